"""`f2rt parity`: the comparison on the command line, and what CI systems read of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.lock import WAIT_S, Wait
from export.options import WaitOption, export_extra
from runtime import console
from runtime.errors import InputError, OutputError

if TYPE_CHECKING:
    from calibration.texts import Text
    from export.report.data import ParityReport

QUICK_TEXTS = 96
_QUICK_CHARS = 600
_ANSWER = {"pass": 0, "fail": 1, "not_executed": 2}


def parity_command(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's folder.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine; may be repeated.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Your own texts, compared besides the shipped ones.")] = None,
    policy: Annotated[Path | None, typer.Option(help="A TOML file with other limits than the shipped ones.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the checkpoint lies, if it was moved.")] = None,
    report_dir: Annotated[
        Path | None, typer.Option(help="Also write report.json, .html, .md and junit.xml here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare again what has a verdict that still stands.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Compare on {QUICK_TEXTS} short texts; records no verdict.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Compare on the text with this id alone; may be repeated; no verdict.")
    ] = None,
    print_policy: Annotated[bool, typer.Option("--print-policy", help="Print the policy's limits as TOML.")] = False,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print report.json's JSON schema.")] = False,
    wait: WaitOption = WAIT_S,
) -> None:
    """Compare every engine of a bundle with PyTorch. Exit status: 0 pass, 1 below a limit, 2 could not check.

    Writes report.json, report.html, report.md and junit.xml into BUNDLE/parity, and the verdicts into the manifest. The
    verdict of an engine stands while engine, texts, policy and versions are the same.
    """
    with console.readable_errors(), export_extra():
        from runtime.policy import read_policy, to_toml

        limits = read_policy(policy)
        if print_policy:
            sys.stdout.write(to_toml(limits))
            return
        if print_schema:
            from export.report.data import schema

            sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
            return
        if bundle is None:
            raise InputError("there is no bundle to compare.", cure="Name its folder: f2rt parity BUNDLE")
        from calibration.texts import verification_texts
        from export.own_texts import read_own_texts, require_prompts
        from export.prove import look_again, prove_bundle
        from export.report.files import DERIVED_FILES, write_derived
        from runtime.bundle import read_manifest

        shipped = verification_texts()
        own: list[Text] = []
        if texts is not None:
            own = read_own_texts(texts, shipped)
            require_prompts(texts, own, read_manifest(bundle).contract.prompts)
        screen = console.out()
        lines: list[str] = []

        def tell(line: str) -> None:
            screen.print(line, markup=False, soft_wrap=True)

        recorded = not quick and not only
        with console.bars() as bars:
            if recorded:
                report = prove_bundle(
                    bundle,
                    [*shipped, *own],
                    engine_names=engine or None,
                    model=model,
                    report_dir=report_dir,
                    force=force,
                    progress=bars.update,
                    tell=tell,
                    wait=Wait(wait, bars.say),
                    policy=limits,
                )
            else:
                report = look_again(
                    bundle,
                    _named([*shipped, *own], only) if only else [*_quick(shipped), *own],
                    engine_names=engine or None,
                    model=model,
                    report_dir=report_dir,
                    progress=bars.update,
                    policy=limits,
                )
        if recorded and any(not (bundle / file).is_file() for file in DERIVED_FILES):
            try:
                write_derived(report, bundle / "parity")
            except OutputError as error:
                if not all(e.kept for e in report.engines):
                    raise
                # Nothing new was found: a bundle on a disk that takes no writes is as good as before.
                lines.append(f"report.html, report.md and junit.xml were not written: {error.message}")
        _print(bundle, report, lines, recorded=recorded, report_dir=report_dir)
    raise typer.Exit(_ANSWER[report.verdict])


def _named(samples: list[Text], ids: list[str]) -> list[Text]:
    """Return the texts with these ids. Raises InputError for an id that none has."""
    by_id = {text.id: text for text in samples}
    unknown = [name for name in ids if name not in by_id]
    if unknown:
        raise InputError(
            f"no text has the id {unknown[0]!r}.",
            cure="Take the id from a report; for a text of your own give its file with --texts too.",
        )
    return [by_id[name] for name in ids]


def _quick(samples: list[Text]) -> list[Text]:
    """Return some short texts, spread evenly over the set and so over its kinds and languages."""
    short = [text for text in samples if len(text.text) <= _QUICK_CHARS]
    return short[:: max(len(short) // QUICK_TEXTS, 1)][:QUICK_TEXTS]


def _print(bundle: Path, report: ParityReport, lines: list[str], *, recorded: bool, report_dir: Path | None) -> None:
    from export.report.ci import github_annotations
    from export.report.markdown import to_markdown
    from export.report.terminal import print_report

    screen = console.out()
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)
    print_report(report, screen)
    folder = report_dir if report_dir is not None else bundle / "parity" if recorded else None
    if folder is not None:
        screen.print(f"report: {folder / 'report.html'} (and report.md, report.json, junit.xml)", soft_wrap=True)
    if not recorded:
        screen.print("nothing was recorded: a verdict takes all texts")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(report):
            typer.echo(line)
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(to_markdown(report))
