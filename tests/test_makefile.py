"""`make engine` runs what its variables name, and refuses names that it would otherwise drop."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what make would run, or what it refuses. Nothing is run."""
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def engines(*arguments: str) -> dict[str, str]:
    """Return the precisions that `make engine` builds with each backend."""
    done = dry_run("engine", *arguments)
    assert done.returncode == 0, done.stderr
    found = {}
    for loop in re.findall(r"for backend in ([^;]*); do(.*?)done", done.stdout, re.DOTALL):
        (precisions,) = re.findall(r"--precision (\S*?);?\s", loop[1])
        found |= dict.fromkeys(loop[0].split(), precisions)
    return found


def test_engine_builds_what_is_named() -> None:
    assert engines() == {"tensorrt-rtx": "fp16,bf16,int8"}
    every = "BACKENDS=onnxruntime onnxruntime-cuda tensorrt tensorrt-rtx"
    compiled = {"tensorrt": "fp16", "tensorrt-rtx": "fp16"}
    assert engines(every, "PRECISIONS=fp32 fp16") == {**compiled, "onnxruntime-cuda": "fp32,fp16"}
    assert engines(every, "PRECISIONS=fp32") == {"onnxruntime-cuda": "fp32"}
    assert engines("BACKENDS=onnxruntime", "PRECISIONS=fp32 int8") == {}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "BACKENDS=onnxruntime tensorrt-rxt openvino",
            "BACKENDS names tensorrt-rxt openvino, which f2rt does not have",
        ),
        (
            "BACKENDS=tensorrt,tensorrt-rtx",
            "it has onnxruntime onnxruntime-cuda tensorrt tensorrt-rtx, given with spaces",
        ),
        ("PRECISIONS=fp32 fp8", "PRECISIONS names fp8, which f2rt does not have; it has fp32 fp16 bf16 int8"),
    ],
)
def test_names_that_f2rt_does_not_have_are_refused(argument: str, words: str) -> None:
    done = dry_run("engine", argument)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""
    assert dry_run("help", argument).returncode == 0
