"""A model, or its repeated blocks, that torch.compile runs for as long as a run has them: names, state dicts and pickles stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from thalweg.core import ModelError
from thalweg.engine.blocks import Kind, kind_of, repeated_blocks
from thalweg.engine.compiled_backend import Compiler
from thalweg.engine.recompute import Recomputation
from thalweg.regularize.keyed import Keyed


class CompiledModel:
    """What was changed in a model so that its passes are compiled; ``release`` changes it back.

    Args:
        model: in training and evaluation it runs what ``compiler`` makes of it.
        again: what it recomputes, released with it.
        blocks: compile its repeated blocks and leave the rest; blocks of one kind share one function, and so its graphs.

    What is compiled already, or stands in something that is, stays as it is.
    """

    def __init__(self, model: nn.Module, compiler: Compiler, again: Recomputation, *, blocks: bool = False) -> None:
        self.compiler, self.again = compiler, again
        places = repeated_blocks(model) if blocks else {"": model}
        theirs = [name for name, module in model.named_modules(remove_duplicate=False) if _is_compiled(module)]
        self.mine = {name: module for name, module in places.items() if not _within(name, theirs)}
        functions: dict[Kind, Callable[..., Any]] = {}
        for name, module in self.mine.items():
            if (kind := kind_of(module)) not in functions:
                functions[kind] = compiler.shared()
            module._compiled_call_impl = _runner(module, name, functions[kind])

    def release(self) -> None:
        """The model is as it was."""
        for module in self.mine.values():
            module._compiled_call_impl = None
        self.again.release()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _within(name: str, others: Iterable[str]) -> bool:
    return any(not other or name == other or name.startswith(f"{other}.") for other in others)


def _runner(module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What is called in the module's place."""
    keyed = [layer for layer in module.modules() if isinstance(layer, Keyed)]
    return _Once(module, name, function, keyed) if keyed else partial(function, module)


class _Once:
    """Runs a compiled module whose layers count their calls in a pass. Inside a graph they count from its beginning, so that a
    second call in a pass would draw the first one's numbers.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], keyed: list[Keyed]) -> None:
        self.module, self.name, self.function, self.keyed = module, name, function, keyed
        #: The keys of the last call, and their version: each pass writes new ones.
        self.drawn: tuple[Any, int] = (None, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = self.keyed[0]
        keys = first._fixed
        if keys is not None and first.training:
            drawn = keys, keys._version
            if self.drawn[0] is keys and self.drawn[1] == drawn[1]:
                raise ModelError(
                    f"'{self.name or type(self.module).__name__}' is compiled, and called more than once in a forward pass.",
                    f"It holds {len(self.keyed)} layers with random numbers of their own, such as '{first._name}', and in a "
                    f"graph the second call would draw those of the first.",
                    "Use compile='step' or 'off'.",
                )
            self.drawn = drawn
        return self.function(self.module, *args, **kwargs)
