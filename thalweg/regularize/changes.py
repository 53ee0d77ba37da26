"""What a conversion did to a model, as values that print well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module that was replaced or added.

    Attributes:
        name: the module's qualified name; "" for the model itself.
        before, after: what it was and what it is now.

    >>> print(Change("body.norm", "BatchNorm2d", "GhostBatchNorm2d(size=32)"))
    body.norm: BatchNorm2d -> GhostBatchNorm2d(size=32)
    """

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"
