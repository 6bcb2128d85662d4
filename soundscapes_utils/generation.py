"""Text-to-audio models behind one protocol, and batches of clips that can be interrupted.

A clip depends on nothing but its row in the plan. Its noise is drawn from its own seed, in a pass
through the model whose shape does not depend on what else is waiting. So it has the same bytes alone, in
a batch, in another order, in a shard or after an interruption: on one machine, with as many threads.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol
from unittest import mock

import numpy as np
import pandas as pd

from . import audio, captions, datasets, store

PLAN_COLUMNS = ["clip_id", "label", "prompt", "prompt_family", "negative_prompt", "seed"]
PLAN_COLUMNS += ["duration_s"]
GENERATED_COLUMNS = ["clip_id", "path", "label", "fold", "source_id", "dataset", "duration_s"]
GENERATED_COLUMNS += ["sample_rate", "prompt", "prompt_family", "negative_prompt", "backend"]
GENERATED_COLUMNS += ["checkpoint", "seed", "guidance_scale", "steps", "lufs", "score", "heard"]
REJECTED_COLUMNS = ["clip_id", "label", "prompt", "backend", "checkpoint", "seed", "reason"]

PEAK = 10 ** (-1 / 20)  # clips are written with their peak at −1 dB of full scale, or below
SILENT_PEAK = 10 ** (-60 / 20)  # a clip below this is silent
CLIPPED_RUN, CLIPPED_SHARE = 3, 0.001  # flat tops: their shortest run, their share of a clip
AUDIOCRAFT_LUFS, AUDIOCRAFT_FLOOR = -14.0, 2e-3  # audiocraft's level, and the RMS below which none

# --- what there is: options of each back-end, settings of the studies, public checkpoints ---------

# Options of each back-end (null: as the checkpoint's note says, else the pipeline's own default).
# Presets hold what the works wrote, levels too; the challenge system keeps the best of three by CLAP.
# Pipelines are diffusers' classes; ragged are tokenizers that do not pad all prompts to one length (of
# other pipelines any may be).
_TABLES = json.loads(Path(__file__).with_name("backends.json").read_text(encoding="utf-8"))
# Audiocraft: the class of each back-end and what it calls the settings.
BACKENDS, PRESETS, _PIPELINES, _RAGGED, _AUDIOCRAFT = _TABLES.values()
# Public checkpoints; parameters in millions, of the parts that a generation needs. docs/generators.md
# shows them, with what each column means.
CHECKPOINTS = store.read_table(Path(__file__).with_name("checkpoints.csv")).set_index("checkpoint")

# how pipelines of diffusers call the seconds and the settings
_SECONDS = ["audio_length_in_s", "audio_end_in_s", "audio_duration_s", "audio_duration", "duration"]
_SETTINGS = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale", "eta": "eta"}


class GenerationError(store.DataError):
    """A request that cannot be fulfilled: unknown name or option, bad plan, missing weights."""


def _require(condition, message):
    if not condition:
        raise GenerationError(message)


# --- back-ends ------------------------------------------------------------------------------------


class TextToAudio(Protocol):
    """What `generate_clips` asks of a model; any object with these five works.

    ``settings`` holds everything that alters the sound (steps, guidance, weights, …). An attribute
    ``heard``, data set to folds that the model was trained on, is optional: ``{"esc10": [2, 3]}``.
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip per prompt: a list of float32 [round(duration_s · sample_rate)].

        ``seeds`` are integers from 0 to 2³² − 1, one per clip; the level is the model's own.
        """


@dataclass
class _InPasses:
    """A model that makes clips in passes of exactly ``clips_per_pass``.

    The last pass is filled up with copies, and clips share a pass only if their prompts have equal
    lengths in tokens where these reach the sound. With one clip per pass a clip is bit by bit
    independent of its batch. With more, its place may round it differently, in half precision most.
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict
    pipe: object
    heard: dict = field(default_factory=dict)
    takes_negative_prompts: bool = True

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip per prompt; see `TextToAudio.generate`."""
        negative_prompts = negative_prompts or [""] * len(prompts)
        self._check(prompts, seeds, duration_s, negative_prompts)
        rows = list(zip(prompts, seeds, negative_prompts, strict=True))
        size, waiting, sounds = self.settings["clips_per_pass"], {}, [None] * len(rows)
        for i, key in enumerate(self.pass_keys(prompts, negative_prompts)):
            waiting.setdefault(key, []).append(i)
        n_samples = round(duration_s * self.sample_rate)
        for places in waiting.values():
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                filled = chosen + [chosen[-1]] * (size - len(chosen))
                columns = map(list, zip(*(rows[i] for i in filled), strict=True))
                for i, y in zip(chosen, self._one_pass(*columns, n_samples), strict=False):
                    sounds[i] = audio.fix_length(y, n_samples, "pad")
        return sounds

    def _check(self, prompts, seeds, duration_s, negative_prompts):
        texts = all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
        counts = len(prompts), len(seeds), len(negative_prompts)
        each = "{} prompts, {} seeds, {} negative prompts: give one of each per clip"
        _require(len(set(counts)) == 1, each.format(*counts))
        _require(texts, "a prompt is empty: say what should be heard")
        _require(duration_s > 0, f"duration_s is {duration_s}: must be positive")
        _require(
            self.takes_negative_prompts or not any(negative_prompts),
            f"{self.checkpoint} takes no negative prompt: plan with negative_prompt=''",
        )


class DiffusersBackend(_InPasses):
    """A text-to-audio pipeline of diffusers, on its device; made by `get_backend`.

    Stereo becomes mono, the mean of both channels. Half precision is tested in float16 with AudioLDM
    and AudioLDM 2, in bfloat16 with AudioLDM, Stable Audio (Open and 3), LongCat and ACE-Step. A tiny
    AudioLDM 2 in bfloat16 on a CPU makes clips that are rejected.
    """

    def pass_keys(self, prompts, negative_prompts):
        """Clips of equal keys can share a pass: one tuple of token lengths per clip."""
        parts = self.pipe.components
        names = [name for name in parts if name.startswith("tokenizer")]
        names = _RAGGED.get(type(self.pipe).__name__, names)
        texts = list(zip(prompts, negative_prompts, strict=True))
        lengths = {
            pair: tuple(len(parts[name](text).input_ids) for name in names for text in pair)
            for pair in set(texts)
        }
        # a pass is with negative prompts or without: to Stable Audio, "" is not the same as none
        return [(bool(pair[1]), lengths[pair]) for pair in texts]

    def _one_pass(self, prompts, seeds, negative_prompts, n_samples):
        import torch

        takes = inspect.signature(self.pipe.__call__).parameters
        arguments = {
            argument: self.settings[key]
            for key, argument in _SETTINGS.items()
            if argument in takes and self.settings[key] is not None
        }
        seconds = next(name for name in _SECONDS if name in takes)
        # LongCat rounds down to whole latents
        spare = self.pipe.vae_scale_factor if seconds == "audio_duration_s" else 0
        # half a sample more: the pipeline truncates where floating point falls short
        arguments[seconds] = (n_samples + spare + 0.5) / self.sample_rate
        if any(negative_prompts):
            arguments["negative_prompt"] = negative_prompts
        if "lyrics" in takes:  # ACE-Step: one for each clip; of broken seconds it may miscount latents
            arguments |= {"lyrics": [""] * len(prompts), seconds: math.ceil(arguments[seconds])}
        # noise drawn on the CPU is the same on every device
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        try:
            sounds = self.pipe(prompts, generator=generators, **arguments).audios
        except ValueError as error:
            refused = f"its pipeline refuses {n_samples / self.sample_rate} s ({error})"
            raise GenerationError(f"{self.checkpoint}: {refused}") from error
        sounds = torch.as_tensor(sounds).float().cpu().numpy()
        return sounds.mean(axis=1) if sounds.ndim == 3 else sounds


class AudioGenBackend(_InPasses):
    """AudioGen or MAGNeT through audiocraft, tokens sampled with one random stream per clip.

    Beyond the 10 s that it was trained on, AudioGen continues a clip from its own end; MAGNeT makes its
    whole length, in spans of tokens, which is cut. With several clips per pass a rounding may tip a
    token, and all that follows it differs.
    """

    def pass_keys(self, prompts, negative_prompts):
        """Clips of equal keys can share a pass: the length in tokens of each prompt."""
        conditioner = self.pipe.lm.condition_provider.conditioners["description"]
        lengths = {p: conditioner.tokenize([p])["attention_mask"].shape[1] for p in set(prompts)}
        return [lengths[prompt] for prompt in prompts]

    def _one_pass(self, prompts, seeds, negative_prompts, n_samples):
        rate, seconds = self.pipe.frame_rate, n_samples / self.sample_rate
        given = {theirs: self.settings[own] for own, theirs in _AUDIOCRAFT[self.name][1].items()}
        if span := getattr(self.pipe.lm, "span_len", 0):
            longest = round(self.pipe.duration * rate) // span * span / rate
            _require(seconds <= longest, f"{self.checkpoint}: makes {longest} s at most, not {seconds}")
        else:
            # half a frame more: audiocraft truncates where floating point falls short
            given["duration"] = (math.ceil(seconds * rate) + 0.5) / rate
        self.pipe.set_generation_params(**given)
        with _sample_by_row(seeds, "xformers" if span else "torch"):
            return self.pipe.generate(prompts).float().cpu().numpy()[:, 0]


@contextmanager
def _sample_by_row(seeds, attention):
    """Let audiocraft draw the tokens of each row from that row's own generator.

    MAGNeT's masked attention is that of "xformers", which has none on a CPU: torch has the same.
    """
    import torch
    from audiocraft.modules import transformer
    from audiocraft.utils import utils

    def attend(q, k, v, mask, p):
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts, mask, p).transpose(1, 2)

    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def multinomial(probabilities, num_samples, **_):
        # dividing by exponential noise and taking the largest is one draw from a categorical
        # distribution, and the noise can come from the CPU whatever the device
        shape = probabilities.shape[1:]
        noise = torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators])
        return (probabilities / noise.to(probabilities)).argmax(-1, keepdim=True)

    ops, during = SimpleNamespace(unbind=torch.unbind), mock.patch.object
    ops.memory_efficient_attention = attend
    transformer.set_efficient_attention_backend(attention)
    with during(utils, "multinomial", multinomial), during(transformer, "ops", ops):
        yield


# --- open a model ---------------------------------------------------------------------------------


def preset(name):
    """Everything that a back-end or preset stands for, as a dictionary to override.

    ``backend`` and its options, and how clips are made: ``duration_s``; ``candidates`` for each
    clip that is kept; ``loudness``, as for `generate_clips`.
    """
    row = PRESETS.get(name, {"backend": name})
    clips = {"duration_s": 2.56, "candidates": 1, "loudness": "peak"}
    return clips | BACKENDS.get(row["backend"], {}) | row


def get_backend(name, **options):
    """Load a text-to-audio model, a `TextToAudio`.

    Parameters
    ----------
    name : str
        A row of `BACKENDS` or `PRESETS`; or ``"module:Class"``, a back-end of your own.
    **options
        ``checkpoint``: a folder or hub name, or ``"builtin"``. ``device``: a torch device, else a GPU if
        there is one. ``guidance_scale``: weight of the prompt. ``clips_per_pass``: more is faster, on a
        GPU by far, and less exact. Pipelines of diffusers: ``steps``, ``eta``, ``dtype`` ("float32",
        "float16", "bfloat16"). AudioGen (MAGNeT): ``top_k`` (``top_p``), ``temperature``. None stands
        for what was left out.

    Raises
    ------
    GenerationError, ldm.CheckpointError
        If the name or an option is unknown; if the checkpoint does not open.

    >>> backend = get_backend("audioldm", checkpoint="builtin", steps=2, device="cpu")
    >>> [clip.shape for clip in backend.generate(["a dog barking"], [0], 1.28)]
    [(20480,)]
    """
    options = {key: value for key, value in options.items() if value is not None}
    if ":" in name:
        backend = store.load_class(name)(**options)
        backend.settings["code"] = store.class_files(name)  # which alters the sound, too
        return backend
    from . import ldm

    whole = preset(name)
    known = BACKENDS.get(whole["backend"])
    names = ", ".join([*BACKENDS, *PRESETS])
    _require(known, f"unknown backend {name!r}: choose one of {names}, or 'module:Class'")
    unknown = ", ".join(sorted(set(options) - set(known)))
    _require(not unknown, f"backend {name} has no option {unknown}: it takes {', '.join(known)}")
    options = {key: (whole | options)[key] for key in known}
    _require(options["checkpoint"], "backend auto needs a checkpoint: a folder or a hub name")
    _require(options["clips_per_pass"] >= 1, "clips_per_pass must be at least 1")
    opener = _open_audiocraft if whole["backend"] in _AUDIOCRAFT else _open_diffusers
    checkpoint = options["checkpoint"]
    if not ldm.local_folder(checkpoint).exists():
        _say_licence(checkpoint)
    with ldm.opening(checkpoint, f"a model of backend {whole['backend']}"):
        return opener(whole["backend"], options)


def _say_licence(checkpoint):
    """Say licence and size of a public checkpoint before it is fetched."""
    about = "licence and size not known here, see its page"
    if checkpoint in CHECKPOINTS.index:
        about = "licence {licence}, {download_gb} GB, trained on {trained_on}"
        about = about.format(**CHECKPOINTS.loc[checkpoint])
    print(f"{checkpoint}: {about}", file=sys.stderr)


def _open_diffusers(name, options):
    import torch

    from . import ldm

    checkpoint, dtype = options["checkpoint"], options["dtype"]
    known = ("float32", "float16", "bfloat16")
    _require(dtype in known, f"unknown dtype {dtype!r}: choose one of {', '.join(known)}")
    source, info = ldm.resolve(checkpoint), ldm.checkpoint_info(checkpoint)
    index = ldm.pipeline_index(checkpoint, _PIPELINES.get(name))
    if noted := index["_class_name"] in ldm.PIPELINES:
        pipe = ldm.load_pipeline(checkpoint, "cpu").to(dtype=getattr(torch, dtype))
    else:
        pipe = _load_pipeline(source, index, getattr(torch, dtype))
    takes = inspect.signature(pipe.__call__).parameters
    _require(
        "prompt" in takes and set(takes) & set(_SECONDS),
        f"{checkpoint}: {type(pipe).__name__} is not a text-to-audio pipeline; it must take a "
        f"prompt and one of {', '.join(_SECONDS)}",
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(_device(options["device"]))
    settings = {key: options[key] for key in (*_SETTINGS, "clips_per_pass", "dtype")}
    for key, argument in _SETTINGS.items():
        acts = argument in takes
        _require(acts or settings[key] is None, f"{checkpoint}: its pipeline has no option {key}")
        if settings[key] is None and acts:
            settings[key] = info[key] if noted else takes[argument].default
    if settings["steps"] is None and type(pipe).__name__ == "StableAudio3Pipeline":
        settings["steps"] = 8 if pipe.scheduler.config.stochastic_sampling else 100  # as its __call__
    settings["weights"] = ldm.checkpoint_digest(source)
    about = name, _short_name(checkpoint), _sample_rate(pipe), settings
    return DiffusersBackend(*about, pipe, info.get("heard", {}), "negative_prompt" in takes)


def _load_pipeline(source, index, dtype):
    """Open any other pipeline; Stable Audio's sampler of diffusers needs torchsde, this one does not."""
    import torch
    from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler

    from . import ldm

    class CosineSDESolver(EDMDPMSolverMultistepScheduler):
        def precondition_noise(self, sigma):
            return torch.as_tensor(sigma).atan() / math.pi * 2

    named = [part for part, names in index.items() if isinstance(names, list)]
    weights = ldm.weight_options(source, named)
    swapped = index.get("scheduler") == ["diffusers", "CosineDPMSolverMultistepScheduler"]
    weights |= {"scheduler": None} if swapped else {}
    pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **weights)
    if swapped:
        solver = {"subfolder": "scheduler", "algorithm_type": "sde-dpmsolver++"}
        pipe.register_modules(scheduler=CosineSDESolver.from_pretrained(source, **solver))
    return pipe


def _device(device):
    import torch

    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _sample_rate(pipe):
    for part in (getattr(pipe, "vocoder", None), pipe, getattr(pipe, "vae", None)):
        # diffusers' parts warn of what is asked of them and stands in their config
        for owner in (getattr(part, "config", None), part):
            for name in ("sampling_rate", "sample_rate"):
                if getattr(owner, name, None):
                    return int(getattr(owner, name))
    raise GenerationError(f"{type(pipe).__name__} does not say the sample rate of its sounds")


def _short_name(checkpoint):
    from . import ldm

    # a folder is called by its own name: tables should not depend on where a project lies
    path = ldm.local_folder(checkpoint)
    return path.absolute().name if checkpoint != "builtin" and path.is_dir() else str(checkpoint)


def _open_audiocraft(name, options):
    import torch

    from . import ldm

    checkpoint, device = options.pop("checkpoint"), _device(options.pop("device"))
    _require(
        checkpoint != "builtin", f"checkpoint builtin is an AudioLDM: backend {name} has no use of it"
    )
    about = name, _short_name(checkpoint)
    checkpoint = str(ldm.local_folder(checkpoint))
    kind = getattr(_import_audiocraft().models, _AUDIOCRAFT[name][0])
    # its pickles hold tensors and texts, whatever the environment would allow
    load = torch.load
    with mock.patch("torch.load", lambda *args, **how: load(*args, **how | {"weights_only": True})):
        model = kind.get_pretrained(checkpoint, device=device)
    # audiocraft decides: half precision on a GPU
    settings = options | {"dtype": "float32" if device == "cpu" else "float16"}
    settings["weights"] = ldm.checkpoint_digest(checkpoint)
    return AudioGenBackend(*about, model.sample_rate, settings, model, takes_negative_prompts=False)


def _import_audiocraft():
    """Import audiocraft without laion_clap, which asks the network for files when imported.

    audiocraft treats its absence as fine; one that was imported before stays usable.
    """
    if importlib.util.find_spec("xformers") is None:
        _stand_in_for_xformers()
    before = {key: sys.modules[key] for key in ["laion_clap"] if key in sys.modules}
    sys.modules["laion_clap"] = None
    try:
        import audiocraft
    finally:
        del sys.modules["laion_clap"]
        sys.modules.update(before)
    return audiocraft


def _stand_in_for_xformers():
    """Give audiocraft the names that it imports: by default torch computes its attention anyway."""
    import torch

    for name in ("xformers", "xformers.ops"):
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
    sys.modules["xformers"].ops = ops = sys.modules["xformers.ops"]
    ops.unbind, ops.memory_efficient_attention, ops.LowerTriangularMask = torch.unbind, None, object


# --- plans ----------------------------------------------------------------------------------------


def clip_seed(dataset, label, prompt, index, seed=0):
    """Derive a clip's seed, 0 to 2³² − 1, from what it is and not from its place in a list.

    ``index`` says which of the clips of that prompt it is; another ``seed``, of the whole study,
    gives other clips throughout.
    """
    identity = json.dumps([str(dataset), str(label), str(prompt), str(index), int(seed)])
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")


def plan_clips(
    labels, n_per_class, family="simple", *, duration_s, dataset="builtin", negative_prompt="", seed=0
):
    """Plan clips of every class: label × prompt family × index.

    `family` is one or a list, see `captions.prompts`; `n_per_class` is as for `class_counts`;
    `dataset` and `seed` are part of each clip's identity, see `clip_seed`. Returns `PLAN_COLUMNS`.
    A clip is the same in a longer plan and in a shorter one.

    >>> plan_clips(["dog", "rain"], 1, duration_s=2.56).clip_id.tolist()
    ['dog-simple-0000', 'rain-simple-0000']
    """
    counts = class_counts(n_per_class, labels)
    rows = []
    for name in [family] if isinstance(family, str) else family:
        for label in labels:
            texts = captions.prompts([label], name, n=counts[label], seed=seed)
            for i, (_, prompt, kind) in enumerate(texts.itertuples(index=False)):
                chance = clip_seed(dataset, label, prompt, i, seed)
                row = (f"{label}-{kind}-{i:04d}", label, prompt, kind, negative_prompt, chance)
                rows.append((*row, float(duration_s)))
    return pd.DataFrame(rows, columns=PLAN_COLUMNS)


def class_counts(counts, labels):
    """Count the clips that each class of a synthetic set should have: class to number.

    `labels` are those of the real clips. `counts` is a number for all; a dictionary; ``"200%"`` of
    the real clips; ``"ronchini2024"``, UrbanSound8K's numbers that Ronchini et al. generate at
    100 %, or a share of them, ``"ronchini2024 400%"``. Shares are rounded, to at least one clip.
    """
    real = pd.Series(list(labels), dtype=str).value_counts().sort_index().to_dict()
    if isinstance(counts, str):
        share = re.fullmatch(r"(ronchini2024)?\s*(?:(\d+(?:\.\d+)?)\s*%)?", counts.strip())
        percent = float(share[2] or 100) if share and counts.strip() else 0
        forms = "a number, '200%' of the real clips, 'ronchini2024' or 'ronchini2024 400%'"
        _require(percent > 0, f"counts is {counts!r}: give {forms}")
        published = {label: row["urbansound8k"] for label, row in captions.EVENTS.items()}
        whole = published if share[1] else real
        counts = {label: max(1, round(n * percent / 100)) for label, n in whole.items() if n > 0}
    counts = counts if isinstance(counts, dict) else dict.fromkeys(real, int(counts))
    absent = [label for label in real if label not in counts]
    _require(not absent, f"there is no number of clips for the classes {absent}")
    return {label: int(counts[label]) for label in real}


def plan_captions(mixes, *, duration_s, seed=0):
    """Plan one clip for the caption of each mix, under its ``clip_id``; see `plan_clips`."""
    rows = zip(mixes["label"], mixes["caption"], mixes["clip_id"], strict=True)
    plan = mixes[["clip_id", "label"]].assign(prompt=mixes["caption"], prompt_family="caption")
    plan["seed"] = [clip_seed("mixes", *row, seed) for row in rows]
    plan = plan.assign(negative_prompt="", duration_s=float(duration_s))
    return plan[PLAN_COLUMNS].reset_index(drop=True)


# --- batches --------------------------------------------------------------------------------------


def generate_clips(plan, backend, out_dir, batch_size=None, max_attempts=3, loudness="peak", shard=None):
    """Make the clips of a plan that are not there yet, and return the table of all of them.

    A file's name carries a digest of its recipe (prompt, seed, back-end, weights, settings): a clip
    made before by the same recipe is kept, one made otherwise is never overwritten. An output that
    is not finite, stays below −60 dB or is clipped is rejected, and made again with the next seed.

    Parameters
    ----------
    plan : pandas.DataFrame
        From `plan_clips`, or any table with its columns.
    backend : TextToAudio
    batch_size : int, optional
        Clips per call of the back-end; by default 16, or eight passes where that is more.
    max_attempts : int
        Seeds tried per clip.
    loudness : "peak", "none", "audiocraft" or float
        Level of the files: peak at −1 dB of full scale; the model's own; −14 LUFS through a tanh, as
        audiocraft writes; or LUFS (ITU-R BS.1770), less where the peak would pass −1 dB.
    shard : str, optional
        "i/n": every n-th row of the plan, from the i-th; all n make the same files as one call.

    Returns
    -------
    pandas.DataFrame
        `GENERATED_COLUMNS`, in the plan's order: ``seed`` the one that made the clip, ``score``
        empty, ``heard`` what the model was trained on. Clips for which every attempt failed are
        missing, and a warning names them.
    """
    from tqdm import tqdm

    plan = _checked(plan, loudness, max_attempts)
    plan, records = store.shard(plan, shard), store.Records(out_dir, "clips")
    # a bar on a terminal; in notebooks and logs a line a minute
    rare = {} if sys.stderr.isatty() else dict.fromkeys(["delay", "mininterval", "maxinterval"], 60)
    pending, made = plan.to_dict("records"), {}
    for attempt in range(max_attempts):
        if not pending:
            break
        requests = [_request(row, attempt, backend, loudness) for row in pending]
        missing = [row for row in requests if not _is_known(row, records)]
        batches = _batches(missing, backend, batch_size)
        for batch in tqdm(batches, desc=f"calls of {backend.checkpoint}", **rare):
            _make_batch(batch, backend, records, loudness)
        entries = [records.entries[row["key"]] for row in requests]
        fit = [(row, e) for row, e in zip(requests, entries, strict=True) if not e.get("reason")]
        made |= {row["clip_id"]: row | {"lufs": entry.get("lufs")} for row, entry in fit}
        pending = [row for row in pending if row["clip_id"] not in made]
    _report_failures(pending, plan, out_dir, max_attempts)
    rows = [made[clip_id] for clip_id in plan["clip_id"] if clip_id in made]
    return _described(pd.DataFrame(rows, columns=[*GENERATED_COLUMNS, "key"]), backend, out_dir)


def _described(table, backend, out_dir):
    """Say of clips what follows from this call; from the records comes what was measured only."""
    table["path"] = [str(Path(out_dir) / f"{key}.wav") for key in table.pop("key")]
    heard = datasets.format_heard(getattr(backend, "heard", {}))
    about = {"dataset": "generated", "heard": heard, "backend": backend.name}
    about |= {"checkpoint": backend.checkpoint, "sample_rate": backend.sample_rate}
    about |= {key: backend.settings.get(key) for key in ("guidance_scale", "steps")}
    numbers = dict.fromkeys(["fold", "guidance_scale", "lufs", "score"], float)
    return table.assign(source_id=table["clip_id"], **about).astype(numbers | {"steps": "Int64"})


def _checked(plan, loudness, max_attempts):
    """The columns of a plan, with values that can be used; the one check before anything is made."""
    kinds = {"clip_id": "a name", "label": "text", "prompt": "text", "prompt_family": "text"}
    store.check_rows(plan, "plan", **kinds, seed="whole", duration_s="positive")
    _require(len(plan), "the plan has no rows: ask for at least one class and one clip")
    twice = ", ".join(plan["clip_id"][plan["clip_id"].duplicated()][:1])
    _require(not twice, f"clip_id {twice} appears twice in the plan")
    _require(max_attempts >= 1, f"max_attempts is {max_attempts}: give at least 1")
    level = isinstance(loudness, int | float) and -70 < loudness <= 0
    forms = "'peak', 'none', 'audiocraft', or LUFS from -70 to 0, such as -23.0"
    known = loudness in ("peak", "none", "audiocraft") or level
    _require(known, f"loudness is {loudness!r}: give {forms}")
    # a plan that was read from a file may have NaN where a text was empty, and 4.0 for the seed 4
    plan = plan.reindex(columns=PLAN_COLUMNS).fillna({"negative_prompt": ""})
    return plan.astype({"seed": int, "duration_s": float})


def _request(row, attempt, backend, loudness):
    """A row of the plan with the seed of this attempt, and the key that names its file."""
    row = row | {"seed": (row["seed"] + attempt) % 2**32}
    wanted = [row[key] for key in ("prompt", "negative_prompt", "seed", "duration_s")]
    # your own back-end may have no weights in its settings: its checkpoint stands for them
    weights = None if backend.settings.get("weights") else backend.checkpoint
    model = [backend.name, backend.settings, backend.sample_rate, weights]
    recipe = store.content_key(wanted, model, loudness, length=10)
    return row | {"key": f"{row['clip_id']}-{recipe}"}


def _is_known(row, records):
    """Whether a request was made before and its file is as it was written, or was rejected."""
    entry = records.entries.get(row["key"], {})
    path = records.folder.parent / f"{row['key']}.wav"
    return bool(entry.get("reason")) or store.is_unchanged(path, entry.get("stamp"))


def _batches(rows, backend, batch_size):
    """Cut rows into calls of one duration whose clips can share their passes."""
    kinds, per_pass = [()] * len(rows), backend.settings.get("clips_per_pass", 1)
    if hasattr(backend, "pass_keys") and per_pass > 1:
        texts = ([row[key] for row in rows] for key in ("prompt", "negative_prompt"))
        kinds = backend.pass_keys(*texts)
    groups, size = {}, batch_size or 8 * max(2, per_pass)
    for row, kind in zip(rows, kinds, strict=True):
        groups.setdefault((row["duration_s"], kind), []).append(row)
    parts = [groups[key] for key in sorted(groups)]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def _make_batch(batch, backend, records, loudness):
    """Make clips, write those that are fit, and note each with its reason if it is not."""
    columns = ([row[key] for row in batch] for key in ("prompt", "seed", "negative_prompt"))
    prompts, seeds, negative_prompts = columns
    sounds = backend.generate(prompts, seeds, batch[0]["duration_s"], negative_prompts)
    for row, y in zip(batch, sounds, strict=True):
        y, gain, reason = _levelled(y, backend.sample_rate, loudness)
        entry = {key: row[key] for key in PLAN_COLUMNS}
        entry |= {"backend": backend.name, "checkpoint": backend.checkpoint, "reason": reason}
        if not reason:
            path = records.folder.parent / f"{row['key']}.wav"
            audio.save_audio(path, y, backend.sample_rate)
            lufs = audio.loudness(y, backend.sample_rate)
            entry |= {"stamp": store.file_stamp(path), "loudness": loudness, "gain": gain}
            entry |= {"lufs": round(lufs, 2) if math.isfinite(lufs) else None}
        records.add(row["key"], entry)


def _levelled(y, rate, loudness):
    """A clip at its level, the gain that it took, and the reason if the clip is not fit."""
    if not np.isfinite(y).all():
        return y, None, "not finite"
    # a constant offset makes no sound
    if np.abs(y - y.mean()).max() < SILENT_PEAK:
        return y, None, "silent"
    if _flat_share(y) > CLIPPED_SHARE:
        return y, None, "clipped"
    peak, audiocraft = float(np.abs(y).max()), loudness == "audiocraft"
    if loudness == "none" or (audiocraft and np.sqrt(np.mean(y**2)) < AUDIOCRAFT_FLOOR):
        return y, 1.0, "beyond full scale" if peak > 1 else ""
    gain = PEAK / peak
    if loudness != "peak":
        lufs = (_audiocraft_loudness if audiocraft else audio.loudness)(y, rate)
        if not math.isfinite(lufs):
            return y, None, "below -70 LUFS"
        wanted = 10 ** (((AUDIOCRAFT_LUFS if audiocraft else loudness) - lufs) / 20)
        gain = wanted if audiocraft else min(gain, wanted)
    y = y * np.float32(gain)
    return np.tanh(y) if audiocraft else y, gain, ""


def _audiocraft_loudness(y, rate):
    # torchaudio's measure, which limits what its filters make louder than full scale
    import torch
    from torchaudio.functional import loudness

    y = audio.fix_length(y, max(len(y), round(0.4 * rate)))  # the standard's shortest
    return loudness(torch.from_numpy(y)[None], rate).item()


def _flat_share(y):
    """Share of the samples that stand in a row at exactly the highest or the lowest value."""
    share, peak = 0.0, np.abs(y).max()
    # silence is the lowest value of a sound that only goes up, and not a flat top
    for extreme in [value for value in (y.max(), y.min()) if abs(value) > peak / 2]:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], y == extreme, [False]])))
        runs = edges[1::2] - edges[::2]
        share += runs[runs >= CLIPPED_RUN].sum() / y.size
    return share


def _report_failures(pending, plan, out_dir, max_attempts):
    names = ", ".join(row["clip_id"] for row in pending[:5])
    message = (
        f"{len(pending)} of {len(plan)} clips were silent, clipped or not finite with each of "
        f"{max_attempts} seeds, such as {names}; rejected_clips({str(out_dir)!r}) lists them"
    )
    advice = "Check the checkpoint, the prompts and the precision."
    _require(len(pending) < max(1, len(plan)), f"{message}. {advice}")
    if pending:
        warnings.warn(message, stacklevel=3)


def rejected_clips(out_dir):
    """List the outputs in a folder that were rejected, with their reasons: `REJECTED_COLUMNS`."""
    entries = store.Records(out_dir, "clips").entries.values()
    return pd.DataFrame([e for e in entries if e.get("reason")], columns=REJECTED_COLUMNS)
