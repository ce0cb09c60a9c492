"""The HTTP port: uvicorn on the endpoints, in the same event loop as gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from runtime.errors import InputError
from runtime.serving.access import Keys
from runtime.serving.models import Models
from runtime.settings import ServeSettings
from runtime.wire.http_app import HttpApp
from runtime.wire.http_connection import HttpConnection
from runtime.wire.tls import TlsFiles

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_HANDSHAKE_S = 10.0  # until then a connection with TLS counts as none of `max_connections`
_CLOSE_S = 30.0  # asyncio's own
_FLUSH_S = 2.0  # at the end, for the last bytes of refusals


class HttpServer:
    """One listening HTTP server on the models of a server."""

    def __init__(self, models: Models, settings: ServeSettings, keys: Keys, tls: TlsFiles | None) -> None:
        self.settings = settings
        self._http = HttpApp(models, settings, keys)
        config = uvicorn.Config(
            self._http.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http=HttpConnection,  # on h11, which bounds a request's headers; httptools does not
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=settings.max_connections,
        )
        config.load()
        self._server = _Server(config, tls.context() if tls else None, max(settings.drain_s, _CLOSE_S))
        self._task: asyncio.Task[None] | None = None
        self._socket_file: tuple[Path, int] | None = None  # and its inode: another server may have replaced the file

    async def start(self) -> str:
        """Listen. Returns the address with the port really taken. Raises InputError."""
        address = self.settings.http_address
        try:
            listening = _listen(address)
        except OSError as error:
            raise InputError(
                f"cannot listen on {address}: {error.strerror or error}.",
                cure="Choose another one with --http HOST:PORT.",
            ) from error
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            await asyncio.sleep(0.001)
            if self._task.done():
                self._task.result()
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            self._socket_file = path, path.stat().st_ino
            return address
        return f"{address.rpartition(':')[0]}:{listening.getsockname()[1]}"

    async def idle(self) -> None:
        """Return once no request is being answered. What was answered may not be sent yet: `stop` waits for that."""
        await self._http.idle()

    async def stop(self, limit_s: float = 0.0) -> None:
        """Stop listening, close connections at rest, and the others once their answers are sent, or `limit_s` later."""
        # uvicorn waits for connections, and a connection is closed when its last byte is out: callers may read slowly.
        self._server.config.timeout_graceful_shutdown = max(limit_s, _FLUSH_S)  # type: ignore[assignment]
        if self._socket_file is not None:
            path, inode = self._socket_file
            with contextlib.suppress(OSError):  # gone already, or not ours to remove
                if path.stat().st_ino == inode:
                    path.unlink()
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    """uvicorn without hands on the process's signals, which `runtime.server` has, and with limits of time for TLS."""

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext | None, close_s: float) -> None:
        """`close_s`: how long a connection with TLS may take to send what is left when it is closed."""
        super().__init__(config)
        self._tls, self._close_s = tls, close_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections. uvicorn's own has no word on how long a handshake may take; asyncio's is a minute."""
        config, loop = self.config, asyncio.get_running_loop()
        times: dict[str, Any] = {}
        if self._tls is not None:
            times = {"ssl_handshake_timeout": _HANDSHAKE_S, "ssl_shutdown_timeout": self._close_s}

        def connect() -> asyncio.Protocol:
            return HttpConnection(config, self.server_state, {})

        self.servers = [
            await loop.create_server(connect, sock=one, ssl=self._tls, backlog=_BACKLOG, **times)
            for one in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _listen(address: str) -> socket.socket:
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _remove_left_over(path)
        listening.bind(str(path))
    else:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family, kind, protocol, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    listening.listen(_BACKLOG)
    listening.setblocking(False)
    return listening


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a server that is gone; never another kind of file, nor one that somebody listens on."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        return
    path.unlink()
