"""Which kernels ONNX Runtime really runs for a graph, and where its time goes, from its own profile."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from runtime.batch import Batch
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.settings import EngineSettings

_WARM_UP = 3


@dataclass(frozen=True)
class Kernels:
    """By operator: how many nodes ran, and their part of the time of all nodes (0 to 1), largest first."""

    nodes: dict[str, int]
    shares: dict[str, float]


def session_options(graph: Path, threads: int = 0) -> onnxruntime.SessionOptions:
    """Return the very options the engine opens INT8's uint8 form with: other options, other kernels."""
    settings = EngineSettings(threads=threads)
    engine = OnnxRuntimeEngine(graph, name="profile", precision="int8", fingerprint="", settings=settings, exact=True)
    options = engine._session.get_session_options()
    engine.close()
    return options


def profile(graph: Path, batch: Batch, threads: int, folder: Path, runs: int = 10) -> Kernels:
    """Run `batch` `runs` times with profiling on; the profile itself goes to `folder`."""
    options = session_options(graph, threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    for _ in range(_WARM_UP + runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    operators: dict[str, str] = {}
    times_us: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operators[event["name"]] = event["args"]["op_name"]
            times_us[event["name"]].append(event["dur"])
    spent: Counter[str] = Counter()
    for node, times in times_us.items():
        spent[operators[node]] += sum(times[_WARM_UP:])
    total = sum(spent.values())
    shares = {operator: round(us / total, 4) for operator, us in spent.most_common()}
    return Kernels(dict(Counter(operators.values()).most_common()), shares)
