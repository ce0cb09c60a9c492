"""Checkpoints that compute the same function as mini, with numbers a naive FP16 or INT8 conversion cannot hold.

Every change multiplies by powers of two and undoes it next door, so float32 results are the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  makes bfloat16 a name numpy knows
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Tensors = dict[str, NDArray[np.generic]]


def _scale(tensors: Tensors, name: str, factor: float, index: Any = ...) -> None:
    """Multiply part of a tensor, staying in its dtype: exact for powers of two."""
    tensor = tensors[name]
    tensor[index] = (tensor[index].astype(np.float32) * factor).astype(tensor.dtype)


def residual(tensors: Tensors) -> None:
    """Scale the residual stream by 2^9: mini's reaches 300, so this one passes 1e5. RMSNorm takes it out again."""
    for name in tensors:
        if name == "embed_tokens.weight" or name.endswith(("o_proj.weight", "down_proj.weight")):
            _scale(tensors, name, 2.0**9)


def gated(tensors: Tensors) -> None:
    """Make silu(gate) * up pass 65504 in two early layers, as Qwen3-Embedding-8B does; down_proj undoes it."""
    for layer in (0, 1):
        _scale(tensors, f"layers.{layer}.mlp.up_proj.weight", 2.0**13)
        _scale(tensors, f"layers.{layer}.mlp.down_proj.weight", 2.0**-13)


def outliers(tensors: Tensors) -> None:
    """Three channels of every norm times 1024, their readers' columns divided: outliers of trained large models."""
    generator = np.random.default_rng(0)
    readers = {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for layer in range(4):
        for norm, matrices in readers.items():
            channels = generator.choice(256, 3, replace=False)
            _scale(tensors, f"layers.{layer}.{norm}.weight", 2.0**10, channels)
            for matrix in matrices:
                _scale(tensors, f"layers.{layer}.{matrix}.weight", 2.0**-10, (slice(None), channels))


def values(tensors: Tensors) -> None:
    """Values times 2^14, undone by o_proj: attention's output passes 65504."""
    for layer in range(4):
        _scale(tensors, f"layers.{layer}.self_attn.v_proj.weight", 2.0**14)
        _scale(tensors, f"layers.{layer}.self_attn.o_proj.weight", 2.0**-14)


def projections(tensors: Tensors) -> None:
    """Queries and keys times 2^15 before their norm, which takes it out again."""
    for layer in range(4):
        for side in "qk":
            _scale(tensors, f"layers.{layer}.self_attn.{side}_proj.weight", 2.0**15)


def everything(tensors: Tensors) -> None:
    """All of the above at once."""
    for change in (residual, gated, outliers, values, projections):
        change(tensors)


HOSTILE: dict[str, Callable[[Tensors], None]] = {
    change.__name__: change for change in (residual, gated, outliers, values, projections, everything)
}


def make_hostile(mini: Path, folder: Path, name: str) -> Path:
    """Write the hostile twin of the checkpoint `mini` to `folder`."""
    return _make(mini, folder, HOSTILE[name])


def hard(tensors: Tensors) -> None:
    """Three channels of every norm and of silu(gate) * up times 64: plain INT8 fails on it, float16 does not.

    The channels are those of the recipe this twin is known by, drawn from torch's generator.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    for layer in (f"layers.{i}" for i in range(layers)):
        edges = {
            f"{layer}.input_layernorm": [f"{layer}.self_attn.{x}_proj" for x in "qkv"],
            f"{layer}.post_attention_layernorm": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
            f"{layer}.mlp.up_proj": [f"{layer}.mlp.down_proj"],
        }
        for maker, readers in edges.items():
            channels = torch.randperm(len(tensors[f"{maker}.weight"]), generator=generator)[:3].numpy()
            _scale(tensors, f"{maker}.weight", 64.0, channels)
            for reader in readers:
                _scale(tensors, f"{reader}.weight", 1 / 64, (slice(None), channels))


def make_hard(mini: Path, folder: Path) -> Path:
    """Write the twin of the checkpoint `mini` that is hard for INT8 alone to `folder`."""
    return _make(mini, folder, hard)


def _make(mini: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(mini, folder)
    tensors = {key: np.array(value) for key, value in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
