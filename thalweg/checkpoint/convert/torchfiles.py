"""Files of ``torch.save``: a pickle is looked through before anything of it is read, and then read as data alone.

Two locks, one behind the other: the pickle's operations are listed without doing any, and one that names anything but the
few makers of tensors is refused; what is left goes to ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from thalweg.checkpoint.convert.pickles import STORAGES, Reader
from thalweg.checkpoint.convert.weights import Weights, listed, refused, separated
from thalweg.core import CheckpointError

NESTED = ("state_dict", "model", "module")
_LARGEST_PICKLE = 256 << 20
_LEGACY_PICKLES = 5  # magic number, protocol, machine, the objects, keys of storages
_MAKERS = {
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch Size",
    "torch device",
}
_DTYPES = {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED = _MAKERS | STORAGES.keys() | _DTYPES
_REMEDY = (
    "If you trust who wrote it, save its tensors alone, in a process of its own: "
    "torch.save(model.state_dict(), 'weights.pt')."
)
_AGAIN = "Copy or download the file again, from where it came."
_UNCHECKED = "The file was written without checksums, so a byte changed on its way would not be seen."


def read_torch(path: Path) -> Weights:
    """The state dict of a torch file: at its top, or below "state_dict", "model" or "module".

    Raises:
        CheckpointError: if it is no such file, names a class that would have to be unpickled, or holds no state dict.
    """
    whole, unchecked = _loaded(path)
    if not isinstance(whole, dict):
        raise refused(path, f"It holds no table but {type(whole).__name__}.", "Save model.state_dict().")
    told = [_UNCHECKED] if unchecked else []
    kind = "a Lightning checkpoint" if "pytorch-lightning_version" in whole else "a torch file"
    step = whole.get("global_step", 0)
    named: Mapping[Any, Any] = whole
    if not any(isinstance(value, Tensor) for value in whole.values()):
        at = next((key for key in NESTED if _holds_tensors(whole.get(key))), None)
        if at is None:
            raise refused(
                path,
                f"It holds no tensor, and none below {', '.join(NESTED)}. Its keys: {listed(whole)}.",
                "Save model.state_dict().",
            )
        named = whole[at]
        others = [key for key in whole if key != at]
        told.append(f"Taken from its key '{at}'." + (f" Left out: {listed(others)}." if others else ""))
    tensors, tied, others = separated(named, path)
    if others:
        told.append(f"Left out, as they are no tensors: {listed(others)}.")
    step = step if isinstance(step, int) else 0
    return Weights(tensors=tensors, tied=tied, kind=kind, files=(path,), told=tuple(told), step=step)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values())


def _loaded(path: Path) -> tuple[Any, bool]:
    """What the file holds, and whether it has no checksums to compare that with."""
    unchecked = False
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            if zipped:
                unchecked = _look_through_zip(file, path)
            else:  # the form of torch before 1.6: five pickles, and the bytes of the storages behind them
                for _ in range(_LEGACY_PICKLES):
                    _reader(path).read(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about how the file was written
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None), unchecked
    except CheckpointError:
        raise
    except Exception as err:  # whatever a reader makes of bytes that anyone may have written
        what = str(err).strip().splitlines()[0][:200] if str(err).strip() else "no reason given"
        raise refused(path, f"{type(err).__name__}: {what}.", "Write the file again, from where it came.") from None


def _look_through_zip(file: IO[bytes], path: Path) -> bool:
    """Refuse what torch does not write, what was changed on its way, and what claims more than is there.

    Returns:
        whether it was written without checksums.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") for name in names):
            raise refused(path, "It is a TorchScript archive, which holds code.", "Save model.state_dict() instead.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(set(names)) != len(names):
            raise refused(path, "Its parts are compressed or doubled; torch writes none so.", "Write it by torch.save.")
        total = sum(entry.file_size for entry in entries)
        if total > size:
            raise refused(path, f"Its parts claim {total} bytes, and it has {size}.", "Write it by torch.save.")
        unchecked = not any(entry.CRC for entry in entries if entry.file_size)
        for entry in entries:
            if unchecked:
                entry.CRC = None  # type: ignore[assignment]  # as zipfile has it where there is none to compare
            if entry.filename.endswith(".pkl"):
                _look_through_pickle(archive, entry, path)
        bad = None if unchecked else archive.testzip()
        if bad is not None:
            raise refused(path, f"The bytes of its part {bad!r} are not those of its checksum.", _AGAIN)
    return unchecked


def _look_through_pickle(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    if entry.file_size > _LARGEST_PICKLE:
        raise refused(path, f"Its table has {entry.file_size} bytes.", "Save model.state_dict() alone.")
    reader = _reader(path)
    with archive.open(entry) as pickle:
        reader.read(pickle)
    folder = entry.filename.rpartition("/")[0]
    sizes = {one.filename: one.file_size for one in archive.infolist()}
    for key, claimed in reader.claimed.items():
        name = f"{folder}/data/{key}"
        if claimed > sizes.get(name, claimed):  # one that is missing is told by torch
            why = f"A tensor claims {claimed} bytes of its part {name!r}, which has {sizes[name]}."
            raise refused(path, why, _AGAIN)


def _reader(path: Path) -> Reader:
    def unknown(name: str) -> CheckpointError:
        named = ".".join(name[:160].split(" ", 1))
        return refused(
            path, f"It asks for {named}. That is no plain tensor, and unpickling it could run code.", _REMEDY
        )

    return Reader(lambda why: refused(path, why, "Save model.state_dict() alone."), _ALLOWED.__contains__, unknown)


def alone(tensor: Tensor) -> Tensor:
    """A tensor whose storage holds nothing else, as torch.save writes whole storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def state_dict_of(weights: Weights) -> dict[str, Tensor]:
    """All names, in a form that torch.save keeps small and tied."""
    lone = {name: alone(tensor) for name, tensor in weights.tensors.items()}
    return {**lone, **{name: lone[kept] for name, kept in weights.tied.items()}}


def write_torch(weights: Weights, file: Path) -> None:
    """A plain state dict, which ``torch.load(weights_only=True)`` reads."""
    torch.save(state_dict_of(weights), file)


# What Lightning wrote in 2.5: it brings older forms up to its own by this number, and knows nothing to change since then.
_LIGHTNING_FORM = "2.5.0"


def write_lightning(weights: Weights, file: Path) -> None:
    """What ``load_from_checkpoint`` asks for; there is no optimizer in it, so it is none to resume from."""
    whole = {
        "epoch": 0,
        "global_step": weights.step,
        "pytorch-lightning_version": _LIGHTNING_FORM,
        "state_dict": state_dict_of(weights),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    torch.save(whole, file)
