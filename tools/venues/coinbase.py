"""Coinbase Advanced Trade for the tools: docs.cdp.coinbase.com, Advanced Trade (WebSocket and public REST), 2026.

Found by name through `tools.venues`. Knows channel names, the dialogue, how a request maps to a recorded body, and a
decoder of a few lines for mdcompare. Never imports the connector. Every message of a connection carries the next
`sequence_num`, so a client of a replay gets the recorded frames under numbers of its own connection.
"""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from tools.venues import (
    EVERYBODY,
    NO_CHOICE,
    Answer,
    BookChange,
    Choice,
    Json,
    Recorded,
    Seen,
    Session,
    Trade,
    Venue,
    parse,
    text_of,
)

_CHANNEL = {
    "trades": "market_trades",
    "orderbook_l2": "level2",
    "bbo": "level2",
    "tickers": "ticker",
    "candles": "candles",
}
_SUBSCRIBED_AS = {"l2_data": "level2"}  # channel of a message -> of its subscription, where they differ
_CHANNELS = (*dict.fromkeys(_CHANNEL.values()), "heartbeats")
_PRODUCTS_PER_MESSAGE = 100
_LIST = "/api/v3/brokerage/market/products"
_NUMBER = re.compile(r'("sequence_num"\s*:\s*)\d+')
_PRODUCT = re.compile(r'"product_id"\s*:\s*"([^"]+)"')
_HEAD_CHARS = 300
_MAKER = {"BUY": 1, "SELL": -1}


class _Session(Session):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded
        self._number = 0
        self._beats = 0

    def dress(self, stream: str, raw: str) -> str:
        if stream == EVERYBODY:
            return raw  # what nobody can read has no number of this connection
        number, self._number = self._number, self._number + 1
        return _NUMBER.sub(rf"\g<1>{number}", raw, count=1)

    def _message(self, channel: str, events: list[Json]) -> str:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        raw = text_of({"channel": channel, "timestamp": now, "sequence_num": 0, "events": events})
        return self.dress(channel, raw)

    def hear(self, text: str) -> list[str]:
        request = parse(text)
        if not isinstance(request, dict) or request.get("type") not in ("subscribe", "unsubscribe"):
            return [_error("failed to parse message")]
        channel, products = request.get("channel"), request.get("product_ids", [])
        if channel not in _CHANNELS or not isinstance(products, list):
            return [_error("authentication failure")]
        names = ["heartbeats"] if channel == "heartbeats" else [str(product) for product in products]
        streams = [f"{channel}:{name}" for name in names]
        if request["type"] == "subscribe":
            self.streams.update(dict.fromkeys(streams))
        else:
            for stream in streams:
                self.streams.pop(stream, None)
        self.heartbeat_s = 1.0 if "heartbeats:heartbeats" in self.streams else 0.0
        return [self._message("subscriptions", [{"subscriptions": _by_channel(self.streams)}])]

    def beat(self) -> list[str]:
        self._beats += 1
        event = {"current_time": f"{datetime.now(UTC)} UTC", "heartbeat_counter": self._beats}
        return [self._message("heartbeats", [event])]


class Coinbase(Venue):
    exchange = "coinbase"
    hosts = ("advanced-trade-ws.coinbase.com", "api.coinbase.com")
    ws_url = "wss://advanced-trade-ws.coinbase.com"
    rest_url = "https://api.coinbase.com"
    ping_s = 0.0
    overdue_code = 1000
    streams_per_connection = 400
    message_gap_s = 0.2  # 8 a second and address
    request_gap_s = 0.2  # 10 a second and address
    compared = ("trades", "orderbook_l2")

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        return isinstance(frame, dict) and {"channel", "sequence_num", "events"} <= frame.keys()

    def stream_of(self, raw: str) -> str | None:
        channel = raw[12 : raw.find('"', 12)] if raw.startswith('{"channel":"') else ""
        product = _PRODUCT.search(raw, 0, _HEAD_CHARS)
        if not channel or (channel not in ("subscriptions", "heartbeats") and product is None):
            frame = parse(raw)
            if not isinstance(frame, dict):
                return EVERYBODY
            channel, product = str(frame.get("channel", "")), _PRODUCT.search(raw)
        if channel in ("", "subscriptions", "heartbeats"):
            return None  # an error, a reply, or a heartbeat: each connection has its own
        return f"{_SUBSCRIBED_AS.get(channel, channel)}:{product[1] if product else ''}"

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return _Session(recorded) if path in ("", "/") else None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        exact = next((b for b in recorded.bodies if b.path == path and b.query == query), None)
        known = exact or next((b for b in recorded.bodies if b.path == path), None)
        if known is not None:
            return Answer(200, known.raw)
        if path == _LIST:
            names = sorted({stream.partition(":")[2] for stream in recorded.streams} - {""})
            return Answer(200, text_of({"products": [_product(name) for name in names], "num_products": len(names)}))
        if path.startswith(f"{_LIST}/") and path.endswith("/ticker"):
            return Answer(200, text_of({"trades": [], "best_bid": "", "best_ask": ""}))
        return None

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        return Answer(404, text_of({"error": "NOT_FOUND", "message": "not in the recording"}))

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, channels = list(tickers), []
        for feed in feeds:
            if feed not in _CHANNEL:
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has {', '.join(_CHANNEL)}")
            channels.append(_CHANNEL[feed])
        return list(dict.fromkeys(f"{channel}:{name}" for name in names for channel in channels))

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        messages = [text_of({"type": "subscribe", "channel": "heartbeats"})]
        for channel, products in _by_channel(dict.fromkeys(streams)).items():
            for i in range(0, len(products), _PRODUCTS_PER_MESSAGE):
                some = products[i : i + _PRODUCTS_PER_MESSAGE]
                messages.append(text_of({"type": "subscribe", "channel": channel, "product_ids": some}))
        return "/", messages

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        return str(frame.get("message")) if isinstance(frame, dict) and frame.get("type") == "error" else None

    def fetches(self, tickers: list[str]) -> list[str]:
        return [_LIST]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        for event in frame["events"]:
            if frame["channel"] == "market_trades" and event["type"] == "update":
                for t in sorted(event["trades"], key=lambda t: int(t["trade_id"])):
                    side = -_MAKER[t["side"]]  # the venue names the maker's
                    number, at = int(t["trade_id"]), _us(t["time"])
                    yield Trade(t["product_id"], number, t["trade_id"], float(t["price"]), float(t["size"]), side, at)
            elif frame["channel"] == "l2_data":
                levels = tuple(
                    (1 if level["side"] == "bid" else -1, float(level["price_level"]), float(level["new_quantity"]))
                    for level in event["updates"]
                )
                at = max((_us(level["event_time"]) for level in event["updates"]), default=_us(frame["timestamp"]))
                yield BookChange(event["product_id"], at, -1, levels, event["type"] == "snapshot", at)


def _us(text: str) -> int:
    """us since the epoch of an RFC 3339 time in UTC with up to nine decimals."""
    second, _, part = text.rstrip("Z").partition(".")
    at = datetime.fromisoformat(second).replace(tzinfo=UTC)
    return int(at.timestamp()) * 1_000_000 + int(part.ljust(6, "0")[:6])


def _error(message: str) -> str:
    return text_of({"type": "error", "message": message})


def _by_channel(streams: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for stream in streams:
        channel, _, product = stream.partition(":")
        found.setdefault(channel, []).append(product)
    return found


def _product(name: str) -> Json:
    base, _, quote = name.partition("-")
    return {
        "product_id": name,
        "status": "online",
        "product_type": "SPOT",
        "base_currency_id": base,
        "quote_currency_id": quote,
        "base_increment": "0.00000001",
        "quote_increment": "0.01",
        "price_increment": "0.01",
        "alias": "",
        "is_disabled": False,
        "trading_disabled": False,
        "new_at": None,
    }


VENUES = (Coinbase(),)
