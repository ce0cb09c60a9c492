"""How fast an engine answers: our fp32 graph in ONNX Runtime beside stock transformers, on CPU.

All get the same random token ids, as many threads as there are physical cores, and take turns within each
repetition, the order rotating. Before each timed run the process rests for 20 ms, so that no pool's threads still
spin on the cores. transformers runs as its users run it: AutoModel, sdpa attention, inference mode, attention mask
given, then last-token pooling and normalization.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import Result, median
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.synth import SIZES, write_checkpoint
from runtime.batch import Batch, make_batch
from runtime.cores import usable_cores
from runtime.errors import InputError
from runtime.loader import open_raw_engine
from runtime.settings import EngineSettings

SHAPES = [(1, 16), (1, 128), (1, 512), (8, 128)]
OURS, TORCH, TORCH_BF16 = "f2rt fp32", "transformers fp32", "transformers bf16"
MIN_COSINE = 0.9999
_LEAST, _MOST = 5, 200  # repetitions
_REST_S = 0.1  # as in bench.turns

Run = Callable[[Batch], NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """One shape's times in milliseconds by contestant, and the smallest cosine to transformers fp32."""

    rows: int
    tokens: int
    times_ms: dict[str, list[float]]
    min_cosine: dict[str, float]

    def ratio(self, name: str) -> float:
        """Median time of `name` over ours: above 1, ours is faster."""
        return median(self.times_ms[name]) / median(self.times_ms[OURS])

    def ratio_of_minima(self, name: str) -> float:
        """Least time of `name` over ours: what other work on the machine disturbs least."""
        return min(self.times_ms[name]) / min(self.times_ms[OURS])


def measure(size: str, work: Path, seconds: float) -> Result:
    """Measure a synthetic checkpoint of `size`; `seconds` bounds the timed part, five repetitions at least."""
    if size not in SIZES:
        raise InputError(f"there is no size {size!r}.", cure=f"Choose one of {', '.join(SIZES)}.")
    checkpoint, bundle = work / f"checkpoint-{size}", work / f"bundle-{size}"
    try:
        say(f"{size}: synthesizing and exporting")
        write_checkpoint(size, checkpoint)
        opened = Checkpoint.open(locate(str(checkpoint)))
        exported = export_bundle(opened, bundle, [Precision.FP32])
        cores = usable_cores()
        engine = open_raw_engine(exported, exported.engine("onnxruntime:fp32"), EngineSettings(threads=cores))
        contestants: dict[str, Run] = {
            OURS: engine.run,
            TORCH: stock_transformers(checkpoint, "float32", cores),
            TORCH_BF16: stock_transformers(checkpoint, "bfloat16", cores),
        }
        rng = np.random.default_rng(0)
        shapes = []
        for rows, tokens in SHAPES:
            ids = rng.integers(0, opened.config.vocab_size, (rows, tokens)).tolist()
            batch = make_batch(ids, opened.contract.pad_id)
            shapes.append(compare(contestants, batch, seconds / len(SHAPES)))
        engine.close()
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)
    return _result(size, seconds, cores, shapes)


def stock_transformers(folder: Path, dtype: str, threads: int) -> Run:
    """Return what runs a batch as users of transformers do, in `dtype` on `threads` threads."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    loaded: Any = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = loaded.eval()

    def run(batch: Batch) -> NDArray[np.float32]:
        with torch.inference_mode():
            mask = torch.from_numpy(batch.attention_mask)
            states = model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask).last_hidden_state
            pooled = states[torch.arange(len(states)), mask.sum(dim=1) - 1].float()
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return vectors

    return run


def compare(contestants: dict[str, Run], batch: Batch, seconds: float, *, truth: str = TORCH) -> Shape:
    """Time all contestants on one batch in turns; cosines are taken to the vectors of `truth`."""
    rows, tokens = batch.input_ids.shape
    # The first run of each is the warm-up, and shows that all give the same vectors.
    vectors = {name: run(batch) for name, run in contestants.items()}
    cosines = {name: _min_cosine(vectors[name], vectors[truth]) for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = time.monotonic() + seconds
    while len(times[OURS]) < _LEAST or (time.monotonic() < end and len(times[OURS]) < _MOST):
        for name in names:
            time.sleep(_REST_S)
            start = time.perf_counter()
            contestants[name](batch)
            times[name].append(1e3 * (time.perf_counter() - start))
        names = [*names[1:], names[0]]
    shape = Shape(rows, tokens, times, cosines)
    shown = ", ".join(f"{name} {median(t):.1f} ms" for name, t in times.items())
    say(f"{rows} x {tokens}: {shown} ({len(times[OURS])} repetitions)")
    return shape


def _min_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosines = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return float(cosines.min())


def _result(size: str, seconds: float, threads: int, shapes: list[Shape]) -> Result:
    agree = all(s.min_cosine[OURS] >= MIN_COSINE for s in shapes)
    rows = []
    for s in shapes:
        for name, times in s.times_ms.items():
            rows.append(
                [
                    f"{s.rows} x {s.tokens}",
                    name,
                    f"{median(times):.1f}",
                    f"{min(times):.1f}",
                    f"{s.rows * s.tokens / median(times) * 1e3:.0f}",
                    "" if name == OURS else f"{s.ratio(name):.2f}",
                    "" if name == OURS else f"{s.ratio_of_minima(name):.2f}",
                    f"{s.min_cosine[name]:.7f}",
                    str(len(times)),
                ]
            )
    return Result(
        name="latency",
        title=f"Engine latency, {size} on {threads} CPU threads",
        command=f"python -m bench latency --size {size} --seconds {seconds:g}",
        columns=[
            *("rows x tokens", "engine", "median ms", "min ms", "tokens/s"),
            *("median / f2rt's", "min / f2rt's", "min cosine to fp32", "repetitions"),
        ],
        rows=rows,
        notes=[
            "f2rt fp32: the exported graph in ONNX Runtime; transformers: AutoModel, sdpa, inference mode, attention "
            "mask given, then last-token pooling and normalization",
            "the same random token ids for all; turns taken in every repetition; random weights of the true shape",
            "above 1, f2rt is faster; where other work ran meanwhile, trust the ratio of minima",
            f"f2rt agrees with transformers fp32 (cosine at least {MIN_COSINE}): {'yes' if agree else 'NO'}",
        ],
        data={
            "size": size,
            "threads": threads,
            "agree": agree,
            "shapes": [
                {
                    "rows": s.rows,
                    "tokens": s.tokens,
                    "median_ms": {n: median(t) for n, t in s.times_ms.items()},
                    "min_ms": {n: min(t) for n, t in s.times_ms.items()},
                    "ratio_to_f2rt": {n: s.ratio(n) for n in s.times_ms},
                    "ratio_of_minima_to_f2rt": {n: s.ratio_of_minima(n) for n in s.times_ms},
                    "min_cosine": s.min_cosine,
                    "times_ms": {n: [round(v, 3) for v in t] for n, t in s.times_ms.items()},
                }
                for s in shapes
            ],
        },
    )


def say(text: str) -> None:
    """Tell on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)
