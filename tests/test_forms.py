"""What each rank holds in each form, planned; and what ``parallel = "auto"`` chooses by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import thalweg
from tests.conftest import run_cli, three_parts
from tests.models import ragged_text, small_gpt, text_loss
from thalweg.core import Decision, Layout, Recipe, RecipeError, Task, human_bytes
from thalweg.device.chips import CHIPS
from thalweg.engine import resolve
from thalweg.engine.layout import Planned, fitting_layout, settle_layout
from thalweg.engine.memory.forms import Way, pick, tell_form
from thalweg.engine.memory.layouts import MACHINE, NETWORK, part_of, talk_seconds
from thalweg.engine.memory.planner import plan_there
from thalweg.engine.settle import Decisions
from thalweg.recipes.models.gpt import GPT


def task_of(model: Any) -> Task:
    return Task(name="gpt", model=model, loss=text_loss, data=lambda: ragged_text(64))


def made(**changes: Any) -> Recipe:
    base = {"precision": "fp32", "train.batch": 64, "train.micro_batch": 1, "train.steps": 10}
    return Recipe().override({**base, **changes})


# ------------------------------------------------------------------------------------ against torch's own FSDP2


@contextmanager
def fake_ranks(rank: int, world: int) -> Iterator[Any]:
    """This process as one of many that are not there; their mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def large() -> nn.Module:
    return GPT(vocab=50257, context=1024, width=2048, heads=16, layers=24)


def broad() -> nn.Module:
    """As many parameters in a quarter of the layers, which take a quarter of the time."""
    return GPT(vocab=50257, context=1024, width=4096, heads=32, layers=6)


def fsdp2_holds(rank: int, world: int, make: Callable[[], nn.Module] = large) -> tuple[int, int, int, int]:
    """(elements of all, local bytes of parameters, of gradients, of AdamW's slots), by torch, in fake tensors."""
    from torch.distributed.fsdp import fully_shard

    def nbytes(x: Any) -> int:
        return int(x.to_local().nbytes)

    with fake_ranks(rank, world) as mesh, FakeTensorMode():
        model: Any = make()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step()
        ps = list(model.parameters())
        slots = sum(nbytes(s) for p in ps for key, s in optimizer.state[p].items() if key != "step")
        return (
            sum(p.numel() for p in ps),
            sum(map(nbytes, ps)),
            sum(nbytes(p.grad) for p in ps),
            slots,
        )


def test_the_plan_of_a_large_model_is_what_fsdp2_holds_without_allocating_it() -> None:
    """GPT of 1.4 thousand million parameters, as rank 3 of 64: within 5 %."""
    numel, parameters, gradients, slots = fsdp2_holds(3, 64, broad)
    assert numel > 1.3e9
    ledger = thalweg.memory.estimate(task_of(broad), made(parallel="fsdp"), on="h100-80gb", devices=64)
    for planned, held in ((ledger.parameters, parameters), (ledger.gradients, gradients), (ledger.slots, slots)):
        assert planned == pytest.approx(held, rel=0.05)
        assert planned >= held, "the rank that has most holds no less than rank 3"


@pytest.mark.parametrize(("rows", "num"), [(10, 4), (3, 4), (64, 64), (65, 64), (1, 2)])
def test_parts_are_cut_as_torch_cuts_them(rows: int, num: int) -> None:
    chunks = torch.empty(rows, 5).chunk(num)
    mine = [part_of((rows, 5), num, rank) for rank in range(num)]
    assert [shape for shape in mine if shape[0]] == [tuple(chunk.shape) for chunk in chunks]
    assert part_of((rows, 5), num) == max(mine)


# ------------------------------------------------------------------------------------ what "auto" chooses


def planned(limit: int = 10**10, **changes: Any) -> Any:
    """A plan for eight chips with so much memory; nothing is timed."""
    return plan_there(task_of(small_gpt), made(**changes), "h100-80gb", devices=8, most=limit, timed=False)


def test_auto_is_the_simplest_form_that_fits_and_says_by_which_numbers() -> None:
    micro = {"train.micro_batch": 8}  # so many samples that activations count
    peaks = {form.name: form.ledger.peak for form in planned(**micro).forms}
    assert list(peaks) == ["ddp", "fsdp", "fsdp, recompute=blocks"]
    recipe, ledger = made(), planned(**micro).ledger
    layouts = {"ddp": Layout(data=8), "fsdp": Layout(shard=8), "fsdp, recompute=blocks": Layout(shard=8)}
    again = {name: replace(recipe, recompute="blocks" if "blocks" in name else None) for name in layouts}
    ways = [
        Way(layout, again[name], replace(ledger, peak=peak))
        for (name, layout), peak in zip(layouts.items(), (3000, 2000, 1000))
    ]
    assert [way.name for way in ways] == list(layouts)
    for limit, name in (
        (3000, "ddp"),
        (2999, "fsdp"),
        (1999, "fsdp, recompute=blocks"),
        (999, "fsdp, recompute=blocks"),
    ):
        decide, chosen = Decisions(), pick(ways, None, limit)
        tell_form(ways, chosen, limit, decide.take)
        assert chosen.name == name
        passed = [way.name for way in ways if way.ledger.peak > max(limit, chosen.ledger.peak)]
        fits = "the simplest that fits" if limit >= 1000 else "takes the least, and does not fit"
        others = "".join(f"; {other} would take {human_bytes({'ddp': 3000, 'fsdp': 2000}[other])}" for other in passed)
        peak = f"predicted peak {human_bytes(chosen.ledger.peak)} of {human_bytes(limit)} on a rank"
        assert decide.made == [Decision("parallel", name, f"{fits}: {peak}{others}")]
    tight = planned((peaks["ddp"] + peaks["fsdp"]) // 2 if peaks["fsdp"] < peaks["ddp"] else 0, **micro)
    assert {d[0]: d[1] for d in tight.decisions}["parallel"] == next(form.name for form in tight.forms if form.chosen)
    assert tight.ledger == next(form.ledger for form in tight.forms if form.chosen)


def test_a_form_that_is_asked_for_is_the_plan_whatever_fits() -> None:
    found = plan_there(task_of(small_gpt), made(parallel="fsdp"), "h100-80gb", devices=8, most=10**10)
    assert "parallel" not in {d[0] for d in found.decisions} and found.sharded
    assert [form.name for form in found.forms if form.chosen] == ["fsdp"] and len(found.forms) == 3
    assert all(form.seconds for form in found.forms)
    own = planned(parallel={"data": 2, "shard": 4})
    assert [(form.name, form.chosen) for form in own.forms] == [("hsdp (data=2, shard=4)", True)]
    assert own.ledger == own.forms[0].ledger and own.sharded
    with pytest.raises(RecipeError) as err:
        planned(parallel={"shard": 3})
    assert "does not multiply out to 8 ranks" in three_parts(err.value)[0]


def test_cut_layers_are_planned_too() -> None:
    found = plan_there(task_of(small_gpt), made(parallel={"tensor": 2}), "h100-80gb", devices=8, most=10**10)
    assert found.forms[0].name == "data=4, tensor=2" and found.forms[0].chosen and found.forms[0].seconds is None
    assert found.seconds is None and found.timed.startswith("not computed: layers are cut")
    cut = {"qkv.weight", "up.weight", "up.bias", "out.weight", "down.weight"}  # the head has 17 rows, and stays whole
    rooms = [
        p.numel() // 2 if ".".join(name.split(".")[-2:]) in cut else p.numel()
        for name, p in small_gpt().named_parameters()
    ]
    held = sum(4 * 256 * -(-room // 256) for room in rooms)
    assert (found.ledger.parameters, found.ledger.slots) == (held, 2 * held)
    assert found.batch == 64 and found.ledger.micro_batch == 1 and found.ledger.gathered == 0


def test_what_adds_up_and_what_gathering_costs() -> None:
    found = planned(**{"optimizer.rule": "muon", "regularize.average": 0.99})
    ddp, fsdp = found.forms[:2]
    for form in found.forms:
        ledger = form.ledger
        assert ledger.peak == sum(size for _, size in ledger.rows()), form.name
    assert ddp.ledger.slots / 8 <= fsdp.ledger.slots < ddp.ledger.slots, "owners share slots of whole matrices"
    assert ddp.ledger.averages / 8 <= fsdp.ledger.averages < ddp.ledger.averages
    once, again = (planned(parallel="fsdp", **{"train.micro_batch": m}).ledger for m in (8, 4))
    assert again.gathered > once.gathered + ddp.ledger.gradients // 2, "gradients wait whole for the last micro-batch"


def test_seconds_of_talk() -> None:
    chip, GB = CHIPS["h100-80gb"], 10**9
    at = lambda layout, num=1: talk_seconds(chip, layout, 4 * GB, 4 * GB, num)
    assert at(Layout()) == 0
    assert at(Layout(data=8)) == pytest.approx(2 * 7 / 8 * 4 * GB / chip.link)
    assert at(Layout(data=8), 4) == at(Layout(data=8)), "one sum a step, whatever the accumulation"
    assert at(Layout(shard=8)) == pytest.approx(3 * 7 / 8 * 4 * GB / chip.link)
    assert at(Layout(shard=8), 4) == pytest.approx(9 * 7 / 8 * 4 * GB / chip.link)
    assert at(Layout(data=8 * MACHINE)) > 8 * at(Layout(data=8)), "between machines it is slower"
    both = 3 * 7 / 8 * 4 * GB / chip.link + 2 * 7 / 8 * 4 * GB / 8 / NETWORK
    assert at(Layout(data=8, shard=8)) == pytest.approx(both)


# ------------------------------------------------------------------------------------ on this machine


def test_a_plan_for_ranks_here(tmp_path: Any) -> None:
    found = thalweg.memory.forecast(task_of(small_gpt), made(**{"train.batch": 8}), devices=4)
    assert (found.devices, found.batch, found.ledger.micro_batch) == (4, 8, 1)
    assert [form.name for form in found.forms] == ["ddp", "fsdp", "fsdp, recompute=blocks"] and found.forms[0].chosen
    ddp, fsdp = (form.ledger for form in found.forms[:2])
    assert fsdp.parameters < ddp.parameters and fsdp.gathered > ddp.gathered == 0
    assert found.timed.startswith("measured here") and "without what ranks send" in found.timed
    told = run_cli("plan", "digits", "--ranks", "2", "--set", "parallel=fsdp", "--set", "precision=fp32", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "on 2 x" in told.stdout and "on each rank" in told.stdout and "gathered" in told.stdout
    for words, error in (
        (("--ranks", "0"), "--ranks 0"),
        (("--ranks", "4", "--on", "h100-80gb", "x2"), "names 2 chips"),
    ):
        refused = run_cli("plan", "digits", *words, cwd=tmp_path)
        assert refused.returncode == 2 and error in refused.stderr


# ------------------------------------------------------------------------------------ in a run


class Four:
    """As much of four ranks as is asked for."""

    world = 4


def test_a_run_stands_as_its_memory_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lambda: GPT(vocab=17, context=12, width=128, heads=2, layers=4)
    found = resolve(task_of(model), made(**{"train.micro_batch": 8}))
    assert found.plan.ledger is not None
    whole = replace(found.plan.ledger, temporary=0, process=0)
    whole = replace(whole, peak=whole.state + whole.activations)
    less = replace(whole, activations=0, peak=whole.state, recompute="blocks")
    open_ = replace(found.plan.recipe, recompute=None)
    planned_ = Planned(open_, whole, lambda recipe: less, found.plan, found.model, found.device)
    ways = {form: planned_.way(layout, recipe) for form, layout, recipe in (
        ("ddp", Layout(data=4), open_), ("fsdp", Layout(shard=4), open_),
        ("fsdp, recompute=blocks", Layout(shard=4), replace(open_, recompute="blocks")),
    )}  # fmt: skip
    peaks = [way.ledger.peak for way in ways.values() if way]
    assert sorted(peaks, reverse=True) == peaks and len(set(peaks)) == 3
    for (form, way), limit in zip(ways.items(), peaks):
        decide = Decisions()
        monkeypatch.setattr("thalweg.engine.layout._limit", lambda device, world, limit=limit: limit)
        assert fitting_layout(None, planned_, Four(), decide) == (way.layout, way.recipe, way.ledger)  # type: ignore[union-attr, arg-type]
        assert [(made.path, made.value) for made in decide.made] == [("parallel", form)]
    asked = fitting_layout(Layout(shard=4), planned_, Four(), decide)  # type: ignore[arg-type]
    assert asked == (Layout(shard=4), replace(open_, recompute="none"), ways["fsdp"].ledger)  # type: ignore[union-attr]
    unknown = replace(planned_, whole=None)
    assert fitting_layout(None, unknown, Four(), decide)[0] == Layout(data=4)  # type: ignore[arg-type]
    assert "not predicted" in decide.made[-1].reason


def test_a_run_that_goes_on_stands_as_it_did() -> None:
    saved = resolve(task_of(small_gpt), made()).plan
    for before, now in (
        (Layout(data=2), Layout(data=4)), (Layout(shard=2), Layout(shard=4)),
        (Layout(data=2, shard=2), Layout(data=2, shard=2)), (Layout(data=2, shard=4), Layout(shard=4)),
    ):  # fmt: skip
        plan = replace(saved, layout=before.to_dict())
        assert settle_layout(made(), Four(), Decisions(), plan) == now  # type: ignore[arg-type]
        assert settle_layout(made(parallel="ddp"), Four(), Decisions(), plan) == Layout(data=4)  # type: ignore[arg-type]
    assert settle_layout(made(), Four(), Decisions(), saved) is None, "one rank had nothing to choose"  # type: ignore[arg-type]
