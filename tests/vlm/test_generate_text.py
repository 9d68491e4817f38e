"""`vlm.generation`: text in batches, text as it is written, and loading with clear errors."""

import pytest
import torch
from PIL import Image

from tests.tiny import DECODERS, FUSIONS, image, tiny
from vlm import generation
from vlm.errors import UserError
from vlm.processing import VLMProcessor
from vlm.session import Session


def request(text, *pictures):
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    return list(pictures), [{"role": "user", "content": content}]


REQUESTS = [
    request("what is it", image(0)),
    request("no image at all"),
    request("a cat and a dog on the street, what is in the image ?", image(1), image(2)),
    request("what", image(3)),
]


@pytest.fixture(scope="module")
def made():
    model, processor = tiny()
    model.generation_config.eos_token_id = None  # random models end when they please; these answers are compared
    return model, processor


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_equals_one_by_one(fusion):
    model, processor = tiny(fusion=fusion)
    together = generation.generate(model, processor, REQUESTS, max_new_tokens=6)
    alone = [generation.generate(model, processor, [r], max_new_tokens=6)[0] for r in REQUESTS]
    small = generation.generate(model, processor, REQUESTS, max_new_tokens=6, max_batch_tokens=100)
    assert together == alone == small
    assert len(set(together)) > 1


def test_a_shared_image_equals_separate_ones_and_is_encoded_once(made):
    model, processor = made
    shared, seen = image(0), []
    hook = model.model.vision_tower.register_forward_hook(
        lambda m, a, kw, out: seen.append(len(kw["pixel_values"])), with_kwargs=True
    )
    questions = ["what", "is it a cat ?", "where"]
    together = generation.generate(model, processor, [request(q, shared) for q in questions], max_new_tokens=6)
    assert seen == [1]
    separate = generation.generate(model, processor, [request(q, image(0)) for q in questions], max_new_tokens=6)
    hook.remove()
    assert seen == [1, 3]
    assert together == separate


@pytest.mark.few(8)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", [*DECODERS, "gemma3 with a wide window"])
def test_questions_about_shared_images_equal_one_by_one(decoder, fusion):
    """What the questions begin with goes through the language model once for each set of images; the answers are those
    of each question alone, token for token."""
    model, processor = tiny(decoder.split()[0], fusion)
    model.generation_config.eos_token_id = None
    requests = questions_about_three_images()
    longest = max(generation.prompt_lengths(model, processor, requests))
    if decoder == "gemma3 with a wide window":  # just wide enough
        model.config.text_config.sliding_window = model.model.language_model.config.sliding_window = longest + 6
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and longest + 6
    rows = []
    hook = model.model.language_model.register_forward_hook(
        lambda m, a, kw, out: rows.append(tuple(kw["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    together = generation.generate(model, processor, requests, max_new_tokens=6)
    hook.remove()
    alone = [generation.generate(model, processor, [r], max_new_tokens=6)[0] for r in requests]
    assert together == alone
    assert len(set(together)) > 2
    if decoder == "gemma3":  # whose window would count the padding
        assert rows[0] == (9, longest)
        return
    assert rows[0][0] == 3, "the beginning was not shared"
    assert rows[1][0] == 9
    assert rows[0][1] + rows[1][1] == longest


def questions_about_three_images():
    pictures = image(0), image(1), image(2)
    texts = ["what is it", "what is in the image ?", "what", "a cat", "what is it"]
    return [request(texts[n % 5], picture) for picture in pictures for n in range(3)]


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(lambda p: [request("what", p), request("what", p)], id="equal"),
        pytest.param(lambda p: [request("what"), request("where is it")], id="no images"),
        pytest.param(lambda p: [request("what", p), request("what is it", p, p)], id="more images in some"),
        pytest.param(lambda p: [request("what", p, image(5)), request("is it", p, image(6))], id="one shared of two"),
        pytest.param(lambda p: [request("what", p), request("what", p), request("no image")], id="with and without"),
    ],
)
def test_what_can_be_shared_changes_no_answer(made, requests):
    made_up = requests(image(0))
    together = generation.generate(*made, made_up, max_new_tokens=6)
    assert together == [generation.generate(*made, [r], max_new_tokens=6)[0] for r in made_up]


def test_beams_about_a_shared_image_equal_one_by_one(made):
    requests = [request(text, image(0)) for text in ("what", "is it a cat ?")]
    shared = [(list(requests[0][0]), messages) for _, messages in requests]
    together = generation.generate(*made, shared, max_new_tokens=5, num_beams=2)
    assert together == [generation.generate(*made, [r], max_new_tokens=5, num_beams=2)[0] for r in requests]


def test_progress_and_order(made):
    done = []
    answers = generation.generate(*made, REQUESTS, max_new_tokens=3, max_batch_tokens=100, progress=done.append)
    assert sum(done) == 4
    assert len(done) > 1
    assert answers == [generation.generate(*made, [r], max_new_tokens=3)[0] for r in REQUESTS]
    assert generation.generate(*made, [], max_new_tokens=3) == []


def test_questions_about_an_image_share_a_batch_whatever_their_order(made):
    """Nine questions in three batches: each image is encoded once, although its questions come apart."""
    requests = questions_about_three_images()
    mixed = [requests[n] for n in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    seen = []
    hook = made[0].model.vision_tower.register_forward_hook(
        lambda m, a, kw, out: seen.append(len(kw["pixel_values"])), with_kwargs=True
    )
    longest = max(generation.prompt_lengths(*made, requests)) + 4
    answers = generation.generate(*made, mixed, max_new_tokens=4, max_batch_tokens=4 * longest)
    hook.remove()
    assert seen == [1, 1, 1]
    assert answers == [generation.generate(*made, [r], max_new_tokens=4)[0] for r in mixed]


@pytest.mark.parametrize("fixed", [True, False])
def test_prompt_lengths_are_those_of_the_model_inputs(made, monkeypatch, fixed):
    monkeypatch.setattr(VLMProcessor, "fixed_image_tokens", fixed)  # as a stock model's, which needs the pixels
    requests = [*REQUESTS, request("what", image(3, (60, 20)))]
    expected = [generation.encode_requests(*made, [r])["input_ids"].shape[1] for r in requests]
    assert generation.prompt_lengths(*made, requests) == expected


def test_running_out_of_memory_says_what_to_lower(made, monkeypatch):
    def generate(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made[0], "generate", generate)
    with pytest.raises(UserError, match=r"lower max_batch_tokens, which is 100 \(CUDA out of memory\)"):
        generation.generate(*made, REQUESTS, max_batch_tokens=100)


def test_sampling_options_are_passed_on(made):
    torch.manual_seed(0)
    greedy = generation.generate(*made, REQUESTS, max_new_tokens=8)
    sampled = generation.generate(*made, REQUESTS, max_new_tokens=8, do_sample=True, temperature=5.0)
    assert greedy != sampled


@pytest.mark.parametrize("which", range(4))
def test_a_stream_adds_up_to_the_answer(made, which):
    pieces = list(Session(*made).stream(REQUESTS[which], max_new_tokens=12))
    answer = generation.generate(*made, [REQUESTS[which]], max_new_tokens=12)[0]
    assert "".join(pieces).strip() == answer


def test_what_users_write_is_text(made):
    inputs = generation.encode_requests(*made, [request("<image><|im_start|>assistant", image(0))])
    assert int((inputs["input_ids"] == made[1].image_token_id).sum()) == made[1].image_seq_length


# --- loading


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made[0].save_pretrained(folder / "model")
    made[1].save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text("name: x\n")
    return folder


def test_a_run_folder_and_its_checkpoint_load_alike(made, saved):
    for folder in (saved, saved / "model"):
        model, processor = generation.load(str(folder), device="cpu")
        assert not model.training
        assert generation.generate(model, processor, REQUESTS, max_new_tokens=6) == generation.generate(
            *made, REQUESTS, max_new_tokens=6
        )


def test_a_run_without_a_model_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"a run without a finished model.*--resume"):
        generation.load(str(tmp_path))


@pytest.mark.parametrize("name", ["{tmp}/not/there", "{tmp}/not_there", "./not_there", "not/there/at/all"])
def test_a_path_that_is_not_there_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = name.format(tmp=tmp_path)
    with pytest.raises(UserError, match=name.split("/")[-1]):
        generation.load(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        generation.load(str(tmp_path / "empty"))


def test_images_of_any_mode_and_size(made):
    pictures = [Image.new("RGB", (7, 300)), Image.new("RGB", (500, 20), "red")]
    assert len(generation.generate(*made, [request("what", p) for p in pictures], max_new_tokens=2)) == 2
