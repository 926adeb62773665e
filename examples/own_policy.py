"""A policy of your own: hold the first tokens, the newest, and those with the largest values.

`python examples/own_policy.py` runs it. In the evaluation and the benchmark it has a row:
    cd examples
    python -m minipyramid.eval --samples 2 --context 256 --policies full,pyramid,own_policy:LargeValues
    python -m minipyramid.bench --policy own_policy:LargeValues --kv-budget 0.5 --runs 1
"""

from dataclasses import dataclass

from torch import Tensor

from minipyramid import LLM, SamplingParams
from minipyramid.policies.held_share import HeldShare
from minipyramid.policy import Seen, top_scored


@dataclass(frozen=True)
class LargeValues(HeldShare):
    """Computes every layer, and holds the tokens whose values would change the output most."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """Which of the prompt's T tokens each key/value head holds.  [K, count]"""
        score = seen.values[:, -len(seen.q) :].norm(dim=-1)  # [K, T]
        return top_scored(score, count, first=4, newest=count // 2)


if __name__ == "__main__":
    llm = LLM("weights/storyteller", policy=LargeValues(), kv_budget=0.5)
    prompt = "Nora went home, and the fox went with her. " * 12
    (completion,) = llm.generate([prompt], SamplingParams(max_new_tokens=24))
    print(completion.text)
    print(f"{completion.kv_bytes} of {completion.kv_bytes_full} bytes held")
