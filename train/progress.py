"""How far a training run is: what a checkpoint keeps of it beside weights, optimizers and random states."""

import argparse


class Progress:
    """How far a run is; saved with each checkpoint."""

    def __init__(self):
        self.step, self.seconds, self.decaying = 0, 0.0, False  # steps taken, seconds of training, rate on its way down
        self.curve = []  # [step, bits/dim of the first held-out images] at each milestone
        self.told = {}  # of the run up to here: `Run.facts`

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def share(self, args: argparse.Namespace) -> float:
        """Of the budget that is used up, 0..1."""
        steps = self.step / args.max_steps if args.max_steps else 0.0
        minutes = self.seconds / 60 / args.max_minutes if args.max_minutes else 0.0
        return min(1.0, max(steps, minutes))
