"""What export refuses as a checkpoint: every rule of the contract, broken once.

A refusal must name the file, the field and the value, and say what to do.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import CheckpointError
from tests.checkpoints import (
    ENDOFTEXT,
    IM_END,
    IM_START,
    INDEX,
    POOLING,
    PROMPTS,
    WEIGHTS,
    Damage,
    Tensors,
    added,
    appends_special,
    config,
    drop,
    export,
    linked_copy,
    open_checkpoint,
    put,
    read,
    removes,
    replaced,
    sets,
    shard,
    shard_then,
    weights,
    writes,
)


@pytest.fixture
def folder(mini: Path, tmp_path: Path) -> Path:
    return linked_copy(mini, tmp_path / "checkpoint")


def no_eos(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = read(path)
    tokenizer["post_processor"] = tokenizer["post_processor"]["processors"][0]
    put(path, tokenizer)


def without(name: str) -> Damage:
    return weights(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def tied_only(tensors: Tensors) -> Tensors:
    return {("lm_head.weight" if k == "embed_tokens.weight" else k): v for k, v in tensors.items()}


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
