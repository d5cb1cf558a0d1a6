"""Ridge regression: as scikit-learn's, and its predictions without a group as if it had been fitted again."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Reference
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score, r2_score

from terratorch_simpler.functional.ridge import Ridge
from terratorch_simpler.functional.scores import MOST_SUBSETS, jackknife, jackknife_errors, score_predictions

STRENGTHS = [1e-3, 1.0, 100.0]


def problem(rows, width, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator) * torch.logspace(-1, 1, width) + 3
    targets = torch.randn(rows, 3, generator=generator) + features[:, :3]
    return features, targets, torch.randint(0, groups, (rows,), generator=generator)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_predictions_are_those_of_scikit_learn(strength):
    features, targets, _ = problem(50, 9, 4)
    ridge = Ridge.fit(features, targets)
    reference = Reference(ridge.penalty(strength)).fit(features.double().numpy(), targets.double().numpy())
    new = torch.randn(7, 9)
    np.testing.assert_allclose(ridge.predict(new, strength), reference.predict(new.double().numpy()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rows", "width", "groups"), [(60, 5, 3), (60, 80, 4), (40, 6, 40), (30, 4, 2)])
def test_leaving_a_group_out_equals_fitting_again(rows, width, groups):
    features, targets, group = problem(rows, width, groups)
    ridge = Ridge.fit(features, targets)
    closed = ridge.leave_group_out(features, targets, group, STRENGTHS)
    for strength, predictions in zip(STRENGTHS, closed, strict=True):
        for number in group.unique():
            out = group == number
            again = Reference(ridge.penalty(strength), solver="svd").fit(features[~out].double(), targets[~out].double())
            np.testing.assert_allclose(predictions[out], again.predict(features[out].double()), rtol=1e-6, atol=1e-7)


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    predictions = 4 * torch.randn(90, 4, generator=generator).double()
    classes = torch.randint(0, 4, (90,), generator=generator)
    one_hot = torch.eye(4).double()[classes]
    predicted = predictions.argmax(dim=1)
    labels = torch.randint(0, 2, (90, 4), generator=generator).double()
    for kind, targets, expected in (
        ("segmentation", one_hot, jaccard_score(classes, predicted, average="macro")),
        ("classification", one_hot, accuracy_score(classes, predicted)),
        ("multilabel", labels, average_precision_score(labels, predictions, average="macro")),
        ("regression", predictions[:, :1] + 1, r2_score(predictions[:, 0] + 1, predictions[:, 0])),
    ):
        assert score_predictions(kind, predictions, targets) == pytest.approx(expected, abs=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    left_out = jackknife(lambda rows: float(values[rows].mean()), torch.arange(20))
    assert float(jackknife_errors(left_out)) == pytest.approx(float(values.std() / 20**0.5))


def test_many_groups_are_left_out_together():
    calls = []
    jackknife(lambda rows: calls.append(int(rows.sum())) or 0.0, torch.arange(100))
    assert len(calls) == MOST_SUBSETS
    assert min(calls) == 96


@pytest.mark.parametrize("period", [2, 8, 32])
def test_the_error_does_not_depend_on_an_order_that_repeats(period):
    """Groups come as classes in turn, or in rows of a grid: a subset must not be all of one kind."""
    kind = torch.arange(960) % period
    values = kind.double() + torch.randn(960, generator=torch.Generator().manual_seed(0)).double() / 10
    left_out = jackknife(lambda rows: float(values[rows].mean()), torch.arange(960))
    assert float(jackknife_errors(left_out)) == pytest.approx(float(values.std() / 960**0.5), rel=0.4)


def test_r2_does_not_depend_on_the_unit():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(50, 1, generator=generator).double()
    predictions = values + torch.randn(50, 1, generator=generator).double()
    expected = r2_score(values[:, 0], predictions[:, 0])
    for unit in (1e-12, 1e-4, 1.0, 1e9):
        for offset in (0, 100 * unit):
            found = score_predictions("regression", unit * predictions + offset, unit * values + offset)
            assert found == pytest.approx(expected, abs=1e-6)
    assert score_predictions("regression", predictions, torch.ones(50, 1).double()) == 0
    assert score_predictions("regression", predictions[:1], values[:1]) == 0


def test_labels_that_do_not_occur_are_left_out_of_map():
    generator = torch.Generator().manual_seed(3)
    predictions, labels = torch.randn(40, 3, generator=generator).double(), torch.zeros(40, 3).double()
    labels[:, :2] = torch.randint(0, 2, (40, 2), generator=generator)
    expected = average_precision_score(labels[:, :2], predictions[:, :2], average="macro")
    assert score_predictions("multilabel", predictions, labels) == pytest.approx(expected, abs=1e-6)
    assert score_predictions("multilabel", predictions, torch.zeros(40, 3)) == 0
