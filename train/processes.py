"""How many processes there are, how many were asked for, and how they share work.

The processes are those of torch.distributed once an Accelerator has been made, and one alone before.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import wraps
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, distributed

import ctrl_c


def told_by_the_launcher(main):
    """A script's main. torchrun's own report of a failure, which comes last and is long, ends with the sentence of a refusal.

    One of several processes that has done its work ends at once: threads of PyTorch that let go of tensors while the
    interpreter is being taken down would abort it, now and then.
    """

    @wraps(main)
    def told(*arguments):
        ctrl_c.raises()
        try:
            main(*arguments)
            if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        except SystemExit as refusal:
            if isinstance(refusal.code, str) and (report := os.environ.get("TORCHELASTIC_ERROR_FILE")):
                Path(report).write_text(json.dumps({"message": refusal.code, "timestamp": int(time.time())}))
            raise
        except KeyboardInterrupt:  # outside train.py's loop, which ends with a checkpoint
            raise SystemExit("Interrupted.") from None

    return told


def check_launch(accelerator: Accelerator) -> None:
    """Refuses a launch that asked for several processes and got single ones, which would all write the same files."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves an address for others that never come.
    pretended = {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if accelerator.num_processes == 1 and (asked > 1 or pretended):
        raise SystemExit(
            "Several processes were asked for, and each would work on its own. On CPUs launch them with: "
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 SCRIPT ..."
        )


def check_precision(accelerator: Accelerator, asked: str) -> None:
    """Refuses a precision that a launcher was told and train.py was not, and one that this device would not compute in."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", asked):
        raise SystemExit(
            f"The launcher was told the precision {launcher}, and --mixed-precision {asked}, which decides, is another. Give "
            "train.py's option, and leave the launcher's out."
        )
    if asked == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed-precision fp16 is for GPUs: on a CPU it would be float32. Take bf16, or no.")


def check_batch(accelerator: Accelerator, batch_size: int, accumulate: int) -> None:
    """Refuses a batch that cannot be shared out evenly."""
    parts = accelerator.num_processes * accumulate
    if batch_size % parts:
        raise SystemExit(
            f"--batch-size {batch_size} must be a multiple of {parts}: {accelerator.num_processes} processes, "
            f"--accumulate {accumulate}. Then each image weighs the same."
        )


def check_sharding(accelerator: Accelerator, optimizer: str) -> None:
    """With FSDP: refuses what accelerate would do otherwise than asked, and keeps the weights in float32.

    accelerate would cast all of the model to the precision of --mixed-precision, the head and the loss too, in which
    bfloat16 is off by a level; autocast knows better, and is left to the trainer.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise SystemExit(
            "FSDP was asked for: accelerate shards on GPUs alone, and here would keep all of the model in every process. "
            "Leave FSDP out, and launch as train/configs/many-gpus.yaml does, or on CPUs with ACCELERATE_USE_CPU=true torchrun."
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None:
        raise SystemExit("FSDP: only version 2 with NO_WRAP is supported, as in train/configs/fsdp.yaml.")
    if optimizer == "muon":
        raise SystemExit("FSDP: accelerate saves one optimizer, and Muon comes with a second one: --optimizer adamw or paper.")
    plugin.mixed_precision_policy = None


def rank() -> int:
    """This process's number, 0 for the main one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def our_share(items: Sequence) -> Sequence:
    """Of all items those that fall to this process, dealt out in turn; perhaps none. Together the shares hold each item once."""
    return items[rank() :: distributed.get_world_size()] if distributed.is_initialized() else items


def summed(ours: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes, which all call this, on the CPU; by way of `device`, as NCCL knows no other."""
    if not distributed.is_initialized():
        return ours
    everyones = ours.to(device, copy=True)
    distributed.all_reduce(everyones)
    return everyones.cpu()


def whole(weight: Tensor) -> Tensor:
    """All of a weight that FSDP has cut up (a DTensor), for which all processes call this; any other as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # to import DTensor takes a second
