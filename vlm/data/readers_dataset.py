"""A data set of the Hugging Face Hub or of this disk, through `datasets`, with our keys mapped to its columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from vlm.data.example import ImageSource, StoredImage
from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, resolve
from vlm.data.readers_rows import DEFAULT_PROMPT, DEFAULT_QUESTION_PROMPT, RowReader
from vlm.errors import nearest

_BATCH = 1000


class Columns(BaseModel):
    """Which column holds what. Rows with an equal `image_id` are branches of one example: their image is kept once."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    image: str | None = None
    images: str | None = None
    image_id: str | None = None
    caption: str | None = None
    captions: str | None = None
    question: str | None = None
    answer: str | None = None
    answers: str | None = None
    qa: str | None = None
    messages: str | None = None
    conversations: str | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _one_image_and_something_to_answer(self) -> Columns:
        if self.image and self.images:
            raise ValueError("give either 'image' (one to a row) or 'images' (a list to a row)")
        if not any((self.caption, self.captions, self.question, self.qa, self.messages, self.conversations)):
            raise ValueError("give one of caption, captions, question, qa, messages, conversations")
        if self.question and not (self.answer or self.answers):
            raise ValueError("'question' needs 'answer' or 'answers' beside it")
        return self


class DatasetSource(Source):
    """`path` is a name on the Hub, a local folder (also one of `save_to_disk`), or a builder such as `parquet`,
    `webdataset` or `json` with `data_files`. `name`, `data_files`, `split` and `revision` are those of
    `datasets.load_dataset`. A column of paths starts at `images`, by default the recipe's folder.
    """

    format_name: ClassVar[str] = "dataset"
    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    revision: str | None = None
    columns: Columns
    images: str | None = None
    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def read(self, base_dir: Path) -> ReadResult:
        folder = base_dir if self.images is None else resolve(self.images, base_dir, "images", folder=True)
        dataset = self._load(base_dir)
        mapping = {key: column for key, column in self.columns.model_dump().items() if column is not None}
        for key, column in mapping.items():
            if column not in dataset.column_names:
                hint = nearest(column, dataset.column_names)
                raise SourceError(f"option 'columns.{key}': no column {column!r} in {self.path}; {hint}")
        image_column = mapping.pop("image", None) or mapping.pop("images", None)
        id_column = mapping.pop("image_id", None)
        if image_column is not None:
            dataset = self._undecoded(dataset, image_column)

        label = f"{self.data_files if isinstance(self.data_files, str) else self.path}[{self.split}]"
        collector = Collector(self.limit)
        rows = RowReader(self.prompt, self.question_prompt)
        names = dict.fromkeys([*mapping.values(), *([id_column] if id_column else [])])
        for index, (row, cell) in enumerate(self._rows(dataset, list(names), image_column)):
            if collector.full and id_column is None:
                break
            where = f"{label}:row {index}"
            image_id = str(index if id_column is None else row[id_column])
            if not collector.wants(image_id):
                continue
            images = _sources(dataset, index, image_column, cell, folder)
            if isinstance(images, str):
                collector.bad(where, "image", f"{images} in column {image_column!r}")
                continue
            named = {key: row[column] for key, column in mapping.items()}
            branches = rows.branches(named, num_images=len(images), where=where, problems=collector.problems)
            paths = [Path(image) for image in images if isinstance(image, str)]
            if branches and not collector.missing_images(paths, where, lost=len(branches)):
                collector.add(images, branches, image_id=image_id, where=where)
        return collector.result(label)

    def _load(self, base_dir: Path) -> Any:
        import datasets

        local = base_dir / Path(self.path).expanduser()
        files: Any = [self.data_files] if isinstance(self.data_files, str) else self.data_files
        if files is not None:
            files = [f if "://" in f else str(base_dir / Path(f).expanduser()) for f in files]
        try:
            if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(local))
                if isinstance(loaded, datasets.DatasetDict):
                    return loaded[self.split]
                if "split" in self.model_fields_set and str(loaded.split) != self.split:
                    raise ValueError(f"it was saved as a single data set (split {loaded.split}); leave out 'split'")
                return loaded
            path = str(local) if local.exists() else self.path
            return datasets.load_dataset(path, self.name, split=self.split, data_files=files, revision=self.revision)
        except Exception as error:  # builders raise anything; the cause is kept below
            tried = f"tried the folder {local}, then the name {self.path!r}" if not local.exists() else f"tried {local}"
            reason = f"{type(error).__name__}: {error}"
            raise SourceError(f"data set {self.path!r}, split {self.split!r}: {reason} ({tried})") from error

    def _undecoded(self, dataset: Any, column: str) -> Any:
        """The data set with the image column left as bytes or paths, so that no row is decoded before it is wanted."""
        from datasets import Image, List, Value

        feature = dataset.features[column]
        if isinstance(feature, Image):
            return dataset.cast_column(column, Image(decode=False))
        inner = getattr(feature, "feature", None)
        if isinstance(inner, Image):
            return dataset.cast_column(column, List(Image(decode=False)))
        if any(
            isinstance(f, Value) and f.dtype in ("string", "large_string", "binary", "large_binary", "null")
            for f in (feature, inner)
        ):
            return dataset
        raise SourceError(f"{self.path}: column {column!r} holds {feature}, not images or paths of images")

    def _rows(self, dataset: Any, names: list[str], image: str | None) -> Iterator[tuple[dict[str, Any], Any]]:
        """Each row's text columns, and what its image column holds without the bytes (see `_outline`)."""
        texts = dataset.select_columns(names)
        outlines = dataset.select_columns([image]).with_format("arrow") if image else None
        for start in range(0, len(dataset), _BATCH):
            stop = min(start + _BATCH, len(dataset))
            batch = texts[start:stop]
            cells = _outline(outlines[start:stop][image]) if outlines is not None else [None] * (stop - start)
            for offset, cell in enumerate(cells):
                yield {name: batch[name][offset] for name in names}, cell


def _outline(column: Any) -> list[Any]:
    """What each cell of an Arrow image column holds: a path, `True` for bytes, `None` for nothing, or a list of these.

    Reads validity bits, offsets and paths only: the encoded images stay on disk.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        return [cell for chunk in array.chunks for cell in _outline(chunk)]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        flat = iter(_outline(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    if pa.types.is_struct(array.type):
        stored = _outline(array.field("bytes"))
        paths = _outline(array.field("path"))
        valid = array.is_valid().to_pylist()
        return [(s or p) if v else None for s, p, v in zip(stored, paths, valid, strict=True)]
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return [valid or None for valid in array.is_valid().to_pylist()]
    return list(array.to_pylist())


def _sources(dataset: Any, row: int, column: str | None, cell: Any, folder: Path) -> tuple[ImageSource, ...] | str:
    """The images of a row, or why there are none."""
    if column is None:
        return ()
    cells = cell if isinstance(cell, list) else [cell]
    if any(c is None or c == "" for c in cells):
        return "no image"
    return tuple(
        str(folder / c)
        if isinstance(c, str)
        else StoredImage(dataset, row, column, i if isinstance(cell, list) else None)
        for i, c in enumerate(cells)
    )
