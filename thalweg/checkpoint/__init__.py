"""Checkpoints: written whole, verified when read, retained by rule."""

from thalweg.checkpoint.files import write_file
from thalweg.checkpoint.lock import FolderLock
from thalweg.checkpoint.place import LocalPlace, Place, open_place
from thalweg.checkpoint.saver import Job, Saver, Unfit
from thalweg.checkpoint.store import Snapshot, Store

__all__ = [
    "FolderLock",
    "Job",
    "LocalPlace",
    "Place",
    "Saver",
    "Snapshot",
    "Store",
    "Unfit",
    "open_place",
    "write_file",
]
