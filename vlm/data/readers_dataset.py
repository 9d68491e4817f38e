"""A data set of the Hugging Face Hub or of this disk, through `datasets`, with our keys mapped to its columns."""

from __future__ import annotations

import inspect
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from vlm.data import readers_webdataset as webdataset
from vlm.data.example import ImageSource, StoredImage
from vlm.data.inline_images import inline_image
from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, files_of, image_sources, resolve
from vlm.data.readers_files import RowFiles, read_files, row_files
from vlm.data.readers_rows import DEFAULT_PROMPT, DEFAULT_QUESTION_PROMPT, RowReader
from vlm.data.readers_tables import class_labels, label_name
from vlm.data.readers_text import RowError, id_text
from vlm.errors import nearest

_BATCH = 1000
_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
"""What reads a file, by the end of its name."""


class Columns(BaseModel):
    """Which column holds what. Rows with an equal `image_id` are branches of one example: their image is kept once."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
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
    completion: str | None = None
    question_id: str | None = None

    @model_validator(mode="after")
    def _one_image_and_something_to_answer(self) -> Columns:
        if self.image and self.images:
            raise ValueError("give either 'image' (one to a row) or 'images' (a list to a row)")
        content = (self.caption, self.captions, self.question, self.qa, self.messages, self.conversations)
        if not any((*content, self.completion)):
            raise ValueError("give one of caption, captions, question, qa, messages, conversations, completion")
        if self.question and not (self.answer or self.answers):
            raise ValueError("'question' needs 'answer' or 'answers' beside it")
        if self.completion and not self.prompt:
            raise ValueError("'completion' needs 'prompt' beside it")
        return self

    @property
    def of_images(self) -> str | None:
        """The column that holds images."""
        return self.image or self.images

    @cached_property
    def to_answer(self) -> dict[str, str]:
        """Key to column, for what is asked and answered."""
        return self.model_dump(exclude_none=True, exclude={"image", "images", "image_id"})

    @property
    def of_words(self) -> list[str]:
        """The columns without images, each once."""
        return list(dict.fromkeys([*self.to_answer.values(), *([self.image_id] if self.image_id else [])]))

    @property
    def all(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys([*self.of_words, *([self.of_images] if self.of_images else [])]))


class DatasetSource(Source):
    """`path` is a name on the Hub, a local folder (also one of `save_to_disk`), or a builder such as `parquet`,
    `webdataset` or `json` with `data_files`. `name`, `data_files`, `split` and `revision` are those of
    `datasets.load_dataset`. A column of paths starts at `images`, by default the recipe's folder. With `streaming`
    training reads it in pieces, and never holds it whole (`vlm.data.stream_sources`).
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
    streaming: bool = False

    @model_validator(mode="after")
    def _complete(self) -> DatasetSource:
        if self.data_files == []:
            raise ValueError("'data_files' is empty; name a file, or remove it")
        if self.streaming and self.limit:
            raise ValueError("'limit' does not go with 'streaming': how long a stream is trained on is train.max_steps")
        return self

    def read(self, base_dir: Path) -> ReadResult:
        with self.errors(base_dir):
            if (files := self.row_files(base_dir)) is not None:
                return read_files(self, base_dir, files)
        dataset = self.load(base_dir)
        with self.errors(base_dir):
            return self._read_loaded(dataset, base_dir)

    def _read_loaded(self, dataset: Any, base_dir: Path) -> ReadResult:
        self.check_columns(dataset.column_names)
        folder, columns = self.image_folder(base_dir), self.columns
        if columns.of_images is not None:
            dataset = self.undecoded(dataset, columns.of_images)

        labels = class_labels(dataset.features)
        label = f"{self.data_files if isinstance(self.data_files, str) else self.path}[{self.split}]"
        collector = Collector(self.limit, self.inside(*self.folders(base_dir)))
        for index, (row, cell) in enumerate(self._rows(dataset, columns.of_words, columns.of_images)):
            if collector.full and columns.image_id is None:
                break
            where = f"{label}:row {index}"
            image_id = self.image_id(row, where, collector) if columns.image_id else str(index)
            if image_id is not None and collector.wants(image_id):
                images = _sources(dataset, index, columns.of_images, cell, folder)
                self.collect(collector, row, images, image_id=image_id, where=where, labels=labels)
        return collector.result(label)

    def image_folder(self, base_dir: Path) -> Path:
        """Where a column of paths starts."""
        if self.images is not None:
            return resolve(self.images, base_dir, "images", folder=True)
        file = base_dir / os.path.expanduser(self.path)
        return file.parent if self.data_files is None and file.is_file() else base_dir

    def folders(self, base_dir: Path) -> list[Path]:
        """The folders of the data: where a column of paths starts, and those of its files."""
        path, files = self.place(base_dir)
        local = [Path(path), *(Path(file.partition("*")[0]).parent for file in files or [] if "://" not in file)]
        found = [self.image_folder(base_dir), *(folder for folder in local if folder.is_dir())]
        if not os.path.exists(path) and files is None:  # on the Hub: where its files are brought to
            import datasets
            from huggingface_hub.constants import HF_HUB_CACHE

            found += [Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
        return list(dict.fromkeys(found))

    def check_columns(self, known: Sequence[str]) -> None:
        """Raise SourceError for a column that is not there."""
        for key, column in self.columns.model_dump(exclude_none=True).items():
            if column not in known:
                hint = nearest(column, known)
                name = self.data_files if isinstance(self.data_files, str) else self.path
                raise SourceError(f"option 'columns.{key}': no column {column!r} in {name}; {hint}")

    def image_id(self, row: Mapping[str, Any], where: str, collector: Collector) -> str | None:
        """What the row says, or where there is no id, `where` it is; None for one that is bad."""
        key = self.columns.image_id
        try:
            return (id_text(row.get(key), key) if key else None) or where
        except RowError as error:
            collector.bad(where, error.key, error.why)
            return None

    def collect(
        self,
        collector: Collector,
        row: Mapping[str, Any],
        images: Sequence[ImageSource] | str,
        *,
        image_id: str,
        where: str,
        labels: Mapping[str, Any],
    ) -> None:
        """Add what a row says, by its columns, of its `images`, or the reason why there are none. `labels` are the
        columns of class labels."""
        if isinstance(images, str):
            collector.bad(where, "image", f"{images} in column {self.columns.of_images!r}")
            return
        named = {key: _named(row.get(column), labels.get(column)) for key, column in self.columns.to_answer.items()}
        rows = RowReader(self.prompt, self.question_prompt)
        branches = rows.branches(named, num_images=len(images), where=where, problems=collector.problems)
        if branches and not collector.missing_images(files_of(images), where, lost=len(branches)):
            collector.add(images, branches, image_id=image_id, where=where)

    def place(self, base_dir: Path) -> tuple[str, list[str] | None]:
        """`path` and `data_files` as `datasets` wants them, relative ones made whole. A `path` that is a file is read
        by how its name ends."""
        local = Path(os.path.abspath(base_dir / os.path.expanduser(self.path)))
        if local.is_file() and self.data_files is None:
            builder = _BUILDERS.get(Path(local.name.lower().removesuffix(".gz")).suffix)
            if builder is None:
                raise SourceError(f"option 'path': {local} is no file of rows; known: {', '.join(_BUILDERS)}")
            return builder, [str(local)]
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files
        if files is not None:
            files = [f if "://" in f else str(base_dir / os.path.expanduser(f)) for f in files]
        return (str(local) if local.exists() else self.path), files

    def is_saved(self, base_dir: Path) -> bool:
        """Whether `path` is what `save_to_disk` saved."""
        path = Path(self.place(base_dir)[0])
        return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()

    def saved(self, base_dir: Path) -> Any | None:
        """The data set, memory-mapped, if `path` is what `save_to_disk` saved."""
        import datasets

        if not self.is_saved(base_dir):
            return None
        path = self.place(base_dir)[0]
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            return loaded[self.split]
        if "split" in self.model_fields_set and str(loaded.split) != self.split:
            raise ValueError(f"it was saved as a single data set (split {loaded.split}); leave out 'split'")
        return loaded

    @contextmanager
    def errors(self, base_dir: Path) -> Iterator[None]:
        """What `datasets` raises, and it may be anything, as a SourceError."""
        import datasets

        try:
            yield
        except SourceError:
            raise
        except Exception as error:
            local = base_dir / os.path.expanduser(self.path)
            tried = f"tried the folder {local}, then the name {self.path!r}" if not local.exists() else f"tried {local}"
            cause: BaseException = error
            while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__:
                cause = cause.__cause__  # the reason, which that does not say
            reason = f"{type(cause).__name__}: {cause}"
            raise SourceError(f"data set {self.path!r}, split {self.split!r}: {reason} ({tried})") from error

    def builder(self, base_dir: Path) -> Any:
        """What `datasets` reads the data set with."""
        import datasets

        path, files = self.place(base_dir)
        for file in files or ():
            if not ("://" in file or os.path.exists(file) or glob(file, recursive=True)):
                what = "no file matches" if has_magic(file) else "no such file:"
                raise SourceError(f"option 'data_files': {what} {file}")
        return datasets.load_dataset_builder(path, self.name, data_files=files, revision=self.revision)

    def row_files(self, base_dir: Path) -> RowFiles | None:
        """The JSON or CSV files of the data set; None for one of another format."""
        return None if self.is_saved(base_dir) else row_files(self.builder(base_dir), streamed=self.streaming)

    def load(self, base_dir: Path) -> Any:
        """The data set, none of its columns looked at. Raises SourceError if it cannot be had."""
        import datasets
        from datasets.fingerprint import Hasher
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        with self.errors(base_dir):
            if (saved := self.saved(base_dir)) is not None:
                return saved
            builder = self.builder(base_dir)
            path, split = self.place(base_dir)[0], self.split.partition("[")[0]
            files = list((builder.config.data_files or {}).get(split, []))
            for file in files:
                require_whole_tar(file)
            if isinstance(builder, WebDataset) and files and split == self.split and self.columns.of_images:
                # What is kept of other or changed files is not taken for these.
                stamps = [os.path.getmtime(file) for file in files if os.path.isfile(file)]
                made = {"tars": files} | self.fields(files[0])
                fingerprint = Hasher.hash([made, stamps, inspect.getsource(webdataset)])
                return datasets.Dataset.from_generator(webdataset.rows, gen_kwargs=made, fingerprint=fingerprint)
            data_files = self.place(base_dir)[1]
            return datasets.load_dataset(
                path, self.name, data_files=data_files, split=self.split, revision=self.revision
            )

    def fields(self, tar: str) -> dict[str, tuple[str, ...]]:
        """What is to be read of WebDataset shards, of which `tar` is one."""
        columns = self.columns.all
        seen = webdataset.look(tar, columns, self.columns.of_images)
        self.check_columns(seen.known)
        return {"columns": tuple(columns), "others": tuple(seen.others)}

    def undecoded(self, dataset: Any, column: str) -> Any:
        """The data set with the image column left as bytes or paths, so that no row is decoded before it is wanted."""
        from datasets import Image, List, Value

        feature = dataset.features[column]
        if isinstance(feature, Image):
            return dataset.cast_column(column, Image(decode=False))
        inner = getattr(feature, "feature", None)
        if _is_stored_image(feature):
            return dataset.cast_column(column, Image(decode=False))
        if isinstance(inner, Image) or _is_stored_image(inner):
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


def require_whole_tar(file: str) -> None:
    """Raise ReadError if a tar on this disk, not compressed, has something else than a header after one of its files:
    `tarfile`, and so `datasets`, takes that for the end and says nothing of what follows."""
    if not (file.endswith(".tar") and os.path.isfile(file)):
        return
    archive: Any
    with tarfile.open(file, "r:") as archive, open(file, "rb") as raw:
        while archive.next():
            archive.members = []  # else it keeps them all
        raw.seek(archive.offset)
        if any(raw.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(
                f"no header at byte {archive.offset:,} of {file}, and more behind it; save it again"
            )


def _is_stored_image(feature: Any) -> bool:
    """Whether it is what an image is stored as, and what pandas writes of it, which does not say that it is one."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _named(value: Any, labels: Any) -> Any:
    return value if labels is None else label_name(labels, value)


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
    try:
        is_file = [isinstance(c, str) and inline_image(c, column) is None for c in cells]
    except RowError as error:
        return error.why
    return tuple(
        image_sources([c], folder, column)[0]
        if file
        else StoredImage(dataset, row, column, i if isinstance(cell, list) else None)
        for i, (c, file) in enumerate(zip(cells, is_file, strict=True))
    )
