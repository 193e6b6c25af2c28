"""Child processes of a benchmark: started in order, spoken to by lines, always ended, never waited for without a bound."""

import contextlib
import fcntl
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
END_S = 10.0
INSTALL_S = 300
CRYPTOFEED = "cryptofeed==2.4.1"


class NotInstalled(Exception):
    """A package cannot be had here."""


def environment(package: str) -> Path:
    """The interpreter of an environment that holds a package and nothing of ours; made when it is missing, under a lock."""
    home = ROOT / f".venv-{package.partition('=')[0]}"
    interpreter, done = home / "bin" / "python", home / f"{package}.done"
    home.mkdir(exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # not for ever: who has it is bound by INSTALL_S
        if not done.exists():
            for command in (
                [sys.executable, "-m", "venv", str(home)],
                [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package],
            ):
                try:
                    result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
                except (OSError, subprocess.TimeoutExpired) as error:
                    raise NotInstalled(f"{package}: {error}") from error
                if result.returncode != 0:
                    last = (result.stderr.strip().splitlines() or ["without a word"])[-1]
                    raise NotInstalled(f"{package}: {last}")
            done.touch()
    return interpreter


class Child:
    """One process that prints JSON lines."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**_environment(), **environment},
        )
        self.pid = self.process.pid
        self._command = command

    def line(self, timeout_s: float) -> dict[str, Any]:
        """The next JSON line; AssertionError when it does not come."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise AssertionError(f"{self._command} said nothing for {timeout_s:g} s")
        text = self.process.stdout.readline()
        if not text:
            raise AssertionError(f"{self._command} ended with {self.process.wait(END_S)}")
        found: dict[str, Any] = json.loads(text)
        return found

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Close its stdin, then ask, then insist."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MDCOLLECTOR_")}


@contextlib.contextmanager
def child(*command: str, **environment: str) -> Iterator[Child]:
    """A process for the length of a block."""
    started = Child(command, **environment)
    try:
        yield started
    finally:
        started.end()


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package in this interpreter."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def until(condition: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.005) -> None:
    """Wait for a condition; AssertionError names `what` when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)
