"""Images to learn from and to test on: counts by hand, and what holds for any labels."""

from collections import Counter

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from vlm.errors import UserError
from vlm.recognition.splits import given, split, stratified_split


@settings(max_examples=100, deadline=None)
@for_all(
    st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(0, 9), st.integers(1, 3)
)
def test_each_label_has_its_share(targets, share, seed, stay):
    learn, held_out = stratified_split(targets, share, seed, stay=stay)
    assert sorted(learn + held_out) == list(range(len(targets)))
    assert learn == sorted(learn)
    for label, count in Counter(targets).items():
        held = sum(targets[i] == label for i in held_out)
        if count <= stay:
            assert held == 0
        else:
            assert 1 <= held <= count - stay
            assert abs(held - share * count) <= 0.5 or held in (1, count - stay)


def test_the_seed_draws():
    targets = [0, 1] * 20
    drawn = [stratified_split(targets, 0.25, seed)[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Counter(targets[i] for i in drawn[0]) == {0: 5, 1: 5}


def images(**counts):
    return {f"{label}/{n}.png": label for label, count in counts.items() for n in range(count)}


def test_labels_with_too_few_images_are_left_out_by_name():
    parts = split(images(cat=10, dog=5, pair=2, one=1, three=3), 0.2, 0)
    assert parts.labels == ["cat", "dog", "three"]
    assert Counter(parts.train.values()) == {0: 8, 1: 4, 2: 2}
    assert Counter(parts.test.values()) == {0: 2, 1: 1, 2: 1}
    assert all(parts.labels[place] == name.split("/")[0] for name, place in (parts.train | parts.test).items())
    assert [line.split(",")[0] for line in parts.left_out] == ["label 'one': 1 image", "label 'pair': 2 images"]


def test_a_given_split_stays_and_what_was_not_learnt_is_left_out_of_both():
    test = {f"new/{name}": label for name, label in images(cat=3, new=2, rare=4).items()}
    parts = given(images(cat=2, dog=3, rare=1), test)
    assert parts.labels == ["cat", "dog"]
    assert Counter(parts.train.values()) == {0: 2, 1: 3}
    assert parts.test == {f"new/cat/{n}.png": 0 for n in range(3)}
    assert parts.left_out == [
        "label 'new': 0 images to learn from, and it takes 2; 2 images to test on",
        "label 'rare': 1 image to learn from, and it takes 2; 4 images to test on",
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: split(images(cat=9, dog=2), 0.2, 0), "fewer than two labels can be learnt; label 'dog': 2 images"),
        (lambda: given(images(cat=9, dog=1), images(cow=1)), "fewer than two labels can be learnt"),
        (lambda: given(images(cat=9, dog=9), images(cow=1)), r"--test: no image has a label .* \(cat, dog"),
        (lambda: given(images(cat=9, dog=9), images(cat=1)), r"1 image in both --data and --test: cat/0\.png"),
    ],
)
def test_what_cannot_be_split_is_refused(parts, message):
    with pytest.raises(UserError, match=message):
        parts()
