"""The HTTP endpoints: OpenAI's API, health, info, metrics and the API's own description. Knows no server.

Every refusal, whoever makes it, has OpenAI's error body, so that its clients show what is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import runtime
from runtime.errors import AccessError, DeadlineError, F2rtError, InputError, OverloadedError, UnavailableError
from runtime.serving.access import Keys
from runtime.serving.call import left_s
from runtime.serving.metrics import CONTENT_TYPE
from runtime.serving.model import Model
from runtime.serving.models import Models, request_id
from runtime.settings import ServeSettings
from runtime.wire import openai_v1
from runtime.wire.http_body import Bodies
from runtime.wire.openapi import describe, page

log = logging.getLogger("f2rt.http")

_DECODED_IN_LOOP = 1 << 16  # bytes
_ENCODED_IN_LOOP = 1 << 16  # values
_MOST_TIMEOUT_S = 24 * 3600.0
_ID = "x-request-id"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")

Endpoint = Callable[[Request], Awaitable[Response]]


class HttpApp:
    """The endpoints on the models of a server."""

    def __init__(self, models: Models, settings: ServeSettings, keys: Keys) -> None:
        self._models = models
        self._settings = settings
        self._keys = keys
        self._bodies = Bodies(settings.max_message_bytes)
        self._created = int(time.time())
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.app = Starlette(
            routes=[
                Route("/v1/embeddings", self._closed(self.embeddings), methods=["POST"]),
                Route("/v1/models", self._closed(self.models), methods=["GET"]),
                Route("/v1/models/{name:path}", self._closed(self.model), methods=["GET"]),
                Route("/info", self._closed(self.info), methods=["GET"]),
                Route("/metrics", self._closed(self.metrics), methods=["GET"]),
                Route("/openapi.json", self._closed(self.openapi), methods=["GET"]),
                Route("/docs", self._closed(self.docs), methods=["GET"]),
                Route("/health/live", self.live, methods=["GET"]),
                Route("/health/ready", self.ready, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _refused},
        )
        # A redirect would be a refusal without our body, to wherever the caller's Host header says.
        self.app.router.redirect_slashes = False

    async def idle(self) -> None:
        """Return once no request is being answered."""
        await self._idle.wait()

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        own_id = _id(request)
        deadline_s = _deadline(request)
        with self._bodies.held_by() as body:
            async with _until(deadline_s):
                wanted = await self._decoded(await body.read(request))
        # The model's own facts decide what token ids and prompts mean.
        model = self._models.get(wanted.model or "")
        contract = model.embedder.contract
        call = openai_v1.make_call(
            wanted,
            contract.eos_id,
            contract.prompts,
            request_id=own_id,
            deadline_s=deadline_s,
            traceparent=self._traceparent(request),
        )
        reply = await _unless_gone(request, self._models.embed(call, "http"))

        def encode() -> bytes:
            return openai_v1.encode_reply(wanted, call, reply, model.name)

        small = reply.vectors.size <= _ENCODED_IN_LOOP
        answer = encode() if small else await model.pipeline.in_thread(encode)
        headers = {_ID: own_id, "x-f2rt-fingerprint": reply.fingerprint}
        truncated = sum(item.truncated for item in reply.items)
        if truncated:
            headers["x-f2rt-truncated"] = str(truncated)
        return Response(answer, media_type="application/json", headers=headers)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._described(model) for model in self._models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        name = request.path_params["name"]
        if not name:  # elsewhere "" is the default model; here it is a path that does not exist
            raise HTTPException(404)
        return _json(self._described(self._models.get(name)))

    async def info(self, request: Request) -> Response:
        """GET /info: which engines answer, from which checkpoints."""
        return _json({"version": runtime.__version__, "models": [_info(model) for model in self._models]})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        exposed = await asyncio.to_thread(self._models.expose)  # no worker of requests, which may all be tokenizing
        return Response(exposed, headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(self._description())

    async def docs(self, request: Request) -> Response:
        """GET /docs: the same for people."""
        return HTMLResponse(page(self._description()))

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: every model gives PyTorch's vectors; 503 when one does not."""
        models = {
            model.name: {"state": model.state, "golden_cosine": model.golden_cosine, "problem": model.problem}
            for model in self._models
        }
        ready = self._models.ready
        return _json({"status": "ready" if ready else "not ready", "models": models}, 200 if ready else 503)

    def _description(self) -> dict[str, Any]:
        """Return the OpenAPI document of the engines that answer now: a reload may bring another contract."""
        contracts = {model.name: model.embedder.contract for model in self._models}
        return describe(runtime.__version__, contracts, self._settings.limits, needs_key=self._keys.required)

    def _described(self, model: Model) -> dict[str, Any]:
        return {"id": model.name, "object": "model", "created": self._created, "owned_by": "f2rt"}

    def _traceparent(self, request: Request) -> str:
        return request.headers.get("traceparent", "") if self._settings.otlp_endpoint else ""

    def _closed(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that asks for a key, counts itself as open, and answers errors with their status."""

        async def answer(request: Request) -> Response:
            self._open += 1
            self._idle.clear()
            try:
                self._keys.check(request.headers.get("authorization"), request.headers.get("x-api-key"))
                return await endpoint(request)
            except F2rtError as error:
                if endpoint == self.embeddings:
                    self._models.refused(error, "http", _id(request), self._traceparent(request))
                return _error(error, _id(request))
            except ClientDisconnect:
                return Response(status_code=499)
            except HTTPException as error:
                if endpoint == self.embeddings:  # a body that stopped coming, or is of another kind
                    kind = DeadlineError if error.status_code == 408 else InputError
                    self._models.refused(kind(error.detail), "http", _id(request), self._traceparent(request))
                raise
            except Exception:
                log.exception("unexpected error in %s", endpoint.__name__)
                text = "an unexpected error; the server's log has the details."
                headers = {_ID: _id(request)}
                return Response(openai_v1.error_body(500, text), 500, headers, media_type="application/json")
            finally:
                self._open -= 1
                if not self._open:
                    self._idle.set()

        return answer

    async def _decoded(self, body: bytes) -> openai_v1.EmbeddingsRequest:
        """Decode a body, a large one on another thread. Raises InputError."""
        limits = self._settings.limits
        if len(body) <= _DECODED_IN_LOOP:
            return openai_v1.decode_request(body, limits)
        return await self._models.default.pipeline.in_thread(lambda: openai_v1.decode_request(body, limits))


def _info(model: Model) -> dict[str, Any]:
    embedder = model.embedder
    manifest, record = embedder.bundle.manifest, embedder.loaded.record
    contract = manifest.contract
    return {
        "name": model.name,
        "state": model.state,
        "source": manifest.source.id,
        "revision": manifest.source.revision,
        "license": manifest.source.license,
        "engine": record.full_name,
        "precision": record.precision,
        "fingerprint": embedder.fingerprint,
        "selection": embedder.loaded.selection,
        "verdict": record.parity.verdict if record.parity else None,
        "min_cosine": record.parity.min_cosine if record.parity else None,
        "golden_cosine": model.golden_cosine,
        "unverified": embedder.loaded.unverified,
        "policy_sha256": embedder.loaded.policy.sha256,
        "dimensions": contract.dim,
        "trained_dimensions": contract.trained_dims,
        "max_tokens": contract.max_tokens,
        "prompts": contract.prompts,
        "default_prompt_name": contract.default_prompt_name,
    }


async def _unless_gone(request: Request, answering: Any) -> Any:
    """Await an answer, and drop it when the client goes away. Raises ClientDisconnect."""
    task = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the end of the connection
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        if task.cancelled() or not task.done():
            await asyncio.gather(task, return_exceptions=True)


def _id(request: Request) -> str:
    """Return a request's id, the caller's or one made for it: the same whenever it is asked for."""
    if not hasattr(request.state, "id"):
        given = request.headers.get(_ID, "")
        request.state.id = request_id(given if given.isprintable() else "")
    return str(request.state.id)


def _deadline(request: Request) -> float | None:
    """Return when the answer is worth nothing any more, from X-Request-Timeout in seconds. Raises InputError."""
    given = request.headers.get("x-request-timeout")
    if given is None:
        return None
    seconds = float(given) if _NUMBER.fullmatch(given) else math.nan
    if not 0 < seconds <= _MOST_TIMEOUT_S:
        raise InputError(f"X-Request-Timeout is {given[:40]!r}.", cure="Give seconds, for example 0.5.")
    return time.perf_counter() + seconds


@contextlib.asynccontextmanager
async def _until(deadline_s: float | None) -> AsyncIterator[None]:
    """Do something of a request by its deadline, if it has one. Raises DeadlineError."""
    try:
        async with asyncio.timeout(left_s(deadline_s)):
            yield
    except TimeoutError as error:
        raise DeadlineError("the deadline passed before the request was read.", cure="Allow more time.") from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error(error: F2rtError, own_id: str) -> Response:
    status, body = openai_v1.encode_error(error)
    headers = {_ID: own_id}
    if isinstance(error, OverloadedError):
        headers |= {
            "retry-after": str(math.ceil(error.retry_after_s)),
            "retry-after-ms": str(int(1e3 * error.retry_after_s)),
        }
    if isinstance(error, UnavailableError):
        headers["retry-after"] = "1"
    if isinstance(error, AccessError):
        headers |= {"www-authenticate": "Bearer"}
    return Response(body, status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is no {request.url.path[:100]} here. See /docs."
    elif error.status_code == 405:
        message = f"{request.url.path[:100]} does not take {request.method[:20]}. See /docs."
    body = openai_v1.error_body(error.status_code, message)
    headers = {**(error.headers or {}), _ID: _id(request)}
    return Response(body, error.status_code, headers, media_type="application/json")
