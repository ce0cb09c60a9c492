"""Messages of f2rt.v1 as tests write, read and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.wire.f2rt_v1 import SERVICE_NAME

EMBED = f"/{SERVICE_NAME}/Embed"


def texts_request(texts: Sequence[str], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(texts=texts), **fields)


def ids_request(*rows: Sequence[int], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(token_ids=[pb.TokenIds(ids=row) for row in rows], **fields))


def vectors_of(answer: pb.EmbedResponse) -> np.ndarray[Any, Any]:
    return np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Whether vectors are equal up to rounding: how texts share batches follows what batches cost."""
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-6)
