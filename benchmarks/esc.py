"""Augmentation study: its speed against the paper's code, and its truth on real recordings.

Speed. The paper's code decodes, resamples and transforms every clip in every epoch. Here that is done
once a clip. Both ways train the same SB-CNN on the same clips, in one process and one thread; what is
printed are ratios of this one run.

    python benchmarks/esc.py --clips 7859 --workers 2

Truth. The whole study on ESC-10 with a generator that never heard the test fold, which is trained
first: tables of arms, controls and tests. What is done is kept, so the same command goes on after a
stop. `--fold` takes another test fold, with a generator of its own.

    python benchmarks/esc.py --truth runs/truth --root FOLDER --yamnet FILE
    python benchmarks/esc.py --truth runs/truth --root FOLDER --yamnet FILE --studies own

The next fold decides when a classifier stops. The generator has not learnt from it either, but its own
training was watched on it, so the arms with synthetic clips are stopped on clips not wholly foreign.

Study "own" asks what synthetic clips are worth where there are two recordings a class: the generator
of the other studies has heard 24, one of its own just these two, drawn anew for every run.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from soundscapes_utils import (
    audio,
    classifiers,
    datasets,
    embeddings,
    esc,
    fad,
    generation,
    minimodel,
    procedural,
    selection,
    stats,
    store,
)

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
        rows.append((str(i), str(path), label, fold, str(i), "builtin"))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id", "dataset"])


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
    """Seconds of: features as the paper takes them, here, here again, patches; epoch; bare steps."""
    y = np.arange(len(clips)) % len(procedural.EVENTS)
    peer = seconds(lambda: list(transform_each(clips["path"])))
    first = seconds(lambda: classifiers.load_features(clips["path"], cache, workers=1))
    again = seconds(lambda: classifiers.load_features(clips["path"], cache, workers=1))
    data = (classifiers.standardise(classifiers.load_features(clips["path"], cache, workers=1)[0]), y)
    tiny = (data[0][:1], y[:1])
    training = esc.Training(epochs=3, batch_size=128, patience=99, device=device)

    def train():
        classifiers.train_classifier("sbcnn", data, tiny, 10, training)

    train()
    epoch = seconds(train) / 3
    return peer, first, again, drawing(data[0]), epoch, bare_steps(data, device)


def drawing(x):
    """Seconds to cut an epoch's random patches out of the spectrograms in memory."""
    patches = torch.from_numpy(x).unfold(1, classifiers.PATCH_FRAMES, 1)

    def draw():
        for part in torch.randperm(len(x)).split(128):
            starts = torch.randint(patches.shape[1], (len(part),))
            patches[part, starts].transpose(1, 2).unsqueeze(1).float()

    draw()
    return seconds(draw)


def bare_steps(data, device, epochs=3):
    """Seconds of an epoch's optimiser steps alone, on patches that lie ready."""
    x, y = (torch.from_numpy(part).to(device) for part in data)
    network = classifiers.SBCNN(10).to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(network.parameters(), **classifiers.ADAM)
    patches = x[:, : classifiers.PATCH_FRAMES].unsqueeze(1).contiguous()
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
    study = esc.Study(["real"], ["sbcnn"], runs=runs)
    with contextlib.redirect_stdout(io.StringIO()):
        esc.run_study(clips, None, study, esc.Training(5, 15, 16, workers=workers), folder)


# SB-CNN's arms on ESC-10, every epoch of as many patches as there are real training clips
ARMS = [
    *("real", "both@mini:1", "both@mini:2", "both@mini:3", "both@mini:4"),
    *("mixed@mini:1", "mixed@mini:2", "mixed@mini:3", "dropped:1", "dropped:2"),
    *("synthetic@mini:1", "synthetic@mini:2", "synthetic@mini:3", "synthetic@mini:4"),
    "thinned@mini:1",
    *("both@builtin:1", "both@mini+builtin:2", "synthetic@builtin:1"),
    *("both@kept:1", "both@random:1"),
    *("both@ps1:4", "both@ps2:4", "both@ts:4", "specaugment:2", "mixup:0.2"),
]
FEW = [f"{kind}/{k}{ratio}" for k in (2, 4, 8, 16)
       for kind, ratio in (("real", ""), ("both@mini", ":1"), ("both@mini", ":4"))]  # fmt: skip
PAPERS = ["real", "both@mini:1", "both@mini:4", "mixed@mini:1", "mixed@mini:2", "synthetic@mini:1"]
PRACTICE = [*PAPERS, "repeat:1", "repeat:4", "steps:1", "steps:4"]
EVERY_FOLD = {"arms": ["real"], "test_folds": [1, 2, 3, 4, 5]}
# clips a class of the generators that have heard two recordings, and training steps of each
OWN_CLIPS, OWN_STEPS = 8, 1000
OWN = ["real/2", "both@mini/2:4", "both@own/2:4"]
STUDIES = {
    "baselines": {
        "models": [*classifiers.BASELINES, "probe:yamnet"], **EVERY_FOLD, "validation": "none",
    },
    "variants": {"models": ["sbcnn", "sbcnn:as_released", "crnn", "crnn:as_released"], **EVERY_FOLD},
    "arms": {"models": ["sbcnn"], "arms": ARMS},
    "crnn": {"models": ["crnn"], "arms": ARMS[:12]},
    "few": {"models": ["sbcnn"], "arms": ["real", *FEW]},
    "practice": {"models": ["sbcnn"], "arms": PRACTICE},
    "released": {
        "models": ["sbcnn:as_released", "crnn:as_released"], "arms": PAPERS,
        "validation": "as_released",
    },
}  # fmt: skip
# equally much practice for every arm of these
PATCHES = dict.fromkeys(("arms", "crnn", "few", "own"), 240)
# beside `real`, what an arm must be held against
CONTROLS = {
    "arms": [
        ("thinned@mini:1", "real"),
        *[(f"mixed@mini:{n}", f"dropped:{n}") for n in (1, 2)],
        ("both@kept:1", "both@random:1"),
        ("both@mini:1", "both@builtin:1"),
        ("both@mini:4", "both@ps1:4"),
    ],
    "few": [(f"both@mini/{k}:{r}", f"real/{k}") for k in (2, 4, 8, 16) for r in (1, 4)],
    "practice": [(f"both@mini:{r}", f"{kind}:{r}") for r in (1, 4) for kind in ("repeat", "steps")],
}
# Piczak's accuracies on ESC-10
PICZAK = {"knn": 0.667, "forest": 0.727, "svm": 0.675}


# an arm is called harmless where its interval ends above this loss of accuracy; set beforehand
MARGIN = 0.05


def trained(clips, wanted, steps=2500):
    """Train a mini model on the training folds of a table, or find it trained; its folder."""
    return minimodel.get_checkpoint(
        "mini", clips, *datasets.load_scenes("esc10", clips), dataset="esc10", test_fold=wanted.fold,
        cache_dir=Path(wanted.truth) / "checkpoints", config=minimodel.MiniConfig(unet_steps=steps),
    )  # fmt: skip


def generate(plan, checkpoint, folder):
    """Make the clips of a plan that are missing, in one thread."""
    torch.set_num_threads(1)
    backend = generation.get_backend("audioldm", checkpoint=checkpoint, device="cpu")
    return generation.generate_clips(plan, backend, folder)


def generated(labels, n, checkpoint, folder, workers):
    """Table of `n` clips of each class, made in so many processes."""
    plan = generation.plan_clips(labels, n, duration_s=2.56, dataset="esc10")
    make = partial(generate, checkpoint=checkpoint, folder=folder)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(make, [plan.iloc[i::workers] for i in range(workers)]))
    return make(plan)


def synthetic_tables(clips, wanted):
    """Tables of synthetic clips by the names that the arms call for."""
    out = Path(wanted.truth)
    real = clips[~clips["fold"].isin([wanted.fold, wanted.fold % 5 + 1])]
    labels, tables = sorted(clips["label"].unique()), {}
    for name, checkpoint, n in (("mini", trained(clips, wanted), 128), ("builtin", "builtin", 24)):
        folder = out / "generated" / (name if name == "builtin" else f"{name}-{wanted.fold}")
        tables[name] = generated(labels, n, checkpoint, folder, wanted.workers)
    reader = embeddings.get_embedding("yamnet", wanted.yamnet)
    cache = out / "features"
    x_real = reader.embed(real["path"].tolist(), silence="allow", cache_dir=cache)
    x_made = reader.embed(tables["mini"]["path"].tolist(), silence="allow", cache_dir=cache)
    made = tables["mini"]
    likes = selection.class_probability((x_real, real["label"]), x_made, made["label"])
    likes = likes["class_probability"]
    tables["kept"] = made[selection.keep_best(made["label"], likes, 128 // 4)]
    tables["random"] = random_drop(tables["mini"], tables["kept"])
    for effect in classifiers.TRANSFORMS:
        # only what may be trained on is needed
        tables[effect] = classifiers.transform_clips(real, effect, out / "transforms" / effect)
    return tables, class_distances((x_real, real["label"]), (x_made, made["label"]))


def random_drop(generated, like):
    """Synthetic clips drawn at random, of each class as many as a filter kept: its control."""
    shuffled = generated.sample(frac=1, random_state=0)
    place = shuffled.groupby("label").cumcount()
    kept = place < shuffled["label"].map(like["label"].value_counts()).fillna(0)
    return shuffled[kept].sort_index()


def class_distances(real, generated):
    """KAD and FAD of the synthetic clips of each class to its real training clips."""
    sides = [(x, np.asarray(labels, dtype=str)) for x, labels in (real, generated)]
    rows = [
        {"metric": metric, "embedding": "yamnet", "reference": label, "candidate": "mini"}
        | {"value": distance(*(x[labels == label] for x, labels in sides))}
        for label in sorted(set(sides[1][1]))
        for metric, distance in (("KAD", fad.kernel_distance), ("FAD", fad.frechet_distance))
    ]
    return pd.DataFrame(rows)


def run_study(name, clips, tables, wanted):
    """Train one study's units and print its tables; gives back the predictions."""
    print(f"\n=== {name}, test fold {wanted.fold}", flush=True)
    study = esc.Study(**{"test_folds": [wanted.fold], "runs": wanted.runs} | STUDIES[name])
    out, started = Path(wanted.truth), time.perf_counter()
    training = training_of(name, wanted)
    reader = embeddings.get_embedding("yamnet", wanted.yamnet)
    esc.run_study(clips, tables, study, training, out, {"yamnet": reader})
    predictions = store.read_table(out / "predictions.csv")
    found = {"intervals": stats.intervals(predictions)}
    if len(study.arms) > 1:
        found["tests"] = stats.compare(predictions)
        found["directions"] = directions(found["tests"])
    if name in CONTROLS:
        found["controls"] = stats.compare(predictions, CONTROLS[name])
    if name == "variants":
        pairs = [(f"{model}:as_released", model) for model in ("sbcnn", "crnn")]
        found["models"] = stats.compare(predictions, pairs, of="model")
    if name == "baselines":
        found["published"] = beside_published(found["intervals"])
    keep(f"{name}-{wanted.fold}", found | {"predictions": predictions}, out)
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min")
    return predictions


def training_of(name, wanted):
    """How the classifiers of a study are trained."""
    return esc.Training(
        epochs=wanted.epochs, batch_size=16, device=wanted.device, workers=wanted.workers,
        patches_per_epoch=PATCHES.get(name),
    )  # fmt: skip


def keep(name, found, out):
    """Write tables, and print all but the predictions."""
    for kind, table in found.items():
        store.write_table(table, out / f"{name}-{kind}.csv")
        if kind != "predictions":
            print(f"\n{kind}")
            print(table.drop(columns=["exact"], errors="ignore").round(3).to_string(index=False))


def run_own(clips, tables, wanted):
    """Two recordings a class: clips of a model that has heard 24, and of one that heard these two."""
    print(f"\n=== own, test fold {wanted.fold}", flush=True)
    out, parts = Path(wanted.truth), []
    held = clips["fold"].isin([wanted.fold, wanted.fold % 5 + 1])
    for run in range(wanted.runs):
        study = esc.Study(OWN, ["sbcnn"], [wanted.fold], seed=run)
        two = esc.plan_study(clips, None, replace(study, arms=OWN[:1]))["real_rows"].iloc[0]
        few = clips[held | clips.index.isin(two)].reset_index(drop=True)
        folder = out / "generated" / f"own-{wanted.fold}-{run}"
        made = generated(
            sorted(set(few["label"])), OWN_CLIPS, trained(few, wanted, OWN_STEPS), folder, wanted.workers
        )
        esc.run_study(clips, tables | {"own": made}, study, training_of("own", wanted), out)
        parts.append(store.read_table(out / "predictions.csv").assign(run=run))
        predictions = pd.concat(parts, ignore_index=True)
        pairs = [(OWN[2], OWN[0]), (OWN[1], OWN[0]), (OWN[2], OWN[1])]
        found = {"intervals": stats.intervals(predictions), "predictions": predictions}
        keep(f"own-{wanted.fold}", found | {"tests": stats.compare(predictions, pairs)}, out)


def beside_published(intervals):
    """Baselines' accuracies beside Piczak's, in points, for ESC-10."""
    table = intervals.set_index("model")["accuracy"].to_frame("here")
    table["published"] = pd.Series(PICZAK)
    table["points_apart"] = 100 * (table["here"] - table["published"])
    table["within_3"] = table["points_apart"].abs() <= 3
    return table.dropna().reset_index()


def directions(tests):
    """What the tests say of the paper's three directions, arm by arm."""
    claims = {"both": "adding helps", "synthetic": "alone it is worse", "mixed": "few are harmless"}
    arms = tests["arm"].str.partition("@")
    kinds, mine = arms[0], arms[2] == "mini"
    table = tests.assign(claim=kinds.map(claims))[mine & kinds.isin(claims)]
    shown = {
        "adding helps": table["verdict"] == "better",
        "alone it is worse": table["verdict"] == "worse",
        "few are harmless": table["ci_low"] > -MARGIN,
    }
    said = np.where(np.select([table["claim"] == c for c in shown], shown.values()), "yes", "no")
    table = table.assign(shown=said)
    columns = ["claim", "arm", "ratio", "model", "difference", "ci_low", "ci_high", "p_holm"]
    return table[[*columns, "verdict", "shown"]]


def class_story(predictions, distances):
    """Print what each class gains, beside the distance of its synthetic clips."""
    for arm in ("both@mini:4", "synthetic@mini:4"):
        gains = stats.class_deltas(predictions, arm, "sbcnn")
        print(f"\nclasses, {arm} against real, and distances of the class against its gain")
        print(gains.round(3).to_string(index=False))
        both = distances.merge(gains, left_on="reference", right_on="label")
        for metric, part in both.groupby("metric"):
            print(metric, spearmanr(part["value"], part["difference"]))


def truth(wanted):
    """Run the chosen studies one after the other."""
    clips = datasets.load_clips("esc10", esc50_root=wanted.root)
    chosen = wanted.studies or [*STUDIES, "own"]
    started = time.perf_counter()
    tables, distances = {}, None
    if set(chosen) - {"baselines", "variants"}:
        tables, distances = synthetic_tables(clips, wanted)
        print(f"synthetic clips: {(time.perf_counter() - started) / 60:.1f} min")
    for name in chosen:
        if name == "own":
            run_own(clips, tables, wanted)
            continue
        predictions = run_study(name, clips, tables, wanted)
        if name == "arms":
            class_story(predictions, distances)
    print(f"in all {(time.perf_counter() - started) / 60:.1f} min, {wanted.workers} processes")


def speed(wanted):
    """Print the table of speeds."""
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(folder, wanted.clips)
        times = epoch_times(clips, Path(folder) / "cache", wanted.device)
        peer, first, _, drawn, epoch, bare = times
        print(f"{wanted.clips} clips of 4 s at 44.1 kHz, one thread, {wanted.device}; ms a clip")
        names = (
            "features, every epoch anew (paper)",
            "features, computed here, once",
            "features, found in the cache",
            "patches drawn from memory, an epoch",
            "epoch, features in memory",
            "its optimiser steps alone",
        )
        for name, value in zip(names, times, strict=True):
            print(f"  {name:36s}{value / wanted.clips * 1e3:9.2f}")
        print(f"  epoch over its bare steps: {100 * (epoch / bare - 1):+.0f} %")
        epochs = 50
        for many, name in ((1, "one classifier"), (50, "50 classifiers (10 folds, 5 runs)")):
            mine = drawn + first / (many * epochs)
            print(f"  feature time an epoch, {name} of {epochs}: {peer / mine:.0f} times less")
        ratio = epochs * (peer + epoch) / (first + epochs * epoch)
        print(f"  {epochs} epochs in all: {ratio:.1f} times faster than with features anew")
        hours = study_hours(epoch / wanted.clips, wanted.workers)
        print(f"  the paper's study, SB-CNN, {wanted.workers} side by side: about {hours:.0f} h")
        few = clips.head(100)
        for workers in (1, wanted.workers):
            out = Path(folder) / f"workers-{workers}"
            took = seconds(lambda n=workers, o=out: run_units(few, o, n, 4))
            print(f"  4 classifiers in {workers} processes: {took:.1f} s")
        before = peak_mb()
        run_units(few, Path(folder) / "many", 1, 12)
        print(f"  12 classifiers more in this process: {peak_mb() - before:+.0f} MB at the peak")


def main():
    """Speed by default, truth where a folder is given for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    say = parser.add_argument
    say("--clips", type=int, default=100)
    say("--workers", type=int, default=2)
    say("--device", default="cpu")
    say("--truth", metavar="FOLDER", help="run the studies on ESC-10 into this folder")
    say("--root", default="data/ESC-50", help="ESC-10 or ESC-50")
    say("--yamnet", help="YAMNet's TFLite file")
    say("--studies", nargs="+", choices=[*STUDIES, "own"], help="all by default")
    say("--fold", type=int, default=5, help="test fold; the next one stops the training")
    say("--runs", type=int, default=5)
    say("--epochs", type=int, default=60)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if not wanted.truth:
        speed(wanted)
    elif wanted.yamnet:
        truth(wanted)
    else:
        parser.error("--truth needs --yamnet")


if __name__ == "__main__":
    main()
