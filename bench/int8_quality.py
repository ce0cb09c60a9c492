"""How good INT8's vectors are: f2rt's two INT8 forms beside what ONNX Runtime's tools make of the same fp32 graph.

On the bundled checkpoint, on its twin that is hard for INT8, and on those made to break FP16 or INT8. All twins compute
the same function (`tests.hostile`), so what differs between them is the quantization alone. Every vector of the
verification texts is compared with the PyTorch reference of that checkpoint: the cosine of each text, and whether the
nearest neighbours of each text stay the same, at every trained dimension. Ranges are chosen on the calibration texts,
which share no text with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.inputs import private_cache, spread
from bench.latency import say
from bench.other_forms import DYNAMIC, NAMES, STATIC, WEIGHTS, WHAT, make_form
from bench.report import Result
from calibration.texts import Text, calibration_texts, verification_texts
from export.checkpoint import Checkpoint
from export.graphs import TWIN
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.reference import Reference
from export.samples import make_samples
from export.synth import default_tokenizer
from runtime.batch import Batch
from runtime.bundle import Bundle
from runtime.cores import usable_cores
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from runtime.golden import row_cosines
from runtime.settings import EngineSettings
from runtime.tokenizer import Instruction, TextTokenizer
from tests.hostile import HOSTILE, make_hard, make_hostile
from tests.neighbours import MEAN_COSINE, MIN_COSINE, OVERLAP, SMALLEST_DIM, Vectors, cut, embed, overlap

MINI, HARD = "mini", "hard"
CHECKPOINTS = (MINI, HARD, *HOSTILE)
UINT8, INT8 = "f2rt int8, CPU form", "f2rt int8, TensorRT form"
FORMS = (DYNAMIC, STATIC, WEIGHTS)
NEIGHBOURS = 10


@dataclass(frozen=True)
class Score:
    """One engine at one dimension: cosines to the reference over all texts, and the overlap of nearest neighbours."""

    dim: int
    min: float
    p01: float
    mean: float
    overlap: float

    @property
    def is_kept(self) -> bool:
        """Whether it keeps what f2rt's INT8 has to keep."""
        return self.min >= MIN_COSINE and self.mean >= MEAN_COSINE and self.overlap >= OVERLAP


@dataclass(frozen=True)
class Scores:
    """All engines on one checkpoint, by name, each at every trained dimension from the smallest up."""

    checkpoint: str
    engines: dict[str, list[Score]]
    int8_share: float


def measure(names: Sequence[str], work: Path, texts: int | None = None, calibration: int | None = None) -> Result:
    """Measure the checkpoints called `names` of CHECKPOINTS on `texts` verification texts, all by default.

    `calibration` counts the calibration texts, all by default. Raises InputError for an unknown name.
    """
    unknown = [name for name in names if name not in CHECKPOINTS]
    if unknown or not names:
        wrong = f"there is no checkpoint {', '.join(unknown)}." if unknown else "no checkpoint was given."
        raise InputError(wrong, cure=f"Choose of {', '.join(CHECKPOINTS)}.")
    shown, seen = spread(verification_texts(), texts), spread(calibration_texts(), calibration)
    with private_cache(work):
        scores = [_measure(name, work / name, shown, seen) for name in names]
    return report(scores, len(shown), len(seen))


def make_checkpoint(name: str, folder: Path) -> Path:
    """Return the folder of the checkpoint called `name`, written to `folder` when it is a twin."""
    mini = default_tokenizer()
    if name == MINI:
        return mini
    return make_hard(mini, folder) if name == HARD else make_hostile(mini, folder, name)


def _measure(name: str, work: Path, texts: Sequence[Text], calibration: Sequence[Text]) -> Scores:
    work.mkdir(parents=True)
    location = locate(str(make_checkpoint(name, work / "checkpoint")))
    say(f"{name}: exporting")
    precisions = [Precision.FP32, Precision.INT8]
    bundle = export_bundle(Checkpoint.open(location), work / "bundle", precisions, calibration=calibration)
    contract = bundle.manifest.contract
    say(f"{name}: PyTorch reference of {len(texts)} texts")
    samples, _ = make_samples(Reference(location), contract, texts, lambda label, done, total: None)
    expected = np.stack([sample.vector for sample in samples])
    engines = {}
    for engine, run in _engines(bundle, work, calibration):
        say(f"{name}: {engine}")
        found = embed(run, [sample.ids for sample in samples], contract.pad_id)
        engines[engine] = [score(found, expected, dim) for dim in sorted(contract.trained_dims)]
    record = bundle.graph("int8").quantization
    return Scores(name, engines, record.int8_share if record else 0.0)


def _engines(
    bundle: Bundle, work: Path, calibration: Sequence[Text]
) -> Iterator[tuple[str, Callable[[Batch], Vectors]]]:
    """Yield all engines of one checkpoint by name, opened one after another."""
    graph = bundle.graph("int8").model.file
    paths = {UINT8: bundle.path(TWIN), INT8: bundle.path(graph)}
    fp32 = bundle.path(bundle.graph("fp32").model.file)
    prompts = bundle.manifest.contract.prompts
    tokenizer = TextTokenizer(bundle.path(bundle.manifest.tokenizer.file), bundle.manifest.contract)
    rendered = [prompts.get(text.prompt or "", "") + text.text for text in calibration]
    sequences = [item.ids for item in tokenizer.encode(rendered, Instruction(prompt=""))]
    paths |= {NAMES[kind]: make_form(kind, fp32, work / kind, sequences) for kind in FORMS}
    settings = EngineSettings(threads=usable_cores())
    for name, path in paths.items():
        engine = OnnxRuntimeEngine(
            path, name=name, precision="int8", fingerprint="", settings=settings, exact=name == UINT8
        )
        yield name, engine.run
        engine.close()


def score(found: Vectors, expected: Vectors, dim: int) -> Score:
    """Compare unit vectors [texts, full dim], cut to `dim`."""
    a, b = cut(found, dim), cut(expected, dim)
    cosines = row_cosines(a, b)
    smallest, low, mean = float(cosines.min()), float(np.quantile(cosines, 0.01)), float(cosines.mean())
    return Score(dim, smallest, low, mean, overlap(a, b, NEIGHBOURS))


def report(scores: Sequence[Scores], texts: int, calibration: int) -> Result:
    """Return the table and all numbers."""
    dims = [s.dim for s in next(iter(scores[0].engines.values()))]
    ours = [s for found in scores for name in (UINT8, INT8) for s in found.engines[name] if s.dim >= SMALLEST_DIM]
    kept = all(s.is_kept for s in ours)
    limits = (
        f"min {MIN_COSINE}, mean {MEAN_COSINE}, top-{NEIGHBOURS} overlap {OVERLAP} from dimension {SMALLEST_DIM} on"
    )
    options = f"--checkpoints {','.join(found.checkpoint for found in scores)}"
    options += f" --texts {texts} --calibration-texts {calibration}"
    return Result(
        name="int8-quality",
        title=f"INT8 vectors against PyTorch, {texts:,} verification texts",
        command=f"python -m bench int8-quality {options}",
        columns=[
            *("checkpoint", "engine", f"dim {dims[-1]}: min p1 mean top-{NEIGHBOURS}"),
            *(f"dim {dim}" for dim in dims[-2::-1]),
            "within limits",
        ],
        rows=[_cells(found.checkpoint, name, s) for found in scores for name, s in found.engines.items()],
        notes=[
            "cosine of each text to PyTorch in float32 (its smallest, first percentile and mean), and the part of the "
            f"{NEIGHBOURS} nearest other texts that both agree on; each dimension cut, then normalized",
            f"limits: {limits}; f2rt keeps them: {'yes' if kept else 'NO'}",
            "CPU form: uint8 activations, what f2rt serves on CPU; TensorRT form: int8 activations and float16, "
            "run by ONNX Runtime (ORT), which widens float16: rounding to INT8 shows here, overflow does not",
            *(f"{NAMES[kind]}: {WHAT[kind]}" for kind in FORMS),
            f"{calibration} calibration texts; hard: single channels times 64; the others: see tests/hostile.py",
        ],
        data={
            "texts": texts,
            "calibration_texts": calibration,
            "limits": {"min": MIN_COSINE, "mean": MEAN_COSINE, "overlap": OVERLAP, "smallest_dim": SMALLEST_DIM},
            "within_limits": kept,
            "checkpoints": [_numbers(found) for found in scores],
        },
    )


def _cells(checkpoint: str, name: str, scores: Sequence[Score]) -> list[str]:
    kept = all(s.is_kept for s in scores if s.dim >= SMALLEST_DIM)
    numbers = [f"{s.min:.4f} {s.p01:.4f} {s.mean:.4f} {s.overlap:.3f}" for s in reversed(scores)]
    return [checkpoint, name, *numbers, "yes" if kept else "no"]


def _numbers(found: Scores) -> dict[str, Any]:
    engines = {name: [vars(s) for s in scores] for name, scores in found.engines.items()}
    return {"checkpoint": found.checkpoint, "int8_share": found.int8_share, "engines": engines}
