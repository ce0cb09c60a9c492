"""Settings as frozen dataclasses, validated where they are made. Reading flags and environment is `cli`'s work."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from runtime.errors import InputError
from runtime.tokenizer import Truncate

_MOST_S = 1e8  # three years: what a thread can wait for is bounded
# A host's name, an IPv4 address, or an IPv6 one in brackets; no URL.
_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%A-Za-z0-9]+\]):([0-9]{1,5})")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:  # which NaN is not either
        raise InputError(f"{name} is {value}; it must be at least {least}.", cure=f"Set {name} to {least} or more.")


def _seconds(name: str, value: float, least: float) -> None:
    _at_least(name, value, least)
    if value > _MOST_S:
        raise InputError(f"{name} is {value}; it must be at most {_MOST_S:g}.", cure="Give seconds, up to three years.")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine uses the machine.

    On CPU, `threads` 0: one per core (`runtime.cores`); `spin`: threads poll between batches. On a GPU, `cuda_graphs`:
    shapes that come back are replayed as CUDA graphs.
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
class SchedulingSettings:
    """How batches form and how much may wait. The fields' values are the preset `latency`; see `PRESETS`.

    `efficiency`: batches are as large as it takes to reach this part of the engine's best throughput, at least
    `least_batch_tokens` and at most `Limits.max_batch_tokens`. `gather_ms`: how long an idle engine waits for company
    for the first request. A burst may wait up to `max_wait_ms`, where 0 is as long as 8 requests of the mean size take
    and at least a second, and three times that while fewer than 8 wait; when something has been waiting for `burst_ms`
    without a pause and `overload` times as many requests come as are served, only as long as `standing_batches` batches
    take, or requests of the mean size where these are larger, and no more than half a second beyond one of them; a
    request of a twentieth of what takes the engine's time is let in all the same, as long as such take no more than
    half of it. A request whose tokens are only foreseen is refused at nine tenths of `max_wait_ms`. The rest are hard
    limits.
    """

    efficiency: float = 0.97
    least_batch_tokens: int = 64
    gather_ms: float = 0.0
    max_wait_ms: float = 0.0
    burst_ms: float = 200.0
    overload: float = 1.3
    standing_batches: float = 3.0
    max_waiting_requests: int = 1024
    max_waiting_items: int = 16_384
    max_waiting_tokens: int = 600_000

    def __post_init__(self) -> None:
        if not 0 < self.efficiency < 1:
            raise InputError(
                f"efficiency is {self.efficiency}; it is a part of the best throughput.",
                cure="Give a number between 0 and 1, for example 0.95.",
            )
        for name, least in (
            *(
                ("gather_ms", 0.0),
                ("max_wait_ms", 0.0),
                ("burst_ms", 0.0),
                ("standing_batches", 1.0),
                ("overload", 1.0),
            ),
            *((n, 1) for n in ("least_batch_tokens", "max_waiting_requests", "max_waiting_items")),
            ("max_waiting_tokens", 1),
        ):
            _at_least(name, getattr(self, name), least)


PRESETS = {
    "latency": SchedulingSettings(),
    # For indexing: large batches, a short wait for company, and a long queue instead of refusals.
    "throughput": SchedulingSettings(efficiency=0.985, gather_ms=5.0, max_wait_ms=60_000.0, overload=1e9),
}


@dataclass(frozen=True)
class ModelSettings:
    """A model to serve: the name that requests ask for, its bundle's folder, and which engine of it."""

    name: str
    bundle: str
    engine: str = "auto"

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 100 or not self.name.isprintable():
            raise InputError(
                f"the model name {self.name!r} is not 1 to 100 printable characters.", cure="Give NAME=BUNDLE."
            )

    def with_engine(self, engine: str) -> ModelSettings:
        """Return the same model with another engine."""
        return replace(self, engine=engine)


@dataclass(frozen=True)
class ShadowSettings:
    """Which engine looks on, at what share of the requests (0 to 1), and from which drift on it is logged."""

    bundle: str
    engine: str = "auto"
    share: float = 0.05
    drift: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"the shadow's share is {self.share}.", cure="Give a number above 0, up to 1.")
        _at_least("shadow_drift", self.drift, 0)


@dataclass(frozen=True)
class TlsSettings:
    """Files in PEM: the server's certificate and key, and with `client_ca` the authority that clients must have."""

    certificate: str
    key: str
    client_ca: str = ""


@dataclass(frozen=True)
class ServeSettings:
    """What a server needs besides its models. Sizes in bytes, times in seconds.

    `http_address` "" is no HTTP. `golden_period_s` is the time between two checks of the running engine, and
    `golden_timeout_s` how long one may take. `policy` is the file of the limits that engines must have been proven
    under, "" the shipped ones; `allow_unverified` lets engines answer that were not. `keys_file` "" is no keys,
    `otlp_endpoint` "" no traces.
    """

    grpc_address: str = "127.0.0.1:50051"
    http_address: str = ""
    truncate: Truncate = Truncate.END
    limits: Limits = field(default_factory=Limits)
    scheduling: SchedulingSettings = field(default_factory=SchedulingSettings)
    max_message_bytes: int = 32 << 20
    max_connections: int = 10_000
    drain_s: float = 10.0
    golden_period_s: float = 10.0
    golden_timeout_s: float = 60.0
    policy: str = ""
    allow_unverified: bool = False
    tls: TlsSettings | None = None
    keys_file: str = ""
    shadow: ShadowSettings | None = None
    access_log: bool = True
    otlp_endpoint: str = ""

    def __post_init__(self) -> None:
        _at_least("max_message_bytes", self.max_message_bytes, 1024)
        _at_least("max_connections", self.max_connections, 1)
        _seconds("drain_s", self.drain_s, 0)
        _seconds("golden_period_s", self.golden_period_s, 0.01)
        _seconds("golden_timeout_s", self.golden_timeout_s, 0.01)
        _check_address(self.grpc_address, "127.0.0.1:50051")
        if self.http_address:
            _check_address(self.http_address, "127.0.0.1:8080")


def _check_address(address: str, example: str) -> None:
    if address.startswith("unix:"):
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[1]) > 65535:
        raise InputError(
            f"the address {address!r} is not HOST:PORT.",
            cure=f"Give for example {example}, [::1]{example[9:]} or unix:/run/f2rt.sock.",
        )
