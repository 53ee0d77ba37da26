"""Other people's dropout layers into ours, and the list of those that stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from thalweg.core import ModelError
from thalweg.regularize.changes import Change
from thalweg.regularize.dropout import (
    AlphaDropout,
    Drop,
    Dropout,
    FeatureAlphaDropout,
    SpatialDropout,
    StochasticDepth,
    check_rate,
)

_TORCH: dict[type[nn.Module], type[Drop]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: SpatialDropout,
    nn.Dropout2d: SpatialDropout,
    nn.Dropout3d: SpatialDropout,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}


def convert_dropout(model: nn.Module) -> list[Change]:
    """Replace torch's dropout layers, timm's DropPath and torchvision's StochasticDepth by ours, in place.

    Names, rates, training flags, hooks and sharing stay; evaluation gives the same bits. What is not a layer of these kinds
    stays too: ``not_converted`` lists what can be seen of it.

    Args:
        model: its layers are replaced inside it. Samples must come first in what they are given; torch's dropout of
            channels takes a single sample without that dimension, ours does not.

    Returns:
        What was replaced, in the model's order; a layer with two names has two lines.

    Raises:
        ModelError: if a rate is 1, or the model itself is such a layer; nothing is changed then.

    >>> for change in convert_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))):
    ...     print(change)
    1: Dropout(p=0.1, inplace=False) -> thalweg Dropout(p=0.1)
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        ours = _ours(name, module)
        if ours is None:
            continue
        if module is model:
            raise ModelError(
                f"The model itself is a {type(module).__name__}, which cannot be replaced in place.",
                "It has no parent.",
                f"Use thalweg.regularize.{ours} instead.",
            )
        made[module] = ours
    changes = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made[module])
            changes.append(Change(name, _shown(module), f"thalweg {made[module]}"))
    return changes


def _ours(name: str, module: nn.Module) -> Drop | None:
    """Our layer for another's, with its flags and hooks; None: it is no such layer."""
    ours: Drop
    if type(module) in _TORCH:
        rate = _rate(name, module, "p")
        ours = _TORCH[type(module)](rate)
    elif _is_drop_path(module):
        ours = StochasticDepth(_rate(name, module, "drop_prob"))
    elif _is_stochastic_depth(module):
        mode: Any = module.mode
        ours = StochasticDepth(_rate(name, module, "p"), mode)
    else:
        return None
    ours.training = module.training
    ours.__dict__.update({key: value for key, value in module.__dict__.items() if "hook" in key})
    return ours


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath" and hasattr(module, "drop_prob") and _scales(module)


def _is_stochastic_depth(module: nn.Module) -> bool:
    kind = type(module).__name__ == "StochasticDepth" and not isinstance(module, Drop)
    return kind and hasattr(module, "p") and getattr(module, "mode", None) in ("row", "batch")


def _scales(module: nn.Module) -> bool:
    return getattr(module, "scale_by_keep", True) is True


def _rate(name: str, module: nn.Module, attribute: str) -> float:
    rate = getattr(module, attribute)
    try:
        return check_rate(type(module).__name__, 0.0 if rate is None else rate)
    except ModelError as err:
        raise ModelError(f"'{name}' cannot be converted: {err.asked}", err.numbers, err.remedy) from None


def _shown(module: nn.Module) -> str:
    return repr(module) if type(module) in _TORCH else f"{type(module).__name__}({module.extra_repr()})"


def not_converted(model: nn.Module) -> list[str]:
    """Modules whose dropout ``convert_dropout`` leaves to torch's generators, one line each: its name and why.

    Found are other classes of dropout with a rate above 0 (subclasses of torch's, any class with "Drop" in its name), and
    modules that hold a rate as a number to use inside: nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN, and whatever has a
    number above 0 in an attribute with "drop" in its name. A call of F.dropout with a rate of its own cannot be seen.

    >>> not_converted(nn.LSTM(4, 4, num_layers=2, dropout=0.5))
    ["'': LSTM has dropout=0.5 inside"]
    """
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Drop) or type(module) in _TORCH or _is_drop_path(module) or _is_stochastic_depth(module):
            continue
        rates = {key: value for key, value in vars(module).items() if _is_rate(key, value)}
        if isinstance(module, _DropoutNd) or "Drop" in kind:
            rates |= {key: value for key, value in vars(module).items() if key in ("p", "prob") and _above_0(value)}
        if getattr(module, "fused_attn", False) is True:  # timm hands the layer's rate to torch's fused attention
            rates |= {key: layer.p for key, layer in module.named_children() if _drops(key, layer)}
        if rates:
            inside = ", ".join(f"{key}={value:g}" for key, value in rates.items())
            found.append(f"'{name}': {kind} has {inside} inside")
    return found


def _is_rate(key: str, value: object) -> bool:
    return "drop" in key.lower() and _above_0(value)


def _above_0(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _drops(key: str, layer: nn.Module) -> bool:
    return key == "attn_drop" and _above_0(getattr(layer, "p", 0))
