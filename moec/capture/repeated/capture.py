"""Captures a model with the first layers of each kind, and repeats their graphs for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.captured import Captured
from moec.capture.repeated.alike import layer_lists, shortened
from moec.capture.repeated.unroll import NotRepeated, unrolled
from moec.capture.request import CaptureRequest
from moec.capture.state.reach import values_kept
from moec.errors import CaptureError
from moec.oracle.agree import agree
from moec.oracle.draws import DRAWS

_log = logging.getLogger(__name__)


def capture_repeated(request: CaptureRequest, capture: Callable[[], Captured]) -> Captured | None:
    """The capture that `capture` makes of the first layers, continued to all of them and compared
    with the whole model; None where layers have to be traced one by one.

    What `capture` proves about sizes and inputs holds for layers that are alike: it is not proved
    again.
    """
    module = request.call.module
    with PROCESS_STATE, values_kept(module):
        try:
            lists = layer_lists(request.call)
        except Exception as error:  # whatever the module raises: its capture says so
            _log.info("alike layers are traced one by one: %s", type(error).__name__)
            return None
        if not lists:
            return None
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights = {name: tensor.detach() for name, tensor in held.items()}  # results keep none
        try:
            with shortened(lists):
                captured = capture()
            program = captured.program
            for layers in lists:
                program = unrolled(program, layers, weights)
        except (CaptureError, NotRepeated) as reason:
            _log.info("alike layers are traced one by one: %s", reason)
            return None
        if not agree(program, captured.eager, captured.example, DRAWS[:1]):
            _log.info("alike layers are traced one by one: repeated, they compute something else")
            return None
    for each in lists:
        _log.info("%d of the %d layers of %s were traced", each.traced, len(each.kinds), each.path)
    return replace(captured, program=program)
