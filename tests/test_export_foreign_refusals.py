"""What --from-onnx refuses: each with what is wrong, where, and the cure, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from export.checkpoint import Checkpoint
from export.cli import app
from export.foreign import open_foreign
from runtime.errors import CheckpointError, InputError
from tests.foreign import Stock, adopt, edited, node

Change = Callable[[ir.Model], None]


def refused(checkpoint: Checkpoint, source: Path, tmp_path: Path, error: type[Exception] = InputError) -> InputError:
    """Try to take `source` in; it must fail with a cure and leave nothing behind."""
    target = tmp_path / "out" / "bundle"
    with pytest.raises(error) as caught:
        adopt(checkpoint, source, target)
    assert not list(target.parent.glob("*") if target.parent.exists() else [])
    assert not list(target.parent.glob(".*") if target.parent.exists() else [])
    assert isinstance(caught.value, InputError)
    assert caught.value.cure
    return caught.value


def test_no_folder_no_graph_no_onnx(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert "there is no folder" in refused(checkpoint, tmp_path / "gone", tmp_path).message
    (tmp_path / "empty").mkdir()
    assert "holds no .onnx file" in refused(checkpoint, tmp_path / "empty", tmp_path).message
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "is not an .onnx file" in refused(checkpoint, tmp_path / "weights.bin", tmp_path).message


def test_several_graphs_and_none_is_the_usual_one(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock("dynamic"), tmp_path / "given"))
    (folder / "model.onnx").rename(folder / "encoder.onnx")
    shutil.copy(folder / "encoder.onnx", folder / "encoder_2.onnx")
    error = refused(checkpoint, folder, tmp_path)
    assert "encoder.onnx, encoder_2.onnx" in error.message
    assert f"--from-onnx {folder / 'encoder.onnx'}" in error.cure
    assert open_foreign(folder / "encoder_2.onnx", checkpoint.config).path.name == "encoder_2.onnx"
    (folder / "encoder_2.onnx").unlink()
    assert open_foreign(folder, checkpoint.config).path.name == "encoder.onnx"  # the only one


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no graph"),
        (b"this is no protobuf", "cannot be read as ONNX"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    ],
    ids=["empty", "text", "pointer"],
)
def test_file_that_is_no_model(checkpoint: Checkpoint, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert words in refused(checkpoint, tmp_path / "model.onnx", tmp_path).message


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_cut_file(checkpoint: Checkpoint, stock: Stock, tmp_path: Path, kept: float) -> None:
    data = (stock("legacy") / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: int(len(data) * kept)])
    message = refused(checkpoint, tmp_path / "model.onnx", tmp_path).message
    assert "cannot be read as ONNX" in message


def test_missing_and_cut_data_file(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock("dynamic"), tmp_path / "given"))
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(20_000_000)
    error = refused(checkpoint, folder, tmp_path)
    assert "has 20000000 bytes; model.onnx wants 266" in error.message
    (folder / "model.onnx.data").unlink()
    error = refused(checkpoint, folder, tmp_path)
    assert "lie in model.onnx.data, which is not beside it" in error.message


@pytest.mark.parametrize("place", ["../secret.data", "/etc/passwd"])
def test_data_file_elsewhere(checkpoint: Checkpoint, stock: Stock, tmp_path: Path, place: str) -> None:
    folder = Path(shutil.copytree(stock("dynamic"), tmp_path / "given"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    onnx.save(model, folder / "model.onnx")
    assert "outside its own folder" in refused(checkpoint, folder, tmp_path).message


def test_data_file_behind_a_link_is_taken(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    """As the hub's cache keeps files: links to where they really lie."""
    (tmp_path / "snapshot").mkdir()
    for file in stock("dynamic").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    bundle = adopt(checkpoint, tmp_path / "snapshot", tmp_path / "bundle")
    assert not any(p.is_symlink() for p in bundle.folder.rglob("*"))


def outputs(model: ir.Model, *values: ir.Value) -> None:
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)


def add(model: ir.Model, new: ir.Node, name: str, shape: list[str | int]) -> ir.Value:
    model.graph.append(new)
    value = new.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    return value


def constant(model: ir.Model, name: str, values: object, dtype: type = np.int64) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, dtype), name=name))
    model.graph.register_initializer(value)
    return value


def last_column(model: ir.Model) -> None:
    """The state at the last column alone: the last token's only where padding is on the left."""
    (hidden,) = model.graph.outputs
    bounds = [constant(model, f"bound.{i}", v) for i, v in enumerate(([-1], [1 << 40], [1]))]
    outputs(model, add(model, node("Slice", hidden, *bounds), "last_hidden_state", ["batch", 1, 256]))
    hidden.name = "all_states"


def pooled_only(model: ir.Model) -> None:
    """A vector a text, pooled already."""
    (hidden,) = model.graph.outputs
    index = constant(model, "last", -1)
    outputs(model, add(model, node("Gather", hidden, index, axis=1), "sentence_embedding", ["batch", 256]))


def logits_only(model: ir.Model) -> None:
    """A score per token of the vocabulary."""
    (hidden,) = model.graph.outputs
    head = constant(model, "head", np.zeros((256, 16000)), np.float32)
    outputs(model, add(model, node("MatMul", hidden, head), "scores", ["batch", "sequence", 16000]))


def two_states(model: ir.Model) -> None:
    """Two outputs that could both be it, under names that say nothing."""
    (hidden,) = model.graph.outputs
    hidden.name = "states_a"
    other = add(model, node("Identity", hidden), "states_b", ["batch", "sequence", 256])
    outputs(model, hidden, other)


def wrong_width(model: ir.Model) -> None:
    """Hidden states of another size."""
    (hidden,) = model.graph.outputs
    narrow = constant(model, "narrow", np.zeros((256, 64)), np.float32)
    outputs(model, add(model, node("MatMul", hidden, narrow), "last_hidden_state", ["batch", "sequence", 64]))
    hidden.name = "wide"


def hidden_width(model: ir.Model) -> None:
    """The same, and the declared shape does not say so."""
    wrong_width(model)
    model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", "hidden"])


def wants_types(model: ir.Model) -> None:
    """An input that Qwen3 does not have."""
    extra = ir.Value(
        name="token_type_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"])
    )
    model.graph.inputs.append(extra)


def three_positions(model: ir.Model) -> None:
    """Positions with an axis more, as multimodal models have them."""
    extra = ir.Value(
        name="position_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3, "batch", "sequence"])
    )
    model.graph.inputs.append(extra)


def long_inputs(model: ir.Model) -> None:
    """A mask with four axes."""
    model.graph.inputs[1].shape = ir.Shape(["batch", 1, "sequence", "sequence"])


def old_opset(model: ir.Model) -> None:
    """An opset whose nodes take axes as attributes."""
    model.graph.opset_imports[""] = 11


def unknown_attribute(model: ir.Model) -> None:
    """A node with an attribute that its operator does not have."""
    added = next(n for n in model.graph if n.op_type == "Add")
    added.attributes["speed"] = ir.AttrInt64("speed", 9)


def brain_float(model: ir.Model) -> None:
    """A weight that ONNX Runtime cannot multiply here, bfloat16."""
    matrix = ir.tensor(np.zeros((8, 8), np.float32).astype(ir.DataType.BFLOAT16.numpy()), name="narrow.weight")
    model.graph.register_initializer(ir.Value(name="narrow.weight", const_value=matrix))


def sees_the_last_column(model: ir.Model) -> None:
    """Every state also holds a part of the last column's: right only without padding, or with it on the left."""
    (hidden,) = model.graph.outputs
    hidden.name = "causal"
    bounds = [constant(model, f"bound.{i}", v) for i, v in enumerate(([-1], [1 << 40], [1]))]
    last = add(model, node("Slice", hidden, *bounds), "last", ["batch", 1, 256])
    outputs(model, add(model, node("Add", hidden, last), "last_hidden_state", ["batch", "sequence", 256]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (last_column, "padded on the left"),
        (pooled_only, "A vector that is already pooled cannot be checked"),
        (logits_only, "text-generation export: it gives scores [batch, sequence, 16000]"),
        (two_states, "as states_a and as states_b"),
        (wrong_width, "last_hidden_state has 64 dimensions; the checkpoint's hidden_size is 256"),
        (hidden_width, "gives 64 dimensions; the checkpoint's hidden_size is 256"),
        (wants_types, "the input token_type_ids"),
        (three_positions, "position_ids is [3, batch, sequence]"),
        (long_inputs, "attention_mask is [batch, 1, sequence, sequence]"),
        (old_opset, "opset 11"),
        (unknown_attribute, "does not make a valid ONNX model: Unrecognized attribute: speed"),
        (brain_float, "BFLOAT16"),
        (sees_the_last_column, "when pads follow them in a batch"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_graph_that_cannot_be_used(
    checkpoint: Checkpoint, stock: Stock, tmp_path: Path, change: Change, words: str
) -> None:
    given = edited(stock("dynamic"), tmp_path / "given", change)
    assert words in refused(checkpoint, given, tmp_path).message


@pytest.mark.slow
def test_fixed_shape(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    error = refused(checkpoint, stock("fixed"), tmp_path)
    assert "was exported for batch 2 and sequence 16 only" in error.message
    assert "dynamic axes" in error.cure

    def pretend(model: ir.Model) -> None:
        """Declare the shapes dynamic: inside, the sizes of the export are still there."""
        for value in [*model.graph.inputs, *model.graph.outputs]:
            value.shape = ir.Shape(["batch", "sequence", 256][: 3 if value.dtype == ir.DataType.FLOAT else 2])

    error = refused(checkpoint, edited(stock("fixed"), tmp_path / "given", pretend), tmp_path)
    assert "fails on 1 x 5 tokens" in error.message
    assert "a size was fixed inside" in error.message


@pytest.mark.slow
def test_past_of_another_model(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    def more_heads(model: ir.Model) -> None:
        next(v for v in model.graph.inputs if v.name == "past_key_values.2.key").shape = ir.Shape(["b", 8, "p", 128])

    error = refused(checkpoint, edited(stock("past"), tmp_path / "given", more_heads), tmp_path)
    assert "past_key_values.2.key is FLOAT [b, 8, p, 128]" in error.message
    assert "float [batch, 2, past, 128]" in error.message


@pytest.mark.slow
def test_text_generation_with_a_past(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    def scores(model: ir.Model) -> None:
        hidden, *present = model.graph.outputs
        head = constant(model, "head", np.zeros((256, 16000)), np.float32)
        outputs(model, add(model, node("MatMul", hidden, head), "logits", ["batch", "sequence", 16000]), *present)

    error = refused(checkpoint, edited(stock("past"), tmp_path / "given", scores), tmp_path)
    assert "text-generation export" in error.message
    assert "--task feature-extraction" in error.cure


def test_quantized(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    """As optimum-cli quantizes: ONNX Runtime's dynamic quantization."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(stock("legacy") / "model.onnx", tmp_path / "model_quantized.onnx")
    error = refused(checkpoint, tmp_path / "model_quantized.onnx", tmp_path)
    assert "is quantized" in error.message
    assert "MatMulInteger" in error.message
    assert "Leave --from-onnx out" in error.cure


def test_config_of_another_model(checkpoint: Checkpoint, stock: Stock, mini: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock("dynamic"), tmp_path / "given"))
    config = json.loads((mini / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    open_foreign(folder, checkpoint.config)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    error = refused(checkpoint, folder, tmp_path, CheckpointError)
    assert "says num_hidden_layers 3; the checkpoint says 4" in error.message


def test_commands_that_cannot_work(mini: Path, stock: Stock, tmp_path: Path) -> None:
    given, out = str(stock("legacy")), tmp_path / "out"
    run = CliRunner().invoke

    def refusal(*arguments: str) -> str:
        done = run(app, ["export", *arguments, "--out", str(out)])
        assert done.exit_code == 2
        assert "cure:" in done.output
        assert not out.exists()
        return done.output.replace("\n", " ")

    assert "no checkpoint was given" in refusal()
    without = refusal("--from-onnx", given)
    assert "holds no weights (model.safetensors)" in without
    assert "f2rt export CHECKPOINT --from-onnx" in without
    assert "holds no weights" in refusal(given, "--from-onnx", given)
    assert "holds no .onnx" in refusal("--from-onnx", str(tmp_path))
    wrong = refusal(str(mini), "--from-onnx", given, "--precision", "fp32,fp16")
    assert "is fp32; fp16 needs f2rt's own graph" in wrong
    assert "Leave --from-onnx out" in wrong
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\n", encoding="utf-8")
    assert "--calibration" in refusal(str(mini), "--from-onnx", given, "--calibration", str(texts))
    assert "--int8-budget" in refusal(str(mini), "--from-onnx", given, "--int8-budget", "0.9")
