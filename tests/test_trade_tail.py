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
    if missed:
        assert (sync.unproven, asked[1][:2]) == (True, ("A", missed[-1] + 1)), "more may lie behind them"
        sync.repaired(missed[-1] + 1, [])
    assert not sync.unproven
    assert len(asked) == 1 + bool(missed)
    trades, gaps = emit.rings["trades"].recent_rows(0), emit.rings["gaps"].recent_rows(0)
    assert trades["trade_seq"].tolist() == [10, *missed]
    assert all(flags & Flag.REPAIRED for flags in trades["flags"][1:].tolist())
    told = [(int(g["first_id"]), int(g["last_id"]), bool(g["repaired"])) for g in gaps]
    whole = missed == list(range(11, 11 + len(missed)))
    expected = [(11, missed[-1], False)] if missed else []
    assert told == ([*expected, (11, missed[-1], True)] if missed and whole else expected)
    assert sync.publish([(missed[-1] if missed else 10, T, 1, 5.0, 1.0, b"")]) == 0  # the late copy is no second row
    emit.close()


@pytest.mark.parametrize("page", [100, 1000])
def test_a_tail_is_asked_for_until_an_answer_brings_nothing_new(tmp_path: Path, page: int) -> None:
    """However few trades the venue gives at once; the next trade is then no hole."""
    sizes = {"trades": 4096, "gaps": 512}
    emit = Emit(tmp_path, "conn", Exchange.OKX, ["trades"], capacities=sizes, semaphore=False)
    emit.packet(T * 1000, emit.clock())
    asked: list[int] = []
    sync = TradeSync(emit, emit.instrument("A"), lambda _ticker, first, _last: asked.append(first))
    sync.publish([(1000, T, 1, 5.0, 1.0, b"")])
    sync.disconnected()
    sync.want_tail()
    for first in asked:  # grows as it goes
        sync.repaired(first, [(seq, T + seq, -1, 5.0, 2.0, b"") for seq in range(first, min(first + page, 2351))])
    assert asked == [*range(1001, 2351, page), 2351]
    assert not sync.unproven
    sync.publish([(2351, T + 2351, 1, 5.0, 1.0, b"")])
    assert emit.rings["trades"].recent_rows(0)["trade_seq"].tolist() == list(range(1000, 2352))
    assert set(emit.rings["gaps"].recent_rows(0)["cause"].tolist()) == {b"reconnect", b"filled"}
    emit.close()
