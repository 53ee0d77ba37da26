"""Keras's fit, on torch or on JAX by KERAS_BACKEND. ``bare`` prints nothing; else its bar, and a checkpoint every 500 updates."""

from __future__ import annotations

import keras

from benchmarks.speed import nets_keras
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, DECAY, LR, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    keras.utils.clear_session()
    keras.mixed_precision.set_global_policy("mixed_bfloat16" if w.bf16 else "float32")
    if not nets_keras.TORCH:
        import jax

        feed.items = [(x.transpose(0, 2, 3, 1).copy() if x.ndim == 4 else x, y) for x, y in feed.items]
        feed.wait = lambda: jax.block_until_ready(jax.live_arrays())
    x, y = feed.items[0]
    model = nets_keras.net(w, x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accumulate = w.accumulate if w.accumulate > 1 else None
    rule = keras.optimizers.AdamW(
        LR, weight_decay=DECAY, epsilon=1e-8, global_clipnorm=CLIP, gradient_accumulation_steps=accumulate
    )
    model.compile(rule, loss)  # jit_compile="auto", as documented: XLA on JAX, plain operators on torch
    told = lambda batch, logs=None: batch + 1 == w.accumulate and feed.first_update()
    callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=told)] if feed.updates else []
    if variant != "bare":
        callbacks.append(keras.callbacks.ModelCheckpoint("keras.weights.h5", save_weights_only=True, save_freq=500))
    model.fit(iter(feed), epochs=1, verbose=0 if variant == "bare" else "auto", callbacks=callbacks)
    out = keras.ops.cast(model(x, training=True), "float32")
    return float(loss(y, out))
