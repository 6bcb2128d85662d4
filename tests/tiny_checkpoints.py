"""Tiny text-to-audio checkpoints of random weights, in the real layouts, made in a second.

They make noise, but they are loaded and run by the very code that loads and runs the public
checkpoints, without network: AudioLDM, AudioLDM 2, Stable Audio Open and 3, LongCat and ACE-Step in
diffusers' folder layout, AudioGen and MAGNeT in audiocraft's (``state_dict.bin`` and
``compression_state_dict.bin``, plus a T5 folder). `Tones` is the smallest back-end of all, for
what has nothing to do with models.
"""

import contextlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

MEL = 16  # bands of the tiny vocoder and VAE
VOCODER = {
    "model_in_dim": MEL,
    "sampling_rate": 16_000,
    "upsample_initial_channel": 16,
    "upsample_rates": [10, 4, 4],
    "upsample_kernel_sizes": [20, 8, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "normalize_before": False,
}


class Tones:
    """A model of a few lines: the seed is the pitch, and some seeds fail."""

    name, checkpoint, sample_rate = "tones", "none", 8000

    def __init__(self, bad=None, interrupt_at=None, pause=0.0):
        self.settings = {"steps": 1}
        self.bad, self.interrupt_at, self.pause, self.asked = bad or {}, interrupt_at, pause, []

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        if self.interrupt_at is not None and len(self.asked) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.asked += seeds
        time.sleep(self.pause)
        t = np.arange(round(duration_s * self.sample_rate)) / self.sample_rate
        tones = [0.3 * np.sin(2 * np.pi * (200 + s % 1000) * t) for s in seeds]
        gains = [np.float32(self.bad.get(s, 1.0)) for s in seeds]
        return [y.astype(np.float32) * g for y, g in zip(tones, gains, strict=True)]


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


def check_invariance(backend, prompts=None, duration_s=0.5, clips_per_pass=4):
    """Compare a back-end's clips with themselves under every way of sharing out the work.

    Returns ``backend, dtype, change, same_bytes, max_difference`` (of full scale; against each clip
    made alone, and for shard and resume between the files of a whole run and of the other).
    """
    prompts = prompts or ["a dog", "a dog barking loudly", "rain", "a dog", "a distant siren"]
    seeds = list(range(1, len(prompts) + 1))
    alone = [backend.generate([p], [s], duration_s)[0] for p, s in zip(prompts, seeds, strict=True)]
    pairs = {
        f"batch of {len(prompts)}": (alone, backend.generate(prompts, seeds, duration_s)),
        "other order": (alone, backend.generate(prompts[::-1], seeds[::-1], duration_s)[::-1]),
    }
    pairs |= _files_compared(backend, prompts, seeds, duration_s)
    usual = backend.settings.get("clips_per_pass")
    if usual:
        backend.settings["clips_per_pass"] = clips_per_pass
        try:
            larger = backend.generate(prompts, seeds, duration_s)
        finally:
            backend.settings["clips_per_pass"] = usual
        pairs[f"passes of {clips_per_pass}"] = (alone, larger)
    rows = [
        {
            "backend": backend.name,
            "dtype": backend.settings.get("dtype"),
            "change": change,
            "same_bytes": all(map(np.array_equal, one, other)),
            "max_difference": max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)),
        }
        for change, (one, other) in pairs.items()
    ]
    return pd.DataFrame(rows)


def _files_compared(backend, prompts, seeds, duration_s):
    from soundscapes_utils.generation import generate_clips

    plan = pd.DataFrame({"prompt": prompts, "seed": seeds, "label": "any", "prompt_family": "any"})
    plan["clip_id"] = [f"clip-{seed}" for seed in seeds]
    plan = plan.assign(negative_prompt="", duration_s=duration_s)
    with tempfile.TemporaryDirectory() as folder:
        whole, shards, resumed = (Path(folder) / name for name in ("whole", "shards", "resumed"))
        generate_clips(plan, backend, whole)
        for shard in ("2/2", "1/2"):
            generate_clips(plan, backend, shards, batch_size=2, shard=shard)
        with contextlib.suppress(KeyboardInterrupt):
            generate_clips(plan, _Interrupted(backend, 1), resumed, batch_size=2)
        generate_clips(plan, backend, resumed, batch_size=1)
        sounds = {path: _clips_in(path) for path in (whole, shards, resumed)}
    return {
        "two shards": (sounds[whole], sounds[shards]),
        "interrupted and resumed": (sounds[whole], sounds[resumed]),
    }


def _clips_in(folder):
    from soundscapes_utils.audio import load_audio

    return [load_audio(path)[0] for path in sorted(folder.glob("*.wav"))]


def _roberta_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer():
    import string

    from transformers import T5Tokenizer

    letters = ["▁", *string.ascii_letters, *string.punctuation]
    pieces = ["<pad>", "</s>", "<unk>", *letters]
    vocab = [(piece, 0.0 if number < 3 else -3.0) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)


def _t5_encoder(vocabulary, width):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def _clap_text_config(vocabulary):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 90,
        "projection_dim": 16,
    }


def small_vae(latent_channels=4):
    """An autoencoder of the published kind, small, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        layers_per_block=1,
    )


def _scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _vocoder(bands=MEL):
    from torch import nn
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER | {"model_in_dim": bands}))
    for weights in vocoder.parameters():
        # transformers' own start is so small that the output would count as silence
        if weights.ndim > 1:
            nn.init.kaiming_normal_(weights)
    return vocoder


def _clap(tokenizer, spec_size=64):
    from transformers import ClapConfig, ClapModel

    audio = {
        "spec_size": spec_size,
        "window_size": 4,
        "num_mel_bins": 64,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "projection_dim": 16,
    }
    text = _clap_text_config(len(tokenizer))
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))


def clap(folder):
    """Write a tiny CLAP of transformers' kind; return the model and its tokenizer."""
    import torch

    torch.manual_seed(0)
    tokenizer = _roberta_tokenizer()
    model = _clap(tokenizer).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def audio_tower(projection_dim=16):
    """The audio half of a CLAP of the published kind, untrained."""
    import torch
    from transformers import ClapAudioConfig, ClapAudioModelWithProjection

    torch.manual_seed(0)
    config = ClapAudioConfig(
        hidden_size=64,
        patch_embeds_hidden_size=8,
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        projection_dim=projection_dim,
    )
    return ClapAudioModelWithProjection(config).eval()


def _film_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=4,
        norm_num_groups=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )


def audioldm(folder, seed=0):
    """Write a tiny AudioLDM checkpoint; return its folder."""
    import torch
    from diffusers import AudioLDMPipeline
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = _roberta_tokenizer()
    text = ClapTextModelWithProjection(ClapTextConfig(**_clap_text_config(len(tokenizer))))
    unet = _film_unet()
    pipe = AudioLDMPipeline(
        vae=small_vae(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        vocoder=_vocoder(),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def audioldm2(folder, seed=0, as_published=False, bands=MEL):
    """Write a tiny AudioLDM 2 checkpoint; return its folder.

    The published one names its language model without the head that the pipeline calls. With 64 bands,
    as published, it can be trained, and its CLAP hears.
    """
    import torch
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
    from transformers import ClapFeatureExtractor, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = _roberta_tokenizer(), _t5_tokenizer()
    clap = _clap(tokenizer, 4 * bands)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 16, 32], [None, 16, 32]),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipe = AudioLDM2Pipeline(
        vae=small_vae(),
        text_encoder=clap,
        text_encoder_2=_t5_encoder(len(tokenizer_2), 32),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ),
        language_model=GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99, max_new_tokens=8)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=ClapFeatureExtractor(),
        unet=unet,
        scheduler=_scheduler(),
        vocoder=_vocoder(bands),
    )
    pipe.save_pretrained(folder)
    if as_published:
        pipe.language_model.transformer.save_pretrained(Path(folder) / "language_model")
        index = Path(folder) / "model_index.json"
        parts = json.loads(index.read_text()) | {"language_model": ["transformers", "GPT2Model"]}
        index.write_text(json.dumps(parts))
    return Path(folder)


def stable_audio(folder, seed=0):
    """Write a tiny Stable Audio Open checkpoint, with the published sampler; return its folder."""
    import torch
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    torch.manual_seed(seed)
    tokenizer = _t5_tokenizer()
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4, 4, 8],
        channel_multiples=[1, 1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=8,
        audio_channels=2,
        sampling_rate=44_100,
    )
    transformer = StableAudioDiTModel(
        sample_size=256,  # 1.49 s: all of it is decoded, however short the clip
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        time_proj_dim=16,
        global_states_input_dim=32,
    )
    pipe = StableAudioPipeline(
        vae=vae,
        text_encoder=_t5_encoder(len(tokenizer), 16),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=512
        ),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(),
    )
    pipe.save_pretrained(folder)
    # the published sampler cannot be built without torchsde, but its files can be written
    sampler = "CosineDPMSolverMultistepScheduler"
    index = Path(folder) / "model_index.json"
    parts = json.loads(index.read_text()) | {"scheduler": ["diffusers", sampler]}
    index.write_text(json.dumps(parts))
    published = {"_class_name": sampler, "sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0}
    published |= {"sigma_schedule": "exponential", "prediction_type": "v_prediction"}
    published |= {"num_train_timesteps": 1000, "solver_order": 2, "rho": 7.0}
    published |= {"solver_type": "midpoint", "lower_order_final": True}
    published |= {"euler_at_final": False, "final_sigmas_type": "zero"}
    (Path(folder) / "scheduler/scheduler_config.json").write_text(json.dumps(published))
    return Path(folder)


def _gemma_tokenizer():
    import string

    from transformers import GemmaTokenizer

    letters = ["▁", *string.ascii_letters, *string.punctuation]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    vocab = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _without_noughts(*parts):
    """Give random weights to what starts at nought, and would keep the text from the sound."""
    import torch

    for weights in (weights for part in parts for weights in part.parameters()):
        if not weights.any():
            torch.nn.init.normal_(weights, std=0.2)


def stable_audio_3(folder, seed=0, distilled=True):
    """Write a tiny Stable Audio 3 checkpoint, distilled or base; return its folder."""
    import torch
    from diffusers import (
        AutoencoderSAME,
        FlowMatchEulerDiscreteScheduler,
        StableAudio3DiTModel,
        StableAudio3DurationEmbedder,
        StableAudio3Pipeline,
    )
    from transformers import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    torch.manual_seed(seed)
    tokenizer, width = _gemma_tokenizer(), 16
    half = T5GemmaModuleConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["full_attention"],
    ).to_dict()
    transformer = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=width,
        global_cond_dim=width,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=2,
    )
    vae = AutoencoderSAME(
        patch_size=64,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(4,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=8,
        ff_mult=2,
    )
    _without_noughts(transformer, vae)
    pipe = StableAudio3Pipeline(
        vae=vae,
        text_encoder=T5GemmaEncoderModel(
            T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False)
        ),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=width, fourier_dim=16),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=distilled),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def ace_step(folder, seed=0):
    """Write a tiny ACE-Step 1.5 checkpoint, of the distilled kind; return its folder."""
    import torch
    from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
    from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
    from diffusers.pipelines.ace_step import AceStepConditionEncoder
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    shape |= {"num_key_value_heads": 1}
    text = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, is_turbo=True, **shape
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=16,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **shape,
    )
    _without_noughts(transformer)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4, 5, 6, 8],
        channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=8,
        audio_channels=2,
        sampling_rate=48_000,
    )
    pipe = AceStepPipeline(
        vae=vae,
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=transformer,
        condition_encoder=encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def longcat(folder, seed=0):
    """Write a tiny LongCat-AudioDiT checkpoint; return its folder."""
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LongCatAudioDiTPipeline,
        LongCatAudioDiTTransformer,
        LongCatAudioDiTVae,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = _t5_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=16, latent_dim=8
    )
    _without_noughts(transformer)
    pipe = LongCatAudioDiTPipeline(
        vae=LongCatAudioDiTVae(
            channels=8,
            c_mults=[1, 1, 1],
            strides=[4, 8],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=32,
        ),
        text_encoder=UMT5EncoderModel(text),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )
    pipe.save_pretrained(folder)
    return Path(folder)


_CODEC = """
compression_model: encodec
sample_rate: 16000
channels: 1
encodec: {autoencoder: seanet, quantizer: rvq, sample_rate: 16000, channels: 1,
          causal: false, renormalize: false}
seanet: {dimension: 16, channels: 1, causal: false, n_filters: 4, n_residual_layers: 1,
         ratios: [10, 8, 8], encoder: {}, decoder: {}}
rvq: {n_q: 4, q_dropout: false, bins: 32, kmeans_init: false}
"""
_LANGUAGE_MODEL = """
lm_model: transformer_lm
dataset: {segment_duration: 10}
transformer_lm: {n_q: 4, card: 32, dim: 16, num_heads: 2, num_layers: 1, hidden_scale: 2,
                 causal: true, custom: true, memory_efficient: false, cross_attention: true,
                 weight_init: gaussian, depthwise_init: current}
codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3]}}
attribute_dropout: {}
classifier_free_guidance: {training_dropout: 0.1, inference_coef: 3.0}
conditioners: {description: {model: t5, t5: {name: t5-small, finetune: false}}}
fuser: {sum: [], prepend: [], cross: [description], input_interpolate: [],
        cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1}
"""


# what MAGNeT's configuration has otherwise than AudioGen's, as audiocraft publishes it
_MAGNET = """
lm_model: transformer_lm_magnet
dataset: {segment_duration: 5}
transformer_lm: {causal: false, memory_efficient: true, subcodes_context: 5,
                 compression_model_framerate: 25, segment_duration: 5, span_len: 3}
codebooks_pattern: {modeling: parallel, parallel: {empty_initial: -1}}
masking: {span_len: 3}
"""


def magnet(folder, seed=0):
    """Write a tiny MAGNeT checkpoint of five seconds, as `audiogen` does."""
    return audiogen(folder, seed, _MAGNET)


def audiogen(folder, seed=0, other="{}"):
    """Write a tiny AudioGen checkpoint and, beside it, the ``t5-small`` folder that it names.

    audiocraft finds the text encoder by its name: run the test in this folder's parent.
    """
    import torch
    from omegaconf import OmegaConf

    from soundscapes_utils import generation

    builders = generation._import_audiocraft().models.builders  # as it must be imported
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = _t5_tokenizer()
    tokenizer.save_pretrained(folder.parent / "t5-small")
    # audiocraft holds the width of t5-small (512) in a table of its own
    _t5_encoder(len(tokenizer), 512).save_pretrained(folder.parent / "t5-small")
    parts = {
        "compression_state_dict.bin": (_CODEC, builders.get_compression_model),
        "state_dict.bin": (_LANGUAGE_MODEL, builders.get_lm_model),
    }
    for name, (text, build) in parts.items():
        config = OmegaConf.create(text)
        if build is builders.get_lm_model:
            config = OmegaConf.merge(config, OmegaConf.create(other))
        config.device, config.dtype = "cpu", "float32"
        with contextlib.chdir(folder.parent):
            weights = build(config).state_dict()
        checkpoint = {"xp.cfg": OmegaConf.to_yaml(config), "best_state": weights}
        torch.save(checkpoint, folder / name)
    return folder
