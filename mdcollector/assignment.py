"""Which connection of a connector carries which instrument: remembered below the rings, so that nobody moves.

One file for each connector, `<rings>/_plans/NAME.json`, the only truth for all who ask: `up` and `run`, each `connect`, and
the running connections themselves, when something is newly listed. It is replaced as a whole, under a lock. Were the
list cut anew at every start, one new name would shift the instruments at all the cuts.
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


class _File(msgspec.Struct):
    exchange: str
    connections: list[Carried]


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
        return [s for s in self._kind.streams_of(ticker, self._feeds, self._options) if s.path == path]

    def carried(self) -> list[Carried]:
        """What each connection carries, by the file; none where there is no file, or one that makes no sense."""
        try:
            file = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return []
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.error("%s: damaged, so instruments may move to other connections: %s", self.path, error)
            return []
        return file.connections if file.exchange == self._kind.NAME else []

    def preview(self, tickers: Sequence[str]) -> list[list[Stream]]:
        """As `plan`, and nothing is remembered."""
        return self._kind.plan(tickers, self._feeds, self._options, self.carried())

    def plan(self, tickers: Sequence[str], alone: int | None = None) -> list[list[Stream]]:
        """Streams of each connection, for a start; some may have none.

        `alone`: only this connection begins. It opens none but itself, for nobody might run the others; what then has
        no place is told by the running connections.
        """
        with self._locked():
            before = self.carried()
            if alone is None or not before:
                return self._place(tickers, before)
            return self._place(tickers, before, lambda number, _: number == alone)

    def follow(self, number: int, path: str, listed: Sequence[str], mine: Collection[str]) -> list[Carried]:
        """What each connection carries now that `listed` are meant: what is new gets a place, where there is one.

        Asked by connection `number`, which subscribes to `mine`; that stays its own, whatever became of the file.
        """
        known = self.carried()
        if number < len(known) and {*listed, *mine} <= {t for carried in known for t in carried.tickers}:
            return known
        with self._locked():
            before = self.carried()
            before += [Carried() for _ in range(number + 1 - len(before))]
            housed = {ticker for carried in before if carried.path == path for ticker in carried.tickers}
            if not before[number].tickers:
                before[number].path = path
            if before[number].path == path:
                before[number].tickers += [ticker for ticker in mine if ticker not in housed]
            tickers = list(dict.fromkeys([*listed, *mine]))
            self._place(tickers, before, lambda n, of_path: n == number and of_path == path)
            return self.carried()

    def _place(
        self,
        tickers: Sequence[str],
        before: Sequence[Carried],
        opens: Callable[[int, str], bool] = lambda _number, _path: True,
    ) -> list[list[Stream]]:
        connections = self._kind.plan(tickers, self._feeds, self._options, before, opens)
        after = [self._remember(n, streams, before, tickers) for n, streams in enumerate(connections)]
        if after != list(before) or not self.path.exists():
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

    def _store(self, connections: list[Carried]) -> None:
        """By a rename, so that who reads it without the lock has the old one or the new one."""
        new = self.path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(_File(self._kind.NAME, connections)))
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
