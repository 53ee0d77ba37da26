"""The nets in torch, and what the torch adapters share: loss, optimizer, loaders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import (
    CONTEXT,
    DECAY,
    HEADS,
    LAYERS,
    LR,
    RESIDUAL,
    SEED,
    VOCAB,
    WIDTH,
    Workload,
    batches,
)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        size, time, _ = x.shape  # B batch, T time, H heads
        q, k, v = self.qkv(self.norm1(x)).view(size, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        for table in (self.token, self.place, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(x) + self.place.weight)))


def convolved(num_in: int, num_out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(num_in, num_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = convolved(1, 32), convolved(32, 64), convolved(64, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = F.max_pool2d(F.relu(self.two(x)), 2)
        return self.head(F.relu(self.three(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = convolved(num_in, num_out, 3, stride), convolved(num_out, num_out)
        self.past = convolved(num_in, num_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.past(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = convolved(3, 32), nn.Sequential(*(Residual(*b) for b in RESIDUAL))
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": Cnn, "gpt": Gpt, "resnet": ResNet}


def net(w: Workload) -> nn.Module:
    torch.manual_seed(SEED)
    return NETS[w.net]().train()


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def optimizer(params: Iterable[nn.Parameter], feed: Feed, fused: bool = True) -> torch.optim.AdamW:
    """AdamW, fused as torch's documentation advises; it tells the feed of its first update, and then no more."""
    made = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=fused)

    def told(*_: Any) -> None:
        feed.first_update()
        hook.remove()

    hook = made.register_step_post_hook(told)
    return made


def around(w: Workload) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if w.bf16 else contextlib.nullcontext()


class Autocast(nn.Module):
    """For frameworks that know no bf16 on a CPU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


def wrapped(w: Workload) -> nn.Module:
    return Autocast(net(w)) if w.bf16 else net(w)


class Data(IterableDataset[Any]):
    """The feed as a torch data set of ready batches, several put together where ``join`` says so."""

    def __init__(self, feed: Feed, join: int = 1) -> None:
        self.feed, self.join = feed, join
        feed.items = as_tensors(feed)

    def __iter__(self) -> Any:
        one = iter(self.feed)
        return one if self.join == 1 else (tuple(map(torch.cat, zip(*group))) for group in zip(*[one] * self.join))


class Counted(Data):
    """With a length, for frameworks that want one."""

    def __len__(self) -> int:
        return self.feed.limit * self.feed.w.accumulate // self.join


def as_tensors(feed: Feed) -> list[Any]:
    return [tuple(map(torch.as_tensor, item)) for item in feed.items]


def as_it_is(batch: Any) -> Any:
    return batch


def loader(
    feed: Feed, kind: type[Data] = Data, form: Callable[[Any], Any] = as_it_is, join: int = 1
) -> DataLoader[Any]:
    """Batches are ready, so that there is nothing to collate and nothing for worker processes to do."""
    return DataLoader(kind(feed, join), batch_size=None, collate_fn=form)


@torch.no_grad()
def final_loss(model: nn.Module, w: Workload) -> float:
    """Of the first batch, in training mode: what all frameworks must agree on."""
    x, y = map(torch.as_tensor, batches(w)[0])
    with around(w):
        return float(loss_of(model.train()(x).float(), y))


def write_weights(folder: str) -> None:
    """The first weights of each net as ``folder/NET.npz``, by torch's names."""
    import numpy as np

    torch.manual_seed(SEED)
    for name, make in NETS.items():
        torch.manual_seed(SEED)
        np.savez(f"{folder}/{name}.npz", **{k: v.numpy() for k, v in make().state_dict().items()})
