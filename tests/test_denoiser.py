"The denoiser against diffusers' own schedulers and pipelines."
import struct
import zlib
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler,
                       UNet2DModel)
from PIL import Image
from torch.testing import assert_close

from unlearn_nb.denoiser import PREDICTIONS, Denoiser, max_batch, opaque, read_image
from unlearn_nb.schedule import generators, randn


@lru_cache
def tiny_net(channels=3, size=8, **config):
    "An untrained net whose output depends on its input and on the level."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**dict(sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1,
                                  block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                                  up_block_types=("UpBlock2D",) * 2) | config).eval()


def tiny(prediction="epsilon", scheduler=DDPMScheduler, channels=3, size=8, **config):
    how = dict(prediction_type=prediction, timestep_spacing="trailing") | config
    return Denoiser(tiny_net(channels, size), scheduler(**how))


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the sampler ---

@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_is_ddim_step_with_the_clipped_belief(prediction):
    x_t, z = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    for clip in (True, False):
        theirs = DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", clip_sample=clip)
        d = Denoiser(tiny_net(), theirs)
        theirs.set_timesteps(50)
        for t in (999, 979, 19):   # the first, the second, the last step
            with torch.no_grad(): out, x0 = d(x_t, torch.full((4,), t)), d.predict(x_t, t)
            expected = theirs.step(out, t, x_t, eta=.3, use_clipped_model_output=True, variance_noise=z)
            x = d.step(x_t, x0, t, t - 20, .3, z)
            tolerance = 2e-5 * max(1., x0.abs().max().item())   # float32 rounding, seen through the gain
            assert_close(x0.clamp(-1, 1) if clip else x0, expected.pred_original_sample, atol=tolerance, rtol=1e-5)
            assert_close(x, expected.prev_sample, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_one_over_all_levels_is_ddpm(prediction):
    theirs = DDPMScheduler(prediction_type=prediction, variance_type="fixed_small")
    d, x_t = Denoiser(tiny_net(), theirs), normal(2, 3, 8, 8)
    for t in (999, 998, 500, 250, 20, 1, 0):
        with torch.no_grad(): out, x0 = d(x_t, torch.full((2,), t)), d.predict(x_t, t)
        expected = theirs.step(out, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
        assert_close(d.step(x_t, x0, t, t - 1, 1., normal(2, 3, 8, 8, seed=5)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sample_is_the_stock_pipeline(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing")
    d, seeds = Denoiser(tiny_net(), scheduler), [4, 0, 123456789]
    pipe = DDIMPipeline(d.net, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def stock(seeds, kind):
        return pipe(batch_size=len(seeds), generator=[torch.Generator().manual_seed(s) for s in seeds], eta=0.,
                    num_inference_steps=20, use_clipped_model_output=True, output_type=kind).images

    ours = (d.sample(seeds, steps=20).clamp(-1, 1) / 2 + .5).permute(0, 2, 3, 1)
    assert_close(ours, torch.from_numpy(stock(seeds, "np")), atol=1e-4, rtol=0)
    picture = d.decode(d.sample([4], steps=20))[0]
    assert abs(np.asarray(picture).astype(int) - np.asarray(stock([4], "pil")[0])).max() <= 1


def test_a_sample_depends_on_its_own_seed_alone():
    d = tiny("v_prediction")
    for eta in (0., 1.):
        alone = {s: d.sample([s], steps=8, eta=eta) for s in (3, 8, 21)}
        for seeds, batch in (([3, 8, 21], 64), ([21, 8, 3], 2), ([8, 3, 8, 21, 3], 3), (torch.tensor([21, 8]), 1)):
            torch.manual_seed(len(seeds))   # nor on the global generator
            x = d.sample(seeds, steps=8, eta=eta, batch=batch)
            for k, s in enumerate(seeds): assert_close(x[k:k + 1], alone[int(s)], atol=1e-5, rtol=1e-5)
        assert (alone[3] - alone[8]).abs().max() > .01


def test_sampling_leaves_the_global_generator_and_the_gradients_alone():
    torch.manual_seed(1)
    before, d = torch.get_rng_state(), tiny()
    x = d.reconstruct(d.sample([1], steps=3, eta=1.), 10, [2], eta=1.)
    assert torch.equal(torch.get_rng_state(), before) and not x.requires_grad


def test_path_visits_and_ends():
    d, x = tiny(), normal(2, 3, 8, 8)
    visited = list(d.path(x, 999, 4, generators([0, 1])))
    assert [t for t, _ in visited] == [999, 749, 499, 249, -1]
    assert visited[0][1] is x and all(v.shape == x.shape for _, v in visited)


# --- reconstruct ---

def test_reconstruct_visits_t_to_0_inclusive(monkeypatch):
    cases = ((6, 50, [6, 5, 4, 3, 2, 1, 0]), (6, 7, [6, 5, 4, 3, 2, 1, 0]), (0, 1, [0]), (99, 2, [99, 49]))
    for t, steps, visited in cases:
        d, seen = tiny(), []
        record = lambda self, x, level, cond=None: seen.append(level.tolist()) or torch.zeros_like(x)
        monkeypatch.setattr(Denoiser, "__call__", record)
        d.reconstruct(normal(1, 3, 8, 8), t, [0, 1], steps=steps)
        assert seen == [[v, v] for v in visited]


def test_a_perfect_net_reconstructs_perfectly(monkeypatch):
    x0 = normal(1, 3, 8, 8)
    monkeypatch.setattr(Denoiser, "__call__", lambda self, x, t, cond=None: self.target(x, x0.expand_as(x), t))
    for prediction in PREDICTIONS:
        d = tiny(prediction, clip_sample=False)
        for eta in (0., 1.):
            back = d.reconstruct(x0, 400, [0, 7], steps=20, eta=eta)
            assert_close(back, x0.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_reconstruct_noises_each_row_with_its_own_seed():
    d, x0, t = tiny("v_prediction"), normal(1, 3, 8, 8), torch.tensor([300])
    both = d.reconstruct(x0, 300, [5, 9], steps=5)
    assert both.shape == (2, 3, 8, 8)
    assert_close(d.reconstruct(x0, 300, [9], steps=5), both[1:], atol=1e-5, rtol=1e-5)
    x_t = d.scheduler.add_noise(x0, randn(generators([5]), d.shape), t)
    *_, (_, end) = d.path(x_t, 300, 5, None)
    assert_close(both[:1], end, atol=1e-5, rtol=1e-5)


# --- the net: what it is told, how it answers ---

def test_gradients_reach_the_net():
    d, t, x = tiny(), torch.tensor([5, 500]), normal(2, 3, 8, 8)
    loss = (d(x, t) - d.target(x, torch.zeros_like(x), t)).square().mean()
    grads = torch.autograd.grad(loss, list(d.net.parameters()), allow_unused=True)
    assert sum(g is not None and g.abs().sum() > 0 for g in grads) > 10


def test_a_half_precision_net_answers_in_float32():
    d = Denoiser(UNet2DModel.from_config(tiny_net().config).to(torch.bfloat16).eval(), DDPMScheduler())
    assert d.dtype == torch.bfloat16 and d(normal(1, 3, 8, 8), torch.tensor([5])).dtype == torch.float32
    assert d.sample([1], steps=2).dtype == torch.float32


def test_says_which_base_it_is():
    d = tiny()
    assert (d.name, d.revision, d.shape, d.size, d.T) == ("custom", None, (3, 8, 8), (8, 8), 1000)
    assert d.layout == torch.channels_last and d.prediction == "epsilon"
    d = Denoiser(tiny_net(), DDPMScheduler(), name="mine", revision="abc")
    assert (d.name, d.revision) == ("mine", "abc")
    assert repr(d).startswith("Denoiser('mine': 3 x 8 x 8, epsilon, T = 1000, ")


def test_large_pictures_go_through_the_net_a_few_at_a_time():
    cases = (((3, 32, 32), False, 64), ((3, 256, 256), False, 16), ((3, 2048, 2048), False, 1),
             ((16, 128, 128), True, 8))
    for shape, words, n in cases:
        d = SimpleNamespace(shape=shape, prompts={"": 0} if words else {})
        assert max_batch(d, 64) == n and max_batch(d, 1) == 1


# --- the edges: pictures and files ---

def noise_picture(*shape, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_encode_decode_round_trip():
    for channels, mode, shape in ((3, "RGB", (8, 8, 3)), (1, "L", (8, 8))):
        d, pictures = tiny(channels=channels), [noise_picture(*shape, seed=k) for k in range(3)]
        x = d.encode(pictures)
        assert x.shape == (3, channels, 8, 8) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
        for a, b in zip(pictures, d.decode(x)): assert b.mode == mode and np.array_equal(np.asarray(a), np.asarray(b))
        assert d.latents(x) is x and torch.equal(d.pixels(x), x.expand(-1, 3, -1, -1))   # grey three times
        if channels == 1: assert_close(d.latents(d.pixels(x)), x)   # and back


def test_an_oblong_model():
    d = tiny(size=(8, 16))
    assert d.shape == (3, 8, 16) and d.sample([0], steps=1).shape == (1, 3, 8, 16)
    x = d.encode([Image.new("RGB", (16, 8))])
    assert x.shape == (1, 3, 8, 16) and d.decode(x)[0].size == (16, 8)


def test_encode_takes_other_modes_and_decode_cuts():
    d = tiny()
    grey, black = Image.new("L", (8, 8), 255), Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))   # white lies beneath
    wanted = torch.tensor([1., -1., 1.]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert_close(d.encode([grey, black, clear]), wanted)
    assert np.asarray(d.decode(torch.full((1, 3, 8, 8), 7.))[0]).min() == 255


def picture(file, mode="RGB", size=(8, 6), **save):
    "Random pixels, written to a file; returns them as an image."
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, size, np.random.default_rng(0).bytes(size[0] * size[1] * bands))
    image.save(file, **save)
    return image


def test_read_image_gives_rgb_turned_as_the_camera_says(tmp_path):
    for mode in ("RGB", "L", "CMYK"):
        file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        made, read = picture(file, mode), read_image(file)
        assert read.mode == "RGB" and read.size == (8, 6)
        if mode != "CMYK": assert np.array_equal(np.asarray(read), np.asarray(made.convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6   # turned by 90 degrees
    made = picture(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.rot90(np.asarray(made), -1))


def png16(file, bands, value):
    "A PNG of 2 x 2 pixels of 16 bits in each band, written by hand: Pillow writes grey ones only."
    def number(n): return struct.pack(">I", n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", value) * bands * 2) * 2
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts))


def test_what_is_transparent_lies_over_white_and_16_bits_are_scaled(tmp_path):
    "Every kind of transparency that a PNG has; the colour is .2 red over white, as a browser shows it."
    file, red = tmp_path / "a.png", (255, 204, 204)
    def palette():
        image = Image.new("P", (1, 1), 0)
        image.putpalette([255, 0, 0])
        return image
    cases = ((Image.new("RGBA", (1, 1), (255, 0, 0, 51)), {}, red), (Image.new("LA", (1, 1), (0, 51)), {}, (204,) * 3),
             (palette(), dict(transparency=bytes([51])), red),
             (Image.new("RGB", (1, 1), "red"), dict(transparency=(255, 0, 0)), (255,) * 3),
             (Image.new("L", (1, 1), 7), dict(transparency=7), (255,) * 3),
             (Image.new("RGBA", (1, 1), (9, 9, 9, 255)), {}, (9,) * 3), (Image.new("1", (1, 1), 1), {}, (255,) * 3))
    for image, how, wanted in cases:
        image.save(file, **how)
        read = read_image(file)
        assert read.mode == "RGB" and read.getpixel((0, 0)) == wanted, (image.mode, how)
    for bands, value in ((1, 99 * 257), (3, 99 * 257), (1, 65535), (1, 0), (4, 65535), (2, 0)):
        png16(file, bands, value)
        wanted = (255,) * 3 if (bands, value) == (2, 0) else (value // 257,) * 3
        assert read_image(file).getpixel((1, 1)) == wanted, (bands, value)
    for mode in "IF":
        with pytest.raises(ValueError, match=f"mode {mode} has no agreed range"): opaque(Image.new(mode, (1, 1)))
    for mode in ("I;16", "I;16B"):
        assert opaque(Image.frombytes(mode, (1, 1), bytes([99, 99]))).getpixel((0, 0)) == (99,) * 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_read_image_refuses_all_else_in_one_sentence(tmp_path):
    def cut(f): picture(f, size=(64, 64)), f.write_bytes(f.read_bytes()[:3000])
    def bomb(side): return lambda f: Image.new("1", (side, side)).save(f)   # a few kB on the disk
    cases = (
        (lambda f: None, "there is no file"),
        (lambda f: f.mkdir(), "is not a picture"),
        (lambda f: f.write_bytes(b""), "is not a picture"),
        (lambda f: f.write_text("<svg/>"), "is not a picture"),
        (lambda f: picture(f, format="GIF"), "expected a whole PNG, JPEG or WebP file"),
        (lambda f: picture(f, format="TIFF"), "expected a whole PNG, JPEG or WebP file"),
        (cut, "is not a picture"),
        (lambda f: Image.new("1", (10_000, 5_001)).save(f), "10000 x 5001 pixels"),
        (bomb(12_000), "50 million"),
        (bomb(14_000), "50 million"),
    )
    for k, (write, sentence) in enumerate(cases):
        file = tmp_path / f"{k}.png"
        write(file)
        with pytest.raises(ValueError) as e: read_image(file)
        assert sentence in str(e.value) and file.name in str(e.value) and "\n" not in str(e.value), sentence


# --- errors: one sentence that names the value ---

def test_what_does_not_fit_is_refused_in_one_sentence():
    def with_net(net, scheduler=DDPMScheduler): return lambda: Denoiser(net, scheduler())
    def with_scheduler(scheduler): return lambda: Denoiser(tiny_net(), scheduler)
    x, t = normal(1, 3, 8, 8), torch.tensor([5])
    vae = AutoencoderKL(block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
                        up_block_types=("UpDecoderBlock2D",), norm_num_groups=4)
    cases = (
        (with_net(vae), "the net is a AutoencoderKL; expected one of UNet2DModel"),
        (with_net(tiny_net(), FlowMatchEulerDiscreteScheduler), "has no alphas_cumprod"),
        (with_net(tiny_net(out_channels=5)), "5 output channels for 3 input channels"),
        (with_net(tiny_net(4)), "4 channels"), (with_net(tiny_net(num_class_embeds=10)), "wants a class"),
        (with_scheduler(DDIMScheduler(rescale_betas_zero_snr=True)), "zero SNR"),
        (with_scheduler(DDPMScheduler(trained_betas=[.1, .2])), "2 noise levels"),
        (with_net(tiny_net(size=None)), "says no sample_size"),
        (lambda: tiny("flow"), "'flow' is not supported; expected one of epsilon, v_prediction, sample"),
        (lambda: tiny(thresholding=True), "thresholding"),
        (lambda: tiny().encode([Image.new("RGB", (9, 8))]), "9 x 8 pixels, but this model makes 8 x 8; resize"),
        (lambda: tiny(channels=2).encode([Image.new("RGB", (8, 8))]), "2 channels"),
        (lambda: tiny().sample([0], steps=0), "steps = 0 makes no picture"),
        (lambda: tiny().sample([1.5]), "seed 1.5 is no seed"),
        (lambda: tiny().reconstruct(x, 1000, [0]), "level t = 1000 does not exist; this model has levels 0 ... 999"),
        (lambda: tiny().reconstruct(normal(1, 3, 9, 9), 10, [0]), "is [1, 3, 9, 9], but this model makes [1, 3, 8, 8]"),
        (lambda: tiny().sample([0], prompt="a flag"), "prompt 'a flag' was given, but this model makes"),
        (lambda: tiny().sample([0, 1], prompt=[None, "x"]), "prompt 'x' was given"),
        (lambda: tiny()(x, t, torch.tensor([0])), "cond was given, but this model makes pictures without words"),
    )
    for act, sentence in cases:
        with pytest.raises(ValueError) as e: act()
        assert sentence in str(e.value) and "\n" not in str(e.value), sentence
