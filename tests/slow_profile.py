"""A profile, one sequence, as its definition reads: every layer's probabilities stand in one matrix.

Written from the specification, not from the engine: what a layer computes and holds are lists of positions,
scores are worked out token by token, and what is read afterwards attends to the lists that are held.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from oracle import Oracle
from torch import Tensor

from minipyramid.policies.profile import Profile

VOTERS = 64
Guesses = dict[int, dict[int, tuple[Tensor, Tensor]]]  # layer: position: key and value


class SlowProfile(Oracle):
    def __init__(self, directory: Path, profile: Profile) -> None:
        super().__init__(directory)
        c = self.config
        self.profile, self.layers = profile, c["num_hidden_layers"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.D = c["hidden_size"] // self.heads
        self.held: list[list[list[int]]] = []  # [layer][key/value head] positions
        self.cache: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []  # [layer] keys, values by position
        self.stands_in: list[int | None] = []  # [layer] position of the token whose slot is the stand-in's

    def logits_after(self, prompt: list[int], continuation: list[int]) -> Tensor:
        """Scores after the prompt and after each token of the continuation.  [1 + T, vocab_size]"""
        computed = self.profile.computed(len(prompt), self.layers)
        counts = self.profile.held(len(prompt), self.layers)
        repeated = self.say_again(prompt)
        guesses: Guesses = {}
        positions, x = list(range(len(prompt))), self.tensors["model.embed_tokens.weight"][prompt]
        received = found = x  # of the layer before: what it received, and what attention found
        for i in range(self.layers):
            if computed[i] < len(positions):  # what the layer before has passed on
                first = min(self.profile.sinks, computed[i] - 1)
                newest = len(positions) - (computed[i] - first)
                stay = [*range(first), *range(newest, len(positions))]
                left = [j for j in range(len(positions)) if j not in stay]
                if self.profile.guesses is not None and i == self.layers - len(self.profile.guesses):
                    more = [max(0, b - a) for a, b in zip(computed, counts, strict=True)]
                    guesses = self.guess(left, positions, (received, found), more)
                positions, x = [positions[j] for j in stay], x[stay]
            q, k, v = self.project(i, x, positions)
            guessed = guesses.get(i, {})
            known = [torch.stack([kv[n] for kv in guessed.values()]) for n in (0, 1)] if guessed else []
            all_k, all_v = (
                (torch.cat(pair) for pair in zip(known, (k, v), strict=True)) if guessed else (k, v)
            )
            out, probs = self.attend(q, all_k, all_v, positions, [*guessed, *positions])
            probs = probs[..., len(guessed) :]
            scores = []
            for g in range(self.kv_heads):
                of_head = self.score(i, g, probs, k[:, g], v[:, g])
                scores.append(of_head | {"repeat": repeated[i][g, positions].tolist()})
            stands = self.profile.level(self.profile.share).stand_ins is not None
            own = min(counts[i], len(positions))
            stands = stands and max(1, self.profile.fewest) < own and counts[i] < len(prompt)
            place = min(self.profile.sinks, len(positions) - 2) if stands else None
            self.stands_in.append(None if place is None else positions[place])
            chosen = [self.choose(i, s, own, place) for s in scores]
            self.held.append([sorted([*guessed, *(positions[j] for j in of_head)]) for of_head in chosen])
            keys, values = ({p: kv[n] for p, kv in guessed.items()} for n in (0, 1))
            keys |= dict(zip(positions, k, strict=True))
            values |= dict(zip(positions, v, strict=True))
            self.cache.append((keys, values))
            received, found = x, out
            x = self.after_attention(i, x, out)
        rows = [self.head(x[-1])]
        for t, token in enumerate(continuation):
            rows.append(self.read(token, len(prompt) + t, len(prompt)))
        return torch.stack(rows)

    def guess(
        self, left: list[int], positions: list[int], left_with: tuple[Tensor, Tensor], more: list[int]
    ) -> Guesses:
        """In every layer that holds more than it computes, the newest of what leaves."""
        behind, (x, found) = self.profile.guesses, left_with
        assert behind is not None
        guesses: Guesses = {}
        for i in range(self.layers - len(behind), self.layers):
            guesses[i] = {}
            for j in left[len(left) - more[i] :]:
                scale = 1 / (x[j].square().mean() + 1e-6).sqrt()
                known = torch.cat((x[j] * scale, found[j], torch.ones(1)))
                key, value = (known @ behind[i - self.layers]).view(2, self.kv_heads, self.D)
                guesses[i][positions[j]] = self.turn(key[None], [positions[j]])[0], value
        return guesses

    def read(self, token: int, position: int, prompt_tokens: int) -> Tensor:
        """One token after the prompt: every head attends to what it holds and to all that was read since."""
        x = self.tensors["model.embed_tokens.weight"][[token]]
        for i in range(self.layers):
            q, new_key, new_value = self.project(i, x, [position])
            keys, values = self.cache[i]
            keys[position], values[position] = new_key[0], new_value[0]
            out = []
            for h in range(self.heads):
                g = h * self.kv_heads // self.heads
                seen = self.held[i][g] + list(range(prompt_tokens, position + 1))
                k, v = torch.stack([keys[s][g] for s in seen]), torch.stack([values[s][g] for s in seen])
                stand_ins = self.profile.level(self.profile.share).stand_ins
                if stand_ins is not None and self.stands_in[i] is not None:
                    slot = seen.index(self.stands_in[i])
                    k[slot] = self.turn(stand_ins[i, g, 0][None, None], [prompt_tokens - 1])[0, 0]
                    v[slot] = stand_ins[i, g, 1]
                out.append((k @ q[0, h] / math.sqrt(self.D)).softmax(0) @ v)
            x = self.after_attention(i, x, torch.cat(out)[None])
        return self.head(x[-1])

    def say_again(self, prompt: list[int]) -> list[Tensor]:
        """Per layer, how much each prompt token is looked at by the prompt said again.  [K, N]"""
        N, ids = len(prompt), prompt + prompt
        x, found = self.tensors["model.embed_tokens.weight"][ids], []
        for i in range(self.layers):
            q, k, v = self.project(i, x, list(range(2 * N)))
            out, probs = self.attend(q, k, v, list(range(2 * N)), list(range(2 * N)))
            group = self.heads // self.kv_heads
            most = [
                probs[g * group : (g + 1) * group, N:, :N].amax((0, 1)) * v[:N, g].norm(dim=-1)
                for g in range(self.kv_heads)
            ]
            found.append(torch.stack(most))
            x = self.after_attention(i, x, out)
        return found

    def score(self, i: int, g: int, probs: Tensor, k: Tensor, v: Tensor) -> dict[str, list[float]]:
        """Every score of a head's tokens that needs no second pass, by name."""
        group, T = self.heads // self.kv_heads, len(k)
        looked = probs[g * group : (g + 1) * group, max(0, T - VOTERS) :].sum((0, 1))
        directions = [key / key.norm() for key in k]
        mean = sum(directions) / T
        usual = [float(d @ mean / mean.norm()) for d in directions]
        line = self.profile.lines[i, g] if self.profile.lines is not None else torch.zeros(2 * self.D + 4)
        fitted = []
        for j in range(T):
            known = torch.cat((k[j], v[j], torch.tensor([k[j].norm(), v[j].norm(), usual[j], 1.0])))
            fitted.append(float(known @ line))
        return {
            "newest": [float(j) for j in range(T)],
            "votes": looked.tolist(),
            "keydiff": [-u for u in usual],
            "fitted": fitted,
        }

    def choose(self, i: int, scores: dict[str, list[float]], count: int, place: int | None) -> list[int]:
        """Places of what is held: the token whose slot is a stand-in's, the newest, the sinks, then by the
        layer's score or scores.
        """
        level = self.profile.level(self.profile.share)
        T = len(scores["newest"])
        chosen = [] if place is None else [place]
        newest = min(count - len(chosen), max(4, int(level.newest[i] * count)))
        always = len(chosen) + newest + self.profile.sinks
        chosen += [j for j in range(T - newest, T)[::-1] if j not in chosen]
        chosen += [j for j in range(min(self.profile.sinks, T)) if j not in chosen]
        chosen = chosen[:count]
        by, *other = level.scores[i].split("+")
        half = (count + min(count, always)) // 2 if other else count
        for name, most in ((by, half), *((o, count) for o in other)):
            ranked = sorted(range(T), key=lambda j: (-scores[name][j], j))
            chosen += [j for j in ranked if j not in chosen][: max(0, most - len(chosen))]
        return chosen

    # --- the layers ---

    def project(self, i: int, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        w, p = self.tensors, f"model.layers.{i}."
        h = self.norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).view(len(x), -1, self.D) for n in "qkv")
        return self.turn(q, positions), self.turn(k, positions), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, asking: list[int], asked: list[int]
    ) -> tuple[Tensor, Tensor]:
        keys, values = (x.repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.mT / math.sqrt(self.D)  # [H, T, n]
        unseen = torch.tensor(asked)[None] > torch.tensor(asking)[:, None]
        probs = scores.masked_fill(unseen, -math.inf).softmax(-1)
        return (probs @ values).transpose(0, 1).flatten(1), probs

    def after_attention(self, i: int, x: Tensor, out: Tensor) -> Tensor:
        w, p = self.tensors, f"model.layers.{i}."
        x = x + out @ w[p + "self_attn.o_proj.weight"].T
        h = self.norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        return (
            x
            + (gate * gate.sigmoid() * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        )

    def head(self, x: Tensor) -> Tensor:
        w = self.tensors
        return (
            self.norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
        )

    def turn(self, x: Tensor, positions: list[int]) -> Tensor:
        D = x.shape[-1]
        theta = self.config["rope_theta"] ** (-torch.arange(0, D, 2).double() / D)
        angles = torch.outer(torch.tensor(positions).double(), theta)
        pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
        pairs = pairs * torch.polar(torch.ones(()).double(), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), -1).float()
