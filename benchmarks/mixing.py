"""Mixing: mixes per second and memory against pydub loops, scaper and the floor, in one run.

All make 10 s at 44.1 kHz, 16-bit WAV, from the same clips: 16-bit WAV too, a foreground for every
25.5 mixes as in Gaurav et al., made by rule in the folder that `--dir` names. Rates are of the wall
clock and include planning where a row says so. Processes that serve several calls are started before.

    python benchmarks/mixing.py --n 5100
    python benchmarks/mixing.py --n 255 --dir /dev/shm        # short, and without a disk

scaper needs numpy < 2 and sox, so an environment of its own: `--scaper-python env/bin/python`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import soundfile as sf
from pydub import AudioSegment

from soundscapes_utils import metadata, mixing, store

RATE, SECONDS = 44_100, 10.0
LABELS = [f"event {i}" for i in range(10)]
SCENES = [f"scene {i}" for i in range(10)]
# what the slow peers make of the same plan; their rates do not depend on the number
FEW = 150
# 1.8 GB: what is written stays in memory at first; of more, a disk's own speed would be measured
PLAIN = 2040
# machines waver: the plain cases take turns, the best round counts for each
ROUNDS = 3
SCAPER = """
import sys, time, warnings
import scaper
warnings.simplefilter("ignore")
foregrounds, backgrounds, n, out = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4]
start = time.perf_counter()
for i in range(n):
    scene = scaper.Scaper(10.0, foregrounds, backgrounds, random_state=i)
    scene.sr, scene.ref_db = 44100, -30
    scene.add_background(("choose", []), ("choose", []), ("const", 0))
    scene.add_event(
        ("choose", []), ("choose", []), ("const", 0), ("uniform", 0, 5), ("const", 5.0),
        ("uniform", -5, 15), None, None,
    )
    scene.generate(f"{out}/{i}.wav", f"{out}/{i}.jams", disable_instantiation_warnings=True)
print(n / (time.perf_counter() - start))
"""
MEMORY = """
import resource, sys
import pandas as pd
from soundscapes_utils import mixing
events, scenes = (pd.read_csv(path) for path in sys.argv[1:3])
n = int(sys.argv[3])
mixes = mixing.plan_mixes(events, scenes, n, **mixing.PRESETS["gaurav2024-report"])
mixing.render_mixes(mixes, sys.argv[4], 44100, workers=1, shard=f"1/{n // 500}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def make_clips(folder, labels, per_fold, seconds, suffix):
    """Write noise bursts, one folder a label as scaper wants it; return their table."""
    rng = np.random.default_rng(0)
    rows = []
    for label in labels:
        for fold in range(1, 6):
            for take in range(per_fold):
                name = f"{label}-{fold}-{take}".replace(" ", "_")
                path = folder / label / f"{name}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                y = rng.normal(0, rng.uniform(0.02, 0.06), int(seconds * RATE))
                subtype = "PCM_16" if suffix == "wav" else "VORBIS"
                sf.write(path, y.clip(-0.4, 0.4), RATE, subtype=subtype)
                rows.append((name, str(path), label, fold, name))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


def clear(folder):
    """Give a case's space back, but leave its names: ext4 passes over inodes just deleted, one by
    one, whenever it makes a file, and the next case would pay for that.
    """
    spent = folder.with_name(f"spent-{len(list(folder.parent.glob('spent-*')))}")
    folder.rename(spent)
    for path in spent.rglob("*.*"):
        if path.is_file():
            os.truncate(path, 0)


def rate_of(function, n):
    """Return how many mixes per second a function makes."""
    os.sync()  # what the case before has left to the disk is not this one's work
    start = time.perf_counter()
    function()
    return n / (time.perf_counter() - start)


def shared_out(make, pairs, work, workers=1):
    """Rate at which a function of sources and a folder makes all mixes, in so many processes."""
    out = work / "out"
    out.mkdir()
    tasks = [joblib.delayed(make)(pairs[i::workers], out / f"{i}-") for i in range(workers)]
    try:
        return rate_of(lambda: joblib.Parallel(workers)(tasks), len(pairs))
    finally:
        clear(out)


def floor(pairs, prefix):
    """Decode every source once, write ready samples as often as there are mixes."""
    for path in {path for pair in pairs for path in pair}:
        y, rate = sf.read(path, dtype="int16")
    y = np.resize(y, int(SECONDS * rate))
    for number in range(len(pairs)):
        sf.write(f"{prefix}{number}.wav", y, rate, subtype="PCM_16")


def floor_of_bytes(pairs, prefix):
    """Do the same, but write a ready file image: no library at all."""
    for path in {path for pair in pairs for path in pair}:
        y, _ = sf.read(path, dtype="int16")
    image = bytes(44) + np.resize(y, int(SECONDS * RATE)).tobytes()
    for number in range(len(pairs)):
        Path(f"{prefix}{number}.wav").write_bytes(image)


def pydub_loop(pairs, prefix, rate=RATE):
    """Mix as Gaurav et al. do: open both files, overlay, export; anew for every mix."""
    for number, pair in enumerate(pairs):
        background, foreground = (_segment(path).set_frame_rate(rate) for path in pair)
        background.overlay(foreground).export(f"{prefix}{number}.wav", format="wav")


def _segment(path):
    if path.endswith(".wav"):
        return AudioSegment.from_wav(path)
    # spares pydub the start of ffmpeg for every file, in its favour
    y, rate = sf.read(path, dtype="int16")
    return AudioSegment(y.tobytes(), sample_width=2, frame_rate=rate, channels=1)


def ours(mixes, rate, workers, work):
    """Render a plan into an empty folder; return mixes per second."""
    out = work / "out"
    try:
        return rate_of(lambda: mixing.render_mixes(mixes, out, rate, workers), len(mixes))
    finally:
        clear(out)


def plain(mixes, pairs, work):
    """Rates of the plain equation, its floors and the pydub loop, by name and processes."""
    rates = {}
    for w in (1, 2):
        rates["floor", w] = shared_out(floor, pairs, work, w)
        rates["ours", w] = ours(mixes, RATE, w, work)
        rates["bare", w] = shared_out(floor_of_bytes, pairs, work, w)
    rates["loop", 1] = shared_out(pydub_loop, pairs, work)
    return rates


def with_annotations(tables, n, workers, work):
    """Plan SNR in LUFS, onsets and captions, render, write all metadata: more than scaper does."""
    out = work / "out"

    def everything():
        mixes = mixing.plan_mixes(*tables, n, snr_measure="lufs", sample_rate=RATE)
        done = mixing.render_mixes(mixes, out, RATE, workers)
        metadata.write_metadata(done, out / "metadata", "mixes")

    try:
        return rate_of(everything, n)
    finally:
        clear(out)


def on_the_fly(mixes):
    """Take every mix once from the data set, source by source as a loader may; mixes per second."""
    items = mixing.MixDataset(mixes, RATE)
    order = np.argsort(mixes.foreground.to_numpy(), kind="stable").tolist()
    return rate_of(lambda: [items[i]["audio"].size for i in order], len(items))


def scaper_rate(python, work):
    """Mixes a second of scaper, or None and why not."""
    if not python:
        return None, "not measured: no --scaper-python was given"
    found = subprocess.run([python, "-c", "import scaper"], capture_output=True, text=True)
    if found.returncode:
        return None, f"not measured: {found.stderr.strip().splitlines()[-1]}"
    folders = [work / "wav" / kind for kind in ("events", "scenes")]
    return elsewhere(python, SCAPER, [*folders, FEW], work), ""


def peak_megabytes(tables, planned, work):
    """Peak memory of a process that plans so many mixes and renders 500 of them."""
    tables = [store.write_atomic(work / f"{i}.csv", t.to_csv().encode()) for i, t in enumerate(tables)]
    return elsewhere(sys.executable, MEMORY, [*tables, planned], work)


def elsewhere(python, code, arguments, work):
    """Run a script in a process of its own; return the number that it prints."""
    out = work / "elsewhere"
    out.mkdir()
    command = [python, "-c", code, *map(str, arguments), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{python} failed:\n{error.stderr}") from error
    finally:
        clear(out)


def line(name, rate, *ratios):
    """Print one row of the table: mixes per second, and ratios with what they are aimed at."""
    shown = "; ".join(
        f"{rate / other:.2f} × {what}" + (f" (goal {goal})" if goal else "")
        for other, what, goal in ratios
        if other
    )
    print(f"{name:<52}{rate:>9.1f}   {shown}".rstrip(), flush=True)


def main():
    """Make clips in a folder of its own, compare, and clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5100, help="mixes of a case")
    parser.add_argument("--dir", help="where clips and mixes go; a temporary folder by default")
    parser.add_argument("--scaper-python", help="interpreter that can import scaper")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.dir, prefix="mixing-"))
    try:
        compare(options.n, options.scaper_python, work)
    finally:
        shutil.rmtree(work)


def compare(n, scaper_python, work):
    """Run all cases in a folder and print the table."""
    per_fold = max(1, round(n / 25.5 / 50))
    wav, ogg = (
        (
            make_clips(work / suffix / "events", LABELS, per_fold, 5.0, suffix),
            make_clips(work / suffix / "scenes", SCENES, 1, SECONDS, suffix),
        )
        for suffix in ("wav", "ogg")
    )
    print(
        f"{n} mixes from {len(wav[0])} events and {len(wav[1])} scenes, {min(n, PLAIN)} where the "
        f"plain equation is compared; {os.cpu_count()} cores\n"
    )
    preset = mixing.PRESETS["gaurav2024-report"]
    planning = n / rate_of(lambda: mixing.plan_mixes(*wav, n, **preset), n)
    plan = mixing.plan_mixes(*wav, n, **preset)
    pairs = list(zip(plan.background, plan.foreground, strict=True))
    # starts the processes that all cases share, and imports what they need
    starting = 128 / ours(plan[:128], RATE, 2, work)

    print(f"{'':<52}{'mixes/s':>9}")
    rounds = [plain(plan[:PLAIN], pairs[:PLAIN], work) for _ in range(ROUNDS)]
    floors, bare, loop, mine = (
        {w: max(rates[name, w] for rates in rounds) for w in (1, 2) if (name, w) in rounds[0]}
        for name in ("floor", "bare", "loop", "ours")
    )
    loop = loop[1]
    for w, name in ((1, "1 process"), (2, "2 processes")):
        line(f"floor: decode once, write by soundfile, {name}", floors[w])
        line(f"floor: decode once, write ready bytes, {name}", bare[w])
    line("pydub loop as in Gaurav et al., 1 process", loop)
    against = (loop, "pydub loop", None), (loop, "pydub loop", 1.8)
    for w in (1, 2):
        line(
            f"plain equation, {w} worker{'s' * (w - 1)}", mine[w],
            (floors[w], "floor", 0.75), (bare[w], "floor of bytes", None), against[w - 1],
        )  # fmt: skip

    scaper, why = scaper_rate(scaper_python, work)
    if scaper:
        line("scaper: SNR in LUFS, onset, JAMS, 1 process", scaper)
    else:
        print(f"{'scaper':<52}{'':>9}   {why}")
    rate = with_annotations(wav, n, 2, work)
    line("SNR in LUFS, onset, captions, JAMS …, plan and 2 workers", rate, (scaper, "scaper", 15))
    line("on the fly, this process", on_the_fly(plan), (1000, "the goal of 1000", None))

    few = min(FEW, n)
    compressed = mixing.plan_mixes(*ogg, n, **preset | {"sample_rate": 16_000})
    some = list(zip(compressed.background, compressed.foreground, strict=True))[:few]
    peer = shared_out(partial(pydub_loop, rate=16_000), some, work)
    line(f"Ogg to 16 kHz: pydub loop, {few} mixes, 1 process", peer)
    line("Ogg to 16 kHz: ours, 1 worker", ours(compressed, 16_000, 1, work), (peer, "pydub loop", 5))

    print()
    for planned in (500, 50_000):
        peak = peak_megabytes(wav, planned, work)
        print(f"peak memory, {planned} mixes planned, 500 of them rendered: {peak:.0f} MiB")
    rendering = n / ours(plan, RATE, 2, work)
    minutes = (planning + rendering) * 51_000 / n / 60 + starting / 60
    gigabytes = 51_000 * (44 + 2 * SECONDS * RATE) / 1e9
    print(
        f"51000 mixes, planned and rendered by 2 workers: {minutes:.1f} min, {gigabytes:.0f} GB "
        f"(from {n} on this disk)"
    )


if __name__ == "__main__":
    main()
