"""Settings as frozen dataclasses, validated where they are made. Reading flags and environment is `cli`'s work."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.errors import InputError
from runtime.tokenizer import Truncate


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise InputError(f"{name} is {value}; it must be at least {least}.", cure=f"Set {name} to {least} or more.")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine uses the machine.

    On CPU, `threads` 0: one per physical core; `spin`: threads poll between batches. On a GPU, `cuda_graphs`: shapes
    that come back are replayed as CUDA graphs.
    """

    threads: int = 0
    spin: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        _at_least("threads", self.threads, 0)


@dataclass(frozen=True)
class Limits:
    """What one request and one batch may hold.

    `max_batch_tokens` counts padded tokens (rows x width), the cost of a batch; `max_text_chars` (one text) and
    `max_request_chars` (all texts of a request with their prompts) bound tokenization before it starts.
    """

    max_items: int = 2048
    max_text_chars: int = 1_000_000
    max_request_chars: int = 8_000_000
    max_request_tokens: int = 300_000
    max_batch_tokens: int = 16_384
    max_batch_rows: int = 256

    def __post_init__(self) -> None:
        for name in (
            "max_items",
            "max_text_chars",
            "max_request_chars",
            "max_request_tokens",
            "max_batch_tokens",
            "max_batch_rows",
        ):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class ServeSettings:
    """What a server needs besides its bundle. Message sizes in bytes, times in seconds."""

    grpc_address: str = "127.0.0.1:50051"
    truncate: Truncate = Truncate.END
    limits: Limits = field(default_factory=Limits)
    max_message_bytes: int = 64 << 20
    max_waiting_requests: int = 256
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        _at_least("max_message_bytes", self.max_message_bytes, 1024)
        _at_least("max_waiting_requests", self.max_waiting_requests, 1)
        _at_least("drain_s", self.drain_s, 0)
        if not self.grpc_address.startswith("unix:"):
            host, _, port = self.grpc_address.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                raise InputError(
                    f"the address {self.grpc_address!r} is not HOST:PORT.",
                    cure="Give for example 127.0.0.1:50051, [::1]:50051 or unix:/run/f2rt.sock.",
                )
