"""train.py: the loop, its checkpoints, the settings, and training without labels."""

import csv
import dataclasses
import inspect
import json
import shutil
import signal
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

import datasets
import train
from datasets import DATA
from deeplab import DeepLabV2
from eval import Protocol
from reclip import ReCLIP
from test_clip_model import encode_prompted_plain
from test_reclip import (
    IMAGENET,
    READINGS,
    noise_of,
    plain_features,
    plain_pixels,
    plain_positional,
)


@pytest.fixture
def command(make_voc, tiny_clip_file, tmp_path):
    """train.py's arguments for a small VOC; `out` and more options are appended."""
    root = make_voc({"train": 4})
    return lambda out, *more: [
        "--stage",
        "rectify",
        "--data",
        "voc",
        "--root",
        str(root),
        "--clip",
        str(tiny_clip_file),
        "--device",
        "cpu",
        "--crop",
        "32",
        "--epochs",
        "3",
        "--out",
        str(tmp_path / out),
        *more,
    ]


def learnt(folder):
    return torch.load(folder / "rectify.pt", weights_only=True)["learnt"]


def fail_at(monkeypatch, step, effect, name="contrastive_loss"):
    """Makes the step-th call of a loss of the loop raise or return something else."""
    calls, loss = [], getattr(train, name)

    def counted(*arguments, **more):
        calls.append(1)
        value = loss(*arguments, **more)
        return effect(value) if len(calls) == step else value

    monkeypatch.setattr(train, name, counted)


def interrupt(loss):
    raise KeyboardInterrupt


def test_resumed_run_equals_uninterrupted_one(command, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch: after --resume, weights, log and order are
    equal to the bit.
    """
    train.main(command("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 7, interrupt)
        train.main(command("parts"))
    state = torch.load(tmp_path / "parts" / "rectify_state.pt", weights_only=True)
    assert state["step"] == 4  # one epoch of 4 pictures
    train.main(command("parts", "--resume"))
    whole, parts = learnt(tmp_path / "whole"), learnt(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [(tmp_path / name / "rectify_log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 13
    other = command("other", "--seed", "1")
    train.main(other)
    assert not torch.equal(
        learnt(tmp_path / "other")["reference.vectors"], whole["reference.vectors"]
    )


def test_a_signal_behind_the_save_counts_for_the_next_step(tmp_path):
    """Else the step that is running then would end unsaved, and one of several processes alone."""

    class Stream(torch.utils.data.Dataset):
        def __getitem__(self, s):
            return torch.tensor([s]), torch.tensor([True]), "any"

    run = train.Run("rectify", tmp_path, {})
    run.begin({}, None, steps=9, images_per_step=1, images_per_epoch=9)
    saves = []
    with pytest.raises(KeyboardInterrupt):
        for step, _, _, _ in run.batches(Stream(), 1):
            saves.append((step, run.save_due(step)))
            if step == 1:
                signal.raise_signal(signal.SIGTERM)
    assert saves == [(0, False), (1, False), (2, True)]


def test_only_the_bias_modules_learn(command, monkeypatch):
    """All of the model in memory, before the loop and after it: prompt and net have moved alone."""
    loop = train.train_rectification
    models, before = [], []

    def recorded(model, *arguments):
        models.append(model)
        before.append(deepcopy(model.state_dict()))
        return loop(model, *arguments)

    monkeypatch.setattr(train, "train_rectification", recorded)
    train.main(command("run"))
    after = models[0].state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[0][key])}
    assert {"reference.vectors", "positional.net.0.weight"} <= moved
    assert all(key.startswith(("reference.", "positional.")) for key in moved), moved
    assert any(key.startswith("clip.") for key in after)


def test_trains_without_label_folder(command, tmp_path):
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    train.main(command("run"))
    assert (tmp_path / "run" / "rectify.pt").is_file()


def test_nan_loss_names_step_and_picture_and_keeps_the_last_state(command, tmp_path, monkeypatch):
    fail_at(monkeypatch, 6, lambda loss: loss * float("nan"))
    with pytest.raises(ValueError, match=r"nan, .* at step 5 on train_\d; .*holds step 4"):
        train.main(command("run"))
    assert torch.load(tmp_path / "run" / "rectify_state.pt", weights_only=True)["step"] == 4
    assert all(value.isfinite().all() for value in learnt(tmp_path / "run").values())


def test_resume_refuses_other_settings_and_lists_them(command, tmp_path):
    train.main(command("run"))
    with pytest.raises(ValueError, match=r"lr was 0.01, now 0.5; .*pool was 'global', now 'mask'"):
        train.main(command("run", "--resume", "--lr", "0.5", "--pool", "mask"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:500]),
        lambda p: p.write_text("hello"),
    ],
)
def test_resume_without_a_good_state(command, tmp_path, damage):
    train.main(command("run", "--epochs", "1"))
    damage(tmp_path / "run" / "rectify_state.pt")
    with pytest.raises((FileNotFoundError, ValueError), match="rectify_state.pt") as caught:
        train.main(command("run", "--epochs", "1", "--resume"))
    assert "\n" not in str(caught.value)


def test_pseudo_labels_are_kept_by_name_and_made_anew_for_other_settings(command, tmp_path):
    """The file holds, for each picture name, what Sec. 3.4 says of that very picture."""
    train.main(command("run", "--epochs", "1"))
    path = tmp_path / "run" / "image_labels.json"
    content = json.loads(path.read_text())
    model = ReCLIP.load(tmp_path / "run" / "rectify.pt")
    split = train.open_split("voc", tmp_path, "train")
    for thumbnail, name in train.Thumbnails(split, model.clip.input_resolution):
        similarity = model.image_similarity(thumbnail[None])[0]
        expected = [c for c in range(20) if similarity[c] >= 23] or sorted(
            similarity.topk(2).indices.tolist()
        )
        assert content["labels"][name] == expected
    content["labels"] = {name: [3] for name in content["labels"]}
    path.write_text(json.dumps(content))
    train.main(command("run", "--epochs", "1"))
    assert json.loads(path.read_text()) == content  # same settings: read, not computed
    train.main(command("run", "--epochs", "1", "--top_k", "1", "--threshold", "99"))
    labels = json.loads(path.read_text())["labels"]
    assert [len(found) for found in labels.values()] == [1] * 4 and json.loads(
        path.read_text()
    ) != content


def test_learning_rate_follows_the_poly_rule(command, tmp_path):
    """lr (1 - epoch / 200) ** 0.9, stepped once an epoch (Sec. 4.1, released horizon)."""
    train.main(command("run"))
    rows = list(csv.DictReader((tmp_path / "run" / "rectify_log.csv").open()))
    assert [float(row["lr"]) for row in rows] == pytest.approx(
        [0.01 * (1 - (step // 4) / 200) ** 0.9 for step in range(12)], rel=1e-5
    )


def settings_of(arguments):
    _, _, settings = train.parse_arguments(arguments)
    return settings


def test_the_learning_rate_of_distillation_has_a_floor(command, tmp_path):
    """0.01 (1 - epoch / epochs) ** 0.9, never below the floor (released: 1e-4)."""
    train.main(command("run", "--epochs", "1"))
    arguments = command(
        "run",
        "--epochs",
        "4",
        "--distill-lr-floor",
        "0.004",
        "--student",
        "tiny",
        "--backbone-weights",
        "none",
        "--distill-crop",
        "32",
        "--distill-batch",
        "2",
    )
    train.main(["--stage", "distill", *arguments[2:]])
    rows = list(csv.DictReader((tmp_path / "run" / "distill_log.csv").open()))
    expected = [max(0.004, 0.01 * (1 - (step // 2) / 4) ** 0.9) for step in range(8)]
    assert expected[-1] == 0.004 < expected[3]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def distill(command, tmp_path):
    """A teacher of one epoch; distill(*options) runs one epoch of distillation from it."""
    train.main(command("run", "--epochs", "1"))
    tiny = ["--student", "tiny", "--backbone-weights", "none", "--distill-crop", "32"]

    def run(*options):
        arguments = command("run", "--epochs", "1", *tiny, "--distill-batch", "2", *options)
        train.main(["--stage", "distill", *arguments[2:]])

    return run


@pytest.mark.parametrize(
    "options, expected", [([], None), (["--head", "original"], 1.0), (["--mask-tau", "0.3"], 0.3)]
)
def test_temperature_of_the_mask_guided_loss(distill, tmp_path, monkeypatch, options, expected):
    """That of Eq. (5), unless it is given; 1 for a classifier that learns its own scale."""
    seen, loss = [], train.mask_guided_loss

    def recorded(logits, pseudo_labels, tau, to_pixels):
        seen.append(tau)
        return loss(logits, pseudo_labels, tau, to_pixels)

    monkeypatch.setattr(train, "mask_guided_loss", recorded)
    distill(*options)
    teacher = ReCLIP.load(tmp_path / "run" / "rectify.pt")
    assert teacher.tau not in (1.0, 0.3)
    assert seen == [teacher.tau if expected is None else expected] * 2


def test_a_teacher_in_training_mode_learns_nothing_from_the_student(command, tmp_path):
    """Its batch norms would take the statistics of the student's images."""
    train.main(command("run", "--epochs", "1"))
    teacher = ReCLIP.load(tmp_path / "run" / "rectify.pt").train()
    before = teacher.fingerprint()
    split = train.open_split("voc", tmp_path, "train")
    settings = dataclasses.replace(
        train.SETTINGS["voc"],
        student="tiny",
        backbone_weights="none",
        distill_crop=32,
        distill_batch=2,
        distill_epochs=1,
    )
    labels = {name: torch.ones(20, dtype=torch.bool) for name in split.names}
    student = train.new_student(teacher, settings, seed=0)
    run = train.Run("distill", tmp_path, {})
    train.train_distillation(teacher, student, split, labels, settings, run)
    assert teacher.fingerprint() == before


def test_the_threshold_reaches_the_labels(make_voc, tiny_clip_file, tmp_path):
    """Each image holds exactly the classes whose similarity reaches the threshold."""
    split = train.open_split("voc", make_voc({"train": 4}), "train")
    facts, clip = DATA["voc"], train.load_clip(tiny_clip_file)
    model = train.new_reclip(clip, facts, train.SETTINGS["voc"], seed=0)
    similarity = {
        name: model.image_similarity(thumbnail[None])[0]
        for thumbnail, name in train.Thumbnails(split, clip.input_resolution)
    }
    values = torch.stack(list(similarity.values())).flatten().sort().values
    threshold = (values[-12] + values[-11]).item() / 2  # of 80 pairs 11 are above
    settings = dataclasses.replace(train.SETTINGS["voc"], threshold=threshold, top_k=1)
    labels = train.label_training_set(model, split, settings, {}, tmp_path / "labels.json")
    above = {name: row > threshold for name, row in similarity.items()}
    assert sum(int(row.sum()) for row in above.values()) == 11
    for name, row in labels.items():
        expected = above[name] if above[name].any() else similarity[name] == similarity[name].max()
        assert row.dtype == torch.bool and torch.equal(row, expected)


FIELDS = {field.name: field for field in dataclasses.fields(train.Settings)}


# (recipe and method have tests of their own)
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"recipe", "method"}))
def test_every_setting_is_an_option(name):
    field = FIELDS[name]
    spelling = name.replace("_", "-")
    ordinary = datasets.find_settings("voc")
    if field.type is bool:
        value = not getattr(ordinary, name)
        option = [f"--{spelling}" if value else f"--no-{spelling}"]
    else:
        value = {int: 3, float: 0.75, str: "none"}[field.type]
        if name == "rectify_poly_epochs":
            value = 1000  # not below rectify_epochs
        if name in train.CHOICES:
            value = train.CHOICES[name][1]
        option = [f"--{spelling}", str(value)]
    assert value != getattr(ordinary, name)
    assert settings_of(["--data", "voc", *option]) == dataclasses.replace(ordinary, **{name: value})


def test_recipes_and_spellings():
    # The defaults are those of the recipe that the paper's checkpoints belong to.
    voc = ["--stage", "rectify", "--data", "voc"]
    assert settings_of(voc) == datasets.find_settings("voc", "cvpr2024")
    assert settings_of([*voc, "--recipe", "2025"]) == datasets.find_settings("voc", "2025")
    assert settings_of([*voc, "--recipe", "2025", "--crop", "48"]) == dataclasses.replace(
        datasets.find_settings("voc", "2025"), crop=48
    )
    hyphens = settings_of(
        ["--data", "voc", "--positional-channels", "1", "--no-positional-last-relu"]
    )
    underscores = settings_of(
        ["--data", "voc", "--positional_channels", "1", "--no-positional_last_relu"]
    )
    assert hyphens == underscores and hyphens.positional_channels == 1


# -- the two recipes, and the image pipeline -------------------------------------------------------

TINY = ["--student", "tiny", "--backbone-weights", "none", "--distill-crop", "32"]


def test_a_run_is_not_resumed_under_another_recipe(command, tmp_path):
    train.main(command("run", "--epochs", "1"))
    assert ReCLIP.load(tmp_path / "run" / "rectify.pt").recipe == "cvpr2024"
    with pytest.raises(ValueError, match=r"recipe was 'cvpr2024', now '2025'") as caught:
        train.main(command("run", "--epochs", "1", "--recipe", "2025", "--resume"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("own, other", [("cvpr2024", "2025"), ("2025", "cvpr2024")])
def test_a_student_has_the_recipe_of_its_teacher(command, tmp_path, own, other):
    """Whatever --recipe's default; naming another one is refused in a sentence."""
    train.main(command("run", "--epochs", "1", "--recipe", own))
    arguments = ["--stage", "distill", *command("run", "--epochs", "1", *TINY)[2:]]
    train.main(arguments)
    assert DeepLabV2.load(tmp_path / "run" / "distill.pt").recipe == own
    assert ReCLIP.load(tmp_path / "run" / "rectify.pt").recipe == own

    with pytest.raises(ValueError, match=f"rectify.pt was learnt under the recipe {own}") as caught:
        train.main([*arguments, "--recipe", other])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage, options, expected", [
    ("rectify", [], dict(long_side=2048, short_side=512)),
    ("rectify", ["--recipe", "2025"], dict(long_side=2048, short_side=336)),
    ("rectify", ["--rectify-long-side", "99", "--rectify_short_side", "88", "--resize-from", "1"],
     dict(long_side=99, short_side=88, ratio=(1.0, 2.0))),
    ("distill", [], dict(long_side=2048, short_side=512)),
    ("distill", ["--distill-long-side", "99", "--distill_short_side", "88", "--no-flip"],
     dict(long_side=99, short_side=88, flip=False)),
])
def test_settings_reach_the_images(command, tmp_path, monkeypatch, stage, options, expected):
    """Sizes and ratio of each stage; and a benchmark's images are resized without antialiasing."""
    if stage == "distill":
        train.main(command("run", "--epochs", "1"))
    given = []

    def recorded(**arguments):
        given.append(arguments)
        return datasets.Augment(**arguments)

    monkeypatch.setattr(train, "Augment", recorded)
    train.main(["--stage", stage, *command("run", "--epochs", "1", *TINY, *options)[2:]])
    defaults = dict(crop=32, ratio=(0.5, 2.0), flip=True, photometric=True, antialias=False)
    assert given == [defaults | expected]


class OneImage:
    """A split of one small image, 10 x 14 pixels, again and again."""

    antialias = True

    def __init__(self, count=1, white=False):
        generator = torch.Generator().manual_seed(4)
        self.pixels = torch.randint(0, 256, (3, 10, 14), dtype=torch.uint8, generator=generator)
        if white:
            self.pixels.fill_(255)
        self.names = [str(i) for i in range(count)]

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return self.pixels


def padded_settings(**changes):
    """The image keeps its 10 x 14 pixels in a crop of 24; nothing but the noise is random."""
    fixed = dict(
        crop=24,
        distill_crop=24,
        rectify_long_side=14,
        rectify_short_side=10,
        distill_long_side=14,
        distill_short_side=10,
        resize_from=1.0,
        resize_to=1.0,
        flip=False,
        photometric=False,
        weight_decay=0.0,
        rectify_epochs=1,
        distill_epochs=1,
        distill_batch=1,
    )
    return dataclasses.replace(datasets.find_settings("voc"), **(fixed | changes))


def padded_model(clip, recipe, **changes):
    """A ReCLIP on the small CLIP whose masks are not settled."""
    torch.manual_seed(1)
    W_q = F.normalize(torch.randn(4, 12), dim=1)
    arguments = dict(prompt_length=6, tau_1=0.3, tau=0.2, positional_gain=0.2, recipe=recipe)
    return ReCLIP(clip, ["cat", "dog", "grass", "tree"], W_q=W_q, **(arguments | changes))


def logged_loss(folder, stage):
    (row,) = csv.DictReader((folder / f"{stage}_log.csv").open())
    return float(row["loss"])


def padded_pixels(split, mean, std):
    """The image in the upper left corner of 24 x 24 pixels, normalized; the rest is 0."""
    pixels = torch.zeros(3, 24, 24, dtype=torch.float64)
    pixels[:, :10, :14] = plain_pixels(split.pixels.double() / 255, mean, std)
    return pixels


@pytest.mark.parametrize("recipe", READINGS)
def test_a_step_of_rectification_on_a_padded_image(clip, tmp_path, recipe):
    """Loss and gradient by Eq. (1)-(5) written out: all 6 x 6 patches take part in Eq. (4)-(5),
    though the image is on 3 x 4 of them alone (as released)."""
    model, split = padded_model(clip, recipe), OneImage()
    vectors = model.reference.vectors.detach().double().requires_grad_()
    net = {key: value.double() for key, value in model.positional.state_dict().items()}
    labels = torch.tensor([True, False, True, True])
    run = train.Run("rectify", tmp_path, {})
    settings = padded_settings()
    train.train_rectification(model, split, {"0": labels}, settings, run)
    learnt_vectors = model.reference.vectors.detach().double()

    model.double()
    gelu, mean, std = READINGS[recipe]
    Z = plain_features(model.clip.state_dict(), padded_pixels(split, mean, std), gelu)  # (D, 6, 6)
    W_r = encode_prompted_plain(model.clip, vectors, model.reference.endings)
    W_r = W_r / W_r.norm()
    p = model.clip.visual.positional_grid(6, 6)[0]
    M_p = 0.2 * plain_positional(net, p, training=True, last_relu=True)
    M = torch.einsum("dhw,cd->chw", Z, model.W_q) - torch.einsum("dhw,cd->chw", Z, W_r) - M_p

    # The noise of step 0 of seed 0, as the class Run seeds it.
    noise = noise_of(7_368_787, torch.empty(1, 4, 6, 6))[0].double()
    soft = (M / 0.3 + noise).softmax(0)
    best = soft.argmax(0)                                                       # (6, 6)
    hard = torch.stack([(best == c).double() for c in range(4)])
    masks = hard + soft - soft.detach()

    def loss_over(masks, Z, patches):
        loss = 0
        for c in (0, 2, 3):
            S = (masks[c] * Z).flatten(1).sum(1) / patches @ model.W_q.T        # (C,)
            loss = loss - (S / 0.2).log_softmax(0)[c] / 3
        return loss

    loss = loss_over(masks, Z, 36)
    assert logged_loss(tmp_path, "rectify") == pytest.approx(loss.item(), abs=2e-5)
    # It would be another number over the patches of the image alone.
    only = loss_over(masks[:, :3, :4], Z[:, :3, :4], 12)
    assert abs(only.item() - loss.item()) > 1e-2

    loss.backward()
    assert vectors.grad.abs().max() > 1e-6
    expected = vectors.detach() - settings.lr * vectors.grad                    # one step of SGD
    moved = (learnt_vectors - vectors.detach()).norm()
    assert (learnt_vectors - expected).norm() < 0.02 * moved


@pytest.mark.parametrize("recipe", READINGS)
def test_a_step_of_distillation_on_padded_images(clip, tmp_path, recipe):
    """Eq. (6)-(8) on whole arrays. Teacher and student each see the image in their own
    normalization, the teacher in that of its recipe; padding is 0 for both, carries no
    pseudo-label and no features; in Eq. (4)-(5) all patches of the student take part."""
    teacher, split = padded_model(clip, recipe), OneImage()
    settings = padded_settings(student="tiny", backbone_weights="none", mask_tau=0.1)
    student = train.new_student(teacher, settings, seed=2)
    copy = deepcopy(student).double().train()
    labels = torch.tensor([True, False, True, True])
    run = train.Run("distill", tmp_path, {})
    train.train_distillation(teacher, student, split, {"0": labels}, settings, run)

    # The teacher: M and Z, enlarged from 6 x 6 patches of 4 pixels.
    teacher.double().eval()
    gelu, mean, std = READINGS[recipe]
    Z = plain_features(teacher.clip.state_dict(), padded_pixels(split, mean, std), gelu)[None]
    M = teacher.rectify(Z).rectified

    def enlarged(grid):
        return F.interpolate(grid, scale_factor=4, mode="bilinear", align_corners=False)

    pseudo_labels = enlarged(M).argmax(1)                                       # (1, 24, 24)

    # The student, on ImageNet's constants whatever the recipe.
    x = copy.backbone(padded_pixels(split, *IMAGENET)[None])
    own_Z = F.normalize(copy.aspp(x), dim=1)                                    # (1, D, 6, 6)
    own_M = torch.einsum("bdhw,cd->bchw", own_Z, copy.W_q - copy.W_r)

    log_p = (enlarged(own_M) / 0.1).log_softmax(1)
    right = log_p.gather(1, pseudo_labels[:, None])[0, 0]                       # (24, 24)
    mask_loss = -right[:10, :14].mean()
    difference = (enlarged(Z) - enlarged(own_Z)).abs().sum(1)[0]                # (24, 24)
    feature_loss = difference[:10, :14].mean()

    noise = noise_of(7_368_787, torch.empty(1, 4, 6, 6))[0].double()
    best = (own_M[0] / 0.3 + noise).argmax(0)
    text_loss = 0
    for c in (0, 2, 3):
        S = own_Z[0][:, best == c].sum(1) / 36 @ teacher.W_q.T
        text_loss = text_loss - (S / 0.2).log_softmax(0)[c] / 3

    expected = (mask_loss + 0.5 * feature_loss + 0.5 * text_loss).item()
    assert logged_loss(tmp_path, "distill") == pytest.approx(expected, rel=2e-5)
    # With the padding it would be another number.
    assert abs(right.mean() + mask_loss) > 1e-3 < abs(difference.mean() - feature_loss)


@pytest.mark.parametrize("recipe", READINGS)
def test_what_enters_the_networks_in_distillation(clip, tmp_path, recipe):
    """A white image: (1 - mean) / std of the teacher's recipe, and of ImageNet for the student."""
    teacher = padded_model(clip, recipe)
    settings = padded_settings(student="tiny", backbone_weights="none")
    student = train.new_student(teacher, settings, seed=2)
    assert student.recipe == teacher.recipe == recipe
    seen = []
    for part in (teacher.dense_visual.conv1, student.backbone[0]):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    labels = {"0": torch.ones(4, dtype=torch.bool)}
    run = train.Run("distill", tmp_path, {})
    train.train_distillation(teacher, student, OneImage(white=True), labels, settings, run)

    for pixels, (mean, std) in zip(seen, (READINGS[recipe][1:], IMAGENET), strict=True):
        expected = torch.zeros(1, 3, 24, 24)
        for color in range(3):
            expected[:, color, :10, :14] = (1 - mean[color]) / std[color]
        torch.testing.assert_close(pixels, expected)
        assert ((pixels == 0) == (expected == 0)).all()


def test_contexts_distillation_sees_images_smaller_than_its_crop(make_clip, tmp_path, monkeypatch):
    """Their short side is 0.5 to 2 times 520 pixels at most, the crop 480 (as released). What is
    padded has the pseudo-label IGNORE and is no place of Eq. (7); all else has a class."""
    clip = make_clip(patch=16)  # 30 x 30 patches
    teacher = padded_model(clip, "cvpr2024")
    settings = dataclasses.replace(
        datasets.find_settings("context"),
        student="tiny",
        backbone_weights="none",
        photometric=False,
        distill_batch=2,
        distill_epochs=1,
    )
    pseudo_labels, valid, images = [], [], []
    mask_loss, feature_loss = train.mask_guided_loss, train.feature_guided_loss

    def recorded_mask_loss(logits, labels, *more):
        pseudo_labels.extend(labels)
        return mask_loss(logits, labels, *more)

    def recorded_feature_loss(Z, Z_student, where, *more):
        valid.extend(where)
        return feature_loss(Z, Z_student, where, *more)

    monkeypatch.setattr(train, "mask_guided_loss", recorded_mask_loss)
    monkeypatch.setattr(train, "feature_guided_loss", recorded_feature_loss)
    student = train.new_student(teacher, settings, seed=2)
    student.register_forward_pre_hook(lambda module, inputs: images.extend(inputs[0].clone()))
    split = OneImage(count=6, white=True)
    labels = {name: torch.ones(4, dtype=torch.bool) for name in split.names}
    train.train_distillation(
        teacher, student, split, labels, settings, train.Run("distill", tmp_path, {})
    )

    assert len(images) == len(pseudo_labels) == len(valid) == 6
    heights = []
    for image, pseudo, where in zip(images, pseudo_labels, valid, strict=True):
        assert image.shape == (3, 480, 480)
        inside = image[0] == 1
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        assert inside[:height, :width].all() and inside.sum() == height * width
        # 10 x 14 pixels: r * 520 wide, 10 / 14 of that high, as far as it fits into the crop
        assert height >= 185 and (width == 480 or abs(height / width - 10 / 14) < 0.005)
        assert width < 480 or height >= 342
        assert torch.equal(where, inside)
        assert torch.equal(pseudo == datasets.IGNORE, ~inside)
        assert pseudo[inside].max() < 4
        heights.append(height)
    assert min(heights) < 480 and len(set(heights)) > 2


def test_help_shows_defaults_and_sources(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train.Settings):
        assert f"--{field.name}" in text.split() or f"--{field.name}," in text.split()
    assert (
        "learning rate of SGD (Sec. 4.1) [voc 0.01, context 0.01, ade20k 0.01, own 0.01, "
        "shapes 2]"
        in text
    )


@pytest.mark.parametrize("options", [
    ["--no_such_flag"], ["--stage", "dance"], ["--lr", "fast"], ["--head", "orignal"],
])
def test_unknown_options_end_at_once(options, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_arguments(options)
    assert caught.value.code == 2 and options[-1] in capsys.readouterr().err


def test_all_stages_on_shapes_end_in_a_table_and_resume(tmp_path, monkeypatch, capsys):
    """The default command, shortened; stopped inside distillation, it goes on with --resume and
    skips what is done.
    """
    command = [
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--rectify_epochs",
        "1",
        "--distill_epochs",
        "1",
    ]
    fail_at(monkeypatch, 3, interrupt, "distillation_loss")
    monkeypatch.setitem(
        train.SETTINGS, "shapes", dataclasses.replace(train.SETTINGS["shapes"], distill_batch=256)
    )
    monkeypatch.setitem(DATA, "shapes", dataclasses.replace(DATA["shapes"], splits=("val",)))
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    before = (tmp_path / "rectify.pt").read_bytes()
    train.main([*command, "--resume"])
    assert (tmp_path / "rectify.pt").read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line[:30].strip(): float(line.split()[-1])
        for line in lines
        if line.startswith(("  MaskCLIP", "  +", "  distilled"))
    }
    assert list(rows) == [
        "MaskCLIP (Query only)",
        "+ Reference",
        "+ Reference + positional",
        "distilled",
    ]
    for stage in ("clip", "rectify", "distill"):
        report = json.loads((tmp_path / f"eval_{stage}.json").read_text())
        assert (tmp_path / f"eval_{stage}.png").is_file() and report["protocol"]["pictures"] == 300
    assert rows["distilled"] == pytest.approx(100 * report["miou"], abs=0.06)


def test_distillation_refuses_a_teacher_of_other_classes(command, tmp_path):
    train.main(command("run", "--epochs", "1"))
    with pytest.raises(
        ValueError, match="rectify.pt was learnt for other classes than shapes's: airplane, "
    ):
        train.main(["--stage", "distill", "--device", "cpu", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--data", "cityscapes"], "--data cityscapes is neither a folder"),
        (["--stage", "all", "--data", ".", "--classes", "a, b"], "--stage all evaluates"),
        (["--rectify_batch", "0"], "rectify_batch is 0"),
        (["--epochs", "-1"], "rectify_epochs is -1"),
        (["--split", "nonsense"], "--split nonsense"),
        (["--recipe", "2025"], "a recipe goes with voc, context and ade20k alone, not with shapes"),
        (
            ["--stage", "rectify", "--data", ".", "--classes", "a, b", "--recipe", "cvpr2024"],
            "a recipe goes with voc, context and ade20k alone",
        ),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--stage", "rectify", "--split", "val"], "--split goes with --stage all"),
        (["--epochs", "21"], "rectify_epochs is 21; it must not be above rectify_poly_epochs, 20"),
        (
            ["--stage", "rectify", "--prompt_length", "0", "--positional_channels", "0"],
            "nothing to learn",
        ),
        (["--stage", "rectify", "--clip", "nothing.pt"], "nothing.pt"),
        (
            [
                "--stage",
                "rectify",
                "--data",
                "voc",
                "--root",
                "nowhere",
                "--clip",
                "shapes_clip.pt",
            ],
            "nowhere/VOCdevkit/VOC2012/.* is missing",
        ),
        (["--stage", "distill"], "learn one first, with python train.py --stage rectify"),
    ],
)
def test_bad_input_ends_in_one_sentence(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(train.Path(train.__file__).parent)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        train.main([*options, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_distillation_resumes_to_the_bit_without_labels_and_knows_its_teacher(
    command, tmp_path, monkeypatch
):
    """On files, label folder gone: stopped and resumed equals uninterrupted; the teacher stays
    as it was; a state made with one teacher is refused under another.
    """
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    train.main(command("teacher", "--epochs", "1"))
    teacher = str(tmp_path / "teacher" / "rectify.pt")
    before = ReCLIP.load(teacher).fingerprint()

    def distill(out, *more):
        arguments = command(
            out,
            "--teacher",
            teacher,
            "--student",
            "tiny",
            "--backbone_weights",
            "none",
            "--distill_crop",
            "32",
            "--distill_batch",
            "2",
            *more,
        )
        train.main(["--stage", "distill", *arguments[2:]])
        return torch.load(tmp_path / out / "distill.pt", weights_only=True)["student"]

    whole = distill("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 4, interrupt, "distillation_loss")
        distill("parts")
    assert torch.load(tmp_path / "parts" / "distill_state.pt", weights_only=True)["step"] == 2
    parts = distill("parts", "--resume")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert ReCLIP.load(teacher).fingerprint() == before
    train.main(command("teacher", "--epochs", "1", "--seed", "5"))
    with pytest.raises(ValueError, match="teacher was '.*', now '"):
        distill("parts", "--resume")


def test_cache_keeps_decoded_pictures_and_says_their_size(command, tmp_path, monkeypatch, capsys):
    """Three epochs of 4 pictures, four readings for the estimate of the size, four for the
    pseudo-labels: kept, each file is decoded once; not kept, for every use. What is learnt is
    the same.
    """
    decoded, read = [], datasets.read_image
    monkeypatch.setattr(
        datasets, "read_image", lambda path, *more: decoded.append(path) or read(path, *more)
    )
    train.main(command("kept"))
    assert len(decoded) == len(set(decoded)) + 4  # the estimate comes before the decision
    said = capsys.readouterr().out
    assert "4 training images, decoded about 0.00 GiB: kept in memory" in said
    decoded.clear()
    train.main(command("read", "--no-cache"))
    assert len(decoded) == 4 + 4 + 12 and "not kept in memory" in capsys.readouterr().out
    kept, again = learnt(tmp_path / "kept"), learnt(tmp_path / "read")
    assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_the_table_measures_each_stage_by_its_own_protocol(monkeypatch, tmp_path):
    measured = []

    def evaluate(model, stage, facts, split, dataset, protocol, out, others, workers):
        drawn = [(column.stage, column.protocol) for column in others]
        measured.append((stage, protocol, dataset.short_side, drawn))
        return {"miou": 0.5}

    monkeypatch.setattr(train, "evaluate_stage", evaluate)
    rows = [("teacher", None, "rectify", tmp_path, [])]
    rows += [("student", None, "distill", tmp_path, ["teacher"])]
    settings = datasets.find_settings("context", "2025")
    train.print_table(rows, DATA["context"], "val", None, settings, 0)
    of_teacher, of_student = Protocol(2048, 448, denoise=0.6), Protocol(520, 520)
    assert measured == [
        ("rectify", of_teacher, 448, []),
        ("distill", of_student, 520, [("rectify", of_teacher)]),
    ]


def test_a_new_student_is_a_function_of_its_seed(clip):
    teacher = ReCLIP(clip, ["cat", "dog"], W_q=torch.eye(2, 12), prompt_length=2).eval()
    settings = dataclasses.replace(train.SETTINGS["own"], student="tiny", backbone_weights="none")

    def student(seed):
        torch.rand(5)  # what was drawn before must not matter
        return train.new_student(teacher, settings, seed).fingerprint()

    assert student(3) == student(3) != student(4)


def test_the_pooling_reaches_both_losses(command, tmp_path, monkeypatch):
    pools = []

    def record(name):
        function = getattr(train, name)

        def recorded(*arguments):
            bound = inspect.signature(function).bind(*arguments)
            bound.apply_defaults()
            pools.append((name, bound.arguments["pool"]))
            return function(*arguments)

        monkeypatch.setattr(train, name, recorded)

    record("masked_features")
    record("text_guided_loss")
    arguments = command("run", "--epochs", "1", "--pool", "mask")
    train.main(arguments)
    student = ["--student", "tiny", "--backbone-weights", "none", "--distill-crop", "32"]
    train.main(["--stage", "distill", *arguments[2:-2], *student, "--distill-batch", "4"])
    assert set(pools) == {("masked_features", "mask"), ("text_guided_loss", "mask")}


def test_settings_reach_the_model(clip):
    """Each that a checkpoint keeps, changed from its default."""
    settings = dataclasses.replace(
        train.SETTINGS["own"], prompt_length=3, prompt_per_class=True, reference_norm="class",
        query_learnable=True, positional_channels=1, positional_last_relu=False,
        positional_gain=0.5, subtract=False, attention="sclip", tau_1=0.5, tau=0.25, pool="mask",
        recipe="cvpr2024",
    )
    facts = datasets.own_facts("own", ("cat", "dog"))
    facts = dataclasses.replace(facts, prompts=("a {}", "the {}"))
    model = train.new_reclip(clip, facts, settings, seed=0)
    kept = {"prompts": ["a {}", "the {}"], "cut_names": False}
    for name, value in model.settings.items():
        assert value == (kept[name] if name in kept else getattr(settings, name)), name
