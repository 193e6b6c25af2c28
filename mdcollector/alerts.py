"""Alerts: who is told of findings, when, and how. Grouped, not repeated within a cooldown, and told again when it is over.

Driven by `monitor.py` once a second with all findings of that moment; the state machine does no I/O. A message goes to the
log and, where configured, to a webhook and to a Telegram chat (Bot API, sendMessage), each by a task that tries again for
a while; what could not be delivered is counted, never waited for.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp
import msgspec
import tenacity

from mdcollector.health import KINDS, Finding

log = logging.getLogger(__name__)

TELEGRAM_URL = "https://api.telegram.org"
TELEGRAM_CHARS_MAX = 4000  # 4096 are allowed in a message (Bot API, sendMessage)
LINES_MAX = 20  # of one message; the rest is counted in its last line
QUEUE_MAX = 100
SEND_TIMEOUT_S = 10.0
SEND_TRIES = 5

Key = tuple[str, str]  # kind and process


class Notice(msgspec.Struct, frozen=True):
    """What is told at once: alerts that began, that still last, and that are over."""

    began: Sequence[Finding]
    lasting: Sequence[Finding]
    over: Sequence[Finding]

    @property
    def text(self) -> str:
        """For people: the worst first."""
        lines = [f"{KINDS[f.kind].state.upper()} {f} ({KINDS[f.kind].advice})" for f in self.began]
        lines += [f"still {KINDS[f.kind].state} {f}" for f in self.lasting]
        lines += [f"recovered {f.process}: {KINDS[f.kind].meaning}" for f in self.over]
        if len(lines) > LINES_MAX:
            lines[LINES_MAX:] = [f"... and {len(lines) - LINES_MAX} more"]
        return "\n".join(["mdcollector", *lines])


class _Alert:
    __slots__ = ("finding", "gone_at", "since", "told_at")

    def __init__(self, finding: Finding, since: float) -> None:
        self.finding, self.since = finding, since
        self.told_at: float | None = None
        self.gone_at: float | None = None


class Alerts:
    """The memory of what was found and told. All times in seconds of one clock.

    A finding becomes an alert when it has lasted as long as its kind says. All that becomes due within `group_s` is one
    notice. The same alert is not told again within `cooldown_s`, whether it lasts or comes back; while it lasts it is
    then told once more. It is over when it was not found for `group_s`.
    """

    def __init__(self, group_s: float = 10.0, cooldown_s: float = 3600.0) -> None:
        self._group_s, self._cooldown_s = group_s, cooldown_s
        self._alerts: dict[Key, _Alert] = {}
        self._quiet_until: dict[Key, float] = {}
        self._due_since: float | None = None

    @property
    def firing(self) -> list[Finding]:
        """What was told and is not over."""
        return [alert.finding for alert in self._alerts.values() if alert.told_at is not None]

    def update(self, findings: Iterable[Finding], now: float) -> Notice | None:
        """Take what is found now; a notice when something is to be told."""
        found = {(finding.kind, finding.process): finding for finding in findings}
        for key, finding in found.items():
            alert = self._alerts.setdefault(key, _Alert(finding, now))
            alert.finding, alert.gone_at = finding, None
        for key, alert in list(self._alerts.items()):
            if key not in found:
                alert.gone_at = now if alert.gone_at is None else alert.gone_at
                if alert.told_at is None:
                    del self._alerts[key]
        began = [a for key, a in self._alerts.items() if a.told_at is None and self._is_due(key, a, now)]
        lasting = [
            a for a in self._alerts.values()
            if a.told_at is not None and a.gone_at is None and now - a.told_at >= self._cooldown_s
        ]  # fmt: skip
        over = [a for a in self._alerts.values() if a.gone_at is not None and now - a.gone_at >= self._group_s]
        if not (began or lasting or over):
            self._due_since = None
            return None
        self._due_since = now if self._due_since is None else self._due_since
        if now - self._due_since < self._group_s:
            return None
        self._due_since = None
        for alert in (*began, *lasting):
            alert.told_at = now
        for alert in over:
            key = alert.finding.kind, alert.finding.process
            self._quiet_until[key] = (alert.told_at or now) + self._cooldown_s
            del self._alerts[key]
        self._quiet_until = {key: until for key, until in self._quiet_until.items() if until > now}
        return Notice(*([a.finding for a in alerts] for alerts in (began, lasting, over)))

    def _is_due(self, key: Key, alert: _Alert, now: float) -> bool:
        return now - alert.since >= KINDS[key[0]].for_s and self._quiet_until.get(key, now) <= now


class Messenger:
    """Carries notices to the log, a webhook and a Telegram chat; never in the way of the one who has something to tell."""

    def __init__(
        self,
        *,
        webhook_url: str = "",
        telegram_chat: str = "",
        telegram_token: str = "",
        telegram_url: str = TELEGRAM_URL,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._targets: list[tuple[str, str, Any]] = []
        if webhook_url:
            self._targets.append(("webhook", webhook_url, _webhook_body))
        if telegram_chat and telegram_token:
            url = f"{telegram_url.rstrip('/')}/bot{telegram_token}/sendMessage"
            self._targets.append(("telegram", url, lambda notice: _telegram_body(telegram_chat, notice)))
        self._waiting: asyncio.Queue[tuple[str, str, bytes]] = asyncio.Queue(QUEUE_MAX)

    def tell(self, notice: Notice) -> None:
        """Log it and queue it for the others; what does not fit into the queue is counted."""
        for line in notice.text.splitlines()[1:]:
            log.warning("%s", line)
        for name, url, body in self._targets:
            try:
                self._waiting.put_nowait((name, url, body(notice)))
            except asyncio.QueueFull:
                self.counters[f"{name}_dropped"] += 1

    async def run(self) -> None:
        """Deliver, for ever."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SEND_TIMEOUT_S)) as session:
            while True:
                name, url, body = await self._waiting.get()
                try:
                    await self._send(session, url, body)
                    self.counters[f"{name}_sent"] += 1
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.counters[f"{name}_failed"] += 1
                    # The text of the error may hold the URL, and the URL of a bot holds its token.
                    log.error("%s: a notice was not delivered: %s", name, type(error).__name__)

    @staticmethod
    @tenacity.retry(
        retry=tenacity.retry_if_exception_type((aiohttp.ClientError, TimeoutError)),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        stop=tenacity.stop_after_attempt(SEND_TRIES),
        reraise=True,
    )
    async def _send(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            response.raise_for_status()


def _webhook_body(notice: Notice) -> bytes:
    parts = {"began": notice.began, "lasting": notice.lasting, "over": notice.over}
    alerts = {name: [{**msgspec.to_builtins(f), "state": f.state} for f in found] for name, found in parts.items()}
    return msgspec.json.encode({"text": notice.text, **alerts})


def _telegram_body(chat: str, notice: Notice) -> bytes:
    return msgspec.json.encode({"chat_id": chat, "text": notice.text[:TELEGRAM_CHARS_MAX]})
