"""The plan of a large model on many ranks against what torch's FSDP2 holds there, in fake tensors: nothing is allocated."""

from __future__ import annotations

from benchmarks.keep import keep
from tests.test_forms import fsdp2_holds, large, made, task_of
from thalweg.memory import estimate

RANKS = ((3, 64), (0, 64), (63, 64), (3, 8))


def main(arguments: list[str]) -> None:
    rows = []
    for rank, world in RANKS:
        numel, *held = fsdp2_holds(rank, world)
        ledger = estimate(task_of(large), made(parallel="fsdp"), on="h100-80gb", devices=world)
        for what, planned, there in zip(
            ("parameters", "gradients", "slots"), (ledger.parameters, ledger.gradients, ledger.slots), held
        ):
            rows.append(
                {"model": "GPT", "elements": numel, "rank": rank, "ranks": world, "what": what, "planned_bytes": planned,
                 "fsdp2_bytes": there, "ratio": round(planned / there, 5)}
            )  # fmt: skip
            print(f"rank {rank} of {world}, {what}: planned {planned:,}, FSDP2 {there:,} ({planned / there:.4f})")
    keep("forms", rows, "python -m benchmarks forms")


if __name__ == "__main__":
    main([])
