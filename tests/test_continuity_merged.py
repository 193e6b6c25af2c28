"""Trades that a venue merges: whatever is lost, doubled, late or fetched, each trade is in exactly one row, or in a hole."""

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdcollector.continuity import TradeSync
from mdcollector.emit import Emit
from mdcollector.records import BUY, Exchange, Flag

NOW_NS = 1_796_083_200_000_000_000
T0 = NOW_NS // 1000
REPAIRED = int(Flag.REPAIRED)
Message = tuple[int, int]  # counter of the last trade, and of how many trades


def rows_of(messages: list[Message]) -> list[tuple[int, int, int, float, float, bytes]]:
    return [(seq, T0, BUY, 1.0, float(count), str(seq).encode()) for seq, count in messages]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), counts=st.lists(st.integers(1, 5), min_size=1, max_size=25))
def test_each_trade_is_in_one_row_or_in_a_hole(data: st.DataObject, counts: list[int]) -> None:
    """A delivery with losses, copies and swaps; between two messages what was asked for may be fetched, one by one."""
    truth: list[Message] = []
    last = 100
    for count in counts:
        last += count
        truth.append((last, count))
    order = sorted(truth, key=lambda m: m[0] + data.draw(st.sampled_from([0, 0, 0, 0, 7.5])))
    arrivals = [m for m in order for _ in range(data.draw(st.sampled_from([1, 1, 1, 1, 0, 2])))]
    asked: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        emit = Emit(Path(folder), "t", Exchange.OKX, ("trades",), capacities={"trades": 4096, "gaps": 4096},
                    semaphore=False, clock=lambda: 0)  # fmt: skip
        emit.packet(NOW_NS, 0)
        sync = TradeSync(emit, emit.instrument("A"), lambda _ticker, first, end: asked.append((first, end)))
        sync.merged = True
        for seq, count in arrivals:
            sync.publish(rows_of([(seq, count)]), counts=[count])
            if asked and data.draw(st.booleans()):
                first, end = asked.pop(0)
                # The venue's answer goes on behind the hole, as far as it has trades by now.
                sync.repaired(first, rows_of([(one, 1) for one in range(first, min(end + 3, last) + 1)]))
        rows = emit.rings["trades"].recent_rows(0)
        gaps = emit.rings["gaps"].recent_rows(0)
        emit.close()
    assert set(rows["trade_seq"].tolist()) <= {-1}
    covered = Counter[int]()
    for trade_id, qty, flags in zip(*(rows[c].tolist() for c in ("trade_id", "qty", "flags")), strict=True):
        count = 1 if flags & REPAIRED else int(qty)
        covered.update(range(int(trade_id) - count + 1, int(trade_id) + 1))
    assert set(covered.values()) <= {1}, "no trade is in two rows"
    if not arrivals:
        return
    began = arrivals[0][0] - arrivals[0][1] + 1
    ids = zip(*(gaps[c].tolist() for c in ("first_id", "last_id", "repaired")), strict=True)
    standing = {(a, b): repaired for a, b, repaired in ids}
    holes = {one for (a, b), repaired in standing.items() if not repaired for one in range(a, b + 1)}
    reached = max(seq for seq, _ in arrivals)
    assert set(range(began, reached + 1)) <= set(covered) | holes, "what is in no row is in a hole"
    for (a, b), repaired in standing.items():
        if repaired:
            assert set(range(a, b + 1)) <= set(covered)


def test_a_trade_that_is_there_in_part_is_fetched_one_by_one(tmp_path: Path) -> None:
    """Fetched were 1 to 4 when the venue told 3 to 6 as one: 5 and 6 are asked for, nothing stands there twice."""
    emit = Emit(tmp_path, "t", Exchange.OKX, ("trades",), capacities={"trades": 512, "gaps": 512}, semaphore=False)
    asked: list[tuple[int, int]] = []
    emit.packet(NOW_NS, emit.clock())
    sync = TradeSync(emit, emit.instrument("A"), lambda _ticker, first, end: asked.append((first, end)), last=4)
    sync.merged = True
    assert sync.publish(rows_of([(6, 4)]), counts=[4]) == 0
    assert asked == [(5, 6)]
    sync.repaired(5, rows_of([(5, 1), (6, 1)]))
    assert sync.publish(rows_of([(8, 2)]), counts=[2]) == 1
    rows, gaps = emit.rings["trades"].recent_rows(0), emit.rings["gaps"].recent_rows(0)
    assert [i.decode() for i in rows["trade_id"].tolist()] == ["5", "6", "8"]
    assert [(int(g["first_id"]), int(g["last_id"]), g["cause"].decode(), bool(g["repaired"])) for g in gaps] == [
        (5, 6, "overlap", False),
        (5, 6, "filled", True),
    ]
    emit.close()
