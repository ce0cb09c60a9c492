"""The command `f2rt diff`: what it says and exits with, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.texts import Text, write_lines
from export import compare
from runtime.bundle import MANIFEST, Bundle, open_bundle, write_manifest
from runtime.errors import BundleError, UnverifiedError
from tests.diffs import FP32, INT8, TEXTS, compared
from tests.serving import f2rt

ROOT = Path(__file__).parent.parent


def lines_file(tmp_path: Path, texts: list[Text]) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(write_lines(texts))
    return str(path)


def refused(*arguments: str) -> str:
    done = f2rt("diff", *arguments)
    error = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, done.stdout, error)
    assert done.stdout == b""
    assert error.startswith("error: ")
    assert "\n  cure: " in error
    assert "Traceback" not in error
    return error


def test_the_command_answers_in_words_and_as_json_and_imports_nothing_heavy(
    int8_bundle: Bundle, tmp_path: Path
) -> None:
    folder, texts = str(int8_bundle.folder), lines_file(tmp_path, [*TEXTS[:20], replace(TEXTS[3], id="again")])
    arguments = ["diff", folder, folder, "--engine-a", FP32, "--engine-b", INT8, "--texts", texts]
    script = (
        "import sys\n"
        "from export.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'onnx', 'onnx_ir', 'grpc') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[-2].startswith("interchangeable within 0.0")
    assert f"20 texts of {texts}; 1 repeat another with the same prompt and count once" in lines
    told = f2rt(*arguments, "--json", "--limit", "10")
    assert told.returncode == 0
    assert told.stderr == b""
    report = json.loads(told.stdout)
    assert report["schema_version"] == 1
    assert report["texts"]["texts"] == 10
    assert report["judgement"]["precision"] == "int8"
    assert report["moves"]["cosine"]["min"] > 0.97
    assert all(set(c) == {"section", "what", "a", "b", "reach", "moves_vectors"} for c in report["changes"])
    assert [c["moves_vectors"] for c in report["changes"] if c["what"] == "precision"] == [True]


def test_the_command_fails_where_vectors_moved(bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path) -> None:
    texts = lines_file(tmp_path, TEXTS[:20])
    done = f2rt("diff", str(bundle.folder), str(tiny_bundle.folder), "--texts", texts)
    assert done.returncode == 1, done.stderr
    assert "re-embed: vectors of 256 and of 16 dimensions cannot be compared" in done.stdout.decode()
    assert done.stderr == b""


def test_a_newer_bundle_is_refused(bundle_copy: Bundle, bundle: Bundle) -> None:
    path = bundle_copy.folder / MANIFEST
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9', 1))
    error = refused(str(bundle.folder), str(bundle_copy.folder))
    assert "has schema version 9; this f2rt reads version 1" in error


def test_what_is_not_there_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    assert "gone is not there" in refused(str(bundle.folder), str(tmp_path / "gone"))
    (tmp_path / "texts.txt").write_text("\n \n")
    assert "all 3 lines are blank" in refused(
        str(bundle.folder), str(bundle.folder), "--texts", str(tmp_path / "texts.txt")
    )
    assert "has no engine 'onnxruntime:fp8'" in refused(
        str(bundle.folder), str(bundle.folder), "--engine-b", "onnxruntime:fp8"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give one thing to compare with"),
        (["OTHER", "--server", "127.0.0.1:1"], "give one thing to compare with"),
        (["--server", "127.0.0.1:1", "--engine-b", FP32], "B is a server"),
        (["OTHER", "--model", "mini"], "are about a server"),
        (["OTHER", "--tls-cert", "a.pem"], "are about a server"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(bundle: Bundle, arguments: list[str], problem: str) -> None:
    assert problem in refused(str(bundle.folder), *arguments)


def test_an_engine_that_is_not_proven_is_refused_before_anything_runs(
    bundle_copy: Bundle, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = bundle_copy.manifest
    write_manifest(bundle_copy.folder, replace(m, engines=[replace(e, parity=None) for e in m.engines]))
    monkeypatch.setattr(compare, "open_embedder", lambda *a: pytest.fail("an engine was opened"))
    for name in ("auto", FP32):
        with pytest.raises(UnverifiedError, match=r"may (not )?answer"):
            compared(bundle, open_bundle(bundle_copy.folder), engine_b=name)


def test_a_bundle_that_was_damaged_is_refused(bundle_copy: Bundle, bundle: Bundle) -> None:
    path = bundle_copy.path(bundle_copy.manifest.graphs[0].data.file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(BundleError, match="has SHA-256"):
        compared(bundle, open_bundle(bundle_copy.folder))


def test_nothing_is_written_into_a_bundle(int8_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_bundle.folder, tmp_path / "copy"))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    compared(open_bundle(folder), int8_bundle, TEXTS[:5])
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
