"""`vlm search`: the images of an index that are most like a photo, or like words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from vlm.data.image_files import IMAGE_SUFFIXES
from vlm.data.images import ImageError
from vlm.embedding import Embedder
from vlm.errors import UserError
from vlm.index import load_encoder
from vlm.paths import existing, existing_file
from vlm.printing import printable_name, require_unicode
from vlm.retrieval.index import ImageIndex
from vlm.retrieval.page import write_hits


def run(query: str, *, index: Path, k: int, html: Path | None, console: Console) -> None:
    """Print the `k` images of `index` that are nearest to `query`, an image file or else words, and write a page.

    Raises UserError if there is no such index or image, or the encoder reads no text.
    """
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {html}: the page needs a name that ends in .html")
    photo = existing_file(query)
    if photo is None and Path(query).suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{query}: the file does not exist")
    if photo is None:
        require_unicode(query, "the words to search for")
    opened = ImageIndex.open(index)
    with console.status("loading the encoder"):
        embedder = load_encoder(opened)
    vector = _vector_of_photo(embedder, str(photo)) if photo else embedder.embed_texts([query])[0].cpu().numpy()
    hits = opened.search(vector, k)
    console.print(f"{'photo' if photo else 'words'}: {query}", markup=False, highlight=False, soft_wrap=True)
    gone = 0
    for hit in hits:
        is_gone = existing(hit.path) is None
        gone += is_gone
        text = f"{hit.score:.3f}  {printable_name(hit.path)}{'  (no longer there)' if is_gone else ''}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if gone:
        console.print(f"{gone} of these files are no longer there; vlm index brings the index up to date")
    if html is not None:
        write_hits(html, hits, query=query, photo=str(photo) if photo else None, searched=len(opened))
        console.print(f"page: {html}", markup=False, highlight=False, soft_wrap=True)


def _vector_of_photo(embedder: Embedder, path: str) -> np.ndarray:
    broken: dict[str, ImageError] = {}
    vectors = [batch.features[0].cpu().numpy() for batch in embedder.embed_images({path: path}, broken=broken)]
    for error in broken.values():
        raise error
    return vectors[0]
