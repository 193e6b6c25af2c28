"""A book whose snapshot was refused, decoded from frames: it is asked for again on the next connection, and only then."""

import json
from pathlib import Path

import pytest

from mdcollector.emit import Emit
from mdcollector.exchanges import Fetch, Options, Send
from mdcollector.exchanges.binance import Binance, BinanceFutures, BinanceSpot

SMALL = {"orderbook_l2": 512, "gaps": 512, "instruments": 512}
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
