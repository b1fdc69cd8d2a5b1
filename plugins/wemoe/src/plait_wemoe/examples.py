"""Small inputs on which ``plait check`` tries the methods."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from plait import Run
from plait.testing.examples import Example

from plait_wemoe import plugin


def _tasks() -> dict[str, Any]:
    return {
        task: plugin.FourTasks(task=task).load_data(run=Run())["test"].shuffle(seed=0).select(range(40))
        for task in ("digits", "textures")
    }


def _model(data: dict[str, Any]) -> Any:
    return plugin.MultiTaskViT(embed_dim=8, depth=1, num_heads=2).load_model(data=data, run=Run())


def _logits(model: Any) -> dict[str, Any]:
    """Task → logits for a few images."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {task: model.logits(images, task) for task in ("digits", "textures")}


def _merge(progress: bool = True, random: bool = False, **fields: Any) -> Example:
    data = _tasks()
    base = _model(data)
    expert = plugin.MultiTaskTraining(num_steps=2, batch_size=8)
    experts = {task: expert.optimize(model=base, data={task: part}, run=Run()) for task, part in data.items()}
    return Example(
        arguments={"base": base, "experts": experts, "data": data},
        outputs=_logits,
        fields=fields,
        random=random,
        progress=progress,
        empty={"experts": {}, **({"data": {task: part.select([]) for task, part in data.items()}} if progress else {})},
        wrong={"experts": {"digits": object(), "textures": object()}, "base": torch.nn.Linear(2, 2)},
    )


static = partial(_merge, progress=False)
dare = partial(_merge, progress=False, random=True)
statistics = partial(_merge, num_examples=8)
trained = partial(_merge, random=True, num_steps=3, batch_size=8, checkpoint_every=1)


def four_tasks() -> Example:
    return Example(arguments={}, fields={"task": "digits"}, random=True, progress=False, device=False)


def multi_task_vit() -> Example:
    return Example(arguments={"data": _tasks()}, fields={"embed_dim": 8}, random=True, progress=False, outputs=_logits)


def _bert() -> str:
    """A folder with a tiny classifier of texts."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tempfile.mkdtemp(prefix="plait-example-")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(vocab_size=10, **sizes)).save_pretrained(folder)
    return folder


def model_folder() -> Example:
    return Example(
        arguments={},
        fields={"folder": _bert()},
        progress=False,
        device=False,
        outputs=lambda model: dict(model.state()),
    )


def text_classifier() -> Example:
    """A tiny BERT in a folder, and texts of three classes."""
    from datasets import ClassLabel, Dataset

    folder = _bert()
    texts = Dataset.from_dict({"text": ["red", "green", "blue"], "label": [0, 1, 2]})
    data = texts.cast_column("label", ClassLabel(names=["red", "green", "blue"]))

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([[1, 2, 3]])).logits

    return Example(
        arguments={"data": data},
        fields={"source": folder},
        random=True,
        progress=False,
        outputs=logits,
        wrong={"data": texts},
    )


def multi_task_training() -> Example:
    data = _tasks()
    return Example(
        arguments={"model": _model(data), "data": data},
        fields={"num_steps": 3, "batch_size": 8},
        random=True,
        outputs=_logits,
        empty={"data": {task: part.select([]) for task, part in data.items()}},
        wrong={"data": data["digits"], "model": torch.nn.Linear(2, 2)},
    )


def multi_task_accuracy() -> Example:
    data = _tasks()
    return Example(
        arguments={"model": _model(data), "data": data},
        progress=False,
        empty={"data": {task: part.select([]) for task, part in data.items()}},
        wrong={"data": data["digits"], "model": torch.nn.Linear(2, 2)},
    )
