"""How many processes there are, and how many were asked for."""

import os

from accelerate import Accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuses a launch that asked for several processes and got single ones, which would all write the same files."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves an address for others that never come.
    pretended = {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if accelerator.num_processes == 1 and (asked > 1 or pretended):
        raise SystemExit(
            "Several processes were asked for, and each would work on its own. On CPUs launch them with: "
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 SCRIPT ..."
        )
