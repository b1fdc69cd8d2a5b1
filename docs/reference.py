"""Write what follows from the code: the catalogue, the README's table of methods, the pages on hooks and pipelines.

The packages' own ``pyproject.toml`` are where methods are declared: description, entry points, and ``[tool.plait]``
with the kind of package and its paper. Packages that are only planned stand in ``registry.yaml`` itself.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from plait.catalogue import catalogue, offers
from plait.hookspecs import HOOKS, MethodHooks, RunEvents, hook_arguments
from plait.pipeline import STEP_KEYS, TOP_KEYS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
KINDS = ("kit", "paper", "tool")
HEAD = """\
# The catalogue: every known package, its kind (kit, paper, tool), its methods by hook, its paper. Shipped in the core's wheel.
# Written by `make docs` from the packages' pyproject.toml; only entries with status "planned" are kept by hand.
packages:
"""
TABLE = re.compile(r"(<!-- methods: .*? -->\n).*?(\n<!-- end of methods -->)", re.DOTALL)
MEANING = {
    "plait": "format of the file: `1`",
    "name": "of the pipeline; the run's folder is `runs/NAME/…`",
    "description": "stands at the top of the report",
    "seed": "a whole number; default 0",
    "matrix": "axis → list of values; every combination is a cell. Axis `seed` sets the seed and is averaged in the report",
    "steps": "name → step",
    "each": "name → list of values (or label → value): the step once for every value; see below",
    "from": "argument → step, `step.split`, a list or a mapping of them",
    "with": "field → value; a field that is a method is written `name` or `{name: {field: value}}`",
    "resources": "what it needs of a machine, `{gpu: 1, cpu: 4, memory: 8GiB}`: bounds what runs beside it, and goes to Ray or Slurm",
    "keep": "`false`: its result is dropped from the store as soon as all steps that need it are done; default true",
}


def text(function: object) -> str:
    """A docstring as Markdown."""
    return inspect.getdoc(function).replace("``", "`").replace(":class:", "").replace(":func:", "")


def packages() -> dict[str, dict[str, Any]]:
    """Every package of the catalogue: those in ``plugins/`` as they declare themselves, planned ones as they stand."""
    known = yaml.safe_load((ROOT / "registry.yaml").read_text(encoding="utf-8"))["packages"]
    found = {name: entry for name, entry in known.items() if entry["status"] == "planned"}
    for path in ROOT.glob("plugins/*/pyproject.toml"):
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        found[project["project"]["name"]] = _declared(project)
    order = list(known)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (KINDS.index(item[1]["kind"]), order.index(item[0]) if item[0] in order else len(order)),
        )
    )


def _declared(project: dict[str, Any]) -> dict[str, Any]:
    groups = project["project"].get("entry-points", {})
    methods = {hook: sorted(groups[f"plait.{hook}"]) for hook in HOOKS if f"plait.{hook}" in groups}
    entry = {"summary": project["project"]["description"], **project["tool"]["plait"], "status": "released"}
    return {**entry, "methods": methods} if methods else entry


def registry() -> str:
    """The text of ``registry.yaml``."""
    lines = []
    for name, entry in packages().items():
        lines.append(f"  {name}:")
        for key in ("summary", "kind", "paper", "status"):
            if key in entry:
                text = json.dumps(entry[key], ensure_ascii=False) if key in ("summary", "paper") else entry[key]
                lines.append(f"    {key}: {text}")
        if entry.get("methods"):
            lines.append("    methods:")
            lines += [f"      {hook}: [{', '.join(names)}]" for hook, names in entry["methods"].items()]
    return HEAD + "\n".join(lines) + "\n"


def methods_table() -> str:
    """The README's table of released packages."""
    lines = ["| package | what it is | hooks |", "| --- | --- | --- |"]
    for name, entry in packages().items():
        if entry["status"] == "released":
            hooks = ", ".join(f"`{hook.replace('_', '-')}`" for hook in entry.get("methods", {})) or "listens to runs"
            lines.append(f"| [{name}](plugins/{name.removeprefix('plait-')}) | {entry['summary']} | {hooks} |")
    return "\n".join(lines)


def readme() -> str:
    """The README with its table as it has to be."""
    return TABLE.sub(
        lambda match: match[1] + methods_table() + match[2], (ROOT / "README.md").read_text(encoding="utf-8")
    )


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
    (ROOT / "registry.yaml").write_text(registry(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    (DOCS / "hooks.md").write_text(hooks_page(), encoding="utf-8")
    (DOCS / "pipelines.md").write_text(pipelines_page(), encoding="utf-8")
