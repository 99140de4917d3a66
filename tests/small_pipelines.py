"Every family as random pipelines of a few thousand weights, made in about a second, without network."
from functools import lru_cache

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel,
                       FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, LDMPipeline,
                       PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel, UNet2DModel, VQModel)
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config,
                          T5EncoderModel, T5TokenizerFast)

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
WORDS = ['re', 'red</w>', 'fl', 'ag</w>', 'flag</w>']
VOCABULARY = ['<|startoftext|>', '<|endoftext|>', *LETTERS, *(f'{c}</w>' for c in LETTERS), *WORDS]
MERGES = [('r', 'e'), ('re', 'd</w>'), ('f', 'l'), ('a', 'g</w>'), ('fl', 'ag</w>')]


def tokenizer():
    return CLIPTokenizer(vocab={w: k for k, w in enumerate(VOCABULARY)}, merges=MERGES, model_max_length=16)


def text_encoder(kind, **config):
    return kind(CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, **config)).eval()


PIECES = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), ('\u2581', -2.), *((c, -3.) for c in LETTERS),
          ('\u2581red', -1.), ('\u2581flag', -1.)]   # of T5, with log probabilities


def t5():
    "A T5 and its tokenizer; as wide as the two CLIPs together."
    config = T5Config(vocab_size=len(PIECES), d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                      feed_forward_proj='gated-gelu')
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=PIECES, extra_ids=0, model_max_length=16)


def vae(channels=4, **config):
    "Halves the side of a picture."
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2,
        norm_num_groups=4, latent_channels=channels, sample_size=16, **config).eval()


def transformer(channels=4, joint=64, pooled=64):
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=joint, caption_projection_dim=16, pooled_projection_dim=pooled,
        pos_embed_max_size=8).eval()


def unet(words=32, channels=4, **config):
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=words,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        **config).eval()


def levels(prediction='epsilon'):
    "A scheduler that walks the levels of `Denoiser.timesteps`."
    return DDIMScheduler(prediction_type=prediction, beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012,
                         clip_sample=False, timestep_spacing='trailing', steps_offset=1)


def make(kind, prediction='epsilon', shift=3.):
    "A pipeline; its parts are made in the order of the arguments, so that a seed gives the same one for ever."
    if kind in ('sd3', 'sd3 with t5'):
        return StableDiffusion3Pipeline(
            transformer(), FlowMatchEulerDiscreteScheduler(shift=shift), vae(scaling_factor=1.5, shift_factor=.06),
            text_encoder(CLIPTextModelWithProjection), tokenizer(),
            text_encoder(CLIPTextModelWithProjection, hidden_act='gelu'), tokenizer(),
            *(t5() if 't5' in kind else (None, None)))
    if kind == 'sd':
        return StableDiffusionPipeline(vae(), text_encoder(CLIPTextModel), tokenizer(), unet(), levels(prediction),
                                       None, None, requires_safety_checker=False)
    xl = unet(64, addition_embed_type='text_time', addition_time_embed_dim=8,
              projection_class_embeddings_input_dim=6*8 + 32, transformer_layers_per_block=1)
    return StableDiffusionXLPipeline(
        vae(scaling_factor=.13), text_encoder(CLIPTextModel), text_encoder(CLIPTextModelWithProjection),
        tokenizer(), tokenizer(), xl, levels(prediction))


@lru_cache
def pipeline(*args):
    "One of 'sd', 'sdxl', 'sd3', 'sd3 with t5' with random weights, the same in every test."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make(*args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(channels=3, side=16, out=None, **config):
    "A UNet2DModel of pixels; out: its output channels, twice as many if it learned a variance."
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=out or channels, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=8, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'), **config).eval()


def ddpm(scheduler=None, **config):
    "A DDPM of pixels, as its pipeline saves it."
    return DDPMPipeline(pixels(**config), scheduler or DDPMScheduler(timestep_spacing='trailing'))


def vq():
    "An autoencoder with a codebook; halves the side of a picture."
    return VQModel(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2, norm_num_groups=4,
                   up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4, num_vq_embeddings=16, sample_size=16,
                   scaling_factor=.5).eval()


def ldm(autoencoder):
    net = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
                      norm_num_groups=4, attention_head_dim=8, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
                      up_block_types=('AttnUpBlock2D', 'UpBlock2D')).eval()
    return LDMPipeline(autoencoder, net, levels())


def dit():
    "1000 classes, since its pipeline takes no other number for none, and a learned variance."
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4)
    return DiTPipeline(net.eval(), vae(scaling_factor=.5), levels())


def flux(guided=True, **scheduler):
    net = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                 num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
                                 guidance_embeds=guided, axes_dims_rope=(4, 6, 6))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(**scheduler), vae(scaling_factor=1.5, shift_factor=.06),
                        text_encoder(CLIPTextModel), tokenizer(), *t5(), net.eval())


def pixart(kind=PixArtSigmaPipeline, sized=False):
    "sized: of 1,024 pixels, and told the size of its pictures."
    net = PixArtTransformer2DModel(num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8,
                                   num_layers=2, cross_attention_dim=24, sample_size=128 if sized else 8,
                                   caption_channels=64, use_additional_conditions=sized)
    encoder, words = t5()
    return kind(words, encoder, vae(scaling_factor=.5), net.eval(), levels())


def sd35():
    "Stable Diffusion 3.5 medium: attention twice in some blocks, norms on queries and keys."
    pipe = make('sd3')
    pipe.register_modules(transformer=SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=64,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm='rms_norm').eval())
    return pipe


BETAS = dict(beta_schedule='squaredcos_cap_v2', timestep_spacing='leading', clip_sample=False)
FAMILIES = {   # name: (makes a pipeline, a prompt or None)
    'DDPM': (ddpm, None),
    'DDPM, grey': (lambda: ddpm(channels=1), None),
    'DDPM, 12 x 20': (lambda: ddpm(side=(20, 12)), None),
    'DDPM, T = 100, sample': (lambda: ddpm(DDPMScheduler(
        num_train_timesteps=100, prediction_type='sample', **BETAS)), None),
    'DDPM, T = 4000': (lambda: ddpm(DDPMScheduler(num_train_timesteps=4000, beta_start=2.5e-5, beta_end=.005)), None),
    'DDPM, set_alpha_to_one False': (lambda: ddpm(DDIMScheduler(set_alpha_to_one=False, steps_offset=1)), None),
    'DDPM, zero SNR, v': (lambda: ddpm(DDIMScheduler(
        prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')), None),
    'DDPM, learned variance': (lambda: ddpm(DDPMScheduler(variance_type='learned_range'), out=6), None),
    'DDPM, classes': (lambda: ddpm(num_class_embeds=4), '3'),
    'LDM, VQ': (lambda: ldm(vq()), None),
    'LDM, KL': (lambda: ldm(vae(scaling_factor=.5)), None),
    'DiT': (dit, '7'),
    'SD 1': (lambda: make('sd'), 'red flag'),
    'SD 2, v': (lambda: make('sd', 'v_prediction'), 'red flag'),
    'SDXL': (lambda: make('sdxl'), 'red flag'),
    'SD 3': (lambda: make('sd3 with t5'), 'red flag'),
    'SD 3.5': (sd35, 'red flag'),
    'Flux dev': (lambda: flux(use_dynamic_shifting=True, max_shift=1.15), 'red flag'),
    'Flux schnell': (lambda: flux(False, shift=1.), 'red flag'),
    'PixArt sigma': (pixart, 'red flag'),
    'PixArt alpha': (lambda: pixart(PixArtAlphaPipeline, True), 'red flag'),
}


def family(name):
    "(pipeline with random weights, the same in every test; its prompt) of a family of `FAMILIES`."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = FAMILIES[name][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, FAMILIES[name][1]
