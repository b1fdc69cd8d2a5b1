"""Amalgamation: the gate's invariants, eq. 5 by hand, and what is fused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Run, codecs
from plait_content_shift.amalgamation import Amalgamation, AmalgamationGate, SavedGate
from plait_content_shift.baselines import concatenation, mean
from plait_content_shift.content_shift import Gate, SparsityWalk, diversity, fit_gate, regularised, sparsity
from plait_content_shift.examples import buckets as example_buckets
from plait_diffusion import FeatureSet, Origin


def maps(count: int, seed: int = 0, channels: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, channels, 5, 5, generator=torch.Generator().manual_seed(seed)))


def gate_of(channels: int = 4, **options: object) -> Gate:
    torch.manual_seed(0)
    return Gate(channels, **options).eval()  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 4),
    assigners=st.integers(1, 3),
    granularity=st.sampled_from(["channel", "scalar"]),
    spatial=st.booleans(),
)
def test_weights_are_shares(count, assigners, granularity, spatial):
    gate = gate_of(num_assigners=assigners, granularity=granularity, spatial=spatial)
    features = maps(count) if spatial else [one.mean((2, 3)) for one in maps(count)]
    weights = gate.weights(features).detach()
    assert weights.shape == (assigners, count, 3, 4 if granularity == "channel" else 1)
    assert bool((weights >= 0).all())
    assert torch.allclose(weights.sum(1), torch.ones(assigners, 3, weights.shape[-1]), atol=1e-6)
    assert 1 / math.sqrt(count) - 1e-6 <= float(sparsity(weights)) <= 1 + 1e-6


def test_one_bucket_is_taken_as_it_is():
    gate = gate_of()
    (one,) = maps(1)
    weights = gate.weights([one])
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(gate([one]), one)
    assert float(sparsity(weights)) == 1
    gate([one]).square().sum().backward()
    assert all(not p.grad.abs().any() for p in gate.assigners.parameters() if p.grad is not None)


def test_identical_buckets_and_permutations():
    gate, (one, two, three) = gate_of(), maps(3)
    assert torch.allclose(gate([one, one, one]), one, atol=1e-6)
    weights, fused = gate.weights([one, two, three]), gate([one, two, three])
    for order in itertools.permutations(range(3)):
        shuffled = [(one, two, three)[number] for number in order]
        assert torch.allclose(gate.weights(shuffled), weights[:, list(order)], atol=1e-6)
        assert torch.allclose(gate(shuffled), fused, atol=1e-5)


def test_a_fresh_gate_starts_near_the_mean():
    torch.manual_seed(0)
    weights = Gate(64).train().weights(maps(3, channels=64))
    assert 0.2 < float(weights.min()) < float(weights.max()) < 0.5


def test_eq_4_by_hand():
    gate = gate_of(channels=1)
    weights = torch.tensor([math.log(3), 0.0]).softmax(0).view(1, 2, 1, 1)
    assert weights.flatten().tolist() == pytest.approx([0.75, 0.25])
    fused = gate.fuse([torch.full((1, 1, 2, 2), 4.0), torch.full((1, 1, 2, 2), 8.0)], weights)
    assert fused.flatten().tolist() == pytest.approx([5.0] * 4)


def test_eq_5_by_hand():
    def of(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)

    assert float(sparsity(of(0.5, 0.5))) == pytest.approx(0.70711, abs=1e-5)
    assert float(sparsity(of(1, 0))) == 1
    assert float(sparsity(of(0.8, 0.2))) == pytest.approx(0.82462, abs=1e-5)
    two = torch.cat([of(1, 0), of(0, 1)])
    assert float(diversity(two)) == pytest.approx(math.sqrt(2))
    assert float(diversity(of(1, 0))) == 0
    # L − γ1 (1 + 1) − γ2 / 2 · 2 √2
    assert float(regularised(torch.tensor(3.0), two, 0.5, 0.25)) == pytest.approx(3 - 1 - 0.25 * math.sqrt(2))


def test_the_released_walk_is_next_to_nothing():
    """Over 10 000 steps of a noisy decaying loss it cannot pass 0.02, and ends far below."""
    walk = SparsityWalk(0)
    noise = torch.Generator().manual_seed(0)
    for step in range(10_000):
        walk.update(math.exp(-step / 3000) + 0.1 * float(torch.rand(1, generator=noise)))
        assert 0 <= walk.strength <= 1e-5 * (step // 5 + 1)
    assert walk.strength < 2e-3


def test_several_assigners_and_attention():
    features, attention = maps(2), torch.randn(3, 2, 5, 5)
    gate = gate_of(num_assigners=2, attention_channels=2, head="none")
    fused = gate(features, attention)
    assert fused.shape == (3, 10, 5, 5) == (3, gate.out_channels, 5, 5)
    assert torch.equal(fused[:, 8:], attention), "attention features are never gated"
    assert gate_of(num_assigners=2, attention_channels=2, head="conv")(features, attention).shape == (3, 10, 5, 5)


def test_unequal_buckets_are_refused():
    gate, (one, two) = gate_of(), maps(2)
    with pytest.raises(ValueError, match="all need 4 channels and one size"):
        gate([one, two[:, :, :3]])
    with pytest.raises(ValueError, match="all need 4 channels"):
        gate([one[:, :3], two[:, :3]])


@pytest.mark.slow
def test_a_gate_learns_which_bucket_to_believe():
    """The class is in one bucket; the other is louder noise, and so stands in the way of the mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    signal = 2.0 * (2 * labels - 1).float()[:, None]
    buckets = [
        signal + 0.3 * torch.randn(120, 4, generator=generator),
        6 * torch.randn(120, 4, generator=generator),
    ]
    torch.manual_seed(0)
    gate, readout = Gate(4, hidden=32, dropout=0.1, spatial=False), torch.nn.Linear(4, 2)
    losses: list[float] = []
    fit_gate(
        gate, readout, lambda out, rows: torch.nn.functional.cross_entropy(out, labels[rows]),
        lambda rows: ([bucket[list(rows)] for bucket in buckets], None), 120,
        num_steps=200, batch_size=40, learning_rate=0.01, log=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0] / 2
    assert float(gate.weights(buckets).detach()[0, 0].std()) > 0.1, "it weighs by what it sees"


def test_a_gate_whose_loss_runs_away_is_not_given_back():
    gate, readout = Gate(2, hidden=4, dropout=0.0, spatial=False), torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in step \d+; lower learning_rate"):
        fit_gate(
            gate, readout, lambda out, rows: out.square().mean(),
            lambda rows: ([torch.ones(len(rows), 2), torch.zeros(len(rows), 2)], None), 4,
            num_steps=20, batch_size=2, learning_rate=1e30,
        )  # fmt: skip


@pytest.mark.slow
def test_gate_training_goes_on_after_a_kill(tmp_path):
    data = example_buckets()

    def train(folder, stop=None):
        class Killable(Run):
            def progress(self, description, done, total):
                if stop is not None and done == stop:
                    raise KeyboardInterrupt

        method = AmalgamationGate(num_steps=130, batch_size=4, hidden=4, sparsity="walk", pooled=True, head="none")
        return method.optimize(data, Killable(folder=folder, step="x"))

    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stop=110)
    again = train(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_saved_gate_knows_what_it_is_for(tmp_path):
    data = example_buckets()
    run = Run(folder=tmp_path / "run", step="x")
    gate = AmalgamationGate(num_steps=2, batch_size=4, hidden=4).optimize(data, run)
    codecs.save(gate, tmp_path / "gate")
    again = codecs.load(tmp_path / "gate")
    assert isinstance(again, SavedGate)
    fused = Amalgamation().extract_feature(again, data, run)
    expected = gate.gate([one.at(4, "nearest").concat().read()["concat"] for one in data.values()])
    assert torch.allclose(fused.read()["fused"], expected.detach(), atol=1e-6)
    assert run.reports[0].rows[0]["bucket"] == "plain"
    assert abs(sum(row["mean weight"] for row in run.reports[0].rows) - 1) < 1e-6
    with pytest.raises(ValueError, match="trained on buckets plain, control; the data has control, plain"):
        Amalgamation().extract_feature(again, dict(reversed(data.items())), run)
    with pytest.raises(ValueError, match="fusion is gate and the model is none"):
        Amalgamation().extract_feature(None, data, run)
    with pytest.raises(ValueError, match="fusion is mean and the model is a SavedGate"):
        Amalgamation(fusion="mean").extract_feature(gate, data, run)


@pytest.mark.slow
def test_the_mean_gate_is_averaging_over_noise(tmp_path):
    data = example_buckets()
    run = Run(folder=tmp_path)
    fused = Amalgamation(fusion="mean").extract_feature(None, data, run)
    values = [one.read() for one in data.values()]
    for name in ("a", "b"):
        assert torch.allclose(fused.read()[name], (values[0][name] + values[1][name]) / 2, atol=1e-6)
        even = torch.full((1, 2, 8, 1), 0.5)
        assert torch.allclose(
            gate_of(values[0][name].shape[1]).fuse([v[name] for v in values], even), fused.read()[name], atol=1e-6
        )
        assert torch.equal(mean([v[name] for v in values]), torch.stack([v[name] for v in values]).mean(0))
    assert concatenation([values[0]["a"], values[1]["a"]]).shape == (8, 12, 4, 4)
    assert Amalgamation(fusion="concat").extract_feature(None, data, run).names == (
        "plain/a",
        "plain/b",
        "control/a",
        "control/b",
    )


@pytest.mark.slow
def test_splits_are_fused_apart(tmp_path):
    data, run = example_buckets(), Run(folder=tmp_path)
    halves = {name: {"train": one.select(range(5)), "test": one.select(range(5, 8))} for name, one in data.items()}
    fused = Amalgamation(fusion="mean").extract_feature(None, halves, run)
    assert {name: len(one) for name, one in fused.items()} == {"train": 5, "test": 3}
    whole = Amalgamation(fusion="mean").extract_feature(None, data, run).read()
    assert torch.equal(fused["test"].read()["a"], whole["a"][5:])
    del halves["plain"]["test"]
    with pytest.raises(ValueError, match=r"different splits .plain: train; control: test, train"):
        Amalgamation(fusion="mean").extract_feature(None, halves, run)


def test_pixels_as_target(tmp_path):
    from plait_diffusion.features_examples import square_features

    one, two = square_features(6, 0), square_features(6, 0)
    run = Run(folder=tmp_path, step="x")
    gate = AmalgamationGate(target="pixels", num_steps=3, batch_size=4, hidden=4).optimize({"a": one, "b": two}, run)
    assert Amalgamation().extract_feature(gate, {"a": one, "b": two}, run).activations[0].side == (16, 16)
    with pytest.raises(ValueError, match="pixels need maps"):
        AmalgamationGate(target="pixels", pooled=True)


@pytest.mark.slow
def test_what_cannot_be_fused_ends_in_a_sentence(tmp_path):
    data, run = example_buckets(), Run(folder=tmp_path)
    narrow = FeatureSet.of_tensors(
        data["plain"].rows, {"a": torch.zeros(8, 3, 4, 4), "b": torch.zeros(8, 2, 2, 2)}, Origin(model="x")
    )
    with pytest.raises(ValueError, match="channels are never resized"):
        Amalgamation(fusion="mean").extract_feature(None, {"plain": data["plain"], "narrow": narrow}, run)
    with pytest.raises(ValueError, match="not of the same rows"):
        Amalgamation(fusion="mean").extract_feature(
            None, {"a": data["plain"], "b": data["control"].select(range(7))}, run
        )
    with pytest.raises(ValueError, match="attention features are not averaged"):
        Amalgamation(fusion="mean").extract_feature(None, {**data, "attention": data["plain"]}, run)
    with pytest.raises(ValueError, match="num_rows is 9; the data has 8"):
        AmalgamationGate(num_rows=9).optimize(data, run)
