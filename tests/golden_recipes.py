"""Recipes of the golden values: short runs of the package whose results were frozen before.

Each part calls public names of the package and returns plain lists, numbers and texts, under names
of its own (see `MIX` and the like): who renames something in the package mends this file, and never
``golden/*.json``. ``golden/freeze.py`` writes what the parts return, ``test_golden.py`` compares.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import soundfile as sf
import torch
from toy_clips import CLASSES, write_clips

from soundscapes_utils import (
    captions,
    datasets,
    esc,
    fad,
    finetuning,
    generation,
    ldm,
    metadata,
    mixing,
    stats,
)

RATE = 16_000
DCASE = Path(__file__).parents[2] / "shared/data/dcase2024_task7_dev"


# --- helpers that know nothing of the package -----------------------------------------------------


def digest(*texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def plain(value):
    """Numbers, texts, lists and dicts as JSON gives them back; None for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, pd.Series)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def columns(table, names):
    """The columns of a table under our names: `names` maps ours to the package's."""
    return {ours: plain(table[theirs].tolist()) for ours, theirs in names.items()}


def samples_digest(path):
    samples, rate = sf.read(path, dtype="int16")
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() + f"/{rate}/{len(samples)}"


def own_names(*lines):
    """Our names are the package's: mend a single one with ``own_names(…) | {"ours": "theirs"}``."""
    return {name: name for line in lines for name in line.split()}


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- 1. mixes -------------------------------------------------------------------------------------

# golden name: column of the table of mixes
MIX = own_names(
    "split scene background_source onset_s duration_s active_start_s active_end_s clip_s repeats",
    "fade_s foreground_gain_db background_gain_db snr_db level_measure seed caption caption_2",
    "caption_3",
) | {"mix_id": "clip_id", "foreground_label": "label", "foreground_source": "source_id"}
EVENT = own_names("event repetition label onset_s offset_s snr_db fade_s") | {
    "mix_id": "clip_id",
    "source": "source_id",
    "foreground_gain_db": "gain_db",
}
SHORT = {"duration_s": 4.0, "sample_rate": RATE}
PLANS = {  # name: (seed, options of the plan, with stems)
    "default": (0, {}, True),
    "lufs": (1, {"snr_measure": "lufs", "snr_db": (0, 12), "format": "flac"}, False),
    "lambda": (
        2,
        {
            "mode": "lambda",
            "foreground_lambda": (0.5, 2.0),
            "background_lambda": (0.3, 1.0),
            "foreground_gain_db": (-6.0, 3.0),
            "background_gain_db": [-6.0, 0.0],
            "onset": (0.5, 2.5),
            "format": "flac",
        },
        True,
    ),
    "report-B": (3, mixing.PRESETS["gaurav2024-report"] | SHORT, False),
    "team-B": (4, mixing.PRESETS["gaurav2024-code"] | SHORT | {"format": "flac"}, False),
    "several": (
        5,
        {"events": (2, 3), "repeat": (1, 2), "fade_s": (0.01, 0.2), "onset": (0.0, 2.0)},
        True,
    ),
    "choices": (
        6,
        {
            "events": [2, 3],
            "snr_db": [0.0, 6.0, 12.0],
            "onset": [0.25, 1.5],
            "repeat": 2,
            "fade_s": 0.05,
            "test_fold": 2,
        },
        False,
    ),
    "loud": (7, {"snr_db": (10, 25), "background_gain_db": (0.0, 18.0)}, True),
}


def built_in_sounds(folder):
    events = datasets.load_builtin(folder / "data", clips_per_class=5)
    return datasets.load_scenes("builtin", events, data_dir=folder / "data", scenes_per_class=5)


def planned(sounds, name, n=5):
    seed, options, _ = PLANS[name]
    return mixing.plan_scenes(*sounds, n, seed, **SHORT | options)


def rendered(plan, name, out_dir, engine):
    mixes, events = plan
    how = {"workers": 1, "engine": engine, "stems": PLANS[name][2], "events": events}
    return mixing.render_mixes(mixes, out_dir, RATE, **how)


def mixes(folder):
    sounds = built_in_sounds(folder)
    found = {}
    for name in PLANS:
        plan = planned(sounds, name)
        sounding = mixing.occurrences(*plan)
        found[name] = {"recipes": columns(plan[0], MIX), "events": columns(sounding, EVENT)}
        for engine in ("numpy", "pydub"):
            made = rendered(plan, name, folder / name / engine, engine)
            found[name][engine] = {
                "peak_scale": plain(made["peak_scale"].tolist()),
                "samples": {
                    path.relative_to(folder / name / engine).as_posix(): samples_digest(path)
                    for path in sorted((folder / name / engine).rglob("*.[wf][al][va]*"))
                },
            }
    return found


# --- 2. captions ----------------------------------------------------------------------------------

LABELS = list(
    own_names(
        "dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets "
        "chirping_birds water_drops wind pouring_water toilet_flush thunderstorm crying_baby sneezing "
        "clapping breathing coughing footsteps laughing brushing_teeth snoring drinking_sipping "
        "door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine "
        "vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn engine "
        "train church_bells airplane fireworks hand_saw air_conditioner children_playing dog_bark "
        "drilling engine_idling gun_shot jackhammer street_music"
    )
)
SCENES = ("park", "metro_station", "street_traffic", "rain")
FAMILIES = ("label", "simple", "gpt", "varied", "task")


def captions_of(label, scene, seed, n):
    return list(captions.mix_captions(label, scene, seed, n))


def prompts_of(label, family):
    return captions.prompts([label], family, n=5, seed=0)["prompt"].tolist()


def negatives_of(label):
    return [captions.negative_prompt(label, confusions=wanted) for wanted in (False, True)]


def captions_and_prompts(folder=None):
    texts = {
        f"{label} captions": [
            captions_of(which, scene, seed, n)
            for which in (label, [label, "dog" if label != "dog" else "rain"])
            for scene in SCENES
            for seed in (0, 1, 12345)
            for n in (3, 6)
        ]
        for label in LABELS
    }
    texts |= {f"{x} {family}": prompts_of(x, family) for x in LABELS for family in FAMILIES}
    texts |= {f"{label} negative": negatives_of(label) for label in LABELS}
    texts["no label negative"] = [captions.negative_prompt()]
    shown = [captions_of(label, "park", 0, 6)[-1] for label in LABELS[::6]]
    shown += [captions_of(["dog", "siren", "rain"], "bus", 7, 4)[-1]]
    shown += [prompts_of(label, family)[-1] for label in ("cow", "siren") for family in FAMILIES]
    return {"digests": {key: digest(text) for key, text in texts.items()}, "shown": shown[:20]}


# --- 3. clips of the built-in model ---------------------------------------------------------------

CLIP = own_names("clip_id prompt seed")


def plan_of_clips():
    return generation.plan_clips(
        ["dog", "rain", "siren"], 2, ["simple", "varied"], duration_s=2.56, seed=0, dataset="embedded"
    )


def made_clips(plan, out_dir):
    backend = generation.get_backend("audioldm", checkpoint="builtin", device="cpu", steps=25)
    return generation.generate_clips(plan, backend, out_dir)


def levels(path, segments=64):
    """Root mean squares of equal parts of a file, relative to its peak."""
    y, _ = sf.read(path)
    parts = np.array_split(y / np.abs(y).max(), segments)
    return [float(np.sqrt(np.mean(part**2))) for part in parts]


def clips(folder):
    plan = plan_of_clips()
    made = made_clips(plan, folder / "clips")
    made = made.set_index(CLIP["clip_id"]).loc[plan[CLIP["clip_id"]]]
    return {
        "plan": columns(plan, CLIP),
        "steps": plain(made["steps"].tolist()),
        "seed": plain(made["seed"].tolist()),
        "rate_and_length": [[sf.info(p).samplerate, sf.info(p).frames] for p in made["path"]],
        "levels": [[round(x, 7) for x in levels(path)] for path in made["path"]],
    }


# --- 4. fine-tuning -------------------------------------------------------------------------------

LOG = own_names(
    "step train_loss train_simple train_vlb val_loss val_loss_ema val_simple_ema val_vlb_ema",
    "test_loss_ema val_audio_ema val_loss_t1 val_loss_t4 learning_rate grad_norm",
)


def tiny_start(folder):
    """A checkpoint of random weights and a set of ten mixes; what `tuning` changes is the rest."""
    sounds = built_in_sounds(folder)
    plan = planned(sounds, "default", n=10)
    made = rendered(plan, "default", folder / "mixes", "numpy")
    dataset = metadata.write_audiocaps(made, folder / "metadata", "golden")
    pipe, tower = ldm.build_small(made["caption"].tolist(), channels=(16, 32, 48))
    rng = np.random.default_rng(0)
    mels = [ldm.waveform_to_mel(rng.normal(size=10_240), 64) for _ in range(4)]
    pipe.vae.fit(torch.stack(mels))
    info = {"steps": 2}
    checkpoint = ldm.save_checkpoint(pipe, folder / "small", info, tower.eval())
    return finetuning.FinetuneConfig(
        checkpoint=str(checkpoint),
        dataset_root=str(dataset),
        out_dir=str(folder / "out"),
        steps=30,
        batch_size=4,
        learning_rate=1e-3,
        lr_warmup_steps=4,
        decay_start=0.5,
        segment_s=0.64,
        validation_steps=3,
        text_condition_probability=0.5,
        info={"training_dataset": "golden"},
    )


def log_of(result):
    return {"best_step": plain(result.best_step), **columns(result.log, LOG)}


def tuned(config):
    return log_of(finetuning.finetune(config))


def tuned_after_a_kill(config, step=14):
    """The same, stopped by Ctrl-C as it draws the batch of that step, and begun again."""
    config = replace(config, out_dir=config.out_dir + "-killed")
    draw = finetuning.training_batch  # what draws the batch of a step

    def interrupted(data, settings, at):
        if at == step:
            raise KeyboardInterrupt
        return draw(data, settings, at)

    try:
        with mock.patch.object(finetuning, "training_batch", interrupted):
            finetuning.finetune(config)
    except KeyboardInterrupt:
        return log_of(finetuning.finetune(config))
    raise AssertionError("the run was not interrupted")


def tuned_by_two(config):
    """The first six steps, at the full rate as in `config`, in two processes (gloo)."""
    first = replace(config, steps=6, decay_start=1.0, gradient_accumulation_steps=2)
    return log_of(finetuning.launch(replace(first, out_dir=config.out_dir + "-two"), processes=2))


def finetuning_losses(folder):
    return tuned(tiny_start(folder))


# --- 5. scores ------------------------------------------------------------------------------------


def score_rows(table, halves):
    """The score table with its floors as rows ahead of each metric's candidates, as was frozen."""
    keys = ["value", "ci_low", "ci_high"]
    names = ["metric", "candidate", *keys, "n_reference", "n_candidate", "note"]
    rows = []
    for metric, part in table.groupby("metric", sort=False):
        for n, same in part.groupby("floor_n"):
            floor = same.iloc[0]
            values = [floor[key] for key in ("floor", "floor_low", "floor_high")]
            sizes = [n if halves else floor["n_reference"], n]
            note = floor["note"].partition("floor: ")[2]
            rows.append([metric, "real (floor)", *values, *sizes, note])
        for row in part.to_dict("records"):
            note = row["note"].partition("floor: ")[0].removesuffix("; ")
            rows.append([metric, row["candidate"], *(row[key] for key in names[2:-1]), note])
    return {name: plain([row[i] for row in rows]) for i, name in enumerate(names)}


METRICS = ("FAD", "FAD-inf", "KAD", "precision", "recall", "density", "coverage")


def gaussians(seed, n, d, shift=0.0, rank=None):
    rng = np.random.default_rng(seed)
    if rank is None:
        return shift + rng.normal(size=(n, d))
    return shift + rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))


SHAPES = {  # name: (reference, candidate)
    "n > d": (gaussians(0, 60, 8), gaussians(1, 40, 8, 0.5)),
    "n < d": (gaussians(2, 12, 40), gaussians(3, 15, 40, 0.5)),
    "n >> d": (gaussians(4, 400, 3), gaussians(5, 300, 3, 1.0)),
    "one dimension": (gaussians(6, 50, 1), gaussians(7, 30, 1, 0.2)),
    "rank-deficient": (gaussians(8, 50, 10, rank=3), gaussians(9, 45, 10, 0.3, rank=4)),
    "candidate < d < reference": (gaussians(10, 90, 30), gaussians(11, 9, 30, 0.1)),
}


def score_table(**options):
    candidates = {"near": gaussians(21, 48, 6, 0.2), "far": gaussians(22, 40, 6, 1.5)}
    groups = {"real": np.arange(60) // 2, "near": np.arange(48) // 3, "far": np.arange(40) // 2}
    table = fad.score_table(
        gaussians(20, 60, 6),
        candidates,
        embedding="toy",
        metrics=METRICS,
        groups=groups,
        repeats=40,
        **options,
    )
    return score_rows(table, halves="floor" not in options)


def scores(folder=None):
    return {
        "halves": score_table(),
        "outside": score_table(floor=gaussians(23, 70, 6), seed=3),
        "frechet": {name: float(fad.frechet_distance(*pair)) for name, pair in SHAPES.items()},
        "kernel": {name: float(fad.kernel_distance(*pair)) for name, pair in SHAPES.items()},
    }


def challenge_floors(folder=None):
    """What real clips of DCASE 2024 Task 7 score against each other, by network."""
    _, published = datasets.load_dcase2024_task7(DCASE)
    found = {}
    for network, windows in published.items():
        points, recordings = fad.stack_windows(windows)
        half = recordings >= 30
        table = fad.score_table(
            points[~half],
            {"second half": points[half]},
            embedding=network,
            metrics=("FAD", "KAD"),
            groups={"real": recordings[~half], "second half": recordings[half]},
            repeats=20,
        )
        found[network] = score_rows(table, halves=True)
    return found


# --- 6. study and statistics ----------------------------------------------------------------------

RESULT = own_names("arm ratio fold run seed n_real n_synthetic epochs steps accuracy")
PREDICTION = own_names("clip_id label predicted arm ratio fold run")
CURVE = own_names("arm ratio fold epoch train_loss validation_loss")


def toy_study(folder, out_dir):
    real = write_clips(folder, CLASSES, range(1, 6), 2, 0)
    made = write_clips(folder, CLASSES, [0], 12, 1000).drop(columns="fold")
    made = made.assign(backend="toy", prompt_family="label", checkpoint="c1")
    study = esc.Study(["real", "both:1", "mixed:1", "synthetic:1"], ["sbcnn"], (5, 2))
    training = esc.Training(epochs=2, batch_size=8, workers=1)
    return esc.run_study(real, made, study, training, out_dir)


def study(folder):
    results = toy_study(folder / "toys", folder / "study")
    predictions = pd.read_csv(folder / "study" / "predictions.csv")
    curves = pd.read_csv(folder / "study" / "curves.csv")
    return {
        "results": columns(results, RESULT),
        "predictions": columns(predictions, PREDICTION),
        "curves": columns(curves, CURVE),
    }


def toy_predictions():
    rng = np.random.default_rng(0)
    rows = [
        (
            *(f"{run}-{fold}-{i}", "dog", "dog" if rng.random() < chance else "rain"),
            *(arm, ratio, "sbcnn", fold, run),
        )
        for arm, ratio, chance in (("real", 0.0, 0.6), ("both", 1.0, 0.8))
        for run in (0, 1)
        for fold in (1, 2)
        for i in range(15)
    ]
    return pd.DataFrame(rows, columns=["clip_id", "label", "predicted", *_WHICH])


_WHICH = ["arm", "ratio", "model", "fold", "run"]
PAIRED = own_names("n difference ci_low ci_high effect p_value exact")


def statistics(folder=None):
    rng = np.random.default_rng(0)
    values, few, many = rng.normal(size=30), rng.normal(0.3, 1, 10), rng.normal(0.1, 1, 40)
    predictions = toy_predictions()
    return {
        "bootstrap_ci": plain(stats.bootstrap_ci(values)),
        "bootstrap_ci of the median": plain(
            stats.bootstrap_ci(values, np.median, n=500, confidence=0.9, seed=4)
        ),
        "paired_test, exact": plain(stats.paired_test(few, values[:10])),
        "paired_test, drawn": plain(stats.paired_test(many[:30], values, n=2000, seed=1)),
        "holm": plain(stats.holm([0.01, 0.04, 0.03, 0.005, 0.5])),
        "compare": {
            by: columns(stats.compare(predictions, by=by), PAIRED) for by in ("clip", "fold", "run")
        },
    }


# name of the part, and of its file in golden/: its recipe
PARTS = {
    "mixes": mixes,
    "captions": captions_and_prompts,
    "clips": clips,
    "finetuning": finetuning_losses,
    "scores": scores,
    "challenge": challenge_floors,
    "study": study,
    "statistics": statistics,
}
