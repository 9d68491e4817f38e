"""Tiny vision-language models of transformers whose processors have no chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from tests.tiny import LINES, byte_level_tokenizer, image_processor, text_config

SIGLIP = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "encoder_hidden_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: `[CLS]` before a text, `[SEP]` behind it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[DEC]", **names)


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """As OPT's: byte-level BPE, one token before a text that also ends it."""
    tokenizer = byte_level_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return tokenizer


def opt_config(tokenizer: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        dropout=0.0,
        max_position_embeddings=256,
        init_std=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _with_queries(model: Any) -> Any:
    """Queries are zero at their start, and the vision tower is near it: no image would matter."""
    for name, parameter in model.named_parameters():
        if "query_tokens" in name or ("vision_model" in name and parameter.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def paligemma(sliding_window: int = 4096) -> tuple[Any, Any]:
    """Image and question see each other both ways, the answer goes on from left to right."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokens = ["<image>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16
    processor = PaliGemmaProcessor(pictures, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SIGLIP | {"vision_use_head": False, "model_type": "siglip_vision_model"},
        text_config=text_config(
            "gemma2",
            2,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            sliding_window=sliding_window,
        ),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    config.vision_config.projection_dim = 32
    return PaliGemmaForConditionalGeneration(config), processor


def blip2() -> tuple[Any, Any]:
    tokenizer = opt_tokenizer()
    config = Blip2Config(
        vision_config=SIGLIP,
        qformer_config=QFORMER,
        text_config=opt_config(tokenizer),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    return _with_queries(Blip2ForConditionalGeneration(config)), processor


def instructblip() -> tuple[Any, Any]:
    """As BLIP-2, and what is asked goes to the Q-Former too."""
    tokenizer, words = opt_tokenizer(), wordpiece_tokenizer()
    config = InstructBlipConfig(
        vision_config=SIGLIP,
        qformer_config=QFORMER | {"vocab_size": len(words)},
        text_config=opt_config(tokenizer),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    processor = InstructBlipProcessor(pictures, tokenizer, words, num_query_tokens=4)
    return _with_queries(InstructBlipForConditionalGeneration(config)), processor


def idefics(additional_vocab_size: int = 0, **changes: Any) -> tuple[Any, Any]:
    """Gated cross-attention to the images that `image_attention_mask` shows to each token."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokens = ["<fake_token_around_image>", "<image>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = IdeficsConfig(
        vocab_size=len(tokenizer) - additional_vocab_size,
        additional_vocab_size=additional_vocab_size,
        **shape | changes,
        initializer_range=0.2,
        alpha_initializer="ones",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vision_config={"embed_dim": 24, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2},
    )
    return IdeficsForVisionText2Text(config), IdeficsProcessor(IdeficsImageProcessor(image_size=32), tokenizer)


def blip() -> tuple[Any, Any]:
    """The words attend to an encoded image. `[DEC]` stands where BERT has `[CLS]`."""
    tokenizer = wordpiece_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 0}
    text |= {"bos_token_id": 4, "sep_token_id": 3, "eos_token_id": 3, "max_position_embeddings": 128}
    config = BlipConfig(vision_config=SIGLIP, text_config=text)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    return _with_queries(BlipForConditionalGeneration(config)), processor


def git() -> tuple[Any, Any]:
    """The patches of an image stand before the words, and no token stands for them."""
    tokenizer = wordpiece_tokenizer()
    config = GitConfig(
        vision_config=SIGLIP,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GitForCausalLM(config), GitProcessor(image_processor(), tokenizer)


PROMPTED: dict[str, Callable[..., tuple[Any, Any]]] = {
    "paligemma": paligemma,
    "blip-2": blip2,
    "instructblip": instructblip,
    "idefics": idefics,
    "blip": blip,
    "git": git,
}
