"""The `data` section of a recipe: sources, and how their examples are laid out."""

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from vlm.data.augmentation import Augmentation
from vlm.errors import nearest, shown
from vlm.recipe_errors import FoundError, findings
from vlm.recipe_model import Section
from vlm.recipe_source import KeyPath

Source = dict[str, Any]
"""Where examples come from: `format` and the keys of that format (see vlm.data.readers). One of several for training
may have a `weight`."""

MOST_WEIGHT = 1e12
"""The sum of much larger weights may be infinite; only their ratio counts."""


class Data(Section):
    """The examples, and how they are laid out in rows."""

    train: Source | list[Source]
    """One source, or several. With `weight` in each, their shares in what is trained on; without, all of each."""
    validation: Source | None = None
    """Held-out examples for the loss during training and the metrics after it."""
    base_dir: str = "."
    """Where relative paths in the sources start (the current folder is tried next). Default: the recipe's folder."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """Share of examples that may be unreadable (they are reported and left out) before training refuses to start."""
    max_length: int = Field(default=2048, ge=1)
    """Longest example, in tokens: its images, its prompt and all its answers."""
    too_long: Literal["skip", "drop_branches", "error"] = "skip"
    """An example over `max_length`: leave it out and count it, drop answers until it fits, or stop."""
    max_tokens_per_row: int = Field(default=1024, ge=1)
    """Examples are packed into rows of about this many tokens; memory grows with it."""
    answer_weighting: Literal["equal_tokens", "root_answers"] = "equal_tokens"
    """What a token weighs in the loss: `equal_tokens`, all the same; `root_answers`, one over the root of how many
    answers its images have, as in Molmo (arXiv 2409.17146), so that an image with many counts less for each."""
    cache_features: bool | Literal["auto"] = "auto"
    """Run a frozen vision encoder once per image and keep what it said on disk; `auto` does so if reading that is
    faster than encoding anew, and there is room."""
    max_cache_size: float = Field(default=50, gt=0, allow_inf_nan=False)
    """How large the folder of kept features may become, in GB. 90 % of the free disk is a limit too."""
    augmentation: Augmentation | None = None
    """Random changes to the images of training, others in each epoch; an encoder's features are then not kept."""

    @field_validator("cache_features", mode="before")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError(f"must be auto, true or false, not {shown(value)}")
        return value

    @model_validator(mode="after")
    def _kept(self) -> "Data":
        if self.augmentation and self.cache_features is True:
            why = "does not go with `augmentation`, which changes the images in each epoch; remove one of them"
            raise FoundError([(("cache_features",), why)])
        return self

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _readable(cls, value: Any, info: ValidationInfo) -> Any:
        several = info.field_name == "train" and isinstance(value, list)
        if not several and not isinstance(value, dict):
            return value
        found: list[tuple[KeyPath, str]] = []
        for i, source in enumerate(value if several else [value]):
            at: KeyPath = (i,) if several else ()
            if not isinstance(source, dict):
                found.append((at, f"must be a section of `key: value` lines, not {shown(source)}"))
                continue
            found += [((*at, *path), why) for path, why in _source_problems(source, several)]
            if info.field_name == "validation" and source.get("streaming") is True:
                found.append((("streaming",), "held-out data is read whole; remove this, and add a `limit`"))
        if several and not value:
            found.append(((), "must not be empty"))
        weighted = [source for source in value if isinstance(source, dict) and "weight" in source] if several else []
        if weighted and len(weighted) < len(value):
            found.append(((), "give each source a `weight`, or none"))
        if found:
            raise FoundError(found)
        return value

    @model_validator(mode="after")
    def _no_features_of_a_stream(self) -> "Data":
        if self.streams and self.cache_features is True:
            why = "does not go with data that is streamed, whose images are not all at hand; remove it"
            raise FoundError([(("cache_features",), why)])
        return self

    @property
    def sources(self) -> list[Source]:
        """Those of training, without their weights."""
        sources = self.train if isinstance(self.train, list) else [self.train]
        return [{key: value for key, value in source.items() if key != "weight"} for source in sources]

    @property
    def weights(self) -> list[float] | None:
        """One for each source, if they have any."""
        sources = self.train if isinstance(self.train, list) else []
        return [float(source["weight"]) for source in sources] if sources and "weight" in sources[0] else None

    @property
    def streams(self) -> bool:
        """Whether training reads its data in pieces, which mixes sources by their weights too."""
        return self.weights is not None or any(source.get("streaming") is True for source in self.sources)


def _source_problems(source: Source, several: bool) -> list[tuple[KeyPath, str]]:
    from vlm.data.readers import READERS

    if "format" not in source:
        return [(("format",), f"is missing; one of {', '.join(READERS)}")]
    reader = READERS.get(source["format"]) if isinstance(source["format"], str) else None
    if reader is None:
        return [(("format",), f"there is none called {shown(source['format'])}; {nearest(source['format'], READERS)}")]
    found: list[tuple[KeyPath, str]] = []
    if several and "weight" in source:
        weight = source["weight"]
        if not (is_number(weight) and weight > 0):
            found.append((("weight",), f"must be more than 0, not {shown(weight)}"))
        elif weight > MOST_WEIGHT:
            found.append((("weight",), f"must be at most {MOST_WEIGHT:.0e}, not {shown(weight)}; only ratios count"))
    hidden = ("format", "weight") if several else ("format",)
    try:
        reader.model_validate({key: value for key, value in source.items() if key not in hidden})
    except ValidationError as error:
        found += findings(error, reader)
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
