"""Stock clients against a real server: tritonclient, openai, LangChain, LlamaIndex, and schemathesis as a hostile one.

They live in an environment of their own (`make clients`); each script in tests/clients uses one of them for everything
it has, and what it got is compared here.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime._pb.inference import grpc_service_pb2 as kserve
from runtime.bundle import Bundle
from runtime.embedder import Embedder
from tests.serving import ROOT, ServerProcess, child_environment

CLIENTS = ROOT / ".venv-clients"
TEXTS = ["Where is the library?", "图书馆在哪里？", "", "a NUL \x00 inside"]
KEY = "a-key-that-the-server-knows"
LIMIT_S = 120.0  # a bound, never a wait

pytestmark = pytest.mark.skipif(
    not (CLIENTS / "bin" / "python").exists(), reason="the stock clients are not installed: run make clients"
)


def run_client(program: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a program of the clients' environment, and return what it printed."""
    done = subprocess.run(
        [str(CLIENTS / "bin" / program), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=child_environment(env),
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def run_script(name: str, *arguments: str) -> Any:
    return json.loads(run_client("python", f"tests/clients/{name}.py", *arguments))


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[ServerProcess]:
    with ServerProcess(bundle.folder, http=True) as running:
        yield running
        assert running.process.poll() is None, "the server died:\n" + "\n".join(running.log)


@pytest.fixture(scope="module")
def closed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that asks for a key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"tests:{KEY}\n", encoding="utf-8")
    with ServerProcess(bundle.folder, "--keys-file", str(file), http=True) as running:
        yield running


def same(found: Any, expected: Any, *, exactly: bool = False) -> None:
    """Compare vectors. A text that shares a batch is equal up to the last bits."""
    found, expected = np.array(found, np.float32), np.array(expected, np.float32)
    assert found.shape == expected.shape
    worst = float(np.abs(found - expected).max())
    assert worst == 0 if exactly else worst < 2e-6, f"largest difference {worst}"


# --- Triton's client


@pytest.fixture(scope="module")
def triton(server: ServerProcess, closed: ServerProcess) -> Any:
    return run_script("stock_triton", server.address, closed.address, KEY)


def test_triton_health_and_metadata(triton: Any, embedder: Embedder) -> None:
    assert triton["live"] is triton["ready"] is triton["model_ready"] is True
    assert triton["keyless_health"] == [True, True, True]
    assert (triton["server"]["name"], triton["server"]["version"]) == ("f2rt", runtime.__version__)
    model = triton["model"]
    assert (model["name"], model["versions"]) == ("mini", ["1"])
    assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}]
    dim = str(embedder.contract.dim)
    assert model["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": ["-1", dim]}]


def test_triton_vectors(triton: Any, embedder: Embedder) -> None:
    expected = embedder.embed(TEXTS).vectors
    for shape in ("column", "row"):
        assert triton[shape]["dtype"] == "float32"
        same(triton[shape]["vectors"], expected)
    assert triton["column"]["id"] == "mine"
    same(triton["in_time"]["vectors"], embedder.embed(["one"]).vectors, exactly=True)
    same(triton["with_key"]["vectors"], embedder.embed(["one"]).vectors, exactly=True)


def test_triton_parameters(triton: Any, embedder: Embedder) -> None:
    same(triton["query"]["vectors"], embedder.embed(["one"], prompt_name="query").vectors, exactly=True)
    expected = embedder.embed(["one"], prompt_name="document", dimensions=64).vectors
    same(triton["passage"]["vectors"], expected, exactly=True)
    same(triton["long"]["vectors"], embedder.embed(["many words " * 3000]).vectors, exactly=True)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("model", "NOT_FOUND", "there is no model 'other'; this server has: mini"),
        ("model_ready", "NOT_FOUND", "there is no model 'other'"),
        ("version", "NOT_FOUND", "no version '7'"),
        ("parameter", "INVALID_ARGUMENT", "no parameter 'dimension'. Use one of: .*dimensions"),
        ("dimensions", "INVALID_ARGUMENT", "4096"),
        ("input_type", "INVALID_ARGUMENT", "no input_type 'poem'"),
        ("too_long", "INVALID_ARGUMENT", "tokens"),
        ("input", "INVALID_ARGUMENT", "'texts'.*Send one input, 'text'"),
        ("shape", "INVALID_ARGUMENT", r"shape \[2, 2\].*Send BYTES of shape \[n, 1\]"),
        ("type", "INVALID_ARGUMENT", "UINT8.*Send BYTES"),
        ("output", "INVALID_ARGUMENT", "no output 'embeddings'"),
        ("timeout", "DEADLINE_EXCEEDED", ""),
        ("no_key", "UNAUTHENTICATED", "no API key"),
        ("wrong_key", "UNAUTHENTICATED", "not known here"),
    ],
)
def test_triton_refusals(triton: Any, name: str, status: str, words: str) -> None:
    refused = triton["refusals"][name]
    assert refused["status"] == f"StatusCode.{status}", refused
    assert re.search(words, refused["message"]), refused


def test_every_refusal_of_triton_is_looked_at(triton: Any) -> None:
    rows = next(mark for mark in test_triton_refusals.pytestmark if mark.name == "parametrize").args[1]
    assert {row[0] for row in rows} == set(triton["refusals"])


def test_our_kserve_proto_is_tritons(triton: Any) -> None:
    """Every message and field of ours has the name, number, type and label that it has in the stock client."""
    theirs, compared = triton["messages"], 0

    def walk(message: Any) -> None:
        nonlocal compared
        for field in message.fields:
            kind = field.message_type.full_name if field.message_type else None
            ours = [field.number, field.type, field.is_repeated, kind]
            assert theirs[message.full_name][field.name] == ours, f"{message.full_name}.{field.name}"
            compared += 1
        for nested in message.nested_types:
            walk(nested)

    for message in kserve.DESCRIPTOR.message_types_by_name.values():
        walk(message)
    assert compared > 50


# --- OpenAI's client


@pytest.fixture(scope="module")
def stock_openai(closed: ServerProcess, bundle: Bundle, embedder: Embedder) -> Any:
    ids = json.dumps(embedder.embed(["one"]).items[0].ids)
    with ServerProcess(bundle.folder, "--set", "max_waiting_requests=1", http=True) as full:
        return run_script("stock_openai", f"http://{closed.http}/v1", f"http://{full.http}/v1", KEY, ids)


def test_openai_vectors(stock_openai: Any, embedder: Embedder) -> None:
    expected = embedder.embed(TEXTS)
    for name in ("default", "float"):
        answer = stock_openai[name]
        same(answer["vectors"], expected.vectors)
        assert answer["index"] == [0, 1, 2, 3]
        assert answer["model"] == "mini"
        assert answer["tokens"] == [sum(len(item.ids) for item in expected.items)] * 2
        assert answer["fingerprint"] == embedder.fingerprint
    # How four texts share batches follows the learned cost, so these are equal up to the last bits too.
    same(stock_openai["default"]["vectors"], stock_openai["float"]["vectors"])


def test_openai_forms_of_input(stock_openai: Any, embedder: Embedder) -> None:
    expected = embedder.embed(["one"]).vectors
    for name in ("text", "texts", "ids", "user"):
        same(stock_openai[name]["vectors"], expected, exactly=True)
    same(stock_openai["rows"]["vectors"], np.concatenate([expected, expected]))


def test_openai_extra_fields(stock_openai: Any, embedder: Embedder) -> None:
    query = embedder.embed(["one"], prompt_name="query").vectors
    for name, expected in (
        ("dimensions", embedder.embed(["one"], dimensions=64).vectors),
        ("query", query),
        ("input_type", query),
        ("prompt", embedder.embed(["one"], prompt="Say: ").vectors),
        ("unnormalized", embedder.embed(["one"], dimensions=64, normalize=False).vectors),
        ("truncated", embedder.embed(["many words " * 3000]).vectors),
    ):
        same(stock_openai[name]["vectors"], expected, exactly=True)


def test_openai_models(stock_openai: Any) -> None:
    assert (stock_openai["listed"], stock_openai["retrieved"]) == (["mini"], "mini")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("key", "AuthenticationError", "the API key is not known here"),
        ("key_of_models", "AuthenticationError", "the API key is not known here"),
        ("model", "NotFoundError", "there is no model 'text-embedding-3-small'; this server has: mini"),
        ("retrieved", "NotFoundError", "there is no model 'other'"),
        ("dimensions", "BadRequestError", "4096"),
        ("empty", "BadRequestError", "input is empty"),
        ("too_long", "BadRequestError", "tokens"),
        ("unknown_field", "BadRequestError", "unknown field `prompt_nam`"),
        ("foreign_ids", "BadRequestError", "check_embedding_ctx_length=False"),
    ],
)
def test_openai_refusals(stock_openai: Any, name: str, kind: str, words: str) -> None:
    refused = stock_openai["refusals"][name]
    assert refused["kind"] == kind, refused
    assert words in refused["message"]
    assert refused["type"] == "invalid_request_error"


def test_openai_async(stock_openai: Any, embedder: Embedder) -> None:
    *singly, together = stock_openai["async"]["answers"]
    expected = embedder.embed(TEXTS).vectors
    same([answer["vectors"][0] for answer in singly], expected)
    same(together["vectors"], expected)
    assert stock_openai["async"]["refused"] == "NotFoundError"


def test_openai_overload(stock_openai: Any, embedder: Embedder) -> None:
    refused = stock_openai["overload"]["refused"]
    assert (refused["kind"], refused["type"]) == ("RateLimitError", "rate_limit_error")
    assert refused["code"] == "rate_limit_exceeded"
    assert int(refused["retry_after"]) >= 1
    assert "waiting; the limit is" in refused["message"]
    same(stock_openai["overload"]["after"]["vectors"], embedder.embed(["one"]).vectors, exactly=True)


# --- what is built on it


@pytest.fixture(scope="module")
def frameworks(closed: ServerProcess) -> Any:
    return run_script("stock_frameworks", f"http://{closed.http}/v1", KEY)


FRAMEWORK_TEXTS = ["Where is the library?", "图书馆在哪里？", "a third one"]


def test_langchain(frameworks: Any, embedder: Embedder) -> None:
    expected = embedder.embed(FRAMEWORK_TEXTS).vectors
    same(frameworks["langchain"], expected)
    same(frameworks["langchain_async"], expected)
    same(frameworks["langchain_query"], expected[0])
    same(frameworks["langchain_dimensions"], embedder.embed(FRAMEWORK_TEXTS, dimensions=64).vectors)


def test_langchains_foreign_token_ids_are_refused_with_the_cure(frameworks: Any) -> None:
    """By default it sends ids of OpenAI's vocabulary, which would give vectors of other words."""
    assert "another tokenizer" in frameworks["langchain_by_ids"]
    assert "check_embedding_ctx_length=False" in frameworks["langchain_by_ids"]


def test_llama_index(frameworks: Any, embedder: Embedder) -> None:
    expected = embedder.embed(FRAMEWORK_TEXTS).vectors
    same(frameworks["llama_index"], expected)
    same(frameworks["llama_index_async"], expected)
    same(frameworks["llama_index_query"], expected[0])


# --- schemathesis


def test_the_openapi_document_is_kept(server: ServerProcess, embedder: Embedder, tmp_path: Path) -> None:
    """All of schemathesis' checks: what the document allows is accepted, what it forbids is refused, as documented."""
    said = run_client(
        "st",
        "run",
        f"http://{server.http}/openapi.json",
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "100", "--generation-deterministic", "--continue-on-failure"),
        *("--request-timeout", "30", "--no-color"),
        env={
            "SCHEMATHESIS_HOOKS": "tests.clients.schemathesis_hooks",
            "EOS_ID": str(embedder.contract.eos_id),
        },
        cwd=tmp_path,  # it remembers failures in a folder there; nothing is to come from an earlier run
    )
    assert "No issues found" in said
    assert re.search(r"(\d+) generated, \1 passed", said), said
    assert re.search(r"Tested: 7\b", said), said
    answered = [line for line in server.log if "protocol=http" in line]
    assert any("status=OK" in line for line in answered)
    assert not any("status=INTERNAL" in line for line in answered)
