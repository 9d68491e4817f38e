"""The statistics that a projector of ours standardises features with, put into a layer that stock models have too."""

from __future__ import annotations

from torch import Tensor

from vlm.errors import UserError
from vlm.modeling import VLMForConditionalGeneration

FIRST_LINEAR = {"linear": "linear", "mlp": "linear_1"}
"""Projectors that begin with a linear layer that has a bias: `W (x - mean) / std + b` is another one."""
FINAL_NORM = {
    "siglip_vision_model": "post_layernorm",
    "siglip2_vision_model": "post_layernorm",
    "idefics3_vision": "post_layernorm",
    "smolvlm_vision": "post_layernorm",
    "dinov2": "layernorm",
}
"""Encoders whose output is that of a layer norm: `((w x + b) - mean) / std` is another one."""


def folded(model: VLMForConditionalGeneration) -> dict[str, Tensor]:
    """The model's weights without `standardize`, computing the same.

    Raises UserError where no layer can take the statistics exactly.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if ".standardize." not in name}
    standardize = model.model.multi_modal_projector.standardize
    (_, mean), (_, std) = standardize.mean.double(), standardize.std.double()
    if not standardize.mean.any() and bool((standardize.std == 1).all()):
        return state
    config = model.config
    if config.vision_feature_select_strategy == "full" and bool((standardize.std[0] != 1).any()):
        raise UserError(
            "class tokens and patches are standardised by statistics of their own, which no stock projector does; only "
            "a model trained with data_dependent_init: false, or with vision_feature_select_strategy: default, can"
        )
    if linear := FIRST_LINEAR.get(config.projector["type"]):
        weight, bias = (f"model.multi_modal_projector.{linear}.{kind}" for kind in ("weight", "bias"))
        scaled = state[weight].double() / std
        state[bias] = (state[bias].double() - scaled @ mean).to(state[bias])
        state[weight] = scaled.to(state[weight])
        return state
    norm = FINAL_NORM.get(config.vision_config.model_type)
    if norm is None or config.vision_feature_layer is not None:
        raise UserError(
            f"the statistics that the {config.projector['type']} projector standardises features with fit into none of "
            "its layers, nor into a final norm of the encoder; only a model trained with data_dependent_init: false can"
        )
    weight, bias = (f"model.vision_tower.{norm}.{kind}" for kind in ("weight", "bias"))
    state[bias] = ((state[bias].double() - mean) / std).to(state[bias])
    state[weight] = (state[weight].double() / std).to(state[weight])
    return state
