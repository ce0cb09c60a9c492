"""What all measurements share: percentiles, facts about the machine, and a result's four forms.

A result is printed as a table for people and a last line of JSON for machines, and written as NAME.json and NAME.md.
None of them holds a host name or a path of the machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

import runtime
from runtime import console
from runtime.cores import physical_cores
from runtime.cpu import cpu_facts
from runtime.packages import installed_version

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Machine:
    """Where it was measured. `load` is the load average of the last 15 minutes, this measurement included."""

    cpu: str
    cores: int
    ram_gib: float
    system: str
    load: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Result:
    """One measurement: `rows` of texts under `columns` for people, `data` with every number for machines."""

    name: str
    title: str
    command: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    data: dict[str, object]


def machine(packages: Sequence[str]) -> Machine:
    """Return the facts of this machine and the versions of `packages`."""
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {"f2rt": runtime.__version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) for name in packages}
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    return Machine(
        _cpu(), physical_cores(), round(ram_bytes / 2**30, 1), system, round(os.getloadavg()[2], 1), versions
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value at `percent` (0 to 100), interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return statistics.median(values)


def publish(result: Result, facts: Machine, folder: Path) -> None:
    """Print the table and the line of JSON; write both files."""
    table = Table(*result.columns, title=result.title, title_justify="left", show_edge=False, pad_edge=False)
    for row in result.rows:
        table.add_row(*row)
    screen = console.out()
    screen.print(table)
    for note in result.notes:
        screen.print(f"- {note}", markup=False)
    whole = {"name": result.name, "command": result.command, "machine": asdict(facts), **result.data}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    (folder / f"{result.name}.md").write_text(_markdown(result, facts), encoding="utf-8")
    print(json.dumps(whole), flush=True)


def _markdown(result: Result, facts: Machine) -> str:
    lines = [f"# {result.title}", "", "```", result.command, "```", ""]
    lines += [_row(result.columns), _row(["---"] * len(result.columns)), *map(_row, result.rows), ""]
    lines += [f"- {note}" for note in result.notes]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    where = f"{facts.cpu}, {facts.cores} cores, {facts.ram_gib} GiB RAM, {facts.system}, load average {facts.load}"
    lines += ["", f"{where}; {versions}.", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_EXTENSIONS = ("avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


def _cpu() -> str:
    """Return the CPU's name, with family and model numbers where a virtual machine hides the name's end.

    And with what it has of the extensions that decide how fast INT8 and bf16 are.
    """
    facts = cpu_facts()
    if not facts:
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    extensions = [e for e in facts.get("flags", "").split() if e in _EXTENSIONS]
    has = ", ".join(extensions) or "none of AVX-512, VNNI, bf16, AMX"
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}; {has})"
