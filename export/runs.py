"""One engine, run in each way that has gone wrong somewhere, row by row against the reference.

Single texts, batches, another order, equal lengths (where a missing causal mask hides), heavy padding (where a missing
length hides), the same texts again, another number of threads, and cut to each trained dimension.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from export.reference import ReferenceVectors, unit
from export.report.data import Check, Latency
from export.samples import Progress, Sample, Vectors
from runtime.batch import make_batch
from runtime.bundle import Contract
from runtime.embedder import finish
from runtime.engines import Engine
from runtime.golden import row_cosines
from runtime.tolerances import Tolerance

BATCH_ROWS = 16
BATCHED_TEXT_TOKENS = 256  # longer texts are compared singly: in a batch they would only cost padding
PERMUTED_TEXTS = 256
EQUAL_LENGTH_TOKENS = 32
PADDED_TEXT_TOKENS = 16
PADDED_WIDTH_TOKENS = 512
PADDED_ROWS = 8
AGAIN_TEXTS = 32
_TIMED_SHAPES = ((1, 16), (1, 128))
_TIMED_RUNS = 5

OpenWithThreads = Callable[[int], Engine]


class Runs:
    """One engine and its samples; `single` keeps its vectors for single texts, in the order of the samples."""

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        contract: Contract,
        reference: ReferenceVectors,
        progress: Progress,
    ) -> None:
        """Run every sample singly. Raises EngineError."""
        self._engine = engine
        self._samples = samples
        self._contract = contract
        self._reference = reference
        self._progress = progress
        self.single = self._batches(engine, [[s.ids] for s in samples], "single texts")

    def checks(self, limits: Tolerance, reopen: OpenWithThreads | None) -> list[Check]:
        """Return all checks. `reopen` gives the same engine with another number of threads, where it has threads."""
        expected = np.stack([s.vector for s in self._samples])
        results = [compare("single", self.single, expected, limits)]
        results += self._batched(expected, limits)
        results += self._equal_length(limits)
        results += self._padded(expected, limits)
        results += self._again(expected, limits, reopen)
        for dim in self._contract.trained_dims[:-1]:
            cut = np.stack([unit(row[:dim]) for row in expected])
            results.append(compare(f"dim {dim}", finish(self.single, dim, True), cut, limits))
        return results

    def latency(self) -> list[Latency]:
        """Time a few shapes, as an indication."""
        longest = self._engine.max_tokens or self._contract.max_tokens
        ids = max((s.ids for s in self._samples), key=len)
        results = []
        for rows, tokens in _TIMED_SHAPES:
            if tokens > longest:
                continue
            row = (ids * -(-tokens // len(ids)))[:tokens]
            batch = make_batch([row] * rows, self._contract.pad_id)
            self._engine.run(batch)
            times = []
            for _ in range(_TIMED_RUNS):
                start = time.perf_counter()
                self._engine.run(batch)
                times.append(time.perf_counter() - start)
            results.append(Latency(rows, tokens, _TIMED_RUNS, round(1000 * float(np.median(times)), 4)))
        return results

    def _batched(self, expected: Vectors, limits: Tolerance) -> list[Check]:
        """Group by length, as the scheduler does, and a sample in any order: there padding is heavy."""
        order = [i for i, s in enumerate(self._samples) if len(s.ids) <= BATCHED_TEXT_TOKENS]
        shuffled = [order[i] for i in np.random.default_rng(0).permutation(len(order))][:PERMUTED_TEXTS]
        results = []
        for name, indices in (
            ("batch", sorted(order, key=lambda i: len(self._samples[i].ids))),
            ("permuted", shuffled),
        ):
            if not indices:
                continue
            groups = [indices[i : i + BATCH_ROWS] for i in range(0, len(indices), BATCH_ROWS)]
            vectors = self._batches(self._engine, [[self._samples[i].ids for i in g] for g in groups], name)
            results.append(compare(name, vectors, expected[indices], limits, single=self.single[indices]))
        return results

    def _equal_length(self, limits: Tolerance) -> list[Check]:
        """Cut texts to one length, EOS kept last: nothing is padded, so a mask that leans on padding shows."""
        eos = self._contract.eos_id
        long = [s for s in self._samples if len(s.ids) >= EQUAL_LENGTH_TOKENS][: 2 * BATCH_ROWS]
        if not long:
            return []
        rows = [[*s.ids[: EQUAL_LENGTH_TOKENS - 1], eos] for s in long]
        expected = np.stack([self._reference.embed(ids) for ids in rows])
        groups = [rows[i : i + BATCH_ROWS] for i in range(0, len(rows), BATCH_ROWS)]
        return [compare("equal length", self._batches(self._engine, groups, "equal length"), expected, limits)]

    def _padded(self, expected: Vectors, limits: Tolerance) -> list[Check]:
        """Put short texts into a wide batch: nearly everything in it is padding."""
        short = [i for i, s in enumerate(self._samples) if len(s.ids) <= PADDED_TEXT_TOKENS][:PADDED_ROWS]
        if not short:
            return []
        width = min(PADDED_WIDTH_TOKENS, self._contract.max_tokens)
        batch = make_batch([self._samples[i].ids for i in short], self._contract.pad_id, width=width)
        return [compare("padded", self._engine.run(batch), expected[short], limits, single=self.single[short])]

    def _again(self, expected: Vectors, limits: Tolerance, reopen: OpenWithThreads | None) -> list[Check]:
        """Run some texts a second time, and once more on one thread: what differs is not deterministic."""
        some = [i for i, s in enumerate(self._samples) if len(s.ids) <= BATCHED_TEXT_TOKENS][:AGAIN_TEXTS]
        if not some:
            return []
        groups = [[self._samples[i].ids] for i in some]
        here, single = expected[some], self.single[some]
        found = self._batches(self._engine, groups, "repeat")
        results = [compare("repeat", found, here, limits, single=single)]
        if reopen is not None:
            with contextlib.closing(reopen(1)) as engine:
                found = self._batches(engine, groups, "one thread")
            results.append(compare("one thread", found, here, limits, single=single))
        return results

    def _batches(self, engine: Engine, groups: Sequence[Sequence[list[int]]], label: str) -> Vectors:
        parts = []
        for index, group in enumerate(groups):
            self._progress(f"{engine.name}: {label}", index, len(groups))
            parts.append(engine.run(make_batch(group, self._contract.pad_id)))
        self._progress(f"{engine.name}: {label}", len(groups), len(groups))
        return np.concatenate(parts)


def compare(name: str, found: Vectors, expected: Vectors, limits: Tolerance, *, single: Vectors | None = None) -> Check:
    """Compare rows of unit vectors [rows, dim] with the reference, each row for itself, in float64."""
    cosines = row_cosines(found, expected)
    wide = found.astype(np.float64)
    non_finite = int(np.count_nonzero(~np.isfinite(wide)))
    clean = np.nan_to_num(wide, nan=2.0, posinf=2.0, neginf=-2.0)
    max_abs_diff = float(np.abs(clean - expected).max())
    norm_error = float(np.abs(np.linalg.norm(clean, axis=1) - 1).max())
    problems = []
    if non_finite:
        problems.append(f"{non_finite} values are not finite")
    if cosines.min() < limits.min_cosine:
        problems.append(f"min cosine {cosines.min():.7f} is below {limits.min_cosine}")
    if cosines.mean() < limits.mean_cosine:
        problems.append(f"mean cosine {cosines.mean():.7f} is below {limits.mean_cosine}")
    if max_abs_diff > limits.max_abs_diff:
        problems.append(f"max |diff| {max_abs_diff:.1e} is above {limits.max_abs_diff}")
    if norm_error > limits.norm_error:
        problems.append(f"norm error {norm_error:.1e} is above {limits.norm_error}")
    return Check(
        name=name,
        rows=len(found),
        cosine_min=float(cosines.min()),
        cosine_p01=float(np.quantile(cosines, 0.01)),
        cosine_mean=float(cosines.mean()),
        max_abs_diff=max_abs_diff,
        norm_error_max=norm_error,
        non_finite=non_finite,
        verdict="fail" if problems else "pass",
        problems=problems,
        vs_single_min_cosine=None if single is None else float(row_cosines(found, single).min()),
    )
