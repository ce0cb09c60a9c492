"""A tiny checkpoint, its texts and its bundle, and the changes that an export has to notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from calibration.texts import calibration_texts, write_lines
from export.cli import app
from runtime.bundle import Bundle, ParityRecord, open_bundle, write_manifest

FP32, FP16, BF16 = "graphs/fp32.onnx", "graphs/fp16.onnx", "graphs/bf16.onnx"
ALL = {FP32, FP16, BF16}
SAME = "nothing it depends on has changed"
VERDICT = ParityRecord("pass", "", "texts", 1, 1.0, 1.0, 0.0, "report", "2026-01-01T00:00:00+00:00")


class Project:
    """A checkpoint, calibration texts and the bundle made from them; the export is the command itself."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        self.texts = folder / "texts.jsonl"
        self.folder = folder / "bundle"
        self.precisions = "fp32,fp16,bf16"
        self.options: list[str] = []

    def export(self) -> dict[str, tuple[str, str]]:
        """Run the command; return per graph or engine file what became of it ("kept", "wrote", "dropped") and why."""
        command = ["export", str(self.checkpoint), "--out", str(self.folder), "--precision", self.precisions]
        if self.texts.exists():
            command += ["--calibration", str(self.texts)]
        done = CliRunner().invoke(app, command + self.options)
        assert done.exit_code == 0, done.output
        found = {}
        for line in done.output.splitlines():
            verb, _, rest = line.partition(" ")
            if verb in ("kept", "wrote", "dropped"):
                file, _, reason = rest.removeprefix(f"{self.folder}/").partition(": ")
                found[file.partition(" (")[0]] = (verb, reason)
        return found

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.folder)

    def prove(self) -> None:
        """Give every engine a verdict, as parity would: what a verdict takes to be kept is what is tested here."""
        bundle = self.bundle
        engines = [replace(e, parity=replace(VERDICT, fingerprint=e.fingerprint)) for e in bundle.manifest.engines]
        (self.folder / "parity").mkdir(exist_ok=True)
        (self.folder / "parity/report.json").write_text("{}")
        write_manifest(self.folder, replace(bundle.manifest, engines=engines))

    def verdicts(self) -> dict[str, bool]:
        return {e.full_name: e.parity is not None for e in self.bundle.manifest.engines}

    def edit_json(self, file: str, **values: object) -> None:
        path = self.checkpoint / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode and times of the folder and everything in it."""
    found = {str(p): p.stat() for p in [folder, *folder.rglob("*")]}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in found.items()}


def change_weight(project: Project) -> None:
    path = project.checkpoint / "model.safetensors"
    tensors = {key: np.array(value) for key, value in load_file(path).items()}
    tensors["layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_texts(project: Project) -> None:
    project.texts.write_bytes(write_lines(calibration_texts()[:21]))


def change_tokenizer(project: Project) -> None:
    path = project.checkpoint / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def change_prompt(project: Project) -> None:
    project.edit_json("config_sentence_transformers.json", prompts={"query": "Q: ", "document": ""})


def shorten(project: Project) -> None:
    project.edit_json("sentence_bert_config.json", max_seq_length=100)


def change_theta(project: Project) -> None:
    path = project.checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(config).replace(json.dumps(1e6), json.dumps(2e6))
    assert "2000000.0" in text
    path.write_text(text, encoding="utf-8")


def change_config_for_others(project: Project) -> None:
    project.edit_json("config.json", _name_or_path="somewhere")


def change_card(project: Project) -> None:
    (project.checkpoint / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
