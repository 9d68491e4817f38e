"""The contract of every metric in the registry, and its bootstrap against one done item by item."""

import numpy as np
import pytest

from vlm.eval import METRICS, bootstrap_interval, get_metric
from vlm.eval.metrics import Scores, mean

PREDICTIONS = ["a man on a red bike", "two dogs in the park", "", "a cat", "the bus is red", "a very big red bus"]
REFERENCES = [
    ["a man rides a red bike", "man on bike"],
    ["two dogs in the park"],
    ["a cat sits on a mat"],
    ["cat"],
    ["a red bus on the street", "the red bus"],
    ["A very big red bus."],
]
GROUPS = ["1", "1", "2", "3", "4", "4"]


@pytest.mark.parametrize("name", METRICS)
def test_contract(name: str) -> None:
    scores = METRICS[name](PREDICTIONS, REFERENCES)
    assert METRICS[name].name == name
    assert scores.per_item.shape == (6,)
    assert scores.per_item[2] == pytest.approx(0.0, abs=1e-6)
    assert 0 < scores.score < METRICS[name].best
    # what a perfect prediction can get, for the metrics where one item says it
    perfect = METRICS[name]([refs[0] for refs in REFERENCES], [refs[:1] for refs in REFERENCES])
    assert perfect.score == pytest.approx(METRICS[name].best, rel=1e-6) or name in ("bleu_4", "cider_d")
    assert perfect.score > scores.score


@pytest.mark.parametrize("name", METRICS)
def test_an_item_without_reference_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="item 1 has no reference"):
        METRICS[name](["a", "b"], [["a"], []])


@pytest.mark.parametrize("name", METRICS)
def test_bootstrap_equals_scoring_the_resampled_statistics_one_by_one(name: str) -> None:
    scores = METRICS[name](PREDICTIONS, REFERENCES)
    groups = np.array(GROUPS)
    rng = np.random.default_rng(3)
    drawn = np.concatenate([rng.integers(4, size=(64, 4)), rng.integers(4, size=(36, 4))])
    values = []
    for draw in drawn:
        rows = np.concatenate([np.flatnonzero(groups == str(group + 1)) for group in draw])
        values.append(float(scores.aggregate(scores.statistics[rows].sum(axis=0))))
    expected = np.percentile(values, [2.5, 97.5])
    np.testing.assert_allclose(bootstrap_interval(scores, GROUPS, resamples=100, seed=3), expected)


def test_bleu_of_a_resample_is_the_corpus_bleu_of_the_repeated_items() -> None:
    scores = METRICS["bleu_4"](PREDICTIONS, REFERENCES)
    rows = [0, 0, 5, 5, 5]
    direct = METRICS["bleu_4"]([PREDICTIONS[i] for i in rows], [REFERENCES[i] for i in rows]).score
    assert float(scores.aggregate(scores.statistics[rows].sum(axis=0))) == pytest.approx(direct, abs=1e-12)
    assert direct != pytest.approx(scores.per_item[rows].mean(), abs=1e-3)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        # 40 images with 5 items each that share their image's luck: resampling items would be far too sure
        items = np.repeat(rng.normal(0.5, 0.2, size=40), 5)
        scores = Scores(items, np.stack([items, np.ones_like(items)], axis=-1), mean)
        low, high = bootstrap_interval(scores, [str(i // 5) for i in range(200)], resamples=200, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_interval_is_seeded() -> None:
    scores = METRICS["rouge_l"](PREDICTIONS, REFERENCES)
    assert bootstrap_interval(scores, GROUPS, seed=1) == bootstrap_interval(scores, GROUPS, seed=1)


def test_unknown_metric_names_the_near_miss_and_all_names() -> None:
    with pytest.raises(ValueError, match=r"'cider'\. Did you mean 'cider_d'\?") as error:
        get_metric("cider")
    for name in METRICS:
        assert name in str(error.value)
