"""``labelled-images``: the same images and classes whatever they come in."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_from_disk
from PIL import Image as PILImage
from plait import Run
from plait_vision.plugin import LabelledImages

ARRAYS = {name: np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8) for i, name in enumerate("abcd")}
CLASSES = {"a": "dog", "b": "cat", "c": "dog", "d": "cat"}


def png(array):
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path, contents):
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, contents):
    path.mkdir()
    with zipfile.ZipFile(path / "pets.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path / "pets.zip"


def tarred(path, contents):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def by_class_folder():
    return {f"{CLASSES[name]}/{name}.png": png(array) for name, array in ARRAYS.items()}


def sources(tmp_path):
    """Every way to write down the same four images."""
    yield {"source": folder(tmp_path / "folders", by_class_folder())}
    yield {"source": zipped(tmp_path / "zip", {f"pets/{name}": content for name, content in by_class_folder().items()})}
    yield {"source": tarred(tmp_path / "folders.tar", by_class_folder())}
    flat = folder(tmp_path / "flat", {f"{name}.png": png(array) for name, array in ARRAYS.items()})
    (tmp_path / "labels.tsv").write_text("file\tclass\n" + "".join(f"{n}\t{c}\n" for n, c in CLASSES.items()))
    yield {"source": flat, "labels": tmp_path / "labels.tsv"}
    samples = [{f"{n}.png": png(array), f"{n}.cls": CLASSES[n].encode()} for n, array in ARRAYS.items()]
    yield {"source": tarred(tmp_path / "samples.tar", {k: v for sample in samples for k, v in sample.items()})}
    for number in (0, 1):
        two = samples[2 * number : 2 * number + 2]
        tarred(tmp_path / "shards" / f"pets-{number:04}.tar", {k: v for sample in two for k, v in sample.items()})
    yield {"source": tmp_path / "shards"}
    texts = Dataset.from_dict(
        {
            "photo": [{"bytes": png(array), "path": f"{n}.png"} for n, array in ARRAYS.items()],
            "kind": list(CLASSES.values()),
        }
    ).cast_column("photo", Image())
    texts.save_to_disk(tmp_path / "texts")
    yield {"source": tmp_path / "texts", "image_column": "photo", "label_column": "kind"}
    texts.cast_column("kind", ClassLabel(names=["dog", "cat"])).save_to_disk(tmp_path / "labels")
    yield {"source": tmp_path / "labels", "image_column": "photo", "label_column": "kind"}


def test_every_source_gives_the_same_images_and_classes(tmp_path):
    wanted = {array.tobytes(): CLASSES[name] for name, array in ARRAYS.items()}
    for fields in sources(tmp_path):
        data = LabelledImages(**fields).load_data(Run())
        assert data.column_names == ["image", "label", "name"], fields
        names = data.features["label"].names
        assert {np.array(row["image"]).tobytes(): names[row["label"]] for row in data} == wanted, fields
        assert sorted(name.rpartition("/")[2] for name in data["name"]) == ["a.png", "b.png", "c.png", "d.png"], fields
        data.save_to_disk(tmp_path / "saved")
        assert load_from_disk(tmp_path / "saved").features == data.features


def test_splits_share_their_classes_wherever_they_come_from(tmp_path):
    contents = {
        "train/dog/a.png": png(ARRAYS["a"]),
        "test/dog/b.png": png(ARRAYS["b"]),
        "test/cat/c.png": png(ARRAYS["c"]),
    }
    shards = {
        f"{split}{i}": tarred(tmp_path / "shards" / f"{split}-{i}.tar", {"x.png": png(ARRAYS[n]), "x.cls": label})
        for i, (split, n, label) in enumerate([("train", "a", b"dog"), ("test", "b", b"dog"), ("test", "c", b"cat")])
    }
    assert len(shards) == 3
    parts = {
        "train": Dataset.from_dict({"image": [{"bytes": png(ARRAYS["a"]), "path": None}], "label": ["dog"]}),
        "test": Dataset.from_dict(
            {"image": [{"bytes": png(ARRAYS[n]), "path": None} for n in "bc"], "label": ["dog", "cat"]}
        ),
    }
    DatasetDict({split: part.cast_column("image", Image()) for split, part in parts.items()}).save_to_disk(
        tmp_path / "saved"
    )
    for source in (folder(tmp_path / "folders", contents), tmp_path / "shards", tmp_path / "saved"):
        data = LabelledImages(source=source).load_data(Run())
        assert {split: len(part) for split, part in data.items()} == {"train": 1, "test": 2}
        assert [part.features["label"].names for part in data.values()] == [["cat", "dog"]] * 2
        assert data["train"]["label"][:] == [1]
        test = LabelledImages(source=source, split="test", max_per_class=1).load_data(Run())
        assert sorted(test["label"]) == [0, 1]
        train = LabelledImages(source=source, split="train").load_data(Run())  # has no cat
        assert train.features["label"].names == ["cat", "dog"]
        assert train["label"][:] == [1]
        with pytest.raises(ValueError, match=r"split is 'val'; .* has (train, test|test, train)"):
            LabelledImages(source=source, split="val").load_data(Run())


def test_numbers_of_tables_and_shards_are_those_of_the_classes(tmp_path):
    samples = {"a.png": png(ARRAYS["a"]), "a.cls": b"10\n", "b.png": png(ARRAYS["b"]), "b.json": b'{"label": 2}'}
    data = LabelledImages(source=tarred(tmp_path / "x.tar", samples)).load_data(Run())
    assert data["label"][:] == [10, 2]
    assert data.features["label"].num_classes == 11
    names = tuple(f"class {i}" for i in range(12))
    data = LabelledImages(source=tmp_path / "x.tar", class_names=names).load_data(Run())
    assert data.features["label"].names == list(names)
    with pytest.raises(ValueError, match="label 10 is not one of the 2 classes"):
        LabelledImages(source=tmp_path / "x.tar", class_names=("a", "b")).load_data(Run())
    # Folders are names, as everywhere: in alphabetical order.
    tens = folder(tmp_path / "tens", {f"{n}/a.png": png(ARRAYS["a"]) for n in (1, 2, 10)})
    assert LabelledImages(source=tens).load_data(Run()).features["label"].names == ["1", "10", "2"]


def test_a_split_alone_has_the_classes_of_all_its_rows_without_one_aside(tmp_path):
    flat = folder(tmp_path / "flat", {f"{name}.png": png(array) for name, array in ARRAYS.items()})
    (tmp_path / "labels.csv").write_text("file,label,split\na,3,train\nb,0,train\nc,1,test\nd,0,test\n")
    test = LabelledImages(source=flat, labels=tmp_path / "labels.csv", split="test").load_data(Run())
    assert test.features["label"].num_classes == 4
    cell = {"bytes": png(ARRAYS["a"]), "path": None}
    parts = {"train": ["dog", "cat"], "test": [None, None]}
    saved = {split: Dataset.from_dict({"image": [cell, cell], "label": labels}) for split, labels in parts.items()}
    DatasetDict({split: part.cast_column("image", Image()) for split, part in saved.items()}).save_to_disk(
        tmp_path / "saved"
    )
    assert LabelledImages(source=tmp_path / "saved", split="train").load_data(Run())["label"][:] == [1, 0]


def test_what_cannot_be_read_is_named(tmp_path):
    contents = by_class_folder() | {"cat/e.png": png(ARRAYS["a"])[:60]}
    for source in (
        folder(tmp_path / "f", contents),
        zipped(tmp_path / "z", contents),
        tarred(tmp_path / "t.tar", contents),
    ):
        with pytest.raises(ValueError, match=r"(f|pets\.zip|t\.tar)/cat/e\.png cannot be decoded"):
            LabelledImages(source=source).load_data(Run())
    with pytest.raises(ValueError, match=r"x/a has no image but cls"):
        LabelledImages(source=tarred(tmp_path / "no.tar", {"x/a.cls": b"1"})).load_data(Run())
    half = tarred(tmp_path / "half.tar", {"a.png": png(ARRAYS["a"]), "a.cls": b"1", "b.png": png(ARRAYS["b"])})
    with pytest.raises(ValueError, match=r"/b has no class: .*b\.cls is missing or empty"):
        LabelledImages(source=half).load_data(Run())
    saved = Dataset.from_dict({"image": [{"bytes": b"text", "path": "x.png"}], "label": [0]}).cast_column(
        "image", Image()
    )
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved, row 0 \(x\.png\) is not an image"):
        LabelledImages(source=tmp_path / "saved").load_data(Run())
    with pytest.raises(ValueError, match="has no column 'kind'; name one of image, label by label_column"):
        LabelledImages(source=tmp_path / "saved", label_column="kind").load_data(Run())


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="transparency is 'dorp'; allowed is 'refuse', 'drop' or a colour"):
        LabelledImages(source="x", transparency="dorp")
    with pytest.raises(ValueError, match="sixteen_bit is 'keep'"):
        LabelledImages(source="x", sixteen_bit="keep")
    with pytest.raises(ValueError, match="give labels, or leave them out"):
        LabelledImages(source="x", delimiter=";")


def test_transparent_images_over_a_colour(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    source = folder(tmp_path, {"cat/a.png": png(pixels)})
    with pytest.raises(ValueError, match=r"cat/a\.png is partly transparent"):
        LabelledImages(source=source).load_data(Run())
    data = LabelledImages(source=source, transparency=(255, 255, 255)).load_data(Run())
    assert np.array(data[0]["image"]).tolist() == np.full((2, 2, 3), 255).tolist()
