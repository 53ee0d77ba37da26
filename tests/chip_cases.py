"""What runs on the stand-in chip, in a process of its own: prints one line of JSON for each case, {"case", "told"}.

Run as ``python -m tests.chip_cases FOLDER``; ``test_device_chip.py`` reads what it says.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
from tests.chip import RAN, load
from tests.models import IGNORED, mlp, ragged_text, small_gpt, text_loss
from thalweg.core import Split
from thalweg.device import choose, memory
from thalweg.optim import AdamW

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
RECIPE = {
    "precision": "fp32",
    "train.steps": 6,
    "train.batch": 16,
    "train.micro_batch": 8,
    "train.clip": 0.5,
    "optimizer.weight_decay": 0.1,
    "regularize.average": 0.9,
    "evaluate.every": 3,
    "schedule.lr": "warmup(2) >> cosine()",
}


def images(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(40, 1, 8, 8, generator=draw), "y": torch.randint(0, 4, (40,), generator=draw)}


def convnet() -> nn.Module:
    front = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2)]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 4))


def image_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def trained(on: str, folder: Path | None = None, resume: Any = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    recipe = {**RECIPE, "device": on, **changes}
    split, accept = Split(train=images(), test=images(1)), ["device"] if resume else []
    return thalweg.train(convnet, image_loss, split, recipe, folder=folder, resume=resume, accept=accept)


def differing(a: Any, b: Any) -> list[str]:
    """Names of what differs between two results, by any bit: weights, buffers, records, metrics."""
    theirs = b.model.state_dict()
    found = [name for name, value in a.model.state_dict().items() if not torch.equal(value.cpu(), theirs[name].cpu())]
    found += [f"step {x.step}" for x, y in zip(a.records, b.records, strict=True) if x.loss != y.loss]
    return found + [name for name in a.metrics if a.metrics[name] != b.metrics[name]]


def same(changes: dict[str, Any], way: str = "eager") -> str:
    """The same run on both. The chip has no fused operators, so the CPU is told to do without its own."""
    before = RAN["convolution"]
    on_chip = trained("auto", **changes)
    assert RAN["convolution"] > before and on_chip.plan.recipe.device == "chip:0"
    on_cpu = trained("cpu", **changes, **({"optimizer.way": way} if way else {}))
    return " ".join(differing(on_cpu, on_chip)) or "same"


def resumed(on: str) -> str:
    """A run of the chip that goes on from its fourth step, against one that was never interrupted."""
    folder = FOLDER / f"resumed-{on}"
    saving = {"checkpoint.every": 2, "checkpoint.keep_last": 9, "optimizer.way": "eager"}
    whole, again = trained("chip", folder, **saving), trained(on, folder, 4, **saving)
    assert [r.step for r in again.records] == [5, 6]
    theirs = whole.model.state_dict()
    off = [n for n, v in again.model.state_dict().items() if not torch.equal(v.cpu(), theirs[n].cpu())]
    return f"{again.model[0].weight.device}: {' '.join(off) or 'same'}"


def ties() -> str:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))
            self.head.weight = self.words.weight
            self.norms[1].running_mean = self.norms[0].running_mean

    model = Tied()
    optimizer = AdamW(model.parameters(), lr=0.1)
    before = [*model.parameters()]
    device, _ = choose("chip")
    assert device.move(model) is model
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and before[0].device.type == "chip"
    assert model.head.weight is model.words.weight and model.norms[0].running_mean is model.norms[1].running_mean
    assert not torch.__future__.get_swap_module_params_on_conversion()
    old = model.head.weight.detach().cpu()
    model.head(model.words(torch.tensor([1, 2]).to("chip"))).sum().backward()
    optimizer.step()
    moved = not torch.equal(old, model.head.weight.detach().cpu())
    return f"kept; the optimizer {'moves' if moved else 'lost'} them"


def held() -> str:
    model = mlp()
    graph = model(torch.ones(2, 6))
    try:
        choose("chip")[0].move(model)
    except thalweg.ThalwegError as err:
        assert graph is not None
        return str(err)
    return "moved"


def refused(**changes: Any) -> str:
    try:
        trained(changes.pop("on", "chip"), **changes)
    except thalweg.ThalwegError as err:
        return str(err)
    return "trained"


def text() -> str:
    """Attention, tied weights, padded targets, recomputation, a loop of one's own."""
    finals = []
    for device in ("cpu", "chip"):
        torch.manual_seed(0)
        model = small_gpt(0.1)
        recipe = {"precision": "fp32", "device": device, "recompute": "blocks", "train.micro_batch": 8}
        step = thalweg.TrainStep(model, text_loss, recipe | {"optimizer.way": "eager", "schedule.lr": "constant()"})
        whole = ragged_text(16)
        losses = [float(step(whole).loss) for _ in range(3)]
        finals.append((losses, [p.detach().cpu() for p in step.finish().parameters()]))
    assert IGNORED < 0 and finals[0][0][2] < finals[0][0][0]
    far = max(float((a - b).abs().max()) for a, b in zip(finals[0][1], finals[1][1], strict=True))
    apart = max(abs(a - b) for a, b in zip(finals[0][0], finals[1][0], strict=True))
    drawn = [small_gpt().eval(), choose("chip")[0].move(small_gpt()).eval()]
    drawn[1].load_state_dict(drawn[0].state_dict())
    same_text = drawn[0].generate([1], 8, seed=3) == drawn[1].generate([1], 8, seed=3)
    return f"{max(far, apart):.1e} {same_text}"


def capabilities() -> str:
    device, why = choose("auto")
    can = device.capabilities
    assert device.generators() == [torch.default_generator] and memory.available(device) is None
    assert memory.in_use(device) == 0 and memory.peak(device) is None and not memory.reset_peak(device)
    memory.release(device)
    device.synchronize()
    names = ("graph_kind", "autocasts", "scales_fp16", "float64", "bf16", "pins", "measures_memory", "fused", "views")
    return f"{device.torch_device}, {why}: {[getattr(can, name) for name in names]} {can.compile_backend} {can.foreach}"


CASES: dict[str, Callable[[], str]] = {
    "capabilities": capabilities,
    "adamw": lambda: same({}),
    "muon": lambda: same({"optimizer.rule": "muon"}, way="stacked"),
    "soap, a long history of norms": lambda: same(
        {"optimizer.rule": "soap", "train.clip": 0, "train.clip_history": 2.0}
    ),
    "int8 slots": lambda: same({"optimizer.slots": "int8"}, way=""),
    "gradient noise": lambda: same({"optimizer.stages.gradient_noise.eta": 0.1}),
    "bf16": lambda: same({"precision": "bf16"}),
    "bf16-pure": lambda: same({"precision": "bf16-pure"}),
    "offload": lambda: " ".join(differing(trained("chip", **{"optimizer.offload": True}), trained("chip"))) or "same",
    "text": text,
    "resumed": lambda: resumed("chip"),
    "resumed on the cpu": lambda: resumed("cpu"),
    "ties": ties,
    "held": held,
    "fp16": lambda: refused(precision="fp16"),
    "memory": lambda: refused(**{"train.micro_batch": "auto"}),
    "second chip": lambda: refused(on="chip:1"),
    "nearly": lambda: refused(on="chp"),
    "fused": lambda: refused(**{"optimizer.way": "fused"}),
    "compiled": lambda: refused(**{"optimizer.way": "compiled"}),
}


def main() -> None:
    load()
    for name, case in CASES.items():
        try:
            told = case()
        except Exception:
            told = f"error: {traceback.format_exc()}"
        print(json.dumps({"case": name, "told": told}), flush=True)


if __name__ == "__main__":
    main()
