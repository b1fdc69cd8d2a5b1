"""Small real methods for the core's tests; pipelines name them by path."""

import os
import signal
import time
from pathlib import Path
from typing import Literal

import attrs
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range, method_field, method_list_field, one_of, output_field


@attrs.frozen(kw_only=True)
class Numbers:
    """Random numbers in two splits."""

    size: int = attrs.field(default=4, validator=in_range(1, 1000), metadata=doc("how many"))
    scale: float = attrs.field(default=1.0, validator=in_range(0, 10, low_open=True), metadata=doc("factor"))
    kind: Literal["uniform", "normal"] = "uniform"
    mode: str = attrs.field(default="plain", validator=one_of("plain", "fancy"))
    names: tuple[str, ...] = ()
    maximum: float | None = None
    splits = ("train", "test")

    @hookimpl
    def load_data(self, run):
        generator = run.numpy_generator()
        draw = generator.random if self.kind == "uniform" else generator.standard_normal
        return {name: (self.scale * draw(self.size)).tolist() for name in self.splits}


@attrs.frozen(kw_only=True)
class Add:
    """Adds a number to every number, and tells a file that it ran."""

    amount: float = 1.0
    witness: str = output_field("", "file that it writes its step's name to")

    @hookimpl
    def transform(self, data, run):
        if self.witness:
            with Path(self.witness).open("a") as file:
                file.write(f"{run.step}\n")
        return [value + self.amount for value in data]


@attrs.frozen(kw_only=True)
class Several:
    """Applies transforms one after the other."""

    steps: tuple = method_list_field("transform", "what to apply, in order")
    last: object = method_field("transform", "applied at the end", default=None)

    @hookimpl
    def transform(self, data, run):
        for step in (*self.steps, *([self.last] if self.last else [])):
            data = step.transform(data, run)
        return data


@attrs.frozen(kw_only=True)
class Fail:
    """Fails in a chosen way."""

    how: str = "plait"

    @hookimpl
    def transform(self, data, run):
        if self.how == "plait":
            raise PlaitError("the data is wrong; use other data")
        if self.how == "none":
            return None
        if self.how == "type":
            return object()
        if self.how == "model":
            return Unwritable()
        return 1 / 0


class Unwritable:
    """A model that cannot be saved."""

    def save_pretrained(self, folder):
        raise OSError("no")

    @classmethod
    def from_pretrained(cls, folder):
        return cls()


@attrs.frozen(kw_only=True)
class Slow:
    """Counts in steps with a checkpoint after each; kills its own process once, at ``kill_at``."""

    steps: int = 5
    kill_at: int = -1
    pause: float = 0.0
    interrupt: bool = False

    @hookimpl
    def transform(self, data, run):
        checkpoint = run.folder / "done"
        start = int(checkpoint.read_text()) if checkpoint.exists() else 0
        started = run.folder / "starts"
        started.write_text((started.read_text() if started.exists() else "") + f"{start} ")
        for step in run.track(range(start, self.steps), "counting"):
            run.log(step=step, value=step**2)
            if step == self.kill_at and not (run.folder / "killed").exists():
                (run.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGINT if self.interrupt else signal.SIGKILL)
            time.sleep(self.pause)
            (run.folder / "new").write_text(str(step + 1))
            os.replace(run.folder / "new", checkpoint)  # in one piece, whenever the process is killed
        return {"starts": started.read_text().split(), "data": data}


@attrs.frozen(kw_only=True)
class Mean:
    """Mean of every entry."""

    title: str = ""

    @hookimpl
    def evaluate(self, data, reference: object | None, run):
        data = data if isinstance(data, dict) else {"all": data}
        if reference is not None:
            run.warn("a reference was given")
        rows = [{"name": name, "mean": sum(values) / len(values)} for name, values in data.items()]
        return Report(rows=rows, title=self.title, better={"mean": "higher"}, formats={"mean": ".3f"})
