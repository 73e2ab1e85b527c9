"""The posterior mean over a set of reference images: the only softmax in the package.

For ``x_t = alpha x0 + sigma noise`` and references x_1 .. x_n,

    E[x0 | x_t, references] = sum_i w_i x_i,   w = softmax_i( -|x_t - alpha x_i|^2 / (2 sigma^2) ),

the Stable Target Field's estimator (Xu, Tong & Jaakkola 2023, arXiv 2302.00670, eq. 5). The set {x0} gives denoising
score matching; the whole data set gives the exact empirical posterior. References are streamed in chunks, and the
states of chunks merge exactly, as in streaming softmax, so no (B, n, D) tensor is ever formed.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .arithmetic_choice import choose_arithmetic
from .chunk_states import (
    Arithmetic,
    PosteriorMean,
    PosteriorState,
    Queries,
    as_multiplied,
    squared_norms,
)
from .integer_products import TERMS, centred_levels
from .precision import full_precision, without_autocast
from .sparse_states import SparseQueries

# Elements of a chunk of references. A CPU is fastest where what a product reads (8 or 16 MiB) stays in its cache; other
# devices where there are few chunks (128 MiB in float64; of floating point references as digits up to 400 MiB for a moment).
_CHUNK_ELEMENTS: dict[Arithmetic, int] = {"int8": 2**23, "float32": 2**22, "float64": 2**21}
DENSE_CHUNK_ELEMENTS = 2**24

# References of a chunk whose weights are rounded to 2^-32 of the chunk's largest: 4e-6 in the mean at worst.
_MAX_INT8_CHUNK = 2**14


class ReferenceRows(Protocol):
    """A tensor (n, ...), or what can be sliced like one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def take_rows(reference: ReferenceRows, rows: Tensor) -> Tensor:
    """The rows (k,), in that order."""
    if isinstance(reference, Tensor):
        return reference.index_select(0, rows.to(reference.device, non_blocking=True))
    return torch.cat([reference[slice(row, row + 1)] for row in rows.tolist()])


def check_tensor(name: str, value: Any, shape: str) -> None:
    """Raise TypeError unless a value is a tensor; the message says which `shape` is needed."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor {shape}; got {type(value).__name__}. Pass torch.as_tensor(...) of it."
        )


def check_batch(name: str, images: Any, shape: str) -> None:
    """Raise TypeError or ValueError unless the images are a tensor (B, ...)."""
    check_tensor(name, images, shape)
    if images.ndim < 2:
        raise ValueError(
            f"{name} must be {shape} with at least 2 dimensions; got {tuple(images.shape)}. Pass {name}[:, None] for "
            "images of one value."
        )


def pixels_to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1] by ``x / 127.5 - 1``; half precision to float32; float32 and float64 as is.

    Raises:
        TypeError: any other dtype, whose range is not known.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(127.5).sub_(1)
    if images.dtype in (torch.float16, torch.bfloat16):
        return images.to(torch.float32)
    if images.dtype in (torch.float32, torch.float64):
        return images
    raise TypeError(
        f"Images must be floating point in [-1, 1] or uint8 pixels (read as x / 127.5 - 1); got {images.dtype}. "
        "Convert them with .to(torch.uint8) or .float() first."
    )


def levels_or_floats(images: Tensor) -> Tensor:
    """References as the products read them: uint8 pixels as centred levels, others as `pixels_to_float` has them."""
    return centred_levels(images) if images.dtype == torch.uint8 else pixels_to_float(images)


def reference_norms(images: Tensor) -> Tensor:
    """(n,) float64, `squared_norms` of references (n, ...) of any dtype that references have."""
    return squared_norms(levels_or_floats(images.flatten(1)))


def posterior_state(
    noisy: Tensor,
    reference: ReferenceRows,
    alpha: Tensor,
    sigma: Tensor,
    *,
    mask: Tensor | None = None,
    norms: Tensor | None = None,
    chunk_size: int | None = None,
    arithmetic: Arithmetic | None = None,
    dense: bool | None = None,
) -> PosteriorState:
    """The unnormalised posterior mean, which states of other references can be merged into.

    Args:
        noisy: (B, D) floating point.
        reference: (n, ...) rows that can be sliced into tensors, D elements each; moved to `noisy` chunk by chunk.
        alpha, sigma: (B,) float64 on the device of `noisy`.
        mask: (B, n) bool.
        norms: (n,) `squared_norms` of the references, where they are known.
        chunk_size, arithmetic: as for `posterior_mean`.
        dense: as for `Queries`: nothing depends on values, so that nothing waits for the device. Default: but on CPUs.
    """
    batch_size, dimension = noisy.shape
    n = reference.shape[0]
    dense = noisy.device.type != "cpu" if dense is None else dense
    if arithmetic is None:
        arithmetic = choose_arithmetic(noisy.device, reference.dtype, dimension)
    if chunk_size is None:
        chunk_size = _chunk_size(dimension, batch_size, arithmetic, reference.dtype, dense)
    chunk_size = min(chunk_size, _MAX_INT8_CHUNK)
    # Chunks of one size, so that the last is not a sliver; of a size that needs no padding, but for the last.
    multiple = 32 if dense and chunk_size >= 32 else 1
    chunk_size = math.ceil(n / max(1, math.ceil(n / chunk_size)) / multiple) * multiple or 1
    levels = reference.dtype == torch.uint8
    mask = None if mask is None else mask.to(noisy.device, non_blocking=True)
    # Only float32 products depend on the settings of the process.
    settings = full_precision if arithmetic == "float32" else without_autocast
    with settings(noisy.device.type):
        queries: Queries | SparseQueries
        if dense:
            queries = Queries(noisy, alpha, sigma, levels, arithmetic, dense)
        else:
            queries = SparseQueries(noisy, alpha, sigma, levels, arithmetic, norms is not None)
        state: PosteriorState | None = None
        for start in range(0, n, chunk_size):
            chunk = slice(start, min(start + chunk_size, n))
            images = reference[chunk].to(noisy.device, non_blocking=True).flatten(1)
            images = queries.read(images) if isinstance(queries, SparseQueries) else levels_or_floats(images)
            if norms is not None:
                known = norms[chunk].to(noisy.device, non_blocking=True)
            else:
                known = queries.norms(images) if isinstance(queries, SparseQueries) else squared_norms(images)
            if norms is None and not levels:
                # NaN for the rows that use such a reference, and nothing for the others: 0 times infinity is NaN too.
                nothing = known * 0
                unusable = nothing != 0
                # Where everything is dense asking whether there are any would wait for the device.
                if dense or bool(unusable.any()):
                    images, known = images.masked_fill(unusable[:, None], 0), known + nothing
            usable = None if mask is None else mask[:, chunk]
            if isinstance(queries, SparseQueries):
                state = state or PosteriorState.empty(batch_size, dimension, noisy.device)
                queries.add(state, images, known, usable)
            else:
                read = as_multiplied(images, arithmetic)
                logits = queries.logits(read, known)
                if usable is not None:
                    logits = logits.masked_fill_(~usable, -torch.inf)
                part = queries.state(logits, read)
                state = part if state is None else state.merge(part)
    return state or PosteriorState.empty(batch_size, dimension, noisy.device)


def _chunk_size(dimension: int, batch_size: int, arithmetic: Arithmetic, dtype: torch.dtype, dense: bool) -> int:
    """How many references are handled at a time."""
    if dense:
        elements = DENSE_CHUNK_ELEMENTS
    else:
        elements = _CHUNK_ELEMENTS[arithmetic]
        batch_size *= 4  # of 8-byte logits and of what they are made of
    return max(1, elements // max(dimension, batch_size, 1))


def state_with_mirrors(
    noisy: Tensor,
    reference: ReferenceRows,
    alpha: Tensor,
    sigma: Tensor,
    mirrors: bool,
    *,
    mask: Tensor | None = None,
    norms: Tensor | None = None,
) -> PosteriorState:
    """The `posterior_state` of references and, if they are asked for, their mirrors; noisy (B, ..., W)."""
    if not mirrors:
        return posterior_state(noisy.flatten(1), reference, alpha, sigma, norms=norms, mask=mask)
    # A mirrored image against x_t is the image against the mirrored x_t: one pass over the images serves both.
    both = torch.cat([noisy, noisy.flip(-1)]).flatten(1)
    mask = None if mask is None else mask.repeat(2, 1)
    state = posterior_state(both, reference, alpha.repeat(2), sigma.repeat(2), norms=norms, mask=mask)
    plain, mirrored = state[: len(noisy)], state[len(noisy) :]
    mirrored.weighted_sum = mirrored.weighted_sum.view(noisy.shape).flip(-1).flatten(1)
    return plain.merge(mirrored)


def check_noisy(noisy: Any) -> None:
    """Raise TypeError or ValueError unless `noisy` is a floating-point tensor (B, ...)."""
    check_batch("noisy", noisy, "(B, ...)")
    if not noisy.is_floating_point():
        raise TypeError(
            f"noisy must be floating point; got {noisy.dtype}. Scale images to [-1, 1] before adding noise."
        )


def coefficient_rows(alpha: Tensor | float, sigma: Tensor | float, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """`alpha` and `sigma` as float64 (B,) vectors on the device of `noisy`.

    Raises:
        TypeError: no number or numbers.
        ValueError: another shape or, on the CPU, a sigma that is not positive (elsewhere checking would wait).
    """
    rows = []
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        try:
            if isinstance(value, float | int):  # sending a number would wait for the device
                vector = torch.full((), value, dtype=torch.float64, device=noisy.device)
            else:
                vector = torch.as_tensor(value, dtype=torch.float64, device=noisy.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a number or a tensor ({len(noisy)},); got {type(value).__name__}."
            ) from error
        if vector.ndim == 0:
            vector = vector.expand(noisy.shape[0])
        if vector.shape != noisy.shape[:1]:
            raise ValueError(
                f"{name} must have one value per row, shape ({noisy.shape[0]},); got {tuple(vector.shape)}. "
                "Pass the (B,) vector itself, not one expanded over the pixels."
            )
        rows.append(vector)
    if noisy.device.type == "cpu" and not bool((rows[1] > 0).all()):
        raise ValueError(
            f"sigma must be positive; got {rows[1].min().item()}. At sigma = 0 the posterior is x_t itself."
        )
    return rows[0], rows[1]


def _check_arithmetic(arithmetic: str | None, dtype: torch.dtype, dimension: int, device_type: str) -> None:
    if arithmetic not in (None, "int8", "float32", "float64"):
        raise ValueError(f"arithmetic must be 'int8', 'float32', 'float64' or None; got {arithmetic!r}.")
    if arithmetic == "int8" and (dtype == torch.float64 or (device_type == "cpu" and dtype != torch.uint8)):
        raise TypeError(
            f"arithmetic='int8' is for uint8 references, and on accelerators for others but float64; got {dtype} and noisy "
            f"images on {device_type}. Leave it out."
        )
    if arithmetic == "float32" and (device_type != "cpu" or dtype == torch.float64):
        raise ValueError(
            f"arithmetic='float32' is for CPUs, and for references that are not float64; got {dtype} and noisy images on "
            f"{device_type}. Leave it out."
        )
    if arithmetic == "int8" and dimension not in TERMS:
        raise ValueError(
            f"arithmetic='int8' takes images of {TERMS.start} to {TERMS.stop - 1} values; got {dimension}. Leave it out."
        )


def _check_mask(mask: Tensor, batch_size: int, n: int) -> None:
    check_tensor("mask", mask, "(B, n)")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}. Compare to make one, for instance `weights > 0`.")
    if mask.shape != (batch_size, n):
        raise ValueError(f"mask must be (B, n) = ({batch_size}, {n}); got {tuple(mask.shape)}.")


@torch.no_grad()
def posterior_mean(
    noisy: Tensor,
    reference: Tensor,
    *,
    alpha: Tensor | float,
    sigma: Tensor | float,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    arithmetic: Arithmetic | None = None,
) -> PosteriorMean:
    """Posterior mean of x0 given ``x_t = alpha x0 + sigma noise`` over a set of references.

    Xu, Tong & Jaakkola 2023 (arXiv 2302.00670), eq. 5. When the set contains the source of each row and is otherwise
    exchangeable with it, the result is an exactly unbiased estimate of E[x0 | x_t] (Bertrand et al. 2025,
    arXiv 2506.03719, Prop. 2). The mean is within 1e-5 of float64 arithmetic throughout.

    Args:
        noisy: (B, ...) floating point, the noised images x_t. Any shape after the first dimension.
        reference: (n, ...) images of the same shape; floating point in the data's range, or uint8 pixels, read as
            ``x / 127.5 - 1``. May lie on another device than `noisy`: chunks are moved.
        alpha, sigma: (B,) or a number; the process's coefficients at each row's time. `sigma` is positive.
        mask: (B, n) bool, which references a row may use. Default: all.
        chunk_size: references handled at a time. Default: few enough that a chunk's temporaries stay under about 200 MiB;
            those of the batch are up to 50 bytes for each of its values.
        arithmetic: how the two products are computed. "float64"; "int8": exact products of queries and weights, as
            integers of 8-bit digits, with pixels or, on accelerators, with floating point references as such integers;
            "float32", on CPUs: float32 products, and in float64 what their errors could decide. Default: on CPUs "int8" for
            pixels where there are fast instructions for it, else "float32"; on CUDA devices the fastest, which is measured
            at the first call (or `STF_DIFFUSERS_ARITHMETIC` in the environment); for float64 references "float64".

    Returns:
        mean (B, ...) in float32 (float64 when `noisy` and `reference` both are), and effective_sample_size (B,),
        between 1 and n. Rows that may use a reference that is not finite are NaN.

    Raises:
        TypeError: not a tensor, a dtype that is neither floating point nor (for `reference`) uint8, or a
            mask that is not bool; or "int8" for references of float64 or, on the CPU, that are not uint8.
        ValueError: shapes that do not fit, an empty reference set, or, on the CPU, a sigma that is not positive or a
            row whose mask leaves nothing (elsewhere those rows are NaN: checking would wait for the device).
    """
    check_noisy(noisy)
    check_tensor("reference", reference, "(n, ...)")
    if reference.ndim == 0 or reference.shape[1:] != noisy.shape[1:]:
        raise ValueError(
            f"noisy (B, ...) and reference (n, ...) must agree after the first dimension; got {tuple(noisy.shape)} and "
            f"{tuple(reference.shape)}. Crop or resize the references as the sources were."
        )
    n = reference.shape[0]
    if n == 0 or noisy.shape[0] == 0:
        raise ValueError(
            f"noisy and reference must not be empty; got {noisy.shape[0]} and {n} rows. The sources alone as references "
            "give the DSM target."
        )
    if mask is not None:
        _check_mask(mask, noisy.shape[0], n)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}. Leave it out to have it chosen.")
    if reference.dtype != torch.uint8:
        pixels_to_float(reference[:0])
    _check_arithmetic(arithmetic, reference.dtype, noisy[0].numel(), noisy.device.type)
    alpha, sigma = coefficient_rows(alpha, sigma, noisy)
    if mask is not None and noisy.device.type == "cpu" and not bool(mask.any(1).all()):
        rows = (~mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"mask leaves no reference for rows {rows}; every row may at least use its own source.")
    state = posterior_state(
        noisy.flatten(1), reference, alpha, sigma, mask=mask, chunk_size=chunk_size, arithmetic=arithmetic
    )
    return state.result_like(noisy, reference.dtype)
