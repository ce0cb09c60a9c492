"""How the splits are built: the sides, the samples, the sources, and the command that writes them. Offline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from calibration import build, edges, pins, sampling, sources
from calibration.sources import Passage
from calibration.texts import Text, normalized, texts_sha256, write_lines
from runtime.errors import InputError
from tests.texts import A, B, check


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
