"""Adds compiled engines to a bundle, and keeps those whose inputs have not changed.

A plan is written under a name of its own, with its hash in it, and the manifest last: until then the bundle is as it
was, the old engine included. Plans that no manifest names are removed by the next build.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import runtime
from export.builder import (
    BUILD_RULES,
    ONNXRUNTIME_CUDA,
    PRECISIONS,
    RULES_NAME,
    Target,
    build_engine,
    check_backend,
    library_version,
    resolve_target,
)
from export.builder_callbacks import Progress
from export.cache import cached_sha256
from export.changes import UNCHANGED, damage
from export.lock import Wait, bundle_lock
from export.profiles import Profile
from runtime.bundle import (
    Bundle,
    EngineRecord,
    GraphRecord,
    engine_fingerprint,
    open_bundle,
    timestamp,
    write_manifest,
)
from runtime.errors import BundleError, EngineError, InputError, explain_memory_errors

_MOST_VALUES = 2**31 - 1  # of one tensor

_OWN_GRAPH = "f2rt's own is made for its builders: export again without --from-onnx, with --precision fp16."


@dataclass(frozen=True)
class Outcome:
    """What became of one engine: its record, and why it was built or kept."""

    record: EngineRecord
    built: bool
    reason: str


def add_engine(
    folder: Path,
    backend: str,
    precision: str,
    profiles: Sequence[Profile],
    *,
    target: str | None = None,
    progress: Progress = lambda label, done, total: None,
    wait: Wait = Wait(),
) -> Outcome:
    """Build the engine of one backend, precision and target, unless the bundle has it from the same inputs.

    Without a target it is for the GPU of this machine. Raises InputError, NotFoundError for a graph the bundle lacks,
    BundleError for one that was changed, MissingExtraError, EngineError or OutputError; the bundle is then unchanged.
    """
    open_bundle(folder)  # where there is no bundle there is nothing to lock
    cure = "Free memory, or build with fewer or smaller profiles."
    with bundle_lock(folder, "f2rt build", wait), explain_memory_errors(f"build an engine of {folder}", cure):
        bundle = open_bundle(folder)
        if backend == ONNXRUNTIME_CUDA:
            return _add_onnxruntime_cuda(bundle, precision, target)
        return _add_engine(bundle, backend, precision, profiles, target, progress)


def _add_engine(
    bundle: Bundle,
    backend: str,
    precision: str,
    profiles: Sequence[Profile],
    target: str | None,
    progress: Progress,
) -> Outcome:
    graph = _graph_for(bundle, backend, precision)
    _check_profiles(bundle, profiles)
    version = library_version(backend)
    place = resolve_target(backend, target)
    old = _find(bundle, f"{backend}:{precision}", place.name)
    reason = _stale(bundle, old, graph, backend, version, profiles, place)
    if old is not None and reason is None:
        _remove_strays(bundle, bundle.path(old.file).parent)
        return Outcome(old, False, UNCHANGED)
    problem = damage(bundle, graph.compiled_files)
    if problem:
        raise BundleError(f"{bundle.folder}: {problem} after the export.", cure="Export the checkpoint again.")
    try:
        record = _build(bundle, graph, backend, profiles, place, progress)
    except EngineError as error:
        if graph.origin is None:
            raise
        raise EngineError(
            f"{error.message} This graph was given with --from-onnx; it is {graph.origin.producer}'s.", cure=_OWN_GRAPH
        ) from error
    _put(bundle, record)
    return Outcome(record, True, reason or "the bundle had none")


def check_request(
    folder: Path,
    backend: str,
    precisions: Sequence[str],
    profiles: Sequence[Profile],
    targets: Sequence[str | None],
    wait: Wait = Wait(),
) -> None:
    """Refuse what cannot be built before anything is. Raises as `add_engine`."""
    open_bundle(folder)
    with bundle_lock(folder, "f2rt build", wait):  # an export under way may bring what is asked for
        bundle = open_bundle(folder)
    for precision in precisions:
        _graph_for(bundle, backend, precision)
    if backend != ONNXRUNTIME_CUDA:
        _check_profiles(bundle, profiles)
        for target in targets:
            resolve_target(backend, target)


def _graph_for(bundle: Bundle, backend: str, precision: str) -> GraphRecord:
    """Return the graph that an engine is made of. Raises InputError or NotFoundError when there is none."""
    if backend != ONNXRUNTIME_CUDA:
        _refuse_foreign(bundle, backend, precision)
        check_backend(backend, precision)
    return bundle.graph(precision)


def _refuse_foreign(bundle: Bundle, backend: str, precision: str) -> None:
    """Refuse a foreign graph in a precision no builder takes. Raises InputError that says where it came from."""
    given = next((g for g in bundle.manifest.graphs if g.origin is not None and g.precision == precision), None)
    if given is not None and given.origin is not None and precision not in PRECISIONS:
        raise InputError(
            f"{backend} engines are built in {', '.join(PRECISIONS)}; this bundle's only graph is {precision} and is "
            f"{given.origin.producer}'s, given with --from-onnx.",
            cure=_OWN_GRAPH,
        )


def _build(
    bundle: Bundle, graph: GraphRecord, backend: str, profiles: Sequence[Profile], target: Target, progress: Progress
) -> EngineRecord:
    precision = graph.precision
    folder = bundle.path(f"engines/{backend}")
    _remove_strays(bundle, folder)
    unnamed = folder / f"{precision}-{target.name}.engine"
    built = build_engine(
        bundle.path(graph.model.file),
        unnamed,
        backend,
        precision,
        profiles,
        target,
        cache_key=[graph.key, graph.calibration_sha256 or ""],
        progress=progress,
    )
    file = f"engines/{backend}/{precision}-{target.name}-{built.sha256[:12]}.engine"
    unnamed.replace(bundle.path(file))
    return EngineRecord(
        name=f"{backend}:{precision}",
        backend=backend,
        precision=precision,
        file=file,
        sha256=built.sha256,
        fingerprint=engine_fingerprint(bundle.manifest.fingerprint, graph, backend, built.sha256),
        builder={"f2rt": runtime.__version__, **built.builder},
        flags=[*built.flags, *_work(graph)],
        profiles=[str(p) for p in profiles],
        target=target.name,
        calibration_sha256=graph.calibration_sha256,
        graph_sha256=graph.key,
        made_at=timestamp(),
    )


def _work(graph: GraphRecord) -> list[str]:
    """Say what the INT8 budget counts, beside the builder's count of weights, which can be far from it."""
    if graph.quantization is None:
        return []
    share, budget = graph.quantization.int8_share, graph.quantization.budget
    return [
        f"{share:.1%} of the matrix work in int8, of which the budget asks {budget:.0%}; it is not the share of "
        "weights, since most of the last layer's products are computed for one token of a text"
    ]


def _add_onnxruntime_cuda(bundle: Bundle, precision: str, target: str | None) -> Outcome:
    """Record the engine that is the graph itself, on any NVIDIA GPU: nothing is compiled, nothing is shown to run."""
    if target is not None:
        raise InputError(
            f"{ONNXRUNTIME_CUDA} compiles nothing and takes no target; {target!r} was given.",
            cure="Leave --target out.",
        )
    graph = _graph_for(bundle, ONNXRUNTIME_CUDA, precision)
    record = EngineRecord(
        name=f"{ONNXRUNTIME_CUDA}:{precision}",
        backend=ONNXRUNTIME_CUDA,
        precision=precision,
        file=graph.model.file,
        sha256=graph.model.sha256,
        fingerprint=engine_fingerprint(bundle.manifest.fingerprint, graph, ONNXRUNTIME_CUDA, graph.model.sha256),
        builder={"f2rt": runtime.__version__},
        flags=[f"opset {graph.opset}"],
        calibration_sha256=graph.calibration_sha256,
        graph_sha256=graph.key,
        made_at=timestamp(),
    )
    old = _find(bundle, record.name, None)
    if old is not None and old.fingerprint == record.fingerprint:
        return Outcome(old, False, "nothing it depends on has changed")
    _put(bundle, record)
    return Outcome(record, True, "the bundle had none" if old is None else "the graph changed")


def _put(bundle: Bundle, record: EngineRecord) -> None:
    """Write the manifest with the record in the place of its predecessor, then remove what only that one used."""
    others = [e for e in bundle.manifest.engines if (e.name, e.target) != (record.name, record.target)]
    manifest = replace(bundle.manifest, engines=[*others, record])
    write_manifest(bundle.folder, manifest)
    if record.backend != ONNXRUNTIME_CUDA:
        _remove_strays(replace(bundle, manifest=manifest), bundle.path(record.file).parent)


def _remove_strays(bundle: Bundle, folder: Path) -> None:
    """Remove plans that no engine names: replaced ones, and those of a build that died before the manifest."""
    named = {bundle.path(engine.file) for engine in bundle.manifest.engines}
    # Whoever adds an engine has the bundle to itself, so a part that is there belongs to a build that is dead.
    for plan in [*folder.glob("*.engine"), *folder.glob(".*.part")]:
        if plan not in named:
            plan.unlink(missing_ok=True)


def _check_profiles(bundle: Bundle, profiles: Sequence[Profile]) -> None:
    limit = bundle.manifest.contract.max_tokens
    for profile in profiles:
        if profile.tokens > limit or profile.rows < 1 or profile.tokens < 1:
            raise InputError(
                f"the profile {profile} is outside of what the graph takes: 1 to {limit} tokens, at least 1 row.",
                cure="Change it.",
            )
        values = profile.rows * profile.tokens * bundle.manifest.contract.dim
        if values > _MOST_VALUES:
            raise InputError(
                f"the profile {profile} makes tensors of {values} values and more; a compiler takes {_MOST_VALUES}.",
                cure="Give it fewer rows or tokens.",
            )


def _find(bundle: Bundle, name: str, target: str | None) -> EngineRecord | None:
    return next((e for e in bundle.manifest.engines if (e.name, e.target) == (name, target)), None)


def _stale(
    bundle: Bundle,
    old: EngineRecord | None,
    graph: GraphRecord,
    backend: str,
    version: str,
    profiles: Sequence[Profile],
    place: Target,
) -> str | None:
    """Return why an engine must be built again, or None.

    A plan for the GPU at hand was chosen by what that GPU and its driver did, so their versions count as well.
    """
    if old is None:
        return "the bundle had none"
    if old.graph_sha256 != graph.key:
        return "the graph changed"
    if old.builder.get(backend) != version:
        return f"{backend} is {version} now, it was {old.builder.get(backend)}"
    rules = old.builder.get(RULES_NAME, "rules not recorded")
    if rules != str(BUILD_RULES):
        return f"this f2rt builds by other rules ({BUILD_RULES}) than the one that made it ({rules})"
    for name, now in place.facts.items():
        if old.builder.get(name) != now:
            return f"the {name} is {now} now, it was {old.builder.get(name, 'not recorded')}"
    if old.profiles != [str(p) for p in profiles]:
        return "the profiles changed"
    path = bundle.path(old.file)
    if not path.is_file() or cached_sha256(path) != old.sha256:
        return "its file is missing or was changed"
    return None
