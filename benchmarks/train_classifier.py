#!/usr/bin/env python
"""A small ResNet of `transformers`, trained on the labels of a data set: a feature extractor where none can be downloaded.

    python benchmarks/train_classifier.py --output_dir digits-resnet
    python benchmarks/train_classifier.py --dataset_name cifar10 --epochs 30 --output_dir cifar-resnet

Every fifth image is held out, for the accuracy that is printed and saved in accuracy.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from stf_diffusers.training.data_set import find_image_column, find_label_column, load_split
from stf_diffusers.training.image_reader import decode_all, make_reader


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="As for the training script. Default: scikit-learn's digits.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = load_split(args.dataset_name)
    column = find_image_column(dataset)
    label_column = find_label_column(dataset)
    reader = make_reader(dataset, column, "RGB", None, False)
    pixels = decode_all(dataset, column, reader, float("inf"), quiet=True)
    assert pixels is not None  # no budget
    labels = torch.tensor(dataset[label_column])

    # Twice the usual smallest size: the network's stem makes images four times smaller.
    processor = ViTImageProcessor(
        size={"height": 64, "width": 64}, resample=Image.Resampling.BILINEAR, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pictures = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    prepared = torch.from_numpy(
        np.concatenate(
            [
                np.asarray(processor(images=pictures[start : start + 500])["pixel_values"], dtype=np.float16)
                for start in range(0, len(pictures), 500)
            ]
        )
    )
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=int(labels.max()) + 1,  # type: ignore[call-arg]
    )
    network = ResNetForImageClassification(config).to(device)  # type: ignore[arg-type]
    held_out = torch.arange(len(labels)) % 5 == 0
    train = (~held_out).nonzero()[:, 0]
    steps = args.epochs * (len(train) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    network.train()
    for step in tqdm(range(steps), unit="step"):
        if step % (len(train) // 128) == 0:
            order = train[torch.randperm(len(train))]
        rows = order[step % (len(train) // 128) * 128 :][:128]
        logits = network(prepared[rows].to(device, torch.float32)).logits
        loss = functional.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        guesses = [
            network(part.to(device, torch.float32)).logits.argmax(1).cpu() for part in prepared[held_out].split(500)
        ]
    accuracy = float((torch.cat(guesses) == labels[held_out]).double().mean())
    print(f"accuracy on {int(held_out.sum())} held-out images: {accuracy:.4f}")
    network.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    Path(args.output_dir, "accuracy.json").write_text(
        json.dumps({"held_out": int(held_out.sum()), "accuracy": accuracy})
    )


if __name__ == "__main__":
    main()
