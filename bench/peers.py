"""Peers in environments of their own, so that pins that clash with ours do not matter: one worker process a peer.

A worker answers one JSON object for each line it is told (see `bench.peer_openvino`). It times itself, so that what it
takes to pass ids and vectors between processes is not counted. A peer that cannot be measured says why; it is never
left out.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch

_ROOT = Path(__file__).resolve().parents[1]
_LOADING_S, _ANSWER_S, _ENDING_S = 1800.0, 600.0, 20.0


@dataclass(frozen=True)
class PeerKind:
    """How a peer is started: its environment's folder under the project, its worker script and that one's argument."""

    name: str
    environment: str
    script: str
    argument: str

    def not_there(self) -> str | None:
        """Return why it cannot be measured here, or None."""
        folder = _ROOT / self.environment
        # The stamp is written last: an environment without it is half made.
        if (folder / "bin" / "python").is_file() and (folder / ".f2rt-installed").is_file():
            return None
        return f"there is no environment {self.environment}; `make bench-peers` creates it"


PEERS = (
    PeerKind("OpenVINO int8 weights", ".venv-openvino", "peer_openvino.py", "int8"),
    PeerKind("OpenVINO bf16", ".venv-openvino", "peer_openvino.py", "bf16"),
)


class PeerError(RuntimeError):
    """A worker did not do what it was told; the message quotes the end of what it wrote."""


class Peer:
    """One worker process. `facts` is what it says of itself when its model is loaded."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        """Start it and wait until its model is loaded; what it prints goes to `log`. Raises PeerError."""
        self.name = name
        self._log = log
        self._batch: Batch | None = None
        self._unread = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment()
            )
        try:
            self.facts: dict[str, Any] = self._answer("ready", _LOADING_S)
        except PeerError:
            self.close()
            raise

    def vectors(self, batch: Batch) -> NDArray[np.float32]:
        """Run once; return float32 [rows, dim]. Raises PeerError."""
        self._give(batch)
        told = self._ask({"vectors": True})
        try:
            values = np.frombuffer(base64.b64decode(told["vectors"]), "<f4")
            return values.reshape(len(batch.lengths), told["dim"])
        except (KeyError, ValueError) as error:
            raise PeerError(f"{self.name} gave vectors that cannot be read: {error}.") from error

    def time_ms(self, batch: Batch) -> float:
        """Run once; return milliseconds. Raises PeerError."""
        self._give(batch)
        return float(self._ask({"run": True}, "ms"))

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _give(self, batch: Batch) -> None:
        if batch is not self._batch:
            ids, mask = batch.input_ids.tolist(), batch.attention_mask.tolist()
            self._ask({"batch": {"input_ids": ids, "attention_mask": mask}}, "rows")
            self._batch = batch

    def _ask(self, told: dict[str, Any], key: str | None = None) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error
        return self._answer(key, _ANSWER_S)

    def _answer(self, key: str | None, limit_s: float) -> Any:
        line = self._line(time.monotonic() + limit_s, limit_s)
        try:
            value = json.loads(line)
            return value if key is None else value[key]
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{self.name} answered {line[:200]!r}.") from error

    def _line(self, end: float, limit_s: float) -> bytes:
        """Read one line: by hand, since a worker that hangs must not hang the measurement."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._process.kill()
                raise PeerError(f"{self.name} did not answer within {limit_s:.0f} s.")
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                raise self._failure()
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failure(self) -> PeerError:
        self.close()
        status = self._process.returncode
        words = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = (
            words[-1].replace(f"{_ROOT}/", "") if words else "it said nothing"
        )  # results hold no paths of the machine
        return PeerError(f"{self.name} ended with status {status}: {last}")


def start_peer(kind: PeerKind, checkpoint: Path, threads: int, folder: Path) -> Peer | str:
    """Start a peer on a checkpoint, or return why it cannot be measured; its log goes to `folder`."""
    reason = kind.not_there()
    if reason is not None:
        return reason
    python, script = _ROOT / kind.environment / "bin" / "python", Path(__file__).resolve().parent / kind.script
    # -P: a script's own folder comes first on its path otherwise, and bench/optimum.py would hide optimum itself.
    command = [str(python), "-P", str(script), str(checkpoint.absolute()), kind.argument, str(threads)]
    try:
        return Peer(kind.name, command, folder / f"{kind.name.replace(' ', '-')}.log")
    except PeerError as error:
        return str(error)


def _environment() -> dict[str, str]:
    """None of this environment's own paths, and no look at the network: the checkpoint is a folder."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return own | {"HF_HUB_OFFLINE": "1"}
