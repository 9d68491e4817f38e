"""Answers about a few held-out images while the model still learns: to read, to look at, and to choose the best by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel

from vlm import generation
from vlm.data.check import ProblemLog
from vlm.data.example import Example, Problem
from vlm.data.image_inputs import SizeCheck
from vlm.data.images import ImageError, open_image
from vlm.eval import evaluate, items_of
from vlm.recipe_evaluation import Evaluation


def report_prompts(examples: Sequence[Example], model: Any, processor: Any, log: ProblemLog) -> None:
    """Note the prompts that scoring will leave out, since they do not fit into the model's learned positions. Images
    that cannot be used are left to the evaluation."""
    check = generation.prompt_check(model, processor)
    for item in items_of(examples) if check else ():
        example = examples[item.example]
        try:
            images = [open_image(source, where=example.where) for source in example.images]
            why = check((images, item.messages)) if check else ""
        except ImageError:
            continue
        if why:
            log.add(Problem(item.where, "", why))


class Samples:
    """Called after an evaluation it answers `examples`, writes `predictions.jsonl`, `summary.json` and `samples.html`
    into `folder`/step-N, and gives each metric of the recipe as `eval_METRIC`. The model is in evaluation mode then."""

    def __init__(
        self, trainer: Any, processor: Any, examples: Sequence[Example], evaluation: Evaluation, folder: Path
    ) -> None:
        self.trainer, self.processor, self.examples = trainer, processor, examples
        self.evaluation, self.folder = evaluation, folder

    def __call__(self, sighted: float) -> dict[str, float]:
        scores = [self._scores() if self.trainer.is_world_process_zero() else {}]
        broadcast_object_list(scores)  # all processes choose the best by them
        return scores[0]

    def _scores(self) -> dict[str, float]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if isinstance(model, PeftModel) else model  # with LoRA in its layers
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            summary = evaluate(
                self.examples,
                partial(self._answers, model),
                self.evaluation.metrics,
                output_dir=self.folder / f"step-{self.trainer.state.global_step}",
                blind=False,
                may_fail_to_write=True,
                bootstrap=0,
                check=SizeCheck(self.processor),
                check_prompt=generation.prompt_check(model, self.processor),
            )
        return {f"eval_{name}": found["score"] for name, found in summary["metrics"].items()}

    def _answers(self, model: Any, requests: list[Any]) -> list[str]:
        return generation.generate(
            model,
            self.processor,
            requests,
            max_new_tokens=self.evaluation.max_new_tokens,
            max_batch_tokens=self.evaluation.max_batch_tokens,
        )
