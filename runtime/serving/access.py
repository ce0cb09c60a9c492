"""API keys from a file: several at a time, compared in constant time, read again on demand. Never logged.

One key a line; in `NAME:KEY` the name is for those who keep the file, and is not read; lines that start with # are
comments. At least 16 characters.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from runtime.errors import AccessError, InputError

_LEAST_CHARS = 16


class Keys:
    """The keys a server knows. Without a file everybody may enter."""

    def __init__(self, file: str = "") -> None:
        """Read the keys. Raises InputError."""
        self._file = file
        self._known = _read(Path(file)) if file else []

    @property
    def required(self) -> bool:
        """Whether a key has to be shown."""
        return bool(self._file)

    def reload(self) -> None:
        """Read the file again. Raises InputError, and keeps what is known."""
        if self._file:
            self._known = _read(Path(self._file))

    def check(self, authorization: str | None, api_key: str | None) -> None:
        """Raise AccessError unless a known key was shown: `Authorization: Bearer KEY`, or `X-API-Key: KEY`."""
        if not self._file:
            return
        shown = api_key
        if authorization is not None:
            scheme, _, shown = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise AccessError("the authorization is not a bearer key.", cure="Send: Authorization: Bearer KEY")
        if not shown:
            raise AccessError("no API key was sent.", cure="Send: Authorization: Bearer KEY")
        digest = _digest(shown.strip())
        # All of them, always: the time must not tell which one came close.
        fits = [hmac.compare_digest(digest, known) for known in self._known]
        if not any(fits):
            raise AccessError("the API key is not known here.", cure="Ask the server's operator for one.")


def _read(file: Path) -> list[bytes]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the keys in {file} cannot be read: {error}.", cure="Give a text file, one key a line."
        ) from error
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key = text.rpartition(":")[2].strip()
        if len(key) < _LEAST_CHARS or any(c.isspace() for c in key):
            raise InputError(
                f"line {number} of {file} has a key of {len(key)} characters; a key has at least {_LEAST_CHARS}, "
                "without spaces.",
                cure="Make one with: openssl rand -hex 24",
            )
        keys.append(_digest(key))
    if not keys:
        raise InputError(f"{file} holds no key.", cure="Write one key a line, or serve without a keys file.")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
