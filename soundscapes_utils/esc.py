"""Environmental sound classification: does synthetic audio help a classifier of real recordings?

Two networks, SB-CNN and CRNN, are trained in *arms*: on real clips, on real and synthetic ones, with
some real training folds replaced by synthetic clips, on synthetic clips only, and on the controls
that tell more clips from more steps (:func:`parse_arm` lists all). Whatever the arm, test clips are
real recordings of the test fold, and validation clips those of the fold after it.

The protocol, features and architectures are those of Ronchini, Comanducci and Antonacci (arXiv
2403.17864, below: the paper). Its released code departs from them. ``"sbcnn"`` and ``"crnn"`` are put
right; ``"sbcnn:faithful"`` and ``"crnn:faithful"`` compute what the released code computes, with the
same seeds and the same order of clips:

====================  ==========================================  ================================
Part                  Released code (``:faithful``)               Corrected
====================  ==========================================  ================================
GRU of the CRNN       recurs over the clips of a batch            recurs over time
GLU of the CRNN       x·σ(x): no weights of its own               learned value, (Wx + b)·σ(x)
Frames of 4 s         counted by the window: 63 of 126            counted by the hop: 126
"3 s" training patch  45 frames, 1.44 s, from 15 places           94 frames, 3.0 s, from 33 places
Normalisation         by the variance                             by the standard deviation
Test                  one random patch, here from the seed        mean over patches of the clip
Validation            synthetic clips in some arms                real clips in every arm
====================  ==========================================  ================================

(The last row is a matter of the plan: ``validation="faithful"``.) Beside them stand Piczak's k-NN,
random forest and SVM, a linear probe on any embedding, and a fine-tuned transformer, see
:data:`BASELINES` and :func:`run_arms`.

A trained classifier is a *unit* (arm, ratio, model, fold, run). Its result is written when it is done,
under a name that holds a hash of all that went into it, so that a run can be stopped and resumed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import zlib
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from soundscapes_utils import datasets, stats, store
from soundscapes_utils.comparison import (
    RESULT_COLUMNS,
    choice_on_test,
    class_consistency,
    class_correlation,
    class_deltas,
    class_distances,
    compare,
    compare_all,
    compare_models,
    compare_pairs,
    confusion,
    confusion_difference,
    intervals,
    mcnemar_runs,
    published,
    summarise,
)
from soundscapes_utils.features import (
    CLIP_FRAMES,
    CLIP_SECONDS,
    FAITHFUL_FRAMES,
    FAITHFUL_PATCH,
    FAITHFUL_STARTS,
    HOP,
    LOG_OFFSET,
    N_MELS,
    PATCH_FRAMES,
    SAMPLE_RATE,
    TRANSFORMS,
    WINDOW,
    divide_by_variance,
    features,
    load_features,
    load_kept,
    load_mfcc_statistics,
    mfcc_statistics,
    standardise,
    transform_clips,
)
from soundscapes_utils.metadata import LeakError
from soundscapes_utils.networks import (
    ADAM_EPS,
    AST_CHECKPOINT,
    BASELINES,
    CRNN,
    FAITHFUL,
    GLU,
    LEARNING_RATE,
    LOG_COLUMNS,
    MODELS,
    SBCNN,
    WEIGHT_DECAY,
    PretrainedTransformer,
    class_probabilities,
    fit_baseline,
    load_transformer_inputs,
    predict,
    predict_one_patch,
    train_classifier,
)

# one name for the whole study, wherever a part of it is written
__all__ = [
    "ADAM_EPS",
    "ARMS",
    "AST_CHECKPOINT",
    "BASELINES",
    "CLIP_FRAMES",
    "CLIP_SECONDS",
    "CRNN",
    "FAITHFUL",
    "FAITHFUL_FRAMES",
    "FAITHFUL_PATCH",
    "FAITHFUL_STARTS",
    "GLU",
    "HOP",
    "LEARNING_RATE",
    "LOG_COLUMNS",
    "LOG_OFFSET",
    "MODELS",
    "N_MELS",
    "PATCH_FRAMES",
    "PROTOCOLS",
    "RESULT_COLUMNS",
    "SAMPLE_RATE",
    "SBCNN",
    "TRANSFORMS",
    "WEIGHT_DECAY",
    "WINDOW",
    "LeakError",
    "PretrainedTransformer",
    "UnitsFailed",
    "arm_parts",
    "choice_on_test",
    "class_consistency",
    "class_correlation",
    "class_deltas",
    "class_distances",
    "class_probabilities",
    "compare",
    "compare_all",
    "compare_models",
    "compare_pairs",
    "confusion",
    "confusion_difference",
    "divide_by_variance",
    "features",
    "fit_baseline",
    "intervals",
    "load_features",
    "load_kept",
    "load_mfcc_statistics",
    "load_transformer_inputs",
    "main",
    "mcnemar_runs",
    "mfcc_statistics",
    "parse_arm",
    "plan_units",
    "predict",
    "predict_one_patch",
    "protocol",
    "published",
    "random_drop",
    "run_arms",
    "standardise",
    "summarise",
    "train_classifier",
    "transform_clips",
]

ARMS = (
    *("real", "both", "mixed", "synthetic", "repeat", "steps", "thinned", "dropped"),
    *("specaugment", "mixup"),
)
# columns of a generated table that say where a row may serve, see plan_units
_BINDING = ("made_from", "held_out_fold")
_NEED_SYNTHETIC = ("both", "mixed", "synthetic", "thinned")
_ON_THE_FLY = ("specaugment", "mixup")
_WHOLE_AMOUNT = ("mixed", "dropped", "specaugment")

PROTOCOLS = pd.DataFrame(
    [("urbansound8k", 10, 10), ("esc50", 5, 50), ("esc10", 5, 10), ("builtin", 5, 10)],
    columns=["dataset", "n_folds", "n_classes"],
).set_index("dataset")
"""Folds and classes of each data set; the fold after the test fold validates, see `protocol`."""

_NO_ROWS = np.zeros(0, np.int32)
_HEARD_VALIDATION = "the generator learnt from the fold that early stopping looks at"

# part of every unit's key: raise it when training changes in a way that its inputs do not show
_RECIPE = 1


class UnitsFailed(RuntimeError):
    """Some classifiers could not be trained; the others are done and kept."""


# --- arms and units ------------------------------------------------------------------------------


_ARM = re.compile(
    r"(?P<kind>[a-z]+)(@(?P<source>[^@/:]+))?(/(?P<per_class>[1-9][0-9]*))?(:(?P<amount>[^:]*))?"
)


def parse_arm(text):
    """Read an arm's name and how much of it.

    Parameters
    ----------
    text : str
        ``name@source/k:amount``; source, k and, for real, amount are left out. The names:

        ``real``; ``both:R`` or ``synthetic:R``, R synthetic clips for each real training clip;
        ``mixed:N``, N of the training folds replaced by as many synthetic clips.

        Controls, of real clips only: ``repeat:R``, each clip R times more (equal n and steps as
        both:R); ``steps:R``, 1 + R times the epochs and the patience (equal steps); ``dropped:N``,
        N training folds left out and nothing in their place. ``thinned:R`` is both:R, thinned at
        random to as many clips of each class as there are real ones (equal n as real).

        Other augmentation of the real clips: ``specaugment:K``, ``mixup:A``, see
        :func:`train_classifier`; pitch and speed are a source, see :func:`transform_clips`.

        ``@source`` says which of several tables of synthetic clips; ``@a+b`` takes them in turn.
        ``/k`` trains on k real clips a class; R counts from them.

    Returns
    -------
    tuple of (str, float)
        What precedes the colon, and R, N, K or A (0 for real).

    Raises
    ------
    ValueError
        Unknown arm, or a number or source that it cannot have.

    Examples
    --------
    >>> parse_arm("both:2"), parse_arm("real"), parse_arm("both@ps1/8:4")
    (('both', 2.0), ('real', 0.0), ('both@ps1/8', 4.0))
    """
    found = _ARM.fullmatch(str(text))
    kind = found["kind"] if found else ""
    try:
        value = float((found and found["amount"]) or 0)
    except ValueError:
        value = -1.0
    fits = value == 0 if kind == "real" else 0 < value < np.inf
    fits &= kind not in _WHOLE_AMOUNT or value.is_integer()
    fits &= kind in _NEED_SYNTHETIC or not (found and found["source"])
    if kind not in ARMS or not fits:
        raise ValueError(
            f"cannot read the arm {text!r}: use 'real', 'both:1.0', 'synthetic:1.0' (synthetic clips "
            "for each real one), 'mixed:2' (training folds replaced), or a control, see parse_arm"
        )
    return str(text).partition(":")[0], value


def arm_parts(arm):
    """Take an arm's name apart, for tables and figures.

    Parameters
    ----------
    arm : str
        First part of what :func:`parse_arm` returns, as in the column `arm` of results.

    Returns
    -------
    tuple of (str, str, int or None)
        Kind, source (empty where there is one table only), real clips a class (None: all).

    Examples
    --------
    >>> arm_parts("both@ps1/8"), arm_parts("real")
    (('both', 'ps1', 8), ('real', '', None))
    """
    found = _ARM.fullmatch(arm)
    per_class = found["per_class"]
    return found["kind"], found["source"] or "", int(per_class) if per_class else None


def protocol(clips):
    """Say which fold tests, validates and trains, and refuse an incomplete data set.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*), of one data set of :data:`PROTOCOLS`.

    Returns
    -------
    pandas.DataFrame
        One row a fold: `test_fold, validation_fold, training_folds, n_train, n_validation, n_test`.
        Fold n tests, fold n + 1 validates (the first after the last, so that the paper's
        ``(n + 1) mod 11`` with 1 for 0 comes out), the others train.

    Raises
    ------
    ValueError
        Unknown data set, several at once, or folds or classes missing: the fold after a missing
        one would validate in its place, and no figure would be comparable.

    Examples
    --------
    >>> clips = pd.DataFrame({"fold": [1, 2], "label": ["dog", "rain"], "dataset": "esc10"})
    >>> protocol(clips)
    Traceback (most recent call last):
    ValueError: esc10 has 5 folds and 10 classes, these clips have 2 and 2; load the whole data set
    """
    names = sorted(set(clips["dataset"]))
    if len(names) != 1 or names[0] not in PROTOCOLS.index:
        raise ValueError(f"datasets {names}: give one of {', '.join(PROTOCOLS.index)}")
    wanted = PROTOCOLS.loc[names[0]]
    folds = sorted(set(clips["fold"]))
    classes = clips["label"].nunique()
    if folds != list(range(1, wanted.n_folds + 1)) or classes != wanted.n_classes:
        raise ValueError(
            f"{names[0]} has {wanted.n_folds} folds and {wanted.n_classes} classes, these clips have "
            f"{len(folds)} and {classes}; load the whole data set"
        )
    rows = []
    for fold in folds:
        split = datasets.assign_splits(clips, fold)
        counts = {f"n_{n}": int((split == key).sum()) for n, key in _SPLITS.items()}
        held = {key: clips["fold"][split == key].unique().tolist() for key in ("train", "val")}
        rows.append(
            {"test_fold": fold, "validation_fold": held["val"][0]}
            | {"training_folds": sorted(held["train"])}
            | counts
        )
    return pd.DataFrame(rows)


_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def random_drop(generated, like, seed=0):
    """Drop synthetic clips at random until as many are left as a filter left: its control.

    Parameters
    ----------
    generated : pandas.DataFrame
        Table *generated* before the filter.
    like : pandas.DataFrame
        The filtered table.
    seed : int, default 0
        Of the choice.

    Returns
    -------
    pandas.DataFrame
        Rows of `generated`, of each class as many as `like` holds.

    Raises
    ------
    ValueError
        `like` holds more clips of a class than `generated`.

    Examples
    --------
    >>> made = pd.DataFrame({"label": ["dog", "dog", "rain", "rain"]})
    >>> random_drop(made, made.iloc[[0, 2, 3]])["label"].value_counts().to_dict()
    {'rain': 2, 'dog': 1}
    """
    wanted = like["label"].value_counts()
    have = generated["label"].value_counts().reindex(wanted.index, fill_value=0)
    if (wanted > have).any():
        label = (wanted - have).idxmax()
        raise ValueError(f"{wanted[label]} clips of {label!r} wanted, there are {have[label]}")
    shuffled = generated.sample(frac=1, random_state=seed)
    place = shuffled.groupby("label").cumcount()
    kept = shuffled[place < shuffled["label"].map(wanted).fillna(0)]
    return kept.sort_index()


def plan_units(
    clips,
    generated,
    arms,
    *,
    models=("sbcnn", "crnn"),
    test_folds=(5,),
    runs=1,
    seed=0,
    real_per_class=None,
    generator_folds=None,
    validation="real",
):
    """Say, before anything is trained, which clips each classifier will see.

    All arms of one fold and run draw from the same shuffled lists, so that a larger ratio adds clips
    to a smaller one, and share their seed: their differences are those of the training clips.

    Parameters
    ----------
    clips : pandas.DataFrame
        Real recordings (table *clips*).
    generated : pandas.DataFrame, dict of str to pandas.DataFrame, or None
        Synthetic clips (table *generated*), several tables by the names that arms call for with
        ``@``; None where no arm needs any. Two optional columns bind a row: it is used only for the
        test fold `held_out_fold` (of a generator trained without that fold), or only where the
        recording `made_from` is among the real training clips.
    arms : list of str
        See :func:`parse_arm`.
    models : sequence of str
        Keys of :data:`MODELS`; those of :data:`FAITHFUL` with ``":faithful"``; rows of
        :data:`BASELINES`;
        ``"probe:<embedding>"``; ``"ast:<checkpoint>"``.
    test_folds : sequence of int
        Folds to test on, one after the other; the next fold, cyclically, validates.
    runs : int, default 1
        Repetitions with other seeds.
    seed : int, default 0
        All choices follow from it.
    real_per_class : int, optional
        Train on so many real clips a class (spread over the training folds) instead of all.
    generator_folds : sequence of int, or dict of str to sequence of int, optional
        Folds that the generator of `generated` (of each table) was trained on; none if it never met
        these recordings.
    validation : {"real", "faithful", "none"}
        What early stopping looks at: real clips of the fold after the test fold; these and synthetic
        ones in the arms both, thinned and synthetic (there, synthetic ones only), as in the released
        code; nothing: that fold trains too, which only classifiers without early stopping allow.

    Returns
    -------
    pandas.DataFrame
        One row a unit: `arm, ratio, model, fold, run, seed, n_real, n_synthetic, n_validation,
        n_test`, the row numbers (arrays) `real_rows, synthetic_rows, validation_rows, test_rows`, with
        faithful validation also `validation_synthetic_rows`; and `note`, which says where early
        stopping looks at recordings that the generator learnt from. `ratio` is the number that the
        arm carries. Synthetic rows count through all tables, one after the other.

    Raises
    ------
    LeakError
        The generator saw a test fold.
    ValueError
        Unknown arm, model or fold; a source recording that spans splits; too few real or synthetic
        clips of a class; more folds to replace than there are.

    Examples
    --------
    >>> clips = pd.DataFrame({"label": ["dog", "rain"] * 3, "fold": [1, 1, 2, 2, 3, 3]})
    >>> clips["source_id"] = clips["clip_id"] = clips.index.astype(str)
    >>> plan_units(clips, None, ["real"], models=["sbcnn"], test_folds=[3])[["n_real", "n_test"]]
       n_real  n_test
    0       2       2
    """
    wanted = list(dict.fromkeys(parse_arm(arm) for arm in arms))
    _check_design(wanted, arms, models, validation)
    tables = _tables(generated, wanted)
    for name in _sources(wanted):
        _refuse_leak(tables[name], test_folds, _folds_of(generator_folds, name))
    synthetic = pd.concat(tables.values(), ignore_index=True) if tables else None
    units = []
    for fold in test_folds:
        rows = _rows_by_split(clips, fold)
        if validation == "none":
            rows |= {"train": np.union1d(rows["train"], rows["val"]), "val": _NO_ROWS}
        for run in range(runs):
            rng = np.random.default_rng([seed, fold, run])
            real = _spread_choice(clips, rows["train"], real_per_class, rng)
            folds = rng.permutation(sorted(set(clips["fold"].iloc[real])))
            pools = _pools(tables, fold, rng, [seed, fold, run])
            for arm, amount in wanted:
                few = arm_parts(arm)[2]
                # the same seed for every k: the smaller sets lie within the larger
                chance = np.random.default_rng([seed, fold, run, 1])
                base = _spread_choice(clips, rows["train"], few, chance) if few else real
                kind = arm_parts(arm)[0]
                stops_by_both = validation == "faithful" and kind != "mixed"
                beside = rows["val"] if stops_by_both else _NO_ROWS
                usable = _usable(pools, synthetic, clips, base)
                drawn = _draw(clips, base, beside, folds, usable, arm, amount, chance)
                # four bytes a row, and one array for all models
                chosen, added, made_beside = (np.asarray(part, np.int32) for part in drawn)
                held = _NO_ROWS if stops_by_both and kind == "synthetic" else rows["val"]
                note = _note(arm, set(clips["fold"].iloc[held]), generator_folds)
                for model in models:
                    unit_seed = _unit_seed(seed, model.partition(":")[0], fold, run)
                    about = (arm, amount, model, int(fold), run, unit_seed)
                    units.append((*about, chosen, added, held, rows["test"], made_beside, note))
    named = ["arm", "ratio", "model", "fold", "run", "seed"]
    parts = ["real", "synthetic", "validation", "test"]
    columns = [*named, *(f"{part}_rows" for part in parts), "validation_synthetic_rows", "note"]
    plan = pd.DataFrame(units, columns=columns)
    for place, part in enumerate(parts):
        plan.insert(len(named) + place, f"n_{part}", plan[f"{part}_rows"].map(len))
    if validation != "faithful":
        return plan.drop(columns="validation_synthetic_rows")
    plan["n_validation"] += plan["validation_synthetic_rows"].map(len)
    return plan


def _check_design(wanted, arms, models, validation):
    faithful = [f"{name}:faithful" for name in FAITHFUL]
    known = {*MODELS, *faithful, *BASELINES.index}
    unknown = [m for m in models if m not in known and not re.match(r"(probe|ast):.", m)]
    if unknown or not wanted or not models:
        raise ValueError(
            f"models {list(models)}, arms {list(arms)}: models are {list(MODELS)}, {faithful}, "
            f"{list(BASELINES.index)}, 'probe:<embedding>' and 'ast:<checkpoint>'"
        )
    if validation not in ("real", "faithful", "none"):
        raise ValueError(f"validation must be 'real', 'faithful' or 'none', got {validation!r}")
    networks = [model for model in models if not _is_baseline(model)]
    if validation == "none" and networks:
        raise ValueError(f"{networks[0]} stops early and needs validation clips: use 'real'")
    for arm, _ in wanted:
        kind = arm_parts(arm)[0]
        if kind in (*_ON_THE_FLY, "steps") and len(networks) < len(models):
            other = next(model for model in models if _is_baseline(model))
            raise ValueError(f"the arm {kind} is a way to train networks; leave it or {other} out")


def _is_baseline(model):
    return model in BASELINES.index or model.startswith("probe:")


def _sources(wanted):
    """Names of the tables of synthetic clips that the arms call for."""
    parts = [arm_parts(arm) for arm, _ in wanted]
    named = [source.split("+") for kind, source, _ in parts if kind in _NEED_SYNTHETIC]
    return list(dict.fromkeys(name for names in named for name in names))


def _tables(generated, wanted):
    """Tables of synthetic clips by name; those that the arms need are there, or an error."""
    sources = _sources(wanted)
    if not sources:
        return {}
    if generated is None or not len(generated):
        raise ValueError("these arms need synthetic clips: run notebook 02_synthetic_generation")
    tables = generated if isinstance(generated, dict) else {"": generated}
    missing = [name for name in sources if name not in tables]
    if missing:
        raise ValueError(
            f"no table of synthetic clips is called {missing[0]!r}; there are {list(tables)}: ask "
            "for one as in 'both@name:1'"
        )
    return tables


def _folds_of(generator_folds, name):
    if isinstance(generator_folds, dict):
        return generator_folds.get(name)
    return generator_folds


def _refuse_leak(generated, test_folds, generator_folds):
    if not len(generated):
        raise ValueError("these arms need synthetic clips: run notebook 02_synthetic_generation")
    seen = sorted(set(test_folds) & {int(fold) for fold in generator_folds or ()})
    if seen:
        makers = ", ".join(sorted(set(generated.get("checkpoint", pd.Series(["?"])).astype(str))))
        raise LeakError(
            f"the generator of these clips ({makers}) was trained on fold {seen}, which is also a "
            "test fold: the test would reward copies of its own recordings. Test on a fold that the "
            "generator never saw, or generate with a checkpoint trained without it"
        )


def _note(arm, held, generator_folds):
    """What a table says of classifiers whose early stopping sees what their generator learnt."""
    heard = {
        int(fold)
        for name in _sources([(arm, 0)])
        for fold in _folds_of(generator_folds, name) or ()
    }
    return _HEARD_VALIDATION if heard & held else ""


def _rows_by_split(clips, fold):
    split = np.asarray(datasets.assign_splits(clips, fold))
    splits = ("train", "val", "test")
    return {name: np.flatnonzero(split == name).astype(np.int32) for name in splits}


def _unit_seed(seed, model, fold, run):
    digest = hashlib.sha256(f"{seed}/{model}/{fold}/{run}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _spread_choice(clips, rows, per_class, rng):
    if per_class is None:
        return rows
    part = clips.iloc[rows].assign(row=rows, draw=rng.permutation(len(rows))).sort_values("draw")
    # first every fold's first clip of a class, then every fold's second, ...
    part["turn"] = part.groupby(["label", "fold"]).cumcount()
    chosen = part.sort_values(["turn", "draw"]).groupby("label").head(per_class)
    few = chosen["label"].value_counts()
    if (few < per_class).any():
        raise ValueError(
            f"real_per_class is {per_class}, but {few.idxmin()!r} has {few.min()} training clips: "
            "lower it, or leave it out to take all"
        )
    return np.sort(chosen["row"].to_numpy())


def _pools(tables, fold, rng, seed):
    """Shuffled rows of each table and class, numbered through all tables."""
    pools, offset = {}, 0
    for name, table in tables.items():
        # each table has its own order, which no other table beside it changes
        chance = np.random.default_rng([*seed, zlib.crc32(name.encode())]) if name else rng
        order = chance.permutation(len(table))
        if "held_out_fold" in table:
            bound = table["held_out_fold"].to_numpy(dtype=float)[order]
            order = order[np.isnan(bound) | (bound == fold)]
        labels = table["label"].to_numpy()
        pools[name] = {
            label: (offset + order[labels[order] == label]).tolist()
            for label in sorted(set(labels))
        }
        offset += len(table)
    return pools


def _pool(pools, source, label):
    """Rows of one class; those of several tables in turn."""
    parts = [pools[name].get(label, []) for name in source.split("+")]
    if len(parts) == 1:
        return parts[0]
    turns = [(place, i, row) for i, part in enumerate(parts) for place, row in enumerate(part)]
    return [row for _, _, row in sorted(turns)]


def _usable(pools, synthetic, clips, real):
    """Pools without what was made from recordings that are not among these real clips."""
    if synthetic is None or "made_from" not in synthetic:
        return pools
    here = set(clips["clip_id"].astype(str).iloc[real])
    serves = [pd.isna(name) or str(name) in here for name in synthetic["made_from"]]
    return {
        source: {label: [row for row in rows if serves[row]] for label, rows in by_class.items()}
        for source, by_class in pools.items()
    }


def _draw(clips, real, beside, folds, pools, arm, amount, chance):
    """Rows of an arm's real and synthetic training clips, and of synthetic validation clips."""
    kind, source, _ = arm_parts(arm)
    labels, row_folds = clips["label"].to_numpy(), clips["fold"].to_numpy()
    leaves_out = kind in ("mixed", "dropped")
    if leaves_out and amount > len(folds):
        raise ValueError(f"{arm}:{amount:g} replaces more folds than the {len(folds)} in training")
    gone = set(folds[: int(amount)]) if leaves_out else set()
    left_out = np.isin(row_folds[real], list(gone))
    # the same array in all arms that keep all
    kept = real[~left_out] if gone else real
    if kind == "repeat":
        kept = np.sort(np.concatenate([kept, _repeated(labels, kept, amount, chance)]))
    if kind not in _NEED_SYNTHETIC:
        return kept, [], []
    base = real[left_out] if kind == "mixed" else real
    needed = _wanted(labels[base], 1.0 if kind == "mixed" else amount)
    further = _wanted(labels[beside], amount)
    added, held = {}, {}
    for label in sorted({*needed, *further}):
        n, m, pool = needed.get(label, 0), further.get(label, 0), _pool(pools, source, label)
        if n + m > len(pool):
            raise ValueError(
                f"{arm}:{amount:g} needs {n + m} synthetic clips of {label!r}, there are "
                f"{len(pool)}: generate more in notebook 02_synthetic_generation, or lower the "
                "ratio, the folds replaced or real_per_class"
            )
        added[label], held[label] = pool[:n], pool[n : n + m]
    if kind == "thinned":
        kept, added = _thinned(labels, kept, added, chance)
    made, made_beside = (list(chain.from_iterable(part.values())) for part in (added, held))
    return ([] if kind == "synthetic" else kept), made, made_beside


def _wanted(labels, times):
    counts = pd.Series(labels, dtype=object).value_counts()
    return {label: int(np.floor(times * count + 0.5)) for label, count in counts.items()}


def _repeated(labels, rows, times, chance):
    """`times` further copies of each row; of a fraction, as many of each class, drawn at random."""
    copies = []
    shuffled = chance.permutation(rows)
    for label, need in sorted(_wanted(labels[rows], times).items()):
        mine = [int(row) for row in shuffled if labels[row] == label]
        copies += (mine * -(-need // len(mine)))[:need]
    return copies


def _thinned(labels, real, added, chance):
    """Of each class as many clips as there are real ones, drawn from real and synthetic alike."""
    kept, kept_added = [], {}
    for label, made in added.items():
        mine = [row for row in real if labels[row] == label]
        drawn = sorted(chance.permutation(len(mine) + len(made))[: len(mine)])
        kept += [mine[i] for i in drawn if i < len(mine)]
        kept_added[label] = [made[i - len(mine)] for i in drawn if i >= len(mine)]
    return sorted(kept), kept_added


def run_arms(
    clips,
    generated,
    arms,
    *,
    models=("sbcnn", "crnn"),
    test_folds=(5,),
    runs=1,
    seed=0,
    epochs=100,
    batch_size=128,
    patience=15,
    patches_per_epoch=None,
    real_per_class=None,
    out_dir,
    generator_folds=None,
    workers=None,
    device="cpu",
    validation="real",
    embeddings=None,
    executor=None,
):
    """Train and test every arm, model, fold and run; resume where an earlier call was stopped.

    Each unit trains in one thread; units run side by side in processes of their own. The plan is
    printed first, and the time that it will take as soon as the first unit of a model is done.

    Parameters
    ----------
    clips, generated, arms, models, test_folds, runs, seed, real_per_class, generator_folds, validation
        See :func:`plan_units`.
    epochs, batch_size, patience, patches_per_epoch
        See :func:`train_classifier`. Models without epochs take no notice.
    out_dir : str or Path
        Gets ``features/`` (cache), ``units/`` (result, predictions and learning curve of each unit),
        ``results.csv``; ``predictions.csv``: `clip_id, label, predicted, arm, ratio, model, fold,
        run`; ``curves.csv``: `epoch, train_loss, validation_loss, validation_accuracy` and the same.
    workers : int, optional
        Processes; by default one a CPU core. With 1 all is done in this process.
    device : str or sequence of str, default "cpu"
        Where torch trains; units take turns on several, such as ``["cuda:0", "cuda:1"]``.
        ``"accelerate"``: the processes that ``accelerate launch`` has started share the units out,
        each on its own GPU; `workers` and `executor` are then left aside.
    embeddings : dict of str to Embedding, optional
        What ``"probe:<name>"`` reads, where :func:`embeddings.get_embedding` needs more than a name.
    executor : concurrent.futures.Executor, optional
        Runs the units in place of own processes: any that sees `out_dir` under the same path, such
        as that of a Dask cluster, ``distributed.Client(address).get_executor()``. Results do not
        depend on who computes them.

    Returns
    -------
    pandas.DataFrame
        Table *results*: `arm, model, backend, prompt_family, ratio, fold, run, seed, n_real,
        n_synthetic, accuracy, macro_f1, epochs, seconds, steps, note`; accuracy and macro F1 from 0 to
        1 on the real clips of the test fold; `epochs` and `steps` of the optimiser as they were taken,
        which early stopping makes fewer than allowed; `note` of :func:`plan_units`.

    Raises
    ------
    LeakError, ValueError
        See :func:`plan_units`.
    audio.AudioError
        A clip cannot be read.
    OSError
        A transformer's checkpoint cannot be loaded.
    UnitsFailed
        Some units failed; the message names them, all others are done and kept.

    Examples
    --------
    >>> results = run_arms(clips, generated, ["real", "both:1"], out_dir="runs/try")  # doctest: +SKIP
    """
    out_dir = Path(out_dir).resolve()
    (out_dir / "units").mkdir(parents=True, exist_ok=True)
    clips = clips.reset_index(drop=True)
    plan = plan_units(
        clips,
        generated,
        arms,
        models=models,
        test_folds=test_folds,
        runs=runs,
        seed=seed,
        real_per_class=real_per_class,
        generator_folds=generator_folds,
        validation=validation,
    )
    if patches_per_epoch and plan["arm"].map(lambda arm: arm_parts(arm)[0] == "steps").any():
        raise ValueError(
            "patches_per_epoch gives every arm equal steps already; leave it or the arm 'steps' out"
        )
    tables = generated.values() if isinstance(generated, dict) else [generated]
    needed = plan["n_synthetic"].any()
    synthetic = pd.concat(tables, ignore_index=True) if needed else clips.iloc[:0]
    training = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    training |= {"patches_per_epoch": patches_per_epoch}
    kinds = list(dict.fromkeys(_input_kind(model) for model in models))
    places = [device] if isinstance(device, str) else list(device)
    team = _team() if places == ["accelerate"] else None
    with team.main_process_first() if team else contextlib.nullcontext():
        shared = _gather(clips, synthetic, out_dir, workers, kinds, embeddings)
    units = [_complete(unit, shared, training) for unit in _records(plan)]
    missing = [unit for unit in units if not _is_done(out_dir, unit)]
    workers = min(workers or os.cpu_count(), max(1, len(missing)))
    if team is None or team.is_main_process:
        where = f"{team.num_processes if team else workers} processes"
        _print_plan(plan, len(missing), "an executor" if executor else where)
    if team:
        failed = _train_my_share(missing, shared, out_dir, team)
    else:
        failed = _train_units(missing, shared, out_dir, workers, places, executor)
    results = _results(out_dir, units)
    if team is None or team.is_main_process:
        store.write_atomic(out_dir / "results.csv", results.to_csv(index=False).encode())
        _write_predictions_and_curves(out_dir, units)
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise UnitsFailed(
            f"{len(failed)} of {len(units)} units failed; the others are kept in {out_dir}. "
            f"Run again to repeat only these:\n{listed}"
        )
    return results


def _gather(clips, synthetic, out_dir, workers, kinds, embedded):
    """Put features, labels and identities of all clips into one place: real first, then synthetic."""
    paths = [*clips["path"], *synthetic["path"]]
    read = {kind: _inputs(kind, paths, out_dir / "features", workers, embedded) for kind in kinds}
    classes = sorted(set(clips["label"]))
    labels = [*clips["label"], *synthetic["label"]]
    number = {label: i for i, label in enumerate(classes)}
    return {
        "x": {kind: x for kind, (x, _) in read.items()},
        "y": np.array([number.get(label, -1) for label in labels], dtype=np.int64),
        "keys": {kind: keys for kind, (_, keys) in read.items()},
        "classes": classes,
        "clip_ids": [str(name) for name in clips["clip_id"]],
        "n_real": len(clips),
        "source": {
            name: ["" if pd.isna(value) else str(value) for value in synthetic[name]]
            if name in synthetic
            else []
            for name in ("backend", "prompt_family")
        },
    }


def _input_kind(model):
    name, _, detail = model.partition(":")
    if name in ("probe", "ast"):
        return model
    if name in BASELINES.index:
        return "mfcc"
    return "logmel-faithful" if detail == "faithful" else "logmel"


def _inputs(kind, paths, cache_dir, workers, embedded):
    """What classifiers of one kind read of each clip, and what identifies it."""
    name, _, detail = kind.partition(":")
    if name == "probe":
        from soundscapes_utils import embeddings

        reader = (embedded or {}).get(detail) or embeddings.get_embedding(detail)
        x = reader.embed(paths, silence="allow", cache_dir=cache_dir)
        return x, [hashlib.sha256(row.tobytes()).hexdigest()[:32] for row in x]
    if name == "ast":
        return load_transformer_inputs(paths, detail, cache_dir, workers)
    if name == "mfcc":
        return load_mfcc_statistics(paths, cache_dir, workers)
    x, keys = load_features(paths, cache_dir, workers)
    return standardise(x) if kind == "logmel" else divide_by_variance(x), keys


def _complete(unit, shared, training):
    """Add to a planned unit its training rows, its source and the key of all that it depends on."""
    # the plan's own arrays: joined, each unit would hold a copy
    rows = {
        "train": (unit["real_rows"], unit["synthetic_rows"]),
        "validation": (unit["validation_rows"], unit.get("validation_synthetic_rows", _NO_ROWS)),
        "test": (unit["test_rows"], _NO_ROWS),
    }
    named = ("arm", "ratio", "model", "fold", "run", "seed", "n_real", "n_synthetic")
    source = {
        name: "+".join(sorted({values[row] for row in unit["synthetic_rows"]})) if values else ""
        for name, values in shared["source"].items()
    }
    keys = shared["keys"][_input_kind(unit["model"])]
    content = {
        name: [(keys[row], int(shared["y"][row])) for row in _joined(part, shared)]
        for name, part in rows.items()
    }
    if arm_parts(unit["arm"])[0] == "steps":
        longer = {
            name: round(training[name] * (1 + unit["ratio"])) for name in ("epochs", "patience")
        }
        training = training | longer
    about = {name: unit[name] for name in named} | source | training
    tested = [shared["clip_ids"][row] for row in unit["test_rows"]]
    kept = [about, content, shared["classes"], tested]
    digest = hashlib.sha256(json.dumps([_RECIPE, kept]).encode()).hexdigest()[:12]
    name = "{arm}-{ratio:g}-{model}-fold{fold}-run{run}".format(**unit)
    # a checkpoint's path can be long, and file names end at 255 bytes
    file = re.sub(r"[^\w.@+-]", "_", name)[:150]
    key = f"{file}-{digest}"
    return {"name": name, "key": key, "about": about, "rows": rows, "note": unit["note"]}


def _joined(rows, shared):
    """Places of real and of synthetic clips in what all units share: real ones first."""
    real, synthetic = rows
    return np.concatenate([real, shared["n_real"] + synthetic])


def _records(plan):
    names = list(plan)
    # one by one: all at once, a plan's numbers would lie in memory once more
    return (dict(zip(names, row, strict=True)) for row in plan.itertuples(index=False, name=None))


def _unit_file(out_dir, unit, ending):
    return out_dir / "units" / f"{unit['key']}.{ending}"


def _is_done(out_dir, unit):
    # the JSON is written last; what an older version left has no learning curve
    endings = ("csv", "log.csv", "json")
    return all(_unit_file(out_dir, unit, ending).is_file() for ending in endings)


def _print_plan(plan, missing, where):
    counts = ["arm", "ratio", "n_real", "n_synthetic", "n_validation", "n_test"]
    table = plan.groupby(counts, sort=False).size().rename("classifiers").reset_index()
    print(table.to_string(index=False))
    kept = len(plan) - missing
    print(f"{len(plan)} classifiers: {missing} to train in {where}, {kept} kept")
    noted = plan[plan["note"] != ""]
    if len(noted):
        folds = sorted(noted["fold"].unique().tolist())
        print(f"note: {len(noted)} of them (test folds {folds}): {_HEARD_VALIDATION}")


# torch's random state belongs to the process: two units at once would draw from each other's
_ONE_UNIT = threading.Lock()


def _work(unit, shared_dir, out_dir, device):
    with _ONE_UNIT, _one_thread():
        return _attempt(unit, _open_shared(shared_dir), out_dir, device)


@contextlib.contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _open_shared(folder):
    shared = json.loads((folder / "shared.json").read_text())
    # mapped, not read: all workers of a machine look at one copy
    x = {
        kind: np.load(folder / f"x{i}.npy", mmap_mode="r") for i, kind in enumerate(shared["kinds"])
    }
    return shared | {"x": x, "y": np.load(folder / "y.npy")}


def _share(shared, folder):
    for i, x in enumerate(shared["x"].values()):
        np.save(folder / f"x{i}.npy", x)
    np.save(folder / "y.npy", shared["y"])
    small = {name: shared[name] for name in ("classes", "clip_ids", "n_real")}
    small |= {"kinds": list(shared["x"])}
    (folder / "shared.json").write_text(json.dumps(small))


def _start_worker():
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # a worker whose parent was killed would otherwise wait, and hold its memory, for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _attempt(unit, shared, out_dir, device):
    """Train, test and write one unit; give back what went wrong, or None."""
    try:
        _run_unit(unit, shared, out_dir, device)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None


def _run_unit(unit, shared, out_dir, device):
    started = time.perf_counter()
    about = unit["about"]
    x = shared["x"][_input_kind(about["model"])]
    rows = {name: _joined(part, shared) for name, part in unit["rows"].items()}
    parts = {name: (np.array(x[places]), shared["y"][places]) for name, places in rows.items()}
    classify = _fit_and_classify if _is_baseline(about["model"]) else _train_and_classify
    chosen, log = classify(about, parts, len(shared["classes"]), device)
    names = np.array(shared["classes"])
    predictions = pd.DataFrame(
        {
            "clip_id": [shared["clip_ids"][row] for row in rows["test"]],
            "label": names[parts["test"][1]],
            "predicted": names[chosen],
        }
    )
    result = about | _accuracies(parts["test"][1], chosen, len(names))
    result |= {"epochs": len(log), "seconds": round(time.perf_counter() - started, 3)}
    for ending, table in (("log.csv", log), ("csv", predictions)):
        store.write_atomic(_unit_file(out_dir, unit, ending), table.to_csv(index=False).encode())
    store.write_atomic(_unit_file(out_dir, unit, "json"), json.dumps(result, indent=1).encode())


def _train_and_classify(about, parts, n_classes, device):
    kind = arm_parts(about["arm"])[0]
    network, log = train_classifier(
        about["model"],
        parts["train"],
        parts["validation"],
        n_classes,
        epochs=about["epochs"],
        batch_size=about["batch_size"],
        patience=about["patience"],
        patches_per_epoch=about["patches_per_epoch"],
        seed=about["seed"],
        device=device,
        augment=(kind, about["ratio"]) if kind in _ON_THE_FLY else None,
    )
    # the released code tests clip by clip
    found = class_probabilities(about["model"], network, parts["test"][0], about["seed"], 1)
    return found.argmax(axis=1), log


def _fit_and_classify(about, parts, n_classes, device):
    fitted = fit_baseline(about["model"].partition(":")[0], *parts["train"], about["seed"])
    return fitted.predict(parts["test"][0]), pd.DataFrame(columns=LOG_COLUMNS)


def _accuracies(truth, chosen, n_classes):
    from sklearn.metrics import f1_score

    f1 = f1_score(truth, chosen, labels=range(n_classes), average="macro", zero_division=0)
    return {"accuracy": float((truth == chosen).mean()), "macro_f1": float(f1)}


def _train_units(units, shared, out_dir, workers, devices, executor, leads=True):
    from tqdm import tqdm

    if executor is not None:
        outcomes = partial(_in_executor, executor=executor)
    else:
        outcomes = _here if workers == 1 else partial(_in_processes, workers=workers)
    failed, timed = {}, set()
    # disable=None: a bar on a terminal, nothing in a notebook or a log
    hidden = None if leads else True
    with tqdm(total=len(units), unit="classifier", disable=hidden, leave=False) as bar:
        for unit, reason in outcomes(units, shared, out_dir, devices):
            bar.update()
            model = unit["about"]["model"]
            if reason:
                failed[unit["name"]] = reason
                tqdm.write(f"failed, going on: {unit['name']}: {reason}")
            elif leads and model not in timed:
                timed.add(model)
                same = [other for other in units if other["about"]["model"] == model]
                tqdm.write(_estimate(unit, same, out_dir, 1 if executor else workers))
    return failed


def _team():
    from accelerate import PartialState

    # who has done its share waits for the others'
    waits = {"timeout": timedelta(days=2)}
    return PartialState(cpu=not torch.accelerator.is_available(), **waits)


def _train_my_share(units, shared, out_dir, team):
    from accelerate.utils import gather_object

    # all have looked for what is missing before the first adds to what is done
    team.wait_for_everyone()
    mine = _longest_first(units)[team.process_index :: team.num_processes]
    place = [str(team.device)]
    failed = _train_units(mine, shared, out_dir, 1, place, None, team.is_main_process)
    return dict(gather_object(list(failed.items())))


def _estimate(unit, units, out_dir, workers):
    """Time of a model's other units, from its first: so much for each patch trained on."""
    took = json.loads(_unit_file(out_dir, unit, "json").read_text())["seconds"]
    rest = took * (sum(map(_patches, units)) / _patches(unit) - 1) / min(workers, len(units))
    about = f"{rest / 60:.0f} min" if rest > 90 else f"{rest:.0f} s"
    side = f", {workers} side by side" if workers > 1 else ""
    model = unit["about"]["model"]
    return f"{model}: the first took {took:.1f} s; about {about} for {len(units) - 1} more{side}"


def _patches(unit):
    about = unit["about"]
    clips = max(1, about["n_real"] + about["n_synthetic"])
    return about["epochs"] * (about["patches_per_epoch"] or clips)


def _here(units, shared, out_dir, devices):
    with _one_thread():
        for i, unit in enumerate(units):
            yield unit, _attempt(unit, shared, out_dir, devices[i % len(devices)])


def _longest_first(units):
    # so that no core waits for another at the end
    return sorted(units, key=lambda u: ("crnn" not in u["about"]["model"], -_patches(u)))


def _processes():
    """How workers start: forked from a process that has imported all they need and run none of it."""
    # never from this one: a process forked from one that has run torch can hang
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # the second is what torch's optimisers import when they are first used, for seconds
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


_KILLED = "its process was killed (too little memory?)"
_NOT_STARTED = "never started: its executor is broken"
# more than a cluster has cores, and few enough to wait in memory
_AT_ONCE = 500


def _in_processes(units, shared, out_dir, devices, workers):
    left = _longest_first(units)
    with _shared_folder(shared, out_dir) as folder:
        while left:
            suspects, later = [], []
            for unit, reason in _in_pool(left, folder, out_dir, devices, workers):
                if reason == _NOT_STARTED:
                    later.append(unit)
                elif reason == _KILLED and not _is_done(out_dir, unit):
                    suspects.append(unit)
                else:
                    yield unit, None if reason == _KILLED else reason
            # one killed process takes all others of its pool with it: which unit it was shows alone
            for unit in suspects:
                yield from _in_pool([unit], folder, out_dir, devices, 1)
            left = later


def _in_pool(units, folder, out_dir, devices, workers):
    pool = ProcessPoolExecutor(workers, mp_context=_processes(), initializer=_start_worker)
    try:
        yield from _outcomes(units, folder, out_dir, devices, pool, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_executor(units, shared, out_dir, devices, executor):
    units = _longest_first(units)
    with _shared_folder(shared, out_dir) as folder:
        yield from _outcomes(units, folder, out_dir, devices, executor, _AT_ONCE)


@contextlib.contextmanager
def _shared_folder(shared, out_dir):
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="shared-") as folder:
        _share(shared, Path(folder))
        yield Path(folder)


def _outcomes(units, folder, out_dir, devices, executor, at_once):
    """Each unit and what went wrong with it, or None; no more than `at_once` are handed over."""
    running = {}
    try:
        for i, unit in enumerate(units):
            if len(running) == at_once:
                yield from _finished(running)
            device = devices[i % len(devices)]
            try:
                running[executor.submit(_work, unit, folder, out_dir, device)] = unit
            except BrokenExecutor:
                yield unit, _NOT_STARTED
        while running:
            yield from _finished(running)
    finally:
        for future in running:
            future.cancel()


def _finished(running):
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        unit = running.pop(future)
        try:
            yield unit, future.result()
        except BrokenExecutor:
            yield unit, _KILLED
        except Exception as error:
            yield unit, f"its worker was lost ({type(error).__name__}: {error})"


_PLACE = ("arm", "ratio", "model", "fold", "run")


def _done_results(out_dir, units):
    """Units that are done, each with its result."""
    for unit in units:
        if _is_done(out_dir, unit):
            yield unit, json.loads(_unit_file(out_dir, unit, "json").read_text())


def _results(out_dir, units):
    rows = [
        result | {"steps": _steps(result), "note": unit["note"]}
        for unit, result in _done_results(out_dir, units)
    ]
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def _steps(result):
    """Steps that the optimiser took."""
    patches = result["patches_per_epoch"] or result["n_real"] + result["n_synthetic"]
    return result["epochs"] * -(-patches // result["batch_size"])


def _write_predictions_and_curves(out_dir, units):
    files = {"predictions": "csv", "curves": "log.csv"}
    columns = {"predictions": ["clip_id", "label", "predicted"], "curves": LOG_COLUMNS}
    for name, ending in files.items():
        # as text, a fifth of what the tables of a large study would take in memory
        content = io.BytesIO()
        content.writelines(_stacked(out_dir, units, ending, [*columns[name], *_PLACE]))
        store.write_atomic(out_dir / f"{name}.csv", content.getvalue())


def _stacked(out_dir, units, ending, columns):
    """Bytes of one CSV file with the tables of all units that are done."""
    yield pd.DataFrame(columns=columns).to_csv(index=False).encode()
    # a class may be called "None" or "NA"
    options = {"dtype": str, "keep_default_na": False} if ending == "csv" else {}
    for unit, result in _done_results(out_dir, units):
        if ending == "csv" or result["epochs"]:
            table = pd.read_csv(_unit_file(out_dir, unit, ending), **options)
            table = table.assign(**{name: result[name] for name in _PLACE})
            yield table.to_csv(index=False, header=False).encode()


# --- command line --------------------------------------------------------------------------------


def main(argv):
    """Run a study from the command line: plan, train, intervals, tests.

    Parameters
    ----------
    argv : list of str
        Arguments; see ``--help``.

    Returns
    -------
    int
        Exit status: 0, 1 where units failed, 2 for a study that cannot be run.
    """
    options = _parser().parse_args(argv)
    try:
        return _study(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnitsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m soundscapes_utils esc",
        description="Train classifiers of real recordings on arms of real and synthetic clips, "
        "with intervals and tests. The same command again resumes. On several GPUs: "
        "accelerate launch -m soundscapes_utils esc --device accelerate ...",
    )
    say = parser.add_argument
    say("--dataset", default="builtin", choices=list(PROTOCOLS.index))
    say("--root", default="", help="folder of ESC-50, ESC-10 or UrbanSound8K")
    say("--data-dir", default="data", help="where the built-in sounds are kept")
    say("--out", default="runs/esc", help="folder of units and tables")
    say("--arms", nargs="+", default=["real"], help="such as real both:1 repeat:1 both@ps1:4")
    say("--models", nargs="+", default=["sbcnn", "crnn"])
    say("--test-folds", nargs="+", type=int, help="all by default")
    say("--runs", type=int, default=5)
    say("--seed", type=int, default=0)
    say("--epochs", type=int, default=100)
    say("--patience", type=int, default=15)
    say("--batch-size", type=int, default=128)
    say("--patches-per-epoch", type=int)
    say("--real-per-class", type=int)
    say("--validation", default="real", choices=["real", "faithful", "none"])
    say("--generated", nargs="+", default=[], metavar="[NAME=]CSV", help="synthetic clips")
    say("--generator-folds", nargs="+", type=int, help="folds that their generator learnt from")
    say("--transforms", nargs="+", default=[], choices=list(TRANSFORMS), help="sources to make")
    say("--yamnet", default="", help="YAMNet's TFLite file, for probe:yamnet")
    say("--workers", type=int)
    say("--device", nargs="+", default=["cpu"], help="such as cuda:0 cuda:1, or accelerate")
    say("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that runs the units")
    say("--plan", action="store_true", help="print protocol and plan, train nothing")
    return parser


def _study(options):
    place = {"urbansound8k": "urbansound8k_root"}.get(options.dataset, "esc50_root")
    clips = datasets.load_clips(options.dataset, data_dir=options.data_dir, **{place: options.root})
    folds = protocol(clips)
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        print(folds.to_string(index=False))
    generated = _read_generated(options.generated)
    for effect in options.transforms:
        folder = Path(options.out) / "transforms" / effect
        generated[effect] = transform_clips(clips, effect, folder, options.workers)
    makers = {name: options.generator_folds for name in generated if name not in options.transforms}
    design = {
        "models": options.models,
        "test_folds": options.test_folds or folds["test_fold"].tolist(),
        "generator_folds": makers,
    }
    shared = ("runs", "seed", "real_per_class", "validation")
    design |= {name: getattr(options, name) for name in shared}
    if options.plan:
        plan = plan_units(clips, generated, options.arms, **design)
        _print_plan(plan, len(plan), "as many processes as are given")
        return 0
    trained = ("epochs", "patience", "batch_size", "patches_per_epoch", "workers", "device")
    with _executor(options.dask) as executor:
        run_arms(
            clips,
            generated,
            options.arms,
            **design,
            **{name: getattr(options, name) for name in trained},
            embeddings=_yamnet(options.yamnet),
            executor=executor,
            out_dir=options.out,
        )
    if leads:
        _print_tables(Path(options.out), clips)
    return 0


def _read_generated(named):
    tables = {}
    for text in named:
        name, _, path = text.rpartition("=")
        table = pd.read_csv(
            path, keep_default_na=False, na_values={name: [""] for name in _BINDING}
        )
        folder = Path(path).parent
        # a table may name its clips relative to itself
        table["path"] = [str(p if Path(p).is_file() else folder / p) for p in table["path"]]
        tables[name] = table
    return tables


def _yamnet(path):
    from soundscapes_utils import embeddings

    return {"yamnet": embeddings.get_embedding("yamnet", path)} if path else None


@contextlib.contextmanager
def _executor(address):
    if not address:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("a Dask cluster needs the package distributed: pip install it") from error
    with Client(address) as client:
        yield client.get_executor()


def _print_tables(out_dir, clips):
    text = {"clip_id": str, "label": str, "predicted": str}
    predictions = pd.read_csv(out_dir / "predictions.csv", dtype=text, keep_default_na=False)
    summary = summarise(pd.read_csv(out_dir / "results.csv", keep_default_na=False))
    shown = ["arm", "ratio", "model", "n", "n_runs", "n_real", "n_synthetic", "steps"]
    tables = {"arms": summary[[*shown, "accuracy", "half_width", "macro_f1"]]}
    tables["intervals"] = intervals(predictions, clips)
    arms = predictions[["arm", "ratio"]].drop_duplicates().itertuples(index=False, name=None)
    others = [arm for arm in arms if arm != ("real", 0.0)]
    if others and (predictions["arm"] == "real").any():
        tables["tests"] = compare_all(predictions, by="source", clips=clips)
        single = pd.concat([mcnemar_runs(predictions, *arm) for arm in others], ignore_index=True)
        # corrected once more, over all arms
        tables["mcnemar"] = single.assign(p_holm=stats.holm(single["p_value"]))
    for name, table in tables.items():
        print(f"\n{name}")
        print(table.round(4).to_string(index=False))
        store.write_atomic(out_dir / f"{name}.csv", table.to_csv(index=False).encode())
