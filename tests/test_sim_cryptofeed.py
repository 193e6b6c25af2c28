"""An unmodified third-party client judges the simulated exchanges: what cryptofeed receives equals the ledger.

Its environment is made once, in `.venv-cryptofeed` beside the project; without a package index the tests are skipped.
"""

import json
import os
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trustme

from bench.processes import CRYPTOFEED, INSTALL_S, NotInstalled, environment
from tools.sim.ledger import Ledger
from tools.sim.process import SimProcess

SCRIPT = Path(__file__).with_name("thirdparty_cryptofeed.py")
LISTEN_S = 5

pytestmark = [pytest.mark.thirdparty, pytest.mark.timeout(INSTALL_S + 120)]


@pytest.fixture(scope="module")
def python() -> Path:
    return interpreter_of(CRYPTOFEED)


def interpreter_of(package: str) -> Path:
    """The interpreter that has a third-party client; the test is skipped where it cannot be had."""
    try:
        return environment(package)
    except NotInstalled as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of an authority and of a certificate for the simulator; the library refuses addresses without TLS."""
    home = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(home / "ca.pem")
    issued.private_key_pem.write_to_path(home / "key.pem")
    issued.cert_chain_pems[0].write_to_path(home / "cert.pem")
    return {name: str(home / f"{name}.pem") for name in ("ca", "key", "cert")}


def received(
    python: Path, exchange: str, sim: SimProcess, symbols: list[str], ca: str, work: Path
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The exchange's names of the symbols, and everything that the library told its callbacks."""
    trusted = {"SSL_CERT_FILE": ca, "REQUESTS_CA_BUNDLE": ca}
    command = [str(python), str(SCRIPT), exchange, sim.ws_url, sim.rest_url, str(LISTEN_S), *symbols]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=work, env={"PATH": os.environ["PATH"], **trusted}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return lines[0]["names"], lines[1:]


def check_trades(got: list[dict[str, Any]], truth: dict[str, dict[str, Any]]) -> None:
    """Every trade equals the ledger's, and none of the ledger's between the first and the last is missing."""
    assert len(got) > 50
    ids = list(truth)
    first, last = ids.index(got[0]["id"]), ids.index(got[-1]["id"])
    assert [trade["id"] for trade in got] == ids[first : last + 1]
    for trade in got:
        row = truth[trade["id"]]
        assert (Decimal(trade["price"]), Decimal(trade["qty"])) == (Decimal(row["price"]), Decimal(row["qty"]))
        assert trade["side"].upper() == row["side"]


def check_books(got: list[dict[str, Any]], ledger: Ledger, ticker: str, stream: str) -> int:
    """Every book whose sequence number ends a depth event equals the ledger's book at that number."""
    told = {book["seq"]: book for book in got}
    compared = 0
    for update_id, (bids, asks) in ledger.books(ticker, stream):
        book = told.get(update_id)
        if book is None:
            continue
        for side, true in (("bid", bids), ("ask", asks)):
            levels = {Decimal(price): Decimal(qty) for price, qty in book[side].items()}
            assert levels == {Decimal(price): Decimal(qty) for price, qty in true.items()}, (ticker, update_id, side)
        compared += 1
    return compared


def test_binance_trades_and_books_equal_the_ledger(python: Path, certificates: dict[str, str], tmp_path: Path) -> None:
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", "BTCUSDT:1,ETHUSDT:0.5")
    with SimProcess("binance_spot", *market, *tls, ledger=tmp_path / "l") as sim:
        names, rows = received(python, "BINANCE", sim, ["BTC-USDT", "ETH-USDT"], certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert names == {"BTC-USDT": "BTCUSDT", "ETH-USDT": "ETHUSDT"}
    for symbol, ticker in names.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        check_trades([row for row in mine if row["kind"] == "trade"], ledger.aggtrades(ticker))
        books = [row for row in mine if row["kind"] == "book"]
        assert check_books(books, ledger, ticker, "depth@100ms") > 20


def test_binance_futures_books_equal_the_ledger_and_no_trade_comes(
    python: Path, certificates: dict[str, str], tmp_path: Path
) -> None:
    """The library connects without a route, as all did before 2026-04-23: books come there. Its trades are `aggTrade`,
    which only /market carries, so its subscription is acknowledged and stays silent (F1), as on the venue itself.
    """
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", "BTCUSDT:1,ETHUSDT:0.5")
    with SimProcess("binance_futures", *market, *tls, ledger=tmp_path / "l") as sim:
        symbols = ["BTC-USDT-PERP", "ETH-USDT-PERP"]
        names, rows = received(python, "BINANCE_FUTURES", sim, symbols, certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert names == {"BTC-USDT-PERP": "BTCUSDT", "ETH-USDT-PERP": "ETHUSDT"}
    for symbol, ticker in names.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        assert {row["kind"] for row in mine} == {"book"}
        assert check_books(mine, ledger, ticker, "depth@100ms") > 20
        assert ledger.aggtrades(ticker)
    assert [c["path"].partition("?")[0] for c in ledger.connections if c["event"] == "open"] == ["/stream"]


def test_deribit_trades_and_books_equal_the_ledger(python: Path, certificates: dict[str, str], tmp_path: Path) -> None:
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", "BTC-PERPETUAL:1,ETH-PERPETUAL:0.5", "--credential", "someone:secret")
    with SimProcess("deribit", *market, *tls, ledger=tmp_path / "l") as sim:
        names, rows = received(python, "DERIBIT", sim, ["BTC-USD-PERP", "ETH-USD-PERP"], certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert names == {"BTC-USD-PERP": "BTC-PERPETUAL", "ETH-USD-PERP": "ETH-PERPETUAL"}
    for symbol, ticker in names.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        check_trades([row for row in mine if row["kind"] == "trade"], ledger.trades(ticker))
        books = [row for row in mine if row["kind"] == "book"]
        assert check_books(books, ledger, ticker, "raw") == len(books) > 100


def test_okx_trades_and_books_equal_the_ledger(python: Path, certificates: dict[str, str], tmp_path: Path) -> None:
    """The library looks at no seqId and asks for candles on the public path, where the venue refuses them (60018); so
    books are told apart by their time, and candles are left out. Merged trades come to it as one, as the venue sends them.
    """
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", "BTC-USDT:1,BTC-USDT-SWAP:0.5")
    with SimProcess("okx", *market, *tls, ledger=tmp_path / "l") as sim:
        names, rows = received(python, "OKX", sim, ["BTC-USDT", "BTC-USDT-PERP"], certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert names == {"BTC-USDT": "BTC-USDT", "BTC-USDT-PERP": "BTC-USDT-SWAP"}
    for symbol, ticker in names.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        check_trades([row for row in mine if row["kind"] == "trade"], ledger.aggtrades(ticker))
        times = {event["last"]: event["t"] // 1000 for event in ledger.book_events(ticker, "books")}
        ids = {time: update_id for update_id, time in times.items()}
        # Of the first book, which begins between two messages, only the levels are of a message.
        books = [{**row, "seq": ids[row["seq"]]} for row in mine if row["kind"] == "book" and row["seq"] in ids]
        assert check_books(books, ledger, ticker, "books") == len(books) > 20


@pytest.mark.parametrize(
    ("category", "tickers"),
    [
        ("linear", {"BTC-USDT-PERP": "BTCUSDT", "ETH-USDC-PERP": "ETHPERP", "BTC-USDC-26Z25": "BTC-25DEC26"}),
        ("spot", {"BTC-USDT": "BTCUSDT", "SOL-USDC": "SOLUSDC"}),
    ],
)
def test_bybit_trades_and_books_equal_the_ledger(
    python: Path, certificates: dict[str, str], tmp_path: Path, category: str, tickers: dict[str, str]
) -> None:
    """The library looks at no `u` and sends no ping; of two categories it knows nothing (inverse, option). It asks for
    both lists of symbols at once, which one simulated category does not have, so it is pointed to one of them."""
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", ",".join(f"{ticker}:1" for ticker in tickers.values()))
    with SimProcess(f"bybit_{category}", *market, *tls, ledger=tmp_path / "l") as sim:
        names, rows = received(python, f"BYBIT_{category.upper()}", sim, list(tickers), certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert {symbol: name.replace("/", "") for symbol, name in names.items()} == tickers
    for symbol, ticker in tickers.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        check_trades([row for row in mine if row["kind"] == "trade"], ledger.trades(ticker))
        books = [row for row in mine if row["kind"] == "book"]
        assert check_books(books, ledger, ticker, "orderbook.200") == len(books) > 20


def test_coinbase_trades_and_bids_equal_the_ledger(python: Path, certificates: dict[str, str], tmp_path: Path) -> None:
    """What this client gets wrong of the venue's words: it takes the side of a trade, the maker's, for the taker's; it
    looks for `ask` in the snapshot, where the venue says `offer`, so asks appear as they change; and it asks for a
    channel `heartbeat`, which is called `heartbeats`, and gets an error. Its list of products needs a login, so it is
    pointed to the public one. All else is equal."""
    tls = ("--tls-cert", certificates["cert"], "--tls-key", certificates["key"])
    market = ("--rate", "150", "--tickers", "BTC-USD:1,ETH-USD:0.5")
    with SimProcess("coinbase", *market, *tls, ledger=tmp_path / "l") as sim:
        sim.rest_url += "/api/v3/brokerage/market"
        names, rows = received(python, "COINBASE", sim, ["BTC-USD", "ETH-USD"], certificates["ca"], tmp_path)
        sim.stop()
    ledger = sim.ledger()
    assert names == {"BTC-USD": "BTC-USD", "ETH-USD": "ETH-USD"}
    opposite = {"buy": "sell", "sell": "buy"}
    for symbol, ticker in names.items():
        mine = [row for row in rows if row["symbol"] == symbol]
        trades = [{**row, "side": opposite[row["side"]]} for row in mine if row["kind"] == "trade"]
        check_trades(sorted(trades, key=lambda trade: int(trade["id"])), ledger.trades(ticker))
        told = [row for row in mine if row["kind"] == "book"]
        sides = [({_number(p): _number(q) for p, q in row["bid"].items()},
                  {_number(p): _number(q) for p, q in row["ask"].items()}) for row in told]  # fmt: skip
        compared = 0
        for _, (bids, asks) in ledger.books(ticker):
            truth = {_number(p): _number(q) for p, q in bids.items()}, {_number(p): _number(q) for p, q in asks.items()}
            if not compared and sides[0][0] != truth[0]:
                continue  # the client was not there yet
            if compared == len(sides):
                break
            assert sides[compared][0] == truth[0], (ticker, compared)
            assert sides[compared][1].items() <= truth[1].items(), (ticker, compared)
            compared += 1
        assert compared == len(told) > 50


def _number(text: str) -> Decimal:
    return Decimal(text).normalize()
