"""Opens an HTML file in a headless Chromium as four readers would; prints what was found as JSON.

Arguments: CHROMIUM HTML FOLDER. The readers have a light and a dark theme, on a desktop and on a phone. FOLDER gets a
screenshot of the whole page for each, THEME-WIDTH.png.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, ConsoleMessage, WebError, sync_playwright

Theme = Literal["light", "dark"]
SCREENS = {1200: 800, 390: 844}
PHONE = 390
COMPLAINTS = {"warning", "error", "assert"}

# Scrolling draws what a page draws only in sight, and loads what it loads only there.
SCROLL = """async () => {
  const pause = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const step = window.innerHeight;
  for (let y = 0; y < document.documentElement.scrollHeight; y += step) { window.scrollTo(0, y); await pause(); }
  window.scrollTo(0, 0);
  await document.fonts.ready;
  await pause();
}"""

MEASURE = """() => {
  const style = getComputedStyle(document.body);
  const root = document.documentElement;
  const area = element => element.getBoundingClientRect();
  const visible = element =>
    element.checkVisibility({opacityProperty: true, visibilityProperty: true}) &&
    (area(element).width > 0 || area(element).height > 0);
  const inked = element => {
    const {fill, stroke} = getComputedStyle(element);
    return fill !== 'none' || stroke !== 'none';
  };
  const drawn = svg => ({
    width: area(svg).width,
    height: area(svg).height,
    shapes: [...svg.querySelectorAll('path, line, polyline, polygon, rect, circle, ellipse, use, image')]
      .filter(shape => visible(shape) && inked(shape)).length,
    texts: [...svg.querySelectorAll('text')]
      .filter(text => visible(text) && inked(text) && text.textContent.trim()).length,
  });
  // A body without a background shows the root's, and that one the browser's own, which the theme decides.
  const canvas = document.createElement('div');
  canvas.style.backgroundColor = 'Canvas';
  root.append(canvas);
  const backgrounds = [style, getComputedStyle(root), getComputedStyle(canvas)].map(s => s.backgroundColor);
  canvas.remove();
  return {
    inner_width: window.innerWidth,
    scroll_width: root.scrollWidth,
    text: document.body.innerText,
    svgs: [...document.querySelectorAll('svg')]
      .filter(svg => visible(svg) && area(svg).width > 0 && area(svg).height > 0).map(drawn),
    background: backgrounds.find(colour => colour !== 'rgba(0, 0, 0, 0)'),
    colour: style.color,
  };
}"""


class Reader:
    """One who opens the page; keeps what it says and asks for."""

    def __init__(self, browser: Browser, page_file: Path, theme: Theme, width: int) -> None:
        self.address, self.theme, self.width = page_file.as_uri(), theme, width
        self.console: list[str] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        phone = width == PHONE
        # A phone lays a page that names no viewport out for a desktop. Nothing the page asks for leaves the machine.
        context = browser.new_context(
            viewport={"width": width, "height": SCREENS[width]},
            color_scheme=theme,
            is_mobile=phone,
            has_touch=phone,
            device_scale_factor=2 if phone else 1,
            reduced_motion="reduce",
            offline=True,
        )
        context.on("console", self._said)
        context.on("weberror", self._failed)
        context.on("request", lambda request: self.requests.append(request.url))
        self.page = context.new_page()
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))
        self.page.goto(self.address)
        self.page.evaluate(SCROLL)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in COMPLAINTS:
            self.console.append(f"{message.type}: {message.text}")

    def _failed(self, failure: WebError) -> None:
        error = failure.error
        self.errors.append(": ".join(filter(None, [error.name, error.message])))

    def look(self, folder: Path) -> dict[str, Any]:
        """Wait until the page is at rest; return what it did and shows."""
        self.page.wait_for_load_state("networkidle")
        measured = self.page.evaluate(MEASURE)
        screenshot = folder / f"{self.theme}-{self.width}.png"
        self.page.screenshot(path=screenshot, full_page=True, animations="disabled")
        return {
            "theme": self.theme,
            "width": self.width,
            "address": self.address,
            "console": self.console,
            "errors": self.errors,
            "requests": self.requests,
            "screenshot": str(screenshot),
            **measured,
        }


def main(chromium: str, html: str, shots: str) -> list[dict[str, Any]]:
    """Look at the page with every reader's eyes."""
    page_file, folder = Path(html).resolve(), Path(shots).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    themes: tuple[Theme, ...] = ("light", "dark")
    with sync_playwright() as playwright:
        # Chromium refuses to run as root within its sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=os.geteuid() != 0)
        # All at once, so that their pages come to rest side by side.
        readers = [Reader(browser, page_file, theme, width) for width in SCREENS for theme in themes]
        views = [reader.look(folder) for reader in readers]
        browser.close()
    return views


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
