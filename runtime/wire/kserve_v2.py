"""KServe v2 over gRPC, so that Triton's stock clients work: `text` in, `embedding` out.

Input `text` BYTES [n] or [n, 1], output `embedding` FP32 [n, dim] in raw_output_contents. Request parameters:
`input_type` (query, passage), `prompt_name`, `prompt`, `truncate` (END, START, NONE), `dimensions`, `normalize`, and
Triton's `timeout` in microseconds. An unknown one is refused: misspelt and ignored, it would change vectors in silence.
Response parameters: `fingerprint`, `tokens`, and `truncated`, the number of texts that were cut.
"""

from __future__ import annotations

import struct
import time
from typing import Any

import runtime
from runtime._pb.inference import grpc_service_pb2 as pb
from runtime.embedder import finish
from runtime.encoding import OutputDType, encode
from runtime.errors import InputError, NotFoundError
from runtime.serving.call import EmbedCall, instruction_for
from runtime.serving.model import Model, State
from runtime.serving.models import Models, request_id
from runtime.tokenizer import Instruction, Truncate
from runtime.wire.grpc_calls import Calls, Dropping, header

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
INPUT, OUTPUT, VERSION = "text", "embedding", "1"
_TRUNCATE = {"END": Truncate.END, "START": Truncate.START, "NONE": Truncate.ERROR}
_IGNORED = ("priority",)  # clients' own: all requests wait in one fair queue
_PARAMETERS = ("input_type", "prompt_name", "prompt", "truncate", "dimensions", "normalize", "timeout")

__all__ = ["SERVICE_NAME", "InferenceService"]


class InferenceService:
    """Answers inference.GRPCInferenceService for all models of a server."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def handlers(self, calls: Calls) -> list[Any]:
        """Return the service's generic handler. Health is open to all, as in every protocol here."""
        return [
            calls.service(
                SERVICE_NAME,
                {
                    "ServerLive": calls.unary(self.live, pb.ServerLiveRequest, pb.ServerLiveResponse, public=True),
                    "ServerReady": calls.unary(self.ready, pb.ServerReadyRequest, pb.ServerReadyResponse, public=True),
                    "ModelReady": calls.unary(
                        self.model_ready, pb.ModelReadyRequest, pb.ModelReadyResponse, public=True
                    ),
                    "ServerMetadata": calls.unary(self.server, pb.ServerMetadataRequest, pb.ServerMetadataResponse),
                    "ModelMetadata": calls.unary(self.model, pb.ModelMetadataRequest, pb.ModelMetadataResponse),
                    "ModelInfer": calls.unary(
                        self.infer, pb.ModelInferRequest, pb.ModelInferResponse, protocol="kserve"
                    ),
                },
            )
        ]

    def live(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """Say that the process answers."""
        return pb.ServerLiveResponse(live=True)

    def ready(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """Say whether every model gives PyTorch's vectors."""
        return pb.ServerReadyResponse(ready=self._models.ready)

    def model_ready(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """Say whether one model does."""
        return pb.ModelReadyResponse(ready=self._model(request.name, request.version).state is State.READY)

    def server(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """Name the server."""
        return pb.ServerMetadataResponse(name="f2rt", version=runtime.__version__)

    def model(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """Describe a model's tensors."""
        model = self._model(request.name, request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[VERSION],
            platform=f"f2rt_{model.embedder.loaded.record.backend}",
            inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1, 1])],
            outputs=[tensor(name=OUTPUT, datatype="FP32", shape=[-1, model.embedder.contract.dim])],
        )

    def infer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """Embed one request."""
        name = self._model(request.model_name, request.model_version).name
        for output in request.outputs:
            if output.name != OUTPUT:
                raise InputError(f"there is no output {output.name[:40]!r}.", cure=f"Ask for {OUTPUT!r}.")
        prompts = self._models.get(name).embedder.contract.prompts
        traceparent = header(context, "traceparent")
        call = _call(request, name, _parameters(request), prompts, context.time_remaining(), traceparent)
        reply = self._models.answer(call, "kserve", Dropping(context).begun)
        vectors = finish(reply.vectors, call.dimensions, call.normalize)
        dim, data = vectors.shape[1], encode(vectors, OutputDType.FLOAT32)[0]
        response = pb.ModelInferResponse(
            model_name=name, model_version=VERSION, id=request.id, raw_output_contents=[data]
        )
        response.outputs.add(name=OUTPUT, datatype="FP32", shape=[len(reply.items), dim])
        response.parameters["fingerprint"].string_param = reply.fingerprint
        response.parameters["tokens"].int64_param = sum(len(item.ids) for item in reply.items)
        response.parameters["truncated"].int64_param = sum(item.truncated for item in reply.items)
        return response

    def _model(self, name: str, version: str) -> Model:
        if version not in ("", VERSION):
            raise NotFoundError(f"there is no version {version[:40]!r}.", cure=f"Ask for {VERSION}, or for none.")
        return self._models.get(name)


def _parameters(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Return the request's parameters as Python values. Raises InputError for an unknown one."""
    values: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        if name in _IGNORED:
            continue
        if name not in _PARAMETERS:
            raise InputError(f"there is no parameter {name[:40]!r}.", cure=f"Use one of: {', '.join(_PARAMETERS)}.")
        kind = parameter.WhichOneof("parameter_choice")
        values[name] = getattr(parameter, kind) if kind else None
    return values


def _call(
    request: pb.ModelInferRequest,
    model: str,
    parameters: dict[str, Any],
    prompts: Any,
    remaining_s: float | None,
    traceparent: str,
) -> EmbedCall:
    """Translate a request. Raises InputError."""
    input_type = _typed(parameters, "input_type", str)
    prompt_name, prompt = _typed(parameters, "prompt_name", str), _typed(parameters, "prompt", str)
    if input_type is not None and (prompt_name is not None or prompt is not None):
        raise InputError("input_type and a prompt were both given.", cure="Give one of them.")
    truncate = _typed(parameters, "truncate", str)
    if truncate is not None and truncate.upper() not in _TRUNCATE:
        raise InputError(f"there is no truncate {truncate[:40]!r}.", cure="Choose END, START or NONE.")
    dimensions, timeout_us = _typed(parameters, "dimensions", int), _typed(parameters, "timeout", int)
    normalize = _typed(parameters, "normalize", bool)
    limits_s = [s for s in (remaining_s, 1e-6 * timeout_us if timeout_us else None) if s is not None]
    return EmbedCall(
        texts=_texts(request),
        instruction=instruction_for(input_type, prompts) if input_type else Instruction(prompt_name, prompt),
        truncate=_TRUNCATE[truncate.upper()] if truncate else None,
        dimensions=dimensions,
        normalize=True if normalize is None else normalize,
        deadline_s=time.perf_counter() + min(limits_s) if limits_s else None,
        request_id=request_id(request.id),
        model=model,
        traceparent=traceparent,
    )


def _typed(parameters: dict[str, Any], name: str, kind: type) -> Any:
    value = parameters.get(name)
    if value is None or type(value) is kind:
        return value
    if kind is int and isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)  # clients that know string parameters only
    if kind is bool and value in ("true", "false"):
        return value == "true"
    raise InputError(f"the parameter {name} is {value!r:.40}.", cure=f"Send it as {kind.__name__}.")


def _texts(request: pb.ModelInferRequest) -> list[str]:
    """Return the texts of a request's one input. Raises InputError."""
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = ", ".join(repr(i.name[:40]) for i in request.inputs[:5]) or "none"
        raise InputError(f"the inputs are {names}.", cure=f"Send one input, {INPUT!r}.")
    tensor = request.inputs[0]
    shape = list(tensor.shape)
    if tensor.datatype != "BYTES" or len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise InputError(
            f"the input {INPUT!r} is {tensor.datatype[:20]} of shape {shape[:5]}.", cure="Send BYTES of shape [n, 1]."
        )
    if request.raw_input_contents:
        if len(request.raw_input_contents) != 1:
            raise InputError(f"there are {len(request.raw_input_contents)} raw inputs.", cure="Send one.")
        blobs = _elements(request.raw_input_contents[0])
    else:
        blobs = list(tensor.contents.bytes_contents)
    if len(blobs) != shape[0]:
        raise InputError(f"the shape is {shape}, and there are {len(blobs)} texts.", cure="Make them agree.")
    try:
        return [blob.decode() for blob in blobs]
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not UTF-8 at byte {error.start}.", cure="Encode texts as UTF-8.") from error


def _elements(data: bytes) -> list[bytes]:
    """Split BYTES elements: each stands after its length, 4 bytes little-endian."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(data):
        raise InputError(
            f"the raw input of {len(data)} bytes ends in the middle of an element.",
            cure="Put each element's length before it, 4 bytes little-endian.",
        )
    return found
