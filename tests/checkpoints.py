"""Checkpoints changed on purpose, for tests of what export accepts and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from runtime.bundle import Bundle

Tensors = dict[str, NDArray[Any]]
Damage = Callable[[Path], None]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POOLING = "1_Pooling/config.json"
PROMPTS = "config_sentence_transformers.json"
ENDOFTEXT, IM_START, IM_END = 15984, 15985, 15986


def linked_copy(mini: Path, copy: Path) -> Path:
    """A copy that may be damaged. Weights and tokenizer are links; `put` replaces a link by a file."""
    shutil.copytree(mini, copy, ignore=shutil.ignore_patterns(WEIGHTS, "tokenizer.json"))
    for name in (WEIGHTS, "tokenizer.json"):
        (copy / name).symlink_to(mini / name)
    return copy


def export(source: Path, target: Path) -> Bundle:
    return export_bundle(open_checkpoint(source), target, [Precision.FP32])


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(locate(str(folder)))


def put(path: Path, value: Any) -> None:
    """Write text, bytes or (anything else) JSON, never through a link."""
    path.unlink(missing_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def drop(path: Path, *names: str) -> None:
    put(path, {k: v for k, v in read(path).items() if k not in names})


def sets(file: str, **values: Any) -> Damage:
    """Set top-level fields of a JSON file."""
    return lambda folder: put(folder / file, read(folder / file) | values)


def config(**values: Any) -> Damage:
    return sets("config.json", **values)


def writes(file: str, value: Any) -> Damage:
    return lambda folder: put(folder / file, value)


def removes(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def appends_special(*ids: int, before: tuple[int, ...] = ()) -> Damage:
    """Make the post-processor put these special tokens after, and before, each text."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = read(path)
        names = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}

        def special(i: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": names[i], "type_id": 0}}

        template = tokenizer["post_processor"]["processors"][1]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        template["single"] = [*map(special, before), text, *map(special, ids)]
        template["pair"] = template["single"] + [{"Sequence": {"id": "B", "type_id": 1}}]
        template["special_tokens"] = {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in {*ids, *before}
        }
        put(path, tokenizer)

    return damage


def tensors_of(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / WEIGHTS)
    return tensors


def save(tensors: Tensors, path: Path) -> None:
    path.unlink(missing_ok=True)
    save_file(tensors, path)


def weights(change: Callable[[Tensors], Tensors]) -> Damage:
    return lambda folder: save(change(tensors_of(folder)), folder / WEIGHTS)


def added(name: str, value: NDArray[Any]) -> Damage:
    return weights(lambda tensors: tensors | {name: value})


def replaced(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Damage:
    return weights(lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors[name]))})


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over three files with an index, as transformers does; returns the index's weight_map."""
    tensors = tensors_of(folder)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file)
    put(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / WEIGHTS).unlink()
    return weight_map


def shard_then(damage: Damage) -> Damage:
    def run(folder: Path) -> None:
        shard(folder)
        damage(folder)

    return run
