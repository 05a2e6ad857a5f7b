"""eval.py: the confusion matrix, mIoU, from an image to its mask, drawing, and the command line."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
from clip_model import load_clip
from conftest import ROOT
from datasets import DATA, IGNORE, Evaluation, Folder, find_settings, open_split
from deeplab import DeepLabV2
from eval import (
    GREY,
    WHITE,
    Column,
    Protocol,
    color_mask,
    confusion_matrix,
    draw_examples,
    draw_grid,
    draw_overlay,
    find_protocol,
    parse_arguments,
    plain_clip,
    predict_mask,
    scores,
    slide,
    window_starts,
)
from reclip import PROMPTS, ReCLIP, segment, strong_classes


# --- mIoU -----------------------------------------------------------------------------------------

def test_confusion_matrix_by_hand():
    truth = torch.tensor([[0, 0, 1], [2, IGNORE, 1]])
    prediction = torch.tensor([[0, 1, 1], [0, 0, 1]])
    expected = [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert confusion_matrix(prediction, truth, 3).tolist() == expected


def test_what_is_predicted_on_ignored_pixels_does_not_count():
    truth = torch.tensor([[0, 1], [IGNORE, IGNORE]], dtype=torch.uint8)
    expected = confusion_matrix(torch.tensor([[0, 1], [0, 0]]), truth, 2)
    for value in (1, IGNORE):
        prediction = torch.tensor([[0, 1], [value, value]])
        assert torch.equal(confusion_matrix(prediction, truth, 2), expected)


def test_scores_by_sets():
    """IoU from sets of pixels. Class 3 is absent from the truth, class 4 from both."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (40, 30), generator=generator)
    prediction = torch.randint(0, 4, (40, 30), generator=generator)
    truth[:5] = IGNORE
    result = scores(confusion_matrix(prediction, truth, 5))

    pixels = [(y, x) for y in range(40) for x in range(30) if truth[y, x] != IGNORE]
    ious = []
    for c in range(3):
        is_class = {p for p in pixels if truth[p] == c}
        called_class = {p for p in pixels if prediction[p] == c}
        ious.append(len(is_class & called_class) / len(is_class | called_class))
    right = [p for p in pixels if truth[p] == prediction[p]]

    assert result["iou"][:3] == pytest.approx(ious, abs=1e-12)
    assert math.isnan(result["iou"][3]) and math.isnan(result["iou"][4])
    assert result["miou"] == pytest.approx(sum(ious) / 3, abs=1e-12)
    assert result["present"] == 3
    assert result["pixel_accuracy"] == pytest.approx(len(right) / len(pixels), abs=1e-12)


@pytest.mark.parametrize("data, folder", [
    ("voc", "VOCdevkit/VOC2012/SegmentationClass"),
    ("context", "VOCdevkit/VOC2010/SegmentationClassContext"),
    ("ade20k", "ADEChallengeData2016/annotations/validation"),
])
def test_miou_on_real_truth_equals_a_count_on_the_raw_files(shared, data, folder):
    """The prediction is the truth, moved by ten pixels and wrapped around. It is scored by the
    project, and counted again from the values of the PNGs, with numpy alone."""
    raw = shared(folder)
    root = raw.parents[folder.count("/")]
    split = open_split(data, root, "val")
    C = len(DATA[data].classes)

    confusion = torch.zeros(C, C, dtype=torch.int64)
    hit = np.zeros(C + 1)     # by the values of the files, 1..C
    either = np.zeros(C + 1)
    present = set()
    for i, name in enumerate(split.names):
        truth = split.truth(i)
        prediction = torch.where(truth == IGNORE, 0, truth).roll(10, 1)
        confusion += confusion_matrix(prediction, truth, C)

        values = np.array(Image.open(raw / f"{name}.png")).astype(int)
        evaluated = (values != 0) & (values != 255)
        guess = np.roll(np.where(evaluated, values, 1), 10, 1)
        present |= set(np.unique(values[evaluated]).tolist())
        for c in range(1, C + 1):
            hit[c] += (evaluated & (values == c) & (guess == c)).sum()
            either[c] += (evaluated & ((values == c) | (guess == c))).sum()

    expected = sum(hit[c] / either[c] for c in present) / len(present)
    result = scores(confusion)
    assert 0.2 < expected < 1
    assert abs(result["miou"] - expected) < 1e-12
    assert result["present"] == len(present)


# --- From logits to a mask ------------------------------------------------------------------------

def test_denoise_drops_weak_classes_only():
    logits = torch.tensor([0.30, 0.28, 0.10]).view(1, 3, 1, 1).repeat(1, 1, 2, 3)
    logits[0, :, 0, 0] = torch.tensor([0.20, 0.28, 0.10])
    best = (100 * logits).softmax(1).amax((2, 3))[0]
    assert best[0] > 0.5 and best[1] > 0.9 and best[2] < 0.5

    assert strong_classes(logits, 0.5).tolist() == [True, True, False]
    assert strong_classes(logits, 0.0).all()  # switched off
    flat = torch.zeros(1, 3, 2, 2)
    assert strong_classes(flat, 0.5).all()  # none passes: none is dropped


def test_segment_stays_in_place():
    """A 20 x 30 image in 8-pixel cells: a 3 x 4 grid over 24 x 32. The mask's edge must stand where
    the grid's edge stands, and not be stretched with the padding."""
    grid = torch.zeros(1, 2, 3, 4)
    grid[:, 0] = 0.5
    grid[:, 1, :, 2:] = 1.0  # right half of the padded image: from x = 16
    mask = segment(grid, 8, (20, 30), (20, 30))
    assert (mask[:, :16] == 0).all() and (mask[:, 16:] == 1).all()

    doubled = segment(grid, 8, (20, 30), (40, 60))
    assert (doubled[:, :31] == 0).all() and (doubled[:, 33:] == 1).all()


def test_segment_is_bilinear_and_strips_leave_no_seam(monkeypatch):
    """Against torch's own enlarging of the padded grid; then in strips of one row each."""
    grid = torch.randn(1, 5, 4, 6)
    enlarged = F.interpolate(grid, scale_factor=16, mode="bilinear")[0, :, :60, :90]
    expected = enlarged.argmax(0)
    assert torch.equal(segment(grid, 16, (60, 90), (60, 90)).long(), expected)

    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, *more: split(self, 1, *more))
    assert torch.equal(segment(grid, 16, (60, 90), (60, 90)).long(), expected)


def test_segment_with_dropped_class_and_background():
    """Class 0 is dropped by denoising, so its index must not shift the others; weak pixels become
    background."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 0.5
    logits[0, 1, 0, 0] = 1.0

    def mask(**options):
        return segment(logits, 1, (2, 2), (2, 2), **options).tolist()
    assert mask(denoise=0.5) == [[1, 2], [2, 2]]

    logits[0, :, 1, 1] = torch.tensor([0.0, 0.0, 0.001])  # softmax(100 * that): 0.36 at best
    assert mask(background=0.4) == [[1, 2], [2, IGNORE]]
    assert mask(background=0.3) == [[1, 2], [2, 2]]

    # A class that denoising dropped still takes its share of the probability.
    logits[0, :, 1, 1] = torch.tensor([0.004, 0.0, 0.004])
    assert mask(denoise=0.5, background=0.45) == [[1, 2], [2, IGNORE]]
    assert mask(denoise=0.5, background=0.35) == [[1, 2], [2, 2]]


# --- Sliding windows ------------------------------------------------------------------------------

class SeesAll:
    """A model of output stride 4 whose logits depend on the whole of what it is shown."""
    output_stride = 4

    def __init__(self):
        self.seen = []  # sizes of what it was shown

    def __call__(self, image):
        self.seen.append(tuple(image.shape[2:]))
        h = math.ceil(image.shape[2] / 4)
        w = math.ceil(image.shape[3] / 4)
        mean = image.mean((2, 3))[:, :2, None, None].expand(1, 2, h, w)
        return SimpleNamespace(
            query=-mean, rectified=mean + torch.arange(h * w).view(1, 1, h, w)
        )


@pytest.mark.parametrize("cells, window, stride, starts", [
    (11, 6, 2, [0, 2, 4, 5]),  # the example of the docstring: the last one is moved back
    (10, 4, 2, [0, 2, 4, 6]),
    (6, 4, 2, [0, 2]),
    (7, 3, 3, [0, 3, 4]),
    (5, 6, 2, [0]),            # a window larger than the row
    (6, 6, 6, [0]),
])
def test_window_starts_by_hand(cells, window, stride, starts):
    assert window_starts(cells, window, stride) == starts


def test_sliding_windows_by_hand():
    """A 22 x 38 image, cells of 4 (6 x 10 of them), windows of 16 every 8: each cell against the
    mean over the windows that cover it, listed by hand."""
    image = torch.rand(1, 3, 22, 38)
    result = slide(SeesAll(), "rectified", image, 16, 8)

    said = {}  # (row, column) of a cell: what each window says of it
    for top in (0, 2):  # cells; the second is moved back: 6 cells hold no window of 4 at 4
        for left in (0, 2, 4, 6):
            window = image[..., 4 * top:4 * top + 16, 4 * left:4 * left + 16]
            logits = SeesAll()(window).rectified[0]
            for i in range(logits.shape[1]):
                for j in range(logits.shape[2]):
                    said.setdefault((top + i, left + j), []).append(logits[:, i, j])

    assert result.shape == (1, 2, 6, 10) and len(said) == 60
    for (i, j), values in said.items():
        assert torch.allclose(result[0, :, i, j], torch.stack(values).mean(0), atol=1e-6)


def test_a_window_larger_than_the_image_is_the_image():
    image = torch.rand(1, 3, 22, 38)
    for part in ("rectified", "query"):
        whole = slide(SeesAll(), part, image, 64, 64)
        assert torch.equal(whole, getattr(SeesAll()(image), part))


def test_windows_see_no_more_than_their_own_pixels():
    """Four times the pixels: more windows, none of them larger; logits are kept per cell."""
    shown = {}
    for side in (64, 128):
        model = SeesAll()
        logits = slide(model, "rectified", torch.rand(1, 3, side, side), 32, 16)
        assert logits.shape == (1, 2, side // 4, side // 4)
        assert set(model.seen) == {(32, 32)}
        shown[side] = len(model.seen)
    assert shown == {64: 9, 128: 49}


def test_a_window_must_start_at_a_cell():
    image = torch.rand(1, 3, 32, 32)
    for window, stride in ((18, 8), (16, 6)):
        with pytest.raises(ValueError, match=f"window {window} and stride {stride} .* of 4"):
            slide(SeesAll(), "rectified", image, window, stride)


# --- The protocol ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    ({"short_side": -1}, "short_side is -1"),
    ({"long_side": 0}, "long_side is 0; it must be 1 or more"),
    ({"window": -8}, "window is -8"),
    ({"window": 64, "stride": 0}, "stride is 0"),
    ({"window": 64, "stride": 72}, "stride is 72; it must lie in 1..64"),
    ({"denoise": 1.5}, "denoise is 1.5"),
    ({"background_threshold": -0.5}, "background_threshold is -0.5"),
])
def test_a_protocol_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        Protocol(**{"long_side": 64, "short_side": 64} | options)
    assert "--" not in str(caught.value)  # a library speaks of arguments


def test_a_protocol_in_words():
    described = Protocol(2048, 336).describe()
    assert described == "images within 2048 x 336, whole images, denoise off"
    described = Protocol(2048, 0, window=224, stride=112, denoise=0.5).describe()
    assert described == "images of their own size, windows of 224, stride 112, denoise 0.5"


@pytest.mark.parametrize("recipe", ["cvpr2024", "2025"])
@pytest.mark.parametrize("data, clip_sides, student_sides, denoise", [
    # the rectified CLIP's under cvpr2024 and under 2025; the student's under both
    ("voc", {"cvpr2024": (2048, 512), "2025": (2048, 336)}, (2048, 512), 0.5),
    ("context", {"cvpr2024": (520, 520), "2025": (2048, 448)}, (520, 520), 0.6),
    ("ade20k", {"cvpr2024": (2048, 512), "2025": (2048, 512)}, (2048, 512), 0.5),
])
def test_a_model_is_evaluated_at_the_sides_it_was_trained_at(
    data, recipe, clip_sides, student_sides, denoise
):
    """As released: the student at those of distillation, and without denoising."""
    settings = find_settings(data, recipe)
    for stage in ("clip", "rectify"):
        expected = Protocol(*clip_sides[recipe], denoise=denoise)
        assert find_protocol(settings, stage) == expected
    assert find_protocol(settings, "distill") == Protocol(*student_sides, denoise=0.0)
    assert (settings.rectify_long_side, settings.rectify_short_side) == clip_sides[recipe]
    assert (settings.distill_long_side, settings.distill_short_side) == student_sides


def test_protocols_of_other_images_and_what_is_given():
    assert find_protocol(find_settings("shapes"), "rectify") == Protocol(2048, 64)
    assert find_protocol(find_settings("shapes"), "distill") == Protocol(2048, 64)
    assert find_protocol(find_settings("photos"), "rectify") == Protocol(2048, 336)

    settings = find_settings("context")
    changed = find_protocol(settings, "distill", short_side=0, denoise=0.25, window=64)
    assert changed == Protocol(520, 0, window=64, stride=64, denoise=0.25)
    assert find_protocol(settings, "clip", denoise=0.0) == Protocol(520, 520)
    assert find_protocol(settings, "clip", window=96, stride=32).stride == 32


def test_each_field_of_a_protocol_reaches_the_mask():
    """A model of three classes that says 0 at the left, 2 at the right, 1 nowhere for sure."""
    logits = torch.zeros(1, 3, 2, 4)
    logits[:, 0, :, :2] = 1.0
    logits[:, 2, :, 2:] = 0.004  # times 100, softmax: 0.43 at best
    logits[:, 1, 1, 3] = 0.005   # a little more than class 2 has at that patch

    class Says(SeesAll):
        W_q = torch.zeros(3, 1)
        scale = 100.0

        def __call__(self, image):
            self.seen.append(tuple(image.shape[2:]))
            return SimpleNamespace(query=logits.flip(1), rectified=logits)

    def mask(stage="rectify", **options):
        return predict_mask(Says(), stage, torch.rand(3, 8, 16), (2, 4), Protocol(99, 8, **options))

    assert mask().dtype == torch.uint8
    assert mask().tolist() == [[0, 0, 2, 2], [0, 0, 2, 1]]
    assert mask("clip").tolist() == [[2, 2, 0, 0], [2, 2, 0, 1]]
    assert mask(denoise=0.6).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    unsure = mask(background_threshold=0.6).tolist()
    assert unsure == [[0, 0, IGNORE, IGNORE], [0, 0, IGNORE, IGNORE]]

    model = SeesAll()
    model.W_q, model.scale = torch.zeros(2, 1), 100.0
    protocol = Protocol(99, 8, window=8, stride=4)
    predict_mask(model, "rectify", torch.rand(3, 8, 16), (2, 4), protocol)
    assert model.seen == [(8, 8)] * 3


# --- Masks as images ------------------------------------------------------------------------------

RED, GREEN, BLUE, YELLOW, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)


def colors_of(image):
    """uint8 (3, H, W) -> rows of (r, g, b)"""
    return [[tuple(pixel) for pixel in row] for row in image.permute(1, 2, 0).tolist()]


def test_masks_are_grey_where_nothing_is_evaluated():
    """In the truth and in a model's mask alike: what it says there is neither right nor wrong."""
    truth = torch.tensor([[0, 1], [IGNORE, 1]], dtype=torch.uint8)
    mask = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)
    colors = color_mask(truth, [RED, GREEN])
    assert colors.dtype == torch.uint8
    assert colors_of(colors) == [[RED, GREEN], [GREY, GREEN]]
    assert colors_of(color_mask(mask, [RED, GREEN], truth)) == [[GREEN, GREEN], [GREY, RED]]
    assert colors_of(color_mask(mask, [RED, GREEN])) == [[GREEN, GREEN], [RED, RED]]
    assert mask.tolist() == [[1, 1], [0, 0]]  # what was given is left alone


def test_examples_have_the_grey_pixels_of_the_truth_in_every_column_of_masks():
    facts = DATA["shapes"]
    dataset = Evaluation(open_split("shapes", None, "val"), 64, 64)
    model = plain_clip(facts, load_clip(facts.clip))
    columns = [
        Column(model, "clip", dataset, Protocol(64, 64)),
        Column(model, "rectify", dataset, Protocol(64, 64), 0.123),
    ]
    sheet = draw_examples(columns, facts, count=2)

    grey = (np.array(sheet) == GREY).all(-1)
    for top in (28, 172):  # two rows of tiles of 136, every 144
        of_truth = grey[top:top + 136, 152:288]
        assert 0.1 < of_truth.mean() < 0.9
        for left in (296, 440):
            assert np.array_equal(grey[top:top + 136, left:left + 136], of_truth)
    # What is not grey is the mask of the model: the first image, in the middle of each pixel.
    image, truth, _ = dataset[0]
    mask = predict_mask(model, "clip", image, (64, 64), Protocol(64, 64))
    colors = color_mask(mask, facts.palette)
    for y, x in (truth != IGNORE).nonzero()[::50].tolist():
        place = (296 + int((x + 0.5) * 136 / 64), 28 + int((y + 0.5) * 136 / 64))
        assert sheet.getpixel(place) == tuple(colors[:, y, x].tolist())


def test_examples_are_those_in_which_the_masks_differ_most(monkeypatch):
    """In the share of the image's pixels, first of the columns against the last; of the first few
    alone; equal shares stay in the order of the split."""
    truth = torch.zeros(4, 5, dtype=torch.uint8)
    truth[0] = IGNORE                                        # 15 of 20 pixels are evaluated
    differing = [2, 0, 15, 2, 9, 15]                         # of these, in image 0, 1, ..
    dataset = [(torch.full((3, 4, 5), i / 255), truth, str(i)) for i in range(6)]
    small = truth.clone()
    small.flatten()[5 + differing[4]:] = IGNORE              # all that is evaluated differs
    dataset[4] = (dataset[4][0], small, "4")

    def mask_of(model, stage, image, size, protocol):
        mask = torch.zeros(4, 5, dtype=torch.uint8)
        if model == "last":
            i = round(255 * image[0, 0, 0].item())
            mask.flatten()[5:5 + differing[i]] = 1
            mask[0] = (i == 1)                               # not evaluated: does not count
        if model == "middle":
            mask += 1                                        # neither first nor last
        return mask

    shown = []

    def no_grid(rows, titles, entries):
        shown.append(([int(row[0][0, 0, 0]) for row in rows], titles))

    monkeypatch.setattr(evaluation, "predict_mask", mask_of)
    monkeypatch.setattr(evaluation, "draw_grid", no_grid)
    first = Column("first", "clip", dataset, None)
    last = Column("last", "distill", dataset, None, 0.5)
    columns = [first, Column("middle", "rectify", dataset, None), last]
    draw_examples(columns, DATA["shapes"], count=4)
    draw_examples(columns, DATA["shapes"], count=2, among=4)
    draw_examples([last], DATA["shapes"], count=3)
    titles = ["image", "truth", "CLIP", "rectified", "distilled 50.0"]
    assert shown[0] == ([2, 5, 4, 0], titles)
    assert shown[1][0] == [2, 0]
    assert shown[2][0] == [0, 1, 2]


def test_grid_of_images():
    """A title of 20 pixels, then tiles of 40 with gaps of 10: at 10 and 60, from 30 on."""
    mask = color_mask(torch.tensor([[0, 1], [IGNORE, 1]]), [RED, GREEN])
    wide = torch.zeros(3, 50, 200, dtype=torch.uint8)
    entries = [(BLUE, "a | b"), (YELLOW, "c")]
    sheet = draw_grid([[mask, wide], [mask, wide]], ["image", ""], entries, tile=40, gap=10)

    for top in (30, 80):
        corners = {(10, 0): RED, (30, 0): GREEN, (11, 39): GREY, (49, 39): GREEN}
        for (x, y), color in corners.items():
            assert sheet.getpixel((x, top + y)) == color
        # 200 x 50 pixels fill 40 x 10, in the middle of the tile
        for y, color in {14: WHITE, 15: BLACK, 24: BLACK, 25: WHITE}.items():
            assert sheet.getpixel((60, top + y)) == color
    shown = {color for _, color in sheet.getcolors(10 ** 6)}
    assert {BLUE, YELLOW} <= shown  # the legend


def test_photographs_made_smaller_are_averaged():
    """Columns of black and white: picked out, single pixels would be one or the other."""
    stripes = torch.zeros(3, 80, 80, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    sheet = draw_grid([[stripes, stripes]], ["", ""], tile=20, gap=10)
    assert all(abs(value - 128) < 10 for value in sheet.getpixel((20, 40)))


def test_overlay():
    """Half the image, half the color of its class; the background stays as it is."""
    image = torch.full((3, 400, 600), 100, dtype=torch.uint8)
    mask = torch.full((400, 600), IGNORE, dtype=torch.uint8)
    mask[:, :200] = 1
    drawn = draw_overlay(image, mask, [RED, GREEN], [(GREEN, "b 33.3 %")])
    assert drawn.width == 600 and drawn.height > 400
    assert drawn.getpixel((199, 200)) == (50, 177, 50)
    assert drawn.getpixel((200, 200)) == (100, 100, 100)

    nothing = draw_overlay(image, torch.full_like(mask, IGNORE), [RED, GREEN], [])
    assert nothing.getpixel((0, 0)) == (100, 100, 100)
    large = draw_overlay(image, mask, [RED, GREEN], [], longest=60)
    assert large.width == 60


# --- The command line -----------------------------------------------------------------------------

@pytest.fixture
def coarse_clip_file(make_clip, merges, tmp_path):
    """A small CLIP with patches of 16 pixels: images of 512 pixels are not too much for it."""
    clip = make_clip(context=77, patch=16)
    path = tmp_path / "coarse.pt"
    torch.save({"state_dict": clip.state_dict(), "merges": [list(m) for m in merges]}, path)
    return path


def test_command_line_writes_what_it_promises(make_voc, coarse_clip_file, tmp_path, capsys):
    """The numbers of the file against a recount from the model's own masks."""
    root = make_voc({"train": 2, "val": 3})
    out = tmp_path / "out"
    evaluation.main([
        "--stage", "clip", "--data", "voc", "--root", str(root), "--clip", str(coarse_clip_file),
        "--out", str(out), "--device", "cpu",
    ])
    report = json.loads((out / "eval_clip.json").read_text())
    assert list(report) == ["miou", "pixel_accuracy", "confusion", "iou", "protocol"]
    assert list(report["protocol"]) == [
        "data", "stage", "recipe", "long_side", "short_side", "window", "stride", "denoise",
        "background", "class_names", "attention", "prompts", "clip_sha256", "split", "pictures",
        "classes_present", "checkpoint_sha256",
    ]
    assert report["protocol"]["prompts"] == list(PROMPTS)
    assert report["protocol"]["recipe"] == "cvpr2024"
    assert (report["protocol"]["long_side"], report["protocol"]["short_side"]) == (2048, 512)
    assert report["protocol"]["pictures"] == 3
    assert report["protocol"]["denoise"] == 0.5
    assert report["protocol"]["stride"] == 0  # no windows
    assert report["protocol"]["checkpoint_sha256"] is None

    facts = DATA["voc"]
    model = plain_clip(facts, load_clip(coarse_clip_file), recipe="cvpr2024")
    dataset = Evaluation(open_split("voc", root, "val"), 2048, 512)
    confusion = torch.zeros(20, 20, dtype=torch.int64)
    for i in range(3):
        image, truth, _ = dataset[i]
        with torch.no_grad():
            logits = model(image[None]).query
        size = image.shape[1:]
        mask = segment(logits, model.output_stride, size, truth.shape, denoise=0.5)
        for t, p in zip(truth.flatten().tolist(), mask.flatten().tolist()):
            if t != IGNORE:
                confusion[t, p] += 1
    assert report["confusion"] == confusion.tolist()
    assert report["miou"] == scores(confusion)["miou"]

    assert f"mIoU {100 * report['miou']:.1f} over the 20 of 20" in capsys.readouterr().out
    assert Image.open(out / "eval_clip.png").width > 300


def test_a_checkpoint_is_known_by_what_was_learnt(tmp_path):
    """Its fingerprint; and a class that never occurs has null, for JSON has no nan."""
    facts = DATA["shapes"]
    model = plain_clip(facts, load_clip(facts.clip))
    changed = ReCLIP(model.clip, facts.classes, prompts=facts.prompts, prompt_length=2)
    changed.save(tmp_path / "rectify.pt")

    dataset = Evaluation(open_split("shapes", None, "val"), 64, 64)
    few = torch.utils.data.Subset(dataset, [0])
    evaluation.evaluate_stage(
        changed.eval(), "rectify", facts, "val", few, Protocol(64, 64), tmp_path,
        [evaluation.Column(changed, "clip", few, Protocol(64, 64))],
    )
    text = (tmp_path / "eval_rectify.json").read_text()
    report = json.loads(text)
    loaded = ReCLIP.load(tmp_path / "rectify.pt")
    assert report["protocol"]["checkpoint_sha256"] == loaded.fingerprint()
    assert "NaN" not in text and None in report["iou"].values()
    assert report["protocol"]["stride"] == 0  # Protocol's own is 224, but there are no windows


@pytest.fixture
def checkpoint(coarse_clip_file, tmp_path):
    """checkpoint(stage, recipe): a model of VOC's classes, saved as <tmp>/<stage>.pt. -> path"""
    def make(stage, recipe):
        torch.manual_seed(5)
        W_q = F.normalize(torch.randn(20, 12), dim=1)
        teacher = ReCLIP(
            load_clip(coarse_clip_file), DATA["voc"].classes, W_q=W_q, prompt_length=4,
            positional_gain=0.03, recipe=recipe,
        )
        path = tmp_path / f"{stage}.pt"
        model = teacher
        if stage == "distill":
            W_q, W_r = teacher.heads()
            model = DeepLabV2(teacher.class_names, W_q, W_r, student="tiny", recipe=recipe)
        model.save(path)
        return path
    return make


def forget_the_recipe(path):
    """Makes a checkpoint what earlier versions wrote."""
    content = torch.load(path, weights_only=True)
    del content["settings"]["recipe"]
    torch.save(content, path)


@pytest.mark.parametrize("stage, recipe, sides, denoise", [
    ("rectify", "cvpr2024", (2048, 512), 0.5),
    ("rectify", "2025", (2048, 336), 0.5),
    ("rectify", "earlier version", (2048, 336), 0.5),
    ("distill", "cvpr2024", (2048, 512), 0.0),
    ("distill", "2025", (2048, 512), 0.0),
    ("distill", "earlier version", (2048, 512), 0.0),
])
def test_a_checkpoint_is_evaluated_under_its_own_recipe(
    checkpoint, make_voc, tmp_path, capsys, stage, recipe, sides, denoise
):
    """At its sides, whatever --recipe's default; the JSON and the printed line name the recipe.
    The numbers are those of masks that are made here at these sides."""
    root = make_voc({"val": 1})                                         # 60 x 90 pixels
    earlier = recipe == "earlier version"
    recipe = "2025" if earlier else recipe
    path = checkpoint(stage, recipe)
    if earlier:
        forget_the_recipe(path)
    command = [
        "--stage", stage, "--data", "voc", "--root", str(root), "--checkpoint", str(path),
        "--out", str(tmp_path / "out"), "--device", "cpu",
    ]
    evaluation.main(command)
    report = json.loads((tmp_path / f"out/eval_{stage}.json").read_text())
    protocol = report["protocol"]
    assert protocol["recipe"] == recipe
    assert (protocol["long_side"], protocol["short_side"]) == sides
    assert protocol["denoise"] == denoise
    assert f"{stage}: voc val, recipe {recipe}, images within" in capsys.readouterr().out

    split = open_split("voc", root, "val")
    size = [sides[1], sides[1] * 90 // 60]
    image = v2.functional.resize(split.image(0)[None], size, antialias=False).float() / 255
    model = ReCLIP.load(path) if stage == "rectify" else DeepLabV2.load(path)
    with torch.no_grad():
        logits = model(image).rectified
    mask = segment(
        logits, model.output_stride, image.shape[2:], (60, 90), denoise, scale=model.scale
    )
    expected = confusion_matrix(mask, split.truth(0), 20)
    assert expected.sum() > 4000 and report["confusion"] == expected.tolist()


@pytest.mark.parametrize("stage", ["rectify", "distill"])
@pytest.mark.parametrize("own, asked", [("cvpr2024", "2025"), ("2025", "cvpr2024")])
def test_a_checkpoint_is_evaluated_under_no_other_recipe(
    checkpoint, make_voc, tmp_path, stage, own, asked
):
    root = make_voc({"val": 1})
    path = checkpoint(stage, own)
    command = [
        "--stage", stage, "--data", "voc", "--root", str(root), "--checkpoint", str(path),
        "--out", str(tmp_path / "out"), "--device", "cpu", "--recipe",
    ]
    with pytest.raises(ValueError, match=f"{stage}.pt was learnt under the recipe {own}") as caught:
        evaluation.main([*command, asked])
    assert "\n" not in str(caught.value) and asked in str(caught.value)
    assert not (tmp_path / "out").exists()

    evaluation.main([*command, own])  # its own may be named
    report = json.loads((tmp_path / f"out/eval_{stage}.json").read_text())
    assert report["protocol"]["recipe"] == own


def test_single_options_win_over_the_recipe(checkpoint, make_voc, tmp_path):
    root = make_voc({"val": 1})
    path = checkpoint("rectify", "cvpr2024")
    evaluation.main([
        "--data", "voc", "--root", str(root), "--checkpoint", str(path), "--device", "cpu",
        "--out", str(tmp_path / "out"), "--long-side", "96", "--short-side", "128",
        "--denoise", "0.25",
    ])
    protocol = json.loads((tmp_path / "out/eval_rectify.json").read_text())["protocol"]
    assert (protocol["long_side"], protocol["short_side"]) == (96, 128)
    assert (protocol["denoise"], protocol["recipe"]) == (0.25, "cvpr2024")


@pytest.mark.parametrize("recipe", [None, "cvpr2024", "2025"])
def test_plain_clip_is_evaluated_under_the_recipe_that_is_asked_for(
    coarse_clip_file, make_voc, tmp_path, recipe
):
    """MaskCLIP's row belongs to a recipe too: its sides, and how CLIP reads patches."""
    command = [
        "--stage", "clip", "--data", "voc", "--root", str(make_voc({"val": 1})), "--clip",
        str(coarse_clip_file), "--out", str(tmp_path / "out"), "--device", "cpu",
    ]
    if recipe:
        command += ["--recipe", recipe]
    evaluation.main(command)
    protocol = json.loads((tmp_path / "out/eval_clip.json").read_text())["protocol"]
    assert protocol["recipe"] == (recipe or "cvpr2024")
    assert protocol["short_side"] == (336 if recipe == "2025" else 512)


def test_plain_clip_on_other_images_runs_as_it_was_trained(tmp_path):
    evaluation.main(["--stage", "clip", "--out", str(tmp_path), "--device", "cpu"])
    protocol = json.loads((tmp_path / "eval_clip.json").read_text())["protocol"]
    assert (protocol["recipe"], protocol["denoise"]) == ("2025", 0.0)
    assert (protocol["long_side"], protocol["short_side"]) == (2048, 64)


def test_errors_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="--split nonsense"):
        evaluation.main(["--data", "shapes", "--split", "nonsense"])
    with pytest.raises(FileNotFoundError, match="train.py --stage rectify"):
        evaluation.main(["--data", "shapes", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluation.main(["--no-such-flag"])


@pytest.mark.parametrize("options, words", [
    (["--stage", "clip", "--images", "."], "--images needs --classes"),
    (["--data", "nowhere"], "--data nowhere is neither a folder"),
    (["--data", "."], "has no truth to evaluate on; --images . draws"),
    (["--data", "voc", "--classes", "a, b"], "--classes goes with your own images"),
    (["--stage", "clip", "--window", "60", "--stride", "24"], "multiples of 8"),
    (["--window", "64", "--stride", "0"], "stride is 0"),
    (["--window", "64", "--stride", "72"], "stride is 72"),
    (["--window", "-8"], "window is -8"),
    (["--short-side", "-1"], "short_side is -1"),
    (["--long-side", "0"], "long_side is 0"),
    (["--recipe", "2025"], "a recipe goes with voc, context and ade20k alone, not with shapes"),
    (["--images", ".", "--classes", "a, b", "--recipe", "cvpr2024"], "a recipe goes with voc"),
    (["--teacher", "a.pt"], "--teacher goes with --stage distill"),
    (["--denoise", "1.5"], "denoise is 1.5"),
    (["--background-threshold", "0.5"], "--background-threshold goes with --images"),
    (["--background-threshold", "2"], "must lie in 0..1"),
    (["--attention", "sclip"], "--attention goes with --stage clip"),
    (["--stage", "clip", "--images", "nothing.jpg", "--classes", "coin, ring"], "nothing.jpg"),
    (["--stage", "clip", "--checkpoint", "a.pt"], "--checkpoint goes with --stage rectify"),
    (["--stage", "distill", "--clip", "ViT-B/16"], "--clip goes with --stage clip and rectify"),
    (["--images", ".", "--checkpoint", "a.pt", "--split", "val"], "have no splits"),
])
def test_options_that_do_not_fit_end_in_one_sentence(options, words, tmp_path):
    clip_file = ROOT / "shapes_clip.pt"
    command = [*options, "--clip", str(clip_file), "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        evaluation.main(command)
    assert "\n" not in str(caught.value)


def test_images_need_to_know_by_which_model():
    images = ["--stage", "distill", "--images", "."]
    with pytest.raises(ValueError, match="--images needs .* --checkpoint runs/NAME/STAGE.pt"):
        parse_arguments(images)
    args, _, _ = parse_arguments([*images, "--checkpoint", "a/b.pt"])
    assert args.out.name == "a"


def test_windows_are_224_apart_or_less():
    for window, stride in (("64", 64), ("336", 224)):
        _, _, changes = parse_arguments(["--window", window])
        assert find_protocol(find_settings("shapes"), "rectify", **changes).stride == stride


@pytest.mark.parametrize("separator", ["-", "_"])
def test_hyphens_and_underscores_are_the_same(separator):
    options = {"long-side": "48", "short-side": "32", "background-threshold": "0.25"}
    command = ["--images", ".", "--checkpoint", "a/b.pt"]
    for name, value in options.items():
        command += ["--" + name.replace("-", separator), value]
    _, _, changes = parse_arguments(command)
    assert changes == {"long_side": 48, "short_side": 32, "background_threshold": 0.25}


def test_windows_and_attention_reach_the_evaluation(tmp_path):
    """The protocol says what was done, and each attention variant and window gives other masks."""
    runs = [
        ([], "maskclip", 0),
        (["--attention", "sclip"], "sclip", 0),
        (["--attention", "naclip"], "naclip", 0),
        (["--window", "48", "--stride", "16"], "maskclip", 48),
    ]
    mious = set()
    for options, attention, window in runs:
        command = ["--stage", "clip", "--out", str(tmp_path), "--device", "cpu", *options]
        evaluation.main(command)
        report = json.loads((tmp_path / "eval_clip.json").read_text())
        assert report["protocol"]["attention"] == attention
        assert report["protocol"]["window"] == window
        mious.add(report["miou"])
    assert len(mious) == 4


# --- Masks of any images --------------------------------------------------------------------------

BROKEN = ("zero.jpg", "text.jpg", "cut.jpg", "cut.png", "page.webp")


@pytest.fixture
def odd_images(tmp_path):
    """Thirty files such as people keep: all formats and modes, 1 x 1 to 6000 x 4000, 5 broken."""
    folder = tmp_path / "photos"
    (folder / "more" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def noise(H, W, *channels):
        return Image.fromarray(rng.integers(0, 256, (H, W, *channels), dtype=np.uint8))

    noise(40, 60, 3).resize((6000, 4000)).save(folder / "large.jpg")
    noise(1, 1, 3).save(folder / "one.png")
    noise(3, 900, 3).save(folder / "ribbon.png")
    noise(50, 40).save(folder / "grey.png")
    noise(50, 40, 4).save(folder / "rgba.png")
    noise(50, 40, 4).convert("LA").save(folder / "la.png")
    noise(50, 40, 3).quantize(9).save(folder / "palette.PNG")
    noise(50, 40, 3).convert("CMYK").save(folder / "cmyk.jpeg")
    noise(50, 40, 3).save(folder / "web.webp")
    noise(50, 40).convert("1").save(folder / "bits.png")
    sixteen_bits = rng.integers(0, 65536, (30, 44)).astype(np.uint16)
    Image.fromarray(sixteen_bits).save(folder / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    noise(30, 44, 3).save(folder / "turned.jpg", exif=turned)
    for i in range(13):
        below = folder / "more"
        if i % 2:
            below = below / "deep"
        noise(30 + i, 70 - 3 * i, 3).save(below / f"same {i // 2}.jpg")

    jpeg = (folder / "turned.jpg").read_bytes()
    png = (folder / "grey.png").read_bytes()
    contents = (b"", b"not an image", jpeg[:len(jpeg) // 2], png[:90], b"<html>")
    for name, content in zip(BROKEN, contents, strict=True):
        (folder / name).write_bytes(content)
    assert sum(path.is_file() for path in folder.rglob("*")) == 30
    return folder


def test_thirty_odd_images_are_trained_on_and_segmented(
    odd_images, tiny_clip_file, tmp_path, capsys
):
    """25 of 30 are readable. Masks have the images' own sizes, areas are those of the index PNG."""
    import train
    out = tmp_path / "out"
    train.main([
        "--stage", "rectify", "--data", str(odd_images), "--classes", "cat | grass, dog, tree",
        "--clip", str(tiny_clip_file), "--crop", "32", "--epochs", "1", "--out", str(out),
        "--device", "cpu",
    ])
    printed = capsys.readouterr()
    assert "images that each class was found in, of 25" in printed.out
    assert "cat | grass" in printed.out
    for name in BROKEN:
        assert f"skipped {name}" in printed.err

    evaluation.main([
        "--stage", "rectify", "--images", str(odd_images), "--checkpoint", str(out / "rectify.pt"),
        "--device", "cpu", "--background-threshold", "0.5",
    ])
    assert "25 images segmented, 5 unreadable" in capsys.readouterr().out
    masks = out / "masks"
    assert len(list(masks.rglob("*.json"))) == 25

    sizes = {
        "large.jpg": (6000, 4000),
        "one.png": (1, 1),
        "ribbon.png": (900, 3),
        "turned.jpg": (30, 44),
        "more/deep/same 0.jpg": (67, 31),
    }
    for name, size in sizes.items():
        index = Image.open(masks / f"{name}.index.png")
        assert index.mode == "P" and index.size == size
        values, counts = np.unique(np.array(index), return_counts=True)
        assert set(values) <= {0, 1, 2, 3}

        report = json.loads((masks / f"{name}.json").read_text())
        assert list(report) == [
            "picture", "size", "areas", "index", "background_threshold", "protocol"
        ]
        assert report["picture"] == name and report["size"] == list(size)
        areas = list(report["areas"].values())
        assert sum(areas) == pytest.approx(1)
        assert areas == sorted(areas, reverse=True)  # what covers most comes first
        assert len(report["areas"]) == len(report["index"]) == len(values)
        for value, count in zip(values, counts):
            found = ("background", "cat", "dog", "tree")[value]
            assert report["areas"][found] == pytest.approx(count / counts.sum())
            assert report["index"][found] == value

        assert Image.open(masks / f"{name}.overlay.png").mode == "RGB"


def test_a_student_segments_without_the_teacher_that_lies_beside_it(tmp_path):
    """Your own images want no drawing of the teacher, so that neither it nor its CLIP is opened."""
    W = torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    DeepLabV2(["cat", "dog"], W, W / 2, student="tiny").save(tmp_path / "distill.pt")
    (tmp_path / "rectify.pt").write_bytes(b"learnt on a CLIP that is not here")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "photos" / "a.png")

    evaluation.main([
        "--stage", "distill", "--checkpoint", str(tmp_path / "distill.pt"),
        "--images", str(tmp_path / "photos"), "--device", "cpu",
    ])
    assert (tmp_path / "masks" / "a.png.index.png").is_file()


def test_each_column_of_examples_sees_images_at_its_own_sides(monkeypatch):
    split = open_split("shapes", None, "val")
    seen = set()

    def mask_of(model, stage, image, size, protocol):
        seen.add((model, tuple(image.shape[1:]), protocol))
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(evaluation, "predict_mask", mask_of)
    small, large = Protocol(32, 32), Protocol(96, 96)
    columns = [
        Column("teacher", "rectify", Evaluation(split, 32, 32), small),
        Column("student", "distill", Evaluation(split, 96, 96), large),
    ]
    draw_examples(columns, DATA["shapes"], count=1, among=2)
    assert seen == {("teacher", (32, 32), small), ("student", (96, 96), large)}


def test_a_teacher_is_drawn_by_its_own_protocol(checkpoint, make_voc, tmp_path, monkeypatch):
    """Beside its student, at the sides of rectification and with its denoising."""
    root = make_voc({"val": 1})
    student, teacher = checkpoint("distill", "2025"), checkpoint("rectify", "2025")
    given = []
    monkeypatch.setattr(evaluation, "evaluate_stage", lambda *arguments: given.append(arguments))
    evaluation.main([
        "--stage", "distill", "--data", "voc", "--root", str(root), "--checkpoint", str(student),
        "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--device", "cpu",
    ])
    (_, _, _, _, dataset, protocol, _, others, _), = given
    assert protocol == Protocol(2048, 512) and dataset.short_side == 512
    assert [column.stage for column in others] == ["clip", "rectify"]
    for column in others:
        assert column.protocol == Protocol(2048, 336, denoise=0.5)
        assert column.dataset.short_side == 336


def test_own_images_made_smaller_are_averaged(tmp_path, monkeypatch):
    """One column of four is white. Interpolated between the nearest two, all would be half so."""
    stripes = np.zeros((80, 80), np.uint8)
    stripes[:, 1::4] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    seen = []

    def mask_of(model, stage, image, size, protocol):
        seen.append(image)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(evaluation, "predict_mask", mask_of)
    facts = DATA["shapes"]
    model = plain_clip(facts, load_clip(facts.clip))
    images = Folder(tmp_path / "a.png")
    evaluation.segment_images(model, "clip", facts, images, Protocol(20, 20), tmp_path)
    assert seen[0].shape == (3, 20, 20) and (seen[0][..., 2:-2] - 0.25).abs().max() < 0.05
