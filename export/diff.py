"""What differs between two bundles, line by line, as their manifests tell it; no other file is read.

Each difference says what it can reach: vectors of every engine, of one graph's or one engine's, or none. "Can" is all a
manifest knows; whether and how far vectors really move is measured in `export.moves`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.bundle import Contract, EngineRecord, FileRecord, GraphRecord, Manifest, Quantization

NOT_THERE = "not there"
EVERY = "every engine"
# What of the contract reaches a vector. Padding is masked and comes after the pooled token, and the trained dimensions
# only advise callers.
_CONTRACT = {
    "architecture": EVERY,
    "dim": EVERY,
    "trained_dims": "",
    "max_tokens": "texts longer than the smaller one",
    "pooling": EVERY,
    "eos_id": EVERY,
    "pad_id": "",
    "vocab_size": EVERY,
    "default_prompt_name": "texts that name no prompt",
    "normalize": EVERY,
}
_UNREAD = (".md", ".rst", ".gitattributes", ".gitignore", "license", "license.txt", "notice")
# Inputs of a graph that have lines of their own.
_SAID = {"weights", "config.json", "calibration texts", "prompts", "tokenizer.json", "token limit"}
_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")


@dataclass(frozen=True)
class Change:
    """One difference: where (`section`), `what`, its value in `a` and in `b`, in words; hashes whole.

    `reach` names whose vectors it can move; empty: it cannot move any.
    """

    section: str
    what: str
    a: str
    b: str
    reach: str

    @property
    def moves_vectors(self) -> bool:
        """Whether it can change a vector."""
        return bool(self.reach)


def shortened(value: str) -> str:
    """Return a value as people read it: of each hash the first twelve digits."""
    return _HASH.sub(r"\1", value)


def compare_manifests(a: Manifest, b: Manifest) -> list[Change]:
    """Return every difference between two bundles: what was given first, then what was made of it."""
    return [
        *_source(a, b),
        *_value("tokenizer", "tokenizer.json", _file(a.tokenizer), _file(b.tokenizer), EVERY),
        *compare_contracts(a.contract, b.contract),
        *_graphs(a.graphs, b.graphs),
        *_engines(a.engines, b.engines),
        *_bundle(a, b),
        *_mapping("versions", a.versions, b.versions, ""),
    ]


def compare_contracts(a: Contract, b: Contract) -> list[Change]:
    """Return the differences of two contracts; prompts one by one, as JSON strings."""
    found = [
        change
        for name, reach in _CONTRACT.items()
        for change in _value("contract", name, _words(getattr(a, name)), _words(getattr(b, name)), reach)
    ]
    return [*found, *compare_prompts(a.prompts, b.prompts)]


def compare_prompts(a: Mapping[str, str], b: Mapping[str, str]) -> list[Change]:
    """Return the prompts that differ, each as a JSON string."""
    return [
        change
        for name in sorted({*a, *b})
        for change in _value(
            "contract", f"prompt {name}", _quoted(a.get(name)), _quoted(b.get(name)), f"texts with prompt {name}"
        )
    ]


def compare_engines(a: EngineRecord, graph_a: GraphRecord, b: EngineRecord, graph_b: GraphRecord) -> list[Change]:
    """Return what tells two engines apart that are compared with each other and have different names."""
    section, reach = "the two engines", "what is compared"
    return [
        *_value(section, "backend", a.backend, b.backend, reach),
        *_value(section, "precision", a.precision, b.precision, reach),
        *_value(section, "target", a.target or "none", b.target or "none", reach),
        *_value(section, "opset", str(graph_a.opset), str(graph_b.opset), reach),
        *_value(section, "rescaling", _rescaled(graph_a), _rescaled(graph_b), reach),
        *_value(section, "quantization", _quantized(graph_a), _quantized(graph_b), reach),
        *_value(section, "calibration texts", a.calibration_sha256 or "none", b.calibration_sha256 or "none", reach),
    ]


def _source(a: Manifest, b: Manifest) -> Iterator[Change]:
    # A name and a commit say where files were found; the files themselves are compared by their hashes.
    yield from _value("source", "id", a.source.id, b.source.id, "")
    yield from _value("source", "revision", a.source.revision or "none", b.source.revision or "none", "")
    yield from _value("source", "license", a.source.license or "none", b.source.license or "none", "")
    files_a, files_b = ({f.file: f for f in m.source.files} for m in (a, b))
    for name in sorted({*files_a, *files_b}):
        reach = "" if name.lower().endswith(_UNREAD) else EVERY
        yield from _value("source", name, _file(files_a.get(name)), _file(files_b.get(name)), reach)


def _graphs(a: Sequence[GraphRecord], b: Sequence[GraphRecord]) -> Iterator[Change]:
    graphs_a, graphs_b = ({g.precision: g for g in graphs} for graphs in (a, b))
    for name in sorted({*graphs_a, *graphs_b}):
        one, other = graphs_a.get(name), graphs_b.get(name)
        if one is None or other is None:
            yield from _value("graphs", f"{name} graph", _there(one), _there(other), f"who uses {name}")
        else:
            yield from _graph(f"{name} graph", f"{name} engines", one, other)


def _graph(section: str, reach: str, a: GraphRecord, b: GraphRecord) -> Iterator[Change]:
    yield from _value(section, "model", _file(a.model), _file(b.model), reach)
    yield from _value(section, "data", _file(a.data), _file(b.data), reach)
    yield from _value(section, "twin for ONNX Runtime", _file(a.twin), _file(b.twin), reach)
    yield from _value(section, "opset", str(a.opset), str(b.opset), reach)
    yield from _value(section, "made by", _origin(a), _origin(b), reach)
    yield from _mapping(section, _rest(a.inputs), _rest(b.inputs), reach)
    yield from _value(
        section, "calibration texts", a.calibration_sha256 or "none", b.calibration_sha256 or "none", reach
    )
    rescaled_a, rescaled_b = (
        {r.tensor: f"{r.channels} channels, up to 2^{r.largest_exponent}" for r in g.rescaling} for g in (a, b)
    )
    yield from _mapping(f"{section}: rescaling", rescaled_a, rescaled_b, reach, missing="not rescaled")
    yield from _quantization(section, reach, a.quantization, b.quantization)
    yield from _value(section, "record of the calibration", _file(a.calibration), _file(b.calibration), "")
    yield from _value(section, "record of the rescaling", _file(a.plan), _file(b.plan), "")
    paths_a, paths_b = (", ".join(f.file for f in g.files) for g in (a, b))
    yield from _value(section, "paths", paths_a, paths_b, "")


def _quantization(section: str, reach: str, a: Quantization | None, b: Quantization | None) -> Iterator[Change]:
    if a is None or b is None:
        yield from _value(
            section, "quantization", "none" if a is None else "INT8", "none" if b is None else "INT8", reach
        )
        return
    yield from _value(section, "INT8 budget", f"{a.budget:g}", f"{b.budget:g}", reach)
    yield from _value(section, "INT8 share of the matrix work", f"{a.int8_share:g}", f"{b.int8_share:g}", reach)
    out_a, out_b = ({x.tensor: f"left out, {x.work_share:.1%} of the work" for x in q.excluded} for q in (a, b))
    yield from _mapping(f"{section}: left out", out_a, out_b, reach, missing="INT8")
    # `error` and `impact` are measurements of the same choice, not further differences.
    in_a, in_b = (
        {i.tensor: f"scale {i.scale:g} by {i.method}, alpha {_words(i.alpha)}" for i in q.inputs} for q in (a, b)
    )
    yield from _mapping(f"{section}: ranges", in_a, in_b, reach, missing="not rounded")


def _engines(a: Sequence[EngineRecord], b: Sequence[EngineRecord]) -> Iterator[Change]:
    engines_a, engines_b = ({e.full_name: e for e in engines} for engines in (a, b))
    for name in sorted({*engines_a, *engines_b}):
        one, other = engines_a.get(name), engines_b.get(name)
        if one is None or other is None:
            yield from _value("engines", name, _engine(one), _engine(other), f"who uses {name}")
        else:
            yield from _engine_changes(name, one, other)


def _engine_changes(name: str, a: EngineRecord, b: EngineRecord) -> Iterator[Change]:
    # How an engine was made reaches its vectors through its file: the same bytes are the same engine.
    reach = name if a.sha256 != b.sha256 or a.graph_sha256 != b.graph_sha256 else ""
    section = f"engine {name}"
    yield from _value(section, "fingerprint", a.fingerprint, b.fingerprint, name)
    yield from _value(section, "file's SHA-256", a.sha256, b.sha256, name)
    yield from _value(section, "compiled from graph", a.graph_sha256 or "none", b.graph_sha256 or "none", reach)
    yield from _value(
        section, "calibration texts", a.calibration_sha256 or "none", b.calibration_sha256 or "none", reach
    )
    yield from _mapping(section, a.builder, b.builder, reach, prefix="built with ")
    yield from _value(section, "flags", "; ".join(a.flags) or "none", "; ".join(b.flags) or "none", reach)
    yield from _value(section, "profiles", ", ".join(a.profiles) or "none", ", ".join(b.profiles) or "none", reach)
    yield from _value(section, "path", a.file, b.file, "")
    yield from _value(section, "made at", a.made_at or "not recorded", b.made_at or "not recorded", "")
    yield from _value(section, "verdict", _verdict(a), _verdict(b), "")


def _bundle(a: Manifest, b: Manifest) -> Iterator[Change]:
    # Weights, tokenizer and contract: what it stands for has lines of its own.
    yield from _value("bundle", "fingerprint", a.fingerprint, b.fingerprint, EVERY)
    yield from _value("bundle", "made at", a.created_at, b.created_at, "")
    yield from _value("bundle", "golden vectors", _file(a.golden), _file(b.golden), "")
    yield from _value("bundle", "notices", "; ".join(a.notices) or "none", "; ".join(b.notices) or "none", "")


def _value(section: str, what: str, a: str, b: str, reach: str) -> Iterator[Change]:
    if a != b:
        yield Change(section, what, a, b, reach)


def _mapping(
    section: str,
    a: Mapping[str, str],
    b: Mapping[str, str],
    reach: str,
    *,
    missing: str = NOT_THERE,
    prefix: str = "",
) -> Iterator[Change]:
    for key in sorted({*a, *b}):
        one, other = a.get(key, missing), b.get(key, missing)
        if one != other:
            yield Change(section, prefix + key, one, other, reach)


def _rest(inputs: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in inputs.items() if name not in _SAID}


def _words(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _quoted(text: str | None) -> str:
    return NOT_THERE if text is None else json.dumps(text, ensure_ascii=False)


def _file(record: FileRecord | None) -> str:
    return NOT_THERE if record is None else f"{record.sha256}, {record.size_bytes:,} bytes"


def _there(graph: GraphRecord | None) -> str:
    return NOT_THERE if graph is None else f"opset {graph.opset}, {_file(graph.data)}"


def _origin(graph: GraphRecord) -> str:
    return "f2rt" if graph.origin is None else f"{graph.origin.producer}, given as {graph.origin.id}"


def _rescaled(graph: GraphRecord) -> str:
    return f"{len(graph.rescaling)} tensors" if graph.rescaling else "none"


def _quantized(graph: GraphRecord) -> str:
    q = graph.quantization
    return "none" if q is None else f"INT8, {q.int8_share:.1%} of the matrix work, {len(q.excluded)} inputs left out"


def _engine(record: EngineRecord | None) -> str:
    return NOT_THERE if record is None else f"{record.fingerprint}, verdict {_verdict(record)}"


def _verdict(record: EngineRecord) -> str:
    parity = record.parity
    if parity is None:
        return "never compared with PyTorch"
    if parity.verdict == "not_executed":
        return "not executed"
    return f"{parity.verdict} on {parity.texts} texts, min cosine {parity.min_cosine:.7f}"
