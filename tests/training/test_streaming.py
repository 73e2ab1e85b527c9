"""A stream of images: its law by enumeration, its order, and what is refused."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stf_diffusers import VE, STFTrainingObjective
from stf_diffusers.training.data_set import load_split
from stf_diffusers.training.image_reader import ImageReader
from stf_diffusers.training.streaming import ImageStream, open_stream


def numbered(count, shards=1):
    """`count` grey 2x2 images, all of whose pixels are the image's number; classes of two neighbours."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(count)})
    pictures = [Image.fromarray(np.full((2, 2), index, dtype=np.uint8)) for index in range(count)]
    rows = {"image": pictures, "label": [index // 2 for index in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset(num_shards=shards)


def stream_of(dataset, batch_size, buffer_size, seed=0, rank=0, world=1, label_column="label"):
    return ImageStream(
        dataset, "image", label_column, ImageReader("L", 2, True), batch_size, buffer_size, seed, rank, world
    )


def take(stream, count, position=0):
    return list(itertools.islice(stream.batches_from(position), count))


def test_layout_and_every_image_once_in_a_pass_through_the_buffer():
    batches = take(stream_of(numbered(40), 3, 10), 30)
    seen = []
    for batch in batches:
        assert batch["reference_images"].shape == (10, 1, 2, 2)
        assert torch.equal(batch["images"], batch["reference_images"][:3])
        assert torch.equal(batch["reference_labels"], batch["reference_images"][:, 0, 0, 0].long() // 2)
        assert torch.equal(batch["labels"], batch["reference_labels"][:3])
        assert torch.equal(batch["index"], batch["images"][:, 0, 0, 0].long())
        seen += batch["index"].tolist()
    # What came in either left as a source or is in the buffer still: 10 + 30 * 3 images, the buffer before its last filling.
    came_in = [number % 40 for number in range(10 + 29 * 3)]
    held = batches[-1]["reference_images"][3:, 0, 0, 0].tolist()
    assert sorted(seen + held) == sorted(came_in)


def test_a_source_is_any_image_of_the_buffer_with_the_same_probability():
    """Of a sorted stream too: the rank of the sources in their sets is uniform. Chi-square; fails one time in 10^4."""
    from scipy import stats

    ranks = []
    for seed in range(60):
        for batch in take(stream_of(numbered(60), 2, 6, seed), 20):
            values = batch["reference_images"][:, 0, 0, 0]
            ranks += (values[None] < values[:2, None]).sum(1).tolist()
    counts = np.bincount(ranks, minlength=6)
    assert len(ranks) == 2400 and stats.chisquare(counts).pvalue > 1e-4


def test_the_target_of_a_sorted_stream_is_unbiased_and_a_queue_of_the_past_is_not():
    """By enumeration over every choice of places, for a stream of 5 images that goes round, with a buffer of 3: the mean
    target at x_t is the mean source, weighted by how likely each choice gives x_t."""
    points = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    x_t, sigma, steps = 1.7, 1.1, 4

    def likelihood(source):
        return torch.exp(-((x_t - source) ** 2) / (2 * sigma**2))

    objective = STFTrainingObjective(VE(), prediction_type="sample")

    def posterior_mean(source, references):
        clean, noise = source.reshape(1, 1), ((x_t - source) / sigma).reshape(1, 1)
        target = objective.target(
            clean, noise, torch.tensor([sigma], dtype=torch.float64), reference=references.reshape(-1, 1)
        )
        return target.double().item()

    of_sources, of_targets, total = 0.0, 0.0, 0.0
    for choices in itertools.product(range(3), repeat=steps):
        buffer, coming = [0, 1, 2], itertools.cycle([3, 4, 0, 1, 2])
        for step, place in enumerate(choices):
            source = points[buffer[place]]
            if step == steps - 1:  # the last step of this history
                others = [points[number] for slot, number in enumerate(buffer) if slot != place]
                weight = likelihood(source).item()
                of_sources += weight * source.item()
                of_targets += weight * posterior_mean(source, torch.stack([source, *others]))
                total += weight
            buffer[place] = next(coming)
    # A queue of the two images before, of the same stream read without a buffer: its last source is always image 4.
    naive = posterior_mean(points[4], points[[4, 3, 2]])
    assert abs(of_targets / total - of_sources / total) < 1e-6
    assert abs(naive - points[4].item()) > 0.5


@pytest.mark.parametrize("shards", [1, 4])
def test_entered_anywhere(shards):
    """Skipping is the same as reading, over the end of passes."""
    whole = take(stream_of(numbered(23, shards=shards), 3, 7), 25)
    for position in (1, 2, 9, 24):
        rest = take(stream_of(numbered(23, shards=shards), 3, 7), 25 - position, position)
        for here, there in zip(whole[position:], rest, strict=True):
            assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("shards", [1, 4])
def test_processes_share_the_stream_out(shards):
    parts = [take(stream_of(numbered(24, shards=shards), 3, 6, rank=rank, world=2), 2) for rank in range(2)]
    values = [torch.cat([batch["reference_images"].flatten() for batch in part]).tolist() for part in parts]
    assert not set(values[0]) & set(values[1])


def test_names_of_streamed_classes():
    stream = open_stream(numbered(6), batch_size=1, class_conditional=True)
    assert stream.class_names == [str(number) for number in range(6)]
    assert open_stream(numbered(6), batch_size=1).class_names is None
    text = datasets.Dataset.from_dict({"image": [np.zeros((2, 2), np.uint8)] * 6, "label": list("abcabc")})
    with pytest.raises(ValueError, match=r"column 'label' does not declare its classes .*, or leave streaming= out"):
        open_stream(text.to_iterable_dataset(), batch_size=1, class_conditional=True)


def test_labels_beyond_the_declared_classes_are_named(tmp_path):
    dataset = numbered(6).map(lambda row: {**row, "label": 2 if row["label"] else 0}, features=numbered(6).features)
    stream = ImageStream(dataset, "image", "label", ImageReader("L", 2, True), 1, 2, 0, num_classes=2)
    with pytest.raises(ValueError, match=r"image 2 has the label 2\. Labels are integers from 0, below the 2 classes"):
        take(stream, 5)


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "digits"])
def test_what_can_be_streamed(kind, tmp_path):
    name = None
    if kind != "digits":
        rows = datasets.Dataset.from_list(list(numbered(6)), features=numbered(6).features)
        name = str(tmp_path / ("data.parquet" if kind == "parquet" else "data"))
        rows.to_parquet(name) if kind == "parquet" else rows.save_to_disk(name)
    found = load_split(name, streaming=True)
    assert isinstance(found, datasets.IterableDataset) and isinstance(next(iter(found))["image"], Image.Image)
