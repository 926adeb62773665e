"""The server, as a process of its own, to which OpenAI's client and raw sockets talk over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import prompts_of

from minipyramid import LLM, Engine, Request, RequestError, SamplingParams
from minipyramid.serve.__main__ import bind, build_parser, listen, main
from minipyramid.serve.fields import characters_of
from minipyramid.serve.loopback import is_loopback
from minipyramid.serve.metrics import Metrics
from minipyramid.serve.worker import Event, Ticket, Worker, picture

openai = pytest.importorskip("openai", reason="the server is tested with OpenAI's client")
pytest.importorskip("uvicorn", reason="needs the extra serve")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
SLOWED = """
import os, time, minipyramid.engine as e
choose = e.choose
e.choose = lambda *a: (time.sleep({seconds}), choose(*a))[1]
"""
SLOW = SLOWED.format(seconds=0.02)
MESSAGES = [{"role": "user", "content": "the fox"}]


class Server:
    """A running one."""

    def __init__(self, model: Path, *flags: str, first: str = "") -> None:
        argv = ["--model", str(model), "--port", "0", "--policy", "full", *flags]
        code = f"{first}\nimport sys; from minipyramid.serve.__main__ import main; sys.exit(main({argv!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MINIPYRAMID_API_KEY": ""},
        )
        assert self.process.stderr is not None
        told = self.process.stderr.readline()
        found = re.search(r"minipyramid: (.+) at (http://(.+):(\d+))$", told)
        assert found, told
        self.model, self.url, self.host, self.port = found[1], found[2], found[3], int(found[4])
        self.client = self.openai()

    def openai(self, key: str = "none", **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        headers = {"Content-Type": "application/json", **headers}
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data) if data[:1] == b"{" else data.decode()

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1]
        return float(re.findall(rf"^minipyramid_{name} (\S+)$", text, flags=re.MULTILINE)[0])

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.metric("requests_running") or self.metric("requests_waiting"):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(model: Path, *flags: str, **how: Any) -> Iterator[Server]:
    server = Server(model, *flags, **how)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def with_template(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with a template for chats."""
    model = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("served") / tiny_dir.name)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.fixture(scope="module")
def server(with_template: Path) -> Iterator[Server]:
    with serving(with_template, "--kv-memory", "2MiB") as running:
        yield running


def alone(tiny: LLM, prompt: Any, **fields: Any) -> Any:
    return tiny.generate(prompt, SamplingParams(**fields))[0]


def test_a_completion_has_the_text_and_the_counts_of_the_engine(server: Server, tiny: LLM) -> None:
    assert [model.id for model in server.client.models.list()] == [server.model]
    assert server.client.models.retrieve(server.model).id == server.model
    expected = alone(tiny, "the fox", max_new_tokens=20, temperature=1.2, seed=7, top_p=0.9, logprobs=True)
    answer = server.client.completions.create(
        model=server.model, prompt="the fox", max_tokens=20, temperature=1.2, seed=7, top_p=0.9, logprobs=0
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(expected.token_ids)
    assert (answer.object, answer.model) == ("text_completion", server.model)
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(expected.prompt_token_ids), 20, len(expected.prompt_token_ids) + 20)


def test_a_stream_joined_is_the_text(server: Server, tiny: LLM) -> None:
    expected = alone(
        tiny, "the fox", max_new_tokens=30, temperature=1.2, seed=3, ignore_eos=True, logprobs=True
    )
    stream = server.client.completions.create(
        model=server.model, prompt="the fox", max_tokens=30, temperature=1.2, seed=3, logprobs=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True, "kept_positions": True},
    )  # fmt: skip
    chunks = list(stream)
    assert len(chunks) > 5
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 30
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected.text
    told = [value for chunk in pieces for value in chunk.choices[0].logprobs.token_logprobs]
    assert told == pytest.approx(expected.logprobs, abs=1e-4)
    assert [chunk.choices[0].finish_reason for chunk in pieces][-2:] == [None, "length"]
    n = len(expected.prompt_token_ids) + 30
    assert pieces[-1].choices[0].kept_positions == [[[0, n - 1]]] * 3
    assert pieces[-1].choices[0].kv_bytes == expected.kv_bytes


def test_a_chat_is_answered_whole_and_streamed(server: Server, with_template: Path) -> None:
    fields = {"model": server.model, "messages": MESSAGES, "max_completion_tokens": 12, "logprobs": True}
    answer = server.client.chat.completions.create(**fields)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert answer.usage.completion_tokens == len(choice.logprobs.content) > 0
    chunks = list(server.client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    expected = LLM(with_template, policy="full").chat(MESSAGES, SamplingParams(max_new_tokens=12))
    assert choice.message.content == expected.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_without_a_template_messages_are_refused_and_the_operator_is_told_why(tiny_dir: Path) -> None:
    """The client was told the checkpoint's path, and the server had no flag for a format."""
    with serving(tiny_dir) as bare:
        assert bare.process.stderr
        told = bare.process.stderr.readline()
        assert f"messages are refused, for {tiny_dir} has no chat template of its own" in told
        with pytest.raises(openai.BadRequestError, match="served without a chat template") as refused:
            bare.client.chat.completions.create(model=bare.model, messages=MESSAGES)
        assert str(tiny_dir) not in str(refused.value)
        assert bare.metric("kv_bytes_limit") > 0  # before anything was asked for


def test_a_named_chat_format_renders_messages(tiny_dir: Path, tiny: LLM) -> None:
    with serving(tiny_dir, "--chat-format", "vicuna") as talking:
        answer = talking.client.chat.completions.create(
            model=talking.model, messages=MESSAGES, max_completion_tokens=12
        )
    expected = tiny.under("full").chat(MESSAGES, SamplingParams(max_new_tokens=12), chat_format="vicuna")
    assert answer.choices[0].message.content == expected.text


def test_several_prompts_and_choices_come_in_order(server: Server, tiny: LLM) -> None:
    prompts = ["the fox", "once upon a time"]
    fields = {"max_tokens": 10, "temperature": 1.5, "seed": 5, "n": 2, "extra_body": {"ignore_eos": True}}
    answer = server.client.completions.create(model=server.model, prompt=prompts, **fields)
    expected = [
        alone(tiny, p, max_new_tokens=10, temperature=1.5, seed=5 + i, ignore_eos=True).text
        for p in prompts for i in (0, 1)
    ]  # fmt: skip
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    assert len(set(expected)) == 4
    streamed = [""] * 4
    for chunk in server.client.completions.create(model=server.model, prompt=prompts, stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    ids = server.client.completions.create(model=server.model, prompt=[[1, 5], [1, 7, 9]], max_tokens=3)
    assert ids.usage.prompt_tokens == 5


def test_the_usage_tells_what_another_request_had_computed(server: Server, tiny: LLM) -> None:
    """Of a prompt, which counts once however many choices it has: more was once told than it has tokens."""
    (prompt,) = prompts_of([150])
    how = {"max_tokens": 5, "temperature": 1.0, "seed": 3, "n": 4, "extra_body": {"ignore_eos": True}}
    answer = server.client.completions.create(model=server.model, prompt=prompt, **how)
    assert answer.usage.prompt_tokens == 150
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    for i, choice in enumerate(answer.choices):
        single = alone(tiny, prompt, max_new_tokens=5, temperature=1.0, seed=3 + i, ignore_eos=True)
        assert choice.text == single.text
    two = server.client.completions.create(model=server.model, prompt=[prompt, [*prompt, 5]], **how)
    assert two.usage.prompt_tokens_details.cached_tokens in (149, 150)  # of one of them


def test_a_stop_text_ends_a_choice(server: Server, tiny: LLM) -> None:
    whole = alone(tiny, "the fox", max_new_tokens=40, ignore_eos=True).text
    stop = whole[8:11]
    answer = server.client.completions.create(
        model=server.model, prompt="the fox", max_tokens=40, stop=[stop], extra_body={"ignore_eos": True}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"temperature": -1}, "temperature is -1"), ({"max_tokens": 9999}, "more than the context"),
     ({"prompt": ""}, "is empty"), ({"prompt": {}}, "prompt is {}"), ({"prompt": [[1], [999]]}, "999"),
     ({"n": 0}, "n = 0"), ({"n": 10**9}, "n = 1000000000"), ({"n": "2"}, "n is '2'"),
     ({"logprobs": 5}, "give 0 or 1"), ({"stop": [""]}, "stop"), ({"stop": 5}, "stop is 5"),
     ({"echo": True}, "echo is True"), ({"temprature": 1}, "did you mean 'temperature'"),
     ({"presence_penalty": 1}, "presence_penalty"), ({"stream": "yes"}, "stream is 'yes'"),
     ({"seed": 1.5}, "seed is 1.5"), ({"top_p": float("nan")}, "top_p is nan"),
     ({"prompt": "\ud800"}, "prompt"), ({"kept_positions": True}, "told by a stream"),
     ({"zzz": 1}, "kept_positions, prompt"), ({"max_tokens": 3, "max_completion_tokens": 3}, "both given"),
     ({"max_tokens": 0}, "max_tokens is 0"), ({"stream_options": {"usage": True}}, "stream_options has"),
     ({"stream_options": {"include_usage": "false"}}, "include_usage is 'false'"),
     ({"stop": ["x"] * 65}, "stop has 65 texts"),
     ({"prompt": "a" * 9000}, "a text of 9000 characters is more")],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named_in_the_clients_form(
    server: Server, fields: dict[str, Any], problem: str
) -> None:
    status, answer = server.ask("POST", "/v1/completions", json.dumps({"prompt": "the fox", **fields}))
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert problem in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_messages_that_lie_deep_in_each_other_are_counted() -> None:
    """A function that called itself raised RecursionError, which was told as a failure of the server."""
    deep: Any = "four"
    for _ in range(5000):
        deep = [{"content": deep}, {"text": "a"}]
    assert characters_of(deep) == 5004


def test_the_client_s_own_exceptions_come(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model=server.model, prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        server.client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        server.client.embeddings.create(model=server.model, input="a")


def test_what_can_never_fit_is_refused_with_its_need(tiny_dir: Path) -> None:
    with serving(tiny_dir, "--kv-memory", "20KiB") as small:
        with pytest.raises(openai.BadRequestError, match=r"needs \d+ bytes of cache, but kv_memory is 20480"):
            small.client.completions.create(model=small.model, prompt="the fox", max_tokens=200)
        assert small.client.completions.create(model=small.model, prompt="the fox", max_tokens=9).choices


def test_garbage_oversized_and_slow_bodies_are_refused(tiny_dir: Path, server: Server) -> None:
    for body in (b"", b"\xff\xfe", b"{", b"[]", b"[" * 100_000, b'"text"', b"5" * 5000):
        status, answer = server.ask("POST", "/v1/completions", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert server.ask("POST", "/v1/completions", b"{}", Content_Type="text/plain")[0] == 415
    assert server.ask("POST", "/v1/completions", b" " * (9 << 20))[0] == 413
    assert server.ask("GET", "/v1/completions")[0] == 405
    assert server.ask("GET", "/nothing")[1]["error"]["type"] == "not_found_error"
    with socket.create_connection((server.host, server.port), timeout=10) as raw:
        raw.sendall(b"this is no HTTP\r\n\r\n")
        assert b"400" in raw.recv(100)
    with (
        serving(tiny_dir, first="import minipyramid.serve.app as a; a.BODY_S = 0.3") as hasty,
        socket.create_connection((hasty.host, hasty.port), timeout=10) as raw,
    ):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {hasty.host}\r\nContent-Type: application/json\r\n"
        raw.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert b"408" in raw.recv(100)


def test_a_body_that_breaks_off_leaves_no_traceback(tiny_dir: Path) -> None:
    """Chunks that are none, and a client that left within its body, filled the server's terminal."""
    with serving(tiny_dir) as quiet:
        with socket.create_connection((quiet.host, quiet.port), timeout=10) as raw:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {quiet.host}\r\nContent-Type: application/json\r\n"
            )
            raw.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
            assert b"400" in raw.recv(100)
        with socket.create_connection((quiet.host, quiet.port), timeout=10) as raw:
            raw.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert quiet.ask("GET", "/health")[0] == 200
        quiet.stop()
        assert quiet.process.stderr is not None
        assert "Traceback" not in quiet.process.stderr.read()


def test_a_key_is_demanded_and_compared(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tiny_dir, "--api-key", "s\u00e4cret") as locked:
        for key in ("none", "s", "s\u00e4cre", "s\u00e4cret2"):
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            assert locked.ask("GET", "/v1/models", **headers)[0] == 401
        assert locked.ask("GET", "/v1/models")[1]["error"]["code"] == "invalid_api_key"
        assert locked.ask("GET", "/metrics")[0] == 401
        assert locked.ask("GET", "/health") == (200, {"status": "ok"})
        right = {"Authorization": "Bearer s\u00e4cret".encode().decode("latin-1")}
        assert locked.ask("GET", "/v1/models", **right)[0] == 200
        with pytest.raises(openai.AuthenticationError):
            locked.client.models.list()
    for key in ("", " ", "x\n"):  # a variable that is not set, and what no header can hold
        assert main(["--api-key", key, "--model", str(tiny_dir)]) == 2
        assert "--api-key is empty or has white space at an end" in capsys.readouterr().err
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        assert main(["--host", host, "--model", str(tiny_dir)]) == 2
        assert "give --api-key" in capsys.readouterr().err


def test_another_page_s_host_name_is_not_let_in(server: Server) -> None:
    """A page whose name leads to the loopback address could otherwise use the server."""
    assert server.ask("GET", "/v1/models", Host="evil.example:80")[0] == 403
    assert server.ask("GET", "/v1/models", Host=f"localhost:{server.port}")[0] == 200


def test_64_clients_at_once_get_the_texts_of_single_runs(server: Server, tiny: LLM) -> None:
    def ask(i: int) -> str:
        fields = {"max_tokens": 5 + i % 20, "temperature": 1.3, "seed": i, "stream": i % 2 == 0}
        prompt = "the fox " * (1 + i % 7)
        answer = server.client.completions.create(model=server.model, prompt=prompt, **fields)
        return "".join(c.choices[0].text for c in answer) if i % 2 == 0 else answer.choices[0].text

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, range(64)))
    for i, text in enumerate(texts):
        fields = {"max_new_tokens": 5 + i % 20, "temperature": 1.3, "seed": i}
        assert text == alone(tiny, "the fox " * (1 + i % 7), **fields).text
    server.wait_until_idle()


def test_requests_that_come_together_share_a_cache(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each had a cache of its own when it came while the one before was computed, and steps were slower."""
    monkeypatch.setattr("minipyramid.serve.worker.GATHER_S", 60.0)
    engine, caches = tiny.under("full").engine, set()
    advance = engine.advance

    def counted() -> None:
        advance()
        caches.add(len(engine.scheduler.caches))

    engine.advance = counted  # type: ignore[method-assign]

    async def ask() -> None:
        worker = Worker(engine, Metrics(), asyncio.get_running_loop())
        worker.coming = 1
        worker.start()
        events: asyncio.Queue[Event] = asyncio.Queue()
        for i in range(6):
            worker.submit(ticket_for(engine, [5, 6, 7 + i], events))
            await asyncio.sleep(0.03)
        assert not caches
        worker.coming = 0
        for _ in range(6):
            await next_end(events)
        worker.close()

    asyncio.run(ask())
    assert caches == {1, 0}


def test_a_request_that_is_long_in_coming_holds_up_no_other(tiny: LLM) -> None:
    async def ask() -> None:
        engine = tiny.under("full").engine
        worker = Worker(engine, Metrics(), asyncio.get_running_loop())
        worker.coming = 1
        worker.start()
        events: asyncio.Queue[Event] = asyncio.Queue()
        worker.submit(ticket_for(engine, [5, 6, 7], events))
        await asyncio.wait_for(next_end(events), 60)
        worker.close()

    asyncio.run(ask())


def test_whoever_is_told_of_an_end_hears_of_it_where_another_cannot(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event that could not be made kept those that were made before it, and its own client, waiting."""

    async def ask() -> list[bool]:
        engine = tiny.under("full").engine
        worker = Worker(engine, Metrics(), asyncio.get_running_loop())
        worker.coming = 1
        queues: list[asyncio.Queue[Event]] = [asyncio.Queue() for _ in range(3)]
        tickets = [ticket_for(engine, [5, 6, 7 + i], queue) for i, queue in enumerate(queues)]
        event = worker._event

        def broken(ticket: Ticket, piece: str | None, now: float) -> Event:
            if ticket is tickets[1] and piece is None:
                raise ValueError("broken")
            return event(ticket, piece, now)

        monkeypatch.setattr(worker, "_event", broken)
        worker.start()
        for ticket in tickets:
            worker.submit(ticket)
        worker.coming = 0
        for queue in queues:
            await asyncio.wait_for(next_end(queue), 60)
        worker.close()
        return [ticket.sequence.error is not None for ticket in tickets]

    assert asyncio.run(ask())[1]


async def next_end(events: asyncio.Queue[Event]) -> None:
    while not (await events.get()).ended:
        pass


def ticket_for(engine: Engine, prompt: list[int], events: asyncio.Queue[Event]) -> Ticket:
    request = Request(prompt, SamplingParams(max_new_tokens=5, ignore_eos=True))
    return Ticket(engine.prepare(request), 0, 0, events)


def leave_in_mid_stream(server: Server, i: int) -> bool:
    """Ask, read some text, or what comes at once, or nothing, and hang up; returns whether text had come."""
    body = {"prompt": "the fox", "max_tokens": 200, "stream": i % 3 != 0, "ignore_eos": True, "n": 1 + i % 2}
    data = json.dumps(body).encode()
    with socket.create_connection((server.host, server.port), timeout=30) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        got = b""
        while i % 3 == 1 and b"data: {" not in got:
            got += raw.recv(400) or pytest.fail("the stream ended")
        if i % 3 == 2:
            got = raw.recv(400)
        time.sleep(0.002 * (i % 10))
        return b"data: {" in got


def test_500_clients_that_leave_hold_no_bytes(tiny_dir: Path) -> None:
    flags = ["--policy", "pyramid", "--kv-memory", "1MiB", "--max-waiting", "1000"]
    with serving(tiny_dir, *flags) as busy:
        with ThreadPoolExecutor(50) as pool:
            begun = sum(pool.map(lambda i: leave_in_mid_stream(busy, i), range(500)))
        assert begun >= 167
        busy.wait_until_idle()
        assert (busy.metric("kv_bytes_planned"), busy.metric("kv_bytes_held")) == (0, 0)
        assert busy.metric("generated_tokens_total") < 500 * 200 / 2  # they were not run to their end
        assert busy.client.completions.create(model=busy.model, prompt="the fox", max_tokens=3).choices


def test_too_many_that_wait_are_told_to_come_again(tiny_dir: Path, tmp_path: Path) -> None:
    """The first holds nearly all of the memory until it is closed, however slowly this process asks."""
    closed = tmp_path / "closed"
    slow = SLOWED.format(seconds=f"0 if os.path.exists({str(closed)!r}) else 0.2")
    with serving(tiny_dir, "--kv-memory", "70KiB", "--max-waiting", "1", first=slow) as small:

        def begin() -> Any:
            return small.client.completions.create(
                model=small.model,
                prompt="the fox",
                max_tokens=150,
                stream=True,
                extra_body={"ignore_eos": True},
            )

        first = begin()
        next(iter(first))
        assert small.metric("kv_bytes_planned") > 0
        assert 0 < small.metric("kv_bytes_held") < small.metric("kv_bytes_planned") <= 70 * 1024
        second = begin()  # its head comes at once, its text later
        with pytest.raises(openai.RateLimitError) as refused:
            begin()
        assert refused.value.response.headers["retry-after"] == "1"
        first.close()
        closed.touch()
        assert "".join(chunk.choices[0].text for chunk in second)
        small.wait_until_idle()
        assert small.metric("time_to_first_token_seconds_count") == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_runs_ends_within_the_grace(tiny_dir: Path, number: int, status: int) -> None:
    with serving(tiny_dir, "--grace", "20", first=SLOW) as server:
        body = {"model": server.model, "prompt": "the fox", "max_tokens": 30, "stream": True}
        stream = server.client.completions.create(**body, extra_body={"ignore_eos": True})
        chunks = [next(iter(stream))]
        server.process.send_signal(number)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(timeout=30) == status
        assert "Traceback" not in (server.process.stderr.read() if server.process.stderr else "")


def test_what_runs_longer_than_the_grace_is_cut(tiny_dir: Path) -> None:
    with serving(tiny_dir, "--grace", "0.2", first=SLOW) as server:
        body = {"model": server.model, "prompt": "the fox", "max_tokens": 240, "stream": True}
        stream = server.client.completions.create(**body, extra_body={"ignore_eos": True})
        next(iter(stream))
        body["stream"] = False
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(
                lambda: server.client.completions.create(**body, extra_body={"ignore_eos": True})
            )
            while server.metric("requests_running") < 2:
                time.sleep(0.02)
            assert server.stop() == 143
            with pytest.raises(openai.InternalServerError, match="the server is being stopped") as refused:
                whole.result()
        assert refused.value.status_code == 503
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(stream)
        assert server.process.stderr
        assert "Traceback" not in server.process.stderr.read()


def test_a_body_that_never_comes_holds_up_no_end(tiny_dir: Path) -> None:
    """Each left a traceback of 70 lines."""
    with (
        serving(tiny_dir, "--grace", "0") as server,
        socket.create_connection((server.host, server.port), timeout=10) as raw,
    ):
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert server.ask("GET", "/health")[0] == 200
        assert server.stop() == 143
        assert server.process.stderr
        assert "Traceback" not in server.process.stderr.read()


def test_a_request_that_comes_too_late_is_told_so(tiny_dir: Path) -> None:
    """One whose body was still coming at the end of the grace was taken, and cut off without an answer."""
    with serving(tiny_dir, "--grace", "0.3") as server:
        data = json.dumps({"prompt": "the fox", "max_tokens": 200, "ignore_eos": True}).encode()
        with socket.create_connection((server.host, server.port), timeout=30) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data[:5])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1.5)
            raw.sendall(data[5:])
            answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
        assert " 503 " in answer.splitlines()[0]
        assert "the server is being stopped" in answer
        assert server.process.wait(timeout=30) == 143


def test_the_picture_leaves_out_the_token_that_a_stand_in_replaces() -> None:
    """Its slot stands for all that the layer has dropped, and the page drew it as that token."""
    layers: list[Any] = [[0, 1, 5, 6], [[0, 2], [2, 3]], [4]]
    assert picture(layers, [5, None, None]) == [[[0, 1], [6, 6]], [[0, 0], [2, 3]], [[4, 4]]]
    assert picture(layers, [None, 2, None]) == [[[0, 1], [5, 6]], [[0, 0], [3, 3]], [[4, 4]]]


def test_a_failure_between_two_steps_leaves_nobody_waiting(tiny_dir: Path) -> None:
    """The engine's thread ended, and every client waited for ever."""
    broken = "import minipyramid.serve.worker as w; w.picture = lambda *_: 1 / 0"
    with serving(tiny_dir, first=broken) as server:
        body = {"model": server.model, "prompt": "the fox", "max_tokens": 20}
        with pytest.raises(openai.APIError, match="the server failed between two steps"):
            list(server.client.completions.create(**body, stream=True, extra_body={"kept_positions": True}))
        assert server.client.completions.create(**body).choices  # the next one is served
        assert server.ask("GET", "/health")[0] == 200
        assert server.metric("kv_bytes_planned") == 0


def test_more_choices_than_can_ever_run_or_wait_are_refused_for_good(tiny_dir: Path) -> None:
    """They were told to come again (429) by an idle server, for ever."""
    with serving(tiny_dir, "--kv-memory", "70KiB", "--max-waiting", "2") as small:
        with pytest.raises(openai.BadRequestError, match="of which more than 2 would have to wait"):
            small.client.completions.create(model=small.model, prompt="the fox", n=8, max_tokens=100)
        assert small.metric("prompt_tokens_total") == 0
        assert small.client.completions.create(model=small.model, prompt="the fox", n=3, max_tokens=9).choices


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("localhost", True), ("LOCALHOST", True), ("localhost.", True), ("127.0.0.2", True), ("[::1]", True),
     ("::1", True), ("10.0.0.1", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, is_own: bool) -> None:
    """A server on 127.0.0.2 started, and then let nobody in."""
    assert is_loopback(host) == is_own


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nobody can bind a port twice")
def test_a_port_that_another_process_has_taken_meanwhile_is_named() -> None:
    """Both had bound it while they loaded; the second was told that its output cannot be written."""
    with bind("127.0.0.1", 0) as first:
        args = build_parser().parse_args(["--port", str(first.getsockname()[1])])
        with bind("127.0.0.1", args.port) as second:
            listen(first, args)
            with pytest.raises(RequestError, match=f"--port {args.port} cannot be served"):
                listen(second, args)


def test_what_cannot_be_served_is_one_line(
    tiny_dir: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    free = ["--port", "0"]
    for flags in (["--port", str(server.port)], ["--port", "70000"], ["--grace", "-1"], ["--host", "::1::"],
                  ["--host", "\u00fc" * 70, "--api-key", "x"],
                  ["--kv-memory", "2", *free], ["--chat-format", "vicunia", *free]):  # fmt: skip
        assert main([*flags, "--model", str(tiny_dir)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
