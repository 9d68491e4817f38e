"""Labelled images to learn from, and others to test on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.errors import UserError

LEARN = 2
"""Images of a label that it takes to learn from: one to fit a linear probe, one to choose its penalty by."""
SHOWN = 3


@dataclass(frozen=True)
class Parts:
    """Attributes:
    labels: those that can be learnt and tested, sorted.
    train: the place in `labels` of the label of each image to learn from, by the image's name.
    test: the same of each image that is held out.
    left_out: labels without the images that it takes, each as a line of text.
    """

    labels: list[str]
    train: dict[str, int]
    test: dict[str, int]
    left_out: list[str]


def stratified_split(targets: Sequence[int], share: float, seed: int, *, stay: int = 1) -> tuple[list[int], list[int]]:
    """The places in `targets` that stay, and those that are held out, each in order.

    Of each label `share` is held out, rounded, and one at the least; but `stay` of a label always stay.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(targets)
    held_out: set[int] = set()
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label)).tolist()
        held_out |= set(places[: max(0, min(max(1, round(share * len(places))), len(places) - stay))])
    return [i for i in range(len(labels)) if i not in held_out], sorted(held_out)


def split(images: Mapping[str, str], share: float, seed: int) -> Parts:
    """Hold out `share` of the images of each label; `images` are labels by the names of images. A label with fewer than
    three images is left out.

    Raises UserError if fewer than two labels are not.
    """
    counts = Counter(images.values())
    too_few = {label: count for label, count in counts.items() if count <= LEARN}
    names = [name for name, label in images.items() if label not in too_few]
    places = _places(images[name] for name in names)
    targets = [places[images[name]] for name in names]
    learn, held_out = stratified_split(targets, share, seed, stay=LEARN)
    return _parts(
        places,
        {names[i]: targets[i] for i in learn},
        {names[i]: targets[i] for i in held_out},
        [
            f"label {label!r}: {_images(count)}, and it takes {LEARN + 1}, {LEARN} to learn from and one to test on"
            for label, count in sorted(too_few.items())
        ],
    )


def given(train: Mapping[str, str], test: Mapping[str, str]) -> Parts:
    """The split that a data set comes with, both parts labels by the names of images. A label with fewer than two
    images in `train` is left out, of `test` too.

    Raises UserError if fewer than two labels are not, no image to test on is left, or an image is in both.
    """
    if both := sorted(train.keys() & test.keys()):
        raise UserError(
            f"{_images(len(both))} in both --data and --test: {', '.join(both[:SHOWN])}; what was learnt is no test"
        )
    counts = Counter(train.values())
    tests = Counter(test.values())
    too_few = {label for label in counts | tests if counts[label] < LEARN}
    places = _places(label for label in train.values() if label not in too_few)
    return _parts(
        places,
        {name: places[label] for name, label in train.items() if label in places},
        {name: places[label] for name, label in test.items() if label in places},
        [
            f"label {label!r}: {_images(counts[label])} to learn from, and it takes {LEARN}; "
            f"{_images(tests[label])} to test on"
            for label in sorted(too_few)
        ],
    )


def _places(labels: Iterable[str]) -> dict[str, int]:
    return {label: place for place, label in enumerate(sorted(set(labels)))}


def _parts(places: dict[str, int], train: dict[str, int], test: dict[str, int], left_out: list[str]) -> Parts:
    if len(places) < 2:
        raise UserError("; ".join(["fewer than two labels can be learnt", *left_out[:SHOWN]]))
    if not test:
        raise UserError(f"--test: no image has a label that can be learnt from --data ({', '.join(places)})")
    return Parts(list(places), train, test, left_out)


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"
