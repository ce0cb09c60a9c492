"""Health that tells the truth, engines switched under load, and a shadow that looks on; in this process."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calibration.texts import calibration_texts, verification_texts
from export.checkpoint import Checkpoint
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.bundle import MANIFEST, Bundle, open_bundle, write_manifest
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.errors import BundleError, DeadlineError, EngineError, InputError, NotFoundError, UnavailableError
from runtime.serving import model as model_module
from runtime.serving.metrics import EngineMetrics
from runtime.serving.pipeline import Pipeline
from runtime.serving.shadow import Shadow
from runtime.settings import SchedulingSettings, ShadowSettings
from runtime.tokenizer import Truncate
from tests.bundles import forge_fingerprint
from tests.serving import SERVING, START_S
from tests.serving_in_process import InProcess, held, wait_until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PATIENT = SchedulingSettings(max_wait_ms=1e9, overload=1e9)


def borrowed(embedder: Embedder) -> Embedder:
    """The same engine, left open by a server that closes its own."""
    return held(embedder, permits=100_000)[1]


@pytest.fixture(scope="module")
def other_bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with two engines, fp32 and fp16, proven on a few texts. Copied, never changed."""
    patch = pytest.MonkeyPatch()
    patch.setenv("F2RT_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("bundles") / "two"
    few = [t for t in calibration_texts() if len(t.text) < 300][::20]
    export_bundle(checkpoint, folder, [Precision.FP32, Precision.FP16], calibration=few)
    texts = [t for t in verification_texts() if len(t.text) < 300][::40]
    assert prove_bundle(folder, texts).verdict == "pass"
    patch.undo()
    return open_bundle(folder)


# --- golden watch


def test_a_wrong_vector_flips_health_metrics_and_watch(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=100_000)
    with InProcess(own, golden_period_s=0.05) as server, server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="mini"))
        assert next(watch).status == SERVING
        assert server.metric("f2rt_ready", model="mini") == 1
        engine.turn = 0.5
        assert next(watch).status == NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        assert server.metric("f2rt_ready", model="mini") == 0
        assert server.metric("f2rt_golden_cosine", model="mini") < 0.95
        assert server.metric("f2rt_golden_failures_total", model="mini") >= 1
        with EmbeddingClient(server.grpc) as client:
            with pytest.raises(UnavailableError, match="does not reproduce PyTorch"):
                client.embed(["a"])
            info = client.info()
            assert (info.state, info.golden_cosine < 0.95) == ("failing", True)
            # All golden texts have to come out right before it answers again.
            engine.turn = 0.0
            assert next(watch).status == SERVING
            assert server.metric("f2rt_golden_cosine", model="mini") > 0.9999
            assert np.allclose(client.embed(["a"]).vectors, embedder.embed(["a"]).vectors, atol=1e-6)


def test_an_engine_error_has_the_golden_texts_run_at_once(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=100_000)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:  # the period is endless here
        engine.fault = EngineError("the engine is on fire.", cure="Put it out.")
        with pytest.raises(EngineError):
            client.embed(["a"])
        wait_until(lambda: server.model.state == "failing")
        assert "on fire" in server.model.problem
        with pytest.raises(UnavailableError):
            client.embed(["a"])


def test_what_nobody_foresaw_is_an_engine_error_and_the_watch_goes_on(bundle: Bundle) -> None:
    engine, own = held(open_embedder(bundle), permits=100_000)
    with InProcess(own, golden_period_s=0.05) as server, EmbeddingClient(server.grpc) as client:
        engine.fault = MemoryError("secret internals")
        wait_until(lambda: server.model.state == "failing")
        assert "MemoryError" in server.model.problem
        engine.fault = None
        wait_until(lambda: server.model.state == "ready")
        engine.fault, engine.fault_for = MemoryError("secret internals"), 777
        with pytest.raises(EngineError, match="failed on a batch of 1 x 2: MemoryError") as told:
            client.embed(token_ids=[[777, 5]])
        assert "secret" not in str(told.value)
        server.model.spec = replace(server.model.spec, bundle=str(bundle.folder))
        client.reload()
        client.embed(["a"])


def test_one_bad_request_does_not_take_the_model_down(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=100_000)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:
        engine.fault, engine.fault_for = EngineError("not this one.", cure="Another."), 777
        with pytest.raises(EngineError):
            client.embed(token_ids=[[777, 5]])
        wait_until(lambda: len(engine.begun) >= 3)  # the request and the golden texts
        client.embed(["a"])
        assert server.model.state == "ready"


def test_an_engine_that_does_not_answer_is_found_out(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own, golden_period_s=0.05, golden_timeout_s=0.3) as server:
        wait_until(lambda: server.model.state == "failing")
        assert "gave no answer to a golden text within 0.3 s" in server.model.problem
        engine.allow(100_000)
        wait_until(lambda: server.model.state == "ready")


def test_a_golden_text_behind_a_long_request_is_not_late(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own, golden_timeout_s=0.2) as server, server.channel() as channel:
        server.model.pipeline.learn(1, 5, 60.0)  # such a request takes a minute
        waiting = server.stub(channel).Embed.future(pb.EmbedRequest(input=pb.EmbedInput(texts=["a b c"])))
        engine.wait_begun(1)
        checking = asyncio.run_coroutine_threadsafe(server.model._watch.check([0]), server.loop)
        time.sleep(0.6)
        assert not checking.done()
        engine.allow(10)
        assert checking.result(START_S)
        assert waiting.result().rows == 1
        assert server.model.state == "ready"


# --- hot switch


def test_reload_under_load_loses_and_mixes_nothing(other_bundle: Bundle, tmp_path: Path) -> None:
    """14 switches between fp32 and fp16 while eight callers ask: every answer is whole, and of the engine it names."""
    folder = Path(shutil.copytree(other_bundle.folder, tmp_path / "bundle"))
    first, second = (open_embedder(open_bundle(folder), f"onnxruntime:{p}") for p in ("fp32", "fp16"))
    texts = [[f"text {n} of {i}" for i in range(1 + n % 3)] for n in range(8)]
    expected = {(e.fingerprint, n): e.embed(texts[n]).vectors for e in (first, second) for n in range(8)}
    assert np.abs(expected[first.fingerprint, 0] - expected[second.fingerprint, 0]).max() > 1e-5
    stop = threading.Event()
    seen: list[str] = []

    def ask(address: str, number: int) -> int:
        answered = 0
        with EmbeddingClient(address) as client:
            while not stop.is_set():
                answer = client.embed(texts[number])
                wanted = expected[answer.fingerprint, number]
                assert np.allclose(answer.vectors, wanted, rtol=0, atol=2e-6)
                seen.append(answer.fingerprint)
                answered += 1
        return answered

    with InProcess(first, scheduling=PATIENT) as server, ThreadPoolExecutor(8) as pool:
        server.model.spec = replace(server.model.spec, bundle=str(folder))
        callers = [pool.submit(ask, server.grpc, n) for n in range(8)]
        with EmbeddingClient(server.grpc) as client:
            for turn in range(14):
                wanted = ("fp16", "fp32")[turn % 2]
                done = client.reload(engine=f"onnxruntime:{wanted}")
                assert done.engine == f"onnxruntime:{wanted}"
                assert done.old_fingerprint != done.new_fingerprint
                assert client.embed(["a"]).fingerprint == done.new_fingerprint
        stop.set()
        assert all(caller.result(START_S) > 0 for caller in callers)
        assert len(set(seen)) == 2
        wait_until(lambda: sum(t.name == "f2rt-engine" for t in threading.enumerate()) == 1)
        assert server.metric("f2rt_reloads_total", model="mini", outcome="switched") == 14


def test_a_request_in_flight_stays_with_its_engine(other_bundle: Bundle) -> None:
    engine, own = held(open_embedder(other_bundle, "onnxruntime:fp32"))
    with InProcess(own) as server, server.channel() as channel, EmbeddingClient(server.grpc) as client:
        old = own.fingerprint
        waiting = server.stub(channel).Embed.future(pb.EmbedRequest(input=pb.EmbedInput(texts=["a"])))
        engine.wait_begun(1)
        done = client.reload(engine="onnxruntime:fp16")
        assert done.old_fingerprint == old
        assert client.embed(["b"]).fingerprint == done.new_fingerprint
        assert not waiting.done()
        engine.allow(10)
        assert waiting.result().fingerprint == old


def test_a_reload_that_fails_leaves_the_old_engine(bundle_copy: Bundle) -> None:
    own = open_embedder(bundle_copy)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:
        before = client.embed(["a"])
        with pytest.raises(NotFoundError, match="has no engine 'onnxruntime:int3'"):
            client.reload(engine="onnxruntime:int3")
        (engine,) = bundle_copy.manifest.engines
        changed = replace(bundle_copy.manifest, engines=[replace(engine, parity=None)])
        (bundle_copy.folder / MANIFEST).write_bytes(msgspec.json.encode(changed))
        with pytest.raises(BundleError, match="never compared with PyTorch"):
            client.reload()
        (bundle_copy.folder / MANIFEST).write_bytes(b"{")
        with pytest.raises(BundleError):
            client.reload()
        after = client.embed(["a"])
        assert after.fingerprint == before.fingerprint
        assert np.array_equal(after.vectors, before.vectors)
        assert server.metric("f2rt_reloads_total", model="mini", outcome="failed") == 3
        assert client.ready()


def test_a_reload_whose_caller_is_gone_when_its_turn_comes_is_none(
    bundle_copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, loads = threading.Event(), []
    load = model_module.load

    def held_load(*arguments: Any) -> Any:
        loads.append(1)
        assert go.wait(START_S)
        return load(*arguments)

    with InProcess(open_embedder(bundle_copy, "onnxruntime:fp32")) as server, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(model_module, "load", held_load)
        with EmbeddingClient(server.grpc) as patient, EmbeddingClient(server.grpc, timeout_s=0.5) as hasty:
            first = pool.submit(patient.reload)
            wait_until(lambda: len(loads) == 1)
            for _ in range(3):
                with pytest.raises(DeadlineError):
                    hasty.reload()
            go.set()
            first.result()
            patient.reload()  # behind the three, and so after them
            assert len(loads) == 2
            assert np.isfinite(patient.embed(["a"]).vectors).all()


def test_a_reload_takes_what_is_on_disk_now(bundle_copy: Bundle) -> None:
    """Another default prompt is another contract: the reloaded model applies it."""
    own = open_embedder(bundle_copy)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:
        plain = client.embed(["a"])
        contract = replace(bundle_copy.manifest.contract, default_prompt_name="query")
        write_manifest(bundle_copy.folder, replace(bundle_copy.manifest, contract=contract))
        forge_fingerprint(bundle_copy)
        done = client.reload()
        assert done.old_fingerprint == plain.fingerprint != done.new_fingerprint
        prompted = client.embed(["a"])
        assert prompted.fingerprint == done.new_fingerprint
        assert np.abs(prompted.vectors - plain.vectors).max() > 0.01


# --- shadow


def look_on(server: InProcess, shadow: Embedder, settings: ShadowSettings) -> None:
    async def attach() -> None:
        metrics = server.models.metrics
        pipeline = Pipeline(shadow, PATIENT, Truncate.END, EngineMetrics(metrics, "mini-shadow"))
        own = server.model.embedder.bundle.manifest.tokenizer.sha256
        server.model.shadow = Shadow(pipeline, own, "mini", settings, metrics)

    server.run(attach())


def test_a_shadow_compares_a_share_of_the_traffic(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    _, same = held(embedder, permits=100_000)
    other, turned = held(embedder, permits=100_000)
    other.turn = 0.2
    settings = ShadowSettings(bundle="", share=1.0, drift=0.001)
    for shadow, differs in ((same, False), (turned, True)):
        caplog.clear()
        with InProcess(borrowed(embedder)) as server, EmbeddingClient(server.grpc) as client:
            look_on(server, shadow, settings)
            expected = embedder.embed(["a", "b"]).vectors
            assert np.allclose(client.embed(["a", "b"]).vectors, expected, atol=1e-6), "the shadow answers nothing"
            wait_until(lambda s=server: s.metric("f2rt_shadow_drift_count", model="mini") == 2)  # type: ignore[misc]
            assert ("and its shadow" in caplog.text) is differs
            assert (server.metric("f2rt_shadow_drift_sum", model="mini") > 0.01) is differs


def test_a_shadow_without_time_is_no_burden(embedder: Embedder) -> None:
    slow, own = held(embedder)
    with InProcess(borrowed(embedder)) as server, EmbeddingClient(server.grpc) as client:
        look_on(server, own, ShadowSettings(bundle="", share=1.0))
        for _ in range(5):
            client.embed(["a"])
        wait_until(lambda: server.metric("f2rt_shadow_dropped_total", model="mini") == 4)
        slow.allow(1000)


def test_a_shadow_with_another_tokenizer_is_refused(embedder: Embedder) -> None:
    _, own = held(embedder)
    with InProcess(borrowed(embedder)) as server:

        async def attach() -> None:
            pipeline = Pipeline(own, PATIENT, Truncate.END, EngineMetrics(server.models.metrics, "x"))
            try:
                Shadow(pipeline, "0" * 64, "mini", ShadowSettings(bundle=""), server.models.metrics)
            finally:
                await pipeline.close()

        with pytest.raises(InputError, match="another tokenizer"):
            server.run(attach())


# --- several models


def test_models_by_name(embedder: Embedder, other_bundle: Bundle) -> None:
    half = open_embedder(other_bundle, "onnxruntime:fp16")
    with InProcess(borrowed(embedder), half) as server, EmbeddingClient(server.grpc) as client:
        assert client.embed(["a"]).fingerprint == embedder.fingerprint
        assert client.embed(["a"], model="mini").fingerprint == embedder.fingerprint
        assert client.embed(["a"], model="mini-1").fingerprint == half.fingerprint
        assert client.info().models == ["mini", "mini-1"]
        assert client.info("mini-1").engine == "onnxruntime:fp16"
        with pytest.raises(NotFoundError, match="there is no model 'nope'; this server has: mini, mini-1"):
            client.embed(["a"], model="nope")


def test_a_shadow_is_let_go_when_a_reload_brings_another_tokenizer(
    bundle_copy: Bundle, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, shadow = held(embedder, permits=100_000)
    with InProcess(open_embedder(bundle_copy)) as server, EmbeddingClient(server.grpc) as client:
        look_on(server, shadow, ShadowSettings(bundle="", share=1.0))
        client.reload()
        looking = server.model.shadow
        assert looking is not None
        manifest = bundle_copy.manifest
        for other in (
            replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0" * 64)),
            replace(manifest, contract=replace(manifest.contract, dim=64)),
        ):
            assert not looking.fits(replace(bundle_copy, manifest=other))
        monkeypatch.setattr(Shadow, "fits", lambda *given: False)
        client.reload()
        assert server.model.shadow is None
        assert "has another tokenizer than its shadow now: the shadow is off" in caplog.text
        assert client.embed(["a"]).vectors.shape == (1, embedder.contract.dim)
