"""The page is safe to open: texts are escaped, nothing is loaded from outside."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.images import ImageError
from vlm.eval import write_samples

EVIL = "<script>alert('x')</script>\"'&"


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(path: Path, prompts: list[str]) -> Reader:
    rows: list[dict[str, Any]] = [
        {
            "image_id": EVIL,
            "where": EVIL,
            "prompt": prompt,
            "prediction": EVIL,
            "references": [EVIL, EVIL, ""],
            "scores": {EVIL: 0.5},
            "blind_prediction": EVIL,
        }
        for prompt in prompts
    ]
    found = {"score": 0.5, "interval": [0.4, 0.6], "blind_score": None, "blind_interval": None, "sees": None}
    summary = {"metrics": {EVIL: found}, "n_items": 9, "n_images": 7, "n_broken": 0, "blind_missing": EVIL}
    images = [lambda: [Image.new("RGBA", (2000, 1000), "red")]] * len(rows)
    write_samples(path, rows, images=images, summary=summary, title=EVIL)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_texts_are_escaped_and_shown_as_they_are(tmp_path: Path) -> None:
    reader = page(tmp_path / "samples.html", [EVIL, "other"])
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "".join(reader.text).count(EVIL) >= 10
    assert "×2" in "".join(reader.text)
    assert "(empty)" in "".join(reader.text)


def test_the_page_is_self_contained_and_small(tmp_path: Path) -> None:
    reader = page(tmp_path / "samples.html", ["one prompt for all"] * 2)
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object"}
    assert (tmp_path / "samples.html").stat().st_size < 30_000
    # one prompt for all stands once, at the top
    assert "".join(reader.text).count("one prompt for all") == 1


def test_a_picture_that_is_gone_does_not_cost_the_page(tmp_path: Path) -> None:
    def gone() -> list[Image.Image]:
        raise ImageError("a.png", "the file does not exist", "check the folder")

    row = {
        "image_id": "1\u202e", "where": "a.jsonl:1\x1b[2J\udce9", "prompt": "what?", "prediction": "\u202ecat",
        "references": ["a \ud83d cat"], "scores": {"anls": 1.0},
    }  # fmt: skip
    summary = {"metrics": {}, "n_items": 1, "n_images": 1, "n_broken": 0, "broken_images": [], "blind_missing": "x"}
    write_samples(tmp_path / "samples.html", [row], images=[gone], summary=summary)
    text = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "a.png: the file does not exist" in text
    assert not set("\u202e\x1b") & set(text)
    assert r"\u202ecat" in text
    assert r"a \ud83d cat" in text
