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

Writes the tables of docs/retrieval.md. Takes 10 to 15 minutes on two cores and 9 GB of memory. Needs the extra `test`
and what `vlm quickstart` fetches.
"""

import os
import statistics
import sys
import tempfile
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

DOCUMENT = ROOT / "docs" / "retrieval.md"
FEATURES = ROOT / "runs" / "benchmarks" / "search_features.safetensors"
COUNT = 1_000_000
CHUNK = 100_000  # images that are added at a time: the index grows as a user's would
CLUSTERS = 64
EASY_VQA_IMAGES = 2_000
K = 10
QUERIES = 200
EXACT_QUERIES = 20
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
    index = ImageIndex(folder, "clip-vit-base-patch16", "")
    for start in range(0, len(vectors), CHUNK):
        end = min(start + CHUNK, len(vectors))
        files = [IndexedFile(f"/photos/{n // 1000:04}/{n:07}.jpg", n, n, f"{n:064x}") for n in range(start, end)]
        index.add(files, vectors[start:end])
    index.save()


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


def measure(
    name: str, vectors: np.ndarray, queries: dict[str, np.ndarray], searched: list[str], built: list[str]
) -> None:
    """Build an index of `vectors`, and add a row to the table `searched` for each kind of `queries`, one to `built`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        start, busy = time.monotonic(), time.process_time()
        build(folder, vectors)
        took, worked = time.monotonic() - start, time.process_time() - busy
        held, start = psutil.Process().memory_info().rss, time.monotonic()
        index = ImageIndex.open(folder, to_search=True)
        opened = time.monotonic() - start
        flat = faiss.IndexFlatIP(vectors.shape[1])
        for query in next(iter(queries.values())):
            index.search(query, K)
        resident = psutil.Process().memory_info().rss - held
        built.append(
            f"| {name} | {len(vectors):,} | {took:.0f} ({worked:.0f}) | {gigabytes(size_on_disk(folder))} | "
            f"{opened:.1f} | {gigabytes(resident)} |"
        )
        flat.add(vectors)
        for kind, given in queries.items():
            exact_only = kind == "words"
            found = recall(index, given, nearest(vectors, given))
            ways: dict[str, tuple[Search, int]] = {
                "index": (lambda query, exact=exact_only: index.search(query, K, exact=exact), QUERIES),
                "numpy": (numpy_search(vectors), EXACT_QUERIES),
                "faiss": (lambda query: flat.search(query[None], K), EXACT_QUERIES),
            }
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            loads = []
            for _ in range(REPEATS):
                for way, (search, count) in ways.items():
                    times[way].append(timed(search, given[: EXACT_QUERIES if exact_only else count]))
                loads.append(os.getloadavg()[0])
            elapsed = {way: [wall for wall, _ in found_times] for way, found_times in times.items()}
            work = statistics.median(busy for _, busy in times["index"])
            best_exact = min(statistics.median(elapsed["numpy"]), statistics.median(elapsed["faiss"]))
            shown = f"1.000, of 32 lists {found:.3f}" if exact_only else f"{found:.3f}"
            searched.append(
                f"| {kind} | {shown} | {spread(elapsed['index'])} | {work:.1f} | {spread(elapsed['numpy'])} | "
                f"{spread(elapsed['faiss'])} | {best_exact / statistics.median(elapsed['index']):.1f} | "
                f"{statistics.median(loads):.1f} |"
            )
            print(searched[-1], flush=True)


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
        "| vectors | images | built and saved in s (CPU) | on disk | opened in s | memory of a search |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    vectors = np.concatenate([mixture.draw(min(CHUNK, count - n), generator) for n in range(0, count, CHUNK)])
    photos = held_out[:QUERIES]
    apart = normalized(generator.standard_normal((1, vectors.shape[1])))
    noise = normalized(generator.standard_normal(photos.shape))
    words = normalized(0.25 * photos + 0.7 * apart + 0.67 * noise).astype(np.float32)
    measure("made", vectors, {"made": photos, "words": words}, searched, built)
    for start in range(0, count, CHUNK):
        part = vectors[start : start + CHUNK]
        part[:] = normalized(generator.standard_normal(part.shape, dtype=np.float32))
    random = normalized(generator.standard_normal(photos.shape)).astype(np.float32)
    measure("random", vectors, {"random": random}, searched, built)
    print("\n".join(built))
    if count == COUNT:
        replace_table(DOCUMENT, "\n".join(searched) + "\n", "## How fast")
        replace_table(DOCUMENT, "\n".join(built) + "\n", "### What an index takes")


if __name__ == "__main__":
    main(sys.argv[1:])
