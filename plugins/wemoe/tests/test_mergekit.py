"""What mergekit merges of the same models (``mergekit/``: its results, how they were made), the folders' merge gives too."""

import json
from pathlib import Path

import pytest
import torch
from plait_wemoe.baselines import static
from plait_wemoe.folders import merge_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).parent / "mergekit" / "merged.safetensors"
EXPERTS = ("a", "b", "c")


def dropped(then):
    """The seed of the masks that mergekit was given; without rescaling, density 0.6 and weight 0.8 are a factor of 0.48."""
    return static.dropping(0.4, then, torch.Generator().manual_seed(0))


RECIPES = {
    "linear": static.averaging(),
    "task_arithmetic": static.arithmetic(0.4),
    "ties": static.trimming(0.7, 0.2, "mean", keep_of="tensor"),
    "ties, not normalised": static.trimming(0.3, 0.2, "sum", keep_of="tensor"),
    "ties, density 1": static.trimming(0.7, 100, "mean"),
    "dare_linear, not rescaled": dropped(static.arithmetic(0.48)),
    "dare_ties, not rescaled": dropped(static.trimming(0.48, 100)),
}


@pytest.fixture(scope="module")
def found():
    """Model or merge → its tensors."""
    states = {}
    for key, value in load_file(FIXTURE).items():
        name, _, tensor = key.rpartition("/")
        states.setdefault(name, {})[tensor] = value
    return states


@pytest.fixture(scope="module")
def folders(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in (torch.float32, torch.bfloat16):
        for name in ("base", *EXPERTS):
            place = folder / str(kind) / name
            place.mkdir(parents=True)
            tensors = {n: value.to(kind) for n, value in found[name].items()}
            save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return folder


def merged(folders, name, kind, out):
    place = folders / str(kind)
    result = merge_folders(RECIPES[name], place / "base", {expert: place / expert for expert in EXPERTS}, out)
    return load_file(result.path / "model.safetensors")


def test_every_merge_of_the_fixture_is_compared():
    with safe_open(FIXTURE, "pt") as content:
        assert set(json.loads(content.metadata()["merges"])) == set(RECIPES)
        assert content.metadata()["mergekit"] == "0.1.5"


@pytest.mark.parametrize("name", RECIPES)
def test_in_float32_merges_equal_mergekits(folders, found, name, tmp_path):
    ours, theirs = merged(folders, name, torch.float32, tmp_path / "out"), found[name]
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        torch.testing.assert_close(ours[tensor], value, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_in_bfloat16_they_equal_to_the_last_bit(folders, found, name, tmp_path):
    """Computed in float32 and rounded once, so that an entry between two numbers may go to either."""
    ours, theirs = merged(folders, name, torch.bfloat16, tmp_path / "out"), found[f"{name}, bfloat16"]
    assert sum(int((ours[tensor] != value).sum()) for tensor, value in theirs.items()) < 20
    for tensor, value in theirs.items():
        torch.testing.assert_close(ours[tensor], value, rtol=2**-7, atol=0)


def test_of_equal_magnitudes_at_the_threshold_of_ties_all_are_kept(folders, found, tmp_path):
    """In bfloat16 there are such; mergekit keeps as many of them as the share allows, whichever its sorting puts first."""
    ours, theirs = merged(folders, "ties", torch.bfloat16, tmp_path / "out"), found["ties, bfloat16"]
    differing = 0
    for tensor, value in theirs.items():
        base, *experts = (found[name][tensor].bfloat16().float() for name in ("base", *EXPERTS))
        magnitudes = torch.stack([(expert - base).abs().flatten() for expert in experts])
        kept = max(1, int(0.2 * base.numel()))
        thresholds = magnitudes.topk(kept, dim=1).values[:, -1:]
        at_threshold = (magnitudes == thresholds).any(dim=0).view_as(base)
        differs = ours[tensor] != value
        assert not bool((differs & ~at_threshold).any())
        differing += int(differs.sum())
    assert differing < 20
