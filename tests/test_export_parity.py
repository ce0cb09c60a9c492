"""Parity: a sound bundle passes, and every kind of damage is caught and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from calibration.texts import Text, read_texts, verification_texts
from export.cli import app
from export.parity import check_bundle
from export.prove import prove_bundle
from export.reference import Reference
from export.report.data import ParityReport
from export.runs import compare
from export.samples import GOLDEN_TEXTS
from runtime.bundle import Bundle, engine_fingerprint, open_bundle, record_file, write_manifest
from runtime.errors import BundleError, CheckpointError, NotFoundError, UnverifiedError
from runtime.loader import load_engine
from runtime.tolerances import tolerance

ENGINE = "onnxruntime:fp32"


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """Some of every kind, short enough to be quick."""
    return [t for t in verification_texts() if len(t.text) < 250][::17]


def rehash(bundle: Bundle) -> Bundle:
    """Make the manifest agree with the files, as an exporter with a fault would have: no hash gives it away."""
    manifest = bundle.manifest
    (graph,) = manifest.graphs
    graph = dataclasses.replace(
        graph, model=record_file(bundle.folder, graph.model.file), data=record_file(bundle.folder, graph.data.file)
    )
    sha256 = graph.model.sha256
    mark = engine_fingerprint(manifest.fingerprint, graph, "onnxruntime", sha256)
    engines = [dataclasses.replace(e, sha256=sha256, fingerprint=mark, parity=None) for e in manifest.engines]
    tokenizer = record_file(bundle.folder, manifest.tokenizer.file)
    write_manifest(
        bundle.folder, dataclasses.replace(manifest, graphs=[graph], engines=engines, tokenizer=tokenizer, golden=None)
    )
    return open_bundle(bundle.folder)


def edit_graph(bundle: Bundle, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    path = bundle.path("graphs/fp32.onnx")
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    return rehash(bundle)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def edit_weight(bundle: Bundle, name: str, value: float) -> Bundle:
    """Overwrite a whole weight in the data file."""
    model = onnx.load(bundle.path("graphs/fp32.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with bundle.path("graphs/fp32.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.full(int(place["length"]) // 4, value, np.float32).tobytes())
    return rehash(bundle)


def report_of(bundle: Bundle, reference: Reference, texts: list[Text]) -> ParityReport:
    return check_bundle(bundle, reference, texts)[0]


def failed_checks(report: ParityReport) -> set[str]:
    return {c.name for c in report.engines[0].checks if c.verdict == "fail"}


def test_sound_bundle_passes_every_check(bundle: Bundle, reference: Reference, texts: list[Text]) -> None:
    report = report_of(bundle, reference, texts)
    (engine,) = report.engines
    assert report.verdict == engine.verdict == "pass"
    assert [c.name for c in engine.checks] == [
        *("single", "batch", "permuted", "equal length", "padded", "repeat", "one thread"),
        *("dim 8", "dim 16", "dim 32", "dim 64", "dim 128"),
    ]
    for check in engine.checks:
        assert check.rows > 0
        assert check.cosine_min >= tolerance("fp32").min_cosine
        assert check.cosine_min <= check.cosine_p01 <= check.cosine_mean + 1e-12
        assert check.non_finite == 0
    assert {c.name for c in engine.checks if c.vs_single_min_cosine is not None} == {
        *("batch", "permuted", "padded", "repeat", "one thread")
    }


def test_pooling_index_off_by_one(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    def flip(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2, np.int64), "two"))
        node(model, "last_position").input[1] = "two"

    (engine,) = report_of(edit_graph(bundle_copy, flip), reference, texts).engines
    assert engine.verdict == "fail"
    assert any("token before the last is pooled" in text for text in engine.diagnosis)
    assert any("last_position" in text for text in engine.diagnosis)


def test_dropped_eos_in_the_tokenizer(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    path = bundle_copy.path("tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["post_processor"] = tokenizer["post_processor"]["processors"][0]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    report = report_of(rehash(bundle_copy), reference, texts)
    assert report.verdict == "fail"
    assert report.engines[0].verdict == "fail"
    assert any("EOS" in m.explanation for m in report.tokenizer_mismatches)


def test_dropped_eos_in_the_runtime(
    bundle: Bundle, reference: Reference, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.tokenizer import TextTokenizer

    honest = TextTokenizer.encode

    def forgetful(self: TextTokenizer, *args: object, **kwargs: object) -> object:
        return [dataclasses.replace(i, ids=i.ids[:-1]) for i in honest(self, *args, **kwargs)]  # type: ignore[arg-type]

    monkeypatch.setattr(TextTokenizer, "encode", forgetful)
    report = report_of(bundle, reference, texts)
    assert report.verdict == "fail"
    assert len(report.tokenizer_mismatches) == len(texts)
    assert "EOS (15986) is missing" in report.tokenizer_mismatches[0].explanation


def test_zeroed_layer(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    damaged = edit_weight(bundle_copy, "layers.2.mlp.down_proj.weight.transposed", 0.0)
    (engine,) = report_of(damaged, reference, texts).engines
    assert engine.verdict == "fail"
    assert any("layers.2.mlp.down_proj.weight" in t and "all zero" in t for t in engine.diagnosis)


def test_missing_causal_mask(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    def uncausal(model: onnx.ModelProto) -> None:
        for a in node(model, "layers.0.self_attn").attribute:
            if a.name == "is_causal":
                a.i = 0

    report = report_of(edit_graph(bundle_copy, uncausal), reference, texts)
    assert "equal length" in failed_checks(report)
    assert any("layers.0.self_attn " in t and "is_causal=1" in t for t in report.engines[0].diagnosis)


def test_missing_key_mask_shows_in_padded_batches_only(
    bundle_copy: Bundle, reference: Reference, texts: list[Text]
) -> None:
    """A single text has no padding, so without the batch checks this damage would go unseen."""

    def unmask(model: onnx.ModelProto) -> None:
        last = node(model, "layers.3.self_attn")
        del last.input[3]

    report = report_of(edit_graph(bundle_copy, unmask), reference, texts)
    failed = failed_checks(report)
    assert {"batch", "padded"} <= failed
    assert "single" not in failed
    assert "equal length" not in failed


def test_missing_normalization(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    def unnormalize(model: onnx.ModelProto) -> None:
        node(model, "normalize").op_type = "Identity"
        del node(model, "normalize").attribute[:]

    (engine,) = report_of(edit_graph(bundle_copy, unnormalize), reference, texts).engines
    assert engine.verdict == "fail"
    assert any("not normalized" in t for t in engine.diagnosis)


def test_vectors_that_are_not_finite(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    (engine,) = report_of(edit_weight(bundle_copy, "norm.weight", float("nan")), reference, texts).engines
    assert engine.verdict == "fail"
    assert engine.checks[0].non_finite > 0
    assert any("norm.weight" in t for t in engine.diagnosis)


def test_graph_that_cannot_be_loaded_fails(bundle_copy: Bundle, reference: Reference, texts: list[Text]) -> None:
    bundle_copy.path("graphs/fp32.onnx").write_bytes(b"no graph")
    report = report_of(rehash(bundle_copy), reference, texts)
    assert report.verdict == "fail"
    assert "cannot load" in report.engines[0].diagnosis[0]


def test_one_bad_row_among_many_is_not_averaged_away() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((500, 32)).astype(np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = expected.copy()
    found[123] = np.roll(found[123], 1)
    check = compare("x", found, expected, tolerance("fp32"))
    assert check.verdict == "fail"
    assert check.cosine_min < 0.9 < check.cosine_p01
    found[123] = np.nan
    check = compare("x", found, expected, tolerance("fp32"))
    assert check.non_finite == 32
    assert check.cosine_min == -1


@pytest.mark.parametrize(
    ("scale", "noise", "words"),
    [(1.001, 0.0, "norm error"), (1.0, 2e-3, "min cosine")],
    ids=["too long", "noisy"],
)
def test_each_limit_is_named(scale: float, noise: float, words: str) -> None:
    rng = np.random.default_rng(1)
    expected = rng.standard_normal((8, 64)).astype(np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = (expected + noise * rng.standard_normal(expected.shape)).astype(np.float32)
    found *= scale / np.linalg.norm(found, axis=1, keepdims=True)
    check = compare("x", found, expected, tolerance("fp32"))
    assert any(words in p for p in check.problems)


def test_verdict_golden_and_report_are_recorded(bundle: Bundle) -> None:
    (engine,) = bundle.manifest.engines
    assert engine.parity is not None
    assert engine.parity.verdict == "pass"
    assert engine.parity.fingerprint == engine.fingerprint
    report = json.loads(bundle.path("parity/report.json").read_text(encoding="utf-8"))
    assert record_file(bundle.folder, "parity/report.json").sha256 == engine.parity.report_sha256
    assert report["coverage"]["texts_sha256"] == engine.parity.texts_sha256
    loaded = load_engine(bundle)
    assert loaded.golden_cosine >= tolerance("fp32").min_cosine
    with np.load(bundle.path("golden.npz")) as arrays:
        assert arrays["embeddings"].shape == (GOLDEN_TEXTS, 256)


def test_failing_verdict_is_recorded_and_refused(bundle_copy: Bundle, texts: list[Text]) -> None:
    damaged = edit_weight(bundle_copy, "layers.0.input_layernorm.weight", 0.5)
    assert prove_bundle(damaged.folder, texts).verdict == "fail"
    with pytest.raises(UnverifiedError, match="verdict is fail"):
        load_engine(open_bundle(damaged.folder))
    with pytest.raises(UnverifiedError, match="verdict is fail"):
        load_engine(open_bundle(damaged.folder), ENGINE)


def test_proving_again_keeps_the_bundle_whole(bundle_copy: Bundle, texts: list[Text]) -> None:
    before = bundle_copy.manifest.engines[0].fingerprint
    assert prove_bundle(bundle_copy.folder, texts[:10]).verdict == "pass"
    after = open_bundle(bundle_copy.folder)
    assert after.manifest.engines[0].fingerprint == before
    load_engine(after)


def test_changed_checkpoint_is_not_taken_for_the_source(
    bundle_copy: Bundle, mini_copy: Path, texts: list[Text]
) -> None:
    (mini_copy / "config.json").write_text((mini_copy / "config.json").read_text() + "\n")
    with pytest.raises(BundleError, match=r"config\.json is not the file"):
        prove_bundle(bundle_copy.folder, texts, model=str(mini_copy))


def test_moved_checkpoint_needs_its_folder(bundle_copy: Bundle, mini: Path, texts: list[Text]) -> None:
    manifest = bundle_copy.manifest
    source = dataclasses.replace(manifest.source, id="./gone")
    write_manifest(bundle_copy.folder, dataclasses.replace(manifest, source=source))
    with pytest.raises(CheckpointError, match="--model FOLDER"):
        prove_bundle(bundle_copy.folder, texts)
    assert prove_bundle(bundle_copy.folder, texts[:5], model=str(mini)).verdict == "pass"


def test_unknown_engine(bundle: Bundle, reference: Reference, texts: list[Text]) -> None:
    with pytest.raises(NotFoundError, match="it has: onnxruntime:fp32"):
        check_bundle(bundle, reference, texts, engine_names=["tensorrt:fp16"])


def test_exit_codes_and_table(
    bundle_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Text]
) -> None:
    """0 pass, 1 below a limit, 2 could not check; through the command itself."""
    monkeypatch.setattr("calibration.texts.verification_texts", lambda: texts)
    own = tmp_path / "own.txt"
    own.write_text("meine eigene Zeile\nune autre ligne\n", encoding="utf-8")
    run = CliRunner().invoke
    folder = str(bundle_copy.folder)
    done = run(app, ["parity", folder, "--texts", str(own), "--report-dir", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "PASS" in done.output
    assert "worst texts" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["coverage"]["texts"] == len(texts) + len(read_texts(own))
    edit_weight(bundle_copy, "layers.1.self_attn.v_proj.weight.transposed", 0.0)
    failed = run(app, ["parity", folder])
    assert failed.exit_code == 1
    assert "FAIL" in failed.output
    assert "layers.1.self_attn.v_proj.weight" in failed.output.replace("\n", "")
    assert run(app, ["parity", str(tmp_path / "nothing")]).exit_code == 2
    own.write_bytes(b"\xff\xfe\x00")
    assert run(app, ["parity", folder, "--texts", str(own)]).exit_code == 2
