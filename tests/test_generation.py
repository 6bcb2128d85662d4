import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_checkpoints
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import Tones

from soundscapes_utils import audio, generation, ldm, store
from soundscapes_utils.generation import GenerationError

PROMPTS = ["a dog", "a dog barking loudly", "rain", "a dog", "rain", "a dog"]
SEEDS = [11, 12, 13, 14, 15, 16]
THREE = ["a dog", "rain", "a dog barking loudly"]
HALF_TOLERANCE = 0.05  # of full scale, by the size of the pass
# float16 takes a processor ten times as long for Stable Audio's convolutions
HALF = [
    ("audioldm", "float16"),
    ("audioldm", "bfloat16"),
    ("audioldm2", "float16"),
    ("stable-audio", "bfloat16"),
    ("stable-audio-3", "bfloat16"),
    ("ace-step", "bfloat16"),
    ("auto", "bfloat16"),
]
AUDIOCRAFT = ["audiogen", "magnet"]


def small_plan(n=3, labels=("dog", "rain")):
    return generation.plan_clips(list(labels), n, duration_s=0.25)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.wav")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    makers = {name: name.replace("-", "_") for name in generation.BACKENDS} | {"auto": "longcat"}
    return {name: getattr(tiny_checkpoints, own)(folder / name) for name, own in makers.items()}


@pytest.fixture(scope="module")
def backends(checkpoints):
    before = Path.cwd()
    os.chdir(checkpoints["audiogen"].parent)  # where audiocraft finds the tiny T5 by its name
    diffusion = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    options = dict.fromkeys(generation.BACKENDS, diffusion)
    options["audioldm"] = {**diffusion, "eta": 1.0}
    options |= {"audiogen": {"top_k": 8, "device": "cpu"}, "magnet": {"device": "cpu"}}
    yield {
        name: generation.get_backend(name, checkpoint=checkpoints[name], **own)
        for name, own in options.items()
    }
    os.chdir(before)


# --- back-ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_a_clip_is_the_same_alone_in_a_batch_and_in_another_order(backends, name):
    backend = backends[name]
    together = backend.generate(PROMPTS, SEEDS, 0.5)
    backwards = backend.generate(PROMPTS[::-1], SEEDS[::-1], 0.5)[::-1]
    for i, y in enumerate(together):
        assert y.dtype == np.float32
        assert y.shape == (backend.sample_rate // 2,)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y, backwards[i])
        np.testing.assert_array_equal(y, backend.generate([PROMPTS[i]], [SEEDS[i]], 0.5)[0])
    assert not np.array_equal(together[0], together[3]), "the seed must matter"


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_odd_durations_have_exactly_the_samples_asked_for(backends, name):
    # 4.1 s / 10 ms falls just short of 410 frames in floating point
    for duration_s in (0.33, 1.11 if name == "stable-audio" else 4.1):
        y = backends[name].generate(["rain"], [1], duration_s)[0]
        assert y.shape == (round(duration_s * backends[name].sample_rate),)
        assert np.abs(y[-100:]).max() > 0, "the end must be made, not filled up"


def test_audioldm_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch

    ours = backends["audioldm"].generate(["a dog"], [11], 0.5, ["noise"])[0]
    reference = ldm.load_pipeline(checkpoints["audioldm"], "cpu")(
        "a dog",
        negative_prompt="noise",
        audio_length_in_s=0.5,
        num_inference_steps=3,
        guidance_scale=2.5,
        eta=1.0,
        generator=torch.Generator().manual_seed(11),
    ).audios[0]
    np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_passes_of_several_clips_differ_by_rounding_only(backends, name, monkeypatch):
    one = backends[name].generate(PROMPTS, SEEDS, 0.5)
    monkeypatch.setitem(backends[name].settings, "clips_per_pass", 4)
    four = backends[name].generate(PROMPTS, SEEDS, 0.5)
    np.testing.assert_allclose(np.stack(four), np.stack(one), atol=1e-3)


@pytest.mark.parametrize("name", [n for n in generation.BACKENDS if n not in [*AUDIOCRAFT, "ace-step"]])
def test_negative_prompt_reaches_the_model(backends, name):
    prompts, seeds, negatives = ["a dog"] * 3, [1, 1, 1], ["", "hiss", ""]
    plain, negative, again = backends[name].generate(prompts, seeds, 0.5, negatives)
    assert not np.array_equal(plain, negative)
    np.testing.assert_array_equal(plain, again)


def test_stable_audio_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch
    from diffusers import StableAudioPipeline

    solver = backends["stable-audio"].pipe.scheduler
    pipe = StableAudioPipeline.from_pretrained(checkpoints["stable-audio"], scheduler=None)
    pipe.register_modules(scheduler=solver)
    for negative in ("", "hiss"):
        ours = backends["stable-audio"].generate(["a dog"], [11], 0.5, [negative])[0]
        stereo = pipe(
            "a dog",
            negative_prompt=negative or None,
            audio_end_in_s=0.5,
            num_inference_steps=3,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(11),
        ).audios[0]
        assert stereo.shape == (2, 22_050)
        np.testing.assert_allclose(ours, stereo.mean(0), atol=1e-6)


def test_stable_audio_solver_is_that_of_diffusers_given_the_noise(backends, monkeypatch):
    import importlib

    import torch

    # the reference imports torchsde for its noise only, which is drawn here
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    theirs = module.CosineDPMSolverMultistepScheduler()
    ours = backends["stable-audio"].pipe.scheduler
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma))
    x = y = torch.randn(2, 4, 8) * ours.init_noise_sigma
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    same = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs.noise_sampler = lambda *_: torch.stack([torch.randn(1, 4, 8, generator=g)[0] for g in same])
    for t in ours.timesteps:
        output = torch.tanh(x) * 0.5  # any function of the state will do
        torch.testing.assert_close(
            ours.scale_model_input(x, t), theirs.scale_model_input(y, t), rtol=1e-5, atol=1e-5
        )
        x = ours.step(output, t, x, generator=noise).prev_sample
        y = theirs.step(output, t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["audioldm", "audioldm2", "stable-audio", "stable-audio-3", "longcat", "ace-step"]
)
def test_auto_makes_what_the_named_backend_makes(backends, checkpoints, name):
    options = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    options |= {"eta": 1.0} if name == "audioldm" else {}
    auto = generation.get_backend("auto", checkpoint=checkpoints[name], **options)
    assert auto.sample_rate == backends[name].sample_rate
    negatives = ["", "" if name == "ace-step" else "hiss"]
    ours = auto.generate(PROMPTS[:2], SEEDS[:2], 0.5, negatives)
    wanted = backends[name].generate(PROMPTS[:2], SEEDS[:2], 0.5, negatives)
    np.testing.assert_array_equal(np.stack(ours), np.stack(wanted))


@pytest.mark.parametrize("name", ["audioldm2", "auto"])
def test_audioldm2_sounds_the_same_whatever_its_index_calls_the_language_model(backends, tmp_path, name):
    folder = tiny_checkpoints.audioldm2(tmp_path / "published", as_published=True)
    options = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    published = generation.get_backend(name, checkpoint=folder, **options)
    assert type(published.pipe.language_model).__name__ == "GPT2LMHeadModel"
    ours, wanted = (b.generate(["a dog"], [1], 0.5)[0] for b in (published, backends["audioldm2"]))
    np.testing.assert_array_equal(ours, wanted)
    half = generation.get_backend(name, checkpoint=folder, dtype="float16", **options)
    assert half.pipe.language_model.dtype == half.pipe.unet.dtype


@pytest.mark.parametrize("name", ["audioldm2", "auto"])
def test_settings_of_an_audioldm2_are_those_of_its_note_or_published(checkpoints, tmp_path, name):
    import shutil

    folder = Path(shutil.copytree(checkpoints["audioldm2"], tmp_path / "tuned"))
    for note, steps in ({}, 200), ({"steps": 7}, 7):
        (folder / ldm.INFO_FILE).write_text(json.dumps(note))
        settings = generation.get_backend(name, checkpoint=folder, device="cpu").settings
        assert [settings[k] for k in ("steps", "guidance_scale", "eta")] == [steps, 3.5, 0.0]


def test_variants_alone_open_with_every_backend_of_diffusers(backends, checkpoints, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoints["audioldm2"], tmp_path / "half")
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    options = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    half = generation.get_backend("audioldm2", checkpoint=folder, **options)
    ours, wanted = (b.generate(["rain"], [2], 0.5)[0] for b in (half, backends["audioldm2"]))
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("name", [name for name in generation.BACKENDS if name != "auto"])
def test_a_checkpoint_of_another_backend_is_refused_by_name(checkpoints, name):
    other = checkpoints["audioldm2"] if name == "audioldm" else "builtin"
    with pytest.raises(store.DataError, match=f"({other}|builtin).*(is needed here|has no use)"):
        generation.get_backend(name, checkpoint=other, device="cpu")


@pytest.mark.parametrize("option", [{"eta": 0.5}, {"duration_s": 2.56}, {"loudness": -14.0}])
def test_an_option_that_cannot_act_is_refused_by_name(checkpoints, option):
    (name,) = option
    with pytest.raises(GenerationError, match=f"has no option {name}"):
        generation.get_backend("auto", checkpoint=checkpoints["auto"], device="cpu", **option)


def test_a_duration_that_is_asked_for_holds_whatever_the_preset_says():
    preset = generation.preset("ronchini2024-audioldm2")
    plan = generation.plan_clips(["dog"], 1, **{"duration_s": 2.56})
    assert (plan.duration_s == 2.56).all() and preset["duration_s"] == 4.0


@pytest.mark.parametrize("force", [False, True])
def test_pickles_of_audiocraft_run_no_code(checkpoints, tmp_path, monkeypatch, force):
    import shutil

    import torch

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, load = shutil.copytree(checkpoints["audiogen"], tmp_path / "evil"), torch.load
    for file in folder.glob("*.bin"):
        torch.save({"xp.cfg": "", "best_state": Trap()}, file)
    with pytest.raises(
        ldm.CheckpointError, match="evil: cannot be opened as a model of backend audiogen"
    ):
        generation.get_backend("audiogen", checkpoint=folder, device="cpu")
    assert not (tmp_path / "opened").exists() and torch.load is load


def test_pickled_parts_of_any_pipeline_are_refused(checkpoints, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoints["auto"], tmp_path / "pickled")
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ldm.CheckpointError, match=r"transformer/.*bin: pickled weights"):
        generation.get_backend("auto", checkpoint=folder, device="cpu")


def test_auto_takes_the_defaults_of_the_pipeline(checkpoints):
    backend = generation.get_backend("auto", checkpoint=checkpoints["auto"], device="cpu")
    assert (backend.settings["steps"], backend.settings["guidance_scale"]) == (16, 4.0)


def test_auto_refuses_what_makes_no_sound(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(GenerationError, match="DDPMPipeline is not a text-to-audio pipeline"):
        generation.get_backend("auto", checkpoint=tmp_path)


def test_clips_that_are_too_long_are_refused_by_name(backends):
    with pytest.raises(GenerationError, match=r"stable-audio: its pipeline refuses 2.0 s"):
        backends["stable-audio"].generate(["rain"], [1], 2.0)
    # 125 frames are 41 spans of three, and two frames that are not made
    assert backends["magnet"].generate(["rain"], [1], 4.92)[0].shape == (78_720,)
    with pytest.raises(GenerationError, match=r"magnet: makes 4.92 s at most, not 4.93"):
        backends["magnet"].generate(["rain"], [1], 4.93)


def test_stable_audio_3_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch
    from diffusers import StableAudio3Pipeline

    pipe = StableAudio3Pipeline.from_pretrained(checkpoints["stable-audio-3"])
    noise = torch.Generator().manual_seed(11)
    options = {"duration": 0.5, "num_inference_steps": 3, "guidance_scale": 2.5, "generator": noise}
    stereo = pipe("a dog", negative_prompt="hiss", **options).audios[0].numpy()
    assert stereo.shape == (2, 22_050) and not np.array_equal(*stereo)
    ours = backends["stable-audio-3"].generate(["a dog"], [11], 0.5, ["hiss"])[0]
    np.testing.assert_allclose(ours, stereo.mean(0), atol=1e-6)


def test_ace_step_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch
    from diffusers import AceStepPipeline

    pipe = AceStepPipeline.from_pretrained(checkpoints["ace-step"])
    noise = torch.Generator().manual_seed(11)
    options = {"audio_duration": 1.0, "num_inference_steps": 3, "guidance_scale": 1.0}
    stereo = pipe("a dog", generator=noise, **options).audios[0].numpy()
    assert stereo.shape[0] == 2 and not np.array_equal(*stereo)
    # of 7 latents, at 25 a second, diffusers makes 8 in one place: whole seconds are made and cut
    ours = backends["ace-step"].generate(["a dog"], [11], 0.28)[0]
    np.testing.assert_allclose(ours, stereo.mean(0)[:13_440], atol=1e-5)


def test_magnet_without_chance_is_what_audiocraft_makes_with_plain_attention(backends, monkeypatch):
    import torch
    from audiocraft.modules import transformer

    def attention(q, k, v, mask=None, p=0.0):
        weights = torch.einsum("bthd,bkhd->bhtk", q, k) / q.shape[-1] ** 0.5
        weights = weights if mask is None else weights + mask
        return torch.einsum("bhtk,bkhd->bthd", weights.softmax(-1), v)

    backend = backends["magnet"]
    monkeypatch.setitem(backend.settings, "top_p", 1e-6)  # the most probable token alone
    ours = backend.generate(["a dog"], [1], 4.92)[0]
    backend.pipe.set_generation_params(use_sampling=False, temperature=3.5, max_cfg_coef=20.0)
    own = {"unbind": torch.unbind, "memory_efficient_attention": attention}
    monkeypatch.setattr(transformer, "ops", types.SimpleNamespace(**own))
    monkeypatch.setattr(transformer, "_efficient_attention_backend", "xformers")
    reference = backend.pipe.generate(["a dog"]).numpy()[0, 0]
    np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_audiogen_and_magnet_leave_each_other_alone(backends):
    first = backends["audiogen"].generate(["a dog"], [1], 0.5)[0]
    backends["magnet"].generate(["a dog"], [1], 0.5)
    np.testing.assert_array_equal(backends["audiogen"].generate(["a dog"], [1], 0.5)[0], first)


def test_what_is_published_of_a_checkpoint_is_what_its_backend_uses(checkpoints):
    # the tiny checkpoint of each kind stands for those of the hub; AudioLDM's has no note either
    for row in generation.CHECKPOINTS.itertuples():
        assert row.memory_gb == pytest.approx(row.parameters_m * 0.004, abs=0.05)
        assert row.trained_on and row.audioset and row.esc50_urbansound8k and row.source
        if row.backend in AUDIOCRAFT:
            assert generation.BACKENDS[row.backend]["guidance_scale"] == float(row.guidance_scale)
            continue
        folder = checkpoints[row.backend]
        if row.Index.endswith("-base"):
            folder = tiny_checkpoints.stable_audio_3(folder.parent / "base", distilled=False)
        settings = generation.get_backend(row.backend, checkpoint=folder, device="cpu").settings
        assert settings["steps"] == int(row.steps)
        assert settings["guidance_scale"] == float(row.guidance_scale)


def test_the_document_of_generators_shows_the_table_of_checkpoints():
    text = (Path(__file__).parents[1] / "docs/generators.md").read_text(encoding="utf-8")
    for row in generation.CHECKPOINTS.reset_index().itertuples():
        cells = [f"`{row.checkpoint}`", f"`{row.backend}`", row.licence, row.download_gb, row.memory_gb]
        cells += [row.seconds, row.steps, row.guidance_scale, row.trained_on, row.audioset]
        cells += [row.esc50_urbansound8k, row.source]
        assert f"| {' | '.join(map(str, cells))} |" in text.splitlines(), row.checkpoint


def test_the_generator_of_the_document_makes_clips(monkeypatch, tmp_path):
    import torch

    text = (Path(__file__).parents[1] / "docs/generators.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 20 <= len(block.splitlines()) <= 40
    (tmp_path / "my_generators.py").write_text(block)
    asked = []

    class Model:
        def __init__(self, name):
            asked.append(name)

        def generate(self, prompt, steps, duration):
            # a package of its own draws from torch's global stream, and makes whole seconds in stereo
            asked.append((prompt, steps, duration))
            return torch.randn(2, 44_100 * duration) / 9

    stub = types.ModuleType("tangoflux")
    stub.TangoFluxInference = Model
    monkeypatch.setitem(sys.modules, "tangoflux", stub)
    monkeypatch.syspath_prepend(tmp_path)
    backend = generation.get_backend("my_generators:TangoFlux", steps=4)
    table = tiny_checkpoints.check_invariance(backend, THREE, 0.25)
    assert table.same_bytes.all()
    made = generation.generate_clips(small_plan(1), backend, tmp_path / "clips")
    assert set(made.backend) == {"tangoflux"} and (made.steps == 4).all()
    assert asked[0] == "declare-lab/TangoFlux" and asked[1] == ("a dog", 4, 1)
    assert len(audio.load_audio(made.path[0])[0]) == 11_025
    # once it is edited, its clips are others
    (tmp_path / "my_generators.py").write_text(f"{block}# edited\n")
    edited = generation.get_backend("my_generators:TangoFlux", steps=4)
    assert not {*generation.generate_clips(small_plan(1), edited, tmp_path / "clips").path} & {
        *made.path
    }


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_every_way_of_sharing_out_the_work_leaves_the_bytes_alone(backends, name):
    table = tiny_checkpoints.check_invariance(backends[name], THREE, 0.25, clips_per_pass=2)
    exact, passes = table[:-1], table.iloc[-1]
    assert len(exact) == 4 and passes.change == "passes of 2"
    assert exact.same_bytes.all() and (exact.max_difference == 0).all()
    assert passes.max_difference < 1e-3


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_half_precision_is_as_independent_of_the_batch(checkpoints, name, dtype):
    options = {"checkpoint": checkpoints[name], "steps": 2, "device": "cpu", "dtype": dtype}
    backend = generation.get_backend(name, **options)
    table = tiny_checkpoints.check_invariance(backend, THREE, 0.25, clips_per_pass=2)
    assert table.same_bytes[:-1].all()
    assert table.max_difference.iloc[-1] < HALF_TOLERANCE


def test_licence_and_size_are_said_before_a_download(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for checkpoint, note in [
        ("stabilityai/stable-audio-open-1.0", "Stability AI Community License.* 5.3 GB"),
        ("someone/else", "licence and size not known here"),
    ]:
        with pytest.raises(ldm.CheckpointError, match="cannot be opened"):
            generation.get_backend("stable-audio", checkpoint=checkpoint)
        assert re.search(note, capsys.readouterr().err)


def test_nothing_is_said_of_what_is_there(checkpoints, capsys):
    generation.get_backend("audioldm", checkpoint=checkpoints["audioldm"], device="cpu")
    assert capsys.readouterr().err == ""


def test_known_checkpoints_cover_every_preset_and_named_backend():
    known = generation.CHECKPOINTS
    for name in generation.PRESETS:
        preset = generation.preset(name)
        assert known.loc[preset["checkpoint"], "backend"] == preset["backend"]
    assert set(known.backend) == set(generation.BACKENDS) - {"auto"}


@pytest.mark.parametrize("name", generation.PRESETS)
def test_presets_run_on_any_checkpoint_of_their_kind(backends, checkpoints, name):
    # in the folder where audiocraft finds the tiny T5, which `backends` has gone to
    preset = generation.preset(name)
    options = {"checkpoint": checkpoints[preset["backend"]], "device": "cpu"}
    if preset["backend"] == "audiogen":
        options["top_k"] = 8  # the tiny vocabulary has 32 tokens
    backend = generation.get_backend(name, **options)
    published = set(generation.PRESETS[name]) & set(generation.BACKENDS[preset["backend"]])
    for key in published - {"checkpoint"}:
        assert backend.settings[key] == (preset | options)[key]


def test_what_is_not_given_is_none_and_what_is_given_holds():
    # values that equal a default are values like any other
    preset = generation.preset("ronchini2024-audioldm2")
    assert (preset | {"duration_s": 2.56})["duration_s"] == 2.56
    given = {"checkpoint": "builtin", "steps": None, "device": "cpu"}
    backend = generation.get_backend("gaurav2024-audioldm", **given)
    assert (backend.checkpoint, backend.settings["steps"]) == ("builtin", 200)


def test_a_backend_of_your_own_is_named_by_module_and_class(monkeypatch):
    backend = generation.get_backend("tiny_checkpoints:Tones", bad={1: 0.0}, pause=None)
    assert isinstance(backend, Tones) and backend.bad == {1: 0.0}
    for name in ("tiny_checkpoints:Overtones", "no_such_module:Tones"):
        with pytest.raises(store.DataError, match=f"{name}: cannot be imported"):
            generation.get_backend(name)


def test_audiogen_without_chance_is_what_audiocraft_makes(backends, checkpoints):
    greedy = generation.get_backend(
        "audiogen", checkpoint=checkpoints["audiogen"], top_k=1, device="cpu", clips_per_pass=2
    )
    prompts = ["a dog", "a cat"]
    ours = greedy.generate(prompts, [1, 2], 1.0)
    greedy.pipe.set_generation_params(use_sampling=False, duration=1.02, cfg_coef=3.0)
    reference = greedy.pipe.generate(prompts).numpy()[:, 0]
    np.testing.assert_array_equal(np.stack(ours), reference)


def test_audiogen_makes_the_same_without_xformers(backends, checkpoints):
    # audiocraft is imported once a process; this one had xformers, if it is installed
    code = (
        "import sys\n"
        "sys.modules['xformers'] = None\n"
        "from soundscapes_utils import generation\n"
        "options = {'checkpoint': sys.argv[1], 'top_k': 8, 'device': 'cpu'}\n"
        "backend = generation.get_backend('audiogen', **options)\n"
        "clips = backend.generate(['a dog', 'a cat'], [1, 2], 1.0)\n"
        "assert sys.modules['xformers'].ops.memory_efficient_attention is None\n"
        "sys.stdout.write(''.join(clip.tobytes().hex() for clip in clips))"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, str(checkpoints["audiogen"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = backends["audiogen"].generate(["a dog", "a cat"], [1, 2], 1.0)
    assert done.stdout == "".join(clip.tobytes().hex() for clip in ours)


def test_audiogen_draws_tokens_with_their_probabilities(backends, monkeypatch):
    import torch
    from audiocraft.utils import utils

    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    counts = []

    def generate(prompts):
        # (rows, codebooks, tokens): 2 × 4000 draws
        drawn = utils.multinomial(wanted.expand(2, 4000, 5), num_samples=1)
        assert drawn.shape == (2, 4000, 1)
        counts.append(torch.bincount(drawn.flatten(), minlength=5) / 8000)
        return torch.zeros(2, 1, 10)

    backend = backends["audiogen"]
    monkeypatch.setattr(backend.pipe, "generate", generate)
    monkeypatch.setitem(backend.settings, "clips_per_pass", 2)
    backend.generate(["a dog", "a cat"], [3, 4], 0.5)
    np.testing.assert_allclose(counts[0], wanted, atol=0.02)  # four standard deviations
    assert utils.multinomial.__module__ == "audiocraft.utils.utils", "must be put back"


def test_audiocraft_is_imported_without_laion_clap(tmp_path, monkeypatch):
    # stand-ins, because the real ones are imported once a process
    (tmp_path / "laion_clap.py").write_text("")
    (tmp_path / "audiocraft.py").write_text(
        "try:\n    import laion_clap\nexcept ImportError:\n    laion_clap = None\n"
        "class models:\n    class AudioGen:\n        sample_rate = 16000\n"
        "        get_pretrained = classmethod(lambda cls, name, device: cls)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("audiocraft", "laion_clap"):
        # set first: a name that was not there is taken out again afterwards only when it was set
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]

    def open_audiogen():
        generation.get_backend("audiogen", checkpoint=tmp_path, device="cpu")
        return sys.modules["audiocraft"]

    assert open_audiogen().laion_clap is None
    import laion_clap

    assert laion_clap.__file__ == str(tmp_path / "laion_clap.py"), "importable again afterwards"
    monkeypatch.delitem(sys.modules, "audiocraft")
    assert open_audiogen().laion_clap is None
    assert sys.modules["laion_clap"] is laion_clap, "and left alone where it was there before"


@pytest.mark.skipif(
    not (ldm.BUILTIN_CHECKPOINT / "model_index.json").is_file(),
    reason="the built-in checkpoint has not been made",
)
def test_builtin_checkpoint_makes_the_same_clip_alone_and_in_a_batch():
    backend = generation.get_backend("audioldm", steps=3, device="cpu")
    together = backend.generate(PROMPTS[:5], SEEDS[:5], 1.28)
    alone = backend.generate(PROMPTS[4:5], SEEDS[4:5], 1.28)[0]
    np.testing.assert_array_equal(together[4], alone)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("audiomagic", {}, "audioldm, audioldm2, audiogen.*ronchini2024-audioldm2"),
        ("auto", {}, "needs a checkpoint"),
        ("audiogen", {"steps": 3}, "it takes .*top_k"),
        ("audioldm", {"clips_per_pass": 0}, "at least 1"),
        ("audioldm", {"dtype": "float8", "checkpoint": "cvssp/audioldm-s-full-v2"}, "float16"),
        ("audioldm2", {"checkpoint": "/no/such/folder"}, "/no/such/folder"),
        ("audiogen", {"checkpoint": "no/such-model"}, "no/such-model"),
    ],
)
def test_impossible_backends_are_refused_by_name(name, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((GenerationError, ldm.CheckpointError), match=message):
        generation.get_backend(name, **options)


@pytest.mark.parametrize(
    ("prompts", "seeds", "duration_s", "message"),
    [
        (["a", "b"], [1], 1.0, "2 prompts, 1 seeds"),
        (["a", " "], [1, 2], 1.0, "a prompt is empty"),
        (["a"], [1], 0.0, "must be positive"),
        (["a"], [1], float("nan"), "must be positive"),
    ],
)
def test_impossible_requests_are_refused(backends, prompts, seeds, duration_s, message):
    with pytest.raises(GenerationError, match=message):
        backends["audioldm"].generate(prompts, seeds, duration_s)


def test_audiogen_refuses_a_negative_prompt(backends):
    with pytest.raises(GenerationError, match="no negative prompt"):
        backends["audiogen"].generate(["a dog"], [1], 0.5, ["hiss"])


# --- plans -------------------------------------------------------------------------------------


@given(st.text(), st.text(), st.text(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_clip_seed_depends_on_every_part_of_the_identity(dataset, label, prompt, index, seed):
    own = generation.clip_seed(dataset, label, prompt, index, seed)
    assert 0 <= own < 2**32
    others = {
        generation.clip_seed(dataset + "x", label, prompt, index, seed),
        generation.clip_seed(dataset, label + "x", prompt, index, seed),
        generation.clip_seed(dataset, label, prompt + "x", index, seed),
        generation.clip_seed(dataset, label, prompt, index + 1, seed),
        generation.clip_seed(dataset, label, prompt, index, seed + 1),
    }
    assert own not in others


def test_clip_seed_does_not_confuse_its_parts():
    assert generation.clip_seed("a", "bc", "d", 0) != generation.clip_seed("ab", "c", "d", 0)


@pytest.mark.parametrize("family", ["simple", "varied", ["label", "gpt"]])
def test_a_longer_plan_contains_the_shorter_one(family):
    short = generation.plan_clips(["dog"], 3, family, duration_s=1.0)
    long = generation.plan_clips(["rain", "dog"], 40, family, duration_s=1.0)
    assert list(short.columns) == generation.PLAN_COLUMNS
    assert long.clip_id.is_unique
    both = short.merge(long, on=generation.PLAN_COLUMNS)
    assert len(both) == len(short)


def test_counts_may_differ_by_class():
    counts = {"dog": 4, "rain": 10}
    plan = generation.plan_clips(["rain", "dog"], counts, ["simple", "task"], duration_s=1.0)
    assert plan.groupby(["label", "prompt_family"]).size().to_dict() == {
        ("dog", "simple"): 4,
        ("dog", "task"): 4,
        ("rain", "simple"): 10,
        ("rain", "task"): 10,
    }
    equal = generation.plan_clips(["rain", "dog"], 10, ["simple", "task"], duration_s=1.0)
    assert len(plan.merge(equal, on=generation.PLAN_COLUMNS)) == len(plan)
    with pytest.raises(GenerationError, match="no number of clips for the classes"):
        generation.plan_clips(["dog", "cat"], counts, duration_s=1.0)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        (5, {"car_horn": 5, "siren": 5}),
        ({"siren": 1, "car_horn": 2, "dog": 3}, {"car_horn": 2, "siren": 1}),
        ("150%", {"car_horn": 2, "siren": 3}),
        ("1%", {"car_horn": 1, "siren": 1}),
        ("ronchini2024", {"car_horn": 429, "siren": 929}),
        (" ronchini2024 400 % ", {"car_horn": 1716, "siren": 3716}),
    ],
)
def test_counts_are_a_number_a_table_or_a_share(counts, wanted):
    assert generation.class_counts(counts, ["siren", "car_horn", "siren"]) == wanted


def test_counts_of_urbansound8k_are_those_of_the_data_set():
    labels = "air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot"
    labels = [*labels.split(), "jackhammer", "siren", "street_music"]
    counts = generation.class_counts("ronchini2024", labels)
    assert sum(counts.values()) == 8732
    assert [counts[name] for name in ("siren", "car_horn", "gun_shot")] == [929, 429, 374]
    assert sum(generation.class_counts("ronchini2024 400%", labels).values()) == 4 * 8732


@pytest.mark.parametrize(
    ("counts", "label", "message"),
    [
        ("esc50", "siren", "counts is 'esc50': give a number, '200%'"),
        ("", "siren", "counts is ''"),
        ("0%", "siren", "counts is '0%'"),
        ("ronchini2024", "dog", "no number of clips for the classes .'dog'."),
        ({"dog": 1}, "cat", "no number of clips for the classes .'cat'."),
    ],
)
def test_impossible_counts_are_refused(counts, label, message):
    with pytest.raises(GenerationError, match=message):
        generation.class_counts(counts, [label])


def test_a_preset_says_all_that_goes_with_it():
    preset = generation.preset("ronchini2024-audioldm2")
    assert (preset["checkpoint"], preset["duration_s"]) == ("cvssp/audioldm2", 4.0)
    assert (preset["dtype"], preset["loudness"]) == ("float16", "none")
    assert generation.preset("ronchini2024-audiogen")["loudness"] == "audiocraft"
    assert generation.preset("gaurav2024-audioldm")["candidates"] == 3
    for name, checkpoint in [
        ("audioldm", "builtin"),
        ("audiogen", "facebook/audiogen-medium"),
        ("auto", None),
    ]:
        plain = {"checkpoint": checkpoint, "duration_s": 2.56, "candidates": 1, "loudness": "peak"}
        assert plain.items() <= generation.preset(name).items()


def test_captions_of_mixes_become_a_plan():
    mixes = pd.DataFrame(
        {"clip_id": ["m1", "m2"], "label": ["dog", "rain"], "caption": ["same", "same"]}
    )
    plan = generation.plan_captions(mixes, duration_s=2.56)
    assert plan.clip_id.tolist() == ["m1", "m2"]
    assert plan.prompt.tolist() == ["same", "same"]
    assert plan.seed.nunique() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.drop(columns="seed"), "has no column seed"),
        (lambda plan: plan.iloc[:0], "no rows"),
        (lambda plan: pd.concat([plan, plan]), "dog-simple-0000 appears twice"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_made(tmp_path, change, message):
    backend = Tones()
    with pytest.raises(store.DataError, match=message):
        generation.generate_clips(change(small_plan()), backend, tmp_path)
    assert backend.asked == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("clip_id", name) for name in ("../x", "/tmp/x", "a/b", "a\\b", "..", ".x", "", None, 7)),
        *(("label", label) for label in ("", " ", None, np.nan)),
        *(("prompt", prompt) for prompt in ("", None)),
        *(("seed", seed) for seed in (np.nan, None, "", -1, 0.5, np.inf)),
        *(("duration_s", seconds) for seconds in (np.nan, None, 0.0, -1.0, np.inf, "long")),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_row_and_column(tmp_path, column, value):
    plan, backend = small_plan().astype({column: object}), Tones()
    plan.loc[3, column] = value
    with pytest.raises(store.DataError, match=rf"plan, row 4: {column} "):
        generation.generate_clips(plan, backend, tmp_path / "out")
    assert backend.asked == [] and not list(tmp_path.rglob("*"))


def test_numbers_of_a_plan_may_be_written_in_any_way(tmp_path):
    plan = small_plan(1, ["dog"]).assign(duration_s=1.0)
    written = plan.astype({"seed": float, "duration_s": int}).drop(columns="negative_prompt")
    first = generation.generate_clips(plan, Tones(), tmp_path)
    again = Tones()
    pd.testing.assert_frame_equal(generation.generate_clips(written, again, tmp_path), first)
    assert again.asked == []


# --- batches -----------------------------------------------------------------------------------


def test_batch_size_order_and_shards_leave_the_files_alone(backends, tmp_path):
    backend, plan = backends["audioldm"], small_plan()
    generation.generate_clips(plan, backend, tmp_path / "one", batch_size=1)
    generation.generate_clips(plan[::-1], backend, tmp_path / "five", batch_size=5)
    for shard in ("2/2", "1/2"):
        generation.generate_clips(plan, backend, tmp_path / "shards", batch_size=4, shard=shard)
    one = contents(tmp_path / "one")
    assert len(one) == 6
    assert one == contents(tmp_path / "five") == contents(tmp_path / "shards")
    whole = generation.generate_clips(plan, backend, tmp_path / "shards")
    assert whole.clip_id.tolist() == plan.clip_id.tolist()


@pytest.mark.parametrize("name", ["audioldm", "audioldm2", *AUDIOCRAFT])
def test_no_pass_is_filled_up_but_the_last_of_each_length(backends, tmp_path, monkeypatch, name):
    import torch

    backend, passes = backends[name], []
    tone = torch.sin(torch.arange(round(0.25 * backend.sample_rate)) / 10)

    class Counted(type(backend.pipe)):
        def __call__(self, prompts, generator, **options):
            passes.append(len({one.initial_seed() for one in generator}))
            return types.SimpleNamespace(audios=tone.expand(len(prompts), -1))

        __call__.__signature__ = inspect.signature(type(backend.pipe).__call__)

    def generate(prompts):
        passes.append(len(prompts))
        return tone.expand(len(prompts), 1, -1)

    monkeypatch.setitem(backend.settings, "clips_per_pass", 8)
    if name in AUDIOCRAFT:
        monkeypatch.setattr(backend.pipe, "generate", generate)
    else:
        monkeypatch.setattr(type(backend.pipe), "__call__", Counted.__call__)
    # three lengths of prompt that take turns in the plan
    plan = pd.concat(
        [small_plan(20, ["dog"]), small_plan(9, ["rain"]), small_plan(11, ["helicopter"])]
    ).sample(frac=1, random_state=0)
    generation.generate_clips(plan, backend, tmp_path)
    # CLAP's text tower pads all prompts to one length, T5 does not
    assert len(passes) == (5 if name == "audioldm" else 3 + 2 + 2)
    assert name in AUDIOCRAFT or sum(passes) == 40


@pytest.mark.parametrize(("per_pass", "calls"), [(1, [16, 16, 8]), (4, [32, 8]), (32, [40])])
def test_a_call_is_of_eight_passes_or_of_sixteen_clips(tmp_path, per_pass, calls):
    sizes = []

    class Counted(Tones):
        def generate(self, prompts, *request):
            sizes.append(len(prompts))
            return super().generate(prompts, *request)

    backend = Counted()
    backend.settings = {"clips_per_pass": per_pass}
    generation.generate_clips(small_plan(20), backend, tmp_path)
    assert sizes == calls


def test_a_shard_without_rows_is_empty(tmp_path):
    done = generation.generate_clips(small_plan(1, ["dog"]), Tones(), tmp_path, shard="2/2")
    assert done.empty
    assert list(done.columns) == generation.GENERATED_COLUMNS


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", 1])
def test_impossible_shards_are_refused(tmp_path, shard):
    with pytest.raises(store.DataError, match="give 'i/n'"):
        generation.generate_clips(small_plan(), Tones(), tmp_path, shard=shard)


@pytest.mark.parametrize("bar", [False, True])
def test_short_work_shows_its_progress_on_a_terminal_alone(monkeypatch, capsys, tmp_path, bar):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bar, raising=False)
    generation.generate_clips(small_plan(5), Tones(), tmp_path, batch_size=1)
    printed = capsys.readouterr()
    assert ("10/10" in printed.err) == bar and printed.out == ""


# --- command line ------------------------------------------------------------------------------


def test_command_line_makes_a_plan_in_shards(tmp_path, capsys):
    from soundscapes_utils.__main__ import main

    plan, out = small_plan(2), str(tmp_path / "clips")
    path = str(tmp_path / "plan.csv")
    plan.to_csv(path, index=False)
    options = ["-o", "steps", "1", "-o", "device", "cpu", "--loudness", "-30"]
    for shard in ("1/2", "2/2"):
        assert not (tmp_path / "clips/generated.csv").exists()
        assert main(["generate", path, out, *options, "--shard", shard]) == 0
    in_shards = (tmp_path / "clips/generated.csv").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.wav")}
    assert main(["generate", path, out, *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "clips/generated.csv").read_bytes() == in_shards
    first, told, *_, last, _, _ = capsys.readouterr().out.splitlines()
    assert told == "1 of 2 shards are done: the table comes with the last"
    assert re.search("2 clips .*: 2 made, 0 kept, 0 outputs rejected; .* s, .* clips/s$", first)
    assert re.search("4 clips .*: 0 made, 4 kept, 0 outputs rejected; .* s, 0.00 clips/s$", last)
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    assert table.clip_id.tolist() == plan.clip_id.tolist()
    assert (table.lufs <= -29.9).all()
    assert (table.steps == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "audiomagic"], "unknown backend"),
        (["-o", "stepz", "3"], "no option stepz"),
        (["-o", "device", "cpu", "--shard", "3/2"], "i from 1 to n"),
        (["-o", "device", "cpu", "--loudness", "loud"], "LUFS"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, capsys, arguments, message):
    from soundscapes_utils.__main__ import main

    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    assert main(["generate", str(tmp_path / "plan.csv"), str(tmp_path), *arguments]) == 1
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_command_line_makes_clips_of_prompts_in_turn(tmp_path, monkeypatch):
    from soundscapes_utils.__main__ import main

    monkeypatch.setattr(generation, "get_backend", lambda name, **options: Tones())
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "one", "--prompt", "a forklift beeping", "-n", "3", "--seconds", "1"]) == 0
    table = pd.read_csv("one/generated.csv")
    assert table.prompt.tolist() == ["a forklift beeping"] * 3 and table.seed.nunique() == 3
    assert (table.duration_s == 1).all() and all((tmp_path / "one" / p).is_file() for p in table.path)
    (tmp_path / "mine.txt").write_text("a pump\n\nrain on a roof\n")
    pd.DataFrame({"prompt": ["a pump", "rain on a roof"], "label": "x"}).to_csv("mine.csv")
    for file in ("mine.txt", "mine.csv"):
        assert main(["generate", file[-3:], "--prompts", file, "-n", "3"]) == 0
        table = pd.read_csv(f"{file[-3:]}/generated.csv")
        assert table.prompt.tolist() == ["a pump", "rain on a roof", "a pump"]
        assert table.seed.nunique() == 3 and table.clip_id[0] == "a_pump-0000"


def test_command_line_takes_the_level_of_a_preset(tmp_path, monkeypatch):
    from soundscapes_utils.__main__ import main

    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    monkeypatch.setattr(generation, "get_backend", lambda name, **options: Tones())
    arguments = ["generate", str(tmp_path / "plan.csv"), str(tmp_path / "clips")]
    assert main([*arguments, "--backend", "ronchini2024-audiogen"]) == 0
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    assert table.lufs.between(-15, -14).all(), "the compressor takes a little"


def test_command_line_keeps_the_candidate_that_suits_its_prompt_best(tmp_path, monkeypatch, capsys):
    from soundscapes_utils import selection
    from soundscapes_utils.__main__ import main

    small_plan(1).drop(columns="duration_s").to_csv(tmp_path / "plan.csv", index=False)
    monkeypatch.setattr(generation, "get_backend", lambda name, **options: Tones())
    asked = []

    def last(candidates, generated, clap):
        asked.append(clap)
        return selection.best_candidates(candidates, generated, np.arange(len(generated)))

    monkeypatch.setattr(selection, "best_by_clap", last)
    arguments = ["generate", str(tmp_path / "plan.csv"), str(tmp_path / "clips")]
    assert main([*arguments, "--backend", "gaurav2024-audioldm", "--clap", "mini-clap"]) == 0
    assert asked == ["mini-clap"]
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    assert table.score.tolist() == [2, 5]
    assert (table.duration_s == 4.0).all(), "the preset's, where the plan says nothing"
    assert "2 clips chosen of 6 candidates" in capsys.readouterr().out
    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    assert main([*arguments, "--backend", "gaurav2024-audioldm", "--best-of", "1"]) == 0
    assert "other durations than the 4.0 s of gaurav2024-audioldm" in capsys.readouterr().out


# --- levels ------------------------------------------------------------------------------------


def test_loudness_is_what_was_asked_for_and_recorded(tmp_path):
    plan, levels = small_plan(1, ["dog"]), {"peak": None, "none": None, -23.0: -23.0, -3.0: None}
    for level, lufs in levels.items():
        folder = tmp_path / str(level)
        done = generation.generate_clips(plan, Tones(), folder, loudness=level)
        y = audio.load_audio(done.path[0])[0]
        made = Tones().generate(["x"], plan.seed.tolist(), 0.25)[0]
        (entry,) = store.Records(folder, "clips").entries.values()
        assert entry["loudness"] == level
        np.testing.assert_allclose(y, made * entry["gain"], atol=2e-5)
        if lufs:
            assert audio.loudness(y, 8000) == pytest.approx(lufs, abs=0.05)
    # -3 LUFS cannot be had below the highest peak
    np.testing.assert_allclose(np.abs(y).max(), generation.PEAK, atol=1e-4)


def audiocraft_level(y, rate, monkeypatch):
    """As audiocraft's own function writes it; where it is not installed, by its formula."""
    import torch

    monkeypatch.setitem(sys.modules, "laion_clap", None)  # which asks the network as it is imported
    try:
        from audiocraft.data.audio_utils import normalize_audio as normalise
    except ImportError:
        import torchaudio

        lufs = torchaudio.functional.loudness(torch.from_numpy(y)[None], rate).item()
        quiet = np.sqrt(np.mean(y.astype(float) ** 2)) < 2e-3
        return y if quiet else np.tanh(y * 10 ** ((-14 - lufs) / 20))
    options = {"strategy": "loudness", "loudness_compressor": True, "sample_rate": rate}
    return normalise(torch.from_numpy(y)[None], **options)[0].numpy()


def test_audiocrafts_level_is_what_audiocraft_writes(tmp_path, monkeypatch):
    rng, rate = np.random.default_rng(0), Tones.sample_rate
    t = np.arange(rate) / rate
    sounds = {
        "a tone": 0.3 * np.sin(2 * np.pi * 300 * t),
        "noise": 0.02 * rng.normal(size=rate),
        "a click in noise, far over full scale": 0.01 * rng.normal(size=rate) + 0.9 * (t == 0.5),
        "louder than full scale": 3.0 * np.sin(2 * np.pi * 300 * t) * np.exp(-t),
        "below its floor": 0.0015 * np.sin(2 * np.pi * 300 * t),
        "dying away": rng.normal(size=rate) * 0.1 * np.exp(-9 * t),
    }

    class Fixed(Tones):
        def generate(self, prompts, seeds, duration_s, negative_prompts=None):
            return [np.float32(list(sounds.values())[seed]) for seed in seeds]

    plan = small_plan(len(sounds), ["dog"]).assign(seed=range(len(sounds)), duration_s=1.0)
    made = generation.generate_clips(plan, Fixed(), tmp_path, max_attempts=1, loudness="audiocraft")
    for path, (name, y) in zip(made.path, sounds.items(), strict=True):
        # a step of 16 bits, and the last digits of two measures of loudness
        wanted = audiocraft_level(np.float32(y), rate, monkeypatch)
        np.testing.assert_allclose(audio.load_audio(path)[0], wanted, atol=1e-4, err_msg=name)


def test_samples_of_audioldm2s_preset_are_written_as_the_model_made_them(tmp_path):
    level = generation.preset("ronchini2024-audioldm2")["loudness"]
    plan = small_plan(2)
    made = generation.generate_clips(plan, Tones(), tmp_path, loudness=level)
    for path, seed in zip(made.path, made.seed, strict=True):
        y = Tones().generate(["x"], [seed], 0.25)[0]
        np.testing.assert_allclose(audio.load_audio(path)[0], y, atol=2e-5)


def test_other_levels_are_other_files(tmp_path):
    plan = small_plan(1, ["dog"])
    for level in ("peak", "none", -23.0, -24.0, "peak"):
        generation.generate_clips(plan, Tones(), tmp_path, loudness=level)
    assert len(contents(tmp_path)) == 4


def reasons(folder, *sounds):
    """Why each of some sounds is rejected, each made in place of a tone."""

    class Fixed(Tones):
        def generate(self, prompts, seeds, duration_s, negative_prompts=None):
            return [np.asarray(sounds[seed], np.float32) for seed in seeds]

    plan = pd.DataFrame({"clip_id": [f"clip-{i}" for i in range(len(sounds))], "label": "any"})
    plan = plan.assign(prompt="any", prompt_family="any", negative_prompt="", duration_s=1.0)
    plan["seed"] = range(len(sounds))
    with warnings.catch_warnings(action="ignore"):
        generation.generate_clips(plan, Fixed(), folder, max_attempts=1)
    rejected = generation.rejected_clips(folder).set_index("seed").reason
    return [rejected.get(i, "") for i in range(len(sounds))]


def test_clipped_and_silent_outputs_are_rejected(tmp_path):
    t = np.arange(8000) / 8000
    sine = np.sin(2 * np.pi * 100 * t)
    sounds = {
        "whole": (0.999 * sine, ""),
        "flat at both ends": (np.clip(2 * sine, -1, 1), "clipped"),
        "flat at one end": (np.clip(2 * sine, -1.5, 0.9), "clipped"),
        "silence at one end is not a flat top": (np.maximum(sine, 0), ""),
        "a peak that is met now and then": (np.sin(2 * np.pi * 1000 * t), ""),
        "a constant offset is silence": (np.full(8000, 0.7), "silent"),
        "but not with a sound on it": (0.7 + 0.01 * sine, ""),
        "one broken sample": (np.append(sine[1:], np.nan), "not finite"),
    }
    wanted = {name: reason for name, (_, reason) in sounds.items()}
    found = reasons(tmp_path, *(y for y, _ in sounds.values()))
    assert dict(zip(sounds, found, strict=True)) == wanted


def test_what_passes_full_scale_is_rejected_where_the_level_stays(tmp_path):
    plan = small_plan(1, ["dog"])
    loud = Tones(bad={int(plan.seed[0]): 4.0})
    done = generation.generate_clips(plan, loud, tmp_path, loudness="none")
    assert generation.rejected_clips(tmp_path).reason.tolist() == ["beyond full scale"]
    assert done.seed.tolist() == [plan.seed[0] + 1]


def test_what_has_no_loudness_is_rejected(tmp_path):
    class Clicks(Tones):
        def generate(self, prompts, seeds, duration_s, negative_prompts=None):
            sounds = super().generate(prompts, seeds, duration_s)
            click = np.zeros(2000, np.float32)
            click[1000] = 0.002
            return [click if seed == bad else y for seed, y in zip(seeds, sounds, strict=True)]

    plan = small_plan(1, ["dog"])
    bad = plan.seed[0]
    done = generation.generate_clips(plan, Clicks(), tmp_path, loudness=-23.0)
    assert generation.rejected_clips(tmp_path).reason.tolist() == ["below -70 LUFS"]
    assert done.seed.tolist() == [bad + 1]


@pytest.mark.parametrize("loudness", ["loud", 3.0, -80.0, True, None])
def test_impossible_levels_are_refused(tmp_path, loudness):
    with pytest.raises(GenerationError, match="loudness is"):
        generation.generate_clips(small_plan(), Tones(), tmp_path, loudness=loudness)
    with pytest.raises(GenerationError, match="max_attempts is 0"):
        generation.generate_clips(small_plan(), Tones(), tmp_path, max_attempts=0)


def test_generated_table_describes_the_files(tmp_path):
    plan = small_plan()
    generated = generation.generate_clips(plan, Tones(), tmp_path)
    assert list(generated.columns) == generation.GENERATED_COLUMNS
    assert generated.score.isna().all()
    for row in generated.itertuples():
        y, rate = audio.load_audio(row.path)
        assert rate == row.sample_rate
        assert len(y) == round(row.duration_s * rate)
        assert 20 * np.log10(np.abs(y).max()) == pytest.approx(-1.0, abs=0.01)
        assert audio.loudness(y, rate) == pytest.approx(row.lufs, abs=0.02)


def test_tables_survive_a_csv_file(tmp_path):
    plan = small_plan()
    plan.to_csv(tmp_path / "plan.csv", index=False)
    generated = generation.generate_clips(pd.read_csv(tmp_path / "plan.csv"), Tones(), tmp_path)
    assert (generated.negative_prompt == "").all()
    again = Tones()
    generation.generate_clips(plan, again, tmp_path)
    assert again.asked == []
    generated.to_csv(tmp_path / "generated.csv", index=False)
    read_back = store.read_table(tmp_path / "generated.csv")
    assert read_back.seed.tolist() == plan.seed.tolist()
    assert read_back.lufs.tolist() == generated.lufs.tolist()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    plan = small_plan(4)
    with pytest.raises(KeyboardInterrupt):
        generation.generate_clips(plan, Tones(interrupt_at=4), tmp_path, batch_size=2)
    again = Tones()
    generated = generation.generate_clips(plan, again, tmp_path, batch_size=2)
    assert again.asked == plan.seed.tolist()[4:]
    assert len(generated) == 8
    third = Tones()
    generation.generate_clips(plan, third, tmp_path)
    assert third.asked == []


def test_a_killed_process_leaves_only_whole_clips(tmp_path):
    code = (
        "from tiny_checkpoints import Tones; from soundscapes_utils import generation as g;"
        "plan = g.plan_clips(['dog', 'rain'], 50, duration_s=0.25);"
        f"g.generate_clips(plan, Tones(pause=0.05), {str(tmp_path)!r}, batch_size=1)"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 300  # only a bound for a loaded machine
        while len(contents(tmp_path)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    made_before = len(contents(tmp_path))
    backend, plan = Tones(), small_plan(50)
    generated = generation.generate_clips(plan, backend, tmp_path)
    assert made_before < 100
    assert 100 - made_before <= len(backend.asked) <= 101 - made_before
    assert all(len(audio.load_audio(path)[0]) == 2000 for path in generated.path)


def test_damage_is_repaired(tmp_path):
    plan = small_plan()
    generation.generate_clips(plan, Tones(), tmp_path)
    whole = contents(tmp_path)
    cut, gone, *_ = sorted(tmp_path.glob("*.wav"))
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    (record,) = (tmp_path / ".records").iterdir()
    # a line cut short, as by a kill: the last clip is unknown to the records
    record.write_text(record.read_text()[:-30])
    backend = Tones()
    generation.generate_clips(plan, backend, tmp_path)
    assert len(backend.asked) == 3
    assert contents(tmp_path) == whole
    last = Tones()
    generation.generate_clips(plan, last, tmp_path)
    assert last.asked == []


def test_a_clip_replaced_by_other_bytes_of_the_same_length_is_made_again(tmp_path):
    plan = small_plan()
    made = generation.generate_clips(plan, Tones(), tmp_path)
    whole = contents(tmp_path)
    first, second, third = map(Path, made.path[:3])
    first.write_bytes(whole[second.name])  # of the same length
    second.write_bytes(b"")
    third.write_bytes(third.read_bytes())  # another time, the same content
    backend = Tones()
    again = generation.generate_clips(plan, backend, tmp_path)
    assert backend.asked == made.seed[:2].tolist()
    assert contents(tmp_path) == whole and again.equals(made)


def test_a_copied_folder_is_known_and_read_where_it_lies(tmp_path):
    import shutil

    plan = small_plan()
    made = generation.generate_clips(plan, Tones(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "a")
    backend = Tones()
    again = generation.generate_clips(plan, backend, tmp_path / "b")
    assert backend.asked == [] and again.drop(columns="path").equals(made.drop(columns="path"))
    assert all(Path(path).is_file() for path in again.path)


@pytest.mark.parametrize(
    "change", [lambda _: {}, lambda _: {"path": "../../x"}, lambda e: e | {"stamp": 5}]
)
def test_damaged_records_are_made_again_and_never_lead_elsewhere(tmp_path, change):
    import json

    plan = small_plan(2)
    made = generation.generate_clips(plan, Tones(), tmp_path)
    (file,) = (tmp_path / ".records").iterdir()
    key, entry = json.loads(file.read_text().splitlines()[0])
    with file.open("a") as records:
        records.write(json.dumps([key, change(entry)]) + '\n5\n{}\nnull\n["torn')
    backend = Tones()
    assert generation.generate_clips(plan, backend, tmp_path).equals(made)
    assert backend.asked == made.seed[:1].tolist()
    assert generation.rejected_clips(tmp_path).empty


def test_what_is_said_of_a_known_clip_is_what_this_plan_and_this_model_say(tmp_path):
    plan, backend = small_plan(1), Tones()
    generation.generate_clips(plan, backend, tmp_path)
    backend.heard = {"esc10": [1]}
    other = plan.assign(label=plan.label.to_numpy()[::-1], prompt_family="mine")
    made = generation.generate_clips(other, backend, tmp_path)
    assert len(backend.asked) == 2, "the sounds are the same"
    assert made.label.tolist() == other.label.tolist() and set(made.prompt_family) == {"mine"}
    assert set(made.heard) == {"esc10:1"}


def test_other_settings_and_other_weights_are_other_clips(checkpoints, tmp_path):
    plan = small_plan(1, ["dog"])
    first, other_steps = Tones(), Tones()
    other_steps.settings = {"steps": 2}
    generation.generate_clips(plan, first, tmp_path)
    generation.generate_clips(plan, other_steps, tmp_path)
    assert other_steps.asked == plan.seed.tolist()
    assert len(contents(tmp_path)) == 2

    folder = tmp_path / "retrained"
    for seed in (0, 1):
        tiny_checkpoints.audioldm(folder, seed=seed)
        backend = generation.get_backend("audioldm", checkpoint=folder, steps=1, device="cpu")
        generation.generate_clips(plan, backend, tmp_path / "same name")
    assert backend.checkpoint == "retrained"
    assert len(contents(tmp_path / "same name")) == 2


def test_useless_outputs_are_set_aside_and_made_again(tmp_path):
    plan = small_plan(2, ["dog"])
    silent, broken = plan.seed
    backend = Tones(bad={silent: 1e-4, broken: np.nan, broken + 1: np.nan})
    generated = generation.generate_clips(plan, backend, tmp_path)
    assert generated.seed.tolist() == [silent + 1, broken + 2]
    rejected = generation.rejected_clips(tmp_path)
    assert list(rejected.columns) == generation.REJECTED_COLUMNS
    assert dict(zip(rejected.seed, rejected.reason, strict=True)) == {
        silent: "silent",
        broken: "not finite",
        broken + 1: "not finite",
    }
    again = Tones()
    assert generation.generate_clips(plan, again, tmp_path).equals(generated)
    assert again.asked == []


def test_clips_that_never_succeed_are_reported(tmp_path):
    plan = small_plan(2, ["dog"])
    bad = {int(plan.seed[1]) + k: 0.0 for k in range(2)}
    with pytest.warns(UserWarning, match=r"1 of 2 clips .*dog-simple-0001"):
        generated = generation.generate_clips(plan, Tones(bad=bad), tmp_path, max_attempts=2)
    assert generated.clip_id.tolist() == ["dog-simple-0000"]
    with pytest.raises(GenerationError, match="Check the checkpoint"):
        generation.generate_clips(plan[1:], Tones(bad=bad), tmp_path, max_attempts=2)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(store.DataError, match=r"dog-simple-0000.*No space left"):
            generation.generate_clips(small_plan(), Tones(), tmp_path)
    assert len(generation.generate_clips(small_plan(), Tones(), tmp_path)) == 6


def test_records_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / ".records").write_text("")
    with pytest.raises(store.DataError, match=r".records: cannot be written"):
        generation.generate_clips(small_plan(), Tones(), tmp_path)


def test_a_row_says_what_its_generator_was_trained_on(tmp_path):
    backend = Tones()
    assert set(generation.generate_clips(small_plan(), backend, tmp_path / "a").heard) == {""}
    backend.heard = {"esc10": [4, 2]}
    table = generation.generate_clips(small_plan(), backend, tmp_path / "b")
    assert set(table.heard) == {"esc10:2,4"}
    assert (table.source_id == table.clip_id).all() and set(table.dataset) == {"generated"}
    assert table.fold.isna().all()
