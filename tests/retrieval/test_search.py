"""`vlm index` and `vlm search`, against CLIPModel called directly."""

import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel, CLIPProcessor

from tests.dual_encoders import save_clip, save_siglip
from tests.retrieval.conftest import picture
from tests.tiny import clip_config, image_processor
from vlm import index as indexing
from vlm import search as searching
from vlm.data.images import image_sha256
from vlm.errors import UserError
from vlm.retrieval.index import Hit
from vlm.retrieval.page import write_hits

EVIL = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture
def said(console):
    """Runs a function with the console, and gives what it said."""

    def run(function, *args, **options):
        console.file.seek(0)
        console.file.truncate()
        function(*args, console=console, **options)
        return console.file.getvalue()

    return run


@pytest.fixture
def index(photos, clip, said, tmp_path):
    said(indexing.run, [str(photos)], encoder=str(clip), output=tmp_path / "index")
    return tmp_path / "index"


def search(said, query, index, *, k=10, html=None):
    """What was understood, and the hits: path and score."""
    text = said(searching.run, query, index=index, k=k, html=html)
    understood, *lines = text.splitlines()
    hits = [found for line in lines if (found := re.fullmatch(r"(-?\d\.\d{3})  (.*)", line))]
    return understood, [(hit[2], float(hit[1])) for hit in hits], text


@torch.no_grad()
def test_words_find_what_clips_own_similarities_say(index, photos, clip, said):
    paths = sorted(map(str, photos.rglob("*.png")))
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for words in ("a red apple", "cat and dog", "2"):
        inputs = processor(text=[words], images=[Image.open(path) for path in paths], return_tensors="pt")
        cosines = (model(**inputs).logits_per_text[0] / model.logit_scale.exp()).tolist()
        understood, hits, _ = search(said, words, index, k=20)
        assert understood == f"words: {words}"
        own = dict(zip(paths, cosines, strict=True))
        assert {path for path, _ in hits} == own.keys()
        assert [score for _, score in hits] == pytest.approx([own[path] for path, _ in hits], abs=6e-4)
        in_order = [own[path] for path, _ in hits]
        assert all(first >= second - 1e-5 for first, second in pairwise(in_order))
        assert max(in_order) - min(in_order) > 1e-2, "the images differ"


def test_a_photo_finds_itself_first(index, photos, said):
    for path in sorted(photos.rglob("*.png"))[::6]:
        understood, hits, _ = search(said, str(path), index, k=3)
        assert understood == f"photo: {path}"
        assert len(hits) == 3
        assert hits[0] == (str(path), 1.0)


@pytest.mark.parametrize("words", ["~nobody-of-that-name cat", "a photo of a cat that sits " * 20, "a\nb"])
def test_any_words_are_no_file(index, said, words):
    assert "words: " in search(said, words, index)[0]


def test_it_works_from_anywhere(photos, clip, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    said(indexing.run, ["photos"], encoder=os.path.relpath(clip), output=Path("index"))
    monkeypatch.chdir("elsewhere")
    (photos / "00.png").unlink()
    text = said(indexing.run, ["../photos"], encoder=None, output=Path("../index"))
    assert text == "1 gone, 19 as before: ../index, 19 images\n"
    assert search(said, "../photos/01.png", Path("../index"), k=1)[1] == [(str(photos / "01.png"), 1.0)]


def test_another_encoder_is_refused(index, photos, said, tmp_path):
    torch.manual_seed(1)
    save_siglip(tmp_path / "siglip")
    with pytest.raises(UserError, match=r"index has vectors of .*, not of .*siglip; .*cannot be compared"):
        said(indexing.run, [str(photos)], encoder=str(tmp_path / "siglip"), output=index)
    assert search(said, str(photos / "00.png"), index, k=1)[1][0][1] == 1.0


def test_an_encoder_that_was_trained_on_is_another(photos, said, tmp_path):
    torch.manual_seed(1)
    save_clip(tmp_path / "clip")
    said(indexing.run, [str(photos)], encoder=str(tmp_path / "clip"), output=tmp_path / "index")
    save_clip(tmp_path / "clip")
    for again in (
        lambda: said(indexing.run, [str(photos)], encoder=None, output=tmp_path / "index"),
        lambda: search(said, "a cat", tmp_path / "index"),
    ):
        with pytest.raises(UserError, match="which has other weights now"):
            again()


def test_an_encoder_alone_finds_by_photo_and_not_by_words(photos, said, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(clip_config()).save_pretrained(tmp_path / "vision")
    image_processor().save_pretrained(tmp_path / "vision")
    said(indexing.run, [str(photos)], encoder=str(tmp_path / "vision"), output=tmp_path / "index")
    path = str(photos / "00.png")
    assert search(said, path, tmp_path / "index", k=1)[1] == [(path, 1.0)]
    with pytest.raises(UserError, match="reads no text"):
        search(said, "a cat", tmp_path / "index")


def test_a_page_shows_no_file_but_those_that_were_indexed(index, photos, said, tmp_path):
    """Somebody who hands over an index may name a file in it that they cannot read."""
    private = tmp_path / "private.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(private)
    [files] = index.glob("content-*/files.jsonl")
    lines = files.read_text().splitlines(keepends=True)
    files.write_text("".join(line.replace(str(photos / "00.png"), str(private)) for line in lines))
    _, hits, _ = search(said, "a cat", index, k=20, html=tmp_path / "hits.html")
    assert str(private) in dict(hits)
    page = (tmp_path / "hits.html").read_text()
    assert page.count("<img ") == 19
    assert page.count("<span>changed since it was indexed</span>") == 1


def test_what_does_not_open_is_named(photos, clip, said, tmp_path):
    (photos / "broken.png").write_bytes(b"not an image")
    text = said(indexing.run, [str(photos)], encoder=str(clip), output=tmp_path / "index")
    assert f"could not be opened: {photos / 'broken.png'}: not an image" in text
    assert text.endswith(f"20 new, 1 could not be opened: {tmp_path / 'index'}, 20 images\n")
    with pytest.raises(UserError, match="no image could be opened, of 1"):
        said(indexing.run, [str(photos / "broken.png")], encoder=str(clip), output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_hits_that_are_gone_are_named_on_the_page_too(index, photos, said, tmp_path):
    (photos / "05.png").unlink()
    _, hits, text = search(said, "a cat", index, k=20, html=tmp_path / "out" / "hits.html")
    assert [path for path, _ in hits if path.endswith("(no longer there)")] == [f"{photos}/05.png  (no longer there)"]
    assert "1 of these files are no longer there" in text
    page = (tmp_path / "out" / "hits.html").read_text()
    assert page.count("the file does not exist") == 1
    assert page.count("<img") == 19


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("photo", [True, False])
def test_the_page_escapes_names_and_loads_nothing(tmp_path, photo):
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    names = [folder / f"{EVIL}.png", folder / "日本語.png", folder / os.fsdecode(b"\xff.png")]
    for n, name in enumerate(names):
        picture(n).save(name)
    hits = [
        Hit(str(name), 0.9 - n / 10, image_sha256(str(name)) if name.exists() else "") for n, name in enumerate(names)
    ]
    query = str(names[0]) if photo else EVIL
    write_hits(tmp_path / "hits.html", hits, query=query, photo=query if photo else None, searched=1234)
    reader = Reader((tmp_path / "hits.html").read_text(encoding="utf-8"))
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 3 + photo
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in pictures)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert sum(tag == "script" for tag, _ in reader.tags) == 0
    assert sum(tag == "article" for tag, _ in reader.tags) == 3
    assert EVIL in reader.text
    assert "日本語.png" in reader.text
    assert "The 3 of 1,234 images" in reader.text
    assert [score for score in ("0.900", "0.800", "0.700") if score in reader.text] == ["0.900", "0.800", "0.700"]


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("nowhere.jpg", {}, "nowhere.jpg: the file does not exist"),
        ("a cat", {"html": Path("hits.png")}, "needs a name that ends in .html"),
        ("a cat", {"index": Path("/nowhere")}, "/nowhere is no index: .*vlm index makes one"),
        ("photos/broken.png", {}, "broken.png: not an image"),
    ],
)
def test_a_search_that_cannot_be_is_refused(index, photos, said, monkeypatch, tmp_path, query, options, message):
    monkeypatch.chdir(tmp_path)
    (photos / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=message):
        search(said, query, **{"index": index} | options)


def test_an_index_that_cannot_be_made_is_refused(photos, clip, said, tmp_path):
    with pytest.raises(UserError, match="is no index yet; --encoder says"):
        said(indexing.run, [str(photos)], encoder=None, output=tmp_path / "index")
    with pytest.raises(UserError, match="photos is there and is no index"):
        said(indexing.run, [str(photos)], encoder=str(clip), output=photos)
    (tmp_path / "index" / "content-0").mkdir(parents=True)  # of one that was killed before it was there
    said(indexing.run, [str(photos)], encoder=str(clip), output=tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_stopped_it_says_what_is_kept(index, photos, said, console, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(indexing, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        said(indexing.run, [str(photos)], encoder=None, output=index)
    assert console.file.getvalue() == f"20 images are in {index}; run it again to go on\n"
