"""``thalweg``: arguments only. torch is imported by the commands that need it, after the arguments are read."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from thalweg import __version__
from thalweg.cli import checkpoint, train, words
from thalweg.cli.backends import leave_out
from thalweg.cli.words import pair, recipe_of, whole
from thalweg.core import RanksError, RecipeError, RunFolderError, StopReason, ThalwegError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 a run failed or a checkpoint is damaged, 2 a mistake in what was asked, 3 the run diverged, 4 it
        could not be saved; 128 and the number of the signal that ended it, saved.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = _parser().parse_args(_joined(given))
    asked.words = given
    try:
        leave_out(asked)
        code = int(asked.run(asked))
        sys.stdout.flush()  # a reader who has gone is noticed here, not when Python ends
        return code
    except ThalwegError as err:
        if not (isinstance(err, RanksError) and err.told):  # another rank says it
            print(f"error: {_who()}{err}", file=sys.stderr)
        if not err.in_run:
            train.not_again(err)
        return StopReason.FAILED.exit_code if err.in_run else 2
    except BrokenPipeError:  # nobody reads our output any more; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as err:  # the traceback follows
        if _who():
            print(f"{_who()}{type(err).__name__}", file=sys.stderr)
        raise


def _who() -> str:
    """Which rank speaks, where there are several."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "" if world == "1" else f"rank {rank} of {world}: "


def _joined(arguments: list[str]) -> list[str]:
    """``schedules preview`` is a command of its own; ``schedules NAME`` is not."""
    return ["schedules preview", *arguments[2:]] if arguments[:2] == ["schedules", "preview"] else arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thalweg", description="Train PyTorch models.")
    parser.add_argument("--version", action="version", version=f"thalweg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train.add(commands)
    plan = commands.add_parser(
        "plan",
        help="say what a run will take in memory and time, and what would make it smaller",
        description="Say what a run will take in memory and time before it begins. Nothing is trained.",
    )
    plan.add_argument("task", help="a shipped task, or module:attribute of your own")
    plan.add_argument("--recipe", metavar="FILE", help="a TOML recipe; what it leaves out is the task's own")
    plan.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="override one value of the recipe"
    )
    words.add_data(plan)
    plan.add_argument(
        "--device-memory", metavar="BYTES", help="plan with so much, such as 16GiB (default: what is there)"
    )
    plan.add_argument(
        "--on",
        metavar=("CHIP", "x N"),
        nargs="+",
        help="plan for chips that are not here, such as h100-80gb x 8; 'list' lists them",
    )
    plan.add_argument(
        "--shard", action="store_true", help="with --on: spread parameters, gradients and slots over them"
    )
    plan.add_argument(
        "--ranks", metavar="N", help="plan for N processes: bytes on each, in each form (docs/parallel.md)"
    )
    plan.add_argument(
        "--compile",
        action="store_true",
        help="with --on: have the chip's own compiler say what the step takes, where it needs no chip for that",
    )
    plan.set_defaults(run=_plan)

    init = commands.add_parser("init", help="write a starter task and recipe")
    init.add_argument("folder", nargs="?", default=".", help="where to write my_task.py and my_recipe.toml")
    init.set_defaults(run=_init)

    commands.add_parser("tasks", help="list what can be trained").set_defaults(run=_tasks)
    rules = commands.add_parser("rules", help="list the update rules, or print the card of one")
    rules.add_argument("name", nargs="?", help="a rule or a stage: its maths, options, cost, evidence")
    rules.add_argument("--stages", action="store_true", help="list the stages, which combine with any rule")
    rules.set_defaults(run=_rules)
    schedules = commands.add_parser("schedules", help="list the schedule language, or print the card of one shape")
    schedules.add_argument("name", nargs="?", help="a shape: its formula, options, a drawing; see also 'preview'")
    schedules.set_defaults(run=_schedules)
    preview = commands.add_parser(
        "schedules preview",
        help="draw every scheduled value of a recipe over the run",
        description="Draw every scheduled value of a recipe over the run, in the terminal and as an SVG file.",
    )
    preview.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML recipe; with --task: the task's own")
    preview.add_argument("--task", help="whose data answers epochs and tokens, and whose recipe is completed")
    words.add_data(preview)
    preview.add_argument("--steps", metavar="N", help="length of the run in updates (default: the recipe's)")
    preview.add_argument("--svg", metavar="FILE", help="where the SVG goes (default: RECIPE.schedules.svg)")
    preview.add_argument("--values", action="store_true", help="print the values at about 20 updates too")
    preview.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="override one value of the recipe"
    )
    preview.set_defaults(run=_preview)
    checkpoint.add(commands)
    doctor = commands.add_parser(
        "doctor", help="say what this machine is, what it can do, and what half precision gains"
    )
    doctor.add_argument("--device", default="auto", help="which device, as in a recipe (default: auto)")
    doctor.set_defaults(run=_doctor)
    report = commands.add_parser("report", help="write the report of a run folder again")
    report.add_argument("folder", help="the run folder")
    report.set_defaults(run=_report)
    return parser


def _plan(asked: argparse.Namespace) -> int:
    from thalweg.core import to_bytes
    from thalweg.watch.forecast import print_chips, print_forecast

    if asked.on == ["list"]:
        print_chips()
        return 0
    if asked.shard and asked.on is None:
        raise RecipeError("--shard goes with --on.", "No chips are named.", "Name them: --on h100-80gb x 8.")
    changes = dict(pair(text) for text in asked.set) | words.data_change(asked)
    if asked.device_memory is not None:
        to_bytes(asked.device_memory, "--device-memory")
    chip, devices = _chips(asked.on) if asked.on else (None, 1)
    if asked.compile:
        _check_compiles(chip)
    if asked.ranks is not None:
        devices = _ranks(asked.ranks, devices)
    from thalweg.memory import forecast
    from thalweg.recipes import find_task

    task = find_task(asked.task)
    recipe = recipe_of(task, asked.recipe).override(changes)
    found = forecast(task, recipe, on=chip, devices=devices, sharded=asked.shard, device_memory=asked.device_memory)
    print_forecast(found)
    if asked.compile and chip is not None:
        from thalweg.run.ahead import compiled_ahead

        decided = {path: value for path, value, _ in found.decisions if path in ("precision", "train.micro_batch")}
        share = {"train.batch": found.batch // devices, "train.micro_batch": found.ledger.micro_batch}
        for line in compiled_ahead(asked.task, recipe.override({**decided, **share}), chip):
            print(line)
    return 0


def _check_compiles(chip: str | None) -> None:
    """Refuse to compile for a chip whose compiler cannot be asked without it."""
    from thalweg.device.aot import TOPOLOGIES

    if chip not in TOPOLOGIES:
        raise RecipeError(
            "--compile goes with chips whose compiler needs none of them.",
            f"Named: {chip or 'no chip'}.",
            f"Name one with --on: {', '.join(TOPOLOGIES)}.",
        )


def _chips(words: list[str]) -> tuple[str, int]:
    """(chip, how many) of "h100-80gb x 8" or "h100-80gb x8"."""
    name, *rest = words
    number = "".join(rest).lower().removeprefix("x") or "1"
    if not number.isdecimal() or int(number) < 1 or (rest and not "".join(rest).lower().startswith("x")):
        raise RecipeError(
            f"--on {' '.join(words)} names no chips.",
            "It is a chip, or a chip, an x and a number.",
            "For example --on h100-80gb x 8.",
        )
    return name, int(number)


def _ranks(text: str, devices: int) -> int:
    """How many ranks a plan is for: one on each device."""
    ranks = whole(text, "--ranks", "number of processes")
    if ranks < 1 or devices not in (1, ranks):
        raise RecipeError(
            f"--ranks {text} is no number of processes for this plan.",
            f"--on names {devices} chips, and each has one." if ranks >= 1 else "It must be 1 or more.",
            f"Leave --ranks out, or give --ranks {devices}." if devices > 1 else "Give --ranks 8.",
        )
    return ranks


def _init(asked: argparse.Namespace) -> int:
    from thalweg.recipes.starter import write_starter

    for path in write_starter(Path(asked.folder)):
        print(f"wrote {path}")
    print("to train it: thalweg train my_task:task --recipe my_recipe.toml")
    return 0


def _tasks(asked: argparse.Namespace) -> int:
    from thalweg.recipes.names import EMBEDDED, FROM_FOLDER

    for name, (_, about) in EMBEDDED.items():
        print(f"{name:13} {about}")
    for name, (_, about) in FROM_FOLDER.items():
        print(f"{name:13} {about} (its data: --data FOLDER)")
    print("module:attribute  a thalweg.Task of your own; 'thalweg init' writes one to start from")
    return 0


def _rules(asked: argparse.Namespace) -> int:
    from thalweg.optim import card

    if asked.name is not None:
        print(card.as_text(card.card(asked.name), width=min(shutil.get_terminal_size().columns, 120)), end="")
        return 0
    headings = card.STAGE_HEADINGS if asked.stages else card.HEADINGS
    rows = card.listed_stages() if asked.stages else card.listed()
    if sys.stdout.isatty():
        from thalweg.watch.console import print_table

        narrow = shutil.get_terminal_size().columns < 110
        shown = [i for i, heading in enumerate(headings) if not narrow or heading not in card.WIDE]
        print_table([headings[i] for i in shown], [[row[i] for i in shown] for row in rows])
    else:
        print(card.columns(headings, rows))
    print("", *([] if asked.stages else card.NOTES), "thalweg rules NAME prints the card of one.", sep="\n")
    return 0


def _schedules(asked: argparse.Namespace) -> int:
    from thalweg.schedules import cards

    if asked.name is None:
        print(cards.listing(), "thalweg schedules NAME prints the card of one,", sep="\n")
        print("thalweg schedules preview RECIPE.toml draws what a recipe schedules.")
        return 0
    from thalweg.report.preview import in_terminal

    print(cards.card(asked.name))
    print(in_terminal(cards.example(asked.name), min(_columns(), 80), braille=_has_braille()))
    return 0


def _preview(asked: argparse.Namespace) -> int:
    changes = dict(pair(text) for text in asked.set) | words.data_change(asked)
    changes |= {} if asked.steps is None else {"train.steps": asked.steps}
    if asked.recipe is None and asked.task is None:
        raise RecipeError(
            "There is nothing to draw.",
            "Neither a recipe nor a task was named.",
            "Write thalweg schedules preview RECIPE.toml, or --task TASK.",
        )
    svg = _svg_of(asked)
    from thalweg.core import Recipe

    if asked.task is None:
        from thalweg.engine.preview import preview

        curves = preview(Recipe.from_file(asked.recipe).override(changes))
    else:
        from thalweg.engine.preview import preview_of_task
        from thalweg.recipes import find_task

        task = find_task(asked.task)
        curves = preview_of_task(task, recipe_of(task, asked.recipe).override(changes))
    from thalweg.report.preview import in_terminal, table, write_svg

    write_svg(svg, curves, f"What {asked.recipe or asked.task} schedules")
    for curve in curves:
        print(in_terminal(curve, _columns(), braille=_has_braille()), end="\n\n")
    if asked.values:
        print(table(curves), end="\n\n")
    print(f"wrote {svg}")
    return 0


def _svg_of(asked: argparse.Namespace) -> Path:
    """Where the drawing goes: by default beside the recipe, or here, called after the task."""
    if asked.svg is None and asked.recipe is not None:
        return Path(f"{asked.recipe.removesuffix('.toml')}.schedules.svg")
    if asked.svg is None:
        from thalweg.recipes import short_name

        return Path(f"{short_name(asked.task)}.schedules.svg")
    svg = Path(asked.svg)
    if svg.suffix.lower() != ".svg" or not svg.parent.is_dir():
        raise RunFolderError(
            f"--svg {svg} names no file that can be written.",
            "It must end in .svg and lie in a folder that is there.",
            "For example --svg schedules.svg.",
        )
    return svg


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _has_braille() -> bool:
    """Whether what reads our output knows more than ASCII."""
    try:
        "\u28ff".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _doctor(asked: argparse.Namespace) -> int:
    from thalweg.device.doctor import examine

    for name, value in examine(asked.device):
        print(f"{name:12} {value}")
    return 0


def _report(asked: argparse.Namespace) -> int:
    from thalweg.report import write_report

    folder = Path(asked.folder)
    if not (folder / "plan.json").is_file():
        raise RunFolderError(f"{folder} is no run folder.", "It holds no plan.json.", "Name a folder below runs/.")
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
