"""Unit vectors by number: added, removed, and searched by inner product.

Up to `EXACT` vectors are all compared. Of more each has a code of 2 bits a number (RaBitQ: Gao and Long, SIGMOD 2024,
https://arxiv.org/abs/2405.12497; Gao et al., 2024, https://arxiv.org/abs/2409.09913), in about sqrt(N) lists by
k-means. A search reads the codes of a quarter of the lists, those whose centres are nearest, and compares the
`CANDIDATES` that look best with the vectors themselves. So many lists, since the nearest images of words are not in
the few lists that are nearest to them.

<folder>/vectors.npy    [N, dimension] float32, in the order of their numbers
<folder>/codes.faiss    of more than `EXACT`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm.disk_faults import DiskError
from vlm.errors import UserError, cut

try:
    import faiss
except ImportError:
    raise UserError("an index of images needs faiss: pip install faiss-cpu") from None

EXACT = 50_000
"""Vectors that are all compared: 512 wide they are 0.1 GB."""
READ = 0.25
"""The share of the lists that a search reads. benchmarks/search.py measures what it finds in them."""
CANDIDATES = 1_000
TOLERATED = 1.5
"""By how much the number of lists may be off: they are made anew whenever the index has grown 2.25 times."""
SAMPLE = 64
"""Vectors a list that k-means learns from."""
CHUNK = 50_000
"""Vectors that are copied at a time."""


class VectorIndex:
    """Vectors `[N, dimension]` float32, each with a number of the caller's own."""

    def __init__(self, dimension: int) -> None:
        self._parts = [np.zeros((0, dimension), dtype=np.float32)]
        self._numbers = np.zeros(0, dtype=np.int64)
        self._removed = np.zeros(0, dtype=bool)
        self._codes: Any = None

    def __len__(self) -> int:
        return len(self._numbers) - int(self._removed.sum())

    @property
    def dimension(self) -> int:
        """The numbers of a vector."""
        return int(self._parts[0].shape[1])

    @property
    def lists(self) -> int:
        """Lists of codes; 0 without codes."""
        return 0 if self._codes is None else int(self._codes.nlist)

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add `vectors [n, dimension]` float32 under `numbers [n]` int64, which ascend, beyond all that there are.

        The lists are made anew when their number is `TOLERATED` times, or a part, of what it should be.
        """
        self._parts.append(np.array(vectors, dtype=np.float32))
        self._numbers = np.concatenate([self._numbers, numbers])
        self._removed = np.concatenate([self._removed, np.zeros(len(numbers), dtype=bool)])
        wanted = round(len(self) ** 0.5)
        if self._codes is not None and self.lists / TOLERATED <= wanted <= self.lists * TOLERATED:
            self._codes.add_with_ids(vectors, numbers)
        else:
            self._codes = self._coded(wanted) if len(self) > EXACT else None

    def remove(self, numbers: np.ndarray) -> None:
        """Remove the vectors of `numbers [n]` int64."""
        self._removed[np.searchsorted(self._numbers, numbers)] = True
        if self._codes is not None:
            self._codes.remove_ids(numbers)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The inner products of `query [dimension]` with the up to `k` nearest vectors, best first, and their
        numbers."""
        query = query.astype(np.float32)
        if self._codes is None:
            places = np.flatnonzero(~self._removed)
            scores = (self._vectors @ query)[places]
        else:
            self._codes.nprobe = max(1, round(READ * self.lists))
            found = self._codes.search(query[None], max(4 * k, CANDIDATES))[1][0]
            # In the order of the file; faiss fills up with -1.
            places = np.searchsorted(self._numbers, np.sort(found[found >= 0]))
            scores = self._vectors[places] @ query
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], self._numbers[places[best]]

    @property
    def _vectors(self) -> np.ndarray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def write(self, folder: Path) -> None:
        """Write what is not removed into the files of `folder`."""
        with (folder / "vectors.npy").open("wb") as file:
            shape = (len(self), self._parts[0].shape[1])
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
            start = 0
            for part in self._parts:
                for first in range(0, len(part), CHUNK):
                    some = part[first : first + CHUNK]
                    file.write(some[~self._removed[start : start + len(some)]].tobytes())
                    start += len(some)
        if self._codes is not None:
            try:
                faiss.write_index(self._codes, str(folder / "codes.faiss"))
            except RuntimeError as error:  # as faiss says that a file cannot be written
                raise DiskError(f"{folder} could not be saved: {error}", str(error).splitlines()[-1]) from error

    @classmethod
    def read(cls, folder: Path, numbers: np.ndarray) -> VectorIndex:
        """What `write` wrote of vectors that have `numbers [N]`, ascending. The vectors stay on disk until they are
        needed. Raises UserError if files are damaged, or not of as many vectors."""
        read = cls(0)
        try:
            read._parts = [np.load(folder / "vectors.npy", mmap_mode="r")]
            codes = folder / "codes.faiss"
            read._codes = faiss.read_index(str(codes)) if codes.exists() else None
        except (OSError, RuntimeError, ValueError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
            why = [type(error).__name__, *str(error).splitlines()][-1]
            raise UserError(f"{folder} is damaged ({cut(why)}); make the index anew") from None
        if read._parts[0].ndim != 2 or read._parts[0].dtype != np.float32:
            raise UserError(f"{folder} is damaged: vectors.npy has no vectors of float32; make the index anew")
        if read._codes is not None and read._codes.d != read.dimension:
            raise UserError(f"{folder} is damaged: codes and vectors are not as long; make the index anew")
        found = [len(read._parts[0])] + ([] if read._codes is None else [read._codes.ntotal])
        if any(count != len(numbers) for count in found):
            raise UserError(f"{folder} is damaged: files and vectors are not as many; make the index anew")
        read._numbers, read._removed = numbers, np.zeros(len(numbers), dtype=bool)
        return read

    def _coded(self, lists: int) -> Any:
        """The codes of all vectors in `lists` lists, which are k-means clusters."""
        kept, vectors = np.flatnonzero(~self._removed), self._vectors
        codes: Any = faiss.index_factory(vectors.shape[1], f"IVF{lists},RaBitQ2", faiss.METRIC_INNER_PRODUCT)
        codes.cp.min_points_per_centroid = 1  # no warning for a list that has a single vector to learn from
        codes.train(vectors[kept[:: max(1, len(kept) // (SAMPLE * lists))]])
        for start in range(0, len(kept), CHUNK):
            some = kept[start : start + CHUNK]
            codes.add_with_ids(vectors[some], self._numbers[some])
        return codes
