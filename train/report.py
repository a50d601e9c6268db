"""What a run says about itself: a progress bar, OUTPUT/log.jsonl, accelerate's trackers, and sheets of samples."""

import datetime
import importlib.util
import json
from functools import wraps
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from data import Images
from files import write_whole
from imtx import ImageTransformer, draw
from imtx.costs import forward_flops, matmul_rate
from imtx.images import save_png, sheet
from likelihood import sources_of
from publishing.records import LOG, log_up_to

LOSSES_A_LINE, SECONDS_A_LINE = 50, 10  # between two lines of the log, and two texts of the bar: whichever is first
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_tracker(name: str | None) -> None:
    """accelerate only warns of a tracker whose package is missing, and logs nothing: here it is an error."""
    if name == "tensorboard" and not any(importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX")):
        raise SystemExit("--track tensorboard: the package is not installed. pip install tensorboard")


def in_a_sentence(method):
    """A method of a Run that writes files: a full disk and the like end it with SystemExit and a sentence.

    On this process; of several, the launcher ends the others.
    """

    @wraps(method)
    def told(run):
        try:
            return method(run)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
        except KeyboardInterrupt:  # in the last validation; the loop ends with a checkpoint
            raise SystemExit(f"Interrupted. --resume latest goes on from the last checkpoint in {run.args.output}.") from None
        except RuntimeError as error:
            if "inline_container" not in str(error):  # which is where torch.save cannot write
                raise
            reason = "torch.save failed, the disk may be full"
        advice = "There is no checkpoint in it yet: leave --resume out to begin anew."
        if run.checkpoints.last is not None:
            advice = "Checkpoints in it are whole: --resume latest goes on from the last one."
        raise SystemExit(f"{run.args.output} cannot be written to: {reason}. {advice}")

    return told


class Report:
    """All processes call its methods; the main one alone shows and writes.

    MFU, model FLOPs utilisation: FLOPs of the model's matrix products a second, a training step's being three times a
    forward's, over the rate at which this device multiplies large matrices in the run's precision, measured at the start.
    """

    def __init__(self, output: Path, accelerator: Accelerator, model: ImageTransformer, precision: str, batch_size: int):
        self.output, self.accelerator, self.batch_size = output, accelerator, batch_size
        self.flops = 3 * forward_flops(model)  # an image
        self.peak = matmul_rate(accelerator.device, DTYPES[precision]) * accelerator.num_processes
        self.bar, self.losses = None, []
        self.since = (0, 0.0, 0.0)  # step, seconds and share of the budget at the last report

    def begin(self, step: int, seconds: float, share: float, steps: int | None) -> None:
        main = self.accelerator.is_main_process
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not main, bar_format="{n_fmt}/{total_fmt} steps{postfix}")
        self.since = (step, seconds, share)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @staticmethod
    def forget_after(output: Path, step: int) -> None:
        """Log and sheets of a run that goes on from there, as it comes to the later steps once more. For the main process."""
        if (log := output / LOG).exists():
            write_whole(log, log_up_to(log, step))
        for sheet_file in output.glob("samples/*.png"):
            if sheet_file.stem.isdigit() and int(sheet_file.stem) > step:
                sheet_file.unlink()

    def step(self, loss: torch.Tensor) -> None:
        """loss: bits/dim of this process's share of the step, not yet waited for."""
        self.losses.append(loss)
        self.bar.update()

    def due(self, seconds: float) -> bool:
        """Whether it is time for another line, at so many seconds of training; the same for all processes."""
        return len(self.losses) == LOSSES_A_LINE or seconds - self.since[1] >= SECONDS_A_LINE

    def losses_to(self, step: int, seconds: float, share: float) -> int | None:
        """Logs the mean loss and the speed since the last report.

        share: of the budget that is used up. Returns the first step whose loss is no number, and then logs nothing.
        """
        if not self.losses:
            return None
        losses = self.accelerator.reduce(torch.stack(self.losses), "mean")
        if wrong := (~losses.isfinite()).nonzero().flatten().tolist():
            return self.since[0] + wrong[0] + 1
        loss = losses.mean().item()
        steps, passed = step - self.since[0], seconds - self.since[1]
        if not passed:  # the first step of a run that compiles, whose time says nothing
            self.bar.set_postfix_str(f"{loss:.3f} bits/dim, compiled")
            self.log(step, seconds, bits_per_dim=loss)
            self.losses, self.since = [], (step, seconds, share)
            return None
        rate = steps * self.batch_size / passed  # images a second, over all processes
        # At the recent pace: a run that was stopped may go on at another one.
        left = datetime.timedelta(seconds=round(passed * (1 - share) / max(share - self.since[2], 1e-9)))
        mfu = rate * self.flops / self.peak
        self.bar.set_postfix_str(f"{loss:.3f} bits/dim, {rate:.1f} images/s, MFU {mfu:.1%}, {left} left")
        self.log(step, seconds, bits_per_dim=loss, images_per_second=round(rate, 1), mfu=round(mfu, 4))
        self.losses, self.since = [], (step, seconds, share)
        return None

    def log(self, step: int, seconds: float, **entry) -> None:
        """A line of log.jsonl, a line above the bar, and numbers for the trackers."""
        self.accelerator.log({name: value for name, value in entry.items() if isinstance(value, (int, float))}, step=step)
        if self.accelerator.is_main_process:
            entry = {"step": step, "seconds": round(seconds, 1), **entry}
            with open(self.output / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.bar.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))

    def samples(self, step: int, model: ImageTransformer, held_out: Images) -> None:
        """8 samples with seeds 0..7: a class each, or for super-resolution source, sample and truth in rows."""
        if not self.accelerator.is_main_process:
            return
        config, seeds = model.config, range(8)
        if config.source_size:
            truth = held_out[:8]
            seeds = range(len(truth))
            sources = sources_of(truth, config.source_size)
            scale = config.image_size // config.source_size
            shown = sources.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            pictures = torch.cat([shown, draw(model, seeds, sources=sources), truth.pixels])
        else:
            labels = [i % len(config.classes) for i in seeds] if config.classes else None
            pictures = draw(model, seeds, labels=labels)
        save_png(sheet(pictures.numpy(), columns=len(seeds), scale=3), self.output / "samples" / f"{step:08d}.png")
