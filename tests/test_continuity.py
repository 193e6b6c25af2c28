"""Book and trade continuity against plain models: random streams with losses, duplicates, swaps and late snapshots.

The truth is a list of messages made first; a hostile delivery of it is played into `BookSync` or `TradeSync`. What is
published must be the truth, and the ledger must be what a plain walk over the delivery says, id by id.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdcollector import continuity
from mdcollector.continuity import BROKEN, HOLE, LIVE, NEXT, OLD, WAITING, BookSync, TradeSync
from mdcollector.emit import Emit
from mdcollector.errors import FrameError
from mdcollector.exchanges import binance, deribit
from mdcollector.records import Exchange, Flag

NOW_NS = 1_796_083_200_000_000_000
T0 = NOW_NS // 1000
LAST, SNAPSHOT, RESYNCED, INVALID, REPAIRED, UNPROVEN = (
    int(f) for f in (Flag.LAST, Flag.SNAPSHOT, Flag.RESYNCED, Flag.BOOK_INVALID, Flag.REPAIRED, Flag.UNPROVEN)
)
CAPACITIES = {"trades": 4096, "orderbook_l2": 16384, "gaps": 4096}
MANY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@contextmanager
def emitter(folder: str | None = None) -> Iterator[Emit]:
    with tempfile.TemporaryDirectory() as scratch:
        emit = Emit(Path(folder or scratch), "t", Exchange.DERIBIT, ("trades", "orderbook_l2"), capacities=CAPACITIES,
                    semaphore=False, clock=lambda: 0)  # fmt: skip
        emit.packet(NOW_NS, 0)
        try:
            yield emit
        finally:
            emit.close()


def ledger(emit: Emit) -> list[tuple[int, int, str, bool]]:
    rows = emit.rings["gaps"].recent_rows(0)
    names = ("first_id", "last_id", "cause", "repaired")
    return [(a, b, c.decode(), bool(r)) for a, b, c, r in zip(*(rows[n].tolist() for n in names), strict=True)]


class Message(NamedTuple):
    """One change of a book, as both kinds of venue number it."""

    first: int
    last: int
    prev: int
    bids: tuple[tuple[float, float], ...]
    asks: tuple[tuple[float, float], ...]


class Rig:
    """A book under test and the wants it had."""

    def __init__(self, emit: Emit, chained: bool, published_id: int = -1) -> None:
        self.emit, self.wanted, self.time = emit, 0, T0
        self.chained = chained  # by predecessor (Deribit), else by ranges (Binance)
        follows = deribit.follows if chained else binance.follows
        self.book = BookSync(emit, emit.instrument("A"), follows, self._want, published_id)

    def _want(self, book: BookSync) -> None:
        assert book is self.book
        self.wanted += 1

    def _packet(self) -> int:
        self.time += 1000
        self.emit.packet(self.time * 1000, 0)
        return self.time

    def delta(self, m: Message) -> None:
        now = self._packet()
        self.book.delta(m.first, m.last, m.prev if self.chained else -1, now, m.bids, m.asks)

    def snapshot(self, last_id: int, book: "Books", in_band: bool = False) -> bool:
        return self.book.snapshot(
            last_id, self._packet(), tuple(book[0].items()), tuple(book[1].items()), in_band=in_band
        )

    def rows(self) -> list[dict[str, Any]]:
        rows = self.emit.rings["orderbook_l2"].recent_rows(0)
        return [dict(zip(rows.dtype.names, row, strict=True)) for row in rows.tolist()]


Books = tuple[dict[float, float], dict[float, float]]

# Prices of the two sides never meet, so that a wrong book cannot hide behind a crossed one.
_level = st.tuples(st.integers(0, 9), st.integers(0, 3))
_levels = st.tuples(
    st.lists(_level, max_size=4, unique_by=lambda x: x[0]), st.lists(_level, max_size=4, unique_by=lambda x: x[0])
)


@st.composite
def truths(draw: st.DrawFn, most: int = 25) -> list[Message]:
    """Messages without a hole; ids jump by up to 4."""
    last, messages = 0, []
    for bids, asks in draw(st.lists(_levels, min_size=1, max_size=most)):
        first, prev = last + 1, last
        last += draw(st.integers(1, 4))
        messages.append(
            Message(first, last, prev, tuple((float(p), float(q)) for p, q in bids),
                    tuple((float(p + 100), float(q)) for p, q in asks))
        )  # fmt: skip
    return messages


def states(messages: list[Message]) -> dict[int, Books]:
    """The book behind every id."""
    books: Books = {}, {}
    found: dict[int, Books] = {0: ({}, {})}
    for m in messages:
        for side, levels in zip(books, (m.bids, m.asks), strict=True):
            for price, qty in levels:
                side[price] = qty
                if not qty:
                    del side[price]
        found[m.last] = dict(books[0]), dict(books[1])
    return found


def readers_view(rows: list[dict[str, Any]], truth: dict[int, Books]) -> int:
    """Rebuild by the rule for readers; after each LAST that is not doubted the book is the true one. Returns its last id."""
    books: Books = {}, {}
    inside, update_id = False, -1
    for row in rows:
        if row["flags"] & SNAPSHOT and not inside:
            books = {}, {}
        inside = bool(row["flags"] & SNAPSHOT) and not row["flags"] & LAST
        if row["side"]:
            side = books[0] if row["side"] == 1 else books[1]
            known = row["price"] in side
            assert row["action"] == (3 if not row["qty"] else 2 if known and not row["flags"] & SNAPSHOT else 1) or (
                row["flags"] & INVALID
            )
            side[row["price"]] = row["qty"]
            if not row["qty"]:
                del side[row["price"]]
        if row["flags"] & LAST:
            update_id = row["update_id"]
            assert not row["flags"] & INVALID
            assert books == truth[update_id], f"after {update_id}"
    return update_id


# Books


@pytest.mark.parametrize("chained", [False, True])
@MANY
@given(messages=truths(), data=st.data())
def test_losses_and_late_snapshots(chained: bool, messages: list[Message], data: st.DataObject) -> None:
    """Messages are lost; snapshots come when they are wanted, some calls later, of any age. The ledger is exact."""
    truth = states(messages)
    ids = [0, *(m.last for m in messages)]
    with emitter() as emit:
        rig = Rig(emit, chained)
        applied: int | None = None  # the last id that the book contains
        waiting: list[Message] = []  # arrived and not applied, since the last good state
        gaps: list[tuple[int, int, str, bool]] = []
        stale = 0
        reached = -1  # while the book waits: the last id that is published or told
        for at, m in enumerate(messages):
            if not data.draw(st.booleans(), label="lost"):
                rig.delta(m)
                if applied is None or waiting:
                    waiting.append(m)
                elif m.last > applied:
                    if m.first > applied + 1:
                        reached = m.first - 1
                        gaps.append((applied + 1, reached, "sequence", False))
                        waiting.append(m)
                    else:
                        applied = m.last
            assert (rig.book.state == LIVE) == (applied is not None and not waiting)
            assert ledger(emit) == gaps
            if data.draw(st.integers(0, 2), label="answer") == 0 and rig.book.state != LIVE:
                age = data.draw(st.integers(0, at + 1), label="age")
                last_id = ids[age] if chained else data.draw(st.integers(ids[age], ids[at + 1]), label="id")
                of = max(i for i in ids if i <= last_id)
                newer = [w for w in waiting if w.last > last_id]
                taken = rig.snapshot(last_id, truth[of])
                if newer and newer[0].first > last_id + 1 and newer[0].prev != last_id:
                    stale += 1
                    if stale < continuity.STALE_SNAPSHOTS_MAX:
                        assert not taken, "older than what is held: steps 3 and F12"
                        continue
                    newer = []
                    gaps += [  # what is held is published as not proven, and what is missing in between is told
                        (a.last + 1, b.first - 1, "sequence", False)
                        for a, b in pairwise(waiting)
                        if b.first > a.last + 1
                    ]
                    reached = waiting[-1].last
                assert taken
                stale = 0
                if 0 <= reached < last_id:  # what the snapshot skips never came, or was held and is superseded
                    gaps.append((reached + 1, last_id, "sequence", False))
                elif applied is not None and last_id < applied:
                    gaps.append((last_id, last_id, "sequence", False))
                applied, waiting, reached = last_id, [], -1
                for w in newer:
                    if waiting:
                        waiting.append(w)
                    elif w.first > applied + 1:
                        reached = w.first - 1
                        gaps.append((applied + 1, reached, "sequence", False))
                        waiting.append(w)
                    else:
                        applied = w.last
                if last_id != of:  # a snapshot within a range: what follows brings the rest
                    break
        assert ledger(emit) == gaps
        if applied is not None and not waiting:
            known = max(i for i in ids if i <= applied)
            assert rig.book.book() == truth[known]
        rows = [row for row in rig.rows() if not row["flags"] & INVALID]
        known_truth = {i: truth[max(k for k in ids if k <= i)] for i in range(ids[-1] + 1)}
        readers_view(rows, known_truth)


@pytest.mark.parametrize("chained", [False, True])
@MANY
@given(messages=truths(), data=st.data())
def test_duplicates_and_swaps_lose_nothing(chained: bool, messages: list[Message], data: st.DataObject) -> None:
    """Every message arrives, some late by one or two places, some more than once: the same book, each row once."""
    truth = states(messages)
    order = sorted(range(len(messages)), key=lambda i: i + data.draw(st.sampled_from([0, 0, 0, 1.5, 2.5])))
    arrivals: list[Message] = []
    for i in order:
        arrivals += [messages[i]] * data.draw(st.sampled_from([1, 1, 1, 2]))
    with emitter() as emit:
        rig = Rig(emit, chained)
        assert rig.snapshot(0, ({}, {}))
        for m in arrivals:
            rig.delta(m)
        if rig.book.state == BROKEN:  # a second hole, or an order that no connection has: the snapshot heals it
            assert rig.wanted
            assert rig.snapshot(messages[-1].last, truth[messages[-1].last], in_band=True)
        assert rig.book.state == LIVE
        assert rig.book.book() == truth[messages[-1].last]
        final = readers_view(rig.rows(), truth)
        with_rows = [m.last for m in messages if m.bids or m.asks]
        assert not with_rows or final >= with_rows[-1]
        seen = [row["update_id"] for row in rig.rows() if row["flags"] & LAST and not row["flags"] & SNAPSHOT]
        assert seen == sorted(set(seen)), "in order, none twice"
        # Every hole that a late message healed is told once more with the very same ids.
        told = ledger(emit)
        assert {(a, b) for a, b, _, repaired in told if repaired} <= {
            (a, b) for a, b, _, repaired in told if not repaired
        }
        assert all(cause == ("reordered" if repaired else "sequence") for _, _, cause, repaired in told)


@pytest.mark.parametrize("chained", [False, True])
def test_missing_messages_that_come_late_are_one_repaired_hole_in_whatever_order(chained: bool) -> None:
    messages = [Message(i, i, i - 1, ((float(i), 1.0),), ()) for i in range(1, 7)]
    for arrival in ([1, 4, 2, 3, 5, 6], [1, 4, 3, 2, 5, 6], [1, 4, 5, 3, 2, 6], [1, 5, 2, 3, 6, 4]):
        with emitter() as emit:
            rig = Rig(emit, chained)
            rig.snapshot(0, ({}, {}))
            for i in arrival:
                rig.delta(messages[i - 1])
            last_missing = arrival[1] - 1
            assert ledger(emit) == [(2, last_missing, "sequence", False), (2, last_missing, "reordered", True)]
            assert rig.book.book() == states(messages)[6]
            assert [row["update_id"] for row in rig.rows() if not row["flags"] & SNAPSHOT] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("hole_end", [1_000, 10**15])
def test_what_is_held_is_not_looked_through_at_each_message(hole_end: int) -> None:
    """Nor behind an absurd id, when all that comes could belong into the hole."""
    asked = 0

    def follows(*ids: int) -> int:
        nonlocal asked
        asked += 1
        return deribit.follows(*ids)

    with emitter() as emit:
        book = BookSync(emit, emit.instrument("A"), follows, lambda _: None)
        book.snapshot(100, T0, ((1.0, 1.0),), ())
        book.delta(0, hole_end + 1, hole_end, T0, (), ())
        asked = 0
        first = 101 if hole_end > 1_000_000 else hole_end + 2
        for i in range(first, first + 1000):
            book.delta(0, i, i - 1, T0, (), ())
        assert book.state == BROKEN
        assert asked < 3 * 1000


@pytest.mark.parametrize("chained", [False, True])
def test_a_snapshot_older_than_the_buffer_is_not_taken(chained: bool) -> None:
    """F12. Step 3 of the local book: fetch again, the buffer stays."""
    with emitter() as emit:
        rig = Rig(emit, chained)
        rig.delta(Message(10, 12, 9, ((1.0, 1.0),), ()))
        rig.delta(Message(13, 13, 12, ((2.0, 1.0),), ()))
        assert rig.wanted == 1
        assert not rig.snapshot(8, ({}, {}))
        assert rig.book.state == WAITING
        assert rig.rows() == []
        assert emit.counters["book_snapshot_stale"] == 1
        assert rig.snapshot(9, ({5.0: 1.0}, {}))
        assert rig.book.book() == ({5.0: 1.0, 1.0: 1.0, 2.0: 1.0}, {})
        assert ledger(emit) == []


@pytest.mark.parametrize("chained", [False, True])
def test_a_snapshot_newer_than_the_whole_buffer_waits_for_what_follows(chained: bool) -> None:
    """F12. All that is held is older; what comes until its id is reached is ignored."""
    with emitter() as emit:
        rig = Rig(emit, chained)
        for i in range(1, 5):
            rig.delta(Message(i, i, i - 1, ((1.0, float(i)),), ()))
        assert rig.snapshot(8, ({7.0: 7.0}, {}))
        assert emit.counters["book_superseded"] == 4
        for i in range(5, 9):
            rig.delta(Message(i, i, i - 1, ((1.0, float(i)),), ()))
        assert rig.book.book() == ({7.0: 7.0}, {})
        rig.delta(Message(9, 9, 8, ((1.0, 9.0),), ()))
        assert rig.book.book() == ({7.0: 7.0, 1.0: 9.0}, {})
        assert ledger(emit) == []
        assert [row["update_id"] for row in rig.rows()] == [8, 9]


def test_snapshots_that_never_fit_end_in_doubting_the_held_messages() -> None:
    """One message with an impossible id must not keep the book closed for ever."""
    with emitter() as emit:
        rig = Rig(emit, chained=False)
        rig.snapshot(10, ({}, {}))
        rig.delta(Message(1 << 60, 1 << 60, -1, ((1.0, 1.0),), ()))
        taken = [rig.snapshot(11 + i, ({9.0: 1.0}, {})) for i in range(continuity.STALE_SNAPSHOTS_MAX)]
        assert taken == [False] * (continuity.STALE_SNAPSHOTS_MAX - 1) + [True]
        assert rig.book.state == LIVE
        assert ledger(emit) == [(11, (1 << 60) - 1, "sequence", False)]
        doubted = [row for row in rig.rows() if row["flags"] & INVALID]
        assert [(row["update_id"], row["price"]) for row in doubted] == [(1 << 60, 1.0)]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("held_max", [continuity.HELD_MESSAGES_MAX, 2])
@MANY
@given(messages=truths(12), data=st.data())
def test_a_book_that_ends_without_a_snapshot(
    chained: bool, restart: bool, held_max: int, messages: list[Message], data: st.DataObject
) -> None:
    """What arrived is in the table once and says what it is; what did not arrive is in the ledger, before the last one.

    `restart`: an earlier life published message 0, this one never gets a snapshot.
    """
    ids = [0, *(m.last for m in messages)]
    messages = [m._replace(bids=m.bids or ((1.0, 1.0),)) for m in messages]  # each one leaves a row
    begin = 1 if restart else 0
    delays = [data.draw(st.sampled_from([0, 0, 0, 1.5, 2.5])) for _ in messages]
    order = [i for i in sorted(range(len(messages)), key=lambda i: i + delays[i]) if i >= begin]
    copies = {i: data.draw(st.sampled_from([0, 1, 1, 1, 2])) for i in order}
    with emitter() as emit, mock.patch.object(continuity, "HELD_MESSAGES_MAX", held_max):
        rig = Rig(emit, chained, published_id=ids[1] if restart else -1)
        if not restart:
            assert rig.snapshot(0, ({}, {}))
        for i in order:
            for _ in range(copies[i]):
                rig.delta(messages[i])
        was = rig.book.state
        for _ in rig.book.flush():
            pass
        rows = [row for row in rig.rows() if not row["flags"] & SNAPSHOT]
        arrived = [i for i in order if copies[i]]
        assert sorted(row["update_id"] for row in rows if row["flags"] & LAST) == sorted(
            messages[i].last for i in arrived
        )
        unproven = [row for row in rows if row["flags"] & UNPROVEN]
        assert all(row["flags"] & INVALID and row["action"] == (2 if row["qty"] else 3) for row in unproven)
        assert not any(row["flags"] & INVALID for row in rows if not row["flags"] & UNPROVEN)
        assert bool(unproven) == (bool(arrived) and was != LIVE), "proven to the last one, or not"
        assert [row["seq_id"] for row in unproven] == [row["seq_id"] for row in rows][len(rows) - len(unproven) :]
        repaired = {(first, last) for first, last, _, done in ledger(emit) if done}
        standing = [gap for gap in ledger(emit) if gap[:2] not in repaired]
        told = {number for first, last, _, _ in standing for number in range(first, last + 1)}
        lost = {
            number
            for i in range(begin, max(arrived, default=0))
            if i not in arrived
            for number in range(messages[i].first, messages[i].last + 1)
        }
        assert lost <= told
        if held_max > len(messages) and standing:  # late ones may stand in the first hole, no other one is too large
            first = set(range(standing[0][0], standing[0][1] + 1))
            assert told - lost <= (set() if restart else first)


@pytest.mark.parametrize("restart", [False, True])
@MANY
@given(messages=truths(10), data=st.data())
def test_what_a_reconnect_or_a_restart_hides_is_in_the_ledger(
    restart: bool, messages: list[Message], data: st.DataObject
) -> None:
    """The cause is said for the hole that begins where the connection ended, and for no later one."""
    cut = data.draw(st.integers(0, len(messages) - 1))
    resume = data.draw(st.integers(cut, len(messages) - 1))
    ids = [0, *(m.last for m in messages)]
    with emitter() as emit:
        rig = Rig(emit, False, published_id=ids[cut] if restart else -1)
        if not restart:
            rig.snapshot(0, ({}, {}))
            for m in messages[:cut]:
                rig.delta(m)
            rig.book.disconnected("reconnect")
        for m in messages[resume:]:
            rig.delta(m)
        if restart:
            assert ledger(emit) == []
            assert rig.snapshot(ids[-1], states(messages)[ids[-1]])
            lost = ids[-1] != ids[cut]
            assert ledger(emit) == ([(ids[cut] + 1, ids[-1], "restart", False)] if lost else [])
            assert {row["flags"] & (SNAPSHOT | RESYNCED) for row in rig.rows()} == {SNAPSHOT | RESYNCED}
        elif resume > cut:
            assert ledger(emit) == [(ids[cut] + 1, ids[resume], "reconnect", False)]
        else:
            assert ledger(emit) == []
            rig.delta(Message(ids[-1] + 5, ids[-1] + 5, ids[-1] + 4, (), ()))
            assert ledger(emit) == [(ids[-1] + 1, ids[-1] + 4, "sequence", False)]


def test_a_new_snapshot_of_a_live_book_is_a_hole_unless_it_is_the_same() -> None:
    with emitter() as emit:
        rig = Rig(emit, True)
        rig.snapshot(5, ({1.0: 1.0}, {}), in_band=True)
        rig.book.disconnected("reconnect")
        rig.snapshot(5, ({1.0: 1.0}, {}), in_band=True)
        assert ledger(emit) == []
        rig.book.disconnected("reconnect")
        rig.snapshot(9, ({2.0: 1.0}, {}), in_band=True)
        assert ledger(emit) == [(6, 9, "reconnect", False)]
        rig.snapshot(3, ({}, {}), in_band=True)
        assert ledger(emit)[1:] == [(3, 3, "snapshot", False)], "ids that go back"
        assert rig.book.book() == ({}, {})
        rows = rig.rows()
        assert (rows[-1]["side"], rows[-1]["flags"], rows[-1]["update_id"]) == (0, SNAPSHOT | RESYNCED | LAST, 3)


def test_an_in_band_snapshot_is_newer_than_all_that_is_held() -> None:
    with emitter() as emit:
        rig = Rig(emit, True)
        rig.snapshot(5, ({1.0: 1.0}, {}), in_band=True)
        rig.delta(Message(8, 8, 7, ((2.0, 1.0),), ()))
        rig.delta(Message(1 << 60, 1 << 60, 8, ((3.0, 1.0),), ()))
        assert rig.snapshot(20, ({4.0: 1.0}, {}), in_band=True)
        assert rig.book.book() == ({4.0: 1.0}, {})
        rig.delta(Message(21, 21, 20, ((5.0, 1.0),), ()))
        assert rig.book.book() == ({4.0: 1.0, 5.0: 1.0}, {})
        newer = 1 << 60, 1 << 60, "sequence", False
        assert ledger(emit) == [(6, 7, "sequence", False), (8, 20, "sequence", False), newer]


@pytest.mark.parametrize("chained", [False, True])
def test_what_a_connection_that_ended_on_a_broken_book_missed_is_told(chained: bool) -> None:
    with emitter() as emit:
        rig = Rig(emit, chained)
        rig.snapshot(99, ({1.0: 1.0}, {}), in_band=True)
        rig.delta(Message(105, 105, 104, ((2.0, 1.0),), ()))
        assert ledger(emit) == [(100, 104, "sequence", False)]
        rig.book.disconnected("reconnect")
        rig.snapshot(9000, ({3.0: 1.0}, {}), in_band=True)
        assert ledger(emit)[1:] == [(105, 9000, "reconnect", False)], "105 came, and is in no row"
        since, until = (emit.rings["gaps"].recent_rows(0)[name].tolist()[1] for name in ("from_time", "to_time"))
        assert since < until == rig.time
        rig.delta(Message(9010, 9010, 9009, (), ()))
        rig.snapshot(9020, ({3.0: 1.0}, {}), in_band=True)
        no_connection_ended = [(9001, 9009, "sequence", False), (9010, 9020, "sequence", False)]
        assert ledger(emit)[2:] == no_connection_ended
        told = {"gap_orderbook_l2_sequence": 2, "gap_orderbook_l2_sequence_continued": 1}
        told["gap_orderbook_l2_reconnect_continued"] = 1
        assert {key: n for key, n in emit.counters.items() if key.startswith("gap_")} == told, "two holes, each once"


@pytest.mark.parametrize(("reached", "told"), [(98, [(98, 98)]), (99, []), (104, []), (105, [(105, 105)])])
@pytest.mark.parametrize("held", [False, True])
def test_a_snapshot_within_what_is_told_tells_only_what_it_supersedes(
    held: bool, reached: int, told: list[tuple[int, int]]
) -> None:
    """One before all that is the beginning of new ids."""
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(99, ({1.0: 1.0}, {}), in_band=True)
        if held:
            rig.delta(Message(105, 105, 104, ((2.0, 1.0),), ()))
        else:
            rig.book.lost(104, "sequence")
        rig.snapshot(reached, ({3.0: 1.0}, {}), in_band=True)
        superseded = [(105, 105)] if held and reached < 104 else []
        assert ledger(emit) == [(a, b, "sequence", False) for a, b in [(100, 104), *superseded, *told]]


def test_ids_that_begin_anew_while_a_book_is_broken() -> None:
    """What was held is told in its own numbering. OKX goes on with an update, Bybit with a snapshot."""
    with emitter() as emit:
        rig = Rig(emit, True)
        rig.snapshot(99, ({1.0: 1.0}, {}), in_band=True)
        for prev, id_ in ((104, 105), (105, 106), (106, 3), (3, 4)):
            rig.delta(Message(id_, id_, prev, ((2.0, 1.0),), ()))
        rig.snapshot(6, ({3.0: 1.0}, {}), in_band=True)
        rest = [(105, 106, "sequence", False), (3, 6, "sequence", False)]
        assert ledger(emit) == [(100, 104, "sequence", False), *rest]


def test_what_is_held_before_the_first_snapshot_of_all_was_never_promised() -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        for i in range(5, 9):
            rig.delta(Message(i, i, i - 1, ((1.0, 1.0),), ()))
        rig.snapshot(7, ({3.0: 1.0}, {}))
        assert ledger(emit) == []


def test_what_follows_rows_without_a_book_was_promised() -> None:
    """Rows 5 and 6 are in the table before the first snapshot, so who reads on must be told of 7 to 9."""
    with emitter() as emit, mock.patch.object(continuity, "HELD_MESSAGES_MAX", 1):
        rig = Rig(emit, False)
        for i in range(5, 8):
            rig.delta(Message(i, i, i - 1, ((1.0, 1.0),), ()))
        rig.snapshot(9, ({3.0: 1.0}, {}))
        assert [row["update_id"] for row in rig.rows()] == [5, 6, 9]
        assert ledger(emit) == [(7, 9, "snapshot", False)]


def test_an_earlier_life_left_the_book_and_the_first_snapshot_tells_what_is_between() -> None:
    with emitter() as emit, mock.patch.object(continuity, "HELD_MESSAGES_MAX", 1):
        rig = Rig(emit, False, published_id=3)
        for i in range(5, 8):
            rig.delta(Message(i, i, i - 1, ((1.0, 1.0),), ()))
        rig.snapshot(9, ({3.0: 1.0}, {}))
        assert ledger(emit) == [(4, 4, "restart", False), (7, 9, "restart", False)], "5 and 6 are there, unproven"


@pytest.mark.parametrize("since", [None, (40, 40)])
@pytest.mark.parametrize("cause", ["crossed", "checksum"])
def test_a_book_that_is_given_up_is_told_up_to_its_next_snapshot(cause: str, since: tuple[int, int] | None) -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(50, ({1.0: 1.0}, {}), in_band=True)
        rig.book.distrust(cause, since)
        for i in range(51, 55):
            rig.delta(Message(i, i, i - 1, ((1.0, 1.0),), ()))
        rig.snapshot(60, ({3.0: 1.0}, {}), in_band=True)
        first = (41, 51) if since else (50, 50)
        assert ledger(emit) == [(*first, cause, False), (first[1] + 1, 60, cause, False)]


@pytest.mark.parametrize("chained", [False, True])
@MANY
@given(
    messages=truths(20),
    restart=st.booleans(),
    held_max=st.sampled_from([continuity.HELD_MESSAGES_MAX, 2]),
    data=st.data(),
)
def test_every_message_is_in_a_row_or_in_the_ledger(
    chained: bool, messages: list[Message], restart: bool, held_max: int, data: st.DataObject
) -> None:
    """Lost, late, doubled, cut, doubted, behind snapshots of any age: from the first row on nothing vanishes untold.

    The venue may once number anew, which it says by a snapshot. `restart`: an earlier life published message 0.
    """
    anew = data.draw(st.integers(0, len(messages) - 1), label="numbers anew at, 0 = never")
    base = 1000  # so that no id of the one numbering is one of the other
    messages = [
        m._replace(bids=m.bids or ((1.0, 1.0),), first=m.first + base, last=m.last + base, prev=m.prev + base)
        if i < anew
        else m._replace(bids=m.bids or ((1.0, 1.0),))
        for i, m in enumerate(messages)
    ]
    number = {id_: i for i, m in enumerate(messages) for id_ in range(m.first, m.last + 1)}
    begin = 1 if restart else len(messages)  # of what is promised
    heard = [-1, -1]  # the newest of each numbering that anything told of; what was lost behind it nobody can know
    late: dict[int, list[Message]] = {}
    came = set[int]()
    with emitter() as emit, mock.patch.object(continuity, "HELD_MESSAGES_MAX", held_max):
        rig = Rig(emit, chained, messages[0].last if restart else -1)
        for i, m in enumerate(messages):
            if restart and not i:
                continue
            delay, copies = data.draw(st.sampled_from([(0, 1), (0, 1), (0, 1), (0, 0), (0, 2), (1, 1), (2, 1)]))
            late.setdefault(i + delay, []).extend([m] * copies)
            if i == anew and anew:
                late[i] = []
                rig.snapshot(m.last, ({}, {}), in_band=True)
                heard[1] = i
            for arrived in late.pop(i, []):
                rig.delta(arrived)
                at = number[arrived.last]
                came.add(at)
                heard[at >= anew] = max(heard[at >= anew], at)
            event = data.draw(st.sampled_from(["", "", "", "snapshot", "in band", "cut", "crossed", "lost"]))
            of = messages[data.draw(st.integers(max(0 if i < anew else anew, i - 4), i))]
            if event == "in band" or (event == "snapshot" and rig.book.state != LIVE):
                id_ = of.last if chained else data.draw(st.integers(of.first, of.last))
                if rig.snapshot(id_, ({}, {}), in_band=event == "in band"):
                    reached = number[id_] - (id_ != of.last)  # in band, it says that nothing newer was sent
                    heard[i >= anew] = reached if event == "in band" else max(heard[i >= anew], reached)
            elif event == "cut":
                rig.book.disconnected()
            elif event == "crossed":
                rig.book.distrust("crossed")
            elif event == "lost":
                rig.book.lost(m.last, "sequence")
            if begin == len(messages) and (rows := rig.rows()):
                first = rows[0]["update_id"]
                begin = min(begin, number[first] + (first == messages[number[first]].last))
        for _ in rig.book.flush():
            pass
        published = {row["update_id"] for row in rig.rows() if not row["flags"] & SNAPSHOT}
        published.add(messages[anew].last)  # it was a snapshot
        newest = {(first, last): repaired for first, last, _, repaired in ledger(emit)}
        told = [hole for hole, repaired in newest.items() if not repaired]
        silent = [
            m
            for i, m in enumerate(messages)
            if begin <= i
            and (i <= heard[i >= anew] or i in came)
            and m.last not in published
            and not any(first <= m.last and last >= m.first for first, last in told)
        ]
        assert not silent, f"told: {told}, published: {published}"


def test_messages_that_were_published_unproven_are_not_told_as_missed() -> None:
    with emitter() as emit, mock.patch.object(continuity, "HELD_MESSAGES_MAX", 1):
        rig = Rig(emit, False)
        rig.snapshot(99, ({1.0: 1.0}, {}))
        rig.delta(Message(105, 105, 104, ((2.0, 1.0),), ()))
        rig.delta(Message(106, 106, 105, ((2.0, 2.0),), ()))
        rig.book.disconnected("reconnect")
        rig.snapshot(200, ({3.0: 1.0}, {}))
        assert ledger(emit) == [(100, 104, "sequence", False), (106, 200, "reconnect", False)]


def test_a_book_that_late_messages_healed_missed_nothing() -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(99, ({1.0: 1.0}, {}))
        rig.delta(Message(101, 101, 100, ((2.0, 1.0),), ()))
        rig.book.disconnected("reconnect")
        rig.delta(Message(100, 100, 99, ((2.0, 1.0),), ()))
        assert rig.book.state == LIVE
        assert ledger(emit) == [(100, 100, "sequence", False), (100, 100, "reordered", True)]
        rig.delta(Message(105, 105, 104, ((2.0, 1.0),), ()))
        rig.snapshot(200, ({3.0: 1.0}, {}))
        assert ledger(emit)[2:] == [(102, 104, "sequence", False), (105, 200, "sequence", False)]


# Crossed books (F19)


def crossing(rig: Rig, i: int, bid: float, qty: float = 1.0) -> None:
    rig.delta(Message(i, i, i - 1, ((bid, qty),), ()))


def test_a_crossed_book_is_flagged_and_forgiven_within_the_grace() -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(0, ({9.0: 1.0}, {10.0: 1.0}))
        for i, (bid, qty, doubted) in enumerate([(10.0, 1.0, True), (8.0, 1.0, True), (10.0, 0.0, False), (7.0, 1.0, False),
                                                 (11.0, 2.0, True), (11.0, 0.0, False)], 1):  # fmt: skip
            crossing(rig, i, bid, qty)
            assert bool(rig.rows()[-1]["flags"] & INVALID) == doubted, i
        assert emit.counters["book_crossed"] == 3
        assert ledger(emit) == []
        assert rig.wanted == 0


def test_a_book_that_stays_crossed_is_taken_anew() -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(0, ({9.0: 1.0}, {10.0: 1.0}))
        crossing(rig, 1, 10.0)
        rig.time += continuity.CROSSED_GRACE_US - 1000
        crossing(rig, 2, 8.0)
        assert rig.book.state == LIVE, "exactly the grace is still forgiven"
        crossing(rig, 3, 7.0)
        assert (rig.book.state, rig.wanted) == (BROKEN, 1)
        assert ledger(emit) == [(3, 3, "crossed", False)]
        published = len(rig.rows())
        crossing(rig, 4, 6.0)  # follows without a hole, and must not make the wrong book live again
        crossing(rig, 5, 5.0)
        assert rig.book.state == BROKEN
        assert len(rig.rows()) == published
        assert rig.snapshot(4, ({9.0: 1.0, 6.0: 1.0}, {10.0: 1.0}))
        assert rig.book.book() == ({9.0: 1.0, 6.0: 1.0, 5.0: 1.0}, {10.0: 1.0})
        assert ledger(emit) == [(3, 3, "crossed", False), (4, 4, "crossed", False)], "4 came and is in no row"
        assert [bool(row["flags"] & INVALID) for row in rig.rows()[2:]] == [
            True,
            True,
            True,
            False,
            False,
            False,
            False,
        ]


@MANY
@given(
    start=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), max_size=30, unique_by=lambda x: x[0]),
    changes=st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 2)), max_size=4,
                              unique_by=lambda x: x[:2]), max_size=40),
)  # fmt: skip
def test_the_best_prices_are_those_of_a_plain_search(start: list[Any], changes: list[Any]) -> None:
    """With room for few entries every sorting and every dead entry is met; crossed is what max and min say."""
    small = {"TOP_LEVELS": 2, "TOP_MAX": 6, "FRESH_MAX": 2, "REMOVED_MAX": 3}
    kept = {name: getattr(continuity, name) for name in small}
    vars(continuity).update(small)
    try:
        with emitter() as emit:
            rig = Rig(emit, False)
            books: Books = {float(p): float(q) for p, q in start}, {p + 40.0: float(q) for p, q in start}
            rig.snapshot(0, books)
            books = dict(books[0]), dict(books[1])
            for i, change in enumerate(changes, 1):
                bids = tuple((float(p), float(q)) for is_bid, p, q in change if is_bid)
                asks = tuple((p + 20.0, float(q)) for is_bid, p, q in change if not is_bid)
                rig.time = T0  # no time passes, so the grace never ends
                rig.delta(Message(i, i, i - 1, bids, asks))
                for side, levels in zip(books, (bids, asks), strict=True):
                    side.update(levels)
                    for price in [p for p, q in side.items() if not q]:
                        del side[price]
                crossed = bool(books[0] and books[1] and max(books[0]) >= min(books[1]))
                assert rig.book.book() == books
                if bids or asks:
                    assert bool(rig.rows()[-1]["flags"] & INVALID) == crossed
                    assert len({row["flags"] & ~LAST for row in rig.rows()[-len(bids) - len(asks) :]}) == 1
    finally:
        vars(continuity).update(kept)


def test_a_book_of_many_deletions_stays_small() -> None:
    with emitter() as emit:
        rig = Rig(emit, False)
        rig.snapshot(0, ({0.5: 1.0}, {1e9: 1.0}))
        for i in range(1, 7000):
            crossing(rig, 2 * i - 1, float(i))
            crossing(rig, 2 * i, float(i), 0.0)
        assert rig.book.book() == ({0.5: 1.0}, {1e9: 1.0})
        side = rig.book._bids
        assert len(side.levels) < 2 * continuity.REMOVED_MAX
        assert len(side._top) + len(side._fresh) <= continuity.TOP_MAX + continuity.FRESH_MAX


# Trades


class Tape:
    """Trades under test; a row of the truth is its counter, its price the counter as well."""

    def __init__(self, emit: Emit, last: int = -1) -> None:
        self.emit, self.time = emit, T0
        self.asked: list[tuple[int, int]] = []
        self.sync = TradeSync(
            emit, emit.instrument("A"), lambda _, first, last_: self.asked.append((first, last_)), last
        )

    def row(self, seq: int) -> Any:
        return seq, T0 + seq, 1, float(seq), 1.0, b""

    def message(self, *seqs: int) -> int:
        self.time += 1000
        self.emit.packet(self.time * 1000, 0)
        return self.sync.publish([self.row(seq) for seq in seqs])

    def repaired(self, asked: int, *seqs: int) -> None:
        self.time += 1000
        self.emit.packet(self.time * 1000, 0)
        self.sync.repaired(asked, [self.row(seq) for seq in seqs])

    def published(self) -> list[tuple[int, bool]]:
        rows = self.emit.rings["trades"].recent_rows(0)
        assert [float(s) for s in rows["trade_seq"].tolist()] == rows["price"].tolist()
        return [
            (s, bool(f & REPAIRED)) for s, f in zip(rows["trade_seq"].tolist(), rows["flags"].tolist(), strict=True)
        ]


@MANY
@given(
    count=st.integers(1, 60),
    data=st.data(),
    published=st.sampled_from([-1, 0]),
)
def test_a_hostile_tape(count: int, published: int, data: st.DataObject) -> None:
    """Messages of several trades, lost, doubled and late; then answers to repairs, whole, in part, empty, doubled."""
    tape_ids = list(range(1, count + 1))
    order = sorted(tape_ids, key=lambda i: i + data.draw(st.sampled_from([0, 0, 0, 0, 2.5, 6.5])))
    arrivals = [i for i in order for _ in range(data.draw(st.sampled_from([1, 1, 1, 1, 0, 2])))]
    with emitter() as emit:
        tape = Tape(emit, published)
        # The plain walk: a hole is opened by a trade that is further ahead than the next one.
        seen: set[int] = set()
        highest, duplicates = published, 0
        missing: dict[int, tuple[int, int]] = {}  # id -> hole it belongs to
        told: list[tuple[int, int, str, bool]] = []
        while arrivals:
            size = data.draw(st.integers(1, 4))
            message, arrivals = arrivals[:size], arrivals[size:]
            filled: list[tuple[int, int]] = []
            new = 0
            for i in message:
                if i in seen or (i not in missing and highest >= 0 and i <= highest):
                    duplicates += 1
                elif highest < 0 and not seen:
                    highest, new = i, new + 1
                    seen.add(i)
                elif i in missing:
                    hole = missing.pop(i)
                    seen.add(i)
                    new += 1
                    if hole not in missing.values():
                        filled.append(hole)
                else:
                    if i > highest + 1:
                        hole = highest + 1, i - 1
                        missing.update(dict.fromkeys(range(highest + 1, i), hole))
                        told.append((*hole, "restart" if highest == published == 0 else "sequence", False))
                    seen.add(i)
                    highest, new = i, new + 1
            assert tape.message(*message) == new
            told += [(*hole, "filled", True) for hole in reversed(filled)]
            assert ledger(emit) == told
        assert emit.counters["trade_duplicate"] == duplicates
        assert sorted(i for i, _ in tape.published()) == sorted(seen), "each once"
        assert not any(repaired for _, repaired in tape.published())
        assert sorted(tape.asked) == sorted((a, b) for a, b, _, repaired in told if not repaired)

        # The answers: in part, empty, doubled, of other ids. What is asked again lies behind what was reached.
        live, incomplete = set(seen), 0
        asked = list(tape.asked)
        wholes = list(asked)
        while asked:
            first, last = asked.pop(data.draw(st.integers(0, len(asked) - 1)))
            tape.asked.clear()
            reach = data.draw(st.integers(first - 1, last))
            answer = [i for i in range(first, reach + 1) if data.draw(st.sampled_from([True] * 5 + [False]))]
            answer += data.draw(st.sampled_from([[], [], answer[:1], [last + 1000], [first - 1]]))
            filled = []
            for i in dict.fromkeys(i for i in answer if i in missing):
                hole = missing.pop(i)
                seen.add(i)
                if hole not in missing.values():
                    filled.append(hole)
            tape.repaired(first, *answer)
            told += [(*hole, "filled", True) for hole in reversed(filled)]
            assert ledger(emit) == told
            assert sorted(tape.published()) == sorted((i, i not in live) for i in seen), (
                "each once, flagged by its origin"
            )
            whole = next(hole for hole in wholes if hole[0] <= first <= hole[1])
            left = sorted(i for i, hole in missing.items() if hole == whole)
            reached = max(answer, default=first - 1)
            begins = [i for i in left if i - 1 not in left and i > reached]
            if begins and reached >= first:
                end = next(i for i in left if i >= begins[0] and i + 1 not in left)
                assert tape.asked == [(begins[0], end)]
            else:
                incomplete += bool(left)
                assert not tape.asked
            assert emit.counters["trade_repair_incomplete"] == incomplete
            asked += tape.asked


def test_rows_of_a_repair_are_flagged_and_live_ones_are_not() -> None:
    with emitter() as emit:
        tape = Tape(emit)
        tape.message(1)
        tape.message(6)
        tape.message(3)  # late, by itself
        assert tape.asked == [(2, 5)]
        tape.repaired(2, 2, 3, 4)
        assert tape.published() == [(1, False), (6, False), (3, False), (2, True), (4, True)]
        assert tape.asked == [(2, 5), (5, 5)], "it answered up to 4 only: asked on"
        tape.repaired(5)
        assert emit.counters["trade_repair_incomplete"] == 1
        assert ledger(emit) == [(2, 5, "sequence", False)]
        tape.message(5)
        assert ledger(emit) == [(2, 5, "sequence", False), (2, 5, "filled", True)]
        tape.repaired(2, 2, 3, 4, 5)
        assert len(tape.published()) == 6


def test_a_hole_is_blamed_on_the_connection_that_ended_there() -> None:
    with emitter() as emit:
        tape = Tape(emit)
        tape.message(1, 2)
        tape.sync.disconnected("reconnect")
        tape.message(3)
        tape.message(5)
        tape.sync.disconnected("reconnect")
        tape.message(8)
        tape.message(10)
        assert [(a, b, c) for a, b, c, _ in ledger(emit)] == [
            (4, 4, "sequence"),
            (6, 7, "reconnect"),
            (9, 9, "sequence"),
        ]


def test_a_restart_continues_the_counter_that_was_published() -> None:
    with emitter() as emit:
        tape = Tape(emit, last=100)
        tape.message(104)
        tape.message(99, 100)
        assert ledger(emit) == [(101, 103, "restart", False)]
        assert tape.asked == [(101, 103)]
        assert [i for i, _ in tape.published()] == [104]
        assert emit.counters["trade_duplicate"] == 2
    with emitter() as emit:
        tape = Tape(emit, last=100)
        tape.message(101)
        assert ledger(emit) == []


def test_a_long_hole_is_recorded_and_not_fetched() -> None:
    with emitter() as emit:
        tape = Tape(emit)
        tape.message(1)
        tape.message(2 + continuity.REPAIR_IDS_MAX)
        assert tape.asked == [(2, 1 + continuity.REPAIR_IDS_MAX)]
        tape.message(4 + 2 * continuity.REPAIR_IDS_MAX)
        assert len(tape.asked) == 1
        assert emit.counters["trade_hole_not_repaired"] == 1
        assert len(ledger(emit)) == 2


def test_a_forgotten_hole_is_never_said_to_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many parts of holes are remembered; a hole of which a part is forgotten goes as a whole."""
    monkeypatch.setattr(continuity, "HOLES_MAX", 3)
    with emitter() as emit:
        tape = Tape(emit)
        tape.message(1)
        tape.message(12)  # 2..11
        for i in (3, 5, 7):  # in four parts now, one too many
            tape.message(i)
        assert emit.counters["trade_hole_forgotten"] == 1
        for i in (2, 4, 6, 8, 9, 10, 11):
            tape.message(i)
        assert ledger(emit) == [(2, 11, "sequence", False)]
        assert emit.counters["trade_duplicate"] == 7, "what is not remembered cannot be told from a duplicate"
        tape.message(14)
        tape.message(13)
        assert ledger(emit)[1:] == [(13, 13, "sequence", False), (13, 13, "filled", True)]


def test_a_counter_is_not_believed_before_it_is_confirmed() -> None:
    with emitter() as emit:
        tape = Tape(emit)
        tape.message(10)
        far = 10 + continuity.COUNTER_JUMP_MAX + 1
        for odd in (far, far + 5 * continuity.SUSPECT_STEP_MAX, far + 3):  # they do not follow each other closely
            with pytest.raises(FrameError) as refused:
                tape.message(odd)
            assert refused.value.reason == "absurd_trade_id"
        tape.message(11)
        with pytest.raises(FrameError):
            tape.message(far + 4)
        assert tape.published() == [(10, False), (11, False)]
        tape.message(far + 6)
        assert ledger(emit) == [(12, far + 2, "ids_reset", False), (far + 3, far + 5, "ids_reset", False)]
        assert tape.asked == [(far + 3, far + 5)]
        assert tape.published()[-1] == (far + 6, False)


# Rules of the venues


@MANY
@given(last=st.integers(0, 50), first=st.integers(0, 50), size=st.integers(0, 5), prev=st.integers(0, 50))
def test_rules_of_the_venues(last: int, first: int, size: int, prev: int) -> None:
    """Word for word: Binance steps 4 and 6; Deribit's predecessor."""
    end = first + size
    by_ranges = (
        OLD
        if not set(range(last + 1, 200)) & set(range(first, end + 1))
        else NEXT
        if last + 1 in range(first, end + 1)
        else HOLE
    )
    assert binance.follows(last, first, end, -1) == by_ranges
    chained = NEXT if prev == last else OLD if end <= last else HOLE
    assert deribit.follows(last, end, end, prev) == chained
