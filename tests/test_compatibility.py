"""What works with `nn.Embedding` and `nn.Linear` gives the same with ours, or is refused."""

from __future__ import annotations

import pytest

from compatibility import KINDS, SIZES
from compatibility_page import CASES, ELSEWHERE, PAGE, find_outcomes, page
from launch import ROOT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_comes_to_the_same_or_is_refused(pool, case):
    for size in SIZES:
        for kind in KINDS:
            found = find_outcomes(pool, case, kind, size)
            assert "FAILED" not in found, f"{kind} at P = {size}: {found}"


def test_page_says_what_was_found(pool):
    assert PAGE.read_text() == page(pool), "Run `python tests/support/compatibility_page.py`."


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.test)
def test_tests_of_other_rows_exist(row):
    file, _, name = row.test.partition("::")
    assert f"def {name}(" in next((ROOT / "tests").rglob(file)).read_text()
