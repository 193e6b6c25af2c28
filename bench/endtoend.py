"""End to end over loopback: a sender process, the real connector in another one, the rows that appear in its rings.

The connector is `mdcollector connect` with its addresses pointed at the sender and pinned to a core; the sender has the
next one. CPU is the kernel's count of the connector's only thread, kernel work for the socket included.
"""

import re
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import frames
from bench.machine import cores, cpu_ns, slowness_around
from bench.micro import ring_directory
from bench.processes import Child, child, module, until
from mdcollector.errors import RingError
from mdcollector.records import Flag
from mdcollector.ring import RingReader
from mdcollector.stats import read_stats
from mdcollector.tables import Rows

FEED_OF = {"trade": "trades", "aggtrade": "trades", "bookticker": "bbo", "depth": "orderbook_l2"}
CAPACITY = 1 << 20
START_S, RUN_S = 120.0, 120.0  # a slow machine encodes three million frames before it says that it is ready

STREAMS_FLEET = """
rings = "{rings}"
[connectors.bench]
exchange = "binance_spot"
tickers = ["S*USDT"]
feeds = ["trades", "orderbook_l2", "bbo", "tickers"]
book_depth = 100
ws_url = "ws://127.0.0.1:{port}"
rest_url = "http://127.0.0.1:{port}"
cpu = {cpu}
"""
FLEET = """
rings = "{rings}"
[connectors.bench]
exchange = "binance_spot"
tickers = ["BTCUSDT"]
feeds = ["{feed}"]
ws_url = "{ws}://127.0.0.1:{port}"
rest_url = "{http}://127.0.0.1:{port}"
cpu = {cpu}
ca_file = "{ca}"
capacity = {{ {feed} = {capacity} }}
"""


@contextmanager
def certificates(directory: Path) -> Iterator[dict[str, str]]:
    """An authority and a certificate for 127.0.0.1, as files."""
    import trustme  # the test extra; needed for runs over TLS only

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    ssl.create_default_context(cafile=directory / "ca.pem")  # fails here rather than in a child
    yield {name: str(directory / f"{name}.pem") for name in ("ca", "key", "cert")}


@contextmanager
def sending(kind: str, count: int, rate: float = 0.0, tls: dict[str, str] | None = None) -> Iterator[tuple[Child, int]]:
    """A sender and its port."""
    extra = ["--tls-cert", tls["cert"], "--tls-key", tls["key"]] if tls else []
    with child(*module("bench.sender", kind, count, "--rate", rate, *extra)) as sender:
        yield sender, int(sender.line(START_S)["port"])


@contextmanager
def collecting(
    rings: Path, kind: str, port: int, tls: dict[str, str] | None = None
) -> Iterator[tuple[Child, RingReader]]:
    """The connector, with its stream live, and a reader of its ring."""
    feed, fleet = FEED_OF[kind], rings / "fleet.toml"
    secure = "s" if tls else ""
    fleet.write_text(
        FLEET.format(
            rings=rings, feed=feed, ws=f"ws{secure}", http=f"http{secure}", port=port, cpu=cores()[0],
            ca=tls["ca"] if tls else "", capacity=CAPACITY,
        )
    )  # fmt: skip
    with child(
        sys.executable, "-m", "mdcollector.cli", "--log-level", "error", "connect", "bench", "-c", str(fleet)
    ) as connector:
        readers: list[RingReader] = []

        def has_rows() -> bool:
            if connector.process.poll() is not None:
                raise AssertionError(f"the connector ended with {connector.process.returncode}")
            try:
                readers[:] = [RingReader(rings / "bench", feed)]
            except RingError:
                return False
            return readers[0].published > 0

        until(has_rows, START_S, f"first row of {feed}")
        yield connector, readers[0]


def messages(kind: str, rows: Rows) -> Rows:
    """The last row of each exchange message."""
    return rows[rows["flags"] & int(Flag.LAST) != 0] if kind == "depth" else rows


def run(kind: str, count: int, rate: float = 0.0, tls: dict[str, str] | None = None) -> dict[str, Any]:
    """One run: throughput, CPU of a message, and how long a packet took to become visible rows."""
    with ring_directory() as rings, sending(kind, count, rate, tls) as (sender, port):
        with collecting(rings, kind, port, tls) as (connector, reader):
            settle(reader)
            with slowness_around(0) as slowness:
                first, cpu_before = reader.published, cpu_ns(connector.pid)
                began = time.time_ns() // 1000
                rows_of_message = 40 if kind == "depth" else 1
                wanted = first + (count - 1) * rows_of_message
                sender.say("go")
                until(lambda: reader.published >= wanted, RUN_S, f"{wanted} rows of {kind}")
                cpu = cpu_ns(connector.pid) - cpu_before
            sender.line(RUN_S)
            if reader.published != wanted:
                raise AssertionError(f"{reader.published} rows of {kind}, expected {wanted}")
            memory = resident_beside_rings(connector.pid)
            reader.seek(max(first, reader.oldest))
            rows = np.concatenate([messages(kind, part) for part in _all_rows(reader)])
        seconds = (int(rows["rcv_timestamp"][-1]) - max(began, int(rows["rcv_timestamp"][0]))) / 1e6
        sizes = np.diff(np.flatnonzero(np.diff(rows["packet_id"], prepend=-1, append=-1)))
        visible = rows["publish_ns"]
        return {
            "kind": kind, "mode": f"{rate:,.0f} msg/s" if rate else "burst", "tls": bool(tls), "messages": count - 1,
            "messages_per_s": (count - 1) / max(seconds, 1e-9), "cpu_ns": cpu / (count - 1),
            "messages_per_packet": float(sizes.mean()), "rss_beside_rings_mb": memory / 1e6,
            "slowness": slowness[0],
            "visible_ns": percentiles(visible), "visible_first_of_packet_ns": percentiles(_firsts(rows)),
        }  # fmt: skip


def streams(rate: float, seconds: float) -> dict[str, Any]:
    """One connector with 400 streams at a steady rate: its share of a core once all books are live."""
    count = int(rate * seconds * 2)
    with ring_directory() as rings, sending("streams", count, rate) as (sender, port):
        fleet = rings / "fleet.toml"
        fleet.write_text(STREAMS_FLEET.format(rings=rings, port=port, cpu=cores()[0]))
        with child(
            sys.executable, "-m", "mdcollector.cli", "--log-level", "error", "connect", "bench", "-c", str(fleet)
        ) as connector:
            until(lambda: _page(rings)["state"] == "connected", START_S, "a connection")
            until(lambda: all(s["acknowledged_ns"] for s in _page(rings)["streams"].values()), START_S, "all streams")
            sender.say("go")
            tickers = len(frames.STREAM_TICKERS)
            until(lambda: _page(rings)["books"] == tickers and not _page(rings)["books_invalid"], RUN_S, "all books")
            with slowness_around(0) as slowness:
                cpu, frames_before, began = cpu_ns(connector.pid), _page(rings)["packets"], time.monotonic()
                time.sleep(seconds / 2)  # what is measured is this stretch of time
                cpu, took = cpu_ns(connector.pid) - cpu, time.monotonic() - began
                page = _page(rings)
        gaps = {name: n for name, n in page["counters"].items() if name.startswith(("gap", "refused")) and n}
        if gaps or page["state"] != "connected":
            raise AssertionError(f"the run was disturbed: {page['state']}, {gaps}")
    return {
        "streams": len(page["streams"]), "messages_per_s": rate, "core_share": cpu / 1e9 / took,
        "cpu_ns_per_message": cpu / (rate * took), "slowness": slowness[0], "packets_per_s": (page["packets"] - frames_before) / took,
        "visible_ns": {name: page["publish_ns"][name] for name in ("p50", "p99")},
    }  # fmt: skip


def _page(rings: Path) -> dict[str, Any]:
    try:
        return read_stats(rings / "bench" / "stats")
    except RingError:
        return {"state": "", "streams": {"": {"acknowledged_ns": 0}}, "books": 0, "packets": 0}


def settle(reader: RingReader) -> None:
    """Until no more rows come: the snapshot of a book and the first frame are through."""
    seen, quiet_since = -1, time.monotonic()

    def quiet() -> bool:
        nonlocal seen, quiet_since
        if reader.published != seen:
            seen, quiet_since = reader.published, time.monotonic()
        return time.monotonic() - quiet_since > 0.5

    until(quiet, START_S, "a quiet ring")


def _all_rows(reader: RingReader) -> Iterator[Rows]:
    while len(rows := reader.read()):
        yield rows


def _firsts(rows: Rows) -> Any:
    """publish_ns of the first message of each packet: nothing waited before it."""
    return rows["publish_ns"][np.diff(rows["packet_id"], prepend=-1) != 0]


def percentiles(values: Any) -> dict[str, float]:
    """The ones that people ask for."""
    return {name: float(np.percentile(values, share)) for name, share in (("p50", 50), ("p99", 99), ("p99.9", 99.9))}


_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def resident_beside_rings(pid: int) -> int:
    """Resident bytes of a process without the mapped files of its rings."""
    total, of_ring = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := _MAPPING.match(line):
            of_ring = found[1].endswith((".data", ".meta"))
        elif line.startswith("Rss:") and not of_ring:
            total += int(line.split()[1]) * 1024
    return total
