"""The room that names backends, and that no other does; what a device can do; moves; errors about devices."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, three_parts
from thalweg.core import DeviceError
from thalweg.data import to_device
from thalweg.device import KNOWN, Device, accelerator, capabilities_of, choose, known, memory
from thalweg.device.kept import same_generators
from thalweg.device.probes import _PROBES

CPU = Device(torch.device("cpu"))
#: Words that only the room ``device`` may use. The CPU is no backend: it is the host, which every machine has.
BACKENDS = re.compile(
    r"\b(cuda|cudnn|nccl|hip|rocm|xpu|xccl|mps|tpu|neuron|hpu|hccl|mtia|xla|privateuse\w*)\b", re.IGNORECASE
)


def named_backends(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every backend that code names: in a string, a name, an attribute or an import; not in docstrings."""
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            words = [node.value]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            words = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        for word in words:
            if BACKENDS.search(word.replace("_", " ")):
                yield getattr(node, "lineno", 0), word


#: Files that must: one names operators of torch, which are called after what they run on; the other stands before torch is
#: imported, and the room ``device`` imports it.
MUST = {"engine/products.py", "cli/backends.py"}


def test_no_other_room_names_a_backend() -> None:
    package = ROOT / "thalweg"
    found = [
        f"{path.relative_to(package)}:{line}: {word}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] != "device" and str(path.relative_to(package)) not in MUST
        for line, word in named_backends(path.read_text(encoding="utf-8"))
    ]
    assert not found
    code = 'def f(x):\n    """cuda"""\n    return x.is_cuda or x.device.type == "xpu" or torch.mps'
    assert [word for _, word in named_backends(code)] == ["is_cuda", "mps", "xpu"]


def test_the_table_is_what_the_device_shows() -> None:
    """The CPU's row, item by item, against trying it; what the CPU has and trials cannot see is left out."""
    row = capabilities_of(torch.device("cpu"))
    assert row == known("cpu")
    for name in ("autocasts", "scales_fp16", "float64", "bf16", "foreach", "fused", "views", "captures_graphs", "pins"):
        assert _PROBES[name](torch.device("cpu")) == getattr(row, name), name
    assert _PROBES["ranks_backend"](torch.device("cpu")) == row.ranks_backend == "gloo"


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("cuda", ("eager", ("bf16", "fp16"), True, True, "inductor", "nccl")),
        ("mps", ("eager", ("bf16", "fp16"), True, False, "inductor", "")),
        ("tpu", ("graph", ("bf16",), False, False, "tpu", "tpu_dist")),
        ("neuron", ("graph", ("bf16",), False, False, "neuron", "")),
        ("nobody", ("eager", (), False, False, None, "")),
    ],
)
def test_what_is_known_of_a_kind_without_one(kind: str, wanted: tuple[object, ...]) -> None:
    can = known(kind)
    said = (can.graph_kind, can.autocasts, can.scales_fp16, can.float64, can.compile_backend, can.ranks_backend)
    assert said == wanted and can.static_shapes == (can.graph_kind == "graph")
    assert capabilities_of(kind) == can, "a kind that is not here is taken at what is known"


def test_a_row_knows_only_what_there_is() -> None:
    assert all(KNOWN[kind].keys() <= vars(known("cpu")).keys() for kind in KNOWN)


@pytest.mark.parametrize(
    ("asked", "numbers", "remedy"),
    [
        ("cuda:7", "It has cpu", "Use device='auto'"),
        ("cudda", "This machine has cpu", "Did you mean cuda?"),
        ("tpu", "the package torch-tpu is not installed", "Use device='auto'"),
        ("neuron:1", "the package torch-neuronx is not installed", "Use device='auto'"),
    ],
)
def test_a_device_that_is_not_here(asked: str, numbers: str, remedy: str) -> None:
    with pytest.raises(DeviceError) as told:
        choose(asked)
    said = three_parts(told.value)
    assert repr(asked) in said[0] and numbers in said[1] and remedy in said[2]


def test_a_device_without_views_is_refused_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    backend = __import__("thalweg.device.backend", fromlist=["x"])
    monkeypatch.setattr(backend.accelerator, "current", lambda: "xpu")
    monkeypatch.setattr(backend.accelerator, "count", lambda kind: 1)
    monkeypatch.setattr(backend, "capabilities_of", lambda device: replace(known("xpu"), views=False))
    device, why = choose("auto")
    assert device == CPU and "no parameters that are views" in why
    with pytest.raises(DeviceError) as told:
        choose("xpu")
    assert "view of a flat buffer" in three_parts(told.value)[1]


# ---------------------------------------------------------------------------------------------- moves


def test_a_move_on_the_cpu_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = [*model.parameters(), *model.buffers()]
    assert CPU.move(model) is model
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))


def test_a_move_that_loses_parameters_is_an_error() -> None:
    class Loses(nn.Linear):
        def to(self, *args: object, **kwargs: object) -> nn.Module:  # type: ignore[override]
            self.weight = nn.Parameter(self.weight.detach().clone())
            return self

    with pytest.raises(DeviceError) as told:
        CPU.move(Loses(2, 2))
    assert "1 are others than before or are elsewhere, such as 'weight'" in three_parts(told.value)[1]


def test_float64_is_refused_where_there_is_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    with pytest.raises(DeviceError) as told:
        Device(torch.device("mps")).move(model)
    said = three_parts(told.value)
    assert "mps" in said[0] and "'0.weight'" in said[1] and "2 " in said[1] and ".float()" in said[2]
    with pytest.raises(DeviceError) as told:
        to_device({"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.float64)}, torch.device("mps"))
    assert "The data has float64" in three_parts(told.value)[0] and "1 tensors, such as 'y'" in told.value.numbers


# ---------------------------------------------------------------------------------------------- memory


def test_memory_of_the_host_is_known() -> None:
    left = memory.available(CPU)
    assert left is not None and memory.there(CPU) >= left > 0


# ---------------------------------------------------------------------------------------------- torch's calls, behind the shim


class Backend:
    """A module of torch that has what a backend without generators of its own has."""

    def __init__(self) -> None:
        self.draw = torch.Generator()

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def manual_seed(self, seed: int) -> None:
        self.draw.manual_seed(seed)

    def get_rng_state(self, at: int) -> torch.Tensor:
        return self.draw.get_state()

    def set_rng_state(self, state: torch.Tensor, at: int) -> None:
        self.draw.set_state(state)

    def get_device_name(self, device: torch.device) -> str:
        return "Backend 9"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 3 << 30, 4 << 30


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """One that registered itself, without the hooks that ``torch.accelerator`` asks."""
    made = Backend()
    monkeypatch.setattr(accelerator, "module", lambda kind: made if kind == "privateuseone" else None)
    return made


def test_a_backend_without_torchs_hooks_is_found(backend: Backend) -> None:
    device = torch.device("privateuseone", 1)
    assert accelerator.registered() == accelerator.current() == "privateuseone"
    assert accelerator.count("privateuseone") == 2 and accelerator.count("cpu") == 1 and accelerator.count("cuda") == 0
    assert accelerator.index() == 0 and accelerator.name(device) == "Backend 9"
    assert accelerator.memory_of(device) == (3 << 30, 4 << 30)


def test_a_backend_without_generators_is_seeded_by_its_module(backend: Backend) -> None:
    device = Device(torch.device("privateuseone"))
    host, own = device.generators()
    assert host is torch.default_generator
    own.manual_seed(7)
    wanted = torch.Generator().manual_seed(7)
    with same_generators(device):
        first = torch.rand(3, generator=backend.draw)
        assert torch.equal(first, torch.rand(3, generator=wanted))
    assert torch.equal(torch.rand(3, generator=backend.draw), first), "it stands where it stood"
    backend.default_generators = (torch.Generator(), torch.Generator())  # type: ignore[attr-defined]
    assert Device(torch.device("privateuseone", 1)).generators()[1] is backend.default_generators[1]  # type: ignore[attr-defined]


def test_waiting_for_a_backend(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(backend, "synchronize", lambda: waited.append(True), raising=False)
    accelerator.synchronize(torch.device("privateuseone"))
    assert waited == [True]
    with pytest.raises((RuntimeError, ValueError)):  # torch.accelerator's own has nothing to say to such a device
        torch.accelerator.synchronize(torch.device("privateuseone"))


def test_a_machine_without_an_accelerator_gives_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    if accelerator.current() is not None:
        pytest.skip("this machine has an accelerator")
    assert accelerator.registered() is None and accelerator.count("cuda") == 0 and accelerator.index() == 0
    accelerator.synchronize(torch.device("cpu"))
    accelerator.use(torch.device("cuda", 0))  # the only one there could be
    with pytest.raises(RuntimeError):
        accelerator.use(torch.device("cuda", 1))
    assert accelerator.memory_of(torch.device("cuda", 0)) == (0, 0)
