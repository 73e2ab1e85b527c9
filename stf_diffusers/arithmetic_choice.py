"""Which arithmetic computes a posterior mean: on CPUs by a rule, on GPUs by a measurement, once for each kind of GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from .chunk_states import Arithmetic, Queries, as_multiplied, level_norms, squared_norms
from .files import replacing
from .integer_products import TERMS, centred_levels, cpu_multiplies_int8
from .precision import without_autocast

logger = logging.getLogger(__name__)

# Names an arithmetic for all accelerators, and switches measuring off.
VARIABLE = "STF_DIFFUSERS_ARITHMETIC"

# Those that do not wait for the device. The first one is what is used where nothing is known.
DENSE: tuple[Arithmetic, ...] = ("float64", "int8")

# Changes with the meaning of a file, and of the arithmetics.
_VERSION = 1

# What is promised of each arithmetic.
_TOLERANCE = 1e-5

# How many times as fast as float64 another arithmetic has to be: timings vary, and a choice should not.
_GAIN = 1.2


def choose_arithmetic(device: torch.device, dtype: torch.dtype, dimension: int) -> Arithmetic:
    """The arithmetic for references of `dtype` (n, dimension) and noisy images on a device.

    On CPUs the one that was measured to be the fastest there, with VNNI instructions and without: the same each time, so that
    a resumed training ends bit-identical. On CUDA devices the fastest that is accurate, measured in about a second when it is
    first asked for, and kept in Hugging Face's cache of assets for this device, driver and version of torch. Elsewhere float64.

    Raises:
        ValueError: the environment variable `STF_DIFFUSERS_ARITHMETIC`, which names one for accelerators, names none.
    """
    fits = dimension in TERMS
    if device.type == "cpu":
        if fits and dtype == torch.uint8 and cpu_multiplies_int8():
            return "int8"
        return "float64" if dtype == torch.float64 else "float32"
    named = os.environ.get(VARIABLE, "")
    if named not in ("", *DENSE):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(DENSE)}, or not set; got {named!r}.")
    if not fits or dtype == torch.float64:
        return "float64"
    if named:
        return "int8" if named == "int8" else "float64"
    if device.type != "cuda":
        return "float64"
    known = torch.cuda.current_device() if device.index is None else device.index, dtype == torch.uint8
    if known not in _CHOSEN:
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return "float64"
        place = torch.device("cuda", known[0])
        _CHOSEN[known] = chosen_by_file(_description(place), place, known[1])
    return _CHOSEN[known]


# By index of the device, and whether references are uint8 pixels.
_CHOSEN: dict[tuple[int, bool], Arithmetic] = {}


def _description(device: torch.device) -> dict[str, str]:
    """What a measurement holds for."""
    driver = Path("/proc/driver/nvidia/version")
    return {
        "version": str(_VERSION),
        "device": torch.cuda.get_device_name(device),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else "",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def chosen_by_file(
    description: dict[str, str], device: torch.device, levels: bool, cache_dir: str | None = None
) -> Arithmetic:
    """What the file for a device says, or else the fastest by `measured`, which it then says.

    Processes that begin together wait for the one that measures, and choose alike.

    Args:
        description: identifies the device.
        device: the device.
        levels: whether the references are uint8 pixels; else floating point.
        cache_dir: cache of assets, if not Hugging Face's.
    """
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock

    key = description | {"references": "uint8" if levels else "floating point"}
    name = f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    with ExitStack() as stack:
        path = None
        try:
            path = cached_assets_path("stf_diffusers", "arithmetic", assets_dir=cache_dir) / name
            stack.enter_context(WeakFileLock(path.with_suffix(".lock")))
        except (OSError, ValueError) as error:  # where a file is in the way of the folder, it is a ValueError
            logger.warning("What is measured is not kept: %s. %s says it beforehand.", error, VARIABLE)
            path = None
        if path is not None and (kept := _read(path)) is not None:
            return kept
        try:
            milliseconds = measured(device, levels)
        except torch.OutOfMemoryError as error:
            logger.warning("Products are in float64 on %s, where there is no room to measure others: %s", device, error)
            return "float64"
        fastest = min(milliseconds, key=lambda arithmetic: milliseconds[arithmetic])
        arithmetic: Arithmetic = fastest if milliseconds[fastest] * _GAIN < milliseconds["float64"] else "float64"
        times = ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items())
        logger.info("Products with %s references are in %s on %s: %s.", key["references"], arithmetic, device, times)
        if path is not None:
            with suppress(OSError), replacing(path) as place:
                place.write_text(
                    json.dumps(key | {"chosen": arithmetic, "milliseconds": milliseconds}, indent=2) + "\n"
                )
        return arithmetic


def _read(path: Path) -> Arithmetic | None:
    """What a file says; None where it is missing, or not one of these."""
    try:
        chosen = json.loads(path.read_text())["chosen"]
        return next((name for name in DENSE if name == chosen), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured(device: torch.device, levels: bool, candidates: Sequence[Arithmetic] = DENSE) -> dict[Arithmetic, float]:
    """Milliseconds of 64 posterior means over 2,048 references of 3 × 32 × 32, by each candidate that is accurate.

    A candidate other than float64 that cannot be computed on the device, or whose mean errs by more than 1e-5 on planted
    near-duplicates and extremes, is left out, which is said in the log.

    Raises:
        torch.OutOfMemoryError: there is no room for it.
    """
    found: dict[Arithmetic, float] = {}
    for arithmetic in candidates:
        try:
            worst = worst_error(device, levels, arithmetic)
            if not worst <= _TOLERANCE:
                logger.warning("%s is not used on %s: its worst error is %.3g.", arithmetic, device, worst)
                continue
            found[arithmetic] = _milliseconds(device, levels, arithmetic)
        except torch.OutOfMemoryError:  # says nothing of the device
            raise
        except RuntimeError as error:
            if arithmetic == "float64":
                raise
            logger.info("%s is not used on %s: %s", arithmetic, device, str(error).splitlines()[0])
    return found


def _mean(noisy: Tensor, images: Tensor, sigma: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Posterior means (B, D) over one chunk of references (n, D), int8 levels or float32."""
    levels = images.dtype == torch.int8
    with without_autocast(noisy.device.type):
        queries = Queries(noisy, torch.ones_like(sigma), sigma, levels, arithmetic, dense=True)
        read = as_multiplied(images, arithmetic)
        norms = level_norms(images) if levels else squared_norms(images)
        state = queries.state(queries.logits(read, norms), read)
    return state.result(torch.float64, centred_levels=levels).mean


def worst_error(device: torch.device, levels: bool, arithmetic: Arithmetic) -> float:
    """Largest error of a posterior mean on the device, against differences in float64 on the CPU.

    For noise levels from 0.002 to 80 and sources with copies, some of which differ in one bit, among black and white images
    and others; in sizes that need padding and in others.
    """
    return max(_worst_error(n, dimension, device, levels, arithmetic) for n, dimension in ((1025, 3069), (1024, 3072)))


def _worst_error(n: int, dimension: int, device: torch.device, levels: bool, arithmetic: Arithmetic) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    pixels = torch.randint(0, 256, (n, dimension), generator=generator, dtype=torch.uint8, device="cpu")
    pixels[100:102] = torch.tensor([[0], [255]], dtype=torch.uint8, device="cpu")
    sigma = torch.tensor([0.002, 0.02, 0.2, 1.0, 3.0, 10.0, 80.0, 0.002, 5.0], dtype=torch.float64, device="cpu")
    for row in range(len(sigma)):
        copies = pixels[110 + 20 * row : 130 + 20 * row]
        copies[:] = pixels[row]
        copies[10:, row] ^= 1
    pixels[7:9] = pixels[100:102]
    images = centred_levels(pixels) if levels else pixels.to(torch.float32) / 127.5 - 1
    values = pixels.to(torch.float64) / 127.5 - 1 if levels else images.to(torch.float64)
    shape = len(sigma), pixels.shape[1]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    noisy = values[: len(sigma)] + sigma[:, None] * noise
    distance = torch.stack([(row - values).square().sum(1) for row in noisy])
    expected = (-distance / (2 * sigma[:, None] ** 2)).softmax(1) @ values
    mean = _mean(noisy.to(device), images.to(device), sigma.to(device), arithmetic)
    return float((mean.cpu() - expected).abs().max())


def _milliseconds(device: torch.device, levels: bool, arithmetic: Arithmetic, repetitions: int = 5) -> float:
    """The shortest of some times, after one that is not counted."""
    images = torch.zeros(2048, 3072, dtype=torch.int8 if levels else torch.float32, device=device)
    noisy = torch.ones(64, 3072, dtype=torch.float64, device=device)
    shortest = math.inf
    for repetition in range(repetitions + 1):
        _wait_for(device)
        start = time.perf_counter()
        _mean(noisy, images, torch.full((64,), 3.0, dtype=torch.float64, device=device), arithmetic)
        _wait_for(device)
        if repetition:
            shortest = min(shortest, 1000 * (time.perf_counter() - start))
    return shortest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
