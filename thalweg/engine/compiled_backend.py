"""What makes graphs: torch.compile with the settings that a whole step needs, counted."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from thalweg.core import ModelError
from thalweg.data import tensors
from thalweg.engine.compiled_uniform import hoisting

#: Another backend of torch.compile than the device's own, for tests: inductor takes 5 to 15 s a graph.
BACKEND = "THALWEG_COMPILE_BACKEND"

#: Compilations after the first step that nobody is warned of: a window with fewer micro-batches, one that is short, evaluation.
FEW = 3

TIME_LOST = "are time lost"

#: Torch's own warning of what it looks at in a block's input: an error where warnings are.
_NO_LEAF = "The .grad attribute of a Tensor that is not a leaf"

#: Shapes of micro-batches that a run may have.
MOST_SHAPES = 64


@cache
def traces_autograd() -> bool:
    """Whether this torch can trace a backward pass into the graph of its forward pass (from 2.13 on, behind a switch)."""
    import torch._dynamo.config as config

    return hasattr(config, "trace_autograd_ops")


@dataclass(frozen=True)
class Ran:
    """A compiled graph, what it was given and what it gave."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    found: Sequence[Any]

    def without(self, places: Sequence[tuple[int, int]]) -> Ran:
        """It holds neither a batch, at these arguments, nor what came of it."""
        left = list(self.args)
        for place, _ in places:
            left[place] = None
        return replace(self, args=tuple(left), found=())


class Compiler:
    """Makes graphs, and counts them.

    Args:
        backend: of torch.compile.
        options: for the backend.

    Attributes:
        made: graphs compiled so far; ``seconds`` were spent on them.
        stepped: whether the run's first step is done.
        noting: whether ``ran`` keeps what graph was run last, until it is taken.
        news: what is to be told of them.
    """

    def __init__(self, backend: str, options: dict[str, Any] | None = None) -> None:
        self.name, self.options = os.environ.get(BACKEND) or backend, dict(options or {})
        self.made = 0
        self.seconds = 0.0
        self.stepped = False
        self.noting = False
        self.ran: Ran | None = None
        self.news: list[str] = []
        self._shapes: dict[str, str] = {}  # of what each graph was given when it was last compiled
        self._again = 0  # graphs since the first step

    @property
    def draws_alike(self) -> bool:
        """Whether graphs draw the numbers from torch's generators that plain operators do."""
        return self.name in ("inductor", "aot_eager", "eager")

    def graph(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` compiled as one graph for each shape of what it is given.

        Raises:
            ModelError: at a call, where it cannot be traced as one.
        """
        compiled = torch.compile(
            _fresh(method),
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
            options={"guard_filter_fn": _not_ours},
        )
        return _Graph(compiled, self, method.__name__.strip("_"))

    def note(self, graph: str, args: tuple[Any, ...], seconds: float) -> None:
        """``graph`` has just been compiled for ``args``, in so many seconds."""
        shapes = (
            ", ".join(f"{name or 'batch'} {'x'.join(map(str, t.shape))}" for name, t in tensors(args[0]))
            if args
            else ""
        )
        self.seconds += seconds
        before = self._shapes.get(graph)
        self._shapes[graph] = shapes
        text = f"The graph '{graph}' was compiled in {seconds:.1f} s"
        if self.stepped:
            self._again += 1
            text += f", number {self._again} after the first step"
        if before is not None:
            text += f", for {shapes} after {before}" if before != shapes else ", for the same shapes"
        if self._again > FEW:
            text += f". More than {FEW} {TIME_LOST}: give micro-batches one shape (train.last='drop', equal lengths)"
        self.news.append(f"{text}.")

    def take(self) -> Ran | None:
        """The graph that was run last, where it was noted; it is let go of."""
        ran, self.ran = self.ran, None
        return ran

    def shared(self) -> Callable[..., Any]:
        """A compiled function that calls the module which is its first argument: its graphs fit all modules that are alike.

        nn.Module.compile would put the graphs of all models of a process together, and what has had eight stays uncompiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(_renamed(_called), backend=self._backend)

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(module, *args, **kwargs)
            except TorchDynamoException as err:
                if _NO_LEAF not in str(err):
                    raise
            with warnings.catch_warnings():  # while it traces; nothing has run yet
                warnings.filterwarnings("ignore", message=_NO_LEAF)
                return compiled(module, *args, **kwargs)

        return run

    def _backend(self, graph: Any, inputs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what it imports
            if self.name == "inductor":
                made = _by_inductor(graph, inputs, {"fallback_random": True, **self.options})
            else:
                from torch._dynamo.backends.registry import lookup_backend

                given: Any = {"options": self.options} if self.options else {}
                made = lookup_backend(self.name)(graph, inputs, **given)
        self.made += 1

        def run(*args: Any) -> Any:
            found = made(*args)
            if self.noting:
                self.ran = Ran(made, args, found)
            return found

        return run


def _by_inductor(graph: Any, inputs: list[Any], options: dict[str, Any]) -> Any:
    """What inductor makes of a graph. On the CPU what calls its kernels is compiled too: in Python it takes as long as the update
    of a small model. Shapes, which are guarded before a call, are not looked at again inside.
    """
    from torch._inductor import compile as by_inductor

    if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in inputs):
        return by_inductor(graph, inputs, options=options)
    here = {**options, "size_asserts": False, **hoisting()}
    try:
        return by_inductor(copy.deepcopy(graph), inputs, options={**here, "cpp_wrapper": True})
    except Exception:  # an operator that only Python can call
        return by_inductor(graph, inputs, options=here)


class _Graph:
    """A compiled function whose tracing needs switches of torch's that its calls do not: setting them takes longer than a call."""

    def __init__(self, compiled: Callable[..., Any], compiler: Compiler, name: str) -> None:
        import torch._dynamo.config as config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported

        self.compiled, self.compiler, self.name, self.traced = compiled, compiler, name, False
        self.switches: dict[str, Any] = {
            "trace_autograd_ops": True,
            "specialize_float": True,
            "recompile_limit": MOST_SHAPES,
        }
        self.too_many = FailOnRecompileLimitHit
        self.config, self.not_traced, self.failed = config, (Unsupported, FailOnRecompileLimitHit), TorchDynamoException

    def __call__(self, *args: Any) -> Any:
        made, begun = self.compiler.made, time.perf_counter()
        found = self._called(args)
        if self.compiler.made != made:
            self.compiler.note(self.name, args, time.perf_counter() - begun)
        return found

    def _called(self, args: tuple[Any, ...]) -> Any:
        if self.traced:
            try:
                return self.compiled(*args)
            except self.not_traced:  # another shape: nothing has run yet
                pass
        try:
            with self.config.patch(**self.switches):
                found = self.compiled(*args)
        except self.too_many as err:
            raise _too_many_shapes(self.name) from err
        except self.failed as err:
            raise _not_one_graph(err) from err
        self.traced = True
        return found


def _not_ours(guards: Sequence[Any]) -> list[bool]:
    """Which guards are looked at in every call: those of the model, the loss, the data and torch's settings.

    What a step holds besides is made once and never replaced; looking at it takes a tenth of a tiny model's step.
    """
    return [not guard.name.startswith("self.") or guard.name.startswith(_MOVES) for guard in guards]


_MOVES = ("self.module", "self.graph_statistics")  # layers may change their mode


def _too_many_shapes(graph: str) -> ModelError:
    return ModelError(
        f"The graph '{graph}' was to be compiled for more than {MOST_SHAPES} shapes of micro-batches.",
        "Each takes as long as the first, and memory.",
        "Pad samples to a few lengths, or use compile='model' or 'off'; --resume --accept compile goes on with it.",
    )


def _not_one_graph(err: Exception) -> ModelError:
    """The tracer's words, which are long, as three parts."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ")]
    where = f" The last place: {places[-1]}." if places else ""
    return ModelError(
        "The step cannot be compiled as one graph.",
        f"{(lines or [type(err).__name__])[0]}.{where}",
        "Let the model and the loss not branch on values of tensors, print, or call what torch cannot trace; or use "
        "compile='model', which may be cut into several graphs, or compile='off'.",
    )


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's hooks and forward function."""
    return module._call_impl(*args, **kwargs)


_NUMBERS = count()


def _renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with code and a name of its own: by the name torch.compile knows which sizes have changed."""
    name = f"{function.__name__.strip('_')}_{next(_NUMBERS)}"
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


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
