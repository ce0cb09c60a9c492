"""What an export has to write again, and why; and which engines and verdicts outlive it.

Every graph records its *inputs*: the name of each thing that decided its bytes, with a hash or value. A graph whose
inputs are still the same, and whose files are still whole, is kept byte for byte. An engine depends on the bytes that
its compiler reads of the graph alone, so it outlives even a graph that was written again, if these came out the same.
(INT8 engines from when the form for ONNX Runtime counted as well do not.) A verdict belongs to an engine's fingerprint
and to what PyTorch reads of the checkpoint.

Decides and links files; writes no graph and no manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import onnx_ir as ir

from calibration.texts import Text, texts_sha256
from export.cache import cached_sha256
from export.checkpoint import Checkpoint, reference_files
from export.config import CONFIG
from export.conventions import TOKENIZER
from export.encoder import build_encoder
from export.external_data import DATA_FORMAT, DataLayout
from export.precision import Precision
from export.quantize import RULES as INT8_RULES
from export.report.files import DERIVED_FILES
from export.rescale import RULES
from export.weights import INDEX
from runtime.bundle import (
    MANIFEST,
    REPORT,
    Bundle,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    Source,
    engine_fingerprint,
    read_manifest,
)
from runtime.errors import BundleError
from runtime.files import copy_file

UNCHANGED = "nothing it depends on has changed"
STRUCTURE = "graph structure"
# What a narrow graph has beside it since then: a bundle without is written again.
KEPT_BESIDE = "calibration, plan"
_SHOWN_CHARS = 20


@dataclass(frozen=True)
class Decision:
    """What becomes of one graph: `kept` is its record in the old bundle, None when it is written. `reason` says why."""

    precision: Precision
    inputs: dict[str, str]
    kept: GraphRecord | None
    reason: str


def graph_inputs(
    checkpoint: Checkpoint, source: Source, precision: Precision, calibration: Sequence[Text], int8_budget: float
) -> dict[str, str]:
    """Return everything that decides the bytes of one graph: a name for people, and a hash or value.

    Narrow graphs are shaped by activations, so the calibration texts count with all that turns them into token ids.
    What differs between two f2rt versions shows in the structure of the graph they write for this checkpoint, and in
    `DATA_FORMAT` and `RULES` for what a structure cannot show.
    """
    hashes = {f.file: f.sha256 for f in source.files}
    weights = sorted(f"{f}:{sha256}" for f, sha256 in hashes.items() if f == INDEX or f.endswith(".safetensors"))
    inputs = {
        "weights": _digest(weights),
        CONFIG: _digest(checkpoint.config),
        "data format": str(DATA_FORMAT),
        STRUCTURE: structure_sha256(checkpoint, precision),
    }
    if precision is Precision.FP32:
        return inputs
    inputs["kept beside"] = KEPT_BESIDE
    used = {t.prompt for t in calibration}
    if precision is Precision.INT8:
        inputs |= {"INT8 budget": str(int8_budget), "INT8 rules": str(INT8_RULES)}
    return inputs | {
        "calibration texts": texts_sha256(calibration),
        "prompts": _digest({name: text for name, text in checkpoint.contract.prompts.items() if name in used}),
        TOKENIZER: hashes[TOKENIZER],
        "token limit": str(checkpoint.contract.max_tokens),
        "rescaling rules": str(RULES),
        # The probe runs the fp32 graph.
        STRUCTURE: _digest([inputs[STRUCTURE], structure_sha256(checkpoint, Precision.FP32)]),
    }


def structure_sha256(checkpoint: Checkpoint, precision: Precision) -> str:
    """Return a hash over the graph f2rt writes for a checkpoint, as far as its shape decides it: no weight is read.

    It covers nodes, attributes, where each tensor lies in the data file, and the computed tensors; not f2rt's version.
    """
    layout = DataLayout(f"{precision}.onnx.data")
    model = build_encoder(checkpoint.config, layout, producer_version="", precision=precision)
    digest = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True))
    for entry in layout.entries:
        digest.update(f"{entry.name} {entry.source} {entry.transposed} {entry.offset}\n".encode())
        if entry.values is not None:
            digest.update(entry.values.tobytes())
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def find_old(folder: Path, *, force: bool) -> tuple[Bundle | None, str]:
    """Return the bundle at `folder`, and the reason for writing a graph that it does not have."""
    if force:
        return None, "--force was given"
    if not (folder / MANIFEST).is_file():
        return None, "the bundle is new"
    try:
        return Bundle(folder, read_manifest(folder)), "the bundle had none"
    except BundleError as error:
        return None, f"the old bundle cannot be used: {error.message}"


def decide(
    old: Bundle | None,
    precision: Precision,
    inputs: dict[str, str],
    otherwise: str,
    advance: Callable[[int], None] = lambda count: None,
) -> Decision:
    """Compare a graph's inputs with those recorded; `otherwise` is the reason where there is nothing to compare with.

    Reads the graph's files to see that they are whole; `advance` is told the bytes done.
    """
    record = next((g for g in old.manifest.graphs if g.precision == precision), None) if old else None
    if old is None or record is None:
        return Decision(precision, inputs, None, otherwise)
    reason = difference(record.inputs, inputs) or damage(old, record.all_files, advance)
    return Decision(precision, inputs, None if reason else record, reason or UNCHANGED)


def difference(old: dict[str, str], new: dict[str, str]) -> str | None:
    """Return which inputs changed, in words, or None. The structure follows from the rest: it is named when alone."""
    if not old:
        return "the old bundle does not say what it was made from"
    changed = [name for name in new | old if old.get(name) != new.get(name)]
    named = [name for name in changed if name != STRUCTURE]
    if not named:
        return "this f2rt writes another graph" if changed else None
    return f"{' and '.join(_spell(name, old.get(name, ''), new.get(name, '')) for name in named)} changed"


def _spell(name: str, old: str, new: str) -> str:
    """Name an input; with its values where they are short enough to be read."""
    short = max(len(old), len(new)) <= _SHOWN_CHARS
    return f"{name} ({old or 'none'} to {new or 'none'})" if short else name


def damage(
    bundle: Bundle, records: Iterable[FileRecord], advance: Callable[[int], None] = lambda n: None
) -> str | None:
    """Return which of these files is not the one recorded, in words, or None."""
    for record in records:
        path = bundle.path(record.file)
        try:
            if path.stat().st_size != record.size_bytes or cached_sha256(path, advance) != record.sha256:
                return f"{record.file} was changed"
        except FileNotFoundError:
            return f"{record.file} is missing"
        except OSError as error:
            return f"{record.file} cannot be read ({error.strerror})"
    return None


def manifest_after(old: Bundle | None, new: Manifest, tell: Callable[[str], None]) -> Manifest:
    """Return `new` with what outlives of the old bundle: engines, their verdicts, golden vectors.

    An engine stays when its graph is, byte for byte, in the new manifest; `tell` is told of the compiled ones that do
    not. Fingerprints are computed anew, since they also stand for weights, tokenizer and contract; a verdict stays with
    the fingerprint it was given to, as long as PyTorch reads what it read then.
    """
    if old is None:
        return new
    graphs = {g.precision: g for g in new.graphs}
    same_reference = reference_files(old.manifest.source) == reference_files(new.source)
    engines = {e.full_name: e for e in new.engines}
    for engine in old.manifest.engines:
        graph = graphs.get(engine.precision)
        lost = _lost(old, engine, graph)
        if graph is None or lost:
            if engine.target:  # one that was compiled; the others are only graphs
                tell(f"dropped {old.path(engine.file)}: {lost}")
            continue
        mark = engine_fingerprint(new.fingerprint, graph, engine.backend, engine.sha256)
        parity = engine.parity if same_reference and mark == engine.fingerprint else None
        calibration = graph.calibration_sha256
        engines[engine.full_name] = replace(engine, fingerprint=mark, parity=parity, calibration_sha256=calibration)
    golden = old.manifest.golden
    if not same_reference or old.manifest.contract != new.contract or (golden and damage(old, [golden])):
        golden = None
    return replace(new, engines=list(engines.values()), golden=golden)


def _lost(old: Bundle, engine: EngineRecord, graph: GraphRecord | None) -> str | None:
    """Return why an engine cannot stay, or None."""
    if graph is None:
        return f"{engine.precision} was not asked for"
    changed = f"the {engine.precision} graph changed"
    of_graph = {f.file: f.sha256 for f in graph.files}
    if engine.file in of_graph:  # ONNX Runtime on the graph itself
        return None if of_graph[engine.file] == engine.sha256 else changed
    if engine.graph_sha256 != graph.key:
        return changed
    with contextlib.suppress(OSError):
        if cached_sha256(old.path(engine.file)) == engine.sha256:
            return None
    return "it is missing or was changed"


def is_same(old: Bundle, new: Manifest) -> bool:
    """Return whether writing `new` would change nothing in the old bundle but its date."""
    before = old.manifest
    dated = replace(new, created_at=before.created_at, versions=before.versions)
    return dated == before and not damage(old, [before.tokenizer])


def outliving_files(new: Manifest, old: Bundle) -> list[str]:
    """Return the old bundle's files besides graphs that `new` names: engines, golden vectors, the report."""
    graph_files = {f.file for graph in new.graphs for f in graph.all_files}
    files = [e.file for e in new.engines if e.file not in graph_files]
    files += [new.golden.file] if new.golden else []
    report = any(e.parity for e in new.engines) and old.path(REPORT).is_file()
    forms = [file for file in DERIVED_FILES if old.path(file).is_file()]
    return [*files, REPORT, *forms] if report else files


def spare_name(file: str, taken: Iterable[str]) -> str:
    """Return `file`, or a second name where the manifest uses the first.

    What replaces a file goes beside it, and the old one goes after the manifest names the new: until then the bundle
    is the old one, whole.
    """
    path = Path(file)
    return file if file not in set(taken) else str(path.with_name(f"{path.stem}.1{path.suffix}"))


def carry(old: Bundle, files: Iterable[str], staging: Path) -> None:
    """Give files of the old bundle a second name in the new folder. Raises OSError.

    They are copied where the file system has no links. Nobody ever writes into a bundle's files: they are replaced.
    """
    for file in files:
        place = staging / file
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old.path(file), place)
        except OSError:
            copy_file(old.path(file), place, BundleError)
