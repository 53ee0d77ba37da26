"""PyTorch's own database of optimizers, applied to ours: the same inputs, the same parameters; and states that go both ways."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("expecttest", reason="torch's testing modules need it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of modules that torch's own testing imports
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import thalweg.optim
from tests.conftest import three_parts
from thalweg.core import RecipeError, ThalwegError
from thalweg.optim import from_torch, to_torch
from thalweg.optim.convert import COUNTERPARTS, options_from_torch
from thalweg.rules import RULES

DATABASE = {info.optim_cls.__name__: info for info in optim_db}

#: Error inputs that are none here, by the option or kind of parameter that is wrong in torch, and why.
NO_ERRORS = {
    "foreach": "it is about a way of running that torch has and we do not: a tensor rate is always taken",
    "d": "0 switches the clipping of updates off here, as it does for every other clipping",
    "3 dimensions": "a batch of matrices is taken",
}


def inputs() -> list[Any]:
    """(rule, options in torch's words) of every input of the database whose class we have."""
    found = []
    for rule, about in COUNTERPARTS.items():
        for one in DATABASE[about.torch_class].optim_inputs_func(device="cpu", dtype=torch.float64):
            found.append(pytest.param(rule, one.kwargs, id=f"{rule}-{one.desc.replace(' ', '_')}"))
    return found


def errors() -> list[Any]:
    found = []
    for rule, about in COUNTERPARTS.items():
        for one in DATABASE[about.torch_class].optim_error_inputs_func(device="cpu", dtype=torch.float64):
            found.append(pytest.param(rule, one, id=f"{rule}-{one.optimizer_error_input.desc.replace(' ', '_')}"))
    return found


def parameters(rule: str) -> list[nn.Parameter]:
    """Of every number of dimensions that both sides treat alike."""
    low, most = COUNTERPARTS[rule].num_dims
    dtype = torch.float32 if low_precision(rule) else torch.float64
    draw = torch.Generator().manual_seed(3)
    shapes = [(6, 4), (5,), (2, 3, 2), (), (3, 7)]
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes if low <= len(s) <= most]


def low_precision(rule: str) -> bool:
    """Whether the maths is in bf16 by definition: then it is noise from there on, and each side rounds at other places."""
    return RULES[rule].defaults.get("precision") == "bf16"


def close(rule: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], rate: float) -> None:
    # torch keeps mu_product in float32
    atol, rtol = (0.1 * rate, 0.0) if low_precision(rule) else (1e-9, 1e-6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


def steps(optimizer: torch.optim.Optimizer, ps: Sequence[nn.Parameter], first: int, last: int) -> None:
    """Updates with gradients named by the number of the update."""
    for number in range(first, last):
        draw = torch.Generator().manual_seed(number)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.step()


def pair(rule: str, given: dict[str, Any]) -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter]]:
    """The optimizer of ours and of torch for one input."""
    theirs_ps, ours_ps = parameters(rule), parameters(rule)
    theirs = getattr(torch.optim, COUNTERPARTS[rule].torch_class)(theirs_ps, **copy.deepcopy(given))
    options = options_from_torch(rule, {**theirs.defaults, **copy.deepcopy(given)})
    return thalweg.optim.face_of(rule)(ours_ps, **options), theirs, ours_ps, theirs_ps


def refused(rule: str, given: dict[str, Any]) -> bool:
    """Whether an input has an option that we do not have; then conversion says so, by the option's name."""
    odd = [name for name, value in COUNTERPARTS[rule].torch_fixed.items() if given.get(name, value) != value]
    if odd:
        with pytest.raises(RecipeError, match=odd[0]) as caught:
            options_from_torch(rule, given)
        three_parts(caught.value)
    return bool(odd)


def test_every_class_of_torch_is_here_or_is_not_a_rule_of_ours() -> None:
    """A class that torch adds shows up here, and a counterpart that is dropped too."""
    named = {about.torch_class for about in COUNTERPARTS.values()}
    assert named == {name for name in DATABASE if hasattr(thalweg.optim, name)}
    assert set(DATABASE) - named == {"ASGD", "Adamax", "LBFGS", "Rprop", "SparseAdam"}


@pytest.mark.parametrize("rule,given", inputs())
def test_same_parameters_as_torch(rule: str, given: dict[str, Any]) -> None:
    if refused(rule, given):
        return
    ours, theirs, ours_ps, theirs_ps = pair(rule, given)
    starts = [p.detach().clone() for p in ours_ps]
    steps(ours, ours_ps, 0, 12)
    steps(theirs, theirs_ps, 0, 12)
    close(rule, ours_ps, theirs_ps, 12 * float(theirs.param_groups[0]["lr"]))
    assert not any(torch.equal(p, start) for p, start in zip(ours_ps, starts))


@pytest.mark.parametrize("rule,given", inputs())
def test_state_goes_on_in_the_other_library(rule: str, given: dict[str, Any]) -> None:
    """k steps there, converted, k steps here, equals 2k steps there; and the other way round."""
    if refused(rule, given):
        return
    _, theirs, ours_ps, theirs_ps = pair(rule, given)
    steps(theirs, theirs_ps, 0, 5)
    state = from_torch(theirs.state_dict(), rule)
    with torch.no_grad():
        for mine, p in zip(ours_ps, theirs_ps):
            mine.copy_(p)
    fresh = thalweg.optim.face_of(rule)(ours_ps)  # all options come with the state
    fresh.load_state_dict(state)
    kept = copy.deepcopy(theirs.state_dict())
    steps(fresh, ours_ps, 5, 10)
    assert_same(kept, theirs.state_dict())
    steps(theirs, theirs_ps, 5, 10)
    rate = float(theirs.param_groups[0]["lr"])
    close(rule, ours_ps, theirs_ps, 10 * rate)

    back = to_torch(fresh)
    other = getattr(torch.optim, COUNTERPARTS[rule].torch_class)(theirs_ps)
    other.load_state_dict(back)
    assert set(back["param_groups"][0]) == set(theirs.state_dict()["param_groups"][0])
    with torch.no_grad():
        for mine, p in zip(theirs_ps, ours_ps):
            mine.copy_(p)
    steps(other, theirs_ps, 10, 15)
    steps(fresh, ours_ps, 10, 15)
    close(rule, ours_ps, theirs_ps, 5 * rate)


def assert_same(a: Any, b: Any) -> None:
    """Two trees of tensors, equal to the bit: an optimizer that goes on must not move what was converted."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("rule,one", errors())
def test_what_torch_refuses_is_refused(rule: str, one: Any) -> None:
    given = one.optimizer_error_input
    params = parameters(rule) if given.params is None else given.params
    if "foreach" in given.kwargs or "fused" in given.kwargs:
        pytest.skip(NO_ERRORS["foreach"])
    if issubclass(one.error_type, Warning):
        with pytest.warns(one.error_type, match=one.error_regex):
            thalweg.optim.face_of(rule)(params, **given.kwargs)
        return
    if rule_takes(rule, params):
        pytest.skip(NO_ERRORS["3 dimensions"])
    if given.kwargs.get("d") == 0:
        pytest.skip(NO_ERRORS["d"])
    with pytest.raises((ThalwegError, one.error_type)) as caught:
        optimizer = thalweg.optim.face_of(rule)(params, **options_from_torch(rule, given.kwargs))
        if one.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()
    if isinstance(caught.value, ThalwegError):
        three_parts(caught.value)
    else:  # what torch's own base class refuses
        caught.match(one.error_regex)


def rule_takes(rule: str, params: Any) -> bool:
    """Whether the error is a real tensor of a number of dimensions that torch's class does not take."""
    most = COUNTERPARTS[rule].num_dims[1]
    return isinstance(params, list) and any(
        isinstance(p, Tensor) and not p.is_complex() and p.is_leaf and p.ndim > most for p in params
    )


def test_states_that_have_no_counterpart_are_refused() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    with pytest.raises(RecipeError, match="lion") as caught:
        to_torch(thalweg.optim.Lion([p]))
    three_parts(caught.value)
    with pytest.raises(RecipeError, match="ASGD") as caught:
        from_torch(torch.optim.ASGD([p]))
    three_parts(caught.value)
    with pytest.raises(RecipeError, match="Give the rule"):
        from_torch(torch.optim.Adam([p]).state_dict())
    for odd, word in (
        ({"average": 0.9}, "average"),
        ({"slots": "bf16+error"}, "m"),
        ({"stages": "cautious"}, "stages"),
        ({"weight_decay": 0.1, "decay_form": "corrected"}, "corrected"),
    ):
        optimizer = thalweg.optim.AdamW([p], **odd)
        optimizer.step()
        with pytest.raises(RecipeError, match=word) as caught:
            to_torch(optimizer)
        three_parts(caught.value)
    with pytest.raises(RecipeError, match="Give the optimizer itself"):
        to_torch(thalweg.optim.Adafactor([p]).state_dict())
    for shape, face in (((3, 2, 2, 2), thalweg.optim.Adafactor), ((3,), thalweg.optim.Muon)):
        q = nn.Parameter(torch.ones(shape))
        q.grad = torch.ones(shape)
        optimizer = face([q])
        optimizer.step()
        with pytest.raises(RecipeError, match=r"dimensions|slot 'v'") as caught:
            to_torch(optimizer)
        three_parts(caught.value)
    with pytest.raises(RecipeError, match="exp_avg"):
        theirs = torch.optim.Adam([p])
        theirs.step()
        from_torch({**theirs.state_dict(), "param_groups": [{"params": [0], "lr": 0.1}]}, "sgd")


def test_parameters_that_were_never_updated_begin_after_conversion() -> None:
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    theirs = torch.optim.AdamW([{"params": [early]}, {"params": [late], "lr": 0.5}], lr=0.1)
    early.grad = torch.ones(2)
    theirs.step()
    ours = thalweg.optim.AdamW([{"params": [early]}, {"params": [late]}])
    ours.load_state_dict(from_torch(theirs))
    assert [group["lr"] for group in ours.param_groups] == [0.1, 0.5]
    late.grad = torch.ones(2)
    ours.step()
    assert float(ours.state[early]["step"]) == 2 and float(ours.state[late]["step"]) == 1
    torch.testing.assert_close(late.detach(), torch.full((2,), 1 - 0.5 - 0.5 * 0.01))


def test_state_of_torch_or_of_a_newer_version_is_not_loaded_unseen() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    ours, theirs = thalweg.optim.Adam([p]), torch.optim.Adam([p])
    theirs.step()
    with pytest.raises(RecipeError, match="from_torch") as caught:
        ours.load_state_dict(theirs.state_dict())
    three_parts(caught.value)
    newer = ours.state_dict()
    newer["param_groups"][0]["schema"] += 1
    with pytest.raises(RecipeError, match="newer thalweg") as caught:
        ours.load_state_dict(newer)
    assert "Upgrade" in three_parts(caught.value)[2]


def test_what_schedulers_wrote_into_the_groups_travels_along() -> None:
    """A run under OneCycleLR goes over in the middle, and comes back."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    theirs, ours = torch.optim.AdamW([p], lr=0.01), thalweg.optim.AdamW([q])
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=20)
    for number in range(5):
        steps(theirs, [p], number, number + 1)
        schedule.step()
    ours.load_state_dict(from_torch(theirs))
    with torch.no_grad():
        q.copy_(p)
    group = ours.param_groups[0]
    assert (group["max_lr"], group["betas"]) == (0.1, theirs.param_groups[0]["betas"]) and group["b1"] != 0.9
    back = to_torch(ours)["param_groups"][0]
    assert back == {**theirs.state_dict()["param_groups"][0], "params": [0]}


def test_bf16_slots_of_torch_go_on_in_float32() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    theirs = torch.optim.Adam([p])
    theirs.step()
    ours = thalweg.optim.Adam([p])
    ours.load_state_dict(from_torch(theirs))
    assert ours.state[p]["m"].dtype == torch.float32 and theirs.state[p]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(ours.state[p]["m"], theirs.state[p]["exp_avg"].float())
