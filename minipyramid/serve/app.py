"""The routes: who may ask, how much, and what becomes of a request until its client is answered or goes."""

import asyncio
import contextlib
import hmac
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minipyramid import LLM, MiniPyramidError
from minipyramid.cli.json_input import json_object
from minipyramid.serve.answers import Answer, error_body, sse
from minipyramid.serve.fields import Asked, ModelNotFoundError, asked_of
from minipyramid.serve.loopback import is_loopback
from minipyramid.serve.metrics import Metrics
from minipyramid.serve.page import PAGE
from minipyramid.serve.worker import STOPPED, EndingError, Event, Ticket, Worker

MOST_BYTES = 8 << 20  # of a body
BODY_S = 30.0  # in which a body must have come
OPEN = ("/", "/health")  # without a key: they tell nothing
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")


@dataclass(frozen=True)
class Limits:
    """What the server grants."""

    api_key: str | None = None
    max_waiting: int = 256  # sequences
    max_new_tokens: int = 256  # where a request names none
    chats: bool = True  # whether messages can be rendered


class RefusedError(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Service:
    """One LLM, and those who wait for its answers."""

    def __init__(self, llm: LLM, model: str, limits: Limits) -> None:
        self.llm, self.model, self.limits = llm, model, limits
        self.metrics = Metrics()
        self.live: dict[Ticket, None] = {}  # in the order in which they came
        self.preparing = asyncio.Lock()  # one at a time, for it takes a processor from the engine
        self.worker: Worker
        self.reading: set[asyncio.Future[bytes]] = set()  # bodies that are still coming
        self.ending = False

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """While the server runs, so does the engine's thread."""
        self.worker = Worker(self.llm.engine, self.metrics, asyncio.get_running_loop())
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.close)

    # --- routes ---

    async def page(self, _: HttpRequest) -> Response:
        """Where a person can try it."""
        return HTMLResponse(PAGE)

    async def health(self, _: HttpRequest) -> Response:
        """Whether the engine's thread is there."""
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 500)

    async def metrics_text(self, _: HttpRequest) -> Response:
        """What was counted, for Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: HttpRequest) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: HttpRequest) -> Response:
        """The model, by its name."""
        name = request.path_params["name"]
        if name != self.model:
            told = f"there is no model {name!r:.60}; expected {self.model!r}"
            return JSONResponse(error_body(told, 404, "model_not_found"), 404)
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "minipyramid"}

    async def completions(self, request: HttpRequest) -> Response:
        """A prompt, or several, continued."""
        return await self.answer(request, chat=False)

    async def chat(self, request: HttpRequest) -> Response:
        """Messages, answered."""
        return await self.answer(request, chat=True)

    # --- a request ---

    async def read(self, request: HttpRequest) -> bytes:
        """The body, unless the server ends before it is there."""
        reading = asyncio.ensure_future(read_body(request))
        self.reading.add(reading)
        try:
            return await reading
        except asyncio.CancelledError as error:
            raise RefusedError(503, STOPPED) from error
        finally:
            reading.cancel()
            self.reading.discard(reading)

    async def answer(self, request: HttpRequest, chat: bool) -> Response:
        """From a body to a response, whatever is in it."""
        try:
            body = json_object(await self.read(request), "the body")
            self.worker.coming += 1
            try:
                async with self.preparing:
                    asked, tickets = await run_in_threadpool(self.prepare, body, chat)
                self.admit(tickets)
                self.metrics.prompts += asked.prompt_tokens
            finally:
                self.worker.coming -= 1
        except RefusedError as refused:
            retry = {"Retry-After": "1"} if refused.status == 429 else None
            return JSONResponse(error_body(str(refused), refused.status, refused.code), refused.status, retry)
        except ModelNotFoundError as error:
            return JSONResponse(error_body(str(error), 404, "model_not_found"), 404)
        except (MiniPyramidError, TypeError) as error:
            return JSONResponse(error_body(str(error), 400), 400)
        answer = Answer(asked, self.model, self.llm.tokenizer)
        if asked.stream:
            return Stream(self, answer, tickets)
        try:
            return await self.collect(request, answer, tickets)
        finally:
            self.leave(tickets)

    def prepare(self, body: dict[str, Any], chat: bool) -> tuple[Asked, list[Ticket]]:
        """What a body asks for, checked and planned."""
        if chat and not self.limits.chats:
            told = "the model is served without a chat template; ask for completions, or for --chat-format"
            raise RefusedError(400, told)
        asked = asked_of(self.llm, body, chat, self.model, self.limits.max_new_tokens)
        events: asyncio.Queue[Event] = asyncio.Queue()
        tickets = []
        for i, request in enumerate(asked.requests):
            sequence = self.llm.engine.prepare(request)
            planned = self.llm.engine.scheduler.bytes_of(sequence)
            tickets.append(Ticket(sequence, i, planned, events, asked.picture))
        return asked, tickets

    def admit(self, tickets: list[Ticket]) -> None:
        """Submit them, unless they would have to wait and too many do already."""
        if self.ending:
            raise RefusedError(503, STOPPED)
        most = self.limits.max_waiting
        if self._waiting(tickets) > most:
            told = f"the request is of {len(tickets)} sequences, of which more than {most} would have to wait"
            raise RefusedError(400, f"{told}; ask for fewer at once")
        there = [ticket for ticket in self.live if not ticket.sequence.ended]
        running_first = sorted(there, key=lambda ticket: ticket.sequence.row is None)
        waiting = self._waiting([*running_first, *tickets])
        if waiting > most:
            told = f"{waiting} sequences would wait for room, and {most} may; try again"
            raise RefusedError(429, told, "overloaded")
        for ticket in tickets:
            self.live[ticket] = None
            self.worker.submit(ticket)

    def _waiting(self, tickets: list[Ticket]) -> int:
        """How many would wait if these were all, in this order: from the first on that finds no room."""
        memory = self.llm.engine.scheduler.memory
        return sum(so_far > memory for so_far in accumulate(ticket.planned for ticket in tickets))

    def end_all(self) -> None:
        """End what runs and waits, and take nothing more; each client is told so."""
        self.ending = True
        for reading in self.reading:
            reading.cancel()
        self.worker.end_all()

    def leave(self, tickets: list[Ticket]) -> None:
        """Nobody waits for them any more, or they have ended."""
        for ticket in tickets:
            self.live.pop(ticket, None)
            if not ticket.sequence.ended:
                self.worker.leave(ticket)

    async def collect(self, request: HttpRequest, answer: Answer, tickets: list[Ticket]) -> Response:
        """The whole answer, or nothing for a client that goes away."""
        gone = asyncio.ensure_future(until_gone(request))
        try:
            for _ in tickets:
                ended = asyncio.ensure_future(next_end(tickets[0].events))
                await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    ended.cancel()
                    return Response(status_code=499)
                self.live.pop(ended.result(), None)
        finally:
            gone.cancel()
        for ticket in tickets:
            if ticket.sequence.error:
                status = 503 if isinstance(ticket.sequence.error, EndingError) else 500
                return JSONResponse(error_body(str(ticket.sequence.error), status), status)
        return JSONResponse(answer.whole([ticket.sequence.completion for ticket in tickets]))

    async def pieces(self, answer: Answer, tickets: list[Ticket]) -> AsyncIterator[bytes]:
        """The answer as it comes; what came meanwhile is one piece of the connection."""
        parts, left, events = answer.begin(), len(tickets), tickets[0].events
        while left:
            event = await events.get()
            while True:
                if event.ended and event.ticket.sequence.error:
                    parts.append(sse(error_body(str(event.ticket.sequence.error), 500)))
                    left = 1  # nothing follows an error
                else:
                    parts.append(answer.piece(event))
                if event.ended:
                    self.live.pop(event.ticket, None)
                    left -= 1
                if not left or events.empty():
                    break
                event = events.get_nowait()
            yield b"".join(parts)
            parts = []
        yield answer.end([ticket.sequence.completion for ticket in tickets])


class Stream(StreamingResponse):
    """Server-sent events; however it ends, its tickets leave."""

    def __init__(self, service: Service, answer: Answer, tickets: list[Ticket]) -> None:
        self.service, self.tickets = service, tickets
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(service.pieces(answer, tickets), 200, headers, "text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that went before anything was sent counts, too."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.leave(self.tickets)


async def read_body(request: HttpRequest) -> bytes:
    """The body, if it is JSON, comes in time, and is not too large."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a foreign page's form cannot say so without being asked first
        raise RefusedError(415, f"the content type is {kind!r:.60}, expected application/json")
    data = bytearray()

    async def read() -> None:
        async for part in request.stream():
            data.extend(part)
            if len(data) > MOST_BYTES:
                raise RefusedError(413, f"the body is larger than {MOST_BYTES >> 20} MiB; send less")

    try:
        await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError as error:
        raise RefusedError(408, f"the body did not come within {BODY_S:.0f} s; send it again") from error
    return bytes(data)


async def until_gone(request: HttpRequest) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def next_end(events: "asyncio.Queue[Event]") -> Ticket:
    """Wait until the next choice has ended."""
    while not (event := await events.get()).ended:
        pass
    return event.ticket


class Gate:
    """Lets in who has the key; without one, who speaks to the loopback address by its own name."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application around another."""
        app = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if self.api_key is None:
                host = headers.get(b"host", b"").decode("latin-1")
                name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
                if not is_loopback(name):  # another page's script, say, behind a name of its own
                    told = f"the host {host!r:.60} is not this machine's own; start the server with --api-key"
                    app = JSONResponse(error_body(told, 403), 403)
            elif scope["path"] not in OPEN:
                given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
                if not hmac.compare_digest(given, os.fsencode(self.api_key)):
                    told = "the API key is wrong or missing; send it as Authorization: Bearer KEY"
                    app = JSONResponse(error_body(told, 401, "invalid_api_key"), 401)
        # A client that leaves, or breaks the protocol, in the middle of its body is no error of ours.
        with contextlib.suppress(ClientDisconnect, LocalProtocolError):
            await app(scope, receive, send)


async def not_there(request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods, in the clients' form."""
    status = getattr(error, "status_code", 500)
    told = f"{request.url.path} is not served here; expected one of {', '.join(PATHS)}"
    if status == 405:
        told = f"{request.url.path} is not served here to {request.method}; use another method"
    return JSONResponse(error_body(told, status), status)


async def defect(_: HttpRequest, error: Exception) -> Response:
    """An error of ours, in the clients' form; the operator gets its traceback."""
    told = f"the server failed ({type(error).__name__}); its operator can read why"
    return JSONResponse(error_body(told, 500), 500)


def build_app(service: Service) -> ASGIApp:
    """The application that a server runs."""
    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.metrics_text),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handlers: Any = {404: not_there, 405: not_there, 500: defect}
    return Gate(
        Starlette(routes=routes, exception_handlers=handlers, lifespan=service.lifespan),
        service.limits.api_key,
    )
