"""The linear probe against scikit-learn's LogisticRegression, which minimises the same in another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from vlm.recognition import linear_probe
from vlm.recognition.linear_probe import choose_c, fit, fit_chosen


def clouds(num_labels=4, images=60, width=10, seed=0, spread=1.0):
    """Unit vectors around a direction for each label, which overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_labels, width, generator=generator)
    targets = torch.arange(images) % num_labels
    features = centres[targets] + spread * torch.randn(images, width, generator=generator) + 2.0
    return F.normalize(features, dim=-1), targets


@pytest.mark.parametrize("strength", [1e-6, 0.01, 1.0, 100.0])
def test_the_optimum_is_scikit_learns(strength):
    features, targets = clouds()
    found = fit(features, targets, 4, strength)
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), targets.numpy())
    assert found.converged
    np.testing.assert_allclose(found.weight, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    expected = theirs.predict_proba(features.double().numpy())
    np.testing.assert_allclose(found.scores(features).softmax(dim=-1), expected, atol=1e-4)


def test_two_labels_are_scikit_learns_with_twice_the_c():
    features, targets = clouds(num_labels=2)
    theirs = LogisticRegression(C=6.0, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), targets.numpy())
    expected = theirs.predict_proba(features.double().numpy())
    np.testing.assert_allclose(fit(features, targets, 2, 3.0).scores(features).softmax(dim=-1), expected, atol=1e-4)


def test_the_optimum_of_one_number_by_hand():
    """One image at +1 and one at -1: by symmetry the weights are w and -w, and the objective 2 C log(1 + exp(-2 w)) +
    w^2 has no slope at w = 2 C / (1 + exp(2 w)), which is 1 for C = (1 + e^2) / 2."""
    features, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    found = fit(features, targets, 2, (1 + np.e**2) / 2)
    torch.testing.assert_close(found.weight.flatten(), torch.tensor([1.0, -1.0]).double(), atol=1e-4, rtol=0)


def test_where_it_begins_changes_nothing():
    features, targets = clouds()
    begun = fit(features, targets, 4, 1.0, start=fit(features, targets, 4, 1e4))
    torch.testing.assert_close(begun.weight, fit(features, targets, 4, 1.0).weight, atol=1e-3, rtol=1e-3)


def test_what_stopped_too_early_says_so(monkeypatch):
    monkeypatch.setattr(linear_probe, "ITERATIONS", 2)
    assert not fit(*clouds(), 4, 100.0).converged


def test_a_label_without_images_is_refused():
    features, targets = clouds()
    with pytest.raises(ValueError, match="label 4 has no image"):
        fit(features, targets, 5, 1.0)


def test_no_other_c_is_right_more_often():
    """Against every eighth of a power of ten, in a landscape with one peak."""
    features, targets = clouds(images=80, spread=3.0, width=40)
    validation, validation_targets = clouds(images=200, spread=3.0, width=40)  # the same centres and more images
    chosen = choose_c(features, targets, validation, validation_targets, 4)
    assert np.log10(chosen) * 8 == pytest.approx(round(np.log10(chosen) * 8))

    def measured(strength):
        scores = fit(features, targets, 4, strength).scores(validation)
        right = (scores.argmax(dim=-1) == validation_targets).double().mean()
        return float(right), -float(F.cross_entropy(scores, validation_targets))

    best, lost = measured(chosen)
    coarse = [measured(10.0**n) for n in range(-6, 7, 2)]
    assert (best, lost) >= max(coarse)
    assert (best, lost) >= max(measured(chosen * 10**step) for step in (-0.125, 0.125))


def test_the_last_fit_has_all_images_and_the_chosen_c(monkeypatch):
    features, targets = clouds()
    seen = []

    def chosen(learn, learn_targets, check, check_targets, num_labels):
        seen.append((len(learn), len(check), sorted(check_targets.tolist())))
        rows = {tuple(row) for row in features.tolist()}
        assert {tuple(row) for row in torch.cat([learn, check]).tolist()} == rows
        return 0.5

    monkeypatch.setattr(linear_probe, "choose_c", chosen)
    found = fit_chosen(features, targets, 4)
    assert seen == [(48, 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])]  # a fifth of 15 images of each label
    torch.testing.assert_close(found.weight, fit(features, targets, 4, 0.5).weight)
    assert found.c == 0.5
