"""ONNX Runtime on a GPU: what was asked for is what answers, or an error says why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from export.build import add_engine
from runtime.bundle import Bundle, EngineRecord, open_bundle, timestamp
from runtime.engines.onnxruntime import CPU, CUDA, OnnxRuntimeEngine, check_placement
from runtime.errors import (
    EngineError,
    MissingExtraError,
    NotExecutableError,
    NotFoundError,
)
from runtime.loader import load_engine
from runtime.settings import EngineSettings
from tests.bundles import forge_report

# --- onnxruntime-cuda


def test_onnxruntime_cuda_is_recorded_not_proven(narrow_copy: Bundle) -> None:
    folder = narrow_copy.folder
    done = add_engine(folder, "onnxruntime-cuda", "fp16", ())
    assert (done.built, done.record.full_name) == (True, "onnxruntime-cuda:fp16")
    assert done.record.parity is None
    assert done.record.file == "graphs/fp16.onnx"
    assert done.record.fingerprint != narrow_copy.engine("onnxruntime:fp16").fingerprint
    assert add_engine(folder, "onnxruntime-cuda", "fp16", ()).built is False
    manifest = open_bundle(folder).manifest
    assert [e.name for e in manifest.engines].count("onnxruntime-cuda:fp16") == 1
    with pytest.raises(NotFoundError, match="has no int8 graph"):
        add_engine(folder, "onnxruntime-cuda", "int8", ())


def open_on_cuda(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(
        bundle.path("graphs/fp16.onnx"),
        name="onnxruntime-cuda:fp16",
        precision="fp16",
        fingerprint="f",
        settings=EngineSettings(),
        provider=CUDA,
    )


def test_package_without_cuda_is_said(narrow_bundle: Bundle) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here")
    with pytest.raises(MissingExtraError, match=r"package without CUDA.*pip uninstall onnxruntime"):
        open_on_cuda(narrow_bundle)


class HalfCuda:
    """A session as onnxruntime-gpu gives it when CUDA lacks kernels: the provider is there, nodes are on the CPU."""

    def __init__(self, session: Any, providers: list[str]) -> None:
        self._session = session
        self.get_providers = lambda: providers

    def get_provider_graph_assignment_info(self) -> Any:
        return self._session.get_provider_graph_assignment_info()


def test_silent_fallback_to_the_cpu_is_an_error(narrow_bundle: Bundle) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = str(narrow_bundle.path("graphs/fp16.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=[CPU])
    # What a session really is when CUDA could not be loaded: a session on the CPU, and no error.
    with pytest.raises(NotExecutableError, match=r"cannot use CUDA here: .*would run on CPUExecutionProvider instead"):
        check_placement("onnxruntime-cuda:fp16", session)
    half: Any = HalfCuda(session, [CUDA, CPU])
    with pytest.raises(EngineError, match=r"no CUDA kernel for 32 nodes .*layers\.0.*and 29 more"):
        check_placement("onnxruntime-cuda:fp16", half)


def test_auto_passes_over_an_engine_that_does_not_open(bundle_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA package is there as far as one can ask, and CUDA is not: auto finds out by trying."""
    import onnxruntime

    from runtime.bundle import write_manifest
    from runtime.engines import onnxruntime as engine

    add_engine(bundle_copy.folder, "onnxruntime-cuda", "fp32", ())
    manifest = open_bundle(bundle_copy.folder).manifest

    def proven(record: EngineRecord) -> EngineRecord:
        parity = manifest.engines[0].parity
        assert parity is not None
        return replace(record, parity=replace(parity, fingerprint=record.fingerprint, checked_at=timestamp()))

    write_manifest(bundle_copy.folder, replace(manifest, engines=[proven(e) for e in manifest.engines]))
    bundle = forge_report(bundle_copy.folder)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        engine.onnxruntime, "InferenceSession", lambda path, options, providers: session(path, options, providers=[CPU])
    )
    loaded = load_engine(bundle)
    assert loaded.record.name == "onnxruntime:fp32"
    assert "passed over onnxruntime-cuda:fp32 (onnxruntime-cuda:fp32 cannot use CUDA here" in loaded.selection
    loaded.engine.close()
    with pytest.raises(NotExecutableError, match="cannot use CUDA here"):
        load_engine(bundle, "onnxruntime-cuda:fp32")


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("fp16", "1"), ("int8", "1")])
def test_fp32_on_a_gpu_is_fp32(
    narrow_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: str, tf32: str
) -> None:
    """The library's default, TF32, moved components of the bundled checkpoint by 1e-4 on a GPU."""
    from runtime.engines import onnxruntime as engine

    asked: list[Any] = []

    def refuse(path: str, options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        raise RuntimeError("asked")

    monkeypatch.setattr(engine.onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(engine.onnxruntime, "InferenceSession", refuse)
    with pytest.raises(EngineError, match="asked"):
        OnnxRuntimeEngine(
            narrow_bundle.path("graphs/fp16.onnx"),
            name="e",
            precision=precision,
            fingerprint="f",
            settings=EngineSettings(),
            provider=CUDA,
        )
    assert asked == [(CUDA, {"use_tf32": tf32})]
