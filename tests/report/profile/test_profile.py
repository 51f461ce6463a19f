"""The profile of a small trained model: times, names, work, and what is left behind."""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.commands.execution.profile import command
from moec.errors import InputError, UsageError
from moec.model.rebuild import rebuild
from moec.report.profile.data import KernelLine, PhaseProfile
from moec.report.profile.profile import ModelProfile, layer_of
from moec.runtime.artifact.artifact import read
from moec.runtime.call.executor import Executor
from moec.runtime.device.library import tvm_ffi
from moec.runtime.device.timed import Spans, open_timed
from moec.runtime.text.texts import Texts

LAYERS, EXPERTS, TOP_K, WIDTH, HIDDEN = 4, 8, 2, 128, 256
BF16 = 2  # bytes


@pytest.fixture(scope="module")
def tiny(compiled_tiny_moe: moec.CompiledModel) -> moec.CompiledModel:
    return compiled_tiny_moe


@pytest.fixture(scope="module")
def profile(tiny: moec.CompiledModel) -> ModelProfile:
    return tiny.profile(prompt_tokens=16, new_tokens=3, rounds=3)


def of_kind(phase: PhaseProfile, kernel: str) -> list[KernelLine]:
    return [line for line in phase.kernels if line.kernel == kernel]


def total(lines: tuple[KernelLine, ...]) -> float:
    return sum(line.time.seconds for line in lines)


def test_parts_add_up_to_the_call(profile: ModelProfile) -> None:
    """Each is a mean over the same repetitions, so only floating point rounds."""
    assert [phase.name for phase in profile.phases] == ["prefill", "decode"]
    assert [phase.repetitions for phase in profile.phases] == [3, 9]
    for phase in profile.phases:
        rest = phase.between.seconds + phase.outside.seconds
        for parts in (phase.kernels, phase.kinds, phase.layers):
            assert total(parts) + rest == pytest.approx(phase.call.seconds, rel=1e-9)
        assert min(line.time.seconds for line in phase.kernels) > 0
        assert min(phase.between.seconds, phase.outside.seconds) > 0


def slowed(kernel: str, seconds: float, each: Callable[[int], bool]) -> Callable[..., Any]:
    """`Spans.wrap` for kernels of which one sleeps before some of its calls."""
    wrap, calls = Spans.wrap, iter(range(1 << 30))

    def with_sleep(spans: Spans, name: str, function: Any, wrapper: int) -> Any:
        def sleeping(*arguments: Any) -> Any:
            if each(next(calls)):
                time.sleep(seconds)
            return function(*arguments)

        slow = tvm_ffi().convert(sleeping) if name.startswith(kernel) else function
        return wrap(spans, name, slow, wrapper)

    return with_sleep


def test_a_slow_kernel_is_found_by_name(
    tiny: moec.CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention sleeps 0.1 s in layer 2, by which the whole call is longer than without the clock.
    A busy machine delays some calls by tens of milliseconds; a clock that missed the kernel would
    differ by the whole sleep."""
    monkeypatch.setattr(Spans, "wrap", slowed("attention", 0.1, lambda n: n % LAYERS == 2))
    for phase in tiny.profile(prompt_tokens=16, new_tokens=3, rounds=3).phases:
        slowest = max(phase.kernels, key=lambda line: line.time.seconds)
        assert (slowest.kernel, slowest.layer) == ("attention", "model.layers.2")
        assert slowest.module == "model.layers.2.self_attn"
        assert slowest.line.startswith("modeling_qwen3_moe.py:")
        assert slowest.ops == ("nn.attention",)
        assert max(phase.kinds, key=lambda line: line.time.seconds).kernel == "attention"
        assert max(phase.layers, key=lambda line: line.time.seconds).kernel == "model.layers.2"
        slept = phase.call.seconds - phase.plain.seconds
        assert slowest.time.seconds >= 0.1
        assert slept == pytest.approx(slowest.time.seconds, abs=0.05)


def test_the_work_of_one_token(profile: ModelProfile) -> None:
    """A step of one text reads two experts of eight; all counted by hand."""
    decode = profile.phases[1]
    both, down = of_kind(decode, "gathered_silu_mul"), of_kind(decode, "grouped")
    assert len(both) == len(down) == LAYERS
    each = WIDTH * HIDDEN  # elements of a matrix
    for line in both:
        assert line.flops == 2 * TOP_K * 2 * each
        choices = TOP_K * 4 + EXPERTS * 4  # order and ends, i32
        rows = (WIDTH + TOP_K * HIDDEN) * BF16
        assert line.bytes == TOP_K * 2 * each * BF16 + rows + choices
        assert not line.at_most
    for line in down:
        assert line.flops == 2 * TOP_K * each
    (head,) = (line for line in decode.kernels if line.module == "lm_head")
    assert head.flops == 2 * WIDTH * 1024
    assert head.bytes == (WIDTH * 1024 + WIDTH + 1024) * BF16
    limits = profile.data.limits
    assert head.least == max(head.flops / limits.peak, head.bytes / limits.bandwidth)


def test_experts_are_counted_by_what_tokens_choose(tiny: moec.CompiledModel) -> None:
    """Two texts with the same token choose the same two experts: as many bytes of weights as one,
    and twice the rows."""
    one, two = (
        of_kind(tiny.profile(prompt="a", new_tokens=1, rounds=1, batch=n).phases[1], "grouped")
        for n in (1, 2)
    )
    weights = TOP_K * WIDTH * HIDDEN * BF16
    for a, b in zip(one, two, strict=True):
        assert a.flops is not None
        assert a.bytes is not None
        assert b.bytes is not None
        assert b.flops == 2 * a.flops
        assert b.bytes - weights < 2 * (a.bytes - weights)


def test_work_that_is_not_known_is_empty(profile: ModelProfile) -> None:
    """An embedding reads some rows of its table: which, no shape tells."""
    for phase in profile.phases:
        (embedding,) = of_kind(phase, "fused_embedding")
        assert (embedding.flops, embedding.bytes, embedding.least) == (None, None, None)
        assert embedding.module == "model.embed_tokens"


def test_other_executors_call_kernels_directly(tiny: moec.CompiledModel) -> None:
    """Of a model that is profiled, the calls of another executor leave no span, and TVM's global
    functions are those of before."""
    package = tiny.package
    assert package is not None
    names = set(tvm_ffi().registry.list_global_func_names())
    functions, spans = open_timed(package.library, package.functions)
    assert set(tvm_ffi().registry.list_global_func_names()) - names <= {"moec.timed"}
    plain, timed = Executor(package), Executor(package, functions)
    logits = [Texts(executor, 1, 4).feed([[5, 6]]) for executor in (plain, timed)]
    np.testing.assert_array_equal(*logits)
    assert len(spans.take()) > LAYERS
    Texts(plain, 1, 4).feed([[5, 6]])
    Texts(tiny.executor, 1, 4).feed([[5, 6]])
    assert not len(spans.take())


def test_a_call_with_inputs(tiny: moec.CompiledModel) -> None:
    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    (phase,) = tiny.profile(inputs={"input_ids": ids}, rounds=2).phases
    assert (phase.name, phase.function, phase.repetitions) == ("call", "main", 2)
    assert [line.flops for line in of_kind(phase, "grouped")] == [
        2 * 12 * TOP_K * WIDTH * HIDDEN
    ] * LAYERS
    with pytest.raises(InputError, match="input_ids"):
        tiny.profile(inputs={"input_ids": ids.astype(np.float32)})


def test_a_profile_in_a_notebook(profile: ModelProfile) -> None:
    assert profile._repr_html_() == f"<pre>{html.escape(str(profile))}</pre>"


def test_layers() -> None:
    assert layer_of("model.layers.12.mlp.experts.3") == "model.layers.12"
    assert layer_of("0.expert") == "0"
    assert layer_of("lm_head") == "lm_head"


@pytest.fixture(scope="module")
def saved(tiny: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.moec"
    tiny.save(path)
    return path


def test_the_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(saved), "--prompt", "def f(x):", "--new-tokens", "2", "--rounds", "1"]
    command.main([*words, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    kernels = report["phases"][1]["kernels"]
    assert {line["layer"] for line in kernels} >= {f"model.layers.{n}" for n in range(LAYERS)}
    command.main([*words, "-q"], standalone_mode=False)
    text = capsys.readouterr().out
    for part in ("decode: ", "between kernels", "gathered_silu_mul", "model.layers.3"):
        assert part in text


def test_what_cannot_be_profiled(saved: Path, tiny: moec.CompiledModel) -> None:
    with pytest.raises(UsageError, match="--input and --prompt cannot be combined"):
        command.main([str(saved), "-i", "x.npz", "--prompt", "a"], standalone_mode=False)
    with pytest.raises(UsageError, match=r"1020 \+ 32 tokens are requested, and the model takes"):
        tiny.profile(prompt_tokens=1020)
    with pytest.raises(UsageError, match="the prompt encodes to no tokens"):
        tiny.profile("")
    with pytest.raises(UsageError, match="rounds is 0: it must be at least 1"):
        tiny.profile(rounds=0)


def test_new_code_of_an_artifact_has_the_same_calls(saved: Path, tiny: moec.CompiledModel) -> None:
    """Also their lines, which graphs do not hold."""
    assert tiny.package is not None
    assert rebuild(read(saved, native=False)).calls == tiny.package.calls


def test_the_trace_nests(profile: ModelProfile) -> None:
    """By the rules of Chrome's format: complete events with numbers, of which those of one thread
    contain one another or are apart. Kernels are in the library's function, which is in the
    call."""
    trace = json.loads(json.dumps(profile.trace()))
    names, slices = trace["traceEvents"][:2], trace["traceEvents"][2:]
    assert {event["ph"] for event in names} == {"M"}
    assert {event["ph"] for event in slices} == {"X"}
    assert all(event["ts"] >= 0 <= event["dur"] for event in slices)
    assert {(event["pid"], event["tid"]) for event in (*names, *slices)} == {(1, 1)}
    ends: list[float] = []
    depths: dict[str, set[int]] = {}
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1]
        depths.setdefault(event["cat"], set()).add(len(ends))
        ends.append(event["ts"] + event["dur"])
    assert depths.pop("call") == {0}
    assert depths.pop("function") == {1}
    assert set().union(*depths.values()) == {2}
    calls = [event["name"] for event in slices if event["cat"] == "call"]
    assert calls == ["prefill", *["decode"] * 3]  # of the last round
    attention = [event for event in slices if event["name"] == "attention"]
    assert len(attention) == LAYERS * 4
    assert attention[1]["args"]["module"] == "model.layers.1.self_attn"


def test_perfettos_trace_processor_reads_the_trace(profile: ModelProfile, tmp_path: Path) -> None:
    """Its Python package would download the processor: it has to be installed."""
    reader = pytest.importorskip("perfetto.trace_processor", reason="no perfetto is installed")
    binary = shutil.which("trace_processor_shell")
    if binary is None:
        pytest.skip("no trace_processor_shell, of Perfetto's releases, is on the PATH")
    path = tmp_path / "t.json"
    path.write_text(json.dumps(profile.trace(), allow_nan=False))
    config = reader.TraceProcessorConfig(bin_path=binary)
    with reader.TraceProcessor(trace=str(path), config=config) as processor:
        lost = processor.query(
            "select name from stats where severity in ('error', 'data_loss') and value > 0"
        )
        assert [row.name for row in lost] == []
        (row,) = processor.query(
            "select count(*) as n, max(depth) as deepest, sum(dur) as dur from slice"
        )
    slices = [event for event in profile.trace()["traceEvents"] if event["ph"] == "X"]
    assert (row.n, row.deepest) == (len(slices), 2)
    assert row.dur == pytest.approx(sum(1e3 * event["dur"] for event in slices))


def test_the_roofline(profile: ModelProfile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profile.plot(tmp_path / "r.svg")
    assert "<svg" in (tmp_path / "r.svg").read_text()
