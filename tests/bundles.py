"""Bundles changed on purpose, for tests of what notices it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from runtime.bundle import (
    MANIFEST,
    REPORT,
    Bundle,
    EngineRecord,
    Manifest,
    content_fingerprint,
    engine_fingerprint,
    open_bundle,
    record_file,
    write_manifest,
)


def contents(manifest: Manifest) -> str:
    """Return the fingerprint a manifest's own parts give."""
    return content_fingerprint(manifest.contract, manifest.tokenizer, manifest.source)


def forge_fingerprint(bundle: Bundle) -> Bundle:
    """Make every fingerprint and verdict fit the parts: what is left to notice a change is the golden check."""
    manifest = open_bundle(bundle.folder).manifest
    content = contents(manifest)
    engines = []
    for engine, graph in zip(manifest.engines, manifest.graphs, strict=True):
        mark = engine_fingerprint(content, graph, engine.backend, engine.sha256)
        assert engine.parity is not None
        engines.append(replace(engine, fingerprint=mark, parity=replace(engine.parity, fingerprint=mark)))
    write_manifest(bundle.folder, replace(manifest, fingerprint=content, engines=engines))
    return forge_report(bundle.folder)


def forge_report(folder: Path) -> Bundle:
    """Make the report say what the manifest says of each engine that has a verdict."""
    report = json.loads((folder / REPORT).read_bytes())
    judged = {one["engine"]: one for one in report["engines"]}
    engines = []
    for engine in open_bundle(folder).manifest.engines:
        if engine.parity is not None:
            known = judged.get(engine.full_name, report["engines"][0])
            verdict = {name: value for name, value in asdict(engine.parity).items() if name in known}
            engines.append({**known, **verdict, "engine": engine.full_name, "fingerprint": engine.fingerprint})
    data = json.dumps({**report, "engines": engines}).encode()
    (folder / REPORT).write_bytes(data)
    return edit_manifest_verdicts(folder, report_sha256=hashlib.sha256(data).hexdigest())


def edit_engines(folder: Path, change: Callable[[EngineRecord], EngineRecord]) -> Bundle:
    """Change what the manifest says of each engine."""
    manifest = open_bundle(folder).manifest
    write_manifest(folder, replace(manifest, engines=[change(engine) for engine in manifest.engines]))
    return open_bundle(folder)


def edit_verdicts(folder: Path, **fields: Any) -> Bundle:
    """Change fields of each engine's verdict, in the manifest and in the report."""
    edit_manifest_verdicts(folder, **fields)
    return forge_report(folder)


def edit_manifest_verdicts(folder: Path, **fields: Any) -> Bundle:
    """Change fields of each engine's verdict in the manifest alone."""

    def change(engine: EngineRecord) -> EngineRecord:
        return replace(engine, parity=replace(engine.parity, **fields)) if engine.parity else engine

    return edit_engines(folder, change)


def without_golden(folder: Path) -> Bundle:
    """Take the golden vectors out of the manifest."""
    write_manifest(folder, replace(open_bundle(folder).manifest, golden=None))
    return open_bundle(folder)


def raw_manifest(bundle: Bundle) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    return raw


def put_manifest(bundle: Bundle, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (bundle.folder / MANIFEST).write_text(text, encoding="utf-8")


def rehash(bundle: Bundle, file: str) -> Bundle:
    """Write the manifest anew with the hash and size `file` has now, as someone hiding a change would."""
    record = record_file(bundle.folder, file)
    raw = raw_manifest(bundle)

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("file") == file:
                value |= {k: v for k, v in msgspec.to_builtins(record).items() if k in value}
            for child in value.values():
                visit(child)
        elif isinstance(value, list):
            for child in value:
                visit(child)

    visit({k: v for k, v in raw.items() if k != "source"})
    put_manifest(bundle, raw)
    return open_bundle(bundle.folder)


def flip_byte(path: Path, at: int, mask: int = 0x40) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))
