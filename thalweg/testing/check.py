"""``check_rule``: the whole contract for anyone's rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thalweg.core import RecipeError
from thalweg.rules import RULES, Rule, Slot, make_rule
from thalweg.testing import engine  # noqa: F401  it registers its promises, after those of maths
from thalweg.testing.case import PROMISES, Case, Oracle


def check_rule(
    rule: Rule | str | Callable[..., Any],
    *,
    options: Mapping[str, Any] | None = None,
    oracle: Oracle | None = None,
    slots: Sequence[str | Slot] | None = None,
) -> None:
    """Ask of a rule all that is asked of the rules of this library.

    Args:
        rule: a rule, its registered name, or a function of maths ``f(p, g, *slots, lr, t, **options) -> (change, *slots)``
            that works element by element; for one that reads more, give ``thalweg.rules.make_rule(f, reads="matrix")``.
        options: other values than the defaults.
        oracle: a transcription of the paper to agree with, ``oracle(ps, gs, *, lr, **options)`` on numpy arrays.
        slots: of a function; None: the names of its arguments after p and g, each a tensor of zeros like the parameter.

    Raises:
        BrokenPromise: naming the first promise that is broken, what was seen, and what to do.
        RecipeError: for options that the rule does not have, or a function that is no rule.

    >>> def heavy_ball(p, g, m, *, lr, t, momentum=0.9):
    ...     m = momentum * m + g
    ...     return -lr * m, m
    >>> check_rule(heavy_ball)

    >>> def hasty(p, g, m, *, lr, t):
    ...     return -lr * m.mul_(0.9).add_(g), m
    >>> check_rule(hasty)
    Traceback (most recent call last):
    thalweg.testing.case.BrokenPromise: hasty breaks a promise: what a rule is given it leaves as it was.
      The update has written into the slot 'm'.
      Write nothing in place: m = b*m + g, not m.mul_(b).add_(g).
    """
    case = Case(_rule_of(rule, slots), dict(options or {}), oracle)
    options, words = case.rule.options(case.options), dict.fromkeys(case.rule.needs)
    tensors = [None] * (2 + len(case.rule.slots_for(options)))
    try:
        inspect.signature(case.rule.update).bind(*tensors, **words)
    except TypeError as err:
        raise RecipeError(
            f"{case.rule.name} cannot be called as a rule is.",
            f"It gets {len(tensors)} tensors, then {', '.join(words)} and its options by keyword: {err}.",
            "Declare its slots in the order of its arguments.",
        ) from None
    for promise in PROMISES.values():
        if promise.applies(case):
            promise.check(case)


def _rule_of(rule: Rule | str | Callable[..., Any], slots: Sequence[str | Slot] | None) -> Rule:
    if isinstance(rule, str):
        return RULES[rule]
    if not isinstance(rule, Rule):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        words = [p for p in inspect.signature(rule).parameters.values() if p.kind in kinds]
        if len(words) < 2:
            raise RecipeError(
                f"{getattr(rule, '__name__', rule)} is no update rule.",
                f"It takes {len(words)} tensors, and a rule takes a parameter and its gradient first.",
                "Write it as f(p, g, *slots, lr, t, **options), all behind the slots by keyword.",
            )
        named = tuple(p.name for p in words[2:] if p.default is inspect.Parameter.empty)
        rule = make_rule(rule, slots=named if slots is None else tuple(slots))
    if rule.name in RULES and RULES[rule.name] is not rule:
        raise RecipeError(
            f"A rule called '{rule.name}' is registered already.", "Names are given once.", "Give yours another name."
        )
    return rule
