"""Finding a model's residual additions: run it once, look at each addition and at what autograd knows of its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from thalweg.device.kept import same_modes

_ADDITIONS = {torch.Tensor.add, torch.Tensor.add_, torch.add}


@dataclass(frozen=True)
class Branch:
    """A residual branch: the module whose output is what is added."""

    name: str
    module: nn.Module


@dataclass
class Run:
    """What one forward pass showed."""

    branches: list[Branch]  # in the order of their additions
    calls: list[tuple[str, nn.Module]]  # every call of a module, in the order of return
    tensors: set[nn.Module]  # modules whose output is one tensor
    unreachable: int  # residual additions whose branch is not the output of a module that runs once


def watch(model: nn.Module, run: Callable[[], Any]) -> Run:
    """Run ``model`` once, in evaluation mode and with gradients, and find its residual additions.

    An addition of two tensors is residual if one of them was computed from the other (identity shortcut), or both from
    something that is no parameter, one on a longer way than the other (projection shortcut). The branch is the one that was
    computed from the other, or on the longer way.
    """
    with ExitStack() as stack:
        stack.enter_context(same_modes(model))
        watcher = stack.enter_context(_watching(model))
        stack.enter_context(watcher)
        stack.enter_context(torch.enable_grad())
        run()
    return watcher.result()


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watcher]:
    """All modules with hooks, in evaluation mode; parameters and inputs with gradients, so that autograd knows all ways."""
    watcher = _Watcher()
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    handles: list[RemovableHandle] = [model.register_forward_pre_hook(_with_gradients, with_kwargs=True)]
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watcher.hook(name)))
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield watcher
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)


def _with_gradients(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(map(_grown, args)), {key: _grown(value) for key, value in kwargs.items()}


def _grown(value: Any) -> Any:
    """A float tensor as the result of a computation, so that it is a place that a branch can start from."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_().clone()
    return value


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, nn.Module]] = []
        self.tensors: set[nn.Module] = set()
        self.made: dict[int, list[tuple[str, nn.Module, int]]] = {}  # by id: who returned it, and its version then
        self.alive: list[Any] = []  # ids stay unique, graphs stay whole
        self.additions: list[list[tuple[str, nn.Module]]] = []
        self.shortcut: dict[Any, Any] = {}  # of the result of a residual addition

    def hook(self, name: str) -> Callable[..., None]:
        def returned(module: nn.Module, args: Any, output: Any) -> None:
            self.calls.append((name, module))
            if isinstance(output, Tensor):
                self.tensors.add(module)
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    whole = isinstance(output, Tensor)
                    self.made.setdefault(id(tensor), []).extend([(name, module, tensor._version)] * whole)

        return returned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [*args, kwargs.get("other")][:2]
        if func not in _ADDITIONS or not all(isinstance(operand, Tensor) for operand in operands):
            return func(*args, **kwargs)
        a, b = operands
        split = self._split(a, b) if a.grad_fn is not None and b.grad_fn is not None else None
        nodes = a.grad_fn, b.grad_fn
        made = [self._makers(a), self._makers(b)]
        result = func(*args, **kwargs)
        self.alive.append((result, *nodes))
        if split is not None:
            self.additions.append(made[split])
            self.shortcut[result.grad_fn] = nodes[1 - split]
        return result

    def _makers(self, tensor: Tensor) -> list[tuple[str, nn.Module]]:
        made = self.made.get(id(tensor), [])
        return [(name, module) for name, module, version in made if version == tensor._version]

    def _split(self, a: Tensor, b: Tensor) -> int | None:
        """Which operand is the branch; None: the addition is no residual one."""
        nodes: tuple[Any, Any] = (a.grad_fn, b.grad_fn)
        before = _ancestors(nodes[0]), _ancestors(nodes[1])
        for branch in (0, 1):
            other: Any = nodes[1 - branch]
            while other is not None:
                if other in before[branch] and other is not nodes[branch]:
                    return branch
                other = self.shortcut.get(other)  # parallel branches: x + f(x) + g(x)
        if not before[0] & before[1]:
            return None
        lengths = len(before[0] - before[1]), len(before[1] - before[0])
        return None if lengths[0] == lengths[1] else int(lengths[1] > lengths[0])

    def result(self) -> Run:
        """Of several modules that returned the same tensor the last: it stands nearest to the addition."""
        times: dict[nn.Module, int] = {}
        for _, module in self.calls:
            times[module] = times.get(module, 0) + 1
        branches, unreachable = [], 0
        for made in self.additions:
            once = [Branch(name, module) for name, module in made if times[module] == 1]
            branches += once[-1:]
            unreachable += not once
        return Run(branches, self.calls, self.tensors, unreachable)


def _ancestors(node: Any) -> set[Any]:
    """All that a result was computed from, itself included, without parameters."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        now = waiting.pop()
        if now is None or now in seen or hasattr(now, "variable"):
            continue
        seen.add(now)
        waiting += [parent for parent, _ in now.next_functions]
    return seen
