"""What our batch-normalization layers share: any number of dimensions, statistics that move once, mixing with torch's classes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import ModelError
from thalweg.regularize.moments import recomputing


class AnyBatchNorm(_BatchNorm):
    """Batch normalization of (batch, channels, ...) that a recomputation does not count again.

    Attributes:
        kind: torch's class, or another's, whose place it takes in a converted model.
        own_moments: the buffers take this rank's moments alone, because somebody else pools ranks.
    """

    kind: type[_BatchNorm] | None = None
    own_moments = False

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ModelError(
                f"{type(self).__name__} was given a tensor without channels.",
                f"Its shape is {tuple(input.shape)}.",
                "Give (batch, channels, ...).",
            )

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The batch normalised by itself, its mean and its unbiased variance; None where nothing is tracked."""
        mean = var = None
        if self._tracks():
            mean, var = self._zeros(), self._zeros()
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps), mean, var

    def _tracks(self) -> bool:
        return self.track_running_stats and self.running_mean is not None

    def _zeros(self) -> Tensor:
        assert self.running_mean is not None
        return self.running_mean.new_zeros(self.running_mean.shape)

    def _track(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Running statistics move towards those of a batch, but not in a recomputation."""
        if mean is None or var is None or recomputing():
            return
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        dtype = self.running_mean.dtype
        share: Any = self.momentum
        if share is None:
            share = self.num_batches_tracked.to(dtype).reciprocal()
        self.running_mean.lerp_(mean.to(dtype), share)
        self.running_var.lerp_(var.to(dtype), share)


class FrozenBatchNorm(AnyBatchNorm):
    """Normalises by its running statistics and keeps them, also after ``model.train()``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.training = False

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)  # what it may contain follows
        self.training = False
        return self


@lru_cache(maxsize=64)
def mixed(part: Any, kind: Any) -> Any:
    """The class that does what ``part``, one of ours, does and still is a ``kind``, such as BatchNorm2d; it can be pickled."""
    if kind is _BatchNorm:
        return part
    body = {
        "kind": kind,
        "_check_input_dim": kind._check_input_dim,
        "__reduce_ex__": lambda self, protocol: (_blank, (part, kind), dict(self.__dict__)),
        "__doc__": part.__doc__,
    }
    return type(part.__name__.removesuffix("BatchNorm") + kind.__name__, (part, kind), body)


def _blank(part: Any, kind: Any) -> Any:
    made = mixed(part, kind)
    return made.__new__(made)
