"""The committed text sets: what they hold, where it is from, and that the two share nothing. Offline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from calibration import texts
from calibration.texts import (
    Text,
    calibration_path,
    check_disjoint,
    normalized,
    texts_sha256,
    verification_path,
    write_lines,
)

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


def test_normalizing_twice_changes_nothing(given: list[Text]) -> None:
    for text in given:
        assert normalized(normalized(text.text)) == normalized(text.text), text.id


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
