"""The end of a run, tried by `--dry-run` before its first step: what fails there would fail after all the training.

pin a batch                   as data loaders do before a GPU trains on it
save and reload the model     weights included, unless they are too large to write for a test
load it in 4 or 8 bits        if the recipe asks for quantization
answer two prompts            of different lengths at once: the answers of each by itself
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vlm.data.image_inputs import processed_once
from vlm.dual_encoder import tokenize as tokenize_pairs
from vlm.errors import UserError
from vlm.files import scratch_folder
from vlm.generation import encode_requests, generate, prompt_shapes
from vlm.loading import no_loading_bar
from vlm.training.folder import save_model
from vlm.training.quantization import merged

SCRATCH = "vlm-dry-run"
WHOLE = 2e9
"""Bytes of weights that are written and read again. Of larger models the names and shapes of weights are compared."""
TOLERANCE = 1e-2
"""How far apart the logits of a prompt may be, as a share of their spread: a prompt that sees padding is far off."""
PROMPTS = ("What is this?", "Describe the image in one sentence, and name everything that you see in it.")


def _scratch() -> AbstractContextManager[Path]:
    """A folder for temporary files, which the next dry run removes if this one is killed."""
    return scratch_folder(Path(tempfile.gettempdir()) / SCRATCH)


@contextmanager
def rehearsing(what: str) -> Iterator[None]:
    """Raise UserError that names `what` for whatever fails within."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"dry run: {what} failed, which training would end with: {kind}{error}") from error


def rehearse(
    trained: Any, processor: Any, batch: Mapping[str, Any], device: torch.device, quantization: Any = None
) -> tuple[PreTrainedModel, str]:
    """Try what comes at the end of a run. Give the model, with LoRA merged into it, and what was tried, in a line.

    Args:
        trained: the model that is to be trained, or the PeftModel around it.
        batch: one of training, on the CPU.
        device: where the model is to answer.
        quantization: the BitsAndBytesConfig of the recipe, if there is one.

    Raises UserError that names what failed.
    """
    with rehearsing("pinning a batch"):
        pin(batch)
    if isinstance(trained, PeftModel):
        with rehearsing("saving the adapter"), _scratch() as folder:
            trained.save_pretrained(str(folder))
    with rehearsing("merging LoRA into the model"):
        model: Any = merged(trained)
    size = _save_and_reload(model, processor, quantization)
    writes = model.can_generate()
    with rehearsing("answering two prompts at once" if writes else "encoding two texts at once"):
        (answer if writes else embed)(model.to(device).eval(), processor)
    asked = "answer two prompts" if writes else "encode two texts"
    return model, f"tried the end of the run: pin a batch, save and load the model ({size}), {asked} at once"


def _save_and_reload(model: Any, processor: Any, quantization: Any) -> str:
    """Give how large the weights are, in words."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    with _scratch() as folder:
        free = shutil.disk_usage(folder).free
        whole = size <= min(WHOLE, free / 2)
        with rehearsing("saving the model"):
            save_model(model if whole else _Weightless(model), processor, folder / "model")
        with rehearsing("loading the saved model"):
            reload(model, folder / "model", whole)
        if quantization is not None and whole:
            with rehearsing("loading the saved model in 4 or 8 bits"), no_loading_bar():
                AutoModelForImageTextToText.from_pretrained(
                    folder / "model", quantization_config=quantization, dtype=torch.float32
                )
    return f"{size / 1e9:.2g} GB of weights" + ("" if whole else ", compared by name and shape, not written")


class _Weightless:
    """A model that saves everything but its weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.can_generate = model.can_generate

    def save_pretrained(self, folder: Path) -> None:
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        if self.can_generate():
            self.model.generation_config.save_pretrained(folder)


def pin(batch: Any) -> None:
    """Copy a batch to pinned memory, which needs a GPU; without one find out whether that would work.

    Raises ValueError for a tensor that cannot be pinned, since its elements share memory.
    """
    if torch.cuda.is_available():
        pin_memory(batch)
        return
    for name, value in batch.items():
        if isinstance(value, Mapping):
            pin(value)
        elif isinstance(value, Tensor) and torch._debug_has_internal_overlap(value) == 1:
            raise ValueError(f"elements of {name} share memory: a tensor that `expand` has made, say")


def reload(model: Any, folder: Path, whole: bool) -> None:
    """Load what was saved of `model` in `folder`: its weights if it is the `whole` of it, else names and shapes.

    Raises ValueError if they are others than before.
    """
    AutoProcessor.from_pretrained(folder, trust_remote_code=model.is_remote_code())
    auto: Any = AutoModelForImageTextToText if model.can_generate() else AutoModel
    with no_loading_bar():
        if whole:
            again = auto.from_pretrained(folder, dtype="float32", trust_remote_code=model.is_remote_code())
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=model.is_remote_code())
            with torch.device("meta"):
                again = auto.from_config(config, trust_remote_code=model.is_remote_code())
    before, after = model.state_dict(), again.state_dict()
    if before.keys() != after.keys():
        raise ValueError(f"weights are others than were saved: {', '.join(sorted(before.keys() ^ after.keys())[:4])}")
    for name, value in before.items():
        if value.shape != after[name].shape or (whole and not torch.equal(value.cpu(), after[name].to(value.dtype))):
            raise ValueError(f"the weight {name} is another than was saved")


@torch.no_grad()
def answer(model: Any, processor: Any) -> None:
    """Answer two prompts about an image, together and each by itself.

    Raises ValueError if an answer depends on the company, by more than rounding.
    """
    image = Image.new("RGB", (64, 48), "teal")
    requests = [
        ([image], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}])
        for text in PROMPTS
    ]
    with processed_once(processor):  # all show the same image
        together = generate(model, processor, requests, max_new_tokens=4)
        alone = [generate(model, processor, [request], max_new_tokens=4)[0] for request in requests]
    if together == alone or len(set(map(repr, prompt_shapes(processor, requests)))) > 1:
        return  # other answers may still be rounding, where two tokens are as likely

    def logits(asked: Sequence[Any]) -> Tensor:
        return model(**encode_requests(model, processor, asked)).logits[:, -1].float()

    require_equal(logits(requests), torch.cat([logits([request]) for request in requests]), "an answer")


@torch.no_grad()
def embed(model: Any, processor: Any) -> None:
    """Encode two texts with a dual encoder, together and each by itself. Raises ValueError as [`answer`] does."""

    def vectors(texts: Sequence[str]) -> Tensor:
        tokens = tokenize_pairs(processor.tokenizer, model.config, texts).to(model.device)
        return model.get_text_features(**tokens).pooler_output.float()

    require_equal(vectors(PROMPTS), torch.cat([vectors([text]) for text in PROMPTS]), "the vector of a text")


def require_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise ValueError unless rows `[N, D]` are equal up to rounding, and finite."""
    if not bool(found.isfinite().all()):
        raise ValueError(f"{what} is not finite")
    apart = (found - wanted).abs().amax() / wanted.std().clamp(min=1e-6)
    if apart > TOLERANCE:
        raise ValueError(f"{what} depends on what is in the batch: the attention mask is not followed")
