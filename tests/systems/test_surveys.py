"""The page of the surveys matches the tests' records, and every test that it names exists."""

from __future__ import annotations

import ast

import pytest

from docs.surveys import PAGE, ROOT, Survey, page, read


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"


@pytest.mark.parametrize("survey", read(), ids=lambda survey: str(survey.number))
def test_each_cell_names_a_test(survey: Survey) -> None:
    tree = ast.parse((ROOT / survey.file).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {cell.test.split("[")[0] for cell in survey.cells} <= names
    assert len({(cell.line, cell.column) for cell in survey.cells}) == len(survey.cells)
