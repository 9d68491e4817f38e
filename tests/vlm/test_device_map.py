"""Models whose parts are on several devices, or kept on disk: their answers are those of the whole model."""

from io import StringIO

import pytest
import torch
from accelerate import infer_auto_device_map
from rich.console import Console
from transformers import AutoModel

from tests.dual_encoders import save_clip
from tests.encoders import ENCODERS
from tests.stock import stock
from tests.tiny import ALL_FUSIONS, image, small_projector, tiny
from tests.vlm.test_qformer_text import reading
from vlm import chat, classify, predict
from vlm.adapters import PROJECTORS, VisionStates
from vlm.adapters.projector import Projector
from vlm.embedding import load_embedder
from vlm.errors import UserError
from vlm.generation import generate, load
from vlm.loading import DTYPES, Placement
from vlm.recognition.likelihood import LabelLikelihood
from vlm.session import Session

TILES = {"type": "tiles", "max_tiles": 4}
MODELS = {
    **{fusion: lambda fusion=fusion: tiny("qwen3", fusion=fusion) for fusion in ALL_FUSIONS},
    "text in the Q-Former": reading,
    "tiles": lambda: tiny(fusion="cross_attention", tiling=TILES),
    "anyres": lambda: tiny(tiling={"type": "anyres", "max_tiles": 4}),
    "several feature layers": lambda: tiny(vision_feature_layer=[-2, 1]),
    "llava": lambda: stock("llava"),
}
FIRST, SECOND = image(1), image(2)


def user(text, images=1):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def conversation(model, processor):
    """Three answers, the last one about a second image."""
    session, messages, answers = Session(model, processor), [], []
    for images, asked in (([FIRST], user("what ?")), ([FIRST], user("and ?", 0)), ([FIRST, SECOND], user("this ?"))):
        messages.append(asked)
        answers.append("".join(session.stream((images, messages), max_new_tokens=3)))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


def answers(model, processor):
    """All ways of answering: a batch in which an image comes twice, a conversation, the likelihood of labels."""
    requests = [([FIRST], [user("what ?")]), ([FIRST], [user("on the street ?")]), ([SECOND], [user("a cat ?")])]
    written = generate(model, processor, requests, max_new_tokens=3)
    likely = LabelLikelihood(model, processor, ["a cat", "a dog"]).scores([FIRST, SECOND])
    return written, conversation(model, processor), likely


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MODELS)
def test_parts_on_disk_answer_as_the_whole_model(name, tmp_path):
    model, processor = MODELS[name]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    parts = [f"model.{part}" for part, _ in model.model.named_children()]
    device_map = {part: "disk" if number % 2 == 0 else "cpu" for number, part in enumerate(parts)}
    split, _ = load(str(tmp_path), device_map=device_map | {"lm_head": "cpu"})
    assert any(parameter.is_meta for parameter in split.parameters())
    written, talked, likely = answers(*load(str(tmp_path), device="cpu"))
    again = answers(split, processor)
    assert (written, talked) == again[:2]
    torch.testing.assert_close(likely, again[2])


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PROJECTORS)
def test_no_projector_is_split(name):
    model, _ = tiny(projector=small_projector(name))
    at_one_device(model, Projector)


def test_an_encoder_that_does_not_say_where_is_not_split():
    model, _ = tiny(vision_config=ENCODERS["timm_vit"].config)
    at_one_device(model, type(model.model.vision_tower))


def at_one_device(model, kind):
    """Whether no amount of memory on a first device splits a module of a `kind` between that and a second one."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    names = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert names
    for share in range(1, 20):
        device_map = infer_auto_device_map(
            model,
            max_memory={0: total * share // 20, 1: 2 * total},
            no_split_module_classes=list(model._no_split_modules),
        )
        for name in names:
            of_it = [place for part, place in device_map.items() if part == name or part.startswith(f"{name}.")]
            assert len(set(of_it)) <= 1, device_map


def test_vision_states_are_moved_whole():
    halves = VisionStates(torch.zeros(1, 2, 4, device="meta"), torch.ones(1, 3, 2, dtype=torch.bool))
    moved = halves.to("meta")
    assert moved.states.is_meta
    assert moved.mask.is_meta


def test_a_dual_encoder_on_disk_has_the_vectors_of_clip(tmp_path):
    torch.manual_seed(0)
    save_clip(tmp_path)
    whole = load_embedder(str(tmp_path), device="cpu")
    split = load_embedder(str(tmp_path), device_map={"": "disk"})
    assert split.model.logit_scale.is_meta
    pixels, texts = whole.prepare_images([FIRST])["pixel_values"], ["a cat", "a dog on the street"]
    torch.testing.assert_close(split.embed_pixels(pixels)[0], whole.embed_pixels(pixels)[0])
    torch.testing.assert_close(split.embed_texts(texts), whole.embed_texts(texts))
    assert split.logit_scale == AutoModel.from_pretrained(tmp_path).logit_scale.exp()


# --- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in tiny():
        part.save_pretrained(folder)
    image(1).save(folder / "photo.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("placement", [Placement("auto", "float32"), Placement("cpu")])
def test_commands_place_the_model(saved, tmp_path, placement):
    photo, found = str(saved / "photo.png"), []
    for number, placed in enumerate((Placement(), placement)):
        said, rows = Console(file=StringIO(), width=100), tmp_path / f"{number}.jsonl"
        chat.run(str(saved), image=photo, question="what ?", console=said, max_new_tokens=4, placement=placed)
        predict.run(
            str(saved), [photo], prompt="a cat ?", output=rows, console=said, max_new_tokens=4, placement=placed
        )
        classify.run(str(saved), [photo], labels="cat,dog", console=said, placement=placed)
        found.append((said.file.getvalue().replace(rows.name, ""), rows.read_text()))
    assert found[0] == found[1]


def test_weights_have_the_dtype_that_is_asked_for(saved):
    model, _ = load(str(saved), **Placement(dtype="bfloat16").options())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_wrong_placements_name_the_valid_ones():
    with pytest.raises(UserError, match=r"dtype 'half' is not valid; choose one of " + ", ".join(DTYPES)):
        Placement(dtype="half")
    with pytest.raises(UserError, match=r"device_map 'gpu' is not valid here; choose one of auto, .*, cpu"):
        Placement("gpu")
    with pytest.raises(UserError, match="device_map 'cuda:77' is not valid here"):
        Placement("cuda:77")
