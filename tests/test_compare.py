"""mdcompare against rings that are right, and against rings with one thing wrong; real processes and sockets."""

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zstandard

from mdcollector.records import FEEDS, Exchange, Flag
from mdcollector.ring import RingReader, RingWriter
from mdcollector.stats import StatsWriter
from tests.fleet import Fleet, until
from tools.compare import Comparison, Rings, Settings, WrongUse
from tools.live import USER_AGENT
from tools.venues import load_venue

DEADLINE_S = 60.0
DATA = Path(os.environ.get("MD_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
RECORDING = DATA / "binance_spot" / "recorded" / "btcusdt_20240808.jsonl.zst"
DERIBIT_RECORDING = DATA / "deribit" / "recorded" / "options_20210405.jsonl.zst"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="recorded traffic is not here (MD_DATA)")
FRAMES = 2000
LAST, SNAPSHOT, RESYNCED = int(Flag.LAST), int(Flag.SNAPSHOT), int(Flag.RESYNCED)
REPAIRED, TIME_LOCAL = int(Flag.REPAIRED), int(Flag.TIME_LOCAL)

Row = dict[str, Any]


def lines_of(path: Path, count: int) -> list[dict[str, Any]]:
    raw = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    return [json.loads(line) for line in raw.splitlines()[:count]]


def rows_of(frames: list[str], now_us: int = 1_800_000_000_000_000) -> dict[str, list[Row]]:
    """What a correct connector writes for these Binance frames, computed with plain json."""
    rows: dict[str, list[Row]] = {"trades": [], "orderbook_l2": [], "bbo": []}
    for raw in frames:
        frame = json.loads(raw)
        data, kind = frame["data"], frame["stream"].split("@")[1]
        common = {"ticker": data["s"], "flags": LAST, "rcv_timestamp": now_us, "timestamp": now_us}
        if kind == "trade":
            numbers = {"price": float(data["p"]), "qty": float(data["q"]), "trade_seq": data["t"]}
            rows["trades"].append({**common, "timestamp": data["T"] * 1000, "side": -1 if data["m"] else 1, **numbers})
        elif kind == "depth":
            levels = [(1, *level) for level in data["b"]] + [(-1, *level) for level in data["a"]]
            for number, (side, price, qty) in enumerate(levels, 1):
                flags = LAST if number == len(levels) else 0
                own = {"side": side, "action": 2, "price": float(price), "qty": float(qty), "update_id": data["u"]}
                rows["orderbook_l2"].append({**common, "timestamp": data["E"] * 1000, **own, "flags": flags})
        elif kind == "bookTicker":
            names = {"b": "bid_price", "B": "bid_qty", "a": "ask_price", "A": "ask_qty"}
            values = {name: float(data[key]) for key, name in names.items()}
            rows["bbo"].append({**common, **values, "update_id": data["u"], "flags": LAST | TIME_LOCAL})
    return rows


def writer(directory: Path, feed: str, exchange: Exchange = Exchange.BINANCE_SPOT) -> RingWriter:
    return RingWriter(
        directory, FEEDS[feed], exchange=exchange.name, connector=directory.name, capacity=1 << 16, semaphore=False
    )


def append(ring: RingWriter, rows: list[Row], exchange: Exchange = Exchange.BINANCE_SPOT) -> None:
    for row in rows:
        filled = {
            "packet_id": 1,
            "parse_ns": 1000,
            "publish_ns": 2000,
            "exchange": int(exchange),
            "trade_id": b"",
            **row,
        }
        filled["ticker"] = ring.code(row["ticker"])
        ring.append([filled[column.name] for column in ring.feed.columns if column.name != "seq_id"])


def write_rings(directory: Path, rows: dict[str, list[Row]], exchange: Exchange = Exchange.BINANCE_SPOT) -> None:
    for feed, some in rows.items():
        ring = writer(directory, feed, exchange)
        append(ring, some, exchange)
        ring.close()


def gap(feed: str, first: int, last: int, ticker: str = "BTCUSDT", cause: bytes = b"sequence") -> Row:
    head = {"timestamp": 1, "rcv_timestamp": 1, "ticker": ticker, "flags": LAST, "repaired": 0}
    return {
        **head,
        "feed": feed.encode(),
        "first_id": first,
        "last_id": last,
        "from_time": -1,
        "to_time": 1,
        "cause": cause,
    }


def mdcompare(*args: object) -> list[str]:
    return [sys.executable, "-m", "tools.compare", *map(str, args)]


@contextmanager
def started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def serving(*args: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with started([sys.executable, "-m", "tools.replay", "serve", *map(str, args)]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield process, json.loads(line)["ws_url"]


class Result:
    """Exit code, summary and CSV files of one run."""

    def __init__(self, code: int, stdout: str, stderr: str, out: Path) -> None:
        assert stdout, stderr
        self.code = code
        self.summary = json.loads(stdout)
        with (out / "summary.csv").open() as file:
            self.rows = list(csv.DictReader(file))
        with (out / "differences.csv").open() as file:
            self.differences = list(csv.DictReader(file))

    def kinds(self) -> list[tuple[str, str, bool]]:
        return [(d["feed"], d["kind"], bool(d["explained_by"])) for d in self.differences]

    def total(self, key: str) -> int:
        return sum(int(row[key]) for row in self.rows)


def compare_with_recording(
    tmp_path: Path, entries: list[dict[str, Any]], rings: Path, *args: object, exchange: str = "binance_spot"
) -> Result:
    """Run beside a replay of these entries, from its first frame to its last."""
    path, out = tmp_path / "small.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with serving(path, "--speed", "max", "--exit") as (server, ws_url):
        command = mdcompare(
            exchange, *args, "--rings", rings, "--out", out, "--ws-url", ws_url, "--seek", "oldest", "--json"
        )
        with started(command) as process:
            server.communicate(timeout=DEADLINE_S)  # it ends when the comparator has received everything
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
    return Result(process.returncode, stdout, stderr, out)


def middle(rows: list[Row]) -> int:
    return len(rows) // 2


def message_at(rows: list[Row], index: int) -> slice:
    """The rows of the book message that row `index` belongs to."""
    at = [n for n, row in enumerate(rows) if row["update_id"] == rows[index]["update_id"]]
    return slice(at[0], at[-1] + 1)


# one thing wrong


def nothing(rows: dict[str, list[Row]]) -> None:
    """The rings are right."""


def missing_trade(rows: dict[str, list[Row]]) -> None:
    del rows["trades"][middle(rows["trades"])]


def missing_book_message(rows: dict[str, list[Row]]) -> None:
    del rows["orderbook_l2"][message_at(rows["orderbook_l2"], middle(rows["orderbook_l2"]))]


def missing_quote(rows: dict[str, list[Row]]) -> None:
    del rows["bbo"][middle(rows["bbo"])]


def missing_level(rows: dict[str, list[Row]]) -> None:
    book = rows["orderbook_l2"]
    del book[next(n for n in range(middle(book), len(book)) if not book[n]["flags"] & LAST)]


def changed_price(rows: dict[str, list[Row]]) -> None:
    rows["trades"][middle(rows["trades"])]["price"] += 0.01


def changed_side(rows: dict[str, list[Row]]) -> None:
    rows["trades"][middle(rows["trades"])]["side"] *= -1


def changed_level(rows: dict[str, list[Row]]) -> None:
    rows["orderbook_l2"][middle(rows["orderbook_l2"])]["qty"] += 1


def changed_quote(rows: dict[str, list[Row]]) -> None:
    rows["bbo"][middle(rows["bbo"])]["ask_price"] = float("nan")


def duplicate_trade(rows: dict[str, list[Row]]) -> None:
    at = middle(rows["trades"])
    rows["trades"].insert(at + 3, dict(rows["trades"][at]))


def duplicate_quote(rows: dict[str, list[Row]]) -> None:
    at = middle(rows["bbo"])
    rows["bbo"].insert(at, dict(rows["bbo"][at]))


def extra_book_message(rows: dict[str, list[Row]]) -> None:
    book = rows["orderbook_l2"]
    at = message_at(book, middle(book)).stop
    ids = sorted({row["update_id"] for row in book})
    free = next(n for n in range(book[at]["update_id"] - 1, ids[0], -1) if n not in ids)
    book.insert(at, {**book[at], "update_id": free, "flags": LAST})


def extra_quote(rows: dict[str, list[Row]]) -> None:
    bbo = rows["bbo"]
    ids = {row["update_id"] for row in bbo}
    at = next(n for n in range(middle(bbo), len(bbo)) if bbo[n]["update_id"] + 1 not in ids)
    bbo.insert(at + 1, {**bbo[at], "update_id": bbo[at]["update_id"] + 1})


def missing_trade_in_ledger(rows: dict[str, list[Row]]) -> None:
    gone = rows["trades"].pop(middle(rows["trades"]))
    rows["gaps"] = [gap("trades", gone["trade_seq"] - 1, gone["trade_seq"])]


def ledger_of_another_symbol(rows: dict[str, list[Row]]) -> None:
    gone = rows["trades"].pop(middle(rows["trades"]))
    rows["gaps"] = [gap("trades", gone["trade_seq"], gone["trade_seq"], "ETHUSDT")]


def ledger_of_another_feed(rows: dict[str, list[Row]]) -> None:
    gone = rows["trades"].pop(middle(rows["trades"]))
    rows["gaps"] = [gap("orderbook_l2", gone["trade_seq"], gone["trade_seq"])]


def repaired_late(rows: dict[str, list[Row]]) -> None:
    late = rows["trades"].pop(middle(rows["trades"]))
    rows["trades"].append({**late, "flags": LAST | REPAIRED})


def repaired_with_another_price(rows: dict[str, list[Row]]) -> None:
    late = rows["trades"].pop(middle(rows["trades"]))
    rows["trades"].append({**late, "flags": LAST | REPAIRED, "price": late["price"] + 1})


def replaced_by_snapshot(flags: int) -> Callable[[dict[str, list[Row]]], None]:
    def replace(rows: dict[str, list[Row]]) -> None:
        book = rows["orderbook_l2"]
        at = message_at(book, middle(book))
        book[at] = [{**book[at.start], "qty": float(n), "flags": flags | (LAST if n == 3 else 0)} for n in range(1, 4)]

    return replace


def edges(rows: dict[str, list[Row]]) -> None:
    for feed in ("trades", "bbo"):
        rows[feed] = rows[feed][5:-5]


@needs_data
@pytest.mark.parametrize(
    ("spoil", "findings", "explained"),
    [
        (nothing, [], []),
        (edges, [], []),
        (missing_trade, [("trades", "missing")], []),
        (missing_book_message, [("orderbook_l2", "missing")], []),
        (missing_quote, [("bbo", "missing")], []),
        (missing_level, [("orderbook_l2", "different")], []),
        (changed_price, [("trades", "different")], []),
        (changed_side, [("trades", "different")], []),
        (changed_level, [("orderbook_l2", "different")], []),
        (changed_quote, [("bbo", "different")], []),
        (duplicate_trade, [("trades", "duplicate")], []),
        (duplicate_quote, [("bbo", "duplicate")], []),
        (extra_book_message, [("orderbook_l2", "extra")], []),
        (extra_quote, [("bbo", "extra")], []),
        (missing_trade_in_ledger, [], [("trades", "missing")]),
        (ledger_of_another_symbol, [("trades", "missing")], []),
        (ledger_of_another_feed, [("trades", "missing")], []),
        (repaired_late, [], []),
        (repaired_with_another_price, [], [("trades", "different")]),
        (replaced_by_snapshot(SNAPSHOT | RESYNCED), [], [("orderbook_l2", "missing")]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(
    tmp_path: Path,
    spoil: Callable[[dict[str, list[Row]]], None],
    findings: list[tuple[str, str]],
    explained: list[tuple[str, str]],
) -> None:
    entries = lines_of(RECORDING, FRAMES)
    rows = rows_of([entry["raw"] for entry in entries if entry["dir"] == "in"])
    whole = sum(len(rows[feed]) for feed in ("trades", "bbo"))
    spoil(rows)
    write_rings(tmp_path / "rings" / "spot", rows)
    result = compare_with_recording(tmp_path, entries, tmp_path / "rings")
    told = [(feed, kind) for feed, kind, is_explained in result.kinds() if not is_explained]
    told_explained = [(feed, kind) for feed, kind, is_explained in result.kinds() if is_explained]
    assert told == findings
    assert told_explained == explained
    assert result.code == (1 if findings else 0)
    assert result.summary["verdict"] == ("differences" if findings else "identical")
    assert result.summary["findings"] == len(findings)
    assert result.summary["explained"] == len(explained)
    assert result.summary["compared"] > whole - 25
    assert result.total("own") > whole
    if spoil is edges:
        assert result.total("edge_own") == 20
    if spoil is changed_price:
        (line,) = result.differences
        wrong = rows["trades"][middle(rows["trades"])]
        assert (line["id"], line["ticker"]) == (str(wrong["trade_seq"]), "BTCUSDT")
        assert str(wrong["price"]) in line["ring"]
        assert str(wrong["price"]) not in line["own"]


@needs_data
def test_what_the_own_connection_missed_is_not_held_against_the_ring(tmp_path: Path) -> None:
    entries = lines_of(RECORDING, FRAMES)
    rows = rows_of([entry["raw"] for entry in entries if entry["dir"] == "in"])
    write_rings(tmp_path / "rings" / "spot", rows)
    lost = {"trade": 40, "depth": 10}
    for kind, which in lost.items():
        at = [n for n, entry in enumerate(entries) if f"@{kind}" in entry["raw"][:40]]
        del entries[at[which]]
    result = compare_with_recording(tmp_path, entries, tmp_path / "rings")
    assert result.code == 0
    assert sorted(result.kinds()) == [("orderbook_l2", "extra", True), ("trades", "extra", True)]


@needs_data
def test_a_ring_that_stops_is_not_an_edge(tmp_path: Path) -> None:
    entries = [{**entry, "t": 10**18 + n * 2_000_000} for n, entry in enumerate(lines_of(RECORDING, 1500))]
    rows = rows_of([entry["raw"] for entry in entries if entry["dir"] == "in"])
    write_rings(tmp_path / "rings" / "spot", {"bbo": rows["bbo"][: middle(rows["bbo"])]})
    path, out = tmp_path / "small.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with serving(path, "--speed", 1, "--exit") as (server, ws_url):
        command = mdcompare("binance_spot", "--rings", tmp_path / "rings", "--out", out, "--ws-url", ws_url)
        with started([*command, "--seek", "oldest", "--edge", "0.2", "--json"]) as process:
            server.communicate(timeout=DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
    result = Result(process.returncode, stdout, stderr, out)
    assert result.code == 1
    assert result.summary["feeds"]["bbo"]["missing"] > 100
    assert result.summary["feeds"]["bbo"]["different"] == 0


@needs_data
def test_deribit_is_matched_by_its_own_ids(tmp_path: Path) -> None:
    entries = lines_of(DERIBIT_RECORDING, 1000)
    entries = [{**e, "raw": e.get("raw", "").replace(".raw", ".100ms")} for e in entries]  # what the public may have
    trades = [
        {
            "instrument_name": "ETH-9APR21-1950-C",
            "trade_seq": n,
            "trade_id": f"ETH-{n}",
            "timestamp": n,
            "price": 0.1 * n,
        }
        | {"amount": 2.0, "direction": "buy" if n % 2 else "sell"}
        for n in range(1, 30)
    ]
    for trade in trades:
        params = {"channel": "trades.ETH-9APR21-1950-C.100ms", "data": [trade]}
        raw = json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": params})
        entries.append({"t": entries[-1]["t"], "conn": "ws1", "dir": "in", "raw": raw})
    common = {"rcv_timestamp": 1, "flags": LAST}
    book: list[Row] = []
    names = set()
    for entry in entries:
        if '"book.' not in entry["raw"][:80] or entry["dir"] != "in":
            continue
        data = json.loads(entry["raw"])["params"]["data"]
        levels = [(1, *level) for level in data["bids"]] + [(-1, *level) for level in data["asks"]]
        if levels:  # an empty book has no rows and so is not in the ring's table
            names.add(data["instrument_name"])
        snapshot = SNAPSHOT if data["type"] == "snapshot" else 0
        for number, (side, what, price, qty) in enumerate(levels, 1):
            own = {"side": side, "action": 1, "price": price, "qty": 0.0 if what == "delete" else qty}
            flags = snapshot | (LAST if number == len(levels) else 0)
            ids = {
                "ticker": data["instrument_name"],
                "update_id": data["change_id"],
                "timestamp": data["timestamp"] * 1000,
            }
            book.append({**common, **ids, **own, "flags": flags})
    rows = {
        "orderbook_l2": book,
        "trades": [
            {**common, "ticker": t["instrument_name"], "timestamp": t["timestamp"] * 1000, "price": t["price"]}
            | {"qty": 2.0, "side": 1 if t["direction"] == "buy" else -1, "trade_seq": t["trade_seq"]}
            | {"trade_id": t["trade_id"].encode()}
            for t in trades
        ],
    }
    write_rings(tmp_path / "rings" / "d", rows, Exchange.DERIBIT)
    result = compare_with_recording(tmp_path, entries, tmp_path / "rings", exchange="deribit")
    assert result.code == 0, result.differences
    assert result.summary["not_compared"] == ["bbo"]
    assert result.summary["feeds"]["trades"]["identical"] == 29
    assert result.summary["feeds"]["orderbook_l2"]["identical"] == 177  # all changes of the recording
    assert {row["ticker"] for row in result.rows} == names

    spoiled = [dict(row) for row in book]
    changes = [row for row in spoiled if not row["flags"] & SNAPSHOT]
    changes[len(changes) // 2]["price"] += 1
    write_rings(tmp_path / "spoiled" / "d", {**rows, "orderbook_l2": spoiled}, Exchange.DERIBIT)
    result = compare_with_recording(tmp_path, entries, tmp_path / "spoiled", exchange="deribit")
    assert result.code == 1
    assert result.kinds() == [("orderbook_l2", "different", False)]


@needs_data
def test_filters_and_tickers_narrow_the_comparison(tmp_path: Path) -> None:
    entries = lines_of(RECORDING, FRAMES)
    for n, entry in enumerate(list(entries)):
        if entry["dir"] == "in" and n % 2:
            eth = entry["raw"].replace("BTCUSDT", "ETHUSDT").replace("btcusdt", "ethusdt")
            entries.append({**entry, "raw": eth})
    rows = rows_of([entry["raw"] for entry in entries if entry["dir"] == "in"])
    rows["trades"] = [
        row for n, row in enumerate(rows["trades"]) if row["ticker"] == "ETHUSDT" or n != 20
    ]  # BTCUSDT is wrong
    write_rings(tmp_path / "rings" / "spot", rows)
    filters = tmp_path / "filters.json"
    filters.write_text('{"symbols": ["eth*"], "exchanges": ["BINANCE_SPOT"]}')
    result = compare_with_recording(tmp_path, entries, tmp_path / "rings", "--filters", filters)
    assert result.code == 0
    assert {row["ticker"] for row in result.rows} == {"ETHUSDT"}
    result = compare_with_recording(tmp_path, entries, tmp_path / "rings", "BTCUSDT", "--feeds", "trades")
    assert result.code == 1
    assert [(row["feed"], row["ticker"]) for row in result.rows] == [("trades", "BTCUSDT")]


@needs_data
def test_it_waits_for_rings_that_do_not_exist_yet(tmp_path: Path) -> None:
    entries = lines_of(RECORDING, FRAMES)
    rows = rows_of([entry["raw"] for entry in entries if entry["dir"] == "in"])
    path, out, rings = tmp_path / "small.jsonl", tmp_path / "out", tmp_path / "rings"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with serving(path, "--speed", "max", "--exit") as (server, ws_url):
        command = mdcompare("binance_spot", "--rings", rings, "--out", out, "--ws-url", ws_url, "--connector", "late")
        command += ["--feeds", "trades,bbo", "--seek", "oldest", "--json"]
        with started(command) as process:
            with pytest.raises(subprocess.TimeoutExpired):  # it is up and waits
                process.wait(1.5)
            write_rings(rings / "late", rows)
            server.communicate(timeout=DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert Result(process.returncode, stdout, stderr, out).code == 0


def test_a_ring_that_fills_as_fast_as_it_is_read_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of([json.dumps({"stream": "btcusdt@trade", "data": trade_data(n)}) for n in range(1, 3)])
    ring = writer(tmp_path / "rings" / "spot", "trades")
    append(ring, rows["trades"])
    venue = load_venue("binance_spot")
    found = Rings(venue, tmp_path / "rings", None, ["trades"])
    tickers = found.find(0.0)
    comparison = Comparison(venue, found, tickers, tmp_path, "ws://127.0.0.1:1", Settings(None, 5.0, 0.0, "oldest"))
    monkeypatch.setattr("tools.compare.DRAIN_S", 0.2)
    (side,) = comparison._ring_sides
    take = side.take

    def take_while_more_comes() -> int:
        append(ring, rows["trades"])
        return take()

    monkeypatch.setattr(side, "take", take_while_more_comes)

    async def read_to_the_end() -> None:
        ending = asyncio.Event()
        ending.set()
        await asyncio.wait_for(comparison._read_rings(ending), DEADLINE_S)

    asyncio.run(read_to_the_end())
    comparison.report.finish()
    side.close()
    ring.close()


def test_nothing_in_common_is_a_finding(tmp_path: Path) -> None:
    write_rings(tmp_path / "rings" / "spot", {"trades": [], "bbo": []})
    entry = {"t": 1, "conn": "ws1", "dir": "in", "raw": json.dumps({"stream": "btcusdt@trade", "data": trade_data(1)})}
    result = compare_with_recording(tmp_path, [entry], tmp_path / "rings", "BTCUSDT")
    assert result.code == 1
    assert result.summary["verdict"] == "nothing in common"


def trade_data(n: int) -> dict[str, Any]:
    return {"e": "trade", "E": n, "s": "BTCUSDT", "t": n, "p": "1.0", "q": "2.0", "T": n, "m": True, "M": True}


def test_the_table_is_for_people(tmp_path: Path) -> None:
    rows = rows_of([json.dumps({"stream": "btcusdt@trade", "data": trade_data(n)}) for n in range(1, 50)])
    rows["trades"][20]["price"] = 7.0
    write_rings(tmp_path / "rings" / "spot", rows)
    path, out = tmp_path / "small.jsonl", tmp_path / "out"
    frames = [json.dumps({"stream": "btcusdt@trade", "data": trade_data(n)}) for n in range(1, 50)]
    path.write_text(
        "".join(json.dumps({"t": n + 1, "conn": "w", "dir": "in", "raw": raw}) + "\n" for n, raw in enumerate(frames))
    )
    with serving(path, "--speed", "max", "--exit") as (server, ws_url):
        command = mdcompare(
            "binance_spot", "--rings", tmp_path / "rings", "--out", out, "--ws-url", ws_url, "--seek", "oldest"
        )
        with started(command) as process:
            server.communicate(timeout=DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "BTCUSDT" in stdout
    assert "1 findings" in stdout


# wrong use


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nyse", "--rings", "{rings}", "--out", "{out}"], "nyse"),
        (["binance_spot", "--out", "{out}"], "--rings"),
        (["binance_spot", "--rings", "{empty}", "--out", "{out}", "--wait", "0.3"], "has no rings"),
        (["binance_spot", "--rings", "{rings}", "--out", "{out}", "--wait", "0.3"], "several connectors"),
        (["deribit", "--rings", "{rings}", "--out", "{out}", "--wait", "0.3"], "has no rings of deribit"),
        (["binance_spot", "--connector", "c", "--rings", "{rings}", "--out", "{out}", "--wait", "0.3"], "waited 0.3 s"),
        (["deribit", "--connector", "a", "--rings", "{rings}", "--out", "{out}"], "not of deribit"),
        (["binance_spot", "--connector", "a", "--rings", "{rings}", "--out", "{out}", "--feeds", "candles"], "candles"),
        (["binance_spot", "--connector", "a", "--rings", "{rings}", "--out", "{out}", "--filters", "{typo}"], "symbol"),
        (["binance_spot", "--connector", "a", "--rings", "{rings}", "--out", "{out}", "--filters", "{other}"], "okx"),
        (["binance_spot", "--connector", "a", "--rings", "{rings}", "--out", "{out}", "--filters", "{none}"], "none.json"),
        (["binance_spot", "BTCUSDT", "--connector", "a", "--rings", "{rings}", "--out", "{out}", "--filters", "{eth}"], "no instrument"),
        (["binance_spot", "--connector", "broken", "--rings", "{broken}", "--out", "{out}", "--wait", "0.3"], "trades.meta"),
    ],
)  # fmt: skip
def test_wrong_use_is_told(tmp_path: Path, args: list[str], told: str) -> None:
    rows = rows_of([json.dumps({"stream": "btcusdt@trade", "data": trade_data(1)})])
    for name in ("a", "b"):
        write_rings(tmp_path / "rings" / name, rows)
    write_rings(tmp_path / "broken" / "broken", rows)
    (tmp_path / "broken" / "broken" / "trades.meta").write_bytes(b"nonsense" * 100)
    (tmp_path / "empty").mkdir()
    texts = {"typo": '{"symbol": []}', "other": '{"exchanges": ["okx"]}', "eth": '{"symbols": ["ETH*"]}'}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    places = {name: tmp_path / name for name in ("rings", "empty", "broken", "out")}
    places |= {name: tmp_path / f"{name}.json" for name in (*texts, "none")}
    command = mdcompare(*(arg.format(**places) for arg in args))
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_venue_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    write_rings(tmp_path / "rings" / "a", rows_of([json.dumps({"stream": "btcusdt@trade", "data": trade_data(1)})]))
    command = mdcompare(
        "binance_spot", "--rings", tmp_path / "rings", "--out", tmp_path / "out", "--ws-url", "ws://127.0.0.1:1"
    )
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert "cannot connect" in json.loads(done.stdout)["error"]


# beside a simulated venue


def test_beside_the_simulator(tmp_path: Path) -> None:
    """A connector of some lines fills rings from the same venue at the same time; only an injected error is found."""
    simulator = [sys.executable, "-c", "from tools.sim.cli import main; main()", "binance_spot", "--port", "0"]
    with started([*simulator, "--seed", "1", "--rate", "60"]) as sim:
        assert sim.stdout is not None
        line = sim.stdout.readline()
        assert line, sim.stderr and sim.stderr.read()
        ready = json.loads(line)
        for name, spoil in (("right", False), ("wrong", True)):
            rings, out = tmp_path / name, tmp_path / f"{name}-out"
            command = mdcompare("binance_spot", "BTCUSDT", "ETHUSDT", "--rings", rings, "--out", out)
            with started([*command, "--ws-url", ready["ws_url"], "--edge", "1", "--json"]) as process:
                asyncio.run(fill_rings(rings / "mini", ready, process, spoil))
                stdout, stderr = process.communicate(timeout=DEADLINE_S)
            result = Result(process.returncode, stdout, stderr, out)
            assert result.summary["compared"] > 50, result.summary
            assert result.kinds() == ([("trades", "different", False), ("trades", "missing", False)] if spoil else [])
            assert result.code == (1 if spoil else 0)


async def fill_rings(directory: Path, ready: dict[str, Any], process: "subprocess.Popen[str]", spoil: bool) -> None:
    """Write rows of everything that comes; stop the comparator when it has been connected for 60 trades of BTCUSDT."""
    rings = {feed: writer(directory, feed) for feed in ("trades", "orderbook_l2", "bbo")}
    kinds = ("trade", "depth@100ms", "bookTicker")
    streams = "/".join(f"{symbol}@{kind}" for symbol in ("btcusdt", "ethusdt") for kind in kinds)
    both = asyncio.Event()
    trades = 0
    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
        async with http.ws_connect(f"{ready['ws_url']}/stream?streams={streams}") as socket:
            group.create_task(see_two_connections(http, ready["rest_url"], both))
            while trades < 60:
                raw = await socket.receive_str(timeout=DEADLINE_S)
                for feed, rows in rows_of([raw], time.time_ns() // 1000).items():
                    if feed == "trades" and rows and rows[0]["ticker"] == "BTCUSDT" and both.is_set():
                        trades += 1
                        if spoil and trades == 40:
                            rows[0]["price"] += 1
                        if spoil and trades == 42:
                            continue
                    append(rings[feed], rows)
        process.send_signal(signal.SIGTERM)
    for ring in rings.values():
        ring.close()


async def see_two_connections(http: aiohttp.ClientSession, rest_url: str, both: asyncio.Event) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not both.is_set():
            async with http.get(f"{rest_url}/_sim/state") as response:
                if len((await response.json())["connections"]) == 2:
                    both.set()
            await asyncio.sleep(0.05)


# what a connector may choose

CHOICES = [
    ("binance_spot", "BTCUSDT", {"trade_channel": "aggTrade"}),
    ("binance_futures", "BTCUSDT", {"trade_channel": "aggTrade"}),
    ("okx", "BTC-USDT-SWAP", {"trade_channel": "trades-all"}),
    ("bybit_linear", "BTCUSDT", {"book_depth": 50}),
    ("deribit", "BTC-PERPETUAL", {"book_interval": "agg2"}),
]
ON_TWO_PATHS = ("binance_futures", "okx")


@pytest.mark.parametrize(("exchange", "ticker", "options"), CHOICES, ids=[exchange for exchange, _, _ in CHOICES])
def test_what_the_connector_chose_is_compared(
    tmp_path: Path, exchange: str, ticker: str, options: dict[str, Any]
) -> None:
    """Beside a connector that records another channel than the default: nothing is found but what is left out.

    Two comparators run beside it: one reads its rings, the other a copy of its trades that lacks some.
    """
    connections = (Fleet.NAME,) if exchange not in ON_TWO_PATHS else (f"{Fleet.NAME}.1", f"{Fleet.NAME}.2")
    feeds = ("trades", "orderbook_l2")
    with ExitStack() as stack:
        fleet = Fleet(
            tmp_path / "fleet", exchange, tickers=[ticker], sim_tickers=f"{ticker}:1", feeds=feeds, rate=120,
            connections=connections, **options,
        )  # fmt: skip
        stack.enter_context(fleet).start()
        mine = {stream for conn in fleet.sim.state()["connections"] for stream in conn["subscriptions"]}
        ((key, value),) = options.items()

        copy = TradeCopy(fleet, tmp_path / "copy" / "copied")
        outs = {"right": tmp_path / "right", "wrong": tmp_path / "wrong"}
        common = (exchange, "--ws-url", fleet.sim.ws_url, "--rest-url", fleet.sim.rest_url, "--edge", "1", "--json")
        right = stack.enter_context(started(mdcompare(*common, "--rings", fleet.rings, "--out", outs["right"])))
        said = (f"--{key.replace('_', '-')}", value)  # the copy has no stats page
        wrong = stack.enter_context(
            started(mdcompare(*common, ticker, "--rings", tmp_path / "copy", "--out", outs["wrong"], *said))
        )
        trades = sum(s["feed"] == "trades" for name in connections for s in fleet.stats(name)["streams"].values())

        def compared() -> bool:
            copy.follow()
            tools = [conn for conn in fleet.sim.state()["connections"] if conn["agent"] == USER_AGENT]
            return sum(len(conn["subscriptions"]) for conn in tools) == len(mine) + trades

        until(compared, lambda: f"comparators subscribed to {mine}; {fleet.sim.state()['connections']}")
        for _ in range(3):
            goal = copy.copied + 30
            until(lambda goal=goal: copy.follow() >= goal, "more trades")
            fleet.wait_more("orderbook_l2")
            copy.leave_out_one()
        until(lambda goal=copy.copied + 1: copy.follow() >= goal, "a trade behind the last one that was left out")
        results = {}
        for name, process in (("right", right), ("wrong", wrong)):
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
            results[name] = Result(process.returncode, stdout, stderr, outs[name])
    assert results["right"].summary["chosen"][key] == str(value)
    assert results["right"].kinds() == []
    assert results["right"].code == 0, results["right"].summary
    assert [feed for feed, counts in results["right"].summary["feeds"].items() if counts["identical"]] == list(feeds)
    assert results["wrong"].kinds() == [("trades", "missing", False)] * 3
    assert [line["id"] for line in results["wrong"].differences] == copy.left_out
    assert results["wrong"].code == 1


class TradeCopy:
    """The ring of trades of a connector in another place, as far as it was followed."""

    def __init__(self, fleet: Fleet, directory: Path) -> None:
        self.copied = 0
        self.left_out: list[str] = []
        self._leave_out = False
        self._exchange = Exchange[fleet.exchange.upper()]
        source = next(d for d in sorted(fleet.rings.iterdir()) if (d / "trades.meta").exists())
        self._reader = RingReader(source, "trades")
        self._writer = writer(directory, "trades", self._exchange)

    def follow(self) -> int:
        """Copy what is new; how many rows that makes."""
        rows = self._reader.read()
        names = self._reader.names(rows)
        for values, ticker in zip(rows.tolist(), names, strict=True):
            row = {**dict(zip(rows.dtype.names, values, strict=True)), "ticker": ticker}
            if self._leave_out:
                self.left_out.append(row["trade_id"].decode() or str(row["trade_seq"]))
                self._leave_out = False
                continue
            append(self._writer, [row], self._exchange)
            self.copied += 1
        return self.copied

    def leave_out_one(self) -> None:
        self._leave_out = True


def with_page(rings: Path, streams: dict[str, str], name: str = "a") -> StatsWriter:
    """Rings of a connector, and its stats page: names of streams by their feed."""
    write_rings(rings / name, {"trades": [], "orderbook_l2": []})
    page = StatsWriter(rings / name)
    page.publish({"streams": {stream: {"feed": feed} for feed, stream in streams.items()}})
    return page


def rings_of(exchange: str, rings: Path, name: str, feeds: list[str] | None = None) -> Rings:
    found = Rings(load_venue(exchange), rings, name, feeds)
    found.find(0.0)
    return found


def test_an_arbiter_is_compared_with_what_its_legs_record(tmp_path: Path) -> None:
    for leg in ("a", "b"):
        with_page(tmp_path, {"trades": "btcusdt@aggTrade"}, leg)
    write_rings(tmp_path / "merged", {"trades": []})
    StatsWriter(tmp_path / "merged").publish({"legs": {"a": {}, "b": {}}})
    assert rings_of("binance_spot", tmp_path, "merged").choice({}) == {"trade_channel": "aggTrade"}
    assert rings_of("binance_spot", tmp_path, "merged").choice({"trade_channel": "trade"}) == {"trade_channel": "trade"}
    with_page(tmp_path, {"trades": "btcusdt@trade"}, "b")
    with pytest.raises(WrongUse, match="records trade_channel = aggTrade, trade: of binance_spot one of"):
        rings_of("binance_spot", tmp_path, "merged").choice({})


def test_what_changes_under_a_comparison_is_told(tmp_path: Path) -> None:
    page = with_page(tmp_path / "rings", {"trades": "btcusdt@trade"})
    found = rings_of("binance_spot", tmp_path / "rings", "a")
    settings = Settings(0.01, 5.0, 0.0, "oldest")
    comparison = Comparison(load_venue("binance_spot"), found, ["BTCUSDT"], tmp_path, "ws://127.0.0.1:1", settings)
    page.publish({"streams": {"btcusdt@aggTrade": {"feed": "trades"}}})
    with pytest.raises(WrongUse, match="compare again"):
        asyncio.run(comparison.run())


@pytest.mark.parametrize(
    ("exchange", "stream", "args", "told"),
    [
        ("okx", "books-l2-tbt:BTC-USDT", (), "records book_interval = 10ms"),
        ("deribit", "book.BTC-PERPETUAL.raw", (), "records book_interval = raw"),
        ("deribit", "book.BTC-PERPETUAL.raw", ("--feeds", "trades"), ""),
        ("deribit", "book.BTC-PERPETUAL.raw", ("--book-interval", "raw"), "book_interval = raw cannot be compared"),
        ("bybit_linear", "orderbook.500.BTCUSDT", (), "records book_depth = 500"),
        ("bybit_linear", "orderbook.500.BTCUSDT", ("--book-depth", "200"), ""),
        ("bybit_linear", "orderbook.50.BTCUSDT", ("--book-depth", "5"), "book_depth = 5 cannot be compared"),
        ("binance_spot", "btcusdt@depth@100ms", ("--book-depth", "100"), "nothing to choose"),
        ("binance_spot", "btcusdt@depth@100ms", ("--trade-channel", "fills"), "has trade, aggTrade"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, exchange: str, stream: str, args: tuple[str, ...], told: str
) -> None:
    for feed in ("trades", "orderbook_l2"):
        writer(tmp_path / "rings" / "a", feed, Exchange[exchange.upper()]).close()
    StatsWriter(tmp_path / "rings" / "a").publish({"streams": {stream: {"feed": "orderbook_l2"}}})
    command = mdcompare(exchange, "BTCUSDT", "--rings", tmp_path / "rings", "--out", tmp_path / "out", *args)
    urls = ("--ws-url", "ws://127.0.0.1:1", "--rest-url", "http://127.0.0.1:1", "--seconds", "0.01")
    done = subprocess.run([*command, *urls], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == (2 if told else 1), done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
