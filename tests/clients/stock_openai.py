"""Talks to /v1 with the stock openai client, sync and async; prints what it got as JSON. Arguments: URL URL_FULL KEY.

At URL_FULL one request may be in the works, and a large one is kept there while others are refused.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import openai

TEXTS = ["Where is the library?", "图书馆在哪里？", "", "a NUL \x00 inside"]


def plain(answer: Any) -> Any:
    """Return an answer's parts."""
    return {
        "vectors": [row.embedding for row in answer.data],
        "index": [row.index for row in answer.data],
        "model": answer.model,
        "tokens": [answer.usage.prompt_tokens, answer.usage.total_tokens],
        "fingerprint": answer.fingerprint,
    }


def refusal(call: Callable[[], Any]) -> Any:
    """Return how a call was refused."""
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "kind": type(error).__name__,
            "status": error.status_code,
            "message": error.message,
            "type": error.type,
            "code": error.code,
            "retry_after": error.response.headers.get("retry-after"),
        }
    return {"kind": "", "message": "it was not refused"}


def synchronous(url: str, key: str, ids: list[int]) -> dict[str, Any]:
    """Use everything once."""
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    stranger = openai.OpenAI(base_url=url, api_key="this-key-is-not-known", max_retries=0)

    def create(given: Any = "one", model: str = "mini", **more: Any) -> Any:
        return client.embeddings.create(input=given, model=model, **more)

    def extra(**fields: Any) -> Any:
        return plain(create(extra_body=fields))

    return {
        "default": plain(create(TEXTS)),
        "float": plain(create(TEXTS, encoding_format="float")),
        "text": plain(create("one")),
        "texts": plain(create(["one"])),
        "ids": plain(create(ids)),
        "rows": plain(create([ids, ids])),
        "dimensions": plain(create(dimensions=64)),
        "user": plain(create(user="somebody")),
        "query": extra(prompt_name="query"),
        "input_type": extra(input_type="query"),
        "prompt": extra(prompt="Say: "),
        "unnormalized": extra(normalize=False, dimensions=64),
        "truncated": plain(create("many words " * 3000, extra_body={"truncate": "end"})),
        "listed": [model.id for model in client.models.list()],
        "retrieved": client.models.retrieve("mini").id,
        "refusals": {
            "key": refusal(lambda: stranger.embeddings.create(input="a", model="mini")),
            "key_of_models": refusal(lambda: stranger.models.list()),
            "model": refusal(lambda: create(model="text-embedding-3-small")),
            "retrieved": refusal(lambda: client.models.retrieve("other")),
            "dimensions": refusal(lambda: create(dimensions=4096)),
            "empty": refusal(lambda: create([])),
            "too_long": refusal(lambda: create("many words " * 3000, extra_body={"truncate": "error"})),
            "unknown_field": refusal(lambda: create(extra_body={"prompt_nam": "query"})),
            "foreign_ids": refusal(lambda: create([[9906, 11, 1917]])),
        },
    }


async def asynchronous(url: str, key: str) -> dict[str, Any]:
    """Use the async client, several calls at a time."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        answers = await asyncio.gather(
            *(client.embeddings.create(input=text, model="mini") for text in TEXTS),
            client.embeddings.create(input=TEXTS, model="mini", encoding_format="float"),
        )
        try:
            await client.embeddings.create(input="a", model="other")
            kind = ""
        except openai.NotFoundError as error:
            kind = type(error).__name__
        return {"answers": [plain(answer) for answer in answers], "refused": kind}


def overload(url: str, key: str) -> Any:
    """Keep the server busy with large requests until one beside them is refused, and return how."""
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    large = ["many words " * 300] * 64
    over = threading.Event()

    def keep_busy() -> None:
        while not over.is_set():
            try:
                client.embeddings.create(input=large, model="mini")
            except openai.RateLimitError:
                over.wait(0.001)

    threads = [threading.Thread(target=keep_busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    found: Any = {"kind": ""}
    for _ in range(10_000):
        found = refusal(lambda: client.embeddings.create(input="a", model="mini"))
        if found["kind"]:
            break
    over.set()
    for thread in threads:
        thread.join()
    # With the client's own retries the same call gets through.
    patient = openai.OpenAI(base_url=url, api_key=key, max_retries=5)
    return {"refused": found, "after": plain(patient.embeddings.create(input="one", model="mini"))}


def main(url: str, full: str, key: str, ids: str) -> dict[str, Any]:
    """Do all of it."""
    return {
        **synchronous(url, key, json.loads(ids)),
        "async": asyncio.run(asynchronous(url, key)),
        "overload": overload(full, key),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
