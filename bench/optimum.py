"""Optimum's real exports of a checkpoint, taken in and proven: which kinds become a bundle and which are refused.

Optimum needs older pins than f2rt, so it runs in an environment of its own; `make optimum-check` creates it.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.latency import say
from bench.report import Result
from calibration.texts import verification_texts
from export.checkpoint import Checkpoint
from export.foreign import open_foreign
from export.hub import locate
from export.parity import check_bundle
from export.pipeline import export_bundle
from export.reference import Reference
from runtime.errors import InputError, MissingExtraError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-optimum"
STAMP = ENVIRONMENT / ".f2rt-installed"
QUANTIZED = "quantized"
# What follows `optimum-cli export onnx --model CHECKPOINT`. The last two are to be refused.
KINDS: dict[str, list[str]] = {
    "feature-extraction": ["--task", "feature-extraction", "--library-name", "transformers"],
    "sentence-transformers": ["--task", "feature-extraction", "--library-name", "sentence_transformers"],
    "opset 14": ["--task", "feature-extraction", "--library-name", "transformers", "--opset", "14"],
    "with-past": ["--task", "feature-extraction-with-past", "--library-name", "transformers"],
    "fp16": ["--task", "feature-extraction", "--library-name", "transformers", "--dtype", "fp16"],
    "text-generation": ["--task", "text-generation-with-past", "--library-name", "transformers"],
    QUANTIZED: [],
}
REFUSED = ("text-generation", QUANTIZED)
_EVERY = 8  # one verification text of so many; all of them for the first kind
_VERSIONS = "import importlib.metadata as m; print(*(m.version(n) for n in ('optimum-onnx', 'transformers', 'torch')))"


@dataclass(frozen=True)
class Outcome:
    """What became of one export: a verdict on so many texts with the smallest cosine, or why it was refused."""

    kind: str
    verdict: str
    precision: str = ""
    texts: int = 0
    min_cosine: float = -1.0
    producer: str = ""
    output: str = ""
    refusal: str = ""


def export_optimum(checkpoint: Path, work: Path, kind: str) -> Path:
    """Export with optimum-cli into a folder of `work`. Raises MissingExtraError, or RuntimeError with its words."""
    if not STAMP.is_file():
        raise MissingExtraError(
            f"there is no environment with optimum-onnx at {ENVIRONMENT.name}.", cure="Create it: make optimum-check"
        )
    folder = work / kind.replace(" ", "-")
    if kind == QUANTIZED:
        source = export_optimum(checkpoint, work, next(iter(KINDS)))
        arguments = ["onnxruntime", "quantize", "--onnx_model", str(source), "--avx512_vnni", "-o", str(folder)]
    else:
        arguments = ["export", "onnx", "--model", str(checkpoint), *KINDS[kind], str(folder)]
    done = subprocess.run(
        [str(ENVIRONMENT / "bin" / "optimum-cli"), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"optimum-cli {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return folder


def measure(model: Path, work: Path) -> Result:
    """Export every kind, take it in, and compare it with PyTorch."""
    checkpoint, reference = Checkpoint.open(locate(str(model))), Reference(locate(str(model)))
    outcomes = []
    for kind in KINDS:
        say(f"{kind}: exporting")
        source = export_optimum(model, work, kind)
        outcomes.append(_prove(kind, source, checkpoint, reference, work / f"bundle-{kind}"))
        say(f"{kind}: {outcomes[-1].verdict}")
    python = ENVIRONMENT / "bin" / "python"
    found = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    versions = dict(zip(("optimum-onnx", "transformers", "torch"), found, strict=True))
    rows = [
        [o.kind, o.precision, o.output, o.verdict, str(o.texts or ""), f"{o.min_cosine:.9f}" if o.texts else ""]
        for o in outcomes
    ]
    passed = all(o.verdict == ("refused" if o.kind in REFUSED else "pass") for o in outcomes)
    return Result(
        name="optimum",
        title="Optimum's exports, taken in with --from-onnx",
        command="make optimum-check",
        columns=["export", "precision", "output taken", "verdict", "texts", "min cosine"],
        rows=rows,
        notes=[
            f"exported by {', '.join(f'{name} {version}' for name, version in versions.items())} from {model.name}",
            *(f"{o.kind}: {o.refusal}" for o in outcomes if o.refusal),
            f"every kind ended as it should: {'yes' if passed else 'NO'}",
        ],
        data={"passed": passed, "exporter": versions, "outcomes": [vars(o) for o in outcomes]},
    )


def _prove(kind: str, source: Path, checkpoint: Checkpoint, reference: Reference, target: Path) -> Outcome:
    try:
        foreign = open_foreign(source, checkpoint.config)
        bundle = export_bundle(checkpoint, target, [foreign.precision], foreign=foreign)
    except InputError as error:
        # Without the places of this machine.
        return Outcome(kind, "refused", refusal=error.message.replace(f"{source}/", ""))
    texts = verification_texts()[:: 1 if kind == next(iter(KINDS)) else _EVERY]
    (engine,) = check_bundle(bundle, reference, texts)[0].engines
    (graph,) = bundle.manifest.graphs
    assert graph.origin is not None
    return Outcome(
        kind,
        engine.verdict,
        graph.precision,
        len(texts),
        min((c.cosine_min for c in engine.checks), default=-1.0),
        graph.origin.producer,
        graph.origin.hidden_states,
    )
