"""Everything that needs an NVIDIA GPU, in one run: which engines load and run, parity, latency beside torch.

    python -m bench.gpu_check --seconds 1500

Runs as it stands on a machine with torch and CUDA alone (PYTHONPATH at the project's root): this file needs the
standard library only. Each contestant is a process of its own with its own share of the time, so one that crashes,
hangs or fills the GPU takes nothing else with it. What is missing is skipped by name, with the reason. One table and
one line of JSON are printed, and written to bench/results/gpu.md and gpu.json when something ran.

    python -m bench.gpu_check --work DIR --prepare

does beforehand, side by side, what takes long and is not timed: checkpoints and exports, which need no GPU, and what
torch compiles, which does. A run with the same --work finds it there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_table import Row, markdown, plain, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SIZES = ("0.6B", "mini", "4B")  # in the order in which time is spent
_TORCH = [(dtype, mode) for dtype in ("float16", "bfloat16") for mode in ("eager", "compiled")]
_ENGINES = [
    *((backend, precision) for backend in ("tensorrt", "tensorrt-rtx") for precision in ("fp16", "bf16", "int8")),
    *(("onnxruntime-cuda", precision) for precision in ("fp16", "fp32", "int8")),
]
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}
_CORES_EACH = 3  # of what is prepared side by side
_LEAST_SHARE_S = 60.0
_GRACE_S = 30.0  # beyond its share, before a contestant is ended

# Torch may be there without CUDA, or not at all: the device is asked in both ways.
PROBE = """
import json
facts = {}
try:
    import torch
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {"gpu": p.name, "sm": f"sm{p.major}{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1)}
except ImportError:
    facts = {"torch": None}
if "gpu" not in facts:
    try:
        from cuda.bindings import runtime
        error, count = runtime.cudaGetDeviceCount()
        if int(error) == 0 and count:
            p = runtime.cudaGetDeviceProperties(0)[1]
            name = bytes(p.name).split(b"\\0")[0].decode()
            facts |= {"gpu": name, "sm": f"sm{p.major}{p.minor}", "memory_gb": round(p.totalGlobalMem / 1e9, 1)}
    except ImportError:
        pass
from importlib import metadata
for package in ("onnxruntime-gpu", "tensorrt-cu13-libs", "tensorrt-rtx-cu13-libs", "cuda-bindings"):
    try:
        facts[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Contestant:
    """One process: its name in the table, the size it runs, and its command."""

    name: str
    size: str
    command: list[str]


def contestants(sizes: list[str], work: Path) -> list[Contestant]:
    """Return who runs, in order: for each size torch, then every engine flavour and precision."""
    found = []
    for size in sizes:
        for dtype, mode in _TORCH:
            command = ["bench.gpu_torch", "--size", size, "--dtype", dtype, "--mode", mode]
            found.append(Contestant(f"torch {_SHORT[dtype]} {mode}", size, command))
        for backend, precision in _ENGINES:
            command = ["bench.gpu_engines", "--size", size, "--backend", backend, "--precision", precision]
            found.append(Contestant(f"{backend}:{precision}", size, [*command, "--work", str(work)]))
    return found


def preparations(sizes: list[str], work: Path, left_out: Collection[str] = ()) -> list[Contestant]:
    """Return what can be made before anything is timed; the exports of one size share a checkpoint."""
    found = []
    for size in sizes:
        engines = [(b, p) for b, p in _ENGINES if f"{size} {b}:{p}" not in left_out]
        for precision in dict.fromkeys(precision for _, precision in engines):
            command = ["bench.gpu_engines", "--size", size, "--work", str(work), "--precision", precision, "--prepare"]
            found.append(Contestant(f"export {precision}", size, command))
        for dtype, short in _SHORT.items():
            command = ["bench.gpu_torch", "--size", size, "--dtype", dtype, "--mode", "compiled", "--prepare"]
            if f"{size} torch {short} compiled" not in left_out:
                found.append(Contestant(f"torch {short} compiled", size, command))
    return found


def prepare(sizes: list[str], work: Path, seconds: float, left_out: Collection[str] = ()) -> list[Row]:
    """Make everything of `preparations`, as many at once as the cores allow, each within `seconds`."""
    chains: dict[str, list[Contestant]] = {}
    for job in preparations(sizes, work, left_out):
        chains.setdefault(job.size if job.name.startswith("export") else f"{job.size} {job.name}", []).append(job)

    def make(chain: list[Contestant]) -> list[Row]:
        rows = []
        for job in chain:
            started = time.monotonic()
            found = list(rows_of(job, run(job, seconds)))
            worst = next((row for row in found if row.status != "ok"), Row("prepared", job.name, job.size, "ok"))
            what = f"{worst.status}: {worst.reason}" if worst.reason else "done"
            print(f"{job.size} {job.name}: {what}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            rows.append(worst)
        return rows

    at_once = max(1, len(os.sched_getaffinity(0)) // _CORES_EACH)
    with ThreadPoolExecutor(at_once) as pool:
        return [row for rows in pool.map(make, chains.values()) for row in rows]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def device() -> dict[str, Any]:
    """Return the facts of the GPU as a process of its own sees it; no "gpu" among them means that there is none."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300, check=False)
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines()
        facts = {"torch": None, "problem": lines[-1] if lines else "no answer"}
    return facts | {"python": platform.python_version(), "driver": driver()}


def driver() -> str | None:
    """Return the NVIDIA driver's version."""
    with suppress(OSError):
        version = Path("/sys/module/nvidia/version")
        if version.is_file():
            return version.read_text().strip()
    return None


def run(contestant: Contestant, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a contestant's lines as they come; past its time it is ended, and what it has not done is said."""
    process = subprocess.Popen(
        [sys.executable, "-m", *contestant.command, "--seconds", f"{seconds:.0f}"],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its own helpers end with it
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda x: errors.append(x or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    end = time.monotonic() + seconds + _GRACE_S
    try:
        while True:
            if time.monotonic() >= end:
                yield {"skipped": f"out of time after {seconds + _GRACE_S:.0f} s"}
                return
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                if process.poll() is not None:
                    break
                continue
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait(timeout=_GRACE_S) != 0:
            readers[1].join(_GRACE_S)
            yield _death(process.returncode, "".join(errors))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(_GRACE_S)  # longer only where a helper in a session of its own still holds the pipe


def _read(stream: Any, put: Any) -> None:
    with stream:
        for line in stream:
            put(line)
    put(None)


def _death(status: int, errors: str) -> dict[str, Any]:
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    if "ModuleNotFoundError" in last:
        return {"skipped": f"not installed: {last.partition(': ')[2]}"}
    if "OutOfMemory" in last or "out of memory" in last:
        return {"skipped": f"no memory: {last[:200]}"}
    return {"failed": f"ended with status {status}: {last[:300]}"}


def rows_of(contestant: Contestant, lines: Iterator[dict[str, Any]]) -> Iterator[Row]:
    """Turn a contestant's lines into rows of the result."""
    for line in lines:
        check = line.pop("check", "latency" if "rows" in line else "all")
        skipped, failed = line.pop("skipped", ""), line.pop("failed", "")
        if check == "parity" and line["verdict"] != "pass":
            problem = line.get("reason") or "; ".join(line.get("problems", []))
            skipped, failed = (problem, "") if line["verdict"] == "not_executed" else ("", problem or "below a limit")
        if check == "runs" and not line["finite"]:
            failed = "a vector is not finite"
        status = "skipped" if skipped else "failed" if failed else "ok"
        yield Row(check, contestant.name, contestant.size, status, skipped or failed, line)


def check(
    sizes: list[str], seconds: float, work: Path, left_out: Collection[str] = ()
) -> tuple[dict[str, Any], list[Row]]:
    """Run everything within `seconds`, a grace for the last one aside. Returns the device's facts and the rows."""
    facts = device()
    everyone = contestants(sizes, work)
    if "gpu" not in facts:
        return facts, [Row("all", c.name, c.size, "skipped", "no CUDA device") for c in everyone]
    end = time.monotonic() + seconds
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for index, contestant in enumerate(everyone):
        left = end - time.monotonic()
        if contestant.name in absent:  # what is missing for one size is missing for all
            rows.append(Row("all", contestant.name, contestant.size, "skipped", absent[contestant.name]))
            continue
        if f"{contestant.size} {contestant.name}" in left_out:
            rows.append(Row("all", contestant.name, contestant.size, "skipped", "left out of this run"))
            continue
        if left < _LEAST_SHARE_S / 2:
            rows.append(Row("all", contestant.name, contestant.size, "skipped", "out of time"))
            continue
        share = min(left, max(_LEAST_SHARE_S, 2 * left / (len(everyone) - index)))
        print(f"{contestant.size} {contestant.name}: up to {share:.0f} s", file=sys.stderr, flush=True)
        found = list(rows_of(contestant, run(contestant, share)))
        found = found or [Row("all", contestant.name, contestant.size, "failed", "it printed nothing")]
        print("\n".join(json.dumps(vars(row)) for row in found), file=sys.stderr, flush=True)
        rows += found
        if [(row.check, row.status) for row in found] == [("all", "skipped")] and "out of time" not in found[0].reason:
            absent[contestant.name] = found[0].reason
    return facts, rows


def main() -> None:
    """Run the check; exits with 0 unless something that could run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500.0, help="for everything together")
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated, in order: mini, 0.6B, 4B")
    parser.add_argument(
        "--work",
        type=Path,
        help="where checkpoints and exports stay and are found again; a temporary folder by default",
    )
    parser.add_argument("--note", default="", help="what to know of this run, for the results")
    parser.add_argument("--leave-out", default="", help='comma-separated, such as "4B onnxruntime-cuda:int8"')
    parser.add_argument("--prepare", action="store_true", help="make what is not timed, and stop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where gpu.json and gpu.md go")
    options = parser.parse_args()
    sizes = [size.strip() for size in options.sizes.split(",") if size.strip()]
    if not sizes or set(sizes) - set(SIZES):
        parser.error(f"--sizes {options.sizes!r}: choose of {', '.join(SIZES)}")
    left_out = [name.strip() for name in options.leave_out.split(",") if name.strip()]
    known = {f"{c.size} {c.name}" for c in contestants(sizes, Path())}
    if unknown := [name for name in left_out if name not in known]:
        parser.error(f"--leave-out {unknown[0]!r} is none of: {', '.join(sorted(known))}")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    if options.prepare and options.work is None:
        parser.error("--prepare needs --work: the folder in which the run will look")
    started = time.monotonic()
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2rt-gpu-")))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work.resolve() / "inductor"))
        if options.prepare:
            made = prepare(sizes, work, options.seconds, left_out)
            sys.exit(1 if any(row.status == "failed" for row in made) else 0)
        facts, rows = check(sizes, options.seconds, work, left_out)
    command = f"python -m bench.gpu_check --seconds {options.seconds:g} --sizes {','.join(sizes)}"
    if left_out:
        command += f' --leave-out "{",".join(left_out)}"'
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "skipped", "failed")}
    note = f"{options.note}; " if options.note else ""
    note += f"{counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped"
    lines = table(rows)
    print(plain(lines))
    whole = {
        "name": "gpu",
        "command": command,
        "device": facts,
        "note": options.note,
        "seconds": round(time.monotonic() - started, 1),
        "counts": counts,
        "results": [vars(row) for row in rows],
    }
    if counts["ok"] or counts["failed"]:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "gpu.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        (options.results / "gpu.md").write_text(markdown(lines, facts, command, note), encoding="utf-8")
        print(f"{note}; written to {options.results}")
    else:
        why = "no CUDA device here" if "gpu" not in facts else "nothing could run"
        print(f"{note}. {why}: nothing was executed, nothing was measured and no result was written.")
    print(json.dumps(whole), flush=True)
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
