"""What TensorRT-RTX says of a graph: parses, how many errors, compiles. Prints one line of JSON.

Runs in a process of its own, since a compiler may take the process down: python -m bench.compiler_says GRAPH TARGET.
Unlike `f2rt build` it refuses nothing beforehand: here a refusal is a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROWS, TOKENS = 8, 128  # the optimization profile's upper end
_KEPT = 3  # messages
_WIDTH = 300  # characters of a message


@dataclass(frozen=True)
class Saying:
    """The compiler's answer. `errors` counts the parser's; `messages` are the first it gave, parsing or compiling."""

    version: str
    parsed: bool
    errors: int
    built: bool
    messages: list[str] = field(default_factory=list)
    network_layers: dict[str, int] = field(default_factory=dict)
    engine_bytes: int = 0
    build_s: float = 0.0

    @property
    def short(self) -> str:
        """Return it in a few words for a table."""
        if not self.parsed:
            return f"{self.errors} parser errors"
        if not self.built:
            return "parses, does not compile"
        return f"builds in {self.build_s:.1f} s, {self.engine_bytes / 1e6:.1f} MB"


def ask(graph: Path, target: str) -> Saying:
    """Ask in another process; one that dies is an answer, too."""
    command = [sys.executable, "-m", "bench.compiler_says", str(graph.absolute()), target]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Saying("", False, 0, False, [f"the process ended with {done.returncode}: {lines[-1] if lines else ''}"])
    return Saying(**json.loads(done.stdout.splitlines()[-1]))


def _say(graph: Path, target: str) -> Saying:
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    version = str(trt.__version__)
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}"[:_WIDTH] for e in found[:_KEPT]]
        return Saying(version, False, parser.num_errors, False, lines or [m[:_WIDTH] for m in messages[:_KEPT]])
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        profile.set_shape(network.get_input(index).name, (1, 1), (ROWS, TOKENS), (ROWS, TOKENS))
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    size = 0 if plan is None else int(plan.nbytes)
    kept = [m[:_WIDTH] for m in messages[:_KEPT]]
    return Saying(version, True, 0, plan is not None, kept, dict(layers.most_common()), size, seconds)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[int]:
    """Send what the library prints on standard output to standard error; yield the real one."""
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        yield real
    finally:
        os.dup2(real, 1)


if __name__ == "__main__":
    with _quiet_stdout() as stdout:
        os.write(stdout, (json.dumps(asdict(_say(Path(sys.argv[1]), sys.argv[2]))) + "\n").encode())
