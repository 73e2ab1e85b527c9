"""References follow the law of their row's source given all that the network sees; other references are a bias.

Every case is enumerated on a few points: with a source drawn from the data, a set built around it and x_t drawn from
N(alpha source, sigma²), E[target | x_t, condition] is a finite sum over sources and sets, each weighted with its
probability times the likelihood of x_t. It must equal E[x0 | x_t, condition] over the points to rounding (EXACT), and
each naive way of choosing references must miss it by more than VISIBLE.
"""

from fractions import Fraction
from itertools import chain, combinations, permutations, product

import pytest
import torch

from oracles import images, normal
from stf_diffusers import FlowMatching, ReferenceBank, ReferenceBatchSampler, STFTrainingObjective, posterior_mean

EXACT, VISIBLE = 1e-12, 0.01

T = 0.45
ALPHA, SIGMA = 1 - T, T
OBJECTIVE = STFTrainingObjective(FlowMatching(), "sample")  # the target is the posterior mean itself
POINTS = normal(6, 2, seed=8, dtype=torch.float64)
QUERIES = [torch.tensor(q, dtype=torch.float64) for q in ([0.3, 0.6], [0.5, -0.5])]
every_query = pytest.mark.parametrize("x_t", QUERIES, ids=lambda q: str(q.tolist()))


def log_likelihood(x_t, points):
    """log N(x_t; alpha x, sigma²) up to a constant, for points (n, ...): (n,)."""
    return -(x_t - ALPHA * points).flatten(1).square().sum(1) / (2 * SIGMA**2)


def truth(x_t, points, prior=None):
    """E[x0 | x_t] for x0 among `points` (n, ...) with prior probabilities (n,), uniform by default."""
    logits = log_likelihood(x_t, points) + (0 if prior is None else prior.log())
    return torch.tensordot(logits.softmax(0), points, 1)


def targets(x_t, sources, others=None, **arguments):
    """The objective's targets for `sources` (B, ...), all noised to x_t, with references [sources, others]."""
    reference = sources if others is None else torch.cat([sources, others])
    noise, t = (x_t - ALPHA * sources) / SIGMA, torch.full((len(sources),), T, dtype=torch.float64)
    return OBJECTIVE.target(sources, noise, t, **{"reference": reference, **arguments})


def bias(x_t, cases, expected):
    """Distance of E[target | x_t] from `expected`; cases are (probability, source, target) of joint draws."""
    chances, sources, values = zip(*cases, strict=True)
    chance = torch.tensor([float(c) for c in chances], dtype=torch.float64)
    weights = (log_likelihood(x_t, torch.stack(sources)) + chance.log()).softmax(0)
    return (torch.tensordot(weights, torch.stack(values), 1) - expected).norm().item()


def by_row(chance, sources, values):
    """The cases of a set whose rows are all sources."""
    return [(chance, source, value) for source, value in zip(sources, values, strict=True)]


def sets(n, size=3):
    return [list(members) for members in combinations(range(n), size)]


# ---- classes, and labels that were dropped

CLASSES = torch.tensor([0, 0, 0, 1, 1, 2])


class Outcome:
    """In place of a `random.Random`: one outcome of its draws. The choices not made are left in `branches`."""

    def __init__(self, path):
        self.path, self.step, self.chance, self.branches = path, 0, Fraction(1), []

    def sample(self, population, k):
        choices = list(combinations(population, k))
        if self.step == len(self.path):
            self.branches += [(*self.path, other) for other in range(1, len(choices))]
            self.path = (*self.path, 0)
        self.step += 1
        self.chance /= len(choices)
        return choices[self.path[self.step - 1]]


def all_lists(sampler, num_examples, batch_size):
    """(probability, list) for all lists of the sampler: its own code, run through all outcomes of its draws."""
    orders = list(permutations(range(num_examples), batch_size))
    for sources in orders:
        paths = [()]
        while paths:
            outcome = Outcome(paths.pop())
            others = sampler._others(list(sources), outcome)
            paths += outcome.branches
            yield outcome.chance / len(orders), [*sources, *others]


@pytest.fixture(scope="module", params=[(1, 4), (2, 5)], ids=str)
def class_aware(request):
    """A class-aware sampler's lists: (number of sources, number of unconditional references, [(probability, list)])."""
    batch_size, n = request.param
    sampler = ReferenceBatchSampler(6, batch_size, n, labels=CLASSES)
    lists = list(all_lists(sampler, 6, batch_size))
    assert sum(chance for chance, _ in lists) == 1
    return batch_size, sampler.num_unconditional, lists


def class_aware_cases(x_t, class_aware, row_labels, use_number=True):
    """[(class of the source, case)]; `row_labels(classes)` are the labels given, None for none at all."""
    batch_size, unconditional, lists = class_aware
    for chance, indices in lists:
        classes, points = CLASSES[indices], POINTS[indices]
        labels = row_labels(classes[:batch_size])
        arguments = {} if labels is None else {"labels": labels, "reference_labels": classes}
        if use_number and labels is not None:
            arguments["num_unconditional"] = unconditional
        values = targets(x_t, points[:batch_size], points[batch_size:], **arguments)
        yield from zip(classes.tolist(), by_row(chance, points[:batch_size], values), strict=False)


@every_query
def test_a_row_with_a_class_uses_references_of_its_class(class_aware, x_t):
    """Naive: the same lists for a network that sees the class, with no labels given."""
    ours = list(class_aware_cases(x_t, class_aware, lambda classes: classes))
    naive = list(class_aware_cases(x_t, class_aware, lambda classes: None))
    for label in range(3):
        expected = truth(x_t, POINTS[label == CLASSES])
        assert bias(x_t, [case for c, case in ours if c == label], expected) < EXACT
        assert bias(x_t, [case for c, case in naive if c == label], expected) > VISIBLE


@every_query
def test_a_row_without_its_class_uses_references_of_the_whole_law(class_aware, x_t):
    """Naive: all of a class-aware list. Rows may be dropped together or one by one."""
    expected = truth(x_t, POINTS)
    dropped = list(class_aware_cases(x_t, class_aware, lambda classes: torch.full_like(classes, -1)))
    assert bias(x_t, [case for _, case in dropped], expected) < EXACT
    naive = class_aware_cases(x_t, class_aware, lambda classes: torch.full_like(classes, -1), use_number=False)
    assert bias(x_t, [case for _, case in naive], expected) > VISIBLE
    first = torch.arange(class_aware[0]) == 0
    mixed = list(class_aware_cases(x_t, class_aware, lambda classes: classes.masked_fill(first, -1)))
    assert bias(x_t, [case for _, case in mixed[:: class_aware[0]]], expected) < EXACT


@every_query
def test_a_bank_holds_every_law(x_t):
    """Without randomness: each row's target is the posterior mean of its class, or of everything."""
    bank, labels = ReferenceBank(POINTS, CLASSES), CLASSES.masked_fill(torch.arange(6) % 2 == 1, -1)
    values = targets(x_t, POINTS, reference=bank, labels=labels)
    for label, value in zip(labels, values, strict=True):
        assert (value - truth(x_t, POINTS[(label == CLASSES) | (label == -1)])).norm() < EXACT


# ---- free text: a condition that one image or a few have

CAPTIONS = torch.tensor([0, 1, 2, 2, 3, 2])


@pytest.mark.parametrize("use_bank", [True, False])
def test_a_lone_caption_is_denoising_score_matching(use_bank):
    """Bit for bit, for every output and also where other rows of the batch are dropped or share a caption."""
    points, t = POINTS.float(), torch.full((6,), T)
    for prediction_type in (None, "epsilon", "sample", "v_prediction"):
        objective = STFTrainingObjective(FlowMatching(), prediction_type)
        noise = normal(6, 2, seed=3)
        labels = CAPTIONS.masked_fill(torch.arange(6) == 5, -1)
        arguments = {"reference": ReferenceBank(points, CAPTIONS)}
        if not use_bank:
            arguments = {"reference": points, "reference_labels": CAPTIONS}
        got, dsm = objective.target(points, noise, t, labels=labels, **arguments), objective.target(points, noise, t)
        alone = torch.tensor([True, True, False, False, True, False])
        assert torch.equal(got[alone], dsm[alone])
        assert ((got - dsm)[~alone].abs().amax(1) > 1e-3).all()


@every_query
def test_captions(x_t):
    """References drawn from everything: of a caption, and of dropped ones. Naive: for all rows, whatever the caption."""
    captioned, dropped = {c: [] for c in range(4)}, []
    naive = {c: [] for c in range(4)}
    for members in sets(6):
        points, captions = POINTS[members], CAPTIONS[members]
        own = targets(x_t, points, labels=captions, reference_labels=captions)
        everything = targets(x_t, points, labels=torch.full_like(captions, -1), reference_labels=captions)
        dropped += by_row(1, points, everything)
        for i, c in enumerate(captions.tolist()):
            captioned[c].append((1, points[i], own[i]))
            naive[c].append((1, points[i], everything[i]))
    assert bias(x_t, dropped, truth(x_t, POINTS)) < EXACT
    for c in range(4):
        expected = truth(x_t, POINTS[c == CAPTIONS])
        assert bias(x_t, captioned[c], expected) < EXACT
        assert bias(x_t, naive[c], expected) > VISIBLE


# ---- latents: an image is a law of its own, N(m_i, s_i²), of which each epoch draws
#
# The three-point Gauss-Hermite law stands for the normal: m_i and m_i +- sqrt(3) s_i, with probabilities 2/3 and 1/6.

MEANS = POINTS[:4]
SPREADS = torch.tensor([0.5, 0.8, 0.3, 0.6], dtype=torch.float64)
DIRECTIONS = torch.nn.functional.normalize(normal(4, 2, seed=2, dtype=torch.float64))
NODES = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * 3**0.5
DRAWS = MEANS[:, None] + SPREADS[:, None, None] * NODES[:, None] * DIRECTIONS[:, None]  # (4 images, 3 draws, 2)
CHANCES = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)


def latent_sets():
    """(members, their latents (3, 2), probability of these draws)."""
    for members in sets(4):
        for draws in product(range(3), repeat=3):
            yield members, DRAWS[members, list(draws)], CHANCES[list(draws)].prod()


@every_query
def test_latents_are_the_draws_that_are_trained_on(x_t):
    """Naive: the source's draw with the means of the others, means alone, and latents drawn once more."""
    expected = truth(x_t, DRAWS.flatten(0, 1), CHANCES.repeat(4))
    ours, own_and_means, means, redrawn = [], [], [], []

    def mean_of(reference):
        return posterior_mean(x_t[None], reference, alpha=ALPHA, sigma=SIGMA).mean[0]

    for members, latents, chance in latent_sets():
        ours += by_row(chance, latents, targets(x_t, latents))
        means += by_row(chance, latents, mean_of(MEANS[members]).expand(3, -1))
        for i, member in enumerate(members):
            others = MEANS[[m for m in members if m != member]]
            own_and_means.append((chance, latents[i], targets(x_t, latents[i : i + 1], others)[0]))
            # The set is drawn independently of the draw that was noised.
            redrawn += [(chance * p, draw, mean_of(latents)) for p, draw in zip(CHANCES, DRAWS[member], strict=True)]
    assert bias(x_t, ours, expected) < EXACT
    for naive in (own_and_means, means, redrawn):
        assert bias(x_t, naive, expected) > VISIBLE


@pytest.mark.parametrize("reference", [MEANS, DRAWS[:, 1]], ids=["means", "another draw"])
def test_references_without_the_source_s_own_draw_are_refused(reference):
    with pytest.raises(ValueError, match="references do not contain the images they belong to"):
        targets(QUERIES[0], DRAWS[:2, 0], reference=reference)
    with pytest.raises(ValueError, match="not in the bank"):
        targets(QUERIES[0], DRAWS[:2, 0], reference=ReferenceBank(reference))


# ---- augmentation

PICTURES = images(5, 1, 2, 2, seed=4, dtype=torch.float64) * 1.5
PICTURE_QUERIES = [
    torch.tensor(q, dtype=torch.float64).view(1, 2, 2) for q in ([0.3, -0.2, 0, 0.4], [-0.5, 0.1, 0.6, 0])
]
every_picture = pytest.mark.parametrize("x_t", PICTURE_QUERIES, ids=["first", "second"])
ORTHOGONAL = {
    "flip": (lambda x: x.flip(-1), lambda x: x.flip(-1)),
    "quarter turn": (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1))),
}


@every_picture
@pytest.mark.parametrize("name", ORTHOGONAL)
def test_flips_and_turns_may_come_after(name, x_t):
    """Plain pictures are noised, then input and target are turned: E[A x0 | A x_t, A]. Naive: only the source is turned.

    x_t is what the network sees. The white noise has the same law before and after an orthogonal A.
    """
    forward, back = ORTHOGONAL[name]
    turned = forward(PICTURES)
    ours, naive = [], []
    for members in sets(5):
        plain = PICTURES[members]
        noise, t = (back(x_t) - ALPHA * plain) / SIGMA, torch.full((3,), T, dtype=torch.float64)
        batch = OBJECTIVE.perturb(plain, reference=plain, t=t, noise=noise)
        assert (forward(batch.model_input) - x_t).abs().max() < EXACT
        ours += by_row(1, turned[members], forward(batch.target))
        for i, member in enumerate(members):
            others = PICTURES[[m for m in members if m != member]]
            naive.append((1, turned[member], targets(x_t, turned[members[i : i + 1]], others)[0]))
    assert bias(x_t, ours, truth(x_t, turned)) < EXACT
    assert bias(x_t, naive, truth(x_t, turned)) > VISIBLE


BRIGHTNESS = torch.tensor([0.5, 1.0], dtype=torch.float64)


@every_picture
def test_one_augmentation_for_sources_and_references(x_t):
    """The network sees how bright. Naive: plain others; others each with a brightness of its own."""
    for seen in BRIGHTNESS:
        expected = truth(x_t, seen * PICTURES)
        ours, plain_others, each_its_own = [], [], []
        for members in sets(5):
            pictures = seen * PICTURES[members]
            ours += by_row(1, pictures, targets(x_t, pictures))
            for i, member in enumerate(members):
                source, others = pictures[i : i + 1], PICTURES[[m for m in members if m != member]]
                plain_others.append((1, source[0], targets(x_t, source, others)[0]))
                for pair in product(BRIGHTNESS, repeat=2):
                    own = torch.stack(pair).view(2, 1, 1, 1) * others
                    each_its_own.append((0.25, source[0], targets(x_t, source, own)[0]))
        assert bias(x_t, ours, expected) < EXACT
        assert bias(x_t, each_its_own, expected) > VISIBLE
        assert bias(x_t, plain_others, expected) > VISIBLE or seen == 1


@every_picture
def test_augmentation_that_the_network_does_not_see(x_t):
    """Then x0 is any picture at any brightness: one for all of a set, or each its own, are both right."""
    expected = truth(x_t, (BRIGHTNESS.view(2, 1, 1, 1, 1) * PICTURES).flatten(0, 1))
    one, each_its_own, plain_others = [], [], []
    for members in sets(5):
        for each in product(BRIGHTNESS, repeat=3):
            pictures = torch.stack(each).view(3, 1, 1, 1) * PICTURES[members]
            each_its_own += by_row(1, pictures, targets(x_t, pictures))
        for b in BRIGHTNESS:
            pictures = b * PICTURES[members]
            one += by_row(1, pictures, targets(x_t, pictures))
            for i, member in enumerate(members):
                others = PICTURES[[m for m in members if m != member]]
                plain_others.append((1, pictures[i], targets(x_t, pictures[i : i + 1], others)[0]))
    assert bias(x_t, one, expected) < EXACT
    assert bias(x_t, each_its_own, expected) < EXACT
    assert bias(x_t, plain_others, expected) > VISIBLE


@every_picture
def test_augmented_rows_may_have_a_label_of_their_own(x_t):
    """They get the plain target, bit for bit, and the other rows that of the plain pictures. Naive: one label for all."""
    ours, naive = [], []
    for members in sets(5):
        for flags in product([False, True], repeat=3):
            augmented = torch.tensor(flags)
            chance = 0.3 ** sum(flags) * 0.7 ** (3 - sum(flags))
            pictures = torch.where(augmented.view(3, 1, 1, 1), 0.5 * PICTURES[members], PICTURES[members])
            labels = torch.where(augmented, 1 + torch.arange(3), 0)
            own = targets(x_t, pictures, labels=labels, reference_labels=labels)
            together = targets(x_t, pictures)
            dsm = targets(x_t, pictures, reference=None)
            assert torch.equal(own[augmented], dsm[augmented])
            ours += by_row(chance, pictures[~augmented], own[~augmented])
            naive += by_row(chance, pictures[~augmented], together[~augmented])
    assert bias(x_t, ours, truth(x_t, PICTURES)) < EXACT
    assert bias(x_t, naive, truth(x_t, PICTURES)) > VISIBLE


# ---- streams: the references are what came before

STREAM = POINTS[:4]
STREAM_CLASSES = [0, 0, 1, 1]
QUEUE = 3


def stream_target(x_t, source, before, **arguments):
    return targets(x_t, STREAM[[source]], STREAM[before], **arguments)[0]


@every_query
def test_a_queue_within_a_pass(x_t):
    """At each place of a pass in random order: the examples just before, and the source."""
    for place in range(4):
        cases = [
            (1, STREAM[order[place]], stream_target(x_t, order[place], list(order[max(0, place - QUEUE) : place])))
            for order in permutations(range(4))
        ]
        assert bias(x_t, cases, truth(x_t, STREAM)) < EXACT


@every_query
def test_a_queue_over_the_end_of_a_pass(x_t):
    """Naive: the queue is kept, and the source may be in it from the last pass. Each image counted once, it is exact."""
    both_passes = list(product(permutations(range(4)), repeat=2))
    kept = [(1, STREAM[this[0]], stream_target(x_t, this[0], list(last[-QUEUE:]))) for last, this in both_passes]
    assert bias(x_t, kept, truth(x_t, STREAM)) > VISIBLE
    for place in range(3):
        once = []
        for last, this in both_passes:
            before = [*last, *this[:place]][-QUEUE:]
            distinct = [i for i in dict.fromkeys(before) if i != this[place]]
            once.append((1, STREAM[this[place]], stream_target(x_t, this[place], distinct)))
        assert bias(x_t, once, truth(x_t, STREAM)) < EXACT


@every_query
def test_a_stream_sorted_by_class(x_t):
    """Naive: what came before, for a network without classes. Within a class the order is random: with labels, exact."""
    halves = list(product(permutations([0, 1]), permutations([2, 3])))
    naive, by_class = [], {0: [], 1: []}
    for order in [list(chain(*both)) for both in halves]:
        for place, source in enumerate(order):
            before = order[max(0, place - QUEUE) : place]
            naive.append((1, STREAM[source], stream_target(x_t, source, before)))
            classes = torch.tensor([STREAM_CLASSES[i] for i in [source, *before]])
            value = stream_target(x_t, source, before, labels=classes[:1], reference_labels=classes)
            by_class[STREAM_CLASSES[source]].append((1, STREAM[source], value))
    assert bias(x_t, naive, truth(x_t, STREAM)) > VISIBLE
    for label, cases in by_class.items():
        assert bias(x_t, cases, truth(x_t, STREAM[torch.tensor(STREAM_CLASSES) == label])) < EXACT
