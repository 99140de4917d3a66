"Stable Diffusion 1, XL and 3 as random pipelines of a few thousand weights, made in about a second, without network."
from functools import lru_cache

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
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


def unet(words=32, **config):
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
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
