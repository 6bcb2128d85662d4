"""Augmentation study: an epoch as the paper's code runs it against one with kept features.

The paper's code decodes, resamples and transforms every clip in every epoch. Here that is done once
a clip. Both ways train the same SB-CNN on the same clips, in one process and one thread; what is
printed are ratios of this one run.

    python benchmarks/esc.py --clips 100 --workers 2
"""

import argparse
import contextlib
import io
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


def epoch_times(clips, cache):
    """Seconds of all features as the paper takes them, first here, again here; of training."""
    y = np.arange(len(clips)) % len(procedural.EVENTS)
    peer = seconds(lambda: list(transform_each(clips["path"])))
    first = seconds(lambda: esc.load_features(clips["path"], cache, workers=1))
    again = seconds(lambda: esc.load_features(clips["path"], cache, workers=1))
    data = (esc.standardise(esc.load_features(clips["path"], cache, workers=1)[0]), y)
    tiny = (data[0][:1], y[:1])
    options = {"batch_size": 128, "patience": 99}
    esc.train_classifier("sbcnn", data, tiny, 10, epochs=1, **options)
    training = seconds(lambda: esc.train_classifier("sbcnn", data, tiny, 10, epochs=3, **options))
    return peer, first, again, training / 3


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(folder, wanted.clips)
        peer, first, again, training = epoch_times(clips, Path(folder) / "cache")
        print(f"{wanted.clips} clips of 4 s at 44.1 kHz, one thread; ms a clip")
        for name, value in (
            ("features, every epoch anew (paper)", peer),
            ("features, computed here", first),
            ("features, found in the cache", again),
            ("training, forward and backward", training),
        ):
            print(f"  {name:36s}{value / wanted.clips * 1e3:9.2f}")
        epochs = 50
        ratio = epochs * (peer + training) / (first + epochs * training)
        print(f"  {epochs} epochs: {ratio:.1f} times faster than with features anew")
        shared = {"models": ["sbcnn"], "runs": 4, "epochs": 5, "batch_size": 16}
        for workers in (1, wanted.workers):
            out = Path(folder) / f"workers-{workers}"
            with contextlib.redirect_stdout(io.StringIO()):
                took = seconds(
                    lambda n=workers, o=out: esc.run_arms(
                        clips, None, ["real"], out_dir=o, workers=n, **shared
                    )
                )
            print(f"  4 classifiers in {workers} processes: {took:.1f} s")


if __name__ == "__main__":
    main()
