"""Deribit for the tools: https://docs.deribit.com (JSON-RPC 2.0 over WebSocket and HTTP GET).

Found by name through `tools.venues`. Knows channel names, the JSON-RPC dialogue, how a request maps to a recorded
body, and a decoder of a few lines for mdcompare. Never imports the connector.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
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

_CHANNEL = {  # of every feed but books
    "trades": "trades.{}.100ms",  # the same rows at every interval
    "bbo": "quote.{}",
    "tickers": "ticker.{}.100ms",
    "candles": "chart.trades.{}.1",
}
_PATH = "/api/v2/"
_CHANNELS_PER_MESSAGE = 200
_HEARTBEAT_S_MIN = 10
_HEARTBEAT_S = 30
_IDENTITY = {  # parameters that choose the resource; all others only shape the answer
    "public/get_order_book": ("instrument_name",),
    "public/ticker": ("instrument_name",),
    "public/get_instrument": ("instrument_name",),
    "public/get_last_trades_by_instrument": ("instrument_name", "start_seq", "end_seq"),
    "public/get_last_trades_by_instrument_and_time": ("instrument_name", "start_timestamp", "end_timestamp"),
    "public/get_tradingview_chart_data": ("instrument_name", "resolution", "start_timestamp", "end_timestamp"),
    "public/get_currencies": (),
}
_INVALID_PARAMS: Json = {"code": -32602, "message": "Invalid params", "data": {"reason": "not in the recording"}}
_METHOD_NOT_FOUND: Json = {"code": -32601, "message": "Method not found"}
_BAD_REQUEST: Json = {"code": 11050, "message": "bad_request", "data": "invalid json"}
_TOKEN: Json = {
    "access_token": "replay-access",
    "refresh_token": "replay-refresh",
    "expires_in": 31536000,
    "scope": "connection",
    "token_type": "bearer",
}
_FIXED_RESULTS: dict[str, Any] = {
    "public/test": {"version": "1.2.26"},
    "public/hello": {"version": "1.2.26"},
    "public/auth": _TOKEN,  # whatever was sent is accepted
    "public/disable_heartbeat": "ok",
}


class _Refused(Exception):
    """A JSON-RPC error object to send back."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.error = error


class _Session(Session):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded
        self._unanswered = 0
        self._beats = 0

    def hear(self, text: str) -> list[str]:
        request = parse(text)
        if not isinstance(request, dict):
            return [_envelope(None, {"error": _BAD_REQUEST})]
        method, params, request_id = str(request.get("method")), request.get("params") or {}, request.get("id")
        try:
            if not isinstance(params, dict):
                raise _Refused(_INVALID_PARAMS)
            return [self._reply(request_id, self._result(method, params))]
        except _Refused as refused:
            return [_envelope(request_id, {"error": refused.error})]

    def _result(self, method: str, params: Json) -> Any:
        if method in ("public/subscribe", "private/subscribe"):
            granted = [c for c in _channels(params) if _instrument_known(c, self._recorded)]
            self.streams.update(dict.fromkeys(granted))
            return granted
        if method in ("public/unsubscribe", "private/unsubscribe"):
            return [c for c in _channels(params) if self.streams.pop(c, 0) is None]
        if method in ("public/unsubscribe_all", "private/unsubscribe_all"):
            self.streams.clear()
            return "ok"
        if method == "public/set_heartbeat":
            return self._set_heartbeat(params)
        if method == "public/disable_heartbeat":
            self.heartbeat_s = 0.0
        if method == "public/test":
            self._unanswered = 0
        return _result(method, params, self._recorded)

    def _set_heartbeat(self, params: Json) -> str:
        interval = params.get("interval")
        if not isinstance(interval, int | float) or interval < _HEARTBEAT_S_MIN:
            reason = {"reason": f"value must be >= {_HEARTBEAT_S_MIN}", "param": "interval"}
            raise _Refused({"code": -32602, "message": "Invalid params", "data": reason})
        self.heartbeat_s = float(interval)
        return "ok"

    def _reply(self, request_id: Any, result: Any) -> str:
        """The recorded answer to the same request with the same id and result, otherwise a made one."""
        for raw in self._recorded.replies:
            recorded = parse(raw)
            if isinstance(recorded, dict) and recorded.get("id") == request_id and "result" in recorded:
                found = recorded["result"]
                if found == result or (_is_names(found) and _is_names(result) and set(found) == set(result)):
                    return raw
        return _envelope(request_id, {"result": result})

    def beat(self) -> list[str]:
        if self._unanswered:
            self.overdue = True
            return []
        self._beats += 1
        kind = "test_request" if self._beats % 2 else "heartbeat"
        self._unanswered = int(kind == "test_request")
        return [text_of({"params": {"type": kind}, "method": "heartbeat", "jsonrpc": "2.0"})]


class Deribit(Venue):
    exchange = "deribit"
    hosts = ("www.deribit.com", "test.deribit.com", "streams.deribit.com")
    ws_url = "wss://www.deribit.com"
    rest_url = "https://www.deribit.com"
    ping_s = 0.0
    overdue_code = 4000
    streams_per_connection = 500
    message_gap_s = 0.3  # 3,000 of 10,000 credits a second each
    request_gap_s = 1.0  # get_instruments has the lowest limit, about one a second
    compared = ("trades", "orderbook_l2")  # `quote` carries no id
    choices: Mapping[str, tuple[str, ...]] = {"book_interval": ("100ms", "agg2")}  # `raw` needs a key

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        if not isinstance(frame, dict) or frame.get("jsonrpc") != "2.0":
            return False
        return frame.get("method") in ("subscription", "heartbeat") or "usOut" in frame

    def stream_of(self, raw: str) -> str | None:
        if raw.startswith('{"jsonrpc":"2.0","method":"subscription","params":{"channel":"'):
            return raw[62 : raw.find('"', 62)]
        frame = parse(raw)
        if not isinstance(frame, dict):
            return EVERYBODY
        if frame.get("method") == "subscription" and isinstance(frame.get("params"), dict):
            return str(frame["params"].get("channel", EVERYBODY))
        return None

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return _Session(recorded) if path.rstrip("/") == "/ws/api/v2" else None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        if not path.startswith(_PATH):
            return None
        method = path.removeprefix(_PATH)
        exact = next((b for b in recorded.bodies if b.path == path and b.query == query), None)
        if exact is not None:
            return Answer(200, exact.raw)
        try:
            return Answer(200, _envelope(None, {"result": _result(method, query, recorded)}))
        except _Refused:
            return None

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        method = path.removeprefix(_PATH)
        known = method in _IDENTITY or method in _FIXED_RESULTS or method == "public/get_instruments"
        return Answer(400, _envelope(None, {"error": _INVALID_PARAMS if known else _METHOD_NOT_FOUND}))

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, forms = list(tickers), []
        by_feed = {**_CHANNEL, "orderbook_l2": f"book.{{}}.{self.chosen('book_interval', choice)}"}
        for feed in feeds:
            if feed not in by_feed:
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has {', '.join(by_feed)}")
            forms.append(by_feed[feed])
        return [form.format(name) for name in names for form in forms]

    def choice_of(self, stream: str) -> Choice:
        return {"book_interval": stream.rpartition(".")[2]} if stream.startswith("book.") else NO_CHOICE

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        chunks = [streams[i : i + _CHANNELS_PER_MESSAGE] for i in range(0, len(streams), _CHANNELS_PER_MESSAGE)]
        calls: list[tuple[str, Json]] = [("public/set_heartbeat", {"interval": _HEARTBEAT_S})]
        calls += [("public/subscribe", {"channels": chunk}) for chunk in chunks]
        messages = [
            text_of({"jsonrpc": "2.0", "id": n, "method": method, "params": params})
            for n, (method, params) in enumerate(calls, 1)
        ]
        return "/ws/api/v2", messages

    def answer(self, raw: str) -> str | None:
        if "test_request" not in raw:
            return None
        return text_of({"jsonrpc": "2.0", "id": 0, "method": "public/test", "params": {}})

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        return text_of(frame["error"]) if isinstance(frame, dict) and "error" in frame else None

    def fetches(self, tickers: list[str]) -> list[str]:
        return ["/api/v2/public/get_instruments?currency=any&expired=false"]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        channel, data = frame["params"]["channel"], frame["params"]["data"]
        kind = channel.split(".")[0]
        if kind == "trades":
            for t in data:
                side = 1 if t["direction"] == "buy" else -1
                name, seq, us = t["instrument_name"], t["trade_seq"], t["timestamp"] * 1000
                yield Trade(name, seq, t["trade_id"], float(t["price"]), float(t["amount"]), side, us)
        elif kind == "book" and "type" in data:  # grouped books have no type and are full each time
            levels = [(1, *_level(row)) for row in data["bids"]] + [(-1, *_level(row)) for row in data["asks"]]
            prev, is_snapshot = data.get("prev_change_id", -1), data["type"] == "snapshot"
            us = data["timestamp"] * 1000
            yield BookChange(data["instrument_name"], data["change_id"], prev, tuple(levels), is_snapshot, us)
        elif kind == "quote":
            keys = ("best_bid_price", "best_bid_amount", "best_ask_price", "best_ask_amount")
            bid, bid_qty, ask, ask_qty = (float(data[k] if data[k] is not None else "nan") for k in keys)
            yield Quote(data["instrument_name"], -1, (bid, bid_qty, ask, ask_qty), data["timestamp"] * 1000)


def _level(row: list[Any]) -> tuple[float, float]:
    action, price, amount = row
    return float(price), 0.0 if action == "delete" else float(amount)


def _envelope(request_id: Any, content: Json) -> str:
    now_us = time.time_ns() // 1000
    head: Json = {"jsonrpc": "2.0"} if request_id is None else {"jsonrpc": "2.0", "id": request_id}
    return text_of({**head, **content, "usIn": now_us, "usOut": now_us, "usDiff": 0, "testnet": False})


def _channels(params: Json) -> list[str]:
    channels: Any = params.get("channels")
    if not _is_names(channels):
        raise _Refused({"code": -32602, "message": "Invalid params", "data": {"param": "channels"}})
    return list(dict.fromkeys(channels))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _instrument_known(channel: str, recorded: Recorded) -> bool:
    """An unknown channel is left out of the reply, as the venue does; a known instrument may be silent."""
    parts = channel.split(".")
    return channel in recorded.streams or any(part in _instruments(recorded) for part in parts[1:3])


def _result(method: str, params: Json, recorded: Recorded) -> Any:
    """Result of a call that does not concern one connection's state, over WebSocket and HTTP alike."""
    if method == "public/get_time":
        return time.time_ns() // 1_000_000
    if method in _FIXED_RESULTS:
        return _FIXED_RESULTS[method]
    if method == "public/get_instruments":
        return _matching_instruments(params, recorded)
    if method not in _IDENTITY:
        raise _Refused(_METHOD_NOT_FOUND)
    wanted = [str(params.get(key, "")) for key in _IDENTITY[method]]
    for body in recorded.bodies:
        if body.path == _PATH + method and [body.query.get(key, "") for key in _IDENTITY[method]] == wanted:
            return json.loads(body.raw)["result"]
    if method == "public/get_instrument" and wanted[0] in _instruments(recorded):
        return _instruments(recorded)[wanted[0]]
    raise _Refused(_INVALID_PARAMS)


def _matching_instruments(params: Json, recorded: Recorded) -> list[Json]:
    currency, kind = str(params.get("currency", "any")).upper(), str(params.get("kind", "any"))
    return [
        instrument
        for instrument in _instruments(recorded).values()
        if (currency == "ANY" or currency in (instrument.get("base_currency"), instrument.get("settlement_currency")))
        and kind in ("any", instrument.get("kind"))
    ]


def _instruments(recorded: Recorded) -> dict[str, Json]:
    """Recorded instruments by name, and made ones for what else the recording speaks of."""
    if "instruments" not in recorded.cache:
        found: dict[str, Json] = {}
        for body in recorded.bodies:
            if body.path == _PATH + "public/get_instruments":
                found.update({i["instrument_name"]: i for i in json.loads(body.raw)["result"]})
        acked = (parse(raw) for raw in recorded.replies)
        channels = [
            c for reply in acked if isinstance(reply, dict) and _is_names(reply.get("result")) for c in reply["result"]
        ]
        for channel in (*recorded.streams, *channels):
            parts = channel.split(".")
            name = parts[2] if channel.startswith("chart.trades.") else parts[1] if len(parts) > 1 else ""
            if name and name not in found and parts[0] in ("book", "trades", "ticker", "quote", "chart"):
                found[name] = _made_instrument(name)
        recorded.cache["instruments"] = found
    instruments: dict[str, Json] = recorded.cache["instruments"]
    return instruments


def _made_instrument(name: str) -> Json:
    pair, _, rest = name.partition("-")
    base, _, quote = pair.partition("_")
    linear = bool(quote)
    kind = "spot" if not rest else "option" if rest.count("-") == 2 else "future"
    return {
        "instrument_name": name,
        "kind": kind,
        "is_active": True,
        "state": "open",
        "base_currency": base,
        "quote_currency": quote or "USD",
        "counter_currency": quote or "USD",
        "settlement_currency": quote if linear else base,
        "settlement_period": "perpetual" if rest == "PERPETUAL" else "month",
        "instrument_type": "linear" if linear else "reversed",
        "tick_size": 0.0001 if kind == "option" else 0.5,
        "min_trade_amount": 0.1,
        "contract_size": 1.0,
        "creation_timestamp": 0,
        "expiration_timestamp": 32503708800000,
    }


VENUES = (Deribit(),)
