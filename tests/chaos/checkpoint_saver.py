"""A process that saves checkpoints as fast as it can, to be killed; started by test_training_faults.

Every line on standard input is a folder: a fresh child resumes there and saves step after step until it is killed. A child
says its process id first, and each step once its save has returned. Children are forked, so that a try costs no imports.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from brainsynth.training.checkpoint import restore_newest, save_checkpoint
from brainsynth.training.ema import Ema
from brainsynth.training.state import TrainingState

KEEP, DIGEST = 2, "some config"


def make_state(width: int = 512) -> TrainingState:
    """A network, its average and an optimizer that has run: 16 bytes a parameter, 4 MB of them by default."""
    network = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, width)).sum().backward()
    optimizer.step()
    return TrainingState({"network": network}, {"network": Ema(network, 0.9)}, {"network": optimizer})


def fill(state: TrainingState, step: int) -> None:
    """Make every number of the state a function of the step."""
    live = [*state.modules["network"].state_dict().values(), *state.averages["network"].state().values()]
    for slots in state.optimizers["network"].state.values():
        live += [slots[name] for name in sorted(slots)]  # they come back in another order
    for index, tensor in enumerate(live):
        tensor.copy_((torch.arange(tensor.numel()) % 97 + index + 1000 * step).reshape(tensor.shape))
    state.averages["network"].updates = step


def save_forever(folder: Path, state: TrainingState) -> None:
    """Resume, then save step after step."""
    step = restore_newest(folder, state, DIGEST)
    while True:
        step += 1
        fill(state, step)
        save_checkpoint(folder, state, step, DIGEST, KEEP)
        os.write(1, f"saved {step}\n".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    fresh = make_state()
    for text in sys.stdin:
        child = os.fork()
        if not child:
            os.write(1, f"child {os.getpid()}\n".encode())
            save_forever(Path(text.strip()), fresh)
        os.waitpid(child, 0)
        os.write(1, b"gone\n")
