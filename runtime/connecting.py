"""How commands reach a server: the options that say who asks, and the connection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from runtime.errors import missing_extra

if TYPE_CHECKING:
    from runtime.client import EmbeddingClient

KEY = typer.Option(help="API key.", envvar="F2RT_API_KEY", show_envvar=True)
TLS_CA = typer.Option(help="Authority of the server's certificate, PEM.")
TLS_CERT = typer.Option(help="A certificate of yours, for a server that asks for one, PEM.")
TLS_KEY = typer.Option(help="The key of --tls-cert, PEM.")


def connect(
    server: str,
    key: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    *,
    timeout_s: float = 60.0,
) -> EmbeddingClient:
    """Return a client of a server. Raises MissingExtraError without gRPC, and InputError as `EmbeddingClient` does."""
    try:
        from runtime.client import EmbeddingClient
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "serve") from error
    return EmbeddingClient(
        server, timeout_s=timeout_s, key=key or None, tls_ca=tls_ca, tls_certificate=tls_cert, tls_key=tls_key
    )
