"""Held-out errors against float64 oracles; memorization is seen where it is, and not where it is not."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from exact_networks import PROCESSES, ExactNetwork, denoise_gaussian, denoise_points
from oracles import normal
from stf_diffusers import EDM, VE, ReferenceBank, SchedulerProcess
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.noise_distribution import LogNormal
from stf_diffusers.training.conditioning import Conditioning
from stf_diffusers.training.data_set import load_digits_dataset
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.references import References
from stf_diffusers.training.validation import Validation, bank_for, compare, open_held_out, validation_times

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
EXACT = PROCESSES["edm"]


@pytest.fixture(scope="module")
def images():
    return open_images(load_digits_dataset().select(range(300)), class_conditional=True, quiet=True)


@pytest.fixture(scope="module")
def held_out():
    return open_images(load_digits_dataset().select(range(300, 420)), class_conditional=True, quiet=True)


def unlabelled(images):
    return open_images(images.dataset, quiet=True)


def pixels(images):
    return images.in_memory.double() / 127.5 - 1


def validate(network, held_out, images, folder, *, process=EXACT, bank=None, classes=None, **more):
    bank = bank or ReferenceBank(images.in_memory, images.labels)
    settings = {"validation_steps": 1, "conditioning": Conditioning(classes), "output_dir": folder, **more}
    validation = Validation(Accelerator(), held_out, images, bank, process, **settings)
    pipeline = SimpleNamespace(unet=network, to=lambda device: pipeline)
    validation(pipeline, 1)
    return json.loads((folder / "validation.json").read_text())[-1], validation


def output_factor(level):
    """What a squared error of x0 is in units of EDM's raw output."""
    return (level**2 + 0.36) / (level * 0.6) ** 2


# ---- errors


@pytest.mark.parametrize("mirrored", [False, True])
def test_errors_of_a_network_that_knows_the_training_images(mirrored, images, held_out, tmp_path):
    """Its error is 0 on them; on the others it is that between posterior means without and with the own image."""
    images, held_out = unlabelled(images), unlabelled(held_out)
    points = pixels(images)
    points = torch.cat([points, points.flip(-1)]) if mirrored else points
    bank = ReferenceBank(images.in_memory, augmentation="horizontal_flip" if mirrored else "none")
    found, validation = validate(ExactNetwork("edm", points), held_out, images, tmp_path, bank=bank)
    assert found["num_images"] == 120 and max(found["training_error"]["by_level"]) < 1e-8
    own = pixels(held_out)
    for k, level in enumerate(validation.noise_levels):
        noisy = own + level * normal(*own.shape, seed=k)
        ours = denoise_points(points, noisy, level)
        errors, dsm = [], []
        for row in range(120):
            joined = [own[row : row + 1]] + ([own[row : row + 1].flip(-1)] if mirrored else [])
            exact = denoise_points(torch.cat([points, *joined]), noisy[row : row + 1], level)
            errors.append((ours[row] - exact[0]).square().mean() * output_factor(level))
            dsm.append((ours[row] - own[row]).square().mean() * output_factor(level))
        for name, expected in (("held_out_error", errors), ("held_out_dsm_loss", dsm)):
            expected = torch.stack(expected)
            error = (found[name]["standard_errors"][k] ** 2 + float(expected.var()) / 120) ** 0.5
            # Five standard errors: once in 20,000 such comparisons by chance.
            assert abs(found[name]["by_level"][k] - float(expected.mean())) < 5 * error + 1e-9
    # All but the least noise, where the difference is that of images which are all alike; the first time it was seen.
    assert set(found["memorized_levels"]) >= set(validation.noise_levels[:8])


def test_classes(images, held_out, tmp_path):
    """The posterior mean is within the image's class."""

    class Network(torch.nn.Module):
        def forward(self, sample, timestep, class_labels):
            level = float((4 * timestep.double()[0]).exp())
            scale = (level**2 + 0.36) ** -0.5
            x = sample.double() / scale
            means = [
                denoise_points(pixels(images)[images.labels == label], x[row : row + 1], level)[0]
                for row, label in enumerate(class_labels)
            ]
            return SimpleNamespace(sample=((torch.stack(means) - 0.36 * scale**2 * x) / (level * 0.6 * scale)).float())

    found, _ = validate(Network(), held_out, images, tmp_path, classes=10, validation_images=40)
    assert max(found["training_error"]["by_level"]) < 1e-8 < found["held_out_error"]["mean"]


class Gaussian(torch.nn.Module):
    """The denoiser of a normal distribution of some images' mean and covariance: it knows none of them."""

    def __init__(self, images):
        super().__init__()
        flat = pixels(images).flatten(1)
        self.mean, self.covariance = flat.mean(0), torch.cov(flat.T)

    def forward(self, sample, timestep, class_labels=None):
        level = float((4 * timestep.double()[0]).exp())
        scale = (level**2 + 0.36) ** -0.5
        x = sample.double() / scale
        denoised = denoise_gaussian(self.mean, self.covariance, x, level)
        return SimpleNamespace(sample=((denoised - 0.36 * scale**2 * x) / (level * 0.6 * scale)).float())


def test_a_network_that_knows_no_image_is_not_accused(images, held_out, tmp_path):
    """Of the images that neither set has."""
    others = open_images(load_digits_dataset().select(range(420, 1797)), quiet=True)
    shuffled = load_digits_dataset().select(range(420)).shuffle(seed=1)
    images, held_out = (open_images(shuffled.select(rows), quiet=True) for rows in (range(300), range(300, 420)))
    network = Gaussian(others)
    for seed in range(5):  # by chance once in 200 such tests
        found, _ = validate(network, held_out, images, tmp_path, seed=seed)
        assert found["memorized_levels"] == []
        # The error has the variance of the network's error alone; the DSM loss that of the posterior too.
        assert found["held_out_error"]["by_level"][-1] < 0.5 * found["held_out_dsm_loss"]["by_level"][-1]


def test_false_alarms_are_as_rare_as_said():
    draws = torch.Generator().manual_seed(0)
    shape = (2, 64, 12)
    alarms = [any(compare(*torch.randn(shape, generator=draws), torch.zeros(64, 12))["larger"]) for _ in range(3000)]
    # 3 expected; more than 12 by chance once in 50,000.
    assert sum(alarms) <= 12
    worse = torch.randn(shape, generator=draws)
    worse[0, :, 4] += 2
    assert compare(*worse, torch.zeros(64, 12))["larger"] == [k == 4 for k in range(12)]


def test_batches_do_not_matter(images, held_out, tmp_path):
    network = ExactNetwork("edm", pixels(images))
    images, held_out = unlabelled(images), unlabelled(held_out)
    one, other = (validate(network, held_out, images, tmp_path, batch_size=size)[0] for size in (7, 64))
    for name in ("held_out_error", "held_out_dsm_loss"):
        assert one[name]["by_level"] == pytest.approx(other[name]["by_level"], rel=1e-4)


# ---- noise levels


def test_levels_are_quantiles_of_those_drawn():
    times = validation_times(EDM(), None)
    middles = (torch.arange(12) + 0.5) / 12
    assert EDM().sigma(times).log().tolist() == pytest.approx(stats.norm.ppf(middles, -1.2, 1.2), abs=1e-4)
    times = validation_times(EDM(), LogNormal(1.0, 0.5))
    assert EDM().sigma(times).log().tolist() == pytest.approx(stats.norm.ppf(middles, 1.0, 0.5), abs=1e-4)
    logs = VE().sigma(validation_times(VE(), None)).log()
    assert torch.allclose(logs.diff(), logs.diff()[0], rtol=1e-3)
    adaptive = AdaptiveNoise(EDM(), power=2)
    before = validation_times(EDM(), adaptive)
    adaptive.update(torch.full((600,), 5.0), torch.full((600,), 9.0))
    assert validation_times(EDM(), adaptive).equal(before), "of the prior, which stays"


def test_few_timesteps_have_few_levels():
    diffusers = pytest.importorskip("diffusers")
    process = SchedulerProcess(diffusers.DDPMScheduler(num_train_timesteps=5))
    assert validation_times(process, None).tolist() == [0, 1, 2, 3, 4]


def test_pure_noise_has_no_level():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=5, beta_end=0.9, rescale_betas_zero_snr=True)
    assert validation_times(SchedulerProcess(scheduler), None).tolist() == [0, 1, 2, 3]


# ---- when


def test_what_is_due(images, held_out, tmp_path):
    network = Gaussian(images)
    _, validation = validate(network, held_out, images, tmp_path, validation_steps=3, classes=10, validation_images=32)
    assert [step for step in range(9) if validation.due(step, max_steps=8)] == [3, 6, 8]
    records = [{"step": 3}, {"step": 6}, {"step": 8}]
    (tmp_path / "validation.json").write_text(json.dumps(records))
    _, resumed = validate(network, held_out, images, tmp_path, validation_steps=3, classes=10, first_step=6)
    assert [record["step"] for record in resumed.records] == [3, 6, 1], "what came after the checkpoint comes again"


# ---- wrong


def test_too_few_images(images, held_out, tmp_path):
    few = open_images(held_out.dataset.select(range(31)), quiet=True)
    with pytest.raises(ValueError, match="31 images are too few"):
        validate(None, few, unlabelled(images), tmp_path)


def test_training_images_are_no_held_out_images(images, held_out, tmp_path, caplog):
    with pytest.raises(ValueError, match="of validation_split= are training images"):
        validate(None, images, images, tmp_path)
    some = open_images(load_digits_dataset().select([*range(10), *range(300, 340)]), quiet=True)
    validate(Gaussian(images), some, unlabelled(images), tmp_path)
    assert "10 of 50 images of the validation split are training images too" in caplog.text


@pytest.mark.parametrize(
    ("split", "reading", "said"),
    [
        ("test", {}, r"validation_split='test': the data set has no 'test' split"),
        ("train[:50]", {"image_mode": "RGB"}, r"has images of \(3, 12, 12\), the training images are of \(1, 12, 12\)"),
        ("train[:50]", {"resolution": 8}, r"has images of \(1, 8, 8\)"),
    ],
)
def test_splits_that_do_not_fit(split, reading, said, images):
    with pytest.raises(ValueError, match=said):
        open_held_out(split, unlabelled(images), **reading)


def test_a_class_that_the_training_images_lack(images):
    few = open_images(load_digits_dataset().select([0, 1, 2, 10, 11, 12]), class_conditional=True, quiet=True)
    with pytest.raises(ValueError, match=r"no training image is of class \[3, 4, 5, 6, 7, 8, 9\]"):
        open_held_out("train[:50]", few, class_conditional=True)


def test_a_bank_that_is_too_large(images):
    references = References("none", 1, None)
    with pytest.raises(ValueError, match="reference_memory_gb=1e-06"):
        bank_for(images, references, reference_memory_gb=1e-6, mirrored=False, device="cpu")
    made = bank_for(images, references, reference_memory_gb=1, mirrored=True, device="cpu")
    assert (len(made), made.num_references, sorted(made.class_rows)) == (300, 600, list(range(10)))
