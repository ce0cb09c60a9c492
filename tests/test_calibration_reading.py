"""Users' own texts: how a file is read, what is said of a bad one, the hash of a set, and sets that share a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from calibration import texts
from calibration.texts import Text, check_disjoint, read_texts, texts_sha256, verification_path, write_lines
from runtime.errors import InputError
from tests.texts import A, B, check


def test_plain_text_is_taken_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff first \r\n\r\nsecond\u2028still second\x0c\n  \nfirst\nfirst".encode())
    read = read_texts(path)
    assert [t.text for t in read] == [" first ", "second\u2028still second\x0c", "first", "first"]
    assert [t.id for t in read] == ["mine:1", "mine:3", "mine:5", "mine:6"]
    assert {(t.prompt, t.kind, t.source) for t in read} == {(None, "document", "mine.txt")}


def test_json_lines_are_taken_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": " a\\r\\n"}\n\n{"text": "", "prompt": "query", "id": "x", "kind": "query"}\r\n')
    assert read_texts(path) == [
        Text("mine:1", " a\r\n", source="mine.jsonl"),
        Text("x", "", "query", kind="query", source="mine.jsonl"),
    ]


def test_json_lines_are_known_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "piped"
    path.write_text('\n{"text": "a", "prompt": null}\n')
    assert [t.text for t in read_texts(str(path))] == ["a"]
    path.write_text('{"a": 1}\n{"text": 2}\n')
    assert [t.text for t in read_texts(path)] == ['{"a": 1}', '{"text": 2}']


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    given = [Text("1", "a\u2028\x85\u0301\r\n\ud7ff"), Text("2", "😀\0", "query", kind="edge")]
    path.write_bytes(write_lines(given))
    assert read_texts(path) == given


BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("empty.txt", b"", ["0 bytes", "at least 1"]),
    ("blank.txt", b" \n\t\r\n\n", ["no usable text", "4 lines", "at least 1"]),
    ("blank.jsonl", b"\n\n", ["no usable text"]),
    ("latin1.txt", b"fine\ncaf\xe9\n", ["line 2", "0xe9", "offset 8", "UTF-8"]),
    ("utf16.txt", "hello".encode("utf-16"), ["line 1", "UTF-16", "iconv"]),
    ("image.png", b"one\n\x89PNG\0\0", ["line 2", "NUL", "offset 8", "binary"]),
    ("array.json", b'[{"text": "a"}]', ["line 1", "one such object per line"]),
    ("syntax.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["line 2", "column", "not JSON", '{"text": "b"']),
    ("list.jsonl", b'{"text": "a"}\n["b"]\n', ["line 2", '["b"]', "not an object"]),
    ("missing.jsonl", b'{"id": "a"}\n', ["line 1", "'text' is missing"]),
    ("null.jsonl", b'{"text": null}\n', ["line 1", "'text'", "null", "must be a string"]),
    ("number.jsonl", b'\n{"text": 12}\n', ["line 2", "'text'", "12", "must be a string"]),
    ("prompt.jsonl", b'{"text": "a", "prompt": ["query"]}', ["'prompt'", '["query"]', "a string or null"]),
    (
        "noprompt.jsonl",
        b'{"text": "a", "prompt": ""}',
        ["line 1", "'prompt'", "at least 1 character", "null"],
    ),
    ("typo.jsonl", b'{"text": "a", "promt": "query"}', ["line 1", "'promt'", "prompt, language"]),
    ("kind.jsonl", b'{"text": "a", "kind": "poem"}', ["line 1", "'poem'", "query, document, code"]),
    ("language.jsonl", b'{"text": "a", "language": null}', ["line 1", "'language'", "must be a string"]),
    ("twice.jsonl", b'{"text": "a", "text": "b"}', ["line 1", "'text' is there twice"]),
    ("ids.jsonl", b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', ["line 2", "'x'", "line 1"]),
    ("surrogate.jsonl", b'{"text": "ab\\ud800"}', ["line 1", "U+D800", "character 2"]),
    ("deep.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, ["line 2", "cannot be used"]),
    ("digits.jsonl", b'{"text": ' + b"1" * 5_000 + b"}", ["line 1", "cannot be used"]),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_bad_file_is_explained(name: str, data: bytes, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_texts(path)
    check(caught.value, path, expected)


def test_a_missing_file_or_a_folder_is_explained(tmp_path: Path) -> None:
    for path, expected in [(tmp_path / "none.txt", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(InputError) as caught:
            read_texts(path)
        check(caught.value, path, [expected])


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * 11)
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError) as caught:
        read_texts(path)
    check(caught.value, path, ["limit of 10 bytes"])
    path.write_bytes(b"a" * 10)
    assert len(read_texts(path)) == 1


@pytest.mark.parametrize(
    "other",
    [
        [B, A],
        [A],
        [A, B, B],
        [dataclasses.replace(A, text="a "), B],
        [dataclasses.replace(A, prompt="document"), B],
        [dataclasses.replace(A, prompt=None), B],
        [dataclasses.replace(A, prompt="None"), B],
        # Moving a character over the border of prompt and text, or of two texts, must show as well.
        [dataclasses.replace(A, prompt="quer", text="ya"), B],
        [dataclasses.replace(A, text='a"]\n[null,"b'), dataclasses.replace(B, text="")],
    ],
)
def test_the_hash_follows_order_text_and_prompt(other: list[Text]) -> None:
    assert texts_sha256([A, B]) != texts_sha256(other)


def test_the_hash_ignores_what_decides_no_vector() -> None:
    renamed = dataclasses.replace(A, id="9", language="fra", script="Latn", kind="edge", source="s", licence="l")
    assert texts_sha256([A, B]) == texts_sha256([renamed, B])
    none, spelt = dataclasses.replace(A, prompt=None), dataclasses.replace(A, prompt="null")
    assert texts_sha256([none]) != texts_sha256([spelt])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who may vote?", "Who may vote?"),
        ("Who may vote?", "\ufeffWHO MAY VOTE?"[1:]),
        ("Who may vote?", "\t Who\n\nmay\u3000vote? \r\n"),
        ("Who may vote?", "\uff37\uff48\uff4f may vote\uff1f"),
        ("a\u00a0b", "a b"),
        ("Stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01ne", "FINE"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("\u0391\u0345\u0301", "\u1fb4"),  # the mark that folding turns into a letter comes after the accent
        ("\u03a3\u03c2", "\u03c3\u03c3"),
        ("", " \t\n"),
    ],
)
def test_a_shared_text_is_found_after_normalization(one: str, other: str) -> None:
    mine = [Text("mine:1", "something else"), Text("mine:7", one, "query")]
    theirs = [Text("v:1", "a third text"), Text("v:2", other, "document")]
    for given, held in ((mine, theirs), (theirs, mine)):
        with pytest.raises(InputError) as caught:
            check_disjoint(given, held, "mine.jsonl")
        check(caught.value, Path("mine.jsonl"), [given[1].id, held[1].id, "1 of 2 texts", "Remove the shared texts"])
    assert ("ignored" in str(caught.value)) == (one != other)


@pytest.mark.parametrize("other", ["Who may not vote?", "Who may vote", "Whomayvote?", "", "Who may voté?"])
def test_different_texts_are_not_shared(other: str) -> None:
    check_disjoint([Text("1", "Who may vote?")], [Text("1", other)])
    check_disjoint([], [Text("1", other)])


def test_the_first_shared_text_is_named_and_all_are_counted() -> None:
    mine = [Text(f"m:{n}", f"text {n % 5}") for n in range(10)]
    held = [Text("v:0", "Text 3"), Text("v:1", "text 2"), Text("v:2", "TEXT 2"), Text("v:3", "other")]
    with pytest.raises(InputError, match="4 of 10 texts") as caught:
        check_disjoint(mine, held)
    check(caught.value, Path("the calibration set"), ["'m:2', 'text 2'", "'v:1'. "])


def test_calibrating_with_the_verification_texts_is_refused(tmp_path: Path, verification: list[Text]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(verification_path().read_bytes())
    expected = ["is identical to the verification set (1,010 texts)", repr(verification[0].id)]
    with pytest.raises(InputError) as caught:
        check_disjoint(read_texts(path), verification, str(path))
    check(caught.value, path, expected)
    # Under no prompt, in another order and with other whitespace it is the same set.
    turned = [Text(f"x{n}", t.text.replace(" ", "\u00a0\n") + " ") for n, t in enumerate(reversed(verification))]
    with pytest.raises(InputError, match="identical to the verification set"):
        check_disjoint(turned, verification)
    with pytest.raises(InputError, match="1,009 of 1,009 texts belong"):
        check_disjoint(verification[1:], verification)
