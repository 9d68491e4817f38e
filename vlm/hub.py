"""`vlm push`: a finished run to the Hugging Face Hub, weights, processor and model card in one commit."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError
from vlm.files import scratch_folder
from vlm.paths import existing
from vlm.recipe_source import read_yaml, write_yaml

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

# Left at home: the trainer's own state, some of it pickled, and cards written by others (ours takes their place).
NOT_UPLOADED = ("README.md", "training_args.bin", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", ".*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
HTTP_CLIENTS = ("httpx", "httpx2")  # huggingface_hub has changed its client once, and does not wrap its errors
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    merge_lora: bool = True,
) -> str:
    """Upload a run folder's model with a model card to `repo_id`, creating the repository if need be.

    There is exactly one commit. Weights of an earlier push that this one does not write are deleted in it, because
    transformers would load a stale `model.safetensors` before new shards. The server is HF_ENDPOINT's.

    Args:
        run_dir: a run folder: `model/` (checkpoint and processor, LoRA merged), and, as far as there, `adapter/` (the
            same LoRA, and what was trained with it), `recipe.yaml`, `environment.json` and `evaluation/summary.json`.
        repo_id: `user/name`.
        token: a write token; by default the one of `hf auth login` or HF_TOKEN.
        private: create the repository private. One that exists stays as it is.
        merge_lora: upload `model/` as it is, which loads without peft. Otherwise upload the model without its LoRA, and
            `adapter/` beside it.

    Returns:
        The repository's URL.

    Raises:
        UserError: no token, no model in the run folder, no LoRA to keep apart, a bad repository name, or the server
            refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    run_dir = Path(run_dir)
    model_dir = run_dir / "model"
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{run_dir} is not the folder of a finished run: there is no model/config.json in it")
    adapter_dir = run_dir / "adapter"
    if not merge_lora and not (adapter_dir / "adapter_config.json").is_file():
        raise UserError(f"{run_dir} was trained without LoRA in its last stage: there is nothing to keep apart")
    token = token or get_token()
    if not token:
        raise UserError("pushing needs a token with write access: log in with `hf auth login`, or set HF_TOKEN")

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with scratch_folder(Path(tempfile.gettempdir()) / "vlm-push") as scratch:
        folder = model_dir if merge_lora else _without_lora(model_dir, adapter_dir, scratch, repo_id)
        files = {path.relative_to(folder).as_posix(): path for path in _uploaded(folder)}
        for extra in ("recipe.yaml", "evaluation/summary.json"):
            if (run_dir / extra).is_file():
                files[extra] = run_dir / extra
        card = model_card(run_dir, repo_id, merge_lora=merge_lora)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            stale = [name for name in api.list_repo_files(repo_id) if _matches(name, WEIGHTS) and name not in files]
            operations: list[Any] = [CommitOperationDelete(name) for name in stale]
            operations += [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            operations.append(CommitOperationAdd("README.md", str(card).encode()))
            with _xet_only_where_it_is(api, repo_id):
                api.create_commit(repo_id, operations, commit_message="Upload model, processor and card")
        except HFValidationError as e:
            raise UserError(f"{repo_id!r} is not a name for a repository: {e}") from e
        except HfHubHTTPError as e:
            raise UserError(f"{api.endpoint} refused the upload to {repo_id}: {e.server_message or e}") from e
        except Exception as e:
            if type(e).__module__.partition(".")[0] not in HTTP_CLIENTS:
                raise
            raise UserError(
                f"{api.endpoint} cannot be reached: {e}. {run_dir} is as it was; try again later with "
                f"`vlm push {run_dir} {repo_id}{'' if merge_lora else ' --keep-lora'}`"
            ) from e
    return str(url)


def model_card(run_dir: str | Path, repo_id: str, *, merge_lora: bool = True) -> "ModelCard":
    """Write the model card of a run: what it is, how to load it, how it scores, and the recipe in full.

    The scores also stand in the metadata as a model-index, which is what the Hub reads. `merge_lora` is as in `push`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run_dir = Path(run_dir)
    recipe = _read_yaml(run_dir / "recipe.yaml")
    metrics = _read_json(run_dir / "evaluation" / "summary.json").get("metrics", {})
    parts = _section(recipe, "model")
    named = [parts.get(key) for key in ("pretrained", "vision", "language")]
    bases = [name for names in named for name in (names if isinstance(names, list) else [names]) if name]
    base_ids = [hub_id for base in bases if (hub_id := _hub_id(base))]
    data = _section(recipe, "data")
    train, test = data.get("train") or {}, data.get("validation") or {}
    sources = [*(train if isinstance(train, list) else [train]), test]  # of training, and what is held out
    dataset = _data_name(test or sources[0])
    dataset_ids = sorted({source["path"] for source in sources if _is_hub_dataset(source)})

    dual = bool(recipe.get("contrastive"))
    task = "zero-shot-image-classification" if dual else "image-text-to-text"
    name = repo_id.split("/")[-1]
    metadata = ModelCardData(
        base_model=base_ids or None,
        datasets=dataset_ids or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["dual-encoder" if dual else "vision-language-model", "vlm-bridge"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset if _is_hub_dataset(test or sources[0]) and "data" not in found else "custom",
                dataset_name=found.get("data", dataset),
                metric_type=metric,
                metric_name=metric,
                metric_value=found["score"],
            )
            for metric, found in metrics.items()
            if isinstance(found.get("score"), int | float)
        ]
        or None,
    )
    sections = [
        f"# {name}",
        _introduction(bases, dual),
        "## Use\n\n" + (_usage_of_vectors if dual else _usage)(repo_id, run_dir / "model", merge_lora),
        "## Scores\n\n" + _score_table(metrics, dataset, dual) if metrics else "",
        "## Training\n\n" + _training(run_dir, recipe, sources) if recipe else "",
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _introduction(bases: Sequence[str], dual: bool) -> str:
    *others, last = [f"`{_hub_id(base) or Path(base).name}`" for base in bases] or [""]
    made_of = f"{', '.join(others)} and {last}" if others else last
    return (
        (
            "A dual encoder that gives images and texts vectors to compare"
            if dual
            else "A vision-language model that answers in text about images"
        )
        + (f", made from {made_of}" if made_of else "")
        + ", trained with `vlm-bridge`. "
        "The licences of the models and data it was made from apply."
    )


def _usage(repo_id: str, model_dir: Path, merge_lora: bool) -> str:
    lora = "" if merge_lora else f'model = PeftModel.from_pretrained(model, "{repo_id}", subfolder="adapter")\n'
    peft = "from peft import PeftModel\n" if lora else ""
    ask = (
        'messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]'
    )
    if not (model_dir / "chat_template.jinja").is_file():  # the prompt is its own: vlm.data.prompts
        return f"""```python
{peft}from PIL import Image
from vlm.generation import generate, load  # pip install vlm-bridge

model, processor = load("{repo_id}")
{lora}{ask}
print(generate(model, processor, [([Image.open("photo.jpg")], messages)], max_new_tokens=64)[0])
```"""
    ours = _read_json(model_dir / "config.json").get("model_type") == "vlm"
    first = "import vlm  # pip install vlm-bridge: makes the Auto classes know this model\n" if ours else ""
    return f"""```python
{first}{peft}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}")
{lora}processor = AutoProcessor.from_pretrained("{repo_id}")

{ask}
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("photo.jpg")], text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _usage_of_vectors(repo_id: str, model_dir: Path, merge_lora: bool) -> str:
    lora = "" if merge_lora else f'model = PeftModel.from_pretrained(model, "{repo_id}", subfolder="adapter")\n'
    peft = "from peft import PeftModel\n" if lora else ""
    ours = _read_json(model_dir / "config.json").get("model_type") == "vlm_dual_encoder"
    first = "import vlm  # pip install vlm-bridge: makes the Auto classes know this model\n" if ours else ""
    siglip = _read_json(model_dir / "config.json").get("text_config", {}).get("model_type", "").startswith("siglip")
    padding = '"max_length"' if siglip else "True"
    return f"""```python
{first}{peft}from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo_id}")
{lora}processor = AutoProcessor.from_pretrained("{repo_id}")

texts = ["a photo of a cat.", "a photo of a dog."]
inputs = processor(images=[Image.open("photo.jpg")], text=texts, return_tensors="pt", padding={padding})
print(model(**inputs).logits_per_image)
```"""


def _score_table(metrics: Mapping[str, Any], dataset: str, dual: bool) -> str:
    about_blind = (
        "Blind is a random order."
        if dual
        else "Blind is the same model and the same prompts with the images\n"
        "swapped among the examples: what it scores without looking."
    )
    lines = [
        f"On {dataset}, with 95 % bootstrap intervals. {about_blind}",
        "",
        "| metric | score | interval | blind | blind interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    others = {name: found["data"] for name, found in metrics.items() if "data" in found}
    if others:
        told = ", ".join(f"`{name}` of {data}" for name, data in others.items())
        lines[:1] = [f"{lines[0]} Images told apart by labels that were not trained on: {told}; blind is chance."]
    for name, found in metrics.items():
        blind = found.get("blind_score", found.get("blind"))
        cells = (found.get("score"), found.get("interval"), blind, found.get("blind_interval"))
        lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_cell, value))
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _training(run_dir: Path, recipe: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> str:
    *train, test = sources
    trained_on = ", ".join(map(_data_name, train))
    text = f"Trained on {trained_on}" + (f", held out: {_data_name(test)}" if test else "") + ". "
    environment = _read_json(run_dir / "environment.json")
    versions: dict[str, Any] = next(
        (environment[key] for key in ("packages", "versions") if isinstance(environment.get(key), dict)), {}
    )
    if versions:
        text += "With " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ". "
    dumped = write_yaml(dict(recipe), width=100)
    return f"{text}The recipe in full (`vlm train recipe.yaml`):\n\n```yaml\n{dumped}```"


def _data_name(source: Mapping[str, Any]) -> str:
    """A data source in words: its Hub name, or the name of the folder or file that is read."""
    places = (source.get(key) for key in ("path", "annotations", "questions", "data_files"))
    place = next((place for place in places if isinstance(place, str)), None)
    if place is None:
        return str(source.get("format", "its own data"))
    if _is_hub_dataset(source):
        return place
    path = Path(place) / str(source.get("metadata", ""))
    return f"{path.parent.name}/{path.name}" if path.suffix and path.parent.name else path.name


def _is_hub_dataset(source: Mapping[str, Any]) -> bool:
    place = source.get("path")
    return source.get("format") == "dataset" and isinstance(place, str) and _hub_id(place) == place


def _hub_id(name: str) -> str | None:
    """The Hub name of a model: itself, or what `source.json` in the folder says it is a copy of."""
    if path := existing(name):
        source = _read_json(path / "source.json").get("model")
        return source if isinstance(source, str) else None
    return name if HUB_ID.fullmatch(name) else None


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

    dual = is_dual_encoder(generation.load_config(str(model_dir)))
    model, processor = load_dual_encoder(str(model_dir)) if dual else generation.load(str(model_dir), device="cpu")
    wrapped: Any = PeftModel.from_pretrained(model, str(adapter_dir))
    for layer in wrapped.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merged_adapters.extend(layer.active_adapters)  # what the checkpoint is, and peft cannot know
    wrapped.unmerge_adapter()
    wrapped.unload().save_pretrained(target)
    processor.save_pretrained(target)
    shutil.copytree(adapter_dir, target / "adapter")
    config = _read_json(adapter_dir / "adapter_config.json") | {"base_model_name_or_path": repo_id}
    (target / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _uploaded(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and not _matches(path.name, NOT_UPLOADED):
            yield path


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


@contextmanager
def _xet_only_where_it_is(api: "HfApi", repo_id: str) -> Iterator[None]:
    """Upload by plain LFS to a server that has no Xet storage; huggingface_hub would die asking it for a Xet token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_DISABLE_XET
    url = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/main"
    if not before and get_session().get(url, headers=api._build_hf_headers()).status_code == 404:
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _section(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return recipe[key] if isinstance(recipe.get(key), dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    return read_yaml(path.read_text(encoding="utf-8"), str(path))[0] if path.is_file() else {}
