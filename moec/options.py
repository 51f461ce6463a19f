"""The options of `moec.compile`: each is one field of `CompileOptions`.

From a field follow the keyword of `moec.compile` and its check, the option of the command line, the
key of the cache, what `moec.compile_ranks` and `moec.optimize` take, and its line in docs/api.md.
torch is not imported: `moec compile --help` reads this file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moec.errors import UsageError
from moec.spelling import did_you_mean

if TYPE_CHECKING:
    import torch

    from moec.capture.behaviour.describe import Declared
    from moec.codegen.backend import Backend
    from moec.passes.approximate.choices.model_choices import ModelChoices
    from moec.passes.core.runner import PassResult
    from moec.pipeline import PassChanges
    from moec.target.cpu import CpuTarget

CAPTURES, CHANGES, COMPILES = "captures", "changes", "compiles"
"""The commands that have an option: those that capture a model, those of them that may write a
changed model, or `moec compile` alone."""


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name and type.

    `says` is what it does; `flags` are its names on the command line of the commands `of`, without
    which it exists in Python only. A command reads its value as `kind`: "" (text, or a switch where
    the default is True or False), "target", "format" or "pass" (text that completion offers),
    "list" (it may be repeated), "levels", "dtype", "tolerance" or "path". `fits` checks whether a
    value other than None is of the right kind, and `give` what to give. `ranks` and `optimize` say
    whether `moec.compile_ranks` and `moec.optimize` take it, `artifact` whether artifacts depend on
    it, `reads` whether they depend on files that it names.
    """

    default: Any
    says: str
    flags: str = ""
    of: str = COMPILES
    kind: str = ""
    metavar: str | None = None
    fits: Callable[[Any], bool] | None = None
    give: str = ""
    ranks: bool = False
    optimize: bool = True
    artifact: bool = True
    reads: bool = False


def option(default: Any, says: str, flags: str = "", of: str = COMPILES, **more: Any) -> Any:
    """A dataclass field with an `Option`. A switch without a check of its own is True or False."""
    if isinstance(default, bool):
        more = {"fits": lambda v: isinstance(v, bool), "give": "True or False", **more}
    return field(default=default, metadata={"option": Option(default, says, flags, of, **more)})


@dataclass(frozen=True, kw_only=True, eq=False)
class CompileOptions:
    """The options of `moec.compile`, in the order of `moec compile --help`. Raises UsageError for a
    value of the wrong kind."""

    # fmt: off
    memory: int | str | None = option(
        None, "How much memory to take for a checkpoint, e.g. 6GiB; by default half of what is "
        "free. Weights that do not fit stay in files.", "--memory", metavar="SIZE", artifact=False)
    revision: str | None = option(
        None, "Of a model that is named by its id on the Hugging Face hub, ORG/NAME.", "--revision",
        CAPTURES, metavar="BRANCH|TAG|COMMIT", ranks=True, artifact=False)
    adapters: Sequence[str | Path] = option(
        (), "Merge this LoRA or DoRA adapter of PEFT into the weights; several in order.",
        "--adapter", CAPTURES, kind="list", metavar="DIR", ranks=True, reads=True,
        fits=lambda v: isinstance(v, list | tuple) and all(isinstance(a, str | Path) for a in v),
        give="a list of folders")
    constants: str | Collection[str] = option(
        (), "An input that always has the example's values, such as image_grid_thw.", "--constant",
        CAPTURES, kind="list", metavar="INPUT", ranks=True,
        fits=lambda v: isinstance(v, Collection), give="the names of inputs")
    allow_fixed: bool | str | Collection[str] = option(
        False, "Accept that the model works only at the example's sizes of this input.",
        "--allow-fixed", CAPTURES, kind="list", metavar="INPUT", ranks=True,
        fits=lambda v: isinstance(v, bool | Collection), give="True, or the names of inputs")
    dynamic_shapes: Any = option(
        None, "Sizes that may vary, e.g. input_ids=B[1..8]xS[1..4096]; default: batch and "
        "sequence.", "--shapes", CAPTURES, kind="list", metavar="INPUT=SIZES", ranks=True,
        fits=lambda v: hasattr(v, "__len__") and not isinstance(v, str),
        give="the dynamic_shapes of torch.export: a dict by input, or a tuple")
    dtype: str | torch.dtype | None = option(
        None, "Convert the weights first, e.g. bf16.", "--dtype", CAPTURES, kind="dtype",
        ranks=True)
    opt_level: int = option(
        2, "0: only the passes that code generation needs; 1: fuse MoE blocks too; 2: fuse all "
        "layers. 0 also omits LLVM's optimisation, on CPUs only.", "-O --opt-level", CAPTURES,
        kind="levels", ranks=True)
    passes: PassChanges = option(
        "", "Add (+) or remove (-) passes, with options as in +a(option=1); see moec list passes.",
        "--passes", CAPTURES, metavar="+a,-b", ranks=True)
    quant: str | None = option(
        None, "Quantise experts: int2 to int6, int8, fp8 (each [:32|64|128]) or mxfp4; options "
        ":rows16, ,linears=… and ,head=… are explained above.", "--quant", CHANGES,
        kind="format", metavar="FORMAT", optimize=False)
    calib: Any = option(
        None, "Calibration data for approximate passes and --quant: inputs by name (.npz, "
        ".safetensors), or a text (.txt, read as 16 windows of 256 tokens); NAME=FILE,NAME=FILE "
        "for several domains.", "--calib", CHANGES, metavar="FILE", ranks=True, reads=True)
    budget: str = option(
        "", "The greatest loss of quality that approximate passes may cause; a layer that exceeds "
        "it is left unchanged. METRIC: kl, perplexity, error or changed.", "--budget", CHANGES,
        metavar="METRIC<=N,…", ranks=True, optimize=False)
    strict: bool = option(
        False, "Exit with code 2 if a pass exceeds the budget.", "--strict", CHANGES, ranks=True,
        optimize=False)
    target: str | CpuTarget = option(
        "cpu", "The machine to compile for; see `moec list targets`.", "--target", kind="target")
    verify: bool | float | str = option(
        True, "How the code is compared with eager PyTorch: off, quick (the graph in float32, the "
        "weights bit for bit), full (kernels and texts too; default), or the greatest relative "
        "error allowed. Where weights stay in files, eager runs layer by layer for all inputs "
        "(layers, default) or input by input (whole).", "--verify", kind="tolerance", fits=None)
    stop_after: str | None = option(
        None, "Print the graph after this pass; generate no code.", "--stop-after", kind="pass",
        metavar="PASS", fits=lambda v: isinstance(v, str), give="the name of a pass",
        optimize=False)
    kv_cache: bool = option(
        True, "For a language model: include the code that generates text with a KV cache.",
        "--kv-cache/--no-kv-cache")
    record_routing: bool = option(
        False, "Include the code for `moec run --record-routing FILE.npz`.", "--record-routing")
    embeddings: bool = option(
        False, "Include the code for /v1/embeddings of `moec serve`; it needs no further weights.",
        "--embeddings")
    store: bool | None = option(
        None, "Include the code for `moec run --memory`, which reads experts from the artifact "
        "when they are needed; by default, for models of 1 GiB or more on CPUs.",
        "--store/--no-store", fits=lambda v: isinstance(v, bool), give="True or False")
    choices: str | Path | ModelChoices | None = option(
        None, "Store weights as `moec optimize --write-choices` chose for this model.", "--choices",
        kind="path", metavar="FILE.yaml", optimize=False, reads=True)
    build: bool = option(True, "False stops before code generation.")
    fuel: int | None = option(
        None, "The greatest number of rewrites.", optimize=False,
        fits=lambda v: isinstance(v, int) and v >= 0,
        give="the greatest number of rewrites, 0 or more")
    backend: Backend | None = option(
        None, "Generates the code, in place of the target's.", fits=lambda v: hasattr(v, "ready"),
        give="a moec.codegen.backend.Backend")
    watch: Callable[[PassResult], None] | None = option(
        None, "Called with the result of each pass.", fits=callable,
        give="a function that takes a PassResult")
    progress: Callable[[str], None] | None = option(
        None, "Called with the name of each phase as it starts.", ranks=True, fits=callable,
        give="a function that takes a string")
    descriptions: Sequence[Declared] = option(
        (), "Results of `moec.describe`, of modules that cannot be traced.", ranks=True,
        fits=lambda v: isinstance(v, Sequence) and not isinstance(v, str),
        give="a list of the results of moec.describe")
    # fmt: on

    def __post_init__(self) -> None:
        check_options(vars(self))


def compile_options() -> dict[str, Option]:
    """The options by name."""
    return {each.name: each.metadata["option"] for each in fields(CompileOptions)}


def check_options(values: Mapping[str, Any]) -> None:
    """Raises UsageError, naming the option, for a value (other than None) of the wrong kind."""
    options = compile_options()
    for name, value in values.items():
        fits = options[name].fits
        if value is not None and fits is not None and not fits(value):
            raise UsageError(f"{name} is {value!r}: give {options[name].give}")


def read_options(values: Mapping[str, Any]) -> CompileOptions:
    """Raises TypeError for an option that does not exist, and UsageError as CompileOptions."""
    names = compile_options()
    for name in values:
        if name not in names:
            raise TypeError(f"moec.compile has no option {name}{did_you_mean(name, names)}")
    return CompileOptions(**values)


class CompileKeywords(TypedDict, total=False):
    """The fields of CompileOptions, for editors and type checkers: a test compares the two."""

    revision: str | None
    adapters: Sequence[str | Path]
    constants: str | Collection[str]
    allow_fixed: bool | str | Collection[str]
    dynamic_shapes: Any
    dtype: str | torch.dtype | None
    opt_level: int
    passes: PassChanges
    quant: str | None
    calib: Any
    budget: str
    strict: bool
    target: str | CpuTarget
    verify: bool | float | str
    stop_after: str | None
    kv_cache: bool
    record_routing: bool
    embeddings: bool
    memory: int | str | None
    store: bool | None
    choices: str | Path | ModelChoices | None
    build: bool
    fuel: int | None
    backend: Backend | None
    watch: Callable[[PassResult], None] | None
    progress: Callable[[str], None] | None
    descriptions: Sequence[Declared]
