"""eval.py: the confusion matrix, mIoU, the protocol's steps, and what is written."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
from datasets import IGNORE
from eval import colour_mask, confusion_matrix, strong_classes, draw_grid, scores, segment


def test_confusion_matrix_by_hand():
    label = torch.tensor([[0, 0, 1], [2, IGNORE, 1]])
    prediction = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert confusion_matrix(prediction, label, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]


def test_scores_by_sets():
    """IoU from sets of pixels; class 3 is absent from the truth, class 4 from truth and prediction."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (40, 30), generator=generator)
    prediction = torch.randint(0, 4, (40, 30), generator=generator)
    label[:5] = IGNORE
    result = scores(confusion_matrix(prediction, label, 5))
    pixels = [(y, x) for y in range(40) for x in range(30) if label[y, x] != IGNORE]
    ious = []
    for c in range(3):
        truth, guess = ({p for p in pixels if mask[p] == c} for mask in (label, prediction))
        ious.append(len(truth & guess) / len(truth | guess))
    assert result["iou"][:3] == pytest.approx(ious, abs=1e-12) and all(map(math.isnan, result["iou"][3:]))
    assert result["miou"] == pytest.approx(sum(ious) / 3, abs=1e-12) and result["present"] == 3
    right = sum(int(label[p] == prediction[p]) for p in pixels)
    assert result["pixel_accuracy"] == pytest.approx(right / len(pixels), abs=1e-12)


def test_denoise_drops_weak_classes_only():
    logits = torch.tensor([0.30, 0.28, 0.10]).view(1, 3, 1, 1).repeat(1, 1, 2, 3)
    logits[0, :, 0, 0] = torch.tensor([0.20, 0.28, 0.10])
    best = (100 * logits).softmax(1).amax((2, 3))[0]
    assert best[0] > 0.5 and best[1] > 0.9 and best[2] < 0.5
    assert strong_classes(logits, 0.5).tolist() == [0, 1]
    flat = torch.zeros(1, 3, 2, 2)
    assert strong_classes(flat, 0.5).tolist() == [0, 1, 2]  # none passes: none is dropped
    assert strong_classes(logits, 0.0).tolist() == [0, 1, 2]  # switched off


def test_segment_stays_in_place():
    """A 20 x 30 picture in 8-pixel patches: a 3 x 4 grid over 24 x 32; the mask's edge must stand where the
    grid's edge stands, not be stretched with the padding."""
    grid = torch.zeros(1, 2, 3, 4)
    grid[:, 0] = 0.5
    grid[:, 1, :, 2:] = 1.0  # right half of the padded picture: from x = 16
    to_pixels = lambda g, H, W: F.interpolate(g, scale_factor=8, mode="bilinear")[..., :H, :W]
    mask = segment(grid, to_pixels, (20, 30), (20, 30))
    assert (mask[:, :16] == 0).all() and (mask[:, 16:] == 1).all()
    double = segment(grid, to_pixels, (20, 30), (40, 60))
    assert (double[:, :31] == 0).all() and (double[:, 33:] == 1).all()


def test_segment_with_dropped_class():
    """Class 0 is dropped by denoising, so its index must not shift the others."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 0.5
    logits[0, 1, 0, 0] = 1.0
    mask = segment(logits, lambda g, H, W: g, (2, 2), (2, 2), denoise=0.5)
    assert mask.tolist() == [[1, 2], [2, 2]]


def test_drawing(tmp_path):
    palette = [(255, 0, 0), (0, 255, 0)]
    image = colour_mask(torch.tensor([[0, 1], [IGNORE, 1]]), palette)
    assert [image.getpixel(p) for p in ((0, 0), (1, 0), (0, 1))] == [(255, 0, 0), (0, 255, 0), evaluation.UNSEEN]
    sheet = draw_grid([[image, image]], ["picture", "truth"], ["a", "b"], palette)
    assert {(255, 0, 0), (0, 255, 0)} <= {colour for _, colour in sheet.getcolors(10 ** 6)}


def test_command_line_writes_what_it_promises(make_voc, tiny_clip_file, tmp_path, capsys):
    """mIoU of the file against a recount from the masks of the model itself."""
    root = make_voc({"train": 2, "val": 3})
    evaluation.main(["--stage", "clip", "--data", "voc", "--root", str(root), "--clip", str(tiny_clip_file), "--out",
                     str(tmp_path / "out"), "--device", "cpu"])
    report = json.loads((tmp_path / "out" / "eval_clip.json").read_text())
    assert set(report) == {"miou", "iou", "pixel_accuracy", "confusion", "protocol"}
    assert {"short_side", "denoise", "background", "class_names", "pictures", "checkpoint_sha256"} <= set(report["protocol"])
    assert report["protocol"]["pictures"] == 3 and report["protocol"]["denoise"] == 0.5
    confusion = torch.tensor(report["confusion"])
    assert scores(confusion)["miou"] == report["miou"] and confusion.sum() > 0
    assert "mIoU" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "eval_clip.png").width > 300


def test_errors_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="--split nonsense"):
        evaluation.main(["--data", "shapes", "--split", "nonsense"])
    with pytest.raises(FileNotFoundError, match="train.py --stage rectify"):
        evaluation.main(["--data", "shapes", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluation.main(["--no-such-flag"])
