"""Noise levels drawn where the network is wrong.

With all data as references the target is the exact optimum, so the loss at a noise level has no floor: it is the network's
own error there. With fewer references, or none, the known variance of the target is the floor that is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .forward_process import NoiseProcess
from .noise_distribution import NoiseDistribution

# Error per dimension of the network's output, whose target has a variance of about 1, that is none.
_NO_ERROR = 1e-4
# Rows of average error that a piece starts with, against the chance of its first few.
_PSEUDO_ROWS = 16
# Probability of the prior beyond the outermost pieces but one, on either side.
_TAIL = 1e-3


class AdaptiveNoise(NoiseDistribution):
    """A prior distribution of noise levels times a power of the network's error there, mixed with the prior.

    The range of ln(sigma / alpha) is cut into pieces. A piece of probability p under the prior and of mean error e is drawn
    with ``q = floor p + (1 - floor) p e^power / sum of p e^power``, and levels within a piece as the prior draws them. The
    error of a piece is a mean over about its last `memory` rows: `update` after each step. Without any error, and before the
    first update, the distribution is the prior.

    ``q / p`` is at least `floor`. With the weights of `importance_weights` in the loss, the expected gradient is that of the
    prior; without them the objective moves to where the error is. The variance of a weighted sum is smallest for a power of
    0.5, where the squared gradient of a row is in proportion to its error.

    Tables are kept on `device`. `sample`, `importance_weights` and `update` do not wait for it.

    Args:
        process: the process that is trained.
        prior: None: the process's own distribution (`level_distribution`).
        power: of the error, 0 (the prior) to 2.
        floor: share of the prior, above 0 and at most 1.
        num_pieces: number of pieces, at least 2; with discrete timesteps at most as many.
        memory: rows of a piece over which its error is averaged.
        device: where levels are used.

    Raises:
        ValueError: a parameter out of its range, a prior of which next to nothing lies in the process's range, or fewer than 3
            timesteps.
        TypeError: the process does not say what levels it draws, and there is no other prior.
    """

    def __init__(
        self,
        process: NoiseProcess,
        prior: NoiseDistribution | None = None,
        *,
        power: float = 0.5,
        floor: float = 0.25,
        num_pieces: int = 32,
        memory: int = 512,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, fits, needed in (
            ("power", power, 0 <= power <= 2, "lie between 0 and 2"),
            ("floor", floor, 0 < floor <= 1, "be above 0 and at most 1"),
            ("num_pieces", num_pieces, num_pieces >= 2, "be at least 2"),
            ("memory", memory, memory >= 1, "be at least 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must {needed}; got {value}.")
        self.prior, self.prior_is_own = (process.level_distribution(), True) if prior is None else (prior, False)
        self.power, self.floor, self.memory = power, floor, memory
        cells = process.level_cells()
        if cells is not None and len(cells) < 4:
            raise ValueError(
                f"the process has {len(cells) - 1} timesteps; levels can be adapted where there are 3 or more."
            )
        low, high = process.training_range()
        self._range = (low, high)
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu").log()
        below, above = self.prior.cdf(ends).tolist()
        if not above - below > 1e-3:
            raise ValueError(
                f"{self.prior} has {above - below:.2g} of its probability at the noise levels {low:g} to {high:g}, at which "
                "the process is trained. Choose another."
            )
        inner = below + (above - below) * torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64, device="cpu")
        first, last = self.prior.quantile(inner).tolist()
        edges = torch.linspace(first, last, num_pieces - 1, dtype=torch.float64, device="cpu")
        if cells is not None:  # a timestep belongs to one piece
            inside = cells[1:-1].log()
            edges = inside[(edges[:, None] - inside).abs().argmin(1)].unique()
        self._edges = torch.cat([ends[:1], edges, ends[1:]]).to(device)
        self._below = self.prior.cdf(self._edges.cpu()).to(device)
        mass = self._below.diff()
        self.prior_weights = mass / mass.sum()
        # Sums of the errors and numbers of rows.
        self._sums = torch.zeros(2, len(mass), dtype=torch.float64, device=device)
        self._floor_levels = self._floor_values = self._sums.new_zeros(0)
        self._set_weights()

    def __repr__(self) -> str:
        prior = "its own" if self.prior_is_own else self.prior
        return f"AdaptiveNoise(prior={prior}, power={self.power}, floor={self.floor})"

    @property
    def edges(self) -> Tensor:
        """(K + 1,) float64 noise levels sigma / alpha between the pieces."""
        return self._edges.exp()

    @property
    def errors(self) -> Tensor:
        """(K,) float64 mean error of each piece, at least 0; NaN where it has not been drawn yet."""
        return (self._sums[0] / self._sums[1]).clamp(min=0)

    def _set_weights(self) -> None:
        errors, rows = self._sums
        average = errors.sum() / rows.sum().clamp(min=1)
        estimate = (errors + _PSEUDO_ROWS * average) / (rows + _PSEUDO_ROWS)
        ahead = self.prior_weights * (estimate.clamp(min=0) + _NO_ERROR) ** self.power
        self.weights = self.floor * self.prior_weights + (1 - self.floor) * ahead / ahead.sum()
        cumulative = torch.cat([self.weights.new_zeros(1), self.weights.cumsum(0)])
        self._cumulative = cumulative / cumulative[-1]

    def _piece(self, log_level: Tensor) -> Tensor:
        inside = self._edges[1:-1].to(log_level.device)
        return torch.searchsorted(inside, log_level.to(torch.float64).contiguous(), right=True)

    # ---- the distribution

    def cdf(self, log_level: Tensor) -> Tensor:
        place = log_level.device
        edges, below, cumulative = (table.to(place) for table in (self._edges, self._below, self._cumulative))
        x = log_level.to(torch.float64).clamp(edges[0], edges[-1])
        piece = self._piece(x)
        share = (self.prior.cdf(x) - below[piece]) / (below[piece + 1] - below[piece]).clamp(min=1e-300)
        return torch.lerp(cumulative[piece], cumulative[piece + 1], share.clamp(0, 1))

    def quantile(self, probability: Tensor) -> Tensor:
        place = probability.device
        edges, below, cumulative = (table.to(place) for table in (self._edges, self._below, self._cumulative))
        p = probability.to(torch.float64).contiguous()
        piece = torch.searchsorted(cumulative[1:-1].contiguous(), p, right=True)
        share = (p - cumulative[piece]) / (cumulative[piece + 1] - cumulative[piece]).clamp(min=1e-300)
        found = self.prior.quantile(torch.lerp(below[piece], below[piece + 1], share.clamp(0, 1)))
        return found.clamp(edges[piece], edges[piece + 1])

    def log_density(self, log_level: Tensor) -> Tensor:
        x = log_level.to(torch.float64)
        gain = (self.weights / self._below.diff().clamp(min=1e-300)).log().to(x.device)
        edges = self._edges.to(x.device)
        log = self.prior.log_density(x) + gain[self._piece(x)]
        return torch.where((x >= edges[0]) & (x <= edges[-1]), log, torch.full_like(log, -math.inf))

    def sample(
        self,
        batch_size: int,
        *,
        low: float = 0.0,
        high: float = math.inf,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        if low > self._range[0] or high < self._range[1]:
            return super().sample(batch_size, low=low, high=high, generator=generator, device=device)
        # Nothing is cut off, so that nothing has to be read from the device.
        source = generator.device if generator is not None else device
        uniform = torch.rand(batch_size, generator=generator, device=source, dtype=torch.float64).to(device or source)
        return self.quantile(uniform.clamp(min=2.0**-54)).exp()

    def importance_weights(self, level: Tensor) -> Tensor:
        """Density of the prior over that of this distribution at noise levels sigma / alpha (B,), of at most 1 / `floor`.

        Weights of the rows of a mean loss that keep its expectation, for levels drawn since the last `update`. In float32.
        """
        ratio = (self.prior_weights / self.weights.clamp(min=1e-300)).to(level.device)
        return ratio[self._piece(level.to(torch.float64).log())].to(torch.float32)

    # ---- the error

    def subtract(self, levels: Sequence[float], variances: Sequence[float]) -> None:
        """Set the error that the optimal network has: the variance of its target, per dimension of the output.

        Args:
            levels: ascending noise levels sigma / alpha. Variances are linear in their logarithm between them, constant beyond.
            variances: of the target at each, as ``output_factor * stf[n].value / dimension`` of `target_variance`; ``dsm``
                without references.

        Raises:
            ValueError: numbers that differ, or levels that do not ascend.
        """
        ascending = all(0 < low < high < math.inf for low, high in pairwise(levels))
        if len(levels) != len(variances) or len(levels) < 2 or not ascending:
            raise ValueError(
                f"levels must ascend, two or more, with a variance for each; got {list(levels)} and {list(variances)}."
            )
        self._floor_levels = self._sums.new_tensor(list(levels)).log()
        self._floor_values = self._sums.new_tensor(list(variances))

    def _known_variance(self, log_level: Tensor) -> Tensor:
        levels, values = self._floor_levels, self._floor_values
        if not len(levels):
            return torch.zeros_like(log_level)
        right = torch.searchsorted(levels, log_level.contiguous()).clamp(1, len(levels) - 1)
        share = (log_level - levels[right - 1]) / (levels[right] - levels[right - 1])
        return torch.lerp(values[right - 1], values[right], share.clamp(0, 1))

    def sums_of(self, level: Tensor, error: Tensor) -> Tensor:
        """(2, K) float64: errors above the known variance, and numbers of rows, by piece. Rows whose error is not finite, as
        in a step that fp16 skips, do not count.

        Args:
            level: (B,) noise levels sigma / alpha.
            error: (B,) squared error of the network's output against its target, mean over the dimensions.
        """
        log_level = level.detach().to(self._sums.device, torch.float64).log()
        excess = error.detach().to(log_level) - self._known_variance(log_level)
        counted = excess.isfinite()
        columns = torch.stack([excess.masked_fill(~counted, 0), counted.to(excess)])
        # A product, whose order of summation is the same each time: that of atomic additions on a GPU is not.
        places = torch.arange(self._sums.shape[1], device=excess.device)
        return columns @ (self._piece(log_level)[:, None] == places).to(excess)

    def take(self, sums: Tensor) -> None:
        """Take in the `sums_of` a step's rows, of all micro-batches and processes together: they must all take the same."""
        keep = (1 - 1 / self.memory) ** sums[1]
        self._sums = keep * self._sums + sums
        self._set_weights()

    def update(self, level: Tensor, error: Tensor) -> None:
        """Take in a batch of one process; arguments as for `sums_of`."""
        self.take(self.sums_of(level, error))

    # ---- saving

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that goes on needs: float64 tensors."""
        return {"sums": self._sums, "floor_levels": self._floor_levels, "floor_values": self._floor_values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Read what `state_dict` returned.

        Raises:
            ValueError: it is of a distribution with other pieces.
        """
        if state["sums"].shape != self._sums.shape:
            raise ValueError(f"the state has {state['sums'].shape[1]} pieces; this distribution {self._sums.shape[1]}.")
        self._sums, self._floor_levels, self._floor_values = (
            state[name].to(self._sums) for name in ("sums", "floor_levels", "floor_values")
        )
        self._set_weights()
