"""What export accepts as a checkpoint and what it refuses: every rule of the contract, broken once.

A refusal must name the file, the field and the value, and say what to do. An accepted variant must give the same graph
bytes as the original, or the vectors transformers gives for that same variant.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.checkpoint import Checkpoint, trained_dims
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.reference import Reference
from runtime.batch import make_batch
from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import CheckpointError
from runtime.settings import EngineSettings
from runtime.tokenizer import TextTokenizer
from runtime.tolerances import tolerance

Tensors = dict[str, NDArray[Any]]
Damage = Callable[[Path], None]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POOLING = "1_Pooling/config.json"
PROMPTS = "config_sentence_transformers.json"
ENDOFTEXT, IM_START, IM_END = 15984, 15985, 15986
TEXTS = ["a", "Où est la bibliothèque ?", "def add(a, b):\n    return a + b\n", "東京は日本の首都です。" * 4]


# --- a checkpoint folder whose large files are links until a test replaces them


@pytest.fixture
def folder(mini: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged. Weights and tokenizer are links; `put` replaces a link by a file."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(mini, copy, ignore=shutil.ignore_patterns(WEIGHTS, "tokenizer.json"))
    for name in (WEIGHTS, "tokenizer.json"):
        (copy / name).symlink_to(mini / name)
    return copy


@pytest.fixture(scope="module")
def plain(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(mini, tmp_path_factory.mktemp("plain") / "bundle")


def export(source: Path, target: Path) -> Bundle:
    return export_bundle(open_checkpoint(source), target, [Precision.FP32])


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(locate(str(folder)))


def put(path: Path, value: Any) -> None:
    """Write text, bytes or (anything else) JSON, never through a link."""
    path.unlink(missing_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def drop(path: Path, *names: str) -> None:
    put(path, {k: v for k, v in read(path).items() if k not in names})


def sets(file: str, **values: Any) -> Damage:
    """Set top-level fields of a JSON file."""
    return lambda folder: put(folder / file, read(folder / file) | values)


def config(**values: Any) -> Damage:
    return sets("config.json", **values)


def writes(file: str, value: Any) -> Damage:
    return lambda folder: put(folder / file, value)


def removes(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def appends_special(*ids: int, before: tuple[int, ...] = ()) -> Damage:
    """Make the post-processor put these special tokens after, and before, each text."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = read(path)
        names = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}

        def special(i: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": names[i], "type_id": 0}}

        template = tokenizer["post_processor"]["processors"][1]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        template["single"] = [*map(special, before), text, *map(special, ids)]
        template["pair"] = template["single"] + [{"Sequence": {"id": "B", "type_id": 1}}]
        template["special_tokens"] = {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in {*ids, *before}
        }
        put(path, tokenizer)

    return damage


def no_eos(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = read(path)
    tokenizer["post_processor"] = tokenizer["post_processor"]["processors"][0]
    put(path, tokenizer)


def tensors_of(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / WEIGHTS)
    return tensors


def save(tensors: Tensors, path: Path) -> None:
    path.unlink(missing_ok=True)
    save_file(tensors, path)


def weights(change: Callable[[Tensors], Tensors]) -> Damage:
    return lambda folder: save(change(tensors_of(folder)), folder / WEIGHTS)


def without(name: str) -> Damage:
    return weights(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def added(name: str, value: NDArray[Any]) -> Damage:
    return weights(lambda tensors: tensors | {name: value})


def replaced(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Damage:
    return weights(lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors[name]))})


def tied_only(tensors: Tensors) -> Tensors:
    return {("lm_head.weight" if k == "embed_tokens.weight" else k): v for k, v in tensors.items()}


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over three files with an index, as transformers does; returns the index's weight_map."""
    tensors = tensors_of(folder)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file)
    put(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / WEIGHTS).unlink()
    return weight_map


def shard_then(damage: Damage) -> Damage:
    def run(folder: Path) -> None:
        shard(folder)
        damage(folder)

    return run


def index_names_stranger(folder: Path) -> None:
    weight_map = shard(folder)
    name = "layers.1.mlp.up_proj.weight"
    other = next(f for f in sorted(set(weight_map.values())) if f != weight_map[name])
    put(folder / INDEX, {"weight_map": weight_map | {name: other}})


def truncated(folder: Path) -> None:
    put(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    put(folder / "pytorch_model.bin", pickle.dumps({"embed_tokens.weight": [1.0]}))


def dense_module(folder: Path) -> None:
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    put(folder / "modules.json", [*read(folder / "modules.json"), dense])


def pooling_missing(folder: Path) -> None:
    (folder / POOLING).unlink()


def tokenizer_of_another_model(folder: Path) -> None:
    """A table of fewer rows than the tokenizer has tokens, the weights agreeing with config.json."""
    config(vocab_size=15000)(folder)
    replaced("embed_tokens.weight", lambda t: t[:15000])(folder)


def no_theta(folder: Path) -> None:
    drop(folder / "config.json", "rope_theta", "rope_parameters")


def no_heads(folder: Path) -> None:
    drop(folder / "config.json", "num_attention_heads")


MEAN = {
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_lasttoken": False,
}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}

REFUSED = [
    # config.json as a file
    pytest.param(removes("config.json"), ["config.json", "missing"], id="config-missing"),
    pytest.param(writes("config.json", '{"model_type": "qwen3",'), ["config.json", "not JSON"], id="config-not-json"),
    pytest.param(writes("config.json", b"\xff\xfe\x00"), ["config.json", "not JSON"], id="config-not-utf8"),
    pytest.param(writes("config.json", ["qwen3"]), ["config.json", "list", "not an object"], id="config-not-an-object"),
    # the architecture
    pytest.param(config(model_type="llama"), ["config.json", "'llama'", "Qwen3"], id="not-qwen3"),
    pytest.param(config(model_type="qwen3_moe"), ["config.json", "'qwen3_moe'"], id="qwen3-moe"),
    pytest.param(
        config(architectures=["Qwen3ForSequenceClassification"]),
        ["config.json", "Qwen3ForSequenceClassification"],
        id="other-architecture",
    ),
    pytest.param(config(hidden_act="gelu"), ["config.json", "hidden_act", "'gelu'"], id="hidden-act"),
    pytest.param(config(attention_bias=True), ["config.json", "attention_bias"], id="attention-bias"),
    pytest.param(
        config(use_sliding_window=True, sliding_window=512),
        ["config.json", "use_sliding_window", "512"],
        id="sliding-window",
    ),
    pytest.param(
        config(layer_types=["full_attention", "sliding_attention"] * 2),
        ["config.json", "layer_types", "'sliding_attention'"],
        id="layer-types",
    ),
    pytest.param(
        config(num_key_value_heads=3),
        ["config.json", "num_attention_heads 4", "num_key_value_heads 3"],
        id="heads-no-multiple-of-kv-heads",
    ),
    pytest.param(config(head_dim=127), ["config.json", "head_dim", "127", "even"], id="odd-head-dim"),
    pytest.param(no_heads, ["config.json", "num_attention_heads", "missing"], id="number-missing"),
    pytest.param(config(hidden_size="256"), ["config.json", "hidden_size", "'256'"], id="number-is-text"),
    pytest.param(config(num_hidden_layers=0), ["config.json", "num_hidden_layers", "0"], id="number-not-positive"),
    pytest.param(config(vocab_size=True), ["config.json", "vocab_size", "True"], id="number-is-a-bool"),
    # rotary embedding
    pytest.param(
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        ["config.json", "rope_scaling", "'yarn'"],
        id="rope-scaling-of-transformers-4",
    ),
    pytest.param(
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        ["config.json", "rope_scaling", "'linear'"],
        id="rope-scaling-with-rope-type",
    ),
    pytest.param(
        config(rope_parameters={"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}),
        ["config.json", "rope_parameters", "'yarn'"],
        id="rope-scaling-of-transformers-5",
    ),
    pytest.param(no_theta, ["config.json", "rope_theta", "no value"], id="rope-theta-missing"),
    pytest.param(
        config(rope_theta=10000.0), ["config.json", "rope_theta", "10000.0", "1000000.0"], id="rope-theta-conflict"
    ),
    # pooling
    pytest.param(removes("modules.json"), ["modules.json", "missing"], id="modules-missing"),
    pytest.param(writes("modules.json", "not json"), ["modules.json", "not a list of modules"], id="modules-not-json"),
    pytest.param(writes("modules.json", [{"path": ""}]), ["modules.json", "type"], id="modules-without-type"),
    pytest.param(writes("modules.json", []), ["modules.json", "nothing"], id="modules-empty"),
    pytest.param(dense_module, ["modules.json", "Dense"], id="extra-dense-module"),
    pytest.param(pooling_missing, [POOLING, "missing"], id="pooling-config-missing"),
    pytest.param(sets(POOLING, **MEAN), [POOLING, "mean_tokens"], id="mean-pooling"),
    pytest.param(sets(POOLING, **CLS), [POOLING, "cls_token"], id="cls-pooling"),
    pytest.param(sets(POOLING, pooling_mode_mean_tokens=True), [POOLING, "lasttoken + mean_tokens"], id="two-poolings"),
    pytest.param(sets(POOLING, pooling_mode_lasttoken=False), [POOLING, "no pooling"], id="no-pooling"),
    pytest.param(
        writes(POOLING, {"embedding_dimension": 256, "pooling_mode": "mean"}), [POOLING, "mean"], id="mean-newer-form"
    ),
    pytest.param(
        writes(POOLING, {"embedding_dimension": 256, "pooling_mode": "cls"}), [POOLING, "cls"], id="cls-newer-form"
    ),
    # EOS
    pytest.param(removes("tokenizer.json"), ["tokenizer.json", "missing"], id="tokenizer-missing"),
    pytest.param(writes("tokenizer.json", "{}"), ["tokenizer.json", "cannot be read"], id="tokenizer-damaged"),
    pytest.param(no_eos, ["tokenizer.json", "appends no EOS", "<|im_end|>"], id="eos-missing"),
    pytest.param(
        appends_special(IM_START),
        ["tokenizer.json", "15985 '<|im_start|>'", "15986 '<|im_end|>'", "config.json", "tokenizer_config.json"],
        id="eos-is-another-special-token",
    ),
    pytest.param(appends_special(IM_END, IM_END), ["tokenizer.json", "15986, 15986", "one EOS"], id="eos-twice"),
    pytest.param(
        appends_special(IM_END, before=(ENDOFTEXT,)), ["tokenizer.json", "[15984, ", "one EOS"], id="bos-in-front"
    ),
    pytest.param(
        tokenizer_of_another_model,
        ["tokenizer.json", "15987", "vocab_size", "15000"],
        id="tokenizer-larger-than-table",
    ),
    # prompts
    pytest.param(config(num_hidden_layers=3), ["layer_types has 4", "num_hidden_layers is 3"], id="layer-types-count"),
    pytest.param(config(quantization_config={"bits": 4}), ["config.json", "quantization_config"], id="quantized"),
    pytest.param(config(rope_theta=-1.0), ["config.json", "rope_theta", "-1"], id="rope-theta-negative"),
    pytest.param(config(rms_norm_eps="x"), ["config.json", "rms_norm_eps", "'x'"], id="eps-is-text"),
    pytest.param(config(rope_scaling="yarn"), ["config.json", "rope_scaling", "'yarn'"], id="rope-scaling-is-text"),
    pytest.param(config(architectures={"a": 1}), ["config.json", "architectures"], id="architectures-not-a-list"),
    pytest.param(config(eos_token_id=[[1]]), ["config.json", "eos_token_id"], id="eos-id-nested"),
    pytest.param(
        config(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ["rope_parameters", "partial_rotary_factor 0.5"],
        id="partial-rotary",
    ),
    pytest.param(sets("tokenizer_config.json", eos_token=["x"]), ["tokenizer_config.json", "eos_token"], id="eos-list"),
    pytest.param(
        sets("sentence_bert_config.json", do_lower_case=True),
        ["sentence_bert_config.json", "do_lower_case"],
        id="lower-case",
    ),
    pytest.param(
        sets("sentence_bert_config.json", max_seq_length="long"),
        ["sentence_bert_config.json", "max_seq_length", "'long'"],
        id="length-is-text",
    ),
    pytest.param(sets(PROMPTS, prompts=["Query: "]), [PROMPTS, "prompts", "['Query: ']"], id="prompts-are-a-list"),
    pytest.param(
        sets(PROMPTS, prompts={"query": "Query: ", "document": None}),
        [PROMPTS, "prompts", "'document': None"],
        id="prompt-is-not-a-text",
    ),
    pytest.param(
        sets(PROMPTS, default_prompt_name="passage"),
        [PROMPTS, "default_prompt_name", "'passage'", "document, query"],
        id="default-prompt-unknown",
    ),
    pytest.param(writes(PROMPTS, "[1]"), [PROMPTS, "list"], id="prompts-file-not-an-object"),
    # weights
    pytest.param(removes(WEIGHTS), [WEIGHTS, INDEX], id="weights-missing"),
    pytest.param(pickle_only, ["pytorch_model.bin", "pickle"], id="pickle-only"),
    pytest.param(truncated, [WEIGHTS, "not a whole safetensors file"], id="safetensors-truncated"),
    pytest.param(writes(WEIGHTS, b""), [WEIGHTS, "not a whole safetensors file"], id="safetensors-empty"),
    pytest.param(
        shard_then(removes("model-00002-of-00003.safetensors")),
        [INDEX, "1 of 3 shards", "model-00002-of-00003.safetensors"],
        id="shard-missing",
    ),
    pytest.param(
        index_names_stranger,
        ["layers.1.mlp.up_proj.weight", "-of-00003.safetensors", "index"],
        id="index-names-a-tensor-its-shard-lacks",
    ),
    pytest.param(shard_then(writes(INDEX, {"metadata": {}})), [INDEX, "weight_map"], id="index-without-weight-map"),
    pytest.param(
        replaced("layers.2.self_attn.k_proj.weight", lambda t: t[:-1]),
        ["layers.2.self_attn.k_proj.weight", WEIGHTS, "[255, 256]", "[256, 256]", "config.json"],
        id="wrong-shape",
    ),
    pytest.param(config(hidden_size=128), ["shape", "256", "128", "config.json"], id="dimension-conflict-with-weights"),
    pytest.param(config(vocab_size=16001), ["embed_tokens.weight", "16001"], id="vocabulary-conflict-with-weights"),
    pytest.param(
        without("layers.3.mlp.down_proj.weight"), ["layers.3.mlp.down_proj.weight", "1 of 46"], id="tensor-missing"
    ),
    pytest.param(
        config(num_hidden_layers=5, layer_types=None), ["layers.4.", "num_hidden_layers (5)"], id="layer-missing"
    ),
    pytest.param(weights(tied_only), ["lm_head.weight", "embed_tokens.weight", "tied"], id="tied-weights-missing"),
    pytest.param(
        config(num_hidden_layers=3, layer_types=None),
        ["11 tensors", "layers.3.", "num_hidden_layers"],
        id="extra-layers",
    ),
    pytest.param(
        added("layers.0.self_attn.q_proj.lora_A.weight", np.zeros((4, 256), np.float32)),
        ["layers.0.self_attn.q_proj.lora_A.weight", "adapters"],
        id="unmerged-adapter",
    ),
    pytest.param(
        replaced("layers.0.mlp.up_proj.weight", lambda t: t.astype(np.int8)),
        ["layers.0.mlp.up_proj.weight", WEIGHTS, "I8", "BF16"],
        id="int8-tensors",
    ),
    pytest.param(replaced("norm.weight", lambda t: t.astype(np.float64)), ["norm.weight", "F64"], id="float64-tensors"),
]


@pytest.mark.parametrize(("damage", "named"), REFUSED)
def test_broken_contract_is_refused(folder: Path, damage: Damage, named: list[str]) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for part in named:
        assert part in str(caught.value)
    assert str(folder) in caught.value.message
    assert caught.value.cure


def test_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    """The pickle beside the weights would leave a file if anything loaded it."""
    trace = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    put(folder / "pytorch_model.bin", pickle.dumps(Attack()))
    open_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(folder)
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the test's own attack does not work"


# --- values are read at export, not before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.gate_proj.weight", "norm.weight"])
def test_weight_that_is_not_finite_is_refused_and_the_old_bundle_stays(
    folder: Path, tmp_path: Path, name: str, value: float
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("the old bundle")

    def poison(tensor: NDArray[Any]) -> NDArray[Any]:
        tensor = tensor.copy()
        tensor.reshape(-1)[-1] = value
        return tensor

    replaced(name, poison)(folder)
    with pytest.raises(CheckpointError, match=rf"{name} holds 1 value not finite") as caught:
        export(folder, target)
    assert caught.value.cure
    assert [p.name for p in target.iterdir()] == ["manifest.json"]
    assert (target / "manifest.json").read_text() == "the old bundle"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "checkpoint"]


# --- accepted forms that hold the same numbers


def prefixed(tensors: Tensors) -> Tensors:
    return {f"model.{k}": v for k, v in tensors.items()}


def as_float32(tensors: Tensors) -> Tensors:
    return {k: v.astype(np.float32) for k, v in tensors.items()}


def theta_only(folder: Path) -> None:
    drop(folder / "config.json", "rope_parameters", "rope_scaling")


def parameters_only(folder: Path) -> None:
    drop(folder / "config.json", "rope_theta", "rope_scaling")


def sharded_with_prefix(folder: Path) -> None:
    weights(prefixed)(folder)
    shard(folder)


def untied_head(folder: Path) -> None:
    config(tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"])(folder)
    rng = np.random.default_rng(0)
    added("lm_head.weight", rng.standard_normal((16000, 256)).astype(ml_dtypes.bfloat16))(folder)


SAME = [
    pytest.param(lambda folder: None, id="unchanged"),
    pytest.param(shard_then(lambda folder: None), id="sharded"),
    pytest.param(weights(prefixed), id="keys-with-model-prefix"),
    pytest.param(sharded_with_prefix, id="sharded-keys-with-model-prefix"),
    pytest.param(theta_only, id="rope-theta-only"),
    pytest.param(parameters_only, id="rope-parameters-only"),
    pytest.param(weights(as_float32), id="float32-storage"),
    pytest.param(replaced("norm.weight", lambda t: t.astype(np.float32)), id="mixed-storage"),
    pytest.param(untied_head, id="untied-lm-head-ignored"),
    pytest.param(added("layers.0.self_attn.rotary_emb.inv_freq", np.ones(64, np.float64)), id="inv-freq-ignored"),
    pytest.param(config(architectures=["Qwen3ForCausalLM"]), id="causal-lm-architecture"),
    pytest.param(lambda folder: drop(folder / "config.json", "architectures", "layer_types"), id="older-config"),
    pytest.param(sets(POOLING, word_embedding_dimension=1024), id="pooling-dimension-wrong"),
    pytest.param(
        writes(POOLING, {"embedding_dimension": 256, "pooling_mode": "lasttoken"}), id="pooling-mode-newer-form"
    ),
]


@pytest.mark.parametrize("change", SAME)
def test_accepted_form_gives_the_same_graph(plain: Bundle, folder: Path, tmp_path: Path, change: Damage) -> None:
    change(folder)
    made, expected = export(folder, tmp_path / "bundle").manifest, plain.manifest
    assert made.graphs[0].data.sha256 == expected.graphs[0].data.sha256
    assert made.graphs[0].model.sha256 == expected.graphs[0].model.sha256
    assert (made.contract.dim, made.contract.eos_id) == (expected.contract.dim, expected.contract.eos_id)


def test_other_weights_give_another_graph(plain: Bundle, folder: Path, tmp_path: Path) -> None:
    """The comparison above can fail: one bit of one weight is enough."""

    def flip(tensor: NDArray[Any]) -> NDArray[Any]:
        bits = tensor.view(np.uint16).copy()
        bits[-1, -1] ^= 1
        return bits.view(tensor.dtype)

    replaced("layers.3.self_attn.o_proj.weight", flip)(folder)
    made = export(folder, tmp_path / "bundle").manifest
    assert made.graphs[0].data.sha256 != plain.manifest.graphs[0].data.sha256
    assert made.graphs[0].model.sha256 == plain.manifest.graphs[0].model.sha256
    assert made.fingerprint != plain.manifest.fingerprint


# --- accepted forms that hold other numbers: transformers on the same folder decides


def assert_like_transformers(folder: Path, bundle: Bundle) -> None:
    contract = bundle.manifest.contract
    reference = Reference(locate(str(folder)))
    ids = [item.ids for item in TextTokenizer(bundle.path("tokenizer.json"), contract).encode(TEXTS)]
    assert ids == [reference.tokenize(text, contract.max_tokens) for text in TEXTS]
    record = bundle.manifest.engines[0]
    engine = OnnxRuntimeEngine(
        bundle.path(record.file),
        name=record.name,
        precision=record.precision,
        fingerprint=record.fingerprint,
        settings=EngineSettings(),
    )
    vectors = engine.run(make_batch(ids, contract.pad_id))
    engine.close()
    expected = np.stack([reference.embed(row) for row in ids])
    limit = tolerance(record.precision)
    cosines = (vectors * expected).sum(axis=1)
    difference = np.abs(vectors - expected).max()
    assert cosines.min() >= limit.min_cosine, f"cosine {cosines.min()}, difference {difference}"
    assert difference <= limit.max_abs_diff, f"cosine {cosines.min()}, difference {difference}"


def test_float16_storage(plain: Bundle, folder: Path, tmp_path: Path) -> None:
    """Where float16 holds the bfloat16 values the graph is the same; here a few are too small for it."""
    tensors = tensors_of(folder)
    halves = {k: v.astype(np.float16) for k, v in tensors.items()}
    exact = all(np.array_equal(halves[k].astype(np.float32), v.astype(np.float32)) for k, v in tensors.items())
    save(halves, folder / WEIGHTS)
    config(dtype="float16", torch_dtype="float16")(folder)
    bundle = export(folder, tmp_path / "bundle")
    assert (bundle.manifest.graphs[0].data.sha256 == plain.manifest.graphs[0].data.sha256) == exact
    assert_like_transformers(folder, bundle)


def qwen3_embedding(folder: Path) -> None:
    """Turn the folder into what Qwen3-Embedding repositories look like."""
    config(architectures=["Qwen3ForCausalLM"], eos_token_id=ENDOFTEXT, bos_token_id=ENDOFTEXT)(folder)
    appends_special(ENDOFTEXT)(folder)
    sets("tokenizer_config.json", padding_side="left", eos_token="<|im_end|>", model_max_length=131072)(folder)
    sets(
        PROMPTS,
        prompts={"query": "Instruct: Given a web search query, retrieve relevant passages\nQuery:", "document": ""},
    )(folder)
    (folder / "sentence_bert_config.json").unlink()
    weights(prefixed)(folder)


def test_qwen3_embedding_conventions(folder: Path, tmp_path: Path) -> None:
    qwen3_embedding(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.contract.eos_id == ENDOFTEXT
    assert checkpoint.contract.pad_id == ENDOFTEXT
    assert checkpoint.contract.architecture == "Qwen3ForCausalLM"
    assert checkpoint.contract.max_tokens == 8192
    assert checkpoint.contract.prompts["query"].endswith("Query:")
    assert any("pads on the left" in notice for notice in checkpoint.notices)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", [Precision.FP32])
    assert bundle.manifest.notices == checkpoint.notices
    assert_like_transformers(folder, bundle)


def test_eos_list_of_which_one_is_appended(folder: Path) -> None:
    config(eos_token_id=[IM_END, ENDOFTEXT])(folder)
    assert open_checkpoint(folder).contract.eos_id == IM_END


# --- the contract as recorded, and notices


def test_contract_of_the_mini_checkpoint(mini: Path) -> None:
    checkpoint = open_checkpoint(mini)
    contract = checkpoint.contract
    assert contract.architecture == "Qwen3Model"
    assert contract.dim == 256
    assert contract.trained_dims == [8, 16, 32, 64, 128, 256]
    assert contract.max_tokens == 1024
    assert (contract.eos_id, contract.pad_id) == (IM_END, ENDOFTEXT)
    assert contract.vocab_size == 16000
    assert contract.pooling == "last_token"
    assert contract.prompts == read(mini / PROMPTS)["prompts"]
    assert contract.prompts["query"].endswith("Query: ")
    assert contract.default_prompt_name is None
    assert checkpoint.location.revision is None


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(320, [8, 16, 32, 64, 128, 256, 320]), (256, [8, 16, 32, 64, 128, 256]), (8, [8]), (5, [5])],
)
def test_trained_dimensions(dim: int, expected: list[int]) -> None:
    assert trained_dims(dim) == expected


def test_max_tokens_is_the_smallest_limit_declared(folder: Path) -> None:
    sets("tokenizer_config.json", model_max_length=777)(folder)
    assert open_checkpoint(folder).contract.max_tokens == 777
    sets("tokenizer_config.json", model_max_length=1e30)(folder)
    assert open_checkpoint(folder).contract.max_tokens == 1024
    (folder / "sentence_bert_config.json").unlink()
    assert open_checkpoint(folder).contract.max_tokens == 8192


def test_default_prompt_is_recorded(folder: Path) -> None:
    sets(PROMPTS, default_prompt_name="query")(folder)
    assert open_checkpoint(folder).contract.default_prompt_name == "query"


def test_no_prompts_at_all(folder: Path) -> None:
    (folder / PROMPTS).unlink()
    assert open_checkpoint(folder).contract.prompts == {}


def test_wrong_pooling_dimension_is_noticed(folder: Path) -> None:
    sets(POOLING, word_embedding_dimension=1024)(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.contract.dim == 256
    assert any(POOLING in n and "1024" in n and "256" in n for n in checkpoint.notices)


def test_missing_normalize_module_is_noticed(folder: Path) -> None:
    put(folder / "modules.json", read(folder / "modules.json")[:2])
    assert any("Normalize" in notice for notice in open_checkpoint(folder).notices)


@pytest.mark.parametrize(
    ("front_matter", "license_name", "noticed"),
    [
        ("license: cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", True),
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0", True),
        ("license: other\nlicense_name: CC_BY_ND_4.0", "CC_BY_ND_4.0", True),
        ("license: apache-2.0", "apache-2.0", False),
        ("license: mit-and-ncsa", "mit-and-ncsa", False),
        ("language: en", None, False),
    ],
)
def test_license_is_recorded_and_noticed(
    folder: Path, front_matter: str, license_name: str | None, noticed: bool
) -> None:
    put(folder / "README.md", f"---\n{front_matter}\n---\n# a card\n")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.license == license_name
    assert checkpoint.source().license == license_name
    assert any(str(license_name) in n and "derivative" in n for n in checkpoint.notices) == noticed


@pytest.mark.parametrize("card", ["no front matter", "---\nlicense: [\n---\n", ""])
def test_malformed_model_card_declares_nothing(folder: Path, card: str) -> None:
    put(folder / "README.md", card)
    assert open_checkpoint(folder).license is None


def test_good_checkpoint_needs_no_notice(mini: Path) -> None:
    assert open_checkpoint(mini).notices == []


def test_source_names_every_file_with_its_hash(folder: Path) -> None:
    shard(folder)
    records = {r.file: r for r in open_checkpoint(folder).source().files}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    expected = {"config.json", "modules.json", "tokenizer.json", PROMPTS, POOLING, INDEX, *shards}
    assert expected <= set(records)
    assert all((folder / name).stat().st_size == r.size_bytes and len(r.sha256) == 64 for name, r in records.items())
