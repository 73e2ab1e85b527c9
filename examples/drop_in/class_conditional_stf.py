"""Train a class-conditional UNet2DModel on EDMEulerScheduler's noise, and save it as a ConsistencyModelPipeline.

The one pipeline of Diffusers that takes labels and preconditions; pass it num_inference_steps, since its default is one.
Labels are dropped now and then, in favour of a class number num_classes, for guidance. Without flags it trains on
scikit-learn's digits; `accelerate launch` runs it on several devices.
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
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from PIL import Image
from stf_diffusers import ReferenceBank, SchedulerProcess, STFTrainingObjective
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a class-conditional diffusion model of images.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, or a folder that Datasets can load.")
    parser.add_argument("--train_data_dir", help="A folder of images, one folder in it for each class.")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--output_dir", default="class_conditional")
    parser.add_argument("--label_dropout", type=float, default=0.1)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(dataset_name: str | None, train_data_dir: str | None) -> datasets.Dataset:
    """The images with their labels; scikit-learn's digits if neither is given."""
    if dataset_name is None and train_data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        images = [Image.fromarray(image) for image in pixels]
        return datasets.Dataset.from_dict({"image": images, "label": digits.target})
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

    split = load_images(args.dataset_name, args.train_data_dir)
    if "label" not in split.column_names:
        raise ValueError(f"No column of {split.column_names} is 'label'. Rename the one that holds the classes.")
    channels = 1 if split[0]["image"].mode in ("1", "L") else 3
    pixels = torch.stack([to_pixels(image, args.resolution, channels) for image in split["image"]])
    classes = torch.tensor(split["label"][:])
    num_classes = int(classes.max()) + 1
    loader = DataLoader(TensorDataset(pixels, classes), batch_size=args.train_batch_size, shuffle=True)

    noise_scheduler = EDMEulerScheduler()
    objective = STFTrainingObjective(SchedulerProcess(noise_scheduler), prediction_type="sample")
    bank = ReferenceBank(pixels, classes)
    model = UNet2DModel(
        sample_size=args.resolution,
        in_channels=pixels.shape[1],
        out_channels=pixels.shape[1],
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes + 1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    batches = islice(chain.from_iterable(repeat(loader)), args.max_train_steps)
    progress = tqdm(batches, total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    for images, labels in progress:
        clean = images / 127.5 - 1
        noise = torch.randn_like(clean)
        steps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(clean),))
        timesteps = noise_scheduler.timesteps[steps].to(clean.device)
        sigmas = noise_scheduler.sigmas[steps].to(clean.device).view(-1, 1, 1, 1)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        dropped = torch.rand(len(labels), device=labels.device) < args.label_dropout

        target = objective.target(clean, noise, timesteps, reference=bank, labels=labels.masked_fill(dropped, -1))

        model_input = noise_scheduler.precondition_inputs(noisy, sigmas)
        output = model(model_input, timesteps, class_labels=labels.masked_fill(dropped, num_classes)).sample
        denoised = noise_scheduler.precondition_outputs(noisy, output, sigmas)
        # Karras et al. 2022, Table 1: lambda(sigma)
        weights = (sigmas**2 + noise_scheduler.config.sigma_data**2) / (sigmas * noise_scheduler.config.sigma_data) ** 2
        loss = (weights * F.mse_loss(denoised.float(), target.float(), reduction="none")).mean()

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ConsistencyModelPipeline(accelerator.unwrap_model(model), noise_scheduler).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
