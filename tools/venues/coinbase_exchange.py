"""Coinbase Exchange for the tools: https://docs.cdp.coinbase.com/exchange (websocket-feed and REST pages).

Found by name through `tools.venues`. Knows channels and products, the subscribe dialogue, how a request maps to a
recorded body, and a decoder of a few lines for mdcompare. Never imports the connector.
"""

import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from tools.venues import (
    EVERYBODY,
    NO_CHOICE,
    Answer,
    BookChange,
    Choice,
    Json,
    Quote,
    Recorded,
    Seen,
    Session,
    Trade,
    Venue,
    parse,
    text_of,
)

_CHANNELS = {"trades": ("matches", "heartbeat"), "orderbook_l2": ("level2_batch",), "bbo": ("ticker",), "tickers": ("ticker",)}  # fmt: skip
# Names of one channel, as requests, replies and the years had them -> the name that is used here.
_NAMES = {"level2": "level2_batch", "level2_50": "level2_batch"}
_CHANNEL_OF_TYPE = {
    "l2update": "level2_batch", "snapshot": "level2_batch", "match": "matches", "last_match": "matches",
    "ticker": "ticker", "heartbeat": "heartbeat",
}  # fmt: skip
_PRODUCTS_PER_MESSAGE = 100


class _Session(Session):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded

    def hear(self, text: str) -> list[str]:
        request = parse(text)
        if not isinstance(request, dict) or request.get("type") not in ("subscribe", "unsubscribe"):
            return [_error("Malformed JSON" if request is None else "Failed to subscribe", "type is not valid")]
        pairs = _pairs(request)
        if not pairs:
            return [_error("Failed to subscribe", "channels and product_ids are required")]
        unknown = [ticker for _, ticker in pairs if ticker not in _products(self._recorded)]
        if unknown:
            return [_error("Failed to subscribe", f"{unknown[0]} is not a valid product")]
        for channel, ticker in pairs:
            stream = f"{_NAMES.get(channel, channel)}:{ticker}"
            if request["type"] == "subscribe":
                self.streams[stream] = None
            else:
                self.streams.pop(stream, None)
        return [self._reply()]

    def _reply(self) -> str:
        """All that is subscribed now, in the recorded words where the recording has just this."""
        found: dict[str, list[str]] = {}
        for stream in self.streams:
            channel, _, ticker = stream.partition(":")
            found.setdefault(channel, []).append(ticker)
        wanted = {channel: set(tickers) for channel, tickers in found.items()}
        for raw in self._recorded.replies:
            reply = parse(raw)
            if isinstance(reply, dict) and reply.get("type") == "subscriptions" and _listed(reply) == wanted:
                return raw
        channels = [{"name": name, "product_ids": tickers, "account_ids": None} for name, tickers in found.items()]
        return text_of({"type": "subscriptions", "channels": channels})


class CoinbaseExchange(Venue):
    exchange = "coinbase_exchange"
    hosts = ("ws-feed.exchange.coinbase.com", "ws-direct.exchange.coinbase.com", "ws-feed.pro.coinbase.com",
             "api.exchange.coinbase.com", "api.pro.coinbase.com")  # fmt: skip
    ws_url = "wss://ws-feed.exchange.coinbase.com"
    rest_url = "https://api.exchange.coinbase.com"
    ping_s = 0.0
    overdue_code = 1008
    streams_per_connection = 300
    message_gap_s = 0.1
    request_gap_s = 0.2  # ten a second are allowed
    compared = ("trades", "bbo")  # an l2update has no id, and two connections cut the batches differently

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        if not isinstance(frame, dict):
            return False
        return frame.get("type") in _CHANNEL_OF_TYPE and "product_id" in frame

    def stream_of(self, raw: str) -> str | None:
        frame = parse(raw)
        if not isinstance(frame, dict):
            return EVERYBODY
        kind = frame.get("type")
        if kind in ("subscriptions", "error"):
            return None
        if kind not in _CHANNEL_OF_TYPE:
            return EVERYBODY
        return f"{_CHANNEL_OF_TYPE[kind]}:{frame.get('product_id')}"

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return _Session(recorded) if path in ("", "/") else None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        exact = next((b for b in recorded.bodies if b.path == path and b.query == query), None)
        if exact is not None:
            return Answer(200, exact.raw)
        parts = path.strip("/").split("/")
        if parts == ["time"]:
            now_s = time.time()
            return Answer(200, text_of({"iso": datetime.fromtimestamp(now_s, UTC).isoformat(), "epoch": now_s}))
        if parts == ["products"]:
            return Answer(200, text_of(list(_products(recorded).values())))
        if parts[0] == "products" and len(parts) == 2 and parts[1] in _products(recorded):
            return Answer(200, text_of(_products(recorded)[parts[1]]))
        return None

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        return Answer(404, text_of({"message": "NotFound"}))

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, channels = list(tickers), dict[str, None]()
        for feed in feeds:
            if feed not in _CHANNELS:
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has {', '.join(_CHANNELS)}")
            channels.update(dict.fromkeys(_CHANNELS[feed]))
        return [f"{channel}:{name}" for name in names for channel in channels]

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        by_channel: dict[str, list[str]] = {}
        for stream in streams:
            channel, _, ticker = stream.partition(":")
            by_channel.setdefault(channel, []).append(ticker)
        messages = [
            text_of({"type": "subscribe", "channels": [{"name": channel, "product_ids": tickers[i : i + _PRODUCTS_PER_MESSAGE]}]})
            for channel, tickers in by_channel.items()
            for i in range(0, len(tickers), _PRODUCTS_PER_MESSAGE)
        ]  # fmt: skip
        return "/", messages

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        if not isinstance(frame, dict) or frame.get("type") != "error":
            return None
        return f"{frame.get('message')}: {frame.get('reason')}"

    def fetches(self, tickers: list[str]) -> list[str]:
        return ["/products"]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        kind, ticker = frame.get("type"), frame.get("product_id")
        if kind in ("match", "last_match"):
            side = {"buy": -1, "sell": 1}[frame["side"]]  # that of the maker: the taker did the opposite
            price, size, id_ = float(frame["price"]), float(frame["size"]), frame["trade_id"]
            yield Trade(ticker, id_, str(id_), price, size, side, _us(frame["time"]))
        elif kind == "l2update":
            levels = tuple((1 if s == "buy" else -1, float(p), float(q)) for s, p, q in frame["changes"])
            yield BookChange(ticker, _us(frame["time"]), -1, levels, snapshot=False, time_us=_us(frame["time"]))
        elif kind == "snapshot":
            levels = tuple(
                (side, float(p), float(q)) for side, key in ((1, "bids"), (-1, "asks")) for p, q in frame[key]
            )
            at = _us(frame["time"]) if "time" in frame else 0
            yield BookChange(ticker, at, -1, levels, snapshot=True, time_us=at)
        elif kind == "ticker" and "best_bid_size" in frame:
            keys = ("best_bid", "best_bid_size", "best_ask", "best_ask_size")
            bid, bid_size, ask, ask_size = (float(frame[key]) for key in keys)
            yield Quote(ticker, frame["sequence"], (bid, bid_size, ask, ask_size), _us(frame["time"]))


def _us(text: str) -> int:
    moment = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
    return max(0, (moment.days * 86_400 + moment.seconds) * 1_000_000 + moment.microseconds)


def _error(message: str, reason: str) -> str:
    return text_of({"type": "error", "message": message, "reason": reason})


def _pairs(request: Json) -> list[tuple[str, str]]:
    """Channel and product of all that a request names; products may stand beside a channel or above all of them."""
    common: Any = request.get("product_ids", [])
    channels: Any = request.get("channels", [])
    if not isinstance(channels, list) or not isinstance(common, list):
        return []
    pairs: list[tuple[str, str]] = []
    for channel in channels:
        name = channel.get("name") if isinstance(channel, dict) else channel
        tickers = channel.get("product_ids", common) if isinstance(channel, dict) else common
        pairs += [(str(name), str(ticker)) for ticker in tickers] if isinstance(tickers, list) else []
    return pairs


def _listed(reply: Json) -> dict[str, set[str]]:
    return {_NAMES.get(c["name"], c["name"]): set(c["product_ids"]) for c in reply["channels"] if c.get("product_ids")}


def _products(recorded: Recorded) -> dict[str, Json]:
    """Recorded products by id, and made ones for what else the recording speaks of."""
    if "products" not in recorded.cache:
        bodies = [json.loads(body.raw) for body in recorded.bodies if body.path == "/products"]
        found: dict[str, Json] = {product["id"]: product for body in bodies for product in body}
        for stream in recorded.streams:
            ticker = stream.partition(":")[2]
            if ticker and ticker not in found:
                found[ticker] = _made_product(ticker)
        recorded.cache["products"] = found
    products: dict[str, Json] = recorded.cache["products"]
    return products


def _made_product(ticker: str) -> Json:
    base, _, quote = ticker.partition("-")
    return {
        "id": ticker,
        "base_currency": base,
        "quote_currency": quote,
        "quote_increment": "0.01",
        "base_increment": "0.00000001",
        "display_name": f"{base}/{quote}",
        "status": "online",
        "status_message": "",
        "trading_disabled": False,
    }


VENUES = (CoinbaseExchange(),)
