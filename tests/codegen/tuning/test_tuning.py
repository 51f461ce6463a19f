"""Tuning values: no bit depends on them, and neither noise nor a damaged cache selects any."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tvm.tirx import PrimFunc

from moec.cache import TUNINGS, Store, entries, load, save, store_in
from moec.codegen.backends.cpu.tunable import tunable
from moec.codegen.cpu.gemm.grouped import gathered_linear
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.tuning import Tuning, tuning_of
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec, QuantisedSpec
from moec.codegen.tuning import arguments as arguments_module
from moec.codegen.tuning import cache
from moec.codegen.tuning.arguments import arguments, sorted_by_expert
from moec.codegen.tuning.choose import Gain, choose, gain
from moec.codegen.tuning.measure import FEWEST, MOST, TOKENS, Bench, OnThisMachine, Times
from moec.codegen.tuning.tunable import Tunable, Values
from moec.codegen.tuning.tune import tune
from moec.errors import NoMatch
from moec.formats.notation import parse
from moec.target.cpu import TARGETS, host

E, K = 4, 2
HOST = host()


@functools.cache
def kernel_of(dtype: str = "float32", n: int = 96) -> Tunable:
    """Gate and up of a few experts, in a dtype or a format of few bits."""
    few = dtype.startswith("int")
    sizes = {"groups": E, "gated": True}
    v = Vector(HOST)
    spec: LinearSpec
    if few:
        spec = QuantisedSpec(n, 64, "float32", "bfloat16", **sizes, format=parse(dtype))  # type: ignore[arg-type]
    else:
        spec = LinearSpec(n, 64, dtype, **sizes)  # type: ignore[arg-type]

    def make(name: str, values: Values) -> PrimFunc:
        return made(name, tuning_of(values))

    @functools.cache
    def made(name: str, tuning: Tuning) -> PrimFunc:
        def join(g, u):  # type: ignore[no-untyped-def]
            return v.silu(g) * u

        if few:
            return quantised_linear(HOST, spec, K, join, None, name, tuning)
        return gathered_linear(HOST, spec, K, join, None, name, tuning=tuning)

    layout = (QuantisedLayout if few else Layout)(spec, HOST)  # type: ignore[arg-type]
    return tunable(f"{dtype} gathered", spec, (layout,), K, make, layout.tuned)


def taking(seconds: Callable[[Values, int], float], rounds: int = 9) -> Bench:
    """A kernel that takes `seconds(values)` seconds, slightly more in odd rounds."""
    return lambda tunings: {
        tokens: [[seconds(t, tokens) * (1 + r % 2 / 100) for r in range(rounds)] for t in tunings]
        for tokens in TOKENS
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "int4:32"])
def test_no_bit_depends_on_it(build, dtype: str) -> None:  # type: ignore[no-untyped-def]
    """All values at both ends, and enough rows and columns that all of the loops run."""
    kernel = kernel_of(dtype, 65 * 32)
    ends = [{n: end(options) for n, options in kernel.candidates.items()} for end in (min, max)]
    inputs = arguments(kernel, kernel.make("k", {}), 0).draw(150)(0)
    results = []
    for tuning in ({}, *ends):
        *before, y = [torch.from_dlpack(one) for one in inputs]
        y.fill_(float("nan"))
        build(HOST, kernel.make("k", tuning))(*before, y)
        results.append(y.clone().view(torch.int8))
    assert all(torch.equal(y, results[0]) for y in results)


def test_which_values_matter_to_which_kernels() -> None:
    amx, here = TARGETS["amx"], TARGETS["avx512-bf16"]
    assert Layout(LinearSpec(64, 64, "bfloat16"), here).tuned == (
        "fetched",
        "tiles_at_once",
        "worth",
    )
    assert Layout(LinearSpec(64, 64, "bfloat16"), amx).tuned == ("tiles_at_once", "worth")
    assert Layout(LinearSpec(64, 64, "float16"), amx).tuned == ("fetched", "tiles_at_once", "worth")
    codes = QuantisedSpec(64, 64, "float32", format=parse("int8"))
    assert "dots_below" in QuantisedLayout(codes, amx).tuned
    assert "dots_below" not in QuantisedLayout(codes, here).tuned


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"speed": 3}, "there is no value 'speed' to tune"),
        ({"tiles_at_once": 0}, "tiles_at_once is 0, and no kernel is made so"),
        ({"fetched": "4096"}, "fetched is '4096'"),
        ({"worth": -1}, "worth is -1"),
    ],
)
def test_values_that_no_kernel_has(recorded: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tuning_of(recorded)  # type: ignore[arg-type]
    assert tuning_of({"fetched": 0}) == Tuning(fetched=0)


# ---- choosing --------------------------------------------------------------------------


def test_the_fastest_of_several_values_is_chosen() -> None:
    cost = {0: 0.9, 4096: 0.8, 16384: 1.0}
    bench = taking(
        lambda t, _: cost.get(t["fetched"], 1.1) * (0.9 if t["tiles_at_once"] == 1 else 1)
    )
    chosen, choice = choose(kernel_of(n=65 * 32), bench)
    assert chosen == {"fetched": 4096, "tiles_at_once": 1}
    assert choice is not None
    assert choice.mean == pytest.approx(-math.log(0.72))


@pytest.mark.parametrize(
    "seconds",
    [
        lambda t, tokens: 1.0,
        lambda t, tokens: 0.99 if t["fetched"] == 0 else 1.0,  # less than counts
        lambda t, tokens: (
            (0.5 if tokens == 1 else 1.1) if t["fetched"] == 0 else 1.0
        ),  # slower with many
    ],
    ids=["equal", "too little", "slower somewhere"],
)
def test_the_default_stays(seconds: Callable[[Values, int], float]) -> None:
    assert choose(kernel_of(), taking(seconds)) == ({}, None)


def test_noise_alone_chooses_hardly_anything() -> None:
    """The spread is 20 %; what wins among several by luck is measured again."""
    random = torch.Generator().manual_seed(0)

    def bench(tunings: Sequence[Values]) -> Times:
        drawn = torch.randn(len(TOKENS), len(tunings), 9, generator=random).mul(0.2).exp()
        return dict(zip(TOKENS, drawn.tolist(), strict=True))

    chosen = [choose(kernel_of(), bench) for _ in range(30)]
    assert all((not values) == (choice is None) for values, choice in chosen)
    assert sum(choice is not None for _, choice in chosen) <= 1


def test_what_a_second_measurement_does_not_confirm_is_dropped() -> None:
    better, equal = (
        taking(lambda t, _: 0.5 if t["fetched"] != 16384 else 1.0),
        taking(lambda t, _: 1.0),
    )
    candidates = {"fetched": kernel_of().candidates["fetched"]}
    kernel = replace(kernel_of(), candidates=candidates)

    def bench(tunings: Sequence[Values]) -> Times:
        return (equal if len(tunings) == 2 else better)(tunings)

    assert choose(kernel, better)[1] is not None
    assert choose(kernel, bench) == ({}, None)


def test_a_disturbed_round_counts_little() -> None:
    middle, error = gain([1.0, 1.0, 1.0, 50.0, 1.0], [0.5] * 5)
    assert (middle, error) == (pytest.approx(math.log(2)), 0.0)


def test_candidates_that_make_the_same_kernel_are_not_measured() -> None:
    calls: list[Sequence[Values]] = []

    def bench(tunings: Sequence[Values]) -> Times:
        calls.append(tunings)
        return taking(lambda t, _: 1.0)(tunings)

    kernel = kernel_of()
    choose(kernel, bench)  # few tiles: one at once whatever is asked for
    varied = {name for tunings in calls for t in tunings for name in kernel.changed(t)}
    assert varied == {"fetched", "worth"}


# ---- measuring -------------------------------------------------------------------------


def test_a_kernel_is_measured_in_turn() -> None:
    ticks = itertools.count()
    measure = OnThisMachine(
        HOST, 0, clock=lambda: float(next(ticks))
    )  # a second a call: few rounds
    times = measure(kernel_of("bfloat16"))([{}, {"fetched": 0}])
    assert tuple(times) == TOKENS
    assert {len(sample) for per_tuning in times.values() for sample in per_tuning} == {FEWEST}
    quick = OnThisMachine(HOST, 0, clock=lambda: next(ticks) * 1e-9)
    assert len(quick(kernel_of("int4:32"))([{}])[1][0]) == MOST


def test_rows_and_copies_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    order, ends = sorted_by_expert(torch.tensor([[2, 0], [2, 3]]), E)
    assert (order.tolist(), ends.tolist()) == ([1, 0, 2, 3], [1, 1, 3, 4])
    kernel = kernel_of()
    size = kernel.work.bytes * E
    func = kernel.make("k", {})
    call = arguments(kernel, func, 0).draw(1)
    met = {tuple(torch.from_dlpack(call(turn)[2]).tolist()) for turn in range(20)}
    assert len(met) > 1  # on the same row, other experts
    assert all(
        ends[-1] == K and max(ends[0], *(b - a for a, b in itertools.pairwise(ends))) == 1
        for ends in met
    )
    monkeypatch.setattr(arguments_module, "last_cache", lambda: size)
    assert arguments(kernel, func, 100 * size).copies == 4  # behind which the cache has forgotten
    assert arguments(kernel, func, 0).copies == 1  # the whole model fits
    monkeypatch.setattr(arguments_module, "free_memory", lambda: size)
    with pytest.raises(NoMatch, match=r"--tune needs 0.0 GB for weights, and 0.0 GB are free"):
        arguments(kernel, func, 0)


# ---- the cache -------------------------------------------------------------------------


def never(kernel: Tunable) -> Bench:
    raise AssertionError("measured again")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "cache")


def entry_of(store: Store) -> Path:
    (entry,) = entries(store)
    return entry.path


def test_a_second_time_nothing_is_measured(store: Store) -> None:
    kernel, messages = kernel_of(), []

    def measure(kernel: Tunable) -> Bench:
        return taking(lambda t, _: 0.8 if t["fetched"] == 0 else 1.0)

    (first,) = tune([kernel], HOST, measure, store, progress=messages.append)
    (again,) = tune([kernel], HOST, never, store)
    assert (first.values, first.from_cache) == ({"fetched": 0}, False)
    assert again == replace(first, from_cache=True)
    assert messages == ["tune 1/1 float32 gathered, 4x96x64"]
    assert entry_of(store).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["kernel", "target", "threads", "context", "damage", "others"])
def test_what_differs_or_is_damaged_is_measured(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kernel, target, context = kernel_of(), HOST, ""

    def measure(kernel: Tunable) -> Bench:
        return taking(lambda t, _: 0.8 if t["fetched"] == 0 else 1.0)

    tune([kernel], target, measure, store, context)
    entry = entry_of(store)
    if what == "kernel":
        kernel = kernel_of(n=32)
    elif what == "target":
        target = replace(target, l2=target.l2 * 2)
    elif what == "threads":
        monkeypatch.setenv("TVM_NUM_THREADS", "7")
    elif what == "context":
        context = "other"
    elif what == "damage":
        entry.write_bytes(entry.read_bytes()[:-9])
    else:
        entry.chmod(0o666)
    (choice,) = tune([kernel], target, measure, store, context)
    assert (choice.values, choice.from_cache) == ({"fetched": 0}, False)
    (again,) = tune([kernel], target, never, store, context)
    assert again.from_cache


@pytest.mark.parametrize(
    "change",
    [
        {"values": {"fetched": "much"}},
        {"values": {"speed": 3}},
        {"values": []},
        {"gain": {"one": [1]}},
        {"gain": 3},
    ],
)
def test_an_entry_that_does_not_say_what_it_should(store: Store, change: dict[str, object]) -> None:
    kernel = kernel_of()
    cache.save(store, "key", "a kernel", {"fetched": 0}, Gain({1: (0.1, 0.01)}))
    assert cache.load(store, "key", kernel) == ({"fetched": 0}, Gain({1: (0.1, 0.01)}))
    text = json.loads(load(store, TUNINGS, "key") or b"")
    save(store, TUNINGS, {"key": json.dumps(text | change).encode()})
    assert cache.load(store, "key", kernel) is None


def test_a_kernel_that_cannot_be_measured_keeps_the_default(store: Store) -> None:
    def measure(kernel: Tunable) -> Bench:
        raise NoMatch("no memory")

    (choice,) = tune([kernel_of()], HOST, measure, store)
    assert (choice.values, choice.why) == ({}, "no memory")
    assert not list(entries(store))
