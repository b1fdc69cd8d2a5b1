"""The method on real (small, random) models of four libraries: invariants, layouts, saving, refusals."""

import copy
import dataclasses
import re

import open_clip
import pytest
import torch
from plait_wemoe.baselines.static import task_arithmetic
from plait_wemoe.ensembling import EnsembledLinear, SparseDeltas
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.upscaling import UpscaleConfig, upscaled_linears
from plait_wemoe.wemoe import upscale
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)


def timm_vit():
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**sizes)


def open_clip_tower(batch_first=True):
    tower = open_clip.model.CLIP(
        embed_dim=10,
        vision_cfg={"image_size": 8, "layers": 3, "width": 16, "patch_size": 4, "head_width": 8},
        text_cfg={"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
    ).visual
    if not batch_first:
        tower.transformer.batch_first = False
        for block in tower.transformer.resblocks:
            block.attn.batch_first = False
    return tower


def clip_tower():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=10))


MODELS = {"timm": timm_vit, "open_clip": open_clip_tower, "transformers": clip_tower}


def output(model, images):
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out.image_embeds


def tuned(base, seed, scale=0.05):
    """A copy with every floating-point weight moved at random."""
    expert = copy.deepcopy(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in expert.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return expert


@pytest.fixture(params=list(MODELS))
def pool(request):
    torch.manual_seed(0)
    base = MODELS[request.param]().eval()
    return base, {f"t{i}": tuned(base, i).eval() for i in range(3)}, torch.rand(5, 3, 8, 8)


def sample_sensitive(model, scale=1.0):
    """Routers whose answers depend on the sample."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.router_parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_routers_that_answer_lambda_give_task_arithmetic(pool, depth):
    base, experts, images = pool
    model = upscale(
        base, experts, images, UpscaleConfig(router_depth=depth, router_init_std=0.0, init_lambda=0.3)
    ).eval()
    states = {name: expert.state_dict() for name, expert in experts.items()}
    static = copy.deepcopy(base)
    static.load_state_dict(task_arithmetic(base.state_dict(), states, 0.3))
    for routing in ("sample", "batch"):
        assert torch.allclose(output(model.set_routing(routing), images), output(static, images), atol=1e-5)


def test_one_hot_coefficients_are_the_experts_own_mlps(pool):
    base, experts, images = pool
    model = upscale(base, experts, images, UpscaleConfig())
    for t, (name, expert) in enumerate(experts.items()):
        dense = model.export_static(torch.eye(3)[t])
        assert same(dense.state_dict(), model.export_static(name).state_dict())
        for linear in upscaled_linears(base, model.blocks):
            for kind in ("weight", "bias"):
                key = f"{linear}.{kind}"
                assert torch.allclose(dense.state_dict()[key], expert.state_dict()[key], atol=1e-6)


def test_a_single_expert_with_lambda_one_is_that_expert(pool):
    base, experts, images = pool
    model = upscale(base, {"t0": experts["t0"]}, images, UpscaleConfig(init_lambda=1.0, router_init_std=0.0)).eval()
    assert torch.allclose(output(model, images), output(experts["t0"], images), atol=1e-5)


def test_experts_equal_to_the_base_give_the_base_whatever_the_routers_say(pool):
    base, _, images = pool
    model = upscale(base, {"a": base, "b": copy.deepcopy(base)}, images, UpscaleConfig()).eval()
    assert torch.allclose(output(sample_sensitive(model, 5.0), images), output(base, images), atol=1e-6)


def test_lambda_zero_and_routers_zero_give_the_base(pool):
    base, experts, images = pool
    model = upscale(base, experts, images, UpscaleConfig(init_lambda=0.0, router_init_std=0.0)).eval()
    assert torch.allclose(output(model, images), output(base, images), atol=1e-6)


def test_same_experts_with_lambda_one_over_t_are_that_expert_outside_the_mlps(pool):
    base, experts, images = pool
    model = upscale(base, dict.fromkeys("abcd", experts["t0"]), images, UpscaleConfig(init_lambda=0.25))
    routed = {f"{n}.{k}" for n in upscaled_linears(base, model.blocks) for k in ("weight", "bias")}
    expert = experts["t0"].state_dict()
    with model.plain_backbone() as backbone:
        for name, value in backbone.state_dict().items():
            want = base.state_dict()[name] if name in routed else expert[name]
            assert torch.allclose(value, want, atol=1e-6), name


@pytest.mark.parametrize("shared", [False, True])
def test_sample_routing_does_not_depend_on_the_batch(pool, shared):
    base, experts, images = pool
    config = UpscaleConfig(shared_router=shared, position_encoding=shared)
    model = sample_sensitive(upscale(base, experts, images, config).eval())
    with torch.no_grad():
        whole = output(model, images)
        for n in range(len(images)):
            assert torch.allclose(whole[n], output(model, images[n : n + 1])[0], atol=1e-5)
        order = torch.tensor([3, 1, 4, 0, 2])
        assert torch.allclose(output(model, images[order]), whole[order], atol=1e-5)
        # batch routing: the same for a batch of one or of equal samples, another where neighbours differ
        model.set_routing("batch")
        assert torch.allclose(output(model, images[:1])[0], whole[0], atol=1e-5)
        assert torch.allclose(output(model, images[:1].repeat(4, 1, 1, 1)), whole[:1].expand(4, -1), atol=1e-5)
        assert not torch.allclose(output(model, images)[0], whole[0], atol=1e-3)


def test_experts_in_another_order_with_their_router_rows(pool):
    base, experts, images = pool
    order = [2, 0, 1]
    model = sample_sensitive(upscale(base, experts, images, UpscaleConfig()).eval())
    names = list(experts)
    other = upscale(base, {names[t]: experts[names[t]] for t in order}, images, UpscaleConfig()).eval()
    other.routers.load_state_dict(model.routers.state_dict())
    with torch.no_grad():
        for router in other.routers:
            router.output.weight.copy_(router.output.weight[order])
            router.output.bias.copy_(router.output.bias[order])
        assert torch.allclose(output(other, images), output(model, images), atol=1e-5)


@pytest.mark.parametrize("compute", ["merge", "activation", "group"])
def test_strategies_agree_on_the_whole_model_and_its_router_gradients(pool, compute):
    base, experts, images = pool

    def run(name):
        model = sample_sensitive(upscale(base, experts, images, UpscaleConfig(compute=name)).eval(), 0.1)
        out = output(model, images)
        out.square().sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in model.router_parameters()])

    (out, gradient), (expected, reference) = run(compute), run("reference")
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_callers_models_are_untouched_and_only_routers_train(pool):
    base, experts, images = pool
    before = {name: state(m) for name, m in {"base": base, **experts}.items()}
    flags = [p.requires_grad for p in base.parameters()]
    model = upscale(base, experts, images, UpscaleConfig())
    output(model, images).sum().backward()
    assert all(same(before[name], m.state_dict()) for name, m in {"base": base, **experts}.items())
    assert [p.requires_grad for p in base.parameters()] == flags
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.router_parameters()}
    assert all(p.grad is not None for p in model.router_parameters())


def test_router_counts(pool):
    base, experts, images = pool
    d, T = {12: 12, 16: 16}[upscale(base, experts, images, UpscaleConfig()).blocks[0].width], 3
    one = d * d + d + d * T + T
    assert upscale(base, experts, images, UpscaleConfig()).summary()["routers"] == 3 * one
    assert upscale(base, experts, images, UpscaleConfig(shared_router=True)).summary()["routers"] == one
    coded = UpscaleConfig(shared_router=True, position_encoding=True, position_encoding_dim=4)
    w = d + 4
    assert upscale(base, experts, images, coded).summary()["routers"] == w * w + w + w * T + T


CONFIGS = {
    "wemoe": UpscaleConfig(),
    "e-wemoe": UpscaleConfig(shared_router=True, prune_ratio=0.9, position_encoding=True),
    "low rank": UpscaleConfig(delta_storage="lowrank", delta_rank=2, router_depth=1),
    "depth 0": UpscaleConfig(router_depth=0, prune_ratio=0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("routing", ["sample", "batch", "fixed"])
def test_saved_and_loaded_it_answers_bit_by_bit_the_same(pool, tmp_path, config, routing):
    base, experts, images = pool
    model = sample_sensitive(upscale(base, experts, images, config, seed=4).eval())
    model.set_routing(routing, torch.rand(3, 3))
    model.save_pretrained(tmp_path)
    loaded = WeightEnsemblingMoE.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(loaded, images), output(model, images))
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.sources == model.sources
    assert len(loaded.routers) == (1 if config.shared_router else 3)


def test_sparse_task_vectors_are_sparse_on_disk_and_counted(pool, tmp_path):
    base, experts, images = pool
    model = upscale(base, experts, images, UpscaleConfig(prune_ratio=0.9, shared_router=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "moe.safetensors")
    values = sum(t.numel() for name, t in tensors.items() if name.endswith(".values"))
    indices = [t for name, t in tensors.items() if name.endswith(".indices")]
    assert values == sum(t.numel() for t in indices)
    assert {t.dtype for t in indices} == {torch.int32}
    kept = 0
    for linear in upscaled_linears(base, model.blocks):
        for kind in ("weight", "bias"):
            n = base.state_dict()[f"{linear}.{kind}"].numel()
            kept += 3 * (n - 1 - int(torch.tensor(0.9) * (n - 1)))
    assert values == kept
    assert sum(t.numel() for t in tensors.values()) == 2 * kept + model.summary()["routers"]


def test_sparse_and_dense_storage_of_the_same_pruned_vectors_agree(pool):
    base, experts, images = pool
    config = UpscaleConfig(prune_ratio=0.8)
    sparse, dense = (
        upscale(base, experts, images, dataclasses.replace(config, delta_storage=s)).eval() for s in ("auto", "dense")
    )
    assert any(isinstance(m, SparseDeltas) for m in sparse.modules())
    for a, b in zip(sparse.modules(), dense.modules(), strict=True):
        if isinstance(a, EnsembledLinear):
            assert torch.equal(a.deltas.dense(), b.deltas.dense())
    sample_sensitive(sparse), sample_sensitive(dense)
    for routing in ("sample", "batch"):
        one, two = (output(m.set_routing(routing), images) for m in (sparse, dense))
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "block", "model"])
def test_pruning_granularity_shares_thresholds(pool, granularity):
    base, experts, images = pool
    model = upscale(base, experts, images, UpscaleConfig(prune_ratio=0.7, prune_granularity=granularity))
    layers = [m for m in model.modules() if isinstance(m, EnsembledLinear)]
    every = [torch.cat([layer.deltas.dense()[0].flatten(), layer.bias_deltas[0]]) for layer in layers]
    kept = torch.tensor([(v != 0).sum() for v in every], dtype=torch.float64)
    sizes = torch.tensor([v.numel() for v in every], dtype=torch.float64)
    assert abs(kept.sum() / sizes.sum() - 0.3) < 0.02
    vectors = torch.cat([v[v != 0].abs() for v in every])
    dropped = [
        (e - b).abs()[~p.bool()]
        for p, e, b in (
            (layer.deltas.dense()[0] != 0, experts["t0"].state_dict()[f"{n}.weight"], base.state_dict()[f"{n}.weight"])
            for n, layer in zip(upscaled_linears(base, model.blocks), layers, strict=True)
        )
    ]
    if granularity == "model":
        assert torch.cat(dropped).max() <= vectors.min() + 1e-6


def test_export_of_fixed_weights_equals_input_independent_routers(pool):
    base, experts, images = pool
    weights = torch.tensor([0.5, -0.2, 1.1])
    model = upscale(base, experts, images, UpscaleConfig(router_depth=0)).eval()
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(weights)
        expected = output(model, images)
        assert torch.allclose(output(model.export_static(weights).eval(), images), expected, atol=1e-5)
        assert torch.allclose(output(model.set_routing("fixed", weights), images), expected, atol=1e-5)
    assert not any(isinstance(m, EnsembledLinear) for m in model.export_static(weights).modules())


def test_routing_weights_shape_and_meaning(pool):
    base, experts, images = pool
    model = sample_sensitive(upscale(base, experts, images, UpscaleConfig()).eval())
    weights = model.routing_weights(images)
    assert weights.shape == (3, 5, 3)
    assert torch.allclose(weights[:, :1], model.routing_weights(images[:1]), atol=1e-5)


def test_routers_alone_reattach_to_the_same_models_only(pool, tmp_path):
    base, experts, images = pool
    model = sample_sensitive(upscale(base, experts, images, UpscaleConfig()).eval())
    model.save_routers(tmp_path / "routers.safetensors")
    again = (
        upscale(base, experts, images, UpscaleConfig(), seed=9).load_routers(tmp_path / "routers.safetensors").eval()
    )
    assert torch.equal(output(again, images), output(model, images))
    other = upscale(base, {**experts, "t2": tuned(base, 8)}, images, UpscaleConfig())
    with pytest.raises(ValueError, match="other base or expert weights"):
        other.load_routers(tmp_path / "routers.safetensors")


def test_seeds_decide_the_routers_and_global_randomness_is_left_alone(pool):
    base, experts, images = pool
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (upscale(base, experts, images, UpscaleConfig(), seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    assert same(a.routers.state_dict(), b.routers.state_dict())
    assert not same(a.routers.state_dict(), c.routers.state_dict())


def test_pruned_routers(pool):
    base, experts, images = pool
    model = sample_sensitive(upscale(base, experts, images, UpscaleConfig(shared_router=True)))
    weight = model.routers[0].output.weight.detach().clone()
    model.prune_routers(0.5)
    left = model.routers[0].output.weight
    assert int((left != 0).sum()) == weight.numel() - 1 - int(0.5 * (weight.numel() - 1))
    assert torch.equal(left[left != 0], weight[left != 0])


def test_copies_are_independent(pool):
    base, experts, images = pool
    model = sample_sensitive(upscale(base, experts, images, UpscaleConfig()).eval())
    expected = output(model, images)
    twin = copy.deepcopy(model)
    sample_sensitive(twin, 9.0)
    assert torch.equal(output(model, images), expected)
    assert not torch.allclose(output(twin, images), expected)


# ------------------------------------------------------------------------------- layouts and families


def test_layout_is_found_from_the_model():
    torch.manual_seed(0)
    first = open_clip_tower(batch_first=True).eval()
    second = open_clip_tower(batch_first=False).eval()
    second.load_state_dict(first.state_dict())
    images = torch.rand(5, 3, 8, 8)  # five samples, five tokens: shapes alone could not tell
    experts = {f"t{i}": tuned(first, i) for i in range(2)}
    models = [sample_sensitive(upscale(base, experts, images, UpscaleConfig()).eval()) for base in (first, second)]
    assert [m.blocks[0].batch_axis for m in models] == [0, 1]
    assert torch.allclose(models[0](images), models[1](images), atol=1e-5)


def test_only_the_tower_that_the_input_passes_is_up_scaled():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = open_clip.model.CLIP(
                embed_dim=10,
                vision_cfg={"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8},
                text_cfg={"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
            )

        def forward(self, images):
            return self.clip.encode_image(images)

    base = Both()
    model = upscale(base, {"a": tuned(base, 1)}, torch.rand(1, 3, 8, 8), UpscaleConfig())
    assert [block.modules for block in model.blocks] == [("clip.visual.transformer.resblocks.0.mlp",)]


def test_attention_of_timm_and_transformers():
    for build in (timm_vit, clip_tower):
        base = build().eval()
        config = UpscaleConfig(upscale=("mlp", "attention"), init_lambda=1.0, router_init_std=0.0)
        images = torch.rand(2, 3, 8, 8)
        expert = tuned(base, 1).eval()
        model = upscale(base, {"a": expert}, images, config).eval()
        assert len(model.blocks) == 6
        assert torch.allclose(output(model, images), output(expert, images), atol=1e-5)


def test_attention_without_linear_calls_is_refused():
    base = open_clip_tower()
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention"):
        upscale(base, {"a": tuned(base, 1)}, torch.rand(1, 3, 8, 8), UpscaleConfig(upscale=("attention",)))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_text_encoders_ignore_padding(family):
    torch.manual_seed(0)
    if family == "bert":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=False).eval()
    else:
        base = T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)).eval()
    experts = {f"t{i}": tuned(base, i) for i in range(2)}
    short = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    model = sample_sensitive(upscale(base, experts, short, UpscaleConfig()).eval(), 0.3)
    assert len(model.blocks) == 2
    with torch.no_grad():
        one = model(**short).last_hidden_state[0]
        two = model(**padded).last_hidden_state[0, :3]
    assert torch.allclose(one, two, atol=1e-5)


def test_any_module_by_pattern():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    base = Net()
    expert = tuned(base, 1)
    x = torch.rand(3, 6)
    with pytest.raises(ValueError, match="no module on the way"):
        upscale(base, {"a": expert}, x, UpscaleConfig())
    config = UpscaleConfig(pattern="(?P<block>)(first|second)", init_lambda=1.0, router_init_std=0.0)
    model = upscale(base, {"a": expert}, x, config)
    assert [block.modules for block in model.blocks] == [("first", "second")]
    assert torch.allclose(model(x), expert(x), atol=1e-6)


# ------------------------------------------------------------------------------------------- refusals


def broken(change):
    base = timm_vit()
    weights = state(tuned(base, 1))
    change(weights)
    return base, weights


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w.pop("norm.weight"), KeyError, "missing ['norm.weight']"),
        (lambda w: w.update(extra=torch.zeros(1)), KeyError, "surplus ['extra']"),
        (lambda w: w.update({"norm.weight": torch.zeros(5)}), ValueError, "norm.weight is (5,) in expert 'a', (12,)"),
        (lambda w: w["norm.weight"].fill_(float("nan")), ValueError, "norm.weight of expert 'a' holds a value"),
        (lambda w: w.update({"norm.weight": torch.zeros(12, dtype=torch.int8)}), TypeError, "dequantise"),
    ],
)
def test_experts_that_do_not_fit(change, error, message):
    base, weights = broken(change)
    with pytest.raises(error, match=re.escape(message)):
        upscale(base, {"a": weights}, torch.rand(1, 3, 8, 8), UpscaleConfig())


def test_no_expert_and_unmerged_adapters():
    base = timm_vit()
    with pytest.raises(ValueError, match="no expert"):
        upscale(base, {}, torch.rand(1, 3, 8, 8), UpscaleConfig())

    class Adapter(nn.Linear):
        def merge_and_unload(self): ...

    with pytest.raises(TypeError, match="merge_and_unload"):
        upscale(base, {"a": Adapter(1, 1)}, torch.rand(1, 3, 8, 8), UpscaleConfig())


def test_experts_from_files(tmp_path):
    base = timm_vit().eval()
    expert = tuned(base, 1)
    torch.save(expert.state_dict(), tmp_path / "a.pt")
    model = upscale(
        base, {"a": tmp_path / "a.pt"}, torch.rand(1, 3, 8, 8), UpscaleConfig(router_init_std=0, init_lambda=1.0)
    )
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(model.eval()(images), expert.eval()(images), atol=1e-5)
    (tmp_path / "a.pt").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        upscale(base, {"a": tmp_path}, torch.rand(1, 3, 8, 8), UpscaleConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"prune_ratio": 1.1},
        {"router_depth": 3},
        {"delta_storage": "x"},
        {"delta_storage": "lowrank"},
        {"compute": "fast"},
        {"upscale": ("norm",)},
        {"prune_granularity": "row"},
        {"merge_dtype": "int8"},
    ],
)
def test_wrong_configuration(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if wrong != {"delta_storage": "lowrank"} else "delta_rank"):
        UpscaleConfig(**wrong)


def test_wrong_routing():
    base = timm_vit()
    model = upscale(base, {"a": tuned(base, 1)}, torch.rand(1, 3, 8, 8), UpscaleConfig())
    with pytest.raises(ValueError, match="routing is 'token'"):
        model.set_routing("token")
    with pytest.raises(ValueError, match="shape"):
        model.set_routing("fixed", torch.rand(2))
    with pytest.raises(ValueError, match="'b' is not an expert"):
        model.export_static("b")
