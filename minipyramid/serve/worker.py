"""The thread that owns the engine: it submits, steps and cancels, and tells the event loop what is new.

Everything that changes what waits and runs happens here, so the event loop never waits for a step, and what
is read of the caches is read between two steps.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

from minipyramid.cache import Positions
from minipyramid.cli.terminal import tell
from minipyramid.engine import Engine, News
from minipyramid.errors import RequestError
from minipyramid.policies.profile import replaced_positions
from minipyramid.request import Sequence
from minipyramid.serve.metrics import Metrics

PICTURE_S = 0.2  # between two pictures of what a sequence holds
NEXT_S, GATHER_S = 0.01, 0.1  # that an idle engine waits for a next request, and at most for all
AFTER_ERROR_S = 0.1  # until a step is tried again
STOPPED = "the server is being stopped; ask again later"

Ranges = list[list[int]]  # first and last position of each run


class EndingError(RequestError):
    """The server is being stopped."""


@dataclass(eq=False)
class Ticket:
    """A sequence that a client waits for: one choice of its answer."""

    sequence: Sequence
    index: int
    planned: int  # bytes of keys, values and votes at its longest
    events: "asyncio.Queue[Event]"
    wants_picture: bool = False
    began: float = field(default_factory=time.monotonic)
    pictured: float = 0.0  # when a picture was last made
    told: int = 0  # tokens that events have told of
    has_begun: bool = False  # has a first token


@dataclass(frozen=True)
class Event:
    """What is new of a ticket."""

    ticket: Ticket
    text: str
    tokens: int  # so far
    ended: bool
    kept: list[Ranges] | None = None  # [layer], what is held now


class Worker(threading.Thread):
    """Steps as long as anything waits or runs."""

    def __init__(self, engine: Engine, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.metrics, self.loop = engine, metrics, loop
        self.coming = 0  # requests that are being prepared
        self._tickets: dict[Sequence, Ticket] = {}
        self._news: deque[News] = deque()
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False

    # --- what the event loop calls ---

    def submit(self, ticket: Ticket) -> None:
        """Let its sequence wait for room; what is new of it comes into its `events`."""
        self._order(lambda: self._submit(ticket))

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its row is free before the next step."""
        self._order(lambda: self._leave(ticket))

    def end_all(self) -> None:
        """End what runs and waits."""
        self._order(lambda: self._end_all(EndingError(STOPPED)))

    def close(self) -> None:
        """End after the step that is being computed."""
        self._closing = True
        self._wake.set()
        self.join()

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._wake.set()

    # --- in its own thread ---

    def run(self) -> None:
        """Until it is closed."""
        self.metrics.look(self.engine.scheduler)  # the bound is told from the beginning
        while not self._closing:
            self._wake.wait()
            self._gather()
            while self._work() and not self._closing:
                pass

    def _gather(self) -> None:
        """Let an idle engine wait while requests come in, for those that start together share a cache."""
        deadline = time.monotonic() + GATHER_S
        while not self._closing and time.monotonic() < deadline:
            self._wake.clear()
            if not self._wake.wait(NEXT_S) and not self.coming:
                break

    def _work(self) -> bool:
        """Carry out orders, and take a step; returns whether anything is left to step."""
        try:
            while self._orders:
                self._orders.popleft()()
            if self._tickets:
                self._step()
            # Before anybody is told, so that who has been finds in the metrics what is held then.
            self.metrics.look(self.engine.scheduler)
            self._tell()
        except Exception as error:  # what was to be told is lost, and nobody may wait for it for ever
            tell(f"minipyramid: what was new could not be told: {error!r}")
            self._end_all(RequestError("the server failed between two steps; ask again"))
        return bool(self._tickets)

    def _step(self) -> None:
        try:
            self.engine.advance()
        except Exception as error:  # those that ran are told by their sequence's error
            tell(f"minipyramid: a step failed: {error!r}")
            time.sleep(AFTER_ERROR_S)
        for ticket in self._tickets.values():
            if not ticket.has_begun and ticket.sequence.completion.token_ids:
                ticket.has_begun = True
                self.metrics.first_token(time.monotonic() - ticket.began)

    def _submit(self, ticket: Ticket) -> None:
        self._tickets[ticket.sequence] = ticket
        self.engine.submit(ticket.sequence, self._news)

    def _leave(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.sequence, None):
            self._count_tokens(ticket)
            self.engine.cancel(ticket.sequence)

    def _end_all(self, error: RequestError) -> None:
        """Give every row back, and tell each client why."""
        tickets = list(self._tickets.values())
        for ticket in tickets:
            self._leave(ticket)
            ticket.sequence.error = error
        self._deliver([Event(ticket, "", ticket.told, ended=True) for ticket in tickets])

    def _count_tokens(self, ticket: Ticket) -> None:
        new = len(ticket.sequence.completion.token_ids)
        self.metrics.generated += new - ticket.told
        ticket.told = new

    def _tell(self) -> None:
        """Everything new of a step in one call of the event loop."""
        events, now = [], time.monotonic()
        try:
            while self._news:
                sequence, piece = self._news.popleft()
                ticket = self._tickets.get(sequence)
                if ticket is None:
                    continue  # it has left
                events.append(self._event(ticket, piece, now))
                if piece is None:
                    del self._tickets[sequence]
        finally:  # whom an error keeps from hearing its own end hears of the error, and nobody else does
            self._deliver(events)

    def _deliver(self, events: list[Event]) -> None:
        if events and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(deliver, events)

    def _event(self, ticket: Ticket, piece: str | None, now: float) -> Event:
        done, ended = ticket.sequence.completion, piece is None
        self._count_tokens(ticket)
        positions = None
        row = ticket.sequence.row
        if ticket.wants_picture and ended:
            positions = done.kept_positions
        elif ticket.wants_picture and row and now - ticket.pictured > PICTURE_S:
            ticket.pictured, positions = now, row.kept_positions()
        kept = None
        if positions is not None:
            sequence = ticket.sequence
            lost = replaced_positions(sequence.policy, len(sequence.prompt), len(positions))
            kept = picture(positions, lost)
        return Event(ticket, piece or "", ticket.told, ended, kept)


def deliver(events: list[Event]) -> None:
    """In the event loop: each to whoever waits for it."""
    for event in events:
        event.ticket.events.put_nowait(event)


def picture(layers: list[Positions], replaced: list[int | None]) -> list[Ranges]:
    """Which positions a layer holds, in any of its heads, as runs; not the one that a stand-in replaces."""
    shown = []
    for layer, lost in zip(layers, replaced, strict=True):
        heads = [head for head in layer if isinstance(head, list)]
        alike = [position for position in layer if isinstance(position, int)]
        held = {position for head in heads or [alike] for position in head}
        ranges = []
        # Positions that follow each other differ from their index by the same number.
        for _, run in groupby(enumerate(sorted(held - {lost})), key=lambda pair: pair[1] - pair[0]):
            each = [position for _, position in run]
            ranges.append([each[0], each[-1]])
        shown.append(ranges)
    return shown
