"""The `evaluation` section of a recipe: what is measured when training is done."""

from pydantic import Field, field_validator

from vlm.batches import MAX_BATCH_TOKENS
from vlm.errors import UserError, nearest
from vlm.recipe_errors import FoundError
from vlm.recipe_model import Section


class Classification(Section):
    """Images with a label each, told by a model that was not trained on these labels, as `vlm classify` does it."""

    data: str
    """A folder with a folder for each label, or with metadata.jsonl, or a data set of `datasets`: NAME, NAME:SPLIT."""
    label_column: str | None = None
    """Of rows and data sets; null is `label`."""
    templates: list[str] | str = Field(default=[])
    """Texts with {} where the label goes, or `imagenet`, or a text file with one on each line. A dual encoder is
    measured with the mean of all, a model that writes with one, its answer."""
    prompt: str | None = None
    """What a model that writes is asked."""

    @field_validator("templates")
    @classmethod
    def _read(cls, value: list[str] | str) -> list[str]:
        from vlm.recognition.labels import read_templates

        try:
            return list(read_templates(*((), value) if isinstance(value, str) else (value, None)))
        except UserError as error:
            raise ValueError(str(error)) from None


class Evaluation(Section):
    """What is measured on `data.validation` when training is done."""

    metrics: list[str] = Field(default=[])
    """Names from vlm.eval.metrics.METRICS; empty: only the loss."""
    max_new_tokens: int = Field(default=32, ge=1)
    limit: int | None = Field(default=None, ge=1)
    """Use only so many examples."""
    samples: int = Field(default=0, ge=0)
    """So many held-out examples are answered in each evaluation during training (`train.eval_strategy`), and scored."""
    max_batch_tokens: int = Field(default=MAX_BATCH_TOKENS, ge=1)
    """The most tokens of a batch, prompts and answers with their padding; lower it if memory runs out."""

    classification: dict[str, Classification] = Field(default={})
    """Tasks by name, each measured as `NAME_top_1` and `NAME_top_5` beside the rest."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if value:
            from vlm.eval.metrics import METRICS

            wrong = [(i, name) for i, name in enumerate(value) if name not in METRICS]
            if wrong:
                raise FoundError(
                    [((i,), f"there is no metric '{name}'; {nearest(name, METRICS)}") for i, name in wrong]
                )
        return value
