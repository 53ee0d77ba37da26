"""Checkpoints: written whole, verified when read, retained by rule."""

from thalweg.checkpoint.files import write_file
from thalweg.checkpoint.lock import FolderLock
from thalweg.checkpoint.store import Snapshot, Store

__all__ = ["FolderLock", "Snapshot", "Store", "write_file"]
