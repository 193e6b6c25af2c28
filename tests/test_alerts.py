"""Alerts: when somebody is told, how often, and that secrets stay out of what is said."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
from aiohttp import web

from mdcollector.alerts import LINES_MAX, QUEUE_MAX, Alerts, Messenger, Notice
from mdcollector.health import KINDS, Finding

DEAD = Finding("dead", "okx", "silent for 9 s")
BEHIND = Finding("writer_behind", "parquet", "okx/trades is behind")
INVALID = Finding("book_invalid", "okx", "3 books are not proven")
TOKEN = "12345:not-a-real-token"


def told(alerts: Alerts, steps: list[tuple[float, list[Finding]]]) -> list[tuple[float, Notice]]:
    """Times and notices of a run."""
    notices = ((now, alerts.update(findings, now)) for now, findings in steps)
    return [(now, notice) for now, notice in notices if notice is not None]


def seconds(end: int, found: dict[range, list[Finding]]) -> list[tuple[float, list[Finding]]]:
    """One step a second: what is found when."""
    return [(float(t), [f for when, findings in found.items() if t in when for f in findings]) for t in range(end)]


def test_what_happens_together_is_told_together_and_once() -> None:
    run = told(Alerts(group_s=5, cooldown_s=1000), seconds(60, {range(60): [DEAD], range(3, 60): [BEHIND]}))
    assert [(t, list(n.began), list(n.lasting), list(n.over)) for t, n in run] == [(5.0, [DEAD, BEHIND], [], [])]


def test_a_finding_that_may_last_a_while_is_told_only_after_it() -> None:
    patience = KINDS["book_invalid"].for_s
    assert patience > 0
    short = told(Alerts(group_s=0, cooldown_s=1000), seconds(90, {range(int(patience)): [INVALID]}))
    assert short == []
    (first, notice), *rest = told(Alerts(group_s=0, cooldown_s=1000), seconds(90, {range(90): [INVALID]}))
    assert (first, list(notice.began), rest) == (patience, [INVALID], [])


def test_the_end_is_told_and_only_of_what_was_told() -> None:
    run = told(Alerts(group_s=2, cooldown_s=1000), seconds(60, {range(5, 20): [DEAD], range(5, 6): [INVALID]}))
    assert [(list(n.began), list(n.over)) for _, n in run] == [([DEAD], []), ([], [DEAD])]
    assert run[1][0] > 20
    assert "recovered okx" in run[1][1].text


def test_what_comes_and_goes_is_quiet_for_the_cooldown_and_what_lasts_is_repeated_after_it() -> None:
    flapping = {range(t, t + 5): [DEAD] for t in range(0, 100, 20)}
    run = told(Alerts(group_s=1, cooldown_s=70), seconds(120, flapping))
    began = [t for t, n in run if n.began]
    assert began == [1.0, 81.0], "told once, and again only after the cooldown"
    lasting = told(Alerts(group_s=1, cooldown_s=30), seconds(100, {range(100): [DEAD]}))
    assert [t for t, n in lasting if n.lasting] == [32.0, 63.0, 94.0]


def test_a_long_notice_is_cut_and_says_so() -> None:
    many = [Finding("dead", f"p{i}", "gone") for i in range(LINES_MAX + 7)]
    lines = Notice(many, [], []).text.splitlines()
    assert len(lines) == LINES_MAX + 2
    assert lines[-1] == "... and 7 more"


# Delivery, to real servers


class Receiver:
    """A local HTTP server that keeps what it is sent; refuses the first few requests."""

    def __init__(self, refuse: int = 0) -> None:
        self.got: list[tuple[str, dict[str, object]]] = []
        self.refused, self._refuse = 0, refuse

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/{tail:.*}", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        if self.refused < self._refuse:
            self.refused += 1
            return web.Response(status=503)
        self.got.append((request.path, json.loads(await request.text())))
        return web.Response(text="{}")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.DEBUG)
    yield caplog
    assert TOKEN not in caplog.text


async def _until(condition: object, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 (another task counts)
            await asyncio.sleep(0.01)


def test_a_notice_reaches_webhook_and_telegram_also_after_a_refusal(said: pytest.LogCaptureFixture) -> None:
    async def run() -> Receiver:
        receiver = Receiver(refuse=2)
        url = await receiver.start()
        messenger = Messenger(
            webhook_url=f"{url}/hook", telegram_chat="-100", telegram_token=TOKEN, telegram_url=url
        )  # fmt: skip
        task = asyncio.create_task(messenger.run())
        messenger.tell(Notice([DEAD], [], [BEHIND]))
        await _until(lambda: messenger.counters["webhook_sent"] and messenger.counters["telegram_sent"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await receiver.stop()
        return receiver

    receiver = asyncio.run(run())
    assert receiver.refused == 2
    bodies = dict(receiver.got)
    hook, chat = bodies["/hook"], bodies[f"/bot{TOKEN}/sendMessage"]
    assert hook["began"] == [{"kind": "dead", "process": "okx", "text": "silent for 9 s", "about": "", "state": "down"}]
    assert [f["process"] for f in hook["over"]] == ["parquet"]  # type: ignore[attr-defined]
    assert chat["chat_id"] == "-100"
    assert "DOWN okx: silent for 9 s" in str(chat["text"])
    assert "recovered parquet" in str(chat["text"])
    assert "DOWN okx: silent for 9 s" in said.text


def test_an_unreachable_receiver_is_counted_and_its_address_never_logged(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Messenger._send.retry, "wait", lambda _: 0.0)  # type: ignore[attr-defined]

    async def run() -> Messenger:
        messenger = Messenger(telegram_chat="1", telegram_token=TOKEN, telegram_url="http://127.0.0.1:1")
        task = asyncio.create_task(messenger.run())
        messenger.tell(Notice([DEAD], [], []))
        await _until(lambda: messenger.counters["telegram_failed"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return messenger

    assert asyncio.run(run()).counters == {"telegram_failed": 1}
    assert "a notice was not delivered" in said.text


def test_more_notices_than_can_wait_are_counted() -> None:
    messenger = Messenger(webhook_url="http://127.0.0.1:1")
    for _ in range(QUEUE_MAX + 3):
        messenger.tell(Notice([DEAD], [], []))
    assert messenger.counters == {"webhook_dropped": 3}
