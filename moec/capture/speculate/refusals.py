"""Messages for modules that cannot be captured: at most six lines, with the user's line."""

from __future__ import annotations

import math
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from moec.capture.speculate.proof import Verdict
from moec.capture.speculate.trace import Assumed
from moec.capture.user_code.sites import Site, foreign
from moec.errors import CaptureError

_REMEDY = "  compute both sides and choose with torch.where, or keep the numbers in tensors"


class Untraceable(CaptureError):
    """The trace failed, or assumed nothing. The error that led to it is the better reason."""


def differs(name: str, assumed: Assumed, verdict: Verdict) -> CaptureError:
    """The error where eager and the program differ because an assumption does not hold."""
    lines = [f"{name} cannot be captured: its result depends on what it reads from its data"]
    shown = [_branch(site, assumed) for site in assumed.branches]
    shown += [f"  {noise} draws random numbers, taken to change nothing" for noise in assumed.noise]
    shown += [f"  {read} reads data into Python" for read in assumed.reads]
    lines += shown[:2]
    differ = f"eager differs by {verdict.error:.1e} at inputs {verdict.inputs}"
    if math.isinf(verdict.error):
        differ = (
            f"the graph fails at inputs {verdict.inputs}, or has other shapes, where the module "
            "runs: a maximum of no rows fails, for one"
        )
    lines.append(f"  {differ}")
    return (CaptureError if shown else Untraceable)("\n".join([*lines, _REMEDY]))


def unproved(name: str, assumed: Assumed, verdict: Verdict) -> str:
    """The message where no run shows what a branch does when it goes the other way."""
    lines = [
        f"{name} cannot be captured: a branch depends on data, and was seen to go one way only"
    ]
    lines += [_branch(site, assumed) for site in verdict.unproved[:2]]
    lines.append(f"  in {verdict.compared} runs of eager it never went the other way")
    lines.append("  leave the branch out, or compute both sides and choose with torch.where")
    return "\n".join(lines)


def assumptions(assumed: Assumed, verdict: Verdict) -> tuple[str, ...]:
    """Notes for the report about proved assumptions."""
    branches = [f"{site} `{site.text}` as {answer}" for site, answer in assumed.branches.items()]
    lines = [
        f"branches on data were taken one way, and equal eager's both ways in {verdict.compared} "
        f"runs: {'; '.join(branches[:3])}{f' and {len(branches) - 3} more' * (len(branches) > 3)}"
    ][: len(branches)]
    noise = list(assumed.noise)[:3]
    lines += [f"random numbers that change nothing were left out: {'; '.join(noise)}"][: len(noise)]
    return tuple(lines)


def _branch(site: Site, assumed: Assumed) -> str:
    return f"  {site}: `{site.text}` was taken to be {assumed.branches[site]}"


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Converts any error of tracing to a CaptureError with the user's line."""
    try:
        yield
    except CaptureError as error:
        if "\n" in str(error) or ".py:" in str(error):
            raise
        raise CaptureError(_failed(name, error, error.__traceback__)) from error
    except Exception as error:
        raise Untraceable(_failed(name, error, error.__traceback__)) from error


def _failed(name: str, error: Exception, trace: TracebackType | None) -> str:
    site = _last_of_user(trace)
    violated = violated_dim(name, str(error))
    if violated is not None and os.environ.get("MOEC_DEBUG") != "1":
        return violated
    lines = [f"{name} cannot be exported: {type(error).__name__}"]
    data = "data-dependent" in str(error) or "data_dependent" in type(error).__name__
    if isinstance(error, CaptureError):
        lines = [f"{name} cannot be captured"]
    if site is not None:
        lines.append(f"  {site}: `{site.text}`")
    advice = "a number that data decide is read there: keep it in a tensor, choose experts with "
    advice += "torch.where(ids == expert) and values with torch.where, or make the input that "
    advice += "holds it constant: constants=INPUT (--constant INPUT), such as the grid of an image"
    lines.append(f"  {advice if data else _reason(error)}")
    if os.environ.get("MOEC_DEBUG") == "1":
        lines.append(str(error))
    return "\n".join(lines)


def _reason(error: Exception) -> str:
    """The first sentence of torch's message, in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    if isinstance(error, TypeError) and "unhashable type" in text and "Sym" in text:
        return (
            "a size that varies is a key of a dict, a set or a cache: compute the value of the "
            "entry from the size instead"
        )
    return text if len(text) <= 240 else f"{text[:237]}..."


def _is_python(frame: FrameType) -> bool:
    """Whether code is the standard library's; installed packages are below the same folder."""
    file = frame.f_code.co_filename
    return file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file


def _last_of_user(trace: TracebackType | None) -> Site | None:
    """The user's innermost frame in an error's traceback, as a site."""
    others = foreign(("torch", "numpy", "sympy", "moec.capture", "moec.ir.interpret"))
    frame: FrameType | None = None
    last = 0
    while trace is not None:
        if not others.holds(trace.tb_frame) and not _is_python(trace.tb_frame):
            frame, last = trace.tb_frame, trace.tb_lasti
        trace = trace.tb_next
    return None if frame is None else Site(frame.f_code, last)


_GUARDED = re.compile(
    r"Not all values of (?P<name>\w+) = (?P<size>L\[.+?\]\.size\(\)\[\d+\]) in the specified range "
    r"(?:<=? \d+ )?satisf\w+ the generated guard (?P<guard>.+?)\.?$",
    re.MULTILINE,
)
_CONSTANT = re.compile(
    r"You marked (?P<name>\w+) as dynamic but your code specialized it to be a constant "
    r"\((?P<size>\d+)\)"
)
_OUTSIDE = re.compile(r"^(?P<size>\d+) not in range \[(?P<low>\d+), (?P<high>\w+)\]")


def violated_dim(name: str, text: str) -> str | None:
    """The refusal of a module whose export violates a Dim that the user gave; None for another
    message of torch."""
    outside = _OUTSIDE.match(text)
    if outside:
        low, high = outside["low"], outside["high"]
        return (
            f"{name}: the example has a size of {outside['size']}, and dynamic_shapes allows "
            f"{low} to {high}; give an example within the range, or a Dim that contains it"
        )
    constant = _CONSTANT.search(text)
    if constant:
        dim, size = constant["name"], constant["size"]
        return (
            f"{name}: dynamic_shapes lets {dim} vary, and the module fixes it at {size}; leave "
            f"{dim} out of dynamic_shapes, or compute what fixes it of symbolic sizes"
        )
    guards = dict.fromkeys(
        (match["name"], match["guard"].replace(match["size"], match["name"]))
        for match in _GUARDED.finditer(text)
    )
    if not guards:
        return None
    (dim, condition), *_ = guards
    return (
        f"{name}: dynamic_shapes gives {dim} sizes at which the graph of the example fails, "
        f"because the module requires {condition}; give {dim} limits within which that is so, such "
        f'as Dim("{dim}", min=2) or 2 * Dim("{dim}"), or Dim.AUTO, with which moec finds the sizes'
    )
