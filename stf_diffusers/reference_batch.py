"""Reference batches: which examples are read together, and how they are laid out.

The invariant throughout: the first B rows of the references are the sources, in order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Sampler


class ReferenceBatchSampler(Sampler[list[int]]):
    """Lists of n indices: the next B sources of a shuffled epoch, then n - B others drawn afresh from the rest.

    An epoch is one pass over the *sources*; sources that do not fill a last batch on every process are left out of
    this epoch (another epoch's shuffle leaves out others). The others are drawn uniformly without replacement from the
    images that are not sources of the batch, so no image is in a list twice and the list is exchangeable: the
    condition under which the target is unbiased. Every draw is a function of (seed, epoch, batch), so an epoch can be
    entered anywhere.

    With `labels`, for rows that use references of their own class (`perturb(..., labels=)`), a list is

        [B sources][u others, uniform as above][n - B - u others of the sources' classes],   u = (n - B) // 2.

    The last part is shared out evenly over the distinct classes of the sources: each share is drawn uniformly without
    replacement from the images of its class that are not yet in the list. What a class cannot fill goes to the others of
    these classes, and what none can fill is drawn uniformly from all images that are left. Sources and uniform others
    are a draw of the whole data law, the whole list is not: give `num_unconditional` to the objective where labels may
    be -1. The shares depend on the labels of the list so far and not on its images, so that, given which places of a
    list hold class c, the images there are a uniform draw from class c, the source among them: its exchangeable set.

    Use it as a DataLoader's `batch_sampler`. Accelerate may shard it (`accelerator.prepare`); with `num_processes` and
    `process_index` it shards itself, without drawing the lists of other processes.

    Args:
        num_examples: N, the size of the data set.
        batch_size: B, sources per list.
        reference_batch_size: n, total length of each list, sources included.
        seed: random seed for the shuffle and the draws; the same on every process.
        num_processes, process_index: yield every `num_processes`-th batch, starting with `process_index`.
        share_references: n counts the references of all processes together: at each step the lists of all processes are
            one list without repeats, for `SharedReferences`.
        labels: (N,) integer classes >= 0 of the examples, for the class-aware lists above. None: all others are uniform.

    Attributes:
        num_unconditional: the first so many of a list are a draw of the whole data law: B + u with labels, otherwise
            the list's length.

    Iterating it raises ValueError in an Accelerate loader that would cut the lists: with `dispatch_batches=True`, or on
    several processes with `split_batches=True`.

    Raises:
        ValueError: unless 1 <= B <= n <= N (with shared references, B times the processes instead of B) and at least
            one batch per process can be filled; labels that do not fit, or together with shared references.
        TypeError: numbers that are not integers, or labels that are not an integer tensor.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        reference_batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        share_references: bool = False,
        labels: Tensor | None = None,
    ) -> None:
        for name, value in (
            ("num_examples", num_examples), ("batch_size", batch_size), ("reference_batch_size", reference_batch_size)
        ):  # fmt: skip
            if not isinstance(value, SupportsIndex):
                raise TypeError(f"{name} must be an integer; got {value!r}.")
        if share_references and not num_processes * batch_size <= reference_batch_size:
            raise ValueError(
                f"shared references hold the sources of all processes, so num_processes * batch_size = "
                f"{num_processes * batch_size} <= reference_batch_size; got {reference_batch_size}. Raise it."
            )
        if not 1 <= batch_size <= reference_batch_size:
            raise ValueError(
                f"the reference batch holds the sources, so 1 <= batch_size <= reference_batch_size; got {batch_size} "
                f"and {reference_batch_size}. Raise reference_batch_size (n = batch_size leaves only the sources)."
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must lie in [0, {num_processes}); got {process_index}.")
        if batch_size * num_processes > num_examples:
            raise ValueError(
                f"{num_processes} processes times batch_size {batch_size} exceeds the {num_examples} images there are. "
                "Lower batch_size."
            )
        if reference_batch_size > num_examples:
            raise ValueError(
                f"reference_batch_size {reference_batch_size} exceeds the {num_examples} images there are. "
                f"Use at most {num_examples}: drawing an image twice would bias the target."
            )
        if labels is not None and share_references:
            raise ValueError(
                "class-aware lists cannot be shared by processes: with labels, leave share_references out and give each "
                "process its own, use a ReferenceBank, or leave labels out (the references are then uniform)."
            )
        self.num_examples = num_examples
        self.num_sources = batch_size
        self.share_references = share_references
        self._num_drawn = reference_batch_size - batch_size * (num_processes if share_references else 1)
        self._num_uniform = self._num_drawn if labels is None else self._num_drawn // 2
        self._classes = None if labels is None else _Classes(labels, num_examples)
        mine = range(process_index, self._num_drawn, num_processes) if share_references else range(self._num_drawn)
        # Length of the lists: what torch and Accelerate understand by a batch sampler's batch_size.
        self.batch_size = batch_size + len(mine)
        self.num_unconditional = self.batch_size if labels is None else batch_size + self._num_uniform
        self.drop_last = True
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> ReferenceBatchSampler:
        """Itself: where Accelerate looks for `set_epoch` when it shards a batch sampler."""
        return self

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Choose the epoch that the next iteration runs through, and the batch (of this process) to begin with.

        Without `start`, another epoch begins at its first batch, and the epoch that is chosen already stays where it
        is: loaders prepared by Accelerate announce the epoch again when they are iterated.
        """
        if start is not None:
            self.start = start
        elif epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return self.num_examples // (self.num_sources * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        _refuse_to_be_cut(self)
        return self._lists()

    def _lists(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        # The next iteration is the next epoch, also for a loop that never calls set_epoch.
        self.set_epoch(epoch + 1, start=0)
        generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
        order = torch.randperm(self.num_examples, generator=generator, device="cpu")
        for batch in range(start, len(self)):
            index = batch * self.num_processes + self.process_index
            sources = order[index * self.num_sources : (index + 1) * self.num_sources].tolist()
            if self.share_references:
                step = self.num_sources * self.num_processes
                everyones = order[batch * step : (batch + 1) * step].tolist()
                others = self._others(everyones, random.Random(f"{self.seed}/{epoch}/{batch}"))
                yield sources + others[self.process_index :: self.num_processes]
            else:
                yield sources + self._others(sources, random.Random(f"{self.seed}/{epoch}/{index}"))

    def _others(self, sources: list[int], draw: random.Random) -> list[int]:
        """The distinct indices to draw outside `sources`, the uniform ones first, in random order."""
        taken = torch.tensor(sources, device="cpu")
        uniform = _outside(taken, self.num_examples, self._num_uniform, draw)
        if self._classes is None:
            return uniform.tolist()
        left = self._num_drawn - self._num_uniform
        taken = torch.cat([taken, uniform])
        taken = torch.cat([taken, self._classes.draw(taken, self.num_sources, left, draw)])
        rest = self.batch_size - len(taken)
        return torch.cat([taken, _outside(taken, self.num_examples, rest, draw)])[self.num_sources :].tolist()


class _Classes:
    """The images of each class, prepared once, and draws from the classes that a list needs."""

    def __init__(self, labels: Tensor, num_examples: int) -> None:
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor of integers; got {type(labels).__name__}. Pass torch.tensor(labels)."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers; got {labels.dtype}. Pass class numbers, one for each image.")
        if labels.shape != (num_examples,):
            raise ValueError(
                f"labels must have shape ({num_examples},), one for each image; got {tuple(labels.shape)}."
            )
        if bool((labels < 0).any()):
            raise ValueError(
                f"labels must be at least 0; got {labels.min().item()}. Pass the true classes here: conditions are "
                "dropped (-1) in the labels of a batch."
            )
        _, self.of_image, counts = labels.to("cpu", torch.int64).unique(return_inverse=True, return_counts=True)
        self.images = self.of_image.argsort(stable=True).split(counts.tolist())
        # Of each image, its place among those of its class.
        self.place = torch.empty_like(self.of_image)
        for images in self.images:
            self.place[images] = torch.arange(len(images), device="cpu")

    def draw(self, taken: Tensor, num_sources: int, count: int, draw: random.Random) -> Tensor:
        """At most `count` images outside `taken`, of the classes of its first `num_sources`, shared out evenly."""
        classes = self.of_image[taken]
        needed = list(dict.fromkeys(classes[:num_sources].tolist()))
        places = {c: self.place[taken[classes == c]] for c in needed}
        free = {c: len(self.images[c]) - len(places[c]) for c in needed}
        parts = []
        # From the class with the fewest images left: what it lacks of an even share goes to those after it. Shares are
        # a function of labels alone; were they one of the images, a class would no longer be exchangeable.
        for position, c in enumerate(sorted(needed, key=free.__getitem__)):
            share = min(free[c], count // (len(needed) - position))
            parts.append(self.images[c][_outside(places[c], len(self.images[c]), share, draw)])
            count -= share
        return torch.cat(parts)


def _outside(taken: Tensor, size: int, count: int, draw: random.Random) -> Tensor:
    """`count` distinct integers below `size` that are not in `taken`, uniformly drawn and in random order."""
    rank = torch.tensor(draw.sample(range(size - len(taken)), count), dtype=torch.int64, device="cpu")
    # The r-th integer outside lies as many places further as there are taken ones before it.
    gaps = taken.sort().values - torch.arange(len(taken), device="cpu")
    return rank + torch.searchsorted(gaps, rank, right=True)


def _loader_in_use() -> Any:
    """The loader of Accelerate's that is being iterated, if there is one."""
    state = sys.modules.get("accelerate.state")
    return None if state is None else state.GradientState().active_dataloader


def _dispatches(loader: Any) -> bool:
    return isinstance(loader, sys.modules["accelerate.data_loader"].DataLoaderDispatcher)


def _refuse_to_be_cut(sampler: ReferenceBatchSampler) -> None:
    loader = _loader_in_use()
    layer, split = getattr(loader, "batch_sampler", None), False
    while layer is not None and layer is not sampler:
        split |= getattr(layer, "split_batches", False) and layer.num_processes > 1
        layer = getattr(layer, "batch_sampler", None)
    if layer is None:
        return
    if _dispatches(loader):
        raise ValueError(_CUT.format("dispatch_batches"))
    if split:
        raise ValueError(_CUT.format("split_batches"))


def refuse_dispatched_references() -> None:
    """Raise ValueError where the batches in use were collated on one process, and cut into pieces since."""
    loader = _loader_in_use()
    if loader is not None and isinstance(loader.collate_fn, ReferenceBatchCollator) and _dispatches(loader):
        raise ValueError(_CUT.format("dispatch_batches"))


_CUT = (
    "Accelerate cuts reference batches with {0}=True (its default for iterable data is dispatch_batches=True): sources "
    "and references are then those of different batches, or the references are lost. Make the Accelerator with "
    "dataloader_config=DataLoaderConfiguration(dispatch_batches=False, split_batches=False)."
)


class ReferenceBatchCollator:
    """Collate n examples into sources and references: a DataLoader's `collate_fn`.

    Args:
        batch_size: B; the first B examples are the sources.
        image_key: column of the images, tensors or arrays (C, H, W), or of any other shape.
        label_key: column of integer class labels; used where the examples have it.
        num_unconditional: that of a class-aware `ReferenceBatchSampler(..., labels=)`, which the objective needs: without
            it the targets of rows of label -1 are biased, and nothing says so.

    Calling it with a list of n examples (mappings), or with one mapping of columns, returns

        {"images": (B, ...), "reference_images": (n, ...), "labels": (B,), "reference_labels": (n,)}

    with labels int64 and only where the examples have them, images in their own dtype, and `reference_images[:B]`
    equal to `images` (which is a view of it). Other columns are left out. `num_unconditional`, if given, is in the batch
    under that name, beside the labels, to be passed to `STFTrainingObjective.perturb` with them.

    Raises:
        ValueError: fewer than B examples, a column that is missing in some or all of them, images of different shapes, or
            another number of labels than of images.
        TypeError: images that are not tensors or arrays (PIL images, for instance), labels that are not integers.
    """

    def __init__(
        self,
        batch_size: int,
        image_key: str = "images",
        label_key: str = "label",
        num_unconditional: int | None = None,
    ) -> None:
        if not isinstance(batch_size, SupportsIndex):
            raise TypeError(f"batch_size must be an integer; got {batch_size!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if num_unconditional is not None and num_unconditional < batch_size:
            raise ValueError(
                f"num_unconditional counts the sources too, so it is at least batch_size {batch_size}; got "
                f"{num_unconditional}. Pass that of the ReferenceBatchSampler."
            )
        self.num_unconditional = num_unconditional
        self.batch_size = batch_size
        self.image_key = image_key
        self.label_key = label_key

    def __call__(self, examples: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
        columns = examples if isinstance(examples, Mapping) else self._columns(examples)
        if self.image_key not in columns:
            raise ValueError(
                f"the examples have no column {self.image_key!r}; they have {sorted(columns)}. Pass image_key=, or, for "
                "a `datasets` data set in Trainer-like code, remove_unused_columns=False."
            )
        references = _stack(columns[self.image_key], self.image_key)
        if references.ndim < 2:
            raise ValueError(
                f"images in {self.image_key!r} must be arrays, (C, H, W) or of another shape; got single numbers."
            )
        if len(references) < self.batch_size:
            raise ValueError(
                f"a reference batch needs at least batch_size = {self.batch_size} examples; got {len(references)}. "
                "Read n examples at a time (batch_size=n in the DataLoader) with drop_last=True."
            )
        batch: dict[str, Any] = {"images": references[: self.batch_size], "reference_images": references}
        if self.label_key in columns:
            labels = self._labels(columns[self.label_key], len(references))
            batch |= {"labels": labels[: self.batch_size], "reference_labels": labels}
            if self.num_unconditional is not None:
                batch["num_unconditional"] = self.num_unconditional
        return batch

    def _columns(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """The two columns that are read, of those that some example has."""
        wrong = next((example for example in examples if not isinstance(example, Mapping)), None)
        if wrong is not None:
            raise TypeError(
                f"examples must be mappings such as {{{self.image_key!r}: image}}; got {type(wrong).__name__}. Let the "
                "data set return dicts, or pass a collate_fn that makes them."
            )
        names = {name for example in examples for name in example}
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for key in (name for name in (self.image_key, self.label_key) if name in names):
            missing = [place for place, example in enumerate(examples) if key not in example]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(examples)} examples have no column {key!r}, the first of them number "
                    f"{missing[0]}. Leave those out of the data set, or fill them in."
                )
            columns[key] = [example[key] for example in examples]
        return columns

    def _labels(self, column: Any, count: int) -> Tensor:
        """The labels of that many examples, (n,) int64."""
        try:
            labels = _as_tensor(column)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"labels in {self.label_key!r} must be one integer per example: {error}. Leave out examples without "
                "a label, or pass label_key= to name another column."
            ) from error
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
            raise TypeError(
                f"labels in {self.label_key!r} must be one integer per example; got {labels.dtype} of shape "
                f"{tuple(labels.shape)}. Pass label_key= to name another column, or make class numbers of them."
            )
        if len(labels) != count:
            raise ValueError(
                f"got {len(labels)} labels in {self.label_key!r} for {count} images: each image needs one."
            )
        return labels.to(torch.int64)


def _as_tensor(value: Any) -> Tensor:
    """A tensor where it is, anything else on the CPU: a default device is not where data are read."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _stack(images: Any, key: str) -> Tensor:
    if isinstance(images, Tensor):
        return images
    try:
        tensors = [_as_tensor(image) for image in images]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"images in {key!r} must be tensors or arrays; got {type(images[0]).__name__}. Convert them in the data "
            "set's transform, for instance torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for uint8 pixels."
        ) from error
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"images in {key!r} must have one shape; got {sorted(shapes)[:4]}. Resize and crop them first."
        )
    return torch.stack(tensors)
