"""Wrong arguments of the package's functions and wrong files of banks, each with the error that it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from banks import pixels
from oracles import images, normal
from stf_diffusers import ReferenceBank, SharedReferences
from stf_diffusers.posterior import reference_norms
from stf_diffusers.reference_set import ReferenceBatch, ReferenceSet

X = images(4, 3, 4, 4)
R = torch.cat([X, images(8, 3, 4, 4, seed=1)])
ONE_PIXEL = R.clone()
ONE_PIXEL[2, 1, 3, 0] += 1e-3
I4, I12 = torch.zeros(4, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
CAT = r"reference=torch.cat\(\[clean, others\]\)"
# What `perturb` and `target` are called with, beside good arguments; the error; a pattern that its message matches.
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other images": (dict(reference=R[4:]), ValueError, CAT),
    "permuted sources": (dict(reference=torch.cat([X.flip(0), R[4:]])), ValueError, f"must equal clean.*{CAT}"),
    "sources at the end": (dict(reference=R.flip(0)), ValueError, f"(?s)source_index.*{CAT}"),
    "one pixel changed": (dict(reference=ONE_PIXEL), ValueError, "largest difference is 0.001"),
    "one pixel of float64": (dict(clean=X.double(), reference=ONE_PIXEL.double()), ValueError, CAT),
    "horizontally flipped": (dict(clean=X.flip(-1), reference=R), ValueError, "after any augmentation"),
    "too few": (dict(reference=X[:3]), ValueError, r"got 3 references for 4 images.*torch.cat\(\[clean, others\]\)"),
    "other size": (dict(reference=R[..., :2]), ValueError, "must have one shape. Resize and crop them alike"),
    "no tensor": (dict(reference=[X]), TypeError, "reference must be a tensor .* got list"),
    "integer images": (dict(clean=X.int()), TypeError, "floating point in .* or uint8 pixels"),
    "integer references": (dict(reference=R.int()), TypeError, "floating point in .* or uint8 pixels"),
    "images no tensor": (dict(clean=[X]), TypeError, "clean must be a tensor .* got list. Stack the images first"),
    "no batch": (dict(clean=X[0, 0, 0]), ValueError, "clean must be a batch"),
    "index to others": (dict(reference=R, source_index=I4 + 5), ValueError, r"reference\[source_index\]"),
    "index beyond": (dict(reference=R, source_index=I4 + 12), ValueError, r"source_index must lie in \[0, 12\)"),
    "index negative": (dict(reference=R, source_index=I4 - 1), ValueError, r"source_index must lie in \[0, 12\)"),
    "index shape": (dict(reference=R, source_index=I12), ValueError, r"source_index must have shape \(4,\)"),
    "index bool": (dict(reference=R, source_index=I4.bool()), TypeError, "source_index must be integers; got torch.bool"),
    "labels alone": (dict(reference=R, labels=I4), ValueError, "labels need reference_labels: rows use references of"),
    "reference labels alone": (dict(reference=R, reference_labels=I12), ValueError, "reference_labels need labels"),
    "labels shape": (dict(reference=R, labels=I4[:3], reference_labels=I12), ValueError, r"labels must have shape \(4,"),
    "reference labels shape": (
        dict(reference=R, labels=I4, reference_labels=I4), ValueError, r"reference_labels must have shape \(12,\)"
    ),
    "float labels": (
        dict(reference=R, labels=I4.float(), reference_labels=I12), TypeError, "labels must be integers; got torch.float32"
    ),
    "one-hot labels": (
        dict(reference=R, labels=torch.eye(4).long(), reference_labels=I12), ValueError, "labels must have shape"
    ),
    "mismatched labels": (
        dict(reference=R, labels=I4 + 1, reference_labels=I12), ValueError, "labels differ from .* or -1 where the condition"
    ),
    "mismatched labels by index": (
        dict(reference=R, labels=I4, source_index=torch.arange(4), reference_labels=I12 + 1), ValueError, "labels differ"
    ),
    "unconditional without labels": (
        dict(reference=R, num_unconditional=8), ValueError, "num_unconditional needs labels and reference_labels"
    ),
    "unconditional below B": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=3), ValueError, r"\[B, n\] = \[4, 12\]; got 3"
    ),
    "unconditional above n": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=13), ValueError, r"\[4, 12\]; got 13"
    ),
    "unconditional no number": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=8.0), TypeError, "must be an int; got float"
    ),
    "unconditional of a bank": (
        dict(reference=ReferenceBank(R, I12), labels=I4, num_unconditional=8),
        ValueError, "in a ReferenceBank, rows of label -1 use all. Leave it out"
    ),
    "a list of labels": (dict(reference=R, labels=[0] * 4, reference_labels=I12), TypeError, "labels must be a tensor"),
    "a list of reference labels": (
        dict(reference=R, labels=I4, reference_labels=[0] * 12), TypeError, "reference_labels must be a tensor .* got list"
    ),
    "a list of labels for a bank": (dict(reference=ReferenceBank(R, I12), labels=[0] * 4), TypeError, "labels must be a tensor"),
    "a list of positions": (dict(reference=R, source_index=[0] * 4), TypeError, "source_index must be a tensor"),
    "a list of positions in a bank": (
        dict(reference=ReferenceBank(R), source_index=[0] * 4), TypeError, "source_index must be a tensor .* got list"
    ),
    "boolean labels": (
        dict(reference=R, labels=I4.bool(), reference_labels=I12), TypeError, "labels must be integers; got torch.bool"
    ),
    "labels of others without references": (dict(labels=I12), ValueError, r"labels must have shape \(4,\), one for each"),
    "a list of times": (dict(t=[1.0] * 4), TypeError, r"times must be a tensor \(4,\); got list"),
    "a number as time": (dict(t=1.0), TypeError, r"times must be a tensor \(4,\); got float"),
    "a list of noise": (dict(noise=[0.0] * 4), TypeError, "noise must be a tensor of shape .* got list"),
    "noise shape": (dict(noise=normal(4, 1, 4, 4)), ValueError, r"noise must have the images' shape \(4, 3, 4, 4\)"),
    "one time": (dict(t=torch.tensor(1.0)), ValueError, r"one per image, shape \(4,\); got \(\)"),
    "times expanded": (dict(t=torch.ones(4, 1, 1, 1)), ValueError, r"one per image, shape \(4,\)"),
    "no noise": (dict(t=torch.tensor([1.0, 0.0, 1.0, 1.0])), ValueError, r"times of EDM lie above 0 .*got \[0.0\]"),
}  # fmt: skip


# The sets of references, called directly: all that is said of a set's kind is said here of each.
SETS: dict[str, Callable[[], ReferenceSet]] = {
    "bank": lambda: ReferenceBank(R, I12),
    "batch": lambda: ReferenceBatch(R, I12),
    "shared": lambda: SharedReferences(R, I12),
}
# What `posterior_mean` of each is called with, beside good arguments; the error; a pattern that its message matches.
SET_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "noisy is a list": (dict(noisy=X.tolist()), TypeError, r"noisy must be a tensor \(B, \.\.\.\); got list"),
    "noisy is an array": (dict(noisy=X.numpy()), TypeError, r"noisy must be a tensor \(B, \.\.\.\); got ndarray"),
    "noisy pixels": (dict(noisy=X.byte()), TypeError, "noisy must be floating point; got torch.uint8. Scale images"),
    "no batch": (dict(noisy=torch.tensor(1.0)), ValueError, "noisy must be .* with at least 2 dimensions"),
    "other images": (dict(noisy=X[..., :2]), ValueError, "noisy must be|must have one shape"),
    "a word as alpha": (dict(alpha="one"), TypeError, r"alpha must be a number or a tensor \(4,\); got str"),
    "no sigma": (dict(sigma=None), TypeError, r"sigma must be a number or a tensor \(4,\); got NoneType"),
    "sigma of pixels": (dict(sigma=torch.ones(4, 1, 1, 1)), ValueError, "sigma must have one value per row"),
    "no noise": (dict(sigma=0.0), ValueError, "sigma must be positive; got 0"),
    "positions in a list": (dict(source_index=[0] * 4), TypeError, "source_index must be a tensor .* got list"),
    "positions as floats": (
        dict(source_index=I4.float()),
        TypeError,
        "source_index must be integers; got torch.float32",
    ),
    "positions as booleans": (dict(source_index=I4.bool()), TypeError, "source_index must be integers; got torch.bool"),
    "positions of others": (dict(source_index=I12), ValueError, r"source_index must have shape \(4,\)"),
    "labels in a list": (dict(labels=[0] * 4), TypeError, "labels must be a tensor .* got list"),
    "labels as floats": (dict(labels=I4.float()), TypeError, "labels must be integers; got torch.float32"),
    "labels as booleans": (dict(labels=I4.bool()), TypeError, "labels must be integers; got torch.bool"),
    "labels of others": (dict(labels=I12), ValueError, r"labels must have shape \(4,\)"),
}


def set_call(case: str, kind: str) -> Callable[[], object]:
    """The call of a case, of one kind of set."""
    good = {"noisy": X, "alpha": 1.0, "sigma": 1.0, "labels": I4}
    return lambda: SETS[kind]().posterior_mean(**{**good, **SET_CALLS[case][0]})


def contents() -> dict[str, Tensor]:
    """The tensors of a bank of 30 images in 4 classes."""
    labels, order = (torch.arange(30) % 4).sort(stable=True)
    images = ReferenceBank(pixels(), torch.arange(30) % 4).images[:]
    return {"images": images, "norms": reference_norms(images), "labels": labels, "order": order}


def changed(name: str, place: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    return change


# What is done to the tensors of a good file; what opening it says, as a ValueError.
BANK_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no norms": (lambda t: t.pop("norms"), "lacks ['norms']"),
    "no images": (lambda t: t.update(images=torch.zeros(0, 2, dtype=torch.uint8)), "images are torch.uint8 (0, 2)"),
    "a number": (lambda t: t.update(images=torch.tensor(3, dtype=torch.uint8)), "images are torch.uint8 ()"),
    "integers": (lambda t: t.update(images=t["images"].long()), "images are torch.int64"),
    "images missing": (lambda t: t.update(images=t["images"][:-1].clone()), "norms are torch.float64 (30,), expected"),
    "norms missing": (lambda t: t.update(norms=t["norms"][:-1].clone()), "norms are torch.float64 (29,), expected"),
    "float32 norms": (lambda t: t.update(norms=t["norms"].float()), "norms are torch.float32 (30,), expected"),
    "labels missing": (lambda t: t.update(labels=t["labels"][:-1].clone()), "labels are torch.int64 (29,), expected"),
    "labels too many": (lambda t: t.update(labels=t["labels"].repeat(2)), "labels are torch.int64 (60,), expected"),
    "float labels": (lambda t: t.update(labels=t["labels"].double()), "labels are torch.float64 (30,), expected"),
    "order missing": (lambda t: t.update(order=t["order"][:-1].clone()), "order are torch.int64 (29,), expected"),
    "unsorted labels": (lambda t: t.update(labels=t["labels"].flip(0)), "its labels are not sorted"),
    "negative labels": (changed("labels", 0, -1), "its labels are not sorted"),
    "order twice": (changed("order", 0, 7), "its order is not a permutation"),
    "order outside": (changed("order", 0, 30), "its order is not a permutation"),
    "labels for order": (lambda t: t.update(labels=t["order"], order=t["labels"]), "its labels are not sorted"),
    "norms that are NaN": (changed("norms", 3, torch.nan), "norms of images [3] are not finite"),
    "infinite norms": (changed("norms", 3, torch.inf), "norms of images [3] are not finite"),
    "a negative norm": (changed("norms", 3, -2.0), "norms of images [3] are none of torch.uint8 images (2, 5, 6)"),
    "a norm too large": (changed("norms", 3, 60 * 127 * 128 + 2.0), "norms of images [3] are none of torch.uint8"),
    "an odd norm": (changed("norms", 3, 4001.0), "norms of images [3] are none of torch.uint8"),
    "a fractional norm": (changed("norms", 3, 4000.5), "norms of images [3] are none of torch.uint8"),
    "norms of other images": (lambda t: t.update(norms=t["norms"].roll(1)), "is not that of the image"),
    "images of other norms": (lambda t: t.update(images=t["images"].roll(1, 0)), "is not that of the image"),
}
