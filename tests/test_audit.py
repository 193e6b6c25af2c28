"""The audit of dependencies finds what is not as pinned."""

from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tools import audit

HASH = " \\\n    --hash=sha256:" + "0" * 64
LOCK = f"one==1.0{HASH}{HASH}\nTwo_b==2.0{HASH}\n"


class Package(Distribution):
    """An installed package as its metadata says."""

    def __init__(self, name: str, version: str, *requires: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        self._text += "".join(f"Requires-Dist: {text}\n" for text in requires)

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        ([Package("one", "1.0", "two-b>=2"), Package("two-b", "2.0", "six; extra == 'x'")], []),
        ([Package("one", "1.0")], ["two-b: pinned and not installed"]),
        ([Package("one", "1.1"), Package("two-b", "2.0")], ["one: 1.1 is installed, 1.0 is pinned"]),
        (
            [Package("one", "1.0"), Package("two-b", "2.0"), Package("three", "3")],
            ["three 3: installed and not pinned"],
        ),
        (
            [Package("one", "1.0", "two-b>2"), Package("two-b", "2.0", "four")],
            ["one: requires two-b>2, there is 2.0", "two-b: requires four, there is none"],
        ),
    ],
)
def test_what_is_not_as_pinned_is_found(packages: list[Package], found: list[str]) -> None:
    assert audit.findings(LOCK, {p.metadata["Name"]: p for p in packages}) == found


def test_a_pin_without_a_hash_is_found() -> None:
    packages = {"one": Package("one", "1.0"), "two-b": Package("two-b", "2.0")}
    assert audit.findings(LOCK.replace(HASH, "", 2), packages) == ["one: pinned without a hash"]


def test_this_environment_is_as_pinned(repository: Path) -> None:
    lock = (repository / audit.LOCK).read_text()
    assert len(audit.pins(lock)) == lock.count("==")
    assert audit.findings(lock, audit.installed()) == []
