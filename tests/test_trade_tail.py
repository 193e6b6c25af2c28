"""Trades missed behind the last one: asked for after a connection ended, published once, told in the ledger."""

from pathlib import Path

import pytest

from mdcollector.continuity import TradeSync
from mdcollector.emit import Emit
from mdcollector.records import Exchange, Flag

T = 1_700_000_000_000_000


@pytest.mark.parametrize("missed", [[], [11], [11, 12, 13], [11, 13]])
def test_what_the_venue_names_behind_the_last_trade_was_missed(tmp_path: Path, missed: list[int]) -> None:
    sizes = {"trades": 512, "gaps": 512}
    emit = Emit(tmp_path, "conn", Exchange.DERIBIT, ["trades"], capacities=sizes, semaphore=False)
    emit.packet(T * 1000, emit.clock())
    asked: list[tuple[str, int, int]] = []
    sync = TradeSync(emit, emit.instrument("A"), lambda *want: asked.append(want))
    sync.publish([(10, T, 1, 5.0, 1.0, b"")])
    assert not sync.unproven
    sync.disconnected()
    assert sync.unproven
    sync.want_tail()
    assert [want[:2] for want in asked] == [("A", 11)]
    sync.repaired(11, [(seq, T + seq, -1, 5.0, 2.0, b"") for seq in missed])
    assert not sync.unproven
    trades, gaps = emit.rings["trades"].recent_rows(0), emit.rings["gaps"].recent_rows(0)
    assert trades["trade_seq"].tolist() == [10, *missed]
    assert all(flags & Flag.REPAIRED for flags in trades["flags"][1:].tolist())
    told = [(int(g["first_id"]), int(g["last_id"]), bool(g["repaired"])) for g in gaps]
    whole = missed == list(range(11, 11 + len(missed)))
    expected = [(11, missed[-1], False)] if missed else []
    assert told == ([*expected, (11, missed[-1], True)] if missed and whole else expected)
    assert sync.publish([(missed[-1] if missed else 10, T, 1, 5.0, 1.0, b"")]) == 0  # the late copy is no second row
    emit.close()
