"""Images are prepared once, and one that an image processor refuses is named while others go on."""

from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPProcessor

from tests.dual_encoders import save_clip
from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import image, tiny
from vlm import generation
from vlm.data.conversation import tokenize_branch
from vlm.data.dataset import make_items
from vlm.data.encoding import encode_images
from vlm.data.example import Example, question_and_answer
from vlm.data.image_inputs import SizeCheck, naming_refused, processed_once
from vlm.data.images import RefusedImages
from vlm.data.pairs import make_pairs
from vlm.predict import Counts, predict


def counting(processor, monkeypatch):
    """How often the image processor runs, by class, under the memory of `processed_once`."""
    runs = Counter()
    kind = type(processor.image_processor)
    plain = kind.preprocess

    def preprocess(self, *args, **options):
        runs[kind] += 1
        return plain(self, *args, **options)

    monkeypatch.setattr(kind, "preprocess", preprocess)
    return runs


def branches(count, images=1):
    return tuple(question_and_answer(f"what {n}?", f"a cat {n}", num_images=images) for n in range(count))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [*STOCK, *PROMPTED])
def test_an_example_is_prepared_once_and_tokenized_as_before(name, monkeypatch):
    _, processor = stock(name)
    images = [image(3, (40, 30))]
    expected = [tokenize_branch(processor, branch, images) for branch in branches(3)]
    runs = counting(processor, monkeypatch)
    with processed_once(processor):
        found = [tokenize_branch(processor, branch, images) for branch in branches(3)]
    assert runs.total() == 1
    assert "preprocess" not in vars(processor.image_processor)
    for one, other in zip(found, expected, strict=True):
        assert repr(one) == repr(other)


def test_images_of_a_size_are_prepared_once_if_tokens_follow_from_it(monkeypatch):
    _, processor = stock("qwen2_vl")
    examples = [
        Example((image(n, (56, 84) if n == 3 else (40, 30)),), branches(2), str(n), f"a.jsonl:{n}") for n in range(5)
    ]
    options = {"max_length": 10_000, "too_long": "error", "report": pytest.fail, "progress": lambda it, total: it}
    alone = [make_items([example], processor, **options)[0][0].tree for example in examples]
    runs = counting(processor, monkeypatch)
    items, _ = make_items(examples, processor, **options)
    assert [item.tree for item in items] == alone
    assert runs.total() == 2


def test_other_pixels_of_the_same_size_are_prepared_anew(monkeypatch):
    _, processor = stock("qwen2_vl")
    monkeypatch.delattr(type(processor), "_get_num_multimodal_tokens")
    runs = counting(processor, monkeypatch)
    with processed_once(processor):
        made = [processor.image_processor([image(n)], return_tensors="pt") for n in (0, 1, 0)]
        made[0].pop("image_grid_thw")
        again = processor.image_processor([image(0)], return_tensors="pt")
        processor.image_processor([image(0)], return_tensors="np")
    assert runs.total() == 3
    assert torch.equal(made[0]["pixel_values"], made[2]["pixel_values"])
    assert not torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])
    assert "image_grid_thw" in again


def refusing(processor, monkeypatch, width):
    """Let the image processor refuse images of that width, as Qwen's refuse thin ones."""
    kind = type(processor.image_processor)
    plain = kind.preprocess

    def preprocess(self, images, *args, **options):
        flat = images
        while isinstance(flat, list | tuple) and isinstance(flat[0], list | tuple):
            flat = [one for some in flat for one in some]
        for one in flat if isinstance(flat, list | tuple) else [flat]:
            if one.size[0] == width:
                raise ValueError("no such width")
        return plain(self, images, *args, **options)

    monkeypatch.setattr(kind, "preprocess", preprocess)


@pytest.mark.parametrize("name", ["qwen2_vl", "paligemma"])
def test_training_leaves_out_and_names_what_is_refused(name, monkeypatch):
    _, processor = stock(name)
    refusing(processor, monkeypatch, 50)
    images = [image(0), image(1, (50, 40)), image(2)]
    examples = [Example((each,), branches(2), str(n), f"a.jsonl:{n}") for n, each in enumerate(images)]
    problems = []
    items, _ = make_items(
        examples, processor, max_length=10_000, too_long="error", report=problems.append, progress=lambda it, total: it
    )
    assert {item.example.where for item in items} == {"a.jsonl:0", "a.jsonl:2"}
    [problem] = problems
    assert problem.where == "a.jsonl:1: image in memory"
    assert "refuses an image of 50 x 40 pixels (no such width)" in problem.why
    assert problem.lost == 2


def test_predict_writes_an_error_for_what_is_refused(monkeypatch, tmp_path):
    model, processor = stock("qwen2_vl")
    refusing(processor, monkeypatch, 50)
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for n, path in enumerate(paths):
        image(n, (50, 40) if n == 1 else (40, 40)).save(path)

    def generate(requests):
        return generation.generate(model, processor, requests, max_new_tokens=2)

    output = tmp_path / "out.jsonl"
    counts = predict(generate, paths, prompt="what", model="m", output=output)
    assert counts == Counts(done=2, earlier=0, broken=1)
    assert "1.png: Qwen2VLImageProcessor refuses an image of 50 x 40" in output.read_text().splitlines()[1]


def test_our_encoders_name_it_too(monkeypatch):
    _, processor = tiny()
    refusing(processor, monkeypatch, 50)
    broken = {}
    images = {str(n): image(n, (50, 40) if n == 1 else (40, 40)) for n in range(3)}

    def encode(pixel_values):
        return pixel_values.flatten(1)[:, None], (1, 1)

    found = [key for batch in encode_images(images, processor, encode, broken=broken) for key in batch.images]
    assert found == ["0", "2"]
    assert "no such width" in str(broken["1"])


def test_each_size_is_tried_once(monkeypatch):
    _, processor = stock("qwen2_vl")
    refusing(processor, monkeypatch, 50)
    runs = counting(processor, monkeypatch)
    check = SizeCheck(processor)
    check([image(0), image(1)])
    check([image(2)])
    assert runs.total() == 1
    with pytest.raises(RefusedImages, match="no such width"):
        check([image(0), image(1, (50, 40))])
    SizeCheck(tiny()[1])([Image.new("RGB", (50, 40))])


def test_errors_that_no_image_is_to_blame_for_stay_as_they_are():
    _, processor = stock("qwen2_vl")
    with pytest.raises(KeyError, match="other"), naming_refused(processor, [image(0)]):
        raise KeyError("other")


def test_pairs_leave_out_and_name_it_too(monkeypatch, tmp_path):
    save_clip(tmp_path)
    processor = CLIPProcessor.from_pretrained(tmp_path)
    refusing(processor, monkeypatch, 50)
    examples = [
        Example((image(n, (50, 40) if n == 1 else (40, 40)),), branches(1), str(n), f"a.jsonl:{n}") for n in range(3)
    ]
    problems = []
    config = CLIPConfig.from_pretrained(tmp_path)
    items, _ = make_pairs(examples, processor, config, report=problems.append, progress=lambda it, total: it)
    assert [item.example.where for item in items] == ["a.jsonl:0", "a.jsonl:2"]
    assert [problem.where for problem in problems] == ["a.jsonl:1: image in memory"]
    assert "no such width" in problems[0].why
