"""A Ledger says what training takes on one device, in bytes by purpose, before it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModuleBytes:
    """What one module's forward pass keeps for the backward pass, its inner modules included.

    Attributes:
        name: as in ``named_modules``; "" is what belongs to none, such as the loss.
        kept: bytes of activations.
    """

    name: str
    kept: int


@dataclass(frozen=True)
class Ledger:
    """Bytes of training state, of one step's passes, and of both at their worst.

    Attributes:
        parameters, gradients, slots, averages, buffers: what lies there for the whole run; ``data``: of it, training data
            on the device.
        activations: kept for the backward pass when the forward pass of a micro-batch is over.
        modules: of which, by module, the largest first.
        temporary: what else there is at the peak.
        peak: the most there is at once in a step: of the tensors, and of ``process``.
        peak_at: where in the step that is, for people.
        process: what the process holds besides: on a CPU the interpreter and its libraries, on a GPU the context.
        micro_batch: samples of one pass.
        recompute: as in the recipe.
        flops: floating-point operations of one sample's products, forward and backward; 0 where nothing counted them.
        gathered: parts of other ranks that are whole here for a while, at most; 0 where nothing lies in parts.
    """

    parameters: int
    gradients: int
    slots: int
    averages: int
    buffers: int
    data: int
    activations: int
    modules: tuple[ModuleBytes, ...]
    temporary: int
    peak: int
    peak_at: str
    process: int
    micro_batch: int
    recompute: str
    flops: float = 0.0
    gathered: int = 0

    @property
    def state(self) -> int:
        """What lies there for the whole run."""
        return self.parameters + self.gradients + self.slots + self.averages + self.buffers + self.data

    def rows(self) -> list[tuple[str, int]]:
        """(purpose, bytes), for a table; they add up to ``peak``."""
        return [
            *((name, getattr(self, name)) for name in STATE),
            ("activations", self.activations),
            ("temporary", self.temporary),
            ("gathered", self.gathered),
            ("process", self.process),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Ledger:
        modules = tuple(ModuleBytes(**one) for one in tree["modules"])
        known = {
            f.name: tree[f.name] for f in fields(cls) if f.name != "modules" and f.name in tree
        }  # old plans lack some
        return cls(**known, modules=modules)


STATE = ("parameters", "gradients", "slots", "averages", "buffers", "data")


@dataclass(frozen=True)
class Change:
    """Something that would make training smaller.

    Attributes:
        what: as one would give it: "train.micro_batch=16".
        peak: bytes then.
        price: factor on the time of a step; None where it is not known.
        fits: whether it alone makes it fit.
        note: what else it changes, if anything.
    """

    what: str
    peak: int
    price: float | None
    fits: bool
    note: str = ""


@dataclass(frozen=True)
class Form:
    """One way in which ranks could share the model.

    Attributes:
        name: "ddp", "fsdp", "hsdp (data=8, shard=8)", "fsdp, recompute=blocks".
        ledger: bytes on the rank that has most.
        seconds: of a step; None where it is not known.
        fits: whether each rank has so much.
        chosen: whether it is the plan's.
    """

    name: str
    ledger: Ledger
    seconds: float | None
    fits: bool
    chosen: bool


@dataclass(frozen=True)
class Forecast:
    """What ``thalweg plan`` has to say.

    Attributes:
        task: its name.
        machine: the device, for people.
        devices: how many of them; ``sharded``: whether parameters, gradients and slots are spread over them.
        ledger: bytes on each device.
        memory: bytes that training may take there.
        batch: samples of a step, over all devices; ``steps``: of the run.
        largest: samples of the largest micro-batch that fits on each; 0: none.
        seconds: of a step; None where it is not known. ``timed``: how it is known.
        decisions: (path, value, reason) of what was filled in.
        changes: what would make it smaller, the cheapest first.
        forms: how several devices could share the model, the simplest first.
    """

    task: str
    machine: str
    devices: int
    sharded: bool
    ledger: Ledger
    memory: int
    batch: int
    steps: int
    largest: int
    seconds: float | None
    timed: str
    decisions: tuple[tuple[str, Any, str], ...] = ()
    changes: tuple[Change, ...] = ()
    forms: tuple[Form, ...] = ()

    @property
    def fits(self) -> bool:
        return self.ledger.peak <= self.memory
