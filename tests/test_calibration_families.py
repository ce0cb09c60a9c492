"""The committed table of language families, its lookup, and the command that writes it. Offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration import families, glottolog, pins
from calibration.families import CONSTRUCTED, ISOLATE, NOT_A_LANGUAGE, UNKNOWN, families_path, family_of, parse_families
from calibration.texts import calibration_texts, verification_texts

ROOT = Path(__file__).parents[1]
README = (ROOT / "calibration/README.md").read_text(encoding="utf-8")
SPECIAL = {"und", "mul", "zxx"}
COLUMNS = "ID,Name,ISO639P3code,Level,Family_ID\n"


def table() -> dict[str, str]:
    return parse_families(families_path().read_text(encoding="utf-8"))


def natural_languages() -> set[str]:
    texts = [*verification_texts(), *calibration_texts()]
    return {text.language for text in texts if text.kind != "code"} - SPECIAL


def test_every_natural_language_of_both_sets_has_a_family() -> None:
    languages = natural_languages()
    assert len(languages) > 400
    assert [code for code in sorted(languages) if family_of(code) in (UNKNOWN, NOT_A_LANGUAGE)] == []


@pytest.mark.parametrize(
    ("family", "codes"),
    [
        ("Indo-European", "eng deu fra hin rus fas pes ell hye sqi lav nep nor yid"),
        ("Uralic", "fin hun ekk est"),
        ("Turkic", "tur azj aze uzn uzb"),
        ("Atlantic-Congo", "swh swa yor zul kon ful"),
        ("Afro-Asiatic", "arb ara heb amh hau orm"),
        ("Sino-Tibetan", "cmn zho yue mya bod"),
        ("Austronesian", "ind msa mlg plt tgl haw"),
        ("Mongolic-Khitan", "mon khk"),
        ("Quechuan", "que quz"),
        ("Japonic", "jpn"),
        ("Koreanic", "kor"),
        ("Dravidian", "tam tel"),
        ("Indo-European", "hat tpi bis jam"),  # creoles
        (ISOLATE, "eus auc pbb"),
        (ISOLATE, "bqe"),  # a dialect of Basque with a code
        ("Haida", "hai"),  # a family with a code
        (CONSTRUCTED, "epo ina ido"),
        ("Sign Language", "ase"),
        (UNKNOWN, "xxx eng-US english python Eng"),
        (NOT_A_LANGUAGE, "und mul zxx"),
    ],
)
def test_spot_checks(family: str, codes: str) -> None:
    assert {code: family_of(code) for code in codes.split()} == dict.fromkeys(codes.split(), family)


def test_no_code_is_unknown_and_the_table_does_not_name_the_special_groups() -> None:
    assert family_of("") == UNKNOWN
    assert not {UNKNOWN, NOT_A_LANGUAGE} & set(table().values())
    assert not SPECIAL & set(table())


def test_a_macrolanguage_is_of_the_family_of_its_language() -> None:
    assert len(pins.MACROLANGUAGES) == 31
    for code, member in pins.MACROLANGUAGES.items():
        assert family_of(code) == family_of(member) != UNKNOWN, code


def test_the_table_is_sorted_and_names_nothing_twice() -> None:
    lines = [line for line in families_path().read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = [line.split("\t") for line in lines]
    names = [name for name, _ in rows]
    assert names == sorted(set(names))
    codes = [codes.split(" ") for _, codes in rows]
    assert all(row == sorted(row) for row in codes)
    every = [code for row in codes for code in row]
    assert len(every) == len(set(every))
    assert all(len(code) == 3 and code.isascii() and code.islower() for code in every)


def test_the_table_is_as_the_command_writes_it_and_small() -> None:
    data = families_path().read_bytes()
    assert data == glottolog.write_families(table())
    assert len(data) < 100_000


def test_source_and_licence_are_named() -> None:
    head = families_path().read_text(encoding="utf-8").split("\nAbkhaz")[0]
    licence = ROOT / f"calibration/licences/glottolog-{pins.LICENCES[pins.GLOTTOLOG]}.txt"
    assert licence.read_text(encoding="utf-8").startswith("Attribution 4.0 International")
    for text in (head, README):
        assert "Glottolog 5.1" in text
        assert "CC BY 4.0" in text
        assert "https://glottolog.org" in text
    assert licence.name in README


def test_readme_states_the_measured_numbers() -> None:
    languages = natural_languages()
    assert f"{len(table()):,} codes in {len(set(table().values()))} groups" in README
    assert f"{len(languages)} codes of {len(set(map(family_of, languages)))} of them" in README


def test_what_is_read_of_glottolog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glottolog, "MACROLANGUAGES", {"mac": "aaa"})
    path = tmp_path / "languages.csv"
    rows = (
        "fam1,Family,,family,",
        "lan1,One,aaa,language,fam1",
        "dia1,A dialect,bbb,dialect,fam1",
        "fam2,A branch,ccc,family,fam1",
        "lan2,No code,,language,fam1",
        "fam3,Own code,ddd,family,",
        "iso1,Alone,eee,language,",
        "dia2,Of one alone,fff,dialect,iso1",
        "boo1,Bookkeeping,,family,",
        "lan3,Retired,ggg,language,boo1",
        "art1,Artificial Language,,family,",
        "lan4,Made,hhh,language,art1",
    )
    path.write_text(COLUMNS + "\n".join(rows) + "\n", encoding="utf-8")
    found = glottolog.read_families(path)
    family = dict.fromkeys(("aaa", "bbb", "ccc", "mac"), "Family")
    assert found == family | {"ddd": "Own code", "eee": ISOLATE, "fff": ISOLATE, "hhh": CONSTRUCTED}
    written = glottolog.write_families(found).decode()
    assert written.endswith("Constructed\thhh\nFamily\taaa bbb ccc mac\nIsolate\teee fff\nOwn code\tddd\n")
    assert parse_families(written) == found


def test_the_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / pins.GLOTTOLOG
    source.write_text(COLUMNS + "iso1,Alone,eee,language,\n", encoding="utf-8")
    monkeypatch.setattr(glottolog, "fetch", lambda name, folder: folder / name)
    monkeypatch.setattr(glottolog, "MACROLANGUAGES", {})
    assert glottolog.main(["--work", str(tmp_path), "--out", str(tmp_path)]) == 0
    written = tmp_path / "families.tsv"
    assert parse_families(written.read_text(encoding="utf-8")) == {"eee": ISOLATE}
    assert f"{written.stat().st_size} bytes, 1 codes, 1 families" in capsys.readouterr().out


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / pins.GLOTTOLOG).write_bytes(b"something else")
    out = tmp_path / "out"
    assert glottolog.main(["--work", str(tmp_path), "--out", str(out)]) == 1
    assert pins.SHA256[pins.GLOTTOLOG] in capsys.readouterr().err
    assert not out.exists()


def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family_of("eng")
    monkeypatch.setattr(families, "families_path", lambda: Path("no-such-table"))
    assert family_of("fin") == "Uralic"
