"""DiT-MoE: the authors' loop over sorted choices is recognised, the shared expert is added by the
combine, and sampled images equal eager's."""

from __future__ import annotations

import functools

import pytest
import torch

import moec
from docs.systems import COMPARABLE, Figure, Source
from tests.systems.records import Keep, load, record_of

example = load("21_dit_moe")
SOURCE = Source(
    number=21,
    title="DiT-MoE",
    paper="2407.11633",
    example="21_dit_moe",
    process="diffusion",
    modalities=("image",),
    adds="Counts that Python reads are speculated on and proved; the shared expert is added inside "
    "of the combine; modulations of all steps and blocks come from one call before sampling.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-4  # float32 sums in another order, through two blocks


@functools.cache
def compiled() -> tuple[torch.nn.Module, moec.CompiledModel, moec.CompiledModel]:
    torch.manual_seed(0)
    model = example.DiTMoE(example.SMALL).eval()
    return model, *example.compiled_parts(model)


def test_every_block_is_recognised_with_its_shared_expert_in_the_combine() -> None:
    _, _, denoiser = compiled()
    assert [(b.name, b.experts, b.top_k, b.router, b.shared) for b in denoiser.blocks] == [
        (f"blocks.{layer}.moe", 4, 2, "softmax, top-2", "added") for layer in range(2)
    ]
    combines = [
        op for op in denoiser.pass_results[-1].program.graph.ops if op.name == "moe.combine"
    ]
    assert [op.attrs.get("added") for op in combines] == [True, True]


def test_one_step_equals_eager() -> None:
    """For other numbers of images than the example's, and one."""
    model, conditions, denoiser = compiled()
    for count in (1, 6):
        image = torch.randn(count, 1, 8, 8)
        steps, classes = torch.randint(1000, (count,)), torch.randint(11, (count,))
        with torch.no_grad():
            eager = model(image, steps, classes)
        ours = denoiser(image, *conditions(steps, classes))
        torch.testing.assert_close(ours, eager, rtol=TOLERANCE, atol=TOLERANCE)


def test_sampling_equals_eager_and_guidance_matters() -> None:
    model, conditions, denoiser = compiled()
    schedule, labels = example.Schedule.of(6), torch.arange(3)
    with torch.no_grad():
        eager = example.sample(model.conditions, model.denoiser, example.SMALL, labels, schedule)
    ours = example.sample(conditions, denoiser, example.SMALL, labels, schedule)
    most = float(eager.abs().max())
    assert float((ours - eager).abs().max()) <= 10 * TOLERANCE * most  # errors add up over steps
    unguided = example.sample(conditions, denoiser, example.SMALL, labels, schedule, guidance=1.0)
    assert float((unguided - ours).abs().max()) > 0.01 * most


def test_modulations_of_all_steps_come_from_one_call() -> None:
    _, conditions, denoiser = compiled()
    calls: list[int] = []

    def counted(steps: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(steps))
        return conditions(steps, classes)

    schedule = example.Schedule.of(5)
    example.sample(counted, denoiser, example.SMALL, torch.arange(2), schedule)
    assert calls == [5 * 2 * 2]


def test_it_learns_and_the_balance_is_gone_from_the_graph() -> None:
    torch.manual_seed(0)
    model = example.DiTMoE(example.SMALL)
    losses = example.train(model, steps=40)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert model.denoiser.blocks[0].moe.balance.item() > 0
    graph = compiled()[2].captured.program.graph
    assert len(graph.outputs) == 1
    assert not [op for op in graph.ops if ".moe" in op.origin and "mean" in op.name]


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Within 1 % of table 1; XL, which the paper writes as 4.1 billion, within 2 %."""
    size, total, active, flops = example.PUBLISHED[name]
    ours = example.parameters(size)
    assert ours[0] / 1e6 == pytest.approx(total, rel=0.02 if name.startswith("XL") else 0.01)
    assert ours[1] / 1e6 == pytest.approx(active, rel=0.03)
    assert example.gigaflops(size) == pytest.approx(flops, rel=0.01)


def test_record(keep: Keep) -> None:
    figures = []
    for name, (size, total, active, flops) in example.PUBLISHED.items():
        ours = example.parameters(size)
        figures += [
            Figure(
                f"parameters of {name}",
                f"{ours[0] / 1e6:.0f} M, {ours[1] / 1e6:.0f} M active",
                f"{total} M, {active} M active",
                COMPARABLE,
            ),
            Figure(f"GFLOPs of {name}", f"{example.gigaflops(size):.2f}", f"{flops}", COMPARABLE),
        ]
    keep(record_of(compiled()[2], SOURCE, f"{TOLERANCE:g}", figures))
