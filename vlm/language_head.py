"""What a causal language model does after its decoder: output layer, scaling, softcapping, loss.

Any `AutoModelForCausalLM` is taken apart. Its decoder becomes the `language_model` of `VLMModel`; what is left runs on
the outputs of that decoder, in the family's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

DECODER = "model.language_model"
"""The name of the decoder in `VLMForConditionalGeneration`."""
COLLECTED = (
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
)
"""Sets of names that a model of transformers collects from its parts."""
PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")
"""How parts are distributed over devices, by name."""


class _Handed:
    """The outputs of a decoder on their way through a causal language model, which takes them for embeddings."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outputs.last_hidden_state, name)  # some look at the shape


class _GivenOutputs(nn.Module):
    """In place of a decoder: returns the outputs that it is handed in place of embeddings, and has its attributes.

    A causal language model may call a part of the decoder in place of the whole (OPT's `model.decoder`).
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self._decoder = (decoder,)  # not as a submodule
        self._parts = {name for name, part in decoder.named_children() if isinstance(part, PreTrainedModel)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        return self if name in self._parts else getattr(self._decoder[0], name)

    def forward(self, *args: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        return inputs_embeds.outputs


class LanguageHead:
    """A causal language model without its decoder.

    It is no module itself: its submodules, parameters and buffers belong to an owner, under the same names
    (`lm_head`), and are looked up there at each call, since they may be replaced (by resizing, quantization or peft).

    Attributes:
        causal_lm: the model that was taken apart.
        base_model_prefix: what it calls its decoder.
        output_embeddings: what it calls its output layer.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.causal_lm, self.base_model_prefix = causal_lm, causal_lm.base_model_prefix
        self._takes = Takes(causal_lm)
        output = causal_lm.get_output_embeddings()
        self.output_embeddings = next((name for name, part in causal_lm.named_modules() if part is output), None)
        self._modules = [name for name in causal_lm._modules if name != self.base_model_prefix]
        self._parameters, self._buffers = [*causal_lm._parameters], [*causal_lm._buffers]

    def move_to(self, owner: PreTrainedModel) -> None:
        """Give an owner the submodules, parameters and buffers, and say which of its weights are tied."""
        causal_lm = self.causal_lm
        for name in self._modules:
            owner.add_module(name, causal_lm._modules[name])
        for name in self._parameters:
            owner.register_parameter(name, causal_lm._parameters[name])
        for name in self._buffers:
            persistent = name not in causal_lm._non_persistent_buffers_set
            owner.register_buffer(name, causal_lm._buffers[name], persistent)
        tied: Mapping[str, str] = getattr(causal_lm, "_tied_weights_keys", None) or {}
        owner._tied_weights_keys = {self.name_in_owner(one): self.name_in_owner(other) for one, other in tied.items()}
        for name in COLLECTED:
            setattr(owner, name, {*(getattr(owner, name) or ()), *(getattr(causal_lm, name) or ())})
        not_saved = [*(owner._keys_to_ignore_on_save or ()), *(causal_lm._keys_to_ignore_on_save or ())]
        owner._keys_to_ignore_on_save = {self.name_in_owner(name) for name in not_saved}

    def name_in_owner(self, name: str) -> str:
        """What the owner calls the tensor `name` of the causal language model."""
        return _with_prefix(name, f"{self.base_model_prefix}.", f"{DECODER}.")

    def name_in_causal_lm(self, name: str) -> str:
        """What the causal language model calls the tensor `name` of the owner's decoder or head."""
        return _with_prefix(name, f"{DECODER}.", f"{self.base_model_prefix}.")

    def set_vocab_size(self, size: int) -> None:
        """Say how many tokens there are, which the loss depends on."""
        self.causal_lm.config.vocab_size = size
        if hasattr(self.causal_lm, "vocab_size"):
            self.causal_lm.vocab_size = size

    def add_plans(self, owner: PreTrainedModel) -> None:
        """Add to the owner's plans for several devices what becomes of the head."""
        for kind in PLANS:
            plan: Mapping[str, Any] = getattr(type(self.causal_lm), kind) or {}
            of_head = {name: style for name, style in plan.items() if name.split(".")[0] in self._modules}
            setattr(owner, kind, {**(getattr(owner, kind) or {}), **of_head})

    def of(self, owner: nn.Module) -> Any:
        """Return the causal language model with the submodules, parameters and buffers that the owner has now."""
        for names, kind in (
            (self._modules, "_modules"),
            (self._parameters, "_parameters"),
            (self._buffers, "_buffers"),
        ):
            mine, current = getattr(self.causal_lm, kind), getattr(owner, kind)
            for name in names:
                if mine[name] is not current[name]:
                    mine[name] = current[name]
        self.causal_lm.training = owner.training
        return self.causal_lm

    def __call__(self, owner: nn.Module, outputs: Any, **kwargs: Any) -> Any:
        """Return loss and logits for the `outputs` of the decoder, as the causal language model does.

        Args:
            kwargs: `attention_mask`, `labels`, `logits_to_keep` and others of its `forward`.
        """
        causal_lm = self.of(owner)
        return causal_lm(inputs_embeds=_Handed(outputs), **self._takes.of({"return_dict": True, **kwargs}))


def take_apart(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """Take the decoder out of a causal language model, and return it.

    Raises ValueError for a model that does not name its decoder.
    """
    prefix = causal_lm.base_model_prefix
    decoder: Any = causal_lm._modules.get(prefix)
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{type(causal_lm).__name__} has no decoder of its own (base_model_prefix is {prefix!r}): use another "
            "language model"
        )
    causal_lm._modules[prefix] = _GivenOutputs(decoder)
    return decoder


class Takes:
    """Which arguments the `forward` of a module takes, looked up once."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters
        self.names = frozenset(parameters)
        self.all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

    def of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return those of `arguments` that it takes."""
        return arguments if self.all else {name: value for name, value in arguments.items() if name in self.names}


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
