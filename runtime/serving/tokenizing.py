"""How requests' texts become token ids: a part at a time, and few long ones at once, so that short ones pass by."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from runtime.cost import Density
from runtime.embedder import Embedder
from runtime.serving.call import EmbedCall
from runtime.serving.job import Job
from runtime.tokenizer import Instruction, TokenizedText, Truncate

_CHUNK_CHARS = 32_768  # tokenized at a time: a long request does not keep a worker from short ones
_CHUNK_TEXTS = 64
_LONG_AT_A_TIME = 2  # texts of more than a chunk: while a million characters are tokenized they take 200 MiB


class Tokenizing:
    """One embedder's tokenizer for many threads. Remembers how many tokens texts of a size have had."""

    def __init__(self, embedder: Embedder, truncate: Truncate) -> None:
        """`truncate` is for requests that do not say."""
        self._embedder = embedder
        self._truncate = truncate
        self._density = Density()
        self._long = threading.Semaphore(_LONG_AT_A_TIME)

    def foresee(self, call: EmbedCall) -> int:
        """Return about how many tokens a request's texts will have, from their bytes, or how many ids it has.

        Raises InputError, NotFoundError for an instruction that the contract does not have.
        """
        if not call.texts:
            return sum(map(len, call.token_ids))
        prompt = self._embedder.loaded.tokenizer.prompt_text(call.instruction)
        return self._density.tokens(prompt, call.texts, self._embedder.contract.max_tokens)

    def is_long(self, call: EmbedCall) -> bool:
        """Whether a request takes so long to tokenize that short ones should not wait for it."""
        return sum(map(len, call.texts)) > _CHUNK_CHARS

    def take_part(self, job: Job) -> bool:
        """Tokenize the next part of a request, or take its token ids as they are; returns whether that was all.

        Raises InputError, NotFoundError.
        """
        call, embedder = job.call, self._embedder
        if call.token_ids:
            job.items = embedder.verbatim(call.token_ids)
            return True
        first = len(job.items)
        if not first:
            embedder.check_texts(call.texts, call.instruction)
        texts = _part(call.texts, first)
        job.items += self._encode(texts, call.instruction, call.truncate, first)
        if len(job.items) < len(call.texts):
            return False
        embedder.check_tokens(job.items)
        prompt = embedder.loaded.tokenizer.prompt_text(call.instruction)
        self._density.observe(prompt, texts, sum(item.original_tokens for item in job.items[first:]))
        return True

    def tokenize(
        self, texts: Sequence[str], instruction: Instruction, truncate: Truncate | None
    ) -> list[TokenizedText]:
        """Tokenize texts as a request's are, and no more. Raises InputError, NotFoundError."""
        self._embedder.check_texts(texts, instruction)
        items: list[TokenizedText] = []
        while len(items) < len(texts):
            items += self._encode(_part(texts, len(items)), instruction, truncate, len(items))
        return self._embedder.check_tokens(items)

    def _encode(
        self, texts: Sequence[str], instruction: Instruction, truncate: Truncate | None, first: int
    ) -> list[TokenizedText]:
        is_long = sum(map(len, texts)) > _CHUNK_CHARS
        with self._long if is_long else contextlib.nullcontext():
            return self._embedder.encode(texts, instruction, truncate or self._truncate, first=first)


def _part(texts: Sequence[str], first: int) -> Sequence[str]:
    """Return the texts from `first` on that are tokenized at once: at least one."""
    chars = 0
    part = texts[first : first + _CHUNK_TEXTS]
    for count, text in enumerate(part):
        chars += len(text)
        if chars > _CHUNK_CHARS:
            return part[: max(count, 1)]
    return part
