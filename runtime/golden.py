"""The golden check: an engine answers only after it has reproduced PyTorch's vectors, here and now.

golden.npz holds, without pickles: the texts, prompts included, as UTF-8 (`text_bytes` uint8, `text_offsets` int64
[texts + 1]), `token_ids` int32 [texts, longest] right-padded with -1, `lengths` int64 [texts], and `embeddings` float32
[texts, dim] from PyTorch.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.batch import make_batch
from runtime.bundle import GOLDEN, Bundle, check_hash
from runtime.engines import Engine
from runtime.errors import BundleError, UnverifiedError
from runtime.tokenizer import Instruction, TextTokenizer
from runtime.tolerances import Tolerance

# Of any script, and short: an engine may have been built for short texts alone.
_STAND_IN_TEXTS = [
    "a",
    "Where is the library?",
    "La bibliothèque est fermée le lundi.",
    "图书馆在哪里？",
    "x = a[0] + 1",
]


@dataclass(frozen=True)
class Golden:
    """The golden texts with their prompts, their ids and PyTorch's float32 unit vectors [texts, dim].

    A `stand_in` has the engine's own vectors instead of PyTorch's: what is compared with it can only stay as it was.
    """

    texts: list[str]
    ids: list[list[int]]
    embeddings: NDArray[np.float32]
    stand_in: bool = False

    @property
    def origin(self) -> str:
        """Whose vectors these are, in words."""
        return "its own first vectors" if self.stand_in else "PyTorch"


def pack(golden: Golden) -> bytes:
    """Return the bytes of golden.npz."""
    lengths = np.array([len(i) for i in golden.ids], np.int64)
    token_ids = np.full((len(golden.ids), int(lengths.max())), -1, np.int32)
    for row, ids in enumerate(golden.ids):
        token_ids[row, : len(ids)] = ids
    # numpy strips trailing NULs from unicode arrays, so the texts travel as UTF-8 with offsets.
    blobs = [t.encode() for t in golden.texts]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        text_bytes=np.frombuffer(b"".join(blobs), np.uint8),
        text_offsets=np.cumsum([0, *map(len, blobs)]),
        token_ids=token_ids,
        lengths=lengths,
        embeddings=golden.embeddings.astype(np.float32),
    )
    return buffer.getvalue()


def load(bundle: Bundle) -> Golden:
    """Read golden.npz. Raises UnverifiedError when the bundle has none, BundleError when it is damaged."""
    record = bundle.manifest.golden
    if record is None:
        raise UnverifiedError(
            f"the bundle {bundle.folder} holds no {GOLDEN}: its engines were never compared with PyTorch.",
            cure=f"Run: f2rt parity {bundle.folder}",
        )
    check_hash(bundle, record)
    try:
        # Given a path, numpy leaves it open when the archive is damaged.
        with bundle.path(record.file).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            blob, offsets = arrays["text_bytes"].tobytes(), arrays["text_offsets"]
            ids = [row[:n].tolist() for row, n in zip(arrays["token_ids"], arrays["lengths"], strict=True)]
            texts = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
            return Golden(texts, ids, arrays["embeddings"])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{bundle.path(record.file)} cannot be read: {error}.", cure=f"Run: f2rt parity {bundle.folder}"
        ) from error


def check_tokenizer(tokenizer: TextTokenizer, golden: Golden) -> None:
    """Compare the tokenizer's ids with PyTorch's. Raises UnverifiedError naming the first text that differs."""
    for text, expected in zip(golden.texts, golden.ids, strict=True):
        found = tokenizer.encode([text], Instruction(prompt=""))[0].ids
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            raise UnverifiedError(
                f"the tokenizer gives {len(found)} ids for the golden text {text[:40]!r}, PyTorch's gives "
                f"{len(expected)}; they differ from position {at}.",
                cure="Export the checkpoint again.",
            )


def stand_in(engine: Engine, tokenizer: TextTokenizer, pad_id: int) -> Golden:
    """Make golden vectors from the engine itself, for a bundle that has none: each text run alone.

    Raises EngineError.
    """
    items = tokenizer.encode(_STAND_IN_TEXTS, Instruction(prompt=""))
    fitting = [i for i, item in enumerate(items) if engine.max_tokens is None or len(item.ids) <= engine.max_tokens]
    ids = [items[i].ids for i in fitting]
    vectors = [engine.run(make_batch([one], pad_id)) for one in ids]
    return Golden([_STAND_IN_TEXTS[i] for i in fitting], ids, np.concatenate(vectors), stand_in=True)


def check_engine(engine: Engine, golden: Golden, pad_id: int, limits: Tolerance) -> float:
    """Run the golden texts through the engine in one padded batch and compare each row with PyTorch.

    Returns the smallest cosine. Raises UnverifiedError naming the worst text, its cosine and the limit.
    """
    return compare(engine, engine.run(make_batch(golden.ids, pad_id)), golden, limits)


def compare(engine: Engine, vectors: NDArray[np.float32], golden: Golden, limits: Tolerance) -> float:
    """Compare an engine's vectors for the golden texts, row by row. Returns and raises as `check_engine` does."""
    limit = limits.min_cosine
    if vectors.shape != golden.embeddings.shape:
        raise UnverifiedError(
            f"{engine.name} gives vectors of shape {vectors.shape} for the golden texts, PyTorch gave "
            f"{golden.embeddings.shape}.",
            cure="The engine does not belong to this bundle. Export the checkpoint again.",
        )
    cosines = row_cosines(vectors, golden.embeddings)
    worst = int(np.argmin(cosines))
    # A cosine does not see a vector's length, and the contract is unit length.
    norm_error = float(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max())
    if cosines[worst] >= limit and not norm_error <= limits.norm_error:
        raise UnverifiedError(
            f"{engine.name} gives a golden vector whose length is off by {norm_error:.1e}, the limit for "
            f"{engine.precision} is {limits.norm_error}.",
            cure="It must not answer. Run f2rt parity on the bundle to see why.",
        )
    if not cosines[worst] >= limit:
        raise UnverifiedError(
            f"{engine.name} does not reproduce {golden.origin}: cosine {cosines[worst]:.6f} on the golden text "
            f"{golden.texts[worst][:40]!r}, the limit for {engine.precision} is {limit}.",
            cure="It must not answer. Run f2rt parity on the bundle to see why.",
        )
    return float(cosines[worst])


def row_cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each pair of rows, float64 [rows]; a row that is not finite or zero counts as -1."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosines = (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    result: NDArray[np.float64] = np.where(np.isfinite(cosines), cosines, -1.0)
    return result
