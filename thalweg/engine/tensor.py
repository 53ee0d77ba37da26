"""A model whose layers several ranks compute together, through torch's ``parallelize_module``.

Parts of weights lie in the rank's arenas, as whole ones do; what is not cut is whole on each rank, which all compute the same with
it. Gradients of parts need no sum over these ranks; those of whole parameters are equal on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.core import Layout, ModelError, Plan
from thalweg.device import Device
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.preflight import ModelLoss, as_written, untouched
from thalweg.engine.same import local_part, take_first_weights
from thalweg.engine.tensor_plan import Cut, CutPiece, tensor_cuts
from thalweg.optim import Arena, make_arenas, named_trainable, plain_name
from thalweg.optim.arena import How
from thalweg.optim.shards import Touch
from thalweg.parallel import Feeds, Grid
from thalweg.precision import Policy

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_WITH = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_CLOSE, _CLOSE_IN_HALF = 1e-4, 3e-2  # of what is whole and what is in parts


class Parts:
    """Which part of each cut parameter is this rank's; as ``Shards`` is for parameters that are sharded by rows."""

    def __init__(self, pieces: Mapping[str, CutPiece], group: Any, touch: Touch = lambda what: nullcontext()) -> None:
        self.pieces, self.group, self.replica, self.touch = dict(pieces), group, 0, touch
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def mine(self, name: str, whole: Tensor) -> Tensor:
        return self.pieces[name].mine(whole, self.rank)

    def whole(self, name: str, part: Tensor, *, all_ranks: bool = False) -> Tensor | None:
        """The whole of what ``part`` is this rank's part of: on the first rank of the group, or on all; elsewhere None."""
        sent, got = part.contiguous(), all_ranks or self.rank == 0
        parts = [torch.empty_like(sent) for _ in range(self.world)] if got else None
        with self.touch("the parts of a tensor"):
            if all_ranks:
                dist.all_gather(parts, sent, group=self.group)
            else:
                dist.gather(sent, parts, group=self.group, group_dst=0)
        return None if parts is None else self.pieces[name].together(parts)

    def total(self, value: Tensor) -> Tensor:
        """The sum of what the ranks of the group have found in their parts."""
        found = value.clone()
        with self.touch("a sum over parts"):
            dist.all_reduce(found, group=self.group)
        return found


class TensorParallel:
    """A model with cut layers, from now on until ``release``.

    Args:
        model: whole, the same on all ranks, on its device.
        cuts: which layers.
        grid: how the ranks stand.
        touch: as for ``Shards``.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[Cut], grid: Grid, touch: Touch) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        from torch.distributed.tensor.placement_types import Replicate

        self.model, self.grid = model, grid
        self.others: list[int] = []  # ranks that began with other weights than the first
        self.released = False
        modules, world = dict(model.named_modules()), grid.layout.tensor
        self._before = [
            (module, key, p) for module in model.modules() for key, p in module._parameters.items() if p is not None
        ]
        self._kept = {(id(m), hooks): set(m.__dict__[hooks]) for m in model.modules() for hooks in _HOOKS}
        self._strides = {id(p): (p.shape, p.stride()) for _, _, p in self._before}
        pieces: dict[str, CutPiece] = {}
        styles: dict[str, Any] = {}
        for cut in cuts:
            layer: Any = modules[cut.name]
            for key in ("weight", "bias") if layer.bias is not None and cut.dim == 0 else ("weight",):
                p = getattr(layer, key)
                piece = pieces[plain_name(f"{cut.name}.{key}")] = CutPiece(tuple(p.shape), world, cut.dim, cut.packs)
                if cut.packs > 1:  # torch cuts in runs: each rank's rows come one after another
                    p.data = torch.cat([piece.mine(p.data, rank) for rank in range(world)])
            styles[cut.name] = RowwiseParallel() if cut.dim else ColwiseParallel()
            if cut.gathers:
                styles[cut.name] = ColwiseParallel(output_layouts=Replicate())
        self._own = {
            id(getattr(modules[cut.name], key)): f"{cut.name}.{key}" for cut in cuts for key in ("weight", "bias")
        }
        self.shards = Parts(pieces, grid.tensor_group, touch)
        parallelize_module(model, grid.mesh["tensor"], styles, src_data_rank=None)
        self._views: dict[str, Tensor] = {}

    def arenas(self, rows: Any, optimizer: Any, how: How) -> list[Arena]:
        """Of what is whole, and of this rank's parts; the model's parameters are views of both.

        Raises:
            ModelError: for updates that would see another whole in a part.
        """
        named = named_trainable(self.model)
        mine = [
            (name, p if not hasattr(p, "_local_tensor") else nn.Parameter(local_part(p).contiguous()))
            for name, p in named
        ]
        whole = [(name, p) for name, p in mine if name not in self.shards.pieces]
        parts = [(name, p) for name, p in mine if name in self.shards.pieces]
        arenas = [arena for group in (whole, parts) if group for arena in make_arenas(group, rows, optimizer, how)]
        for arena in arenas:
            _check_updates(arena, cut=any(name in self.shards.pieces for name in arena.places))
        places = {name: arena for arena in arenas for name in arena.places}
        for name, p in named:
            if hasattr(p, "_local_tensor"):
                p._local_tensor = places[name].view(places[name].params, name)
                view = places[name].view(places[name].grads, name)
                p.register_post_accumulate_grad_hook(partial(_deliver, view))
        return arenas

    # ------------------------------------------------------------------ as for parameters that are sharded by rows

    def whole(self) -> AbstractContextManager[None]:
        """Layers stay cut: ranks that compute them together run the model together."""
        return nullcontext()

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name, this rank's part of what is cut; the rest as it is."""
        return {name: local_part(t) for name, t in tensors.items()}

    @torch.no_grad()
    def release(self, *, together: bool = True) -> None:
        """The model has its own, whole parameters again, and computes alone.

        Args:
            together: all ranks are here. If not, as after an error, what was cut is NaN.
        """
        if self.released:
            return
        self.released = True
        for module, key, p in self._before:
            now: Any = module._parameters[key]
            if now is p:
                continue
            name = plain_name(self._own[id(p)])
            shape, stride = self._strides[id(p)]
            p.data = torch.empty_strided(shape, stride, dtype=p.dtype, device=p.device)
            if name not in self.shards.pieces:
                p.data.copy_(local_part(now))
            elif together:
                found = self.shards.whole(name, local_part(now), all_ranks=True)
                assert found is not None
                p.data.copy_(found)
            else:
                p.data.fill_(math.nan)
            p.grad = None
            module._parameters[key] = p
        for module in self.model.modules():
            for hooks in _HOOKS:
                kept = module.__dict__[hooks]
                for number in [n for n in kept if n not in self._kept[id(module), hooks]]:
                    del kept[number]
                    for more in _WITH:
                        module.__dict__.get(more, {}).pop(number, None)


def _deliver(view: Tensor, p: Any) -> None:
    """A gradient that is there joins those in the arena."""
    found = p.grad if p.grad.placements == p.placements else p.grad.redistribute(p.device_mesh, p.placements)
    view.add_(local_part(found))
    p.grad = None


def _check_updates(arena: Arena, *, cut: bool) -> None:
    """Refuse rules that need more than one element of a parameter, or draw or keep numbers by its whole."""
    for segment in arena.segments:
        program = segment.program
        why = ""
        if program.rule.shared:
            why = "estimates one number from all parameters"
        elif any(part.shape in ("uniform", "tensor") for part in program.parts):
            why = "keeps one number for several parameters"
        elif cut and program.reads != "element":
            why = f"reads a parameter's {program.reads}"
        elif cut and (program.blocked or any(part.shape == "block" for part in program.parts)):
            why = "keeps a number for each block of a whole parameter"
        elif cut and (program.random or "noise" in program.tensors):
            why = "draws numbers by an element's place in the whole"
        if why:
            raise ModelError(
                f"The update of '{segment.names[0]}' is not possible where layers are cut (parallel.tensor).",
                f"optimizer.rule='{segment.treatment.rule}' with its stages, slots='{arena.how.slots}' and rounding "
                f"'{program.rounding}' {why}; of {len(segment.names)} parameters there are parts.",
                "Use a rule that works element by element, such as adamw, with full slots and float32 weights; or "
                "parallel='fsdp', where all rules work.",
            )


# ---------------------------------------------------------------------- cutting a run's model, and looking at it


def cut_layers(
    model: nn.Module, plan: Plan, device: Device, ranks: Any, loss: ModelLoss, policy: Policy, batch: Any
) -> tuple[TensorParallel, Feeds]:
    """The model with cut layers, as the plan's layout says, of the first rank's weights; the ranks as feeds.

    Args:
        ranks: those of the run; every one calls this.
        batch: the same samples on every rank: the loss and random draws must be those of the whole model.

    Raises:
        ModelError: where they are not.
    """
    recipe = plan.recipe
    grid = Grid(ranks, Layout(**plan.layout), device)
    others = take_first_weights(model, ranks)
    cuts = tensor_cuts(model, recipe, grid.layout.tensor)
    ends = [cut.name for cut in cuts if cut.dim or cut.gathers]  # after these, activations are whole again
    run = partial(_seen, model, ends, loss, batch, device, policy, recipe.seed)
    before = run()
    made = TensorParallel(model, cuts, grid, ranks.in_touch)
    made.others = others
    try:
        ranks.together(lambda: _check_same(run, before, policy))
    except BaseException:
        made.release(together=False)
        raise
    return made, Feeds(ranks, grid)


@dataclass
class _Seen:
    """What a forward pass showed.

    Attributes:
        loss: the sum of losses.
        drawn: what was drawn at random, and of which shape.
        ends: by name of a layer after which activations are whole: (norm, a projection) of what it gave at last.
    """

    loss: float = 0.0
    drawn: list[str] = field(default_factory=list)
    ends: dict[str, tuple[float, float]] = field(default_factory=dict)


def _seen(
    model: nn.Module, ends: Sequence[str], loss: ModelLoss, batch: Any, device: Device, policy: Policy, seed: int
) -> _Seen:
    """A forward pass, looked at."""
    model.train()
    seen = _Seen()

    def note(name: str, module: nn.Module, given: Any, gave: Tensor) -> None:
        flat = gave.detach().reshape(-1).cpu().double()
        by = torch.arange(len(flat), dtype=torch.float64).mul_(0.7).cos_()
        seen.ends[name] = float(flat.norm()), float(flat @ by)

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in ends]
    looked_at = (
        untouched(model, device, seed),
        _layers_noted(model, seen.drawn),
        _Drawn(seen.drawn),
        policy.context(device),
    )
    with ExitStack() as stack, torch.no_grad(), as_written():
        for handle in handles:
            stack.callback(handle.remove)
        for one in looked_at:
            stack.enter_context(one)
        seen.loss = float(sum_and_weight(loss(model, batch), batch)[0])
    return seen


def _check_same(run: Callable[[], _Seen], before: _Seen, policy: Policy) -> None:
    way_out = (
        "Look at the model's plan: a colwise layer is followed by a rowwise one, and what lies between works on parts."
    )
    try:
        now = run()
    except (RuntimeError, ValueError, IndexError) as err:
        words = " ".join(str(err).split())[:300]
        failed = ModelError("The model does not run with its layers cut (parallel.tensor).", words, way_out)
    else:
        if before.drawn != now.drawn:
            a, b = next(((a, b) for a, b in zip(before.drawn, now.drawn) if a != b), ("more", "less"))
            raise ModelError(
                "Random numbers are drawn inside layers that are cut (parallel.tensor).",
                f"The whole model draws {a}, a rank {b}: masks would not be those of one rank.",
                "Use a model without dropout there, such as on attention weights or between up and down; or parallel='fsdp'.",
            )
        close = _CLOSE if policy.name in ("fp32", "tf32") else _CLOSE_IN_HALF
        for name, (norm, there) in before.ends.items():
            here = now.ends.get(name, (0.0, math.inf))[1]
            if not abs(here - there) <= close * norm:
                raise ModelError(
                    f"'{name}' gives other values with the model's layers cut (parallel.tensor).",
                    f"A projection of them is {there:.7g} whole and {here:.7g} in parts, of a norm of {norm:.7g}, with the same "
                    "weights and samples.",
                    way_out,
                )
        if not abs(now.loss - before.loss) <= close * max(abs(now.loss), abs(before.loss)):
            raise ModelError(
                "The model gives another loss with its layers cut (parallel.tensor).",
                f"{before.loss:.7g} whole, {now.loss:.7g} in parts, with the same weights and samples.",
                way_out,
            )
        return
    raise failed


@contextmanager
def _layers_noted(model: nn.Module, noted: list[str]) -> Iterator[None]:
    """Layers of dropout write down the shape that they see; which of them draw from torch's generator is not asked."""

    def note(name: str, module: nn.Module, given: Any) -> None:
        noted.extend(f"{name} {tuple(x.shape)}" for x in given if isinstance(x, Tensor))

    layers = [(n, m) for n, m in model.named_modules() if "drop" in type(m).__name__.lower() and getattr(m, "p", True)]
    handles = [m.register_forward_pre_hook(partial(note, n)) for n, m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Drawn(TorchDispatchMode):
    """Writes down operators that draw from a generator, and the shape of what they give."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports the compiler

    def __init__(self, noted: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.noted.append(f"{func.overloadpacket.__name__} {tuple(first.shape)}")
        return result


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it draws anything: attention has a rate that is mostly 0."""
    names = [one.name for one in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    at = names.index("dropout_p")
    rate = args[at] if at < len(args) else kwargs.get("dropout_p", 0.0)
    return bool(rate)
