#!/usr/bin/env python
"""What do the switches of the training script do to the time of a step?

    python benchmarks/training_step.py --batch_size 8 --rounds 5

One step (noising, forward, backward, optimizer) in the manner of Diffusers' `train_unconditional.py` (DDPM noise by its
scheduler, default layout, AdamW that loops over tensors) alternates with DSM steps of `STFTrainingObjective` under each
switch alone and all together, in one run. The table gives the median seconds, and the median ratio to the first.
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
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from stf_diffusers import EDM, STFTrainingObjective

PRESET = Path(__file__).parents[1] / "examples" / "configs" / "cifar10_32.json"
VARIANTS = {
    "as Diffusers' script": set(),
    "ours": {"ours"},
    "ours, fused AdamW": {"ours", "fused"},
    "ours, channels last": {"ours", "channels_last"},
    "ours, bf16": {"ours", "bf16"},
    "ours, all of these": {"ours", "fused", "channels_last", "bf16"},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", type=Path, default=PRESET)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="Counted, after one that is not.")
    parser.add_argument("--output", type=Path, default=Path("training_step.json"))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = json.loads(args.model_config.read_text()) | {
        "sample_size": args.image_size,
        "in_channels": 3,
        "out_channels": 3,
    }
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device) * 2 - 1
    scheduler, objective = DDPMScheduler(), STFTrainingObjective(EDM())

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def make(switches: set[str]) -> tuple[UNet2DModel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        unet = UNet2DModel.from_config(config).to(device)
        if "channels_last" in switches:
            unet.to(memory_format=torch.channels_last)
        return unet, torch.optim.AdamW(
            unet.parameters(), foreach=False if "fused" not in switches else None, fused="fused" in switches
        )

    def step(unet: UNet2DModel, optimizer: torch.optim.Optimizer, switches: set[str]) -> float:
        start = now()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled="bf16" in switches):
            if "ours" in switches:
                batch = objective.perturb(images)
                loss = objective.loss(unet(batch.model_input, batch.timestep).sample, batch)
            else:
                noise = torch.randn_like(images)
                timesteps = torch.randint(0, 1000, (len(images),), device=device)
                noisy = scheduler.add_noise(images, noise, timesteps)
                loss = F.mse_loss(unet(noisy, timesteps).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    made = {name: make(switches) for name, switches in VARIANTS.items()}
    rounds = [{name: step(*made[name], VARIANTS[name]) for name in VARIANTS} for _ in range(args.rounds + 1)][1:]
    machine = f"{platform.processor() or platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    rows = []
    for name in VARIANTS:
        row = {
            "variant": name,
            "seconds": statistics.median(times[name] for times in rounds),
            "ratio": statistics.median(times[name] / times["as Diffusers' script"] for times in rounds),
        }
        rows.append(row)
        print(f"{name:24s} {row['seconds']:8.3f}s {row['ratio']:7.3f}")
    args.output.write_text(json.dumps({"machine": machine, "batch_size": args.batch_size, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
