"""``thalweg train``: a run here, on ranks, resumed, or going on from another."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from thalweg.cli import checkpoint
from thalweg.cli.quick import imported_at_once
from thalweg.cli.words import add_data, data_change, pair, recipe_of, whole
from thalweg.core import RanksError, RecipeError, ThalwegError

_START = (
    120.0  # seconds that ranks may be apart when they start: one reads torch from a slow disk, and nothing is wrong
)


def add(commands: Any) -> None:
    """The command and its options."""
    train = commands.add_parser("train", help="train a task", description="Train a task; see 'thalweg tasks'.")
    train.add_argument("task", help="a shipped task, or module:attribute of your own")
    train.add_argument("--recipe", metavar="FILE", help="a TOML recipe; what it leaves out is the task's own")
    train.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="override one value of the recipe"
    )
    add_data(train)
    train.add_argument("--name", help="name of the run folder; by default the task's, numbered if taken")
    train.add_argument("--runs", metavar="DIR", default="runs", help="where run folders lie (default: runs)")
    train.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="STEP",
        help="go on with the newest run of this task (or --name), from its newest good checkpoint or from STEP; 'auto': "
        "begin where there is none",
    )
    train.add_argument(
        "--accept",
        metavar="PATHS",
        action="append",
        default=[],
        help="with --resume: what may differ from the run's recipe, such as lr,steps",
    )
    train.add_argument("--quiet", action="store_true", help="do not print the plan")
    train.add_argument(
        "--from", dest="source", metavar="FOLDER", help="a new run that goes on from another's checkpoint"
    )
    train.add_argument(
        "--from-step", metavar="STEP", help="with --from: which checkpoint (default: the newest good one)"
    )
    train.add_argument("--more", metavar="STEPS", help="with --from: how many more steps")
    train.add_argument(
        "--then",
        metavar="SCHEDULE",
        help="with --from: the rate's schedule (default: cooldown())",
    )
    checkpoint.add_start(train)
    train.add_argument("--ranks", metavar="N", help="train in N processes on this machine (docs/ranks.md)")
    train.add_argument(
        "--ranks-timeout", metavar="SECONDS", help="give up a rank that does not answer for so long (default: 300)"
    )
    train.add_argument(
        "--restarts", metavar="N", help="with --ranks: start all ranks again when one is lost, up to N times"
    )
    train.set_defaults(run=_train)


def _train(asked: argparse.Namespace) -> int:
    _check_words(asked)
    num = None if asked.ranks is None else whole(asked.ranks, "--ranks", "number of processes")
    restarts = 0 if asked.restarts is None else whole(asked.restarts, "--restarts", "number of restarts")
    if restarts and num is None:
        raise RecipeError(
            "--restarts goes with --ranks.",
            "One process was asked for.",
            "Add --ranks 2, or use torchrun --max-restarts.",
        )
    timeout = 300 if asked.ranks_timeout is None else whole(asked.ranks_timeout, "--ranks-timeout", "time")
    if timeout < 1:
        raise RecipeError(
            f"--ranks-timeout {timeout} leaves no time.",
            "Ranks wait for one another in every step.",
            "Give seconds, such as --ranks-timeout 60.",
        )
    if num is not None and "RANK" not in os.environ:
        from thalweg.parallel import launch

        return launch(asked.words, num, restarts)
    with imported_at_once():
        import thalweg.recipes
        import thalweg.run
        import thalweg.watch  # noqa: F401
        from thalweg.parallel import Agent, join, left_to

    left = Agent().left()
    if left.code:
        print(f"This run ended with exit code {left.code}, and is not started again.", file=sys.stderr)
        return left.code
    ranks = join(timeout, patience=max(timeout, _START))
    if num is not None and num != ranks.world:
        raise RecipeError(
            f"--ranks {num} is not what was started.",
            f"A launcher made this process one of {ranks.world} ranks.",
            "Leave --ranks out under torchrun.",
        )
    code = _train_here(asked, ranks, left_to(ranks, Agent()).folder)
    ranks.leave()
    return code


def not_again(err: ThalwegError) -> None:
    """What is wrong with what was asked will be wrong again: a launcher that starts ranks anew is told so."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and not (isinstance(err, RanksError) and err.lost):
        from thalweg.parallel import Agent

        agent = Agent()
        if not agent.left().begun:
            agent.leave(code=2)


def _check_words(asked: argparse.Namespace) -> None:
    """Refuse what does not go together, before any process is started."""
    for text in asked.set:
        pair(text)
    starts = checkpoint.start_changes(asked)
    resume = _resume(asked.resume)
    if asked.accept and resume is False:
        raise RecipeError("--accept goes with --resume.", "A new run has no earlier recipe.", "Add --resume.")
    if asked.source is None:
        if asked.more or asked.from_step or asked.then:
            raise RecipeError(
                "--more, --from-step and --then go with --from.",
                "No other run is named.",
                "Name it: --from runs/digits.",
            )
        return
    if asked.set or asked.recipe or asked.resume is not None or starts or asked.data is not None:
        raise RecipeError(
            "--from goes on with the other run's recipe.",
            "--set, --recipe, --data, --resume or --weights was given too.",
            "Leave them out; --then changes the schedule of the rate.",
        )
    if asked.more is None:
        raise RecipeError("--from does not say for how long.", "--more is missing.", "Add --more 100.")


def _train_here(asked: argparse.Namespace, ranks: Any, before: str) -> int:
    """This process's part of a run: all of it, where there is one rank.

    Args:
        before: the folder of a run that ranks were started again for; it holds the recipe, whatever was asked of the first ones.
    """
    changes = dict(pair(text) for text in asked.set) | checkpoint.start_changes(asked)
    from thalweg.recipes import find_task, short_name

    task = ranks.together(lambda: find_task(asked.task))
    if asked.source is not None and not ranks.from_first((Path(before) / "recipe.toml").exists()):
        return _train_on(asked, task, short_name(asked.task), ranks, before)
    recipe = ranks.together(lambda: recipe_of(task, asked.recipe).override(changes))
    from thalweg.parallel import on_first
    from thalweg.run import RunFolder, choose_folder, train_task
    from thalweg.watch import Terminal

    resume = _resume(asked.resume)
    accept = [word.strip() for words in asked.accept for word in words.split(",") if word.strip()]

    def chosen() -> tuple[Path, Any]:
        if before:
            held = (Path(before) / "recipe.toml").exists()
            return Path(before), RunFolder.recipe_in(Path(before)) if held else recipe
        folder = choose_folder(Path(asked.runs), asked.name, short_name(asked.task), resume=resume is not False)
        begins = resume is False or (resume == "auto" and not (folder / "recipe.toml").exists())
        own = not begins and not asked.recipe and not changes
        return folder, (RunFolder.recipe_in(folder) if own else recipe).override(data_change(asked))

    folder, recipe = ranks.from_first(on_first(ranks, chosen))
    sinks = [Terminal(verbose=not asked.quiet)]
    result = train_task(task, recipe, folder=folder, resume=resume, accept=accept, sinks=sinks)
    return _ended(asked, result, folder, ranks)


def _resume(text: str | None) -> bool | int | str:
    if text is None:
        return False
    return True if text == "newest" else text if text == "auto" else whole(text)


def _train_on(asked: argparse.Namespace, task: Any, name: str, ranks: Any, before: str) -> int:
    """A new run that goes on from a checkpoint of another."""
    from thalweg.branch import continue_run
    from thalweg.run import choose_folder
    from thalweg.watch import Terminal

    chosen = Path(before) if before else choose_folder(Path(asked.runs), asked.name, name, resume=False)
    folder = ranks.from_first(chosen)
    result = continue_run(
        task,
        asked.source,
        folder,
        steps=whole(asked.more, "--more"),
        then=asked.then or "cooldown()",
        at=None if asked.from_step is None else whole(asked.from_step, "--from-step"),
        sinks=[Terminal(verbose=not asked.quiet)],
    )
    return _ended(asked, result, folder, ranks)


def _ended(asked: argparse.Namespace, result: Any, folder: Path, ranks: Any) -> int:
    """What is left to say of a run."""
    if not ranks.is_first:
        return int(result.exit_code)
    if result.sample:
        print(f"\n{result.sample}\n")
    if result.goodput is not None:
        print(f"goodput: {result.goodput}")
    print(f"report: {folder / 'report.html'}")
    if result.exit_code >= 128:
        again = ["thalweg", "train", asked.task, "--resume"]
        again += ["--name", asked.name] if asked.name else []
        again += ["--runs", asked.runs] if asked.runs != "runs" else []
        again += ["--ranks", asked.ranks] if asked.ranks else []
        again += ["--restarts", asked.restarts] if asked.restarts else []
        print(f"to go on: {' '.join(again)}")
    return int(result.exit_code)
