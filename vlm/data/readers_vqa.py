"""VQAv2: a question file, an annotation file and a folder of COCO images (visualqa.org/download.html)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from vlm.data.example import question_and_answer
from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, load_json, load_json_list, resolve
from vlm.data.readers_rows import DEFAULT_QUESTION_PROMPT, RowError, answer_texts, required_text


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

        collector = Collector(self.limit)
        asked: set[Any] = set()
        annotations = self._annotations(annotations_path, collector)
        for index, row in enumerate(content["questions"]):
            where = f"{self.questions}:row {index}"
            if not isinstance(row, dict) or not isinstance(row.get("image_id"), int) or "question_id" not in row:
                collector.bad(where, "image_id", "expected an object with 'image_id', 'question_id' and 'question'")
                continue
            where = f"{where} (question_id {row['question_id']})"
            if row["question_id"] in asked:
                collector.bad(where, "question_id", "two questions have this id")
                continue
            asked.add(row["question_id"])
            image_id = str(row["image_id"])
            if not collector.wants(image_id):
                continue
            if row["question_id"] not in annotations:
                collector.bad(where, "question_id", f"no annotation in {self.annotations} has this id")
                continue
            annotation_where, annotation = annotations[row["question_id"]]
            if annotation.get("image_id", row["image_id"]) != row["image_id"]:
                why = f"{row['image_id']} here but {annotation['image_id']} in {annotation_where}"
                collector.bad(where, "image_id", why)
                continue
            try:
                question = required_text(row, "question")
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            try:
                answer = required_text(annotation, "multiple_choice_answer")
                references = answer_texts(annotation.get("answers"))
            except RowError as error:
                collector.bad(annotation_where, error.key, error.why)
                continue
            name = self.image_pattern.format(image_id=row["image_id"], data_subtype=content.get("data_subtype"))
            if not collector.missing_images([folder / name], where):
                text = self.question_prompt.replace("{question}", question)
                branch = question_and_answer(text, answer, references=references, where=where)
                collector.add([str(folder / name)], [branch], image_id=image_id, where=where)
        for question_id in [q for q in annotations if q not in asked]:
            collector.bad(annotations[question_id][0], "question_id", f"no question in {self.questions} has this id")
        return collector.result(self.questions)

    def _annotations(self, path: Path, collector: Collector) -> dict[Any, tuple[str, dict[str, Any]]]:
        """The annotations by question id, each with where it stands."""
        by_question: dict[Any, tuple[str, dict[str, Any]]] = {}
        for index, row in enumerate(load_json_list(path, "annotations")):
            where = f"{self.annotations}:row {index}"
            if not isinstance(row, dict) or not isinstance(row.get("question_id"), int | str):
                collector.bad(
                    where, "question_id", "expected an object with 'question_id' and 'multiple_choice_answer'"
                )
                continue
            where = f"{where} (question_id {row['question_id']})"
            if row["question_id"] in by_question:
                collector.bad(where, "question_id", "two annotations have this id")
                continue
            by_question[row["question_id"]] = (where, row)
        return by_question
