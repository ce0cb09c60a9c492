"""KServe v2 on the wire: tensors in and out, parameters, and every row of the status table, in this process.

Stock clients have their own tests; these reach what they would not send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime._pb.inference import grpc_service_pb2 as pb
from runtime.embedder import Embedder
from runtime.errors import EngineError
from runtime.settings import SchedulingSettings
from tests.kserve_messages import request, stub_of, with_parameters
from tests.serving import START_S, TEXTS, failure
from tests.serving_in_process import HeldEngine, InProcess, held, wait_until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def stub(embedder: Embedder) -> Iterator[Any]:
    _, own = held(embedder, permits=100_000)
    with InProcess(own) as server, server.channel() as channel:
        yield stub_of(channel)


def vectors_of(answer: pb.ModelInferResponse) -> np.ndarray[Any, Any]:
    (output,) = answer.outputs
    assert (output.name, output.datatype) == ("embedding", "FP32")
    return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(tuple(output.shape))


@pytest.mark.parametrize("raw", [True, False])
def test_vectors_are_the_embedders(stub: Any, embedder: Embedder, raw: bool) -> None:
    answer = stub.ModelInfer(request(TEXTS, raw=raw, id="abc"))
    assert np.allclose(vectors_of(answer), embedder.embed(TEXTS).vectors, atol=1e-6)
    assert (answer.id, answer.model_name, answer.model_version) == ("abc", "mini", "1")
    assert answer.parameters["fingerprint"].string_param == embedder.fingerprint
    tokens = sum(len(item.ids) for item in embedder.embed(TEXTS).items)
    assert answer.parameters["tokens"].int64_param == tokens
    assert answer.parameters["truncated"].int64_param == 0


def test_a_million_characters_are_cut_and_the_answer_says_so(stub: Any, embedder: Embedder) -> None:
    texts = ["long " * 200_000, "short"]
    answer = stub.ModelInfer(request(texts))
    assert np.allclose(vectors_of(answer), embedder.embed(texts).vectors, atol=1e-6)
    assert answer.parameters["truncated"].int64_param == 1


@pytest.mark.parametrize(
    ("parameters", "same_as"),
    [
        ({"input_type": "query"}, {"prompt_name": "query"}),
        ({"input_type": "passage"}, {"prompt_name": "document"}),
        ({"prompt_name": "query", "dimensions": 64}, {"prompt_name": "query", "dimensions": 64}),
        ({"prompt": "Instruct: x\nQuery: ", "dimensions": "32"}, {"prompt": "Instruct: x\nQuery: ", "dimensions": 32}),
        ({"dimensions": 100, "normalize": False}, {"dimensions": 100, "normalize": False}),
        ({"truncate": "end"}, {}),
        ({"timeout": 30_000_000}, {}),
        ({"timeout": 2**63 - 1}, {}),
    ],
)
def test_parameters(stub: Any, embedder: Embedder, parameters: dict[str, Any], same_as: dict[str, Any]) -> None:
    answer = stub.ModelInfer(with_parameters(request(TEXTS[:3]), **parameters))
    assert np.allclose(vectors_of(answer), embedder.embed(TEXTS[:3], **same_as).vectors, atol=1e-6)


def test_live_ready_and_metadata(stub: Any, embedder: Embedder) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="mini", version="1")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "f2rt"
    model = stub.ModelMetadata(pb.ModelMetadataRequest(name="mini"))
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("text", "BYTES", [-1, 1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [
        ("embedding", "FP32", [-1, embedder.contract.dim])
    ]


def test_while_the_golden_check_fails_nothing_is_ready_nor_answered(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=10**6)
    with InProcess(own, golden_period_s=0.02) as server, server.channel() as channel:
        stub = stub_of(channel)

        def ready() -> tuple[bool, bool]:
            model = stub.ModelReady(pb.ModelReadyRequest(name="mini"))
            return stub.ServerReady(pb.ServerReadyRequest()).ready, model.ready

        assert ready() == (True, True)
        engine.turn = 0.5
        wait_until(lambda: server.model.state == "failing")
        assert ready() == (False, False)
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        error = failure(lambda: stub.ModelInfer(request(["a"]), timeout=START_S))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "mini does not answer" in error.details()
        engine.turn = 0.0
        wait_until(lambda: server.model.state == "ready")
        assert ready() == (True, True)
        assert np.allclose(vectors_of(stub.ModelInfer(request(["a"]))), embedder.embed(["a"]).vectors, atol=1e-6)


def _changed(change: Callable[[pb.ModelInferRequest], Any], *texts: str) -> pb.ModelInferRequest:
    message = request(texts or ["a"])
    change(message)
    return message


WRONG: dict[str, tuple[Callable[[], pb.ModelInferRequest], str]] = {
    "no input": (lambda: pb.ModelInferRequest(model_name="mini"), "the inputs are none"),
    "another input": (lambda: _changed(lambda m: setattr(m.inputs[0], "name", "x")), "the inputs are 'x'"),
    "two inputs": (lambda: _changed(lambda m: m.inputs.add(name="y")), "the inputs are 'text', 'y'"),
    "datatype": (lambda: _changed(lambda m: setattr(m.inputs[0], "datatype", "FP32")), "is FP32 of shape [1, 1]"),
    "shape": (lambda: _changed(lambda m: m.inputs[0].shape.append(1)), "of shape [1, 1, 1]"),
    "wide": (lambda: _changed(lambda m: m.inputs[0].shape.__setitem__(1, 2)), "of shape [1, 2]"),
    "count": (lambda: _changed(lambda m: m.inputs[0].shape.__setitem__(0, 7)), "and there are 1 texts"),
    "negative": (lambda: _changed(lambda m: m.inputs[0].shape.__setitem__(0, -1)), "and there are 1 texts"),
    "two raw": (lambda: _changed(lambda m: m.raw_input_contents.append(b"")), "there are 2 raw inputs"),
    "cut": (
        lambda: _changed(lambda m: m.raw_input_contents.__setitem__(0, b"\x09\x00\x00\x00abc")),
        "ends in the middle of an element",
    ),
    "cut length": (lambda: _changed(lambda m: m.raw_input_contents.__setitem__(0, b"\x09")), "in the middle"),
    "no UTF-8": (lambda: request([b"ok", b"\xff"]), "not UTF-8 at byte 0"),
    "empty": (lambda: request([]), "0 items"),
    "10,000 texts": (lambda: request(["a"] * 10_000), "10000 items; it may have 1 to 2048"),
    "a text too long": (lambda: request(["x" * 1_000_001]), "1000001 characters"),
    "another output": (lambda: _changed(lambda m: m.outputs.add(name="x")), "there is no output 'x'"),
    "misspelt": (lambda: with_parameters(request(["a"]), input_typ="query"), "there is no parameter 'input_typ'"),
    "input type": (lambda: with_parameters(request(["a"]), input_type="x"), "there is no input_type 'x'"),
    "truncate": (lambda: with_parameters(request(["a"]), truncate="MIDDLE"), "there is no truncate 'MIDDLE'"),
    "a word for a number": (lambda: with_parameters(request(["a"]), dimensions="many"), "dimensions is 'many'"),
    "a number for a word": (lambda: with_parameters(request(["a"]), prompt=3), "the parameter prompt is 3"),
    "dimensions": (lambda: with_parameters(request(["a"]), dimensions=257), "dimensions is 257"),
    "two prompts": (lambda: with_parameters(request(["a"]), input_type="query", prompt="x"), "both given"),
    "too long": (lambda: with_parameters(request(["word " * 2000]), truncate="NONE"), "the limit is 1024"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_request_says_what_is_wrong(stub: Any, case: str) -> None:
    make, message = WRONG[case]
    error = failure(lambda: stub.ModelInfer(make(), timeout=START_S))
    assert error.code() is INVALID, error.details()
    assert message in error.details()


# --- every row of the status table


def _nothing(server: InProcess, engine: HeldEngine) -> None:
    engine.allow(1000)


def _on_fire(server: InProcess, engine: HeldEngine) -> None:
    engine.allow(1000)
    engine.fault = EngineError("the engine is on fire.", cure="Put it out.")


def _draining(server: InProcess, engine: HeldEngine) -> None:
    server.run(_drain(server))


async def _drain(server: InProcess) -> None:
    server.models.drain()


def _full(server: InProcess, engine: HeldEngine) -> object:
    channel = server.channel()
    one = stub_of(channel)
    calls = [one.ModelInfer.future(request(["first"]))]
    engine.wait_begun(1)
    calls.append(one.ModelInfer.future(request(["second"])))
    wait_until(lambda: server.model.pipeline.waiting[0] == 1)
    return [channel, *calls]


ROWS: dict[str, tuple[Callable[[InProcess, HeldEngine], object], dict[str, Any], grpc.StatusCode, str]] = {
    "invalid": (_nothing, {"texts": []}, INVALID, "0 items"),
    "no model": (_nothing, {"model": "nope"}, grpc.StatusCode.NOT_FOUND, "there is no model 'nope'"),
    "no version": (_nothing, {"model_version": "7"}, grpc.StatusCode.NOT_FOUND, "there is no version '7'"),
    "no key": (_nothing, {}, grpc.StatusCode.UNAUTHENTICATED, "no API key"),
    "full": (_full, {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "requests are waiting"),
    "late": (lambda s, e: None, {"timeout_us": 200_000}, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline passed"),
    "draining": (_draining, {}, grpc.StatusCode.UNAVAILABLE, "shutting down"),
    "engine": (_on_fire, {}, grpc.StatusCode.INTERNAL, "on fire"),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_every_row_of_the_status_table(embedder: Embedder, tmp_path: Path, row: str) -> None:
    prepare, asked, status, message = ROWS[row]
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length")
    settings: dict[str, Any] = {"keys_file": str(keys)} if row == "no key" else {}
    settings["scheduling"] = SchedulingSettings(max_waiting_requests=1, max_wait_ms=1e9)
    engine, own = held(embedder)
    with InProcess(own, **settings) as server, server.channel() as channel:
        stub = stub_of(channel)
        kept = prepare(server, engine)  # noqa: F841  (calls that are let go are cancelled)
        fields = {"texts": ["a"], **asked}
        timeout_us = fields.pop("timeout_us", None)
        message_out = request(fields.pop("texts"), **fields)
        if timeout_us:
            # Triton's own parameter: the server keeps it, whatever the call's deadline is.
            with_parameters(message_out, timeout=timeout_us)
            busy = stub.ModelInfer.future(request(["first"]))
            engine.wait_begun(1)
            late = stub.ModelInfer.future(message_out)
            wait_until(lambda: server.model.pipeline.waiting[0] == 1)
            error = failure(lambda: late.result(START_S))  # while the engine is still held
            engine.allow(10)
            busy.result()
            assert len(engine.begun) == 1  # and it is never computed
        else:
            error = failure(lambda: stub.ModelInfer(message_out, timeout=START_S))
        assert error.code() is status, error.details()
        assert message in error.details()
