"""Every error f2rt raises on purpose has a place in the tree, a status, and a way back to the caller."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import runtime.errors as errors
from runtime import console
from runtime.client import EmbeddingClient
from runtime.errors import STATUS, F2rtError, missing_extra, status_of
from runtime.wire.grpc_calls import status_details

# Status in gRPC and HTTP, and what a caller in Python catches; written by hand, not derived from the code.
TABLE = {
    "F2rtError": ("INTERNAL", 500),
    "InputError": ("INVALID_ARGUMENT", 400),
    "TooLargeError": ("INVALID_ARGUMENT", 413),
    "CheckpointError": ("INVALID_ARGUMENT", 400),
    "NotFoundError": ("NOT_FOUND", 404),
    "AccessError": ("UNAUTHENTICATED", 401),
    "OverloadedError": ("RESOURCE_EXHAUSTED", 429),
    "DeadlineError": ("DEADLINE_EXCEEDED", 504),
    "AbandonedError": ("CANCELLED", 499),
    "UnavailableError": ("UNAVAILABLE", 503),
    "MissingExtraError": ("FAILED_PRECONDITION", 500),
    "OutputError": ("INTERNAL", 500),
    "BundleError": ("FAILED_PRECONDITION", 500),
    "UnverifiedError": ("FAILED_PRECONDITION", 500),
    "EngineError": ("INTERNAL", 500),
    "NotExecutableError": ("INTERNAL", 500),
    "OutOfMemoryError": ("INTERNAL", 500),
}


def family(cls: type[F2rtError]) -> Iterator[type[F2rtError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from family(child)


def test_the_table_names_every_error() -> None:
    assert {cls.__name__ for cls in family(F2rtError)} == set(TABLE)
    assert all(cls.__module__ == "runtime.errors" for cls in family(F2rtError)), "errors live in one file"


@pytest.mark.parametrize("name", list(TABLE))
def test_every_error_has_its_status(name: str) -> None:
    status = status_of(getattr(errors, name)("what", cure="how"))
    assert (status.grpc, status.http) == TABLE[name]
    assert isinstance(grpc.StatusCode[status.grpc], grpc.StatusCode)
    assert status.exit_code == 2


def test_a_child_without_an_entry_has_its_parents_status() -> None:
    assert errors.UnverifiedError not in STATUS
    assert status_of(errors.UnverifiedError("x")) is STATUS[errors.BundleError]
    assert status_of(errors.CheckpointError("x")) is STATUS[errors.InputError]


def test_the_docstring_draws_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    ((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+Error)\b", line)
        if found:
            depth = 0 if "──" not in line else len(found[1]) // 4 + 1
            path = [*path[:depth], found[2]]
            drawn[found[2]] = path[depth - 1] if depth else "Exception"
    assert drawn == {cls.__name__: cls.__base__.__name__ for cls in family(F2rtError) if cls.__base__}


def test_message_and_cure() -> None:
    error = errors.InputError("7 is too many.", cure="Send 6.")
    assert (error.message, error.cure, str(error)) == ("7 is too many.", "Send 6.", "7 is too many. Send 6.")
    assert str(errors.EngineError("broken.")) == "broken."
    assert "pip install 'f2rt[serve]'" in str(missing_extra("grpc", "serve"))
    assert "'grpc'" in str(missing_extra("grpc", "serve"))


@pytest.mark.parametrize("name", list(TABLE))
def test_a_command_prints_message_and_cure_and_leaves_with_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, console.readable_errors():
        raise getattr(errors, name)("a [bold]odd[/nothing] :smile: message.", cure="Do [this].")
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: a [bold]odd[/nothing] :smile: message.\n  cure: Do [this].\n"


def test_other_exceptions_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), console.readable_errors():
        1 / 0  # noqa: B018


class Failure(grpc.RpcError):
    """What grpc raises, with the methods a client reads."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailing: Any = None) -> None:
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def translated(
    code: grpc.StatusCode, details: str | None, trailing: Any = None, **connection: Path | None
) -> F2rtError:
    def fail(request: Any, timeout: float, metadata: Any) -> Any:
        raise Failure(code, details, trailing)

    with EmbeddingClient("127.0.0.1:1", **connection) as client, pytest.raises(F2rtError) as caught:
        client._call(fail, None, None)
    assert isinstance(caught.value.__cause__, Failure)
    return caught.value


@pytest.mark.parametrize(
    "cls",
    [
        errors.InputError,
        errors.NotFoundError,
        errors.AccessError,
        errors.OverloadedError,
        errors.DeadlineError,
        errors.UnavailableError,
        errors.EngineError,
    ],
)
def test_the_client_raises_what_the_server_raised(cls: type[F2rtError]) -> None:
    sent = cls("what.", cure="How.")
    code = grpc.StatusCode[status_of(sent).grpc]
    back = translated(code, str(sent), status_details(code, sent))
    assert type(back) is cls
    assert str(back) == str(sent)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_an_f2rt_error(code: grpc.StatusCode) -> None:
    for details in ("", None, "why"):
        error = translated(code, details)
        assert error.message
        assert type(error) in family(F2rtError)


def test_connection_and_size_failures_say_the_cure(tmp_path: Path) -> None:
    gone = translated(grpc.StatusCode.UNAVAILABLE, "connection refused")
    assert isinstance(gone, errors.UnavailableError)
    assert gone.message == "no f2rt server answers at 127.0.0.1:1: connection refused."
    assert "f2rt serve" in gone.cure
    assert "one with TLS needs tls_ca" in gone.cure
    pem = tmp_path / "any.pem"
    pem.write_text("none")
    closed = translated(grpc.StatusCode.UNAVAILABLE, "Socket closed.", tls_ca=pem)
    assert closed.message.endswith("Socket closed.")
    assert "asks for certificates needs yours" in closed.cure
    large = translated(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)")
    assert type(large) is errors.InputError
    assert large.cure == "Split the request."


@pytest.mark.parametrize("given", [("tls_certificate",), ("tls_ca", "tls_key"), ("tls_certificate", "tls_key")])
def test_files_of_a_connection_go_together(tmp_path: Path, given: tuple[str, ...]) -> None:
    files = {name: tmp_path / name for name in given}
    with pytest.raises(errors.InputError, match="go together"):
        EmbeddingClient("127.0.0.1:1", **files)


def test_a_file_of_a_connection_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match=r"cannot read .*gone\.pem"):
        EmbeddingClient("127.0.0.1:1", tls_ca=tmp_path / "gone.pem")


def test_progress_bars_are_quiet_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with console.bars() as bars:
        bars.update("work", 1, 2)
        bars.update("work", 2, 2)
    assert stream.getvalue() == ""
