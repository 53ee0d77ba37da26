"""``RuleOptimizer``: the engine behind the interface of ``torch.optim.Optimizer``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core import ModelError, RecipeError, did_you_mean, seed_for
from thalweg.core.recipe import ROUNDINGS, WAYS
from thalweg.device import exact_dtype
from thalweg.device.kept import restored
from thalweg.optim import checks
from thalweg.optim.batch import FOLDS, evaluation_weights, fold_of, laid_like, normal_like
from thalweg.optim.codecs import CODECS
from thalweg.optim.cohort import Cohort
from thalweg.optim.history import NormHistory, excess
from thalweg.optim.norm import global_norm
from thalweg.optim.program import Program
from thalweg.optim.shared import first_values, settle_over
from thalweg.optim.weights import average_share, climb
from thalweg.rules import RULES, STAGES, Rule

#: Version of what ``state_dict`` holds.
SCHEMA = 1

#: What every group has beside the options of its rule.
_COMMON = ("lr", "weight_decay", "decay_form", "maximize", "stages", "fold", "aux_lr", "aux_options")
#: What else a group may hold: marks of schedulers and wrappers, and what is kept here with the state.
_MARKS = ("params", "initial_lr", "peak_lr", "name", "param_names", "moving", "rule", "schema")
#: Options that schedules of others move: torch's OneCycleLR and CyclicLR, a warm-up of momentum.
_RATES = ("b1", "b2", "b3", "momentum")


class RuleOptimizer(torch.optim.Optimizer):
    """Runs a registered rule on parameters where they lie.

    Args:
        params: parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or 0-dim tensor; None: the rule's published default.
        weight_decay: strength of decay; torch's convention: every parameter of the group decays.
        decay_form: a key of ``thalweg.rules.DECAYS``, or None: the rule's own.
        maximize: climb instead of descending.
        stages: what combines with the rule: a name, a list of names, or {name: options}.
        fold: how parameters of more than two dimensions become matrices, "batch" or "flatten"; None: three dimensions are a
            batch of matrices, more a convolution's kernel.
        aux_lr, aux_options: rate (None: the group's) and options of AdamW, which takes what the rule does not (vectors).
        slots: how slots are kept: "full", "bf16", "bf16+error" or "int8".
        rounding: of parameters under 32 bits: "nearest", "stochastic", "kahan"; "auto": bfloat16 stochastic, float16 Kahan.
        average: decay of an exponential average of the weights, see ``averaged``; 0: none.
        clip: largest global gradient norm over all groups; 0: no clipping.
        clip_history: deviations above its running mean that the norm may have, such as 2.5; 0: any (``NormHistory``).
        skip_nonfinite: an update whose gradients hold an infinity or NaN changes nothing, not even counts.
        way: how updates run, one of ``thalweg.optim.WAYS``; None chooses by size, device and maths.
        seed: of random bits.
        options: the rule's own, such as ``b1``; ``betas=(b1, b2)`` is understood too.

    Raises:
        RecipeError: for an option that the rule does not have, or a value that it cannot have.
        ModelError: for complex parameters.
    """

    rule_name: ClassVar[str] = "adamw"
    rule: ClassVar[Rule] = RULES["adamw"]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    _step_supports_amp_scaling = True  # GradScaler hands over its scale and its finding, and reads nothing back

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        weight_decay: float = 0.0,
        decay_form: str | None = None,
        maximize: bool = False,
        stages: str | Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
        fold: str | None = None,
        aux_lr: float | Tensor | None = None,
        aux_options: Mapping[str, Any] | None = None,
        slots: str = "full",
        rounding: str = "auto",
        average: float = 0.0,
        clip: float = 0.0,
        clip_history: float = 0.0,
        skip_nonfinite: bool = False,
        way: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if "betas" in options:
            options.update(checks.named(options.pop("betas")))
        self.how: dict[str, Any] = {
            "slots": checks.one_of("slots", slots, CODECS),
            "rounding": checks.one_of("rounding", rounding, ("auto", *ROUNDINGS)),
            "average": checks.number("average", average, below=1.0),
            "clip": checks.number("clip", clip),
            "clip_history": checks.number("clip_history", clip_history),
            "skip_nonfinite": skip_nonfinite,
            "way": way if way is None else checks.one_of("way", way, WAYS),
            "seed": seed,
        }
        defaults = {
            "lr": self.rule.lr if lr is None else lr,
            "weight_decay": weight_decay,
            "decay_form": checks.decay_form(decay_form, self.rule),
            "maximize": maximize,
            "stages": checks.stages(stages),
            "fold": fold,
            "aux_lr": aux_lr,
            "aux_options": dict(aux_options or {}),
            **self.rule.options(options),
        }
        if betas := checks.betas(defaults):
            defaults["betas"] = betas  # where torch's schedulers look for a momentum to cycle
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        self._cohorts: list[list[Cohort]] = []
        self._live: list[list[int]] = []
        self._shared: dict[str, Tensor] = {}
        self._programs: dict[Any, Program] = {}
        self._clears = False
        self._curvature: dict[Tensor, Tensor] = {}
        self._history: NormHistory | None = None
        self._decisive = ("decay_form", "maximize", *self.rule.defaults)
        self._asked: list[list[Any] | None] = []
        self._answers: list[set[Program]] = []
        self._rates: list[dict[str, Any]] = []
        self._moved: list[dict[tuple[str, torch.device], Tensor]] = []

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked now, its slots are made at its first update."""
        if "betas" in param_group:
            param_group = {**checks.named(param_group["betas"]), **param_group}
        for name in sorted(set(param_group) - {*self.defaults, *_MARKS}):
            raise RecipeError(
                f"A parameter group has no option '{name}'.",
                f"Given: {name}={param_group[name]!r}.",
                did_you_mean(name, (*_COMMON, *self.rule.defaults)),
            )
        group = {**self.defaults, **param_group}
        self.rule.options({name: group[name] for name in self.rule.defaults})
        RULES["adamw"].options(group["aux_options"])
        param_group["stages"] = checks.stages(group["stages"])
        param_group["decay_form"] = checks.decay_form(group["decay_form"], self.rule)
        if betas := checks.betas(group):
            param_group["betas"] = betas
        if group["fold"] is not None:
            checks.one_of("fold", group["fold"], FOLDS)
        for name in ("lr", "weight_decay", "aux_lr"):
            if group[name] is not None:
                checks.number(name, group[name])
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added.setdefault("peak_lr", added.get("initial_lr", added["lr"]))
        added.setdefault("moving", ())
        added["rule"], added["schema"] = self.rule_name, SCHEMA
        if isinstance(added["peak_lr"], Tensor):
            added["peak_lr"] = added["peak_lr"].clone()
        for p in added["params"]:
            if p.is_complex():
                raise ModelError(
                    f"{type(self).__name__} does not train complex parameters.",
                    f"A parameter of shape {tuple(p.shape)} is {p.dtype}.",
                    "Train torch.view_as_real(p) instead.",
                )
        self._cohorts.append([])
        self._live.append([])
        self._rates.append({})
        self._moved.append({})
        self._asked.append(None)
        self._answers.append(set())

    def _follow(self, index: int, group: dict[str, Any], *, begin: bool = True) -> None:
        """Take note of decay rates that were changed from outside; one that moves becomes a tensor, and its kernel stays."""
        known = self._rates[index]
        if known and all(group[name] is value for name, value in known.items()):
            return
        if "betas" in group:
            mine = checks.betas(group)
            if known and group["betas"] == known["betas"]:
                group["betas"] = mine  # b1 or b2 may have been set
            elif group["betas"] != mine:
                group.update(checks.named(group["betas"]))
        found = {name: group[name] for name in (*_RATES, "betas") if name in group}
        for name in known:
            if (
                name != "betas"
                and type(found[name]) is float
                and found[name] != known[name]
                and name not in group["moving"]
            ):
                group["moving"] = (*group["moving"], name)
        if known or begin:
            self._rates[index] = found

    def _options(self, index: int, group: dict[str, Any], device: torch.device, exact: torch.dtype) -> dict[str, Any]:
        """The rule's options of a group; those that move as tensors."""
        options = {name: group[name] for name in self.rule.defaults}
        for name in group["moving"]:
            if type(options[name]) is float:
                moved = self._moved[index]
                if (name, device) not in moved:
                    moved[name, device] = torch.zeros((), dtype=exact, device=device)
                options[name] = moved[name, device].fill_(options[name])
        return options

    def _rule_for(self, p: Tensor) -> Rule:
        return self.rule if p.ndim >= self.rule.least_ndim else RULES["adamw"]

    def _program(self, index: int, group: dict[str, Any], p: Tensor) -> Program:
        """The program of a parameter; parameters with equal ones are updated together."""
        rule = self._rule_for(p)
        mine = rule is self.rule
        exact = exact_dtype(p.device)
        options = self._options(index, group, p.device, exact) if mine else rule.options(group["aux_options"])
        form = group["decay_form"] if group["weight_decay"] else None
        stages = group["stages"] if mine else {}
        listed = tuple((name, tuple(given.items())) for name, given in stages.items())
        fixed = tuple(id(v) if isinstance(v, Tensor) else v for v in options.values())
        key = (rule.name, fixed, form, listed, group["maximize"], p.dtype, p.device, self._unscales(), self._clears)
        if key not in self._programs:
            self._programs[key] = Program(
                rule,
                options,
                stages=[(STAGES[name], STAGES[name].options(given)) for name, given in stages.items()],
                decay_form=form,
                dtype=p.dtype,
                rounding=self.how["rounding"],
                codec=CODECS[self.how["slots"]],
                average=self.how["average"] > 0,
                unscale=self._unscales(),
                maximize=group["maximize"],
                clear=self._clears,
                seed=seed_for(self.how["seed"], "rounding"),
                exact=exact,
            )
        return self._programs[key]

    def _unscales(self) -> bool:
        return bool(self.how["clip"] or self.how["clip_history"]) or getattr(self, "grad_scale", None) is not None

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero: bool = False) -> Any:
        """One update of every parameter that has a gradient; each counts its own updates.

        Args:
            closure: computes the loss and its gradients again, as for every torch optimizer.
            zero: leave zeros in the gradients, in the same pass; ``zero_grad`` has no more to do then.
        """
        self._clears = zero
        loss = None
        if closure is not None:
            if getattr(self, "found_inf", None) is not None:
                del self.grad_scale, self.found_inf  # the scaler will not come back to do it
                raise RecipeError(
                    "A loss scaler cannot step with a closure.",
                    "It has looked for infinities, and the closure would make other gradients.",
                    "Call the closure yourself, then scaler.step(optimizer).",
                )
            with torch.enable_grad():
                loss = closure()
        gradients = [self._gather(index, group) for index, group in enumerate(self.param_groups)]
        divisor, skipped = self._divisor(gradients)
        cohorts = [(group, c) for group, mine in zip(self.param_groups, self._cohorts) for c in mine if c.batch.gs]
        for _, cohort in cohorts:
            cohort.count(skipped)
        numbers = [self._scalars(group, cohort, divisor, skipped) for group, cohort in cohorts]
        if self.rule.shared and cohorts:
            self._settle(cohorts, numbers, skipped)
        for (_, cohort), scalars in zip(cohorts, numbers):
            cohort.run({**scalars, **self._shared}, self._extra(cohort))
            cohort.batch.gs = []
        self._curvature.clear()
        return loss

    def _gather(self, index: int, group: dict[str, Any]) -> list[Tensor]:
        """The gradients of a group, handed to its cohorts; cohorts are made and split where membership changed."""
        self._follow(index, group)
        ps = [p for p in group["params"] if p.grad is not None]
        gs = [p.grad for p in ps]
        for p, g in zip(ps, gs):
            if g.layout is not torch.strided:
                raise ModelError(
                    f"{type(self).__name__} does not take sparse gradients.",
                    f"A parameter of shape {tuple(p.shape)} has one.",
                    "Build the embedding with sparse=False.",
                )
        live = [id(p) for p in ps]
        programs = self._wanted(index, group, ps)
        if live != self._live[index] or any(c.program not in programs for c in self._cohorts[index]):
            self._regroup(index, group, ps)
            self._live[index] = live
        found = dict(zip(live, gs))
        for cohort in self._cohorts[index]:
            cohort.hold([found[i] for i in cohort.ids] if cohort.ids and cohort.ids[0] in found else [])
        return gs

    def _wanted(self, index: int, group: dict[str, Any], ps: list[Tensor]) -> set[Program]:
        """The programs that the group's parameters should run: options may have been changed since the last step."""
        least = self.rule.least_ndim
        kinds = {(p.ndim >= least, p.dtype, p.device): p for p in ps}
        asked = [
            self._unscales(),
            self._clears,
            bool(group["weight_decay"]),
            *kinds,
            *map(group.__getitem__, self._decisive),
        ]
        plain = not (group["moving"] or group["stages"] or group["aux_options"])  # else there is more to look at
        if not plain or asked != self._asked[index]:
            self._asked[index] = asked if plain else None
            self._answers[index] = {self._program(index, group, p) for p in kinds.values()}
        return self._answers[index]

    def _regroup(self, index: int, group: dict[str, Any], ps: list[Tensor]) -> None:
        """Parameters that were together and both have a gradient now stay together; others part ways; new ones begin."""
        live = {id(p): p for p in ps}
        cohorts: list[Cohort] = []
        known: set[int] = set()
        for cohort in self._cohorts[index]:
            known.update(cohort.ids)
            here = [i for i, number in enumerate(cohort.ids) if number in live]
            away = [i for i, number in enumerate(cohort.ids) if number not in live]
            cohorts += [cohort] if not here or not away else [cohort.split(here), cohort.split(away)]
        fresh: dict[Program, list[Tensor]] = {}
        for p in ps:
            if id(p) not in known:
                fresh.setdefault(self._program(index, group, p), []).append(p)
        for program, members in fresh.items():
            folds = [group["fold"] or fold_of(p.shape) for p in members]
            cohorts.append(Cohort(program, members, folds, way=self._way(program)))
        self._cohorts[index] = [self._current(index, group, cohort) for cohort in cohorts]
        used = {cohort.program for mine in self._cohorts for cohort in mine}
        self._programs = {key: program for key, program in self._programs.items() if program in used}
        for cohort in self._cohorts[index]:
            for i, p in enumerate(cohort.ps):
                self.state[p].update(cohort.state(i))

    def _way(self, program: Program) -> str | None:
        """A way that was asked for holds for the rule; what is left to AdamW chooses."""
        return self.how["way"] if program.rule is self.rule else None

    def _current(self, index: int, group: dict[str, Any], cohort: Cohort) -> Cohort:
        """The cohort with the program that its group's options ask for now; slots of the same name go on."""
        program = self._program(index, group, cohort.ps[0])
        if program is cohort.program:
            return cohort
        kept = dict(zip(cohort.program.parts, cohort.slots))
        slots = [kept.get(part) for part in program.parts]
        way = self._way(program)
        return Cohort(program, cohort.ps, cohort.folds, way=way, slots=slots, t=cohort.t, tries=cohort.tries)

    def _divisor(self, gradients: list[list[Tensor]]) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are divided by (loss scale and clipping), and whether the update is skipped."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        everything = [g for gs in gradients for g in gs]
        clips = self.how["clip"] or self.how["clip_history"]
        if not everything or not (clips or self.how["skip_nonfinite"]):
            return scale, found
        norm = global_norm(everything)
        if self.how["skip_nonfinite"]:
            bad = (~torch.isfinite(norm)).to(torch.float32)
            found = bad if found is None else torch.maximum(found, bad)
        if not clips:
            return scale, found
        length = norm if scale is None else norm / scale
        history, ok = None, None
        if most := self.how["clip_history"]:
            history = self._history = self._history or NormHistory(most, norm.device, exact_dtype(norm.device))
            ok = None if found is None else torch.isfinite(length) & (found == 0)
        times = excess(length, self.how["clip"], history, ok)
        return times if scale is None else scale * times, found

    def _scalars(
        self, group: dict[str, Any], cohort: Cohort, divisor: Tensor | None, skipped: Tensor | None
    ) -> dict[str, Any]:
        mine = cohort.program.rule is self.rule
        lr = group["lr"] if mine or group["aux_lr"] is None else group["aux_lr"]
        found = {"lr": lr, "wd": group["weight_decay"], "peak": group.get("max_lr", group["peak_lr"])}
        if not isinstance(found["peak"], Tensor) and not found["peak"]:
            found["peak"] = 1.0  # a rate of 0 throughout: there is nothing to scale by
        found |= {n: v for n, v in cohort.program.options.items() if isinstance(v, Tensor)}
        if divisor is not None:
            found["divisor"] = divisor
        if skipped is not None:
            found["skipped"] = skipped
        if self.how["average"]:
            found["share"] = average_share(self.how["average"], cohort.t)
        return found

    def _settle(
        self, cohorts: list[tuple[dict[str, Any], Cohort]], numbers: list[dict[str, Any]], skipped: Tensor | None
    ) -> None:
        """New values of the numbers that belong to all parameters of every group."""
        mine = [(c, n) for (_, c), n in zip(cohorts, numbers) if c.program.rule is self.rule]
        first = mine[0][0]
        device, exact = first.t.device, first.program.exact
        if not self._shared:
            self._shared = first_values(self.rule, first.program.options, device, exact)
        measured = []
        for cohort, given in mine:
            scalars = {name: torch.as_tensor(value, device=device) for name, value in given.items()}
            measured.append((cohort.program, cohort.batch, {**scalars, "t": cohort.t}))
        rates = [torch.as_tensor(given["lr"], dtype=exact, device=device) for _, given in mine]
        settle_over(measured, self._shared, rates=rates, skipped=skipped)

    @torch.no_grad()
    def estimate_curvature(self, batch: float) -> None:
        """Take the gradients that the parameters hold now for an estimate of the curvature, for rules that use one (Sophia).

        They are those of the *mean* loss over ``batch`` samples whose labels were drawn from the model's own predictions;
        batch * gradient^2 is then the Gauss-Newton-Bartlett estimate (arXiv:2305.14342, algorithm 2). Call it before
        ``zero_grad`` and the pass of the next update, which uses it.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._curvature[p] = p.grad.float().square() * batch

    def _extra(self, cohort: Cohort) -> dict[str, list[Tensor]]:
        """What the cohort's program needs shaped like its gradients."""
        extra = {}
        if "noise" in cohort.program.tensors:
            extra["noise"] = self._noise(cohort)
        if "curvature" in cohort.program.tensors and all(p in self._curvature for p in cohort.ps):
            extra["curvature"] = [self._curvature[p].to(cohort.program.wide) for p in cohort.ps]
        return extra

    def _noise(self, cohort: Cohort) -> list[Tensor]:
        """Standard normal numbers, named by (seed, place among all parameters, update): the same after a resume."""
        places = {id(p): k for k, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return [
            normal_like(p, cohort.program.wide, seed_for(self.how["seed"], "noise", places[id(p)], cohort.tries))
            for p in cohort.ps
        ]

    # ------------------------------------------------------------------ other weights for a while

    @contextmanager
    def sharpened(self, rho: float = 0.05, *, scaled: bool = False) -> Iterator[None]:
        """The parameters stand where the loss nearby is about highest, by the gradients that they hold (SAM); afterwards
        where they were, to the bit. Inside, ``zero_grad`` and a second backward pass over the same samples give the
        gradients to ``step`` with, after it.

        Args:
            rho: distance of the neighbour, above 0.
            scaled: in units of each weight (ASAM): ``thalweg.optim.weights.climb`` has the formulas and their sources.
        """
        ps = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with restored(ps):
            climb(ps, [p.grad for p in ps], rho, scaled=scaled)
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold what to evaluate and ship: the kept average, or a schedule-free rule's own; afterwards the live
        values, to the bit.

        Raises:
            RecipeError: if there is none.
        """
        stages = [self.rule.then, *(name for group in self.param_groups for name in group["stages"])]
        if not self.how["average"] and not any(name is not None and STAGES[name].evaluate for name in stages):
            raise RecipeError(
                "This optimizer keeps no weight average.",
                "It was built with average=0.",
                "Build it with average=0.999.",
            )
        cohorts = [cohort for mine in self._cohorts for cohort in mine]
        with torch.no_grad():
            pairs = [pair for c in cohorts for pair in zip(c.ps, evaluation_weights(c.program, c.batch) or ())]
        with restored([p for p, _ in pairs]):
            with torch.no_grad():
                for p, average in pairs:
                    p.copy_(average)
            yield

    # ------------------------------------------------------------------ state in and out

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with what each parameter needs to go on: slots, counts, and the numbers shared by all."""
        for index, (group, mine) in enumerate(zip(self.param_groups, self._cohorts)):
            self._follow(index, group, begin=False)
            for number, cohort in enumerate(mine):
                for i, p in enumerate(cohort.ps):
                    self.state[p].update(cohort.state(i))
                    self.state[p].update(tries=cohort.tries, cohort=number)
                    self.state[p].update({f"shared.{name}": value for name, value in self._shared.items()})
                    if self._history is not None:
                        self.state[p]["norm_history"] = self._history.values
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict; slots keep the dtype that they were saved in.

        Raises:
            RecipeError: for the state of another rule, or of a newer version.
        """
        for group in state_dict["param_groups"]:
            rule, version = group.get("rule"), group.get("schema", 0)
            if rule != self.rule_name:
                raise RecipeError(
                    f"This state is not {self.rule_name}'s.",
                    f"It is of {rule or 'no rule of ours'}, and this optimizer runs {self.rule_name}.",
                    "Build the optimizer that it was saved from, or convert it with thalweg.optim.from_torch.",
                )
            if version > SCHEMA:
                raise RecipeError(
                    f"This state of {rule} was written by a newer thalweg.",
                    f"It has version {version}, and here {SCHEMA} is the newest known.",
                    "Upgrade thalweg to load it.",
                )
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, mine):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):  # torch casts them to the parameter's dtype
                    device = p.device if value.device.type != "meta" else value.device
                    self.state[p][name] = value.detach().to(device, copy=True)
        for group in self.param_groups:  # a state that says less, such as one converted from torch
            group["schema"] = SCHEMA
            betas = group.get("betas", checks.betas({**self.defaults, **group}))
            given = {**self.defaults, "betas": betas, "peak_lr": group["lr"], "moving": ()}
            for name in (*_COMMON, *self.rule.defaults, *(["betas"] if betas else []), "peak_lr", "moving"):
                group.setdefault(name, given[name])
        self._restore()

    def _restore(self) -> None:
        """Cohorts from the state, as they were: who is updated together decides random bits and the order of sums."""
        self._cohorts = [[] for _ in self.param_groups]
        self._live = [[] for _ in self.param_groups]
        self._asked = [None for _ in self.param_groups]
        self._answers = [set() for _ in self.param_groups]
        self._rates = [{} for _ in self.param_groups]
        self._moved = [{} for _ in self.param_groups]
        self._shared, self._programs = {}, {}
        for index, group in enumerate(self.param_groups):
            self._follow(index, group, begin=any(p in self.state for p in group["params"]))
            together: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if not self.state.get(p):
                    continue
                program = self._program(index, group, p)
                state = self.state[p]
                uniform = [part.name for part in program.parts if part.shape == "uniform"]
                counts = (state.get("cohort", 0), float(state["step"]), *(float(state[name]) for name in uniform))
                key = (*counts, id(program))
                together.setdefault(key, []).append(p)
                if "norm_history" in state:
                    values = state.pop("norm_history")
                    self._history = self._history or NormHistory(self.how["clip_history"], p.device, values.dtype)
                    self._history.values.copy_(values)
                for name in list(state):
                    if name.startswith("shared."):
                        self._shared.setdefault(name.removeprefix("shared."), state[name])
                        del state[name]
            for _, members in sorted(together.items(), key=lambda item: item[0][0]):
                self._cohorts[index].append(self._cohort_from_state(index, group, members))

    def _cohort_from_state(self, index: int, group: dict[str, Any], members: list[Tensor]) -> Cohort:
        first = self.state[members[0]]
        program = self._program(index, group, members[0])
        folds = [group["fold"] or fold_of(p.shape) for p in members]
        slots: list[list[Tensor] | None] = []
        for part in program.parts:
            wanted = program.dtype_of(part)
            held = members[:1] if part.shape == "uniform" else members
            for p in held:
                if part.name not in self.state[p]:
                    raise RecipeError(
                        f"The state has no '{part.name}' for a parameter of shape {tuple(p.shape)}.",
                        f"It has {', '.join(map(str, self.state[p]))}.",
                        "Build the optimizer with the options that the state was saved with.",
                    )
                if self.state[p][part.name].dtype != wanted:
                    warnings.warn(
                        f"slot '{part.name}' is converted from {self.state[p][part.name].dtype} to {wanted}",
                        stacklevel=4,
                    )
                    self.state[p][part.name] = self.state[p][part.name].to(wanted)
            mine = [self.state[p][part.name] for p in held]
            slots.append(laid_like(mine, held) if part.shape == "like" else mine)
        t = first["step"].to(members[0].device, torch.float32)
        tries = int(first.get("tries", float(first["step"])))
        cohort = Cohort(program, members, folds, way=self._way(program), slots=slots, t=t, tries=tries)
        for i, p in enumerate(members):
            self.state[p].update(cohort.state(i))
        return cohort

    def __getstate__(self) -> dict[str, Any]:
        self.state_dict()  # puts counts and shared numbers into the state
        return {**super().__getstate__(), "how": self.how}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_cohorts"):  # from a pickle or a copy, not from load_state_dict
            self._begin()
            self._restore()
