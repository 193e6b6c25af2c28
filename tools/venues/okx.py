"""OKX for the tools: https://www.okx.com/docs-v5/en (v5, WebSocket and HTTP GET).

Found by name through `tools.venues`. Knows channels and their args, the dialogue, how a request maps to a recorded
body, and a decoder of a few lines for mdcompare. Never imports the connector.
"""

import itertools
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

_CHANNELS = {"orderbook_l2": "books", "bbo": "bbo-tbt", "tickers": "tickers", "candles": "candle1m"}  # but for trades
_BOOKS = ("books", "books-l2-tbt")
_PATHS = ("/ws/v5/public", "/ws/v5/business", "/ws/v5/private")
_ARGS_PER_MESSAGE = 100
_BUSINESS = ("candle", "trades-all")  # how the channels begin that come on the second path
_KINDS = ("SPOT", "SWAP", "FUTURES", "OPTION")


def _stream_of(arg: Json) -> str:
    return f"{arg.get('channel', '')}:{arg.get('instId') or arg.get('instType') or arg.get('instFamily') or ''}"


def _arg_of(stream: str) -> Json:
    channel, _, of = stream.partition(":")
    return {"channel": channel, "instType" if of in _KINDS else "instId": of}


class _Session(Session):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded

    def hear(self, text: str) -> list[str]:
        if text == "ping":
            return ["pong"]
        request = parse(text)
        args = request.get("args") if isinstance(request, dict) else None
        if not isinstance(args, list) or not all(isinstance(arg, dict) for arg in args):
            return [_error(request, "60012", f"Invalid request: {text[:200]}")]
        if request.get("op") == "login":  # whatever was sent is accepted
            return [text_of({"event": "login", "code": "0", "msg": "", "connId": "replay"})]
        if request.get("op") not in ("subscribe", "unsubscribe"):
            return [_error(request, "60012", f"Invalid request: {text[:200]}")]
        return [self._one(request, arg) for arg in args]

    def _one(self, request: Json, arg: Json) -> str:
        """The answer to one arg; a channel of the recording that is silent is confirmed too."""
        stream = _stream_of(arg)
        if request["op"] == "unsubscribe":
            self.streams.pop(stream, None)
        elif stream in self._recorded.streams or stream.partition(":")[2] in _instruments(self._recorded):
            self.streams[stream] = None
        else:
            what = ",".join(f"{key}:{value}" for key, value in arg.items())
            return _error(request, "60018", f"Wrong URL or {what} doesn't exist. Please use the correct URL, channel")
        for raw in self._recorded.replies:
            recorded = parse(raw)
            if recorded.get("event") == request["op"] and recorded.get("arg") == arg and "id" not in request:
                return raw
        head = {"id": request["id"]} if "id" in request else {}
        return text_of({**head, "event": request["op"], "arg": arg, "connId": "replay"})


class Okx(Venue):
    exchange = "okx"
    hosts = ("ws.okx.com", "www.okx.com", "ws.okex.com", "www.okex.com", "wspap.okx.com", "wseea.okx.com")
    ws_url = "wss://ws.okx.com:8443"
    rest_url = "https://www.okx.com"
    ping_s = 0.0  # it is the client that pings, with the text `ping`
    overdue_code = 4004
    streams_per_connection = 400
    message_gap_s = 0.4
    request_gap_s = 0.2
    compared = ("trades", "orderbook_l2", "bbo")
    choices: Mapping[str, tuple[str, ...]] = {
        "trade_channel": ("trades", "trades-all"), "book_interval": ("100ms",),
    }  # fmt: skip

    def recognises(self, raw: str) -> bool:
        frame = parse(raw)
        return isinstance(frame, dict) and isinstance(frame.get("arg"), dict) and "channel" in frame["arg"]

    def stream_of(self, raw: str) -> str | None:
        if raw == "pong":
            return None
        frame = parse(raw)
        if not isinstance(frame, dict):
            return EVERYBODY
        if frame.get("event") == "notice":
            return EVERYBODY
        if "data" in frame and isinstance(frame.get("arg"), dict):
            return _stream_of(frame["arg"])
        return None

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return _Session(recorded) if path.rstrip("/") in _PATHS else None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        if path == "/api/v5/public/time":
            return Answer(200, _answer([{"ts": str(time.time_ns() // 1_000_000)}]))
        exact = next((body for body in recorded.bodies if body.path == path and body.query == query), None)
        if exact is not None:
            return Answer(200, exact.raw)
        if path == "/api/v5/public/instruments":
            kind, family = query.get("instType", ""), query.get("instFamily", query.get("uly", ""))
            rows = [i for i in _instruments(recorded).values() if i["instType"] == kind]
            return Answer(200, _answer([i for i in rows if family in ("", i.get("uly"), i.get("instFamily"))]))
        return None

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        if not path.startswith("/api/v5/"):
            return Answer(404, text_of({"code": "404", "data": [], "msg": "Not Found"}))
        text = "Instrument ID, Instrument ID code, or Spread ID doesn't exist."
        return Answer(200, text_of({"code": "51001", "data": [], "msg": text}))

    # an own connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, by_feed = list(tickers), {**_CHANNELS, "trades": self.chosen("trade_channel", choice)}
        wanted = []
        for feed in feeds:
            if feed not in by_feed:
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has {', '.join(by_feed)}")
            wanted.append(by_feed[feed])
        return [f"{channel}:{name}" for name in names for channel in wanted]

    def choice_of(self, stream: str) -> Choice:
        channel = stream.partition(":")[0]
        if channel in self.choices["trade_channel"]:
            return {"trade_channel": channel}
        return {"book_interval": "100ms" if channel == "books" else "10ms"} if channel in _BOOKS else NO_CHOICE

    def connections(self, streams: list[str]) -> list[list[str]]:
        business = [stream for stream in streams if stream.startswith(_BUSINESS)]
        public = [stream for stream in streams if not stream.startswith(_BUSINESS)]
        return list(itertools.chain.from_iterable(map(super().connections, (public, business))))

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        chunks = [streams[i : i + _ARGS_PER_MESSAGE] for i in range(0, len(streams), _ARGS_PER_MESSAGE)]
        messages = [
            text_of({"id": str(n), "op": "subscribe", "args": [_arg_of(stream) for stream in chunk]})
            for n, chunk in enumerate(chunks, 1)
        ]
        return _PATHS[bool(streams) and streams[0].startswith(_BUSINESS)], messages

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        is_error = isinstance(frame, dict) and frame.get("event") == "error"
        return f"{frame.get('code')} {frame.get('msg')}" if is_error else None

    def fetches(self, tickers: list[str]) -> list[str]:
        kinds = [f"instType={kind}" for kind in _KINDS[:3]]
        kinds += [f"instType=OPTION&instFamily={family}" for family in ("BTC-USD", "ETH-USD")]
        return [f"/api/v5/public/instruments?{query}" for query in kinds]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def decode(self, raw: str) -> Iterator[Seen]:
        frame = json.loads(raw)
        channel, ticker = frame["arg"]["channel"], frame["arg"].get("instId", "")
        for data in frame["data"] if channel in (*_BOOKS, "trades", "trades-all", "bbo-tbt") else ():
            us = int(data["ts"]) * 1000
            if channel in ("trades", "trades-all"):
                side, seq = 1 if data["side"] == "buy" else -1, int(data["tradeId"])
                count = int(data.get("count", 1))
                yield Trade(ticker, seq, data["tradeId"], float(data["px"]), float(data["sz"]), side, us, count)
            elif channel in _BOOKS:
                rows = [(1, level) for level in data["bids"]] + [(-1, level) for level in data["asks"]]
                levels = tuple((side, float(level[0]), float(level[1])) for side, level in rows)
                order = data.get("seqId", int(data["ts"]))
                snapshot = frame.get("action") == "snapshot"
                yield BookChange(ticker, order, data.get("prevSeqId", -1), levels, snapshot, us)
            else:
                bid, bid_qty = data["bids"][0][:2] if data["bids"] else ("nan", "0")
                ask, ask_qty = data["asks"][0][:2] if data["asks"] else ("nan", "0")
                values = (float(bid), float(bid_qty), float(ask), float(ask_qty))
                yield Quote(ticker, data.get("seqId", -1), values, us)


def _error(request: Any, code: str, text: str) -> str:
    head = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
    return text_of({**head, "event": "error", "msg": text, "code": code, "connId": "replay"})


def _answer(data: list[Any]) -> str:
    return text_of({"code": "0", "msg": "", "data": data})


def _instruments(recorded: Recorded) -> dict[str, Json]:
    """Recorded instruments by name, and made ones for what else the recording speaks of."""
    if "instruments" not in recorded.cache:
        found: dict[str, Json] = {}
        for body in recorded.bodies:
            if body.path == "/api/v5/public/instruments":
                found.update({i["instId"]: i for i in json.loads(body.raw)["data"]})
        acked = [reply["arg"] for raw in recorded.replies if isinstance(reply := parse(raw), dict) and "arg" in reply]
        for stream in (*recorded.streams, *map(_stream_of, acked)):
            channel, _, name = stream.partition(":")
            if name and name not in found and name not in _KINDS and channel != "index-tickers":
                found[name] = _made_instrument(name)
        recorded.cache["instruments"] = found
    instruments: dict[str, Json] = recorded.cache["instruments"]
    return instruments


def _made_instrument(name: str) -> Json:
    base, quote, *rest = name.split("-")
    kind = "SPOT" if not rest else "SWAP" if rest == ["SWAP"] else "OPTION" if len(rest) == 3 else "FUTURES"
    family = "" if kind == "SPOT" else f"{base}-{quote}"
    return {
        "instId": name,
        "instType": kind,
        "state": "live",
        "baseCcy": base if kind == "SPOT" else "",
        "quoteCcy": quote if kind == "SPOT" else "",
        "settleCcy": "" if kind == "SPOT" else quote,
        "uly": family.partition("_")[0],
        "instFamily": family,
        "ctVal": "" if kind == "SPOT" else "1",
        "ctMult": "" if kind == "SPOT" else "1",
        "ctValCcy": "" if kind == "SPOT" else base,
        "ctType": "" if kind == "SPOT" else "linear",
        "tickSz": "0.1",
        "lotSz": "1",
        "minSz": "1",
        "listTime": "1606468572000",
        "expTime": "",
        "lever": "",
        "optType": "",
        "stk": "",
        "alias": "",
        "category": "1",
    }


VENUES = (Okx(),)
