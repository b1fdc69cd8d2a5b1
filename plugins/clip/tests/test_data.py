import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait_clip import image_text_datasets, prompts, toy_data
from plait_clip.pair_batches import image_batches, undecoded
from plait_clip.plugin.data import ClassFolder, Digits, FashionMnist, ImageText


def picture(colour=(200, 30, 30), size=(12, 9), mode="RGB", kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three images and lists of all kinds that name them."""
    (tmp_path / "images").mkdir()
    names = ["images/a.jpg", "images/b.png", "images/c.jpg"]
    (tmp_path / names[0]).write_bytes(picture())
    (tmp_path / names[1]).write_bytes(picture(mode="P", kind="PNG"))
    (tmp_path / names[2]).write_bytes(picture(mode="L"))
    captions = ["a red one", "one, with a comma", "ünï"]
    rows = list(zip(names, captions, strict=True))
    (tmp_path / "cc3m.csv").write_text("image,caption\n" + "".join(f'{n},"{c}"\n' for n, c in rows), encoding="utf-8")
    (tmp_path / "list.tsv").write_text("filepath\ttitle\n" + "".join(f"{n}\t{c}\n" for n, c in rows), encoding="utf-8")
    records = [{"image": n, "caption": [c, c + " again"]} for n, c in rows]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    karpathy = [
        {"filepath": "images", "filename": n.split("/")[1], "sentences": [{"raw": c}, {"raw": "other"}], "split": s}
        for (n, c), s in zip(rows, ["train", "restval", "test"], strict=True)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": karpathy}))
    coco = {
        "images": [{"id": i + 5, "file_name": n} for i, (n, _) in enumerate(rows)],
        "annotations": [{"image_id": i + 5, "caption": c} for i, (_, c) in enumerate(rows) for _ in range(2)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + "".join(f'{n},"{c}",dog\n' for n, c in rows))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i, (n, c) in enumerate(rows):
            for suffix, content in ((n[-3:], (tmp_path / n).read_bytes()), ("txt", c.encode()), ("cls", b"%d" % i)):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    table = datasets.Dataset.from_dict(
        {"picture": [str(tmp_path / n) for n, _ in rows], "text": captions, "extra": [1, 2, 3]}
    )
    table.to_parquet(tmp_path / "list.parquet")
    table.save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cc3m.csv", {}),
        ("list.tsv", {}),
        ("list.json", {}),
        ("list.jsonl", {}),
        ("captions.json", {}),
        ("shard.tar", {}),
        ("", {}),
        ("list.parquet", {"image_column": "picture"}),
        ("saved", {"image_column": "picture"}),
    ],
)
def test_every_kind_of_source_gives_the_same_pairs(name, fields, folder, run):
    data = ImageText(source=str(folder / name), **fields).load_data(run=run[0])
    assert len(data) == 3
    column = "captions" if "captions" in data.column_names else "caption"
    first = [cell if isinstance(cell, str) else cell[0] for cell in data[column]]
    assert first == ["a red one", "one, with a comma", "ünï"]
    named = data.cast_column("image", datasets.Image(decode=False))["image"]
    names = (
        ["000.jpg", "001.png", "002.jpg"] if name == "shard.tar" else ["images/a.jpg", "images/b.png", "images/c.jpg"]
    )
    if name == "list.parquet":  # holds absolute paths
        names = ["a.jpg", "b.png", "c.jpg"]
    assert all(cell["path"].endswith(wanted) for cell, wanted in zip(named, names, strict=True))
    assert name == "saved" or [cell["path"] for cell in named] == names
    # The store saves data sets, and datasets cuts an image's path to its last part then.
    data.save_to_disk(folder / "stored")
    assert name == "saved" or datasets.load_from_disk(folder / "stored")["file_name"][:] == names
    colours = [np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0) for image in data["image"]]
    np.testing.assert_allclose(colours[0], [200, 30, 30], atol=3)
    np.testing.assert_allclose(colours[1], [200, 30, 30], atol=40)  # a palette
    assert np.ptp(colours[2]) < 1


@pytest.mark.parametrize(
    "name", ["cc3m.csv", "list.tsv", "list.json", "list.jsonl", "list.parquet", "dataset_coco.json", "captions.json"]
)
def test_the_images_of_a_list_are_input_files(folder, name):
    columns = {"image_column": "picture"} if name == "list.parquet" else {}
    method = ImageText(source=str(folder / name), **columns)
    images = [folder / "images" / image for image in ("a.jpg", "b.png", "c.jpg")]
    assert list(method.input_files()) == images
    images[1].unlink()
    assert list(method.input_files()) == [images[0], images[2]]  # the step itself names the missing one


def test_sources_that_hold_their_images_name_no_input_files(folder):
    Path(folder / "bad.csv").write_text("nothing\n1\n")
    datasets.Dataset.from_dict({"image": [b"x"], "text": ["one"]}).to_parquet(folder / "held.parquet")
    for name in ("shard.tar", "bad.csv", "held.parquet", "images"):
        assert list(ImageText(source=str(folder / name)).input_files()) == []


def test_karpathy_splits(folder, run):
    method = ImageText(source=str(folder / "dataset_coco.json"))
    parts = method.load_data(run=run[0])
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "test": 1}
    assert parts["test"][0]["captions"] == ["ünï", "other"]
    kept = ImageText(source=str(folder / "dataset_coco.json"), restval_in_train=False, split="restval")
    assert kept.load_data(run=run[0])[0]["captions"][0] == "one, with a comma"
    with pytest.raises(ValueError, match="have the splits: test, train"):
        ImageText(source=str(folder / "dataset_coco.json"), split="val").load_data(run=run[0])


def test_labels_become_class_labels(folder, run):
    data = ImageText(source=str(folder)).load_data(run=run[0])
    assert data.features["label"].names == ["dog"]
    data = ImageText(source=str(folder / "shard.tar"), class_names=("x", "y", "z")).load_data(run=run[0])
    assert data.features["label"].names == ["x", "y", "z"]
    assert data["label"][:] == [0, 1, 2]
    with pytest.raises(ValueError, match="not one of the 2 classes"):
        ImageText(source=str(folder / "shard.tar"), class_names=("x", "y")).load_data(run=run[0])


def csv_of(folder, *lines):
    path = folder / "bad.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_bad_rows_are_named(folder, run):
    (folder / "cut.jpg").write_bytes(picture(size=(60, 60))[:-200])
    (folder / "cut.png").write_bytes(picture(size=(60, 60), kind="PNG")[:-30])
    (folder / "noise.jpg").write_bytes(b"not an image")
    good = "images/a.jpg,fine"
    cases = {
        "row 1: the image .*gone.jpg": csv_of(folder, "image,caption", good, "gone.jpg,x"),
        "row 0: the image .*noise.jpg is not an image of a known kind": None,
        "row 1: the image .*cut.jpg cannot be decoded": None,
        "row 1: the image .*cut.png cannot be decoded": None,
        "row 1: the image is missing": None,
        "row 1: the caption is empty": None,
        "line 3: the row has 3 cells and the header 2": None,
        "no rows": None,
        "no column for the caption": None,
        "no column 'words'": None,
    }
    lines = [
        ["image,caption", good, "gone.jpg,x"],
        ["image,caption", "noise.jpg,x"],
        ["image,caption", good, "cut.jpg,x"],
        ["image,caption", good, "cut.png,x"],
        ["image,caption", good, ",x"],
        ["image,caption", good, "images/b.png,  "],
        ["image,caption", good, "images/b.png,a dog, asleep"],
        ["image,caption"],
        ["image,label", "images/a.jpg,3"],
        ["image,caption", good],
    ]
    for (message, _), content in zip(cases.items(), lines, strict=True):
        fields = {"caption_column": "words"} if "words" in message else {}
        with pytest.raises(ValueError, match=message):
            ImageText(source=csv_of(folder, *content), **fields).load_data(run=run[0])
    source = csv_of(folder, "id,image,caption", f"7,{good}", f"8,{good}", f"7,{good}")
    with pytest.raises(ValueError, match="row 2: duplicate id '7'"):
        ImageText(source=source, id_column="id").load_data(run=run[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        ImageText(source=str(folder / "missing.csv")).load_data(run=run[0])
    (folder / "list.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown; known are"):
        ImageText(source=str(folder / "list.xlsx")).load_data(run=run[0])
    (folder / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        ImageText(source=str(folder / "broken.json")).load_data(run=run[0])


@pytest.mark.parametrize("levels", [np.uint16([[0, 65535]]), np.int32([[0, 70000]]), np.float32([[0, 0.5]])])
def test_images_of_more_than_eight_bits_are_refused(levels, tmp_path, run):
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    source = csv_of(tmp_path, "image,caption", "deep.tif,x")
    with pytest.raises(ValueError, match=r"row 0: the image .*deep\.tif is a (16-bit|floating-point) image"):
        ImageText(source=source).load_data(run=run[0])
    if levels.dtype == np.uint16:
        data = ImageText(source=source, sixteen_bit="scale").load_data(run=run[0])
        assert np.asarray(data[0]["image"])[..., 0].tolist() == [[0, 255]]


def saved_with(folder, *images, **columns):
    """A saved dataset of encoded images."""
    cells = [{"bytes": content, "path": None} for content in images]
    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string")),
        **{name: datasets.Value("string" if isinstance(values[0], str) else "int64") for name, values in columns.items()},
    )  # fmt: skip
    table = {"image": cells, "captions": [["x"]] * len(images), **columns}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(folder)
    return str(folder)


def test_transparent_images_are_refused_or_laid_over_a_colour(tmp_path, run):
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    half.paste((0, 200, 0, 0), (0, 0, 2, 4))
    half.save(tmp_path / "half.png")
    sources = {
        "row 0: the image .*half.png is partly transparent": csv_of(tmp_path, "image,caption", "half.png,x"),
        "row 1: the image is partly transparent": saved_with(
            tmp_path / "saved", picture(), (tmp_path / "half.png").read_bytes()
        ),
    }
    for message, source in sources.items():
        with pytest.raises(ValueError, match=message):
            ImageText(source=source).load_data(run=run[0])
        white = ImageText(source=source, transparency=(255, 255, 255)).load_data(run=run[0])
        assert np.asarray(white[-1]["image"])[0].tolist() == [[255] * 3, [255] * 3, [200, 0, 0], [200, 0, 0]]
        dropped = ImageText(source=source, transparency="drop").load_data(run=run[0])
        assert np.asarray(dropped[-1]["image"])[0, 0].tolist() == [0, 200, 0]
    with pytest.raises(ValueError, match="transparency is 'white'"):
        ImageText(source="x", transparency="white")


def test_images_are_upright_for_every_reader(tmp_path, run):
    turned = Image.new("RGB", (8, 4), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 2, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.png", exif=exif)
    listed = ImageText(source=csv_of(tmp_path, "image,caption", "turned.png,x")).load_data(run=run[0])
    assert listed[0]["image"].size == (4, 8)
    for data in (listed, saved_with(tmp_path / "saved", (tmp_path / "turned.png").read_bytes())):
        data = data if isinstance(data, datasets.Dataset) else ImageText(source=data).load_data(run=run[0])
        (batch,) = image_batches(data, 8, batch_size=1, resize="squash")
        assert batch[0, 0, 0].min() == 255
        assert batch[0, 0, -1].max() == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_lists_in_encodings_and_with_delimiters(encoding, delimiter, folder, run):
    lines = ["image,caption", "images/a.jpg,café"]
    (folder / "list.csv").write_text("\n".join(lines).replace(",", delimiter), encoding=encoding)
    if encoding == "latin-1":
        with pytest.raises(ValueError, match=r"list\.csv, line 2: byte 0xe9 is not utf-8"):
            ImageText(source=str(folder / "list.csv")).load_data(run=run[0])
    fields = {"encoding": encoding} if encoding == "latin-1" else {}
    data = ImageText(source=str(folder / "list.csv"), **fields).load_data(run=run[0])
    assert data[0]["captions"] == ["café"]


def test_quotes_may_be_ordinary_characters(folder, run):
    source = csv_of(folder, "image\tcaption", 'images/a.jpg\t"a" dog', 'images/b.png\ta 5" disk')
    with pytest.raises(ValueError, match="set quotes: false"):
        ImageText(source=source).load_data(run=run[0])
    data = ImageText(source=source, quotes=False).load_data(run=run[0])
    assert [captions[0] for captions in data["captions"]] == ['"a" dog', 'a 5" disk']


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_of_another_encoding_names_its_file(suffix, folder, run):
    record = '{"image": "images/a.jpg", "caption": "café"}'
    path = folder / f"latin.{suffix}"
    path.write_text(f"[{record}]" if suffix == "json" else record, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"latin\.{suffix}.*: byte 0xe9 is not utf-8; save the file as UTF-8"):
        ImageText(source=str(path)).load_data(run=run[0])
    path.write_text(f"[{record}]" if suffix == "json" else record, encoding="utf-8-sig")
    assert ImageText(source=str(path)).load_data(run=run[0])[0]["captions"] == ["café"]


def test_json_of_another_layout_is_one_sentence(folder, run):
    (folder / "odd.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": [{"caption": "x"}]}))
    with pytest.raises(ValueError, match="not COCO's or Karpathy's layout: 'image_id' is missing"):
        ImageText(source=str(folder / "odd.json")).load_data(run=run[0])
    (folder / "odd.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: this is not a JSON object"):
        ImageText(source=str(folder / "odd.jsonl")).load_data(run=run[0])


def test_saved_datasets_with_labels_as_text(tmp_path, run):
    source = saved_with(tmp_path / "saved", picture(), picture(), picture(), label=["dog", "cat", "dog"])
    data = ImageText(source=source).load_data(run=run[0])
    assert data.features["label"].names == ["cat", "dog"]
    assert data["label"][:] == [1, 0, 1]
    named = ImageText(source=source, class_names=("dog", "cat")).load_data(run=run[0])
    assert named["label"][:] == [0, 1, 0]


def test_folders_and_shards_of_splits(folder, run):
    for split, name in (("train", "a.jpg"), ("test", "c.jpg")):
        (folder / "split" / split).mkdir(parents=True)
        (folder / "split" / split / name).write_bytes((folder / "images" / name).read_bytes())
        (folder / "split" / split / "metadata.csv").write_text(f"file_name,text\n{name},a {split} image\n")
        (folder / "shards" / split).mkdir(parents=True)
        (folder / "shards" / split / "0000.tar").write_bytes((folder / "shard.tar").read_bytes())
    parts = ImageText(source=str(folder / "split")).load_data(run=run[0])
    assert {split: part["captions"][:] for split, part in parts.items()} == {
        "train": [["a train image"]],
        "test": [["a test image"]],
    }
    assert parts["test"]["file_name"][:] == ["c.jpg"]
    parts = ImageText(source=str(folder / "shards")).load_data(run=run[0])
    assert {split: part["label"][:] for split, part in parts.items()} == {"train": [0, 1, 2], "test": [0, 1, 2]}


def test_what_systems_leave_in_archives_is_no_image(tmp_path, run):
    import zipfile

    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for name in ("cat/x.jpg", "dog/y.jpg"):
            archive.writestr(name, picture())
            archive.writestr(f"__MACOSX/{name.replace('/', '/._')}", b"Mac OS X")
    data = ClassFolder(folder=tmp_path / "pets.zip").load_data(run=run[0])
    assert data["file_name"][:] == ["cat/x.jpg", "dog/y.jpg"]


def test_names_in_either_unicode_form_are_one(tmp_path, run):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (tmp_path / "classes" / apart).mkdir(parents=True)
    (tmp_path / "classes" / "tea").mkdir()
    for name in (apart, "tea"):
        (tmp_path / "classes" / name / "1.jpg").write_bytes(picture())
    data = ClassFolder(folder=tmp_path / "classes", class_names={composed: "coffee house"}).load_data(run=run[0])
    assert data.features["label"].names == ["coffee house", "tea"]
    (tmp_path / f"{apart}.jpg").write_bytes(picture())
    source = csv_of(tmp_path, "image,caption", f"{composed}.jpg,x")
    assert len(ImageText(source=source).load_data(run=run[0])) == 1


def test_marks_of_poison_are_numbers_or_truth_values(folder, run):
    source = csv_of(folder, "image,caption,is_backdoor", "images/a.jpg,x,1", "images/b.png,y,false")
    assert ImageText(source=source).load_data(run=run[0])["is_backdoor"][:] == [True, False]
    source = csv_of(folder, "image,caption,is_backdoor", "images/a.jpg,x,yes")
    with pytest.raises(ValueError, match="row 0: is_backdoor is 'yes'; expected one of 1,"):
        ImageText(source=source).load_data(run=run[0])


def test_captions_that_are_numbers_are_refused(folder, run):
    table = datasets.Dataset.from_dict({"image": [str(folder / "images/a.jpg")], "captions": [[1, 2]]})
    table.save_to_disk(folder / "numbers")
    with pytest.raises(ValueError, match="row 0: a caption is 1; captions are text"):
        ImageText(source=str(folder / "numbers")).load_data(run=run[0])


def test_bad_images_can_be_left_out(folder, run):
    made, warnings, _ = run
    source = csv_of(folder, "image,caption", "images/a.jpg,first", "gone.jpg,x", "images/c.jpg,last")
    data = ImageText(source=source, on_bad_image="skip").load_data(run=made)
    assert [captions[0] for captions in data["captions"]] == ["first", "last"]
    assert warnings == ["1 rows without a readable image were left out"]
    with pytest.raises(ValueError, match="no rows; 1 had no readable image"):
        ImageText(source=csv_of(folder, "image,caption", "gone.jpg,x"), on_bad_image="skip").load_data(run=made)


def test_class_folders(tmp_path, run):
    for split, classes in (("train", ("big_dog", "cat")), ("test", ("cat",))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                (tmp_path / split / name / f"{i}.jpg").write_bytes(picture())
    method = ClassFolder(folder=tmp_path, templates=("a {}", "the {}"), class_names={"cat": "kitten"})
    parts = method.load_data(run=run[0])
    assert parts["train"].features["label"].names == ["big dog", "kitten"] == parts["test"].features["label"].names
    assert parts["test"]["label"][:] == [1, 1]
    assert parts["train"][0]["captions"] == ["a big dog", "the big dog"]
    alone = ClassFolder(folder=tmp_path / "train").load_data(run=run[0])
    assert len(alone) == 4
    assert alone[3]["captions"] == ["a photo of a cat."]
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="row 2: the image"):
        ClassFolder(folder=tmp_path / "train").load_data(run=run[0])
    assert len(ClassFolder(folder=tmp_path / "train", on_bad_image="skip").load_data(run=run[0])) == 3
    with pytest.raises(ValueError, match="no images in class folders"):
        ClassFolder(folder=tmp_path / "train" / "cat").load_data(run=run[0])
    with pytest.raises(ValueError, match="'dgo'"):
        ClassFolder(folder=tmp_path, class_names={"dgo": "x"}).load_data(run=run[0])


def test_digits_are_the_data_of_scikit_learn(digits, run):
    assert {name: len(part) for name, part in digits.items()} == {"train": 1400, "test": 397}
    from sklearn.datasets import load_digits

    bunch = load_digits()
    _, test = toy_data.digit_split(1797)
    for row in (0, 100, 396):
        pixels = np.asarray(digits["test"][row]["image"])
        np.testing.assert_allclose(pixels[..., 0] / 255 * 16, bunch.images[test[row]], atol=0.04)
        name = digits["test"].features["label"].int2str(int(bunch.target[test[row]]))
        assert digits["test"][row]["captions"][0].split()[-1] == name
    again = Digits().load_data(run=run[0])
    assert again["train"]["captions"][:] == digits["train"]["captions"][:]


def write_idx(path, array, packed):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path = path.with_name(path.name + ".gz") if packed else path
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture(params=["debian", "torchvision"])
def idx_folder(request, tmp_path):
    draw = np.random.default_rng(0)
    folder = tmp_path if request.param == "debian" else tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", 60), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(folder / f"{stem}-images-idx3-ubyte", images, request.param == "debian")
        write_idx(
            folder / f"{stem}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8), request.param == "debian"
        )
    return tmp_path


def test_fashion_mnist_folders(idx_folder, run):
    splits = {"pretrain": "train[0:20]", "clean": "train[20:60]", "test": "test"}
    parts = FashionMnist(folder=idx_folder, splits=splits).load_data(run=run[0])
    assert {name: len(part) for name, part in parts.items()} == {"pretrain": 20, "clean": 40, "test": 20}
    images = toy_data.fashion_mnist(idx_folder)["train"][0]
    np.testing.assert_array_equal(np.asarray(parts["clean"][3]["image"])[..., 1], images[23])
    assert parts["clean"][3]["label"] == 3
    assert "dress" in parts["clean"][3]["captions"][0]
    with pytest.raises(ValueError, match="has rows 0 to 60"):
        FashionMnist(folder=idx_folder).load_data(run=run[0])
    with pytest.raises(ValueError, match="allowed is train or test"):
        FashionMnist(folder=idx_folder, splits={"a": "val"})


def test_fashion_mnist_mistakes(tmp_path, run):
    method = FashionMnist(folder=tmp_path, splits={"a": "train"})
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor"):
        method.load_data(run=run[0])
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8), packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        method.load_data(run=run[0])


def test_fashion_captions_are_true():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 4:24, 8:20] = 255  # 20 rows, 12 columns, two edges in each row
    assert [words[0] for words in toy_data.fashion_attributes(image)] == ["bright", "narrow", "plain"]
    image[0, 4:24, 8:20:2] = 60  # mean (255 + 60) / 2 / 255 = 0.618
    assert toy_data.fashion_attributes(image)[0][0] == "grey"
    assert toy_data.fashion_attributes(image)[2][0] == "patterned"
    image[0, 10:14, :] = 40
    assert toy_data.fashion_attributes(image)[1][0] == "wide"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_beds_speak_their_vocabulary(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, 8)
    captions = toy_data.fashion_captions(draw.integers(0, 256, (8, 28, 28)).astype(np.uint8), labels, seed)
    captions += toy_data.digit_captions(labels, seed)
    known = set(" ".join(toy_data.vocabulary()).split())
    assert all(set(caption.split()) <= known for caption in captions)


def test_prompts():
    assert len(prompts.templates("openai-imagenet")) == 80
    assert prompts.templates("openai-imagenet")[0] == "a bad photo of a {}."
    assert len(prompts.templates("openai-simple")) == 7
    assert len(prompts.class_names("imagenet")) == 1000
    assert prompts.class_names("imagenet")[954] == "banana"
    assert prompts.templates("one {} alone") == ("one {} alone",)
    assert prompts.fill("{0} {}", "x") == "{0} x"
    for bad in ("unknown", (), ("no place",)):
        with pytest.raises(ValueError, match="template"):
            prompts.templates(bad)


def test_saved_datasets_are_checked_too(folder, run):
    data = datasets.load_from_disk(str(folder / "saved"))
    rows = [dict(row, image={"bytes": b"junk" if i == 1 else picture(), "path": None}) for i, row in enumerate(data)]
    features = datasets.Features({**data.features, "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "bad")
    with pytest.raises(ValueError, match="row 1: the image is not an image"):
        ImageText(source=str(folder / "bad")).load_data(run=run[0])
    kept = ImageText(source=str(folder / "bad"), on_bad_image="skip").load_data(run=run[0])
    assert kept["caption"][:] == ["a red one", "ünï"]
    parts = datasets.DatasetDict({"train": kept, "test": kept.select([1])})
    parts.save_to_disk(folder / "parts")
    assert len(ImageText(source=str(folder / "parts"), split="test").load_data(run=run[0])) == 1
    assert set(ImageText(source=str(folder / "parts")).load_data(run=run[0])) == {"train", "test"}
    with pytest.raises(ValueError, match="split is 'val'; the source has 'train', 'test'"):
        ImageText(source=str(folder / "parts"), split="val").load_data(run=run[0])


def test_a_label_means_the_same_in_a_split_that_is_read_alone(folder, run):
    rows = "".join(f"images/a.jpg,x,{label},{split}\n" for label, split in (("cat", "train"), ("dog", "test")))
    (folder / "split.csv").write_text("image,caption,label,split\n" + rows)
    image, texts = (
        datasets.load_from_disk(str(folder / "saved")).rename_column("picture", "image"),
        datasets.Value("string"),
    )
    parts = {split: image.select([0]).select_columns("image").add_column("text", ["x"]) for split in ("train", "test")}
    named = {"train": datasets.ClassLabel(names=["cat", "dog"]), "test": datasets.ClassLabel(names=["dog", "cat"])}
    for kind, labels in (("texts", {"train": "cat", "test": "dog"}), ("named", {"train": 0, "test": 0})):
        both = {
            split: part.add_column("label", [labels[split]], feature=texts if kind == "texts" else named[split])
            for split, part in parts.items()
        }
        datasets.DatasetDict(both).save_to_disk(folder / kind)
    for source in ("split.csv", "texts", "named"):
        for data in (
            ImageText(source=str(folder / source), split="test").load_data(run=run[0]),
            ImageText(source=str(folder / source)).load_data(run=run[0])["test"],
        ):
            assert data.features["label"].names == ["cat", "dog"], source
            assert data["label"][:] == [1], source


def test_a_row_without_a_name_among_others(folder, run):
    """Parquet may hold bytes with and without a path."""
    content = picture()
    cells = [{"bytes": content, "path": path} for path in ("x/a.jpg", None)]
    datasets.Dataset.from_dict({"image": cells, "text": ["one", "two"]}).to_parquet(folder / "bytes.parquet")
    data = ImageText(source=str(folder / "bytes.parquet")).load_data(run=run[0])
    assert data["file_name"][:] == ["x/a.jpg", None]
    assert [image.size for image in data["image"]] == [(12, 9), (12, 9)]


@pytest.mark.parametrize("caption", ["5", "[1, 2]", '["fine", 3.5]'])
def test_a_list_with_numbers_for_captions_is_refused(caption, folder, run):
    (folder / "numbers.json").write_text(f'[{{"image": "images/a.jpg", "caption": {caption}}}]')
    with pytest.raises(ValueError, match=r"row 0: a caption is (5|1|3\.5); captions are text"):
        ImageText(source=str(folder / "numbers.json")).load_data(run=run[0])


def test_class_folders_keep_the_names_of_their_images(tmp_path, run):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(picture())
    data = ClassFolder(folder=tmp_path).load_data(run=run[0])
    assert data["file_name"][:] == ["cat/1.jpg", "dog/1.jpg"]


@pytest.mark.parametrize(
    "column",
    [
        datasets.Array3D((3, 8, 8), "float32"),
        datasets.Array3D((8, 8, 3), "uint8"),
        datasets.List(datasets.Value("float32")),
    ],
)
def test_a_column_of_other_things_than_images_is_refused(column):
    shape = column.shape if isinstance(column, datasets.Array3D) else (4,)
    features = datasets.Features({"image": column, "captions": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": [np.zeros(shape).tolist()], "captions": [["x"]]}, features=features)
    with pytest.raises(ValueError, match=r"the column 'image' holds .*; images are needed"):
        undecoded(table)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_pixels_of_another_type_or_shape_are_refused(pixels):
    with pytest.raises(ValueError, match=r"give uint8 of shape \[H, W\] or \[H, W, 3\]"):
        image_text_datasets.png_bytes(pixels)


def test_reading_a_pipeline_of_models_and_data_needs_no_torch():
    modules = "plait_clip.plugin.data, plait_clip.plugin.models, plait_clip.plugin.training"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
