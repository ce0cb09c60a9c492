"""A deployed engine, looked at from outside: is it the one of this bundle, and are its vectors that engine's?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from export.compare import Chosen, Progress, embed_with, finish, notes_on, side
from export.diff import Change, compare_prompts
from export.diff_report import DIFF_SCHEMA_VERSION, Audit, DiffReport, Side
from export.embedded import Embedded, ask, embed_there
from export.moves import less_precise
from runtime import golden
from runtime.bundle import Bundle, EngineRecord
from runtime.client import EmbeddingClient
from runtime.client_answers import ServerInfo
from runtime.errors import MissingExtraError, NotExecutableError
from runtime.golden import row_cosines
from runtime.loader import select
from runtime.policy import Policy
from runtime.tokenizer import Instruction


def audit_server(
    bundle: Bundle,
    client: EmbeddingClient,
    address: str,
    chosen: Chosen,
    *,
    engine: str | None = None,
    model: str = "",
    policy: Policy = Policy(),
    progress: Progress = lambda label, done, total: None,
) -> DiffReport:
    """Compare a server's model with a bundle: what Info says, the golden texts, and the vectors of `chosen`.

    A is the bundle's engine with the server's fingerprint, or the one asked for; B is the server. Where the server's
    engine is not in the bundle A is the one `auto` takes. Where the engine cannot run on this machine the golden texts
    alone are compared. Raises what the client and `load_engine` raise.
    """
    info = client.info(model)
    own = next((e for e in bundle.manifest.engines if e.fingerprint == info.fingerprint), None)
    less_precise([info.precision], policy)
    expected = golden.load(bundle)
    notes: list[str] = []
    a: tuple[EngineRecord, Embedded] | None = None
    why = "asked for by name" if engine else "it has the server's fingerprint" if own else ""
    try:
        record, selection = select(bundle, engine or (own.full_name if own else "auto"))
        less_precise([record.precision], policy)
        a = embed_with(bundle, record, chosen.texts, "A", progress)
    except (NotExecutableError, MissingExtraError) as error:
        if engine is not None or own is None:
            raise
        record, selection = own, why
        notes.append(f"the texts were not compared, the golden ones alone: {error.message}")
    audit = _golden(client, info, expected, policy, model)
    findings = [*_identity(bundle, info, own), *audit.findings]
    if info.unverified:
        findings.append(f"the server answers with an engine that has no verdict that stands: {info.unverified}")
    changes = list(compare_info(bundle, record, info))
    side_a = side(bundle, record, why or selection)
    side_b = Side(
        bundle="",
        server=address,
        source=info.model,
        revision=info.revision,
        bundle_fingerprint="",
        engine=info.engine,
        engine_fingerprint=info.fingerprint,
        precision=info.precision,
        selection=info.selection,
    )
    audit = replace(
        audit,
        model=info.name,
        state=info.state,
        version=info.version,
        in_bundle=own.full_name if own else None,
        findings=findings,
    )
    if a is None:
        report = DiffReport(
            schema_version=DIFF_SCHEMA_VERSION,
            verdict="the server reproduces PyTorch's golden vectors",
            moved=False,
            a=side_a,
            b=side_b,
            changes=changes,
            texts=chosen.used,
            moves=None,
            judgement=None,
            audit=audit,
            notes=notes,
        )
        return _with_findings(report, audit)
    label = f"B: {address}"
    there = embed_there(client, info, chosen.texts, lambda done, total: progress(label, done, total), model=model)
    notes += notes_on(changes, chosen.texts, a[1], there)
    strangers = [f for f in [*audit.fingerprints, *there.fingerprints] if f != info.fingerprint]
    if strangers:
        findings.append(
            f"the server said that {info.fingerprint} answers, and {strangers[0]} did: it changed its engine "
            "meanwhile, or several servers share this address"
        )
    audit = replace(
        audit, fingerprints=list(dict.fromkeys([*audit.fingerprints, *there.fingerprints])), findings=findings
    )
    report = finish(side_a, side_b, chosen, changes, notes, a[1], there, policy)
    if own is not None and report.moved and engine is None:
        findings.append(f"its vectors are not those of {own.full_name} of the bundle: {report.verdict}")
    return _with_findings(replace(report, audit=audit), audit)


def compare_info(bundle: Bundle, record: EngineRecord, info: ServerInfo) -> Iterator[Change]:
    """Yield where what a server says of itself differs from a bundle and an engine of it."""
    manifest = bundle.manifest
    contract, every = manifest.contract, "every vector"
    rows = [
        ("source", "id", manifest.source.id, info.model, ""),
        ("source", "revision", manifest.source.revision or "none", info.revision or "none", ""),
        ("source", "license", manifest.source.license or "none", info.license or "none", ""),
        ("engine", "fingerprint", record.fingerprint, info.fingerprint, every),
        ("engine", "name", record.name, info.engine, every),
        ("engine", "precision", record.precision, info.precision, every),
        ("contract", "dim", str(contract.dim), str(info.dim), every),
        ("contract", "max_tokens", str(contract.max_tokens), str(info.max_tokens), "texts longer than the smaller one"),
        ("contract", "trained_dims", str(contract.trained_dims), str(info.trained_dims), ""),
        (
            "contract",
            "default_prompt_name",
            contract.default_prompt_name or "none",
            info.default_prompt_name or "none",
            "texts that name no prompt",
        ),
    ]
    yield from (Change(section, what, a, b, reach) for section, what, a, b, reach in rows if a != b)
    yield from compare_prompts(contract.prompts, info.prompts)


def _identity(bundle: Bundle, info: ServerInfo, own: EngineRecord | None) -> list[str]:
    if own is not None:
        return []
    names = ", ".join(f"{e.full_name} {e.fingerprint}" for e in bundle.manifest.engines) or "none"
    return [
        f"the server's engine {info.engine} with the fingerprint {info.fingerprint} is not in {bundle.folder}; "
        f"it has: {names}"
    ]


def _golden(client: EmbeddingClient, info: ServerInfo, expected: golden.Golden, policy: Policy, model: str) -> Audit:
    """Have the server embed the golden texts, whose prompts are in them, and compare with PyTorch's vectors."""
    limits = policy.tolerance(info.precision)
    answer = ask(client, expected.texts, Instruction(prompt=""), model=model)
    audit = Audit(
        golden_texts=len(expected.texts),
        golden_min_cosine=None,
        golden_limit=limits.min_cosine,
        fingerprints=[answer.fingerprint],
        findings=[],
    )
    if answer.vectors.shape != expected.embeddings.shape:
        return replace(
            audit,
            findings=[
                f"the server gives {answer.vectors.shape[1]} dimensions for the golden texts, PyTorch gave "
                f"{expected.embeddings.shape[1]}"
            ],
        )
    cosines = row_cosines(answer.vectors, expected.embeddings)
    worst = int(np.argmin(cosines))
    findings = []
    if not cosines[worst] >= limits.min_cosine:
        findings.append(
            f"the server does not reproduce PyTorch: cosine {cosines[worst]:.6f} on the golden text "
            f"{expected.texts[worst][:40]!r}, the limit for {info.precision} is {limits.min_cosine:g}"
        )
    norm_error = float(np.abs(np.linalg.norm(answer.vectors.astype(np.float64), axis=1) - 1).max())
    if not norm_error <= limits.norm_error:
        findings.append(
            f"the server gives a golden vector whose length is off by {norm_error:.1e}, the limit for "
            f"{info.precision} is {limits.norm_error:g}"
        )
    return replace(audit, golden_min_cosine=float(cosines[worst]), findings=findings)


def _with_findings(report: DiffReport, audit: Audit) -> DiffReport:
    """Let a finding decide: an engine that is not the bundle's may give the same vectors today."""
    if not audit.findings:
        return report
    return replace(report, moved=True, verdict=audit.findings[0])
