"""Test-time training without labels: minimise the entropy of the predictions (WEMoE, AdaMerging)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait_wemoe.heads import logits_of
from plait_wemoe.inputs import Inputs

# A task has collapsed when its entropy is below 1 % of the greatest possible and one class takes most inputs.
COLLAPSE_ENTROPY, COLLAPSE_SHARE, COLLAPSE_WINDOW = 0.01, 0.9, 10

Encoder = Callable[[Inputs], Tensor]


class Batches(Protocol):
    """A stream of unlabelled batches that can be entered at any step: ``batches[step]``."""

    def __getitem__(self, step: int) -> Inputs: ...


class UnlabelledBatches(Batches, Protocol):
    """Such a stream whose inputs can also be read once, in order."""

    def in_order(self, batch_size: int = 128) -> Iterable[Inputs]: ...


class Checkpoint(Protocol):
    """What a training goes on from: ``load`` gives the last saved state, or ``None``."""

    def load(self) -> Any: ...

    def save(self, state: Any) -> None: ...


def entropy(logits: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean over samples of −Σ_c p log(p + ε), p = softmax(logits); at most ln C. logits (B, C) → scalar."""
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; entropy needs (samples, classes)")
    p = logits.float().softmax(dim=-1)
    return -(p * (p + epsilon).log()).sum(dim=-1).mean()


@dataclass
class History:
    """What a training saw: per-task entropy at each step, and sentences about tasks that collapsed."""

    entropies: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def minimise_entropy(
    parameters: Sequence[nn.Parameter],
    encoder_at: Callable[[int], Encoder],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Mapping[str, Batches],
    *,
    num_steps: int = 1000,
    learning_rate: float = 1e-4,
    optimizer: str = "adam",
    learning_rate_schedule: str = "constant",
    entropy_eps: float = 1e-8,
    grad_accumulate: bool = True,
    keep_graph: bool = False,
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 100,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> History:
    """(4) of :mod:`plait_wemoe.wemoe`: Adam on Σ_tasks entropy(head_t(encoder(x_t))), one batch of every task in every step.

    Args:
        parameters: the only tensors that change.
        encoder_at: step → function from inputs to features that depends on ``parameters``; called once a step.
        heads: task → frozen function from features to logits, or a head inside the encoder.
        batches: task → unlabelled batches; steps 0, 1, … are asked for.
        learning_rate_schedule: ``constant`` or ``cosine`` (to 0 at ``num_steps``).
        grad_accumulate: a backward pass after each task (same gradient, memory of one task).
        keep_graph: what ``encoder_at`` computed is shared by the tasks of a step, so its graph must last.
        checkpoint: where the training goes on from, saved every ``checkpoint_every`` steps.

    Raises:
        KeyError: a task with a head but no data, or the other way round.
        FloatingPointError: loss not finite; names step and task. ``parameters`` are then the last finite ones.
    """
    if heads.keys() != batches.keys():
        raise KeyError(f"tasks with only a head or only data: {sorted(heads.keys() ^ batches.keys())}")
    step_rule = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](
        parameters, lr=learning_rate
    )
    schedule = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(step_rule, factor=1.0, total_iters=0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(step_rule, T_max=max(1, num_steps)),
    }[learning_rate_schedule]()
    history = History({task: [] for task in heads})
    predictions: dict[str, list[Tensor]] = {task: [] for task in heads}
    classes: dict[str, int] = {}
    start = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        _restore(parameters, state["parameters"])
        step_rule.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, history.entropies = state["step"], state["entropies"]
    last_finite = [parameter.detach().clone() for parameter in parameters]

    for step in track(range(start, num_steps)):
        encoder = encoder_at(step)
        losses = {}
        total: Tensor | None = None
        for task, head in heads.items():
            logits = logits_of(head, encoder, batches[task][step])
            loss = entropy(logits, entropy_eps)
            losses[task] = loss.item()
            if not math.isfinite(losses[task]):
                _restore(parameters, last_finite)
                raise FloatingPointError(
                    f"the entropy of task {task!r} is {losses[task]} in step {step}; lower learning_rate"
                )
            predictions[task] = [*predictions[task], logits.detach().argmax(dim=-1)][-COLLAPSE_WINDOW:]
            classes[task] = logits.shape[1]
            history.entropies[task].append(losses[task])
            if grad_accumulate:
                loss.backward(retain_graph=keep_graph)
            else:
                total = loss if total is None else total + loss
        if total is not None:
            total.backward()
        for saved, parameter in zip(last_finite, parameters, strict=True):
            saved.copy_(parameter.detach())
        step_rule.step()
        step_rule.zero_grad(set_to_none=True)
        schedule.step()
        on_step(step, losses)
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            checkpoint.save(
                {
                    "step": step + 1,
                    "parameters": [parameter.detach().cpu() for parameter in parameters],
                    "optimizer": step_rule.state_dict(),
                    "schedule": schedule.state_dict(),
                    "entropies": history.entropies,
                }
            )
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        _restore(parameters, last_finite)
        raise FloatingPointError(
            f"the trained parameters are not finite after step {num_steps - 1}; lower learning_rate"
        )
    history.warnings += collapsed(history, predictions, classes)
    return history


def collapsed(history: History, predictions: Mapping[str, Sequence[Tensor]], classes: Mapping[str, int]) -> list[str]:
    """A sentence for each task whose last predictions are certain and nearly all the same."""
    sentences = []
    for task, seen in predictions.items():
        if not seen:
            continue
        labels = torch.cat(list(seen))
        share = labels.bincount().max().item() / len(labels)
        recent = history.entropies[task][-len(seen) :]
        mean = sum(recent) / len(recent)
        if mean < COLLAPSE_ENTROPY * math.log(max(2, classes[task])) and share > COLLAPSE_SHARE:
            sentences.append(
                f"task {task!r} may have collapsed: entropy {mean:.2g} and {share:.0%} of the last inputs in one class; "
                "train for fewer steps or with a lower learning_rate"
            )
    return sentences


def _restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
