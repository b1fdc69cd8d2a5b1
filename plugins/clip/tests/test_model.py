import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_clip import digit_pairs, toy_data
from plait_clip.model import (
    CallableModel,
    ImageInput,
    ImageTextModel,
    OpenClipModel,
    ProcessorInput,
    TransformersModel,
    WordTokenizer,
    architectures,
)
from plait_clip.model.open_clip_model import build
from plait_clip.plugin.models import OpenClip, TransformersClip
from plait_clip.plugin.training import ClipContrastive
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

TEXTS = ["a photo of the number one", "two", "this is the number three", "two"]


def hf_tokenizer(pad: str) -> transformers.PreTrainedTokenizerFast:
    words = [
        "[PAD]",
        "[UNK]",
        *["a", "photo", "of", "the", "number", "one", "two", "three", "this", "is"],
        "[CLS]",
        "[SEP]",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def text_tower(**more):
    return {
        "vocab_size": 14,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        **more,
    }


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def hf_clip(image_input: ImageInput | None = None) -> TransformersModel:
    config = transformers.CLIPConfig(
        text_config=text_tower(bos_token_id=12, eos_token_id=13, pad_token_id=13),
        vision_config=VISION,
        projection_dim=8,
    )
    return TransformersModel(
        transformers.CLIPModel(config).eval(),
        hf_tokenizer("[SEP]"),
        image_input or ImageInput(16, [0.5] * 3, [0.5] * 3),
    )


def hf_siglip() -> TransformersModel:
    config = transformers.SiglipConfig(text_config=text_tower(projection_size=16), vision_config=VISION)
    image = ImageInput(16, [0.5] * 3, [0.5] * 3, resize="squash")
    return TransformersModel(transformers.SiglipModel(config).eval(), hf_tokenizer("[PAD]"), image)


def hf_blip() -> TransformersModel:
    config = transformers.BlipConfig(
        text_config=text_tower(encoder_hidden_size=16, pad_token_id=0, bos_token_id=12, sep_token_id=13),
        vision_config=VISION,
        image_text_hidden_size=8,
    )
    image = ImageInput(16, [0.5] * 3, [0.5] * 3, resize="squash")
    return TransformersModel(transformers.BlipForImageTextRetrieval(config).eval(), hf_tokenizer("[PAD]"), image)


class TwoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(3, 5), nn.EmbeddingBag(100, 5, padding_idx=0)


def two_linear() -> CallableModel:
    return CallableModel(
        TwoLinear(),
        lambda module, pixels: module.image(pixels.mean(dim=(2, 3))),
        lambda module, tokens: module.text(tokens),
        WordTokenizer(TEXTS, 8),
        ImageInput(4, [0.0] * 3, [1.0] * 3),
        context_length=8,
        factory=f"{__name__}:two_linear",
    )


def tiny() -> OpenClipModel:
    return architectures.tiny("tiny").eval()


MAKERS = [tiny, hf_clip, hf_siglip, hf_blip]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("make", [*MAKERS, two_linear])
def test_every_model_keeps_the_interface(make):
    model = make()
    images = torch.rand(3, 3, 20, 13, requires_grad=True)
    u, v = model.encode_image(images), model.encode_text(TEXTS)
    assert u.shape == (3, v.shape[1])
    assert v.shape[0] == 4
    torch.testing.assert_close(v[1], v[3], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(u.sum(), images)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    tokens = model.tokenize(TEXTS)
    assert tokens.shape == (4, model.context_length)
    assert tokens.dtype == torch.long
    # Cutting the padding off changes nothing but rounding.
    torch.testing.assert_close(model.encode_tokens(tokens), v, rtol=1e-4, atol=1e-5)
    assert model.truncated(["one", "one " * 10_000]) == [False, True]
    assert torch.isfinite(model.encode_text(["one " * 10_000])).all()
    assert isinstance(model.logit_scale, nn.Parameter)
    assert any(model.logit_scale is parameter for parameter in model.parameters())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_come_back_exactly(make, dtype, tmp_path):
    model = make().to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(3.25)
    model.save_pretrained(tmp_path)
    again = ImageTextModel.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.kind == model.kind
    images = torch.rand(2, 3, 20, 13)
    torch.testing.assert_close(again.encode_image(images), model.encode_image(images), rtol=0, atol=0)
    torch.testing.assert_close(again.encode_text(TEXTS), model.encode_text(TEXTS), rtol=0, atol=0)
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert float(again.logit_scale.detach()) == 3.25


def test_callable_models_are_saved_by_the_name_of_their_factory(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    model = two_linear()
    model.save_pretrained(tmp_path)
    again = ImageTextModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode_text(TEXTS), model.encode_text(TEXTS), rtol=0, atol=0)
    model.factory = None
    with pytest.raises(ValueError, match="factory"):
        model.save_pretrained(tmp_path / "other")


def _this_module():
    import types

    module = types.ModuleType(__name__)
    module.two_linear = two_linear
    return module


def test_open_clip_reads_our_folders(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}")
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(theirs.eval().encode_image(model.image_input(x)), model.encode_image(x))


def test_transformers_reads_our_folders(tmp_path):
    model = hf_clip()
    model.save_pretrained(tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path)
    tokens = model.tokenize(TEXTS)
    found = theirs.get_text_features(input_ids=tokens)
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    torch.testing.assert_close(found, model.encode_tokens(tokens))


def test_transformers_folders_with_their_image_processor(run, tmp_path):
    model = hf_clip()
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    ).save_pretrained(tmp_path)
    loaded = TransformersClip(source=str(tmp_path)).load_model(run=run[0])
    assert loaded.image_size == 16
    assert loaded.image_input.config()["resize"] == "crop"
    assert loaded.image_input.config()["mean"] == [0.4] * 3
    x = torch.rand(2, 3, 16, 16)
    expected = model.model.get_image_features(pixel_values=(x - 0.4) / 0.3)
    torch.testing.assert_close(loaded.encode_image(x), getattr(expected, "pooler_output", expected))


# Versions of transformers have two or three of these; all have the first.
PROCESSORS = [
    "CLIPImageProcessor",
    *(n for n in ("CLIPImageProcessorPil", "CLIPImageProcessorFast") if hasattr(transformers, n)),
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_image_processor_is_saved_with_the_model(name, tmp_path):
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    processor = getattr(transformers, name)(**sizes, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    hf_clip(ProcessorInput(processor)).save_pretrained(tmp_path)
    again = ImageTextModel.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8))
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = again.image_input(torch.from_numpy(again.image_input.from_pil(image).copy())[None].float() / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert list(transformers.AutoImageProcessor.from_pretrained(tmp_path).image_mean) == [0.4] * 3


def test_fusion_scores_pairs_as_the_library_does():
    model = hf_blip()
    images = torch.rand(3, 3, 16, 16)
    texts = TEXTS[:3]
    tokens = model.tokenizer(texts, padding=True, return_tensors="pt")
    itm = model.model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=(images - 0.5) / 0.5
    ).itm_score
    torch.testing.assert_close(model.match(images, texts), itm[:, 1] - itm[:, 0])
    with pytest.raises(ValueError, match="2 texts"):
        model.match(images, texts[:2])
    with pytest.raises(TypeError, match="fusion"):
        hf_clip().match(images, texts)


def test_images_are_resized_cropped_and_normalised():
    image = ImageInput(4, [0.1, 0.2, 0.3], [0.5, 0.25, 0.2])
    x = torch.rand(2, 3, 4, 4)
    expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(image(x), expected)
    wide = torch.zeros(1, 3, 4, 8)
    wide[..., 2:6] = 1  # the centre
    torch.testing.assert_close(image.to_size(wide), torch.ones(1, 3, 4, 4))
    squashed = ImageInput(4, [0.0] * 3, [1.0] * 3, resize="squash").to_size(wide)
    assert squashed[..., 0].max() < 0.5 < squashed[..., 1].min()


@given(height=st.integers(3, 40), width=st.integers(3, 40), size=st.integers(2, 24))
@settings(max_examples=60, deadline=None)
def test_resized_images_stay_images(height, width, size):
    x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    for resize in ("crop", "squash"):
        found = ImageInput(size, [0.0] * 3, [1.0] * 3, resize=resize).to_size(x)
        assert found.shape == (1, 3, size, size)
        assert 0 <= found.min() <= found.max() <= 1


@given(st.lists(st.text(alphabet="abc 12é", min_size=1, max_size=30), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_word_tokens_end_in_the_largest_id(texts):
    tokenizer = WordTokenizer(["ab", "b", "12"], 6)
    tokens = tokenizer(texts)
    assert tokens.shape == (len(texts), 6)
    assert (tokens.max(dim=1).values == tokenizer.eot_id).all()
    assert ((tokens == tokenizer.eot_id).sum(dim=1) == 1).all()


def test_word_tokens_by_hand():
    tokenizer = WordTokenizer(["two one"], 5)
    assert tokenizer(["One, TWO!", "one unknown", "one two one two"]).tolist() == [
        [3, 1, 2, 4, 0],
        [3, 1, 4, 0, 0],
        [3, 1, 2, 1, 4],
    ]


def openai_style(vision: dict) -> dict:
    return {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision",
    [
        {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32},
        {"layers": [1, 2, 1, 1], "width": 16, "patch_size": None, "image_size": 64},
    ],
    ids=["vit", "resnet"],
)
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_openais_files_tell_their_architecture_and_others_are_asked_for_it(vision, quick_gelu, run, tmp_path):
    config = {**openai_style(vision), "quick_gelu": quick_gelu}
    original = build(config).eval()
    state = {f"module.{name}": tensor for name, tensor in original.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    # Its weights look the same with either activation.
    with pytest.raises(ValueError, match=r"neither its activation nor its heads.*quick_gelu: true"):
        OpenClip(checkpoint=tmp_path / "epoch_3.pt").load_model(data=None, run=run[0])
    model = OpenClip(config=config, checkpoint=tmp_path / "epoch_3.pt").load_model(data=None, run=run[0])
    same_as(original, model)
    if quick_gelu:
        marks = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
        marked = original.state_dict() | {name: torch.tensor(value) for name, value in marks.items()}
        torch.save(marked, tmp_path / "openai.pt")
        model = OpenClip(checkpoint=tmp_path / "openai.pt").load_model(data=None, run=run[0])
        assert model.config == config
        same_as(original, model)


def same_as(original: nn.Module, model: OpenClipModel) -> None:
    x = torch.rand(2, 3, model.image_size, model.image_size)
    torch.testing.assert_close(model.encode_image(x), original.encode_image(model.image_input(x)), rtol=0, atol=0)
    tokens = model.tokenize(TEXTS)
    torch.testing.assert_close(model.encode_tokens(tokens), original.encode_text(tokens), rtol=0, atol=0)


def test_a_question_names_the_architectures_of_these_shapes(run, tmp_path):
    from safetensors.torch import save_file

    config = architectures.with_image_size(architectures.open_clip_architecture("ViT-B-32"), None)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 12
    with torch.device("meta"):
        shapes = build(config).state_dict()
    # Only what shapes are read off.
    kept = {name: tensor for name, tensor in shapes.items() if "resblocks" not in name or "in_proj_weight" in name}
    save_file(
        {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in kept.items()},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ValueError, match="give its architecture too: ViT-B-32 or ViT-B-32-quickgelu"):
        OpenClip(checkpoint=tmp_path / "b.safetensors").load_model(data=None, run=run[0])


@pytest.mark.parametrize(
    "stored",
    [
        lambda state: state,
        lambda state: {"model_state_dict": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"params_ema": state, "params": {name: tensor * 0 for name, tensor in state.items()}},
    ],
    ids=["plain", "compiled", "lightning", "averaged"],
)
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "pth"])
def test_checkpoints_as_people_have_them(stored, suffix, run, tmp_path):
    original = tiny()
    torch.save(stored(dict(original.model.state_dict())), tmp_path / f"tiny.{suffix}")
    model = OpenClip(architecture="tiny", checkpoint=tmp_path / f"tiny.{suffix}").load_model(data=None, run=run[0])
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_openais_torchscript_archives_are_read(run, tmp_path):
    config = openai_style({"layers": 1, "width": 64, "patch_size": 16, "image_size": 32})
    original = build(config).eval()
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(original, name):
            delattr(original, name)
        original.register_buffer(name, torch.tensor(value))
    del original.attn_mask  # no buffer in OpenAI's own code
    archive = torch.jit.trace_module(original, {"encode_image": torch.rand(1, 3, 32, 32)})
    archive.save(str(tmp_path / "jit.pt"))
    model = OpenClip(checkpoint=tmp_path / "jit.pt").load_model(data=None, run=run[0])
    assert model.config == config
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(x), original.encode_image(model.image_input(x)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quick"), [("ViT-B-32", True), ("ViT-B-32-quickgelu", True)])
def test_the_weights_of_a_tag_say_which_activation_they_have(name, quick, run, tmp_path, monkeypatch):
    """Tags as open_clip knows them; the download is a file of random weights."""
    config = architectures.open_clip_architecture("ViT-B-32")
    small = {**config["vision_cfg"], "layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    config = {**config, "vision_cfg": small, "text_cfg": {**config["text_cfg"], "width": 64, "heads": 1, "layers": 1}}
    original = build({**config, "quick_gelu": quick}).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(architectures, "download_pretrained", lambda found: str(tmp_path / "weights.pt"))
    monkeypatch.setattr(architectures, "get_model_config", lambda asked: dict(config))
    model = OpenClip(architecture=name, pretrained="openai").load_model(data=None, run=run[0])
    assert model.config["quick_gelu"] is quick
    same_as(original, model)
    # LAION's own weights of this architecture have GELU.
    gelu = build(config).eval()
    torch.save(gelu.state_dict(), tmp_path / "weights.pt")
    if name == "ViT-B-32":
        same_as(gelu, OpenClip(architecture=name, pretrained="laion2b_s34b_b79k").load_model(data=None, run=run[0]))


def test_an_open_clip_configuration_may_name_a_tokenizer_of_transformers(tmp_path):
    hf_tokenizer("[PAD]").save_pretrained(tmp_path)
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {**text, "hf_tokenizer_name": str(tmp_path)},
    }
    model = architectures.from_config(config)
    assert model.tokenize(["two", "a photo"]).shape == (2, 8)
    assert len(model.encode_text(["two", "a photo"]).unique(dim=0)) == 2


def test_a_transformers_folder_needs_its_tokenizer(run, tmp_path):
    model = hf_clip()
    model.model.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer|cannot load"):
        TransformersClip(source=str(tmp_path)).load_model(run=run[0])
    model.tokenizer.save_pretrained(tmp_path)
    assert TransformersClip(source=str(tmp_path)).load_model(run=run[0]).context_length == 12
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        TransformersClip(source=str(tmp_path)).load_model(run=run[0])


@pytest.mark.slow
def test_architecture_from_json_and_inline_and_checkpoint(run, tmp_path):
    config = openai_style({"layers": 1, "width": 64, "patch_size": 16, "image_size": 32})
    (tmp_path / "small.json").write_text(json.dumps(config))
    a = OpenClip(architecture=str(tmp_path / "small.json")).load_model(data=None, run=run[0])
    b = OpenClip(config=config).load_model(data=None, run=run[0])
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)  # same seed, same weights
    a.save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "open_clip_model.safetensors"
    c = OpenClip(config=config, checkpoint=weights, image_size=64).load_model(data=None, run=run[0])
    assert c.image_size == 64
    assert OpenClip(checkpoint=tmp_path / "a").load_model(data=None, run=run[0]).image_size == 32


@pytest.mark.slow
def test_a_known_architecture(run):
    model = OpenClip(architecture="ViT-B-32", config=None, image_size=32).load_model(data=None, run=run[0])
    assert model.image_size == 32
    assert model.context_length == 77
    tokens = model.tokenize(["a dog " * 60])
    assert tokens[0, -1] == 49407  # the cut text keeps its end
    assert model.trim(model.tokenize(["a dog"])).shape == (1, 4)


def test_words_of_the_data_make_the_vocabulary(run, digits):
    model = OpenClip(context_length=9).load_model(data=digits, run=run[0])
    assert "seven" in model.tokenizer.words
    assert "bag" not in model.tokenizer.words
    assert model.context_length == 9


def test_users_mistakes_are_one_sentence(run, tmp_path):
    run = run[0]
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    cases = {
        "did you mean 'ViT-B-32'": OpenClip(architecture="ViT-B32"),
        "is not a file": OpenClip(checkpoint=tmp_path / "missing.pt"),
        "is not a file of weights": OpenClip(checkpoint=tmp_path / "junk.pt"),
        "Git LFS pointer": OpenClip(architecture="tiny", checkpoint=tmp_path / "pointer.pt"),
        "give its architecture": OpenClip(checkpoint=tmp_path / "other.pt"),
        "neither plait.json": OpenClip(checkpoint=tmp_path / "empty"),
        "does not fit": OpenClip(architecture="tiny", checkpoint=tmp_path / "other.pt"),
        "lacks embed_dim": OpenClip(config={"vision_cfg": {}, "text_cfg": {}}),
        "is not one of the weights of ViT-B-32": OpenClip(architecture="ViT-B-32", pretrained="nowhere"),
    }
    for message, method in cases.items():
        with pytest.raises(ValueError, match=message):
            method.load_model(data=None, run=run)
    with pytest.raises(ValueError, match="give one"):
        OpenClip(architecture="tiny", config={})
    with pytest.raises(TypeError, match="encode_text"):
        OpenClipModel(nn.Linear(2, 2), {}, WordTokenizer(["a"]), ImageInput(4, [0.0] * 3, [1.0] * 3))
    with pytest.raises(TypeError, match="both towers"):
        CallableModel(nn.Linear(2, 2), lambda m, x: x, None, WordTokenizer(["a"]), ImageInput(4, [0.0] * 3, [1.0] * 3))
    vision_only = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(TypeError, match="both towers"):
        TransformersModel(vision_only, None, ImageInput(16, [0.0] * 3, [1.0] * 3))


def test_missing_transformers_models_are_one_sentence(run, tmp_path):
    with pytest.raises(ValueError, match="transformers cannot load") as caught:
        TransformersClip(source=str(tmp_path)).load_model(run=run[0])
    assert "\n" not in str(caught.value)


def test_global_randomness_is_left_alone(run):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    OpenClip().load_model(data=None, run=run[0])
    assert np.array_equal(state.numpy(), torch.get_rng_state().numpy())


def test_one_tower_of_a_callable_model_is_trained_where_it_says_which_weights_are_whose():
    encoders = (lambda module, x: module.image(x.mean(dim=(2, 3)))), (lambda module, tokens: module.text(tokens))
    data = digit_pairs(20)
    model = CallableModel(
        TwoLinear(),
        *encoders,
        WordTokenizer(toy_data.vocabulary(), 8),
        ImageInput(8, [0.0] * 3, [1.0] * 3),
        context_length=8,
        image_prefixes=["module.image."],
    )
    assert set(model.text_state()) == {"module.text.weight"}
    trained = ClipContrastive(train="image", num_epochs=1, batch_size=10, warmup_steps=1).optimize(model, data, Run())
    assert torch.equal(trained.module.text.weight, model.module.text.weight)
    assert not torch.equal(trained.module.image.weight, model.module.image.weight)
