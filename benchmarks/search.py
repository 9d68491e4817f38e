"""How fast an index of a million images is searched, and how much it finds: `python -m benchmarks.search [COUNT]`.

`vlm.retrieval.index.ImageIndex`, as `vlm index` fills it and `vlm search` opens it, against exact search with numpy
and with faiss (IndexFlatIP) in the same run. A million images there are not, so their vectors are drawn:

CLIP      CLIP ViT-B/16 with its projection to 512 numbers encodes the quickstart's 949 stamps and 2,000 images of
          easy-VQA, in bfloat16. Four fifths of these vectors are fitted with a mixture: k-means with 64 clusters, each
          with a scale of its own, and one covariance for what remains. Vectors are drawn from it and brought to length
          1. Photos are the vectors of the last fifth, of which the mixture knows nothing. Words, since the quickstart
          has no text half of it, are made up: they lie apart from all images, as CLIP's do (Liang et al.,
          https://arxiv.org/abs/2203.02053): 0.25 of an image's vector, 0.7 of one direction for all, the rest random.
trained   The same with the encoder of `vlm train contrastive`; words are captions of stamps, by its text half.
random    Directions drawn uniformly, queries too: no vector is near to any other.

Writes the tables of docs/retrieval.md. Takes about 20 minutes on two idle cores, and 9 GB of memory. What was made is
kept in runs/benchmarks/search, so that the times can be measured again in a few minutes. Needs the extra `test`, what
`vlm quickstart` and `vlm fetch all-MiniLM-L6-v2` fetch, and `vlm train contrastive`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import psutil
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

from benchmarks.noted import ROOT, replace_table
from vlm.data.disk import gigabytes, size_on_disk
from vlm.data.images import find_images
from vlm.embedding import Embedder, load_embedder, unit
from vlm.recipe_paths import home
from vlm.retrieval.index import ImageIndex, IndexedFile

DOCUMENT = ROOT / "docs" / "retrieval.md"
KEPT = ROOT / "runs" / "benchmarks" / "search"
CLIP, TRAINED, RANDOM = "clip-vit-base-patch16", "runs/contrastive", ""
ENCODERS = {"CLIP": CLIP, "trained": TRAINED, "random": RANDOM}
COUNT = 1_000_000
CHUNK = 100_000  # images that are added at a time: the index grows as a user's would
CLUSTERS = 64
EASY_VQA_IMAGES = 2_000
K = 10
QUERIES = 200
EXACT_QUERIES = 10
REPEATS = 5

Search = Callable[[np.ndarray], object]


def real_vectors(encoder: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[2949, 512]` of real images, and `[N, 512]` of captions, none if the encoder reads no text; encoded
    once, images in bfloat16, which is several times as fast."""
    kept = KEPT / f"{Path(encoder).name}.safetensors"
    if not kept.exists():
        stamps, texts = home() / "tuxpaint-stamps", torch.zeros(0, 512)
        if encoder == CLIP:
            folder = home() / encoder
            tower = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
            embedder: Embedder = Projected(encoder, tower, AutoImageProcessor.from_pretrained(folder))
        else:
            embedder = load_embedder(encoder)
            rows = [json.loads(line) for name in ("train", "test") for line in (stamps / f"{name}.jsonl").open()]
            texts = embedder.embed_texts(list(dict.fromkeys(row["captions"][0] for row in rows)))
        embedder.model.to(torch.bfloat16)
        files = find_images([str(stamps / "images")])
        files += find_images([str(home() / "easy-vqa" / "train")])[:EASY_VQA_IMAGES]
        images = torch.cat([each.features for each in embedder.embed_images({f: f for f in files}, broken={})])
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": images.numpy(), "texts": texts.numpy()}, kept)
    vectors = load_file(kept)
    return vectors["images"], vectors["texts"]


class Projected(Embedder):
    """CLIP's vision half alone with its projection, which `vlm encode` leaves out."""

    @torch.no_grad()
    def embed_pixels(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        return unit(self.model(pixel_values.to(self.model.dtype)).image_embeds), (1, 1)


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Mixture:
    """Clusters of `features [N, D]`, each round its centre by a scale of its own and a covariance that all share."""

    def __init__(self, features: np.ndarray) -> None:
        kmeans = faiss.Kmeans(features.shape[1], CLUSTERS, seed=0, min_points_per_centroid=1)
        kmeans.train(features)
        nearest = kmeans.index.search(features, 1)[1][:, 0]
        self.centres = kmeans.centroids
        self.shares = np.bincount(nearest, minlength=CLUSTERS) / len(features)
        rest = features - self.centres[nearest]
        squares = np.bincount(nearest, (rest**2).sum(axis=1), CLUSTERS) / np.bincount(nearest, minlength=CLUSTERS)
        self.scales = np.sqrt(squares).astype(np.float32)
        rest /= np.maximum(self.scales[nearest], 1e-6)[:, None]
        covariance = rest.T @ rest / len(rest) + 1e-8 * np.eye(rest.shape[1])
        self.root = np.linalg.cholesky(covariance).T.astype(np.float32)

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        cluster = generator.choice(CLUSTERS, count, p=self.shares)
        noise = generator.standard_normal((count, len(self.root)), dtype=np.float32)
        return normalized(noise @ self.root * self.scales[cluster, None] + self.centres[cluster])


def intrinsic_dimension(vectors: np.ndarray, neighbours: int = 20) -> float:
    """The median over `vectors [N, D]` of the maximum likelihood estimate (Levina and Bickel, NeurIPS 2004)."""
    squared = 2 - 2 * vectors @ vectors.T
    np.fill_diagonal(squared, np.inf)
    nearest = np.sqrt(np.maximum(np.sort(squared, axis=1)[:, :neighbours], 1e-9))
    return float(np.median(1 / np.log(nearest[:, -1:] / nearest[:, :-1]).mean(axis=1)))


def build(folder: Path, vectors: np.ndarray) -> None:
    """The index `folder` of images with `vectors`, and beside it what it took."""
    index = ImageIndex(folder, "clip-vit-base-patch16", "")
    start, busy = time.monotonic(), time.process_time()
    for first in range(0, len(vectors), CHUNK):
        end = min(first + CHUNK, len(vectors))
        files = [IndexedFile(f"/photos/{n // 1000:04}/{n:07}.jpg", n, n, f"{n:064x}") for n in range(first, end)]
        index.add(files, vectors[first:end])
    index.save()
    took = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - busy}
    folder.with_suffix(".json").write_text(json.dumps(took), encoding="utf-8")


def number_of(path: str) -> int:
    return int(Path(path).stem)


def quality(index: ImageIndex, vectors: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """Over `queries`, the mean share of the `K` nearest of `vectors` among the `K` that are found, and the median place
    of the last one found among all."""
    shares, places = [], []
    for query in queries:
        scores = vectors @ query
        found = [number_of(hit.path) for hit in index.search(query, K)]
        shares.append(len({*found} & {*np.argpartition(-scores, K)[:K].tolist()}) / K)
        places.append(int((scores >= scores[found[-1]]).sum()))
    return statistics.mean(shares), statistics.median(places)


def timed(search: Search, queries: np.ndarray) -> tuple[float, float]:
    """The median over `queries` of the milliseconds that one takes, and of those that all cores work for it."""
    elapsed, worked = [], []
    for query in queries:
        start, busy = time.perf_counter(), time.process_time()
        search(query)
        worked.append(time.process_time() - busy)
        elapsed.append(time.perf_counter() - start)
    return 1e3 * statistics.median(elapsed), 1e3 * statistics.median(worked)


def numpy_search(vectors: np.ndarray) -> Search:
    def search(query: np.ndarray) -> np.ndarray:
        scores = vectors @ query
        best = np.argpartition(-scores, K)[:K]
        return best[np.argsort(-scores[best])]

    return search


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def what_it_takes(folder: Path, queries: np.ndarray) -> str:
    """A row of the second table, which is the same for all vectors."""
    took = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    held, start = psutil.Process().memory_info().rss, time.monotonic()
    index = ImageIndex.open(folder)
    opened = time.monotonic() - start
    for query in queries:
        index.search(query, K)
    resident = psutil.Process().memory_info().rss - held
    return (
        f"| {len(index):,} | {took['seconds']:.0f} | {took['cpu_seconds']:.0f} | "
        f"{gigabytes(size_on_disk(folder))} | {opened:.1f} | {gigabytes(resident)} |"
    )


def measure(name: str, kind: str, folder: Path, vectors: np.ndarray, queries: np.ndarray) -> str:
    """A row of the first table."""
    index = ImageIndex.open(folder)
    found, place = quality(index, vectors, queries)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    ways: dict[str, tuple[Search, int]] = {
        "index": (lambda query: index.search(query, K), len(queries)),
        "numpy": (numpy_search(vectors), EXACT_QUERIES),
        "faiss": (lambda query: flat.search(query[None], K), EXACT_QUERIES),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    loads = []
    for _ in range(REPEATS):
        for way, (search, count) in ways.items():
            times[way].append(timed(search, queries[:count]))
        loads.append(os.getloadavg()[0])
    elapsed = {way: [wall for wall, _ in pairs] for way, pairs in times.items()}
    faster = min(statistics.median(elapsed[way]) for way in ("numpy", "faiss")) / statistics.median(elapsed["index"])
    row = (
        f"| {name} | {kind} | {found:.3f} | {place:.0f} | {spread(elapsed['index'])} | "
        f"{statistics.median(busy for _, busy in times['index']):.1f} | {spread(elapsed['numpy'])} | "
        f"{spread(elapsed['faiss'])} | {faster:.1f} | {statistics.median(loads):.1f} |"
    )
    print(row, flush=True)
    return row


def drawn(encoder: str, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`count` vectors like those that the encoder makes of images, and queries by their kinds."""
    generator = np.random.default_rng(0)
    if encoder == RANDOM:
        vectors = np.empty((count, 512), dtype=np.float32)
        for start in range(0, count, CHUNK):
            part = vectors[start : start + CHUNK]
            part[:] = normalized(generator.standard_normal(part.shape, dtype=np.float32))
        return vectors, {"random": normalized(generator.standard_normal((QUERIES, 512))).astype(np.float32)}
    images, texts = (generator.permutation(each) for each in real_vectors(encoder))
    held_out, known = np.split(images, [len(images) // 5])
    mixture = Mixture(known)
    dimensions = intrinsic_dimension(known), intrinsic_dimension(mixture.draw(len(known), generator))
    print(f"{encoder}: intrinsic dimension: real {dimensions[0]:.1f}, made {dimensions[1]:.1f}", flush=True)
    vectors = np.concatenate([mixture.draw(min(CHUNK, count - n), generator) for n in range(0, count, CHUNK)])
    photos, words = held_out[:QUERIES], texts[:QUERIES]
    if len(texts):
        return vectors, {"photos": photos, "words": words}
    apart, noise = (normalized(generator.standard_normal((n, vectors.shape[1]))) for n in (1, len(photos)))
    made_up = normalized(0.25 * photos + 0.7 * apart + 0.67 * noise).astype(np.float32)
    return vectors, {"photos": photos, "words, made up": made_up}


def main(arguments: list[str]) -> None:
    count = int(arguments[0]) if arguments else COUNT
    searched = [
        f"| vectors | queries | recall@{K} | place of the last | a query, ms | CPU, ms | numpy, ms | faiss, ms "
        "| times as fast | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    built = [
        "| images | built in, s | CPU, s | on disk | opened in, s | memory of 200 searches |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, encoder in ENCODERS.items():
        folder = KEPT / f"{name}-{count}"
        vectors, queries = drawn(encoder, count)
        if not folder.exists():
            build(folder, vectors)
        if encoder == TRAINED:
            built.append(what_it_takes(folder, queries["photos"]))
        searched += [measure(name, kind, folder, vectors, each) for kind, each in queries.items()]
    print("\n".join(built))
    if count == COUNT:
        replace_table(DOCUMENT, "\n".join(searched) + "\n", "## How fast")
        replace_table(DOCUMENT, "\n".join(built) + "\n", "### What an index takes")


if __name__ == "__main__":
    main(sys.argv[1:])
