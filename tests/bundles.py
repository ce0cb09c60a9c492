"""Bundles changed on purpose, for tests of what notices it."""

from __future__ import annotations

from dataclasses import replace

from runtime.bundle import (
    Bundle,
    Manifest,
    content_fingerprint,
    engine_fingerprint,
    open_bundle,
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
    return open_bundle(bundle.folder)
