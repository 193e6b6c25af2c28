"""GMX for the tools: docs.gmx.io, REST V2 (oracle information). Nothing but polled REST.

Found by name through `tools.venues`. Knows the resources, how old an answer is by its own words, and a decoder of a few
lines for mdcompare. Never imports the connector.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tools.venues import (
    CANDLES_COMPARED,
    NO_CHOICE,
    Answer,
    Candle,
    Choice,
    Json,
    Poll,
    Recorded,
    Seen,
    Session,
    Venue,
    parse,
    text_of,
)

_CANDLES, _TICKERS, _TOKENS = "/prices/candles", "/prices/tickers", "/tokens"
_CANDLES_EVERY_S, _TICKERS_EVERY_S = 15.0, 2.0


class Gmx(Venue):
    exchange = "gmx"
    hosts = ("arbitrum-api.gmxinfra.io", "arbitrum-api.gmxinfra2.io", "avalanche-api.gmxinfra.io",
             "avalanche-api.gmxinfra2.io", "botanix-api.gmxinfra.io", "botanix-api.gmxinfra2.io")  # fmt: skip
    ws_url = ""
    rest_url = "https://arbitrum-api.gmxinfra.io"
    ping_s = 0.0
    overdue_code = 1000
    streams_per_connection = 1000  # there are no connections
    message_gap_s = 0.0
    request_gap_s = 0.2
    compared = ("candles",)  # of prices each poll sees others
    choices: Mapping[str, tuple[str, ...]] = {"intervals": (CANDLES_COMPARED,)}

    def recognises(self, raw: str) -> bool:
        return False

    def stream_of(self, raw: str) -> str | None:
        return None

    def session(self, path: str, query: dict[str, str], recorded: Recorded) -> Session | None:
        return None

    def rest(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer | None:
        """What the venue answered last at this point of the recording, of candles as many as are asked for."""
        if path == "/ping":
            return Answer(200, '{"ok":true}')
        wanted = _resource(path, query)
        bodies = [body for body in recorded.bodies if _resource(body.path, body.query) == wanted]
        if not bodies:
            return self._made(path, recorded)
        found = bodies[0]  # what comes first was so before, as far as the recording knows
        for body in bodies:
            if body.position < recorded.position:
                found = body
        limit = query.get("limit", "")
        if path != _CANDLES or not limit.isdecimal() or found.query.get("limit") == limit:
            return Answer(200, found.raw)
        return Answer(200, _shortened(found.raw, int(limit)))

    @staticmethod
    def _made(path: str, recorded: Recorded) -> Answer | None:
        """A list of tokens out of the candles that were recorded, where there is none."""
        names = {body.query.get("tokenSymbol") for body in recorded.bodies if body.path == _CANDLES}
        if path != _TOKENS or not names:
            return None
        tokens = [{"symbol": name, "address": "", "decimals": 18} for name in sorted(filter(None, names))]
        return Answer(200, text_of({"tokens": tokens}))

    def refusal(self, path: str, query: dict[str, str], recorded: Recorded) -> Answer:
        return Answer(404, '{"error":"not in the recording"}')

    # polls instead of a connection

    def streams_for(self, tickers: Iterable[str], feeds: Iterable[str], choice: Choice = NO_CHOICE) -> list[str]:
        names, streams = list(tickers), list[str]()
        for feed in feeds:
            if feed not in ("candles", "tickers"):
                raise ValueError(f"{self.exchange} has no feed {feed!r}; it has candles, tickers")
            streams += (
                [_TICKERS]
                if feed == "tickers"
                else [f"{_CANDLES}?tokenSymbol={n}&period={CANDLES_COMPARED}" for n in names]
            )
        return streams

    def choice_of(self, stream: str) -> Choice:
        return {"intervals": period[0]} if (period := parse_qs(urlsplit(stream).query).get("period")) else NO_CHOICE

    def opening(self, streams: list[str]) -> tuple[str, list[str]]:
        raise NotImplementedError("there is no WebSocket")

    def answer(self, raw: str) -> str | None:
        return None

    def complaint(self, raw: str) -> str | None:
        frame = parse(raw)
        return text_of(frame) if isinstance(frame, dict) and ("error" in frame or "errors" in frame) else None

    def fetches(self, tickers: list[str]) -> list[str]:
        return [_TOKENS]

    def snapshot_for(self, stream: str) -> str | None:
        return None

    def poll(self, stream: str, first: bool) -> Poll:
        if not stream.startswith(_CANDLES):
            return Poll(stream, _TICKERS_EVERY_S)
        return Poll(f"{stream}&limit={1000 if first else 20}", _CANDLES_EVERY_S)

    def decode(self, raw: str) -> Iterator[Seen]:
        raise NotImplementedError("there are no frames")

    def decode_body(self, path: str, query: dict[str, str], raw: str) -> Iterator[Seen]:
        """Every candle but the newest one, which is open, the oldest first."""
        if path != _CANDLES:
            return
        answer: Json = json.loads(raw)
        for start, *prices in reversed(answer["candles"][1:]):
            values = tuple(map(float, prices))
            yield Candle(query["tokenSymbol"], answer["period"], int(start) * 1_000_000, values)


def _resource(path: str, query: dict[str, str]) -> tuple[Any, ...]:
    """What an answer is about; `limit` only says how much of it."""
    return path, *sorted((key, value) for key, value in query.items() if key != "limit")


def _shortened(raw: str, limit: int) -> str:
    """The newest `limit` candles, each in its recorded text."""
    head, _, rest = raw.partition("[[")
    rows = rest.split("],[", limit)
    return raw if len(rows) <= limit else f"{head}[[{'],['.join(rows[:limit])}]]}}"


VENUES = (Gmx(),)
