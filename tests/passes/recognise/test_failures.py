"""A candidate with thousands of readings is declined after some hundred proofs that fail."""

from __future__ import annotations

from typing import Any
from unittest import mock

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op
from moec.passes.proof.prove import Prover
from moec.passes.recognise import experts
from moec.passes.recognise.reading.block import Candidate
from moec.passes.recognise.region import Scope


def test_proofs_that_fail_are_counted() -> None:
    numbers = range(2 * experts.MOST_FAILURES)
    proposals: Any = (mock.Mock(form="loop", doubts=(), output=n) for n in numbers)
    proofs = mock.Mock(side_effect=NoMatch("the numbers differ"))
    candidate = Candidate(Op("aten.cat.default", (), ()), lambda: proposals)
    with mock.patch.object(experts, "check", proofs):
        proved, reason = experts.proved_blocks(Scope(Graph((), (), (), ())), candidate, Prover({}))
    assert (proved, reason) == ([], "loop: the numbers differ")
    assert proofs.call_count == experts.MOST_FAILURES
