"""Optimization profiles: the length buckets an engine is compiled for. Pure data, no library."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.errors import InputError

_BUCKET = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True, order=True)
class Profile:
    """One bucket: up to `rows` texts of up to `tokens` tokens; both at least 1."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


# The longest bucket of a preset: the evaluation length of F2LLM-v2. Attention kernels end not far beyond it.
LONGEST_TOKENS = 8192

PRESETS: dict[str, tuple[Profile, ...]] = {
    # Few texts, short ones first: a request meets a bucket near its own size.
    "latency": (Profile(1, 64), Profile(8, 128), Profile(8, 512)),
    # Many texts a batch.
    "throughput": (Profile(64, 64), Profile(64, 256), Profile(32, 512)),
}


def parse_profiles(text: str, max_tokens: int) -> tuple[Profile, ...]:
    """Read a preset's name or a list such as 1x64,8x256.

    A preset is cut to the model's limit and gets one more bucket for a single text of any length up to it, so that
    nothing the model takes is refused. Raises InputError for an unknown name, a malformed bucket, or one longer than
    `max_tokens`.
    """
    if text in PRESETS:
        cut = [Profile(p.rows, min(p.tokens, max_tokens)) for p in PRESETS[text]]
        longest = min(max_tokens, LONGEST_TOKENS)
        if longest > max(p.tokens for p in cut):
            cut.append(Profile(1, longest))
        return tuple(dict.fromkeys(cut))
    profiles = []
    for part in text.split(","):
        match = _BUCKET.fullmatch(part.strip())
        if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
            raise InputError(
                f"{part.strip()!r} is no profile.",
                cure=f"Give ROWSxTOKENS, for example 1x64,8x256, or a preset: {', '.join(PRESETS)}.",
            )
        profile = Profile(int(match[1]), int(match[2]))
        if profile.tokens > max_tokens:
            raise InputError(
                f"the profile {profile} is longer than the model's limit of {max_tokens} tokens.", cure="Shorten it."
            )
        profiles.append(profile)
    return tuple(dict.fromkeys(profiles))
