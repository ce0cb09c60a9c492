"""From a name to a folder: local forms, nonsense, and the hub without a network.

huggingface_hub reads its environment when it is imported, so what depends on it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.hub import Location, locate
from runtime.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
MODEL = "owner-of-nothing/no-such-model"

LOCATE = """
import json, sys
from export.checkpoint import Checkpoint
from export.hub import locate
from runtime.errors import CheckpointError, status_of
try:
    location = locate(*sys.argv[1:])
except CheckpointError as error:
    print(json.dumps({"message": error.message, "cure": error.cure, "exit_code": status_of(error).exit_code}))
else:
    contract = Checkpoint.open(location).contract
    print(json.dumps({"id": location.id, "folder": str(location.folder), "revision": location.revision,
                      "dim": contract.dim}))
"""


def locate_elsewhere(cache: Path, *arguments: str, **environment: str) -> dict[str, str | int | None]:
    """Call `locate` in a new process with its own empty home and hub cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", LOCATE, *arguments]
    done = subprocess.run(command, env=env | environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, str | int | None] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- local folders


def test_folder(mini: Path) -> None:
    assert locate(str(mini)) == Location(str(mini), mini, None)


def test_relative_folder_and_trailing_slash(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mini.parent)
    assert locate("mini/") == Location("mini", Path("mini"), None)
    assert locate("./mini") == Location("./mini", Path("mini"), None)
    assert locate(".").id == "."


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model").folder == tmp_path / "model"


def test_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Location("owner/name", Path("owner/name"), None)


def test_revision_of_a_folder_is_refused(mini: Path) -> None:
    with pytest.raises(CheckpointError, match="main") as caught:
        locate(str(mini), "main")
    assert str(mini) in caught.value.message
    assert "--revision" in caught.value.cure


def test_file_is_refused(mini: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file") as caught:
        locate(str(mini / "model.safetensors"))
    assert "folder" in caught.value.cure


@pytest.mark.parametrize(
    "name",
    ["", " ", "no-such-folder", "./no/such/folder", "/no/such/folder", "a/b/c", "https://hub/a/b", "a b/c", "a/"],
)
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a hub id") as caught:
        locate(name)
    assert name in caught.value.message
    assert "folder" in caught.value.cure


def test_root_keeps_its_name() -> None:
    assert locate("/") == Location("/", Path("/"), None)


# --- the hub without a network


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="declared-offline"),
        # Nothing listens on the discard port: the connection is refused at once, as without a network.
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, id="hub-unreachable"),
    ],
)
def test_offline_names_the_folder_form(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    found = locate_elsewhere(tmp_path / "cache", MODEL, **environment)
    assert MODEL in str(found["message"])
    assert "hub could not be asked" in str(found["message"])
    assert "local folder" in str(found["cure"])
    assert "f2rt export ./" in str(found["cure"])
    assert found["exit_code"] == 2
    assert time.monotonic() - start < 30


@pytest.fixture(scope="module")
def cache(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with two revisions of one repository, `main` being the first."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for commit in (COMMIT, OTHER_COMMIT):
        shutil.copytree(mini, repository / "snapshots" / commit)
    return cache


@pytest.mark.parametrize(
    ("arguments", "environment", "commit"),
    [
        pytest.param(["owner/name"], {"HF_HUB_OFFLINE": "1"}, COMMIT, id="offline"),
        pytest.param(["owner/name"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, COMMIT, id="unreachable"),
        pytest.param(["owner/name", OTHER_COMMIT], {"HF_HUB_OFFLINE": "1"}, OTHER_COMMIT, id="revision"),
    ],
)
def test_cached_repository_is_opened_offline(
    cache: Path, arguments: list[str], environment: dict[str, str], commit: str
) -> None:
    found = locate_elsewhere(cache, *arguments, **environment)
    assert found == {
        "id": "owner/name",
        "folder": str(cache / "models--owner--name" / "snapshots" / commit),
        "revision": commit,
        "dim": 256,
    }


def test_unknown_revision_of_a_cached_repository_is_refused(cache: Path) -> None:
    found = locate_elsewhere(cache, "owner/name", "v2", HF_HUB_OFFLINE="1")
    assert "hub could not be asked" in str(found["message"])
    assert "local folder" in str(found["cure"])
