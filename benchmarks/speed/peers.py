"""Who runs: the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One row.

    Attributes:
        kind: "hand" for loops by hand, "ours", or "trainer" for what is compared with us.
        environment: which of ``environments.ENVIRONMENTS``; empty: the interpreter that runs the driver.
        variant: handed to the adapter.
        short: also part of the short form.
        settings: environment variables of its process.
    """

    name: str
    kind: str
    adapter: str
    environment: str = ""
    variant: str = ""
    short: bool = True
    settings: tuple[tuple[str, str], ...] = ()


_ON_TORCH, _ON_JAX = (("KERAS_BACKEND", "torch"),), (("KERAS_BACKEND", "jax"),)

PEERS = {
    p.name: p
    for p in (
        Peer("by hand", "hand", "raw"),
        Peer("by hand, torch.compile", "hand", "raw", variant="compile", short=False),
        Peer("by hand, bf16 and channels last", "hand", "raw", variant="tuned"),
        Peer("jax.jit and optax", "hand", "jax", "jax"),
        Peer("thalweg, eager", "ours", "thalweg"),
        Peer("thalweg, auto", "ours", "thalweg", variant="auto"),
        Peer("Lightning", "trainer", "lightning", "lightning"),
        Peer("Lightning, bare", "trainer", "lightning", "lightning", "bare", short=False),
        Peer("Fabric", "trainer", "fabric", "lightning"),
        Peer("Accelerate", "trainer", "accelerate", "accelerate"),
        Peer("HF Trainer", "trainer", "hf", "hf"),
        Peer("HF Trainer, bare", "trainer", "hf", "hf", "bare", short=False),
        Peer("Keras on torch", "trainer", "keras", "keras", settings=_ON_TORCH),
        Peer("Keras on JAX", "trainer", "keras", "jax", settings=_ON_JAX),
        Peer("Keras on JAX, bare", "trainer", "keras", "jax", "bare", short=False, settings=_ON_JAX),
        Peer("fastai", "trainer", "fastai", "fastai"),
        Peer("fastai, bare", "trainer", "fastai", "fastai", "bare", short=False),
        Peer("ignite", "trainer", "ignite", "ignite"),
        Peer("ignite, bare", "trainer", "ignite", "ignite", "bare", short=False),
        Peer("skorch", "trainer", "skorch", "skorch"),
        Peer("skorch, bare", "trainer", "skorch", "skorch", "bare", short=False),
        Peer("Composer", "trainer", "composer", "composer"),
    )
}
