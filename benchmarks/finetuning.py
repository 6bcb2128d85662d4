"""Fine-tuning: row P5 of `all.py`, what a GPU holds, and what three seeds come to.

P5. The baseline trainer runs decoding, spectrogram, autoencoder and CLAP in every step. Here they run
once a clip. Both ways train the same U-Net of the built-in model on the same sounds.

    python benchmarks/finetuning.py                    AudioLDM-S on a GPU, if there is one
    python benchmarks/finetuning.py --small            the same in small, on the CPU
    python benchmarks/finetuning.py --sizes            what is trained of the public models, no weights
    python benchmarks/finetuning.py --checks           a killed run, and two processes, against one
    python benchmarks/finetuning.py --study ESC-50 --checkpoint FOLDER --out runs/finetuning-study

The last fine-tunes a mini-AudioLDM on ESC-10 scenes from several seeds: loss curves, FAD and KAD
over the steps, and both against held-out test mixes, beside their floors.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from soundscapes_utils import audio, finetuning, ldm, metadata, procedural, store

GIB = 2**30
CARDS_GIB = (16, 24, 48)
# The published cvssp/audioldm-s-full-v2, as diffusers' convert_original_audioldm_to_diffusers.py
# derives it from audioldm_original.yaml of AudioLDM-training-finetuning.
AUDIOLDM_S = {
    "unet": {
        "sample_size": 128,
        "in_channels": 8,
        "out_channels": 8,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "block_out_channels": (128, 256, 384, 640),
        "layers_per_block": 2,
        "cross_attention_dim": (128, 256, 384, 640),
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 512,
        "class_embeddings_concat": True,
    },
    "vae": {
        "sample_size": 512,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (128, 256, 512),
        "latent_channels": 8,
        "layers_per_block": 2,
        "scaling_factor": 0.9227914214134216,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
    },
    "vocoder": {
        "model_in_dim": ldm.N_MELS,
        "sampling_rate": ldm.SAMPLE_RATE,
        "upsample_initial_channel": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "normalize_before": False,
    },
}


def seconds(action, repeats, device="cpu"):
    """Mean wall time of a call, after one that warms up."""
    action(0)
    wait(device)
    started = time.perf_counter()
    for i in range(1, repeats + 1):
        action(i)
    wait(device)
    return (time.perf_counter() - started) / repeats


def wait(device):
    """Let a GPU finish what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def stepper(unet, scheduler, precision="fp32", ema_decay=None):
    """Make an optimiser step: loss, gradients, clipping, AdamW, and the average if it is wanted."""
    trained = [value for value in unet.parameters() if value.requires_grad]
    averaged = [value.detach().clone() for value in trained] if ema_decay else []
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    device = next(unet.parameters()).device.type
    half = precision == "bf16"

    def step(batch):
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            found = finetuning.denoising(unet, scheduler, batch)
        loss = (found.weight * found.error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for mean, value in zip(averaged, trained, strict=False):
            mean.lerp_(value.detach(), 1 - ema_decay)
        return float(loss.detach())

    return step


# --- on the CPU: what the caches are worth ------------------------------------------------------


def make_set(folder, n):
    """Write `n` captioned clips of 5 s as an AudioCaps-format set."""
    rows = []
    for i in range(n):
        label = procedural.EVENTS[i % len(procedural.EVENTS)]
        y = procedural.synthesize(label, i, 44_100, 5.0)
        path = audio.save_audio(Path(folder) / "clips" / f"{i}.wav", y, 44_100)
        split = "val" if i % 8 == 0 else "train"
        rows.append((split, str(path), label, "", f"the sound of {label.replace('_', ' ')}"))
    table = pd.DataFrame(rows, columns=["split", "path", "label", "scene", "caption"])
    return metadata.write_audiocaps(table, Path(folder) / "metadata", "speed")


def encoded(pipe, clap, path, config, rng):
    """Latent and embedding of one segment of a sound, as the baseline trainer computes them."""
    frames = round(config.segment_s * 100 / 32) * 32
    y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
    segment = audio.loudest_segment(y, frames * ldm.HOP, ldm.TRIES, rng)
    latent = ldm.encode_mel(pipe, ldm.waveform_to_mel(segment, frames)[None])[0]
    return latent, ldm.embed_audio(clap, [segment], ldm.SAMPLE_RATE)[0]


def uncached_batch(pipe, clap, clips, config, step):
    """Compute a batch as the baseline trainer does: all of it, in every step."""
    rng = np.random.default_rng([config.seed, step])
    chosen = clips.iloc[rng.integers(len(clips), size=config.batch_size)]
    found = [encoded(pipe, clap, path, config, rng) for path in chosen["path"]]
    latents, sounds = map(torch.stack, zip(*found, strict=True))
    texts = ldm.embed_text(pipe, chosen["caption"].tolist())
    as_text = torch.from_numpy(rng.random(len(chosen)) < config.text_condition_probability)
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape),
        "t": torch.from_numpy(rng.random(len(chosen)).astype(np.float32)),
        "condition": torch.where(as_text[:, None], texts, sounds),
    }


def p5(work, quick, options):
    """The caches against one by one; the trainer's own steps against steps that encode."""
    n_clips, steps = (16, 4) if quick else (256, 60)
    root = make_set(work, n_clips)
    config = finetuning.FinetuneConfig(
        "builtin", str(root), str(work / "out"), text_condition_probability=0.5, steps=2 * steps,
        validation_steps=steps, validation_segments=1, test_segments=0,
    )  # fmt: skip
    pipe, clap = ldm.load_pipeline("builtin", "cpu"), ldm.load_clap("builtin")
    clips, rng = metadata.read_audiocaps(root), np.random.default_rng(0)
    some = [path for path in clips["path"][: n_clips // 4] for _ in range(config.segments_per_clip)]
    encoded(pipe, clap, some[0], config, rng)  # the first is slower
    started = time.perf_counter()
    for path in some:
        encoded(pipe, clap, path, config, rng)
    one_by_one = len(some) / (time.perf_counter() - started)
    started = time.perf_counter()
    data = finetuning.load_data(pipe, config)
    ours = sum(len(part["clip"]) for part in data.values()) / (time.perf_counter() - started)
    row = {"what": f"preparing {n_clips} clips of 5 s", "peer": "one by one", "unit": "segments/s"}
    yield row | {"theirs": one_by_one, "ours": ours, "least": 4}
    # the trainer says itself what its steps took: drawing, copies, average and log included
    mine = finetuning.finetune(config).log["samples_per_s"].iloc[-1]
    step, log = stepper(pipe.unet.train(), pipe.scheduler, ema_decay=config.ema_decay), []
    whole = seconds(
        lambda i: log.append(step(uncached_batch(pipe, clap, clips, config, i))), max(2, steps // 10)
    )
    row = {"what": f"steps of {config.batch_size} segments", "peer": "encoding in every step"}
    yield row | {"theirs": config.batch_size / whole, "ours": mine, "unit": "samples/s", "least": 5}


ROWS = {"P5": p5}


# --- on a GPU: AudioLDM-S in full size ------------------------------------------------------------


def build_audioldm_s(device="cpu"):
    """Build the networks of AudioLDM-S in full size, untrained: what the published weights fill.

    ``unet`` (185 million parameters), ``vae`` (55), ``text_encoder`` (125), ``vocoder`` (55) and
    ``audio_encoder`` (28) in the classes that ``AudioLDMPipeline`` loads, and the ``scheduler``. On the
    device ``"meta"`` there are names and shapes alone, without memory.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        ClapAudioConfig,
        ClapAudioModelWithProjection,
        ClapTextConfig,
        ClapTextModelWithProjection,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(**AUDIOLDM_S["unet"]),
            "vae": AutoencoderKL(**AUDIOLDM_S["vae"]),
            "text_encoder": ClapTextModelWithProjection(ClapTextConfig()),
            "vocoder": SpeechT5HifiGan(SpeechT5HifiGanConfig(**AUDIOLDM_S["vocoder"])),
            "audio_encoder": ClapAudioModelWithProjection(ClapAudioConfig()),
        }
    for network in parts.values():
        network.eval()  # as from_pretrained leaves them
    return {**parts, "scheduler": DDIMScheduler(**AUDIOLDM_S["scheduler"])}


def build(device, small):
    """Build AudioLDM-S of random weights; in small for a trial on the CPU."""
    if not small:
        return build_audioldm_s(device), 1024
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import ClapAudioConfig, ClapAudioModelWithProjection

    widths = (32, 64, 96, 160)
    unet = {**AUDIOLDM_S["unet"], "block_out_channels": widths, "cross_attention_dim": widths}
    vae = {**AUDIOLDM_S["vae"], "block_out_channels": (32, 32, 64)}
    tiny = {"hidden_size": 64, "patch_embeds_hidden_size": 8, "projection_dim": 512}
    tiny |= {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    return {
        "unet": UNet2DConditionModel(**unet),
        "vae": AutoencoderKL(**vae),
        "audio_encoder": ClapAudioModelWithProjection(ClapAudioConfig(**tiny)),
        "scheduler": DDIMScheduler(**AUDIOLDM_S["scheduler"]),
    }, 64


def latent_batch(n, frames, device):
    """Draw a batch of latents and conditions, as the caches hold them."""
    shape = (n, 8, frames // 4, 16)
    return {
        "latents": torch.randn(shape, device=device),
        "noise": torch.randn(shape, device=device),
        "t": (torch.arange(n) + 0.5) / n,
        "condition": torch.randn(n, 512, device=device),
    }


def original_step(device, small):
    """Make a step of the original setting: autoencoder and CLAP in the loop, float32, batch 2."""
    parts, frames = build(device, small)
    step = stepper(parts["unet"].train(), parts["scheduler"])
    mel = torch.randn(2, 1, frames, 64, device=device)
    heard = torch.randn(2, 1, 1001, 64, device=device)
    longer = torch.zeros(2, 1, dtype=torch.bool, device=device)

    def run(_):
        batch = latent_batch(2, frames, device)
        with torch.no_grad():
            batch["latents"] = parts["vae"].encode(mel).latent_dist.sample()
            found = parts["audio_encoder"](input_features=heard, is_longer=longer)
            batch["condition"] = found.audio_embeds
        step(batch)

    return run


def measured(make_run, device, n, repeats):
    """Samples a second and peak memory in GiB of a way to train; (0, nan) if it does not fit."""
    try:
        run = make_run()
        if device == "cuda":
            # what building took, and left, is not what training takes
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rate = n / seconds(run, repeats, device)
    except torch.OutOfMemoryError:
        return 0.0, float("nan")
    return rate, torch.cuda.max_memory_allocated() / GIB if device == "cuda" else float("nan")


def our_run(device, small, n, **options):
    """Make a step of the cached trainer, from fresh weights."""
    parts, frames = build(device, small)
    unet = parts["unet"].train()
    if options.get("gradient_checkpointing"):
        unet.enable_gradient_checkpointing()
    config = finetuning.FinetuneConfig("", "", "", train=options.get("train", "full"))
    ldm.set_trainable(unet, config)
    step = stepper(unet, parts["scheduler"], options.get("precision", "bf16"))
    batch = latent_batch(n, frames, device)
    return lambda _: step(batch)


def gpu_table(device, small, repeats):
    """Print speed, memory and largest batches of AudioLDM-S."""
    base, peak = measured(lambda: original_step(device, small), device, 2, repeats)
    rows = [("original: batch 2, fp32, VAE and CLAP in the loop", 2, base, peak)]
    sizes = (1, 2) if small else (2, 8, 16, 32, 64)
    ways = {
        "cached, fp32": {"precision": "fp32"},
        "cached, bf16": {},
        "cached, bf16, checkpointing": {"gradient_checkpointing": True},
        "cached, bf16, attention only": {"train": "attention"},
        "cached, bf16, LoRA": {"train": "lora"},
        "cached, bf16, LoRA, checkpointing": {"train": "lora", "gradient_checkpointing": True},
    }
    for name, options in ways.items():
        for n in sizes:
            found = measured(lambda n=n, o=options: our_run(device, small, n, **o), device, n, repeats)
            rows.append((name, n, *found))
    table = pd.DataFrame(rows, columns=["way", "batch", "samples_per_s", "peak_gib"])
    table["ratio"] = table["samples_per_s"] / base
    print(table.round(2).to_string(index=False))
    if device == "cuda":
        print(largest_batches(table).to_string(index=False))


def sizes():
    """Count what is trained of the public models, and its memory, without any weights.

    Float32: the gradient, two moments of AdamW, the average and the best average so far.
    """
    import generation as public

    rows = []
    for name, model in {"AudioLDM-S": public.audioldm_s, "AudioLDM 2": public.audioldm2}.items():
        for train, rank in (("full", 8), ("attention", 8), ("lora", 8), ("lora", 64)):
            config = finetuning.FinetuneConfig("", "", "", train=train, lora_rank=rank)
            with torch.device("meta"), ldm.quiet():
                unet = model().unet
                ldm.set_trainable(unet, config)
            n = sum(p.numel() for p in unet.parameters() if p.requires_grad)
            way = f"{train}, rank {rank}" if train == "lora" else train
            rows.append({"model": name, "train": way, "trained M": n / 1e6, "GB": 5 * 4 * n / 1e9})
    print(pd.DataFrame(rows).round(2).to_string(index=False))


def largest_batches(table):
    """Tell the largest batch for each card, from a line through the measured peaks of each way."""
    rows = []
    for way, part in table.dropna(subset="peak_gib").groupby("way", sort=False):
        if len(part) < 2:
            continue
        slope, start = np.polyfit(part["batch"], part["peak_gib"], 1)
        # a tenth is left to the driver and to fragments
        fits = {f"{gib} GB": max(0, int((0.9 * gib - start) // slope)) for gib in CARDS_GIB}
        rows.append({"way": way, "fixed_gib": round(start, 2), "gib_a_sample": round(slope, 3), **fits})
    return pd.DataFrame(rows)


# --- one sequence, however it is run -------------------------------------------------------------


def killed_run(file, states):
    """Train from the command line, kill -9 after the second saved state, and call it again."""
    command = [sys.executable, "-m", "soundscapes_utils", "finetune", str(file)]
    seen = set()
    with subprocess.Popen(command) as process:
        while process.poll() is None and len(seen) < 2:
            seen |= {path.stat().st_mtime_ns for path in states.glob("*.safetensors")}
            time.sleep(0.01)
        process.kill()
    subprocess.run(command, check=True)
    return f"killed after {len(seen)} saved states (exit {process.returncode})"


def checks(folder):
    """Print how far a killed run, and one in two processes, end from one that was let alone."""
    root = make_set(folder, 16)
    config = finetuning.FinetuneConfig(
        "builtin", str(root), str(folder / "alone"), steps=12, batch_size=8, validation_steps=3,
        lr_warmup_steps=4, learning_rate=1e-3, keep_best=False, text_condition_probability=0.5,
    )  # fmt: skip
    alone = finetuning.finetune(config)
    weights = ldm.load_pipeline(alone.checkpoint, "cpu").unet.state_dict()
    for name in ("killed", "shared"):
        ours = replace(config, out_dir=str(folder / name))
        if name == "killed":
            settings = json.loads(json.dumps(asdict(ours)))
            file = store.write_atomic(folder / f"{name}.yaml", yaml.safe_dump(settings))
            told = killed_run(file, folder / f"{name}.states")
        else:
            told = "two processes, half of each batch each"
        found = finetuning.launch(ours, processes=1 if name == "killed" else 2)
        columns = [c for c in alone.log if "loss" in c or "vlb" in c or c == "grad_norm"]
        apart = (found.log[columns] - alone.log[columns]).abs().max()
        again = ldm.load_pipeline(found.checkpoint, "cpu").unet.state_dict()
        far = max(float((again[k] - weights[k]).abs().max()) for k in weights)
        print(f"{told}: {config.steps} steps of {config.batch_size}; largest differences")
        print(f"  losses {apart.drop('grad_norm').max():.1e}, of {alone.log.train_loss.mean():.3f};")
        print(f"  gradient norm {apart.grad_norm:.1e}, of {alone.log.grad_norm.mean():.3f};")
        print(f"  weights {far:.1e}")


# --- several seeds --------------------------------------------------------------------------------


def study_set(esc50_root, folder, n_mixes, seed):
    """Mix the events of ESC-10 over its ambient classes; test fold 5 is held out."""
    from soundscapes_utils import datasets, mixing

    clips = datasets.load_esc50(esc50_root, esc10=True)
    events, scenes = datasets.load_scenes("esc10", clips)
    plan = mixing.plan_mixes(events, scenes, n_mixes, seed, test_fold=5, duration_s=5.0)
    mixes = mixing.render_mixes(plan, folder / "mixes", ldm.SAMPLE_RATE)
    folds = clips["fold"][datasets.assign_splits(clips, 5) == "train"]
    info = {"training_dataset": "mixes of ESC-10", "heard": {"esc10": sorted(set(folds.tolist()))}}
    return mixes, metadata.write_audiocaps(mixes, folder / "metadata", "esc10-scenes"), info


def held_out(mixes, checkpoint, name, folder, rulers, n):
    """Ask a checkpoint for the captions of test mixes; score the samples against these mixes."""
    from soundscapes_utils import fad, generation

    test, train = (mixes[mixes["split"] == split] for split in ("test", "train"))
    plan = generation.plan_captions(test.head(n), duration_s=2.56, seed=0)
    model = generation.get_backend("audioldm", checkpoint=checkpoint, clips_per_pass=8)
    made = generation.generate_clips(plan, model, folder)
    rows = []
    for ruler in rulers:
        real, floor, ours = (
            ruler.embed(audio.excerpts(paths, 2.56), ldm.SAMPLE_RATE, silence="allow")
            for paths in (test["path"], train["path"], made["path"])
        )
        groups = {"real": test["source_id"].astype(str), "floor": train["source_id"].astype(str)}
        scores = fad.score_table(real, {name: ours}, embedding=ruler.name, floor=floor, groups=groups)
        rows.append(scores.assign(reference="test mixes"))
    return pd.concat(rows)


def study(wanted):
    """Fine-tune from several seeds; write tables, print the scores."""
    from soundscapes_utils import embeddings, fad

    out = Path(wanted.out)
    mixes, root, info = study_set(wanted.study, out, wanted.mixes, seed=0)
    names = {"logmel-stats": ""} | ({"yamnet": wanted.yamnet} if wanted.yamnet else {})
    rulers = [embeddings.get_embedding(name, path) for name, path in names.items()]
    base = finetuning.FinetuneConfig(
        wanted.checkpoint, str(root), "", steps=wanted.steps, learning_rate=1e-3, lr_warmup_steps=20,
        text_condition_probability=0.5, ema_decay=0.97, validation_steps=wanted.steps // 8,
        sample_epochs=2.0, n_watched=24,
        sample_embeddings=tuple(names.items()),
        info=info, data_licence="CC BY 3.0 (ESC-10)",
    )  # fmt: skip
    logs, scores = [], []
    samples = out / "samples"
    final = [held_out(mixes, wanted.checkpoint, "before", samples, rulers, wanted.samples)]
    for seed in wanted.seeds:
        folder = out / f"seed-{seed}"
        result = finetuning.finetune(replace(base, seed=seed, out_dir=str(folder)))
        logs.append(result.log.assign(seed=seed, best_step=result.best_step))
        scores.append(result.scores.assign(seed=seed))
        name = f"after, seed {seed}"
        final.append(held_out(mixes, folder, name, samples, rulers, wanted.samples))
    tables = {"log": logs, "scores": scores, "held_out": final}
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    for name, table in tables.items():
        store.write_atomic(out / f"{name}.csv", table.to_csv(index=False).encode())
    shown = ["seed", "step", "train_loss", "val_loss_ema", "test_loss_ema", "samples_per_s"]
    print(tables["log"][shown].round(4).to_string(index=False))
    index = ["metric", "embedding", "step"]
    print(tables["scores"].pivot_table("value", index, "seed", aggfunc="first").to_string())
    print(fad.score_lines(tables["held_out"]).to_string(index=False))


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="the GPU's part in small, on the CPU")
    parser.add_argument("--sizes", action="store_true", help="what is trained of public models")
    parser.add_argument("--checks", action="store_true", help="a killed run, and two processes")
    parser.add_argument("--study", metavar="ESC-50", help="folder of ESC-50 or ESC-10: several seeds")
    parser.add_argument("--checkpoint", default="builtin", help="where the study starts")
    parser.add_argument("--out", default="runs/finetuning-study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--mixes", type=int, default=400)
    parser.add_argument("--samples", type=int, default=80, help="captions of test mixes")
    parser.add_argument("--yamnet", default="", help="YAMNet's TFLite file, as a second ruler")
    wanted = parser.parse_args()
    if wanted.study:
        study(wanted)
        return
    if wanted.sizes:
        sizes()
        return
    torch.set_num_threads(1)
    if wanted.checks:
        with tempfile.TemporaryDirectory() as folder:
            checks(Path(folder))
        return
    if wanted.small:
        gpu_table("cpu", True, wanted.repeats)
        return
    if torch.cuda.is_available():
        gpu_table("cuda", False, 4 * wanted.repeats)
    else:
        print("no GPU here: speed and memory of AudioLDM-S in full size are not measured")


if __name__ == "__main__":
    main()
