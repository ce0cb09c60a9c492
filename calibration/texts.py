"""Text sets: what one text is, how a file of them is read, and the hash that names a set.

Two file formats are read. *JSON lines* holds one object per line with the fields of `Text`, only `text` being
required. *Plain text* holds one text per line. A file is JSON lines when its name ends in `.jsonl` or
`.ndjson`, or when its first line that is not blank is a JSON object with a "text" field.

Texts are never stripped, normalized or reordered here: what a reader changes would no longer be what PyTorch
and the engine are compared on. This module knows nothing of tokenizers or of what a prompt name stands for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from runtime.errors import InputError

KINDS: Final = ("query", "document", "code", "edge", "long")
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
"""Larger files are refused: they are read whole, and a set that size is a corpus given by mistake."""

_READ_BYTES: Final = 1024 * 1024
_JSON_LINES_SUFFIXES: Final = (".jsonl", ".ndjson")
_FORMAT_CURE: Final = 'Write one object per line, such as {"text": "some text", "prompt": "query"}'
_PLAIN_CURE: Final = "or rename the file to .txt to use its lines as they stand"
_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True)
class Text:
    """One text and what is known of it. Only `prompt` and `text` decide the vector.

    `prompt` is the name of a prompt of the checkpoint ("query", "document"), or None for no prompt.
    `language` is an ISO 639-3 code ("und" unknown, "zxx" none, "mul" several) or the name of a programming
    language; `script` is an ISO 15924 code ("Zyyy" where no letter decides it); `kind` is one of `KINDS`;
    `licence` is an SPDX expression.
    """

    id: str
    text: str
    prompt: str | None = None
    language: str = "und"
    script: str = "Zyyy"
    kind: str = "document"
    source: str = "user"
    licence: str = "unknown"


_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Text))


def read_texts(path: str | Path) -> list[Text]:
    """Read a JSON-lines or plain-text file; texts come back verbatim and in file order.

    In plain text the line end (LF or CRLF) is not part of the text and blank lines are ignored. In JSON lines
    blank lines are ignored too, but a `text` may be empty or all whitespace. A UTF-8 byte order mark at the
    start is dropped. A missing `id` becomes "<file stem>:<line number>".

    Raises `InputError` (with file, line, value, limit and cure) for a file that is missing, unreadable, too
    large, empty, binary or not UTF-8, for a bad line, for an id used twice, and when no text is left.
    """
    path = Path(path)
    data = _read_bytes(path)
    lines = _decode(path, data).split("\n")
    # Only LF ends a line. str.splitlines would also cut at U+2028, U+0085 or form feed, which are text.
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(
            f"{path}: no usable text: all {len(lines)} lines are blank; at least 1 text is needed.",
            cure="Put one text on each line.",
        )
    if path.suffix.lower() in _JSON_LINES_SUFFIXES or _is_json_text(numbered[0][1]):
        return _unique([(n, _from_json(path, n, line)) for n, line in numbered], path)
    if path.suffix.lower() == ".json":
        raise InputError(
            f"{path}: line {numbered[0][0]} is {_shorten(numbered[0][1])}, not an object with a 'text' "
            "field; a .json file must hold one such object per line.",
            cure=_FORMAT_CURE + f"; {_PLAIN_CURE}.",
        )
    return [Text(f"{path.stem}:{n}", line.removesuffix("\r"), source=path.name) for n, line in numbered]


def texts_sha256(texts: Iterable[Text]) -> str:
    """The hash (64 hex digits) over what decides the vectors: prompt name and text of each, in order.

    Each text contributes one line, the JSON array [prompt, text] in ASCII. JSON escapes line ends, so no two
    different sequences give the same bytes. Ids, languages, sources and licences do not count.
    """
    digest = hashlib.sha256(b"f2rt texts 1\n")
    for text in texts:
        line = json.dumps([text.prompt, text.text], ensure_ascii=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def write_lines(texts: Iterable[Text]) -> bytes:
    """The JSON-lines form of `texts`, UTF-8, as `read_texts` takes it back.

    Edge texts are escaped to ASCII, so that no editor, diff tool or normalizing checkout can alter what they
    are there to test; all others stay readable.
    """
    lines = [json.dumps(dataclasses.asdict(t), ensure_ascii=t.kind == "edge") for t in texts]
    return "".join(line + "\n" for line in lines).encode("utf-8")


def verification_path() -> Path:
    """Where the committed verification set lies, beside this module."""
    return Path(__file__).with_name("verification.jsonl")


def verification_texts() -> list[Text]:
    """The committed verification set, in its stable order. Raises `InputError` where the file is damaged."""
    return read_texts(verification_path())


def calibration_path() -> Path:
    """Where the committed calibration set lies, beside this module."""
    return Path(__file__).with_name("calibration.jsonl")


def calibration_texts() -> list[Text]:
    """The committed calibration set, in its stable order. Raises `InputError` where the file is damaged."""
    return read_texts(calibration_path())


def normalized(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, each run of whitespace one space, none
    at the ends. Folding decomposes some characters and NFKC composes some, hence Unicode's order of steps."""
    for _ in range(2):
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(text.split())


def check_disjoint(
    calibration: Iterable[Text], verification: Iterable[Text], name: str = "the calibration set"
) -> None:
    """Check that no text of `calibration` is one of `verification`, after `normalized` and whatever the prompts.

    Raises `InputError` that names the first shared text in the order of `calibration`, and says how many there
    are. `name` is what the message calls the first set: the path of a user's file.
    """
    held = {normalized(text.text): text for text in reversed(list(verification))}
    given = [(text, normalized(text.text)) for text in calibration]
    shared = [(text, held[form]) for text, form in given if form in held]
    if not shared:
        return
    mine, theirs = shared[0]
    if {form for _, form in given} == set(held):
        what = f"{name}: is identical to the verification set ({len(given):,} texts)"
    else:
        what = f"{name}: {len(shared):,} of {len(given):,} texts belong to the verification set, 0 may"
    same = "" if mine.text == theirs.text else " once case, whitespace and compatibility forms are ignored"
    raise InputError(
        f"{what}; the first is {_shorten(mine.id)}, {_shorten(mine.text)}, the same as {_shorten(theirs.id)}{same}.",
        cure="Remove the shared texts or calibrate with others: texts that ranges are chosen on verify nothing.",
    )


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file of texts.", cure="Name one file inside it.")
    try:
        with path.open("rb") as file:
            # Asked for the limit at once, a file of a few lines would take as much memory as the largest.
            pieces = iter(lambda: file.read(_READ_BYTES), b"")
            data = b"".join(itertools.islice(pieces, MAX_FILE_BYTES // _READ_BYTES + 1))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.", cure="Check the path given for the texts.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read: {reason}.", cure="Check its permissions.") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(
            f"{path}: over the limit of {MAX_FILE_BYTES:,} bytes for a file of texts.",
            cure="Pass a sample of it; a few hundred texts are enough to verify an engine.",
        )
    if not data:
        raise InputError(
            f"{path}: the file is empty (0 bytes); at least 1 text is needed.",
            cure="Put one text on each line.",
        )
    return data


def _decode(path: Path, data: bytes) -> str:
    if data.startswith(_UTF16_BOMS):
        raise InputError(
            f"{path}: line 1 starts with the UTF-16 byte order mark {data[:2].hex(' ')}; only UTF-8 is read.",
            cure=f"Convert it: iconv -f UTF-16 -t UTF-8 {path} > texts.txt",
        )
    # A raw NUL is no text in either format (JSON writes it as \u0000), but every model or image has some.
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(
            f"{path}: line {_line_at(data, nul)}: NUL byte at offset {nul}: a binary file, not text.",
            cure="Pass a text file with one text per line, or JSON lines.",
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad = error.start
        raise InputError(
            f"{path}: line {_line_at(data, bad)}: byte 0x{data[bad]:02x} at offset {bad} is not UTF-8.",
            cure=f"Save it as UTF-8, for instance: iconv -f WINDOWS-1252 -t UTF-8 {path} > texts.txt",
        ) from error


def _line_at(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _is_json_text(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "text" in value


def _from_json(path: Path, number: int, line: str) -> Text:
    """One JSON line as a `Text`. Raises `InputError`."""
    where = f"{path}: line {number}"
    try:
        value = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}, column {error.colno}: not JSON: {error.msg}: {_shorten(line)}.",
            cure=_FORMAT_CURE + f"; {_PLAIN_CURE}.",
        ) from error
    except (ValueError, RecursionError) as error:  # a field twice, a number too long, nesting too deep
        raise InputError(f"{where}: cannot be used: {error}: {_shorten(line)}.", cure=_FORMAT_CURE + ".") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {_shorten(line)} is not an object.", cure=_FORMAT_CURE + ".")
    unknown = sorted(set(value) - set(_FIELDS))
    if unknown:
        raise InputError(
            f"{where}: unknown field {_shorten(unknown[0])}; the fields are {', '.join(_FIELDS)}.",
            cure="Remove or rename it: a misspelt 'prompt' would silently check other vectors.",
        )
    if "text" not in value:
        raise InputError(f"{where}: the field 'text' is missing: {_shorten(line)}.", cure=_FORMAT_CURE + ".")
    for name, given in value.items():
        _check_field(where, name, given)
    return Text(**{"id": f"{path.stem}:{number}", "source": path.name, **value})


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    # Plain json keeps the last of two equal names without a word.
    value: dict[str, object] = {}
    for name, given in pairs:
        if name in value:
            raise ValueError(f"the field {name!r} is there twice")
        value[name] = given
    return value


def _check_field(where: str, name: str, given: object) -> None:
    if name == "prompt" and given is None:
        return
    if not isinstance(given, str):
        allowed = "a string or null" if name == "prompt" else "a string"
        raise InputError(
            f"{where}: field {name!r} is {_shorten(json.dumps(given))}; it must be {allowed}.",
            cure="Put the value in double quotes, or leave an optional field out.",
        )
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {name!r} has a lone surrogate U+{ord(given[error.start]):04X} at character "
            f"{error.start}; only whole Unicode characters can be tokenized.",
            cure="Write the character itself, or both halves of the \\u pair.",
        ) from error
    if name == "kind" and given not in KINDS:
        raise InputError(
            f"{where}: field 'kind' is {_shorten(given)}; it must be one of {', '.join(KINDS)}.",
            cure="Use one of these, or leave the field out.",
        )
    if name in ("id", "prompt") and not given:
        cure = "Use null for no prompt." if name == "prompt" else "Leave the field out for a default."
        raise InputError(f"{where}: field {name!r} is empty; it must have at least 1 character.", cure=cure)


def _unique(numbered: list[tuple[int, Text]], path: Path) -> list[Text]:
    first: dict[str, int] = {}
    for number, text in numbered:
        if text.id in first:
            raise InputError(
                f"{path}: line {number}: id {_shorten(text.id)} was already used on line {first[text.id]}.",
                cure="Give each text its own id, as reports name texts by it, or leave the field out.",
            )
        first[text.id] = number
    return [text for _, text in numbered]


def _shorten(value: str, limit: int = 80) -> str:
    return repr(value if len(value) <= limit else value[: limit - 1] + "…")
