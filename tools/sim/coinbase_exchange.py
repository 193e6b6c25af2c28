"""Coinbase Exchange as a simulated exchange: channels, replies, signatures, REST endpoints and limits of its feed.

Written from https://docs.cdp.coinbase.com/exchange (websocket-feed overview, channels, authentication, rate-limits and
errors; REST get-products, get-product-book, get-product-trades, pagination; 2026) and from frames recorded in 2021 and
2026; deliberately not from our own decoder, so that each can prove the other wrong.
"""

import base64
import binascii
import hashlib
import hmac
import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

from tools.sim.faults import shown
from tools.sim.ledger import Dialect
from tools.sim.market import ASK, BID, Action, Book, Instrument, Trade, plain
from tools.sim.server import Credits, Exchange, Reply, Request, Session, Venue, Window

# name: price, tick and lot in units of 10**-8, decimals of a price, usual size in lots
KNOWN: dict[str, tuple[int, int, int, int, int]] = {
    "BTC-USD": (11_574_000_000_000, 1_000_000, 1_000, 2, 8_000),
    "ETH-USD": (267_133_000_000, 1_000_000, 10_000, 2, 9_000),
    "SOL-USD": (16_500_000_000, 1_000_000, 100_000, 2, 6_000),
    "DOGE-USD": (12_345_000, 1_000, 100_000_000, 5, 900),
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BATCH, RAW, MATCHES, TICKER, HEARTBEAT = "level2_batch", "level2", "matches", "ticker", "heartbeat"
CHANNELS = (BATCH, RAW, MATCHES, TICKER, HEARTBEAT)
WITH_LOGIN = (RAW, "level3", "full")
REPLIED_AS = {BATCH: "level2_50"}  # so in the frame recorded on 2026-09-30
BATCH_US = 50_000


class _Refused(Exception):
    """A request of a client that is answered with an error."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.message, self.reason = message, reason


class _Product:
    """One product: what waits for the next batch, and its texts."""

    def __init__(self, book: Book, t: int) -> None:
        self.book, self.name = book, book.instrument.ticker
        self.waiting: dict[tuple[int, int], int] = {}  # side and price -> quantity at the last batch
        self.batch_t = self.raw_t = t  # time of the last update of either kind
        self.sequence = book.engine_id
        self.ticker = ""  # the last one, with which a subscription begins
        self._prices: dict[int, str] = {}

    def price(self, ticks: int) -> str:
        text = self._prices.get(ticks)
        if text is None:
            if len(self._prices) > 20_000:
                self._prices.clear()
            instrument = self.book.instrument
            text = plain(ticks * instrument.tick // 10 ** (8 - instrument.price_scale), instrument.price_scale)
            self._prices[ticks] = text
        return text

    def size(self, lots: int) -> str:
        return plain(lots * self.book.instrument.lot, 8)

    def levels(self, levels: list[tuple[int, int]], tail: str = "") -> str:
        return "[" + ",".join(f'["{self.price(price)}","{self.size(lots)}"{tail}]' for price, lots in levels) + "]"


class CoinbaseExchange(Venue):
    name: ClassVar[str] = "coinbase_exchange"
    shown_faults: ClassVar[tuple[str, ...]] = shown(trades="matches:")
    tickers: ClassVar[tuple[str, ...]] = tuple(KNOWN)
    dialect: ClassVar[Dialect] = Dialect(
        1,
        BATCH,
        {
            "last": "price",
            "open_24h": "open_24h",
            "high_24h": "high_24h",
            "low_24h": "low_24h",
            "volume_24h": "volume_24h",
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
        "subscribe_within_s": 5,
        "connects_per_s": 8,
        "connects_burst": 20,
        "messages_per_s": 100,
        "requests_per_s": 10,
        "requests_burst": 15,
        "subscriptions_max": 10,
        "heartbeat_s": 1,
    }
    intervals: ClassVar[dict[str, int]] = {}
    notes: ClassVar[str] = (
        "subscribe/unsubscribe for level2_batch, level2 (needs a signature with an accepted --credential), matches,"
        " ticker, heartbeat; GET /products, /products/<id>, /products/<id>/book|trades|ticker, /time."
        " Ledger streams: level2_batch, level2; their ids are the times of the messages in us."
    )

    def __init__(self, exchange: Exchange, limits: Mapping[str, float], credentials: Mapping[str, str]) -> None:
        super().__init__(exchange, limits, credentials)
        self.products = {ticker: _Product(book, exchange.t) for ticker, book in exchange.market.books.items()}
        self.connects: dict[str, Credits] = {}
        self.messages: dict[str, Window] = {}
        self.requests: dict[str, Credits] = {}

    @staticmethod
    def instrument(ticker: str, busy: float) -> Instrument:
        base, _, quote = ticker.partition("-")
        price, tick, lot, scale, size = KNOWN.get(ticker, (1_234_560_000, 10_000, 1_000_000, 4, 5_000))
        return Instrument(ticker, base, quote or "USD", tick, scale, lot, 8, price // tick, size, busy)

    @staticmethod
    def invented(number: int) -> str:
        return f"T{number:03d}-USD"

    def first_book(self, book: Book) -> dict[str, object]:
        product = self.products[book.instrument.ticker]
        bids, asks = ([[product.price(p), product.size(q)] for p, q in book.levels(side)] for side in (BID, ASK))
        return {"last": product.batch_t, "bids": bids, "asks": asks}

    def listed(self, book: Book, t: int) -> None:
        self.products[book.instrument.ticker] = _Product(book, t)

    def delisted(self, book: Book, t: int) -> None:
        self._batches(t)
        del self.products[book.instrument.ticker]

    # The market put into words.

    def _publish(self, channel: str, product: _Product, text: str, first: int, last: int) -> None:
        self.exchange.publish(f"{channel}:{product.name}", product.name, lambda _form: text, first, last)

    def on_action(self, book: Book, action: Action) -> None:
        product = self.products[book.instrument.ticker]
        product.sequence += len(action.changes) + len(action.trades)
        for side, price, before, _ in action.changes:
            product.waiting.setdefault((side, price), before)
        for trade in action.trades:
            taker = "BUY" if trade.side > 0 else "SELL"
            self.exchange.ledger.line(
                "trade",
                product.name,
                f'{{"kind":"trade","ticker":"{product.name}","id":"{trade.id}","seq":{trade.id},'
                f'"price":"{product.price(trade.price)}","qty":"{product.size(trade.lots)}","side":"{taker}","t":{trade.t}}}',
            )
            self._publish(MATCHES, product, self._match("match", product, trade), trade.id, trade.id)
        if action.trades:
            self._ticker(product, action)
        if action.changes:
            product.raw_t = max(action.t, product.raw_t + 1)
            changed = [(side, price, book.level(side, price)) for side, price, _, _ in action.changes]
            self._update(RAW, product, product.raw_t, changed)

    @staticmethod
    def _match(kind: str, product: _Product, trade: Trade) -> str:
        """`side` is that of the resting order."""
        maker, taker = UUID(int=trade.engine_id << 64), UUID(int=(trade.agg_id << 64) + 1)
        return (
            f'{{"type":"{kind}","trade_id":{trade.id},"maker_order_id":"{maker}","taker_order_id":"{taker}",'
            f'"side":"{"sell" if trade.side > 0 else "buy"}","size":"{product.size(trade.lots)}",'
            f'"price":"{product.price(trade.price)}","product_id":"{product.name}","sequence":{product.sequence},'
            f'"time":"{stamp(trade.t)}"}}'
        )

    def _ticker(self, product: _Product, action: Action) -> None:
        """One for each taker, after its last match."""
        day, trade = self.exchange.market.day[product.name], action.trades[-1]
        (bid, bid_lots), (ask, ask_lots) = product.book.best(BID), product.book.best(ASK)
        volume = product.size(day.lots)
        data = {
            "type": "ticker",
            "sequence": product.sequence,
            "product_id": product.name,
            "price": product.price(trade.price),
            "open_24h": product.price(day.open),
            "volume_24h": volume,
            "low_24h": product.price(day.low),
            "high_24h": product.price(day.high),
            "volume_30d": volume,
            "best_bid": product.price(bid),
            "best_bid_size": product.size(bid_lots),
            "best_ask": product.price(ask),
            "best_ask_size": product.size(ask_lots),
            "side": "buy" if trade.side > 0 else "sell",
            "time": stamp(action.t),
            "trade_id": trade.id,
            "last_size": product.size(trade.lots),
        }
        self.exchange.ledger.record("ticker", ticker=product.name, t=action.t, data=data)
        self.exchange.ledger.record(
            "bbo", ticker=product.name, id=product.sequence, bid=data["best_bid"], bid_qty=data["best_bid_size"],
            ask=data["best_ask"], ask_qty=data["best_ask_size"], t=action.t,
        )  # fmt: skip
        product.ticker = _json(data)
        self._publish(TICKER, product, product.ticker, product.sequence, product.sequence)

    def _update(self, channel: str, product: _Product, t: int, changed: list[tuple[int, int, int]]) -> None:
        """One l2update. It carries no number, so the ledger knows it by its time."""
        if self.exchange.ledger.writing:
            bids, asks = (product.levels([(p, q) for s, p, q in changed if s == side]) for side in (BID, ASK))
            previous = product.batch_t if channel == BATCH else 0
            self.exchange.ledger.line(
                "book",
                product.name,
                f'{{"kind":"book","ticker":"{product.name}","stream":"{channel}","first":{t},"last":{t},"prev":{previous},'
                f'"bids":{bids},"asks":{asks},"t":{t}}}',
            )
        if f"{channel}:{product.name}" not in self.exchange.streams:
            return
        words = ",".join(
            f'["{"buy" if side == BID else "sell"}","{product.price(p)}","{product.size(q)}"]' for side, p, q in changed
        )
        text = f'{{"type":"l2update","product_id":"{product.name}","changes":[{words}],"time":"{stamp(t)}"}}'
        self._publish(channel, product, text, t, t)

    def timers(self) -> list[tuple[int, Callable[[int], None]]]:
        return [(BATCH_US, self._batches), (int(self.limit["heartbeat_s"] * 1e6), self._heartbeats)]

    def finish(self, t: int) -> None:
        self._batches(t)

    def _batches(self, t: int) -> None:
        for product in self.products.values():
            if not product.waiting:
                continue
            changed = [(side, price, product.book.level(side, price)) for side, price in product.waiting]
            product.waiting.clear()
            time = max(t, product.batch_t + 1)
            self._update(BATCH, product, time, changed)
            product.batch_t = time

    def _heartbeats(self, t: int) -> None:
        for product in self.products.values():
            text = (
                f'{{"type":"heartbeat","last_trade_id":{product.book.trade_id},"product_id":"{product.name}",'
                f'"sequence":{product.sequence},"time":"{stamp(t)}"}}'
            )
            self._publish(HEARTBEAT, product, text, product.book.trade_id, product.book.trade_id)

    def _snapshot(self, channel: str, product: _Product) -> str:
        """The book as of the last update of the channel, so that the next one follows it."""
        book = product.book
        before = product.waiting if channel == BATCH else {}
        sides = []
        for side in (BID, ASK):
            levels = dict(book.levels(side)) | {price: lots for (s, price), lots in before.items() if s == side}
            sides.append(product.levels(sorted(((p, q) for p, q in levels.items() if q), reverse=side == BID)))
        time = stamp(product.batch_t if channel == BATCH else product.raw_t)
        return f'{{"type":"snapshot","product_id":"{product.name}","asks":{sides[ASK]},"bids":{sides[BID]},"time":"{time}"}}'

    # WebSocket.

    def refuse_ws(self, request: Request) -> Reply | None:
        if request.path != "/":
            return Reply("", 404)
        pool = self._pool(self.connects, request.ip, "connects")
        if pool.take(1, self.exchange.now_s):
            return None
        self.exchange.violation("connects")
        return self.ban_reply(429, 1)

    def _pool(self, pools: dict[str, Credits], ip: str, what: str) -> Credits:
        if ip not in pools:
            pools[ip] = Credits(self.limit[f"{what}_burst"], self.limit[f"{what}_per_s"], self.exchange.now_s)
        return pools[ip]

    def opened(self, session: Session) -> None:
        session.own = False  # whether it has subscribed to anything yet

    def allows(self, session: Session) -> bool:
        window = self.messages.setdefault(session.request.ip, Window(self.limit["messages_per_s"], 1.0))
        return window.allow(self.exchange.now_s)

    def keep(self, session: Session, now_s: float) -> None:
        if not session.own and now_s - session.opened_s >= self.limit["subscribe_within_s"]:
            self.exchange.violation("no_subscription", session)
            self.exchange.hang_up(session, "no subscription within the time allowed")

    def notice(self, session: Session, t: int) -> str:
        """No notice is documented; messages of type error are."""
        return _json({"type": "error", "message": "Server is going away"})

    def unknown_event(self, session: Session, t: int) -> str:
        return f'{{"type":"something_new","product_id":"BTC-USD","z":[1,"2",null],"time":"{stamp(t)}"}}'

    def on_text(self, session: Session, text: str) -> None:
        try:
            self._on_message(session, json.loads(text))
        except ValueError:
            self.exchange.send(session, _json({"type": "error", "message": "Malformed JSON"}))
        except _Refused as refused:
            words = {"type": "error", "message": refused.message, "reason": refused.reason}
            self.exchange.send(session, _json(words))

    def _on_message(self, session: Session, message: Any) -> None:
        kind = message.get("type") if isinstance(message, dict) else None
        if kind not in ("subscribe", "unsubscribe"):
            raise _Refused("Failed to subscribe", f"{kind} is not a valid type")
        pairs = self._pairs(message)
        if kind == "unsubscribe":
            for channel, ticker in pairs:
                self.exchange.unsubscribe(session, f"{channel}:{ticker}")
            self._reply(session)
            return
        if self.exchange.ignored(session, {f"{channel}:{ticker}": ticker for channel, ticker in pairs}):
            return
        has_login = self._has_login(message)
        for channel, ticker in pairs:
            self._check(session, channel, ticker, has_login)
        session.own = True
        fresh = [(c, ticker) for c, ticker in pairs if f"{c}:{ticker}" not in session.subs]
        for channel, ticker in fresh:
            self.exchange.subscribe(session, f"{channel}:{ticker}", None)
        self._reply(session)
        for channel, ticker in fresh:
            self._greet(session, channel, self.products[ticker])

    @staticmethod
    def _pairs(message: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Channel and product of all that a request names; products stand beside the channel or above all of them."""
        common, pairs = message.get("product_ids", []), []
        channels = message.get("channels")
        if not isinstance(channels, list) or not channels or not isinstance(common, list):
            raise _Refused("Failed to subscribe", "channels is required")
        for channel in channels:
            name = channel.get("name") if isinstance(channel, dict) else channel
            tickers = channel.get("product_ids", common) if isinstance(channel, dict) else common
            if not isinstance(tickers, list) or not tickers:
                raise _Refused("Failed to subscribe", "product_ids is required")
            pairs += [(BATCH if name == REPLIED_AS[BATCH] else str(name), str(ticker)) for ticker in tickers]
        return pairs

    def _check(self, session: Session, channel: str, ticker: str, has_login: bool) -> None:
        stream = f"{channel}:{ticker}"
        if channel in WITH_LOGIN and not has_login:
            raise _Refused("Failed to subscribe", f"{channel} channel requires authentication")
        if channel not in CHANNELS:
            raise _Refused("Failed to subscribe", f"{channel} is not a valid channel")
        if ticker not in self.products or self.exchange.refused(session, stream, ticker):
            raise _Refused("Failed to subscribe", f"{ticker} is not a valid product")
        others = sum(stream in s.subs for s in self.exchange.sessions.values() if s is not session)
        if others >= self.limit["subscriptions_max"]:
            self.exchange.violation("subscriptions", session)
            raise _Refused("Failed to subscribe", f"too many subscriptions to {stream}")

    def _has_login(self, message: Mapping[str, Any]) -> bool:
        """Whether the request is signed; a wrong signature is refused."""
        if "signature" not in message and "key" not in message:
            return False
        secret = self.credentials.get(str(message.get("key")), "")
        signed = f"{message.get('timestamp')}GET/users/self/verify".encode()
        try:
            right = base64.b64encode(hmac.new(base64.b64decode(secret), signed, hashlib.sha256).digest()).decode()
        except binascii.Error:
            right = ""
        if not secret or not message.get("passphrase") or message.get("signature") != right:
            raise _Refused("Authentication Failed", "invalid signature")
        return True

    def _reply(self, session: Session) -> None:
        """All that is subscribed now."""
        found: dict[str, list[str]] = {}
        for stream in session.subs:
            channel, _, ticker = stream.partition(":")
            found.setdefault(REPLIED_AS.get(channel, channel), []).append(ticker)
        channels = [{"name": c, "product_ids": tickers, "account_ids": None} for c, tickers in found.items()]
        self.exchange.send(session, _json({"type": "subscriptions", "channels": channels}))

    def _greet(self, session: Session, channel: str, product: _Product) -> None:
        if channel in (BATCH, RAW):
            self.exchange.send(session, self._snapshot(channel, product))
        elif channel == MATCHES and product.book.trades:
            self.exchange.send(session, self._match("last_match", product, product.book.trades[-1]))
        elif channel == TICKER and product.ticker:
            self.exchange.send(session, product.ticker)

    # REST.

    def ban_reply(self, status: int, retry_after_s: int) -> Reply:
        return Reply('{"message":"Public rate limit exceeded"}', status, {"Retry-After": str(retry_after_s)})

    async def http(self, request: Request) -> Reply:
        if request.method != "GET":
            return Reply('{"message":"Method Not Allowed"}', 405)
        if not self._pool(self.requests, request.ip, "requests").take(1, self.exchange.now_s):
            self.exchange.violation("requests")
            return self.ban_reply(429, 1)
        parts = request.path.strip("/").split("/")
        if parts == ["time"]:
            now = self.exchange.clock_us()
            return Reply(_json({"iso": stamp(now), "epoch": now / 1e6}))
        if parts == ["products"]:
            return Reply(_json([self._described(name) for name in (*self.products, *self.exchange.halted)]))
        product = self.products.get(parts[1]) if parts[0] == "products" and len(parts) in (2, 3) else None
        answers: dict[str, Callable[[_Product, Request], Reply]] = {
            "book": self._book, "trades": self._trades, "ticker": self._ticker_now,
            "": lambda found, _: Reply(_json(self._described(found.name))),
        }  # fmt: skip
        answer = answers.get(parts[2] if len(parts) == 3 else "")
        if product is None or answer is None:
            return Reply('{"message":"NotFound"}', 404)
        return answer(product, request)

    def _described(self, name: str) -> dict[str, object]:
        halted = self.exchange.halted.get(name)
        instrument = halted or self.products[name].book.instrument
        scale = instrument.price_scale + self.exchange.finer[name]
        return {
            "id": name,
            "base_currency": instrument.base,
            "quote_currency": instrument.quote,
            "quote_increment": plain(instrument.tick // 10 ** (8 - instrument.price_scale), scale),
            "base_increment": plain(instrument.lot, 8),
            "display_name": f"{instrument.base}/{instrument.quote}",
            "min_market_funds": "1",
            "margin_enabled": False,
            "post_only": False,
            "limit_only": False,
            "cancel_only": False,
            "status": "delisted" if halted else "online",
            "status_message": "",
            "trading_disabled": halted is not None,
            "fx_stablecoin": False,
            "auction_mode": False,
        }

    def _book(self, product: _Product, request: Request) -> Reply:
        """Aggregated; the book of this moment, not of the last batch."""
        level = request.query.get("level", "1")
        if level not in ("1", "2"):
            return Reply('{"message":"Invalid level"}', 400)
        most = 1 if level == "1" else None
        bids, asks = (product.levels(product.book.levels(side)[:most], ",1") for side in (BID, ASK))
        return Reply(
            f'{{"bids":{bids},"asks":{asks},"sequence":{product.sequence},"auction_mode":false,"auction":null,'
            f'"time":"{stamp(self.exchange.t)}"}}'
        )

    @staticmethod
    def _trades(product: _Product, request: Request) -> Reply:
        """Newest first; `after` pages towards older ids, `before` towards newer ones, neither is in the page."""
        numbers: dict[str, float] = {"limit": 1000, "after": math.inf, "before": -math.inf}
        for name in numbers:
            text = request.query.get(name, "")
            if text and not text.isdigit():
                return Reply(_json({"message": f"Invalid value for {name}"}), 400)
            numbers[name] = int(text) if text else numbers[name]
        chosen = [t for t in product.book.trades if numbers["before"] < t.id < numbers["after"]]
        count = max(1, min(int(numbers["limit"]), 1000))
        page = chosen[:count] if request.query.get("before") else chosen[-count:]
        rows = [
            {
                "trade_id": t.id,
                "side": "sell" if t.side > 0 else "buy",
                "size": product.size(t.lots),
                "price": product.price(t.price),
                "time": stamp(t.t),
            }
            for t in reversed(page)
        ]
        headers = {"cb-before": str(page[-1].id), "cb-after": str(page[0].id)} if page else {}
        return Reply(_json(rows), 200, headers)

    def _ticker_now(self, product: _Product, _request: Request) -> Reply:
        if not product.book.trades:
            return Reply('{"message":"NotFound"}', 404)
        trade, (bid, _), (ask, _) = product.book.trades[-1], product.book.best(BID), product.book.best(ASK)
        day = self.exchange.market.day[product.name]
        words = {"ask": product.price(ask), "bid": product.price(bid), "volume": product.size(day.lots)}
        last = {"trade_id": trade.id, "price": product.price(trade.price), "size": product.size(trade.lots)}
        return Reply(_json(words | last | {"time": stamp(trade.t)}))


def stamp(t: int) -> str:
    """RFC 3339 in UTC with six decimals."""
    return (EPOCH + timedelta(microseconds=t)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
