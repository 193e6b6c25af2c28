"""The errors of the product, each class saying what follows; raised deep, handled in one loop (`connector.py`).

    MdError
    ├── ConfigError          exit 78, a supervisor must not restart
    ├── RingError            a ring file is unusable: wrong magic, version, size, second writer, unproven machine
    ├── StorageError         a Parquet file or a directory of them is unusable
    ├── Refused              the venue refuses a request: alert, keep the other streams
    ├── FrameError           one frame is unusable: count it by reason, keep a sample, go on
    ├── Disconnected         reconnect with capped exponential backoff and full jitter
    │   └── Stale            nothing but heartbeats came for too long
    └── RateLimited          wait as long as the venue said, then go on
A hole in a sequence is not an exception: `continuity.py` tells it to the emitter as a gap and heals it by itself.
Anything else is a bug: the process crashes, is restarted and is seen.
"""

EXIT_DONE = 0  # done and proven
EXIT_FINDINGS = 1  # finished, with findings: missing rows, differences
EXIT_USAGE = 2  # wrong use
EXIT_CONFIG = 78  # wrong configuration (sysexits EX_CONFIG): never restarted


class MdError(Exception):
    """Base of every error that this product raises on purpose."""


class ConfigError(MdError):
    """The configuration is wrong; the text names file, key, value and what is allowed."""


class RingError(MdError):
    """A ring file cannot be used; the text says which file, what was found and what was expected."""


class StorageError(MdError):
    """A stored file cannot be used; the text says which file and why."""


class Refused(MdError):
    """The venue refused a request for good; the other streams of the connection stay."""


class FrameError(MdError):
    """One frame is unusable. `reason` is a short, low-cardinality word that is counted.

    `text` is for people; it is kept with the sample of the frame.
    """

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text or reason)
        self.reason = reason


class Disconnected(MdError):
    """The connection is gone or must be given up: reconnect."""


class Stale(Disconnected):
    """The connection is open but carries no data any more."""


class RateLimited(MdError):
    """The venue asks to slow down: no request before `retry_after_s` seconds have passed."""

    def __init__(self, retry_after_s: float, text: str = "") -> None:
        super().__init__(text or f"rate limited for {retry_after_s:g} s")
        self.retry_after_s = retry_after_s
