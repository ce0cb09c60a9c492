"""The server's process: how it starts, whom it refuses, and how it ends. A real process on loopback."""

from __future__ import annotations

import array
import fcntl
import re
import signal
import socket
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.bundle import MANIFEST, Bundle
from runtime.embedder import Embedder
from runtime.errors import UnavailableError
from runtime.server import is_loopback
from runtime.settings import ServeSettings
from runtime.wire.f2rt_v1 import SERVICE_NAME
from tests.serving import LONG, SERVING, START_S, TEXTS, ServerProcess, f2rt, failure, wait_until_busy
from tests.serving_in_process import wait_until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_sigterm_finishes_what_was_admitted_and_refuses_the_rest(bundle: Bundle, embedder: Embedder) -> None:
    # The long request may take a slow machine longer than a server waits by default.
    patient = ("--set", "drain_s=120")
    with ServerProcess(bundle.folder, *patient) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
            assert next(watch).status == SERVING
            long = pool.submit(client.embed, token_ids=LONG)
            wait_until_busy(client)
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            assert not long.done()
            with pytest.raises(UnavailableError, match="shutting down"):
                client.embed(["too late"])
            with server.client() as late:
                for refused_call in (late.embed, late.explain):
                    with pytest.raises(UnavailableError, match=r"shutting down\. Ask another replica\."):
                        refused_call(["too late"])
                assert not late.ready()
                assert not long.done()
            assert np.array_equal(long.result(START_S).vectors, embedder.infer(embedder.verbatim(LONG)))
            assert server.wait() == 0
            failure(lambda: next(watch))  # the stream ends with the server
        assert any("stopped" in line for line in server.log)
        assert not any("Traceback" in line or "ERROR" in line for line in server.log), server.log


def test_sigterm_waits_for_a_caller_who_reads_slowly(bundle: Bundle) -> None:
    """A large HTTP answer is with the caller whole, however long it takes within `drain_s`."""
    body = b'{"encoding_format": "float", "input": [%s]}' % b",".join([b"[15986]"] * 2000)
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with ServerProcess(bundle.folder, "--set", "drain_s=120", http=True) as server, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # most of it has to wait in the server
        peer.settimeout(START_S)
        host, _, port = server.http.rpartition(":")
        peer.connect((host, int(port)))
        peer.sendall(head + body)
        said = peer.recv(1 << 12)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("draining")
        time.sleep(3)  # longer than the end of anything else takes
        while part := peer.recv(1 << 20):
            said += part
        assert server.wait() == 0
    headers, _, got = said.partition(b"\r\n\r\n")
    announced = re.search(rb"content-length: (\d+)", headers)
    assert announced is not None
    assert len(got) == int(announced[1]) > 5 << 20
    assert not any("Traceback" in line or "ERROR" in line for line in server.log), server.log


class Impatient(ServerProcess):
    """Gets a SIGHUP as soon as its engine is proven, long before it listens."""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in iter(self.process.stderr.readline, ""):
            self.log.append(line.rstrip("\n"))
            if "reproduces PyTorch" in line:
                self.process.send_signal(signal.SIGHUP)
                break
        super()._read()


def test_sighup_before_it_serves_reloads_once_it_does(bundle: Bundle) -> None:
    with Impatient(bundle.folder) as server:
        server.wait_for_line("mini switched from")
        with server.client() as client:
            client.embed(["a"])
        assert server.stop() == 0


class Unread(ServerProcess):
    """Nobody reads what it logs once it serves, and the pipe behind its standard error is soon full."""

    def _read(self) -> None:
        assert self.process.stderr is not None
        fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        for line in iter(self.process.stderr.readline, ""):
            with self._logged:
                self.log.append(line.rstrip("\n"))
                self._logged.notify_all()
            if "serving mini" in line:
                break


def test_a_log_that_nobody_reads_stops_neither_answers_nor_the_end(bundle: Bundle) -> None:
    with Unread(bundle.folder, http=True) as server:
        with server.client() as client:
            for turn in range(200):
                client.embed(["a"], request_id=f"{turn:0200}")
            client.reload()
            assert client.ready()
        assert server.process.stderr is not None
        waiting = array.array("i", [0])
        fcntl.ioctl(server.process.stderr, termios.FIONREAD, waiting)
        assert waiting[0] > 3000  # it is full indeed
        metrics = httpx.get(f"http://{server.http}/metrics", trust_env=False, timeout=START_S).text
        assert re.search(r'^f2rt_requests_total\{.*status="OK".*\} 200.0$', metrics, re.M), metrics
        assert "\nf2rt_log_lines_dropped_total 0.0\n" in metrics
        assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_at_once_even_while_watched(bundle: Bundle, number: signal.Signals) -> None:
    with ServerProcess(bundle.folder) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        start = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - start < ServeSettings().drain_s / 2
        assert next(watch).status == NOT_SERVING
        assert not any("Traceback" in line for line in server.log), server.log


def test_a_unix_socket(bundle: Bundle, embedder: Embedder, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/f2rt.sock"
    with ServerProcess(bundle.folder, "--threads", "1", address=address) as server:
        assert server.address == address
        with server.client() as client:
            assert np.allclose(client.embed(TEXTS).vectors, embedder.embed(TEXTS).vectors, atol=1e-5)
        assert not any("open to the network" in line for line in server.log)
        assert server.stop() == 0


def test_a_shadow_looks_on(bundle: Bundle) -> None:
    shadow = ("--shadow", f"{bundle.folder}@onnxruntime:fp32", "--set", "shadow_share=1")
    with ServerProcess(bundle.folder, *shadow, http=True) as server, server.client() as client:
        line = f"model mini: 100 % of requests are shown to the shadow onnxruntime:fp32 of {bundle.folder}"
        assert any(line in one for one in server.log)
        client.embed(TEXTS)
        seen = f'f2rt_shadow_drift_count{{model="mini"}} {len(TEXTS)}'
        wait_until(lambda: seen in httpx.get(f"http://{server.http}/metrics", trust_env=False).text)
        assert server.stop() == 0


def refused(*arguments: str) -> str:
    """Run `f2rt serve`, expect it to refuse, and return its standard error."""
    done = f2rt("serve", *arguments)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert done.stdout == b""
    assert re.search(r"^error: .+\.$", text, re.MULTILINE), text
    assert re.search(r"^  cure: .+", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert "serving" not in text
    return text


def test_an_http_address_that_cannot_be(bundle: Bundle, tmp_path: Path) -> None:
    """gRPC listens already when HTTP cannot: the process ends all the same. A file in the way stays."""
    file = tmp_path / "important"
    file.write_text("not a socket")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", f"unix:{file}"):
            text = refused(str(bundle.folder), "--grpc", "127.0.0.1:0", "--http", address)
            assert f"cannot listen on {address}" in text
    assert file.read_text() == "not a socket"


def test_http_on_a_unix_socket(bundle: Bundle, tmp_path: Path) -> None:
    """One that is in use is left alone; one that a killed server left behind is taken. Nothing stays after a stop."""
    path = tmp_path / "http.sock"
    with ServerProcess(bundle.folder, "--http", f"unix:{path}") as server:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport) as client:
            assert client.get("http://f2rt/health/ready").status_code == 200
        assert "cannot listen on" in refused(str(bundle.folder), "--grpc", "127.0.0.1:0", "--http", f"unix:{path}")
        server.stop(signal.SIGKILL)
    assert path.is_socket()
    with ServerProcess(bundle.folder, "--http", f"unix:{path}") as server:
        assert server.stop() == 0
    assert not path.exists()
    with ServerProcess(bundle.folder, "--http", f"unix:{path}") as server:
        path.unlink()
        path.write_text("somebody else's")
        assert server.stop() == 0
    assert path.read_text() == "somebody else's"


def test_a_port_in_use(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = refused(str(bundle.folder), "--grpc", address)
    assert f"cannot listen on {address}" in text
    assert "--grpc HOST:PORT" in text


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:70000", ":50051", "127.0.0.1:-1", "203.0.113.7:50051"])
def test_an_address_that_is_none(bundle: Bundle, address: str) -> None:
    assert address in refused(str(bundle.folder), "--grpc", address)


def test_a_second_server_on_the_port_of_the_first(bundle: Bundle, server: ServerProcess) -> None:
    assert "in use" in refused(str(bundle.folder), "--grpc", server.address)


def test_engines_that_must_not_answer(bundle_copy: Bundle, tmp_path: Path) -> None:
    folder, manifest = bundle_copy.folder, bundle_copy.manifest
    (engine,) = manifest.engines
    assert engine.parity is not None

    def write(**changes: Any) -> None:
        changed = replace(manifest, engines=[replace(engine, **changes)])
        (folder / MANIFEST).write_bytes(msgspec.json.encode(changed))

    write(parity=None)
    text = refused(str(folder), "--grpc", "127.0.0.1:0")
    assert "never compared with PyTorch" in text
    assert f"f2rt parity {folder}" in text
    write(parity=replace(engine.parity, verdict="fail"))
    text = refused(str(folder), "--engine", engine.name, "--grpc", "127.0.0.1:0")
    assert "its verdict is fail" in text
    write()
    graph = bundle_copy.path(manifest.graphs[0].data.file)
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 0x40
    graph.write_bytes(data)
    assert "SHA-256" in refused(str(folder), "--grpc", "127.0.0.1:0")


def test_what_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    text = refused(str(bundle.folder), "--engine", "onnxruntime:int3", "--grpc", "127.0.0.1:0")
    assert "onnxruntime:int3" in text
    assert "onnxruntime:fp32" in text
    assert "is not there" in refused(str(tmp_path / "nowhere"))
    assert "not a bundle" in refused(str(tmp_path))


def test_an_address_open_to_the_network_is_warned_about(bundle: Bundle, server: ServerProcess) -> None:
    with ServerProcess(bundle.folder, address="0.0.0.0:0") as open_server:
        assert "WARNING" in open_server.wait_for_line("0.0.0.0:0 is open to the network without key or TLS")
        assert open_server.stop() == 0
    assert not any("open to the network" in line for line in server.log)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/f2rt.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.4:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_which_addresses_are_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
