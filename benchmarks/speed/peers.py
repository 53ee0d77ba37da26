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
        short: workloads of the short form that it takes part in, apart by spaces.
        settings: environment variables of its process.
    """

    name: str
    kind: str
    adapter: str
    environment: str = ""
    variant: str = ""
    short: str = ""
    settings: tuple[tuple[str, str], ...] = ()


ALL = "W1 W2 W3 W4 W5"
_ON_TORCH, _ON_JAX = (("KERAS_BACKEND", "torch"),), (("KERAS_BACKEND", "jax"),)

#: In the short form all but the bare ones run on W1, where they differ most. On the others, where starting a process takes
#: longer than timing it, those trainers run that were fastest there when all of them did (LOG.md, 2026-11-30).
PEERS = {
    p.name: p
    for p in (
        Peer("by hand", "hand", "raw", short=ALL),
        Peer("by hand, torch.compile", "hand", "raw", variant="compile"),
        Peer("by hand, bf16 and channels last", "hand", "raw", variant="tuned", short=ALL),
        Peer("jax.jit and optax", "hand", "jax", "jax", short="W1"),
        Peer("thalweg, eager", "ours", "thalweg", short=ALL),
        Peer("thalweg, auto", "ours", "thalweg", variant="auto", short=ALL),
        Peer("Lightning", "trainer", "lightning", "lightning", short="W1 W2 W5"),
        Peer("Lightning, bare", "trainer", "lightning", "lightning", "bare"),
        Peer("Fabric", "trainer", "fabric", "lightning", short="W1 W4"),
        Peer("Accelerate", "trainer", "accelerate", "accelerate", short="W1 W4"),
        Peer("HF Trainer", "trainer", "hf", "hf", short="W1"),
        Peer("HF Trainer, bare", "trainer", "hf", "hf", "bare"),
        Peer("Keras on torch", "trainer", "keras", "keras", short="W1", settings=_ON_TORCH),
        Peer("Keras on JAX", "trainer", "keras", "jax", short="W1 W5", settings=_ON_JAX),
        Peer("Keras on JAX, bare", "trainer", "keras", "jax", "bare", settings=_ON_JAX),
        Peer("fastai", "trainer", "fastai", "fastai", short="W1"),
        Peer("fastai, bare", "trainer", "fastai", "fastai", "bare"),
        Peer("ignite", "trainer", "ignite", "ignite", short="W1 W2 W3"),
        Peer("ignite, bare", "trainer", "ignite", "ignite", "bare"),
        Peer("skorch", "trainer", "skorch", "skorch", short="W1 W2 W3"),
        Peer("skorch, bare", "trainer", "skorch", "skorch", "bare"),
        Peer("Composer", "trainer", "composer", "composer", short=ALL),
    )
}
