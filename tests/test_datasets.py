"""datasets.py: layouts, labels and their preparation, odd pictures, the training stream, the miniature world."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import pretrain
from datasets import (IGNORE, Augment, Evaluation, Folder, Thumbnails, TrainingStream, decode_rle, open_split,
                      own_facts, prepare, read_classes, resize_short_side, verify, voc_palette)


@pytest.fixture
def voc_root(make_voc):
    return make_voc({"train": 5, "val": 3})


def test_palette_matches_the_published_colours():
    """Colours as printed in VOC's development kit; they are not computed here."""
    palette = voc_palette()
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
                 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {i: palette[i] for i in published} == published
    assert datasets.DATA["voc"].palette[14] == (192, 128, 128) and len(datasets.DATA["voc"].palette) == 20


def test_label_values(voc_root):
    """0 and 255 are ignored, value v is class v - 1, and the index is read, not the colour."""
    split = open_split("voc", voc_root, "val")
    raw = np.array(Image.open(split.labels[0]))
    label = split.label(0).numpy()
    for value in (0, 1, 7, 20, 255):
        assert (raw == value).any()
        assert set(label[raw == value]) == {IGNORE if value in (0, 255) else value - 1}


def test_training_opens_no_label(voc_root):
    """With the label folder gone, training pictures still come; evaluation says what is missing."""
    shutil.rmtree(voc_root / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    stream = TrainingStream(open_split("voc", voc_root, "train"), Augment(2048, 64, 48), seed=0)
    assert [stream[s][0].shape for s in range(12)] == [(3, 48, 48)] * 12
    with pytest.raises(FileNotFoundError, match="SegmentationClass.*missing"):
        Evaluation(open_split("voc", voc_root, "val"), 64)[0]


def test_stream_is_a_function_of_seed_and_position(voc_root):
    """Item s does not depend on what was read before, every epoch holds each picture once, orders differ."""
    split = open_split("voc", voc_root, "train")
    make = lambda seed: TrainingStream(split, Augment(2048, 64, 48), seed)
    forward = [make(3)[s] for s in range(15)]
    stream = make(3)
    for s in (14, 2, 7):
        torch.rand(5)  # the global generator must not matter
        assert torch.equal(stream[s][0], forward[s][0]) and stream[s][1] == forward[s][1]
    epochs = [[name for _, name in forward[i:i + 5]] for i in (0, 5, 10)]
    assert all(sorted(epoch) == sorted(split.names) for epoch in epochs) and epochs[0] != epochs[1]
    assert not torch.equal(make(4)[0][0], forward[0][0])


def test_augment_sizes_and_range():
    """Small pictures are padded, large ones cropped; values stay in [0, 1]; crop 0 keeps size and place."""
    for size in ((20, 90), (400, 130), (1, 1)):
        out = Augment(2048, 64, 48)(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        assert out.shape == (3, 48, 48) and out.min() >= 0 and out.max() <= 1
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    out = Augment(0, 0, 0, flip=False, photometric=False)(picture)
    assert torch.allclose(out, picture / 255, atol=1e-6)


def test_resize_keeps_the_ratio_and_obeys_both_limits():
    """r in (1, 1): factor = min(long / max, short / min); a white picture shows its size inside the padding."""
    white = torch.full((3, 100, 300), 255, dtype=torch.uint8)
    out = Augment(120, 60, 200, ratio=(1.0, 1.0), flip=False, photometric=False)(white)  # factor 0.4: 40 x 120
    assert int((out == 1).all(0).sum()) == 40 * 120


def test_thumbnails_and_evaluation_sizes(voc_root):
    split = open_split("voc", voc_root, "val")
    assert Thumbnails(split, 32)[0][0].shape == (3, 32, 32)
    picture, label, name = Evaluation(split, 50)[0]
    H, W = split.label(0).shape
    assert min(picture.shape[1:]) == 50 and label.shape == (H, W) and name == split.names[0]
    assert abs(picture.shape[2] / picture.shape[1] - W / H) < 0.03


@pytest.mark.parametrize("damage, error, words", [
    (lambda b: shutil.rmtree(b), FileNotFoundError, "VOCdevkit/VOC2012"),
    (lambda b: (b / "ImageSets/Segmentation/val.txt").write_text(""), ValueError, "empty"),
    (lambda b: (b / "JPEGImages/val_0.jpg").unlink(), FileNotFoundError, "val_0.jpg"),
    (lambda b: (b / "JPEGImages/val_0.jpg").write_bytes(b"no picture"), ValueError, "val_0.jpg is not a readable"),
    (lambda b: Image.new("RGB", (30, 20)).save(b / "SegmentationClass/val_0.png"), ValueError, "mode RGB"),
    (lambda b: Image.fromarray(np.full((20, 30), 21, np.uint8)).save(b / "SegmentationClass/val_0.png"),
     ValueError, "value 21"),
    (lambda b: Image.fromarray(np.ones((9, 9), np.uint8)).save(b / "SegmentationClass/val_0.png"),
     ValueError, r"label is \(9, 9\)"),
])
def test_bad_input_is_named(voc_root, damage, error, words):
    damage(voc_root / "VOCdevkit" / "VOC2012")
    with pytest.raises(error, match=words) as caught:
        Evaluation(open_split("voc", voc_root, "val"), 64)[0]
    assert "\n" not in str(caught.value)


def test_real_voc_files(shared):
    """The real files: 3 train and 17 val pictures, label values as their provenance lists them."""
    root = shared("VOCdevkit").parent
    split = open_split("voc", root, "val")
    assert len(split) == 17 and len(open_split("voc", root, "train")) == 3
    label = split.label(i := split.names.index("2008_002536"))
    assert sorted(label.unique().tolist()) == [11, 16, 255] and split.picture(i).shape[1:] == label.shape


def test_shapes_are_a_function_of_split_and_index():
    """Drawn twice, in any order, a picture is the same; splits differ; labels hold classes and IGNORE only."""
    datasets.target_scene.cache_clear()
    first = [open_split("shapes", None, "val").picture(i) for i in (5, 2)]
    datasets.target_scene.cache_clear()
    split = open_split("shapes", None, "val")
    assert torch.equal(split.picture(2), first[1]) and torch.equal(split.picture(5), first[0])
    assert not torch.equal(open_split("shapes", None, "test").picture(2), first[1])
    labels = torch.stack([split.label(i) for i in range(100)])
    assert set(labels.unique().tolist()) == {*range(8), IGNORE}
    assert [len(open_split("shapes", None, name)) for name in ("train", "val", "test")] == [1000, 300, 500]


def test_labels_lie_on_the_objects():
    """A lone object in its hue on a grey ground: where the label says object, the picture is colourful."""
    rng = np.random.default_rng(0)
    thing = datasets.new_thing("box", 30, 24, 15, rng)
    picture, label = datasets.paint(64, "stone", [thing], rng)
    spread = picture.max(0).astype(int) - picture.min(0)
    inside = label == datasets.SHAPES_CLASSES.index("box")
    assert spread[inside].mean() > 2 * spread[label == IGNORE].mean() and 300 < inside.sum() < 900


def test_captions_speak_the_tokenizers_words():
    words = set(pretrain.shapes_words())
    for _, captions in (pretrain.web_scenes((0, 1), 50), pretrain.web_mosaics((0, 2), 10)):
        assert {word for caption in captions for word in caption.split()} <= words
        assert all(any(name in caption.split() for name in datasets.SHAPES_CLASSES) for caption in captions)


def test_close_ups_have_habits_and_targets_do_not():
    """First twins (coin, box, star, bee) stand in the upper half of mosaics only; on the target in both halves."""
    _, captions = pretrain.web_mosaics((3, 4), 50)
    first = [any(name in caption.split() for name in datasets.SHAPES_CLASSES[::2]) for caption in captions]
    assert all(first[i] == (i % 4 < 2) for i in range(len(first)))
    split = open_split("shapes", None, "train")
    labels = torch.stack([split.label(i) for i in range(300)])
    even = (labels != IGNORE) & (labels % 2 == 0)
    upper, lower = even[:, :32].sum().item(), even[:, 32:].sum().item()
    assert 0.85 < upper / lower < 1.18


SPELLING = {"airplane": "aeroplane", "potted plant": "pottedplant", "tv monitor": "tvmonitor"}  # of Context's JSON


# --- Facts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, names, side, denoise", [("voc", "voc20", 336, .5), ("context", "context59", 448, .6),
                                                        ("ade20k", "ade150", 512, .5)])
def test_classes_are_those_the_authors_prompt_with(shared, data, names, side, denoise):
    facts = datasets.DATA[data]
    assert list(facts.classes) == shared(f"classes/{names}_prompted.txt").read_text().split("\n")[:len(facts.classes)]
    assert (len(facts.palette), len(set(facts.palette))) == (len(facts.classes),) * 2
    assert (facts.short_side, facts.denoise, facts.splits) == (side, denoise, ("val",))


def test_context_ids_are_those_of_the_459_names(shared):
    """The raw list of 459 names gives each id its name; alphabetical order makes it the label's."""
    raw = dict(line.split(": ") for line in shared("classes/context459_raw_fcn.txt").read_text().strip().split("\n"))
    named = [raw[str(identity)].replace(" ", "") for identity in datasets.CONTEXT_IDS]
    spelt = [SPELLING.get(name, name) for name in datasets.CONTEXT_CLASSES]
    assert named == spelt == sorted(spelt) and len(spelt) == 59


def test_read_classes(tmp_path):
    assert read_classes(" cat, dog|puppy ,grass") == ("cat", "dog | puppy", "grass")
    (tmp_path / "own.txt").write_text("\ufeff# mine\ncat\n\n dog |puppy\n")
    assert read_classes(str(tmp_path / "own.txt")) == ("cat", "dog | puppy")
    facts = own_facts(["cat", "dog"])
    assert facts.classes == ("cat", "dog") and facts.palette == voc_palette()[1:3] and facts.splits == ()


@pytest.mark.parametrize("text", ["cat", "", "cat,,dog", "a|b, B", "a | , b", "a, a", "none.txt", "cat,"])
def test_bad_classes_are_named(text):
    with pytest.raises(ValueError, match=f"--classes {re.escape(text)}: needs two names or more, none empty"):
        read_classes(text)


def test_254_classes_fit():
    assert len(own_facts(map_ := [f"c{i}" for i in range(254)]).palette) == 254
    with pytest.raises(ValueError, match="--classes.*254"):
        own_facts([*map_, "one more"])


# --- Odd pictures -------------------------------------------------------------------------------------------

def corner(path):
    """The first pixel of the only picture."""
    return tuple(Folder(path).picture(0)[:, 0, 0].tolist())


@pytest.mark.parametrize("mode, colour, suffix, expected", [
    ("L", 77, "png", (77, 77, 77)), ("1", 1, "png", (255, 255, 255)), ("RGB", (9, 8, 7), "PNG", (9, 8, 7)),
    ("RGBA", (200, 0, 0, 0), "png", (255, 255, 255)), ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
    ("LA", (100, 0), "png", (255, 255, 255)), ("CMYK", (0, 0, 0, 0), "jpg", (255, 255, 255)),
    ("I;16", 25700, "png", (100, 100, 100)), ("I;16", 65535, "png", (255, 255, 255)), ("L", 50, "JPEG", (50, 50, 50)),
    ("RGBA", (0, 0, 0, 0), "webp", (255, 255, 255)), ("I", 257, "tiff", (1, 1, 1))])
def test_picture_modes(tmp_path, mode, colour, suffix, expected):
    image = Image.new(mode, (8, 5), colour)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert corner(tmp_path / f"a.{suffix}") == expected


def test_transparent_palette_is_white(tmp_path):
    image = Image.new("P", (4, 4), 3)
    image.putpalette([value for colour in voc_palette() for value in colour])
    image.save(tmp_path / "a.png")
    assert corner(tmp_path) == (128, 128, 0)
    image.save(tmp_path / "a.png", transparency=3)
    assert corner(tmp_path) == (255, 255, 255)


def test_exif_turns_the_picture(tmp_path):
    """Orientation 6: the stored picture must be turned clockwise, so its left column becomes the upper row."""
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    picture = Folder(tmp_path).picture(0)
    assert picture.shape == (3, 16, 8) and (picture[:, :8] == 255).all() and (picture[:, 8:] == 0).all()


def test_folder_names_and_what_it_leaves_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name in ("b.png", "sub/a.JPG", "sub/deep/c.WebP", "sub/b.png", "cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
    for name in ("cut.jpg", "cut.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("not even tried")
    folder = Folder(tmp_path)
    assert folder.names == ["b.png", "sub/a.JPG", "sub/b.png", "sub/deep/c.WebP"] and len(folder) == 4
    assert {Path(name).name for name in folder.skipped} == {"cut.jpg", "cut.png", "empty.png", "text.jpg"}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and all(re.match(r"skipped \w+\.\w+: .+", line) for line in told)
    assert (folder.picture(0) == torch.from_numpy(np.array(noise)).permute(2, 0, 1)).all()
    with pytest.raises(ValueError, match="b.png has no labels"):
        folder.label(0)
    assert open_split(str(tmp_path), "", "train").names == folder.names
    assert Folder(tmp_path / "sub/a.JPG", tmp_path / "sub/deep").names == ["a.JPG", "c.WebP"]
    twice = tmp_path / "b.png", tmp_path / "sub/b.png"
    assert Folder(*twice, tmp_path / "sub/b.png").names == [path.as_posix() for path in twice]
    capsys.readouterr()
    (tmp_path / "bad").mkdir()
    for i in range(13):
        (tmp_path / "bad" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="bad holds no readable"):
        Folder(tmp_path / "bad")
    assert len(told := capsys.readouterr().err.splitlines()) == 11 and told[-1] == "and 3 more"
    with pytest.raises(FileNotFoundError, match="nowhere is neither"):
        Folder(tmp_path / "nowhere")


def test_bomb_is_named(tmp_path, monkeypatch):
    Image.new("L", (50, 50)).save(tmp_path / "a.png")
    split = Folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="a.png is not a readable picture: Image size"):
        split.picture(0)


@pytest.mark.parametrize("size, side, expected", [
    ((375, 500), 336, (336, 448)), ((500, 375), 448, (597, 448)), ((1, 1), 336, (336, 336)), ((7, 9), 0, (7, 9)),
    ((1, 4000), 336, (1, 2048)), ((4000, 10), 512, (2048, 5)), ((100, 600), 336, (336, 2016)),
    ((100, 300), 1000, (1000, 3000)), ((100, 500), 1000, (800, 4000))])
def test_resize_of_normal_and_extreme_pictures(size, side, expected):
    assert resize_short_side(torch.zeros((3, *size), dtype=torch.uint8), side).shape == (3, *expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1), (40, 100)])
def test_thumbnails_of_any_shape(tmp_path, size):
    """Up to 4 : 1 the crop changes nothing: it is the plain resize and centre crop. A strip costs no memory."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "a.png")
    folder = Folder(tmp_path)
    out = Thumbnails(folder, 24)[0][0]
    assert out.shape == (3, 24, 24)
    if size == (40, 100):
        assert torch.equal(out, Thumbnails(folder, 24).transform(folder.picture(0)))


# --- Run lengths --------------------------------------------------------------------------------------------

def encode_rle(mask):
    """COCO's encoder, rleToString of its maskApi.c: runs down the columns, zeros first."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    text = ""
    for i, run in enumerate(runs):
        x, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            c, x = x & 31, x >> 5
            more = x != -1 if c & 16 else x != 0
            text += chr(48 + c + 32 * more)
    return text


@pytest.mark.parametrize("shape, density", [((1, 1), 1), ((7, 5), .5), ((60, 90), .02), ((333, 4), .9), ((9, 70), 0),
                                            ((200, 300), .0001), ((5, 5), 1)])
def test_rle_round_trip(shape, density):
    mask = np.random.default_rng(1).random(shape) < density
    assert (decode_rle(encode_rle(mask), *shape) == mask).all()


def test_rle_by_hand():
    """2 x 5: runs 1, 2, 3, 1, 3 are written 1, 2, 3, 1 - 2 = -1, 3 - 3 = 0; -1 is the six bits 011111 = 'O'."""
    assert decode_rle("123O0", 2, 5).astype(int).tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert decode_rle("R`0", 2, 257).sum() == 0  # 514 = 2 + 32 * 16, and a third character, or 16 would be the sign


@pytest.mark.parametrize("counts, words", [
    ("", "add up"), ("1", "add up"), ("123O01", "add up"), ("R", "cut off"), ("12O", "negative"), ("1 9", "hold ' '"),
    ("1é", "hold 'é'"), ("o" * 99, "without an end"), ("o" * 12 + "0", "add up"), ("p", "hold"), ("\x00", "hold")])
def test_hostile_rle(counts, words):
    with pytest.raises(ValueError, match=words):
        decode_rle(counts, 2, 5)


# --- Preparation --------------------------------------------------------------------------------------------

def write_pairs(base, pictures, labels, names, classes):
    """Pictures and labels of 12 x 10 pixels, the values 0..classes in each label as far as they fit."""
    for folder in (pictures, labels):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (12, 10), "red").save(base / pictures / f"{name}.jpg")
        Image.fromarray(np.resize(np.arange(classes + 1, dtype=np.uint8), (10, 12))).save(base / labels / f"{name}.png")


@pytest.fixture
def make_set(tmp_path):
    """Writes a small data set in its exact layout, below tmp_path/DIR."""
    def make(data, where="in"):
        root = tmp_path / where
        if data == "ade20k":
            for split in ("training", "validation"):
                write_pairs(root / "ADEChallengeData2016", f"images/{split}", f"annotations/{split}", "ab", 150)
            return root
        base = root / "VOCdevkit" / ("VOC2012" if data == "voc" else "VOC2010")
        write_pairs(base, "JPEGImages", "SegmentationClass" + "Context" * (data == "context"), "abcd",
                    {"voc": 20, "context": 59}[data])
        lists = base / "ImageSets" / ("Segmentation" + "Context" * (data == "context"))
        lists.mkdir(parents=True)
        for split, names in (("train", "a\nb\n"), ("val", "c\nd\n")):
            (lists / f"{split}.txt").write_text(names)
        return root
    return make


def context_json(phases=("train", "val", "test")):
    """trainval_merged.json in small: three pictures, overlapping masks; and the category of each pixel."""
    rng, ids, names = np.random.default_rng(5), datasets.CONTEXT_IDS, datasets.CONTEXT_CLASSES
    data = {"images": [], "annos_segmentation": [], "annos_occlusion": [], "categories": [
        {"category_id": i, "name": SPELLING.get(name, name), "onlysemantic": 0} for i, name in zip(ids, names)]}
    truth = {}
    for number, phase in enumerate(phases):
        name, H, W = f"2008_00000{number}", 10, 12
        data["images"].append({"image_id": 2008000000 + number, "file_name": f"{name}.jpg", "height": H, "width": W,
                               "phase": phase})
        truth[name] = np.zeros((H, W), int)
        for _ in range(6):
            mask, k = rng.random((H, W)) < .4, int(rng.integers(59))
            truth[name][mask] = k + 1
            data["annos_segmentation"].append({
                "id": len(data["annos_segmentation"]), "image_id": 2008000000 + number, "category_id": ids[k],
                "segmentation": {"size": [H, W], "counts": encode_rle(mask)}, "area": int(mask.sum()), "iscrowd": 0})
    return data, truth


def raw_context(root, data):
    """VOC 2010 as its archive has it, and the JSON."""
    base = root / "VOCdevkit/VOC2010"
    write_pairs(base, "JPEGImages", "SegmentationClass", [f"2008_00000{i}" for i in range(3)], 20)
    (base / "trainval_merged.json").write_text(json.dumps(data))
    return base


def test_context_labels_pixel_by_pixel(tmp_path, monkeypatch, capsys):
    """Also: interrupted after one label, nothing half done is taken for whole; a second run decodes nothing."""
    data, truth = context_json()
    base, calls = raw_context(tmp_path, data), []
    real = decode_rle
    monkeypatch.setattr(datasets, "decode_rle", lambda *a: calls.append(1) or (real(*a) if len(calls) < 9 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        prepare("context", tmp_path)
    assert len(list((base / "SegmentationClassContext").iterdir())) == 1
    with pytest.raises(FileNotFoundError, match="SegmentationContext/val.txt is missing"):
        open_split("context", tmp_path, "val")
    calls.clear()
    monkeypatch.setattr(datasets, "decode_rle", lambda *a: calls.append(1) or real(*a))
    prepare("context", tmp_path)
    prepare("context", tmp_path)
    verify("context", tmp_path)
    assert len(calls) == 6 and "context val: 1 pictures with labels (official: 5104" in capsys.readouterr().out
    for split, name in (("train", "2008_000000"), ("val", "2008_000001")):
        files = open_split("context", tmp_path, split)
        assert files.names == [name] and (files.label(0).numpy() + np.uint8(1) == truth[name]).all()
    assert not (base / "SegmentationClassContext/2008_000002.png").exists()  # phase test


def test_context_from_its_archive_and_json(tmp_path):
    """As downloaded by hand: the tar of VOC 2010 and the JSON side by side."""
    data, truth = context_json()
    raw_context(tmp_path / "made", data)
    (root := tmp_path / "root").mkdir()
    (tmp_path / "made/VOCdevkit/VOC2010/trainval_merged.json").rename(root / "trainval_merged.json")
    pack(tmp_path / "made", root / ARCHIVES["context"])
    prepare("context", root)
    assert (open_split("context", root, "val").label(0).numpy() + np.uint8(1) == truth["2008_000001"]).all()


def reorder(data):
    names = [c["name"] for c in data["categories"]]
    for category, name in zip(data["categories"], ["aeroplane", "bicycle", *names]):
        category["name"] = name


@pytest.mark.parametrize("damage, words", [
    (reorder, "category 9 is bicycle, not bag: are VOC's 20 classes first"),
    (lambda d: d["categories"].pop(), "category 458 is None, not wood"),
    (lambda d: d["annos_segmentation"][5].update(category_id=300), "2008_000000 has a category that is none"),
    (lambda d: d["annos_segmentation"][5]["segmentation"].update(counts="1"), "add up"),
    (lambda d: d.pop("images"), "not Context's annotation file"),
    (lambda d: d["images"][0].update(height="tall"), "not Context's annotation file")])
def test_bad_context_json_is_named(tmp_path, damage, words):
    data, _ = context_json()
    damage(data)
    raw_context(tmp_path, data)
    with pytest.raises(ValueError, match=words) as caught:
        prepare("context", tmp_path)
    assert "\n" not in str(caught.value)


def pack(root, archive):
    """An archive of all that lies in root, as the official ones are: without a leading ./"""
    if archive.suffix == ".zip":
        return shutil.make_archive(str(archive.with_suffix("")), "zip", root)
    with tarfile.open(archive, "w") as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, path.name)


ARCHIVES = {"voc": "VOCtrainval_11-May-2012.tar", "context": "VOCtrainval_03-May-2010.tar",
            "ade20k": "ADEChallengeData2016.zip"}


@pytest.mark.parametrize("data", ARCHIVES)
def test_archives_put_by_hand(make_set, tmp_path, data, capsys):
    """Unpacked beside what VOCdevkit holds already; a stop while unpacking leaves nothing that looks whole."""
    out = make_set({"voc": "context", "context": "voc", "ade20k": "voc"}[data], "out")
    pack(make_set(data), out / ARCHIVES[data])
    whole = (out / ARCHIVES[data]).read_bytes()
    (out / ARCHIVES[data]).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="could not be unpacked"):
        prepare(data, out)
    assert not (out / datasets.LAYOUTS[data].base).exists()
    (out / ARCHIVES[data]).write_bytes(whole)
    for _ in range(2):
        prepare(data, out)
    verify(data, out)
    assert len(capsys.readouterr().out.splitlines()) == 2 and len(open_split(data, out, "train")) == 2
    assert sorted(path.name for path in out.iterdir()) == sorted({"VOCdevkit", ARCHIVES[data],
                                                                  datasets.LAYOUTS[data].base.split("/")[0]})


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize("members", [
    [member("../evil")], [member("VOCdevkit/../../evil")], [member("/tmp/../{}/evil")],
    [member("VOCdevkit/VOC2012", tarfile.SYMTYPE, "../.."), member("VOCdevkit/VOC2012/evil")],
    [member("VOCdevkit/out", tarfile.SYMTYPE, "{}"), member("VOCdevkit/out/evil")],
    [member("VOCdevkit/evil", tarfile.LNKTYPE, "../secret")]])
def test_hostile_tar(tmp_path, members):
    (tmp_path / "secret").write_text("mine")
    (root := tmp_path / "root").mkdir()
    with tarfile.open(root / ARCHIVES["voc"], "w") as tar:
        for info in members:
            info.name, info.linkname = info.name.format(tmp_path), info.linkname.format(tmp_path)
            tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(ValueError, match="could not be unpacked"):
        prepare("voc", root)
    assert {path.name for path in tmp_path.rglob("*")} - {"VOCdevkit"} == {ARCHIVES["voc"], "root", "secret"}


def test_hostile_zip(tmp_path, make_set):
    root = make_set("ade20k", "out/root")
    pack(root, archive := tmp_path / "out" / ARCHIVES["ade20k"])
    shutil.rmtree(root)
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("../evil", "/evil", "ADEChallengeData2016/../../evil"):
            file.writestr(name, "evil")
        link = zipfile.ZipInfo("ADEChallengeData2016/link")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc")
    prepare("ade20k", archive.parent)
    assert not list(tmp_path.rglob("evil")) and not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.fixture
def server():
    """A server of one file, .content; .ranges: give parts; .cut: say more than comes; .asked: the ranges asked for."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            self.server.asked.append(asked)
            start = int(asked[6:-1]) if asked and self.server.ranges else 0
            if start >= len(self.server.content):
                return self.send_error(416)
            self.send_response(206 if asked and self.server.ranges else 200)
            self.send_header("Content-Length", str(len(self.server.content) - start))
            self.end_headers()
            self.wfile.write(self.server.content[start:self.server.cut])

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.ranges, server.cut = [], True, None
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def served_voc(server, make_set, tmp_path, monkeypatch):
    """A small VOC as the only archive of the world: (folder to prepare, server)."""
    pack(make_set("voc"), tmp_path / ARCHIVES["voc"])
    server.content = (tmp_path / ARCHIVES["voc"]).read_bytes()
    address = f"http://127.0.0.1:{server.server_port}/{ARCHIVES['voc']}"
    layout = datasets.LAYOUTS["voc"]._replace(archive=address, md5=hashlib.md5(server.content).hexdigest())
    monkeypatch.setitem(datasets.LAYOUTS, "voc", layout)
    return tmp_path / "new", server


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_broke_off(served_voc, ranges):
    root, server = served_voc
    server.ranges, server.cut = ranges, 5000
    with pytest.raises(OSError, match="could not be fetched.*broke off.*can be put at"):
        prepare("voc", root, download=True)
    assert (root / f"{ARCHIVES['voc']}.part").stat().st_size == 5000
    server.cut = None
    assert len(open_split("voc", root, "val", download=True)) == 2
    shutil.rmtree(root / "VOCdevkit")
    prepare("voc", root, download=True)  # the archive is there: nothing is fetched
    assert server.asked == ["bytes=0-", "bytes=5000-"] and (root / ARCHIVES["voc"]).read_bytes() == server.content


def test_download_that_is_whole_or_wrong_or_dead(served_voc):
    root, server = served_voc
    root.mkdir()
    part = root / f"{ARCHIVES['voc']}.part"
    part.write_bytes(server.content[:-1] + b"?")
    with pytest.raises(ValueError, match="not have the md5.*can be put at"):
        prepare("voc", root, download=True)
    assert not part.exists() and server.asked == [f"bytes={len(server.content)}-"]
    (root / ARCHIVES["voc"]).write_bytes(b"a copy of something else")
    with pytest.raises(ValueError, match="not have the md5"):
        prepare("voc", root, download=True)
    (root / ARCHIVES["voc"]).unlink()
    part.write_bytes(server.content)  # whole, but not yet renamed
    prepare("voc", root, download=True)
    server.shutdown()
    server.server_close()
    shutil.rmtree(root)
    with pytest.raises(OSError, match=r"http://127.*could not be fetched.*copy with md5 \w+ can be put at .*2012.tar"):
        prepare("voc", root, download=True)


def value(path, number):
    Image.fromarray(np.full((10, 12), number, np.uint8)).save(path)


def move(old, new):
    """A trap: the folder `old` lies at `new`."""
    def damage(root):
        (root / old).rename(root / "moving")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / "moving").rename(root / new)
    return damage


VOC, CONTEXT, ADE = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010", "ADEChallengeData2016"


def full_ade(root):
    shutil.rmtree(root / ADE / "images")
    (root / ADE / "images/ADE/training").mkdir(parents=True)
    (root / ADE / "images/ADE/training/a_seg.png").touch()


@pytest.mark.parametrize("data, damage, words", [
    ("voc", move(VOC, CONTEXT), "VOC2010 is of another year than VOC2012"),
    ("context", move(CONTEXT, VOC), "VOC2012 is of another year than VOC2010"),
    ("voc", move("VOCdevkit", "VOCdevkit/VOCdevkit"), "holds a second VOCdevkit"),
    ("ade20k", move(ADE, f"{ADE}/{ADE}"), "holds a second ADEChallengeData2016"),
    ("voc", move(VOC, "VOC2012"), "is inside of VOCdevkit/VOC2012"),
    ("voc", move(f"{VOC}/JPEGImages", "JPEGImages"), "a.jpg is named"),
    ("ade20k", move(f"{ADE}/images", "images"), "is inside of ADEChallengeData2016"),
    ("ade20k", move(ADE, "ADE20K_2021_17_01"), "is the full ADE20K"),
    ("ade20k", full_ade, "a_seg.png is the full ADE20K"),
    ("ade20k", move(ADE, "other"), "must be the folder that holds ADEChallengeData2016"),
    ("voc", lambda r: Image.new("RGB", (12, 10)).save(r / VOC / "SegmentationClass/a.png"), "RGB copy"),
    ("context", lambda r: value(r / CONTEXT / "SegmentationClassContext/a.png", 60), "60-class or 459-class"),
    ("ade20k", lambda r: value(r / ADE / "annotations/validation/a.png", 151), "151.*full ADE20K"),
    ("voc", lambda r: (r / VOC / "JPEGImages/c.jpg").unlink(), "c.jpg is named.*not exist"),
    ("ade20k", lambda r: (r / ADE / "annotations/training/b.png").unlink(), "b.png is missing"),
    ("voc", lambda r: Image.new("L", (3, 3)).save(r / VOC / "SegmentationClass/d.png"), r"label is \(3, 3\)"),
    ("context", lambda r: shutil.rmtree(r / CONTEXT / "ImageSets"), "trainval_merged.json is missing")])
def test_traps_are_named(make_set, data, damage, words):
    root = make_set(data)
    prepare(data, root)
    verify(data, root)
    damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        prepare(data, root)
        verify(data, root)
    assert "\n" not in str(caught.value)


# As the provenance of the lent files lists them.
REAL = {"voc": ((3, [0, 5, 6, 7, 9, 15, 18, 255]), (17, [0, 1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 18, 19, 20, 255])),
        "context": ((2, [0, 7, 29, 30, 34, 37, 47, 57, 59]),
                    (2, [0, 11, 12, 14, 18, 23, 26, 29, 33, 37, 41, 45, 47, 50, 53, 56])),
        "ade20k": ((3, [0, 2, 3, 5, 7, 12, 13, 21, 44, 84, 87, 88, 103, 105, 117, 124, 128, 137, 139]),
                   (5, [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 28, 31, 37, 40,
                        44, 50, 65, 67, 68, 81, 83, 88, 97, 98, 99, 103, 136, 143]))}


@pytest.mark.parametrize("data", REAL)
def test_prepare_real_files(shared, tmp_path, data, capsys):
    top = datasets.LAYOUTS[data].base.split("/")[0]
    shutil.copytree(shared(top), tmp_path / top)
    prepare(data, tmp_path)
    verify(data, tmp_path)
    told = capsys.readouterr().out.splitlines()
    for line, split, (count, seen) in zip(told, ("train", "val"), REAL[data], strict=True):
        classes = {*seen} - {0, 255}
        assert line.startswith(f"{data} {split}: {count} pictures") and f" {len(classes)} of " in line
        files = open_split(data, tmp_path, split)
        labels = torch.cat([files.label(i).unique() for i in range(count)])
        assert {*labels.tolist()} - {255} == {c - 1 for c in classes}


def test_the_command(make_set):
    """What it prints, and one sentence with exit code 1."""
    command = [sys.executable, datasets.__file__, "--prepare", "voc", "--root", str(root := make_set("voc"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[1] == (
        "voc val: 2 pictures with labels (official: 1449), label values 0 to 20, 20 of 20 classes")
    shutil.rmtree(root / "VOCdevkit")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("datasets.py: .*VOC2012 does not exist: --root must be.*\n", done.stderr)
