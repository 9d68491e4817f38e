"""How well a dual encoder brings images and their texts together: recall, and a page to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from vlm.data.encoding import BATCH_IMAGES, EncodedBatch
from vlm.data.example import Example
from vlm.data.images import ImageError, open_image
from vlm.data.pairs import CutTexts, positives, text_number
from vlm.dual_encoder import longest_text, text_lengths
from vlm.embedding import Embedder
from vlm.errors import UserError
from vlm.eval.retrieval import nearest_texts, show, summarize
from vlm.eval.samples import write_samples
from vlm.files import replacing_files
from vlm.printing import json_text

SHOWN = 48


def evaluate_pairs(
    embedder: Embedder,
    examples: Sequence[Example],
    *,
    output_dir: Path,
    console: Console,
    watch: Callable[[Iterable[EncodedBatch]], Iterable[EncodedBatch]] = iter,
    more: Mapping[str, dict[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare the images of `examples`, one each, with the texts of all, and write `summary.json`, `predictions.jsonl`
    and `samples.html` into `output_dir`. Gives the summary, and prints it. Images that do not open are named in it and
    left out, and their texts with them. `watch` sees each batch, and may raise. `more` is what was measured otherwise,
    in the form of the summary's `metrics`, and `about` what was evaluated, the first keys of the summary.

    Raises UserError if there is nothing to compare.
    """
    usable = [example for example in examples if len(example.images) == 1]
    broken: dict[str, ImageError] = {}
    numbered = {str(number): example.images[0] for number, example in enumerate(usable)}
    vectors: dict[str, torch.Tensor] = {}
    total = -(-len(usable) // BATCH_IMAGES)
    batches = track(embedder.embed_images(numbered, broken=broken), "encoding", total, console=console, transient=True)
    for batch in watch(batches):
        vectors |= zip(batch.images, batch.features.cpu(), strict=True)
    if not vectors:
        raise UserError("there is not one example with one image that opens to compare")
    kept = [usable[int(number)] for number in vectors]
    # A text of an image once; one that several images share stands there for each of them.
    pairs = [
        (row, text)
        for row, example in enumerate(kept)
        for text in dict.fromkeys(branch.answer.strip() for branch in example.branches)
        if text
    ]
    if not pairs:
        raise UserError("the examples have no texts to compare images with")
    rows, texts = zip(*pairs, strict=True)
    if missing := set(range(len(kept))) - set(rows):
        raise UserError(f"{kept[min(missing)].where}: has no text to compare its image with")
    scores = (torch.stack(list(vectors.values())) @ embedder.embed_texts(texts).cpu().T).numpy()
    positive = positives(
        torch.arange(len(kept)), torch.tensor(rows), torch.tensor([text_number(text) for text in texts])
    ).numpy()
    left_out = {usable[int(number)].where: str(error) for number, error in broken.items()}
    left_out |= {e.where: f"has {len(e.images)} images" for e in examples if len(e.images) != 1}
    summary = dict(about or {}) | summarize(scores, positive) | {"n_broken": len(left_out), "broken": left_out}
    summary["metrics"] |= more or {}
    predictions = [
        {"image_id": example.image_id, "where": example.where} | row
        for example, row in zip(kept, nearest_texts(scores, positive, texts), strict=True)
    ]
    with replacing_files(output_dir, "summary.json") as folder:
        lines = "".join(json_text(row) + "\n" for row in predictions)
        (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
        write_samples(
            folder / "samples.html",
            predictions[:SHOWN],
            images=[partial(_open, example) for example in kept[:SHOWN]],
            summary=summary,
            title="Nearest texts",
            about_blind="Blind is a random order.",
        )
        (folder / "summary.json").write_text(json_text(summary, indent=1), encoding="utf-8")
    show(summary, console)
    cut = CutTexts(longest_text(embedder.tokenizer, embedder.model.config))
    cut.saw(text_lengths(embedder.tokenizer, texts))
    if cut.count:
        console.print(str(cut), highlight=False, soft_wrap=True)
    for where, why in left_out.items():
        console.print(f"left out: {where}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"nearest texts: {output_dir / 'samples.html'}", markup=False, highlight=False, soft_wrap=True)
    return summary


def _open(example: Example) -> list[Image.Image]:
    return [open_image(source, where=example.where) for source in example.images]
