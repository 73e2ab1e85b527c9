"""Averages of the weights, against their recursions."""

import pytest
import torch

from exact_networks import small_unet
from stf_diffusers.training.averages import ExponentialAverage, PostHocAverages, reconstruct, snapshots_of


def walk(network, count):
    """The network's weights after each of `count` random steps, in float64."""
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        yield {name: value.double() for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("inv_gamma", "power", "max_decay"), [(1.0, 3 / 4, 0.9999), (4.0, 0.5, 0.9999), (1.0, 3.0, 0.6)]
)
def test_the_exponential_average_follows_its_decay(inv_gamma, power, max_decay):
    network = small_unet()
    average = ExponentialAverage(network, inv_gamma=inv_gamma, power=power, max_decay=max_decay)
    expected = None
    for k, now in enumerate(walk(network, 6)):
        average.step()
        decay = min(max_decay, 1 - (1 + k / inv_gamma) ** -power) if k else 0.0
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in now} if expected else now
        copy = small_unet()
        average.copy_to(copy)
        for name, value in copy.state_dict().items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [ExponentialAverage, PostHocAverages])
def test_what_is_saved_goes_on_as_if_it_had_stayed_in_memory(kind, tmp_path):
    if kind is PostHocAverages:
        pytest.importorskip("ema_pytorch")
    network = small_unet()
    one = kind(network)
    steps = walk(network, 5)
    for _ in range(3):
        next(steps)
        one.step()
    one.save(tmp_path, tmp_path, 3)
    two = kind(network)
    two.load(tmp_path)
    next(steps)
    for name, average in (("one", one), ("two", two)):
        average.step()
        (tmp_path / name).mkdir()
        average.save(tmp_path / name, tmp_path / name, 4)
    (left,) = (tmp_path / "one").glob("*.safetensors")
    assert left.read_bytes() == (tmp_path / "two" / left.name).read_bytes()


def test_a_kept_width_is_reconstructed_as_the_average_that_was_kept(tmp_path):
    """Equation 127 with the weights t^gamma; the average of the first step stands for the initial weights too."""
    optimize = pytest.importorskip("scipy.optimize")
    pytest.importorskip("ema_pytorch")
    network = small_unet()
    averages, path = PostHocAverages(network), []
    for step, now in enumerate(walk(network, 8), start=1):
        averages.step()
        averages.save(tmp_path, tmp_path, step)
        path.append(now)
    snapshots = snapshots_of(tmp_path)
    assert [file.name for file in snapshots] == [f"step-{step:07d}.safetensors" for step in range(1, 9)]
    for width in (0.05, 0.10):
        gamma = optimize.brentq(lambda g, width=width: (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5) - width, 0, 1e3)
        expected = path[0]
        for t, now in enumerate(path[1:], start=3):
            decay = (1 - 1 / t) ** (gamma + 1)
            expected = {name: decay * value + (1 - decay) * now[name] for name, value in expected.items()}
        for name, value in reconstruct(snapshots, width).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"below 0\.288; got 0\.5"):
        reconstruct(snapshots, 0.5)
    with pytest.raises(ValueError, match="there are no snapshots"):
        reconstruct([], 0.1)
