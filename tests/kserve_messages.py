"""KServe messages for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import grpc

from runtime._pb.inference import grpc_service_pb2 as pb
from runtime._pb.inference import grpc_service_pb2_grpc as pb_grpc


def stub_of(channel: grpc.Channel) -> Any:
    return pb_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def request(
    texts: Sequence[str | bytes], *, raw: bool = True, model: str = "mini", **more: Any
) -> pb.ModelInferRequest:
    blobs = [t if isinstance(t, bytes) else t.encode() for t in texts]
    message = pb.ModelInferRequest(model_name=model, **more)
    tensor = message.inputs.add(name="text", datatype="BYTES", shape=[len(blobs), 1])
    if raw:
        message.raw_input_contents.append(b"".join(struct.pack("<I", len(b)) + b for b in blobs))
    else:
        tensor.contents.bytes_contents.extend(blobs)
    return message


def with_parameters(message: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferRequest:
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message
