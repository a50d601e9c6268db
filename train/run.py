"""One training run: its state, its steps, and when it writes what."""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from filelock import FileLock, Timeout

import data
from checkpoints import Checkpoints
from files import check_writable, write_whole
from imtx import ImageTransformer
from interruption import Interruption
from likelihood import Likelihood, bits_per_dim, sources_of
from memory import keep_freed_memory
from optimization import DECAY_SHARE, Average, batch_indices, optimizers, rate_factor
from processes import check_batch, check_launch, check_precision, check_sharding
from progress import Progress
from publishing import provenance
from publishing.records import LOG, RECORD, RUN, Training
from report import Report, in_a_sentence, require_tracker
from start import CHANGEABLE, SETTINGS, Start, changes, check_data, check_settings, commands, noted

LABEL_DROPOUT = 0.1  # share of labels replaced by "no class", so that one model learns both
LOOKED_AT = 8  # held-out images that averaged weights must have a likelihood for, before they are saved


class Run:
    """One training run: the state of it, and what is written to the output folder."""

    def __init__(self, args: argparse.Namespace):
        """All that can be refused is refused before the output folder is touched, and what takes long comes last."""
        self.args, self.commit = args, provenance.commit()
        self.launch()
        before = noted(args.output) if args.resume is not None else {}  # what the run that goes on began with
        if args.validation is None:
            args.validation = before.get("validation")
        check_settings(args, before)
        self.commands, self.changes = commands(before), changes(args, before)
        self.noted = False  # whether OUTPUT/run.json tells of this command
        set_seed(args.seed)
        self.start = Start.of(args, before)
        self.read_data(before)
        self.build()
        folder = args.output / "checkpoints"
        self.checkpoints = Checkpoints(folder, self.accelerator, self.model, self.average.model, args.keep)
        if self.accelerator.is_main_process:
            self.claim_output()
        self.accelerator.wait_for_everyone()
        self.report = Report(args.output, self.accelerator, self.average.model, args.mixed_precision, args.batch_size)
        self.interruption = Interruption(tells=self.accelerator.is_main_process)
        self.interruption.listen()

    def launch(self) -> None:
        """The processes, and whether they are what was meant."""
        args = self.args
        keep_freed_memory()
        require_tracker(args.track)
        project = ProjectConfiguration(project_dir=str(args.output), logging_dir=str(args.output))
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=args.track, project_config=project)
        check_launch(self.accelerator)
        check_precision(self.accelerator, args.mixed_precision)
        check_sharding(self.accelerator, args.optimizer)
        check_batch(self.accelerator, args.batch_size, args.accumulate)
        if self.accelerator.is_main_process:
            check_writable(args.output)  # better now than after decoding

    def read_data(self, before: dict) -> None:
        """The images, those held out, and the model's configuration with their classes."""
        args = self.args
        if data.lies_among_pictures(args.output, args.data):
            raise SystemExit(f"--output: {args.output} lies in --data, where its sheets would be pictures to train on.")
        images = data.load(args.data, args.split, self.start.config, **data.options(args))
        self.config = data.with_classes(self.start.config, images, fresh=args.preset is not None)
        # The names that the data's labels stand for; the model's classes may be in another order.
        self.labels = None if images.labels is None else list(images.classes or self.config.classes)
        compared = not before or before.get("data_checksum")  # a run that began without one gets none
        self.checksum = images.checksum() if compared else None
        check_data(args, before, self.labels, len(images), self.checksum)
        images = data.match_labels(images, self.config.classes, args.data)
        if args.validation is None:
            most = 1000 if args.preset and args.preset.startswith("faces") else 2000
            args.validation = data.validation_size(len(images), most)
        self.images, self.held_out = data.hold_out(images, args.validation)

    def build(self) -> None:
        """Model, average, optimizers, and all of it as accelerate wants it."""
        args = self.args
        self.model = ImageTransformer(self.config)
        self.start.into(self.model)
        self.average = Average(self.model, args.ema)
        self.progress = Progress()
        self.likelihood, *self.optimizers = self.accelerator.prepare(
            Likelihood(self.model), *optimizers(self.model, args.optimizer, args.learning_rate, args.weight_decay)
        )
        self.average.model.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.progress)
        self.compiled = torch.compile(self.likelihood) if args.compile else self.likelihood

    def claim_output(self) -> None:
        """Refuses a folder with another run in it, notes what a new one begins with, and clears up after a killed one."""
        args = self.args
        if args.resume is None and self.checkpoints.in_use():
            raise SystemExit(
                f"{args.output} holds a run already: --resume latest goes on with it, or choose another folder for --output."
            )
        if args.resume is not None and not self.checkpoints.in_use():
            self.checkpoints.find(args.resume)  # says so, and makes no folder
        try:
            (args.output / "samples").mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(args.output / ".lock")  # the system unlocks it when this process is gone, however it ends
            self.lock.acquire(timeout=0)
            if args.resume is None:
                Report.forget_after(args.output, 0)  # what a run wrote that ended before its first checkpoint
                self.note()
            self.checkpoints.tidy()
        except Timeout as error:
            raise SystemExit(f"{args.output}: another process trains there. Wait for its end, or choose another folder.") from error
        except OSError as error:
            raise SystemExit(f"{args.output} cannot be written to: {error.strerror}. Choose another folder.") from error

    def note(self) -> None:
        """OUTPUT/run.json: what a resumed run goes by."""
        note = {name: getattr(self.args, name) for name in (*SETTINGS, *CHANGEABLE)}
        note |= {"labels": self.labels, "images": len(self.images) + len(self.held_out), "data_checksum": self.checksum}
        note |= {"init_licence": self.start.licence, "commands": self.commands}
        write_whole(self.args.output / RUN, json.dumps(note) + "\n")
        self.noted = True

    # ---- one step ------------------------------------------------------------------------------------------

    def batch(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """This process's share of the step's images: pixels (n, h, w, 3), labels (n,) and sources (n, s, s, 3), or None."""
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
        """One optimizer step; this process's loss in bits/dim, (), on the device."""
        args = self.args
        factor = rate_factor(args.schedule, self.progress.step, args.warmup, self.progress.share(args))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
        images, loss = self.batch(), torch.zeros((), device=self.accelerator.device)
        parts = [tuple(None if t is None else t[i :: args.accumulate] for t in images) for i in range(args.accumulate)]
        for i, part in enumerate(parts):
            # Gradients are shared out among the processes once, with the last part.
            sync = nullcontext() if i + 1 == len(parts) else self.accelerator.no_sync(self.likelihood)
            with sync:
                with self.accelerator.autocast():  # accelerate puts it into the forward by itself, but for FSDP
                    nats = self.compiled(*part)
                bits = nats.mean() * nats[0].numel() / (math.log(2) * self.config.sub_pixels) / len(parts)  # bits/dim
                self.accelerator.backward(bits)
            loss += bits.detach()
        self.accelerator.clip_grad_norm_(self.likelihood.parameters(), args.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.model, self.progress.step)
        self.progress.step += 1
        return loss

    # ---- files ---------------------------------------------------------------------------------------------

    def log(self, **entry) -> None:
        self.report.log(self.progress.step, self.progress.seconds, **entry)

    def log_losses(self) -> None:
        wrong = self.report.losses_to(self.progress.step, self.progress.seconds, self.progress.share(self.args))
        if wrong is not None:
            self.diverged(f"The loss of step {wrong:,} is no number.")

    def check_weights(self) -> None:
        """Before anything is saved: weights may be spoilt although the step that made them had a loss. All processes call."""
        first = tuple(None if t is None else t[:: self.args.accumulate] for t in self.batch())  # of the step to come
        self.likelihood.eval()
        with torch.no_grad(), self.accelerator.autocast():
            loss = self.accelerator.reduce(self.likelihood(*first).mean(), "mean").item()
        self.likelihood.train()
        if not math.isfinite(loss + bits_per_dim(self.average.model, self.held_out[:LOOKED_AT])):
            self.diverged(f"After step {self.progress.step:,} the model has no likelihood that is a number.")

    def diverged(self, told: str) -> None:
        """Ends the run."""
        there = self.checkpoints.in_order()
        after = "There is no checkpoint yet: begin anew"
        if there:
            after = f"The last good checkpoint is {there[-1].name}: go on from it, --resume {there[-1].name},"
        raise SystemExit(f"{told} {after} with a lower --learning-rate.")

    def save_checkpoint(self, name: str | None = None) -> None:
        self.log_losses()
        self.check_weights()
        if self.accelerator.is_main_process and not self.noted:
            self.note()  # of a run that goes on: had it diverged, it would have done nothing to the weights
        self.progress.told = self.facts()
        self.checkpoints.save(name or f"step-{self.progress.step:08d}")

    def resume(self) -> None:
        """Raises SystemExit, before anything is changed, if the run has ended and its budget is not larger by now."""
        args, progress = self.args, self.progress
        self.checkpoints.load(self.checkpoints.find(args.resume))
        if args.max_steps is not None and progress.step > args.max_steps:
            raise SystemExit(f"--max-steps {args.max_steps:,}: this run has taken {progress.step:,} already. Raise it.")
        share = progress.share(args)
        if share == 1 and (args.output / RECORD).exists():  # without: killed in its last validation, which comes once more
            constant = "; --resume before-decay then goes on at the constant rate" * (args.schedule == "constant")
            raise SystemExit(
                f"--resume {args.resume}: the budget is spent, {progress.step:,} steps and {progress.seconds / 60:.1f} minutes. "
                f"To prolong the run, raise --max-steps or --max-minutes{constant}."
            )
        progress.decaying = progress.decaying and share >= 1 - DECAY_SHARE  # no longer, with a larger budget
        if self.accelerator.is_main_process:
            kept = (RUN, RECORD, "model", LOG, "samples", *filter(None, [args.track]))
            self.checkpoints.set_aside_after(progress.step, kept, ended=(args.output / RECORD).exists())
            Report.forget_after(args.output, progress.step)
            print(*self.changes, sep="\n", end="\n" * bool(self.changes), file=sys.stderr)

    def save_model(self) -> None:
        if self.accelerator.is_main_process:
            self.average.model.save_pretrained(self.args.output / "model")

    # ---- the loop ------------------------------------------------------------------------------------------

    @in_a_sentence
    def train(self) -> None:
        try:
            self.loop()
        finally:
            self.report.close()  # what is said at the end begins on a line of its own
        self.interruption.stop_listening()  # nothing after the loop looks at what was heard

    def loop(self) -> None:
        args, progress = self.args, self.progress
        if args.resume is not None:
            self.resume()
        else:
            set_seed(args.seed, device_specific=True)  # weights are the same in all processes, dropout is not
        if args.track:  # what tensorboard has of later steps belongs to the run that is set aside
            self.accelerator.init_trackers(args.track, init_kwargs={args.track: {"purge_step": progress.step + 1}})
        if self.accelerator.is_main_process:
            for folder in (args.output, args.output / "model"):  # of an earlier end of this run, which does go on now
                (folder / RECORD).unlink(missing_ok=True)
        self.report.begin(progress.step, progress.seconds, progress.share(args), args.max_steps)
        since, compiling = time.monotonic(), args.compile  # in the first step, whose time is not charged to --max-minutes
        while progress.share(args) < 1:
            if args.schedule == "constant" and not progress.decaying and progress.share(args) >= 1 - DECAY_SHARE:
                self.save_checkpoint("before-decay")  # a run can be prolonged from here, at the constant rate
                progress.decaying = True
            self.report.step(self.train_step())
            now = time.monotonic()
            progress.seconds += 0.0 if compiling else now - since
            ends = self.agree()
            if compiling or self.report.due(progress.seconds):
                self.log_losses()
            since, compiling = time.monotonic() if compiling else now, False
            if ends:
                self.save_checkpoint()
                raise SystemExit(f"Interrupted at step {progress.step}. --resume latest goes on from there.")
            if progress.step % args.every == 0 and progress.share(args) < 1:
                self.milestone()
                since = time.monotonic()  # validation and sample sheets are not charged to --max-minutes
        self.log_losses()

    def agree(self) -> bool:
        """All processes go by the main one's clock and stop for a signal that any of them got, which is handed back: else
        they part ways. One that comes meanwhile waits for the next step."""
        if self.accelerator.num_processes == 1:
            return self.interruption.heard
        seconds = self.progress.seconds if self.accelerator.is_main_process else 0.0
        ours = torch.tensor([seconds, self.interruption.heard], dtype=torch.float64, device=self.accelerator.device)
        self.progress.seconds, signals = self.accelerator.reduce(ours, "sum").tolist()
        return signals > 0

    def milestone(self) -> None:
        self.log_losses()
        validation = bits_per_dim(self.average.model, self.held_out[: self.args.validate_on])
        if not math.isfinite(validation):
            self.diverged(f"After step {self.progress.step:,} validation gives {validation}.")
        self.progress.curve.append([self.progress.step, validation])
        self.log(validation_bits_per_dim=validation)  # before: killed in between, a run that goes on comes here once more
        self.save_checkpoint()
        self.save_model()
        self.report.samples(self.progress.step, self.average.model, self.held_out)

    @in_a_sentence
    def finish(self) -> dict:
        self.save_checkpoint()
        self.save_model()
        self.report.samples(self.progress.step, self.average.model, self.held_out)
        # Last, as it takes longest.
        validation = bits_per_dim(self.average.model, self.held_out)
        self.log(validation_bits_per_dim=validation, images=len(self.held_out))
        if self.accelerator.is_main_process:
            self.save_record(validation)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return {
            "num_processes": self.accelerator.num_processes,
            "steps": self.progress.step,
            "bits_per_dim": validation,
            "output": str(self.args.output / "model"),
        }

    def facts(self) -> dict[str, str | None]:
        """Fields of `Training` that another command, on another machine, may change when the run goes on."""
        hardware = provenance.hardware(self.accelerator.device, self.accelerator.num_processes)
        return {
            "command": " && ".join(self.commands), "hardware": hardware, "precision": self.args.mixed_precision,
            "commit": self.commit,
        }

    def save_record(self, validation: float) -> None:
        args, progress = self.args, self.progress
        record = Training(
            **self.facts(), preset=args.preset, init=args.init, init_licence=self.start.licence,
            data=args.data, data_checksum=self.checksum, images=len(self.images), steps=progress.step, batch_size=args.batch_size,
            images_seen=progress.step * args.batch_size, seed=args.seed,
            minutes=progress.seconds / 60, validation_bits_per_dim=validation, validation_images=len(self.held_out),
            curve=progress.curve,
        )
        for folder in (args.output / "model", args.output):  # in this order: with the second one the run has ended
            record.save(folder / RECORD)
