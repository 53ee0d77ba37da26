"""A whole run: its folder, its checkpoints, its end."""

from thalweg.run.folder import RunFolder, choose_folder
from thalweg.run.result import Result, Resume
from thalweg.run.whole import train, train_task

__all__ = ["Result", "Resume", "RunFolder", "choose_folder", "train", "train_task"]
