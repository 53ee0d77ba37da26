"""What a run does about a step that would spoil it: the recipe's table ``[guard]``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from thalweg.core.errors import RecipeError, did_you_mean

NONFINITE = ("skip", "rewind", "stop")
SPIKE = ("off", "skip", "rewind", "stop")
#: How far apart the step numbers are at which the limits of spikes are taken anew.
REFRESH = 16


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What becomes of a step whose loss or gradient is not finite, or far out of line. It is never applied.

    Args:
        nonfinite: "skip": the run goes on with the next step; "rewind": weights and all that belongs to them go back to a
            copy in memory, and the run goes on with the samples after the bad step; "stop": the run ends as diverged.
        spike: the same for a loss or gradient norm that is finite and far above those of late; "off": nothing is looked for.
        deviations: robust standard deviations above the median of the window, from which on it is a spike.
        window: applied steps whose losses and norms are compared with; until there are so many nothing is a spike.
        patience: bad steps in a row after which the run ends as diverged.
        every: steps between two copies in memory; the older of two is gone back to.
        rewinds: how often a run goes back; the next time it ends as diverged.
    """

    nonfinite: str = "skip"
    spike: str = "off"
    deviations: float = 16.0
    window: int = 64
    patience: int = 50
    every: int = 100
    rewinds: int = 3

    @property
    def rewinding(self) -> bool:
        """Whether copies are kept in memory."""
        return "rewind" in (self.nonfinite, self.spike)

    @property
    def trips(self) -> bool:
        """Whether a bad step can hold up the run."""
        return self.rewinding or "stop" in (self.nonfinite, self.spike)

    @property
    def active(self) -> bool:
        """Whether there is more to do than to skip what is not finite."""
        return self.trips or self.spike != "off"

    def __post_init__(self) -> None:
        for name, known in (("nonfinite", NONFINITE), ("spike", SPIKE)):
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(
                    f"guard.{name}={value!r} is not known.",
                    f"{len(known)} are: {', '.join(known)}.",
                    did_you_mean(value, known),
                )
        if not self.deviations > 0:
            raise RecipeError(
                f"guard.deviations={self.deviations} is no distance above the median.",
                "It counts robust standard deviations.",
                "Give one above 0, such as 16.",
            )
        for name, least, why in (
            ("window", 8, "A median and its deviation need some steps."),
            ("patience", 1, "It counts bad steps in a row."),
            ("every", 1, "It counts steps."),
            ("rewinds", 1, "It counts how often a run goes back."),
        ):
            if getattr(self, name) < least:
                raise RecipeError(
                    f"guard.{name}={getattr(self, name)} is too small.", f"{why} It is {least} or more.", _remedy(name)
                )
        self._check_used()

    def _check_used(self) -> None:
        """Refuse what was given and would never act."""
        usual: dict[str, Any] = {f.name: f.default for f in fields(self)}
        for names, acts, need in (
            (("deviations", "window"), self.spike != "off", "guard.spike='skip', 'rewind' or 'stop'"),
            (("every", "rewinds"), self.rewinding, "guard.nonfinite='rewind' or guard.spike='rewind'"),
        ):
            for name in names:
                if not acts and getattr(self, name) != usual[name]:
                    raise RecipeError(
                        f"guard.{name}={getattr(self, name)} has no effect.",
                        f"guard.nonfinite='{self.nonfinite}', guard.spike='{self.spike}'.",
                        f"Give {need} too, or leave guard.{name} out.",
                    )


def _remedy(name: str) -> str:
    if name == "rewinds":
        return "Give 1 or more; guard.nonfinite='stop' and guard.spike='stop' end the run at once."
    return {"window": "Give 8 or more, such as 64.", "patience": "Give 1 or more, such as 50."}.get(
        name, "Give 1 or more, such as 100."
    )
