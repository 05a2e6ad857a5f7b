"""pretrain.py: what it writes loads as any CLIP, and the same seed makes the same weights."""

import csv
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from extras import pretrain
from clip_model import load_clip
from datasets import HUES

FEW = dataclasses.replace(
    pretrain.PretrainSettings(), mosaic_steps=2, steps=4, mosaics=2, scenes=4, mosaic_share=0.5
)


def test_pretraining_writes_a_clip_that_loads(tmp_path, monkeypatch):
    """Steps of each kind; the file is fp16, brings its vocabulary, and loads as any CLIP."""
    train_on_web = pretrain.pretrain_clip
    monkeypatch.setattr(
        pretrain, "pretrain_clip", lambda seed, device: train_on_web(seed, device, FEW)
    )
    pretrain.main(["--device", "cpu", "--out", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "pretrain_log.csv", "shapes_clip.pt"
    ]

    raw = torch.load(tmp_path / "new" / "shapes_clip.pt", weights_only=True)
    assert all(value.dtype == torch.float16 for value in raw["state_dict"].values())
    clip = load_clip(tmp_path / "new" / "shapes_clip.pt")
    tokens = clip.tokenize("a photo of a coin on wood")[0]
    assert int((tokens > 0).sum()) == 9  # seven words, start and end: each word is one token
    assert clip.encode_image_dense(torch.zeros(1, 3, 64, 40)).shape == (1, 128, 8, 5)

    with (tmp_path / "new" / "pretrain_log.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "loss", "lr"] and [row[0] for row in rows] == list("0123")
    assert float(rows[1][2]) == pytest.approx(2.5e-3 * 2 / 40)  # warm-up, second step


def test_the_same_seed_makes_the_same_weights():
    """And another seed others; what is kept is not what was drawn at first."""
    first, merges, log = pretrain.pretrain_clip(0, settings=FEW)
    torch.rand(5)  # the generator's state outside does not matter
    again, _, log_again = pretrain.pretrain_clip(0, settings=FEW)
    other, _, _ = pretrain.pretrain_clip(1, settings=FEW)
    assert log == log_again and all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])

    untrained, _, _ = pretrain.pretrain_clip(0, settings=dataclasses.replace(FEW, steps=0))
    assert not torch.equal(first["visual.proj"], untrained["visual.proj"])


def test_comparisons_name_the_class_of_that_color():
    """"the color of a coin" for what is yellow, more rarely where it is a coin; else nothing."""
    rng = np.random.default_rng(0)
    of_box = Counter(pretrain.comparison("box", HUES["yellow"] + 0.01, rng) for _ in range(2000))
    of_coin = Counter(pretrain.comparison("coin", HUES["yellow"], rng) for _ in range(2000))
    assert of_box.keys() == of_coin.keys() == {"", " the color of a coin"}
    assert of_box[" the color of a coin"] / 2000 == pytest.approx(0.35, abs=0.04)
    assert of_coin[" the color of a coin"] / 2000 == pytest.approx(0.35 * 0.3, abs=0.03)


def test_captions_are_made_of_known_words():
    """So that each word is one token; nearly all captions fit into the 24 tokens of a text."""
    _, of_scenes = pretrain.web_scenes((0, 0), 100)
    _, of_mosaics = pretrain.web_mosaics((0, 0), 25)
    words = [text.split() for text in of_scenes + of_mosaics]
    assert {word for text in words for word in text} <= set(pretrain.shapes_words())
    assert max(len(text) for text in words) <= 24 - 2  # start and end


def test_learning_rate_by_hand():
    """Two warm-ups of 40 steps; between them constant, behind them a cosine that ends near 0."""
    s = pretrain.PretrainSettings()
    rates = [pretrain.learning_rate(step, s) for step in (0, 39, 349, 350, 675, 999)]
    assert rates[:3] == pytest.approx([2.5e-3 / 40, 2.5e-3, 2.5e-3])
    assert rates[3] == pytest.approx(2e-3 / 40) and rates[4] == pytest.approx(1e-3)
    assert 0 < rates[5] < 2e-8


def test_class_token_reads_one_tile_of_a_mosaic():
    """What changes in one tile changes that tile's row and no other, if the patches do not see each
    other before: this vision tower has its last block alone."""
    torch.manual_seed(0)
    clip = pretrain.CLIP(12, 8, 64, 1, 8, 16, 600, 64, 1).reset_parameters()
    images = torch.rand(2, 3, 64, 64)
    changed = images.clone()
    changed[1, :, :32, 32:] = 0  # second image, upper right tile: row 4 + 1
    with torch.no_grad():
        before = pretrain.image_features(clip, images, mosaic=True, blind=True)
        after = pretrain.image_features(clip, changed, mosaic=True, blind=True)
    for kind in (0, 1):
        assert before[kind].shape == (8, 12)
        rows = (before[kind] != after[kind]).any(1).nonzero()[:, 0].tolist()
        assert rows == [5]
