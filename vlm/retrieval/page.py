"""A page of hits to look at: the query, and under it a card for each image, best first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlm.data.images import ImageError, image_sha256, open_image
from vlm.eval.samples import STYLE, data_uri
from vlm.files import atomic_write
from vlm.printing import html_text
from vlm.retrieval.index import Hit

_STYLE = """
header { display: flex; gap: 1.25rem; align-items: center; margin-bottom: 1.25rem; }
header img { width: 132px; height: 132px; object-fit: contain; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
header p.note { margin-bottom: 0; } h1 { overflow-wrap: anywhere; }
.hits { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(190px, 100%), 1fr)); }
.hit { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.hit .picture { aspect-ratio: 1; background: #fff; display: grid; place-items: center; color: #6b7280; }
.hit img { width: 100%; height: 100%; object-fit: contain; padding: .5rem; display: block; min-height: 0; }
.hit p { margin: 0; padding: .55rem .75rem .7rem; font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
.hit .score { float: right; margin-left: .5rem; font-weight: 600; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.hit .folder { color: var(--soft); font-size: .75rem; }
"""


def write_hits(path: Path, hits: Sequence[Hit], *, query: str, photo: str | None, searched: int) -> None:
    """Write one self-contained HTML page; every name is escaped, images are embedded as small JPEGs.

    Args:
        path: the HTML file; one that is there is replaced.
        hits: best first. Files that do not open any more have a card that says so.
        query: words, or the name of the photo.
        photo: the file of the photo.
        searched: how many images the index has.
    """
    title = html_text(Path(query).name if photo else f"“{query}”")
    picture = f'<img src="{data_uri(open_image(photo))}" alt="{title}">' if photo else ""
    what = "most like this photo" if photo else "nearest to these words"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}{_STYLE}</style></head><body>",
        f'<header>{picture}<div><h1>{title}</h1><p class="note">The {len(hits):,} of {searched:,} images {what}, '
        'with cosine similarity.</p></div></header><main class="hits">',
    ]
    common = os.path.commonpath([os.path.dirname(hit.path) for hit in hits]) if hits else ""
    with atomic_write(path) as file:
        file.writelines(parts)
        file.writelines(_card(hit, common) for hit in hits)
        file.write("</main></body></html>\n")


def _card(hit: Hit, common: str) -> str:
    """`common` is the folder that all hits are in: only what is below it is shown, the whole path when pointed at."""
    shown = Path(hit.path)
    below = os.path.relpath(os.path.dirname(hit.path), common)
    name, folder = html_text(shown.name), "" if below == "." else html_text(below)
    try:
        # Somebody else's index may name any file, but not what is in it.
        if image_sha256(hit.path) != hit.sha256:
            raise ImageError(hit.path, "changed since it was indexed", "run vlm index again")
        picture = f'<img src="{data_uri(open_image(hit.path))}" alt="{name}" loading="lazy">'
    except ImageError as error:
        picture = f"<span>{html_text(error.why)}</span>"
    return (
        f'<article class="hit" title="{html_text(str(shown))}"><div class="picture">{picture}</div>'
        f'<p><span class="score">{hit.score:.3f}</span>{name}<br><span class="folder">{folder}</span></p></article>'
    )
