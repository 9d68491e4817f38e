"""Vectors in faiss against numpy's inner products with all of them."""

import sys

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.retrieval import vectors as module
from vlm.retrieval.vectors import VectorIndex


def unit(count, seed, dimension=24):
    """Vectors round ten centres, as those of images are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((10, dimension))
    drawn = centres[rng.integers(10, size=count)] + 0.5 * rng.standard_normal((count, dimension))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def brute_force(stored, query, k):
    """Scores and numbers of the nearest of `stored`, a dictionary of vectors by number."""
    numbers = np.array(list(stored))
    scores = np.stack(list(stored.values())).astype(np.float64) @ query
    best = np.argsort(-scores)[:k]
    return scores[best], numbers[best]


def check(index, stored, *, k=7, exact=False):
    assert len(index) == len(stored)
    for query in unit(20, seed=5):
        scores, numbers = index.search(query, k, exact=exact)
        wanted_scores, wanted = brute_force(stored, query, k)
        assert numbers.tolist() == wanted.tolist()
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)


def test_order_is_that_of_brute_force_through_adding_and_removing(tmp_path):
    index, stored = VectorIndex(24), {}
    for start in (0, 100, 160):
        added = unit(40, seed=start)
        index.add(np.arange(start, start + 40), added)
        stored |= dict(zip(range(start, start + 40), added, strict=True))
        gone = [start, start + 7]
        index.remove(np.array(gone))
        stored = {number: vector for number, vector in stored.items() if number not in gone}
        check(index, stored)
    index.write(tmp_path / "v")
    for mapped in (True, False):
        check(VectorIndex.read(tmp_path / "v", mapped=mapped), stored)


def test_fewer_vectors_than_asked_for_and_none():
    index = VectorIndex(24)
    assert [len(found) for found in index.search(unit(1, 0)[0], 5)] == [0, 0]
    index.add(np.array([4, 2, 9]), unit(3, 0))
    scores, numbers = index.search(unit(1, 1)[0], 5)
    assert len(scores) == 3
    assert sorted(numbers) == [2, 4, 9]


def test_many_vectors_are_in_lists_and_all_lists_together_are_exact(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "EXACT", 100)
    monkeypatch.setattr(module, "PROBES", 4)
    index, stored, lists = VectorIndex(24), {}, []
    for start in range(0, 2000, 250):
        added = unit(250, seed=start)
        index.add(np.arange(start, start + 250), added)
        index.remove(np.array([start + 3]))
        stored |= dict(zip(range(start, start + 250), added, strict=True))
        del stored[start + 3]
        lists.append(index.lists)
        assert len(index) / 1.5**2 <= lists[-1] ** 2 <= 1.5**2 * len(index)  # about sqrt(N) of them, always
    assert len(set(lists)) >= 3, "made anew as it grew"
    index.write(tmp_path / "v")
    read = VectorIndex.read(tmp_path / "v", mapped=True)
    check(read, stored, exact=True)
    found = 0
    for query in unit(50, seed=6):
        scores, numbers = read.search(query, 10)
        np.testing.assert_allclose(scores, [stored[number] @ query for number in numbers], atol=1e-6)
        found += len({*numbers} & {*brute_force(stored, query, 10)[1]})
    assert 250 < found < 500, "a few of 45 lists find most, not all"


def test_it_is_the_same_each_time_it_is_built(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 100)
    monkeypatch.setattr(module, "PROBES", 2)
    built = [VectorIndex(24), VectorIndex(24)]
    for index in built:
        index.add(np.arange(900), unit(900, seed=0))
    for query in unit(20, seed=1):
        one, other = (index.search(query, 10)[1].tolist() for index in built)
        assert one == other


def test_a_damaged_file_is_said_to_be_one(tmp_path):
    index = VectorIndex(24)
    index.add(np.arange(50), unit(50, 0))
    index.write(tmp_path / "v")
    (tmp_path / "v").write_bytes((tmp_path / "v").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"v is damaged .*make the index anew"):
        VectorIndex.read(tmp_path / "v", mapped=False)


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "vlm.retrieval.vectors")
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        import vlm.retrieval.vectors  # noqa: F401
