"""Tiny models of transformers that have a counterpart among ours, with their processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Blip2VisionConfig,
    InternVLVisionConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from typer.testing import CliRunner

from tests import stock
from tests.stock_prompted import SIGLIP, blip2, instructblip, opt_config, opt_tokenizer, paligemma
from tests.stock_prompted import idefics as stock_idefics
from tests.tiny import byte_level_tokenizer, encode, image, open_gates, text_config, tiny, user
from vlm.build import assemble
from vlm.cli import app
from vlm.processing import QFORMER_INPUTS


def llava() -> tuple[Any, Any]:
    return stock.llava()


def internvl() -> tuple[Any, Any]:
    model, processor = stock.STOCK["internvl"]()
    processor.image_processor.max_patches = 1
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "cls_token" in name:  # zero at their start
            torch.nn.init.normal_(parameter)
    return model, processor


def _one_tile(name: str) -> tuple[Any, Any]:
    model, processor = stock.STOCK[name]()
    processor.image_processor.do_image_splitting = False
    return model, processor


def internvl_in_tiles() -> tuple[Any, Any]:
    model, processor = internvl()
    processor.image_processor.max_patches = 6
    return model, processor


def idefics(**changes: Any) -> tuple[Any, Any]:
    """As published: a resampler, norms on queries and keys, a block for every second layer, two tokens added."""
    perceiver = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 3, "resampler_head_dim": 6}
    shape = {"num_hidden_layers": 4, "cross_layer_interval": 2, "use_resampler": True, "qk_layer_norms": True}
    shape |= {"perceiver_config": perceiver | {"qk_layer_norms_perceiver": True}, "additional_vocab_size": 2}
    model, processor = stock_idefics(**shape | changes)
    vary(model)
    return model, processor


def idefics2() -> tuple[Any, Any]:
    """Images lose their proportions, so that all of a batch are of one size."""
    model, processor = stock.STOCK["idefics2"]()
    processor.image_processor.size = {"height": 32, "width": 32}
    vary(model)
    return model, processor


def mllama() -> tuple[Any, Any]:
    """As its base model is asked: an image stands first. A tile is 48 x 48 pixels, so that those here are one."""
    model, processor = stock.STOCK["mllama"](image_size=48)
    processor.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    vary(model)
    return model, processor


@torch.no_grad()
def vary(model: Any) -> None:
    """Norms of any size, and resamplers that look at some patches more than at others: as they start, it would not
    matter which norm is which, nor how latents attend."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif "perceiver" in name:
            parameter.normal_(std=0.4)


COUNTERPARTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "idefics3": lambda: _one_tile("idefics3"),
    "smolvlm": lambda: _one_tile("smolvlm"),
    "internvl": internvl,
    "gemma3": stock.gemma3,
    "idefics": idefics,
    "idefics2": idefics2,
    "mllama": mllama,
    "paligemma": lambda: paligemma(sliding_window=24),
    "blip2": blip2,
    "instructblip": instructblip,
}
"""By the names of `FAMILIES`; an image is one tile."""

IN_TILES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_next, tiles": stock.llava_next,
    "idefics3, tiles": stock.idefics3,
    "smolvlm, tiles": stock.smolvlm,
    "internvl, tiles": internvl_in_tiles,
}
"""The same where images are cut into several; their processors become ours too."""


def counterpart(name: str) -> tuple[Any, Any]:
    """A stock model in evaluation mode, and its processor."""
    torch.manual_seed(0)
    model, processor = (COUNTERPARTS | IN_TILES)[name]()
    return model.eval(), processor


def asked(processor: Any, *questions: tuple[Any, ...]) -> Any:
    """Questions, each of images and texts in their order, as a left-padded batch that waits for answers."""
    if processor.chat_template is not None:
        return encode(processor, [[user(*parts)] for parts in questions])
    processor.tokenizer.padding_side = "left"
    if type(processor).__name__ == "IdeficsProcessor":
        return processor(text=[list(parts) for parts in questions], padding=True)
    images = [[part for part in parts if not isinstance(part, str)] for parts in questions]
    texts = ["".join(part for part in parts if isinstance(part, str)) for parts in questions]
    if type(processor).__name__ == "PaliGemmaProcessor":
        texts = ["<image>" * len(row) + text for row, text in zip(images, texts, strict=True)]
    made = processor(images=images, text=texts, return_tensors="pt", padding=True)
    made.pop("labels", None)
    return made


def siglip(projector: Any, **options: Any) -> tuple[Any, Any]:
    return squares(SiglipVisionConfig(**SIGLIP, vision_use_head=False), projector, **options)


def squares(vision: Any, projector: Any, **options: Any) -> tuple[Any, Any]:
    """A model of ours and its processor, which stretches images to a square."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(vision)
    decoder = options.pop("decoder", "llama")
    decoder = text_config(decoder) if isinstance(decoder, str) else decoder
    language_model = AutoModelForCausalLM.from_config(decoder)
    pictures = options.pop("pictures", None) or SiglipImageProcessor(size={"height": 32, "width": 32})
    tokenizer = options.pop("tokenizer", None) or byte_level_tokenizer()
    model, processor = assemble(tower, language_model, pictures, tokenizer, projector=projector, **options)
    open_gates(model)
    return model.eval(), processor


PHOTO = image(5, (90, 40))
"""What exported models are asked about: large enough to be cut into tiles."""


def fit(model, seed=1):
    """Give a model's projector statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    standardize = model.model.multi_modal_projector.standardize
    standardize.mean.normal_(generator=generator)
    standardize.std.uniform_(0.5, 2, generator=generator)


def export(model: Any, processor: Any, name: str, folder: Path) -> None:
    """Save a model of ours in `folder`, export it to `folder/out`, and put messages there to ask it with.

    `name` is what follows `--to`, or one of `EXPRESSIBLE`.
    """
    target = name.partition(",")[0]
    model.save_pretrained(folder / "run" / "model")
    processor.save_pretrained(folder / "run" / "model")
    PHOTO.save(folder / "photo.png")
    parts = [{"type": "image", "path": str(folder / "photo.png")}, {"type": "text", "text": "what is it ?"}]
    (folder / "messages.json").write_text(json.dumps([{"role": "user", "content": parts}]))
    command = ["export", str(folder / "run"), "--to", target, "--output", str(folder / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output


def for_ours(inputs: Any) -> dict[str, Any]:
    """What our model takes of the stock processor's output."""
    pixels = inputs["pixel_values"]
    names = ("input_ids", "attention_mask", "token_type_ids", *QFORMER_INPUTS)
    given = {name: inputs[name] for name in names if name in inputs}
    return given | {"pixel_values": pixels.flatten(0, -4)[pixels.flatten(0, -4).flatten(1).any(dim=1)]}


INTERN_VIT = InternVLVisionConfig(**SIGLIP | {"image_size": [32, 32], "patch_size": [8, 8]})


def gemma3() -> tuple[Any, Any]:
    markers = ("\n\n<start_of_image>", "<end_of_image>\n\n")
    pool = {"type": "average_pool", "num_image_tokens": 4}
    return siglip(pool, decoder="gemma3", image_markers=markers, image_attention="bidirectional")


def own_paligemma() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    options: dict[str, Any] = {"image_attention": "prefix_lm", "chat_template": "paligemma", "tokenizer": tokenizer}
    return siglip("linear", decoder=text_config("gemma2", 2, sliding_window=8), **options)


def own_blip2(decoder: Any = None, reads_text: bool = False, **changes: Any) -> tuple[Any, Any]:
    tokenizer = opt_tokenizer()
    qformer: dict[str, Any] = {"type": "qformer", "num_image_tokens": 4, "hidden_size": 16, "num_attention_heads": 2}
    options = {"vision_feature_select_strategy": "full", "chat_template": "blip2", "tokenizer": tokenizer} | changes
    qformer["use_qformer_text_input"] = reads_text
    vision = Blip2VisionConfig(**SIGLIP)
    return squares(vision, qformer, decoder=decoder or opt_config(tokenizer), **options)


IDEFICS3_MARKERS = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
ANYRES = {"type": "anyres", "max_tiles": 4, "grids": [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]}
EXPRESSIBLE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": lambda: tiny(vision_feature_layer=-2),
    "llava_next": lambda: tiny(vision_feature_layer=-2, tiling=ANYRES),
    "idefics3": lambda: siglip({"type": "pixel_shuffle"}, image_markers=IDEFICS3_MARKERS),
    "idefics3, tiles": lambda: siglip({"type": "pixel_shuffle"}, tiling={"type": "idefics3", "max_tiles": 9}),
    "smolvlm": lambda: siglip({"type": "pixel_shuffle"}, image_markers=IDEFICS3_MARKERS),
    "smolvlm, tiles": lambda: siglip({"type": "pixel_shuffle"}, tiling={"type": "idefics3", "max_tiles": 9}),
    "gemma3": gemma3,
    "internvl": lambda: squares(INTERN_VIT, "pixel_shuffle_mlp", image_markers=("<img>", "</img>")),
    "internvl, tiles": lambda: squares(
        INTERN_VIT, "pixel_shuffle_mlp", image_markers=("<img>", "</img>"), tiling={"type": "internvl", "max_tiles": 6}
    ),
    "paligemma": own_paligemma,
    "blip2": own_blip2,
    "instructblip": lambda: own_blip2(reads_text=True),
}
"""Models of ours, by what they can become, and how."""
PROMPTED = {"paligemma", "blip2", "instructblip"}
"""Those whose processors have no chat template, so that no server of chats takes them."""
WITHOUT_STATISTICS = ("internvl", "internvl, tiles", "blip2", "instructblip")
"""Those whose layers can take none."""
