"""Every kind of input in `rows.ROWS` has a test that shows what happens to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from record import Record
from rows import ROWS, row

# Kinds that no test can show yet, each with its reason.
NOT_YET: dict[int, str] = {}


def rows_marked(source: str) -> set[int]:
    """The numbers that are given to `row` as they stand in a source."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    given = (argument for call in calls if getattr(call.func, "id", "") == "row" for argument in call.args)
    return {argument.value for argument in given if isinstance(argument, ast.Constant)}


def test_every_kind_of_input_has_a_test() -> None:
    paths = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    marked = set().union(*(rows_marked(path.read_text(encoding="utf-8")) for path in paths))
    assert marked == set(range(1, 67)) - NOT_YET.keys()
    assert ROWS.keys() == set(range(1, 67))
    assert rows_marked("@row(1, 2)\ndef f(): param(marks=row(3)); other(4); row(*five)") == {1, 2, 3}  # the negative control


def test_a_kind_with_one_failed_test_does_not_count_as_gone_well() -> None:
    def report(outcome: str, *numbers: int) -> pytest.TestReport:
        told = [("technique", "R6"), *(("row", number) for number in numbers)]
        return pytest.TestReport("a", ("a", 0, "a"), {}, outcome, None, "call", user_properties=told)  # type: ignore[arg-type]

    record = Record()
    for made in (report("passed", 1, 2), report("passed", 1), report("passed", 3), report("failed", 3, 4)):
        record.take(made)
    found = record.rows["R6"]
    assert (found.cases, found.failed, found.passed_kinds - found.failed_kinds) == (3, 1, {1, 2})


def test_a_kind_that_is_not_in_the_table_cannot_be_marked() -> None:
    with pytest.raises(AssertionError):
        row(67)
