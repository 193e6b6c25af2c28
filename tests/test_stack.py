"""The monitoring stack of `docker/`: files checked by the tools of their makers, and used by the real programs.

Prometheus, Alertmanager, promtool and amtool are Debian's; where they are missing those tests say so and are skipped.
Grafana, Loki and Alloy cannot be had as packages: their files are checked by schema and by what they refer to.
"""

import json
import logging
import re
import shutil
import socket
import subprocess
import sysconfig
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdcollector.logs import JsonLines
from tests.fleet import Fleet, until
from tools.dashboards import TROUBLE, expressions

PROMETHEUS, ALERTMANAGER = shutil.which("prometheus"), shutil.which("prometheus-alertmanager")


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program of this environment (extra `check`), or else of the machine."""
    here = sysconfig.get_path("scripts")
    if (found := shutil.which(program, path=here) or shutil.which(program)) is None:
        pytest.skip(f"{program} is not installed")
    return subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_the_dockerfile_has_no_findings(repository: Path) -> None:
    done = run("hadolint", repository / "docker" / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_compose_file_keeps_its_schema_and_mounts_what_exists(repository: Path) -> None:
    path = repository / "docker" / "compose.yml"
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert done.returncode == 0, done.stdout
    compose = yaml.safe_load(path.read_text())
    secrets = {name: path.parent / secret["file"] for name, secret in compose["secrets"].items()}
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = source in compose["volumes"] if not source.startswith((".", "/")) else True
            assert known, f"{name}: {volume}"
            assert not source.startswith(".") or (path.parent / source).exists(), f"{name}: {volume}"
        assert set(service.get("secrets", ())) <= set(secrets), name
    assert {s.parent.name for s in secrets.values()} == {"secrets"}
    ignored = (path.parent / "secrets" / ".gitignore").read_text().split()
    assert ignored[0] == "*", "no secret is ever committed"


def test_prometheus_and_alertmanager_take_their_files(repository: Path, tmp_path: Path) -> None:
    done = run("promtool", "check", "config", repository / "docker" / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    alertmanager = tmp_path / "alertmanager.yml"
    alertmanager.write_text(without_token_file(repository))
    done = run("amtool", "check-config", alertmanager)
    assert done.returncode == 0, done.stdout + done.stderr


def without_token_file(repository: Path, token: str = "1:x", **more: str) -> str:
    """Our Alertmanager file for the version of Debian, which is too old for `bot_token_file`."""
    text = (repository / "docker" / "alertmanager" / "alertmanager.yml").read_text()
    assert "bot_token_file:" in text
    extra = "".join(f"\n        {key}: {value}" for key, value in more.items())
    return re.sub(r"bot_token_file: \S+", f"bot_token: '{token}'{extra}", text)


def test_grafana_finds_data_source_and_dashboard_where_it_is_told(repository: Path) -> None:
    docker = repository / "docker"
    sources = yaml.safe_load((docker / "grafana/provisioning/datasources/datasources.yml").read_text())["datasources"]
    board = json.loads((docker / "grafana/dashboards/mdcollector.json").read_text())
    uids = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert uids == {source["uid"] for source in sources}
    provider = yaml.safe_load((docker / "grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][0]
    volumes = yaml.safe_load((docker / "compose.yml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in volumes
    titles = [panel["title"] for panel in board["panels"]]
    assert len(titles) == len(set(titles))
    right = [panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in board["panels"]]
    assert max(right) == 24


def test_the_dashboard_keeps_grafanas_schema(repository: Path, tmp_path: Path) -> None:
    schema = repository / "tests" / "grafana-dashboard.schema.json"
    path = repository / "docker" / "grafana" / "dashboards" / "mdcollector.json"
    done = run("check-jsonschema", "--schemafile", schema, path)
    assert done.returncode == 0, done.stdout
    for number, spoil in enumerate(({"refresh": 10}, {"panells": []}, {"panels": [{"type": "stat", "title": 1}]})):
        spoilt = tmp_path / f"{number}.json"
        spoilt.write_text(json.dumps({**json.loads(path.read_text()), **spoil}))
        assert run("check-jsonschema", "--schemafile", schema, spoilt).returncode == 1, f"{spoil} is found"


def test_what_the_dashboard_asks_loki_for_is_what_the_shipper_sends(repository: Path) -> None:
    """The label of its query is one that the shipper makes of a key of our JSON lines, its values are levels of ours."""
    label, values = re.fullmatch(r'\{(\w+)=~"([\w|]+)"\}', TROUBLE).groups()  # type: ignore[union-attr]
    shipper = (repository / "docker" / "alloy" / "config.alloy").read_text()
    keys = dict(re.findall(r'(\w+) = "(\w+)"', re.findall(r"expressions = \{(.*)\}", shipper)[0]))
    labels = re.findall(r'(\w+) = ""', re.findall(r"values = \{(.*)\}", shipper)[0])
    time_source = re.findall(r'source = "(\w+)"', shipper)[0]
    assert label in labels
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "words", (), None)
    line = json.loads(JsonLines().format(record))
    assert {keys[name] for name in (*labels, time_source)} <= line.keys()
    assert line[keys[label]] in values.split("|")
    assert datetime.fromisoformat(line[keys[time_source]]).tzinfo is not None, "RFC 3339"


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[None]:
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


class Telegram(ThreadingHTTPServer):
    """Answers as the Bot API does and keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), _Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Telegram)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/sendMessage"):
            self.server.got.append((self.path, json.loads(body)))
        chat = {"id": -1, "type": "group", "title": "t"}
        answer = {
            "ok": True,
            "result": {"message_id": 1, "date": 1, "chat": chat, "id": 1, "is_bot": True, "first_name": "b"},
        }
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.timeout(240)
@pytest.mark.skipif(
    not (PROMETHEUS and ALERTMANAGER), reason="prometheus and prometheus-alertmanager are not installed"
)
def test_a_killed_connector_reaches_telegram_through_prometheus_and_alertmanager(
    repository: Path, tmp_path: Path
) -> None:
    """And every expression of the dashboard is answered by that Prometheus, most of them with numbers."""
    telegram, ports = Telegram(), {name: free_port() for name in ("prometheus", "alertmanager")}
    with Fleet(tmp_path / "fleet", "binance_spot") as fleet:
        fleet.start()
        fleet.spawn("monitor", "-c", fleet.config, "--listen", "127.0.0.1:0")
        log = fleet.logs[-1]
        port = until(lambda: re.search(r"serving on 127\.0\.0\.1:(\d+)", log.read_text()), fleet.tail)[1]
        docker = repository / "docker"
        shutil.copy(docker / "prometheus" / "mdcollector.rules.yml", tmp_path)
        text = (docker / "prometheus" / "prometheus.yml").read_text()
        text = text.replace("monitor:9464", f"127.0.0.1:{port}").replace(
            "alertmanager:9093", f"127.0.0.1:{ports['alertmanager']}"
        )
        (tmp_path / "prometheus.yml").write_text(text.replace("5s", "1s"))
        api = f"http://127.0.0.1:{telegram.server_address[1]}"
        text = without_token_file(repository, "7:x", api_url=api).replace("group_wait: 10s", "group_wait: 1s")
        (tmp_path / "alertmanager.yml").write_text(text)
        assert PROMETHEUS
        assert ALERTMANAGER
        base = f"http://127.0.0.1:{ports['prometheus']}"
        with serving(
            [ALERTMANAGER, f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/am",
             f"--web.listen-address=127.0.0.1:{ports['alertmanager']}", "--cluster.listen-address="],
            tmp_path / "alertmanager.log",
        ), serving(
            [PROMETHEUS, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
             f"--web.listen-address=127.0.0.1:{ports['prometheus']}"],
            tmp_path / "prometheus.log",
        ):  # fmt: skip
            until(lambda: query(base, "sum(rate(mdcollector_ring_rows_total[1m])) > 0"), "rows in Prometheus", 60)
            answered = {expression: query(base, expression) for expression in expressions()}
            silent = [expression for expression, answer in answered.items() if not answer]
            may_be_empty = ("> 0", "mdcollector_refused_frames_total")
            assert not [e for e in silent if not any(part in e for part in may_be_empty)], silent
            fleet.connector.kill()
            fleet.connector.wait(30)
            path, message = until(
                lambda: telegram.got and telegram.got[0],
                lambda: (tmp_path / "alertmanager.log").read_text()[-2000:],
                90,
            )
        assert path == "/bot7:x/sendMessage"
        assert "conn: the process is dead or hangs" in message["text"]
    telegram.shutdown()
    telegram.server_close()


def query(base: str, expression: str) -> list[Any]:
    url = f"{base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:  # it is still starting
                return []
        raise
    except (urllib.error.URLError, ConnectionError) as error:
        if isinstance(getattr(error, "reason", error), ConnectionError):
            return []
        raise
    assert found["status"] == "success", found
    result: list[Any] = found["data"]["result"]
    return result
