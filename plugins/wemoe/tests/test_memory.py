"""Merging streams over tensors: what is allocated beside the result stays small."""

import pytest
import torch
from plait_wemoe import states
from plait_wemoe.baselines import static
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocated(TorchDispatchMode):
    """Counts the elements that operations put into new tensors while the block runs: of all, and of the largest one."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in before:
                self.total += value.numel()
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("merge", [static.simple_average, lambda b, e: static.task_arithmetic(b, e, 0.3)])
def test_nothing_as_large_as_the_model_is_made_but_the_result(merge, monkeypatch):
    monkeypatch.setattr(states, "PIECE", 64)
    base = {f"w{i}": torch.randn(50, 40) for i in range(5)}
    experts = {f"t{i}": {name: torch.randn(50, 40) for name in base} for i in range(6)}
    with Allocated() as allocated:
        merge(base, experts)
    assert allocated.total <= 1.2 * sum(value.numel() for value in base.values())


@pytest.mark.parametrize("function", ["sum", "mean", "max"])
def test_ties_holds_a_piece_of_the_task_vectors_at_a_time(function, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(50, 41, generator=draw).to(torch.bfloat16 if i == 2 else None) for i in range(3)}
    experts = {
        f"t{i}": {
            name: (value + 0.1 * torch.randn(50, 41, generator=draw)).to(value.dtype) for name, value in base.items()
        }
        for i in range(3)
    }
    whole = static.ties(base, experts, 0.3, 20, function)
    monkeypatch.setattr(states, "PIECE", 300)
    monkeypatch.setattr(static, "DIGIT_BITS", 8)
    with Allocated() as allocated:
        merged = static.ties(base, experts, 0.3, 20, function)
    assert all(torch.equal(merged[name], whole[name]) and merged[name].dtype == base[name].dtype for name in base)
    assert allocated.largest <= 50 * 41


def test_pieces_do_not_change_the_result(monkeypatch):
    base, experts = torch.randn(7, 9), [torch.randn(7, 9) for _ in range(3)]
    whole = states.scaled_sum(base, experts, 0.3)
    assert torch.equal(whole, 0.3 * sum(expert - base for expert in experts) + base)
    monkeypatch.setattr(states, "PIECE", 5)
    assert torch.equal(states.scaled_sum(base, experts, 0.3), whole)
    half = states.scaled_sum(base.half(), [expert.half() for expert in experts], 0.3)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), whole, atol=1e-2)
