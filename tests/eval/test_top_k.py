"""Top-k accuracy against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from vlm.eval.top_k import first_right, top_k


def test_with_one_right_candidate_it_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(60, 20)), rng.permuted(np.repeat(np.arange(20), 3))
    scores[np.arange(60), targets] += 1
    found = top_k(first_right(scores, np.eye(20, dtype=bool)[targets]), (1, 5, 10))
    for k, share in found.items():
        assert share.value == pytest.approx(top_k_accuracy_score(targets, scores, k=k))
        assert share.low < share.value < share.high
    assert found[1].value < found[5].value < found[10].value


def test_any_right_candidate_counts_and_a_tie_with_a_wrong_one_is_lost() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.1]])
    right = np.array([[True, True, False], [False, True, False]])
    assert first_right(scores, right).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        ([[np.nan]], [[True]], "NaN"),
        ([[1.0]], [[False]], "query 0 has no right candidate"),
        ([[1.0]], [[True, True]], "right ones"),
    ],
)
def test_it_refuses(scores: list[list[float]], right: list[list[bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_right(np.array(scores), np.array(right))
