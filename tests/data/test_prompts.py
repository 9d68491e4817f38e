"""Prompts of models without a chat template, against their processors' own ways, and what is refused."""

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, ViltProcessor

from tests.data.test_tree_masks import conversation
from tests.stock import stock
from tests.stock_prompted import PROMPTED, QFORMER, SIGLIP, wordpiece_tokenizer
from tests.tiny import encode, image, image_processor, metaspace_tokenizer, user
from vlm.chat_templates import chat_template_for
from vlm.data.conversation import IGNORE, tokenize_branch
from vlm.data.dataset import TreeCollator, make_items
from vlm.data.example import Example
from vlm.data.prompts import _answer_ids, encode_prompt, require_prompt
from vlm.errors import UserError
from vlm.generation import generate, require_supported
from vlm.processing import VLMProcessor
from vlm.training.inputs import training_inputs

PT = {"return_tensors": "pt"}
QUESTION, ANSWER = "what is in the image ?", "a dog and a cat"


def tokenized(name, question=QUESTION, answer=ANSWER):
    _, processor = stock(name)
    return processor, tokenize_branch(processor, conversation(question, answer), [image(0)])


def supervised(processor, found):
    return processor.tokenizer.decode([label for label in found.labels if label != IGNORE])


def test_paligemma_is_given_what_its_processor_makes_of_a_prefix_and_a_suffix():
    processor, found = tokenized("paligemma")
    wanted = processor(images=[[image(0)]], text=["<image>" + QUESTION], suffix=[ANSWER], **PT)
    assert found.input_ids == wanted["input_ids"][0].tolist()
    assert found.labels == wanted["labels"][0].tolist()
    assert found.token_types["token_type_ids"] == wanted["token_type_ids"][0].tolist()
    assert supervised(processor, found) == f"{ANSWER}<|endoftext|>"


def test_paligemmas_prompt_sees_itself_both_ways_and_its_answer_is_read_from_left_to_right():
    """Of the scores before a token that is changed, those in the prompt change, and those in the answer do not."""
    model, processor = stock("paligemma")
    examples = [Example((image(0),), (conversation(QUESTION, ANSWER),), "0", "row 0")]
    items, _ = make_items(
        examples, processor, max_length=99, too_long="error", report=print, progress=lambda steps, total: steps
    )
    batch = TreeCollator(processor, plain=True)([items])
    labels = batch.pop("labels")[0]
    start = int((labels != IGNORE).nonzero()[0])
    scores = []
    for changed in (None, start - 2, len(labels) - 2):
        ids = batch["input_ids"].clone()
        if changed is not None:
            ids[0, changed] = 260
        with torch.no_grad():
            scores.append(model(**{**batch, "input_ids": ids}).logits[0])
    same = [(other == scores[0]).all(dim=1) for other in scores[1:]]
    assert not same[0].any()
    assert same[1].tolist() == [True] * (len(labels) - 2) + [False] * 2


@pytest.mark.parametrize(("name", "template"), [("paligemma", "paligemma"), ("blip-2", "blip2")])
@pytest.mark.parametrize("question", [QUESTION, "", " what:"])
def test_ours_writes_the_prompts_of_stock_models(name, template, question):
    processor, wanted = tokenized(name, question)
    way, length = ("prefix_lm", 16) if name == "paligemma" else ("causal", 4)
    made = chat_template_for(processor.tokenizer, template)
    ours = VLMProcessor(processor.image_processor, processor.tokenizer, made, length, image_attention=way)
    assert tokenize_branch(ours, conversation(question, ANSWER), [image(0)]) == wanted
    asked = [[user(image(0), question)]]
    row = encode_prompt(processor, conversation(question, ANSWER).messages[:1], [image(0)])["input_ids"]
    assert torch.equal(encode(ours, asked)["input_ids"], row)


@pytest.mark.parametrize("name", ["blip", "git"])
def test_a_question_and_its_answer_are_one_text_to_bert(name):
    processor, found = tokenized(name)
    assert found.input_ids == processor.tokenizer(f"{QUESTION} {ANSWER}")["input_ids"]
    assert supervised(processor, found) == f"{ANSWER} [SEP]"


@pytest.mark.parametrize("name", ["blip-2", "instructblip", "idefics"])
def test_a_question_and_its_answer_are_one_text(name):
    """Also where the answer begins in the middle of a line."""
    processor, found = tokenized(name)
    words = processor.tokenizer(f"{QUESTION} {ANSWER}", add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.eos_token_id
    assert found.input_ids[-len(words) - 1 :] == [*words, end]
    assert supervised(processor, found) == f" {ANSWER}<|endoftext|>"
    assert tokenized(name, question="")[1].input_ids[-1] == end
    assert supervised(processor, tokenized(name, question="")[1]) == f"{ANSWER}<|endoftext|>"


@pytest.mark.parametrize("answer", [" a cat", "a cat", " 2", "?"])
def test_an_answer_has_the_tokens_that_it_has_behind_a_text(answer):
    """With a tokenizer as Llama's, which begins a text with a space of its own."""
    tokenizer = metaspace_tokenizer()
    before, both = (tokenizer(text)["input_ids"] for text in ("what:", f"what:{answer}"))
    assert _answer_ids(tokenizer, answer) == [*both[len(before) :], tokenizer.eos_token_id]


def test_a_q_former_reads_the_question_and_not_the_answer():
    processor, found = tokenized("instructblip")
    assert found.qformer_inputs["qformer_input_ids"] == [processor.qformer_tokenizer(QUESTION)["input_ids"]]


def test_blips_decoder_begins_with_its_own_token():
    model, _ = stock("blip")
    ids, labels = torch.tensor([[2, 7, 8, 3]]), torch.tensor([[IGNORE, IGNORE, 8, 3]])
    inputs = training_inputs(model.config, {"input_ids": ids}, labels)
    assert inputs["input_ids"].tolist() == [[4, 7, 8, 3]]
    assert ids.tolist() == [[2, 7, 8, 3]]
    assert inputs["logits_to_keep"].tolist() == [[False, True, True, False]]


OWN_WAYS = {
    "idefics": lambda processor: processor(text=[[image(0), QUESTION]], **PT),
    "git": lambda processor: {
        "pixel_values": processor(images=image(0), **PT)["pixel_values"],
        "input_ids": torch.tensor(
            [[2, *processor(text=QUESTION, add_special_tokens=False)["input_ids"]]]  # as in its documentation
        ),
    },
    "paligemma": lambda processor: {
        name: value
        for name, value in processor(images=[[image(0)]], text=["<image>" + QUESTION], **PT).items()
        if name != "labels"
    },
}


@pytest.mark.parametrize("name", PROMPTED)
def test_an_answer_is_that_of_the_models_own_way(name):
    model, processor = stock(name)
    own_way = OWN_WAYS.get(name, lambda processor: processor(images=image(0), text=QUESTION, **PT))
    inputs = own_way(processor)
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    prompt = inputs["input_ids"].shape[1] - (name == "blip")  # its [SEP] is not kept
    wanted = processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True).strip()
    request = ([image(0)], list(conversation(QUESTION, ANSWER).messages[:1]))
    assert generate(model, processor, [request], max_new_tokens=5) == [wanted]


@pytest.mark.parametrize("name", PROMPTED)
def test_an_answer_ends_with_the_token_that_it_ended_with_in_training(name):
    """Although the checkpoint does not say so."""
    model, processor = stock(name)
    end = tokenized(name)[1].input_ids[-1]
    writer = getattr(model, "language_model", getattr(model, "text_decoder", model))
    for owner in (model, writer):
        owner.generation_config.eos_token_id = None
    writer.get_output_embeddings().register_forward_hook(lambda module, inputs, output: one_hot(output, end))
    request = ([image(0)], list(conversation(QUESTION, ANSWER).messages[:1]))
    calls = []
    assert generate(model, processor, [request], max_new_tokens=5, logits_processor=[counted(calls)]) == [""]
    assert len(calls) == 1


def one_hot(scores, token):
    return torch.nn.functional.one_hot(torch.tensor(token), scores.shape[-1]).to(scores).expand_as(scores)


def counted(calls):
    def processor(ids, scores):
        calls.append(ids)
        return scores

    return processor


# --- refused


def test_several_images_are_refused_where_no_token_stands_for_one():
    _, processor = stock("blip")
    with pytest.raises(UserError, match="a prompt of BlipProcessor has one image, not 2"):
        encode_prompt(processor, conversation("what", "", images=2).messages[:1], [image(0), image(1)])


def test_a_conversation_is_refused_with_its_place_in_the_data():
    _, processor = stock("paligemma")
    with pytest.raises(UserError, match=r"^row: PaliGemmaProcessor has no chat template.*/reset"):
        tokenize_branch(processor, conversation("what", "a cat", "and", "a dog"), [image(0)])


def test_a_processor_without_a_known_prompt_is_refused():
    with pytest.raises(UserError, match=r"ViltProcessor has no chat template, and no prompt.*BlipProcessor.*Give it"):
        require_prompt(ViltProcessor(image_processor(), wordpiece_tokenizer()))


def test_a_processor_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="CLIPImageProcessor has no tokenizer"):
        require_prompt(image_processor())


def test_a_chat_template_without_an_image_token_is_refused():
    _, processor = stock("blip-2")
    processor.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="Blip2Processor has no image token id"):
        require_prompt(processor)


def test_a_decoder_behind_an_encoder_is_refused():
    text = {"model_type": "t5", "vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = Blip2Config(vision_config=SIGLIP, qformer_config=QFORMER, text_config=text, num_query_tokens=2)
    with pytest.raises(UserError, match="Blip2ForConditionalGeneration has an encoder that reads the prompt"):
        require_supported(Blip2ForConditionalGeneration(config), stock("blip-2")[1])


def test_mllama_takes_one_number_of_images():
    _, processor = stock("mllama")
    made = [
        Example(tuple(image(i) for i in range(n)), (conversation("what", "2", images=n),), str(n), f"row {n}")
        for n in (1, 2)
    ]
    with pytest.raises(UserError, match="the examples have 1 or 2 images"):
        make_items(made, processor, max_length=99, too_long="error", report=print, progress=lambda steps, total: steps)
