"""Schedules in both directions: ours as a torch ``LRScheduler`` in other loops, torch's by name in our recipes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from thalweg.core import RecipeError, did_you_mean
from thalweg.schedules import Schedule, parse

#: What a schedule multiplies; of all else it gives the value itself.
_FACTORS = ("lr", "weight_decay")
#: Torch's schedulers that are no function of the number of updates alone, and what there is instead.
_INSTEAD = {
    "ReduceLROnPlateau": "plateau(factor=0.1, patience=10)",
    "SequentialLR": "pieces in a row: warmup(100) >> cosine()",
    "ChainedScheduler": "a product: warmup(100) * cosine()",
    "LambdaLR": "a shape of your own: thalweg.schedules.shape",
    "MultiplicativeLR": "a shape of your own: thalweg.schedules.shape",
    "SWALR": "regularize.average_form = 'swa', and a schedule that ends in hold()",
}


class Scheduler(lr_scheduler.LRScheduler):
    """Our schedules in a loop of someone else's, over any hyper-parameter of any torch optimizer.

    Call ``step`` after each update, once. Values are a function of the count alone, so editing a group, adding one late or
    going on from ``last_epoch`` is safe; past the end the last value stays.

    Args:
        optimizer: any torch optimizer.
        schedules: a schedule of the rate, or {key of a parameter group: schedule}. "lr" and "weight_decay" are factors on
            what the group began with; all else ("momentum", "b1", "eps") is the value itself, from the group's own.
            "betas" are scheduled as "beta1" and "beta2".
        steps: updates of the whole run, 1 or more.
        last_epoch: updates done before, less 1, as in torch; -1: none.

    Raises:
        RecipeError: for a key that no group has, a schedule that listens to the run, or one longer than the run.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.95)
    >>> running = Scheduler(optimizer, {"lr": "warmup(2) >> linear()", "momentum": "warmup(2, start=0.85)"}, steps=4)
    >>> for _ in range(4):
    ...     print(round(optimizer.param_groups[0]["lr"], 3), round(optimizer.param_groups[0]["momentum"], 3))
    ...     optimizer.step()
    ...     running.step()
    0.05 0.9
    0.1 0.95
    0.05 0.95
    0.0 0.95
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedules: str | Schedule | Mapping[str, str | Schedule],
        steps: int,
        last_epoch: int = -1,
    ) -> None:
        named = schedules if isinstance(schedules, Mapping) else {"lr": schedules}
        self.schedules = {name: parse(schedule) for name, schedule in named.items()}
        self.steps = steps
        for name, schedule in self.schedules.items():
            if schedule.feedback:
                raise RecipeError(
                    f"The schedule of {name}, '{schedule}', listens to the run.",
                    "A torch scheduler is told nothing of it.",
                    "Use torch's ReduceLROnPlateau in this loop, or thalweg.train.",
                )
            for group in optimizer.param_groups:
                _where(group, name)
        for group in optimizer.param_groups:
            if last_epoch >= 0 and "initial_lr" not in group:
                raise RecipeError(
                    f"A scheduler that goes on from last_epoch={last_epoch} needs the rate that the run began with.",
                    "A parameter group has no 'initial_lr'.",
                    "Load the optimizer's state first; it holds it.",
                )
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rate of each group at the next update; a schedule of other things leaves it as it is."""
        groups = self.optimizer.param_groups
        if "lr" not in self.schedules:
            return [group["lr"] for group in groups]
        factor = self.schedules["lr"].at(max(self.last_epoch, 0), self.steps)
        return [float(group.setdefault("initial_lr", group["lr"])) * factor for group in groups]

    def step(self, epoch: int | None = None) -> None:
        """An update was made."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            for name, schedule in self.schedules.items():
                if name != "lr":
                    self._put(group, name, schedule)

    def _put(self, group: dict[str, Any], name: str, schedule: Schedule) -> None:
        key, place = _where(group, name)
        old = group[key] if place is None else group[key][place]
        base = float(group.setdefault(f"initial_{name}", old))
        at = max(self.last_epoch, 0)
        new = base * schedule.at(at, self.steps) if name in _FACTORS else schedule.at(at, self.steps, peak=base)
        if place is not None:
            group[key] = tuple(new if k == place else value for k, value in enumerate(group[key]))
        elif isinstance(old, Tensor):
            old.fill_(new)
        else:
            group[key] = new

    def state_dict(self) -> dict[str, Any]:
        """The count, and what it counts for: plain data."""
        told = {name: str(schedule) for name, schedule in self.schedules.items()}
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "steps": self.steps, "schedules": told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a count; the values are put into the groups at once.

        Raises:
            RecipeError: for the state of another schedule.
        """
        mine = self.state_dict()
        for name in ("schedules", "steps"):
            if state_dict.get(name) != mine[name]:
                raise RecipeError(
                    f"This state is of another schedule: its {name} differ.",
                    f"It has {state_dict.get(name)}, and this scheduler {mine[name]}.",
                    "Build the scheduler that it was saved from.",
                )
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        for group in self.optimizer.param_groups:
            for name, schedule in self.schedules.items():
                self._put(group, name, schedule)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]


def _where(group: Mapping[str, Any], name: str) -> tuple[str, int | None]:
    """The key of a group that holds a hyper-parameter, and its place in a tuple."""
    if name in group:
        return name, None
    if name in ("beta1", "beta2") and "betas" in group:
        return "betas", ("beta1", "beta2").index(name)
    known = [key for key, value in group.items() if isinstance(value, (float, Tensor))]
    known += ["beta1", "beta2"] if "betas" in group else []
    raise RecipeError(
        f"A schedule moves '{name}', which a parameter group does not have.",
        f"It has {len(known)} numbers.",
        did_you_mean(name, known),
    )


def by_torch(name: str, options: Mapping[str, Any], steps: int) -> list[float]:
    """The factors that one of torch's schedulers gives at each update, by running it on an optimizer of rate 1.

    Args:
        name: its class, such as "CosineAnnealingLR".
        options: its arguments. Rates among them (``max_lr``, ``eta_min``) are factors on the peak.

    Raises:
        RecipeError: if there is none of that name, it cannot be a function of the count, or it refuses the arguments.

    >>> by_torch("ExponentialLR", {"gamma": 0.5}, 3)
    [1.0, 0.5, 0.25]
    """
    return list(_values(name, tuple(sorted((key, _plain(value)) for key, value in options.items())), steps))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=16)
def _values(name: str, options: tuple[tuple[str, Any], ...], steps: int) -> tuple[float, ...]:
    kinds: dict[str, Any] = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not key.startswith("_")
    }
    kinds.pop("LRScheduler", None)
    if name in _INSTEAD:
        raise RecipeError(
            f"torch.{name} is no function of the number of updates alone.",
            "A schedule here is.",
            f"Use {_INSTEAD[name]}.",
        )
    if name not in kinds:
        raise RecipeError(
            f"torch has no scheduler called '{name}'.", f"It has {len(kinds)}.", did_you_mean(name, kinds)
        )
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options}
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            running = kinds[name](optimizer, **given)
            for update in range(steps):
                values.append(float(optimizer.param_groups[0]["lr"]))
                if update + 1 < steps:
                    optimizer.step()
                    running.step()
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as err:
            raise RecipeError(
                f"torch.{name} does not take what it is given.",
                f"{type(err).__name__}: {err}"[:300],
                f"Its arguments are {', '.join(list(inspect.signature(kinds[name]).parameters)[1:])}.",
            ) from None
    if not all(0 <= value < float("inf") for value in values):
        raise RecipeError(
            f"torch.{name} leaves the range of rates.",
            f"Its values lie between {min(values):g} and {max(values):g}.",
            "Give arguments that keep it at 0 or above.",
        )
    return tuple(values)
