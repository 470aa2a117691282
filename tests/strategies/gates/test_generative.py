"""The generative classifier, against a model whose likelihood has a closed form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError, DataError
from bpn_lightning.strategies.gates.generative import (
    GenerativeClassifier,
    fit_autoencoder,
    joint_ratio,
    log_likelihood,
)

WIDTH, LATENT, VARIANCE = 6, 2, 0.5


def linear_gaussian(widened: float = 1.0) -> tuple[dict[str, Tensor], Any]:
    """An autoencoder without hidden layers, and its marginal N(b, W W^T + s^2 I).

    The columns of W are orthogonal, so that the exact posterior has independent dimensions: it is the encoder, with
    standard deviations ``widened`` times as large.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(WIDTH, LATENT, generator=generator)).Q * torch.tensor(
        [2.0, 1.0]
    )
    b = torch.randn(WIDTH, generator=generator)
    posterior = 1 / (1 + (w**2).sum(0) / VARIANCE)
    back = posterior[:, None] * w.T / VARIANCE
    weights = {
        "log_variance": torch.tensor(math.log(VARIANCE)),
        "decoder0.weight": w,
        "decoder0.bias": b,
        "encoder0.weight": torch.cat([back, torch.zeros(LATENT, WIDTH)]),
        "encoder0.bias": torch.cat([-back @ b, posterior.log() + 2 * math.log(widened)]),
    }
    covariance = (w @ w.T + VARIANCE * torch.eye(WIDTH)).numpy()
    return weights, multivariate_normal(b.numpy(), covariance)


def drawn(marginal: Any, number: int) -> Tensor:
    return torch.tensor(marginal.rvs(number, random_state=np.random.default_rng(1))).float()


def test_with_the_exact_posterior_one_sample_gives_the_marginal_likelihood() -> None:
    weights, marginal = linear_gaussian()
    features = drawn(marginal, 50)
    found = log_likelihood(weights, features, torch.randn(1, LATENT))
    assert found.numpy() == pytest.approx(marginal.logpdf(features.numpy()), abs=1e-3)


def test_importance_sampling_converges_to_the_marginal_likelihood() -> None:
    weights, marginal = linear_gaussian(widened=1.5)
    features = drawn(marginal, 40)
    exact = torch.tensor(marginal.logpdf(features.numpy()))
    generator = torch.Generator().manual_seed(2)
    errors = []
    for samples in (10, 1000, 100_000):
        noise = torch.randn(samples, LATENT, generator=generator)
        errors.append(float((log_likelihood(weights, features, noise) - exact).abs().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01
    bound = joint_ratio(weights, features, torch.randn(10_000, 1, LATENT, generator=generator))
    assert (bound.mean(0) < exact).all(), "the evidence lower bound is one"


def test_training_comes_close_to_the_likelihood_of_the_distribution_that_made_the_data() -> None:
    _, marginal = linear_gaussian()
    train, test = drawn(marginal, 4000)[:3000], drawn(marginal, 4000)[3000:]
    generator = torch.Generator().manual_seed(0)
    weights = fit_autoencoder(train, [], LATENT, 1500, 128, 0.01, generator)
    noise = torch.randn(200, LATENT, generator=generator)
    found = float(log_likelihood(weights, test, noise).mean())
    assert found == pytest.approx(float(marginal.logpdf(test.numpy()).mean()), abs=0.1)


def digits(**arguments: Any) -> GenerativeClassifier:
    small = {"hidden": (32,), "updates": 150, "importance_samples": 20, "modes": 0}
    return GenerativeClassifier(**{**small, **arguments})


@pytest.mark.slow
def test_it_knows_the_digits_without_the_task_and_forgets_nothing(fit: Any) -> None:
    seen: list[Tensor] = []

    class Watched(GenerativeClassifier):
        def on_task_end(self, host: Any, task: Any) -> None:
            super().on_task_end(host, task)
            inputs = next(iter(host.gate_batches(0, "test"))).inputs.flatten(1)
            seen.append(self.log_scores(inputs)[:, :2])

    stream = SplitDigits(num_tasks=5, epochs_per_task=1, seed=0)
    gate = Watched(hidden=(32,), updates=150, importance_samples=20, modes=0)
    module, _ = fit([gate], stream=stream)
    assert all(torch.equal(one, seen[0]) for one in seen)
    summary = module.accuracy_matrix.summary()
    assert summary["task_agnostic"]["average"] > 0.9
    assert summary["average"] > 0.98
    assert gate.declared_bytes(module.host).inference == sum(v.nbytes for v in gate.rows.values())


@pytest.mark.slow
def test_a_front_and_strategies_beside_it_change_nothing_of_what_it_is_asked(fit: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0)
    alone, beside = digits(), digits()
    fit([alone], stream=stream)
    from bpn_lightning.strategies import FineTuning

    stream = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0)
    fit([FineTuning(), beside], stream=stream)
    assert alone.rows.keys() == beside.rows.keys()
    assert all(torch.equal(alone.rows[key], beside.rows[key]) for key in alone.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": ()}, "at least one layer"),
        ({"hidden": (0,)}, "hidden to be a whole number of at least 1, but got 0"),
        ({"latent": 0}, "latent to be"),
        ({"updates": 0}, "updates to be"),
        ({"batch_size": 0.5}, "batch_size to be"),
        ({"importance_samples": 0}, "importance_samples to be"),
        ({"lr": 0.0}, "lr to be a positive number"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GenerativeClassifier(**arguments)


def test_it_is_asked_after_it_has_learned_and_of_the_same_features() -> None:
    gate = digits()
    with pytest.raises(ConfigurationError, match="before any was"):
        gate.log_scores(torch.zeros(1, 4))
    gate.rows = {"log_variance": torch.zeros(1)}
    gate.row_tasks, gate.row_columns, gate.inputs = [0], [0], 4
    with pytest.raises(DataError, match=r"shape \(n, 4\)"):
        gate.log_scores(torch.zeros(1, 5))
    with pytest.raises(CheckpointError, match="1 autoencoders of 4 features"):
        digits().load_state_dict(gate.state_dict())
