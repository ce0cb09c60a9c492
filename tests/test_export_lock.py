"""Commands at once on one bundle take turns: nothing is lost, who waits says for whom, a dead owner holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibration.texts import calibration_texts, write_lines
from export.checkpoint import Checkpoint
from export.lock import Wait, bundle_lock
from export.pipeline import export_bundle
from export.precision import Precision
from runtime.bundle import open_bundle
from runtime.errors import OutputError
from tests.mounting import in_small_file_system
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
TEXTS = calibration_texts()[:10]
MAIN = "from export.cli import main; main()"
HOLDER = (
    "import sys, time; from pathlib import Path; from export.lock import bundle_lock\n"
    "with bundle_lock(Path(sys.argv[1]), 'f2rt parity'):\n"
    "    print('held', flush=True); time.sleep(600)"
)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out + error


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path/bundle."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "bundle")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_builds_and_an_export_at_once_lose_nothing(checkpoint: Checkpoint, mini: Path, tmp_path: Path) -> None:
    folder, texts = tmp_path / "mini", tmp_path / "texts.jsonl"
    texts.write_bytes(write_lines(TEXTS))
    export_bundle(checkpoint, folder, [Precision.FP32, Precision.FP16], calibration=TEXTS)
    build = ["build", folder, "--backend", "tensorrt-rtx", "--profile", "1x32", "--target"]
    export = ["export", mini, "--out", folder, "--precision", "fp32,fp16,bf16", "--calibration", texts]
    processes = [start(*build, "sm80"), start(*build, "sm89"), start(*export), start(*build, "sm120")]
    for process in processes:
        status, output = finish(process)
        assert status == 0, output
    bundle = open_bundle(folder)
    assert [g.precision for g in bundle.manifest.graphs] == ["fp32", "fp16", "bf16"]
    assert {e.target for e in bundle.manifest.engines if e.target} == {"sm80", "sm89", "sm120"}
    assert all(bundle.path(e.file).is_file() for e in bundle.manifest.engines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini", "texts.jsonl"]


def test_two_first_exports_take_turns(tiny: Path, tmp_path: Path) -> None:
    processes = [start("export", tiny, "--out", tmp_path / "build/bundle") for _ in range(3)]
    outputs = [finish(p) for p in processes]
    assert [status for status, _ in outputs] == [0, 0, 0], outputs
    assert sum("wrote " in output for _, output in outputs) == 1
    assert sum("kept " in output for _, output in outputs) == 2
    assert [p.name for p in (tmp_path / "build").iterdir()] == ["bundle"]


def test_whoever_waits_too_long_says_for_whom(
    holder: subprocess.Popen[str], checkpoint: Checkpoint, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    first = start("export", tiny, "--out", folder, "--wait", "0.3")
    status, output = finish(first)
    assert status == 2
    assert f"waiting for f2rt parity (process {holder.pid} on " in output
    assert f"error: {folder} is being changed by f2rt parity (process {holder.pid} on " in output
    assert "waited 0.3 s for it" in output
    assert "--wait SECONDS" in output
    assert not folder.exists()


@pytest.mark.parametrize("verb", ["build", "parity"])
def test_build_and_parity_wait_too(verb: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    export_bundle(checkpoint, folder, [Precision.FP32])
    before = (folder / "manifest.json").read_bytes()
    options = {"build": ["--backend", "tensorrt-rtx", "--target", "sm89"], "parity": []}[verb]
    with bundle_lock(folder, "a test"):
        status, output = finish(start(verb, folder, *options, "--wait", "0"))
    assert status == 2
    assert "is being changed by a test (process " in output
    assert (folder / "manifest.json").read_bytes() == before


def test_a_killed_owner_holds_nothing(holder: subprocess.Popen[str], tiny: Path, tmp_path: Path) -> None:
    waiting = start("export", tiny, "--out", tmp_path / "bundle")
    assert waiting.stderr is not None
    assert "waiting for f2rt parity" in waiting.stderr.readline()
    assert waiting.poll() is None
    holder.send_signal(signal.SIGKILL)
    status, output = finish(waiting)
    assert status == 0, output
    assert not list(tmp_path.glob(".bundle*"))


def test_lock_file_of_a_dead_owner_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".bundle.lock").write_text("f2rt build (process 1 on nowhere, since long ago)")
    with bundle_lock(tmp_path / "bundle", "a test", Wait(0)):
        assert "a test" in (tmp_path / ".bundle.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_lock_is_one_whatever_the_path_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "link").symlink_to("bundle")
    monkeypatch.chdir(tmp_path)
    with bundle_lock(tmp_path / "bundle", "a test"):
        for name in ("bundle", "./bundle", "link", "link/../bundle"):
            with pytest.raises(OutputError, match="being changed by a test"), bundle_lock(Path(name), "x", Wait(0)):
                pass


COUNTER = (
    "import sys, time; from pathlib import Path; from export.lock import bundle_lock\n"
    "counter = Path(sys.argv[1]) / 'counter'\n"
    "for _ in range(40):\n"
    "    with bundle_lock(Path(sys.argv[1]) / 'bundle', 'x'):\n"
    "        value = int(counter.read_text()); time.sleep(0.001); counter.write_text(str(value + 1))\n"
)


def test_many_owners_in_turn_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed by each owner while others already have it open: they must not take the removed one."""
    (tmp_path / "counter").write_text("0")
    script = COUNTER.replace("import sys", "import export.lock as l; l._POLL_S = 0; import sys")
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [p.wait(120) for p in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "160"
    assert [p.name for p in tmp_path.iterdir()] == ["counter"]


def test_bundle_whose_parent_cannot_be_written_is_locked_itself(tmp_path: Path) -> None:
    """A volume mounted read-write in a file system that is not."""
    (tmp_path / "hold.py").write_text(HOLDER)
    (tmp_path / "try.py").write_text(
        "import sys; from pathlib import Path; from export.lock import Wait, bundle_lock\n"
        "with bundle_lock(Path(sys.argv[1]), 'x', Wait(0.2)): print('free')\n"
    )
    (tmp_path / "disk").mkdir()
    done = in_small_file_system(
        "mount -t tmpfs none $D && mkdir $D/mini && mount -t tmpfs none $D/mini && mount -o remount,ro $D && "
        "$PYTHON $D/../try.py $D/mini && { $PYTHON $D/../hold.py $D/mini > $D/mini/out & holder=$!; } && "
        "while ! grep -q held $D/mini/out; do sleep 0.05; done; $PYTHON $D/../try.py $D/mini; kill $holder",
        tmp_path / "disk",
    )
    assert done.stdout.split() == ["free"], done.stderr
    assert "mini is being changed by another f2rt" in done.stderr
