"""How examples are laid out: the sources first, and their labels."""

import pytest
import torch
from torch.utils.data import DataLoader

from oracles import images
from stf_diffusers import EDM, ReferenceBatchCollator, ReferenceBatchSampler, STFTrainingObjective


def epoch_of(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


IMAGES = images(6, 3, 4, 5)


def rows_of(data=IMAGES, **columns):
    return [{"images": x, **{key: values[i] for key, values in columns.items()}} for i, x in enumerate(data)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_collator_invariant(dtype, batch_size):
    """reference_images are all examples in order, the first B of them the images; in their own dtype."""
    data = (IMAGES * 100 + 100).to(dtype)
    batch = ReferenceBatchCollator(batch_size)(rows_of(data, label=list(range(6)), name=list("abcdef")))
    assert set(batch) == {"images", "reference_images", "labels", "reference_labels"}
    assert torch.equal(batch["reference_images"], data) and batch["reference_images"].dtype == dtype
    assert torch.equal(batch["images"], batch["reference_images"][:batch_size])
    assert batch["reference_labels"].tolist() == list(range(6)) and batch["reference_labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["reference_labels"][:batch_size])


def test_collator_without_labels():
    assert set(ReferenceBatchCollator(2)(rows_of())) == {"images", "reference_images"}


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 2, 0, -1, 1],
        torch.tensor([3, 1, 2, 0, -1, 1], dtype=torch.int32),
        list(torch.tensor([3, 1, 2, 0, -1, 1])),
    ],
    ids=["list", "int32", "list of tensors"],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_collator_takes_a_mapping_of_columns(labels, stacked):
    columns = {"pixels": IMAGES if stacked else list(IMAGES.numpy()), "class": labels, "id": list("abcdef")}
    batch = ReferenceBatchCollator(2, image_key="pixels", label_key="class")(columns)
    assert torch.equal(batch["reference_images"], IMAGES) and torch.equal(batch["images"], IMAGES[:2])
    assert batch["reference_labels"].tolist() == [3, 1, 2, 0, -1, 1] and batch["labels"].dtype == torch.int64
    by_rows = ReferenceBatchCollator(2)(rows_of(label=labels))
    assert torch.equal(by_rows["reference_labels"], batch["reference_labels"])


@pytest.mark.parametrize("form", ["torch", "transform"])
def test_collator_takes_rows_of_a_hub_data_set(form):
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (20, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = datasets.Features({"images": datasets.Image(), "label": datasets.ClassLabel(num_classes=20)})
    rows = {"images": [image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels], "label": list(range(20))}
    data = datasets.Dataset.from_dict(rows, features=features)
    if form == "torch":
        data, expected = data.with_format("torch"), pixels
    else:
        expected = pixels.float() / 127.5 - 1
        data = data.with_transform(lambda batch: {**batch, "images": [expected[i] for i in batch["label"]]})
    loader = DataLoader(data, batch_sampler=ReferenceBatchSampler(20, 4, 10), collate_fn=ReferenceBatchCollator(4))
    batches = list(loader)
    assert len(batches) == 5
    for batch, indices in zip(batches, epoch_of(ReferenceBatchSampler(20, 4, 10)), strict=True):
        assert batch["reference_images"].dtype == expected.dtype
        assert torch.equal(batch["reference_images"], expected[indices]) and batch["labels"].tolist() == indices[:4]


def pil_images():
    image = pytest.importorskip("PIL.Image")
    return [image.new("RGB", (4, 4)) for _ in range(4)]


COLLATOR_ERRORS = {
    "PIL": (lambda: rows_of(pil_images()), TypeError, "tensors or arrays; got .*Image.*torch.from_numpy"),
    "shapes": (
        lambda: rows_of([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)]),
        ValueError,
        r"must have one shape; got \[\(3, 4, 4\), \(3, 4, 5\)\]. Resize and crop them first",
    ),
    "column": (
        lambda: [{"img": x, "label": 0} for x in IMAGES],
        ValueError,
        r"no column 'images'; they have \['img', 'label'\]. Pass image_key=.*remove_unused_columns=False",
    ),
    "too few": (lambda: rows_of(IMAGES[:1]), ValueError, "at least batch_size = 2 examples; got 1.*drop_last=True"),
    "none": (lambda: [], ValueError, "no column 'images'"),
    "float labels": (
        lambda: rows_of(label=[0.5] * 6),
        TypeError,
        "one integer per example; got torch.float32.*label_key=",
    ),
    "missing labels": (
        lambda: rows_of(label=[0, None] * 3),
        TypeError,
        "one integer per example: .*Leave out examples without a label, or pass label_key=",
    ),
    "missing in some": (
        lambda: rows_of(label=[0] * 6)[:2] + rows_of()[2:],
        ValueError,
        "4 of 6 examples have no column 'label', the first of them number 2. Leave those out",
    ),
    "missing in the first": (
        lambda: rows_of()[:1] + rows_of(label=[0] * 6)[1:], ValueError, "1 of 6 examples have no column 'label'"
    ),
    "image missing": (lambda: [*rows_of(), {"label": 1}], ValueError, "1 of 7 examples have no column 'images'"),
    "unequal numbers": (
        lambda: {"images": IMAGES, "label": torch.arange(5)}, ValueError, "got 5 labels in 'label' for 6 images"
    ),
    "boolean labels": (lambda: rows_of(label=[True, False] * 3), TypeError, "got torch.bool.*make class numbers of them"),
    "single numbers": (lambda: [{"images": 1.0}] * 4, ValueError, "must be arrays, .* got single numbers"),
    "no mappings": (lambda: list(IMAGES), TypeError, "examples must be mappings .* got Tensor. Let the data set return"),
    "tuples": (lambda: [(image, 1) for image in IMAGES], TypeError, "examples must be mappings .* got tuple"),
    "text labels": (lambda: rows_of(label=list("abcdef")), TypeError, "one integer per example: .*pass label_key="),
    "one-hot labels": (lambda: rows_of(label=[[0, 1]] * 6), TypeError, r"shape \(6, 2\). Pass label_key="),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLATOR_ERRORS)
def test_collator_errors(case):
    make, error, message = COLLATOR_ERRORS[case]
    with pytest.raises(error, match=message):
        ReferenceBatchCollator(2)(make())


def test_collator_batch_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        ReferenceBatchCollator(0)
    with pytest.raises(TypeError, match=r"batch_size must be an integer; got 2\.0"):
        ReferenceBatchCollator(2.0)


def test_the_collator_hands_num_unconditional_on():
    """What it makes is passed to the objective as it is; forgetting the number would be a silent bias."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(40) % 4
    sampler = ReferenceBatchSampler(40, 4, 16, labels=labels)
    collate = ReferenceBatchCollator(4, num_unconditional=sampler.num_unconditional)
    batch = collate([{"images": images[i], "label": int(labels[i])} for i in next(iter(sampler))])
    assert batch["num_unconditional"] == sampler.num_unconditional == 10
    call = {"t": torch.full((4,), 2.0), "noise": torch.randn(4, 1, 4, 4, generator=generator)}
    call |= {"reference": batch["reference_images"], "labels": torch.full((4,), -1)}
    call |= {"reference_labels": batch["reference_labels"]}
    objective = STFTrainingObjective(EDM())
    handed = objective.perturb(batch["images"], num_unconditional=batch["num_unconditional"], **call)
    uniform = objective.perturb(batch["images"], **{**call, "reference": batch["reference_images"][:10], "labels": None, "reference_labels": None})  # fmt: skip
    assert torch.equal(handed.target, uniform.target)
    assert "num_unconditional" not in collate([{"images": image} for image in images[:16]]), "without labels"
    with pytest.raises(ValueError, match="at least batch_size 4"):
        ReferenceBatchCollator(4, num_unconditional=3)
