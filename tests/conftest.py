from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from pool import Pool

# Examples take as long as the ranks need, and all examples of a test share the pool.
settings.register_profile(
    "tp_embed",
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tp_embed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files. First come those that start programs on several hosts, then others that start
    programs, since they wait most of their time; then those with most tests, so that workers end
    at about the same time."""
    counts = Counter(item.path for item in items)

    def order(item: pytest.Item) -> tuple[bool, bool, int]:
        module = item.getparent(pytest.Module)
        names = vars(module.obj).values() if module else ()
        uses = {getattr(value, "__module__", None) for value in names}
        return "hosts" not in uses, not uses & {"hosts", "launch", "forks"}, -counts[item.path]

    items.sort(key=order)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restores environment variables that a program sets in a test, such as its rank."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_configure() -> None:
    torch.set_num_threads(1)
