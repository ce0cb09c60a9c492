"""The report in all its forms, written side by side."""

from __future__ import annotations

from pathlib import Path

from export.report.data import DERIVED, ParityReport, to_json
from runtime.bundle import REPORT
from runtime.files import write_atomic

DERIVED_FILES = [str(Path(REPORT).with_name(name)) for name in DERIVED]


def write_derived(report: ParityReport, folder: Path) -> None:
    """Write report.html, report.md and junit.xml into `folder`. Raises OutputError."""
    # Here, since drawing loads a large library, which a comparison with nothing new to say does not need.
    from export.report.ci import to_junit
    from export.report.html import to_html
    from export.report.markdown import to_markdown

    forms = (to_html(report).encode(), to_markdown(report).encode(), to_junit(report))
    for name, data in zip(DERIVED, forms, strict=True):
        write_atomic(folder / name, data)


def write_all(report: ParityReport, folder: Path) -> None:
    """Write report.json and the forms made from it into `folder`. Raises OutputError."""
    write_atomic(folder / Path(REPORT).name, to_json(report))
    write_derived(report, folder)
