"""Texts to vectors for a comparison: by an engine of a bundle here, or by a server from outside.

Texts are embedded as a caller would have it done: with the prompt they name, with the checkpoint's default prompt where
they name none, cut at the end where they are too long. Both ways give float32 unit vectors [texts, dim] in the order of
the texts, and each text's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.texts import Text
from export.own_texts import missing_prompts
from runtime.embedder import Embedder
from runtime.errors import EngineError, InputError, OverloadedError
from runtime.tokenizer import Instruction, Truncate

if TYPE_CHECKING:
    from runtime.client import EmbeddingClient
    from runtime.client_answers import EmbedAnswer, ServerInfo

Progress = Callable[[int, int], None]

_CHUNK_TEXTS = 64
_CHUNK_CHARS = 1_000_000
_TIMEOUT_S = 600.0
_TRIES = 5


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 [texts, dim] and token counts in the order of the texts.

    `without_prompt` counts the texts whose prompt there is none of, by its name: they were embedded without any.
    `fingerprints` are those of the engines that answered: one, unless a server changed its engine meanwhile.
    """

    vectors: NDArray[np.float32]
    tokens: list[int]
    without_prompt: dict[str, int]
    fingerprints: list[str]


def embed_here(embedder: Embedder, texts: Sequence[Text], progress: Progress) -> Embedded:
    """Embed texts with an engine of this machine. Raises InputError for one longer than it takes, EngineError."""
    prompts, longest = embedder.contract.prompts, embedder.loaded.engine.max_tokens
    vectors = np.empty((len(texts), embedder.contract.dim), np.float32)
    tokens = [0] * len(texts)
    done = 0
    for rows in _chunks(texts, _CHUNK_TEXTS):
        progress(done, len(texts))
        instruction = _instruction(texts[rows[0]].prompt, prompts)
        items = embedder.encode([texts[row].text for row in rows], instruction, Truncate.END)
        for row, item in zip(rows, items, strict=True):
            tokens[row] = len(item.ids)
            if longest is not None and len(item.ids) > longest:
                raise InputError(
                    f"the text {texts[row].id!r} has {len(item.ids)} tokens; the engine {embedder.loaded.engine.name} "
                    f"was built for at most {longest}.",
                    cure="Leave it out of --texts, or build the engine with a longer profile.",
                )
        vectors[rows] = embedder.infer(items)
        done += len(rows)
    progress(done, len(texts))
    return Embedded(vectors, tokens, missing_prompts(texts, prompts), [embedder.fingerprint])


def embed_there(
    client: EmbeddingClient, info: ServerInfo, texts: Sequence[Text], progress: Progress, *, model: str = ""
) -> Embedded:
    """Embed texts through a server. Raises what its client raises, EngineError for vectors that cannot be meant."""
    vectors: NDArray[np.float32] | None = None
    tokens = [0] * len(texts)
    fingerprints: list[str] = []
    done = 0
    most = max(min(_CHUNK_TEXTS, info.max_items, info.max_request_tokens // max(info.max_tokens, 1)), 1)
    for rows in _chunks(texts, most):
        progress(done, len(texts))
        instruction = _instruction(texts[rows[0]].prompt, info.prompts)
        answer = ask(client, [texts[row].text for row in rows], instruction, model=model)
        if vectors is None:
            vectors = np.empty((len(texts), answer.vectors.shape[1]), np.float32)
        if answer.vectors.shape != (len(rows), vectors.shape[1]):
            raise EngineError(
                f"the server gave vectors of shape {answer.vectors.shape} for {len(rows)} texts after others of "
                f"{vectors.shape[1]} dimensions.",
                cure="Something between here and the server changes its answers, or it serves several models.",
            )
        bad = np.flatnonzero(~np.isfinite(answer.vectors).all(axis=1))
        if len(bad):
            raise EngineError(
                f"the server gave a vector that is not finite for the text {texts[rows[int(bad[0])]].id!r}.",
                cure="Run f2rt parity on its bundle.",
            )
        vectors[rows] = answer.vectors
        for row, item in zip(rows, answer.items, strict=True):
            tokens[row] = item.tokens
        if answer.fingerprint not in fingerprints:
            fingerprints.append(answer.fingerprint)
        done += len(rows)
    progress(done, len(texts))
    assert vectors is not None
    return Embedded(vectors, tokens, missing_prompts(texts, info.prompts), fingerprints)


def ask(client: EmbeddingClient, texts: Sequence[str], instruction: Instruction, *, model: str = "") -> EmbedAnswer:
    """Send one request, and again when the server says that it is full. Raises what the client raises."""
    for left in reversed(range(_TRIES)):
        try:
            return client.embed(
                texts,
                prompt_name=instruction.prompt_name,
                prompt=instruction.prompt,
                truncate=Truncate.END,
                model=model,
                timeout_s=_TIMEOUT_S,
            )
        except OverloadedError as error:
            if not left:
                raise
            time.sleep(error.retry_after_s)
    raise AssertionError("unreachable")


def _instruction(prompt: str | None, prompts: Collection[str]) -> Instruction:
    """Return what a text's prompt means where these prompts are known; no prompt at all for an unknown one."""
    return Instruction(prompt_name=prompt) if prompt is None or prompt in prompts else Instruction(prompt="")


def _chunks(texts: Sequence[Text], most: int) -> Iterator[list[int]]:
    """Yield the places of all texts, those of one prompt and of similar length together: the same for every engine."""
    order = sorted(range(len(texts)), key=lambda i: (texts[i].prompt or "", len(texts[i].text), i))
    chunk: list[int] = []
    chars = 0
    for place in order:
        size = len(texts[place].text)
        other = bool(chunk) and texts[chunk[0]].prompt != texts[place].prompt
        if chunk and (other or len(chunk) >= most or chars + size > _CHUNK_CHARS):
            yield chunk
            chunk, chars = [], 0
        chunk.append(place)
        chars += size
    if chunk:
        yield chunk
