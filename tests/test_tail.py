"""mdtail as a user runs it: a real process that looks at real rings."""

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mdcollector.records import FEEDS, UINT32_MAX, Exchange, Feed
from mdcollector.ring import RingWriter
from readers.tail import kind_of

MDTAIL = [sys.executable, "-m", "readers.tail"]
TIMEOUT_S = 60.0
T0 = 1_723_161_253_123_456
NAN = float("nan")


def ring(rings: Path, feed: str = "trades", connector: str = "c", **changes: Any) -> RingWriter:
    how: dict[str, Any] = {"exchange": "DERIBIT", "capacity": 512, "semaphore": False, **changes}
    return RingWriter(rings / connector, FEEDS[feed], connector=connector, **how)


def row(feed: Feed | str, **values: Any) -> tuple[object, ...]:
    """A row of a feed with the values given by name and something plausible elsewhere."""
    feed = FEEDS[feed] if isinstance(feed, str) else feed
    texts = {"interval": b"1m", "feed": b"trades", "cause": b"sequence", "trade_id": b""}
    whole = {
        "timestamp": T0,
        "rcv_timestamp": T0 + 500,
        "exchange": int(Exchange.DERIBIT),
        "action": 1,
        **texts,
        **values,
    }
    plausible = {"f": 1.5, "S": b"X"}  # by the kind of the column; 1 for whole numbers
    return tuple(whole.get(c.name, plausible.get(c.ring[0], 1)) for c in feed.columns[:-1])


def fill(
    out: RingWriter, count: int, *, tickers: tuple[str, ...] = ("BTC-PERPETUAL",), rcv: int = T0, step: int = 1000
) -> None:
    for n in range(count):
        out.append(
            row(out.feed, rcv_timestamp=rcv + n * step, ticker=out.code(tickers[n % len(tickers)]), trade_seq=n, price=n + 0.1)
        )  # fmt: skip
    out.seal()


def mdtail(rings: Path, *args: object, code: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run mdtail to its end and hold it to its exit code."""
    done = subprocess.run(
        [*MDTAIL, "--rings", rings, *map(str, args)], capture_output=True, text=True, timeout=TIMEOUT_S, **how
    )
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


class Following:
    """A running mdtail whose output is read by threads; every wait for it has an end."""

    def __init__(self, rings: Path, *args: object) -> None:
        self.process = subprocess.Popen(
            [*MDTAIL, "--rings", rings, "--poll-ms", "1", *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._take, args=(stream, to))
            for stream, to in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _take(stream: Any, to: list[str]) -> None:
        to.extend(line.rstrip("\n") for line in stream)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.out[-5:]} {self.err[-5:]}"
            assert self.process.poll() is None, f"{what}: it ended: {self.err[-5:]}"
            time.sleep(0.002)

    def until_rows(self, count: int) -> list[dict[str, Any]]:
        self.until(lambda: len(self.out) >= count, f"{count} rows")
        return [json.loads(line) for line in self.out]

    def until_said(self, text: str) -> None:
        self.until(lambda: any(text in line for line in self.err), f"{text!r} on stderr")

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(TIMEOUT_S)
        self._join()
        return code

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def following(rings: Path, *args: object) -> Iterator[Following]:
    tail = Following(rings, *args)
    try:
        yield tail
    finally:
        tail.kill()


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("feed", FEEDS.values(), ids=lambda feed: feed.name)
def test_json_has_every_column_of_the_table_under_its_name(tmp_path: Path, feed: Feed) -> None:
    with ring(tmp_path, feed.name) as out:
        out.append(row(feed, ticker=out.code("ソラ-USDT")))
    (found,) = objects(mdtail(tmp_path, "--json", "--no-follow"))
    assert list(found) == ["connector", "table", *(c.name for c in feed.table_columns)]
    assert (found["connector"], found["table"], found["exchange"]) == ("c", feed.name, "DERIBIT")
    assert (found["ticker"], found["timestamp"], found["rcv_timestamp"]) == ("ソラ-USDT", T0, T0 + 500)
    kinds = {"float64": float, "bool": bool, "text": str, "category": str}
    for column in feed.table_columns:
        assert type(found[column.name]) is kinds.get(column.table, int), column


def test_values_are_exact_and_what_was_not_given_is_null(tmp_path: Path) -> None:
    with ring(tmp_path, "bbo") as out:
        code = out.code("X")
        out.append(row("bbo", ticker=code, bid_price=0.1 + 0.2, bid_qty=1e-8, ask_price=NAN, ask_qty=0.0, update_id=-1))
    (found,) = objects(
        mdtail(tmp_path, "--json", "--no-follow", "--columns", "bid_price,bid_qty,ask_price,ask_qty,update_id")
    )
    assert found == {"bid_price": 0.1 + 0.2, "bid_qty": 1e-8, "ask_price": None, "ask_qty": 0.0, "update_id": None}
    done = mdtail(
        tmp_path, "--feed", "bbo", "--csv", "-", "--no-follow", "--columns", "ask_price,bid_price,update_id,seq_id"
    )
    assert done.stdout == "ask_price,bid_price,update_id,seq_id\n,0.30000000000000004,,0\n"


def test_a_trade_id_is_the_sequence_where_the_ring_leaves_it_empty(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        out.code("X")
        for seq, text in ((12, b""), (12, b"ab-1"), (-1, b""), (-1, b"z")):
            out.append(row("trades", ticker=0, trade_seq=seq, trade_id=text))
    rows = objects(mdtail(tmp_path, "--json", "--no-follow"))
    assert [(r["trade_seq"], r["trade_id"]) for r in rows] == [(12, "12"), (12, "ab-1"), (None, ""), (None, "z")]


def test_csv_survives_any_text(tmp_path: Path) -> None:
    names = ['quo"te', "com,ma", "new\nline", " blank ", "ソラ", "plain", "cr\rcr"]
    with ring(tmp_path) as out:
        fill(out, len(names), tickers=tuple(names))
    target = tmp_path / "out.csv"
    mdtail(tmp_path, "--feed", "trades", "--csv", target, "--no-follow")
    with open(target, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert [r["ticker"] for r in rows] == names
    assert list(rows[0]) == ["connector", *(c.name for c in FEEDS["trades"].table_columns)]
    assert [float(r["price"]) for r in rows] == [n + 0.1 for n in range(len(names))]
    assert [int(r["rcv_timestamp"]) for r in rows] == [T0 + n * 1000 for n in range(len(names))]


def test_csv_of_one_feed_is_the_file_itself_of_several_a_file_each(tmp_path: Path) -> None:
    rings = tmp_path / "rings"
    with ring(rings) as out:
        fill(out, 5)
    mdtail(rings, "--csv", tmp_path / "one.csv", "--no-follow")
    with ring(rings, "candles") as out:
        fill(out, 3)
    done = mdtail(rings, "--csv", tmp_path / "all.csv", "--no-follow")
    mdtail(rings, "--csv", tmp_path / "chosen.csv", "--feed", "trades", "--no-follow")
    assert sorted(p.name for p in tmp_path.glob("*.csv")) == [
        "all.candles.csv",
        "all.trades.csv",
        "chosen.csv",
        "one.csv",
    ]
    assert done.stdout == ""
    assert "writing candles to" in done.stderr
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "all.trades.csv").read_text()
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "chosen.csv").read_text()
    lines = (tmp_path / "all.candles.csv").read_text().splitlines()
    assert len(lines) == 4
    assert ",true," in lines[1]


def test_csv_and_a_view_at_once(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 5)
    done = mdtail(tmp_path, "--csv", tmp_path / "o.csv", "--json", "--no-follow", "--rows", 3)
    assert len(objects(done)) == 3
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4


def test_the_table_is_aligned_and_names_its_columns(tmp_path: Path) -> None:
    with ring(tmp_path, "orderbook_l2") as out:
        fill(out, 3, tickers=("BTC", "ソラ", "\x1b[2J"))
    done = mdtail(tmp_path, "--feed", "orderbook_l2", "--no-follow")
    header, *lines = done.stdout.splitlines()
    assert header.split() == [
        "timestamp", "exchange", "ticker", "seq_id", "side", "action", "price", "qty", "update_id", "flags",
    ]  # fmt: skip
    assert "2024-08-08T23:54:13.123456" in lines[0]
    assert lines[0].index("BTC") == header.index("ticker")
    assert lines[0].split()[4:6] == ["bid", "NEW"]
    assert "\x1b" not in done.stdout, "control characters of an exchange must not reach a terminal"
    assert r"\x1b[2J" in lines[2]
    both = mdtail(tmp_path, "--no-follow").stdout.splitlines()
    assert both[0].split()[0] == "table"
    assert both[1].split()[0] == "orderbook_l2"


def test_tradeprint_has_its_fields_and_the_times_of_each_stage(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        code = out.code("BTC-PERPETUAL")
        common = {"ticker": code, "price": 61837.5, "qty": 10.0, "parse_ns": 1500, "publish_ns": 2_000_000}
        out.append(row("trades", **common, side=-1, trade_id=b"BTC-17"))
        out.append(row("trades", **{**common, "publish_ns": UINT32_MAX}, side=0, trade_seq=5))
    before = time.time() * 1000
    first, second = objects(mdtail(tmp_path, "--format", "tradeprint", "--no-follow"))
    assert list(first) == [
        "exchange", "asset", "kind", "px", "sz", "side", "exchange_trade_id", "exchange_ts_ms", "recv_ts_ms",
        "parse_ts_ms", "enqueue_ts_ms", "writer_ts_ms",
    ]  # fmt: skip
    assert [first[k] for k in ("exchange", "asset", "kind", "px", "sz", "side", "exchange_trade_id")] == [
        "DERIBIT", "BTC-PERPETUAL", "perp", 61837.5, 10.0, "sell", "BTC-17",
    ]  # fmt: skip
    assert (first["exchange_ts_ms"], first["recv_ts_ms"]) == (T0 / 1000, (T0 + 500) / 1000)
    assert first["parse_ts_ms"] == pytest.approx((T0 + 500) / 1000 + 0.0015, abs=0.0005)
    assert first["enqueue_ts_ms"] == pytest.approx((T0 + 500) / 1000 + 2, abs=0.0005)
    assert before <= first["writer_ts_ms"] <= time.time() * 1000
    assert (second["side"], second["exchange_trade_id"], second["enqueue_ts_ms"]) == (None, "5", None)


@pytest.mark.parametrize(
    ("exchange", "ticker", "kind"),
    [
        ("BINANCE_SPOT", "BTCUSDT", "spot"), ("BINANCE_FUTURES", "BTCUSDT", "perp"),
        ("BINANCE_FUTURES", "BTCUSDT_261225", "future"), ("DERIBIT", "BTC-PERPETUAL", "perp"),
        ("DERIBIT", "BTC_USDC-PERPETUAL", "perp"), ("DERIBIT", "BTC-25DEC26", "future"),
        ("DERIBIT", "BTC-25DEC26-76000-C", "option"), ("DERIBIT", "XRP_USDC-25DEC26-1d5-P", "option"),
        ("DERIBIT", "ETH_USDC", "spot"), ("DERIBIT", "BTC-FS-25DEC26_PERP", "perp"), ("OKX", "BTC-USDT", "spot"),
        ("OKX", "BTC-USDT-SWAP", "perp"), ("OKX", "BTC-USD-220527", "future"),
        ("OKX", "BTC-USD-210924-66000-C", "option"), ("OKX", "BTC-USD_UM-261030", "future"),
        ("BYBIT_SPOT", "OPUSDC", "spot"), ("BYBIT_LINEAR", "BTCUSDT", "perp"), ("BYBIT_LINEAR", "BTCPERP", "perp"),
        ("BYBIT_LINEAR", "BTC-26DEC25", "future"), ("BYBIT_INVERSE", "BTCUSD", "perp"),
        ("BYBIT_INVERSE", "BTCUSDH26", "future"), ("BYBIT_OPTION", "BTC-26DEC25-100000-C-USDT", "option"),
        ("COINBASE", "BTC-USD", "spot"), ("COINBASE", "BTC-PERP-INTX", "perp"), ("GMX", "BTC", None),
        ("OKX", "what is this", None),
    ],
)  # fmt: skip
def test_the_kind_is_told_as_far_as_the_symbol_tells_it(exchange: str, ticker: str, kind: str | None) -> None:
    assert kind_of(exchange, ticker) == kind


# ---------------------------------------------------------------- what is selected


def test_filters_feeds_and_connectors_narrow_what_is_shown(tmp_path: Path) -> None:
    for connector in ("a", "b"):
        for feed in ("trades", "bbo"):
            with ring(tmp_path, feed, connector) as out:
                fill(out, 6, tickers=("BTCUSDT", "ETHUSDT", "ethbtc"))

    def shown(*args: object) -> list[tuple[str, str, str]]:
        found = objects(mdtail(tmp_path, "--json", "--no-follow", *args))
        return sorted({(r["connector"], r["table"], r["ticker"]) for r in found})

    assert len(shown()) == 12
    assert {t for _, _, t in shown("--filter", "Eth*")} == {"ETHUSDT", "ethbtc"}
    assert {t for _, _, t in shown("--filter", "btc?sdt,ethb[s-u]c")} == {"BTCUSDT", "ethbtc"}
    assert {t for _, _, t in shown("--filter", "BTCUSDT", "--filter", "ethbtc")} == {"BTCUSDT", "ethbtc"}
    assert shown("--filter", "nothing*") == []
    assert {f for _, f, _ in shown("--feed", "bbo")} == {"bbo"}
    assert {f for _, f, _ in shown("--feed", "bbo,trades")} == {"bbo", "trades"}
    assert {c for c, _, _ in shown("--connector", "b")} == {"b"}
    assert shown("--connector", "b", "--feed", "trades", "--filter", "btc*") == [("b", "trades", "BTCUSDT")]


def test_the_directory_may_be_one_connectors_or_come_from_the_environment(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 2)
    assert len(objects(mdtail(tmp_path / "c", "--json", "--no-follow"))) == 2
    done = subprocess.run(
        [*MDTAIL, "--json", "--no-follow"], env={**os.environ, "MDCOLLECTOR_RINGS": str(tmp_path)},
        capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
    )  # fmt: skip
    assert len(objects(done)) == 2


def test_from_and_rows_choose_a_stretch(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 100)

    def numbers(*args: object) -> list[int]:
        return [r["seq_id"] for r in objects(mdtail(tmp_path, "--json", *args))]

    assert numbers("--no-follow") == list(range(100))
    assert numbers("--from", "oldest", "--rows", 3) == [0, 1, 2]
    assert numbers("--from", 97, "--no-follow") == [97, 98, 99]
    assert numbers("--from", 90, "--rows", 5) == [90, 91, 92, 93, 94]
    assert numbers("--from", "newest", "--no-follow") == []
    assert numbers("--seconds", 0.2) == [], "from the newest row on nothing came"


def test_rows_of_several_rings_come_in_the_order_in_which_they_arrived(tmp_path: Path) -> None:
    with ring(tmp_path, "trades", "a", capacity=1 << 15) as a, ring(tmp_path, "bbo", "b") as b:
        fill(a, 20_000, step=10)  # more than is held of a ring at once
        fill(b, 200, step=1000, rcv=T0 + 3)
    rows = objects(mdtail(tmp_path, "--json", "--no-follow"))
    assert len(rows) == 20_200
    times = [r["rcv_timestamp"] for r in rows]
    assert times == sorted(times)
    for connector in ("a", "b"):
        own = [r["seq_id"] for r in rows if r["connector"] == connector]
        assert own == sorted(own)


# ---------------------------------------------------------------- live


def test_it_follows_over_writer_restarts_replaced_files_and_new_rings(tmp_path: Path) -> None:
    out = ring(tmp_path)
    with following(tmp_path, "--json", "--from", "oldest") as tail:
        fill(out, 3)
        tail.until_rows(3)
        out.close()
        out = ring(tmp_path)
        fill(out, 2, tickers=("ETH", "XRP"))
        rows = tail.until_rows(5)
        assert [r["seq_id"] for r in rows] == [0, 1, 2, 3, 4]
        assert [r["ticker"] for r in rows[3:]] == ["ETH", "XRP"]
        tail.until_said("c/trades: its writer was restarted")
        out.close()
        for end in ("data", "meta"):
            (tmp_path / "c" / f"trades.{end}").rename(tmp_path / f"old.{end}")
        with ring(tmp_path) as out:
            fill(out, 2, tickers=("NEW",))
            rows = tail.until_rows(7)
            assert [(r["seq_id"], r["ticker"]) for r in rows[5:]] == [(0, "NEW"), (1, "NEW")]
            tail.until_said("c/trades: its files were replaced or removed")
            with ring(tmp_path, "bbo", "later") as later:
                fill(later, 4)
                rows = tail.until_rows(11)
                assert [(r["connector"], r["seq_id"]) for r in rows[7:]] == [("later", n) for n in range(4)]
                tail.until_said("later/bbo: found")
        assert tail.end() == 0
        assert tail.err[-1] == "mdtail: 11 rows shown"


def test_it_waits_for_rings_that_do_not_exist_yet(tmp_path: Path) -> None:
    with following(tmp_path, "--json") as tail:
        tail.until_said("yet, waiting")
        with ring(tmp_path) as out:
            fill(out, 2)
            tail.until_rows(2)
        assert tail.end(signal.SIGTERM) == 0


def test_being_lapped_is_said_with_the_number_of_rows(tmp_path: Path) -> None:
    out = ring(tmp_path)
    fill(out, 5)
    with following(tmp_path, "--json", "--from", "oldest") as tail:
        tail.until_rows(5)
        tail.process.send_signal(signal.SIGSTOP)
        fill(out, 2000)
        tail.process.send_signal(signal.SIGCONT)
        tail.until(lambda: bool(tail.out) and json.loads(tail.out[-1])["seq_id"] == 2004, "the newest row")
        rows = [json.loads(line)["seq_id"] for line in tail.out]
        lost = 2005 - len(rows)
        assert lost >= 2005 - 5 - 512
        tail.until_said(f"c/trades: lapped, {lost} rows were overwritten before they could be read")
        assert tail.end() == 1
    out.close()


def test_rows_that_are_gone_before_it_starts_are_said_too(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 1000)
        oldest = out.limit - 512
    done = mdtail(tmp_path, "--json", "--from", 0, "--no-follow", code=1)
    assert [r["seq_id"] for r in objects(done)] == list(range(oldest, 1000))
    assert f"lapped, {oldest} rows were overwritten" in done.stderr
    assert len(objects(mdtail(tmp_path, "--json", "--from", "oldest", "--no-follow"))) == 1000 - oldest


@pytest.mark.parametrize("output", ["--json", "--csv"])
def test_it_keeps_up_with_a_fast_writer(tmp_path: Path, output: str) -> None:
    rings, target = tmp_path / "rings", tmp_path / "out.csv"
    with ring(rings, capacity=1 << 15) as out:
        count = 60_000
        args = ["--csv", target, "--from", "oldest"] if output == "--csv" else ["--json", "--from", "oldest"]
        with following(rings, *args, "--rows", count) as tail:
            rows = [row("trades", ticker=out.code("BTC"), trade_seq=n, price=n + 0.1) for n in range(1000)]
            written = 0
            tail.until(lambda: target.exists() or output == "--json", "the file")
            while written < count:
                shown = len(tail.out) if output == "--json" else target.read_bytes().count(b"\n") - 1
                if written - shown < 20_000:
                    out.append_many(rows[:250])
                    written += 250
                else:
                    time.sleep(0.001)
                assert tail.process.poll() is None or written >= count, tail.err
            assert tail.process.wait(TIMEOUT_S) == 0
            tail._join()
        if output == "--json":
            numbers = [json.loads(line)["seq_id"] for line in tail.out]
        else:
            with open(target, newline="") as file:
                numbers = [int(r["seq_id"]) for r in csv.DictReader(file, strict=True)]
        assert numbers == list(range(count))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_whole_lines_and_a_summary(tmp_path: Path, number: int) -> None:
    with ring(tmp_path, capacity=1 << 17) as out:
        fill(out, 60_000)
        with following(tmp_path, "--json", "--from", "oldest") as tail:
            tail.until(lambda: len(tail.out) > 100, "rows")
            assert tail.end(number) == 0
    assert [json.loads(line)["seq_id"] for line in tail.out] == list(range(len(tail.out)))
    assert tail.err == [f"mdtail: {len(tail.out)} rows shown"]


def test_it_can_be_stopped_while_nobody_reads_its_output(tmp_path: Path) -> None:
    with ring(tmp_path, capacity=1 << 14) as out:
        fill(out, 10_000)
        with subprocess.Popen(
            [*MDTAIL, "--rings", tmp_path, "--json", "--from", "oldest"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.read(1) == b"{", "it writes, and nobody reads on"
                process.send_signal(signal.SIGINT)
                assert process.wait(TIMEOUT_S) == 1
                assert process.stderr is not None
                assert b"the last rows could not be written" in process.stderr.read()
            finally:
                process.kill()


def test_a_reader_of_its_output_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    with ring(tmp_path, capacity=1 << 14) as out:
        fill(out, 16000)
        done = subprocess.run(
            f"{sys.executable} -m readers.tail --rings {tmp_path} --json --from oldest | head -n 2; exit ${{PIPESTATUS[0]}}",
            shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
    assert len(done.stdout.splitlines()) == 2
    assert (done.returncode, done.stderr) == (0, "")


def on_a_terminal(*args: object, env: dict[str, str] | None = None) -> str:
    """What mdtail writes when standard output is a terminal."""
    main, end = pty.openpty()
    try:
        process = subprocess.Popen(
            [*MDTAIL, *map(str, args)],
            stdout=end,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm", **(env or {})},
        )
        os.close(end)
        text = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            text += part
        assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(main)
    return text.decode()


def test_colours_come_on_a_terminal_only(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 50)
    args = ("--rings", tmp_path, "--no-follow", "--feed", "trades")
    shown = on_a_terminal(*args)
    if "NO_COLOR" not in os.environ:
        assert "\x1b[32m" in shown
    assert shown.count("ticker") == 2, "the header comes again"
    assert "\x1b" not in on_a_terminal(*args, env={"NO_COLOR": "1"})
    assert "\x1b" not in mdtail(tmp_path, *args[2:]).stdout


# ---------------------------------------------------------------- rates


def test_rates_tell_state_lag_and_latency_of_each_ring(tmp_path: Path) -> None:
    closed, dead = ring(tmp_path, "bbo"), ring(tmp_path, "tickers")
    fill(closed, 3)
    closed.close()
    fill(dead, 4)
    os.close(dead._lock_fd)  # what a kill leaves
    dead._lock_fd = -1
    with ring(tmp_path, capacity=1 << 15) as out:
        with following(tmp_path, "--rates", "--json") as tail:
            batch = [row("trades", ticker=out.code("BTC"), parse_ns=1000, publish_ns=3000 + n) for n in range(100)]

            def measured() -> bool:
                out.append_many(batch)
                out.heartbeat()
                return any(json.loads(line)["parse_us_p50"] is not None for line in tail.out)

            tail.until(measured, "a latency")
            rates = [json.loads(line) for line in tail.out]
            (seen,) = [r for r in rates if r["parse_us_p50"] is not None][:1]
            assert (seen["ring"], seen["state"], seen["lapped"], seen["damaged"]) == ("c/trades", "open", 0, 0)
            assert seen["rows_per_s"] > 0
            assert seen["parse_us_p50"] == seen["parse_us_p99"] == 1.0
            assert 3.0 < seen["publish_us_p50"] < seen["publish_us_p99"] <= 3.1
            assert 0 <= seen["heartbeat_age_s"] < TIMEOUT_S
            assert {r["ring"]: r["state"] for r in rates if r["ring"] != "c/trades"} == {
                "c/bbo": "closed",
                "c/tickers": "dead",
            }
            assert tail.end() == 0
        plain = mdtail(tmp_path, "--rates", "--no-follow").stdout.splitlines()
        assert len(plain) == 3
        assert any(line.startswith("c/bbo closed rows/s=0.0 published=3 lag=0 lapped=0") for line in plain)
    table = on_a_terminal("--rings", tmp_path, "--rates", "--no-follow", env={"COLUMNS": "200"})
    assert "c/trades" in table
    assert "rows/s" in table


# ---------------------------------------------------------------- damage and wrong use


def test_a_damaged_ring_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    for feed in ("trades", "bbo", "tickers"):
        with ring(tmp_path, feed) as out:
            fill(out, 3)
    os.truncate(tmp_path / "c" / "trades.data", 100)
    (tmp_path / "c" / "tickers.meta").write_bytes(b"nonsense")
    done = mdtail(tmp_path, "--json", "--no-follow", code=1)
    assert {r["table"] for r in objects(done)} == {"bbo"}
    assert "trades.data: 100 bytes, expected 65536: truncated" in done.stderr
    assert "tickers.meta: 8 bytes, too short for a ring" in done.stderr
    done = mdtail(tmp_path, "--feed", "trades", code=1)
    assert "trades.data: 100 bytes" in done.stderr, "with nothing else to follow it ends at once"


def test_a_damaged_ring_is_said_once_and_read_when_it_is_replaced(tmp_path: Path) -> None:
    for feed in ("trades", "bbo"):
        with ring(tmp_path, feed) as out:
            fill(out, 3)
    (tmp_path / "c" / "trades.meta").write_bytes(b"nonsense")
    with following(tmp_path, "--json", "--from", "oldest") as tail:
        tail.until_rows(3)
        tail.until_said("trades.meta: 8 bytes")
        for end in ("data", "meta"):
            (tmp_path / "c" / f"trades.{end}").unlink()
        with ring(tmp_path) as out:
            fill(out, 2)
        assert [r["table"] for r in tail.until_rows(5)][3:] == ["trades"] * 2
        assert tail.end() == 1
        assert sum("trades.meta: 8 bytes" in line for line in tail.err) == 1


def test_rows_with_a_flipped_bit_are_left_out_and_counted(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 300)
    data = tmp_path / "c" / "trades.data"
    raw = bytearray(data.read_bytes())
    raw[260 * 128 + 41] ^= 1
    data.write_bytes(raw)
    done = mdtail(tmp_path, "--json", "--no-follow", code=1)
    assert [r["seq_id"] for r in objects(done)] == list(range(256))
    assert "c/trades: 44 rows are damaged (wrong checksum) and left out" in done.stderr


def test_a_row_of_an_unknown_instrument_gives_the_ring_up(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        out.append(row("trades", ticker=9))
    with ring(tmp_path, "bbo") as out:
        fill(out, 2)
    done = mdtail(tmp_path, "--json", "--no-follow", code=1)
    assert len(objects(done)) == 2
    assert "a row names instrument 9 of 0: damaged" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--feed", "prices"], "'prices' is not a feed; there are trades, orderbook_l2"),
        (["--format", "xml"], "'xml' is not one of"),
        (["--filter", "a,,b"], "an empty pattern"),
        (["--from", "yesterday"], "neither newest, oldest nor a sequence number"),
        (["--from", "-5"], "neither newest, oldest nor a sequence number"),
        (["--from", "4"], "row 4 is not in 0..3"),
        (["--columns", "price,colour"], "no selected feed has 'colour'"),
        (["--feed", "bbo", "--columns", "price"], "no selected feed has 'price'"),
        (["--json", "--format", "csv"], "exclude each other"),
        (["--csv", "-", "--json"], "exclude each other"),
        (["--csv", "-"], "needs exactly one --feed"),
        (["--format", "tradeprint", "--feed", "bbo"], "shows the feed trades"),
        (["--rates", "--rows", "5"], "--rates goes with"),
        (["--rows", "0"], "--rows"),
        (["--seconds", "-1"], "--seconds"),
        (["--poll-ms", "nan"], "nan is not a finite number"),
        (["--seconds", "inf"], "inf is not a finite number"),
        (["--poll-ms", "0"], "--poll-ms"),
        (["--what"], "No such option"),
        (["surplus"], "unexpected extra argument"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_use_is_said_and_ends_with_2(tmp_path: Path, args: list[str], said: str) -> None:
    with ring(tmp_path) as out:
        fill(out, 3)
    done = mdtail(tmp_path, *args, code=2)
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_no_rings(tmp_path: Path) -> None:
    assert "does not exist" in mdtail(tmp_path / "nothing", code=2).stderr
    assert "no ring of trades that can be read" in mdtail(tmp_path, "--feed", "trades", "--no-follow", code=1).stderr


def test_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 300)
    done = mdtail(tmp_path, "--csv", tmp_path / "no" / "where.csv", "--no-follow", code=1)
    assert "where.csv: No such file" in done.stderr
    if Path("/dev/full").exists():
        done = mdtail(tmp_path, "--csv", "/dev/full", "--no-follow", code=1)
        assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_notices_can_be_turned_down_or_machine_readable(tmp_path: Path) -> None:
    with ring(tmp_path) as out:
        fill(out, 3)
    assert mdtail(tmp_path, "--no-follow", "--log-level", "warning").stderr == ""
    done = mdtail(tmp_path, "--no-follow", "--log-format", "json")
    said = json.loads(done.stderr)
    assert said.pop("time")
    assert said == {"level": "info", "logger": "mdtail", "message": "3 rows shown"}


def test_the_help_teaches() -> None:
    done = subprocess.run([*MDTAIL, "--help"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    for word in ("mdtail --feed trades --filter", "tradeprint", "orderbook_l2", "MDCOLLECTOR_RINGS", "Exit code"):
        assert word in done.stdout
