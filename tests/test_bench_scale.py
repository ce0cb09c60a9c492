"""The measurement at scale: all steps on the mini checkpoint, and what is said of steps that do not end well."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import scale
from bench.__main__ import app
from bench.scale import DONE, FAILED, NO_MEMORY, NO_TIME, SKIPPED, Outcome, Step, run_step

STEPS = ["fp32 export", "probe", "fp16 export", "int8 export", "fp16 build", "int8 build"]


def run(results: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Measure the mini checkpoint; return the steps by name."""
    options = ["--size", "mini", "--calibration-texts", "4", "--profile", "1x16"]
    folders = ["--work", str(results / "work"), "--results", str(results)]
    done = CliRunner().invoke(app, ["scale", *options, *folders, *arguments])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((results / "scale-mini.json").read_text()) == said
    assert not list((results / "work").iterdir())
    return {step["step"]: step for step in said["steps"]}


def table(results: Path) -> dict[str, str]:
    """The outcome of each step, as people read it."""
    lines = [line for line in (results / "scale-mini.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[5] for row in cells}


@pytest.mark.slow
def test_every_step_has_time_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = run(tmp_path)
    assert list(found) == STEPS
    for step in found.values():
        assert step["state"] == DONE, step
        assert 0.1 < step["seconds"] < 300
        assert 20e6 < step["peak_private_bytes"] < step["peak_bytes"] < 4e9
        assert step["made_bytes"] > 0
        assert sum(s["seconds"] for s in step["stages"]) == pytest.approx(step["seconds"], abs=0.2)
    assert table(tmp_path) == dict.fromkeys(STEPS, DONE)
    # What the probe found is not looked for again.
    labels = {name: [s["label"] for s in found[name]["stages"]] for name in ("probe", "fp16 export", "int8 export")}
    assert "probe" in labels["probe"]
    assert "probe" not in labels["fp16 export"] + labels["int8 export"]
    assert {"INT8: search", "INT8: sensitivity"} <= set(labels["int8 export"])


def test_without_memory_the_step_ends_and_what_needs_it_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(scale, "LEAST_FREE_BYTES", 1 << 60)
    found = run(tmp_path)
    assert found["fp32 export"]["state"] == NO_MEMORY
    assert {step["state"] for name, step in found.items() if name != "fp32 export"} == {SKIPPED}
    said = table(tmp_path)
    assert said["fp32 export"].startswith("memory ran out: ended when the machine had less than")
    assert said["int8 build"] == "not tried: it needs the int8 export"


def test_without_time_nothing_more_is_begun(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = run(tmp_path, "--seconds", "0")
    assert {step["state"] for step in found.values()} == {SKIPPED}


def child(monkeypatch: pytest.MonkeyPatch, script: str, deadline_s: float | None = None) -> Outcome:
    """Run `script` in the place of a step."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    return run_step(Step("a step", "synth"), Path("nowhere"), deadline)


def test_memory_of_a_stage_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = child(
        monkeypatch,
        """
import time
def tell(label): print('{"label": "%s", "done": 1, "total": 2}' % label, flush=True)
tell("small"); time.sleep(0.5)
tell("large"); held = bytearray(b"x") * 200_000_000; time.sleep(0.5); del held
tell("small again"); time.sleep(0.5)
tell("small"); time.sleep(0.5)
print("a library's words"); print('{"tokens": 7}'); print('{"bytes": 5}')
""",
    )
    stages = {stage.label: stage for stage in outcome.stages}
    assert list(stages) == ["start", "large", "small again", "small"]
    assert stages["large"].peak_private_bytes > 200e6 > 100e6 > stages["small"].peak_private_bytes
    assert 200e6 < outcome.peak_private_bytes <= outcome.peak_bytes < 400e6
    assert all(stages[name].seconds > 0.4 for name in ("large", "small again"))
    assert stages["small"].seconds > 0.8
    assert sum(stage.seconds for stage in outcome.stages) == pytest.approx(outcome.seconds, abs=0.2)
    assert (outcome.state, outcome.made_bytes, outcome.facts) == (DONE, 5, {"tokens": 7})


@pytest.mark.parametrize(
    ("script", "state", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", NO_MEMORY, "killed by the system"),
        ("raise ValueError('broken')", FAILED, "ended with status 1: ValueError: broken"),
        ("""print('{"error": "it ran out of memory."}'); raise SystemExit(1)""", NO_MEMORY, "it ran out of memory."),
        ("""print('{"error": "no such graph."}'); raise SystemExit(1)""", FAILED, "no such graph."),
    ],
)
def test_how_a_step_failed_is_said(script: str, state: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = child(monkeypatch, script)
    assert (outcome.state, outcome.reason) == (state, reason)


def test_a_step_is_ended_when_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """import time; print('{"label": "probe: layer 3", "done": 1, "total": 9}', flush=True); time.sleep(60)"""
    outcome = child(monkeypatch, script, 1.0)
    assert outcome.state == NO_TIME
    assert 0.9 < outcome.seconds < 30
    assert scale._cells(outcome)[5] == "time ran out: ended, at probe: layer 3, 1 of 9"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--size", "1B", "no size '1B'"),
        ("--target", "sm1", "does not build for 'sm1'"),
        ("--profile", "1x", "'1x' is no profile"),
    ],
)
def test_what_cannot_be_measured_is_refused(option: str, value: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = CliRunner().invoke(app, ["scale", option, value, "--results", str(tmp_path / "results")])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "results").exists()


def test_a_disk_too_small_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(scale, "_DISK_PER_PARAMETER", 10**9)
    done = CliRunner().invoke(app, ["scale", "--work", str(tmp_path), "--results", str(tmp_path / "results")])
    assert done.exit_code == 2
    assert "GB are free" in done.output
