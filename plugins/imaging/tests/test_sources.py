"""Sources: every image arrives unchanged under its name, and a bad folder is refused in one sentence."""

import hashlib
import unicodedata
import zipfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from plait import Run
from plait_imaging.sources import PHOTOS, HFDataset, ImageFolder, ImagePairs, Photos, photograph


def save(path, shape=(6, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


def test_photos_defaults_are_two_tiles_of_each_photograph_at_the_stated_places():
    splits = Photos().load_data(Run())
    assert {split: data["name"][:] for split, data in splits.items()} == {
        "reference": ["astronaut_0", "astronaut_1", "china_0", "china_1", "rocket_0", "rocket_1"],
        "test": ["chelsea_0", "chelsea_1", "coffee_0", "coffee_1", "flower_0", "flower_1"],
    }
    for data in splits.values():
        for row in data:
            top, left = PHOTOS[row["photo"]][int(row["name"][-1])]
            tile = photograph(row["photo"])[top : top + 256, left : left + 256]
            assert tile.shape == (256, 256, 3)
            assert np.array_equal(np.array(row["image"]), tile)


def test_photos_grid_never_overlaps_and_says_how_many_fit():
    data = Photos(splits={"all": ("chelsea",)}, tile_size=100, tiles_per_photo=12, layout="grid").load_data(Run())[
        "all"
    ]
    assert len({hashlib.sha256(np.array(row["image"]).tobytes()).digest() for row in data}) == 12
    with pytest.raises(ValueError, match=r"chelsea \(300×451 pixels\) holds 12 tiles of 100 pixels"):
        Photos(splits={"all": ("chelsea",)}, tile_size=100, tiles_per_photo=13, layout="grid").load_data(Run())


def test_photos_refuses_a_photograph_in_two_splits_and_unknown_ones():
    with pytest.raises(ValueError, match="'china' is in splits a and b"):
        Photos(splits={"a": ("china",), "b": ("china", "rocket")})
    with pytest.raises(ValueError, match="names 'lena'; allowed is astronaut"):
        Photos(splits={"a": ("lena",)})
    with pytest.raises(ValueError, match="names no photograph"):
        Photos(splits={})
    with pytest.raises(ValueError, match="layout: grid"):
        Photos(tiles_per_photo=3)
    with pytest.raises(ValueError, match="does not fit"):
        Photos(tile_size=400).load_data(Run())


def test_folder_sorted_by_name_with_file_bytes_kept(tmp_path):
    arrays = {name: save(tmp_path / f"{name}.png", seed=i) for i, name in enumerate(["b", "a", "c"])}
    (tmp_path / ".DS_Store").write_text("hidden")
    save(tmp_path / "sub" / "d.png")
    data = ImageFolder(folder=tmp_path).load_data(Run())
    assert data["name"][:] == ["a", "b", "c"]
    assert all(np.array_equal(np.array(row["image"]), arrays[row["name"]]) for row in data)
    assert ImageFolder(folder=tmp_path, recursive=True).load_data(Run())["name"][:] == ["a", "b", "c", "sub/d"]


def test_folder_of_jpegs_is_not_recompressed(tmp_path):
    save(tmp_path / "a.jpg", (64, 64))
    data = ImageFolder(folder=tmp_path).load_data(Run())
    assert np.array_equal(np.array(data[0]["image"]), np.array(Image.open(tmp_path / "a.jpg")))
    raw = data.with_format("arrow")[:1]["image"].to_pylist()[0]["bytes"]
    assert raw == (tmp_path / "a.jpg").read_bytes()


def test_folder_bad_input(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.txt is not an image by its suffix; .*other_files: skip"):
        ImageFolder(folder=tmp_path).load_data(Run())
    assert len(ImageFolder(folder=tmp_path, other_files="skip").load_data(Run())) == 1
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png cannot be decoded"):
        ImageFolder(folder=tmp_path, other_files="skip").load_data(Run())
    (tmp_path / "b.png").write_text("text in disguise")
    with pytest.raises(ValueError, match=r"b\.png is not an image"):
        ImageFolder(folder=tmp_path, other_files="skip").load_data(Run())
    with pytest.raises(ValueError, match="none does not exist; give a folder, a zip or a tar"):
        ImageFolder(folder=tmp_path / "none").load_data(Run())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        ImageFolder(folder=tmp_path / "empty").load_data(Run())


def test_folder_16_bit_and_greyscale_are_for_a_field_to_decide(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 7, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png is a 16-bit image"):
        ImageFolder(folder=tmp_path).load_data(Run())
    data = ImageFolder(folder=tmp_path, sixteen_bit="scale").load_data(Run())
    assert np.array(data[0]["image"]).tolist() == np.full((4, 4, 3), 7).tolist()
    with pytest.raises(ValueError, match=r"deep\.png is a greyscale image"):
        ImageFolder(folder=tmp_path, sixteen_bit="scale", greyscale="refuse").load_data(Run())


def test_folder_two_files_of_one_stem(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="share the stem a"):
        ImageFolder(folder=tmp_path).load_data(Run())


def test_turned_photographs_stand_upright(tmp_path):
    array = save(tmp_path / "a.png", (6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    data = ImageFolder(folder=tmp_path).load_data(Run())
    assert np.array_equal(np.array(data[0]["image"]), np.rot90(array, -1))


def test_pairs_matched_by_stem(tmp_path):
    for i in range(3):
        save(tmp_path / "lq" / f"{i}x2.png", (6, 8), i)
        save(tmp_path / "gt" / f"{i}.png", (12, 16), 10 + i)
    data = ImagePairs(inputs=tmp_path / "lq", targets=tmp_path / "gt", input_suffix="x2", scale=2).load_data(Run())
    assert data["name"][:] == ["0", "1", "2"]
    assert np.array_equal(np.array(data[1]["target"]), np.array(Image.open(tmp_path / "gt" / "1.png")))
    assert np.array_equal(np.array(data[1]["image"]), np.array(Image.open(tmp_path / "lq" / "1x2.png")))


def test_zips_and_what_systems_leave_behind(tmp_path):
    array = save(tmp_path / "in" / "a.png")
    content = (tmp_path / "in" / "a.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a.png", content)
        archive.writestr("__MACOSX/._a.png", b"x")
        archive.writestr(".DS_Store", b"x")
    for folder in (tmp_path / "in.zip", tmp_path / "in"):
        (data,) = ImageFolder(folder=folder, recursive=True).load_data(Run())
        assert data["name"] == "a"
        assert np.array_equal(np.array(data["image"]), array)


def test_pairs_of_a_mac_and_of_others_are_partners(tmp_path):
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save(tmp_path / "lq" / f"{one}.png")
    save(tmp_path / "gt" / f"{two}.png")
    data = ImagePairs(inputs=tmp_path / "lq", targets=tmp_path / "gt").load_data(Run())
    assert data["name"][:] == [one]


def test_what_lies_behind_transparent_images(tmp_path):
    Image.fromarray(np.zeros((2, 2, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is partly transparent"):
        ImageFolder(folder=tmp_path).load_data(Run())
    data = ImageFolder(folder=tmp_path, transparency=(255, 0, 9)).load_data(Run())
    assert np.array(data[0]["image"])[0, 0].tolist() == [255, 0, 9]
    with pytest.raises(ValueError, match="transparency is 'white'; allowed is 'refuse', 'drop' or a colour"):
        ImageFolder(folder=tmp_path, transparency="white")


def test_pairs_bad_input(tmp_path):
    for i in range(5):
        save(tmp_path / "lq" / f"{i}.png")
    save(tmp_path / "gt" / "0.png")
    pairs = ImagePairs(inputs=tmp_path / "lq", targets=tmp_path / "gt")
    with pytest.raises(ValueError, match=r"gt has no counterpart of 4 images: 1, 2, 3 …"):
        pairs.load_data(Run())
    for i in range(1, 5):
        save(tmp_path / "gt" / f"{i}.png")
    save(tmp_path / "gt" / "extra.png")
    with pytest.raises(ValueError, match=r"lq has no counterpart of 1 images: extra"):
        pairs.load_data(Run())
    (tmp_path / "gt" / "extra.png").unlink()
    save(tmp_path / "gt" / "3.png", (6, 9))
    with pytest.raises(ValueError, match="pair 3: the input is 6×8 pixels and the target 6×9"):
        pairs.load_data(Run())


def hf_dataset(tmp_path, **columns):
    save(tmp_path / "a.png")
    data = {"lq": [Image.open(tmp_path / "a.png")] * 2, "gt": [Image.open(tmp_path / "a.png")] * 2, **columns}
    return Dataset.from_dict(data)


def test_hf_dataset_from_disk_with_columns_mapped_and_classes_kept(tmp_path):
    labelled = hf_dataset(tmp_path, label=[0, 1]).cast_column("label", ClassLabel(names=["cat", "dog"]))
    DatasetDict({"train": labelled, "test": labelled}).save_to_disk(tmp_path / "d")
    source = HFDataset(path=str(tmp_path / "d"), columns={"image": "lq", "target": "gt"})
    splits = source.load_data(Run())
    assert set(splits) == {"train", "test"}
    assert set(splits["train"].column_names) == {"image", "target", "label", "name"}
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["train"]["name"][:] == ["0", "1"]
    one = HFDataset(path=str(tmp_path / "d"), split="test", columns={"image": "lq"}).load_data(Run())
    assert isinstance(one, Dataset)


def test_hf_dataset_of_a_plain_image_folder_is_named_by_file(tmp_path):
    for name in ("p", "q"):
        save(tmp_path / "train" / "cat" / f"{name}.png")
    data = HFDataset(path=str(tmp_path), split="train").load_data(Run())
    assert sorted(data["name"]) == ["p", "q"]


def test_hf_dataset_bad_input(tmp_path):
    hf_dataset(tmp_path, text=["a", "b"]).save_to_disk(tmp_path / "d")
    path = str(tmp_path / "d")
    with pytest.raises(ValueError, match="no column 'image' but lq, gt, text"):
        HFDataset(path=path).load_data(Run())
    with pytest.raises(ValueError, match=r"columns\.image is 'photo'; data has lq, gt, text"):
        HFDataset(path=path, columns={"image": "photo"}).load_data(Run())
    with pytest.raises(ValueError, match="without splits"):
        HFDataset(path=path, split="train", columns={"image": "lq"}).load_data(Run())
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="could not be loaded as a dataset"):
        HFDataset(path=str(tmp_path / "void")).load_data(Run())
