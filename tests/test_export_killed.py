"""Killed at every change of the file system, export, build and parity leave the old bundle or the new one.

What stands afterwards opens, every file has its recorded hash, and the next run completes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.texts import calibration_texts, verification_texts, write_lines
from export.checkpoint import Checkpoint
from export.cli import app
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from runtime.bundle import open_bundle
from tests import killing
from tests.tiny import write_tiny

PRECISIONS = [Precision.FP32, Precision.FP16, Precision.BF16]
TEXTS = calibration_texts()[:6]
SHORT = [t for t in verification_texts() if len(t.text) < 100][:6]

# Every driver starts each point from a copy of a template, and says whether the old bundle or the new one stands.
COMMON = """
import os, shutil, sys
from pathlib import Path
from calibration.texts import read_texts
from export.checkpoint import Checkpoint
from export.hub import locate
from export.lock import bundle_lock
from export.pipeline import export_bundle
from export.precision import Precision
from runtime.bundle import MANIFEST, bundle_files, check_hash, engine_files, open_bundle
from tests.killing import at_every_change

folder, template = Path(sys.argv[1]), Path(sys.argv[2])
PRECISIONS = [Precision.FP32, Precision.FP16, Precision.BF16]

def prepare(point):
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if folder.exists():
        shutil.rmtree(folder)
    if template.exists():
        shutil.copytree(template, folder)

def look():
    bundle = open_bundle(folder)
    for record in [*bundle_files(bundle.manifest), *engine_files(bundle)]:
        check_hash(bundle, record)
    same = template.exists() and (folder / MANIFEST).read_bytes() == (template / MANIFEST).read_bytes()
    return bundle, "old" if same else "new"
"""

# Nothing at the target, then all three graphs. The probe is killed too: with a cache that stays it goes on from where
# it was, with one that is emptied each time it is met at every one of its own points.
FIRST = (
    COMMON
    + """
checkpoint, texts = Checkpoint.open(locate(sys.argv[3])), read_texts(sys.argv[4])

def check():
    if not folder.exists():
        return {"stands": "nothing"}
    bundle, _ = look()
    assert [g.precision for g in bundle.manifest.graphs] == PRECISIONS
    return {"stands": "new"}

def prepare_cache(point):
    prepare(point)
    if sys.argv[5] == "emptied":
        shutil.rmtree(os.environ["F2RT_CACHE"], ignore_errors=True)

def act(_):
    export_bundle(checkpoint, folder, PRECISIONS, calibration=texts)

at_every_change(prepare_cache, act, check)
"""
)

# Other calibration texts over a proven bundle: fp32 is kept by a link, the other two are written.
AGAIN = (
    COMMON
    + """
checkpoint, texts = Checkpoint.open(locate(sys.argv[3])), read_texts(sys.argv[4])
old = {g.precision: g.calibration_sha256 for g in open_bundle(template).manifest.graphs}

def check():
    bundle, stands = look()
    now = {g.precision: g.calibration_sha256 for g in bundle.manifest.graphs}
    assert (now == old) == (stands == "old"), (now, old, stands)
    assert len(set(now.values())) == 2, now  # None for fp32, and one for both others
    assert all(e.parity for e in bundle.manifest.engines)
    return {"stands": stands}

def prepare_hashes(point):
    prepare(point)
    shutil.rmtree(Path(os.environ["F2RT_CACHE"]) / "hashes", ignore_errors=True)

def act(_):
    export_bundle(checkpoint, folder, PRECISIONS, calibration=texts)

# Once to its end first, in a child since it starts threads: what the cache then holds is the same for every point.
if os.fork() == 0:
    prepare(0)
    act(0)
    os._exit(0)
os.wait()
at_every_change(prepare_hashes, act, check)
"""
)

# Another profile for an engine the bundle has: the old file stays until the manifest names the new one.
BUILD = (
    COMMON
    + """
import tensorrt_rtx
from export.build import add_engine
from export.profiles import Profile

def check():
    bundle, stands = look()
    (engine,) = [e for e in bundle.manifest.engines if e.target]
    assert engine.profiles == (["1x32"] if stands == "old" else ["2x16"]), engine
    return {"stands": stands}

def act(_):
    add_engine(folder, "tensorrt-rtx", Precision.FP16, (Profile(2, 16),), target="sm89")

at_every_change(prepare, act, check)
"""
)

# Other texts over a proven bundle: new golden vectors, new report, new verdicts. The reference's record is killed too.
PARITY = (
    COMMON
    + """
import torch, transformers
from export.prove import prove_bundle
from runtime import golden

texts = read_texts(sys.argv[3])

def check():
    bundle, stands = look()
    golden.load(bundle)
    assert {e.parity.verdict for e in bundle.manifest.engines} == {"pass"}
    assert {e.parity.texts for e in bundle.manifest.engines} == {3 if stands == "old" else len(texts)}
    return {"stands": stands}

at_every_change(prepare, lambda _: prove_bundle(folder, texts) and None, check)
"""
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_bytes(write_lines(TEXTS))
    return tmp_path / "texts.jsonl"


def counts(points: list[dict[str, object]]) -> Counter[object]:
    return Counter(p["stands"] for p in points)


@pytest.mark.parametrize("cache", ["kept", pytest.param("emptied", marks=pytest.mark.slow)])
def test_first_export_of_three_precisions(tmp_path: Path, texts: Path, cache: str) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    environment = {"F2RT_CACHE": str(tmp_path / "cache")}
    points = killing.run(FIRST, tmp_path / "b/x", tmp_path / "none", tiny, texts, cache, environment=environment)
    found = counts(points)
    assert found["nothing"] >= {"kept": 15, "emptied": 30}[cache]  # three graphs with data, the manifest; the probe
    assert found["new"] >= 1
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["x"]


@pytest.mark.slow
def test_export_over_a_proven_bundle(tmp_path: Path, texts: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    (tmp_path / "old.jsonl").write_bytes(write_lines(TEXTS[:4]))
    template = tmp_path / "template"
    command = ["export", str(tiny), "--out", str(template), "--precision", "fp32,fp16,bf16", "--calibration"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "old.jsonl")])
    assert done.exit_code == 0, done.output
    prove_bundle(template, SHORT[:3])
    environment = {"F2RT_CACHE": str(tmp_path / "cache")}
    found = counts(killing.run(AGAIN, tmp_path / "b/x", template, tiny, texts, environment=environment))
    assert found["old"] >= 12
    assert found["new"] >= 5
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["x"]


@pytest.fixture(scope="module")
def narrow(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "mini"
    export_bundle(checkpoint, folder, [Precision.FP32, Precision.FP16], calibration=TEXTS)
    return folder


@pytest.mark.slow
def test_build_over_an_older_engine(narrow: Path, tmp_path: Path) -> None:
    template = Path(shutil.copytree(narrow, tmp_path / "template"))
    build = ["build", str(template), "--backend", "tensorrt-rtx", "--target", "sm89", "--profile", "1x32"]
    assert CliRunner().invoke(app, build).exit_code == 0
    found = counts(killing.run(BUILD, tmp_path / "b/x", template))
    assert found["old"] >= 5  # the lock, the engine and its folder, the manifest
    assert found["new"] >= 2  # the old engine's file, the lock's file
    engines = [p.name for p in (tmp_path / "b/x/engines/tensorrt-rtx").iterdir()]
    assert engines == [Path(e.file).name for e in open_bundle(tmp_path / "b/x").manifest.engines if e.target]


def test_parity_over_an_older_verdict(narrow: Path, tmp_path: Path) -> None:
    template = Path(shutil.copytree(narrow, tmp_path / "template"))
    assert prove_bundle(template, SHORT[:3]).verdict == "pass"
    (tmp_path / "short.jsonl").write_bytes(write_lines(SHORT))
    environment = {"F2RT_CACHE": str(tmp_path / "cache")}
    found = counts(killing.run(PARITY, tmp_path / "b/x", template, tmp_path / "short.jsonl", environment=environment))
    assert found["old"] >= 10
    assert found["new"] >= 2
    assert sorted(p.name for p in (tmp_path / "b/x").glob("golden*")) == [
        open_bundle(tmp_path / "b/x").manifest.golden.file  # type: ignore[union-attr]
    ]
