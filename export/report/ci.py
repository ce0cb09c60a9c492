"""The verdict for CI systems: JUnit XML, where each threshold is a test, and GitHub's annotations."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from export.report.data import EngineReport, ParityReport
from export.report.words import broken, broken_graphs, number, value_of

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: ParityReport) -> bytes:
    """Return JUnit XML: a suite per engine, a case per threshold; an engine that was not executed is skipped.

    Graphs that would fail on a GPU are cases of a suite of their own.
    """
    root = ET.Element("testsuites", name="f2rt parity", time=str(report.duration_s))
    for engine in report.engines:
        cases = _cases(engine)
        failures = sum(case.find("failure") is not None for case in cases)
        skipped = sum(case.find("skipped") is not None for case in cases)
        suite = ET.SubElement(
            root,
            "testsuite",
            name=engine.engine,
            tests=str(len(cases)),
            failures=str(failures),
            errors="0",
            skipped=str(skipped),
            timestamp=engine.checked_at,
        )
        properties = ET.SubElement(suite, "properties")
        for name, value in (
            ("fingerprint", engine.fingerprint),
            ("policy", engine.policy_sha256),
            ("texts", engine.texts_sha256),
        ):
            ET.SubElement(properties, "property", name=name, value=value)
        suite.extend(cases)
    lost = broken_graphs(report.stages, (e.precision for e in report.engines))
    if lost:
        suite = ET.SubElement(
            root, "testsuite", name="graphs", tests=str(len(lost)), failures=str(len(lost)), errors="0"
        )
        for stage in lost:
            found = ET.SubElement(suite, "testcase", classname="parity.graphs", name=stage.name)
            ET.SubElement(found, "failure", message=_clean(broken(stage)))
    ET.indent(root)
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _cases(engine: EngineReport) -> list[ET.Element]:
    def case(name: str) -> ET.Element:
        return ET.Element("testcase", classname=f"parity.{engine.engine}", name=name)

    if engine.verdict == "not_executed":
        found = case("executed")
        ET.SubElement(found, "skipped", message=_clean(engine.reason))
        return [found]
    cases = []
    for threshold in engine.thresholds:
        found = case(threshold.name)
        if threshold.verdict == "fail":
            text = f"{value_of(threshold)}, allowed {threshold.sense} {number(threshold.limit)}"
            ET.SubElement(found, "failure", message=_clean(text)).text = _clean(
                "\n".join([threshold.where, *engine.diagnosis])
            )
        cases.append(found)
    # A failure that no threshold shows: it did not load, or did not run.
    if engine.verdict == "fail" and not any(t.verdict == "fail" for t in engine.thresholds):
        found = case("runs")
        causes = [*engine.diagnosis, *(p for c in engine.checks for p in c.problems)]
        ET.SubElement(found, "failure", message=_clean("; ".join(causes)))
        cases.append(found)
    return cases


def _clean(text: str) -> str:
    """Drop what XML 1.0 cannot hold: a text's control characters may come along in a message."""
    return _NOT_XML.sub("", text)


def github_annotations(report: ParityReport) -> list[str]:
    """Return GitHub workflow commands: errors for broken limits and graphs, notices for engines not executed."""
    lines = []
    for engine in report.engines:
        title = f"parity of {engine.engine}"
        if engine.verdict == "not_executed":
            lines.append(_command("notice", title, engine.reason))
        for threshold in engine.thresholds:
            if threshold.verdict == "fail":
                text = f"{threshold.name} is {value_of(threshold)}, allowed {threshold.sense} {number(threshold.limit)}"
                lines.append(_command("error", title, f"{text} ({threshold.where})" if threshold.where else text))
        lines += [_command("error", title, f"likely cause: {cause}") for cause in engine.diagnosis]
    lost = broken_graphs(report.stages, (e.precision for e in report.engines))
    lines += [_command("error", f"parity of the {stage.name}", broken(stage)) for stage in lost]
    lines += [_command("error", "tokenizer", f"{m.id}: {m.explanation}") for m in report.tokenizer_mismatches[:5]]
    return lines


def _command(kind: str, title: str, message: str) -> str:
    """Escape as GitHub's toolkit does: % and line ends in a message, and : and , besides in a property."""
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={name}::{data}"
