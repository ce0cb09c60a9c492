"""Fingerprints follow from the parts that decide a vector, from all of them and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle import Bundle, Manifest, engine_fingerprint, fingerprint
from tests.bundles import contents


def test_recorded_fingerprints_follow_from_the_parts(bundle: Bundle) -> None:
    manifest = bundle.manifest
    engine, graph = manifest.engines[0], manifest.graphs[0]
    assert manifest.fingerprint == contents(manifest)
    assert engine.fingerprint == engine_fingerprint(manifest.fingerprint, graph, engine.backend, engine.sha256)
    assert engine.fingerprint != manifest.fingerprint
    assert len(engine.fingerprint) == 32
    assert int(engine.fingerprint, 16)


def other_source(manifest: Manifest) -> Manifest:
    files = [replace(f, sha256="0" * 64) if f.file.endswith(".safetensors") else f for f in manifest.source.files]
    return replace(manifest, source=replace(manifest.source, files=files))


CONTENT_CHANGES = {
    "weights": other_source,
    "tokenizer": lambda m: replace(m, tokenizer=replace(m.tokenizer, sha256="0" * 64)),
    "prompt": lambda m: replace(m, contract=replace(m.contract, prompts=m.contract.prompts | {"query": "Query:"})),
    "default-prompt": lambda m: replace(m, contract=replace(m.contract, default_prompt_name="query")),
    "max-tokens": lambda m: replace(m, contract=replace(m.contract, max_tokens=512)),
    "eos": lambda m: replace(m, contract=replace(m.contract, eos_id=15984)),
}


@pytest.mark.parametrize("change", CONTENT_CHANGES.values(), ids=CONTENT_CHANGES.keys())
def test_content_fingerprint_changes_with_every_part(bundle: Bundle, change: Callable[[Manifest], Manifest]) -> None:
    assert contents(change(bundle.manifest)) != contents(bundle.manifest)


def test_content_fingerprint_does_not_change_with_what_decides_no_vector(bundle: Bundle) -> None:
    manifest = bundle.manifest
    elsewhere = replace(manifest.source, id="/another/place", revision="main", license="mit")
    card = [replace(f, sha256="0" * 64) if f.file == "README.md" else f for f in manifest.source.files]
    assert contents(replace(manifest, source=replace(elsewhere, files=card[::-1]))) == contents(manifest)


def test_engine_fingerprint_changes_with_every_part(bundle: Bundle) -> None:
    content, graph, backend, sha256 = "content", bundle.manifest.graphs[0], "onnxruntime", "f" * 64
    found = {
        engine_fingerprint(content, graph, backend, sha256),
        engine_fingerprint("other", graph, backend, sha256),
        engine_fingerprint(content, replace(graph, precision="fp16"), backend, sha256),
        engine_fingerprint(content, replace(graph, model=replace(graph.model, sha256="0")), backend, sha256),
        engine_fingerprint(content, replace(graph, data=replace(graph.data, sha256="0")), backend, sha256),
        engine_fingerprint(content, graph, "tensorrt", sha256),
        engine_fingerprint(content, graph, backend, "0" * 64),
    }
    assert len(found) == 7


@given(st.lists(st.text(max_size=4), max_size=5), st.lists(st.text(max_size=4), max_size=5))
def test_no_two_lists_share_a_fingerprint(a: list[str], b: list[str]) -> None:
    assert (fingerprint(a) == fingerprint(b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [(["ab", "c"], ["a", "bc"]), (["ab"], ["a", "b"]), (["a", ""], ["a"]), (["", "a"], ["a", ""]), ([], [""])],
)
def test_parts_keep_their_borders(a: list[str], b: list[str]) -> None:
    assert fingerprint(a) != fingerprint(b)
