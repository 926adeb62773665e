"""`python -m minipyramid.serve`: binds, loads, and answers until it is told to stop.

SIGINT and SIGTERM let what runs end within `--grace`, and then the exit status is 130 or 143.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from minipyramid import LLM, MiniPyramidError, RequestError
from minipyramid.cli.loading import load
from minipyramid.cli.terminal import DEFAULT_MODEL, Parser, Signals, exit_status, tell
from minipyramid.serve.loopback import is_loopback

BACKLOG = 2048  # connections that wait to be taken
KEY_VARIABLE = "MINIPYRAMID_API_KEY"


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="minipyramid.serve", allow_abbrev=False, description="Serve a Llama checkpoint.")
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--host", default="127.0.0.1", help="another than the loopback address needs --api-key")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--api-key", metavar="KEY", help=f"what clients must send (or in the variable {KEY_VARIABLE})")
    add("--chat-format", metavar="NAME", help="for messages (default: the checkpoint's own template)")
    add("--policy", default="auto", metavar="NAME_OR_FILE", help="what the layers hold")
    add("--kv-budget", type=float, metavar="SHARE", help="share of the full cache, as 0.454")
    add("--kv-memory", metavar="SIZE", help="for keys and values of all that runs, as 2GiB")
    add("--max-waiting", type=int, default=256, metavar="N", help="sequences that may wait for room (256)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="where a request names none (256)")
    add("--grace", type=float, default=30.0, metavar="SECONDS", help="for what runs, at the end (30)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--kv-dtype", default="auto", metavar="NAME", help="int8 holds keys and values in 8 bits")
    add("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--compile", action="store_true", help="compile decode steps; slow to start")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check, bind, load, serve."""
    api_key = os.environ.get(KEY_VARIABLE) or None if args.api_key is None else args.api_key
    check(args, api_key)
    try:
        import uvicorn

        from minipyramid.serve.app import Limits, Service, build_app
        from minipyramid.serve.ending import Server
    except ImportError as error:
        raise RequestError(
            'the server needs starlette and uvicorn; pip install "minipyramid[serve]"'
        ) from error
    with bind(args.host, args.port) as listening:
        llm = load(args)
        check_memory(llm)
        name = Path(args.model).name or args.model
        problem = chat_problem(llm)
        limits = Limits(api_key, args.max_waiting, args.max_new_tokens, chats=not problem)
        service = Service(llm, name, limits)
        config = uvicorn.Config(build_app(service), log_level="warning", access_log=False)
        listen(listening, args)  # from here on a client is not refused, so the address can be told
        if not args.quiet:
            host = f"[{args.host}]" if ":" in args.host else args.host
            address = f"http://{host}:{listening.getsockname()[1]}"
            tell(f"minipyramid: {name} at {address}")
            if problem:
                tell(f"minipyramid: messages are refused, for {problem}")
        with Signals():
            Server(config, service, args.grace).run(sockets=[listening])


def check_memory(llm: LLM) -> None:
    """Refuse a bound that no request fits in."""
    scheduler = llm.engine.scheduler
    needed = llm.config.num_hidden_layers * scheduler.bytes_per_token
    if scheduler.memory < needed:
        problem = f"--kv-memory is {scheduler.memory} bytes, and a single token needs {needed}"
        raise RequestError(f"{problem}; give enough for whole requests, as 2GiB")


def chat_problem(llm: LLM) -> str:
    """Why messages cannot be rendered; empty where they can."""
    try:
        llm.chat_format()
    except MiniPyramidError as error:
        return str(error)
    return ""


def check(args: argparse.Namespace, api_key: str | None) -> None:
    """Refuse what cannot be, before weights are loaded."""
    if not is_loopback(args.host) and api_key is None:
        raise RequestError(f"--host {args.host} can be reached by others; give --api-key, or use 127.0.0.1")
    if api_key is not None and not (api_key and api_key == api_key.strip()):
        told = "--api-key" if args.api_key is not None else KEY_VARIABLE
        raise RequestError(f"{told} is empty or has white space at an end; give a key, or leave it out")
    if not 0 <= args.port <= 65535:
        raise RequestError(f"--port is {args.port}, expected 0 to 65535")
    for flag, value, least in (
        ("--max-waiting", args.max_waiting, 0),
        ("--max-new-tokens", args.max_new_tokens, 1),
    ):
        if value < least:
            raise RequestError(f"{flag} is {value}, expected at least {least}")
    if not 0 <= args.grace <= 1e6:
        raise RequestError(f"--grace is {args.grace}, expected seconds, 0 or more")


def bind(host: str, port: int) -> socket.socket:
    """Take the port, before the weights are loaded in vain."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, TypeError, UnicodeError) as error:  # the last two: it is no name that a host can have
        listening.close()
        raise RequestError(f"--host {host} --port {port} cannot be served ({error}); name another") from error
    return listening


def listen(listening: socket.socket, args: argparse.Namespace) -> None:
    """Let clients connect. Linux lets two processes take a port, and only one of them listen."""
    try:
        listening.listen(BACKLOG)
    except OSError as error:
        told = f"--host {args.host} --port {args.port} cannot be served ({error})"
        raise RequestError(f"{told}; name another") from error


if __name__ == "__main__":
    sys.exit(main())
