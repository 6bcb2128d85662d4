"""Rows P1a to P1e of `all.py`: mixes a second against loops of pydub, scaper and the floor.

All make 10 s of 16-bit WAV from noise made by rule, in a folder that should lie on a disk: events of 5 s
and scenes of 10 s, as many of each as mixes are divided by "mixes a source". Cases take turns, the best
of three rounds counts for each. A row is a dictionary, see `all.py`.
"""

import os
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile as sf
from pydub import AudioSegment

from soundscapes_utils import metadata, mixing

RATE, SECONDS, ROUNDS = 44_100, 10.0, 3
PLAIN = mixing.PRESETS["gaurav2024-report"]
# what the slow peers make of the same clips; their rates do not depend on the number
FEW = 150
SCAPER = """
import sys, time, warnings
try:
    import scaper
except ImportError:
    import dscaper as scaper
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
print(scaper.__name__, scaper.__version__, n / (time.perf_counter() - start))
"""


def make_clips(folder, n, seconds, suffix="wav", rate=RATE):
    """Write `n` noise bursts, one folder a label as scaper wants it, over five folds; their table."""
    rng, rows, n_labels = np.random.default_rng(0), [], max(1, min(10, n // 5))
    for i in range(n):
        label = f"{folder.name} {i % n_labels}"
        path = folder / label / f"{folder.name}-{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        y = rng.normal(0, rng.uniform(0.02, 0.06), round(seconds * rate)).clip(-0.4, 0.4)
        sf.write(path, y, rate, subtype="PCM_16" if suffix == "wav" else "VORBIS")
        rows.append((path.stem, str(path), label, i // n_labels % 5 + 1, path.stem))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


def make_set(work, n_events, n_scenes, suffix="wav"):
    """Write events and scenes of one row."""
    folder = work / f"{suffix}-{n_events}-{n_scenes}"
    events = make_clips(folder / "event", n_events, SECONDS / 2, suffix)
    return events, make_clips(folder / "scene", n_scenes, SECONDS, suffix)


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


def in_folder(work, make, n):
    """Rate at which a function of an empty folder makes `n` mixes."""
    out = work / "out"
    out.mkdir()
    try:
        return rate_of(lambda: make(out), n)
    finally:
        clear(out)


def floor(pairs, out, by_library):
    """Decode every source once, write ready samples as often as there are mixes."""
    for path in {path for pair in pairs for path in pair}:
        y, rate = sf.read(path, dtype="int16")
    y = np.resize(y, int(SECONDS * rate))
    image = bytes(44) + y.tobytes()
    for number in range(len(pairs)):
        if by_library:
            sf.write(f"{out}/{number}.wav", y, rate, subtype="PCM_16")
        else:
            (out / f"{number}.wav").write_bytes(image)


def pydub_loop(pairs, out, rate=RATE):
    """Mix as Gaurav et al. do: open both files, overlay, export; anew for every mix."""
    for number, pair in enumerate(pairs):
        background, foreground = (_segment(path).set_frame_rate(rate) for path in pair)
        background.overlay(foreground).export(f"{out}/{number}.wav", format="wav")


def _segment(path):
    if path.endswith(".wav"):
        return AudioSegment.from_wav(path)
    # spares pydub the start of ffmpeg for every file, in its favour
    y, rate = sf.read(path, dtype="int16")
    return AudioSegment(y.tobytes(), sample_width=2, frame_rate=rate, channels=1)


def plain(work, n, a_source, suffix="wav", rate=RATE, least=1.3):
    """Yield the rows of the plain equation in one process, over pydub's loop and over the floor."""
    tables = make_set(work, n // a_source, n // a_source, suffix)
    plan = partial(mixing.plan_mixes, *tables, n, **PLAIN | {"sample_rate": rate})
    planning, mixes = rate_of(plan, n), plan()
    pairs = list(zip(mixes["background"], mixes["foreground"], strict=True))
    some, best = pairs if suffix == "wav" else pairs[:FEW], {}
    cases = {
        "floor": (n, partial(floor, pairs, by_library=True)),
        "floor of bytes": (n, partial(floor, pairs, by_library=False)),
        "ours": (n, lambda out: mixing.render_mixes(mixes, out, rate, workers=1)),
        "pydub": (len(some), partial(pydub_loop, some, rate=rate)),
    }
    mixing.render_mixes(mixes[:8], work / "warm", rate, workers=1)  # imports what the case needs
    for _ in range(ROUNDS):
        for name, (count, make) in cases.items():
            best[name] = max(best.get(name, 0.0), in_folder(work, make, count))
    what = f"{n} mixes of {len(tables[0])} + {len(tables[1])} {suffix.upper()} sources"
    row = {"what": what, "ours": best["ours"], "unit": "mixes/s"}
    yield row | {"peer": "pydub's loop", "theirs": best["pydub"], "least": least}
    if suffix == "wav":
        fastest = max(best["floor"], best["floor of bytes"])
        yield row | {"peer": "decode once + write", "theirs": fastest, "least": 0.75}
        both = 1 / (1 / best["ours"] + 1 / planning)
        row |= {"what": f"{what}, planning included", "ours": both}
        yield row | {"peer": "pydub's loop", "theirs": best["pydub"]}


def p1a(work, quick, options):
    """Every source used once, and 400 sources in all, used twice."""
    n = 20 if quick else 400
    yield from plain(work, n, 1)
    yield from plain(work, n, 2)


def p1b(work, quick, options):
    """Few sources, used often: 16 events and 16 scenes for 400 mixes."""
    yield from plain(work, 125 if quick else 400, 25)


def p1c(work, quick, options):
    """Compressed sources, resampled."""
    yield from plain(work, 20 if quick else 400, 2, "ogg", 16_000, least=5)


def p1d(work, quick, options):
    """SNR by LUFS, onsets, captions, JAMS: planned, rendered by two workers and annotated."""
    shapes = [(5, 5, 125), (20, 20, 40)] if quick else [(160, 160, 4000), (2000, 2000, 4000)]
    for n_events, n_scenes, n in shapes:
        tables = make_set(work, n_events, n_scenes)
        peers = [scaper(python, work, tables, 2 if quick else FEW) for python in options.scaper_python]
        mixing.render_mixes(mixing.plan_mixes(*tables, 40, **PLAIN), work / "warm", RATE, workers=2)
        rate = in_folder(work, partial(with_annotations, tables, n), n)
        without = "scaper (not measured: no --scaper-python was given)", None
        peer, theirs = max(peers, key=lambda found: found[1] or 0.0, default=without)
        row = {"what": f"{n} mixes of {n_events} + {n_scenes}, LUFS, JAMS", "unit": "mixes/s"}
        yield row | {"peer": peer, "theirs": theirs, "ours": rate, "least": 15}


def with_annotations(tables, n, out):
    """Plan, render, write all metadata: more than scaper does."""
    mixes = mixing.plan_mixes(*tables, n, snr_measure="lufs", sample_rate=RATE)
    done = mixing.render_mixes(mixes, out, RATE, workers=2)
    metadata.write_metadata(done, out / "metadata", "mixes")


def scaper(python, work, tables, n):
    """Name and rate of the scaper of an interpreter; or why there is none, and None."""
    folders = [str(Path(table["path"][0]).parents[1]) for table in tables]
    out = work / "scaper"
    out.mkdir(exist_ok=True)
    command = [python, "-c", SCAPER, *folders, str(n), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"scaper (not measured: {(done.stderr.strip().splitlines() or ['?'])[-1]})", None
    name, version, rate = done.stdout.split()[-3:]
    return f"{name} {version}", float(rate)


def p1e(work, quick, options):
    """On the fly: shuffled, two workers, batches of 32 as torch makes them."""
    from torch.utils.data import DataLoader

    n = 125 if quick else 2000
    tables = make_set(work, n // 25, n // 25)
    items = mixing.MixDataset(mixing.plan_mixes(*tables, n, **PLAIN), RATE)
    loader = DataLoader(items, 32, shuffle=True, num_workers=2, persistent_workers=True)

    def epoch():
        return sum(len(batch["audio"]) for batch in loader)

    seconds = [n / rate_of(epoch, n) for _ in range(3)]
    what = f"{n} mixes of {len(tables[0])} + {len(tables[1])} sources, shuffled, 2 workers"
    row = {"peer": "", "unit": "items/s"}
    yield row | {"what": f"{what}, three epochs", "ours": 3 * n / sum(seconds), "least": 1000}
    yield row | {"what": "  the first epoch, which decodes", "ours": n / seconds[0]}
    yield row | {"what": "  the last epoch", "ours": n / seconds[-1]}


ROWS = {"P1a": p1a, "P1b": p1b, "P1c": p1c, "P1d": p1d, "P1e": p1e}
