"""What the server counts, in Prometheus' text."""

from minipyramid.scheduler import Scheduler

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # of the time to the first token


class Metrics:
    """Counted by the worker's thread (prompts by the event loop, which admits them), and read by the loop."""

    def __init__(self) -> None:
        self.running = self.waiting = self.planned = self.held = self.memory = 0
        self.prompts = self.generated = 0  # tokens
        self.first_tokens = [0] * (len(BUCKETS_S) + 1)
        self.first_tokens_s = 0.0

    def look(self, scheduler: Scheduler) -> None:
        """Between two steps: what runs, waits and is held."""
        self.running, self.waiting = len(scheduler.running), len(scheduler.waiting)
        self.planned, self.memory = scheduler.bytes_in_flight, scheduler.memory
        self.held = scheduler.bytes_per_token * sum(sum(row.lengths) for row in scheduler.running)

    def first_token(self, seconds: float) -> None:
        """A sequence's first token came so long after it was asked for."""
        self.first_tokens[sum(seconds > limit for limit in BUCKETS_S)] += 1
        self.first_tokens_s += seconds

    def text(self) -> str:
        """All of them."""
        lines: list[str] = []
        self._one(lines, "requests_running", "gauge", "sequences that run", self.running)
        self._one(lines, "requests_waiting", "gauge", "sequences that wait for room", self.waiting)
        self._one(lines, "prompt_tokens_total", "counter", "tokens of prompts", self.prompts)
        self._one(lines, "generated_tokens_total", "counter", "tokens that were generated", self.generated)
        self._one(lines, "kv_bytes_planned", "gauge", "bytes allotted for what runs", self.planned)
        self._one(lines, "kv_bytes_held", "gauge", "bytes of the keys and values held now", self.held)
        self._one(lines, "kv_bytes_limit", "gauge", "bytes that may be allotted", self.memory)
        name = "minipyramid_time_to_first_token_seconds"
        lines += [f"# HELP {name} from a request to its first token", f"# TYPE {name} histogram"]
        below = 0
        for limit, count in zip((*BUCKETS_S, "+Inf"), self.first_tokens, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{limit}"}} {below}')
        lines += [f"{name}_sum {self.first_tokens_s}", f"{name}_count {below}"]
        return "\n".join(lines) + "\n"

    def _one(self, lines: list[str], name: str, kind: str, told: str, value: int) -> None:
        name = f"minipyramid_{name}"
        lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}", f"{name} {value}"]
