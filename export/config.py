"""config.json: the shape of a Qwen3 encoder, and what in that file f2rt does not implement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a Qwen3 encoder. `rope_theta` and `rms_norm_eps` as in config.json; all else counts."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor the encoder needs and its shape, [out, in] for matrices."""
        h, d, q, kv, m = (
            self.hidden_size,
            self.head_dim,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.intermediate_size,
        )
        layer = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "self_attn.q_norm.weight": (d,),
            "self_attn.k_norm.weight": (d,),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (m, h),
            "mlp.up_proj.weight": (m, h),
            "mlp.down_proj.weight": (h, m),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, h),
            "norm.weight": (h,),
        }
        for index in range(self.layers):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file, {} for an absent file that is not required. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(
            f"{path} is missing.",
            cure="Give the folder of a whole checkpoint: config, tokenizer and weights.",
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.", cure="Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object.", cure="Download it again.")
    return value


def architecture(raw: dict[str, Any]) -> str:
    """Return the first architecture config.json names; without one, the bare encoder."""
    return str((raw.get("architectures") or ["Qwen3Model"])[0])


def read_encoder_config(path: Path, raw: dict[str, Any]) -> EncoderConfig:
    """Return the shape in `raw`, read from `path`. Raises CheckpointError for what is wrong or not implemented."""
    if raw.get("model_type") != "qwen3" or architecture(raw) not in ("Qwen3Model", "Qwen3ForCausalLM"):
        raise CheckpointError(
            f"{path} describes {raw.get('model_type')!r} / {architecture(raw)!r}, not a Qwen3 encoder.",
            cure="f2rt converts Qwen3-architecture embedding checkpoints such as F2LLM-v2 and Qwen3-Embedding.",
        )

    def number(name: str, default: int | None = None) -> int:
        value = raw.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be a positive integer.", cure="Correct it.")
        return value

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}, which f2rt does not implement.",
            cure="Use a checkpoint without it, or ask for it.",
        )

    if raw.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act is {raw['hidden_act']!r}")
    if raw.get("attention_bias", False):
        raise refuse("attention_bias is true")
    if raw.get("use_sliding_window", False):
        raise refuse(f"use_sliding_window is true (window {raw.get('sliding_window')})")
    other = sorted(set(raw.get("layer_types") or []) - {"full_attention"})
    if other:
        raise refuse(f"layer_types holds {other[0]!r}")
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    config = EncoderConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        intermediate_size=number("intermediate_size"),
        max_positions=number("max_position_embeddings"),
        rope_theta=_rope_theta(path, raw, refuse),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    )
    if config.heads % config.kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {config.heads} is not a multiple of num_key_value_heads {config.kv_heads}.",
            cure="Correct config.json.",
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"{path}: head_dim is {config.head_dim}; rotary embedding needs an even one.", cure="Correct it."
        )
    return config


def _rope_theta(path: Path, raw: dict[str, Any], refuse: Callable[[str], CheckpointError]) -> float:
    """Read RoPE's base from transformers 5's `rope_parameters` or 4's `rope_theta`; both must agree."""
    parameters = raw.get("rope_parameters") or {}
    for name, scaling in (("rope_parameters", parameters), ("rope_scaling", raw.get("rope_scaling") or {})):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise refuse(f"{name} asks for {kind!r} scaling")
    values = {float(v) for v in (raw.get("rope_theta"), parameters.get("rope_theta")) if v is not None}
    if len(values) != 1:
        found = " and ".join(map(str, sorted(values))) or "no value"
        raise CheckpointError(
            f"{path}: rope_theta has {found}.", cure="Give it once, as rope_theta or in rope_parameters."
        )
    return values.pop()
