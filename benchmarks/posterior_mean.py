#!/usr/bin/env python
"""How fast, how large and how accurate is the posterior mean?

    python benchmarks/posterior_mean.py --n 1024 4096 50000 --output posterior_mean.json
    python benchmarks/posterior_mean.py --parts arithmetics --n 4096 --sigmas 3 4 6 8 20 --dataset_name cifar10

Speed: `posterior_mean` of uint8 and of float32 references and a `ReferenceBank`, against the two bare float32 matrix
products of the same size and against direct broadcasting in slices of 8 rows and of one row. Ratios are medians over
pairs that alternate in one run. Noise levels are EDM's training draws, all at 3, where a few references matter to each
image, all at 6, where nearly all do a little, and all at 20, where all do (`--sigmas`). The same of each arithmetic that a CPU
has (`--arithmetics`), of which a call uses the fastest by itself. Images are smooth random ones or a data set's.

Memory: the largest extra memory of one call beyond the references, in a process of its own (CPU: resident memory, on Linux).

Accuracy: the worst error of any pixel against float64 arithmetic by exact differences, with 23 planted duplicates and
near-duplicates of each source, per noise level.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stf_diffusers import EDM, ReferenceBank, posterior_mean
from stf_diffusers.chunk_states import Arithmetic
from stf_diffusers.posterior import posterior_state, reference_norms
from stf_diffusers.training.data_set import find_image_column, load_split
from stf_diffusers.training.image_reader import decode_all, make_reader

PARTS = ("speed", "arithmetics", "memory", "accuracy")
SIGMAS = (0.002, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 80.0)


def smooth_pixels(n: int, size: int, device: torch.device) -> Tensor:
    """Random images with the correlations of photographs, (n, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.empty((n, 3, size, size), dtype=torch.uint8)
    for start in range(0, n, 4096):
        rows = min(4096, n - start)
        coarse = torch.rand((rows, 3, 5, 5), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic") + 0.05 * torch.randn(
            (rows, 3, size, size), generator=generator
        )
        pixels[start : start + rows] = fine.clamp(0, 1).mul(255).to(torch.uint8)
    return pixels.to(device)


def images_of(dataset_name: str | None, n: int, size: int, device: torch.device) -> Tensor:
    """The first `n` images of a data set, or smooth ones, (n, 3, size, size) uint8."""
    if dataset_name is None:
        return smooth_pixels(n, size, device)
    dataset = load_split(dataset_name)
    if len(dataset) < n:
        raise SystemExit(f"{dataset_name} has {len(dataset)} images; --n asks for {n}.")
    dataset = dataset.select(range(n))
    column = find_image_column(dataset)
    pixels = decode_all(dataset, column, make_reader(dataset, column, "RGB", size, True), math.inf, quiet=True)
    if pixels is None:
        raise SystemExit(f"{dataset_name} cannot be decoded to {size}x{size} images.")
    return pixels.to(device)


def noised(pixels: Tensor, sigma: Tensor) -> Tensor:
    clean = pixels[: len(sigma)].float() / 127.5 - 1
    return clean + sigma.view(-1, 1, 1, 1).to(clean) * torch.randn_like(clean)


def broadcast(noisy: Tensor, reference: Tensor, sigma: Tensor, rows: int) -> None:
    """The direct formulation, (rows, n, D) at a time."""
    for start in range(0, len(noisy), rows):
        part = slice(start, start + rows)
        distance = ((noisy[part, None] - reference[None]) ** 2).flatten(2).sum(2)
        weights = torch.softmax(-distance / (2 * sigma[part, None] ** 2), 1)
        (weights[:, :, None] * reference.flatten(1)[None]).sum(1)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio_of_pairs(
    ours: Callable[[], object], other: Callable[[], object], pairs: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of `ours`, and median of ours / other over alternating pairs after one that is not counted."""
    times = [(seconds(ours, device), seconds(other, device)) for _ in range(pairs + 1)][1:]
    return statistics.median(t for t, _ in times), statistics.median(t / u for t, u in times)


def noise_levels(batch_size: int, sigmas: Sequence[float], device: torch.device) -> dict[str, Tensor]:
    draws = EDM().sample_t(batch_size, generator=torch.Generator().manual_seed(1)).float().to(device)
    return {"EDM's draws": draws} | {f"all at {level:g}": torch.full_like(draws, level) for level in sigmas}


def by_arithmetic(
    query: Tensor, reference: Tensor, norms: Tensor | None, sigma: Tensor, arithmetic: Arithmetic
) -> None:
    alpha = torch.ones_like(sigma, dtype=torch.float64)
    state = posterior_state(query, reference, alpha, sigma.double(), norms=norms, arithmetic=arithmetic)
    state.result_like(query, reference.dtype)


def products(query: Tensor, reference: Tensor, weights: Tensor) -> None:
    query @ reference.T
    weights @ reference


def measure_arithmetics(
    batch_size: int, pixels: Tensor, sigmas: Sequence[float], pairs: int, arithmetics: Sequence[Arithmetic]
) -> list[dict[str, object]]:
    """The ratios to the products of named arithmetics, of references whose norms are known (a bank) or not."""
    device, shape, n = torch.device("cpu"), pixels.shape, len(pixels)
    pixels = pixels.flatten(1)
    floats, weights = pixels.float() / 127.5 - 1, torch.rand(batch_size, n)
    cases = [
        (f"{name}{'' if norms is None else ' bank'}", reference, norms, arithmetic)
        for name, reference in (("uint8", pixels), ("float32", floats))
        for norms in (None, reference_norms(reference))
        for arithmetic in arithmetics
        if arithmetic != "int8" or name == "uint8"
    ]
    rows: list[dict[str, object]] = []
    for noise, sigma in noise_levels(batch_size, sigmas, device).items():
        query = noised(pixels.view(shape), sigma).flatten(1)
        bare = partial(products, query, floats, weights)
        for name, reference, norms, arithmetic in cases:
            call = partial(by_arithmetic, query, reference, norms, sigma, arithmetic)
            taken, ratio = ratio_of_pairs(call, bare, pairs, device)
            rows.append({"noise": noise, "references": name, "arithmetic": arithmetic, "n": n})
            rows[-1] |= {"seconds": taken, "ratio_to_products": ratio}
            print(
                f"{batch_size:4d} {n:7d}  {noise:12s} {name:13s} {arithmetic:8s} {taken:9.4f}s {ratio:7.2f}", flush=True
            )
    return rows


def measure_speed(
    batch_size: int, pixels: Tensor, sigmas: Sequence[float], pairs: int, device: torch.device
) -> list[dict[str, object]]:
    n = len(pixels)
    floats = pixels.float() / 127.5 - 1
    flat, weights = floats.flatten(1), torch.rand(batch_size, n, device=device)
    bank = ReferenceBank(pixels)
    rows: list[dict[str, object]] = []
    for noise, sigma in noise_levels(batch_size, sigmas, device).items():
        noisy = noised(pixels, sigma)
        bare = partial(products, noisy.flatten(1), flat, weights)
        for name, call in (
            ("uint8", lambda noisy=noisy, sigma=sigma: posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma)),
            ("uint8 bank", lambda noisy=noisy, sigma=sigma: bank.posterior_mean(noisy, 1.0, sigma)),
            ("float32", lambda noisy=noisy, sigma=sigma: posterior_mean(noisy, floats, alpha=1.0, sigma=sigma)),
        ):
            taken, ratio = ratio_of_pairs(call, bare, pairs, device)
            row: dict[str, object] = {"B": batch_size, "n": n, "D": flat.shape[1], "noise": noise, "references": name}
            row |= {"seconds": taken, "ratio_to_products": ratio}
            if n <= 4096:
                for slices in (8, 1):
                    _, inverse = ratio_of_pairs(call, partial(broadcast, noisy, floats, sigma, slices), 1, device)
                    row[f"broadcast_{slices}_rows_over_ours"] = 1 / inverse
            rows.append(row)
            print(
                f"{batch_size:4d} {n:7d} {flat.shape[1]:6d}  {noise:12s} {name:11s} {taken:9.4f}s {ratio:7.2f}"
                + "".join(f" {row[f'broadcast_{k}_rows_over_ours']:9.1f}" for k in (8, 1) if n <= 4096),
                flush=True,
            )
    return rows


def resident_peak() -> int:
    """Largest resident memory in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def measure_memory(batch_size: int, n: int, size: int, kind: str) -> None:
    """Print the MiB by which one call raises the largest resident memory (or the allocator's, on a GPU)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)
    sigma = torch.full((batch_size,), 20.0, device=device)
    noisy = noised(pixels, sigma)
    posterior_mean(noisy[:2], pixels[:64], alpha=1.0, sigma=sigma[:2])  # libraries' own buffers
    reference = pixels if kind == "uint8" else pixels.float() / 127.5 - 1
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        posterior_mean(noisy, reference, alpha=1.0, sigma=sigma)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is now the present one
        before = resident_peak()
        posterior_mean(noisy, reference, alpha=1.0, sigma=sigma)
        print((resident_peak() - before) / 2**10)


def measure_memories(batch_size: int, n: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for kind in ("uint8", "float32"):
        command = [sys.executable, __file__, "--memory_of", str(batch_size), str(n), "32", kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        mebibytes = float(done.stdout.split()[-1])
        rows.append({"references": kind, "n": n, "mebibytes": mebibytes})
        print(f"{kind:8s} n = {n}: {mebibytes:.0f}")
    return rows


def measure_accuracy(device: torch.device) -> list[dict[str, object]]:
    pixels = smooth_pixels(4160, 32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for source in range(len(SIGMAS)):
        copies = pixels[source].repeat(23, 1, 1, 1).short()
        copies[3:13].view(10, -1)[torch.arange(10), torch.arange(10) * 300] += 1
        copies[13:] += torch.randint(-1, 2, copies[13:].shape, generator=generator, dtype=torch.int16)
        pixels[1000 + 23 * source : 1023 + 23 * source] = copies.clamp(0, 255).to(torch.uint8)
    sigma = torch.tensor(SIGMAS)
    noisy = noised(pixels, sigma)
    exact = pixels.double() / 127.5 - 1
    truth = []
    for row, level in zip(noisy.double(), SIGMAS, strict=True):
        weights = (-(row - exact).square().flatten(1).sum(1) / (2 * level**2)).softmax(0)
        truth.append((weights @ exact.flatten(1)).view(row.shape))
    rows: list[dict[str, object]] = []
    for name, reference, arithmetic in (
        ("uint8, int8 products", pixels, "int8"),
        ("uint8, float64 logits", pixels, "float64"),
        ("float32, float64 logits", exact.float(), "float64"),
        ("uint8, float32 products", pixels, "float32"),
        ("float32, float32 products", exact.float(), "float32"),
    ):
        if arithmetic != "float64" and device.type != "cpu":
            continue
        result = posterior_mean(
            noisy.to(device),
            reference.to(device),
            alpha=1.0,
            sigma=sigma.to(device),
            arithmetic=arithmetic,  # type: ignore[arg-type]
        )
        errors = [
            (mean.double().cpu() - right).abs().max().item() for mean, right in zip(result.mean, truth, strict=True)
        ]
        rows.append(
            {"references": name, "worst": max(errors), "by_sigma": dict(zip(map(str, SIGMAS), errors, strict=True))}
        )
        print(f"{name:25s} " + " ".join(f"{error:8.1e}" for error in errors))
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 4096, 50000])
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[32], help="D = 3 x size x size.")
    parser.add_argument(
        "--arithmetics", nargs="*", default=["int8", "float32", "float64"], help="Arithmetics to compare, on a CPU."
    )
    parser.add_argument("--sigmas", type=float, nargs="+", default=[3, 6, 20], help="Besides EDM's draws.")
    parser.add_argument("--dataset_name", help="Default: smooth random images.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--memory_of", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("posterior_mean.json"))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.memory_of:
        batch_size, n, size, kind = args.memory_of
        measure_memory(int(batch_size), int(n), int(size), kind)
        return

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = f"{platform.processor() or platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    result: dict[str, object] = {"machine": machine}
    print(
        "   B       n      D  noise        references     seconds  /products  broadcast(8 rows)/ours  broadcast(1 row)/ours"
    )
    images = {
        (size, n): images_of(args.dataset_name, n, size, device)
        for size in args.image_sizes
        for n in args.n
        if "speed" in args.parts or "arithmetics" in args.parts
    }
    if "speed" in args.parts:
        result["speed"] = [
            row
            for batch_size in args.batch_sizes
            for pixels in images.values()
            for row in measure_speed(batch_size, pixels, args.sigmas, args.pairs, device)
        ]
    if "arithmetics" in args.parts and device.type == "cpu":
        result["arithmetics"] = [
            row
            for (size, n), pixels in images.items()
            if size == args.image_sizes[0] and (n <= 4096 or args.parts == ["arithmetics"])
            for row in measure_arithmetics(args.batch_sizes[0], pixels, args.sigmas, args.pairs, args.arithmetics)
        ]
    if "memory" in args.parts:
        print("extra memory of a call, MiB")
        result["memory"] = measure_memories(args.batch_sizes[0], max(args.n))
    if "accuracy" in args.parts:
        print("worst error, sigma = " + " ".join(f"{sigma:8g}" for sigma in SIGMAS))
        result["accuracy"] = measure_accuracy(device)
    args.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
