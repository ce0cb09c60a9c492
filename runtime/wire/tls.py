"""TLS files, looked at before a port is opened with them: gRPC itself does not say what is wrong with one."""

from __future__ import annotations

import ssl
from pathlib import Path

from runtime.errors import InputError
from runtime.settings import TlsSettings


def read_pem(file: str) -> bytes:
    """Return the bytes of a PEM file. Raises InputError."""
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"the TLS file {file} cannot be read: {error}.", cure="Give a PEM file.") from error
    if b"-----BEGIN" not in data:
        raise InputError(f"the TLS file {file} is not PEM.", cure="Convert it with openssl.")
    return data


def check_tls(tls: TlsSettings) -> None:
    """Load certificate, key and authority as a server would. Raises InputError, naming the file."""
    for file in (tls.certificate, tls.key, tls.client_ca):
        if file:
            read_pem(file)
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


def _reason(error: Exception) -> str:
    """Return what the library says, without its own source's file and line."""
    return str(error).partition(" (_ssl.c")[0] or type(error).__name__
