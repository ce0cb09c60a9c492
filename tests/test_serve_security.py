"""TLS, client certificates and API keys on both ports: health is open, the rest closed, nothing secret logged."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import trustme
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime._pb.inference import grpc_service_pb2 as kserve
from runtime.bundle import Bundle
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.errors import AccessError, InputError, UnavailableError
from runtime.serving.access import Keys
from runtime.settings import TlsSettings
from runtime.wire import http_server
from runtime.wire.f2rt_v1 import _is_local
from tests.http_client import talk
from tests.serving import SERVING, START_S, ServerProcess, f2rt, failure
from tests.serving_in_process import InProcess

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


class Certificates:
    """A certificate authority, a server's certificate for 127.0.0.1, and a client's, as PEM files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
        self.client_cert, self.client_key = folder / "client.pem", folder / "client.key"
        authority.cert_pem.write_to_path(str(self.ca))
        server = authority.issue_cert("localhost", "127.0.0.1")
        server.cert_chain_pems[0].write_to_path(str(self.cert))
        server.private_key_pem.write_to_path(str(self.key))
        client = authority.issue_cert("client.example")
        client.cert_chain_pems[0].write_to_path(str(self.client_cert))
        client.private_key_pem.write_to_path(str(self.client_key))

    def context(self, *, client: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        if client:
            context.load_cert_chain(str(self.client_cert), str(self.client_key))
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may ask\n\nteam-a:{KEY}\n{OTHER}\n")
    return file


def closed_methods(channel: grpc.Channel) -> dict[str, Callable[[Any], Any]]:
    names = ["f2rt.v1.EmbeddingService/Embed", "f2rt.v1.EmbeddingService/Explain", "f2rt.v1.EmbeddingService/Info"]
    names += ["f2rt.v1.AdminService/Reload", "inference.GRPCInferenceService/ModelInfer"]
    names += ["inference.GRPCInferenceService/ModelMetadata", "inference.GRPCInferenceService/ServerMetadata"]
    return {name: lambda data, name=name, **more: channel.unary_unary(f"/{name}")(data, **more) for name in names}


def test_keys_close_everything_but_health(bundle: Bundle, embedder: Embedder, keys_file: Path) -> None:
    with ServerProcess(bundle.folder, "--http", "127.0.0.1:0", "--keys-file", str(keys_file)) as server:
        http = server.wait_for_line("serving HTTP on ").rpartition(" ")[2]
        with grpc.insecure_channel(server.address) as channel:
            for shown in ((), (("authorization", "Bearer wrong-key-0123456789"),), (("authorization", KEY),)):
                for name, call in closed_methods(channel).items():
                    error = failure(lambda c=call, s=shown: c(b"", metadata=s))  # type: ignore[misc]
                    assert error.code() is UNAUTHENTICATED, name
                    assert "Bearer" in error.details() or "operator" in error.details()
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == SERVING
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert kserve.ServerLiveResponse.FromString(live(b"")).live
            stream = channel.stream_stream("/f2rt.v1.EmbeddingService/EmbedStream")
            assert failure(lambda: list(stream(iter([b""])))).code() is UNAUTHENTICATED
            reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            assert failure(lambda: list(reflection(iter([b""])))).code() is grpc.StatusCode.UNIMPLEMENTED
        for key in (KEY, OTHER):
            with EmbeddingClient(server.address, key=key) as client:
                assert np.array_equal(client.embed(["a"]).vectors, embedder.embed(["a"]).vectors)
        with EmbeddingClient(server.address) as client, pytest.raises(AccessError, match="no API key"):
            client.info()
        for path in ("/v1/models", "/info", "/metrics", "/docs", "/openapi.json"):
            assert httpx.get(f"http://{http}{path}").status_code == 401
            assert httpx.get(f"http://{http}{path}", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
            assert httpx.get(f"http://{http}{path}", headers={"x-api-key": OTHER}).status_code == 200
        for path in ("/health/live", "/health/ready"):
            assert httpx.get(f"http://{http}{path}").status_code == 200
        assert server.stop() == 0
        log = "\n".join(server.log)
        assert not any(secret in log for secret in (KEY, OTHER, "wrong-key"))


def test_keys_are_read_again_on_reload(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    with (
        ServerProcess(bundle.folder, "--keys-file", str(file)) as server,
        EmbeddingClient(server.address, key=KEY) as old,
        EmbeddingClient(server.address, key=OTHER) as new,
    ):
        old.embed(["a"])
        with pytest.raises(AccessError):
            new.embed(["a"])
        file.write_text(OTHER)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("switched from")
        new.embed(["a"])
        with pytest.raises(AccessError):
            old.embed(["a"])
        file.write_text("short")  # a file that cannot be: the keys stay as they were
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("the keys stay as they were")
        new.embed(["a"])
        with pytest.raises(InputError, match="5 characters"):
            new.reload()
        server.wait_for_line("a reload was asked for, and everything stays as it was: .* 5 characters")


def test_a_keys_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY, encoding="utf-8-sig")
    Keys(str(file)).check(f"Bearer {KEY}", None)


def test_the_command_sends_its_key(bundle: Bundle, keys_file: Path) -> None:
    with ServerProcess(bundle.folder, "--keys-file", str(keys_file)) as server:
        done = f2rt("embed", "--server", server.address, "a", env={"F2RT_API_KEY": KEY})
        assert done.returncode == 0, done.stderr.decode()
        assert f2rt("embed", "--server", server.address, "a").returncode == 2
        reloaded = f2rt("reload", "--server", server.address, env={"F2RT_API_KEY": KEY})
        assert reloaded.returncode == 0, reloaded.stderr.decode()
        assert "the same: " in reloaded.stdout.decode()
        refused = f2rt("reload", "--server", server.address, "--key", "x" * 20)
        assert refused.returncode == 2
        assert "not known" in refused.stderr.decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("tiny!\n", "line 1 of .* has a key of 5 characters; a key has at least 16"),
        (f"{KEY}\nwith spaces in between it\n", "line 2"),
        ("name:\n", "a key of 0 characters"),
    ],
)
def test_a_wrong_keys_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Keys(str(file))
    assert "tiny!" not in caught.value.message


def test_tls_on_both_ports(bundle: Bundle, embedder: Embedder, certificates: Certificates) -> None:
    files = ["--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key)]
    with ServerProcess(bundle.folder, "--http", "127.0.0.1:0", *files, ca=certificates.ca) as server:
        http = server.wait_for_line("serving HTTP on ").rpartition(" ")[2]
        with EmbeddingClient(server.address, tls_ca=certificates.ca) as client:
            assert np.array_equal(client.embed(["a"]).vectors, embedder.embed(["a"]).vectors)
        with EmbeddingClient(server.address, timeout_s=5) as plain, pytest.raises(UnavailableError):
            plain.embed(["a"])
        body = {"input": "a", "encoding_format": "float"}
        answer = httpx.post(f"https://{http}/v1/embeddings", json=body, verify=certificates.context())
        assert np.allclose(answer.json()["data"][0]["embedding"], embedder.embed(["a"]).vectors[0], atol=1e-6)
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"http://{http}/v1/embeddings", json=body)
        with pytest.raises(httpx.ConnectError):  # an authority it does not know
            httpx.post(f"https://{http}/v1/embeddings", json=body)


def test_client_certificates_on_both_ports(bundle: Bundle, certificates: Certificates) -> None:
    c = certificates
    files = ["--tls-cert", str(c.cert), "--tls-key", str(c.key), "--tls-client-ca", str(c.ca)]
    own = {"tls_certificate": c.client_cert, "tls_key": c.client_key}
    with ServerProcess(bundle.folder, "--http", "127.0.0.1:0", *files, ca=c.ca, **own) as server:
        http = server.wait_for_line("serving HTTP on ").rpartition(" ")[2]
        with EmbeddingClient(server.address, tls_ca=c.ca, **own) as client:
            assert client.embed(["a"]).vectors.shape == (1, 256)
        with EmbeddingClient(server.address, tls_ca=c.ca, timeout_s=5) as bare, pytest.raises(UnavailableError):
            bare.embed(["a"])
        ours = ["--tls-ca", str(c.ca), "--tls-cert", str(c.client_cert), "--tls-key", str(c.client_key)]
        for command in (["embed", "--server", server.address, "a"], ["reload", "--server", server.address]):
            done = f2rt(*command, *ours)
            assert done.returncode == 0, done.stderr
            assert b"asks for certificates needs yours" in f2rt(*command, *ours[:2]).stderr
        assert httpx.get(f"https://{http}/info", verify=c.context(client=True)).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"https://{http}/info", verify=c.context())


def shake(
    address: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[int, ssl.SSLSession | None]:
    """Shake hands and have a byte of the answer; returns the number of the server's certificate, and the session."""
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), START_S) as plain,
        context.wrap_socket(plain, session=session) as shaken,
    ):
        shown = shaken.getpeercert(binary_form=True)
        # Under TLS 1.3 a server refuses a client's certificate after the client is done.
        shaken.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        if not shaken.recv(1):
            raise ConnectionResetError("the server ended the connection")
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number, shaken.session


def test_certificates_and_authority_are_read_again_on_reload(bundle: Bundle, tmp_path: Path) -> None:
    """A connection made before stays; a new one sees the new certificate, and needs one of the new authority."""
    served, first, second = (tmp_path / name for name in ("served", "first", "second"))
    for folder in (served, first, second):
        folder.mkdir()
    old, new = Certificates(first), Certificates(second)

    def put(*files: Path) -> None:
        for file in files:
            shutil.copy(file, served / file.name)

    def of(pki: Certificates) -> ssl.SSLContext:
        """A client of one authority, who trusts either."""
        context = pki.context(client=True)
        context.check_hostname = False
        for one in (old, new):
            context.load_verify_locations(str(one.ca))
        return context

    put(old.ca, old.cert, old.key)
    files = ["--tls-cert", str(served / "server.pem"), "--tls-key", str(served / "server.key")]
    files += ["--tls-client-ca", str(served / "ca.pem")]
    own = {"tls_certificate": old.client_cert, "tls_key": old.client_key}
    with ServerProcess(bundle.folder, *files, http=True, ca=old.ca, **own) as server, server.client() as before:
        before.embed(["a"])
        ports = (server.address, server.http)
        seen = {shake(port, of(old))[0] for port in ports}
        assert len(seen) == 1
        sessions = []  # under TLS 1.2 a client that resumes one is not asked for its certificate
        for port in ports:
            context = of(old)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            sessions.append((port, context, shake(port, context)[1]))
            assert shake(*sessions[-1])[0] in seen
        put(new.cert)  # without its key: everything stays
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("the certificates stay as they were: the TLS certificate .* cannot be used")
        assert {shake(port, of(old))[0] for port in ports} == seen
        put(new.ca, new.key)
        assert before.reload().model == "mini"
        renewed = {shake(port, of(new))[0] for port in ports}
        assert len(renewed) == 1
        assert renewed != seen
        for port, context, session in (*((port, of(old), None) for port in ports), *sessions):
            with pytest.raises(OSError, match=r"alert|reset|EOF|ended"):
                shake(port, context, session)  # its authority is not known any more
        # A line for each would fill a log that nobody reads.
        assert not any("andshake" in line for line in server.log)
        before.embed(["a"])
        own = {"tls_certificate": new.client_cert, "tls_key": new.client_key}
        with EmbeddingClient(server.address, tls_ca=new.ca, **own) as client:
            client.embed(["a"])


def test_a_handshake_has_to_come_to_an_end(
    bundle: Bundle, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.2)
    tls = TlsSettings(str(certificates.cert), str(certificates.key))
    with InProcess(open_embedder(bundle), http=True, tls=tls) as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(talk(server)) for _ in range(3)]
        peers[1].sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of one
        for peer in peers:
            peer.settimeout(START_S / 2)  # asyncio's own limit is a minute
            assert peer.recv(1) == b""
        answer = httpx.get(f"https://{server.http}/health/ready", verify=certificates.context())
        assert answer.status_code == 200


@pytest.mark.parametrize("files", [("nowhere.pem", "nowhere.key"), ("text", "text")])
def test_wrong_tls_files(bundle: Bundle, tmp_path: Path, files: tuple[str, str]) -> None:
    (tmp_path / "text").write_text("no PEM")
    cert, key = (str(tmp_path / name) for name in files)
    done = f2rt("serve", str(bundle.folder), "--grpc", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", key)
    assert done.returncode == 2
    assert "the TLS file" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


GARBAGE = "-----BEGIN CERTIFICATE-----\nbm8gY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("case", ["certificate", "key", "another key", "authority"])
@pytest.mark.parametrize("more", [["--check"], []])
def test_pem_that_is_none_inside_is_named(
    bundle: Bundle, certificates: Certificates, tmp_path: Path, case: str, more: list[str]
) -> None:
    """In a check and at the start: not as a port that is in use."""
    c, garbage = certificates, tmp_path / "garbage.pem"
    garbage.write_text(GARBAGE)
    cert, key, ca, words = {
        "certificate": (garbage, c.key, c.ca, f"the TLS certificate {garbage} with the key"),
        "key": (c.cert, garbage, c.ca, f"with the key {garbage} cannot be used"),
        "another key": (c.cert, c.client_key, c.ca, f"with the key {c.client_key} cannot be used"),
        "authority": (c.cert, c.key, garbage, f"the TLS authority {garbage} cannot be used"),
    }[case]
    files = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(ca)]
    done = f2rt("serve", str(bundle.folder), "--grpc", "127.0.0.1:0", *files, *more)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert words in text
    assert "in use" not in text
    assert "Traceback" not in text


def test_without_keys_a_reload_comes_from_this_machine_only() -> None:
    assert all(map(_is_local, ("ipv4:127.0.0.1:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5", "unix:/run/x.sock", "unix:")))
    assert not any(map(_is_local, ("ipv4:10.0.0.1:5", "ipv6:[fe80::1]:5", "ipv4:128.127.0.1:1", "")))
