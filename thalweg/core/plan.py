"""A Plan is the recipe with every gap filled: values, the reason for each, sizes in bytes, the machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from thalweg.core.fits import misfit
from thalweg.core.ledger import Ledger
from thalweg.core.recipe import Recipe

#: The reason of a row whose rule is the recipe's own: nothing to tell.
RECIPES_RULE = "the recipe's rule"


@dataclass(frozen=True)
class Decision:
    """One value that the user did not give, and why it is what it is."""

    path: str
    value: Any
    reason: str


@dataclass(frozen=True)
class ParameterRow:
    """One parameter as the optimizer will treat it.

    Attributes:
        decays, decay_reason: whether it decays, and what decided that.
        rule, rule_reason: the update rule that takes it, and what decided that.
        lr: factor on the scheduled learning rate.
        weight_decay: strength, where it decays.
        options: the rule's, where they are not its defaults.
        fold: how more than two dimensions become matrices: "batch" (the last two are one) or "flatten" (the first
            against the others).
        moves: what a schedule moves for it ("lr", "weight_decay", an option), and the name of that schedule.
        thaws: updates before it begins to train (``optimizer.unfreeze``).
    """

    name: str
    shape: tuple[int, ...]
    decays: bool
    decay_reason: str
    rule: str = "adamw"
    rule_reason: str = ""
    lr: float = 1.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    fold: str = "batch"
    moves: dict[str, str] = field(default_factory=dict)
    thaws: int = 0


@dataclass(frozen=True)
class Plan:
    """All that is decided before step 1.

    Attributes:
        task: the task's name.
        recipe: complete; no field is left open.
        decisions: where each filled value came from.
        steps: optimizer updates to attempt.
        samples: training samples in an epoch; 0 where a stream does not say.
        loss_divisor: a power of two near the weight of one window; sums of losses are divided by it before the backward
            pass, so that gradients keep the scale of a mean (half precision needs that).
        parameters: the table of parameters.
        unit: what a weight of 1 is, such as "tokens".
        sizes: bytes by purpose.
        machine: what the run is on.
        per_step: what a whole batch takes of each unit that schedules count in: "examples", "tokens", "epochs".
        why_not: for a unit that is not known, why.
        sequence: tokens of a whole sequence; 0 where the data has none.
        image: height and width of the data's images; empty where it has none.
        changes: what was changed in the model, such as layers of dropout that were put in, a line each.
        ledger: what training takes in memory, predicted; None where nothing predicted it.
        layout: how the ranks that made this plan stand, as ``Layout`` has it; empty for one.
    """

    task: str
    recipe: Recipe
    decisions: tuple[Decision, ...]
    steps: int
    samples: int
    loss_divisor: float
    parameters: tuple[ParameterRow, ...]
    unit: str
    sizes: dict[str, int]
    machine: dict[str, Any]
    per_step: dict[str, float] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)
    sequence: int = 0
    image: tuple[int, ...] = ()
    changes: tuple[str, ...] = ()
    ledger: Ledger | None = None
    layout: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        tree = {
            "task": self.task,
            "recipe": self.recipe.to_dict(),
            "decisions": [vars(d) for d in self.decisions],
            "steps": self.steps,
            "samples": self.samples,
            "loss_divisor": self.loss_divisor,
            "parameters": [vars(p) for p in self.parameters],
            "unit": self.unit,
            "sizes": self.sizes,
            "machine": self.machine,
            "per_step": self.per_step,
            "why_not": self.why_not,
            "sequence": self.sequence,
            "image": self.image,
            "changes": list(self.changes),
            "ledger": None if self.ledger is None else self.ledger.to_dict(),
            "layout": self.layout,
        }
        return json.dumps(tree, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """
        Raises:
            ThalwegError, ValueError, KeyError, TypeError, AttributeError, RecursionError: for what ``to_json`` never wrote.
        """
        tree = json.loads(text)
        plan = cls(
            task=tree["task"],
            recipe=Recipe.from_dict(tree["recipe"]),
            decisions=tuple(Decision(**d) for d in tree["decisions"]),
            steps=tree["steps"],
            samples=tree["samples"],
            loss_divisor=tree["loss_divisor"],
            parameters=tuple(ParameterRow(**{**p, "shape": tuple(p["shape"])}) for p in tree["parameters"]),
            unit=tree["unit"],
            sizes=tree["sizes"],
            machine=tree["machine"],
            per_step=tree.get("per_step", {}),
            why_not=tree.get("why_not", {}),
            sequence=tree.get("sequence", 0),
            image=tuple(tree.get("image", ())),
            changes=tuple(tree.get("changes", ())),
            ledger=Ledger.from_dict(tree["ledger"]) if tree.get("ledger") else None,
            layout=tree.get("layout", {}),
        )
        if text := misfit(plan, cls, "plan"):
            raise TypeError(text)
        return plan
