"""A model that torch.compile runs, for as long as a run has it: names, state dicts and pickles stay as they are."""

from __future__ import annotations

from torch import nn

from thalweg.engine.compiled_backend import Compiler
from thalweg.engine.recompute import Recomputation


class CompiledModel:
    """What was changed in a model so that its passes are compiled; ``release`` changes it back.

    Args:
        model: in training it runs what ``compiler`` makes of it; one that is compiled already stays as it is.
        again: what it recomputes, released with it.
    """

    def __init__(self, model: nn.Module, compiler: Compiler, again: Recomputation) -> None:
        self.model, self.again = model, again
        self.mine = model._compiled_call_impl is None and not hasattr(model, "_orig_mod")
        if self.mine:
            compiler.compile_model(model)

    def release(self) -> None:
        """The model is as it was."""
        if self.mine:
            self.model._compiled_call_impl = None
        self.again.release()
