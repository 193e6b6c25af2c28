"""Fixtures that all tests share."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdcollector.config import ALLOW_ROOT

os.environ[ALLOW_ROOT] = "1"  # CI may be root on a machine of its own


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and directories of whoever runs the tests must not leak into them."""
    for name in list(os.environ):
        if name.startswith("MDCOLLECTOR_") and name != ALLOW_ROOT:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _no_semaphores_left() -> Iterator[None]:
    """Connectors that a test killed leave the semaphores of their rings behind, as they would anywhere."""
    began = time.time()
    yield
    for path in Path("/dev/shm").glob("sem.mdring-*"):
        try:
            if path.stat().st_mtime >= began:
                path.unlink()
        except FileNotFoundError:  # its ring was closed meanwhile
            continue
