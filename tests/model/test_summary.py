"""What a report says that continuing a text costs."""

from __future__ import annotations

from dataclasses import replace

from moec.model.summary import cost_of_text
from moec.runtime.package import Function, Generation, Package, Port
from tests.runtime import toy


def test_what_a_text_costs() -> None:
    model = toy.language_model()
    no_cache = "each new token takes the whole text again: layer 3 sorts"
    assert cost_of_text(replace(model, no_generation="layer 3 sorts")) == no_cache
    keys, state = Port("k", "bf16", ("B", 2, "L", 8)), Port("s", "f32", ("B", 4, 64))

    def decoding(*caches: Port) -> Package:
        functions = {**model.functions, "decode": Function(caches=caches)}
        return replace(model, functions=functions, generation=Generation(8))

    assert cost_of_text(decoding(keys, keys)) == (
        "the cache takes 64 bytes a token; texts run side by side"
    )
    assert cost_of_text(decoding(keys, state)) == (
        "the cache takes 32 bytes a token, and 1.0 kB of state, which cannot go back: nothing is "
        "guessed; texts run side by side"
    )
    image = replace(model.main, outputs=(Port("score", "f32", ("B",)),))
    assert cost_of_text(replace(model, functions={"main": image})) == ""
