"""How fast an index of a million images is searched, and how much it finds: `python -m benchmarks.search [COUNT]`.

`vlm.retrieval.index.ImageIndex`, as `vlm index` fills it and `vlm search` opens it, against exact search with numpy
and with faiss (IndexFlatIP) in the same run. A million images there are not, so their vectors are drawn:

made      CLIP ViT-B/16 with its projection to 512 numbers encodes the quickstart's 949 stamps and 2,000 images of
          easy-VQA, in bfloat16. Four fifths of these vectors are fitted with a mixture: k-means with 64 clusters, each
          with a scale of its own, and one covariance for what remains. Vectors are drawn from it and brought to length
          1. Queries are the vectors of the last fifth, of which the mixture knows nothing.
random    Directions drawn uniformly, queries too: no vector is near to any other, and no index can do well.
words     The made vectors, with queries that lie apart from them, as those of words do in CLIP (Liang et al.,
          https://arxiv.org/abs/2203.02053): 0.25 of an image's vector, 0.7 of one direction for all, the rest random.
          `vlm search` reads all lists for words; the recall with as many as for a photo says why.

Writes the tables of docs/retrieval.md. Takes 10 to 15 minutes on two idle cores, and 9 GB of memory. What was made is
kept in runs/benchmarks/search, so that the times can be measured again in a minute or two. Needs the extra `test` and
what `vlm quickstart` fetches.
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
from vlm.data.encoding import encode_images
from vlm.data.images import find_images
from vlm.embedding import Embedder, unit
from vlm.recipe_paths import home
from vlm.retrieval.index import ImageIndex, IndexedFile
from vlm.retrieval.vectors import PROBES

DOCUMENT = ROOT / "docs" / "retrieval.md"
KEPT = ROOT / "runs" / "benchmarks" / "search"
FEATURES = KEPT / "features.safetensors"
COUNT = 1_000_000
CHUNK = 100_000  # images that are added at a time: the index grows as a user's would
CLUSTERS = 64
EASY_VQA_IMAGES = 2_000
K = 10
QUERIES = 200
EXACT_QUERIES = 10
REPEATS = 5

Search = Callable[[np.ndarray], object]


def real_features() -> np.ndarray:
    """Unit vectors `[2949, 512]` of real images; encoded once, and kept."""
    if not FEATURES.exists():
        folder = home() / "clip-vit-base-patch16"
        tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.bfloat16).eval()
        files = find_images([str(home() / "tuxpaint-stamps" / "images")])
        files += find_images([str(home() / "easy-vqa" / "train")])[:EASY_VQA_IMAGES]

        @torch.no_grad()
        def project(pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
            return unit(tower(pixels.to(tower.dtype)).image_embeds), (1, 1)

        embedder = Embedder(str(folder), tower, AutoImageProcessor.from_pretrained(folder))
        batches = encode_images({file: file for file in files}, embedder, project, broken={})
        FEATURES.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.cat([batch.features for batch in batches]).numpy()}, FEATURES)
    return load_file(FEATURES)["features"]


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


def recall(index: ImageIndex, queries: np.ndarray, wanted: np.ndarray) -> float:
    """The mean share of the `K` nearest, `wanted [queries, K]`, among the `K` that are found."""
    found = [{number_of(hit.path) for hit in index.search(query, K)} for query in queries]
    return float(np.mean([len(each & set(row)) / K for each, row in zip(found, wanted.tolist(), strict=True)]))


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


def nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The `K` nearest of each query, exactly: `[queries, K]`."""
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :K]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def what_it_takes(folder: Path, queries: np.ndarray) -> str:
    """A row of the second table, which is the same for all vectors."""
    took = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    held, start = psutil.Process().memory_info().rss, time.monotonic()
    index = ImageIndex.open(folder, to_search=True)
    opened = time.monotonic() - start
    for query in queries:
        index.search(query, K)
    resident = psutil.Process().memory_info().rss - held
    return (
        f"| {len(index):,} | {took['seconds']:.0f} | {took['cpu_seconds']:.0f} | "
        f"{gigabytes(size_on_disk(folder))} | {opened:.1f} | {gigabytes(resident)} |"
    )


def measure(name: str, folder: Path, vectors: np.ndarray, queries: np.ndarray) -> str:
    """A row of the first table."""
    index = ImageIndex.open(folder, to_search=True)
    exact = name == "words"
    found = recall(index, queries, nearest(vectors, queries))
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    ways: dict[str, tuple[Search, int]] = {
        "index": (lambda query: index.search(query, K, exact=exact), EXACT_QUERIES if exact else len(queries)),
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
    shown = f"exact ({PROBES} lists: {found:.3f})" if exact else f"{found:.3f}"
    row = (
        f"| {name} | {shown} | {spread(elapsed['index'])} | "
        f"{statistics.median(busy for _, busy in times['index']):.1f} | {spread(elapsed['numpy'])} | "
        f"{spread(elapsed['faiss'])} | {faster:.1f} | {statistics.median(loads):.1f} |"
    )
    print(row, flush=True)
    return row


def main(arguments: list[str]) -> None:
    count = int(arguments[0]) if arguments else COUNT
    generator = np.random.default_rng(0)
    features = generator.permutation(real_features())
    held_out, known = np.split(features, [len(features) // 5])
    mixture = Mixture(known)
    sample = mixture.draw(len(known), generator)
    print(
        f"intrinsic dimension: real {intrinsic_dimension(known):.1f}, made {intrinsic_dimension(sample):.1f}",
        flush=True,
    )
    searched = [
        f"| queries | recall@{K} | a query, ms | CPU, ms | numpy, ms | faiss flat, ms | times as fast | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    built = [
        "| images | built in, s | CPU, s | on disk | opened in, s | memory of 200 searches |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    folders = {name: KEPT / f"{name}-{count}" for name in ("made", "random")}
    vectors = np.concatenate([mixture.draw(min(CHUNK, count - n), generator) for n in range(0, count, CHUNK)])
    photos = held_out[:QUERIES]
    apart = normalized(generator.standard_normal((1, vectors.shape[1])))
    noise = normalized(generator.standard_normal(photos.shape))
    words = normalized(0.25 * photos + 0.7 * apart + 0.67 * noise).astype(np.float32)
    if not folders["made"].exists():
        build(folders["made"], vectors)
    searched.append(measure("made", folders["made"], vectors, photos))
    searched.append(measure("words", folders["made"], vectors, words))
    for start in range(0, count, CHUNK):
        part = vectors[start : start + CHUNK]
        part[:] = normalized(generator.standard_normal(part.shape, dtype=np.float32))
    random = normalized(generator.standard_normal(photos.shape)).astype(np.float32)
    if not folders["random"].exists():
        build(folders["random"], vectors)
    built.append(what_it_takes(folders["random"], random))
    searched.append(measure("random", folders["random"], vectors, random))
    print("\n".join(built))
    if count == COUNT:
        replace_table(DOCUMENT, "\n".join(searched) + "\n", "## How fast")
        replace_table(DOCUMENT, "\n".join(built) + "\n", "### What an index takes")


if __name__ == "__main__":
    main(sys.argv[1:])
