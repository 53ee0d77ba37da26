"""A trace, the bytes of the training state and the process: the Ledger of a run."""

from __future__ import annotations

from dataclasses import replace

from thalweg.core import Ledger
from thalweg.device import Device, memory
from thalweg.engine.memory.trace import Trace
from thalweg.optim.sizes import StateSizes


def predict(
    traced: Trace,
    sizes: StateSizes,
    device: Device,
    *,
    micro_batches: int = 1,
    buffers: int = 0,
    data: int = 0,
    recompute: str = "none",
    process: int | None = None,
    seen: int | None = None,
    accelerator: bool = False,
) -> Ledger:
    """What training takes at most.

    The peak of a step is that of its passes or of its update, whichever is larger, over the training state. On a CPU what the
    C library's heap loses between blocks joins it as temporary: as it was ``seen``, or else as it is on average
    (``thalweg.device.memory.lost_in_heap``). Elsewhere tensors alone count; an accelerator's allocator rounds each up to 512
    bytes, and takes memory from the device in portions of 2 MiB and more.

    Args:
        traced: the passes of one micro-batch.
        sizes: of the training state.
        micro_batches: of one window; all of them are on the device at once.
        buffers, data: bytes of the model's buffers and of training data on the device.
        recompute: as in the recipe, of the model that was traced.
        process: bytes besides; None: ``process_bytes`` now, where model and data lie in this process.
        seen: bytes that these very passes took on this machine at most; None: follows from the trace.
        accelerator: whether the plan is for one, whatever ``device`` it was traced on.
    """
    if process is None:
        process = process_bytes(device, sizes.parameters + buffers + data)
    state = sizes.parameters + sizes.gradients + sizes.slots + sizes.averages + buffers + data
    lost = 0 if accelerator else memory.lost_in_heap(device, traced.peak_of(memory.in_heap))
    passes, place = traced.peak + lost, traced.peak_at
    if seen is not None:
        passes = max(traced.peak, seen) + memory.widened_by_steps(device, seen)
    if sizes.update > passes:
        passes, place = sizes.update, "update"
    temporary = max(0, passes - traced.kept) + traced.inputs * micro_batches
    return Ledger(
        parameters=sizes.parameters,
        gradients=sizes.gradients,
        slots=sizes.slots,
        averages=sizes.averages,
        buffers=buffers,
        data=data,
        activations=traced.kept,
        modules=traced.modules,
        temporary=temporary,
        peak=state + traced.kept + temporary + process,
        peak_at=place,
        process=process,
        micro_batch=traced.samples,
        recompute=recompute,
        flops=3 * traced.flops / max(traced.samples, 1),
    )


def process_bytes(device: Device, resident: int = 0) -> int:
    """What this process takes on the device besides training: on the CPU the interpreter, its libraries, data in memory.

    Args:
        resident: bytes of tensors that lie there already and that the ledger counts elsewhere, such as the model.
    """
    if device.kind != "cpu":
        return 0
    memory.release(device)
    return max(0, memory.in_use(device) - resident)


def begun(ledger: Ledger, device: Device) -> Ledger:
    """The ledger when the training state is there and no step was taken: what building it loaded is the process's."""
    if device.kind != "cpu":
        return ledger
    process = process_bytes(device, ledger.state)
    return replace(ledger, process=process, peak=ledger.peak - ledger.process + process)
