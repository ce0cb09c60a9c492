"""What every command shares: plain output off a terminal, progress bars on one, and errors made readable."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from runtime.errors import F2rtError, explain_memory_errors, status_of

_PLAIN_WIDTH = 140  # off a terminal rich assumes 80 columns and cuts tables


def out() -> Console:
    """Return a console on standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


class Bars:
    """Progress bars by label, drawn on standard error and only on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, label: str, done: int, total: int) -> None:
        """Show `done` of `total` for the bar called `label`."""
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)

    def say(self, message: str) -> None:
        """Print a line above the bars, also where none are drawn."""
        self._progress.console.print(Text(message), soft_wrap=True)


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    """Yield progress bars; quiet when standard error is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("warning: ", "bold yellow"), message))


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print an F2rtError as message and cure and leave with its exit code."""
    try:
        with explain_memory_errors("go on", "Free memory, or give less at once."):
            yield
    except F2rtError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(Text.assemble(("error: ", "bold red"), error.message))
        if error.cure:
            console.print(Text.assemble(("  cure: ", "bold"), error.cure))
        raise SystemExit(status_of(error).exit_code) from error
