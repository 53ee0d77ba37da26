"""What kinds of devices can do: one record a kind, from what is known of it and what it shows when it is tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from thalweg.device.operators import FAULTS, Fault


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a device can do, as far as training here needs to know. The values below are those of a device that nobody knew.

    Attributes:
        kind: torch's name of the device.
        graph_kind: how work gets there: "cpu": the host computes it; "eager": operator by operator; "graph": whole graphs,
            compiled before they run.
        autocasts: half precisions that autocast has: "bf16", "fp16".
        scales_fp16: whether the loss can be scaled there, without which fp16 loses small gradients.
        float64: whether it has float64.
        bf16: whether it adds and multiplies bfloat16.
        pins: whether copies from pinned memory of the host run by themselves.
        streams: whether copies can run beside its work.
        measures_memory: whether it says how many bytes are taken and left.
        captures_graphs: whether a step that was run once can be replayed as one.
        static_shapes: whether each new shape costs a compilation.
        compile_backend: what ``torch.compile`` is to be told, or None where nothing is known to compile for it.
        ranks_backend: what sums between processes on such devices, or "".
        foreach: whether one call works on a list of tensors.
        fused: whether torch's fused optimizers run there.
        channels_last: whether its convolutions are fastest with channels side by side in memory.
        views: whether a parameter can be a view of a flat buffer.
        faults: operators that are missing, wrong or slow there, with the way round.
    """

    kind: str
    graph_kind: str = "eager"
    autocasts: tuple[str, ...] = ()
    scales_fp16: bool = False
    float64: bool = False
    bf16: bool = False
    pins: bool = False
    streams: bool = False
    measures_memory: bool = False
    captures_graphs: bool = False
    static_shapes: bool = False
    compile_backend: str | None = None
    ranks_backend: str = ""
    foreach: bool = True
    fused: bool = False
    channels_last: bool = False
    views: bool = True
    faults: tuple[Fault, ...] = field(default=())


_GPU: dict[str, Any] = {
    "autocasts": ("bf16", "fp16"),
    "scales_fp16": True,
    "float64": True,
    "bf16": True,
    "pins": True,
    "streams": True,
    "measures_memory": True,
    "captures_graphs": True,
    "compile_backend": "inductor",
    "foreach": True,
    "fused": True,
    "views": True,
}
_GRAPH: dict[str, Any] = {
    "graph_kind": "graph",
    "autocasts": ("bf16",),
    "scales_fp16": False,  # its check of gradients is not implemented; bf16 needs none
    "bf16": True,
    "streams": False,
    "captures_graphs": False,
    "static_shapes": True,
    "fused": False,
}
#: What is known of a kind without asking it. Of what a row leaves out, the device is asked (``probes.py``).
KNOWN: dict[str, dict[str, Any]] = {
    "cpu": {**_GPU, "graph_kind": "cpu", "pins": False, "streams": False, "captures_graphs": False}
    | {"ranks_backend": "gloo"},
    "cuda": {**_GPU, "channels_last": True, "ranks_backend": "nccl"},
    "xpu": {name: can for name, can in _GPU.items() if name not in ("float64", "captures_graphs")}
    | {"ranks_backend": "xccl"},  # some of these chips have no float64
    "mps": {**_GPU, "float64": False, "pins": False, "streams": False, "captures_graphs": False}
    | {"ranks_backend": ""},
    "tpu": {**_GRAPH, "compile_backend": "tpu", "ranks_backend": "tpu_dist"},
    "neuron": {**_GRAPH, "compile_backend": "neuron"},
    "hpu": {"autocasts": ("bf16",), "scales_fp16": False, "bf16": True, "captures_graphs": False}
    | {"compile_backend": "hpu_backend", "ranks_backend": "hccl"},
}
#: What brings a kind to torch, where torch alone does not have it.
PACKAGES = {"tpu": "torch-tpu", "neuron": "torch-neuronx", "hpu": "habana-torch-plugin"}


def known(kind: str) -> Capabilities:
    """What is known of a kind of device without one: for plans made elsewhere."""
    return Capabilities(kind=kind, faults=FAULTS.get(kind, ()), **KNOWN.get(kind, {}))
