"""The README is true: its commands are run in order, as written, in a copy of the project."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.client import EmbeddingClient

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVER = "127.0.0.1:50051"
STAMP = Path(sys.prefix) / ".f2rt-installed"
CLIENTS = ".venv-clients"  # make clients
NOT_RUN = {"make test": "it is what is running"}
# `make engine` as it stands takes minutes, and is what `.ci/run` ends with: here it makes what the README's text needs.
PART = {"PRECISIONS": "fp32 int8", "TARGETS": "sm89"}


def blocks() -> list[tuple[str, str]]:
    """Return (language, body) of each fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What git would clone, with the running environment as its .venv, and the clients' if it is there.

    The environment is the developer's: it is used as it stands. Installing the copy into it, which make does when the
    stamp is older than what it is made of, would leave it pointing at a folder that is gone after the test.
    """
    folder = tmp_path / "f2rt"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (0, 0))
    (folder / ".venv").symlink_to(sys.prefix)
    if (ROOT / CLIENTS).exists():
        (folder / CLIENTS).symlink_to(ROOT / CLIENTS)
    return folder


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM, 2)


def run_bash(body: str, copy: Path, servers: list[subprocess.Popen[bytes]]) -> str:
    if body.strip() == "make serve":
        servers.append(subprocess.Popen(["make", "serve"], cwd=copy, start_new_session=True))
        with EmbeddingClient(SERVER) as client:
            client.wait_ready(60)
        return ""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", body], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def cpu_s() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def require_stamp() -> None:
    if not STAMP.exists():
        pytest.skip("the running environment was not made by `make setup`, which the README's commands use")


def test_make_in_a_copy_installs_nothing(copy: Path) -> None:
    """Also where pyproject.toml was changed after the environment was made."""
    require_stamp()
    would_do = run_bash("make --dry-run setup", copy, [])
    assert "pip install" not in would_do, would_do


@pytest.mark.parametrize("variables", [PART, pytest.param({}, marks=pytest.mark.slow)], ids=["part", "whole"])
def test_commands_run_in_order(
    copy: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    require_stamp()
    for name in PART:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    installed_ns = STAMP.stat().st_mtime_ns
    output: dict[int, str] = {}
    all_blocks = blocks()
    for index, (language, body) in enumerate(all_blocks):
        if body.strip() in NOT_RUN:
            continue
        if language == "bash":
            output[index] = run_bash(body, copy, servers)
        elif language == "python":
            stock = re.search(r"^(from|import) (openai|tritonclient)\b", body, re.MULTILINE)
            if stock and not (copy / CLIENTS).exists():
                continue
            python = f"{CLIENTS if stock else '.venv'}/bin/python"
            done = subprocess.run([python, "-c", body], cwd=copy, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{body}\n{done.stderr}"
            output[index] = done.stdout
            if index + 1 < len(all_blocks) and all_blocks[index + 1][0] == "text":
                assert done.stdout == all_blocks[index + 1][1]  # what the README shows is what it prints
    assert sum(language == "bash" for language, _ in all_blocks) >= 5
    assert "PASS" in output[0]
    assert (copy / "build/mini/manifest.json").is_file()
    manifest = (copy / "build/mini/manifest.json").read_bytes()
    start_s = cpu_s()
    again = run_bash("make engine", copy, servers)
    assert cpu_s() - start_s < 10  # of processor time, whatever else this machine does; nothing may be done twice
    assert {line.split()[0] for line in again.splitlines() if line.split()[:1]} >= {"kept", "PASS"}
    assert not re.findall(r"^(wrote|built|comparing|dropped) .*", again, re.MULTILINE)
    assert (copy / "build/mini/manifest.json").read_bytes() == manifest
    assert STAMP.stat().st_mtime_ns == installed_ns


def test_file_map_names_every_file() -> None:
    """One line a file; folders whose files need no line of their own stand for them."""
    mapped = re.findall(r"^\| `([^`]+)` \|", README.split("## Files")[1].split("\n## ")[0], re.MULTILINE)
    for name in mapped:
        assert (ROOT / name).exists(), name
    folders = tuple(name for name in mapped if name.endswith("/"))
    for package in ("export", "runtime"):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py"}
        missing = {file for file in files - set(mapped) if not file.startswith(folders)}
        assert not missing, missing


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
