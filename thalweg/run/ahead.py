"""A run's step compiled for a TPU that is not here: lowered by torch-tpu, compiled by libtpu, each in a process of its own.

torch-tpu can only lower what it runs: the step runs once, on the CPU, in a simulated TPU (``device/simulated.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thalweg.core import Recipe, human_bytes
from thalweg.device import aot, simulated

#: Seconds for each of the two processes.
LIMIT = 1800.0


def compiled_ahead(task: str, recipe: Recipe, chip: str, limit: float = LIMIT) -> list[str]:
    """What the TPU's compiler says of the graphs of a step, a line each; or one line that says why it was not asked.

    Args:
        task: by name, for another process to find.
        recipe: with a micro-batch.
        chip: as in ``thalweg.device.chips``.
        limit: seconds for each of the two processes.
    """
    if reason := aot.why_not(chip) or simulated.why_not():
        return [f"not compiled for {chip}: {reason}. '{aot.EXTRA}' has all of them."]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text(
            recipe.override({"device": simulated.KIND, "compile": "step"}).to_toml()
        )
        begun = time.perf_counter()
        told = _process("thalweg.run.ahead", task, folder, limit=limit)
        files = sorted(Path(folder).glob("*.mlir"))
        if not files:
            return [f"not compiled for {chip}: the step could not be lowered: {told}"]
        lowered = time.perf_counter() - begun
        found = _process("thalweg.device.aot", chip, *map(str, files), limit=limit)
        try:
            programs = json.loads(found)
        except ValueError:
            return [f"not compiled for {chip}: its compiler ended without an answer: {found}"]
        if "refused" in programs:
            return [f"not compiled for {chip}: {programs['refused']}"]
        return list(_told(chip, [file.stem for file in files], programs, lowered))


def _told(chip: str, names: list[str], programs: list[dict[str, Any]], lowered: float) -> Iterator[str]:
    for name, one in zip(names, programs):
        graph = name.split("-", 1)[1]
        yield (
            f"compiled for {chip} by {one['compiler']}: graph '{graph}' takes {human_bytes(one['peak'])} at its peak "
            f"({human_bytes(one['arguments'])} given, {human_bytes(one['temporary'])} temporary), computes "
            f"{one['flops'] / 1e9:.4g} GFLOP, moves {human_bytes(int(one['accessed']))} to and from memory; "
            f"{one['seconds']:.1f} s to compile"
        )
    yield f"lowered in {lowered:.0f} s, with attention as plain operators and nothing donated: a run takes less"


def _process(module: str, *arguments: str, limit: float) -> str:
    """The last line that a process prints, or of what it complains."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit:g} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1] if lines else f"it ended with {done.returncode}"


def lower(name: str, folder: Path) -> None:
    """Write the graphs of one step of the task ``name``, by ``recipe.toml`` in ``folder``, beside it."""
    simulated.begin()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from thalweg.engine import build, resolve
    from thalweg.engine.compiled import CompiledStep
    from thalweg.recipes import find_task

    recipe = Recipe.from_toml((folder / "recipe.toml").read_text())
    with sdpa_kernel(SDPBackend.MATH):  # torch-tpu's own attention can be compiled for a TPU alone
        resolved = resolve(find_task(name), recipe)
        step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
        assert isinstance(step, CompiledStep)
        found: list[Any] = []
        step.compiler.options["debug_callback"] = found.append
        step.check = None
        step.run(next(iter(resolved.feed.windows(0, 1))))
    names = [text.split("'")[1] for text in step.news]
    for number, (graph, debug) in enumerate(zip(names, found)):
        for text in debug.stablehlo_forward_text:
            (folder / f"{number}-{graph}.mlir").write_text(text)


if __name__ == "__main__":
    lower(sys.argv[1], Path(sys.argv[2]))
