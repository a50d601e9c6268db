"""Trains a preset: python train/train.py --preset tiny --data FOLDER --output DIR --max-steps 200.

Runs on a CPU or on one GPU as it is. OUTPUT/model is the moving average of the weights, which
`ImageTransformer.from_pretrained` reads; OUTPUT/checkpoints holds what a resumed run needs (and, in each, the model folders
raw and ema), OUTPUT/log.jsonl what happened.
"""

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

import data
from checkpoints import Checkpoints
from imtx import PRESETS, ImageTransformer, draw
from imtx.images import save_png, sheet
from likelihood import bits_per_dim, sources_of
from optimization import DECAY_SHARE, Average, batch_indices, optimizers, rate_factor

LABEL_DROPOUT = 0.1  # share of labels replaced by "no class", so that one model learns both


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS))
    parser.add_argument("--data", required=True, help="parquet file, or a folder: its train-* files")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-steps", type=int, help="the budget, in optimizer steps")
    parser.add_argument("--max-minutes", type=float, help="the budget, in minutes of training; whichever ends first")
    parser.add_argument("--validation", type=int, help="hold out the last N training images (2000; faces presets 1000)")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step, over all processes")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoint, validation and sample sheet")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints kept, the last ones; for evaluate.py --average")
    parser.add_argument("--validate-on", type=int, default=200, help="held-out images at each of these (all at the end)")
    parser.add_argument("--resume", metavar="NAME", help='"latest", or the name of a folder in OUTPUT/checkpoints')
    args = parser.parse_args()
    if args.max_steps is None and args.max_minutes is None:
        parser.error("Give a budget: --max-steps, --max-minutes or both.")
    if args.validation is None:
        args.validation = 1000 if args.preset.startswith("faces") else 2000
    above_0 = "max_steps max_minutes batch_size validation learning_rate warmup clip every keep validate_on"
    for name in above_0.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}.")
    if not 0 <= args.ema < 1 or not 0 <= args.weight_decay < math.inf:
        parser.error(f"--ema must be in [0, 1) and --weight-decay at least 0, got {args.ema} and {args.weight_decay}.")
    return args


class Likelihood(nn.Module):
    """-log p of a batch in nats, (N, P): one module, so that it is compiled and wrapped as a whole."""

    def __init__(self, model: ImageTransformer):
        super().__init__()
        self.model = model

    def forward(self, pixels, labels, sources):
        return -self.model.log_prob(pixels, labels, sources)


class Progress:
    """How far a run is; saved with each checkpoint."""

    def __init__(self):
        self.step, self.seconds, self.decaying = 0, 0.0, False  # steps taken, seconds of training, rate on its way down

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def share(self, args: argparse.Namespace) -> float:
        """Of the budget that is used up, 0..1."""
        steps = self.step / args.max_steps if args.max_steps else 0.0
        minutes = self.seconds / 60 / args.max_minutes if args.max_minutes else 0.0
        return min(1.0, max(steps, minutes))


class Run:
    """One training run: the state of it, and what is written to the output folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        set_seed(args.seed)
        self.config = PRESETS[args.preset]
        self.model = ImageTransformer(self.config)
        self.average = Average(self.model, args.ema)
        self.progress = Progress()
        self.likelihood, *self.optimizers = self.accelerator.prepare(
            Likelihood(self.model), *optimizers(self.model, args.learning_rate, args.weight_decay)
        )
        self.average.model.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.progress)
        folder = args.output / "checkpoints"
        self.checkpoints = Checkpoints(folder, self.accelerator, self.model, self.average.model, args.keep)
        if self.accelerator.is_main_process:
            self.claim_output()
        self.accelerator.wait_for_everyone()
        self.compiled = torch.compile(self.likelihood) if args.compile else self.likelihood
        images = data.load(args.data, "train", self.config)
        if args.validation >= len(images):
            raise SystemExit(f"--validation {args.validation} leaves none of the {len(images)} images to train on.")
        self.images, self.held_out = images[: -args.validation], images[-args.validation :]
        data.check_labels(images, self.config.classes, args.data)
        self.bar, self.recent, self.interrupted = None, [], False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)

    def claim_output(self) -> None:
        """Refuses a folder with another run in it, and to resume a run with settings that change what it computes."""
        args, note = self.args, self.args.output / "run.json"
        settings = {name: getattr(args, name) for name in ("preset", "seed", "batch_size", "validation", "flip")}
        try:
            (args.output / "samples").mkdir(parents=True, exist_ok=True)
            if args.resume is None:
                if self.checkpoints.in_use():
                    raise SystemExit(
                        f"{args.output} holds a run already: --resume latest goes on with it, or choose another folder."
                    )
                note.write_text(json.dumps(settings) + "\n")
            self.checkpoints.tidy()
        except OSError as error:
            raise SystemExit(f"{args.output} cannot be written to: {error.strerror}.") from error
        before = json.loads(note.read_text()) if note.exists() else settings
        for name, value in settings.items():
            if before[name] != value:
                raise SystemExit(f"--resume: this run has --{name.replace('_', '-')} {before[name]}, not {value}.")

    def interrupt(self, number: int, _) -> None:
        """Ctrl-C and SIGTERM: the loop ends after the step at work, with a checkpoint; a second one ends at once."""
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL)

    # ---- one step ------------------------------------------------------------------------------------------

    def batch(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """This process's share of the step's images, with labels or sources."""
        args, step = self.args, self.progress.step
        batch = self.images[batch_indices(step, args.batch_size, len(self.images), args.seed)]
        chance = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        if args.flip:
            mirrored = torch.rand(len(batch), generator=chance) < 0.5
            batch.pixels = torch.where(mirrored[:, None, None, None], batch.pixels.flip(2), batch.pixels)
        labels, sources = None, sources_of(batch, self.config.source_size)
        if self.config.classes:
            dropped = torch.rand(len(batch), generator=chance) < LABEL_DROPOUT
            labels = torch.where(dropped, len(self.config.classes), batch.labels)
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return tuple(t if t is None else t[share].to(self.accelerator.device) for t in (batch.pixels, labels, sources))

    def train_step(self) -> torch.Tensor:
        factor = rate_factor(self.progress.step, self.args.warmup, self.progress.share(self.args))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * factor
        nats = self.compiled(*self.batch())
        loss = nats.mean() * nats[0].numel() / (math.log(2) * self.config.sub_pixels)  # bits/dim
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.likelihood.parameters(), self.args.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.model, self.progress.step)
        self.progress.step += 1
        return loss.detach()

    # ---- files ---------------------------------------------------------------------------------------------

    def log(self, **entry) -> None:
        if self.accelerator.is_main_process:
            entry = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **entry}
            with open(self.args.output / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.bar.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))

    def save_checkpoint(self, name: str | None = None) -> None:
        self.report()
        self.checkpoints.save(name or f"step-{self.progress.step:08d}")

    def resume(self) -> None:
        self.checkpoints.load(self.checkpoints.find(self.args.resume))
        self.checkpoints.forget_after(self.progress.step)

    def save_model(self) -> None:
        if self.accelerator.is_main_process:
            self.average.model.save_pretrained(self.args.output / "model")

    def save_sheet(self) -> None:
        """8 samples of the averaged model: a class each, or for super-resolution source, sample and truth in rows."""
        if not self.accelerator.is_main_process:
            return
        model, seeds = self.average.model, range(8)
        if self.config.source_size:
            truth = self.held_out[:8]
            seeds = range(len(truth))
            sources = sources_of(truth, self.config.source_size)
            scale = self.config.image_size // self.config.source_size
            shown = sources.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            pictures = torch.cat([shown, draw(model, seeds, sources=sources), truth.pixels])
        else:
            labels = [i % len(self.config.classes) for i in seeds] if self.config.classes else None
            pictures = draw(model, seeds, labels=labels)
        save_png(sheet(pictures.numpy(), columns=len(seeds), scale=3), self.args.output / "samples" / f"{self.progress.step:08d}.png")

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(self) -> None:
        args, progress = self.args, self.progress
        if args.resume is not None:
            self.resume()
        self.bar = tqdm(total=args.max_steps, initial=progress.step, unit="step", disable=not self.accelerator.is_main_process)
        since = time.time()
        while progress.share(args) < 1:
            if not progress.decaying and progress.share(args) >= 1 - DECAY_SHARE:
                self.save_checkpoint("before-decay")  # a run can be prolonged from here, at the constant rate
                progress.decaying = True
            self.recent.append(self.train_step())
            now = time.time()
            progress.seconds, since = progress.seconds + now - since, now
            self.agree()
            self.bar.update()
            if len(self.recent) == 50:
                self.report()
            if self.interrupted:
                self.save_checkpoint()
                raise SystemExit(f"Interrupted at step {progress.step}. --resume latest goes on from there.")
            if progress.step % args.every == 0 and progress.share(args) < 1:
                self.milestone()
                since = time.time()  # validation and sample sheets are not charged to --max-minutes
        self.bar.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # nothing after the loop waits for the flag

    def agree(self) -> None:
        """All processes go by the main one's clock and stop for a signal that any of them got: else they part ways."""
        if self.accelerator.num_processes == 1:
            return
        seconds = self.progress.seconds if self.accelerator.is_main_process else 0.0
        ours = torch.tensor([seconds, self.interrupted], dtype=torch.float64, device=self.accelerator.device)
        self.progress.seconds, signals = self.accelerator.reduce(ours, "sum").tolist()
        self.interrupted = signals > 0

    def report(self) -> None:
        """Logs the loss since the last report. Called before anything is saved: no NaN gets into a checkpoint."""
        if not self.recent:
            return
        loss = torch.stack(self.recent).mean().item()
        if not math.isfinite(loss):
            raise SystemExit(f"The loss is {loss} by step {self.progress.step}. Resume with a lower --learning-rate.")
        rate = self.progress.step * self.args.batch_size / max(self.progress.seconds, 1e-9)
        self.bar.set_postfix_str(f"{loss:.3f} bits/dim, {rate:.1f} images/s")
        self.log(bits_per_dim=loss)
        self.recent = []

    def milestone(self) -> None:
        self.save_checkpoint()
        self.log(validation_bits_per_dim=bits_per_dim(self.average.model, self.held_out[: self.args.validate_on]))
        self.save_model()
        self.save_sheet()

    def finish(self) -> dict:
        self.save_checkpoint()
        self.save_model()
        self.save_sheet()
        # Last, as it takes longest.
        validation = bits_per_dim(self.average.model, self.held_out)
        self.log(validation_bits_per_dim=validation, images=len(self.held_out))
        return {
            "num_processes": self.accelerator.num_processes,
            "steps": self.progress.step,
            "bits_per_dim": validation,
            "output": str(self.args.output / "model"),
        }


def main() -> None:
    run = Run(arguments())
    run.train()
    result = run.finish()
    if run.accelerator.is_main_process:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
