"""Two bundles, two engines of one, or a bundle and a server, compared: what was changed and how vectors moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from calibration.texts import Text, texts_sha256
from export.diff import Change, compare_engines, compare_manifests
from export.diff_report import DIFF_SCHEMA_VERSION, DiffReport, Side, TextsUsed
from export.embedded import Embedded, embed_here
from export.moves import judge, less_precise, measure
from runtime.bundle import Bundle, EngineRecord
from runtime.embedder import open_embedder
from runtime.errors import InputError
from runtime.loader import select
from runtime.policy import Policy

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Chosen:
    """The texts of a comparison, no two the same, and how they came about: see `TextsUsed`."""

    texts: list[Text]
    used: TextsUsed


def choose(texts: Sequence[Text], source: str, limit: int | None = None) -> Chosen:
    """Count each text with its prompt once, and take `limit` of them evenly from the whole.

    Raises InputError for no texts, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; it must be at least 1.", cure="Leave it out to take all texts.")
    distinct = list({(t.prompt, t.text): t for t in reversed(texts)}.values())[::-1]
    if not distinct:
        raise InputError(f"{source} has no text to compare on.", cure="Give a file with at least one text.")
    taken = distinct
    if limit is not None and limit < len(distinct):
        taken = [distinct[i * len(distinct) // limit] for i in range(limit)]
    used = TextsUsed(
        source=source,
        texts=len(taken),
        of=len(distinct),
        duplicates=len(texts) - len(distinct),
        sha256=texts_sha256(taken),
    )
    return Chosen(taken, used)


def compare_bundles(
    a: Bundle,
    b: Bundle,
    chosen: Chosen,
    *,
    engine_a: str = "auto",
    engine_b: str = "auto",
    policy: Policy = Policy(),
    progress: Progress = lambda label, done, total: None,
) -> DiffReport:
    """Compare two bundles, or two engines of one: manifests, then the vectors of `chosen`.

    Raises what `load_engine` raises for an engine that may not answer or cannot run here.
    """
    # Both are chosen before the first one works: a refusal must not come after minutes.
    record_a, why_a = select(a, engine_a)
    record_b, why_b = select(b, engine_b)
    less_precise([record_a.precision, record_b.precision], policy)
    record_a, embedded_a = embed_with(a, record_a, chosen.texts, "A", progress)
    record_b, embedded_b = embed_with(b, record_b, chosen.texts, "B", progress)
    changes = compare_manifests(a.manifest, b.manifest)
    if record_a.full_name != record_b.full_name:
        graphs = a.graph(record_a.precision), b.graph(record_b.precision)
        changes += compare_engines(record_a, graphs[0], record_b, graphs[1])
    side_a, side_b = side(a, record_a, why_a), side(b, record_b, why_b)
    notes = notes_on(changes, chosen.texts, embedded_a, embedded_b)
    if record_a.fingerprint == record_b.fingerprint:
        notes.append("A and B are the same engine, by its fingerprint")
    return finish(side_a, side_b, chosen, changes, notes, embedded_a, embedded_b, policy)


def embed_with(
    bundle: Bundle, record: EngineRecord, texts: Sequence[Text], label: str, progress: Progress
) -> tuple[EngineRecord, Embedded]:
    """Open and prove an engine, embed the texts, and close it. Raises what opening and embedding raise."""
    name = f"{label}: {record.full_name}"
    progress(name, 0, len(texts))
    embedder = open_embedder(bundle, record.full_name)
    try:
        return embedder.loaded.record, embed_here(embedder, texts, lambda done, total: progress(name, done, total))
    finally:
        embedder.close()


def side(bundle: Bundle, record: EngineRecord, selection: str) -> Side:
    """Describe an engine of a bundle as one side of the comparison."""
    manifest = bundle.manifest
    return Side(
        bundle=str(bundle.folder),
        server="",
        source=manifest.source.id,
        revision=manifest.source.revision or "",
        bundle_fingerprint=manifest.fingerprint,
        engine=record.full_name,
        engine_fingerprint=record.fingerprint,
        precision=record.precision,
        selection=selection,
    )


def finish(
    a: Side,
    b: Side,
    chosen: Chosen,
    changes: list[Change],
    notes: list[str],
    embedded_a: Embedded,
    embedded_b: Embedded,
    policy: Policy,
) -> DiffReport:
    """Measure and judge the move, and put the report together."""
    tokens = list(map(max, embedded_a.tokens, embedded_b.tokens))
    moves = measure(chosen.texts, tokens, embedded_a.vectors, embedded_b.vectors)
    judgement = judge(moves, less_precise([a.precision, b.precision], policy), policy)
    return DiffReport(
        schema_version=DIFF_SCHEMA_VERSION,
        verdict=judgement.line,
        moved=judgement.answer == "re-embed",
        a=a,
        b=b,
        changes=changes,
        texts=chosen.used,
        moves=moves,
        judgement=judgement,
        audit=None,
        notes=notes,
    )


def notes_on(changes: Iterable[Change], texts: Sequence[Text], a: Embedded, b: Embedded) -> list[str]:
    """Return what the numbers do not say: prompts that are missing, and changes that no text of these could show."""
    notes = [
        f"{name} has no prompt {prompt!r}: {count} texts were embedded without one there"
        for name, side in (("A", a), ("B", b))
        for prompt, count in sorted(side.without_prompt.items())
    ]
    named = {f"prompt {text.prompt}" for text in texts}
    longest = max(map(max, zip(a.tokens, b.tokens, strict=True)), default=0)
    for change in changes:
        if change.section != "contract":
            continue
        if change.what.startswith("prompt ") and change.what not in named:
            notes.append(f"{change.what} differs and no text names it: what it moves was not measured")
        if change.what == "default_prompt_name" and all(text.prompt for text in texts):
            notes.append("the default prompt differs and every text names one: what it moves was not measured")
        if change.what == "max_tokens" and longest < min(int(change.a), int(change.b)):
            notes.append(f"max_tokens differs and no text is that long ({longest} tokens at most): it moved nothing")
    return notes
