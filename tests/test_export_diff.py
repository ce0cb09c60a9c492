"""`f2rt diff` and manifests: what changed, line by line, and whether it can move a vector."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import pytest
from rich.console import Console

from export import diff, diff_report
from export.diff import EVERY, Change, compare_contracts, compare_manifests, shortened
from runtime.bundle import (
    Bundle,
    Contract,
    EngineRecord,
    Exclusion,
    FileRecord,
    GraphRecord,
    Origin,
    Quantization,
    QuantizedInput,
    Rescaling,
)
from tests.diffs import FP32, said

HASH = "0123456789abcdef" * 4


def test_a_manifest_equals_itself(int8_bundle: Bundle) -> None:
    assert compare_manifests(int8_bundle.manifest, int8_bundle.manifest) == []


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
def test_no_field_of_a_graph_changes_in_silence(int8_bundle: Bundle, name: str) -> None:
    """A field that is added to the manifest must be given its line, or this fails."""
    graph = full_graph()
    a, b = (replace(int8_bundle.manifest, graphs=[g]) for g in (graph, replace(graph, **{name: GRAPH_CHANGES[name]})))
    changes = compare_manifests(a, b)
    assert changes
    assert any(c.moves_vectors for c in changes) == (name not in ("calibration", "plan"))


@pytest.mark.parametrize("name", [f.name for f in fields(EngineRecord) if f.name != "name"])
def test_no_field_of_an_engine_changes_in_silence(int8_bundle: Bundle, name: str) -> None:
    engine = int8_bundle.manifest.engines[0]
    # Backend and precision are the name's two halves.
    changed = replace(engine, **{name: ENGINE_CHANGES[name]})
    if name in ("backend", "precision"):
        changed = replace(changed, name=f"{changed.backend}:{changed.precision}")
    a, b = (replace(int8_bundle.manifest, engines=[e]) for e in (engine, changed))
    changes = compare_manifests(a, b)
    assert changes
    moving = {"backend", "precision", "sha256", "fingerprint", "target", "graph_sha256"}
    assert any(c.moves_vectors for c in changes) == (name in moving)


@pytest.mark.parametrize("name", [f.name for f in fields(Contract)])
def test_no_field_of_the_contract_changes_in_silence(int8_bundle: Bundle, name: str) -> None:
    contract = int8_bundle.manifest.contract
    changes = compare_contracts(contract, replace(contract, **{name: CONTRACT_CHANGES[name]}))
    assert changes
    assert any(c.moves_vectors for c in changes) == (name not in ("trained_dims", "pad_id"))


def test_how_an_engine_was_built_reaches_vectors_only_through_its_file(int8_bundle: Bundle) -> None:
    engine = int8_bundle.manifest.engines[0]
    a = replace(int8_bundle.manifest, engines=[engine])
    built = replace(engine, builder={"tensorrt": "11.1"}, profiles=["8x64"])
    same = said(compare_manifests(a, replace(a, engines=[built])))
    assert same[f"engine {FP32}: profiles"] == ("none", "8x64", "")
    other = said(compare_manifests(a, replace(a, engines=[replace(built, sha256=HASH)])))
    assert other[f"engine {FP32}: profiles"] == ("none", "8x64", FP32)
    assert other[f"engine {FP32}: built with tensorrt"] == ("not there", "11.1", FP32)


def test_what_int8_rounds_is_compared_input_by_input(int8_bundle: Bundle) -> None:
    graph = full_graph()
    q = graph.quantization
    assert q is not None
    q = replace(q, budget=0.8, int8_share=0.85, inputs=[replace(q.inputs[0], scale=0.25)], excluded=[])
    a, b = (replace(int8_bundle.manifest, graphs=[g]) for g in (graph, replace(graph, quantization=q)))
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


def test_where_and_when_cannot_move_vectors(int8_bundle: Bundle) -> None:
    m = int8_bundle.manifest
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
def test_each_file_of_the_source_is_compared_by_its_hash(int8_bundle: Bundle, file: str) -> None:
    m = int8_bundle.manifest
    files = [replace(f, sha256=HASH) if f.file == file else f for f in m.source.files]
    (change,) = compare_manifests(m, replace(m, source=replace(m.source, files=files)))
    assert (change.section, change.what, change.reach) == ("source", file, EVERY)
    assert change.b.startswith(HASH)
    gone = [f for f in m.source.files if f.file != file]
    (change,) = compare_manifests(m, replace(m, source=replace(m.source, files=gone)))
    assert change.b == "not there"


def test_hashes_that_begin_alike_are_different(int8_bundle: Bundle) -> None:
    a, b = (replace(int8_bundle.manifest, tokenizer=FileRecord("t", HASH[:-1] + end, 1)) for end in "ab")
    (change,) = compare_manifests(a, b)
    assert shortened(change.a) == shortened(change.b) == "0123456789ab, 1 bytes"


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
