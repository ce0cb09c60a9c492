"""The two sides of the GPU check, on a CPU: that each measures what it claims, and that both compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import gpu_engines, gpu_torch
from bench.gpu_torch import SIZES
from export import synth
from export.checkpoint import Checkpoint
from export.config import EncoderConfig
from export.reference import Reference
from runtime.bundle import Bundle, EngineRecord
from runtime.engines import Engine
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.golden import row_cosines
from runtime.settings import EngineSettings

ROOT = Path(__file__).parent.parent


# --- the torch side


def test_shapes_are_the_familys(checkpoint: Checkpoint) -> None:
    def same(ours: gpu_torch.Encoder, config: EncoderConfig) -> None:
        theirs = (config.vocab_size, config.hidden_size, config.layers, config.heads, config.kv_heads)
        assert (ours.vocabulary, ours.hidden, ours.layers, ours.heads, ours.kv_heads) == theirs
        assert (ours.mlp, ours.head_dim) == (config.intermediate_size, config.head_dim)
        assert ours.parameters == synth.parameters(config)
        assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 1e6)

    same(SIZES["mini"], checkpoint.config)
    same(SIZES["0.6B"], synth.SIZES["0.6B"])
    same(SIZES["4B"], synth.SIZES["4B"])
    assert [(r, t) for r in (1, 8, 64) for t in (32, 128, 512)] == gpu_torch.SHAPES


def test_torch_baseline_is_the_model(mini: Path, reference: Reference) -> None:
    """The same vectors as transformers' from the same weights: a baseline that computes less would be no baseline."""
    model = gpu_torch.load(SIZES["mini"], torch.float32, "cpu", mini)
    ids = np.random.default_rng(0).integers(0, 15_000, (5, 40))
    vectors = gpu_torch.runner(model, "cpu", "eager")(ids)
    expected = np.stack([reference.embed(row.tolist()) for row in ids])
    assert np.abs(vectors - expected).max() < 1e-5
    half = gpu_torch.runner(gpu_torch.load(SIZES["mini"], torch.bfloat16, "cpu", mini), "cpu", "eager")(ids)
    assert 0.995 < row_cosines(half, expected).min() < 0.999999


def test_torch_is_timed_shape_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_torch, "SHAPES", [(1, 8), (2, 16), (4, 8)])
    monkeypatch.setattr(gpu_torch, "_WARM_S", 0.1)
    monkeypatch.setattr(gpu_torch, "_MOST", 10)  # the time is a bound that a busy machine may need
    lines = list(gpu_torch.measure("mini", "bfloat16", "eager", "cpu", 300.0))
    assert [(line["rows"], line["tokens"]) for line in lines] == [(1, 8), (2, 16), (4, 8)]
    for line in lines:
        assert 0 < line["min_ms"] <= line["median_ms"] <= line["p90_ms"]
        assert line["runs"] >= 5
        assert line["texts_per_s"] == pytest.approx(1e3 * line["rows"] / line["median_ms"], rel=0.01)
    over = list(gpu_torch.measure("mini", "bfloat16", "eager", "cpu", 0.0))
    assert [line["skipped"] for line in over] == ["out of time"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has CUDA here")
def test_torch_without_cuda_is_one_line_with_the_reason() -> None:
    (line,) = gpu_torch.measure("4B", "float16", "eager", "cuda", 60.0)
    assert "cannot use CUDA here" in line["skipped"]


def test_clock_counts_from_host_to_host() -> None:
    calls = 0

    def slow(ids: Any) -> Any:
        nonlocal calls
        calls += 1
        assert ids.shape == (2, 3)
        time.sleep(0.02)

    line = gpu_torch.clock(slow, 2, 3, 100, 0.3)
    assert line["median_ms"] >= 20
    assert line["runs"] >= 5
    assert calls > line["runs"]  # the warm-up came first and was not counted


def test_a_shape_is_prepared_by_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_torch, "SHAPES", [(1, 8), (2, 16)])
    lines = list(gpu_torch.measure("mini", "bfloat16", "eager", "cpu", 300.0, gpu_torch.once))
    assert [(line["rows"], line["tokens"]) for line in lines] == [(1, 8), (2, 16)]
    assert all("median_ms" not in line and line["warm_up_s"] > 0 for line in lines)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_torch_is_the_model_for_every_ids() -> None:
    model = gpu_torch.load(SIZES["mini"], torch.float16, "cuda")
    run = gpu_torch.runner(model, "cuda", "compiled")
    eager = gpu_torch.runner(gpu_torch.load(SIZES["mini"], torch.float16, "cuda"), "cuda", "eager")
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 15_000, (4, 24))
        assert row_cosines(run(ids), eager(ids)).min() > 0.9999


@pytest.mark.slow
def test_compiled_torch_gives_the_same(mini: Path) -> None:
    model = gpu_torch.load(SIZES["mini"], torch.float32, "cpu", mini)
    ids = np.random.default_rng(0).integers(0, 15_000, (2, 16))
    eager = gpu_torch.runner(model, "cpu", "eager")(ids)
    assert row_cosines(gpu_torch.runner(model, "cpu", "compiled")(ids), eager).min() > 0.99999


# --- the engines' side, with the CPU's engine in the place of the GPU's


@pytest.mark.slow
def test_engine_is_built_run_timed_and_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really exported and compiled, for a GPU that is not here; what runs is ONNX Runtime on the same graph."""
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_torch, "SHAPES", [(1, 8), (2, 16)])
    monkeypatch.setattr(gpu_torch, "_MOST", 10)
    monkeypatch.setattr(gpu_engines, "PARITY_TEXTS", 12)
    opened: list[str] = []

    def stand_in(bundle: Bundle, record: EngineRecord, settings: EngineSettings) -> Engine:
        opened.append(record.full_name)
        path = bundle.path(f"graphs/{record.precision}.onnx")
        return OnnxRuntimeEngine(
            path, name=record.name, precision=record.precision, fingerprint=record.fingerprint, settings=settings
        )

    monkeypatch.setattr("runtime.loader.open_raw_engine", stand_in)
    monkeypatch.setattr("export.parity.open_raw_engine", stand_in)
    monkeypatch.setattr("calibration.texts.calibration_texts", short_texts)
    runs, first, second, parity = gpu_engines.check("mini", "tensorrt-rtx", "fp16", tmp_path, 300.0, target="sm89")
    assert opened == ["tensorrt-rtx:fp16@sm89"] * 2
    assert runs["finite"] is True
    assert any("fp16" in flag for flag in runs["flags"])
    assert [(x["rows"], x["tokens"]) for x in (first, second)] == [(1, 8), (2, 16)]
    assert first["median_ms"] > 0
    assert (parity["verdict"], parity["omitted"]) == ("pass", 0)
    assert parity["min_cosine"] > 0.9995


def short_texts() -> list[Any]:
    from calibration import texts

    return [t for t in texts.read_texts(ROOT / "calibration" / "calibration.jsonl") if len(t.text) < 300][::40]


def test_agreement_compares_with_torch_from_the_same_weights(mini: Path, reference: Reference) -> None:
    ids = np.random.default_rng(0).integers(0, 15_000, (3, 20))
    vectors = np.stack([reference.embed(row.tolist()) for row in ids])
    same = gpu_engines.agreement("mini", mini, ids, vectors)
    assert same["check"] == "agreement"
    assert same["min_cosine"] > 0.99999
    assert gpu_engines.agreement("mini", mini, ids, vectors[::-1].copy())["min_cosine"] < 0.99


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("tensorrt", "tensorrt is not installed here"),
        ("tensorrt-rtx", "there is no GPU here"),
        ("onnxruntime-cuda", "package without CUDA"),
    ],
)
def test_engine_that_cannot_be_is_one_line_with_the_reason(tmp_path: Path, backend: str, words: str) -> None:
    arguments = ["--size", "4B", "--backend", backend, "--precision", "fp16", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_engines", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert words in json.loads(line)["skipped"]
    assert list(tmp_path.iterdir()) == []  # found out before a checkpoint of 8 GB was written
