"""The step of a recipe that asks for the compiler."""

from __future__ import annotations

from functools import partial
from typing import Any

from thalweg.device.replay import record
from thalweg.engine.compiled import CompiledStep
from thalweg.engine.compiled_backend import Compiler
from thalweg.engine.compiled_cache import use_cache
from thalweg.engine.compiled_choice import WHOLE, check_model
from thalweg.engine.compiled_model import CompiledModel
from thalweg.engine.recompute import Recomputation
from thalweg.engine.release import Release
from thalweg.engine.released import ReleasedStep
from thalweg.engine.state import State
from thalweg.engine.step import Step
from thalweg.parallel import Ranks

#: What ``steps_per_call = "auto"`` is: so many steps at most, in so many seconds. A signal waits no longer for its answer.
MOST, CALL_S = 64, 0.02


def compiled_step(
    how: str,
    state: State,
    loss: Any,
    policy: Any,
    options: Any,
    streams: Any,
    again: Recomputation,
    ranks: Ranks,
    release: Release | None,
    several: int | str = 1,
) -> Step:
    """As ``build`` makes it.

    Args:
        how: "model", "blocks", "step" or "captured".
        several: the recipe's ``steps_per_call``.
        release: of gradients, where they are.
    """
    check_model(state.model, how)
    use_cache()
    compiler = Compiler(state.device.compile_backend or "", state.device.compile_options)
    if how in WHOLE:
        step = CompiledStep(state, loss, policy, options, streams, again, ranks, compiler=compiler)
        if how == "captured":
            step.replay(partial(record, state.device))
        elif ranks.world == 1:
            step.per_call, step.call_s = (MOST, CALL_S) if isinstance(several, str) else (several, 0.0)
        return step
    compiled = CompiledModel(state.model, compiler, again, blocks=how == "blocks")
    if release is not None:
        return ReleasedStep(state, loss, policy, options, streams, compiled, release=release)
    return Step(state, loss, policy, options, streams, compiled, ranks)
