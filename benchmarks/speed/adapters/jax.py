"""A hand-written loop of JAX: forward, backward, clipping and optax's AdamW as one jax.jit, its state donated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.speed import nets_jax
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, DECAY, LR, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    forward, dtype = nets_jax.NETS[w.net], jnp.bfloat16 if w.bf16 else jnp.float32
    params, running = nets_jax.weights(w)
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY))
    if w.accumulate > 1:
        rule = optax.MultiSteps(rule, w.accumulate)
    slots = rule.init(params)

    def loss_of(params, running, x, y):
        done = nets_jax.Pass(params, running, dtype)
        out = forward(done, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), done.running

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, running, slots, x, y):
        (loss, running), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, running, x, y)
        changes, slots = rule.update(gradient, slots, params)
        return optax.apply_updates(params, changes), running, slots, loss

    feed.items = [(jnp.asarray(nets_jax.channels_last(x)), jnp.asarray(y)) for x, y in feed.items]
    feed.wait = lambda: jax.block_until_ready(params)
    for i, (x, y) in enumerate(feed, 1):
        params, running, slots, loss = update(params, running, slots, x, y)
        if i == w.accumulate:
            loss.block_until_ready()
            feed.first_update()
    return float(loss_of(params, running, *feed.items[0])[0])
