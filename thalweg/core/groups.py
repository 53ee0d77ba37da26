"""The table of parameters in sum, for people: the plan on the terminal and the report show the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from thalweg.core.plan import RECIPES_RULE, ParameterRow


@dataclass(frozen=True)
class ParameterGroup:
    """What the optimizer does alike to some parameters.

    Attributes:
        rule: with those of its options that differ between parameters.
        rates: least and largest factor on the scheduled learning rate.
        decay: strength, or None where they are exempt.
        rule_reasons, decay_reasons: what decided them, each once.
        tensors, elements: how many.
    """

    rule: str
    rates: tuple[float, float]
    decay: float | None
    rule_reasons: tuple[str, ...]
    decay_reasons: tuple[str, ...]
    tensors: int
    elements: int

    def told(self, peak: float | None) -> tuple[str, str, str, str]:
        """(rule, rate, decay, because) as people read them; ``peak`` is the recipe's rate."""
        low, high = self.rates
        factor = f"x{high:.4g}" if low == high else f"x{low:.4g} to x{high:.4g}"
        rate = factor if peak is None or low != high else f"{peak * high:.4g} ({factor})"
        because = [f"rule: {', '.join(self.rule_reasons)}"] if self.rule_reasons else []
        because.append(f"decay: {', '.join(self.decay_reasons)}")
        return self.rule, rate, "no" if self.decay is None else f"{self.decay:g}", "; ".join(because)


def parameter_groups(rows: Iterable[ParameterRow], most: int | None = None) -> list[ParameterGroup]:
    """The table of parameters in sum: one for each way in which they are treated; decayed ones first, then by rate.

    Args:
        most: where there would be more, those that differ by their rate alone are put together.
    """
    rows = list(rows)
    options = {
        rule: _differing([r.options for r in rows if r.rule == rule]) for rule in dict.fromkeys(r.rule for r in rows)
    }
    found: dict[tuple[Any, ...], ParameterGroup] = {}
    for row in rows:
        own = [f"{name}={row.options[name]}" for name in options[row.rule] if name in row.options]
        named = " ".join([row.rule, *own])
        strength = row.weight_decay if row.decays else None
        why = (row.rule_reason,) if row.rule_reason not in ("", RECIPES_RULE) else ()
        one = ParameterGroup(named, (row.lr, row.lr), strength, why, (row.decay_reason,), 1, math.prod(row.shape))
        _put(found, (named, row.lr, strength), one)
    if most is not None and len(found) > most:
        whole: dict[tuple[Any, ...], ParameterGroup] = {}
        for one in found.values():
            _put(whole, (one.rule, one.decay), one)
        found = whole
    order = {rule: k for k, rule in enumerate(options)}
    return sorted(
        found.values(), key=lambda t: (order[t.rule.split()[0]], t.rule, t.decay is None, -t.rates[1], -t.elements)
    )


def _put(found: dict[tuple[Any, ...], ParameterGroup], key: tuple[Any, ...], one: ParameterGroup) -> None:
    """``one`` joined to what is under ``key``."""
    known = found.get(key)
    if known is None:
        found[key] = one
        return
    found[key] = replace(
        known,
        rates=(min(known.rates[0], one.rates[0]), max(known.rates[1], one.rates[1])),
        rule_reasons=tuple(dict.fromkeys((*known.rule_reasons, *one.rule_reasons))),
        decay_reasons=tuple(dict.fromkeys((*known.decay_reasons, *one.decay_reasons))),
        tensors=known.tensors + one.tensors,
        elements=known.elements + one.elements,
    )


def _differing(options: list[dict[str, Any]]) -> list[str]:
    """The names whose values are not the same in all."""
    names = dict.fromkeys(name for given in options for name in given)
    return [name for name in names if any(given.get(name) != options[0].get(name) for given in options)]
