"""Synthetic checkpoints: the family's shapes, and the writer on a tiny one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from export import synth
from export.checkpoint import Checkpoint
from export.hub import locate
from runtime.errors import CheckpointError, InputError, OutputError
from tests.tiny import TINY, write_tiny

MINI = synth.default_tokenizer()
PARAMETERS = {
    "80M": 80_084_288,
    "160M": 159_185_024,
    "330M": 334_349_184,
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 7_568_405_504,
    "14B": 13_990_394_880,
}


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_family_has_the_published_parameter_counts() -> None:
    assert {size: synth.parameters(config) for size, config in synth.SIZES.items()} == PARAMETERS


def test_safetensors_reads_what_was_streamed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: t.shape for name, t in tensors.items()} == TINY.weight_shapes()
    assert all(t.dtype == ml_dtypes.bfloat16 for t in tensors.values())
    for name, tensor in tensors.items():
        values = tensor.astype(np.float32)
        if values.ndim == 1:
            assert (values == 1).all(), name
        else:
            assert values.std() == pytest.approx(0.02, rel=0.1), name
            assert abs(values.mean()) < 0.02 * 5 / np.sqrt(values.size), name
            assert np.abs(values).max() < 0.02 * 4.4, name


def test_values_are_normal(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    with safe_open(folder / "model.safetensors", "np") as file:
        z = file.get_tensor("embed_tokens.weight").astype(np.float64).ravel() / 0.02
    for limit, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (np.abs(z) < limit).mean() == pytest.approx(share, abs=0.003)
    assert (z**4).mean() == pytest.approx(3, abs=0.1)
    # Neighbours, rows and chunks are unrelated.
    for lag in (1, 16, 1024):
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < 0.02


def test_chunks_differ_and_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "_CHUNK_VALUES", 64)
    tensor = synth._Tensor(0, "a", (5, 30))
    chunks = [c.tobytes() for c in synth._chunks(tensor, 0, synth._quantiles())]
    assert [len(c) for c in chunks] == [128, 128, 44]
    assert chunks[0] != chunks[1]
    again = [c.tobytes() for c in synth._chunks(synth._Tensor(0, "b", (2, 64)), 0, synth._quantiles())]
    assert again == chunks[:2]
    assert next(iter(synth._chunks(synth._Tensor(1, "a", (5, 30)), 0, synth._quantiles()))).tobytes() != chunks[0]


def test_the_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(locate(str(write_tiny(tmp_path / "tiny"))))
    assert checkpoint.config == TINY
    assert checkpoint.license == "apache-2.0"
    assert checkpoint.notices == []
    mini = Checkpoint.open(locate(str(MINI))).contract
    expected = dataclasses.replace(
        checkpoint.contract, dim=mini.dim, trained_dims=mini.trained_dims, max_tokens=mini.max_tokens
    )
    assert expected == mini
    assert checkpoint.contract.max_tokens == 256


def test_stock_transformers_loads_every_weight(tmp_path: Path) -> None:
    from export.reference import Reference

    reference = Reference(locate(str(write_tiny(tmp_path / "tiny"))))  # raises for a missing weight
    vector = reference.embed(reference.tokenize("hello", 64))
    assert vector.shape == (16,)
    assert np.isfinite(vector).all()


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    one, many = write_tiny(tmp_path / "one"), write_tiny(tmp_path / "many", shard_bytes=8_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in many.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 2 * synth.parameters(TINY)
    for name in files[1:]:  # the first holds the token table, larger than a shard
        with safe_open(many / name, "np") as file:
            assert sum(file.get_tensor(k).nbytes for k in file.keys()) <= 8_000  # noqa: SIM118
    a, b = Checkpoint.open(locate(str(one))), Checkpoint.open(locate(str(many)))
    for name in TINY.weight_shapes():
        assert a.weights.read(name).tobytes() == b.weights.read(name).tobytes()


def test_equal_seed_equal_bytes(tmp_path: Path) -> None:
    first = hashes(write_tiny(tmp_path / "a", seed=7))
    assert hashes(write_tiny(tmp_path / "b", seed=7)) == first
    other = hashes(write_tiny(tmp_path / "c", seed=8))
    assert other["model.safetensors"] != first["model.safetensors"]
    # Pinned: a seed must give the same checkpoint with every version of numpy.
    assert first["model.safetensors"] == "cd67ddce4f37b41bea19522618ad3fd9e7b3e1b36b544bf434146b21c012f381"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    synth._write(TINY, tmp_path / "a", MINI, "tiny", 0, 1 << 30, lambda label, done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == 2 * synth.parameters(TINY)
    assert calls == sorted(calls)


def test_an_unknown_size_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'5B'.*80M, 160M.*14B"):
        synth.write_checkpoint("5B", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_missing_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tokenizer FOLDER"):
        synth.write_checkpoint("80M", tmp_path / "x", tokenizer_from=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="15987 tokens; the token table has 100 rows"):
        write_tiny(tmp_path / "x", config=dataclasses.replace(TINY, vocab_size=100))


def test_only_a_synthetic_checkpoint_is_replaced(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "x", seed=1)
    write_tiny(folder, seed=2)
    assert json.loads((folder / synth.MARKER).read_text())["seed"] == 2
    precious = tmp_path / "mine"
    shutil.copytree(MINI, precious)
    before = hashes(precious)
    with pytest.raises(OutputError, match="not replaced"):
        write_tiny(precious)
    assert hashes(precious) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        write_tiny(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    write_tiny(tmp_path / "empty")


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10_000))
    with pytest.raises(OutputError, match="no room"):
        synth.write_checkpoint("14B", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from export import synth
        from tests.test_export_synth import MINI, TINY

        def progress(label, done, total):
            if 2 * done > total:
                os.kill(os.getpid(), signal.SIGKILL)

        synth._write(TINY, Path({str(tmp_path / "x")!r}), MINI, "tiny", 0, 1 << 30, progress)
    """
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.iterdir())) == 1  # hidden, and removed by the next call
    write_tiny(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_error_in_the_middle_leaves_the_old_one(tmp_path: Path) -> None:
    before = hashes(write_tiny(tmp_path / "x"))

    def stop(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth._write(TINY, tmp_path / "x", MINI, "tiny", 5, 1 << 30, stop)
    assert hashes(tmp_path / "x") == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
