"""Tiny models with random weights, tokenizers trained on a few lines, and images: everything made here, in moments."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from vlm.adapters import PROJECTORS
from vlm.build import assemble
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor

torch.set_num_threads(1)  # several only wait for each other in models this small

VOCABULARY = 320
LINES = ["user assistant system what is in the image ? a cat and a dog on the street \n 0 1 2 3"] * 4
FUSIONS = ["prefix", "cross_attention", "cross_attention_layers", "prefix+cross_attention"]
"""What `tiny` takes: `cross_attention` has Flamingo's blocks, `cross_attention_layers` is the same with Mllama's."""
ALL_FUSIONS = [*FUSIONS, "cross_attention_block"]
"""And with those of Idefics."""
SMALL: dict[str, dict[str, Any]] = {
    "c_abstractor": {"hidden_size": 16, "depth": 2},
    "qformer": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4},
}
CONFIGS: dict[str, Any] = {
    "cohere": CohereConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "granite": GraniteConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
DECODERS = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]


def byte_level_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: byte-level BPE, no token before a text, ChatML's tokens known."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: SentencePiece-like BPE with byte fallback, `<s>` before a text, no chat template and no padding."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer = _without_added_tokens(tokenizer)  # bytes are pieces, not tokens to look for in a text
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))


TOKENIZERS = {"byte_level": byte_level_tokenizer, "metaspace": metaspace_tokenizer}


def text_config(name: str = "llama", layers: int = 4, **changes: Any) -> PreTrainedConfig:
    """A decoder 32 wide with 4 heads."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.2,
    } | changes
    if name == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names["max_position_embeddings"] = "n_positions"
        drop = ("num_key_value_heads", "intermediate_size")
        common = {names.get(key, key): value for key, value in common.items() if key not in drop}
        return GPT2Config(**common, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if name in ("qwen3", "gemma2", "gemma3"):
        common.setdefault("head_dim", 16)
    if name == "gemma3":
        common.setdefault("sliding_window", 8)
        common["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return CONFIGS[name](**common)


def clip_config(**changes: Any) -> CLIPVisionConfig:
    """A ViT with 4 x 4 patches and a class token, 24 wide."""
    return CLIPVisionConfig(
        **{
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        }
        | changes
    )


def image_processor(size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def small_projector(name: str) -> dict[str, Any]:
    """The projector `name` with few weights, and with 4 tokens if it can be told how many."""
    fixed = "num_image_tokens" in inspect.signature(PROJECTORS[name]).parameters
    return {"type": name, **({"num_image_tokens": 4} if fixed else {}), **SMALL.get(name, {})}


def tiny(
    decoder: str = "llama",
    fusion: str = "prefix",
    projector: Any = "mlp",
    *,
    vision_config: PreTrainedConfig | None = None,
    tokenizer: Any = None,
    gates: bool = True,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    text: PreTrainedConfig | None = None,
    **options: Any,
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """A model and its processor. `gates` opens the cross-attention gates, so that images matter. `text` configures the
    decoder in place of its name."""
    torch.manual_seed(seed)
    if fusion == "cross_attention_block":
        fusion, options = "cross_attention", {"cross_attention_block": "idefics", **options}
    if fusion == "cross_attention_layers":
        fusion, options = "cross_attention", {"cross_attention_layers": [1, 4], **options}
    model, processor = assemble(
        AutoModel.from_config(vision_config or clip_config()),
        AutoModelForCausalLM.from_config(text or text_config(decoder, tie_word_embeddings=tie_word_embeddings)),
        image_processor(),
        tokenizer or byte_level_tokenizer(),
        projector=projector,
        fusion=fusion,
        **{"cross_attention_every": 2, **options},
    )
    if gates:
        open_gates(model)
    return model.eval(), processor


@torch.no_grad()
def open_gates(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.fill_(1.0)
        elif "multi_modal_projector" in name or "cross_attention" in name:
            parameter.normal_(std=0.3)  # visual tokens as large as words


def language_weights(model: VLMForConditionalGeneration) -> dict[str, Tensor]:
    """The weights of decoder and head, as the causal language model that they were taken from calls them, without
    cross-attention."""
    bridge = ("model.vision_tower.", "model.multi_modal_projector.", "model.tile_positions.", "model.anyres_merger.")
    return {
        model.language_head.name_in_causal_lm(name).replace(".layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(bridge) and ".cross_attention." not in name
    }


def causal_lm(model: VLMForConditionalGeneration) -> PreTrainedModel:
    """The causal language model with the weights of a model's decoder and head."""
    made = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    made.load_state_dict(language_weights(model))
    return made


def with_older_names(model: VLMForConditionalGeneration, state: dict[str, Any]) -> dict[str, Any]:
    """Weights as earlier versions named them: no `model.` before the bridge, the language model whole."""
    decoder = model.language_head.base_model_prefix
    older = {}
    for name, tensor in state.items():
        if name.startswith("model.language_model."):
            name = f"language_model.{decoder}.{name.removeprefix('model.language_model.')}"
        elif name.startswith("model."):
            name = name.removeprefix("model.")
        else:
            name = f"language_model.{name}"
        older[name] = tensor
    return older


def image(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*parts: str | Image.Image) -> dict[str, Any]:
    """A user message of images and texts, in order."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def encode(processor: Any, conversations: list[list[dict[str, Any]]], **kwargs: Any) -> Any:
    """Conversations as a left-padded batch that waits for the assistant."""
    processor.tokenizer.padding_side = "left"
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
        **kwargs,
    )


@torch.no_grad()
def logits(model: torch.nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def continuation(model: Any, inputs: Any, tokens: int = 6, **kwargs: Any) -> list[list[int]]:
    """Ids that greedy decoding adds to each row."""
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
