"""Write the pages that follow from the code: the hooks and the pipeline format."""

from __future__ import annotations

import inspect
from pathlib import Path

from plait.catalogue import catalogue, offers
from plait.hookspecs import HOOKS, MethodHooks, RunEvents, hook_arguments
from plait.pipeline import STEP_KEYS, TOP_KEYS

DOCS = Path(__file__).parent
MEANING = {
    "plait": "format of the file: `1`",
    "name": "of the pipeline; the run's folder is `runs/NAME/…`",
    "description": "stands at the top of the report",
    "seed": "a whole number; default 0",
    "matrix": "axis → list of values; every combination is a cell. Axis `seed` sets the seed and is averaged in the report",
    "steps": "name → step",
    "from": "argument → step, `step.split`, a list or a mapping of them",
    "with": "field → value; a field that is a method is written `name` or `{name: {field: value}}`",
    "resources": "what an executor should know, such as `{gpu: 1}`; the local executor ignores it",
}


def text(function: object) -> str:
    """A docstring as Markdown."""
    return inspect.getdoc(function).replace("``", "`").replace(":class:", "").replace(":func:", "")


def hooks_page() -> str:
    """All hooks with their arguments, and the run events."""
    lines = ["# Hooks", "", "Generated from `plait/hookspecs.py`.", "", text(inspect.getmodule(MethodHooks)), ""]
    for hook in HOOKS:
        arguments = ", ".join((*hook_arguments(hook), "run"))
        methods = sorted(
            {f"`{offer.name}`" for offer in offers(hook)}
            | {f"`{name}`" for entry in catalogue().values() for name in entry.get("methods", {}).get(hook, ())}
        )
        lines += [
            f"## {hook.replace('_', '-')}",
            "",
            f"`def {hook}(self, {arguments})`",
            "",
            text(getattr(MethodHooks, hook)),
            "",
        ]
        if methods:
            lines += [f"Known methods: {', '.join(methods)}.", ""]
    lines += ["## Run events", "", text(RunEvents), ""]
    for name, event in vars(RunEvents).items():
        if not name.startswith("_"):
            arguments = ", ".join(parameter for parameter in inspect.signature(event).parameters if parameter != "self")
            lines += [f"`{name}({arguments})`", f":   {text(event)}", ""]
    return "\n".join(lines)


def pipelines_page() -> str:
    """The format of pipeline files."""
    lines = [
        "# Pipelines",
        "",
        (DOCS / "pipelines.in.md").read_text(encoding="utf-8").strip(),
        "",
        "## Keys",
        "",
        "| key | where | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{key}` | file | {MEANING[key]} |" for key in TOP_KEYS]
    lines += [
        "| a hook, e.g. `attack` | step | the method: its name, `package/name`, `./file.py:Class` or `module:Class` |"
    ]
    lines += [
        f"| `{key}` | step | {MEANING[key] if key != 'seed' else 'fixes the seed of this step'} |" for key in STEP_KEYS
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (DOCS / "hooks.md").write_text(hooks_page(), encoding="utf-8")
    (DOCS / "pipelines.md").write_text(pipelines_page(), encoding="utf-8")
