"""Bybit v5 for the tools: https://bybit-exchange.github.io/docs/v5 (WebSocket topics, GET /v5/market).

Found by name through `tools.venues`, one venue a category. Knows topic names, the dialogue, how a request maps to a
recorded body, and a decoder of a few lines for mdcompare. Never imports the connector.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

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

_MARKET = "/v5/market/"
_PREFIX = '{"topic":"'
_IDENTITY = ("category", "symbol", "baseCoin", "interval", "cursor")  # parameters that choose the resource
_TOPICS_PER_MESSAGE = 10  # spot takes no more
_NOT_RECORDED: Json = {"retCode": 10001, "retMsg": "not in the recording", "result": {}, "retExtInfo": {}}


class _Session(Session):
    def __init__(self, recorded: Recorded, category: str) -> None:
        super().__init__()
        self._recorded, self._category = recorded, category

    def hear(self, text: str) -> list[str]:
        request = parse(text)
        if not isinstance(request, dict):
            return [text_of({"success": False, "ret_msg": "error:invalid json", "conn_id": "replay", "op": ""})]
        op, args, req_id = request.get("op"), request.get("args"), request.get("req_id", "")
        if op == "ping" and self._category == "option":
            now_ms = str(time.time_ns() // 1_000_000)
            return [text_of({"req_id": req_id, "op": "pong", "args": [now_ms], "conn_id": "replay"})]
        if op == "ping":
            return [self._reply(request, True, "pong")]
        if (
            op not in ("subscribe", "unsubscribe")
            or not isinstance(args, list)
            or not all(isinstance(a, str) for a in args)
        ):
            return [self._reply(request, False, "error:bad request")]
        if op == "unsubscribe":
            for topic in args:
                self.streams.pop(topic, None)
            return [self._reply(request, True, "", args)]
        unknown = [topic for topic in args if not self._known(topic)]
        if self._category == "option":
            good = [topic for topic in args if topic not in unknown]
            self.streams.update(dict.fromkeys(good))
            return [self._reply(request, not unknown, "", good, unknown)]
        if unknown:  # one bad topic fails the whole request
            return [self._reply(request, False, f"error:handler not found,topic:{unknown[0]}")]
        self.streams.update(dict.fromkeys(args))
        return [self._reply(request, True, "")]

    def _known(self, topic: str) -> bool:
        """A topic of an instrument that the recording speaks of may be silent."""
        return topic in self._recorded.streams or _instrument_of(topic) in _instruments(self._recorded, self._category)

    def _reply(self, request: Json, success: bool, text: str, good: Iterable[str] = (), bad: Iterable[str] = ()) -> str:
        if self._category == "option":
            topics = {"failTopics": list(bad), "successTopics": list(good)}
            return text_of({"success": success, "conn_id": "replay", "data": topics, "type": "COMMAND_RESP"})
        head = {"success": success, "ret_msg": text, "conn_id": "replay"}
        return text_of({**head, "req_id": request.get("req_id", ""), "op": request.get("op", "")})


class _Bybit(Venue):
    hosts = ("stream.bybit.com", "api.bybit.com", "stream-testnet.bybit.com", "api-testnet.bybit.com")
    ws_url = "wss://stream.bybit.com"
    rest_url = "https://api.bybit.com"
    ping_s = 0.0
    overdue_code = 1008
    streams_per_connection = 400
    message_gap_s = 0.1
    request_gap_s = 0.1  # 600 in 5 s
    compared: tuple[str, ...] = ("trades", "orderbook_l2", "bbo")

    def __init__(self, category: str, *depths: str) -> None:
        """`depths`: of books, the default first."""
        self.exchange, self._category, self.choices = f"bybit_{category}", category, {"book_depth": depths}
        if category == "option":
            self.compared = ("trades", "orderbook_l2")

    def serves(self, url: str) -> bool:
        """All categories share the hosts: the path of the connection or the request tells them apart."""
        parts = urlsplit(url)
        named = parse_qs(parts.query).get("category", [parts.path.rpartition("/")[2]])[0]
        return parts.hostname in self.hosts and named == self._category

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        return isinstance(frame, dict) and "topic" in frame and _category_of(frame) == self._category

    def stream_of(self, raw: str) -> str | None:
        if raw.startswith(_PREFIX):
            return raw[len(_PREFIX) : raw.find('"', len(_PREFIX))]
        frame = parse(raw)
        if not isinstance(frame, dict):
            return EVERYBODY
        return str(frame["topic"]) if "topic" in frame else None

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return _Session(recorded, self._category) if path.rstrip("/") == f"/v5/public/{self._category}" else None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        if path == _MARKET + "time":
            now_ns = time.time_ns()
            return Answer(200, _ok({"timeSecond": str(now_ns // 1_000_000_000), "timeNano": str(now_ns)}))
        wanted = [query.get(key, "") for key in _IDENTITY]
        for body in recorded.bodies:
            if body.path == path and [body.query.get(key, "") for key in _IDENTITY] == wanted:
                return Answer(200, body.raw)
        if path == _MARKET + "option-base-coins" and self._category == "option":
            coins = sorted({row["baseCoin"] for row in _instruments(recorded, self._category).values()})
            return Answer(200, _ok({"list": [{"baseCoin": coin, "hasSymbol": 1} for coin in coins]}))
        if path != _MARKET + "instruments-info" or query.get("category") != self._category or "cursor" in query:
            return None
        listed = list(_instruments(recorded, self._category).values())
        if "baseCoin" in query:
            listed = [row for row in listed if row["baseCoin"] == query["baseCoin"]]
        return Answer(200, _ok({"category": self._category, "nextPageCursor": "", "list": listed}))

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        return Answer(200 if path.startswith(_MARKET) else 404, text_of(_NOT_RECORDED))

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        depth = self.chosen("book_depth", choice)
        forms = {
            "trades": "publicTrade.{}", "orderbook_l2": f"orderbook.{depth}.{{}}", "bbo": "orderbook.1.{}",
            "tickers": "tickers.{}", "candles": "kline.1.{}", "liquidations": "allLiquidation.{}",
        }  # fmt: skip
        asked = list(feeds)
        if unknown := [feed for feed in asked if feed not in forms]:
            raise ValueError(f"{self.exchange} has no feed {unknown[0]!r}; it has {', '.join(forms)}")
        names = list(tickers)
        topics = [
            forms[feed].format(n.split("-")[0] if feed == "trades" and self._category == "option" else n)
            for n in names
            for feed in asked
        ]
        return list(dict.fromkeys(topics))

    def choice_of(self, stream: str) -> Choice:
        kind, _, rest = stream.partition(".")
        depth = rest.partition(".")[0]
        return {"book_depth": depth} if kind == "orderbook" and depth != "1" else NO_CHOICE  # 1 is the feed bbo

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        messages = [
            text_of({"req_id": str(n), "op": "subscribe", "args": streams[i : i + _TOPICS_PER_MESSAGE]})
            for n, i in enumerate(range(0, len(streams), _TOPICS_PER_MESSAGE), 1)
        ]
        return f"/v5/public/{self._category}", messages

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        if not isinstance(frame, dict) or frame.get("success") is not False:
            return None
        return str(frame.get("ret_msg") or text_of(frame.get("data")))

    def fetches(self, tickers: list[str]) -> list[str]:
        first = f"{_MARKET}instruments-info?category={self._category}&limit=1000"
        if self._category != "option":
            return [first]
        return [_MARKET + "option-base-coins"] + [
            f"{first}&baseCoin={coin}" for coin in sorted({ticker.split("-")[0] for ticker in tickers})
        ]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        kind, data = frame["topic"].split(".")[:2], frame["data"]
        if kind[0] == "publicTrade":
            for t in data:  # there is no counter; the time keeps them in order
                side, us = (1 if t["S"] == "Buy" else -1), t["T"] * 1000
                yield Trade(t["s"], us, t["i"], float(t["p"]), float(t["v"]), side, us)
        elif kind == ["orderbook", "1"]:
            (bid, bid_qty), (ask, ask_qty) = (data[side][0] if data[side] else ("nan", "0") for side in "ba")
            values = float(bid), float(bid_qty), float(ask), float(ask_qty)
            yield Quote(data["s"], data["u"], values, frame.get("cts", frame["ts"]) * 1000)
        elif kind[0] == "orderbook" and kind[1].isdecimal():
            levels = [(1, float(p), float(q)) for p, q in data["b"]] + [(-1, float(p), float(q)) for p, q in data["a"]]
            us, is_snapshot = frame.get("cts", frame["ts"]) * 1000, frame["type"] == "snapshot"
            yield BookChange(data["s"], data["u"], data["u"] - 1, tuple(levels), is_snapshot, us)


def _ok(result: Any) -> str:
    return text_of(
        {"retCode": 0, "retMsg": "OK", "result": result, "retExtInfo": {}, "time": time.time_ns() // 1_000_000}
    )


def _category_of(frame: Json) -> str:
    """The only category that such a frame can be of; "" where it is no telling."""
    data = frame.get("data")
    row = data[0] if isinstance(data, list) and data else data
    if not isinstance(row, dict):
        return ""
    symbol = str(row.get("s", row.get("symbol", "")))
    if "usdIndexPrice" in row:
        return "spot"
    if symbol.count("-") >= 3:
        return "option"
    if not {"L", "fundingRate"} & row.keys():  # spot knows neither
        return ""
    return "inverse" if "USD" in symbol and "USDT" not in symbol else "linear"


def _instrument_of(topic: str) -> str:
    kind, _, rest = topic.partition(".")
    return rest.partition(".")[2] if kind in ("orderbook", "kline") else rest


def _instruments(recorded: Recorded, category: str) -> dict[str, Json]:
    """Recorded instruments by symbol, and made ones for what else the recording speaks of."""
    if "instruments" not in recorded.cache:
        found: dict[str, Json] = {}
        for body in recorded.bodies:
            if body.path == _MARKET + "instruments-info":
                found.update({row["symbol"]: row for row in json.loads(body.raw)["result"]["list"]})
        for topic in recorded.streams:
            name = _instrument_of(topic)
            if name and (category != "option" or "-" in name):
                found.setdefault(name, _made_instrument(name, category))
        recorded.cache["instruments"] = found
    instruments: dict[str, Json] = recorded.cache["instruments"]
    return instruments


def _made_instrument(name: str, category: str) -> Json:
    quote = next((q for q in ("USDT", "USDC", "USD") if name.endswith(q)), "USDT")
    base = name.partition("-")[0].removesuffix(quote).removesuffix("PERP")
    lot = {"basePrecision": "0.001"} if category == "spot" else {"qtyStep": "0.001"}
    made: Json = {"symbol": name, "status": "Trading", "baseCoin": base, "quoteCoin": quote,
                  "priceFilter": {"tickSize": "0.01"}, "lotSizeFilter": lot}  # fmt: skip
    return made if category in ("spot", "option") else {**made, "contractType": f"{category.capitalize()}Perpetual"}


VENUES = (
    *(_Bybit(category, "200", "50", "1000") for category in ("spot", "linear", "inverse")),
    _Bybit("option", "100", "25"),
)
