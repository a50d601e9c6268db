"""How threads that draw a picture, or a few, together wait for each other: each counts where it is, in memory that all can read.

A wait lasts as long as the parts differ in time, well under a microsecond, while a lock of the operating system's would cost
ten. But a thread without a processor may be away for milliseconds, so those that wait long let others run.
"""

import os

from numba import types
from numba.extending import intrinsic

from .arithmetic import kernel

GONE = 2**63 - 1  # the count of a lane that nobody is to wait for
PATIENCE = 2_000  # looks at a count, a few microseconds
let_others_run = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


@intrinsic
def publish(typing, counts, index, value):
    """counts[index] = value, after all that this thread has written before; counts: int64."""

    def generate(context, builder, signature, arguments):
        counts, index, value = arguments
        data = context.make_array(signature.args[0])(context, builder, counts).data
        builder.store_atomic(value, builder.gep(data, [index]), ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(counts, types.int64, types.int64), generate


@intrinsic
def look(typing, counts, index):
    """counts[index], before all that this thread reads afterwards; counts: int64."""

    def generate(context, builder, signature, arguments):
        counts, index = arguments
        data = context.make_array(signature.args[0])(context, builder, counts).data
        return builder.load_atomic(builder.gep(data, [index]), ordering="acquire", align=8)

    return types.int64(counts, types.int64), generate


@kernel
def meet(arrived, lane, lanes, phase):
    """Returns when all `lanes` have come to `phase`, which grows from one meeting to the next. arrived: (lanes, 8) int64."""
    if lanes == 1:
        return
    counts, line = arrived.reshape(arrived.size), arrived.shape[1]  # (lanes, 8) -> (lanes 8,)
    publish(counts, lane * line, phase)
    for other in range(lanes):
        looks = 0
        while look(counts, other * line) < phase:
            looks += 1
            if looks > PATIENCE:
                let_others_run()
