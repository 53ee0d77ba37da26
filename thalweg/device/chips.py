"""Machines that may not be here: what their makers state, for plans made elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from thalweg.core import DeviceError, did_you_mean

#: Memory: GiB that a process finds. TB/s: between chip and memory. Link: GB/s between two chips of a machine, each way.
#: The rest: TFLOP/s of dense products of matrices, by precision. A TPU multiplies float32 in six passes of bfloat16; a v7 is two
#: devices, and the row is for one of them.
_TABLE = """
name          kind  GiB    TB/s   link  fp32  tf32  bf16  fp16  fp8   source
v100-16gb     cuda  15.8   0.900   150  15.7  -     -     125   -     NVIDIA V100 data sheet
v100-32gb     cuda  31.7   0.900   150  15.7  -     -     125   -     NVIDIA V100 data sheet
t4-16gb       cuda  14.6   0.320    16  8.1   -     -     65    -     NVIDIA T4 data sheet
a10g-24gb     cuda  22.0   0.600    32  31.2  62.5  125   125   -     NVIDIA A10 data sheet
a100-40gb     cuda  39.4   1.555   300  19.5  156   312   312   -     NVIDIA A100 data sheet
a100-80gb     cuda  79.2   2.039   300  19.5  156   312   312   -     NVIDIA A100 data sheet
l4-24gb       cuda  22.0   0.300    32  30.3  60    121   121   242   NVIDIA L4 data sheet
l40s-48gb     cuda  44.5   0.864    32  91.6  183   362   362   733   NVIDIA L40S data sheet
h100-80gb     cuda  79.1   3.350   450  67    494   989   989   1979  NVIDIA H100 SXM data sheet
h200-141gb    cuda  139.8  4.800   450  67    494   989   989   1979  NVIDIA H200 SXM data sheet
b200-180gb    cuda  178.0  7.700   900  75    1100  2250  2250  4500  NVIDIA HGX B200 data sheet
rtx3090-24gb  cuda  23.6   0.936    32  35.6  35.6  71    71    -     NVIDIA GA102 white paper
rtx4090-24gb  cuda  23.5   1.008    32  82.6  82.6  165   165   330   NVIDIA Ada white paper
mi300x-192gb  cuda  191.0  5.300    64  163   -     1307  1307  -     AMD MI300X data sheet
tpu-v4        tpu   32.0   1.200   300  46    -     275   -     -     Google Cloud TPU documentation
tpu-v5e       tpu   16.0   0.820   200  33    -     197   -     -     Google Cloud TPU documentation
tpu-v5p       tpu   95.0   2.770   600  76    -     459   -     -     Google Cloud TPU documentation
tpu-v6e       tpu   32.0   1.640   448  153   -     918   -     -     Google Cloud TPU documentation
tpu-v7        tpu   96.0   3.685   300  192   -     1153  -     2307  Google Cloud TPU documentation
"""


@dataclass(frozen=True)
class Chip:
    """What a chip can do, as its data sheet states it.

    Attributes:
        kind: torch's name of the device.
        memory: bytes that a process finds.
        rates: floating-point operations a second of dense products of matrices, by precision.
        bandwidth: bytes a second between the chip and its memory.
        link: bytes a second between two chips of one machine, in each direction.
        source: the data sheet.
    """

    name: str
    kind: str
    memory: int
    rates: dict[str, float]
    bandwidth: float
    link: float
    source: str

    def rate(self, precision: str) -> float:
        """Operations a second in a precision of the recipe.

        Raises:
            DeviceError: if the chip does not have it.
        """
        wanted = {"bf16-pure": "bf16"}.get(precision, precision)
        if wanted not in self.rates:
            raise DeviceError(
                f"precision={precision!r} is not possible on {self.name}.",
                f"It has {', '.join(self.rates)}.",
                "Use one of these.",
            )
        return self.rates[wanted]


def _read(row: str, headings: list[str]) -> Chip:
    name, kind, memory, bandwidth, link, *rates, source = row.split(maxsplit=len(headings) - 1)
    known = {precision: float(rate) * 1e12 for precision, rate in zip(headings[5:-1], rates) if rate != "-"}
    return Chip(name, kind, int(float(memory) * 2**30), known, float(bandwidth) * 1e12, float(link) * 1e9, source)


_headings, *_rows = _TABLE.strip().splitlines()
#: By name.
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (_read(row, _headings.split()) for row in _rows)}


#: What devices call themselves, where that is not in the table's words.
_ALSO = {"v5lite": "v5e", "v6lite": "v6e"}
#: Forms of a chip that are slower than the one in the table.
_OTHERS = {"h100": ("pcie", "nvl"), "h200": ("nvl",), "a10g": (), "t4": ("t4g",)}


def chip_here(name: str, memory: int) -> Chip | None:
    """The chip that a device is, by what it calls itself and how much memory it has; None where the table has none.

    >>> chip_here("NVIDIA H100 80GB HBM3", 79 << 30).name
    'h100-80gb'
    >>> chip_here("NVIDIA H100 PCIe", 79 << 30)
    """
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    words += [a + b for a, b in zip(words, words[1:])]  # "rtx 4090"
    words += [_ALSO[word] for word in words if word in _ALSO]
    found = []
    for chip in CHIPS.values():
        model = chip.name.removeprefix("tpu-").split("-")[0]
        mine = "tpu" in words if chip.kind == "tpu" else True
        if model in words and mine and not set(_OTHERS.get(model, ())) & set(words):
            found.append(chip)
    return min(found, key=lambda chip: abs(chip.memory - memory), default=None)


def chip_called(name: str) -> Chip:
    """A chip by its name.

    Raises:
        DeviceError: if it is not known.
    """
    if name not in CHIPS:
        raise DeviceError(f"The chip {name!r} is not known.", f"{len(CHIPS)} are.", did_you_mean(name, sorted(CHIPS)))
    return CHIPS[name]
