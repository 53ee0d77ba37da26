"""Numbers drawn from a seed of their own, near the device where it has generators, else on the host."""

from __future__ import annotations

import torch


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """A generator that stands at ``seed``: of the device, or of the host where a backend makes none. See its ``device``."""
    try:
        generator = torch.Generator(device)
    except RuntimeError:
        generator = torch.Generator()
    return generator.manual_seed(seed)
