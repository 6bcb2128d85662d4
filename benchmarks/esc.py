"""Augmentation study: row P7 of `all.py`, and its truth on real recordings.

P7. Epochs at the size of UrbanSound8K, eight folds of ten to train on and one to validate, against the
optimiser's steps alone on the same patches, drawn anew in every epoch on both sides.

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
import multiprocessing
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
    classifiers,
    datasets,
    embeddings,
    esc,
    fad,
    generation,
    minimodel,
    selection,
    stats,
    store,
)


def bare_epoch(network, optimiser, patches, y):
    """Draw an epoch's patches and take its optimiser steps, and nothing else."""
    for part in torch.randperm(len(y)).split(128):
        batch = patches[part, torch.randint(patches.shape[1], (len(part),))]
        loss = torch.nn.functional.cross_entropy(network(batch.transpose(1, 2).unsqueeze(1)), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()


def p7(work, quick, options):
    """Epochs of both networks with validation, over bare steps."""
    n = 160 if quick else 8732
    rng, n_train, epochs = np.random.default_rng(0), n * 8 // 10, 1 if quick else 2
    x = classifiers.standardise(rng.normal(size=(n_train + n // 10, 126, 64)).astype(np.float32))
    y = np.arange(len(x)) % 10
    parts = [(x[:n_train], y[:n_train]), (x[n_train:], y[n_train:])]
    patches = torch.from_numpy(parts[0][0]).unfold(1, classifiers.PATCH_FRAMES, 1)
    for model in ("sbcnn", "crnn"):
        network = classifiers.MODELS[model](10).to(memory_format=torch.channels_last).train()
        optimiser = torch.optim.Adam(network.parameters(), **classifiers.ADAM)
        bare = partial(bare_epoch, network, optimiser, patches, torch.from_numpy(parts[0][1]))
        whole = partial(classifiers.train_classifier, model, *parts, 10, esc.Training(epochs=epochs))
        bare_epoch(network, optimiser, patches[:128], torch.from_numpy(y[:128]))  # the first is slower
        found = []
        for action, times in [(bare, 1), (whole, epochs)] * (1 if quick else 2):
            started = time.perf_counter()
            action()
            found.append((time.perf_counter() - started) / times)
        row = {"what": f"{model}, {n_train} clips, {n // 10} to validate", "peer": "bare steps"}
        best = {"theirs": min(found[::2]), "ours": min(found[1::2])}
        yield row | best | {"unit": "s an epoch", "most": 1.15}


ROWS = {"P7": p7}


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


def main():
    """Run the studies that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    say = parser.add_argument
    say("--workers", type=int, default=2)
    say("--device", default="cpu")
    say("--truth", required=True, metavar="FOLDER", help="run the studies on ESC-10 into this folder")
    say("--root", default="data/ESC-50", help="ESC-10 or ESC-50")
    say("--yamnet", required=True, help="YAMNet's TFLite file")
    say("--studies", nargs="+", choices=[*STUDIES, "own"], help="all by default")
    say("--fold", type=int, default=5, help="test fold; the next one stops the training")
    say("--runs", type=int, default=5)
    say("--epochs", type=int, default=60)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    truth(wanted)


if __name__ == "__main__":
    main()
