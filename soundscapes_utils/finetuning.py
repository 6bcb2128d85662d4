"""The trainer: AudioLDM's U-Net on the latents of captioned sounds, under the CLAP condition.

Latents and embeddings are computed once and cached, so that the loop sees only the U-Net. What is
drawn at a step (clips, noise, timesteps, dropped conditions) follows from the seed and the number of
the step alone: a run that was killed continues the sequence it would have had, and several processes
share the batch that one would have drawn.

From the command line, on one device or on several::

    python -m soundscapes_utils finetune config.yaml -p steps 2000
    accelerate launch -m soundscapes_utils.finetuning config.yaml
    accelerate launch --multi_gpu --num_processes 2 -m soundscapes_utils.finetuning config.yaml

(the last also on CPUs, where ``--cpu`` would start one process only); from a notebook or a script
`launch` does the same. The settings of the baseline trainer, with caches and a larger batch::

    checkpoint: cvssp/audioldm-s-full-v2
    dataset_root: mixes/metadata/dataset_root.json
    out_dir: models/audioldm-scenes
    steps: 52000
    batch_size: 32
    warmup_steps: 2000
    ema_decay: 0.9999
    segment_s: 10.24
    loudest_of: 1
    text_condition_probability: 0.0
    val_every: 1000
    sample_epochs: 5
    precision: bf16
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from . import audio, ldm, metadata, store

# clips whose latents share a file of the cache; a killed run loses at most these
_SHARD = 64
# samples that are generated at once; more gain little and need the memory of a training step
_CLIPS_A_PASS = 8
# share of the KL divergence in the loss of the autoencoder, for each value of the log-mel
_KL_WEIGHT = 1e-3
# clips of the validation split that samples are scored against: more gain little and take long
_REFERENCE_CLIPS = 512
_SHARED_DISK = "out_dir and cache_dir must lie on a disk that all machines share"
# a validation loss of so many times that of the start is no training any more
_DIVERGED = 10.0
_CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "train": ("full", "attention", "lora"),
    "vae": ("keep", "decoder", "all"),
    "prediction_type": ("", "epsilon", "v_prediction", "sample"),
}
# what says where things lie, what is told about them or how memory is saved, and not what is trained:
# a run goes on when these change
_PLACES = (
    *("out_dir", "dataset_root", "checkpoint", "cache_dir"),
    *("wandb_project", "keep_states", "data_licence"),
    *("accumulate", "gradient_checkpointing"),
)

_NO_LICENCE = "see its own page"

# Gaurav et al., DCASE 2024 Challenge, task 7, table 1
REPORTED = pd.DataFrame(
    {
        "metric": "FAD",
        "candidate": [
            "report: AudioLDM",
            "report: fine-tuned, development set",
            "report: fine-tuned, external set",
        ],
        "score": ["61.28", "28.18", "31.58"],
    }
)


class TrainingError(RuntimeError):
    """Training that cannot start or go on."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What `finetune` is to do.

    Parameters
    ----------
    checkpoint : str
        Where to start: ``"builtin"``, a diffusers AudioLDM folder or a hub name.
    dataset_root : str
        ``dataset_root.json`` of an AudioCaps-format set (see `metadata.write_audiocaps`, and
        `captioned_set` for a table of sounds and captions).
    out_dir : str
        Becomes a diffusers folder; beside it lie the curves and samples (``<name>.logs``), the
        resumable states (``<name>.states``) and the cache.
    steps, batch_size : int
        Optimiser steps, and segments in each, over all processes and accumulated parts.
    accumulate : int
        Parts in which a process works through its share of a batch; more parts need less memory.
    learning_rate : float
        Peak rate of AdamW.
    warmup_steps : int
        Steps of linear warm-up.
    decay_start : float
        Fraction of the steps after which the rate falls to zero on a cosine; 1 keeps it constant, as
        the baseline trainer does.
    max_grad_norm : float
        The norm to which gradients are clipped.
    ema_decay : float
        Of the exponential moving average of the weights, which is what is saved.
    train : str
        ``"full"``: all weights of the U-Net; ``"attention"``: those of its attention layers;
        ``"lora"``: low-rank adapters of these, merged into the weights that are saved.
    lora_rank : int
        Rank of the adapters.
    precision : str
        ``"fp32"``, or ``"bf16"`` or ``"fp16"`` for autocast; weights stay float32.
    gradient_checkpointing : bool
        Compute activations twice instead of keeping them: less memory, about a third slower.
    prediction_type : str
        What the U-Net is trained to predict: ``"epsilon"``, ``"v_prediction"``, ``"sample"``;
        empty: as the checkpoint says.
    snr_gamma : float
        Above 0: min-SNR weighting of the loss with this gamma (5 in its paper); 0: see Notes of
        `finetune`.
    vae : str
        ``"keep"``; or train the autoencoder first: its ``"decoder"``, which leaves the latent as it
        is, or ``"all"`` of it, after which the U-Net has a new latent to learn. A `PatchVAE` is
        fitted in closed form.
    vae_steps : int
        Steps of that, in batches of ``batch_size``.
    vae_learning_rate : float
        Rate of its AdamW.
    text_condition_probability : float
        How often the condition is the caption's text embedding, not the audio embedding. 0 is the
        way of AudioLDM, whose CLAP was trained on hundreds of thousands of pairs. The small CLAP of
        the built-in checkpoint leaves a wide gap between texts and sounds, and wants 0.5.
    condition_dropout : float
        How often the condition is that of the empty text, for classifier-free guidance.
    segment_s : float
        Length of a training segment, seconds; rounded to what the U-Net can halve.
    segments_per_clip : int
        Segments cached for each clip, each the loudest of ``loudest_of`` random positions; one for a
        clip that is no longer than a segment.
    loudest_of : int
        1 draws segments uniformly.
    val_every : int
        Steps between validations and saved states.
    val_segments, test_segments : int
        At most so many segments, each at its own fixed timestep and noise. The test loss is only
        written down: no decision looks at it. 0 test segments leave the test split alone.
    keep_best : bool
        Save the averaged weights of the lowest validation loss (default), or the last ones.
    patience : int
        Stop after so many validations without a lower loss of the averaged weights; 0 never stops.
    sample_epochs : float
        Generate samples every so many passes over the training segments (5 in the report); 0 never.
    n_samples : int
        Captions of the validation split that are asked for, each always with the same seed.
    sample_prompts : sequence of str
        Prompts to ask for instead.
    sample_embeddings : sequence of str
        Embeddings in which samples are scored against the validation clips (FAD and KAD);
        ``name=path`` where the weights are elsewhere than `embeddings.get_embedding` looks.
    keep_states : int
        Latest saved states to keep while training.
    wandb_project : str
        Also log there (Weights & Biases; ``WANDB_MODE=offline`` needs no account); empty: do not.
    cache_dir : str
        Where latents and embeddings are kept, for runs that share them; empty: beside ``out_dir``.
    data_licence : str
        Of the training data, for the model card.
    seed : int
        For everything that is drawn.
    info : dict
        Entries for the checkpoint's note, such as ``training_dataset`` and ``training_folds``.
    """

    checkpoint: str
    dataset_root: str
    out_dir: str
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_start: float = 1.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    train: str = "full"
    lora_rank: int = 8
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    prediction_type: str = ""
    snr_gamma: float = 0.0
    vae: str = "keep"
    vae_steps: int = 1000
    vae_learning_rate: float = 1e-5
    text_condition_probability: float = 0.0
    condition_dropout: float = 0.1
    segment_s: float = 2.56
    segments_per_clip: int = 2
    loudest_of: int = 4
    val_every: int = 50
    val_segments: int = 64
    test_segments: int = 64
    keep_best: bool = True
    patience: int = 0
    sample_epochs: float = 0.0
    n_samples: int = 16
    sample_prompts: tuple = ()
    sample_embeddings: tuple = ("logmel-stats",)
    keep_states: int = 2
    wandb_project: str = ""
    cache_dir: str = ""
    data_licence: str = ""
    seed: int = 0
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    Parameters
    ----------
    checkpoint : Path
        Diffusers folder that ``AudioLDMPipeline.from_pretrained`` opens.
    log : pandas.DataFrame
        One row a validation: ``step``; ``train_loss``, ``train_simple`` (without the weights of
        the timesteps) and ``train_vlb``, means since the row before; ``val_loss`` of the raw and
        ``val_loss_ema`` of the averaged weights, likewise ``val_simple_ema``, ``val_vlb_ema``,
        ``test_loss``, ``test_loss_ema``; ``val_audio_ema``, ``val_loss_ema`` under the sounds'
        embeddings instead of the captions'; ``val_loss_t1`` to ``val_loss_t4``, the
        averaged weights' loss in the four quarters of the timesteps, from clean to noisy;
        ``learning_rate``; ``grad_norm`` before clipping; ``seconds`` and ``samples_per_s`` of
        the steps.
    best_step : int
        Of the lowest validation loss of the averaged weights.
    scores : pandas.DataFrame
        FAD and KAD of the samples, with floors (see `fad.score_table`), and their ``step``; the
        weights that are kept have theirs.
    """

    checkpoint: Path
    log: pd.DataFrame
    best_step: int
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)


def finetune(config):
    """Train the U-Net of a checkpoint on captioned sounds; resume where a killed run stopped.

    Parameters
    ----------
    config : FinetuneConfig
        The same configuration and data continue or return what is there; others start anew.

    Returns
    -------
    FinetuneResult
        The averaged weights in diffusers' format, with a model card; log and scores.

    Raises
    ------
    TrainingError
        If the configuration is wrong, the set has no training or validation clips, the loss is no
        longer finite or diverges, or the memory does not suffice; the message names the remedy and
        the last good state.
    ldm.CheckpointError
        If the checkpoint cannot be opened.

    Notes
    -----
    The objective is L(θ) of AudioLDM (arXiv 2301.12503, eq. 4) for checkpoints that predict the
    noise or the velocity (arXiv 2202.00512); one that predicts the latent itself
    (``prediction_type="sample"``) is weighted by its SNR clamped to [0.25, 4]. With ``snr_gamma``
    any of them is weighted as in min-SNR (arXiv 2303.09556).

    Under ``accelerate launch`` every process works on its part of the batch that one process would
    have drawn: the loss does not depend on their number.

    Examples
    --------
    >>> config = FinetuneConfig("builtin", "set/dataset_root.json", "out", steps=100)
    >>> finetune(config).log.tail(1)  # doctest: +SKIP
    """
    _check(config)
    out_dir = Path(config.out_dir)
    clips = _read_clips(config)
    key = _run_key(config, clips)
    done, team = _finished(out_dir, key), _team()
    _agree(team, done is not None)
    if done:
        return done
    _check_shares(config, team)
    states = _beside(out_dir, "states") / key
    with _memory_advice(config, team, states):
        pipe = ldm.load_pipeline(config.checkpoint, str(team.device))
        if config.vae != "keep":
            _train_vae(pipe, clips, config, team)
        cache = prepare(pipe, clips, config, _cache_dir(config), team)
        run = _Run(pipe, cache, clips, config, team, states)
        run.restore(key)
        _agree(team, run.step)
        run.train(key)
    if team.is_main_process:
        run.keep()
        _save_result(pipe, run, clips, config, key)
        shutil.rmtree(_beside(out_dir, "states"), ignore_errors=True)
    team.wait_for_everyone()
    return _finished(out_dir, key)


def launch(config, processes=1):
    """Fine-tune in several processes, as `accelerate launch` would: from a notebook or a script.

    Parameters
    ----------
    config : FinetuneConfig
        As for `finetune`.
    processes : int
        1: `finetune`, in this process; more: as many new ones, a GPU each, or all on the CPU. What
        they say is printed; their configuration lies in ``<out_dir>.logs/config.yaml``.

    Returns
    -------
    FinetuneResult
        As `finetune`: the loss does not depend on the number of processes.

    Raises
    ------
    TrainingError
        Fewer than one process, more than there are GPUs, or an error in one of them.
    ldm.CheckpointError
        If the checkpoint cannot be opened.

    Examples
    --------
    >>> config = FinetuneConfig("builtin", "set/dataset_root.json", "out", steps=100)
    >>> launch(config, processes=2).best_step  # doctest: +SKIP
    """
    if processes == 1:
        return finetune(config)
    gpus = torch.cuda.device_count()
    if processes < 1 or 0 < gpus < processes:
        raise TrainingError(
            f"processes must be at least 1, and with GPUs one each ({gpus} here); got {processes}"
        )
    _check(config)
    out_dir, key = Path(config.out_dir), _run_key(config, _read_clips(config))
    done = _finished(out_dir, key)
    if done:
        return done
    file = write_config(config, _beside(out_dir, "logs") / "config.yaml")
    status, lines = _spoken(_launch_command(file, processes), _launch_environment(processes))
    if status:
        told = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        raise TrainingError(f"{processes} processes ended with status {status}: {' '.join(told)}")
    return _finished(out_dir, key)


def _launch_command(file, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # with --cpu accelerate starts one process only; the trainer itself sees that there is no GPU
    words = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    words = ["accelerate.commands.launch", *words, "-m", "soundscapes_utils.finetuning"]
    return [sys.executable, "-m", *words, str(file)]


def _launch_environment(processes):
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    ours = {"OMP_NUM_THREADS": threads} | os.environ
    return ours | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _spoken(command, environment):
    """Run a command, print what it says as it says it, and give back its status and last lines."""
    lines = deque(maxlen=200)
    with subprocess.Popen(
        command,
        env=environment,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.strip())
        except BaseException:
            process.terminate()  # an interrupted notebook leaves no training behind
            raise
    return process.returncode, list(lines)


def _beside(out_dir, what):
    return Path(out_dir).with_name(f"{Path(out_dir).name}.{what}")


def _team():
    """Tell what `accelerate launch` has started; one process by default."""
    from accelerate import PartialState

    # samples and validations keep the others waiting for longer than the usual ten minutes
    waits = {"timeout": timedelta(hours=6)}
    return PartialState(cpu=not torch.cuda.is_available(), **waits)


def _agree(team, found):
    """Refuse to go on where the processes see different files."""
    if team.num_processes == 1:
        return
    all_found = [None] * team.num_processes
    torch.distributed.all_gather_object(all_found, found)
    if len(set(all_found)) > 1:
        raise TrainingError(f"the processes find different states of this run: {_SHARED_DISK}")


def _check(config):
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise TrainingError(f"{name} must be one of {known}; got {getattr(config, name)!r}")
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "val_every": 1, "keep_states": 1}
    least |= {"segments_per_clip": 1, "loudest_of": 1, "val_segments": 1, "lora_rank": 1}
    least |= {"vae_steps": 1, "learning_rate": 0, "warmup_steps": 0, "segment_s": 0, "patience": 0}
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise TrainingError(f"{name} must be at least {bound}; got {getattr(config, name)}")
    for name in ("text_condition_probability", "condition_dropout", "ema_decay", "decay_start"):
        if not 0 <= getattr(config, name) <= 1:
            raise TrainingError(f"{name} must be from 0 to 1; got {getattr(config, name)}")
    if not config.max_grad_norm > 0:
        raise TrainingError(
            f"max_grad_norm must be above 0, or nothing is trained; got {config.max_grad_norm}. To "
            "clip nothing, give a large number"
        )
    if config.sample_epochs and config.n_samples < 2 and len(config.sample_prompts) < 2:
        raise TrainingError("a score needs two samples or more: raise n_samples")


def _check_shares(config, team):
    parts = team.num_processes * config.accumulate
    if config.batch_size % parts:
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be shared by {team.num_processes} processes "
            f"in {config.accumulate} parts each; make it a multiple of {parts}"
        )


@contextmanager
def _memory_advice(config, team, states):
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not _out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory with parts of {_part_size(config, team)} segments of "
            f"{config.segment_s:g} s in {config.precision} ({str(error).splitlines()[0][:120]}). "
            f"Raise accumulate (now {config.accumulate}) or set gradient_checkpointing: the run goes "
            "on. Or start anew with precision='bf16', train='lora', or a smaller batch_size or "
            f"segment_s. {_last(states)}"
        ) from error


def _part_size(config, team):
    return config.batch_size // (config.accumulate * team.num_processes)


def _out_of_memory(error):
    # on a full card FFT and BLAS fail in their own words
    signs = ("out of memory", "can't allocate memory", "CUFFT", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _last(states):
    files = sorted(states.glob("*.safetensors"))
    if not files:
        return "No state had been saved."
    return f"The last good state is {files[-1]}; the same command goes on from it."


def _calmer(config):
    # the rate belongs to what identifies a run, so no state can go on with another one
    return (
        "It will meet the same batches again, which helps after a fault of the machine only. "
        f"Otherwise give a lower learning_rate (now {config.learning_rate:g}) or max_grad_norm (now "
        f"{config.max_grad_norm:g}): that is another run, which starts at step 0."
    )


def _splits(config):
    return ("train", "val", "test") if config.test_segments else ("train", "val")


def _read_clips(config):
    clips = metadata.read_audiocaps(config.dataset_root)
    for split in ("train", "val"):
        if not (clips["split"] == split).any():
            raise TrainingError(
                f"{config.dataset_root}: no clips in its split {split!r}; fine-tuning needs train and "
                "val (see metadata.write_audiocaps)"
            )
    return clips[clips["split"].isin(_splits(config))].reset_index(drop=True)


def _run_key(config, clips):
    """Identity of a run: its settings without places, its sounds by content, its checkpoint."""
    digest = hashlib.sha256()
    settings = asdict(config)
    for place in _PLACES:
        settings.pop(place)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(ldm.checkpoint_digest(ldm.resolve(config.checkpoint)).encode())
    captions = clips[["split", *_caption_columns(clips)]].fillna("")
    digest.update(captions.to_csv(index=False).encode())
    for path in clips["path"]:
        digest.update(_content(path))
    return digest.hexdigest()[:16]


def _content(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}); metadata.validate lists all such clips"
        ) from error


def _finished(out_dir, key):
    note = out_dir / "training.json"
    if not note.is_file():
        return None
    told = json.loads(note.read_text())
    if told["key"] != key:
        return None
    scores = pd.DataFrame(told.get("scores", []))
    return FinetuneResult(out_dir, pd.DataFrame(told["log"]), told["best_step"], scores)


def _save_result(pipe, run, clips, config, key):
    info = {**ldm.checkpoint_info(config.checkpoint), **config.info}
    # a published tower that came from the hub is found there again
    comes_along = (Path(ldm.resolve(config.checkpoint)) / "audio_encoder").is_dir()
    own_tower = ldm.load_audio_tower(str(config.checkpoint))[0] if comes_along else None
    training = {"key": key, "best_step": run.best_step, "config": asdict(config), "log": run.log}
    training["scores"] = run.scores
    for place in ("out_dir", "dataset_root", "cache_dir"):
        training["config"][place] = Path(training["config"][place]).name
    training["config"]["checkpoint"] = _base(config.checkpoint)
    pipe.unet.eval()
    texts = {
        "training.json": json.dumps(training),
        ldm.CARD_FILE: _card(info, run, clips, config),
    }
    ldm.save_checkpoint(pipe, config.out_dir, info, own_tower, extra=texts)


def _card(info, run, clips, config):
    """Write the model card: data, licence, steps, scores with floors."""
    base, licence = _base(config.checkpoint), _licence(config.checkpoint)
    kept = next(row for row in run.log if row["step"] == run.kept[1])
    told = "\n".join(f"- {name}: {n} clips" for name, n in clips["split"].value_counts().items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-audio
base_model: {base}
license: {_licence_name(licence)}
---

# {Path(config.out_dir).name}

A latent diffusion model in the layout of AudioLDM, fine-tuned from `{base}`
(licence of its weights: {licence}) with `soundscapes_utils.finetuning`.

## Data

{info["training_dataset"]}; licence: {config.data_licence or "not stated"}.

{told}

## Training

- {_what(config)}, {run.step} steps of {config.batch_size} segments of {config.segment_s:g} s,
  {config.precision}, learning rate {config.learning_rate:g}, seed {config.seed}; the weights are the
  moving average (decay {config.ema_decay:g}) of step {kept["step"]}.
- Loss: squared error of the prediction ({run.scheduler.config.prediction_type}), {_weighting(run)}.
- Autoencoder: {_vae_told(config)}.
- Condition: text embeddings in {config.text_condition_probability:.0%}, audio embeddings otherwise;
  dropped in {config.condition_dropout:.0%}.
- Validation loss (fixed noise and timesteps): {run.log[0]["val_loss_ema"]:.4f} before,
  {kept["val_loss_ema"]:.4f} at step {kept["step"]}.
- Test loss: {_or_none(run.log[0], "test_loss_ema")} before, {_or_none(kept, "test_loss_ema")} at
  step {kept["step"]}; it took no part in any choice.

## Scores

{_score_lines([row for row in run.scores if row["step"] == kept["step"]])}

## Use

Sampling: {info["clip_s"]} s, {info["steps"]} DDIM steps, guidance {info["guidance_scale"]}, eta
{info["eta"]}.

```python
from soundscapes_utils import generation

model = generation.get_backend("audioldm", checkpoint="{Path(config.out_dir).name}")
```
"""


def _what(config):
    if config.train == "lora":
        return f"Low-rank adapters (rank {config.lora_rank}) of the attention, merged"
    return {"full": "The whole U-Net", "attention": "The attention of the U-Net"}[config.train]


def _weighting(run):
    if run.config.snr_gamma:
        return f"min-SNR weights with gamma {run.config.snr_gamma:g}"
    kind = run.scheduler.config.prediction_type
    return "weighted by the SNR clamped to [0.25, 4]" if kind == "sample" else "unweighted"


def _vae_told(config):
    if config.vae == "keep":
        return "as in the checkpoint"
    part = {"decoder": "its decoder", "all": "all of it"}[config.vae]
    return (
        f"{part} trained first, {config.vae_steps} steps at a rate of {config.vae_learning_rate:g} "
        "(a linear one is fitted in closed form)"
    )


def _base(checkpoint):
    """Name a checkpoint without a place of this machine; a hub name as a whole."""
    at_the_hub = checkpoint != "builtin" and not Path(checkpoint).exists()
    return checkpoint if at_the_hub else Path(checkpoint).name


def _or_none(row, name):
    return f"{row[name]:.4f}" if row.get(name) is not None else "not taken"


def _licence(checkpoint):
    """Find the licence of the checkpoint that training starts from: in its card, or as known."""
    from . import generation

    known = generation.known_checkpoints().set_index("checkpoint")["licence"]
    if str(checkpoint) in known.index:
        return known[str(checkpoint)]
    card = Path(ldm.resolve(checkpoint)) / ldm.CARD_FILE
    if card.is_file():
        for line in card.read_text().splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return _NO_LICENCE


def _licence_name(licence):
    # as the hub spells them
    return licence.split(" (")[0].lower().replace(" ", "-") if licence != _NO_LICENCE else "unknown"


def note_scores(checkpoint, scores):
    r"""Put scores into a model card, in place of what stands under its "Scores".

    Parameters
    ----------
    checkpoint : str or Path
        Folder that `finetune` has made.
    scores : pandas.DataFrame
        From `fad.score_table`, with the floors; or several of them concatenated.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    TrainingError
        A folder without such a card.

    Examples
    --------
    >>> import tempfile
    >>> from soundscapes_utils import fad
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "README.md").write_text("# Model\n\n## Scores\n\nNone yet.\n\n## Use\n")
    >>> real, ours = np.random.default_rng(0).normal(size=(2, 40, 4))
    >>> scores = fad.score_table(real, {"ours": ours}, embedding="toy")
    >>> note_scores(folder, scores).read_text().count("- FAD in toy, ours against real (n 40 / 40)")
    1
    """
    card = Path(checkpoint) / ldm.CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head, title, rest = text.partition("## Scores\n")
    if not title:
        raise TrainingError(f"{card}: no model card with a part '## Scores'; finetune writes one")
    tail = re.search(r"^## .*", rest, re.M | re.S)
    lines = _score_lines(scores.to_dict("records"))
    text = f"{head}{title}\n{lines}\n\n{tail[0] if tail else ''}"
    store.write_atomic(card, text.encode())
    return card


def _score_lines(scores):
    from . import fad

    if not scores:
        return "No samples were scored."
    rows = fad.beside_floor(pd.DataFrame(scores))
    lines = [
        f"- {r.metric} in {r.embedding}, {r.candidate} against {r.reference} (n {r.n}): {r.score}; "
        f"floor, real against real (n {r.floor_n}): {r.floor}"
        for r in rows.itertuples()
    ]
    return "\n".join(lines)


# --- data -------------------------------------------------------------------------------------


def captioned_set(csv_file, out_dir, name="sounds", audio_dir=None, shares=(0.8, 0.1, 0.1)):
    """Turn a table of sounds and captions into an AudioCaps-format set.

    Parameters
    ----------
    csv_file : str or Path
        One row a sound: ``path`` (also ``file``, ``filename``, ``file_name``, ``wav``) and
        ``caption``; if there are any, ``caption_2``, … , ``label``, ``split`` (train, val, test) and
        ``source`` (what must not lie in two splits).
    out_dir : str or Path
        Gets ``dataset_root.json`` and what it names; and ``set_aside.csv``, the rows that cannot be
        used, with the reason.
    name : str
        Of the set.
    audio_dir : str or Path, optional
        What relative paths are relative to; by default the folder of the table.
    shares : sequence of float
        Of train, val and test, where the table has no ``split``: each source is assigned by the
        digest of its name, so that it stays where it is when others come. If none falls to train
        or to val, the one that comes nearest is moved there.

    Returns
    -------
    Path
        ``dataset_root.json``, which `metadata.validate` has found nothing wrong with.

    Raises
    ------
    TrainingError
        No such columns, a source in two splits, an unknown split, or a split without clips.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(9):
    ...     _ = audio.save_audio(folder / f"{i}.wav", np.sin(np.arange(16_000) / (i + 2)), 16_000)
    >>> rows = [(f"{i}.wav", "a tone", s) for i, s in enumerate(["train", "val", "test"] * 3)]
    >>> table = pd.DataFrame(rows, columns=["path", "caption", "split"])
    >>> table.to_csv(folder / "sounds.csv", index=False)
    >>> root = captioned_set(folder / "sounds.csv", folder / "set")
    >>> len(metadata.read_audiocaps(root))
    9
    """
    csv_file, out_dir = Path(csv_file), Path(out_dir)
    rows = _csv_rows(csv_file)
    folder = Path(audio_dir) if audio_dir else csv_file.parent
    rows["path"] = [str(folder / str(path)) for path in rows["path"]]
    rows["problem"] = _problems(rows)
    aside = rows[rows["problem"] != ""]
    rows = _with_splits(rows[rows["problem"] == ""].drop(columns="problem"), csv_file, shares)
    root = metadata.write_audiocaps(rows, out_dir, name)
    store.write_atomic(out_dir / "set_aside.csv", aside.to_csv(index=False).encode())
    if len(aside):
        shown = "; ".join(f"{r.path}: {r.problem}" for r in aside.head(3).itertuples())
        warnings.warn(
            f"{len(aside)} of {len(aside) + len(rows)} rows set aside ({shown}); all are in "
            f"{out_dir / 'set_aside.csv'}",
            stacklevel=2,
        )
    faults = metadata.validate(root, full=False)
    if len(faults):
        raise TrainingError(f"{root}: {faults.iloc[0].path}: {faults.iloc[0].problem}")
    return root


def _csv_rows(csv_file):
    try:
        rows = pd.read_csv(csv_file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{csv_file}: cannot be read as a CSV table ({error})") from error
    names = [n for n in ("path", "file", "filename", "file_name", "wav") if n in rows.columns]
    if not names or "caption" not in rows.columns:
        raise TrainingError(
            f"{csv_file}: has columns {', '.join(rows.columns)}; path and caption are needed"
        )
    rows = rows.rename(columns={names[0]: "path"})
    return rows.assign(
        label=rows.get("label", pd.Series("sound", rows.index)).replace("", "sound"),
        scene="",
        source=rows.get("source", rows["path"]),
    )


def _problems(rows):
    told = []
    repeated = rows["path"].duplicated()
    for row, again in zip(rows.to_dict("records"), repeated, strict=True):
        problem = "is named a second time" if again else ""
        if not row["caption"].strip():
            problem = "has no caption"
        try:
            audio.check_audio(audio.load_audio(row["path"])[0], row["path"])
        except audio.AudioError as error:
            problem = str(error).removeprefix(f"{row['path']}: ")
        told.append(problem)
    return told


def _with_splits(rows, csv_file, shares):
    if "split" not in rows.columns:
        rows = rows.assign(split=rows["source"].map(_hashed_splits(rows["source"], shares)))
    unknown = set(rows["split"]) - {"train", "val", "test"}
    missing = {"train", "val"} - set(rows["split"])
    shared = rows.groupby("source")["split"].nunique()
    if unknown or missing:
        raise TrainingError(
            f"{csv_file}: splits are train, val and test, and the first two must have clips; "
            f"unknown: {sorted(unknown) or 'none'}, without clips: {sorted(missing) or 'none'}"
        )
    if (shared > 1).any():
        names = ", ".join(shared.index[shared > 1][:5])
        raise TrainingError(f"{csv_file}: sources in more than one split: {names}")
    return rows


def _hashed_splits(sources, shares):
    # a place in [0, 1) for each source, which does not depend on the other sources
    digests = {
        source: hashlib.sha256(source.encode()).hexdigest() for source in sorted(set(sources))
    }
    places = pd.Series({s: int(d[:12], 16) / 16**12 for s, d in digests.items()}, dtype=float)
    ends = np.cumsum([0.0, *shares]) / np.sum(shares)
    names = np.array(["train", "val", "test"])
    splits = pd.Series(names[np.searchsorted(ends[1:3], places, side="right")], places.index)
    for name, low, high in zip(names[:2], ends, ends[1:], strict=False):
        others = splits.groupby(splits).transform("size") > (splits != "test")
        if not (splits == name).any() and others.any():
            away = np.maximum(low - places, places - high)
            splits[away[others].idxmin()] = name
    return splits


def _caption_columns(clips):
    return [name for name in clips.columns if name.startswith("caption")]


def load_data(pipe, config):
    """Read the data of a configuration as the loop sees it, from the cache if it is there.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Of the configuration's checkpoint.
    config : FinetuneConfig
        Gives set, segments and cache.

    Returns
    -------
    dict of str to dict of torch.Tensor
        As `prepare`.

    Raises
    ------
    TrainingError
        If the set has no training or validation clips.
    """
    return prepare(pipe, _read_clips(config), config, _cache_dir(config))


def _cache_dir(config):
    return Path(config.cache_dir) if config.cache_dir else _beside(config.out_dir, "cache")


def prepare(pipe, clips, config, cache_dir, team=None):
    """Compute, or read from the cache, all that the loop needs: latents and embeddings.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives VAE and text tower.
    clips : pandas.DataFrame
        ``split, path, caption, caption_2, …``.
    config : FinetuneConfig
        Gives segment length, number and seed, and the checkpoint of the audio tower.
    cache_dir : Path
        Gets files of up to 64 clips each, named by the content that they were made from: a run that
        was killed here computes only what is missing.
    team : accelerate.PartialState, optional
        The processes that share the work; by default this one does it all.

    Returns
    -------
    dict of str to dict of torch.Tensor
        For ``"train"``, ``"val"`` and, if there is one, ``"test"``: ``latents`` [segments, channels,
        time, mel], ``audio`` [segments, dim], ``clip`` [segments], ``text`` [clips, captions, dim]
        (zero where a clip has fewer captions), ``n_text`` [clips]; and ``empty`` [1, dim].
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    settings = [config.segment_s, config.segments_per_clip, config.loudest_of, config.seed]
    prefix = f"{ldm.checkpoint_digest(ldm.resolve(config.checkpoint))}{settings}"
    if config.vae != "keep":
        prefix += _weights_digest(pipe.vae)
    files = {}
    for split in _splits(config):
        rows = clips[clips["split"] == split].reset_index(drop=True)
        if rows.empty:
            continue
        starts = range(0, len(rows), _SHARD)
        shards = [(rows.iloc[start : start + _SHARD], start) for start in starts]
        files[split] = [cache_dir / _shard_name(split, shard, prefix) for shard in shards]
        _write_missing(pipe, config, shards, files[split], team)
        files[split].append(cache_dir / _text_name(split, rows, prefix))
        if not files[split][-1].is_file() and (team is None or team.is_main_process):
            _write_tensors(_text_tensors(pipe, rows), files[split][-1])
    if team is not None:
        team.wait_for_everyone()
    return {split: _read_split(*paths) for split, paths in files.items()}


def _read_split(*files):
    *shards, text = (_read_tensors(file) for file in files)
    return {name: torch.cat([s[name] for s in shards]) for name in shards[0]} | text


def _read_tensors(file):
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise TrainingError(
            f"{file}: another process made it, elsewhere; {_SHARED_DISK}"
        ) from error
    except SafetensorError as error:
        raise TrainingError(
            f"{file}: a damaged file of the cache ({error}); delete it, and it is made again"
        ) from error


def _weights_digest(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shard_name(split, shard, prefix):
    rows, start = shard
    digest = hashlib.sha256(f"{prefix} {start}".encode())
    for path in rows["path"]:
        digest.update(_content(path))
    return f"{split}-{start:06d}-{digest.hexdigest()[:16]}.safetensors"


def _text_name(split, rows, prefix):
    content = prefix + rows[_caption_columns(rows)].fillna("").to_csv(index=False)
    return f"{split}-text-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def _write_missing(pipe, config, shards, files, team):
    from tqdm.auto import tqdm

    missing = [(s, f) for s, f in zip(shards, files, strict=True) if not f.is_file()]
    if team is not None:
        missing = missing[team.process_index :: team.num_processes]
    if not missing:
        return
    model, rate = ldm.load_audio_tower(str(config.checkpoint))
    home = next(model.parameters()).device
    model.to(pipe.device)
    total = sum(len(rows) for (rows, _), _ in missing)
    with tqdm(total=total, desc="latents", disable=None, leave=False) as bar:
        for (rows, start), file in missing:
            _write_tensors(_sound_tensors(pipe, rows, start, config, (model, rate), bar), file)
    # the loaded tower is shared with others, who expect it where it was
    model.to(home)


def _sound_tensors(pipe, rows, start, config, tower, bar):
    frames = _segment_frames(pipe, config.segment_s)
    latents, embeddings, owner = [], [], []
    for i, path in enumerate(rows["path"], start=start):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        # of a clip that is no longer than a segment there is only one
        for _ in range(config.segments_per_clip if len(y) > frames * ldm.HOP else 1):
            segment = audio.loudest_segment(y, frames * ldm.HOP, config.loudest_of, rng)
            mel = ldm.waveform_to_mel(segment, frames)
            latents.append(ldm.encode_mel(pipe, mel[None])[0].cpu())
            embeddings.append(ldm.embed_with(tower, segment, ldm.SAMPLE_RATE))
            owner.append(i)
        bar.update()
    tensors = {"latents": torch.stack(latents).contiguous(), "audio": torch.stack(embeddings)}
    return {**tensors, "clip": torch.tensor(owner)}


def _text_tensors(pipe, rows):
    texts = [[t for t in row if isinstance(t, str) and t] for row in _captions(rows)]
    widest = max(len(row) for row in texts)
    padded = [row + [""] * (widest - len(row)) for row in texts]
    distinct = sorted({text for row in padded for text in row} | {""})
    table = dict(zip(distinct, ldm.embed_text(pipe, distinct).cpu(), strict=True))
    return {
        "text": torch.stack([torch.stack([table[text] for text in row]) for row in padded]),
        "n_text": torch.tensor([len(row) for row in texts]),
        "empty": table[""][None].clone(),
    }


def _captions(rows):
    return rows[_caption_columns(rows)].to_numpy().tolist()


def _segment_frames(pipe, segment_s):
    # each of the U-Net's levels but the last halves the latent once more
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    return max(1, round(segment_s * ldm.SAMPLE_RATE / ldm.HOP / unit)) * unit


def _write_tensors(tensors, file, note=None):
    part = file.with_name(file.name + ".part")
    save_file(tensors, part, metadata=note)
    part.replace(file)


def draw(data, config, step):
    """Draw the batch of a step: its content follows from the seed and the step alone.

    Parameters
    ----------
    data : dict of str to torch.Tensor
        One split of what `prepare` returns.
    config : FinetuneConfig
        Gives batch size, probabilities and seed.
    step : int
        Number of the step.

    Returns
    -------
    dict of str to torch.Tensor
        ``latents``, ``noise`` of their shape, ``t`` in [0, 1), ``condition`` [batch, dim].
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    n = config.batch_size

    def uniform():
        return torch.rand(n, generator=generator)

    index = torch.randint(len(data["latents"]), (n,), generator=generator)
    clip = data["clip"][index]
    which = (uniform() * data["n_text"][clip]).long()
    as_text = (uniform() < config.text_condition_probability)[:, None]
    condition = torch.where(as_text, data["text"][clip, which], data["audio"][index])
    dropped = (uniform() < config.condition_dropout)[:, None]
    latents = data["latents"][index]
    # one timestep in each of n equal bins: the loss of a batch varies less
    t = (torch.arange(n) + uniform()) / n
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=generator),
        "t": t,
        "condition": torch.where(dropped, data["empty"], condition),
    }


def fixed_batch(data, n, seed, condition="right"):
    """Lay out the segments of a validation: the same timesteps and noise each time.

    Parameters
    ----------
    data : dict of str to torch.Tensor
        One split of what `prepare` returns.
    n : int
        At most so many segments, evenly spread over the split.
    seed : int
        Of the noise.
    condition : str
        ``"right"``: the embedding of the clip's own first caption; ``"wrong"``: that of the clip
        whose caption is least like it; ``"none"``: of the empty text; ``"audio"``: of the sound.

    Returns
    -------
    dict of str to torch.Tensor
        As `draw`.

    Raises
    ------
    ValueError
        Another word for `condition`.
    """
    n = min(n, len(data["latents"]))
    index = torch.linspace(0, len(data["latents"]) - 1, n).long()
    noise = torch.randn(
        (n, *data["latents"].shape[1:]), generator=torch.Generator().manual_seed(seed)
    )
    return {
        "latents": data["latents"][index],
        "noise": noise,
        # a stride coprime to n: neighbouring clips get distant timesteps
        "t": (torch.arange(n) * 37 % n + 0.5) / n if n % 37 else (torch.arange(n) + 0.5) / n,
        "condition": _condition(data, index, condition),
    }


def _condition(data, index, condition):
    captions = data["text"][:, 0]
    own = captions[data["clip"][index]]
    if condition == "right":
        return own
    if condition == "wrong":
        return captions[(own @ captions.T).argmin(dim=1)]
    if condition == "none":
        return data["empty"].expand(len(index), -1)
    if condition == "audio":
        return data["audio"][index]
    raise ValueError(f"condition must be one of right, wrong, none, audio; got {condition!r}")


def _part(batch, number, count):
    """Take every `count`-th sample of a batch, so that each part has timesteps of all kinds."""
    return {name: value[number::count] for name, value in batch.items()}


# --- the loss ---------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """What the U-Net got wrong in a batch.

    Parameters
    ----------
    error : torch.Tensor [batch]
        Mean squared error of what it predicts.
    weight : torch.Tensor [batch]
        Its weight in the objective.
    bound : torch.Tensor [batch]
        Its weight in the variational lower bound, in nats for each value of the latent.
    """

    error: torch.Tensor
    weight: torch.Tensor
    bound: torch.Tensor


def diffusion_loss(unet, scheduler, batch, snr_gamma=0.0):
    """Weighted denoising loss of a batch.

    Parameters
    ----------
    unet : torch.nn.Module
        Called as ``unet(noisy, timestep, encoder_hidden_states=None, class_labels=condition)``.
    scheduler : diffusers scheduler
        Gives the noise schedule and says what the U-Net predicts.
    batch : dict
        As `draw` returns it.
    snr_gamma : float
        As in `FinetuneConfig`.

    Returns
    -------
    torch.Tensor, scalar
        Mean over the batch of the weighted squared error.

    Raises
    ------
    TrainingError
        If the scheduler's prediction type is unknown here.
    """
    found = denoising(unet, scheduler, batch, snr_gamma)
    return (found.weight * found.error).mean()


@torch.no_grad()
def fixed_losses(unet, scheduler, data, *, n=64, seed=0, condition="right", batch_size=16):
    """Measure how well a U-Net denoises fixed segments under fixed noise: comparable numbers.

    Parameters
    ----------
    unet, scheduler
        As for `diffusion_loss`.
    data, n, seed, condition
        As for `fixed_batch`.
    batch_size : int
        Segments at once.

    Returns
    -------
    pandas.DataFrame
        One row a segment: ``t`` in [0, 1), ``error`` (mean squared) and ``loss`` (weighted).
    """
    batch = fixed_batch(data, n, seed, condition)
    training = unet.training
    unet.eval()
    errors, losses = [], []
    for start in range(0, len(batch["t"]), batch_size):
        part = {k: v[start : start + batch_size] for k, v in batch.items()}
        found = denoising(unet, scheduler, part)
        errors += found.error.tolist()
        losses += (found.weight * found.error).tolist()
    unet.train(training)
    return pd.DataFrame({"t": batch["t"].tolist(), "error": errors, "loss": losses})


def denoising(unet, scheduler, batch, snr_gamma=0.0):
    """Let the U-Net denoise a batch, and tell its error in each sample.

    Parameters
    ----------
    unet, scheduler, batch, snr_gamma
        As for `diffusion_loss`.

    Returns
    -------
    Denoising
        Error and weights of each sample.

    Raises
    ------
    TrainingError
        If the scheduler's prediction type is unknown here.
    """
    device = next(unet.parameters()).device
    latents, noise = batch["latents"].to(device), batch["noise"].to(device)
    t = (batch["t"] * scheduler.config.num_train_timesteps).long().to(device)
    noisy = scheduler.add_noise(latents, noise, t)
    condition = batch["condition"].to(device)
    out = unet(noisy, t, encoder_hidden_states=None, class_labels=condition).sample.float()
    alpha = scheduler.alphas_cumprod.to(device)[t]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = latents
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, t)
    else:
        raise TrainingError(f"prediction type {kind!r} is none of epsilon, sample, v_prediction")
    error = ((out - target) ** 2).mean(dim=(1, 2, 3))
    weight = _loss_weight(kind, alpha / (1 - alpha), snr_gamma)
    bound = bound_weights(scheduler.alphas_cumprod.cpu(), kind).to(device)[t]
    return Denoising(error, weight, bound)


def _loss_weight(kind, snr, gamma):
    if gamma > 0:
        clamped = snr.clamp(max=gamma)
        return clamped / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind]
    return snr.clamp(0.25, 4.0) if kind == "sample" else torch.ones_like(snr)


def bound_weights(alphas_cumprod, kind):
    """Weigh the squared error at every timestep as the variational lower bound does.

    Parameters
    ----------
    alphas_cumprod : torch.Tensor [timesteps]
        Of the noise schedule.
    kind : str
        What the error is of: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.

    Returns
    -------
    torch.Tensor, float32 [timesteps]
        Half the fall of the signal-to-noise ratio from the step before, for an error of the latent
        (arXiv 2107.00630, eq. 13), turned into one of `kind`. The first step, where it is infinite,
        has the weight of the second, as in the baseline trainer (``lvlb_weights``).

    Examples
    --------
    >>> bound_weights(torch.tensor([0.9, 0.8, 0.5]), "sample")
    tensor([2.5000, 2.5000, 1.5000])
    """
    alpha = alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    weights = 0.5 * (snr[:-1] - snr[1:])
    weights = torch.cat([weights[:1], weights])
    # the share of the latent's error in the error of what is predicted
    share = {"sample": torch.ones_like(snr), "epsilon": 1 / snr, "v_prediction": 1 - alpha}[kind]
    share[0] = share[1]
    return (weights * share).float()


def learning_rate(config, step):
    """Learning rate of a step: linear warm-up, constant, then a cosine to zero.

    Parameters
    ----------
    config : FinetuneConfig
        Gives the peak and the shape.
    step : int
        From 0.

    Returns
    -------
    float
        The rate.

    Examples
    --------
    >>> config = FinetuneConfig("builtin", "", "", steps=100, warmup_steps=10, decay_start=0.5)
    >>> learning_rate(config, 4) == 0.5 * config.learning_rate
    True
    >>> learning_rate(config, 99) < 0.01 * config.learning_rate
    True
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    start = config.decay_start * config.steps
    if step < start:
        return config.learning_rate * warm
    progress = (step + 1 - start) / max(1.0, config.steps - start)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --- the run ----------------------------------------------------------------------------------


def choose_weights(unet, config):
    """Freeze what is not to be trained; add the adapters.

    Parameters
    ----------
    unet : UNet2DConditionModel
        Changed in place.
    config : FinetuneConfig
        Its ``train`` and ``lora_rank`` say which.

    Raises
    ------
    TrainingError
        If the U-Net has no attention layers to train.
    """
    if config.train == "full":
        return
    layers = [name for name, _ in unet.named_parameters() if ".attn" in name]
    if not layers:
        raise TrainingError(f"train={config.train!r}: this U-Net has no attention layers")
    unet.requires_grad_(False)
    if config.train == "attention":
        for name, value in unet.named_parameters():
            value.requires_grad_(name in set(layers))
        return
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        unet.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_rank,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
        )


class _Run:
    """The state of a training run: weights, their average, optimiser, log."""

    def __init__(self, pipe, cache, clips, config, team, states):
        self.pipe, self.cache, self.clips, self.config = pipe, cache, clips, config
        self.team, self.states = team, states
        if config.prediction_type:
            pipe.scheduler.register_to_config(prediction_type=config.prediction_type)
        self.unet, self.scheduler = pipe.unet.train(), pipe.scheduler
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        choose_weights(self.unet, config)
        self.trained = {k: v for k, v in self.unet.named_parameters() if v.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate)
        half = team.device.type if config.precision == "fp16" else None
        self.scaler = torch.amp.GradScaler(half or "cpu", enabled=half is not None)
        self.model = self._shared()
        self.ema = self._weights()
        self.best, self.best_step, self.step = self._weights(), 0, 0
        self.log, self.scores, self.ahead, self.rulers = [], [], None, {}

    def _shared(self):
        """Wrap the U-Net so that the processes average their gradients; one needs no wrapper."""
        if self.team.num_processes == 1:
            return self.unet
        device = self.team.device
        ids = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(self.unet, device_ids=ids)

    def _weights(self):
        return {k: v.detach().clone() for k, v in self.trained.items()}

    @torch.no_grad()
    def _load(self, weights):
        for name, value in self.trained.items():
            value.copy_(weights[name])

    @contextmanager
    def _in_place(self, others):
        """Put other weights in place for a while."""
        weights = self._weights()
        self._load(others)
        try:
            yield
        finally:
            self._load(weights)

    @property
    def kept(self):
        """The weights that become the checkpoint, and their step."""
        if self.config.keep_best:
            return self.best, self.best_step
        return self.ema, self.step

    def keep(self):
        """Leave the weights that are kept in the pipeline, adapters merged."""
        self._load(self.kept[0])
        if self.config.train == "lora":
            self.unet.fuse_lora()
            self.unet.unload_lora()

    def train(self, key):
        from tqdm.auto import tqdm

        config, main = self.config, self.team.is_main_process
        curves = _Curves(config, key, self.step) if main else None
        found, started = [], time.monotonic()
        bar = tqdm(
            total=config.steps, initial=self.step, desc="training", disable=None, leave=False
        )
        if not self.log:
            self._record({}, 0.0, curves)
        while self.step < config.steps and not self._idle():
            found.append(self._step())
            bar.update()
            if self.step % config.val_every == 0 or self.step == config.steps:
                seconds = time.monotonic() - started
                self._record(_means(found), seconds, curves)
                if main:
                    self._save(key)
                found, started = [], time.monotonic()
        bar.close()
        if main:
            if config.sample_epochs and self.kept[1] not in {r["step"] for r in self.scores}:
                self._score(curves, *self.kept)
            curves.close()

    def _idle(self):
        # rows of the log, not steps: a resumed run counts as the unbroken one would have
        since = [row["step"] for row in self.log if row["step"] > self.best_step]
        return 0 < self.config.patience <= len(since)

    def _autocast(self):
        if self.config.precision == "fp32":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        return torch.autocast(self.team.device.type, dtype)

    def _step(self):
        config, team = self.config, self.team
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = draw(self.cache["train"], config, self.step) if self.ahead is None else self.ahead
        self.optimizer.zero_grad(set_to_none=True)
        # [loss, simple loss, lower bound], mean over the share of this process
        means = torch.zeros(3, device=team.device)
        for number in range(config.accumulate):
            place = team.process_index + number * team.num_processes
            part = _part(batch, place, team.num_processes * config.accumulate)
            means += self._backward(part, last=number == config.accumulate - 1)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        # drawn while an accelerator still works on this step
        self.ahead = draw(self.cache["train"], config, self.step + 1)
        if team.num_processes > 1:
            torch.distributed.all_reduce(means)
            means /= team.num_processes
        told = dict(zip(("train_loss", "train_simple", "train_vlb"), means.tolist(), strict=True))
        self._refuse_broken(told["train_loss"], float(norm))
        self.step += 1
        return told | {"grad_norm": float(norm)}

    def _backward(self, part, last):
        # processes average their gradients once a step, not once a part
        waits = nullcontext() if last or self.model is self.unet else self.model.no_sync()
        with waits:
            with self._autocast():
                found = denoising(self.model, self.scheduler, part, self.config.snr_gamma)
            loss = (found.weight * found.error).mean() / self.config.accumulate
            self.scaler.scale(loss).backward()
        plain = torch.stack([found.error.mean(), (found.bound * found.error).mean()]).detach()
        return torch.cat([loss.detach()[None], plain / self.config.accumulate])

    @torch.no_grad()
    def _average(self):
        # a young average follows faster, or it would remember the starting weights for long
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.trained.items():
            self.ema[name].lerp_(value, 1 - decay)

    def _refuse_broken(self, loss, norm):
        # in fp16 a gradient may overflow: the scaler leaves that step out and scales less
        if math.isfinite(loss) and (math.isfinite(norm) or self.config.precision == "fp16"):
            return
        raise TrainingError(
            f"the loss is not finite at step {self.step}. {_last(self.states)} {_calmer(self.config)}"
        )

    def _record(self, means, seconds, curves):
        row = self._row(means, seconds) if self.team.is_main_process else None
        if self.team.num_processes > 1:
            # decisions are taken on the numbers of one process, or the others might differ
            rows = [row]
            torch.distributed.broadcast_object_list(rows)
            row = rows[0]
        if not self.log or row["val_loss_ema"] < min(r["val_loss_ema"] for r in self.log):
            self.best, self.best_step = {k: v.clone() for k, v in self.ema.items()}, self.step
        self.log.append(row)
        if self.team.is_main_process:
            curves.write(self.log)
            if self._time_to_sample():
                self._score(curves, self.ema, self.step)
        limit = _DIVERGED * self.log[0]["val_loss"]
        if not row["val_loss"] <= limit:
            raise TrainingError(
                f"training diverged: the validation loss is {row['val_loss']:.4g} at step "
                f"{self.step}, {self.log[0]['val_loss']:.4g} at the start. {_last(self.states)} "
                f"{_calmer(self.config)}"
            )

    def _row(self, means, seconds):
        config = self.config
        raw, raw_test = self._validate("val"), self._validate("test")
        with self._in_place(self.ema):
            averaged, averaged_test = self._validate("val"), self._validate("test")
            heard = self._validate("val", "audio")
        names = ("train_loss", "train_simple", "train_vlb")
        row = {"step": self.step} | {name: means.get(name, float("nan")) for name in names}
        row |= {
            "val_loss": raw["loss"],
            "val_loss_ema": averaged["loss"],
            "val_simple_ema": averaged["simple"],
            "val_vlb_ema": averaged["vlb"],
            "val_audio_ema": heard["loss"],
        }
        if raw_test:
            row |= {"test_loss": raw_test["loss"], "test_loss_ema": averaged_test["loss"]}
        row |= {f"val_loss_t{i}": value for i, value in enumerate(averaged["quarters"], 1)}
        done = self.step - (self.log[-1]["step"] if self.log else 0)
        return row | {
            "learning_rate": learning_rate(config, max(0, self.step - 1)),
            "grad_norm": means.get("grad_norm", float("nan")),
            "seconds": round(seconds, 3),
            "samples_per_s": round(done * config.batch_size / seconds, 3) if seconds else 0.0,
        }

    @torch.no_grad()
    def _validate(self, split, condition="right"):
        """Loss at fixed clips, timesteps and noise: comparable from step to step."""
        if split not in self.cache:
            return {}
        config = self.config
        wanted = {"val": config.val_segments, "test": config.test_segments}[split]
        batch = fixed_batch(self.cache[split], wanted, config.seed, condition)
        self.unet.eval()
        means, losses, errors, bounds = [], [], [], []
        size = max(1, config.batch_size // config.accumulate)
        for start in range(0, len(batch["t"]), size):
            part = {k: v[start : start + size] for k, v in batch.items()}
            with self._autocast():
                found = denoising(self.unet, self.scheduler, part, config.snr_gamma)
            weighted = found.weight * found.error
            means += [float(weighted.mean())] * len(part["t"])
            losses += weighted.tolist()
            errors += found.error.tolist()
            bounds += (found.bound * found.error).tolist()
        self.unet.train()
        quarter = (batch["t"] * 4).long().numpy()
        quarters = pd.Series(losses).groupby(quarter).mean().reindex(range(4))
        return {
            "loss": float(np.mean(means)),
            "simple": float(np.mean(errors)),
            "vlb": float(np.mean(bounds)),
            "quarters": quarters.tolist(),
        }

    def _time_to_sample(self):
        """At the start, at the end, and at the first validation after so many epochs."""
        if not self.config.sample_epochs:
            return False
        epoch = len(self.cache["train"]["latents"]) / self.config.batch_size
        every = max(1.0, self.config.sample_epochs * epoch)
        before = self.log[-2]["step"] if len(self.log) > 1 else -1
        due = before < 0 or int(self.step / every) > int(before / every)
        return due or self.step == self.config.steps

    def _score(self, curves, weights, step):
        """Generate fixed prompts with fixed seeds and score them against the validation clips."""
        from . import fad

        config = self.config
        self.unet.eval()
        with self._in_place(weights):
            sounds, rate = _sample(self.pipe, config, self._prompts())
        self.unet.train()
        curves.write_sounds(sounds, rate, step)
        options = {"reference_name": "validation", "repeats": 50, "seed": config.seed}
        rows = []
        for name, (embedding, real) in self._rulers().items():
            ours = {f"step {step}": embedding.embed(sounds, rate, silence="allow")}
            rows.append(fad.score_table(real, ours, embedding=name, **options))
        table = pd.concat(rows).assign(step=step).astype(object)
        self.scores += table.to_dict("records")
        curves.write_scores(self.scores, step)

    def _rulers(self):
        """Open the embeddings and embed the reference, once a run."""
        from . import embeddings

        if not self.rulers:
            paths = _spread(self._validation["path"].tolist(), _REFERENCE_CLIPS)
            real = audio.excerpts(paths, self.config.segment_s)
            for told in self.config.sample_embeddings:
                name, _, path = told.partition("=")
                ruler = embeddings.get_embedding(name, path)
                points = ruler.embed(real, ldm.SAMPLE_RATE, silence="allow")
                self.rulers[name] = (ruler, points)
        return self.rulers

    @property
    def _validation(self):
        return self.clips[self.clips["split"] == "val"]

    def _prompts(self):
        if self.config.sample_prompts:
            return list(self.config.sample_prompts)
        return _spread(self._validation["caption"].tolist(), self.config.n_samples)

    def _save(self, key):
        groups = {"model": self._weights(), "ema": self.ema, "best": self.best}
        note = {"key": key, "step": self.step, "best_step": self.best_step, "log": self.log}
        note |= {"scores": self.scores, "scaler": self.scaler.state_dict()}
        _save_state(self.states, groups, self.optimizer, note, self.config.keep_states)

    def restore(self, key):
        found = _load_state(self.states, key)
        if found is None:
            return
        groups, note = found
        self._load(groups["model"])
        device = self.team.device
        self.ema = {k: v.to(device) for k, v in groups["ema"].items()}
        self.best = {k: v.to(device) for k, v in groups["best"].items()}
        _restore_optimizer(self.optimizer, groups["optimizer"])
        self.scaler.load_state_dict(note["scaler"])
        self.step, self.best_step = note["step"], note["best_step"]
        self.log, self.scores = note["log"], note["scores"]


def _spread(items, n):
    """Take at most `n` of a list, evenly over it."""
    places = np.linspace(0, len(items) - 1, min(n, len(items)))
    return [items[int(place)] for place in places]


def _means(found):
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def _sample(pipe, config, prompts):
    from . import generation

    told = ldm.checkpoint_info(config.checkpoint)
    settings = {name: told[name] for name in ("steps", "guidance_scale", "eta")}
    rate = pipe.vocoder.config.sampling_rate
    model = generation.DiffusersBackend(
        "audioldm",
        config.checkpoint,
        rate,
        settings | {"clips_per_pass": min(_CLIPS_A_PASS, len(prompts))},
        pipe,
        lambda prompts: [0] * len(prompts),
    )
    seeds = [config.seed + i for i in range(len(prompts))]
    return model.generate(prompts, seeds, config.segment_s), rate


def _save_state(folder, groups, optimizer, note, keep):
    """Write a state whole, then drop the oldest."""
    tensors = {f"{group}.{k}": v for group, part in groups.items() for k, v in part.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{note['step']:08d}.safetensors"
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    _write_tensors(tensors, file, {"note": json.dumps(note)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def _load_state(folder, key):
    """Read the latest state that can be read: tensors by group, and the note."""
    for file in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(file, framework="pt") as stored:
                note = json.loads(stored.metadata()["note"])
            tensors = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{file}: damaged ({error}); trying the one before", stacklevel=2)
            continue
        if note["key"] != key:
            continue
        groups = {}
        for name, value in tensors.items():
            group, rest = name.split(".", 1)
            groups.setdefault(group, {})[rest] = value
        return groups, note
    return None


def _restore_optimizer(optimizer, moments):
    state = optimizer.state_dict()
    for name, value in moments.items():
        index, moment = name.split(".", 1)
        state["state"].setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(state)


class _Curves:
    """Where the numbers go: a CSV table, TensorBoard and, if asked for, Weights & Biases."""

    def __init__(self, config, key, step):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = _beside(config.out_dir, "logs")
        self.folder.mkdir(parents=True, exist_ok=True)
        # what a killed run wrote after its last state is not to be shown twice
        self.board = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        self.wandb = None
        if config.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=Path(config.out_dir).name,
                id=key,
                resume="allow",
                dir=str(self.folder),
                config=asdict(config),
                settings=wandb.Settings(silent=True),
            )

    def write(self, log):
        table = pd.DataFrame(log).to_csv(index=False)
        store.write_atomic(self.folder / "training_log.csv", table.encode())
        told = {k: v for k, v in log[-1].items() if k != "step" and v == v}
        self._tell(told, log[-1]["step"])

    def write_scores(self, scores, step):
        from . import fad

        table = pd.DataFrame(scores)
        store.write_atomic(self.folder / "scores.csv", table.to_csv(index=False).encode())
        last = table[table["step"] == step]
        names = {True: "floor", False: "samples"}
        told = {
            f"{row.metric} {row.embedding} {names[row.candidate == fad.FLOOR_NAME]}": row.value
            for row in last.itertuples()
        }
        self._tell(told, step)

    def _tell(self, numbers, step):
        for name, value in numbers.items():
            self.board.add_scalar(name.replace(" ", "/"), value, step)
        self.board.flush()
        # W&B takes no step twice or late; the weights that are kept may be those of an early one
        if self.wandb and step >= self.wandb.step:
            self.wandb.log(numbers, step=step)

    def write_sounds(self, sounds, rate, step):
        for i, y in enumerate(sounds):
            peak = max(1.0, float(np.abs(y).max()))
            path = self.folder / "samples" / f"step-{step:08d}" / f"{i:02d}.wav"
            audio.save_audio(path, y / peak, rate)

    def close(self):
        self.board.close()
        if self.wandb:
            self.wandb.finish()


# --- the autoencoder --------------------------------------------------------------------------


def _train_vae(pipe, clips, config, team):
    """Train the autoencoder on the training clips, before any latent is taken."""
    frames = _segment_frames(pipe, config.segment_s)
    paths = clips.loc[clips["split"] == "train", "path"].tolist()
    if isinstance(pipe.vae, ldm.PatchVAE):
        if config.vae == "decoder":
            raise TrainingError("a PatchVAE has no decoder of its own to train; set vae to 'all'")
        pipe.vae.fit(torch.cat([_mels([path], frames, config, i) for i, path in enumerate(paths)]))
        return
    key = _run_key(config, clips)
    states = _beside(config.out_dir, "states") / f"{key}-vae"
    if team.is_main_process:
        _VaeRun(pipe, config, states, key).train(clips, frames)
    team.wait_for_everyone()
    found = _load_state(states, key)
    pipe.vae.load_state_dict(found[0]["model"])
    pipe.vae.register_to_config(scaling_factor=found[1]["scaling_factor"])


def _mels(paths, frames, config, step):
    """Log-mels of a random segment of each clip; what is drawn follows from the step alone."""
    rng = np.random.default_rng([config.seed, step])
    parts = []
    for path in paths:
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        segment = audio.loudest_segment(y, frames * ldm.HOP, config.loudest_of, rng)
        parts.append(ldm.waveform_to_mel(segment, frames))
    return torch.stack(parts)


def vae_loss(vae, mel, noise):
    """Loss of an autoencoder: absolute error of the log-mel, and the divergence of its latent.

    Parameters
    ----------
    vae : AutoencoderKL
        From diffusers.
    mel : torch.Tensor [batch, frames, 64]
        Log-mel spectrograms.
    noise : torch.Tensor
        Standard normal, of the latent's shape.

    Returns
    -------
    loss : torch.Tensor, scalar
        To be minimised.
    error : torch.Tensor, scalar
        Mean absolute error of the log-mel, nats.

    Notes
    -----
    The reconstruction and KL terms of AudioLDM's autoencoder. Its discriminator, which sets in after
    50,000 steps, is left out: a decoder that is only fitted to new sounds does not get there.
    """
    dist = vae.encode(mel[:, None]).latent_dist
    out = vae.decode(dist.mean + dist.std * noise).sample[:, 0]
    error = (out - mel).abs().mean()
    return error + _KL_WEIGHT * dist.kl().mean() / mel[0].numel(), error


class _VaeRun:
    """Training of the autoencoder, resumed like that of the U-Net."""

    def __init__(self, pipe, config, states, key):
        self.vae, self.config, self.states, self.key = pipe.vae, config, states, key
        self.device, self.frozen = pipe.device, config.vae == "decoder"
        trained = [
            value
            for name, value in self.vae.named_parameters()
            if not self.frozen or name.startswith(("decoder", "post_quant_conv"))
        ]
        self.vae.requires_grad_(False)
        for value in trained:
            value.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(trained, lr=config.vae_learning_rate)
        self.trained, self.step, self.log = trained, 0, []

    def train(self, clips, frames):
        from tqdm.auto import tqdm

        self._restore()
        config, paths = self.config, clips.groupby("split")["path"].apply(list)
        val = _mels(paths["val"][: config.val_segments], frames, config, 0).to(self.device)
        steps = range(self.step, config.vae_steps)
        losses = []
        for step in tqdm(steps, desc="autoencoder", disable=None, leave=False):
            losses.append(self._step(paths["train"], frames, step))
            self.step = step + 1
            if self.step % config.val_every == 0 or self.step == config.vae_steps:
                self._record(losses, val)
                losses = []
        self.vae.requires_grad_(False).eval()

    def _step(self, paths, frames, step):
        config = self.config
        rng = np.random.default_rng([config.seed, step, 1])
        chosen = [paths[i] for i in rng.integers(len(paths), size=config.batch_size)]
        mels = _mels(chosen, frames, config, step).to(self.device)
        noise = self._noise(mels, step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        parts = zip(mels.chunk(config.accumulate), noise.chunk(config.accumulate), strict=True)
        for part, its_noise in parts:
            share = len(part) / len(mels)
            loss, error = vae_loss(self.vae, part, its_noise)
            (loss * share).backward()
            total += float(error.detach()) * share
        torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
        self.optimizer.step()
        if not math.isfinite(total):
            raise TrainingError(
                f"the autoencoder's loss is not finite at step {step}. {_last(self.states)} Or start "
                f"anew with a lower vae_learning_rate (now {config.vae_learning_rate:g})."
            )
        return total

    def _noise(self, mel, step):
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(mel), self.vae.config.latent_channels, *(n // factor for n in mel.shape[1:]))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return torch.randn(shape, generator=generator).to(mel.device)

    @torch.no_grad()
    def _record(self, losses, val):
        latents, error = [], 0.0
        for part in val.split(self.config.batch_size):
            latents.append(self.vae.encode(part[:, None]).latent_dist.mean)
            again = self.vae.decode(latents[-1]).sample[:, 0]
            error += float((again - part).abs().sum())
        row = {"step": self.step, "train_error": float(np.mean(losses))}
        self.log.append(row | {"val_error": error / val.numel()})
        table = pd.DataFrame(self.log).to_csv(index=False).encode()
        store.write_atomic(_beside(self.config.out_dir, "logs") / "vae_log.csv", table)
        # the diffusion wants a latent of unit variance
        factor = 1 / float(torch.cat(latents).std())
        note = {"key": self.key, "step": self.step, "log": self.log}
        note["scaling_factor"] = self.vae.config.scaling_factor if self.frozen else factor
        groups = {"model": self.vae.state_dict()}
        _save_state(self.states, groups, self.optimizer, note, self.config.keep_states)

    def _restore(self):
        found = _load_state(self.states, self.key)
        if found:
            groups, note = found
            self.vae.load_state_dict(groups["model"])
            _restore_optimizer(self.optimizer, groups["optimizer"])
            self.step, self.log = note["step"], note["log"]


# --- command line -----------------------------------------------------------------------------


def read_config(file, changes=()):
    r"""Read a configuration from a YAML file.

    Parameters
    ----------
    file : str or Path
        Names of `FinetuneConfig` and their values.
    changes : sequence of (str, str)
        Names and values, as YAML, that replace those of the file.

    Returns
    -------
    FinetuneConfig

    Raises
    ------
    TrainingError
        A file that cannot be read, an unknown name, or a name without a value.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "config.yaml"
    >>> _ = file.write_text("checkpoint: builtin\ndataset_root: set.json\nout_dir: out")
    >>> read_config(file, [("steps", "20")]).steps
    20
    """
    import yaml

    try:
        told = yaml.safe_load(Path(file).read_text()) or {}
        told |= {name: yaml.safe_load(value) for name, value in changes}
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise TrainingError(f"{file}: not a YAML file of names and values ({error})") from error
    known = {f.name: f for f in fields(FinetuneConfig)}
    for name in told.keys() - known.keys():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TrainingError(f"{file}: unknown name {name!r}{hint} Known: {', '.join(known)}")
    missing = [n for n in ("checkpoint", "dataset_root", "out_dir") if n not in told]
    if missing:
        raise TrainingError(f"{file}: {', '.join(missing)} must be given")
    return replace(FinetuneConfig("", "", ""), **{n: _typed(known[n], v) for n, v in told.items()})


def write_config(config, file):
    """Write a configuration to a YAML file, for `read_config` and the command line.

    Parameters
    ----------
    config : FinetuneConfig
        What is written.
    file : str or Path
        Its folder is made if need be.

    Returns
    -------
    Path
        The file.

    Examples
    --------
    >>> import tempfile
    >>> config = FinetuneConfig("builtin", "set.json", "out", sample_prompts=("rain", "wind"))
    >>> read_config(write_config(config, Path(tempfile.mkdtemp()) / "config.yaml")) == config
    True
    """
    import yaml

    # through JSON, in which tuples are lists
    plain = json.loads(json.dumps(asdict(config)))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(file, yaml.safe_dump(plain, sort_keys=False).encode())
    return file


def _typed(told, value):
    # YAML reads 1e-4 as a text
    wanted = told.type
    try:
        if wanted in (int, float) and not isinstance(value, bool):
            if wanted is int and float(value) != int(float(value)):
                raise ValueError
            return wanted(float(value))
        if wanted is tuple and isinstance(value, list):
            return tuple(value)
    except (TypeError, ValueError):
        value = f"{value!r}"
    if not isinstance(value, wanted):
        raise TrainingError(f"{told.name} must be {wanted.__name__}; got {value}")
    return value


def main(argv=None):
    """Fine-tune from the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; see ``--help``.

    Returns
    -------
    int
        Exit status: 0, 1 if training failed, 2 for a wrong call.
    """
    parser = argparse.ArgumentParser(
        prog="python -m soundscapes_utils finetune",
        description="Fine-tune AudioLDM on captioned sounds; the same command again resumes. For "
        "several processes: accelerate launch -m soundscapes_utils.finetuning config.yaml",
    )
    parser.add_argument("config", nargs="?", help="YAML file: names of FinetuneConfig, values")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--csv", help="table of path, caption (label, split, source) to convert")
    parser.add_argument("--to", metavar="FOLDER", help="where the converted set goes")
    options = parser.parse_args(argv)
    if bool(options.csv) != bool(options.to) or not (options.config or options.csv):
        parser.print_usage(sys.stderr)
        print("error: give a configuration, or --csv and --to, or all three", file=sys.stderr)
        return 2
    try:
        if options.csv:
            root = captioned_set(options.csv, options.to)
            print(f"Set: {root}")
            options.p.append(("dataset_root", json.dumps(str(root))))
        if options.config:
            result = finetune(read_config(options.config, options.p))
            team = _team()
            if team.is_main_process:
                told = f"best step {result.best_step}; processes: {team.num_processes}"
                print(f"Checkpoint: {result.checkpoint} ({told})")
    except (TrainingError, ldm.CheckpointError, metadata.MetadataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
