"""The search over layers finds the result of brute force."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest

from moec.plan.search.search import LayerOption, search


def brute_force(
    layers: list[list[LayerOption]], steps: list[list[float]], limit: float
) -> float | None:
    plans = [
        sum(c.seconds for c in plan) + sum(steps[a.state][b.state] for a, b in pairwise(plan))
        for plan in product(*layers)
        if sum(c.memory for c in plan) <= limit
    ]
    return min(plans, default=None)


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force_on_a_hundred_cases(seed: int) -> None:
    generator = random.Random(seed)
    feasible = 0
    for _ in range(100):
        states, depth = generator.randint(1, 3), generator.randint(1, 5)
        layers = [
            [
                LayerOption(
                    generator.randrange(states),
                    generator.choice([generator.random(), 0.5]),
                    generator.choice([generator.random(), generator.randint(1, 3)]),
                )
                for _ in range(generator.randint(1, 5))
            ]
            for _ in range(depth)
        ]
        steps = [[abs(a - b) * generator.random() for b in range(states)] for a in range(states)]
        limit = generator.uniform(0.3, 2.5) * depth
        expected = brute_force(layers, steps, limit)
        best = search(layers, lambda a, b, steps=steps: steps[a][b], limit)
        if expected is None:
            assert best is None
            continue
        feasible += 1
        assert best is not None
        assert best.seconds == pytest.approx(expected, rel=1e-9)
        assert best.memory <= limit * (1 + 1e-8)
        plan = [layers[i][choice] for i, choice in enumerate(best.indices)]
        total = sum(c.seconds for c in plan)
        total += sum(steps[a.state][b.state] for a, b in pairwise(plan))
        assert total == pytest.approx(best.seconds)
    assert feasible > 50


def test_no_layers() -> None:
    best = search([], lambda a, b: 0.0, 1.0)
    assert best is not None
    assert best.indices == ()
