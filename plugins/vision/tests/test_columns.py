"""Class labels mean the same in all splits, whatever a saved dataset holds."""

import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from plait_vision.columns import is_saved_dataset, read_saved, with_class_labels


def labelled(*labels, feature=None):
    features = None if feature is None else Features({"x": Value("int64"), "label": feature})
    return Dataset.from_dict({"x": list(range(len(labels))), "label": list(labels)}, features=features)


def classes(parts):
    return {split: [part.features["label"].names[i] for i in part["label"]] for split, part in parts.items()}


def test_texts_become_the_same_classes_in_all_splits():
    parts = with_class_labels({"train": labelled("dog", "cat"), "test": labelled("fox", "dog")})
    assert classes(parts) == {"train": ["dog", "cat"], "test": ["fox", "dog"]}
    assert [part.features["label"].names for part in parts.values()] == [["cat", "dog", "fox"]] * 2
    assert parts["train"].column_names == ["x", "label"]


def test_numbers_and_names_given():
    assert classes(with_class_labels({"": labelled(2, 0)})) == {"": ["2", "0"]}
    assert with_class_labels({"": labelled(2, 0)})[""].features["label"].names == ["0", "1", "2"]
    assert classes(with_class_labels({"": labelled(2, 0)}, names=["a", "b", "c"])) == {"": ["c", "a"]}
    given = with_class_labels({"": labelled("b", "a")}, names=["b", "a"])[""]
    assert given["label"][:] == [0, 1]
    assert with_class_labels({"": labelled(True, False)})[""]["label"][:] == [1, 0]


def test_class_labels_of_other_orders_mean_what_they_meant():
    parts = {
        "train": labelled(0, 1, feature=ClassLabel(names=["dog", "cat"])),
        "test": labelled(0, 1, feature=ClassLabel(names=["cat", "dog"])),
    }
    assert classes(with_class_labels(parts)) == {"train": ["dog", "cat"], "test": ["cat", "dog"]}
    alone = {"": labelled(1, 0, feature=ClassLabel(names=["dog", "cat"]))}
    assert with_class_labels(alone)[""] is alone[""]


@pytest.mark.parametrize(
    ("labels", "names", "sentence"),
    [
        ((0, -1), None, "train, row 1: label -1 is not a class"),
        (("a", None), None, "train, row 1: label None is not a class"),
        (("a", " "), None, "train, row 1: label ' ' is not a class"),
        ((0, 3), ["a", "b"], "label 3 is not one of the 2 classes"),
        (("a", "x"), ["a", "b"], "label 'x' is not one of the 2 classes"),
        ((0, 1), ["a", "a"], "duplicate class name 'a'"),
        ((0.5, 1.0), None, "column 'label' holds float64; expected class numbers or names"),
        (([1], [2]), None, "expected class numbers or names"),
    ],
)
def test_labels_that_are_none(labels, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_class_labels({"train": labelled(*labels)}, names=names)


def test_splits_of_two_kinds_and_missing_columns():
    with pytest.raises(ValueError, match="holds names in one split and numbers in another"):
        with_class_labels({"train": labelled("a"), "test": labelled(1)})
    with pytest.raises(ValueError, match="train has no column 'kind' but x, label"):
        with_class_labels({"train": labelled("a")}, "kind")


def test_saved_datasets(tmp_path):
    labelled("a").save_to_disk(tmp_path / "one")
    DatasetDict({"train": labelled("a"), "test": labelled("b")}).save_to_disk(tmp_path / "two")
    assert is_saved_dataset(tmp_path / "one")
    assert list(read_saved(tmp_path / "one")) == [""]
    assert list(read_saved(tmp_path / "two")) == ["train", "test"]
    assert not is_saved_dataset(tmp_path)
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="one cannot be read as a saved dataset"):
        read_saved(tmp_path / "one")


@pytest.mark.slow
def test_heavy_libraries_wait_until_something_is_computed():
    """So that planning begins at once, and so do worker processes that need no dataset."""
    program = """
import sys, plait_vision, plait_vision.recognition
print({"datasets", "pandas", "pyarrow", "torch"} & set(sys.modules) or "none")
import plait_vision.plugin, plait_vision.rows
print({"torch"} & set(sys.modules) or "none")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["none", "none", ""]
