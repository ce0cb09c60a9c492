"""The bundle as the runtime meets it: whole, damaged or of another version, and which of its engines may answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import (
    MANIFEST,
    Bundle,
    EngineRecord,
    ParityRecord,
    bundle_files,
    check_hash,
    open_bundle,
    write_manifest,
)
from runtime.errors import BundleError, InputError, NotFoundError, UnverifiedError
from runtime.loader import load_engine, select
from tests.bundles import flip_byte, forge_report, put_manifest, raw_manifest

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


def test_auto_passes_over_unproven_engines_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.loader.has_fast_int8_products", lambda: True)
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
