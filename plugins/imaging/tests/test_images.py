"""Between datasets and tensors: nothing is lost, and what cannot be read is named in one sentence."""

import unicodedata

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from plait import Run
from plait_imaging import images
from plait_vision import writing


def dataset_of(arrays, labels=None):
    labels = labels or [f"n{i}" for i in range(len(arrays))]
    features = Features({"image": Image(), "name": Value("string"), "label": Value("int64")})
    pictures = [PILImage.fromarray(array) for array in arrays]
    return Dataset.from_dict({"image": pictures, "name": labels, "label": list(range(len(arrays)))}, features=features)


def random_arrays(*shapes):
    return [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]


def test_all_levels_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(levels)), levels)


def test_rounding_is_to_the_nearest_level_and_clips():
    values = torch.tensor([-1.0, 0.4999 / 255, 0.501 / 255, 254.6 / 255, 7.0])
    assert images.to_uint8(values).tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_level_stands_for_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        images.to_uint8(torch.tensor([bad]))
    with pytest.raises(ValueError, match="image n1 came out with NaN"):
        images.write_images(
            Run(), dataset_of(random_arrays((4, 4), (4, 4))), [torch.zeros(3, 4, 4), torch.full((3, 4, 4), bad)]
        )


def test_the_255_scale_is_told_from_overshoots():
    levels = torch.full((3, 4, 4), 90.0)
    with pytest.raises(ValueError, match=r"values from 90 to 90 where \[0, 1\] is expected, as on the 0–255 scale"):
        images.to_uint8(levels)
    with pytest.raises(ValueError, match=r"image n0 came out with values from 90 .*; nothing was written"):
        images.write_images(Run(), dataset_of(random_arrays((4, 4))), [levels])
    assert images.to_uint8(torch.full((3, 4, 4), 1.4)).unique().tolist() == [255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_levels_survive_in_every_precision_that_has_them(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(levels).to(dtype)), levels)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_reading_gives_every_image_in_order_whatever_the_sizes(shapes, batch_size, order):
    arrays = random_arrays(*shapes)
    order.shuffle(arrays)
    data = dataset_of(arrays)
    batches = images.read_batches(data, "image", batch_size)
    read = [pair for rows, batch in batches for pair in zip(rows, batch, strict=True)]
    assert [row for row, _ in read] == list(range(len(arrays)))
    for (_, image), array in zip(read, arrays, strict=True):
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), array)
    rows = order.choices(range(-len(arrays), len(arrays)), k=4)
    picked = data.with_format("numpy").select([row % len(arrays) for row in rows])
    for column, places in ((images.ImageColumn(data), rows), (images.ImageColumn(picked), range(len(rows)))):
        for row, place in zip(rows, places, strict=True):
            assert torch.equal(column[place], read[row][1])
            assert column[place].dtype == torch.uint8


def test_unrounded_images_are_kept_to_the_last_bit_through_saving(tmp_path):
    source = dataset_of(random_arrays((5, 6), (7, 3), (5, 6)))
    floats = [
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate([(5, 6), (7, 3), (2, 2)])
    ]
    images.write_images(Run(), source, floats, keep_float=True).save_to_disk(tmp_path / "d")
    read = [image for _, batch in images.read_floats(load_from_disk(tmp_path / "d"), 2) for image in batch]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read, floats, strict=True))


def test_writing_keeps_other_columns_and_the_source():
    source = dataset_of(random_arrays((5, 6), (7, 3)))
    written = images.map_images(Run(), source, lambda image, row: 255 - image, "invert", keep_source_as="target")
    assert written["name"] == ["n0", "n1"]
    assert written["label"] == [0, 1]
    for before, after in zip(source, written, strict=True):
        assert np.array_equal(np.array(after["target"]), np.array(before["image"]))
        assert np.array_equal(np.array(after["image"]), 255 - np.array(before["image"]))


def test_a_target_that_is_there_stays_and_stale_floats_go():
    run, source = Run(), dataset_of(random_arrays((5, 6)))
    once = images.map_images(
        run, source, lambda image, row: image / 300, "dim", keep_float=True, keep_source_as="target"
    )
    twice = images.map_images(run, once, lambda image, row: image // 2, "dim", keep_source_as="target")
    assert images.FLOAT_COLUMN in once.column_names
    assert images.FLOAT_COLUMN not in twice.column_names
    assert np.array_equal(np.array(twice[0]["target"]), np.array(source[0]["image"]))


def test_selected_and_empty_datasets():
    source = dataset_of(random_arrays((5, 6), (7, 3), (4, 4))).select([2, 0])
    same = images.map_images(Run(), source, lambda image, row: image, "same")
    assert same["name"] == ["n2", "n0"]
    assert np.array_equal(np.array(same[1]["image"]), np.array(source[1]["image"]))
    empty = images.map_images(Run(), source.select([]), lambda image, row: image, "same", keep_source_as="target")
    assert len(empty) == 0
    assert set(empty.column_names) == {"image", "name", "label", "target"}


def test_many_images_go_to_several_shards(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 2000)
    monkeypatch.setattr(images, "BUFFER_BYTES", 1000)
    run, arrays = Run(), random_arrays(*[(20, 20)] * 9)
    written = images.map_images(run, dataset_of(arrays), lambda image, row: image, "same")
    assert len(list(run.folder.rglob("*.arrow"))) > 1
    assert all(np.array_equal(np.array(row["image"]), array) for row, array in zip(written, arrays, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_images_as_rows(count):
    source = dataset_of(random_arrays((4, 4), (4, 4)))
    with pytest.raises(ValueError, match="for 2 rows"):
        images.write_images(Run(), source, [torch.zeros(3, 4, 4)] * count)


def test_same_scenes_names_the_image_the_model_and_both_sizes():
    base = dataset_of(random_arrays((5, 6), (7, 3)))
    images.check_same_scenes({"a": base, "b": dataset_of(random_arrays((5, 6), (7, 3)))})
    with pytest.raises(ValueError, match="image n1 is 7×4 pixels in tv and 7×3 in median"):
        images.check_same_scenes({"median": base, "tv": dataset_of(random_arrays((5, 6), (7, 4)))})
    with pytest.raises(ValueError, match="tv lacks 1 of the images of median: n1"):
        images.check_same_scenes({"median": base, "tv": base.select([0])})
    with pytest.raises(ValueError, match="more: n1"):
        images.check_same_scenes({"median": base.select([0]), "tv": base})
    with pytest.raises(ValueError, match="order"):
        images.check_same_scenes({"median": base, "tv": base.select([1, 0])})


def test_missing_column_and_what_is_no_dataset():
    source = dataset_of(random_arrays((4, 4)))
    with pytest.raises(ValueError, match="no column 'target'; it has image, name, label"):
        list(images.read_batches(source, "target"))
    with pytest.raises(ValueError, match="no column 'target'; it has image, name, label"):
        images.ImageColumn(source, "target")
    with pytest.raises(IndexError):
        images.ImageColumn(source)[1]
    with pytest.raises(ValueError, match=r"data\.train is a list"):
        images.over_splits({"train": [1]}, lambda dataset, split: dataset)
    with pytest.raises(ValueError, match="data has no splits"):
        images.over_splits({}, lambda dataset, split: dataset)


def test_images_that_cannot_be_read_are_named_by_column_and_row(tmp_path):
    cells = [{"bytes": images.encode_png(torch.zeros(3, 2, 2, dtype=torch.uint8)), "path": None}] * 2
    for bad, sentence in (
        ({"bytes": b"text", "path": None}, "is not an image"),
        (None, "is missing"),
        ({"bytes": None, "path": str(tmp_path / "none" / "x.png")}, "cannot be read: No such file"),
    ):
        data = Dataset.from_dict({"image": [*cells, bad]}, features=Features({"image": Image()}))
        for read in (images.read_batches, images.sizes, images.ImageColumn):
            with pytest.raises(ValueError, match=f"column 'image', row 2 {sentence}"):
                list(read(data))
    with pytest.raises(ValueError, match="column 'image', row 0 is not an image"):
        list(images.read_batches(Dataset.from_dict({"image": ["x.png"]})))


def test_names_of_macs_and_of_others_are_one_and_formats_do_not_matter():
    arrays = random_arrays((3, 3), (3, 3))
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    images.check_same_scenes({"a": dataset_of(arrays, ["x", one]), "b": dataset_of(arrays, ["x", two])})
    assert images.names(dataset_of(arrays).with_format("numpy")) == ["n0", "n1"]
    numbered = Dataset.from_dict({"name": [7, 8]})
    assert images.names(numbered) == ["7", "8"]
