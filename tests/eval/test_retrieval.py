import numpy as np
import pytest

from vlm.eval.retrieval import first_right, recall_at


def test_one_right_candidate_is_counted_among_the_first_k_of_a_sort() -> None:
    similarity = np.random.default_rng(0).normal(size=(40, 40))
    recalls = recall_at(first_right(similarity, np.eye(40, dtype=bool)))
    order = np.argsort(-similarity, axis=1)
    for k, recall in recalls.items():
        assert recall.value == pytest.approx(np.mean([i in order[i, :k] for i in range(40)]))
        assert recall.low <= recall.value <= recall.high


def test_any_right_candidate_counts_and_a_tie_with_a_wrong_one_is_lost() -> None:
    similarity = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.1]])
    relevant = np.array([[True, True, False], [False, True, False]])
    assert first_right(similarity, relevant).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("similarity", "relevant", "message"),
    [
        ([[np.nan]], [[True]], "NaN"),
        ([[1.0]], [[False]], "query 0 has no right candidate"),
        ([[1.0]], [[True, True]], "relevant"),
    ],
)
def test_it_refuses(similarity: list[list[float]], relevant: list[list[bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_right(np.array(similarity), np.array(relevant))
