"""Fixtures that more than one room of the tests uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public CT that FOURDVQ_REAL_DATA names; without it tests skip, and fail where CI is set."""
    named = os.environ.get("FOURDVQ_REAL_DATA", "")
    folder = Path(named)
    if named and (folder / "SOURCES.md").is_file():
        return folder
    reason = f"FOURDVQ_REAL_DATA is {named!r}: set it to the folder that holds SOURCES.md"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: small networks are faster so, and sums do not depend on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
