"""Features of image models of timm, of transformers and of the CLIP kit, in one kind of set."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from plait import Run
from plait.demo.pictures import digits
from plait.testing import conformance
from plait_diffusion.vision_models import capture, image_tower, load_vision_model, resolve_layers
from plait_diffusion.vision_plugin import VisionFeatures

test_conformance = conformance("vision")


@pytest.fixture(scope="module")
def timm_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer
    return vit(img_size=16, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=5).eval()


@pytest.fixture(scope="module")
def dino() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_register_tokens=4,
        mlp_ratio=2,
    )
    return transformers.Dinov2WithRegistersModel(config).eval()


def features_of(model, tmp_path, **fields):
    return VisionFeatures(dtype="float32", **fields).extract_feature(model, digits(5), Run(folder=tmp_path))


def test_tokens_of_timm_become_maps(timm_vit, tmp_path):
    features = features_of(timm_vit, tmp_path, layers=("blocks.*",), image_size=16)
    assert features.names == ("blocks.0", "blocks.1", "blocks.2")
    assert [activation.shape for activation in features.activations] == [(8, 4, 4)] * 3
    tower = image_tower(timm_vit, 16)
    images = torch.rand(2, 3, 16, 16)
    found = capture(tower, ["blocks.2"], images)["blocks.2"]
    by_timm = timm_vit.forward_intermediates(images, indices=[2], norm=False, intermediates_only=True)[0]
    assert torch.allclose(found, by_timm, atol=1e-6)
    assert not any(module._forward_hooks for module in timm_vit.modules())


def test_class_and_register_tokens_of_transformers_are_left_out(dino, tmp_path):
    tower = image_tower(dino)
    layers = resolve_layers(tower, ())
    assert layers == ["encoder.layer.1"]
    images = torch.rand(2, 3, 16, 16)
    found = capture(tower, layers, images)[layers[0]]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in tower.normalisation)
    with torch.no_grad():
        tokens = dino(pixel_values=(images - mean) / std, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, tokens[:, 5:].transpose(1, 2).reshape(2, 8, 4, 4), atol=1e-6)
    assert features_of(dino, tmp_path).activations[0].origin.more["image_size"] == 16


def test_saved_models_are_loaded_by_folder(dino, tmp_path):
    dino.save_pretrained(tmp_path / "dino")
    from_folder = features_of(None, tmp_path / "a", source=str(tmp_path / "dino"))
    assert torch.equal(
        from_folder.read()["encoder.layer.1"], features_of(dino, tmp_path / "b").read()["encoder.layer.1"]
    )
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_vision_model(str(tmp_path / "nothing"))


def test_splits_are_extracted_apart(timm_vit, tmp_path):
    data = {"train": digits(5), "test": digits(3)}
    method = VisionFeatures(image_size=16, dtype="float32")
    found = method.extract_feature(timm_vit, data, Run(folder=tmp_path))
    assert {name: len(features) for name, features in found.items()} == {"train": 5, "test": 3}
    assert torch.equal(found["test"].read()["blocks.2"], found["train"].read(rows=range(3))["blocks.2"])


def test_a_convolutional_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    features = features_of(model, tmp_path, layers=("layer1", "layer4"), image_size=64)
    assert [activation.shape for activation in features.activations] == [(64, 16, 16), (512, 2, 2)]


@pytest.mark.parametrize("architecture", ["tiny", "tiny-transformers"])
def test_image_towers_of_the_clip_kit(architecture, tmp_path):
    models = pytest.importorskip("plait_clip.plugin.models")
    if architecture == "tiny":
        model = models.OpenClip(architecture="tiny").load_model(data=None, run=Run(folder=tmp_path))
    else:
        toy = pytest.importorskip("plait_clip.toy_models")
        model = toy.tiny_model()
    features = features_of(model, tmp_path)
    (activation,) = features.activations
    assert activation.height == activation.width > 1
    assert len(features) == 5


def test_what_cannot_be_extracted_ends_in_a_sentence(timm_vit, tmp_path):
    with pytest.raises(ValueError, match=r"no module 'block.0' .did you mean 'blocks.0'"):
        features_of(timm_vit, tmp_path, layers=("block.0",), image_size=16)
    with pytest.raises(ValueError, match="'head' is not called"):
        features_of(timm_vit, tmp_path, layers=("head",), image_size=16)
    with pytest.raises(ValueError, match="a Linear does not say how large its images are"):
        features_of(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="one of them"):
        features_of(None, tmp_path)
    with pytest.raises(ValueError, match="three numbers each"):
        VisionFeatures(mean=(0.5, 0.5, 0.5))
