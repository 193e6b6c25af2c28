"""`mdsim` as a process of its own, started, steered and stopped from Python.

For tests, the demo and benchmarks; knows the command line and the `/_sim/` paths, nothing of any venue.
"""

import http.client
import json
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.sim.ledger import Ledger

READY_S = 20.0
STOP_S = 20.0
POLL_S = 0.02


class SimError(RuntimeError):
    """The simulated exchange did not do what was asked of it; the text says what it printed."""


class SimProcess:
    """A running `mdsim`; as a context manager it is stopped, or killed if it will not stop, at the end.

    with SimProcess("some_venue", "--rate", "100", ledger=path) as sim:
        ... connect to sim.ws_url, sim.rest_url ...
        sim.fault("drop", stream="trade", count=2)
        sim.stop()
    truth = sim.ledger()
    """

    def __init__(self, exchange: str, *arguments: str, ledger: Path | None = None) -> None:
        command = [sys.executable, "-m", "tools.sim", exchange, *arguments]
        if ledger is not None:
            command += ["--ledger", str(ledger)]
        self.ledger_path = ledger
        self.summary: dict[str, Any] = {}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 (our own program)
        try:
            self.ready = json.loads(self._first_line())
        except (ValueError, SimError):
            self.kill()
            raise
        self.ws_url: str = self.ready["ws_url"]
        self.rest_url: str = self.ready["rest_url"]
        self.port: int = self.ready["port"]
        self.tickers: list[str] = self.ready["tickers"]

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(READY_S):
                raise SimError(f"mdsim printed nothing within {READY_S:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise SimError(f"mdsim ended with exit code {self.process.wait(STOP_S)} before it was ready")
        return line

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        secure = self.rest_url.startswith("https")
        if secure:
            raise SimError("steering a simulated exchange over TLS is not supported; steer a plain one")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = connection.getresponse()
            value: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise SimError(str(value.get("error", value)))
        return value

    def fault(self, name: str, **keys: float | str) -> None:
        """Inject a fault now (or at=, every=, rate= as in the grammar)."""
        self._ask("POST", "/_sim/fault", {"name": name, **keys})

    def pause(self) -> None:
        """Let nothing more happen in the market; what waits for its timer is still published."""
        self._ask("POST", "/_sim/pause")

    def resume(self) -> None:
        self._ask("POST", "/_sim/resume")

    def state(self) -> dict[str, Any]:
        """Counters, connections with their subscriptions, faults."""
        return self._ask("GET", "/_sim/state")

    def wait_state(self, condition: Callable[[dict[str, Any]], bool], within_s: float = 10.0) -> dict[str, Any]:
        """Poll the state until a condition holds."""
        deadline = time.monotonic() + within_s
        while True:
            state = self.state()
            if condition(state):
                return state
            if time.monotonic() > deadline:
                raise SimError(f"the condition did not come true within {within_s:g} s; last state: {state}")
            time.sleep(POLL_S)

    def stop(self) -> dict[str, Any]:
        """End it in order; returns the summary that it printed."""
        if not self.summary:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.wait()
        return self.summary

    def wait(self, within_s: float = STOP_S) -> dict[str, Any]:
        """Wait until it ends by itself (`--seconds`, `--events`); returns the summary."""
        if not self.summary:
            rest, _ = self.process.communicate(timeout=within_s)
            if self.process.returncode != 0:
                raise SimError(f"mdsim ended with exit code {self.process.returncode}")
            self.summary = json.loads(rest.strip().splitlines()[-1])
        return self.summary

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ledger(self) -> Ledger:
        """The ledger as far as it has been written."""
        if self.ledger_path is None:
            raise SimError("this simulated exchange writes no ledger")
        return Ledger(self.ledger_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            if kind is None:
                try:
                    self.stop()
                finally:
                    if self.process.poll() is None:
                        self.kill()
            else:
                self.kill()
        elif self.process.stdout is not None and not self.process.stdout.closed:
            self.process.communicate()
