"""The audit of dependencies, part of `make check`: what is installed is what was pinned and tested, and fits together.

Works without a network, so it cannot know of vulnerabilities that were found since: it makes sure that nothing else than
the pinned files can get in. Exit code 1 when a package is not pinned, pinned without hashes, installed in another
version than pinned, or does not get the versions that it requires.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS

LOCK = Path(".ci/requirements.lock")
NOT_PINNED = ("mdcollector", "pip")  # ourselves, and what Python brings along to install the others
_PIN = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$", re.MULTILINE)


def pins(lock: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package of a lock file."""
    return {canonicalize_name(name): (version, hashes.count("--hash=")) for name, version, hashes in _PIN.findall(lock)}


def installed() -> dict[str, importlib.metadata.Distribution]:
    """What this environment holds."""
    found = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    return {name: d for name, d in found.items() if name not in NOT_PINNED}


def findings(lock: str, packages: dict[str, importlib.metadata.Distribution]) -> list[str]:
    """Everything that is not as it should be."""
    pinned, found = pins(lock), list[str]()
    found += [f"{name}: pinned without a hash" for name, (_, hashes) in pinned.items() if not hashes]
    found += [f"{name}: pinned and not installed" for name in pinned if name not in packages]
    for name, package in sorted(packages.items()):
        if name not in pinned:
            found.append(f"{name} {package.version}: installed and not pinned")
        elif package.version != pinned[name][0]:
            found.append(f"{name}: {package.version} is installed, {pinned[name][0]} is pinned")
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            other = packages.get(canonicalize_name(requirement.name))
            if other is None or not requirement.specifier.contains(other.version, prereleases=True):
                found.append(f"{name}: requires {text}, there is {other.version if other is not None else 'none'}")
    return found


def main() -> int:
    packages = installed()
    found = findings(LOCK.read_text(encoding="utf-8"), packages)
    for finding in found:
        print(f"{LOCK}: {finding}")  # noqa: T201
    if not found:
        print(f"dependencies: {len(packages)} packages, all as pinned")  # noqa: T201
    return EXIT_FINDINGS if found else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
