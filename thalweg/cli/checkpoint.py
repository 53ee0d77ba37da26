"""``thalweg checkpoint``: arguments only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_CHOICES = ("live", "average", "best")


def add(commands: Any) -> None:
    """Register ``checkpoint`` and its commands."""
    whole = commands.add_parser(
        "checkpoint",
        help="verify, show, convert and prune checkpoints",
        description="What is in a run's checkpoints, whether they are whole, and how to take them elsewhere.",
    )
    parts = whole.add_subparsers(metavar="WHAT", required=True)

    verify = parts.add_parser(
        "verify",
        help="compare every byte with the manifests; exit code 1 if one is damaged",
        description="Compare every byte of checkpoints with their manifests. Exit code 1: one is damaged.",
    )
    verify.add_argument("paths", nargs="+", metavar="RUN_OR_CHECKPOINT")
    verify.set_defaults(run=_verify)

    show = parts.add_parser("show", help="say what is in them: steps, sizes, parameters, dtypes, best evaluations")
    show.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    show.add_argument("--tensors", action="store_true", help="of a run: list the tensors of its newest good one too")
    show.set_defaults(run=_show)

    convert = parts.add_parser(
        "convert",
        help="to and from torch, safetensors, Lightning and Hugging Face",
        description="Write weights as another kind of file. What is read can be a run folder, a checkpoint, a file of "
        "torch, safetensors or Lightning, or a Hugging Face folder; nothing in it is run.",
    )
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("target", metavar="TARGET", help=".pt, .safetensors, .ckpt, or a Hugging Face folder")
    convert.add_argument("--to", choices=("torch", "safetensors", "lightning", "hf"), help="whatever the suffix says")
    convert.add_argument("--weights", choices=_CHOICES, help="of a run (default: the average, where there is one)")
    convert.add_argument("--step", type=_count, metavar="N", help="of a run (default: the newest good one)")
    convert.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="names of modules or tensors; =NEW puts all below NEW, OLD= takes OLD off",
    )
    convert.add_argument("--like", metavar="FOLDER", help="Hugging Face folder to copy config and tokenizer from")
    convert.add_argument("--shard-size", metavar="BYTES", help="of a Hugging Face folder's files (default: 5GB)")
    convert.add_argument("--force", action="store_true", help="replace a target that is there")
    convert.set_defaults(run=_convert)

    prune = parts.add_parser(
        "prune",
        help="remove checkpoints that need not be kept",
        description="Remove checkpoints, chosen by step and metric. The newest good one always stays.",
    )
    prune.add_argument("run_folder", metavar="RUN")
    prune.add_argument("--last", type=_count, metavar="N", help="keep the N newest (default: 1)")
    prune.add_argument("--every", type=_count, default=0, metavar="N", help="keep multiples of step N")
    prune.add_argument("--best", type=_count, default=0, metavar="N", help="keep those of the N best evaluations")
    prune.add_argument("--damaged", action="store_true", help="remove those that are not whole; alone, only those")
    prune.add_argument("--dry-run", action="store_true", help="say it, and remove nothing")
    prune.set_defaults(run=_prune)


def add_start(train: argparse.ArgumentParser) -> None:
    """The options of ``train`` that name weights to begin with."""
    train.add_argument(
        "--weights", metavar="FILE", help="begin with these: a run, or a file of torch, safetensors, Lightning or HF"
    )
    train.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="names in --weights (see docs)")


def start_changes(asked: argparse.Namespace) -> dict[str, Any]:
    """What those options change in the recipe."""
    changes: dict[str, Any] = {} if asked.weights is None else {"weights": asked.weights}
    return changes | ({"weights_rename": asked.rename} if asked.rename else {})


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0")
    return int(text)


def _place(text: str) -> Path | str:
    """A run folder, or the address of a store."""
    return text if "://" in text else Path(text)


def _verify(asked: argparse.Namespace) -> int:
    from thalweg.checkpoint.convert.overview import verify
    from thalweg.core import human_bytes

    damaged = 0
    for path in asked.paths:
        for one in verify(_place(path)):
            damaged += bool(one.fault)
            print(f"{one.path}  step {one.step}  {human_bytes(one.size)}  {one.fault or 'ok'}", flush=True)
    if damaged:
        print(f"damaged: {damaged}")
    return 1 if damaged else 0


def _show(asked: argparse.Namespace) -> int:
    from thalweg.checkpoint.convert.overview import show

    print(*show(_place(asked.path), tensors=asked.tensors), sep="\n")
    return 0


def _convert(asked: argparse.Namespace) -> int:
    from thalweg.checkpoint.convert import convert
    from thalweg.core import to_bytes

    told = convert(
        asked.source,
        asked.target,
        to=asked.to,
        choice=asked.weights,
        step=asked.step,
        rename=asked.rename,
        like=asked.like,
        shard_bytes=None if asked.shard_size is None else to_bytes(asked.shard_size, "--shard-size"),
        force=asked.force,
    )
    print(*told, sep="\n")
    return 0


def _prune(asked: argparse.Namespace) -> int:
    from thalweg.checkpoint.convert.prune import prune
    from thalweg.core import human_bytes

    done = prune(
        Path(asked.run_folder),
        last=asked.last,
        every=asked.every,
        best=asked.best,
        damaged=asked.damaged,
        dry=asked.dry_run,
    )
    for name, why in done.kept:
        print(f"keeps   {name}  {why}")
    for name, why in done.removed:
        print(f"{'would remove' if asked.dry_run else 'removed'} {name}  {why}")
    print(f"{'would free' if asked.dry_run else 'freed'} {human_bytes(done.freed)}")
    return 0
