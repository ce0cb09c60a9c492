"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.bundle import (
    MANIFEST,
    Bundle,
    open_bundle,
    write_manifest,
)
from runtime.errors import OutputError
from runtime.files import sha256_file, staged_folder, write_atomic

ROOT = Path(__file__).resolve().parent.parent


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("number", "named"),
    [(28, "disk is full"), (13, "Permission denied"), (5, "cannot write")],
    ids=["full", "mode", "io"],
)
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, named: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=named) as caught:
        write_atomic(path, b"new")
    assert str(path) in caught.value.message
    assert "Nothing was changed" in caught.value.message
    assert caught.value.cure
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"x")
    with pytest.raises(OutputError, match="cannot write"), staged_folder(tmp_path / "file" / "below"):
        pass


def test_staged_folder_makes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    for content in ("one", "two"):
        with staged_folder(target) as staging:
            assert names(staging) == []
            assert staging.parent == target.parent
            (staging / content).write_text(content)
        assert names(target) == [content]
        assert names(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_failure_inside_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as staging:
        (staging / "old").touch()
    expected = OutputError if isinstance(error, OSError) else type(error)

    def replace_and_fail() -> None:
        with staged_folder(target) as staging:
            (staging / "new").touch()
            raise error

    with pytest.raises(expected):
        replace_and_fail()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["target"]


def test_failure_without_an_old_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "target") as staging:
            (staging / "new").touch()
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fail()
    assert names(tmp_path) == []


READER = """
import sys
from pathlib import Path
target, seen = Path(sys.argv[1]) / "content", set()
print("ready", flush=True)
count = 0
while not (Path(sys.argv[1]).parent / "stop").exists():
    for _ in range(200):
        seen.add(target.read_text())
        count += 1
print(count, sorted(seen), flush=True)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start Python on `code` and wait until it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_reader_sees_the_old_or_the_new_content_at_every_instant(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write(content: str) -> None:
        with staged_folder(target) as staging:
            (staging / "content").write_text(content)

    write("even")
    reader = start(READER, str(target))
    try:
        for i in range(1, 60):
            write("odd" if i % 2 else "even")
    finally:
        (tmp_path / "stop").touch()
        out, err = reader.communicate(timeout=30)
    assert reader.returncode == 0, err
    count, _, seen = out.strip().partition(" ")
    assert int(count) > 200
    assert seen == "['even', 'odd']"


STAGE = """
import sys, time
from pathlib import Path
from runtime.files import staged_folder
with staged_folder(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("half")
    print(staging.name, flush=True)
    time.sleep(60)
"""


def test_leftovers_of_the_killed_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as staging:
        (staging / "old").touch()
    dead, alive = start(STAGE, str(target)), start(STAGE, str(target))
    try:
        dead.send_signal(signal.SIGKILL)
        dead.communicate(timeout=10)
        assert names(target) == ["old"]
        before = [n for n in names(tmp_path) if n != "target"]
        assert len(before) == 2
        with staged_folder(target) as staging:
            (staging / "new").touch()
            there = [n for n in names(tmp_path) if n not in ("target", staging.name)]
        assert names(target) == ["new"]
        assert len(there) == 1, "of two earlier staging folders the dead one's goes and the living one's stays"
        assert (tmp_path / there[0] / "half").read_text() == "half"
    finally:
        alive.kill()
        alive.communicate(timeout=10)
    with staged_folder(target):
        assert there[0] not in names(tmp_path)
    assert names(tmp_path) == ["target"]


def test_folders_of_like_names_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    for name in ("target2", ".target", ".target2.staging-x", "target.staging-x"):
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "target"):
        pass
    assert names(tmp_path) == sorted(["target", "target2", ".target", ".target2.staging-x", "target.staging-x"])


WRITE_FOREVER = """
import sys, itertools
from pathlib import Path
from runtime.files import write_atomic
print("ready", flush=True)
for i in itertools.count():
    write_atomic(Path(sys.argv[1]), (b"a" if i % 2 else b"b") * 300_000)
"""


def test_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"a" * 300_000)
    for delay_ms in (1, 7, 13):
        writer = start(WRITE_FOREVER, str(path))
        time.sleep(delay_ms / 1e3)
        writer.kill()
        writer.communicate(timeout=10)
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1


def test_manifest_is_written_as_it_is_read(bundle_copy: Bundle) -> None:
    changed = replace(bundle_copy.manifest, notices=["a notice\nin two lines"])
    write_manifest(bundle_copy.folder, changed)
    assert open_bundle(bundle_copy.folder).manifest == changed
    text = (bundle_copy.folder / MANIFEST).read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert hashlib.sha256(text.encode()).hexdigest() == sha256_file(bundle_copy.folder / MANIFEST)
