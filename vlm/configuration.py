"""The configuration of a vision encoder, a bridge and a language model."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from vlm.adapters import LARGEST, PROJECTORS, unknown_name
from vlm.tiling import tiler_of

BLOCKS = ("flamingo", "idefics")
FUSIONS = ("prefix", "cross_attention", "prefix+cross_attention")
IMAGE_ATTENTIONS = ("causal", "bidirectional", "prefix_lm")


class VLMConfig(PreTrainedConfig):
    """Configuration of [`VLMForConditionalGeneration`].

    Args:
        vision_config: any configuration `AutoModel` knows, timm's through `TimmWrapperConfig`.
        text_config: any configuration `AutoModelForCausalLM` knows.
        projector: `{"type": NAME, **options}` with a name of [`vlm.adapters.PROJECTORS`] and that projector's options,
            or the name alone.
        fusion: `prefix` puts the visual tokens into the sequence (LLaVA), `cross_attention` lets decoder layers attend
            to them (Flamingo), `prefix+cross_attention` does both (NVLM-H).
        cross_attention_every: with cross-attention, every how many decoder layers a block is inserted.
        cross_attention_block: whose block: `flamingo`, or `idefics`, whose first stands before the first layer. With
            cross-attention alone, Idefics' visual tokens are as wide as the encoder's features.
        cross_attention_layers: where layers as Llama 3.2 Vision's stand instead, as in `MllamaTextConfig`: positions in
            the list of all layers, these among them; `mllama` is its own, 3, 8, 13 ... to the end of the decoder.
        image_token_id: the token that holds an image's place in `input_ids`.
        image_seq_length: how many such tokens an image, or with tiling each of its tiles, takes: the projector's tokens
            with `prefix`, else 1.
        image_attention: whom an image's tokens see with `prefix`: what is before them, as words do (`causal`), their
            whole image too (`bidirectional`, as in Gemma 3), or all of the prompt, whose words see all of it as well
            (`prefix_lm`, as in PaliGemma; with any fusion). The prompt ends where the first answer begins.
        vision_feature_layer: which hidden state of the encoder is used, as in LLaVA (-2 there), or a list of them,
            concatenated on channels. `None` is the encoder's own `last_hidden_state`, after its final norm; for SigLIP
            that is not the same as -1.
        vision_feature_select_strategy: `default` leaves the class and register tokens out, `full` keeps them.
        tiling: how images are cut into tiles, the attributes of [`vlm.tiling.Tiler`]; `None`: an image is one image.
        vision_hidden_size: the width of the features that the projector reads; `None` asks the encoder.
    """

    model_type = "vlm"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - as in transformers
        "cache",
        "vision_states",
        "image_hidden_states",
        "image_outputs",
    ]
    sub_configs_defaults = {  # noqa: RUF012 - the name and form transformers looks for
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    text_config: Any = None
    projector: Any = None
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix"
    cross_attention_every: int = 4
    cross_attention_block: Literal["flamingo", "idefics"] = "flamingo"
    cross_attention_layers: list[int] | Literal["mllama"] | None = None
    image_token_id: int = 0
    image_seq_length: int = 1
    image_attention: Literal["causal", "bidirectional", "prefix_lm"] = "causal"
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    tiling: Any = None
    vision_hidden_size: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        projector = self.projector or "mlp"
        if not isinstance(projector, str | dict):
            raise ValueError(f"projector must be a name, or an object with `type`, not {projector!r:.80}")
        for name, least in (("cross_attention_every", 1), ("image_seq_length", 1), ("image_token_id", 0)):
            if type(value := getattr(self, name)) is not int or not least <= value <= LARGEST:
                raise ValueError(f"{name} must be a whole number from {least} to {LARGEST:,}, not {value!r:.80}")
        self.projector = {"type": projector} if isinstance(projector, str) else dict(projector)
        if self.projector.get("type") not in PROJECTORS:
            raise unknown_name("projector", str(self.projector.get("type")), PROJECTORS)
        if self.fusion not in FUSIONS:
            raise unknown_name("fusion", str(self.fusion), FUSIONS)
        if self.cross_attention_block not in BLOCKS:
            raise unknown_name("cross_attention_block", str(self.cross_attention_block), BLOCKS)
        if self.cross_attention_block != "flamingo" and self.cross_attention_layers is not None:
            raise ValueError(
                "cross_attention_layers places blocks of Llama 3.2 Vision: leave out cross_attention_block"
            )
        if self.image_attention not in IMAGE_ATTENTIONS:
            raise unknown_name("image_attention", str(self.image_attention), IMAGE_ATTENTIONS)
        if (tiler := tiler_of(self.tiling)) is not None and tiler.type == "anyres":
            if not self.uses_prefix:
                raise ValueError(
                    "tiling of type anyres puts the tokens of all tiles into reading order, which cross_attention does "
                    "not see: choose type tiles"
                )
            if tiler.token_grid is None:
                raise ValueError("tiling of type anyres needs the token_grid of a tile")
        super().__post_init__(**kwargs)
        # The head belongs to the language model, whose own configuration says whether it is tied.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def uses_prefix(self) -> bool:
        return "prefix" in self.fusion

    @property
    def uses_cross_attention(self) -> bool:
        return "cross_attention" in self.fusion

    @property
    def use_qformer_text_input(self) -> bool:
        """Whether the projector reads what is asked about an image, so that its tokens differ from question to
        question."""
        return bool(self.projector.get("use_qformer_text_input"))
