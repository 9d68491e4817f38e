"""A Q-Former that reads the question: what it is given, and that answers do not depend on how they are asked for."""

from itertools import takewhile

import pytest
import torch
from transformers import AutoProcessor, pipeline

from tests.tiny import continuation, encode, image, logits, metaspace_tokenizer, small_projector, tiny, user
from tests.vlm.test_session import Reads, assistant, both, unending
from vlm.generation import generate
from vlm.session import Session

READS = small_projector("qformer") | {"use_qformer_text_input": True}
TILES = {"type": "tiles", "max_tiles": 4}
FUSIONS = ["prefix", "cross_attention"]
SHORT, LONG = "a cat", "what is in the image on the street ?"


def reading(fusion="prefix", **options):
    """Its visual tokens are as much of the question as of the image."""
    model, processor = tiny(fusion=fusion, projector=READS, **options)
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5, mean="norm.weight" in name)
    return model, processor


def read(processor, inputs):
    """The texts in a batch, one for each image."""
    rows = zip(inputs["qformer_input_ids"], inputs["qformer_attention_mask"], strict=True)
    texts = [(ids[mask.bool()].tolist(), mask.tolist()) for ids, mask in rows]
    assert all([*takewhile(bool, mask)] == [1] * sum(mask) for _, mask in texts), "padding stands at the ends"
    return [processor.qformer_tokenizer.decode(ids) for ids, _ in texts]


# --- what is read


def test_the_text_of_the_message_in_which_the_image_stands():
    _, processor = reading()
    turns = [
        {"role": "system", "content": "be brief"},
        user(image(0), "  is it ", image(1), "a dog ?"),
        assistant("no"),
        user("why"),
        assistant("2"),
        user(image(2)),
    ]
    inputs = encode(processor, [[user("hello")], [user(LONG, image(3))], turns])
    assert read(processor, inputs) == [LONG, "is it a dog ?", "is it a dog ?", ""]
    assert len(inputs["pixel_values"]) == 4


def test_it_is_the_same_without_pixels_and_as_lists():
    _, processor = reading()
    turns = [user(image(0), LONG)]
    wanted = encode(processor, [turns])
    for options in ({"pixels": False}, {}):
        made = processor.apply_chat_template(turns, tokenize=True, return_dict=True, processor_kwargs=options)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            assert torch.as_tensor(made[name]).tolist() == wanted[name].tolist()


def test_without_an_image_there_is_nothing_to_read():
    model, processor = reading()
    inputs = encode(processor, [[user("hello")]])
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert continuation(model, inputs)


def test_a_placeholder_that_a_user_wrote_is_text_unless_it_is_trusted():
    _, processor = reading()
    assert read(processor, encode(processor, [[user(image(0), "no <image>")]])) == ["no <image>"]
    written = [{"role": "user", "content": "<image> what"}]
    trusted = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": False}
    options = {"processor_kwargs": {"return_tensors": "pt", "images": [image(0)]}}
    assert read(processor, processor.apply_chat_template(written, **trusted, **options)) == ["what"]


def test_of_a_text_that_is_no_conversation_all_is_read():
    _, processor = reading()
    inputs = processor(
        images=[image(0), image(1)], text=["<image> a cat", "2 <image>"], padding=True, return_tensors="pt"
    )
    assert read(processor, inputs) == ["a cat", "2"]


def test_what_is_longer_than_the_places_is_cut():
    spec = READS | {"max_position_embeddings": 4}
    model, processor = tiny(projector=spec)
    inputs = encode(processor, [[user(image(0), LONG)]])
    whole = processor.tokenizer(LONG)["input_ids"]
    assert inputs["qformer_input_ids"].tolist() == [whole[:4]]
    assert continuation(model, inputs)


def test_there_is_a_word_for_each_token():
    """With a tokenizer that puts a token before each text, and with markers of tiles."""
    for options in ({"tokenizer": metaspace_tokenizer()}, {"tiling": TILES}):
        model, processor = reading(**options)
        assert model.model.multi_modal_projector.word_embeddings.num_embeddings == len(processor.qformer_tokenizer)
        assert len(processor.qformer_tokenizer) == len(processor.tokenizer)


def test_images_without_their_texts_are_refused():
    model, processor = reading()
    inputs = encode(processor, [[user(image(0), SHORT)], [user(image(1), LONG)]])
    for given, message in ((None, "none"), (inputs["qformer_input_ids"][:1], "1")):
        with pytest.raises(
            ValueError, match=f"2 images need as many rows of qformer_input_ids, and there are {message}"
        ):
            model(**inputs | {"qformer_input_ids": given})


# --- what comes of it


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("tiling", [None, TILES], ids=["whole", "tiles"])
def test_a_padded_batch_equals_one_by_one(fusion, tiling):
    model, processor = reading(fusion, tiling=tiling)
    size = (70, 30)
    asked = [[user(image(0, size), SHORT)], [user(image(0, size), LONG)], [user(image(1, size), image(2), "dog")]]
    batch, alone = encode(processor, asked), [encode(processor, [turns]) for turns in asked]
    wanted = torch.cat([logits(model, **inputs)[:, -1] for inputs in alone])
    assert (logits(model, **batch)[:, -1] - wanted).abs().max() < 1e-4
    answers = [continuation(model, inputs)[0] for inputs in alone]
    assert continuation(model, batch) == answers
    assert continuation(model, batch, use_cache=False) == answers


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_question_changes_what_is_seen(fusion):
    model, processor = reading(fusion)
    inputs = encode(processor, [[user(image(0), SHORT)]])
    other = encode(processor, [[user(image(0), LONG)]])
    texts = {name: other[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    assert (logits(model, **inputs) - logits(model, **inputs | texts)).abs().max() > 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
def test_texts_stay_with_their_images_in_beams_and_samples(options):
    model, processor = reading()
    asked = [[user(image(0), SHORT)], [user(image(1), "dog", image(2), LONG)]]
    alone = [row for turns in asked for row in continuation(model, encode(processor, [turns]), **options)]
    assert continuation(model, encode(processor, asked), **options) == alone


def test_questions_about_one_image_share_none_of_its_tokens():
    """Evaluation asks many at once."""
    model, processor = unending(*reading())
    picture = image(0)
    requests = [([picture], [user_of(text)]) for text in (SHORT, LONG, "dog")]
    alone = [generate(model, processor, [request], max_new_tokens=6)[0] for request in requests]
    assert len(set(alone)) == 3
    assert generate(model, processor, requests, max_new_tokens=6) == alone


def user_of(text, images=1):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_conversation_equals_reading_everything_again(fusion):
    model, processor = unending(*reading(fusion))
    session, reads = Session(model, processor), Reads(model)
    cat, dog = image(0), image(1)
    turns = [user_of(SHORT)]
    said, *_ = both(model, processor, session, ([cat], turns), reads)
    turns = [*turns, assistant(said), user_of("and", images=0)]
    said, tokens, whole, images = both(model, processor, session, ([cat], turns), reads)
    assert images == 0
    assert tokens < whole - 4, "the image was read again"
    turns = [*turns, assistant(said), user_of(LONG)]
    said, tokens, whole, images = both(model, processor, session, ([cat, dog], turns), reads)
    assert images == 1
    assert tokens < whole - 4, "the first image was read again"
    turns = [*turns, assistant(said), user_of("and", images=0)]
    both(model, processor, session, ([cat, dog], turns), reads)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_another_question_about_the_image_is_read_together_with_it(fusion):
    """From the image on, although the tokens are the same up to the last of the question."""
    model, processor = unending(*reading(fusion))
    session, reads = Session(model, processor), Reads(model)
    picture = image(0)
    both(model, processor, session, ([picture], [user_of("dog ? 0 1 2")]), reads)
    _, tokens, whole, images = both(model, processor, session, ([picture], [user_of("dog ? 0 1 3")]), reads)
    assert images == 0, "the encoder saw it already"
    ids = encode(processor, [[user(picture)]])["input_ids"][0].tolist()
    assert whole - tokens == ids.index(model.config.image_token_id)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    """Also by transformers' pipeline."""
    model, processor = reading()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.qformer_tokenizer.model_max_length == 512
    turns = [user(image(0), LONG)]
    inputs, loaded = encode(processor, [turns]), encode(again, [turns])
    assert inputs.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in inputs.items())
    answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    said = answer(text=turns, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert torch.equal(logits(answer.model, **inputs), logits(model, **inputs))
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(ids, skip_special_tokens=True)


def test_a_model_that_reads_no_text_has_no_second_tokenizer(tmp_path):
    _, processor = tiny(projector=small_projector("qformer"))
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "qformer_tokenizer").exists()
    assert AutoProcessor.from_pretrained(tmp_path).qformer_tokenizer is None
