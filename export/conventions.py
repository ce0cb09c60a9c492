"""The conventions around the encoder: pooling, EOS, prompts and length, as the checkpoint's own files declare them.

F2LLM-v2 and Qwen3-Embedding differ in all of these, so nothing is assumed: each is read, checked and recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
from tokenizers import Tokenizer

from export.config import CONFIG, EncoderConfig, Identity, read_json, read_typed
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


class SpecialToken(msgspec.Struct):
    """A special token as an object."""

    content: str


class TokenizerConfig(msgspec.Struct):
    """The fields of tokenizer_config.json that matter."""

    eos_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None
    padding_side: str = "right"
    model_max_length: float | None = None


class SentenceLimits(msgspec.Struct):
    """sentence_bert_config.json."""

    max_seq_length: Annotated[int, msgspec.Meta(ge=2)] | None = None
    do_lower_case: bool = False


class SentenceConfig(msgspec.Struct):
    """config_sentence_transformers.json."""

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Return tokenizer_config.json, empty when there is none. Raises CheckpointError."""
    return read_typed(folder / TOKENIZER_CONFIG, TokenizerConfig, required=False)


def check_tokenizer(
    folder: Path, identity: Identity, declared: TokenizerConfig, config: EncoderConfig, notices: list[str]
) -> tuple[int, int]:
    """Return the EOS id the post-processor appends and the pad id. Raises CheckpointError."""
    tokenizer = _open_tokenizer(folder / TOKENIZER, config)
    eos_id = _appended_eos(folder / TOKENIZER, tokenizer, identity, _text(declared.eos_token))
    if declared.padding_side == "left":
        notices.append("the tokenizer pads on the left; f2rt pads on the right, where causal attention never looks")
    pad_text = _text(declared.pad_token)
    pad_id = identity.pad_token_id if pad_text is None else tokenizer.token_to_id(pad_text)
    return eos_id, pad_id if pad_id is not None and 0 <= pad_id < config.vocab_size else eos_id


def _text(token: str | SpecialToken | None) -> str | None:
    return token.content if isinstance(token, SpecialToken) else token


def _open_tokenizer(path: Path, config: EncoderConfig) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.", cure="Save the tokenizer in its fast form (tokenizer.json).")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}.", cure="Copy it again from its source.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {size} tokens; vocab_size in {CONFIG} is {config.vocab_size}, the rows of the token table.",
            cure="Tokenizer and weights do not belong together.",
        )
    return tokenizer


def _appended_eos(path: Path, tokenizer: Tokenizer, identity: Identity, eos_text: str | None) -> int:
    """Return the one token the post-processor appends; it must be one the checkpoint declares as EOS."""
    ids = identity.eos_token_id if isinstance(identity.eos_token_id, list) else [identity.eos_token_id]
    declared = {f"{i} {tokenizer.id_to_token(i)!r}": i for i in ids if i is not None}
    if eos_text is not None:
        declared[repr(eos_text)] = tokenizer.get_vocab().get(eos_text, -1)
    bare, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    if full == bare:
        raise CheckpointError(
            f"{path}: the post-processor appends no EOS. Without it the vector is taken at the last word, and "
            "retrieval is ruined.",
            cure=f"Add a TemplateProcessing post-processor that appends {eos_text or 'the EOS token'}.",
        )
    if full[: len(bare)] != bare or len(full) != len(bare) + 1:
        raise CheckpointError(
            f"{path}: the post-processor turns {bare} into {full}; exactly one EOS at the end is expected.",
            cure="Correct the post-processor.",
        )
    eos_id: int = full[-1]
    if declared and eos_id not in declared.values():
        raise CheckpointError(
            f"{path}: the post-processor appends {eos_id} {tokenizer.id_to_token(eos_id)!r}, but {CONFIG} and "
            f"{TOKENIZER_CONFIG} declare {', '.join(declared)} as EOS.",
            cure="Make them agree: a vector taken at a token the model was not trained on is wrong.",
        )
    return eos_id


def read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name and the default's name. Raises CheckpointError for malformed ones."""
    path = folder / ST_CONFIG
    found = read_typed(path, SentenceConfig, required=False)
    for name, text in found.prompts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path}: the prompt {name!r} is not valid Unicode.", cure="Correct it.") from error
    default = found.default_prompt_name
    if default is not None and default not in found.prompts:
        raise CheckpointError(
            f"{path}: default_prompt_name is {default!r}; prompts has {', '.join(sorted(found.prompts)) or 'none'}.",
            cure="Name one of them, or null.",
        )
    return found.prompts, default


def max_tokens(folder: Path, config: EncoderConfig, declared: TokenizerConfig) -> int:
    """Return the smallest declared limit: max_seq_length, the tokenizer's model_max_length, or the positions."""
    path = folder / ST_LIMITS
    limits = read_typed(path, SentenceLimits, required=False)
    if limits.do_lower_case:
        raise CheckpointError(
            f"{path}: do_lower_case is true, which f2rt does not implement.",
            cure="Set it to false if the model was trained on text as it stands; Qwen3 models are.",
        )
    # transformers writes 1e30 for "no limit".
    lengths = [config.max_positions, limits.max_seq_length, declared.model_max_length]
    return int(min(n for n in lengths if n is not None and n >= 2))
