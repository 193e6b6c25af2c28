"""Coinbase Advanced Trade as a simulated exchange: its channels, one number for all messages of a connection, REST, limits.

Written from docs.cdp.coinbase.com (Advanced Trade: websocket-overview, websocket-channels, websocket-rate-limits,
websocket-authentication and the public REST endpoints, 2026) and from frames recorded in 2026-08; deliberately not from
our own decoder, so that each can prove the other wrong. What the documents leave open and no frame shows is said where
it is decided.
"""

import base64
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Candle, Instrument, Trade, plain
from tools.sim.server import Exchange, Level, Reply, Request, Session, Venue, Window

BATCH_US = 50_000  # recorded book messages come each 50 ms
TRADES_US = 100_000  # recorded trade messages lie on a grid of 100 ms
GREETING_TRADES = GREETING_CANDLES = 100
TRADES_MAX = 1000
FIVE_MINUTES_US = 300_000_000
JWT_S_MAX = 120
MARKET = "/api/v3/brokerage/market"
# Product: first price, tick and lot in units of 10**-8, usual size in lots.
KNOWN: dict[str, tuple[int, int, int, int]] = {
    "BTC-USD": (6_508_366_000_000, 1_000_000, 1, 4_000_000),
    "ETH-USD": (191_941_000_000, 1_000_000, 1, 90_000_000),
    "SOL-USD": (16_500_000_000, 1_000_000, 1, 600_000_000),
    "ADA-USD": (81_230_000, 10_000, 1_000_000, 90_000),
}
CHANNELS = ("level2", "market_trades", "ticker", "candles", "heartbeats")
GRANULARITIES = {"FIVE_MINUTE": "5m"}


class _Connection:
    """What the venue knows about one WebSocket."""

    def __init__(self, now_s: float) -> None:
        self.next_number = 0
        self.asked = False  # whether a subscribe came
        self.sent_s = now_s


class _Product:
    """One product: its texts, and what waits for the timers."""

    def __init__(self, book: Book, t: int) -> None:
        self.book, self.instrument = book, book.instrument
        self.name = book.instrument.ticker
        self.waiting: dict[tuple[int, int], int] = {}  # side and price -> lots when last published
        self.changed_t = self.book_t = t  # event times of the newest change, and of the newest book message
        self.trades: list[Trade] = []
        self.ticker_dirty = self.candle_dirty = False
        self.best = self.best_now()  # as of the newest book message
        self.bbo_line: tuple[tuple[Level, Level], int] | None = None  # the last one in the ledger
        self.candle_line: object = None

    def price(self, ticks: int) -> str:
        return _short(ticks * self.instrument.tick, self.instrument.price_scale)

    def size(self, lots: int) -> str:
        return _short(lots * self.instrument.lot, self.instrument.qty_scale)

    def best_now(self) -> tuple[Level, Level]:
        """Best bid and best ask, levels that belong to no order among them."""
        best = []
        for side, better in ((BID, max), (ASK, min)):
            shown = [(price, self.book.level(side, price)) for of, price in self.book.phantoms if of == side]
            best.append(better([self.book.best(side), *shown]))
        return best[BID], best[ASK]

    def published(self) -> tuple[list[Level], list[Level]]:
        """The book as it was at its last message: bids and asks, best first."""
        sides: list[list[Level]] = []
        for side in (BID, ASK):
            levels = dict(self.book.levels(side))
            for (changed_side, price), before in self.waiting.items():
                if changed_side == side:
                    levels[price] = before
            sides.append(sorted(((p, q) for p, q in levels.items() if q), reverse=side == BID))
        return sides[BID], sides[ASK]


def _short(value: int, scale: int) -> str:
    """Decimal text without trailing zeros, as the venue writes all numbers."""
    text = plain(value, scale)
    return text.rstrip("0").rstrip(".") if "." in text else text


def stamp(t: int, nanoseconds: int = 0) -> str:
    """RFC 3339 with up to nine decimals, trailing zeros cut off."""
    second, us = divmod(t, 1_000_000)
    digits = f"{us:06d}{nanoseconds:03d}".rstrip("0")
    day = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{day}.{digits}Z" if digits else f"{day}Z"


class Coinbase(Venue):
    name: ClassVar[str] = "coinbase"
    shown_faults: ClassVar[tuple[str, ...]] = shown("level2:", "market_trades:")
    tickers: ClassVar[tuple[str, ...]] = ("BTC-USD", "ETH-USD", "SOL-USD", "ADA-USD")
    dialect: ClassVar[Dialect] = Dialect(
        1,
        "50ms",
        {
            "last": "price",
            "high_24h": "high_24_h",
            "low_24h": "low_24_h",
            "volume_24h": "volume_24_h",
            "bid_price": "best_bid",
            "ask_price": "best_ask",
        },
        bbo_has_id=True,
        bbo_has_time=True,
        candle_has_time=False,
        candle_counts_trades=False,
        intervals={},
    )
    limits: ClassVar[dict[str, float]] = {
        "connects_max": 8,
        "messages_max": 8,
        "requests_max": 10,
        "window_s": 1,
        "subscribe_within_s": 5,
        "idle_s": 90,
        "heartbeat_s": 1,
        "greeting_trades": GREETING_TRADES,
    }
    intervals: ClassVar[dict[str, int]] = {"5m": FIVE_MINUTES_US}
    notes: ClassVar[str] = (
        f"/ and GET {MARKET}/...; channels {', '.join(CHANNELS)}; sequence_num counts every message of a connection."
        " --credential KEY_NAME:PUBLIC_KEY_PEM (newlines as \\n) accepts ES256 tokens. In the ledger books have the one"
        " stream 50ms, ids are event times in us, and side is the taker's (messages name the maker's)."
    )

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.products = {ticker: _Product(book, exchange.t) for ticker, book in exchange.market.books.items()}
        self.left: dict[str, _Product] = {}  # as they were when they were delisted
        self.windows: dict[tuple[str, str], Window] = {}
        self.nonces: set[str] = set()
        self.heartbeats = 41_690

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        base, _, quote = ticker.partition("-")
        price, tick, lot, size = KNOWN.get(ticker, (1_234_000_000, 1_000_000, 10_000, 50_000))
        return Instrument(ticker, base, quote, tick, 8, lot, 8, price // tick, size, busy)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}-USD"

    def first_book(self, book: Book) -> dict[str, object]:
        product = self.products[book.instrument.ticker]
        bids, asks = ([[product.price(p), product.size(q)] for p, q in side] for side in product.published())
        return {"last": product.book_t, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.products[book.instrument.ticker] = _Product(book, t)

    def delisted(self, book: Book, t: int) -> None:
        self.finish(t)
        self.left[book.instrument.ticker] = self.products.pop(book.instrument.ticker)

    # The market put into words.

    def _number(self, session: Session, channel: str, events: str) -> str:
        """A message with the next number of its connection; all messages that are sent to it go through here."""
        own: _Connection = session.own
        number, own.next_number = own.next_number, own.next_number + 1
        own.sent_s = self.exchange.now_s
        when = stamp(self.exchange.t, number % 1000)
        return f'{{"channel":"{channel}","timestamp":"{when}","sequence_num":{number},"events":{events}}}'

    def _publish(self, stream: str, ticker: str, channel: str, events: str, first: int = 0, last: int = 0) -> None:
        """To each subscriber under its own number. What a silent stream would have carried was never numbered."""

        def make(session: Any) -> str:
            silent = self.exchange.faults.silenced(stream, ticker)
            if any(fault.wants_conn(session.id, session.agent) for fault in silent):
                return "{}"
            return self._number(session, channel, events)

        self.exchange.publish(stream, ticker, make, first, last)

    def on_action(self, book: Book, action: Action) -> None:
        product = self.products[book.instrument.ticker]
        for side, price, before, _ in action.changes:
            product.waiting.setdefault((side, price), before)
        product.changed_t = max(product.changed_t, action.t)
        if action.trades:
            product.trades += action.trades
            product.ticker_dirty = product.candle_dirty = True
            for trade in action.trades:
                self.exchange.ledger.line(
                    "trade",
                    product.name,
                    f'{{"kind":"trade","ticker":"{product.name}","id":"{trade.id}","seq":{trade.id},'
                    f'"price":"{product.price(trade.price)}","qty":"{product.size(trade.lots)}",'
                    f'"side":"{"BUY" if trade.side > 0 else "SELL"}","t":{trade.t}}}',
                )

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        beat_us = int(self.limit["heartbeat_s"] * 1_000_000)
        return [(BATCH_US, self._books), (TRADES_US, self._trades), (1_000_000, self._candles), (beat_us, self._beat)]

    def finish(self, t: int) -> None:
        self._books(t)
        self._trades(t)

    def _books(self, _t: int) -> None:
        for product in self.products.values():
            self._book(product)

    def _book(self, product: _Product) -> None:
        """The levels that changed since the last message; its event time is that of the newest change."""
        changed = [(side, price, after) for (side, price), before in product.waiting.items()
                   if (after := product.book.level(side, price)) != before]  # fmt: skip
        product.waiting.clear()
        if not changed:
            return
        previous, t = product.book_t, max(product.changed_t, product.book_t + 1)
        product.changed_t = product.book_t = t
        product.best = product.best_now()
        sides = [
            ",".join(f'["{product.price(p)}","{product.size(q)}"]' for side, p, q in changed if side == wanted)
            for wanted in (BID, ASK)
        ]
        self.exchange.ledger.line(
            "book",
            product.name,
            f'{{"kind":"book","ticker":"{product.name}","stream":"50ms","first":{t},"last":{t},"prev":{previous},'
            f'"bids":[{sides[BID]}],"asks":[{sides[ASK]}],"t":{t}}}',
        )
        self._bbo(product, only_news=True)
        levels = ",".join(_level(product, stamp(t), *level) for level in changed)
        stream = f"level2:{product.name}"
        events = f'[{{"type":"update","product_id":"{product.name}","updates":[{levels}]}}]'
        self._publish(stream, product.name, "l2_data", events, t, t)

    def _bbo(self, product: _Product, *, only_news: bool) -> None:
        """The best prices that follow from the book messages, into the ledger; the venue has no channel for them."""
        line, known = (product.best, product.book_t), product.bbo_line
        if known == line or (only_news and known is not None and known[0] == product.best):
            return
        greeting = ',"greeting":true' if known is not None and known[0] == product.best else ""  # for one client only
        product.bbo_line = line
        (bid, bid_lots), (ask, ask_lots) = product.best
        self.exchange.ledger.line(
            "bbo",
            product.name,
            f'{{"kind":"bbo","ticker":"{product.name}","id":{product.book_t},"bid":"{product.price(bid)}",'
            f'"bid_qty":"{product.size(bid_lots)}","ask":"{product.price(ask)}","ask_qty":"{product.size(ask_lots)}",'
            f'"t":{product.book_t}{greeting}}}',
        )

    def _snapshot(self, product: _Product) -> str:
        """The book at its last message; all levels have that message's event time, as in the recording."""
        when, sides = stamp(product.book_t), product.published()
        levels = ",".join(_level(product, when, side, p, q) for side in (BID, ASK) for p, q in sides[side])
        self._bbo(product, only_news=False)
        return f'[{{"type":"snapshot","product_id":"{product.name}","updates":[{levels}]}}]'

    def _trades(self, t: int) -> None:
        for product in self.products.values():
            if product.trades:
                trades, product.trades = product.trades, []
                words = ",".join(_trade(product, trade) for trade in reversed(trades))
                events = f'[{{"type":"update","trades":[{words}]}}]'
                stream = f"market_trades:{product.name}"
                self._publish(stream, product.name, "market_trades", events, trades[0].id, trades[-1].id)
            if product.ticker_dirty:
                product.ticker_dirty = False
                data = self._ticker_words(product)
                self._ticker_line("ticker", product, t, data)
                self._publish(f"ticker:{product.name}", product.name, "ticker", _ticker("update", data))

    def _ticker_words(self, product: _Product) -> str:
        day = self.exchange.market.day[product.name]
        (bid, bid_lots), (ask, ask_lots) = product.best
        words = {
            "type": "ticker",
            "product_id": product.name,
            "price": product.price(day.close),
            "volume_24_h": product.size(day.lots),
            "low_24_h": product.price(day.low),
            "high_24_h": product.price(day.high),
            "low_52_w": product.price(day.low // 2),
            "high_52_w": product.price(day.high * 2),
            "price_percent_chg_24_h": f"{100 * (day.close - day.open) / day.open:.14f}",
            "best_bid": product.price(bid),
            "best_ask": product.price(ask),
            "best_bid_quantity": product.size(bid_lots),
            "best_ask_quantity": product.size(ask_lots),
        }
        return json.dumps(words, separators=(",", ":"))

    def _ticker_line(self, kind: str, product: _Product, t: int, data: str) -> None:
        line = f'{{"kind":"{kind}","ticker":"{product.name}","stream":"50ms","t":{t},"data":{data}}}'
        self.exchange.ledger.line(kind, product.name, line)

    def _candles(self, t: int) -> None:
        """Once a second the open candle of what has traded; a candle is over when a later one comes."""
        for product in self.products.values():
            candles = self.exchange.market.candles[product.name]
            for _, candle in candles.roll(t):
                self._candle(product, candle, t, closed=True)
            if product.candle_dirty:
                product.candle_dirty = False
                self._candle(product, candles.open["5m"], t, closed=False)

    def _candle(self, product: _Product, candle: Candle, t: int, *, closed: bool) -> None:
        self._candle_line(product, candle, t, closed=closed)
        events = f'[{{"type":"update","candles":[{_json(_candle_words(product, candle))}]}}]'
        self._publish(f"candles:{product.name}", product.name, "candles", events)

    def _candle_line(self, product: _Product, candle: Candle, t: int, *, closed: bool) -> None:
        words = _candle_words(product, candle)
        product.candle_line = words
        self.exchange.ledger.record(
            "candle",
            ticker=product.name,
            interval="5m",
            open_time=candle.start,
            **{key: words[key] for key in ("open", "high", "low", "close", "volume")},
            trades=candle.trades,
            closed=closed,
            t=t,
        )

    def _beat(self, t: int) -> None:
        self.heartbeats += 1
        if self.exchange.faults.window("no_heartbeat_answer"):
            return
        now = datetime.fromtimestamp(t / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        words = f'{{"current_time":"{now}123 +0000 UTC m=+{self.heartbeats}.26","heartbeat_counter":{self.heartbeats}}}'
        self._publish("heartbeats:heartbeats", "", "heartbeats", f"[{words}]")

    # WebSocket.

    def _allow(self, what: str, ip: str) -> bool:
        window = self.windows.setdefault((what, ip), Window(self.limit[what], self.limit["window_s"]))
        if window.allow(self.exchange.now_s):
            return True
        self.exchange.violation(what.removesuffix("_max"))
        return False

    def refuse_ws(self, request: Request) -> Reply | None:
        if request.path != "/":
            return Reply("", 404)
        return None if self._allow("connects_max", request.ip) else self.ban_reply(429, 1)

    def opened(self, session: Session) -> None:
        session.own = _Connection(self.exchange.now_s)

    def allows(self, session: Session) -> bool:
        return self._allow("messages_max", session.request.ip)

    def keep(self, session: Session, now_s: float) -> None:
        own: _Connection = session.own
        if not own.asked and now_s - session.opened_s > self.limit["subscribe_within_s"]:
            self.exchange.violation("subscribe_within", session)
            self.exchange.hang_up(session, "no subscribe")
        elif "heartbeats:heartbeats" not in session.subs and now_s - own.sent_s > self.limit["idle_s"]:
            self.exchange.hang_up(session, "idle", 1000)

    def _error(self, session: Session, message: str) -> None:
        """An error has no number and names no request, as the captured one."""
        self.exchange.send(session, json.dumps({"type": "error", "message": message}, separators=(",", ":")))

    def on_text(self, session: Session, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        kind = channel = products = None
        if isinstance(message, dict):
            kind, channel, products = message.get("type"), message.get("channel"), message.get("product_ids", [])
        if kind not in ("subscribe", "unsubscribe") or not isinstance(products, list):
            self._error(session, "failed to parse message")
        elif channel not in CHANNELS or ("jwt" in message and not self._signed(message["jwt"])):
            self._error(session, "authentication failure")
        else:
            session.own.asked = True
            names = ["heartbeats"] if channel == "heartbeats" else [self._real(str(p)) for p in products]
            known = {"heartbeats", *self.products, *(self.left if kind == "unsubscribe" else ())}
            if unknown := [name for name in names if name not in known]:
                self._error(session, f"{unknown[0]} is not a valid product")
            elif kind == "unsubscribe":
                for name in names:
                    self.exchange.unsubscribe(session, f"{channel}:{name}")
                self._subscriptions(session)
            elif any(self.exchange.refused(session, f"{channel}:{name}", name) for name in names):
                self._error(session, "subscription refused")
            else:
                self._subscribe(session, channel, names)

    def _real(self, name: str) -> str:
        """The product whose data another one brings."""
        alias = name.removesuffix("C")
        return alias if name.endswith("-USDC") and alias in self.products else name

    def _subscribe(self, session: Session, channel: str, names: list[str]) -> None:
        """First what greets a new subscriber, then the reply, as recorded. Whoever is subscribed is not greeted again
        (not documented; the harder case for a client)."""
        for name in names:
            stream = f"{channel}:{name}"
            if stream in session.subs:
                continue
            self.exchange.subscribe(session, stream, session)
            silent = self.exchange.faults.silenced(stream, name)
            if channel != "heartbeats" and not any(f.wants_conn(session.id, session.agent) for f in silent):
                message, events = self._greeting(channel, self.products[name])
                self.exchange.send(session, self._number(session, message, events))
        self._subscriptions(session)

    def _greeting(self, channel: str, product: _Product) -> tuple[str, str]:
        t = self.exchange.t
        if channel == "level2":
            return "l2_data", self._snapshot(product)
        if channel == "market_trades":
            told = list(product.book.trades)[: len(product.book.trades) - len(product.trades)]
            newest = told[-int(self.limit["greeting_trades"]) :][::-1]
            words = ",".join(_trade(product, trade) for trade in newest)
            return channel, f'[{{"type":"snapshot","trades":[{words}]}}]'
        if channel == "ticker":
            data = self._ticker_words(product)
            self._ticker_line("first_ticker", product, t, data)
            return channel, _ticker("snapshot", data)
        candles = self.exchange.market.candles[product.name]
        known = [*candles.closed["5m"], candles.open["5m"]][-GREETING_CANDLES:]
        if product.candle_line != _candle_words(product, known[-1]):
            self._candle_line(product, known[-1], t, closed=False)
        words = ",".join(_json(_candle_words(product, candle)) for candle in known)
        return channel, f'[{{"type":"snapshot","candles":[{words}]}}]'

    def _subscriptions(self, session: Session) -> None:
        """The reply to whatever was asked: all that the connection has now."""
        subscribed: dict[str, list[str]] = {}
        for stream in sorted(session.subs):
            channel, _, name = stream.partition(":")
            subscribed.setdefault(channel, []).append(name)
        events = _json([{"subscriptions": subscribed}])
        self.exchange.send(session, self._number(session, "subscriptions", events))

    def _signed(self, token: object) -> bool:
        """Whether this is a token for one message: signed with the key of its name, valid now, not used before."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec, utils
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            head_text, claims_text, signature_text = str(token).split(".")
            head, claims = json.loads(_unpadded(head_text)), json.loads(_unpadded(claims_text))
            key = load_pem_public_key(self.credentials[head["kid"]].replace("\\n", "\n").encode())
            raw = _unpadded(signature_text)
            r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
            assert isinstance(key, ec.EllipticCurvePublicKey)
            signed = f"{head_text}.{claims_text}".encode()
            key.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(SHA256()))
        except (ValueError, KeyError, TypeError, InvalidSignature):
            return False
        now_s = time.time()
        fresh = head["nonce"] not in self.nonces
        self.nonces.add(head["nonce"])
        valid = claims["nbf"] <= now_s + 1 and now_s < claims["exp"] <= claims["nbf"] + JWT_S_MAX
        named = head["alg"] == "ES256" and claims["iss"] == "cdp" and claims["sub"] == head["kid"]
        return fresh and valid and named and "uri" not in claims

    def notice(self, session: Session, t: int) -> str:
        return '{"type":"error","message":"the server is going away"}'  # the venue documents no notice

    def unknown_event(self, session: Session, t: int) -> str:
        return f'{{"channel":"novelty","timestamp":"{stamp(t)}","events":[{{"type":"update","news":[1,2,3]}}]}}'

    # REST.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        body = {"error": "rate_limit_exceeded", "message": "too many requests"}
        return Reply(_json(body), status, {"Retry-After": str(retry_after_s)})

    async def http(self, request: Request) -> Reply:
        if not self._allow("requests_max", request.ip):
            return self.ban_reply(429, 1)
        path = request.path.removeprefix(MARKET)
        if path == request.path:
            return Reply(_json({"error": "not_found"}), 404)
        if path == "/products":
            return self._list(request)
        if path == "/product_book":
            product = self.products.get(request.query.get("product_id", ""))
            return self._book_reply(product, request) if product else _no_such_product()
        name, _, what = path.removeprefix("/products/").partition("/")
        product = self.products.get(name)
        if product is None:
            return _no_such_product()
        if what == "":
            return Reply(_json(self._described(product, "")))
        if what == "ticker":
            return self._trades_reply(product, request)
        if what == "candles":
            return self._candles_reply(product, request)
        return Reply(_json({"error": "not_found"}), 404)

    def _list(self, request: Request) -> Reply:
        """Products, page by page where a limit asks for it; each -USD one has a -USDC one that is the same market."""
        rows = []
        for product in (*self.products.values(), *(self.left[name] for name in self.exchange.halted)):
            rows.append(self._described(product, ""))
            if product.instrument.quote == "USD":
                rows.append(self._described(product, product.name) | {"product_id": f"{product.name}C"})
        first = int(request.query.get("cursor") or 0)
        last = first + int(request.query.get("limit") or len(rows))
        has_next = last < len(rows)
        page = {
            "prev_cursor": "",
            "next_cursor": str(last) if has_next else "",
            "has_next": has_next,
            "has_prev": first > 0,
        }
        return Reply(_json({"products": rows[first:last], "num_products": len(rows), "pagination": page}))

    def _described(self, product: _Product, alias: str) -> dict[str, object]:
        instrument = product.instrument
        quote = "USDC" if alias else instrument.quote
        tick = _short(instrument.tick, instrument.price_scale + self.exchange.finer[product.name])
        is_halted = product.name in self.exchange.halted
        return {
            "product_id": product.name,
            "price": product.price(product.book.mid2() // 2),
            "base_increment": _short(instrument.lot, instrument.qty_scale),
            "quote_increment": tick,
            "is_disabled": False,
            "new": False,
            "status": "delisted" if is_halted else "online",
            "cancel_only": False,
            "limit_only": False,
            "post_only": False,
            "trading_disabled": is_halted,
            "auction_mode": False,
            "product_type": "SPOT",
            "quote_currency_id": quote,
            "base_currency_id": instrument.base,
            "fcm_trading_session_details": None,
            "alias": alias,
            "alias_to": [] if alias or quote != "USD" else [f"{product.name}C"],
            "view_only": False,
            "price_increment": tick,
            "display_name": f"{instrument.base}-{quote}",
            "product_venue": "CBE",
            "new_at": "2023-01-01T00:00:00Z",
        }

    def _book_reply(self, product: _Product, request: Request) -> Reply:
        limit = int(request.query.get("limit") or 10_000)
        sides = [
            [{"price": product.price(p), "size": product.size(q)} for p, q in side[:limit]]
            for side in product.published()
        ]
        words = {"product_id": product.name, "bids": sides[BID], "asks": sides[ASK], "time": stamp(product.book_t)}
        return Reply(_json({"pricebook": words}))

    def _trades_reply(self, product: _Product, request: Request) -> Reply:
        """Trades of a range of whole seconds, both included, the newest first; more than the limit are left out."""
        try:
            limit = min(int(request.query["limit"]), TRADES_MAX)
            start, end = int(request.query.get("start", 0)), int(request.query.get("end", 1 << 40))
        except (KeyError, ValueError):
            return Reply(_json({"error": "INVALID_ARGUMENT"}), 400)
        chosen = [t for t in product.book.trades if start <= t.t // 1_000_000 <= end]
        words = ",".join(_trade(product, trade) for trade in chosen[: -limit - 1 : -1])
        (bid, _), (ask, _) = product.book.best(BID), product.book.best(ASK)
        best = f'"best_bid":"{product.price(bid)}","best_ask":"{product.price(ask)}"'
        return Reply(f'{{"trades":[{words}],{best}}}')

    def _candles_reply(self, product: _Product, request: Request) -> Reply:
        interval = GRANULARITIES.get(request.query.get("granularity", ""))
        if interval is None:
            return Reply(_json({"error": "INVALID_ARGUMENT"}), 400)
        candles = self.exchange.market.candles[product.name]
        known = [*candles.closed[interval], candles.open[interval]]
        start, end = int(request.query.get("start", 0)), int(request.query.get("end", 1 << 40))
        rows = [_candle_words(product, c) for c in known if start <= c.start // 1_000_000 <= end]
        for row in rows:
            del row["product_id"]
        return Reply(_json({"candles": rows[::-1]}))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _level(product: _Product, when: str, side: int, price: int, lots: int) -> str:
    return (
        f'{{"side":"{"bid" if side == BID else "offer"}","event_time":"{when}","price_level":"{product.price(price)}",'
        f'"new_quantity":"{product.size(lots)}"}}'
    )


def _trade(product: _Product, trade: Trade) -> str:
    """One trade; the side is the maker's (see the recorded ones)."""
    return (
        f'{{"product_id":"{product.name}","trade_id":"{trade.id}","price":"{product.price(trade.price)}",'
        f'"size":"{product.size(trade.lots)}","time":"{stamp(trade.t)}","side":"{"SELL" if trade.side > 0 else "BUY"}"}}'
    )


def _ticker(kind: str, data: str) -> str:
    return f'[{{"type":"{kind}","tickers":[{data}]}}]'


def _candle_words(product: _Product, candle: Candle) -> dict[str, str]:
    prices = {key: product.price(getattr(candle, key)) for key in ("high", "low", "open", "close")}
    start = str(candle.start // 1_000_000)
    return {"start": start, **prices, "volume": product.size(candle.lots), "product_id": product.name}


def _no_such_product() -> Reply:
    return Reply(_json({"error": "NOT_FOUND", "message": "valid product_id is required"}), 404)
