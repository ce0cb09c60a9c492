"""`f2rt diff --server`: a server that is what it says, one with another engine, one that lies, one that changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from calibration.texts import verification_texts, write_lines
from export import audit
from export.audit import audit_server
from export.compare import choose
from export.diff_report import DiffReport
from export.embedded import embed_there
from runtime.bundle import Bundle, open_bundle, write_manifest
from runtime.client import EmbeddingClient
from runtime.client_answers import EmbedAnswer
from runtime.embedder import Embedder, open_embedder
from runtime.errors import EngineError, NotExecutableError, OverloadedError
from tests.bundles import forge_fingerprint
from tests.serving import ServerProcess, f2rt
from tests.serving_in_process import InProcess, held

TEXTS = [t for t in verification_texts() if len(t.text) < 300][::20]
FP32 = "onnxruntime:fp32"


@pytest.fixture(scope="module")
def other(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle under another contract, and so with other fingerprints. Read only."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path_factory.mktemp("other") / "mini"))
    m = bundle.manifest
    contract = replace(m.contract, prompts={**m.contract.prompts, "query": "Q: "}, max_tokens=512)
    write_manifest(folder, replace(m, contract=contract, source=replace(m.source, revision="abc")))
    return forge_fingerprint(open_bundle(folder))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_bytes(write_lines(TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    opened = open_embedder(bundle, FP32)
    yield opened
    opened.close()


def audited(bundle: Bundle, address: str, **options: Any) -> DiffReport:
    with EmbeddingClient(address) as client:
        return audit_server(bundle, client, address, choose(TEXTS, "the test"), **options)


def test_a_server_of_the_bundle_passes(bundle: Bundle, server: ServerProcess, texts: str) -> None:
    done = f2rt("diff", str(bundle.folder), "--server", server.address, "--texts", texts, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["changes"] == []
    assert report["a"]["engine"] == FP32
    assert report["a"]["selection"] == "it has the server's fingerprint"
    assert report["b"]["server"] == server.address
    assert report["audit"]["findings"] == []
    assert report["audit"]["in_bundle"] == FP32
    assert report["audit"]["fingerprints"] == [server.fingerprint]
    assert report["audit"]["golden_min_cosine"] > 0.9995
    assert report["moves"]["cosine"]["min"] > 0.99999
    told = f2rt("diff", str(bundle.folder), "--server", server.address, "--texts", texts, "--limit", "5")
    assert told.returncode == 0
    out = told.stdout.decode()
    assert "no difference: what the server says of itself is what the bundle says" in out
    assert f"its engine is {FP32} of the bundle, by its fingerprint" in out
    assert out.splitlines()[-1].startswith(("identical vectors", "interchangeable within "))


def test_an_engine_that_the_bundle_does_not_have_is_named(other: Bundle, server: ServerProcess, texts: str) -> None:
    done = f2rt("diff", str(other.folder), "--server", server.address, "--texts", texts)
    assert done.returncode == 1, done.stderr
    assert done.stderr == b""
    last = done.stdout.decode().splitlines()[-1]
    assert f"the server's engine {FP32} with the fingerprint {server.fingerprint} is not in {other.folder}" in last
    assert f"it has: {FP32} {other.manifest.engines[0].fingerprint}" in last


def test_what_the_server_says_of_itself_is_compared(other: Bundle, server: ServerProcess) -> None:
    report = audited(other, server.address)
    lines = {f"{c.section}: {c.what}": (c.a, c.b) for c in report.changes}
    assert lines == {
        "source: revision": ("abc", "none"),
        "engine: fingerprint": (other.manifest.engines[0].fingerprint, server.fingerprint),
        "contract: max_tokens": ("512", "1024"),
        "contract: prompt query": ('"Q: "', lines["contract: prompt query"][1]),
    }
    assert report.audit is not None
    assert report.audit.in_bundle is None
    assert report.audit.golden_min_cosine is not None
    assert report.audit.golden_min_cosine > 0.99999  # the same weights
    assert report.moves is not None  # how far it is from what the bundle would answer is said all the same
    assert {t.prompt for t in report.moves.worst[:3]} == {"query"}
    assert report.moved


def test_what_server_and_bundle_share_is_no_reason_to_fail(bundle: Bundle, server: ServerProcess) -> None:
    """Found by name, too; and what the bundle's own fp32 engine answers here is what the server answers."""
    report = audited(bundle, server.address, engine=FP32)
    assert not report.moved
    assert report.a.selection == "asked for by name"


def test_vectors_that_are_not_the_engines_are_found(bundle: Bundle, embedder: Embedder) -> None:
    """A server with the right fingerprint whose vectors are turned a little, each still of unit length."""
    engine, own = held(embedder, permits=100_000)
    with InProcess(own) as running:
        address = running.grpc
        assert not audited(bundle, address).moved
        engine.turn = 0.1
        report = audited(bundle, address)
    assert report.moved
    assert report.audit is not None
    golden, texts = report.audit.findings
    assert golden.startswith("the server does not reproduce PyTorch: cosine 0.99")
    assert texts.startswith(f"its vectors are not those of {FP32} of the bundle: re-embed: the smallest cosine is 0.99")
    assert report.verdict == golden


def test_where_the_engine_cannot_run_the_golden_texts_decide(
    bundle: Bundle, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a GPU, looked at from a machine without one."""

    def unfit(*arguments: object) -> Any:
        raise NotExecutableError("there is no GPU.")

    monkeypatch.setattr(audit, "embed_with", unfit)
    report = audited(bundle, server.address)
    assert not report.moved
    assert report.moves is None
    assert report.verdict == "the server reproduces PyTorch's golden vectors"
    assert report.notes == ["the texts were not compared, the golden ones alone: there is no GPU."]
    with pytest.raises(NotExecutableError):  # asked for and not obtained is an error
        audited(bundle, server.address, engine=FP32)


class Double:
    """A client whose answers are another's, changed."""

    def __init__(self, client: EmbeddingClient) -> None:
        self.client = client
        self.calls = 0

    def info(self, model: str) -> Any:
        return self.client.info(model)

    def embed(self, texts: Any, **options: Any) -> EmbedAnswer:
        self.calls += 1
        return self.change(self.client.embed(texts, **options))

    def change(self, answer: EmbedAnswer) -> EmbedAnswer:
        return answer


def test_a_server_that_changes_its_engine_meanwhile_is_found(bundle: Bundle, server: ServerProcess) -> None:
    class Reloaded(Double):
        def change(self, answer: EmbedAnswer) -> EmbedAnswer:
            return replace(answer, fingerprint="f" * 32) if self.calls > 2 else answer

    with EmbeddingClient(server.address) as client:
        double: Any = Reloaded(client)
        report = audit_server(bundle, double, server.address, choose(TEXTS, "the test"))
    assert report.moved
    assert report.audit is not None
    assert report.audit.fingerprints == [server.fingerprint, "f" * 32]
    assert report.verdict == (
        f"the server said that {server.fingerprint} answers, and {'f' * 32} did: it changed its engine meanwhile, "
        "or several servers share this address"
    )


def test_a_full_server_is_asked_again(server: ServerProcess) -> None:
    class Full(Double):
        def change(self, answer: EmbedAnswer) -> EmbedAnswer:
            if self.calls < 3:
                raise OverloadedError("full.", retry_after_s=0.001)
            return answer

    with EmbeddingClient(server.address) as client:
        double: Any = Full(client)
        got = embed_there(double, client.info(), TEXTS[:3], lambda *progress: None)
    assert got.vectors.shape == (3, 256)


def test_answers_that_cannot_be_meant_are_errors(server: ServerProcess) -> None:
    class NotFinite(Double):
        def change(self, answer: EmbedAnswer) -> EmbedAnswer:
            return replace(answer, vectors=np.full_like(answer.vectors, np.nan))

    class Short(Double):
        def change(self, answer: EmbedAnswer) -> EmbedAnswer:
            return replace(answer, vectors=answer.vectors[:-1])

    with EmbeddingClient(server.address) as client:
        broken: Any
        for broken, problem in ((NotFinite(client), "not finite for the text"), (Short(client), "of shape")):
            with pytest.raises(EngineError, match=problem):
                embed_there(broken, client.info(), TEXTS[:3], lambda *progress: None)


def test_keys_and_tls_are_those_of_embed(bundle: Bundle, texts: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "keys").write_text("test:correct-horse-battery-staple\n")
    ca = tmp_path / "ca.pem"
    options = [f"--tls-cert={tmp_path}/cert.pem", f"--tls-key={tmp_path}/key.pem", f"--keys-file={tmp_path}/keys"]
    with ServerProcess(bundle.folder, *options, ca=ca) as secured:
        arguments = ["diff", str(bundle.folder), "--server", secured.address, "--texts", texts, "--limit", "3"]
        assert f2rt(*arguments).returncode == 2
        done = f2rt(*arguments, "--tls-ca", str(ca))
        assert done.returncode == 2
        assert "key" in done.stderr.decode()
        key = {"F2RT_API_KEY": "correct-horse-battery-staple"}
        done = f2rt(*arguments, "--tls-ca", str(ca), env=key)
        assert done.returncode == 0, done.stderr
    done = f2rt(*arguments, "--tls-ca", str(tmp_path / "gone.pem"))
    assert done.returncode == 2
    assert "gone.pem" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_a_server_that_is_not_there_and_a_model_it_does_not_have(bundle: Bundle, server: ServerProcess) -> None:
    done = f2rt("diff", str(bundle.folder), "--server", "127.0.0.1:1", "--limit", "3")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no f2rt server answers at 127.0.0.1:1")
    done = f2rt("diff", str(bundle.folder), "--server", server.address, "--limit", "3", "--model", "other")
    assert done.returncode == 2
    assert b"other" in done.stderr
