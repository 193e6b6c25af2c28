"""Logging: one line per event on stderr, as text for people or as JSON for machines. Set up once, by the commands.

Every line says which process of the fleet it is of, and which life (epoch) of it. An event that repeats itself is shown a
few times a minute; how often it was left out is said with the next one that is shown.
"""

import logging
import sys
import time
from datetime import UTC, datetime

import msgspec

REPEATS_SHOWN = 5  # of one event within REPEATS_WITHIN_S
REPEATS_WITHIN_S = 60.0
EVENTS_REMEMBERED = 1000


class _Identity(logging.Filter):
    """Puts process and epoch into every record."""

    process, epoch = "", 0

    def filter(self, record: logging.LogRecord) -> bool:
        record.fleet_process, record.epoch = self.process, self.epoch
        return True


class Repeats(logging.Filter):
    """Lets an event through a few times a minute. The same event is the same text before its values are filled in."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int, str], list[float]] = {}  # event -> end of its minute, shown, left out

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        if len(self._seen) > EVENTS_REMEMBERED:
            self._seen.clear()
        entry = self._seen.setdefault(key, [now + REPEATS_WITHIN_S, 0, 0])
        if now >= entry[0]:
            left_out, entry[:] = entry[2], [now + REPEATS_WITHIN_S, 0, 0]
            if left_out:
                record.msg = f"{record.msg} ({left_out:.0f} more like this were not shown)"
        entry[1] += 1
        if entry[1] <= REPEATS_SHOWN:
            return True
        entry[2] += 1
        return False


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, process, epoch, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": getattr(record, "fleet_process", ""),
            "epoch": getattr(record, "epoch", 0),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


_identity = _Identity()


def set_up(level: str, form: str) -> None:
    """Send records of `level` and above to stderr; `form` is text or json."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    handler.addFilter(_identity)
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("picows").setLevel(logging.ERROR)  # a refused connection is told by the connector itself


def identify(process: str, epoch: int = 0) -> None:
    """From now on this process logs under this name; `epoch` is the one of its rings, 0 where it has none."""
    _identity.process, _identity.epoch = process, epoch
