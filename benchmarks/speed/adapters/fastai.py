"""fastai's Learner; ``bare`` without bar and table. Its bf16 knows CUDA alone, so autocast stands around the net."""

from __future__ import annotations

import contextlib
from functools import partial

from fastai.basics import DataLoaders, Learner, OptimWrapper
from fastai.callback.all import GradientAccumulation, GradientClip, ProgressCallback, SaveModelCallback

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, LR, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    callbacks = [GradientClip(CLIP)]
    if w.accumulate > 1:
        callbacks.append(GradientAccumulation(w.batch * w.accumulate))
    if variant != "bare":  # a notebook's user has the first of the two without asking
        callbacks += [ProgressCallback(), SaveModelCallback(monitor="train_loss", every_epoch=True)]
    net = nets.wrapped(w)
    data = DataLoaders(nets.loader(feed, nets.Counted), [])
    wrap = partial(OptimWrapper, opt=lambda params, **_: nets.optimizer(params, feed))
    learner = Learner(data, net, loss_func=nets.loss_of, lr=LR, wd_bn_bias=True, cbs=callbacks, opt_func=wrap)
    with contextlib.ExitStack() as quiet:
        if variant == "bare":
            quiet.enter_context(learner.no_bar())
            quiet.enter_context(learner.no_logging())
        learner.fit(1)
    return nets.final_loss(net, w)
