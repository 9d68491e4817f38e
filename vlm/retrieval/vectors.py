"""Unit vectors by number: added, removed, and searched by inner product, in faiss' inverted file.

Up to `EXACT` vectors there is one list, and a search reads all of it: exact. More are dealt to about sqrt(N) lists by
k-means, and a search reads the `PROBES` whose centres are nearest (IVF: Sivic and Zisserman, ICCV 2003; Jégou et al.,
https://doi.org/10.1109/TPAMI.2010.57), or all if it has to be exact. Vectors stay in float32: those of images are so
much alike that float16 would exchange neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UserError

try:
    import faiss
    from faiss.contrib.inspect_tools import get_invlist
except ImportError:
    raise UserError("an index of images needs faiss: pip install faiss-cpu") from None

EXACT = 50_000
"""Vectors that are all compared: 512 wide and in float32 they are 0.1 GB."""
PROBES = 32
"""Lists that a search reads. benchmarks/search.py measures what it finds in them."""
TOLERATED = 1.5
"""By how much the number of lists may be off: they are made anew whenever the index has grown 2.25 times."""
SAMPLE = 64
"""Vectors a list that k-means learns from."""


class VectorIndex:
    """Vectors `[N, dimension]` float32, each with a number of the caller's own."""

    def __init__(self, dimension: int) -> None:
        self._index = _with_lists(1, np.zeros((1, dimension), dtype=np.float32))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def lists(self) -> int:
        return int(self._index.nlist)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Add `vectors [n, dimension]` float32 under `ids [n]` int64, none of which is there yet.

        The lists are made anew when their number is `TOLERATED` times, or a part, of what it should be.
        """
        wanted = _lists_for(len(self) + len(ids))
        if not self.lists / TOLERATED <= wanted <= self.lists * TOLERATED:
            old = [get_invlist(self._index.invlists, number) for number in range(self.lists)]
            kept = [(found, codes.view(np.float32)) for found, codes in old if len(found)]
            self._index = _with_lists(wanted, np.concatenate([*(v for _, v in kept), vectors]) if kept else vectors)
            for kept_ids, kept_vectors in kept:
                self._index.add_with_ids(kept_vectors, kept_ids)
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: np.ndarray) -> None:
        """Remove the vectors of `ids [n]` int64."""
        self._index.remove_ids(ids)

    def search(self, query: np.ndarray, k: int, *, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The inner products of `query [dimension]` with the up to `k` nearest vectors, best first, and their ids.

        `exact` reads all lists. A query that is not one of a kind with the vectors needs that.
        """
        self._index.nprobe = self.lists if exact else min(PROBES, self.lists)
        scores, ids = self._index.search(query[None].astype(np.float32), k)
        found = ids[0] >= 0  # faiss fills up with -1
        return scores[0][found], ids[0][found]

    def write(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))

    @classmethod
    def read(cls, path: Path, *, mapped: bool) -> VectorIndex:
        """What `write` wrote; `mapped` leaves the vectors on the disk until a search reads them, and nothing can be
        added. Raises UserError for a file that is damaged."""
        read = cls.__new__(cls)
        try:
            read._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[-1]}); make the index anew") from None
        return read


def _lists_for(count: int) -> int:
    return 1 if count <= EXACT else round(count**0.5)


def _with_lists(lists: int, vectors: np.ndarray) -> Any:
    """An empty inverted file whose lists are k-means clusters of `vectors [N, D]`."""
    dimension = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # no warning for a list that has a single vector to learn from
    index.cp.max_points_per_centroid = SAMPLE
    index.train(vectors)
    return index
