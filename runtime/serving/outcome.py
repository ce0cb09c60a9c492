"""What became of a request, in numbers: neither texts nor vectors are kept until it is counted and logged."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.serving.call import EmbedCall, EmbedReply, Timings


@dataclass(frozen=True)
class Answered:
    """What was answered; `texts` of which `truncated` were cut, `tokens` of all of them together."""

    texts: int
    truncated: int
    tokens: int
    fingerprint: str
    timings: Timings


@dataclass(frozen=True)
class Outcome:
    """One request; `model` is "" when there is none of the name asked for, `answered` None without an answer."""

    model: str
    protocol: str
    status: str
    request_id: str
    traceparent: str
    received_ns: int
    items: int
    answered: Answered | None
    error: str

    @classmethod
    def of(
        cls, model: str, protocol: str, status: str, call: EmbedCall, reply: EmbedReply | None = None, error: str = ""
    ) -> Outcome:
        """Return what is to be known of a call and its reply."""
        answered = None
        if reply is not None:
            cut = sum(item.truncated for item in reply.items)
            tokens = sum(len(item.ids) for item in reply.items)
            answered = Answered(len(reply.items), cut, tokens, reply.fingerprint, reply.timings)
        return cls(
            model,
            protocol,
            status,
            call.request_id,
            call.traceparent,
            call.received_ns,
            call.items,
            answered,
            error,
        )
