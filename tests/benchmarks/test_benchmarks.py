"""What the benchmarks compute themselves: who wins, by how much, and the same answers as turns."""

import numpy as np
import pytest

from benchmarks.run import Claim, Group, Side, row_of, table
from benchmarks.trees_and_turns import interval
from benchmarks.workload import Shape, as_turns
from vlm.data.example import Example, question_and_answer

SHAPE = Shape("captions", images=2, answers=5)


def measured(ours, peer):
    return {"shape": vars(SHAPE), "results": {"ours": ours, "peer": peer}, "chosen": {"ours": {}, "peer": {"size": 2}}}


def test_a_claim_is_the_median_of_neighbours():
    """10 answers in 1, 2 and 5 s are 10, 5 and 2 answers a second; in 10 s each they are 1."""
    ours = [{"seconds": s, "peak": 1e9} for s in (1, 2, 5)]
    peer = [{"seconds": s, "peak": 2e9} for s in (10, 10, 10)]
    row = row_of(Claim("speed", "ours", "peer", "6"), measured(ours, peer))
    assert row == "| speed | 5.00 answers/s | 1.00 answers/s | 5.00 (2.00 to 10.00) | 6 |"
    row = row_of(Claim("memory", "ours", "peer", "0.6", "peak"), measured(ours, peer))
    assert row == "| memory | 1.00 GB | 2.00 GB | 0.50 (0.50 to 0.50) | 0.6 |"


def test_a_group_that_was_not_run_is_not_in_the_table():
    groups = [Group(name, SHAPE, [Side("ours", "ours")], [Claim("c", "ours", "peer", "1")]) for name in ("a", "b")]
    text = table(groups, {"a": measured([{"seconds": 1, "peak": 1}], [{"seconds": 1, "peak": 1}])})
    assert "**a**" in text
    assert "**b**" not in text
    assert "peer size 2." in text


def test_turns_show_the_image_once():
    branches = tuple(question_and_answer(q, a) for q, a in (("red?", "yes"), ("blue?", "no")))
    (whole,) = as_turns(Example(("one.png",), branches, "one", "row 1")).branches
    assert [m["role"] for m in whole.messages] == ["user", "assistant"] * 2
    assert [[part["type"] for part in m["content"]] for m in whole.messages] == [["image", "text"], *[["text"]] * 3]
    assert whole.messages[2]["content"][0]["text"] == "blue?"


def test_an_interval_takes_whole_images():
    """Each image has one right and one wrong answer, so that every resample of images has the same mean."""
    scores = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=float)
    assert interval([scores]) == (0.5, 0.5, 0.5)
    uneven = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=float)
    mean, low, high = interval([uneven])
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert interval([uneven, uneven])[0] == pytest.approx(0.5)
