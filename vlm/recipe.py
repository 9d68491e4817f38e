"""A recipe: one YAML file that says which model, on what data, trained how, and measured by what.

    recipe = load("quickstart", ["train.max_steps=50"])      # a packaged recipe, or the path of a file

The classes below, and those of `vlm.recipe_model`, `vlm.recipe_data`, `vlm.recipe_evaluation` and
`vlm.recipe_contrastive`, are the reference of every key. A recipe is checked whole before any weight is loaded: an
unknown key, a wrong type or a contradiction is reported with its file and line, all at once (RecipeError).

Relative paths in a recipe are looked for beside the recipe file first, then in the current folder. `~` and
`${VLM_HOME}` (the cache folder, ~/.cache/vlm unless the environment says otherwise) are expanded.
"""

import copy
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from vlm import recipe_contrastive, recipe_train
from vlm.errors import cut, nearest, shown
from vlm.paths import existing, existing_file, existing_folder, expanded
from vlm.recipe_contrastive import Contrastive
from vlm.recipe_data import Data, is_number
from vlm.recipe_errors import FoundError, impossible, listed, to_recipe_error
from vlm.recipe_evaluation import Evaluation
from vlm.recipe_model import Model, Section
from vlm.recipe_paths import expand, expand_source, home
from vlm.recipe_source import COMMAND_LINE, KeyPath, Places, RecipeError, apply_overrides, read_yaml

__all__ = [
    "Recipe",
    "RecipeError",
    "from_dict",
    "load",
    "packaged",
    "packaged_text",
    "parse_data",
    "require_models",
]

PARTS = ("projector", "vision", "fusion", "language")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _with_rates(value: Any, parts: Sequence[str]) -> Any:
    """A list of parts, or a section of part to learning rate, as the latter; None is to be decided."""
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, dict):
        raise ValueError(f"must be a section such as `{parts[0]}: 1e-4`, or a list of parts, not {shown(value)}")
    found: list[tuple[KeyPath, str]] = []
    for part, rate in value.items():
        if part not in parts:
            found.append(((part,), f"there is no such part of the model; {nearest(part, parts)}"))
        elif rate is not None and not (is_number(rate) and 0 < rate < float("inf")):
            found.append(((part,), f"must be a learning rate such as 1e-4, not {shown(rate)}"))
    if found:
        raise FoundError(found)
    return value


class Lora(Section):
    """Low-rank adapters, in the words of peft.LoraConfig (arXiv 2106.09685)."""

    parts: dict[str, float | None] = Field(default={"language": None}, min_length=1)
    """Where they are, language or vision, to learning rate. A list of parts uses `learning_rate` for each. After
    validation every part has a number, and `learning_rate` is gone."""

    r: int = Field(default=16, ge=1, le=65_536)
    lora_alpha: int = Field(default=32, ge=1, le=1_000_000)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Any = "all-linear"
    """`all-linear`, or a list of module names such as `[q_proj, v_proj]`; of linear layers in each of the parts."""
    use_rslora: bool = False
    learning_rate: Rate | None = None
    """Of parts without one of their own. Default: `learning_rate` of the stage's `train` section."""

    @field_validator("parts", mode="before")
    @classmethod
    def _places(cls, value: Any) -> Any:
        return _with_rates(value, ("language", "vision"))

    @field_validator("target_modules")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        names = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        if value != "all-linear" and not names:
            raise ValueError(f"must be all-linear or a list of module names, not {shown(value)}")
        return value


class Stage(Section):
    """One training run over the data: which parts learn, at what rate, and how. What is not named stays frozen."""

    name: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the stage's folder inside the run folder."""
    trainable: dict[str, float | None] = Field(default={})
    """Part (vision, projector, fusion, language) to learning rate. A list of parts uses `train.learning_rate` for each.
    After validation every part has a number."""
    lora: Lora | None = None
    train: dict[str, Any] = Field(default={})
    """Fields of transformers.TrainingArguments, under their own names. After validation without `learning_rate`, which
    has been handed to the parts."""

    @field_validator("trainable", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return _with_rates(value, PARTS)

    @field_validator("train")
    @classmethod
    def _training_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = recipe_train.check(value)
        rate = value.get("learning_rate", 1)
        if is_number(rate) and not 0 < rate < float("inf"):
            found.append(("learning_rate", f"must be more than 0, not {shown(rate)}"))
        if found:
            raise FoundError([((key,), why) for key, why in found])
        return value

    @model_validator(mode="after")
    def _rates(self) -> "Stage":
        if not self.trainable and self.lora is None:
            raise FoundError([(("trainable",), "nothing would learn; for example `trainable: {projector: 1e-3}`")])
        lora = self.lora
        if lora and (twice := sorted(self.trainable.keys() & lora.parts.keys())):
            what = {"language": "language model", "vision": "vision encoder"}
            why = "LoRA trains the {} already; remove this, or it from `lora.parts`"
            raise FoundError([(("trainable", part), why.format(what[part])) for part in twice])
        bare = [part for part, rate in self.trainable.items() if rate is None]
        bare_lora = [part for part, rate in lora.parts.items() if rate is None] if lora else []
        if lora and lora.learning_rate:
            if not bare_lora:
                why = "has no effect: every part under `lora.parts` has a rate of its own; change those"
                raise FoundError([(("lora", "learning_rate"), why)])
            lora.parts = {part: own or lora.learning_rate for part, own in lora.parts.items()}
            lora.learning_rate, bare_lora = None, []
        if "learning_rate" in self.train and not bare and not bare_lora:
            why = "has no effect: every part under `trainable` and `lora` has a rate of its own; change those"
            raise FoundError([(("train", "learning_rate"), why)])
        if bare or bare_lora:
            rate = float(self.train.get("learning_rate", recipe_train.default_learning_rate()))
            self.trainable = {part: own or rate for part, own in self.trainable.items()}
            if lora:
                lora.parts = {part: own or rate for part, own in lora.parts.items()}
            self.train = {key: value for key, value in self.train.items() if key != "learning_rate"}
        return self

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part to learning rate; LoRA's under the names `lora`, in the language model, and `lora_vision`."""
        rates = {part: float(rate) for part, rate in self.trainable.items() if rate}
        names = {"language": "lora", "vision": "lora_vision"}
        return rates | {
            names[part]: float(rate) for part, rate in (self.lora.parts if self.lora else {}).items() if rate
        }


class Recipe(Section):
    """The whole recipe. A recipe with one stage may write `trainable`, `lora` and `train` at the top level instead."""

    shorthand: ClassVar[tuple[str, ...]] = ("trainable", "lora", "train")

    name: str = Field(default="recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Default: the name of the file."""
    model: Model
    data: Data
    stages: list[Stage] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    contrastive: Contrastive | None = None
    """Train two encoders to agree on images and texts, in place of a model that writes."""
    output_dir: str = ""
    """The run folder, relative to the current folder. Default: runs/<name>."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _one_stage(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        short = [key for key in cls.shorthand if key in raw]
        if "stages" in raw and short:
            why = "this recipe has `stages`; write it inside one of them (on the command line: stages.0.{}...)"
            raise FoundError([((key,), why.format(key)) for key in short])
        if "stages" in raw:
            return raw
        rest = {key: value for key, value in raw.items() if key not in short}
        return rest | {"stages": [{key: raw[key] for key in short if raw[key] is not None}]}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        found: list[tuple[KeyPath, str]] = []
        for i, stage in enumerate(self.stages):
            if "fusion" in stage.trainable and not self.model.pretrained and self.model.adapter.fusion == "prefix":
                why = "`fusion: prefix` has no weights; remove it, or choose cross_attention in model.adapter"
                found.append((("stages", i, "trainable", "fusion"), why))
            if "language" in stage.trainable and self.model.quantization_config:
                why = "weights in 4 or 8 bits cannot learn; use `lora`, or remove model.quantization_config"
                found.append((("stages", i, "trainable", "language"), why))
            if stage.name in [earlier.name for earlier in self.stages[:i]]:
                found.append((("stages", i, "name"), f"there are two stages called '{stage.name}'; give each a name"))
            found += [(("stages", i, "train", key), why) for key, why in self._about_evaluation(stage.train)]
        if self.contrastive:
            found += recipe_contrastive.problems(self.contrastive, self.model, self)
        if self.evaluation.samples:
            if not self.evaluation.metrics:
                found.append((("evaluation", "samples"), "are answered to be scored; name `metrics`"))
            if all(stage.train.get("eval_strategy", "no") == "no" for stage in self.stages):
                found.append((("evaluation", "samples"), "are answered in evaluations; set `eval_strategy` in `train`"))
        found += self._about_classification()
        if self.evaluation.metrics and self.data.validation is None:
            found.append((("evaluation", "metrics"), "there is nothing to measure on; add `data.validation`"))
        if found:
            raise FoundError(found)
        self.output_dir = str(expanded(self.output_dir or f"runs/{self.name}"))
        return self

    def _about_classification(self) -> list[tuple[KeyPath, str]]:
        found: list[tuple[KeyPath, str]] = []
        for name, task in self.evaluation.classification.items():
            at = ("evaluation", "classification", name)
            if self.contrastive and task.prompt is not None:
                found.append(
                    ((*at, "prompt"), "is what a model that writes is asked; a dual encoder takes `templates`")
                )
            if not self.contrastive and len(task.templates) > 1:
                found.append(((*at, "templates"), "a model that writes takes one, its answer: ['A {}.']"))
        if self.evaluation.classification and not self.is_scored:
            what = "`data.validation`" if self.contrastive else "`metrics`, and `data.validation`"
            found.append((("evaluation", "classification"), f"is measured beside {what}; add it"))
        return found

    def _about_evaluation(self, train: dict[str, Any]) -> list[tuple[str, str]]:
        """What is wrong with how a stage evaluates as it trains."""
        found = []
        if train.get("eval_strategy", "no") != "no" and self.data.validation is None:
            found.append(("eval_strategy", "there is nothing to evaluate on; add `data.validation`"))
        known = ["loss", *(self.evaluation.metrics if self.evaluation.samples else ())]
        if self.contrastive:
            from vlm.eval.retrieval import METRICS

            known += METRICS
        best = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
        if best not in known:
            why = f"is not measured during training; {nearest(best, known)}"
            if best in self.evaluation.metrics:
                why = "is measured during training only with `evaluation.samples`, the number of examples to answer"
            found.append(("metric_for_best_model", why))
        return found

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    @property
    def is_scored(self) -> bool:
        """Whether a stage's model is measured when it is trained: by `evaluation.metrics`, or by recall."""
        return bool(self.evaluation.metrics or (self.contrastive and self.data.validation))

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default written out, as plain values: what `from_dict` gives back unchanged."""
        return self.model_dump(mode="json")


def from_dict(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    base_dir: Path | None = None,
    places: Places | None = None,
    file: str = "recipe",
) -> Recipe:
    """Check a recipe given as plain values.

    Args:
        overrides: `key.path=value` strings, set before the check.
        base_dir: the folder of the recipe file, for relative paths.
        places: where each key was written, for the messages.
        file: what the recipe is called in the messages.

    Raises RecipeError with every problem found.
    """
    values = copy.deepcopy(dict(raw))
    places = dict(places or {})
    if "stages" not in values:  # one stage at the top level: `stages.0.train` is `train`
        overrides = [override.removeprefix("stages.0.") for override in overrides]
        if beyond := [override for override in overrides if override.startswith("stages.")]:
            raise RecipeError(f"{COMMAND_LINE}  {beyond[0]}: {file} has one stage, stages.0")
    apply_overrides(values, places, overrides)
    if found := list(impossible(values)):
        raise listed(found, places, file)
    expand(values, base_dir)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        hidden: KeyPath = () if "stages" in values else ("stages", 0)
        raise to_recipe_error(error, Recipe, places, file, hidden=hidden) from None


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe: the path of a YAML file, or the name of one that comes with vlm.

    Raises RecipeError with every problem found, its file and line.
    """
    path = expanded(name_or_path)
    if existing_file(name_or_path):
        name, base_dir = str(name_or_path), path.parent.resolve()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name}: cannot be read as text: {error}") from None
    elif existing(path):
        inside = f"; its recipe is {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(f"{cut(str(name_or_path), 300)} is {'a folder' if path.is_dir() else 'no file'}{inside}")
    elif str(name_or_path) in packaged():
        name, text, base_dir = f"{name_or_path}.yaml", packaged_text(str(name_or_path)), None
    else:
        raise RecipeError(
            f"there is no file '{cut(str(name_or_path), 300)}', and no recipe of that name comes with vlm; "
            f"{nearest(str(name_or_path), packaged())}"
        )
    raw, places = read_yaml(text, name)
    raw.setdefault("name", path.stem)
    return from_dict(raw, overrides, base_dir=base_dir, places=places, file=name)


def require_models(recipe: Recipe) -> None:
    """Raise RecipeError when a model named by a path is not there: transformers would look for it on the Hub."""
    gone = [
        f"model.{key}: there is no folder {value}"
        + (f"; `vlm fetch {Path(value).name}` gets it" if str(home()) in value else "")
        for key, values in (
            ("pretrained", [recipe.model.pretrained]),
            ("vision", recipe.model.encoders),
            ("language", [recipe.model.language]),
        )
        for value in values
        if value and value.startswith(("/", ".")) and not existing(value)
    ]
    if gone:
        raise RecipeError("\n".join(gone))


def packaged() -> dict[str, str]:
    """Return the recipes that come with vlm: name to the first line of the file, which says what it does."""
    folder = importlib.resources.files("vlm.recipes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8").partition("\n")[0].lstrip("# ") for file in files}


def accelerate_configurations() -> list[str]:
    """Return the names of the configurations for `accelerate launch` that come with vlm, such as `accelerate/ddp`."""
    folder = importlib.resources.files("vlm.recipes") / "accelerate"
    return sorted(f"accelerate/{file.name.removesuffix('.yaml')}" for file in folder.iterdir())


def packaged_text(name: str) -> str:
    """Return the text of a recipe, or of a configuration for `accelerate launch`, that comes with vlm. Raises
    RecipeError for an unknown name."""
    known = [*packaged(), *accelerate_configurations()]
    if name not in known:
        raise RecipeError(f"no recipe called '{name}' comes with vlm; {nearest(name, known)}")
    return (importlib.resources.files("vlm.recipes") / f"{name}.yaml").read_text("utf-8")


def parse_data(words: Sequence[str]) -> Data:
    """Read data from the command line: the `data` of a recipe, an image folder, or one source as `format=... key=value`
    words.

    Raises RecipeError as `load` does.
    """
    source: dict[str, Any] = {}
    places: Places = {}
    if len(words) == 1 and existing_folder(words[0]):
        source = {"format": "image_folder", "path": words[0]}
    elif len(words) == 1 and (file := existing_file(words[0])) and file.suffix.lower() not in (".yaml", ".yml"):
        name = cut(words[0], 300)
        raise RecipeError(
            f"{name} is no recipe and no folder. Write path={name} with its format, such as "
            "format=dataset and 'columns={image: image, caption: caption}'"
        )
    elif len(words) == 1 and "=" not in words[0]:
        return load(words[0]).data
    else:
        apply_overrides(source, places, words)
    if found := list(impossible(source)):
        raise listed(found, places, "data")
    expand_source(source, None)
    try:
        return Data(train=source)
    except ValidationError as error:
        raise to_recipe_error(error, Data, places, "data", hidden=("train",)) from None
