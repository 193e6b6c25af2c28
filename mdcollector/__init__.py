"""mdcollector as a library: what a strategy or a script imports to read rings and rebuild books.

>>> from mdcollector import RingReader, OrderBooks
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdcollector.book import OrderBook, OrderBooks
    from mdcollector.errors import MdError, RingError
    from mdcollector.records import (
        ASK,
        BID,
        BUY,
        FEEDS,
        SELL,
        UNKNOWN,
        Action,
        Column,
        Exchange,
        Feed,
        Flag,
    )
    from mdcollector.ring import RingReader, ring_dir

__all__ = [
    "ASK",
    "BID",
    "BUY",
    "FEEDS",
    "SELL",
    "UNKNOWN",
    "Action",
    "Column",
    "Exchange",
    "Feed",
    "Flag",
    "MdError",
    "OrderBook",
    "OrderBooks",
    "RingError",
    "RingReader",
    "ring_dir",
]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: `__main__` is to be heard before NumPy is loaded."""
    if name in __all__:
        for module in ("book", "errors", "records", "ring"):
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
