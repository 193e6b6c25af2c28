"""Books while a second connection begins with a snapshot that is passed over, as the first one still delivers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_decode_hostile import MS, Probe

from mdcollector.continuity import BROKEN, LIVE

Frame = Callable[[int, str], dict[str, Any]]


def deribit(change_id: int, kind: str) -> dict[str, Any]:
    data = {"timestamp": MS, "type": kind, "instrument_name": "AB", "change_id": change_id,
            "prev_change_id": change_id - 1, "bids": [["new", 1, change_id]], "asks": []}  # fmt: skip
    params = {"channel": "book.AB.100ms", "data": data}
    return {"jsonrpc": "2.0", "method": "subscription", "params": params}


def bybit(u: int, kind: str) -> dict[str, Any]:
    data = {"s": "AB", "b": [["1", str(u)]], "a": [], "u": u, "seq": u}
    return {"topic": "orderbook.200.AB", "type": "delta" if kind == "change" else kind, "ts": MS, "data": data}


def okx(seq: int, kind: str) -> dict[str, Any]:
    data = {"bids": [["1", str(seq), "0", "1"]], "asks": [], "ts": str(MS), "checksum": 0, "seqId": seq,
            "prevSeqId": -1 if kind == "snapshot" else seq - 1}  # fmt: skip
    action = "update" if kind == "change" else kind
    return {"arg": {"channel": "books", "instId": "AB"}, "action": action, "data": [data]}


@pytest.fixture(params=[("deribit", deribit), ("bybit_linear", bybit), ("okx", okx)], ids=lambda param: param[0])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Probe, Frame]]:
    """A book that is live at 100, and a second connection that began with a snapshot of 105."""
    name, frame = request.param
    one = Probe(name, tmp_path, ("AB",))
    assert one.feed(frame(100, "snapshot"))
    one.venue.overlap_begins()
    assert one.feed(frame(105, "snapshot"))
    yield one, frame
    one.emit.close()


def end(one: Probe) -> None:
    one.venue.overlapping = False
    one.venue.older_left()


def test_what_the_older_connection_did_not_bring_any_more_is_told_at_once(both: tuple[Probe, Frame]) -> None:
    one, frame = both
    book = one.venue.books["AB"]
    assert one.feed(frame(101, "change"))
    assert (book.state, book.last_id) == (LIVE, 101)
    end(one)
    assert book.state == BROKEN
    assert one.gaps() == [("orderbook_l2", 102, 105, "reconnect", False)]
    one.venue.tick(one.now_ns + 60_000_000_000)
    assert [want for want in one.venue.wants if "subscribe" in str(want)], "a new snapshot is asked for"
    assert one.feed(frame(106, "change"))
    assert one.feed(frame(106, "snapshot"))
    assert one.feed(frame(107, "change"))
    assert book.book() == ({1.0: 107.0}, {})
    assert one.gaps()[1:] == [("orderbook_l2", 106, 106, "reconnect", False)], "it is in the snapshot, and in no row"
    one.sane()


@pytest.mark.parametrize("reached", [105, 107])
def test_an_older_connection_that_came_so_far_costs_nothing(both: tuple[Probe, Frame], reached: int) -> None:
    one, frame = both
    for i in range(101, reached + 1):
        assert one.feed(frame(i, "change"))
    end(one)
    assert one.feed(frame(reached + 1, "change"))
    assert (one.venue.books["AB"].state, one.venue.books["AB"].last_id) == (LIVE, reached + 1)
    assert one.gaps() == []
    one.sane()


def test_the_snapshot_of_a_connection_that_failed_is_forgotten(both: tuple[Probe, Frame]) -> None:
    """The older one went on by itself; what counts is the snapshot of the next one."""
    one, _ = both
    one.venue.overlapping = False
    one.venue.overlap_begins()
    end(one)
    assert one.venue.books["AB"].state == LIVE
    assert one.gaps() == []
