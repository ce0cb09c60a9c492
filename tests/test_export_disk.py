"""A disk that is full, that may not be written, or that cannot be read: a clear error, and the old bundle as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.texts import calibration_texts, verification_texts, write_lines
from export import changes
from export.checkpoint import Checkpoint
from export.cli import app
from export.hub import locate
from export.pipeline import Step, export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from runtime.bundle import open_bundle
from runtime.errors import CheckpointError
from tests.mounting import in_small_file_system
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
TEXTS = calibration_texts()[:6]
SHORT = [t for t in verification_texts() if len(t.text) < 100][:6]

# The command with six verification texts in place of the shipped ones.
FEW = """
import sys
import calibration.texts as t
texts = t.read_texts(sys.argv.pop(1))
t.verification_texts = lambda: texts
from export.cli import main
main()
"""


@pytest.fixture(scope="module")
def work(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, the command for few texts, and a bundle of two precisions, proven on three texts."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "few.py").write_text(FEW)
    (folder / "short.jsonl").write_bytes(write_lines(SHORT))
    (folder / "calibration.jsonl").write_bytes(write_lines(TEXTS))
    export_bundle(checkpoint, folder / "mini", [Precision.FP32, Precision.FP16], calibration=TEXTS)
    assert prove_bundle(folder / "mini", SHORT[:3]).verdict == "pass"
    return folder


@pytest.fixture
def disk(work: Path, tmp_path: Path) -> Path:
    """Where a script mounts; the work folder's files stand beside it."""
    for file in work.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    (tmp_path / "mini").symlink_to(work / "mini")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def run(disk: Path, size: str, script: str) -> list[str]:
    """Copy the proven bundle to a disk of this size, run the script, then compare the bundle with what it was.

    Returns standard output and error as lines; the last says whether the bundle is as it was and what lies beside it.
    """
    steps = [
        f"mount -t tmpfs -o size={size} none $D && cp -rL $D/../mini $D/mini && cp $D/mini/manifest.json $D/../before",
        script,
        "cmp $D/mini/manifest.json $D/../before && eval $F2RT inspect $D/mini --verify | tail -1; ls -A $D",
    ]
    done = in_small_file_system("exec 2>&1; " + "; ".join(steps), disk)
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout.splitlines()


SOUND = ["all files have the recorded hashes", "mini"]
EXPORT = "eval $F2RT export checkpoints/mini --out $D/mini --calibration $D/../calibration.jsonl"
BUILD = "eval $F2RT build $D/mini --backend tensorrt-rtx --target sm89 --profile 1x32"
PARITY = "$PYTHON $D/../few.py $D/../short.jsonl parity $D/mini"


def test_full_disk_while_a_precision_is_added(disk: Path) -> None:
    """The fp32 and fp16 graphs are linked and need no room; bf16's 17.6 MB do not fit."""
    lines = run(disk, "58m", f"{EXPORT} --precision fp32,fp16,bf16; echo status $?")
    assert any("the disk is full" in line and f"{disk}/mini" in line for line in lines), lines
    assert lines[-3:] == ["status 2", *SOUND]


def test_full_disk_while_narrow_graphs_are_written_again(disk: Path) -> None:
    lines = run(disk, "75m", f"{EXPORT} --precision fp32,fp16 --force; echo status $?")
    assert any("the disk is full" in line for line in lines), lines
    assert lines[-3:] == ["status 2", *SOUND]


def test_full_cache_is_named(disk: Path) -> None:
    """First the probe's part of it, then PyTorch's vectors."""
    small = "export F2RT_CACHE=$D/../small; mkdir -p $F2RT_CACHE; mount -t tmpfs -o size=20k none $F2RT_CACHE"
    export = f"{EXPORT} --precision fp32,fp16 --force; echo status $?"
    lines = run(disk, "150m", f"{small}; {export}; {PARITY}; echo status $?")
    assert sum("f2rt's cache: no room to write" in line for line in lines) == 2, lines
    assert sum("point F2RT_CACHE to another folder" in line for line in lines) == 2
    assert sum(line == "status 2" for line in lines) == 2
    assert lines[-2:] == SOUND


def test_full_disk_while_an_engine_is_built(disk: Path) -> None:
    lines = run(disk, "58m", f"{BUILD}; echo status $?; ls $D/mini/engines/tensorrt-rtx")
    assert any("no room to write" in line and "fp16-sm89.engine" in line for line in lines), lines
    assert lines[-3:] == ["status 2", *SOUND]


def test_full_disk_while_a_verdict_is_recorded(disk: Path) -> None:
    """The verdict that was there stands, and with room again the same command records the new one."""
    full = f"dd if=/dev/zero of=$D/filler bs=4k status=none; {PARITY}; echo status $?; rm $D/filler"
    stands = "cmp $D/mini/manifest.json $D/../before; echo cmp $?; eval $F2RT inspect $D/mini --verify"
    again = f"{PARITY}; echo status $?; cp $D/mini/manifest.json $D/../before"
    lines = run(disk, "60m", f"{full}; {stands} | tail -1; ls -A $D; {again}")
    assert any("the disk is full" in line for line in lines if "dd:" not in line), lines
    failed = lines.index("status 2")
    assert lines[failed : failed + 4] == ["status 2", "cmp 0", *SOUND]
    assert lines[-3:] == ["status 0", *SOUND]


@pytest.mark.parametrize("command", [f"{EXPORT} --precision fp32", BUILD, PARITY], ids=["export", "build", "parity"])
def test_disk_that_may_not_be_written(disk: Path, command: str) -> None:
    lines = run(disk, "60m", f"mount -o remount,ro $D; {command}; echo status $?")
    assert any("cannot write" in line and "Read-only file system" in line for line in lines), lines
    assert any("cure: Choose a folder you may write to" in line for line in lines)
    assert lines[-3:] == ["status 2", *SOUND]


def test_what_writes_nothing_needs_no_disk_to_write_to(disk: Path, work: Path) -> None:
    """All verdicts stand and all graphs are kept: on a read-only disk that is a success."""
    three = disk.parent / "three.jsonl"
    three.write_bytes(write_lines(SHORT[:3]))
    kept = f"{EXPORT} --precision fp32,fp16; echo status $?; $PYTHON $D/../few.py $D/../three.jsonl parity $D/mini"
    # The bundle was made under another name of the checkpoint, which the first export records.
    first = f"{EXPORT} --precision fp32,fp16 >/dev/null && cp $D/mini/manifest.json $D/../before"
    lines = run(disk, "60m", f"{first}; mount -o remount,ro $D; {kept}; echo status $?")
    assert [line for line in lines if line.startswith("status")] == ["status 0", "status 0"], lines
    assert sum(line.startswith("kept ") for line in lines) == 4
    assert lines[-2:] == SOUND


def test_source_that_cannot_be_read_is_a_read_error(tmp_path: Path) -> None:
    """/proc/self/mem opens, has no size, and fails with EIO when its start is read: as a broken disk does."""
    tiny = write_tiny(tmp_path / "tiny")
    (tiny / "README.md").unlink()
    (tiny / "README.md").symlink_to("/proc/self/mem")
    done = CliRunner().invoke(app, ["export", str(tiny), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert f"cannot read {tiny}/README.md: Input/output error" in done.output.replace("\n", "")
    assert "write" not in done.output
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("tokenizer.json", "decide"),
        ("model.safetensors", "hash source and bundle"),
        ("model.safetensors", "write the fp32 graph"),
    ],
)
def test_source_that_goes_away_is_a_read_error(
    tmp_path: Path, file: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    checkpoint = Checkpoint.open(locate(str(tiny)))
    target = tmp_path / "bundle"
    before = export_bundle(checkpoint, target, [Precision.FP32]).manifest

    def strike(at: Step, done: int) -> None:
        if at.label == step:
            (tiny / file).unlink(missing_ok=True)

    def decide(*arguments: object) -> object:  # between hashing and copying nothing is shown
        strike(Step("decide", 0), 0)
        return changes.decide(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("export.pipeline.decide", decide)
    with pytest.raises(CheckpointError, match=rf"cannot read .*{file}.*No such file") as caught:
        export_bundle(checkpoint, target, [Precision.FP32], strike, force=True)
    assert "write" not in caught.value.message
    assert open_bundle(target).manifest == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
