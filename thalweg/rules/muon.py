"""Muon: momentum, orthogonalized; with NorMuon's row-wise second moment as an option and a name of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thalweg.core import RecipeError
from thalweg.rules._newton_schulz import COEFFICIENTS, orthogonalize
from thalweg.rules._whole import on_matrices
from thalweg.rules.registry import Slot, rule

_ABOUT: dict[str, Any] = {
    "reads": "matrix",
    "decay": "decoupled",
    "slots": lambda options: ("m",) + ((Slot("v", shape="row", signed=False),) if options["normalize"] else ()),
    "lr": 0.02,
    "least_ndim": 2,
    "choices": {
        "coefficients": COEFFICIENTS,
        "scale": ("original", "spectral", "match_rms_adamw", "none"),
        "precision": ("bf16", "fp32"),
        "gram": ("auto", "off"),
    },
}


@rule(
    name="normuon",
    paper="Li et al. 2025, arXiv:2510.05491",
    year=2025,
    reference="github.com/zichongli5/NorMuon, pytorch_optimizer",
    ships=("pytorch_optimizer", "dion", "emerging_optimizers"),
    use="Muon for wide runs where single rows are updated far more than others; costs one number a row more.",
    avoid="Expecting a gain over a Muon whose rate and decay are tuned.",
    evidence="Authors: 21.7 % fewer steps than Adam and 11.3 % than Muon at 1.1B. Independent: 3,250 steps to the NanoGPT "
    "target, the same as tuned plain Muon (modded-nanogpt track 3, 2026).",
    fixed={"normalize": True},
    unmoved=("eps",),
    **_ABOUT,
)
@rule(
    paper="Jordan et al. 2024, kellerjordan.github.io/posts/muon",
    year=2024,
    reference="torch.optim.Muon",
    ships=("torch", "timm", "pytorch_optimizer", "optax", "keras", "heavyball", "dion"),
    use="Hidden matrices of transformers from about 100M parameters, pretrained from scratch; adamw takes the rest. With "
    "scale=match_rms_adamw one rate and decay of AdamW serve both.",
    avoid="Embeddings, the head and vectors; fine-tuning of models pretrained with Adam; long runs without weight decay.",
    evidence="1.4x fewer steps than tuned AdamW at 0.1B, 1.1x at 1.2B (arXiv:2509.02046); 1.4x kept from 190M to 1.4B with "
    "muP rates and decay as 1/width (arXiv:2512.05620). AlgoPerf 2026: 3rd of 16 by steps, 6th by time.",
    torch_names={"m": "momentum_buffer"},
    unmoved=("eps", "b2"),
    **_ABOUT,
)
def muon(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str = "newton-schulz",
    scale: str = "original",
    precision: str = "bf16",
    gram: str = "auto",
    heads: int = 0,
    normalize: bool = False,
    b2: float = 0.95,
    eps: float = 1e-7,
) -> tuple[Tensor, ...]:
    """m <- mu*m + (1-mu)*g;  u = (1-mu)*g + mu*m;  p <- p - lr*s*orth(u), orth(U S V^T) being about U V^T.

    Args:
        p, g, m: parameter, gradient and momentum, (..., R, C); leading dimensions are a batch of matrices.
        v: mean square of each row of the orthogonalized update (..., R, 1); there with ``normalize`` alone.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        momentum: mu, in [0, 1).
        nesterov: u as above; else u = m.
        steps: iterations, 5 as published.
        coefficients: "newton-schulz" (Jordan's one polynomial: singular values end in [0.68, 1.13]) or "polar-express"
            (arXiv:2505.16932: one polynomial for each iteration, nearer to 1).
        scale: s = "original" max(1, R/C)^0.5 (Jordan); "spectral" (R/C)^0.5 (Bernstein 2025, Scion arXiv:2502.07529);
            "match_rms_adamw" 0.2*max(R, C)^0.5 (Moonlight, arXiv:2502.16982); "none" 1.
        precision: of the iteration: "bf16" or "fp32"; float64 gradients iterate in float64.
        gram: "auto": two iterations for each pass over matrices of aspect 2 and more, the same within bf16 noise; "off".
        heads: if above 0, rows are so many equal blocks, each a matrix of its own (per-head Muon).
        normalize: NorMuon: divide rows by the root of v, keep the Frobenius norm.
        b2: decay of v, in [0, 1).
        eps: smallest norm of u that is scaled up.

    Cost: 1 slot a parameter (4 B at fp32), with ``normalize`` 1 number a row more; reads 3 and writes 2 tensors a step, and
    for n x m, n the smaller, 10*n^2*m + 5*n^3 multiplications (7/9 of that at m = 4*n with ``gram``).
    Departures: momentum is a running mean, as in torch and in Jordan's code since 2024-12; his post writes mu*m + g, a longer
    u of the same direction without Nesterov and of another mix with it. eps is a floor as in torch, Jordan adds it. optax
    corrects u for its start, with Nesterov a different mix.
    NorMuon keeps the Frobenius norm as its authors' code; the paper sets an RMS of 0.2, which scale=match_rms_adamw is close to.
    """
    m = torch.lerp(m, g, 1 - momentum)
    u = torch.lerp(g, m, momentum) if nesterov else m
    if heads:
        u, v = _split(u, heads), None if v is None else _split(v, heads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    u = u if u.dtype == torch.float64 else u.to(dtype)
    words = {"steps": steps, "coefficients": coefficients, "gram": gram == "auto", "eps": eps}
    o = on_matrices(orthogonalize, u, **words).to(p.dtype)
    if v is not None:
        v = torch.lerp(v, o.square().mean(-1, keepdim=True), 1 - b2)
        size = _norm(o)
        o = o / (v.sqrt() + 1e-10)
        o = o * (size / (_norm(o) + 1e-10))
    change = (-(lr * _factor(scale, *o.shape[-2:])) * o).reshape(p.shape)
    return (change, m) if v is None else (change, m, v.reshape(*p.shape[:-1], 1))


def _norm(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return size


def _factor(scale: str, rows: int, columns: int) -> float:
    if scale == "original":
        return math.sqrt(max(1, rows / columns))
    if scale == "spectral":
        return math.sqrt(rows / columns)
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms_adamw" else 1.0


def _split(x: Tensor, heads: int) -> Tensor:
    rows = x.shape[-2]
    if rows % heads:
        raise RecipeError(
            f"muon(heads={heads}) cannot split a matrix of {rows} rows.",
            f"{rows}/{heads} = {rows / heads:.2f} is not a whole number.",
            "Give the heads of these parameters in a group of their own, or heads=0.",
        )
    return x.reshape(*x.shape[:-2], heads, rows // heads, x.shape[-1])
