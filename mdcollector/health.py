"""Health: what is not well in a fleet, judged from what its processes say of themselves. One set of rules for everybody.

`supervisor.status` gathers the numbers; `judge` turns them into findings. `mdcollector status` prints them, the monitor
answers `/health` with them and sends alerts about them, and the Prometheus alert rules are made of the same kinds.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from mdcollector.config import connector_of
from mdcollector.errors import EXIT_CONFIG
from mdcollector.stats import clock_text

OK, DEGRADED, DOWN = "ok", "degraded", "down"  # of a process or a fleet; each is worse than the one before
PAGE_STALE_S = 5.0  # a process publishes its page some times a second; one that is silent for so long is dead or hangs
ACKNOWLEDGED_WITHIN_S = 15.0  # else a stream is shown
HOLES_MANY = 50  # holes between two looks, of books or of all else: more than single lost messages
_TOLD_BEFORE = ("_repaired", "_continued")  # ends of counters of rows that say more of a hole that is counted already
LIMITED = (
    "rate_limited",
    "http_rate_limited",
    "venue_rate_limited",
)  # counters of being told to wait: 429, 418 and such
DISK_FREE_LEAST = 0.05  # share of the disk below which writers will soon stop
CLOCK_OFFSET_MOST_S = 0.5
NAMES_SHOWN_MAX = 20
TABLE_USED_MOST = 0.9  # of a ring's table of instruments: options that expired stay in it


class Kind(msgspec.Struct, frozen=True):
    """One kind of finding: what it means for a process, how long it may last before somebody is told, what to do."""

    state: str
    for_s: float
    meaning: str
    advice: str


KINDS: dict[str, Kind] = {
    "dead": Kind(DOWN, 0, "the process is dead or hangs", "look at its log; it is restarted by its supervisor"),
    "gave_up": Kind(DOWN, 0, "the process cannot run as it is configured", "run mdcollector check; its log says what is wrong"),
    "disconnected": Kind(DOWN, 30, "the connector is not connected", "look at last_error; check the network and the venue's status page"),
    "banned": Kind(DEGRADED, 0, "the venue told this address to wait", "find what else asks the venue from this address"),
    "stale": Kind(DEGRADED, 60, "no row came for long on an open connection", "compare with the venue's web page; the connector reconnects by itself"),
    "book_invalid": Kind(DEGRADED, 30, "books are not proven", "wait for the resync; look at fetches waiting and the venue's weight"),
    "stream_refused": Kind(DEGRADED, 0, "the venue refused a subscription", "the instrument may be delisted, or the key lacks a right"),
    "stream_unanswered": Kind(DEGRADED, 0, "a subscription got no answer", "it is asked for again by itself; look at the venue's status page"),
    "stream_silent": Kind(DEGRADED, 0, "an acknowledged stream does not deliver", "it is subscribed anew by itself; if it lasts, the venue changed"),
    "holes": Kind(DEGRADED, 0, "many holes in trades and other streams", "look at the network and at CPU use; the table gaps has each of them"),
    "resync_storm": Kind(DEGRADED, 0, "books break again and again", "look at the network and at CPU use: each costs a snapshot, and the venue's weight is limited"),
    "no_connection": Kind(DEGRADED, 60, "a new listing has no connection: none has room for it", "mdcollector up and run open a further one, or say why not; with systemd units run mdcollector units again, systemctl daemon-reload, and start the new connector unit"),
    "left_behind": Kind(DEGRADED, 0, "a connection is written nowhere, though its siblings are", "the connector has grown: name the new process in the writer's connectors, or as a leg of an arbiter, and start them again"),
    "leg_dead": Kind(DEGRADED, 30, "an arbiter has lost a leg", "start the leg again: until then nothing fills holes of the other one"),
    "writer_behind": Kind(DEGRADED, 0, "a writer is behind by more than half a ring", "look at disk and CPU: when the ring is full rows are lost"),
    "rows_lost": Kind(DEGRADED, 0, "rows were overwritten before a writer read them", "make the ring larger or give the writer a core of its own"),
    "writer_error": Kind(DEGRADED, 0, "a writer cannot write", "look at the disk: rows wait in the ring for as long as it has room"),
    "file_refused": Kind(DEGRADED, 0, "a ring or stored file is unusable", "look at the file: it is damaged, foreign or of another version"),
    "restarted": Kind(DEGRADED, 0, "a process ended and was started again", "look at its log; what it had published is not lost"),
    "reconnected": Kind(DEGRADED, 0, "a connection was lost and made again", "what was missed is in the table gaps; often: look at the network"),
    "disk_low": Kind(DEGRADED, 0, "a disk is nearly full", "free space; writers back off and rows stay in the rings meanwhile"),
    "table_full": Kind(DEGRADED, 0, "a ring's table of instruments is nearly full", "stop what fills the ring, let the writers drain it, move its directory away and start again: a full table takes no new instrument"),
    "clock_offset": Kind(DEGRADED, 60, "the clock of this machine and the venue's differ", "start chrony or ntpd"),
    "clock_stepped": Kind(DEGRADED, 0, "the clock of this machine was set", "let chrony slew it; receive times before and after do not compare, the table clocks says by how much"),
}  # fmt: skip


class Finding(msgspec.Struct, frozen=True):
    """Something that is not well: `kind` of KINDS, `process` that has it, words for people, and whose rows it concerns."""

    kind: str
    process: str
    text: str
    about: str = ""  # the process that fills the ring, where `process` drains it

    @property
    def state(self) -> str:
        return KINDS[self.kind].state

    def __str__(self) -> str:
        return f"{self.process}: {self.text}"


def counts_holes(counter: str) -> bool:
    """Whether a counter of a connector counts holes, each once: also those that were repaired later."""
    return counter.startswith("gap_") and not counter.endswith(_TOLD_BEFORE)


def judge(found: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings in what `supervisor.status` found.

    What is counted (lost rows, errors, restarts, holes) is found when it grew since `before`, an earlier answer of
    `supervisor.status`; without one, when it ever happened in the life of the process.
    """
    now_ns = time.time_ns()
    findings = [Finding("file_refused", "rings", problem) for problem in found["problems"]]
    for name, page in found["connectors"].items():
        if page["state"] != "stopped":
            findings += _connector(name, page, _earlier(before, "connectors", name), now_ns)
    for name, page in found["arbiters"].items():
        if page["state"] != "stopped":
            findings += _arbiter(name, page)
    for name, page in found["writers"].items():
        if page.get("state") != "stopped":
            findings += _silent(name, page)
        findings += _writer(name, page, _earlier(before, "writers", name))
    findings += _homeless(found)
    findings += _supervised(found["supervisor"] or {}, (before["supervisor"] or {}) if before is not None else None)
    return findings


def concerning(findings: list[Finding], name: str) -> list[Finding]:
    """What is not well with a process, with who drains its rings, and with the disks that all need."""
    return [f for f in findings if name in (f.process, f.about) or f.kind == "disk_low"]


def state_of(findings: list[Finding]) -> str:
    """The worst of some findings."""
    states = {finding.state for finding in findings}
    return DOWN if DOWN in states else DEGRADED if DEGRADED in states else OK


def _silent(name: str, page: "Page") -> Iterator[Finding]:
    if page["age_s"] > PAGE_STALE_S:
        yield Finding("dead", name, f"silent for {page['age_s']:.0f} s: dead or hanging")


Page = Mapping[str, Any]


def _earlier(before: Page | None, role: str, name: str) -> Page | None:
    """The earlier page of a process; an empty one when it was not there yet, None when nobody looked."""
    return None if before is None else before[role].get(name, {})


def _same_life(page: Page, before: Page | None) -> Page:
    """The earlier page if the same process wrote it: the counters of another one began at zero."""
    return before if before is not None and before.get("pid") == page["pid"] else {}


def _connector(name: str, page: Page, before: Page | None, now_ns: int) -> Iterator[Finding]:
    if page["age_s"] > PAGE_STALE_S:
        yield from _silent(name, page)
        return
    if page["state"] not in ("connected", "polling") and not page["state"].startswith("replacing"):
        yield Finding("disconnected", name, f"{page['state']}; {page['last_error'] or 'no error yet'}")
    if page["fetch_blocked_until_ns"] > now_ns:
        wait_s = (page["fetch_blocked_until_ns"] - now_ns) / 1e9
        yield Finding("banned", name, f"the venue answers no request for another {wait_s:.0f} s")
    if (off_s := _clock_off_s(page.get("clock", {}))) > CLOCK_OFFSET_MOST_S:
        yield Finding(
            "clock_offset", name, f"the venue's clock is {clock_text(page['clock'])} off, {off_s:.1f} s for sure"
        )
    if page["data_ns"] and now_ns - page["data_ns"] > KINDS["stale"].for_s * 1e9:
        yield Finding("stale", name, f"no row for {(now_ns - page['data_ns']) / 1e9:.0f} s")
    if page["books_invalid_count"]:
        yield Finding("book_invalid", name, f"{page['books_invalid_count']} books are not proven at the moment")
    for stream, (kind, text) in streams_unwell(page).items():
        yield Finding(kind, name, f"{stream}: {text}")
    yield from _tables(name, page)
    if before is not None:
        blocked = page["fetch_blocked_until_ns"] > now_ns
        if not blocked and (limited := _grown(page, before, *LIMITED)):  # a wait may be over before anybody looks
            yield Finding("banned", name, f"the venue told it to wait {limited} times lately; {page['last_error']}")
        if steps := _grown(page, before, "clock_steps"):
            by_s = page["clock"]["last_step_us"] / 1e6
            yield Finding(
                "clock_stepped", name, f"the clock of this machine was set {steps} times, last by {by_s:+.3f} s"
            )
        if lost := _grown(page, before, "disconnected", "stale"):
            yield Finding("reconnected", name, f"lost its connection {lost} times lately; {page['last_error']}")
        holes = [key for key in page["counters"] if counts_holes(key)]
        books = [key for key in holes if key.startswith("gap_orderbook_l2_")]
        if (resyncs := _grown(page, before, *books)) > HOLES_MANY:
            yield Finding("resync_storm", name, f"{resyncs} holes in the sequence of books")
        if (count := _grown(page, before, *(key for key in holes if key not in books))) > HOLES_MANY:
            yield Finding("holes", name, f"{count} holes in trades and other streams")


def _homeless(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Instruments that no connection of a connector carries, while it runs: of one that rests it is not known."""
    running = {connector_of(name) for name, page in found["connectors"].items() if page["state"] != "stopped"}
    supervisor = found["supervisor"]
    for name, tickers in found["homeless"].items():
        if tickers and name in running:
            shown = ", ".join(tickers[:NAMES_SHOWN_MAX]) + (", ..." if len(tickers) > NAMES_SHOWN_MAX else "")
            text = f"{shown}: no connection has room"
            if supervisor is None or supervisor["age_s"] > PAGE_STALE_S:
                text += "; run mdcollector units again and start the new unit"
            elif why := supervisor.get("unopened", {}).get(name):
                text += f", and no further one is opened: {why}"
            else:
                text += "; a further one is opened"
            yield Finding("no_connection", name, text)


def _tables(name: str, page: Page) -> Iterator[Finding]:
    """The fullest table of instruments of the rings that this process fills."""
    tables = {feed: ring["instruments"] for feed, ring in page.get("rings", {}).items() if "instruments" in ring}
    feed, (used, most) = max(tables.items(), key=lambda table: table[1], default=("", (0, 1)))
    if used > TABLE_USED_MOST * most:
        yield Finding("table_full", name, f"{feed}: the ring's table holds {used:,} of {most:,} instruments")


def _clock_off_s(clock: Page) -> float:
    """By how much the clocks differ at least."""
    offset_us, unsure_us = clock.get("offset_us"), clock.get("uncertainty_us")
    if offset_us is None:
        return 0.0
    if unsure_us is None:  # the venue is ahead by at least so much; nothing says that it is behind
        return float(max(0.0, offset_us)) / 1e6
    return float(max(0.0, abs(offset_us) - unsure_us)) / 1e6


def streams_unwell(page: Page) -> dict[str, tuple[str, str]]:
    """Streams of a connector's page that were refused, are silent, or were not acknowledged for long: kind and words."""
    found = {}
    for name, stream in page["streams"].items():
        if stream["refused"]:
            found[name] = "stream_refused", f"refused: {stream['refused']}"
        elif stream["silent_ns"]:
            silent_s = (page["time_ns"] - stream["silent_ns"]) / 1e9
            found[name] = "stream_silent", f"silent for {silent_s:.0f} s, though REST shows something new"
        elif stream["acknowledged_ns"] <= stream["requested_ns"]:
            waiting_s = (page["time_ns"] - stream["requested_ns"]) / 1e9
            if stream["requested_ns"] and waiting_s > ACKNOWLEDGED_WITHIN_S:
                found[name] = "stream_unanswered", f"not acknowledged for {waiting_s:.0f} s"
    return found


def _grown(page: Page, before: Page | None, *names: str) -> int:
    """By how much counters grew since `before`."""
    earlier = _same_life(page, before).get("counters", {})
    return sum(page["counters"].get(name, 0) - earlier.get(name, 0) for name in names)


def _arbiter(name: str, page: Page) -> Iterator[Finding]:
    yield from _silent(name, page)
    for leg, numbers in page["legs"].items():
        if not numbers["alive"]:
            yield Finding("leg_dead", name, f"leg {leg} is dead")
    yield from _tables(name, page)
    if page["books_unproven"]:
        yield Finding("book_invalid", name, f"{page['books_unproven']} books are not proven at the moment")


def _writer(name: str, page: Page, before: Page | None) -> Iterator[Finding]:
    earlier = _same_life(page, before)
    for stream, numbers in page["streams"].items():
        then, filler = earlier.get("streams", {}).get(stream, {}), stream.rpartition("/")[0]
        if numbers["behind"]:
            yield Finding("writer_behind", name, f"{stream} is behind by more than half of its ring", filler)
        if lost := numbers["lapped"] - then.get("lapped", 0):
            yield Finding("rows_lost", name, f"{stream}: {lost:,} rows were overwritten before they were read", filler)
        if damaged := numbers["damaged"] - then.get("damaged", 0):
            yield Finding("rows_lost", name, f"{stream}: {damaged:,} rows were damaged in the ring", filler)
    for kind, count in page["errors"].items():
        if more := count - earlier.get("errors", {}).get(kind, 0):
            yield Finding("writer_error", name, f"{more} errors {kind}")
    for path, why in page["refused"].items():
        yield Finding("file_refused", name, f"{path}: {why}")


def _supervised(page: Page, before: Page | None) -> Iterator[Finding]:
    earlier = (before or {}).get("processes") or {}
    for name, why in (page.get("waiting") or {}).items():
        yield Finding("disconnected", name, f"not begun yet, {why or 'its list of instruments is asked for'}")
    for name, streams in page.get("left_behind", {}).items():
        if streams:
            yield Finding(
                "left_behind", name, f"no writer takes {', '.join(streams)}: they stay in the rings for a while"
            )
    for name, process in (page.get("processes") or {}).items():
        if process["gave_up"] and process["last_exit"] == EXIT_CONFIG:
            yield Finding("gave_up", name, "not running, it cannot run as it is configured (see its log)")
        # One that was not there yet has been started once since; it may have died a moment later.
        began = earlier[name]["starts"] if name in earlier else 1 if before is not None else process["starts"]
        starts = process["starts"] - began
        if starts > 0:
            text = f"started again {starts} times lately, last after exit {process['last_exit']}"
            yield Finding("restarted", name, text)
