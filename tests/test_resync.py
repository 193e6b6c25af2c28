"""Snapshots of Binance's books that do not come at once: refused ones, and those for which polls leave no weight."""

import asyncio
import json
from pathlib import Path

import pytest

from mdcollector import budget, transport
from mdcollector.emit import Emit
from mdcollector.exchanges import Fetch, Options, Send
from mdcollector.exchanges.binance import Binance, BinanceFutures, BinanceSpot

SMALL = {"orderbook_l2": 512, "tickers": 512, "gaps": 512, "instruments": 512}
BASE_MS = 1_796_083_200_000


def depth(number: int) -> bytes:
    data = {
        "e": "depthUpdate", "E": BASE_MS + number, "T": BASE_MS + number, "s": "AB", "U": number, "u": number,
        "pu": number - 1, "b": [["1", "2"]], "a": [],
    }  # fmt: skip
    return json.dumps({"stream": "ab@depth@100ms", "data": data}, separators=(",", ":")).encode()


def sent(venue: Binance) -> list[int]:
    """Ids of the requests that were sent; every other want is dropped."""
    wants = [want for want in venue.wants if isinstance(want, Send)]
    venue.wants.clear()
    return [json.loads(want.text)["id"] for want in wants]


def fetched(venue: Binance) -> list[str]:
    wants = [want.key for want in venue.wants if isinstance(want, Fetch)]
    venue.wants.clear()
    return wants


@pytest.mark.parametrize("kind", [BinanceSpot, BinanceFutures])
@pytest.mark.parametrize("was_live", [False, True])
def test_a_refused_snapshot_is_asked_for_on_the_next_connection(
    kind: type[Binance], was_live: bool, tmp_path: Path
) -> None:
    emit = Emit(tmp_path / "rings", "t", kind.EXCHANGE, ["orderbook_l2"], semaphore=False, capacities=SMALL)
    venue = kind(emit, Options(), kind.streams_of("AB", ["orderbook_l2"], Options()))
    url = f"http://a{venue.API}/depth?symbol=AB&limit=1000"

    def connect() -> None:
        venue.disconnected("reconnect")
        venue.opened()
        for number in sent(venue):
            venue.decode(b'{"result":null,"id":%d}' % number)

    emit.packet(BASE_MS * 1_000_000, 0)
    connect()
    assert fetched(venue) == [], "there is no book yet"
    venue.decode(depth(10))
    assert fetched(venue) == ["depth AB"]
    if was_live:
        venue.http(url, b'{"lastUpdateId":10,"bids":[],"asks":[]}')
        venue.decode(depth(11))
        assert venue.books["AB"].state == "live"
        connect()
        assert fetched(venue) == [], "a live book needs none"
        venue.decode(depth(20))
        assert fetched(venue) == ["depth AB"]
    venue.http_failed(Fetch("depth AB", url, 1), 400, b"")
    assert venue.proof["ab@depth@100ms"].refused
    venue.decode(depth(21))
    assert fetched(venue) == [], "it is refused"

    connect()
    assert fetched(venue) == ["depth AB"]
    venue.decode(depth(22))
    assert fetched(venue) == []
    venue.http(url, b'{"lastUpdateId":22,"bids":[],"asks":[]}')
    assert venue.books["AB"].state == "live"
    emit.close()


def test_polls_leave_request_weight_for_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll of open interest waits while less than the reserve is left; a snapshot wanted later goes before it."""
    now, asked = [1000.0], list[tuple[str, float]]()  # URL and when
    monkeypatch.setattr(budget, "_now", lambda: now[0])

    async def answer(_session: object, url: str, *_: object) -> transport.Answer:
        asked.append((url, now[0]))
        return transport.Answer(400, b"", 0.0)

    monkeypatch.setattr(transport, "get", answer)
    kind = BinanceFutures
    emit = Emit(tmp_path / "rings", "t", kind.EXCHANGE, ["tickers"], semaphore=False, capacities=SMALL)
    venue = kind(emit, Options(), kind.streams_of("AB", ["tickers"], Options()))
    venue.tick(BASE_MS * 1_000_000)
    poll = venue.wants.popleft()
    assert isinstance(poll, Fetch)
    shared = budget.Budget(tmp_path / "b", 2400, 60)
    assert not shared.take(shared.capacity / 2)  # the reserve is left, and not one more
    fetcher = transport.Fetcher(emit, venue, ["http://a"], shared, None)
    fetcher.want(poll)
    fetcher.want(Fetch("depth AB", "/depth", 20))

    class EnoughError(Exception):
        """The end of the test."""

    def later() -> None:
        now[0] += 60.0
        fetcher.want(poll)  # the same one; it only wakes up who waits

    def on_answer() -> None:
        if len(asked) == 2:
            raise EnoughError
        asyncio.get_running_loop().call_soon(later)  # runs once the fetcher waits, and not before

    with pytest.raises(EnoughError):
        asyncio.run(fetcher.run(on_answer, lambda: None))
    assert asked == [("http://a/depth", 1000.0), (f"http://a{poll.path}", 1060.0)], "with weight enough it goes"
    emit.close()
