"""Synthetic checkpoints: a family member's true shape with random weights, for benchmarks and scale tests.

A checkpoint is streamed to disk in the layout of `checkpoints/mini`: bfloat16 safetensors, one file or shards of at
most 5 GB with an index, names without the `model.` prefix. Its vectors mean nothing; its cost is that of the real
model. What is resident is one chunk of a few megabytes.

Where the numbers come from: norm weights are 1. A matrix is cut into chunks of 2^20 values, each with its own
generator (SFC64 seeded with seed, tensor number and chunk number), so any chunk can be made without the ones before
it. Each 16 random bits pick one of 65,536 evenly spaced quantiles of the normal distribution (standard deviation
0.02), rounded to bfloat16: a table look-up instead of arithmetic, as fast as memory. The distribution is normal up to
the tails, which end at 4.3 standard deviations. Equal seed, equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import runtime
from export.config import CONFIG, EncoderConfig
from export.conventions import MODULES, ST_CONFIG, ST_LIMITS, TOKENIZER, TOKENIZER_CONFIG
from export.weights import INDEX, SINGLE
from runtime.errors import CheckpointError, InputError, OutputError
from runtime.files import staged_folder

MARKER = "synth.json"  # says that a folder was written here and may be replaced
STANDARD_DEVIATION = 0.02
_MAX_SEQUENCE_TOKENS = 8192
_SHARD_BYTES = 5_000_000_000
_CHUNK_VALUES = 1 << 20
_QUERY_PROMPT = (
    "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "  # space at the end
)
_TOKENIZER_FILES = [TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json"]
_ONE = np.array(1, ml_dtypes.bfloat16).view(np.uint16)

# (done, total) bytes of the step called by the first argument.
Progress = Callable[[str, int, int], None]


def _family(hidden: int, layers: int, heads: int, intermediate: int) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=151_936,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        max_positions=40_960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )


SIZES: dict[str, EncoderConfig] = {
    "80M": _family(320, 8, 16, 2048),
    "160M": _family(640, 9, 16, 1536),
    "330M": _family(896, 16, 16, 2560),
    "0.6B": _family(1024, 28, 16, 3072),
    "1.7B": _family(2048, 28, 16, 6144),
    "4B": _family(2560, 36, 32, 9728),
    "8B": _family(4096, 36, 32, 12_288),
    "14B": _family(5120, 40, 40, 17_408),
}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the plan; `index` is its place in the checkpoint and decides its numbers."""

    index: int
    name: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


def parameters(config: EncoderConfig) -> int:
    """Return the number of weights of a shape."""
    return sum(int(np.prod(shape)) for shape in config.weight_shapes().values())


def default_tokenizer() -> Path:
    """Return the mini checkpoint beside the package; it is there in a source tree, not in a wheel."""
    return Path(__file__).resolve().parents[1] / "checkpoints" / "mini"


def write_checkpoint(
    size: str,
    folder: Path,
    *,
    tokenizer_from: Path | None = None,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> None:
    """Write a checkpoint of `size` (a key of SIZES) to `folder`, whole or not at all.

    The tokenizer is copied from the checkpoint folder `tokenizer_from`, by default the bundled mini checkpoint; its
    vocabulary may be smaller than the table. A synthetic checkpoint already in `folder` is replaced. Raises
    InputError for an unknown size, CheckpointError for a tokenizer that is missing or too large, OutputError when
    the folder holds anything else or cannot be written.
    """
    if size not in SIZES:
        raise InputError(f"there is no size {size!r}.", cure=f"Choose one of {', '.join(SIZES)}.")
    _write(SIZES[size], folder, tokenizer_from or default_tokenizer(), size, seed, _SHARD_BYTES, progress)


def _write(
    config: EncoderConfig,
    folder: Path,
    tokenizer_from: Path,
    size: str,
    seed: int,
    shard_bytes: int,
    progress: Progress,
) -> None:
    """Write a checkpoint of any shape, in shards of at most `shard_bytes` (a larger tensor has a shard to itself)."""
    eos_id, pad_id = _special_ids(tokenizer_from, config)
    _check_target(folder)
    _check_room(folder, 2 * parameters(config))
    with staged_folder(folder) as staging:
        for name in _TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, staging / name)
        documents: dict[str, Any] = {
            CONFIG: _config_json(config, eos_id, pad_id),
            MODULES: [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(
                    [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
                )
            ],
            "1_Pooling/config.json": _pooling_json(config),
            ST_CONFIG: {
                "model_type": "SentenceTransformer",
                "prompts": {"query": _QUERY_PROMPT, "document": ""},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            ST_LIMITS: {"max_seq_length": min(_MAX_SEQUENCE_TOKENS, config.max_positions), "do_lower_case": False},
            MARKER: {
                "made_by": f"f2rt {runtime.__version__}",
                "size": size,
                "seed": seed,
                "parameters": parameters(config),
            },
        }
        (staging / "1_Pooling").mkdir()
        for name, value in documents.items():
            _write_json(staging / name, value)
        (staging / "README.md").write_text(_card(config, size, seed), encoding="utf-8")
        _write_weights(staging, config, seed, shard_bytes, progress)


# --- weights


def _write_weights(folder: Path, config: EncoderConfig, seed: int, shard_bytes: int, progress: Progress) -> None:
    tensors = [_Tensor(i, name, shape) for i, (name, shape) in enumerate(config.weight_shapes().items())]
    shards = _shards(tensors, shard_bytes)
    total, done = 2 * sum(t.values for t in tensors), 0
    table = _quantiles()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for chunk in _chunks(tensor, seed, table):
                    file.write(chunk.data)
                    done += chunk.nbytes
                    progress("write random weights", done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + 2 * tensor.values > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += 2 * tensor.values
    return shards


def _header(tensors: list[_Tensor]) -> bytes:
    """Return what precedes the data of a safetensors file: its length (uint64, little endian) and a JSON object.

    Format: https://huggingface.co/docs/safetensors (offsets count from the end of the header, without holes).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 2 * tensor.values
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _quantiles() -> NDArray[np.uint16]:
    """Return the 65,536 normal quantiles (i + 1/2) / 65,536 as bits of bfloat16."""
    normal = NormalDist(0.0, STANDARD_DEVIATION)
    values = np.array([normal.inv_cdf((i + 0.5) / 65_536) for i in range(65_536)])
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def _chunks(tensor: _Tensor, seed: int, table: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """Yield a tensor's bfloat16 bits in order, uint16 little endian."""
    if len(tensor.shape) == 1:
        yield np.full(tensor.shape, _ONE, "<u2")
        return
    for number, start in enumerate(range(0, tensor.values, _CHUNK_VALUES)):
        count = min(_CHUNK_VALUES, tensor.values - start)
        generator = np.random.SFC64(np.random.SeedSequence([seed, tensor.index, number]))
        bits = generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")
        # mode="wrap" checks no bounds: every 16-bit number is one of the table's.
        yield table.take(bits[:count], mode="wrap").astype("<u2", copy=False)


# --- checks


def _special_ids(folder: Path, config: EncoderConfig) -> tuple[int, int]:
    """Return (EOS id, pad id) of the tokenizer in `folder`. Raises CheckpointError."""
    cure = "Name a folder with the tokenizer of a Qwen3 embedding checkpoint: --tokenizer FOLDER."
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        if not (folder / name).is_file():
            raise CheckpointError(f"there is no {name} in {folder} to take the tokenizer from.", cure=cure)
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        pad = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("pad_token")
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}.", cure=cure) from error
    ids = tokenizer.encode("").ids
    pad_id = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else str(pad))
    if not ids or pad_id is None:
        raise CheckpointError(f"the tokenizer in {folder} appends no EOS or names no padding token.", cure=cure)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.get_vocab_size()} tokens; the token table has "
            f"{config.vocab_size} rows.",
            cure=cure,
        )
    return ids[-1], pad_id


def _check_target(folder: Path) -> None:
    """Refuse to replace anything that was not written here."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is not a folder.", cure="Choose another --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputError(
            f"{folder} holds files but no {MARKER}; it is not a synthetic checkpoint and is not replaced.",
            cure="Choose an empty or new folder for --out.",
        )


def _check_room(folder: Path, needed_bytes: int) -> None:
    """Say at once that the disk is too small, instead of filling it first."""
    above = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(above).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"no room to write {folder}: it takes {needed_bytes / 1e9:.1f} GB and {free_bytes / 1e9:.1f} GB are free.",
            cure="Free some space or choose another --out.",
        )


# --- the small files


def _config_json(config: EncoderConfig, eos_id: int, pad_id: int) -> dict[str, Any]:
    """Return config.json with the fields of both transformers 4 and 5."""
    return {
        "architectures": ["Qwen3Model"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": pad_id,
        "dtype": "bfloat16",
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": STANDARD_DEVIATION,
        "intermediate_size": config.intermediate_size,
        "layer_types": ["full_attention"] * config.layers,
        "max_position_embeddings": config.max_positions,
        "max_window_layers": config.layers,
        "model_type": "qwen3",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _pooling_json(config: EncoderConfig) -> dict[str, Any]:
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    flags = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
    return {"word_embedding_dimension": config.hidden_size, **flags, "include_prompt": True}


def _card(config: EncoderConfig, size: str, seed: int) -> str:
    return f"""---
license: apache-2.0
tags: [qwen3, random-weights, synthetic]
---
# Random weights in the shape of F2LLM-v2 {size}

Every weight in this folder is random (seed {seed}); nothing was trained and the vectors mean nothing. `f2rt synth`
wrote it to measure export, engines and servers at the size of the real model: {parameters(config):,} parameters in
bfloat16, {config.layers} layers, hidden size {config.hidden_size}. It holds no weights of any published model.
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
