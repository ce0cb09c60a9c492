"""config.json: the shape of a Qwen3 encoder, and what in that file f2rt does not implement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from runtime.errors import CheckpointError

CONFIG = "config.json"

T = TypeVar("T")
Positive = Annotated[int, msgspec.Meta(ge=1)]


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


def read_typed(path: Path, kind: type[T], *, required: bool = True) -> T:
    """Return the object in a JSON file as a `kind`; other fields are ignored. Raises CheckpointError."""
    return as_type(path, read_json(path, required=required), kind)


def as_type(path: Path, raw: dict[str, Any], kind: type[T]) -> T:
    """Check `raw`, read from `path`, against a struct. Raises CheckpointError naming the field."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        field = place.strip("`").removeprefix("$.")
        top = field.partition(".")[0].partition("[")[0]
        value = f" (it is {raw[top]!r})" if top in raw else ""
        where = f"{field}: " if field else ""
        raise CheckpointError(f"{path}: {where}{message}{value}.", cure="Correct it, or download it again.") from error


class Rope(msgspec.Struct):
    """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] | None = None
    partial_rotary_factor: float | None = None


class Qwen3Config(msgspec.Struct):
    """The fields of config.json that matter, with transformers' own defaults where leaving them out is usual."""

    vocab_size: Positive
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive = 128
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-6
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class Identity(msgspec.Struct):
    """What config.json says it is, read first: another model's file may lack everything else."""

    model_type: str = ""
    architectures: list[str] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def architecture(self) -> str:
        """The first architecture named; without one, the bare encoder."""
        return (self.architectures or ["Qwen3Model"])[0]


def read_encoder_config(folder: Path) -> tuple[Identity, EncoderConfig]:
    """Return what config.json says. Raises CheckpointError for what is wrong there or not implemented."""
    path = folder / CONFIG
    raw = read_json(path)
    identity = as_type(path, raw, Identity)
    if identity.model_type != "qwen3" or identity.architecture not in ("Qwen3Model", "Qwen3ForCausalLM"):
        raise CheckpointError(
            f"{path} describes {identity.model_type!r} / {identity.architecture!r}, not a Qwen3 encoder.",
            cure="f2rt converts Qwen3-architecture embedding checkpoints such as F2LLM-v2 and Qwen3-Embedding.",
        )
    found = as_type(path, raw, Qwen3Config)
    _refuse_unimplemented(path, found)
    config = EncoderConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        kv_heads=found.num_key_value_heads or found.num_attention_heads,
        head_dim=found.head_dim,
        intermediate_size=found.intermediate_size,
        max_positions=found.max_position_embeddings,
        rope_theta=_rope_theta(path, found),
        rms_norm_eps=found.rms_norm_eps,
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
    if found.layer_types is not None and len(found.layer_types) != config.layers:
        raise CheckpointError(
            f"{path}: layer_types has {len(found.layer_types)} entries; num_hidden_layers is {config.layers}.",
            cure="Make them agree.",
        )
    return identity, config


def _refuse_unimplemented(path: Path, config: Qwen3Config) -> None:
    """Refuse every variation of the architecture that would silently give other vectors."""
    reasons = []
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act is {config.hidden_act!r}")
    if config.attention_bias:
        reasons.append("attention_bias is true")
    if config.use_sliding_window:
        reasons.append(f"use_sliding_window is true (window {config.sliding_window})")
    other = sorted(set(config.layer_types or []) - {"full_attention"})
    if other:
        reasons.append(f"layer_types holds {other[0]!r}")
    if config.quantization_config is not None:
        reasons.append("the weights are quantized (quantization_config)")
    for name, rope in (("rope_parameters", config.rope_parameters), ("rope_scaling", config.rope_scaling)):
        kind = (rope.rope_type or rope.type or "default") if rope else "default"
        if kind != "default":
            reasons.append(f"{name} asks for {kind!r} scaling")
        if rope and rope.partial_rotary_factor not in (None, 1.0):
            reasons.append(f"{name} has partial_rotary_factor {rope.partial_rotary_factor}")
    if reasons:
        raise CheckpointError(
            f"{path}: {'; '.join(reasons)}, which f2rt does not implement.",
            cure="Use a checkpoint without it, or ask for it.",
        )


def _rope_theta(path: Path, config: Qwen3Config) -> float:
    """Read RoPE's base from transformers 5's `rope_parameters` or 4's `rope_theta`; both must agree."""
    parameters = config.rope_parameters
    values = {v for v in (config.rope_theta, parameters.rope_theta if parameters else None) if v is not None}
    if len(values) != 1:
        found = " and ".join(map(str, sorted(values))) or "no value"
        raise CheckpointError(
            f"{path}: rope_theta has {found}.", cure="Give it once, as rope_theta or in rope_parameters."
        )
    return values.pop()
