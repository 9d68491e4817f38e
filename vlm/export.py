"""`vlm export`: a model as one of transformers' own, as files for llama.cpp, or with its code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vlm import generation, remote_code
from vlm.errors import UserError, nearest
from vlm.files import atomic_folder, require_new
from vlm.generation_config import make_savable
from vlm.interop import FAMILIES, REASONS, family_of, gguf, target_of, to_stock
from vlm.loading import checkpoint_of
from vlm.locks import locked
from vlm.modeling import VLMForConditionalGeneration

OTHERS = ("gguf", "remote_code")
"""What a model can be exported to besides the architectures of `FAMILIES`."""


def run(name: str, target: str, output: Path | None, *, console: Any) -> None:
    """Export the run or checkpoint `name` to the folder `output`, by default `exported-TARGET` in it.

    The folder appears when it is whole. Raises UserError as [`to_stock`] does, for an unknown target, and for a folder
    that is not empty, and InUse if another process writes it.
    """
    require_target(target, (*FAMILIES, *OTHERS))
    folder = output or Path(checkpoint_of(name)).parent / f"exported-{target}"
    with locked(folder, "Wait until it ends, or choose another --output."):
        require_new(folder)
        with atomic_folder(folder) as unfinished:
            about = write(name, target, unfinished)
    console.print(f"{folder}: {about}")


def require_target(target: str, targets: Sequence[str]) -> None:
    """Raise UserError for a target that is none of `targets`, with the reason if there is one."""
    if target not in targets and target not in REASONS:
        exported = [name for name in targets if name in OTHERS or not FAMILIES[name].into_ours_only]
        raise UserError(f"a model cannot be exported to {target!r}; {nearest(target, exported)}")
    if target not in OTHERS:
        target_of(target)


def write(name: str, target: str, folder: Path) -> str:
    """Write the run or checkpoint `name` to `folder` as `target` and return what it is, in words.

    Raises UserError as [`to_stock`] does, and for a model that is none of ours.
    """
    model, processor = generation.load(name, device="cpu")
    note = make_savable(model)
    if not isinstance(model, VLMForConditionalGeneration):
        raise UserError(f"{name} is a {model.config.model_type} model of transformers already")
    if target == "gguf":
        files = " and ".join(path.name for path in gguf.write(model, processor, folder))
        notice = gguf.notice(model)
        return f"{files}, for llama.cpp" + (f"\nNote: {notice}" if notice else "")
    if target == "remote_code":
        remote_code.write(model, processor, folder)
        return "loads without vlm, with trust_remote_code=True" + (f"\n{note}" if note else "")
    stock, stock_processor = to_stock(model, processor, target)
    save(stock, stock_processor, folder)
    return f"{type(stock).__name__}, equal to {name} on a question about an image" + (f"\n{note}" if note else "")


def save(stock: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write a stock model and its processor as programs beside transformers expect them.

    transformers 5 has newer names for vision towers, and one file for a processor's parts; vLLM and llama.cpp read the
    older ones, and so does transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = stock.config
    family = family_of(config.model_type)
    config.architectures = [type(stock).__name__]
    config.save_pretrained(folder)
    if stock.generation_config is not None:
        stock.generation_config.save_pretrained(folder)
    tied = set(stock.all_tied_weights_keys)
    state = {
        family.file_name(name, config): tensor.contiguous()
        for name, tensor in stock.state_dict().items()
        if name not in tied
    }
    shards = split_torch_state_dict_into_shards(state)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    processor.save_pretrained(folder)
    nested = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    image_processor = nested.pop("image_processor") | {"processor_class": nested["processor_class"]}
    for file, values in (("processor_config.json", nested), ("preprocessor_config.json", image_processor)):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
