"""The ranks as a mesh of data x shard x tensor, for what torch spreads over it, and the groups of its sides."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from thalweg.core import Layout
from thalweg.core.parallel import SIZES
from thalweg.device import Device
from thalweg.parallel.joined import Joined


def ranks_on_each(world: int) -> int:
    """How many ranks each machine has, by what the launcher says; all of them where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


class Grid:
    """This rank's place in the mesh of all ranks.

    Groups are made one by one rather than by ``init_device_mesh``: so they have the run's timeout and the device's own
    backend, and none is made for a side of one rank, or of all.

    Args:
        ranks: those of the run, each of which makes this with the same layout.
        device: on which tensors will lie.

    Attributes:
        mesh: torch's mesh, with those of the dimensions "data", "shard" and "tensor" that are longer than 1.
        feed: which of ``layout.feeds`` shares of the micro-batches is this rank's.
        tensor: this rank's number among those that compute its layers.
        feeds_group: with whom gradients and packed sums are added up: the ranks of all feeds, with this ``tensor``; None: one feed.
        tensor_group: with whom this rank computes its layers; None: alone.
    """

    def __init__(self, ranks: Joined, layout: Layout, device: Device) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        assert layout.ranks == ranks.world
        self.layout, self.rank = layout, ranks.rank
        self.feed, (_, _, self.tensor) = layout.feed_of(ranks.rank), layout.place_of(ranks.rank)
        known = tuple(dist.get_process_group_ranks(ranks.words))
        box = torch.tensor(known, dtype=torch.int).reshape(layout.data, layout.shard, layout.tensor)
        made: dict[tuple[int, ...], Any] = {known: ranks.group}
        limit, everyone = timedelta(seconds=ranks.timeout), len(known) == dist.get_world_size()

        def group_of(parts: Tensor) -> Any:
            """The group of this rank's row of ``parts``; all rows' groups are made by all ranks, in one order."""
            mine = None
            for row in parts.tolist():
                key = tuple(row)
                if key not in made and (everyone or self_id in key):
                    made[key] = dist.new_group(
                        list(key), timeout=limit, backend=device.ranks_backend, use_local_synchronization=not everyone
                    )
                mine = made[key] if self_id in key else mine
            return mine

        self_id = known[ranks.rank]
        rows = {name: box.movedim(i, 2).reshape(-1, box.shape[i]) for i, name in enumerate(SIZES)}
        long = [name for name in SIZES if rows[name].shape[1] > 1]
        with ranks._in_touch("groups of a mesh"):
            groups = {name: group_of(rows[name]) for name in long}
            feeds = box.movedim(2, 0).reshape(layout.tensor, -1)
            self.feeds_group = group_of(feeds) if layout.feeds > 1 else None
            around = box.reshape([box.shape[i] for i, name in enumerate(SIZES) if name in long])
            self.mesh = DeviceMesh.from_group(
                [groups[name] for name in long], device.kind, mesh=around, mesh_dim_names=tuple(long)
            )
        self.tensor_group = groups.get("tensor")

    @property
    def sharding(self) -> Any:
        """The mesh for ``fully_shard``: of one dimension, or, with copies, of two."""
        names = [name for name in ("data", "shard") if name in (self.mesh.mesh_dim_names or ())]
        return self.mesh[tuple(names)]
