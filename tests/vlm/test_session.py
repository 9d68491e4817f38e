"""A conversation that goes on from its cache: the answers of reading everything again, and what is not read again."""

import threading

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tests.tiny import DECODERS, FUSIONS, byte_level_tokenizer, clip_config, image, image_processor, text_config, tiny
from vlm.session import Session

STOCK_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A template that leaves out what an assistant thought in earlier turns, as Qwen3's does.
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif m['role'] == 'user' or loop.length > 1 %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def unending(model, processor):
    model.generation_config.eos_token_id = None  # random models end when they please; these answers are compared
    return model, processor


def user(text, pictures=0):
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class Reads:
    """What the language model and the vision encoder are given."""

    def __init__(self, model):
        self.tokens, self.images = [], []
        model.model.language_model.register_forward_hook(
            lambda m, a, kw, out: self.tokens.append(kw["inputs_embeds"].shape[1]), with_kwargs=True
        )
        model.model.vision_tower.register_forward_hook(
            lambda m, a, kw, out: self.images.append(len(a[0] if a else kw["pixel_values"])), with_kwargs=True
        )

    def clear(self):
        self.tokens.clear()
        self.images.clear()

    @property
    def prompt(self):
        return self.tokens[0]


def answer(session, request, tokens=6, **options):
    return "".join(session.stream(request, max_new_tokens=tokens, **options))


def both(model, processor, session, request, reads, tokens=6):
    """The answer, and how many tokens were read for it in this session and in a new one. The two answers are equal."""
    reads.clear()
    found = answer(session, request, tokens)
    read, images = reads.prompt, sum(reads.images)
    reads.clear()
    assert found == answer(Session(model, processor), request, tokens)
    return found, read, reads.prompt, images


@pytest.mark.few(10)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_conversation_equals_reading_everything_again(decoder, fusion):
    model, processor = unending(*tiny(decoder, fusion))
    session, reads = Session(model, processor), Reads(model)
    slides = decoder == "gemma3"  # what has left its window cannot be taken back
    cat, dog = image(0), image(1)

    first = [cat], [user("what is it", 1)]
    said, _, _, images = both(model, processor, session, first, reads)
    assert images == 1
    second = [cat], [*first[1], assistant(said), user("where is it ?")]
    said, read, whole, images = both(model, processor, session, second, reads)
    assert images == 0
    assert slides or read < whole - 16, "the image was read again"

    third = [cat, dog], [*second[1], assistant(said), user("and this, a dog ?", 1)]
    said, read, whole, images = both(model, processor, session, third, reads)
    assert images == 1, "only the new image is encoded"
    assert slides or read < whole - 16

    fourth = [cat, dog], [*third[1], assistant(said), user("what ?")]
    _, read, whole, images = both(model, processor, session, fourth, reads)
    assert images == 0
    assert slides or read < whole - 32

    again = [cat], [*first[1], assistant("a cat"), user("0 1 2 3")]  # back to the first turn, with other words
    _, read, whole, images = both(model, processor, session, again, reads)
    assert images == 0
    assert slides or read < whole - 16


@pytest.mark.parametrize("fusion", FUSIONS)
def test_another_image_in_the_same_place_is_looked_at(fusion):
    model, processor = unending(*tiny(fusion=fusion))
    session, reads = Session(model, processor), Reads(model)
    answers = set()
    for picture in (image(0), image(1), image(0)):
        found, read, whole, images = both(model, processor, session, ([picture], [user("what is it", 1)]), reads)
        answers.add(found)
        assert images == 1
    assert len(answers) == 2
    two = image(2), image(3)
    said, *_ = both(model, processor, session, (list(two), [user("what", 2)]), reads)
    swapped = [two[0], image(4)], [user("what", 2)]
    found, read, whole, images = both(model, processor, session, swapped, reads)
    assert (images, whole - read) == (1, read_before_second_image(processor, swapped))
    assert found != said


def read_before_second_image(processor, request):
    from vlm.generation import tokenize

    ids = tokenize(processor, [request])["input_ids"][0].tolist()
    places = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    return places[processor.image_seq_length]


def test_what_is_known_of_an_image_goes_with_it():
    """A new object may get the identity of one that nobody holds any more."""
    model, processor = unending(*tiny())
    session, reads, cat = Session(model, processor), Reads(model), image(0)
    both(model, processor, session, ([cat], [user("what is it", 1)]), reads)
    both(model, processor, session, ([], [user("no image at all")]), reads)
    *_, images = both(model, processor, session, ([cat], [user("what is it", 1)]), reads)
    assert images == 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_changed_beginning_is_read(fusion):
    model, processor = unending(*tiny(fusion=fusion))
    session, reads, cat = Session(model, processor), Reads(model), image(0)
    system = {"role": "system", "content": [{"type": "text", "text": "a cat"}]}
    both(model, processor, session, ([cat], [system, user("what is it", 1)]), reads)
    other = {"role": "system", "content": [{"type": "text", "text": "a dog"}]}
    _, read, whole, images = both(model, processor, session, ([cat], [other, user("what is it", 1)]), reads)
    assert images == 0
    assert 0 < whole - read < 16
    both(model, processor, session, ([], [user("no image at all")]), reads)
    both(model, processor, session, ([cat], [user("what is it", 1)]), reads)


def test_the_same_question_again_reads_one_token():
    model, processor = unending(*tiny())
    session, reads = Session(model, processor), Reads(model)
    request = [image(0)], [user("what is it", 1)]
    both(model, processor, session, request, reads)
    assert both(model, processor, session, request, reads)[1] == 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_answer_that_is_stopped_half_way_leaves_a_sound_cache(fusion):
    model, processor = unending(*tiny(fusion=fusion))
    session, reads = Session(model, processor), Reads(model)
    first = [image(0)], [user("what is it", 1)]
    said = answer(session, first)
    pieces = session.stream(([*first[0]], [*first[1], assistant(said), user("a long one")]), max_new_tokens=150)
    next(pieces)
    pieces.close()
    second = first[0], [*first[1], assistant(said), user("where is it ?")]
    _, read, whole, images = both(model, processor, session, second, reads)
    assert images == 0
    assert read < whole - 16


def test_an_error_in_the_middle_leaves_nothing_behind():
    model, processor = unending(*tiny())
    session, reads = Session(model, processor), Reads(model)
    first = [image(0)], [user("what is it", 1)]
    said = answer(session, first)
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[2].register_forward_hook(fail)
    second = first[0], [*first[1], assistant(said), user("where is it ?")]
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(session, second)
    hook.remove()
    _, read, whole, images = both(model, processor, session, second, reads)
    assert (read, images) == (whole, 0)


def test_a_window_that_has_slid_goes_on_but_does_not_go_back():
    """The same prompt again takes the answer back, which a window that slid over it cannot."""
    model, processor = unending(*tiny("gemma3"))
    session, reads = Session(model, processor), Reads(model)
    ids = []
    hook = model.register_forward_hook(lambda m, a, kw, out: ids.append(kw["input_ids"]), with_kwargs=True)
    request = [image(0)], [user("what is it", 1)]
    both(model, processor, session, request, reads)
    _, read, whole, _ = both(model, processor, session, request, reads)
    assert read == whole
    ids.clear()
    answer(session, request, tokens=1)  # nothing of it is in the cache: the next prompt goes on from there
    longer = request[0], [*request[1], assistant(""), user("where")]
    _, read, whole, _ = both(model, processor, session, longer, reads)
    hook.remove()
    assert read < whole - 16


@pytest.mark.parametrize("fusion", FUSIONS)
def test_thoughts_that_a_template_leaves_out_later_are_not_kept(fusion):
    model, processor = unending(*tiny(fusion=fusion))
    processor.chat_template = FORGETFUL_TEMPLATE
    session, reads = Session(model, processor), Reads(model)
    first = [image(0)], [user("what is it", 1)]
    said, *_ = both(model, processor, session, first, reads)
    second = first[0], [*first[1], assistant(said), user("where is it ?")]
    _, read, whole, _ = both(model, processor, session, second, reads)
    assert read < whole - 16


def test_without_a_cache_everything_is_read_and_nothing_is_kept():
    model, processor = unending(*tiny())
    session, reads = Session(model, processor), Reads(model)
    request = [image(0)], [user("what is it", 1)]
    said, _, whole, _ = both(model, processor, session, request, reads)
    for _ in range(2):
        reads.clear()
        assert answer(session, request, use_cache=False) == said
        assert reads.prompt == whole
    assert both(model, processor, session, request, reads)[1] == whole


# --- a stock model


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text_config(vocab_size=len(tokenizer)),
        image_token_index=image_token_id,
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=STOCK_TEMPLATE,
        num_additional_image_tokens=1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = [image_token_id]
    return model, processor


def test_a_stock_model_goes_on_too(llava):
    model, processor = llava
    session, reads = Session(model, processor), Reads(model)
    cat, dog = image(0), image(1)
    first = [cat], [user("what is it", 1)]
    said, *_ = both(model, processor, session, first, reads)
    second = [cat], [*first[1], assistant(said), user("where is it ?")]
    said, read, whole, images = both(model, processor, session, second, reads)
    assert images == 0
    assert read < whole - 16
    third = [cat, dog], [*second[1], assistant(said), user("and this ?", 1)]
    _, read, whole, images = both(model, processor, session, third, reads)
    assert (read, images) == (whole, 2)
    _, read, whole, images = both(model, processor, session, ([dog, cat], third[1]), reads)
    assert (read, images) == (whole, 2)


def test_a_stock_model_that_is_told_more_is_not_gone_on_with(llava, monkeypatch):
    """Token types, a grid: positions or a mask of its own."""
    from vlm import session as module

    model, processor = llava
    monkeypatch.setattr(module, "CAUSAL_INPUTS", {"input_ids", "attention_mask"})
    session, reads = Session(model, processor), Reads(model)
    request = [image(0)], [user("what is it", 1)]
    both(model, processor, session, request, reads)
    _, read, whole, _ = both(model, processor, session, request, reads)
    assert read == whole


# --- streaming


def test_closing_a_stream_stops_its_thread():
    model, processor = unending(*tiny())
    before = threading.active_count()
    reads = Reads(model)
    pieces = Session(model, processor).stream(([image(0)], [user("what is it", 1)]), max_new_tokens=200)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    assert len(reads.tokens) < 150


def test_an_error_in_the_stream_reaches_the_reader():
    with pytest.raises(ValueError, match="temperature"):
        answer(Session(*tiny()), ([image(0)], [user("what is it", 1)]), do_sample=True, temperature=-1.0)
