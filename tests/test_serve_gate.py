"""The gate as a deployment meets it: policies at start and reload, unverified engines that say so, poison requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import golden
from runtime.bundle import Bundle, open_bundle, record_file, write_manifest
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.errors import BundleError, EngineError, InputError
from runtime.gate import Gate
from runtime.policy import Policy, read_policy, to_toml
from runtime.serving import watch
from runtime.tokenizer import TokenizedText
from runtime.tolerances import TOLERANCES
from tests.bundles import edit_engines, edit_verdicts, without_golden
from tests.serving import START_S, ServerProcess, f2rt
from tests.serving_in_process import InProcess, held, wait_until

LOOSE = Policy("loose", dict(TOLERANCES) | {"fp32": replace(TOLERANCES["fp32"], min_cosine=0.9)})
NEVER = "never compared with PyTorch"
STAND_IN = "its own first vectors (a stand-in)"


def loose_file(folder: Path) -> Path:
    path = folder / "loose.toml"
    path.write_text(to_toml(LOOSE))
    return path


def unproven(folder: Path) -> Bundle:
    return edit_engines(folder, lambda e: replace(e, parity=None))


def info_over_http(server: ServerProcess) -> dict[str, Any]:
    (model,) = httpx.get(f"http://{server.http}/info").json()["models"]
    return dict(model)


def metric(server: ServerProcess) -> str:
    text = httpx.get(f"http://{server.http}/metrics").text
    assert "# HELP f2rt_engine_unverified 1 while" in text
    (line,) = re.findall(r"^f2rt_engine_unverified\{.*$", text, re.M)
    return str(line)


# --- unverified engines in a real process


def test_an_unverified_engine_that_is_allowed_says_so_everywhere(bundle_copy: Bundle, bundle: Bundle) -> None:
    folder = bundle_copy.folder
    unproven(folder)
    refused = f2rt("serve", str(folder), "--grpc", "127.0.0.1:0")
    assert refused.returncode == 2
    assert NEVER in refused.stderr.decode()
    with ServerProcess(folder, "--allow-unverified", http=True) as server, server.client() as client:
        warning = f"is answered by an unverified engine, onnxruntime:fp32: {NEVER}"
        assert warning in server.wait_for_line("WARNING.*unverified")
        assert f"(unverified: {NEVER}) on " in server.wait_for_line("serving .* on .*fingerprint")
        assert client.embed(["a"]).fingerprint == server.fingerprint
        info = client.info()
        assert (info.unverified, info.policy_sha256, info.verdict) == (NEVER, Policy().sha256, "")
        shown = info_over_http(server)
        assert (shown["unverified"], shown["policy_sha256"]) == (NEVER, Policy().sha256)
        assert metric(server) == 'f2rt_engine_unverified{engine="onnxruntime:fp32",model="bundle"} 1.0'
        # Every reload says it again.
        client.reload()
        wait_until(lambda: sum(warning in line for line in server.log) == 2)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(warning in line for line in server.log) == 3)
        # Proven meanwhile: a reload clears it.
        edit_engines(folder, lambda e: replace(e, parity=bundle.manifest.engines[0].parity))
        client.reload()
        assert client.info().unverified == info_over_http(server)["unverified"] == ""
        assert metric(server).endswith(" 0.0")
        assert server.stop() == 0
        assert sum(warning in line for line in server.log) == 3


def test_without_golden_vectors_the_log_names_the_stand_in(bundle_copy: Bundle) -> None:
    without_golden(bundle_copy.folder)
    with ServerProcess(bundle_copy.folder, "--allow-unverified") as server, server.client() as client:
        assert STAND_IN in server.wait_for_line("smallest cosine")
        assert "no golden vectors, so it is compared with its own first ones alone" in server.wait_for_line("WARNING")
        assert "no golden vectors" in client.info().unverified
        assert client.info().golden_cosine > 0.99999
        client.embed(["a"])


def test_check_and_embed_say_it_too(bundle_copy: Bundle) -> None:
    folder = str(unproven(bundle_copy.folder).folder)
    done = f2rt("serve", folder, "--check", "--allow-unverified")
    assert done.returncode == 0, done.stderr.decode()
    assert f"bundle (unverified: {NEVER}): onnxruntime:fp32 reproduces PyTorch's golden" in done.stdout.decode()
    assert "is answered by an unverified engine" in done.stderr.decode()
    assert f2rt("embed", folder, "a").returncode == 2
    for flags, env in ((["--allow-unverified"], {}), ([], {"F2RT_ALLOW_UNVERIFIED": "1"})):
        done = f2rt("embed", folder, "a", *flags, env=env)
        assert done.returncode == 0, done.stderr.decode()
        assert f"warning: the engine onnxruntime:fp32 is unverified: {NEVER}." in done.stderr.decode()
        assert len(json.loads(done.stdout)["embedding"]) == 256
    without_golden(bundle_copy.folder)
    done = f2rt("serve", folder, "--check", "--allow-unverified")
    assert f"reproduces {STAND_IN}" in done.stdout.decode()


def test_a_wrong_engine_is_refused_all_the_same(bundle_copy: Bundle) -> None:
    folder = unproven(bundle_copy.folder).folder
    right = golden.load(bundle_copy)
    wrong = replace(right, embeddings=np.roll(right.embeddings, 1, axis=1))
    (folder / "golden.npz").write_bytes(golden.pack(wrong))
    write_manifest(folder, replace(open_bundle(folder).manifest, golden=record_file(folder, "golden.npz")))
    refused = f2rt("serve", str(folder), "--grpc", "127.0.0.1:0", "--allow-unverified")
    assert refused.returncode == 2
    assert "An engine known to be wrong never answers" in refused.stderr.decode()


def test_an_unverified_engine_is_watched_against_its_own_vectors(bundle_copy: Bundle) -> None:
    bare = without_golden(bundle_copy.folder)
    engine, own = held(open_embedder(bare, gate=Gate(allow_unverified=True)), permits=100_000)
    with InProcess(own, golden_period_s=0.05) as server:
        assert server.metric("f2rt_engine_unverified", model="mini", engine="onnxruntime:fp32") == 1
        engine.turn = 0.5
        wait_until(lambda: server.model.state == "failing")
        assert "does not reproduce its own first vectors" in server.model.problem
        engine.turn = 0.0
        wait_until(lambda: server.model.state == "ready")


# --- policies


def test_a_policy_is_refused_at_start_and_shown_by_inspect(bundle: Bundle, tmp_path: Path) -> None:
    folder, file = str(bundle.folder), str(loose_file(tmp_path))
    told = f"asked for is loose, {LOOSE.sha256[:12]}"
    for arguments in (["serve", folder, "--grpc", "127.0.0.1:0"], ["embed", folder, "a"]):
        for flags, env in ((["--policy", file], {}), ([], {"F2RT_POLICY": file})):
            done = f2rt(*arguments, *flags, env=env)
            assert done.returncode == 2
            assert told in done.stderr.decode()
            assert Policy().sha256[:12] in done.stderr.decode()
            assert f"f2rt parity {folder} --policy {file}" in done.stderr.decode()
            assert "or leave --policy out" in done.stderr.decode()
    shown = " ".join(f2rt("inspect", folder, "--policy", file).stdout.decode().split())
    assert f"loose, {LOOSE.sha256[:12]}" in shown
    assert "its verdict was reached" in shown
    shown = " ".join(f2rt("inspect", folder).stdout.decode().split())
    assert f"default, {Policy().sha256[:12]}" in shown


def test_policy_and_allowance_are_settings_like_the_others(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "f2rt.toml"
    file.write_text('policy = "a.toml"\nallow_unverified = true\n')
    base = ["serve", str(bundle.folder), "--config", str(file), "--print-config"]
    printed = f2rt(*base).stdout.decode()
    assert f'policy = "a.toml"  # {file}' in printed
    assert f"allow_unverified = true  # {file}" in printed
    printed = f2rt(*base, env={"F2RT_POLICY": "b.toml", "F2RT_ALLOW_UNVERIFIED": "no"}).stdout.decode()
    assert 'policy = "b.toml"  # F2RT_POLICY' in printed
    assert "allow_unverified = false  # F2RT_ALLOW_UNVERIFIED" in printed
    printed = f2rt(*base, "--policy", "c.toml", env={"F2RT_POLICY": "b.toml"}).stdout.decode()
    assert 'policy = "c.toml"  # --policy' in printed


def test_a_wrong_policy_file_stops_the_start(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[fp32]\nmin_cosin = 1\n")
    for verb in (["serve"], ["inspect"], ["embed"]):
        done = f2rt(*verb, str(bundle.folder), *(["a"] if verb == ["embed"] else []), "--policy", str(file))
        assert done.returncode == 2
        assert f"{file}: [fp32] min_cosin is no limit" in done.stderr.decode()


def test_a_reload_reads_the_policy_again_and_keeps_the_old_engine(bundle_copy: Bundle, tmp_path: Path) -> None:
    file = loose_file(tmp_path)
    loose = edit_verdicts(bundle_copy.folder, policy_sha256=LOOSE.sha256)
    own = open_embedder(loose, gate=Gate(read_policy(file)))
    with InProcess(own, policy=str(file)) as server, EmbeddingClient(server.grpc) as client:
        before = client.embed(["a"])
        assert client.info().policy_sha256 == LOOSE.sha256
        client.reload()
        file.write_text("[fp32]\nmin_cosine = 0.91\n")
        with pytest.raises(BundleError, match=f"under the policy {LOOSE.sha256[:12]}; asked for is loose, "):
            client.reload()
        file.write_text("[fp32]\nmin_cosine = nan\n")
        with pytest.raises(InputError, match=r"\[fp32\] min_cosine is nan"):
            client.reload()
        file.unlink()
        with pytest.raises(InputError, match="cannot read"):
            client.reload()
        after = client.embed(["a"])
        assert after.fingerprint == before.fingerprint
        assert np.array_equal(after.vectors, before.vectors)
        assert client.info().policy_sha256 == LOOSE.sha256
        assert server.metric("f2rt_reloads_total", model="mini", outcome="failed") == 3
        assert client.ready()


# --- poison requests


def test_poison_requests_do_not_keep_the_engine_busy_with_golden_texts(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, own = held(embedder, permits=1_000_000)
    checks: list[int] = []
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:  # the period is endless here
        run = server.model.pipeline.run

        async def counted(items: list[TokenizedText]) -> NDArray[np.float32]:
            checks.append(len(items))
            return await run(items)

        # Not the engine's rows: those that shared a batch with one that failed run once more.
        monkeypatch.setattr(server.model.pipeline, "run", counted)
        engine.fault, engine.fault_for = EngineError("not this one.", cure="Another."), 777
        begun_s, asked = time.monotonic(), 0
        while time.monotonic() - begun_s < 1.5 or asked < 10:
            with pytest.raises(EngineError):
                client.embed(token_ids=[[777, 5]])
            asked += 1
        took_s = time.monotonic() - begun_s
        assert 1 <= len(checks) <= 2 + took_s, (checks, asked)
        assert set(checks) == {len(own.loaded.expected.ids)}
        assert server.model.state == "ready"
        # The last one is looked into as well: now it is the engine that is broken.
        engine.fault_for = None
        wait_until(lambda: server.model.state == "failing")


class Clock:
    """A pipeline of which only the alarm matters, and the times at which the watch checked."""

    def __init__(self, embedder: Embedder, took_s: float) -> None:
        self.embedder = SimpleNamespace(loaded=embedder.loaded)
        self.took_s = took_s
        self.checks: list[tuple[float, float]] = []
        self.on_engine_error: Any = None

    def foreseen_wait_s(self, items: list[Any]) -> float:
        return 0.0

    async def run(self, items: list[Any]) -> Any:
        begun_s = asyncio.get_running_loop().time()
        await asyncio.sleep(self.took_s)
        self.checks.append((begun_s, asyncio.get_running_loop().time()))
        return self.embedder.loaded.expected.embeddings


@pytest.mark.parametrize(("took_s", "least_s"), [(0.0, 0.3), (0.6, 0.6)])
def test_checks_that_errors_start_have_a_pause_between_them(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, took_s: float, least_s: float
) -> None:
    monkeypatch.setattr(watch, "_ALARM_PAUSE_S", 0.3)

    async def scenario() -> list[tuple[float, float]]:
        clock = Clock(embedder, took_s)
        golden_watch = watch.GoldenWatch(
            clock,  # type: ignore[arg-type]
            embedder.loaded.expected,
            lambda cosine, problem: None,
            period_s=1e6,
            timeout_s=60,
        )
        while len(clock.checks) < 3:
            clock.on_engine_error(None)
            await asyncio.sleep(0.005)
        await golden_watch.stop()
        return clock.checks

    checks = asyncio.run(asyncio.wait_for(scenario(), START_S))
    for (_, ended_s), (begun_s, _) in itertools.pairwise(checks):
        assert begun_s - ended_s >= least_s - 0.01


def test_a_watch_ends_also_when_an_answer_comes_in_the_same_instant(embedder: Embedder) -> None:
    """A cancellation that is lost there would keep a reload, or the server's end, waiting for ever."""

    async def scenario() -> None:
        clock, answered = Clock(embedder, 0.0), asyncio.get_running_loop().create_future()
        clock.run = lambda items: _result(answered)  # type: ignore[method-assign]
        golden_watch = watch.GoldenWatch(
            clock,  # type: ignore[arg-type]
            embedder.loaded.expected,
            lambda cosine, problem: None,
            period_s=0.001,
            timeout_s=60,
        )
        await asyncio.sleep(0.1)
        answered.set_result(embedder.loaded.expected.embeddings[:1])
        stopping = asyncio.create_task(golden_watch.stop())
        done, _ = await asyncio.wait({stopping}, timeout=10)
        assert done, "it goes on"

    asyncio.run(scenario())


async def _result(future: asyncio.Future[Any]) -> Any:
    return await future
