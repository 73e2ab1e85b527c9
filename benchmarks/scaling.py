#!/usr/bin/env python
"""What does a target cost as the reference set grows, and over processes?

    python benchmarks/scaling.py --image_size 32 --n 10000 20000 50000 100000
    python benchmarks/scaling.py --image_size 64 --n 62500 125000 250000 500000 1000000 --on_disk --folder /large/disk
    python benchmarks/scaling.py --image_size 32 --n 50000 --processes 1 2

Times one batch's posterior means over a `ReferenceBank`, in memory or (`--on_disk`) read from a file chunk by chunk, and
fits the exponent of n. The extra memory is the largest resident memory of the calls beyond that before them. With
`--processes`, a bank is spread over that many processes on this machine (one thread each), which each have a batch of
their own: the cost per image then stays, and the memory of each falls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from posterior_mean import resident_peak

from stf_diffusers import EDM, ReferenceBank
from stf_diffusers.bank_file import write_bank


def write_random_bank(path: Path, n: int, size: int) -> None:
    """A file of random images, written chunk by chunk."""

    def chunks() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, n, 4096):
            yield torch.randint(0, 256, (min(4096, n - start), 3, size, size), generator=generator, dtype=torch.uint8)

    write_bank(path, torch.Size((n, 3, size, size)), torch.uint8, chunks(), None, None, fingerprint="")


def measure(bank: ReferenceBank, batch_size: int, size: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a call after one that is not counted, and MiB of extra resident memory."""
    sigma = EDM().sample_t(batch_size, generator=torch.Generator().manual_seed(1)).float()
    noisy = torch.randn(batch_size, 3, size, size) * sigma.view(-1, 1, 1, 1)
    Path("/proc/self/clear_refs").write_text("5")
    before, times = resident_peak(), []
    for _ in range(repeats + 1):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        bank.posterior_mean(noisy, 1.0, sigma)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), (resident_peak() - before) / 2**10


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", "--num_references", type=int, nargs="+", default=[10_000, 20_000, 50_000, 100_000])
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--on_disk", action="store_true")
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="Where --on_disk writes its file, and removes it."
    )
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    size = args.image_size

    if "LOCAL_RANK" in os.environ:  # one of the processes of a bank that is spread
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (args.n[0], 3, size, size), generator=generator, dtype=torch.uint8)
        bank = ReferenceBank(images, process_shard=(rank, world))
        del images
        taken, _ = measure(bank, args.batch_size, size, args.repeats)
        if rank == 0:
            print(json.dumps({"processes": world, "seconds": taken, "bank_mebibytes": bank.nbytes / 2**20}))
        dist.destroy_process_group()
        return

    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(machine)
    result: dict[str, object] = {
        "machine": machine,
        "batch_size": args.batch_size,
        "image_size": size,
        "on_disk": args.on_disk,
    }
    rows = []
    if args.processes:
        for world in args.processes:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), __file__]
            command += [
                "--num_references",
                str(args.n[0]),
                "--image_size",
                str(size),
                "--batch_size",
                str(args.batch_size),
            ]
            done = subprocess.run(
                [*command, "--repeats", str(args.repeats)], check=True, capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            row = json.loads(done.stdout.splitlines()[-1])
            row["seconds_per_image"] = row["seconds"] / (world * args.batch_size)
            rows.append(row)
            print(row)
    else:
        print(f"{'n':>9} {'seconds':>9} {'extra MiB':>10} {'bank MiB':>10}")
        for n in args.n:
            path = args.folder / "scaling_bank.safetensors"
            try:
                if args.on_disk:
                    write_random_bank(path, n, size)
                    bank = ReferenceBank.open(path)
                else:
                    bank = ReferenceBank(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8))
                taken, extra = measure(bank, args.batch_size, size, args.repeats)
            finally:
                path.unlink(missing_ok=True)
            rows.append({"n": n, "seconds": taken, "extra_mebibytes": extra, "bank_mebibytes": bank.nbytes / 2**20})
            print(f"{n:9d} {taken:9.3f} {extra:10.1f} {bank.nbytes / 2**20:10.1f}", flush=True)
        if len(rows) > 1:
            x = [math.log(row["n"]) for row in rows]
            y = [math.log(row["seconds"]) for row in rows]
            slope = statistics.linear_regression(x, y).slope
            result["exponent"] = slope
            print(f"seconds grow as n^{slope:.3f}")
    result["rows"] = rows
    args.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
