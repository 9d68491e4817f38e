"""A page to look at: each image beside what was predicted, what was expected, and what was said without seeing it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.files import atomic_write
from vlm.printing import html_text

MAX_SIDE = 384  # pixels of the embedded JPEGs
MAX_REFERENCES = 10

STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #6b7280; --line: #e3e6ea;
  --accent: #2563eb; --good: #15803d; --bad: #b45309; }
@media (prefers-color-scheme: dark) { :root { --bg: #101317; --card: #181c22; --ink: #e8eaed; --soft: #9aa3af;
  --line: #2a3038; --accent: #7aa2ff; --good: #4ade80; --bad: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 2rem 1.25rem 4rem; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
p.note { color: var(--soft); margin: .25rem 0 1.25rem; }
.summary { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  margin-bottom: 1.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem 1rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
td.interval, td .interval { color: var(--soft); font-weight: 400; font-size: .85rem; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
.card { display: grid; grid-template-columns: 42% 1fr; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; overflow: hidden; }
.images { background: color-mix(in srgb, var(--line) 45%, transparent); display: grid; align-content: center; gap: 2px;
  min-height: 190px; }
.images img { display: block; width: 100%; max-height: 300px; object-fit: contain; }
.text { padding: .9rem 1rem; min-width: 0; overflow-wrap: anywhere;
  display: flex; flex-direction: column; gap: .45rem; }
.text p, .text ul { margin: 0; } .question { color: var(--accent); font-size: .9rem; white-space: pre-line; }
.prediction { font-weight: 600; font-size: 1.05rem; line-height: 1.35; }
.references { list-style: none; padding: 0; font-size: .9rem; }
.label { display: block; font-size: .7rem; letter-spacing: .06em; text-transform: uppercase; color: var(--soft);
  font-weight: 500; }
.blind { color: var(--soft); font-size: .9rem; }
.scores { margin-top: auto; padding-top: .3rem; display: flex; flex-wrap: wrap; gap: .35rem; }
.scores span { font-size: .75rem; border: 1px solid var(--line); border-radius: 99px; padding: .05rem .55rem;
  font-variant-numeric: tabular-nums; color: var(--soft); }
.scores b { color: var(--ink); font-weight: 600; }
.empty { font-style: italic; font-weight: 400; color: var(--soft); }
@media (max-width: 480px) { .card { grid-template-columns: 1fr; } }
"""


def data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _words(text: str) -> str:
    return html_text(text) if text.strip() else '<span class="empty">(empty)</span>'


def _score(score: float) -> str:
    return str(score) if isinstance(score, int) else f"{score:.2f}"


def _interval(interval: Sequence[float] | None) -> str:
    return f' <span class="interval">{interval[0]:.3f} to {interval[1]:.3f}</span>' if interval else ""


def _summary_table(summary: Mapping[str, Any]) -> str:
    verdicts = {True: '<span class="yes">yes</span>', False: '<span class="no">not shown</span>', None: "&ndash;"}
    rows = []
    for name, found in summary["metrics"].items():
        blind = "&ndash;" if found["blind_score"] is None else f"{found['blind_score']:.3f}"
        rows.append(
            f"<tr><td>{html_text(name)}</td><td>{found['score']:.3f}{_interval(found['interval'])}</td>"
            f"<td>{blind}{_interval(found['blind_interval'])}</td><td>{verdicts[found['sees']]}</td></tr>"
        )
    return (
        '<div class="summary"><table><thead><tr><th>metric</th><th>score, 95 % interval</th>'
        "<th>blind, 95 % interval</th><th>better than blind</th></tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table></div>"
    )


def _card(row: Mapping[str, Any], opener: Callable[[], Sequence[Image.Image]], *, show_prompt: bool) -> str:
    name = html_text(f"{row['image_id']} ({row['where']})")
    try:
        uris = [data_uri(image) for image in opener()]
        pictures = "".join(f'<img src="{uri}" alt="{name}" title="{name}" loading="lazy">' for uri in uris)
    except (OSError, ValueError) as error:  # a file that is gone by now must not cost the page
        pictures = f"<p>{html_text(str(error))}</p>"
    question = f'<p class="question">{html_text(row["prompt"])}</p>' if show_prompt and row["prompt"] else ""
    # Ten annotators mostly say the same: each text once, with how often it was said.
    counts: dict[str, int] = {}
    for reference in row["references"]:
        counts[reference] = counts.get(reference, 0) + 1
    shown = [
        f"<li>{_words(text)}{f' &times;{count}' if count > 1 else ''}</li>"
        for text, count in sorted(counts.items(), key=lambda pair: -pair[1])
    ]
    if len(shown) > MAX_REFERENCES:
        shown = [*shown[:MAX_REFERENCES], f"<li>and {len(shown) - MAX_REFERENCES} more</li>"]
    blind = ""
    if "blind_prediction" in row:
        blind = f'<p class="blind"><span class="label">blind</span>{_words(row["blind_prediction"])}</p>'
    scores = "".join(f"<span>{html_text(name)} <b>{_score(score)}</b></span>" for name, score in row["scores"].items())
    return (
        f'<article class="card"><div class="images">{pictures}</div><div class="text">{question}'
        f'<p class="prediction">{_words(row["prediction"])}</p>'
        f'<ul class="references"><li class="label">expected</li>{"".join(shown)}</ul>{blind}'
        f'<div class="scores">{scores}</div></div></article>'
    )


def write_samples(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[Callable[[], Sequence[Image.Image]]],
    summary: Mapping[str, Any],
    title: str = "Samples",
    about_blind: str = "Blind is the same prompt with another image.",
) -> None:
    """Write one self-contained HTML page; every text is escaped, images are embedded as small JPEGs.

    Args:
        path: the HTML file.
        rows: as in `predictions.jsonl`: image_id, where, prompt, prediction, references, scores, and where there is
            one, blind_prediction.
        images: for each row a function that opens its images, called one after another.
        summary: what `vlm.eval.evaluate` returns; its table heads the page.
        title: heading of the page.
        about_blind: what a blind score is of.
    """
    prompts = {row["prompt"] for row in rows}
    common = f" Prompt: “{html_text(next(iter(prompts)))}”" if len(prompts) == 1 and "" not in prompts else ""
    left_out = f" {summary['n_broken']} left out: their images do not open." if summary["n_broken"] else ""
    missing = summary["blind_missing"]
    blind = f"No blind score: {html_text(missing)}." if missing else about_blind
    cards = (_card(row, opener, show_prompt=len(prompts) > 1) for row, opener in zip(rows, images, strict=True))
    page = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html_text(title)}</h1><p class='note'>{len(rows)} of {summary['n_items']} items on "
        f"{summary['n_images']} images.{left_out} {blind}{common}</p>",
        _summary_table(summary),
        '<main class="grid">',
    ]
    with atomic_write(Path(path)) as file:
        file.writelines(page)
        file.writelines(cards)
        file.write("</main></body></html>\n")
