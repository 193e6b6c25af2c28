"""What an HTTP answer makes a connector do, told by a real server: the wait of every spelling of Retry-After, a retry."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from aiohttp import web

from mdcollector.budget import BLOCK_MOST_S, Budget
from mdcollector.emit import Emit
from mdcollector.errors import Disconnected, RateLimited
from mdcollector.exchanges import Fetch, Options
from mdcollector.exchanges.bybit import BybitLinear
from mdcollector.transport import RETRY_AFTER_DEFAULT_S, Fetcher, get, open_session


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The address of a server that answers everything so."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def waited(status: int, retry_after: str | None, rate_limited: dict[int, float] | None = None) -> float:
    """Seconds that this answer asks for."""
    error = raised_by(status, {"Retry-After": retry_after} if retry_after is not None else {}, rate_limited)
    assert isinstance(error, RateLimited)
    return error.retry_after_s


def raised_by(status: int, headers: dict[str, str], rate_limited: dict[int, float] | None = None) -> Exception:
    """What one try raises at this answer."""

    async def ask() -> Exception:

        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=status, headers=headers)

        async with serving(answer) as base, open_session(None) as session:
            with pytest.raises((RateLimited, Disconnected)) as raised:
                await get(session, base, rate_limited, tries=1)
        return raised.value

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("2.5", 2.5),
        ("0", 1.0),
        ("-3", 1.0),
        (None, RETRY_AFTER_DEFAULT_S),
        ("soon", RETRY_AFTER_DEFAULT_S),
        ("nan", RETRY_AFTER_DEFAULT_S),
        ("1e999", RETRY_AFTER_DEFAULT_S),  # infinite
        ("99999999999999", BLOCK_MOST_S),  # more than any ban lasts
        (formatdate(0, usegmt=True), 1.0),  # is over
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", RETRY_AFTER_DEFAULT_S),
    ],
)
def test_how_long_a_429_is_waited_for(value: str | None, seconds: float) -> None:
    assert waited(429, value) == seconds


def test_a_date_is_waited_for_too() -> None:
    until = time.time() + 3600
    assert 3600 - 30 < waited(418, formatdate(until, usegmt=True)) <= 3600


def test_a_status_that_a_venue_has_for_it() -> None:
    assert waited(403, None, {403: 600.0}) == 600.0


@pytest.mark.parametrize(
    ("status", "ahead_s", "least_s", "most_s"),
    [
        (200, 300, 285, 300),  # retCode 10006 in the body
        (200, 0, 0, 5),  # what the header says in an answer when no limit was hit
        (200, 86_400, 0, 5),  # of another clock
        (200, None, 0, 5),
        (403, 300, 585, 600),  # the documents say so
        (403, 86_400, 585, 600),
    ],
)
def test_bybit_tells_when_a_limit_is_over(
    status: int, ahead_s: int | None, least_s: float, most_s: float, tmp_path: Path
) -> None:
    """What the header tells is waited for, where it is longer than what is waited anyway."""
    reset = "soon" if ahead_s is None else str(int((time.time() + ahead_s) * 1000))

    async def answer(_: web.Request) -> web.Response:
        body = '{"retCode":10006,"retMsg":"Too many visits!","result":{}}'
        return web.Response(status=status, text=body, headers={"X-Bapi-Limit-Reset-Timestamp": reset})

    async def asked(fetcher: Fetcher) -> None:
        held = asyncio.Event()
        task = asyncio.create_task(fetcher.run(held.set, lambda: None))
        await held.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run() -> None:
        async with serving(answer) as base:
            fetcher = Fetcher(emit, venue, [base], Budget(tmp_path / "b", 600, 5), None)
            fetcher.want(Fetch("trades AUSDT", "/v5/market/recent-trade?category=linear&symbol=AUSDT", 1))
            await asked(fetcher)
            waited_s = (fetcher.blocked_until_ns - time.time_ns()) / 1e9
            assert least_s < waited_s <= most_s
            assert emit.counters["http_rate_limited"] == 1

    emit = Emit(tmp_path, "t", BybitLinear.EXCHANGE, ["trades"], semaphore=False)
    venue = BybitLinear(emit, Options(), BybitLinear.streams_of("AUSDT", ["trades"], Options()))
    asyncio.run(run())
    emit.close()


def test_an_answer_that_leads_on_to_no_host_is_a_failure_like_any_other(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": f"http://{'a' * 300}/"})

    async def run() -> None:
        async with serving(answer) as base:
            fetcher = Fetcher(emit, venue, [base], Budget(tmp_path / "b", 600, 5), None, tries=1)
            fetcher.want(Fetch("k", "/", 1))
            failed = asyncio.Event()
            task = asyncio.create_task(fetcher.run(failed.set, lambda: None))
            await asyncio.wait([task, asyncio.create_task(failed.wait())], return_when="FIRST_COMPLETED")
            assert not task.done()
            task.cancel()
            assert emit.counters["http_failed"] == 1

    emit = Emit(tmp_path, "t", BybitLinear.EXCHANGE, ["trades"], semaphore=False)
    venue = BybitLinear(emit, Options(), [])
    asyncio.run(run())
    emit.close()


@pytest.mark.parametrize("status", [408, 500, 504])
def test_a_venue_that_took_too_long_has_not_answered(status: int) -> None:
    """Only what is no answer is retried. Binance tells a timeout of its own backend as 408."""
    assert isinstance(raised_by(status, {}), Disconnected)
