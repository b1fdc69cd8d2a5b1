import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures
from plait import PlaitError, Run, load
from plait_vision.examples import caption

DATA = caption().arguments["data"]  # cat, dog, tree, cat, dog, tree


def make(method, **fields):
    return load(f"plait-vision/{method}", hook="transform", **fields)


def transform(method, data, **fields):
    return make(method, **fields).transform(data=data, run=Run(seed=1))


def names(data):
    return [data.features["label"].int2str(label) for label in data["label"]]


def pixels(data, row):
    return np.asarray(data[row]["image"])


def test_rows_by_class_number_and_text():
    data = DATA.add_column("part", list("aabbcc"))
    assert names(transform("select", data, where={"label": "dog"})) == ["dog", "dog"]
    assert names(transform("select", data, where={"label": [0, "tree"]})) == ["cat", "tree", "cat", "tree"]
    both = transform("select", data, where={"label": "dog", "part": ["c"]}, columns=["part", "label"])
    assert both.column_names == ["part", "label"]
    assert list(both["part"]) == ["c"]
    np.testing.assert_array_equal(pixels(transform("select", data, where={"part": "b"}), 1), pixels(data, 3))


def test_first_and_draw():
    data = DATA.add_column("row", list(range(6)))
    assert list(transform("select", data, first=2, where={"label": "tree"})["row"]) == [2, 5]
    drawn = list(transform("select", data, draw=4)["row"])
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 4
    assert drawn == list(transform("select", data, draw=4)["row"])
    parts = transform("select", {"train": data, "test": data}, draw=3)
    assert {split: len(part) for split, part in parts.items()} == {"train": 3, "test": 3}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"where": {"label": "dogg"}},
            "label 'dogg' is not a class (did you mean 'dog'?); the data has cat, dog, tree",
        ),
        ({"where": {"lable": 1}}, "there is no column 'lable' (did you mean 'label'?)"),
        ({"where": {"label": 7}}, "the data has no row where label is 7"),
        ({"first": 3, "where": {"label": "cat"}}, "first is 3; the data has 2 such rows"),
        ({"draw": 7}, "draw is 7; the data has 6 rows"),
        ({"columns": ["imag"]}, "there is no column 'imag' (did you mean 'image'?)"),
    ],
)
def test_selections_that_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        transform("select", DATA, **fields)


def test_first_and_draw_exclude_each_other():
    with pytest.raises(PlaitError, match="first and draw are two ways"):
        make("select", first=1, draw=1)


def test_classes_are_joined_by_name():
    other = transform("relabel", DATA, classes={"cat": "ape"})  # ape, dog, tree
    joined = transform("concat", {"a": DATA, "b": other}, origin="source")
    assert joined.features["label"].names == ["cat", "dog", "tree", "ape"]
    assert names(joined) == names(DATA) + names(other)
    assert list(joined["source"]) == ["a"] * 6 + ["b"] * 6
    np.testing.assert_array_equal(pixels(joined, 7), pixels(DATA, 1))


def test_columns_of_another_order_are_the_same():
    turned = DATA.select_columns(["label", "image"])
    joined = transform("concat", {"a": DATA, "b": turned})
    assert joined.column_names == ["image", "label"]
    assert names(joined) == names(DATA) * 2


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (DATA.remove_columns("label"), "a and b differ in the columns label; transform: select"),
        (
            DATA.cast_column("image", Image(decode=False)).remove_columns("image").add_column("image", ["x"] * 6),
            "image is",
        ),
    ],
)
def test_columns_that_do_not_fit(other, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        transform("concat", {"a": DATA, "b": other})


def test_an_origin_that_exists_is_refused():
    with pytest.raises(ValueError, match="origin is 'label'"):
        transform("concat", {"a": DATA}, origin="label")


def test_numbers_of_classes_stay_whatever_is_renamed():
    pets = transform("relabel", DATA, classes={"cat": "pet", "dog": "pet"})
    assert pets.features["label"].names == ["pet", "dog", "tree"]
    assert names(pets) == ["pet", "pet", "tree"] * 2
    assert pets.column_names == DATA.column_names
    as_tree = transform("relabel", DATA, classes={"cat": "tree", "dog": "tree"})
    assert as_tree.features["label"].names == ["cat", "dog", "tree"]
    assert as_tree["label"][:] == [2] * 6
    swapped = transform("relabel", DATA, classes={"cat": "dog", "dog": "cat"})
    assert swapped.features == DATA.features
    assert names(swapped) == ["dog", "cat", "tree"] * 2
    chain = transform("relabel", DATA, classes={"cat": "dog", "dog": "wolf"})
    assert chain.features["label"].names == ["cat", "dog", "tree", "wolf"]
    assert names(chain) == ["dog", "wolf", "tree"] * 2


def test_classes_are_left_out_and_numbered_anew_on_request():
    parts = {"train": DATA, "test": DATA.select([2, 1])}
    few = transform("relabel", parts, classes={"dog": "dog"}, others="drop")
    assert {split: names(part) for split, part in few.items()} == {"train": ["dog", "dog"], "test": ["dog"]}
    assert [part.features for part in few.values()] == [DATA.features] * 2
    anew = transform("relabel", parts, classes={"dog": "dog", "tree": "plant"}, others="drop", unused="drop")
    assert [part.features["label"].names for part in anew.values()] == [["dog", "plant"]] * 2
    joined = transform("relabel", DATA, classes={"cat": "pet", "dog": "pet"}, unused="drop")
    assert joined.features["label"].names == ["pet", "tree"]
    assert names(joined) == ["pet", "pet", "tree"] * 2
    with pytest.raises(ValueError, match="classes names 'caat'"):
        transform("relabel", DATA, classes={"caat": "x"})
    with pytest.raises(ValueError, match="not classes with names"):
        transform("relabel", DATA.cast_column("label", Value("int64")), classes={"cat": "x"})


def test_splits_of_other_classes_are_relabelled_alike():
    features = Features({"label": ClassLabel(names=["tree", "cat"])})
    parts = {
        "train": DATA.remove_columns("image"),
        "test": Dataset.from_dict({"label": [0, 1]}, features=features),
    }
    done = transform("relabel", parts, classes={"dog": "wolf"})
    assert [part.features["label"].names for part in done.values()] == [["cat", "wolf", "tree"]] * 2
    assert names(done["test"]) == ["tree", "cat"]


def test_captions_of_the_right_and_of_another_class():
    right = transform("caption", DATA)
    assert list(right["caption"])[:3] == ["a photo of a cat", "a photo of a dog", "a photo of a tree"]
    wrong = transform("caption", right, templates=["{}", "{}!"], shift=-1)
    assert list(wrong["caption"])[:2] == [["tree", "tree!"], ["cat", "cat!"]]
    with pytest.raises(PlaitError, match="at least one"):
        make("caption", templates=["a photo"])


@pytest.mark.parametrize("missing", [-1, None])
@pytest.mark.parametrize(("method", "fields"), [("caption", {}), ("relabel", {"classes": {"cat": "pet"}})])
def test_rows_without_a_class_are_refused(method, fields, missing):
    features = Features({"label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({"label": [0, missing, 1]}, features=features)
    with pytest.raises(ValueError, match=r"row 1: label (-1|None) is not a class"):
        transform(method, data, **fields)


def test_a_split_that_would_be_empty_is_refused():
    with pytest.raises(ValueError, match="test has no row of cat"):
        transform("relabel", {"train": DATA, "test": DATA.select([1])}, classes={"cat": "pet"}, others="drop")


@pytest.mark.slow
@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=8), shift=st.integers(-5, 5))
def test_shifted_captions_are_never_the_right_ones(values, shift):
    features = Features({"label": ClassLabel(names=["p", "q", "r", "s"])})
    data = Dataset.from_dict({"label": values}, features=features)
    told = list(transform("caption", data, templates=["{}"], shift=shift)["caption"])
    assert all((text == name) == (shift % 4 == 0) for text, name in zip(told, names(data), strict=True))


def test_sizes(tmp_path):
    data = DATA  # 8 × 6 pixels
    run = Run(folder=tmp_path)
    small = make("resize", size=3).transform(data=data, run=run)
    assert small[0]["image"].size == (3, 4)
    assert names(small) == names(data)
    exact = make("resize", size=[5, 7]).transform(data=data, run=run)
    assert exact[0]["image"].size == (7, 5)
    expected = np.asarray(data[1]["image"].resize((7, 5), Pictures.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels(exact, 1), expected)
    with pytest.raises(ValueError, match="column 'label' holds"):
        make("resize", size=3, columns=["label"]).transform(data=data, run=run)
    with pytest.raises(PlaitError, match="size is 0"):
        make("resize", size=0)
