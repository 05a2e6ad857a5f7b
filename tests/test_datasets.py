"""datasets.py: VOC's layout and label conventions, the training stream, the miniature world."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import IGNORE, Augment, Evaluation, Thumbnails, TrainingStream, open_split, voc_palette


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
    i = split.names.index("2008_002536")
    assert sorted(split.label(i).unique().tolist()) == [11, 16, 255] and split.picture(i).shape[1:] == split.label(i).shape


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
    words = set(datasets.shapes_words())
    for _, captions in (datasets.web_scenes((0, 1), 50), datasets.web_mosaics((0, 2), 10)):
        assert {word for caption in captions for word in caption.split()} <= words
        assert all(any(name in caption.split() for name in datasets.SHAPES_CLASSES) for caption in captions)


def test_close_ups_have_habits_and_targets_do_not():
    """First twins (coin, box, star, bee) stand in the upper half of mosaics only; on the target in both halves."""
    _, captions = datasets.web_mosaics((3, 4), 50)
    first = [any(name in caption.split() for name in datasets.SHAPES_CLASSES[::2]) for caption in captions]
    assert all(first[i] == (i % 4 < 2) for i in range(len(first)))
    split = open_split("shapes", None, "train")
    labels = torch.stack([split.label(i) for i in range(300)])
    even = (labels != IGNORE) & (labels % 2 == 0)
    upper, lower = even[:, :32].sum().item(), even[:, 32:].sum().item()
    assert 0.85 < upper / lower < 1.18
