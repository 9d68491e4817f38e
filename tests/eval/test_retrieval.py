"""Recall both ways against scikit-learn and by hand, and that of a random order against random orders."""

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import top_k_accuracy_score

from vlm.eval.retrieval import by_chance, nearest_texts, recall, show, summarize

RIGHT = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=bool)  # two texts of the first image


def test_recall_is_top_k_accuracy_both_ways() -> None:
    scores = np.random.default_rng(0).normal(size=(40, 40)) + 2 * np.eye(40)
    found = recall(scores, np.eye(40, dtype=bool))
    for name, matrix in (("image_to_text", scores), ("text_to_image", scores.T)):
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(np.arange(40), matrix, k=k)
            assert found[f"{name}_r{k}"].value == pytest.approx(expected)
            assert found[f"{name}_r{k}"].low <= expected <= found[f"{name}_r{k}"].high


def test_one_of_several_texts_is_enough() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.0], [0.3, 0.8, 0.5, 0.0], [0.0, 0.9, 0.1, 0.2]])
    found = recall(scores, RIGHT)
    assert found["image_to_text_r1"].value == pytest.approx(1 / 3)  # the first image, by its second text
    assert found["text_to_image_r1"].value == pytest.approx(1 / 4)  # the last text; two are ties or lost, one is beaten
    assert found["image_to_text_r5"].value == found["text_to_image_r5"].value == 1


def test_the_recall_of_a_random_order_is_that_of_random_orders() -> None:
    right = np.zeros((30, 60), dtype=bool)
    right[np.arange(60) // 2, np.arange(60)] = True
    right[3, :7] = True
    rng = np.random.default_rng(1)
    drawn = [recall(rng.random(right.shape), right) for _ in range(150)]
    for name, chance in by_chance(right).items():
        assert np.mean([each[name].value for each in drawn]) == pytest.approx(chance, abs=0.02)


def test_summary_page_rows_and_table() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.0], [0.3, 0.8, 0.5, 0.0], [0.0, 0.9, 0.1, 0.2]])
    rows = nearest_texts(scores, RIGHT, ["a", "b", "c", "d"])
    assert [(row["prediction"], row["references"], row["scores"]) for row in rows] == [
        ("b", ["a", "b"], {"place": 1}),
        ("b", ["c"], {"place": 2}),
        ("b", ["d"], {"place": 2}),
    ]
    summary = summarize(scores, RIGHT)
    assert summary["metrics"]["image_to_text_r1"]["blind_score"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert summary["metrics"]["image_to_text_r5"]["blind_score"] == 1.0  # there are four texts in all
    console = Console(record=True, width=100)
    show(summary, console)
    assert "3 images and 4 texts" in console.export_text()
