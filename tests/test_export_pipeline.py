"""Export writes a whole bundle or nothing: killed at every point, on a full disk, into a folder it may not write."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from export.checkpoint import Checkpoint
from export.cli import app
from export.pipeline import export_bundle
from export.precision import Precision, parse_precisions
from runtime.bundle import Bundle, bundle_files, check_hash, open_bundle
from runtime.errors import InputError, OutputError
from tests import killing
from tests.mounting import in_small_file_system

ROOT = Path(__file__).parent.parent

# Whatever the point, the target is the old bundle or the new one, and every file has its recorded hash.
DRIVER = """
import sys
from pathlib import Path
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import parse_precisions
from runtime.bundle import bundle_files, check_hash, open_bundle
from tests.killing import at_every_change

checkpoint, target, precisions = Checkpoint.open(locate(sys.argv[1])), Path(sys.argv[2]), parse_precisions(sys.argv[3])
export_bundle(checkpoint, target, precisions)

def check():
    bundle = open_bundle(target)
    for record in bundle_files(bundle.manifest):
        check_hash(bundle, record)
    return {"leftovers": len(list(target.parent.iterdir())) - 1}

at_every_change(lambda _: None, lambda _: export_bundle(checkpoint, target, precisions, force=True) and None, check)
"""


def test_killed_at_every_change_of_the_file_system(mini: Path, tmp_path: Path) -> None:
    points = killing.run(DRIVER, mini, tmp_path / "build" / "mini", "fp32")
    assert len(points) >= 8  # staging, tokenizer, graphs, data, model, manifest, exchange, removal
    assert max(p["leftovers"] for p in points) >= 1  # the kills did strike while something was half made
    assert points[-1]["leftovers"] == 0  # and the next export cleaned up


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_while_weights_stream(checkpoint: Checkpoint, tmp_path: Path, share: float) -> None:
    """A fault in the middle of the data, as an exception: nothing is left, and the old bundle is untouched."""
    target = tmp_path / "mini"
    export_bundle(checkpoint, target, [Precision.FP32])
    before = (target / "manifest.json").read_bytes()

    class FaultError(Exception):
        pass

    def strike(step: object, done: int) -> None:
        total = step.total  # type: ignore[attr-defined]
        if "graph" in step.label and done >= share * total * 0.99:  # type: ignore[attr-defined]
            raise FaultError

    with pytest.raises(FaultError):
        export_bundle(checkpoint, target, [Precision.FP32], strike, force=True)
    assert (target / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mini"]


def test_export_is_reproducible(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = export_bundle(checkpoint, tmp_path / "again", [Precision.FP32]).manifest
    assert again.fingerprint == bundle.manifest.fingerprint
    assert again.engines[0].fingerprint == bundle.manifest.engines[0].fingerprint
    assert [g.data.sha256 for g in again.graphs] == [g.data.sha256 for g in bundle.manifest.graphs]


def test_manifest_traces_the_source(bundle: Bundle, mini: Path) -> None:
    manifest = bundle.manifest
    files = {f.file for f in manifest.source.files}
    assert {"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json", "modules.json"} <= files
    assert manifest.source.license == "to-be-decided-by-the-publisher"
    assert bundle.path("tokenizer.json").read_bytes() == (mini / "tokenizer.json").read_bytes()
    assert {"f2rt", "python", "onnx-ir", "safetensors"} <= set(manifest.versions)
    for record in bundle_files(manifest):
        check_hash(bundle, record)


def test_folder_that_is_not_a_bundle_is_never_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="it is not a bundle and is not replaced"):
        export_bundle(checkpoint, tmp_path, [Precision.FP32])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        export_bundle(checkpoint, file, [Precision.FP32])


def test_full_disk(tmp_path: Path) -> None:
    done = in_small_file_system(
        "mount -t tmpfs -o size=12m none $D && eval $F2RT export checkpoints/mini --out $D/mini; "
        "echo status $?; ls -A $D",
        tmp_path,
    )
    assert "the disk is full" in done.stderr
    assert "cure: Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["status", "2"]  # and ls shows nothing


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    done = in_small_file_system(
        "mount -t tmpfs -o ro none $D && eval $F2RT export checkpoints/mini --out $D/mini; echo status $?; ls -A $D",
        tmp_path,
    )
    assert "cannot write" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "cure: Choose a folder you may write to" in done.stderr
    assert done.stdout.split() == ["status", "2"]


def test_full_disk_keeps_the_old_bundle(tmp_path: Path) -> None:
    done = in_small_file_system(
        "mount -t tmpfs -o size=40m none $D && eval $F2RT export checkpoints/mini --out $D/mini >/dev/null && "
        "{ eval $F2RT export checkpoints/mini --out $D/mini --force; echo status $?; ls -A $D; "
        "eval $F2RT inspect $D/mini --verify | tail -1; }",
        tmp_path,
    )
    assert "the disk is full" in done.stderr
    assert done.stdout.splitlines() == ["status 2", "mini", "all files have the recorded hashes"]


def test_export_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    target = str(tmp_path / "mini")
    done = run(app, ["export", str(ROOT / "checkpoints/mini"), "--out", target])
    assert done.exit_code == 0, done.output
    assert "256 dimensions" in done.output
    assert open_bundle(Path(target)).manifest.golden is None  # proving is another step
    assert run(app, ["export", str(tmp_path / "gone"), "--out", target]).exit_code == 2
    refused = run(app, ["export", str(ROOT / "checkpoints/mini"), "--out", target, "--precision", "fp13"])
    assert refused.exit_code == 2
    assert "fp13" in refused.output


def test_precisions() -> None:
    assert parse_precisions("fp32, fp32") == [Precision.FP32]
    for text in ("", "fp64", "fp32,int3"):
        with pytest.raises(InputError):
            parse_precisions(text)
