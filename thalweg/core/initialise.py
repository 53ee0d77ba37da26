"""What a run's weights begin with, where a recipe says more than the model does: the recipe's table ``[initialise]``."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.core.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Initialise:
    """Layers by patterns of their names ("stem", "blocks.*.conv2"), and what they begin with.

    Args:
        whiten: two-dimensional convolutions whose filters make what they read uncorrelated, measured on training samples.
        whiten_samples: training samples that they are measured on, at least; whole windows are taken.
        whiten_eps: added to the variances, as a share of their mean, so that noise is not blown up.
        whiten_freeze: whether those filters stay as they begin; else they train with the rest.
        dirac: convolutions whose first filters hand each channel on as it is.
        orthogonal: convolutions and linear layers whose weights begin as a matrix with orthonormal rows or columns.
        gain: factor on the orthogonal ones.
    """

    whiten: tuple[str, ...] = ()
    whiten_samples: int = 2000
    whiten_eps: float = 5e-4
    whiten_freeze: bool = True
    dirac: tuple[str, ...] = ()
    orthogonal: tuple[str, ...] = ()
    gain: float = 1.0

    @property
    def active(self) -> bool:
        """Whether any layer is named."""
        return bool(self.whiten or self.dirac or self.orthogonal)

    def __post_init__(self) -> None:
        if self.whiten_samples < 1:
            raise RecipeError(
                f"initialise.whiten_samples={self.whiten_samples} measures nothing.",
                "Filters that whiten are measured on 1 sample or more.",
                "Give some thousands, such as 2000.",
            )
        for name, value in (("whiten_eps", self.whiten_eps), ("gain", self.gain)):
            if not value > 0:
                raise RecipeError(
                    f"initialise.{name}={value} is not above 0.",
                    "Filters are divided by the root of a variance and it, or multiplied by it.",
                    f"Give a positive number, such as {getattr(Initialise, name)}.",
                )
