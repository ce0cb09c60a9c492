"""From what the user typed to a folder on disk: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import CheckpointError, missing_extra

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "README.md", "*_Pooling/*"]
_REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies. `id` as the user gave it; `revision` is the hub's commit, None for a local folder."""

    id: str
    folder: Path
    revision: str | None


def locate(model: str, revision: str | None = None) -> Location:
    """Find `model`: a folder that exists, else a hub id, which is downloaded or taken from the hub's cache.

    Raises CheckpointError when it is neither, or the hub cannot be reached; MissingExtraError without huggingface_hub.
    """
    folder = Path(model).expanduser()
    if model.strip() and folder.is_dir():  # Path("") is the current folder
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision}) was given for the local folder {model}.",
                cure="Leave --revision out, or give a hub id.",
            )
        return Location(model.rstrip("/") or model, folder, None)
    if model.strip() and folder.exists():
        raise CheckpointError(f"{model} is a file.", cure="Give the folder that holds config.json.")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"there is no folder {model}, and it is not a hub id either (OWNER/NAME).",
            cure="Give the path of a folder that holds config.json, or a hub id.",
        )
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Location:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise missing_extra("huggingface_hub", "export") from error
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {model} here and no such repository on the hub (or it is private).",
            cure="Check the spelling, or log in with: hf auth login",
        ) from error
    # Whatever the network does wrong arrives as one of these; OSError covers a full cache disk, too.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {model} here, and the hub could not be asked for it: {_first_line(error)}",
            cure="Without a network, give a local folder instead: f2rt export ./path/to/checkpoint --out BUNDLE",
        ) from error
    commit = folder.name if _REVISION.fullmatch(folder.name) else revision
    return Location(model, folder, commit)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
