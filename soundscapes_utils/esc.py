"""Environmental sound classification: does synthetic audio help a classifier of real recordings?

Classifiers are trained in *arms* (:class:`Arm`): on real clips, on real and synthetic ones, with some
real training folds replaced by synthetic clips, on synthetic clips only, and on the controls that tell
other clips from more clips and from more steps. Whatever the arm, test clips are real recordings of
the test fold, and validation clips those of the fold after it, as in Ronchini, Comanducci and
Antonacci (arXiv 2403.17864, below: the paper).

A trained classifier is a *trial* (arm, model, fold, run). :func:`plan_study` says which clips each one
sees, :func:`run_study` trains those that are not kept yet, under a key of all that goes into it.
"""

import csv
import hashlib
import io
import re
import sys
import threading
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from soundscapes_utils import classifiers, datasets, stats, store
from soundscapes_utils.classifiers import BASELINES, MODELS
from soundscapes_utils.metadata import LeakError, read_heard

Training = classifiers.Training

KINDS = ("real", "both", "mixed", "synthetic", "thinned", "repeat", "steps", "dropped")
KINDS += ("specaugment", "mixup")
_NEED_SYNTHETIC = ("both", "mixed", "synthetic", "thinned")
_ON_THE_FLY = ("specaugment", "mixup")
_WHOLE_RATIO = ("mixed", "dropped", "specaugment")

RESULT_COLUMNS = [
    *("arm", "model", "backend", "prompt_family", "ratio", "fold", "run", "seed", "n_real"),
    *("n_synthetic", "accuracy", "macro_f1", "epochs", "seconds", "steps", "note"),
]
_NORMALISE = {"logmel": classifiers.standardise, "as_released": classifiers.divide_by_variance}
_PLACE = ["arm", "ratio", "model", "fold", "run"]
_HEARD_VALIDATION = "the generator was trained on the fold that early stopping looks at"
# ESC-10 is a part of ESC-50, with its folds
_FAMILY = {"esc10": "esc50"}
# part of every trial's key: raise it when training changes in a way that its inputs do not show
_RECIPE = 2
# torch's random state belongs to the process: two trials at once would draw from each other's
_ONE_TRIAL = threading.Lock()


class TrialsFailed(RuntimeError):
    """Some classifiers could not be trained; the others are done and kept."""


# --- what is studied -----------------------------------------------------------------------------


class Arm(NamedTuple):
    """What classifiers are trained on, written ``kind@source/per_class:ratio``; R is the ratio.

    - ``real``. ``both``, ``synthetic``: R synthetic clips for each real training clip. ``mixed``: R of
      the training folds replaced by as many synthetic clips.
    - Controls: ``repeat``, each real clip R times more (equal n and steps as both); ``steps``, 1 + R
      times the epochs and the patience; ``dropped``, R training folds left out; ``thinned``, both,
      thinned at random to as many clips of each class as there are real ones (equal n as real).
    - ``specaugment`` and ``mixup`` augment real clips while training.
    - ``source``: which of several tables of synthetic clips; "a+b" takes them in turn. ``per_class``:
      real clips per class to train on, from which R counts; by default what the study says.

    >>> Arm.parse("both@ps1/8:4")
    Arm(kind='both', ratio=4.0, source='ps1', per_class=8)
    >>> str(Arm("both", 1, per_class=4)), Arm("both", 1, per_class=4).name
    ('both/4:1', 'both/4')
    """

    kind: str
    ratio: float = 0.0
    source: str = ""
    per_class: int | None = None

    @classmethod
    def parse(cls, text):
        """Read an arm's text; what no arm can have is a ValueError."""
        form = r"([a-z]+)(?:@([^@/:]+))?(?:/([1-9]\d*))?(?::(\d*\.?\d+))?"
        match = re.fullmatch(form, str(text))
        kind, source, per_class, ratio = match.groups() if match else [None] * 4
        arm = cls(kind, float(ratio or 0), source or "", int(per_class) if per_class else None)
        if (
            kind not in KINDS
            or (arm.ratio == 0) != (kind == "real")
            or (kind in _WHOLE_RATIO and not arm.ratio.is_integer())
            or (source and kind not in _NEED_SYNTHETIC)
        ):
            forms = "'real', 'both:1', 'synthetic:1', 'mixed:2' (folds replaced), or see help(esc.Arm)"
            raise ValueError(f"cannot read the arm {text!r}: use {forms}")
        return arm

    @property
    def name(self):
        """The text without its ratio: the column `arm` of all tables."""
        source = f"@{self.source}" if self.source else ""
        return self.kind + source + (f"/{self.per_class}" if self.per_class else "")

    def __str__(self):
        return stats.arm_name(self.name, self.ratio)


@dataclass(frozen=True)
class Study:
    """What a study compares.

    - ``arms``: each an `Arm` or its text. ``models``: keys of :data:`classifiers.MODELS`, names of
      :data:`classifiers.BASELINES`, ``"probe:<embedding>"``, or one's own ``module:Class``.
    - ``test_folds``, one after the other; the next fold, cyclically, validates. ``runs`` repeat each
      with other seeds; all choices follow from ``seed``.
    - ``real_per_class``: train on this many real clips per class (spread over the training folds).
    - ``validation``, what early stopping looks at: "real" clips of the fold after the test fold;
      "as_released", these and synthetic ones in the arms both, thinned and synthetic (there, synthetic
      ones only); "none": that fold trains too, which only classifiers without early stopping allow.
    """

    arms: tuple
    models: tuple = ("sbcnn", "crnn")
    test_folds: tuple = (5,)
    runs: int = 1
    seed: int = 0
    real_per_class: int | None = None
    validation: str = "real"

    def __post_init__(self):
        arms = tuple(dict.fromkeys(Arm.parse(str(arm)) for arm in self.arms))
        object.__setattr__(self, "arms", arms)
        baselines = [model for model in self.models if _is_baseline(model)]
        kinds = [model.partition(":")[::2] for model in self.models]
        own = [f"{a}:{b}" for a, b in kinds if b and a not in (*BASELINES, *MODELS, "probe")]
        networks = [model for model in self.models if model in MODELS or model in own]
        list(map(classifiers.network_class, networks))  # one's own is there, and can be imported
        if len(baselines) + len(networks) < len(self.models) or not (self.models and arms):
            known = f"{list(MODELS)}, {list(BASELINES)}, 'probe:<embedding>' and 'module:Class'"
            raise ValueError(f"models {list(self.models)}, arms {[*map(str, arms)]}: models are {known}")
        if self.validation not in ("real", "as_released", "none"):
            raise ValueError("validation must be 'real', 'as_released' or 'none'")
        if self.validation == "none" and networks:
            raise ValueError(f"{networks[0]} stops early and needs validation clips: use 'real'")
        if baselines and {arm.kind for arm in arms} & {*_ON_THE_FLY, "steps"}:
            kinds = f"{', '.join(_ON_THE_FLY)} and steps"
            raise ValueError(f"{kinds} are ways to train networks; leave it or {baselines[0]} out")


def _is_baseline(model):
    return model in BASELINES or bool(re.match("probe:.", model))


# --- plan ----------------------------------------------------------------------------------------


def plan_study(clips, generated, study):
    """Say, before anything is trained, which clips each classifier will see: one row per trial.

    All arms of one fold and run draw from the same shuffled lists, so that a larger ratio adds clips
    to a smaller one, and share their seed: their differences are those of the training clips.

    `generated` is a table, or several by the names that arms call for with ``@``. Two optional columns
    bind a row: it is used only for the test fold `held_out_fold` (of a generator trained without that
    fold), or only where the recording `made_from` is among the real training clips.

    LeakError: the column `heard` says that a generator was trained on the fold that its clips are tested
    on (ESC-10 is a part of ESC-50). Where it was trained on the validation fold, `note` says so.
    """
    tables = _tables(generated, study.arms)
    synthetic = pd.concat(tables.values(), ignore_index=True) if tables else None
    trials = []
    for fold in study.test_folds:
        split = np.asarray(datasets.assign_splits(clips, fold))
        rows = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
        if study.validation == "none":
            rows |= {"train": np.union1d(rows["train"], rows["val"]), "val": rows["val"][:0]}
        for run in range(study.runs):
            draws = _Draws(clips, tables, synthetic, rows, study, [study.seed, fold, run])
            for arm in study.arms:
                drawn = draws.arm(arm)
                n = {name.removesuffix("_rows"): len(part) for name, part in drawn.items()}
                n["validation"] += n.pop("validation_synthetic")
                drawn |= {f"n_{name}": count for name, count in n.items()}
                drawn["note"] = _check_leak(clips, synthetic, drawn)
                for model in study.models:
                    text = f"{study.seed}/{model.partition(':')[0]}/{fold}/{run}"
                    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
                    place = (arm.name, arm.ratio, model, int(fold), run, seed, arm.kind)
                    names = [*_PLACE, "seed", "kind"]
                    trials.append(dict(zip(names, place, strict=True)) | drawn)
    return pd.DataFrame(trials)


def _tables(generated, arms):
    """Tables of synthetic clips by name; those that the arms need exist, or an error."""
    sources = [arm.source for arm in arms if arm.kind in _NEED_SYNTHETIC]
    tables = generated if isinstance(generated, dict) else {"": generated}
    for name in dict.fromkeys(name for source in sources for name in source.split("+")):
        if tables.get(name) is None or not len(tables[name]):
            raise ValueError(
                f"no synthetic clips are called {name!r}; there are {list(tables)}: run notebook "
                "02_synthetic_generation, or ask for a table as in 'both@name:1'"
            )
    return tables if sources else {}


def _check_leak(clips, synthetic, drawn):
    """Refuse a trial whose generator was trained on its test fold; note its validation fold."""
    rows = np.concatenate([drawn["synthetic_rows"], drawn["validation_synthetic_rows"]])
    if not len(rows) or "heard" not in synthetic:
        return ""
    used = synthetic.iloc[rows]
    family = {_FAMILY.get(name, name) for name in clips["dataset"]}
    known = read_heard(used["heard"]).items()
    heard = {fold for name, folds in known if _FAMILY.get(name, name) in family for fold in folds}
    leaked = sorted(heard & set(clips["fold"].iloc[drawn["test_rows"]].tolist()))
    if leaked:
        raise LeakError(
            f"the generator of these clips ({', '.join(used['checkpoint'].unique())}) was trained on "
            f"fold {leaked}, which is also a test fold: test on a fold that it never saw, or generate "
            "with a checkpoint trained without it"
        )
    return _HEARD_VALIDATION if heard & set(clips["fold"].iloc[drawn["validation_rows"]]) else ""


class _Draws:
    """What the arms of one fold and run draw from: the same shuffled lists for all of them."""

    def __init__(self, clips, tables, synthetic, rows, study, seed):
        self.clips, self.synthetic, self.rows, self.seed = clips, synthetic, rows, seed
        self.labels, self.folds = clips["label"].to_numpy(), clips["fold"].to_numpy()
        self.made_labels = None if synthetic is None else synthetic["label"].to_numpy()
        self.as_released = study.validation == "as_released"
        rng = np.random.default_rng(seed)
        self.real = self._spread_choice(study.real_per_class, rng)
        self.fold_order = rng.permutation(sorted(set(self.folds[self.real])))
        self.shuffled, offset = {}, 0
        for name, table in tables.items():
            # each table has its own order, which no other table changes
            chance = np.random.default_rng([*seed, zlib.crc32(name.encode())]) if name else rng
            order = chance.permutation(len(table))
            if "held_out_fold" in table:
                bound = table["held_out_fold"].to_numpy(dtype=float)[order]
                order = order[np.isnan(bound) | (bound == seed[1])]
            self.shuffled[name] = offset + order
            offset += len(table)

    def arm(self, arm):
        """Rows of an arm's training, validation and test clips."""
        # the same seed for every number of real clips: the smaller sets lie within the larger
        chance = np.random.default_rng([*self.seed, 1])
        base = self._spread_choice(arm.per_class, chance) if arm.per_class else self.real
        kept, replaced, validation, added, held = base, base, self.rows["val"], [], []
        if arm.kind in ("mixed", "dropped"):
            n = len(self.fold_order)
            if arm.ratio > n:
                raise ValueError(f"{arm} replaces more folds than the {n} in training")
            gone = np.isin(self.folds[base], self.fold_order[: int(arm.ratio)])
            kept, replaced = base[~gone], base[gone]
        if arm.kind == "repeat":
            kept = np.sort(np.concatenate([kept, self._repeated(kept, arm.ratio, chance)]))
        if arm.kind in _NEED_SYNTHETIC:
            stops_by_both = self.as_released and arm.kind != "mixed"
            beside = validation if stops_by_both else validation[:0]
            added, held = self._synthetic(arm, base, replaced, beside)
            if arm.kind == "thinned":
                kept, added = self._thinned(kept, added, chance)
            if arm.kind == "synthetic":
                kept, validation = [], [] if stops_by_both else validation
        rows = {"real": kept, "synthetic": added, "validation": validation}
        rows |= {"test": self.rows["test"], "validation_synthetic": held}
        # four bytes per row: a large study holds many
        return {f"{name}_rows": np.asarray(part, np.int32) for name, part in rows.items()}

    def _spread_choice(self, per_class, rng):
        rows = self.rows["train"]
        if per_class is None:
            return rows
        part = self.clips.iloc[rows].assign(row=rows, draw=rng.permutation(len(rows)))
        # first every fold's first clip of a class, then every fold's second, ...
        part = part.sort_values("draw")
        part["turn"] = part.groupby(["label", "fold"]).cumcount()
        chosen = part.sort_values(["turn", "draw"]).groupby("label").head(per_class)
        few = chosen["label"].value_counts()
        if few.min() < per_class:
            raise ValueError(
                f"real_per_class is {per_class}, but {few.idxmin()!r} has {few.min()} training clips: "
                "lower it, or leave it out to take all"
            )
        return np.sort(chosen["row"].to_numpy())

    def _synthetic(self, arm, base, replaced, beside):
        """Synthetic rows that train, and those that validate, class by class."""
        serves = np.ones(len(self.synthetic), bool)
        if "made_from" in self.synthetic:
            origin = self.synthetic["made_from"].fillna("").astype(str)
            here = set(self.clips["clip_id"].iloc[base].astype(str))
            serves = ((origin == "") | origin.isin(here)).to_numpy()
        parts = [rows[serves[rows]] for rows in map(self.shuffled.get, arm.source.split("+"))]
        needed = _wanted(self.labels[replaced], 1 if arm.kind == "mixed" else arm.ratio)
        further = _wanted(self.labels[beside], arm.ratio)
        added, held = [], []
        for label in sorted({*needed, *further}):
            n, m = needed.get(label, 0), further.get(label, 0)
            made = [rows[self.made_labels[rows] == label].tolist() for rows in parts]
            # several tables in turn
            turns = [(place, i, row) for i, part in enumerate(made) for place, row in enumerate(part)]
            pool = [row for *_, row in sorted(turns)]
            if n + m > len(pool):
                raise ValueError(
                    f"{arm} needs {n + m} synthetic clips of {label!r}, there are {len(pool)}: "
                    "generate more in notebook 02_synthetic_generation, or ask for fewer"
                )
            added += pool[:n]
            held += pool[n : n + m]
        return added, held

    def _repeated(self, rows, times, chance):
        """`times` further copies of each row; of a fraction, as many of each class, at random."""
        copies, shuffled = [], chance.permutation(rows)
        for label, need in sorted(_wanted(self.labels[rows], times).items()):
            copies += np.resize(shuffled[self.labels[shuffled] == label], need).tolist()
        return copies

    def _thinned(self, real, added, chance):
        """Of each class as many clips as there are real ones, drawn from real and synthetic."""
        kept, kept_added, added = [], [], np.array(added, dtype=int)
        for label in dict.fromkeys(self.made_labels[added]):
            mine, made = real[self.labels[real] == label], added[self.made_labels[added] == label]
            drawn = np.sort(chance.permutation(len(mine) + len(made))[: len(mine)])
            kept += mine[drawn[drawn < len(mine)]].tolist()
            kept_added += made[drawn[drawn >= len(mine)] - len(mine)].tolist()
        return sorted(kept), kept_added


def _wanted(labels, times):
    counts = pd.Series(labels, dtype=object).value_counts()
    return {label: int(np.floor(times * count + 0.5)) for label, count in counts.items()}


# --- run -----------------------------------------------------------------------------------------


def run_study(clips, generated, study, training, out_dir, embeddings=None):
    """Train and test every arm, model, fold and run; resume where an earlier call was stopped.

    Each trial trains in one thread; trials run side by side in joblib's processes, or wherever the
    caller's ``joblib.parallel_config`` sends them, such as to a Dask cluster. Results do not depend
    on who computes them. `out_dir` gets a record of each trial, ``results.csv``, ``predictions.csv`` and
    ``curves.csv``; `embeddings` are what ``"probe:<name>"`` reads, where a name alone does not do.

    Returns
    -------
    pandas.DataFrame
        Table *results*; accuracy and macro F1 from 0 to 1 on the real clips of the test fold.

    Raises
    ------
    TrialsFailed
        Some trials failed; the message names them, all others are done and kept.

    >>> study, training = Study(["real", "both:1"]), Training(epochs=8)
    >>> results = run_study(clips, generated, study, training, "runs/try")  # doctest: +SKIP
    """
    if training.patches_per_epoch and any(arm.kind == "steps" for arm in study.arms):
        raise ValueError(
            "patches_per_epoch gives every arm equal steps already; leave it or the arm 'steps' out"
        )
    plan = plan_study(clips, generated, study)
    tables = list(generated.values()) if isinstance(generated, dict) else [generated]
    synthetic = pd.concat(tables) if plan["n_synthetic"].any() else clips.iloc[:0]
    out_dir = Path(out_dir).resolve()
    data = _Data(clips, synthetic, study.models, out_dir / "features", embeddings)
    trials = [data.trial(row, training) for row in plan.to_dict("records")]
    records = store.Records(out_dir, "trials")
    missing = [trial for trial in trials if trial["key"] not in records.entries]
    _print_plan(plan, len(missing))
    failed = _train_missing(missing, data, training, records)
    results = _write_tables(trials, data, records.entries, out_dir)
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise TrialsFailed(
            f"{len(failed)} of {len(trials)} trials failed; the others are kept in {out_dir}. "
            f"Run again to repeat only these:\n{listed}"
        )
    return results


class _Data:
    """Features, labels and identities of all clips in one place: real first, then synthetic."""

    def __init__(self, clips, synthetic, models, cache_dir, embeddings):
        paths, labels = ([*clips[name], *synthetic[name]] for name in ("path", "label"))
        self.x, self.keys = {}, {}
        for kind in dict.fromkeys(map(_input_kind, models)):
            self.x[kind], keys = _inputs(kind, paths, cache_dir, embeddings)
            self.keys[kind] = np.array(keys)
        self.classes = np.array(sorted(set(clips["label"])))
        number = {label: i for i, label in enumerate(self.classes)}
        self.y = np.array([number.get(label, -1) for label in labels])
        self.clip_ids, self.synthetic = clips["clip_id"].astype(str).to_numpy(), synthetic
        self.sources = clips.get("source_id", clips["clip_id"]).to_numpy()

    def trial(self, row, training):
        """A planned trial with its rows, its source, and the key of all that it depends on."""
        n, keys = len(self.clip_ids), self.keys[_input_kind(row["model"])]
        held = np.concatenate([row["validation_rows"], n + row["validation_synthetic_rows"]])
        train = np.concatenate([row["real_rows"], n + row["synthetic_rows"]])
        rows = {"train": train, "validation": held, "test": row["test_rows"]}
        if row["kind"] == "steps":
            longer = [round(m * (1 + row["ratio"])) for m in (training.epochs, training.patience)]
            training = replace(training, epochs=longer[0], patience=longer[1])
        info, used = {name: row[name] for name in (*_PLACE, "seed")}, row["synthetic_rows"]
        for name in ("backend", "prompt_family"):
            values = self.synthetic[name].iloc[used] if name in self.synthetic else pd.Series()
            info[name] = "+".join(sorted(set(values.fillna("").astype(str))))
        settings = vars(replace(training, device="", workers=None))
        tested = self.clip_ids[rows["test"]].tolist()
        content = [keys[part].tobytes() + self.y[part].tobytes() for part in rows.values()]
        content += store.class_files(row["model"])
        key = store.content_key(_RECIPE, info, settings, list(self.classes), tested, *content)
        info |= {name: row[name] for name in ("kind", "n_real", "n_synthetic", "note")}
        trial = {"key": key, "info": info, "rows": rows, "training": training}
        return trial | {"patches": training.patches_per_epoch or len(train)}


def _input_kind(model):
    if _is_baseline(model):
        return "mfcc" if model in BASELINES else model
    return "as_released" if model.endswith(":as_released") else "logmel"


def _inputs(kind, paths, cache_dir, embeddings):
    """What classifiers of one kind read of each clip, and what identifies it."""
    if kind.startswith("probe:"):
        from soundscapes_utils.embeddings import get_embedding

        name = kind.partition(":")[2]
        reader = (embeddings or {}).get(name) or get_embedding(name)
        x = reader.embed(paths, silence="allow", cache_dir=cache_dir)
        return x, [store.content_key(row.tobytes()) for row in x]
    if kind == "mfcc":
        return classifiers.load_features(paths, cache_dir, kind=kind)
    x, keys = classifiers.load_features(paths, cache_dir)
    return _NORMALISE[kind](x), keys


def _print_plan(plan, missing):
    counts = ["arm", "ratio", "n_real", "n_synthetic", "n_validation", "n_test"]
    table = plan.groupby(counts, sort=False).size().rename("classifiers").reset_index()
    print(table.to_string(index=False))
    print(f"{len(plan)} classifiers: {missing} to train, {len(plan) - missing} kept")
    noted = plan[plan["note"] != ""]
    if len(noted):
        folds = sorted(noted["fold"].unique().tolist())
        print(f"note: {len(noted)} of them (test folds {folds}): {_HEARD_VALIDATION}")


def _train_missing(trials, data, training, records):
    """Train, keep what is done, and give back what went wrong by the name of the trial."""
    from tqdm import tqdm

    # so that no core waits for another at the end
    trials = sorted(trials, key=lambda t: ("crnn" not in t["info"]["model"], -_patches(t)))
    failed, timed = {}, set()
    # disable=None: a bar on a terminal, nothing in a notebook or a log
    with tqdm(total=len(trials), unit="classifier", disable=None, leave=False) as bar:
        for trial, entry, reason in _outcomes(trials, data, training):
            bar.update()
            info = trial["info"]
            if reason:
                name = f"{stats.arm_name(info['arm'], info['ratio'])} {info['model']}"
                name += f" fold {info['fold']} run {info['run']}"
                failed[name] = reason
                tqdm.write(f"failed, going on: {name}: {reason}")
                continue
            records.add(trial["key"], entry)
            if info["model"] not in timed:
                timed.add(info["model"])
                tqdm.write(_estimate(trial, entry["seconds"], trials, training))
    return failed


def _estimate(first, seconds, trials, training):
    """Time of a model's other trials, from its first: so much for each patch trained on."""
    import joblib

    model = first["info"]["model"]
    patches = [_patches(trial) for trial in trials if trial["info"]["model"] == model]
    workers = min(joblib.effective_n_jobs(training.workers or -1), len(patches))
    rest = seconds * (sum(patches) / _patches(first) - 1) / workers
    rest = f"{rest / 60:.0f} min" if rest > 90 else f"{rest:.0f} s"
    return f"{model}: the first took {seconds:.1f} s; about {rest} for {len(patches) - 1} more"


def _patches(trial):
    return trial["training"].epochs * trial["patches"]


def _outcomes(trials, data, training):
    """Each trial with its entry or what went wrong, as they finish."""
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    devices = np.atleast_1d(training.device).tolist()
    left, suspects, handed = {trial["key"]: trial for trial in trials}, [], []

    def tasks(some):
        for i, trial in enumerate(some):
            handed.append(trial["key"])
            model, device = trial["info"]["model"], devices[i % len(devices)]
            placed = trial | {"training": replace(trial["training"], device=device), "path": sys.path}
            x = data.x[_input_kind(model)]
            yield joblib.delayed(_attempt)(placed, x, data.y, len(data.classes))

    while left:
        handed.clear()
        # one killed process takes all others with it: which trial it was shows alone
        alone = suspects.pop() if suspects else None
        workers, some = (2, [left[alone]]) if alone else (training.workers or -1, left.values())
        pool = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
        try:
            for key, entry, reason in pool(tasks(list(some))):
                yield left.pop(key), entry, reason
        except TerminatedWorkerError:
            if alone:
                yield left.pop(alone), None, "its process was killed (too little memory?)"
            else:
                suspects = [key for key in handed if key in left]


def _attempt(trial, x, y, n_classes):
    """Train and test one trial; give back its key, its entry, and what went wrong or None."""
    from threadpoolctl import threadpool_limits

    sys.path += [place for place in trial["path"] if place not in sys.path]  # of a class of one's own
    try:
        with _ONE_TRIAL, threadpool_limits(1):
            return trial["key"], _train_and_test(trial, x, y, n_classes), None
    except Exception as error:
        return trial["key"], None, f"{type(error).__name__}: {error}"


def _train_and_test(trial, x, y, n_classes):
    from sklearn.metrics import f1_score

    started, info = time.perf_counter(), trial["info"]
    train, validation, test = ((np.array(x[rows]), y[rows]) for rows in trial["rows"].values())
    model, seed = info["model"], info["seed"]
    if _is_baseline(model):
        fitted = classifiers.fit_baseline(model.partition(":")[0], *train, seed)
        predicted, curve = fitted.predict(test[0]), []
    else:
        augment = (info["kind"], info["ratio"]) if info["kind"] in _ON_THE_FLY else None
        network, log = classifiers.train_classifier(
            model, train, validation, n_classes, trial["training"], seed, augment
        )
        # the released code tests clip by clip
        predicted = classifiers.predict(model, network, test[0], seed, batch_size=1).argmax(axis=1)
        curve = log.astype(object).where(np.isfinite(log), None).to_numpy().tolist()
    f1 = f1_score(test[1], predicted, labels=range(n_classes), average="macro", zero_division=0)
    scores = {"accuracy": float((test[1] == predicted).mean()), "macro_f1": float(f1)}
    scores["seconds"] = round(time.perf_counter() - started, 3)
    return scores | {"predicted": predicted.tolist(), "curve": curve}


def _write_tables(trials, data, entries, out_dir):
    """Write the results of all trials that are done, their predictions and curves."""
    done = [(trial, entries[trial["key"]]) for trial in trials if trial["key"] in entries]
    results = []
    for trial, entry in done:
        epochs, batch_size = len(entry["curve"]), trial["training"].batch_size
        counts = {"epochs": epochs, "steps": epochs * -(-trial["patches"] // batch_size)}
        results.append(trial["info"] | entry | counts)
    results = pd.DataFrame(results, columns=RESULT_COLUMNS)
    store.write_table(results, out_dir / "results.csv")
    # as text, a fifth of what the tables of a large study would take in memory
    predictions, curves = io.StringIO(), io.StringIO()
    csv.writer(predictions).writerow(["clip_id", "source_id", "label", "predicted", *_PLACE])
    csv.writer(curves).writerow([*classifiers.LOG_COLUMNS, *_PLACE])
    for trial, entry in done:
        test, place = trial["rows"]["test"], [trial["info"][name] for name in _PLACE]
        labels = data.classes[data.y[test]], data.classes[entry["predicted"]]
        rows = zip(data.clip_ids[test], data.sources[test], *labels, strict=True)
        csv.writer(predictions).writerows([*row, *place] for row in rows)
        csv.writer(curves).writerows([*row, *place] for row in entry["curve"])
    store.write_atomic(out_dir / "predictions.csv", predictions.getvalue())
    store.write_atomic(out_dir / "curves.csv", curves.getvalue())
    return results
