"""What is damaged, unreadable or older in a bundle is written again, and what is whole is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from export import cache
from export.cache import cached_sha256
from runtime.bundle import write_manifest
from runtime.files import sha256_file
from tests.project import ALL, BF16, FP16, FP32, SAME, Project, change_texts


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Change one byte and nothing that is cheap to see: the size and the time of the last change stay."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("file", [FP16, f"{FP16}.data"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "was changed"), (flip, "was changed"), (Path.unlink, "is missing")],
    ids=["cut", "flip", "unlink"],
)
def test_damaged_graph_is_written_again(
    project: Project, file: str, damage: Callable[[Path], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))  # even where every hash was kept
    project.export()
    damage(project.folder / file)
    found = project.export()
    assert found == {FP32: ("kept", SAME), BF16: ("kept", SAME), FP16: ("wrote", f"{file} {words}")}
    assert set(project.verdicts().values()) == {True}  # the same bytes are there again


@pytest.mark.parametrize("file", ["tokenizer.json", "golden.npz"])
def test_other_damage_is_repaired(project: Project, file: str) -> None:
    (project.folder / "golden.npz").write_bytes(b"x")
    bundle = project.bundle
    from runtime.bundle import record_file

    write_manifest(project.folder, replace(bundle.manifest, golden=record_file(project.folder, "golden.npz")))
    project.export()
    assert project.bundle.manifest.golden is not None
    flip(project.folder / file)
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    after = project.bundle
    assert sha256_file(after.path("tokenizer.json")) == sha256_file(project.checkpoint / "tokenizer.json")
    assert (after.manifest.golden is None) == (file == "golden.npz")


@pytest.mark.parametrize("text", ["{", '{"schema_version": 999}'], ids=["damaged", "newer"])
def test_old_manifest_that_cannot_be_read(project: Project, text: str) -> None:
    (project.folder / "manifest.json").write_text(text)
    found = project.export()
    assert {verb for verb, _ in found.values()} == {"wrote"}
    assert all("the old bundle cannot be used: " in reason for _, reason in found.values())


def test_bundle_of_an_earlier_version_says_nothing_of_its_inputs(project: Project) -> None:
    manifest = project.bundle.manifest
    write_manifest(project.folder, replace(manifest, graphs=[replace(g, inputs={}) for g in manifest.graphs]))
    reason = "the old bundle does not say what it was made from"
    assert project.export() == dict.fromkeys(ALL, ("wrote", reason))
    assert set(project.verdicts().values()) == {True}  # the bytes came out the same


def test_where_the_file_system_has_no_links_files_are_copied(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    change_texts(project)
    before = (project.folder / f"{FP32}.data").stat().st_ino
    assert project.export()[FP32] == ("kept", SAME)
    after = project.bundle
    assert after.path(f"{FP32}.data").stat().st_ino != before
    assert sha256_file(after.path(f"{FP32}.data")) == after.graph("fp32").data.sha256


def test_hash_is_taken_from_the_cache_only_while_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = cached_sha256(file)
    assert first == sha256_file(file)
    assert not (tmp_path / "cache").exists()  # too young: its times could not show another change
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    cached_sha256(file)
    (entry,) = (tmp_path / "cache/hashes").iterdir()
    entry.write_bytes(entry.read_bytes().replace(first.encode(), b"f" * 64))
    seen: list[int] = []
    assert cached_sha256(file, seen.append) == "f" * 64  # it is read from there
    assert seen == [3]
    flip(file)  # same size, same time of last change
    assert cached_sha256(file) == sha256_file(file) != first
    entry.write_bytes(b"damaged")
    assert cached_sha256(file) == sha256_file(file)
    # A cache that cannot be written costs time and nothing else.
    monkeypatch.setenv("F2RT_CACHE", str(file))
    assert cached_sha256(file) == sha256_file(file)
