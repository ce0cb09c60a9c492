"""A checkpoint of a few thousand random weights behind the bundled tokenizer: for tests that export many times."""

from __future__ import annotations

from pathlib import Path

from export import synth
from export.config import EncoderConfig

TINY = EncoderConfig(
    vocab_size=16_000,
    hidden_size=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=256,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)


def write_tiny(folder: Path, *, seed: int = 0, shard_bytes: int = 1 << 30, config: EncoderConfig = TINY) -> Path:
    synth._write(config, folder, synth.default_tokenizer(), "tiny", seed, shard_bytes, lambda label, done, total: None)
    return folder
