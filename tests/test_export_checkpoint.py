"""What export reads in a checkpoint: the contract as recorded, its license and files, and notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.checkpoint import trained_dims
from tests.checkpoints import (
    ENDOFTEXT,
    IM_END,
    INDEX,
    POOLING,
    PROMPTS,
    linked_copy,
    open_checkpoint,
    put,
    read,
    sets,
    shard,
)


@pytest.fixture
def folder(mini: Path, tmp_path: Path) -> Path:
    return linked_copy(mini, tmp_path / "checkpoint")


def test_contract_of_the_mini_checkpoint(mini: Path) -> None:
    checkpoint = open_checkpoint(mini)
    contract = checkpoint.contract
    assert contract.architecture == "Qwen3Model"
    assert contract.dim == 256
    assert contract.trained_dims == [8, 16, 32, 64, 128, 256]
    assert contract.max_tokens == 1024
    assert (contract.eos_id, contract.pad_id) == (IM_END, ENDOFTEXT)
    assert contract.vocab_size == 16000
    assert contract.pooling == "last_token"
    assert contract.prompts == read(mini / PROMPTS)["prompts"]
    assert contract.prompts["query"].endswith("Query: ")
    assert contract.default_prompt_name is None
    assert checkpoint.location.revision is None


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(320, [8, 16, 32, 64, 128, 256, 320]), (256, [8, 16, 32, 64, 128, 256]), (8, [8]), (5, [5])],
)
def test_trained_dimensions(dim: int, expected: list[int]) -> None:
    assert trained_dims(dim) == expected


def test_max_tokens_is_the_smallest_limit_declared(folder: Path) -> None:
    sets("tokenizer_config.json", model_max_length=777)(folder)
    assert open_checkpoint(folder).contract.max_tokens == 777
    sets("tokenizer_config.json", model_max_length=1e30)(folder)
    assert open_checkpoint(folder).contract.max_tokens == 1024
    (folder / "sentence_bert_config.json").unlink()
    assert open_checkpoint(folder).contract.max_tokens == 8192


def test_default_prompt_is_recorded(folder: Path) -> None:
    sets(PROMPTS, default_prompt_name="query")(folder)
    assert open_checkpoint(folder).contract.default_prompt_name == "query"


def test_no_prompts_at_all(folder: Path) -> None:
    (folder / PROMPTS).unlink()
    assert open_checkpoint(folder).contract.prompts == {}


def test_wrong_pooling_dimension_is_noticed(folder: Path) -> None:
    sets(POOLING, word_embedding_dimension=1024)(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.contract.dim == 256
    assert any(POOLING in n and "1024" in n and "256" in n for n in checkpoint.notices)


def test_missing_normalize_module_is_noticed(folder: Path) -> None:
    put(folder / "modules.json", read(folder / "modules.json")[:2])
    assert any("Normalize" in notice for notice in open_checkpoint(folder).notices)


@pytest.mark.parametrize(
    ("front_matter", "license_name", "noticed"),
    [
        ("license: cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", True),
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0", True),
        ("license: other\nlicense_name: CC_BY_ND_4.0", "CC_BY_ND_4.0", True),
        ("license: apache-2.0", "apache-2.0", False),
        ("license: mit-and-ncsa", "mit-and-ncsa", False),
        ("language: en", None, False),
    ],
)
def test_license_is_recorded_and_noticed(
    folder: Path, front_matter: str, license_name: str | None, noticed: bool
) -> None:
    put(folder / "README.md", f"---\n{front_matter}\n---\n# a card\n")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.license == license_name
    assert checkpoint.source().license == license_name
    assert any(str(license_name) in n and "derivative" in n for n in checkpoint.notices) == noticed


@pytest.mark.parametrize("card", ["no front matter", "---\nlicense: [\n---\n", ""])
def test_malformed_model_card_declares_nothing(folder: Path, card: str) -> None:
    put(folder / "README.md", card)
    assert open_checkpoint(folder).license is None


def test_good_checkpoint_needs_no_notice(mini: Path) -> None:
    assert open_checkpoint(mini).notices == []


def test_source_names_every_file_with_its_hash(folder: Path) -> None:
    shard(folder)
    records = {r.file: r for r in open_checkpoint(folder).source().files}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    expected = {"config.json", "modules.json", "tokenizer.json", PROMPTS, POOLING, INDEX, *shards}
    assert expected <= set(records)
    assert all((folder / name).stat().st_size == r.size_bytes and len(r.sha256) == 64 for name, r in records.items())
