"""What tests of the HTTP port share: clients, raw connections, and reading of answers and refusals."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.serving import START_S
from tests.serving_in_process import InProcess

TEXTS = [
    "Where is the library?",
    "La bibliothèque est fermée le lundi.",
    "图书馆在哪里？",
    "",
    "NUL \x00 inside",
    "👩‍🔬",
]
JSON = {"content-type": "application/json"}
KEY, OTHER = "0123456789abcdef-first", "fedcba9876543210-second"


def client_of(server: InProcess, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=f"http://{server.http}", timeout=START_S, trust_env=False, **options)


def vectors_of(answer: httpx.Response) -> NDArray[np.float32]:
    """Return float32 [n, dim] of an answer, in whatever encoding it is."""
    assert answer.status_code == 200, answer.text
    rows = []
    for number, row in enumerate(answer.json()["data"]):
        assert (row["index"], row["object"]) == (number, "embedding")
        given = row["embedding"]
        rows.append(
            np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given, np.float32)
        )
    return np.stack(rows)


def refused(answer: httpx.Response, status: int, words: str = "") -> dict[str, Any]:
    """Check a refusal, and return its error as OpenAI's clients read it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )
    assert len(body["error"]["message"]) < 1000
    assert re.search(words, body["error"]["message"]), body["error"]["message"]
    return dict(body["error"])


@contextlib.contextmanager
def talk(server: InProcess) -> Iterator[socket.socket]:
    host, _, port = server.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=START_S) as peer:
        yield peer


@contextlib.contextmanager
def sending(threads: int = 4) -> Iterator[Callable[[Callable[[], httpx.Response]], Future[httpx.Response]]]:
    """Give what sends requests from other threads."""
    with ThreadPoolExecutor(threads) as pool:
        yield pool.submit
