"""A checkpoint folder, read and checked against the whole contract before any work is done.

`Checkpoint.open` is the only way in; what it returns is known to be a Qwen3 encoder with last-token pooling whose
tokenizer appends one EOS and whose weights are all there with the right shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from export.config import CONFIG, EncoderConfig, read_encoder_config
from export.conventions import (
    MODULES,
    ST_CONFIG,
    ST_LIMITS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_modules,
    check_tokenizer,
    max_tokens,
    pooling_files,
    read_prompts,
    read_tokenizer_config,
)
from export.hub import Location
from export.weights import INDEX, Weights
from runtime.bundle import Contract, FileRecord, Source, record_file
from runtime.errors import CheckpointError
from runtime.files import explain_read_errors, sha256_file

SMALLEST_TRAINED_DIM = 8


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `notices` are things a user should know and that need no action."""

    location: Location
    config: EncoderConfig
    contract: Contract
    weights: Weights
    license: str | None
    notices: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder it was read from."""
        return self.location.folder

    @classmethod
    def open(cls, location: Location) -> Checkpoint:
        """Read and check a checkpoint. Raises CheckpointError naming file, field, value and cure."""
        folder = location.folder
        notices: list[str] = []
        identity, config = read_encoder_config(folder)
        check_modules(folder, config, notices)
        declared = read_tokenizer_config(folder)
        eos_id, pad_id = check_tokenizer(folder, identity, declared, config, notices)
        prompts, default_prompt_name = read_prompts(folder)
        contract = Contract(
            architecture=identity.architecture,
            dim=config.hidden_size,
            trained_dims=trained_dims(config.hidden_size),
            max_tokens=max_tokens(folder, config, declared),
            pooling="last_token",
            eos_id=eos_id,
            pad_id=pad_id,
            vocab_size=config.vocab_size,
            prompts=prompts,
            default_prompt_name=default_prompt_name,
        )
        weights = Weights(folder)
        _check_weights(folder, weights, config)
        license_name = _license(folder)
        if license_name and {"nd", "nc"} & set(license_name.lower().replace("_", "-").split("-")):
            notices.append(
                f"the checkpoint declares the license {license_name}: a converted engine may count as a derivative; "
                "check that you may make and use one"
            )
        return cls(location, config, contract, weights, license_name, notices)

    def source(self, sha256: Callable[[Path], str] = sha256_file) -> Source:
        """Hash every file that was used and describe where they came from. Reads all weights once.

        Raises CheckpointError for a file that cannot be read.
        """
        names = [CONFIG, MODULES, TOKENIZER, TOKENIZER_CONFIG, ST_CONFIG, ST_LIMITS, INDEX, "README.md"]
        files = [n for n in names if (self.folder / n).is_file()]
        files += [str(p.relative_to(self.folder)) for p in pooling_files(self.folder)]
        files += [p.name for p in self.weights.files]
        records = []
        for name in files:
            with explain_read_errors(self.folder / name, CheckpointError):
                records.append(record_file(self.folder, name, sha256=sha256(self.folder / name)))
        return Source(self.location.id, self.location.revision, self.license, records)


def reference_files(source: Source) -> list[FileRecord]:
    """Return the records of the files that PyTorch and transformers read; a model card is not one of them."""
    names = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, INDEX)
    return [f for f in source.files if f.file in names or f.file.endswith(".safetensors")]


def trained_dims(dim: int) -> list[int]:
    """Return the Matryoshka dimensions of the F2LLM-v2 recipe: powers of two from 8 below `dim`, and `dim`."""
    return [d for d in (1 << n for n in range(3, 20)) if SMALLEST_TRAINED_DIM <= d < dim] + [dim]


def _check_weights(folder: Path, weights: Weights, config: EncoderConfig) -> None:
    expected = config.weight_shapes()
    missing = [name for name in expected if name not in weights]
    if "embed_tokens.weight" in missing and "lm_head.weight" in weights:
        raise CheckpointError(
            f"{folder} holds lm_head.weight but not embed_tokens.weight: tied weights were saved under the wrong name.",
            cure="Save it again with transformers, which keeps embed_tokens.weight for tied weights.",
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}.",
            cure=f"Check num_hidden_layers ({config.layers}) in {CONFIG}, or download the weights again.",
        )
    for name, shape in expected.items():
        info = weights.info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{info.key} in {info.file} has shape {list(info.shape)}; {CONFIG} asks for {list(shape)}.",
                cure=f"Weights and {CONFIG} do not belong together.",
            )
    extra = [n for n in weights.names() if n not in expected and n != "lm_head.weight" and not n.endswith("inv_freq")]
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors a Qwen3 encoder of {config.layers} layers does not use, the first is "
            f"{extra[0]}.",
            cure=f"Check num_hidden_layers and the architecture in {CONFIG}; adapters must be merged first.",
        )


def _license(folder: Path) -> str | None:
    """Return what the model card's front matter declares, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(card) or {}
    except Exception:  # noqa: BLE001 - the card is prose for people; a malformed one says nothing about its license
        return None
    return str(data.get("license_name") or data["license"]) if data.get("license") else None
