"""The trainer: the U-Net of AudioLDM or AudioLDM 2 on the latents of captioned sounds.

`_train` is the loop, and reads as diffusers' training examples do; what a step sees (latents and
conditions) is made once, by `load_data`. What is drawn at a step (clips, noise, timesteps, dropped
conditions) follows from the seed and the number of the step: a run that was killed continues the
sequence it would have had, and several processes share the batch that one would have drawn.

On one device, and on several (on CPUs too)::

    python -m soundscapes_utils finetune config.yaml -p steps 2000
    accelerate launch --multi_gpu --num_processes 2 -m soundscapes_utils finetune config.yaml
"""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import audio, captions, conditioning, datasets, embeddings, fad, ldm, metadata, mixing, store

_CARD = Path(__file__).with_name("finetuned_card.md")
CLIPS_PER_FILE = 64  # of latents in the cache; a killed run loses at most these
_REFERENCE_CLIPS = 512  # of the validation split, for scores: more gain little and take long
_DIVERGED = 10.0  # times the validation loss of the start is not training any more
# where things lie, what is said of them, how memory is saved: a run goes on when these change
_NOT_TRAINED = {"out_dir", "dataset_root", "checkpoint", "cache_dir", "wandb_project"}
_NOT_TRAINED |= {"data_licence", "gradient_accumulation_steps", "gradient_checkpointing"}


class TrainingError(store.DataError):
    """Training that cannot start or go on."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What `finetune` is to do; names as in diffusers' examples.

    - ``checkpoint``: where to start: "builtin", a folder or a hub name of AudioLDM or AudioLDM 2.
    - ``dataset_root``: a set of captioned sounds, as `metadata.read_clips` takes it, or a plan of mixes
      that nobody made: they are made as they are encoded, 64 at a time, at the checkpoint's rate.
    - ``out_dir`` becomes a diffusers folder; next to it lie curves and samples (``<name>.logs``),
      resumable states (``<name>.states``) and latents and embeddings (``<name>.cache``, or
      ``cache_dir``, which several runs can share).
    - ``steps`` of the optimiser, ``batch_size`` over all processes and ``gradient_accumulation_steps``.
    - ``learning_rate``: peak of AdamW, after ``lr_warmup_steps``; from the fraction ``decay_start`` of
      the steps on it falls to zero on a cosine (1: constant, as in the baseline trainer).
      ``max_grad_norm``: the norm to which gradients are clipped. ``ema_decay`` of the averaged weights,
      which are what is saved.
    - ``train``: "full" (all weights of the U-Net, "auto" for AudioLDM); "attention" (its attention
      layers); "lora" (adapters of ``lora_rank`` there, kept beside the merged weights; for AudioLDM 2).
    - ``mixed_precision``: "no", "bf16" or (on a GPU) "fp16", for autocast; weights stay float32.
      ``gradient_checkpointing``: less memory, about a third slower.
    - ``snr_gamma`` above 0: min-SNR weights of the loss (5 in its paper).
    - ``text_condition_probability``: how often the condition is the caption's, not the sound's: 0 in
      AudioLDM's own training, 0.5 where texts and sounds lie far apart, as in the small CLAP of the
      built-in checkpoint; always for AudioLDM 2. ``conditioning_dropout``: how often the empty text's.
    - ``segment_s``: seconds of a segment, rounded to what the U-Net can halve; ``segments_per_clip``,
      each the loudest of four random positions (one of a clip that is no longer).
    - ``validation_steps`` between validations and saved states, over at most ``validation_segments``,
      each at its own fixed timestep and noise. The loss of ``test_segments`` decides nothing (0: no test
      split). ``keep_best``: save the averaged weights of the lowest validation loss, else the last ones.
    - ``sample_epochs``: passes over the training segments between samples of ``n_watched`` captions of
      the validation split, always with the same seeds, scored in ``sample_embeddings`` (names, or names
      and paths, for `embeddings.get_embedding`); 0: never.
    - ``wandb_project``: also log there. ``data_licence``: for the card. ``seed``: of all that is drawn.
    - ``info`` for the checkpoint's note: ``training_dataset`` in words; ``heard``, the training folds by
      data set, to which the start's are added.
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
    train: str = "auto"
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
    n_watched: int = 16
    sample_embeddings: tuple = ("logmel-stats",)
    wandb_project: str = ""
    cache_dir: str = ""
    data_licence: str = ""
    seed: int = 0
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    - ``checkpoint``: a folder that ``from_pretrained`` of the pipeline of its start opens.
    - ``log``, one row per validation: ``step``; ``train_loss``, ``train_simple`` (without the weights of
      the timesteps), ``train_vlb``, ``grad_norm`` (before clipping), means since the row before;
      ``val_loss`` of the raw and ``val_loss_ema`` of the averaged weights, likewise ``test_…``;
      ``val_simple_ema``, ``val_vlb_ema``; ``val_audio_ema``, under the sounds' embeddings instead of the
      captions' (AudioLDM); ``val_loss_t1`` to ``val_loss_t4``, from clean timesteps to noisy ones.
    - ``best_step``: of the lowest validation loss of the averaged weights.
    - ``scores``: FAD and KAD of the samples (see `fad.score_table`), and their ``step``.
    """

    checkpoint: Path
    log: pd.DataFrame
    best_step: int
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)


# --- train ---------------------------------------------------------------------------------------


def finetune(config):
    """Train the U-Net of a checkpoint on captioned sounds; resume where a killed run stopped.

    The objective is L(θ) of AudioLDM (arXiv 2301.12503, eq. 4) for checkpoints that predict the noise
    or the velocity (arXiv 2202.00512); one that predicts the latent itself is weighted by its SNR
    clamped to [0.25, 4]. With ``snr_gamma`` any of them is weighted as in min-SNR (arXiv 2303.09556).
    The same configuration and data continue or return what is there; others start again.

    Returns
    -------
    FinetuneResult
        The averaged weights in diffusers' format, with a model card; log and scores.

    Raises
    ------
    TrainingError
        The configuration is wrong, the set has no training or validation clips, or the loss is no longer
        finite or diverges; the message names the remedy and the last good state.

    >>> finetune(FinetuneConfig("builtin", "set.csv", "out", steps=100)).log  # doctest: +SKIP
    """
    config = _check(config)
    clips = _read_clips(config)
    key = _run_key(config, clips)
    if result := _finished(config, key):
        return result
    clips = _usable(config, clips)
    accelerator = _accelerator(config)
    pipe = ldm.load_pipeline(config.checkpoint, str(accelerator.device))
    data = load_data(pipe, config, clips, accelerator)
    run = _Run(pipe, data, clips, config, accelerator, key)
    _train(run)
    if accelerator.is_main_process:
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
        numbers.append([*losses, float(norm)])
        seen = losses[:1] if accelerator.scaler else numbers[-1]  # fp16 skips gradients that overflow
        run.refuse(not np.isfinite(seen).all(), "the loss is not finite")
        run.step += 1
        bar.update()
        if run.step % config.validation_steps == 0 or run.step == config.steps:
            run.validate(numbers, time.monotonic() - started)
            run.save()
            numbers, started = [], time.monotonic()
    bar.close()
    scored = {row["step"] for row in run.scores} if config.sample_epochs else {run.kept[1]}
    if accelerator.is_main_process and run.kept[1] not in scored:
        run.score(*run.kept)


def launch(config, processes=1):
    """Fine-tune in several processes, as `accelerate launch` would, each on a GPU or all on the CPU."""
    if processes == 1:
        return finetune(config)
    gpus = torch.cuda.device_count()
    if processes < 1 or 0 < gpus < processes:
        raise TrainingError(f"processes must be 1 or more, one per GPU ({gpus}); got {processes}")
    text = json.dumps(asdict(config), indent=2)  # which is YAML too
    file = store.write_atomic(_next_to(config, "logs") / "config.yaml", text)
    # with --cpu accelerate starts one process only; the trainer itself sees that there is no GPU
    words = f"-m accelerate.commands.launch --multi_gpu --num_processes {processes}"
    words += " --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, *words.split(), "-m", "soundscapes_utils", "finetune", str(file)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ours = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    ours |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    ours["PYTHONIOENCODING"] = "utf-8"
    pipes, lines = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, []
    with subprocess.Popen(command, env=ours, encoding="utf-8", **pipes) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.strip())
        except BaseException:
            process.terminate()  # an interrupted notebook leaves no training behind
            raise
    if process.returncode:
        errors = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        raise TrainingError(f"processes ended in status {process.returncode}: {' '.join(errors)}")
    return finetune(config)  # which reads what they have left


def _accelerator(config):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # two runs in one process may differ in their precision
    # samples and validations keep the others waiting for longer than the usual ten minutes
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    options = {"mixed_precision": config.mixed_precision, "project_dir": _next_to(config, "logs")}
    options["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    options["log_with"] = ["tensorboard", *(["wandb"] if config.wandb_project else [])]
    options |= {"cpu": not torch.cuda.is_available(), "kwargs_handlers": [waits]}
    accelerator = Accelerator(**options)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise TrainingError(f"batch_size {config.batch_size} must be a multiple of its {parts} parts")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("mixed_precision fp16 needs a GPU; bf16 works on a CPU too")
    return accelerator


def _learning_rate(config, step):
    """Learning rate of a step: linear warm-up, constant, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    start = config.decay_start * config.steps
    done = min(1.0, max(0.0, step + 1 - start) / max(1.0, config.steps - start))
    fall = 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * warm * fall


# --- the loss ------------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """Per sample: mean squared error, its weight in the loss, and in the variational bound (nats)."""

    error: torch.Tensor
    weight: torch.Tensor
    bound: torch.Tensor


def denoising(unet, scheduler, batch, snr_gamma=0.0):
    """Add noise to latents, let the U-Net predict what is beneath it, and measure its error.

    The loss of a batch (from `training_batch`) is ``(weight * error).mean()`` of the `Denoising`.
    """
    from diffusers.training_utils import compute_snr

    batch = {name: value.to(next(unet.parameters()).device) for name, value in batch.items()}
    latents, noise = batch["latents"], batch["noise"]
    t = (batch["t"] * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, t)
    out = unet(noisy, t, **conditioning.unet_inputs(unet, batch["condition"])).sample.float()
    kind = scheduler.config.prediction_type
    velocity = scheduler.get_velocity(latents, noise, t)
    target = {"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind]
    error = ((out - target) ** 2).mean(dim=(1, 2, 3))
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(0.25, 4.0) if kind == "sample" else torch.ones_like(snr)
    if snr_gamma > 0:
        weight = snr.clamp(max=snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1}.get(kind, 1.0)
    return Denoising(error, weight, _vlb_weights(scheduler.alphas_cumprod.cpu(), kind).to(t.device)[t])


def _vlb_weights(alphas_cumprod, kind):
    """Weigh the squared error at every timestep as the variational lower bound does.

    Half the fall of the SNR (arXiv 2107.00630, eq. 13), for an error of `kind`; at 0 as at 1, not ∞.
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
    """Draw the batch of a step: its content follows from the seed and the step (from 0) alone.

    ``latents``, ``noise`` of their shape, ``t`` in [0, 1) and ``condition`` [batch, …] (see
    `conditioning`), from one split of what `load_data` returns.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    n = config.batch_size

    uniform = functools.partial(torch.rand, n, generator=generator)
    index = torch.randint(len(data["latents"]), (n,), generator=generator)
    clip = data["clip"][index]
    which = (uniform() * data["n_text"][clip]).long()
    as_text = uniform() < config.text_condition_probability
    dropped = uniform() < config.conditioning_dropout
    condition = conditioning.chosen(data, index, which, as_text, dropped)
    latents = data["latents"][index]
    # one timestep in each of n equal bins: the loss of a batch varies less
    t = (torch.arange(n) + uniform()) / n
    noise = torch.randn(latents.shape, generator=generator)
    return {"latents": latents, "noise": noise, "t": t, "condition": condition}


@torch.no_grad()
def fixed_losses(
    unet, scheduler, data, *, n=64, seed=0, condition="matched", batch_size=16, snr_gamma=0.0
):
    """Measure how well a U-Net denoises fixed segments under fixed noise: comparable numbers.

    At most `n` segments, evenly spread over one split of `load_data`. `condition` is
    ``"matched"``, that of the clip's first caption; ``"mismatched"``, of the caption least like it;
    ``"unconditional"``, of the empty text; ``"audio"``, of the sound (AudioLDM). Returns one row per
    segment: ``t`` in [0, 1), ``error`` (mean squared), ``loss`` (weighted), ``vlb``, and its ``clip``.
    """
    n = min(n, len(data["latents"]))
    index = torch.linspace(0, len(data["latents"]) - 1, n).long()
    conditions = conditioning.conditions_of(data, index)
    if condition not in conditions:
        raise TrainingError(f"condition must be one of {', '.join(conditions)}; got {condition!r}")
    shape, generator = (n, *data["latents"].shape[1:]), torch.Generator().manual_seed(seed)
    # a stride coprime to n: neighbouring clips get distant timesteps
    t = (torch.arange(n) * (37 if n % 37 else 1) % n + 0.5) / n
    batch = {"latents": data["latents"][index], "noise": torch.randn(shape, generator=generator)}
    batch |= {"t": t, "condition": conditions[condition]}
    training, rows = unet.training, []
    unet.eval()
    for start in range(0, n, batch_size):
        part = {name: value[start : start + batch_size] for name, value in batch.items()}
        found = denoising(unet, scheduler, part, snr_gamma)
        losses = found.error, found.weight * found.error, found.bound * found.error
        rows.append(torch.stack(losses, dim=1).cpu())
    unet.train(training)
    table = pd.DataFrame(torch.cat(rows).double().numpy(), columns=["error", "loss", "vlb"])
    return table.assign(t=t.tolist(), clip=data["clip"][index].tolist())


# --- data ----------------------------------------------------------------------------------------


def load_data(pipe, config, clips=None, accelerator=None):
    """Compute, or read from the cache, all that the loop needs: latents and conditions.

    By default of the set of a `FinetuneConfig`, else of `clips` with ``split, path, caption, …``; `pipe`
    is the pipeline of its checkpoint. An accelerate.Accelerator shares the work among its processes.

    For each split: ``latents`` [segments, channels, time, mel], ``clip`` [segments], ``caption`` [clips,
    captions], rows of ``text``, of which ``n_text`` [clips] are there; for all of them ``text``,
    ``empty`` and ``empty_of`` of `conditioning.text_tensors`; for AudioLDM ``audio`` [segments, dim].
    """
    from tqdm.auto import tqdm

    clips = _usable(config, _read_clips(config)) if clips is None else clips
    folder, clips = _cache(config), clips.assign(digest=_digests(config, clips))
    tower = ldm.local_folder(ldm.checkpoint_info(config.checkpoint)["audio_encoder"])
    made_from = [ldm.checkpoint_digest(ldm.resolve(config.checkpoint)), ldm.checkpoint_digest(tower)]
    made_from += [ldm.load_clap(str(config.checkpoint)).front_end, config.seed, ldm.TRIES]
    made_from += [config.segment_s, config.segments_per_clip]
    words = clips[captions.caption_columns(clips)].fillna("").map(str.strip).to_numpy(str)
    words = np.take_along_axis(words, np.argsort(words == "", axis=1, kind="stable"), axis=1)
    texts, numbers = np.unique(words, return_inverse=True)
    file = folder / f"captions-{store.content_key(made_from, texts.tolist())}.safetensors"
    jobs = {file: ("", conditioning.text_tensors, (pipe, texts.tolist()))}
    for split, rows in clips.groupby("split", sort=False):
        for start in range(0, len(rows), CLIPS_PER_FILE):
            part = rows.iloc[start : start + CLIPS_PER_FILE]
            content = store.content_key(made_from, start, part["digest"].tolist())
            file = folder / f"{split}-{start:06d}-{content}.safetensors"
            reading = part, file.with_suffix(".mixes"), conditioning.sound_tensors, pipe, config, start
            jobs[file] = split, _read_sounds, reading
    if accelerator is not None and accelerator.num_processes > 1:
        for file in list(jobs)[accelerator.process_index :: accelerator.num_processes]:
            conditioning.cached_tensors(file, *jobs[file][1:])
        accelerator.wait_for_everyone()
    parts = {}
    for file, (split, *make) in tqdm(jobs.items(), desc="latents", disable=None, leave=False):
        parts.setdefault(split, []).append(conditioning.cached_tensors(file, *make))
    # a copy: what safetensors reads stays in the file
    shared = {name: value.clone() for name, value in parts.pop("")[0].items()}
    for split, made in parts.items():
        rows = (clips["split"] == split).to_numpy()
        shared |= {"caption": torch.tensor(numbers[rows])}
        shared |= {"n_text": torch.tensor((words[rows] != "").sum(axis=1))}
        parts[split] = shared | {k: torch.cat([part[k] for part in made]) for k in made[0]}
    return parts


def _planned(clips):
    """Whether these are mixes that were planned, and none of them made."""
    return "foreground" in clips and not clips["path"].map(os.path.exists).any()


def _read_sounds(clips, folder, read, *arguments):
    """Call `read` with paths; mixes that are only planned lie in `folder` until it is done."""
    if not _planned(clips):
        return read(clips["path"], *arguments)
    found = read(mixing.render_mixes(clips, folder, ldm.SAMPLE_RATE)["path"], *arguments)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _read_clips(config):
    """Read the set: ``split, path, caption, …`` of the splits that are needed."""
    clips = metadata.read_clips(config.dataset_root)
    splits = ("train", "val", "test") if config.test_segments else ("train", "val")
    return clips[clips["split"].isin(splits)].reset_index(drop=True)


def _usable(config, clips):
    """Set aside what cannot be trained on, with reasons in ``<out_dir>.logs/set_aside.csv``."""
    worded = clips[captions.caption_columns(clips)].fillna("").map(str.strip).any(axis=1)
    read = clips[["foreground", "background"] if _planned(clips) else ["path"]]
    files = pd.DataFrame({"path": pd.unique(read.to_numpy().ravel())})
    find = functools.partial(_fault, known=store.Records(_cache(config), "faults"))
    with ThreadPoolExecutor() as pool:
        files["fault"] = list(pool.map(find, files["path"], _digests(config, files)))
    faults = read.map(files.set_index("path")["fault"].get).max(axis=1)
    faults = np.where(worded, faults, "has no caption")
    why = ""
    if (bad := faults != "").any():
        aside = clips.loc[bad, ["split", "path"]].assign(reason=faults[bad])
        file = store.write_table(aside, _next_to(config, "logs") / "set_aside.csv")
        why = f"{len(aside)} of {len(clips)} clips are set aside, see {file} ({faults[bad][0]})"
        warnings.warn(why, stacklevel=3)
        clips = clips[~bad].reset_index(drop=True)
    if missing := sorted({"train", "val"} - set(clips["split"])):
        raise TrainingError(f"{config.dataset_root}: no clips in its split {missing[0]!r} {why}".strip())
    return clips


def _fault(path, digest, known):
    """Why a sound cannot be trained on, or nothing; what was read whole before is not read again."""
    if digest in known.entries:
        return ""
    if not (fault := audio.find_fault(path)):
        known.add(digest, {})
    return fault


def _digests(config, clips):
    """Digests of sounds, in the clips' order; of one that is not there, an empty one."""
    known = store.Records(_cache(config), "digests")
    if _planned(clips):
        return mixing.recipe_keys(clips, ldm.SAMPLE_RATE, known)
    return [store.known_digest(p, known) if Path(p).is_file() else "" for p in clips["path"]]


def _cache(config):
    return Path(config.cache_dir or _next_to(config, "cache"))


def _next_to(config, what):
    return Path(config.out_dir).with_name(f"{Path(config.out_dir).name}.{what}")


def _run_key(config, clips):
    """Identity of a run: its settings without places, its sounds by content, its checkpoint."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_TRAINED}
    texts = clips[["split", *captions.caption_columns(clips)]].fillna("").to_numpy().tolist()
    weights = ldm.checkpoint_digest(ldm.resolve(config.checkpoint))
    return store.content_key(settings, weights, texts, _digests(config, clips))


# --- the state of a run --------------------------------------------------------------------------


class _Run:
    """What changes in training: weights, their average, optimiser, log and scores."""

    def __init__(self, pipe, data, clips, config, accelerator, key):
        self.pipe, self.data, self.clips, self.config = pipe, data, clips, config
        self.accelerator, self.key, self.scheduler = accelerator, key, pipe.scheduler
        self.state = _next_to(config, "states") / f"{key}.safetensors"
        self.unet, self.embeddings = pipe.unet.train(), {}
        if config.gradient_checkpointing:
            ldm.checkpoint_gradients(self.unet)
        ldm.set_trainable(self.unet, config)
        self.trained = {k: v for k, v in self.unet.named_parameters() if v.requires_grad}
        optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.ema, self.best = self.weights(), self.weights()
        self.step, self.best_step, self.log, self.scores = 0, 0, [], []
        self.info = _info(config, clips)

    def weights(self):
        return {name: value.detach().clone() for name, value in self.trained.items()}

    @torch.no_grad()
    def load(self, weights):
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
        # diffusers' EMAModel, but for its first step, which would forget the start wholly
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.trained.items():
            self.ema[name].lerp_(value, 1 - decay)

    def parts(self, batch):
        """Deal a batch to processes and accumulated parts, each with timesteps of all kinds."""
        n, first = self.accelerator.num_processes, self.accelerator.process_index
        count = n * self.config.gradient_accumulation_steps
        for start in range(first, count, n):
            yield {name: value[start::count] for name, value in batch.items()}

    @property
    def kept(self):
        """The weights that become the checkpoint, and their step."""
        return (self.best, self.best_step) if self.config.keep_best else (self.ema, self.step)

    def init_trackers(self):
        """Open TensorBoard's file, and W&B's; what a killed run wrote too late is not shown twice."""
        config, folder = self.config, str(_next_to(self.config, "logs"))
        name, curves = (Path(config.out_dir).name, {"purge_step": self.step + 1 if self.step else None})
        wandb = {"name": name, "id": self.key, "resume": "allow", "dir": folder}
        options = {"wandb": wandb | {"config": asdict(config)}, "tensorboard": curves}
        self.accelerator.init_trackers(config.wandb_project or "curves", init_kwargs=options)

    def validate(self, numbers, seconds):
        """Measure the weights and their average, write a row of the log, sample if it is time."""
        from accelerate.utils import broadcast_object_list

        # decisions are taken on the numbers of one process, or the others might differ
        main = self.accelerator.is_main_process
        (row,) = broadcast_object_list([self._row(numbers, seconds) if main else None])
        if not self.log or row["val_loss_ema"] < min(r["val_loss_ema"] for r in self.log):
            self.best, self.best_step = {k: v.clone() for k, v in self.ema.items()}, self.step
        self.log.append(row)
        if main:
            table = pd.DataFrame(self.log)
            store.write_table(table, _next_to(self.config, "logs") / "training_log.csv")
            self.accelerator.log(table.iloc[-1].drop("step").dropna().to_dict(), self.step)
            if self.config.sample_epochs and self._time_to_sample():
                self.score(self.ema, self.step)
        loss, first = row["val_loss"], self.log[0]["val_loss"]
        broken = not loss <= _DIVERGED * first
        self.refuse(broken, f"training diverged: validation loss {loss:.4g}, once {first:.4g},")

    def _row(self, numbers, seconds):
        raw = {split: self._losses(split)["loss"].mean() for split in self.data if split != "train"}
        with self.averaged(self.ema):
            tables = {split: self._losses(split) for split in raw}
            has_sounds = "audio" in self.data["val"]
            sounds = self._losses("val", condition="audio")["loss"].mean() if has_sounds else math.nan
        val, done = tables["val"], len(numbers) * self.config.batch_size
        means = np.mean(numbers or [[math.nan] * 4], axis=0)
        names = "train_loss", "train_simple", "train_vlb", "grad_norm"
        row = dict(zip(names, means, strict=True))
        row |= {f"{split}_loss": loss for split, loss in raw.items()}
        row |= {f"{split}_loss_ema": table["loss"].mean() for split, table in tables.items()}
        row |= {"val_simple_ema": val["error"].mean(), "val_vlb_ema": val["vlb"].mean()}
        quarters = val["loss"].groupby((val["t"] * 4).astype(int)).mean().reindex(range(4))
        row |= {f"val_loss_t{i}": value for i, value in enumerate(quarters, 1)}
        row["learning_rate"] = _learning_rate(self.config, max(0, self.step - 1))
        row |= {"val_audio_ema": sounds, "seconds": round(seconds, 3)}
        row["samples_per_s"] = round(done / seconds, 3) if done else 0.0
        return {"step": self.step} | {name: float(value) for name, value in row.items()}

    def _losses(self, split, **options):
        config = self.config
        n = config.validation_segments if split == "val" else config.test_segments
        options |= {"n": n, "seed": config.seed, "snr_gamma": config.snr_gamma}
        options["batch_size"] = max(1, config.batch_size // config.gradient_accumulation_steps)
        return fixed_losses(self.unet, self.scheduler, self.data[split], **options)

    def refuse(self, broken, what):
        """Stop where nothing can be learnt any more; the message says how to go on."""
        if not broken:
            return
        state, config = self.state if self.state.is_file() else "the start", self.config
        raise TrainingError(
            f"{what} at step {self.step}. The last good state is {state}; the same command goes on from "
            "there, which helps after a fault of the machine only. "
            f"Otherwise give a lower learning_rate (now {config.learning_rate:g}) or max_grad_norm (now "
            f"{config.max_grad_norm:g}): that is another run, which starts at step 0."
        )

    def _time_to_sample(self):
        """At the start, at the end, and at the first validation after so many epochs."""
        epoch = len(self.data["train"]["latents"]) / self.config.batch_size
        every = max(1.0, self.config.sample_epochs * epoch)
        before = self.log[-2]["step"] if len(self.log) > 1 else -every
        return self.step // every > before // every or self.step == self.config.steps

    def score(self, weights, step):
        """Generate fixed prompts with fixed seeds and score them against the validation clips."""
        config, folder = self.config, _next_to(self.config, "logs")
        clips = self.clips[self.clips["split"] == "val"]
        shown = _spread(clips, _REFERENCE_CLIPS)
        sources = shown.get("source_id", shown["path"]).tolist()
        options = {"groups": {"real": sources}, "repeats": 50, "seed": config.seed}
        if not self.embeddings:  # opened once, and so is the reference embedded
            real = _read_sounds(shown, folder / "mixes", audio.excerpts, config.segment_s)
            for item in config.sample_embeddings:
                ruler = embeddings.get_embedding(*[item] if isinstance(item, str) else item)
                self.embeddings[ruler.name] = ruler, ruler.embed(real, ldm.SAMPLE_RATE, silence="allow")
        with self.averaged(weights):
            sounds, rate = _sample(
                self.pipe, config, _spread(clips, config.n_watched)["caption"].tolist()
            )
        for i, y in enumerate(sounds):
            file = folder / "samples" / f"step-{step:08d}" / f"{i:02d}.wav"
            audio.save_audio(file, y / max(1.0, float(np.abs(y).max())), rate)
        for name, (network, real) in self.embeddings.items():
            ours = {f"step {step}": network.embed(sounds, rate, silence="allow")}
            table = fad.score_table(real, ours, embedding=name, **options)
            self.scores += table.assign(reference="validation", step=step).to_dict("records")
            values = table.set_index("metric")["value"].add_suffix(f"/{name}")
            self.accelerator.log(values.to_dict(), step)
        store.write_table(pd.DataFrame(self.scores), folder / "scores.csv")

    def save(self):
        """Write a state in the place of the last: safetensors, since accelerate's are pickled."""
        if not self.accelerator.is_main_process:
            return
        groups = {"model": self.weights(), "ema": self.ema, "best": self.best}
        groups |= {str(i): part for i, part in self.optimizer.state_dict()["state"].items()}
        flat = ((f"{g}:{k}", v) for g, part in groups.items() for k, v in part.items())
        tensors = {name: value.contiguous() for name, value in flat}
        note = {name: getattr(self, name) for name in ("step", "best_step", "log", "scores")}
        scaler = self.accelerator.scaler
        note = {"run": note, "scaler": scaler.state_dict() if scaler else {}}
        store.write_atomic(self.state, save(tensors, {"note": json.dumps(note)}))

    def restore(self):
        """Go on from the saved state, if there is one."""
        if not self.state.is_file():
            return
        groups = {}
        try:
            with safe_open(self.state, "pt", device=str(self.accelerator.device)) as stored:
                note = json.loads(stored.metadata()["note"])
                for name in stored.keys():  # noqa: SIM118, it is not a dict
                    group, _, rest = name.partition(":")
                    groups.setdefault(group, {})[rest] = stored.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{self.state}: damaged ({error}); training starts anew", stacklevel=2)
            return
        self.load(groups.pop("model"))
        self.ema, self.best = groups.pop("ema"), groups.pop("best")
        moments = {int(i): part for i, part in groups.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if note["scaler"]:
            self.accelerator.scaler.load_state_dict(note["scaler"])
        self.__dict__ |= note["run"]


def _spread(clips, n):
    """Take at most `n` of a table, evenly over it."""
    return clips.iloc[np.linspace(0, len(clips) - 1, min(n, len(clips))).astype(int)]


def _sample(pipe, config, prompts):
    info, rate = ldm.checkpoint_info(config.checkpoint), pipe.vocoder.config.sampling_rate
    seeds = [torch.Generator().manual_seed(config.seed + i) for i in range(len(prompts))]
    options = {name: info[name] for name in ("guidance_scale", "eta")}
    options |= {"audio_length_in_s": config.segment_s, "num_inference_steps": info["steps"]}
    # a longer prompt beside it changes what the GPT-2 of AudioLDM 2 says of a prompt
    size, sounds = 1 if hasattr(pipe, "language_model") else len(prompts), []
    for i in range(0, len(prompts), size):
        sounds += list(pipe(prompts[i : i + size], generator=seeds[i : i + size], **options).audios)
    return sounds, rate


# --- the result ----------------------------------------------------------------------------------


def _finished(config, key):
    note = Path(config.out_dir) / "training.json"
    try:
        content = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if content.get("key") != key:
            return None
        log, scores = (pd.DataFrame(content[name]) for name in ("log", "scores"))
        return FinetuneResult(Path(config.out_dir), log, content["best_step"], scores)
    except (ValueError, AttributeError, KeyError) as error:
        warnings.warn(f"{note}: damaged ({error!r}); made again", stacklevel=3)


def _save_result(run):
    config, (weights, _) = run.config, run.kept
    run.load(weights)
    run.unet.eval()
    note = {"key": run.key, "best_step": run.best_step, "log": run.log, "scores": run.scores}
    texts = {"training.json": json.dumps(note), ldm.CARD_FILE: _card(run, run.info)}
    if config.train == "lora":
        texts[ldm.ADAPTER_FILE] = ldm.merge_adapters(run.unet)
    # a published tower that came from the hub is found there again
    comes_along = (Path(ldm.resolve(config.checkpoint)) / "audio_encoder").is_dir()
    clap = ldm.load_clap(str(config.checkpoint)) if comes_along else None
    if clap and clap.extractor:
        texts["audio_encoder/preprocessor_config.json"] = clap.front_end
    ldm.save_checkpoint(run.pipe, config.out_dir, run.info, clap and clap.audio_encoder, extra=texts)


def _info(config, clips):
    """The note: ``heard`` has the folds of the start, the set, and the makers of generated clips."""
    base = ldm.checkpoint_info(config.checkpoint)
    rows = clips[clips["split"] == "train"].reindex(columns=["dataset", "fold", "heard"])
    ours = rows[["dataset", "fold"]].dropna().groupby("dataset")["fold"].unique().to_dict()
    parts = base["heard"], config.info.get("heard", ours), metadata.read_heard(rows["heard"])
    heard = {n: sorted({int(f) for p in parts for f in p.get(n, [])}) for n in set().union(*parts)}
    return base | config.info | {"heard": heard}


def _card(run, info):
    """Write the model card: data, licence, steps, scores with floors."""
    config, start = run.config, Path(run.config.checkpoint)
    texts = config.text_condition_probability if "audio" in run.data["train"] else 1.0
    licence = ldm.licence(config.checkpoint)
    kept = [row for row in run.log if row["step"] == run.kept[1]]
    losses = pd.DataFrame([run.log[0], *kept]).filter(regex="step|(val|test)_loss_ema$").round(4)
    return _CARD.read_text(encoding="utf-8").format(
        **{"config": config, "info": info, "licence": licence, "step": run.kept[1]},
        base=start.name if start.exists() else config.checkpoint,  # no place of this machine
        name=Path(config.out_dir).name,
        backend=type(run.pipe).__name__.removesuffix("Pipeline").lower(),
        condition=f"text embeddings in {texts:.0%}, audio embeddings otherwise",
        licence_id=licence.split(" (")[0].lower().replace(" ", "-"),
        data_licence=config.data_licence or "not stated",
        heard=datasets.format_heard(info["heard"]) or "not stated",
        clips=run.clips["split"].value_counts().to_dict(),
        kind=run.scheduler.config.prediction_type,
        losses=losses.to_string(index=False),
        scores=_score_lines(pd.DataFrame([r for r in run.scores if r["step"] == run.kept[1]])),
    )


def note_scores(checkpoint, scores):
    """Put scores (of `fad.score_table`) into the model card of a folder that `finetune` has made."""
    card = Path(checkpoint) / ldm.CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    part = re.compile(r"(?<=\n## Scores\n\n).*?(?=\n\n## )", re.DOTALL)
    if not part.search(text):
        raise TrainingError(f"{card}: no model card with a part '## Scores'; finetune writes one")
    return store.write_atomic(card, part.sub(lambda _: _score_lines(scores), text))


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
    """Check a configuration, and settle what it leaves to the checkpoint."""
    for one in fields(config):
        store.check_value(one.name, getattr(config, one.name), one.name, TrainingError)
    kind = ldm.pipeline_index(config.checkpoint, *ldm.PIPELINES)["_class_name"]
    try:
        if config.wandb_project:
            import wandb

            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
                raise ValueError("no key")
    except Exception as error:  # no package, no key, a wrong one, no network
        remedy = "run `wandb login`, set WANDB_MODE=offline, or leave wandb_project empty"
        raise TrainingError(f"wandb_project: W&B cannot be used ({error}); {remedy}") from None
    return replace(config, train=ldm.PIPELINES[kind]) if config.train == "auto" else config


def read_config(file, changes=()):
    """Read a `FinetuneConfig` from a YAML file; `changes` are (name, value as YAML) instead of its own.

    Raises `TrainingError` for a file that cannot be read, an unknown name, or a value of another type.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        values |= {name: yaml.safe_load(value) for name, value in changes}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise TrainingError(f"{file}: not a YAML file of names and values ({error})") from error
    for option in fields(FinetuneConfig):
        value = values.get(option.name)
        if option.type in (int, float, tuple) and value is not None:
            try:  # YAML reads 1e-4 as a text
                values[option.name] = option.type(value if option.type is tuple else float(value))
            except (TypeError, ValueError) as error:
                raise TrainingError(f"{file}: {option.name}: {error}") from None
    try:
        return FinetuneConfig(**values)
    except TypeError as error:
        raise TrainingError(f"{file}: {error}; see finetuning.FinetuneConfig") from None
