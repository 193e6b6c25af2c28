"""The proof itself: a good run agrees with the ledger, and every way of spoiling its tables is found."""

from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fleet import TICKERS, Fleet

from tools.proof import prove

EXCHANGES = tuple(TICKERS)


@pytest.fixture(scope="module", params=EXCHANGES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A short run without any fault."""
    with Fleet(tmp_path_factory.mktemp(request.param), request.param, rate=100) as fleet:
        fleet.start()
        fleet.wait_more("trades", 100)
        if "candles" in fleet.feeds:
            fleet.wait_more("candles", 2)
        fleet.clean = fleet.finish()  # type: ignore[attr-defined]
        yield fleet


def test_a_run_without_faults_agrees_to_the_last_row(run: Fleet) -> None:
    proof = run.clean  # type: ignore[attr-defined]
    assert proof.ok, str(proof)
    assert proof.books_checked > 10
    assert proof.compared.keys() == set(run.feeds)
    assert all(proof.compared.values()), str(proof)
    assert not proof.gaps
    assert all(counts.explained == 0 for counts in proof.feeds.values())


def spoil(run: Fleet, out: Path, feed: str, change: Callable[[pa.Table], pa.Table]) -> list[str]:
    """What the proof says of a copy of the tables in which one file of a feed was changed."""
    copytree(run.data, out)
    path = max(out.glob(f"{feed}/*/date=*/*.parquet"), key=lambda path: path.stat().st_size)
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table), path)
    proof = prove(run.sim.ledger(), out, feeds=run.feeds)
    assert proof.ok is not bool(proof.differences)
    return proof.differences


def without(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def twice(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table, table.slice(row, 1)])


def changed(column: str, row: int = 3) -> Callable[[pa.Table], pa.Table]:
    """One number of one row is a little different."""

    def change(table: pa.Table) -> pa.Table:
        values, kind = table[column].to_pylist(), table[column].type
        if pa.types.is_timestamp(kind):
            values = table[column].cast(pa.int64()).to_pylist()
        values[row] = {"BID": "ASK", "NEW": "UPDATE", "UPDATE": "NEW", "DELETE": "NEW"}.get(values[row]) or (
            values[row] + "0" if isinstance(values[row], str) else not values[row] if isinstance(values[row], bool)
            else -values[row] if column == "side" else values[row] + 1
        )  # fmt: skip
        array = pa.array(values, pa.int64() if pa.types.is_timestamp(kind) else None)
        if pa.types.is_dictionary(kind):
            array = array.dictionary_encode()
        return table.set_column(table.column_names.index(column), table.schema.field(column), pc.cast(array, kind))

    return change


SPOILT = {
    "trade missing": ("trades", without(3)),
    "trade twice": ("trades", twice(3)),
    **{f"trade {c}": ("trades", changed(c)) for c in ("price", "qty", "side", "timestamp", "trade_id", "trade_seq")},
    "level missing": ("orderbook_l2", without(-20)),
    **{
        f"level {c}": ("orderbook_l2", changed(c)) for c in ("price", "qty", "side", "action", "timestamp", "update_id")
    },
    "quote missing": ("bbo", without(3)),
    "quote twice": ("bbo", twice(3)),
    **{f"quote {c}": ("bbo", changed(c)) for c in ("bid_price", "bid_qty", "ask_price", "ask_qty")},
    "ticker missing": ("tickers", without(1)),
    **{f"ticker {c}": ("tickers", changed(c, 1)) for c in ("last", "high_24h", "bid_price", "timestamp")},
    "candle close": ("candles", changed("close", 0)),
    "candle volume": ("candles", changed("volume", 0)),
    "seq_id": ("bbo", changed("seq_id")),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_tables_are_found(run: Fleet, tmp_path: Path, what: str) -> None:
    feed, change = SPOILT[what]
    if feed not in run.feeds:
        pytest.skip(f"one connection of {run.exchange} does not bring {feed}")
    if what == "trade trade_seq" and all(row["trade_seq"] is None for row in run.rows("trades")):
        pytest.skip(f"{run.exchange} merges trades, so rows have no counter")
    if what == "level action":  # rows of a snapshot are all NEW, so take one that is not
        found = spoil(run, tmp_path / "out", feed, lambda t: changed("action", t.num_rows - 3)(t))
    elif what == "level timestamp":  # a snapshot over HTTP has no time to compare
        found = spoil(run, tmp_path / "out", feed, lambda t: changed("timestamp", _first_of_last_message(t))(t))
    elif what == "level missing":
        found = spoil(run, tmp_path / "out", feed, lambda t: without(t.num_rows - 5)(t))
    else:
        found = spoil(run, tmp_path / "out", feed, change)
    assert any(text.startswith(f"{feed}: ") for text in found), found


def _first_of_last_message(table: pa.Table) -> int:
    ids = table["update_id"].to_pylist()
    tickers = table["ticker"].to_pylist()
    at = len(ids) - 1
    while (ids[at - 1], tickers[at - 1]) == (ids[-1], tickers[-1]):
        at -= 1
    return at


def test_rings_that_differ_from_the_tables_are_found(run: Fleet, tmp_path: Path) -> None:
    copytree(run.data, tmp_path / "out")
    path = max(tmp_path.glob("out/trades/*/date=*/*.parquet"), key=lambda path: path.stat().st_size)
    pq.write_table(changed("packet_id")(pq.read_table(path, partitioning=None)), path)
    proof = prove(run.sim.ledger(), tmp_path / "out", run.rings, feeds=run.feeds)
    assert [text for text in proof.differences if "packet_id not as in the ring" in text], str(proof)


def test_rows_that_never_reached_the_tables_are_found(run: Fleet, tmp_path: Path) -> None:
    copytree(run.data, tmp_path / "out")
    last = max(tmp_path.glob("out/bbo/*/date=*/*.parquet"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
    table = pq.read_table(last, partitioning=None)
    pq.write_table(table.slice(0, len(table) // 2), last)  # a slow run may have no other file
    proof = prove(run.sim.ledger(), tmp_path / "out", run.rings, feeds=run.feeds)
    assert [text for text in proof.differences if "rows published" in text], str(proof)
    assert prove(run.sim.ledger(), tmp_path / "out", feeds=run.feeds).ok, "a table that ends early is no difference"
    assert not prove(run.sim.ledger(), tmp_path / "out", feeds=run.feeds, to_the_end=True).ok


def test_an_empty_directory_proves_nothing(run: Fleet, tmp_path: Path) -> None:
    assert not prove(run.sim.ledger(), tmp_path).ok


def test_the_ledger_of_another_venue_is_refused(run: Fleet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not of gmx"):
        prove(run.sim.ledger(), tmp_path, None, "gmx")


def test_of_several_connectors_that_record_the_same_each_is_proven_by_itself(run: Fleet, tmp_path: Path) -> None:
    """The other one's connection has a number of its own; one of its trades is missing at last."""
    copytree(run.data, tmp_path / "out")
    paths = [p for p in tmp_path.glob("out/*/*/date=*/*.parquet") if p.name.startswith(f"{run.NAME}-")]
    copies = [path.with_name(path.name.replace(run.NAME, "other.1", 1)) for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert len(copies) >= len(run.feeds)
    assert not prove(run.sim.ledger(), tmp_path / "out", feeds=run.feeds).ok, "a ticker has two connectors"
    for connector in (run.NAME, "other"):
        proof = prove(run.sim.ledger(), tmp_path / "out", connector=connector, feeds=run.feeds)
        assert proof.ok, str(proof)
        assert all(proof.compared.values())
    spoilt = max((copy for copy in copies if copy.parts[-4] == "trades"), key=lambda copy: copy.stat().st_size)
    pq.write_table(without(3)(pq.read_table(spoilt, partitioning=None)), spoilt)
    assert not prove(run.sim.ledger(), tmp_path / "out", connector="other", feeds=run.feeds).ok
    assert prove(run.sim.ledger(), tmp_path / "out", connector=run.NAME, feeds=run.feeds).ok
