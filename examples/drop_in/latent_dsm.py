"""Train a UNet2DModel on the latents of an AutoencoderKL with DDIMScheduler's noise, and save it as an LDMPipeline.

The encoder runs once over the images; what is trained on is drawn afresh from its posterior each time an image is read.
Without --dataset_name or --train_data_dir it trains on scikit-learn's digits.
"""

import argparse
from collections.abc import Sequence
from itertools import chain, islice, repeat

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a latent diffusion model of images.")
    parser.add_argument("--vae", required=True, help="An AutoencoderKL on the Hub, or its folder.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, or a folder that Datasets can load.")
    parser.add_argument("--train_data_dir", help="A folder of images.")
    parser.add_argument("--resolution", type=int, default=64, help="Resolution of the images, before encoding.")
    parser.add_argument("--output_dir", default="latent")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(dataset_name: str | None, train_data_dir: str | None) -> datasets.Dataset:
    """The training images, in the column "image"; scikit-learn's digits if neither is given."""
    if dataset_name is None and train_data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    dataset = datasets.load_dataset(dataset_name or "imagefolder", data_dir=train_data_dir, split="train")
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"The data set has the columns {dataset.column_names}, none of them images. Pass another one.")
    return dataset if columns[0] == "image" else dataset.rename_column(columns[0], "image")


def to_pixels(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """uint8 (C, R, R): the shorter side resized to R, then the centre."""
    image = image.convert("L" if channels == 1 else "RGB")
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image).reshape(resolution, resolution, channels)).permute(2, 0, 1)


class LatentDraws(Dataset):
    """Draws from the posteriors N(mean, std^2) of the images' latents, scaled; a new draw each time."""

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, pixels: Tensor) -> None:
        posteriors = [vae.encode((part / 127.5 - 1).to(vae.device)).latent_dist for part in pixels.split(32)]
        self.mean = torch.cat([posterior.mean.cpu() for posterior in posteriors]) * vae.config.scaling_factor
        self.std = torch.cat([posterior.std.cpu() for posterior in posteriors]) * vae.config.scaling_factor

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.mean[index] + self.std[index] * torch.randn_like(self.mean[index])}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)

    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).to(accelerator.device)
    if vae.config.shift_factor:
        raise ValueError(f"LDMPipeline does not shift latents; {args.vae} has a shift_factor. Pass another --vae.")
    images = load_images(args.dataset_name, args.train_data_dir)["image"]
    pixels = torch.stack([to_pixels(image, args.resolution, vae.config.in_channels) for image in images])
    dataset = LatentDraws(vae, pixels)
    loader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)

    noise_scheduler = DDIMScheduler(clip_sample=False)
    model = UNet2DModel(
        sample_size=dataset.mean.shape[-1],
        in_channels=dataset.mean.shape[1],
        out_channels=dataset.mean.shape[1],
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    batches = islice(chain.from_iterable(repeat(loader)), args.max_train_steps)
    progress = tqdm(batches, total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    for batch in progress:
        clean = batch["images"]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)

        target = noise

        output = model(noisy, timesteps).sample
        loss = F.mse_loss(output.float(), target.float())

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        LDMPipeline(vae, accelerator.unwrap_model(model), noise_scheduler).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
