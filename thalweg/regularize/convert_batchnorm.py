"""Another kind of batch normalization for models that somebody else built: same weights, buffers, names and objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from thalweg.core import ModelError, did_you_mean
from thalweg.regularize.changes import Change
from thalweg.regularize.ghost import GhostBatchNorm, check_size
from thalweg.regularize.synced import SyncedBatchNorm
from thalweg.regularize.tracking import AnyBatchNorm, FrozenBatchNorm, mixed

KINDS = ("ghost", "synced", "frozen", "torch", "group")


def convert_batchnorm(
    model: nn.Module, to: str, *, size: int | None = None, groups: int | None = None, affine: bool = False
) -> list[Change]:
    """Make every batch-normalization layer of a model another kind, in place.

    The layers stay the same objects, but for ``to="group"``: an optimizer, hooks, tied layers and a state_dict that know them
    stay right. Weights, buffers, dtype and training mode stay; ``isinstance(layer, nn.BatchNorm2d)`` stays true.

    Args:
        to: "ghost" (``GhostBatchNorm``, needs ``size``), "synced" (``SyncedBatchNorm``), "frozen" (``FrozenBatchNorm``),
            "torch" (back to torch's own class, in the model's training mode), or "group" (a new ``nn.GroupNorm`` with the
            same gains and biases, needs ``groups``; it has no running statistics, so **the model's function changes**).
        size: samples of a ghost batch, from 1 on.
        groups: groups of channels, which every layer's channels must be a multiple of.
        affine: for "frozen": gains and biases are not trained either (``requires_grad`` becomes False).

    Returns:
        What was changed, by name; a layer that is so already is not in it.

    Raises:
        ModelError: for a kind, size or groups that cannot be, and for layers that cannot be converted: those with a
            forward pass of their own (all but "frozen"), not yet initialised ones, and frozen ones without statistics.
            Nothing has been changed then.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    >>> [str(change) for change in convert_batchnorm(model, to="ghost", size=32)]
    ['1: BatchNorm2d -> GhostBatchNorm2d(size=32)']
    """
    _check_options(to, size, groups, affine)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    if to == "group":
        return _to_group(model, layers, groups)
    planned = [(name, layer, _class_for(layer, name, to)) for name, layer in layers]
    changes: list[Change] = []
    for name, layer, wanted in planned:
        before = _said(layer)
        _become(layer, wanted, size, training=model.training)
        if affine:
            for own in layer.parameters(recurse=False):
                own.requires_grad_(False)
        if _said(layer) != before:
            changes.append(Change(name, before, _said(layer)))
    return changes


def freeze_batchnorm(model: nn.Module, *, affine: bool = False) -> list[Change]:
    """Normalise by the running statistics and keep them, also after ``model.train()``, as for fine-tuning.

    Args:
        affine: gains and biases are not trained either.

    Returns:
        What was changed; ``convert_batchnorm(model, to="torch")`` thaws the statistics again.

    Raises:
        ModelError: for a layer without running statistics.
    """
    return convert_batchnorm(model, to="frozen", affine=affine)


def _check_options(to: str, size: int | None, groups: int | None, affine: bool) -> None:
    if to not in KINDS:
        raise ModelError(f"There is no batch normalization {to!r}.", did_you_mean(to, KINDS), "Use one of these.")
    if to == "ghost":
        check_size(size)
    for name, given, kind in (
        ("size", size, "ghost"),
        ("groups", groups, "group"),
        ("affine", affine or None, "frozen"),
    ):
        if given is not None and to != kind:
            raise ModelError(
                f"{name}={given!r} does nothing with to={to!r}.",
                f"It is an option of to={kind!r} alone.",
                f"Leave {name} out, or convert to {kind!r}.",
            )


def _class_for(layer: Any, name: str, to: str) -> Any:
    """The class that a layer gets."""
    kind = _kind_of(layer)
    own_pass = kind.forward is not _BatchNorm.forward and kind is not nn.SyncBatchNorm
    if isinstance(layer, LazyModuleMixin):
        raise _cannot(name, layer, "its number of channels is not known yet", "Run the model on one batch first.")
    if to == "frozen":
        if layer.running_mean is None:
            remedy = "Build it with track_running_stats=True."
            raise _cannot(name, layer, "it has no running statistics to keep", remedy)
        return mixed(FrozenBatchNorm, _BatchNorm if kind is nn.SyncBatchNorm else kind)
    if to == "torch":
        if kind is _BatchNorm:
            remedy = "Build the model with nn.BatchNorm1d, 2d or 3d."
            raise _cannot(name, layer, "it was built for any number of dimensions, and torch has no such class", remedy)
        return kind
    if own_pass:
        remedy = 'Give the model plain BatchNorm layers, or use to="frozen", which keeps that forward pass.'
        raise _cannot(name, layer, "its class has a forward pass of its own, which would be lost", remedy)
    part = GhostBatchNorm if to == "ghost" else SyncedBatchNorm
    # DistributedDataParallel refuses subclasses of torch's SyncBatchNorm on the CPU.
    return mixed(part, _BatchNorm if kind is nn.SyncBatchNorm else kind)


def _kind_of(layer: Any) -> Any:
    """Torch's class, or another's, that a layer had before it became one of ours."""
    return (layer.kind or _BatchNorm) if isinstance(layer, AnyBatchNorm) else type(layer)


def _become(layer: Any, wanted: Any, size: int | None, *, training: bool) -> None:
    thawed = isinstance(layer, FrozenBatchNorm) and not issubclass(wanted, FrozenBatchNorm)
    layer.__class__ = wanted
    layer.__dict__.pop("size", None)
    if issubclass(wanted, GhostBatchNorm):
        layer.size = size
    if issubclass(wanted, FrozenBatchNorm):
        layer.training = False
    elif thawed:
        layer.training = training


def _said(layer: Any) -> str:
    """A layer in a word, with what it is told beyond torch's own options."""
    name = type(layer).__name__
    if isinstance(layer, GhostBatchNorm):
        return f"{name}(size={layer.size})"
    held = isinstance(layer, FrozenBatchNorm) and layer.affine
    return f"{name}(affine too)" if held and not any(p.requires_grad for p in layer.parameters(recurse=False)) else name


def _to_group(model: nn.Module, layers: list[tuple[str, Any]], groups: int | None) -> list[Change]:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ModelError(
            f"groups={groups!r} is no number of groups.",
            "It counts the groups of channels that are normalised together.",
            "Give a whole number from 1 on, such as 8.",
        )
    for name, layer in layers:
        if name == "":
            raise _cannot(name, layer, "it is the model itself", "Put it in a model, or build an nn.GroupNorm.")
        if _kind_of(layer).forward is not _BatchNorm.forward and not isinstance(layer, nn.SyncBatchNorm):
            raise _cannot(name, layer, "its class has a forward pass of its own", "Use plain BatchNorm layers.")
        if isinstance(layer, LazyModuleMixin) or layer.num_features % groups:
            remedy = "Give a number that divides the channels of all layers."
            raise _cannot(name, layer, f"{layer.num_features} channels are no multiple of groups={groups}", remedy)
    made = {id(layer): _group_norm(layer, groups) for _, layer in layers}
    for parent, place, layer in list(_places(model)):
        parent._modules[place] = made[id(layer)]
    after = f"GroupNorm(groups={groups}; another function)"
    return [Change(name, _said(layer), after) for name, layer in layers]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Where the layers hang, every place of a shared one."""
    for parent in model.modules():
        for place, child in parent._modules.items():
            if isinstance(child, _BatchNorm):
                yield parent, place, child


def _group_norm(layer: Any, groups: int) -> nn.GroupNorm:
    made = nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=False)
    made.affine, made.training = layer.affine, layer.training
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _cannot(name: str, layer: Any, why: str, remedy: str) -> ModelError:
    return ModelError(f"Layer '{name}' cannot be converted.", f"It is a {type(layer).__name__}: {why}.", remedy)
