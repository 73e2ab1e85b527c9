#!/usr/bin/env python
"""Everything about this package that needs a GPU, in one command.

    python benchmarks/gpu_check.py --output_dir gpu-check

In about eight minutes (no part is begun after `--minutes`), and again from where it stopped: the accuracy of each arithmetic on the device; the time of
`posterior_mean` over dtypes, n, noise levels and arithmetics as a multiple of the two bare float32 products, with and without
TF32; the share of a training step of the CIFAR-10 preset in bf16 that targets take, and images per second beside a step in the
manner of Diffusers' script; whether a step waits for the device; a short training of each noise process with its grid of
samples. Each part is a JSON file in the output folder; report.md has the tables. Without a GPU the same runs on the CPU at small
sizes, which tests the command and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from posterior_mean import SIGMAS, ratio_of_pairs, smooth_pixels
from study_cifar10 import write
from torch import Tensor

from stf_diffusers import EDM, ReferenceBank, ReferenceBatchSampler, STFTrainingObjective, posterior_mean
from stf_diffusers.arithmetic_choice import DENSE, measured, worst_error
from stf_diffusers.training.device_images import DeviceImages

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "examples" / "train_unconditional_stf.py"
PRESET = ROOT / "examples" / "configs" / "cifar10_32.json"
# Sizes on a GPU, and on a CPU.
SIZES = (4096, 50_000) if GPU else (256, 1024)
BATCH, SIDE = (64, 32) if GPU else (4, 8)
DTYPES = (torch.uint8, torch.float32, torch.bfloat16)
SMALL_NETWORK = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
                 "layers_per_block": 1, "norm_num_groups": 4}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--pairs", type=int, default=5, help="Alternating pairs of each ratio, after one that is not counted."
    )
    parser.add_argument("--minutes", type=float, default=8, help="Begin no part after this time.")
    parser.add_argument("--steps", type=int, default=300 if GPU else 3, help="Of each short training.")
    return parser.parse_args(argv)


def images(n: int, dtype: torch.dtype) -> Tensor:
    """References on the device."""
    pixels = smooth_pixels(n, SIDE, DEVICE)
    return pixels if dtype == torch.uint8 else (pixels.float() / 127.5 - 1).to(dtype)


def noised(reference: Tensor, sigma: Tensor) -> Tensor:
    """x_t of the first references."""
    clean = reference[: len(sigma)]
    clean = clean.float() / 127.5 - 1 if clean.dtype == torch.uint8 else clean.float()
    return clean + sigma[:, None, None, None].float() * torch.randn(clean.shape, device=DEVICE)


def arithmetics(dtype: torch.dtype) -> list[str | None]:
    """The default, and those that there are for references of a dtype."""
    there = ("float64", "int8") if GPU else ("float64", "float32", *(["int8"] if dtype == torch.uint8 else []))
    return [None, *there]


def outcome(compute: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises, which is a result too."""
    try:
        return compute()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


# ---- parts


def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Worst error over noise levels from 0.002 to 80 against float64 differences, with planted near-duplicates."""
    found = []
    for dtype in DTYPES:
        reference = images(512, dtype)
        sigma = torch.tensor(SIGMAS, device=DEVICE)
        for row in range(len(SIGMAS)):  # copies of each source, of which some differ in one value
            reference[100 + 20 * row : 120 + 20 * row] = reference[row]
            reference[110 + 20 * row : 120 + 20 * row, 0, 0, row % SIDE] += 1 if dtype == torch.uint8 else 1 / 128
        noisy = noised(reference, sigma)
        exact = reference.double() / 127.5 - 1 if dtype == torch.uint8 else reference.double()
        distance = torch.stack([(row - exact).square().flatten(1).sum(1) for row in noisy.double()])
        truth = (-distance / (2 * sigma.double()[:, None] ** 2)).softmax(1) @ exact.flatten(1)
        for arithmetic in arithmetics(dtype):

            def error(
                arithmetic: Any = arithmetic, truth: Tensor = truth, reference: Tensor = reference,
                noisy: Tensor = noisy, sigma: Tensor = sigma,
            ) -> float:  # fmt: skip
                mean = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic=arithmetic).mean
                return float((mean.flatten(1).double() - truth).abs().max())

            found.append({"references": str(dtype), "arithmetic": arithmetic or "default", "worst": outcome(error)})
    return found


def choice(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the arithmetic is chosen by: worst error, and milliseconds of 64 means over 2,048 references."""
    found = []
    for levels in (True, False):
        for arithmetic in DENSE:
            row = {"references": "uint8" if levels else "floating point", "arithmetic": arithmetic}
            row["worst"] = outcome(partial(worst_error, DEVICE, levels, arithmetic))
            times = outcome(partial(measured, DEVICE, levels, (arithmetic,)))
            row["milliseconds"] = times.get(arithmetic, "left out") if isinstance(times, dict) else times
            found.append(row)
    return found


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a posterior mean as a multiple of the two bare products in float32, IEEE and TF32."""
    found = []
    for n in SIZES:
        for dtype in DTYPES:
            reference, weights = images(n, dtype), torch.rand(BATCH, n, device=DEVICE)
            flat = images(n, torch.float32).flatten(1)
            for name, sigma in (
                ("EDM's draws", EDM().sample_t(BATCH, generator=torch.Generator().manual_seed(1)).to(DEVICE)),
                ("all at 3", torch.full((BATCH,), 3.0, device=DEVICE)),
                ("all at 20", torch.full((BATCH,), 20.0, device=DEVICE)),
            ):
                noisy = noised(reference, sigma)

                def products(noisy: Tensor = noisy, flat: Tensor = flat, weights: Tensor = weights) -> None:
                    noisy.flatten(1) @ flat.T
                    weights @ flat

                for arithmetic in arithmetics(dtype):

                    def compute(
                        arithmetic: Any = arithmetic,
                        noisy: Tensor = noisy,
                        sigma: Tensor = sigma,
                        reference: Tensor = reference,
                    ) -> None:
                        posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic=arithmetic)

                    row: dict[str, Any] = {"n": n, "references": str(dtype), "noise": name}
                    row["arithmetic"] = arithmetic or "default"
                    for precision in ("ieee", "tf32") if GPU else ("ieee",):
                        torch.backends.cuda.matmul.fp32_precision = precision
                        row[precision] = outcome(partial(ratio_of_pairs, compute, products, args.pairs, DEVICE))
                    torch.backends.cuda.matmul.fp32_precision = "ieee"
                    found.append(row)
    return found


def _network(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    config = json.loads(PRESET.read_text()) if GPU else SMALL_NETWORK
    return UNet2DModel.from_config(config | {"sample_size": SIDE, "in_channels": 3, "out_channels": 3}).to(DEVICE)


def _seconds(call: Callable[[], object]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second in the manner of Diffusers' script, by DSM and by STF, also with channels last, and the share of the targets in the last."""
    objective, scheduler, found = STFTrainingObjective(EDM()), DDPMScheduler(), []
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def finish(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def diffusers_step(clean: Tensor) -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),), device=DEVICE)
            loss = F.mse_loss(network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample.float(), noise)
        finish(loss)

    def our_step(pixels: Tensor, reference: Any, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            batch = objective.perturb(pixels, reference=reference)
            noisy = batch.model_input.contiguous(memory_format=memory_format)
            loss = objective.loss(network(noisy, batch.timestep).sample, batch)
        finish(loss)

    for n in SIZES:
        pixels = images(n, torch.uint8)
        sources, clean = pixels[:BATCH], images(BATCH, torch.float32)
        banks = {
            "bank": ReferenceBank(pixels),
            "bank with mirrors": ReferenceBank(pixels, augmentation="horizontal_flip"),
        }
        for name, reference in (({"batch": pixels} if n == SIZES[0] else {}) | banks).items():
            calls: list[Callable[[], object]] = [
                partial(diffusers_step, clean),
                partial(our_step, sources, None),
                partial(our_step, sources, reference),
                partial(our_step, sources, reference, torch.channels_last),
                partial(objective.perturb, sources, reference=reference),
                partial(objective.perturb, sources),
            ]
            rounds = [[_seconds(call) for call in calls] for _ in range(args.pairs + 1)]
            theirs, dsm, stf, last, target, alone = (
                statistics.median(times) for times in zip(*rounds[1:], strict=True)
            )
            found.append(
                {
                    "n": n, "references": name, "diffusers_images_per_second": BATCH / theirs,
                    "dsm_images_per_second": BATCH / dsm, "stf_images_per_second": BATCH / stf,
                    "channels_last_images_per_second": BATCH / last,
                    "share_of_targets": (target - alone) / stf,
                }
            )  # fmt: skip
    return found


def waits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whether a second call waits for the device: CUDA raises where it does."""
    objective, pixels = STFTrainingObjective(EDM()), images(SIZES[0], torch.uint8)
    floats = images(SIZES[0], torch.float32)
    labels = torch.arange(SIZES[0], device=DEVICE) % 10
    bank, flipped = ReferenceBank(pixels), ReferenceBank(pixels, augmentation="horizontal_flip")
    labelled = ReferenceBank(pixels, labels.cpu())
    some, theirs, on_cpu = pixels[:BATCH], labels[:BATCH], labels.cpu()
    sampler = ReferenceBatchSampler(len(pixels), BATCH, min(4 * BATCH, len(pixels)), labels=on_cpu)
    batches = DeviceImages.of_bank(labelled, on_cpu).batches_from(0, sampler, pin_memory=GPU)
    cases: dict[str, Callable[[], Any]] = {
        "no references": lambda: objective.perturb(some),
        "uint8 batch": lambda: objective.perturb(some, reference=pixels),
        "float32 batch": lambda: objective.perturb(floats[:BATCH], reference=floats),
        "batch with classes": lambda: objective.perturb(some, reference=pixels, labels=theirs, reference_labels=labels),
        "bank": lambda: objective.perturb(some, reference=bank),
        "bank with mirrors": lambda: objective.perturb(some, reference=flipped),
        "batch of a bank's images": lambda: next(batches),
        "bank with classes": lambda: objective.perturb(some, reference=labelled, labels=on_cpu[:BATCH]),
    }
    found = []
    for name, call in cases.items():
        call()
        if GPU:
            torch.cuda.set_sync_debug_mode("error")
        result = outcome(call)
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
        found.append(
            {"step": name, "waits": result if isinstance(result, str) else "no" if GPU else "not known on a CPU"}
        )
    return found


def trainings(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The digits, by each noise process."""
    found = []
    for process in ("edm", "ve", "vp", "flow"):
        folder = args.output_dir / f"digits-{process}"
        command = [
            sys.executable,
            str(TRAINER),
            "--output_dir",
            str(folder),
            "--overwrite_output_dir",
            "--noise_process",
            process,
        ]
        command += [
            "--max_train_steps",
            str(args.steps),
            "--lr_warmup_steps",
            str(args.steps // 10),
            "--learning_rate",
            "1e-3",
        ]
        command += ["--report_to", "none", "--num_samples", "16" if GPU else "2", "--mixed_precision", "bf16"]
        command += ["--num_inference_steps", "35" if GPU else "2", "--reference", "bank"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        row = {"process": process, "exit_code": done.returncode, "seconds": time.perf_counter() - started}
        grids = sorted((folder / "samples").glob("step-*.png"))
        found.append(row | {"grid": str(grids[-1].relative_to(args.output_dir)) if grids else done.stderr[-300:]})
    return found


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "accuracy": accuracy, "choice": choice, "waits": waits, "steps": steps, "speed": speed, "trainings": trainings,
}  # fmt: skip


# ---- report


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):  # seconds, and the ratio
        return f"{value[1]:.2f} ({1000 * value[0]:.2f} ms)"
    return str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    machine = f"{torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()}, torch {torch.__version__}"
    lines = [f"# GPU check: {machine}", ""]
    for name, part in PARTS.items():
        path = args.output_dir / f"{name}.json"
        if not path.exists():
            if time.monotonic() > deadline:
                print(f"Stopped before {name}. Call again.")
                continue
            print(f"{name} ...", flush=True)
            started = time.perf_counter()
            try:
                rows = part(args)
            except Exception:  # the other parts are still of use
                traceback.print_exc()
                continue
            write(path, {"machine": machine, "seconds": time.perf_counter() - started, "rows": rows})
        found = json.loads(path.read_text())
        lines += [f"## {name} ({found['machine']}, {found['seconds']:.0f} s)", ""]
        lines += [PARTS[name].__doc__ or "", "", *table(found["rows"]), ""]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.md").write_text("\n".join(lines))
    print(args.output_dir / "report.md")


if __name__ == "__main__":
    main()
