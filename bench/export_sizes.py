"""What an export costs: wall time and peak memory of `f2rt export` for several sizes, beside a plain file write.

Each size is synthesized, then exported in a child process; before each export a file of as many bytes as the graph
is written with plain Python (4 MiB of random numbers at a time, then fsync). The two alternate, so both meet the
same disk. An export's time is that of the whole command: interpreter, imports, hashing the source, conversion,
writing, hashing what is written, fsync. No cache is dropped between steps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.report import Result, median
from export.config import EncoderConfig
from export.synth import SIZES, parameters, write_checkpoint
from runtime.errors import InputError

DEFAULT_SIZES = ["80M", "0.6B", "4B"]
PEAK_LIMIT_BYTES = 3_000_000_000
_BLOCK_BYTES = 4 << 20
_POOL_BLOCKS = 16
_POLL_S = 0.05
_ROOT = Path(__file__).resolve().parents[1]

# The peak is read by the process itself from its own address space. getrusage would do in principle, but its maximum
# survives exec and so includes what the parent held.
_CHILD = """
import sys
from export.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(f"peak_kib {peak}", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Export:
    """One run of the command. `peak_bytes` counts mapped file pages, `peak_private_bytes` does not."""

    seconds: float
    peak_bytes: int
    peak_private_bytes: int


@dataclass(frozen=True)
class Measurement:
    """One size. Times in seconds, one per repetition; `write_s[i]` was measured just before `exports[i]`."""

    size: str
    parameters: int
    source_bytes: int
    graph_bytes: int
    synth_s: float
    write_s: list[float]
    exports: list[Export]

    @property
    def export_s(self) -> float:
        """Median seconds of an export."""
        return median([e.seconds for e in self.exports])

    @property
    def peak_bytes(self) -> int:
        """Largest peak of all repetitions."""
        return max(e.peak_bytes for e in self.exports)

    @property
    def ratio(self) -> float:
        """Export time over write time, medians."""
        return self.export_s / median(self.write_s)


def measure(sizes: Sequence[str], work: Path, repetitions: int) -> Result:
    """Measure `sizes` in the folder `work`, which needs room for a checkpoint, its graph and one more graph."""
    unknown = [size for size in sizes if size not in SIZES]
    if unknown or not sizes:
        wrong = f"there is no size {', '.join(unknown)}." if unknown else "no size was given."
        raise InputError(wrong, cure=f"Choose of {', '.join(SIZES)}.")
    startup_s = median([_startup() for _ in range(3)])
    measurements = [_measure(size, SIZES[size], work, repetitions) for size in sizes]
    return Result(
        name="export",
        title="Export to fp32: time and peak memory",
        command=f"python -m bench export --sizes {','.join(sizes)} --repetitions {repetitions}",
        columns=[
            *("size", "source GB", "graph GB", "export s", "plain write s", "export / write", "graph MB/s"),
            *("peak RSS MB", "private MB", "synth MB/s"),
        ],
        rows=[_cells(m) for m in measurements],
        notes=[
            f"medians of {repetitions} alternating repetitions; in brackets the smallest and the largest",
            "export: the whole command, with hashing of source and result; plain write: as many random bytes, "
            "4 MiB at a time, then fsync; no cache was dropped",
            f"{startup_s:.1f} s of every export are the interpreter's start and imports",
            "peak RSS: VmHWM of the exporting process, mapped file pages included (private: without them); limit "
            f"{PEAK_LIMIT_BYTES / 1e6:,.0f} MB: {'kept' if _kept(measurements) else 'EXCEEDED'}",
        ],
        data={
            "repetitions": repetitions,
            "peak_limit_bytes": PEAK_LIMIT_BYTES,
            "peak_limit_kept": _kept(measurements),
            "startup_s": startup_s,
            "sizes": [
                asdict(m) | {"export_s": m.export_s, "peak_bytes": m.peak_bytes, "ratio": m.ratio} for m in measurements
            ],
        },
    )


def _kept(measurements: Sequence[Measurement]) -> bool:
    return all(m.peak_bytes < PEAK_LIMIT_BYTES for m in measurements)


def _measure(size: str, config: EncoderConfig, work: Path, repetitions: int) -> Measurement:
    checkpoint, bundle, plain = work / f"checkpoint-{size}", work / f"bundle-{size}", work / f"plain-{size}"
    try:
        _say(f"{size}: synthesizing")
        start = time.perf_counter()
        write_checkpoint(size, checkpoint)
        synth_s = time.perf_counter() - start
        # The graph's size is not known before an export; fp32 has four bytes a weight, and tables besides.
        graph_bytes = 4 * parameters(config)
        write_s: list[float] = []
        exports: list[Export] = []
        for repetition in range(repetitions):
            write_s.append(_plain_write(plain, graph_bytes))
            shutil.rmtree(bundle, ignore_errors=True)
            exports.append(_export(checkpoint, bundle))
            graph_bytes = sum(f.stat().st_size for f in (bundle / "graphs").iterdir())
            took = f"write {write_s[-1]:.1f} s, export {exports[-1].seconds:.1f} s"
            _say(f"{size}: {repetition + 1}/{repetitions}: {took}")
        source_bytes = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
        return Measurement(size, parameters(config), source_bytes, graph_bytes, synth_s, write_s, exports)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)
        plain.unlink(missing_ok=True)


def _startup() -> float:
    """Return the seconds a process takes to start and import what an export needs."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import export.cli, export.pipeline, export.checkpoint"], cwd=_ROOT, check=True
    )
    return time.perf_counter() - start


def _plain_write(path: Path, count: int) -> float:
    """Write and fsync `count` bytes; return seconds. Sixteen different random blocks take turns."""
    pool = np.random.default_rng(0).bytes(_POOL_BLOCKS * _BLOCK_BYTES)
    blocks = [pool[i * _BLOCK_BYTES : (i + 1) * _BLOCK_BYTES] for i in range(_POOL_BLOCKS)]
    start = time.perf_counter()
    with path.open("wb") as file:
        for number in range(count // _BLOCK_BYTES):
            file.write(blocks[number % _POOL_BLOCKS])
        file.write(blocks[0][: count % _BLOCK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def _export(checkpoint: Path, bundle: Path) -> Export:
    command = [sys.executable, "-c", _CHILD, "export", str(checkpoint), "--out", str(bundle), "--precision", "fp32"]
    # A cache of its own, empty: every run hashes the source.
    cache = bundle.with_name(f"{bundle.name}-cache")
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, "F2RT_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    private_kib = 0
    while True:
        try:
            _, errors = child.communicate(timeout=_POLL_S)
            break
        except subprocess.TimeoutExpired:
            private_kib = max(private_kib, _private_kib(child.pid))
    seconds = time.perf_counter() - start
    if child.returncode != 0:
        raise RuntimeError(f"f2rt export failed with status {child.returncode}:\n{errors}")
    peak_kib = int(errors.strip().splitlines()[-1].removeprefix("peak_kib "))
    return Export(seconds, 1024 * peak_kib, 1024 * private_kib)


def _private_kib(pid: int) -> int:
    """Return the resident memory that is not a file's, as it is now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    return 0  # it has just ended


def _cells(m: Measurement) -> list[str]:
    exports = [e.seconds for e in m.exports]
    private = max(e.peak_private_bytes for e in m.exports)
    return [
        m.size,
        f"{m.source_bytes / 1e9:.2f}",
        f"{m.graph_bytes / 1e9:.2f}",
        f"{m.export_s:.1f} ({min(exports):.1f}-{max(exports):.1f})",
        f"{median(m.write_s):.1f} ({min(m.write_s):.1f}-{max(m.write_s):.1f})",
        f"{m.ratio:.2f}",
        f"{m.graph_bytes / m.export_s / 1e6:.0f}",
        f"{m.peak_bytes / 1e6:.0f}",
        f"{private / 1e6:.0f}",
        f"{m.source_bytes / m.synth_s / 1e6:.0f}",
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
