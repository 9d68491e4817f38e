"""The vote of nearest neighbours against scikit-learn's KNeighborsClassifier, with cosine distances."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from vlm.recognition import nearest_neighbours
from vlm.recognition.nearest_neighbours import vote


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    features, queries = (F.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (50, 30))
    return features, torch.arange(50) % 7, queries


@pytest.mark.parametrize("k", [1, 5, 50])
def test_shares_of_votes_are_scikit_learns(vectors, monkeypatch, k):
    monkeypatch.setattr(nearest_neighbours, "QUERIES_AT_ONCE", 8)  # so that the last part is smaller
    features, targets, queries = vectors
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
    expected = theirs.fit(features.numpy(), targets.numpy()).predict_proba(queries.numpy())
    votes = vote(features, targets, queries, 7, k=k)
    np.testing.assert_allclose(votes / votes.sum(dim=-1, keepdim=True), expected, atol=1e-4)


def test_near_ones_outvote_many():
    """At temperature 0.07 a cosine of 1 has exp(0.5 / 0.07) = 1,265 times the vote of one of 0.5; hot, two beat one."""
    features = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])
    targets, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    votes = vote(features, targets, query, 2, k=3)[0]
    assert float(votes[0] / votes[1]) == pytest.approx(1264.6 / 2, rel=1e-3)
    assert vote(features, targets, query, 2, k=3, temperature=10.0).argmax() == 1


@pytest.mark.parametrize("k", [0, 51])
def test_a_k_beyond_the_images_is_refused(vectors, k):
    features, targets, queries = vectors
    with pytest.raises(ValueError, match=f"k is {k}, and there are 50 images"):
        vote(features, targets, queries, 7, k=k)
