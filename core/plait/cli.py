"""The command line. Heavy imports stand inside the commands that need them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from plait import completing
from plait.errors import ConfigurationError, PipelineError, PlaitError


class _Group(click.Group):
    """Turns PlaitError into one sentence and an exit code; knows the nearest command."""

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            from plait.errors import nearest

            raise click.UsageError(f"{error.message}{nearest(arguments[0], self.commands)}", context) from error

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PipelineError as error:
            if context.params.get("debug"):
                raise
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
            raise SystemExit(2) from error
        except PlaitError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            from plait.interrupts import Terminated

            what, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
            report = f"; report: {error.__notes__[-1]}" if getattr(error, "__notes__", None) else ""
            click.echo(f"{what}; what is finished is kept, the same command resumes from there{report}", err=True)
            raise SystemExit(code) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="plait")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Braid research methods: find them, configure them, run compositions of them from YAML."""
    if debug:
        os.environ["PLAIT_DEBUG"] = "1"


def _pipeline_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.argument("overrides", nargs=-1, shell_complete=completing.overrides)(command)
    return click.argument("pipeline", type=click.Path(path_type=Path))(command)


def _to_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Only this step and what it needs; may be repeated."
    return click.option("--to", multiple=True, metavar="STEP", help=text, shell_complete=completing.steps)(command)


def _limit_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Only the first so many rows of every split of every source, for a trial; results are kept apart."
    return click.option("--limit", type=click.IntRange(1), metavar="N", help=text)(command)


def _store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", type=click.Path(path_type=Path), help="Folder of the store (default: $PLAIT_STORE, else .plait)."
    )(command)


def _out_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders are."
    )(command)


class Jobs(click.ParamType[Any]):
    """A number of processes from 1, or ``auto``."""

    name = "number or auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


def _pairs(given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if not all(text.partition("=")):
            raise PipelineError([f"--slurm {text!r} is not of the form key=value"])
    return dict(text.split("=", 1) for text in given)


def _store(path: Path | None) -> Any:
    from plait.store import Store

    return Store(path.absolute() if path else None)


@main.command()
@_pipeline_arguments
@_to_option
@_limit_option
@click.option(
    "--only-failed", is_flag=True, help="Only what failed in the last run of this pipeline, and what waits for it."
)
@_store_option
@_out_option
@click.option("--jobs", type=Jobs(), default="1", show_default=True, help="Processes over independent steps, or auto.")
@click.option(
    "--executor",
    type=click.Choice(("local", "ray", "slurm")),
    default="local",
    show_default=True,
    help="What runs the steps.",
)
@click.option("--address", help="ray: auto or ray://host:port (default: a cluster on this machine for this run).")
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="ray: tries more for a step whose worker died.",
)
@click.option(
    "--slurm", multiple=True, metavar="KEY=VALUE", help="slurm: an option of sbatch, e.g. partition=long, time=4:00:00."
)
@click.option("--device", help="torch device, e.g. cuda:0 (default: CUDA where there is one).")
@click.option(
    "--deterministic",
    is_flag=True,
    help="On a GPU: slower kernels whose sums are the same, to the last bit, in every run.",
)
@click.option("--quiet", is_flag=True, help="Print the report's path only.")
def run(
    pipeline: Path,
    overrides: tuple[str, ...],
    to: tuple[str, ...],
    limit: int | None,
    only_failed: bool,
    store: Path | None,
    out: Path,
    jobs: Any,
    executor: Any,
    address: str | None,
    retries: int,
    slurm: tuple[str, ...],
    device: str | None,
    deterministic: bool,
    quiet: bool,
) -> None:
    """Run a PIPELINE; finished steps are taken from the store.

    OVERRIDES change it: steps.dirty.with.rate=0.1 matrix.seed=[0]
    """
    if not quiet:  # the imports take their time
        click.echo(f"reading {pipeline}", err=True)
    from rich.console import Console

    from plait.displays import Display, Lines
    from plait.executors.choice import Execution
    from plait.pipeline import load_pipeline
    from plait.runner import run_pipeline
    from plait.said import errors_kept
    from plait.selection import limited
    from plait.terminal import print_tables

    execution = Execution(executor=executor, jobs=jobs, address=address, retries=retries, slurm=_pairs(slurm))
    with errors_kept():
        checked = load_pipeline(pipeline, overrides)
    checked = limited(checked, limit) if limit else checked
    select = _selection(to, only_failed, checked.name, out)
    console = Console(file=sys.stderr)  # as it is now: steps write elsewhere
    display = None if quiet else Display(console) if console.is_terminal else Lines(console)
    try:
        shown = [display] if display else []
        place = _store(store)
        result = run_pipeline(checked, place, out, execution, device, shown, select, deterministic=deterministic)
    finally:
        if isinstance(display, Display):
            display.close()
    if not quiet:
        print_tables(table for table in result.tables.values() if table.main)
    click.echo(f"report: {result.folder / 'report.html'}")
    for step, message in result.failed.items():
        click.echo(f"error: step {step}: {message}", err=True)
    if result.not_run:
        click.echo(f"{len(result.not_run)} steps behind these were not run: {', '.join(result.not_run)}", err=True)
    if result.failed:
        raise SystemExit(1)


def _selection(to: tuple[str, ...], failed_only: bool, name: str, out: Path) -> Callable[[Any], Any] | None:
    """What ``--to`` and ``--only-failed`` leave of a plan."""
    from plait.selection import only_failed, up_to

    failed: list[str] = []
    if failed_only:
        from plait.runs import find_run, open_run

        last = open_run(find_run(name, out))
        failed = [*last.results.get("failed", {}), *last.results.get("not run", {})]
        if not failed:
            raise PlaitError(f"nothing failed in the last run of {name} ({last.folder})")

    def select(plan: Any) -> Any:
        plan = up_to(plan, to) if to else plan
        return only_failed(plan, failed) if failed_only else plan

    return select


@main.command()
@_pipeline_arguments
@_to_option
@_limit_option
@_store_option
def plan(
    pipeline: Path, overrides: tuple[str, ...], to: tuple[str, ...], limit: int | None, store: Path | None
) -> None:
    """Show what a PIPELINE would do: its steps, what is in the store, and why the rest is not."""
    from plait.pipeline import load_pipeline
    from plait.plan import explain, flatten, is_done, make_plan
    from plait.scheduling import Progress
    from plait.selection import limited, up_to

    checked = load_pipeline(pipeline, overrides)
    made = make_plan(limited(checked, limit) if limit else checked)
    made = up_to(made, to) if to else made
    place = _store(store)
    cells = len(made.pipeline.cells)
    matrix = made.pipeline.data.get("matrix") or {}
    axes = ", ".join(f"{axis}: {len(values)}" for axis, values in matrix.items())
    click.echo(
        f"{made.pipeline.name}: {len(made.tasks)} steps, {cells} matrix cell{'s' if cells > 1 else ''}{f' ({axes})' if axes else ''}"
    )
    reasons = explain(made, place)
    progress = Progress(made, {task.key for task in made.tasks if is_done(task, place)})
    settled = {task.key for task in progress.settled}
    missing = len(made.tasks) - len(settled)
    for task in made.tasks:
        stored = task.key in settled
        inputs = ", ".join(
            f"{argument}={'+'.join(i.label for i in flatten(value))}" for argument, value in task.inputs.items()
        )
        reason = f" ({reasons[task.label]})" if reasons[task.label] else ""
        state = f"{'in the store' if is_done(task, place) else 'not needed' if stored else 'to run'}{reason}"
        click.echo(
            f"  {'=' if stored else '+'} {task.label}  {task.step.hook.replace('_', '-')}: {task.step.method.name}({inputs})  {state}"
        )
    unneeded = sum(not is_done(task, place) for task in progress.settled)
    click.echo(
        f"{len(settled) - unneeded} in the store, {missing} to run{f', {unneeded} not needed' if unneeded else ''}"
    )


@main.command("list")
@click.argument("word", required=False)
@click.option("--hook", help="Only methods of this hook.")
@click.option("--package", help="Only methods of this package.")
@click.option("--all", "every", is_flag=True, help="Also what is known but not installed.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_methods(word: str | None, hook: str | None, package: str | None, every: bool, as_json: bool) -> None:
    """List installed methods by hook, each with a line on what it does; with WORD, those that speak of it."""
    from plait.catalogue import catalogue

    rows = _listed(hook, package, every)
    if word:
        rows = [row for row in rows if any(word.lower() in text.lower() for text in row.values())]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        which = " ".join(
            filter(None, (word and f"with {word!r}", hook and f"of hook {hook}", package and f"of {package}"))
        )
        click.echo(f"no installed method {which}".rstrip() + "; plait list --all shows what there is")
    name_width = max((len(row["method"]) for row in rows), default=0)
    package_width = max((len(row["package"]) for row in rows), default=0)
    last = None
    for row in rows:
        if row["hook"] != last:
            click.secho(row["hook"], bold=True)
            last = row["hook"]
        about = row["summary"] if row["state"] == "installed" else f"({row['state']})"
        click.echo(f"  {row['method']:<{name_width}}  {row['package']:<{package_width}}  {about}".rstrip())
    if every and not (word or hook or package):
        for name, entry in catalogue().items():
            if not entry.get("methods"):
                click.echo(f"{name}  ({entry.get('status')}): {entry['summary']}")


def _listed(hook: str | None, package: str | None, every: bool) -> list[dict[str, str]]:
    from plait.catalogue import catalogue, offers
    from plait.errors import nearest
    from plait.hookspecs import HOOKS
    from plait.summaries import summary

    shown = [name.replace("_", "-") for name in HOOKS]
    if hook is not None and hook.replace("_", "-") not in shown:
        raise PipelineError(
            [f"there is no hook {hook!r}{nearest(hook, shown) or '; the hooks are ' + ', '.join(shown)}"]
        )
    rows = []
    for name in HOOKS:
        if hook is not None and hook.replace("-", "_") != name:
            continue
        known = {(offer.name, offer.package): ("installed", summary(offer.target)) for offer in offers(name)}
        for owner, entry in catalogue().items() if every else ():
            state = "planned" if entry.get("status") == "planned" else f"pip install {owner}"
            for method in entry.get("methods", {}).get(name, ()):
                known.setdefault((method, owner), (state, ""))
        for (method, owner), (state, about) in sorted(known.items()):
            if package is None or owner.removeprefix("plait-") == package.removeprefix("plait-"):
                row = {"hook": name.replace("_", "-"), "method": method, "package": owner, "state": state}
                rows.append({**row, "summary": about})
    return rows


@main.command()
@_out_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def runs(out: Path, as_json: bool) -> None:
    """List earlier runs, the latest first: when, how they ended, their main figures."""
    from plait.runs import past_runs

    found = past_runs(out)
    if as_json:
        rows = [
            {
                "run": run.folder.name, "folder": str(run.folder), "pipeline": run.pipeline, "started": run.started.isoformat(),
                "state": run.state, "cells": run.results.get("cells"), "steps": run.results.get("steps"), "headline": run.headline,
            }
            for run in found
        ]  # fmt: skip
        click.echo(json.dumps(rows, indent=1))
        return
    if not found:
        click.echo(f"there are no runs in {out}")
    width = max((len(run.pipeline) for run in found), default=0)
    for run in found:
        cells, steps = (run.results.get(name, "?") for name in ("cells", "steps"))
        when = run.started.strftime("%Y-%m-%d %H:%M")
        line = f"{run.folder.name}  {when}  {run.pipeline:<{width}}  {cells:>3} cells {steps:>4} steps  {run.state}"
        click.echo(f"{line}  {run.headline}".rstrip())


@main.command()
@click.argument("name", metavar="METHOD|RUN", shell_complete=completing.methods_and_runs)
@click.option("--hook", help="Which hook, where methods of two hooks share the name.")
@click.option("--all", "every", is_flag=True, help="Of a run: also the tables that steps added.")
@click.option(
    "--format",
    "text_format",
    type=click.Choice(["Markdown", "LaTeX", "CSV"], case_sensitive=False),
    help="Of a run: print its tables in this format.",
)
@_out_option
def show(name: str, hook: str | None, every: bool, text_format: Any, out: Path) -> None:
    """Show a METHOD (hooks, fields, package, paper, an example) or the tables of a RUN.

    A RUN is a folder, an id or its beginning, a pipeline's name for its latest run, or "last".
    """
    from plait.runs import is_run

    if is_run(name, out) or (not _is_method(name) and (out / name).is_dir()):
        _show_run(name, out, every, text_format)
    else:
        _show_method(name, hook)


def _is_method(name: str) -> bool:
    from plait.catalogue import offers
    from plait.hookspecs import HOOKS

    return ":" in name or any(offer.name == name.rpartition("/")[2] for hook in HOOKS for offer in offers(hook))


def _show_run(name: str, out: Path, every: bool, text_format: Any) -> None:
    from plait.report.text import table_as
    from plait.runs import find_run, open_run
    from plait.terminal import print_tables

    run = open_run(find_run(name, out))
    tables = [table for table in run.tables if every or table.main]
    if text_format:
        click.echo("\n".join(table_as(text_format, table) for table in tables), nl=False)
        return
    click.echo(f"{run.pipeline}, {run.started:%Y-%m-%d %H:%M}: {run.state}; {run.folder}")
    print_tables(tables)
    for kind, said in (("failed", "failed"), ("not run", "was not run")):
        for step, message in run.results[kind].items():
            click.echo(f"step {step} {said}: {message}")


def _show_method(method: str, hook: str | None) -> None:
    import inspect

    import attrs

    from plait.catalogue import catalogue, offers, package_of
    from plait.configuration import describe, example_step, fields_of
    from plait.errors import nearest
    from plait.hookspecs import HOOKS, implemented_hooks
    from plait.methods import arguments_of, find

    short = method.rpartition("/")[2]
    if hook:
        hooks = [hook.replace("-", "_")]
    elif ":" in method:
        hooks = list(HOOKS)
    else:
        hooks = [h for h in HOOKS if any(o.name == short for o in offers(h))] or [
            h for h in HOOKS if package_of(h, short)
        ]
    if not hooks:
        raise PipelineError(
            [
                f"there is no method {method!r}{nearest(short, {o.name for h in HOOKS for o in offers(h)}) or '; plait list --all shows all'}"
            ]
        )
    seen: set[Any] = set()
    for name in hooks:
        try:
            found = find(name, method)
        except PlaitError as error:
            if ":" in method and "has no hook" in str(error):
                continue
            raise
        if found.cls in seen:
            continue
        seen.add(found.cls)
        click.secho(f"{found.name}", bold=True)
        click.echo(f"  {(inspect.getdoc(found.cls) or '').strip()}".replace("\n", "\n  ").rstrip())
        implemented = implemented_hooks(found.cls)
        for one in implemented:
            arguments = ", ".join(
                a + ("" if required else " (optional)") for a, required in arguments_of(found.cls, one).items()
            )
            click.echo(f"  hook     {one.replace('_', '-')}  from: {arguments or 'nothing'}")
        for word, said in _contract(found, implemented):
            click.echo(f"  {word:<8} {said}")
        if found.package:
            entry = catalogue().get(found.package, {})
            click.echo(f"  package  {found.package} {found.version}")
            if entry.get("paper"):
                click.echo(f"  paper    {entry['paper']}")
        fields = fields_of(found.cls)
        if fields:
            click.echo("  fields")
        for field in fields.values():
            facts = describe(field)
            allowed = f", {facts['allowed']}" if facts["allowed"] and not facts["type"].startswith("one of") else ""
            required = facts["default"] == "required"
            click.echo(
                f"    {facts['name']}: {facts['type']}{allowed}; {'required' if required else 'default ' + facts['default']}"
            )
            if facts["doc"]:
                click.echo(f"        {facts['doc']}")
        click.echo("  in a pipeline")
        for one in implemented:
            click.echo(f"    {example_step(attrs.evolve(found, hook=one))}")
    if not seen:
        raise PipelineError([f"{method!r} implements none of the hooks"])


def _contract(found: Any, hooks: list[str]) -> Iterator[tuple[str, str]]:
    """What a method, with the defaults of its fields, says of what it takes and gives."""
    from plait.configuration import configure
    from plait.contract import declared

    try:
        method = configure(found, {})
    except ConfigurationError:  # a field without a default: what depends on fields is not known
        method = found.cls
    for hook in hooks:
        says = declared(method, hook)
        for argument, kinds in says.takes.items():
            yield "takes", f"{argument}: {' or '.join(kinds)}"
        if says.gives:
            yield "gives", says.gives
        for argument, columns in says.columns_needed.items():
            yield "needs", f"columns of {argument}: {', '.join(columns)}"
        if says.columns_made:
            yield "makes", f"columns {', '.join(says.columns_made)}"
        if says.splits:
            yield "splits", ", ".join(says.splits)


@main.command()
def schema() -> None:
    """Print the JSON Schema of pipeline files, with the installed methods and their fields."""
    from plait.schema import pipeline_schema

    click.echo(json.dumps(pipeline_schema(), separators=(",", ":")))


@main.command()
@click.argument("names", metavar="RUN...", nargs=-1, required=True, shell_complete=completing.runs)
@click.option("--full", is_flag=True, help="With all pictures as they are, however large the page becomes.")
@click.option("--to", type=click.Path(path_type=Path), help="Of several runs: the HTML file to write.")
@_out_option
@_store_option
def report(names: tuple[str, ...], full: bool, to: Path | None, out: Path, store: Path | None) -> None:
    """Write the report of a RUN again, or put several runs beside each other.

    A RUN is a folder, an id or its beginning, a pipeline's name for its latest run, or "last". Of several runs: what
    differs in configuration, and their tables with the differences to the first.
    """
    from plait.runs import find_run

    folders = [find_run(name, out) for name in names]
    if len(folders) == 1:
        from plait.run_folder import store_of
        from plait.runner import write_report_again

        write_report_again(folders[0], _store(store) if store else store_of(folders[0]), full)
        click.echo(f"report: {folders[0] / 'report.html'}")
        return
    from plait.comparing import compare
    from plait.report.html import to_html
    from plait.terminal import print_tables

    document = compare(folders)
    print_tables(table for table in document.tables if table.main)
    for note in document.notes:
        click.echo(f"note: {note}")
    click.echo(document.description)
    file = to or out / f"comparison-{'-'.join(folder.resolve().name for folder in folders)[:200]}.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_html(document, full), encoding="utf-8", errors="replace")
    except OSError as error:
        raise PlaitError(f"{file} cannot be written: {error.strerror}; name another file with --to") from error
    click.echo(f"report: {file}")


@main.command()
@click.argument("run", metavar="RUN", shell_complete=completing.runs)
@click.argument("step", shell_complete=completing.steps_of_run)
@click.argument("folder", type=click.Path(path_type=Path))
@_out_option
@_store_option
def export(run: str, step: str, folder: Path, out: Path, store: Path | None) -> None:
    """Write the result of a STEP of a RUN into a new FOLDER: a model folder, a data set, pictures."""
    from plait.exporting import export as export_result
    from plait.exporting import key_of
    from plait.run_folder import store_of
    from plait.runs import find_run

    found = find_run(run, out)
    place = _store(store) if store else store_of(found)
    click.echo(f"{folder}: {export_result(place, key_of(found, step), folder)}")


@main.command()
@click.argument("run", metavar="RUN", shell_complete=completing.runs)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_out_option
def record(run: str, file: Path, out: Path) -> None:
    """Put the figures of a RUN on record: a CSV with command, date, versions, hardware and every seed's value."""
    from plait.recording import record_of, to_text
    from plait.runs import find_run, open_run

    made = record_of(open_run(find_run(run, out)))
    try:
        file.write_text(to_text(made), encoding="utf-8")
    except OSError as error:
        raise PlaitError(f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"{file}: {len(made.figures)} figures")


@main.command()
@click.argument("names", metavar="RECORD_OR_PACKAGE...", nargs=-1, required=True)
@click.option("--quick", is_flag=True, help="The first seed only.")
@click.option("--write", is_flag=True, help="Put the new figures on record.")
@_store_option
@_out_option
def reproduce(names: tuple[str, ...], quick: bool, write: bool, store: Path | None, out: Path) -> None:
    """Run the pipelines behind recorded figures again; exit code 1 where one lies outside the recorded spread.

    Named are records, folders of them, or packages: the records in the folder figures that these had a part in. The
    commands are run from the current folder.
    """
    from plait.recording import records_named

    if quick and write:
        raise click.UsageError("figures of one seed are not put on record; leave out --quick or --write")
    good = True
    for file in [file for name in names for file in records_named(name, Path("figures"))]:
        try:
            good &= _reproduce(file, quick, write, store, out)
        except PlaitError as error:  # the others can be had all the same
            click.echo(f"  {error}")
            good = False
    if not good:
        raise SystemExit(1)


def _reproduce(file: Path, quick: bool, write: bool, store: Path | None, out: Path) -> bool:
    """Whether every figure came again, or is on record anew."""
    import attrs

    from plait.pipeline import load_pipeline
    from plait.recording import again, read_record, record_of, to_text
    from plait.runner import run_pipeline
    from plait.runs import open_run

    old = read_record(file)
    context = run.make_context("run", list(old.command), resilient_parsing=False)
    overrides = [*context.params["overrides"]]
    if quick and (seeds := old.figures[0].seeds[:1] if old.figures else ()) and seeds[0]:
        overrides.append(f"matrix.seed=[{seeds[0]}]")
    click.echo(f"{file}: plait run {context.params['pipeline']} {' '.join(overrides)}".rstrip())
    result = run_pipeline(load_pipeline(context.params["pipeline"], overrides), _store(store), out)
    compared = again(old, list(result.tables.values()))
    for one in compared:
        if not one.within:
            where = " / ".join(filter(None, one.figure.place))
            now = "missing" if one.value is None else f"{one.value:.6g}"
            click.echo(f"  {where}: {now}, on record {one.expected:.6g} ({one.figure.text})")
    inside = sum(one.within for one in compared)
    click.echo(f"  {inside} of {len(compared)} figures lie within the recorded spread")
    if not write:
        return inside == len(compared)
    if result.failed:
        failed, reason = next(iter(result.failed.items()))
        raise PlaitError(f"{file} stays as it is, since a step failed: {failed}: {reason}")
    new = record_of(open_run(result.folder))
    kept = attrs.evolve(new, facts={**new.facts, "command": old.facts["command"]})
    file.write_text(to_text(kept), encoding="utf-8")
    return True


@main.command()
@_pipeline_arguments
@click.option("--svg", type=click.Path(path_type=Path), help="Write the picture into this file.")
def graph(pipeline: Path, overrides: tuple[str, ...], svg: Path | None) -> None:
    """Draw the steps of a PIPELINE: as lines here, or as a picture."""
    from plait.drawing import as_lines, as_svg
    from plait.pipeline import load_pipeline

    checked = load_pipeline(pipeline, overrides)
    if svg is None:
        for line in as_lines(checked):
            click.echo(line)
        return
    try:
        svg.write_text(as_svg(checked), encoding="utf-8")
    except OSError as error:
        raise PlaitError(f"{svg} cannot be written: {error.strerror}") from error
    click.echo(str(svg))


@main.command()
@click.argument("method", shell_complete=completing.methods)
@click.option("--hook", help="Only this hook of the method.")
@click.option(
    "--example",
    metavar="FILE.py:FUNCTION",
    help="A function that returns the plait.testing.Example to try the method on; also package.module:function.",
)
def check(method: str, hook: str | None, example: str | None) -> None:
    """Check that a METHOD keeps every promise of its hooks, on small real data."""
    from plait.testing.checks import run_checks, subjects
    from plait.testing.examples import named_example

    broken = 0
    for subject in subjects(method, hook, (lambda: named_example(example)) if example else None):
        click.secho(f"{subject.method.hook.replace('_', '-')}: {subject.method.name}", bold=True)
        for name, sentence, passed in run_checks(subject):
            broken += not passed
            mark = "-" if passed and sentence else "+" if passed else "!"
            click.echo(f"  {mark} {name.replace('_', ' ')}{f'  {sentence}' if sentence else ''}")
    if broken:
        click.echo(f"{broken} check{'s' if broken > 1 else ''} failed", err=True)
        sys.exit(1)
    click.echo("all checks passed")


@main.command()
@click.argument("name")
@click.option(
    "--hook", "hooks", multiple=True, required=True, help="A hook that the package implements; may be repeated."
)
@click.option(
    "--domain",
    default="image-classification",
    show_default=True,
    help="What the methods work on; also image-text, text, graph, restoration, tensor.",
)
@click.option(
    "--in", "parent", type=click.Path(path_type=Path), default=Path(), help="Where to put the package's folder."
)
def new(name: str, hooks: tuple[str, ...], domain: str, parent: Path) -> None:
    """Write a complete, working package NAME for a new method."""
    from plait.new import create

    folder = create(name, list(hooks), parent, domain)
    click.echo(f"{folder} is ready:")
    click.echo(f"  pip install -e {folder}")
    click.echo(f"  plait check {name}")
    click.echo(f"  plait run {folder}/pipelines/demo.yaml")


@main.command()
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--from", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A folder of wheels."
)
def install(names: tuple[str, ...], folder: Path | None) -> None:
    """Install packages by NAMES of packages or methods, as the catalogue knows them."""
    from plait.installing import install as install_packages

    install_packages(list(names), folder)


@main.command()
@_store_option
def doctor(store: Path | None) -> None:
    """Look at versions, entry points, names, torch and the store; exit code 1 when something is wrong."""
    from plait.doctor import examine

    wrong = 0
    for finding in examine(_store(store)):
        wrong += not finding.ok
        click.echo(f"{'ok   ' if finding.ok else 'wrong'}  {finding.text}")
    if wrong:
        click.echo(f"{wrong} things are wrong", err=True)
        sys.exit(1)


@main.group()
def cache() -> None:
    """Look after the store of results."""


@cache.command("ls")
@_store_option
@click.option(
    "--by",
    type=click.Choice(["result", "step", "method"]),
    default="result",
    show_default=True,
    help="Add up what results of a step or of a method take.",
)
def cache_ls(store: Path | None, by: str) -> None:
    """List what is in the store, the largest last: its size, and the part of it that no other result shares."""
    import time

    from plait.listeners import duration
    from plait.store import own_sizes

    place = _store(store)
    entries = list(place.entries())
    groups: dict[str, list[Any]] = {}
    for entry in entries:
        label, method = entry.meta.get("label", ""), entry.meta.get("method", "")
        names = {"result": entry.key, "step": label.partition("[")[0].partition(".")[0], "method": method}
        groups.setdefault(names[by], []).append(entry)
    sizes = {name: sum(entry.size for entry in found) for name, found in groups.items()}
    own = own_sizes(groups)
    for name, found in sorted(groups.items(), key=lambda item: sizes[item[0]]):
        takes = f"{sizes[name] / 2**20:9.2f} MiB  {own[name] / 2**20:9.2f} its own"
        if by == "result":
            meta = found[0].meta
            age = duration(time.time() - meta["created"])
            click.echo(f"{name[:12]}  {takes}  {age:>14} ago  {meta.get('label', '')}  {meta.get('method', '')}")
        else:
            click.echo(f"{takes} in {len(found):6d}  {name}")
    (on_disk,) = own_sizes({"": entries}).values()
    click.echo(
        f"{len(entries)} results, {sum(sizes.values()) / 2**20:.2f} MiB ({on_disk / 2**20:.2f} on the disk, where equal"
        f" files are one) in {place.root}"
    )
    steps, held = place.unfinished()
    if steps:
        click.echo(
            f"{steps} steps that did not finish keep {held / 2**20:.2f} MiB for a resume; plait cache gc deletes old ones"
        )


@cache.command("gc")
@_store_option
@click.option(
    "--older-than", type=click.FloatRange(0), default=30.0, show_default=True, help="Days a result was not used."
)
def cache_gc(store: Path | None, older_than: float) -> None:
    """Delete results that were not used for long, and what killed runs left."""
    place = _store(store)
    count, freed = place.collect(older_than * 86400)
    click.echo(f"deleted {count} results, freed {freed / 2**20:.2f} MiB in {place.root}")


@cache.command("verify")
@_store_option
@click.option("--delete", is_flag=True, help="Delete broken results, so that the next run makes them again.")
def cache_verify(store: Path | None, delete: bool) -> None:
    """Compare every stored file with its checksum; exit code 1 when one differs."""
    place = _store(store)
    broken = place.verify()
    for key, problem in broken.items():
        click.echo(f"{key[:12]}  {problem}{'  deleted' if delete else ''}")
        if delete:
            place.remove(key)
    click.echo(
        f"{len(broken)} broken results in {place.root}{'; plait cache verify --delete removes them' if broken and not delete else ''}"
    )
    if broken and not delete:
        sys.exit(1)


if __name__ == "__main__":
    main()
