"""A page as its readers see it: a real headless Chromium opens it in light and dark, on a desktop and on a phone.

    page = tmp_path / "report.html"
    for view in look(page, tmp_path / "screenshots"):
        assert view.faults == []

Both the browser and what drives it come with `make clients`; a test that needs them is marked `needs_chromium`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ROOT, child_environment

CLIENTS = ROOT / ".venv-clients"
INSTALLED = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
LIMIT_S = 120.0  # a bound, never a wait


def chromium() -> str | None:
    """Return the browser's path: the one that `make clients` brought, or else the machine's."""
    own = CLIENTS / "bin" / "chromium"
    return str(own) if own.exists() else next(filter(None, map(shutil.which, INSTALLED)), None)


def _missing() -> str | None:
    if chromium() is None:
        return "there is no chromium: run make clients, or install it"
    if not list(CLIENTS.glob("lib/python*/site-packages/playwright")):
        return "what drives chromium is not installed: run make clients"
    return None


CHROMIUM_MISSING = _missing()
needs_chromium = pytest.mark.skipif(CHROMIUM_MISSING is not None, reason=CHROMIUM_MISSING or "")


@dataclass(frozen=True)
class Drawing:
    """An SVG that takes up room on the page, and how many visible shapes and texts are in it."""

    width: float
    height: float
    shapes: int
    texts: int


@dataclass(frozen=True)
class PageView:
    """What one reader got. Colours are as CSS computes them, like `rgb(255, 255, 255)`."""

    theme: str
    width: int  # of the screen, in CSS pixels
    address: str
    console: tuple[str, ...]  # "warning: ..." and "error: ..."
    errors: tuple[str, ...]  # exceptions nobody caught
    requests: tuple[str, ...]  # in order, the page itself included
    inner_width: int
    scroll_width: int
    text: str  # what a reader can read and select
    svgs: tuple[Drawing, ...]
    background: str
    colour: str
    screenshot: Path

    @property
    def foreign_requests(self) -> tuple[str, ...]:
        """What the page asked for beside itself and what it carries (data: and blob: addresses)."""
        return tuple(
            url
            for url in self.requests
            if url.partition("#")[0] != self.address and not url.startswith(("data:", "blob:"))
        )

    @property
    def overhang(self) -> int:
        """By how many pixels the page is wider than the screen.

        Not than the window: a phone zooms out until a wide page fits, and its window grows with it.
        """
        return max(0, self.scroll_width - self.width)

    @property
    def faults(self) -> list[str]:
        """All that no page may do, each in words; a sound page has none."""
        faults = [f"on the console: {line}" for line in self.console]
        faults += [f"uncaught: {error}" for error in self.errors]
        faults += [f"asked for {url}" for url in self.foreign_requests]
        if self.overhang:
            faults.append(f"{self.overhang} pixels wider than a screen of {self.width}")
        if not self.text.strip():
            faults.append("no text is visible")
        return faults


def look(html: Path, screenshots: Path) -> list[PageView]:
    """Open a page as each reader and return what they got; their screenshots lie in that folder, THEME-WIDTH.png."""
    assert CHROMIUM_MISSING is None, CHROMIUM_MISSING
    done = subprocess.run(
        [
            str(CLIENTS / "bin" / "python"),
            "tests/clients/look_at_page.py",
            str(chromium()),
            str(html),
            str(screenshots),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=child_environment(),
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return [_view(found) for found in json.loads(done.stdout)]


def _view(found: dict[str, Any]) -> PageView:
    tuples: dict[str, Any] = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    tuples["svgs"] = tuple(Drawing(**svg) for svg in found["svgs"])
    return PageView(**{**found, **tuples, "screenshot": Path(found["screenshot"])})
