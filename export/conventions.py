"""The conventions around the encoder: pooling, EOS, prompts and length, as the checkpoint's own files declare them.

F2LLM-v2 and Qwen3-Embedding differ in all of these, so nothing is assumed: each is read, checked and recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from export.config import CONFIG, EncoderConfig, read_json
from runtime.errors import CheckpointError

MODULES = "modules.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ST_CONFIG = "config_sentence_transformers.json"
ST_LIMITS = "sentence_bert_config.json"


def pooling_files(folder: Path) -> list[Path]:
    """Return the configuration files of the modules after the encoder."""
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    return [folder / m["path"] / CONFIG for m in modules if m.get("path") and (folder / m["path"] / CONFIG).is_file()]


def check_modules(folder: Path, config: EncoderConfig, notices: list[str]) -> None:
    """Check that the pipeline is encoder, last-token pooling, normalization. Raises CheckpointError."""
    path = folder / MODULES
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(str(m["type"]).rsplit(".", 1)[-1], str(m.get("path", ""))) for m in modules]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing, so nothing says how tokens become one vector.",
            cure="Use a checkpoint in the sentence-transformers layout (modules.json, 1_Pooling/config.json).",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error!r}.", cure="Download it again.") from error
    names = [kind for kind, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path} lists {' -> '.join(names) or 'nothing'}; f2rt implements Transformer -> Pooling -> Normalize.",
            cure="Use a checkpoint without further modules.",
        )
    if "Normalize" not in names:
        notices.append(f"{MODULES} has no Normalize module; f2rt's vectors have unit length all the same")
    pooling_path = folder / kinds[1][1] / CONFIG
    pooling = read_json(pooling_path)
    modes = sorted(k.removeprefix("pooling_mode_") for k, v in pooling.items() if k.startswith("pooling_mode_") and v)
    if isinstance(pooling.get("pooling_mode"), str):
        modes = [pooling["pooling_mode"]]
    if modes != ["lasttoken"]:
        raise CheckpointError(
            f"{pooling_path} declares {' + '.join(modes) or 'no'} pooling; f2rt implements last-token pooling only.",
            cure="Use a checkpoint trained with last-token pooling; another pooling would give wrong vectors.",
        )
    declared = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
    if declared not in (None, config.hidden_size):
        notices.append(
            f"{pooling_path.relative_to(folder)} says {declared} dimensions; config.json and the weights say "
            f"{config.hidden_size}, which is used"
        )


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def check_tokenizer(
    folder: Path,
    raw: dict[str, Any],
    tokenizer_config: dict[str, Any],
    config: EncoderConfig,
    notices: list[str],
) -> tuple[int, int]:
    """Return the EOS id the post-processor appends and the pad id. Raises CheckpointError."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.", cure="Save the tokenizer in its fast form (tokenizer.json).")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}.", cure="Copy it again from its source.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {size} tokens; vocab_size in {CONFIG} is {config.vocab_size}, the rows of the token table.",
            cure="Tokenizer and weights do not belong together.",
        )
    declared_ids = raw.get("eos_token_id")
    declared = set(declared_ids if isinstance(declared_ids, list) else [declared_ids]) - {None}
    eos_text = _token_text(tokenizer_config.get("eos_token"))
    if eos_text is not None:
        declared.add(tokenizer.token_to_id(eos_text))
    bare, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    if full == bare:
        raise CheckpointError(
            f"{path}: the post-processor appends no EOS. Without it the vector is taken at the last word, and "
            "retrieval is ruined.",
            cure=f"Add a TemplateProcessing post-processor that appends {eos_text or declared or 'the EOS token'}.",
        )
    if full[: len(bare)] != bare or len(full) != len(bare) + 1:
        raise CheckpointError(
            f"{path}: the post-processor turns {bare} into {full}; exactly one EOS at the end is expected.",
            cure="Correct the post-processor.",
        )
    eos_id = full[-1]
    if declared and eos_id not in declared:
        names = ", ".join(f"{i} {tokenizer.id_to_token(i)!r}" for i in sorted(i for i in declared if i is not None))
        raise CheckpointError(
            f"{path}: the post-processor appends {eos_id} {tokenizer.id_to_token(eos_id)!r}, but {CONFIG} and "
            f"{TOKENIZER_CONFIG} declare {names} as EOS.",
            cure="Make them agree: a vector taken at a token the model was not trained on is wrong.",
        )
    if tokenizer_config.get("padding_side") == "left":
        notices.append("the tokenizer pads on the left; f2rt pads on the right, where causal attention never looks")
    pad_text = _token_text(tokenizer_config.get("pad_token"))
    pad_id = tokenizer.token_to_id(pad_text) if pad_text is not None else raw.get("pad_token_id")
    return eos_id, pad_id if isinstance(pad_id, int) and 0 <= pad_id < config.vocab_size else eos_id


def read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name and the default's name. Raises CheckpointError for malformed ones."""
    path = folder / ST_CONFIG
    raw = read_json(path, required=False)
    prompts = raw.get("prompts", {})
    if not isinstance(prompts, dict) or not all(isinstance(v, str) for v in prompts.values()):
        bad = prompts if not isinstance(prompts, dict) else {k: v for k, v in prompts.items() if not isinstance(v, str)}
        raise CheckpointError(f"{path}: prompts must map names to texts, and is or holds {bad!r}.", cure="Correct it.")
    default = raw.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(
            f"{path}: default_prompt_name is {default!r}; prompts has {', '.join(sorted(prompts)) or 'none'}.",
            cure="Name one of them, or null.",
        )
    return prompts, default


def max_tokens(folder: Path, config: EncoderConfig, tokenizer_config: dict[str, Any]) -> int:
    """Return the smallest declared limit: max_seq_length, the tokenizer's model_max_length, or the positions."""
    limits = [config.max_positions, tokenizer_config.get("model_max_length")]
    limits.append(read_json(folder / ST_LIMITS, required=False).get("max_seq_length"))
    # transformers writes 1e30 for "no limit".
    return min(int(n) for n in limits if isinstance(n, int | float) and 2 <= n < 1e9)
