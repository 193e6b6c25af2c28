"""The container image: built from a local base, run as it is shipped, and its rows proven against the exchange's ledger.

Only where MD_IMAGE_BASE names a base with Python 3.11 or newer (docker/README.md says how to make one): it takes a minute
and downloads what `.ci/image.lock` pins. The lock itself is always checked.
"""

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdcollector.supervisor import balance
from tests.fleet import Fleet, until

BASE = os.environ.get("MD_IMAGE_BASE", "")
USER = 10001  # of the image
BUILD_S, STOP_S = 400.0, 90.0


def podman(*arguments: str | Path, tool: str = "podman", within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=within_s)


def test_the_image_takes_the_versions_that_are_tested(repository: Path) -> None:
    pins = {}
    for name in ("requirements", "image"):
        text = (repository / ".ci" / f"{name}.lock").read_text()
        blocks = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$", text, re.MULTILINE)
        assert len(blocks) == len(re.findall("==", text)), name
        assert all(hashes for _, _, hashes in blocks), name
        pins[name] = {package: version for package, version, _ in blocks}
    both = pins["image"].keys() & pins["requirements"].keys()
    assert {"aiohttp", "pyarrow", "setuptools"} <= both
    assert {package: pins["image"][package] for package in both} == {p: pins["requirements"][p] for p in both}


@pytest.fixture(scope="module")
def image(repository: Path) -> Iterator[str]:
    if not BASE:
        pytest.skip("MD_IMAGE_BASE names no base image to build from (docker/README.md)")
    if missing := [tool for tool in ("buildah", "podman") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    name = f"localhost/mdcollector:test-{uuid.uuid4().hex[:8]}"
    how = ["--format", "docker", "--isolation", "chroot", "--build-arg", f"BASE={BASE}", "-t", name]
    built = podman(
        "bud", *how, "-f", repository / "docker" / "Dockerfile", repository, tool="buildah", within_s=BUILD_S
    )
    assert built.returncode == 0, built.stdout + built.stderr
    yield name
    podman("rmi", "--force", name)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_the_image_records_and_is_healthy_and_loses_nothing(image: str, tmp_path: Path) -> None:
    """Root of the container read-only, no capability, its own user; `podman stop` drains."""
    container = f"mdcollector-{uuid.uuid4().hex[:8]}"
    with Fleet(tmp_path, "binance_spot") as fleet:
        fleet.config.write_text(fleet.config.read_text().replace(str(tmp_path), ""))  # /rings and /data are the image's
        for directory in (fleet.rings, fleet.data):
            directory.mkdir()
            os.chown(directory, USER, USER)
        locked = ["--read-only", "--cap-drop=all", "--security-opt", "no-new-privileges", "--network=host"]
        mounts = [
            f"-v={fleet.rings}:/rings",
            f"-v={fleet.data}:/data",
            f"-v={fleet.config}:/etc/mdcollector/fleet.toml:ro",
        ]
        started = podman("run", "--detach", f"--name={container}", *locked, *mounts, image)
        assert started.returncode == 0, started.stderr

        def words() -> str:
            done = podman("logs", container)
            return f"{done.stdout}{done.stderr}\n{fleet.brief()}"

        try:
            assert podman("exec", container, "id", "-u").stdout.strip() == str(USER)
            assert podman("exec", container, "touch", "/opt/x").returncode != 0, "its root is read-only"
            until(lambda: fleet.stats().get("state") == "connected", words)
            until(lambda: podman("healthcheck", "run", container).returncode == 0, words)
            writer = fleet.stats("_writers/parquet")["pid"]
            signalled = f"import os, signal; os.kill({writer}, signal.%s)"
            assert podman("exec", container, "python3", "-c", signalled % "SIGSTOP").returncode == 0
            until(lambda: podman("healthcheck", "run", container).returncode == 1, words)
            assert podman("exec", container, "python3", "-c", signalled % "SIGCONT").returncode == 0
            until(lambda: podman("healthcheck", "run", container).returncode == 0, words)
            fleet.wait_more("trades", 20)
            until(lambda: fleet.stats()["trades_unproven"] == 0, words)
            fleet.settle()
            ended = fleet.counter("disconnected")
            fleet.sim.stop()
            until(lambda: fleet.counter("disconnected") > ended, words)
            stopped = podman("stop", f"--time={STOP_S:g}", container, within_s=STOP_S + 30)
            assert stopped.returncode == 0, stopped.stderr
            ending = podman("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip()
            assert ending == "0", words()
        finally:
            podman("rm", "--force", "--time=0", container)
        assert not [row for row in balance(fleet.rings, ["parquet"]) if row.missing or row.lapped or row.damaged]
        proof = fleet.prove(to_the_end=True)
        assert proof.ok, str(proof)
