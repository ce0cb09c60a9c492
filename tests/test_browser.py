"""The tool that looks at a page (tests/browser.py) sees what is there, and every fault a page can have."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.browser import Drawing, PageView, look, needs_chromium

pytestmark = needs_chromium

VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
VIEWS = [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]
SOUND = """
<style>
  body { background: #fff; color: #111; margin: 1em }
  @media (prefers-color-scheme: dark) { body { background: #102030; color: #eee } }
  svg { max-width: 100% }
</style>
<h1>A report</h1><p id="written"></p><p hidden>Nobody reads this.</p>
<img alt="a dot" src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">
<svg viewBox="0 0 300 100" width="300" height="100">
  <defs><path id="unused" d="M0 0L9 9"/></defs>
  <line x1="0" x2="300" y1="90" y2="90" stroke="currentColor"/>
  <path d="M0 80L300 10" stroke="currentColor" fill="none"/>
  <rect width="9" height="9" fill="none"/>
  <text x="5" y="20" fill="currentColor">milliseconds</text><text></text>
</svg>
<svg width="0" height="0"><circle r="5"/></svg>
<div style="height: 3000px">far</div><p>The end.</p>
<script>document.getElementById("written").textContent = "Written by a script."; console.log("fine")</script>
"""


def page(folder: Path, body: str, head: str = VIEWPORT) -> Path:
    file = folder / "a page.html"  # the space is on purpose
    file.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8">{head}<title>A page</title>{body}', "utf-8")
    return file


def everywhere(*faults: str) -> dict[tuple[str, int], list[str]]:
    return {view: list(faults) for view in VIEWS}


def faults(folder: Path, body: str, head: str = VIEWPORT) -> dict[tuple[str, int], list[str]]:
    return {(view.theme, view.width): view.faults for view in look(page(folder, body, head), folder / "shots")}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[PageView]:
    folder = tmp_path_factory.mktemp("sound")
    return look(page(folder, SOUND), folder / "deep" / "shots")


def test_a_sound_page_has_no_faults(sound: list[PageView]) -> None:
    assert [(view.theme, view.width) for view in sound] == VIEWS
    assert [view.faults for view in sound] == [[]] * 4
    for view in sound:
        assert view.requests == (view.address,)
        assert view.address.startswith("file:///")
        assert view.address.endswith("/a%20page.html")
        assert view.scroll_width == view.inner_width == view.width


def test_what_is_visible_and_drawn(sound: list[PageView]) -> None:
    for view in sound:
        # The chart's text is text, too; what is hidden is not.
        assert " ".join(view.text.split()) == "A report Written by a script. milliseconds far The end."
        assert view.svgs == (Drawing(width=300, height=100, shapes=2, texts=1),)


def test_the_theme_is_the_readers(sound: list[PageView]) -> None:
    colours = {view.theme: (view.background, view.colour) for view in sound}
    assert colours == {
        "light": ("rgb(255, 255, 255)", "rgb(17, 17, 17)"),
        "dark": ("rgb(16, 32, 48)", "rgb(238, 238, 238)"),
    }
    assert all((view.background, view.colour) == colours[view.theme] for view in sound)


def test_screenshots_show_the_whole_page(sound: list[PageView]) -> None:
    assert [view.screenshot.name for view in sound] == [f"{theme}-{width}.png" for theme, width in VIEWS]
    for view in sound:
        data = view.screenshot.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        pixels = 2 if view.width == 390 else 1  # a phone's are finer
        assert width == view.width * pixels
        assert height > 3000 * pixels
    assert len({view.screenshot.read_bytes() for view in sound}) == 4


@pytest.mark.parametrize(
    ("style", "dark"),
    [
        ("", "rgb(255, 255, 255)"),
        (":root { color-scheme: light dark }", "rgb(18, 18, 18)"),
        ("@media (prefers-color-scheme: dark) { html { background: #000 } }", "rgb(0, 0, 0)"),
    ],
    ids=["none", "the-browsers-own", "the-roots"],
)
def test_the_background_of_a_body_without_one(tmp_path: Path, style: str, dark: str) -> None:
    views = look(page(tmp_path, f"<style>{style}</style><p>text"), tmp_path / "shots")
    assert {(view.theme, view.background) for view in views} == {("light", "rgb(255, 255, 255)"), ("dark", dark)}


def test_what_goes_wrong_in_a_script(tmp_path: Path) -> None:
    expected = {
        "console.error('it', 'broke')": "on the console: error: it broke",
        "console.warn('careful')": "on the console: warning: careful",
        "console.assert(1 === 2, 'as said')": "on the console: assert: as said",
        "setTimeout(() => console.error('late'), 200)": "on the console: error: late",
        "throw new TypeError('not caught')": "uncaught: TypeError: not caught",
        "Promise.reject(new Error('nor this'))": "uncaught: Error: nor this",
        "this is no script": "uncaught: SyntaxError: Unexpected identifier 'is'",
        "throw 'only a text'": "uncaught: only a text",
    }
    scripts = "".join(f"<script>{script}</script>" for script in expected)
    for found in faults(tmp_path, f"<p>text</p>{scripts}").values():
        assert sorted(found) == sorted(expected.values())


def test_a_request_for_anything_else(tmp_path: Path) -> None:
    beside = tmp_path.as_uri()
    expected = {
        '<img src="https://a.example/image">': "https://a.example/image",
        '<img src="http://127.0.0.1:9/this-machine">': "http://127.0.0.1:9/this-machine",
        '<link rel="stylesheet" href="beside.css">': f"{beside}/beside.css",
        '<iframe src="beside.html"></iframe>': f"{beside}/beside.html",
        '<script src="file:///absent.js"></script>': "file:///absent.js",
        '<style>p { background: url("https://a.example/background") }</style>': "https://a.example/background",
        '<style>@font-face { font-family: f; src: url("https://a.example/font") } p { font: 1em f }</style>': (
            "https://a.example/font"
        ),
        '<script>fetch("https://a.example/fetch").catch(() => 0)</script>': "https://a.example/fetch",
        '<script>navigator.sendBeacon("https://a.example/beacon")</script>': "https://a.example/beacon",
        '<script>new WebSocket("wss://a.example/socket")</script>': "wss://a.example/socket",
        '<link rel="preload" as="style" href="https://a.example/preload">': "https://a.example/preload",
        '<script>setTimeout(() => fetch("https://a.example/late").catch(() => 0), 200)</script>': (
            "https://a.example/late"
        ),
        # Only a reader who scrolls down to it gets this one.
        '<div style="height: 9000px"></div><img loading="lazy" src="https://a.example/lazy">': "https://a.example/lazy",
    }
    (tmp_path / "beside.css").write_text("p { color: red }", encoding="utf-8")
    (tmp_path / "beside.html").write_text("<p>beside", encoding="utf-8")
    for found in faults(tmp_path, "<p>text</p>" + "".join(expected)).values():
        asked = [fault.removeprefix("asked for ") for fault in found if fault.startswith("asked for ")]
        assert sorted(asked) == sorted(expected.values())


def test_a_page_carries_its_own_data(tmp_path: Path) -> None:
    script = "const u = URL.createObjectURL(new Blob(['{}'])); fetch(u); fetch('data:,x'); location.hash = 'part'"
    assert faults(tmp_path, f"<p id=part>text</p><script>{script}</script>") == everywhere()


@pytest.mark.parametrize(("wide", "hurt"), [(500, [390]), (1300, [1200, 390])])
def test_a_page_wider_than_the_screen(tmp_path: Path, wide: int, hurt: list[int]) -> None:
    box = f'<p>text</p><div style="width: {wide}px; height: 9px; background: red"></div>'
    for view in look(page(tmp_path, f"<style>body {{ margin: 0 }}</style>{box}"), tmp_path / "shots"):
        if view.width not in hurt:
            assert view.faults == []
            continue
        assert view.overhang - (wide - view.width) in (0, 1)  # a phone zooms, and rounds
        assert view.faults == [f"{view.overhang} pixels wider than a screen of {view.width}"]


def test_what_scrolls_in_its_own_box_is_not_too_wide(tmp_path: Path) -> None:
    box = '<div style="overflow-x: auto"><div style="width: 1300px; height: 9px"></div></div>'
    assert faults(tmp_path, f"<p>text</p>{box}") == everywhere()


def test_a_page_that_forgot_phones(tmp_path: Path) -> None:
    found = faults(tmp_path, "<p>text</p>", head="")
    assert [found[view] for view in VIEWS] == [[], []] + [["590 pixels wider than a screen of 390"]] * 2


def test_a_page_without_visible_text(tmp_path: Path) -> None:
    assert faults(tmp_path, '<p style="display: none">text</p>') == everywhere("no text is visible")
