"""``thalweg doctor``: the capability table, measured products and data sheets; and what the command line spares torch."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import ROOT, run_cli
from thalweg.cli import backends
from thalweg.cli import main as cli
from thalweg.cli.backends import SWITCH, device_asked, leave_out
from thalweg.core import Evaluation, Ledger, flops_use, training_times
from thalweg.device import doctor
from thalweg.device.chips import CHIPS, chip_here

needs_python_backends = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends of pure Python",
)


@pytest.mark.parametrize(
    ("name", "gib", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79, None),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23, "rtx4090-24gb"),
        ("NVIDIA L4", 22, "l4-24gb"),
        ("NVIDIA L40S", 44, "l40s-48gb"),
        ("Tesla V100-SXM2-16GB", 15, "v100-16gb"),
        ("TPU v5 lite", 16, "tpu-v5e"),
        ("TPU v6e", 0, "tpu-v6e"),
        ("AMD EPYC v4", 0, None),
    ],
)
def test_the_data_sheet_of_a_device(name: str, gib: int, chip: str | None) -> None:
    found = chip_here(name, gib << 30)
    assert (None if found is None else found.name) == chip


def test_tpus_are_in_the_table() -> None:
    known = {name: (chip.memory >> 30, chip.rates["bf16"] / 1e12) for name, chip in CHIPS.items() if chip.kind == "tpu"}
    assert known == {
        "tpu-v4": (32, 275),
        "tpu-v5e": (16, 197),
        "tpu-v5p": (95, 459),
        "tpu-v6e": (32, 918),
        "tpu-v7": (96, 1153),
    }
    assert all("fp16" not in CHIPS[name].rates for name in known)


def test_what_is_measured_is_held_against_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.device import choose

    monkeypatch.setattr(doctor, "peak_rates", lambda device: (4096, {"fp32": 33.5e12, "bf16": 494.5e12}))
    told = list(doctor._peaks(choose("cpu")[0], CHIPS["h100-80gb"]))
    assert told[0] == ("matmul", "fp32: 33,500 GFLOP/s on 4096 x 4096, 50% of the 67 TFLOP/s stated")
    assert told[1][1].endswith("50% of the 989 TFLOP/s stated")
    assert told[2][1].startswith("h100-80gb: TFLOP/s fp32 67") and "NVIDIA H100 SXM data sheet" in told[2][1]


def plugin(folder: Path, module: str) -> str:
    """A package that registers a backend with torch, as pip would leave it; the folder to put on the path."""
    info = folder / "plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\nplugin = {module}:load\n")
    return str(folder)


def test_doctor_names_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "cudda"]) == 2
    assert "Did you mean cuda?" in capsys.readouterr().err


@needs_python_backends
def test_doctor_on_a_chip_that_nobody_knew(tmp_path: Path) -> None:
    """The chip comes as it would on a user's machine: through an entry point that torch loads."""
    place = plugin(tmp_path / "site", "tests.chip")
    ran = run_cli("doctor", cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{place}", OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    told = [(line[:12].strip(), line[13:]) for line in ran.stdout.splitlines()]
    lines = dict(told)
    assert lines["device"] == "chip:0: chip (torch finds this accelerator)"
    assert lines["memory"] == "the device does not say" and lines["work"] == "operator by operator"
    assert lines["autocast"] == "bf16, fp16" and lines["loss scale"] == "not possible: fp16 is refused"
    assert lines["fp16"].startswith("not possible on this device. fp16 loses small gradients")
    assert lines["compile"] == "nothing known for it" and lines["views"] == "parameters lie in flat buffers"
    assert "possible; " in lines["bf16"] and any("fp32: " in value for name, value in told if name == "matmul")


# ---------------------------------------------------------------------------------------------- backends that torch loads


def asked(**words: object) -> argparse.Namespace:
    return argparse.Namespace(**{"task": "digits", "set": [], "recipe": None, **words})


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had not been imported; the switch is put back."""
    monkeypatch.setattr(backends, "_loaded", lambda: False)
    monkeypatch.setenv(SWITCH, "x")
    monkeypatch.delenv(SWITCH)


@pytest.mark.parametrize(
    ("packages", "words", "chip", "left_out"),
    [
        ([], {"set": ["device=cpu"]}, False, False),  # nothing to spare
        (["torch_tpu"], {"set": ["device=cpu"]}, True, True),
        (["torch_tpu"], {"set": ["device=cuda:1"]}, False, True),
        (["torch_tpu"], {"set": ["device=tpu"]}, False, False),
        (["torch_tpu"], {}, False, True),  # auto, and there is no such chip
        (["torch_tpu"], {}, True, False),
        (["torch_tpu", "other"], {}, False, False),  # nobody knows what chips the other is for
        (["other"], {"device": "cpu"}, False, True),
        (["other"], {"recipe": "cpu.toml"}, False, True),
        (["other"], {"recipe": "cpu.toml", "set": ["device=other"]}, False, False),
    ],
)
def test_backends_are_left_out_where_none_is_meant(
    packages: list[str],
    words: dict[str, object],
    chip: bool,
    left_out: bool,
    before_torch: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import importlib.metadata as metadata

    points = [metadata.EntryPoint(name, f"{name}.loader:load", "torch.backends") for name in packages]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "torch.backends" else [])
    monkeypatch.chdir(tmp_path)
    Path("cpu.toml").write_text('device = "cpu"\n')
    for number in range(2):
        (tmp_path / "pci" / str(number)).mkdir(parents=True)
        (tmp_path / "pci" / str(number) / "vendor").write_text("0x1ae0\n" if chip and number else "0x8086\n")
    assert leave_out(asked(**words), tmp_path / "pci") is left_out
    assert os.environ.get(SWITCH) == ("0" if left_out else None)


def test_what_the_user_set_stays(before_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    assert not leave_out(asked(set=["device=cpu"])) and os.environ[SWITCH] == "1"


def test_a_recipe_that_cannot_be_read_is_anothers_to_tell() -> None:
    assert device_asked(asked(recipe="no such file.toml")) == "auto"


def test_the_command_line_leaves_them_out_before_torch(tmp_path: Path) -> None:
    """In a process: an entry point that tells when torch loads it."""
    place = plugin(tmp_path / "site", "loud")
    Path(place, "loud.py").write_text("import os\n\ndef load():\n    print('LOADED')\n")
    code = (
        "import json, os, sys\nfrom thalweg.cli import main\n"
        "main._plan = lambda asked: __import__('torch') and 0\n"
        "main.main(['plan', 'digits', *sys.argv[1:]])\n"
        "print(json.dumps(os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD')))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{place}"}
    environment.pop(SWITCH, None)

    def told(*words: str) -> list[str]:
        ran = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        return ran.stdout.split()

    assert told("--set", "device=cpu") == [json.dumps("0")]
    assert told("--set", "device=auto") == ["LOADED", json.dumps(None)]


# ---------------------------------------------------------------------------------------------- model FLOPs use


def linear_run(**machine: object) -> Any:
    """40 steps of 32 samples through one layer of 64 x 64, a tenth of a second each."""
    model = lambda: nn.Linear(64, 64, bias=False)
    loss = lambda model, batch: model(batch["x"]).square().mean()
    data = {"x": torch.randn(64, 64)}
    recipe = {"device": "cpu", "precision": "fp32", "train.steps": 40, "train.batch": 32, "train.micro_batch": 16}
    result = thalweg.train(model, loss, data, recipe)
    records = [replace(r, seconds=0.1 * k + 5 * (k > 2)) for k, r in enumerate(result.records)]
    return replace(result, plan=replace(result.plan, machine={**result.plan.machine, **machine}), records=records)


def test_model_flops_use_of_a_run() -> None:
    """A layer of 64 x 64 multiplies and adds 64 * 64 numbers a sample, three times; 320 samples a second."""
    plain = linear_run()
    assert plain.plan.ledger.flops == 3 * 2 * 64 * 64 and plain.flops_use is None
    assert Ledger.from_dict(plain.plan.ledger.to_dict()) == plain.plan.ledger
    old = {name: value for name, value in plain.plan.ledger.to_dict().items() if name != "flops"}
    assert Ledger.from_dict(old).flops == 0, "a plan of an older version is read"
    result = linear_run(chip="h100-80gb", peak_flops=320 * 3 * 2 * 64 * 64 * 4.0)
    assert result.flops_use == pytest.approx(0.25), "the first steps, with their five seconds, do not count"
    away = Evaluation(40, {"loss": 1.0}, best=False, seconds=result.records[-1].seconds + 100)
    more = [replace(r, step=r.step + 40, seconds=r.seconds + 100) for r in result.records[3:]]
    late = [replace(r, seconds=r.seconds + 4) for r in more]
    assert flops_use(result.plan, training_times([*result.records, away, *late])) == pytest.approx(0.25, rel=1e-6)
    again = [replace(r, step=r.step + 40, seconds=r.seconds / 2) for r in result.records[3:]]
    times = training_times([*result.records, *again])
    assert flops_use(result.plan, times) == pytest.approx(0.5), "after a resume its own seconds count"
    assert flops_use(result.plan, times[:1]) is None


def test_the_report_and_the_terminal_tell_it(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from thalweg.report.figures import key_figures
    from thalweg.report.folder import Run
    from thalweg.watch import Terminal

    result = linear_run(chip="h100-80gb", peak_flops=1e9)
    out = StringIO()
    terminal = Terminal(Console(file=out, width=120), verbose=False)
    terminal.start(result.plan, 0)
    for record in result.records:
        terminal.steps([record])
    terminal.stop(result.reason)
    assert "Model FLOPs use: 0.8% of the 0.001 TFLOP/s that h100-80gb has in fp32." in out.getvalue()
    assert "model FLOPs use" in key_figures(Run("x", result.plan, "", [*result.records], [], {}))
