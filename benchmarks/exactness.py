"""How far apart are one step over one big batch and the same step over micro-batches?

Float64, a GPT on padded text of varying length, clipping on; and the running statistics of batch normalization against pooled
statistics computed independently. For comparison: what a mean of means gives.

    python -m benchmarks.exactness
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.keep import keep
from tests.models import IGNORED, make_step, ragged_text, small_gpt, text_loss
from tests.test_batchnorm import net, pooled_by_hand
from tests.test_step import SPLITS, cut
from thalweg.regularize import PooledStatistics


def update_of(model: torch.nn.Module, parts: list[Any], whole: Any, rule: str) -> torch.Tensor:
    changes = {"train.batch": 64, "train.clip": 0.05, "optimizer.rule": rule, "optimizer.weight_decay": 0.1}
    if rule == "adamw":
        changes["optimizer.options.eps"] = 1e-3
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    step, _ = make_step(model, text_loss, whole, **changes)
    step.run(parts)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def mean_of_means(model: torch.nn.Module, parts: list[Any]) -> torch.Tensor:
    """The gradient that dividing each micro-batch's mean by the number of micro-batches gives."""
    for part in parts:
        logits = model(part["tokens"]).flatten(0, 1)
        (F.cross_entropy(logits, part["targets"].flatten(), ignore_index=IGNORED) / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main(arguments: list[str] | None = None) -> None:
    torch.manual_seed(0)
    model, data, rows = small_gpt().double(), ragged_text(), []
    exact = mean_of_means(copy.deepcopy(model), [data])
    for rule in ("adamw", "sgd"):
        whole = update_of(copy.deepcopy(model), [data], data, rule)
        for name, sizes in SPLITS.items():
            parts = cut(data, sizes)
            after = update_of(copy.deepcopy(model), parts, data, rule)
            naive = mean_of_means(copy.deepcopy(model), parts)
            rows.append(
                {
                    "rule": rule,
                    "split": name,
                    "relative difference of the update": float((after - whole).abs().max() / whole.abs().max()),
                    "gradient error of a mean of means": float((naive - exact).norm() / exact.norm()),
                }
            )
    for sizes in ([64], [16] * 4, [4] * 16, [2, 30, 2, 16, 14]):
        bn = net()
        parts = [torch.randn(n, 6, dtype=torch.float64) * 3 + 10 for n in sizes]
        wanted = pooled_by_hand(bn, parts)
        pool = PooledStatistics(bn, torch.float64)
        bn.train()
        pool.begin()
        for place, part in enumerate(parts):
            bn(part)
            pool.collect(last=place == len(parts) - 1)
        pool.end(torch.tensor(True))
        errors = [
            max(
                float((layer.running_mean - 0.1 * mean).abs().max() / mean.abs().max()),
                float((layer.running_var - 0.9 - 0.1 * var).abs().max() / var.abs().max()),
            )
            for layer, (mean, var) in zip((bn[1], bn[4]), wanted)
        ]
        rows.append({"batch normalization": str(sizes), "relative error of the running statistics": max(errors)})
    for row in rows:
        print(row)
    print(keep("exactness", rows, "python -m benchmarks.exactness"))


if __name__ == "__main__":
    main()
