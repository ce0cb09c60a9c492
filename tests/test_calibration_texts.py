"""The committed text sets, the reader of users' own, the rules that build the splits. Offline."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from calibration import build, edges, pins, sampling, sources, texts
from calibration.sources import Passage
from calibration.texts import (
    Text,
    calibration_path,
    calibration_texts,
    check_disjoint,
    normalized,
    read_texts,
    texts_sha256,
    verification_path,
    verification_texts,
    write_lines,
)
from runtime.errors import InputError

ROOT = Path(__file__).parents[1]
PATHS = {"calibration": calibration_path(), "verification": verification_path()}
SHA256 = {
    "calibration": "9a510307883ac8591d03418d7adaab2826babe85174b50c6f63edf0816db3c90",
    "verification": "bdc6dbece83c1a968ef6251d053b8dd1510dea0a58034521d9f59e58e4ad19d5",
}
PROGRAMMING = {
    "calibration": {"python", "java", "cpp", "go", "rb", "haskell", "scala", "objective-c"},
    "verification": {"python", "java", "js", "c", "cpp", "go", "php", "rb", "bash"},
}
TRAINED_TOKENS = 1_024  # longer texts were truncated in training


@pytest.fixture(scope="module")
def verification() -> list[Text]:
    return verification_texts()


@pytest.fixture(scope="module")
def calibration() -> list[Text]:
    return calibration_texts()


@pytest.fixture(params=["calibration", "verification"])
def split(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def given(split: str, calibration: list[Text], verification: list[Text]) -> list[Text]:
    return {"calibration": calibration, "verification": verification}[split]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.from_file(str(ROOT / "checkpoints/mini/tokenizer.json"))
    loaded.no_truncation()
    return loaded


def natural(given: list[Text]) -> set[str]:
    return {t.language for t in given if t.kind in ("query", "document", "long")} - {"und", "zxx", "mul"}


def programming(given: list[Text]) -> set[str]:
    return {t.language for t in given if t.kind == "code"}


def test_counts_are_what_is_promised(calibration: list[Text], verification: list[Text]) -> None:
    assert len(calibration) == 512
    assert len(verification) >= 1_000
    for given, documents, queries in ((verification, 400, 250), (calibration, 190, 125)):
        assert all(len(language) == 3 for language in natural(given))
        assert len(natural(given)) >= 200
        assert len({t.language for t in given if t.kind == "document"}) >= documents
        assert len(programming(given)) >= 40
        assert len({t.script for t in given if t.kind == "document"}) >= 40
        assert {t.kind for t in given} == set(texts.KINDS)
        assert {t.prompt for t in given} == {None, "query", "document"}
        assert sum(t.kind == "query" for t in given) >= queries


def test_the_files_and_their_tokens_stay_small(split: str, given: list[Text], tokenizer: Tokenizer) -> None:
    # Every verification text runs alone through PyTorch on a CPU, every calibration text through the probe.
    assert PATHS[split].stat().st_size < {"calibration": 500_000, "verification": 900_000}[split]
    lengths = [len(tokenizer.encode(t.text, add_special_tokens=False).ids) for t in given]
    total = sum(min(length, TRAINED_TOKENS) for length in lengths)
    assert total < {"calibration": 90_000, "verification": 170_000}[split]


def test_widely_used_languages_are_there(split: str, given: list[Text]) -> None:
    assert {"eng", "cmn", "spa", "fra", "deu", "jpn", "rus", "arb", "hin", "kor", "tha"} <= natural(given)
    # An example file is on one side only, so a language with a single file is in one split only.
    assert PROGRAMMING[split] <= programming(given)


def test_every_record_says_where_it_is_from(given: list[Text]) -> None:
    origins = {"npm": "MIT", "pypi": "BSD-2-Clause", "cpython": "PSF-2.0", "f2rt": "Apache-2.0"}
    for text in given:
        assert text.licence == origins[text.source.replace("==", ":").split(":")[0]], text.id
        assert (text.kind == "edge") == (text.source == "f2rt"), text.id
    for licence in {t.licence for t in given} - {"Apache-2.0"}:
        assert list((ROOT / "calibration/licences").glob(f"*-{licence}.txt")), licence
    assert (ROOT / "LICENSE").exists()


def test_no_record_carries_a_notice_of_another_owner(given: list[Text]) -> None:
    code = [t for t in given if t.source.startswith("pypi:")]
    assert code
    for text in code:
        assert "copyright" not in text.text.lower(), text.id
        assert "license" not in text.text.lower(), text.id


def test_ids_and_texts_are_unique(given: list[Text]) -> None:
    assert len({t.id for t in given}) == len(given)
    assert len({(t.prompt, t.text) for t in given}) == len(given)


def test_the_hash_and_the_bytes_are_the_committed_ones(split: str, given: list[Text]) -> None:
    # A new hash is a new set: every manifest and report names it, so it changes on purpose only.
    assert texts_sha256(given) == SHA256[split]
    assert write_lines(given) == PATHS[split].read_bytes()


def test_the_splits_share_no_text_no_id_and_no_passage(calibration: list[Text], verification: list[Text]) -> None:
    check_disjoint(calibration, verification)
    check_disjoint(verification, calibration)
    assert not {normalized(t.text) for t in calibration} & {normalized(t.text) for t in verification}
    assert not {t.id for t in calibration} & {t.id for t in verification}
    # Not even in pieces: no paragraph of some length stands in both, within whatever texts.
    paragraphs = [
        {normalized(part) for t in given if t.kind != "code" for part in t.text.split("\n") if len(part) > 40}
        for given in (calibration, verification)
    ]
    assert not paragraphs[0] & paragraphs[1]
    files = [
        {t.source.split("#")[0] for t in given if t.source.startswith("pypi:")} for given in (calibration, verification)
    ]
    assert files[0]
    assert not files[0] & files[1]


def test_lengths_reach_from_nothing_to_the_limit(verification: list[Text], tokenizer: Tokenizer) -> None:
    lengths = {t.id: len(tokenizer.encode(t.text, add_special_tokens=False).ids) for t in verification}
    counts = sorted(lengths.values())
    assert counts[0] == 0
    assert counts.count(1) >= 5
    assert max(counts) > 8_192
    assert sum(count > TRAINED_TOKENS for count in counts) >= 15
    for low, high in [(2, 16), (16, 64), (64, 256), (256, 1_024), (1_024, 4_096)]:
        assert sum(low <= count < high for count in counts) >= 10, (low, high)
    assert sum(lengths[t.id] >= 2_000 for t in verification if t.kind == "long") >= 8


def test_calibration_lengths_reach_from_one_token_to_the_trained_length(
    calibration: list[Text], tokenizer: Tokenizer
) -> None:
    counts = [len(tokenizer.encode(t.text, add_special_tokens=False).ids) for t in calibration]
    assert min(counts) == 1
    assert counts.count(1) >= 8
    for low, high in [(2, 16), (16, 64), (64, 256), (256, 1_024), (1_024, 4_097)]:
        assert sum(low <= count < high for count in counts) >= 10, (low, high)
    assert all(t.text.strip() for t in calibration)


def test_edge_texts_are_there_to_the_code_point(verification: list[Text]) -> None:
    edges = {t.id.removeprefix("edge/"): t for t in verification if t.kind == "edge"}
    assert [t.prompt for t in edges.values() if t.text == ""] == [None, "query"]
    assert {t.text for t in edges.values()} >= {"a", "é", "的", "🙂", "1", " ", "\n", "\t", "<|im_end|>"}
    assert sum(not t.text.strip() for t in edges.values()) >= 6
    assert edges["decomposed"].text != edges["composed"].text
    assert len(edges["decomposed"].text) > len(edges["composed"].text)
    assert edges["repeated-word"].text.split() == ["vector"] * 300
    assert " " not in edges["long-word"].text
    assert len(edges["long-word"].text) > 1_000
    assert "\r\n" in edges["crlf"].text
    assert edges["surrounding-whitespace"].text != edges["surrounding-whitespace"].text.strip()
    assert "\u200d" in edges["emoji-family"].text
    assert "<|endoftext|>" in edges["special-inside"].text
    assert not any("\0" in t.text for t in edges.values())


def test_edge_texts_are_escaped(split: str, given: list[Text]) -> None:
    escaped = [line for line in PATHS[split].read_bytes().splitlines() if b'"kind": "edge"' in line]
    assert len(escaped) == sum(t.kind == "edge" for t in given) > 0
    assert all(line.isascii() for line in escaped)


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


def check(error: InputError, path: Path, expected: list[str]) -> None:
    message = str(error)
    assert error.cure, message
    assert error.cure in message
    assert str(path) in message
    assert len(message) < 600
    for part in expected:
        assert part in message, message


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


A, B = Text("1", "a", "query"), Text("2", "b")


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


def test_normalizing_twice_changes_nothing(given: list[Text]) -> None:
    for text in given:
        assert normalized(normalized(text.text)) == normalized(text.text), text.id


def passage(group: str, text: str, title: str = "") -> Passage:
    return Passage(group, f"name/{group}/{text}", text, title, "eng", "Latn", "npm:x")


def test_splits_are_disjoint_and_do_not_depend_on_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same text under several groups lands on both sides by hash: verification must win, however it is spelt.
    spellings = ("text {}", "TEXT  {}", "text\u00a0{}\n")
    functions = [passage(f"g{n}", spellings[n % 3].format(n // 3), f"question {n}") for n in range(3_000)]
    small = sampling.Quotas(articles=0, runs=0, titles=0, functions=10, examples=0)
    middle, large = (dataclasses.replace(small, functions=n) for n in (25, 3_000))

    def taken(split: str, quotas: sampling.Quotas) -> set[str]:
        monkeypatch.setitem(sampling.QUOTAS, split, quotas)
        sampled = sampling.sample(split, [], [], functions)
        assert sum(t.kind == "query" for t in sampled) <= quotas.functions
        return {t.text for t in sampled}

    for split in ("verification", "calibration"):
        assert len(taken(split, small)) > 10
        assert taken(split, small) < taken(split, middle) < taken(split, large)
    forms = [{normalized(t) for t in taken(split, large)} for split in ("verification", "calibration")]
    assert all(any(form.startswith("text") for form in side) for side in forms)
    assert not forms[0] & forms[1]


def test_a_heading_many_articles_share_excludes_none_of_them() -> None:
    articles = [passage(f"g{n}", f"text {n}", "Article 5") for n in range(30)]
    sides = [sampling.pool(articles, split) for split in ("calibration", "verification")]
    assert len(sides[0]) + len(sides[1]) == 30
    assert sides[0]
    assert not sampling.pool(articles, "calibration", titles=True)


def test_texts_written_by_hand_are_apart() -> None:
    names = [name for name, *_ in (*edges.EDGES, *edges.SHORT_TEXTS)]
    assert len(set(names)) == len(names)
    forms = [{normalized(text) for _, text, *_ in rows} for rows in (edges.EDGES, edges.SHORT_TEXTS)]
    assert not forms[0] & forms[1]


def test_sides_are_fixed_for_good() -> None:
    # These are hashes: if one moves, committed calibration texts become verification texts.
    sides = [sampling.side(f"udhr/eng/article{n}") for n in range(12)]
    assert "".join(side[0] for side in sides) == "vvcvcvvcccvv"
    assert sampling.side("") == "verification"


def test_spread_takes_each_language_before_a_second_text() -> None:
    passages = [
        Passage("", f"{language}/{n}", f"{language} {n}", "", language, "Latn", "npm:x")
        for language in ("zul", "eng", "xho")
        for n in range(3)
    ]
    first = [p.language for p in sampling._spread(passages)]
    assert first[0] == "eng"
    assert set(first[:3]) == set(first[3:6]) == set(first[6:]) == {"zul", "eng", "xho"}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("abc", "Latn"),
        ("日本の", "Jpan"),
        ("中文", "Hani"),
        ("aб в г", "Cyrl"),
        ("12 🙂", "Zyyy"),
        ("ᚠᚢ", "Zyyy"),
        ("", "Zyyy"),
    ],
)
def test_script_of(text: str, script: str) -> None:
    assert sources.script_of(text) == script


def test_a_wrong_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / pins.UDHR
    path.write_bytes(b"something else")
    with pytest.raises(InputError) as caught:
        sources.fetch(pins.UDHR, tmp_path)
    check(caught.value, path, [pins.SHA256[pins.UDHR]])
    out = tmp_path / "out"
    out.mkdir()
    assert build.main(["--work", str(tmp_path), "--out", str(out)]) == 1
    assert "sha256" in capsys.readouterr().err
    assert not list(out.iterdir())


def build_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: dict[str, list[Text]]) -> int:
    """Run the build with sampling replaced: what it writes, and when, without the packages."""
    monkeypatch.setattr(build, "fetch", lambda name, folder: folder / name)
    for reader in ("read_declarations", "read_examples"):
        monkeypatch.setattr(build, reader, lambda archive: [])
    monkeypatch.setattr(build, "read_functions", list)
    monkeypatch.setattr(build, "sample", lambda split, *passages: splits[split])
    return build.main(["--work", str(tmp_path), "--out", str(tmp_path)])


def test_a_build_writes_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"calibration": [A], "verification": [B, dataclasses.replace(B, id="3", text="c")]}
    assert build_with(monkeypatch, tmp_path, splits) == 0
    printed = capsys.readouterr().out
    for split, given in splits.items():
        assert (tmp_path / f"{split}.jsonl").read_bytes() == write_lines(given)
        assert texts_sha256(given) in printed


def test_a_build_whose_splits_share_a_text_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"calibration": [A], "verification": [B, dataclasses.replace(A, id="3", text=" A")]}
    assert build_with(monkeypatch, tmp_path, splits) == 1
    assert "belong to the verification set" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_standard_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pins.SHA256, pins.STDLIB, "0" * 64)
    with pytest.raises(InputError, match=pins.PYTHON_VERSION):
        sources.read_functions()


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pins.CLIENTS, pins.UDHR, ("f2rt-no-such-client",))
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        sources.fetch(pins.UDHR, tmp_path)
    assert caught.value.cure


def test_coverage_counts(verification: list[Text]) -> None:
    table = build.coverage(verification)
    assert f"texts                  {len(verification)}" in table
    assert "licences               Apache-2.0" in table
    by_bytes = [line.rsplit(" ", 1)[1] for line in table.splitlines() if " bytes " in line]
    assert sum(map(int, by_bytes)) == len(verification)


def test_readme_states_the_measured_numbers(
    calibration: list[Text], verification: list[Text], tokenizer: Tokenizer
) -> None:
    readme = (ROOT / "calibration/README.md").read_text(encoding="utf-8")
    both = (calibration, verification)

    def row(name: str, values: list[int]) -> str:
        return f"{name} | {' | '.join(f'{value:,}' for value in values)} |"

    expected = [row(kind, [sum(t.kind == kind for t in given) for given in both]) for kind in texts.KINDS]
    expected += [row("texts", [len(given) for given in both])]
    expected += [row("natural languages", [len(natural(given)) for given in both])]
    expected += [row("programming languages", [len(programming(given)) for given in both])]
    expected += [row("bytes of the file", [path.stat().st_size for path in PATHS.values()])]
    lengths = [[len(tokenizer.encode(t.text, add_special_tokens=False).ids) for t in given] for given in both]
    expected += [row("tokens", [sum(min(n, TRAINED_TOKENS) for n in counts) for counts in lengths])]
    bounds = (0, 2, 16, 64, 256, 1_024, 4_096, 8_193, 1_000_000)
    for name, counts in zip(SHA256, lengths, strict=True):
        expected.append(row(name, [sum(low <= n < high for n in counts) for low, high in itertools.pairwise(bounds)]))
        expected.append(SHA256[name])
    sources = {"npm:": "Human Rights", "pypi:": "`tests/examplefiles`", "cpython": "library", "f2rt": "(`edges.py`)"}
    for source, name in sources.items():
        expected.append(row(name, [sum(t.source.startswith(source) for t in given) for given in both]))
    for line in expected:
        assert line in readme, line
    for example in readme.split("```json\n")[1].split("```")[0].splitlines():
        assert "text" in json.loads(example)
