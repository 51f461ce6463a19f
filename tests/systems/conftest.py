"""The records of the systems, compared with their golden files."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.surveys import Survey
from docs.systems import RECORDS, Record
from tests.systems.records import Keep
from tests.systems.surveys import KeepSurvey


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """Compare a record with the system's golden file, or write that (`--update-golden`)."""

    def check(record: Record) -> None:
        path: Path = RECORDS / f"{record.source.number:02}.json"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(record.text(), encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing: run with --update-golden, then `make pages`"
        assert record.text() == path.read_text(encoding="utf-8"), "see --update-golden"

    return check


@pytest.fixture
def keep_survey(request: pytest.FixtureRequest) -> KeepSurvey:
    """As `keep`, for the matrix of a survey."""

    def check(survey: Survey) -> None:
        if request.config.getoption("--update-golden"):
            survey.record.parent.mkdir(parents=True, exist_ok=True)
            survey.record.write_text(survey.text(), encoding="utf-8")
            return
        assert survey.text() == survey.record.read_text(encoding="utf-8"), "see --update-golden"

    return check
