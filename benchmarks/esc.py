"""Augmentation study: an epoch as the paper's code runs it against one with kept features.

The paper's code decodes, resamples and transforms every clip in every epoch. Here that is done once
a clip. Both ways train the same SB-CNN on the same clips, in one process and one thread; what is
printed are ratios of this one run.

    python benchmarks/esc.py --clips 100 --workers 2
"""

import argparse
import contextlib
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from soundscapes_utils import audio, esc, procedural

CLIP_SECONDS = 4.0
SOURCE_RATE = 44_100


def make_clips(folder, n):
    """Write `n` clips of 4 s at 44.1 kHz, over all classes and five folds."""
    rows = []
    for i in range(n):
        label = procedural.EVENTS[i % len(procedural.EVENTS)]
        y = procedural.synthesize(label, i, SOURCE_RATE, CLIP_SECONDS)
        path = audio.save_audio(Path(folder) / f"{i}.wav", y, SOURCE_RATE)
        fold = i // len(procedural.EVENTS) % 5 + 1
        rows.append((str(i), str(path), label, fold, str(i)))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


def transform_each(paths):
    """Decode, resample and transform every clip with torchaudio, as the paper's data set does."""
    from torchaudio.functional import resample
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(16_000, n_fft=1024, hop_length=512, n_mels=64)
    for path in paths:
        y, rate = audio.load_audio(path)
        y = resample(torch.from_numpy(y), rate, 16_000)[: 4 * 16_000]
        yield torch.log(mel(y) + 0.001).T.numpy()


def seconds(action):
    """Wall time of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def epoch_times(clips, cache, device):
    """Seconds of: all features as the paper takes them, first here, again here; epoch; bare steps."""
    y = np.arange(len(clips)) % len(procedural.EVENTS)
    peer = seconds(lambda: list(transform_each(clips["path"])))
    first = seconds(lambda: esc.load_features(clips["path"], cache, workers=1))
    again = seconds(lambda: esc.load_features(clips["path"], cache, workers=1))
    data = (esc.standardise(esc.load_features(clips["path"], cache, workers=1)[0]), y)
    tiny = (data[0][:1], y[:1])
    options = {"batch_size": 128, "patience": 99, "device": device}
    esc.train_classifier("sbcnn", data, tiny, 10, epochs=1, **options)
    epoch = seconds(lambda: esc.train_classifier("sbcnn", data, tiny, 10, epochs=3, **options)) / 3
    return peer, first, again, epoch, bare_steps(data, device)


def bare_steps(data, device, epochs=3):
    """Seconds of an epoch's optimiser steps alone, on patches that lie ready."""
    x, y = (torch.from_numpy(part).to(device) for part in data)
    network = esc.SBCNN(10).to(device, memory_format=torch.channels_last).train()
    settings = {"eps": esc.ADAM_EPS, "weight_decay": esc.WEIGHT_DECAY}
    optimiser = torch.optim.Adam(network.parameters(), esc.LEARNING_RATE, **settings)
    patches = x[:, : esc.PATCH_FRAMES].unsqueeze(1).contiguous()
    batches = list(zip(patches.split(128), y.split(128), strict=True))

    def run(times):
        for batch, target in batches * times:
            loss = torch.nn.functional.cross_entropy(network(batch), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()

    run(1)
    return seconds(lambda: run(epochs)) / epochs


def study_hours(per_clip, workers):
    """Hours of the paper's study of SB-CNN: 7,859 real clips, 10 folds, 5 runs, all arms, 50 epochs."""
    real = 7859
    sizes = [1, *(1 + r for r in range(1, 5)), *[1] * 8, *range(1, 5)]
    return sum(sizes) * real * 10 * 5 * 50 * per_clip / workers / 3600


def peak_mb():
    """Largest memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_units(clips, folder, workers, runs):
    """Train `runs` classifiers of a few epochs; nothing is printed."""
    options = {"models": ["sbcnn"], "epochs": 5, "batch_size": 16, "runs": runs, "workers": workers}
    with contextlib.redirect_stdout(io.StringIO()):
        esc.run_arms(clips, None, ["real"], out_dir=folder, **options)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(folder, wanted.clips)
        times = epoch_times(clips, Path(folder) / "cache", wanted.device)
        peer, first, again, epoch, bare = times
        print(f"{wanted.clips} clips of 4 s at 44.1 kHz, one thread, {wanted.device}; ms a clip")
        names = (
            "features, every epoch anew (paper)",
            "features, computed here, once",
            "features, found in the cache",
            "epoch, features in memory",
            "its optimiser steps alone",
        )
        for name, value in zip(names, times, strict=True):
            print(f"  {name:36s}{value / wanted.clips * 1e3:9.2f}")
        print(f"  epoch over its bare steps: {100 * (epoch / bare - 1):+.0f} %")
        epochs = 50
        # read or computed once for all epochs
        for name, mine in (("computed", first), ("kept by an earlier run", again)):
            print(f"  features of {epochs} epochs, {name}: {epochs * peer / mine:.0f} times faster")
        ratio = epochs * (peer + epoch) / (first + epochs * epoch)
        print(f"  {epochs} epochs in all: {ratio:.1f} times faster than with features anew")
        hours = study_hours(epoch / wanted.clips, wanted.workers)
        print(f"  the paper's study, SB-CNN, {wanted.workers} side by side: about {hours:.0f} h")
        for workers in (1, wanted.workers):
            out = Path(folder) / f"workers-{workers}"
            took = seconds(lambda n=workers, o=out: run_units(clips, o, n, 4))
            print(f"  4 classifiers in {workers} processes: {took:.1f} s")
        before = peak_mb()
        run_units(clips, Path(folder) / "many", 1, 12)
        print(f"  12 classifiers more in this process: {peak_mb() - before:+.0f} MB at the peak")


if __name__ == "__main__":
    main()
