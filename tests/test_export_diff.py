"""`f2rt diff`: what changed, line by line; how vectors move, measured; and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from calibration.texts import Text, calibration_texts, verification_texts, write_lines
from export import compare, diff, diff_report, embedded
from export.checkpoint import Checkpoint
from export.compare import choose, compare_bundles
from export.diff import EVERY, Change, compare_contracts, compare_manifests, shortened
from export.diff_report import DiffReport
from export.hub import locate
from export.moves import excerpt, judge, less_precise, measure
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from runtime.bundle import (
    MANIFEST,
    Bundle,
    Contract,
    EngineRecord,
    Exclusion,
    FileRecord,
    GraphRecord,
    Manifest,
    Origin,
    Quantization,
    QuantizedInput,
    Rescaling,
    open_bundle,
    write_manifest,
)
from runtime.errors import BundleError, InputError, UnverifiedError
from runtime.policy import Policy
from runtime.tolerances import TOLERANCES
from tests.bundles import forge_fingerprint
from tests.serving import f2rt
from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
SHORT = [t for t in verification_texts() if len(t.text) < 300]
TEXTS = SHORT[::12]
CALIBRATION = [t for t in calibration_texts() if len(t.text) < 300][::20]
FP32, INT8 = "onnxruntime:fp32", "onnxruntime:int8"
HASH = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def two(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with fp32 and int8 engines, proven on a few texts. Read only."""
    folder = tmp_path_factory.mktemp("two") / "mini"
    export_bundle(checkpoint, folder, [Precision.FP32, Precision.INT8], calibration=CALIBRATION)
    assert prove_bundle(folder, TEXTS[::4]).verdict == "pass"
    return open_bundle(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of 16 dimensions and 256 tokens. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = Checkpoint.open(locate(str(write_tiny(folder / "checkpoint"))))
    export_bundle(checkpoint, folder / "bundle", [Precision.FP32])
    assert prove_bundle(folder / "bundle", TEXTS[::4]).verdict == "pass"
    return open_bundle(folder / "bundle")


def rewritten(bundle: Bundle, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Write another manifest whose fingerprints and verdicts fit it."""
    write_manifest(bundle.folder, change(bundle.manifest))
    return forge_fingerprint(open_bundle(bundle.folder))


def compared(a: Bundle, b: Bundle, texts: list[Text] = TEXTS, **options: Any) -> DiffReport:
    return compare_bundles(a, b, choose(texts, "the test"), **options)


def said(changes: list[Change]) -> dict[str, tuple[str, str, str]]:
    return {f"{c.section}: {c.what}": (c.a, c.b, c.reach) for c in changes}


# --- manifests


def test_a_manifest_equals_itself(two: Bundle) -> None:
    assert compare_manifests(two.manifest, two.manifest) == []


def full_graph() -> GraphRecord:
    file = FileRecord("graphs/int8.onnx", HASH, 10)
    return GraphRecord(
        precision="int8",
        model=file,
        data=file,
        opset=23,
        rescaling=[Rescaling("layers.0.up", 3, 4, "too large")],
        calibration_sha256=HASH,
        quantization=Quantization(
            0.9, 0.95, [QuantizedInput("layers.0.in", 0.9, "max", 0.5, 0.1, 0.1)], [Exclusion("layers.1.in", 0.1, 0.02)]
        ),
        twin=file,
        origin=None,
        calibration=file,
        plan=file,
        inputs={"data format": "1"},
    )


OTHER = FileRecord("elsewhere", HASH[::-1], 11)
GRAPH_CHANGES: dict[str, Any] = {
    "model": OTHER,
    "data": OTHER,
    "opset": 22,
    "rescaling": [],
    "calibration_sha256": None,
    "quantization": None,
    "twin": None,
    "origin": Origin("./export", "optimum", [OTHER], "last_hidden_state", [], []),
    "calibration": None,
    "plan": None,
    "inputs": {"data format": "2"},
}
ENGINE_CHANGES: dict[str, Any] = {
    "backend": "tensorrt",
    "precision": "bf16",
    "file": "elsewhere",
    "sha256": HASH[::-1],
    "fingerprint": HASH[::-1][:32],
    "builder": {"tensorrt": "11.1"},
    "flags": ["weak"],
    "profiles": ["1x64"],
    "target": "sm89",
    "calibration_sha256": HASH,
    "graph_sha256": HASH,
    "parity": None,
    "made_at": "2030-01-01",
}
CONTRACT_CHANGES: dict[str, Any] = {
    "architecture": "OtherModel",
    "dim": 7,
    "trained_dims": [7],
    "max_tokens": 7,
    "pooling": "mean",
    "eos_id": 7,
    "pad_id": 7,
    "vocab_size": 7,
    "prompts": {"query": "Q: "},
    "default_prompt_name": "query",
    "normalize": False,
}


@pytest.mark.parametrize("name", [f.name for f in fields(GraphRecord) if f.name != "precision"])
def test_no_field_of_a_graph_changes_in_silence(two: Bundle, name: str) -> None:
    """A field that is added to the manifest must be given its line, or this fails."""
    graph = full_graph()
    a, b = (replace(two.manifest, graphs=[g]) for g in (graph, replace(graph, **{name: GRAPH_CHANGES[name]})))
    changes = compare_manifests(a, b)
    assert changes
    assert any(c.moves_vectors for c in changes) == (name not in ("calibration", "plan"))


@pytest.mark.parametrize("name", [f.name for f in fields(EngineRecord) if f.name != "name"])
def test_no_field_of_an_engine_changes_in_silence(two: Bundle, name: str) -> None:
    engine = two.manifest.engines[0]
    # Backend and precision are the name's two halves.
    changed = replace(engine, **{name: ENGINE_CHANGES[name]})
    if name in ("backend", "precision"):
        changed = replace(changed, name=f"{changed.backend}:{changed.precision}")
    a, b = (replace(two.manifest, engines=[e]) for e in (engine, changed))
    changes = compare_manifests(a, b)
    assert changes
    moving = {"backend", "precision", "sha256", "fingerprint", "target", "graph_sha256"}
    assert any(c.moves_vectors for c in changes) == (name in moving)


@pytest.mark.parametrize("name", [f.name for f in fields(Contract)])
def test_no_field_of_the_contract_changes_in_silence(two: Bundle, name: str) -> None:
    contract = two.manifest.contract
    changes = compare_contracts(contract, replace(contract, **{name: CONTRACT_CHANGES[name]}))
    assert changes
    assert any(c.moves_vectors for c in changes) == (name not in ("trained_dims", "pad_id"))


def test_how_an_engine_was_built_reaches_vectors_only_through_its_file(two: Bundle) -> None:
    engine = two.manifest.engines[0]
    a = replace(two.manifest, engines=[engine])
    built = replace(engine, builder={"tensorrt": "11.1"}, profiles=["8x64"])
    same = said(compare_manifests(a, replace(a, engines=[built])))
    assert same[f"engine {FP32}: profiles"] == ("none", "8x64", "")
    other = said(compare_manifests(a, replace(a, engines=[replace(built, sha256=HASH)])))
    assert other[f"engine {FP32}: profiles"] == ("none", "8x64", FP32)
    assert other[f"engine {FP32}: built with tensorrt"] == ("not there", "11.1", FP32)


def test_what_int8_rounds_is_compared_input_by_input(two: Bundle) -> None:
    graph = full_graph()
    q = graph.quantization
    assert q is not None
    q = replace(q, budget=0.8, int8_share=0.85, inputs=[replace(q.inputs[0], scale=0.25)], excluded=[])
    a, b = (replace(two.manifest, graphs=[g]) for g in (graph, replace(graph, quantization=q)))
    assert said(compare_manifests(a, b)) == {
        "int8 graph: INT8 budget": ("0.9", "0.8", "int8 engines"),
        "int8 graph: INT8 share of the matrix work": ("0.95", "0.85", "int8 engines"),
        "int8 graph: left out: layers.1.in": ("left out, 2.0% of the work", "INT8", "int8 engines"),
        "int8 graph: ranges: layers.0.in": (
            "scale 0.5 by max, alpha 0.9",
            "scale 0.25 by max, alpha 0.9",
            "int8 engines",
        ),
    }


def test_where_and_when_cannot_move_vectors(two: Bundle) -> None:
    m = two.manifest
    source = replace(m.source, id="org/other", revision=HASH[:40], license="MIT")
    files = [replace(f, sha256=HASH) if f.file == "README.md" else f for f in m.source.files]
    b = replace(m, source=replace(source, files=files), created_at="2030", notices=["n"], versions={"f2rt": "9"})
    changes = compare_manifests(m, b)
    assert not [c for c in changes if c.moves_vectors]
    lines = said(changes)
    assert lines["source: revision"] == ("none", HASH[:40], "")
    assert lines["source: id"][1] == "org/other"
    assert lines["versions: f2rt"][1] == "9"
    assert "source: README.md" in lines


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_each_file_of_the_source_is_compared_by_its_hash(two: Bundle, file: str) -> None:
    m = two.manifest
    files = [replace(f, sha256=HASH) if f.file == file else f for f in m.source.files]
    (change,) = compare_manifests(m, replace(m, source=replace(m.source, files=files)))
    assert (change.section, change.what, change.reach) == ("source", file, EVERY)
    assert change.b.startswith(HASH)
    gone = [f for f in m.source.files if f.file != file]
    (change,) = compare_manifests(m, replace(m, source=replace(m.source, files=gone)))
    assert change.b == "not there"


def test_hashes_that_begin_alike_are_different(two: Bundle) -> None:
    a, b = (replace(two.manifest, tokenizer=FileRecord("t", HASH[:-1] + end, 1)) for end in "ab")
    (change,) = compare_manifests(a, b)
    assert shortened(change.a) == shortened(change.b) == "0123456789ab, 1 bytes"


# --- vectors


def test_a_bundle_against_itself_is_identical(two: Bundle) -> None:
    report = compared(two, two)
    assert report.verdict == "identical vectors"
    assert report.changes == []
    assert not report.moved
    assert report.a.engine == report.b.engine == INT8  # the fastest
    assert report.moves is not None
    assert report.moves.top10_overlap == report.moves.mixed_top10_overlap == report.moves.mixed_found_again == 1.0
    assert [s.texts for s in report.moves.moved] == [0, 0, 0]
    assert report.notes == ["A and B are the same engine, by its fingerprint"]


def test_engines_of_one_bundle_are_compared_by_the_less_precise_ones_limits(two: Bundle) -> None:
    report = compared(two, two, engine_a=FP32, engine_b=INT8)
    assert report.moves is not None
    assert report.moves.cosine is not None
    assert report.judgement is not None
    assert report.judgement.limits == TOLERANCES["int8"]
    assert TOLERANCES["int8"].min_cosine < report.moves.cosine.min < TOLERANCES["fp32"].min_cosine
    assert report.verdict.startswith("interchangeable within 0.0")
    assert report.verdict.endswith("no re-embed needed (the limit for int8 is 0.03)")
    assert report.moves.moved[0].share > 0.9
    lines = said(report.changes)
    assert lines["the two engines: precision"][:2] == ("fp32", "int8")
    assert lines["the two engines: quantization"][1].startswith("INT8, ")
    worst = report.moves.worst
    assert len(worst) == 10
    assert [t.cosine for t in worst] == sorted(t.cosine for t in worst)
    assert worst[0].cosine == report.moves.cosine.min
    strict = Policy("strict", {**TOLERANCES, "int8": TOLERANCES["fp32"]})
    again = compared(two, two, engine_a=FP32, engine_b=INT8, policy=strict)
    assert again.moved
    assert again.verdict.startswith("re-embed: the smallest cosine is 0.9")


def test_changed_prompts_are_named_and_move_the_texts_that_use_them(bundle_copy: Bundle, bundle: Bundle) -> None:
    prompts = {**bundle.manifest.contract.prompts, "query": "Something else altogether: ", "title": "T: "}
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, prompts=prompts)))
    report = compared(bundle, other)
    lines = said(report.changes)
    assert lines["contract: prompt query"][1:] == ('"Something else altogether: "', "texts with prompt query")
    assert lines["contract: prompt title"][0] == "not there"
    assert report.moved
    assert report.verdict.startswith("re-embed: the smallest cosine is ")
    assert report.judgement is not None
    assert report.judgement.reasons[1].startswith("the mean cosine is ")
    assert report.moves is not None
    assert {t.prompt for t in report.moves.worst} == {"query"}
    assert report.notes == ["prompt title differs and no text names it: what it moves was not measured"]
    documents = compared(bundle, other, [t for t in TEXTS if t.prompt != "query"])
    assert documents.verdict == "identical vectors"
    assert documents.notes[0].startswith("prompt query differs and no text names it")


def test_a_prompt_that_only_one_side_has_is_counted(bundle_copy: Bundle, bundle: Bundle) -> None:
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, prompts={"document": ""})))
    report = compared(bundle, other)
    queries = sum(t.prompt == "query" for t in TEXTS)
    assert f"B has no prompt 'query': {queries} texts were embedded without one there" in report.notes
    assert report.moved


def test_texts_without_a_prompt_get_the_default_one(bundle_copy: Bundle, bundle: Bundle) -> None:
    """What a caller who names no prompt gets has changed, and that is what an index holds."""
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, default_prompt_name="query")))
    report = compared(bundle, other, [replace(t, prompt=None) for t in TEXTS])
    assert report.moved
    named = compared(bundle, other, [t for t in TEXTS if t.prompt])
    assert named.verdict == "identical vectors"
    assert named.notes == ["the default prompt differs and every text names one: what it moves was not measured"]


def test_a_shorter_limit_moves_long_texts_alone(bundle_copy: Bundle, bundle: Bundle) -> None:
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, max_tokens=96)))
    long = Text("long", "The quick brown fox jumps over the lazy dog. " * 30)
    report = compared(bundle, other, [*TEXTS, long])
    assert report.moves is not None
    far = [t for t in report.moves.worst if t.cosine < 1 - 1e-6]
    assert "long" in {t.id for t in far}
    assert all(t.tokens > 96 for t in far)
    few = compared(bundle, other, [t for t in TEXTS if len(t.text) < 40])
    assert few.verdict == "identical vectors"
    assert few.notes[0].startswith("max_tokens differs and no text is that long (")


def test_other_weights_of_other_dimensions_cannot_be_compared(bundle: Bundle, tiny: Bundle) -> None:
    report = compared(bundle, tiny)
    assert report.moved
    assert report.verdict.startswith(
        "re-embed: vectors of 256 and of 16 dimensions cannot be compared, nor be in one index"
    )
    assert report.moves is not None
    assert report.moves.cosine is None
    assert report.moves.mixed_top10_overlap is None
    assert report.moves.top10_overlap < 0.9  # random weights: own neighbours need no common space
    lines = said(report.changes)
    assert lines["contract: dim"] == ("256", "16", EVERY)
    assert lines["source: model.safetensors"][2] == EVERY


def unit(rows: int, dim: int = 32, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def made(count: int) -> list[Text]:
    return [Text(str(i), f"text {i}") for i in range(count)]


def test_neighbours_alone_can_demand_a_re_embed() -> None:
    """Rows that barely move in an index where all are alike: cosines see nothing, the ten nearest are others."""
    crowd = unit(1, seed=2)[0] + np.float32(0.05) * unit(200)
    a = (crowd / np.linalg.norm(crowd, axis=1, keepdims=True)).astype(np.float32)
    moved = a + 0.1 * unit(200, seed=1)
    b = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
    moves = measure(made(200), [1] * 200, a, b)
    assert moves.cosine is not None
    assert moves.cosine.min > TOLERANCES["int8"].min_cosine
    judgement = judge(moves, "int8")
    assert judgement.answer == "re-embed"
    assert [r.split(" is ")[0] for r in judgement.reasons] == [
        "the top-10 overlap",
        "the top-10 overlap of B's queries in an index of A",
    ]


def test_shares_count_what_moved_further() -> None:
    a = np.zeros((4, 2), np.float32)
    a[:, 0] = 1
    angles = np.arccos(1 - np.array([0, 1e-5, 1e-3, 0.1]))
    b = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    moves = measure(made(4), [1, 2, 3, 4], a, b)
    assert [(s.more_than, s.texts, s.share) for s in moves.moved] == [(1e-6, 3, 0.75), (1e-4, 2, 0.5), (1e-2, 1, 0.25)]
    assert [(t.id, t.tokens) for t in moves.worst] == [("3", 4), ("2", 3), ("1", 2), ("0", 1)]


@pytest.mark.parametrize("texts", [1, 2])
def test_few_texts_are_enough(texts: int) -> None:
    a = unit(texts)
    assert judge(measure(made(texts), [1] * texts, a, a), "fp32").line == "identical vectors"


def test_a_precision_without_limits_is_refused() -> None:
    with pytest.raises(BundleError, match="there are no limits for the precision 'fp4'"):
        less_precise(["fp32", "fp4"], Policy())


def test_an_excerpt_does_nothing_to_a_terminal() -> None:
    assert (
        excerpt("a\x1b[31m\n\tred\x00 " + "x" * 100)
        == "a\N{REPLACEMENT CHARACTER}[31m red\N{REPLACEMENT CHARACTER} " + "x" * 36
    )


def test_repeated_texts_count_once_and_samples_are_even() -> None:
    texts = [Text(str(i), f"t{i // 2}", "query" if i == 0 else None) for i in range(40)]
    chosen = choose(texts, "here")
    assert (len(chosen.texts), chosen.used.duplicates) == (21, 19)  # the first two differ in their prompts
    assert [t.id for t in chosen.texts][:4] == ["0", "1", "2", "4"]
    taken = choose(made(100), "here", 10)
    assert [t.id for t in taken.texts] == [str(i) for i in range(0, 100, 10)]
    assert (taken.used.texts, taken.used.of) == (10, 100)
    assert choose(made(5), "here", 50).used.texts == 5
    with pytest.raises(InputError, match="--limit is 0"):
        choose(made(5), "here", 0)
    with pytest.raises(InputError, match="here has no text"):
        choose([], "here")


def test_batches_and_order_do_not_mix_texts_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row i is text i whatever the chunks are: seen by embedding the same texts backwards and in chunks of 3."""
    report = compared(bundle, bundle)
    assert report.verdict == "identical vectors"
    texts = choose(TEXTS, "here").texts
    record = bundle.manifest.engines[0]
    _, forward = compare.embed_with(bundle, record, texts, "A", lambda *progress: None)
    monkeypatch.setattr(embedded, "_CHUNK_TEXTS", 3)
    _, backward = compare.embed_with(bundle, record, texts[::-1], "A", lambda *progress: None)
    assert forward.tokens == backward.tokens[::-1]
    assert np.abs(forward.vectors - backward.vectors[::-1]).max() < 1e-5
    assert len({v.tobytes() for v in forward.vectors}) == len(texts)


# --- the command


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


def test_the_command_answers_in_words_and_as_json_and_imports_nothing_heavy(two: Bundle, tmp_path: Path) -> None:
    folder, texts = str(two.folder), lines_file(tmp_path, [*TEXTS[:20], replace(TEXTS[3], id="again")])
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


def test_the_command_fails_where_vectors_moved(bundle: Bundle, tiny: Bundle, tmp_path: Path) -> None:
    texts = lines_file(tmp_path, TEXTS[:20])
    done = f2rt("diff", str(bundle.folder), str(tiny.folder), "--texts", texts)
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


def test_nothing_is_written_into_a_bundle(two: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two.folder, tmp_path / "copy"))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    compared(open_bundle(folder), two, TEXTS[:5])
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_values_are_words() -> None:
    assert diff._words([8, 16]) == "8, 16"
    assert diff._words(None) == "none"
    assert shortened(f"{HASH}, 5 bytes") == "0123456789ab, 5 bytes"
    assert shortened("checkpoints/mini, 12345678901234") == "checkpoints/mini, 12345678901234"


def test_a_long_list_is_cut_on_the_terminal_alone() -> None:
    changes = [Change("int8 graph: ranges", f"layer {i}", HASH, "none", "int8 engines") for i in range(30)]
    changes.append(Change("versions", "f2rt", "1", "2", ""))
    screen = Console(width=140, record=True, file=io.StringIO())
    screen.print(diff_report._changes(changes))
    lines = [" ".join(line.replace("│", " ").split()) for line in screen.export_text().splitlines()[2:]]
    assert lines[0] == "int8 graph: ranges: layer 0 0123456789ab none int8 engines"
    assert lines[8:] == ["int8 graph: ranges: 22 more, see --json int8 engines", "versions: f2rt 1 2 none"]
