"""What a large checkpoint costs on this machine: time and peak memory of every step from weights to engines.

Each step is a process of its own and calls what the `f2rt` command calls: a synthetic checkpoint is written, exported
to fp32, probed on calibration texts, exported to fp16 and int8, and compiled for one GPU. A step's time is that of its
whole process, with hashing what it reads and writes. Memory is read from outside, twenty times a second, so that a
process that is killed has numbers, too.

A limit is a result. Before a step takes the last memory of the machine it is ended, and the table says how far it
came; what needs its result is left out, by name.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.inputs import private_cache
from bench.latency import say
from bench.report import Result
from bench.scale_step import BUILD, CHECKPOINT, EXPORT, PROBE, SYNTH
from calibration.texts import calibration_texts
from export.builder import resolve_target
from export.config import read_encoder_config
from export.profiles import parse_profiles
from export.synth import SIZES, default_tokenizer, parameters
from runtime.errors import InputError, OutputError

MINI = "mini"
DONE, FAILED, NO_MEMORY, NO_TIME, SKIPPED = "done", "failed", "memory ran out", "time ran out", "not tried"
LEAST_FREE_BYTES = 1 << 30  # a step that leaves the machine less than this is ended
_POLL_S = 0.05
_ROOT = Path(__file__).resolve().parents[1]
_OUT_OF_MEMORY = "ran out of memory"
_BY_PARTS = ("probe: ",)  # progress by layer, one stage here
_DISK_PER_PARAMETER = 13  # bytes: the checkpoint, three graphs, and two plans


@dataclass(frozen=True)
class Step:
    """One process: its arguments after the folder, and the steps it cannot do without."""

    name: str
    kind: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass
class Stage:
    """A part of a step as its progress names it, the latest one last. Memory is the largest seen meanwhile."""

    label: str
    seconds: float = 0.0
    peak_private_bytes: int = 0
    at: str = ""
    done: int = 0
    total: int = 0


@dataclass
class Outcome:
    """What became of a step. `peak_bytes` counts mapped file pages, `peak_private_bytes` does not."""

    step: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_private_bytes: int = 0
    made_bytes: int = 0
    stages: list[Stage] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)


def steps(size: str, calibration: str, target: str, profile: str) -> list[Step]:
    """Return the steps in order."""
    first = [] if size == MINI else [Step("synth", SYNTH, (size,))]
    needs = tuple(step.name for step in first)
    return [
        *first,
        Step("fp32 export", EXPORT, (calibration, "fp32"), needs),
        Step("probe", PROBE, (calibration,), ("fp32 export",)),
        Step("fp16 export", EXPORT, (calibration, "fp16"), ("probe",)),
        Step("int8 export", EXPORT, (calibration, "int8"), ("probe",)),
        Step("fp16 build", BUILD, ("fp16", target, profile), ("fp16 export",)),
        Step("int8 build", BUILD, ("int8", target, profile), ("int8 export",)),
    ]


def measure(
    size: str,
    work: Path,
    calibration: int | None = None,
    target: str = "sm89",
    profile: str = "latency",
    seconds: float | None = None,
) -> Result:
    """Take `size`, "mini" or one of the family, through all steps in `work`, with `calibration` texts or all.

    Ends what is running after `seconds`. Raises InputError for an unknown size, target or profile, OutputError where
    the disk is too small.
    """
    if size != MINI and size not in SIZES:
        raise InputError(f"there is no size {size!r}.", cure=f"Choose one of {', '.join((MINI, *SIZES))}.")
    resolve_target("tensorrt-rtx", target)
    config = read_encoder_config(default_tokenizer())[1] if size == MINI else SIZES[size]
    parse_profiles(profile, config.max_positions)
    weights = parameters(config)
    _check_room(work, _DISK_PER_PARAMETER * weights)
    if size == MINI:
        shutil.copytree(default_tokenizer(), work / CHECKPOINT)
    texts = "all" if calibration is None else str(calibration)
    deadline = None if seconds is None else time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    with private_cache(work):
        for step in steps(size, texts, target, profile):
            missing = [name for name in step.needs if outcomes[name].state != DONE]
            if missing:
                outcomes[step.name] = Outcome(step.name, SKIPPED, f"it needs the {missing[0]}")
            elif deadline is not None and time.monotonic() >= deadline:
                outcomes[step.name] = Outcome(step.name, SKIPPED, "the time was over")
            else:
                say(f"{size}: {step.name}")
                outcomes[step.name] = run_step(step, work, deadline)
            say(f"{size}: {' | '.join(_cells(outcomes[step.name]))}")
    return _report(size, weights, list(outcomes.values()), calibration, target, profile)


def run_step(step: Step, work: Path, deadline: float | None = None) -> Outcome:
    """Do one step in the folder `work`, until it ends, memory runs out or `deadline` (monotonic seconds) comes."""
    outcome = Outcome(step.name, DONE)
    command = [sys.executable, "-m", "bench.scale_step", step.kind, str(work.absolute()), *step.arguments]
    with tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        try:
            # Should the machine run out of memory all the same, this process ends and no other.
            Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
            _watch(child.stdout.fileno(), child, outcome, deadline)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        outcome.seconds = time.monotonic() - start
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if outcome.state == DONE and child.returncode != 0:
        outcome.state, outcome.reason = _why(child.returncode, outcome.reason, lines)
    return outcome


def _watch(pipe: int, child: subprocess.Popen[bytes], outcome: Outcome, deadline: float | None) -> None:
    """Follow the child until it closes its output, or end it."""
    began, text = time.monotonic(), b""
    while True:
        if select.select([pipe], [], [], _POLL_S)[0]:
            data = os.read(pipe, 1 << 16)
            if not data:
                child.wait()
                break
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                _note(outcome, line, time.monotonic() - began)
        _look(child.pid, outcome)
        if _available_bytes() < LEAST_FREE_BYTES:
            outcome.state = NO_MEMORY
            outcome.reason = f"ended when the machine had less than {LEAST_FREE_BYTES / 2**30:.0f} GiB left"
        elif deadline is not None and time.monotonic() >= deadline:
            outcome.state, outcome.reason = NO_TIME, "ended"
        if outcome.state != DONE:
            child.kill()
            break
    if outcome.stages:
        outcome.stages[-1].seconds += time.monotonic() - began - sum(s.seconds for s in outcome.stages)


def _note(outcome: Outcome, line: bytes, elapsed_s: float) -> None:
    """Take in one line of the child. A stage lasts until another begins; the first one, until anything was said."""
    try:
        told = json.loads(line)
    except ValueError:
        return  # a library's own words
    if not isinstance(told, dict):
        return
    if "label" in told:
        at = str(told["label"])
        label = at.partition(":")[0] if at.startswith(_BY_PARTS) else at
        stages = outcome.stages
        if not stages:
            stages.append(Stage("start", elapsed_s, outcome.peak_private_bytes))
        if stages[-1].label != label:
            stages[-1].seconds += elapsed_s - sum(s.seconds for s in stages)
            known = next((s for s in stages if s.label == label), None)
            if known is not None:  # it goes on: a builder comes back to the same phase for every profile
                stages.remove(known)
            stages.append(known or Stage(label))
        stage = outcome.stages[-1]
        stage.at, stage.done, stage.total = at, int(told["done"]), int(told["total"])
    elif "error" in told:
        outcome.reason = str(told["error"])
    elif "bytes" in told:
        outcome.made_bytes = int(told["bytes"])
    else:
        outcome.facts |= told


def _look(pid: int, outcome: Outcome) -> None:
    """Read the memory of the child as it is now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return  # it has just ended
    kib = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines) if name in _MEMORY}
    private = 1024 * kib.get("RssAnon", 0)
    outcome.peak_bytes = max(outcome.peak_bytes, 1024 * kib.get("VmHWM", 0))
    outcome.peak_private_bytes = max(outcome.peak_private_bytes, private)
    if outcome.stages:
        outcome.stages[-1].peak_private_bytes = max(outcome.stages[-1].peak_private_bytes, private)


_MEMORY = ("VmHWM", "RssAnon")


def _available_bytes() -> int:
    with Path("/proc/meminfo").open() as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _why(status: int, said: str, errors: Sequence[str]) -> tuple[str, str]:
    """Return state and reason of a step that ended by itself."""
    if said:
        return (NO_MEMORY if _OUT_OF_MEMORY in said else FAILED), said
    if status == -9:
        return NO_MEMORY, "killed by the system"
    last = f": {errors[-1]}" if errors else ""
    return FAILED, f"ended with status {status}{last}"


def _check_room(work: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(work).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"no room in {work}: it takes {needed_bytes / 1e9:.0f} GB and {free_bytes / 1e9:.0f} GB are free.",
            cure="Choose another --work.",
        )


def _report(
    size: str, weights: int, outcomes: list[Outcome], calibration: int | None, target: str, profile: str
) -> Result:
    options = f"--size {size}" + (f" --calibration-texts {calibration}" if calibration is not None else "")
    options += f" --target {target} --profile {profile}"
    found = {outcome.step: outcome for outcome in outcomes}
    used = len(calibration_texts()) if calibration is None else calibration
    tokens = found["probe"].facts.get("tokens")
    return Result(
        name=f"scale-{size}",
        title=f"{size} from checkpoint to engines: time and peak memory",
        command=f"python -m bench scale {options}",
        columns=["step", "seconds", "peak RSS GB", "private GB", "made GB", "outcome", "most of the time"],
        rows=[_cells(outcome) for outcome in outcomes],
        notes=[
            f"{weights / 1e9:.2f} billion weights; {used} calibration texts"
            + (f" of {tokens:,.0f} tokens together" if tokens else ""),
            "every step is a process of its own; its time includes starting, hashing what it reads and writing; peak "
            "RSS (VmHWM) with mapped file pages, private without them",
            "the probe runs on the fp32 graph, layer by layer; the exports of fp16 and int8 find it in the cache",
            f"builds: TensorRT-RTX for {target}, profiles {profile}; compiled, not executed",
            f"a step that leaves the machine less than {LEAST_FREE_BYTES / 2**30:.0f} GiB is ended",
            *_memory_notes(found),
        ],
        data={
            "size": size,
            "parameters": weights,
            "calibration_texts": used,
            "target": target,
            "profile": profile,
            "steps": [asdict(outcome) for outcome in outcomes],
        },
    )


def _memory_notes(found: dict[str, Outcome]) -> list[str]:
    """Say how a build's memory relates to the weights it compiles."""
    notes = []
    for precision in ("fp16", "int8"):
        build, graph = found[f"{precision} build"], found[f"{precision} export"]
        if build.peak_private_bytes and graph.made_bytes:
            private, peak = (n / graph.made_bytes for n in (build.peak_private_bytes, build.peak_bytes))
            short = "" if build.state == DONE else f" when it ended ({build.state})"
            notes.append(
                f"{build.step}: private memory {private:.1f} times the graph's weights, {peak:.1f} times with the file "
                f"they are mapped from{short}"
            )
    return notes


def _cells(outcome: Outcome) -> list[str]:
    if outcome.state == SKIPPED:
        return [outcome.step, "", "", "", "", f"{SKIPPED}: {outcome.reason}", ""]
    last = outcome.stages[-1] if outcome.stages else None
    state = outcome.state
    if state != DONE:
        state += f": {outcome.reason}"
        state += f", at {last.at}, {last.done} of {last.total}" if last else ""
    long = [s for s in outcome.stages if s.seconds >= max(1.0, outcome.seconds / 20)]
    return [
        outcome.step,
        f"{outcome.seconds:.1f}",
        f"{outcome.peak_bytes / 1e9:.2f}",
        f"{outcome.peak_private_bytes / 1e9:.2f}",
        f"{outcome.made_bytes / 1e9:.2f}" if outcome.made_bytes else "",
        state,
        ", ".join(f"{s.label} {s.seconds:.0f} s" for s in sorted(long, key=lambda s: -s.seconds)[:3]),
    ]
