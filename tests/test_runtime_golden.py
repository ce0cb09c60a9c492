"""The golden check: an engine that does not give the recorded vectors does not answer, though every hash fits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import golden
from runtime.batch import Batch
from runtime.bundle import Bundle, open_bundle, write_manifest
from runtime.errors import BundleError, UnverifiedError
from runtime.loader import load_engine
from runtime.tolerances import tolerance
from tests.bundles import flip_byte, forge_fingerprint, put_manifest, raw_manifest, rehash


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
