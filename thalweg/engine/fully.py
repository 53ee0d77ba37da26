"""A model whose parameters lie on ranks in parts, through torch's FSDP2: ``fully_shard`` by blocks.

FSDP2 gathers what a block needs, sums gradients to those who hold the parts, and frees what is whole again. Everything else
is ours: each rank's parts are views of its arena, so that updates, averages and norms work on flat memory as on one rank;
gradients are added to the arena as they come, and the sum is divided by the weight of the window, not by a number of ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thalweg.core import Layout, ModelError, Plan
from thalweg.device import Device
from thalweg.engine.blocks import repeated_blocks
from thalweg.engine.precision import gradient_dtype
from thalweg.engine.same import local_part, take_first_weights
from thalweg.optim import Arena, plain_name
from thalweg.optim.sharded_arena import ShardedArena
from thalweg.optim.shards import Shards, Touch
from thalweg.parallel import Grid

# What FSDP2 writes into modules: attributes, and hooks.
_NOTES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api_state_key")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class FullySharded:
    """A model in parts, from now on until ``release``.

    Args:
        model: whole, the same on all ranks, on its device.
        mesh: a DeviceMesh of one dimension, or of two: copies, and among which ranks each is cut.
        sums: what gradients are added up in; None: as the parameters are stored.
        exact: whether gradients are summed in the order of micro-batches, to the bits of one rank.
        touch: stands around each exchange, as for ``Shards``.

    What a loss does with weights outside of the layers that hold them is out of reach: they are parts there.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Any,
        *,
        sums: torch.dtype | None = None,
        exact: bool = False,
        touch: Touch = lambda what: nullcontext(),
    ) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model, self.mesh, self.exact, self.touch = model, mesh, exact, touch
        self.released = False
        self.others: list[int] = []  # ranks that began with other weights than the first
        self.idle = False  # whether what this rank adds to the sums is nothing
        named = dict(model.named_parameters())
        self.shapes = {plain_name(name): tuple(p.shape) for name, p in named.items()}
        self._before = [
            (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None
        ]
        self._types = {id(module): type(module) for module in model.modules()}
        self._keys = {id(module): set(module.__dict__) for module in model.modules()}
        self._strides = {id(p): p.stride() for p in named.values()}
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group(1)
        self.everyone = group
        replica = 0 if mesh.ndim == 1 else mesh.get_local_rank(0)
        self.replicas = None if mesh.ndim == 1 else mesh.get_group(0)
        self.shards = Shards(self.shapes, group, replica, touch)
        for p in named.values():
            p.data = p.data.contiguous()
        self.units: list[Any] = list(units(model))
        for module in self.units:
            wide = sums if sums is not None and any(p.dtype != sums for p in module.parameters()) else None
            fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, mp_policy=_policy(wide))
        for _, _, p in self._before:
            p.data = p.data.new_empty(0)  # the whole is nobody's from here on
        self.root: Any = model
        for module in self.units:
            self._sum_with(module)
        self.names = {id(p): plain_name(name) for name, p in model.named_parameters()}
        self._where = {(id(module), key): self.names[id(module._parameters[key])] for module, key, _ in self._before}
        self._views: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ parts in arenas

    def parts(self) -> list[tuple[str, nn.Parameter]]:
        """(plain name, this rank's part) of what is trained, for arenas to take over."""
        return [
            (self.names[id(p)], nn.Parameter(local_part(p).detach()))
            for p in self.model.parameters()
            if p.requires_grad
        ]

    def arena(self, named: Sequence[tuple[str, nn.Parameter]], treatments: Any, how: Any) -> ShardedArena:
        return ShardedArena(named, treatments, how, self.shards)

    def take(self, arenas: Sequence[Arena]) -> None:
        """The parts are those of the arenas: what FSDP2 gathers is what updates move, and gradients come into their buffers."""
        for one in self._params():
            name = self.names[id(one.sharded_param)]
            arena = next((arena for arena in arenas if name in arena.places), None)
            if arena is None:
                continue  # not trained
            start = arena.places[name][0]
            one._sharded_param_data = arena.params[start : start + self.shards.pieces[name].room]
            one.sharded_param._local_tensor = arena.view(arena.params, name)
            self._views[name] = arena.view(arena.grads, name).view(-1)

    def _params(self) -> Iterator[Any]:
        for module in self.units:
            for group in _groups(module):
                yield from group.fsdp_params

    # ------------------------------------------------------------------ passes

    def synchronize(self, now: bool) -> None:
        """Whether the next backward pass sums gradients over ranks, or keeps them until a later one does."""
        self.root.set_requires_gradient_sync(now)

    def drop(self) -> None:
        """Forget the gradients that backward passes have kept."""
        for one in self._params():
            one.unsharded_accumulated_grad = None
            if hasattr(one, "_unsharded_param"):
                one._unsharded_param.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all parameters are whole on every rank, and passes gather nothing: ranks may run as many as they like.

        All ranks enter and leave it together.
        """
        for module in self.units:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self.units:
                module.set_reshard_after_forward(module is not self.model, recurse=False)
                module.reshard()

    def _sum_with(self, module: Any) -> None:
        summing = _Sum(self)
        module.set_custom_all_gather(_Gather(self))
        module.set_custom_reduce_scatter(summing)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)
        for group in _groups(module):
            for one in group.fsdp_params:
                if one.sharded_param.requires_grad:
                    one.sharded_param.register_post_accumulate_grad_hook(partial(self._deliver, summing))

    def _deliver(self, summing: _Sum, p: Any) -> None:
        """The sum of a parameter's gradients, of this rank's part, is there."""
        name = self.names[id(p)]
        if not summing.given:  # autograd itself brings it: FSDP2 has not gathered this parameter where it was read
            raise read_in_parts(f"'{name}' gets a gradient that no pass of its layer has made.")
        view, room = self._views[name], self.shards.pieces[name].room
        for given in summing.given:
            view.add_(given[summing.at : summing.at + view.numel()])
        summing.at += room
        p.grad = None
        if summing.at == summing.given[0].numel():  # that was the last one
            summing.given = []

    # ------------------------------------------------------------------ the end

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name, this rank's part of what is cut; the rest as it is."""
        return {name: local_part(t) for name, t in tensors.items()}

    @torch.no_grad()
    def release(self, *, together: bool = True) -> None:
        """The model has its own parameters again, and FSDP2 has left it.

        Args:
            together: all ranks are here: parameters are whole on each of them. If not, as after an error, they are NaN.
        """
        if self.released:
            return
        self.released = True
        from torch.distributed._composable_state import _module_state_mapping

        own = {self._where[id(module), key]: p for module, key, p in self._before}
        for one in self._params():
            name = self.names[id(one.sharded_param)]
            p, shape = own[name], self.shapes[name]
            p.data = torch.empty_strided(shape, self._strides[id(p)], dtype=p.dtype, device=p.device)
            found = self.shards.whole(name, local_part(one.sharded_param), all_ranks=True) if together else None
            p.data.fill_(math.nan) if found is None else p.data.copy_(found)
            p.grad = None
        for module, key, p in self._before:
            module._parameters[key] = p
        for module in self.model.modules():
            module.__class__ = self._types[id(module)]
            for hooks in _HOOKS:
                _without_fsdp(module, hooks)
            for key in set(module.__dict__) - self._keys[id(module)]:
                if key.startswith(_NOTES):
                    del module.__dict__[key]
            _module_state_mapping.pop(module, None)


def cut(model: nn.Module, plan: Plan, device: Device, ranks: Any) -> FullySharded:
    """The model in parts, as the plan's layout says, of the first rank's weights.

    Args:
        ranks: those of the run; every one calls this.
    """
    recipe = plan.recipe
    mesh = Grid(ranks, Layout(**plan.layout), device).sharding
    others = take_first_weights(model, ranks)
    made = FullySharded(model, mesh, sums=gradient_dtype(recipe), exact=recipe.exact_reduce, touch=ranks.in_touch)
    made.others = others
    return made


def read_in_parts(numbers: str) -> ModelError:
    return ModelError(
        "A weight is read outside of the layers that hold it, where it lies in parts.",
        numbers,
        "Read weights in the forward pass of their own layer; or use parallel='ddp'.",
    )


class _Gather:
    """FSDP2's way to gather a block's parameters."""

    def __init__(self, sharded: FullySharded) -> None:
        self.sharded = sharded

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with self.sharded.touch("the parameters of a block"):
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum:
    """FSDP2's way to sum a block's gradients over ranks, each getting the sum of its part.

    Attributes:
        given: what is to be added to the gradients, part after part; at: how far it has been handed on.
    """

    def __init__(self, sharded: FullySharded) -> None:
        self.sharded = sharded
        self.given: list[Tensor] = []
        self.at = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        if self.sharded.idle:
            input_tensor.zero_()
        self.at = 0
        with self.sharded.touch("the sum of gradients"):
            self._sum(output_tensor, input_tensor, group)

    def _sum(self, output_tensor: Tensor, input_tensor: Tensor, group: Any) -> None:
        if not self.sharded.exact:
            _reduce_scatter(output_tensor, input_tensor, group=group)
            self.given = [output_tensor]
            return
        world = dist.get_world_size(group)
        found = torch.empty_like(input_tensor)
        dist.all_to_all_single(found, input_tensor, group=group)
        if self.sharded.replicas is not None:
            copies = dist.get_world_size(self.sharded.replicas)
            all_found = found.new_empty(copies * found.numel())
            _all_gather(all_found, found, group=self.sharded.replicas)
            found, world = all_found, copies * world
        self.given = list(found.view(world, -1).unbind())
        output_tensor.zero_()


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once, from the inside out: layers of another dtype than what is around them, blocks, and the rest.

    A block that shares a parameter with something outside of it is left to the rest.
    """
    blocks = list(repeated_blocks(model).values())
    parts: list[Any] = [*blocks, _Rest(model, blocks)]
    uses = Counter(id(p) for part in parts for p in {id(p): p for p in part.parameters()}.values())
    blocks = [block for block in blocks if all(uses[id(p)] == 1 for p in block.parameters())]
    found: list[nn.Module] = []
    for unit in [*blocks, model]:
        taken = {id(p) for other in found for p in other.parameters()}
        sizes: Counter[torch.dtype] = Counter()
        for p in unit.parameters():
            sizes[p.dtype] += 0 if id(p) in taken else p.numel()
        for dtype in sorted(sizes, key=lambda d: sizes[d])[:-1]:
            for module in unit.modules():
                own = [p for p in module.parameters(recurse=False) if id(p) not in taken]
                if own and own[0].dtype == dtype:
                    found.append(module)
        found.append(unit)
    return found


class _Rest:
    """The parameters of a model that lie outside of its blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.inside = model, {id(m) for block in blocks for m in block.modules()}

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self.model.modules():
            if id(module) not in self.inside:
                yield from module.parameters(recurse=False)


def _all_gather(found: Tensor, given: Tensor, group: Any, async_op: bool = False) -> Any:
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
    return gather(found, given, group=group, async_op=async_op)


def _reduce_scatter(found: Tensor, given: Tensor, group: Any) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(found, given, group=group)


def _groups(module: Any) -> list[Any]:
    """FSDP2's groups of parameters of a module; one before torch 2.12."""
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)
    return list(found) if found is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _policy(sums: torch.dtype | None) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(reduce_dtype=sums, cast_forward_inputs=False)


def _without_fsdp(module: nn.Module, hooks: str) -> None:
    kept = module.__dict__[hooks]
    for key, hook in list(kept.items()):
        function = getattr(hook, "hook", hook)
        if (getattr(function, "__module__", "") or "").startswith("torch.distributed.fsdp"):
            del kept[key]
            for more in (
                "_forward_pre_hooks_with_kwargs",
                "_forward_hooks_with_kwargs",
                "_forward_hooks_always_called",
            ):
                module.__dict__.get(more, {}).pop(key, None)
