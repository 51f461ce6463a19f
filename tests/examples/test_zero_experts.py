"""Training MoE++: the loss and the capacities by hand, and a trained layer that compiles."""

from __future__ import annotations

import pytest
import torch

import moec
from examples.training.zero_experts import MoEPlusPlus, balance_loss, capacities, within_limits
from moec.errors import UsageError


def test_balance_loss_by_hand() -> None:
    """Two networks and one other; tokens choose 0, 0, 2 and the router is undecided."""
    logits = torch.zeros(3, 3)
    ids = torch.tensor([[0], [0], [2]])
    # f = (2/3, 0, 1/3), P = 1/3 each, eta = (1, 1, 0.5)
    loss = balance_loss(logits, ids, networks=2, tau=0.5)
    torch.testing.assert_close(loss, torch.tensor(2 / 9 + 0.5 / 9))


@pytest.mark.parametrize("tau", [0.1, 0.75, 1.0])
def test_balance_loss_is_least_where_networks_are_chosen_tau_times_as_often(tau: float) -> None:
    """With f = P, as training brings about: minimise sum of eta * P^2 on the simplex."""
    share = torch.tensor([tau] * 4 + [1.0] * 3)
    share /= share.sum()
    eta = torch.tensor([1.0] * 4 + [tau] * 3)
    least = (eta * share**2).sum()
    for seed in range(20):
        other = share.log() + torch.randn(7, generator=torch.Generator().manual_seed(seed)) / 3
        assert (eta * other.softmax(0) ** 2).sum() > least


def test_capacities_hold_all_choices() -> None:
    private, other = capacities(1200, networks=8, others=4, tau=0.5, gamma=1.0)
    assert (private, other) == (75, 150)
    assert 8 * private + 4 * other == 1200


def test_choices_beyond_a_capacity_are_left_out_in_order() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    remaining = within_limits(ids, torch.tensor([2, 1, 5]))
    assert remaining.tolist() == [[True, True], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 9}, {"zero": -1}, {"networks": 0}])
def test_refusals(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="MoEPlusPlus: width=8"):
        MoEPlusPlus(8, 16, **{"networks": 4, **options})
    with pytest.raises(UsageError, match=r"tau=0\.0, gamma=1\.1: give numbers above 0"):
        MoEPlusPlus(8, 16, 4, tau=0.0)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(MoEPlusPlus(8, 16, 3, constant=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor | None = None
        for layer in self.layers:
            y, logits = layer(x, logits)
            x = x + y
        return x


def test_training_moves_everything_and_the_result_compiles() -> None:
    torch.manual_seed(0)
    model = Two()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.randn(128, 8)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        wrong = (model(x) - x.flip(1)).square().mean()
        loss = wrong + 0.01 * sum(layer.loss for layer in model.layers)  # type: ignore[misc]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["layers.0.residual.weight"]  # the first layer has none before it
    model.eval()
    compiled = moec.compile(model, (x[:9],), verify=1e-5)
    assert [block.zero for block in compiled.blocks] == ["1 constant, 1 copy, 1 zero"] * 2
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
