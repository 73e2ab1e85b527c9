"""The parts of a training script work on the CPU whatever the default device is; the meta device stands for a GPU."""

import copy
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from exact_networks import small_unet
from stf_diffusers import EDM, VE, VP, FlowMatching, ReferenceBank, STFPipeline, network_denoiser
from stf_diffusers.export import diffusers_pipeline, process_from_config, process_of, read_metadata, save_pipeline
from stf_diffusers.quality import sample_quality
from stf_diffusers.sde import sample_ancestral, sample_predictor_corrector
from stf_diffusers.training.autoencoder import LatentScale, check_fit, fold_normalization
from stf_diffusers.training.averages import ExponentialAverage, PostHocAverages, reconstruct, snapshots_of
from stf_diffusers.training.conditioning import Conditioning
from stf_diffusers.training.device_images import DeviceImages
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.latents import load_latents
from stf_diffusers.training.noise_process import choose_process
from stf_diffusers.training.references import choose_references
from stf_diffusers.training.sampling import sample_grid, seeded_generator
from stf_diffusers.training.streaming import open_stream
from tiny import tiny_autoencoder

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

UNET, VAE, CPU = small_unet(3, 8), tiny_autoencoder(), torch.device("cpu")
NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PICTURES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
DATA = datasets.Dataset.from_dict(
    {"image": [Image.fromarray(picture) for picture in PICTURES], "label": [0, 1, 2] * 4}, features=FEATURES
)
STREAM = DATA.to_iterable_dataset()
DDPM = DDPMScheduler()
DDPM.register_to_config(_class_name="DDPMScheduler")
PROCESSES = {"edm": EDM(), "ve": VE(), "vp": VP(), "flow": FlowMatching()}


@pytest.fixture(autouse=True)
def other_default_device(fresh_accelerate_state: None) -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def on_cpu(batch):
    return {part.device.type for part in batch.values() if torch.is_tensor(part)} == {"cpu"}


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_images_and_their_references(memory, tmp_path):
    found = open_images(DATA, class_conditional=True, image_memory_gb=memory, cache_dir=str(tmp_path))
    assert 0.4 < found.standard_deviation < 0.7
    references = choose_references(found, 2, reference_batch_size=6)
    batch = next(found.batches_from(0, references.sampler))
    if found.in_memory is not None:
        gathered = next(DeviceImages(found.in_memory, found.labels).batches_from(0, references.sampler))
        assert on_cpu(gathered) and gathered["index"].equal(batch["index"])
    assert on_cpu(batch) and np.array_equal(batch["images"][0].permute(1, 2, 0), PICTURES[batch["index"][0]])
    assert batch["reference_labels"].tolist()[:2] == [int(index) % 3 for index in batch["index"]]


def test_a_bank_of_the_images(tmp_path):
    found = open_images(DATA, class_conditional=True, image_memory_gb=1.0, cache_dir=str(tmp_path))
    references = choose_references(found, 2, reference="bank", bank_file=tmp_path / "bank.safetensors")
    batch = next(found.batches_from(0, references.sampler))
    assert on_cpu(
        {name: value for name, value in references.of(batch, batch["labels"]).items() if torch.is_tensor(value)}
    )
    bank = ReferenceBank.from_dataset(DATA, path=tmp_path / "other.safetensors", quiet=True)
    assert bank.posterior_mean(NOISE, 1.0, 2.0).mean.isfinite().all()


def test_a_stream():
    stream = open_stream(STREAM, batch_size=2, buffer_size=6, class_conditional=True)
    assert 0.4 < stream.standard_deviation < 0.7
    batch = next(stream.batches_from(0))
    assert on_cpu(batch) and batch["images"].equal(batch["reference_images"][:2])


@pytest.mark.parametrize("sample", [True, False])
def test_latents(sample, tmp_path):
    images = open_images(DATA, image_memory_gb=1.0, cache_dir=str(tmp_path))
    assert check_fit(VAE, images.__getitems__([0])["images"])[0] == (4, 4, 4)
    column, vae, _ = load_latents(
        images, copy.deepcopy(VAE), tmp_path / "run", sample=sample, mirrored=True, own=False, batch_size=4, device=CPU,
        seed=0, quiet=True,
    )  # fmt: skip
    batch = column.__getitems__([3, 4])
    assert on_cpu(batch) and batch["images"].isfinite().all() and vae.post_quant_conv.weight.isfinite().all()


def test_an_autoencoder_without_convolutions_beside_its_latents():
    vae = copy.deepcopy(VAE)
    vae.quant_conv = vae.post_quant_conv = None
    folded = fold_normalization(vae, LatentScale((1.0,) * 4, (2.0,) * 4))
    assert folded.post_quant_conv.weight.flatten(1).equal(2 * torch.eye(4, device="cpu"))


def test_averages(tmp_path):
    pytest.importorskip("ema_pytorch")
    network = copy.deepcopy(UNET)
    averages = [ExponentialAverage(network), PostHocAverages(network)]
    for step in (1, 2, 3):
        for average in averages:
            average.step()
            average.save(tmp_path, tmp_path, step)
    weights = reconstruct(snapshots_of(tmp_path), 0.1)
    assert all(torch.allclose(weights[name], value, atol=1e-5) for name, value in network.state_dict().items())


def test_conditions():
    conditioning = Conditioning(3, 0.5, 0.5, False)
    draws = conditioning.draw(torch.tensor([0, 1, 2], device="cpu"), 3, seeded_generator(CPU, 0))
    assert {part.device.type for part in draws} == {"cpu"}
    draws = Conditioning(None, 0.0, 0.5, False).draw(None, 3, seeded_generator(CPU, 0))
    assert draws[0].device.type == draws[2].device.type == "cpu"


@pytest.mark.parametrize("name", PROCESSES)
def test_saved_pipelines(name, tmp_path):
    pipeline = diffusers_pipeline(UNET, PROCESSES[name], metadata={"num_classes": None})
    assert process_of(pipeline.scheduler, UNET) == PROCESSES[name]
    save_pipeline(pipeline, tmp_path)
    with torch.device("cpu"):  # Diffusers makes schedulers' tables on the default device
        loaded = STFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(1, 2, output_type="pt", generator=torch.Generator("cpu").manual_seed(0)).images.isfinite().all()
    assert np.asarray(sample_grid(pipeline, 2, seed=0, batch_size=2, num_inference_steps=2)).any()


SEEDED = (torch.Generator("cpu").manual_seed(0), [torch.Generator("cpu").manual_seed(k) for k in range(2)])


@pytest.mark.parametrize("generator", SEEDED, ids=["one", "several"])
def test_reverse_sdes(generator):
    for process in (EDM(), VE(), VP()):
        denoise = network_denoiser(UNET, process)
        assert sample_ancestral(denoise, NOISE, num_steps=3, process=process, generator=generator).isfinite().all()
    assert sample_predictor_corrector(denoise, NOISE, num_steps=3, generator=generator).isfinite().all()


def test_quality():
    left, right = NOISE.flatten(1).repeat(10, 1), NOISE.flatten(1).repeat(10, 1) + 1
    left = left + 0.1 * torch.randn(left.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    stamp = {"extractor": "x", "reference": "x", "sampler": "x", "seeds": "x"}
    assert sample_quality(left, right, **stamp).frechet_distance > 0


@pytest.mark.parametrize("saved", [None, {"process": {"name": "discrete", "scheduler": dict(DDPM.config)}}])
def test_discrete_schedules(saved, tmp_path):
    process, _ = choose_process("discrete", {}, standard_deviation=lambda: 0.5, saved=saved)
    pipeline = diffusers_pipeline(UNET, process, metadata={})
    assert process_of(pipeline.scheduler, UNET).alpha(torch.tensor([3.0], device="cpu")).isfinite().all()
    save_pipeline(pipeline, tmp_path)
    assert read_metadata(tmp_path)["process"]["scheduler"]["_class_name"] == "DDPMScheduler"
    DDPMPipeline(UNET, DDPM).save_pretrained(tmp_path)
    assert process_from_config(read_metadata(tmp_path)["process"]).sigma(torch.tensor([3.0], device="cpu")) > 0
