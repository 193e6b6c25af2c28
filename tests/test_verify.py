"""Verify: it finds what is wrong with a tree, and nothing else."""

import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdcollector.errors import StorageError
from mdcollector.records import BBO, FEEDS, GAPS, ORDERBOOK_L2, TRADES, Action, Feed, Flag
from mdcollector.sinks import Batch, Stream
from mdcollector.sinks.parquet import ParquetSink, StoredFile
from mdcollector.verify import Report, _covered, _Span, _Trades, verify

NOON_US = 1_772_366_400_000_000  # 2026-03-01 12:00 UTC
SECOND_US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
TICKERS = ("BTCUSDT", "ETHUSDT")


class Tree:
    """A tree made by the sink itself, file by file, with rows that a test chooses."""

    def __init__(self, out: Path) -> None:
        self.out, self.sink = out, ParquetSink(out)
        self.next: dict[Stream, int] = {}

    def add(
        self,
        feed: Feed,
        rows: Iterable[dict[str, object]],
        *,
        connector: str = "conn",
        epoch: int = 1,
        ring: int = 1,
        first: int | None = None,
    ) -> Path:
        stream = Stream(connector, feed, "BINANCE_SPOT")
        rows = list(rows)
        array = np.zeros(len(rows), dtype=feed.dtype)
        for i, row in enumerate(rows):
            array[i]["timestamp"] = array[i]["rcv_timestamp"] = NOON_US
            for name, value in row.items():
                array[i][name] = value
        start = self.next.get(stream, 0) if first is None else first
        array["seq_id"] = np.arange(start, start + len(rows))
        self.next[stream] = start + len(rows)
        day = int(array["rcv_timestamp"][0]) // DAY_US
        batch = Batch(stream, epoch, ring, day, start, tickers=("",) if "~" in connector else TICKERS)
        batch.append(array)
        self.sink.write(batch)
        return StoredFile(
            feed.name, "BINANCE_SPOT", connector, epoch, batch.first, batch.last, batch.date, self.out
        ).path

    def verify(self) -> Report:
        return verify(self.out)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "out")


def trades(counters: Iterable[int], ticker: int = 0, hour: int = 0, **more: object) -> list[dict[str, object]]:
    return [
        {"trade_seq": n, "ticker": ticker, "side": 1, "price": 1.5, "qty": 2.0, "flags": 1,
         "timestamp": NOON_US + hour * HOUR_US + n * SECOND_US, **more}
        for n in counters
    ]  # fmt: skip


def gap(first: int, last: int, feed: str = "trades", **more: object) -> dict[str, object]:
    return {
        "feed": feed.encode(), "first_id": first, "last_id": last, "from_time": NOON_US, "to_time": NOON_US,
        "cause": b"sequence", "ticker": 0, "flags": 1, **more,
    }  # fmt: skip


def book(
    update: int, flags: int = 0, ticker: int = 0, levels: int = 2, snapshot: bool = False
) -> list[dict[str, object]]:
    """One book message."""
    flags |= int(Flag.SNAPSHOT) if snapshot else 0
    action = Action.NEW if snapshot else Action.UPDATE
    rows = [
        {
            "update_id": update,
            "ticker": ticker,
            "side": 1,
            "action": int(action),
            "price": 9.0 - i,
            "qty": 1.0,
            "flags": flags,
        }
        for i in range(levels)
    ]
    rows[-1]["flags"] = flags | int(Flag.LAST)
    return rows


# Trades


def test_a_whole_tree_is_proven_ticker_by_ticker_and_hour_by_hour(tree: Tree) -> None:
    tree.add(TRADES, trades(range(10, 20)) + trades(range(500, 505), ticker=1))
    tree.add(TRADES, trades(range(20, 25), hour=1))
    tree.add(BBO, [{"bid_price": np.nan, "ask_price": 2.0, "update_id": 7}])
    report = tree.verify()
    assert (report.findings, report.exit_code, report.missing, report.explained) == ([], 0, 0, 0)
    assert (report.files, report.rows) == (3, 21)
    lines = [(h.feed, h.connector, h.ticker, h.hour, h.rows, h.first_id, h.last_id) for h in report.hours]
    assert lines == [
        ("bbo", "conn", "BTCUSDT", "2026-03-01T12", 1, 0, 0),
        ("trades", "conn", "BTCUSDT", "2026-03-01T12", 10, 10, 19),
        ("trades", "conn", "BTCUSDT", "2026-03-01T13", 5, 20, 24),
        ("trades", "conn", "ETHUSDT", "2026-03-01T12", 5, 500, 504),
    ]
    told = json.loads(json.dumps(report.as_dict()))
    assert told["exit_code"] == 0
    assert told["hours"][1]["first_id"] == 10


def test_missing_trades_are_found_and_belong_to_the_hour_behind_the_hole(tree: Tree) -> None:
    tree.add(TRADES, trades(range(10)) + trades(range(13, 20), hour=2))
    report = tree.verify()
    assert (report.exit_code, report.missing, report.explained) == (1, 3, 0)
    assert "3 of the trades 10 to 12 are missing" in report.findings[0]
    assert [(h.hour[-2:], h.missing) for h in report.hours] == [("12", 0), ("14", 3)]


def test_what_the_ledger_names_is_explained_and_only_that(tree: Tree) -> None:
    tree.add(TRADES, trades([*range(10), *range(20, 30), *range(40, 50)]))
    tree.add(GAPS, [gap(10, 14), gap(13, 17), gap(30, 39), gap(10, 19, feed="bbo"), gap(18, 19, ticker=1)])
    report = tree.verify()
    assert (report.missing, report.explained) == (2, 18)
    assert len(report.findings) == 1
    assert "2 of the trades 10 to 19" in report.findings[0]


def test_a_later_row_of_the_ledger_replaces_an_earlier_one(tree: Tree) -> None:
    tree.add(TRADES, trades([*range(10), *range(20, 30)]))
    tree.add(GAPS, [gap(10, 19)])
    assert tree.verify().exit_code == 0
    tree.add(GAPS, [gap(10, 19, repaired=1)])
    report = tree.verify()
    assert report.missing == 10
    assert "though the ledger says repaired" in report.findings[0]
    tree.add(TRADES, trades(range(10, 20), flags=int(Flag.REPAIRED | Flag.LAST)))  # they come behind the hole
    assert tree.verify().findings == []


def test_a_hole_without_ids_is_explained_by_its_time(tree: Tree) -> None:
    tree.add(TRADES, trades([*range(10), *range(20, 30), *range(40, 50)]))
    tree.add(GAPS, [gap(-1, -1, from_time=NOON_US + 9 * SECOND_US, to_time=NOON_US + 20 * SECOND_US)])
    report = tree.verify()
    assert (report.missing, report.explained) == (10, 10)
    assert "30 to 39" in report.findings[0]


def test_trades_twice_are_found_within_a_file_and_over_files(tree: Tree) -> None:
    tree.add(TRADES, trades([1, 2, 2, 3]))
    tree.add(TRADES, trades([3, 4]))
    report = tree.verify()
    assert report.findings == ["BINANCE_SPOT conn trades BTCUSDT: 2 trades twice"]


def test_two_connectors_may_record_the_same_trades(tree: Tree) -> None:
    for connector in ("leg-a", "leg-b"):
        tree.add(TRADES, trades(range(10)), connector=connector)
    assert tree.verify().findings == []


@pytest.mark.parametrize("other", ["leg-b", "leg-a-2"])
def test_what_another_connector_says_of_its_hole_explains_nothing(tree: Tree, other: str) -> None:
    """Both missed 5 to 7, one of them silently."""
    for connector in ("leg-a", other):
        tree.add(TRADES, trades([*range(5), *range(8, 12)]), connector=connector)
    tree.add(GAPS, [gap(5, 7)], connector="leg-a")
    report = tree.verify()
    assert (report.exit_code, report.missing, report.explained) == (1, 3, 3)
    (finding,) = report.findings
    assert finding.startswith(f"BINANCE_SPOT {other} trades BTCUSDT")
    assert "3 of the trades 5 to 7 are missing" in finding
    tree.add(GAPS, [gap(5, 7)], connector=other)
    assert tree.verify().findings == []


def test_what_another_connector_repaired_says_nothing_of_a_hole(tree: Tree) -> None:
    """The ledger of each is right: one still has the hole, the other one repaired its own later."""
    tree.add(TRADES, trades([*range(5), *range(8, 12)]), connector="leg-a")
    tree.add(TRADES, trades(range(12)), connector="leg-b")
    tree.add(GAPS, [gap(5, 7)], connector="leg-a")
    tree.add(GAPS, [gap(5, 7), gap(5, 7, repaired=1, rcv_timestamp=NOON_US + SECOND_US)], connector="leg-b")
    report = tree.verify()
    assert (report.findings, report.missing, report.explained) == ([], 0, 3)


def test_another_connector_does_not_say_why_a_book_was_resynced(tree: Tree) -> None:
    for connector in ("leg-a", "leg-b"):
        tree.add(ORDERBOOK_L2, [*book(3), *book(9, int(Flag.RESYNCED), snapshot=True)], connector=connector)
    tree.add(GAPS, [gap(4, 9, feed="orderbook_l2")], connector="leg-a")
    (finding,) = tree.verify().findings
    assert "leg-b" in finding
    assert "resynced at update 9 and the ledger does not say why" in finding


# A ticker that went from one connection of a connector to another


def test_trades_between_two_connections_of_a_connector_are_missed(tree: Tree) -> None:
    """Also when it came back, and whichever of them found the hole."""
    tree.add(TRADES, trades([*range(10), *range(20, 25)]), connector="conn.1")
    tree.add(TRADES, trades(range(13, 20)), connector="conn.2", epoch=2)
    report = tree.verify()
    assert (report.exit_code, report.missing) == (1, 3)
    (finding,) = report.findings
    assert finding.startswith("BINANCE_SPOT conn.2 trades BTCUSDT")
    assert "3 of the trades 10 to 12 are missing" in finding
    assert [(h.connector, h.missing) for h in report.hours] == [("conn.1", 0), ("conn.2", 3)]
    for process in ("conn.1", "conn.2"):
        tree.add(GAPS, [gap(10, 12)], connector=process)
        report = tree.verify()
        assert (report.findings, report.missing, report.explained) == ([], 0, 3)
    tree.add(GAPS, [gap(10, 12, repaired=1)], connector="conn.2")
    assert "though the ledger says repaired" in tree.verify().findings[0]
    tree.add(TRADES, trades(range(10, 13), flags=int(Flag.REPAIRED | Flag.LAST)), connector="conn.2", epoch=2)
    assert tree.verify().findings == []


def test_trades_that_two_connections_of_a_connector_have_are_there_twice(tree: Tree) -> None:
    tree.add(TRADES, trades(range(10)), connector="conn.1")
    tree.add(TRADES, trades(range(8, 15)), connector="conn.2")
    assert tree.verify().findings == ["BINANCE_SPOT conn trades BTCUSDT: 2 trades twice"]


def test_a_name_with_a_number_that_is_no_connection_is_a_connector_of_its_own(tree: Tree) -> None:
    for connector in ("conn", "conn-2", "conn2", "other.1"):
        tree.add(TRADES, trades(range(10)), connector=connector)
    assert tree.verify().findings == []


@pytest.mark.parametrize(
    ("process", "epoch", "first", "explained"),
    [
        ("conn.1", 1, 15, True),  # behind its last row there, in the life of that row
        ("conn.2", 2, 0, True),  # before its first row here
        ("conn.1", 1, 0, False),
        ("conn.2", 2, 20, False),
        ("conn.1", 3, 15, False),  # in lives of which neither row is
        ("conn.2", 1, 0, False),
        ("conn.3", 1, 15, False),
    ],
)
def test_rows_that_the_writer_lost_where_a_ticker_moved_explain_the_hole(
    tree: Tree, process: str, epoch: int, first: int, explained: bool
) -> None:
    tree.add(TRADES, trades(range(10)), connector="conn.1", first=5)
    tree.add(TRADES, trades(range(13, 20)), connector="conn.2", epoch=2, first=3)
    tree.add(GAPS, [gap(first, first + 2)], connector=f"{process}~trades", epoch=epoch)
    report = tree.verify()
    assert (report.missing, report.explained) == ((0, 3) if explained else (3, 0))


def test_trades_without_a_counter_are_counted_by_row(tree: Tree) -> None:
    tree.add(TRADES, trades([-1, -1, -1], timestamp=NOON_US))
    tree.add(TRADES, [*trades([7, 8], ticker=1), *trades([-1], ticker=1, timestamp=NOON_US)])
    report = tree.verify()
    assert report.findings == []
    assert [(h.ticker, h.rows, h.first_id, h.last_id) for h in report.hours] == [
        ("BTCUSDT", 3, 0, 2),
        ("ETHUSDT", 3, 7, 8),
    ]


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 60), max_size=8), max_size=12))
def test_spans_of_counters_are_those_of_a_plain_set(portions: list[list[int]]) -> None:
    trades_, seen, twice = _Trades(), set(), 0
    for portion in portions:
        for n in portion:
            trades_.add(_Span(n, n, (1, n), (1, n), n, n))
            twice += n in seen
            seen.add(n)
    assert {n for span in trades_.spans for n in range(span.first, span.last + 1)} == seen
    assert all(a.last + 1 < b.first for a, b in zip(trades_.spans, trades_.spans[1:], strict=False))
    assert trades_.twice == twice
    assert all(
        (s.first_at, s.last_at, s.first_us, s.last_us) == ((1, s.first), (1, s.last), s.first, s.last)
        for s in trades_.spans
    )


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))), st.integers(0, 30), st.integers(0, 30))
def test_covered_counts_as_a_plain_set_does(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    wanted = {n for low, high in ranges for n in range(low, high + 1)} & set(range(first, last + 1))
    assert _covered(ranges, first, last) == len(wanted)


# The line of rows


def test_a_missing_file_is_found_and_what_the_writer_lost_is_explained(tree: Tree) -> None:
    tree.add(BBO, [{}] * 5)
    tree.add(BBO, [{}] * 5, first=15)
    report = tree.verify()
    assert report.missing == 10
    assert "10 of the rows with seq_id 5 to 14 before it are missing" in report.findings[0]
    tree.add(
        GAPS, [gap(5, 11, feed="bbo", cause=b"lapped"), gap(12, 14, feed="bbo", cause=b"damaged")], connector="conn~bbo"
    )
    report = tree.verify()
    assert (report.findings, report.missing, report.explained) == ([], 0, 10)


def test_rows_lost_at_the_end_of_a_life_are_found(tree: Tree) -> None:
    tree.add(BBO, [{}] * 5)
    tree.add(BBO, [{}] * 5, epoch=2, first=7)
    assert tree.verify().missing == 2
    tree.add(GAPS, [gap(5, 6, feed="bbo")], connector="conn~bbo", epoch=1)
    assert tree.verify().findings == []


def test_a_new_ring_starts_a_line_of_its_own(tree: Tree) -> None:
    tree.add(BBO, [{}] * 5)
    tree.add(BBO, [{}] * 5, epoch=9, ring=9, first=100)
    tree.add(BBO, [{}] * 5, epoch=12, ring=9, first=105)
    assert tree.verify().findings == []


def test_what_the_writer_lost_explains_the_trades_and_messages_that_went_with_it(tree: Tree) -> None:
    tree.add(TRADES, trades(range(10)))
    tree.add(TRADES, trades(range(15, 20)), first=13)
    tree.add(ORDERBOOK_L2, book(1)[:1])
    tree.add(ORDERBOOK_L2, book(5), first=4)
    tree.add(ORDERBOOK_L2, book(9, int(Flag.RESYNCED), snapshot=True), first=10)
    tree.add(GAPS, [gap(10, 12)], connector="conn~trades")
    tree.add(GAPS, [gap(1, 3, feed="orderbook_l2"), gap(6, 9, feed="orderbook_l2")], connector="conn~orderbook_l2")
    report = tree.verify()
    assert (report.findings, report.missing) == ([], 0)
    assert report.explained == 3 + 5 + 7


def test_what_the_writer_lost_elsewhere_explains_nothing(tree: Tree) -> None:
    tree.add(TRADES, trades([*range(10), *range(15, 20)]))
    tree.add(TRADES, trades(range(20, 25)), first=18)
    tree.add(GAPS, [gap(15, 17)], connector="conn~trades")
    tree.add(GAPS, [gap(9, 10)], connector="other~trades")
    tree.add(GAPS, [gap(9, 10)], connector="conn~trades", epoch=7)
    report = tree.verify()
    assert (report.missing, len(report.findings)) == (5, 1)
    assert "5 of the trades 10 to 14" in report.findings[0]


def test_the_same_rows_in_two_files_are_found(tree: Tree) -> None:
    tree.add(BBO, [{}] * 5)
    tree.add(BBO, [{}] * 3, first=2)
    report = tree.verify()
    assert len(report.findings) == 1
    assert "its rows are in conn-1-0-4.parquet too" in report.findings[0]


# Files


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "name of a column"])
def test_a_damaged_file_is_found(tree: Tree, damage: str) -> None:
    tree.add(TRADES, trades(range(100)))
    path = tree.add(TRADES, trades(range(100, 200)))
    tree.add(TRADES, trades(range(200, 300)))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        column = pq.read_metadata(path).row_group(0).column(0)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "name of a column":  # no text any more
        path.write_bytes(content.replace(b"rcv_timestamp", b"rcv\xfftimestamp"))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        pq.write_table(pa.table({"seq_id": list(range(100, 200))}), path)
    report = tree.verify()
    assert report.exit_code == 1
    assert any(str(path) in finding for finding in report.findings)
    assert report.missing == 100  # its trades


def test_a_footer_by_which_readers_would_skip_rows_is_found(tree: Tree) -> None:
    path = tree.add(TRADES, trades(range(100, 200)))
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    last, less = struct.pack("<q", 199), struct.pack("<q", 198)  # of trade_seq
    assert last in content[footer:]
    path.write_bytes(content[:footer] + content[footer:].replace(last, less))
    assert len(ds.dataset(path).to_table(filter=ds.field("trade_seq") == 199)) == 0, "it is there"
    (finding,) = [text for text in tree.verify().findings if "its footer says" in text]
    assert f"{path}: its footer says (100, 198, 0) of trade_seq" in finding


@pytest.mark.parametrize("field", ["connector", "epoch", "first", "date", "exchange", "feed"])
def test_a_file_under_a_wrong_name_is_found(tree: Tree, field: str) -> None:
    path = tree.add(TRADES, trades(range(10)))
    file = StoredFile.parse(tree.out, path)
    assert file is not None
    wrong: dict[str, object] = {
        "connector": "other", "epoch": 2, "first": 1, "date": "2026-03-02", "exchange": "OKX", "feed": "liquidations",
    }  # fmt: skip
    moved = replace(file, **{field: wrong[field]}, **({"last": 10} if field == "first" else {}))
    moved.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, moved.path)
    report = tree.verify()
    assert any(str(moved.path) in finding and "expected" in finding for finding in report.findings)


def test_rows_of_another_day_or_with_impossible_numbers_are_found(tree: Tree) -> None:
    path = tree.add(TRADES, [
        *trades([1], price=np.inf), *trades([2], qty=-1.0), *trades([3], price=np.nan),
        *trades([4], timestamp=1), *trades([5], rcv_timestamp=NOON_US + DAY_US),
    ])  # fmt: skip
    assert sorted(finding.removeprefix(f"{path}: ") for finding in tree.verify().findings) == [
        "1 rows whose qty is negative",
        "1 rows whose rcv_timestamp is not of 2026-03-01",
        "1 rows whose timestamp cannot be",
        "2 rows whose price is not a finite number",
    ]


def test_a_foreign_file_in_the_tree_is_found(tree: Tree) -> None:
    path = tree.add(TRADES, trades([1]))
    shutil.copy(path, path.with_name("copy of data.parquet"))
    (finding,) = tree.verify().findings
    assert "copy of data.parquet: is no file of this tree" in finding


def test_no_tree_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such directory"):
        verify(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="holds no stored tables"):
        verify(tmp_path)


def test_only_the_wanted_feeds_are_read(tree: Tree) -> None:
    tree.add(TRADES, trades([1, 3]))
    tree.add(BBO, [{}])
    report = verify(tree.out, feeds=("b*",))
    assert report.findings == []
    assert [h.feed for h in report.hours] == ["bbo"]


# Books


def test_a_book_that_runs_through_is_proven(tree: Tree) -> None:
    tree.add(
        ORDERBOOK_L2, [*book(10, snapshot=True), *book(11), *book(3, ticker=1, snapshot=True), *book(11, levels=1)]
    )
    tree.add(
        ORDERBOOK_L2, [*book(12), *book(4, ticker=1), *book(20, int(Flag.BOOK_INVALID | Flag.UNPROVEN)), *book(13)]
    )
    report = tree.verify()
    assert report.findings == []
    assert [(h.ticker, h.rows, h.first_id, h.last_id) for h in report.hours] == [
        ("BTCUSDT", 11, 10, 20),
        ("ETHUSDT", 4, 3, 4),
    ]


def test_a_single_row_between_two_files_is_missed_where_no_id_of_the_exchange_tells(tree: Tree) -> None:
    tree.add(BBO, [{}] * 5)
    tree.add(BBO, [{}] * 5, first=6)
    report = tree.verify()
    assert (report.exit_code, report.missing) == (1, 1)
    assert "1 of the rows with seq_id 5 to 5 before it are missing" in report.findings[0]


def test_a_message_may_be_cut_by_the_end_of_a_file(tree: Tree) -> None:
    message = book(11, levels=5)
    tree.add(ORDERBOOK_L2, [*book(10), *message[:3]])
    tree.add(ORDERBOOK_L2, message[3:])
    assert tree.verify().findings == []


@pytest.mark.parametrize("where", ["inside", "between"])
def test_a_message_without_its_last_row_is_found(tree: Tree, where: str) -> None:
    if where == "inside":
        tree.add(ORDERBOOK_L2, [*book(10), *book(11)[:-1], *book(12)])
    else:
        tree.add(ORDERBOOK_L2, [*book(10), *book(11)[:-1]])
        tree.add(ORDERBOOK_L2, book(12))
    (finding,) = tree.verify().findings
    assert (
        ("BTCUSDT 11 at seq_id 2" in finding) if where == "inside" else ("before seq_id 3 has no last row" in finding)
    )


@pytest.mark.parametrize("two_files", [False, True])
def test_an_update_id_that_goes_back_is_found(tree: Tree, two_files: bool) -> None:
    first, second = [*book(10), *book(4, ticker=1)], [*book(9), *book(5, ticker=1)]
    if two_files:
        tree.add(ORDERBOOK_L2, first)
        tree.add(ORDERBOOK_L2, second)
    else:
        tree.add(ORDERBOOK_L2, first + second)
    (finding,) = tree.verify().findings
    assert "BTCUSDT 9 behind 10" in finding


@pytest.mark.parametrize("two_files", [False, True])
def test_a_resync_must_be_in_the_ledger(tree: Tree, two_files: bool) -> None:
    first, second = [*book(10, snapshot=True), *book(11)], [*book(20, int(Flag.RESYNCED), snapshot=True), *book(21)]
    if two_files:
        tree.add(ORDERBOOK_L2, first)
        tree.add(ORDERBOOK_L2, second)
    else:
        tree.add(ORDERBOOK_L2, first + second)
    (finding,) = tree.verify().findings
    assert "BTCUSDT was resynced at update 20" in finding
    tree.add(
        GAPS,
        [gap(12, 15, feed="orderbook_l2", ticker=1), gap(25, 26, feed="orderbook_l2"), gap(3, 5, feed="orderbook_l2")],
    )
    assert len(tree.verify().findings) == 1  # another ticker's, and of other times
    tree.add(GAPS, [gap(12, 15, feed="orderbook_l2")])
    assert len(tree.verify().findings) == 1, "where the hole was seen, but not how far it went"
    tree.add(GAPS, [gap(16, 20, feed="orderbook_l2")])
    assert tree.verify().findings == []
    tree.add(GAPS, [gap(16, 20, feed="orderbook_l2", repaired=1, rcv_timestamp=NOON_US + SECOND_US)])
    assert len(tree.verify().findings) == 1, "nothing is missing, it says, and yet there is a new snapshot"


@pytest.mark.parametrize("two_files", [False, True])
def test_rows_without_a_book_may_be_what_reaches_the_snapshot(tree: Tree, two_files: bool) -> None:
    doubted = int(Flag.UNPROVEN | Flag.BOOK_INVALID)
    first = [*book(10, snapshot=True), *book(5, ticker=1), *book(12, doubted), *book(13, doubted)]
    second = [*book(6, ticker=1), *book(13, int(Flag.RESYNCED), snapshot=True)]
    for rows in [first, second] if two_files else [first + second]:
        tree.add(ORDERBOOK_L2, rows)
    assert len(tree.verify().findings) == 1
    tree.add(GAPS, [gap(11, 11, feed="orderbook_l2")])
    assert tree.verify().findings == []
    tree.add(ORDERBOOK_L2, [*book(14), *book(16, int(Flag.RESYNCED), snapshot=True)])
    assert len(tree.verify().findings) == 1, "these say nothing of a later resync"


def test_a_book_whose_ids_begin_anew_is_told_by_the_first_of_them(tree: Tree) -> None:
    tree.add(ORDERBOOK_L2, [*book(99, snapshot=True), *book(1, int(Flag.RESYNCED), snapshot=True), *book(2)])
    assert len(tree.verify().findings) == 1
    tree.add(GAPS, [gap(1, 1, feed="orderbook_l2", cause=b"snapshot")])
    assert tree.verify().findings == []


def test_a_resync_that_missed_nothing_needs_no_ledger(tree: Tree) -> None:
    tree.add(ORDERBOOK_L2, [*book(10, snapshot=True), *book(10, int(Flag.RESYNCED), snapshot=True)])
    assert tree.verify().findings == []


def test_a_deleted_level_with_a_quantity_is_found(tree: Tree) -> None:
    rows = book(10)
    rows[0]["action"] = int(Action.DELETE)
    rows[1]["qty"] = 0.0
    tree.add(ORDERBOOK_L2, rows)
    (finding,) = tree.verify().findings
    assert "2 rows whose DELETE and a quantity of 0 do not go together" in finding


def test_findings_are_all_counted_and_a_thousand_are_kept() -> None:
    report = Report()
    for i in range(1500):
        report.find(str(i))
    assert (report.findings_count, len(report.findings)) == (1500, 1000)


def test_every_feed_can_be_verified(tree: Tree) -> None:
    for feed in FEEDS.values():
        if feed is not GAPS:
            tree.add(feed, [{"action": 1, "qty": 1.0} if feed is ORDERBOOK_L2 else {}] * 3)
    assert [f for f in tree.verify().findings if "twice" not in f and "no last row" not in f] == []
