"""The probe measures what the stock model computes, resumes wherever it was cut, and knows its cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.statistics import percentiles_of
from export.checkpoint import Checkpoint
from export.lock import Wait, bundle_lock
from export.probe import probe
from export.reference import Reference
from runtime.bundle import Bundle
from runtime.errors import InputError, OutputError
from tests.serving import ROOT

SEQUENCES = [[11, 12, 13, 15986], [200, 15986], [*list(range(300, 340)), 15986]]


class CutError(Exception):
    pass


def test_maxima_are_those_of_the_stock_model(
    bundle: Bundle, checkpoint: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    statistics = probe(bundle.path("graphs/fp32.onnx"), "x", checkpoint.config, SEQUENCES, cache=tmp_path)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in reference._model.named_modules():
        if name.endswith(("_proj", "embed_tokens", "layernorm")):
            hooks.append(module.register_forward_hook(lambda m, i, o, n=name: seen.setdefault(n, []).append(o[0])))
    for ids in SEQUENCES:
        reference.hidden(ids)
    for hook in hooks:
        hook.remove()
    # In the last layer the graph computes some of these for the pooled token only.
    for name in [n for n in seen if not n.startswith("layers.3.")]:
        expected = torch.cat(seen[name]).abs().amax(dim=0).numpy()
        np.testing.assert_allclose(statistics.absmax(name), expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert statistics.tokens == sum(map(len, SEQUENCES))


@pytest.mark.parametrize("cut", ["embed_tokens", "layer 0", "layer 2", "layer 3", "the end"])
def test_interrupted_probe_resumes(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.path("graphs/fp32.onnx")
    whole = probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path / "whole")
    labels: list[str] = []

    def strike(label: str, done: int, total: int) -> None:
        if label == f"probe: {cut}" and done == 1:
            raise CutError

    with monkeypatch.context() as patch:
        if cut == "the end":  # all layers are done, the result is not written

            def fail(parts: object) -> None:
                raise CutError

            patch.setattr("export.probe.merge", fail)
        with pytest.raises(CutError):
            probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path / "cut", progress=strike)
    again = probe(
        graph,
        "x",
        checkpoint.config,
        SEQUENCES,
        cache=tmp_path / "cut",
        progress=lambda label, *_: labels.append(label),
    )
    assert whole.largest.keys() == again.largest.keys()
    for name, values in whole.largest.items():
        np.testing.assert_array_equal(values, again.largest[name])
    finished = {"layer 2": "probe: layer 1", "layer 3": "probe: layer 2", "the end": "probe: layer 3"}
    if cut in finished:
        assert finished[cut] not in labels  # it went on, it did not begin again
    labels.clear()
    probe(
        graph,
        "x",
        checkpoint.config,
        SEQUENCES,
        cache=tmp_path / "cut",
        progress=lambda label, *_: labels.append(label),
    )
    assert labels == []  # the second time it is read from the cache


@pytest.mark.parametrize("damaged", ["statistics.npz", "rows/layers.1.mlp.gated.npz", "rows"])
def test_what_is_damaged_in_the_cache_is_measured_again(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path, damaged: str
) -> None:
    graph = bundle.path("graphs/fp32.onnx")
    whole = probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path)
    (folder,) = (tmp_path / "probe").iterdir()
    path = folder / damaged
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    again = probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path)
    for name, values in whole.largest.items():
        np.testing.assert_array_equal(values, again.largest[name])
    assert again.rows("layers.1.mlp.gated").sampled.shape == whole.rows("layers.1.mlp.gated").sampled.shape


@pytest.mark.parametrize("damaged", ["1.npz", "1.streams.npy"])
def test_what_an_interrupted_probe_left_damaged_is_measured_again(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path, damaged: str
) -> None:
    def strike(label: str, done: int, total: int) -> None:
        if label == "probe: layer 2":
            raise CutError

    graph = bundle.path("graphs/fp32.onnx")
    with pytest.raises(CutError):
        probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path, progress=strike)
    (folder,) = (tmp_path / "probe").iterdir()
    path = folder / "layers" / damaged
    path.write_bytes(path.read_bytes()[:50])
    assert probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path).tokens == sum(map(len, SEQUENCES))
    assert not (folder / "layers").exists()


def test_other_texts_or_weights_are_another_probe(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    graph = bundle.path("graphs/fp32.onnx")
    for sha256, sequences in (("x", SEQUENCES), ("y", SEQUENCES), ("x", SEQUENCES[:2])):
        probe(graph, sha256, checkpoint.config, sequences, cache=tmp_path)
    assert len(list((tmp_path / "probe").iterdir())) == 3
    with pytest.raises(InputError, match="no calibration texts"):
        probe(graph, "x", checkpoint.config, [], cache=tmp_path)


def test_percentiles_are_those_of_each_channels_magnitudes() -> None:
    rows = np.random.default_rng(0).permuted(np.arange(-500, 500, dtype=np.float32)[:, None] * [1, -2, 0], axis=0)
    median, high, highest = percentiles_of(rows.astype(np.float32))
    np.testing.assert_allclose(median, [250, 500, 0], atol=2)
    np.testing.assert_allclose(high, [495, 990, 0], atol=2)
    np.testing.assert_allclose(highest, [499, 999, 0], atol=2)


def test_percentiles_come_from_the_texts(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    statistics = probe(bundle.path("graphs/fp32.onnx"), "x", checkpoint.config, SEQUENCES, cache=tmp_path)
    for name, values in statistics.percentiles.items():
        assert (np.diff(values, axis=0) >= 0).all(), name
        assert (values <= statistics.absmax(name) * 1.01 + 1e-6).all(), name
        assert values.max() > 0, name


WAITING = """
import sys, time
from pathlib import Path
from export.checkpoint import Checkpoint
from export.hub import locate
from export.lock import Wait
from export.lock import Wait, bundle_lock
from export.probe import probe
graph, model, cache, slow = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "slow"
def progress(label, done, total):
    print(label, flush=True)
    while slow and label == "probe: layer 1" and not (cache / "go on").exists():
        time.sleep(0.02)
config = Checkpoint.open(locate(model)).config
sequences = [[11, 12, 13, 15986], [200, 15986]]
wait = Wait(120, lambda line: print(line, flush=True))
probe(graph, "x", config, sequences, cache=cache, progress=progress, wait=wait)
print("done", flush=True)
"""


def test_the_second_of_two_at_once_waits_and_reads_what_the_first_found(
    bundle: Bundle, mini: Path, tmp_path: Path
) -> None:
    def start(pace: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WAITING, str(bundle.path("graphs/fp32.onnx")), str(mini), str(tmp_path), pace]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start("slow")
    assert first.stdout is not None
    while (line := first.stdout.readline()) != "probe: layer 1\n":
        assert line, first.wait()
    second = start("fast")
    assert second.stdout is not None
    told = second.stdout.readline()
    (tmp_path / "go on").touch()
    rest = second.communicate(timeout=120)[0]
    assert first.communicate(timeout=120)[0].endswith("done\n")
    assert told.startswith(f"waiting for f2rt export (process {first.pid} on "), told + rest
    assert "which is measuring activations for " in told
    assert rest == "done\n"
    (folder,) = (tmp_path / "probe").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["rows", "statistics.npz"]


def test_what_is_finished_is_read_from_a_cache_that_another_holds(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    graph = bundle.path("graphs/fp32.onnx")
    probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path)
    (folder,) = (tmp_path / "probe").iterdir()
    with bundle_lock(folder, "a test"):
        probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path, wait=Wait(0))
        (folder / "statistics.npz").unlink()
        with pytest.raises(OutputError, match=r"probe/.* is being changed by a test .*waited 0 s"):
            probe(graph, "x", checkpoint.config, SEQUENCES, cache=tmp_path, wait=Wait(0))


def test_cache_that_cannot_be_written_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(OutputError, match=r"f2rt's cache: cannot write .*point F2RT_CACHE to another folder"):
        probe(tmp_path / "no graph", "x", checkpoint.config, SEQUENCES, cache=tmp_path / "cache")
