"""The policy: what an engine must reach before it may answer, per precision, as a TOML file can set it.

A file names what it changes; everything else keeps the shipped limits of `runtime/tolerances.py`:

    name = "search"
    [int8]
    min_cosine = 0.98
    top10_overlap = 0.95

The policy's hash is that of the limits alone: two files that ask for the same are the same policy. It stands in every
verdict, so a server notices one that was reached under other limits.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import InputError
from runtime.files import explain_read_errors
from runtime.tolerances import TOLERANCES, Tolerance
from runtime.toml_text import toml_value

_COSINES = ("min_cosine", "mean_cosine")
_NAMES = tuple(f.name for f in fields(Tolerance))
# What each limit may be, smallest and largest.
_RANGES = dict.fromkeys(_COSINES, (-1.0, 1.0)) | {
    "max_abs_diff": (0.0, 2.0),
    "norm_error": (0.0, 1.0),
    "top10_overlap": (0.0, 1.0),
    "retrieval_loss_points": (0.0, 100.0),
}


@dataclass(frozen=True)
class Policy:
    """The limits of every precision, and the name people know the policy by."""

    name: str = "default"
    limits: Mapping[str, Tolerance] = field(default_factory=lambda: dict(TOLERANCES))
    file: str = field(default="", compare=False)  # where it was read

    @property
    def sha256(self) -> str:
        """64 hex digits over all limits; the name and how a file was written do not count."""
        canonical = {name: msgspec.to_builtins(self.limits[name]) for name in sorted(self.limits)}
        return hashlib.sha256(b"f2rt policy 1\n" + msgspec.json.encode(canonical, order="sorted")).hexdigest()

    def tolerance(self, precision: str) -> Tolerance:
        """Return the limits of a precision; raises KeyError for one that has none."""
        return self.limits[precision]


def read_policy(path: Path | None) -> Policy:
    """Read a policy file; None is the shipped policy.

    Raises InputError with file, key, value, limit and cure for a file that cannot be read, is not TOML, or sets
    something that is no limit.
    """
    if path is None:
        return Policy()
    with explain_read_errors(path, InputError):
        data = path.read_bytes()
    try:
        document = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of thousands of digits, deep nesting
        raise InputError(
            f"{path} is not TOML: {error}.", cure="See the shipped policy: f2rt parity --print-policy"
        ) from error
    name = document.pop("name", path.stem)
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: name is {name!r}.", cure='Write it as text: name = "search"')
    limits = dict(TOLERANCES)
    for precision, section in document.items():
        if precision not in limits or not isinstance(section, dict):
            raise InputError(
                f"{path}: [{precision}] is no section of a policy; there are: {', '.join(sorted(limits))}.",
                cure="Write each limit below the precision it is for.",
            )
        limits[precision] = replace(limits[precision], **_section(path, precision, section))
    return Policy(name, limits, str(path))


def _section(path: Path, precision: str, section: dict[str, Any]) -> dict[str, float]:
    found = {}
    for key, value in section.items():
        if key not in _NAMES:
            raise InputError(
                f"{path}: [{precision}] {key} is no limit; there are: {', '.join(_NAMES)}.", cure="Correct the name."
            )
        lowest, highest = _RANGES[key]
        # bool is an int in Python, and NaN compares with nothing.
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise InputError(
                f"{path}: [{precision}] {key} is {value!r}; it must be a number from {lowest:g} to {highest:g}.",
                cure=f"The shipped limit is {getattr(TOLERANCES[precision], key):g}.",
            )
        found[key] = float(value)
    return found


def to_toml(policy: Policy) -> str:
    """Return the policy as a file that `read_policy` takes, every limit spelt out."""
    lines = [f"name = {toml_value(policy.name)}"]
    for precision, limits in policy.limits.items():
        lines += ["", f"[{precision}]", *(f"{name} = {getattr(limits, name)!r}" for name in _NAMES)]
    return "\n".join(lines) + "\n"
