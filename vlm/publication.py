"""What `vlm push` uploads: the files of the model and no others, without paths of this machine or credentials."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.model_card import model_card
from vlm.portable import local_folders, portable, public_recipe, public_summary, read_json
from vlm.recipe_source import write_yaml

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
CONFIGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer_config.json", "adapter_config.json",
)  # fmt: skip
"""JSON files whose values may name folders."""
ALLOWED = (
    *WEIGHTS, *CONFIGS, "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "spm.model",
)  # fmt: skip
"""What transformers and peft write for a model and its processor."""
FOLDERS = {"", "adapter", "qformer_tokenizer", "additional_chat_templates"}
"""The folders they are in."""


@dataclass
class Publication:
    """The files of a push, by their name in the repository, and what stays here, each with the reason.

    `command` repeats the push.
    """

    run_dir: Path
    command: str
    files: dict[str, Path | bytes]
    left_out: dict[str, str]

    def listing(self) -> str:
        """Return the files with their sizes, and those that are left out, as lines to read before the upload."""
        sizes = {name: _size(content) for name, content in self.files.items()}
        lines = [f"{size:>14,} bytes  {name}" for name, size in sorted(sizes.items())]
        lines += [f"not uploaded: {name} ({why})" for name, why in sorted(self.left_out.items())]
        return "\n".join(lines)


def require_pushable(run_dir: Path, repo_id: str, *, merge_lora: bool, target: str | None) -> None:
    """Raise UserError for a push that cannot succeed, before a token is asked for and a model is loaded."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not (run_dir / "model" / "config.json").is_file():
        raise UserError(f"{run_dir} is not the folder of a finished run: there is no model/config.json in it")
    if not merge_lora and target:
        raise UserError("--as writes one model, with LoRA merged into it: leave out --keep-lora")
    if not merge_lora and not (run_dir / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{run_dir} was trained without LoRA in its last stage: there is nothing to keep apart")
    if target:
        from vlm import export
        from vlm.interop import FAMILIES

        export.require_target(target, tuple(FAMILIES))
    try:
        if "/" not in repo_id:
            raise HFValidationError(f"it lacks the user: USER/{repo_id}")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not a name for a repository: {error}") from error


def prepare(run_dir: Path, repo_id: str, scratch: Path, *, merge_lora: bool, target: str | None) -> Publication:
    """Collect what a push of a run uploads, after [`require_pushable`]; `scratch` is a folder for files made on the
    way. Options and errors are those of [`vlm.hub.push`]."""
    model_dir, adapter_dir = run_dir / "model", run_dir / "adapter"
    folder = model_dir
    if target:
        folder = _exported(model_dir, target, scratch)
    elif not merge_lora:
        folder = _without_lora(model_dir, adapter_dir, scratch, repo_id)
    files, left_out = _files_of(folder)
    if not any(is_weights(name) and name.endswith(".safetensors") for name in files):
        why = "".join(f"; {name} is {reason}" for name, reason in left_out.items())
        raise UserError(f"{folder} holds no weights that can be uploaded (model.safetensors){why}")
    _add_code(files, read_json(folder / "config.json"))
    if recipe := public_recipe(run_dir):
        files["recipe.yaml"] = write_yaml(recipe).encode()
    if summary := public_summary(run_dir):
        files["evaluation/summary.json"] = json.dumps(summary, indent=1, ensure_ascii=False).encode()
    files["README.md"] = str(model_card(run_dir, repo_id, model_dir=folder, merge_lora=merge_lora)).encode()
    options = (f" --as {target}" if target else "") + ("" if merge_lora else " --keep-lora")
    return Publication(run_dir, f"vlm push {run_dir} {repo_id}{options}", files, left_out)


def is_weights(name: str) -> bool:
    """Whether a file of a repository holds weights, or says which file does."""
    return any(Path(name).match(pattern) for pattern in WEIGHTS)


def _files_of(folder: Path) -> tuple[dict[str, Path | bytes], dict[str, str]]:
    files: dict[str, Path | bytes] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        allowed = name.parent.as_posix().removeprefix(".") in FOLDERS and _is_allowed(name.name)
        if path.is_symlink():
            left_out[name.as_posix()] = "a link"
        elif path.is_dir():
            continue
        elif name.parts == ("README.md",):
            left_out[name.as_posix()] = "the model card is written anew"
        elif not allowed:
            left_out[name.as_posix()] = "no file of the model"
        elif name.name in CONFIGS:
            values = portable(read_json(path), local_folders(folder))
            files[name.as_posix()] = json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
        else:
            files[name.as_posix()] = path
    return files, left_out


def _is_allowed(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in ALLOWED) or name.endswith(".jinja")


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _add_code(files: dict[str, Path | bytes], config: Mapping[str, Any]) -> None:
    """Put the code of a model of ours among the files, so that it loads without this package."""
    from vlm import remote_code

    auto_maps = remote_code.AUTO_MAPS.get(str(config.get("model_type")))
    if auto_maps is None:
        return
    files |= {name: text.encode() for name, text in remote_code.code(config).items()}
    for name, auto_map in auto_maps.items():
        content = files[name]
        values = json.loads(content if isinstance(content, bytes) else content.read_bytes()) | {"auto_map": auto_map}
        files[name] = json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"


def _exported(model_dir: Path, target: str, scratch: Path) -> Path:
    from vlm import export

    folder = scratch / target
    folder.mkdir()
    export.write(str(model_dir), target, folder)
    return folder


def _without_lora(model_dir: Path, adapter_dir: Path, target: Path, repo_id: str) -> Path:
    """Write the model with its LoRA taken out again, and the adapter in its folder `adapter`; gives `target`.

    The LoRA is subtracted, not the starting model loaded anew: that one may be gone, and the embeddings and bridge of a
    model that was put together for the run were drawn at random.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from vlm import generation
    from vlm.dual_encoder import is_dual_encoder
    from vlm.embedding import load_dual_encoder
    from vlm.generation_config import make_savable
    from vlm.loading import reading
    from vlm.older_adapters import present_adapter

    dual = is_dual_encoder(generation.load_config(str(model_dir)))
    model, processor = load_dual_encoder(str(model_dir)) if dual else generation.load(str(model_dir), device="cpu")
    make_savable(model)  # should the file have been edited
    with present_adapter(adapter_dir, model) as adapter:
        with reading(str(adapter_dir), "LoRA", kind="an adapter"):
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
        for layer in wrapped.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merged_adapters.extend(layer.active_adapters)  # what the checkpoint is, and peft cannot know
        wrapped.unmerge_adapter()
        wrapped.unload().save_pretrained(target)
        processor.save_pretrained(target)
        shutil.copytree(adapter, target / "adapter")
    config = read_json(target / "adapter" / "adapter_config.json") | {"base_model_name_or_path": repo_id}
    (target / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target
