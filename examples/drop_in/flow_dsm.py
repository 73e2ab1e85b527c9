"""Train an SD3Transformer2DModel on captioned images by flow matching, and save it as a StableDiffusion3Pipeline.

The transformer works on pixels, and captions are embedded by `embed_captions`: the pipeline has neither a VAE nor text
encoders, and wants to be told so.

    missing = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = DiffusionPipeline.from_pretrained("flow", **dict.fromkeys(missing))
    prompts, pooled = embed_captions(["a handwritten seven"])
    no_prompts, no_pooled = embed_captions([""])
    pixels = pipe(
        prompt_embeds=prompts,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_prompts,
        negative_pooled_prompt_embeds=no_pooled,
        output_type="latent",
    ).images  # in [-1, 1]

Without flags it trains on scikit-learn's digits; `accelerate launch` runs it on several devices.
"""

import argparse
import zlib
from collections.abc import Sequence
from itertools import chain, islice, repeat

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a flow-matching model of captioned images.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, or a folder that Datasets can load.")
    parser.add_argument("--train_data_dir", help="A folder of images, with their captions in a metadata.jsonl.")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--output_dir", default="flow")
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--shift", type=float, default=3.0, help="Timestep shift of the noise schedule.")
    parser.add_argument("--weighting_scheme", choices=("logit_normal", "sigma_sqrt", "cosmap"), default="logit_normal")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(dataset_name: str | None, train_data_dir: str | None) -> datasets.Dataset:
    """The images with their captions; scikit-learn's digits if neither is given."""
    if dataset_name is None and train_data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        captions = [f"a handwritten {NUMERALS[digit]}" for digit in digits.target]
        return datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], "text": captions})
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


def embed_captions(captions: Sequence[str], length: int = 16, width: int = 32) -> tuple[Tensor, Tensor]:
    """Word embeddings (N, length, width), zero where a caption has ended, and their sums (N, width).

    Stands in for a text encoder: a word's embedding is drawn with the word as the seed, so that it is the same in training
    and in sampling.
    """
    embeddings = torch.zeros(len(captions), length, width)
    for row, caption in zip(embeddings, captions, strict=True):
        for position, word in enumerate(caption.lower().split()[:length]):
            row[position] = torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    return embeddings, embeddings.sum(1)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)

    split = load_images(args.dataset_name, args.train_data_dir)
    if args.caption_column not in split.column_names:
        raise ValueError(f"The data set has the columns {split.column_names}: pass one of them to --caption_column.")
    channels = 1 if split[0]["image"].mode in ("1", "L") else 3
    pixels = torch.stack([to_pixels(image, args.resolution, channels) for image in split["image"]])
    captions = split[args.caption_column][:]
    # Equal captions have equal numbers; the empty caption stands last, where -1 finds it.
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    caption_ids = torch.tensor([numbers[caption] for caption in captions])
    embeddings, pooled = (table.to(accelerator.device) for table in embed_captions([*numbers, ""]))
    loader = DataLoader(TensorDataset(pixels, caption_ids), batch_size=args.train_batch_size, shuffle=True)

    noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    model = SD3Transformer2DModel(
        sample_size=args.resolution,
        in_channels=pixels.shape[1],
        out_channels=pixels.shape[1],
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=embeddings.shape[-1],
        pooled_projection_dim=pooled.shape[-1],
        pos_embed_max_size=args.resolution // 2,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    batches = islice(chain.from_iterable(repeat(loader)), args.max_train_steps)
    progress = tqdm(batches, total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    for images, ids in progress:
        clean = images / 127.5 - 1
        noise = torch.randn_like(clean)
        u = compute_density_for_timestep_sampling(args.weighting_scheme, len(clean), logit_mean=0.0, logit_std=1.0)
        steps = (u * noise_scheduler.config.num_train_timesteps).long()
        timesteps = noise_scheduler.timesteps[steps].to(clean.device)
        sigmas = noise_scheduler.sigmas[steps].to(clean.device).view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * clean + sigmas * noise
        condition = ids.masked_fill(torch.rand(len(ids), device=ids.device) < args.caption_dropout, -1)

        target = noise - clean

        output = model(noisy, embeddings[condition], pooled[condition], timesteps).sample
        weights = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
        loss = (weights * F.mse_loss(output.float(), target.float(), reduction="none")).mean()

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Neither a VAE nor text encoders and tokenizers.
        pipeline = StableDiffusion3Pipeline(accelerator.unwrap_model(model), noise_scheduler, *[None] * 7)
        pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
