"""The trainer: AudioLDM's U-Net on the latents of captioned sounds, under the CLAP condition.

What a step sees (latents, embeddings of sounds and captions) is computed once and cached, so that the
loop, `_train`, holds the U-Net alone and reads as diffusers' training examples do. What is drawn at a
step (clips, noise, timesteps, dropped conditions) follows from the seed and the number of the step: a
run that was killed continues the sequence it would have had, and several processes share the batch
that one would have drawn.

On one device, and on several (on CPUs too)::

    python -m soundscapes_utils finetune config.yaml -p steps 2000
    accelerate launch --multi_gpu --num_processes 2 -m soundscapes_utils finetune config.yaml

From a notebook or a script, `finetune` and `launch` do the same. The settings of the baseline trainer
of Gaurav et al. are in ``notebooks/profiles/paper.yaml``.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from . import audio, captions, fad, generation, ldm, metadata, store

_CARD = Path(__file__).with_name("finetuned_card.md")
# clips whose latents share a file of the cache; a killed run loses at most these
_SHARD = 64
# segments are the loudest of this many random positions
_TRIES = 4
# clips of the validation split that samples are scored against: more gain little and take long
_REFERENCE_CLIPS = 512
# a validation loss of this many times that of the start is not training any more
_DIVERGED = 10.0
# the latest saved states that are kept: the last one may have been cut off
_STATES = 2
_CHOICES = {"mixed_precision": ("no", "fp16", "bf16"), "train": ("full", "attention", "lora")}
_AT_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "gradient_accumulation_steps", "lora_rank"), 1),
    **dict.fromkeys(("segments_per_clip", "validation_steps", "validation_segments"), 1),
    **dict.fromkeys(("learning_rate", "lr_warmup_steps", "segment_s", "snr_gamma"), 0),
}
_SHARES = ("text_condition_probability", "conditioning_dropout", "ema_decay", "decay_start")
# where things lie, what is said of them, how memory is saved: a run goes on when these change
_NOT_TRAINED = (
    *("out_dir", "dataset_root", "checkpoint", "cache_dir", "wandb_project", "data_licence"),
    *("gradient_accumulation_steps", "gradient_checkpointing"),
)

# Gaurav et al., DCASE 2024 Challenge, task 7, table 1
REPORTED = pd.DataFrame(
    [
        ("FAD", "report: AudioLDM", "61.28"),
        ("FAD", "report: fine-tuned, development set", "28.18"),
        ("FAD", "report: fine-tuned, external set", "31.58"),
    ],
    columns=["metric", "candidate", "score"],
)


class TrainingError(store.DataError):
    """Training that cannot start or go on."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What `finetune` is to do; names as in diffusers' examples.

    Parameters
    ----------
    checkpoint : str
        Where to start: ``"builtin"``, a diffusers AudioLDM folder or a hub name.
    dataset_root : str
        ``dataset_root.json`` of an AudioCaps-format set (see `metadata.write_audiocaps`); or a table,
        CSV or Parquet, of ``path`` (relative to the table), ``caption``, ``caption_2``, … and, if there
        are any, ``split`` (train, val, test), ``source_id`` (what must not be in two splits),
        ``dataset`` and ``fold``.
    out_dir : str
        Becomes a diffusers folder; next to it lie the curves and samples (``<name>.logs``), the
        resumable states (``<name>.states``) and the cache (``<name>.cache``).
    steps, batch_size : int
        Optimiser steps, and segments in each, over all processes and accumulated parts.
    gradient_accumulation_steps : int
        Parts in which a process works through its share of a batch; more parts need less memory.
    learning_rate, lr_warmup_steps, decay_start : float, int, float
        Peak rate of AdamW, steps of linear warm-up, and the fraction of the steps after which the rate
        falls to zero on a cosine (1 keeps it constant, as the baseline trainer does).
    max_grad_norm : float
        The norm to which gradients are clipped.
    ema_decay : float
        Of the exponential moving average of the weights, which is what is saved.
    train, lora_rank : str, int
        ``"full"``: all weights of the U-Net; ``"attention"``: those of its attention layers;
        ``"lora"``: low-rank adapters of these, merged into the weights that are saved.
    mixed_precision : str
        ``"no"``, ``"bf16"`` or (on a GPU) ``"fp16"``, for autocast; weights stay float32.
    gradient_checkpointing : bool
        Compute activations twice instead of keeping them: less memory, about a third slower.
    snr_gamma : float
        Above 0: min-SNR weights of the loss with this gamma (5 in its paper).
    text_condition_probability : float
        How often the condition is the caption's text embedding, not the audio embedding. 0 is the
        way of AudioLDM, whose CLAP was trained on hundreds of thousands of pairs. The small CLAP of
        the built-in checkpoint leaves a wide gap between texts and sounds, and wants 0.5.
    conditioning_dropout : float
        How often the condition is that of the empty text, for classifier-free guidance.
    segment_s, segments_per_clip : float, int
        Length of a training segment, seconds, rounded to what the U-Net can halve; and how many are
        cached per clip, each the loudest of four random positions (one of a clip that is no longer).
    validation_steps : int
        Steps between validations and saved states.
    validation_segments, test_segments : int
        At most this many segments, each at its own fixed timestep and noise. The test loss decides
        nothing; 0 leaves the test split alone.
    keep_best : bool
        Save the averaged weights of the lowest validation loss (default), or the last ones.
    sample_epochs : float
        Generate samples after this many passes over the training segments, and so on; 0 never.
    n_samples : int
        Captions of the validation split that are asked for, each always with the same seed.
    sample_embeddings : sequence of str or of (str, str)
        Names, or names and paths, for `embeddings.get_embedding`: FAD and KAD of the samples.
    wandb_project : str
        Also log there (Weights & Biases; ``WANDB_MODE=offline`` needs no account).
    cache_dir : str
        Where latents and embeddings are kept, for runs that share them; empty: next to ``out_dir``.
    data_licence : str
        Of the training data, for the model card.
    seed : int
        For everything that is drawn.
    info : dict
        Entries for the checkpoint's note: ``training_dataset`` in words, and ``heard``, the training
        folds by data set (a table with ``dataset`` and ``fold`` tells them itself). The folds that the
        start was trained on are added.
    """

    checkpoint: str
    dataset_root: str
    out_dir: str
    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 100
    decay_start: float = 1.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    train: str = "full"
    lora_rank: int = 8
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    snr_gamma: float = 0.0
    text_condition_probability: float = 0.0
    conditioning_dropout: float = 0.1
    segment_s: float = 2.56
    segments_per_clip: int = 2
    validation_steps: int = 50
    validation_segments: int = 64
    test_segments: int = 64
    keep_best: bool = True
    sample_epochs: float = 0.0
    n_samples: int = 16
    sample_embeddings: tuple = ("logmel-stats",)
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
        One row per validation: ``step``; ``train_loss``, ``train_simple`` (without the weights of
        the timesteps), ``train_vlb`` and ``grad_norm`` (before clipping), means since the row before;
        ``val_loss`` of the raw and ``val_loss_ema`` of the averaged weights, likewise
        ``val_simple_ema``, ``val_vlb_ema``, ``test_loss``, ``test_loss_ema``; ``val_audio_ema``, under
        the sounds' embeddings instead of the captions'; ``val_loss_t1`` to ``val_loss_t4``, the
        averaged weights' loss in the four quarters of the timesteps, from clean to noisy;
        ``learning_rate``; ``seconds`` and ``samples_per_s`` of the steps.
    best_step : int
        Of the lowest validation loss of the averaged weights.
    scores : pandas.DataFrame
        FAD and KAD of the samples with their floors (see `fad.score_table`), and their ``step``; the
        weights that are kept have theirs.
    """

    checkpoint: Path
    log: pd.DataFrame
    best_step: int
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)


# --- train ---------------------------------------------------------------------------------------


def finetune(config):
    """Train the U-Net of a checkpoint on captioned sounds; resume where a killed run stopped.

    Parameters
    ----------
    config : FinetuneConfig
        The same configuration and data continue or return what is there; others start again.

    Returns
    -------
    FinetuneResult
        The averaged weights in diffusers' format, with a model card; log and scores.

    Raises
    ------
    TrainingError
        If the configuration is wrong, the set has no training or validation clips, or the loss is no
        longer finite or diverges; the message names the remedy and the last good state.
    ldm.CheckpointError
        If the checkpoint cannot be opened.

    Notes
    -----
    The objective is L(θ) of AudioLDM (arXiv 2301.12503, eq. 4) for checkpoints that predict the
    noise or the velocity (arXiv 2202.00512); one that predicts the latent itself
    (``prediction_type="sample"``) is weighted by its SNR clamped to [0.25, 4]. With ``snr_gamma``
    any of them is weighted as in min-SNR (arXiv 2303.09556).

    Examples
    --------
    >>> config = FinetuneConfig("builtin", "set/dataset_root.json", "out", steps=100)
    >>> finetune(config).log.tail(1)  # doctest: +SKIP
    """
    _check(config)
    clips = _read_clips(config)
    key = _run_key(config, clips)
    if result := _finished(config, key):
        return result
    accelerator = _accelerator(config)
    pipe = ldm.load_pipeline(config.checkpoint, str(accelerator.device))
    data = load_data(pipe, config, clips, accelerator)
    run = _Run(pipe, data, clips, config, accelerator, key)
    _train(run)
    if accelerator.is_main_process:
        run.keep()
        _save_result(run)
        shutil.rmtree(_next_to(config, "states"), ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return _finished(config, key)


def _train(run):
    """The training loop; all of it works on `run`, which can be saved and restored."""
    from tqdm.auto import tqdm

    config, accelerator = run.config, run.accelerator
    run.restore()
    run.init_trackers()
    if not run.log:
        run.validate([], 0.0)
    numbers, started = [], time.monotonic()
    bar = tqdm(total=config.steps, initial=run.step, desc="training", disable=None, leave=False)
    while run.step < config.steps:
        for group in run.optimizer.param_groups:
            group["lr"] = _learning_rate(config, run.step)
        batch = training_batch(run.data["train"], config, run.step)
        losses = torch.zeros(3, device=accelerator.device)
        for part in run.parts(batch):
            with accelerator.accumulate(run.model):
                found = denoising(run.model, run.scheduler, part, config.snr_gamma)
                loss = (found.weight * found.error).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.trained.values(), config.max_grad_norm)
                run.optimizer.step()
                run.optimizer.zero_grad()
            means = loss, found.error.mean(), (found.bound * found.error).mean()
            losses += torch.stack(means).detach() / config.gradient_accumulation_steps
        run.average()
        losses = accelerator.reduce(losses, "mean").tolist()
        run.refuse_broken(losses[0], float(norm))
        numbers.append([*losses, float(norm)])
        run.step += 1
        bar.update()
        if run.step % config.validation_steps == 0 or run.step == config.steps:
            run.validate(numbers, time.monotonic() - started)
            run.save()
            numbers, started = [], time.monotonic()
    bar.close()
    run.score_kept()


def launch(config, processes=1):
    """Fine-tune in several processes, as `accelerate launch` would: from a notebook or a script.

    Parameters
    ----------
    config : FinetuneConfig
        As for `finetune`.
    processes : int
        1: `finetune`, in this process; more: as many new ones, a GPU each, or all on the CPU. What
        they say is printed; their configuration is in ``<out_dir>.logs/config.yaml``.

    Returns
    -------
    FinetuneResult
        As `finetune`: the loss does not depend on the number of processes.

    Raises
    ------
    TrainingError
        Fewer than one process, more than there are GPUs, or an error in one of them.
    """
    import yaml

    if processes == 1:
        return finetune(config)
    gpus = torch.cuda.device_count()
    if processes < 1 or 0 < gpus < processes:
        raise TrainingError(
            f"processes must be at least 1, and with GPUs one each ({gpus} here); got {processes}"
        )
    _check(config)
    key = _run_key(config, _read_clips(config))
    if result := _finished(config, key):
        return result
    plain = json.loads(json.dumps(asdict(config)))  # in JSON tuples are lists
    text = yaml.safe_dump(plain, sort_keys=False)
    file = store.write_atomic(_next_to(config, "logs") / "config.yaml", text)
    # with --cpu accelerate starts one process only; the trainer itself sees that there is no GPU
    words = f"accelerate.commands.launch --multi_gpu --num_processes {processes} --num_machines 1"
    words += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m soundscapes_utils"
    status, lines = _run_aloud(
        [sys.executable, "-m", *words.split(), "finetune", str(file)], processes
    )
    if status:
        errors = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        raise TrainingError(f"{processes} processes ended with status {status}: {' '.join(errors)}")
    return _finished(config, key)


def _run_aloud(command, processes):
    """Run a command, print what it says as it says it, and give back its status and last lines."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    text, lines = {"encoding": "utf-8", "errors": "replace"}, deque(maxlen=200)
    with subprocess.Popen(command, env=threads | ours, **pipes, **text) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.strip())
        except BaseException:
            process.terminate()  # an interrupted notebook leaves no training behind
            raise
    return process.returncode, list(lines)


def _accelerator(config):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    # two runs in one process may differ in their precision
    AcceleratorState._reset_state()
    # samples and validations keep the others waiting for longer than the usual ten minutes
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=["tensorboard", *(["wandb"] if config.wandb_project else [])],
        project_dir=_next_to(config, "logs"),
        kwargs_handlers=[waits],
    )
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes "
            f"in {config.gradient_accumulation_steps} parts each; make it a multiple of {parts}"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("mixed_precision fp16 needs a GPU; bf16 works on a CPU too")
    return accelerator


def _learning_rate(config, step):
    """Learning rate of a step: linear warm-up, constant, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    start = config.decay_start * config.steps
    if step < start:
        return config.learning_rate * warm
    progress = (step + 1 - start) / max(1.0, config.steps - start)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --- the loss ------------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """What the U-Net got wrong in a batch; every field is a tensor [batch].

    Parameters
    ----------
    error : torch.Tensor
        Mean squared error of what it predicts.
    weight : torch.Tensor
        Its weight in the objective.
    bound : torch.Tensor
        Its weight in the variational lower bound, in nats for each value of the latent.
    """

    error: torch.Tensor
    weight: torch.Tensor
    bound: torch.Tensor


def denoising(unet, scheduler, batch, snr_gamma=0.0):
    """Add noise to latents, let the U-Net predict what is beneath it, and measure its error.

    Parameters
    ----------
    unet : torch.nn.Module
        Called as ``unet(noisy, timestep, encoder_hidden_states=None, class_labels=condition)``.
    scheduler : diffusers scheduler
        Gives the noise schedule and says what the U-Net predicts.
    batch : dict
        From `training_batch`.
    snr_gamma : float
        As in `FinetuneConfig`.

    Returns
    -------
    Denoising
        The loss of the batch is ``(weight * error).mean()``.
    """
    from diffusers.training_utils import compute_snr

    batch = {name: value.to(next(unet.parameters()).device) for name, value in batch.items()}
    latents, noise = batch["latents"], batch["noise"]
    t = (batch["t"] * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, t)
    out = unet(noisy, t, encoder_hidden_states=None, class_labels=batch["condition"]).sample.float()
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, t)
    else:
        target = {"epsilon": noise, "sample": latents}[kind]
    error = ((out - target) ** 2).mean(dim=(1, 2, 3))
    snr = compute_snr(scheduler, t)
    if snr_gamma > 0:
        weight = snr.clamp(max=snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1}.get(kind, 1.0)
    else:
        weight = snr.clamp(0.25, 4.0) if kind == "sample" else torch.ones_like(snr)
    return Denoising(
        error, weight, _vlb_weights(scheduler.alphas_cumprod.cpu(), kind).to(t.device)[t]
    )


def _vlb_weights(alphas_cumprod, kind):
    """Weigh the squared error at every timestep as the variational lower bound does.

    Half the fall of the signal-to-noise ratio from the step before, for an error of the latent
    (arXiv 2107.00630, eq. 13), turned into one of `kind`. The first step, where it is infinite,
    has the weight of the second, as in the baseline trainer (``lvlb_weights``).
    """
    alpha = alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    weights = 0.5 * (snr[:-1] - snr[1:])
    weights = torch.cat([weights[:1], weights])
    # the share of the latent's error in the error of what is predicted
    share = {"sample": torch.ones_like(snr), "epsilon": 1 / snr, "v_prediction": 1 - alpha}[kind]
    share[0] = share[1]
    return (weights * share).float()


def training_batch(data, config, step):
    """Draw the batch of a step: its content follows from the seed and the step alone.

    Parameters
    ----------
    data : dict of str to torch.Tensor
        One split of what `load_data` returns.
    config : FinetuneConfig
        Gives batch size, probabilities and seed.
    step : int
        Number of the step, from 0.

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
    dropped = (uniform() < config.conditioning_dropout)[:, None]
    latents = data["latents"][index]
    # one timestep in each of n equal bins: the loss of a batch varies less
    t = (torch.arange(n) + uniform()) / n
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=generator),
        "t": t,
        "condition": torch.where(dropped, data["empty"], condition),
    }


def _validation_batch(data, n, seed, condition="matched"):
    """Lay out the segments of a validation: the same timesteps and noise each time."""
    n = min(n, len(data["latents"]))
    index = torch.linspace(0, len(data["latents"]) - 1, n).long()
    generator = torch.Generator().manual_seed(seed)
    texts = data["text"][:, 0]
    matched = texts[data["clip"][index]]
    conditions = {
        "matched": lambda: matched,
        "mismatched": lambda: texts[(matched @ texts.T).argmin(dim=1)],
        "unconditional": lambda: data["empty"].expand(n, -1),
        "audio": lambda: data["audio"][index],
    }
    if condition not in conditions:
        raise TrainingError(f"condition must be one of {', '.join(conditions)}; got {condition!r}")
    return {
        "latents": data["latents"][index],
        "noise": torch.randn((n, *data["latents"].shape[1:]), generator=generator),
        # a stride coprime to n: neighbouring clips get distant timesteps
        "t": (torch.arange(n) * 37 % n + 0.5) / n if n % 37 else (torch.arange(n) + 0.5) / n,
        "condition": conditions[condition](),
    }


@torch.no_grad()
def fixed_losses(
    unet, scheduler, data, *, n=64, seed=0, condition="matched", batch_size=16, snr_gamma=0.0
):
    """Measure how well a U-Net denoises fixed segments under fixed noise: comparable numbers.

    Parameters
    ----------
    unet, scheduler, snr_gamma
        As for `denoising`.
    data : dict of str to torch.Tensor
        One split of what `load_data` returns.
    n : int
        At most this many segments, evenly spread over the split.
    seed : int
        Of the noise.
    condition : str
        ``"matched"``: the embedding of the clip's first caption; ``"mismatched"``: that of the clip
        whose caption is least like it; ``"unconditional"``: of the empty text; ``"audio"``: of the
        sound.
    batch_size : int
        Segments at once.

    Returns
    -------
    pandas.DataFrame
        One row per segment: ``t`` in [0, 1), ``error`` (mean squared), ``loss`` (weighted), ``vlb``.
    """
    batch = _validation_batch(data, n, seed, condition)
    training = unet.training
    unet.eval()
    rows = []
    for start in range(0, len(batch["t"]), batch_size):
        part = {name: value[start : start + batch_size] for name, value in batch.items()}
        found = denoising(unet, scheduler, part, snr_gamma)
        losses = found.weight * found.error, found.bound * found.error
        rows.append(torch.stack([found.error, *losses], dim=1).cpu())
    unet.train(training)
    table = pd.DataFrame(torch.cat(rows).double().numpy(), columns=["error", "loss", "vlb"])
    return table.assign(t=batch["t"].tolist())


# --- data ----------------------------------------------------------------------------------------


def load_data(pipe, config, clips=None, accelerator=None):
    """Compute, or read from the cache, all that the loop needs: latents and embeddings.

    Files of up to 64 clips each are named by the content that they were made from: a run that was
    killed here computes only what is missing, and runs of one ``cache_dir`` share them.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Of the configuration's checkpoint.
    config : FinetuneConfig
        Gives set, segments and cache.
    clips : pandas.DataFrame, optional
        ``split, path, caption, caption_2, …``, instead of the configuration's set.
    accelerator : accelerate.Accelerator, optional
        The processes that share the work; by default this one does it all.

    Returns
    -------
    dict of str to dict of torch.Tensor
        For ``"train"``, ``"val"`` and, if there is one, ``"test"``: ``latents`` [segments, channels,
        time, mel], ``audio`` [segments, dim], ``clip`` [segments], ``text`` [clips, captions, dim]
        (zero where a clip has fewer captions), ``n_text`` [clips]; and ``empty`` [1, dim].
    """
    from tqdm.auto import tqdm

    clips = _read_clips(config) if clips is None else clips
    folder = Path(config.cache_dir or _next_to(config, "cache"))
    made_from = [ldm.checkpoint_digest(ldm.resolve(config.checkpoint)), config.seed]
    made_from += [ldm.checkpoint_info(config.checkpoint)["audio_encoder"], _TRIES]
    jobs = {}
    for split, rows in clips.groupby("split", sort=False):
        for start in range(0, len(rows), _SHARD):
            part = rows.iloc[start : start + _SHARD]
            settings = [*made_from, config.segment_s, config.segments_per_clip, start]
            content = store.content_key(
                settings, [store.file_digest(path) for path in part["path"]]
            )
            make = _sound_tensors, (pipe, config, part, start)
            jobs[folder / f"{split}-{start:06d}-{content}.safetensors"] = split, make
        texts = rows[captions.caption_columns(rows)].fillna("")
        content = store.content_key(made_from, texts.to_numpy().tolist())
        make = _text_tensors, (pipe, texts)
        jobs[folder / f"{split}-text-{content}.safetensors"] = split, make
    if accelerator is not None and accelerator.num_processes > 1:
        for file in list(jobs)[accelerator.process_index :: accelerator.num_processes]:
            _cached(file, *jobs[file][1])
        accelerator.wait_for_everyone()
    parts = {split: {} for split in clips["split"]}
    for file, (split, make) in tqdm(jobs.items(), desc="latents", disable=None, leave=False):
        for name, value in _cached(file, *make).items():
            parts[split].setdefault(name, []).append(value)
    return {
        split: {name: torch.cat(values) for name, values in tensors.items()}
        for split, tensors in parts.items()
    }


def _cached(file, make, arguments):
    if file.is_file():
        try:
            return load_file(file)
        except SafetensorError as error:
            warnings.warn(f"{file}: damaged ({error}); made again", stacklevel=2)
    tensors = make(*arguments)
    store.write_atomic(file, save(tensors))
    return tensors


def _sound_tensors(pipe, config, rows, start):
    clap = ldm.load_clap(str(config.checkpoint))
    clap.audio_encoder.to(pipe.device)
    # each of the U-Net's levels but the last halves the latent once more
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    frames = max(1, round(config.segment_s * ldm.SAMPLE_RATE / ldm.HOP / unit)) * unit
    latents, sounds, owner = [], [], []
    for i, path in enumerate(rows["path"], start=start):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        # of a clip that is no longer than a segment there is only one
        for _ in range(config.segments_per_clip if len(y) > frames * ldm.HOP else 1):
            segment = audio.loudest_segment(y, frames * ldm.HOP, _TRIES, rng)
            latents.append(ldm.encode_mel(pipe, ldm.waveform_to_mel(segment, frames)[None]))
            sounds.append(ldm.embed_audio(clap, [segment], ldm.SAMPLE_RATE))
            owner.append(i)
    clap.audio_encoder.to("cpu")  # others share this tower
    return {"latents": torch.cat(latents), "audio": torch.cat(sounds), "clip": torch.tensor(owner)}


def _text_tensors(pipe, rows):
    texts = [[text for text in row if text] for row in rows.to_numpy().tolist()]
    widest = max(map(len, texts))
    padded = [row + [""] * (widest - len(row)) for row in texts]
    distinct = sorted({text for row in padded for text in row} | {""})
    vectors = dict(zip(distinct, ldm.embed_text(pipe, distinct), strict=True))
    return {
        "text": torch.stack([torch.stack([vectors[text] for text in row]) for row in padded]),
        "n_text": torch.tensor([len(row) for row in texts]),
        "empty": vectors[""][None].clone(),
    }


def _read_clips(config):
    """Read the set: ``split, path, caption, …``, the splits that are needed."""
    path = Path(config.dataset_root)
    clips = metadata.read_audiocaps(path) if path.suffix == ".json" else _captioned_table(path)
    for split in ("train", "val"):
        if not (clips["split"] == split).any():
            raise TrainingError(
                f"{path}: no clips in its split {split!r}; fine-tuning needs train and val"
            )
    splits = ("train", "val", "test") if config.test_segments else ("train", "val")
    return clips[clips["split"].isin(splits)].reset_index(drop=True)


def _captioned_table(path):
    clips = store.read_table(path)
    if missing := {"path", "caption"} - set(clips):
        raise TrainingError(
            f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(clips)}"
        )
    clips["path"] = [str(path.parent / name) for name in clips["path"]]
    source = clips.get("source_id", clips["path"])
    if "split" not in clips:
        # a place in [0, 1) for each source, which does not change when other sources come
        places = source.map(
            lambda name: int(store.content_key(Path(name).name, length=12), 16) / 16**12
        )
        clips["split"] = np.select([places < 0.1, places < 0.2], ["val", "test"], "train")
        if not (clips["split"] == "val").any():
            clips.loc[places == places.min(), "split"] = "val"
    faults = {
        "clips without a caption": clips["caption"].str.strip() == "",
        "paths that appear twice": clips["path"].duplicated(),
        "splits that are not train, val or test": ~clips["split"].isin(["train", "val", "test"]),
        "sources in more than one split": clips.groupby(source)["split"].transform("nunique") > 1,
    }
    for fault, rows in faults.items():
        if rows.any():
            shown = ", ".join(clips.loc[rows, "path"].head(3))
            raise TrainingError(f"{path}: {fault}, {rows.sum()} rows, such as {shown}")
    return clips


def _next_to(config, what):
    return Path(config.out_dir).with_name(f"{Path(config.out_dir).name}.{what}")


def _run_key(config, clips):
    """Identity of a run: its settings without places, its sounds by content, its checkpoint."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_TRAINED}
    texts = clips[["split", *captions.caption_columns(clips)]].fillna("").to_numpy().tolist()
    sounds = [store.file_digest(path) for path in clips["path"]]
    weights = ldm.checkpoint_digest(ldm.resolve(config.checkpoint))
    return store.content_key(settings, weights, texts, sounds)


# --- the state of a run --------------------------------------------------------------------------


class _Run:
    """What changes in training: weights, their average, optimiser, log and scores."""

    def __init__(self, pipe, data, clips, config, accelerator, key):
        self.pipe, self.data, self.clips, self.config = pipe, data, clips, config
        self.accelerator, self.key = accelerator, key
        self.unet, self.scheduler = pipe.unet.train(), pipe.scheduler
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        _set_trainable(self.unet, config)
        self.trained = {k: v for k, v in self.unet.named_parameters() if v.requires_grad}
        optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.ema, self.best = self.weights(), self.weights()
        self.step, self.best_step, self.log, self.scores = 0, 0, [], []
        self.embeddings = {}

    def weights(self):
        """A copy of the trained weights."""
        return {name: value.detach().clone() for name, value in self.trained.items()}

    @torch.no_grad()
    def load(self, weights):
        """Put weights in the place of the trained ones."""
        for name, value in self.trained.items():
            value.copy_(weights[name])

    @contextmanager
    def averaged(self, weights):
        """Put averaged weights in place for a while, to look at what they can."""
        raw = self.weights()
        self.load(weights)
        self.unet.eval()
        try:
            yield
        finally:
            self.unet.train()
            self.load(raw)

    @torch.no_grad()
    def average(self):
        """Move the average towards the weights of this step."""
        # diffusers' EMAModel, but for its first step, which would forget the start wholly
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.trained.items():
            self.ema[name].lerp_(value, 1 - decay)

    def parts(self, batch):
        """Deal a batch to processes and accumulated parts, each with timesteps of all kinds."""
        processes, place = self.accelerator.num_processes, self.accelerator.process_index
        count = processes * self.config.gradient_accumulation_steps
        for first in range(place, count, processes):
            yield {name: value[first::count] for name, value in batch.items()}

    @property
    def kept(self):
        """The weights that become the checkpoint, and their step."""
        return (self.best, self.best_step) if self.config.keep_best else (self.ema, self.step)

    def keep(self):
        """Leave the weights that are kept in the pipeline, adapters merged."""
        self.load(self.kept[0])
        if self.config.train == "lora":
            self.unet.fuse_lora()
            self.unet.unload_lora()

    def init_trackers(self):
        """Open TensorBoard's file, and W&B's; what a killed run wrote too late is not shown twice."""
        folder, config = _next_to(self.config, "logs"), self.config
        named = {"name": Path(config.out_dir).name, "id": self.key, "resume": "allow"}
        options = {
            "tensorboard": {"purge_step": self.step + 1 if self.step else None},
            "wandb": {**named, "dir": str(folder), "config": asdict(config)},
        }
        self.accelerator.init_trackers(config.wandb_project or "curves", init_kwargs=options)

    def validate(self, numbers, seconds):
        """Measure the weights and their average, write a row of the log, sample if it is time."""
        from accelerate.utils import broadcast_object_list

        rows = [self._row(numbers, seconds) if self.accelerator.is_main_process else None]
        # decisions are taken on the numbers of one process, or the others might differ
        (row,) = broadcast_object_list(rows)
        if not self.log or row["val_loss_ema"] < min(r["val_loss_ema"] for r in self.log):
            self.best, self.best_step = {k: v.clone() for k, v in self.ema.items()}, self.step
        self.log.append(row)
        if self.accelerator.is_main_process:
            store.write_table(
                pd.DataFrame(self.log), _next_to(self.config, "logs") / "training_log.csv"
            )
            self.accelerator.log(
                {k: v for k, v in row.items() if k != "step" and v == v}, self.step
            )
            if self._time_to_sample():
                self._score(self.ema, self.step)
        if not row["val_loss"] <= _DIVERGED * self.log[0]["val_loss"]:
            self._stop(
                f"training diverged: the validation loss is {row['val_loss']:.4g} at step "
                f"{self.step}, {self.log[0]['val_loss']:.4g} at the start"
            )

    def _row(self, numbers, seconds):
        means = np.mean(numbers or [[float("nan")] * 4], axis=0).tolist()
        row = {"step": self.step}
        row |= zip(("train_loss", "train_simple", "train_vlb"), means[:3], strict=True)
        row["val_loss"] = self._losses("val")["loss"].mean()
        if "test" in self.data:
            row["test_loss"] = self._losses("test")["loss"].mean()
        with self.averaged(self.ema):
            val = self._losses("val")
            row |= {"val_loss_ema": val["loss"].mean(), "val_simple_ema": val["error"].mean()}
            row["val_vlb_ema"] = val["vlb"].mean()
            row["val_audio_ema"] = self._losses("val", "audio")["loss"].mean()
            if "test" in self.data:
                row["test_loss_ema"] = self._losses("test")["loss"].mean()
        quarters = val["loss"].groupby((val["t"] * 4).astype(int)).mean().reindex(range(4))
        row |= {f"val_loss_t{i}": value for i, value in enumerate(quarters, 1)}
        row["learning_rate"] = _learning_rate(self.config, max(0, self.step - 1))
        row |= {"grad_norm": means[3], "seconds": round(seconds, 3)}
        done = len(numbers) * self.config.batch_size
        row["samples_per_s"] = round(done / seconds, 3) if seconds else 0.0
        return {name: float(value) if name != "step" else value for name, value in row.items()}

    def _losses(self, split, condition="matched"):
        config = self.config
        n = config.validation_segments if split == "val" else config.test_segments
        options = {"n": n, "seed": config.seed, "condition": condition}
        size = max(1, config.batch_size // config.gradient_accumulation_steps)
        options |= {"batch_size": size, "snr_gamma": config.snr_gamma}
        return fixed_losses(self.unet, self.scheduler, self.data[split], **options)

    def refuse_broken(self, loss, norm):
        """Stop where nothing can be learnt any more."""
        # in fp16 a gradient may overflow: the scaler leaves that step out and scales less
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler)):
            self._stop(f"the loss is not finite at step {self.step}")

    def _stop(self, what):
        files = sorted(self.states.glob("*.safetensors"))
        state = f"The last good state is {files[-1]}" if files else "No state had been saved"
        raise TrainingError(
            f"{what}. {state}; the same command goes on from there and meets the same batches, which "
            "helps after a fault of the machine only. Otherwise give a lower learning_rate (now "
            f"{self.config.learning_rate:g}) or max_grad_norm (now {self.config.max_grad_norm:g}): that "
            "is another run, which starts at step 0."
        )

    # --- samples

    def _time_to_sample(self):
        """At the start, at the end, and at the first validation after so many epochs."""
        if not self.config.sample_epochs:
            return False
        epoch = len(self.data["train"]["latents"]) / self.config.batch_size
        every = max(1.0, self.config.sample_epochs * epoch)
        before = self.log[-2]["step"] if len(self.log) > 1 else -every
        return self.step // every > before // every or self.step == self.config.steps

    def score_kept(self):
        """Score the weights that are kept, where they have no scores yet."""
        done = {row["step"] for row in self.scores}
        if (
            self.accelerator.is_main_process
            and self.config.sample_epochs
            and self.kept[1] not in done
        ):
            self._score(*self.kept)

    def _score(self, weights, step):
        """Generate fixed prompts with fixed seeds and score them against the validation clips."""
        from . import embeddings

        config, folder = self.config, _next_to(self.config, "logs")
        clips = self.clips[self.clips["split"] == "val"]
        prompts = _spread(clips["caption"].tolist(), config.n_samples)
        with self.averaged(weights):
            sounds, rate = _sample(self.pipe, config, prompts)
        for i, y in enumerate(sounds):
            path = folder / "samples" / f"step-{step:08d}" / f"{i:02d}.wav"
            audio.save_audio(path, y / max(1.0, float(np.abs(y).max())), rate)
        if not self.embeddings:  # opened once, and so is the reference embedded
            paths = _spread(clips["path"].tolist(), _REFERENCE_CLIPS)
            real = audio.excerpts(paths, config.segment_s)
            for item in config.sample_embeddings:
                name, path = (item, "") if isinstance(item, str) else item
                embedding = embeddings.get_embedding(name, path)
                rows = embedding.embed(real, ldm.SAMPLE_RATE, silence="allow")
                self.embeddings[name] = embedding, rows
        for name, (embedding, real) in self.embeddings.items():
            ours = {f"step {step}": embedding.embed(sounds, rate, silence="allow")}
            options = {"embedding": name, "repeats": 50, "seed": config.seed}
            table = fad.score_table(real, ours, **options).assign(reference="validation", step=step)
            self.scores += table.to_dict("records")
            numbers = {f"{row.metric}/{name}": row.value for row in table.itertuples()}
            self.accelerator.log(numbers, step)
        store.write_table(pd.DataFrame(self.scores), folder / "scores.csv")

    # --- states: safetensors, because accelerate's own save_state pickles

    @property
    def states(self):
        """Folder of the saved states."""
        return _next_to(self.config, "states") / self.key

    def save(self):
        """Write a state whole, then drop the oldest; the main process alone."""
        if not self.accelerator.is_main_process:
            return
        groups = {"model": self.weights(), "ema": self.ema, "best": self.best}
        for i, moments in self.optimizer.state_dict()["state"].items():
            groups[f"optimizer/{i}"] = moments
        tensors = {
            f"{group}:{k}": v.contiguous() for group in groups for k, v in groups[group].items()
        }
        scaler = self.accelerator.scaler
        note = {
            "step": self.step,
            "best_step": self.best_step,
            "log": self.log,
            "scores": self.scores,
        }
        note["scaler"] = scaler.state_dict() if scaler else {}
        file = self.states / f"step-{self.step:08d}.safetensors"
        store.write_atomic(file, save(tensors, {"note": json.dumps(note)}))
        for old in sorted(self.states.glob("step-*.safetensors"))[:-_STATES]:
            old.unlink()

    def restore(self):
        """Go on from the latest state that can be read."""
        for file in sorted(self.states.glob("step-*.safetensors"), reverse=True):
            try:
                with safe_open(file, framework="pt") as stored:
                    note = json.loads(stored.metadata()["note"])
                tensors = load_file(file, device=str(self.accelerator.device))
            except (SafetensorError, OSError, ValueError) as error:
                warnings.warn(f"{file}: damaged ({error}); trying the one before", stacklevel=2)
                continue
            groups = {}
            for name, value in tensors.items():
                group, _, rest = name.partition(":")
                groups.setdefault(group, {})[rest] = value
            self.load(groups["model"])
            self.ema, self.best = groups["ema"], groups["best"]
            state = self.optimizer.state_dict()
            moments = {int(g.partition("/")[2]): m for g, m in groups.items() if "/" in g}
            self.optimizer.load_state_dict(state | {"state": moments})
            if note["scaler"]:
                self.accelerator.scaler.load_state_dict(note["scaler"])
            self.step, self.best_step = note["step"], note["best_step"]
            self.log, self.scores = note["log"], note["scores"]
            return


def _set_trainable(unet, config):
    """Freeze what is not to be trained; add the adapters."""
    if config.train == "full":
        return
    layers = [name for name, _ in unet.named_parameters() if ".attn" in name]
    if not layers:
        raise TrainingError(f"train={config.train!r}: this U-Net has no attention layers")
    unet.requires_grad_(False)
    if config.train == "attention":
        for name in layers:
            unet.get_parameter(name).requires_grad_(True)
        return
    from peft import LoraConfig

    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    sizes = {"r": config.lora_rank, "lora_alpha": config.lora_rank}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        unet.add_adapter(LoraConfig(**sizes, init_lora_weights="gaussian", target_modules=layers))


def _spread(items, n):
    """Take at most `n` of a list, evenly over it."""
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, min(n, len(items)))]


def _sample(pipe, config, prompts):
    info, rate = ldm.checkpoint_info(config.checkpoint), pipe.vocoder.config.sampling_rate
    settings = {name: info[name] for name in ("steps", "guidance_scale", "eta")}
    settings["clips_per_pass"] = min(8, len(prompts))
    about = "audioldm", config.checkpoint, rate, settings, pipe
    model = generation.DiffusersBackend(*about, heard={}, takes_negative_prompts=True)
    seeds = [config.seed + i for i in range(len(prompts))]
    return model.generate(prompts, seeds, config.segment_s), rate


# --- the result ----------------------------------------------------------------------------------


def _finished(config, key):
    note = Path(config.out_dir) / "training.json"
    content = json.loads(note.read_text()) if note.is_file() else {}
    if content.get("key") != key:
        return None
    log, scores = pd.DataFrame(content["log"]), pd.DataFrame(content["scores"])
    return FinetuneResult(Path(config.out_dir), log, content["best_step"], scores)


def _save_result(run):
    config, start = run.config, Path(ldm.resolve(run.config.checkpoint))
    base = ldm.checkpoint_info(config.checkpoint)
    heard = {name: set(folds) for name, folds in base["heard"].items()}
    for name, folds in _heard(run.clips, config).items():
        heard[name] = heard.get(name, set()) | set(folds)
    heard = {name: sorted(folds) for name, folds in heard.items()}
    info = base | config.info | {"heard": heard}
    # a published tower that came from the hub is found there again
    comes_along = (start / "audio_encoder").is_dir()
    tower = ldm.load_clap(str(config.checkpoint)).audio_encoder if comes_along else None
    places = ("out_dir", "dataset_root", "cache_dir")
    settings = asdict(config) | {name: Path(getattr(config, name)).name for name in places}
    settings["checkpoint"] = _base_name(config.checkpoint)
    training = {"key": run.key, "best_step": run.best_step, "config": settings, "log": run.log}
    training["scores"] = run.scores
    texts = {"training.json": json.dumps(training), ldm.CARD_FILE: _card(run, info)}
    run.unet.eval()
    ldm.save_checkpoint(run.pipe, config.out_dir, info, tower, extra=texts)


def _heard(clips, config):
    """The training folds by data set: as the configuration says, else as the table does."""
    if "heard" in config.info or not {"dataset", "fold"} <= set(clips):
        return config.info.get("heard", {})
    train = clips[clips["split"] == "train"]
    return {name: [int(f) for f in part["fold"]] for name, part in train.groupby("dataset")}


def _card(run, info):
    """Write the model card: data, licence, steps, scores with floors."""
    config, first, kind = run.config, run.log[0], run.scheduler.config.prediction_type
    kept = next(row for row in run.log if row["step"] == run.kept[1])
    weights = "weighted by the SNR clamped to [0.25, 4]" if kind == "sample" else "unweighted"
    losses = [
        f"- {what} loss: {first[column]:.4f} before, {kept[column]:.4f} at step {kept['step']}."
        for what, column in (("Validation", "val_loss_ema"), ("Test", "test_loss_ema"))
        if column in first
    ]
    counts = run.clips["split"].value_counts()
    licence = _licence(config.checkpoint)
    trained = {
        "full": "The whole U-Net",
        "attention": "The attention of the U-Net",
        "lora": f"Low-rank adapters (rank {config.lora_rank}) of the attention, merged",
    }
    return _CARD.read_text(encoding="utf-8").format(
        **{"config": config, "info": info, "kept": kept, "kind": kind, "licence": licence},
        base=_base_name(config.checkpoint),
        name=Path(config.out_dir).name,
        licence_id=licence.split(" (")[0].lower().replace(" ", "-"),
        data_licence=config.data_licence or "not stated",
        heard=ldm.format_heard(info["heard"]) or "not stated",
        clips="\n".join(f"- {split}: {n} clips" for split, n in counts.items()),
        trained=trained[config.train],
        weights=f"min-SNR weights with gamma {g:g}" if (g := config.snr_gamma) else weights,
        losses="\n".join(losses),
        scores=_score_lines(pd.DataFrame([r for r in run.scores if r["step"] == kept["step"]])),
    )


def _base_name(checkpoint):
    """Name a checkpoint without a place of this machine; a hub name as a whole."""
    at_the_hub = checkpoint != "builtin" and not Path(checkpoint).exists()
    return checkpoint if at_the_hub else Path(checkpoint).name


def _licence(checkpoint):
    """Find the licence of the checkpoint that training starts from: as known, or in its card."""
    known = generation.CHECKPOINTS["licence"].get(str(checkpoint))
    card = Path(ldm.resolve(checkpoint)) / ldm.CARD_FILE
    lines = card.read_text().splitlines() if card.is_file() else []
    said = [line.removeprefix("license:").strip() for line in lines if line.startswith("license:")]
    return known or next(iter(said), "unknown")


def note_scores(checkpoint, scores):
    """Put scores into a model card, in place of what stands under its "Scores".

    Parameters
    ----------
    checkpoint : str or Path
        Folder that `finetune` has made.
    scores : pandas.DataFrame
        From `fad.score_table`, or several of them concatenated.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    TrainingError
        A folder without such a card.
    """
    card = Path(checkpoint) / ldm.CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head, title, rest = text.partition("## Scores\n")
    if not title:
        raise TrainingError(f"{card}: no model card with a part '## Scores'; finetune writes one")
    _, use, tail = rest.partition("## ")
    return store.write_atomic(card, f"{head}{title}\n{_score_lines(scores)}\n\n{use}{tail}")


def _score_lines(scores):
    if not len(scores):
        return "No samples were scored."
    return "\n".join(
        f"- {r.metric} in {r.embedding}, {r.candidate} against {r.reference} (n {r.n}): {r.score}; "
        f"floor, real against real (n {r.floor_n}): {r.floor}"
        for r in fad.score_lines(scores).itertuples()
    )


# --- configuration -------------------------------------------------------------------------------


def _check(config):
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise TrainingError(f"{name} must be one of {known}; got {getattr(config, name)!r}")
    for name, bound in _AT_LEAST.items():
        if not getattr(config, name) >= bound:
            raise TrainingError(f"{name} must be at least {bound}; got {getattr(config, name)}")
    for name in _SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise TrainingError(f"{name} must be from 0 to 1; got {getattr(config, name)}")
    if not config.max_grad_norm > 0:
        raise TrainingError(
            f"max_grad_norm must be above 0, or nothing is trained; got {config.max_grad_norm}. To "
            "clip nothing, give a large number"
        )
    if config.sample_epochs and config.n_samples < 2:
        raise TrainingError("a score needs two samples or more: raise n_samples")


def read_config(file, changes=()):
    r"""Read a configuration from a YAML file.

    Parameters
    ----------
    file : str or Path
        Names of `FinetuneConfig` and their values.
    changes : sequence of (str, str)
        Names and values, as YAML, that replace those of the file.

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
    import difflib

    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
        values |= {name: yaml.safe_load(value) for name, value in changes}
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise TrainingError(f"{file}: not a YAML file of names and values ({error})") from error
    known = {f.name: f for f in fields(FinetuneConfig)}
    for name in values.keys() - known.keys():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TrainingError(f"{file}: unknown name {name!r}{hint} Known: {', '.join(known)}")
    if missing := [n for n in ("checkpoint", "dataset_root", "out_dir") if n not in values]:
        raise TrainingError(f"{file}: {', '.join(missing)} must be given")
    return FinetuneConfig(**{name: _typed(known[name], value) for name, value in values.items()})


def _typed(option, value):
    # YAML reads 1e-4 as a text
    wanted, got = option.type, value
    try:
        if wanted in (int, float) and not isinstance(value, bool):
            got = wanted(float(value))
        elif wanted is tuple and isinstance(value, list):
            got = tuple(value)
    except (TypeError, ValueError):
        pass
    if not isinstance(got, wanted) or (wanted is int and got != float(value)):
        raise TrainingError(f"{option.name} must be {wanted.__name__}; got {value!r}")
    return got
