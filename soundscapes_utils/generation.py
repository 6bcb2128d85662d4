"""Text-to-audio models behind one protocol, and batches of clips that can be interrupted.

A clip is made by its own seed, in a pass through the model whose shape never depends on who else
is waiting. So it has the same bytes whether it is made alone, in a batch, in another order, in a
shard, or after an interruption: on one machine, with one number of threads and one set of options.
"""

import hashlib
import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from . import audio, captions

PLAN_COLUMNS = [
    "clip_id",
    "label",
    "prompt",
    "prompt_family",
    "negative_prompt",
    "seed",
    "duration_s",
]
GENERATED_COLUMNS = [
    "clip_id",
    "label",
    "prompt",
    "prompt_family",
    "negative_prompt",
    "backend",
    "checkpoint",
    "seed",
    "guidance_scale",
    "steps",
    "duration_s",
    "sample_rate",
    "path",
    "lufs",
    "score",
]
REJECTED_COLUMNS = ["clip_id", "label", "prompt", "backend", "checkpoint", "seed", "reason"]

PEAK = 10 ** (-1 / 20)  # every clip is written with its peak at −1 dB of full scale
SILENT_PEAK = 10 ** (-60 / 20)  # below this a model has made nothing that is worth amplifying
MANIFEST = "manifest.jsonl"


class GenerationError(ValueError):
    """A request that no back-end can fulfil: unknown name or option, bad plan, missing weights."""


class TextToAudio(Protocol):
    """What `generate_clips` asks of a model; any object with these five works.

    Attributes
    ----------
    name : str
        Name of the back-end, as in the column ``backend``.
    checkpoint : str
        Name of the weights, as in the column ``checkpoint``.
    sample_rate : int
        Of the sounds it makes, Hz.
    settings : dict
        Everything beside the request that alters the sound (steps, guidance, weights, …); a clip
        made under other settings is another clip.
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip a prompt.

        Parameters
        ----------
        prompts : list of str
            What to hear.
        seeds : list of int
            One a clip, 0 to 2³² − 1.
        duration_s : float
            Seconds of each clip.
        negative_prompts : list of str, optional
            What not to hear, one a clip.

        Returns
        -------
        list of np.ndarray, float32 [round(duration_s · sample_rate)]
            One a prompt; the level is the model's own.
        """


@dataclass
class DiffusersBackend:
    """AudioLDM or AudioLDM 2 through its diffusers pipeline; made by `get_backend`.

    Clips run through the model in passes of exactly ``clips_per_pass``: the last pass is filled up
    with copies, and clips share a pass only if their prompts have the same length in tokens where
    that length reaches the sound (AudioLDM 2 pads to the longest). With the default of 1 a clip is
    bit by bit independent of its batch. With more, its place in the pass and their number may round
    it differently: by about 1e-5 of full scale in float32, with the tiny models of the tests.

    Attributes
    ----------
    name, checkpoint, sample_rate, settings
        See `TextToAudio`.
    pipe : diffusers.DiffusionPipeline
        Loaded, on its device.
    token_lengths : callable
        From prompts to the lengths that keep them in separate passes.

    Examples
    --------
    >>> get_backend("audioldm", checkpoint="embedded", steps=2, device="cpu").settings["steps"]
    2
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict
    pipe: object
    token_lengths: Callable

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip a prompt.

        Parameters
        ----------
        prompts, seeds, duration_s, negative_prompts
            See `TextToAudio.generate`. AudioLDM 2 cuts a negative prompt to the prompt's length.

        Returns
        -------
        list of np.ndarray, float32 [samples]

        Raises
        ------
        GenerationError
            If the lists differ in length, a prompt is empty or the duration is not positive.
        """
        negative_prompts = negative_prompts or [""] * len(prompts)
        _check_request(prompts, seeds, negative_prompts, duration_s)
        rows = list(zip(prompts, seeds, negative_prompts, strict=True))
        lengths = self.token_lengths(prompts)
        return _in_passes(
            rows, lengths, self.settings["clips_per_pass"], lambda r: self._one_pass(r, duration_s)
        )

    def _one_pass(self, rows, duration_s):
        import torch

        prompts, seeds, negative_prompts = map(list, zip(*rows, strict=True))
        arguments = {
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": self.settings["guidance_scale"],
            "eta": self.settings["eta"],
        }
        n_samples = round(duration_s * self.sample_rate)
        sounds = self.pipe(
            prompts,
            negative_prompt=negative_prompts,
            # half a sample more: the pipeline truncates where floating point falls short
            audio_length_in_s=(n_samples + 0.5) / self.sample_rate,
            # noise drawn on the CPU is the same on every device
            generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
            **arguments,
        ).audios
        return [audio.fit_length(np.asarray(y, np.float32), n_samples, "pad") for y in sounds]


@dataclass
class AudioGenBackend:
    """AudioGen through audiocraft; made by `get_backend`.

    Tokens are sampled with one stream of random numbers a clip, in passes as in
    `DiffusersBackend`: with the default ``clips_per_pass`` of 1 a clip is bit by bit independent of
    its batch. With more, a rounding may now and then tip a token, and all that follows it differs.

    Attributes
    ----------
    name, checkpoint, sample_rate, settings
        See `TextToAudio`.
    model : audiocraft.models.AudioGen
        Loaded, on its device.

    Examples
    --------
    >>> backend = get_backend("audiogen", checkpoint="facebook/audiogen-medium")  # doctest: +SKIP
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict
    model: object

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip a prompt.

        Parameters
        ----------
        prompts, seeds, duration_s
            See `TextToAudio.generate`. Beyond the 10 s that it was trained on, audiocraft continues
            a clip from its own end.
        negative_prompts : list of str, optional
            AudioGen knows none: must be empty.

        Returns
        -------
        list of np.ndarray, float32 [samples]

        Raises
        ------
        GenerationError
            As for the other back-ends, or if a negative prompt is given.
        """
        negative_prompts = negative_prompts or [""] * len(prompts)
        _check_request(prompts, seeds, negative_prompts, duration_s)
        if any(negative_prompts):
            raise GenerationError("audiogen takes no negative prompt: plan with negative_prompt=''")
        rows = list(zip(prompts, seeds, strict=True))
        conditioner = self.model.lm.condition_provider.conditioners["description"]
        lengths = [conditioner.tokenize([p])["attention_mask"].shape[1] for p in prompts]
        return _in_passes(
            rows, lengths, self.settings["clips_per_pass"], lambda r: self._one_pass(r, duration_s)
        )

    def _one_pass(self, rows, duration_s):
        prompts, seeds = map(list, zip(*rows, strict=True))
        n_samples = round(duration_s * self.sample_rate)
        rate = self.model.frame_rate
        frames = math.ceil(n_samples / self.sample_rate * rate)
        self.model.set_generation_params(
            # half a frame more: audiocraft truncates where floating point falls short
            duration=(frames + 0.5) / rate,
            top_k=self.settings["top_k"],
            temperature=self.settings["temperature"],
            cfg_coef=self.settings["guidance_scale"],
        )
        with _sample_by_row(seeds):
            sounds = self.model.generate(prompts)
        sounds = sounds.float().cpu().numpy()[:, 0]
        return [audio.fit_length(y, n_samples, "pad") for y in sounds]


def _audioldm(
    checkpoint="embedded",
    *,
    steps=None,
    guidance_scale=None,
    eta=None,
    device=None,
    dtype="float32",
    clips_per_pass=1,
):
    from . import ldm

    precision = _torch_dtype(dtype)
    info = ldm.checkpoint_info(checkpoint)
    settings = {
        "steps": info["steps"] if steps is None else steps,
        "guidance_scale": info["guidance_scale"] if guidance_scale is None else guidance_scale,
        "eta": info["eta"] if eta is None else eta,
        "clips_per_pass": clips_per_pass,
        "dtype": dtype,
        "weights": ldm.checkpoint_digest(ldm.resolve(checkpoint)),
    }
    pipe = ldm.load_pipeline(checkpoint, device)
    if dtype != "float32":
        with _loading("AudioLDM", checkpoint):
            pipe.to(dtype=precision)
    rate = pipe.vocoder.config.sampling_rate

    def lengths(prompts):
        # CLAP's text tower pads every prompt to one length
        return [0] * len(prompts)

    return DiffusersBackend("audioldm", _short_name(checkpoint), rate, settings, pipe, lengths)


def _audioldm2(
    checkpoint="cvssp/audioldm2",
    *,
    steps=200,
    guidance_scale=3.5,
    eta=0.0,
    device=None,
    dtype="float32",
    clips_per_pass=1,
):
    import torch
    from diffusers import AudioLDM2Pipeline

    from . import ldm

    with _loading("AudioLDM 2", checkpoint):
        pipe = AudioLDM2Pipeline.from_pretrained(checkpoint, dtype=_torch_dtype(dtype))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "clips_per_pass": clips_per_pass,
        "dtype": dtype,
        "weights": ldm.checkpoint_digest(checkpoint),
    }
    rate = pipe.vocoder.config.sampling_rate

    def lengths(prompts):
        return [len(ids) for ids in pipe.tokenizer_2(prompts).input_ids]

    return DiffusersBackend("audioldm2", _short_name(checkpoint), rate, settings, pipe, lengths)


def _audiogen(
    checkpoint="facebook/audiogen-medium",
    *,
    guidance_scale=3.0,
    top_k=250,
    temperature=1.0,
    device=None,
    clips_per_pass=1,
):
    from . import ldm

    models = import_audiocraft().models
    with _loading("AudioGen", checkpoint):
        model = models.AudioGen.get_pretrained(str(checkpoint), device=device)
    settings = {
        "guidance_scale": guidance_scale,
        "top_k": top_k,
        "temperature": temperature,
        "clips_per_pass": clips_per_pass,
        # audiocraft decides: half precision on a GPU
        "dtype": "float32" if model.device.type == "cpu" else "float16",
        "weights": ldm.checkpoint_digest(checkpoint),
    }
    name = _short_name(checkpoint)
    return AudioGenBackend("audiogen", name, model.sample_rate, settings, model)


BACKENDS = {"audioldm": _audioldm, "audioldm2": _audioldm2, "audiogen": _audiogen}


def get_backend(name, **options):
    """Load a text-to-audio model.

    Parameters
    ----------
    name : {"audioldm", "audioldm2", "audiogen"}
        Which code runs it.
    **options
        ``checkpoint``: a folder or hub name; ``"embedded"`` for the model that comes along
        (default of ``audioldm``). ``device``: a torch device, else a GPU if there is one.
        ``guidance_scale``: weight of the prompt. ``clips_per_pass``: clips that share a pass (1;
        more is faster, on a GPU by far, and less exact). AudioLDM and AudioLDM 2: ``steps``,
        ``eta``, ``dtype`` (``"float32"``, ``"float16"``, ``"bfloat16"``). AudioGen: ``top_k``,
        ``temperature``. What is left out is the checkpoint's own note (AudioLDM) or the published
        setting.

    Returns
    -------
    TextToAudio

    Raises
    ------
    GenerationError
        If the name, an option or the checkpoint is unknown.

    Examples
    --------
    >>> backend = get_backend("audioldm", checkpoint="embedded", steps=2, device="cpu")
    >>> [clip.shape for clip in backend.generate(["a dog barking"], [0], 1.28)]
    [(20480,)]
    """
    if name not in BACKENDS:
        raise GenerationError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    known = inspect.signature(BACKENDS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise GenerationError(
            f"backend {name} has no option {', '.join(unknown)}: it takes {', '.join(known)}"
        )
    if options.get("clips_per_pass", 1) < 1:
        raise GenerationError("clips_per_pass must be at least 1")
    return BACKENDS[name](**options)


def import_audiocraft():
    """Import audiocraft without laion_clap, which asks the network for files when imported.

    audiocraft treats its absence as fine. A laion_clap that was imported before stays usable.

    Returns
    -------
    module

    Examples
    --------
    >>> import_audiocraft().__name__
    'audiocraft'
    """
    missing = object()
    before = sys.modules.get("laion_clap", missing)
    sys.modules["laion_clap"] = None
    try:
        import audiocraft
    finally:
        if before is missing:
            del sys.modules["laion_clap"]
        else:
            sys.modules["laion_clap"] = before
    return audiocraft


def clip_seed(dataset, label, prompt, index, seed=0):
    """Derive a clip's seed from what it is, not from where it stands in a list.

    Parameters
    ----------
    dataset, label, prompt : str
        What the clip is for.
    index : int or str
        Which of the clips of that prompt.
    seed : int
        Of the whole study; another one gives other clips throughout.

    Returns
    -------
    int
        0 to 2³² − 1, which is all that torch's generator on the CPU makes use of.

    Examples
    --------
    >>> clip_seed("embedded", "dog", "a dog barking", 1)
    1283765925
    """
    identity = json.dumps([str(dataset), str(label), str(prompt), str(index), int(seed)])
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")


def plan_clips(
    labels,
    n_per_class,
    family="simple",
    *,
    duration_s,
    dataset="embedded",
    negative_prompt="",
    seed=0,
):
    """Plan clips of every class: label × prompt family × index.

    Parameters
    ----------
    labels : list of str
        Classes.
    n_per_class : int
        Clips of each class in each family.
    family : str or list of str
        Prompt families, see `captions.prompts`.
    duration_s : float
        Seconds of each clip.
    dataset : str
        Part of each clip's identity.
    negative_prompt : str
        The same for all.
    seed : int
        See `clip_seed`.

    Returns
    -------
    pandas.DataFrame
        Columns ``clip_id, label, prompt, prompt_family, negative_prompt, seed, duration_s``. A clip
        is the same in a longer plan and in a shorter one.

    Examples
    --------
    >>> plan = plan_clips(["dog", "rain"], 2, duration_s=2.56)
    >>> plan.clip_id.tolist()
    ['dog-simple-0000', 'dog-simple-0001', 'rain-simple-0000', 'rain-simple-0001']
    """
    families = [family] if isinstance(family, str) else list(family)
    parts = [captions.prompts(list(labels), name, n=n_per_class, seed=seed) for name in families]
    plan = pd.concat(parts, ignore_index=True)
    index = plan.groupby(["label", "prompt_family"]).cumcount()
    plan["clip_id"] = [
        f"{row.label}-{row.prompt_family}-{number:04d}"
        for row, number in zip(plan.itertuples(), index, strict=True)
    ]
    plan["seed"] = [
        clip_seed(dataset, row.label, row.prompt, number, seed)
        for row, number in zip(plan.itertuples(), index, strict=True)
    ]
    plan["negative_prompt"] = negative_prompt
    plan["duration_s"] = float(duration_s)
    return plan[PLAN_COLUMNS]


def plan_captions(mixes, *, duration_s, seed=0):
    """Plan one clip for the caption of each mix.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Columns ``mix_id, foreground_label, caption`` are used.
    duration_s : float
        Seconds of each clip.
    seed : int
        See `clip_seed`.

    Returns
    -------
    pandas.DataFrame
        As from `plan_clips`; ``clip_id`` is the ``mix_id`` and ``prompt_family`` is ``"caption"``.

    Examples
    --------
    >>> mixes = pd.DataFrame(
    ...     {"mix_id": ["test-0"], "foreground_label": ["dog"], "caption": ["a dog in a park"]})
    >>> plan_captions(mixes, duration_s=2.56).prompt.item()
    'a dog in a park'
    """
    rows = [
        {
            "clip_id": mix.mix_id,
            "label": mix.foreground_label,
            "prompt": mix.caption,
            "prompt_family": "caption",
            "negative_prompt": "",
            "seed": clip_seed("mixes", mix.foreground_label, mix.caption, mix.mix_id, seed),
            "duration_s": float(duration_s),
        }
        for mix in mixes.itertuples()
    ]
    return pd.DataFrame(rows, columns=PLAN_COLUMNS)


def generate_clips(plan, backend, out_dir, batch_size=16, max_attempts=3):
    """Make the clips of a plan that are not there yet, and return the table of all of them.

    Each clip is written whole, with its peak at −1 dB of full scale, under a name that carries a
    digest of its recipe (prompt, seed, back-end, weights, settings): a clip made before under the
    same recipe is kept, one made otherwise is never overwritten. A line in ``manifest.jsonl``
    follows each file, so that an interrupted run goes on where it stopped. Several processes may
    each work on a part of the plan in one folder.

    An output that is not finite or stays below −60 dB is set aside, listed by `rejected_clips`, and
    made again with the next seed.

    Parameters
    ----------
    plan : pandas.DataFrame
        From `plan_clips`, or any table with its columns.
    backend : TextToAudio
        From `get_backend`, or one's own.
    out_dir : str or Path
        Folder for the clips and their manifest.
    batch_size : int
        Clips asked for in one call of the back-end; what is lost at most by an interruption. A
        multiple of the back-end's ``clips_per_pass`` wastes nothing.
    max_attempts : int
        Seeds tried for a clip.

    Returns
    -------
    pandas.DataFrame
        The `generated` table, in the plan's order: ``clip_id, label, prompt, prompt_family,
        negative_prompt, backend, checkpoint, seed, guidance_scale, steps, duration_s,
        sample_rate, path, lufs, score``. ``seed`` is the one that made the clip; ``lufs`` that of
        the written file; ``score`` is empty. Clips for which every attempt failed are missing,
        and a warning names them.

    Raises
    ------
    GenerationError
        If the plan is not one, no clip at all could be made, or the manifest cannot be written.
    AudioError
        If a clip cannot be written (disk full).

    Examples
    --------
    >>> import tempfile
    >>> backend = get_backend("audioldm", steps=2, device="cpu")
    >>> plan = plan_clips(["dog"], 1, duration_s=1.28)
    >>> generate_clips(plan, backend, tempfile.mkdtemp()).duration_s.item()
    1.28
    """
    _check_plan(plan, batch_size, max_attempts)
    out_dir = Path(out_dir)
    manifest = _read_manifest(out_dir)
    # a plan that was read from a file has NaN where a text was empty
    plan = plan[PLAN_COLUMNS].fillna({"negative_prompt": ""})
    pending, made = plan.to_dict("records"), {}
    for attempt in range(max_attempts):
        requests = [{**row, "seed": (row["seed"] + attempt) % 2**32} for row in pending]
        requests = [{**row, "recipe": _recipe(row, backend)} for row in requests]
        _make_missing(requests, backend, out_dir, manifest, batch_size)
        for row in requests:
            entry = manifest[row["clip_id"], row["recipe"]]
            if not entry["reason"]:
                made[row["clip_id"]] = {**entry, "path": str(out_dir / entry["path"])}
        pending = [row for row in pending if row["clip_id"] not in made]
        if not pending:
            break
    _report_failures(pending, plan, out_dir, max_attempts)
    rows = [made[clip_id] for clip_id in plan["clip_id"] if clip_id in made]
    generated = pd.DataFrame(rows, columns=GENERATED_COLUMNS)
    return generated.astype({"score": float, "guidance_scale": float, "steps": "Int64"})


def rejected_clips(out_dir):
    """List the outputs that were set aside in a folder.

    Parameters
    ----------
    out_dir : str or Path
        As given to `generate_clips`.

    Returns
    -------
    pandas.DataFrame
        ``clip_id, label, prompt, backend, checkpoint, seed, reason``; one row an output.

    Examples
    --------
    >>> import tempfile
    >>> len(rejected_clips(tempfile.mkdtemp()))
    0
    """
    rows = [entry for entry in _read_manifest(Path(out_dir)).values() if entry["reason"]]
    return pd.DataFrame(rows, columns=REJECTED_COLUMNS)


def _make_missing(requests, backend, out_dir, manifest, batch_size):
    from tqdm import tqdm

    missing = [row for row in requests if not _is_done(row, manifest, out_dir)]
    # a call has one duration
    missing.sort(key=lambda row: row["duration_s"])
    with tqdm(total=len(missing), unit="clip", desc=backend.checkpoint, disable=None) as bar:
        while missing:
            duration_s = missing[0]["duration_s"]
            batch = [row for row in missing[:batch_size] if row["duration_s"] == duration_s]
            try:
                _make_batch(batch, backend, out_dir, manifest)
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(
                    f"{len(requests) - len(missing)} of {len(requests)} clips are complete in "
                    f"{out_dir}; the same call goes on from there"
                )
                raise
            missing = missing[len(batch) :]
            bar.update(len(batch))


def _make_batch(batch, backend, out_dir, manifest):
    sounds = backend.generate(
        [row["prompt"] for row in batch],
        [row["seed"] for row in batch],
        batch[0]["duration_s"],
        [row["negative_prompt"] for row in batch],
    )
    for row, y in zip(batch, sounds, strict=True):
        entry = _describe(row, backend) | {"reason": _fault(y), "path": "", "bytes": 0}
        if not entry["reason"]:
            y = y * (PEAK / np.abs(y).max())
            name = f"{row['clip_id']}-{row['recipe']}.wav"
            path = audio.save_audio(out_dir / name, y, backend.sample_rate)
            loudness = audio.loudness(y, backend.sample_rate)
            entry |= {"path": name, "bytes": path.stat().st_size, "lufs": round(loudness, 2)}
        _append(out_dir / MANIFEST, entry)
        manifest[row["clip_id"], row["recipe"]] = entry


def _describe(row, backend):
    return {
        **row,
        "backend": backend.name,
        "checkpoint": backend.checkpoint,
        "sample_rate": backend.sample_rate,
        "guidance_scale": backend.settings.get("guidance_scale"),
        "steps": backend.settings.get("steps"),
    }


def _recipe(row, backend):
    what = [row[key] for key in ("prompt", "negative_prompt", "seed", "duration_s")]
    recipe = [*what, backend.name, backend.settings, backend.sample_rate, PEAK]
    # a user's own back-end may have no weights in its settings: its checkpoint stands for them
    recipe.append(None if backend.settings.get("weights") else backend.checkpoint)
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _is_done(row, manifest, out_dir):
    entry = manifest.get((row["clip_id"], row["recipe"]))
    if entry is None:
        return False
    path = out_dir / entry["path"]
    return bool(entry["reason"]) or (path.is_file() and path.stat().st_size == entry["bytes"])


def _fault(y):
    if not np.isfinite(y).all():
        return "not finite"
    # a constant offset makes no sound
    return "silent" if np.abs(y - y.mean()).max() < SILENT_PEAK else ""


def _read_manifest(out_dir):
    path = out_dir / MANIFEST
    entries = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short when the process was killed: that clip is made again
        entries[entry["clip_id"], entry["recipe"]] = entry
    return entries


def _append(path, entry):
    # one write to a file opened for appending: lines of several processes do not mix. The
    # leading line break ends a line that a killed process may have left unfinished.
    line = ("\n" + json.dumps(entry) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise GenerationError(
            f"{path}: cannot be written ({error}); free some space and call again to go on"
        ) from error


def _report_failures(pending, plan, out_dir, max_attempts):
    if not pending:
        return
    names = ", ".join(row["clip_id"] for row in pending[:5])
    message = (
        f"{len(pending)} of {len(plan)} clips were silent or not finite with each of "
        f"{max_attempts} seeds ({names}{', …' if len(pending) > 5 else ''}); "
        f"rejected_clips({str(out_dir)!r}) lists them"
    )
    if len(pending) == len(plan):
        raise GenerationError(f"{message}. Check the checkpoint, the prompts and the precision.")
    warnings.warn(message, stacklevel=3)


def _check_plan(plan, batch_size, max_attempts):
    absent = [column for column in PLAN_COLUMNS if column not in plan.columns]
    if absent:
        raise GenerationError(f"the plan lacks the columns {', '.join(absent)}; see plan_clips")
    if plan.empty:
        raise GenerationError("the plan has no rows: ask for at least one class and one clip")
    twice = plan["clip_id"][plan["clip_id"].duplicated()]
    if len(twice):
        raise GenerationError(f"clip_id {twice.iloc[0]!r} stands twice in the plan")
    bad = [name for name in plan["clip_id"] if Path(str(name)).name != str(name)]
    if bad:
        raise GenerationError(f"clip_id {bad[0]!r} is no file name: leave out slashes")
    if batch_size < 1 or max_attempts < 1:
        raise GenerationError("batch_size and max_attempts must be at least 1")


def _check_request(prompts, seeds, negative_prompts, duration_s):
    if not len(prompts) == len(seeds) == len(negative_prompts):
        raise GenerationError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negative_prompts)} negative "
            "prompts: give one of each for every clip"
        )
    if any(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts):
        raise GenerationError("a prompt is empty: say what should be heard")
    if not duration_s > 0:
        raise GenerationError(f"duration_s is {duration_s}: must be positive")


def _in_passes(rows, keys, size, one_pass):
    sounds = [None] * len(rows)
    for key in dict.fromkeys(keys):
        members = [i for i, own in enumerate(keys) if own == key]
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            filled = chosen + [chosen[-1]] * (size - len(chosen))
            made = one_pass([rows[i] for i in filled])
            for i, y in zip(chosen, made, strict=False):
                sounds[i] = y
    return sounds


@contextmanager
def _sample_by_row(seeds):
    """Let audiocraft draw the tokens of each row from that row's own generator."""
    import torch
    from audiocraft.utils import utils

    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def multinomial(probabilities, num_samples, **_):
        # dividing by exponential noise and taking the largest is one draw from a categorical
        # distribution, and the noise can come from the CPU whatever the device
        shape = probabilities.shape[1:]
        noise = torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators])
        return (probabilities / noise.to(probabilities)).argmax(-1, keepdim=True)

    original, utils.multinomial = utils.multinomial, multinomial
    try:
        yield
    finally:
        utils.multinomial = original


@contextmanager
def _loading(what, checkpoint):
    """No bars and notes while a model is opened; one clear error if it cannot be."""
    from . import ldm

    try:
        with ldm.quiet():
            yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise GenerationError(
            f"{checkpoint}: cannot be opened as an {what} checkpoint ({reason}). Check the name, "
            "and that the hub can be reached (HF_HUB_OFFLINE unset) or its files are in the cache."
        ) from error


def _torch_dtype(name):
    import torch

    known = ("float32", "float16", "bfloat16")
    if name not in known:
        raise GenerationError(f"unknown dtype {name!r}: choose one of {', '.join(known)}")
    return getattr(torch, name)


def _short_name(checkpoint):
    # a folder is called by its own name: tables should not depend on where a project lies
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else str(checkpoint)
