"""One step of `bench.scale`, in a process of its own: python -m bench.scale_step KIND FOLDER ARGUMENT...

FOLDER is shared by all steps. Prints lines of JSON: what it is doing, how far it came, and last the bytes of what it
made, or the error.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.inputs import spread
from calibration.texts import Text, calibration_texts
from runtime.errors import F2rtError

CHECKPOINT, BUNDLE = "checkpoint", "bundle"
_EVERY_S = 0.5

SYNTH, PROBE, EXPORT, BUILD = "synth", "probe", "export", "build"


class Told:
    """Passes progress on as lines of JSON: the first and last of every label, and some between."""

    def __init__(self) -> None:
        self._label = ""
        self._at = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        """Say that `done` of `total` are done of what is called `label`."""
        now = time.monotonic()
        if label == self._label and done < total and now - self._at < _EVERY_S:
            return
        self._label, self._at = label, now
        print(json.dumps({"label": label, "done": done, "total": total}), flush=True)


def chosen_texts(calibration: str) -> list[Text]:
    """Return the calibration texts: a count of them at even distances, or "all"."""
    return spread(calibration_texts(), None if calibration == "all" else int(calibration))


def synth(place: Path, size: str, told: Told) -> int:
    """Write a checkpoint of `size`; return its weights' bytes."""
    from export.synth import write_checkpoint

    write_checkpoint(size, place / CHECKPOINT, progress=told)
    return sum(f.stat().st_size for f in (place / CHECKPOINT).glob("*.safetensors"))


def probe(place: Path, calibration: str, told: Told) -> int:
    """Probe the fp32 graph; the result stays in the cache, where the exports find it. Return its bytes there."""
    from export.checkpoint import Checkpoint
    from export.graphs import measure
    from export.hub import locate
    from runtime.bundle import open_bundle
    from runtime.files import cache_folder

    bundle = open_bundle(place / BUNDLE)
    checkpoint = Checkpoint.open(locate(str(place / CHECKPOINT)))
    measured = measure(
        checkpoint,
        bundle.folder,
        bundle.graph("fp32"),
        chosen_texts(calibration),
        lambda step, done: told(step.label, done, step.total),
    )
    print(json.dumps({"tokens": sum(map(len, measured.sequences))}), flush=True)
    return sum(f.stat().st_size for f in (cache_folder() / "probe").rglob("*") if f.is_file())


def export(place: Path, calibration: str, precision: str, told: Told) -> int:
    """Put a precision into the bundle beside those that are there; return the bytes of the new graph's weights."""
    from export.checkpoint import Checkpoint
    from export.hub import locate
    from export.pipeline import export_bundle
    from export.precision import Precision
    from runtime.bundle import open_bundle

    folder = place / BUNDLE
    there = [Precision(g.precision) for g in open_bundle(folder).manifest.graphs] if folder.is_dir() else []
    bundle = export_bundle(
        Checkpoint.open(locate(str(place / CHECKPOINT))),
        folder,
        [*there, Precision(precision)],
        lambda step, done: told(step.label, done, step.total),
        calibration=chosen_texts(calibration),
    )
    graph = bundle.graph(precision)
    if graph.quantization is not None:
        print(json.dumps({"int8_share": graph.quantization.int8_share}), flush=True)
    return graph.data.size_bytes


def build(place: Path, precision: str, target: str, profile: str, told: Told) -> int:
    """Compile one engine; return its bytes."""
    from export.build import add_engine
    from export.profiles import parse_profiles
    from runtime.bundle import open_bundle

    bundle = open_bundle(place / BUNDLE)
    profiles = parse_profiles(profile, bundle.manifest.contract.max_tokens)
    done = add_engine(bundle.folder, "tensorrt-rtx", precision, profiles, target=target, progress=told)
    return bundle.path(done.record.file).stat().st_size


def main(kind: str, *arguments: str) -> int:
    """Do one step; return the exit status."""
    told = Told()
    place = Path(arguments[0])
    try:
        if kind == SYNTH:
            made = synth(place, arguments[1], told)
        elif kind == PROBE:
            made = probe(place, arguments[1], told)
        elif kind == EXPORT:
            made = export(place, arguments[1], arguments[2], told)
        else:
            made = build(place, arguments[1], arguments[2], arguments[3], told)
    except F2rtError as error:
        print(json.dumps({"error": error.message}), flush=True)
        return 1
    print(json.dumps({"bytes": made}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
