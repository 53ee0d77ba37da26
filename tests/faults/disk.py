"""A disk that loses what was not fsynced: a process's operations are recorded, and images made of what a power cut leaves.

The model is the strictest that POSIX allows. A file's bytes are those of its last fsync; of later writes anything may be
there: none, all, a prefix, pages of zeros. A name is where the last fsync of its folder saw it; of later renames, creations
and removals in it any may have happened and any not, except that one that uses a name needs the one that made it.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.checkpoint import files

PAGE = 4096


@dataclass
class File:
    """An inode of a file: ``safe`` is what is durable, ``now`` what a reader sees, ``edges`` where writes ended since."""

    safe: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    edges: list[int] = field(default_factory=list)

    def torn(self, draw: random.Random) -> bytes:
        """What may be found of it."""
        now = bytes(self.now)
        if now == self.safe:
            return now
        kind = draw.choice(("none", "all", "edge", "torn", "zeros", "pages"))
        cut = draw.choice(self.edges) if self.edges else len(now)
        if kind == "none":
            return self.safe
        if kind == "all":
            return now
        if kind == "edge":
            return now[:cut]
        least = min(len(self.safe), len(now))  # what is durable and was not written again stays
        same = next((i for i, (a, b) in enumerate(zip(self.safe, now)) if a != b), least)
        if kind == "torn":
            return now[: draw.randint(same, len(now))]
        if kind == "zeros":
            return now[:same] + bytes(len(now) - same)
        pages = bytearray(now)
        for at in range(same - same % PAGE, len(now), PAGE):
            if draw.random() < 0.5:
                start = max(at, same)
                pages[start : at + PAGE] = bytes(len(pages[start : at + PAGE]))
        return bytes(pages)

    def sync(self) -> None:
        self.safe, self.edges = bytes(self.now), []


Node = Any  # File or Folder
Change = dict[str, Node | None]  # what one operation makes of names: what each stands for, or None


@dataclass
class Folder:
    """An inode of a folder: ``safe`` names, and changes since."""

    safe: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.changes.append(change)
        self.now = _applied(self.now, change)

    def sync(self) -> None:
        self.safe, self.changes = dict(self.now), []

    def found(self, draw: random.Random) -> dict[str, Node]:
        """Names that may be found: some of the changes, each with all that it rests on."""
        kind = draw.choice(("none", "all", "prefix", "any", "any"))
        num = len(self.changes)
        keep = {"none": 0, "all": num, "prefix": draw.randint(0, num)}.get(kind)
        chosen = set(range(keep)) if keep is not None else {i for i in range(num) if draw.random() < 0.5}
        names = self.safe
        lost: set[str] = set()  # names whose change did not happen: what builds on them cannot have
        for i, change in enumerate(self.changes):
            if i in chosen and not lost & set(change):
                names = _applied(names, change)
            else:
                lost |= set(change)
        return names


def _applied(names: dict[str, Node], change: Change) -> dict[str, Node]:
    merged: dict[str, Node | None] = {**names, **change}
    return {name: node for name, node in merged.items() if node is not None}


class Disk:
    """What lies below one folder, as the process sees it and as the disk has it.

    Args:
        root: a folder that is empty, and durable itself.

    Attributes:
        after: called behind every operation, with its name: where a cut may fall.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.after: Callable[[str], None] = lambda name: None
        self.top = Folder()
        self.count = 0
        self._handles: dict[int, Node] = {}
        self._lock = threading.RLock()

    def image(self, where: Path, draw: random.Random) -> Path:
        """Lay out below ``where`` what one power cut leaves."""
        with self._lock:
            _lay_out(self.top, where, draw)
        return where

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, all that is done through ``os`` below the root is seen."""
        notes = {
            "open": self._opened,
            "close": self._closed,
            "write": self._written,
            "fsync": self._synced,
            "ftruncate": self._cut,
            "mkdir": self._made,
            "rename": self._renamed,
            "replace": self._renamed,
            "unlink": self._unlinked,
            "rmdir": self._unlinked,
        }
        real = {name: getattr(os, name) for name in notes}
        exchange, rmtree = files.exchange, shutil.rmtree
        for name, function in real.items():
            setattr(os, name, self._watched(name, function, notes[name]))
        files.exchange = self._watched("exchange", exchange, self._exchanged)
        shutil.rmtree = _rmtree  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            files.exchange, shutil.rmtree = exchange, rmtree

    def _watched(self, name: str, real: Callable[..., Any], note: Callable[..., bool]) -> Callable[..., Any]:
        def watched(*arguments: Any, **more: Any) -> Any:
            with self._lock:  # what is noted is in the order in which it was done
                result = real(*arguments, **more)
                seen = note(result, *arguments)
                if seen:
                    self.count += 1
                    self.after(name)
            return result

        return watched

    def _find(self, path: Any) -> tuple[Folder, str] | None:
        """(the folder that holds a path's last name, that name); None for a path that is not below the root."""
        if not isinstance(path, (str, Path)):
            return None
        full = Path(os.path.abspath(path))
        if self.root not in full.parents:
            return None
        here: Node = self.top
        *folders, name = full.relative_to(self.root).parts
        for part in folders:
            here = here.now[part]
        return here, name

    def _opened(self, handle: int, path: Any, flags: int, *_: Any) -> bool:
        if isinstance(path, (str, Path)) and Path(os.path.abspath(path)) == self.root:
            self._handles[handle] = self.top
            return False
        place = self._find(path)
        self._handles.pop(handle, None)
        if place is None:
            return False
        folder, name = place
        is_new = name not in folder.now
        if is_new:
            folder.change({name: File()})
        self._handles[handle] = folder.now[name]
        return is_new

    def _closed(self, _: None, handle: int) -> bool:
        self._handles.pop(handle, None)
        return False

    def _written(self, num: int, handle: int, data: Any) -> bool:
        file = self._handles.get(handle)
        if file is None:
            return False
        file.now += bytes(data[:num])  # new files, and one that is appended to
        file.edges.append(len(file.now))
        return True

    def _cut(self, _: None, handle: int, length: int) -> bool:
        file = self._handles.get(handle)
        if file is None:
            return False
        del file.now[length:]
        file.edges.append(length)
        return True

    def _synced(self, _: None, handle: int) -> bool:
        node = self._handles.get(handle)
        if node is not None:
            node.sync()
        return node is not None

    def _made(self, _: None, path: Any, *more: Any) -> bool:
        place = self._find(path)
        if place is not None:
            place[0].change({place[1]: Folder()})
        return place is not None

    def _renamed(self, _: None, a: Any, b: Any) -> bool:
        old, new = self._find(a), self._find(b)
        if old is None or new is None:
            return False
        assert old[0] is new[0], f"{a} moves to another folder"
        folder = old[0]  # a file that was not made through os, such as a report's, has no bytes that we know
        folder.change({old[1]: None, new[1]: folder.now.get(old[1]) or File()})
        return True

    def _exchanged(self, done: bool, a: Any, b: Any) -> bool:
        old, new = self._find(a), self._find(b)
        if not done or old is None or new is None:
            return False
        folder = old[0]
        folder.change({old[1]: folder.now[new[1]], new[1]: folder.now[old[1]]})
        return True

    def _unlinked(self, _: None, path: Any) -> bool:
        place = self._find(path)
        if place is not None:
            place[0].change({place[1]: None})
        return place is not None


def _rmtree(path: Any, ignore_errors: bool = False) -> None:
    """Removal by path: the standard library's goes by descriptors, which nobody could follow."""
    try:
        with os.scandir(path) as entries:
            inside = list(entries)
        for entry in inside:
            _rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        os.rmdir(path)
    except OSError:
        if not ignore_errors:
            raise


def _lay_out(folder: Folder, where: Path, draw: random.Random) -> None:
    where.mkdir(exist_ok=True)
    for name, node in folder.found(draw).items():
        if isinstance(node, Folder):
            _lay_out(node, where / name, draw)
        else:
            (where / name).write_bytes(node.torn(draw))
