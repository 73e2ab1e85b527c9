"""Labels of the network and classes of the references, drawn together; the eight orientations."""

import numpy as np
import torch

from oracles import images
from stf_diffusers.training.conditioning import Conditioning, orient


def test_conditioning_draws():
    """Frequencies within five standard errors; the classes of the references follow the network's labels."""
    count = 20_000
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(3, class_dropout=0.2, reorient=0.6)
    network, classes, orientation = conditioning.draw(labels, count, torch.Generator().manual_seed(1))
    assert conditioning.embeddings == 32 and conditioning.null_label == 3
    dropped = classes == -1
    assert abs(dropped.double().mean() - 0.2) < 5 * (0.16 / count) ** 0.5
    assert torch.equal(classes[~dropped], labels[~dropped])
    assert torch.equal(network % 4, torch.where(dropped, 3, labels))
    assert torch.equal(network // 4, orientation)
    share = torch.bincount(orientation, minlength=8).double() / count
    expected = torch.tensor([0.4 + 0.6 / 8] + [0.6 / 8] * 7, dtype=torch.float64)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert Conditioning(None).draw(None, 4, torch.Generator()) == (None, None, None)
    network, classes, _ = Conditioning(None, transformer=True).draw(None, 4, torch.Generator())
    assert classes is None and network.tolist() == [1000] * 4


def test_orientations_are_the_eight_of_the_square():
    picture = images(1, 3, 4, 4).expand(8, -1, -1, -1)
    turned = orient(picture, torch.arange(8)).numpy()
    for number in range(8):
        plain = picture[0].numpy()
        plain = plain[:, :, ::-1] if number >= 4 else plain
        np.testing.assert_array_equal(turned[number], np.rot90(plain, number % 4, (1, 2)))
    assert len({turned[number].tobytes() for number in range(8)}) == 8
