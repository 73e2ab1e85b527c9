"""Distributions of the noise level in training: where on ln(sigma / alpha) a process's times are drawn.

One description for every process: levels are comparable between them, times are not.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class NoiseDistribution(ABC):
    """A distribution of the log noise level ``ln(sigma / alpha)`` on the real line.

    Draws are made by the inverse of `cdf`, one uniform number each, so that a range is cut out exactly.
    """

    @abstractmethod
    def cdf(self, log_level: Tensor) -> Tensor:
        """Probability of a level below each of `log_level` (...), in float64; infinite levels allowed."""

    @abstractmethod
    def quantile(self, probability: Tensor) -> Tensor:
        """The log levels at which `cdf` has the values `probability` (...) in [0, 1], in float64."""

    @abstractmethod
    def log_density(self, log_level: Tensor) -> Tensor:
        """ln of the density with respect to ln(sigma / alpha) at `log_level` (...), in float64; -inf where it is 0."""

    def sample(
        self,
        batch_size: int,
        *,
        low: float = 0.0,
        high: float = math.inf,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """(batch_size,) float64 noise levels sigma / alpha between `low` and `high`, drawn where the generator is.

        Raises:
            ValueError: next to nothing of the distribution lies between `low` and `high`.
        """
        source = generator.device if generator is not None else device
        uniform = torch.rand(batch_size, generator=generator, device=source, dtype=torch.float64).to(device or source)
        uniform = uniform.clamp(min=2.0**-54)  # 0 once in 2^53 draws
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu").log()
        below, above = self.cdf(ends).tolist()
        if not above - below > 1e-3:
            raise ValueError(
                f"{self} has {above - below:.2g} of its probability at the noise levels {low:g} to {high:g}, at which the "
                "process is trained. Choose another."
            )
        inside = (below + uniform * (above - below)).clamp(max=math.nextafter(above, 0))
        return self.quantile(inside).exp().clamp(low, high)


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x.to(torch.float64))


@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    """ln(sigma / alpha) is normal: Karras et al. 2022 (arXiv 2206.00364, Table 1) on EDM.

    On `FlowMatching`, sigma / alpha is t / (1 - t), so this is also the logit-normal distribution of t (Esser et al. 2024,
    arXiv 2403.03206, section 3.1).

    Args:
        mean, std: of ln(sigma / alpha).
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean must be finite and std positive; got {self.mean} and {self.std}.")

    def cdf(self, log_level: Tensor) -> Tensor:
        return _normal_cdf((log_level - self.mean) / self.std)

    def quantile(self, probability: Tensor) -> Tensor:
        return self.mean + self.std * torch.special.ndtri(probability.to(torch.float64))

    def log_density(self, log_level: Tensor) -> Tensor:
        z = (log_level.to(torch.float64) - self.mean) / self.std
        return -z.square() / 2 - math.log(self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class LogitNormal(NoiseDistribution):
    """The place of ln(sigma / alpha) between two levels, from 0 to 1, has a normal logit: log-uniform with the ends left out.

    Args:
        low, high: the noise levels sigma / alpha at the ends.
        mean, std: of the logit.
    """

    low: float = 0.002
    high: float = 80.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean must be finite and std positive; got {self.mean} and {self.std}.")

    @property
    def _ends(self) -> tuple[float, float]:
        return math.log(self.low), math.log(self.high)

    def cdf(self, log_level: Tensor) -> Tensor:
        start, end = self._ends
        place = ((log_level.to(torch.float64) - start) / (end - start)).clamp(0, 1)
        return _normal_cdf((torch.logit(place) - self.mean) / self.std)

    def quantile(self, probability: Tensor) -> Tensor:
        start, end = self._ends
        logit = self.mean + self.std * torch.special.ndtri(probability.to(torch.float64))
        return start + (end - start) * torch.sigmoid(logit)

    def log_density(self, log_level: Tensor) -> Tensor:
        start, end = self._ends
        place = (log_level.to(torch.float64) - start) / (end - start)
        inside = (place > 0) & (place < 1)
        place = torch.where(inside, place, torch.full_like(place, 0.5))
        z = (torch.logit(place) - self.mean) / self.std
        log = (
            -z.square() / 2 - math.log(self.std * math.sqrt(2 * math.pi)) - (place * (1 - place) * (end - start)).log()
        )
        return torch.where(inside, log, torch.full_like(log, -math.inf))


@lru_cache(maxsize=32)
def _tables_of(
    levels: tuple[float, ...], weights: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """ln of the levels, weights, and their sums from below; sent once, because a copy waits for the device."""
    edges = torch.tensor(levels, dtype=torch.float64, device=device).log()
    shares = torch.tensor(weights, dtype=torch.float64, device=device)
    below = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
    return edges, shares, below / below[-1]


@dataclass(frozen=True)
class Piecewise(NoiseDistribution):
    """A density that is constant between neighbouring levels.

    Args:
        levels: (K + 1) increasing noise levels sigma / alpha.
        weights: (K) probabilities between them, not negative; divided by their sum.
    """

    levels: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        levels, weights = tuple(map(float, self.levels)), tuple(map(float, self.weights))
        if len(levels) != len(weights) + 1 or not weights:
            raise ValueError(
                f"levels must be one more than weights, and at least two; got {len(levels)} and {len(weights)}."
            )
        if not all(0 < low < high < math.inf for low, high in pairwise(levels)):
            raise ValueError(f"levels must be positive, finite and increasing; got {list(levels)}.")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise ValueError(f"weights must be finite, not negative, and not all 0; got {list(weights)}.")
        total = math.fsum(weights)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "weights", tuple(weight / total for weight in weights))

    def __repr__(self) -> str:
        if len(self.weights) > 8:
            return f"Piecewise({len(self.weights)} pieces from {self.levels[0]:.3g} to {self.levels[-1]:.3g})"
        return f"Piecewise(levels={self.levels}, weights={self.weights})"

    @classmethod
    def log_uniform(cls, low: float, high: float) -> Piecewise:
        """Uniform in ln(sigma / alpha) between two noise levels: the training distribution of Song et al. 2021's VE."""
        _check_range(low, high)
        return cls((low, high), (1.0,))

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _tables_of(self.levels, self.weights, like.device)

    def cdf(self, log_level: Tensor) -> Tensor:
        edges, weights, below = self._tables(log_level)
        x = log_level.to(torch.float64).clamp(edges[0], edges[-1])
        piece = (torch.searchsorted(edges, x, right=True) - 1).clamp(0, len(weights) - 1)
        return below[piece] + weights[piece] * (x - edges[piece]) / (edges[piece + 1] - edges[piece])

    def quantile(self, probability: Tensor) -> Tensor:
        edges, weights, below = self._tables(probability)
        p = probability.to(torch.float64)
        piece = (torch.searchsorted(below, p, right=True) - 1).clamp(0, len(weights) - 1)
        # A piece without weight is passed over, but for the last probabilities that rounding leaves in one.
        share = ((p - below[piece]) / weights[piece].clamp(min=1e-300)).clamp(0, 1)
        return edges[piece] + share * (edges[piece + 1] - edges[piece])

    def log_density(self, log_level: Tensor) -> Tensor:
        edges, weights, _ = self._tables(log_level)
        x = log_level.to(torch.float64)
        piece = (torch.searchsorted(edges, x, right=True) - 1).clamp(0, len(weights) - 1)
        log = (weights[piece] / (edges[piece + 1] - edges[piece])).log()
        return torch.where((x >= edges[0]) & (x <= edges[-1]), log, torch.full_like(log, -math.inf))


def _check_range(low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"the noise levels need 0 < low < high; got {low} and {high}.")


# Distributions by the names that they have on a command line and in saved folders.
NOISE_DISTRIBUTIONS: dict[str, type[Any]] = {
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
    "piecewise": Piecewise,
}


def distribution_to_config(distribution: NoiseDistribution) -> dict[str, Any]:
    """A distribution as a JSON dictionary, ``{"name": "log_normal", "mean": -1.2, "std": 1.2}``.

    Raises:
        TypeError: it is not one of `NOISE_DISTRIBUTIONS`.
    """
    for name, kind in NOISE_DISTRIBUTIONS.items():
        # One that derives from it is another distribution.
        if isinstance(distribution, kind) and type(distribution) is kind:
            return {"name": name, **{key: _as_json(value) for key, value in dataclasses.asdict(distribution).items()}}
    raise TypeError(
        f"only distributions of the kinds {', '.join(NOISE_DISTRIBUTIONS)} can be saved; got {distribution!r}."
    )


def distribution_from_config(config: dict[str, Any]) -> NoiseDistribution:
    """The inverse of `distribution_to_config`.

    Raises:
        ValueError: the name is not in `NOISE_DISTRIBUTIONS`, or the parameters are not those of the distribution.
    """
    if not isinstance(config, dict):
        raise ValueError(f"a noise distribution is saved as a dictionary; got {type(config).__name__}.")
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name not in NOISE_DISTRIBUTIONS:
        raise ValueError(f"the noise distribution {name!r} is not one of {', '.join(NOISE_DISTRIBUTIONS)}.")
    kind = NOISE_DISTRIBUTIONS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if parameters.keys() - set(known) or set(required) - parameters.keys():
        raise ValueError(f"{name} takes {', '.join(known)}; got {', '.join(parameters) or 'none'}.")
    distribution: NoiseDistribution = kind(**parameters)
    return distribution


def _as_json(value: float | Sequence[float]) -> float | list[float]:
    return list(value) if isinstance(value, Sequence) else value
