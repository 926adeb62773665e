"""Train the embedded checkpoint: tokenizer, a small Llama, and what it can recall.

    python weights/train.py --text books.txt.xz --test other-books.txt.xz

The first weights are those of another run (`--from`), or of `circuit.py`, which can already look back a
little. From there prose, stories, drills and words said twice (`documents.py`) are learnt together, on short
sequences first: 128 tokens until facts are repeated from them (left out with `--from`), then 256, 512, 1,024
and 2,048. Hidden matrices are optimised by Muon, the rest by AdamW at a quarter of the rate: at the rate of
the matrices the embeddings moved faster than the circuit could follow, and recall fell from 0.7 to 0.15
within 75 steps.

The run is bounded by tokens, saves its state every few minutes, and goes on from it when it is started again.
The model is written out once more here, as one trains it: whole sequences at once, with gradients and without
a cache.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import lzma
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from circuit import wire
from documents import ANSWER_WEIGHT, BOS, EOS, Data, Wanted, made_ahead
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipyramid import MiniPyramidError, RequestError
from minipyramid.eval.books import sentences
from minipyramid.eval.stories import story


@dataclass(frozen=True)
class Shape:
    """Field names are those of `config.json`."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6


# --- The model, as one trains it: whole sequences, no cache. Parameter names are the checkpoint's. ---


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
        self.q_proj = nn.Linear(s.hidden_size, self.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, self.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, self.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * s.head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return out


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        inv_freq = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angles = torch.outer(torch.arange(s.max_position_embeddings).float(), inv_freq).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def precision(device: torch.device, bf16: bool) -> torch.autocast:
    """Products in bf16, or in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def quicker_in_bf16(device: torch.device, shape: Shape) -> bool:
    """Whether a product of the model is quicker in bf16 here, each by the best of a few tries.

    That a processor has instructions for bf16 does not tell: one with AVX512-BF16, but without AMX, took
    1.6 s a step in bf16 and 1.0 s in float32.
    """
    x = torch.randn(4096, shape.hidden_size, device=device)
    weight = torch.randn(shape.intermediate_size, shape.hidden_size, device=device)
    best = {False: math.inf, True: math.inf}
    for bf16 in (False, True) * 10:
        began = time.perf_counter()
        with precision(device, bf16):
            F.linear(x, weight).sum().item()  # which waits for a GPU
        best[bf16] = min(best[bf16], time.perf_counter() - began)
    return best[True] < best[False]


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ids[:, 1:] under `weights` [B, T - 1], and which of them the model would have said."""
    logits = model(ids[:, :-1]).flatten(0, 1)
    target, w = ids[:, 1:].flatten(), weights.flatten()
    loss = (F.cross_entropy(logits.float(), target, reduction="none") * w).sum() / w.sum()
    return loss, (logits.argmax(-1) == target).view(weights.shape)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (five Newton-Schulz steps), so that every direction of a
    matrix moves alike; about twice as fast per token as AdamW here. In float32, since torch's own works in
    bf16, which took three times as long as the model where the processor has no bf16 products. Source: Jordan
    et al., 2024.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                updates = []
                for p in params:
                    held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    grad = cast("Tensor", p.grad)
                    held.lerp_(grad, 0.05)
                    updates.append(grad.lerp(held, 0.95))
                u = torch.stack(updates)
                u = u.mT if shape[0] > shape[1] else u
                u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = u @ u.mT
                    u = 3.4445 * u + (-4.7750 * a + 2.0315 * (a @ a)) @ u
                u = u.mT if shape[0] > shape[1] else u
                # Scaled to AdamW's usual size of step, so that one rate serves both.
                scale = 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, u, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


# --- The texts
# ----------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return data.decode("utf-8")


def train_tokenizer(text: str, directory: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Llama 2's kind: byte-pair pieces, digits apart, unknown characters as bytes; prose and some stories."""
    model = directory / "tokenizer.model"
    if not model.exists():
        rng = random.Random(0)
        paragraphs = [p for p in text.splitlines() if 20 < len(p) < 4000]
        sentences = rng.sample(paragraphs, min(len(paragraphs), 30000))
        for _ in range(2500):
            tale = story(rng, 300, lambda t: len(t) // 4 + 1)
            sentences += (tale.text + "".join(q + a for q, a in tale.asked)).splitlines()
        trained = io.BytesIO()  # a writer, for a path would be written into the model
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=trained, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=0.9995, max_sentence_length=8192,
            unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, minloglevel=1, num_threads=2,
        )  # fmt: skip
        model.write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@torch.no_grad()
def recall(model: nn.Module, data: Data, length: int, rows: int, bf16: bool = False) -> float:
    """Share of answers of which every token is the model's first choice, given the true text before it."""
    right, asked, device = 0, 0, next(model.parameters()).device
    for _ in range(rows):
        ids, weights = (torch.tensor([x], device=device) for x in data.story(length))
        with precision(device, bf16):
            _, hit = weighted_loss(model, ids, weights)
        tokens = zip(weights[0].tolist(), hit[0].tolist(), strict=True)
        for is_answer, span in itertools.groupby(tokens, key=lambda token: token[0] == ANSWER_WEIGHT):
            if is_answer:
                asked += 1
                right += all(said for _, said in span)
    return right / max(1, asked)


@torch.no_grad()
def prose_loss(model: nn.Module, tokens: np.ndarray, length: int, rows: int, bf16: bool = False) -> float:
    """Nats per token over evenly spaced windows."""
    total, device = 0.0, next(model.parameters()).device
    for start in np.linspace(0, len(tokens) - length - 1, rows).astype(int).tolist():
        ids = torch.tensor([[BOS, *tokens[start : start + length].tolist()]], device=device)
        with precision(device, bf16):
            total += float(weighted_loss(model, ids, torch.ones(1, length, device=device))[0])
    return total / rows


# --- The run
# -----------------------------------------------------------------------------------------------------


def export(model: Llama, shape: Shape, directory: Path) -> None:
    """The Hugging Face layout, bf16, embeddings tied."""
    tensors = {f"model.{n}": p.detach().cpu().bfloat16().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape), "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_data(args: argparse.Namespace, out: Path, vocab_size: int) -> tuple[Data, Data]:
    """What is learnt from, and what is measured on."""
    text, unseen = read_text(Path(args.text)), read_text(Path(args.test))
    if args.start and not (out / "tokenizer.model").exists():
        shutil.copy(args.start / "tokenizer.model", out)
    tokenizer = train_tokenizer(text, out, vocab_size)
    held = out / "prose.npy"
    if not held.exists():
        parts = text.split("\n\n")
        np.save(
            held, np.array([i for part in parts for i in tokenizer.encode(part + "\n\n")], dtype=np.uint16)
        )
    data = Data(tokenizer, np.load(held), sentences(text), args.seed)
    test_tokens = np.array(tokenizer.encode(unseen), dtype=np.uint16)
    test = Data(tokenizer, test_tokens, sentences(unseen), args.seed)
    for each in (data, test):
        next(each.stretch(STAGES[-1].length))  # a text that is too short is refused now
    return data, test


def check_shape(directory: Path, shape: Shape) -> None:
    """Refuse weights of another shape; raises `RequestError`."""
    for name in ("model.safetensors", "tokenizer.model"):
        if not (directory / name).exists():
            raise RequestError(f"--from {directory} is no checkpoint, for it has no {name}")
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"--from {directory} is no checkpoint: {error}") from error
    for name, wanted in asdict(shape).items():
        if config.get(name) != wanted:
            raise RequestError(f"--from {directory} has {name} {config.get(name)}, expected {wanted}")


class Run:
    """The model, its optimisers and how far they are, saved together and taken up again.

    Args:
        start: a checkpoint whose weights are the first ones, with its optimisers' state if that is there.
    """

    def __init__(
        self, shape: Shape, out: Path, lr: float, device: torch.device, start: Path | None = None
    ) -> None:
        self.shape, self.out, self.lr = shape, out, lr
        self.model = Llama(shape)
        wire(list(self.model.layers), self.model.embed_tokens.weight, shape.rope_theta)
        self.model.to(device)
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() != 2 or "embed" in name]
        self.muon = Muon(matrices, lr=lr, weight_decay=0.05)
        self.adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.stage = self.step = self.tokens = 0
        self.seconds = 0.0
        self.parts: dict[str, Any] = {"model": self.model, "muon": self.muon, "adam": self.adam}
        if (out / "state.pt").exists():
            vars(self).update(self.load(out / "state.pt"))
        elif start:
            check_shape(start, shape)
            self.stage = 1  # what the first stage teaches is there
            if (start / "state.pt").exists():
                self.load(start / "state.pt")
            else:
                tensors = load_file(start / "model.safetensors")
                self.model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})

    def load(self, file: Path) -> dict[str, float]:
        """Take weights and optimisers over; returns how far that run was."""
        held = torch.load(file, weights_only=True, map_location=next(self.model.parameters()).device)
        for name, part in self.parts.items():
            part.load_state_dict(held[name])
        state: dict[str, float] = held["state"]
        return state

    def save(self) -> None:
        state = {name: vars(self)[name] for name in ("stage", "step", "tokens", "seconds")}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**parts, "state": state}, self.out / "state.pt")
        export(self.model, self.shape, self.out)

    def learn(self, loss: Tensor, done: float) -> None:
        """One step; the rate rises over 50 steps and falls over the last 40 %."""
        rate = self.lr * min(1.0, (self.step + 1) / 50, max(0.02, (1 - done) / 0.4))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, share in ((self.muon, 1.0), (self.adam, 0.25)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Stage:
    """What is learnt at one length: shares of the kinds of documents, until recall from stories stands."""

    length: int
    shares: dict[str, float]
    enough: float
    # Share of the run after which the next stage begins all the same, since the longest must be seen.
    due: float


STAGES = (
    Stage(128, {"copy": 0.15, "drill": 0.2, "story": 0.25, "book": 0.4}, 0.85, 0.15),
    Stage(256, {"copy": 0.05, "drill": 0.05, "story": 0.4, "book": 0.5}, 0.9, 0.3),
    Stage(512, {"copy": 0.03, "drill": 0.02, "story": 0.35, "book": 0.6}, 0.95, 0.6),
    Stage(1024, {"copy": 0.03, "story": 0.35, "book": 0.62}, 0.97, 0.85),
    Stage(2048, {"copy": 0.03, "story": 0.3, "book": 0.67}, 2.0, 2.0),
)


def train(args: argparse.Namespace) -> Iterator[str]:
    """Yields a line per measurement; the last ones are what the checkpoint's README reports."""
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    run = Run(Shape(), out, args.lr, device, args.start)
    data, test = read_data(args, out, run.shape.vocab_size)
    bf16 = quicker_in_bf16(device, run.shape)
    yield f"products in {'bf16' if bf16 else 'float32'}, which is quicker here"
    step_fn = torch.compile(weighted_loss, dynamic=False) if args.compile else weighted_loss
    seed = f"{args.seed} {run.step}"  # a run that is taken up again reads other documents
    lengths = random.Random(seed)

    def want() -> Wanted:
        # Shorter lengths stay in, so that what was learnt on them does not fade.
        among = STAGES[max(0, run.stage - 2) : run.stage + 1]
        stage = among[-1] if lengths.random() < 0.25 else lengths.choice(among)
        return max(1, args.batch_tokens // stage.length), stage.length, stage.shares

    last_save = time.monotonic()
    losses: list[float] = []
    with made_ahead(data, seed, want) as batches:
        while (done := run.tokens / (1e6 * args.tokens)) < 1:
            began = time.monotonic()
            ids, weights = next(batches)
            with precision(device, bf16):
                loss, _ = step_fn(run.model, ids.to(device), weights.to(device))
            run.learn(loss, done)
            losses.append(loss.item())
            run.step += 1
            run.tokens += weights.numel()
            run.seconds += time.monotonic() - began
            if run.step % args.every == 0:
                now = STAGES[run.stage]
                got = recall(run.model, test, now.length, max(8, 8192 // now.length), bf16)
                books = prose_loss(run.model, test.prose, 512, 4, bf16)
                yield (
                    f"step {run.step} {run.tokens / 1e6:.2f}M tokens {run.seconds / 60:.1f} min "
                    f"length {now.length} "
                    f"loss {sum(losses) / len(losses):.3f} recall {got:.2f} books {books:.3f}"
                )
                losses = []
                if got >= now.enough or done > now.due:
                    run.stage += 1
                if time.monotonic() - last_save > 240:
                    last_save = time.monotonic()
                    run.save()
    run.save()
    test.rng.seed(987_654_321)  # the same stories, whatever was asked on the way
    for stage in STAGES[1:]:
        yield f"recall at {stage.length}: {recall(run.model, test, stage.length, args.eval_rows, bf16):.3f}"
    yield f"books test loss: {prose_loss(run.model, test.prose, 1024, 64, bf16):.3f} nats per token"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="prose to learn from (.txt or .txt.xz)")
    parser.add_argument("--test", required=True, help="prose to measure loss and recall on")
    parser.add_argument("--out", default="trained", help="directory of the checkpoint and of the run's state")
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="DIRECTORY",
        help="a checkpoint to begin with, and its state.pt",
    )
    parser.add_argument(
        "--tokens", type=float, default=20.0, help="millions that are learnt from; the rate falls to the end"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        for line in train(args):
            print(line, flush=True)
    except MiniPyramidError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; started again, the run goes on from the state that it saved last")


if __name__ == "__main__":
    main()
