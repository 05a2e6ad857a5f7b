"""train.py: both loops against loops written out plainly; what learns, hyper-parameters, files.

Trainings here take few steps on small images, with the CLIP of conftest. Real processes, killed
ones and other accidents: test_long_runs.py.
"""

import builtins
import csv
import dataclasses
import io
import json
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import eval as evaluation
import reference
import train
from conftest import close, sentence
from datasets import DATA, Augment, Thumbnails, TrainingStream, open_split, own_images
from deeplab import DeepLabV2
from reclip import ReCLIP

GELU = {"cvpr2024": reference.exact_gelu, "2025": reference.quick_gelu}
COLORS = {"cvpr2024": reference.IMAGENET_COLORS, "2025": reference.CLIP_COLORS}


# --- A split, a data set and settings, all small --------------------------------------------------

class SmallImages:
    """A split of noise: images of 10 x 14 and 14 x 9 pixels in turn, named a, b, c, ..."""

    def __init__(self, names="ab"):
        self.names = list(names)
        generator = torch.Generator().manual_seed(4)
        self.images = []
        for i in range(len(names)):
            size = (3, 10, 14) if i % 2 == 0 else (3, 14, 9)
            image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
            self.images.append(image)

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return self.images[i]


OWN = dataclasses.replace(
    own_images("own", ("cat", "dog", "grass")),
    prompts=("a photo of a {}", "the {}"),
    numbers=dict(
        rectify_epochs=3, rectify_poly_epochs=5, crop=24,
        rectify_long_side=28, rectify_short_side=20,
        distill_epochs=3, distill_batch=2, distill_crop=24,
        distill_long_side=28, distill_short_side=20,
        prompt_length=4, positional_gain=0.2, tau_1=0.3, tau=0.2,
        threshold=23.0, top_k=2, denoise=0.0,
        student="tiny", backbone_weights="none",
    ),
)


@pytest.fixture
def start(clip, tmp_path):
    """start("rectify", out, lr=0.5, ...) trains on four images for 3 epochs. -> the model

    Rectification takes 12 steps, distillation 6; its teacher has learnt nothing.
    """

    def start(stage, out, names="abcd", clip=clip, seed=0, resume=False, overwrite=False, **given):
        options, settings = train.hyper_parameters(OWN, **given)
        split = SmallImages(names)
        labels_path = tmp_path / out / "image_labels.json"
        run = train.Run(stage, tmp_path / out, seed, resume=resume, overwrite=overwrite)
        if stage == "rectify":
            return train.rectify(OWN, options, settings, split, clip, labels_path, run)
        teacher = train.new_reclip(clip, OWN, options, settings, seed=0).eval()
        return train.distill(OWN, settings, split, teacher, labels_path, run)

    return start


def file_of(folder, stage="rectify"):
    return torch.load(folder / f"{stage}.pt", weights_only=True)


def log_of(folder, stage="rectify"):
    with (folder / f"{stage}_log.csv").open() as file:
        return list(csv.DictReader(file))


def equal(a, b):
    """Nested dicts and lists are equal, their tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def effect_at(patch, name, call, effect):
    """From now on effect(result) stands for the result of the call-th call of train.<name>."""
    function = getattr(train, name)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        result = function(*arguments)
        return effect(result) if len(calls) == call else result

    patch.setattr(train, name, counted)


def interrupt(*arguments):
    raise KeyboardInterrupt


# --- The loops, literally -------------------------------------------------------------------------

class DoubleRun(train.Run):
    """Images in float64, so that rounding moves no patch from one class to another."""

    def batches(self):
        for step, images, valid, names in super().batches():
            yield step, images.double(), valid, names


def settings_without_chance(**changes):
    """Images keep their size and stand in the upper left of a crop of 24 x 24 pixels.

    Of the two stages each test needs one: the sides of the other would show if they were taken.
    """
    fixed = dict(
        rectify_epochs=2, rectify_poly_epochs=3, lr=0.5, momentum=0.8, weight_decay=0.01,
        poly_power=0.7, resize_from=1.0, resize_to=1.0, flip=False, photometric=False,
        crop=40, rectify_long_side=99, rectify_short_side=98,
        distill_crop=40, distill_long_side=97, distill_short_side=96,
    )
    return train.hyper_parameters(OWN, **(fixed | changes))[1]


PROTOCOL = dict(long_side=14, short_side=10, antialias=True, denoise=0.0)


def unsettled_model(clip, **options):
    """A ReCLIP in float64 with C = 4, whose masks depend on noise and on every part."""
    W_q = nn.functional.normalize(torch.randn(4, 12), dim=1)
    fixed = dict(prompt_length=6, tau_1=0.3, tau=0.2, positional_gain=0.2, protocol=PROTOCOL)
    names = ["cat", "dog", "grass", "tree"]
    return ReCLIP(clip, names, W_q=W_q, **(fixed | options)).double()


LABELS = {
    "a": torch.tensor([True, False, True, True]),
    "b": torch.tensor([False, True, False, False]),
}


def order_of(seed, epoch, count):
    """Every epoch has its own order of the images."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def padded(image):
    """uint8 (3, H, W) -> (3, 24, 24) in [0, 1], and where the image is (24, 24)."""
    H, W = image.shape[1:]
    canvas = torch.zeros(3, 24, 24, dtype=torch.float64)
    canvas[:, :H, :W] = image.double() / 255
    valid = torch.zeros(24, 24, dtype=torch.bool)
    valid[:H, :W] = True
    return canvas, valid


def of_length_1(Z):
    """(D, h, w)"""
    return Z / Z.square().sum(0).sqrt()


def masks_of(M, tau_1, noise):
    """Eq. (4), (B, C, h, w): hard masks whose gradient is that of the softmax."""
    soft = (M / tau_1 + noise).softmax(1)
    return reference.hard_masks(M, tau_1, noise) + soft - soft.detach()


def sgd_step(parameters, loss, velocity, lr, momentum=0.8, weight_decay=0.01):
    """In place: v <- momentum v + gradient + weight_decay p, then p <- p - lr v."""
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    with torch.no_grad():
        for (name, p), gradient in zip(parameters.items(), gradients):
            assert gradient.abs().max() > 1e-9, name
            velocity[name] = momentum * velocity.get(name, 0) + gradient + weight_decay * p
            p -= lr * velocity[name]


@pytest.mark.parametrize("recipe", ["cvpr2024", "2025"])
def test_rectification_is_this_loop(clip, tmp_path, recipe):
    """Eq. (1)-(5), SGD, the poly rule. All 6 x 6 patches count, padding too (as released)."""
    split = SmallImages()
    settings = settings_without_chance(crop=24, rectify_long_side=14, rectify_short_side=10)
    model = unsettled_model(clip, recipe=recipe).eval()  # the loop sets train mode
    before = deepcopy(model.state_dict())
    train.train_rectification(
        model, split, LABELS, settings, DoubleRun("rectify", tmp_path, seed=3)
    )

    learning = {}
    for name, parameter in before.items():
        if name == "reference.vectors" or name.startswith("positional.net."):
            if parameter.is_floating_point() and "running" not in name:
                learning[name] = parameter.clone().requires_grad_()
    state = {name[5:]: tensor for name, tensor in before.items() if name.startswith("clip.")}
    W_q = before["W_q"]
    p = reference.positional_table(state, 6, 6)

    velocity = {}
    expected_rows = []
    for step in range(4):
        epoch = step // 2
        i = order_of(3, epoch, 2)[step % 2]
        pixels, valid = padded(split.images[i])
        pixels = reference.normalized(pixels, COLORS[recipe], valid)
        Z = of_length_1(reference.patch_vectors(state, pixels, GELU[recipe]))   # (D, 6, 6)

        W_r = reference.reference_heads(
            state, learning["reference.vectors"], model.reference.endings
        )
        net = {name[11:]: tensor for name, tensor in (before | learning).items()}
        M_p = reference.positional_map(net, p, training=True, gain=0.2)
        M = reference.rectified_logits(Z, W_q, W_r, M_p)                        # (C, 6, 6)

        noise = reference.gumbel_noise(4 * 7_368_787 + step, (1, 4, 6, 6))
        masks = masks_of(M[None], 0.3, noise)
        found = LABELS[split.names[i]][None]
        loss = reference.contrastive_loss(Z[None], masks, W_q, found, 0.2)

        lr = 0.5 * (1 - epoch / 3) ** 0.7
        sgd_step(learning, loss, velocity, lr)
        expected_rows.append((step, loss.item(), lr))

    after = model.state_dict()
    for name, parameter in learning.items():
        close(after[name], parameter.detach(), 1e-6)
    rows = [(int(row["step"]), float(row["loss"]), float(row["lr"])) for row in log_of(tmp_path)]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)

    # Besides, nothing has moved but what the batch norms count.
    for name in before.keys() - learning.keys():
        counted = name.startswith("positional.") and "running" in name or "num_batches" in name
        assert torch.equal(after[name], before[name]) != counted, name


def test_distillation_is_this_loop(clip, tmp_path):
    """Eq. (6)-(8) on whole arrays. Each network sees its own normalization, padding is 0 for both.

    Padding has no mask of the teacher's and no features to learn; in Eq. (4)-(5) all cells count.
    """
    split = SmallImages()
    settings = settings_without_chance(
        student="tiny", backbone_weights="none", distill_epochs=3, distill_batch=2, distill_lr=0.3,
        distill_lr_floor=0.2, alpha=0.4, beta=0.3, rectify_poly_epochs=5,
        distill_crop=24, distill_long_side=14, distill_short_side=10,
    )
    teacher = unsettled_model(clip).eval()
    student = train.new_student(teacher, OWN, settings, seed=2).double()
    copy = deepcopy(student)
    before = deepcopy(teacher.state_dict())
    teacher.train()  # the loop must put it into eval mode: its batch norms would learn
    train.train_distillation(
        teacher, student, split, LABELS, settings, DoubleRun("distill", tmp_path, seed=3)
    )

    state = {name[5:]: tensor for name, tensor in before.items() if name.startswith("clip.")}
    net = {name[11:]: tensor for name, tensor in before.items() if name.startswith("positional.")}
    W_q = before["W_q"]
    W_r = reference.reference_heads(
        state, before["reference.vectors"], teacher.reference.endings
    ).detach()
    M_p = reference.positional_map(net, reference.positional_table(state, 6, 6), gain=0.2)
    learning = dict(copy.named_parameters())

    velocity = {}
    expected_rows = []
    for step in range(3):
        order = order_of(3, step, 2)
        found = torch.stack([LABELS[split.names[i]] for i in order])
        seen = [padded(split.images[i]) for i in order]
        student_pixels = [
            reference.normalized(image, reference.IMAGENET_COLORS, valid) for image, valid in seen
        ]
        x = copy.aspp(copy.backbone(torch.stack(student_pixels)))               # (2, D, 6, 6)
        Z_student = torch.stack([of_length_1(vectors) for vectors in x])
        M_student = torch.stack([reference.student_logits(Z, W_q, W_r) for Z in Z_student])

        mask_loss = feature_loss = pixels = 0
        for b, (image, valid) in enumerate(seen):
            image = reference.normalized(image, COLORS["cvpr2024"], valid)
            Z = of_length_1(reference.patch_vectors(state, image, GELU["cvpr2024"]))
            M = reference.rectified_logits(Z, W_q, W_r, M_p)
            teacher_mask = reference.enlarge(M, 4, 24, 24).argmax(0)            # (24, 24)

            log_p = (reference.enlarge(M_student[b], 4, 24, 24) / 0.2).log_softmax(0)
            log_p = log_p.gather(0, teacher_mask[None])[0]                      # (24, 24)
            mask_loss = mask_loss - log_p[valid].sum()
            difference = reference.enlarge(Z - Z_student[b], 4, 24, 24).abs().sum(0)
            feature_loss = feature_loss + difference[valid].sum()
            pixels = pixels + valid.sum()

        noise = reference.gumbel_noise(4 * 7_368_787 + step, (2, 4, 6, 6))
        masks = masks_of(M_student, 0.3, noise)
        text_loss = reference.contrastive_loss(Z_student, masks, W_q, found, 0.2)
        mask_loss, feature_loss = mask_loss / pixels, feature_loss / pixels
        loss = mask_loss + 0.4 * feature_loss + 0.3 * text_loss

        lr = max(0.3 * (1 - step / 3) ** 0.7, 0.2)
        sgd_step(learning, loss, velocity, lr)
        parts = (loss, mask_loss, feature_loss, text_loss)
        expected_rows.append([step, *(part.item() for part in parts), lr])

    assert expected_rows[-1][-1] == 0.2 < expected_rows[1][-1]  # the floor has been reached
    for row, expected in zip(log_of(tmp_path, "distill"), expected_rows, strict=True):
        assert [float(number) for number in row.values()] == pytest.approx(expected, rel=1e-5)
    for name, parameter in student.named_parameters():
        close(parameter.detach(), learning[name].detach(), 1e-6)
    assert equal(teacher.state_dict(), before)
    close(student.W_q, W_q)
    close(student.W_r, W_r, 1e-6)


@pytest.mark.parametrize("given, expected", [
    ({}, 0.2), ({"head": "original"}, 1.0), ({"mask_tau": 0.7}, 0.7),
])
def test_temperature_of_the_mask_guided_loss(start, monkeypatch, given, expected):
    """That of Eq. (5) unless it is given; 1 for a classifier, which learns its own scale."""
    seen = []
    loss = train.mask_guided_loss

    def recorded(logits, masks, tau, to_pixels):
        seen.append(tau)
        return loss(logits, masks, tau, to_pixels)

    monkeypatch.setattr(train, "mask_guided_loss", recorded)
    start("distill", "run", distill_epochs=1, **given)
    assert seen == [expected] * 2


def test_features_of_unchanging_images_are_computed_once(clip):
    split = SmallImages("aca")
    split.names = list("abc")
    split.images[1] = split.images[0].flip(2)  # one size, for a batch of whole images
    augment = Augment(0, 0, crop=0, flip=False, photometric=False, antialias=True)
    stream = TrainingStream(split, augment, seed=5)
    model = unsettled_model(clip).float()
    expected = {}
    for s in range(3):
        image, _, name = stream[s]
        expected[name] = model.features(image[None])[0]

    features = train.frozen_features(model, stream, "cpu")
    model.features = None  # it is not called any more

    close(features(None, None, ["c", "a"]), torch.stack([expected["c"], expected["a"]]), 1e-5)


@pytest.mark.parametrize("gain", [0.01, 9.0])
def test_rectification_ends_with_the_spread_of_each_logit(start, capsys, gain):
    """Where the bias has more of it than M_q, the masks are the bias's own: that is said."""
    sides = dict(rectify_long_side=14, rectify_short_side=10)
    model = start("rectify", "run", rectify_epochs=1, positional_gain=gain, **sides)
    printed = capsys.readouterr().out

    output = model(SmallImages().image(0)[None].float() / 255)
    shown = []
    parts = (output.query, output.reference, output.positional, output.query - output.rectified)
    for name, logits in zip(("M_q", "M_r", "M_p", "bias"), parts):
        variance = (logits - logits.mean(1, keepdim=True)).square().mean(1)
        shown.append(f"{name} {variance.sqrt().mean().item():.3f}")
    assert f"standard deviation over classes: {', '.join(shown)}\n" in printed
    assert ("the bias outweighs what CLIP sees" in printed) == (gain == 9)


class Weighted(ReCLIP):
    """M = M_q - weight * M_b: an idea of one's own, with a number that learns."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.weight = nn.Parameter(torch.ones(()))

    def rectify(self, Z):
        output = super().rectify(Z)
        M_b = output.query - output.rectified
        return output._replace(rectified=output.query - self.weight * M_b)


def test_a_parameter_hung_on_the_model_learns_and_is_kept(clip, tmp_path):
    names = ["cat", "dog", "grass", "tree"]
    model = Weighted(clip, names, W_q=torch.eye(4, 12), tau_1=0.3, protocol=PROTOCOL)
    settings = settings_without_chance()
    train.train_rectification(
        model, SmallImages(), LABELS, settings, train.Run("rectify", tmp_path)
    )

    assert abs(model.weight.item() - 1) > 1e-4
    assert torch.equal(file_of(tmp_path)["learnt"]["weight"], model.weight)
    assert torch.equal(Weighted.load(tmp_path / "rectify.pt", clip).weight, model.weight)

    # The student would leave it out without a word.
    with pytest.raises(ValueError) as caught:
        train.new_student(model, OWN, settings, seed=0)
    assert "the teacher has learnt weight, which DeepLabV2.rectify does not" in sentence(caught)


# --- The models that the loops start from ---------------------------------------------------------

def test_options_and_protocols_reach_both_models(clip):
    context = DATA["context"]
    given = dict(
        prompt_length=3, prompt_per_class=True, reference_norm="class", query_learnable=True,
        positional_channels=1, positional_last_relu=False, positional_gain=0.5, subtract=True,
        tau_1=0.5, tau=0.25, cut_names=True, recipe="2025",
    )
    options, settings = train.hyper_parameters(
        context, **given, student="tiny", backbone_weights="none"
    )
    dataset = dataclasses.replace(OWN, antialias=context.antialias)
    model = train.new_reclip(clip, dataset, options, settings, seed=0)
    student = train.new_student(model.eval(), dataset, settings, seed=0)

    assert dataclasses.asdict(model.options) == given
    assert model.prompts == OWN.prompts
    assert model.class_names == student.class_names == OWN.classes
    assert model.protocol == dict(long_side=2048, short_side=448, antialias=False, denoise=0.6)
    assert student.protocol == dict(long_side=520, short_side=520, antialias=False, denoise=0.0)


def test_models_are_functions_of_their_seed(clip):
    options, settings = train.hyper_parameters(OWN)

    def made(seed):
        torch.rand(5)  # what was drawn before must not matter
        teacher = train.new_reclip(clip, OWN, options, settings, seed)
        torch.rand(5)
        student = train.new_student(teacher.eval(), OWN, settings, seed)
        return [teacher.state_dict(), student.state_dict()]

    first, other = made(3), made(4)
    assert equal(first, made(3))
    assert not equal(first[0], other[0]) and not equal(first[1], other[1])


def test_a_student_inherits_the_heads_and_if_wanted_the_positions(clip):
    options, settings = train.hyper_parameters(OWN, head="query_reference_positional")
    teacher = train.new_reclip(clip, OWN, options, settings, seed=0).eval()
    student = train.new_student(teacher, OWN, settings, seed=0)

    W_q, W_r = teacher.heads()
    M_p = teacher.positional(clip.visual.positional_grid(3, 3))  # the grid that CLIP was trained on
    close(student.W_q, W_q)
    close(student.W_r, W_r)
    close(student.M_p, M_p.detach(), 1e-6)


def test_a_teacher_that_adds_its_bias_has_none_to_subtract(clip):
    options, settings = train.hyper_parameters(OWN, subtract=False)
    teacher = train.new_reclip(clip, OWN, options, settings, seed=0).eval()
    with pytest.raises(ValueError, match="subtracts the Reference, which this teacher does not"):
        train.new_student(teacher, OWN, settings, seed=0)


# --- Hyper-parameters -----------------------------------------------------------------------------

# The released numbers. Rectification: sides, crop, epochs, horizon of the poly rule.
RECTIFICATION = {
    #                          long  short  crop  epochs  horizon
    ("voc", "cvpr2024"):      (2048,   512,  512,    200,     200),
    ("voc", "2025"):          (2048,   336,  336,     51,     200),
    ("context", "cvpr2024"):   (520,   520,  480,    150,     150),
    ("context", "2025"):      (2048,   448,  480,     51,     400),
    ("ade20k", "cvpr2024"):   (2048,   512,  512,    150,     150),
    ("ade20k", "2025"):       (2048,   512,  512,    101,     600),
}

# The same in both recipes: threshold t, K labels, denoising; then distillation.
BOTH_RECIPES = {
    #            t   K  denoise  long  short  crop  epochs
    "voc":      (23, 2,     0.5, 2048,   512,  512,    100),
    "context":  (20, 6,     0.6,  520,   520,  480,    150),
    "ade20k":   (21, 5,     0.5, 2048,   512,  512,    150),
}

# The same everywhere.
EVERYWHERE = dict(
    rectify_batch=1, lr=0.01, momentum=0.9, weight_decay=5e-4, poly_power=0.9,
    distill_batch=16, distill_lr=0.01, distill_lr_floor=1e-4, mask_tau=None, alpha=0.5, beta=0.5,
    resize_from=0.5, resize_to=2.0, flip=True, photometric=True,
    head="query_reference", student="resnet101", backbone_weights="imagenet",
    prompt_length=73, prompt_per_class=False, reference_norm="frobenius", query_learnable=False,
    positional_channels=None, positional_last_relu=True, positional_gain=1.0, subtract=True,
    tau_1=0.001, tau=None, cut_names=False,
)


@pytest.mark.parametrize("data, recipe", RECTIFICATION)
def test_the_numbers_of_both_recipes(data, recipe):
    long_side, short_side, crop, epochs, horizon = RECTIFICATION[data, recipe]
    t, K, denoise, *distillation = BOTH_RECIPES[data]
    expected = EVERYWHERE | dict(
        recipe=recipe, rectify_long_side=long_side, rectify_short_side=short_side, crop=crop,
        rectify_epochs=epochs, rectify_poly_epochs=horizon,
        threshold=t, top_k=K, denoise=denoise,
        distill_long_side=distillation[0], distill_short_side=distillation[1],
        distill_crop=distillation[2], distill_epochs=distillation[3],
    )

    options, settings = train.hyper_parameters(DATA[data], recipe)
    assert dataclasses.asdict(options) | dataclasses.asdict(settings) == expected
    if recipe == "cvpr2024":  # the paper's, so it is the default
        assert train.hyper_parameters(DATA[data]) == (options, settings)


def hyper_parameters_of(*arguments):
    """Those that the command line leads to, as one dict."""
    _, _, options, settings = train.parse_arguments(list(arguments))
    return dataclasses.asdict(options) | dataclasses.asdict(settings)


def test_the_command_line_comes_before_the_data_set_before_the_default(monkeypatch):
    numbers = DATA["voc"].numbers | {"lr": 7.0, "reference_norm": "class"}
    monkeypatch.setitem(DATA, "voc", dataclasses.replace(DATA["voc"], numbers=numbers))

    found = hyper_parameters_of("--stage", "rectify", "--data", "voc", "--lr", "9", "--tau", "4")
    assert (found["lr"], found["tau"]) == (9, 4)                    # the command line
    assert (found["reference_norm"], found["crop"]) == ("class", 512)  # the entry, its first recipe
    assert (found["alpha"], found["tau_1"]) == (0.5, 0.001)         # the default

    found = hyper_parameters_of("--data", "voc", "--recipe", "2025", "--lr", "9", "--epochs", "4")
    assert (found["recipe"], found["crop"], found["rectify_epochs"]) == ("2025", 336, 4)
    found = hyper_parameters_of("--data", "voc", "--stage", "distill", "--epochs", "4")
    assert (found["distill_epochs"], found["rectify_epochs"]) == (4, 200)


@pytest.mark.parametrize("words, name, value", [
    (["--top-k", "3"], "top_k", 3),
    (["--positional-channels", "1"], "positional_channels", 1),   # an option of the model
    (["--no-positional-last-relu"], "positional_last_relu", False),
    (["--query-learnable"], "query_learnable", True),
    (["--mask-tau", "0.5"], "mask_tau", 0.5),
    (["--reference-norm", "class"], "reference_norm", "class"),
])
def test_each_hyper_parameter_is_an_option_and_changes_nothing_else(words, name, value):
    ordinary = hyper_parameters_of("--data", "voc")
    assert hyper_parameters_of("--data", "voc", *words) == ordinary | {name: value}


@pytest.mark.parametrize("words, quick_gelu", [
    ([], True), (["--clip", "its.pt", "--exact-gelu"], False),
])
def test_the_command_line_says_which_gelu_a_clip_has(monkeypatch, tmp_path, words, quick_gelu):
    asked = []
    monkeypatch.setattr(train, "load_clip", lambda *arguments: asked.append(arguments) or 1 / 0)
    monkeypatch.setattr(evaluation, "load_clip", train.load_clip)

    for main in (train.main, evaluation.main):
        with pytest.raises(ZeroDivisionError):
            main(["--stage", "clip" if main is evaluation.main else "rectify", *words])

    assert [arguments[2] for arguments in asked] == [quick_gelu, quick_gelu]


def test_help_tells_source_and_values_of_each_data_set(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate of SGD (Sec. 4.1) [0.01, shapes 2025: 2.0, your own images 2025" in text
    assert "ade20k cvpr2024: 150, ade20k 2025: 101, shapes 2025: 20, your own images" in text


def test_settings_reach_the_images():
    given = dict(resize_from=0.7, resize_to=1.1, flip=False, photometric=True)
    _, settings = train.hyper_parameters(OWN, **given)
    for antialias in (False, True):
        model = SimpleNamespace(
            protocol=dict(long_side=99, short_side=88, antialias=antialias, denoise=0.0))
        stream = train.training_stream(SmallImages(), model, 77, settings, seed=5)
        assert stream.seed == 5
        assert vars(stream.transform) == dict(
            long_side=99, short_side=88, crop=77, ratio=(0.7, 1.1), flip=False, photometric=True,
            antialias=antialias, changes=True,
        )


# --- Labels: none is read, CLIP's are kept --------------------------------------------------------

def test_no_label_is_opened_in_training(make_voc, tiny_clip_file, tmp_path, monkeypatch):
    """Both stages, on files: the label folder is gone, and nobody asks for one of its files."""
    root = make_voc({"train": 3})
    shutil.rmtree(root / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n")
    asked = []
    real_open = builtins.open

    def recorded(file, *arguments, **more):
        asked.append(str(file))
        return real_open(file, *arguments, **more)

    monkeypatch.setattr(builtins, "open", recorded)  # Pillow's
    monkeypatch.setattr(io, "open", recorded)        # pathlib's
    arguments = [
        "--data", "voc", "--root", str(root), "--clip", str(tiny_clip_file), "--device", "cpu",
        "--out", str(tmp_path / "run"), "--epochs", "1", "--crop", "32", "--distill-crop", "32",
        "--rectify-short-side", "64", "--student", "tiny",
        "--backbone-weights", "none", "--distill-batch", "2",
    ]
    train.main(["--stage", "rectify", *arguments, "--prompts", str(tmp_path / "prompts.txt")])
    train.main(["--stage", "distill", *arguments])

    assert any("JPEGImages" in name for name in asked)  # those of images are seen here
    assert not any("SegmentationClass" in name for name in asked)
    DeepLabV2.load(tmp_path / "run" / "distill.pt")


@pytest.fixture
def label(clip, tmp_path):
    """label(...) -> the pseudo-labels of three images, as indices, kept in labels.json."""
    options, settings = train.hyper_parameters(OWN)

    def start(names="abc", clip=clip, prompts=OWN.prompts, classes=OWN.classes, **changes):
        dataset = dataclasses.replace(OWN, prompts=prompts, classes=classes)
        model = train.new_reclip(clip, dataset, options, settings, seed=0)
        changed = dataclasses.replace(settings, **changes)
        found = train.label_training_set(
            model, SmallImages(names), changed, tmp_path / "labels.json"
        )
        return {name: row.nonzero()[:, 0].tolist() for name, row in found.items()}

    return start


def test_pseudo_labels_are_the_classes_above_the_threshold_else_the_best(clip, label, capsys):
    split = SmallImages("abcdef")
    model = ReCLIP(clip, OWN.classes, prompts=OWN.prompts, prompt_length=4)
    similarity = {}
    for thumbnail, name in Thumbnails(split, 12):
        similarity[name] = model.image_similarity(thumbnail[None])[0].tolist()
    best = sorted(max(row) for row in similarity.values())
    threshold = (best[2] + best[3]) / 2  # three of six images reach it

    expected = {}
    for name, row in similarity.items():
        expected[name] = [c for c in range(3) if row[c] >= threshold]
        if not expected[name]:
            expected[name] = [row.index(max(row))]
    capsys.readouterr()
    assert label("abcdef", threshold=threshold, top_k=1) == expected

    # The histogram says how often each class was found.
    lines = capsys.readouterr().out.splitlines()[1:]
    for c, line in enumerate(lines):
        count = sum(c in found for found in expected.values())
        assert line.split()[:2] == [OWN.classes[c], str(count)]
        assert ("try a synonym" in line) == (count == 0)


def test_pseudo_labels_are_kept_by_name(label, tmp_path):
    label()
    content = json.loads((tmp_path / "labels.json").read_text())
    content["labels"] = {"c": [0], "b": [1], "a": [0, 2]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert label() == {"a": [0, 2], "b": [1], "c": [0]}


@pytest.mark.parametrize("change", [
    dict(threshold=-200.0), dict(top_k=1), dict(prompts=("the {}",)), dict(names="abd"),
    dict(classes=("cat", "dog", "tree")), dict(clip="another"),
])
def test_pseudo_labels_of_something_else_are_made_anew(label, make_clip, tmp_path, change):
    if "clip" in change:
        change = {"clip": make_clip(seed=1)}
    expected = label(**change)
    label()
    content = json.loads((tmp_path / "labels.json").read_text())
    content["labels"] = {name: [] for name in content["labels"]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert label(**change) == expected


def test_damaged_pseudo_labels_are_made_anew(label, tmp_path):
    expected = label()
    path = tmp_path / "labels.json"
    path.write_text(path.read_text()[:100])
    assert label() == expected


# --- Stop and go on -------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, place, call, saved, steps", [
    ("rectify", "contrastive_loss", 7, 4, 12),   # in the middle of the second of three epochs
    ("distill", "distillation_loss", 4, 2, 6),
])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    start, tmp_path, monkeypatch, stage, place, call, saved, steps
):
    start(stage, "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        effect_at(patch, place, call, interrupt)
        start(stage, "parts")
    assert file_of(tmp_path / "parts", stage)["training"]["step"] == saved

    start(stage, "parts", resume=True)

    whole, parts = file_of(tmp_path / "whole", stage), file_of(tmp_path / "parts", stage)
    assert equal(whole, parts)
    assert log_of(tmp_path / "whole", stage) == log_of(tmp_path / "parts", stage)
    assert [int(row["step"]) for row in log_of(tmp_path / "parts", stage)] == list(range(steps))
    assert parts["training"]["step"] == steps and parts["training"]["optimizer"] is None

    # And none of it is chance: another seed ends elsewhere.
    start(stage, "other", seed=1)
    assert not equal(whole["learnt"], file_of(tmp_path / "other", stage)["learnt"])


def test_rows_that_the_checkpoint_does_not_know_are_cut_off_the_log(start, tmp_path, monkeypatch):
    """Stopped after the log of the second epoch was written, and before its checkpoint was."""
    start("rectify", "whole")
    save = ReCLIP.save

    def save_once(model, path, **more):
        if path.exists():
            raise KeyboardInterrupt
        save(model, path, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReCLIP, "save", save_once)
        start("rectify", "parts")
    assert len(log_of(tmp_path / "parts")) == 8
    assert file_of(tmp_path / "parts")["training"]["step"] == 4

    start("rectify", "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_log_keeps_its_columns(start, tmp_path, monkeypatch):
    """A number more, in the code, and --resume: rows would stand under a header of other names."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        effect_at(patch, "contrastive_loss", 7, interrupt)
        start("rectify", "run")

    log = train.Run.log
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="has other columns than"):
        patch.setattr(train.Run, "log", lambda *step, **more: log(*step, **more, share=0.5))
        start("rectify", "run", resume=True)

    (tmp_path / "run/rectify_log.csv").unlink()  # a lost one begins anew, with its header
    start("rectify", "run", resume=True)
    assert [int(row["step"]) for row in log_of(tmp_path / "run")] == list(range(4, 12))


def test_resume_with_nothing_there_begins(start, tmp_path):
    start("rectify", "whole")
    start("rectify", "run", resume=True)
    assert equal(file_of(tmp_path / "whole"), file_of(tmp_path / "run"))


def test_resume_of_a_finished_training_takes_no_step(start, tmp_path, monkeypatch):
    trained = start("rectify", "run")
    before = (tmp_path / "run" / "rectify.pt").read_bytes()
    monkeypatch.setattr(train, "contrastive_loss", interrupt)

    again = start("rectify", "run", resume=True)

    assert equal(again.learnt(), trained.learnt())
    assert (tmp_path / "run" / "rectify.pt").read_bytes() == before
    assert len(log_of(tmp_path / "run")) == 12


def test_resume_of_another_training_names_every_difference(start, make_clip, tmp_path):
    start("rectify", "run")
    before = (tmp_path / "run" / "rectify.pt").read_bytes()
    with pytest.raises(ValueError) as caught:
        start(
            "rectify", "run", "abce", make_clip(seed=1), seed=3, resume=True,
            lr=0.5, flip=False, tau=0.3,
        )
    message = sentence(caught)
    assert message.startswith(f"cannot resume {tmp_path / 'run' / 'rectify.pt'}: ")
    for words in ("lr was 0.01, now 0.5", "flip was True, now False", "tau was 0.2, now 0.3",
                  "seed was 0, now 3", "clip was '", "images was "):
        assert words in message
    assert "crop was" not in message
    assert (tmp_path / "run" / "rectify.pt").read_bytes() == before


def test_resume_under_another_teacher_is_refused(start):
    start("distill", "run", distill_epochs=1)
    with pytest.raises(ValueError, match=r"cannot resume .*distill.pt: .*teacher was '"):
        start("distill", "run", distill_epochs=1, prompt_length=3, resume=True)


def test_a_finished_training_of_other_settings_is_replaced_only_when_told_so(start, tmp_path):
    start("rectify", "run")
    before = (tmp_path / "run" / "rectify.pt").read_bytes()
    with pytest.raises(ValueError) as caught:
        start("rectify", "run", lr=0.5)
    assert "rectify.pt is the end of another training (lr was 0.01, now 0.5)" in sentence(caught)
    assert "--out" in sentence(caught) and "--overwrite" in sentence(caught)
    assert (tmp_path / "run" / "rectify.pt").read_bytes() == before

    start("rectify", "run", lr=0.5, overwrite=True)
    start("rectify", "other", lr=0.5)
    assert equal(file_of(tmp_path / "run"), file_of(tmp_path / "other"))


def test_a_checkpoint_that_no_training_of_ours_wrote_is_not_replaced(start, clip, tmp_path):
    """Such as a converted file of the authors'."""
    ReCLIP(clip, OWN.classes, prompts=OWN.prompts).save(tmp_path / "run" / "rectify.pt")
    with pytest.raises(ValueError, match="rectify.pt is the end of another training"):
        start("rectify", "run")


def test_the_same_training_and_an_unfinished_one_are_replaced(start, tmp_path, monkeypatch):
    start("rectify", "run")
    whole = file_of(tmp_path / "run")
    start("rectify", "run")
    assert equal(file_of(tmp_path / "run"), whole)
    assert len(log_of(tmp_path / "run")) == 12

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        effect_at(patch, "contrastive_loss", 7, interrupt)
        start("rectify", "unfinished", lr=0.5)
    start("rectify", "unfinished")
    assert equal(file_of(tmp_path / "unfinished"), whole)


def spoil(tensor):
    return tensor * float("nan")


def spoil_gradient_alone(tensor):
    tensor.register_hook(lambda gradient: gradient * float("inf"))
    return tensor


@pytest.mark.parametrize("effect", [spoil, spoil_gradient_alone])
def test_a_number_that_is_not_finite_ends_the_training_before_its_step(
    start, tmp_path, monkeypatch, effect
):
    models = []
    before = []
    new_reclip = train.new_reclip

    def recorded(*arguments):
        models.append(new_reclip(*arguments))
        return models[0]

    def watched(result):
        before.append(deepcopy(list(models[0].parameters())))
        return effect(result)

    monkeypatch.setattr(train, "new_reclip", recorded)
    effect_at(monkeypatch, "contrastive_loss", 6, watched)
    with pytest.raises(ValueError) as caught:
        start("rectify", "run")

    message = sentence(caught)
    third_of_epoch_1 = "abcd"[order_of(0, 1, 4)[1]]
    assert f"at step 5 on {third_of_epoch_1}; the step was not taken" in message
    assert ("the loss is nan" in message) == (effect is spoil)
    assert equal(list(models[0].parameters()), before[0])
    assert file_of(tmp_path / "run")["training"]["step"] == 4


# --- Several processes, as each of them sees it ---------------------------------------------------

class Numbers(Dataset):
    """An endless stream of ten images an epoch: item s is the number s."""

    def __len__(self):
        return 10

    def __getitem__(self, s):
        return torch.tensor([s]), torch.tensor([s % 3 == 0]), str(s)


def one_of_two(rank, tmp_path, seed=0):
    run = train.Run("rectify", tmp_path, seed)
    run.rank, run.processes = rank, 2
    run.begin(None, None, epochs=3, batch=2, stream=Numbers(), identity={})
    return run


def test_two_processes_share_the_stream(tmp_path):
    """Three epochs of ten images, two images a step in each process: eight steps, none twice."""
    seen = []
    for rank in (0, 1):
        run = one_of_two(rank, tmp_path)
        batches = list(run.batches())
        assert [step for step, *_ in batches] == list(range(8))
        for _, images, valid, names in batches:
            assert [str(s) for s in images.flatten().tolist()] == list(names)
            assert valid.flatten().tolist() == [s % 3 == 0 for s in images.flatten().tolist()]
        seen.append([images.flatten().tolist() for _, images, _, _ in batches])

        # The learning rate follows what both have seen: 0, 4, 8, 12, ... of 10 images.
        assert [run.epoch(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]

    for step in range(8):
        assert seen[0][step] + seen[1][step] == list(range(4 * step, 4 * step + 4))


def test_no_two_steps_processes_or_seeds_have_the_same_noise(tmp_path):
    drawn = set()
    for rank in (0, 1):
        for seed in (0, 1, 2):
            run = one_of_two(rank, tmp_path, seed)
            for step in range(8):
                torch.manual_seed(run.noise_seed(step))
                drawn.add(torch.rand((), dtype=torch.float64).item())
    assert len(drawn) == 2 * 3 * 8


# --- The whole paper in one command ---------------------------------------------------------------

def test_all_stages_end_in_a_table_of_what_was_measured(trained):
    rows = {}
    for line in trained.printed.splitlines():
        if line.startswith(("  MaskCLIP", "  + ", "  distilled")):
            rows[line[:30].strip()] = float(line.split()[-1])

    files = {
        "MaskCLIP (Query only)": "eval_clip.json",
        "+ Reference": "reference_only/eval_rectify.json",
        "+ Reference + positional": "eval_rectify.json",
        "distilled": "eval_distill.json",
    }
    assert list(rows) == list(files)
    for title, name in files.items():
        report = json.loads((trained.out / name).read_text())
        assert rows[title] == pytest.approx(100 * report["miou"], abs=0.051)


def test_the_second_row_has_no_positional_net(trained):
    alone = file_of(trained.out / "reference_only")["learnt"]
    both = file_of(trained.out)["learnt"]
    assert not any(key.startswith("positional.") for key in alone)
    assert any(key.startswith("positional.") for key in both)


def test_all_stages_resumed_do_nothing_twice(trained, small_shapes, tmp_path, capsys):
    shutil.copytree(trained.out, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.pt")}
    train.main([*trained.arguments[:-1], str(tmp_path / "run"), "--resume"])

    assert len(before) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    table = capsys.readouterr().out.split("mIoU\n")[1].split("masks:")[0]
    assert table == trained.printed.split("mIoU\n")[1].split("masks:")[0]


def test_a_new_student_is_a_function_of_its_seed(clip):
    """Of one teacher: making a teacher seeds too."""
    options, settings = train.hyper_parameters(OWN)
    teacher = train.new_reclip(clip, OWN, options, settings, seed=0).eval()
    made = []
    for seed in (3, 3, 4):
        torch.rand(5)  # what was drawn before must not matter
        made.append(train.new_student(teacher, OWN, settings, seed).state_dict())
    assert equal(made[0], made[1]) and not equal(made[0], made[2])


def test_resume_with_other_pseudo_labels_is_refused(start, tmp_path):
    """A file of labels edited by hand: no setting tells."""
    start("rectify", "run")
    path = tmp_path / "run" / "image_labels.json"
    content = json.loads(path.read_text())
    content["labels"]["a"] = [1] if content["labels"]["a"] == [0] else [0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot resume .*: labels was"):
        start("rectify", "run", resume=True)


def test_another_image_under_the_same_name_is_noticed(make_voc):
    split = open_split("voc", make_voc({"train": 2}), "train")
    before = train.images_crc(split)
    with split.image_paths[1].open("ab") as file:
        file.write(b"more")
    assert train.images_crc(split) != before
