"""Deribit's login, by the decoder alone: what is subscribed when, and what a refused login costs."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mdcollector.emit import Emit
from mdcollector.exchanges import Options, Send
from mdcollector.exchanges.deribit import Deribit

KEY = {"client_id": "id", "client_secret": "secret"}
TOKEN = {"access_token": "a", "refresh_token": "r", "expires_in": 900}
FEEDS = ("trades", "orderbook_l2", "tickers")
RAW = ["trades.A.raw", "book.A.raw", "ticker.A.raw"]
SLOW = ["trades.A.100ms", "book.A.100ms", "ticker.A.100ms"]


class Session:
    """A venue and what it sends; answers go to the newest request of a method."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.emit = Emit(folder, "t", Deribit.EXCHANGE, Deribit.FEEDS, semaphore=False)
        self.options = options
        self.venue = Deribit(self.emit, options, Deribit.streams_of("A", FEEDS, options))
        self.sent: list[dict[str, Any]] = []

    def open(self) -> None:
        self.venue.opened()
        self.take()

    def take(self) -> None:
        while self.venue.wants:
            want = self.venue.wants.popleft()
            assert isinstance(want, Send)
            self.sent.append(json.loads(want.text))

    def answer(self, method: str, **outcome: Any) -> None:
        request = next(r for r in reversed(self.sent) if r["method"] == method)
        self.venue.decode(json.dumps({"jsonrpc": "2.0", "id": request["id"], **outcome}).encode())
        self.take()

    def subscribed(self) -> list[str]:
        """Channels asked for since the last look."""
        channels = [c for r in self.sent if r["method"] == "public/subscribe" for c in r["params"]["channels"]]
        self.sent = [r for r in self.sent if r["method"] != "public/subscribe"]
        return channels


Make = Callable[..., Session]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Make]:
    made: list[Session] = []

    def make(**options: Any) -> Session:
        made.append(Session(tmp_path / str(len(made)), Options(credentials=KEY, **options)))
        made[-1].open()
        return made[-1]

    yield make
    for one in made:
        one.emit.close()


def names(tickers: Sequence[str]) -> list[str]:
    return [name.replace(".A.", f".{ticker}.") for ticker in tickers for name in RAW]


def test_nothing_is_subscribed_before_the_login_is_answered(session: Make) -> None:
    """Raw channels would be refused: what is listed meanwhile, or asked for again, comes with all others."""
    one = session()
    one.venue.add(Deribit.streams_of("B", FEEDS, one.options), connected=True)
    one.venue.subscribe(RAW[:1])
    one.take()
    assert one.subscribed() == []
    one.answer("public/auth", result=TOKEN)
    assert one.subscribed() == names("AB")
    one.venue.add(Deribit.streams_of("C", FEEDS, one.options), connected=True)
    one.take()
    assert one.subscribed() == names("C")


def test_a_login_that_succeeds_later_brings_the_raw_channels_back(session: Make) -> None:
    one = session()
    one.answer("public/auth", error={"code": 11094, "message": "internal_server_error"})
    assert one.subscribed() == SLOW
    assert "11094" in one.venue.notes["credentials"]
    one.venue.disconnected("reconnect")
    one.open()
    assert one.subscribed() == []
    one.answer("public/auth", result=TOKEN)
    assert one.subscribed() == RAW
    assert list(one.venue.proof) == RAW
    assert "credentials" not in one.venue.notes


def test_beside_a_connection_of_the_slower_channels_they_stay(session: Make) -> None:
    """One book cannot be continued by the changes of both kinds of channel."""
    one = session()
    one.answer("public/auth", error={"code": 11094, "message": "internal_server_error"})
    one.subscribed()
    one.venue.overlapping = True
    one.open()
    one.answer("public/auth", result=TOKEN)
    assert one.subscribed() == SLOW
    assert "11094" in one.venue.notes["credentials"]
    one.venue.overlapping = False
    one.venue.disconnected("reconnect")
    one.open()
    one.answer("public/auth", result=TOKEN)
    assert one.subscribed() == RAW


def test_slower_channels_that_are_configured_stay(session: Make) -> None:
    one = session(book_interval="100ms")
    one.answer("public/auth", error={"code": 11094, "message": "internal_server_error"})
    assert one.subscribed() == SLOW
    one.venue.disconnected("reconnect")
    one.open()
    one.answer("public/auth", result=TOKEN)
    assert one.subscribed() == SLOW
    assert "credentials" not in one.venue.notes
