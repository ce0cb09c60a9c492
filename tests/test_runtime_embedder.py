"""Texts to vectors, vectors to bytes, and the arrows: what the runtime may import, checked by blocking and by reading.

Equivalence comes first: one text alone, in a batch, in another order and from another thread gives the same vector.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from export.reference import Reference
from runtime.bundle import Bundle
from runtime.embedder import Embedder, finish, open_embedder
from runtime.encoding import OutputDType, decode, encode
from runtime.errors import EngineError, InputError, NotFoundError
from runtime.settings import EngineSettings, Limits
from runtime.tokenizer import Truncate
from runtime.tolerances import tolerance

ROOT = Path(__file__).resolve().parent.parent
MIXED = [
    "a",
    "The library opens at nine. " * 20,
    "",
    "Où est la bibliothèque ?",
    "東京",
    "def f(x):\n    return x\n" * 8,
    "one two three",
]


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    limit = tolerance("fp32")
    cosines = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    difference = np.abs(found - expected).max()
    assert cosines.min() >= limit.min_cosine, f"cosine {cosines.min()}, difference {difference}"
    assert difference <= limit.max_abs_diff, f"cosine {cosines.min()}, difference {difference}"


# --- embedding


def test_vectors_are_those_of_pytorch(embedder: Embedder, reference: Reference) -> None:
    prompt = embedder.contract.prompts["query"]
    expected = np.stack([reference.embed(reference.tokenize(prompt + t, 1024)) for t in MIXED])
    result = embedder.embed(MIXED, prompt_name="query")
    assert_same(result.vectors, expected)
    assert result.vectors.dtype == np.float32
    assert result.vectors.shape == (len(MIXED), 256)
    assert result.fingerprint == embedder.bundle.manifest.engines[0].fingerprint
    assert result.tokenize_ms > 0
    assert result.infer_ms > 0


def test_one_text_is_the_same_as_in_a_batch_and_order_is_kept(embedder: Embedder) -> None:
    together = embedder.embed(MIXED)
    alone = np.concatenate([embedder.embed([text]).vectors for text in MIXED])
    assert_same(together.vectors, alone)
    assert_same(embedder.embed(MIXED[::-1]).vectors, alone[::-1])
    assert [item.rendered for item in together.items] == MIXED
    # The comparison can fail: no two of these texts are alike.
    assert (alone @ alone.T - np.eye(len(MIXED))).max() < 0.99


@pytest.mark.parametrize("limits", [Limits(max_batch_rows=1), Limits(max_batch_rows=2), Limits(max_batch_tokens=8)])
def test_batch_limits_do_not_change_vectors(embedder: Embedder, limits: Limits) -> None:
    small = Embedder(embedder.bundle, embedder.loaded, limits)
    assert_same(small.embed(MIXED).vectors, embedder.embed(MIXED).vectors)


def test_unit_length(embedder: Embedder) -> None:
    norms = np.linalg.norm(embedder.embed(MIXED).vectors, axis=1)
    assert np.abs(norms - 1).max() <= tolerance("fp32").norm_error


def test_prompt_changes_the_vector(embedder: Embedder) -> None:
    plain, named = embedder.embed(["a text"]), embedder.embed(["a text"], prompt_name="query")
    given_as_text = embedder.embed(["a text"], prompt=embedder.contract.prompts["query"])
    assert np.array_equal(named.vectors, given_as_text.vectors)
    assert (plain.vectors * named.vectors).sum() < 0.99


@pytest.mark.parametrize("dim", [1, 8, 100, 128, 255])
def test_dimensions_are_cut_then_normalized(embedder: Embedder, dim: int) -> None:
    full = embedder.embed(MIXED).vectors
    cut = full[:, :dim]
    found = embedder.embed(MIXED, dimensions=dim).vectors
    assert found.shape == (len(MIXED), dim)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)


def test_full_dimension_is_the_whole_vector(embedder: Embedder) -> None:
    full = embedder.embed(MIXED).vectors
    assert np.array_equal(embedder.embed(MIXED, dimensions=256).vectors, full)
    assert np.array_equal(embedder.embed(MIXED, normalize=False).vectors, full)


def test_without_normalization_the_cut_is_left_as_it_is(embedder: Embedder) -> None:
    full = embedder.embed(MIXED).vectors
    found = embedder.embed(MIXED, dimensions=32, normalize=False).vectors
    assert np.array_equal(found, full[:, :32])
    assert found.flags.c_contiguous
    assert (np.linalg.norm(found, axis=1) < 0.99).all()


def test_cut_of_zeros_stays_zero() -> None:
    vectors = np.array([[0, 0, 1], [3, 4, 0]], np.float32)
    assert finish(vectors, 2, True).tolist() == [[0, 0], [np.float32(0.6), np.float32(0.8)]]


@pytest.mark.parametrize("dimensions", [0, -1, 257])
def test_dimensions_outside_are_refused(embedder: Embedder, dimensions: int) -> None:
    with pytest.raises(InputError, match=f"dimensions is {dimensions}; this model gives 1 to 256") as caught:
        embedder.embed(["a"], dimensions=dimensions)
    assert "8, 16, 32, 64, 128, 256" in caught.value.cure


def test_long_text_is_truncated_and_says_so(embedder: Embedder) -> None:
    text = "vector " * 3000
    result = embedder.embed([text, "short"])
    long, short = result.items
    assert (len(long.ids), long.truncated, short.truncated) == (1024, True, False)
    assert long.original_tokens > 3000
    assert long.ids[-1] == embedder.contract.eos_id
    with pytest.raises(InputError, match=f"text 0 has {long.original_tokens} tokens; the limit is 1024"):
        embedder.embed([text], truncate=Truncate.ERROR)


def test_unknown_prompt_is_refused(embedder: Embedder) -> None:
    with pytest.raises(NotFoundError, match="'passage'"):
        embedder.embed(["a"], prompt_name="passage")


def test_empty_request_is_refused(embedder: Embedder) -> None:
    for work in (lambda: embedder.embed([]), lambda: embedder.verbatim([])):
        with pytest.raises(InputError, match="has 0 items; it may have 1 to 2048") as caught:
            work()
        assert "at least one text" in caught.value.cure


def test_limits_are_enforced_with_value_and_limit(embedder: Embedder) -> None:
    strict = Embedder(embedder.bundle, embedder.loaded, Limits(max_items=3, max_text_chars=20, max_request_tokens=15))
    accepted = strict.embed(["a", "b", "c" * 20])  # each limit met exactly
    assert sum(len(item.ids) for item in accepted.items) == 15
    with pytest.raises(InputError, match="has 4 items; it may have 1 to 3"):
        strict.embed(["a"] * 4)
    with pytest.raises(InputError, match="text 1 has 21 characters; the limit is 20"):
        strict.embed(["a", "c" * 21])
    with pytest.raises(InputError, match="the request has 20 tokens; the limit is 15"):
        strict.verbatim([[5] * 10, [6] * 10])
    with pytest.raises(InputError, match=r"the request has \d+ tokens; the limit is 15"):
        strict.embed(["1 2 3 4 5 6 7 8"] * 2)


def test_verbatim_ids_give_the_vector_of_their_text(embedder: Embedder) -> None:
    result = embedder.embed(MIXED)
    assert_same(embedder.infer(embedder.verbatim([item.ids for item in result.items])), result.vectors)


def test_vector_that_is_not_finite_is_an_engine_error(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedder.loaded.engine
    run = engine.run

    def poisoned(batch: object) -> NDArray[np.float32]:
        vectors = run(batch)  # type: ignore[arg-type]
        vectors[0, 3] = np.nan
        return vectors

    monkeypatch.setattr(engine, "run", poisoned)
    with pytest.raises(EngineError, match="not finite for item 1") as caught:
        embedder.embed(["a", "a longer text comes first in its batch"])
    assert caught.value.cure


def test_many_threads_get_the_vectors_of_one(embedder: Embedder) -> None:
    expected = embedder.embed(MIXED).vectors
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(embedder.embed, MIXED[i % 3 :]) for i in range(18)]
        for i, future in enumerate(futures):
            assert_same(future.result().vectors, expected[i % 3 :])


def test_bundle_is_opened_by_several_threads_at_once(bundle: Bundle, embedder: Embedder) -> None:
    def open_and_embed(_: int) -> NDArray[np.float32]:
        mine = open_embedder(bundle, settings=EngineSettings(threads=1, spin=False))
        try:
            return mine.embed(MIXED).vectors
        finally:
            mine.close()

    with ThreadPoolExecutor(3) as pool:
        for vectors in pool.map(open_and_embed, range(3)):
            assert_same(vectors, embedder.embed(MIXED).vectors)


# --- vectors as bytes

VECTORS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 20)), elements=st.floats(-1, 1, width=32).map(np.float32)
)


@given(VECTORS)
def test_float32_is_exact(vectors: NDArray[np.float32]) -> None:
    data, scales = encode(vectors, OutputDType.FLOAT32)
    assert scales is None
    assert data == vectors.astype("<f4").tobytes()
    assert np.array_equal(decode(data, *vectors.shape, OutputDType.FLOAT32), vectors)


@given(VECTORS)
def test_float16_is_the_nearest(vectors: NDArray[np.float32]) -> None:
    data, scales = encode(vectors, OutputDType.FLOAT16)
    assert scales is None
    assert len(data) == 2 * vectors.size
    found = decode(data, *vectors.shape, OutputDType.FLOAT16)
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors.astype(np.float16).astype(np.float32))


@given(VECTORS)
def test_int8_is_within_half_a_step(vectors: NDArray[np.float32]) -> None:
    vectors = np.where(np.abs(vectors) < 1e-6, 0, vectors).astype(np.float32)
    data, scales = encode(vectors, OutputDType.INT8)
    assert scales is not None
    assert len(data) == vectors.size
    found = decode(data, *vectors.shape, OutputDType.INT8, scales)
    assert (np.abs(found - vectors) <= 0.501 * scales[:, None]).all()
    largest = np.abs(vectors).max(axis=1)
    assert np.allclose(scales[largest > 0], largest[largest > 0] / 127)
    assert (scales[largest == 0] == 1).all()


@given(VECTORS)
def test_binary_keeps_the_sign(vectors: NDArray[np.float32]) -> None:
    rows, dim = vectors.shape
    data, scales = encode(vectors, OutputDType.BINARY)
    assert scales is None
    assert len(data) == rows * -(-dim // 8)
    assert np.array_equal(decode(data, rows, dim, OutputDType.BINARY), np.where(vectors > 0, 1, -1))


def test_binary_puts_the_first_value_in_the_highest_bit() -> None:
    data, _ = encode(np.array([[1, -1, -1, -1, -1, -1, -1, 1, 1]], np.float32), OutputDType.BINARY)
    assert data == bytes([0b10000001, 0b10000000])


@pytest.mark.parametrize("extra", [-1, 1])
@pytest.mark.parametrize("dtype", list(OutputDType))
def test_wrong_byte_count_is_refused(dtype: OutputDType, extra: int) -> None:
    data, scales = encode(np.ones((3, 16), np.float32), dtype)
    wrong = data + b"\x00" if extra > 0 else data[:-1]
    with pytest.raises(InputError, match=f"{len(wrong)} bytes are not 3 rows of 16 {dtype} values") as caught:
        decode(wrong, 3, 16, dtype, scales)
    assert f"({len(data)} bytes)" in caught.value.message
    assert caught.value.cure


def test_int8_without_scales_is_refused() -> None:
    data, _ = encode(np.ones((1, 4), np.float32), OutputDType.INT8)
    with pytest.raises(InputError, match="without their scales"):
        decode(data, 1, 4, OutputDType.INT8)


# --- the arrows: blocked, then read

ALONE = """
import importlib, json, pkgutil, sys

BLOCKED = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tensorrt", "safetensors", "huggingface_hub",
           "ml_dtypes", "export", "calibration"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Block())
for name in sorted(BLOCKED):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "is blocked" in str(error), error
    else:
        raise AssertionError(f"{name} is not blocked")

import runtime
found = [m.name for m in pkgutil.walk_packages(runtime.__path__, "runtime.", onerror=lambda name: sys.exit(name))]
for name in found:
    importlib.import_module(name)

from pathlib import Path
from runtime.bundle import open_bundle
from runtime.embedder import open_embedder
embedder = open_embedder(open_bundle(Path(sys.argv[1])))
vectors = embedder.embed(json.loads(sys.argv[2])).vectors
print(json.dumps({"modules": found, "vectors": vectors.tolist()}))
"""


def test_runtime_works_alone(bundle: Bundle, embedder: Embedder) -> None:
    """Every module imports, and a bundle embeds, where nothing that makes bundles can be imported."""
    command = [sys.executable, "-c", ALONE, str(bundle.folder), json.dumps(MIXED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "runtime").rglob("*.py")
        if "_pb" not in path.parts
    } - {"runtime"}
    assert files <= set(result["modules"])
    assert_same(np.array(result["vectors"], np.float32), embedder.embed(MIXED).vectors)


def imports(path: Path) -> set[str]:
    """Return the dotted names a file imports, anywhere in it; a relative import is resolved against its package."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def importers(package: str, *names: str) -> dict[str, set[str]]:
    """Return the files below `package` that import one of `names`, with what of them they import."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if "_pb" in path.parts:
            continue
        hits = {i for i in imports(path) if i.partition(".")[0] in names}
        if hits:
            found[str(path.relative_to(ROOT))] = hits
    return found


def test_runtime_imports_neither_export_nor_calibration_nor_what_they_use() -> None:
    assert importers("runtime", "export", "calibration", "tests", "bench") == {}
    assert importers("runtime", "torch", "transformers", "onnx", "onnx_ir", "safetensors", "huggingface_hub") == {}


def test_calibration_imports_neither_export_nor_torch() -> None:
    assert importers("calibration", "export", "tests", "bench", "torch", "transformers", "onnx", "onnx_ir") == {}


def test_only_the_reference_imports_torch_and_transformers() -> None:
    assert set(importers("export", "torch", "transformers")) == {"export/reference.py"}


def test_only_its_engine_imports_an_inference_library() -> None:
    assert set(importers("runtime", "onnxruntime")) == {"runtime/engines/onnxruntime.py"}
    outside = [file for file in importers("runtime", "tensorrt", "cuda") if not file.startswith("runtime/engines/")]
    assert outside == []


def test_only_wire_and_client_know_a_protocol() -> None:
    wire = ("grpc", "grpc_health", "grpc_reflection", "google", "starlette", "uvicorn")
    found = set(importers("runtime", *wire))
    assert {"runtime/client.py", "runtime/wire/f2rt_v1.py", "runtime/wire/http_app.py"} <= found
    stubs = {file for file, names in importers("runtime", "runtime").items() if any("._pb" in n for n in names)}
    assert all(file.startswith(("runtime/client", "runtime/wire/")) for file in found | stubs)


def test_imports_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader above sees what it must forbid: inside functions, renamed, relative and below a package."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "bad.py").write_text(
        "def f():\n    import torch.nn as nn\n    from export import pipeline\n"
        "from . import batch\nfrom .errors import X\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(tmp_path / "runtime" / "bad.py") == {
        "torch.nn",
        "export",
        "export.pipeline",
        "runtime",
        "runtime.batch",
        "runtime.errors",
        "runtime.errors.X",
    }
    assert set(importers("runtime", "torch")) == {"runtime/bad.py"}
