"""The anchor of the recipe characters: nanoGPT's model and loop, with the numbers that its page gives for a CPU.

From the facts of github.com/karpathy/nanoGPT (README on training without a GPU; train.py; config/train_shakespeare_char.py): 4
layers, 4 heads, width 128, windows of 64, batch 12, no dropout, 2,000 steps; AdamW at 1e-3, warm-up over 100 steps, a cosine
to 1e-4, betas 0.9 and 0.99, decay 0.1 of matrices, clipping to norm 1; windows at random places; its own estimate of both
losses from 20 batches each every 250 steps. More than it has itself: the fused AdamW, which is faster on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
WARMUP, PEAK, LEAST = 100, 1e-3, 1e-4
ESTIMATE_EVERY, ESTIMATE_BATCHES = 250, 20
FORMS = ("eager", "bf16", "compiled", "bf16 compiled")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.shape
        split = [
            part.view(batch, time_, HEADS, width // HEADS).transpose(1, 2)
            for part in self.attention(self.ln_1(x)).split(WIDTH, dim=2)
        ]
        y = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).contiguous().view(batch, time_, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Its head is the table of its tokens."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.ln = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("projection.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return F.linear(self.ln(self.layers(x)), self.tokens.weight)


def rate(step: int) -> float:
    """The rate of step ``step``, from 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return LEAST + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (PEAK - LEAST)


@dataclass
class Trained:
    """A run of the anchor.

    Attributes:
        training: seconds in steps alone. wall: with its own estimates, and compiling.
        curve: (step, training seconds, exact loss); the exact evaluations are in neither clock.
        seen: loss of each step.
    """

    form: str
    training: float = 0.0
    wall: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)


def train(
    text: Tensor, held_out: Tensor, exact: Callable[[nn.Module], float], form: str, seed: int = 1337, until: int = STEPS
) -> Trained:
    """Train it.

    Args:
        text, held_out: tokens. exact: the loss over all of the held-out text.
        form: of ``FORMS``.
        until: stop after so many of its steps, to time them; then nothing is evaluated.
    """
    torch.manual_seed(seed)
    model = NanoGPT(int(text.max()) + 1)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)
    run: Any = torch.compile(model) if "compiled" in form else model
    half = "bf16" in form
    inside = torch.arange(CONTEXT)

    def loss_of(tokens: Tensor) -> Tensor:
        places = torch.randint(len(tokens) - CONTEXT, (BATCH,))[:, None] + inside
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            logits = run(tokens[places].long())
            return F.cross_entropy(logits.flatten(0, 1), tokens[places + 1].long().flatten())

    told = Trained(form)
    for step in range(until):
        if step % ESTIMATE_EVERY == 0 and until == STEPS:
            begun = time.perf_counter()
            with torch.no_grad():
                for tokens in (text, held_out):
                    torch.stack([loss_of(tokens) for _ in range(ESTIMATE_BATCHES)]).mean().item()
            told.wall += time.perf_counter() - begun
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(text)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told.seen.append(loss.item())
        spent = time.perf_counter() - begun
        told.training, told.wall = told.training + spent, told.wall + spent
        if (step + 1) % ESTIMATE_EVERY == 0 and until == STEPS:
            told.curve.append((step + 1, told.training, exact(model)))
    return told
