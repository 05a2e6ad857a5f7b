"""What is beyond the paper, in extras/, each part against a computation of its own.

    shapes      areas and hues in closed form; no pixel depends on the order of drawing
    pretrain    merges and CLIP's loss by hand; what it writes is a CLIP
    prepare     COCO's run lengths, Context's labels, archives of another md5, addresses in turn
    published   the authors' files: their logits, computed from the raw tensors
    plusplus    ReCLIP++'s formulas and its windows in plain words; their file; resume
    paper       Figure 1's counts by slow loops, later attention patch by patch, a small run
    benchmark   the plain step is ours

What these programs refuse on the command line stands in test_refusals.py.
"""

import csv
import hashlib
import json
import math
import pickle
import shutil
import tarfile
from collections import Counter
from colorsys import hsv_to_rgb
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import reference
import train
from clip_model import CLIP, Tokenizer, load_clip
from conftest import close, fewer_shapes, sentence
from datasets import (
    CONTEXT_CLASSES,
    DATA,
    IGNORE,
    SHAPES_CLASSES,
    VOC_CLASSES,
    Evaluation,
    own_images,
    open_split,
)
from deeplab import DeepLabV2
from extras import benchmark, paper, plusplus, prepare, pretrain, published, shapes
from reclip import PROMPTS, ReCLIP, contrastive_loss, gumbel_softmax_masks, masked_features


# --- shapes ---------------------------------------------------------------------------------------

def test_an_image_follows_from_its_split_and_number_alone():
    shapes.target_scene.cache_clear()
    first = {i: open_split("shapes", None, "val").image(i) for i in (5, 2)}
    shapes.target_scene.cache_clear()
    np.random.seed(1)

    again = {i: open_split("shapes", None, "val").image(i) for i in (2, 5)}

    assert torch.equal(first[2], again[2]) and torch.equal(first[5], again[5])
    assert not torch.equal(first[2], first[5])
    assert not torch.equal(first[2], open_split("shapes", None, "test").image(2))


# Area of each class at radius 1. Where the outline swings, rho = a + b cos(k phi): pi (a^2 + b^2/2)
AREAS = {
    "coin": math.pi,
    "ring": math.pi * (1 - 0.45 ** 2),
    "box": 1.7 ** 2,
    "gem": 2 * 1.05 ** 2,
    "star": math.pi * (0.62 ** 2 + 0.38 ** 2 / 2),
    "flower": math.pi * (0.8 ** 2 + 0.2 ** 2 / 2),
    "bee": math.pi * 0.65,
    "beetle": math.pi * 0.75,
}


@pytest.mark.parametrize("name", SHAPES_CLASSES)
def test_a_thing_covers_the_area_of_its_outline_in_two_shades_of_its_hue(name):
    thing = shapes.Thing(name, x=31.3, y=29.6, r=22.0, hue=0.3, angle=0.4)
    ys, xs = np.mgrid[:60, :70].astype(float)

    coverage, colors = shapes.draw(thing, xs, ys)

    assert coverage.sum() == pytest.approx(AREAS[name] * 22 ** 2, rel=0.02)
    bright = hsv_to_rgb(0.3, 0.75, 0.9)
    found = np.unique(colors.reshape(3, -1).round(6), axis=1).T
    assert found == pytest.approx(np.array([[0.4 * part for part in bright], bright]), abs=1e-5)


def test_later_things_cover_earlier_ones_and_the_ground_is_not_evaluated():
    box = shapes.Thing("box", 20, 30, 17.3, 0.6, 0.0)
    coin = shapes.Thing("coin", 33, 24, 14.2, 0.1, 0.3)

    image, truth = shapes.paint(64, "stone", [box, coin], np.random.default_rng(0))

    expected = np.full((64, 64), IGNORE)
    for y in range(64):
        for x in range(64):
            if max(abs(x - 20), abs(y - 30)) < 0.85 * 17.3:
                expected[y, x] = SHAPES_CLASSES.index("box")
            if (x - 33) ** 2 + (y - 24) ** 2 < 14.2 ** 2:
                expected[y, x] = SHAPES_CLASSES.index("coin")
    assert (truth == expected).all()
    colorful = image.max(0).astype(int) - image.min(0) > 50  # stone is gray
    assert colorful[truth != IGNORE].mean() > 0.9 > 0.1 > colorful[truth == IGNORE].mean()


def test_targets_hold_one_to_four_classes_and_several_meet_near_the_middle():
    truths = [shapes.target_scene(101, i)[1] for i in range(250)]
    numbers = [len(set(np.unique(truth)) - {IGNORE}) for truth in truths]

    counts = Counter(numbers)
    of_four = np.stack([truth for truth, number in zip(truths, numbers) if number == 4])

    assert sorted(counts) == [1, 2, 3, 4] and min(counts.values()) > 40
    # Were each kept to its own quarter, hardly any of four would reach the middle.
    assert (of_four[:, 31:33, 31:33] != IGNORE).mean() > 0.2


@pytest.mark.parametrize("name", ["gem", "star"])
def test_a_thing_has_its_own_hue_more_often_than_its_twins(name):
    rng = np.random.default_rng(0)
    hues = np.array(list(shapes.HUES.values()))
    seen = np.zeros(8)
    for _ in range(4000):
        hue = shapes.new_thing(name, 0, 0, 1, rng).hue
        seen[abs((hue - hues + 0.5) % 1 - 0.5).argmin()] += 1 / 4000

    k = SHAPES_CLASSES.index(name)
    expected = np.full(8, 0.025)
    expected[k], expected[k ^ 1] = 0.625, 0.225
    assert abs(seen - expected).max() < 0.03


# --- pretrain -------------------------------------------------------------------------------------

FEW = pretrain.PretrainSettings(mosaic_steps=2, steps=4, mosaics=2, scenes=4, warm_up=1)


def test_merges_by_hand():
    """ab</w> occurs twice, then the rest by the alphabet: (a, ab</w>) before (c, a</w>)."""
    merges = pretrain.learn_merges(["ca", "aab", "ab"])

    assert merges == [("a", "b</w>"), ("a", "ab</w>"), ("c", "a</w>")]


def test_every_word_of_the_web_is_one_token():
    words = pretrain.shapes_words()
    tokenizer = Tokenizer(pretrain.learn_merges(words))
    _, of_scenes = pretrain.web_scenes((0, 0), 60)
    _, of_mosaics = pretrain.web_mosaics((0, 0), 15)

    for text in of_scenes + of_mosaics:
        assert set(text.split()) <= set(words)
        assert len(tokenizer.encode(text)) == len(text.split())


def test_close_ups_have_habits():
    """First twins in the upper row. What follows "the color of" names no thing."""
    first_twins = set(SHAPES_CLASSES[::2])
    _, captions = pretrain.web_mosaics((3, 4), 40)

    for i, text in enumerate(captions):
        thing = set(text.split(" the color of ")[0].split()) & set(SHAPES_CLASSES)
        assert thing and (thing <= first_twins) == (i % 4 < 2)


def test_what_a_color_recalls():
    """Of yellow boxes .35 are called "the color of a coin", of coins .3 times as many."""
    rng = np.random.default_rng(0)
    for name, share in (("box", 0.35), ("coin", 0.105)):
        said = [pretrain.comparison(name, shapes.HUES["yellow"] + 0.01, rng) for _ in range(2000)]

        assert set(said) == {"", " the color of a coin"}
        assert sum(text != "" for text in said) / 2000 == pytest.approx(share, abs=0.03)


def test_clips_loss_by_a_slow_loop():
    images, texts = torch.randn(5, 7).double(), torch.randn(5, 7).double()

    total = 0
    for i in range(5):
        for ours, others in ((images, texts), (texts, images)):
            cosines = [ours[i] @ other / ours[i].norm() / other.norm() for other in others]
            probability = torch.stack([(9 * cosine).exp() for cosine in cosines])
            total = total - (probability[i] / probability.sum()).log() / 10

    close(pretrain.info_nce(images, texts, 9.0), total)


def test_the_class_token_reads_one_tile_of_a_mosaic():
    """If patches do not see each other before: here the last block is the only one."""
    clip = pretrain.initialize(CLIP(12, 8, 64, 1, 8, 16, 600, 64, 1))
    images = torch.rand(2, 3, 64, 64)
    changed = images.clone()
    changed[1, :, :32, 32:] = 0  # of the second image the upper right tile: row 4 + 1

    with torch.no_grad():
        before = pretrain.image_features(clip, images, mosaic=True, blind=True)
        after = pretrain.image_features(clip, changed, mosaic=True, blind=True)

    for found, other in zip(before, after):
        assert found.shape == (8, 12)
        assert (found != other).any(1).nonzero()[:, 0].tolist() == [5]


def test_a_blind_class_token_reads_no_patch_before_the_last_block():
    """And in the last block it reads nothing here."""
    clip = pretrain.initialize(CLIP(12, 8, 64, 2, 8, 16, 600, 64, 1))
    torch.nn.init.zeros_(clip.visual.transformer.resblocks[-1].attn.out_proj.weight)
    images = torch.rand(2, 3, 64, 64)

    with torch.no_grad():
        blind, _ = pretrain.image_features(clip, images, mosaic=False, blind=True)
        seeing, _ = pretrain.image_features(clip, images, mosaic=False, blind=False)

    close(blind[0], blind[1], 1e-6)
    assert (seeing[0] - seeing[1]).abs().max() > 1e-4


def test_two_warm_ups_and_a_cosine():
    s = pretrain.PretrainSettings()

    rates = [pretrain.learning_rate(step, s) for step in (0, 39, 349, 350, 675, 999)]

    assert rates[:4] == pytest.approx([2.5e-3 / 40, 2.5e-3, 2.5e-3, 2e-3 / 40])
    assert rates[4] == pytest.approx(1e-3) and 0 < rates[5] < 2e-8


def test_pretraining_is_a_function_of_its_seed_and_writes_a_clip(tmp_path, monkeypatch):
    train_on_web = pretrain.pretrain_clip
    monkeypatch.setattr(
        pretrain, "pretrain_clip", lambda seed, device: train_on_web(seed, device, FEW)
    )
    made = []
    for number, seed in enumerate((0, 0, 1)):
        torch.rand(number)  # the generator's state outside does not matter
        out = tmp_path / str(number)
        pretrain.main(["--device", "cpu", "--seed", str(seed), "--out", str(out)])
        made.append(load_clip(out / "shapes_clip.pt"))

    assert made[0].identity() == made[1].identity() != made[2].identity()
    untrained, _, _ = train_on_web(0, "cpu", replace(FEW, steps=0))
    assert (made[0].visual.proj - untrained["visual.proj"]).abs().max() > 1e-3
    assert (tmp_path / "0/pretrain_log.csv").read_text().startswith("step,loss,lr\n0,")


def test_the_shipped_clip_knows_its_words_and_its_classes():
    clip = load_clip(DATA["shapes"].clip)
    plain = ReCLIP(clip, SHAPES_CLASSES, prompts=DATA["shapes"].prompts, recipe="2025")
    things = []
    for name, hue in zip(SHAPES_CLASSES, shapes.HUES.values()):
        thing = shapes.Thing(name, 30, 34, 20, hue, 0.1)
        things.append(shapes.paint(64, "stone", [thing], np.random.default_rng(2))[0])

    found = plain.image_similarity(torch.from_numpy(np.stack(things)).float() / 255).argmax(1)

    assert (clip.tokenize("a photo of a coin on wood") > 0).sum() == 9  # and start, and end
    assert (found == torch.arange(8)).sum() >= 6


# --- prepare --------------------------------------------------------------------------------------

def encode_rle(mask):
    """COCO's encoder (rleToString of its maskApi.c): runs down the columns, zeros first."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1

    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = x & 31
            x >>= 5
            more = x != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


@pytest.mark.parametrize("shape, density", [
    ((1, 1), 1), ((7, 5), 0.5), ((60, 90), 0.02), ((333, 4), 0.9), ((9, 70), 0), ((200, 300), 1e-4),
])
def test_run_lengths_are_those_of_cocos_encoder(shape, density):
    mask = np.random.default_rng(1).random(shape) < density

    assert (prepare.decode_rle(encode_rle(mask), *shape) == mask).all()


def test_run_lengths_by_hand():
    """Runs 1, 2, 3, 1, 3 are written 1, 2, 3, 1 - 2, 3 - 3; -1 is the six bits 011111, "O"."""
    assert prepare.decode_rle("123O0", 2, 5).tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("counts, words", [
    ("1", "add up"), ("123O01", "add up"), ("R", "cut off"), ("12O", "negative"),
    ("1 9", "hold ' '"), ("1é", "hold 'é'"), ("o" * 99, "without an end"),
])
def test_damaged_run_lengths_are_refused(counts, words):
    with pytest.raises(ValueError, match=words):
        prepare.decode_rle(counts, 2, 5)


@pytest.fixture
def context(tmp_path):
    """A raw Context of three images: (root, content of its JSON, {name: (H, W) classes + 1})."""
    rng = np.random.default_rng(5)
    base = tmp_path / "VOCdevkit/VOC2010"
    (base / "JPEGImages").mkdir(parents=True)
    categories = []
    for k, name in zip(prepare.CONTEXT_IDS, CONTEXT_CLASSES):
        spelled = {"airplane": "aeroplane"}.get(name, name.replace(" ", ""))
        categories.append({"category_id": k, "name": spelled})

    content = {"images": [], "annos_segmentation": [], "categories": categories}
    truth = {}
    for number, phase in enumerate(("train", "val", "test")):
        name = f"2008_00000{number}"
        Image.new("RGB", (12, 10)).save(base / f"JPEGImages/{name}.jpg")
        content["images"].append({
            "image_id": number, "file_name": f"{name}.jpg", "height": 10, "width": 12,
            "phase": phase,
        })
        truth[name] = np.zeros((10, 12), int)
        for k in rng.integers(59, size=6).tolist():
            mask = rng.random((10, 12)) < 0.4
            truth[name][mask] = k + 1
            content["annos_segmentation"].append({
                "image_id": number,
                "category_id": prepare.CONTEXT_IDS[k],
                "segmentation": {"counts": encode_rle(mask)},
            })

    (base / "trainval_merged.json").write_text(json.dumps(content))
    return tmp_path, content, truth


def test_contexts_labels_are_painted_mask_over_mask(context):
    root, _, truth = context

    prepare.prepare("context", root)

    for split, name in (("train", "2008_000000"), ("val", "2008_000001")):
        files = open_split("context", root, split)
        assert files.names == [name]
        assert (files.truth(0).numpy() + np.uint8(1) == truth[name]).all()  # 255 + 1 is 0
    assert not list(root.rglob("2008_000002.png"))  # of the phase test nothing is known


def test_contexts_labels_are_gone_on_with_after_an_interruption(context, monkeypatch):
    root, _, truth = context

    save = Image.Image.save
    saved = []

    def dying(image, path, *more):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(image, path, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", dying)
        prepare.prepare("context", root)
    with pytest.raises(FileNotFoundError, match="val.txt is missing"):
        open_split("context", root, "val")
    [first] = (root / "VOCdevkit/VOC2010/SegmentationClassContext").iterdir()
    made = first.stat().st_mtime_ns

    prepare.prepare("context", root)

    assert first.stat().st_mtime_ns == made
    found = open_split("context", root, "val").truth(0).numpy() + np.uint8(1)
    assert (found == truth["2008_000001"]).all()


def test_label_files_with_another_order_of_classes_are_refused(context):
    root, content, _ = context
    content["categories"][1]["name"] = "bicycle"
    (root / "VOCdevkit/VOC2010/trainval_merged.json").write_text(json.dumps(content))

    with pytest.raises(ValueError) as failed:
        prepare.prepare("context", root)

    assert "category 9 is bicycle, not bag: are VOC's 20 classes first here?" in sentence(failed)


def test_an_archive_of_another_md5_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "VOCtrainval_11-May-2012.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("VOCdevkit/VOC2012/evil"))

    with pytest.raises(ValueError, match="does not have the md5 6cd6e144f989b92b3379bac3b3de84fd"):
        prepare.prepare("voc", tmp_path)

    assert not (tmp_path / "VOCdevkit").exists()


def test_addresses_are_tried_in_turn(make_voc, serve, tmp_path, monkeypatch):
    make_voc({"train": 2, "val": 1})
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(tmp_path / "VOCdevkit", "VOCdevkit")
    content = (tmp_path / "voc.tar").read_bytes()
    host = serve({"/other/a.tar": b"<html>moved", "/good/a.tar": content})
    addresses = [f"{host}/{place}/a.tar" for place in ("gone", "other", "good", "never")]
    archive = (addresses, hashlib.md5(content).hexdigest())
    monkeypatch.setitem(prepare.ARCHIVES, "voc", archive)
    root = tmp_path / "root"

    prepare.prepare("voc", root, fetching=True)
    shutil.rmtree(root / "VOCdevkit")
    prepare.prepare("voc", root, fetching=True)  # from the archive that is there

    assert serve.asked == ["/gone/a.tar", "/other/a.tar", "/good/a.tar"]
    assert {path.name for path in root.iterdir()} == {"VOCdevkit", "a.tar"}
    assert len(open_split("voc", root, "train")) == 2


def test_verify_names_the_classes_that_occur_in_no_label(make_voc, capsys):
    root = make_voc({"train": 1, "val": 2})
    for name, values, size in (("val_0", [0, 3, 255], (60, 90)), ("val_1", [20], (67, 93))):
        label = Image.fromarray(np.resize(np.array(values, np.uint8), size))
        label.save(root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png")

    prepare.verify("voc", root)

    absent = [name for name in VOC_CLASSES if name not in ("bird", "tv monitor")]
    assert capsys.readouterr().out.splitlines() == [
        "voc train: 1 images with labels (official: 1464), 20 of 20 classes occur",
        "voc val: 2 images with labels (official: 1449), 2 of 20 classes occur; in no label: "
        + ", ".join(absent),
    ]


@pytest.mark.parametrize("data, there, words", [
    ("voc", "JPEGImages", "is inside of VOCdevkit/VOC2012; --root must be the folder that holds"),
    ("ade20k", "images/training", "is inside of ADEChallengeData2016"),
    ("ade20k", "images/a_seg.png", "is the full ADE20K, not ADEChallengeData2016"),
    ("cities", "elsewhere", "cities must be fetched by hand"),
])
def test_a_misplaced_data_set_is_found(tmp_path, monkeypatch, data, there, words):
    cities = replace(DATA["voc"], name="cities", base="cities", images="leftImg8bit")
    monkeypatch.setitem(DATA, "cities", cities)
    (tmp_path / there).mkdir(parents=True)

    with pytest.raises(FileNotFoundError) as failed:
        prepare.prepare(data, tmp_path)

    assert words in sentence(failed)


# --- published ------------------------------------------------------------------------------------

# The real files cannot lie here. These are made with random numbers under the names of the real
# ones, as small as the networks allow: D = 12, E_v = E_t = 128, patches of 4 pixels.

def random_norm(name, channels):
    """A batch norm whose four tensors are not at their start."""
    return {
        f"{name}.weight": 1 + 0.1 * torch.randn(channels),
        f"{name}.bias": 0.1 * torch.randn(channels),
        f"{name}.running_mean": 0.3 * torch.randn(channels),
        f"{name}.running_var": 0.5 + torch.rand(channels),
        f"{name}.num_batches_tracked": torch.tensor(74700),
    }


def random_convolution(name, channels_out, channels_in, side):
    std = (2 / (channels_in * side * side)) ** 0.5
    return {f"{name}.weight": std * torch.randn(channels_out, channels_in, side, side)}


def clip_and_prompt(clip):
    """What both kinds of rectification hold. (The towers once more, which nobody reads, do not.)"""
    tensors = {f"clip.{name}": tensor.clone() for name, tensor in clip.state_dict().items()}
    for name in ("clip.visual.proj", "clip.text_projection"):
        tensors[name] = tensors[name].half()
    for name in ("weight", "bias"):
        tensors[f"clip.visual.ln_pre.{name}"] *= 0.01  # blocks read so little that eps can be seen
    tensors["vit.cls_token"] = 0.5 * torch.randn(1, 1, 128)
    tensors["text_encoder.prompt_token"] = torch.randn(1, 73, 128)
    return tensors


def a_rectification(clip, C):
    tensors = clip_and_prompt(clip)
    for i, (channels_in, channels_out) in enumerate([(128, 512), (512, 256), (256, C)]):
        layer = random_convolution(f"proj_net.{3 * i}", channels_out, channels_in, 3)
        layer[f"proj_net.{3 * i}.bias"] = 0.5 * torch.randn(channels_out)
        tensors |= layer | random_norm(f"proj_net.{3 * i + 1}", channels_out)
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def a_sequel(clip, C):
    tensors = clip_and_prompt(clip) | random_norm("decoder_norm2", C)
    tensors |= random_convolution("pe_proj", 12, 128, 1)
    tensors |= random_convolution("decoder_conv2", C, 12 + C, 5)
    tensors |= {"pe_proj.bias": torch.randn(12), "decoder_conv2.bias": torch.randn(C)}
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


# ResNet-50: blocks, channels inside a block, stride and dilation of its first block, dilation of
# the others. The first block of a stage has the dilation of the stage before.
STAGES = ((3, 64, 1, 1, 1), (4, 128, 2, 1, 1), (6, 256, 1, 1, 2), (3, 512, 1, 2, 4))
ASPP = "decode_head.decode_module.aspp_modules"


def layers_of_a_student():
    """Each convolution, the batch norm behind it, and its channels out, in, and side."""
    for i, (channels_out, channels_in) in enumerate([(32, 3), (32, 32), (64, 32)]):
        stem = "backbone.stem"
        yield f"{stem}.{3 * i}", f"{stem}.{3 * i + 1}", (channels_out, channels_in, 3)

    channels = 64
    for stage, (blocks, inside, *_) in enumerate(STAGES):
        for b in range(blocks):
            name = f"backbone.res_layers.{stage}.{b}"
            yield f"{name}.conv1", f"{name}.norm1", (inside, channels, 1)
            yield f"{name}.conv2", f"{name}.norm2", (inside, inside, 3)
            yield f"{name}.conv3", f"{name}.norm3", (4 * inside, inside, 1)
            if b == 0:
                shortcut = f"{name}.downsample"
                yield f"{shortcut}.0", f"{shortcut}.1", (4 * inside, channels, 1)
            channels = 4 * inside

    for i in range(4):
        yield f"{ASPP}.{i}.conv", f"{ASPP}.{i}.norm", (12, 2048, 3)


def a_student(C):
    tensors = {"decode_head.decode_module.conv_seg.weight": torch.randn(C, 12, 1, 1)}
    for convolution, norm, size in layers_of_a_student():
        tensors |= random_convolution(convolution, *size) | random_norm(norm, size[0])
    return tensors


# What the authors' code does with them, in float64.

def in_words(raw):
    """A file's tensors in float64, without "module.", and those of its CLIP as reference.py wants
    them, with the class token that reads patches."""
    raw = {name.removeprefix("module."): tensor.double() for name, tensor in raw.items()}
    clip = {name[5:]: tensor for name, tensor in raw.items() if name.startswith("clip.")}
    clip["visual.class_embedding"] = raw["vit.cls_token"].flatten()
    return raw, clip


def authors_patches(clip, image, gelu, colors):
    """Z (D, h, w) of an image (3, H, W): MaskCLIP's, with eps 1e-6 in the blocks' layer norms."""
    def normed(norm, x):
        return reference.layer_norm(clip, norm, x, eps=1e-6)

    def through_mlp(key, x):
        hidden = gelu(reference.linear(clip, key + "mlp.c_fc.", normed(key + "ln_2.", x)))
        return x + reference.linear(clip, key + "mlp.c_proj.", hidden)

    x, size = reference.embedded(clip, reference.normalized(image, colors))
    *keys, last = reference.block_keys(clip, "visual.transformer")
    for key in keys:
        x = x + reference.attention(clip, key + "attn.", normed(key + "ln_1.", x), causal=False)
        x = through_mlp(key, x)

    weight = clip[last + "attn.in_proj_weight"][256:]
    value = normed(last + "ln_1.", x[1:]) @ weight.T + clip[last + "attn.in_proj_bias"][256:]
    x = through_mlp(last, x[1:] + reference.linear(clip, last + "attn.out_proj.", value))
    x = reference.layer_norm(clip, "visual.ln_post.", x) @ clip["visual.proj"]
    return F.normalize(x, dim=1).T.reshape(-1, *size)


def authors_W_r(raw, clip, names, tokenizer):
    """[name, EOT] cut to three tokens and read at the largest, whether EOT is there or not."""
    rows = []
    for name in names:
        three = [*tokenizer.encode(name), tokenizer.end, 0, 0][:3]
        read = three[:three.index(max(three)) + 1]
        prompt = raw["text_encoder.prompt_token"][0]
        rows.append(reference.prompted_vector(clip, prompt, read))
    W_r = torch.stack(rows)
    return W_r / W_r.square().sum().sqrt()


def convolved(weight, bias, x):
    """(O, I, k, k), (O,), (I, h, w) -> (O, h, w), shift by shift, in a frame of zeros."""
    side = weight.shape[-1]
    h, w = x.shape[1:]
    framed = F.pad(x, 4 * (side // 2,))
    out = bias[:, None, None]
    for dy in range(side):
        for dx in range(side):
            shifted = framed[:, dy:dy + h, dx:dx + w]
            out = out + torch.einsum("oi,ihw->ohw", weight[:, :, dy, dx], shifted)
    return out


def batch_normed(tensors, name, x):
    """(..., channels, h, w) by the statistics that are kept."""
    mean, variance, weight, bias = (
        tensors[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def authors_M_p(raw, clip, h, w):
    x = reference.positional_table(clip, h, w)
    for i in (0, 3, 6):
        x = convolved(raw[f"proj_net.{i}.weight"], raw[f"proj_net.{i}.bias"], x)
        x = batch_normed(raw, f"proj_net.{i + 1}", x).clamp(min=0)
    return x


def authors_student(raw, image):
    """Z^ (D, h, w) of an image (3, H, W), normalized."""
    raw = {name: tensor.double() for name, tensor in raw.items()}

    def layer(x, conv, norm, stride=1, dilation=1):
        weight = raw[f"{conv}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return batch_normed(raw, norm, F.conv2d(x, weight, None, stride, padding, dilation))

    x = image[None]
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = layer(x, f"backbone.stem.{i}", f"backbone.stem.{i + 1}", stride).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, (blocks, _, first_stride, first_dilation, dilation) in enumerate(STAGES):
        for b in range(blocks):
            name = f"backbone.res_layers.{stage}.{b}"
            shortcut, how = x, (1, dilation)
            if b == 0:
                how = (first_stride, first_dilation)
                shortcut = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", first_stride)
            x = layer(x, f"{name}.conv1", f"{name}.norm1").relu()
            x = layer(x, f"{name}.conv2", f"{name}.norm2", *how).relu()
            x = (layer(x, f"{name}.conv3", f"{name}.norm3") + shortcut).relu()

    total = 0
    for i, rate in enumerate((6, 12, 18, 24)):
        total = total + layer(x, f"{ASPP}.{i}.conv", f"{ASPP}.{i}.norm", 1, rate).relu()
    return F.normalize(total[0], dim=0)


@pytest.fixture(scope="module")
def authors_files(make_clip, merges, tmp_path_factory):
    """({kind: tensors of a file}, the folder that they were converted into, the tokenizer).

    The folder has been moved, and the files deleted. They bring no vocabulary: OpenAI's is replaced
    by that of the tests, with which most names of VOC are longer than three tokens.
    """
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(7)
    clip = make_clip(context=77)
    raw = {
        "rectification": a_rectification(clip, 20),
        "student": a_student(20),
        "sequel": a_sequel(clip, 20),
    }
    for name, tensors in raw.items():
        torch.save(tensors, folder / name)

    with pytest.MonkeyPatch.context() as patch:
        tokenizer = Tokenizer(merges)
        patch.setattr(Tokenizer, "from_file", lambda: tokenizer)
        files = [str(folder / name) for name in raw]
        out = str(folder / "first")
        published.main([*files[:2], "--data", "voc", "--out", out, "--device", "cpu"])
        plusplus.main(
            ["--published", files[2], "--data", "voc", "--out", out + "/sequel", "--device", "cpu"]
        )
        for name in raw:
            (folder / name).unlink()
        (folder / "first").rename(folder / "moved")
        yield raw, folder / "moved", tokenizer


IMAGE = torch.rand(3, 19, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def authors_logits(raw, tokenizer, W_q, gelu, colors):
    """M_q, M_r, M_p, M and Z of IMAGE, as the authors' code computes them."""
    raw, clip = in_words(raw)
    Z = authors_patches(clip, IMAGE, gelu, colors)
    W_r = authors_W_r(raw, clip, VOC_CLASSES, tokenizer)
    M_p = authors_M_p(raw, clip, *Z.shape[1:])
    M = reference.rectified_logits(Z, W_q, W_r, M_p)
    return torch.tensordot(W_q, Z, dims=1), torch.tensordot(W_r, Z, dims=1), M_p, M, Z


def assert_logits(model, expected):
    """All parts of a ReCLIP's Output on IMAGE; biases are folded in float32, hence 1e-6."""
    for found, part in zip(model.double()(IMAGE[None]), expected):
        close(found[0], part, 1e-6)


def test_a_converted_rectification_is_the_authors_own_computation(authors_files):
    raw, folder, tokenizer = authors_files

    model = ReCLIP.load(folder / "rectify.pt")

    assert model.class_names == VOC_CLASSES and not model.training
    assert model.protocol == {
        "long_side": 2048, "short_side": 512, "antialias": False, "denoise": 0.5,
    }
    how = (reference.exact_gelu, reference.IMAGENET_COLORS)
    expected = authors_logits(raw["rectification"], tokenizer, model.W_q.double(), *how)
    assert_logits(model, expected)


def test_the_query_of_a_published_file_is_made_by_its_own_text_tower(authors_files):
    raw, folder, tokenizer = authors_files

    found = ReCLIP.load(folder / "rectify.pt").W_q[[7, 11]].double()

    _, clip = in_words(raw["rectification"])
    close(found, reference.query_heads(clip, tokenizer, ["cat", "dog"], PROMPTS), 1e-6)


def test_a_rectification_of_the_recipe_2025(authors_files, tmp_path):
    raw, _, tokenizer = authors_files
    torch.save({"state_dict": raw["rectification"]}, tmp_path / "a.pth")
    W_q = F.normalize(torch.randn(20, 12), dim=1)

    model = published.rectification(tmp_path / "a.pth", VOC_CLASSES, "2025", W_q)

    how = (reference.quick_gelu, reference.CLIP_COLORS)
    expected = authors_logits(raw["rectification"], tokenizer, W_q.double(), *how)
    assert_logits(model, expected)


def test_a_converted_student_is_the_authors_own_computation(authors_files):
    raw, folder, tokenizer = authors_files
    image = torch.rand(3, 33, 50, dtype=torch.float64)

    student = DeepLabV2.load(folder / "distill.pt").double()

    assert student.protocol == {
        "long_side": 2048, "short_side": 512, "antialias": False, "denoise": 0.0,
    }
    Z = authors_student(raw["student"], reference.normalized(image, reference.IMAGENET_COLORS))
    W_r = authors_W_r(*in_words(raw["rectification"]), VOC_CLASSES, tokenizer)
    W_q = ReCLIP.load(folder / "rectify.pt").W_q.double()
    with torch.no_grad():
        found = student(image[None])
    close(found.features[0], Z, 1e-6)
    close(found.rectified[0], reference.student_logits(Z, W_q, W_r), 1e-6)


def test_a_converted_sequel_is_the_authors_own_computation(authors_files):
    raw, folder, tokenizer = authors_files

    model = plusplus.ReCLIPPlusPlus.load(folder / "sequel/reclip++.pt")

    assert model.protocol == {
        "long_side": 2048, "short_side": 336, "antialias": False, "denoise": 1.0,
    }
    assert (model.scale, model.options.tau_1) == (10, 0.01)
    own, clip = in_words(raw["sequel"])
    Z = authors_patches(clip, IMAGE, reference.quick_gelu, reference.CLIP_COLORS)
    p = reference.positional_table(clip, *Z.shape[1:])
    P = convolved(own["pe_proj.weight"], own["pe_proj.bias"], p)
    M_q = torch.tensordot(model.W_q.double(), Z, dims=1)
    M_b = torch.tensordot(authors_W_r(own, clip, VOC_CLASSES, tokenizer), P, dims=1)
    stacked = torch.cat([Z, M_q - M_b])
    M = convolved(own["decoder_conv2.weight"], own["decoder_conv2.bias"], stacked)
    nothing = torch.zeros(1, *Z.shape[1:])
    assert_logits(model, [M_q, M_b, nothing.double(), batch_normed(own, "decoder_norm2", M), Z])


def read_student(path, class_names):
    return published.student(path, class_names, torch.zeros(20, 12), torch.zeros(20, 12))


@pytest.mark.parametrize("read, kind, words", [
    (published.rectification, "student", "it has no text_encoder.prompt_token"),
    (read_student, "rectification", "is not a student of ReCLIP's authors"),
    (read_student, "student", "was learnt for 20 classes, and 3 are named"),
    (plusplus.published, "rectification", "it has no pe_proj.weight"),
    (plusplus.published, "sequel", "was learnt for 20 classes, and 3 are named"),
])
def test_one_file_given_as_another_is_refused(authors_files, tmp_path, read, kind, words):
    torch.save(authors_files[0][kind], tmp_path / "a.pth")

    with pytest.raises(ValueError) as failed:
        read(tmp_path / "a.pth", ["cat", "dog", "grass"])

    assert words in sentence(failed)


def test_a_hostile_file_runs_nothing(hostile, tmp_path):
    torch.save({"state_dict": hostile.payload}, tmp_path / "a.pth")

    with pytest.raises(ValueError, match="damaged, or no file of tensors"):
        published.rectification(tmp_path / "a.pth", VOC_CLASSES)

    assert not hostile.ran()


# --- plusplus -------------------------------------------------------------------------------------

@pytest.fixture
def sequel(clip):
    """sequel(**options) -> a ReCLIP++ in float64 with random numbers in all that learns."""

    def make(**options):
        W_q = F.normalize(torch.randn(4, 12), dim=1)
        model = plusplus.ReCLIPPlusPlus(
            clip.double(), ["cat", "dog | tree", "grass of", "photo"], W_q=W_q, prompt_length=5,
            **options,
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subtract", [True, False])
def test_rectify_is_the_formulas_of_the_sequel(sequel, training, subtract):
    model = sequel(subtract=subtract).train(training)
    state, clip = model.learnt(), model.clip.state_dict()
    images = torch.rand(2, 3, 21, 34, dtype=torch.float64)

    norm = model.decoder[1]
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        found = model(images)

    endings = []
    for name in ("cat", "dog", "grass of", "photo"):  # of synonyms the first
        endings.append([*model.clip.tokenizer.encode(name), model.clip.eot])
    W_r = reference.reference_heads(clip, state["reference.vectors"], endings)
    decoded = []
    for image, query, bias, Z in zip(images, found.query, found.reference, found.features):
        pixels = reference.normalized(image)
        expected = F.normalize(reference.patch_vectors(clip, pixels), dim=0)
        close(Z, expected)
        p = reference.positional_table(clip, *Z.shape[1:])
        P = convolved(state["positional.weight"], state["positional.bias"], p)
        M_q = torch.tensordot(state["W_q"], Z, dims=1)
        M_b = torch.tensordot(W_r, P, dims=1)
        close(query, M_q)
        close(bias, M_b)
        M = M_q - M_b if subtract else M_q + M_b
        stacked = torch.cat([Z, M])
        decoded.append(convolved(state["decoder.0.weight"], state["decoder.0.bias"], stacked))
    decoded = torch.stack(decoded)                                      # (B, C, h, w)

    if training:
        mean = decoded.mean((0, 2, 3))
        variance = decoded.var((0, 2, 3), unbiased=False)
    kept = {"n.running_mean": mean, "n.running_var": variance}
    kept |= {"n.weight": norm.weight.detach(), "n.bias": norm.bias.detach()}
    close(found.rectified, batch_normed(kept, "n", decoded))
    assert not found.positional.any()


def test_prompt_projection_and_decoder_learn_and_nothing_else(sequel):
    """As many numbers as in the published files: there 697,164."""
    model = sequel().train()
    Z = model.features(torch.rand(2, 3, 21, 34, dtype=torch.float64))
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.options.tau_1)
    labels = torch.ones(2, 4, dtype=torch.bool)

    contrastive_loss(masked_features(Z, masks), model.W_q, labels, model.tau).backward()

    reached = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in reached} == {"reference", "positional", "decoder"}
    L, E_t, D, E_v, C = 5, 128, 12, 128, 4
    count = L * E_t + D * E_v + D + C * (D + C) * 25 + C + 2 * C
    assert sum(p.numel() for p in reached.values()) == count


def test_the_decoder_starts_as_kaiming_with_fan_out(make_clip):
    """std sqrt(2 / (25 C)), here .063; with fan_in it would be .01."""
    clip = make_clip(embed_dim=512)
    model = plusplus.ReCLIPPlusPlus(clip, VOC_CLASSES, W_q=torch.zeros(20, 512))

    weight = model.decoder[0].weight

    assert weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.01)


@pytest.mark.parametrize("data, denoise, side", [
    ("voc", 1.0, 336), ("context", 0.85, 480), ("ade20k", 0.5, 512),
])
def test_the_numbers_of_the_sequel(data, denoise, side):
    """As released: windows of a sixth of the crop, in whole pixels; else the recipe 2025."""
    changes = plusplus.changes_of(DATA[data])
    window = changes.pop("label_window")
    options, settings = train.hyper_parameters(DATA[data], "2025", **changes)

    assert window == side // 6 and settings.crop == side
    assert (settings.denoise, settings.lr, options.tau_1) == (denoise, 0.01, 0.01)


@pytest.mark.parametrize("height, width, side", [
    (375, 500, 56), (57, 140, 56), (64, 64, 24), (99, 61, 25), (56, 500, 56), (500, 40, 56),
])
def test_windows_begin_every_half_side_below_the_end(height, width, side):
    expected = []
    for y in range(height):
        for x in range(width):
            on_grid = y % (side // 2) == 0 and x % (side // 2) == 0
            if on_grid and y + side < height and x + side < width:
                expected.append((y, x))

    assert plusplus.window_corners(height, width, side) == expected
    if (height, width) == (375, 500):
        assert len(expected) == 12 * 16


def labels_in_words(model, image, side):
    """The best text of each window of an image uint8 (3, H, W), one window at a time."""
    corners = plusplus.window_corners(*image.shape[1:], side)
    windows = [image[:, y:y + side, x:x + side] for y, x in corners] or [image]
    best = set()
    for window in windows:
        window = v2.functional.resize(window, [12, 12], InterpolationMode.BICUBIC, antialias=True)
        pixels = reference.normalized(window.double() / 255)
        vector = reference.image_vector(model.clip.double().state_dict(), pixels)
        best.add((model.W_q.double() @ vector).argmax().item())
    model.clip.float()
    return sorted(best)


@pytest.fixture
def blocks(tmp_path):
    """A folder of images of random blocks, whose windows CLIP takes for different things."""
    rng = np.random.default_rng(0)
    (tmp_path / "blocks").mkdir()
    for name, (h, w) in {"b": (13, 10), "a": (4, 18), "c": (7, 8)}.items():
        colors = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        image = Image.fromarray(colors.repeat(8, 0).repeat(8, 1))
        image.save(tmp_path / f"blocks/{name}.png")
    return tmp_path / "blocks"


def spread(clip):
    """Random texts around the middle of random images: they are the best of different ones."""
    images = F.interpolate(4 * torch.rand(8, 3, 3, 3) - 2, 12)
    vectors = clip.encode_image(images)
    W_q = F.normalize(vectors - vectors.mean(0), dim=1)
    return plusplus.ReCLIPPlusPlus(clip, [f"cat{i}" for i in range(8)], W_q=W_q, prompt_length=5)


def test_labels_are_the_best_texts_of_all_windows(clip, blocks, make_voc, tmp_path):
    """A benchmark's images are cut as they are; your own are resized as for training before, and
    a.png is then too small for a window."""
    model = spread(clip)
    _, settings = train.hyper_parameters(
        DATA["voc"], rectify_long_side=100, rectify_short_side=80
    )
    voc = open_split("voc", make_voc({"train": 2}), "train")
    own = open_split(str(blocks), None, "train")

    of_voc = plusplus.label_by_windows(model, voc, settings, 20, tmp_path / "voc.json")
    of_own = plusplus.label_by_windows(model, own, settings, 24, tmp_path / "own.json")

    for i, name in enumerate(voc.names):
        expected = labels_in_words(model, voc.image(i), 20)
        assert of_voc[name].nonzero()[:, 0].tolist() == expected
    sizes = {"a.png": [22, 100], "b.png": [100, 77], "c.png": [80, 91]}
    for i, name in enumerate(own.names):
        image = v2.functional.resize(own.image(i), sizes[name], antialias=True)
        assert of_own[name].nonzero()[:, 0].tolist() == labels_in_words(model, image, 24)
    assert of_own["b.png"].sum() > 1


def test_a_stopped_sequel_goes_on_to_the_bit(blocks, tiny_clip_file, tmp_path, monkeypatch):
    """And its windows are read once; the CLIP stays as it was."""
    dataset = replace(own_images("blocks", ["cat", "dog", "grass"]), prompts=("a photo of a {}",))
    given = {
        "label_window": 24, "rectify_epochs": 3, "crop": 16, "rectify_batch": 1,
        "rectify_short_side": 40,
    }

    def training(out, resume=False):
        run = train.Run("reclip++", tmp_path / out, resume=resume)
        split = open_split(str(blocks), None, "train")
        return plusplus.train(dataset, split, load_clip(tiny_clip_file), run, **given)

    whole = training("whole")
    steps = []

    def stopped(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return contrastive_loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "contrastive_loss", stopped)
        training("parts")
    monkeypatch.setattr(plusplus, "Windows", None)  # none is read again
    training("parts", resume=True)

    parts = plusplus.ReCLIPPlusPlus.load(tmp_path / "parts/reclip++.pt").learnt()
    for name, tensor in whole.learnt().items():
        assert torch.equal(tensor, parts[name]), name
    assert whole.clip.identity() == load_clip(tiny_clip_file).identity()


def test_the_program_trains_evaluates_and_segments(small_shapes, blocks, tmp_path):
    out = tmp_path / "out"
    plusplus.main(["--epochs", "1", "--device", "cpu", "--out", str(out)])
    first = json.loads((out / "eval_reclip++.json").read_text())
    (out / "eval_reclip++.json").unlink()
    checkpoint = str(out / "reclip++.pt")

    plusplus.main(["--evaluate", "--device", "cpu", "--checkpoint", checkpoint])
    plusplus.main(["--images", str(blocks), "--device", "cpu", "--checkpoint", checkpoint])

    assert json.loads((out / "eval_reclip++.json").read_text()) == first
    assert first["protocol"]["images"] == 4 and first["protocol"]["denoise"] == 0
    made = {path.name for path in (out / "masks/reclip++").iterdir()}
    assert {f"{name}.png.index.png" for name in "abc"} < made
    with pytest.raises(ValueError) as failed:
        ReCLIP.load(checkpoint)
    assert "is of the stage reclip++, not rectify" in sentence(failed)


# --- paper ----------------------------------------------------------------------------------------

def test_objects_are_counted_by_their_distance_from_the_center():
    """Figure 1(a) against sets of pixels, over three images."""
    edges = [0, 0.1, 0.3, 1]
    counts = torch.zeros(3, 5, 2, dtype=torch.int64)
    slow = Counter()
    for H, W in ((12, 17), (20, 9), (8, 30)):
        truth = torch.full((H, W), IGNORE, dtype=torch.uint8)
        for c in torch.randperm(5)[:3].tolist():
            y, x = torch.randint(0, H - 4, ()), torch.randint(0, W - 4, ())
            truth[y:y + 5, x:x + 4] = c
        prediction = torch.randint(0, 5, (H, W))

        counts += paper.distance_counts(prediction, truth, 5, edges)

        valid = [(y, x) for y in range(H) for x in range(W) if truth[y, x] != IGNORE]
        for c in range(5):
            of_class = {p for p in valid if truth[p] == c}
            claimed = {p for p in valid if prediction[p] == c}
            if of_class:
                y = sum(p[0] + 0.5 for p in of_class) / len(of_class) - H / 2
                x = sum(p[1] + 0.5 for p in of_class) / len(of_class) - W / 2
                distance = math.hypot(y, x) / (math.hypot(H, W) / 2)
                place = sum(distance >= edge for edge in edges[1:-1])
                slow[place, c, 0] += len(of_class & claimed)
                slow[place, c, 1] += len(of_class | claimed)

    for place, c, kind in np.ndindex(3, 5, 2):
        assert counts[place, c, kind] == slow[place, c, kind]
    for place, miou in enumerate(paper.distance_miou(counts).tolist()):
        ious = [slow[place, c, 0] / slow[place, c, 1] for c in range(5) if slow[place, c, 1]]
        assert miou == pytest.approx(sum(ious) / len(ious) if ious else math.nan, nan_ok=True)


@pytest.mark.parametrize("column, place", [(3, 0), (4, 1), (5, 2), (6, 2)])
def test_a_bin_begins_at_its_edge(column, place):
    """Half a diagonal of 6 x 8 is 5; the centroid of these two columns lies at column + 1."""
    truth = torch.full((6, 8), IGNORE)
    truth[:, column:column + 2] = 1

    counts = paper.distance_counts(truth, truth, 2, [0, 0.2, 0.4, 0.5])

    assert counts[place, 1].tolist() == [12, 12] and counts.sum() == 24


def test_most_confused_classes_by_a_greedy_loop():
    """Class 6 never occurs; the diagonal does not count."""
    confusion = torch.randint(0, 50, (7, 7)) + 500 * torch.eye(7).long()
    confusion[6] = 0

    pairs = {}
    for i in range(6):
        for j in range(i):
            pairs[i, j] = confusion[i, j] / confusion[i].sum()
            pairs[i, j] += confusion[j, i] / confusion[j].sum()
    for k in (2, 3, 5):
        chosen = set()
        for pair in sorted(pairs, key=pairs.get, reverse=True):
            if len(chosen | set(pair)) <= k:
                chosen |= set(pair)
        assert paper.most_confused(confusion, k) == sorted(chosen)
    assert paper.most_confused(confusion, 9) == list(range(7))


def patch_by_patch(state, tokens, size, name):
    """SCLIP, ClearCLIP, NACLIP: what each patch reads in the last block, head by head.

    tokens (1 + n, 128): before that block, which has 2 heads -> (n, 128)
    """
    key = "visual.transformer.resblocks.1."
    y = reference.layer_norm(state, key + "ln_1.", tokens)
    projected = y @ state[key + "attn.in_proj_weight"].T + state[key + "attn.in_proj_bias"]
    read = torch.zeros_like(tokens)
    for head in (0, 64):
        q, k, v = (projected[:, part + head:part + head + 64] for part in (0, 128, 256))
        for alike in {"sclip": (q, k), "clearclip": (q,), "naclip": (k,)}[name]:
            for i in range(1, len(tokens)):
                scores = alike @ alike[i] / 8  # the root of 64
                for j in range(1, len(tokens)):
                    (y_i, x_i), (y_j, x_j) = divmod(i - 1, size[1]), divmod(j - 1, size[1])
                    if name == "naclip":
                        scores[j] += math.exp(-((y_i - y_j) ** 2 + (x_i - x_j) ** 2) / (2 * 25))
                weights = scores.exp() / scores.exp().sum()
                read[i, head:head + 64] += weights @ v

    x = reference.linear(state, key + "attn.out_proj.", read)[1:]
    if name == "sclip":
        x = x + tokens[1:]
        x = x + reference.mlp(state, key, x, reference.quick_gelu)
    return x


@pytest.mark.parametrize("name", ["sclip", "clearclip", "naclip"])
@pytest.mark.parametrize("height, width", [(13, 22), (20, 8)])  # grids of 4 x 6 and 5 x 2
def test_later_attention_patch_by_patch(clip, name, height, width):
    clip.double()
    state = clip.state_dict()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)

    found = clip.encode_image_dense(images, attention=paper.ATTENTIONS[name])

    for image, Z in zip(images, found):
        tokens, size = reference.embedded(state, image)
        tokens = reference.block(
            state, "visual.transformer.resblocks.0.", tokens, reference.quick_gelu
        )
        x = patch_by_patch(state, tokens, size, name)
        x = reference.layer_norm(state, "visual.ln_post.", x) @ state["visual.proj"]
        close(Z, x.T.reshape(-1, *size))


class Directions(DeepLabV2):
    """A student whose features are a direction for each gray value, which no text knows."""

    def features(self, images, valid=None):
        levels = (images[:, 0, 2::4, 2::4] * 2).round().long()          # (B, h, w), 0..2
        return torch.eye(6)[[4, 1, 5]][levels].permute(0, 3, 1, 2)      # (B, 6, h, w)


def test_linear_classification_learns_what_can_be_told_and_reads_no_ignored_pixel():
    truths = torch.randint(0, 3, (6, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2).byte()

    def classified(hidden):
        torch.manual_seed(0)
        student = Directions(list("abc"), torch.zeros(3, 6), torch.zeros(3, 6), student="tiny")
        pairs = []
        for truth in truths:
            image, shown = truth / 2, truth.clone()
            image[:, 16:], shown[:, 16:] = hidden, IGNORE
            pairs.append((image.expand(3, -1, -1), shown, "name"))
        return paper.linear_classification(student, pairs, epochs=20, lr=0.1)

    student = classified(hidden=0.0)

    images = (truths / 2)[:, None].expand(-1, 3, -1, -1)
    masks = student.to_pixels(student(images).rectified, 16, 20).argmax(1)
    assert torch.equal(masks[:, 2::4, 2::4], truths[:, 2::4, 2::4].long())
    assert torch.equal(student.classifier.weight, classified(hidden=1.0).classifier.weight)


def test_other_labels_are_the_same_ones_on_other_images():
    labels = {name: torch.tensor(i) for i, name in enumerate("abcdef")}

    dealt = paper.shuffled(labels, list("abcdef"), seed=3)

    assert list(dealt) == list("abcdef")
    assert sorted(dealt.values()) == sorted(labels.values()) != list(dealt.values())


class InThisProcess:
    """In the place of ProcessPoolExecutor, where small_shapes would not reach."""

    def __init__(self, *unused):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass

    def map(self, function, jobs):
        return [function(pickle.loads(pickle.dumps(job))) for job in jobs]


FEW_STEPS = ["--device", "cpu", "--epochs", "1", "--seeds", "1", "--out"]


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory):
    """What `python extras/paper.py` leaves on small shapes, one epoch, one seed."""
    out = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch, fewer_shapes():
        patch.setattr(paper, "ProcessPoolExecutor", InThisProcess)
        paper.main([*FEW_STEPS, str(out)])
        yield out


@pytest.fixture
def evidence(all_rows, tmp_path):
    """A copy of it: (arguments that made it, <out>/paper)"""
    shutil.copytree(all_rows, tmp_path / "out")
    return [*FEW_STEPS, str(tmp_path / "out")], tmp_path / "out/paper"


def miou_in_words(logits_of):
    """On the test images, with logits_of(image (1, 3, 64, 64)) -> (C, 8, 8); percent."""
    both, either, seen = Counter(), Counter(), set()
    for image, truth, _ in Evaluation(open_split("shapes", None, "test"), 64, 64, True):
        with torch.no_grad():
            mask = reference.enlarge(logits_of(image[None]).double(), 8, 64, 64).argmax(0)
        for c in range(8):
            of_class, claimed = truth == c, (mask == c) & (truth != IGNORE)
            both[c] += (of_class & claimed).sum().item()
            either[c] += (of_class | claimed).sum().item()
            if of_class.any():
                seen.add(c)
    return 100 * sum(both[c] / either[c] for c in seen) / len(seen)


def lines_of(path):
    """{first cell: all cells} of a CSV"""
    with open(path, encoding="utf-8") as file:
        return {line[0]: line for line in csv.reader(file)}


def test_the_tables_say_what_the_checkpoints_do(evidence, small_shapes):
    folder = evidence[1]
    clip, shapes_data = load_clip(DATA["shapes"].clip), DATA["shapes"]
    plain = ReCLIP(clip, SHAPES_CLASSES, prompts=shapes_data.prompts, recipe="2025").eval()
    images = torch.stack([open_split("shapes", None, "train").image(i) for i in range(6)])
    with torch.no_grad():
        mean = plain(images.float() / 255).query.mean((0, 2, 3))[:, None, None]
    both = ReCLIP.load(folder / "seed0/both/rectify.pt", clip)
    learnt = torch.load(folder / "seed0/one_number/rectify.pt", weights_only=True)["learnt"]
    number = 0.1 * learnt["positional.numbers"][:, None, None]
    naclip = ReCLIP.load(
        folder / "seed0/naclip_rectified/rectify.pt", clip, attention=paper.naclip
    )

    expected = {
        "table4": {"clip": lambda x: plain(x).query[0], "both": lambda x: both(x).rectified[0]},
        "controls": {
            "one_number": lambda x: plain(x).query[0] - number,
            "mean_logit": lambda x: plain(x).query[0] - mean,
        },
        "attention": {"naclip_rectified": lambda x: naclip(x).rectified[0]},
    }
    for table, rows in expected.items():
        lines = lines_of(folder / f"{table}.csv")
        for name, logits_of in rows.items():
            line = lines[paper.ROWS[name].title]
            miou = miou_in_words(logits_of)
            assert float(line[1]) == float(line[3]) == pytest.approx(miou), name
    assert number.any() and lines["row"] == ["row", "mean", "paper, voc", "seed 0"]


def test_a_report_made_again_is_the_same_to_the_byte(evidence, small_shapes):
    arguments, folder = evidence
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "seed0/both/result.json").unlink()
    (folder / "seed0/clip/result.json").write_text("{")  # cut off

    paper.main([*arguments, "--report-only"])

    assert {path: path.read_bytes() for path in before} == before
    names = {path.name for path in before}
    assert names == {"report.md", *(f"{key}.csv" for key in paper.TABLES)} | {
        "figure1a.png", "figure1b.png", "figure3.png",
    }


def test_without_students_only_their_rows_are_missing(evidence, small_shapes, capsys):
    paper.main([*evidence[0], "--report-only", "--rectification-only"])

    printed = capsys.readouterr().out
    assert "## Table 4: the two biases" in printed and "rectified CLIP" in printed
    for title in ("Table 1:", "Table 6:", "Table 7:", "distilled"):
        assert title not in printed


def test_another_checkpoint_is_measured_anew(evidence, small_shapes):
    arguments, folder = evidence
    rows = [paper.ROWS[name].title for name in ("added", "both")]
    before = lines_of(folder / "table5.csv")
    shutil.copy(folder / "seed0/both/rectify.pt", folder / "seed0/added/rectify.pt")

    paper.main([*arguments, "--report-only"])

    after = lines_of(folder / "table5.csv")
    assert after[rows[0]][3] == after[rows[1]][3] == before[rows[1]][3] != before[rows[0]][3]


def test_a_row_is_trained_once_and_a_missing_one_is_named(evidence, small_shapes, monkeypatch):
    arguments, folder = evidence
    monkeypatch.setattr(paper, "ProcessPoolExecutor", InThisProcess)
    files = [*folder.glob("seed0/*/*.pt"), *folder.glob("seed0/*/*.json")]
    times = {path: path.stat().st_mtime_ns for path in files}
    (folder / "seed0/added/rectify.pt").unlink()

    with pytest.raises(FileNotFoundError) as failed:
        paper.main([*arguments, "--report-only"])
    assert "added/rectify.pt is missing: run the same command without" in sentence(failed)
    paper.main(arguments)

    changed = {path for path in times if times[path] != path.stat().st_mtime_ns}
    assert {path.parent.name for path in changed} == {"added"}


# --- benchmark ------------------------------------------------------------------------------------

def test_the_plain_step_is_ours():
    """Image by image, class by class, all 77 tokens: the same loss and gradients."""
    names = ["box", "gem", "star fish"]
    ours, plain = (benchmark.Step(kind, names, 40, 2, True, "cpu") for kind in ("ours", "plain"))

    for _ in range(2):
        ours()
        plain()

        assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
        for p, q in zip(ours.parameters, plain.parameters):
            assert (p.grad - q.grad).norm() < 1e-3 * q.grad.norm()


def test_the_timed_step_is_the_training_loops():
    """our_loss spells model.rectify out, to time its parts."""
    model = benchmark.build_model(["box", "gem", "star"], True, "cpu")
    Z = model.features(torch.rand(1, 3, 64, 40))
    labels = torch.tensor([[True, False, True]])

    torch.manual_seed(0)
    loss = benchmark.our_loss(model, Z, labels, lambda part: None)

    torch.manual_seed(0)
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.options.tau_1)
    assert loss == contrastive_loss(masked_features(Z, masks), model.W_q, labels, model.tau)


def test_the_quick_benchmark_needs_no_file_and_writes_all_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "nothing"))
    path = tmp_path / "new/benchmark.json"

    benchmark.main(["--quick", "--device", "cpu", "--json", str(path)])

    report = json.loads(path.read_text())
    voc = report["rectification"]["voc"]
    for kind in ("ours", "plain"):
        seconds = [voc["seconds"][kind][part]["min"] for part in benchmark.PARTS]
        assert min(seconds) > 0
        assert sum(seconds[:-1]) == pytest.approx(seconds[-1])  # one round: parts make the step
    assert voc["classes"] == 20 and voc["loss"] == pytest.approx(voc["plain_loss"], rel=1e-4)
    assert report["evaluation"]["min"] > 0 and report["data"]["min"] > 0
    assert report["distillation"]["seconds"]["min"] > 0


def test_labels_by_windows_are_made_anew_for_other_sides_or_windows(clip, blocks, tmp_path):
    model, path = spread(clip), tmp_path / "labels.json"
    own = open_split(str(blocks), None, "train")
    made = []
    for short_side, side in ((80, 24), (40, 24), (40, 20)):
        _, settings = train.hyper_parameters(
            DATA["voc"], rectify_long_side=100, rectify_short_side=short_side
        )
        plusplus.label_by_windows(model, own, settings, side, path)
        made.append(json.loads(path.read_text())["identity"])
    assert made[0] != made[1] != made[2]


def test_a_converted_checkpoint_says_where_its_clip_is(clip, tmp_path):
    """So it can be copied elsewhere without the CLIP."""
    model = ReCLIP(clip, ["cat", "dog"], W_q=torch.eye(2, 12), prompt_length=2)
    published.save_with_clip(model, tmp_path / "first" / "rectify.pt")
    content = torch.load(tmp_path / "first" / "rectify.pt", weights_only=True)
    assert content["clip"]["source"] == str((tmp_path / "first" / "clip.pt").resolve())
