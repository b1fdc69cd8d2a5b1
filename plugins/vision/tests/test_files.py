"""Folders, zips and tars give the same classes, splits and bytes; what is unclear is refused."""

import io
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image
from plait_vision.files import Files, by_stem, class_folders, labels_from_table, tar_samples


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def laid_out(folder, kind, contents):
    """A folder, zip or tar with these files."""
    if kind == "folder":
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder
    path = folder / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


KINDS = ["folder", "zip", "tar", "tar.gz"]
CLUTTER = {
    "__MACOSX/cat/._a.png": b"x", "__MACOSX/._cat": b"x", "cat/Thumbs.db": b"x", "cat/.hidden.png": b"x",
    "cat/._a.png": b"x", ".git/x/y.png": b"x", "cat/notes.txt": b"x", "README.md": b"x",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_class_folders_without_what_systems_leave_behind(tmp_path, kind):
    contents = {"cat/a.png": png(0), "cat/b.JPG": png(1), "dog/a.png": png(2)}
    with Files(laid_out(tmp_path, kind, contents | CLUTTER)) as files:
        assert class_folders(files) == {"": {"cat": ["cat/a.png", "cat/b.JPG"], "dog": ["dog/a.png"]}}
        assert {name: files.read(name) for name in files.images} == contents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["", "pets/", "data/pets/"])
def test_splits_between_with_a_folder_around(tmp_path, kind, around):
    contents = {f"{around}train/cat/a.png": png(), f"{around}train/dog/a.png": png(), f"{around}val/cat/a.png": png()}
    with Files(laid_out(tmp_path, kind, contents | {f"{around}labels.txt": b"x"})) as files:
        found = class_folders(files)
    assert {split: sorted(classes) for split, classes in found.items()} == {"train": ["cat", "dog"], "val": ["cat"]}


def test_one_split_alone_and_a_folder_around_classes(tmp_path):
    with Files(laid_out(tmp_path / "a", "folder", {"test/cat/a.png": png()})) as files:
        assert class_folders(files) == {"test": {"cat": ["test/cat/a.png"]}}
    with Files(laid_out(tmp_path / "b", "folder", {"pets/cat/a.png": png(), "pets/dog/a.png": png()})) as files:
        assert class_folders(files) == {"": {"cat": ["pets/cat/a.png"], "dog": ["pets/dog/a.png"]}}


def test_layouts_that_are_no_classes(tmp_path):
    flat = laid_out(tmp_path / "flat", "folder", {"a.png": png()})
    with pytest.raises(ValueError, match="has no images in class folders"):
        class_folders(Files(flat))
    with pytest.raises(ValueError, match="has no images in class folders"):
        class_folders(Files(laid_out(tmp_path / "none", "folder", {"cat/a.txt": b"x"})))
    mixed = laid_out(tmp_path / "mixed", "folder", {"cat/a.png": png(), "cat/kitten/b.png": png()})
    with pytest.raises(ValueError, match=r"different or too great depths \(cat/a\.png, cat/kitten/b\.png\)"):
        class_folders(Files(mixed))
    with pytest.raises(ValueError, match="does not exist"):
        Files(tmp_path / "missing")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="is neither a folder nor a zip or tar"):
        Files(tmp_path / "x.txt")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_names_of_macs_and_of_others_are_one(tmp_path, kind):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert one != two
    with Files(laid_out(tmp_path, kind, {f"train/{one}/a.png": png(), f"test/{two}/b.png": png(1)})) as files:
        found = class_folders(files)
        assert found == {"test": {one: [f"test/{one}/b.png"]}, "train": {one: [f"train/{one}/a.png"]}}
        assert files.read(f"test/{one}/b.png") == png(1)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_two_names_that_differ_in_form_alone(tmp_path, kind):
    names = [unicodedata.normalize(form, "x/é.png") for form in ("NFC", "NFD")]
    with pytest.raises(ValueError, match=r"has a duplicate x/é\.png"):
        Files(laid_out(tmp_path, kind, dict.fromkeys(names, png())))


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = laid_out(tmp_path / "a", "folder", {"cat/a.png": png()})
    other = laid_out(tmp_path / "b", "folder", {"b.png": png()})
    (folder / "dog").symlink_to(other)
    (folder / "cat" / "back").symlink_to(folder)
    assert class_folders(Files(folder)) == {"": {"cat": ["cat/a.png"], "dog": ["dog/b.png"]}}


def test_zips_of_windows_and_damaged_ones(tmp_path):
    path = laid_out(tmp_path, "zip", {"train\\cat\\a.png": png()})
    with Files(path) as files:
        assert class_folders(files) == {"train": {"cat": ["train/cat/a.png"]}}
        assert files.read("train/cat/a.png") == png()
    content = path.read_bytes().replace(png()[-20:], bytes(20), 1)
    path.write_bytes(content)
    with Files(path) as files, pytest.raises(ValueError, match=r"images\.zip/train/cat/a\.png cannot be read: Bad CRC"):
        files.read("train/cat/a.png")


def test_stems(tmp_path):
    assert by_stem(["b/x.png", "a.jpg"], "d") == {"a": "a.jpg", "b/x": "b/x.png"}
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png in d share the stem a"):
        by_stem(["a.png", "a.jpg"], "d")


def table(folder, text):
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


def test_labels_of_a_table(tmp_path):
    files = Files(laid_out(tmp_path, "folder", {f"images/{i}.png": png(i) for i in range(3)}))
    wanted = {"train": {"cat": ["images/0.png"], "dog": ["images/2.png"]}, "test": {"cat": ["images/1.png"]}}
    for names in (["images/{}.png"] * 3, ["./images/{}.png", "{}.png", "{}"]):
        lines = [f"{name.format(i)},{c},{s}" for i, (name, c, s) in enumerate(zip(names, ["cat", "cat", "dog"], ["train", "test", "train"], strict=True))]  # fmt: skip
        assert labels_from_table(files, table(tmp_path, "\n".join(["file_name,label,split", *lines]))) == wanted
    text = "img;kind\n0;a\n1;b\n2;a"
    assert labels_from_table(files, table(tmp_path, text), file_column="img", label_column="kind") == {
        "": {"a": ["images/0.png", "images/2.png"], "b": ["images/1.png"]}
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file,label\n9,cat", r"labels\.csv, line 2: '9' is not an image of"),
        ("file,label\n0,cat\n0.png,dog", r"line 3: images/0\.png has a label in line 2 already"),
        ("file,label\n0,cat\n1,", "line 3: column 'label' is empty"),
        ("file,label\n0,cat", r"has no row for 1 of the images .*: images/1\.png"),
        ("file,label\n", "has no row for 2 of the images"),
        ("x,label\n0,cat", r"has no column of files \(file_name, filename.*its columns are x, label"),
        ("file,x\n0,cat", "has no column of labels"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, sentence):
    files = Files(laid_out(tmp_path, "folder", {f"images/{i}.png": png(i) for i in range(2)}))
    with pytest.raises(ValueError, match=sentence):
        labels_from_table(files, table(tmp_path, text))


def test_names_that_may_be_several_images(tmp_path):
    files = Files(laid_out(tmp_path, "folder", {"x/a.png": png(), "y/a.png": png()}))
    with pytest.raises(ValueError, match=r"'a' may be x/a\.png or y/a\.png in"):
        labels_from_table(files, table(tmp_path, "file,label\na,cat"))


def test_samples_of_a_shard(tmp_path):
    contents = {
        "s/0.cls": b"3\n", "s/0.jpg": b"image", "s/._0.jpg": b"x", "s/1.PNG": b"other", "s/1.cls": b"cat",
        "s/1.seg.png": b"mask", "2.txt": "Bär".encode(),
    }  # fmt: skip
    samples = list(tar_samples(laid_out(tmp_path, "tar", contents)))
    assert [sample.key for sample in samples] == ["s/0", "s/1", "2"]
    assert samples[0].image == ("s/0.jpg", b"image")
    assert samples[0].text("cls") == "3"
    assert samples[1].image == ("s/1.png", b"other")
    assert (samples[2].image, samples[2].text("txt"), samples[2].text("cls")) == (None, "Bär", None)


def test_shards_that_are_mixed_up_or_damaged(tmp_path):
    path = laid_out(tmp_path, "tar", {"0.jpg": b"a", "1.jpg": b"b", "0.cls": b"1"})
    with pytest.raises(ValueError, match="0 is a duplicate, or its files do not lie next to one another"):
        list(tar_samples(path))
    with pytest.raises(ValueError, match=r"0\.txt is not UTF-8"):
        next(tar_samples(laid_out(tmp_path, "tar", {"0.txt": b"\xff\xfe\xfa"}))).text("txt")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"images\.tar cannot be read as a tar"):
        list(tar_samples(path))
