"""The container image: built from a local base, run as it is shipped, and its rows proven against the exchange's ledger.

Root with Debian's podman, buildah, runc and debootstrap only, and skipped with the reason elsewhere. No registry is asked:
the base is put together of Debian's packages, once, or is what MD_IMAGE_BASE names; the build downloads what
`.ci/image.lock` pins. The lock itself is always checked.
"""

import fcntl
import json
import os
import re
import shutil
import ssl
import subprocess
import sysconfig
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdcollector.errors import EXIT_FINDINGS
from mdcollector.stats import read_stats
from mdcollector.supervisor import balance
from tests.fleet import Fleet, until
from tests.test_stack import free_port, query, without_token_file
from tools.proof import prove

BASE = os.environ.get("MD_IMAGE_BASE", "")
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
    with pytest.MonkeyPatch.context() as patch, open(tmp_path_factory.getbasetemp().parent / "base.lock", "w") as lock:
        if "CONTAINERS_CONF" not in os.environ:
            (directory / "containers.conf").write_text(ENGINE)
            patch.setenv("CONTAINERS_CONF", str(directory / "containers.conf"))
        name = BASE or MADE_BASE
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers make one base; the one that waits is held by its test's time-out
        if podman("image", "exists", name).returncode:
            assert name == MADE_BASE, f"MD_IMAGE_BASE: there is no image {name}"
            root, packed = directory / "root", directory / "root.tar"
            packages = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root]
            try:
                made = podman(*packages, tool="debootstrap", within_s=DEBOOTSTRAP_S)
            except subprocess.TimeoutExpired as error:
                pytest.skip(f"no base here: {error}")
            if made.returncode:
                pytest.skip(f"no base here, debootstrap says: {made.stdout[-500:]}{made.stderr[-500:]}")
            left_out = [f"--exclude=./{name}/*" for name in ("proc", "sys", "dev")]
            podman("-C", root, *left_out, "-cf", packed, ".", tool="tar").check_returncode()
            podman("import", packed, name).check_returncode()
            shutil.rmtree(root)
        fcntl.flock(lock, fcntl.LOCK_UN)
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


# The stack

STAND_INS = {  # Debian's programs where the makers' images have theirs, as the images start them
    "prometheus": ("prometheus", ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]),
    "alertmanager": (
        "prometheus-alertmanager",
        [
            "--config.file=/etc/alertmanager/alertmanager.yml",
            "--storage.path=/alertmanager",
            "--cluster.listen-address=",
        ],
    ),
}
EXCHANGE = [
    "binance_spot", "--port", "9100", "--seed", "1", "--rate", "60", "--tickers", "BTCUSDT:1,ETHUSDT:1",
    "--ledger", "/data/ledger",
]  # fmt: skip
FLEET = """\
rings = "/rings"
[connectors.conn]
exchange = "binance_spot"
tickers = ["BTCUSDT", "ETHUSDT"]
ws_url = "ws://127.0.0.1:9100"
rest_url = "http://127.0.0.1:9100"
reconnect_most_s = 0.3
[writers.parquet]
out = "/data"
roll_s = 0.5
[monitor]
csv = "/data/metrics.csv"
"""


@pytest.fixture
def stack(base: str, image: str, repository: Path, tmp_path: Path) -> Iterator["Stack"]:
    """docker/compose.yml as it is, but for a fleet file, secrets, free ports, and images that are here."""
    if missing := [program for program, _ in STAND_INS.values() if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    name = f"md{uuid.uuid4().hex[:8]}"
    docker = tmp_path / "docker"
    shutil.copytree(repository / "docker", docker)
    (docker / "fleet.toml").write_text(FLEET)
    (docker / "alertmanager" / "alertmanager.yml").write_text(without_token_file(repository))
    compose = yaml.safe_load((docker / "compose.yml").read_text())
    for secret in compose["secrets"].values():
        (docker / secret["file"]).write_text("1:x")
    services = compose["services"]
    for service in ("fleet", "monitor"):
        services[service]["image"] = image
        del services[service]["build"]
    del services["fleet"]["ulimits"]  # a machine may refuse to raise them
    assert services["monitor"]["pid"] == "service:fleet"  # which podman-compose does not know
    services["monitor"]["pid"] = f"container:{name}_fleet_1"
    services["exchange"] = {
        "image": image, "entrypoint": ["mdsim"], "command": EXCHANGE, "network_mode": "service:fleet",
        "volumes": ["ledger:/data"], "depends_on": ["fleet"],
    }  # fmt: skip
    compose["volumes"]["ledger"] = {}
    ports = {}
    for service, (program, arguments) in STAND_INS.items():
        directory = tmp_path / service
        directory.mkdir()
        shutil.copy(str(shutil.which(program)), directory / service)
        copied = [f"COPY {service} /bin/{service}"]
        if (templates := Path("/usr/share/prometheus") / service).is_dir():  # where Debian's looks for them
            shutil.copytree(templates, directory / "templates")
            copied.append(f"COPY templates {templates}")
        lines = [f"FROM {base}", *copied, f"RUN install -d -o nobody /{service}", f"WORKDIR /{service}", "USER nobody",
                 f'ENTRYPOINT ["/bin/{service}"]', f"CMD {json.dumps(arguments)}"]  # fmt: skip
        (directory / "Dockerfile").write_text("\n".join(lines) + "\n")
        services[service]["image"] = made = f"localhost/{service}:{name}"
        done = podman("bud", "--isolation", "chroot", "-t", made, directory, tool="buildah", within_s=BUILD_S)
        assert done.returncode == 0, done.stdout + done.stderr
        ports[service] = free_port()
        ((address, _, inside),) = (published.split(":") for published in services[service]["ports"])
        services[service]["ports"] = [f"{address}:{ports[service]}:{inside}"]
    (docker / "compose.yml").write_text(yaml.safe_dump(compose))
    it = Stack(name, docker / "compose.yml", ports)
    try:
        yield it
    finally:
        it.compose("down", "--volumes", "--timeout", "0")
        podman("network", "rm", "--force", f"{name}_default")
        podman("rmi", "--force", *(services[service]["image"] for service in STAND_INS))


class Stack:
    """Services of a compose file under a name of their own."""

    def __init__(self, name: str, file: Path, ports: dict[str, int]) -> None:
        self.name, self.file, self.ports = name, file, ports

    def compose(self, *words: str, within_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        command = ["-f", self.file, "-p", self.name, *words]
        return podman(*command, tool=f"{sysconfig.get_path('scripts')}/podman-compose", within_s=within_s)

    def container(self, service: str) -> str:
        return f"{self.name}_{service}_1"

    def volume(self, name: str) -> Path:
        done = podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.name}_{name}")
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def words(self) -> str:
        said = [podman("ps", "--all").stdout]
        for service in ("fleet", "monitor", "exchange", *STAND_INS):
            done = podman("logs", "--tail", "20", self.container(service))
            said.append(f"{service}: {done.stdout}{done.stderr}")
        return "\n".join(said)

    def stop(self, service: str) -> None:
        done = podman("stop", f"--time={STOP_S:g}", self.container(service), within_s=STOP_S + 30)
        assert done.returncode == 0, done.stderr
        ending = podman("inspect", "--format", "{{.State.ExitCode}}", self.container(service)).stdout.strip()
        assert ending == "0", self.words()


def page_of(url: str) -> str:
    """The text there, nothing as long as nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def ask(prometheus: str, what: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(page_of(f"{prometheus}/api/v1/{what}"))["data"]
    return data


@pytest.mark.stress
@pytest.mark.timeout(1500)
def test_the_compose_file_brings_up_fleet_monitor_prometheus_and_alertmanager(stack: Stack) -> None:
    """They find each other by the names in their files, as the users and on the volumes that they are given."""
    up = stack.compose("up", "--detach", "exchange", "fleet", "monitor", *STAND_INS)
    assert up.returncode == 0, up.stdout + up.stderr
    for service in ("fleet", "monitor"):
        until(lambda service=service: health(stack.container(service)) == 0, stack.words, HEALTH_S)  # type: ignore[misc]
    prometheus = f"http://127.0.0.1:{stack.ports['prometheus']}"
    until(lambda: query(prometheus, 'up{job="mdcollector"} == 1'), stack.words, HEALTH_S)
    for process in ("conn", "parquet"):  # the monitor looks into the fleet's /proc
        until(
            lambda process=process: query(prometheus, f'mdcollector_process_resident_bytes{{process="{process}"}} > 0'),  # type: ignore[misc]
            stack.words,
            HEALTH_S,
        )
    (alertmanager,) = ask(prometheus, "alertmanagers")["activeAlertmanagers"]
    assert alertmanager["url"].startswith("http://alertmanager:9093/")
    (group,) = ask(prometheus, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}, group
    received = f"http://127.0.0.1:{stack.ports['alertmanager']}/metrics"
    until(lambda: "alertmanager_config_last_reload_successful 1" in page_of(received), stack.words, HEALTH_S)

    rings, page = stack.volume("rings"), stack.volume("rings") / "conn" / "stats"
    until(lambda: read_stats(page)["trades_unproven"] == 0 and not read_stats(page)["fetches_waiting"], stack.words)
    stack.stop("exchange")
    until(lambda: read_stats(page)["counters"].get("disconnected", 0) > 0, stack.words)
    stack.stop("fleet")
    assert "every row that went in was written" in podman("logs", stack.container("fleet")).stdout
    ledger, feeds = stack.volume("ledger") / "ledger", ("trades", "orderbook_l2", "bbo")
    proof = prove(ledger, stack.volume("data"), rings, "binance_spot", feeds=feeds, to_the_end=True)
    assert proof.ok, str(proof)
    assert proof.feeds["trades"].equal > 0
    assert (stack.volume("data") / "metrics.csv").exists()
