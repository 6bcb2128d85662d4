"""Small sounds of two classes that tests of features, arms and units share."""

import os
import signal

import numpy as np
import pandas as pd

from soundscapes_utils import audio

RATE = 16_000


def tone(frequency, seed, seconds=1.0):
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=t.size)
    return (0.3 * np.sin(2 * np.pi * frequency * t) + 0.02 * noise).astype(np.float32)


def write_clips(folder, classes, folds, each, first_seed):
    rows = []
    for label, frequency in classes.items():
        for fold in folds:
            for i in range(each):
                name = f"{label}-{fold}-{i}"
                path = audio.save_audio(
                    folder / f"{name}.wav", tone(frequency, first_seed + len(rows)), RATE
                )
                rows.append((name, str(path), label, fold, name))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


CLASSES = {"hum": 200, "whistle": 3000}


def killed_by_its_name(unit, folder, out_dir, device):
    """Stands for a unit of a study: here, as processes of their own import it by its name."""
    if unit["name"] == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
