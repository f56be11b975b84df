"""The log of a command: lines on stderr. stdout is left to results."""

import sys

_enabled = True


def enable(enabled: bool) -> None:
    """Turns `say` on or off; in a job of several processes only process 0 writes the log."""
    global _enabled
    _enabled = enabled


def say(text: str) -> None:
    """Writes a line to stderr, in a single write so that lines of other threads cannot split it."""
    if _enabled:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)
