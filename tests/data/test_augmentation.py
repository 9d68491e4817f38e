"""Changed images: by how much, by which seed, and where: in training, and in each epoch anew."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.tiny import image, tiny
from vlm.data.augmentation import Augmentation
from vlm.data.dataset import TreeCollator, TreeDataset, make_items, one_row_an_answer
from vlm.data.example import Example, question_and_answer

WIDTH, HEIGHT = 120, 80
ALL = {"max_length": 1000, "too_long": "error", "report": print, "progress": lambda steps, total: steps}
CROP = Augmentation(random_resized_crop={"scale": [0.3, 0.6]})


def coordinates():
    """An image whose red is the column and whose green is the row."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))


def part_of(picture):
    """Which part of `coordinates` is seen: its sides as shares of the whole's."""
    pixels = np.asarray(picture).astype(float)
    columns, rows = pixels[HEIGHT // 2, :, 0] / 2, pixels[:, WIDTH // 2, 1] / 2
    return (columns[-1] - columns[0] + 1) / WIDTH, (rows[-1] - rows[0] + 1) / HEIGHT


def test_a_crop_is_as_large_and_as_stretched_as_allowed():
    augment = Augmentation(random_resized_crop={"scale": [0.3, 0.6], "ratio": [0.8, 1.25]})
    parts = []
    for seed in range(200):
        picture = augment(coordinates(), str(seed))
        assert picture.size == (WIDTH, HEIGHT)
        parts.append(part_of(picture))
    area = np.array([w * h for w, h in parts])
    stretch = np.array([w / h for w, h in parts])
    assert 0.27 < area.min() < 0.35
    assert 0.55 < area.max() < 0.65
    assert 0.74 < stretch.min() < 0.87
    assert 1.15 < stretch.max() < 1.35
    whole = Augmentation(random_resized_crop={"scale": [1, 1], "ratio": [1, 1]})
    assert whole(coordinates(), "0") == coordinates()


def test_colours_change_and_edges_do_not():
    augment = Augmentation(color_jitter={"brightness": 0.5})
    grey = Image.new("RGB", (WIDTH, HEIGHT), (100, 100, 100))
    seen = {augment(grey, str(seed)).getpixel((5, 5))[0] for seed in range(100)}
    assert 49 <= min(seen) < 60
    assert 140 < max(seen) <= 151
    half = Image.new("L", (WIDTH, HEIGHT), 200)
    half.paste(40, (0, 0, 50, HEIGHT))
    columns = np.asarray(augment(half.convert("RGB"), "1"))[0, :, 0]
    assert len(set(columns[:50])) == len(set(columns[50:])) == 1


def test_half_of_the_images_are_mirrored():
    augment = Augmentation(random_horizontal_flip=0.5)
    mirrored = [augment(coordinates(), str(seed)) == ImageOps.mirror(coordinates()) for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    assert all(
        augment(coordinates(), str(seed)) in (coordinates(), ImageOps.mirror(coordinates())) for seed in range(20)
    )


def test_a_seed_says_all_and_no_other_random_number_is_drawn():
    augment = Augmentation(
        random_resized_crop={}, color_jitter={"brightness": 0.3, "hue": 0.1}, random_horizontal_flip=0.5
    )
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment(image(0), "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert augment(image(0), "a") == first
    assert augment(image(0), "b") != first


# --- in training


@pytest.fixture(scope="module")
def made():
    processor = tiny()[1]
    examples = [
        Example(
            (image(n),), (question_and_answer("what", "a cat"), question_and_answer("who", "a dog")), str(n), f"row {n}"
        )
        for n in range(6)
    ]
    return processor, make_items(examples, processor, **ALL)[0]


def pixels_by_example(processor, data, *epochs):
    """What the model sees of each example, in each epoch."""
    seen = []
    for epoch in epochs:
        data.set_epoch(epoch)
        pixels = {}
        for row in (data[index] for index in range(len(data))):
            for item, shown in zip(row, TreeCollator(processor)([row])["pixel_values"], strict=True):
                pixels.setdefault(item.example.where, []).append(shown)
        seen.append(pixels)
    return seen


def test_each_epoch_has_other_images_and_the_same_when_it_comes_again(made):
    processor, items = made
    first, second, again = pixels_by_example(processor, TreeDataset(items, 60, 0, CROP), 0, 1, 0)
    [plain] = pixels_by_example(processor, TreeDataset(items, 60), 0)
    for where, [shown] in first.items():
        assert not torch.equal(shown, second[where][0])
        assert not torch.equal(shown, plain[where][0])
        assert torch.equal(shown, again[where][0])
    other = pickle.loads(pickle.dumps(TreeDataset(items, 200, 0, CROP)))  # as a worker gets it
    assert all(
        torch.equal(shown[0], first[where][0]) for where, shown in pixels_by_example(processor, other, 0)[0].items()
    )
    [seeded] = pixels_by_example(processor, TreeDataset(items, 60, 1, CROP), 0)
    assert not any(torch.equal(shown[0], first[where][0]) for where, shown in seeded.items())


def test_all_answers_of_an_example_see_the_same_image(made):
    """So that rows with one answer each are the same training as trees."""
    processor, items = made
    [trees] = pixels_by_example(processor, TreeDataset(items, 60, 0, CROP), 0)
    [plain] = pixels_by_example(processor, TreeDataset(one_row_an_answer(items), 1, 0, CROP), 0)
    for where, shown in plain.items():
        assert len(shown) == 2
        assert all(torch.equal(each, trees[where][0]) for each in shown)


def test_images_of_an_example_are_changed_each_in_its_way(made):
    processor, _ = made
    twice = Example((image(0), image(0)), (question_and_answer("what", "a cat", num_images=2),), "0", "row 0")
    data = TreeDataset(make_items([twice], processor, **ALL)[0], 60, 0, CROP)
    one, other = TreeCollator(processor)([data[0]])["pixel_values"]
    assert not torch.equal(one, other)
