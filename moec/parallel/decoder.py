"""Generates text on the ranks of a plan; each rank has some of the texts, and their caches.

Every rank draws every token from the logits of all texts, so all take the same number of steps, and
a seed gives the same tokens as in one process. A rank without texts takes part with its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from moec.parallel.process_ranks import ProcessRanks, as_rank_errors, named_meanings
from moec.parallel.segments import RankModel
from moec.parallel.store import RankFiles
from moec.plan.groups import WORLD, tp_group, tp_texts
from moec.runtime.call.caches import Cache, caches_of
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, Package


class RankDecoder:
    """The decoder of one of several ranks, for `Texts` (`moec.runtime.text.texts.Decoder`)."""

    holds_all_texts = False
    account = None

    def __init__(self, files: RankFiles, ranks: ProcessRanks) -> None:
        self._ranks, self._meanings = ranks, named_meanings(ranks)
        code = files.code
        self._model = RankModel(code, ranks.device)
        generation = code.generation and replace(code.generation, stop=files.stop)
        functions = {DECODE: code.signature}
        self.package = Package(code.package.target, functions, generation=generation)
        degrees = {layer.attention for layer in files.plan.layers}
        self._groups = {tp_texts(degree): tp_group(degree) for degree in degrees}
        self._requests = 0

    def number_requests(self, count: int) -> Array:
        first, self._requests = self._requests, self._requests + count
        return np.arange(first, first + count, dtype=np.int32)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        """Caches for this rank's share of the texts, or, where ranks share the heads, for all texts
        of their group."""
        counts, caches = [*map(len, self._shares(texts))], []
        for port in self.package.functions[DECODE].caches:
            group = self._groups.get(str(port.shape[0]))
            ranks = (self._ranks.rank,) if group is None else self._ranks.members[group]
            held = sum(counts[rank] for rank in ranks)
            caches += caches_of([port], held, room, self._ranks.device)
        return caches

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """Logits f32[B, 1, V] of all texts. Raises RankError where an exchange fails."""
        ids, first, rows, last = counts
        shares = self._shares(len(ids))
        own_texts = shares[self._ranks.rank]
        # rows of the texts of ranks before this one
        before = (own_texts[0] if len(own_texts) else 0) * ids.shape[1]
        inputs = [ids[own_texts], first[own_texts], rows[own_texts] - before, last[own_texts]]
        tensors = [torch.from_numpy(array).to(self._ranks.device.takes) for array in inputs]
        (logits,) = self._model(tensors, self._meanings, caches)
        with as_rank_errors(self._ranks, "the logits", "all_gather"):
            gathered = self._ranks.gather(WORLD, logits.float(), [*map(len, shares)])
        return gathered.cpu().numpy()

    def _shares(self, texts: int) -> list[Array]:
        return np.array_split(np.arange(texts), self._ranks.size(WORLD))
