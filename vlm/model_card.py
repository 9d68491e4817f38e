"""The model card of a run: what it is, how to load it, how it scores, and its recipe in full."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.portable import hub_id, public_recipe, public_summary, read_json
from vlm.recipe_source import write_yaml

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CODE = """\
The code of the model is in this repository; `trust_remote_code=True` runs it. With `pip install vlm-bridge` and
`import vlm`, leave that out.

"""


def model_card(
    run_dir: str | Path, repo_id: str, *, merge_lora: bool = True, model_dir: Path | None = None
) -> "ModelCard":
    """Write the model card of a run: what it is, how to load it, how it scores, and the recipe in full.

    The scores are also in the metadata as a model-index, which is what the Hub reads. `merge_lora` is that of
    [`vlm.hub.push`]; `model_dir` is the folder that is uploaded if it is not the run's own.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run_dir = Path(run_dir)
    recipe = public_recipe(run_dir)
    metrics = public_summary(run_dir).get("metrics", {})
    parts = _section(recipe, "model")
    named = [parts.get(key) for key in ("pretrained", "vision", "language")]
    bases = [name for names in named for name in (names if isinstance(names, list) else [names]) if name]
    base_ids = [found for base in bases if (found := hub_id(base))]
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
        "## Use\n\n" + (_usage_of_vectors if dual else _usage)(repo_id, model_dir or run_dir / "model", merge_lora),
        "## Scores\n\n" + _score_table(metrics, dataset, dual) if metrics else "",
        "## Training\n\n" + _training(run_dir, recipe, sources) if recipe else "",
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _introduction(bases: Sequence[str], dual: bool) -> str:
    *others, last = [f"`{hub_id(base) or Path(base).name}`" for base in bases] or [""]
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
    ours = read_json(model_dir / "config.json").get("model_type") == "vlm"
    trust = ", trust_remote_code=True" if ours else ""
    return f"""{CODE if ours else ""}```python
{peft}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}"{trust})
{lora}processor = AutoProcessor.from_pretrained("{repo_id}"{trust})

{ask}
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("photo.jpg")], text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _usage_of_vectors(repo_id: str, model_dir: Path, merge_lora: bool) -> str:
    lora = "" if merge_lora else f'model = PeftModel.from_pretrained(model, "{repo_id}", subfolder="adapter")\n'
    peft = "from peft import PeftModel\n" if lora else ""
    ours = read_json(model_dir / "config.json").get("model_type") == "vlm_dual_encoder"
    trust = ", trust_remote_code=True" if ours else ""
    siglip = read_json(model_dir / "config.json").get("text_config", {}).get("model_type", "").startswith("siglip")
    padding = '"max_length"' if siglip else "True"
    return f"""{CODE if ours else ""}```python
{peft}from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo_id}"{trust})
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
    environment = read_json(run_dir / "environment.json")
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
    return source.get("format") == "dataset" and isinstance(place, str) and hub_id(place) == place


def _section(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return recipe[key] if isinstance(recipe.get(key), dict) else {}
