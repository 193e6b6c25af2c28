"""Which connection of a connector carries which instrument: remembered below the rings, so that nobody moves.

One file for each connector, `<rings>/_plans/NAME.json`, the only truth for all who ask: `up` and `run`, each `connect`, and
the running connections themselves, when something is newly listed. It is replaced as a whole, under a lock. Were the
list cut anew at every start, one new name would shift the instruments at all the cuts.

What is newly listed and has no place on any connection is noted there as `homeless`, by the connections, which open
none; a supervisor sees it and opens a further one (`house`), health tells it where there is no supervisor.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mdcollector.errors import StorageError
from mdcollector.exchanges import Carried, Options, Stream, Venue

log = logging.getLogger(__name__)

PLANS = "_plans"  # below the rings
LOCK_WAIT_S = 2.0  # whoever has the lock reads and writes a small file


class Plan(msgspec.Struct):
    """The file."""

    exchange: str
    connections: list[Carried]
    numbered: bool | None = None  # the first process is NAME.1, not NAME; None = not said
    homeless: list[str] = msgspec.field(default_factory=list)  # instruments that no connection has room for


def read_plan(path: Path) -> Plan:
    """Raises OSError or ValueError (a damaged file)."""
    return msgspec.json.decode(path.read_bytes(), type=Plan)


class Assignment:
    """The instruments of one connector, by connection; connections count from 0 here."""

    def __init__(self, rings: Path, connector: str, kind: type[Venue], feeds: Sequence[str], options: Options) -> None:
        self.path = rings / PLANS / f"{connector}.json"
        self._rings, self._connector = rings, connector
        self._kind, self._feeds, self._options = kind, feeds, options

    def siblings(self, name: str) -> list[Path]:
        """Rings of all processes but `name` that this connector ever had: from them instruments may have moved."""
        directories = self._rings.glob(f"{self._connector}*")
        numbers = ((d, d.name.removeprefix(self._connector)) for d in directories if d.is_dir() and d.name != name)
        return sorted(d for d, number in numbers if not number or (number[0] == "." and number[1:].isdecimal()))

    def streams_of(self, ticker: str, path: str) -> list[Stream]:
        """Subscriptions of one instrument on a connection of this path."""
        return [stream for stream in self._streams_of(ticker) if stream.path == path]

    def _streams_of(self, ticker: str) -> list[Stream]:
        return self._kind.streams_of(ticker, self._feeds, self._options)

    def remembered(self) -> Plan:
        """What the file says; an empty plan where there is none, or one that makes no sense."""
        try:
            plan = read_plan(self.path)
        except FileNotFoundError:
            return self._forgotten()
        except ValueError as error:
            log.error("%s: damaged, so instruments may move to other connections: %s", self.path, error)
            return self._forgotten()
        if plan.exchange != self._kind.NAME:
            return self._forgotten()
        if plan.numbered is None:
            plan.numbered = len(plan.connections) > 1
        return plan

    def _forgotten(self) -> Plan:
        """Only the rings tell what the first process was called; none, and it is called as its siblings demand."""
        names = (f"{self._connector}.1", True), (self._connector, False)
        known = (numbered for name, numbered in names if (self._rings / name).is_dir())
        return Plan(self._kind.NAME, [], next(known, None))

    def names(self, count: int) -> list[str]:
        """Processes of so many connections: NAME, or NAME.1, NAME.2, ...; who began alone stays NAME beside others."""
        numbered = self.remembered().numbered
        names = [f"{self._connector}.{n + 1}" for n in range(count)]
        if count and not (count > 1 if numbered is None else numbered):
            names[0] = self._connector
        return names

    def preview(self, tickers: Sequence[str]) -> list[list[Stream]]:
        """As `plan`, and nothing is remembered."""
        return self._kind.plan(tickers, self._feeds, self._options, self.remembered().connections)

    def plan(self, tickers: Sequence[str], alone: int | None = None) -> list[list[Stream]]:
        """Streams of each connection, for a start; some may have none.

        `alone`: only this connection begins. It opens none but itself, for nobody might run the others; what then has
        no place is told by the running connections.
        """
        with self._locked():
            before, wanted = self.remembered(), set(tickers)
            for number, carried in enumerate(before.connections):
                if alone in (None, number) and not wanted.intersection(carried.tickers):
                    carried.tickers.clear()  # nobody runs it, so nobody there would see that they trade again
            if alone is None or not before.connections:
                return self._place(tickers, before)
            return self._place(tickers, before, lambda number, _: number == alone)

    def house(self, check: Callable[[list[list[Stream]]], object]) -> list[list[Stream]]:
        """As `plan`, for what is carried now and for who is homeless, with further connections; [] if nobody is.

        `check` is asked before; what it raises leaves all as it was. No place is taken from what is halted, and a
        connection keeps its path: who runs knows nothing of this yet.
        """
        with self._locked():
            before = self.remembered()
            if not before.homeless:
                return []
            carried = before.connections
            tickers = list(dict.fromkeys([*(t for c in carried for t in c.tickers), *before.homeless]))
            return self._place(tickers, before, lambda n, path: n >= len(carried) or carried[n].path == path, check)

    def follow(
        self, number: int, path: str, listed: Sequence[str], mine: Collection[str]
    ) -> tuple[list[Carried], list[str]]:
        """What each connection carries now that `listed` are meant: what is new gets a place, where there is one; and
        who is homeless, and was not before.

        Asked by connection `number`, which subscribes to `mine`; that stays its own, whatever became of the file.
        """
        known = self.remembered()
        carried = known.connections
        everybody = {*listed, *mine}
        if number < len(carried) and not known.homeless and everybody <= {t for c in carried for t in c.tickers}:
            return carried, []
        with self._locked():
            before = self.remembered()
            carried = before.connections
            carried += [Carried() for _ in range(number + 1 - len(carried))]
            housed = {ticker for c in carried if c.path == path for ticker in c.tickers}
            if not carried[number].tickers:
                carried[number].path = path
            if carried[number].path == path:
                carried[number].tickers += [ticker for ticker in mine if ticker not in housed]
            tickers = list(dict.fromkeys([*listed, *mine]))
            noted, before.homeless = before.homeless, tickers
            self._place(tickers, before, lambda n, of_path: n == number and of_path == path)
            after = self.remembered()
            return after.connections, [ticker for ticker in after.homeless if ticker not in noted]

    def _place(
        self,
        tickers: Sequence[str],
        before: Plan,
        opens: Callable[[int, str], bool] = lambda _number, _path: True,
        check: Callable[[list[list[Stream]]], object] = lambda _connections: None,
    ) -> list[list[Stream]]:
        """Of those that `before` calls homeless the ones that find no place now either stay so."""
        carried = before.connections
        connections = self._kind.plan(tickers, self._feeds, self._options, carried, opens)
        check(connections)
        placed = {(stream.path, stream.ticker) for streams in connections for stream in streams}
        after = Plan(
            self._kind.NAME,
            [self._remember(n, streams, carried, tickers) for n, streams in enumerate(connections)],
            len(connections) > 1 if before.numbered is None else before.numbered,
            [t for t in before.homeless if any((s.path, t) not in placed for s in self._streams_of(t))],
        )
        self._store(after)
        return connections

    def _remember(
        self, number: int, streams: Sequence[Stream], before: Sequence[Carried], tickers: Collection[str]
    ) -> Carried:
        """What this connection carries, and behind it what it did until it was halted: its place is kept while nobody
        needs it, so that it comes back to where its counters stand.
        """
        was = before[number] if number < len(before) else Carried()
        carried = Carried(streams[0].path if streams else was.path, list(dict.fromkeys(s.ticker for s in streams)))
        if carried.path == was.path:
            taken, wanted = list(streams), set(tickers)
            for ticker in was.tickers:
                more = self.streams_of(ticker, was.path)
                if ticker not in wanted and more and self._kind.fits(taken, more):
                    taken += more
                    carried.tickers.append(ticker)
        return carried

    def _store(self, plan: Plan) -> None:
        """By a rename, so that who reads it without the lock has the old one or the new one."""
        new = self.path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(plan))
        new.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            self._take_lock(fd)
            yield
        finally:
            os.close(fd)

    def _take_lock(self, fd: int) -> None:
        """StorageError when somebody who was stopped has it: a start is tried again, a running connection asks later."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    text = f"{self.path}: held by another process for more than {LOCK_WAIT_S:g} s"
                    raise StorageError(text) from None
                time.sleep(0.01)
            else:
                return
