"""Loops that can be killed, fingerprints, and what counts as a sentence for the user."""

import attrs
import datasets
import numpy as np
import pytest
import torch
from plait import ConfigurationError, MissingDependency, PlaitError, Run
from plait.errors import located, sentence_of
from plait.fields import REQUIRED, field, in_range
from plait.fingerprints import fingerprint
from plait.optional import require


@attrs.frozen(kw_only=True)
class Training:
    """Counts."""

    num_steps: int = field(5, "steps", in_range(1))


class Killed(BaseException):
    pass


def count(steps, checkpoint, kill_at=None):
    state = checkpoint.load() or {"step": 0, "sum": torch.zeros(())}
    done, total = state["step"], state["sum"]
    seen = []
    for step in range(done, steps):
        if step == kill_at:
            raise Killed
        total = total + step
        seen.append(step)
        checkpoint.save({"step": step + 1, "sum": total})
    return total, seen


def test_a_killed_loop_goes_on_and_leaves_nothing(tmp_path):
    data = torch.arange(3)
    run = Run(folder=tmp_path)
    with pytest.raises(Killed), run.loop(Training(), "count", inputs=data) as loop:
        count(5, loop, kill_at=3)
    with run.loop(Training(), "count", inputs=data.clone()) as loop:
        total, seen = count(5, loop)
    assert (total, seen) == (10, [3, 4])
    assert not list(tmp_path.rglob("*.pt*"))
    with run.loop(Training(), "count", inputs=data) as loop:
        assert count(5, loop)[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        lambda run, data: Run(folder=run.folder, seed=1).loop(Training(), "count", inputs=data),
        lambda run, data: run.loop(Training(num_steps=6), "count", inputs=data),
        lambda run, data: run.loop(Training(), "another", inputs=data),
        lambda run, data: run.loop(Training(), "count", inputs=data + 1),
    ],
)
def test_no_other_loop_finds_the_state(tmp_path, other):
    run, data = Run(folder=tmp_path), torch.arange(3)
    run.loop(Training(), "count", inputs=data).save({"step": 4, "sum": torch.ones(())})
    assert run.loop(Training(), "count", inputs=data).load()["step"] == 4
    assert other(run, data).load() is None


def test_a_damaged_checkpoint_is_told_and_not_used(tmp_path):
    warnings = []
    run = Run(folder=tmp_path, on_warning=warnings.append)
    loop = run.loop(Training(), "count")
    loop.save({"step": 4})
    (loop.folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert loop.load() is None
    assert "starts anew" in warnings[0]


def test_progress_and_curves_of_a_loop_that_calls_back(tmp_path):
    ticks, points = [], []
    run = Run(
        folder=tmp_path, on_progress=lambda *facts: ticks.append(facts), on_log=lambda *facts: points.append(facts)
    )
    loop = run.loop(Training(), "count", total=3)
    for step in range(3):
        loop.done(step, {"loss": step})
    assert ticks == [("count", 1, 3), ("count", 2, 3), ("count", 3, 3)]
    assert points == [({"loss": 0.0}, 0), ({"loss": 1.0}, 1), ({"loss": 2.0}, 2)]


def test_warnings_are_shown_in_plain_python():
    with pytest.warns(UserWarning, match="mind this"):
        Run().warn("mind this")


VALUES = [
    None, True, 1, 1.0, "1", ("a", "b"), ["ab"], {"a": 1}, {"a": 2}, torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(1, 2), torch.tensor([0.0, -0.0]), torch.zeros(2).to_sparse(), np.zeros(2), np.zeros(2, np.float32), Training(),
    Training(num_steps=6), torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), torch.empty(0), torch.float32,
]  # fmt: skip


def test_fingerprints_tell_values_apart():
    assert len({fingerprint(value) for value in VALUES}) == len(VALUES)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_fingerprints_are_of_the_content():
    assert fingerprint(torch.arange(6).reshape(2, 3)) == fingerprint(
        torch.arange(6).reshape(3, 2).reshape(2, 3).clone()
    )
    model = torch.nn.Linear(2, 1)
    twin = torch.nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(twin)
    data = datasets.Dataset.from_dict({"x": [1]})
    assert fingerprint(data) != fingerprint(data.map(lambda row: {"x": 2}))
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint(object())


def _caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raises_itself():
    raise ValueError("rate is 2; allowed is\n at most 1")


def raises_missing():
    raise KeyError("there is no 'x'")


def fails_inside():
    return int("x")


def fails_deeper():
    return torch.zeros(2) @ torch.zeros(3)


def gives_no_reason():
    raise ValueError


def test_sentences_are_what_authors_wrote():
    here = {__name__.partition(".")[0]}
    assert sentence_of(_caught(raises_itself), here) == "rate is 2; allowed is at most 1"
    assert sentence_of(_caught(raises_missing), here) == "there is no 'x'"
    assert sentence_of(_caught(raises_itself), {"plait"}) is None
    for function in (fails_inside, fails_deeper, gives_no_reason):
        error = _caught(function)
        assert sentence_of(error, here) is None
        assert located(error).startswith(type(error).__name__)
        assert "test_loops.py" in located(error) or function is fails_deeper


def test_errors_are_what_python_calls_them():
    with pytest.raises(ValueError, match=r"num_steps is 0; allowed is \[1, inf\)"):
        Training(num_steps=0)
    with pytest.raises(ImportError, match="pip install no-such-library"):
        require("no-such-library")
    assert issubclass(MissingDependency, PlaitError)
    assert issubclass(ConfigurationError, PlaitError)
    assert REQUIRED is attrs.NOTHING
