"""Binance Spot and USD-M futures for the tools: https://github.com/binance/binance-spot-api-docs (web-socket-streams.md,
rest-api.md) and the futures pages of developers.binance.com.

Found by name through `tools.venues`. Knows stream names, the SUBSCRIBE dialogue, how a REST request maps to a recorded
body, and a decoder of a few lines for mdcompare. Never imports the connector.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec

from tools.venues import (
    EVERYBODY,
    NO_CHOICE,
    Answer,
    Body,
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

_EVENT_SUFFIX = {
    "trade": "trade",
    "aggTrade": "aggTrade",
    "depthUpdate": "depth@*",
    "bookTicker": "bookTicker",
    "24hrTicker": "ticker",
    "24hrMiniTicker": "miniTicker",
    "avgPrice": "avgPrice",
    "markPriceUpdate": "markPrice@*",
    "forceOrder": "forceOrder",
}
_SPEEDS = ("", "@100ms", "@250ms", "@500ms", "@1000ms", "@0ms", "@1s")  # that a frame does not tell
_STREAMS_IN_URL = 100  # keeps the request line below the 8 KB that many servers take
_STREAMS_PER_MESSAGE = 100
_QUOTE_ASSETS = ("USDT", "USDC", "FDUSD", "TUSD", "BUSD", "BTC", "ETH", "BNB", "EUR", "GBP", "TRY", "AUD", "BRL", "RUB", "JPY", "USD")  # fmt: skip
_EXCHANGE_INFO_SYMBOLS = 100  # beyond that the URL grows too long and the whole list is fetched


class _Combined(msgspec.Struct):
    stream: str
    data: msgspec.Raw


_decode_combined = msgspec.json.Decoder(_Combined).decode


class _Session(Session):
    def __init__(self, recorded: Recorded, combined: bool, streams: str, carried: Callable[[str], bool]) -> None:
        super().__init__()
        self._recorded = recorded
        self._combined = combined
        self._carried = carried
        self.streams.update(dict.fromkeys(s for s in streams.split("/") if s))

    def _subscribed_as(self, stream: str) -> str | None:
        """The client's name of a stream; one whose speed the frame does not tell fits any speed.

        None also for a stream that this path does not carry: it is acknowledged all the same.
        """
        if not self._carried(stream):
            return None
        if not stream.endswith("@*"):
            return stream if stream in self.streams else None
        return next((s for speed in _SPEEDS if (s := stream[:-2] + speed) in self.streams), None)

    def wants(self, stream: str) -> bool:
        return stream == EVERYBODY or self._subscribed_as(stream) is not None

    def dress(self, stream: str, raw: str) -> str:
        is_combined = raw.startswith('{"stream":') or (stream == EVERYBODY and '"stream"' in raw)
        if is_combined == self._combined:
            return raw
        if is_combined:
            try:
                return bytes(_decode_combined(raw).data).decode()
            except msgspec.DecodeError:  # a damaged frame of the recording: the client gets it as it is
                return raw
        return raw if stream == EVERYBODY else f'{{"stream":"{self._subscribed_as(stream)}","data":{raw}}}'

    def hear(self, text: str) -> list[str]:
        request = parse(text)
        if not isinstance(request, dict):
            return [text_of({"code": 3, "msg": "Invalid JSON: expected value at line 1 column 1"})]
        method, request_id = request.get("method"), request.get("id")
        params = request["params"] if isinstance(request.get("params"), list) else []
        if method in ("SUBSCRIBE", "UNSUBSCRIBE") and params and all(isinstance(p, str) for p in params):
            for stream in params:
                if method == "SUBSCRIBE":
                    self.streams[stream] = None
                else:
                    self.streams.pop(stream, None)
            return [self._ack(request_id)]
        if method == "LIST_SUBSCRIPTIONS":
            return [text_of({"result": list(self.streams), "id": request_id})]
        if method == "SET_PROPERTY" and len(params) == 2 and params[0] == "combined":
            self._combined = bool(params[1])
            return [self._ack(request_id)]
        if method == "GET_PROPERTY" and params == ["combined"]:
            return [text_of({"result": self._combined, "id": request_id})]
        return [text_of({"code": 2, "msg": "Invalid request: unknown method or parameters", "id": request_id})]

    def _ack(self, request_id: Any) -> str:
        fitting = {"result": None, "id": request_id}
        return next((raw for raw in self._recorded.replies if parse(raw) == fitting), text_of(fitting))


class Binance(Venue):
    """What both markets have in common."""

    overdue_code = 1008
    compared = ("trades", "orderbook_l2", "bbo")
    choices: Mapping[str, tuple[str, ...]] = {"trade_channel": ("trade", "aggTrade")}
    api: str  # path of REST
    suffixes: ClassVar[dict[str, str]]  # feed -> its stream, but for trades

    def stream_of(self, raw: str) -> str | None:
        if raw.startswith('{"stream":"'):
            name = raw[11 : raw.find('"', 11)]
            if "\\" not in name:
                return EVERYBODY if name == "!serverShutdown" else name
        frame = parse(raw)
        if isinstance(frame, list) and frame and isinstance(frame[0], dict):
            return f"!{_EVENT_SUFFIX.get(str(frame[0].get('e')), 'unknown')}@arr"
        if not isinstance(frame, dict):
            return EVERYBODY
        if "stream" in frame:
            return EVERYBODY if frame["stream"] == "!serverShutdown" else str(frame["stream"])
        if frame.keys() & {"result", "id", "code", "error"}:
            return None
        return self._stream_of_payload(frame)

    @staticmethod
    def _stream_of_payload(payload: Json) -> str:
        event = payload.get("e")
        order = payload["o"] if event == "forceOrder" and isinstance(payload.get("o"), dict) else {}
        symbol = str(payload.get("s") or order.get("s", "")).lower()
        if not symbol:
            return EVERYBODY
        if event == "kline":
            return f"{symbol}@kline_{payload['k']['i']}"
        if event is None and "B" in payload:  # of spot; on futures it has a name
            return f"{symbol}@bookTicker"
        return f"{symbol}@{_EVENT_SUFFIX.get(str(event), event)}"

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return self._session(path.strip("/"), query, recorded, lambda _: True)

    @staticmethod
    def _session(
        path: str, query: dict[str, str], recorded: Recorded, carried: Callable[[str], bool]
    ) -> Session | None:
        head, _, tail = path.partition("/")
        if head == "ws":
            return _Session(recorded, False, tail, carried)
        if head == "stream":
            return _Session(recorded, True, query.get("streams", ""), carried)
        return None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        resource = _resource(path)
        if resource == "ping":
            return Answer(200, "{}")
        if resource == "time":  # the client's own clock is what it is compared with
            return Answer(200, text_of({"serverTime": time.time_ns() // 1_000_000}))
        if resource == "exchangeInfo":
            return self._exchange_info(query, recorded)
        same = [b for b in recorded.bodies if _resource(b.path) == resource and _identity(b.query) == _identity(query)]
        if not same:
            return None
        # A snapshot that playback has not passed yet bridges for a client that has buffered from the start of its
        # subscription; when all are passed the latest one needs the shortest buffer.
        ahead = (b for b in same if b.position >= recorded.position)
        return Answer(200, next(ahead, same[-1]).raw)

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        symbol = query.get("symbol", "").lower()
        is_recorded = any(stream.split("@")[0] == symbol for stream in recorded.streams)
        if ("symbol" in query or "symbols" in query) and not is_recorded:
            return Answer(400, text_of({"code": -1121, "msg": "Invalid symbol."}))
        return Answer(404, text_of({"code": -1000, "msg": f"{path} is not in the recording."}))

    def _exchange_info(self, query: dict[str, str], recorded: Recorded) -> Answer | None:
        body = next((b for b in recorded.bodies if _resource(b.path) == "exchangeInfo"), None)
        wanted = query.get("symbols") or query.get("symbol")
        if body is not None and not wanted:
            return Answer(200, body.raw)
        info = self._parsed_info(body, recorded)
        if not wanted:
            return Answer(200, text_of(info))
        names = parse(wanted) if wanted.startswith("[") else [wanted]
        by_name = {s["symbol"]: s for s in info["symbols"]}
        if not isinstance(names, list) or any(name not in by_name for name in names):
            return None
        return Answer(200, text_of({**info, "symbols": [by_name[name] for name in names]}))

    @staticmethod
    def _parsed_info(body: Body | None, recorded: Recorded) -> Json:
        """The recorded exchangeInfo, or one made of the symbols that the recording holds."""
        if "exchangeInfo" not in recorded.cache:
            info: Json = json.loads(body.raw) if body is not None else _made_info()
            known = {s["symbol"] for s in info["symbols"]}
            symbols = dict.fromkeys(s.split("@")[0].upper() for s in recorded.streams if s and s[0] != "!")
            info["symbols"] += [_made_symbol(s) for s in symbols if s not in known]
            recorded.cache["exchangeInfo"] = info
        found: Json = recorded.cache["exchangeInfo"]
        return found

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, by_feed = list(tickers), {**self.suffixes, "trades": self.chosen("trade_channel", choice)}
        suffixes = []
        for feed in feeds:
            if feed not in by_feed:
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has {', '.join(by_feed)}")
            suffixes.append(by_feed[feed])
        return [f"{name.lower()}@{suffix}" for name in names for suffix in suffixes]

    def choice_of(self, stream: str) -> Choice:
        channel = stream.partition("@")[2]
        return {"trade_channel": channel} if channel in self.choices["trade_channel"] else NO_CHOICE

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        rest = streams[_STREAMS_IN_URL:]
        chunks = [rest[i : i + _STREAMS_PER_MESSAGE] for i in range(0, len(rest), _STREAMS_PER_MESSAGE)]
        messages = [text_of({"method": "SUBSCRIBE", "params": c, "id": n}) for n, c in enumerate(chunks, 1)]
        return f"{self._path(streams[0])}/stream?streams=" + "/".join(streams[:_STREAMS_IN_URL]), messages

    def _path(self, stream: str) -> str:
        """Path of the connection that carries this stream, in front of /stream."""
        return ""

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        return (
            str(frame.get("msg") or frame.get("error")) if isinstance(frame, dict) and "result" not in frame else None
        )

    def fetches(self, tickers: list[str]) -> list[str]:
        if not 0 < len(tickers) <= _EXCHANGE_INFO_SYMBOLS:
            return [f"{self.api}/exchangeInfo"]
        return [f"{self.api}/exchangeInfo?symbols={text_of([t.upper() for t in tickers])}"]

    def snapshot_for(self, stream: str) -> str | None:
        symbol, _, kind = stream.partition("@")
        return f"{self.api}/depth?symbol={symbol.upper()}&limit=1000" if kind in ("depth", "depth@100ms") else None

    def serves(self, url: str) -> bool:
        parts = urlsplit(url)
        if parts.hostname == "www.binance.com":  # once the host of both, then the path tells
            return parts.path.startswith("/fapi/") == self.api.startswith("/fapi/")
        return super().serves(url)


class BinanceSpot(Binance):
    exchange = "binance_spot"
    api = "/api/v3"
    suffixes: ClassVar[dict[str, str]] = {
        "orderbook_l2": "depth@100ms", "bbo": "bookTicker", "tickers": "ticker", "candles": "kline_1m",
    }  # fmt: skip
    hosts = ("stream.binance.com", "data-stream.binance.vision", "api.binance.com", "www.binance.com", "data-api.binance.vision")  # fmt: skip
    ws_url = "wss://stream.binance.com:9443"
    rest_url = "https://api.binance.com"
    ping_s = 20.0
    streams_per_connection = 1024
    message_gap_s = 0.25  # five a second, pongs included
    request_gap_s = 0.5  # depth with limit 1000 weighs 50 of 6000 a minute: two a second

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        data = frame.get("data", frame) if isinstance(frame, dict) else None
        if not isinstance(data, dict):
            return False
        event = data.get("e")
        if event == "depthUpdate":
            return "U" in data and "pu" not in data  # `pu` is the futures form
        if event in ("trade", "aggTrade"):
            return "M" in data  # futures have no `M`
        return event is None and {"u", "s", "b", "B", "a", "A"} == data.keys()

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        data = frame["data"] if "stream" in frame else frame
        event = data.get("e")
        if event == "trade":
            side = -1 if data["m"] else 1  # the buyer was the maker, so the taker sold
            yield Trade(data["s"], data["t"], str(data["t"]), float(data["p"]), float(data["q"]), side, _us(data["T"]))
        elif event == "aggTrade":
            yield _merged(data)
        elif event == "depthUpdate":
            yield BookChange(data["s"], data["u"], data["U"] - 1, _levels(data), snapshot=False, time_us=_us(data["E"]))
        elif event is None and "B" in data and "u" in data:
            values = (float(data["b"]), float(data["B"]), float(data["a"]), float(data["A"]))
            yield Quote(data["s"], data["u"], values, time_us=-1)


class BinanceFutures(Binance):
    """Its streams come on two paths; the wrong one, or none, acknowledges them and delivers nothing."""

    exchange = "binance_futures"
    api = "/fapi/v1"
    suffixes: ClassVar[dict[str, str]] = {
        "orderbook_l2": "depth@100ms", "bbo": "bookTicker", "tickers": "ticker", "candles": "kline_1m",
        "liquidations": "forceOrder",
    }  # fmt: skip
    hosts = ("fstream.binance.com", "demo-fstream.binance.com", "fapi.binance.com", "www.binance.com")
    ws_url = "wss://fstream.binance.com"
    rest_url = "https://fapi.binance.com"
    ping_s = 180.0
    streams_per_connection = 200
    message_gap_s = 0.125  # ten a second, pongs included
    request_gap_s = 0.6  # depth with limit 1000 weighs 20 of 2400 a minute: two a second

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        data = frame.get("data", frame) if isinstance(frame, dict) else None
        if not isinstance(data, dict):
            return False
        event = data.get("e")
        if event == "depthUpdate":
            return "pu" in data
        if event in ("trade", "aggTrade"):
            return "M" not in data and "T" in data
        return event in ("bookTicker", "markPriceUpdate", "forceOrder")

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        route, _, rest = path.strip("/").partition("/")
        if route not in ("public", "market"):
            route, rest = "public", path.strip("/")
        return self._session(rest, query, recorded, lambda stream: self._path(stream) == f"/{route}")

    def connections(self, streams: list[str]) -> list[list[str]]:
        by_path: dict[str, list[str]] = {}
        for stream in streams:
            by_path.setdefault(self._path(stream), []).append(stream)
        return list(itertools.chain.from_iterable(map(super().connections, by_path.values())))

    def fetches(self, tickers: list[str]) -> list[str]:
        return [f"{self.api}/exchangeInfo"]  # it takes no symbols

    def _path(self, stream: str) -> str:
        kind = stream.partition("@")[2]
        return "/public" if kind.startswith(("depth", "rpiDepth", "bookTicker", "trade")) else "/market"

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        data = frame["data"] if "stream" in frame else frame
        event = data.get("e")
        if event == "trade":
            if data["X"] not in ("INSURANCE_FUND", "ADL", "NA"):
                side = -1 if data["m"] else 1
                price, qty = float(data["p"]), float(data["q"])
                yield Trade(data["s"], data["t"], str(data["t"]), price, qty, side, data["T"] * 1000)
        elif event == "aggTrade":
            yield _merged(data)
        elif event == "depthUpdate":
            yield BookChange(data["s"], data["u"], data["pu"], _levels(data), snapshot=False, time_us=data["T"] * 1000)
        elif event == "bookTicker":
            values = (float(data["b"]), float(data["B"]), float(data["a"]), float(data["A"]))
            yield Quote(data["s"], data["u"], values, time_us=data["T"] * 1000)


def _merged(data: Json) -> Trade:
    """What one order took at one price; it has a counter of its own."""
    side = -1 if data["m"] else 1
    return Trade(data["s"], data["a"], str(data["a"]), float(data["p"]), float(data["q"]), side, _us(data["T"]))


def _levels(data: Json) -> tuple[tuple[int, float, float], ...]:
    return tuple((side, float(p), float(q)) for side, name in ((1, "b"), (-1, "a")) for p, q in data[name])


def _us(venue_time: int) -> int:
    """Microseconds of a time in ms or us; the unit follows `timeUnit` of the connection and shows in the size."""
    return venue_time if venue_time > 100_000_000_000_000 else venue_time * 1000


def _resource(path: str) -> str:
    """`/api/v3/depth` and `/api/v1/depth` are one resource."""
    parts = path.strip("/").split("/")
    return "/".join(parts[2:]) if len(parts) > 2 and parts[0] in ("api", "fapi") and parts[1] in ("v1", "v3") else ""


def _identity(query: dict[str, str]) -> tuple[str, ...]:
    return tuple(query.get(key, "") for key in ("symbol", "interval", "fromId", "startTime", "endTime"))


def _made_info() -> Json:
    limit = {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6000}
    now_ms = time.time_ns() // 1_000_000
    return {"timezone": "UTC", "serverTime": now_ms, "rateLimits": [limit], "exchangeFilters": [], "symbols": []}


def _made_symbol(symbol: str) -> Json:
    quote = next((q for q in _QUOTE_ASSETS if symbol.endswith(q) and symbol != q), symbol[-3:])
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": symbol[: -len(quote)],
        "quoteAsset": quote,
        "orderTypes": ["LIMIT", "MARKET"],
        "isSpotTradingAllowed": True,
        "filters": [],
        "permissions": ["SPOT"],
    }


VENUES = (BinanceSpot(), BinanceFutures())
