"""Talks KServe v2 with the stock tritonclient; prints what it got as JSON. Arguments: ADDRESS ADDRESS_WITH_KEYS KEY."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

TEXTS = ["Where is the library?", "图书馆在哪里？", "", "a NUL \x00 inside"]


def infer(client: Any, texts: list[str], shape: tuple[int, ...], **more: Any) -> Any:
    """Return the vectors of `texts`, sent as BYTES of a shape."""
    tensor = triton.InferInput(more.pop("name", "text"), list(shape), "BYTES")
    tensor.set_data_from_numpy(np.array([t.encode() for t in texts], dtype=np.object_).reshape(shape))
    answer = client.infer(more.pop("model", "mini"), [tensor], **more)
    found = answer.as_numpy("embedding")
    return {"dtype": str(found.dtype), "vectors": found.tolist(), "id": answer.get_response().id}


def refusal(call: Callable[[], Any]) -> Any:
    """Return how a call was refused."""
    try:
        call()
    except InferenceServerException as error:
        return {"status": str(error.status()), "message": error.message()}
    return {"status": "", "message": "it was not refused"}


def described(descriptor: Any) -> dict[str, Any]:
    """Return every message's fields by name, as the wire sees them."""
    found: dict[str, Any] = {}

    def walk(message: Any) -> None:
        found[message.full_name] = {
            f.name: [f.number, f.type, f.is_repeated, f.message_type.full_name if f.message_type else None]
            for f in message.fields
        }
        for nested in message.nested_types:
            walk(nested)

    for message in descriptor.message_types_by_name.values():
        walk(message)
    return found


def main(address: str, closed: str, key: str) -> dict[str, Any]:
    """Use everything once."""
    client = triton.InferenceServerClient(address)
    guarded = triton.InferenceServerClient(closed)
    one, n = ["one"], len(TEXTS)
    uint = triton.InferInput("text", [1], "UINT8")
    uint.set_data_from_numpy(np.zeros(1, np.uint8))
    wrong = {"authorization": "Bearer this-key-is-not-known"}
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("mini"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("mini", as_json=True),
        "column": infer(client, TEXTS, (n, 1), request_id="mine"),
        "row": infer(client, TEXTS, (n,), outputs=[triton.InferRequestedOutput("embedding")]),
        "query": infer(client, one, (1, 1), parameters={"input_type": "query"}),
        "passage": infer(client, one, (1, 1), parameters={"input_type": "passage", "dimensions": 64}),
        "long": infer(client, ["many words " * 3000], (1, 1), parameters={"truncate": "END"}),
        "in_time": infer(client, one, (1, 1), client_timeout=30.0),
        "with_key": infer(guarded, one, (1, 1), headers={"authorization": f"Bearer {key}"}),
        "keyless_health": [guarded.is_server_live(), guarded.is_server_ready(), guarded.is_model_ready("mini")],
        "refusals": {
            "model": refusal(lambda: infer(client, one, (1, 1), model="other")),
            "model_ready": refusal(lambda: client.is_model_ready("other")),
            "version": refusal(lambda: infer(client, one, (1, 1), model_version="7")),
            "parameter": refusal(lambda: infer(client, one, (1, 1), parameters={"dimension": 64})),
            "dimensions": refusal(lambda: infer(client, one, (1, 1), parameters={"dimensions": 4096})),
            "input_type": refusal(lambda: infer(client, one, (1, 1), parameters={"input_type": "poem"})),
            "too_long": refusal(lambda: infer(client, ["many words " * 3000], (1, 1), parameters={"truncate": "NONE"})),
            "input": refusal(lambda: infer(client, one, (1, 1), name="texts")),
            "shape": refusal(lambda: infer(client, TEXTS, (2, 2))),
            "type": refusal(lambda: client.infer("mini", [uint])),
            "output": refusal(lambda: infer(client, one, (1, 1), outputs=[triton.InferRequestedOutput("embeddings")])),
            "timeout": refusal(lambda: infer(client, TEXTS * 64, (64 * n, 1), client_timeout=1e-4)),
            "no_key": refusal(lambda: infer(guarded, one, (1, 1))),
            "wrong_key": refusal(lambda: infer(guarded, one, (1, 1), headers=wrong)),
        },
        "messages": described(service_pb2.DESCRIPTOR),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
