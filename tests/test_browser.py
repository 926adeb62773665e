"""The demo's page and the server's in a real Chromium, by a real pointer and real keys.

Driven through the W3C WebDriver protocol, which is JSON over HTTP, so nothing but `chromedriver` is needed.
The page's script is run by nothing else in these tests: what Python wrote is covered by `test_demo.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipyramid.demo.__main__ import build_parser, check
from minipyramid.demo.kept import Kept
from minipyramid.demo.page import page
from minipyramid.demo.picture import Picture, Prompt, Text, Token
from minipyramid.demo.sides import compare

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
)

SCRIPT = "<script>alert(1)</script>"
PROMPT = (
    f"</script>{SCRIPT} <img src=x onerror=alert(2)> "
    "The fox said: \u201cwho is there?\u201d The fox went home again. "
) * 2
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
STARTS_S, ANSWERS_S = 30.0, 30.0  # how long a driver and an answer are waited for
LEFT, RIGHT, END = "\ue012", "\ue014", "\ue010"  # the protocol's names for keys


class Browser:
    """One session of a running driver."""

    def __init__(self, driver: str) -> None:
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
        self.url = driver
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1000,900",
        ]
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        # Unhandled dialogs stay, so that one can be noticed.
        wanted |= {"unhandledPromptBehavior": "ignore", "timeouts": {"pageLoad": 20_000, "script": 20_000}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json; charset=utf-8"}, method=method
        )
        with self.opener.open(request, timeout=ANSWERS_S) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path) -> None:
        self.call("POST", "/url", {"url": file.as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def errors(self) -> list[str]:
        """What the console has of errors since it was last asked; uncaught exceptions are there, too."""
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def find(self, selector: str) -> dict[str, str]:
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return {ELEMENT: element[ELEMENT]}

    def point(self, selector: str, x: int = 0, y: int = 0) -> None:
        """Move the pointer to a place in an element, from its middle."""
        move = {"type": "pointerMove", "duration": 0, "origin": self.find(selector), "x": x, "y": y}
        pointer = {
            "type": "pointer",
            "id": "mouse",
            "parameters": {"pointerType": "mouse"},
            "actions": [move],
        }
        self.call("POST", "/actions", {"actions": [pointer]})

    def press(self, key: str) -> None:
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def dialog(self) -> str | None:
        """The text of an open dialog."""
        try:
            text: str = self.call("GET", "/alert/text")
        except urllib.error.HTTPError as error:
            if json.load(error)["value"]["error"] == "no such alert":
                return None
            raise
        return text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A driver in a process group and a folder of its own, which end with the tests, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not pytest's folder: Chromium's sockets need a short path.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        driver = subprocess.Popen(
            [str(CHROMEDRIVER), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            wait_for(port, driver)
            session = Browser(f"http://127.0.0.1:{port}")
            yield session
            with suppress(OSError):
                session.call("DELETE", "")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)  # Chromium's processes are in the group, too
            driver.wait(timeout=10)


def wait_for(port: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline and driver.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail(f"chromedriver did not start within {STARTS_S:.0f} s")


POLICIES = {
    "pyramid": [],
    "snapkv": ["--policy", "snapkv", "--kv-budget", "0.5"],
    "random-split": ["--policy", "random-split", "--kv-budget", "0.5"],
    "profile": ["--policy", "PROFILE", "--kv-budget", "0.5"],
}
PROFILE = {"policy": "profile", "levels": [{"computed": [1, 1, 0.5], "held": [0.3, 0.8, 0.4]}]}


@pytest.fixture(scope="module", params=POLICIES)
def picture(
    request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Picture:
    """Of a prompt that would run as a script if it were not escaped."""
    file = tmp_path_factory.mktemp("profile") / "p.json"
    file.write_text(json.dumps(PROFILE))
    policy = [str(file) if flag == "PROFILE" else flag for flag in POLICIES[request.param]]
    flags = ["--model", str(tiny_dir), "--max-new-tokens", "8", "--prompt", PROMPT, *policy]
    args = build_parser().parse_args(flags)
    return compare(args, check(args))


@pytest.fixture
def opened(browser: Browser, picture: Picture, tmp_path: Path) -> Iterator[Browser]:
    """The page, fresh; a test during which its script has failed fails, too."""
    (tmp_path / "page.html").write_text(page(picture), encoding="utf-8", newline="")
    browser.errors()
    browser.open(tmp_path / "page.html")
    yield browser
    assert browser.errors() == []


def expected(picture: Picture, position: int) -> str:
    """What the page tells about a token."""
    token, kept = picture.tokens[position], picture.pruned.kept
    where = kept.where(kept.columns[position])
    if picture.pruned.name == "pyramid":  # whose layers are nested
        depth = depths(picture)[position]
        layers = "layer 0" if depth == 1 else f"layers 0 to {depth - 1}"
        assert where == f"kept by {depth} of {picture.layers} layers, in {layers}"
    name = json.dumps(token.text or token.name, ensure_ascii=False)
    return f"position {position}: {name}, {where}"


def depths(picture: Picture) -> list[int]:
    """How many layers keep each token."""
    return [sum(count > 0 for count in column) for column in picture.pruned.kept.columns]


def readout(browser: Browser) -> Any:
    return browser.run("return document.getElementById('readout').textContent")


def highlighted(browser: Browser) -> Any:
    """Positions in the text, and the column of the map."""
    return browser.run(
        "const all = [...document.getElementById('text').children];"
        "return [all.flatMap((token, i) => token.classList.contains('on') ? [i] : []),"
        " Number(document.getElementById('column').getAttribute('x'))]"
    )


def test_errors_of_a_script_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """Otherwise the absence of errors would say nothing."""
    (tmp_path / "broken.html").write_text("<script>nothing.there()</script>")
    browser.open(tmp_path / "broken.html")
    assert any("nothing is not defined" in error for error in browser.errors())


def test_a_dialog_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """Likewise: what the prompt holds does open one where it is not escaped."""
    (tmp_path / "careless.html").write_text(SCRIPT)
    browser.open(tmp_path / "careless.html")
    assert browser.dialog() == "1"
    browser.call("POST", "/alert/dismiss", {})
    assert browser.dialog() is None


def test_a_prompt_with_a_script_is_shown_and_not_run(opened: Browser, picture: Picture) -> None:
    assert opened.dialog() is None
    assert opened.run("return document.getElementById('text').textContent") == PROMPT
    assert opened.run("return document.scripts.length") == 1
    assert opened.run("return document.images.length") == 0
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    assert readout(opened) == expected(picture, 0)


def test_a_script_within_one_token_is_shown_and_not_run(
    browser: Browser, picture: Picture, tmp_path: Path
) -> None:
    """The tiny tokenizer cuts tags to pieces; one that has them whole would not. So for all texts."""
    hostile = [Token(PROMPT, PROMPT), Token("", f'">{PROMPT}')]
    kept = Kept(1, [[1, 1], [1, 1], [1, 0]], [2, 2, 1])
    side = replace(picture.full, texts=[Text([5, 6], hostile)], kept=kept)
    other = replace(side, name=PROMPT, texts=[Text([5, 7], hostile)])
    shown = replace(picture, title=PROMPT, prompts=[Prompt(PROMPT, hostile, PROMPT)], full=side, pruned=other)
    (tmp_path / "page.html").write_text(page(shown), encoding="utf-8", newline="")
    browser.open(tmp_path / "page.html")
    assert browser.dialog() is None
    assert browser.run("return [document.scripts.length, document.images.length]") == [1, 0]
    assert browser.run("return document.getElementById('text').textContent") == PROMPT
    assert readout(browser) == expected(shown, 0)
    browser.press(RIGHT)
    assert readout(browser) == expected(shown, 1)
    assert browser.errors() == []


def test_pointing_at_the_map_tells_about_the_token_there(opened: Browser, picture: Picture) -> None:
    """The layers that keep them differ, so a wrong column would show."""
    n, width = (
        len(picture.tokens),
        opened.run("return document.getElementById('map').getBoundingClientRect().width"),
    )
    depth = depths(picture)
    shallow, deep = depth.index(min(depth)), n - 2
    for position in (shallow, deep, n // 2, 0, n - 1):
        opened.point("#map", round(((position + 0.5) / n - 0.5) * width), 7)
        assert readout(opened) == expected(picture, position)
        assert highlighted(opened) == [[position], position]
    assert depth[shallow] != depth[deep]


def test_pointing_at_a_token_highlights_its_column(opened: Browser, picture: Picture) -> None:
    # Long ones, in whose middle there is no line break.
    words = [i for i, token in enumerate(picture.tokens) if len(token.text.strip()) > 3]
    for position in (words[0], words[-1]):
        opened.point(f"#text > span:nth-child({position + 1})")
        assert readout(opened) == expected(picture, position)
        assert highlighted(opened) == [[position], position]


def test_arrow_keys_move_along_the_tokens(opened: Browser, picture: Picture) -> None:
    n, width = (
        len(picture.tokens),
        opened.run("return document.getElementById('map').getBoundingClientRect().width"),
    )
    opened.point("#map", round((10.5 / n - 0.5) * width))
    for key, position in ((RIGHT, 11), (RIGHT, 12), (LEFT, 11)):
        opened.press(key)
        assert readout(opened) == expected(picture, position)
        assert highlighted(opened) == [[position], position]


def test_the_map_is_a_slider_for_those_who_do_not_see_it(opened: Browser, picture: Picture) -> None:
    n = len(picture.tokens)
    opened.run("document.getElementById('map').focus()")
    opened.press(END)
    opened.press(RIGHT)  # stays at the last
    assert readout(opened) == expected(picture, n - 1)
    role, now, told = opened.run(
        "const map = document.getElementById('map');"
        "return ['role', 'aria-valuenow', 'aria-valuetext'].map(name => map.getAttribute(name))"
    )
    assert (role, now, told) == ("slider", str(n - 1), expected(picture, n - 1))


def test_the_map_is_filled_where_a_layer_kept_a_token(opened: Browser, picture: Picture) -> None:
    """Asked of the browser's own geometry, for every position and layer: how dark it is there."""
    filled = opened.run(
        "const kept = [...document.querySelectorAll('#map .kept')];"
        "const box = document.getElementById('map').viewBox.baseVal;"
        "const at = (x, y) => kept.filter(path => path.isPointInFill(new DOMPoint(x + 0.5, y + 0.5)))"
        ".map(path => Number(path.style.fillOpacity));"
        "return [...Array(box.width).keys()].map(x => [...Array(box.height).keys()].map(y => at(x, y)))"
    )
    kept = picture.pruned.kept
    shades = {0: [], 1: [0.5], 2: [1]}  # by the heads that keep the token, of two
    assert filled == [[shades[count] for count in column] for column in kept.columns]
    if picture.pruned.name == "pyramid":
        assert [sum(bool(shade) for shade in column) for column in filled] == depths(picture)


def test_the_bars_are_as_long_as_the_layers_kept_and_computed(opened: Browser, picture: Picture) -> None:
    """In the place of the map's layers, and as parts of the whole prompt."""
    drawn = opened.run(
        "const box = id => document.getElementById(id).getBoundingClientRect(), whole = box('bars');"
        "return [box('map').top - whole.top, box('map').height - whole.height,"
        " ...['kept', 'computed'].map(name => [...document.querySelectorAll('#bars .' + name)].map("
        "bar => Math.round(bar.getBoundingClientRect().width / whole.width * 1000)))]"
    )
    kept, n = picture.pruned.kept, len(picture.tokens)
    assert drawn[:2] == [0, 0]
    assert drawn[2] == pytest.approx([1000 * count / n for count in kept.counts], abs=4)
    more = [layer for layer, count in enumerate(kept.counts) if kept.computed[layer] != count]
    assert drawn[3] == pytest.approx([1000 * kept.computed[layer] / n for layer in more], abs=4)
    assert bool(more) == (picture.pruned.name != "pyramid")


def test_both_texts_of_each_prompt_stand_one_under_the_other(
    browser: Browser, picture: Picture, tmp_path: Path
) -> None:
    full, pruned = (replace(side, texts=side.texts * 2) for side in (picture.full, picture.pruned))
    shown = replace(picture, prompts=picture.prompts * 2, full=full, pruned=pruned)
    (tmp_path / "page.html").write_text(page(shown), encoding="utf-8", newline="")
    browser.open(tmp_path / "page.html")
    boxes = browser.run(
        "return [...document.querySelectorAll('section .text')].map(text => {"
        "const box = text.getBoundingClientRect(); return [box.left, box.top, box.bottom]})"
    )
    assert len(boxes) == 4
    for (left, _, bottom), (next_left, top, _) in itertools.pairwise(boxes):
        assert left == next_left
        assert bottom < top


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_colour_scheme(opened: Browser, scheme: str, dark: bool) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": feature})
    colour = opened.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == dark


@pytest.fixture
def served(tiny_dir: Path) -> Iterator[str]:
    """The address of a running server."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    argv = ["-m", "minipyramid.serve", "--port", "0", "--model", str(tiny_dir), "--kv-memory", "8MiB"]
    with subprocess.Popen([sys.executable, *argv], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            yield server.stderr.readline().rpartition(" ")[2].strip()
        finally:
            server.kill()


def until(browser: Browser, script: str) -> Any:
    """What a script returns as soon as that is true."""
    deadline = time.monotonic() + ANSWERS_S
    while not (found := browser.run(script)):
        assert time.monotonic() < deadline, script
        time.sleep(0.02)
    return found


def test_a_prompt_typed_into_the_server_s_page_is_answered_with_its_picture(
    browser: Browser, served: str
) -> None:
    browser.errors()
    browser.call("POST", "/url", {"url": served})
    assert browser.run("return document.getElementById('max_tokens').value") == "128"
    browser.run(
        "document.getElementById('prompt').value = ''; document.getElementById('max_tokens').value = 200;"
        "document.getElementById('temperature').value = 0;"  # by chance a text ended at once
    )
    element = browser.find("#prompt")[ELEMENT]
    browser.call("POST", f"/element/{element}/value", {"text": f"the fox and {SCRIPT} the little fox"})
    element = browser.find("#go")[ELEMENT]
    browser.call("POST", f"/element/{element}/click", {})
    said = "(document.querySelector('#text .said') || {}).textContent"
    first = until(browser, f"return {said}")
    early = until(browser, "return document.querySelector('#map path').getAttribute('d')")
    until(browser, "return document.getElementById('stop').disabled")
    whole = browser.run(f"return {said}")
    assert len(first) < len(whole)
    assert whole.startswith(first)
    assert browser.run("return document.querySelector('#text .prompt').textContent").count(SCRIPT) == 1
    assert browser.dialog() is None
    picture = browser.run("return document.querySelector('#map path').getAttribute('d')")
    assert (
        picture.count("M")
        >= 3
        == int(browser.run("return document.getElementById('map').viewBox.baseVal.height"))
    )
    assert early != picture
    assert "Of " in browser.run("return document.getElementById('figures').textContent")
    assert "full cache" in browser.run("return document.getElementById('figures').textContent")
    hosts = browser.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(hosts) <= {served}
    assert browser.errors() == []


def test_the_server_s_page_tells_what_is_wrong_and_stops_when_asked(browser: Browser, served: str) -> None:
    browser.call("POST", "/url", {"url": served})
    browser.run("document.getElementById('prompt').value = ''; document.getElementById('go').click();")
    assert "is empty" in until(browser, "return (document.querySelector('#text .wrong') || {}).textContent")
    browser.run(
        "document.getElementById('prompt').value = 'fox'; document.getElementById('max_tokens').value = 240;"
    )
    browser.run("document.getElementById('go').click(); document.getElementById('stop').click();")
    assert until(browser, "return document.getElementById('stop').disabled")
    assert browser.run("return document.querySelector('#text .wrong')") is None
