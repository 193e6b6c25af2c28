"""The container image: built from a local base, run as it is shipped, and its rows proven against the exchange's ledger.

Root with Debian's podman, buildah, runc and debootstrap only, and skipped with the reason elsewhere. No registry is asked:
the base is put together of Debian's packages, once, or is what MD_IMAGE_BASE names; the build downloads what
`.ci/image.lock` pins. The lock itself is always checked.
"""

import json
import os
import re
import shutil
import ssl
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdcollector.errors import EXIT_FINDINGS
from mdcollector.supervisor import balance
from tests.fleet import Fleet, until

BASE = os.environ.get("MD_IMAGE_BASE", "")  # conftest.py takes such settings away from the tests
MADE_BASE = "localhost/mdcollector-base:bookworm"
USER = 10001  # of the image
DEBOOTSTRAP_S, BUILD_S, HEALTH_S, STOP_S = 600.0, 600.0, 90.0, 90.0
# Mixed cgroups are more than crun takes, and a machine may refuse to raise limits (docker/README.md).
ENGINE = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
"""


def podman(*arguments: str | Path, tool: str = "podman", within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=within_s)


def health(container: str) -> int:
    """Do the container's health check now; the exit code of its command, -1 when that was not done in time."""
    podman("healthcheck", "run", container)
    state = json.loads(podman("inspect", "--format", "{{json .State.Health}}", container).stdout)
    return int(state["Log"][-1]["ExitCode"])


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
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with Debian and its Python."""
    if os.geteuid() != 0:
        pytest.skip("only root can build an image from a local base")
    if missing := [tool for tool in ("podman", "buildah", "runc", "debootstrap") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    directory = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        if "CONTAINERS_CONF" not in os.environ:
            (directory / "containers.conf").write_text(ENGINE)
            patch.setenv("CONTAINERS_CONF", str(directory / "containers.conf"))
        name = BASE or MADE_BASE
        if podman("image", "exists", name).returncode:
            assert name == MADE_BASE, f"MD_IMAGE_BASE: there is no image {name}"
            root, packed = directory / "root", directory / "root.tar"
            packages = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root]
            made = podman(*packages, tool="debootstrap", within_s=DEBOOTSTRAP_S)
            if made.returncode:
                pytest.skip(f"debootstrap makes no base here: {made.stdout[-500:]}{made.stderr[-500:]}")
            left_out = [f"--exclude=./{name}/*" for name in ("proc", "sys", "dev")]
            podman("-C", root, *left_out, "-cf", packed, ".", tool="tar").check_returncode()
            podman("import", packed, name).check_returncode()
            shutil.rmtree(root)
        yield name


@pytest.fixture(scope="module")
def image(base: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    name = f"localhost/mdcollector:test-{uuid.uuid4().hex[:8]}"
    how = ["--format", "docker", "--isolation", "chroot", "--build-arg", f"BASE={base}", "-t", name]
    if (trusted := ssl.get_default_verify_paths().cafile) is not None:  # whom this machine trusts, the build does too
        inside, pip = "/etc/ssl/certs/ca-certificates.crt", tmp_path_factory.mktemp("pip") / "pip.conf"
        pip.write_text(f"[global]\ncert = {inside}\n")
        how += [f"--volume={trusted}:{inside}:ro", f"--volume={pip}:/etc/pip.conf:ro"]
    built = podman(
        "bud", *how, "-f", repository / "docker" / "Dockerfile", repository, tool="buildah", within_s=BUILD_S
    )
    assert built.returncode == 0, built.stdout + built.stderr
    yield name
    podman("rmi", "--force", name)


@pytest.mark.stress
@pytest.mark.timeout(1500)
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
            done, health = podman("logs", container), podman("inspect", "--format", "{{json .State.Health}}", container)
            return f"{done.stdout}{done.stderr}\n{health.stdout}\n{fleet.brief()}"

        try:
            assert podman("exec", container, "id", "-u").stdout.strip() == str(USER)
            assert podman("exec", container, "touch", "/opt/x").returncode != 0, "its root is read-only"
            until(lambda: fleet.stats().get("state") == "connected", words)
            until(lambda: health(container) == 0, words, HEALTH_S)
            writer = fleet.stats("_writers/parquet")["pid"]
            signalled = f"import os, signal; os.kill({writer}, signal.%s)"
            assert podman("exec", container, "python3", "-c", signalled % "SIGSTOP").returncode == 0
            until(lambda: health(container) == EXIT_FINDINGS, words, HEALTH_S)
            assert podman("exec", container, "python3", "-c", signalled % "SIGCONT").returncode == 0
            until(lambda: health(container) == 0, words, HEALTH_S)
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
