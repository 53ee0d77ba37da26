"""Recomputation: a model's blocks keep their inputs alone, and are run again in the backward pass.

The forward function of each block is replaced on the instance, so names, state dicts, hooks, copies and pickles of the model
stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import ModelError
from thalweg.engine.blocks import described, repeated_blocks
from thalweg.engine.products import product_operators
from thalweg.engine.rerun import Run
from thalweg.regularize.keyed import Keyed

#: Of torch.compile's activation memory budget: 1 keeps what it keeps by itself, 0 the inputs alone.
COMPILED_BUDGET = 0.5


class Released(Protocol):
    """Something that was changed in a model for the time of a run."""

    def release(self) -> None:
        """The model is as it was."""


class Recomputation:
    """What was changed in a model so that it recomputes; ``release`` changes it back.

    Attributes:
        how: "none", "blocks", "ops" or "compiled".
        places: by name, the modules that were changed.
    """

    def __init__(self, how: str, places: Mapping[str, nn.Module]) -> None:
        self.how, self.places = how, dict(places)
        self._made: list[_Budgeted | _Recomputed] = []
        for name, module in self.places.items():
            self._made.append(_Budgeted(module) if how == "compiled" else _Recomputed(module, name, how == "ops"))
        for made in self._made:
            made.put()

    def release(self) -> None:
        """The model is as it was; a backward pass that is still to come recomputes as its forward pass was run."""
        for made in self._made:
            made.take_off()
        self._made, self.places = [], {}

    def idle(self) -> list[str]:
        """Names of the modules that were changed and have not been called since."""
        return [name for name, made in zip(self.places, self._made) if not made.called]


def recompute(model: nn.Module, how: str) -> Recomputation:
    """Let a model recompute, in place, where it trains with gradients; gradients stay the same to the bit.

    Args:
        how: "none"; "blocks": of each of its repeated blocks only the inputs are kept; "ops": and the results of products of
            matrices, convolutions and attention; "compiled": a compiled model keeps what fits half of torch.compile's activation
            memory budget; what has been compiled so far in this process is compiled anew.

    Raises:
        ModelError: for a model without repeated blocks; for "compiled" and a model that is not, or the other way round; for
            one that recomputes already.

    Cost: time of the forward pass without the last product of each block ("blocks"), or without all products ("ops").
    """
    if how == "none":
        return Recomputation(how, {})
    places = _compiled_parts(model) if how == "compiled" else _blocks(model, how)
    for name, module in places.items():
        if any(isinstance(part, (_Recomputed, _Budgeted)) for part in module.__dict__.values()):
            raise ModelError(
                f"recompute='{how}' was asked for, and the model recomputes already.",
                f"'{name}' does.",
                "Call finish() of the TrainStep that has it, or give a fresh model.",
            )
    if how == "compiled":
        torch._dynamo.reset()  # what was traced before knows of no budget
    return Recomputation(how, places)


@contextmanager
def recomputed(model: nn.Module, how: str) -> Iterator[Recomputation]:
    """``recompute``, for the time inside."""
    made = recompute(model, how)
    try:
        yield made
    finally:
        made.release()


@contextmanager
def tried(model: nn.Module, how: str | None, take: Callable[[str, Any, str], Any]) -> Iterator[None]:
    """``recomputed`` for a trial of the model; afterwards what was changed is told.

    Args:
        how: as in the recipe; None: nothing is changed.
        take: notes a decision: (path, value, reason).

    Raises:
        ModelError: if the trial never called what was changed.
    """
    with recomputed(model, how or "none") as made:
        yield
        if not made.places:
            return
        idle = made.idle()
        if len(idle) == len(made.places):
            raise ModelError(
                f"recompute='{made.how}' was asked for, and the model never calls its blocks.",
                f"{len(idle)} of {len(idle)} blocks, such as '{idle[0]}', are not called as modules in a forward pass.",
                "Call them as block(x), not their layers one by one, or use recompute='none'.",
            )
        told = f"in the backward pass; {len(idle)} of them did not run when the model was tried"
        take(f"recompute '{made.how}'", described(made.places), told)


def _blocks(model: nn.Module, how: str) -> dict[str, nn.Module]:
    blocks = repeated_blocks(model)
    if not blocks:
        kinds = sorted({type(child).__name__ for child in model.children()})
        raise ModelError(
            f"recompute='{how}' was asked for, and the model has no repeated blocks.",
            f"Looked for two or more modules of one class, with layers of their own, in an nn.ModuleList, nn.ModuleDict or "
            f"nn.Sequential; {_inside(model)} holds {', '.join(kinds) or 'no modules'}.",
            "Put its layers into blocks, or use recompute='none'.",
        )
    return blocks


def _inside(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _compiled_parts(model: nn.Module) -> dict[str, nn.Module]:
    """What torch.compile was called with, by name.

    Raises:
        ModelError: if there is none.
    """
    found: dict[str, nn.Module] = {}
    if "torch._dynamo" in sys.modules:
        from torch._dynamo import OptimizedModule

        for name, module in model.named_modules():
            if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
                found[name] = module
    if not found:
        raise ModelError(
            "recompute='compiled' was asked for, and the model is not compiled.",
            f"None of the {sum(1 for _ in model.modules())} modules of {type(model).__name__} is.",
            "Give torch.compile(model), or use recompute='blocks' or 'ops'.",
        )
    return found


class _Recomputed:
    """In place of a block's forward function: runs it so that the backward pass runs it again.

    Args:
        module: the block.
        name: its name.
        products: whether results of products of matrices are kept.
    """

    def __init__(self, module: nn.Module, name: str, products: bool) -> None:
        self.module, self.name, self.products, self.called = module, name, products, False
        self.own = module.__dict__.get("forward")  # some are given one on the instance
        self.layers = [layer for layer in module.modules() if isinstance(layer, Keyed)]
        self.holders = [m for m in module.modules() if m._buffers and not isinstance(m, _BatchNorm)]

    def put(self) -> None:
        self.module.__dict__["forward"] = self
        self.module.__dict__["_replicate_for_data_parallel"] = partial(_replica, self)

    def take_off(self) -> None:
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"], self.module.__dict__["_replicate_for_data_parallel"]
            if self.own is not None:
                self.module.__dict__["forward"] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recomputes = self.module.training and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return _traced(self, recomputes, args, kwargs)
        self.called = True
        forward = self.own or MethodType(type(self.module).forward, self.module)
        if not recomputes:
            return forward(*args, **kwargs)
        args, kwargs = tuple(map(_no_cache, args)), {key: _no_cache(value) for key, value in kwargs.items()}
        before = [(m, name, b, b._version) for m in self.holders for name, b in m._buffers.items() if b is not None]
        result = Run(self.name, forward, self.layers, self.products).first(args, kwargs)
        for module, name, buffer, version in before:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                raise ModelError(
                    f"The block '{self.name}' cannot be computed again.",
                    f"Its forward pass changes the buffer '{name}' of a {type(module).__name__}, and would change it twice.",
                    "Move what changes out of the block, or set recompute='none'.",
                )
        return result


def _no_cache(value: Any) -> Any:
    """None for an empty cache of keys and values (transformers): the second run would find in it what the first put there."""
    length = getattr(value, "get_seq_length", None)
    if length is None or isinstance(value, (Tensor, nn.Module)):
        return value
    return None if length() == 0 else value


def _traced(again: _Recomputed, recomputes: bool, args: Any, kwargs: Any) -> Any:
    """The same inside torch.compile, which knows torch's own checkpoint."""
    if not recomputes:
        return _plainly(again, *args, **kwargs)
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if not again.products:
        return checkpoint(_plainly, again, *args, use_reentrant=False, **kwargs)
    contexts = partial(create_selective_checkpoint_contexts, _OPERATORS)
    return checkpoint(_plainly, again, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _plainly(again: _Recomputed, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward function, in words that the compiler can trace."""
    return again.own(*args, **kwargs) if again.own else type(again.module).forward(again.module, *args, **kwargs)


#: A list, and made beforehand, for the compiler cannot trace how it is made.
_OPERATORS = product_operators()


def _replica(again: _Recomputed) -> nn.Module:
    """A replica (nn.DataParallel) with a forward function of its own; it would run the original's."""
    module = again.module
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    del replica.__dict__["forward"], replica.__dict__["_replicate_for_data_parallel"]
    if again.own is not None:
        replica.__dict__["forward"] = again.own
    _Recomputed(replica, again.name, again.products).put()
    return replica


class _Budgeted:
    """In place of what runs a compiled module: what torch.compile traces now, it cuts to the budget."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.called = module, False
        self.name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        self.own = module.__dict__[self.name]

    def put(self) -> None:
        self.module.__dict__[self.name] = self

    def take_off(self) -> None:
        if self.module.__dict__.get(self.name) is self:
            self.module.__dict__[self.name] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._functorch import config

        self.called = True
        with config.patch(activation_memory_budget=COMPILED_BUDGET):
            return self.own(*args, **kwargs)


__all__ = ["COMPILED_BUDGET", "Recomputation", "recompute", "recomputed", "tried"]
