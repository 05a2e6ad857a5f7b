"""The sequel, ReCLIP++: each formula against a literal computation, its labels by windows, its
commands, and the authors' published files of it.

The literal computations are plain torch.nn.functional on the tensors of a small CLIP, in float64,
with those of test_released.py for CLIP's two towers.
"""

import copy
import csv
import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import datasets
import eval as evaluation
import train
from clip_model import CLIP, Tokenizer, sha256_of
from datasets import CONTEXT_CLASSES, DATA, VOC_CLASSES, Windows, find_settings, window_corners
from reclip import (
    PROMPTS,
    Logits,
    ReCLIP,
    ReCLIPPlusPlus,
    contrastive_loss,
    gumbel_softmax_masks,
    masked_features,
    open_rectification,
    released_kind,
    segment,
    strong_classes,
    window_labels,
)
from test_released import (
    OPENAI,
    SMALL,
    Words,
    in_double,
    literal_texts,
    literal_W_r,
    literal_Z,
    positions,
    rectification,
    sequel,
    three_tokens,
    unit_rows,
)

NAMES = ("cat", "dog | tree", "grass of", "photo")
ONE_PROMPT = ("a photo of a {}",)


# --- A small model, and the same in plain functions -----------------------------------------------

def shaken(model, seed=1):
    """Random numbers in all that learns, batch norm and running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for key, tensor in state.items():
        if key.startswith(("reference.", "position_projection.", "decoder.")):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.3 * noise.to(tensor.dtype))
            if key.endswith("running_var"):
                tensor.abs_().add_(0.5)
    model.load_state_dict(state)
    return model


def small_model(clip, names=NAMES, **options):
    options = {"prompts": ONE_PROMPT, "prompt_length": 5} | options
    return ReCLIPPlusPlus(clip, names, **options)


@pytest.fixture
def model(clip):
    return shaken(small_model(clip).double()).eval()


def as_published(clip):
    """The tensors of a CLIP under the names that the functions of test_released.py read."""
    state = {}
    for key, tensor in clip.state_dict().items():
        if key.startswith("visual."):
            state[f"module.vit.{key.removeprefix('visual.')}"] = tensor
        else:
            state[f"module.text_encoder.{key}"] = tensor
    state["module.proj.weight"] = clip.visual.proj.detach().T[:, :, None, None]
    state["module.clip.text_projection"] = clip.text_projection.detach()
    return in_double(state)


def one_text_at_a_time(clip, vectors, names):
    """W_r: [SOT] v_1 .. v_L [name] [EOT], a forward pass of its own for each; Frobenius norm 1."""
    state = as_published(clip)
    table = state["module.text_encoder.token_embedding.weight"]
    rows = []
    for name in names:
        ending = [*clip.tokenizer.encode(name.split("|")[0]), clip.eot]
        text = torch.cat([table[clip.sot][None], vectors.double(), table[ending]])
        place = len(text) - 1
        text = F.pad(text, (0, 0, 0, clip.context_length - len(text)))
        rows.append(literal_texts(state, text[None], torch.tensor([place]))[0])
    W = torch.stack(rows)
    return W / W.square().sum().sqrt()


def batch_norm_in_words(x, state, training):
    """(x - mean) / sqrt(var + eps) * weight + bias, with statistics of the batch or kept ones."""
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, var = state["decoder.1.running_mean"], state["decoder.1.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * state["decoder.1.weight"][:, None, None] + state["decoder.1.bias"][:, None, None]


def literal_parts(model, Z, learnt=None, training=False):
    """P, W_r, M_q, M_b, M and M^ of features Z (B, D, h, w), all in float64.

    learnt: {key: tensor} in the place of the model's own, such as parameters to differentiate by.
    """
    state = in_double(dict(model.learnt()))
    if learnt is not None:
        state = state | learnt
    published = as_published(model.clip)
    Z = Z.double()

    p = positions(published, *Z.shape[2:])
    P = F.conv2d(p, state["position_projection.weight"], state["position_projection.bias"])
    W_r = one_text_at_a_time(model.clip, state["reference.vectors"], model.class_names)
    M_q = F.conv2d(Z, state["W_q"][:, :, None, None])
    M_b = F.conv2d(P, W_r[:, :, None, None])
    M = M_q - M_b
    stacked = torch.cat([Z, M], 1)
    decoded = F.conv2d(stacked, state["decoder.0.weight"], state["decoder.0.bias"], padding=2)
    decoded = batch_norm_in_words(decoded, state, training)
    return {"P": P, "W_r": W_r, "M_q": M_q, "M_b": M_b, "M": M, "M^": decoded}


def pictures(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_features(clip, images):
    """Z by plain functions: CLIP's own class token and eps, CLIP's mean and std."""
    return literal_Z(
        as_published(clip), images, exact_gelu=False, eps=1e-5,
        class_token="module.vit.class_embedding", **OPENAI,
    )


# Not square and no multiple of the patch; the grid that the weights were trained on; one row.
SHAPES = ((2, 3, 21, 34), (1, 3, 12, 12), (1, 3, 4, 30))
EXACT = {"rtol": 1e-9, "atol": 1e-10}


# --- The formulas ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_each_part_is_the_literal_computation(model, shape, training):
    model.train(training)
    images = pictures(*shape)
    found = model(images)
    Z = plain_features(model.clip, images)
    want = literal_parts(model, Z, training=training)
    torch.testing.assert_close(found.features, Z, **EXACT)
    torch.testing.assert_close(found.query, want["M_q"], **EXACT)
    torch.testing.assert_close(found.reference, want["M_b"].expand_as(want["M_q"]), **EXACT)
    torch.testing.assert_close(found.rectified, want["M^"], **EXACT)

    # The parts that Logits does not have.
    h, w = Z.shape[2:]
    p = model.clip.visual.positional_grid(h, w)
    torch.testing.assert_close(model.position_projection(p), want["P"], **EXACT)
    W_q, W_r = model.heads()
    torch.testing.assert_close(W_r, want["W_r"], **EXACT)
    assert W_r.norm().item() == pytest.approx(1) and torch.equal(W_q, model.W_q)
    assert isinstance(found, Logits) and found.rectified.shape == (shape[0], 4, h, w)
    assert not found.positional.any() and found.positional.shape[2:] == (h, w)


def test_the_decoder_sees_M_and_not_M_q(model, monkeypatch):
    """Its input, first the features and then the difference; and the bias is no rounding error."""
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = pictures(2, 3, 21, 34)
    model(images)
    want = literal_parts(model, plain_features(model.clip, images))
    torch.testing.assert_close(seen[0][:, :12], plain_features(model.clip, images), **EXACT)
    torch.testing.assert_close(seen[0][:, 12:], want["M"], **EXACT)
    assert want["M_b"].std() > 0.1


def test_each_part_of_the_formula_can_be_seen(model):
    """A wrong sign, no bias, another norm or padding would each move M^ by far more than EXACT."""
    Z = plain_features(model.clip, pictures(2, 3, 21, 34))
    want = literal_parts(model, Z)
    state = model.state_dict()

    def decode(M, **how):
        x = F.conv2d(
            F.pad(torch.cat([Z, M], 1), (2, 2, 2, 2), **how),
            state["decoder.0.weight"], state["decoder.0.bias"],
        )
        return batch_norm_in_words(x, state, False)

    M_q, M_b = want["M_q"], want["M_b"]
    torch.testing.assert_close(decode(M_q - M_b), want["M^"], **EXACT)
    rows = want["W_r"] / want["W_r"].norm(dim=1, keepdim=True)
    per_class = F.conv2d(want["P"], rows[:, :, None, None])
    mistakes = (
        decode(M_q + M_b), decode(M_q), decode(M_q - per_class),
        decode(M_q - M_b, mode="replicate"),
    )
    for wrong in mistakes:
        assert (wrong - want["M^"]).abs().max() > 0.01


def test_the_bias_is_that_of_the_place_alone(model):
    """M_b is the same for every image, differs from place to place and from class to class."""
    M_b = model(pictures(3, 3, 21, 34)).reference
    assert torch.equal(M_b[0], M_b[1]) and torch.equal(M_b[0], M_b[2])
    assert torch.equal(M_b[0], model(pictures(1, 3, 21, 34, seed=9)).reference[0])
    assert M_b[0].flatten(1).std(1).min() > 1e-2 and M_b[0].std(0).min() > 1e-3


def test_scale_and_temperatures(clip):
    model = small_model(clip)
    assert (model.scale, model.tau_1, model.method) == (10, 0.01, "reclip++")
    assert model.settings["tau_1"] == 0.01 and model.recipe == "2025"
    assert ReCLIP(clip, NAMES, prompts=ONE_PROMPT).scale == 100


def test_what_is_kept_in_eval_mode_is_forgotten_in_time(model):
    """P and W_r are computed once for each grid; whatever changes a weight clears them."""
    images, wide = pictures(1, 3, 21, 34), pictures(1, 3, 12, 40)
    calls = []
    model.position_projection.register_forward_hook(lambda *inputs: calls.append(1))
    first = model(images).rectified
    assert torch.equal(model(images).rectified, first) and len(calls) == 1
    model(wide)
    assert torch.equal(model(images).rectified, first) and len(calls) == 2

    changed = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed["position_projection.bias"] += 1
    model.load_state_dict(changed)
    want = literal_parts(model, plain_features(model.clip, images))
    torch.testing.assert_close(model(images).rectified, want["M^"], **EXACT)

    model.train()
    with torch.no_grad():
        model.reference.vectors += 1
        model.position_projection.weight *= 2
    model.eval()
    want = literal_parts(model, plain_features(model.clip, images))
    torch.testing.assert_close(model(images).rectified, want["M^"], **EXACT)
    torch.testing.assert_close(model.heads()[1], want["W_r"], **EXACT)


@pytest.mark.parametrize(
    "options", [{"prompt_length": 0}, {"positional_channels": 1}, {"positional_channels": None}]
)
def test_what_it_cannot_be_without(clip, options):
    with pytest.raises(ValueError) as caught:
        small_model(clip, **options)
    assert "\n" not in str(caught.value) and "ReCLIP++" in str(caught.value)


# --- The decoder's start; what learns -------------------------------------------------------------

@pytest.fixture
def full_size():
    """ViT-B/16's sizes without its numbers, and VOC's names: where sizes alone matter."""
    with torch.device("meta"):
        clip = CLIP(512, 16, 768, 12, 14, 77, 49408, 512, 12)
        W_q = torch.empty(20, 512)
    clip.tokenizer = Words(49408)

    def make(**options):
        return ReCLIPPlusPlus(clip, VOC_CLASSES, W_q=W_q, tau=0.01, **options)

    return make


def test_as_many_numbers_learn_as_in_the_published_files(full_size):
    """73 x 512; 512 x 768 + 512; 20 x 532 x 25 + 20; 20 + 20."""
    model = full_size()
    learns = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {
        "reference.vectors": (73, 512),
        "position_projection.weight": (512, 768, 1, 1),
        "position_projection.bias": (512,),
        "decoder.0.weight": (20, 532, 5, 5),
        "decoder.0.bias": (20,),
        "decoder.1.weight": (20,),
        "decoder.1.bias": (20,),
    }
    assert sum(math.prod(shape) for shape in learns.values()) == 697_164
    modules = model.learnable_modules()
    assert set(modules) == {"reference", "position_projection", "decoder"}
    assert sum(p.numel() for part in modules.values() for p in part.parameters()) == 697_164


def test_the_decoder_starts_as_kaiming_with_fan_out(make_clip):
    """std sqrt(2 / (C * 25)): of 20 classes .063, where fan_in would be .0123."""
    clip = make_clip(embed_dim=512)
    weight = small_model(clip, VOC_CLASSES, W_q=unit_rows(20)).decoder[0].weight
    assert weight.shape == (20, 532, 5, 5)
    assert weight.std().item() == pytest.approx((2 / (20 * 25)) ** 0.5, rel=0.01)
    assert abs(weight.mean().item()) < 1e-3
    kurtosis = ((weight / weight.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.05)  # normal; uniform: 1.8


def test_nothing_stands_behind_the_batch_norm(clip):
    """In training each class has mean 0 over the batch: half of the values are below 0."""
    model = small_model(clip).train()
    assert [type(layer).__name__ for layer in model.decoder] == ["Conv2d", "BatchNorm2d"]
    M = model(pictures(2, 3, 33, 50).float()).rectified
    below = (M < 0).float().mean((0, 2, 3))
    assert ((below > 0.2) & (below < 0.8)).all()
    assert M.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(M.var((0, 2, 3), unbiased=False), torch.ones(4), rtol=0, atol=1e-2)


def test_gradients_reach_prompt_projection_and_decoder_alone(clip):
    model = small_model(clip).train()
    Z = model.features(pictures(2, 3, 21, 34).float())
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)
    labels = torch.ones(2, 4, dtype=torch.bool)
    contrastive_loss(masked_features(Z, masks), model.W_q, labels, model.tau).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in ("reference.vectors", "position_projection.weight", "decoder.0.weight"):
        assert dict(model.named_parameters())[name].grad.abs().max() > 0, name
    assert not [name for name in with_gradient if "clip" in name or "dense_visual" in name]
    assert not model.clip.training and not model.W_q.requires_grad


# --- One step of training -------------------------------------------------------------------------

def slow_loss(decoded, noise, Z, W_q, present, tau):
    """Eq. (4)-(5), patch by patch and class by class: one image, (C, h, w) and (D, h, w).

    The straight-through gradient: forward 1 for the chosen class and 0 for the others, backward
    that of the softmax.
    """
    C, h, w = decoded.shape
    pooled = [torch.zeros(len(Z), dtype=Z.dtype) for _ in range(C)]
    for y in range(h):
        for x in range(w):
            noisy = decoded[:, y, x] / 0.01 + noise[:, y, x]
            exponentials = (noisy - noisy.max()).exp()
            soft = exponentials / exponentials.sum()
            chosen = max(range(C), key=lambda c: noisy[c].item())
            for c in range(C):
                one = soft[c] - soft[c].detach() + (1.0 if c == chosen else 0.0)
                pooled[c] = pooled[c] + one * Z[:, y, x] / (h * w)

    losses = []
    for c in range(C):
        if present[c]:
            S = torch.stack([pooled[c] @ text for text in W_q]) / tau
            losses.append(S.exp().sum().log() - S[c])
    return sum(losses) / len(losses)


def test_one_step_against_a_slow_loop(make_voc, make_clip, tmp_path):
    """Of train_rectification: the loss in its log, the gradients in the momentum of its state."""
    split = datasets.open_split("voc", make_voc({"train": 1}), "train")
    settings = find_settings("voc", method="reclip++", crop=24, prompt_length=5, rectify_epochs=1)
    facts = dataclasses.replace(DATA["voc"], prompts=ONE_PROMPT)
    model = train.new_reclip(make_clip(context=77), facts, settings, seed=0)
    assert type(model) is ReCLIPPlusPlus and model.training and model.tau_1 == 0.01
    before = copy.deepcopy(model)
    present = torch.zeros(20, dtype=torch.bool)
    present[[3, 7, 8]] = True
    run = train.Run("rectify", tmp_path / "out", {})
    train.train_rectification(model, split, {"train_0": present}, settings, run)

    # The step again. Its noise is the first that is drawn after its seed.
    augment = datasets.Augment(
        settings.rectify_long_side, settings.rectify_short_side, 24, antialias=False
    )
    image, valid, _ = datasets.TrainingStream(split, augment, seed=0)[0]
    assert valid.all()
    Z = before.features(image[None])
    torch.manual_seed(7_368_787)
    noise = -torch.empty(1, 20, 6, 6).exponential_().log()

    learnt = {}
    for name, parameter in before.named_parameters():
        if parameter.requires_grad:
            learnt[name] = parameter.detach().double().requires_grad_()
    decoded = literal_parts(before, Z, learnt, training=True)["M^"]
    loss = slow_loss(
        decoded[0], noise[0].double(), Z[0].double(), before.W_q.double(), present, before.tau
    )
    rows = list(csv.DictReader((tmp_path / "out" / "rectify_log.csv").open()))
    assert len(rows) == 1 and float(rows[0]["loss"]) == pytest.approx(loss.item(), rel=1e-5)

    # SGD's momentum begins as gradient + weight decay * weight.
    loss.backward()
    state = torch.load(run.state_path, weights_only=True)
    order = []
    for part, module in before.learnable_modules().items():
        order += [f"{part}.{name}" for name, _ in module.named_parameters()]
    assert sorted(order) == sorted(learnt)
    for i, name in enumerate(order):
        weight = learnt[name]
        want = weight.grad + 0.0005 * weight.detach()
        found = state["optimiser"]["state"][i]["momentum_buffer"].double()
        largest = want.abs().max().item()
        torch.testing.assert_close(found, want, rtol=0, atol=2e-3 * largest + 1e-6, msg=name)
        moved = dict(model.named_parameters())[name].double() - weight.detach()
        torch.testing.assert_close(moved, -0.01 * found, rtol=1e-3, atol=1e-7, msg=name)


# --- Image-level labels by windows ----------------------------------------------------------------

def corners_in_words(height, width, side):
    """0, s, 2s, .. strictly below H - w and W - w, with s half a side; row by row."""
    rows, columns = [], []
    y = 0
    while y < height - side:
        rows.append(y)
        y += side // 2
    x = 0
    while x < width - side:
        columns.append(x)
        x += side // 2
    return [(y, x) for y in rows for x in columns]


@pytest.mark.parametrize("size", [
    (375, 500, 56), (500, 375, 56), (112, 113, 56), (85, 140, 56), (57, 57, 56), (300, 200, 85),
    (200, 400, 80), (57, 140, 56), (64, 64, 24), (99, 61, 25),
])
def test_corners(size):
    found = window_corners(*size)
    assert found == corners_in_words(*size) and found[0] == (0, 0)
    H, W, side = size
    for y, x in found:
        assert y + side < H and x + side < W


def test_corners_of_a_usual_voc_image():
    """375 x 500 pixels: 12 rows of 16."""
    corners = window_corners(375, 500, 56)
    assert len(corners) == 192 and corners[:3] == [(0, 0), (0, 28), (0, 56)]
    assert corners[-1] == (308, 420)
    # Strictly below: where a window would end with the image there is none.
    assert window_corners(84, 112, 56) == [(0, 0), (0, 28)]
    assert window_corners(56, 500, 56) == window_corners(500, 56, 56) == []


def write_image(path, height, width, seed=0):
    """Blocks of random colors: windows then differ in what CLIP takes them for."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(path)


def torchvisions(window, resolution):
    """One window uint8 (3, w, w) as CLIP's input, by torchvision alone."""
    resized = v2.functional.resize(
        window, [resolution, resolution], InterpolationMode.BICUBIC, antialias=True
    )
    return resized.float() / 255


@pytest.fixture
def folder(tmp_path):
    """Own images: one of 3 x 2 windows, one that is too small on one side, one as large as one."""
    path = tmp_path / "own"
    path.mkdir()
    for i, (name, size) in enumerate({"b": (140, 112), "a": (40, 200), "c": (56, 56)}.items()):
        write_image(path / f"{name}.png", *size, seed=i)
    return path


def test_windows_are_cut_and_resized_as_torchvision_does(folder):
    split = datasets.open_split(str(folder), None, "train")
    windows = Windows(split, 56, 48)
    for i in range(len(split)):
        image = split.image(i)
        found, name = windows[i]
        assert name == split.names[i]
        cuts = corners_in_words(*image.shape[1:], 56)
        want = [torchvisions(image[:, y:y + 56, x:x + 56], 48) for y, x in cuts]
        if name != "b.png":
            want = [torchvisions(image, 48)]  # whole, squeezed into CLIP's square
        assert len(found) == (6 if name == "b.png" else 1)
        torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=1e-6)


def test_windows_of_resized_images(folder):
    """Within 100 x 84 pixels, the ratio kept."""
    split = datasets.open_split(str(folder), None, "train")
    found, name = Windows(split, 24, 16, 100, 84)[split.names.index("b.png")]
    image = v2.functional.resize(split.image(split.names.index(name)), [100, 80], antialias=True)
    want = [
        torchvisions(image[:, y:y + 24, x:x + 24], 16)
        for y, x in corners_in_words(100, 80, 24)
    ]
    assert len(want) == 7 * 5
    torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=1e-6)


def test_window_labels_are_the_union_of_best_classes():
    similarity = torch.randn(7, 9)
    best = {row.index(max(row)) for row in similarity.tolist()}
    found = window_labels(similarity)
    assert found.dtype == torch.bool and found.shape == (9,)
    assert set(found.nonzero()[:, 0].tolist()) == best and 1 < len(best) < 8
    one = window_labels(torch.tensor([[1.0, 3.0, 2.0]]))
    assert one.tolist() == [False, True, False]


def labels_in_words(model, image, side):
    """The best text of each window; CLIP reads one window at a time."""
    cuts = corners_in_words(*image.shape[1:], side)
    windows = [image[:, y:y + side, x:x + side] for y, x in cuts] or [image]
    mean = torch.tensor(OPENAI["mean"]).view(3, 1, 1)
    std = torch.tensor(OPENAI["std"]).view(3, 1, 1)
    best = set()
    for window in windows:
        pixels = (torchvisions(window, model.clip.input_resolution) - mean) / std
        vector = model.clip.encode_image(pixels[None])[0]
        cosines = [(F.cosine_similarity(vector, text, dim=0)).item() for text in model.W_q]
        best.add(cosines.index(max(cosines)))
    return sorted(best)


def spread(clip):
    """A model whose W_q are directions of random image features: windows differ in their class."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.rand(8, 3, 3, 3, generator=generator)
    vectors = clip.encode_image(F.interpolate(4 * blocks - 2, clip.input_resolution))
    vectors = vectors - vectors.mean(0)
    return small_model(clip, [f"cat{i}" for i in range(8)], W_q=F.normalize(vectors, dim=1))


def test_find_in_windows_of_a_folder(clip, folder):
    """Own images are first resized as for training; the labels are the right image's."""
    model = spread(clip)
    split = datasets.open_split(str(folder), None, "train")
    settings = find_settings(
        str(folder), method="reclip++", label_window=24, rectify_long_side=100,
        rectify_short_side=84,
    )
    found = train.find_in_windows(model, split, settings, workers=0)
    assert set(found) == {"a.png", "b.png", "c.png"}
    sizes = {"a.png": [20, 100], "b.png": [100, 80], "c.png": [84, 84]}
    for i, name in enumerate(split.names):
        image = v2.functional.resize(split.image(i), sizes[name], antialias=True)
        assert found[name] == labels_in_words(model, image, 24), name
    assert len(found["b.png"]) > 1 and len(found["a.png"]) == 1
    assert len({tuple(classes) for classes in found.values()}) > 1


def test_find_in_windows_of_a_benchmark(clip, make_voc):
    """As they are: no side of the settings changes what is cut."""
    model = spread(clip)
    split = datasets.open_split("voc", make_voc({"train": 3}), "train")
    settings = find_settings("voc", method="reclip++", label_window=20)
    found = train.find_in_windows(model, split, settings, workers=0)
    assert list(found) == split.names
    for i, name in enumerate(split.names):
        assert found[name] == labels_in_words(model, split.image(i), 20)
    assert max(len(classes) for classes in found.values()) > 1


def test_labels_do_not_depend_on_how_many_windows_go_through_at_once(clip, folder, monkeypatch):
    """300 windows are read in pieces, and their order is lost nowhere."""
    model = spread(clip)
    image = folder / "large.png"
    write_image(image, 100, 190, seed=3)
    split = datasets.Folder(image)
    settings = find_settings("own", method="reclip++", label_window=8)
    settings = dataclasses.replace(settings, rectify_long_side=190, rectify_short_side=100)
    pieces = []
    read = model.image_similarity

    def counted(windows):
        pieces.append(len(windows))
        return read(windows)

    monkeypatch.setattr(model, "image_similarity", counted)
    found = train.find_in_windows(model, split, settings, workers=0)
    assert sum(pieces) == len(corners_in_words(100, 190, 8)) > 300 and max(pieces) < 300
    assert found["large.png"] == labels_in_words(model, split.image(0), 8)


def test_labels_are_kept_by_name_and_not_computed_again(clip, folder, tmp_path, monkeypatch):
    model = spread(clip)
    path = tmp_path / "labels.json"
    settings = find_settings(str(folder), method="reclip++", rectify_short_side=84)
    facts = datasets.own_facts(str(folder), model.class_names)

    def labels_of(settings=settings):
        split = datasets.open_split(str(folder), None, "train")
        origin = train.origin_of(facts, settings, clip, PROMPTS, split)
        return train.label_training_set(model, split, settings, origin, path)

    first = labels_of()
    split = datasets.open_split(str(folder), None, "train")
    found = train.find_in_windows(model, split, settings, workers=0)
    assert set(first) == set(split.names)
    for name, row in first.items():
        assert row.dtype == torch.bool and row.nonzero()[:, 0].tolist() == found[name]

    with monkeypatch.context() as patch:
        patch.setattr(train, "find_in_windows", None)
        again = labels_of()
    assert all(torch.equal(first[name], again[name]) for name in first)

    # What is in the file counts, by name; another window is another question.
    content = json.loads(path.read_text())
    content["labels"] = {name: [i] for i, name in enumerate(sorted(content["labels"]))}
    path.write_text(json.dumps(content))
    kept = labels_of()
    assert [kept[name].tolist().index(True) for name in ("a.png", "b.png", "c.png")] == [0, 1, 2]
    labels_of(dataclasses.replace(settings, label_window=24))
    assert json.loads(path.read_text())["labels"] != content["labels"]

    # Nor are they taken for those of the paper's rule.
    path.write_text(json.dumps(content))
    labels_of(dataclasses.replace(settings, label_window=0))
    assert json.loads(path.read_text())["labels"] != content["labels"]


def test_kept_labels_of_own_images_are_made_anew_for_other_sides(clip, folder, tmp_path):
    """Windows are cut from resized images: the sides decide what a window shows."""
    model = spread(clip)
    facts = datasets.own_facts(str(folder), model.class_names)
    split = datasets.open_split(str(folder), None, "train")
    for short_side in (84, 200):
        settings = find_settings(
            str(folder), method="reclip++", rectify_short_side=short_side, label_window=30
        )
        origin = train.origin_of(facts, settings, clip, PROMPTS, split)
        labels = train.label_training_set(
            model, split, settings, origin, tmp_path / "labels.json"
        )
        want = train.find_in_windows(model, split, settings, workers=0)
        found = {name: row.nonzero()[:, 0].tolist() for name, row in labels.items()}
        assert found == want, f"the labels of short side {short_side}"


# --- Settings -------------------------------------------------------------------------------------

def test_settings_are_those_of_2025_but_for_what_the_sequel_changes():
    wanted = {
        "voc": {"label_window": 56, "denoise": 1.0},
        "context": {"label_window": 80, "denoise": 0.85},
        "ade20k": {"label_window": 85, "denoise": 0.5},
    }
    sides = {"voc": (2048, 336, 336), "context": (2048, 448, 480), "ade20k": (2048, 512, 512)}
    for data, changes in wanted.items():
        settings = find_settings(data, method="reclip++")
        assert settings == find_settings(data, "2025", "reclip++")
        assert settings == dataclasses.replace(
            find_settings(data, "2025"), method="reclip++", tau_1=0.01, **changes
        )
        assert (settings.rectify_long_side, settings.rectify_short_side, settings.crop) == (
            sides[data]
        )
        assert settings.label_window == settings.crop // 6
        assert settings.recipe == "2025" and (settings.lr, settings.rectify_batch) == (0.01, 1)
        assert find_settings(data).label_window == 0 and find_settings(data).method == "reclip"


def test_settings_of_other_images():
    for data in ("shapes", "any folder"):
        settings = find_settings(data, method="reclip++")
        assert settings.method == "reclip++"
        assert settings.recipe == "2025" and settings.tau_1 == 0.01
        plain = find_settings(data)
        assert (plain.method, plain.label_window) == ("reclip", 0)
        changed = dataclasses.replace(
            settings, method="reclip", label_window=0, tau_1=plain.tau_1
        )
        assert changed.denoise == plain.denoise == 0
    assert find_settings("any folder", method="reclip++").label_window == 56
    # Chosen on val: few and large things, so windows name what is not there.
    shapes = find_settings("shapes", method="reclip++")
    assert (shapes.label_window, shapes.lr) == (0, 0.01)
    assert find_settings("voc", method="reclip++", label_window=30).label_window == 30


def test_the_other_recipe_and_other_methods_are_refused():
    for data in ("voc", "context", "ade20k", "shapes", "own"):
        with pytest.raises(ValueError, match="2025") as caught:
            find_settings(data, "cvpr2024", "reclip++")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="reclip\\+\\+"):
        find_settings("voc", method="reclip2")


def test_command_line_of_the_method():
    """The recipe is implied, the folder is another one, and options still change settings."""
    _, _, settings = train.parse_arguments(
        ["--stage", "rectify", "--data", "voc", "--method", "reclip++"]
    )
    assert settings == find_settings("voc", method="reclip++")
    args, _, settings = train.parse_arguments(
        ["--stage", "rectify", "--data", "voc", "--method", "reclip++", "--recipe", "2025",
         "--label-window", "40", "--denoise", "0.7"]
    )
    assert (settings.label_window, settings.denoise) == (40, 0.7)
    assert args.out.name == "voc-reclip++"
    args, _, settings = train.parse_arguments(["--stage", "rectify", "--data", "voc"])
    assert args.out.name == "voc" and settings == find_settings("voc")
    with pytest.raises(SystemExit):
        train.parse_arguments(["--stage", "rectify", "--method", "reclip+++"])


@pytest.mark.parametrize("options, words", [
    (["--stage", "all"], "--method reclip\\+\\+"),
    (["--stage", "distill"], "--method reclip\\+\\+"),
    ([], "--method reclip\\+\\+"),
    (["--stage", "rectify", "--recipe", "cvpr2024"], "cvpr2024"),
])
def test_commands_that_do_not_fit_the_method(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        train.parse_arguments(["--data", "voc", "--method", "reclip++", *options])
    assert "\n" not in str(caught.value)


def saturated_logits(dtype):
    """Six classes on a row of six patches; the rest of a patch is 0.

    softmax(10 M) of a patch where one class leads by d is 1 / (1 + 5 exp(-10 d)). In fp32 that is
    1 from about d = 1.9 on, in float64 not before d = 3.8.
    """
    logits = torch.zeros(1, 6, 1, 6, dtype=dtype)
    for patch, (c, lead) in enumerate([(0, 1.4), (1, 2.2), (2, 1.0), (3, 3.0), (4, 1.6)]):
        logits[0, c, 0, patch] = lead
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoising_at_1_keeps_what_saturates_in_fp32(dtype):
    logits = saturated_logits(dtype)
    probabilities = (10 * logits).float().numpy()
    exponentials = np.exp(probabilities - probabilities.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    saturated = (probabilities.max((0, 2, 3)) == np.float32(1)).tolist()
    assert saturated == [False, True, False, True, False, False]
    assert strong_classes(logits, 1.0, scale=10).tolist() == saturated

    # In float64 none of them is 1: the threshold would keep all.
    exact = (10 * logits.double()).softmax(1).amax((0, 2, 3))
    assert (exact < 1).all() and (exact[[1, 3]] > 1 - 1e-8).all()

    # Of a mask the others are gone; where nothing saturates all stay.
    mask = segment(logits.float(), 16, (16, 96), (16, 96), denoise=1.0, scale=10)
    assert set(mask.unique().tolist()) == {1, 3}
    assert strong_classes(logits[:, [0, 2, 4]], 1.0, scale=10).all()


def test_masks_are_denoised_on_softmax_of_ten_times_the_logits(model):
    """By predict_mask, with the model's own scale; 100, ReCLIP's, would keep more."""
    image = pictures(3, 24, 33)
    M = literal_parts(model, plain_features(model.clip, image[None]))["M^"]
    model, image = model.float(), image.float()
    best = (10 * M).softmax(1).amax((0, 2, 3)).tolist()
    threshold = sorted(best)[2] - 1e-9  # of four classes two pass
    protocol = evaluation.Protocol(2048, 0, denoise=threshold)
    mask = evaluation.predict_mask(model, "rectify", image, (24, 33), protocol)
    kept = {c for c in range(4) if best[c] >= threshold}
    of_100 = (100 * M).softmax(1).amax((0, 2, 3)) >= threshold
    assert len(kept) == 2 and of_100.sum() > 2
    others = [c for c in range(4) if c not in kept]
    M[:, others] = -torch.inf
    want = segment(M.nan_to_num(neginf=-1e9).float(), 4, (24, 33), (24, 33))
    assert torch.equal(mask, want) and set(mask.unique().tolist()) <= kept


# --- Training: resume, files ----------------------------------------------------------------------

@pytest.fixture
def prompts_file(tmp_path):
    """One template in the place of 85: the texts of 20 classes are most of a short run's time."""
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a {}\n")
    return path


@pytest.fixture
def coarse_clip_file(make_clip, merges, tmp_path):
    """Patches of 16 pixels, as in the real weights: an image of 336 x 504 has 21 x 32 of them."""
    clip = make_clip(context=77, patch=16)
    content = {"state_dict": clip.state_dict(), "merges": [list(pair) for pair in merges]}
    torch.save(content, tmp_path / "coarse.pt")
    return tmp_path / "coarse.pt"


@pytest.fixture
def command(make_voc, tiny_clip_file, prompts_file, tmp_path):
    """train.py's arguments for a small VOC of four images, three epochs."""
    root = make_voc({"train": 4, "val": 2})

    def arguments(out, *more):
        options = [
            "--stage", "rectify", "--method", "reclip++", "--data", "voc", "--root", root,
            "--clip", tiny_clip_file, "--prompts", prompts_file, "--device", "cpu",
            "--crop", "32", "--epochs", "3", "--out", tmp_path / out, *more,
        ]
        return [str(option) for option in options]

    return arguments


def at_step(monkeypatch, step, effect):
    """Something happens in the step-th call of the loss."""
    calls, loss = [], train.contrastive_loss

    def counted(*arguments):
        calls.append(1)
        if len(calls) == step:
            effect()
        return loss(*arguments)

    monkeypatch.setattr(train, "contrastive_loss", counted)


def end_at_once():
    raise KeyboardInterrupt


def ask_to_end():
    signal.raise_signal(signal.SIGTERM)


def learnt(folder):
    return torch.load(folder / "rectify.pt", weights_only=True)["learnt"]


def assert_same_files(one, other, steps):
    first, second = learnt(one), learnt(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    logs = [(folder / "rectify_log.csv").read_text() for folder in (one, other)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 1 + steps
    fingerprints = [ReCLIP.load(folder / "rectify.pt").fingerprint() for folder in (one, other)]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("effect, saved", [(end_at_once, 4), (ask_to_end, 7)])
def test_resumed_run_equals_uninterrupted_one(command, tmp_path, monkeypatch, effect, saved):
    """Stopped in the middle of the second epoch, without or with a save at that step."""
    train.main(command("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 7, effect)
        train.main(command("parts"))
    state = torch.load(tmp_path / "parts" / "rectify_state.pt", weights_only=True)
    assert state["step"] == saved
    assert set(state["modules"]) == {"reference", "position_projection", "decoder"}

    # The labels have been kept: no window is read again.
    with monkeypatch.context() as patch:
        patch.setattr(train, "find_in_windows", None)
        train.main(command("parts", "--resume"))
    assert_same_files(tmp_path / "whole", tmp_path / "parts", 12)

    # They have learnt something, all three of them, and other seeds something else.
    model = ReCLIP.load(tmp_path / "whole" / "rectify.pt")
    settings = find_settings("voc", method="reclip++")
    facts = dataclasses.replace(DATA["voc"], prompts=ONE_PROMPT)
    start = train.new_reclip(model.clip, facts, settings, seed=0).learnt()
    after = model.learnt()
    assert start.keys() == after.keys()
    for key in ("reference.vectors", "position_projection.weight", "decoder.0.weight",
                "decoder.1.running_mean", "decoder.1.bias"):
        assert not torch.equal(start[key], after[key]), key
    assert torch.equal(start["W_q"], after["W_q"])
    fresh = train.load_clip(model.clip.source).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in model.clip.state_dict().items())


def test_on_shapes_a_run_is_resumed_too(tmp_path, monkeypatch):
    """Whole images, whose features are computed once; the shapes' own settings, few images."""
    monkeypatch.setitem(datasets.SHAPES_SPLITS, "train", (32, 101))
    arguments = ["--stage", "rectify", "--method", "reclip++", "--device", "cpu", "--epochs", "4"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 2, ask_to_end)
        train.main([*arguments, "--out", str(tmp_path / "parts")])
    train.main([*arguments, "--out", str(tmp_path / "parts"), "--resume"])
    assert_same_files(tmp_path / "whole", tmp_path / "parts", 4)


def test_resume_refuses_the_other_method(command, tmp_path):
    """And a run of the paper's method is not mixed with one of the sequel's."""
    train.main(command("run", "--epochs", "1"))
    other = command("run", "--epochs", "1", "--resume", "--recipe", "2025")
    other[other.index("reclip++")] = "reclip"
    with pytest.raises(ValueError, match="method was 'reclip\\+\\+', now 'reclip'") as caught:
        train.main(other)
    assert "\n" not in str(caught.value)


def test_save_and_load(model, tmp_path):
    """ReCLIP.load makes the right class; nothing of CLIP is in the file."""
    model.float()
    model.save(tmp_path / "rectify.pt")
    content = torch.load(tmp_path / "rectify.pt", weights_only=True)
    assert content["method"] == "reclip++"
    assert set(content["learnt"]) == {
        "W_q", "reference.vectors", "position_projection.weight", "position_projection.bias",
        "decoder.0.weight", "decoder.0.bias", "decoder.1.weight", "decoder.1.bias",
        "decoder.1.running_mean", "decoder.1.running_var", "decoder.1.num_batches_tracked",
    }
    images = pictures(2, 3, 21, 34).float()
    wanted = model(images)
    for load in (ReCLIP.load, ReCLIPPlusPlus.load, open_given):
        again = load(tmp_path / "rectify.pt", model.clip)
        assert type(again) is ReCLIPPlusPlus and not again.training
        found = again(images)
        for part in Logits._fields:
            assert torch.equal(getattr(found, part), getattr(wanted, part)), part
        assert again.fingerprint() == model.fingerprint()
        assert (again.scale, again.tau_1, again.recipe) == (10, 0.01, "2025")
    with torch.no_grad():
        again.position_projection.bias[0] += 1
    assert again.fingerprint() != model.fingerprint()
    assert released_kind(tmp_path / "rectify.pt") is None

    # A method that a later version may have.
    torch.save(content | {"method": "reclip+++"}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="later.pt") as caught:
        ReCLIP.load(tmp_path / "later.pt", model.clip)
    assert "\n" not in str(caught.value)


def open_given(path, clip):
    return open_rectification(path, NAMES, clip)


def test_the_other_recipe_is_refused_for_its_files(model, tmp_path):
    model.float().save(tmp_path / "rectify.pt")
    with pytest.raises(ValueError, match="2025"):
        open_rectification(tmp_path / "rectify.pt", NAMES, model.clip, recipe="cvpr2024")


def test_distillation_refuses_such_a_teacher(command, tmp_path):
    """In one sentence, before a student is made; of the default place and of one that is given."""
    train.main(command("run", "--epochs", "1"))
    arguments = command("run", "--student", "tiny", "--backbone-weights", "none")
    for name in ("--method", "--prompts"):
        at = arguments.index(name)
        del arguments[at:at + 2]
    arguments[arguments.index("rectify")] = "distill"
    given = ["--teacher", str(tmp_path / "run" / "rectify.pt"), "--out", str(tmp_path / "new")]
    for more in ([], given):
        with pytest.raises(ValueError) as caught:
            train.main([*arguments, *more])
        message = str(caught.value)
        assert "\n" not in message and "rectify.pt" in message and "ReCLIP++" in message
    assert not (tmp_path / "run" / "distill.pt").exists()


def test_evaluation_of_a_trained_checkpoint(command, coarse_clip_file, tmp_path):
    """The data set alone is named; method, recipe, sides and denoising are the checkpoint's."""
    train.main(command("run", "--epochs", "1", "--clip", coarse_clip_file))
    evaluation.main([
        "--stage", "rectify", "--data", "voc", "--root", str(tmp_path), "--device", "cpu",
        "--checkpoint", str(tmp_path / "run" / "rectify.pt"), "--out", str(tmp_path / "run"),
    ])
    report = json.loads((tmp_path / "run" / "eval_rectify.json").read_text())
    protocol = report["protocol"]
    assert (protocol["long_side"], protocol["short_side"]) == (2048, 336)
    assert (protocol["denoise"], protocol["recipe"]) == (1.0, "2025")
    model = ReCLIP.load(tmp_path / "run" / "rectify.pt")
    assert protocol["checkpoint_sha256"] == model.fingerprint()
    assert_confusion(report, model, tmp_path)


def assert_confusion(report, model, root, denoise=1.0, some_drop=False):
    """The matrix of the report is that of masks made here, from softmax(10 M^) in fp32."""
    split = datasets.open_split("voc", root, "val")
    confusion = torch.zeros(20, 20, dtype=torch.int64)
    for image, truth, _ in datasets.Evaluation(split, 2048, 336):
        M = model(image[None]).rectified
        best = (10 * M).softmax(1).amax((0, 2, 3))
        kept = best >= denoise
        if some_drop:
            assert 0 < kept.sum() < 20
        if not kept.any():
            kept[:] = True
        M[:, ~kept] = -1e9
        mask = segment(M, model.output_stride, image.shape[1:], truth.shape)
        for t, p in zip(truth.flatten().tolist(), mask.flatten().tolist()):
            if t != 255:
                confusion[t, p] += 1
    assert report["confusion"] == confusion.tolist() and confusion.sum() > 1000


# --- The authors' published files -----------------------------------------------------------------

@pytest.fixture
def published(monkeypatch, tmp_path):
    """A made file with the published keys under a name that says nothing, and its vocabulary."""
    words = Words(SMALL["vocabulary"])
    monkeypatch.setattr(Tokenizer, "from_file", lambda path=None: words)
    state = sequel(20)
    # So that M^ is of the size that training leaves: some classes pass denoising and others not.
    state["module.decoder_conv2.weight"] *= 0.4
    path = tmp_path / "downloaded.bin"
    torch.save(state, path)
    return path, state, words


def literal_published(state, images, W_q, words, names=VOC_CLASSES, **mistakes):
    """The logits of a published file by plain functions, all in float64."""
    state = in_double(state)
    how = {"exact_gelu": False, **OPENAI} | mistakes
    Z = literal_Z(state, images.double(), **how)
    W_r = literal_W_r(state, three_tokens(names, words), words.start)
    p = positions(state, *Z.shape[2:])
    P = F.conv2d(p, state["module.pe_proj.weight"], state["module.pe_proj.bias"])
    M_q = torch.einsum("bdhw,cd->bchw", Z, W_q.double())
    M_b = torch.einsum("bdhw,cd->bchw", P, W_r).expand_as(M_q)
    M = F.conv2d(
        torch.cat([Z, M_q - M_b], 1), state["module.decoder_conv2.weight"],
        state["module.decoder_conv2.bias"], padding=2,
    )
    norm = "module.decoder_norm2."
    M = F.batch_norm(
        M, state[norm + "running_mean"], state[norm + "running_var"], state[norm + "weight"],
        state[norm + "bias"], training=False,
    )
    return {"query": M_q, "reference": M_b, "rectified": M, "features": Z}


def test_the_made_file_has_the_published_keys(published):
    """Beside a frozen CLIP; 512 features and C logits go into the decoder."""
    _, state, _ = published
    own = [
        key for key in state
        if not key.startswith(("module.clip.", "module.vit.", "module.text_encoder."))
    ]
    assert set(own) == {
        "module.proj.weight", "module.logit_scale", "module.pe_proj.weight",
        "module.pe_proj.bias", "module.decoder_conv2.weight", "module.decoder_conv2.bias",
        "module.decoder_norm2.weight", "module.decoder_norm2.bias",
        "module.decoder_norm2.running_mean", "module.decoder_norm2.running_var",
        "module.decoder_norm2.num_batches_tracked",
    }
    assert state["module.decoder_conv2.weight"].shape == (20, 532, 5, 5)
    assert state["module.text_encoder.prompt_token"].shape == (1, 73, 128)


def test_a_published_file_gives_the_logits_of_the_literal_computation(published, tmp_path):
    path, state, words = published
    assert released_kind(path) == "ReCLIP++"
    W_q = unit_rows(20)
    model = ReCLIPPlusPlus.from_released(path, VOC_CLASSES, W_q=W_q)
    assert type(model) is ReCLIPPlusPlus and not model.training
    assert (model.recipe, model.scale, model.tau_1) == ("2025", 10, 0.01)
    assert model.class_names == VOC_CLASSES

    for shape in ((2, 3, 43, 90), (1, 3, 64, 64)):
        images = pictures(*shape)
        want = literal_published(state, images, W_q, words)
        single = model.float()(images.float())
        for part, tensor in want.items():
            torch.testing.assert_close(
                getattr(single, part).double(), tensor, rtol=1e-4, atol=1e-3, msg=part
            )
        double = model.double()(images)
        for part, tensor in want.items():
            torch.testing.assert_close(getattr(double, part), tensor, **EXACT, msg=part)
        assert not double.positional.any()

    # A copy in our own format, and a copy of the copy.
    model.float()
    images = pictures(1, 3, 43, 90).float()
    for name in ("copy.pt", "second.pt"):
        model.save(tmp_path / name)
        again = ReCLIP.load(tmp_path / name)
        assert type(again) is ReCLIPPlusPlus and again.fingerprint() == model.fingerprint()
        assert torch.equal(again(images).rectified, model(images).rectified)
        model = again


def test_each_habit_of_the_published_file_can_be_seen(published):
    """Else a loader that ignores one would pass."""
    _, state, words = published
    images, W_q = pictures(1, 3, 43, 58), unit_rows(20)
    right = literal_published(state, images, W_q, words)["rectified"]
    mistakes = (
        {"class_token": "module.clip.visual.class_embedding"}, {"eps": 1e-5}, {"exact_gelu": True},
        {"mean": (0.485, 0.456, 0.406)}, {"std": (0.229, 0.224, 0.225)},
    )
    for mistake in mistakes:
        wrong = literal_published(state, images, W_q, words, **mistake)["rectified"]
        assert (wrong - right).abs().max() > 1e-6, mistake


def test_published_names_are_cut_as_in_reclips_files(published, tmp_path):
    """Three names that are too long for three tokens, as ADE has them."""
    path, _, words = published
    names = ("chest of drawers", "skyscraper", "conveyer belt", "wall")
    state = sequel(4, seed=2)
    torch.save(state, path)
    W_q = unit_rows(4)
    model = ReCLIPPlusPlus.from_released(path, names, W_q=W_q).double()
    images = pictures(1, 3, 43, 58)
    want = literal_published(state, images, W_q, words, names)
    torch.testing.assert_close(model(images).reference, want["reference"], **EXACT)
    torch.testing.assert_close(model(images).rectified, want["rectified"], **EXACT)


def test_evaluation_of_a_published_file(published, make_voc, tmp_path):
    """Recognized by its keys; 2025's sides, denoising at 1.0; a copy is measured alike."""
    path, state, _ = published
    root = make_voc({"val": 2})
    out = tmp_path / "out"
    # W_q is known from an earlier time: 1700 texts would be most of the test's time.
    given = unit_rows(20)
    kept = {"file": sha256_of(path), "class_names": list(VOC_CLASSES)}
    out.mkdir()
    torch.save({"origin": kept, "W_q": given}, out / "W_q.pt")

    def evaluate(checkpoint, *more):
        evaluation.main([
            "--stage", "rectify", "--data", "voc", "--root", str(root), "--device", "cpu",
            "--checkpoint", str(checkpoint), "--out", str(out), *more,
        ])
        return json.loads((out / "eval_rectify.json").read_text())

    report = evaluate(path)
    protocol = report["protocol"]
    assert (protocol["denoise"], protocol["recipe"]) == (1.0, "2025")
    assert (protocol["long_side"], protocol["short_side"]) == (2048, 336)
    model = ReCLIPPlusPlus.from_released(path, VOC_CLASSES, W_q=given)
    assert protocol["checkpoint_sha256"] == model.fingerprint()
    assert_confusion(report, model, root, some_drop=True)

    model.save(tmp_path / "copy.pt")
    again = evaluate(tmp_path / "copy.pt")
    assert again["confusion"] == report["confusion"] and again["protocol"] == protocol
    assert evaluate(path, "--recipe", "2025", "--denoise", "0.5")["protocol"]["denoise"] == 0.5
    with pytest.raises(ValueError, match="2025") as caught:
        evaluate(path, "--recipe", "cvpr2024")
    assert "\n" not in str(caught.value)


def test_W_q_of_a_published_file_is_made_of_its_85_texts(published):
    """Each text of length 1, and their mean too; two classes."""
    path, _, _ = published
    torch.save(sequel(2), path)
    model = ReCLIPPlusPlus.from_released(path, ("cow", "dining table"))
    clip = model.clip
    for c, name in enumerate(("cow", "dining table")):
        texts = F.normalize(
            clip.encode_text(clip.tokenize([prompt.format(name) for prompt in PROMPTS])), dim=1
        )
        torch.testing.assert_close(model.W_q[c], F.normalize(texts.mean(0), dim=0))
    assert len(PROMPTS) == 85


def one_sentence(call, *arguments, names="", **options):
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and names in message and len(message) < 600, message
    return message


def test_one_kind_of_file_given_as_the_other(published, tmp_path):
    path, _, _ = published
    W_q = unit_rows(20)
    message = one_sentence(
        ReCLIP.from_released, path, VOC_CLASSES, W_q=W_q, names="downloaded.bin"
    )
    assert "ReCLIP++" in message.replace(str(path), "")

    other = tmp_path / "theirs.bin"
    torch.save(rectification(20), other)
    assert released_kind(other) == "ReCLIP"
    message = one_sentence(
        ReCLIPPlusPlus.from_released, other, VOC_CLASSES, W_q=W_q, names="theirs.bin"
    )
    assert "ReCLIP++" in message.replace(str(other), "")

    # Each opens as what it is, whoever asks.
    for file, method in ((path, "reclip++"), (other, "reclip")):
        W_q_path = tmp_path / f"{method}.pt"
        origin = {"file": sha256_of(file), "class_names": list(VOC_CLASSES)}
        torch.save({"origin": origin, "W_q": W_q}, W_q_path)
        assert open_rectification(file, VOC_CLASSES, W_q_path=W_q_path).method == method
    one_sentence(open_rectification, path, VOC_CLASSES, recipe="cvpr2024", names="2025")
    one_sentence(ReCLIP.load, path, names="downloaded.bin")


def test_wrong_number_of_classes(published):
    path, _, _ = published
    message = one_sentence(
        ReCLIPPlusPlus.from_released, path, CONTEXT_CLASSES, W_q=unit_rows(59),
        names="downloaded.bin",
    )
    assert "20" in message and "59" in message
    one_sentence(ReCLIPPlusPlus.from_released, path, VOC_CLASSES[:19])
    one_sentence(ReCLIPPlusPlus.from_released, path, VOC_CLASSES, W_q=unit_rows(59))


@pytest.mark.parametrize("key", [
    "module.vit.cls_token", "module.text_encoder.prompt_token", "module.pe_proj.bias",
    "module.decoder_conv2.weight", "module.decoder_conv2.bias",
    "module.decoder_norm2.running_var", "module.pe_proj.weight",
])
def test_a_key_is_missing_or_of_another_shape(published, key):
    path, state, _ = published
    tensor = state.pop(key)
    for changed in (state, state | {key: tensor[..., :-1].clone()}, state | {key: 5},
                    state | {key: torch.zeros(())}):
        torch.save(changed, path)
        one_sentence(
            ReCLIPPlusPlus.from_released, path, VOC_CLASSES, W_q=unit_rows(20),
            names="downloaded.bin",
        )


def test_distillation_refuses_a_published_file(published, make_voc, tmp_path):
    path, _, _ = published
    out = tmp_path / "out"
    out.mkdir()
    origin = {"file": sha256_of(path), "class_names": list(VOC_CLASSES)}
    torch.save({"origin": origin, "W_q": unit_rows(20)}, out / "W_q.pt")
    one_sentence(
        train.main,
        ["--stage", "distill", "--data", "voc", "--root", str(make_voc({"train": 1})),
         "--teacher", str(path), "--out", str(out), "--device", "cpu", "--student", "tiny",
         "--backbone-weights", "none"],
        names="ReCLIP++",
    )


# --- Images of your own ---------------------------------------------------------------------------

def test_own_images_from_training_to_masks(folder, tiny_clip_file, prompts_file, tmp_path):
    """train.py on a folder, then eval.py --images on it: three files per image."""
    out = tmp_path / "out"
    train.main([
        "--stage", "rectify", "--method", "reclip++", "--data", str(folder), "--classes",
        "cat, dog, grass", "--clip", str(tiny_clip_file), "--prompts", str(prompts_file),
        "--device", "cpu", "--crop", "32", "--epochs", "1", "--out", str(out),
        "--rectify-short-side", "90",
    ])
    checkpoint = out / "rectify.pt"
    assert type(ReCLIP.load(checkpoint)) is ReCLIPPlusPlus
    evaluation.main([
        "--images", str(folder), "--checkpoint", str(checkpoint), "--device", "cpu",
        "--short-side", "90",
    ])
    made = sorted(path.name for path in (out / "masks").iterdir())
    assert made == sorted(
        f"{name}.png.{kind}" for name in "abc" for kind in ("index.png", "overlay.png", "json")
    )
    model = ReCLIP.load(checkpoint)
    for name in "abc":
        report = json.loads((out / "masks" / f"{name}.png.json").read_text())
        assert report["protocol"]["class_names"] == ["cat", "dog", "grass"]
        assert report["protocol"]["denoise"] == 0  # own images: off
        image = datasets.Folder(folder / f"{name}.png").image(0)
        seen = datasets.resize_within(image, 2048, 90).float() / 255
        mask = segment(
            model(seen[None]).rectified, model.output_stride, seen.shape[1:], image.shape[1:]
        )
        index = np.array(Image.open(out / "masks" / f"{name}.png.index.png"))
        assert index.shape == image.shape[1:]
        assert (index == mask.numpy() + 1).mean() > 0.999


# --- Real photographs -----------------------------------------------------------------------------

@pytest.fixture
def real_voc(shared, tmp_path):
    """A VOC of two training images and one of val that links to the real sample files."""
    real = shared("VOCdevkit/VOC2012")
    base = tmp_path / "real" / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (base / folder).symlink_to(real / folder)
    for split, count in (("train", 2), ("val", 1)):
        names = (real / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        text = "\n".join(names[:count]) + "\n"
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return tmp_path / "real"


def train_stop_resume_evaluate_segment(root, clip_file, prompts, tmp_path, monkeypatch):
    """With the real settings: windows of 56, crops of 336, short side 336, denoising at 1.0."""
    options = ["--data", "voc", "--root", str(root), "--device", "cpu"]
    training = [
        "--stage", "rectify", "--method", "reclip++", "--clip", str(clip_file),
        "--prompts", str(prompts), "--epochs", "1", *options,
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 1, ask_to_end)
        train.main([*training, "--out", str(parts)])
    state = torch.load(parts / "rectify_state.pt", weights_only=True)
    assert state["step"] == 1
    train.main([*training, "--out", str(parts), "--resume"])

    # Uninterrupted, with the labels that are known by now.
    whole.mkdir()
    labels = (parts / "image_labels.json").read_text()
    (whole / "image_labels.json").write_text(labels)
    train.main([*training, "--out", str(whole)])
    assert_same_files(whole, parts, 2)
    found = json.loads(labels)["labels"]
    assert len(found) == 2 and all(1 <= len(classes) <= 20 for classes in found.values())

    checkpoint = str(parts / "rectify.pt")
    evaluation.main(["--checkpoint", checkpoint, "--out", str(parts), *options])
    report = json.loads((parts / "eval_rectify.json").read_text())
    assert report["protocol"]["denoise"] == 1.0 and report["protocol"]["pictures"] == 1
    photo = next((root / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir())
    evaluation.main(["--images", str(photo), "--checkpoint", checkpoint, "--device", "cpu"])
    assert len(list((parts / "masks").iterdir())) == 3


def test_real_photographs(real_voc, coarse_clip_file, prompts_file, tmp_path, monkeypatch):
    train_stop_resume_evaluate_segment(
        real_voc, coarse_clip_file, prompts_file, tmp_path, monkeypatch
    )


@pytest.mark.skipif(
    "SLOW" not in os.environ, reason="384 windows through a ViT-B/16: minutes; SLOW=1 runs it"
)
def test_real_photographs_at_the_real_size(
    real_voc, shared, prompts_file, tmp_path, monkeypatch
):
    """Random weights of ViT-B/16's shapes, OpenAI's vocabulary."""
    vocabulary = shared("clip/bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setenv("CLIP_HOME", str(vocabulary.parent))
    clip = CLIP(512, 16, 768, 12, 14, 77, 49408, 512, 12).reset_parameters()
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))  # OpenAI's
    path = tmp_path / "full.pt"
    torch.save(clip.state_dict(), path)
    del clip
    train_stop_resume_evaluate_segment(real_voc, path, prompts_file, tmp_path, monkeypatch)
    vectors = learnt(tmp_path / "parts")["reference.vectors"]
    assert vectors.shape == (73, 512)
    path.unlink()  # 600 MB, and pytest would keep it of the last three runs


# --- ReCLIP's own path ----------------------------------------------------------------------------

def test_learnable_modules_of_reclip_keep_their_order(clip):
    """The state of an optimizer knows parameters by their number: an earlier run goes on only if
    the order is the same."""

    def names(**options):
        model = ReCLIP(clip, NAMES, prompts=ONE_PROMPT, prompt_length=3, **options)
        return list(model.learnable_modules())

    assert names() == ["reference", "positional"]
    assert names(query_learnable=True) == ["query", "reference", "positional"]
    assert names(positional_channels=0) == ["reference"]
    model = small_model(clip)
    assert list(model.learnable_modules()) == ["reference", "position_projection", "decoder"]


def test_a_file_that_names_no_method_is_reclips(clip, tmp_path):
    """As all files before the sequel."""
    model = ReCLIP(clip, NAMES, prompts=ONE_PROMPT, prompt_length=3).eval()
    assert model.method == "reclip"
    model.save(tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    assert content.pop("method") == "reclip"
    torch.save(content, tmp_path / "old.pt")
    images = pictures(1, 3, 21, 34).float()
    for name in ("new.pt", "old.pt"):
        again = ReCLIP.load(tmp_path / name, clip)
        assert type(again) is ReCLIP and again.fingerprint() == model.fingerprint()
        assert torch.equal(again(images).rectified, model(images).rectified)
    assert set(model.learnt()) == {"W_q", "reference.vectors"} | {
        key for key in model.state_dict() if key.startswith("positional.")
    }


def test_nothing_of_the_sequel_is_in_a_reclip(clip):
    """Its settings, its state and its logits: the paper's formula."""
    model = ReCLIP(clip, NAMES, prompts=ONE_PROMPT, prompt_length=3).double().eval()
    assert not [key for key in model.state_dict() if "decoder" in key or "projection" in key
                and "text_projection" not in key]
    images = pictures(1, 3, 21, 34)
    found = model(images)
    Z = plain_features(clip, images)
    W_r = one_text_at_a_time(clip, model.reference.vectors.detach(), NAMES)
    M_r = torch.einsum("bdhw,cd->bchw", Z, W_r)
    M_q = torch.einsum("bdhw,cd->bchw", Z, model.W_q)
    torch.testing.assert_close(found.reference, M_r, **EXACT)
    torch.testing.assert_close(found.rectified, M_q - M_r - found.positional, **EXACT)
    assert found.positional.any()


def test_adding_the_bias(clip):
    """Table 5, in the sequel too: the decoder sees M_q + M_b."""
    model = shaken(small_model(clip, subtract=False).double()).eval()
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = pictures(2, 3, 21, 34)
    model(images)
    want = literal_parts(model, plain_features(model.clip, images))
    torch.testing.assert_close(seen[0][:, 12:], want["M_q"] + want["M_b"], **EXACT)
