"""VQAv2: a question file, an annotation file and a folder of COCO images (visualqa.org/download.html)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from vlm.data.example import Branch
from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, resolve
from vlm.data.readers_conversations import asked_branch
from vlm.data.readers_json import load_json, load_json_list
from vlm.data.readers_rows import DEFAULT_QUESTION_PROMPT
from vlm.data.readers_text import RowError, answer_text, answer_texts, id_text, required_id, required_text
from vlm.errors import shown

_QUESTION = "'image_id', 'question_id' and 'question'"
_ANNOTATION = "'question_id' and 'multiple_choice_answer'"


class _AnnotationError(RowError):
    """The annotation of a question is bad."""


class VQAv2Source(Source):
    """The answer learned is `multiple_choice_answer`, the references are the ten `answers`.

    `image_pattern` names the image of a question by `{image_id}` and by `{data_subtype}` as the question file gives it,
    such as `train2014`. `question_prompt` is what is asked, with `{question}` where the question goes.
    """

    format_name: ClassVar[str] = "vqav2"
    questions: str
    annotations: str
    images: str
    image_pattern: str = "COCO_{data_subtype}_{image_id:012d}.jpg"
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    @field_validator("image_pattern")
    @classmethod
    def _pattern_names_images(cls, pattern: str) -> str:
        try:
            names = {pattern.format(image_id=i, data_subtype="train2014") for i in (1, 2)}
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"{pattern!r} may use {{image_id}} and {{data_subtype}} only ({error!r})") from error
        if len(names) == 1:
            raise ValueError(f"{pattern!r} gives every image the same name; put {{image_id}} in it")
        return pattern

    def read(self, base_dir: Path) -> ReadResult:
        questions_path = resolve(self.questions, base_dir, "questions")
        annotations_path = resolve(self.annotations, base_dir, "annotations")
        folder = resolve(self.images, base_dir, "images", folder=True)
        content = load_json(questions_path)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise SourceError(
                f"{questions_path}: not a VQAv2 question file: expected an object with a list 'questions'"
            )
        if "{data_subtype" in self.image_pattern and "data_subtype" not in content:
            raise SourceError(f"{questions_path}: has no 'data_subtype'; set image_pattern without {{data_subtype}}")

        collector = Collector(self.limit, self.inside(folder))
        asked: dict[str, str] = {}
        annotations = self._annotations(annotations_path, collector)
        for index, row in enumerate(content["questions"]):
            where = f"{self.questions}:row {index}"
            try:
                if not isinstance(row, dict):
                    raise RowError("", f"expected an object with {_QUESTION}, found {shown(row)}")
                question_id, image_id = required_id(row, "question_id"), required_id(row, "image_id")
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            where = f"{where} (question_id {shown(row['question_id'])})"
            if question_id in asked:
                collector.bad(
                    where, "question_id", f"two questions have this id; the other one is in {asked[question_id]}"
                )
                continue
            asked[question_id] = where
            if not collector.wants(image_id):
                continue
            if question_id not in annotations:
                collector.bad(where, "question_id", f"no annotation in {self.annotations} has this id")
                continue
            annotation_where, annotation = annotations[question_id]
            try:
                branch = self._branch(row, annotation, image_id, question_id, where, annotation_where)
                name = self._file_name(image_id, content.get("data_subtype"))
            except _AnnotationError as error:
                collector.bad(annotation_where, error.key, error.why)
            except RowError as error:
                collector.bad(where, error.key, error.why)
            else:
                if not collector.missing_images([folder / name], where):
                    collector.add([str(folder / name)], [branch], image_id=image_id, where=where)
        for question_id in [q for q in annotations if q not in asked]:
            collector.bad(annotations[question_id][0], "question_id", f"no question in {self.questions} has this id")
        return collector.result(self.questions)

    def _branch(
        self,
        row: dict[str, Any],
        annotation: dict[str, Any],
        image_id: str,
        question_id: str,
        where: str,
        annotation_where: str,
    ) -> Branch:
        if "image_id" in annotation and id_text(annotation["image_id"], "image_id") != image_id:
            why = f"{shown(row['image_id'])} here but {shown(annotation['image_id'])} in {annotation_where}"
            raise RowError("image_id", why)
        question = required_text(row, "question")
        try:
            answer = answer_text(annotation, "multiple_choice_answer")
            references = answer_texts(annotation.get("answers"))
        except RowError as error:
            raise _AnnotationError(error.key, error.why) from None
        asked = self.question_prompt.replace("{question}", question)
        return asked_branch(asked, answer, references=references, where=where, question_id=question_id)

    def _file_name(self, image_id: str, data_subtype: Any) -> str:
        """The file of an image whose id is a number, or any text, as `image_pattern` wants it."""
        number = int(image_id) if image_id.isdecimal() and str(int(image_id)) == image_id else image_id
        try:
            return self.image_pattern.format(image_id=number, data_subtype=data_subtype)
        except ValueError:
            why = f"{shown(image_id)} is no number, as image_pattern {self.image_pattern!r} wants it"
            raise RowError("image_id", f"{why}; for ids of any kind set image_pattern: '{{image_id}}.jpg'") from None

    def _annotations(self, path: Path, collector: Collector) -> dict[str, tuple[str, dict[str, Any]]]:
        """The annotations by question id, each with where it stands."""
        by_question: dict[str, tuple[str, dict[str, Any]]] = {}
        for index, row in enumerate(load_json_list(path, "annotations")):
            where = f"{self.annotations}:row {index}"
            try:
                if not isinstance(row, dict):
                    raise RowError("", f"expected an object with {_ANNOTATION}, found {shown(row)}")
                question_id = required_id(row, "question_id")
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            where = f"{where} (question_id {shown(row['question_id'])})"
            if question_id in by_question:
                other = by_question[question_id][0]
                collector.bad(where, "question_id", f"two annotations have this id; the other one is in {other}")
                continue
            by_question[question_id] = (where, row)
        return by_question
