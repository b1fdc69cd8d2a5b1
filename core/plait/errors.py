"""The one exception a user of plait is meant to see."""

from __future__ import annotations


class PlaitError(Exception):
    """A mistake of the user's, told in one sentence: which step or field, which value, what to do.

    The command line prints the message without a traceback (``--debug`` shows it).
    Messages start in lower case after their subject and end without a traceback, e.g.
    ``PlaitError("bin_width is 0; allowed is a whole number from 1 to 256")``.
    """


class PipelineError(PlaitError):
    """A pipeline file or command is wrong; nothing has been run (exit code 2).

    Attributes:
        problems: one sentence each, all that were found, in the order of the file.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))
