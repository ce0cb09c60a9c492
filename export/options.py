"""What several verbs share on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from runtime.errors import MissingExtraError, missing_extra

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
        name = str(error.name)
        if name.rpartition(".")[2].startswith("_"):  # a library's own inner part: it is there, and does not load
            raise MissingExtraError(
                f"a library of this command cannot be loaded: {error}.",
                cure="Free memory if there is too little to load it, or install it again: pip install 'f2rt[export]'",
            ) from error
        raise missing_extra(name, "export") from error
