"""Texts to vectors: tokenization, planning, the engine, and what is done to its vectors afterwards.

Knows no wire protocol. Vectors are float32 [items, dim] in the order of the request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch, make_batch
from runtime.batching import plan
from runtime.bundle import Bundle
from runtime.errors import EngineError, InputError
from runtime.gate import Gate
from runtime.loader import LoadedEngine, load_engine
from runtime.settings import EngineSettings, Limits
from runtime.tokenizer import Instruction, TokenizedText, Truncate

__all__ = ["EmbedResult", "Embedder", "finish", "not_finite", "open_embedder"]


@dataclass(frozen=True)
class EmbedResult:
    """Vectors float32 [items, dim] and where they come from. Times in milliseconds."""

    vectors: NDArray[np.float32]
    items: list[TokenizedText]
    fingerprint: str
    tokenize_ms: float
    infer_ms: float


class Embedder:
    """One proven engine with its tokenizer. `embed` may be called from any thread; batches run one by one."""

    def __init__(self, bundle: Bundle, loaded: LoadedEngine, limits: Limits = Limits()) -> None:
        self.bundle = bundle
        self.loaded = loaded
        self.limits = limits
        self.contract = bundle.manifest.contract
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the engine that makes the vectors."""
        return self.loaded.engine.fingerprint

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: Truncate = Truncate.END,
    ) -> EmbedResult:
        """Embed `texts`. Raises InputError, NotFoundError or EngineError."""
        self.check_dimensions(dimensions)
        start = time.perf_counter()
        items = self.tokenize(texts, Instruction(prompt_name, prompt), truncate)
        tokenized = time.perf_counter()
        vectors = finish(self.infer(items), dimensions, normalize)
        done = time.perf_counter()
        return EmbedResult(vectors, items, self.fingerprint, 1e3 * (tokenized - start), 1e3 * (done - tokenized))

    def tokenize(self, texts: Sequence[str], instruction: Instruction, truncate: Truncate) -> list[TokenizedText]:
        """Tokenize after checking the limits on items and characters. Raises InputError, NotFoundError."""
        self.check_texts(texts, instruction)
        return self.check_tokens(self.encode(texts, instruction, truncate))

    def encode(
        self, texts: Sequence[str], instruction: Instruction, truncate: Truncate, *, first: int = 0
    ) -> list[TokenizedText]:
        """Tokenize some of a request's texts, from number `first` on. Raises InputError, NotFoundError."""
        return self.loaded.tokenizer.encode(texts, instruction, truncate, first=first)

    def check_texts(self, texts: Sequence[str], instruction: Instruction) -> None:
        """Check what bounds tokenization before it starts. Raises InputError, NotFoundError."""
        self._check_count(len(texts))
        prompt_chars = len(self.loaded.tokenizer.prompt_text(instruction))
        total = prompt_chars * len(texts)
        for index, text in enumerate(texts):
            total += len(text)
            if len(text) > self.limits.max_text_chars:
                self._refuse_chars(f"text {index}", len(text))
        if prompt_chars > self.limits.max_text_chars:
            self._refuse_chars("the prompt", prompt_chars)
        # The prompt stands before every text, so a short request with a long prompt is a long request.
        if total > self.limits.max_request_chars:
            raise InputError(
                f"the request has {total} characters, {prompt_chars} of them in the prompt of each of {len(texts)} "
                f"texts; the limit is {self.limits.max_request_chars}.",
                cure="Split the request, or shorten the prompt.",
            )

    def _refuse_chars(self, what: str, chars: int) -> None:
        raise InputError(
            f"{what} has {chars} characters; the limit is {self.limits.max_text_chars}.",
            cure="Split it, or embed it in parts.",
        )

    def verbatim(self, sequences: Collection[Sequence[int]]) -> list[TokenizedText]:
        """Accept token ids as they are. Raises InputError."""
        self._check_count(len(sequences))
        return self.check_tokens(self.loaded.tokenizer.verbatim(sequences))

    def infer(self, items: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """Run the engine; float32 [items, dim], unit length, in the order of `items`. Raises EngineError."""
        vectors = np.empty((len(items), self.contract.dim), np.float32)
        for rows in self.plan(items):
            vectors[rows] = self.infer_rows(items, rows)
        return vectors

    def plan(self, items: Sequence[TokenizedText]) -> list[list[int]]:
        """Return which items share a batch, as indices."""
        return plan([len(item.ids) for item in items], self.limits)

    def infer_rows(self, items: Sequence[TokenizedText], rows: Sequence[int]) -> NDArray[np.float32]:
        """Run one batch, the items at `rows`; float32 [rows, dim]. Raises EngineError."""
        vectors = self.run(make_batch([items[row].ids for row in rows], self.contract.pad_id))
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            row = rows[int(bad[0])]
            raise not_finite(self.loaded.engine.name, row, len(items[row].ids))
        return vectors

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run one batch, alone; float32 [rows, dim], not looked at. Raises EngineError."""
        with self._lock:
            return self.loaded.engine.run(batch)

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise InputError unless `dimensions` is None or within 1 and the full dimension."""
        if dimensions is not None and not 1 <= dimensions <= self.contract.dim:
            raise InputError(
                f"dimensions is {dimensions}; this model gives 1 to {self.contract.dim}.",
                cure=f"Choose one it was trained for: {', '.join(map(str, self.contract.trained_dims))}.",
            )

    def close(self) -> None:
        """Free the engine."""
        self.loaded.engine.close()

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= self.limits.max_items:
            raise InputError(
                f"the request has {count} items; it may have 1 to {self.limits.max_items}.",
                cure="Send at least one text." if count < 1 else "Split the request.",
            )

    def check_tokens(self, items: list[TokenizedText]) -> list[TokenizedText]:
        """Return `items` if the engine takes their lengths and the limits their sum. Raises InputError."""
        longest = self.loaded.engine.max_tokens
        for index, item in enumerate(items):
            if longest is not None and len(item.ids) > longest:
                raise InputError(
                    f"item {index} has {len(item.ids)} tokens; the engine {self.loaded.engine.name} was built for at "
                    f"most {longest}.",
                    cure="Shorten the text, or build the engine with a longer profile.",
                )
        total = sum(len(item.ids) for item in items)
        if total > self.limits.max_request_tokens:
            raise InputError(
                f"the request has {total} tokens; the limit is {self.limits.max_request_tokens}.",
                cure="Split the request.",
            )
        return items


def not_finite(engine: str, item: int, tokens: int) -> EngineError:
    """Return the error for an item whose vector holds NaN or infinity."""
    return EngineError(
        f"{engine} gave a vector that is not finite for item {item} ({tokens} tokens).",
        cure="Run f2rt parity on the bundle with this text.",
    )


def finish(vectors: NDArray[np.float32], dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Cut to the first `dimensions` values, then scale each row to unit length (Matryoshka: cut, *then* normalize).

    The full vector is left as the engine gave it: its length is 1 already.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    if not normalize:
        return np.ascontiguousarray(cut)
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    # A cut of all zeros has no direction: it stays zero.
    unit: NDArray[np.float32] = (cut / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit


def open_embedder(
    bundle: Bundle,
    engine: str = "auto",
    settings: EngineSettings = EngineSettings(),
    limits: Limits = Limits(),
    gate: Gate = Gate(),
) -> Embedder:
    """Open, prove and wrap an engine of a bundle. Raises what `load_engine` raises."""
    return Embedder(bundle, load_engine(bundle, engine, settings, gate), limits)
