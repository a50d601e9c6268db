"""Ctrl-C and SIGTERM during a training: after the first it ends with a checkpoint, after a second at once."""

import os
import signal
import time

# Schedulers and Ctrl-C signal all processes, and a launcher among them hands it on: one wish, heard twice within so many seconds.
HANDED_ON = 3.0


class Interruption:
    """heard: whether this process has been asked to end; those that train together agree on it (`Run.agree`)."""

    def __init__(self, tells: bool):
        """tells: whether this process prints what will happen, as one of several does."""
        self.heard, self.tells = False, tells
        self.first: dict[int, float] = {}  # when each signal came first, by the monotonic clock

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def stop_listening(self) -> None:
        """Both signals do again what they do by default."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def hear(self, number: int, _) -> None:
        now = time.monotonic()
        if now - self.first.setdefault(number, now) > HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.tells and not self.heard:  # by the system's call, as this may come in the middle of a print
            what = "Ends with a checkpoint, after the step or validation at work"
            os.write(2, f"\n{what}. Once more, {HANDED_ON:g} seconds from now or later, and it ends at once.\n".encode())
        self.heard = True
