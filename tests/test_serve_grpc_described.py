"""f2rt.v1 besides its vectors: Explain and Info, health and reflection. A real process on loopback."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from transformers import AutoTokenizer

import runtime
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.bundle import Bundle
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.settings import Limits, ServeSettings
from runtime.wire.f2rt_v1 import SERVICE_NAME
from runtime.wire.kserve_v2 import SERVICE_NAME as KSERVE
from tests.grpc_messages import EMBED, same
from tests.serving import SERVING, TEXTS, failure

MODEL = "mini"

# ---------------------------------------------------------------------------------------------------- Explain and Info


def test_explain_gives_transformers_ids(client: EmbeddingClient, bundle: Bundle, mini: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(mini)
    contract = bundle.manifest.contract
    for name, prompt in {None: "", **contract.prompts}.items():
        for text, item in zip(TEXTS, client.explain(TEXTS, prompt_name=name), strict=True):
            assert item.ids == theirs(prompt + text)["input_ids"], (name, text)
            assert item.rendered == prompt + text
            assert item.tokens == theirs.convert_ids_to_tokens(item.ids)
            assert item.pooled_position == len(item.ids) - 1
            assert item.pooled_id == item.ids[-1] == contract.eos_id
            assert (item.truncated, item.original_tokens) == (False, len(item.ids))


def test_explain_of_token_ids(client: EmbeddingClient) -> None:
    (item,) = client.explain(token_ids=[[5, 9, 6]])
    assert (item.ids, item.rendered, item.pooled_position, item.pooled_id) == ([5, 9, 6], "", 2, 6)


def test_info_is_the_manifest(client: EmbeddingClient, bundle: Bundle) -> None:
    info, manifest, limits = client.info(), bundle.manifest, Limits()
    (engine,) = manifest.engines
    assert engine.parity is not None
    assert (info.model, info.revision) == (manifest.source.id, manifest.source.revision or "")
    assert (info.engine, info.precision) == (engine.name, engine.precision)
    assert (info.dim, info.trained_dims) == (manifest.contract.dim, manifest.contract.trained_dims)
    assert info.max_tokens == manifest.contract.max_tokens
    assert info.prompts == manifest.contract.prompts
    assert info.default_prompt_name == (manifest.contract.default_prompt_name or "")
    assert info.default_truncate is ServeSettings().truncate
    assert (info.max_items, info.max_request_tokens) == (limits.max_items, limits.max_request_tokens)
    assert info.license == (manifest.source.license or "")
    assert info.verdict == "pass"
    assert info.min_cosine == pytest.approx(engine.parity.min_cosine)
    assert info.version == runtime.__version__
    assert "passing verdict" in info.selection


# ----------------------------------------------------------------------------------------------- health and reflection


def test_health_check_list_and_watch(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    names = ("", SERVICE_NAME, KSERVE, MODEL)
    for name in names:
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
    statuses = stub.List(health_pb2.HealthListRequest()).statuses
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(names, SERVING)
    for name, expected in (("", SERVING), ("nobody", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        assert next(watch).status == expected
        watch.cancel()
    error = failure(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_client_without_stubs_embeds_by_reflection(channel: grpc.Channel, embedder: Embedder) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName(SERVICE_NAME).FindMethodByName("Embed")
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    assert request_class is not pb.EmbedRequest
    call = channel.unary_unary(
        EMBED, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
    )
    answer = call(request_class(input={"texts": TEXTS, "prompt_name": "query"}, dimensions=64))
    vectors = np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)
    assert same(vectors, embedder.embed(TEXTS, prompt_name="query", dimensions=64).vectors)
