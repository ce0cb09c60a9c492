"""One embedding request and its answer, whatever protocol they travel in."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.tokenizer import Instruction, TokenizedText, Truncate


def left_s(deadline_s: float | None) -> float | None:
    """Return the seconds until a time of `time.perf_counter`, 0 when it has passed; None without one."""
    return None if deadline_s is None else max(deadline_s - time.perf_counter(), 0.0)


@dataclass(frozen=True)
class EmbedCall:
    """Texts, or token ids used verbatim, and what to do with them. What is None is the model's or server's default.

    `deadline_s` is a time of `time.perf_counter`. `request_id`, `model` and W3C's
    `traceparent` are as the caller gave them, or ""; `received_ns` is wall-clock time.
    """

    texts: Sequence[str] = ()
    token_ids: Collection[Sequence[int]] = ()
    instruction: Instruction = Instruction()
    truncate: Truncate | None = None
    dimensions: int | None = None
    normalize: bool = True
    deadline_s: float | None = None
    request_id: str = ""
    model: str = ""
    traceparent: str = ""
    received_ns: int = field(default_factory=time.time_ns)

    @property
    def items(self) -> int:
        """Number of texts or token id lists."""
        return len(self.texts) or len(self.token_ids)

    @property
    def left_s(self) -> float | None:
        """The time until the deadline, 0 when it has passed; None without one."""
        return left_s(self.deadline_s)

    def check(self, max_items: int) -> None:
        """Check what needs no tokenizer. Raises InputError."""
        if len(self.texts) and len(self.token_ids):
            raise InputError("texts and token_ids were both given.", cure="Send two requests.")
        if len(self.token_ids) and (self.instruction.prompt_name is not None or self.instruction.prompt is not None):
            raise InputError("a prompt was given with token_ids, which are used verbatim.", cure="Leave it out.")
        if not 1 <= self.items <= max_items:
            raise InputError(
                f"the request has {self.items} items; it may have 1 to {max_items}.",
                cure="Send at least one text." if self.items < 1 else "Split the request.",
            )


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in milliseconds. `queue_ms` is what is neither tokenization nor inference."""

    tokenize_ms: float
    queue_ms: float
    infer_ms: float
    total_ms: float


@dataclass(frozen=True)
class EmbedReply:
    """Unit vectors float32 [items, dim] of the full dimension, in the request's order, and who made them."""

    vectors: NDArray[np.float32]
    items: list[TokenizedText]
    fingerprint: str
    trained_dims: Sequence[int]
    timings: Timings


@dataclass(eq=False)
class Stopwatch:
    """Times of one request, as `time.perf_counter` gives them."""

    started_s: float = field(default_factory=time.perf_counter)
    tokenized_s: float = 0.0
    infer_s: float = 0.0

    def read(self) -> Timings:
        """Return the timings up to now."""
        total_s = time.perf_counter() - self.started_s
        tokenize_s = self.tokenized_s - self.started_s
        queue_s = max(total_s - tokenize_s - self.infer_s, 0.0)
        return Timings(1e3 * tokenize_s, 1e3 * queue_s, 1e3 * self.infer_s, 1e3 * total_s)


def instruction_for(input_type: str, prompts: Mapping[str, str]) -> Instruction:
    """Return the prompt for an input type as KServe and Cohere clients name it: query, passage or document.

    A model that has no prompt for passages takes them as they are. Raises InputError for another type, or for queries
    of a model without a prompt for them.
    """
    if input_type == "query":
        if "query" in prompts:
            return Instruction(prompt_name="query")
        raise InputError(
            "this model has no prompt for queries.", cure="Give the prompt itself, or leave input_type out."
        )
    if input_type in ("passage", "document"):
        name = next((name for name in (input_type, "passage", "document") if name in prompts), None)
        return Instruction(prompt="") if name is None else Instruction(prompt_name=name)
    raise InputError(f"there is no input_type {input_type[:40]!r}.", cure="Choose query or passage.")
