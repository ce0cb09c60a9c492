"""The server's queue in simulated time: who waits, who is refused, how full batches are. No clock, no server, no model.

The queue is the one that serves; only the engine is imagined, a batch of which costs what `Engine` says, give or take.
It shows in seconds what a real engine takes hours to show: what callers who wait for their answers do to each other
(closed loop), and what comes at a rate of its own (open loop). Beside it stands a queue of the same batches that serves
who came first, and refuses nobody until 512 requests wait.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from runtime.batching import fill
from runtime.cost import CostModel
from runtime.errors import OverloadedError
from runtime.fair_order import Ticket
from runtime.scheduler import Planned
from runtime.settings import Limits, SchedulingSettings

_FORESEEN = (0.85, 1.2)  # times a text's tokens: before tokenization they are only foreseen
_NOISE = (0.85, 1.2)  # times a batch's cost
_PAUSE_S = 0.05  # of a caller who was refused, where the queue asks for less
_FIFO_REQUESTS, _WINDOW = 512, 256  # that may wait; items looked at for one batch
SHORTEST, LONGEST = 8, 512  # tokens of a text where lengths are mixed


@dataclass(frozen=True)
class Engine:
    """What a batch costs: `fixed_ms`, and `token_ms` for each padded token."""

    name: str
    fixed_ms: float
    token_ms: float

    def batch_ms(self, tokens: int) -> float:
        """Return what a batch of so many padded tokens takes."""
        return self.fixed_ms + self.token_ms * tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second in batches as large as efficiency asks for: its capacity."""
        return 1e3 * SchedulingSettings().efficiency / self.token_ms


@dataclass(frozen=True)
class Kind:
    """Requests of one kind: `texts` of `tokens` each, 0 for mixed lengths.

    They come at a rate of their own, `load` times what the engine can do, or from `callers` who wait for their answers
    and ask again.
    """

    name: str
    texts: int
    tokens: int = 0
    load: float = 0.0
    callers: int = 0

    def lengths(self, chance: random.Random) -> list[int]:
        """Return the tokens of one request's texts; mixed ones are as often between 8 and 16 as between 256 and 512."""
        if self.tokens:
            return [self.tokens] * self.texts
        low, high = math.log(SHORTEST), math.log(LONGEST)
        return [round(math.exp(chance.uniform(low, high))) for _ in range(self.texts)]

    @property
    def mean_tokens(self) -> float:
        """Return the tokens of a request in the mean."""
        mixed = (LONGEST - SHORTEST) / math.log(LONGEST / SHORTEST)
        return self.texts * (self.tokens or mixed)


@dataclass(frozen=True)
class Scenario:
    """An engine and what comes, for so many simulated seconds."""

    name: str
    engine: Engine
    kinds: tuple[Kind, ...]
    seconds: float


class Line(Protocol):
    """What a simulated engine asks of a queue: that of `FairQueue`."""

    cost: CostModel

    def __len__(self) -> int:
        """Return how many requests wait."""
        ...

    def check_door(self, now_s: float, tokens: int = 0) -> None:
        """Raise OverloadedError for a request that may not wait."""
        ...

    def admit(self, ticket: Ticket, now_s: float) -> None:
        """Take in a request. Raises OverloadedError."""
        ...

    def next_batch(self, now_s: float) -> Planned | None:
        """Take out the next batch; None when nothing waits."""
        ...


class Fifo:
    """First come, first served: the batches that `FairQueue` would make, of the items that came first."""

    def __init__(self, limits: Limits, settings: SchedulingSettings) -> None:
        self.cost = CostModel()
        self._limits, self._settings = limits, settings
        self._items: list[tuple[Ticket, int]] = []
        self._waiting: collections.Counter[Ticket] = collections.Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def check_door(self, now_s: float, tokens: int = 0) -> None:
        """Refuse when 512 requests wait."""
        if len(self) >= _FIFO_REQUESTS:
            raise OverloadedError(f"{len(self)} requests are waiting.", cure="Try again.", retry_after_s=_PAUSE_S)

    def admit(self, ticket: Ticket, now_s: float) -> None:
        """Take in a request."""
        self._waiting[ticket] = len(ticket.lengths)
        self._items += ((ticket, index) for index in range(len(ticket.lengths)))

    def next_batch(self, now_s: float) -> Planned | None:
        """Return the item that came first, with those of the next ones that go with it."""
        window = self._items[:_WINDOW]
        if not window:
            return None
        budget = max(self.cost.efficient_tokens(self._settings.efficiency), self._settings.least_batch_tokens)
        lengths = [ticket.lengths[index] for ticket, index in window]
        most = min(budget, self._limits.max_batch_tokens)
        chosen = fill(lengths, most, self._limits.max_batch_rows, self.cost.break_even_tokens)
        for k in sorted(chosen, reverse=True):
            del self._items[k]
        self._waiting.subtract(window[k][0] for k in chosen)
        self._waiting += collections.Counter()  # drops those with nothing left
        return Planned([window[k] for k in chosen], max(lengths[k] for k in chosen))


@dataclass
class Group:
    """What became of the requests of one kind; times in milliseconds, from coming to the last vector."""

    came: int = 0
    refused: int = 0
    tokens: int = 0  # of what was answered
    ms: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What a simulation found."""

    groups: dict[str, Group]
    batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0


@dataclass
class _Request:
    kind: Kind
    came_s: float
    left: int


class Simulation:
    """One queue under one scenario."""

    def __init__(self, scenario: Scenario, line: Line, seed: int = 0) -> None:
        """`line` learns what this engine's batches cost from five of them before anything comes."""
        self.outcome = Outcome({kind.name: Group() for kind in scenario.kinds})
        self._scenario, self._line = scenario, line
        # Each kind has chances of its own: what comes by itself is the same, whatever the queue makes of it.
        self._chances = {kind.name: random.Random(f"{seed} {kind.name}") for kind in scenario.kinds}
        self._noise = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._running: Planned | None = None
        for tokens in (1, 16, 64, 256, 1024):
            line.cost.observe(tokens, scenario.engine.batch_ms(tokens))

    def run(self) -> Outcome:
        """Run until the time is over; what is not answered by then is counted as having come, and no more."""
        for kind in self._scenario.kinds:
            if kind.load:
                self._at(self._next_s(kind, 0.0), partial(self._arrive, kind))
            for _ in range(kind.callers):
                self._at(0.0, partial(self._ask, kind))
        while self._events and self._events[0][0] < self._scenario.seconds:
            now_s, _, event = heapq.heappop(self._events)
            event(now_s)
            if self._running is None:
                self._begin(now_s)
        return self.outcome

    def _at(self, when_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), event))

    def _next_s(self, kind: Kind, now_s: float) -> float:
        rate = kind.load * self._scenario.engine.tokens_per_s / kind.mean_tokens
        return now_s + self._chances[kind.name].expovariate(rate)

    def _arrive(self, kind: Kind, now_s: float) -> None:
        self._at(self._next_s(kind, now_s), partial(self._arrive, kind))
        self._ask(kind, now_s)

    def _ask(self, kind: Kind, now_s: float) -> None:
        group, chance = self.outcome.groups[kind.name], self._chances[kind.name]
        lengths = kind.lengths(chance)
        foreseen = round(sum(lengths) * chance.uniform(*_FORESEEN))
        group.came += 1
        try:
            # As the server does: with an empty queue nothing needs to be foreseen.
            self._line.check_door(now_s, foreseen if len(self._line) else 0)
            self._line.admit(Ticket(lengths, payload=_Request(kind, now_s, len(lengths))), now_s)
        except OverloadedError as error:
            group.refused += 1
            if kind.callers:
                self._at(now_s + max(error.retry_after_s, _PAUSE_S), partial(self._ask, kind))

    def _begin(self, now_s: float) -> None:
        self._running = planned = self._line.next_batch(now_s)
        if planned is not None:
            ms = self._scenario.engine.batch_ms(planned.padded_tokens) * self._noise.uniform(*_NOISE)
            requests = [(ticket.payload, ticket.lengths[index]) for ticket, index in planned.rows]
            self._at(now_s + 1e-3 * ms, partial(self._end, planned, requests, ms))

    def _end(self, planned: Planned, requests: list[tuple[_Request, int]], ms: float, now_s: float) -> None:
        self._running = None
        self._line.cost.observe(planned.padded_tokens, ms, planned.width)
        outcome = self.outcome
        outcome.batches += 1
        outcome.tokens += planned.tokens
        outcome.padded_tokens += planned.padded_tokens
        for request, tokens in requests:
            kind, group = request.kind, outcome.groups[request.kind.name]
            group.tokens += tokens
            request.left -= 1
            if not request.left:
                group.ms.append(1e3 * (now_s - request.came_s))
                if kind.callers:
                    self._ask(kind, now_s)
