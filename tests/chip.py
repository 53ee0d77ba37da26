"""A chip that nobody knew: a device of pure Python that registers itself with torch, for tests without one.

Its memory is tensors of the CPU, one for each storage, found by the storage alone: views, ``p.data = view`` and writes in place
are then what they are on a real chip. Operators run on views of that memory, so results are the CPU's to the bit. It is a poor
chip on purpose: no fused optimizers, no loss scale, no pinned memory, no figures of its memory, no generators.

Registering (``load``) holds for the process: do it in a process of its own. Importing this module does nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "chip"
#: What it does not have.
MISSING = ("_fused_", "_amp_", "pin_memory", "_pin_memory", "record_stream")
#: How often each operator ran.
RAN: Counter[str] = Counter()
_memory: dict[int, tuple[StorageWeakRef, Tensor]] = {}
_purge_at = [1024]


class _Module:
    """``torch.chip``: as little as torch asks of a backend."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        assert index == 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws from the host's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _refuse(name: str) -> None:
    if any(name.startswith(missing) for missing in MISSING):
        raise NotImplementedError(f"chip has no {name}")


class Chip(Tensor):
    """A tensor of the chip: shape, strides and a storage whose bytes lie in ``_memory``."""

    @staticmethod
    def __new__(cls, memory: Tensor, requires_grad: bool = False) -> Chip:
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            layout=memory.layout,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        _note(made, memory)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"chip({_cpu(self)!r})"

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _note(made: Tensor, memory: Tensor) -> None:
    """The bytes of ``memory`` are those of the storage of ``made``."""
    storage = made.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage())
    _memory[storage._cdata] = (StorageWeakRef(storage), flat)
    if len(_memory) > _purge_at[0]:
        for key in [key for key, (held, _) in _memory.items() if held.expired()]:
            del _memory[key]
        _purge_at[0] = 2 * len(_memory) + 1024


def _cpu(x: Any) -> Any:
    """The same numbers as a tensor of the CPU, in the same memory."""
    if isinstance(x, Chip):
        _, flat = _memory[x.untyped_storage()._cdata]
        whole = torch.empty(0, dtype=x.dtype).set_(flat.untyped_storage())
        return whole.as_strided(x.size(), x.stride(), x.storage_offset())
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = op._schema.name.removeprefix("aten::")
    _refuse(name)
    RAN[name] += 1
    if name == "copy_":
        return _copy_from(args[1], args[0])
    wanted = kwargs.get("device")
    leaves = tree_leaves((args, kwargs))
    here = any(isinstance(x, Chip) for x in leaves) if wanted is None else torch.device(wanted).type == NAME
    if any(isinstance(x, Tensor) and not isinstance(x, Chip) and x.ndim for x in leaves) and name != "_to_copy":
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, and some are on the CPU")
    given, kept = tree_map(_cpu, (args, kwargs))
    result = op(*given, **kept)
    if not here:
        return result
    made = tree_map(lambda x: Chip(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(op, args, kwargs, made)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return Chip(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Chip(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _cpu(target).copy_(_cpu(source))
    return target


def _made(make: Any) -> Any:
    """A factory whose ``out`` form changes a tensor's size, which a subclass cannot follow."""
    return lambda *numbers, dtype=None, **_: Chip(make(*numbers, dtype=dtype))


def _half(op: Any) -> Any:
    """The operator under autocast: float32 goes in as autocast's dtype."""
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def narrow(x: Any) -> Any:
        wide = isinstance(x, Tensor) and x.dtype == torch.float32
        return x.to(torch.get_autocast_dtype(NAME)) if wide else x

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            given, kept = tree_map(narrow, (args, kwargs))
            return op(*given, **kept)

    return run


_kept: list[torch.library.Library] = []  # what is registered lasts as long as these


def load() -> None:
    """Make ``chip`` a device of torch, once; what torch calls where ``chip`` is an entry point."""
    if _kept:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("empty.memory_format", _empty, "PrivateUse1")
    operators.impl("empty_strided", _empty_strided, "PrivateUse1")
    operators.impl("_copy_from", _copy_from, "PrivateUse1")
    for form in ("arange", "arange.start", "arange.start_step"):
        operators.impl(form, _made(torch.arange), "PrivateUse1")
    for form in ("eye", "eye.m"):
        operators.impl(form, _made(torch.eye), "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "mm", "bmm", "addmm", "matmul", "conv2d"):
        operators.impl(name, _half(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _kept.extend((operators, others))
