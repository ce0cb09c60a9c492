"""The bundle as the runtime meets it: whole, damaged, unproven or altered."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import golden
from runtime.batch import Batch
from runtime.bundle import (
    MANIFEST,
    Bundle,
    EngineRecord,
    Manifest,
    ParityRecord,
    bundle_files,
    check_hash,
    engine_fingerprint,
    fingerprint,
    open_bundle,
    record_file,
    write_manifest,
)
from runtime.errors import BundleError, InputError, NotFoundError, UnverifiedError
from runtime.loader import load_engine, select
from runtime.tolerances import tolerance
from tests.bundles import contents, forge_fingerprint, forge_report

ROOT = Path(__file__).resolve().parent.parent


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


# --- opening


def test_a_bundle_opens_with_what_was_written(bundle: Bundle) -> None:
    assert open_bundle(bundle.folder) == bundle
    assert bundle.manifest.contract.dim == 256
    assert bundle.path("tokenizer.json").is_file()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not there") as caught:
        open_bundle(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in caught.value.message
    assert "f2rt export" in caught.value.cure


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest.json: it is not a bundle") as caught:
        open_bundle(tmp_path)
    assert "f2rt export" in caught.value.cure


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"manifest.json"):
        open_bundle(tmp_path / "file")


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda raw: {k: v for k, v in raw.items() if k not in names}


def with_contract(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda raw: raw | {"contract": raw["contract"] | values}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda raw: "", "damaged", id="empty"),
        pytest.param(lambda raw: json.dumps(raw)[:-40], "damaged", id="cut"),
        pytest.param(lambda raw: "[]", "damaged", id="not-an-object"),
        pytest.param(without("schema_version"), "schema_version", id="no-version"),
        pytest.param(without("contract"), "contract", id="field-missing"),
        pytest.param(lambda raw: raw | {"graphs": {}}, r"graphs", id="object-for-list"),
        pytest.param(with_contract(dim="256"), r"contract\.dim", id="text-for-number"),
        pytest.param(with_contract(pooling="mean"), r"contract\.pooling", id="other-pooling"),
        pytest.param(with_contract(normalize=False), r"contract\.normalize", id="not-normalized"),
        pytest.param(with_contract(prompts=["q"]), r"contract\.prompts", id="prompts-list"),
    ],
)
def test_damaged_manifest(bundle_copy: Bundle, change: Callable[[Any], Any], named: str) -> None:
    put_manifest(bundle_copy, change(raw_manifest(bundle_copy)))
    with pytest.raises(BundleError, match=named) as caught:
        open_bundle(bundle_copy.folder)
    assert str(bundle_copy.folder / MANIFEST) in caught.value.message
    assert "Export" in caught.value.cure


@pytest.mark.parametrize(("version", "cure"), [(2, "Update f2rt"), (0, "Export the checkpoint again")])
def test_other_schema_version(bundle_copy: Bundle, version: int, cure: str) -> None:
    """A future manifest may have any other shape: only its version is read."""
    put_manifest(bundle_copy, {"schema_version": version, "all_else": "is different"})
    with pytest.raises(BundleError, match=f"schema version {version}; this f2rt reads version 1") as caught:
        open_bundle(bundle_copy.folder)
    assert cure in caught.value.cure


FILES = ["tokenizer.json", "graphs/fp32.onnx", "graphs/fp32.onnx.data", "golden.npz"]


@pytest.mark.parametrize("file", FILES)
def test_missing_file(bundle_copy: Bundle, file: str) -> None:
    bundle_copy.path(file).unlink()
    with pytest.raises(BundleError, match="is missing from the bundle") as caught:
        open_bundle(bundle_copy.folder)
    assert str(bundle_copy.path(file)) in caught.value.message


@pytest.mark.parametrize("file", FILES)
def test_file_of_another_size(bundle_copy: Bundle, file: str) -> None:
    size = bundle_copy.path(file).stat().st_size
    os.truncate(bundle_copy.path(file), size - 1)
    with pytest.raises(BundleError, match=f"has {size - 1} bytes; the manifest records {size}") as caught:
        open_bundle(bundle_copy.folder)
    assert str(bundle_copy.path(file)) in caught.value.message


def flip_byte(path: Path, at: int, mask: int = 0x40) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("file", FILES)
def test_changed_byte_is_found_by_the_hash_and_the_engine_does_not_open(bundle_copy: Bundle, file: str) -> None:
    flip_byte(bundle_copy.path(file), bundle_copy.path(file).stat().st_size // 2, 1)
    opened = open_bundle(bundle_copy.folder)
    record = next(r for r in bundle_files(opened.manifest) if r.file == file)
    for check in (lambda: check_hash(opened, record), lambda: load_engine(opened)):
        with pytest.raises(BundleError, match="SHA-256") as caught:
            check()
        assert str(bundle_copy.path(file)) in caught.value.message
        assert record.sha256[:16] in caught.value.message


def test_unchanged_files_pass_the_hash(bundle: Bundle) -> None:
    for record in bundle_files(bundle.manifest):
        check_hash(bundle, record)


def test_unknown_engine_and_precision_name_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(NotFoundError, match=r"'tensorrt:fp16'; it has: onnxruntime:fp32"):
        bundle.engine("tensorrt:fp16")
    with pytest.raises(NotFoundError, match="no int8 graph; it has: fp32"):
        bundle.graph("int8")


# --- which engine may answer


def parity(record: EngineRecord) -> ParityRecord:
    assert record.parity is not None
    return record.parity


def with_engines(bundle: Bundle, *engines: EngineRecord) -> Bundle:
    return Bundle(bundle.folder, replace(bundle.manifest, engines=list(engines)))


def test_auto_and_name_choose_the_proven_engine(bundle: Bundle) -> None:
    record, why = select(bundle, "auto")
    assert record == bundle.manifest.engines[0]
    assert "fastest" in why
    assert select(bundle, "onnxruntime:fp32") == (record, "asked for by name")


UNPROVEN = [
    pytest.param(lambda e: replace(e, parity=None), "never compared", id="never-compared"),
    pytest.param(lambda e: replace(e, parity=replace(parity(e), verdict="fail")), "its verdict is fail", id="failed"),
    pytest.param(
        lambda e: replace(e, parity=replace(parity(e), verdict="not_executed")),
        "its verdict is not_executed",
        id="not-executed",
    ),
    pytest.param(
        lambda e: replace(e, fingerprint="0" * 32), "belongs to another engine", id="verdict-of-another-engine"
    ),
]


@pytest.mark.parametrize("name", ["auto", "onnxruntime:fp32"])
@pytest.mark.parametrize(("change", "reason"), UNPROVEN)
def test_unproven_engine_may_not_answer(
    bundle: Bundle, name: str, change: Callable[[EngineRecord], EngineRecord], reason: str
) -> None:
    unproven = with_engines(bundle, change(bundle.manifest.engines[0]))
    for choose in (select, load_engine):
        with pytest.raises(UnverifiedError, match=reason) as caught:
            choose(unproven, name)
        assert "onnxruntime:fp32" in caught.value.message
        assert "f2rt parity" in caught.value.cure


def test_auto_passes_over_unproven_engines_and_says_so(bundle: Bundle) -> None:
    good = bundle.manifest.engines[0]
    fast = replace(good, name="onnxruntime:int8", parity=None)
    record, why = select(with_engines(bundle, good, fast), "auto")
    assert record == good
    assert "onnxruntime:int8 (never compared with PyTorch)" in why


def test_auto_prefers_the_faster_engine_whatever_the_order(bundle_copy: Bundle) -> None:
    good = bundle_copy.manifest.engines[0]
    slow = replace(good, name="onnxruntime:other")
    write_manifest(bundle_copy.folder, replace(bundle_copy.manifest, engines=[good, slow]))
    both = forge_report(bundle_copy.folder)
    good, slow = both.manifest.engines
    assert select(with_engines(both, slow, good), "auto")[0] == good
    assert select(with_engines(both, good, slow), "auto")[0] == good
    assert select(with_engines(both, slow), "auto")[0] == slow


def test_asked_for_by_name_never_falls_back(bundle: Bundle) -> None:
    good = bundle.manifest.engines[0]
    both = with_engines(bundle, good, replace(good, name="other:fp32", parity=None))
    with pytest.raises(UnverifiedError, match="other:fp32"):
        select(both, "other:fp32")
    with pytest.raises(NotFoundError, match="tensorrt:fp16"):
        select(both, "tensorrt:fp16")


def test_bundle_without_engines(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="has no engine"):
        select(with_engines(bundle), "auto")


# --- the golden check


def test_proven_engine_reproduces_the_golden_vectors(bundle: Bundle) -> None:
    loaded = load_engine(bundle)
    assert loaded.golden_cosine >= tolerance("fp32").min_cosine
    expected = golden.load(bundle)
    assert expected.embeddings.shape == (len(expected.texts), bundle.manifest.contract.dim)
    loaded.engine.close()


def test_golden_survives_packing(bundle_copy: Bundle) -> None:
    rng = np.random.default_rng(0)
    texts = ["", "a\x00", "é\nñ", "\U0001f642 <|im_end|>"]
    before = golden.Golden(texts, [[1], [2, 3], [4, 5, 6], [7]], rng.standard_normal((4, 8)).astype(np.float32))
    data = golden.pack(before)
    assert golden.pack(before) == data
    bundle_copy.path("golden.npz").write_bytes(data)
    after = golden.load(rehash(bundle_copy, "golden.npz"))
    assert (after.texts, after.ids) == (before.texts, before.ids)
    assert np.array_equal(after.embeddings, before.embeddings)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        assert arrays["token_ids"].tolist() == [[1, -1, -1], [2, 3, -1], [4, 5, 6], [7, -1, -1]]


def test_absent_golden_vectors_are_refused(bundle_copy: Bundle) -> None:
    put_manifest(bundle_copy, raw_manifest(bundle_copy) | {"golden": None})
    with pytest.raises(UnverifiedError, match=r"holds no golden.npz") as caught:
        load_engine(open_bundle(bundle_copy.folder))
    assert "f2rt parity" in caught.value.cure


def cut_golden(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap_golden(path: Path) -> None:
    path.write_bytes(b"not a zip archive")


def empty_golden(path: Path) -> None:
    path.write_bytes(b"")


def pickled_golden(path: Path) -> None:
    with np.load(path) as arrays:
        content = {k: arrays[k] for k in arrays.files}
    np.savez(path, **content | {"embeddings": np.array([{"a": 1}], object)})


def golden_without_vectors(path: Path) -> None:
    with np.load(path) as arrays:
        content = {k: arrays[k] for k in arrays.files if k != "embeddings"}
    np.savez(path, **content)


@pytest.mark.parametrize("damage", [cut_golden, swap_golden, empty_golden, pickled_golden, golden_without_vectors])
def test_damaged_golden_vectors_are_refused(bundle_copy: Bundle, damage: Callable[[Path], None]) -> None:
    damage(bundle_copy.path("golden.npz"))
    with pytest.raises(BundleError, match=r"golden.npz cannot be read") as caught:
        load_engine(rehash(bundle_copy, "golden.npz"))
    assert "f2rt parity" in caught.value.cure


def altered_golden(bundle: Bundle, change: Callable[[golden.Golden], golden.Golden]) -> Bundle:
    bundle.path("golden.npz").write_bytes(golden.pack(change(golden.load(bundle))))
    return rehash(bundle, "golden.npz")


def one_vector_turned(g: golden.Golden) -> golden.Golden:
    vectors = g.embeddings.copy()
    vectors[3] = np.roll(vectors[3], 1)
    return replace(g, embeddings=vectors)


def one_vector_not_finite(g: golden.Golden) -> golden.Golden:
    vectors = g.embeddings.copy()
    vectors[3, 7] = np.nan
    return replace(g, embeddings=vectors)


@pytest.mark.parametrize("change", [one_vector_turned, one_vector_not_finite])
def test_altered_golden_vectors_are_refused(
    bundle_copy: Bundle, change: Callable[[golden.Golden], golden.Golden]
) -> None:
    text = golden.load(bundle_copy).texts[3]
    with pytest.raises(UnverifiedError, match="does not reproduce PyTorch") as caught:
        load_engine(altered_golden(bundle_copy, change))
    assert repr(text[:40]) in caught.value.message
    assert "limit for fp32 is 0.99999" in caught.value.message


def test_slightly_altered_golden_vector_is_refused(bundle_copy: Bundle) -> None:
    """A cosine of 0.9999 would pass an eye; it does not pass here."""

    def tilt(g: golden.Golden) -> golden.Golden:
        vectors = g.embeddings.copy()
        other = np.random.default_rng(0).standard_normal(vectors.shape[1]).astype(np.float32)
        other -= (other @ vectors[0]) * vectors[0]
        vectors[0] = np.cos(0.0141) * vectors[0] + np.sin(0.0141) * other / np.linalg.norm(other)
        return replace(g, embeddings=vectors)

    with pytest.raises(UnverifiedError, match=r"cosine 0\.9999"):
        load_engine(altered_golden(bundle_copy, tilt))


def test_golden_vectors_of_another_dimension_are_refused(bundle_copy: Bundle) -> None:
    altered = altered_golden(bundle_copy, lambda g: replace(g, embeddings=g.embeddings[:, :128]))
    with pytest.raises(UnverifiedError, match=r"shape \(\d+, 256\).*\(\d+, 128\)"):
        load_engine(altered)


def test_swapped_tokenizer_is_refused(bundle_copy: Bundle) -> None:
    """Two words of the vocabulary change places: EOS is right, every hash is right, the ids are not."""
    path = bundle_copy.path("tokenizer.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    used = {i for ids in golden.load(bundle_copy).ids for i in ids}
    names = [name for name, i in vocabulary.items() if i in used]
    a, b = names[0], names[-1]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UnverifiedError, match="its parts give"):
        load_engine(rehash(bundle_copy, "tokenizer.json"))
    with pytest.raises(UnverifiedError, match=r"the tokenizer gives .* differ from position") as caught:
        load_engine(forge_fingerprint(bundle_copy))
    assert caught.value.cure


def test_changed_weight_is_refused_though_every_hash_fits(bundle_copy: Bundle) -> None:
    """The exponent of weights in the middle of the file: the golden vectors notice what no hash can."""
    import onnx

    model = onnx.load(bundle_copy.path("graphs/fp32.onnx"), load_external_data=False)
    weight = next(t for t in model.graph.initializer if "layers.1.mlp.down_proj" in t.name)
    place = {entry.key: entry.value for entry in weight.external_data}
    file = f"graphs/{place['location']}"
    for row in range(64):
        # Little-endian float32: the last byte of four holds the sign and most of the exponent.
        flip_byte(bundle_copy.path(file), int(place["offset"]) + 4 * 257 * row + 3, 0x80)
        flip_byte(bundle_copy.path(file), int(place["offset"]) + 4 * 257 * row + 2, 0x80)
    with pytest.raises(UnverifiedError, match="onnxruntime:fp32 does not reproduce PyTorch"):
        load_engine(forge_fingerprint(rehash(bundle_copy, file)))


# --- fingerprints


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


# --- what the cosine alone would not notice


def test_engine_file_exchanged_under_its_verdict_is_refused(bundle_copy: Bundle) -> None:
    """The record points at another file: graph and fingerprint fit, what would run does not."""
    import onnx

    model = onnx.load(bundle_copy.path("graphs/fp32.onnx"), load_external_data=False)
    model.producer_version = "other"
    onnx.save(model, bundle_copy.path("graphs/other.onnx"))
    engine = replace(bundle_copy.manifest.engines[0], file="graphs/other.onnx")
    write_manifest(bundle_copy.folder, replace(bundle_copy.manifest, engines=[engine]))
    with pytest.raises(BundleError, match=r"graphs/other\.onnx has SHA-256"):
        load_engine(open_bundle(bundle_copy.folder))


def test_golden_vectors_of_another_length_are_refused(bundle: Bundle) -> None:
    class Tripled:
        name, precision, fingerprint = "x", "fp32", ""

        def run(self, batch: Batch) -> NDArray[np.float32]:
            return 3 * expected.embeddings

        def close(self) -> None:
            pass

    expected = golden.load(bundle)
    with pytest.raises(UnverifiedError, match=r"length is off by 2\.0e\+00"):
        golden.check_engine(Tripled(), expected, 0, tolerance("fp32"))
