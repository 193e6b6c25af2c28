"""The product beside other stacks: the same frames from the same sender, in turns, in one run.

cryptofeed runs unmodified from its package, in an environment of its own (`.venv-cryptofeed`, shared with the tests,
made when it is missing). It takes TLS only and the aggTrade stream, so the product runs over that once more.
"""

import sys
from pathlib import Path
from typing import Any

from bench import endtoend, machine
from bench.micro import ring_directory
from bench.processes import CRYPTOFEED, NotInstalled, child, environment

STACKS = ("aiohttp+ujson", "aiohttp+ujson+pydantic", "websockets+json")
BARE = "bare picows+msgspec"  # the shape of the product without what it does: the floor for it on this machine
START_S, RUN_S = 60.0, 300.0


def _peer(
    python: str, stack: str, kind: str, count: int, tls: dict[str, str] | None, **environment: str
) -> dict[str, Any]:
    with endtoend.sending(kind, count, tls=tls) as (sender, port):
        script = str(Path(__file__).with_name("peer.py"))
        with child(python, script, stack, str(port), str(count), **environment) as peer:
            peer.line(START_S)
            with machine.slowness_around(0) as slowness:
                sender.say("go")
                found = peer.line(RUN_S)
    return {
        "stack": stack, "kind": kind, "tls": tls is not None, "messages": count - 1,
        "messages_per_s": (count - 1) / found["seconds"], "cpu_ns": found["cpu_s"] / (count - 1) * 1e9,
        "slowness": slowness[0],
    }  # fmt: skip


def _product(kind: str, count: int, tls: dict[str, str] | None) -> dict[str, Any]:
    found = endtoend.run(kind, count, tls=tls)
    return {
        "stack": "mdcollector",
        **{k: found[k] for k in ("kind", "tls", "messages", "messages_per_s", "cpu_ns", "slowness")},
    }


def run(count: int, rounds: int) -> list[dict[str, Any]]:
    """The middle one, at nominal speed, of `rounds` turns of each."""
    turns: list[list[dict[str, Any]]] = []
    try:
        python = environment(CRYPTOFEED)
    except NotInstalled as error:
        print(f"cryptofeed is left out: {error}", file=sys.stderr)
        python = None
    with ring_directory() as directory, endtoend.certificates(directory) as tls:
        trust = {"SSL_CERT_FILE": tls["ca"], "REQUESTS_CA_BUNDLE": tls["ca"]}
        for _ in range(rounds):
            turn = [_product("trade", count, None), _peer(sys.executable, BARE, "trade", count, None)]
            turn += [_peer(sys.executable, stack, "trade", max(count // 4, 100), None) for stack in STACKS]
            turn.append(_product("aggtrade", count, tls))
            if python is not None:
                turn.append(_peer(str(python), "cryptofeed", "aggtrade", max(count // 8, 100), tls, **trust))
            turns.append(turn)
    return [machine.middle(same, "cpu_ns") for same in zip(*turns, strict=True)]
