"""Adds compiled engines to a bundle, and keeps those whose inputs have not changed.

The engine file is written first, beside the one it replaces, and the manifest then: until then the bundle is as it was.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import runtime
from export.builder import MODULES, Progress, build_engine, library_version
from export.cache import cached_sha256
from export.changes import UNCHANGED, damage, spare_name
from export.lock import Wait, bundle_lock
from export.precision import Precision
from export.profiles import Profile
from runtime.bundle import (
    Bundle,
    EngineRecord,
    GraphRecord,
    engine_fingerprint,
    open_bundle,
    write_manifest,
)
from runtime.errors import BundleError, InputError
from runtime.files import write_atomic


@dataclass(frozen=True)
class Outcome:
    """What became of one engine: its record, and why it was built or kept."""

    record: EngineRecord
    built: bool
    reason: str


def add_engine(
    folder: Path,
    backend: str,
    precision: Precision,
    profiles: tuple[Profile, ...],
    *,
    target: str | None = None,
    progress: Progress = lambda label, done, total: None,
    wait: Wait = Wait(),
) -> Outcome:
    """Build the engine of one backend, precision and target, unless the bundle has it from the same inputs.

    Raises InputError, NotFoundError for a graph the bundle lacks, BundleError for one that was changed,
    MissingExtraError, EngineError or OutputError; the bundle is then unchanged.
    """
    open_bundle(folder)  # where there is no bundle there is nothing to lock
    with bundle_lock(folder, "f2rt build", wait):
        return _add_engine(open_bundle(folder), backend, precision, profiles, target, progress)


def _add_engine(
    bundle: Bundle,
    backend: str,
    precision: Precision,
    profiles: tuple[Profile, ...],
    target: str | None,
    progress: Progress,
) -> Outcome:
    if backend not in MODULES:
        raise InputError(f"there is no builder {backend!r}.", cure=f"Choose one of: {', '.join(MODULES)}.")
    graph = bundle.graph(precision)
    version = library_version(backend)
    wanted = [str(p) for p in profiles]
    old = _find(bundle, f"{backend}:{precision}", target)
    reason = _stale(bundle, old, graph, backend, version, wanted)
    if old is not None and reason is None:
        return Outcome(old, False, UNCHANGED)
    problem = damage(bundle, graph.files)
    if problem:
        raise BundleError(f"{bundle.folder}: {problem} after the export.", cure="Export the checkpoint again.")
    built = build_engine(bundle.path(graph.model.file), backend, precision, profiles, target=target, progress=progress)
    others = [e for e in bundle.manifest.engines if (e.name, e.target) != (f"{backend}:{precision}", built.target)]
    replaced = [e.file for e in bundle.manifest.engines if e not in others]
    file = spare_name(f"engines/{backend}/{precision}-{built.target}.engine", replaced)
    write_atomic(bundle.path(file), built.data)
    sha256 = hashlib.sha256(built.data).hexdigest()
    record = EngineRecord(
        name=f"{backend}:{precision}",
        backend=backend,
        precision=precision,
        file=file,
        sha256=sha256,
        fingerprint=engine_fingerprint(bundle.manifest.fingerprint, graph, backend, sha256),
        builder={"f2rt": runtime.__version__, **built.builder},
        flags=built.flags,
        profiles=wanted,
        target=built.target,
        calibration_sha256=graph.calibration_sha256,
        graph_sha256=graph.key,
    )
    write_manifest(bundle.folder, replace(bundle.manifest, engines=[*others, record]))
    for old_file in replaced:
        bundle.path(old_file).unlink(missing_ok=True)
    return Outcome(record, True, reason or "the bundle had none")


def _find(bundle: Bundle, name: str, target: str | None) -> EngineRecord | None:
    wanted = target or "current"
    return next((e for e in bundle.manifest.engines if (e.name, e.target) == (name, wanted)), None)


def _stale(
    bundle: Bundle, old: EngineRecord | None, graph: GraphRecord, backend: str, version: str, profiles: list[str]
) -> str | None:
    """Return why an engine must be built again, or None."""
    if old is None:
        return "the bundle had none"
    if old.graph_sha256 != graph.key:
        return "the graph changed"
    if old.builder.get(backend) != version:
        return f"{backend} is {version} now, it was {old.builder.get(backend)}"
    if old.profiles != profiles:
        return "the profiles changed"
    path = bundle.path(old.file)
    if not path.is_file() or cached_sha256(path) != old.sha256:
        return "its file is missing or was changed"
    return None
