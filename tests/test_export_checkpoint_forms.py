"""The forms of a checkpoint that export accepts: sharded, prefixed, of other types, with an older or a newer config.

An accepted variant must give the same graph bytes as the original, or the vectors transformers gives for that same
variant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.reference import Reference
from runtime.batch import make_batch
from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.settings import EngineSettings
from runtime.tokenizer import TextTokenizer
from runtime.tolerances import tolerance
from tests.checkpoints import (
    ENDOFTEXT,
    IM_END,
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
    replaced,
    save,
    sets,
    shard,
    shard_then,
    tensors_of,
    weights,
    writes,
)

TEXTS = ["a", "Où est la bibliothèque ?", "def add(a, b):\n    return a + b\n", "東京は日本の首都です。" * 4]


@pytest.fixture
def folder(mini: Path, tmp_path: Path) -> Path:
    return linked_copy(mini, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def plain(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(mini, tmp_path_factory.mktemp("plain") / "bundle")


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
