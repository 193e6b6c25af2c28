"""The list of instruments while a connector runs: read now and then, page by page, and followed.

Used by `connector.py`. What is newly listed and meant by the configuration is subscribed by the connection that has room
for it (`assignment.py`), or counted where none has; what trades no more is left. A list is used only when all of its pages
are there: half a list would close what stands in the other half.
"""

import time
from collections.abc import Callable
from functools import partial

from mdcollector.assignment import Assignment
from mdcollector.emit import Emit
from mdcollector.errors import ConfigError, StorageError
from mdcollector.exchanges import PAGES_MAX, REASON_CHARS_MAX, Fetch, InstrumentInfo, Selection, Venue

ROUND_MOST_S = 600.0  # a list that is not complete by then is begun anew
NOTE, NO_ROOM = "list of instruments", "new instruments"


class Followed:
    """What the list is followed for: `selection` says what is meant, and `assignment` which connection takes it.

    `number` is that of this connection.
    """

    def __init__(self, selection: Selection, assignment: Assignment, number: int) -> None:
        self.selection, self.assignment, self.number = selection, assignment, number


class Listing:
    """Wants the list of instruments every `every_s` seconds (0 = never), and follows it with the venue's streams."""

    def __init__(self, venue: Venue, every_s: float, followed: Followed, connected: Callable[[], bool]) -> None:
        self._venue, self._every_s, self._followed, self._connected = venue, every_s, followed, connected
        self._emit: Emit = venue.emit
        self._due = self._begun = time.monotonic() if every_s else float("inf")
        self._round = 0
        self._listed: dict[str, InstrumentInfo] = {}
        self._open: set[str] = set()  # pages that did not come yet
        self._pages = 0  # asked for in this round
        self._mine = {stream.ticker for stream in venue.streams}  # also what trades no more: it may come back
        self._no_room: set[str] = set()

    def tick(self) -> None:
        """Begin a list when one is due and none is under way."""
        now = time.monotonic()
        if now < self._due or (self._open and now - self._begun < ROUND_MOST_S):
            return
        self._due, self._begun = now + self._every_s, now
        self._round += 1
        self._listed, self._pages = {}, 0
        self._open.clear()
        for path in self._venue.instruments_paths():
            self._want(self._round, path)

    def _want(self, number: int, path: str) -> None:
        self._open.add(path)
        self._pages += 1
        self._venue.wants.append(
            Fetch(
                f"instruments {number} {path}",
                path,
                self._venue.LIMITS.instruments_weight,
                answer=partial(self._take, number, path),
                failed=partial(self._failed, number, path),
            )
        )

    def _take(self, number: int, path: str, body: bytes) -> None:
        listed, behind = self._venue.take_instruments(path, body), self._venue.pages_behind(path, body)
        if number != self._round:
            return
        self._listed |= {info.ticker: info for info in listed}
        if self._pages + len(behind) > PAGES_MAX:
            self._give_up(f"{path}: more than {PAGES_MAX} pages")
            return
        self._open.discard(path)
        for page in behind:
            self._want(number, page)
        if not self._open:
            self._follow(self._listed)

    def _failed(self, number: int, path: str, status: int, body: bytes) -> None:
        if number == self._round:
            self._give_up(f"{path}: HTTP {status} {body[:REASON_CHARS_MAX].decode(errors='replace')}")

    def _give_up(self, why: str) -> None:
        self._round += 1  # answers that are still on their way belong to no list
        self._open.clear()
        self._emit.counters["instruments_refused"] += 1
        self._venue.notes[NOTE] = why

    def _follow(self, listed: dict[str, InstrumentInfo]) -> None:
        """All pages are there: leave what trades no more, take what is new."""
        if not listed:  # a venue under maintenance; all that is subscribed would be closed
            self._give_up("empty")
            return
        venue, followed = self._venue, self._followed
        venue.notes.pop(NOTE, None)
        subscribed = {stream.ticker for stream in venue.streams}
        gone = {t for t in subscribed if t not in listed or not listed[t].active}
        if gone:
            self._emit.counters["instruments_left"] += len(gone)
            venue.remove(gone, connected=self._connected())
        for ticker in self._mine - listed.keys():
            self._emit.instrument_gone(ticker)
        meant = followed.selection.chosen(listed.values())
        mine = [stream.ticker for stream in venue.streams]
        try:
            carried, homeless = followed.assignment.follow(followed.number, venue.path, meant, dict.fromkeys(mine))
        except (ConfigError, StorageError, OSError) as error:  # what is subscribed goes on
            self._give_up(str(error))
            return
        here = carried[followed.number]
        new = set(here.tickers) & set(meant) - set(mine) if here.path == venue.path else set[str]()
        no_room = {ticker for ticker in sorted(new) if not self._take_up(listed[ticker])}
        if count := len(homeless) + len(no_room - self._no_room):
            self._emit.counters["listing_no_room"] += count
        self._no_room = no_room
        venue.notes.pop(NO_ROOM, None)
        if no_room:
            names = ", ".join(sorted(no_room))[:REASON_CHARS_MAX]
            venue.notes[NO_ROOM] = (
                f"{names}: no room here, as they were planned with another configuration; restart all"
            )

    def _take_up(self, info: InstrumentInfo) -> bool:
        """Whether there is room for it: a sibling that runs with another configuration may have thought so."""
        venue = self._venue
        streams = self._followed.assignment.streams_of(info.ticker, venue.path)
        if not venue.fits(venue.streams, streams):
            return False
        self._mine.add(info.ticker)
        self._emit.counters["instruments_taken"] += 1
        venue.add(streams, connected=self._connected())
        venue.tell(info)
        return True
