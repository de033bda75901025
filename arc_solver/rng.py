"""Randomness by name: what is drawn depends on the seed and on names, and on nothing that ran before."""

import hashlib
import json

import numpy as np


def named_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A generator that depends on `seed` and `names` only: not on task order, workers or what ran before.

    The key is a SHA-256 of the names, never Python's salted `hash`.
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
