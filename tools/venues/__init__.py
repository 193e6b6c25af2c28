"""What the tools must know of a venue: the contract, and how a venue is found by its name.

Used by mdreplay and mdcompare. Each file here gives `VENUES`, objects that keep this contract. Nothing here imports
`mdcollector.exchanges`: these files are a second, independent reading of the same protocol, so that an error of a
connector is not repeated by the tool that is to find it. All of it is synchronous and free of I/O.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

CANDLES_COMPARED = "1m"  # the interval that mdcompare and mdreplay ask a polled venue for
EVERYBODY = ""  # "stream" of a frame that goes to every client: notices of the server, frames that nobody can read
Json = dict[str, Any]
Choice = Mapping[str, str]  # key of the fleet file that chooses a channel -> its value; none = the venue's default
NO_CHOICE: Choice = {}


@dataclass(frozen=True, slots=True)
class Body:
    """One recorded REST answer and where in the recording it lies."""

    position: int
    path: str
    query: dict[str, str]
    raw: str

    @classmethod
    def of(cls, position: int, url: str, raw: str) -> "Body":
        parts = urlsplit(url)
        return cls(position, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), raw)


@dataclass
class Recorded:
    """What the first pass over the recordings found; the venue answers requests out of it."""

    streams: Counter[str] = field(default_factory=Counter)  # data frames by stream, in order of first appearance
    replies: list[str] = field(default_factory=list)  # frames that answered a request, exact text
    bodies: list[Body] = field(default_factory=list)
    frames: int = 0  # data frames in all
    control: int = 0  # frames that belong to one client's dialogue and are never played to another
    position: int = 0  # entries that playback has passed
    cache: dict[str, Any] = field(default_factory=dict)  # what a venue derived from the above, by its own keys


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer as the venue words it."""

    status: int
    text: str


class Session(ABC):
    """One client connection of the replay server, as the venue sees it."""

    heartbeat_s: float = 0.0  # 0: the client asked for none
    overdue = False  # the client left a heartbeat unanswered and is to be disconnected

    def __init__(self) -> None:
        self.streams: dict[str, None] = {}  # subscribed, in the order of the requests

    def wants(self, stream: str) -> bool:
        """Whether frames of this recorded stream go to this client."""
        return stream in self.streams or stream == EVERYBODY

    def dress(self, stream: str, raw: str) -> str:
        """The text as this client gets it; the recorded text itself unless the connection asked for another form."""
        return raw

    @abstractmethod
    def hear(self, text: str) -> list[str]:
        """Take a text frame of the client; what to send back at once."""

    def beat(self) -> list[str]:
        """Frames to send each `heartbeat_s`; may set `overdue`."""
        return []


@dataclass(frozen=True, slots=True)
class Trade:
    """One execution as the venue reported it."""

    ticker: str
    order: int  # the venue's counter, +1 per trade of the instrument
    trade_id: str
    price: float
    qty: float
    side: int
    time_us: int
    count: int = 1  # trades that it stands for, where the venue merges them; `order` is that of the last


@dataclass(frozen=True, slots=True)
class BookChange:
    """One book message: every level as side, price, absolute quantity."""

    ticker: str
    order: int  # update id
    prev: int  # id of the message before it, by its own words; -1 where it has none
    levels: tuple[tuple[int, float, float], ...]
    snapshot: bool
    time_us: int


@dataclass(frozen=True, slots=True)
class Quote:
    """Best bid and offer; `order` is -1 where the venue gives no id."""

    ticker: str
    order: int
    values: tuple[float, float, float, float]  # bid price, bid qty, ask price, ask qty
    time_us: int  # -1 where the venue gives none


@dataclass(frozen=True, slots=True)
class Candle:
    """A closed candle."""

    ticker: str
    interval: str
    open_us: int
    values: tuple[float, ...]  # open, high, low, close


@dataclass(frozen=True, slots=True)
class Poll:
    """A REST request (path and query) that takes the place of a stream, and the pause behind it."""

    path: str
    every_s: float


Seen = Trade | BookChange | Quote | Candle


class Venue(ABC):
    """Everything venue-specific that a tool needs."""

    exchange: str  # name of records.Exchange, lower case
    hosts: tuple[str, ...]  # hosts that stand in the URLs of recordings
    ws_url: str  # "" = the venue is polled: streams are resources, asked for as `poll` says
    rest_url: str
    ping_s: float  # how often the venue sends WebSocket pings
    overdue_code: int  # close code for an unanswered heartbeat
    streams_per_connection: int
    message_gap_s: float  # pause between two messages of the tools' own connection
    request_gap_s: float  # pause between two of their REST requests
    compared: tuple[str, ...]  # feeds that have an id by which mdcompare can match
    # Where a connector may choose: what a connection without a key can have, too, by the key of the fleet file; the
    # default first.
    choices: Mapping[str, tuple[str, ...]] = {}

    # recordings and their playback

    def serves(self, url: str) -> bool:
        """Whether this URL of a recording can only be this venue's."""
        return urlsplit(url).hostname in self.hosts

    @abstractmethod
    def recognises(self, raw: str) -> bool:
        """Whether this frame can only be this venue's."""

    @abstractmethod
    def stream_of(self, raw: str) -> str | None:
        """Name of the stream of a data frame, EVERYBODY, or None for a frame of one client's dialogue."""

    @abstractmethod
    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        """State of a new client connection; None where the venue has no such path."""

    @abstractmethod
    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        """Answer a GET; None where the recording has no answer."""

    @abstractmethod
    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        """The venue's own error for a request that cannot be answered."""

    # an own connection

    @abstractmethod
    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        """Streams to subscribe; ValueError names a feed that the venue does not have."""

    def choice_of(self, stream: str) -> Choice:
        """What must have been chosen for a connector to have this stream."""
        return NO_CHOICE

    def chosen(self, key: str, choice: Choice) -> str:
        """The value of that key, the venue's default where none is given."""
        return choice.get(key) or self.choices[key][0]

    def connections(self, streams: list[str]) -> list[list[str]]:
        """These streams as they are spread over connections."""
        size = self.streams_per_connection
        return [streams[i : i + size] for i in range(0, len(streams), size)]

    @abstractmethod
    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        """Path and query of the connection, and the messages to send when it is open."""

    @abstractmethod
    def answer(self, raw: str) -> str | None:
        """What the client must send back to a frame of the dialogue, if anything."""

    @abstractmethod
    def complaint(self, raw: str) -> str | None:
        """The venue's words when a frame of the dialogue refuses something."""

    @abstractmethod
    def fetches(self, tickers: list[str]) -> list[str]:
        """REST requests (path and query) that a connector makes before it subscribes."""

    @abstractmethod
    def snapshot_for(self, stream: str) -> str | None:
        """REST request (path and query) that goes with the first frame of this stream, if any."""

    @abstractmethod
    def decode(self, raw: str) -> Iterator[Seen]:
        """Trades, book changes and quotes of one data frame, with plain `json`."""

    # a polled venue

    def poll(self, stream: str, first: bool) -> Poll:
        """The request for this stream; the `first` one may reach back."""
        raise NotImplementedError(f"{self.exchange} is not polled")

    def decode_body(self, path: str, query: dict[str, str], raw: str) -> Iterator[Seen]:
        """What one answer says for good, with plain `json`."""
        raise NotImplementedError(f"{self.exchange} is not polled")


@cache
def _venues() -> dict[str, Venue]:
    found: dict[str, Venue] = {}
    for module in pkgutil.iter_modules(__path__):
        for venue in importlib.import_module(f"{__name__}.{module.name}").VENUES:
            assert isinstance(venue, Venue)
            found[venue.exchange] = venue
    return found


def venue_names() -> list[str]:
    return sorted(_venues())


def load_venue(name: str) -> Venue:
    """The venue of that name; ValueError tells which exist."""
    try:
        return _venues()[name]
    except KeyError:
        raise ValueError(f"unknown exchange {name!r}; known: {', '.join(venue_names())}") from None


def parse(raw: str) -> Any:
    """The JSON value of a text, or None where it is none."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None


def text_of(value: Any) -> str:
    """Compact JSON text as venues send it."""
    return msgspec.json.encode(value).decode()
