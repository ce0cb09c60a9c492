"""The GPU check without a GPU: what it says then, what it prepares, and how it bounds its contestants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu_check import Contestant, rows_of
from bench.gpu_table import Row, table

ROOT = Path(__file__).parent.parent


def command(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "bench.gpu_check", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


# --- without a GPU, for real


def test_without_a_gpu_everything_is_skipped_by_name(tmp_path: Path) -> None:
    """-S: not even site-packages are there for the command itself."""
    done = command("--results", str(tmp_path / "results"), python=("-S",))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    whole = json.loads(lines[-1])
    assert whole["counts"] == {"ok": 0, "skipped": 39, "failed": 0}
    assert {row["reason"] for row in whole["results"]} == {"no CUDA device"}
    assert {row["size"] for row in whole["results"]} == {"mini", "0.6B", "4B"}
    for name in (
        "torch fp16 compiled",
        "torch bf16 eager",
        "tensorrt:int8",
        "tensorrt-rtx:fp16",
        "onnxruntime-cuda:fp16",
    ):
        assert sum(name in line and "skipped: no CUDA device" in line for line in lines) == 3, name
    assert "no CUDA device here: nothing was executed, nothing was measured and no result was written." in done.stdout
    assert not (tmp_path / "results").exists()


def test_make_runs_it(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "gpu-check", "SECONDS_GPU=77"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "-m bench.gpu_check --seconds 77" in done.stdout, done.stderr


def test_unknown_size_is_refused() -> None:
    done = command("--sizes", "7B")
    assert done.returncode == 2
    assert "choose of 0.6B, mini, 4B" in done.stderr


def test_preparing_needs_a_folder_to_find_again() -> None:
    done = command("--prepare")
    assert done.returncode == 2
    assert "--prepare needs --work" in done.stderr


def test_what_is_left_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("--leave-out", "4B onnxruntime-cuda:int4")
    assert done.returncode == 2
    assert "--leave-out '4B onnxruntime-cuda:int4' is none of: 0.6B onnxruntime-cuda:fp16, " in done.stderr
    order = [Contestant("torch fp16 eager", "4B", ["never_started"])]
    monkeypatch.setattr(gpu_check, "device", lambda: {"gpu": "a double"})
    monkeypatch.setattr(gpu_check, "contestants", lambda sizes, work: order)
    _, (row,) = gpu_check.check(["4B"], 100.0, tmp_path, ["4B torch fp16 eager"])
    assert (row.status, row.reason) == ("skipped", "left out of this run")


def test_preparing_says_what_it_made_and_what_not(
    player: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exports of one size follow one another, since they share a checkpoint; the rest goes beside them."""
    first = player("import time; time.sleep(1); open('first', 'w'); print('{\"check\": \"prepared\"}')", "export fp16")
    second = player("open('first').close(); print('{\"check\": \"prepared\"}')", "export fp32")
    broken = player("raise ValueError('broken')", "torch fp16 compiled")
    absent = player('print(\'{"skipped": "no CUDA"}\')', "torch bf16 compiled")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))  # four at once
    monkeypatch.setattr(gpu_check, "preparations", lambda sizes, work, out: [first, broken, absent, second])
    rows = gpu_check.prepare(["mini"], tmp_path, 60.0)
    assert {(row.engine, row.status) for row in rows} == {
        ("export fp16", "ok"),
        ("export fp32", "ok"),
        ("torch fp16 compiled", "failed"),
        ("torch bf16 compiled", "skipped"),
    }
    said = capfd.readouterr().err
    assert "mini export fp32: done, " in said
    assert "mini torch fp16 compiled: failed: ended with status 1: ValueError: broken, " in said
    assert "mini torch bf16 compiled: skipped: no CUDA, " in said


def test_preparations_are_what_a_run_looks_for(tmp_path: Path) -> None:
    out = ["4B onnxruntime-cuda:fp32", "4B torch bf16 compiled"]
    jobs = gpu_check.preparations(["mini", "4B"], tmp_path, out)
    assert [job.name for job in jobs if job.size == "mini"] == [
        *("export fp16", "export bf16", "export int8", "export fp32"),
        *("torch fp16 compiled", "torch bf16 compiled"),
    ]
    four = [job.name for job in jobs if job.size == "4B"]
    assert four == ["export fp16", "export bf16", "export int8", "torch fp16 compiled"]
    timed = {(c.size, c.name) for c in gpu_check.contestants(["mini", "4B"], tmp_path)}
    assert {(job.size, job.name) for job in jobs if job.name.startswith("torch")} <= timed
    assert all("--prepare" in job.command for job in jobs)


def test_an_export_is_really_prepared(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "F2RT_CACHE": str(tmp_path / "cache")}
    made = []
    for _ in range(2):
        arguments = ["--size", "mini", "--precision", "fp32", "--work", str(tmp_path), "--prepare"]
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu_engines", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert [json.loads(line) for line in done.stdout.splitlines()] == [{"check": "prepared"}], done.stderr
        made.append((tmp_path / "bundle-mini-fp32" / "manifest.json").stat().st_mtime_ns)
    assert made[0] == made[1]  # found again


# --- the orchestra


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a maker of contestants that run a few lines of Python."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_GRACE_S", 0.5)
    made = 0

    def make(source: str, name: str = "engine") -> Contestant:
        nonlocal made
        made += 1
        (tmp_path / f"player{made}.py").write_text(source)
        return Contestant(name, "mini", [f"player{made}"])

    return make


def played(contestant: Contestant, seconds: float = 20.0) -> list[Row]:
    return list(rows_of(contestant, gpu_check.run(contestant, seconds)))


def test_lines_become_rows(player: Any) -> None:
    good = player(
        "import json\nprint('noise')\n"
        "print(json.dumps({'check': 'runs', 'finite': True, 'build_s': 1, 'load_s': 2}))\n"
        "print(json.dumps({'rows': 1, 'tokens': 32, 'median_ms': 2.0}))\n"
        "print(json.dumps({'rows': 8, 'tokens': 32, 'skipped': 'out of time'}))\n"
        "print(json.dumps({'check': 'parity', 'verdict': 'fail', 'problems': ['single: min cosine']}))\n"
        "print(json.dumps({'check': 'parity', 'verdict': 'not_executed', 'reason': 'no GPU'}))\n"
        "print(json.dumps({'check': 'runs', 'finite': False}))\n"
    )
    rows = played(good)
    assert [(r.check, r.status, r.reason) for r in rows] == [
        ("runs", "ok", ""),
        ("latency", "ok", ""),
        ("latency", "skipped", "out of time"),
        ("parity", "failed", "single: min cosine"),
        ("parity", "skipped", "no GPU"),
        ("runs", "failed", "a vector is not finite"),
    ]


def test_helper_that_outlives_its_contestant_holds_nothing_up(player: Any, tmp_path: Path) -> None:
    """A process in a session of its own is not ours to end; the check goes on without it."""
    left = player(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(15)'], start_new_session=True)\n"
        'print(\'{"rows": 1, "tokens": 2}\', flush=True)\n'
    )
    start = time.monotonic()
    assert [row.status for row in played(left, 60.0)] == ["ok"]
    assert time.monotonic() - start < 12


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise ValueError('broken')", "failed", "ended with status 1: ValueError: broken"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended with status -11"),
        ("import a_library_nobody_has", "skipped", "not installed: No module named 'a_library_nobody_has'"),
        (
            "class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory.')",
            "skipped",
            "no memory: ",
        ),
    ],
    ids=["exception", "crash", "missing", "memory"],
)
def test_death_of_a_contestant_is_its_own(player: Any, source: str, status: str, reason: str) -> None:
    rows = played(player(f'print(\'{{"rows": 1, "tokens": 2}}\', flush=True)\n{source}'))
    assert rows[0].status == "ok"  # what it had done is kept
    assert (rows[1].status, len(rows)) == (status, 2)
    assert rows[1].reason.startswith(reason)


def test_contestant_that_hangs_is_ended_with_its_children(player: Any, tmp_path: Path) -> None:
    hanging = player(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        'print(\'{"rows": 1, "tokens": 2}\', flush=True)\ntime.sleep(600)\n'
    )
    start = time.monotonic()
    rows = played(hanging, 3.0)
    assert time.monotonic() - start < 30
    assert [r.status for r in rows] == ["ok", "skipped"]
    assert rows[1].reason.startswith("out of time after")
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """A process that was killed and not yet collected by anybody counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_is_bounded_and_what_is_missing_is_missing_once(
    player: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = player("import json; print(json.dumps({'skipped': 'tensorrt is not installed here'}))", "tensorrt:fp16")
    works = player('print(\'{"rows": 1, "tokens": 2, "median_ms": 3.0}\')', "torch fp16 eager")
    silent = player("", "silent")
    late = player("raise SystemExit('never started')", "late")
    order = [works, missing, Contestant("tensorrt:fp16", "4B", ["never_started"]), silent, late]
    monkeypatch.setattr(gpu_check, "device", lambda: {"gpu": "a double"})
    monkeypatch.setattr(gpu_check, "contestants", lambda sizes, work: order)
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 95.0])

    class Time:
        monotonic = staticmethod(lambda: next(clock, 95.0))

    real = gpu_check.run
    monkeypatch.setattr(gpu_check, "time", Time)
    monkeypatch.setattr(gpu_check, "run", lambda contestant, seconds: timed(real, contestant))

    def timed(run: Any, contestant: Contestant) -> list[dict[str, Any]]:
        monkeypatch.setattr(gpu_check, "time", time)
        lines = list(run(contestant, 20.0))
        monkeypatch.setattr(gpu_check, "time", Time)
        return lines

    facts, rows = gpu_check.check(["mini"], 100.0, tmp_path)
    assert facts == {"gpu": "a double"}
    assert [(r.engine, r.size, r.status, r.reason) for r in rows] == [
        ("torch fp16 eager", "mini", "ok", ""),
        ("tensorrt:fp16", "mini", "skipped", "tensorrt is not installed here"),
        ("tensorrt:fp16", "4B", "skipped", "tensorrt is not installed here"),
        ("silent", "mini", "failed", "it printed nothing"),
        ("late", "mini", "skipped", "out of time"),
    ]


def test_table_compares_with_the_fastest_torch() -> None:
    def latency(engine: str, ms: float, size: str = "mini") -> Row:
        numbers = {"rows": 8, "tokens": 32, "median_ms": ms, "texts_per_s": 8e3 / ms}
        return Row("latency", engine, size, "ok", "", numbers)

    rows = [
        latency("torch fp16 eager", 4.0),
        latency("torch fp16 compiled", 3.0),
        latency("tensorrt:fp16", 1.5),
        latency("tensorrt:fp16", 1.5, "4B"),
        Row("runs", "tensorrt:fp16", "mini", "ok", "", {"build_s": 9.0, "load_s": 0.5, "finite": True}),
        Row("parity", "tensorrt:fp16", "mini", "ok", "", {"verdict": "pass", "min_cosine": 0.9999, "texts": 202}),
    ]
    lines = table(rows)
    assert [line[6] for line in lines] == ["0.75", "1.00", "2.00", "", "", ""]
    assert lines[2][3:6] == ["8 x 32", "1.500", "5333.333"]
    assert lines[4][7] == "ok, built in 9.0 s, loaded in 0.5 s"
    assert lines[5][7] == "ok, min cosine 0.999900 on 202 texts"
