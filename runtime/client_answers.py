"""What the client gives back: a server's answers, typed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.tokenizer import Truncate


@dataclass(frozen=True)
class EmbeddedItem:
    """What became of one text: tokens the engine saw, tokens there were, and whether some were dropped."""

    tokens: int
    original_tokens: int
    truncated: bool


@dataclass(frozen=True)
class Timings:
    """Where the server's time went, in milliseconds."""

    tokenize_ms: float
    queue_ms: float
    infer_ms: float
    total_ms: float


@dataclass(frozen=True)
class EmbedAnswer:
    """Vectors float32 [items, dim] in the order of the request, and the fingerprint of the engine that made them."""

    vectors: NDArray[np.float32]
    items: list[EmbeddedItem]
    timings: Timings
    fingerprint: str
    trained_dimension: bool
    request_id: str


@dataclass(frozen=True)
class ExplainedItem:
    """What the engine would see: rendered text, ids, their spelling, and the pooled token."""

    rendered: str
    ids: list[int]
    tokens: list[str]
    pooled_position: int
    pooled_id: int
    truncated: bool
    original_tokens: int


@dataclass(frozen=True)
class ServerInfo:
    """Which engine answers, from which checkpoint, within which limits.

    `unverified` says what a server that allows it lacks of a verdict that stands; "" for a verified engine.
    """

    model: str
    revision: str
    engine: str
    precision: str
    fingerprint: str
    dim: int
    trained_dims: list[int]
    max_tokens: int
    prompts: dict[str, str]
    default_prompt_name: str
    default_truncate: Truncate
    max_items: int
    max_request_tokens: int
    license: str
    verdict: str
    min_cosine: float
    version: str
    selection: str
    name: str = ""
    models: list[str] = field(default_factory=list)
    state: str = ""
    golden_cosine: float = 0.0
    unverified: str = ""
    policy_sha256: str = ""


@dataclass(frozen=True)
class Reloaded:
    """A switch of engines: the fingerprints before and after, and the new engine's name."""

    model: str
    old_fingerprint: str
    new_fingerprint: str
    engine: str
