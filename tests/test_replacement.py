"""The replacement of a connection, with legs that are handed in instead of opened: which one stays, and what it brings."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdcollector import connector as module
from mdcollector.config import ConnectorConfig
from mdcollector.connector import Connector
from mdcollector.errors import RateLimited
from mdcollector.exchanges import Reconnect, deribit, venue_class
from mdcollector.transport import Leg

SMALL = {"trades": 512, "gaps": 512, "instruments": 512}
WITHIN_S = 20.0
TICKERS = {"binance_spot": "AB", "deribit": "AB-PERPETUAL"}


class HandedLeg(Leg):
    """A connection without a network."""

    def close(self) -> None:
        self.closed.set()


class Desk:
    """A connector whose connections are opened by hand: each one that it wants is in `opened`, each error in `noted`."""

    def __init__(self, exchange: str, rings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("OVERLAP_LEAD_S", "OVERLAP_S", "OVERLAP_QUIET_S", "ROLLOVER_RETRY_S"):
            monkeypatch.setattr(module, name, 0.0)
        settings = ConnectorConfig(exchange=exchange, tickers=[TICKERS[exchange]], feeds=["trades"], capacity=SMALL)
        kind = venue_class(exchange)
        streams = kind.streams_of(TICKERS[exchange], ["trades"], module.venue_options(settings, kind))
        self.connector = Connector("t", settings, rings, streams, connector="t", number=0)
        self.venue = self.connector.venue
        self.opened: asyncio.Queue[HandedLeg] = asyncio.Queue()
        self.noted: asyncio.Queue[Exception] = asyncio.Queue()
        monkeypatch.setattr(self.connector, "_open", self._open)
        monkeypatch.setattr(self.connector, "_jitter_s", lambda: 0.0)
        monkeypatch.setattr(self.connector, "_note", lambda error, _: self.noted.put_nowait(error))
        self.trades = 0

    async def _open(self, decode: Any) -> Leg:
        leg = HandedLeg(self.connector.emit, decode, self.connector._on_packet)
        for state in self.venue.proof.values():
            state.requested_ns, state.acknowledged_ns = 1, 0
        self.opened.put_nowait(leg)
        return leg

    async def begin(self) -> tuple[HandedLeg, "asyncio.Task[None]"]:
        """The first connection, and what watches it."""
        leg = await self._open(self.venue.decode)
        assert await self.opened.get() is leg
        self.connector._leg = leg
        return leg, asyncio.create_task(self.connector._serve(leg))

    def replace(self, leg: HandedLeg) -> None:
        """Another connection in its place is wanted."""
        self.venue.wants.append(Reconnect("planned", overlap=True))
        self.connector._on_packet(leg)

    def bring(self, leg: HandedLeg, frame: bytes) -> None:
        self.connector.emit.packet(1_796_083_200_000_000_000, 0)
        leg.decode(frame)
        leg.packets += 1
        self.connector._on_packet(leg)

    def acknowledge(self, leg: HandedLeg) -> None:
        leg.packets += 1
        self.venue.acknowledge(list(self.venue.proof), 2)

    def trade(self, leg: HandedLeg) -> None:
        """The next one, of Binance."""
        self.trades += 1
        data = {"e": "trade", "t": self.trades, "p": "1", "q": "1", "T": 1_796_083_200_000, "m": True}
        self.bring(leg, json.dumps({"stream": "ab@trade", "data": data}, separators=(",", ":")).encode())


async def first(*waits: Any) -> Any:
    """What comes of these before the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        if task not in waits:  # what watches the connection goes on
            task.cancel()
    assert done, "nothing came"
    return done.pop().result()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Desk]:
    return lambda exchange: Desk(exchange, tmp_path, monkeypatch)


@pytest.mark.parametrize("ends", [True, False])
def test_too_much_on_the_new_connection_keeps_the_old_one(
    ends: bool, desk: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deribit refuses what the new connection asks for, and ends it or not: the next one comes after the wait it names."""
    monkeypatch.setattr(deribit, "REFILL_S", 0.05)

    async def scenario() -> None:
        at = desk("deribit")
        old, serving = await at.begin()
        at.replace(old)
        new = await first(at.opened.get(), serving)
        rate = at.connector._messages_per_s
        at.bring(new, b'{"jsonrpc":"2.0","id":1,"error":{"code":10028,"message":"too_many_requests"}}')
        if ends:
            new.close()
        else:
            at.acknowledge(new)
        error = await first(at.noted.get(), serving)
        assert isinstance(error, RateLimited)
        assert error.retry_after_s == 0.05
        assert at.connector._leg is old
        assert not old.closed.is_set()
        assert new.closed.is_set()
        assert at.connector._messages_per_s == rate / 2
        assert isinstance(await first(at.opened.get(), serving), HandedLeg), "it is tried again"
        assert not old.closed.is_set()
        serving.cancel()
        at.connector.emit.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("form", [b"%b", b'{"stream":"!serverShutdown","data":%b}'])
def test_notice_on_the_new_connection_is_followed(form: bytes, desk: Callable[[str], Desk]) -> None:
    """The same one as on the old connection, and yet another one; it is no proof that the new one brings anything."""
    notice = form % b'{"e":"serverShutdown","E":1796083200000}'

    async def scenario() -> None:
        at = desk("binance_spot")
        old, serving = await at.begin()
        at.replace(old)
        new = await first(at.opened.get(), serving)
        at.bring(old, notice)  # it is being replaced already
        at.acknowledge(new)
        at.trade(new)
        at.bring(new, notice)
        newest = await first(at.opened.get(), serving)
        assert old.closed.is_set()
        assert not new.closed.is_set()
        at.acknowledge(newest)
        at.trade(newest)
        await first(new.closed.wait(), serving)
        assert newest.wanted is None
        serving.cancel()
        at.connector.emit.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("old_brings", "new_brings"), [(True, False), (True, True), (False, True), (False, False)])
def test_the_old_connection_goes_when_the_new_one_has_brought_data(
    old_brings: bool, new_brings: bool, desk: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither brings anything there is nothing to wait for."""
    monkeypatch.setattr(module, "OVERLAP_MOST_S", 0.2)

    async def scenario() -> None:
        at = desk("binance_spot")
        old, serving = await at.begin()
        legs: list[HandedLeg] = []

        async def wait(leg: Leg, _: float) -> None:
            """Meanwhile the market moves."""
            for one, brings in ((old, old_brings), *((new, new_brings) for new in legs)):
                if brings and not one.closed.is_set():
                    at.trade(one)
            await asyncio.sleep(0)

        monkeypatch.setattr(at.connector, "_wait", wait)
        at.replace(old)
        new = await first(at.opened.get(), serving)
        at.acknowledge(new)
        legs.append(new)
        await first(old.closed.wait(), new.closed.wait(), serving)
        stays, goes = (old, new) if old_brings and not new_brings else (new, old)
        assert goes.closed.is_set()
        assert not stays.closed.is_set()
        serving.cancel()
        at.connector.emit.close()

    asyncio.run(scenario())
