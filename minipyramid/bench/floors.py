"""What a method cannot be quicker than on this machine.

The floor of a phase is the time that its arithmetic, or its reading of memory, takes at the best rates
measured in the same run: of a prompt, the products of the tokens that each layer computes; of a decode step,
the weights and the held keys and values read once, or its products, whichever takes longer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minipyramid.bench.work import Work
from minipyramid.config import ModelConfig
from minipyramid.formats.weights import AT_LOAD
from minipyramid.need import Planner
from minipyramid.policy import Policy
from minipyramid.quicker import layer_of

TRIES = 7  # of which the quickest counts


@dataclass(frozen=True)
class Rates:
    """What this machine can do at most."""

    flops: float  # products and sums in a second
    bytes_per_s: float  # read from memory


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Time one large matrix product, and a sum over more memory than any cache holds.

    The product counts in the quicker of two forms, torch's own and that of the model's layers.
    """
    cuda = device.type == "cuda"
    size, numbers = (8192, 1 << 28) if cuda else (2048, 1 << 26)
    a = torch.randn(size // 2, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    layer = layer_of(b)
    memory = torch.ones(numbers, device=device)  # float32
    product_s = min(quickest(lambda: a @ b, device), quickest(lambda: layer(a), device))
    reading_s = quickest(memory.sum, device)
    return Rates(2.0 * (size // 2) * size * size / product_s, memory.nbytes / reading_s)


def best_of(measured: list[Rates]) -> Rates:
    """The machine at its best moments: others may use it, and then it does less for a while."""
    return Rates(max(rates.flops for rates in measured), max(rates.bytes_per_s for rates in measured))


def quickest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def floors(planner: Planner, work: Work, itemsize: float, rates: Rates) -> tuple[float, float]:
    """Seconds that prompts take at least, and those that decode steps do; a weight has `itemsize` bytes."""
    config = planner.config
    layers, heads_size = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    requests = [(planner.policy_for(prompt, new), prompt, new) for prompt, new in work.lengths]
    prompt_s = sum(prompt_flops(config, policy, prompt) for policy, prompt, _ in requests) / rates.flops
    weights = layers * sum(layer_weights(config)) + config.hidden_size * config.vocab_size
    decode_s = 0.0
    for step in range(1, max(work.new_tokens) + 1):
        running = [(policy, prompt) for policy, prompt, new in requests if new >= step]
        held = sum(sum(policy.kv_lengths(prompt, step, layers)) for policy, prompt in running)
        read = itemsize * weights + planner.bytes_per_token * held
        flops = 2 * len(running) * weights + 4 * held * heads_size
        decode_s += max(read / rates.bytes_per_s, flops / rates.flops)
    return prompt_s, decode_s


def weight_bytes(config: ModelConfig, itemsize: int) -> float:
    """Bytes of a linear layer's weight, which has `itemsize` where it is not quantised."""
    quantization = config.quantization
    if quantization is None:
        return itemsize
    return 1.0 if quantization == AT_LOAD else quantization.bits / 8


def prompt_flops(config: ModelConfig, policy: Policy, prompt_tokens: int) -> float:
    """Products and sums of one prompt, two for each weight that a token passes.

    A layer computes queries, keys, values and attention of all tokens that it receives, and the rest of those
    that it passes on. Of the last layer only the newest token is wanted, so no other query is asked there.
    What a layer holds and does not compute is guessed (`minipyramid/policies/guesses.py`).
    """
    before, behind = layer_weights(config)
    heads_size = config.num_attention_heads * config.head_dim
    computed = policy.computed(prompt_tokens, config.num_hidden_layers)
    held = policy.held(prompt_tokens, config.num_hidden_layers)
    a_guess = (config.hidden_size + heads_size + 1) * 2 * config.num_key_value_heads * config.head_dim
    flops = 0.0
    for i, (received, count) in enumerate(zip(computed, held, strict=True)):
        last = i == len(computed) - 1
        passed_on = 1 if last else computed[i + 1]
        # Causal, so that on average half of the tokens are looked at.
        pairs = received if last else received * received / 2
        flops += 2 * received * before + 2 * passed_on * behind + 4 * pairs * heads_size
        flops += 2 * max(0, count - received) * a_guess
    return flops + 2 * config.hidden_size * config.vocab_size


def layer_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of a layer before attention (queries, keys, values) and behind it (output, feed-forward)."""
    hidden, D = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    return hidden * (H + 2 * K) * D, hidden * H * D + 3 * hidden * config.intermediate_size
