"""The f2rt side of the GPU check: builds one engine on this GPU, proves it, and times it.

    python -m bench.gpu_engines --size mini --backend tensorrt-rtx --precision fp16 --work DIR --seconds 120

prints lines of JSON: whether it loads and runs, parity with PyTorch (mini), and the time of each batch shape.
What cannot be done is a line with the reason; only what really ran has numbers. `--prepare` exports the bundle alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
PROFILES = "1x128,1x512,8x128,8x512,64x128,64x512"
PARITY_TEXTS = 200
_CALIBRATION_TEXTS = 8  # for the synthetic sizes: their activations mean nothing


def check(
    size: str, backend: str, precision: str, work: Path, seconds: float, *, target: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what became of one engine. Raises F2rtError or ImportError for what stands in the way of all of it."""
    from bench.gpu_torch import MOST_S, SHAPES, SIZES, clock
    from export.build import add_engine
    from export.profiles import parse_profiles
    from runtime.batch import Batch
    from runtime.loader import open_raw_engine
    from runtime.settings import EngineSettings

    end = time.perf_counter() + seconds
    require(backend, target)
    checkpoint, bundle = prepare(size, precision, work)
    started = time.perf_counter()
    profiles = parse_profiles(PROFILES, bundle.manifest.contract.max_tokens)
    done = add_engine(bundle.folder, backend, precision, profiles, target=target)
    build_s = time.perf_counter() - started
    started = time.perf_counter()
    engine = open_raw_engine(bundle, done.record, EngineSettings())
    try:
        load_s = time.perf_counter() - started

        def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            return engine.run(Batch(ids, np.full(len(ids), ids.shape[1], np.int64)))

        ids = np.random.default_rng(0).integers(0, SIZES[size].vocabulary, (8, 32))
        vectors = run(ids)
        yield {
            "check": "runs",
            "finite": bool(np.isfinite(vectors).all()),
            "build_s": round(build_s, 1),
            "load_s": round(load_s, 2),
            "flags": done.record.flags,
        }
        for index, (rows, tokens) in enumerate(SHAPES):
            left = end - time.perf_counter()
            if left <= 0:
                yield {"rows": rows, "tokens": tokens, "skipped": "out of time"}
                continue
            share = min(MOST_S, left / (len(SHAPES) - index) / 2)
            yield clock(run, rows, tokens, SIZES[size].vocabulary, share)
    finally:
        engine.close()
    if size == "mini":
        yield parity(bundle.folder, checkpoint, done.record.full_name)
    else:
        yield agreement(size, checkpoint, ids, vectors)


def require(backend: str, target: str | None) -> None:
    """Raise what stands in the way of a backend here, before anything is made for it."""
    from export.builder import resolve_target
    from runtime.engines.onnxruntime import cuda_obstacle

    if backend != "onnxruntime-cuda":
        resolve_target(backend, target)
    elif (obstacle := cuda_obstacle()) is not None:
        raise obstacle


def agreement(size: str, checkpoint: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> dict[str, Any]:
    """Compare vectors with torch's in float32, from the same weights: what is timed is the same function."""
    import torch

    from bench.gpu_torch import SIZES, load, runner
    from runtime.golden import row_cosines

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and size == "4B":
        return {"check": "agreement", "skipped": "torch in float32 on CPU would take 16 GB and minutes"}
    expected = runner(load(SIZES[size], torch.float32, device, checkpoint), device, "eager")(ids)
    return {"check": "agreement", "min_cosine": float(row_cosines(vectors, expected).min()), "texts": len(ids)}


def parity(folder: Path, checkpoint: Path, engine: str) -> dict[str, Any]:
    """Compare an engine with PyTorch in every way `f2rt parity` does, on a part of the verification texts."""
    from calibration.texts import verification_texts
    from export.hub import locate
    from export.parity import check_bundle
    from export.reference import Reference
    from runtime.bundle import open_bundle

    texts = verification_texts()
    texts = texts[:: max(1, len(texts) // PARITY_TEXTS)]
    report, _ = check_bundle(open_bundle(folder), Reference(locate(str(checkpoint))), texts, engine_names=[engine])
    (found,) = report.engines
    if not found.checks:
        return {"check": "parity", "verdict": found.verdict, "reason": found.reason or "; ".join(found.diagnosis)}
    return {
        "check": "parity",
        "verdict": found.verdict,
        "texts": len(texts),
        "omitted": found.omitted,
        "min_cosine": min(c.cosine_min for c in found.checks),
        "mean_cosine": found.checks[0].cosine_mean,
        "max_abs_diff": max(c.max_abs_diff for c in found.checks),
        "problems": [f"{c.name}: {p}" for c in found.checks for p in c.problems],
    }


def prepare(size: str, precision: str, work: Path) -> tuple[Path, Any]:
    """Return checkpoint folder and bundle of one precision; both are made on the spot and kept in `work`."""
    from calibration.texts import calibration_texts
    from export.checkpoint import Checkpoint
    from export.hub import locate
    from export.pipeline import export_bundle
    from export.precision import parse_precisions
    from export.synth import default_tokenizer, write_checkpoint
    from runtime.bundle import MANIFEST, open_bundle

    precisions = parse_precisions(precision)  # first: it is what refuses a precision this version does not make
    checkpoint = default_tokenizer() if size == "mini" else work / f"checkpoint-{size}"
    if size != "mini" and not checkpoint.is_dir():
        write_checkpoint(size, checkpoint)
    folder = work / f"bundle-{size}-{precision}"
    if not (folder / MANIFEST).is_file():
        texts = calibration_texts()
        if size != "mini":
            texts = sorted(texts, key=lambda text: len(text.text))[100 : 100 + _CALIBRATION_TEXTS]
        export_bundle(Checkpoint.open(locate(str(checkpoint))), folder, precisions, calibration=texts)
    return checkpoint, open_bundle(folder)


def prepared(size: str, precision: str, work: Path) -> Iterator[dict[str, Any]]:
    """Make what `check` would make first, and yield one line."""
    prepare(size, precision, work)
    yield {"check": "prepared"}


def main() -> None:
    """Check one engine and print its lines; what stops it is the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True)
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--prepare", action="store_true", help="make checkpoint and bundle only")
    options = parser.parse_args()
    if options.backend is None and not options.prepare:
        parser.error("--backend is missing")
    if options.prepare:
        lines = prepared(options.size, options.precision, options.work)
    else:
        lines = check(options.size, options.backend, options.precision, options.work, options.seconds)
    try:
        for line in lines:
            print(json.dumps(line), flush=True)
    except ImportError as error:
        print(json.dumps({"skipped": f"not installed: {error.name or error}"}), flush=True)
    except Exception as error:
        from runtime.errors import F2rtError, InputError, MissingExtraError, NotExecutableError

        if not isinstance(error, F2rtError):
            raise
        kind = "skipped" if isinstance(error, InputError | MissingExtraError | NotExecutableError) else "failed"
        print(json.dumps({kind: str(error)}), flush=True)


if __name__ == "__main__":
    main()
