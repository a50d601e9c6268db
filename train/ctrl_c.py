"""Ctrl-C while a script still imports, which takes seconds: it ends without a traceback."""

import signal


def ends_quietly() -> None:
    """For the first line of a script. What ignores Ctrl-C, in the background say, goes on to."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raises() -> None:
    """KeyboardInterrupt, as ever: for the beginning of a script's main."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
