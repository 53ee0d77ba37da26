"""The rules as ``torch.optim.Optimizer``, and the schedules as ``LRScheduler``, for anyone's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.core import ModelError
from thalweg.optim.lower import Update, lower
from thalweg.rules import RULES
from thalweg.schedules import Schedule, parse


class RuleOptimizer(torch.optim.Optimizer):
    """Runs a registered rule on parameters where they lie.

    Args:
        params: parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or 0-dim tensor; None: the rule's published default.
        weight_decay: strength of decay; torch's convention: every parameter of the group decays.
        decay_form: "decoupled", "coupled", or None: the rule's own.
        fused: True or False to force a way of running; None chooses.
        options: the rule's own, such as ``b1``; ``betas=(b1, b2)`` is understood too.

    Raises:
        RecipeError: for an option that the rule does not have.
    """

    rule_name = "adamw"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        weight_decay: float = 0.0,
        decay_form: str | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        self.rule = RULES[self.rule_name]
        if "betas" in options:
            options["b1"], options["b2"] = options.pop("betas")
        defaults = {
            "lr": self.rule.lr if lr is None else lr,
            "weight_decay": weight_decay,
            "decay_form": decay_form or self.rule.decay_form,
            "fused": fused,
            **self.rule.options(options),
        }
        self._updates: dict[tuple[Any, ...], Update] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rule, self._updates = RULES[self.rule_name], {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                raise ModelError(
                    f"{type(self).__name__} does not train complex parameters.",
                    f"A parameter of shape {tuple(p.shape)} is {p.dtype}.",
                    "Train torch.view_as_real(p) instead.",
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; each counts its own updates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {name: group[name] for name in self.rule.defaults}
            slot_names = self.rule.slots_for(options)
            batches: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self._start_state(p, slot_names)
                    batches.setdefault((p.dtype, p.device.type), []).append(p)
            for (dtype, device), ps in batches.items():
                update = self._update_for(group, options, dtype, device)
                gs = [p.grad for p in ps if p.grad is not None]
                slots = [[self.state[p][name] for p in ps] for name in slot_names]
                ts = [self.state[p]["step"] for p in ps]
                torch._foreach_add_(ts, 1)
                update.run(ps, gs, slots, ts, group["lr"], None, None)
        return loss

    def _start_state(self, p: Tensor, slot_names: tuple[str, ...]) -> None:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise ModelError(
                f"{type(self).__name__} does not take sparse gradients.",
                f"A parameter of shape {tuple(p.shape)} has one.",
                "Build the embedding with sparse=False.",
            )
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in slot_names:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _update_for(self, group: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, device: str) -> Update:
        key = (*options.values(), group["weight_decay"], group["decay_form"], group["fused"], dtype, device)
        if key not in self._updates:
            self._updates[key] = lower(
                self.rule,
                options,
                weight_decay=group["weight_decay"],
                decay_form=group["decay_form"],
                dtype=dtype,
                device=device,
                fused=group["fused"],
            )
        return self._updates[key]


class SGD(RuleOptimizer):
    """Stochastic gradient descent with momentum or Nesterov's form; ``thalweg.rules.sgd`` has the maths."""

    rule_name = "sgd"


class Adam(RuleOptimizer):
    """Adam, weight decay coupled (L2) by default; ``thalweg.rules.adam`` has the maths."""

    rule_name = "adam"


class AdamW(RuleOptimizer):
    """Adam with decoupled weight decay; ``thalweg.rules.adam`` has the maths."""

    rule_name = "adamw"


def scheduler(optimizer: torch.optim.Optimizer, schedule: str | Schedule, steps: int) -> Any:
    """Any schedule of ours as torch's ``LambdaLR``, to be stepped after each update of ``steps``.

    Args:
        schedule: in the schedule language, or an object of it.
        steps: updates of the whole run.
    """
    shape = parse(schedule)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: shape.at(update, steps))
