#!/usr/bin/env python
"""What share of a training step do STF's targets take?

    python benchmarks/training_overhead.py --batch_size 64 --n 1024 4096 50000 --output overhead.json

Whole steps (targets, forward, backward, optimizer) with DSM and with STF alternate in one run, on random images of the
network's size. Up to 8,192 references are a reference batch, more are a `ReferenceBank`. The table gives, as medians over
the pairs, the time in `perturb`, the step, and the share of the step that the targets take beyond DSM's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel

from stf_diffusers import EDM, ReferenceBank, STFTrainingObjective

PRESET = Path(__file__).parents[1] / "examples" / "configs" / "cifar10_32.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", type=Path, default=PRESET)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 4096, 50000], help="References.")
    parser.add_argument("--pairs", type=int, default=3, help="Counted pairs of steps per n, after one that is not.")
    parser.add_argument("--output", type=Path, default=Path("training_overhead.json"))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {"sample_size": 32, "in_channels": 3, "out_channels": 3, **json.loads(args.model_config.read_text())}
    unet = UNet2DModel.from_config(config).to(device)
    optimizer = torch.optim.AdamW(unet.parameters())
    objective = STFTrainingObjective(EDM())
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(sources: torch.Tensor, reference: torch.Tensor | ReferenceBank | None) -> tuple[float, float]:
        """Seconds in `perturb`, and in the whole step."""
        start = now()
        batch = objective.perturb(sources, reference=reference)
        targets = now()
        objective.loss(unet(batch.model_input, batch.timestep).sample, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return targets - start, now() - start

    rows = []
    print(
        f"{platform.processor() or platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'n':>8} {'perturb DSM':>12} {'perturb STF':>12} {'step STF':>10} {'share':>8} {'STF/DSM step':>13}")
    for n in args.n:
        images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, device=device)
        reference, sources = images if n <= 8192 else ReferenceBank(images), images[: args.batch_size]
        pairs = [(step(sources, None), step(sources, reference)) for _ in range(args.pairs + 1)][1:]
        row = {
            "n": n,
            "perturb_dsm_s": statistics.median(dsm[0] for dsm, _ in pairs),
            "perturb_stf_s": statistics.median(stf[0] for _, stf in pairs),
            "step_stf_s": statistics.median(stf[1] for _, stf in pairs),
            "share_of_step": statistics.median((stf[0] - dsm[0]) / stf[1] for dsm, stf in pairs),
            "step_ratio": statistics.median(stf[1] / dsm[1] for dsm, stf in pairs),
        }
        rows.append(row)
        print(
            f"{n:8d} {row['perturb_dsm_s']:11.4f}s {row['perturb_stf_s']:11.4f}s {row['step_stf_s']:9.3f}s "
            f"{row['share_of_step']:8.2%} {row['step_ratio']:13.3f}"
        )
    args.output.write_text(json.dumps({"batch_size": args.batch_size, "device": str(device), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
