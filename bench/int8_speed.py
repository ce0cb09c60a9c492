"""How fast INT8 answers on CPU: f2rt int8 and fp32 beside other 8-bit forms of the same graph, and other tools.

All get the same random token ids and as many threads as there are physical cores, and take turns (see `bench.turns`).
Other tools run as their users run them; those whose pins clash with ours run in environments of their own (see
`bench.peers`). Cosines are taken to stock transformers in float32 on the same ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.inputs import private_cache, short_texts
from bench.kernels import Kernels, profile
from bench.latency import TORCH, TORCH_BF16, say, stock_transformers
from bench.other_forms import DYNAMIC, NAMES, WEIGHTS, WHAT, make_form
from bench.peers import PEERS, Peer, start_peer
from bench.report import Result
from bench.turns import Contestant, InProcess, Turns, take_turns
from export.checkpoint import Checkpoint
from export.hub import locate
from export.int8 import groups
from export.pipeline import export_bundle
from export.precision import Precision
from export.synth import SIZES, default_tokenizer, write_checkpoint
from runtime.batch import Batch, make_batch
from runtime.bundle import Bundle, open_bundle
from runtime.cores import usable_cores
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from runtime.loader import open_raw_engine
from runtime.settings import EngineSettings

MINI = "mini"
OURS, FP32 = "f2rt int8", "f2rt fp32"
FORMS = (DYNAMIC, WEIGHTS)
SHAPES = {"1 x 16": (1, 16), "1 x 32": (1, 32), "1 x 128": (1, 128), "1 x 512": (1, 512), "8 x 64": (8, 64)}
MIXED, MIXED_ROWS, MIXED_TOKENS = "32 mixed", 32, (8, 256)
LEAST, MOST = 3, 200  # repetitions
_INTEGER, _WEIGHTS_ONLY = "MatMulIntegerToFloat", "MatMulNBits"


@dataclass(frozen=True)
class Products:
    """The int8 graph's matrix products: all, those of them with float32 inputs, and the kernels that ran."""

    all: int
    weights_only: int
    kernels: Kernels

    @property
    def are_integer(self) -> bool:
        """Whether every product that should runs in an integer kernel."""
        found = [self.kernels.nodes.get(kind, 0) for kind in (_INTEGER, _WEIGHTS_ONLY)]
        return found == [self.all - self.weights_only, self.weights_only]


@dataclass(frozen=True)
class Measured:
    """Shapes by label, what has no times and why, and what is known of the peers and of the int8 graph."""

    size: str
    threads: int
    batches: dict[str, Batch]
    turns: dict[str, Turns]
    not_measured: dict[str, str]
    peer_facts: dict[str, Any]
    products: Products

    @property
    def names(self) -> list[str]:
        """All contestants in the order of the report."""
        return [OURS, FP32, *(NAMES[kind] for kind in FORMS), TORCH, TORCH_BF16, *(p.name for p in PEERS)]

    def fastest_peer(self, label: str) -> str:
        """Return which other tool is fastest on a shape; other forms of our own graph are none."""
        peers = [TORCH, TORCH_BF16, *(p.name for p in PEERS)]
        turns = self.turns[label]
        return min((n for n in peers if n in turns.times_ms), key=turns.median_ms)


def measure(size: str, work: Path, seconds: float, calibration: int, bundle: Path | None = None) -> Result:
    """Measure the mini checkpoint or a synthetic one of `size`; `seconds` bounds the timed part of all shapes.

    `calibration` counts the short texts that INT8 is made on. A `bundle` with fp32 and int8 is taken as it is instead,
    with the checkpoint it was made of. Raises InputError for an unknown size, and what opening a bundle raises.
    """
    threads = usable_cores()
    opened = open_bundle(bundle) if bundle else _made(size, work, calibration)
    checkpoint = Checkpoint.open(locate(opened.manifest.source.id))
    if bundle:
        size = next((name for name, config in SIZES.items() if config == checkpoint.config), bundle.name)
    batches = make_batches(checkpoint.config.vocab_size, opened.manifest.contract.pad_id)
    products = _products(opened, checkpoint, next(iter(batches.values())), threads, work)
    forms = _forms(opened, work)
    turns: dict[str, Turns] = {}
    with contextlib.ExitStack() as stack:
        # While it loads, a peer takes several times its model's memory: so the peers come first.
        peers, not_measured = _peers(checkpoint.folder, threads, work, stack)
        contestants = [*_in_process(opened, checkpoint.folder, forms, threads, stack), *peers]
        for label, batch in batches.items():
            turns[label] = take_turns(contestants, batch, TORCH, seconds / len(batches), LEAST, MOST)
            times = ", ".join(f"{name} {turns[label].median_ms(name):.1f} ms" for name in turns[label].times_ms)
            say(f"{label}: {times}")
            # Who failed once stays away: its worker may be gone.
            contestants = [c for c in contestants if c.name not in turns[label].failed]
            not_measured |= turns[label].failed
    facts = {peer.name: peer.facts for peer in peers}
    found = Measured(size, threads, batches, turns, not_measured, facts, products)
    given = f"--size {size} --calibration-texts {calibration}" if bundle is None else "--bundle BUNDLE"
    return report(found, f"python -m bench int8-speed {given} --seconds {seconds:g}")


def make_batches(vocab_size: int, pad_id: int) -> dict[str, Batch]:
    """Return the batches by label: random ids, the same in every run."""
    rng = np.random.default_rng(0)
    batches = {}
    for label, shape in SHAPES.items():
        batches[label] = make_batch(rng.integers(0, vocab_size, shape).tolist(), pad_id)
    lengths = rng.integers(MIXED_TOKENS[0], MIXED_TOKENS[1] + 1, MIXED_ROWS)
    batches[MIXED] = make_batch([rng.integers(0, vocab_size, n).tolist() for n in lengths], pad_id)
    return batches


def _made(size: str, work: Path, calibration: int) -> Bundle:
    if size not in (MINI, *SIZES):
        raise InputError(f"there is no size {size!r}.", cure=f"Choose one of {MINI}, {', '.join(SIZES)}.")
    folder = default_tokenizer()
    if size != MINI:
        folder = work / f"checkpoint-{size}"
        say(f"{size}: synthesizing")
        write_checkpoint(size, folder)
    checkpoint = Checkpoint.open(locate(str(folder)))
    say(f"{size}: exporting")
    with private_cache(work):
        precisions = [Precision.FP32, Precision.INT8]
        return export_bundle(checkpoint, work / "bundle", precisions, calibration=short_texts(calibration))


def _products(bundle: Bundle, checkpoint: Checkpoint, batch: Batch, threads: int, work: Path) -> Products:
    record = bundle.graph("int8").quantization
    excluded = {line.tensor for line in record.excluded} if record else set()
    every = groups(checkpoint.config)
    say(f"{OURS}: profiling")
    kernels = profile(bundle.path(bundle.engine("onnxruntime:int8").file), batch, threads, work)
    weights_only = sum(len(group.matrices) for group in every if group.input in excluded)
    return Products(sum(len(group.matrices) for group in every), weights_only, kernels)


def _peers(
    checkpoint: Path, threads: int, work: Path, stack: contextlib.ExitStack
) -> tuple[list[Peer], dict[str, str]]:
    started, not_measured = [], {}
    for kind in PEERS:
        say(f"{kind.name}: starting")
        peer = start_peer(kind, checkpoint, threads, work)
        if isinstance(peer, Peer):
            stack.callback(peer.close)
            started.append(peer)
        else:
            say(f"{kind.name}: not measured: {peer}")
            not_measured[kind.name] = peer
    return started, not_measured


def _forms(bundle: Bundle, work: Path) -> dict[str, Path]:
    fp32 = bundle.path(bundle.graph("fp32").model.file)
    paths = {}
    for kind in FORMS:
        say(f"{NAMES[kind]}: quantizing")
        paths[NAMES[kind]] = make_form(kind, fp32, work / kind)
    return paths


def _in_process(
    bundle: Bundle, checkpoint: Path, forms: dict[str, Path], threads: int, stack: contextlib.ExitStack
) -> Iterator[Contestant]:
    settings = EngineSettings(threads=threads)
    for name, precision in ((OURS, "int8"), (FP32, "fp32")):
        engine = open_raw_engine(bundle, bundle.engine(f"onnxruntime:{precision}"), settings)
        stack.callback(engine.close)
        yield InProcess(name, engine.run)
    for name, path in forms.items():
        form = OnnxRuntimeEngine(path, name=name, precision="int8", fingerprint="", settings=settings)
        stack.callback(form.close)
        yield InProcess(name, form.run)
    for name, dtype in ((TORCH, "float32"), (TORCH_BF16, "bfloat16")):
        yield InProcess(name, stock_transformers(checkpoint, dtype, threads))


def report(found: Measured, command: str) -> Result:
    """Return the table, the ratios and all numbers."""
    products, shares = found.products, found.products.kernels.shares
    ran = products.kernels.nodes
    first = next(iter(found.turns))
    spent = ", ".join(f"{kind} {part:.0%}" for kind, part in list(shares.items())[:6])
    return Result(
        name="int8-speed",
        title=f"INT8 latency, {found.size} on {found.threads} CPU threads",
        command=command,
        columns=[
            *("rows x tokens", "engine", "median ms", "min ms", "tokens/s", "times f2rt fp32"),
            *("f2rt int8 is x faster", "by minima", "min cosine to fp32", "repetitions"),
        ],
        rows=[_row(found, label, name) for label in found.turns for name in found.names],
        notes=[
            *(_summary(found, label) for label in found.turns),
            "the same random token ids and threads for all, turns taken in every repetition; 32 mixed: one batch of "
            f"{MIXED_ROWS} texts of {MIXED_TOKENS[0]} to {MIXED_TOKENS[1]} tokens, padded; tokens/s without pads",
            *(f"{NAMES[kind]}: {WHAT[kind]}, of f2rt's fp32 graph" for kind in FORMS),
            "transformers: AutoModel, sdpa; OpenVINO: optimum-intel's OVModelForFeatureExtraction; all with last-token "
            "pooling and normalization",
            *(f"{name}: {_said(facts)}" for name, facts in found.peer_facts.items()),
            *(f"{name}: not measured: {reason}" for name, reason in found.not_measured.items()),
            "where other work ran meanwhile, trust the ratio of minima",
            f"of {products.all} matrix products {ran.get(_INTEGER, 0)} ran as {_INTEGER} and "
            f"{ran.get(_WEIGHTS_ONLY, 0)} as {_WEIGHTS_ONLY}, as planned: {'yes' if products.are_integer else 'NO'}",
            f"{OURS}'s time at {first}: {spent}",
        ],
        data={
            "size": found.size,
            "threads": found.threads,
            "integer_kernels_used": products.are_integer,
            "kernels": asdict(products.kernels),
            "not_measured": found.not_measured,
            "peers": found.peer_facts,
            "shapes": [_numbers(found, label) for label in found.turns],
        },
    )


def _row(found: Measured, label: str, name: str) -> list[str]:
    turns = found.turns[label]
    if name not in turns.times_ms:
        return [label, name, "not measured", *[""] * 7]
    times = turns.times_ms[name]
    tokens = int(found.batches[label].lengths.sum())
    return [
        label,
        name,
        f"{turns.median_ms(name):.1f}",
        f"{min(times):.1f}",
        f"{tokens / turns.median_ms(name) * 1e3:.0f}",
        "" if name == FP32 else f"{turns.speedup(name, FP32):.2f}",
        "" if name == OURS else f"{turns.speedup(OURS, name):.2f}",
        "" if name == OURS else f"{turns.speedup_of_minima(OURS, name):.2f}",
        f"{turns.min_cosine[name]:.5f}",
        str(len(times)),
    ]


def _summary(found: Measured, label: str) -> str:
    turns, peer = found.turns[label], found.fastest_peer(label)
    return (
        f"{label}: {OURS} is {turns.speedup(OURS, FP32):.2f} times as fast as {FP32} and "
        f"{turns.speedup(OURS, peer):.2f} times as fast as the fastest peer, {peer} (cosine "
        f"{turns.min_cosine[OURS]:.5f} against {turns.min_cosine[peer]:.5f})"
    )


def _said(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{versions}, computes in {facts['computes_in']}"


def _numbers(found: Measured, label: str) -> dict[str, Any]:
    turns, batch, peer = found.turns[label], found.batches[label], found.fastest_peer(label)
    names = list(turns.times_ms)
    return {
        "label": label,
        "rows": len(batch.lengths),
        "width": int(batch.input_ids.shape[1]),
        "tokens": int(batch.lengths.sum()),
        "fastest_peer": peer,
        "int8_over_fp32": turns.speedup(OURS, FP32),
        "int8_over_fp32_by_minima": turns.speedup_of_minima(OURS, FP32),
        "int8_over_fastest_peer": turns.speedup(OURS, peer),
        "int8_over_fastest_peer_by_minima": turns.speedup_of_minima(OURS, peer),
        "median_ms": {name: turns.median_ms(name) for name in names},
        "min_ms": {name: min(turns.times_ms[name]) for name in names},
        "int8_over": {name: turns.speedup(OURS, name) for name in names},
        "min_cosine": turns.min_cosine,
        "times_ms": {name: [round(t, 3) for t in turns.times_ms[name]] for name in names},
    }
