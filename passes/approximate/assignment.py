"""The assignment problem: which column each row takes, so that the costs add up to the least."""

from __future__ import annotations

from typing import Any, cast

import numba
import numpy as np
import torch


def assign(gain: torch.Tensor) -> torch.Tensor:
    """The permutation p, i64[N], with the greatest sum of gain[i, p[i]]; gain is [N, N].

    Shortest augmenting paths, O(N^3) (Jonker and Volgenant, Computing 38, 1987).
    """
    cost = -gain.double().numpy()
    return torch.from_numpy(_assign(np.ascontiguousarray(cost)))


def _shortest_paths(cost: Any) -> Any:
    n = cost.shape[0]
    rows, columns = np.zeros(n), np.zeros(n)  # prices, so that no reduced cost is negative
    taken = np.full(n, -1)  # the row that holds each column
    for start in range(n):
        length = np.full(n, np.inf)
        before = np.full(n, -1)
        done = np.zeros(n, np.bool_)
        row, least, column = start, 0.0, -1
        while True:
            nearest = -1
            for j in range(n):
                if done[j]:
                    continue
                reached = least + cost[row, j] - rows[row] - columns[j]
                if reached < length[j]:
                    length[j], before[j] = reached, row
                if nearest < 0 or length[j] < length[nearest]:
                    nearest = j
            column, least = nearest, length[nearest]
            done[column] = True
            if taken[column] < 0:
                break
            row = taken[column]
        rows[start] += least
        for j in range(n):
            if done[j] and j != column:
                rows[taken[j]] += least - length[j]
                columns[j] -= least - length[j]
        while True:  # along the path each row takes the column after its own
            row = before[column]
            taken[column] = row
            if row == start:
                break
            for j in range(n):
                if done[j] and j != column and taken[j] == row:
                    following = j
            column = following
    result = np.empty(n, np.int64)
    for j in range(n):
        result[taken[j]] = j
    return result


_assign = cast(Any, numba.njit(_shortest_paths))
