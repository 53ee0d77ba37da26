"""Other libraries' optimizers, where they are installed; each is built from a list of parameters."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def timm_optim(module: str, name: str) -> Any:
    """A class of timm.optim; the rest of timm, which needs torchvision, is left alone."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None:
            raise ImportError("timm")
        bare = types.ModuleType("timm")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["timm"] = bare
        folder = types.ModuleType("timm.optim")
        folder.__path__ = [f"{bare.__path__[0]}/optim"]
        sys.modules["timm.optim"] = folder
    return getattr(importlib.import_module(f"timm.optim.{module}"), name)


def of(package: str, name: str, **options: Any) -> Make:
    """``package.name(params, **options)``."""

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if package.startswith("timm."):
            kind = timm_optim(package.removeprefix("timm."), name)
        else:
            kind = getattr(importlib.import_module(package), name)
        made: torch.optim.Optimizer = kind(params, **options)
        return made

    return make
