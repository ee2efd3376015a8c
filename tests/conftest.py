"""Order of the suite: what fails quickly comes first."""

from __future__ import annotations

import pytest

#: Folders from the fastest to the slowest; what is in none of them comes between.
_ORDER = ("tests/unit/", "tests/gpu/", "tests/integration/", "tests/integration/e2e/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return max((i for i, folder in enumerate(_ORDER) if f"/{folder}" in f"/{item.nodeid}"), default=1)

    items.sort(key=rank)  # stable: the order within a folder stays
