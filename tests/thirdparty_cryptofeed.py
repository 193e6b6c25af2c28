"""What an unmodified cryptofeed receives from an exchange, as JSON lines on stdout.

Run by `test_sim_cryptofeed.py` in an environment of its own that has cryptofeed and nothing of this project:

    python thirdparty_cryptofeed.py EXCHANGE WS_URL REST_URL SECONDS SYMBOL...

EXCHANGE is one of FEEDS. Only the addresses (class attributes that the library has for this purpose), the TLS context and
the credentials are set.
"""

import asyncio
import json
import ssl
import sys

from cryptofeed import FeedHandler
from cryptofeed.connection import RestEndpoint, Routes, WebsocketEndpoint
from cryptofeed.defines import L2_BOOK, TRADES
from cryptofeed.exchanges import OKX, Binance, BinanceFutures, Bybit, Coinbase, Deribit

# Class, path of its WebSocket, and which of the addresses of its lists of symbols is meant, where it has several.
FEEDS = {
    "BINANCE": (Binance, "", ""), "BINANCE_FUTURES": (BinanceFutures, "", ""), "COINBASE": (Coinbase, "", ""),
    "BYBIT_LINEAR": (Bybit, "/v5/public/linear", "category=linear"),
    "BYBIT_SPOT": (Bybit, "/v5/public/spot", "category=spot"),
    "DERIBIT": (Deribit, "/ws/api/v2", ""), "OKX": (OKX, "/ws/v5/public", ""),
}  # fmt: skip


def tell(**row):
    sys.stdout.write(json.dumps(row) + "\n")


async def on_trade(trade, _received):
    tell(kind="trade", symbol=trade.symbol, id=trade.id, price=str(trade.price), qty=str(trade.amount), side=trade.side)


async def on_book(book, _received):
    levels = book.book.to_dict()
    sides = {side: {str(price): str(qty) for price, qty in levels[side].items()} for side in ("bid", "ask")}
    # Where the library hands on no number of a message, the message itself has one (Bybit), or its time in ms stands for
    # it; books of Coinbase have no such time.
    seq = book.sequence_number
    data = book.raw.get("data") if isinstance(book.raw, dict) else None
    if seq is None and isinstance(data, dict):
        seq = data.get("u")
    if seq is None and isinstance(book.timestamp, float):
        seq = round(book.timestamp * 1000)
    tell(kind="book", symbol=book.symbol, seq=seq, **sides)


def main():
    name, ws_url, rest_url, seconds, *symbols = sys.argv[1:]
    feed, path, listed = FEEDS[name]
    feed.websocket_endpoints = [WebsocketEndpoint(ws_url + path, options={"ssl": ssl.create_default_context()})]
    routes = feed.rest_endpoints[0].routes
    if listed:
        routes = Routes([address for address in routes.instruments if listed in address] * len(routes.instruments))
    feed.rest_endpoints = [RestEndpoint(rest_url, routes=routes)]
    key = {"key_id": "someone", "key_secret": "secret"}
    config = {"log": {"disabled": True}, "uvloop": False, "deribit": key, "coinbase": key}
    handler = FeedHandler(config=config)
    made = feed(
        config=config,
        symbols=symbols,
        channels=[TRADES, L2_BOOK],
        callbacks={TRADES: on_trade, L2_BOOK: on_book},
    )
    tell(kind="symbols", names={symbol: made.std_symbol_to_exchange_symbol(symbol) for symbol in symbols})
    handler.add_feed(made)
    asyncio.get_event_loop().call_later(float(seconds), asyncio.get_event_loop().stop)
    handler.run(install_signal_handlers=False)
    sys.stdout.flush()


main()
