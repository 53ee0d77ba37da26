"""A pickle is looked through before anything of it is done: what it names, what it claims, and what it would cost."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

_DEEPEST = 8  # tuples in tuples
_LARGEST = 1 << 20  # items of a tuple, those of its tuples among them, each as often as it is there
_HASHED = 1 << 24  # likewise, of all keys
_BYTES = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
STORAGES = {f"torch {kind}Storage": size for kind, size in _BYTES.items()} | {"torch.storage UntypedStorage": 1}

#: Called with a reason for refusing.
Refuse = Callable[[str], Exception]


@dataclass(frozen=True)
class _Named:
    """A class or function."""

    name: str


@dataclass(frozen=True, eq=False)
class _Tuple:
    """``size`` is what hashing it visits."""

    items: tuple[Any, ...]
    deep: int = 1
    size: int = 1


_MARK = object()
_OTHER = object()


class Reader:
    """Goes through a pickle's operations, doing none, and knows of each text, number and tuple where it ends up.

    Attributes:
        claimed: bytes by the key of a storage.
    """

    def __init__(self, refuse: Refuse, may_name: Callable[[str], bool], unknown: Callable[[str], Exception]) -> None:
        self.refuse, self.may_name, self.unknown = refuse, may_name, unknown
        self.claimed: dict[str, int] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._hashed = 0

    def read(self, pickle: IO[bytes]) -> None:
        """One pickle; its reader stands behind it afterwards."""
        self._stack, self._memo = [], {}
        texts: list[
            str
        ] = []  # the last two: what a class is named by, where that does not stand in the operation itself
        for operation, argument, _ in pickletools.genops(pickle):
            name = operation.name
            if "UNICODE" in name:
                texts = [*texts[-1:], str(argument)]
            if name in ("STACK_GLOBAL", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise self.unknown(" ".join(texts))
            if name == "INST" or (name == "GLOBAL" and not self.may_name(str(argument))):
                raise self.unknown(str(argument))
            try:
                self._step(operation, argument)
            except (IndexError, KeyError):
                raise self.refuse(f"Its table is not whole: nothing is there for {name}.") from None

    def _step(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        name, stack = operation.name, self._stack
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(_Named(str(argument)))
        elif isinstance(argument, (str, int)) and not operation.stack_before and name not in ("PROTO", "FRAME"):
            stack.append(argument)
        else:
            self._pop_and_push(operation)

    def _pop_and_push(self, operation: pickletools.OpcodeInfo) -> None:
        name, before = operation.name, operation.stack_before
        if name == "MARK":
            self._stack.append(_MARK)
            return
        if pickletools.markobject in before:
            at = len(self._stack) - 1
            while self._stack[at] is not _MARK:
                at -= 1
                if at < 0:
                    raise IndexError
            popped = self._stack[at + 1 :]
            del self._stack[at:]
            before = before[: before.index(pickletools.markobject)]
        else:
            popped = []
        under = [self._stack.pop() for _ in before][::-1]
        popped = [*under, *popped]
        if name in ("SETITEM", "SETITEMS", "ADDITEMS"):
            self._hash(popped[1:] if name == "ADDITEMS" else popped[1::2])
        self._stack += [self._made(name, popped)] if operation.stack_after else []

    def _made(self, name: str, popped: list[Any]) -> Any:
        if "TUPLE" in name or name == "FROZENSET":
            return self._tuple(popped)
        if name in ("REDUCE", "NEWOBJ") and popped[0] == _Named("torch Size"):
            return popped[1]
        if name == "BINPERSID":
            self._claim(popped[0])
        return _OTHER

    def _tuple(self, items: list[Any]) -> _Tuple:
        inner = [item for item in items if isinstance(item, _Tuple)]
        deep = 1 + max((item.deep for item in inner), default=0)
        size = 1 + len(items) + sum(item.size for item in inner)
        if deep > _DEEPEST or size > _LARGEST:
            raise self.refuse(
                f"It holds tuples nested {deep} deep, of {size} items: no weights have such, and time is lost."
            )
        return _Tuple(tuple(items), deep, size)

    def _hash(self, keys: list[Any]) -> None:
        self._hashed += sum(key.size for key in keys if isinstance(key, _Tuple))
        if self._hashed > _HASHED:
            raise self.refuse(f"Its keys are tuples of {self._hashed} items: no weights have such, and time is lost.")

    def _claim(self, named: Any) -> None:
        """("storage", kind, key, device, number of elements), which is what a record of the file is asked for by."""
        items = named.items if isinstance(named, _Tuple) else ()
        match items:
            case ("storage", _Named(name=kind), str(key), str(), int(num), *_) if kind in STORAGES:
                self.claimed[key] = max(self.claimed.get(key, 0), num * STORAGES[kind])
            case _:
                raise self.refuse("It asks for a storage in words that torch does not use.")
