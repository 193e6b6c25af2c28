"""`python -m mdcollector` and the console script: Ctrl-C ends a command without a word until it says itself what it means.

Nothing is imported before that is said: it takes a second on a slow machine, and a traceback would be the answer.
"""

import os
import signal
import sys

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Run the command that the arguments name."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us wants it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))  # an exception could be caught on its way
    from mdcollector import cli

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(EXIT_INTERRUPTED))
    cli.main()


if __name__ == "__main__":
    main()
