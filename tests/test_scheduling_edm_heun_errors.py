"""What the Heun scheduler refuses."""

import math

import numpy as np
import pytest
import torch

from stf_diffusers import EDMHeunScheduler


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prediction_type": "sample"}, "prediction_type 'epsilon' or 'v_prediction'; got 'sample'"),
        ({"sigma_schedule": "beta"}, "sigma_schedule 'karras' or 'exponential'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'zero'"),
        ({"sigma_min": 90.0}, "below the largest"),
        ({"sigma_min": 90.0, "sigma_schedule": "exponential"}, "below the largest"),
        ({"sigma_min": 0.0, "sigma_schedule": "exponential"}, "must be positive"),
        ({"sigma_max": math.inf}, "finite"),
        ({"sigma_data": 0.0}, "sigma_data must be positive and finite; got 0.0"),
        ({"sigma_data": math.nan}, "sigma_data must be positive and finite"),
        ({"rho": 0.0}, "rho must be positive and finite"),
        ({"s_noise": math.nan}, "must not be negative"),
        ({"s_churn": -1.0}, "must not be negative"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_min must not be above"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        EDMHeunScheduler(**options)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2.5, 2.0, "2", math.nan])
def test_a_number_of_steps_that_is_not_an_integer(steps, schedule):
    scheduler = EDMHeunScheduler(sigma_schedule=schedule)
    with pytest.raises(TypeError, match=f"number of steps must be an integer; got {steps!r}"):
        scheduler.set_timesteps(steps)
    scheduler.set_timesteps(np.int64(2))
    assert len(scheduler.timesteps) == 3


def test_misuse_is_an_error():
    x, scheduler = torch.zeros(2, 1, 4, 4), EDMHeunScheduler(s_churn=40.0)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="at least one step"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="not an index; got 0"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match=r"timestep 0\.5 is not one of scheduler\.timesteps"):
        scheduler.step(x, 0.5, x)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[seeded(0)])
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=(seeded(0),))
    for begin in (-1, 11):
        with pytest.raises(ValueError, match=r"begin_index must lie in \[0, 11\)"):
            scheduler.set_begin_index(begin)
    for sigmas in (
        [],
        [0.0],
        [1.0, 2.0],
        [2.0, 2.0],
        [2.0, 0.0, 0.0],
        [2.0, -1.0],
        [math.inf, 1.0],
        [math.nan],
        [[2.0, 1.0]],
    ):
        with pytest.raises(ValueError, match="sigmas must be noise levels that fall"):
            scheduler.set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="exclude each other"):
        scheduler.set_timesteps(2, sigmas=[2.0, 1.0])
    scheduler.set_timesteps(1)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="sampling has ended"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("timesteps", [[3], [999], [1000]])
def test_add_noise_takes_no_index(timesteps):
    scheduler, x = EDMHeunScheduler(), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=f"not an index; got .{timesteps[0]}"):
        scheduler.add_noise(x, x, torch.tensor(timesteps))


@pytest.mark.parametrize("timestep", [3.0, 500.0, 1000.0, -9.0, -1000.0, math.nan])
def test_add_noise_takes_no_other_number(timestep):
    scheduler, x = EDMHeunScheduler(), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"timesteps are ln\(sigma\) / 4, of sigma from 0.002 to 80"):
        scheduler.add_noise(x, x, torch.tensor([0.0, timestep]))
