"""What a method of hook ``optimize`` on graphs is written with: :class:`GraphTraining`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import attrs
import torch
from plait import Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import field, in_range
from plait.freezing import thawed
from torch import nn

from plait_graph import tasks
from plait_graph.fewshot import EpisodeModel
from plait_graph.library_warnings import library_warnings_to
from plait_graph.models import check_is_module
from plait_graph.training_loop import Update, train

GRAPHS = ("graph", "graph-tasks")  # the kinds of data: a graph, and one whose classes are split for episodes
_EACH_BETA = in_range(0, 1, high_open=True)


def _two_betas(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ConfigurationError(f"{attribute.name} is {value!r}; expected two numbers, such as [0.9, 0.999]")
    _EACH_BETA(instance, attribute, value)


_two_betas.allowed = "two numbers in [0, 1)"  # type: ignore[attr-defined]


def betas_field() -> Any:
    """The field ``betas`` of trainings with Adam: the decay of its two running means."""
    return field((0.9, 0.999), "decay of the two running means of Adam", _two_betas)


@attrs.frozen(kw_only=True)
class GraphTraining:
    """A training on a graph or on episodes; a subclass says how a model is updated."""

    takes = {"model": "graph-network", "data": GRAPHS}

    learning_rate: float = field(0.01, "learning rate", in_range(0, low_open=True))
    weight_decay: float = field(5e-4, "of the base optimizer", in_range(0))
    num_steps: int = field(200, "updates (episodes), at most", in_range(1))
    eval_every: int = field(5, "updates between validations", in_range(1))
    patience: int | None = field(None, "stop after so many validations without a gain", in_range(1))
    select: Literal["best", "last"] = field("best", "weights kept: best validation, or last")
    checkpoint_every: int = field(100, "updates between checkpoints", in_range(1))
    batch_size: int | None = field(None, "labelled nodes an update; none: all", in_range(1))
    num_hops: int | None = field(None, "compute only this neighbourhood of the targets; none: all", in_range(1))
    num_neighbors: int | None = field(None, "random neighbours a node and hop, with num_hops; none: all", in_range(1))
    n_way: int = field(5, "classes of an episode (few-shot)", in_range(2))
    k_shot: int = field(3, "support nodes a class (few-shot)", in_range(1))
    n_query: int = field(10, "query nodes a class (few-shot)", in_range(1))
    num_val_tasks: int = field(20, "validation episodes (few-shot)", in_range(1))

    renamed_fields: ClassVar[Mapping[str, str]] = {"lr": "learning_rate", "num_updates": "num_steps"}

    def make_update(self, model: nn.Module, seed: int) -> Update:
        """The optimizer on ``model``; ``seed`` is for draws of its own."""
        raise NotImplementedError

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Run) -> nn.Module:
        check_is_module(model)
        model = thawed(model)
        # The seed is the same for every optimizer and step, so that gains over a baseline are paired.
        surroundings = Run(seed=run.seed)
        seed = surroundings.derived_seed("training")
        with library_warnings_to(run.warn):
            objective = self._objective(model, data, run, surroundings.generator("validation"))
            with run.loop(self, "update", inputs=(model, data)) as loop:
                return train(
                    model,
                    objective,
                    lambda copy: self.make_update(copy, seed),
                    num_steps=self.num_steps,
                    eval_every=self.eval_every,
                    patience=self.patience,
                    select=self.select,
                    seed=seed,
                    device=run.device,
                    checkpoint=loop,
                    checkpoint_every=self.checkpoint_every,
                    track=loop.track,
                    log=loop.log,
                )

    def _objective(self, model: nn.Module, data: Any, run: Run, generator: torch.Generator) -> tasks.Objective:
        if isinstance(model, EpisodeModel):
            if any(size is not None for size in (self.batch_size, self.num_hops, self.num_neighbors)):
                raise ValueError(
                    "batch_size, num_hops and num_neighbors do not apply to episodes; leave them out with few-shot models"
                )
            shape = (self.n_way, self.k_shot, self.n_query)
            episodes = tasks.EpisodeObjective(data, run.device, *shape, self.num_val_tasks, generator)
            episodes.check(model)
            return episodes
        objective = tasks.NodeObjective(data, run.device, self.batch_size, self.num_hops, self.num_neighbors)
        objective.check(model)
        unseen = data.get("val_mask") is None or not data.val_mask.any()
        if unseen and self.select == "best":
            run.warn("there are no validation nodes, so the last weights are kept")
        if unseen and self.patience is not None:
            run.warn("there are no validation nodes, so patience does not stop the training")
        return objective
