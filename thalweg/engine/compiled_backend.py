"""What makes graphs: torch.compile with the settings that a whole step needs, counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from thalweg.device import Device

#: Another backend of torch.compile than the device's own, for tests: inductor takes 5 to 15 s a graph.
BACKEND = "THALWEG_COMPILE_BACKEND"

#: Shapes of micro-batches that a run may have.
MOST_SHAPES = 64


@cache
def traces_autograd() -> bool:
    """Whether this torch can trace a backward pass into the graph of its forward pass (from 2.13 on, behind a switch)."""
    import torch._dynamo.config as config

    return hasattr(config, "trace_autograd_ops")


def compile_backend(device: Device) -> str:
    """The backend of torch.compile for a device, or "" where there is none."""
    if device.graph_kind == "graph":
        return device.compile_backend or ""
    return "" if device.kind == "mps" else "inductor"


class Compiler:
    """Makes graphs, and counts them.

    Args:
        backend: of torch.compile.
        options: for the backend.

    Attributes:
        made: graphs compiled so far.
    """

    def __init__(self, backend: str, options: dict[str, Any] | None = None) -> None:
        self.name, self.options = os.environ.get(BACKEND) or backend, dict(options or {})
        self.made = 0

    def graph(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` compiled as one graph for each shape of what it is given.

        Raises:
            torch._dynamo.exc.Unsupported: at a call, where it cannot be traced as one.
        """
        compiled = torch.compile(_fresh(method), fullgraph=True, dynamic=False, backend=self._backend)
        return _Graph(compiled)

    def compile_model(self, model: nn.Module) -> None:
        """Let ``model``, when it is called, run what is made of its forward function."""
        model.compile(backend=self._backend)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        if self.name == "inductor":
            import torch._inductor

            made: Any = torch._inductor.compile(graph, inputs, options={"fallback_random": True, **self.options})
        else:
            from torch._dynamo.backends.registry import lookup_backend

            made = lookup_backend(self.name)(graph, inputs, **({"options": self.options} if self.options else {}))
        self.made += 1
        return made


class _Graph:
    """A compiled function whose tracing needs switches of torch's that its calls do not: setting them takes longer than a call."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        import torch._dynamo.config as config
        from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

        self.compiled, self.traced = compiled, False
        self.switches: dict[str, Any] = {
            "trace_autograd_ops": True,
            "specialize_float": True,
            "recompile_limit": MOST_SHAPES,
        }
        self.config, self.not_traced = config, (Unsupported, FailOnRecompileLimitHit)

    def __call__(self, *args: Any) -> Any:
        if self.traced:
            try:
                return self.compiled(*args)
            except self.not_traced:  # another shape: nothing has run yet
                pass
        with self.config.patch(**self.switches):
            found = self.compiled(*args)
        self.traced = True
        return found


def _fresh(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with code of its own: what torch.compile knows of it is not shared with another run's."""
    function: Any = method.__func__  # type: ignore[attr-defined]
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return MethodType(copy, method.__self__)  # type: ignore[attr-defined]
