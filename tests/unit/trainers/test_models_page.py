"""docs/models.md says what the tests check, of every family that is built and no other."""

from __future__ import annotations

from miles.config.families import FAMILIES as BUILT

from .families import _PAGE, CASES, FAMILIES, TRAINED, page_with_table


def test_the_table_is_that_of_the_tests() -> None:
    assert _PAGE.read_text(encoding="utf-8") == page_with_table(), "run `python -m tests.unit.trainers.families`"


def test_every_family_and_every_case_has_a_row() -> None:
    assert sorted(kind for family in FAMILIES for kind in family.kinds) == sorted(BUILT)
    assert sorted(case for family in FAMILIES for case in family.cases) == sorted(CASES)
    assert set(TRAINED) <= set(CASES)
