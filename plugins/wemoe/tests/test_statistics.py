"""What is not a plain weight: running statistics, counts, tied tensors, shared modules, values beyond the range."""

import copy

import datasets
import numpy as np
import plait
import pytest
import torch
from PIL import Image
from plait_wemoe import plugin
from plait_wemoe.baselines import adaptive, static
from plait_wemoe.columns import Reading, column_of
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.states import merged_buffer, state_of, weight_names, with_state
from plait_wemoe.upscaling import UpscaleConfig
from plait_wemoe.wemoe import upscale
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.body(x))


def moved(base, seed, scale=0.1):
    model, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def normed_pool():
    """Four experts whose variances are a fraction of the base's: extrapolated by 0.3 they would be negative."""
    torch.manual_seed(0)
    base = Normed().eval()
    base.body[1].running_var.fill_(10.0)
    base.body[1].num_batches_tracked.fill_(100)
    experts = {}
    for number in range(4):
        expert = moved(base, number)
        expert.body[1].running_var.fill_(0.1 * (number + 1))
        expert.body[1].running_mean.fill_(float(number))
        expert.body[1].num_batches_tracked.fill_(100 + number)
        experts[f"t{number}"] = expert
    return base, experts


STATIC = {
    "simple average": static.simple_average,
    "task arithmetic": lambda b, e: static.task_arithmetic(b, e, 0.3),
    "TIES": lambda b, e: static.ties(b, e, 0.3, 20),
    "DARE": lambda b, e: static.dare(b, e, 0.5, static.arithmetic(0.3), torch.Generator().manual_seed(0)),
    "Fisher": lambda b, e: static.fisher(b, e, {t: {n: torch.ones_like(b[n]) for n in weight_names(b)} for t in e}),
    "RegMean": lambda b, e: static.regmean(b, e, {t: {} for t in e}),
}


@pytest.mark.parametrize("merge", STATIC.values(), ids=STATIC)
def test_statistics_are_averaged_and_never_extrapolated(merge):
    base, experts = normed_pool()
    merged = merge(base.state_dict(), {name: expert.state_dict() for name, expert in experts.items()})
    assert torch.allclose(merged["body.1.running_var"], torch.full((4,), 0.25))
    assert torch.allclose(merged["body.1.running_mean"], torch.full((4,), 1.5))
    assert merged["body.1.num_batches_tracked"] == 102  # 101.5, to even
    assert merged["body.1.num_batches_tracked"].dtype == torch.int64
    base.load_state_dict(merged)
    assert torch.isfinite(base(torch.rand(2, 3, 8, 8))).all()


@pytest.mark.parametrize("method", [plugin.AdaMerging(num_steps=0), plugin.Concrete(num_steps=0)])
def test_trained_merges_average_them_too(method):
    from plait_wemoe.pool import pool_of

    base, experts = normed_pool()
    pool = pool_of(base, experts, {}, "photo")
    merge = adaptive.adamerging if isinstance(method, plugin.AdaMerging) else adaptive.concrete_adamerging
    heads, batches = pool.task_heads, {name: [torch.rand(2, 3, 8, 8)] for name in experts}
    state, _ = merge(pool.base, pool.states, heads, batches, num_steps=0)
    assert torch.allclose(state["body.1.running_var"], torch.full((4,), 0.25))


def pictures(number, side=8):
    draw = np.random.default_rng(0)
    cells = [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]
    return datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))


def test_statistics_are_recomputed_from_data_where_the_field_says_so():
    base, experts = normed_pool()
    data = dict.fromkeys(experts, pictures(6))
    said = []
    run = plait.Run(on_warning=said.append)
    merged = plugin.SimpleAverage(statistics="recompute").merge(base=base, experts=experts, data=data, run=run)
    norm = merged.encoder.body[1]
    seen = merged.encoder.body[0](column_of(data["t0"], Reading()).read(range(6)))
    assert torch.allclose(norm.running_mean, seen.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, seen.var(dim=(0, 2, 3)), atol=1e-5)
    assert not norm.training
    assert norm.momentum == 0.1
    assert not said
    with pytest.raises(KeyError, match="no unlabelled data"):
        plugin.SimpleAverage(statistics="recompute").merge(base=base, experts=experts, data=None, run=plait.Run())


def test_integer_buffers():
    same = torch.tensor([3, 1, 2])
    assert torch.equal(merged_buffer("index", torch.zeros(3, dtype=torch.int64), [same, same]), same)
    with pytest.raises(ValueError, match=r"buffer index holds torch\.int64 values that differ"):
        merged_buffer("index", same, [same, same.flip(0)])
    with pytest.raises(ValueError, match="buffer flag"):
        merged_buffer("flag", torch.tensor(True), [torch.tensor(True), torch.tensor(False)])


@pytest.mark.parametrize("name", ["task arithmetic", "TIES", "DARE"])
def test_what_leaves_the_range_is_refused_with_tensor_and_method(name):
    base = {"a.weight": torch.zeros(4, dtype=torch.float16)}
    experts = {f"t{i}": {"a.weight": torch.full((4,), 60000.0, dtype=torch.float16)} for i in range(4)}
    method = "task arithmetic" if name == "DARE" else name
    with pytest.raises(ValueError, match=f"a.weight merged by {method} is beyond the range of torch.float16"):
        STATIC[name](base, experts)


def test_the_plugin_and_the_static_part_of_a_mixture_refuse_it_too():
    base = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval().half()
    experts = {f"t{i}": moved(base, i) for i in range(2)}
    with torch.no_grad():
        for expert in experts.values():
            expert.embeddings.word_embeddings.weight.fill_(60000.0)
    with pytest.raises(ValueError, match=r"word_embeddings.weight merged by task arithmetic is beyond"):
        plugin.TaskArithmetic(scaling=1.0).merge(base=base, experts=experts, data=None, run=plait.Run())
    with pytest.raises(ValueError, match="merged by the static part of WEMoE"):
        upscale(base, experts, {"input_ids": torch.tensor([[1, 2]])}, UpscaleConfig(init_lambda=1.0))


SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


# --------------------------------------------------------------------------------------- tied and shared


class Tied(nn.Module):
    """Two names of one matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.middle = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.mark.parametrize("merge", [STATIC["TIES"], STATIC["DARE"]], ids=["TIES", "DARE"])
def test_a_tied_tensor_counts_once(merge):
    torch.manual_seed(0)
    base = Tied()
    experts = {f"t{i}": moved(base, i, 1.0) for i in range(3)}
    every = merge(base.state_dict(), {name: e.state_dict() for name, e in experts.items()})
    once = merge(state_of(base), {name: state_of(e) for name, e in experts.items()})
    assert list(once) == ["first.weight", "middle.weight"]
    assert torch.equal(every["first.weight"], every["last.weight"])
    assert all(torch.equal(every[name], once[name]) for name in once)


def test_what_is_tied_stays_so_and_an_expert_that_unties_it_is_refused():
    base, experts = Tied(), {"a": moved(Tied(), 1)}
    merged = with_state(base, static.task_arithmetic(state_of(base), {"a": state_of(experts["a"])}, 0.3))
    assert merged.first.weight is merged.last.weight
    experts["a"].last.weight = nn.Parameter(experts["a"].last.weight + 1)
    with pytest.raises(ValueError, match=r"first.weight and last.weight are one tensor in the base"):
        upscale(base, experts, torch.rand(1, 4), UpscaleConfig(pattern="middle"))


@pytest.mark.parametrize("merge", [adaptive.adamerging, adaptive.concrete_task_arithmetic])
def test_trained_merges_of_tied_models(merge):
    torch.manual_seed(0)
    base = Tied().requires_grad_(False)
    experts = {f"t{i}": state_of(moved(base, i)) for i in range(2)}
    batches = {name: [torch.rand(3, 4)] * 3 for name in experts}
    state, _ = merge(base, experts, dict.fromkeys(experts, nn.Identity()), batches, num_steps=3, learning_rate=0.1)
    assert list(state) == ["first.weight", "middle.weight"]


class SharedMLP(nn.Module):
    """Blocks that run one and the same MLP (or, for ``parts``, one and the same of its layers)."""

    def __init__(self, parts: bool = False):
        super().__init__()
        self.layers = nn.ModuleList()
        mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        for _ in range(3):
            block = nn.Module()
            block.norm = nn.LayerNorm(6)
            block.mlp = nn.Sequential(mlp[0], nn.ReLU(), nn.Linear(8, 6)) if parts else mlp
            self.layers.append(block)

    def forward(self, x):
        for block in self.layers:
            x = x + block.mlp(block.norm(x))
        return x


@pytest.mark.parametrize("parts", [False, True])
def test_an_mlp_that_several_blocks_share_is_up_scaled_once_and_exactly(parts, tmp_path):
    torch.manual_seed(0)
    base = SharedMLP(parts)
    expert, x = moved(base, 1, 0.5), torch.randn(4, 5, 6)
    model = upscale(base, {"a": expert}, x, UpscaleConfig(init_lambda=1.0, router_init_std=0.0)).eval()
    assert len(model.blocks) == (3 if parts else 1)
    assert torch.allclose(model(x), expert(x), atol=1e-5)
    assert torch.allclose(model.export_static("a")(x), expert(x), atol=1e-5)
    states = {"a": state_of(expert), "b": state_of(moved(base, 2, 0.5))}
    model = upscale(base, states, x, UpscaleConfig(init_lambda=0.3, router_init_std=0.0)).eval()
    arithmetic = with_state(base, static.task_arithmetic(state_of(base), states, 0.3))
    assert torch.allclose(model(x), arithmetic(x), atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(WeightEnsemblingMoE.from_pretrained(tmp_path)(x), model(x))


# ------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [UpscaleConfig(), UpscaleConfig(prune_ratio=0.5, position_encoding=True, shared_router=True)]
)
def test_a_mixture_in_half_precision(dtype, config, tmp_path):
    torch.manual_seed(0)
    base = T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)).eval()
    experts = {f"t{i}": moved(base, i) for i in range(2)}
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 1]])}
    model = upscale(base, experts, inputs, config).eval()
    with torch.no_grad():
        exact = model(**inputs).last_hidden_state
        for routing in ("sample", "batch"):
            low = copy.deepcopy(model).set_routing(routing).to(dtype)
            got = low(**inputs).last_hidden_state
            assert got.dtype == dtype
            assert torch.allclose(got.float(), exact, atol=0.1)
        low.save_pretrained(tmp_path)
        loaded = WeightEnsemblingMoE.from_pretrained(tmp_path).eval()
        assert {name: v.dtype for name, v in loaded.state_dict().items()} == {
            n: v.dtype for n, v in low.state_dict().items()
        }
        assert torch.equal(loaded(**inputs).last_hidden_state, got)
