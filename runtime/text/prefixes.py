"""Beginnings of prompts whose keys and values are known, so that they are not computed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.errors import InputError
from moec.runtime.call.caches import Cache, token_arrays
from moec.runtime.package import Port
from moec.runtime.text.texts import Decoder

BLOCK = 32  # tokens; not below the engine's ROWS, so that shorter prompts, of other bits, have none


@dataclass(eq=False)
class _Block:
    """BLOCK tokens after those of its parent; their keys and values are text `slot` of the store's
    caches."""

    slot: int
    tokens: tuple[int, ...] = ()
    parent: _Block | None = None
    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)


class Prefixes:
    """A tree of blocks of tokens, of at most `tokens` tokens in all; the least recently used leaf
    makes room. A prompt's keys and values are copied from it, and to it when they are complete."""

    def __init__(self, executor: Decoder, ports: Sequence[Port], tokens: int) -> None:
        """Raises InputError where the caches are not in memory of the CPU."""
        self.capacity = max(1, tokens // BLOCK)
        caches = executor.new_caches(self.capacity, BLOCK)
        if not all(str(cache.tensor.device).startswith("cpu") for cache in caches):
            raise InputError("prefixes are reused on CPUs only: ask for a store of 0 tokens")
        self._ports, self._arrays = ports, token_arrays(ports, caches)
        self._root = _Block(-1)
        # Descendants of a block are never younger than it, so that the oldest is a leaf.
        self._by_age: OrderedDict[_Block, None] = OrderedDict()

    def load(self, prompt: Sequence[int], most: int, caches: Sequence[Cache]) -> int:
        """Copy the keys and values of the longest known beginning of at most `most` tokens to the
        caches of one text; returns its length."""
        blocks = self._longest(prompt)[: most // BLOCK]
        for array, store in zip(token_arrays(self._ports, caches), self._arrays, strict=True):
            for index, block in enumerate(blocks):
                array[0, :, index * BLOCK : (index + 1) * BLOCK] = store[block.slot]
        return len(blocks) * BLOCK

    def add(self, prompt: Sequence[int], caches: Sequence[Cache], text: int) -> None:
        """Keep the blocks of a prompt whose keys and values are those of a text of caches."""
        blocks = self._longest(prompt)
        arrays = token_arrays(self._ports, caches)
        for index in range(len(blocks), min(len(prompt) // BLOCK, self.capacity)):
            parent = blocks[-1] if blocks else self._root
            block = self._new(parent, tuple(prompt[index * BLOCK : (index + 1) * BLOCK]))
            for array, store in zip(arrays, self._arrays, strict=True):
                store[block.slot] = array[text, :, index * BLOCK : (index + 1) * BLOCK]
            blocks.append(block)
        self._touch(blocks)

    def _longest(self, prompt: Sequence[int]) -> list[_Block]:
        blocks: list[_Block] = []
        block = self._root
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            child = block.children.get(tuple(prompt[start : start + BLOCK]))
            if child is None:
                break
            blocks.append(child)
            block = child
        self._touch(blocks)
        return blocks

    def _touch(self, blocks: Sequence[_Block]) -> None:
        for block in reversed(blocks):
            self._by_age.move_to_end(block)

    def _new(self, parent: _Block, tokens: tuple[int, ...]) -> _Block:
        slot = len(self._by_age)
        if slot == self.capacity:
            oldest, _ = self._by_age.popitem(last=False)
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens]
            slot = oldest.slot
        block = _Block(slot, tokens, parent)
        parent.children[tokens] = block
        self._by_age[block] = None
        return block
