"""What tells one set of weights from another."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from plait_clip.fingerprint import fingerprint

STATE = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3), "c": torch.tensor([True, False])}


def test_the_order_of_names_does_not_matter():
    assert fingerprint(STATE) == fingerprint(dict(reversed(STATE.items())))
    assert len(fingerprint({})) == 64


def test_names_shapes_types_and_values_do():
    changes = [
        {**STATE, "a": STATE["a"].T.contiguous()},
        {**STATE, "a": STATE["a"].bfloat16()},
        {**STATE, "b": STATE["b"].float()},
        {**STATE, "b": torch.tensor(4)},
        {"a": STATE["a"], "b": STATE["b"], "d": STATE["c"]},
    ]
    assert len({fingerprint(state) for state in [STATE, *changes]}) == len(changes) + 1


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.integers(0, 11))
def test_a_view_counts_as_its_values(dtype, row):
    table = torch.arange(24).view(4, 6).to(dtype).T.repeat(2, 1)
    assert fingerprint({"w": table[row]}) == fingerprint({"w": table[row].clone()})
