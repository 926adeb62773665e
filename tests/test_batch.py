"""Files of prompts: a record for each line, whole lines only, whatever ends the run."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import STEEP

from minipyramid import LLM, RequestError, SamplingParams, batch
from minipyramid.batch import job, lines
from minipyramid.generate import main

SHORT = SamplingParams(max_new_tokens=6, ignore_eos=True)


def write(file: Path, entries: list[Any]) -> Path:
    """A file with an entry on each line; a text as it is."""
    file.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """Records; each must be a whole line."""
    text = file.read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def prompts(count: int) -> list[dict[str, Any]]:
    """Lines of different lengths, some sampled with seeds of their own."""
    rng = random.Random(count)
    texts = ["the fox " * rng.randint(1, 9) for _ in range(count)]
    return [
        {"id": f"n{i}", "prompt": text, "max_new_tokens": rng.randint(1, 12)}
        | ({"temperature": 1.5, "seed": i} if i % 2 else {})
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def small(tiny: LLM) -> LLM:
    """Has room for a few at a time."""
    return tiny.under(STEEP, kv_memory="200KiB")


def test_every_line_has_the_text_of_its_single_run(small: LLM, tmp_path: Path) -> None:
    entries = prompts(40)
    counts = batch.run(small, write(tmp_path / "in", entries), tmp_path / "out", SHORT)
    assert (counts.finished, counts.failed, counts.skipped) == (40, 0, 0)
    records = {record.pop("id"): record for record in read(tmp_path / "out")}
    for entry in entries:
        given = {name: entry[name] for name in ("max_new_tokens", "temperature", "seed") if name in entry}
        alone = small.generate(entry["prompt"], SamplingParams(ignore_eos=True, **given))[0]
        assert records.pop(entry["id"]) == {
            "text": alone.text,
            "finish_reason": "length",
            "prompt_tokens": len(alone.prompt_token_ids),
            "new_tokens": given["max_new_tokens"],
            "kv_bytes": alone.kv_bytes,
        }
    assert records == {}


def test_a_prompt_of_ids_gets_ids_back(tiny: LLM, tmp_path: Path) -> None:
    entry = {"id": 1, "token_ids": [1, 5, 9], "logprobs": True}
    batch.run(tiny, write(tmp_path / "in", [entry]), tmp_path / "out", SHORT)
    alone = tiny.generate([[1, 5, 9]], SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True))[0]
    (record,) = read(tmp_path / "out")
    assert record["token_ids"] == alone.token_ids
    assert record["logprobs"] == pytest.approx(alone.logprobs, abs=1e-5)


BAD = [
    ("no json", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("[1]", "expected a JSON object"),
    ({"prompt": "the fox"}, "no id"),
    ({"id": None, "prompt": "the fox"}, "the id None"),
    ({"id": True, "prompt": "the fox"}, "the id True"),
    ({"id": "x" * 2000, "prompt": "the fox"}, "more than 1024 characters"),
    ({"id": "first", "prompt": "again"}, "the id 'first' of an earlier line"),
    ({"id": "none"}, "has none of them; give one of prompt, messages, token_ids"),
    ({"id": "both", "prompt": "a", "token_ids": [1]}, "has prompt and token_ids"),
    ({"id": "empty", "prompt": ""}, "line 12 is empty"),
    ({"id": "number", "prompt": 5}, "expected a text"),
    ({"id": "text", "token_ids": "5"}, "expected a list of ids"),
    ({"id": "ids", "token_ids": [1, 320]}, "the token id 320"),
    ({"id": "kinds", "token_ids": [1, "2"]}, "token ids"),
    ({"id": "range", "prompt": "a", "top_p": 2}, "top_p is 2"),
    ({"id": "kind", "prompt": "a", "top_k": "2"}, "top_k is '2'"),
    ({"id": "nan", "prompt": "a", "temperature": float("nan")}, "temperature is nan"),
    ({"id": "misspelt", "prompt": "a", "max_new_token": 2}, "did you mean 'max_new_tokens'?"),
    ({"id": "half", "prompt": "\ud800"}, "line 21"),
    ({"id": "long", "prompt": "the fox " * 400}, "more than the context of 256"),
    ({"id": "large", "prompt": "a", "max_new_tokens": 250}, "bytes of cache, but kv_memory"),
]  # fmt: skip


def test_a_bad_line_is_a_record_and_the_rest_goes_on(tiny: LLM, tmp_path: Path) -> None:
    first, last = ({"id": name, "prompt": "the fox"} for name in ("first", "last"))
    file = write(tmp_path / "in", [first, *(entry for entry, _ in BAD), "", last])
    with file.open("ab") as end:
        end.write(b'{"id": "bytes", "prompt": "caf\xe9"}')  # also the last line without a line break
    llm = tiny.under("full", kv_memory="60KiB")
    counts = batch.run(llm, file, tmp_path / "out", SHORT)
    assert (counts.finished, counts.failed) == (2, len(BAD) + 1)
    records = read(tmp_path / "out")
    for number, (entry, problem) in enumerate(BAD, 2):
        (record,) = [r for r in records if r.get("line") == number] or [
            r for r in records if isinstance(entry, dict) and r.get("id") == entry.get("id") and "error" in r
        ]
        assert problem in record["error"]
    assert [r["id"] for r in records if "text" in r] == ["first", "last"]
    assert "UTF-8" in next(r for r in records if r.get("line") == len(BAD) + 4)["error"]


def test_a_line_without_end_is_skipped_and_not_read_into_memory(
    tiny: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MOST_BYTES", 1 << 20)
    entries = [{"id": 1, "prompt": "a" * (5 << 20)}, {"id": 2, "prompt": "the fox"}]
    batch.run(tiny, write(tmp_path / "in", entries), tmp_path / "out", SHORT)
    assert [record.get("id", record.get("line")) for record in read(tmp_path / "out")] == [1, 2]
    assert "longer than 1 MiB" in read(tmp_path / "out")[0]["error"]


@pytest.mark.parametrize(("entry", "problem"), BAD[:2] + BAD[6:8] + BAD[15:17] + BAD[20:21])
def test_strict_refuses_before_anything_is_written(
    tiny: LLM, tmp_path: Path, entry: Any, problem: str
) -> None:
    file = write(tmp_path / "in", [{"id": "first", "prompt": "the fox"}, entry])
    with pytest.raises(RequestError, match=problem.replace("?", ".")) as error:
        batch.run(tiny, file, tmp_path / "out", SHORT, strict=True)
    assert "line 2" in str(error.value)  # also of a field, whose error knew no line
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_dropped_at_any_byte(small: LLM, tmp_path: Path) -> None:
    entries = [{"id": "\u00e4", "prompt": "the fox"}, {"id": 2, "prompt": "once", "max_new_tokens": 1}, "bad"]
    file, out = write(tmp_path / "in", entries), tmp_path / "out"
    few = SamplingParams(max_new_tokens=2, ignore_eos=True)  # for there are hundreds of runs
    batch.run(small, file, out, few)
    whole = out.read_bytes()
    expected = sorted(map(str, read(out)))
    for end in range(len(whole)):
        out.write_bytes(whole[:end])
        counts = batch.run(small, file, out, few, resume=True)
        assert counts.skipped == whole[:end].count(b"\n")
        assert sorted(map(str, read(out))) == expected


def test_resuming_what_is_complete_changes_nothing(small: LLM, tmp_path: Path) -> None:
    file, out = write(tmp_path / "in", [*prompts(5), "bad", "worse"]), tmp_path / "out"
    batch.run(small, file, out, SHORT)
    before = out.read_bytes()
    assert batch.run(small, file, out, SHORT, resume=True).skipped == 7
    assert out.read_bytes() == before


def test_an_error_for_a_repeated_id_does_not_stand_for_the_first(
    small: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line's record comes first, and must not make a resumed run leave out the first line."""
    entries = [{"id": "a", "prompt": "the fox"}, {"id": "a", "prompt": "again"}]
    file, out = write(tmp_path / "in", entries), tmp_path / "out"
    stops = iter([False, False, False, False, True])  # before a token is computed
    batch.run(small, file, out, SHORT, stop=lambda: next(stops, True))
    assert [list(record) for record in read(out)] == [["line", "error"]]
    batch.run(small, file, out, SHORT, resume=True)
    assert [record.get("id") for record in read(out)] == [None, "a"]


def test_what_cannot_be_the_output_is_one_sentence(small: LLM, tmp_path: Path) -> None:
    file = write(tmp_path / "in", prompts(2))
    (tmp_path / "story.txt").write_text("Once upon a time\n")
    (tmp_path / "list.json").write_text('{"other": 1}\n')
    for i, line in enumerate(
        ('{"id": 1, "prompt": "x"}', '{"id": [1], "text": ""}', '{"id": null, "text": ""}')
    ):
        (tmp_path / f"{i}.json").write_text(line + "\n")  # prompts were taken for finished records
    for out, problem in {
        file: "the input as well",
        tmp_path: "cannot be written",
        tmp_path / "no" / "where": "cannot be written",
        tmp_path / "story.txt": "no JSON",
        tmp_path / "list.json": "no record",
        **{tmp_path / f"{i}.json": "no record" for i in range(3)},
    }.items():
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(RequestError, match=problem):
            batch.run(small, file, out, SHORT, resume=True)
        assert (out.read_bytes() if out.is_file() else None) == before
    with pytest.raises(RequestError, match="holds something already"):
        batch.run(small, file, tmp_path / "story.txt", SHORT)
    with pytest.raises(RequestError, match="cannot be read"):
        batch.run(small, tmp_path / "nothing", tmp_path / "out", SHORT)
    for source, target in (("a\0", tmp_path / "out"), (file, "a\0")):  # it was a ValueError
        with pytest.raises(RequestError, match="null byte"):
            batch.run(small, source, target, SHORT)
    assert small.engine.scheduler.bytes_in_flight == 0


def test_parameters_of_another_type_are_refused_before_anything_is_written(
    small: LLM, tmp_path: Path
) -> None:
    """They became an error record for each line, which a later run took for done."""
    file, out = write(tmp_path / "in", prompts(1)), tmp_path / "out"
    given: Any = {"temperature": 0.5}
    with pytest.raises(TypeError, match="params"):
        batch.run(small, file, out, given)
    assert not out.exists()


def test_two_runs_do_not_write_one_file(small: LLM, tmp_path: Path) -> None:
    file, out = write(tmp_path / "in", prompts(3)), tmp_path / "out"
    problems = []

    def meanwhile(_: object) -> None:
        try:
            batch.run(small, file, out, SHORT, resume=True)
        except RequestError as error:
            problems.append(str(error))

    batch.run(small, file, out, SHORT, on_step=meanwhile)
    assert "another run" in problems[0]
    assert len(read(out)) == 3


def test_no_more_lines_are_held_than_wait_and_run(
    small: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "AHEAD", 4)
    taken: list[int] = []
    read_all = lines.read_lines

    def counted(source: Path) -> Iterator[Any]:
        for line in read_all(source):
            taken.append(line.number)
            yield line

    monkeypatch.setattr(job, "read_lines", counted)
    out = tmp_path / "out"
    beyond: list[int] = []

    def look(scheduler: Any) -> None:
        written = out.read_bytes().count(b"\n")
        beyond.append(len(taken) - written - len(scheduler.running) - len(scheduler.waiting))
        assert len(scheduler.waiting) <= 4

    batch.run(small, write(tmp_path / "in", prompts(60)), out, SHORT, on_step=look)
    assert set(beyond) == {0}
    assert len(beyond) > 20


def test_messages_are_rendered_or_refused(tiny: LLM, tiny_dir: Path, tmp_path: Path) -> None:
    """A checkpoint without a template was refused its messages, and nothing could name a format for it."""
    said = [{"role": "user", "content": "Hello"}]
    file = write(tmp_path / "in", [{"id": 1, "messages": said}])
    batch.run(tiny, file, tmp_path / "refused", SHORT)
    assert "has no chat template of its own; name a chat format" in read(tmp_path / "refused")[0]["error"]
    vicuna = LLM(tiny_dir, policy="full", chat_format="vicuna")
    batch.run(vicuna, file, tmp_path / "out", SHORT)
    expected = vicuna.under("full").chat(said, SHORT).text
    assert expected == tiny.under("full").chat(said, SHORT, chat_format="vicuna").text
    assert read(tmp_path / "out")[0]["text"] == expected
    flags = ["--policy", "full", "--ignore-eos", "--max-new-tokens", str(SHORT.max_new_tokens)]
    flags += ["--batch", str(file), "--output", str(tmp_path / "told"), "--model", str(tiny_dir)]
    assert main([*flags, "--chat-format", "vicuna"]) == 0
    assert read(tmp_path / "told")[0]["text"] == expected


def test_what_fails_while_it_runs_is_tried_once_more(
    small: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was short for a moment made an error of the line, which `--resume` took for done."""
    compute, entries = small.engine._compute_prompts, prompts(6)
    expected = [record["text"] for record in finished(small, entries, tmp_path / "expected")]

    def failing(together: list[Any]) -> None:
        for sequence, _ in together:
            often = {"line 2": 1, "line 4": 9}.get(sequence.request.name, 0)
            if tries[sequence.request.name] < often:
                tries[sequence.request.name] += len(together) == 1
                raise MemoryError("just now")
        compute(together)

    tries: Counter[str] = Counter()
    monkeypatch.setattr(small.engine, "_compute_prompts", failing)
    records = finished(small, entries, tmp_path / "out")
    assert tries == {"line 2": 1, "line 4": 2}
    assert [record.get("text") for record in records] == [*expected[:3], None, *expected[4:]]
    assert "just now" in records[3]["error"]


def test_a_step_that_is_broken_off_is_gone_on_with(
    small: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the run, with a traceback."""
    step, calls, entries = small.model.step, [0], prompts(30)
    expected = finished(small, entries, tmp_path / "expected")

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("out of memory")
        return step(*args)

    monkeypatch.setattr(small.model, "step", failing)
    assert finished(small, entries, tmp_path / "out") == expected


@pytest.mark.parametrize("text", ["my thesis in one line", '{"precious": 1}', '{"id": 1, "text": "a"}\nmine'])
def test_a_file_of_another_kind_is_not_resumed(small: LLM, tmp_path: Path, text: str) -> None:
    """A last line without its end was taken for a torn record, and cut off."""
    (tmp_path / "out").write_text(text)
    with pytest.raises(RequestError, match="no record; name another file"):
        batch.run(small, write(tmp_path / "in", prompts(2)), tmp_path / "out", SHORT, resume=True)
    assert (tmp_path / "out").read_text() == text


def finished(llm: LLM, entries: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The records in the order of their lines."""
    batch.run(llm, write(out.with_suffix(".in"), entries), out, SHORT)
    order = [entry["id"] for entry in entries]
    return sorted(read(out), key=lambda record: order.index(record["id"]))


# --- as a command ---


def test_the_command_writes_records_and_tells_how_many(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "in", [*prompts(3), "bad"]), tmp_path / "out"
    flags = ["--batch", str(file), "--output", str(out), "--model", str(tiny_dir), "--policy", "full"]
    assert main([*flags, "--ignore-eos"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "minipyramid: 4 records written, 1 of them with an error\n")
    assert sum(record.get("finish_reason") == "length" for record in read(out)) == 3
    assert main([*flags, "--resume"]) == 0
    assert capsys.readouterr().err == "minipyramid: 0 records written, 4 were there already\n"
    for more, problem in (
        ([], "holds something already"),
        (["--resume", "--strict"], "line 4 is no JSON"),
        (["--resume", "a prompt"], "PROMPT does not go with --batch"),
        (["--resume", "--json"], "--json does not go with --batch"),
        (["--resume", "--plan"], "--plan does not go with --batch"),
        (["--batch", "-"], "--batch - does not exist"),
    ):
        assert main([*flags, *more]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("\n") == 1
    for lonely in (["the fox", "--output", "x"], ["the fox", "--resume"], ["--batch", str(file)]):
        assert main([*lonely, "--model", str(tiny_dir)]) == 2
        assert "--batch" in capsys.readouterr().err


def start(tiny_dir: Path, *flags: str, first: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own; `first` is run there before it."""
    argv = ["--model", str(tiny_dir), "--policy", "full", "--kv-memory", "200KiB", "--ignore-eos", *flags]
    code = f"{first}\nimport sys; from minipyramid.generate import main; sys.exit(main({argv!r}))"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env, **options
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_what_is_finished_is_whole(
    tiny_dir: Path, tiny: LLM, tmp_path: Path, number: int, status: int
) -> None:
    entries = prompts(3000)
    file, out = write(tmp_path / "in", entries), tmp_path / "out"
    process = start(tiny_dir, "--batch", str(file), "--output", str(out))
    with process:
        while process.poll() is None and not (out.exists() and out.stat().st_size > 1000):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert err.count("\n") <= 2
    records = read(out)
    assert 0 < len(records) < 3000
    given = {entry["id"]: entry for entry in entries}
    record = records[-1]
    alone = tiny.generate(
        given[record["id"]]["prompt"],
        SamplingParams(
            ignore_eos=True, **{k: v for k, v in given[record["id"]].items() if k not in ("id", "prompt")}
        ),
    )[0]
    assert record["text"] == alone.text


def test_a_full_disk_leaves_whole_lines_and_is_gone_on_with(
    tiny_dir: Path, tiny: LLM, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: a write then does a part of a line, and fails."""
    file, out, undisturbed = write(tmp_path / "in", prompts(60)), tmp_path / "out", tmp_path / "undisturbed"
    flags = ["--batch", str(file), "--output", str(out), "--resume"]
    with start(
        tiny_dir, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    ) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be written (File too large)" in err
    assert err.count("\n") == 1
    assert 4000 < out.stat().st_size < 5000
    held = out.read_bytes()
    llm = tiny.under("full", kv_memory="200KiB")
    params = SamplingParams(ignore_eos=True)
    assert batch.run(llm, file, out, params, resume=True).skipped == held.count(b"\n")
    assert out.read_bytes().startswith(held)
    batch.run(llm, file, undisturbed, params)
    assert sorted(out.read_bytes().splitlines()) == sorted(undisturbed.read_bytes().splitlines())


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from minipyramid import LLM, SamplingParams, batch
from minipyramid.batch import job

model, source, target, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
llm = LLM(model, policy="full", kv_memory="20KiB")
job.AHEAD = 4  # so that the first record comes soon
rng, killed, progressed = random.Random(1), 0, 0
size = lambda: target.stat().st_size if target.exists() else 0
whole_lines = lambda: target.read_bytes().count(b"\\n") if target.exists() else 0
while True:
    before = size()
    child = os.fork()  # a process of its own, without the seconds that a start takes
    if child == 0:
        batch.run(llm, source, target, SamplingParams(ignore_eos=True), resume=True)
        os._exit(0)
    if killed < kills:
        # After its first record, or while it starts, or at once where few lines are left for the kills.
        spare = 300 - whole_lines() - (kills - killed)
        deadline = time.monotonic() + 20
        awaits = spare > 20 and rng.random() < 0.5
        while awaits and size() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        # A fast machine writes 3 lines in a millisecond, and must not come to the end before the last kill.
        longest = min(0.01 if awaits else 0.1, spare / 3000)
        time.sleep(rng.uniform(0, longest) if spare > 10 else 0)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    progressed += os.WIFSIGNALED(status) and size() > before
    if status == 0:
        break
print(killed, progressed)
"""


def test_two_hundred_kills_lose_and_repeat_nothing(tiny_dir: Path, tiny: LLM, tmp_path: Path) -> None:
    """Most kills once came before the first record, which showed nothing."""
    entries = [{**entry, "max_new_tokens": 1 + i % 3} for i, entry in enumerate(prompts(300))]
    file, out = write(tmp_path / "in", entries), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_dir), str(file), str(out), "200"],
        capture_output=True, text=True, check=False, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, progressed = map(int, done.stdout.split())
    assert killed == 200
    assert progressed > 40
    records = read(out)
    assert Counter(record["id"] for record in records) == Counter(entry["id"] for entry in entries)
    batch.run(tiny.under("full"), file, tmp_path / "undisturbed", SamplingParams(ignore_eos=True))
    assert sorted(map(str, records)) == sorted(map(str, read(tmp_path / "undisturbed")))


LONG = """
import json, sys
from pathlib import Path
from minipyramid import LLM, SamplingParams, batch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def look(scheduler):
    if scheduler.finished >= 250 * (len(seen) + 1):
        seen.append((scheduler.finished, resident()))

model, source, target = sys.argv[1:4]
llm, seen = LLM(model, policy="full", kv_memory="200KiB"), []
batch.run(llm, source, target, SamplingParams(ignore_eos=True), on_step=look)
first = next(size for finished, size in seen if finished >= 500)
print(len(seen), max(size for finished, size in seen if finished >= 500) - first)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells resident memory on Linux alone")
def test_a_hundred_thousand_lines_take_no_more_memory(tiny_dir: Path, tmp_path: Path) -> None:
    """One in fifty is generated from; the others are of every kind that becomes an error.

    torch keeps what it has prepared for products of the last 1,024 shapes, some 200 MB; here for eight.
    """
    file, out = tmp_path / "in", tmp_path / "out"
    with file.open("w") as lines_of:
        for i in range(100_000):
            entry: Any = {"id": f"n{i}", "prompt": "the fox", "max_new_tokens": 1}
            if i % 50:
                entry = ["no JSON", {"id": i, "prompt": ""}, {"id": "n0", "prompt": "a"}, {"id": i, "x": 1}][
                    i % 4
                ]
            lines_of.write((entry if isinstance(entry, str) else json.dumps(entry)) + "\n")
    few = {"LRU_CACHE_CAPACITY": "8", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tiny_dir), str(file), str(out)],
        capture_output=True, text=True, check=False, timeout=250, env={**os.environ, **few},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    looks, grown = map(int, done.stdout.split())
    assert looks >= 7
    assert grown < 8 << 20
    with out.open() as records:
        kinds = Counter("text" in json.loads(record) for record in records)
    assert kinds == {True: 2000, False: 98_000}
