from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Truncate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATE_UNSPECIFIED: _ClassVar[Truncate]
    TRUNCATE_ERROR: _ClassVar[Truncate]
    TRUNCATE_END: _ClassVar[Truncate]
    TRUNCATE_START: _ClassVar[Truncate]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
    DTYPE_BINARY: _ClassVar[DType]
TRUNCATE_UNSPECIFIED: Truncate
TRUNCATE_ERROR: Truncate
TRUNCATE_END: Truncate
TRUNCATE_START: Truncate
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_INT8: DType
DTYPE_BINARY: DType

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EmbedInput(_message.Message):
    __slots__ = ("texts", "token_ids", "prompt_name", "prompt", "truncate")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedCompositeFieldContainer[TokenIds]
    prompt_name: str
    prompt: str
    truncate: Truncate
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., prompt_name: _Optional[str] = ..., prompt: _Optional[str] = ..., truncate: _Optional[_Union[Truncate, str]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("input", "dimensions", "normalize", "dtype", "request_id", "model")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    input: EmbedInput
    dimensions: int
    normalize: bool
    dtype: DType
    request_id: str
    model: str
    def __init__(self, input: _Optional[_Union[EmbedInput, _Mapping]] = ..., dimensions: _Optional[int] = ..., normalize: _Optional[bool] = ..., dtype: _Optional[_Union[DType, str]] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("tokens", "truncated", "original_tokens", "scale")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    truncated: bool
    original_tokens: int
    scale: float
    def __init__(self, tokens: _Optional[int] = ..., truncated: _Optional[bool] = ..., original_tokens: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("tokenize_ms", "queue_ms", "infer_ms", "total_ms")
    TOKENIZE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    INFER_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    tokenize_ms: float
    queue_ms: float
    infer_ms: float
    total_ms: float
    def __init__(self, tokenize_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., infer_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "rows", "dim", "dtype", "items", "timings", "fingerprint", "request_id", "trained_dimension")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINED_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    rows: int
    dim: int
    dtype: DType
    items: _containers.RepeatedCompositeFieldContainer[Item]
    timings: Timings
    fingerprint: str
    request_id: str
    trained_dimension: bool
    def __init__(self, embeddings: _Optional[bytes] = ..., rows: _Optional[int] = ..., dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., fingerprint: _Optional[str] = ..., request_id: _Optional[str] = ..., trained_dimension: _Optional[bool] = ...) -> None: ...

class EmbedStreamResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: EmbedResponse
    error: StreamError
    def __init__(self, response: _Optional[_Union[EmbedResponse, _Mapping]] = ..., error: _Optional[_Union[StreamError, _Mapping]] = ...) -> None: ...

class StreamError(_message.Message):
    __slots__ = ("code", "message", "request_id", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    request_id: str
    retry_after_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., request_id: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("input", "model")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    input: EmbedInput
    model: str
    def __init__(self, input: _Optional[_Union[EmbedInput, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("rendered", "ids", "tokens", "pooled_position", "pooled_id", "truncated", "original_tokens")
    RENDERED_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOLED_POSITION_FIELD_NUMBER: _ClassVar[int]
    POOLED_ID_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    rendered: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    pooled_position: int
    pooled_id: int
    truncated: bool
    original_tokens: int
    def __init__(self, rendered: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ..., pooled_position: _Optional[int] = ..., pooled_id: _Optional[int] = ..., truncated: _Optional[bool] = ..., original_tokens: _Optional[int] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("items", "fingerprint")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Explanation]
    fingerprint: str
    def __init__(self, items: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("model", "revision", "engine", "precision", "fingerprint", "dim", "trained_dims", "max_tokens", "prompts", "default_prompt_name", "default_truncate", "max_items", "max_request_tokens", "license", "verdict", "min_cosine", "version", "selection", "name", "models", "state", "golden_cosine", "unverified", "policy_sha256")
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    TRAINED_DIMS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    MIN_COSINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_COSINE_FIELD_NUMBER: _ClassVar[int]
    UNVERIFIED_FIELD_NUMBER: _ClassVar[int]
    POLICY_SHA256_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    engine: str
    precision: str
    fingerprint: str
    dim: int
    trained_dims: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    prompts: _containers.ScalarMap[str, str]
    default_prompt_name: str
    default_truncate: Truncate
    max_items: int
    max_request_tokens: int
    license: str
    verdict: str
    min_cosine: float
    version: str
    selection: str
    name: str
    models: _containers.RepeatedScalarFieldContainer[str]
    state: str
    golden_cosine: float
    unverified: str
    policy_sha256: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., engine: _Optional[str] = ..., precision: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dim: _Optional[int] = ..., trained_dims: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., prompts: _Optional[_Mapping[str, str]] = ..., default_prompt_name: _Optional[str] = ..., default_truncate: _Optional[_Union[Truncate, str]] = ..., max_items: _Optional[int] = ..., max_request_tokens: _Optional[int] = ..., license: _Optional[str] = ..., verdict: _Optional[str] = ..., min_cosine: _Optional[float] = ..., version: _Optional[str] = ..., selection: _Optional[str] = ..., name: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., golden_cosine: _Optional[float] = ..., unverified: _Optional[str] = ..., policy_sha256: _Optional[str] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ("model", "engine")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ...) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("model", "old_fingerprint", "new_fingerprint", "engine")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OLD_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NEW_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    model: str
    old_fingerprint: str
    new_fingerprint: str
    engine: str
    def __init__(self, model: _Optional[str] = ..., old_fingerprint: _Optional[str] = ..., new_fingerprint: _Optional[str] = ..., engine: _Optional[str] = ...) -> None: ...
