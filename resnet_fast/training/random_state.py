"""The global random states of Python, NumPy and torch, as values that `torch.load(weights_only=True)` accepts.

seed_everything(seed); states = random_states(device); restore_random_states(states, device)
"""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed the global random states, with another seed for each rank."""
    if rank:
        seed = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the global states, with the GPU's if `device` is one."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        # torch 2.11 has no random operations on uint32, but int64 holds each of the 624 words.
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the global states, with the GPU's if it was saved and `device` is one."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
