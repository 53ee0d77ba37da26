"""What ``thalweg plan`` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console

from thalweg.core import Forecast, Form, ModuleBytes, human_bytes, human_seconds
from thalweg.watch.console import Steady, print_table

_MODULES = 8


def print_forecast(forecast: Forecast, console: Console | None = None) -> None:
    """Bytes by purpose, activations by module, time, and what would make it smaller, the cheapest first."""
    out = console or Steady(highlight=False)

    def say(text: str) -> None:
        out.print(text, soft_wrap=True)

    ledger = forecast.ledger
    many = f"{forecast.devices} x " if forecast.devices > 1 else ""
    spread = ", parameters, gradients and slots spread over them" if forecast.sharded else ""
    say(f"[bold]{forecast.task}[/bold] on {many}{forecast.machine}{spread}: planned, not trained")
    if forecast.decisions:
        decided = [(path, str(value), reason) for path, value, reason in forecast.decisions]
        print_table(("value", "is", "because"), decided, title="decided before step 1", console=out)
    rows = [(name, human_bytes(size)) for name, size in ledger.rows() if size]
    print_table(("memory", "bytes"), [*rows, ("peak", human_bytes(ledger.peak))], console=out)
    if forecast.forms:
        print_table(_HEADINGS, [_form_row(form) for form in forecast.forms], title="on each rank", console=out)
    spare = forecast.memory - ledger.peak
    room = human_bytes(forecast.memory)
    if spare >= 0:
        say(f"fits: {human_bytes(spare)} of {room} are left at the peak, in the {ledger.peak_at}")
    else:
        say(
            f"[yellow]does not fit: {human_bytes(-spare)} more than {room} at the peak, in the {ledger.peak_at}[/yellow]"
        )
    if ledger.modules:
        print_table(("activations of", "bytes", "each"), _by_kind(ledger.modules)[:_MODULES], console=out)
    share = forecast.batch // forecast.devices
    each = " on each" if forecast.devices > 1 else ""
    largest = f"the largest that fits is {forecast.largest}" if forecast.largest else "none fits"
    say(f"micro-batch: {ledger.micro_batch} of {share} samples a step{each}; {largest}")
    say(f"recomputation: {ledger.recompute}")
    if forecast.seconds is None:
        say(f"time: {forecast.timed}")
    else:
        whole = human_seconds(forecast.seconds * forecast.steps)
        say(f"time: {_short(forecast.seconds)} a step, {whole} for {forecast.steps} steps ({forecast.timed})")
    if forecast.changes:
        title = "what would make it smaller, the cheapest first" if spare >= 0 else "what to change, the cheapest first"
        print_table(
            ("change", "peak", "fits", "time", "besides"),
            [
                (
                    change.what,
                    human_bytes(change.peak),
                    "yes" if change.fits else "no",
                    "not known" if change.price is None else f"x {change.price:.2f}",
                    change.note,
                )
                for change in forecast.changes
            ],
            title=title,
            console=out,
        )


_HEADINGS = ("", "parallel", "parameters", "gradients", "slots", "gathered", "peak", "fits", "step")


def _form_row(form: Form) -> tuple[str, ...]:
    ledger = form.ledger
    sizes = (ledger.parameters, ledger.gradients, ledger.slots + ledger.averages, ledger.gathered, ledger.peak)
    seconds = "" if form.seconds is None else _short(form.seconds)
    return (">" if form.chosen else "", form.name, *map(human_bytes, sizes), "yes" if form.fits else "no", seconds)


def _by_kind(modules: Sequence[ModuleBytes]) -> list[tuple[str, str, str]]:
    """Modules that differ in name by a number alone are one row: (name, bytes, bytes of each where there are several)."""
    kinds: dict[str, list[ModuleBytes]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", module.name), []).append(module)
    rows = []
    for name, mine in sorted(kinds.items(), key=lambda row: -sum(module.kept for module in row[1])):
        total = sum(module.kept for module in mine)
        if len(mine) > 1:
            rows.append((f"{name} ({len(mine)})", human_bytes(total), human_bytes(total // len(mine))))
        else:
            rows.append((mine[0].name or "(the loss, and outside modules)", human_bytes(total), ""))
    return rows


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else human_seconds(seconds)


def print_chips() -> None:
    """The chips that can be planned for."""
    from thalweg.device.chips import CHIPS

    rows = [
        (
            chip.name,
            human_bytes(chip.memory),
            ", ".join(f"{k} {v / 1e12:g}" for k, v in chip.rates.items()),
            chip.source,
        )
        for chip in CHIPS.values()
    ]
    print_table(("chip", "memory", "TFLOP/s", "source"), rows)
