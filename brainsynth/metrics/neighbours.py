"""Exact nearest neighbours of many rows among many: products in float32 on all cores, decisions in float64.

Every row of a block is compared with every reference by one matrix product; a few candidates more than asked are kept, and
their distances are computed again from float64 differences, so that an exact copy has distance 0. A row whose candidates do
not settle the answer within the rounding error of the product is searched again in float64. So results are those of a loop
over all pairs, ties go to the lower index, and neither block sizes nor the number of cores change them.

Memory: blocks of fixed size in addition to the two sets and the result, whatever their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from brainsynth.errors import UserError
from brainsynth.metrics.manifold import feature_matrix, row_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_QUERIES, _REFERENCES = 1024, 16384
"""Rows per block: the block of squared distances takes 64 MiB."""
_SPARE = 6
"""Candidates beyond those asked for; more only save searches in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The nearest references of each query, nearest first."""

    indices: I64
    """(n, k) rows of the references; for `nearest_subjects`, subjects."""
    distances: F64
    """(n, k) Euclidean distances, in the unit of the features, >= 0."""


def nearest_neighbours(queries: npt.ArrayLike, references: npt.ArrayLike, k: int) -> Neighbours:
    """The k nearest of (m, d) references for each of (n, d) queries; time n m d, on the threads that torch is set to.

    Raises:
        UserError: fewer than k references, different widths, NaN or Inf.
    """
    query, reference = feature_matrix(queries, "query"), feature_matrix(references, "reference")
    if query.shape[1] != reference.shape[1]:
        raise UserError(f"queries have {query.shape[1]} columns and references {reference.shape[1]}")
    if not 1 <= k <= len(reference):
        raise UserError(f"k = {k} neighbours of {len(reference)} references: ask for 1 to {len(reference)}")
    centre = reference.mean(axis=0, dtype=np.float64)
    centred, squares = _centred(reference, centre)
    indices, distances = np.empty((len(query), k), np.int64), np.empty((len(query), k))
    keep = min(len(reference), k + _SPARE)
    unit = (4 + np.sqrt(query.shape[1])) * np.finfo(np.float32).eps
    for rows in row_blocks(len(query), _QUERIES):
        near, near_squares = _centred(query[rows], centre)
        candidates, approximate = _candidates(near, near_squares, centred, squares, keep)
        exact = _exact_squares(query[rows], reference, candidates)
        order = np.lexsort((candidates, exact), axis=1)[:, :k]
        indices[rows] = np.take_along_axis(candidates, order, 1)
        distances[rows] = np.sqrt(np.take_along_axis(exact, order, 1))
        if keep < len(reference):
            margin = unit * (near_squares.numpy().astype(np.float64) + float(squares.max()))
            unsettled = distances[rows][:, -1] ** 2 >= approximate[:, -1] - margin
            for row in np.nonzero(unsettled)[0] + rows.start:
                indices[row], distances[row] = _search_exactly(query[row], reference, k)
    return Neighbours(indices=indices, distances=distances)


def nearest_subjects(
    views: npt.ArrayLike,
    references: npt.ArrayLike,
    subjects: npt.ArrayLike,
    k: int,
    own: npt.ArrayLike | None = None,
) -> Neighbours:
    """The k nearest subjects of each query, a subject being as near as the nearest of its scans to any view of the query.

    Args:
        views: (n, v, d) features of n queries, each seen in v ways (as it is, mirrored).
        references: (m, d) features of scans.
        subjects: (m,) int >= 0, whose scan each reference is.
        k: subjects wanted, >= 1.
        own: (n,) int, a subject to leave out of each query's search: its own; -1 for none.

    Returns:
        Neighbours whose indices are subjects, each once per query.

    Raises:
        UserError: as `nearest_neighbours`; lengths that differ; fewer than k (other) subjects.
    """
    seen, owner = np.asarray(views), np.asarray(subjects, np.int64)
    scans = np.asarray(references)
    if seen.ndim != 3 or len(owner) != len(scans) or (owner < 0).any():
        raise UserError(f"views {seen.shape}, references {scans.shape}, subjects {owner.shape}: see the docstring")
    left_out = np.full(len(seen), -1) if own is None else np.asarray(own, np.int64)
    if left_out.shape != (len(seen),):
        raise UserError(f"own has shape {left_out.shape}; give one subject for each of {len(seen)} queries")
    counts = np.unique(owner, return_counts=True)[1]
    needed = k + bool((left_out >= 0).any())
    if k < 1 or len(counts) < needed:
        raise UserError(f"{k} nearest subjects need {needed} subjects in the references, not {len(counts)}")
    # The rows of the most-scanned subjects, at worst, stand before the first row of the last subject wanted.
    rows = int(np.sort(counts)[::-1][: needed - 1].sum()) + 1
    by_view = [nearest_neighbours(seen[:, view], scans, rows) for view in range(seen.shape[1])]
    indices = np.concatenate([part.indices for part in by_view], axis=1)
    distances = np.concatenate([part.distances for part in by_view], axis=1)
    order = np.lexsort((indices, distances), axis=1)
    whose = owner[np.take_along_axis(indices, order, 1)]
    distances = np.take_along_axis(distances, order, 1)
    for column in range(whose.shape[1]):
        again = (whose[:, :column] == whose[:, column, None]).any(axis=1) | (whose[:, column] == left_out)
        distances[again, column] = np.inf
    first = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Neighbours(indices=np.take_along_axis(whose, first, 1), distances=np.take_along_axis(distances, first, 1))


def _centred(features: npt.NDArray[np.floating], centre: F64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows minus the centre in float32, and their squared norms: smaller numbers round less."""
    rows = np.empty(features.shape, np.float32)
    for part in row_blocks(len(features)):
        rows[part] = features[part] - centre
    tensor = torch.from_numpy(rows)
    return tensor, tensor.square().sum(1)


def _candidates(
    query: torch.Tensor, query_squares: torch.Tensor, reference: torch.Tensor, squares: torch.Tensor, keep: int
) -> tuple[I64, F64]:
    """(b, keep) rows with the smallest squared distances as float32 has them, ascending, and those squares."""
    best = torch.empty(len(query), 0)
    where = torch.empty(len(query), 0, dtype=torch.int64)
    for part in row_blocks(len(reference), _REFERENCES):
        # The query's own square is the same along its row: it is added to the winners alone.
        block = torch.addmm(squares[part], query, reference[part].t(), alpha=-2)
        values, columns = torch.topk(block, min(keep, block.shape[1]), dim=1, largest=False)
        best, where = torch.cat([best, values], 1), torch.cat([where, columns + part.start], 1)
        if best.shape[1] > keep:
            best, columns = torch.topk(best, keep, dim=1, largest=False)
            where = where.gather(1, columns)
    best, columns = best.sort(dim=1)
    return where.gather(1, columns).numpy(), (best + query_squares[:, None]).numpy().astype(np.float64)


def _exact_squares(query: npt.NDArray[np.floating], reference: npt.NDArray[np.floating], candidates: I64) -> F64:
    """(b, c) squared distances of candidates, from float64 differences."""
    out = np.empty(candidates.shape)
    for column in range(candidates.shape[1]):
        difference = query.astype(np.float64) - reference[candidates[:, column]]
        out[:, column] = np.square(difference, out=difference).sum(axis=1)
    return out


def _search_exactly(query: npt.NDArray[np.floating], reference: npt.NDArray[np.floating], k: int) -> tuple[I64, F64]:
    """(k,) nearest rows of one query and their distances, all pairs in float64."""
    squared = np.empty(len(reference))
    for part in row_blocks(len(reference)):
        difference = query.astype(np.float64) - reference[part]
        squared[part] = np.square(difference, out=difference).sum(axis=1)
    order = np.argsort(squared, kind="stable")[:k]
    return order.astype(np.int64), np.sqrt(squared[order])
