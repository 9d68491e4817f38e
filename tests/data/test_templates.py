"""Any conversation through chat templates like those of the field: trees are the conversations that templates write.

The reference is the template's own text, tokenized at once, and the answers as they were given.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_conversation import BARE, INST, WITH_SYSTEM, X, processor_with
from tests.tiny import metaspace_tokenizer
from vlm.data.conversation import tokenize_branch
from vlm.data.example import Branch
from vlm.data.trees import make_tree, paths

# As in Gemma and Llama 3: messages are trimmed.
TRIMS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As in Qwen3 and DeepSeek-R1: of an earlier answer only what follows its thoughts is kept.
FORGETS = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + said + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As in Mistral's: a system prompt is put before the last question.
SYSTEM_LAST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if system is defined and loop.index > messages | length - 2 %}{{ system + '\\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)

TEMPLATES = {
    "chatml": (processor_with(), "<|im_end|>"),
    "plain turns": (processor_with(tokenizer=metaspace_tokenizer()), "</s>"),
    "inst": (processor_with(INST, metaspace_tokenizer()), "</s>"),
    "trims": (processor_with(TRIMS), "<|im_end|>"),
    "system prompt": (processor_with(WITH_SYSTEM), "<|im_end|>"),
    "bare": (processor_with(BARE), "\n"),
    "paligemma": (processor_with(name="paligemma"), "<|endoftext|>"),
    "blip2": (processor_with(name="blip2"), "<|endoftext|>"),
    "forgets": (processor_with(FORGETS), "<|im_end|>"),
    "system last": (processor_with(SYSTEM_LAST, metaspace_tokenizer()), "</s>"),
}
WORDS = st.sampled_from(["a cat", "a", "dog on the street", "what ?", "0 1 2", "  is", "the image "])
ANSWERS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join).map(str.strip)


@st.composite
def branches(draw, thoughts=False, system=False):
    """Conversations about the same images, which stand anywhere in the first question."""
    images = draw(st.integers(0, 2))
    parts = [{"type": "image"}] * images + [{"type": "text", "text": draw(ANSWERS)}]
    opening = draw(st.permutations(parts)) if draw(st.booleans()) else parts
    made, same = [], draw(ANSWERS)  # several answers to one question begin right where the branches part
    for _ in range(draw(st.integers(1, 3))):
        question = [*opening, {"type": "text", "text": " " + draw(st.just(same) | ANSWERS)}]
        messages = [{"role": "user", "content": question}]
        for turn in range(draw(st.integers(1, 3))):
            if turn:
                messages.append({"role": "user", "content": [{"type": "text", "text": draw(ANSWERS)}]})
            thought = f"<think>{draw(ANSWERS)}</think>" if thoughts and draw(st.booleans()) else ""
            messages.append({"role": "assistant", "content": [{"type": "text", "text": thought + draw(ANSWERS)}]})
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": draw(ANSWERS)}]})
        made.append(Branch(tuple(messages), where="data.json:7"))
    return made


def written(processor, branch):
    """The ids of the whole text that the template writes."""
    text = processor.apply_chat_template(list(branch.messages))
    text = text.replace(processor.image_token, processor.image_token * processor.image_seq_length)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def answers(branch):
    return [m["content"][0]["text"] for m in branch.messages if m["role"] == "assistant"]


def runs(tokenizer, labels):
    found, run = [], []
    for label in [*labels, X]:
        if label != X:
            run.append(label)
        elif run:
            found.append(tokenizer.decode(run).strip(" "))
            run = []
    return found


def check(name, made):
    processor, end = TEMPLATES[name]
    tree = make_tree([tokenize_branch(processor, branch) for branch in made])
    found = paths(tree)
    assert len(found) == len(made)
    for path, branch in zip(found, made, strict=True):
        whole = written(processor, branch)
        assert path.input_ids == whole[: len(path)]
        assert not processor.tokenizer.decode(whole[len(path) :]).strip(), "nothing but white space is left out"
        assert path.position_ids == list(range(len(path)))
        assert runs(processor.tokenizer, path.labels) == [answer + end for answer in answers(branch)]
        assert all(label in (X, token) for label, token in zip(path.labels, path.input_ids, strict=True))


@pytest.mark.few(5)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "system last"])
def test_trees_are_the_conversations_as_the_template_writes_them(name):
    @settings(deadline=None, derandomize=True, max_examples=30, database=None)
    @given(branches())
    def every(made):
        check(name, made)

    every()


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(branches(thoughts=True))
def test_thoughts_that_are_forgotten_later_are_refused(made):
    """Right with thoughts in the last answer, refused with thoughts in an earlier one: nothing in between."""
    forgotten = any("</think>" in answer for branch in made for answer in answers(branch)[:-1])
    if forgotten:
        with pytest.raises(ValueError, match=r"data\.json:7: the chat template changes earlier turns.*chatml"):
            check("forgets", made)
    else:
        check("forgets", made)


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(branches(system=True))
def test_a_system_prompt_that_wanders_is_refused(made):
    """Written before the last question, it moves with each turn."""
    several = any(len(answers(branch)) > 1 for branch in made)
    if several:
        with pytest.raises(ValueError, match="the chat template changes earlier turns"):
            check("system last", made)
    else:
        check("system last", made)
