"""A run on ranks: which micro-batch is whose, what has to be equal before step 1, and what cannot be on ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.checkpoint import Snapshot
from thalweg.core import Layout, ModelError, RanksError, Recipe, RecipeError, divisors
from thalweg.core.parallel import told as in_words
from thalweg.device import Device
from thalweg.engine.preflight import ModelLoss, as_written, untouched
from thalweg.engine.same import digest_of
from thalweg.engine.state import State
from thalweg.parallel import ALONE, Ranks, check_equal
from thalweg.regularize import SyncedBatchNorm
from thalweg.regularize.moments import num_ranks


@dataclass(frozen=True)
class Place:
    """Names the micro-batches of a rank as one process would: rank ``rank`` has every ``world``-th of a window.

    >>> place = Place(rank=1, world=2, micro_batch=8)
    >>> place.of(0, 0, 0), place.of(1, 8, 1)  # its first and its second micro-batch are number 1 and number 3
    ((1, 8), (3, 24))
    >>> place.of(2, 8, 1, portions=2)  # where memory has cut each into two, the third portion here is number 6 of all
    (6, 24)
    """

    rank: int
    world: int
    micro_batch: int

    def of(self, index: int, first: int, micro: int, portions: int = 1) -> tuple[int, int]:
        """(number, first sample) in the whole window of what is number ``index`` here, from sample ``first`` on.

        Args:
            micro: which of this rank's micro-batches it lies in.
            portions: into how many a whole micro-batch is cut.
        """
        others = self.rank + micro * (self.world - 1)  # micro-batches of other ranks before it
        return index + others * portions, first + others * self.micro_batch


def micro_batch_of(recipe: Recipe, world: int) -> int:
    """The largest micro-batch of which a window has one for each rank.

    Raises:
        RecipeError: if there is none.
    """
    fitting = [size for size in divisors(recipe.train.batch) if recipe.train.batch // size >= world]
    if not fitting:
        raise too_many(recipe, world)
    return max(fitting)


def check_ranks(recipe: Recipe, world: int) -> None:
    """Refuse what cannot be on several ranks.

    Raises:
        RecipeError: naming the micro-batches that work.
    """
    passes = recipe.optimizer.release_gradients
    if passes not in (None, "off"):
        raise RecipeError(
            f"optimizer.release_gradients='{passes}' is not possible on {world} ranks.",
            "A gradient is used and freed in the backward pass of one rank, before it can be added to those of the others.",
            "Give optimizer.release_gradients='off', or train on one rank.",
        )
    micro = recipe.train.micro_batch
    if isinstance(micro, int) and -(-recipe.train.batch // micro) < world:
        raise too_many(recipe, world)


def too_many(recipe: Recipe, world: int) -> RecipeError:
    batch, micro = recipe.train.batch, recipe.train.micro_batch
    fitting = [size for size in divisors(batch) if batch // size >= world]
    num = -(-batch // micro) if isinstance(micro, int) else batch
    remedy = (
        f"Give train.micro_batch, one of {', '.join(map(str, fitting))}" if fitting else "Give a larger train.batch"
    )
    return RecipeError(
        f"There are more ranks than micro-batches: {world} ranks.",
        f"train.batch={batch}, train.micro_batch={micro}: a window has {num} of them, and each is computed by one rank.",
        f"{remedy}; or start at most {num} ranks.",
    )


def ranks_of_step(given: Ranks | None) -> Ranks:
    """Who trains by a ``TrainStep``.

    Raises:
        RanksError: where there are several processes, and it was not told.
    """
    if given is not None:
        return given
    there = num_ranks()
    if there > 1:
        raise RanksError(
            f"TrainStep was not told of the {there} ranks that there are.",
            "torch.distributed is initialised, and by itself each rank would train a model of its own.",
            "Give ranks=thalweg.parallel.join(), and every rank the same batch; or ranks=thalweg.parallel.ALONE.",
        )
    return ALONE


def check_ranks_of_step(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what a ``TrainStep`` cannot do on several ranks.

    Raises:
        RecipeError: naming it.
        RanksError: where ranks have other recipes.
    """
    check_equal(ranks, "another recipe", recipe.to_toml().splitlines(), "Give every rank the same recipe.")
    if recipe.train.micro_batch == "auto" or recipe.memory_budget is not None:
        asked = "memory_budget" if recipe.memory_budget is not None else "train.micro_batch='auto'"
        raise RecipeError(
            f"{asked} is out of TrainStep's reach on {ranks.world} ranks.",
            "It is chosen by what one process has room for.",
            "Give train.micro_batch, or use thalweg.train.",
        )
    if recipe.parallel not in ("auto", "ddp") and recipe.parallel != {"data": ranks.world}:
        raise RecipeError(
            f"parallel={in_words(recipe.parallel)} is out of TrainStep's reach.",
            f"Each of the {ranks.world} ranks holds the whole model there.",
            "Leave parallel out, or use thalweg.train.",
        )
    if recipe.optimizer.release_gradients not in (None, "off"):
        check_ranks(recipe, ranks.world)


def has_shards(model: nn.Module) -> bool:
    """Whether parameters are DTensors: no rank has the whole model then."""
    return any(hasattr(p, "placements") for p in model.parameters())


def check_layers(model: nn.Module, world: int) -> None:
    """Refuse layers that look beyond their micro-batch.

    Raises:
        ModelError: naming them.
    """
    synced = [name for name, layer in model.named_modules() if isinstance(layer, (SyncedBatchNorm, nn.SyncBatchNorm))]
    if synced:
        raise ModelError(
            f"Synchronised batch normalization is not possible on {world} ranks of a run.",
            f"{len(synced)} layers, such as '{synced[0]}': what a micro-batch is normalised by would hang on how many ranks "
            "there are.",
            "Use plain BatchNorm: its running statistics are pooled over all micro-batches of all ranks.",
        )


def check_parts(model: nn.Module, recipe: Recipe) -> None:
    """Refuse what needs weights whole where they lie on ranks in parts.

    Raises:
        RecipeError: for penalties on weights. ModelError: for parameters that cannot be cut, naming them.
    """
    if recipe.regularize.penalties:
        raise RecipeError(
            f"regularize.penalties ({', '.join(recipe.regularize.penalties)}) are not possible where parameters lie in parts.",
            "They read weights outside of the layers that gather them.",
            "Use parallel='ddp'; decay of weights (optimizer.weight_decay) is possible with parts.",
        )
    numbers = [name for name, p in model.named_parameters() if not p.ndim]
    if numbers:
        raise ModelError(
            "Parameters that are single numbers cannot be cut into parts.",
            f"{len(numbers)} of {sum(1 for _ in model.parameters())}, such as '{numbers[0]}', have no dimension.",
            "Give them the shape (1,), or use parallel='ddp'.",
        )
    mixed = [
        name
        for name, module in model.named_modules()
        if len({p.dtype for p in module.parameters(recurse=False) if p.requires_grad}) > 1
    ]
    if mixed:
        raise ModelError(
            "Parameters of one layer that are of different dtypes cannot be gathered together.",
            f"{len(mixed)} layers, such as '{mixed[0]}'.",
            "Give each layer one dtype, or use parallel='ddp'.",
        )


def tell_parts(recipe: Recipe, layout: Layout, take: Callable[[str, Any, str], Any]) -> None:
    """Say what parameters that lie in parts are gathered as, and what is held besides."""
    micro = recipe.train.micro_batch
    mine = -(-recipe.train.batch // (micro * layout.feeds)) if isinstance(micro, int) else 1
    more = ""
    if mine > 1 and not recipe.exact_reduce:
        more = f"; gradients are summed once a step, so a rank holds its own whole ones through {mine} micro-batches"
    take(
        "parts",
        f"1/{layout.shard} a rank",
        f"of parameters, gradients, slots and averages; parameters are gathered block by block in the dtype that they are stored "
        f"in, whatever passes compute in: the bits of one rank{more}",
    )


def check_buffers(model: nn.Module, loss: ModelLoss, batch: Any, device: Device, recipe: Recipe, world: int) -> None:
    """Refuse buffers that ranks would each move their own way.

    Raises:
        ModelError: naming them.
    """
    pooled = {id(b) for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)}
    others = [(name, b) for name, b in model.named_buffers() if id(b) not in pooled]
    watched = [*others, *model.named_parameters()]  # such as nn.Embedding(max_norm=...) writes into
    with untouched(model, device, recipe.seed), torch.no_grad(), as_written():
        before = [(id(t), t._version) for _, t in watched]
        loss(model, batch)
        now = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        moved = [name for (name, _), was in zip(watched, before) if (id(now[name]), now[name]._version) != was]
    if moved:
        raise ModelError(
            f"The forward pass moves a buffer or a weight, and {world} ranks would each move it their own way.",
            f"{len(moved)} of them, such as '{moved[0]}'.",
            "Train on one rank, or use a layer that writes into none: nn.Embedding without max_norm, for example.",
        )


def settle_micro_batch(recipe: Recipe, world: int) -> tuple[Recipe, str]:
    """The recipe with a micro-batch for each rank where it names none, and the reason; "" where nothing was settled."""
    train = recipe.train
    if train.micro_batch is not None or recipe.memory_budget is not None:
        return recipe, ""
    size = micro_batch_of(recipe, world)
    return replace(recipe, train=replace(train, micro_batch=size)), f"the largest with one for each of {world} ranks"


def take_state(state: State, snapshot: Snapshot | None, ranks: Ranks) -> tuple[Snapshot | None, list[str]]:
    """The state that a run goes on from, on all ranks; what the first has read of a checkpoint, or None.

    Returns:
        As ``same_state``.
    """
    if state.spread is None or state.fully is None:
        ranks.together(lambda: None if snapshot is None else state.load(snapshot))
        return same_state(state, snapshot, ranks)
    parts = state.spread.parts(snapshot)
    if parts is None:
        return None, _others_began_with_other_weights(state.fully.others)
    mine = parts
    ranks.together(lambda: state.load(mine))
    for limit in state.limits():
        limit.most = 0  # all ranks go through as many passes
    groups = {stem: dict(t) for stem, t in parts.groups.items() if stem not in ("weights", "state", "average")}
    return Snapshot(groups, parts.facts), []


def _others_began_with_other_weights(others: list[int]) -> list[str]:
    names = ", ".join(map(str, others))
    return [f"Ranks {names} began with other weights; those of rank 0 are taken."] if others else []


def same_state(state: State, snapshot: Snapshot | None, ranks: Ranks) -> tuple[Snapshot | None, list[str]]:
    """Every rank holds the first rank's state, to the bit.

    The first rank has read and verified the checkpoint; the others get the tensors from it and not from the disk: they need
    not see its folder, and what was verified is what all go on with.

    Returns:
        The snapshot's facts and what the loop keeps beside the state, such as the best weights, on all ranks; what to tell of
        ranks that began with other weights.

    Raises:
        RanksError: if a rank's state is another afterwards.
    """
    if ranks.world == 1:
        return snapshot, []
    told = []
    if ranks.from_first(snapshot is None):
        begun = ranks.told(digest(state))
        others = [rank for rank, one in enumerate(begun) if one != begun[0]]
        told = _others_began_with_other_weights(others)
    most = [limit.most for limit in state.limits()]
    state.step, most = ranks.from_first((state.step, most))
    for limit, value in zip(state.limits(), most):
        limit.most = value
    ranks.copy(state.tensors())
    state.t.copy_(state.applied[0] + 1)
    check_same(state, ranks)
    kept = None
    if snapshot is not None:
        groups = {stem: dict(t) for stem, t in snapshot.groups.items() if stem not in ("weights", "state", "average")}
        kept = dict(snapshot.facts), groups
    kept = ranks.from_first(kept)
    return None if kept is None else Snapshot(kept[1], kept[0]), told


def digest(state: State) -> str:
    """SHA-256 over every tensor of a state."""
    return digest_of(state.tensors())


def checksum(state: State) -> str:
    """A sum over every tensor of a state, made where it lies: a tensor or two that differ show, and nothing is copied."""
    sums = [_sum(tensor.detach()) for tensor in state.tensors() if tensor.numel()]
    return f"{hash(tuple(sums)) & (1 << 64) - 1:016x}"


def _sum(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32):
        if flat.numel() % dtype.itemsize == 0 and flat.storage_offset() % dtype.itemsize == 0:
            return int(flat.view(dtype).sum(dtype=torch.int64))
    return int(flat.sum(dtype=torch.int64))


def check_same(state: State, ranks: Ranks, digest: Callable[[State], str] = digest) -> None:
    """
    Raises:
        RanksError: if a rank holds another state than the first.
    """
    found = ranks.told(digest(state))
    others = [rank for rank, one in enumerate(found) if one != found[0]]
    if others:
        raise RanksError(
            f"Ranks hold other states after step {state.step}.",
            f"Rank 0 has {found[0][:12]}, rank {others[0]} {found[others[0]][:12]}.",
            "The model or the loss does other things on other ranks: let it not ask which rank it is on.",
        )
