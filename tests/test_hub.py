"""A model name that is no local path is fetched from a hub: here a small server on the loopback, and no other
host.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import TINY, lines_of, random_tensors, train_pieces
from meta_files import write_meta
from safetensors.torch import save

import minipyramid
from minipyramid import LLM, SamplingParams

PROMPT, NEW = "Once upon a time", 8
TOKEN = "hf_for_this_test_only"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
UNWANTED = [
    "README.md",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "original/tokenizer.model",
    "pytorch_model.bin",
]


def sha_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Repo:
    """What the server holds under one repository id, and what it refuses."""

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: list[str] = field(default_factory=lambda: ["main"])
    absent: set[str] = field(default_factory=set)  # listed, but answered with 404
    refusal: tuple[int, str] | None = None  # the status and X-Error-Code of every answer,
    refuses_listing: bool = True  # or, if not, of every file's
    token: str | None = None  # who does not send it is told that there is no such repository


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that a download of a snapshot needs; it remembers what was asked."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, repo_id: str) -> list[Request]:
        return [r for r in self.requests if r.path.startswith((f"/{repo_id}/", f"/api/models/{repo_id}/"))]

    def files_asked(self, repo_id: str) -> set[str]:
        return {
            r.path.split("/resolve/")[1].partition("/")[2]
            for r in self.asked(repo_id)
            if "/resolve/" in r.path
        }


class Handler(BaseHTTPRequestHandler):
    """One request; errors are told apart by the header X-Error-Code, as the hub does."""

    server: Hub
    LISTING = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>.+)")
    FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(Request(self.command, path, self.headers["Authorization"]))
        listing, file = self.LISTING.fullmatch(path), self.FILE.fullmatch(path)
        match = listing or file
        if match is None:
            self.refuse(400, "BadRequest")
        elif match["id"] not in self.server.repos:
            self.refuse(404, "RepoNotFound")
        else:
            self.answer_from(self.server.repos[match["id"]], listing, file)

    do_HEAD = do_GET

    def answer_from(self, repo: Repo, listing: re.Match[str] | None, file: re.Match[str] | None) -> None:
        match = listing or file
        assert match is not None
        commit = next(
            (sha_of(name) for name in repo.revisions if match["revision"] in (name, sha_of(name))), None
        )
        if repo.token and self.headers["Authorization"] != f"Bearer {repo.token}":
            self.refuse(401, "RepoNotFound")
        elif repo.refusal and (file or repo.refuses_listing):
            self.refuse(*repo.refusal)
        elif commit is None:
            self.refuse(404, "RevisionNotFound")
        elif file:
            self.answer_file(repo, file["file"], commit)
        elif match["kind"] == "tree":
            self.answer_json(
                [{"type": "file", "path": n, "size": len(b), "oid": sha_of(n)} for n, b in repo.files.items()]
            )
        else:
            siblings = [{"rfilename": name} for name in repo.files]
            self.answer_json({"id": match["id"], "sha": commit, "siblings": siblings})

    def answer_file(self, repo: Repo, name: str, commit: str) -> None:
        if name in repo.absent or name not in repo.files:
            self.refuse(404, "EntryNotFound")
        else:
            body = repo.files[name]
            self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit})

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on the tests' stderr."""


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str


def command(model: str, *options: str) -> list[str]:
    return [f"--model={model}", "--max-new-tokens", str(NEW), *options, PROMPT]


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """This process's environment without what steers the hub's client, and with the endpoint and the cache
    given.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("HF_", "HUGGING")) and not name.upper().endswith("_PROXY")
    }
    source = str(Path(minipyramid.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {
        **kept,
        "PYTHONPATH": path,
        "PYTHONUTF8": "1",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        **more,
    }


def python(arguments: list[str], env: dict[str, str], cwd: Path) -> Result:
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, check=False, timeout=300
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


DRIVER = """
import json, sys
from minipyramid.generate import main
for argv in json.loads(sys.argv[1]):
    status = main(argv)
    for stream in (sys.stdout, sys.stderr):
        print(f"<<exit {status}>>", end="", file=stream, flush=True)
"""


def run_all(commands: dict[str, list[str]], env: dict[str, str], cwd: Path) -> dict[str, Result]:
    """The commands one after the other in one process, since a start costs seconds; what each wrote is kept
    apart.
    """
    whole = python(["-c", DRIVER, json.dumps(list(commands.values()))], env, cwd)
    assert whole.status == 0, whole.stderr
    out, err = (re.split(r"<<exit (\d+)>>", text) for text in (whole.stdout, whole.stderr))
    assert len(out) == len(err) == 2 * len(commands) + 1
    assert out[-1] == err[-1] == ""  # nothing is written at the end of the process either
    return {name: Result(int(out[2 * i + 1]), out[2 * i], err[2 * i]) for i, name in enumerate(commands)}


@pytest.fixture(scope="module")
def hub(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a whole checkpoint, the same in shards, and what can go wrong with either."""
    files = {path.name: path.read_bytes() for path in tiny_dir.iterdir()}
    files |= dict.fromkeys(UNWANTED, b"must not be fetched")
    files["pyramid.json"] = b'{"recent_ratio": 0.2}'  # what `auto` takes if it is there
    files["pyramid.safetensors"] = b"the lines of a profile"
    names = sorted(tensors := random_tensors(TINY))
    halves = [names[::2], names[1::2]]
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    sharded = {name: body for name, body in files.items() if name != "model.safetensors"}
    sharded[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    for shard, half in zip(SHARDS, halves, strict=True):
        sharded[shard] = save({name: tensors[name] for name in half})
    level = {"computed": [1, 0.5, 0.5], "held": [0.5, 0.5, 0.5], "scores": "fitted"}
    profile = json.dumps({"policy": "profile", "levels": [level], "fitted": "pyramid.safetensors"}).encode()
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    in_bin = {name: files[name] for name in ("config.json", "tokenizer.model", "pyramid.json")}
    in_bin["pytorch_model.bin"] = pickled.getvalue()
    write_meta(metas := tmp_path_factory.mktemp("metas"), 1, False, vocab_size=-1)
    in_metas = {path.name: path.read_bytes() for path in metas.iterdir()}
    in_metas["tokenizer.model"] = train_pieces(tmp_path_factory.mktemp("pieces")).read_bytes()
    of_profile = {"pyramid.json": profile, "pyramid.safetensors": save({"lines": lines_of(3)})}
    repos = {
        "acme/tiny": Repo(files),
        "acme/profiled": Repo(files | of_profile),
        "acme/sharded": Repo(sharded),
        "acme/private": Repo(files, revisions=["main", "v1.0"], token=TOKEN),
        "acme/gated": Repo(files, refusal=(403, "GatedRepo")),
        "acme/gated-files": Repo(files, refusal=(403, "GatedRepo"), refuses_listing=False),
        "acme/broken": Repo(files, refusal=(500, "")),
        "acme/bin": Repo(in_bin),
        "acme/gemma": Repo(files | {"config.json": json.dumps({**TINY, "model_type": "gemma"}).encode()}),
        "acme/spoilt": Repo(files | {"tokenizer.model": b"\nx"}),
        "acme/large": Repo(files),
        "acme/wordless": Repo({name: body for name, body in files.items() if "tokenizer" not in name}),
        "acme/flagged": Repo(files),
        "acme/silent": Repo(files),
        "acme/gguf": Repo({"model.Q4_K_M.gguf": b"GGUF", "README.md": b"x"}),
        "acme/meta": Repo(in_metas),
        "acme/shard-lost": Repo(sharded, absent={SHARDS[1]}),
        "acme/shard-unlisted": Repo({name: body for name, body in sharded.items() if name != SHARDS[1]}),
    }
    with Hub(repos) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache that all of these tests share, empty at first."""
    return tmp_path_factory.mktemp("hub_home")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory where no name of a repository is a path."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def text(tiny: LLM) -> str:
    """What the checkpoint writes when it is loaded from its own directory."""
    return tiny.generate([PROMPT], SamplingParams(max_new_tokens=NEW))[0].text


@pytest.fixture(scope="module")
def with_token(hub: Hub, home: Path, elsewhere: Path) -> Result:
    """A private repository at a tag, by someone who has set a token."""
    arguments = ["-m", "minipyramid.generate", *command("acme/private", "--revision", "v1.0")]
    return python(arguments, environment(hub.url, home, HF_TOKEN=TOKEN), elsewhere)


FAILING = {
    "acme/nowhere": command("acme/nowhere"),
    "acme/private": command("acme/private"),
    "acme/gated": command("acme/gated"),
    "acme/gated-files": command("acme/gated-files"),
    "no such revision": command("acme/tiny", "--revision", "v9"),
    "a//b": command("a//b"),
    "-x-/..": command("-x-/.."),
    "acme/two words": command("acme/two words"),
    "acme/gemma": command("acme/gemma"),
    "acme/spoilt": command("acme/spoilt"),
    "acme/wordless": command("acme/wordless"),
    "acme/flagged": command("acme/flagged", "--dtype", "float8"),
    "acme/silent": ["--chat", "--model", "acme/silent"],
    "acme/gguf": command("acme/gguf"),
    "acme/broken": command("acme/broken"),
    "acme/shard-lost": command("acme/shard-lost"),
    "acme/shard-unlisted": command("acme/shard-unlisted"),
}


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path, elsewhere: Path) -> dict[str, Result]:
    """Every command without a token, the hub within reach."""
    whole = ("acme/tiny", "acme/sharded", "acme/bin", "acme/meta")
    commands = {name: command(name) for name in whole} | FAILING
    commands["planned"] = ["--model", "acme/profiled", "--plan", "--prompt-tokens", "90"]
    commands["acme/profiled"] = command("acme/profiled")
    return run_all(commands, environment(hub.url, home), elsewhere)


# What is in the cache by then: whole, at a revision, in part, and not at all.
AGAIN = {
    "acme/tiny": command("acme/tiny"),
    "acme/private": command("acme/private", "--revision", "v1.0"),
    "acme/shard-lost": command("acme/shard-lost"),
    "acme/nowhere": command("acme/nowhere"),
    "acme/tiny at v9": command("acme/tiny", "--revision", "v9"),
}


@pytest.fixture(scope="module")
def offline(
    hub: Hub, home: Path, elsewhere: Path, with_token: Result, online: dict[str, Result]
) -> dict[str, dict[str, Result]]:
    """Those commands after the runs above, with HF_HUB_OFFLINE set, and with a hub that does not answer."""
    before = len(hub.requests)
    set_offline = run_all(AGAIN, environment(hub.url, home, HF_HUB_OFFLINE="1"), elsewhere)
    assert len(hub.requests) == before
    with socket.socket() as closed:  # bound, so that nobody else gets the port, but not listening
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        return {
            "set offline": set_offline,
            "out of reach": run_all(AGAIN, environment(nowhere, home), elsewhere),
        }


@pytest.mark.parametrize("name", ["acme/bin", "acme/meta"])
def test_other_kinds_are_fetched_where_there_are_no_safetensors(
    name: str, online: dict[str, Result], text: str
) -> None:
    """Meta's Llama 2 leaves its vocabulary's size to the tokenizer, and was asked of missing weights."""
    assert (online[name].status, online[name].stderr) == (0, "")
    if name == "acme/bin":
        assert online[name].stdout.rstrip("\n") == text.rstrip("\n")


def test_what_is_wrong_is_said_before_weights_are_fetched(
    hub: Hub, home: Path, elsewhere: Path, online: dict[str, Result]
) -> None:
    """A configuration that is not run, a tokenizer that is missing or cannot be read, a flag, a chat with no
    template, a disk with room for all but weights.
    """
    no_room = "import shutil; shutil.disk_usage = lambda _: type('Disk', (), {'free': 50_000}); "
    code = f"{no_room}from minipyramid.generate import main; main({command('acme/large')})"
    large = python(["-c", code], environment(hub.url, home), elsewhere)
    assert "config.json" in hub.files_asked("acme/large")
    for name, result, word in (
        ("acme/gemma", online["acme/gemma"], "model_type"),
        ("acme/spoilt", online["acme/spoilt"], "sentencepiece"),
        ("acme/wordless", online["acme/wordless"], "has no tokenizer"),
        ("acme/flagged", online["acme/flagged"], "float8"),
        ("acme/silent", online["acme/silent"], "no chat template"),
        ("acme/gguf", online["acme/gguf"], "GGUF files are not read"),
        ("acme/large", large, r"0\.0 GiB are to be fetched"),
    ):
        assert re.search(word, result.stderr), result.stderr
        assert result.stderr.count("\n") == 1
        paths = [r.path for r in hub.asked(name) if r.method == "GET"]
        assert not any("model" in path.rpartition("/")[2] for path in paths if "safetensors" in path)


def the_error(result: Result) -> str:
    """What a failed command says, which is all that it writes."""
    assert result.status == 2
    assert result.stdout == ""
    assert re.fullmatch(r"minipyramid: error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("minipyramid: error: ").rstrip("\n")


def test_a_repository_is_fetched_and_run(online: dict[str, Result], text: str) -> None:
    assert online["acme/tiny"] == Result(0, text + "\n", "")


def test_a_repository_in_shards_is_fetched_and_run(online: dict[str, Result], hub: Hub, text: str) -> None:
    assert online["acme/sharded"] == Result(0, text + "\n", "")
    assert hub.files_asked("acme/sharded") == {
        "config.json",
        "pyramid.json",
        "pyramid.safetensors",
        "tokenizer.model",
        INDEX,
        *SHARDS,
    }


def test_only_what_the_engine_reads_is_asked_for(online: dict[str, Result], hub: Hub) -> None:
    """The same weights in other layouts would double the download; a profile's lines stayed behind, and the
    profile could not be read.
    """
    assert set(UNWANTED) < set(hub.repos["acme/tiny"].files)
    assert hub.files_asked("acme/tiny") == {
        "config.json",
        "pyramid.json",
        "pyramid.safetensors",
        "tokenizer.model",
        "model.safetensors",
    }


def test_a_repository_s_profile_is_fetched_with_what_it_has_fitted(
    online: dict[str, Result], hub: Hub
) -> None:
    """Without its lines a profile that chooses by `fitted` was refused, and so was its plan."""
    for name in ("planned", "acme/profiled"):
        assert (online[name].status, online[name].stderr) == (0, "")
    assert "pyramid.safetensors" in hub.files_asked("acme/profiled")


def test_a_token_from_the_environment_opens_a_private_repository(
    with_token: Result, hub: Hub, text: str
) -> None:
    assert with_token == Result(0, text + "\n", "")
    tokens = {request.authorization for request in hub.asked("acme/private")}
    assert f"Bearer {TOKEN}" in tokens


def test_without_a_token_none_is_sent(online: dict[str, Result], hub: Hub) -> None:
    assert {request.authorization for request in hub.asked("acme/tiny")} == {None}


def test_the_revision_named_is_the_one_fetched(with_token: Result, hub: Hub) -> None:
    paths = [request.path for request in hub.asked("acme/private") if request.authorization]
    assert "/api/models/acme/private/revision/v1.0" in paths
    commits = {path.split("/")[4] for path in paths if "/resolve/" in path}
    assert commits == {sha_of("v1.0")}


@pytest.mark.parametrize("hub_is", ["set offline", "out of reach"])
def test_what_is_in_the_cache_is_run_without_the_hub(
    hub_is: str, offline: dict[str, dict[str, Result]], text: str
) -> None:
    assert offline[hub_is]["acme/tiny"] == Result(0, text + "\n", "")
    assert offline[hub_is]["acme/private"] == Result(0, text + "\n", "")


@pytest.mark.parametrize("hub_is", ["set offline", "out of reach"])
@pytest.mark.parametrize("name", ["acme/nowhere", "acme/tiny at v9"])
def test_what_is_not_in_the_cache_is_refused_without_the_hub(
    name: str, hub_is: str, offline: dict[str, dict[str, Result]]
) -> None:
    said = the_error(offline[hub_is][name])
    assert said.startswith(name.removesuffix(" at v9") + " ")
    assert ("at revision 'v9'" in said) == name.endswith("v9")
    assert "not complete in the hub's cache" in said
    assert "cannot be reached or is offline" in said


@pytest.mark.parametrize("hub_is", ["set offline", "out of reach"])
def test_what_is_in_the_cache_only_in_part_is_refused_without_the_hub(
    hub_is: str, offline: dict[str, dict[str, Result]]
) -> None:
    """By the hub's library or, where an older one hands out what there is, by the loading of it."""
    said = the_error(offline[hub_is]["acme/shard-lost"])
    assert re.match(r"acme/shard-lost is no directory, is not complete|.*\bmodels--acme--shard-lost\b", said)


@pytest.mark.parametrize("name", ["acme/nowhere", "acme/private"])
def test_a_repository_that_is_absent_or_private_asks_for_another_name_or_a_login(
    name: str, online: dict[str, Result]
) -> None:
    """The hub does not tell the two apart, and so neither does the message."""
    said = the_error(online[name])
    assert said.startswith(f"{name} is neither a directory nor a repository")
    assert "check the name" in said
    assert "HF_TOKEN" in said


@pytest.mark.parametrize("name", ["acme/gated", "acme/gated-files"])
def test_a_gated_repository_asks_to_accept_its_terms(name: str, online: dict[str, Result]) -> None:
    """Whether the hub hides the listing or, as it does today, the files alone."""
    said = the_error(online[name])
    assert said.startswith(f"{name} is gated")
    assert "accept its terms" in said
    assert "HF_TOKEN" in said


def test_an_unknown_revision_is_named_with_what_could_be_one(online: dict[str, Result]) -> None:
    said = the_error(online["no such revision"])
    assert said.startswith("acme/tiny at revision 'v9' is not on the hub")
    assert "expected a branch, tag or commit" in said


@pytest.mark.parametrize("name", ["a//b", "-x-/..", "acme/two words"])
def test_a_malformed_name_is_quoted_with_the_form_expected_and_the_hub_not_asked(
    name: str, online: dict[str, Result], hub: Hub
) -> None:
    said = the_error(online[name])
    assert name in said
    assert "repository id" in said
    assert not [request for request in hub.requests if name in request.path]


def test_a_hub_that_fails_is_not_called_out_of_reach(online: dict[str, Result]) -> None:
    said = the_error(online["acme/broken"])
    assert said.startswith("acme/broken ")
    assert "500" in said
    assert "cannot be reached" not in said
    assert "try again" in said


def test_a_shard_that_the_hub_lists_but_does_not_hold_is_named(online: dict[str, Result]) -> None:
    said = the_error(online["acme/shard-lost"])
    assert said.startswith("acme/shard-lost could not be fetched from the hub")
    assert SHARDS[1] in said


def test_a_shard_that_the_index_names_but_the_hub_does_not_list_is_named(online: dict[str, Result]) -> None:
    said = the_error(online["acme/shard-unlisted"])
    assert "acme--shard-unlisted" in said  # its directory in the cache
    assert f"{SHARDS[1]} is missing" in said
    assert "fetch the checkpoint again" in said
