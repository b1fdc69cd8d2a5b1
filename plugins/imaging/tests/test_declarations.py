"""What methods say they take and give: steps that do not fit are refused before anything runs."""

import pytest
from plait.errors import PipelineError
from plait.pipeline import parse_pipeline
from plait_imaging.transforms import JPEG, Compose, Haze, RandomCrops, Weathers

PHOTOS = "photos: {load-data: photos}"


def refused(words, *steps):
    with pytest.raises(PipelineError, match=words):
        parse(*steps)


def parse(*steps):
    return parse_pipeline("plait: 1\nname: p\nsteps:\n" + "".join(f"  {step}\n" for step in (PHOTOS, *steps)))


def test_columns_and_splits_that_are_not_there():
    net = "net: {load-model: residual-cnn}"
    refused("'target'", net, "trained: {optimize: restoration-network, from: {model: net, data: photos.test}}")
    refused("'depth'", "hazy: {transform: haze, from: {data: photos}, with: {depth: depth}}")
    refused("no split 'train'", "median: {restore: median, from: {data: photos.train}}")
    rainy = "rainy: {transform: rain, from: {data: photos}}"
    parse(rainy, net, "trained: {optimize: restoration-network, from: {model: net, data: rainy.test}}")


def test_what_compose_says_is_what_its_parts_say():
    assert (Compose().gives, Compose().columns_needed, Compose().columns_made) == ("data", ("image",), ("target",))
    parts = Compose(transforms=(Haze(depth="depth"), RandomCrops(), Weathers(depth="target"), JPEG()))
    assert parts.columns_needed == ("image", "depth")
    assert set(parts.columns_made) == {"target", "name", "weather"}
