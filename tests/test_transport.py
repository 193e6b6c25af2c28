"""What an HTTP answer makes a connector do, told by a real server: the wait of every spelling of Retry-After, a retry."""

import asyncio
import time
from email.utils import formatdate

import pytest
from aiohttp import web

from mdcollector.budget import BLOCK_MOST_S
from mdcollector.errors import Disconnected, RateLimited
from mdcollector.transport import RETRY_AFTER_DEFAULT_S, get, open_session


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

        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with open_session(None) as session:
                with pytest.raises((RateLimited, Disconnected)) as raised:
                    await get(session, f"http://127.0.0.1:{runner.addresses[0][1]}/", rate_limited, tries=1)
        finally:
            await runner.cleanup()
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
    ],
)
def test_how_long_a_429_is_waited_for(value: str | None, seconds: float) -> None:
    assert waited(429, value) == seconds


def test_a_date_is_waited_for_too() -> None:
    until = time.time() + 3600
    assert 3600 - 30 < waited(418, formatdate(until, usegmt=True)) <= 3600


def test_a_status_that_a_venue_has_for_it() -> None:
    assert waited(403, None, {403: 600.0}) == 600.0


@pytest.mark.parametrize("status", [408, 500, 504])
def test_a_venue_that_took_too_long_has_not_answered(status: int) -> None:
    """Only what is no answer is retried. Binance tells a timeout of its own backend as 408."""
    assert isinstance(raised_by(status, {}), Disconnected)
