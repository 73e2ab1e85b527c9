"""Targets are unbiased, exactly, and their variance falls with every reference."""

from itertools import combinations, pairwise

import pytest
import torch

from oracles import normal, posterior, rows, worst
from processes import PROCESSES, coefficients, every_type, four_processes, seeded
from stf_diffusers import (
    EDM,
    VE,
    VP,
    FlowMatching,
    ReferenceBatchCollator,
    ReferenceBatchSampler,
    STFTrainingObjective,
    posterior_mean,
)

diffusers = pytest.importorskip("diffusers")


# ---- exact unbiasedness, by enumeration
#
# Six points, references of three: given x_t, the source is s with probability w_s (the full posterior) and the set is
# {s, two others}, uniform. Every expectation below is the finite sum over all of these.

POINTS = normal(6, 2, seed=8, dtype=torch.float64)
POINT_CLASSES = torch.tensor([0, 0, 1, 0, 1, 1])
QUERIES = [torch.tensor(q, dtype=torch.float64) for q in ([0.1, -0.2], [1.0, 0.5])]
TIMES = {EDM: [0.3, 1.0, 4.0], VE: [0.3, 1.0, 4.0], VP: [0.1, 0.3, 0.6], FlowMatching: [0.2, 0.5, 0.8]}


def sets(n):
    return [list(s) for s in combinations(range(6), n)]


def full_posterior(x_t, alpha, sigma, members=None):
    """Weights (6,) over all points, or over those that `members` (6,) allows."""
    mask = None if members is None else members[None]
    return posterior(x_t[None], POINTS, alpha[None], sigma[None], mask)[0][0]


def enumerate_targets(process, prediction_type, x_t, t, labels=None):
    """{(set, source): target} by the objective itself: all rows of a set are noised to the same x_t."""
    alpha, sigma = (float(f(torch.tensor([t], dtype=torch.float64))) for f in (process.alpha, process.sigma))
    objective = STFTrainingObjective(process, prediction_type)
    targets = {}
    for members in sets(3):
        x0 = POINTS[members]
        classes = {} if labels is None else {"labels": labels[members], "reference_labels": POINT_CLASSES[members]}
        target = objective.target(
            x0, (x_t - alpha * x0) / sigma, torch.full((3,), t, dtype=torch.float64), reference=x0, **classes
        )
        targets |= {(tuple(members), s): target[i] for i, s in enumerate(members)}
    return targets


def expectation(targets, weights):
    """E over source ~ weights and the two others uniform, C(5, 2) = 10 choices."""
    return sum(weights[source] * target / 10 for (_, source), target in targets.items())


@every_type
@four_processes
def test_target_is_exactly_unbiased(process, prediction_type):
    """E[target | x_t] = E[y | x_t] for n = 3, to rounding: Bertrand et al. 2025, Prop. 2."""
    for t in TIMES[type(process)]:
        alpha, sigma, a, b = (
            c[0] for c in coefficients(process, prediction_type, torch.tensor([t], dtype=torch.float64))
        )
        for x_t in QUERIES:
            weights = full_posterior(x_t, alpha, sigma)
            mean = weights @ POINTS
            expected = a * mean + b * (x_t - alpha * mean) / sigma
            got = expectation(enumerate_targets(process, prediction_type, x_t, t), weights)
            assert worst(got, expected) < 1e-12 * (1 + expected.abs().max())


@four_processes
def test_class_conditional_target_is_exactly_unbiased(process):
    """Given the class of the source, and given a dropped class, for sets drawn from the whole data."""
    for t in TIMES[type(process)]:
        alpha, sigma, *_ = (c[0] for c in coefficients(process, None, torch.tensor([t], dtype=torch.float64)))
        for x_t in QUERIES:
            everything = full_posterior(x_t, alpha, sigma)
            by_class = [full_posterior(x_t, alpha, sigma, label == POINT_CLASSES) for label in (0, 1)]
            conditional = enumerate_targets(process, "sample", x_t, t, labels=POINT_CLASSES)
            dropped = enumerate_targets(process, "sample", x_t, t, labels=torch.full((6,), -1))
            for targets, weights in ((conditional, by_class[0]), (conditional, by_class[1]), (dropped, everything)):
                assert worst(expectation(targets, weights), weights @ POINTS) < 1e-12
            if t == TIMES[type(process)][1]:  # references of every class would be a bias
                assert worst(expectation(dropped, by_class[1]), by_class[1] @ POINTS) > 0.01


def mean_over(reference_sets, x_t, sigma):
    """Posterior means (len(sets), 2) by the package, each over its own rows of POINTS (repeats allowed)."""
    sigma = torch.tensor([sigma], dtype=torch.float64)
    return torch.stack([posterior_mean(x_t[None], POINTS[s], alpha=1.0, sigma=sigma).mean[0] for s in reference_sets])


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_the_traps_are_biases(sigma):
    """The source left out, counted twice, or added to a fixed subset: biases clearly above 0.01; otherwise none."""
    x_t, one = QUERIES[0], torch.tensor(1.0, dtype=torch.float64)
    weights = full_posterior(x_t, one, one * sigma)
    exact = weights @ POINTS

    def bias(sets_of):
        targets = [mean_over(sets_of(s), x_t, sigma).mean(0) for s in range(6)]
        return (weights @ torch.stack(targets) - exact).norm().item()

    def others(source, n):
        return [list(o) for o in combinations([i for i in range(6) if i != source], n)]

    assert bias(lambda s: [[s, *o] for o in others(s, 2)]) < 1e-12
    assert bias(lambda s: others(s, 3)) > 0.05  # left out
    assert bias(lambda s: [[*range(6), s]]) > 0.01  # the whole data set and the source once more
    assert bias(lambda s: [list({0, 1, 2, s})]) > 0.01  # a fixed subset, and the source
    assert bias(lambda s: [list(range(6))]) < 1e-12  # the whole data set, the source once


# ---- variance, by enumeration


@pytest.mark.parametrize("x_t", QUERIES, ids=str)
@pytest.mark.parametrize("sigma", [0.4, 1.0, 4.0])
def test_variance_falls_with_every_reference(sigma, x_t):
    """Var(target | x_t) is strictly decreasing in n, from V_DSM at n = 1 to 0 at n = N (Rao-Blackwell)."""
    one = torch.tensor(1.0, dtype=torch.float64)
    weights = full_posterior(x_t, one, one * sigma)
    exact = weights @ POINTS
    variances = []
    for n in range(1, 7):
        means = mean_over(sets(n), x_t, sigma)
        # P(set | x_t) = sum over its members of w_s / C(5, n - 1)
        probability = torch.stack([weights[s].sum() for s in sets(n)])
        probability /= probability.sum()
        variances.append((probability @ (means - exact).square().sum(1)).item())
    v_dsm = (weights @ (POINTS - exact).square().sum(1)).item()
    assert variances[0] == pytest.approx(v_dsm, rel=1e-12)
    assert variances[5] < 1e-24
    assert all(later < 0.999 * earlier for earlier, later in pairwise(variances)), variances


# ---- Gaussian data, where everything has a closed form
#
# x0 ~ N(mu, s² I): Var(x0 | x_t) = v = s² sigma² / (alpha² s² + sigma²), E[x0 | x_t] = mu + alpha v (x_t - alpha mu) / sigma²,
# and y given x_t is (a - b alpha / sigma) x0 plus what x_t fixes: the least DSM loss is (a - b alpha / sigma)² v.

MU, S = torch.tensor([0.4, -0.3, 0.1]).double(), 0.6


def gaussian_data(count, seed):
    return (MU + S * normal(count, 3, seed=seed, dtype=torch.float64)).float()


def analytic_network(process, prediction_type, model_input, t):
    """The optimal network: it sees its input and the time alone. Returns its output and the least loss, per row."""
    alpha, sigma, a, b = (rows(c, model_input) for c in coefficients(process, prediction_type, t))
    x_t = model_input.double() / rows(process.input_scale(t.double()), model_input)
    v = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2)
    x0 = MU + alpha * v * (x_t - alpha * MU) / sigma**2
    return a * x0 + b * (x_t - alpha * x0) / sigma, (a - b * alpha / sigma) ** 2 * v


GAUSSIAN = [
    (EDM(p_mean=0.0), None),
    (EDM(p_mean=0.0), "sample"),
    (EDM(p_mean=0.0), "score"),
    (VE(sigma_min=0.1, sigma_max=20.0), None),
    (VP(), None),
    (VP(), "v_prediction"),
    (VP(), "sample"),
    (FlowMatching(), None),
    (FlowMatching("logit_normal"), "epsilon"),
    (PROCESSES["DDPM"], None),
    (PROCESSES["DDPM v"], None),
    (PROCESSES["Euler"], None),
    (PROCESSES["Euler v"], None),
    (PROCESSES["EDM-Euler"], None),
    (PROCESSES["FlowMatch"], None),
]
gaussian = pytest.mark.parametrize(("process", "prediction_type"), GAUSSIAN, ids=str)


@gaussian
def test_analytic_network_has_the_loss_of_theory(process, prediction_type):
    """Errors over theory's variance are chi-square with one degree of freedom, over the process's own times: |z| < 4."""
    x0 = gaussian_data(20_000, seed=0)
    objective = STFTrainingObjective(process, prediction_type)
    batch = objective.perturb(x0, generator=seeded(1))
    output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
    informative = (least > 1e-8).squeeze(1)  # where rounding is not what is left
    ratio = ((output - batch.target) ** 2 / least)[informative]
    assert ratio.numel() > 40_000
    z = (ratio.mean() - 1) * (ratio.numel() / 2) ** 0.5
    assert abs(z) < 4, z.item()


@pytest.mark.parametrize(("process", "prediction_type", "time"), [
    (EDM(), None, 1.0), (EDM(), "sample", 3.0), (VE(), None, 1.0), (VP(), None, 0.4), (VP(), "v_prediction", 0.5),
    (FlowMatching(), None, 0.5), (PROCESSES["DDPM"], None, 400),
], ids=str)  # fmt: skip
def test_loss_at_one_time_and_its_fall_with_references(process, prediction_type, time):
    """The scalar loss is theory's to |z| < 4 for DSM, and falls towards 0 with the references at the rate of n."""
    t = torch.full((4096,), time)
    objective = STFTrainingObjective(process, prediction_type)
    losses = {}
    for n in (1, 16, 256, 4096):
        size = 2048 if n == 1 else 8
        total, repeats = 0.0, 2 if n == 1 else 64
        for repeat in range(repeats):
            reference = gaussian_data(max(n, size), seed=1000 * n + repeat)
            batch = objective.perturb(
                reference[:size], reference=None if n == 1 else reference, t=t[:size], generator=seeded(repeat)
            )
            output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
            total += objective.loss(output.float(), batch).item() / repeats
        losses[n] = total / least[0].item()
    assert abs(losses[1] - 1) < 4 * (2 / (2 * 2048 * 3)) ** 0.5, losses
    assert losses[16] < 0.8 and losses[256] < 0.25 * losses[16] and losses[4096] < 0.25 * losses[256], losses
    assert losses[4096] < 0.01, losses


@gaussian
def test_analytic_network_is_the_minimiser(process, prediction_type):
    """The gradient of a constant offset is 0 in the mean over batches, |z| < 4, with STF; of an offset network it is not.

    The references of a batch are shared by its rows, so batches are the independent units. Rows are weighted by theory's
    standard deviation, since low noise and high noise differ by orders of magnitude.
    """
    objective = STFTrainingObjective(process, prediction_type)
    gradients = []
    for seed in range(400):
        reference = gaussian_data(24, seed=seed)
        batch = objective.perturb(reference[:8], reference=reference, generator=seeded(seed))
        output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
        gradients.append(((output - batch.target) / (least.sqrt() + 1e-3)).mean(0))
    gradients = torch.stack(gradients)
    z = gradients.mean(0) / (gradients.std(0) / 20)
    assert z.abs().max() < 4, z
    assert ((gradients.mean(0) + 0.1) / (gradients.std(0) / 20)).min() > 4


def test_a_training_run_with_sampler_and_collator_is_unbiased():
    """ReferenceBatchSampler -> collator -> objective: target minus full posterior mean is 0 in the mean, |z| < 4.

    And uncorrelated with x_t; the same run without the sources among the references is far off.
    """
    data = normal(60, 2, seed=3)
    full = data.double()
    sampler, collate = ReferenceBatchSampler(60, batch_size=4, reference_batch_size=10), ReferenceBatchCollator(4)
    objective, generator = STFTrainingObjective(EDM(), "sample"), seeded(0)
    moments = {"stf": [], "without sources": []}
    for _ in range(100):
        for indices in sampler:
            batch = collate([{"images": data[i]} for i in indices])
            clean, reference = batch["images"], batch["reference_images"]
            perturbed = objective.perturb(clean, reference=reference, t=torch.full((4,), 1.0), generator=generator)
            exact = posterior(perturbed.noisy, full, perturbed.alpha, perturbed.sigma)[1]
            biased = posterior(perturbed.noisy, reference[4:], perturbed.alpha, perturbed.sigma)[1]
            for name, target in (("stf", perturbed.target), ("without sources", biased)):
                error = target.double() - exact
                moments[name].append(torch.cat([error.mean(0), (error * perturbed.noisy).mean(0)]))
    z = {}
    for name, values in moments.items():
        values = torch.stack(values)
        z[name] = (values.mean(0) / (values.std(0) / len(values) ** 0.5)).abs().max().item()
    assert z["stf"] < 4 < 10 < z["without sources"], z
