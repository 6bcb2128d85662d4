"""Text-to-audio models behind one protocol, and batches of clips that can be interrupted.

A clip is made by its own seed, in a pass through the model whose shape never depends on who else
is waiting. So it has the same bytes whether it is made alone, in a batch, in another order, in a
shard, or after an interruption: on one machine, with one number of threads and one set of options.
`check_invariance` tells whether that holds for a back-end on the machine at hand.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import re
import sys
import threading
import time
import traceback
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

PEAK = 10 ** (-1 / 20)  # clips are written with their peak at −1 dB of full scale, or below
SILENT_PEAK = 10 ** (-60 / 20)  # below this a model has made nothing that is worth amplifying
CLIPPED_RUN, CLIPPED_SHARE = 3, 0.001  # flat tops: their shortest run, their share of a clip
MANIFEST = "manifest.jsonl"

# What was published: the study with UrbanSound8K (A; audiocraft's loudness on writing is −14 LUFS)
# and the challenge system (B), whose best of three by CLAP needs three clips a prompt.
PRESETS = {
    "ronchini2024-audioldm2": {
        "backend": "audioldm2",
        "options": {
            "checkpoint": "cvssp/audioldm2",
            "dtype": "float16",
            "steps": 200,
            "guidance_scale": 3.5,
        },
        "duration_s": 4.0,
        "candidates": 1,
        "loudness": "peak",
    },
    "ronchini2024-audiogen": {
        "backend": "audiogen",
        "options": {
            "checkpoint": "facebook/audiogen-medium",
            "top_k": 250,
            "temperature": 1.0,
            "guidance_scale": 3.0,
        },
        "duration_s": 4.0,
        "candidates": 1,
        "loudness": -14.0,
    },
    "gaurav2024-audioldm": {
        "backend": "audioldm",
        "options": {
            "checkpoint": "cvssp/audioldm-s-full-v2",
            "steps": 200,
            "guidance_scale": 3.5,
            "eta": 0.0,
        },
        "duration_s": 4.0,
        "candidates": 3,
        "loudness": "peak",
    },
}
# clips of each class in UrbanSound8K, which A takes for 100 %
URBANSOUND8K_COUNTS = {
    "air_conditioner": 1000,
    "car_horn": 429,
    "children_playing": 1000,
    "dog_bark": 1000,
    "drilling": 1000,
    "engine_idling": 1000,
    "gun_shot": 374,
    "jackhammer": 1000,
    "siren": 929,
    "street_music": 1000,
}

_CC_NC_SA = "CC BY-NC-SA 4.0 (not commercial)"
_STABILITY = "Stability AI Community License (accept it on the hub; commercial use is limited)"
# name: back-end, licence, download in GB, million parameters in use, Hz, longest clip in s
_CHECKPOINTS = {
    "cvssp/audioldm-s-full-v2": ("audioldm", _CC_NC_SA, 1.7, 421, 16_000, None),
    "cvssp/audioldm-m-full": ("audioldm", _CC_NC_SA, 2.6, 652, 16_000, None),
    "cvssp/audioldm-l-full": ("audioldm", _CC_NC_SA, 3.9, 975, 16_000, None),
    "cvssp/audioldm2": ("audioldm2", _CC_NC_SA, 4.3, 1078, 16_000, None),
    "cvssp/audioldm2-large": ("audioldm2", _CC_NC_SA, 5.8, 1448, 16_000, None),
    "facebook/audiogen-medium": (
        "audiogen",
        "CC BY-NC 4.0 (not commercial)",
        6.9,
        2200,
        16_000,
        None,
    ),
    "stabilityai/stable-audio-open-1.0": ("stable-audio", _STABILITY, 5.3, 1324, 44_100, 47.5),
}
_HALF = ("float16", "bfloat16")
_clock = time.monotonic
# how pipelines of diffusers call the seconds wanted
_DURATION_ARGUMENTS = (
    "audio_length_in_s",
    "audio_end_in_s",
    "audio_duration_s",
    "audio_duration",
    "duration",
)
_SETTING_ARGUMENTS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "eta": "eta",
}


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
    """A text-to-audio pipeline of diffusers; made by `get_backend`.

    Clips run through the model in passes of exactly ``clips_per_pass``: the last pass is filled up
    with copies, and clips share a pass only if their prompts have the same length in tokens where
    that length reaches the sound (AudioLDM 2 pads to the longest). With the default of 1 a clip is
    bit by bit independent of its batch, order, shard and interruptions. With more, its place in the
    pass and their number may round it differently: with the tiny models of the tests by about 1e-5
    of full scale in float32, by less than 0.05 in half precision (0.014 at most was seen). Half
    precision is tested in float16 with AudioLDM and AudioLDM 2, in bfloat16 with AudioLDM, Stable
    Audio and auto. What a tiny AudioLDM 2 makes in bfloat16 on a CPU is set aside as faulty: give
    that model float16. AudioGen has no such choice: audiocraft takes float32 on a CPU and float16
    on a GPU.

    A pass that does not fit into memory is tried again with half the clips, and so are all that
    follow; what they make has the bytes of a run that asked for the smaller passes.

    Attributes
    ----------
    name, checkpoint, sample_rate, settings
        See `TextToAudio`.
    pipe : diffusers.DiffusionPipeline
        Loaded, on its device.
    token_lengths : callable
        From prompts to the lengths that keep them in separate passes.
    pass_limit : int or None
        Clips that fit into a pass, once memory has run out.

    Examples
    --------
    >>> get_backend("audioldm", checkpoint="builtin", steps=2, device="cpu").settings["steps"]
    2
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict
    pipe: object
    token_lengths: Callable
    pass_limit: int | None = None

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """Make one clip a prompt.

        Parameters
        ----------
        prompts, seeds, duration_s, negative_prompts
            See `TextToAudio.generate`. AudioLDM 2 cuts a negative prompt to the prompt's length.

        Returns
        -------
        list of np.ndarray, float32 [samples]
            The mean of the channels, where the model makes several.

        Raises
        ------
        GenerationError
            If the lists differ in length, a prompt is empty, the duration is not positive or too
            long for the model, it takes no negative prompt, or one clip does not fit into memory.
        """
        negative_prompts = negative_prompts or [""] * len(prompts)
        _check_request(prompts, seeds, negative_prompts, duration_s)
        takes = inspect.signature(self.pipe.__call__).parameters
        if any(negative_prompts) and "negative_prompt" not in takes:
            raise GenerationError(
                f"{self.checkpoint} takes no negative prompt: plan with negative_prompt=''"
            )
        rows = list(zip(prompts, seeds, negative_prompts, strict=True))
        keys = self.pass_keys(prompts, negative_prompts)
        return _in_passes(rows, keys, self, lambda r: self._one_pass(r, duration_s))

    def pass_keys(self, prompts, negative_prompts):
        """Tell which clips can share a pass: those of equal keys.

        Parameters
        ----------
        prompts, negative_prompts : list of str
            One a clip.

        Returns
        -------
        list of tuple
            One a clip; they can be sorted.
        """
        # a pass is with negative prompts or without: to Stable Audio, "" is not the same as none
        lengths = map(self.token_lengths, (prompts, negative_prompts))
        return list(zip(map(bool, negative_prompts), *lengths, strict=True))

    def _one_pass(self, rows, duration_s):
        import torch

        prompts, seeds, negative_prompts = map(list, zip(*rows, strict=True))
        takes = inspect.signature(self.pipe.__call__).parameters
        n_samples = round(duration_s * self.sample_rate)
        arguments = {
            theirs: self.settings[ours]
            for ours, theirs in _SETTING_ARGUMENTS.items()
            if theirs in takes and self.settings[ours] is not None
        }
        argument = next(name for name in _DURATION_ARGUMENTS if name in takes)
        # LongCat rounds down to whole latents
        spare = self.pipe.vae_scale_factor if argument == "audio_duration_s" else 0
        # half a sample more: the pipeline truncates where floating point falls short
        arguments[argument] = (n_samples + spare + 0.5) / self.sample_rate
        if any(negative_prompts):
            arguments["negative_prompt"] = negative_prompts
        try:
            sounds = self.pipe(
                prompts,
                # noise drawn on the CPU is the same on every device
                generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
                **arguments,
            ).audios
        except ValueError as error:
            raise GenerationError(
                f"{self.checkpoint}: its pipeline refuses {duration_s} s ({_first_line(error)})"
            ) from error
        sounds = torch.as_tensor(sounds).float().cpu().numpy()
        sounds = sounds.mean(axis=1) if sounds.ndim == 3 else sounds
        return [audio.fix_length(y, n_samples, "pad") for y in sounds]


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
    pass_limit : int or None
        Clips that fit into a pass, once memory has run out.

    Examples
    --------
    >>> backend = get_backend("audiogen", checkpoint="facebook/audiogen-medium")  # doctest: +SKIP
    """

    name: str
    checkpoint: str
    sample_rate: int
    settings: dict
    model: object
    pass_limit: int | None = None

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
            As for the other back-ends; a negative prompt is always one too many.
        """
        negative_prompts = negative_prompts or [""] * len(prompts)
        _check_request(prompts, seeds, negative_prompts, duration_s)
        if any(negative_prompts):
            raise GenerationError("audiogen takes no negative prompt: plan with negative_prompt=''")
        rows = list(zip(prompts, seeds, strict=True))
        keys = self.pass_keys(prompts)
        return _in_passes(rows, keys, self, lambda r: self._one_pass(r, duration_s))

    def pass_keys(self, prompts, negative_prompts=None):
        """Tell which clips can share a pass: those of prompts of one length in tokens.

        Parameters
        ----------
        prompts : list of str
            One a clip.
        negative_prompts : list of str, optional
            Without effect.

        Returns
        -------
        list of int
            One a clip.
        """
        conditioner = self.model.lm.condition_provider.conditioners["description"]
        lengths = {p: conditioner.tokenize([p])["attention_mask"].shape[1] for p in set(prompts)}
        return [lengths[p] for p in prompts]

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
        return [audio.fix_length(y, n_samples, "pad") for y in sounds]


def _audioldm(
    checkpoint="builtin",
    *,
    steps=None,
    guidance_scale=None,
    eta=None,
    device=None,
    dtype="float32",
    clips_per_pass=1,
    offload=None,
    compile=False,
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
    _before_loading(checkpoint, device, dtype, offload)
    with _loading("AudioLDM", checkpoint, device, dtype):
        pipe = ldm.load_pipeline(checkpoint, "cpu" if offload or dtype != "float32" else device)
        if dtype != "float32":
            pipe.to(dtype=precision)
        pipe = _placed(pipe, device, offload, compile)
    # CLAP's text tower pads every prompt to one length
    return _diffusers_backend("audioldm", checkpoint, settings, pipe, _one_length, compile)


def _audioldm2(
    checkpoint="cvssp/audioldm2",
    *,
    steps=200,
    guidance_scale=3.5,
    eta=0.0,
    device=None,
    dtype="float32",
    clips_per_pass=1,
    offload=None,
    compile=False,
):
    from diffusers import AudioLDM2Pipeline

    settings = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    settings |= _common_settings(checkpoint, dtype, clips_per_pass)
    pipe = _open(AudioLDM2Pipeline, "AudioLDM 2", checkpoint, device, dtype, offload, compile)

    def lengths(prompts):
        return [len(ids) for ids in pipe.tokenizer_2(prompts).input_ids]

    return _diffusers_backend("audioldm2", checkpoint, settings, pipe, lengths, compile)


def _stable_audio(
    checkpoint="stabilityai/stable-audio-open-1.0",
    *,
    steps=100,
    guidance_scale=7.0,
    device=None,
    dtype="float32",
    clips_per_pass=1,
    offload=None,
    compile=False,
):
    from diffusers import StableAudioPipeline

    settings = {"steps": steps, "guidance_scale": guidance_scale, "eta": None}
    settings |= _common_settings(checkpoint, dtype, clips_per_pass)
    pipe = _open(StableAudioPipeline, "Stable Audio", checkpoint, device, dtype, offload, compile)
    # every prompt is padded to the tokenizer's longest
    return _diffusers_backend("stable-audio", checkpoint, settings, pipe, _one_length, compile)


def _auto(
    checkpoint,
    *,
    steps=None,
    guidance_scale=None,
    eta=None,
    device=None,
    dtype="float32",
    clips_per_pass=1,
    offload=None,
    compile=False,
):
    from diffusers import DiffusionPipeline

    settings = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    settings |= _common_settings(checkpoint, dtype, clips_per_pass)
    pipe = _open(DiffusionPipeline, "text-to-audio", checkpoint, device, dtype, offload, compile)
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt" not in takes or not set(takes) & set(_DURATION_ARGUMENTS):
        raise GenerationError(
            f"{checkpoint}: {type(pipe).__name__} is no text-to-audio pipeline; it must take a "
            f"prompt and one of {', '.join(_DURATION_ARGUMENTS)}"
        )
    for ours, theirs in _SETTING_ARGUMENTS.items():
        if settings[ours] is None and theirs in takes:
            settings[ours] = takes[theirs].default
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer")]

    def lengths(prompts):
        ids = [tokenizer(prompts).input_ids for tokenizer in tokenizers]
        return [tuple(map(len, own)) for own in zip(*ids, strict=True)]

    return _diffusers_backend("auto", checkpoint, settings, pipe, lengths, compile)


def _common_settings(checkpoint, dtype, clips_per_pass):
    from . import ldm

    weights = ldm.checkpoint_digest(checkpoint)
    return {"clips_per_pass": clips_per_pass, "dtype": dtype, "weights": weights}


def _diffusers_backend(name, checkpoint, settings, pipe, lengths, compile):
    # compiled code rounds differently; what is not compiled keeps the recipe it always had
    settings |= {"compile": True} if compile else {}
    rate = _sample_rate(pipe)
    return DiffusersBackend(name, _short_name(checkpoint), rate, settings, pipe, lengths)


def _one_length(prompts):
    return [0] * len(prompts)


def _sample_rate(pipe):
    for part in (getattr(pipe, "vocoder", None), pipe, getattr(pipe, "vae", None)):
        # diffusers' parts warn of what is asked of them and stands in their config
        for owner in (getattr(part, "config", None), part):
            for name in ("sampling_rate", "sample_rate"):
                if getattr(owner, name, None):
                    return int(getattr(owner, name))
    raise GenerationError(f"{type(pipe).__name__} does not tell the sample rate of its sounds")


def _open(cls, what, checkpoint, device, dtype, offload, compile):
    from . import ldm

    precision = _torch_dtype(dtype)
    _before_loading(checkpoint, device, dtype, offload)
    with _loading(what, checkpoint, device, dtype), ldm.cosine_sampler():
        pipe = cls.from_pretrained(checkpoint, dtype=precision)
        pipe.set_progress_bar_config(disable=True)
        return _placed(pipe, device, offload, compile)


def _placed(pipe, device, offload, compile):
    import torch

    if compile:
        net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        net.to(memory_format=torch.channels_last)
        net.compile()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=_device(device))
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=_device(device))
    else:
        pipe.to(_device(device))
    return pipe


def _device(device):
    import torch

    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    # audiocraft decides: half precision on a GPU
    dtype = "float32" if _device(device) == "cpu" else "float16"
    _before_loading(checkpoint, device, dtype, None)
    with _loading("AudioGen", checkpoint, device, dtype):
        model = models.AudioGen.get_pretrained(str(checkpoint), device=device)
    settings = {
        "guidance_scale": guidance_scale,
        "top_k": top_k,
        "temperature": temperature,
        "clips_per_pass": clips_per_pass,
        "dtype": dtype,
        "weights": ldm.checkpoint_digest(checkpoint),
    }
    name = _short_name(checkpoint)
    return AudioGenBackend("audiogen", name, model.sample_rate, settings, model)


BACKENDS = {
    "audioldm": _audioldm,
    "audioldm2": _audioldm2,
    "audiogen": _audiogen,
    "stable-audio": _stable_audio,
    "auto": _auto,
}


def get_backend(name, **options):
    """Load a text-to-audio model.

    Licence and size of a checkpoint are said before it is downloaded, and what cannot fit into
    memory is refused before that.

    Parameters
    ----------
    name : {"audioldm", "audioldm2", "audiogen", "stable-audio", "auto"} or a key of `PRESETS`
        Which code runs it. ``"auto"`` opens any other text-to-audio pipeline of diffusers by the
        class that the checkpoint names, such as those that ``AutoPipelineForText2Audio`` knows. A
        preset is a back-end with published settings.
    **options
        ``checkpoint``: a folder or hub name; ``"builtin"`` for the model that comes along
        (default of ``audioldm``). ``device``: a torch device, else a GPU if there is one.
        ``guidance_scale``: weight of the prompt. ``clips_per_pass``: clips that share a pass (1;
        more is faster, on a GPU by far, and less exact). All but AudioGen: ``steps``, ``dtype``
        (``"float32"``, ``"float16"``, ``"bfloat16"``), ``offload`` (``"model"`` or
        ``"sequential"``: parts wait in main memory until the GPU needs them), ``compile``
        (compiled denoiser in channels-last layout). AudioLDM, AudioLDM 2, auto: ``eta``. AudioGen:
        ``top_k``, ``temperature``. What is left out is the preset's, else the checkpoint's own
        note (AudioLDM), else the published setting.

    Returns
    -------
    TextToAudio

    Raises
    ------
    GenerationError
        If the name, an option or the checkpoint is unknown, or memory does not suffice.

    Examples
    --------
    >>> backend = get_backend("audioldm", checkpoint="builtin", steps=2, device="cpu")
    >>> [clip.shape for clip in backend.generate(["a dog barking"], [0], 1.28)]
    [(20480,)]
    """
    if name in PRESETS:
        options = {**PRESETS[name]["options"], **options}
        name = PRESETS[name]["backend"]
    if name not in BACKENDS:
        known = ", ".join([*BACKENDS, *PRESETS])
        raise GenerationError(f"unknown backend {name!r}: choose one of {known}")
    known = inspect.signature(BACKENDS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise GenerationError(
            f"backend {name} has no option {', '.join(unknown)}: it takes {', '.join(known)}"
        )
    if name == "auto" and not options.get("checkpoint"):
        raise GenerationError("backend auto needs a checkpoint: a folder or a name on the hub")
    if options.get("clips_per_pass", 1) < 1:
        raise GenerationError("clips_per_pass must be at least 1")
    if options.get("offload") not in (None, "model", "sequential"):
        raise GenerationError("offload must be 'model' or 'sequential', or be left out")
    return BACKENDS[name](**options)


def preset(name, checkpoint="builtin", duration_s=2.56):
    """Tell what goes with a back-end or preset beside the options of `get_backend`.

    Parameters
    ----------
    name : str
        As for `get_backend`.
    checkpoint : str
        The default stands for what was left open: the built-in model for ``audioldm``, the
        published checkpoint for every other back-end, the preset's own for a preset.
    duration_s : float
        Seconds of a clip; the default, the length of the built-in model, stands for what was left
        open: the preset's, if it is one.

    Returns
    -------
    dict
        ``checkpoint, duration_s``; ``candidates``, clips made for each one that is kept;
        ``loudness``, as for `generate_clips`.

    Examples
    --------
    >>> preset("gaurav2024-audioldm")["checkpoint"], preset("gaurav2024-audioldm")["duration_s"]
    ('cvssp/audioldm-s-full-v2', 4.0)
    >>> preset("gaurav2024-audioldm", "mini", 5.0)
    {'checkpoint': 'mini', 'duration_s': 5.0, 'candidates': 3, 'loudness': 'peak'}
    """
    known = PRESETS.get(name, {"backend": name, "options": {}})
    if checkpoint == "builtin":
        opener = inspect.signature(BACKENDS.get(known["backend"], _audioldm))
        default = opener.parameters["checkpoint"].default
        # `auto` has none, and says so when it is opened
        default = "" if default is inspect.Parameter.empty else default
        checkpoint = known["options"].get("checkpoint", default)
    return {
        "checkpoint": checkpoint,
        "duration_s": known.get("duration_s", duration_s) if duration_s == 2.56 else duration_s,
        "candidates": known.get("candidates", 1),
        "loudness": known.get("loudness", "peak"),
    }


def known_checkpoints():
    """What is known of the public checkpoints before they are downloaded.

    Returns
    -------
    pandas.DataFrame
        ``checkpoint, backend, licence, download_gb, parameters_m`` (millions, of the parts that a
        generation needs), ``memory_gb`` and ``memory_gb_half`` (their weights in float32 and in
        half precision; a pass takes memory on top, more with more clips), ``sample_rate``,
        ``longest_s`` (NaN: no limit). Sizes are rounded.

    Examples
    --------
    >>> known_checkpoints().set_index("checkpoint").loc["cvssp/audioldm2", "licence"]
    'CC BY-NC-SA 4.0 (not commercial)'
    """
    columns = ["backend", "licence", "download_gb", "parameters_m", "sample_rate", "longest_s"]
    table = pd.DataFrame.from_dict(_CHECKPOINTS, orient="index", columns=columns)
    table["memory_gb"] = (table["parameters_m"] * 4 / 1000).round(1)
    table["memory_gb_half"] = (table["parameters_m"] * 2 / 1000).round(1)
    order = [*columns[:4], "memory_gb", "memory_gb_half", *columns[4:]]
    return table[order].rename_axis("checkpoint").reset_index()


def _before_loading(checkpoint, device, dtype, offload):
    """Say what a download brings, and refuse at once what memory cannot hold."""
    device = _device(device)
    if offload and device == "cpu":
        raise GenerationError(
            "offload lends parts to a GPU, and the device is the CPU: leave it out"
        )
    known = known_checkpoints().set_index("checkpoint")
    if str(checkpoint) in known.index:
        facts = known.loc[str(checkpoint)]
        need = facts["memory_gb_half" if dtype in _HALF else "memory_gb"]
        free = _free_gb("cpu" if offload else device)
        if need > free:
            raise GenerationError(
                f"{checkpoint}: its weights take {need} GB in {dtype}, and {free:.1f} GB are free "
                f"on {device}. {_remedy(device, dtype)}"
            )
        note = f"licence {facts.licence}, {facts.download_gb} GB to download, {need} GB in {dtype}"
    else:
        note = f"licence and size not known here, see https://huggingface.co/{checkpoint}"
    if not (checkpoint == "builtin" or Path(checkpoint).exists() or _is_cached(checkpoint)):
        print(f"{checkpoint}: {note}", file=sys.stderr)


def _free_gb(device):
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return psutil.virtual_memory().available / 1e9


def _is_cached(checkpoint):
    from huggingface_hub import try_to_load_from_cache

    files = ("model_index.json", "state_dict.bin")
    try:
        return any(isinstance(try_to_load_from_cache(str(checkpoint), n), str) for n in files)
    except ValueError:
        return True  # no name that a hub could have: nothing will be downloaded


def _remedy(device, dtype):
    remedies = [
        "clips_per_pass=1 and a smaller batch",
        "close other programs that use this memory",
        "choose a smaller checkpoint" if device == "cpu" else "offload='model' (all but AudioGen)",
    ]
    if dtype not in _HALF:
        remedies.insert(0, "dtype='float16' or 'bfloat16' halves it (all but AudioGen)")
    return f"Remedies: {'; '.join(remedies)}; shorter clips."


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
    >>> clip_seed("builtin", "dog", "a dog barking", 1)
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
    dataset="builtin",
    negative_prompt="",
    seed=0,
):
    """Plan clips of every class: label × prompt family × index.

    Parameters
    ----------
    labels : list of str
        Classes.
    n_per_class : int or dict
        Clips of each class in each family; a number for all or one for each, see `class_counts`.
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

    Raises
    ------
    GenerationError
        If a class has no number.

    Examples
    --------
    >>> plan = plan_clips(["dog", "rain"], 2, duration_s=2.56)
    >>> plan.clip_id.tolist()
    ['dog-simple-0000', 'dog-simple-0001', 'rain-simple-0000', 'rain-simple-0001']
    """
    labels = list(labels)
    families = [family] if isinstance(family, str) else list(family)
    counts = n_per_class if hasattr(n_per_class, "keys") else dict.fromkeys(labels, n_per_class)
    without = [label for label in labels if label not in counts]
    if without:
        raise GenerationError(f"n_per_class has no number for the class {without[0]!r}")
    most = max([counts[label] for label in labels], default=0)
    parts = [captions.prompts(labels, name, n=most, seed=seed) for name in families]
    plan = pd.concat(parts, ignore_index=True)
    index = plan.groupby(["label", "prompt_family"]).cumcount()
    wanted = index < plan["label"].map(dict(counts))
    plan, index = plan[wanted].reset_index(drop=True), index[wanted]
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


def class_counts(source, percent=100):
    """Count the clips that each class of a synthetic set should have.

    Parameters
    ----------
    source : pandas.DataFrame or dict or "ronchini2024"
        A table of real clips (column ``label``); numbers of one's own; or UrbanSound8K's, which
        Ronchini et al. generate at 100 %: 1000 a class, but siren 929, car_horn 429, gun_shot 374.
    percent : float
        Of these numbers, such as 100, 200, 300, 400; rounded, at least one clip a class.

    Returns
    -------
    dict
        Class to number, for ``plan_clips(list(counts), counts, …)``.

    Raises
    ------
    GenerationError
        If the source is unknown or empty, or the percentage not positive.

    Examples
    --------
    >>> class_counts("ronchini2024", 200)["siren"]
    1858
    >>> class_counts(pd.DataFrame({"label": ["dog", "dog", "rain"]}), 300)
    {'dog': 6, 'rain': 3}
    """
    if isinstance(source, pd.DataFrame):
        source = source["label"].value_counts(sort=False).sort_index().to_dict()
    elif source == "ronchini2024":
        source = URBANSOUND8K_COUNTS
    if not isinstance(source, dict) or not source:
        raise GenerationError("counts come from a table of clips, a dict, or 'ronchini2024'")
    if not percent > 0:
        raise GenerationError(f"percent is {percent}: must be positive")
    return {label: max(1, round(number * percent / 100)) for label, number in source.items()}


def read_counts(text, clips, n):
    """Read how many clips each class should have from a line of a profile or a command.

    Parameters
    ----------
    text : str
        ``"200%"`` of the clips there are, ``"ronchini2024"``, ``"ronchini2024 400%"``; empty
        for `n` clips each.
    clips : pandas.DataFrame
        Real clips; of it the column ``label`` is used.
    n : int
        Clips of each class where the text is empty.

    Returns
    -------
    dict
        Class to number, for the classes of `clips`: for `plan_clips`.

    Raises
    ------
    GenerationError
        If the text says none of these, or a class of `clips` has no number.

    Examples
    --------
    >>> clips = pd.DataFrame({"label": ["siren", "siren", "gun_shot"]})
    >>> read_counts("300%", clips, 10)
    {'gun_shot': 3, 'siren': 6}
    >>> read_counts("ronchini2024", clips, 10)["siren"], read_counts("", clips, 10)["siren"]
    (929, 10)
    """
    labels = sorted(clips["label"].unique())
    if not text:
        return dict.fromkeys(labels, n)
    found = re.fullmatch(r"(ronchini2024)?\s*(?:(\d+(?:\.\d+)?)\s*%)?", text.strip())
    if not found:
        raise GenerationError(
            f"counts is {text!r}: give '200%' of the real clips, 'ronchini2024', "
            "'ronchini2024 400%', or leave it empty"
        )
    counts = class_counts(found[1] or clips, float(found[2] or 100))
    without = [label for label in labels if label not in counts]
    if without:
        raise GenerationError(f"counts {text!r} has no number for the class {without[0]!r}")
    return {label: counts[label] for label in labels}


def plan_captions(mixes, *, duration_s, seed=0):
    """Plan one clip for the caption of each mix.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Columns ``clip_id, label, caption`` are used.
    duration_s : float
        Seconds of each clip.
    seed : int
        See `clip_seed`.

    Returns
    -------
    pandas.DataFrame
        As from `plan_clips`; ``clip_id`` is the ``clip_id`` and ``prompt_family`` is ``"caption"``.

    Examples
    --------
    >>> mixes = pd.DataFrame(
    ...     {"clip_id": ["test-0"], "label": ["dog"], "caption": ["a dog in a park"]})
    >>> plan_captions(mixes, duration_s=2.56).prompt.item()
    'a dog in a park'
    """
    rows = [
        {
            "clip_id": mix.clip_id,
            "label": mix.label,
            "prompt": mix.caption,
            "prompt_family": "caption",
            "negative_prompt": "",
            "seed": clip_seed("mixes", mix.label, mix.caption, mix.clip_id, seed),
            "duration_s": float(duration_s),
        }
        for mix in mixes.itertuples()
    ]
    return pd.DataFrame(rows, columns=PLAN_COLUMNS)


def generate_clips(
    plan, backend, out_dir, batch_size=None, max_attempts=3, *, loudness="peak", shard=None
):
    """Make the clips of a plan that are not there yet, and return the table of all of them.

    Each clip is written whole, under a name that carries a digest of its recipe (prompt, seed,
    back-end, weights, settings): a clip made before under the same recipe is kept, one made
    otherwise is never overwritten. A line in ``manifest.jsonl`` follows each file, so that an
    interrupted run goes on where it stopped. Several processes may each work on a part of the plan
    in one folder.

    An output that is not finite, stays below −60 dB or is clipped is set aside, listed by
    `rejected_clips`, and made again with the next seed.

    Parameters
    ----------
    plan : pandas.DataFrame
        From `plan_clips`, or any table with its columns.
    backend : TextToAudio
        From `get_backend`, or one's own.
    out_dir : str or Path
        Folder for the clips and their manifest.
    batch_size : int, optional
        Clips asked for in one call of the back-end at most, and lost at most by an interruption;
        by default 16, or eight passes of the back-end's ``clips_per_pass`` where that is more.
        Clips that can share a pass (a back-end's ``pass_keys``, where it has them) are called for
        together, so that a multiple of ``clips_per_pass`` leaves no more than one pass of each kind
        to be filled up with copies.
    max_attempts : int
        Seeds tried for a clip.
    loudness : "peak", "none" or float
        Level of the files: peak at −1 dB of full scale; the model's own; or so many LUFS
        (ITU-R BS.1770), less where the peak would pass −1 dB. The manifest keeps the gain.
    shard : str, optional
        "i/n", i from 1 to n: every n-th row of the plan, from the i-th. All n together, in one or
        in many machines and in any order, make the same files as one call without.

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
        If the plan is not one, an option is unknown, no clip at all could be made, or the manifest
        cannot be written.
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
    _check_plan(plan, batch_size, max_attempts, loudness)
    out_dir = Path(out_dir)
    # a plan that was read from a file has NaN where a text was empty
    plan = _part(plan, shard)[PLAN_COLUMNS].fillna({"negative_prompt": ""})
    manifest = _read_manifest(out_dir)
    pending, made = plan.to_dict("records"), {}
    for attempt in range(max_attempts):
        requests = [{**row, "seed": (row["seed"] + attempt) % 2**32} for row in pending]
        requests = [{**row, "recipe": _recipe(row, backend, loudness)} for row in requests]
        size = batch_size or 8 * max(2, backend.settings.get("clips_per_pass", 1))
        _make_missing(requests, backend, out_dir, manifest, size, loudness)
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


def generate_with_workers(
    plan, name, out_dir, *, options=None, workers=2, runner="loky", threads=1, **how
):
    """Make the clips of a plan in several processes, of this machine or of a Dask cluster.

    Parameters
    ----------
    plan : pandas.DataFrame
        As for `generate_clips`.
    name : str
        As for `get_backend`; every process loads the model for itself, once.
    out_dir : str or Path
        As for `generate_clips`. The workers of a cluster must see it, and the checkpoint, under the
        same path.
    options : dict, optional
        As for `get_backend`.
    workers : int
        Processes at once, and parts of the plan; a Dask cluster uses all that it has, up to so
        many.
    runner : {"loky", "dask"}
        Who runs them, through joblib: processes of this machine, or the Dask cluster of the
        ``distributed.Client`` that exists. Threads of one Dask worker take turns at its model.
    threads : int
        Of torch, in each process. The bytes are those of one process with as many.
    **how
        ``batch_size, max_attempts, loudness`` as for `generate_clips`.

    Returns
    -------
    pandas.DataFrame
        As from `generate_clips`.

    Raises
    ------
    GenerationError
        As `generate_clips`, of any part; also for an unknown runner, a number below 1, or if there
        is no Dask client. The other parts are made first and stay.

    Examples
    --------
    >>> import tempfile
    >>> plan = plan_clips(["dog"], 2, duration_s=1.28)
    >>> options = {"steps": 1, "device": "cpu"}
    >>> table = generate_with_workers(
    ...     plan, "audioldm", tempfile.mkdtemp(), options=options, workers=1)
    >>> table.clip_id.tolist()
    ['dog-simple-0000', 'dog-simple-0001']
    """
    import joblib

    if runner not in ("loky", "dask"):
        raise GenerationError(f"unknown runner {runner!r}: choose loky or dask")
    if workers < 1 or threads < 1:
        raise GenerationError("workers and threads must be at least 1")
    if runner == "dask":
        _require_dask_client()
    _check_plan(plan, **_batch_options(how))
    parts = [plan[i::workers] for i in range(min(workers, len(plan)))]
    tasks = [
        joblib.delayed(_make_part)(part, name, options, out_dir, how, threads) for part in parts
    ]
    with joblib.parallel_config(backend=runner):
        done = joblib.Parallel(workers, batch_size=1)(tasks)
    return _joined(done, plan)


def generate_on_gpus(plan, name, out_dir, *, options=None, **how):
    """Make the clips of a plan on all GPUs that ``accelerate launch`` has started a process for.

    Called in each of the processes; each takes its part (accelerate's ``split_between_processes``)
    to its own device. In a single process it is `generate_clips`.

    Parameters
    ----------
    plan, out_dir
        As for `generate_clips`.
    name : str
        As for `get_backend`.
    options : dict, optional
        As for `get_backend`; ``device`` is each process's own.
    **how
        ``batch_size, max_attempts, loudness`` as for `generate_clips`.

    Returns
    -------
    pandas.DataFrame
        As from `generate_clips`: the whole, in every process.

    Raises
    ------
    GenerationError
        As `generate_clips`, of any part. The other parts are made first and stay.

    Examples
    --------
    >>> import tempfile
    >>> plan = plan_clips(["dog"], 1, duration_s=1.28)
    >>> len(generate_on_gpus(plan, "audioldm", tempfile.mkdtemp(), options={"steps": 1}))
    1
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    # where there is no GPU, processes find each other only if told so
    state = PartialState(cpu=not torch.accelerator.is_available())
    _check_plan(plan, **_batch_options(how))
    with state.split_between_processes(list(range(len(plan)))) as mine:
        part = plan.iloc[list(mine)]
    own = {**(options or {}), "device": str(state.device)}
    done = [_make_part(part, name, own, out_dir, how)] if len(part) else []
    return _joined(gather_object(done) if state.num_processes > 1 else done, plan)


def check_invariance(backend, prompts=None, duration_s=0.5, clips_per_pass=4):
    """Compare a back-end's clips with themselves under every way of sharing out the work.

    Parameters
    ----------
    backend : TextToAudio
        As from `get_backend`.
    prompts : list of str, optional
        At least three; by default five of different lengths, two of them alike.
    duration_s : float
        Of each clip, s.
    clips_per_pass : int
        Size of the larger passes that are compared too, where the back-end has such a setting.

    Returns
    -------
    pandas.DataFrame
        ``backend, dtype, change, same_bytes, max_difference`` (of full scale; against each clip
        made alone, and for shard and resume between the files of a whole run and of the other).

    Examples
    --------
    >>> backend = get_backend("audioldm", steps=1, device="cpu")
    >>> table = check_invariance(backend, ["a dog", "rain", "a dog"], duration_s=0.64)
    >>> bool(table[table.change != "passes of 4"].same_bytes.all())
    True
    """
    prompts = prompts or ["a dog", "a dog barking loudly", "rain", "a dog", "a distant siren"]
    seeds = list(range(1, len(prompts) + 1))
    alone = [backend.generate([p], [s], duration_s)[0] for p, s in zip(prompts, seeds, strict=True)]
    found = {
        f"batch of {len(prompts)}": (alone, backend.generate(prompts, seeds, duration_s)),
        "other order": (alone, backend.generate(prompts[::-1], seeds[::-1], duration_s)[::-1]),
    }
    found |= _files_compared(backend, prompts, seeds, duration_s)
    usual = backend.settings.get("clips_per_pass")
    if usual:
        backend.settings["clips_per_pass"] = clips_per_pass
        try:
            larger = backend.generate(prompts, seeds, duration_s)
        finally:
            backend.settings["clips_per_pass"] = usual
        found[f"passes of {clips_per_pass}"] = (alone, larger)
    rows = [
        {
            "backend": backend.name,
            "dtype": backend.settings.get("dtype"),
            "change": change,
            "same_bytes": all(map(np.array_equal, one, other)),
            "max_difference": max(
                float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)
            ),
        }
        for change, (one, other) in found.items()
    ]
    return pd.DataFrame(rows)


class _Interrupted:
    """A back-end that is stopped by hand after some calls."""

    def __init__(self, backend, calls):
        self.backend, self.calls = backend, calls

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def generate(self, *request):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        return self.backend.generate(*request)


def _files_compared(backend, prompts, seeds, duration_s):
    import tempfile

    plan = pd.DataFrame({"prompt": prompts, "seed": seeds})
    plan = plan.assign(
        clip_id=[f"clip-{seed}" for seed in seeds],
        label="any",
        prompt_family="any",
        negative_prompt="",
        duration_s=duration_s,
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, shards, resumed = (Path(folder) / name for name in ("whole", "shards", "resumed"))
        generate_clips(plan, backend, whole)
        for shard in ("2/2", "1/2"):
            generate_clips(plan, backend, shards, batch_size=2, shard=shard)
        with contextlib.suppress(KeyboardInterrupt):
            generate_clips(plan, _Interrupted(backend, 1), resumed, batch_size=2)
        generate_clips(plan, backend, resumed, batch_size=1)
        read = {path: _clips_in(path) for path in (whole, shards, resumed)}
    return {
        "two shards": (read[whole], read[shards]),
        "interrupted and resumed": (read[whole], read[resumed]),
    }


def _clips_in(folder):
    return [audio.load_audio(path)[0] for path in sorted(folder.glob("*.wav"))]


# a model is stepped through by one thread at a time: samplers count their steps, and AudioGen's
# draw is put into audiocraft itself
_MODEL_IN_USE = threading.Lock()


def _make_part(part, name, options, out_dir, how, threads=None):
    """Make a part of a plan in this process; return its table, and what went wrong."""
    import torch

    with _MODEL_IN_USE:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            backend = _loaded(name, json.dumps(options or {}, sort_keys=True, default=str))
            return generate_clips(part, backend, out_dir, **how), None
        except (ValueError, OSError) as error:
            return None, str(error)
        except Exception:
            # whatever it is: processes that gather their parts would wait for this one for ever
            return None, f"a part failed:\n{traceback.format_exc()}"
        finally:
            torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _loaded(name, options):
    return get_backend(name, **json.loads(options))


def _joined(done, plan):
    problems = [problem for _, problem in done if problem]
    if problems:
        raise GenerationError(problems[0])
    table = pd.concat([table for table, _ in done]).set_index("clip_id", drop=False)
    present = [clip_id for clip_id in plan["clip_id"] if clip_id in table.index]
    return table.loc[present].reset_index(drop=True)


def _batch_options(how):
    usual = {"batch_size": None, "max_attempts": 3, "loudness": "peak"}
    unknown = sorted(set(how) - set(usual))
    if unknown:
        raise GenerationError(f"unknown option {unknown[0]}: there are {', '.join(usual)}")
    return usual | how


def _require_dask_client():
    try:
        from distributed import get_client
    except ImportError as error:
        raise GenerationError(
            "runner 'dask' needs the package distributed: pip install 'soundscapes-utils[cluster]'"
        ) from error
    try:
        get_client()
    except ValueError as error:
        raise GenerationError(
            "runner 'dask' finds no client; make one first, such as distributed.Client(address)"
        ) from error


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


def _make_missing(requests, backend, out_dir, manifest, batch_size, loudness):
    missing = [row for row in requests if not _is_done(row, manifest, out_dir)]
    _remove_halves(missing, out_dir)
    left = len(missing)
    with _progress(left, backend.checkpoint) as advance:
        for batch in _calls(missing, backend, batch_size):
            try:
                _make_batch(batch, backend, out_dir, manifest, loudness)
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(
                    f"{len(requests) - left} of {len(requests)} clips are complete in "
                    f"{out_dir}; the same call goes on from there"
                )
                raise
            left -= len(batch)
            advance(len(batch))


def _calls(rows, backend, batch_size):
    """Cut rows into calls of one duration whose clips can share their passes."""
    durations, kinds = [row["duration_s"] for row in rows], [0] * len(rows)
    if hasattr(backend, "pass_keys") and backend.settings.get("clips_per_pass", 1) > 1:
        texts = ([row[key] for row in rows] for key in ("prompt", "negative_prompt"))
        kinds = backend.pass_keys(*texts)
    groups = {}
    for key, row in zip(zip(durations, kinds, strict=True), rows, strict=True):
        groups.setdefault(key, []).append(row)
    for key in sorted(groups):
        for start in range(0, len(groups[key]), batch_size):
            yield groups[key][start : start + batch_size]


@contextmanager
def _progress(total, name):
    """A bar on a terminal; in notebooks and logs a line a minute."""
    from tqdm import tqdm

    done, begin = 0, _clock()
    said = begin

    def advance(n):
        nonlocal done, said
        done += n
        bar.update(n)
        now = _clock()
        if bar.disable and now - said >= 60:
            said, rate = now, done / (now - begin)
            left = round((total - done) / rate / 60)
            print(
                f"{name}: {done} of {total} clips, {rate:.2f} clips/s, {left} min left", flush=True
            )

    with tqdm(total=total, unit="clip", desc=name, disable=None) as bar:
        yield advance


def _remove_halves(missing, out_dir):
    # .<name>.<process>.part is what save_audio calls a file that is not finished
    own = {_file_name(row) for row in missing}
    for part in out_dir.glob(".*.wav.*.part"):
        if part.name[1:].rsplit(".", 2)[0] in own:
            part.unlink(missing_ok=True)


def _file_name(row):
    return f"{row['clip_id']}-{row['recipe']}.wav"


def _make_batch(batch, backend, out_dir, manifest, loudness):
    sounds = backend.generate(
        [row["prompt"] for row in batch],
        [row["seed"] for row in batch],
        batch[0]["duration_s"],
        [row["negative_prompt"] for row in batch],
    )
    for row, y in zip(batch, sounds, strict=True):
        reason = _fault(y) or _unfit(y, backend.sample_rate, loudness)
        entry = _describe(row, backend) | {"reason": reason, "path": "", "bytes": 0}
        if not reason:
            y, gain = _levelled(y, backend.sample_rate, loudness)
            path = audio.save_audio(out_dir / _file_name(row), y, backend.sample_rate)
            lufs = audio.loudness(y, backend.sample_rate)
            entry |= {"path": path.name, "bytes": path.stat().st_size, "lufs": round(lufs, 2)}
            entry |= {"loudness": loudness, "gain_db": round(20 * math.log10(gain), 2)}
        _append(out_dir, entry)
        manifest[row["clip_id"], row["recipe"]] = entry


def _levelled(y, rate, loudness):
    highest = PEAK / np.abs(y).max()
    if loudness == "none":
        return y, 1.0
    if loudness == "peak":
        return y * highest, float(highest)
    gain = min(float(highest), 10 ** ((loudness - audio.loudness(y, rate)) / 20))
    return y * np.float32(gain), gain


def _unfit(y, rate, loudness):
    if loudness == "none":
        return "beyond full scale" if np.abs(y).max() > 1 else ""
    if loudness == "peak":
        return ""
    return "" if math.isfinite(audio.loudness(y, rate)) else "below -70 LUFS"


def _describe(row, backend):
    return {
        **row,
        "backend": backend.name,
        "checkpoint": backend.checkpoint,
        "sample_rate": backend.sample_rate,
        "guidance_scale": backend.settings.get("guidance_scale"),
        "steps": backend.settings.get("steps"),
    }


def _recipe(row, backend, loudness):
    what = [row[key] for key in ("prompt", "negative_prompt", "seed", "duration_s")]
    recipe = [*what, backend.name, backend.settings, backend.sample_rate, PEAK]
    # a user's own back-end may have no weights in its settings: its checkpoint stands for them
    recipe.append(None if backend.settings.get("weights") else backend.checkpoint)
    # the usual level stays out, so that clips of older versions are known
    recipe += [] if loudness == "peak" else [loudness]
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
    if np.abs(y - y.mean()).max() < SILENT_PEAK:
        return "silent"
    return "clipped" if _flat_share(y) > CLIPPED_SHARE else ""


def _flat_share(y):
    """Share of the samples that stand in a row at exactly the highest or the lowest value."""
    share, peak = 0.0, np.abs(y).max()
    # silence is the lowest value of a sound that only goes up, and no flat top
    for extreme in [value for value in (y.max(), y.min()) if abs(value) > peak / 2]:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], y == extreme, [False]])))
        runs = edges[1::2] - edges[::2]
        share += runs[runs >= CLIPPED_RUN].sum() / y.size
    return share


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


def _append(out_dir, entry):
    from filelock import FileLock

    path = out_dir / MANIFEST
    # the leading line break ends a line that a killed process may have left unfinished
    line = ("\n" + json.dumps(entry) + "\n").encode()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        # appended lines of several processes mix on file systems that machines share
        with FileLock(out_dir / f".{MANIFEST}.lock"), path.open("ab", buffering=0) as manifest:
            manifest.write(line)
    except OSError as error:
        raise GenerationError(
            f"{path}: cannot be written ({error}); free some space and call again to go on"
        ) from error


def _report_failures(pending, plan, out_dir, max_attempts):
    if not pending:
        return
    names = ", ".join(row["clip_id"] for row in pending[:5])
    message = (
        f"{len(pending)} of {len(plan)} clips were silent, clipped or not finite with each of "
        f"{max_attempts} seeds ({names}{', …' if len(pending) > 5 else ''}); "
        f"rejected_clips({str(out_dir)!r}) lists them"
    )
    if len(pending) == len(plan):
        raise GenerationError(f"{message}. Check the checkpoint, the prompts and the precision.")
    warnings.warn(message, stacklevel=3)


def _part(plan, shard):
    if shard is None:
        return plan
    number, _, total = str(shard).partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise GenerationError(f"shard {shard!r}: give 'i/n' with i from 1 to n, such as '1/4'")
    # every n-th, so that a family or class of longer clips is shared out
    return plan.iloc[int(number) - 1 :: int(total)]


def _check_plan(plan, batch_size, max_attempts, loudness):
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
    if (batch_size is not None and batch_size < 1) or max_attempts < 1:
        raise GenerationError("batch_size and max_attempts must be at least 1")
    if loudness not in ("peak", "none") and not _is_level(loudness):
        raise GenerationError(
            f"loudness is {loudness!r}: give 'peak', 'none', or LUFS from -70 to 0, such as -23.0"
        )


def _is_level(loudness):
    return isinstance(loudness, int | float) and -70 < loudness <= 0


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


def _in_passes(rows, keys, backend, one_pass):
    sounds = [None] * len(rows)
    for key in dict.fromkeys(keys):
        waiting = [i for i, own in enumerate(keys) if own == key]
        while waiting:
            size = backend.settings["clips_per_pass"]
            size = min(size, backend.pass_limit or size)
            chosen = waiting[:size]
            filled = chosen + [chosen[-1]] * (size - len(chosen))
            made = _unless_memory_runs_out(one_pass, [rows[i] for i in filled])
            if made is None:
                backend.pass_limit = _half(size, backend)
                continue
            for i, y in zip(chosen, made, strict=False):
                sounds[i] = y
            waiting = waiting[size:]
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


def _unless_memory_runs_out(make, *arguments):
    try:
        return make(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    # only here are the tensors of the failed pass no longer held by the exception
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
    return None


def _out_of_memory(error):
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    # these two libraries say it in words of their own
    return any(sign in str(error) for sign in ("CUFFT_ALLOC", "cuFFT error", "STATUS_ALLOC_FAILED"))


def _half(size, backend):
    dtype = backend.settings["dtype"]
    device = str(getattr(getattr(backend, "pipe", None), "device", None) or "the device")
    if size == 1:
        raise GenerationError(
            f"{backend.checkpoint}: memory of {device} does not suffice for one clip. "
            f"{_remedy(device, dtype)}"
        )
    warnings.warn(
        f"{backend.checkpoint}: out of memory with {size} clips in a pass; going on with "
        f"{size // 2}. From here on the clips are those of clips_per_pass={size // 2}.",
        stacklevel=2,
    )
    return size // 2


@contextmanager
def _loading(what, checkpoint, device, dtype):
    """No bars and notes while a model is opened; one clear error if it cannot be."""
    from . import ldm

    try:
        with ldm.quiet():
            yield
    except ldm.CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise GenerationError(
            f"{checkpoint}: cannot be opened as an {what} checkpoint ({_first_line(error)}). Check "
            "the name, that its licence is accepted on the hub where it asks for that, and that "
            "the hub can be reached (HF_HUB_OFFLINE unset) or its files are in the cache."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise GenerationError(
            f"{checkpoint}: memory does not suffice to load it. {_remedy(_device(device), dtype)}"
        ) from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
