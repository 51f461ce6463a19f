"""ApolloMoE: experts only in the last two layers; languages as an input force experts."""

from __future__ import annotations

import functools

import pytest
import torch

import moec
from docs.systems import NO_FIGURE, Figure, Source
from tests.systems.records import Keep, load, record_of

example = load("20_apollo_moe")
SOURCE = Source(
    number=20,
    title="ApolloMoE",
    paper="2410.10626",
    example="20_apollo_moe",
    process="autoregressive",
    modalities=("text",),
    adds="The same module is two artifacts: one whose last choices languages force, as an input of "
    "the recognised router (`moe.force`), and one for inference, without that input.",
    trained="the standard library's text",
)
TOLERANCE = 1e-4  # float32 sums in another order, through three layers


@functools.cache
def compiled(forced: bool) -> tuple[torch.nn.Module, moec.CompiledModel]:
    torch.manual_seed(0)
    model = example.upcycle(example.Decoder(example.SMALL)).eval()
    return model, example.serve(model, forced)


def test_experts_are_copies_of_the_dense_layer_and_in_the_last_layers_alone() -> None:
    torch.manual_seed(0)
    dense = example.Decoder(example.SMALL)
    model = example.upcycle(dense)
    sparse = [isinstance(layer.mlp, example.Experts) for layer in model.layers]
    assert sparse == [False, True, True]
    for expert in model.layers[-1].mlp.experts:
        assert torch.equal(expert.down.weight, dense.layers[-1].mlp.down.weight)


@pytest.mark.parametrize("forced", [False, True], ids=["inference", "forced"])
def test_the_last_layers_are_blocks_and_equal_eager(forced: bool) -> None:
    model, ours = compiled(forced)
    assert [(b.name, b.experts, b.top_k) for b in ours.blocks] == [
        ("layers.1.mlp", 4, 2),
        ("layers.2.mlp", 4, 2),
    ]
    router = "softmax, top-2" + (", the last forced by language_ids" if forced else "")
    assert {block.router for block in ours.blocks} == {router}
    names = [port.name for port in ours.package.main.inputs]
    assert names == (["input_ids", "language_ids"] if forced else ["input_ids"])
    for shape in ((1, 1), (3, 20)):
        inputs = (torch.randint(256, shape), torch.randint(4, shape))[: 1 + forced]
        with torch.no_grad():
            torch.testing.assert_close(
                ours(*inputs), model(*inputs), rtol=TOLERANCE, atol=TOLERANCE
            )


def test_a_language_forces_its_expert() -> None:
    """Of the first sparse layer: the expert of the language is among the two of every token, as the
    last where the router had not chosen it."""
    model, ours = compiled(True)
    layer = model.layers[1].mlp
    x, languages = torch.randn(2, 9, 32), torch.randint(4, (2, 9))
    with torch.no_grad():
        plain, forced = layer(x), layer(x, languages)
        chosen = layer.router(x).topk(2, dim=-1).indices
        ids = torch.randint(256, (2, 9))
        one, other = (ours(ids, torch.full((2, 9), language)) for language in (0, 1))
    missing = (chosen != languages[..., None]).all(-1)
    assert missing.any()
    assert not missing.all()
    torch.testing.assert_close(plain[~missing], forced[~missing])
    assert not torch.isclose(plain[missing], forced[missing]).all(-1).any()
    assert not torch.allclose(one, other)


def test_in_inference_it_writes() -> None:
    model, ours = compiled(False)
    prompt = torch.tensor([list(b"def ")])
    ids = prompt
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(prompt, max_new_tokens=4), ids)


def test_hybrid_routing_teaches_the_router() -> None:
    """Without a loss of its own, by what the forced experts learn."""
    torch.manual_seed(0)
    model = example.upcycle(example.Decoder(example.SMALL))
    before = example.share_of_own_expert(model)
    losses = example.train(model, steps=40, hybrid=True)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert example.share_of_own_expert(model) > before + 0.1


def test_record(keep: Keep) -> None:
    figures = []
    for name, size in example.PUBLISHED.items():
        total, active = example.parameters(size)
        ours = f"{total / 1e9:.2f} B, {active / 1e9:.2f} B active"
        figures.append(Figure(f"upcycled from {name}", ours, "not read", NO_FIGURE))
    keep(record_of(compiled(False)[1], SOURCE, f"{TOLERANCE:g}", figures))
