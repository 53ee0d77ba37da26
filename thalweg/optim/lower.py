"""From a program, written once as pure maths, to what runs.

Every way updates lists of tensors in place, and takes the divisor of the gradient (loss scale, weight of the window and
clipping in one number) and the flag of a skipped step as tensors: nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from thalweg.core import RecipeError
from thalweg.core.recipe import WAYS
from thalweg.device import capabilities_of
from thalweg.optim.batch import Batch
from thalweg.optim.eager import Extra, Kernel, eager
from thalweg.optim.kernels import Bind, fused
from thalweg.optim.program import Program

#: Below this many elements a kernel is not built unasked: eagerly they take under 2 ms a step, and a thousand steps of that
#: are what building costs where nothing is cached (benchmarks/results/optim.json).
WORTH_COMPILING = 1 << 18
#: The same where slots are kept in blocks of few bits: eagerly an element takes six times as long.
WORTH_COMPILING_BLOCKS = WORTH_COMPILING >> 3


@dataclass(frozen=True)
class Update:
    """An update that can be run: ``how`` says which way, ``why`` the reason.

    Attributes:
        bind: makes a call of it for tensors that stay the same; None where nothing is gained by that.
    """

    run: Kernel
    how: str
    why: str
    bind: Bind | None = None


def lower(program: Program, *, device: str, elements: int, way: str | None = None, keep: bool = False) -> Update:
    """Choose how a program runs.

    The choice depends on the model alone, never on the clock: a run that is resumed makes it again, and gets the same bits.

    Args:
        device: kind of device.
        elements: how many it will update at once.
        way: one of ``WAYS`` to force; None chooses.
        keep: whether gradients must be left as they are: torch's operators write back what they divide.

    Raises:
        RecipeError: if ``way`` is not possible here.
    """
    update = _choose(program, device=device, elements=elements, way=way, keep=keep)
    if program.clear and (update.how != "compiled" or device != "cpu"):
        return replace(update, run=_clearing(update.run), bind=None)
    return update


def _clearing(kernel: Kernel) -> Kernel:
    """A kernel, and zeros in the gradients after it."""

    def run(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        kernel(batch, scalars, due=due, extra=extra)
        torch._foreach_zero_(batch.gs)

    return run


def _choose(program: Program, *, device: str, elements: int, way: str | None, keep: bool) -> Update:
    if way is not None and way not in WAYS:
        raise RecipeError(f"way={way!r} is not known.", "It says how an update runs.", f"Use one of {', '.join(WAYS)}.")
    if way in ("eager", "stacked"):
        return Update(eager(program, stack=way == "stacked"), way, "asked for")
    operator = None if way == "compiled" else fused(program, device=device)
    if way == "fused" and operator is None:
        raise RecipeError(
            f"way='fused' is not possible for {program.rule.name}.",
            f"torch has no fused operator with this maths in {program.dtype} on {device}.",
            "Leave way out, or use way='compiled'.",
        )
    least = WORTH_COMPILING_BLOCKS if program.blocked and device == "cpu" else WORTH_COMPILING
    large = elements >= least
    if operator is not None and (way == "fused" or not ((program.average or (keep and program.unscale)) and large)):
        why = f"torch has a fused operator with the maths of {program.rule.name} on {device}"
        return Update(operator.run, "fused", why, operator.bind)
    matrices = program.reads == "matrix" and program.rule.least_ndim == 2
    if way == "compiled" or large:
        kernel, why = _compiled(program, device)
        if kernel is not None:
            return Update(kernel, "compiled", why)
        if way == "compiled":
            raise RecipeError(f"way='compiled' is not possible for {program.rule.name}.", why, "Leave way out.")
    else:
        why = f"{elements} elements are too few to repay a kernel ({least})"
    if operator is not None:
        return Update(operator.run, "fused", f"torch's fused operator; {why}", operator.bind)
    if matrices:
        return Update(eager(program, stack=True), "stacked", f"equal shapes in one batched call; {why}")
    return Update(eager(program, stack=program.reads == "matrix"), "eager", why)


def _by(backend: str | None) -> str:
    return "nothing that torch knows of" if backend is None else f"whole steps, with {backend}"


def _compiled(program: Program, device: str) -> tuple[Kernel | None, str]:
    """A compiled kernel and the reason for it, or None and why there is none."""
    from thalweg.optim.around import around  # these import what only compiling needs
    from thalweg.optim.inductor import inductor
    from thalweg.optim.native import NoCompiler, native_by_ndim
    from thalweg.optim.trace import Untraceable

    builders: list[tuple[Callable[[Program], Kernel], str]] = [
        (native_by_ndim, "one C kernel over all tensors"),
        (around, "a C kernel before and one after its products of matrices"),
    ]
    if device != "cpu":
        if (backend := capabilities_of(device).compile_backend) != "inductor":
            return None, f"kernels for {device} are not made one by one: it compiles {_by(backend)}"
        builders = [(inductor, "one kernel of torch.compile for each dtype")]
    why_not = ""
    for build, why in builders:
        try:
            return build(program), why
        except Untraceable as err:
            why_not = f"it is not plain arithmetic on elements, rows and columns: {err}"
        except NoCompiler as err:
            return None, f"no kernel could be built: {err}"
    return None, why_not
