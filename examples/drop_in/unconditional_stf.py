"""Train an unconditional UNet2DModel on DDPMScheduler's noise, and save it as a DDPMPipeline.

Without flags it trains on scikit-learn's digits; `accelerate launch` runs it on several devices.
"""

import argparse
from collections.abc import Sequence
from itertools import chain, islice, repeat
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from PIL import Image
from stf_diffusers import ReferenceBatchCollator, ReferenceBatchSampler, STFTrainingObjective
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an unconditional diffusion model of images.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, or a folder that Datasets can load.")
    parser.add_argument("--train_data_dir", help="A folder of images.")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    parser.add_argument("--output_dir", default="unconditional")
    parser.add_argument("--prediction_type", choices=("epsilon", "sample", "v_prediction"), default="epsilon")
    parser.add_argument("--snr_gamma", type=float, help="Weight the loss by min-SNR (Hang et al. 2023), usually 5.")
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)

    images = load_images(args.dataset_name, args.train_data_dir)
    channels = 1 if images[0]["image"].mode in ("1", "L") else 3

    def preprocess(examples: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.stack([to_pixels(image, args.resolution, channels) for image in examples["image"]])
        if args.random_flip:
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        return {"images": pixels / 127.5 - 1}

    dataset = images.with_transform(preprocess)
    sampler = ReferenceBatchSampler(len(dataset), args.train_batch_size, min(1024, len(dataset)), args.seed)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=ReferenceBatchCollator(args.train_batch_size))

    noise_scheduler = DDPMScheduler(prediction_type=args.prediction_type)
    objective = STFTrainingObjective.from_scheduler(noise_scheduler)
    model = UNet2DModel(
        sample_size=args.resolution,
        in_channels=channels,
        out_channels=channels,
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

        target = objective.target(clean, noise, timesteps, reference=batch["reference_images"])

        output = model(noisy, timesteps).sample
        losses = F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        if args.snr_gamma is not None:
            snr = compute_snr(noise_scheduler, timesteps)
            in_this_type = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
            losses = losses * snr.clamp(max=args.snr_gamma) / in_this_type[args.prediction_type]
        loss = losses.mean()

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
