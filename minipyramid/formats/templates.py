"""Chat templates: where a checkpoint has them, those that are built in, and rendering within limits."""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipyramid.config import read_json
from minipyramid.errors import CheckpointError, ConfigError, RequestError

SECONDS = 1.5  # for a template to render; it takes milliseconds
START_S = 60.0  # for its process to start, which takes a moment even on a busy machine
OLDEST = (3, 1, 6)  # of jinja2: templates can leave the sandbox of older ones
# The process's program: a file, with further places to look for packages in.
RUN = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
DEFAULT = "default"  # the name of a checkpoint's template where it has only one

# As Meta, Hugging Face and LMSYS publish them, for checkpoints that come without one.
BUILT_IN = {
    "llama2": """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after the system message, user and assistant take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set text = (system if loop.first and system is defined else '') + message['content'] %}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "llama3": """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "zephyr": """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}""",
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "vicuna": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] + ' ' }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- 'A chat between a curious user and an artificial intelligence assistant. The assistant gives ' }}
    {{- "helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'ASSISTANT: ' + message['content'] + eos_token }}
    {%- else %}
        {{- 'USER: ' + message['content'] + ' ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}""",
}
# Tokens without which a format would be plain text to the model.
NEEDS = {"llama3": ("<|start_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>", "<|im_end|>")}


def own_templates(directory: Path) -> dict[str, str]:
    """A checkpoint's templates by name: in files of their own, or in `tokenizer_config.json`.

    Raises `ConfigError` for one that cannot be read.
    """
    given = tokenizer_settings(directory).get("chat_template")
    found = given if isinstance(given, list) else [{"name": DEFAULT, "template": given}] if given else []
    templates = {}
    for entry in found:
        name, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(template, str):
            expected = "expected a text, or a list of names and templates"
            raise ConfigError(
                f"{directory / 'tokenizer_config.json'}: chat_template is malformed; {expected}"
            )
        templates[name] = template
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    for name, file in files.items():
        try:
            if file.exists():
                templates[name] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({error}); fetch it again") from error
    return templates


def special_texts(directory: Path) -> dict[str, str]:
    """What templates call `bos_token`, `eos_token` and so on, where the checkpoint says it."""
    texts = {}
    for name, given in tokenizer_settings(directory).items():
        text = given.get("content") if isinstance(given, dict) else given
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says, if there is one. Raises `ConfigError` if it cannot be read."""
    try:
        return read_json(directory / "tokenizer_config.json", optional=True)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


class Renderer:
    """Renders templates in a process that is started for the first one, and ended if it takes too long.

    One thread at a time uses it; the others wait.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def check(self, template: str) -> None:
        """Raise `ConfigError` for what is no template; nothing is rendered."""
        self._answer(template, None)

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text. Raises `RequestError` where the template refuses, `ConfigError` where it fails."""
        return self._answer(template, variables)

    def _answer(self, template: str, variables: dict[str, Any] | None) -> str:
        try:
            line = json.dumps({"template": template, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are no plain data ({error}); give texts") from error
        with self._lock:
            if self._process and self._process.poll() is not None:  # somebody has ended it
                self._process = None
            process = self._started()
            answer = self._ask(process, line, SECONDS)
            if not answer:
                self._process = None
                _end(process)
                problem = f"did not end within {SECONDS} s; use another, or name a built-in format"
                raise ConfigError(f"the chat template {problem}")
        told: dict[str, str] = json.loads(answer)
        if "refused" in told:
            raise RequestError(f"the chat template refuses the messages: {told['refused']}")
        if "failed" in told:
            raise ConfigError(f"the chat template {told['failed']}")
        return told["text"]

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            _check_jinja2()
            # Isolated, so that neither the user's directory nor this file's is searched for modules; where
            # the package is that was found here, the process is told.
            found = [find_spec(name) for name in ("jinja2", "markupsafe")]
            places = [str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin]
            file = str(Path(__file__).with_name("template_process.py"))
            command = [sys.executable, "-I", "-c", RUN, file, *places]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C stops an answer, and is not for this process
            )
            weakref.finalize(self, _end, self._process)
            if not self._ask(self._process, "", START_S):
                raise ConfigError("the process that renders chat templates does not start; check jinja2")
        return self._process

    def _ask(self, process: "subprocess.Popen[str]", line: str, seconds: float) -> str:
        """The answer to a line; empty where there was none in time, and the process has ended."""
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if process.stdin is None or process.stdout is None:
                return ""
            if line:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # it has ended before
            return ""
        finally:
            timer.cancel()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with contextlib.suppress(OSError, ValueError):  # a pipe may be closed already
        process.communicate()


def _check_jinja2() -> None:
    try:
        found = version("jinja2")
    except PackageNotFoundError as error:
        install = "pip install 'minipyramid[chat]'"
        raise ConfigError(f"chat templates need the package jinja2; {install}") from error
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST:
        newer = ".".join(map(str, OLDEST))
        raise ConfigError(f"chat templates need jinja2 {newer} or newer, {found} is installed; upgrade it")
