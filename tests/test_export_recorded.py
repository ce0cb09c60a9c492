"""PyTorch's vectors are recorded: they are used again while they hold, and a killed pass goes on where it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.texts import write_lines
from export.checkpoint import Checkpoint
from export.hub import locate
from export.recorded import CHUNK_VECTORS, RecordedReference
from export.reference import Reference
from tests.bundles import edit_engines
from tests.verdicts import FP32, TEXTS, Run, forget, state

ROOT = Path(__file__).parent.parent


def test_recorded_vectors_are_pytorchs_to_the_bit(
    mini: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.recorded._CHUNK_S", 1e9)  # on a slow machine chunks would be smaller
    location = locate(str(mini))
    source = Checkpoint.open(location).source()
    texts = [t.text for t in TEXTS[:20]]
    with RecordedReference(location, source, cache=tmp_path) as first:
        for text in texts:
            first.embed(first.tokenize(text, 64))
    assert first.computed == 20
    with RecordedReference(location, source, cache=tmp_path) as second:
        for text in texts:
            ids = second.tokenize(text, 64)
            assert ids == reference.tokenize(text, 64)
            np.testing.assert_array_equal(second.embed(ids), reference.embed(ids))
    assert second.computed == 0
    assert second.tokenize(texts[0], 3) == reference.tokenize(texts[0], 3)  # the limit counts
    # A chunk that is not what was written is computed again; the other still holds.
    chunks = sorted(tmp_path.rglob("*.vectors"), key=lambda p: p.stat().st_size)
    data = bytearray(chunks[-1].read_bytes())
    data[-1] ^= 1
    chunks[-1].write_bytes(data)
    with RecordedReference(location, source, cache=tmp_path) as third:
        for text in texts:
            np.testing.assert_array_equal(
                third.embed(third.tokenize(text, 64)), reference.embed(third.tokenize(text, 64))
            )
    assert third.computed == CHUNK_VECTORS


def test_other_weights_or_versions_are_another_reference(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = locate(str(mini))
    source = Checkpoint.open(location).source()
    ids = [1, 2, 15986]

    def computed() -> int:
        with RecordedReference(location, source, cache=tmp_path) as reference:
            reference.embed(ids)
        return reference.computed

    assert (computed(), computed()) == (1, 0)
    card = [replace(f, sha256="0" * 64) if f.file == "README.md" else f for f in source.files]
    source = replace(source, files=card)
    assert computed() == 0
    with monkeypatch.context() as patch:
        patch.setattr("export.recorded.reference_versions", lambda: {"torch": "3", "transformers": "6"})
        assert computed() == 1
    for file in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        changed = [replace(f, sha256="0" * 64) if f.file == file else f for f in source.files]
        source = replace(source, files=changed)
        assert computed() == 1


KILLED_AT_TEXT = """
import os, signal, sys
from pathlib import Path
from calibration.texts import read_texts
from export.prove import prove_bundle

def strike(label, done, total):
    if label == "PyTorch reference" and done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

prove_bundle(Path(sys.argv[1]), read_texts(sys.argv[2]), progress=strike)
"""


def test_reference_pass_killed_in_the_middle_goes_on(
    proven_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(proven_folder, tmp_path / "bundle"))
    edit_engines(folder, forget(FP32))
    (tmp_path / "texts.jsonl").write_bytes(write_lines(TEXTS))
    at = CHUNK_VECTORS + 8
    assert len(TEXTS) > at
    arguments = [sys.executable, "-c", KILLED_AT_TEXT, str(folder), str(tmp_path / "texts.jsonl"), str(at)]
    before = state(folder)
    done = subprocess.run(arguments, cwd=ROOT, env=os.environ.copy(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert state(folder) == before
    run = Run(folder)
    assert run.compared == {FP32: "it was never compared"}
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "another cache"))
    whole = Run(folder, force=True).computed
    assert run.computed is not None
    assert whole is not None
    # At most one chunk was not yet recorded.
    assert whole - at <= run.computed <= whole - at + CHUNK_VECTORS
