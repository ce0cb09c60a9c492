"""The runtime's verbs as a shell sees them: a child process, its output, its exit status."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import runtime
from runtime.bundle import MANIFEST, Bundle
from runtime.embedder import Embedder
from tests.serving import ServerProcess, f2rt

TEXTS = ["Where is the library?", "图书馆在哪里？", "a"]


def ok(*arguments: str, **options: Any) -> bytes:
    done = f2rt(*arguments, **options)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout


def failed(*arguments: str, **options: Any) -> str:
    """Run a command that has to refuse readably; returns its standard error."""
    done = f2rt(*arguments, **options)
    text = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, text)
    assert done.stdout == b""
    assert "Traceback" not in text, text
    assert text.startswith("error: "), text
    if "--server" not in arguments:  # what a server says is one sentence after the other
        assert "\n  cure: " in text, text
    return text


def parsed(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]  # bytes: only line feeds end a line


def vectors(lines: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([line["embedding"] for line in lines], np.float32)


# --- embed


def test_embed_here_and_on_a_server_give_the_same(bundle: Bundle, server: ServerProcess, embedder: Embedder) -> None:
    wanted = ["--prompt", "query", "--dim", "64"]
    here = ok("embed", str(bundle.folder), *TEXTS, *wanted)
    assert ok("embed", "--server", server.address, *TEXTS, *wanted) == here
    lines, result = parsed(here), embedder.embed(TEXTS, prompt_name="query", dimensions=64)
    assert np.array_equal(vectors(lines), result.vectors)
    assert [line["text"] for line in lines] == TEXTS
    assert [line["tokens"] for line in lines] == [len(i.ids) for i in result.items]
    assert {line["fingerprint"] for line in lines} == {bundle.manifest.engines[0].fingerprint}
    assert "图书馆" in here.decode()


def test_npy_and_an_instruction_of_ones_own(bundle: Bundle, server: ServerProcess, embedder: Embedder) -> None:
    prompt = "Instruct: find\nQuery: "
    expected = embedder.embed(TEXTS, prompt=prompt).vectors
    for where in ([str(bundle.folder)], ["--server", server.address]):
        array = np.load(io.BytesIO(ok("embed", *where, *TEXTS, "--instruction", prompt, "--format", "npy")))
        assert array.dtype == np.float32
        assert np.array_equal(array, expected)


def test_texts_from_standard_input_one_per_line_feed(server: ServerProcess, embedder: Embedder) -> None:
    texts = ["first", "", "with\u2028separator and \x0c form feed", "図書館 \x1c end", "last"]
    output = ok("embed", "--server", server.address, stdin="\r\n".join(texts).encode() + b"\n")
    assert [line["text"] for line in parsed(output)] == texts
    assert np.array_equal(vectors(parsed(output)), embedder.embed(texts).vectors)
    without_end = ok("embed", "--server", server.address, stdin=b"\xef\xbb\xbfone\ntwo")
    assert [line["text"] for line in parsed(without_end)] == ["one", "two"]


def test_output_is_utf_8_whatever_the_locale(server: ServerProcess) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    output = ok("embed", "--server", server.address, stdin="é 図\n".encode(), env=environment)
    assert [line["text"] for line in parsed(output)] == ["é 図"]


def test_what_embed_refuses_on_a_server(server: ServerProcess) -> None:
    remote = ["--server", server.address]
    assert "no text" in failed("embed", *remote)
    assert "no text" in failed("embed", "--server", "", stdin=b"")
    assert "not UTF-8 at byte 3" in failed("embed", *remote, stdin=b"abc\xff\n")
    assert "no prompt 'nope'; this model has: document, query" in failed("embed", *remote, "a", "--prompt", "nope")
    assert "Choose one of these" in failed("embed", *remote, "a", "--prompt", "nope")
    assert "1 to 256" in failed("embed", *remote, "a", "--dim", "257")
    assert "both" in failed("embed", *remote, "a", "--prompt", "query", "--instruction", "x")
    assert "cannot be sent" in failed("embed", *remote, "\udcff")
    for flag, value in (("--engine", "onnxruntime:fp32"), ("--policy", "p.toml"), ("--allow-unverified", "a")):
        assert f"{flag} is about a bundle" in failed("embed", *remote, flag, value)
    gone = failed("embed", "--server", "127.0.0.1:1", "a")
    assert "127.0.0.1:1" in gone
    assert "f2rt serve" in gone


def test_a_bundle_beside_a_server_is_a_text_and_said_to_be(server: ServerProcess, bundle: Bundle) -> None:
    done = f2rt("embed", "--server", server.address, str(bundle.folder), env={"F2RT_POLICY": "for other commands"})
    assert done.returncode == 0
    assert b"is embedded as a text" in done.stderr


def test_what_embed_refuses_here(bundle: Bundle, tmp_path: Path) -> None:
    folder = str(bundle.folder)
    assert "no bundle" in failed("embed")
    assert "no format 'xml'" in failed("embed", folder, "a", "--format", "xml")
    assert "is not there" in failed("embed", str(tmp_path / "nowhere"), "a")
    assert "no prompt 'nope'" in failed("embed", folder, "a", "--prompt", "nope")
    assert "1 to 256" in failed("embed", folder, "a", "--dim", "0")
    assert "has no engine 'x:y'" in failed("embed", folder, "a", "--engine", "x:y")
    for flag in ("--model", "--key", "--tls-ca", "--tls-cert", "--tls-key"):
        assert f"{flag} is about a server" in failed("embed", folder, "a", flag, "x")
    assert "surrogate" in failed("embed", folder, "\udcff")


def test_an_unproven_engine_does_not_embed(bundle_copy: Bundle) -> None:
    engines = [replace(engine, parity=None) for engine in bundle_copy.manifest.engines]
    manifest = msgspec.json.encode(replace(bundle_copy.manifest, engines=engines))
    (bundle_copy.folder / MANIFEST).write_bytes(manifest)
    assert "never compared with PyTorch" in failed("embed", str(bundle_copy.folder), "a")
    assert "never compared" in ok("inspect", str(bundle_copy.folder)).decode()


# --- inspect, version, help


def test_inspect_shows_the_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    shown = ok("inspect", str(bundle.folder)).decode()
    for part in (
        manifest.source.id,
        manifest.fingerprint,
        "up to 1024",
        "EOS 15986",
        "prompt query",
        "onnxruntime:fp32",
    ):
        assert part in shown
    assert manifest.engines[0].fingerprint in shown
    assert "pass" in shown
    assert "recorded hashes" not in shown
    assert "all files have the recorded hashes" in ok("inspect", str(bundle.folder), "--verify").decode()
    whole = ok("inspect", str(bundle.folder), "--json", "--verify")
    assert whole == (bundle.folder / MANIFEST).read_bytes()


def test_inspect_prints_prompts_as_they_stand(bundle_copy: Bundle) -> None:
    """Square brackets are rich's markup, and :name: an emoji; in a prompt they are text."""
    contract = replace(bundle_copy.manifest.contract, prompts={"q[/b]": "[INST] :smile: [bold]x[/INST]"})
    manifest = replace(bundle_copy.manifest, contract=contract, notices=["[red]mind[/red] the [/gap]"])
    (bundle_copy.folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    shown = ok("inspect", str(bundle_copy.folder)).decode()
    assert "prompt q[/b]" in shown
    assert "[INST] :smile: [bold]x[/INST]" in shown
    assert "[red]mind[/red] the [/gap]" in shown


def test_inspect_of_a_damaged_bundle(bundle_copy: Bundle, tmp_path: Path) -> None:
    assert "not a bundle" in failed("inspect", str(tmp_path))
    tokenizer = bundle_copy.path(bundle_copy.manifest.tokenizer.file)
    data = bytearray(tokenizer.read_bytes())
    data[-3] ^= 1
    tokenizer.write_bytes(data)
    ok("inspect", str(bundle_copy.folder))
    assert "SHA-256" in failed("inspect", str(bundle_copy.folder), "--verify")
    tokenizer.write_bytes(data[:-1])
    assert "bytes; the manifest records" in failed("inspect", str(bundle_copy.folder))
    (bundle_copy.folder / MANIFEST).write_text("{")
    assert "is damaged" in failed("inspect", str(bundle_copy.folder))


def test_version_and_help() -> None:
    assert ok("--version").decode() == f"f2rt {runtime.__version__}\n"
    shown = ok("serve", "--help", env={"COLUMNS": "200", "NO_COLOR": "1"}).decode()
    for part in ("--engine", "--grpc", "--threads", "F2RT_NAME", "127.0.0.1:50051", "SIGTERM"):
        assert part in shown
    every = ok("--help", env={"COLUMNS": "200", "NO_COLOR": "1"}).decode()
    for verb in ("export", "parity", "embed", "serve", "reload", "inspect", "synth"):
        assert verb in every


def test_flags_have_environment_variables(bundle: Bundle) -> None:
    assert "'from-env'" in failed("serve", str(bundle.folder), env={"F2RT_GRPC": "from-env"})
    assert "threads is -1" in failed("serve", str(bundle.folder), env={"F2RT_THREADS": "-1"})
    assert "has no engine 'x:y'" in failed("serve", str(bundle.folder), env={"F2RT_ENGINE": "x:y"})


# --- installed in part

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}.split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
EXPORT_ONLY = "torch transformers onnx onnx_ir ml_dtypes safetensors huggingface_hub"
SERVE_ONLY = "grpc grpc_health grpc_reflection google starlette uvicorn prometheus_client orjson"


def test_export_verbs_without_their_libraries_name_the_extra(bundle: Bundle, mini: Path, tmp_path: Path) -> None:
    prelude = BLOCK.format(names=EXPORT_ONLY)
    for arguments in (
        ["export", str(mini), "--out", str(tmp_path / "bundle")],
        ["parity", str(bundle.folder)],
        ["synth", "80M", "--out", str(tmp_path / "checkpoint")],
    ):
        text = failed(*arguments, prelude=prelude)
        assert "is not installed" in text
        assert "pip install 'f2rt[export]'" in text
    assert list(tmp_path.iterdir()) == []


def test_serving_verbs_without_grpc_name_the_extra(bundle: Bundle) -> None:
    prelude = BLOCK.format(names=SERVE_ONLY)
    for arguments in (["serve", str(bundle.folder)], ["embed", "--server", "127.0.0.1:1", "a"]):
        assert "pip install 'f2rt[serve]'" in failed(*arguments, prelude=prelude)


def test_the_base_install_embeds_and_inspects(bundle: Bundle, embedder: Embedder) -> None:
    """With the libraries of every extra blocked, not merely unused."""
    prelude = BLOCK.format(names=f"{EXPORT_ONLY} {SERVE_ONLY}")
    assert np.array_equal(
        vectors(parsed(ok("embed", str(bundle.folder), *TEXTS, prelude=prelude))), embedder.embed(TEXTS).vectors
    )
    assert bundle.manifest.fingerprint in ok("inspect", str(bundle.folder), "--verify", prelude=prelude).decode()


def test_embed_imports_no_heavy_library(bundle: Bundle) -> None:
    prelude = (
        "import atexit, sys\n"
        f"heavy = {f'{EXPORT_ONLY} {SERVE_ONLY}'.split()!r}\n"
        "atexit.register(lambda: print('loaded:', [m for m in heavy if m in sys.modules], file=sys.stderr))\n"
    )
    done = f2rt("embed", str(bundle.folder), "a", prelude=prelude)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.decode() == "loaded: []\n"


def test_the_tests_run_the_interpreter_under_test() -> None:
    assert ok("--version", prelude=f"import sys; assert sys.executable == {sys.executable!r}")
