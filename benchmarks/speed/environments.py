"""The virtual environments of the peers, made on demand under ``.venv-peers``.

All of them but jax's see one torch: that of a base environment, through a ``.pth`` file, held to its version while the rest is
installed. What cannot be installed leaves the reason in ``NAME.failed``, and becomes a row of the table.

    python -m benchmarks.speed.environments [NAME ...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"
TORCH = "torch==2.13.0"

#: name: what is installed. Exact versions, so that a table can be made again.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "base": (TORCH, "numpy==2.4.6"),
    "lightning": ("lightning==2.6.6",),
    "accelerate": ("accelerate==1.15.0",),
    "hf": ("transformers==5.24.0", "accelerate==1.15.0"),
    "keras": ("keras==3.15.1",),
    "jax": ("jax==0.10.2", "optax==0.2.8", "keras==3.15.1"),
    "fastai": ("fastai==2.8.12",),
    "ignite": ("pytorch-ignite==0.5.5",),
    "skorch": ("skorch==1.4.0",),
    "composer": ("mosaicml==0.32.1",),
}
WITHOUT_TORCH = ("base", "jax")


class CannotInstall(Exception):
    """What pip said, in one line."""


def python_of(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def ready(name: str) -> Path:
    """The interpreter of an environment, made if it is not there.

    Raises:
        CannotInstall: with the reason, now or from an earlier try with the same packages.
    """
    wanted, stamp, failed = "\n".join(ENVIRONMENTS[name]), FOLDER / name / "done", FOLDER / f"{name}.failed"
    if stamp.exists() and stamp.read_text() == wanted:
        return python_of(name)
    if failed.exists() and failed.read_text().partition("\n\n")[0] == wanted:
        raise CannotInstall(failed.read_text().partition("\n\n")[2])
    if name not in WITHOUT_TORCH:
        ready("base")
    print(f"environment {name}: {', '.join(ENVIRONMENTS[name])}", flush=True)
    try:
        _make(name)
    except CannotInstall as error:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        failed.write_text(f"{wanted}\n\n{error}")
        raise
    stamp.write_text(wanted)
    return python_of(name)


def _make(name: str) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    held: list[str] = []
    if name not in WITHOUT_TORCH:
        base = _site_packages("base")
        (_site_packages(name) / "base.pth").write_text(f"{base}\n")
        constraint = FOLDER / "torch.txt"
        constraint.write_text(f"torch=={torch_version('base')}\n")
        held = ["--constraint", str(constraint)]
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(name)), "install", *held]
    done = subprocess.run([*pip, "--disable-pip-version-check", *ENVIRONMENTS[name]], capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(f"cannot be installed: {reason(done.stdout + done.stderr)}")
    if name != "jax" and not (got := torch_version(name)).endswith("+cpu"):
        raise CannotInstall(f"torch {got} is in it, and a build for the CPU is wanted")


def _site_packages(name: str) -> Path:
    return next((FOLDER / name / "lib").glob("python3*")) / "site-packages"


def torch_version(name: str) -> str:
    """From the package's metadata: importing it takes seconds."""
    asked = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([python_of(name), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def reason(told: str) -> str:
    """What pip says about a failure, in one line.

    >>> reason(
    ...     "ERROR: Cannot install a and b\\n\\nThe conflict is caused by:\\n    a depends on b<2\\nERROR: Resolution"
    ... )
    'a depends on b<2'
    """
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    causes = [line for line in lines if " depends on " in line] or [line for line in lines if line.startswith("ERROR")]
    return (causes or lines or ["pip failed and said nothing"])[0].removeprefix("ERROR: ")[:200]


def main(names: list[str]) -> None:
    for name in names or ENVIRONMENTS:
        try:
            print(f"{name:10} {ready(name)}", flush=True)
        except CannotInstall as error:
            print(f"{name:10} {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
