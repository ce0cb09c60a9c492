"""The report in each of its forms, on a real comparison, and in a real browser; the gate on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from calibration.texts import Text, calibration_texts, verification_texts, write_lines
from export.cli import app
from export.prove import prove_bundle
from export.recorded import RecordedReference
from export.report.ci import github_annotations, to_junit
from export.report.data import ParityReport, Threshold, schema, to_json
from export.report.html import to_html
from export.report.markdown import to_markdown
from export.report.words import headline, value_of
from runtime.bundle import Bundle, open_bundle
from runtime.policy import Policy
from runtime.tolerances import TOLERANCES
from tests.browser import look, needs_chromium

ROOT = Path(__file__).parent.parent
GITHUB_LIMIT_CHARS = 65_536


def some_texts() -> list[Text]:
    """Docstrings with their code, articles, titles and edge cases: the labelled sets are there, in small."""
    shipped = verification_texts()
    texts = [t for t in shipped if len(t.text) < 400]
    pairs = [t for t in shipped if t.id.startswith("stdlib/") and len(t.text) < 700]
    ids = {t.id for t in pairs}
    whole = [name for name in sorted(ids) if f"{name}?" in ids][:15]
    both = [t for t in pairs if t.id.removesuffix("?") in whole]
    return both + [t for t in texts if t.id.startswith("udhr/")][::12] + [t for t in texts if t.kind == "edge"][::6]


@pytest.fixture(scope="module")
def proven(narrow_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParityReport]:
    """A bundle with fp32, fp16 and bf16 and its report. Read only."""
    folder = Path(shutil.copytree(narrow_bundle.folder, tmp_path_factory.mktemp("report") / "mini"))
    return folder, prove_bundle(folder, some_texts())


@pytest.fixture(scope="module")
def report(proven: tuple[Path, ParityReport]) -> ParityReport:
    return proven[1]


@pytest.fixture(scope="module")
def failing(report: ParityReport) -> ParityReport:
    """The same report had fp16 broken a limit, with texts in it that no format likes."""
    nasty = 'a <script>alert("x")</script> | b\n`c` & \x1b[31m'
    fp32, fp16, *others = report.engines
    broken = Threshold("min cosine", 0.5, ">=", 0.9995, "fail", nasty)
    fp16 = dataclasses.replace(
        fp16,
        verdict="fail",
        thresholds=[broken, *fp16.thresholds[1:]],
        diagnosis=[nasty],
        worst=[dataclasses.replace(fp16.worst[0], excerpt=nasty, command=nasty), *fp16.worst[1:]],
    )
    return dataclasses.replace(report, verdict="fail", engines=[fp32, fp16, *others])


def test_the_report_says_what_was_asked_of_it(report: ParityReport) -> None:
    fp32, fp16 = report.engines[:2]
    assert report.verdict == fp32.verdict == fp16.verdict == "pass"
    assert {p.by for p in fp16.parts} == {"family", "script", "length", "kind", "prompt"}
    assert all(
        sum(p.rows for p in fp16.parts if p.by == by) == len(some_texts()) for by in ("family", "script", "kind")
    )
    assert fp16.spread is not None
    assert sum(fp16.spread.counts) == len(some_texts())
    assert len(fp16.worst) == 20
    assert [w.cosine for w in fp16.worst] == sorted(w.cosine for w in fp16.worst)
    assert fp16.tasks is not None
    assert {r.name for r in fp16.tasks.retrieval} >= {"docstring to code"}
    assert fp16.tasks.top10_overlap > 0.99
    assert fp16.made is not None
    assert fp16.made.fingerprint == fp16.fingerprint
    assert report.policy.sha256 == fp16.policy_sha256 == Policy().sha256
    assert {"fp32 graph", "fp16 graph"} <= {s.name for s in report.stages}
    assert report.activations
    assert sum(report.coverage.by_script.values()) == report.coverage.texts
    assert {t.name for t in fp16.thresholds} > {"min cosine", "top-10 overlap", "texts also calibrated on"}


def test_json_is_what_the_published_schema_says(report: ParityReport) -> None:
    published = json.loads((ROOT / "export/report/schema.json").read_text(encoding="utf-8"))
    assert published == schema(), "run: f2rt parity --print-schema > export/report/schema.json"
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(to_json(report))
    jsonschema.Draft202012Validator(published).validate(document)
    del document["engines"][0]["fingerprint"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(published).validate(document)


def test_a_report_survives_its_json(report: ParityReport) -> None:
    back = msgspec.json.decode(to_json(report), type=ParityReport)
    assert to_html(back) == to_html(report)
    assert to_markdown(back) == to_markdown(report)


def test_the_page_is_one_file_and_escapes_what_texts_hold(failing: ParityReport) -> None:
    page = to_html(failing)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert all(
        a.startswith(("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/")) for a in addresses
    )
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert page.count("<svg") >= 7
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


@needs_chromium
@pytest.mark.parametrize("which", ["report", "failing"])
def test_a_browser_shows_it_without_a_fault(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    shown: ParityReport = request.getfixturevalue(which)
    page = tmp_path / "report.html"
    page.write_text(to_html(shown), encoding="utf-8")
    views = look(page, tmp_path / "screenshots")
    assert {(v.theme, v.width) for v in views} == {("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)}
    for view in views:
        assert view.faults == []
        assert view.text.lstrip().startswith("PASS" if shown.verdict == "pass" else "FAIL")
        assert headline(shown) in view.text
        assert len(view.svgs) >= 7
        assert all(s.width > 200 and s.height > 80 and s.shapes > 5 and s.texts > 4 for s in view.svgs)
    backgrounds = {v.theme: v.background for v in views}
    assert backgrounds["light"] != backgrounds["dark"]


def test_markdown_fits_a_pull_request_comment_and_its_tables_hold(failing: ParityReport) -> None:
    text = to_markdown(failing)
    assert len(text) < GITHUB_LIMIT_CHARS / 4
    assert text.startswith("## ❌ FAIL")
    assert "found 0.5, allowed >= 0.9995" in text
    assert "<script" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_junit_shows_each_threshold_as_a_test(failing: ParityReport) -> None:
    root = ET.fromstring(to_junit(failing))
    suites = {s.get("name"): s for s in root}
    fp32, fp16 = suites["onnxruntime:fp32"], suites["onnxruntime:fp16"]
    assert fp32.get("failures") == "0"
    assert fp32.get("tests") == str(len(failing.engines[0].thresholds))
    assert fp16.get("failures") == "1"
    (failure,) = fp16.iter("failure")
    assert failure.get("message") == "0.5, allowed >= 0.9995"
    fingerprint = next(p.get("value") for p in fp16.iter("property") if p.get("name") == "fingerprint")
    assert fingerprint == failing.engines[1].fingerprint
    idle = dataclasses.replace(failing.engines[0], verdict="not_executed", reason="no GPU", thresholds=[], checks=[])
    (suite,) = ET.fromstring(to_junit(dataclasses.replace(failing, engines=[idle])))
    assert suite.get("skipped") == "1"


def test_an_engine_that_fails_without_a_broken_threshold_is_a_failure_in_junit(report: ParityReport) -> None:
    lost = dataclasses.replace(
        report.engines[0], verdict="fail", checks=[], thresholds=[], diagnosis=["it cannot be loaded: x"]
    )
    (suite,) = ET.fromstring(to_junit(dataclasses.replace(report, engines=[lost])))
    assert suite.get("failures") == "1"


def test_annotations_keep_to_one_line_each(failing: ParityReport) -> None:
    lines = github_annotations(failing)
    assert all("\n" not in line for line in lines)
    assert any(
        line.startswith("::error title=parity of onnxruntime%3Afp16::min cosine is 0.5, allowed >= 0.9995")
        for line in lines
    )
    assert "%0A" in "".join(lines)


def test_the_headline_counts_what_it_says(report: ParityReport, failing: ParityReport) -> None:
    assert headline(report).startswith("2 engines within every limit")
    assert "1 engine outside the limits: onnxruntime:fp16" in headline(failing)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "unknown"), (0.9999999, "1 - 1.0e-07"), (0.97, "0.97"), (0.5, "0.5")]
)
def test_cosines_near_one_are_shown_as_their_distance(value: float | None, shown: str) -> None:
    assert value_of(Threshold("min cosine", value, ">=", 0.9, "pass")) == shown


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    texts = some_texts()[::8]
    monkeypatch.setattr("calibration.texts.verification_texts", lambda: list(texts))
    return texts


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["parity", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.usefixtures("few")
def test_a_stricter_policy_fails_the_engine_everywhere_and_a_looser_one_lifts_it(
    bundle_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text('name = "strict"\n[fp32]\nmax_abs_diff = 1e-9\n')
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    status, output = run(bundle_copy.folder, "--policy", strict, "--report-dir", tmp_path / "out")
    assert status == 1
    assert "::error title=parity of onnxruntime%3Afp32::max |diff| is" in output
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("## ❌ FAIL")
    files = {p.name for p in (bundle_copy.folder / "parity").iterdir()}
    assert files == {"report.json", "report.html", "report.md", "junit.xml"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    assert ET.parse(bundle_copy.folder / "parity/junit.xml").getroot().find(".//failure") is not None
    (engine,) = open_bundle(bundle_copy.folder).manifest.engines
    assert engine.parity is not None
    assert engine.parity.verdict == "fail"
    status, output = run(bundle_copy.folder)
    assert status == 0
    (engine,) = open_bundle(bundle_copy.folder).manifest.engines
    assert engine.parity is not None
    assert (engine.parity.verdict, engine.parity.policy_sha256) == ("pass", Policy().sha256)
    looser = tmp_path / "looser.toml"
    looser.write_text("[int8]\nmin_cosine = 0.5\n")
    assert "comparing onnxruntime:fp32: the policy changed" in run(bundle_copy.folder, "--policy", looser)[1]


@pytest.mark.usefixtures("few")
def test_quick_and_only_record_nothing(bundle_copy: Bundle, few: list[Text]) -> None:
    before = {p: p.stat().st_mtime_ns for p in bundle_copy.folder.rglob("*")}
    status, output = run(bundle_copy.folder, "--quick")
    assert status == 0
    assert "nothing was recorded" in output
    status, output = run(bundle_copy.folder, "--only", few[2].id)
    assert status == 0
    assert "1 texts" in output
    assert {p: p.stat().st_mtime_ns for p in bundle_copy.folder.rglob("*")} == before
    status, output = run(bundle_copy.folder, "--only", "nobody")
    assert status != 0
    assert "no text has the id 'nobody'" in output


def test_the_policy_is_printed_as_a_file_it_takes(tmp_path: Path) -> None:
    from runtime.policy import read_policy

    status, _ = run("--print-policy")
    printed = CliRunner().invoke(app, ["parity", "--print-policy"]).output
    assert status == 0
    (tmp_path / "p.toml").write_text(printed)
    assert read_policy(tmp_path / "p.toml").sha256 == Policy().sha256


def test_texts_that_were_calibrated_on_fail_the_engine_by_name(narrow_copy: Bundle) -> None:
    """Even changed in case and spaces: two texts that count as the same are the same."""
    used = next(t for t in calibration_texts() if len(t.text) < 300 and t.text != t.text.upper())
    texts = [*some_texts()[::10], dataclasses.replace(used, id="mine", text=f"  {used.text.upper()}")]
    report = prove_bundle(narrow_copy.folder, texts, engine_names=["onnxruntime:fp16", "onnxruntime:fp32"])
    by_name = {e.engine: e for e in report.engines}
    assert by_name["onnxruntime:fp32"].verdict == "pass"
    assert by_name["onnxruntime:fp16"].verdict == "fail"
    (broken,) = [t for t in by_name["onnxruntime:fp16"].thresholds if t.verdict == "fail"]
    assert (broken.name, broken.value) == ("texts also calibrated on", 1.0)
    record = open_bundle(narrow_copy.folder).engine("onnxruntime:fp16").parity
    assert record is not None
    assert record.calibration_overlap == 1


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([Text("a", "x"), Text("b", " \n")], "1 of 2 texts are empty, the first is 'b'"),
        ([Text("a", "x"), Text("b", "y"), Text("c", "x")], "1 of 3 texts repeat another with the same prompt"),
        ([Text("edge/one-letter", "quite new")], "the id 'edge/one-letter' is that of a shipped text"),
        ([dataclasses.replace(verification_texts()[0], id="mine")], "the same as"),
    ],
)
def test_own_texts_that_say_less_than_they_seem_are_refused(
    bundle: Bundle, tmp_path: Path, lines: list[Text], expected: str
) -> None:
    (tmp_path / "own.jsonl").write_bytes(write_lines(lines))
    status, output = run(bundle.folder, "--texts", tmp_path / "own.jsonl")
    assert status == 2
    assert expected in output


def test_the_same_text_under_two_prompts_is_two_texts(tmp_path: Path) -> None:
    from export.own_texts import read_own_texts

    (tmp_path / "own.jsonl").write_bytes(write_lines([Text("a", "x", prompt="query"), Text("b", "x")]))
    assert len(read_own_texts(tmp_path / "own.jsonl", verification_texts())) == 2


def test_texts_in_another_encoding_are_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes("größer\n".encode("latin-1"))
    status, output = run(bundle.folder, "--texts", tmp_path / "own.txt")
    assert status == 2
    assert "is not UTF-8" in output


def test_an_edited_report_is_noticed_and_made_again(bundle_copy: Bundle, few: list[Text]) -> None:
    prove_bundle(bundle_copy.folder, few)
    path = bundle_copy.folder / "parity/report.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"pass"', '"fail"', 1), encoding="utf-8")
    told: list[str] = []
    prove_bundle(bundle_copy.folder, few, tell=told.append)
    assert any("parity/report.json is missing, was changed" in line for line in told)


def test_layer_states_are_recorded_like_vectors(proven: tuple[Path, ParityReport]) -> None:
    """The second comparison needs no PyTorch, stages included."""
    from export.prove import source_location

    folder, _ = proven
    bundle = open_bundle(folder)
    with RecordedReference(source_location(bundle, None), bundle.manifest.source) as reference:
        assert bundle.manifest.golden is not None
        from runtime import golden

        states = [reference.layer_states(ids) for ids in golden.load(bundle).ids]
        assert states[0].shape == (5, 256)
        assert reference._model is None


def test_tolerances_hold_what_the_gate_needs() -> None:
    assert TOLERANCES["int8"].top10_overlap == 0.9
    assert {t.retrieval_loss_points for t in TOLERANCES.values()} == {1.0}
