"""What a fleet file asks of its venues, before anything connects: connections, requests, time until all is in sync.

Used by `mdcollector check`, and by a supervisor before it opens a further connection. Limits count per IP address, so they
are shared by all connectors whose venues are of one family; a plan that no patience makes possible is refused.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from mdcollector.budget import seconds_for
from mdcollector.config import ConnectorConfig
from mdcollector.connector import WEIGHT_SHARE, feeds_of, venue_options
from mdcollector.emit import CAPACITIES, Emit
from mdcollector.errors import ConfigError
from mdcollector.exchanges import Send, Stream, Venue, venue_class
from mdcollector.records import ALWAYS_ON, FEEDS
from mdcollector.ring import ring_bytes


class Planned(msgspec.Struct):
    """One connection of the plan: the process `name` subscribes to `streams`."""

    name: str
    connector: str
    tickers: list[str]
    streams: list[Stream]
    number: int = 0  # of the connections of its connector


Connectors = Mapping[str, tuple[ConnectorConfig, Sequence[Planned]]]  # of a fleet, each with its connections


class ConnectorPlan(msgspec.Struct):
    """One `[connectors.NAME]`."""

    name: str
    exchange: str
    connections: int
    tickers: int
    streams: int
    messages: int  # client messages that subscribe everything
    weight: int  # request weight of the first snapshots and of the list of instruments
    polled_per_s: float  # request weight a second that polling costs all the time
    messages_s: float  # that the slowest connection needs for its messages
    ring_bytes: int


class FamilyPlan(msgspec.Struct):
    """All connectors whose venues share the limits of one IP address. Times in seconds, at most about."""

    family: str
    connections: int
    messages: int
    weight: int
    connects_s: float  # until all connections may be opened
    messages_s: float  # until everything may be subscribed
    weight_s: float  # until all snapshots may be fetched

    @property
    def sync_s(self) -> float:
        """Until every book is live: one after the other at worst."""
        return self.connects_s + self.messages_s + self.weight_s


class FleetPlan(msgspec.Struct):
    """The whole fleet file."""

    connections: list[Planned]
    connectors: list[ConnectorPlan]
    families: list[FamilyPlan]


def plan_fleet(where: str, connectors: Connectors) -> FleetPlan:
    """What these connectors, each with its connections, come to. ConfigError: more than a venue allows."""
    check_limits(where, connectors)
    plans, families = [], dict[str, list[ConnectorPlan]]()
    for name, (settings, connections) in connectors.items():
        kind = venue_class(settings.exchange)
        plan = _connector_plan(name, kind, settings, connections)
        plans.append(plan)
        families.setdefault(kind.FAMILY or kind.NAME, []).append(plan)
    return FleetPlan(
        [connection for _, connections in connectors.values() for connection in connections],
        plans,
        [_family_plan(family, members) for family, members in families.items()],
    )


def check_limits(where: str, connectors: Connectors) -> None:
    """ConfigError: more than the venues allow, however long one waits."""
    venues, keys = dict[type[Venue], list[str]](), dict[tuple[type[Venue], str], list[str]]()
    families = dict[str, list[str]]()
    for name, (settings, _) in connectors.items():
        kind = venue_class(settings.exchange)
        venues.setdefault(kind, []).append(name)
        families.setdefault(kind.FAMILY or kind.NAME, []).append(name)
        if credentials := venue_options(settings, kind).credentials:
            keys.setdefault((kind, credentials[kind.CREDENTIALS[0]]), []).append(name)

    def connections(names: Sequence[str]) -> int:
        return sum(len(connectors[name][1]) for name in names)

    for (kind, _), names in keys.items():
        _check_sessions(f"{where}: connectors {', '.join(names)}", kind, connections(names))
    for kind, names in venues.items():
        _check_open(f"{where}: connectors {', '.join(names)}", kind, connections(names))
    for family, names in families.items():
        polled = sum(_polled_per_s(*connectors[name]) for name in names)
        _check_polled(f"{where}: connectors {', '.join(names)}", family, connectors[names[0]][0], polled)


def _polled_per_s(settings: ConnectorConfig, connections: Sequence[Planned]) -> float:
    kind = venue_class(settings.exchange)
    options = venue_options(settings, kind)
    return sum(kind.polled_weight(connection.streams, options) for connection in connections)


def _connector_plan(
    name: str, kind: type[Venue], settings: ConnectorConfig, connections: Sequence[Planned]
) -> ConnectorPlan:
    options, limits = venue_options(settings, kind), kind.LIMITS
    messages = [_messages(kind, settings, connection) for connection in connections]
    books = sum(stream.feed == "orderbook_l2" for connection in connections for stream in connection.streams)
    lists = len(connections) * len(kind.instruments_paths()) if settings.instruments_s else 0
    return ConnectorPlan(
        name,
        settings.exchange,
        len(connections),
        len({ticker for connection in connections for ticker in connection.tickers}),
        sum(len(connection.streams) for connection in connections),
        sum(messages),
        books * kind.snapshot_weight(options) + lists * limits.instruments_weight,
        _polled_per_s(settings, connections),
        max(0.0, (max(messages, default=0) - max(1.0, limits.messages_per_s)) / limits.messages_per_s),
        sum(_ring_bytes(settings, connection) for connection in connections),
    )


def _messages(kind: type[Venue], settings: ConnectorConfig, connection: Planned) -> int:
    """Client messages that subscribe the streams of a connection: the venue itself says them, into rings of no feed."""
    with tempfile.TemporaryDirectory(prefix="mdcollector-") as rings:
        small = dict.fromkeys(ALWAYS_ON, 512)
        emit = Emit(Path(rings), "plan", kind.EXCHANGE, [], capacities=small, semaphore=False)
        venue = kind(emit, venue_options(settings, kind), connection.streams)
        venue.subscribe([stream.name for stream in connection.streams])
        emit.close()
        return sum(isinstance(want, Send) for want in venue.wants)


def _ring_bytes(settings: ConnectorConfig, connection: Planned) -> int:
    sizes = {**CAPACITIES, **settings.capacity}
    feeds = (*feeds_of(settings, connection.streams), *ALWAYS_ON)
    return sum(ring_bytes(FEEDS[feed], sizes[feed]) for feed in feeds)


def _check_sessions(who: str, kind: type[Venue], sessions: int) -> None:
    allowed = kind.LIMITS.sessions_per_key
    if allowed and sessions > allowed:
        raise ConfigError(
            f"{who}: {sessions} connections to {kind.NAME} with the same credentials; it"
            f" allows {allowed}: take fewer tickers or feeds, or other credentials for some"
        )


def _check_open(who: str, kind: type[Venue], sockets: int) -> None:
    """A connection for streams and, by `open_session`, one for requests are open all the time."""
    allowed = kind.LIMITS.open_per_ip
    http = sockets if kind.LIMITS.http_is_open else 0
    if allowed and sockets + http > allowed:
        of = f" ({sockets} WebSocket, {http} HTTP)" if http else ""
        raise ConfigError(
            f"{who}: {sockets + http} connections to {kind.NAME} at the same time{of}; it"
            f" allows {allowed} to one IP address: take fewer tickers or feeds, or spread them over machines"
        )


def _check_polled(who: str, family: str, settings: ConnectorConfig, polled: float) -> None:
    """Of a venue that is only polled: what is polled beside streams waits while there is no weight for it."""
    kind = venue_class(settings.exchange)
    most = kind.LIMITS.weight[0] * WEIGHT_SHARE / kind.LIMITS.weight[1]
    if polled > most and not kind.WS_URL:
        raise ConfigError(
            f"{who}: {polled:g} requests a second to {family}, which is polled; {most:g} are"
            " allowed from one IP address: take fewer tickers or intervals, or a longer poll_s"
        )


def _family_plan(family: str, members: Sequence[ConnectorPlan]) -> FamilyPlan:
    limits = venue_class(members[0].exchange).LIMITS
    connections, messages = sum(m.connections for m in members), sum(m.messages for m in members)
    per_ip, per_ip_s = limits.messages_per_ip
    weight = sum(member.weight for member in members)
    return FamilyPlan(
        family,
        connections,
        messages,
        weight,
        seconds_for(connections, *limits.connects),
        max(*(m.messages_s for m in members), seconds_for(messages, per_ip, per_ip_s) if per_ip else 0.0),
        seconds_for(weight, limits.weight[0] * WEIGHT_SHARE, limits.weight[1]),
    )
