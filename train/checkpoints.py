"""The folders that a training run can be resumed from, each complete under its name or not there.

    step-00001000/raw, step-00001000/ema   the trained weights and their moving average: ordinary model folders, in float32
    step-00001000/*                        accelerate's: optimizers, random states of each process, progress, fp16's scaler;
                                           under FSDP the weights once more, which it insists on
    step-00001000/files.json               size and checksum of each file, written last: what a disk has lost since is noticed
    before-decay/                          the same, of the step at which the rate began to fall

Those that came after the one that a run went on from are in OUTPUT/former-N/checkpoints.
"""

import copy
import itertools
import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed

from averaging import difference, open_model
from files import part
from imtx import ImageTransformer
from processes import whole
from publishing.origins import PROGRESS

FILES = "files.json"


class Checkpoints:
    """All processes call `save` and `load`; the main one alone writes weights, renames and removes."""

    def __init__(self, folder: Path, accelerator: Accelerator, raw: ImageTransformer, ema: ImageTransformer, kept: int):
        self.folder, self.accelerator, self.kept = folder, accelerator, kept
        self.last: str | None = None  # the name of the one that was saved or loaded last
        self.models = {"raw": raw, "ema": ema}
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def after(self, step: int) -> list[Path]:
        """Those of later steps, damaged ones too, whose step is in their name."""
        whole = [folder for folder in self.in_order() if step_of(folder) > step]
        return whole + [folder for folder in self.steps() if damage(folder) and int(folder.name.split("-")[1]) > step]

    def in_order(self) -> list[Path]:
        """All that there is to resume from, undamaged, the last one last."""
        found = (file.parent for file in self.folder.glob(f"[!.]*/{PROGRESS}"))
        return sorted((folder for folder in found if not damage(folder)), key=lambda folder: (step_of(folder), folder.name))

    def in_use(self) -> bool:
        """Whether there is something to resume from, be it only after `tidy`."""
        return any(self.folder.glob("[!.]*")) or any(self.folder.glob(".*.old"))

    def tidy(self) -> None:
        """Clears up after a run that was killed while it wrote, moved or removed something. For the main process alone."""
        for aside in self.folder.glob(".*.old"):  # killed between the two renames of `save`
            final = self.folder / aside.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(aside, final)
        for kind in ("step-*", "before-decay*"):
            for rest in self.folder.glob(f".{kind}"):
                shutil.rmtree(rest)
        model = self.folder.with_name("model")
        for rest in model.parent.glob(".model-*"):  # where `save_pretrained` keeps the new model and then the old one
            if (rest / "old").exists() and not model.exists():  # killed between its two renames
                os.replace(rest / "new", model)
            shutil.rmtree(rest)
        for rest in model.parent.glob(".former-*"):
            shutil.rmtree(rest)  # copies

    def save(self, name: str) -> None:
        """Everything that a resumed run needs, and at most `kept` folders of steps."""
        final, temporary, aside = self.folder / name, self.folder / f".{name}.part", self.folder / f".{name}.old"
        self.accelerator.save_state(str(temporary))  # the folder is new: `tidy` saw to that
        self.accelerator.wait_for_everyone()  # each process writes random states of its own
        if self.accelerator.is_main_process:
            seal(temporary)
            if final.exists():  # of a run that was prolonged: it stays until the new one has its name
                os.replace(final, aside)
                os.replace(temporary, final)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, final)
            for old in [folder for folder in self.steps() if not damage(folder)][: -self.kept]:
                self._remove(old)
        self.last = name

    def find(self, name: str) -> Path:
        """The folder of that name, "latest" for the last one. Raises SystemExit with a sentence if there is none.

        Nothing damaged is passed over: it may be the latest.
        """
        for folder in self.folder.glob("[!.]*"):
            if name in ("latest", folder.name):
                self._refuse_damaged(folder, name)
        there = self.in_order()
        if not there:
            raise SystemExit(f"--resume {name}: {self.folder} holds no checkpoint yet. Leave --resume out to begin.")
        chosen = there[-1] if name == "latest" else self.folder / name
        if chosen not in there:
            names = ", ".join(folder.name for folder in there)
            raise SystemExit(f"--resume: there is no checkpoint {self.folder / name}; there are {names}.")
        self._refuse_damaged(chosen, name, contents=True)
        return chosen

    def _refuse_damaged(self, folder: Path, name: str, contents: bool = False) -> None:
        if wrong := damage(folder, contents):
            others = ", ".join(other.name for other in self.in_order() if other != folder) or "nothing"
            raise SystemExit(f"--resume {name}: {folder} is damaged: {wrong}. Remove that folder. Whole is: {others}.")

    def load(self, folder: Path) -> None:
        """Puts weights, optimizers and progress back, bit for bit, and the random states of the processes that there were."""
        self.last = folder.name
        sharded = any(folder.glob("pytorch_model_fsdp*"))
        if sharded != (self.accelerator.distributed_type == DistributedType.FSDP):
            raise SystemExit(f"--resume: {folder} was saved {'with' if sharded else 'without'} FSDP, go on with it likewise.")
        saved = {name: open_model(folder / name) for name in self.models}
        for name, model in self.models.items():
            if found := difference(saved[name].config, model.config):
                field, there, here = found
                raise SystemExit(f"--resume: {field} is {there!r} in {folder / name} and {here!r} in the preset by now.")
        number = self.accelerator.process_index
        if not (folder / f"random_states_{number}.pkl").exists():  # of which accelerate would say nothing
            set_seed(number)  # more processes than there were: dropout is all that this is for
        self.accelerator.load_state(str(folder))
        for name, model in self.models.items():
            if name == "ema" or not sharded:  # cut-up weights accelerate has put back itself
                model.load_state_dict(saved[name].state_dict())

    def set_aside_after(self, step: int, copied: Sequence[str], ended: bool) -> None:
        """Keeps the future of a run that now takes another way, which "latest" must not find, as a run of its own.

        copied: names in OUTPUT of what belongs to that one too. ended: it had come to its end, which is kept even if the run
        goes on from there. For the main process alone. If it is killed, what has not been moved yet is where it was, the
        last one too.
        """
        later = self.after(step)
        if not later and not ended:
            return
        output = self.folder.parent
        former = next(f for n in itertools.count(1) if not (f := output / f"former-{n}").exists())
        (part(former) / "checkpoints").mkdir(parents=True)
        sources = [output / name for name in copied]
        if not later:
            sources.append(self.in_order()[-1])  # which this run goes on from as well
        for source in filter(Path.exists, sources):
            target = part(former) / source.relative_to(output)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        os.replace(part(former), former)
        for folder in later:
            os.replace(folder, former / "checkpoints" / folder.name)
        had = f"had after step {step:,}" if later else "was at its end"
        print(f"What this run {had} is kept in {former}, which you may delete.", file=sys.stderr)

    def _remove(self, folder: Path) -> None:
        gone = folder.with_name(f".{folder.name}.gone")  # first, as half a checkpoint must not be found under its name
        os.replace(folder, gone)
        shutil.rmtree(gone)

    def _save_weights(self, wrapped: list, weights: list[dict], folder: str) -> None:
        """accelerate's hook before it saves: it writes the state dicts left in `weights`, to a file of its own."""
        weights.clear()
        for name, model in self.models.items():
            state = {key: whole(weight) for key, weight in model.state_dict().items()}  # a gathering, under FSDP
            if self.accelerator.is_main_process:
                plain = copy.deepcopy(self.models["ema"])
                plain.load_state_dict(state)
                plain.save_pretrained(Path(folder) / name)

    def _load_weights(self, wrapped: list, folder: str) -> None:
        """accelerate's hook before it loads: it fills the modules left in `wrapped`."""
        wrapped.clear()


def seal(folder: Path) -> None:
    """Notes size and checksum of each file, and has all of them on the disk before this returns. Raises OSError."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    notes = {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": checksum(file)} for file in files}
    (folder / FILES).write_text(json.dumps(notes, indent=2) + "\n")
    for file in (*files, folder / FILES):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def checksum(file: Path) -> int:
    found = 0
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            found = zlib.crc32(piece, found)
    return found


def damage(checkpoint: Path, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, with `contents` by all that is in them; None: nothing, or it is older than FILES."""
    if not (checkpoint / FILES).exists():
        return None
    try:
        notes = json.loads((checkpoint / FILES).read_text())
    except ValueError:
        return f"{FILES} cannot be read"
    for name, note in notes.items():
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != note["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes in place of {note['bytes']:,}"
        if contents and checksum(file) != note["crc32"]:
            return f"{name} does not hold what was written to it"
    return None


def step_of(checkpoint: Path) -> int:
    """How many steps were taken before it was saved."""
    return torch.load(checkpoint / PROGRESS, weights_only=True)["step"]
