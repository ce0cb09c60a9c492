"""Certificate, key and authority of both ports: looked at before they are used, and read again on demand.

Connections that are open keep what they were made with; each new one gets what was read last.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from runtime.errors import InputError
from runtime.settings import TlsSettings

_TRIES = 5


@dataclass(frozen=True)
class _Loaded:
    """One reading of the files, for either library. `grpc` is compared by identity: an object for each reading."""

    files: tuple[bytes, bytes, bytes | None]
    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


class TlsFiles:
    """What a server shows and asks for, as its files are now."""

    def __init__(self, settings: TlsSettings) -> None:
        """Read the files. Raises InputError, naming the one that cannot be used."""
        self._settings = settings
        self._loaded = _load(settings)

    def reload(self) -> None:
        """Read the files again. Raises InputError, and keeps what was read before."""
        loaded = _load(self._settings)
        if loaded.files != self._loaded.files:  # sessions go on where nothing has changed
            self._loaded = loaded

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a gRPC port, which follow a reload."""
        given = self._loaded.grpc

        def newer() -> grpc.ServerCertificateConfiguration | None:  # asked at every handshake
            nonlocal given
            if self._loaded.grpc is given:
                return None
            given = self._loaded.grpc
            return given

        return grpc.dynamic_ssl_server_credentials(given, newer, bool(self._settings.client_ca))

    def context(self) -> ssl.SSLContext:
        """Return a context for a listening socket of asyncio, which follows a reload."""
        context = _Following(ssl.PROTOCOL_TLS_SERVER)
        context.latest = lambda: self._loaded.context
        return context


class _Following(ssl.SSLContext):
    """Leaves each connection to the context of the latest reading, with its sessions: an old one opens no door."""

    latest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Return what asyncio talks TLS with on one connection."""
        return self.latest().wrap_bio(*args, **options)


def _load(settings: TlsSettings) -> _Loaded:
    """Read the files, once more while somebody replaces them."""
    for _ in range(_TRIES):
        before = _read(settings)
        context = _context(settings)
        if _read(settings) == before:
            certificate, key, authority = before
            return _Loaded(before, context, grpc.ssl_server_certificate_configuration([(key, certificate)], authority))
    raise InputError("the TLS files change while they are read.", cure="Reload once they are complete.")


def _read(settings: TlsSettings) -> tuple[bytes, bytes, bytes | None]:
    authority = _read_pem(settings.client_ca) if settings.client_ca else None
    return _read_pem(settings.certificate), _read_pem(settings.key), authority


def _read_pem(file: str) -> bytes:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"the TLS file {file} cannot be read: {error}.", cure="Give a PEM file.") from error
    if b"-----BEGIN" not in data:
        raise InputError(f"the TLS file {file} is not PEM.", cure="Convert it with openssl.")
    return data


def _context(tls: TlsSettings) -> ssl.SSLContext:
    """Load the files. Raises InputError, naming the one at fault: gRPC itself does not say what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of its own the library would ask the terminal for the one of an encrypted key.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InputError(
            f"the TLS certificate {tls.certificate} with the key {tls.key} cannot be used: {_reason(error)}.",
            cure="Give the certificate and its own key, not encrypted, as PEM; look at them with openssl x509 -text.",
        ) from error
    if tls.client_ca:
        try:
            context.load_verify_locations(tls.client_ca)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the TLS authority {tls.client_ca} cannot be used: {_reason(error)}.",
                cure="Give the certificates of the authority as PEM; look at them with openssl x509 -text.",
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: Exception) -> str:
    """Return what the library says, without its own source's file and line."""
    return str(error).partition(" (_ssl.c")[0] or type(error).__name__
