"""What several verbs share on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from runtime.errors import missing_extra

WaitOption = Annotated[
    float,
    typer.Option(
        "--wait", min=0, envvar="F2RT_WAIT", help="Seconds to wait for another f2rt that is changing this bundle."
    ),
]


@contextlib.contextmanager
def export_extra() -> Iterator[None]:
    """Say which extra is missing when a library of this package is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "export") from error
