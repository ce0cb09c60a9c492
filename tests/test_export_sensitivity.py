"""What rounding does to a layer is a finite number, and an export that goes wrong there leaves the old bundle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calibration.texts import Text
from export import sensitivity
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from runtime.bundle import Bundle, open_bundle
from runtime.errors import BundleError, EngineError
from runtime.tokenizer import Instruction, TextTokenizer
from tests.tiny import write_tiny

TEXTS = [Text(str(i), text) for i, text in enumerate(["zero at the start", "no zero here", "a third text of words"])]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def zero_the_first_token(folder: Path) -> None:
    """Make the embedding of the first token of TEXTS[0] a row of zeros, which then stays one in every layer."""
    checkpoint = Checkpoint.open(locate(str(folder)))
    tokenizer = TextTokenizer(folder / "tokenizer.json", checkpoint.contract)
    first = tokenizer.encode([TEXTS[0].text], Instruction(prompt=""))[0].ids[0]
    (path,) = folder.glob("*.safetensors")
    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    tensors["embed_tokens.weight"][first] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def export(folder: Path, out: Path) -> Bundle:
    checkpoint = Checkpoint.open(locate(str(folder)))
    return export_bundle(checkpoint, out, [Precision.FP32, Precision.INT8], calibration=TEXTS)


def test_a_row_of_zeros_is_no_trouble(tiny: Path, tmp_path: Path) -> None:
    zero_the_first_token(tiny)
    record = open_bundle(export(tiny, tmp_path / "bundle").folder).graph("int8").quantization
    assert record is not None
    impacts = [line.impact for line in [*record.inputs, *record.excluded]]
    assert all(math.isfinite(impact) for impact in impacts)
    assert any(impact > 0 for impact in impacts)


def test_a_row_of_zeros_has_no_say_and_others_keep_theirs() -> None:
    rng = np.random.default_rng(0)
    true = [rng.normal(size=(1, 9, 4)).astype(np.float32)]
    found = [true[0] * np.float32(1.01)]
    assert sensitivity._impact(true, found) == pytest.approx(1e-4, rel=1e-3)
    true[0][0, 0] = found[0][0, 0] = 0
    assert sensitivity._impact(true, found) == pytest.approx(8 / 9 * 1e-4, rel=1e-3)
    nothing = [np.zeros((1, 3, 4), np.float32)]
    assert sensitivity._impact(nothing, nothing) == 0


def test_an_impact_that_is_not_finite_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_impact", lambda true, found: math.nan)
    with pytest.raises(EngineError, match=r"rounding layers\.0\.input_layernorm to INT8 .* by nan"):
        export(tiny, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_that_cannot_be_read_takes_no_ones_place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    old = export_bundle(Checkpoint.open(locate(str(tiny))), folder, [Precision.FP32])
    monkeypatch.setattr("export.quantize._short", lambda number: math.nan)
    with pytest.raises(
        BundleError, match=r"manifest\.json was not written, .*`float`, got `null`.*Nothing was changed"
    ):
        export(tiny, folder)
    assert open_bundle(folder).manifest == old.manifest


class Broken:
    """A session of ONNX Runtime that fails, with what it is made of or when it runs."""

    def __init__(self, *, on_open: bool) -> None:
        if on_open:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : no such kernel")

    def get_inputs(self) -> list[object]:
        return []

    def run(self, *arguments: object) -> list[object]:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad shape")


@pytest.mark.parametrize(
    ("module", "on_open", "words"),
    [
        ("probe", True, "failed opening embed_tokens for the probe: .*no such kernel"),
        ("probe", False, r"failed in the probe on embed_tokens, text 0 of \d+ tokens: .*bad shape"),
        ("sensitivity", True, r"failed opening the graph's part up to embed_tokens\.out for .*no such kernel"),
        ("sensitivity", False, r"failed in INT8's sensitivity on embed_tokens\.out, text 0 of \d+ tokens: .*bad shape"),
    ],
)
def test_what_the_library_raises_is_explained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, on_open: bool, words: str
) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"export.{module}.open_part", lambda graph, part: Broken(on_open=on_open))
    with pytest.raises(EngineError, match=words):
        export(tiny, tmp_path / "bundle")
