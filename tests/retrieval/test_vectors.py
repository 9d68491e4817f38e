"""Vectors that are searched, against numpy's inner products with all of them."""

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


def check(index, stored, *, k=7):
    assert len(index) == len(stored)
    for query in unit(20, seed=5):
        scores, numbers = index.search(query, k)
        wanted_scores, wanted = brute_force(stored, query, k)
        assert numbers.tolist() == wanted.tolist()
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)


def written(index, stored, folder):
    """`index` as it comes back from the disk."""
    folder.mkdir()
    index.write(folder)
    return VectorIndex.read(folder, np.array(sorted(stored)))


def filled(count, *, each=250):
    """An index of about `count` vectors, filled step by step, in each of which one is removed, and what is in it."""
    index, stored = VectorIndex(24), {}
    for start in range(0, count, each):
        added = unit(each, seed=start)
        index.add(np.arange(start, start + each), added)
        index.remove(np.array([start + 3]))
        stored |= dict(zip(range(start, start + each), added, strict=True))
        del stored[start + 3]
    return index, stored


@pytest.fixture
def small(monkeypatch):
    """What is many thousands elsewhere is a hundred."""
    monkeypatch.setattr(module, "EXACT", 100)
    monkeypatch.setattr(module, "CANDIDATES", 100)
    monkeypatch.setattr(module, "CHUNK", 300)


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
    read = written(index, stored, tmp_path / "one")
    check(read, stored)
    read.remove(np.array([5]))
    read.add(np.array([900]), unit(1, seed=1))
    del stored[5]
    stored[900] = unit(1, seed=1)[0]
    check(read, stored)
    check(written(read, stored, tmp_path / "other"), stored)


def test_fewer_vectors_than_asked_for_and_none():
    index = VectorIndex(24)
    assert [len(found) for found in index.search(unit(1, 0)[0], 5)] == [0, 0]
    index.add(np.array([2, 4, 9]), unit(3, 0))
    scores, numbers = index.search(unit(1, 1)[0], 5)
    assert len(scores) == 3
    assert sorted(numbers) == [2, 4, 9]


def test_many_vectors_are_in_lists_of_codes(small, monkeypatch, tmp_path):
    index, stored = filled(500)
    lists = [index.lists]
    for start in range(500, 3000, 250):
        added = unit(250, seed=start)
        index.add(np.arange(start, start + 250), added)
        stored |= dict(zip(range(start, start + 250), added, strict=True))
        lists.append(index.lists)
        assert len(index) / 1.5**2 <= lists[-1] ** 2 <= 1.5**2 * len(index)  # about sqrt(N) of them, always
    assert len(set(lists)) >= 3, "made anew as it grew"
    read = written(index, stored, tmp_path / "index")
    monkeypatch.setattr(module, "READ", 0.05)
    found = 0
    for query in unit(50, seed=6):
        scores, numbers = read.search(query, 10)
        np.testing.assert_allclose(scores, [stored[number] @ query for number in numbers], atol=1e-6)
        found += len({*numbers} & {*brute_force(stored, query, 10)[1]})
    assert 250 < found < 500, "a few of the lists hold most, not all"
    monkeypatch.setattr(module, "READ", 1.0)
    monkeypatch.setattr(module, "CANDIDATES", len(stored))
    check(read, stored)


def test_what_is_removed_is_found_no_more_and_what_is_added_is(small, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "READ", 1.0)
    index, stored = filled(1000)
    read = written(index, stored, tmp_path / "one")
    for query in unit(30, seed=8):
        nearest = read.search(query, 1)[1]
        read.remove(nearest)
        del stored[int(nearest[0])]
        assert read.search(query, 1)[1][0] == brute_force(stored, query, 1)[1][0]
    new = unit(3, seed=9)
    read.add(np.arange(2000, 2003), new)
    stored |= dict(zip(range(2000, 2003), new, strict=True))
    again = written(read, stored, tmp_path / "other")
    assert len(again) == len(stored)
    assert [again.search(vector, 1)[1][0] for vector in new] == [2000, 2001, 2002]


def test_words_that_lie_apart_find_what_is_nearest(small):
    """Their nearest images are in any list: all differ from a query alike in what sets words apart."""
    index, stored = filled(2000)
    apart = np.eye(24, dtype=np.float32)[0]
    found = 0
    for query in unit(50, seed=6):
        words = 0.3 * query + 0.9 * apart
        found += len({*index.search(words, 10)[1]} & {*brute_force(stored, words, 10)[1]})
    assert found > 450


def test_it_is_the_same_each_time_it_is_built(small):
    built = [VectorIndex(24), VectorIndex(24)]
    for index in built:
        index.add(np.arange(900), unit(900, seed=0))
    for query in unit(20, seed=1):
        one, other = (index.search(query, 10)[1].tolist() for index in built)
        assert one == other


@pytest.mark.parametrize(("name", "length"), [("vectors.npy", 2000), ("vectors.npy", 40), ("codes.faiss", 500)])
def test_a_damaged_file_is_said_to_be_one(small, tmp_path, name, length):
    index, _ = filled(500)
    index.write(tmp_path)
    numbers = np.arange(len(index))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:length])
    with pytest.raises(UserError, match=r"is damaged .*make the index anew"):
        VectorIndex.read(tmp_path, numbers)


def test_more_or_fewer_vectors_than_numbers_are_refused(tmp_path):
    index, _ = filled(50, each=50)
    index.write(tmp_path)
    with pytest.raises(UserError, match="files and vectors are not as many"):
        VectorIndex.read(tmp_path, np.arange(50))


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "vlm.retrieval.vectors")
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        import vlm.retrieval.vectors  # noqa: F401
