"""Generation: clips a second, parts of the time, memory, and what does not change the bytes.

    python benchmarks/generation.py invariance     back-end × batch, order, shard, resume
    python benchmarks/generation.py cpu            the built-in model, by clips in a pass
    python benchmarks/generation.py resume         200 clips, killed in the middle
    python benchmarks/generation.py gpu            AudioLDM 2 and AudioLDM-S at their public sizes
    python benchmarks/generation.py mini --yamnet FILE [--checkpoint FOLDER --esc10 FOLDER]
                                                   class consistency, FAD and KAD of a mini model
    python benchmarks/generation.py stages --yamnet FILE [--checkpoint FOLDER --esc10 FOLDER]
                                                   where a class is lost: latent, vocoder or U-Net

Without a GPU, seconds are those of the processor unless a column says wall; part cpu uses one
thread, so that they are what a free core would take, however busy the machine is. Part gpu needs a
GPU; `--tiny` runs the same code with tiny models, on a CPU as well. Public sizes have random
weights: the time of a clip does not depend on them. The peer is the loop of work A: one clip a
call, half precision, 200 steps.
"""

import argparse
import json
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from soundscapes_utils import audio, datasets, embeddings, fad, generation, ldm, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_checkpoints

PROMPT = "A clear sound of a dog barking in a urban context."
SECONDS = 4.0


def now():
    """Seconds on the wall where a GPU works, else of the processor."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def device_name():
    """Name what the figures were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model.partition(':')[2].strip()}, {torch.get_num_threads()} thread(s), no GPU"


def peak_mb():
    """Tell the highest memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def show(title, rows):
    """Print a table under a heading."""
    table = pd.DataFrame(rows).round(2)
    print(f"\n{title}\n{table.to_string(index=False)}", flush=True)


# --- the same bytes ------------------------------------------------------------------------------


def invariance():
    """Compare every back-end's clips under all ways of sharing out the work."""
    cases = [(name, {}) for name in generation.BACKENDS]
    cases += [
        (name, {"dtype": dtype})
        for name in generation.BACKENDS
        for dtype in ("float16", "bfloat16")
        if name != "audiogen"
    ]
    makers = {"stable-audio": "stable_audio", "auto": "longcat"}
    tables = []
    with tempfile.TemporaryDirectory() as folder, tiny_checkpoints.contextlib.chdir(folder):
        for name, options in cases:
            # audiocraft finds the tiny T5 by its name in the current folder
            checkpoint = Path(folder) / name
            if not checkpoint.exists():
                getattr(tiny_checkpoints, makers.get(name, name))(checkpoint)
            options |= {"top_k": 8} if name == "audiogen" else {"steps": 3}
            backend = generation.get_backend(name, checkpoint=checkpoint, device="cpu", **options)
            tables.append(tiny_checkpoints.check_invariance(backend))
    embedded = generation.get_backend("audioldm", steps=3, device="cpu")
    table = tiny_checkpoints.check_invariance(embedded, duration_s=1.28)
    tables.append(table.assign(backend="audioldm (builtin)"))
    table = pd.concat(tables)
    table["same_bytes"] = table.same_bytes.map({True: "same", False: ""})
    table["shown"] = table.same_bytes.where(
        table.same_bytes == "same", table.max_difference.map("≤ {:.1e}".format)
    )
    order = list(dict.fromkeys(table.change))
    wide = table.pivot_table("shown", ["backend", "dtype"], "change", aggfunc="first", sort=False)
    sizes = {name: name.replace("batch of 5", "batch") for name in order}
    show(
        "same bytes, or greatest difference of full scale",
        wide[order].rename(columns=sizes).reset_index(),
    )


# --- the built-in model ----------------------------------------------------------------------------


def timed_parts(pipe):
    """Make a pipeline count the seconds of its parts; return the count."""
    seconds = defaultdict(float)
    parts = {
        "text": (pipe.text_encoder, "forward"),
        "U-Net": (pipe.unet, "forward"),
        "decoder": (pipe.vae, "decode"),
        "vocoder": (pipe.vocoder, "forward"),
    }

    def counting(name, call):
        def run(*arguments, **named):
            begin = now()
            result = call(*arguments, **named)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] += now() - begin
            return result

        return run

    for name, (part, method) in parts.items():
        setattr(part, method, counting(name, getattr(part, method)))
    return seconds


def rate(backend, n, duration_s):
    """Clips a second over n clips, after a first pass that warms up; and the same by the wall."""
    size = backend.settings["clips_per_pass"]
    backend.generate([PROMPT] * size, list(range(size)), duration_s)
    begin, begin_wall = now(), time.perf_counter()
    backend.generate([PROMPT] * n, list(range(n)), duration_s)
    return n / (now() - begin), n / (time.perf_counter() - begin_wall)


# clips in a pass that notebook 02 chooses with the built-in model
NOTEBOOK = {1: "real set", 10: "trials"}


def cpu_case(size, n, steps):
    """Measure the built-in model with so many clips in a pass; print a row as JSON."""
    torch.set_num_threads(1)
    backend = generation.get_backend("audioldm", steps=steps, device="cpu", clips_per_pass=size)
    clip_s = 2.56
    seconds = timed_parts(backend.pipe)
    fast, wall = rate(backend, n, clip_s)
    total = sum(seconds.values())
    shares = {f"{name} %": round(100 * s / total, 1) for name, s in seconds.items()}
    row = {
        "clips in a pass": size,
        "clips/s": round(fast, 2),
        "clips/s, wall": round(wall, 2),
        **shares,
        "peak MB": round(peak_mb()),
    }
    print(json.dumps(row))


def cpu(n, steps, sizes):
    """Measure each size of pass in a process of its own, for its peak memory."""
    rows = []
    torch.set_num_threads(1)  # for the name in the heading: the processes have one each
    for size in sizes:
        call = [sys.executable, __file__, "cpu", "--size", str(size), "--n", str(n)]
        call += ["--steps", str(steps)]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = pd.DataFrame(rows)
    table.insert(2, "× batch 1", (table["clips/s"] / table["clips/s"].iloc[0]).round(2))
    table["notebook 02"] = table["clips in a pass"].map(NOTEBOOK).fillna("")
    show(f"built-in model, {steps} steps, 2.56 s, {device_name()}", table)


# --- killed and resumed ----------------------------------------------------------------------------

RUN = """
import sys, pandas as pd
from soundscapes_utils import generation
plan = pd.read_csv(sys.argv[1])
backend = generation.get_backend("audioldm", steps=int(sys.argv[3]), device="cpu")
generation.generate_clips(plan, backend, sys.argv[2])
"""


def resume(n, steps):
    """Make clips in one go, and again with a kill in the middle; compare all files."""
    labels = ["dog", "rain", "rooster", "clock_tick"]
    plan = generation.plan_clips(labels, n // len(labels), "varied", duration_s=1.28)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plan.to_csv(folder / "plan.csv", index=False)
        whole, killed = folder / "whole", folder / "killed"

        def start(out):
            call = [sys.executable, "-c", RUN, folder / "plan.csv", out, str(steps)]
            return subprocess.Popen(list(map(str, call)), stderr=subprocess.DEVNULL)

        def made(out):
            return {path.name: path.read_bytes() for path in out.glob("*.wav")}

        begin = time.perf_counter()
        assert start(whole).wait() == 0
        seconds = time.perf_counter() - begin
        process = start(killed)
        while len(list(killed.glob("*.wav"))) < n // 2:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(made(killed))
        assert start(killed).wait() == 0
        one, other = made(whole), made(killed)
        row = {
            "clips": len(one),
            "seconds in one go": round(seconds, 1),
            "whole clips after SIGKILL": before,
            "after resuming": len(other),
            "same bytes": sum(one[name] == other.get(name) for name in one),
            "left over": len(list(killed.glob(".*.part"))),
        }
    show(f"killed and resumed, {steps} steps, {device_name()}", [row])


# --- public sizes ------------------------------------------------------------------------------------

LATENT = {
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 384, 640),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "sample_size": 128,
}
VOCODER = {
    "model_in_dim": 64,
    "sampling_rate": 16_000,
    "upsample_initial_channel": 1024,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "normalize_before": False,
}
FLAN_T5_LARGE = {
    "vocab_size": 32_128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}


def shared_parts():
    """Autoencoder, sampler and vocoder of both, as diffusers' conversion scripts write them."""
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=8,
        layers_per_block=2,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=512,
    )
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER))
    return {"vae": vae, "vocoder": vocoder, "scheduler": tiny_checkpoints._scheduler()}


def audioldm_s():
    """AudioLDM-S-full: a U-Net of 128 channels, conditioned on CLAP's text embedding."""
    from diffusers import AudioLDMPipeline, UNet2DConditionModel
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    unet = UNet2DConditionModel(
        **LATENT,
        cross_attention_dim=LATENT["block_out_channels"],
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=512,
        class_embeddings_concat=True,
    )
    return AudioLDMPipeline(
        text_encoder=ClapTextModelWithProjection(ClapTextConfig()),
        tokenizer=tiny_checkpoints._roberta_tokenizer(),
        unet=unet,
        **shared_parts(),
    )


def audioldm2():
    """AudioLDM 2: CLAP and Flan-T5-large, GPT-2, a U-Net with two cross-attentions."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5EncoderModel,
    )

    widths = [None, 768, 1024]
    unet = AudioLDM2UNet2DConditionModel(**LATENT, cross_attention_dim=[widths] * 4)
    return AudioLDM2Pipeline(
        text_encoder=ClapModel(ClapConfig()),
        text_encoder_2=T5EncoderModel(T5Config(**FLAN_T5_LARGE)),
        projection_model=AudioLDM2ProjectionModel(512, 1024, 768),
        language_model=GPT2LMHeadModel(GPT2Config(max_new_tokens=8)),
        tokenizer=tiny_checkpoints._roberta_tokenizer(),
        tokenizer_2=tiny_checkpoints._t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(),
        unet=unet,
        **shared_parts(),
    )


def parameters_m(pipe):
    """Millions of parameters, of the U-Net and of all parts."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (pipe.unet, *parts)]
    return round(counts[0]), round(sum(counts[1:]))


def tiny(name):
    """A pipeline of the same kind whose parts are tiny."""
    from diffusers import AudioLDM2Pipeline, AudioLDMPipeline

    with tempfile.TemporaryDirectory() as folder:
        if name == "AudioLDM-S":
            return AudioLDMPipeline.from_pretrained(tiny_checkpoints.audioldm(folder))
        return AudioLDM2Pipeline.from_pretrained(tiny_checkpoints.audioldm2(folder))


def gpu(n, steps, sizes, small, models):
    """Clips a second of A's loop and of passes of several clips, and their peak memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not small:
        print("\nno GPU: public sizes are not timed; --tiny runs the same code with tiny models")
        return
    half = torch.float16 if device == "cuda" else torch.float32
    for name in models:
        build = MODELS[name]
        torch.manual_seed(0)
        with ldm.quiet():
            pipe = (tiny(name) if small else build()).to(device, half)
        pipe.set_progress_bar_config(disable=True)
        unet, total = parameters_m(pipe)
        peer = a_loop(pipe, max(2, n // 16), steps)
        rows = [{"way": "A's loop", "clips/s": peer, "× A": 1.0, "peak MB": peak_mb()}]
        rows += [batched(pipe, size, n, steps, False, peer) for size in sizes]
        if device == "cuda":
            # a compilation takes a minute and serves one size of pass: the largest that fits
            pipe.unet.to(memory_format=torch.channels_last).compile()
            rows.append(batched(pipe, sizes[-1], n, steps, True, peer))
        title = f"{name}, U-Net {unet} M of {total} M parameters, {steps} steps, {SECONDS} s"
        show(f"{title}, {device_name()}", rows)
        del pipe


def a_loop(pipe, n, steps):
    """Clips a second of one call a clip, after a first."""
    for number in range(n + 1):
        if number == 1:
            begin = now()
        sound = pipe(PROMPT, num_inference_steps=steps, audio_length_in_s=SECONDS).audios[0]
        assert np.isfinite(sound).all()
    return n / (now() - begin)


def batched(pipe, size, n, steps, compiled, peer):
    """The same steps with so many clips in a pass, through the project's own back-end."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    settings = {"steps": steps, "guidance_scale": 3.5, "eta": 0.0, "clips_per_pass": size}
    settings["dtype"] = str(pipe.dtype).removeprefix("torch.")
    backend = generation.DiffusersBackend("random", "random weights", 16_000, settings, pipe)
    # four passes at most: small ones would take hours
    fast, _ = rate(backend, max(size, min(n, 4 * size)), SECONDS)
    way = f"{size} in a pass" + (", compiled, channels last" if compiled else "")
    row = {"way": way, "clips/s": fast, "× A": fast / peer, "peak MB": peak_mb()}
    print(row, file=sys.stderr, flush=True)
    return row


MODELS = {"AudioLDM 2": audioldm2, "AudioLDM-S": audioldm_s}


def sizes_of_public_models():
    """Count parameters without making any: the sizes that `CHECKPOINTS` states."""
    with torch.device("meta"), ldm.quiet():
        rows = {"cvssp/audioldm2": audioldm2(), "cvssp/audioldm-s-full-v2": audioldm_s()}
    known = generation.CHECKPOINTS["parameters_m"]
    table = [
        {"checkpoint": name, "U-Net M": parameters_m(pipe)[0], "all M": parameters_m(pipe)[1]}
        | {"stated M": known[name]}
        for name, pipe in rows.items()
    ]
    show("parameters of the configurations written out here", table)


# --- what becomes of a class -----------------------------------------------------------------------

TEST_FOLD = 5


def opened(name, path=""):
    """Embed sounds at one level, so that nothing is info by it."""
    network = embeddings.get_embedding(name, path)

    def listen(sounds):
        level = [0.9 * y / max(np.abs(y).max(), 1e-6) for y in sounds]
        return network.embed(level, ldm.SAMPLE_RATE, silence="allow")

    return listen


def real_parts(dataset, esc10):
    """Recordings of the folds to learn from, and those held out."""
    clips = datasets.load_clips(dataset, esc50_root=esc10)
    held_out = clips["fold"] == TEST_FOLD
    return clips[~held_out], clips[held_out]


def refuse_test_fold(checkpoint, info):
    """End here if a model has heard the recordings that are to examine it."""
    if TEST_FOLD in info["heard"].get("esc10", []):
        raise SystemExit(f"{checkpoint} has heard fold {TEST_FOLD}: take another one")


def mini(esc10, yamnet, checkpoint, n):
    """Print how class-consistent and how far from real a mini model's clips are."""
    info = ldm.checkpoint_info(checkpoint)
    refuse_test_fold(checkpoint, info)
    dataset = "esc10" if "esc10" in info["heard"] else "builtin"
    train, test = real_parts(dataset, esc10)
    torch.set_num_threads(1)
    backend = generation.get_backend("audioldm", checkpoint=checkpoint, device="cpu")
    plan = generation.plan_clips(sorted(train["label"].unique()), n, duration_s=2.56)
    begin = now()
    made = backend.generate(plan["prompt"].tolist(), plan["seed"].tolist(), 2.56)
    seconds = (now() - begin) / len(plan)
    parts = {"train": train, "held out": test}
    sounds = {key: audio.excerpts(part["path"], 2.56) for key, part in parts.items()}
    sounds["made"] = made
    labels = [train["label"], plan["label"], test["label"]]
    distances = []
    for name, path in (("yamnet", yamnet), ("logmel-stats", "")):
        listen = opened(name, path)
        x, real, y = (listen(sounds[key]) for key in ("train", "held out", "made"))
        judged = stats.class_consistency(*zip((x, y, real), labels, strict=True))
        if name == "yamnet":
            show(f"YAMNet judge of {dataset}, folds but {TEST_FOLD}", with_intervals(judged))
        # as many clips of a class as are held out: both distances depend on the number
        equal = plan.groupby("label").cumcount() < test["label"].value_counts().min()
        groups = {"real": train["source_id"], "generated": plan["clip_id"][equal]}
        candidates = {"generated": y[equal]}
        distances.append(fad.score_table(x, candidates, embedding=name, floor=real, groups=groups))
    columns = ["metric", "embedding", "value", "ci_low", "ci_high", "n_candidate", "floor"]
    table = pd.concat(distances)[columns].round(3)
    show("distance from the training folds, and that of as many held-out recordings", table)
    print(f"\n{seconds:.2f} s a clip, {device_name()}, {backend.settings['steps']} steps")


def with_intervals(judged):
    """Wilson intervals of the last row, which stands for all clips."""
    from scipy.stats import binomtest

    row = {"label": "all, 95 %"}
    for name in ("held_out", "generated"):
        n = int(judged[f"n_{name}"].iloc[-1])
        right = round(judged[name].iloc[-1] * n)
        row[name] = "{:.2f} to {:.2f}".format(*binomtest(right, n).proportion_ci(method="wilson"))
    return pd.concat([judged.round(2).astype(object), pd.DataFrame([row])]).fillna("")


def generated_mels(backend, plan):
    """Log-mels of a plan's clips, as the vocoder gets them."""
    mels, pipe = [], backend.pipe
    vocoder = pipe.mel_spectrogram_to_waveform

    def keep(mel):
        mels.append(mel.reshape(-1, *mel.shape[-2:]).clone())
        return vocoder(mel)

    pipe.mel_spectrogram_to_waveform = keep
    backend.generate(plan["prompt"].tolist(), plan["seed"].tolist(), 2.56)
    pipe.mel_spectrogram_to_waveform = vocoder
    return torch.cat(mels)[: len(plan)]


@torch.no_grad()
def denoised(backend, latents, labels, start):
    """Add noise to latents up to a timestep; let the model take it away again under their prompts."""
    pipe, settings = backend.pipe, backend.settings
    prompts = generation.plan_clips(sorted(set(labels)), 1, duration_s=2.56).set_index("label")["prompt"]
    told = ldm.embed_text(pipe, prompts[labels].tolist())
    untold = ldm.embed_text(pipe, [""]).expand_as(told)
    draws = torch.Generator().manual_seed(0)
    scheduler, w = pipe.scheduler, settings["guidance_scale"]
    scheduler.set_timesteps(settings["steps"])
    times = [t for t in scheduler.timesteps if t <= start]
    noise = torch.randn(latents.shape, generator=draws)
    z = scheduler.add_noise(latents, noise, times[0].expand(len(latents)))
    for t in times:
        with_text, without = (pipe.unet(z, t, None, class_labels=c).sample for c in (told, untold))
        out = without + w * (with_text - without)
        z = scheduler.step(out, t, z, eta=settings["eta"], generator=draws).prev_sample
    return ldm.decode_latents(pipe, z)


def stages(esc10, yamnet, checkpoint, n, iterations):
    """Print how often a judge is right on what each stage leaves of each class."""
    info = ldm.checkpoint_info(checkpoint)
    refuse_test_fold(checkpoint, info)
    dataset = "esc10" if "esc10" in info["heard"] else "builtin"
    train, test = real_parts(dataset, esc10)
    train = train[train["fold"].isin(info["heard"].get(dataset, train["fold"]))]
    listen = opened("yamnet", yamnet)
    sounds = listen(audio.excerpts(train["path"], 2.56))
    judge = stats.linear_probe().fit(sounds, train["label"])

    def right(sounds, labels):
        answers = judge.predict(listen(sounds)) == np.asarray(labels)
        return pd.Series(answers, np.asarray(labels))

    sounds = audio.excerpts(test["path"], 2.56)
    backend = generation.get_backend("audioldm", checkpoint=checkpoint, device="cpu", clips_per_pass=8)
    plan = generation.plan_clips(sorted(train["label"].unique()), n, duration_s=2.56)
    mels = torch.stack([ldm.waveform_to_mel(y, 256) for y in sounds])
    latents = ldm.encode_mel(backend.pipe, mels)
    kinds = {
        "log-mel": (mels, test["label"]),
        "latent": (ldm.decode_latents(backend.pipe, latents), test["label"]),
    }
    for start in (100, 300, 500, 700):
        mel = denoised(backend, latents, test["label"], start)
        kinds[f"noised to t {start}, denoised"] = mel, test["label"]
    kinds["generated"] = generated_mels(backend, plan), plan["label"]
    found = {("recordings as they are", ""): right(sounds, test["label"])}
    for k in iterations:
        backend.pipe.vocoder.register_to_config(iterations=k)
        for kind, (mel, labels) in kinds.items():
            found[kind, k] = right(ldm.vocode(backend.pipe, mel), labels)
    named = (
        f"YAMNet judge of {dataset}, folds {sorted(map(int, set(train['fold'])))}, test fold {TEST_FOLD}"
    )
    show(named, [accuracy(*key, answers) for key, answers in found.items()])
    by_class = {key: answers.groupby(level=0).mean() for key, answers in found.items()}
    table = pd.DataFrame(by_class).T.rename_axis(["stage", "vocoder iterations"]).reset_index()
    show(f"{named}: accuracy of each class", table)
    spreads = {
        kind: pd.Series(mel.std(dim=(1, 2)).numpy(), np.asarray(labels)).groupby(level=0).mean()
        for kind, (mel, labels) in kinds.items()
    }
    table = pd.DataFrame(spreads).T.rename_axis("stage").reset_index()
    show("standard deviation of the log-mels, nats: how uneven a sound is", table)


def accuracy(stage, iterations, right):
    """One row of `stages`."""
    low, high = stats.bootstrap_ci(right.to_numpy())
    row = {"stage": stage, "vocoder iterations": iterations, "n": len(right)}
    return row | {"accuracy": right.mean(), "low": low, "high": high}


def main():
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["invariance", "cpu", "resume", "gpu"]
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(parts)} (all by default), mini or stages"
    )
    parser.add_argument("--esc10", default="data/ESC-50", help="ESC-10 or ESC-50, for its models")
    parser.add_argument("--yamnet", default="yamnet.tflite", help="file, in parts mini and stages")
    parser.add_argument("--checkpoint", default="builtin", help="mini-AudioLDM, in both")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[1, 2, 6, 16, 32], help="of the vocoder, stages"
    )
    parser.add_argument("--n", type=int, help="clips: 16 on a CPU, 200 resumed, 128 on a GPU")
    parser.add_argument("--steps", type=int, help="10 for the built-in model, 200 on a GPU")
    parser.add_argument("--sizes", type=int, nargs="+", help="clips in a pass")
    parser.add_argument("--tiny", action="store_true", help="tiny models in part gpu")
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, help="in part gpu")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # one case of part cpu
    options = parser.parse_args()
    if options.size:
        return cpu_case(options.size, options.n, options.steps)
    judged = options.esc10, options.yamnet, options.checkpoint, options.n or 12
    for part in options.parts or parts:
        if part == "invariance":
            invariance()
        elif part == "cpu":
            cpu(options.n or 16, options.steps or 10, options.sizes or [1, 2, 4, 8, 10, 16])
        elif part == "resume":
            resume(options.n or 200, options.steps or 10)
        elif part == "gpu":
            sizes_of_public_models()
            gpu(
                options.n or 128,
                options.steps or 200,
                options.sizes or [1, 8, 32, 128],
                options.tiny,
                options.models,
            )
        elif part == "stages":
            stages(*judged, options.iterations)
        elif part == "mini":
            mini(*judged)
        else:
            parser.error(f"{part}: choose of {', '.join(parts)}, mini and stages")


if __name__ == "__main__":
    main()
