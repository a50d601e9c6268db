"""The folders that a training run can be resumed from, each complete under its name or not there.

    step-00001000/raw, step-00001000/ema   the trained weights and their moving average: ordinary model folders, in float32
    step-00001000/*                        accelerate's: optimizers, random states of each process, progress, fp16's scaler
    before-decay/                          the same, of the step at which the rate began to fall
"""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from averaging import difference, open_model
from imtx import ImageTransformer


class Checkpoints:
    """All processes call `save` and `load`; the main one alone writes weights, renames and removes."""

    def __init__(self, folder: Path, accelerator: Accelerator, raw: ImageTransformer, ema: ImageTransformer, kept: int):
        self.folder, self.accelerator, self.kept = folder, accelerator, kept
        self.models = {"raw": raw, "ema": ema}
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def in_use(self) -> bool:
        """Whether there is something to resume from, be it only after `tidy`."""
        return any(self.folder.glob("[!.]*")) or any(self.folder.glob(".*.old"))

    def tidy(self) -> None:
        """Clears up after a run that was killed while it wrote or removed a checkpoint. For the main process alone."""
        for aside in self.folder.glob(".*.old"):  # killed between the two renames of `save`
            final = self.folder / aside.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(aside, final)
        for kind in ("step-*", "before-decay*"):
            for rest in self.folder.glob(f".{kind}"):
                shutil.rmtree(rest)

    def save(self, name: str) -> None:
        """Everything that a resumed run needs, and at most `kept` folders of steps."""
        final, temporary, aside = self.folder / name, self.folder / f".{name}.part", self.folder / f".{name}.old"
        self.accelerator.save_state(str(temporary))  # the folder is new: `tidy` saw to that
        self.accelerator.wait_for_everyone()  # each process writes random states of its own
        if self.accelerator.is_main_process:
            if final.exists():  # of a run that was prolonged: it stays until the new one has its name
                os.replace(final, aside)
                os.replace(temporary, final)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, final)
            for old in self.steps()[: -self.kept]:
                self._remove(old)

    def find(self, name: str) -> Path:
        """The folder of that name, "latest" for the last step. Raises SystemExit with a sentence if there is none."""
        if name == "latest":
            if not self.steps():
                raise SystemExit(f"--resume latest: {self.folder} holds no checkpoint yet.")
            return self.steps()[-1]
        if not name or not (self.folder / name).is_dir():
            raise SystemExit(f"--resume: there is no checkpoint {self.folder / name}.")
        return self.folder / name

    def load(self, folder: Path) -> None:
        """Puts weights, optimizers, random states and progress back, bit for bit."""
        self.accelerator.load_state(str(folder))

    def forget_after(self, step: int) -> None:
        """Removes the future of a run that now takes another way; "latest" must not find it."""
        if self.accelerator.is_main_process:
            for later in self.steps():
                if int(later.name.removeprefix("step-")) > step:
                    self._remove(later)

    def _remove(self, folder: Path) -> None:
        gone = folder.with_name(f".{folder.name}.gone")  # first, as half a checkpoint must not be found under its name
        os.replace(folder, gone)
        shutil.rmtree(gone)

    def _save_weights(self, wrapped: list, weights: list[dict], folder: str) -> None:
        """accelerate's hook before it saves: it writes the state dicts left in `weights`, to a file of its own."""
        weights.clear()
        if self.accelerator.is_main_process:
            for name, model in self.models.items():
                model.save_pretrained(Path(folder) / name)

    def _load_weights(self, wrapped: list, folder: str) -> None:
        """accelerate's hook before it loads: it fills the modules left in `wrapped`. Random states come after this."""
        wrapped.clear()
        for name, model in self.models.items():
            saved = open_model(Path(folder) / name)
            if found := difference(saved.config, model.config):
                field, there, here = found
                raise SystemExit(f"--resume: {field} is {there!r} in {folder} and {here!r} in the preset by now.")
            model.load_state_dict(saved.state_dict())
