"""Two files for llama.cpp: the language model, and the encoder with its projector (`mmproj`).

Keys and names are those that llama.cpp reads (`tools/mtmd/clip.cpp`, `conversion/`); its package `gguf` knows most of
them. Matrices are float16, all else float32.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.chat_templates import without_marks
from vlm.errors import UserError, nearest
from vlm.interop.family import image_of
from vlm.interop.idefics3 import Idefics3
from vlm.interop.standardize import folded
from vlm.modeling import VLMForConditionalGeneration

DECODERS = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Type of the language model to its name in `gguf.MODEL_ARCH`."""
ENCODERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision")
PROJECTORS = {
    "mlp": {"linear_1": "mm.0", "linear_2": "mm.2"},
    "pixel_shuffle": {"proj": "mm.model.fc"},
}
"""Layers of a projector of ours to their names."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "": "gpt-2",
    "Digits": "smollm",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}
"""What a byte-level tokenizer splits a text by, to llama.cpp's name for it."""


def check_expressible(model: VLMForConditionalGeneration, processor: Any) -> None:
    """Raises UserError, naming the reason, for a model that llama.cpp has no graph for."""
    config = model.config
    kind, encoder, decoder = config.projector["type"], config.vision_config, config.text_config
    if config.fusion != "prefix" or config.image_attention != "causal":
        raise UserError("llama.cpp is given models with fusion: prefix and image_attention: causal alone")
    if config.tiling is not None:
        raise UserError(
            "this model's images are cut into tiles, in another way than llama.cpp's; whole ones are needed"
        )
    if kind not in PROJECTORS:
        raise UserError(f"the projector is {kind}; for llama.cpp it has to be {' or '.join(PROJECTORS)}")
    if encoder.model_type not in ENCODERS:
        raise UserError(f"the encoder is {encoder.model_type}; llama.cpp is given {', '.join(ENCODERS)} alone")
    if decoder.model_type not in DECODERS:
        raise UserError(
            f"the language model is {decoder.model_type}, for which there is no description; "
            f"{nearest(decoder.model_type, DECODERS)}"
        )
    if (rope := decoder.rope_parameters.get("rope_type", "default")) != "default":
        raise UserError(f"the language model's rope_type is {rope}; only default is written")
    if config.vision_feature_select_strategy == "full" and image_of(model, processor).num_prefix:
        raise UserError("llama.cpp leaves the class token out, and this model was trained with it (full)")
    if isinstance(config.vision_feature_layer, list):
        raise UserError(f"this model reads layers {config.vision_feature_layer} of its encoder; only one is written")
    side = encoder.image_size
    if (size := image_of(model, processor).size) != (side, side):
        raise UserError(
            f"images have to be {side} x {side} pixels, as the encoder was made for, not {size[0]} x {size[1]}"
        )
    if kind == "pixel_shuffle":
        if config.vision_feature_layer is not None:
            raise UserError("with pixel_shuffle llama.cpp reads the encoder's output, and this model an earlier layer")
        Idefics3().chat_template(processor, processor.image_token)  # llama.cpp writes the same markers around an image


def notice(model: VLMForConditionalGeneration) -> str | None:
    """What llama.cpp of October 2026 does otherwise with such a file, as measured; None if nothing."""
    if model.config.projector["type"] == "pixel_shuffle":
        return "llama.cpp shows the image twice, as a tile and as a whole; this model was trained with one of them"
    if model.config.vision_config.model_type == "clip_vision_model":
        return "llama.cpp puts CLIP's class token behind the patches and takes it from before them: answers are worse"
    return None


def write(model: VLMForConditionalGeneration, processor: Any, folder: Path) -> tuple[Path, Path]:
    """Write `model.gguf` and `mmproj.gguf` into `folder`. Raises UserError as [`check_expressible`], for a tokenizer
    that is not byte-level or splits texts in a way unknown here, and without the package `gguf`."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("writing for llama.cpp needs a package: pip install gguf")
    check_expressible(model, processor)
    embeddings: Any = model.get_input_embeddings()
    tokenizer = _tokenizer(processor, embeddings.num_embeddings)
    weights = folded(model)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "model.gguf", folder / "mmproj.gguf"
    _write_language(model, weights, tokenizer, paths[0])
    _write_vision(model, processor, weights, paths[1])
    return paths


def _write_language(model: Any, weights: Mapping[str, Tensor], tokenizer: Mapping[str, Any], path: Path) -> None:
    import gguf

    config = model.config.text_config
    arch = gguf.MODEL_ARCH[DECODERS[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(len(tokenizer["tokens"]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer["pre"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    writer.add_token_merges(tokenizer["merges"])
    writer.add_add_bos_token(False)  # the chat template writes it
    for name, token_id in tokenizer["special"].items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template(tokenizer["chat_template"])
    for name, tensor in language_tensors(model, weights):
        _add(writer, name, tensor)
    _close(writer)


def language_tensors(model: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors as llama.cpp names and lays them out."""
    import gguf

    config = model.config.text_config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[DECODERS[config.model_type]], config.num_hidden_layers)
    for name, tensor in weights.items():
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
            continue
        name = model.language_head.name_in_causal_lm(name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp has no place for {name} of the language model")
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            # Rotated pairs are halves of a head in transformers, and neighbours in llama.cpp.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield found, tensor


def _write_vision(model: Any, processor: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    import gguf

    config, vision = model.config, model.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    writer.add_vision_block_count(layers_run(config))
    if config.projector["type"] == "mlp":
        writer.add_clip_projector_type("mlp")
        writer.add_bool("clip.has_llava_projector", True)
        # Else llama.cpp leaves out the last layer, as LLaVA does.
        writer.add_array("clip.vision.feature_layer", [layers_run(config)])
    else:
        writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
        writer.add_vision_projector_scale_factor(config.projector.get("scale_factor", 2))
        writer.add_vision_preproc_image_size(vision.image_size)
    for name, tensor in vision_tensors(model, weights):
        _add(writer, name, tensor)
    _close(writer)


def layers_run(config: Any) -> int:
    """How many layers of the encoder the features have gone through."""
    depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if layer is None:
        return depth
    return layer if layer >= 0 else depth + 1 + layer


def vision_tensors(model: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of encoder and projector as llama.cpp names them, without those that are not used: layers behind the
    one that is read, the final norm if features are from before it, the pooling."""
    import gguf

    config = model.config
    layers = layers_run(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision_config.num_hidden_layers)
    has_final_norm = config.vision_feature_layer is None and config.vision_config.model_type != "clip_vision_model"
    for name, tensor in weights.items():
        if name.startswith("model.multi_modal_projector."):
            layer, kind = name.removeprefix("model.multi_modal_projector.").rsplit(".", 1)
            yield f"{PROJECTORS[config.projector['type']][layer]}.{kind}", tensor
        elif name.startswith("model.vision_tower."):
            name = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            part, *rest = name.split(".")
            unused = part == "head" or (part == "post_layernorm" and not has_final_norm)
            if unused or (part == "encoder" and int(rest[1]) >= layers):
                continue
            found = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
            if found is None:
                raise UserError(f"llama.cpp has no place for {name} of the encoder")
            yield found, tensor.flatten() if part == "embeddings" and rest == ["class_embedding"] else tensor


def stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor in the number format that it is written in."""
    half = tensor.ndim > 1 and "position_embd" not in name
    return tensor.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    writer.add_tensor(name, stored(name, tensor).numpy())


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(processor: Any, size: int) -> dict[str, Any]:
    """The tokenizer as llama.cpp takes it: a token for each of the `size` embeddings."""
    import gguf

    tokenizer = processor.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        raise UserError("only byte-level BPE tokenizers, such as those of GPT-2, Llama 3 and Qwen, are written")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
        if number in added:
            types[number] = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
    names = ("bos", "eos", "pad", "unk")
    special = {name: number for name in names if (number := getattr(tokenizer, f"{name}_token_id")) is not None}
    if ends := [number for number, token in added.items() if token.content == "<|im_end|>"]:
        special["eot"] = ends[0]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]]
    return {
        "pre": _pre_tokenizer(state["pre_tokenizer"]),
        "tokens": tokens,
        "types": types,
        "merges": merges,
        "special": special,
        "chat_template": without_marks(_text_template(processor.chat_template)),
    }


def _pre_tokenizer(state: Mapping[str, Any]) -> str:
    steps = state.get("pretokenizers", [state])
    *splits, last = steps
    key = None
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not splits:
            key = ""
        elif splits[0]["type"] == "Digits":
            key = "Digits"
        elif splits[0]["type"] == "Split":
            key = splits[0]["pattern"].get("Regex")
    if key not in PRE_TOKENIZERS:
        raise UserError("this tokenizer splits texts in a way that is none of " + ", ".join(PRE_TOKENIZERS.values()))
    return PRE_TOKENIZERS[key]


def _text_template(template: str) -> str:
    """A chat template for contents that are text, as llama.cpp has them: without what makes text of their parts."""
    return template.rpartition("{%- set messages = ns.flat -%}")[2]
