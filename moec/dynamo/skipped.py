"""Reports functions that Dynamo skips before it calls any backend.

A loop that finds each expert's tokens with `torch.where` creates sizes that depend on data. Without
a setting that `moec.prepare` enables, Dynamo then gives up on the whole function and runs it as
Python; likewise where features of images are added at `x[mask]`, and where a loop tests whether a
mask is set. No backend is called in these cases, but
Dynamo calls listeners at the end of each attempt, with its error in flight.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import FrameType
from typing import Any

from moec.dynamo.record import RECORDER, Fallback, FallbackWarning
from moec.torch_private import dynamo

_SAID: Mapping[tuple[str, ...], str] = {
    ("capture_dynamic_output_shape_ops",): (
        "the size of a result depends on data, as that of torch.where for the tokens of each "
        "expert, or of x[mask] for features of images: call moec.prepare(model) before the model "
        "runs; in a prepared model, the layers that the function calls are compiled all the same"
    ),
    ("Data-dependent branching", "graph break in loop"): (
        "a loop branches on a mask, as `if mask.any():` does: remove the condition (an expert "
        "without tokens adds nothing), or give an example: moec.prepare(model, x), whose x are "
        "the arguments of a call; a Hugging Face model needs moec.prepare(model)"
    ),
}
"""What to report, by words in Dynamo's reason."""


def watch(backend: object) -> None:
    """Report each function that Dynamo skips for one of these reasons instead of calling `backend`.
    Needed once, and again after a reset of Dynamo, which removes listeners."""
    handler, listener = dynamo.callback_handler, _listener(backend)
    if listener not in handler.end_callbacks:
        handler.register_end_callback(listener)


@cache
def _listener(backend: object) -> Callable[[object], None]:
    def warn_on_fallback(_: object) -> None:
        """Warns even under `strict` or a filter that raises errors: Dynamo never calls its
        listeners again after one has raised."""
        why = _why(sys.exc_info()[1])
        if why is None:
            return
        attempt = next((f for f in _frames() if f.f_code.co_name == "_compile"), None)
        if attempt is None:
            return
        code = attempt.f_locals.get("code")
        if _calls(attempt.f_locals.get("compiler_fn"), backend):
            where = getattr(code, "co_qualname", "a function").removesuffix(".forward")
            reason = f"Dynamo skips the function, so moec gets no graph of it: {why}"
            with warnings.catch_warnings():
                warnings.simplefilter("always", FallbackWarning)
                RECORDER.fall_back([Fallback(where, reason)], strict=False)

    return warn_on_fallback


def _why(error: BaseException | None) -> str | None:
    texts = [str(cause) for cause in _causes(error)]
    for names, reason in _SAID.items():
        if any(all(name in text for name in names) for text in texts):
            return reason
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls(called: Any, backend: object) -> bool:
    """Whether Dynamo would call `backend` for this callable."""
    innermost = dynamo.eval_frame.innermost_backend(called)
    return getattr(innermost, "compiler_fn", innermost) is backend
