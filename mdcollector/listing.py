"""The list of instruments while a connector runs: read now and then, page by page, and what follows from it.

Used by `connector.py`. A list is used only when all of its pages are there: half a list would close what stands in the
other half.
"""

import time
from functools import partial

from mdcollector.exchanges import PAGES_MAX, REASON_CHARS_MAX, Fetch, InstrumentInfo, Venue

ROUND_MOST_S = 600.0  # a list that is not complete by then is begun anew
NOTE = "list of instruments"


class Listing:
    """Wants the list of instruments every `every_s` seconds (0 = never) and hands its pages to the venue."""

    def __init__(self, venue: Venue, every_s: float) -> None:
        self._venue, self._every_s = venue, every_s
        self._due = self._begun = time.monotonic() if every_s else float("inf")
        self._round = 0
        self._listed: dict[str, InstrumentInfo] = {}
        self._open: set[str] = set()  # first pages whose last page did not come yet

    def tick(self) -> None:
        """Begin a list when one is due and none is under way."""
        now = time.monotonic()
        if now < self._due or (self._open and now - self._begun < ROUND_MOST_S):
            return
        self._due, self._begun = now + self._every_s, now
        self._round += 1
        paths = self._venue.instruments_paths()
        self._listed, self._open = {}, set(paths)
        for path in paths:
            self._want(self._round, path, path, 1)

    def _want(self, number: int, first: str, path: str, page: int) -> None:
        self._venue.wants.append(
            Fetch(
                f"instruments {number} {path}",
                path,
                self._venue.LIMITS.instruments_weight,
                answer=partial(self._take, number, first, path, page),
                failed=partial(self._failed, number, path),
            )
        )

    def _take(self, number: int, first: str, path: str, page: int, body: bytes) -> None:
        venue = self._venue
        listed, behind = venue.take_instruments(path, body), venue.next_page(path, body)
        if number != self._round:
            return
        self._listed |= {info.ticker: info for info in listed}
        if behind is None:
            self._open.discard(first)
            venue.notes.pop(NOTE, None)
        elif page >= PAGES_MAX:
            self._give_up(f"{first}: more than {PAGES_MAX} pages")
        else:
            self._want(number, first, behind, page + 1)

    def _failed(self, number: int, path: str, status: int, body: bytes) -> None:
        if number == self._round:
            self._give_up(f"{path}: HTTP {status} {body[:REASON_CHARS_MAX].decode(errors='replace')}")

    def _give_up(self, why: str) -> None:
        self._round += 1  # answers that are still on their way belong to no list
        self._open.clear()
        self._venue.emit.counters["instruments_refused"] += 1
        self._venue.notes[NOTE] = why
