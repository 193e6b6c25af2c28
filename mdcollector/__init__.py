"""mdcollector as a library: what a strategy or a script imports to read rings and rebuild books.

>>> from mdcollector import RingReader, OrderBooks
"""

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
