"""Any model as a classifier: its own preparation of images, texts, tasks, and what is refused."""

import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait.testing.examples import classifier as toy
from plait_vision import Classifier, Preparation, as_classifier, as_features
from plait_vision.classifiers import evaluating
from torch import nn


class Answer:
    def __init__(self, logits):
        self.logits = logits


class WithLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, images):
        return Answer(self.layer(images.flatten(1)))


def images(count=3, side=8, channels=3):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_a_module_of_logits_is_itself_and_differentiable():
    model = toy()
    seen = as_classifier(model)
    given = images().requires_grad_()
    assert torch.equal(seen(given), model(given))
    seen(given).sum().backward()
    assert given.grad.abs().sum() > 0
    assert as_classifier(seen) is seen
    assert {id(p) for p in seen.parameters()} == {id(p) for p in model.parameters()}


def test_an_object_with_logits_counts_and_modes_stay():
    model = WithLogits()
    model.layer.eval()
    seen = as_classifier(model)
    assert seen(images(2, 2)).shape == (2, 3)
    assert (model.training, model.layer.training, seen.training) == (True, False, True)
    with evaluating(seen):
        assert not model.training
    assert (model.training, model.layer.training) == (True, False)


def test_half_precision_gets_images_of_its_type_and_gives_float_logits():
    assert as_classifier(toy().bfloat16())(images()).dtype == torch.float32


def test_a_network_of_timm_gets_what_timm_prepares():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_model_data_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", pretrained=False, num_classes=5).eval()
    network.conv1.weight.data.mul_(3) if isinstance(getattr(network, "conv1", None), nn.Conv2d) else None
    facts = resolve_model_data_config(network)
    levels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    smooth = Image.fromarray(levels).resize((240, 200), Image.Resampling.BICUBIC)
    theirs = create_transform(**facts, is_training=False)(smooth)[None]
    seen = as_classifier(network)
    ours = seen.preparation(torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.05  # their resizing rounds to 8 bits
    assert torch.equal(seen(torch.full((1, 3, 9, 9), 0.5)), network(seen.preparation(torch.full((1, 3, 9, 9), 0.5))))


def test_a_classifier_of_transformers_gets_what_its_folder_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    )
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(tmp_path)
    read = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    expected = read(**processor(images=picture, return_tensors="pt")).logits
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(as_classifier(read)(pixels), expected)
    loaded = plait.load("transformers-classifier", folder=tmp_path).load_model(run=plait.Run())
    torch.testing.assert_close(loaded(pixels), expected)
    assert loaded.class_names is None  # LABEL_0, … are no names
    model.config.id2label = {0: "cat", 1: "dog", 2: "tree"}
    model.save_pretrained(tmp_path)
    loaded = plait.load("transformers-classifier", folder=tmp_path).load_model(run=plait.Run())
    assert loaded.class_names == ("cat", "dog", "tree")
    model.vit.save_pretrained(tmp_path)  # a body without a head is no classifier, whatever would be drawn for it
    with pytest.raises(ValueError, match=r"lacks classifier\.bias, classifier\.weight"):
        plait.load("transformers-classifier", folder=tmp_path).load_model(run=plait.Run())


def test_an_image_text_model_answers_as_in_zero_shot_classification():
    clip = pytest.importorskip("plait_clip")
    model, names = clip.tiny_model(), ["zero", "one", "two"]
    templates = ["a photo of the number {}", "the digit {}"]
    head = clip.zero_shot_head(model, names, templates, cache=False)
    features = torch.nn.functional.normalize(model.encode_image(images()), dim=-1)
    expected = features @ head.T * model.logit_scale.exp()
    seen = as_classifier(model, class_names=names, templates=templates)
    torch.testing.assert_close(seen(images()), expected)
    assert seen.class_names == tuple(names)
    with pytest.raises(ValueError, match="class_names is empty"):
        as_classifier(model)
    with pytest.raises(ValueError, match="templates are texts"):
        as_classifier(model, class_names=names, templates=["a photo"])


class TwoTasks(nn.Module):
    tasks = ("a", "b")

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 3)])

    def logits(self, images, task):
        return self.heads[self.tasks.index(task)](images.flatten(1))


def test_a_model_of_several_tasks_answers_for_one_or_for_their_mean():
    model, given = TwoTasks(), images(2, 2)
    assert torch.equal(as_classifier(model, task="b")(given), model.logits(given, "b"))
    mean = (model.logits(given, "a") + model.logits(given, "b")) / 2
    torch.testing.assert_close(as_classifier(model, task="*")(given), mean)
    with pytest.raises(ValueError, match="the tasks a, b; name one"):
        as_classifier(model)
    with pytest.raises(ValueError, match="task is 'c'"):
        as_classifier(model, task="c")
    with pytest.raises(ValueError, match="has no tasks"):
        as_classifier(toy(), task="a")


def test_a_merged_model_of_several_tasks_is_one():
    wemoe = pytest.importorskip("plait_wemoe.tasks")
    model = wemoe.MultiTaskModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), {"a": nn.Linear(4, 3)})
    assert torch.equal(as_classifier(model)(images(2, 2)), model.logits(images(2, 2), "a"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 3, 1), "the model gives a tensor"),
        (nn.Linear(5, 2), "the model fails on inputs of shape"),
        (nn.Bilinear(2, 2, 2), "the model fails on inputs of shape"),
    ],
)
def test_what_is_no_classifier_is_told(model, message):
    with pytest.raises(ValueError, match=message):
        as_classifier(model)(images())


def test_what_is_no_module_is_told():
    with pytest.raises(TypeError, match="of type dict; expected a torch module"):
        as_classifier({})


def test_preparation_crops_squeezes_and_normalises():
    wide = images(1, 8)[..., :4]  # 8 × 4
    assert Preparation(4)(wide).shape[-2:] == (4, 4)
    assert torch.equal(Preparation(4)(wide), wide[:, :, 2:6])
    assert Preparation(4, resize="squash")(wide).shape[-2:] == (4, 4)
    assert Preparation((6, 4), shorter=8)(wide).shape[-2:] == (6, 4)
    normal = Preparation(None, (0.5,) * 3, (0.25,) * 3)(torch.ones(1, 3, 2, 2))
    assert torch.equal(normal, torch.full((1, 3, 2, 2), 2.0))
    with pytest.raises(ValueError, match="three numbers"):
        Preparation(4, (0.5,), (1.0,))


def test_a_network_with_its_preparation_is_a_classifier():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    seen = Classifier(network, Preparation(2, (0.5,) * 3, (0.5,) * 3), ["cat", "dog"])
    assert torch.equal(seen(images(2, 2)), network((images(2, 2) - 0.5) / 0.5))
    assert seen.class_names == ("cat", "dog")


def test_features_are_what_enters_the_last_linear_layer():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh()), nn.Linear(4, 3)
    images = torch.rand(2, 3, 2, 2)
    seen = as_features(nn.Sequential(body, head))
    assert torch.equal(seen(images), body(images))
    assert not any(part._forward_hooks for part in seen.modules())
    with pytest.raises(ValueError, match="does not end in a linear layer"):
        as_features(nn.Sequential(body, head, nn.Linear(3, 5), nn.Unflatten(1, (5,)), nn.ZeroPad1d(1)))(images)
    with pytest.raises(TypeError, match="expected a torch module"):
        as_features("net")
