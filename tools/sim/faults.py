"""Faults on demand: the grammar in which they are asked for, when they fire, and what they hit.

Used by `server.py`, which carries out what is decided here. Names no venue and touches no socket.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from random import Random
from typing import Any

PENDING_MAX = 10_000  # hits that wait for something to hit

FRAME, SESSION, WINDOW, REQUEST, MARKET = "frame", "session", "window", "request", "market"


@dataclass(frozen=True, slots=True)
class Kind:
    """What one fault is: its class, its own keys with their defaults, and a sentence for the help."""

    group: str
    help: str
    keys: Mapping[str, float | str] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "drop": Kind(FRAME, "one message of a stream is never sent"),
    "duplicate": Kind(FRAME, "a message is sent twice"),
    "reorder": Kind(FRAME, "a message and the next one of its stream change places"),
    "truncate": Kind(
        FRAME, "half a message; mode=wire cuts the bytes of the frame and resets the connection", {"mode": "text"}
    ),
    "garbage": Kind(
        FRAME,
        "nonsense is sent before the true message; kind=bytes|utf8|types|nan|absurd|unknown_symbol|unknown_event,"
        " without it each in turn",
        {"kind": "any"},
    ),
    "gap": Kind(FRAME, "the next n messages of one stream are never sent", {"n": 5}),
    "split": Kind(FRAME, "a message in parts; mode=fragments (WebSocket) or tcp", {"mode": "fragments", "parts": 3}),
    "disconnect": Kind(SESSION, "the TCP connection is reset without a word"),
    "close": Kind(SESSION, "an orderly close frame", {"code": 1001}),
    "shutdown": Kind(SESSION, "the venue's own notice, then an orderly close after_s seconds later", {"after_s": 2}),
    "lifetime": Kind(SESSION, "the end of the connection's allowed lifetime"),
    "freeze": Kind(SESSION, "the connection stays open but nothing at all is sent for `seconds`; what was due is lost"),
    "auth_expire": Kind(SESSION, "the session's access token expires"),
    "silence": Kind(
        WINDOW,
        "streams are acknowledged but carry nothing; until=end (of the window) or left: one that is left and taken anew"
        " carries again",
        {"until": "end"},
    ),
    "no_heartbeat_answer": Kind(WINDOW, "the client's pings and tests stay unanswered, and the server sends none"),
    "clock_skew": Kind(WINDOW, "the exchange's clock is ms milliseconds off", {"ms": 2000}),
    "ban": Kind(
        WINDOW,
        "REST answers `status` with Retry-After until the window ends; or the venue's own code, where that is in the body",
        {"status": 418},
    ),
    "slow_rest": Kind(REQUEST, "a REST answer comes ms milliseconds late", {"ms": 2000}),
    "stale_rest": Kind(WINDOW, "REST answers stay what they were before the window began"),
    "rest_error": Kind(REQUEST, "a REST request fails with `status`", {"status": 503}),
    "bad_body": Kind(
        REQUEST,
        "a REST answer with status 200 is spoilt; kind=half|empty|types|nan|absurd|text, without it each in turn",
        {"kind": "any"},
    ),
    "refuse": Kind(
        REQUEST,
        "a subscription (or stream=login) is refused with the venue's error; code= another one than usual, where it has codes",
        {"code": 0},
    ),
    "ignore": Kind(REQUEST, "a subscription gets no answer and brings nothing"),
    "stale_snapshot": Kind(REQUEST, "a book snapshot that is some seconds old"),
    "future_snapshot": Kind(REQUEST, "a book snapshot newer than everything sent: the streams lag by ms", {"ms": 1000}),
    "cross": Kind(MARKET, "a book event with a bid above the best ask, taken back after ms", {"ms": 300}),
    "renumber": Kind(MARKET, "book messages of a ticker count anew from a lower number, where a venue does that"),
    "snapshot": Kind(
        MARKET, "a book snapshot that nobody asked for; anew=1: its numbers begin again as the venue's do", {"anew": 0}
    ),
    "revise": Kind(MARKET, "the newest closed candles of a ticker are changed, where a venue does that"),
    "listing": Kind(MARKET, "the instrument named by ticker= is listed while running, or trades again after a delist"),
    "delist": Kind(
        MARKET,
        "the instrument named by ticker= trades no more; mode=absent (from the list) or halted (listed as not trading)",
        {"mode": "absent"},
    ),
    "tick_size": Kind(MARKET, "the list says a tick size ten times finer for the instrument named by ticker="),
}
COMMON = {
    "at": "seconds after the start; then once, unless every= is given",
    "every": "seconds between two hits",
    "rate": "probability per message or request",
    "count": "hits in all",
    "seconds": "how long a window lasts",
    "stream": "only streams whose name contains this; with a * in it, whose whole name it matches",
    "ticker": "only this ticker",
    "conn": "only the connection of this number",
    "agent": "only clients whose User-Agent contains this",
}
BAD_BODIES = ("half", "empty", "types", "nan", "absurd", "text")
GARBAGE = ("bytes", "utf8", "types", "nan", "absurd", "unknown_symbol", "unknown_event")
_TEXT_KEYS = {"stream", "ticker", "agent", "mode", "kind", "until"}
_CHOICES = {
    ("truncate", "mode"): ("text", "wire"),
    ("split", "mode"): ("fragments", "tcp"),
    ("delist", "mode"): ("absent", "halted"),
    ("silence", "until"): ("end", "left"),
    ("garbage", "kind"): ("any", *GARBAGE),
    ("bad_body", "kind"): ("any", *BAD_BODIES),
}


class FaultError(ValueError):
    """The request for a fault is wrong; the text says what is allowed."""


@dataclass(slots=True)
class Fault:
    """One fault as asked for, and how often it has fired."""

    name: str
    keys: dict[str, float | str]
    fired: int = 0
    pending: float = 0.0  # hits that may happen now
    next_s: float = math.inf  # when the next hit becomes possible
    until_s: float = -math.inf  # end of the window
    gaps: dict[str, int] = field(default_factory=dict)  # stream -> messages of a running gap still to lose
    left: set[str] = field(default_factory=set)  # streams that a client has left since

    @property
    def group(self) -> str:
        return KINDS[self.name].group

    def number(self, key: str, default: float = 0.0) -> float:
        value = self.keys.get(key, KINDS[self.name].keys.get(key, default))
        return float(value)

    def text(self, key: str) -> str:
        return str(self.keys.get(key, KINDS[self.name].keys.get(key, "")))

    @property
    def hits_max(self) -> float:
        if "count" in self.keys:
            return self.number("count")
        return math.inf if "every" in self.keys or "rate" in self.keys else 1.0

    def wants(self, stream: str = "", ticker: str = "") -> bool:
        """Whether a stream and ticker are ones that this fault may hit."""
        wanted = self.text("stream")
        matches = fnmatchcase(stream, wanted) if "*" in wanted else wanted in stream
        return matches and self.keys.get("ticker", ticker) == ticker

    def wants_conn(self, conn: int, agent: str) -> bool:
        """Whether a connection is one that this fault may hit."""
        return self.keys.get("conn", conn) == conn and self.text("agent") in agent


def parse(spec: str | Mapping[str, Any]) -> Fault:
    """Read `NAME:key=value,...` or the same as a JSON object with the key `name`."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        raw: dict[str, Any] = {key: value if eq else "" for key, eq, value in pairs}
    else:
        raw = {str(key): value for key, value in spec.items() if key != "name"}
        name = str(spec.get("name", ""))
    if name not in KINDS:
        raise FaultError(f"unknown fault {name!r}; known: {', '.join(KINDS)}")
    allowed = [*COMMON, *KINDS[name].keys]
    keys: dict[str, float | str] = {}
    for key, value in raw.items():
        if key not in allowed:
            raise FaultError(f"fault {name}: unknown key {key!r}; allowed: {', '.join(allowed)}")
        if key in _TEXT_KEYS:
            choices = _CHOICES.get((name, key))
            if choices and value not in choices:
                raise FaultError(f"fault {name}: {key} must be one of {', '.join(choices)}, not {value!r}")
            keys[key] = str(value)
            continue
        try:
            keys[key] = float(value)
        except (TypeError, ValueError):
            raise FaultError(f"fault {name}: {key} must be a number, not {value!r}") from None
        if not math.isfinite(float(keys[key])) or (float(keys[key]) < 0 and key != "ms"):
            raise FaultError(f"fault {name}: {key} must be a number that is not negative, not {value!r}")
    if "rate" in keys and KINDS[name].group not in (FRAME, REQUEST):
        raise FaultError(f"fault {name}: rate= is for messages and requests only; use at= or every=")
    if keys.get("every") == 0:
        raise FaultError(f"fault {name}: every must be greater than 0")
    if name in ("listing", "delist", "tick_size") and "ticker" not in keys:
        raise FaultError(f"fault {name}: ticker= is needed")
    return Fault(name, keys)


class Faults:
    """All faults of a run. Time is seconds of market time, that is, since the market started."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"{seed}:faults")
        self.all: list[Fault] = []
        self.now_s = 0.0
        self.frame: list[Fault] = []  # those that every message must be held against
        self.silent: list[Fault] = []

    def add(self, fault: Fault) -> None:
        if "at" in fault.keys:
            fault.next_s = fault.number("at")
        elif "every" in fault.keys:
            fault.next_s = self.now_s + fault.number("every")
        elif "rate" not in fault.keys:
            fault.pending = fault.hits_max
        self.all.append(fault)
        self._index()

    def _index(self) -> None:
        self.frame = [f for f in self.all if f.group == FRAME and (f.fired < f.hits_max or f.gaps)]
        self.silent = [f for f in self.all if f.name == "silence" and self._in_window(f)]

    def tick(self, now_s: float) -> list[Fault]:
        """Advance to `now_s`; returns the session, window and market faults that are due now."""
        self.now_s = now_s
        due: list[Fault] = []
        for fault in self.all:
            while now_s >= fault.next_s:
                fault.pending = min(fault.pending + 1, PENDING_MAX)
                fault.next_s = fault.next_s + fault.number("every") if "every" in fault.keys else math.inf
            if fault.group in (SESSION, WINDOW, MARKET) and fault.pending >= 1 and fault.fired < fault.hits_max:
                due.append(fault)
        self._index()
        return due

    def fire(self, fault: Fault) -> None:
        """Count one hit; opens the window of a window fault."""
        fault.fired += 1
        fault.pending = max(0.0, fault.pending - 1)
        if fault.group == WINDOW:
            fault.until_s = self.now_s + fault.number("seconds", 5.0 if fault.name == "ban" else math.inf)
        if fault.group in (FRAME, WINDOW):
            self._index()

    def _in_window(self, fault: Fault) -> bool:
        return fault.fired > 0 and self.now_s < fault.until_s

    def _may_hit(self, fault: Fault) -> bool:
        if fault.fired >= fault.hits_max:
            return False
        return fault.pending >= 1 or (
            "rate" in fault.keys and "at" not in fault.keys and self.rng.random() < fault.number("rate")
        )

    def for_message(self, stream: str, ticker: str, conns: Iterable[tuple[int, str]]) -> list[Fault]:
        """The frame faults that hit this message; a running gap goes on without counting as a new hit."""
        hits: list[Fault] = []
        for fault in list(self.frame):
            if not fault.wants(stream, ticker):
                continue
            if stream in fault.gaps:
                hits.append(fault)
                fault.gaps[stream] -= 1
                if fault.gaps[stream] <= 0:
                    del fault.gaps[stream]
                continue
            if not any(fault.wants_conn(conn, agent) for conn, agent in conns) or not self._may_hit(fault):
                continue
            if fault.name == "gap" and fault.number("n") > 1:
                fault.gaps[stream] = int(fault.number("n")) - 1
            self.fire(fault)
            hits.append(fault)
        return hits

    def for_request(
        self, name: str, stream: str = "", ticker: str = "", conn: int = 0, agent: str = ""
    ) -> Fault | None:
        """The request fault of this name that hits now, already counted."""
        for fault in self.all:
            if (
                fault.name == name
                and fault.wants(stream, ticker)
                and fault.wants_conn(conn, agent)
                and self._may_hit(fault)
            ):
                self.fire(fault)
                return fault
        return None

    def window(self, name: str, conn: int = 0, agent: str = "") -> Fault | None:
        """The window fault of this name that is open now."""
        for fault in self.all:
            if fault.name == name and self._in_window(fault) and fault.wants_conn(conn, agent):
                return fault
        return None

    def silenced(self, stream: str, ticker: str) -> list[Fault]:
        return [f for f in self.silent if f.wants(stream, ticker) and stream not in f.left]

    def left(self, stream: str) -> None:
        """A client has left a stream."""
        for fault in self.silent:
            if fault.text("until") == "left":
                fault.left.add(stream)


def shown(books: str = "", trades: str = "") -> tuple[str, ...]:
    """Faults for a demonstration, for streams whose names have these parts; "" = there is none that proves itself."""
    found = ["garbage:every=3.5", "disconnect:at=11"]
    if books:
        found += [f"gap:at=5,stream={books}", f"duplicate:every=3,stream={books}"]
    if trades:
        found += [f"gap:at=7,stream={trades},n=2", f"duplicate:every=4,stream={trades}"]
    return tuple(found)


def help_text() -> str:
    """The table of faults for `--help`."""
    lines = ["Faults, as --fault NAME[:key=value,...] (repeatable), or at run time by POST /_sim/fault:", ""]
    for name, kind in KINDS.items():
        own = " ".join(
            f"{key}={value:g}" if isinstance(value, float | int) else f"{key}={value}"
            for key, value in kind.keys.items()
        )
        lines.append(f"  {name:20} {kind.help}{' [' + own + ']' if own else ''}")
    lines += ["", "Keys for all of them:", *(f"  {key:20} {text}" for key, text in COMMON.items())]
    return "\n".join(lines)
