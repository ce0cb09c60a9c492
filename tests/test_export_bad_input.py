"""Bad calibration texts, weights, and too little memory, through the command: a clear error, the old bundle intact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from calibration.texts import Text, calibration_texts, verification_path, verification_texts, write_lines
from export.build import add_engine
from export.checkpoint import Checkpoint
from export.cli import app
from export.options import export_extra
from export.pipeline import export_bundle
from export.precision import Precision
from export.profiles import Profile
from export.prove import prove_bundle
from runtime.bundle import bundle_files, check_hash, open_bundle
from runtime.errors import (
    EngineError,
    InputError,
    MissingExtraError,
    OutOfMemoryError,
    explain_memory_errors,
    is_out_of_memory,
)
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
TEXTS = calibration_texts()[:6]


class Tiny:
    """A small checkpoint with a bundle of its fp32 graph, and the export command on them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = write_tiny(folder / "checkpoint")
        self.folder = folder / "bundle"
        self.texts = folder / "texts.txt"
        done = self.export("fp32", calibrated=False)
        assert done[0] == 0, done[1]
        self.before = (self.folder / "manifest.json").read_bytes()

    def export(self, precisions: str = "fp32,fp16", *, calibrated: bool = True, name: str = "") -> tuple[int, str]:
        """Return the exit code and everything printed, on one line."""
        command = ["export", str(self.checkpoint), "--out", str(self.folder), "--precision", precisions]
        if calibrated:
            command += ["--calibration", name or str(self.texts)]
        done = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output.replace("\n", " ")

    def assert_intact(self) -> None:
        assert (self.folder / "manifest.json").read_bytes() == self.before
        assert_whole(self.folder)


def assert_whole(folder: Path) -> None:
    """Check that all files have their hashes and that nothing half made lies beside the bundle."""
    bundle = open_bundle(folder)
    for record in bundle_files(bundle.manifest):
        check_hash(bundle, record)
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}")] == []


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"\n \n\t\n", "no usable text: all 4 lines are blank"),
        (b"text\n\x00\x01\x02", "NUL byte at offset 5: a binary file, not text"),
        (bytes(range(128, 256)), "byte 0x80 at offset 0 is not UTF-8"),
        ("text".encode("utf-16"), "UTF-16 byte order mark"),
        (b'{"text": 3}', "field 'text' is '3'; it must be a string"),
        (b'{"text": "a", "prmpt": "query"}', "unknown field 'prmpt'"),
        (b'{"text": "half \\ud800"}', "lone surrogate U+D800"),
    ],
    ids=["empty", "blank", "binary", "latin", "utf-16", "number", "field", "surrogate"],
)
def test_calibration_file_that_is_none(tiny: Tiny, data: bytes, words: str) -> None:
    tiny.texts.write_bytes(data)
    status, output = tiny.export()
    assert status == 2
    assert words in output
    assert "cure: " in output
    tiny.assert_intact()


def test_calibration_file_that_is_not_there(tiny: Tiny) -> None:
    assert "no such file" in tiny.export()[1]
    assert "is a folder" in tiny.export(name=str(tiny.checkpoint))[1]
    tiny.assert_intact()


def test_calibration_that_is_the_verification(tiny: Tiny) -> None:
    status, output = tiny.export(name=str(verification_path()))
    assert status == 2
    assert "is identical to the verification set (1,010 texts)" in output
    # One text is enough, also with another case, spacing and prompt.
    shared = next(t.text for t in verification_texts() if t.text.isascii() and 40 < len(t.text) < 200)
    tiny.texts.write_bytes(write_lines([*TEXTS, Text("mine", f"  {shared.upper()} ")]))
    status, output = tiny.export()
    assert status == 2
    assert "1 of 7 texts belong to the verification set" in output
    tiny.assert_intact()


@pytest.mark.parametrize("verb", ["export", "parity"])
def test_a_misspelt_prompt_is_named(tiny: Tiny, verb: str) -> None:
    """It would be no prompt at all, and the ranges or the verdict those of other vectors."""
    lines = [
        Text("a", "one text", prompt="query"),
        Text("b", "another", prompt="Query"),
        Text("c", "third", prompt="x"),
    ]
    tiny.texts.write_bytes(write_lines(lines))
    if verb == "export":
        status, output = tiny.export()
    else:
        done = CliRunner().invoke(app, ["parity", str(tiny.folder), "--texts", str(tiny.texts)])
        status, output = done.exit_code, done.output.replace("\n", " ")
    assert status == 2
    assert "2 of 3 texts name a prompt that the checkpoint does not have; the first is 'b', with 'Query'" in output
    assert "Name one of its prompts ('document', 'query'), or leave the field out" in output
    tiny.assert_intact()


def test_shipped_texts_serve_a_checkpoint_without_their_prompts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.checkpoint / "config_sentence_transformers.json").unlink()
    shipped = [replace(text, prompt="query") for text in TEXTS]
    monkeypatch.setattr("export.pipeline.calibration_texts", lambda: shipped)
    status, output = tiny.export(calibrated=False)
    assert status == 0, output
    told = f"notice: the checkpoint has no prompt 'query': {len(TEXTS)} calibration texts were taken without one"
    assert told in " ".join(output.split())
    tiny.texts.write_bytes(write_lines(shipped))
    status, output = tiny.export()
    assert status == 2
    assert "It has no prompts: leave the field out" in output


def test_text_longer_than_the_model_is_cut_and_counted(tiny: Tiny) -> None:
    long = " ".join(f"word{i}" for i in range(400))
    tiny.texts.write_text(f"short\n{long}\n{long} again\n", encoding="utf-8")
    status, output = tiny.export()
    assert status == 0, output
    assert "calibration: 3 texts, " in output
    assert "; 2 longer than 256 tokens and cut there" in output
    assert "calibration" not in tiny.export()[1].replace(str(tiny.folder), "")  # kept: nothing was calibrated


@pytest.mark.parametrize(
    "text",
    [
        "\U00010600\U00010601\U00010602 \U00010603",  # Linear A: no one reads it
        "\ue000\ue001\uf8ff",  # private use: no script at all
        "\U0001f9ff\u200d\U0001f9ff \u202eabc\u202c",
        "\ufffd\ufeff\u0000 ",
        "a" * 5000,
        "\u2800\u2800",  # a blank that is no space
    ],
    ids=["Linear A", "private use", "emoji", "controls", "one letter", "blank"],
)
def test_language_never_seen_calibrates_like_any_other(tiny: Tiny, text: str) -> None:
    """Byte-level tokens: every text has some, and nothing about them is special."""
    tiny.texts.write_bytes(write_lines([Text("strange", text, language="qaa", script="Qaaa")]))
    tiny.texts.rename(tiny.texts.with_suffix(".jsonl"))
    status, output = tiny.export(name=str(tiny.texts.with_suffix(".jsonl")))
    assert status == 0, output
    assert "calibration: 1 texts, " in output
    assert_whole(tiny.folder)
    assert open_bundle(tiny.folder).graph("fp16").calibration_sha256


@pytest.mark.parametrize("precisions", ["fp32", "fp16", "bf16,int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.down_proj.weight", "norm.weight"])
def test_weights_that_are_no_numbers(tiny: Tiny, precisions: str, value: float, name: str) -> None:
    path = tiny.checkpoint / "model.safetensors"
    tensors = {key: np.array(tensor) for key, tensor in load_file(path).items()}
    tensors[name].reshape(-1)[3] = ml_dtypes.bfloat16(value)
    save_file(tensors, path, metadata={"format": "pt"})
    tiny.texts.write_bytes(write_lines(TEXTS))
    shutil.move(tiny.texts, tiny.texts.with_suffix(".jsonl"))
    status, output = tiny.export(precisions, name=str(tiny.texts.with_suffix(".jsonl")))
    assert status == 2
    assert f"the weight {name} holds 1 value not finite" in output
    assert "download it again" in output
    tiny.assert_intact()


# Runs the command, and takes all but 3 MB of memory away when a progress bar comes to a given point.
SQUEEZED = """
import resource, sys
from runtime import console
label, at, texts = sys.argv[1:4]
del sys.argv[1:4]
honest = console.Bars.update

def update(self, text, done, total):
    global label
    honest(self, text, done, total)
    if label and text.startswith(label) and done == (total if at == "end" else int(at)):
        label = ""
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 3_000_000
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

console.Bars.update = update
import calibration.texts
shipped = calibration.texts.read_texts(texts)
calibration.texts.verification_texts = lambda: shipped
from export.cli import main
main()
"""


def squeezed(label: str, at: str, texts: Path, *command: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SQUEEZED, label, at, str(texts), *map(str, command)],
        cwd=ROOT,
        env=os.environ.copy(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def narrow(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "mini"
    export_bundle(checkpoint, folder, [Precision.FP32, Precision.FP16], calibration=TEXTS)
    return folder


@pytest.fixture
def mini_bundle(narrow: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(narrow, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("label", "at"),
    [
        ("hash source", "end"),
        pytest.param("write the fp32 graph", "end", marks=pytest.mark.slow),
        pytest.param("probe: embed_tokens", "1", marks=pytest.mark.slow),
        ("probe: layer 0", "1"),
    ],
    ids=["before writing", "before the probe", "in the probe", "in a layer"],
)
def test_memory_runs_out_during_export(
    mini_bundle: Path, mini: Path, tmp_path: Path, label: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    before = (mini_bundle / "manifest.json").read_bytes()
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(write_lines([*TEXTS, Text("long", " ".join(f"word{i}" for i in range(900)))]))
    (tmp_path / "others.jsonl").write_bytes(write_lines(calibration_texts()[20:22]))
    command = ["export", mini, "--out", mini_bundle, "--precision", "fp32,fp16", "--calibration", texts, "--force"]
    status, output = squeezed(label, at, tmp_path / "others.jsonl", *command)
    # The tokenizer's library ends the process when it gets no memory, and so does the loader for a new thread's own:
    # nothing to catch.
    if status in (-signal.SIGABRT, 127):
        assert "memory allocation of" in output or "cannot allocate memory for thread-local data" in output
        assert (mini_bundle / "manifest.json").read_bytes() == before
        return
    assert status == 2, output
    assert f"error: not enough memory to export to {mini_bundle}" in output
    assert "cure: Free memory, or give fewer or shorter --calibration texts" in output
    assert "Traceback" not in output
    assert (mini_bundle / "manifest.json").read_bytes() == before
    assert_whole(mini_bundle)
    status, output = squeezed("never", "0", tmp_path / "others.jsonl", *command)
    assert status == 0, output


def test_memory_runs_out_while_an_engine_is_compared(mini_bundle: Path, tmp_path: Path) -> None:
    """It says nothing of the engine: the verdict that was there stays, and no failure is recorded."""
    long = Text("long", " ".join(f"word{i}" for i in range(900)))
    short = [t for t in verification_texts() if len(t.text) < 100][:4]
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(write_lines([*short, long]))
    for known in ([*short, long], short):  # PyTorch's vectors are then recorded, and only the engine needs memory
        assert prove_bundle(mini_bundle, known).verdict == "pass"
    before = (mini_bundle / "manifest.json").read_bytes()
    status, output = squeezed("onnxruntime:fp32: single texts", "4", texts, "parity", mini_bundle)
    assert status == 2, output
    assert "not enough memory" in output
    assert "cure: Free memory" in output
    assert "Traceback" not in output
    assert (mini_bundle / "manifest.json").read_bytes() == before
    assert_whole(mini_bundle)
    status, output = squeezed("never", "0", texts, "parity", mini_bundle)
    assert status == 0, output


def test_memory_runs_out_while_an_engine_is_built(mini_bundle: Path, tmp_path: Path) -> None:
    """The compiler says so, or aborts the process: the bundle is the old one either way, and the next build is well."""
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(write_lines(TEXTS))
    before = (mini_bundle / "manifest.json").read_bytes()
    build = ["build", mini_bundle, "--backend", "tensorrt-rtx", "--target", "sm89", "--profile", "1x32"]
    status, output = squeezed("build", "0", texts, *build)
    assert status in (2, -signal.SIGABRT, -signal.SIGSEGV), output
    if status == 2:
        assert "not enough memory to build an engine" in output
        assert "build with fewer or smaller profiles" in output
    assert (mini_bundle / "manifest.json").read_bytes() == before
    assert add_engine(mini_bundle, "tensorrt-rtx", Precision.FP16, (Profile(1, 32),), target="sm89").built
    assert_whole(mini_bundle)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[ONNXRuntimeError] : 6 : bad allocation"),
        RuntimeError("Failed to allocate memory for requested buffer of size 34359738368"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libgomp.so.1: failed to map segment from shared object"),
        EngineError("tensorrt-rtx could not compile fp16.onnx: Unexpected exception std::bad_alloc", cure="x"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_every_way_of_saying_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemoryError, match="not enough memory to count sheep") as caught:
        raise_in(error, "count sheep")
    assert caught.value.cure == "Sleep."
    assert caught.value.__cause__ is error


def raise_in(error: Exception, what: str) -> None:
    with explain_memory_errors(what, "Sleep."):
        raise error


@pytest.mark.parametrize("error", [InputError("a bad file"), OSError(28, "No space left on device"), ValueError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raise_in(error, "x")
    assert caught.value is error


def test_memory_error_anywhere_in_a_command_is_readable(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Callable[..., object]:
        raise MemoryError

    monkeypatch.setattr("export.checkpoint.Weights", no_memory)
    status, output = tiny.export("fp32", calibrated=False)
    assert status == 2
    assert "error: not enough memory to go on" in output
    tiny.assert_intact()


def test_few_calibration_texts_and_unused_ones_are_noticed(tiny: Tiny) -> None:
    tiny.texts.write_bytes(write_lines(TEXTS))
    status, output = tiny.export("fp32,fp16")
    assert (status, "INT8 ranges" in output) == (0, False)
    status, output = tiny.export("int8")
    assert status == 0
    assert f"notice: INT8 ranges from {len(tiny.texts.read_bytes().splitlines())} texts leave out" in output
    status, output = tiny.export("fp32")
    assert status == 0
    assert "is not used: fp32 needs no calibration" in output


def test_a_library_that_is_there_and_does_not_load_is_not_called_missing() -> None:
    with (
        pytest.raises(MissingExtraError, match=r"cannot be loaded: No module named 'torch\._C'.*Free memory"),
        export_extra(),
    ):
        raise ModuleNotFoundError("No module named 'torch._C'", name="torch._C")
    with pytest.raises(MissingExtraError, match=r"the module 'torch' is not installed"), export_extra():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
