"""A feature-extraction graph that another tool exported, found, read and checked before any work is done.

Takes what Optimum, sentence-transformers and `torch.onnx.export` write for a Qwen3 encoder: token ids in, hidden states
per token out. What is refused is what could not become the bundle's graph, each with its reason. Whether the numbers
in such a file are the checkpoint's is not asked here and cannot be seen here: parity proves it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx_ir as ir
from onnx_ir.passes import common

from export.config import CONFIG, EncoderConfig, read_encoder_config
from export.precision import Precision
from export.weights import INDEX, SINGLE
from runtime.errors import CheckpointError, InputError

GRAPH = "model.onnx"
SUBFOLDER = "onnx"  # where sentence-transformers and transformers.js look for it
OLDEST_OPSET = 13  # from here on axes are inputs, as in the nodes that are added
INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
OWN_GRAPH = "Leave --from-onnx out: f2rt then writes its own graph from the checkpoint."

_HIDDEN_NAMES = ("last_hidden_state", "token_embeddings")
_PAST = "past_key"
_FLOATS = {ir.DataType.FLOAT: Precision.FP32, ir.DataType.FLOAT16: Precision.FP16}
_INPUT_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, *_FLOATS)  # int64 is cast to them
_QUANTIZED = ("Quant", "Integer", "NBits", "Bnb4")  # parts of the names of operators on quantized numbers
_FIELDS = {  # as config.json calls them
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
}
_LFS = b"version https://git-lfs"
_AGAIN = "Export it again: optimum-cli export onnx --model CHECKPOINT --task feature-extraction FOLDER"


@dataclass(frozen=True)
class ForeignGraph:
    """A graph that can become a bundle's: nothing in it has been changed yet.

    `source` is what the user gave, `path` the file and `data` the files its weights lie in; `hidden` is the output
    that holds float [batch, sequence, hidden]; `dropped` names the others; `past` the inputs for keys and values of
    earlier tokens.
    """

    source: Path
    path: Path
    data: tuple[Path, ...]
    model: ir.Model
    precision: Precision
    hidden: ir.Value
    past: tuple[ir.Value, ...]
    dropped: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def producer(self) -> str:
        """Who wrote the file, in its own words."""
        return f"{self.model.producer_name or 'unknown'} {self.model.producer_version or ''}".strip()


def open_foreign(source: Path, config: EncoderConfig) -> ForeignGraph:
    """Find, read and check the graph at `source`, a folder or an .onnx file, against the checkpoint's `config`.

    Weights stay where they are. Raises InputError for a graph that is missing, damaged or of a kind that cannot be
    used, CheckpointError when the folder's config.json describes another model.
    """
    path, others = find_graph(source)
    _compare_configs(path, config)
    model = _load(path)
    data = _check_data(path, model)
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{path} is written in opset {opset}; f2rt adds nodes of opset {OLDEST_OPSET}.",
            cure=f"Export it with opset {OLDEST_OPSET} or later; optimum-cli takes --opset 18.",
        )
    past = _check_inputs(path, model.graph, config)
    hidden, dropped = _hidden_output(path, model.graph, config)
    notices = [f"{path} is taken; the folder also holds {', '.join(others)}"] if others else []
    domains = sorted({n.domain for n in model.graph.all_nodes()} - {""})
    if domains:
        notices.append(f"{path} uses operators of {', '.join(domains)}: not every backend reads them")
    precision = _precision(path, model)
    if precision is Precision.FP16:
        notices.append(
            "the given graph is float16 throughout: ONNX Runtime on CPU computes parts of it in float32, so a pass "
            "there says nothing of overflow on a GPU"
        )
    return ForeignGraph(source, path, data, model, precision, hidden, past, dropped, tuple(notices))


def find_graph(source: Path) -> tuple[Path, list[str]]:
    """Return the .onnx file that `source` means, and the names of others beside it. Raises InputError."""
    if source.is_file():
        if source.suffix != ".onnx":
            raise InputError(f"{source} is not an .onnx file.", cure="Give the folder of an export, or its .onnx file.")
        return source, []
    if not source.is_dir():
        raise InputError(
            f"there is no folder {source}.",
            cure="Give the folder of an ONNX export; one on the hub is downloaded first: hf download OWNER/NAME",
        )
    folders = [source, source / SUBFOLDER]
    found = [p for folder in folders for p in sorted(folder.glob("*.onnx")) if p.is_file()]
    if not found:
        raise InputError(f"{source} holds no .onnx file, nor does its folder {SUBFOLDER}/.", cure=_AGAIN)
    usual = next((folder / GRAPH for folder in folders if folder / GRAPH in found), None)
    if usual is None and len(found) > 1:
        names = ", ".join(str(p.relative_to(source)) for p in found)
        raise InputError(
            f"{source} holds {len(found)} graphs and none is called {GRAPH}: {names}.",
            cure=f"Name the one you mean: --from-onnx {found[0]}",
        )
    chosen = usual or found[0]
    return chosen, [str(p.relative_to(source)) for p in found if p != chosen]


def root_of(source: Path) -> Path:
    """Return the folder whose config.json belongs to the graph at `source`: the file's own, or the one above onnx/."""
    folder = source if source.is_dir() else source.parent
    above = folder.name == SUBFOLDER and not (folder / CONFIG).is_file()
    return folder.parent if above else folder


def checkpoint_of(source: Path) -> str:
    """Return the folder of the graph at `source`, which is then the checkpoint, too. Raises InputError without weights.

    sentence-transformers keeps both in one folder; Optimum writes the graph without the weights file.
    """
    folder = root_of(source)
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return str(folder)
    raise InputError(
        f"{folder} holds no weights ({SINGLE}) besides its graph. f2rt proves a graph against PyTorch, and for that it "
        "needs the checkpoint that the graph was exported from: weights, tokenizer, pooling and prompts.",
        cure=f"Name that checkpoint, a folder or a hub id: f2rt export CHECKPOINT --from-onnx {source} --out BUNDLE",
    )


def require_precision(foreign: ForeignGraph, wanted: list[Precision]) -> None:
    """Refuse precisions that the given graph does not have. Raises InputError."""
    others = [p for p in wanted if p != foreign.precision]
    if others:
        raise InputError(
            f"{foreign.path} is {foreign.precision}; {', '.join(others)} needs f2rt's own graph, in which every number "
            "has its place and can be scaled.",
            cure=OWN_GRAPH,
        )


def _compare_configs(path: Path, config: EncoderConfig) -> None:
    """Refuse a graph whose own config.json says that it belongs to another model; without one parity has to tell."""
    folder = root_of(path)
    if not (folder / CONFIG).is_file():
        return
    _, own = read_encoder_config(folder)
    for field in dataclasses.fields(EncoderConfig):
        here, there = getattr(own, field.name), getattr(config, field.name)
        if here != there:
            raise CheckpointError(
                f"{folder / CONFIG} says {_FIELDS.get(field.name, field.name)} {here}; the checkpoint says {there}.",
                cure="Give the checkpoint that this graph was exported from.",
            )


def _load(path: Path) -> ir.Model:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise InputError(f"{path} is a Git LFS pointer, not the file itself.", cure="Fetch it with: git lfs pull")
    try:
        model = ir.load(path)
    except Exception as error:  # a damaged file fails in protobuf or in onnx_ir, each in its own way
        raise InputError(
            f"{path} cannot be read as ONNX: {error}.", cure="The file is cut or damaged: copy or export it again."
        ) from error
    if not len(model.graph) or not model.graph.inputs or not model.graph.outputs:
        raise InputError(f"{path} holds no graph.", cure="The file is cut or damaged: copy or export it again.")
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass()(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    return model


def _check_data(path: Path, model: ir.Model) -> tuple[Path, ...]:
    """Return the files with the graph's weights. Raises InputError for one that is missing, short or elsewhere."""
    files: dict[Path, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise InputError(f"{path}: the weight {name} has no value.", cure="The file is damaged: export it again.")
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = PurePosixPath(str(tensor.location))
        if location.is_absolute() or ".." in location.parts:
            raise InputError(
                f"{path} wants its weights from {location}, outside its own folder.",
                cure="Put the data file beside the graph and export or save it again.",
            )
        file = path.parent / location
        files[file] = max(files.get(file, 0), (tensor.offset or 0) + tensor.nbytes)
    for file, end in files.items():
        if not file.is_file():
            raise InputError(
                f"the weights of {path} lie in {file.name}, which is not beside it.",
                cure="Copy it from the same export: a graph and its data file belong together.",
            )
        size = file.stat().st_size
        if size < end:
            raise InputError(
                f"{file} has {size} bytes; {path.name} wants {end}.", cure="The file is cut: copy it again."
            )
    return tuple(files)


def _check_inputs(path: Path, graph: ir.Graph, config: EncoderConfig) -> tuple[ir.Value, ...]:
    """Return the inputs for a past, which will be empty. Raises InputError for what cannot be supplied."""
    inputs = {str(v.name): v for v in graph.inputs}
    past = [v for name, v in inputs.items() if name.startswith(_PAST)]
    strange = [n for n in inputs if n not in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS) and not n.startswith(_PAST)]
    if strange or INPUT_IDS not in inputs:
        missing = f"no {INPUT_IDS}" if INPUT_IDS not in inputs else f"the input {strange[0]}"
        raise InputError(
            f"{path} has {missing}; its inputs are {', '.join(inputs)}. f2rt supplies {INPUT_IDS}, {ATTENTION_MASK}, "
            f"{POSITION_IDS} and an empty past.",
            cure=_AGAIN,
        )
    for name in (INPUT_IDS, ATTENTION_MASK):
        if name in inputs:
            _check_dynamic(path, inputs[name])
    for value in inputs.values():
        if value not in past and value.dtype not in _INPUT_TYPES:
            raise InputError(f"{path}: the input {value.name} is {value.dtype}; int64 is expected.", cure=_AGAIN)
    positions = inputs.get(POSITION_IDS)
    if positions is not None and positions.shape is not None and positions.shape.rank() != 2:
        raise InputError(
            f"{path}: {POSITION_IDS} is {_spell(positions)}, and [batch, sequence] is expected.", cure=_AGAIN
        )
    for value in past:
        expected = (None, config.kv_heads, None, config.head_dim)
        dims = list(value.shape.dims) if value.shape is not None else []
        wrong = len(dims) != 4 or any(isinstance(d, int) and d != e for d, e in zip(dims, expected, strict=True))
        if wrong or value.dtype not in _FLOATS:
            raise InputError(
                f"{path}: the past {value.name} is {value.dtype} {_spell(value)}; for this checkpoint it would be "
                f"float [batch, {config.kv_heads}, past, {config.head_dim}].",
                cure="Give the checkpoint that this graph was exported from.",
            )
    return tuple(past)


def _check_dynamic(path: Path, value: ir.Value) -> None:
    """Require [batch, sequence] with neither fixed."""
    if value.shape is None:
        return
    if value.shape.rank() != 2:
        raise InputError(f"{path}: {value.name} is {_spell(value)}, and [batch, sequence] is expected.", cure=_AGAIN)
    fixed = [f"{axis} {d}" for axis, d in zip(("batch", "sequence"), value.shape.dims, strict=True) if type(d) is int]
    if fixed:
        raise InputError(
            f"{path} was exported for {' and '.join(fixed)} only: {value.name} is {_spell(value)}.",
            cure="Export it with dynamic axes for batch and sequence; optimum-cli does so by default.",
        )


def _hidden_output(path: Path, graph: ir.Graph, config: EncoderConfig) -> tuple[ir.Value, tuple[str, ...]]:
    """Return the output with hidden states per token and the names of the others. Raises InputError."""
    outputs = {str(v.name): v for v in graph.outputs}
    candidates = [v for v in graph.outputs if _per_token(v)]
    named = next((outputs[n] for n in _HIDDEN_NAMES if n in outputs), None)
    if named is not None and (named.shape is None or named in candidates):
        candidates = [named]
    described = ", ".join(f"{name} {_spell(v)}" for name, v in outputs.items())
    wide = [v for v in candidates if "logits" in str(v.name) or _width(v) == config.vocab_size != config.hidden_size]
    states = [v for v in candidates if v not in wide]
    if not states and wide:
        raise InputError(
            f"{path} is a text-generation export: it gives {wide[0].name} {_spell(wide[0])}, and no hidden states.",
            cure=_AGAIN,
        )
    if not states:
        raise InputError(
            f"{path} gives no hidden state per token, float [batch, sequence, {config.hidden_size}]; its outputs are "
            f"{described}. A vector that is already pooled cannot be checked for where it was taken: at the last "
            "column it is right only for texts padded on the left.",
            cure=_AGAIN,
        )
    if len(states) > 1:
        raise InputError(
            f"{path} gives hidden states as {' and as '.join(str(v.name) for v in states)}: which are those after the "
            "final norm cannot be told.",
            cure=f"Export it with one output of hidden states, called {_HIDDEN_NAMES[0]}.",
        )
    (hidden,) = states
    if hidden.dtype not in _FLOATS:
        raise InputError(f"{path}: {hidden.name} is {hidden.dtype}; f2rt reads float32 and float16.", cure=OWN_GRAPH)
    dims = list(hidden.shape.dims) if hidden.shape is not None else [None, None, None]
    if isinstance(dims[0], int) or isinstance(dims[1], int):
        raise InputError(
            f"{path} was exported for one shape only: {hidden.name} is {_spell(hidden)}.",
            cure="Export it with dynamic axes for batch and sequence; optimum-cli does so by default.",
        )
    if isinstance(dims[2], int) and dims[2] != config.hidden_size:
        raise InputError(
            f"{path}: {hidden.name} has {dims[2]} dimensions; the checkpoint's hidden_size is {config.hidden_size}.",
            cure="Give the checkpoint that this graph was exported from.",
        )
    return hidden, tuple(n for n in outputs if n != hidden.name)


def _per_token(value: ir.Value) -> bool:
    """Float [batch, sequence, hidden]; [batch, 1, hidden] is one state a text."""
    if value.shape is None or value.shape.rank() != 3 or value.dtype is None:
        return False
    return value.dtype.is_floating_point() and value.shape[1] != 1


def _width(value: ir.Value) -> object:
    return value.shape[2] if value.shape is not None else None


def _precision(path: Path, model: ir.Model) -> Precision:
    """Return the precision of the weight matrices. Raises InputError for quantized and other ones."""
    nodes = Counter(n.op_type for n in model.graph.all_nodes() if any(part in n.op_type for part in _QUANTIZED))
    if nodes:
        raise InputError(
            f"{path} is quantized ({', '.join(f'{count} {kind}' for kind, count in nodes.most_common(2))}). Its scales "
            "came from another tool and often from the batch at hand, so that a vector depends on its neighbours.",
            cure=f"Give the float export ({GRAPH}), not this one. {OWN_GRAPH}",
        )
    sizes: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            sizes[value.const_value.dtype] += value.const_value.size if len(value.const_value.shape) > 1 else 0
    strange = [d for d, size in sizes.items() if size and d not in _FLOATS]
    if strange:
        raise InputError(
            f"{path} holds weights in {strange[0]}, which ONNX Runtime on CPU cannot multiply: nothing could prove it.",
            cure=f"Export it in float32 or float16. {OWN_GRAPH}",
        )
    return Precision.FP16 if sizes[ir.DataType.FLOAT16] else Precision.FP32


def _spell(value: ir.Value) -> str:
    if value.shape is None:
        return "of unknown shape"
    return f"[{', '.join(str(d) if isinstance(d, int) else str(d.value or '?') for d in value.shape.dims)}]"
