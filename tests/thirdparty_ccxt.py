"""What an unmodified ccxt receives from an exchange over WebSocket, as JSON lines on stdout.

Run by `test_sim_coinbase_exchange.py` in an environment of its own that has ccxt and nothing of this project:

    CCXT_KEY=... CCXT_SECRET=... CCXT_PASSWORD=... python thirdparty_ccxt.py EXCHANGE WS_URL REST_URL SECONDS SYMBOL...

Only addresses and credentials are set, and that no list of currencies is asked for.
"""

import asyncio
import json
import os
import sys

import ccxt.pro


def tell(**row):
    sys.stdout.write(json.dumps(row) + "\n")


async def trades(exchange, symbol):
    while True:
        for trade in await exchange.watch_trades(symbol):
            row = {"id": trade["id"], "price": trade["info"]["price"], "qty": trade["info"]["size"]}
            tell(kind="trade", symbol=symbol, side=trade["side"], **row)


async def books(exchange, symbol):
    while True:
        book = await exchange.watch_order_book(symbol)
        sides = {side: {repr(price): repr(size) for price, size in book[side]} for side in ("bids", "asks")}
        tell(kind="book", symbol=symbol, ms=book["timestamp"], **sides)


async def main():
    name, ws_url, rest_url, seconds, *symbols = sys.argv[1:]
    keys = {"apiKey": "CCXT_KEY", "secret": "CCXT_SECRET", "password": "CCXT_PASSWORD"}
    exchange = getattr(ccxt.pro, name)({"newUpdates": True, **{key: os.environ[name] for key, name in keys.items()}})
    exchange.urls["api"] = {"ws": ws_url, "public": rest_url, "private": rest_url}
    exchange.has["fetchCurrencies"] = False
    await exchange.load_markets()
    tasks = [asyncio.create_task(watch(exchange, symbol)) for symbol in symbols for watch in (trades, books)]
    done, _ = await asyncio.wait(tasks, timeout=float(seconds), return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for task in done:
        task.result()  # raises what ended it
    await exchange.close()
    sys.stdout.flush()


asyncio.run(main())
