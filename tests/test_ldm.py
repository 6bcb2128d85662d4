"""The pieces of AudioLDM against independent computations and through diffusers' own loading."""

import contextlib
import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoints
import torch
from diffusers import AudioLDMPipeline
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from soundscapes_utils import audio, datasets, ldm

ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10/audio"
needs_esc10 = pytest.mark.skipif(not ESC10.is_dir(), reason="../shared/data/ESC-10 is not there")
TEXTS = ["a dog is barking", "the sound of rain", "a rooster crowing in a park"] * 3


def textured_mels(n=6, frames=64, seed=0):
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(n, frames * ldm.HOP)) * np.linspace(0.1, 1, frames * ldm.HOP)
    return torch.stack([ldm.waveform_to_mel(y, frames) for y in waves])


@pytest.fixture(scope="module")
def small():
    pipe, tower = ldm.build_small(TEXTS, channels=(16, 32, 48))
    pipe.vae.fit(textured_mels())
    return pipe, tower.eval()


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    return ldm.save_checkpoint(small[0], folder, {"heard": {"noise": [2]}}, small[1])


def test_latent_is_the_whitened_pca_of_the_patches(small):
    mels = textured_mels()
    rows = mels.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 64).numpy()
    expected = PCA(32, whiten=True).fit(rows)
    latents = ldm.encode_mel(small[0], mels).movedim(1, -1).reshape(-1, 32).numpy()
    projected = expected.transform(rows)
    # principal axes are defined up to their sign
    for k in range(32):
        assert abs(np.corrcoef(latents[:, k], projected[:, k])[0, 1]) > 0.999
    assert latents.std(0) == pytest.approx(np.ones(32), rel=0.02)


def test_decoding_is_the_best_reconstruction_of_that_rank(small):
    mels = textured_mels()
    rows = mels.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 64).numpy()
    pca = PCA(32).fit(rows)
    best = np.mean((pca.inverse_transform(pca.transform(rows)) - rows) ** 2)
    ours = ldm.decode_latents(small[0], ldm.encode_mel(small[0], mels)) - mels
    assert float((ours**2).mean()) == pytest.approx(best, rel=1e-3)


def test_vocoder_meets_the_mel_and_repeats_itself(small):
    mels = textured_mels()
    y = ldm.vocode(small[0], mels)
    assert y.shape == (len(mels), mels.shape[1] * ldm.HOP)
    error = np.mean([np.abs(audio.log_mel(a) - m.numpy()).mean() for a, m in zip(y, mels, strict=True)])
    assert error < 0.2
    np.testing.assert_array_equal(y, ldm.vocode(small[0], mels))


def test_waveform_is_conditioned_as_the_trainer_does():
    y = np.random.default_rng(1).normal(2.0, 0.1, 10 * ldm.HOP).astype(np.float32)
    centred = y - y.mean()
    padded = np.pad(centred * 0.5 / np.abs(centred).max(), (0, 6 * ldm.HOP))
    mel = ldm.waveform_to_mel(y, 16).numpy()
    np.testing.assert_allclose(mel, audio.log_mel(padded), atol=1e-4)


def torchaudio_mel(y, n_frames):
    """The baseline trainer's front end, from its description, in torch's float64 and torchaudio."""
    from torchaudio.functional import melscale_fbanks

    y = torch.from_numpy(y[: n_frames * 160]).double()
    y = y - y.mean()
    y = 0.5 * y / (y.abs().max() + 1e-8)
    y = torch.nn.functional.pad(y, (0, n_frames * 160 - len(y)))
    y = torch.nn.functional.pad(y[None], (432, 432), mode="reflect")[0]
    window = torch.hann_window(1024, dtype=torch.float64)
    stft = torch.stft(y, 1024, 160, 1024, window, center=False, return_complex=True)
    filters = melscale_fbanks(513, 0.0, 8000.0, 64, 16_000, norm="slaney", mel_scale="slaney")
    return torch.log((stft.abs().T @ filters.double()).clamp(min=1e-5))


@needs_esc10
@pytest.mark.parametrize("number", [0, 57, 123, 211, 399])
def test_front_end_is_the_trainers_value_for_value_on_real_clips(number):
    path = sorted(ESC10.glob("*.ogg"))[number]
    y, _ = audio.load_audio(path, 16_000)
    ours = ldm.waveform_to_mel(y, 1024).double()  # 10.24 s: the clip of 5 s and zeros
    exact = torchaudio_mel(y, 1024)
    assert ours.shape == exact.shape == (1024, 64)
    assert float((ours - exact).abs().max()) < 1e-4


def full_size_parts():
    """What the benchmark of fine-tuning measures."""
    file = Path(__file__).parents[1] / "benchmarks" / "finetuning.py"
    spec = importlib.util.spec_from_file_location("benchmark_finetuning", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.build_audioldm_s("meta")


def pair(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(name, entry, exit_, time=0):
    found = pair(f"{name}.norm1", entry) | pair(f"{name}.conv1", exit_, entry, 3, 3)
    found |= pair(f"{name}.norm2", exit_) | pair(f"{name}.conv2", exit_, exit_, 3, 3)
    found |= pair(f"{name}.time_emb_proj", exit_, time) if time else {}
    return found | (pair(f"{name}.conv_shortcut", exit_, entry, 1, 1) if entry != exit_ else {})


def transformer(name, width):
    found = pair(f"{name}.norm", width)
    found |= pair(f"{name}.proj_in", width, width, 1, 1)
    found |= pair(f"{name}.proj_out", width, width, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for i in (1, 2, 3):
        found |= pair(f"{block}.norm{i}", width)
    for attention in ("attn1", "attn2"):
        found |= {f"{block}.{attention}.to_{x}.weight": (width, width) for x in "qkv"}
        found |= pair(f"{block}.{attention}.to_out.0", width, width)
    found |= pair(f"{block}.ff.net.0.proj", 8 * width, width)
    return found | pair(f"{block}.ff.net.2", width, 4 * width)


def published_unet():
    """128 channels times 1 2 3 5, two blocks a level, attention below the first; time and CLAP 512."""
    widths, time = [128, 256, 384, 640], 512 + 512
    found = pair("conv_in", 128, 8, 3, 3) | pair("class_embedding", 512, 512)
    found |= pair("time_embedding.linear_1", 512, 128) | pair("time_embedding.linear_2", 512, 512)
    skips, width = [128], 128
    for i, out in enumerate(widths):
        for j in range(2):
            found |= resnet(f"down_blocks.{i}.resnets.{j}", width, out, time)
            found |= transformer(f"down_blocks.{i}.attentions.{j}", out) if i else {}
            width = out
            skips.append(out)
        if i < 3:
            found |= pair(f"down_blocks.{i}.downsamplers.0.conv", out, out, 3, 3)
            skips.append(out)
    found |= resnet("mid_block.resnets.0", 640, 640, time)
    found |= resnet("mid_block.resnets.1", 640, 640, time)
    found |= transformer("mid_block.attentions.0", 640)
    for i, out in enumerate(reversed(widths)):
        for j in range(3):
            found |= resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), out, time)
            found |= transformer(f"up_blocks.{i}.attentions.{j}", out) if i < 3 else {}
            width = out
        found |= pair(f"up_blocks.{i}.upsamplers.0.conv", out, out, 3, 3) if i < 3 else {}
    return found | pair("conv_norm_out", 128) | pair("conv_out", 8, 128, 3, 3)


def published_vae():
    """128 channels times 1 2 4, two blocks a level (three going up), one attention in the middle."""
    found = pair("quant_conv", 16, 16, 1, 1) | pair("post_quant_conv", 8, 8, 1, 1)
    for half, entry, exit_ in (("encoder", 1, 16), ("decoder", 8, 1)):
        levels, blocks = ([128, 256, 512], 2) if half == "encoder" else ([512, 256, 128], 3)
        side, scale = ("down", "downsamplers") if half == "encoder" else ("up", "upsamplers")
        width = levels[0]
        found |= pair(f"{half}.conv_in", width, entry, 3, 3)
        for i, out in enumerate(levels):
            for j in range(blocks):
                found |= resnet(f"{half}.{side}_blocks.{i}.resnets.{j}", width, out)
                width = out
            if i < 2:
                found |= pair(f"{half}.{side}_blocks.{i}.{scale}.0.conv", out, out, 3, 3)
        for j in range(2):
            found |= resnet(f"{half}.mid_block.resnets.{j}", 512, 512)
        attention = f"{half}.mid_block.attentions.0"
        found |= pair(f"{attention}.group_norm", 512)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= pair(f"{attention}.{name}", 512, 512)
        found |= pair(f"{half}.conv_norm_out", width) | pair(f"{half}.conv_out", exit_, width, 3, 3)
    return found


def published_text_encoder():
    """RoBERTa base (12 layers of 768) and CLAP's two projection layers to 512."""
    head = "text_model.embeddings"
    found = {f"{head}.word_embeddings.weight": (50_265, 768)} | pair(f"{head}.LayerNorm", 768)
    found |= {f"{head}.position_embeddings.weight": (514, 768)}
    found |= {f"{head}.token_type_embeddings.weight": (1, 768)}
    for i in range(12):
        layer = f"text_model.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            found |= pair(f"{layer}.attention.self.{name}", 768, 768)
        found |= pair(f"{layer}.attention.output.dense", 768, 768)
        found |= pair(f"{layer}.attention.output.LayerNorm", 768)
        found |= pair(f"{layer}.intermediate.dense", 3072, 768)
        found |= pair(f"{layer}.output.dense", 768, 3072) | pair(f"{layer}.output.LayerNorm", 768)
    found |= pair("text_model.pooler.dense", 768, 768)
    return found | pair("text_projection.linear1", 512, 768) | pair("text_projection.linear2", 512, 512)


def published_vocoder():
    """HiFi-GAN: from 64 mel bands, hops of 5 4 2 2 2, three residual stacks after each."""
    found = pair("conv_pre", 1024, 64, 7) | pair("conv_post", 1, 32, 7)
    for i, kernel in enumerate([16, 16, 8, 4, 4]):
        out = 512 // 2**i
        # transposed convolutions name their input first
        found |= {f"upsampler.{i}.weight": (2 * out, out, kernel), f"upsampler.{i}.bias": (out,)}
        for j, size in enumerate([3, 7, 11]):
            for layer in ("convs1", "convs2"):
                for k in range(3):
                    found |= pair(f"resblocks.{3 * i + j}.{layer}.{k}", out, out, size)
    return found


@pytest.mark.parametrize(
    "part, expected, millions",
    [
        ("unet", published_unet(), 185.04),
        ("vae", published_vae(), 55.38),
        ("text_encoder", published_text_encoder(), 125.30),
        ("vocoder", published_vocoder(), 55.26),
    ],
)
def test_full_size_networks_have_the_published_names_and_shapes(part, expected, millions):
    network = full_size_parts()[part]
    found = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert found == expected
    assert sum(np.prod(shape) for shape in found.values()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_full_size_latent_schedule_and_rates_are_the_published_ones():
    parts = full_size_parts()
    mel = torch.empty(1, 1, 1024, 64, device="meta")
    latent = parts["vae"].encode(mel).latent_dist.mean
    assert latent.shape == (1, 8, 256, 16)
    t, clap = torch.empty(1, device="meta"), torch.empty(1, 512, device="meta")
    out = parts["unet"](latent, t, encoder_hidden_states=None, class_labels=clap).sample
    assert out.shape == latent.shape
    # "linear" is linear in the square root of beta
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    np.testing.assert_allclose(parts["scheduler"].betas, betas, rtol=1e-5)
    assert parts["scheduler"].config.prediction_type == "epsilon"
    assert np.prod(parts["vocoder"].config.upsample_rates) == ldm.HOP
    assert parts["audio_encoder"].config.projection_dim == 512


def test_what_passes_through_a_gpu_comes_back_from_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # tensors without content, on a device that need not be there
        vae = ldm.PatchVAE().to("cuda")
        pipe = SimpleNamespace(vae=vae, device=vae.mean.device)
        pipe.decode_latents = lambda z: vae.decode(z).sample
        mels = torch.zeros(2, 64, 64)
        assert vae.fit(mels).components.device.type == "cuda"
        latents = ldm.encode_mel(pipe, mels)
        again = ldm.decode_latents(pipe, latents)
    assert latents.device.type == again.device.type == "cpu"
    assert again.shape == mels.shape


def test_long_lists_of_texts_are_embedded_in_passes_to_the_same_numbers(small, monkeypatch):
    texts = [f"a dog number {i}" for i in range(9)]
    whole = ldm.embed_text(small[0], texts)
    monkeypatch.setattr(ldm, "_TOKENS_PER_PASS", 4 * 64)
    torch.testing.assert_close(ldm.embed_text(small[0], texts), whole, atol=1e-6, rtol=0)


def damaged(saved, folder, change):
    import shutil

    shutil.copytree(saved, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_partly_matching_checkpoint_lists_missing_and_unexpected_keys(saved, tmp_path):
    def rename(tensors):
        tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")

    folder = damaged(saved, tmp_path / "renamed", rename)
    with pytest.raises(
        ldm.CheckpointError, match=r"unet .*missing 1 \(conv_in\.weight.*unexpected 1 \(conv_inn"
    ):
        ldm.load_pipeline(folder)


def rename_in(folder, part, old, new):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[new] = tensors.pop(old)
    save_file(tensors, file, metadata={"format": "pt"})


def test_partly_matching_audio_towers_list_their_keys(small, saved, tmp_path):
    import shutil

    own, published = tmp_path / "own", tmp_path / "published"
    shutil.copytree(saved, own)
    rename_in(own, "audio_encoder", "projection.weight", "projektion.weight")
    ldm.save_checkpoint(small[0], published, {}, tiny_checkpoints.audio_tower())
    name = "audio_projection.linear1.weight"
    # the other half of a CLAP has a right to be there
    rename_in(published, "audio_encoder", "audio_projection.linear1.bias", "text_projection.bias")
    with pytest.raises(ldm.CheckpointError) as told:
        _ = ldm.load_clap(str(published)).audio_encoder
    assert "text_projection" not in str(told.value)
    rename_in(published, "audio_encoder", name, "audio_projection.linear0.weight")
    for folder, words in [
        (own, r"missing 1 \(projection\.weight\).*unexpected 1 \(projektion\.weight"),
        (published, r"missing 2 .*linear1\.weight.*unexpected 1 \(audio_projection\.linear0"),
    ]:
        with pytest.raises(ldm.CheckpointError, match=f"audio_encoder .*{words}"):
            _ = ldm.load_clap(str(folder)).audio_encoder


def test_weights_of_another_shape_are_refused_by_name(saved, tmp_path):
    def widen(tensors):
        tensors["conv_in.bias"] = torch.zeros(7)

    folder = damaged(saved, tmp_path / "wide", widen)
    with pytest.raises(ldm.CheckpointError, match=r"conv_in\.bias"):
        ldm.load_pipeline(folder)


def test_text_embedding_is_the_one_the_pipeline_samples_with(small):
    pipe = small[0]
    theirs = pipe._encode_prompt(["a dog is barking"], "cpu", 1, True)
    ours = ldm.embed_text(pipe, ["", "a dog is barking"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_checkpoint_opens_in_diffusers_and_sounds_the_same(small, saved):
    def sample(pipe):
        generator = torch.Generator().manual_seed(0)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a dog is barking", audio_length_in_s=0.64, num_inference_steps=3, generator=generator
        ).audios

    np.testing.assert_allclose(
        sample(AudioLDMPipeline.from_pretrained(saved)), sample(small[0]), atol=1e-5
    )


def test_half_precision_keeps_the_checkpoint_small_and_close(small, tmp_path):
    before = {k: v.clone() for k, v in small[0].unet.state_dict().items()}
    folder = ldm.save_checkpoint(small[0], tmp_path / "half", {}, small[1], half=True)
    assert all(torch.equal(v, before[k]) for k, v in small[0].unet.state_dict().items())
    halved = ldm.load_pipeline(folder, device="cpu").unet.state_dict()
    for name, value in small[0].unet.state_dict().items():
        torch.testing.assert_close(halved[name], value, atol=1e-3, rtol=1e-3)
    assert small[0].unet.dtype == torch.float32
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(small, tmp_path):
    for steps in (1, 2):
        ldm.save_checkpoint(small[0], tmp_path / "twice", {"steps": steps}, small[1])
    assert ldm.checkpoint_info(tmp_path / "twice")["steps"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["twice"]


def test_checkpoint_names_no_place_of_the_machine_that_made_it(saved, tmp_path):
    pipe = ldm.load_pipeline(saved, device="cpu")
    tower = ldm.load_clap(str(saved)).audio_encoder
    for folder in (ldm.save_checkpoint(pipe, tmp_path / "again", {}, tower), ldm.BUILTIN_CHECKPOINT):
        texts = [p.read_text() for p in folder.rglob("*.json")]
        assert texts and not any("_name_or_path" in text for text in texts)


def test_own_audio_tower_comes_with_the_checkpoint(small, saved):
    y = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    ours = ldm.embed_audio(ldm.load_clap(str(saved)), [y, y[:8000]], 16_000).numpy()
    expected = small[1](ldm.waveform_to_mel(y, 100)[None]).detach().numpy()
    np.testing.assert_allclose(ours[:1], expected, atol=1e-5)
    assert np.linalg.norm(ours, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_published_audio_tower_is_used_where_the_folder_holds_one(small, tmp_path):
    tower = tiny_checkpoints.audio_tower(projection_dim=128)
    folder = ldm.save_checkpoint(small[0], tmp_path / "published", {}, tower)
    y = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    clap = ldm.load_clap(str(folder))
    embedding = ldm.embed_audio(clap, [y], 16_000)
    assert embedding.shape == (1, 128)
    assert float(embedding.norm()) == pytest.approx(1, abs=1e-5)
    # transformers would take 10 s of a longer sound at random
    longer = np.random.default_rng(0).normal(size=164_000).astype(np.float32)
    first, again, cut = (
        ldm.embed_audio(clap, [z], 16_000).numpy() for z in [longer] * 2 + [longer[:160_000]]
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, cut, atol=1e-3)


def test_what_is_said_of_a_checkpoint_makes_no_other_of_it(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "copy")
    before = ldm.checkpoint_digest(folder)
    (folder / "README.md").write_text("scores")
    (folder / ldm.INFO_FILE).write_text('{"heard": {"esc10": [1]}}')
    assert ldm.checkpoint_digest(folder) == before
    (folder / "unet" / "config.json").write_text("{}")
    assert ldm.checkpoint_digest(folder) != before


@pytest.mark.parametrize(
    "note, heard",
    [
        ({"heard": {"esc10": [2, 3]}}, {"esc10": [2, 3]}),
        ({"training_dataset": "esc10", "training_folds": [2, 3]}, {"esc10": [2, 3]}),
        (
            {"training_dataset": "esc10; mixes of esc50", "training_folds": [2]},
            {"esc10": [2], "esc50": [2]},
        ),
        ({"training_dataset": "sounds of nobody", "training_folds": []}, {}),
    ],
)
def test_folds_of_the_training_are_read_from_notes_old_and_new(tmp_path, note, heard):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / ldm.INFO_FILE).write_text(json.dumps(note))
    info = ldm.checkpoint_info(tmp_path)
    assert info["heard"] == heard and "training_folds" not in info
    assert info["steps"] == ldm.HUB_INFO["steps"]


def test_folds_of_the_training_are_written_in_order():
    assert datasets.format_heard({}) == ""
    assert datasets.format_heard({"b": [1], "a": [10, 9]}) == "a:9,10;b:1"


def test_clap_of_transformers_gives_both_towers(small, tmp_path):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio_config = tiny_checkpoints.audio_tower().config
    text_config = copy.deepcopy(small[0].text_encoder.config)
    model = ClapModel(ClapConfig(text_config=text_config, audio_config=audio_config,
                                 projection_dim=16)).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "clap")
    small[0].tokenizer.save_pretrained(tmp_path / "clap")
    clap = ldm.load_clap(str(tmp_path / "clap"))
    y = np.random.default_rng(0).normal(size=48_000).astype(np.float32)
    rows = ldm.embed_text(clap, ["a dog"]), ldm.embed_audio(clap, [y], 48_000)
    assert [row.shape for row in rows] == [(1, 16), (1, 16)]
    with torch.no_grad():
        extractor = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
        features = extractor(y, sampling_rate=48_000, return_tensors="pt")["input_features"]
        expected = model.audio_model(input_features=features).pooler_output
        expected = torch.nn.functional.normalize(model.audio_projection(expected), dim=-1)
    torch.testing.assert_close(rows[1], expected)


def test_wrong_places_name_the_remedy(tmp_path):
    with pytest.raises(ldm.CheckpointError, match=r"no model_index\.json.*train-mini"):
        ldm.load_pipeline(tmp_path)
    with pytest.raises(ldm.CheckpointError, match=r"nobody/nothing.*hub"):
        ldm.load_pipeline("nobody/nothing")


def test_incomplete_checkpoint_is_refused(saved, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    next(folder.glob("unet/*.safetensors")).unlink()
    with pytest.raises(ldm.CheckpointError, match="broken"):
        ldm.load_pipeline(folder)


def test_hub_checkpoints_have_the_published_sampling():
    info = ldm.checkpoint_info("cvssp/audioldm-s-full-v2")
    assert (info["steps"], info["guidance_scale"], info["heard"]) == (200, 3.5, {})


def test_builtin_checkpoint_is_small_free_of_pickle_and_documented():
    folder = ldm.BUILTIN_CHECKPOINT
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert "train-mini" in (folder / "README.md").read_text()
    # its sounds come from a pool of their own, of which no study has a clip
    assert json.loads((folder / ldm.INFO_FILE).read_text())["heard"] == {}


# --- checkpoints as they are published ----------------------------------------------------------


def whole_clap(folder, text_encoder, tokenizer, **front_end):
    """A CLAP of transformers around a text tower, and its front end if one is given."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    width = text_encoder.config.projection_dim
    parts = {"audio_config": tiny_checkpoints.audio_tower(width).config, "projection_dim": width}
    # a CLAP writes its width into the configuration that it is given
    parts["text_config"] = copy.deepcopy(text_encoder.config)
    model = ClapModel(ClapConfig(**parts)).eval()
    model.text_model.load_state_dict(text_encoder.text_model.state_dict())
    model.text_projection.load_state_dict(text_encoder.text_projection.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if front_end:
        ClapFeatureExtractor(**front_end).save_pretrained(folder)
    return model


@pytest.mark.parametrize("front_end", [{}, {"frequency_min": 50}, {"frequency_min": 300, "top_db": 60}])
def test_clap_hears_through_the_front_end_that_was_published_with_it(small, tmp_path, front_end):
    from transformers import ClapFeatureExtractor

    pipe, folder = small[0], tmp_path / "clap"
    model = whole_clap(folder, pipe.text_encoder, pipe.tokenizer, **front_end)
    clap = ldm.load_clap(str(folder))
    y = np.random.default_rng(0).normal(size=48_000).astype(np.float32)
    extractor = ClapFeatureExtractor(**{"frequency_min": 50, **front_end})
    options = {"truncation": "rand_trunc", "sampling_rate": 48_000, "return_tensors": "pt"}
    with torch.no_grad():
        found = model.audio_model(input_features=extractor(y, **options)["input_features"])
        wanted = torch.nn.functional.normalize(model.audio_projection(found.pooler_output), dim=-1)
    torch.testing.assert_close(ldm.embed_audio(clap, [y], 48_000), wanted)
    # what is cached under one front end is no other's
    own = ldm.load_clap.__wrapped__(str(folder)).front_end
    assert own == clap.front_end and json.loads(own)["frequency_min"] == extractor.frequency_min
    damage = folder / "preprocessor_config.json"
    damage.write_text("{")
    with pytest.raises(ldm.CheckpointError, match="cannot be opened as a CLAP audio tower"):
        _ = ldm.load_clap.__wrapped__(str(folder)).audio_encoder


def test_towers_that_were_not_trained_together_are_refused(small, tmp_path):
    from transformers import ClapTextModelWithProjection

    pipe = small[0]
    whole_clap(tmp_path / "its own", pipe.text_encoder, pipe.tokenizer)
    torch.manual_seed(5)
    other = ClapTextModelWithProjection(pipe.text_encoder.config).eval()
    whole_clap(tmp_path / "another", other, pipe.tokenizer)
    nearly = ClapTextModelWithProjection(pipe.text_encoder.config).eval()
    nearly.load_state_dict(pipe.text_encoder.state_dict())
    with torch.no_grad():  # one bias of many
        nearly.text_projection.linear2.bias += 1.0
    whole_clap(tmp_path / "nearly", nearly, pipe.tokenizer)
    tiny_checkpoints.clap(tmp_path / "narrow")
    tower = tiny_checkpoints.audio_tower(128)
    tower.save_pretrained(tmp_path / "half")
    for name in ("its own", "another", "nearly", "narrow", "half"):
        info = {"audio_encoder": str(tmp_path / name)}
        clap = ldm.load_clap(str(ldm.save_checkpoint(pipe, tmp_path / f"with {name}", info)))
        if name == "its own":
            assert clap.audio_encoder.config.projection_dim == 128
            continue
        with pytest.raises(ldm.CheckpointError, match=f"{name}: .*(trained together|text tower)"):
            _ = clap.audio_encoder
    narrow = ldm.save_checkpoint(pipe, tmp_path / "in it", {}, tiny_checkpoints.audio_tower(16))
    with pytest.raises(ldm.CheckpointError, match="not trained together"):
        _ = ldm.load_clap(str(narrow)).audio_encoder


def test_known_checkpoints_name_their_towers():
    towers = {n: ldm.checkpoint_info(f"cvssp/audioldm{n}")["audio_encoder"] for n in ("", "-m-full")}
    assert towers[""] == ldm.HUB_CLAP != towers["-m-full"]
    assert ldm.checkpoint_info("somebody/else")["audio_encoder"] == ldm.HUB_CLAP


def renamed(folder, out, change):
    """A copy of a checkpoint, its files of weights under other names."""
    import shutil

    shutil.copytree(folder, out)
    for file in out.rglob("*.safetensors"):
        change(file)
    return out


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_weights_of_a_variant_open_where_there_are_no_others(saved, tmp_path, variant):
    def rename(file):
        file.rename(file.with_suffix(f".{variant}.safetensors"))

    folder = renamed(saved, tmp_path / "half", rename)
    ours, whole = (ldm.load_pipeline(place, device="cpu").unet for place in (folder, saved))
    assert all(map(torch.equal, ours.parameters(), whole.parameters()))
    assert ldm.load_clap(str(folder)).audio_encoder.config.projection_dim == 128


def test_pipelines_of_another_class_are_refused_by_name(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "two")
    index = json.loads((folder / "model_index.json").read_text())
    for kind in ("StableAudioPipeline", "MusicLDMPipeline"):
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        told = f"two: is an {kind}; AudioLDMPipeline or AudioLDM2Pipeline is needed"
        with pytest.raises(ldm.CheckpointError, match=told):
            ldm.load_pipeline(folder)


def test_audioldm2_opens_as_published_with_its_clap_and_names_weights_that_do_not_fit(tmp_path):
    folder = tiny_checkpoints.audioldm2(tmp_path / "two", as_published=True, bands=64)
    pipe, clap = ldm.load_pipeline(folder, device="cpu"), ldm.load_clap(str(folder))
    assert type(pipe.language_model).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        found = pipe.text_encoder.get_text_features(**pipe.tokenizer("rain", return_tensors="pt"))
    own = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
    torch.testing.assert_close(ldm.embed_text(clap, ["rain"]), own, atol=1e-5, rtol=1e-4)
    sound = np.random.default_rng(0).normal(size=16_000)
    assert ldm.embed_audio(clap, [sound], 16_000).norm() == pytest.approx(1, abs=1e-5)
    file = next((folder / "language_model").glob("*.safetensors"))
    weights = load_file(file)
    save_file({k: v.clone() for k, v in weights.items() if "ln_f.bias" not in k}, file)
    with pytest.raises(ldm.CheckpointError, match=r"weights of language_model .*missing 1 .*ln_f\.bias"):
        ldm.load_pipeline(folder, device="cpu")


@pytest.mark.parametrize("force", [False, True])
def test_pickled_weights_are_refused_unopened(saved, tmp_path, monkeypatch, force):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    def to_pickle(file):
        names = {"model": "pytorch_model.bin"}
        torch.save({"x": Trap()}, file.with_name(names.get(file.stem, f"{file.stem}.bin")))
        file.unlink()

    folder = renamed(saved, tmp_path / "pickled", to_pickle)
    message = "pickled weights, which can run any code.*give safetensors"
    for opened in (ldm.load_pipeline, lambda place: ldm.load_clap(str(place)).audio_encoder):
        with pytest.raises(ldm.CheckpointError, match=message):
            opened(folder)
    assert not trap.exists()


def test_a_checkpoints_own_code_is_neither_run_nor_asked_about(saved, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    trap, folder = tmp_path / "ran", shutil.copytree(saved, tmp_path / "own code")
    code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
    for part in ("tokenizer", "unet", "text_encoder"):
        (folder / part / "evil.py").write_text(code)
    note = folder / "tokenizer/tokenizer_config.json"
    known = json.loads(note.read_text())
    auto = {"auto_map": {"AutoTokenizer": ["evil.Own", "evil.Own"]}}
    note.write_text(json.dumps(known | auto))
    rows = ldm.embed_text(ldm.load_clap(str(folder)), ["a dog"])
    torch.testing.assert_close(rows, ldm.embed_text(ldm.load_clap(str(saved)), ["a dog"]))
    assert ldm.load_pipeline(folder, device="cpu")
    # a class that nobody knows, in a part that the pipeline opens by itself
    note.write_text(json.dumps(known | auto | {"tokenizer_class": "Own"}))
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "AutoTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with contextlib.suppress(ldm.CheckpointError):
        ldm.load_pipeline(folder)
    with contextlib.suppress(ldm.CheckpointError):
        _ = ldm.load_clap.__wrapped__(str(folder)).tokenizer
    assert not trap.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"heard": 5}', '{"heard": {"esc10": ["x"]}}'])
def test_damaged_notes_name_their_file(saved, tmp_path, text):
    import shutil

    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / ldm.INFO_FILE).write_text(text)
    with pytest.raises(ldm.CheckpointError, match=rf"copy/{ldm.INFO_FILE}: damaged"):
        ldm.checkpoint_info(folder)
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ldm.CheckpointError, match=r"copy: (cannot be opened|is an None)"):
        ldm.load_pipeline(folder)


def test_cut_weights_are_one_clear_error(saved, tmp_path):
    folder = renamed(saved, tmp_path / "cut", lambda file: file.write_bytes(file.read_bytes()[:-100]))
    with pytest.raises(ldm.CheckpointError, match="cut: cannot be opened"):
        ldm.load_pipeline(folder)


def test_relative_paths_are_taken_from_the_project_and_then_from_here(saved, tmp_path, monkeypatch):
    import shutil

    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    shutil.copytree(saved, project / "runs" / "models" / "mine")
    (project / "notebooks").mkdir()
    (project / "pyproject.toml").touch()
    shutil.copytree(saved, elsewhere / "models")
    (elsewhere / "runs" / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(project / "notebooks")
    assert Path(ldm.resolve("runs/models/mine")) == project / "runs/models/mine"
    assert ldm.checkpoint_info("runs/models/mine")["heard"] == {"noise": [2]}
    monkeypatch.chdir(elsewhere)
    assert Path(ldm.resolve("models")).samefile(elsewhere / "models")


def test_two_that_save_one_folder_do_not_share_a_half_written_one(small, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def save(steps):
        return ldm.save_checkpoint(small[0], tmp_path / f"{steps % 2}", {"steps": steps}, small[1])

    stray = tmp_path / "0.part"
    stray.mkdir()
    (stray / "of another process").touch()
    with ThreadPoolExecutor(2) as pool:
        assert [ldm.checkpoint_info(folder)["steps"] for folder in pool.map(save, (0, 1))] == [0, 1]
    assert list(stray.iterdir()) and not list(tmp_path.glob(".*"))
