"""Every merge method on small random models of every kind that people merge: merged, called, stored, loaded, equal."""

import copy
import importlib.util

import datasets
import numpy as np
import plait
import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from plait import codecs
from plait_wemoe import plugin
from plait_wemoe.baselines import static
from plait_wemoe.columns import Reading, column_of, reading_of
from plait_wemoe.heads import feature_tensor, head_places
from plait_wemoe.inputs import call, take
from plait_wemoe.supervised import labelled_tasks
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

TASKS = {"a": 3, "b": 4}
SIDE = 16
TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
IMAGE = {"image_size": SIDE, "patch_size": 8}
BLOCKS = {key: TEXT[key] for key in TEXT if key != "vocab_size"}
TIMM = {"img_size": SIDE, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


class Bottleneck(nn.Module, PyTorchModelHubMixin):
    """A convolutional net that saves itself."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.body(x)).log_softmax(dim=-1)


def other_head(classes):
    """A classifier whose head was replaced after it was built, so that its own configuration is wrong."""
    model = Bottleneck(7)
    model.fc = nn.Linear(4, classes)
    return model


def bert(classes):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=classes))


def roberta(classes):
    config = transformers.RobertaConfig(**TEXT, num_labels=classes, max_position_embeddings=20, pad_token_id=1)
    return transformers.RobertaForSequenceClassification(config)


def t5(classes):
    sizes = {"vocab_size": 30, "d_model": 8, "d_ff": 12, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    return transformers.T5ForSequenceClassification(
        transformers.T5Config(**sizes, num_labels=classes, decoder_start_token_id=0)
    )


def vit(classes):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**BLOCKS, **IMAGE, num_labels=classes))


def deit(classes):
    config = transformers.DeiTConfig(**BLOCKS, **IMAGE, num_labels=classes)
    return transformers.DeiTForImageClassificationWithTeacher(config)


def torchvision_resnet(classes):
    import torchvision

    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)


def torchvision_shuffle(classes):
    import torchvision

    return torchvision.models.ShuffleNetV2([1, 1, 1], [4, 4, 8, 16, 16], num_classes=classes)


def torchvision_vit(classes):
    import torchvision

    return torchvision.models.VisionTransformer(SIDE, 8, 2, 2, 8, 12, num_classes=classes)


IMAGE_MODELS = {
    "transformers ViT": vit,
    "transformers distilled DeiT": deit,
    "timm ViT": lambda classes: VisionTransformer(num_classes=classes, **TIMM),
    "timm distilled": lambda classes: VisionTransformerDistilled(num_classes=classes, **TIMM),
    "timm ResNet": lambda classes: ResNet(
        BasicBlock, (1, 1, 1, 1), channels=(4, 4, 4, 4), stem_width=4, num_classes=classes
    ),
    "HubMixin": Bottleneck,
    "HubMixin, head replaced": other_head,
    **(
        {"torchvision ShuffleNet": torchvision_shuffle, "torchvision ViT": torchvision_vit}
        if importlib.util.find_spec("torchvision")
        else {}
    ),
}
TEXT_MODELS = {"transformers BERT": bert, "transformers RoBERTa": roberta, "transformers T5, tied": t5}
CONVOLUTIONAL = {"timm ResNet", "HubMixin", "HubMixin, head replaced", "torchvision ShuffleNet"}


def moved(base, seed, scale=0.1):
    """A copy with other weights and other running statistics."""
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=draw))
            elif name.endswith("num_batches_tracked"):
                buffer.add_(10 * seed)
    return model


def experts_of(base, build):
    """Task → the base's body, fine-tuned, with a head for the task's own classes."""
    experts = {}
    for number, (task, classes) in enumerate(TASKS.items(), start=1):
        body, expert = moved(base, number).state_dict(), build(classes)
        own = expert.state_dict()
        expert.load_state_dict({n: body[n] if body[n].shape == own[n].shape else own[n] for n in own})
        experts[task] = expert.eval()
    return experts


def pool_of_kind(name):
    """(base, experts, data, inputs) of one of the kinds above."""
    torch.manual_seed(0)
    build = {**IMAGE_MODELS, **TEXT_MODELS}[name]
    base = build(2).eval()
    make = tokens if name in TEXT_MODELS else pictures
    return base, experts_of(base, build), {task: make(6, seed) for seed, task in enumerate(TASKS)}


def pictures(number, seed=0, side=SIDE):
    draw = np.random.default_rng(seed)
    cells = [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]
    return datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))


def tokens(number, seed=0):
    """Sequences of other lengths, each with one end token 1 at its end (T5 reads its answer there)."""
    draw = np.random.default_rng(seed)
    rows = [[*draw.integers(2, 30, size=draw.integers(2, 7)).tolist(), 1] for _ in range(number)]
    return datasets.Dataset.from_dict({"input_ids": rows})


METHODS = {
    "individual": plugin.Individual(),
    "simple-average": plugin.SimpleAverage(),
    "simple-average, recomputed": plugin.SimpleAverage(statistics="recompute"),
    "task-arithmetic": plugin.TaskArithmetic(),
    "ties": plugin.Ties(),
    "dare": plugin.Dare(),
    "fisher": plugin.Fisher(num_examples=4),
    "regmean": plugin.RegMean(num_examples=4),
    "adamerging": plugin.AdaMerging(num_steps=1),
    "concrete": plugin.Concrete(num_steps=1),
    "wemoe": plugin.WEMoE(num_steps=1),
    "e-wemoe": plugin.EWEMoE(num_steps=1, eval_routing="fixed"),
}
# Methods that go another's way through a model; they are tried on one kind elsewhere.
ALIKE = ("task-arithmetic", "ties", "concrete")
# One of each shape that a result has on disk: several encoders, one encoder, a mixture of dense and of sparse task vectors.
STORED = ("individual", "simple-average", "wemoe", "e-wemoe")


@pytest.fixture(scope="module", params=[*IMAGE_MODELS, *TEXT_MODELS])
def kind(request):
    return (request.param, *pool_of_kind(request.param))


def inputs_of(data):
    return column_of(data, Reading()).read(range(len(data)))


def stored(model, folder):
    """What the store gives back: the same weights, bit by bit."""
    codecs.save(model, folder)
    loaded = codecs.load(folder)
    one, two = model.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    return loaded


def same(one, two):
    """Outputs of equal weights, which lie elsewhere in memory: that alone may change a sum's last bit."""
    return torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_every_kind_is_merged_and_what_is_stored_answers_as_it_did(kind, tmp_path):
    name, base, experts, data = kind
    before = copy.deepcopy([base, *experts.values()])
    inputs = {task: inputs_of(data[task]) for task in TASKS}
    for label, method in METHODS.items():
        if label in ALIKE:
            continue
        arguments = {"base": base, "experts": experts, "data": data, "run": plait.Run(on_warning=lambda sentence: None)}
        if name in CONVOLUTIONAL and isinstance(method, plugin.WEMoE):
            with pytest.raises(ValueError, match="no module on the way of the input matches"):
                method.merge(**arguments)
            continue
        merged = method.merge(**arguments)
        assert not merged.training
        assert any(parameter.requires_grad for parameter in merged.parameters())
        with torch.no_grad():
            logits = {task: merged.logits(inputs[task], task) for task in TASKS}
            assert {task: found.shape for task, found in logits.items()} == {t: (6, n) for t, n in TASKS.items()}
            if label in STORED:
                loaded = stored(merged, tmp_path / label)
                assert all(same(loaded.logits(inputs[task], task), logits[task]) for task in TASKS)
    for model, old in zip([base, *experts.values()], before, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), old.state_dict().values(), strict=True)
        )
        assert all(p.requires_grad for p in model.parameters())


def test_one_expert_merged_with_lambda_one_is_that_expert(kind):
    """The head answers from its own place: what the model does around it stays as it is."""
    _, base, experts, data = kind
    inputs = inputs_of(data["b"])
    arguments = {"base": base, "experts": {"b": experts["b"]}, "data": None, "run": plait.Run()}
    with torch.no_grad():
        own = feature_tensor(call(experts["b"], inputs))
        for method in (plugin.Individual(), plugin.SimpleAverage(), plugin.TaskArithmetic(scaling=1.0)):
            assert torch.allclose(method.merge(**arguments).logits(inputs, "b"), own, atol=1e-5)


def test_mixed_batches_score_every_sample_with_its_own_head(kind):
    _, base, experts, data = kind
    merged = plugin.SimpleAverage().merge(base=base, experts=experts, data=None, run=plait.Run())
    inputs, places = inputs_of(data["a"]), {"a": torch.tensor([4, 0]), "b": torch.tensor([1, 2, 3, 5])}
    with torch.no_grad():
        for task, logits in merged.logits_by_task(inputs, places).items():
            assert torch.allclose(logits, merged.logits(take(inputs, places[task]), task), atol=1e-5)


def test_a_merged_model_can_be_trained_every_weight_of_it(kind):
    name, base, experts, data = kind
    arguments = {"base": base, "experts": experts, "data": data}
    methods = [plugin.SimpleAverage()] + [plugin.WEMoE(num_steps=0)] * (name not in CONVOLUTIONAL)
    for method in methods:
        merged = method.merge(**arguments, run=plait.Run())
        merged.logits(inputs_of(data["a"]), "a").sum().backward()
        moved = {name for name, p in merged.named_parameters() if p.grad is not None}
        still = {name for name, p in merged.named_parameters() if not p.requires_grad}
        assert moved
        assert not still


def test_parameters_that_the_base_keeps_fixed_stay_so():
    base = vit(2)
    base.vit.embeddings.cls_token.requires_grad_(False)
    merged = plugin.SimpleAverage().merge(base=base, experts=experts_of(base, vit), data=None, run=plait.Run())
    fixed = [name for name, p in merged.named_parameters() if not p.requires_grad]
    assert fixed == ["encoder.vit.embeddings.cls_token"]
    base.requires_grad_(False)  # a base that is frozen as a whole, for being a pre-trained one
    merged = plugin.SimpleAverage().merge(base=base, experts=experts_of(base, vit), data=None, run=plait.Run())
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize(
    ("build", "places"),
    [
        (bert, ("classifier",)),
        (deit, ("cls_classifier", "distillation_classifier")),
        (t5, ("classification_head",)),
        (Bottleneck, ("fc",)),
        (IMAGE_MODELS["timm distilled"], ("head", "head_dist")),
    ],
)
def test_where_heads_are(build, places):
    assert head_places(build(3)) == places
    assert head_places(nn.Sequential(nn.Linear(2, 2))) == ()


def test_a_resnet_of_torchvision_comes_out_of_the_store(tmp_path):
    pytest.importorskip("torchvision")
    base = torchvision_resnet(2).eval()
    merged = plugin.TaskArithmetic().merge(
        base=base, experts=experts_of(base, torchvision_resnet), data=None, run=plait.Run()
    )
    loaded, images = stored(merged, tmp_path), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.isfinite(merged.logits(images, "b")).all()
        assert same(loaded.logits(images, "b"), merged.logits(images, "b"))


def test_a_merged_transformers_model_is_one_of_transformers_on_disk(tmp_path):
    base, experts, _ = pool_of_kind("transformers BERT")
    merged = plugin.SimpleAverage().merge(base=base, experts=experts, data=None, run=plait.Run())
    merged.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again.bert.pooler.dense.weight, merged.encoder.bert.pooler.dense.weight)
    assert torch.equal(again.classifier.weight, base.classifier.weight)


HEADLESS = {
    "BERT": (bert, transformers.BertModel),
    "RoBERTa, with a pooler that its classifier lacks": (roberta, transformers.RobertaModel),
    "ViT": (vit, transformers.ViTModel),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_a_base_without_a_head_is_merged_as_the_same_one_with_a_head(name, tmp_path):
    build, cls = HEADLESS[name]
    torch.manual_seed(0)
    base = build(2).eval()
    inner = getattr(base, base.base_model_prefix)
    headless = cls(base.config).eval()
    headless.load_state_dict(inner.state_dict(), strict=False)
    experts = experts_of(base, build)
    inputs = inputs_of((pictures if build is vit else tokens)(6))
    for method in (plugin.TaskArithmetic(), plugin.Ties()):
        one, two = (method.merge(base=b, experts=experts, data=None, run=plait.Run()) for b in (base, headless))
        with torch.no_grad():
            for task in TASKS:
                assert torch.equal(one.logits(inputs, task), two.logits(inputs, task))
    with torch.no_grad():
        assert same(stored(two, tmp_path).logits(inputs, "b"), two.logits(inputs, "b"))
    assert all(parameter.requires_grad for parameter in two.parameters())
    first = next(iter(dict(headless.named_parameters())))
    headless.get_parameter(first).requires_grad_(False)
    again = plugin.SimpleAverage().merge(base=headless, experts=experts, data=None, run=plait.Run())
    fixed = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert fixed == [f"encoder.{base.base_model_prefix}.{first}"]


def test_a_base_that_lacks_more_than_a_head_is_refused():
    base, experts, _ = pool_of_kind("transformers BERT")
    headless = transformers.BertModel(base.config, add_pooling_layer=False)
    with pytest.raises(
        KeyError, match=r"a BertModel without bert\.pooler\.dense\.weight, which a BertForSequenceClass"
    ):
        plugin.SimpleAverage().merge(base=headless, experts=experts, data=None, run=plait.Run())


def test_experts_with_other_places_of_their_heads_or_another_base():
    base, experts, _ = pool_of_kind("timm ViT")
    run = plait.Run()
    with pytest.raises(ValueError, match="the head of expert 'b' is head, head_dist"):
        plugin.SimpleAverage().merge(
            base=base, experts={"a": experts["a"], "b": IMAGE_MODELS["timm distilled"](4)}, data=None, run=run
        )
    with pytest.raises(KeyError, match="another architecture"):
        plugin.SimpleAverage().merge(base=Bottleneck(2), experts=experts, data=None, run=run)


def test_images_reach_a_model_of_timm_as_timm_prepares_them(tmp_path):
    import timm

    def build(classes):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=1, num_classes=classes
        )

    torch.manual_seed(0)
    base, data = build(2).eval(), {task: pictures(3, seed, 40) for seed, task in enumerate(TASKS)}
    config = {**timm.data.resolve_model_data_config(base), "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config, is_training=False)
    expected = {task: torch.stack([transform(image) for image in part["image"]]) for task, part in data.items()}
    read = {task: column_of(part, reading_of(base, None)).read(range(3)) for task, part in data.items()}
    assert all(torch.equal(read[task], expected[task]) for task in TASKS)
    assert min(images.min() for images in read.values()) < -0.5  # normalised, not in [0, 1]
    # What a merge computes its inner products of, and what a merged model from the store is measured on.
    experts = experts_of(base, build)
    merged = plugin.RegMean(num_examples=3).merge(base=base, experts=experts, data=data, run=plait.Run())
    grams = {task: static.gram_matrices(e, [expected[task]]) for task, e in experts.items()}
    assert grams["a"]["blocks.0.mlp.fc1"].shape == (12, 12)
    states = [{n: v for n, v in m.state_dict().items() if "head" not in n} for m in (base, *experts.values())]
    by_hand = static.regmean(states[0], dict(zip(TASKS, states[1:], strict=True)), grams)
    assert torch.allclose(merged.encoder.blocks[0].mlp.fc1.weight, by_hand["blocks.0.mlp.fc1.weight"], atol=1e-5)
    named = datasets.ClassLabel(names=["one", "two"])
    labelled = {t: d.add_column("label", [0, 1, 1]).cast_column("label", named) for t, d in data.items()}
    tasks = labelled_tasks(labelled, stored(merged, tmp_path))
    assert all(torch.equal(tasks[task].inputs.read(range(3)), expected[task]) for task in TASKS)


def test_images_reach_a_model_of_transformers_through_the_image_processor_that_is_named(tmp_path):
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.4] * 3)
    processor.save_pretrained(tmp_path)
    base, experts, _ = pool_of_kind("transformers ViT")
    data = {task: pictures(3, seed, 24) for seed, task in enumerate(TASKS)}
    method = plugin.RegMean(num_examples=3, image_processor=tmp_path)
    columns = method.columns(method.pool(base, experts, None, plait.Run()), data, plait.Run())
    for task, part in data.items():
        expected = processor(images=part["image"][:], return_tensors="pt")["pixel_values"]
        assert torch.equal(columns[task].read(range(3)), expected)
    assert columns["a"].fingerprint != column_of(data["a"], Reading()).fingerprint
    with pytest.raises(ValueError, match=r"size \(24\*24\)"):  # 24 pixels as they are
        plugin.RegMean(num_examples=3).merge(base=base, experts=experts, data=data, run=plait.Run())
    with pytest.raises(ValueError, match="holds no image processor that transformers can read"):
        plugin.RegMean(image_processor=tmp_path / "none").columns(
            method.pool(base, experts, None, plait.Run()), data, plait.Run()
        )


def clip_config():
    text = {"vocab_size": 30, "max_position_embeddings": 8, "projection_dim": 6, **BLOCKS}
    return transformers.CLIPConfig(
        text_config=text, vision_config={**BLOCKS, **IMAGE, "projection_dim": 6}, projection_dim=6
    )


def open_clip_model():
    import open_clip

    return open_clip.model.CLIP(
        embed_dim=6,
        vision_cfg={"image_size": SIDE, "layers": 2, "width": 8, "patch_size": 8, "head_width": 4},
        text_cfg={"context_length": 8, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2},
    )


WHOLE = {
    "transformers CLIP": (
        lambda: transformers.CLIPModel(clip_config()),
        lambda model, images, ids: model(input_ids=ids, pixel_values=images).logits_per_image,
    ),
    "transformers CLIP's image tower": (
        lambda: transformers.CLIPVisionModelWithProjection(clip_config().vision_config),
        lambda model, images, ids: model(images).image_embeds,
    ),
    "open_clip": (open_clip_model, lambda model, images, ids: torch.cat(model(images, ids)[:2])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_models_without_a_head_come_out_of_the_store_whole(name, tmp_path):
    torch.manual_seed(0)
    build, answer = WHOLE[name]
    base = build().eval()
    experts = {task: moved(base, seed) for seed, task in enumerate(TASKS)}
    images, ids = torch.rand(3, 3, SIDE, SIDE), torch.tensor([[2, 3, 4, 29, 0, 0, 0, 0]] * 3)
    for method in ("simple-average", "task-arithmetic", "ties", "dare"):
        merged = METHODS[method].merge(base=base, experts=experts, data=None, run=plait.Run())
        with torch.no_grad():
            assert not torch.allclose(answer(merged, images, ids), answer(base, images, ids))
    loaded = stored(merged, tmp_path)
    with torch.no_grad():
        assert same(answer(loaded, images, ids), answer(merged, images, ids))


def open_clip_pair():
    from plait_clip import architectures

    return architectures.tiny("tiny", ["one", "two", "a", "photo", "of"])


def transformers_pair():
    from plait_clip import ImageInput, TransformersModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "one", "two", "a", "photo", "of"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
    )
    model = transformers.CLIPModel(clip_config())
    return TransformersModel(model, fast, ImageInput(SIDE, [0.5] * 3, [0.5] * 3))


@pytest.mark.slow
@pytest.mark.parametrize("build", [open_clip_pair, transformers_pair])
def test_image_text_models_come_out_of_the_store_with_both_towers(build, tmp_path):
    pytest.importorskip("plait_clip")
    torch.manual_seed(0)
    base = build().eval()
    experts = {task: moved(base, seed) for seed, task in enumerate(TASKS)}
    names = datasets.ClassLabel(names=["one", "two"])
    data = {
        task: pictures(6, seed, 8).add_column("label", [0] * 6).cast_column("label", names)
        for seed, task in enumerate(TASKS)
    }
    images, run = torch.rand(3, 3, 8, 8), plait.Run(on_warning=lambda sentence: None)
    for label, method in METHODS.items():
        if label in ALIKE:
            continue
        merged = method.merge(base=base, experts=experts, data=data, run=run)
        with torch.no_grad():
            assert merged.logits(images, "a").shape == (3, 2)
            if label not in STORED:
                continue
            loaded = stored(merged, tmp_path / label)
            assert same(loaded.logits(images, "a"), merged.logits(images, "a"))
            if label != "individual":
                assert same(loaded.encode_image(images), merged.encode_image(images))
                assert same(loaded.encode_text(["a photo of one"]), merged.encode_text(["a photo of one"]))
