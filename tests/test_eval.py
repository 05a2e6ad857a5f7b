"""eval.py: mIoU, from an image of any kind to its mask, what is written, and the command line.

What it refuses is in test_refusals.py. Photographs from training to masks: test_long_runs.py.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import reference
from clip_model import load_clip
from conftest import close, command, sentence
from datasets import DATA, IGNORE, Evaluation, Folder, open_split, own_images
from deeplab import DeepLabV2
from eval import (
    GREY,
    confusion_matrix,
    draw_examples,
    draw_grid,
    evaluate_split,
    open_model,
    plain_clip,
    predict_mask,
    scores,
    segment_image,
    segment_images,
    without_biases,
)
from reclip import ReCLIP, query_text_features

CLASSES = ["cat | kitten", "dog", "a/b: c"]
COLORS = [(128, 0, 0), (0, 128, 0), (128, 128, 0)]  # VOC's first three


class Reads:
    """A model to which a channel of the image says the class of each pixel: 0, 1 or 2.

    It is sure of class 0 and 2, at which it has the probability .72, and less so of class 1: .58.
    It keeps what it was shown.
    """
    output_stride = 1
    scale = 1
    W_q = torch.zeros(3, 1)
    class_names = CLASSES

    def __init__(self, channel=0, stage="distill", long_side=99, short_side=0, antialias=True):
        self.channel = channel
        self.stage = stage
        self.protocol = dict(
            long_side=long_side, short_side=short_side, antialias=antialias, denoise=0.0
        )
        self.seen = []

    def __call__(self, images):
        self.seen.append(images[0])
        value = 255 * images[:, self.channel, None]                     # (1, 1, H, W)
        classes = torch.arange(3).view(1, 3, 1, 1)
        return SimpleNamespace(rectified=-(value - classes).square())   # (1, 3, H, W)

    def to_pixels(self, grid, height, width):
        return grid

    def learnt(self):
        return {"channel": torch.tensor(self.channel)}


class Made:
    """A split of given images and truths."""
    def __init__(self, images, truths):
        self.images = images
        self.truths = truths
        self.names = [str(i) for i in range(len(images))]

    def __len__(self):
        return len(self.images)

    def image(self, i):
        return self.images[i]

    def truth(self, i):
        return self.truths[i]


def image_of(*masks):
    """uint8 (3, H, W): each channel the mask of the same number, further ones 100."""
    image = torch.full((3, *masks[0].shape), 100, dtype=torch.uint8)
    for channel, mask in enumerate(masks):
        image[channel] = mask
    return image


def random_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def save(image, path, **more):
    """uint8 (3, H, W) as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **more)


def index_of(path):
    """An index PNG as a mask: 0 is IGNORE, 1 is class 0."""
    return torch.from_numpy(np.array(Image.open(path))) - 1


# --- mIoU -----------------------------------------------------------------------------------------

def test_pairs_of_classes_are_counted_where_the_truth_is_known():
    truth = torch.randint(3, (7, 9), dtype=torch.uint8)
    truth[2:4] = IGNORE
    prediction = torch.randint(4, (7, 9))
    prediction[2, :5] = IGNORE  # a background by threshold, where nothing is evaluated

    found = confusion_matrix(prediction, truth, 4)

    expected = np.zeros((4, 4), int)
    for y in range(7):
        for x in range(9):
            if truth[y, x] != IGNORE:
                expected[truth[y, x], prediction[y, x]] += 1
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("value", [3, IGNORE])
def test_what_is_no_class_is_not_counted_as_another(value):
    with pytest.raises(ValueError) as caught:
        confusion_matrix(torch.tensor([[0, value]]), torch.tensor([[0, 1]]), 3)
    assert f"holds {value}, and there are 3 classes" in sentence(caught)


@pytest.mark.parametrize("data, folder", [
    ("voc", "VOCdevkit/VOC2012/SegmentationClass"),
    ("context", "VOCdevkit/VOC2010/SegmentationClassContext"),
    ("ade20k", "ADEChallengeData2016/annotations/validation"),
])
def test_miou_on_real_truth_is_a_count_on_the_values_of_its_files(shared, data, folder):
    """What is evaluated is the truth itself, moved by ten pixels and wrapped around."""
    files = shared(folder)
    root = files.parents[folder.count("/")]
    split = open_split(data, root, "val")
    C = len(DATA[data].classes)

    confusion = torch.zeros(C, C, dtype=torch.int64)
    both = np.zeros(C + 1)    # of each value 1..C: pixels that are it AND are called so
    either = np.zeros(C + 1)  # OR
    present = set()
    for i, name in enumerate(split.names):
        truth = split.truth(i)
        prediction = torch.where(truth == IGNORE, 0, truth).roll(10, 1)
        confusion += confusion_matrix(prediction, truth, C)

        values = np.array(Image.open(files / f"{name}.png")).astype(int)
        evaluated = (values != 0) & (values != 255)
        called = np.roll(np.where(evaluated, values, 1), 10, 1)
        present |= set(values[evaluated].tolist())
        for c in range(1, C + 1):
            both[c] += (evaluated & (values == c) & (called == c)).sum()
            either[c] += (evaluated & ((values == c) | (called == c))).sum()

    expected = sum(both[c] / either[c] for c in present) / len(present)
    assert 0.2 < expected < 1
    assert scores(confusion)["miou"] == pytest.approx(expected, abs=1e-12)


# --- From one image to its mask -------------------------------------------------------------------

def literal_mask(model, image, size, denoise, background):
    """The mask, and the probabilities (C, H0, W0) of each pixel."""
    grid = model(image[None]).rectified[0].detach()                     # (C, h, w)
    H, W = image.shape[1:]
    seen = reference.enlarge(grid, model.output_stride, H, W)           # (C, H, W)
    rows = reference.bilinear_weights(H, size[0]).to(grid)
    columns = reference.bilinear_weights(W, size[1]).to(grid)
    pixels = rows @ seen @ columns.T                                    # (C, H0, W0)
    probabilities = (model.scale * pixels).softmax(0)

    mask = torch.zeros(size, dtype=torch.uint8)
    best_of_class = (model.scale * grid).softmax(0).amax((1, 2))
    left = [c for c in range(len(grid)) if best_of_class[c] >= denoise]
    for y in range(size[0]):
        for x in range(size[1]):
            c = max(left, key=lambda c: pixels[c, y, x])
            mask[y, x] = c if probabilities[c, y, x] >= background else IGNORE
    return mask, probabilities


@pytest.mark.parametrize("size", [(10, 13), (25, 31), (6, 9)])
@pytest.mark.parametrize("kind", ["rectified CLIP", "student", "student with a classifier"])
def test_a_mask_is_the_best_class_of_the_enlarged_logits(make_model, kind, size):
    """First all cells become pixels, of which some lie beyond the image and are cut off."""
    model = make_model().eval()
    if kind != "rectified CLIP":
        head = "query_reference" if kind == "student" else "original"
        W_q, W_r = [W / 20 for W in model.heads()]  # so that untrained features are sure of nothing
        model = DeepLabV2(model.class_names, W_q, W_r, student="tiny", head=head).double().eval()
    image = torch.rand(3, 10, 13, dtype=torch.float64)

    # Thresholds that some classes, and some pixels, do not pass.
    grid = (model.scale * model(image[None]).rectified[0]).softmax(0).detach()  # (C, h, w)
    denoise = grid.amax((1, 2)).sort().values[1:3].mean().item()
    background = grid.amax(0).flatten().sort().values[5:7].mean().item()
    model.protocol = {"denoise": denoise}
    mask, probabilities = predict_mask(model, image, size, background, probabilities=True)

    expected_mask, expected = literal_mask(model, image, size, denoise, background)
    close(probabilities, expected, 1e-7)
    assert torch.equal(mask, expected_mask)
    assert 0 < (mask == IGNORE).sum() < mask.numel()
    assert torch.equal(predict_mask(model, image, size, background), mask)


def test_denoise_and_background_are_off_unless_asked_for():
    mask = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)

    assert torch.equal(segment_image(Reads(), image_of(mask)), mask)


@pytest.fixture
def student():
    """A tiny student of CLASSES, to which images are shown at their own size."""
    W_q, W_r = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    protocol = dict(long_side=99, short_side=0, antialias=True, denoise=0.0)
    return DeepLabV2(CLASSES, W_q, W_r / 2, student="tiny", protocol=protocol).eval()


def whole_mask(model, image):
    """uint8 (3, H, W) -> (H, W): the best class of the enlarged logits."""
    grid = model(image[None] / 255).rectified[0]
    return reference.enlarge(grid, model.output_stride, *image.shape[1:]).argmax(0).byte()


@pytest.mark.parametrize("kind", ["path", "str", "PIL", "tensor", "float tensor"])
def test_an_image_may_be_a_path_or_an_image_or_a_tensor(student, tmp_path, kind):
    image = random_bytes(3, 21, 30)
    save(image, tmp_path / "a.png")
    given = {
        "path": tmp_path / "a.png",
        "str": str(tmp_path / "a.png"),
        "PIL": Image.fromarray(image.permute(1, 2, 0).numpy()),
        "tensor": image,
        "float tensor": image / 255,
    }

    mask = segment_image(student, given[kind])

    assert mask.dtype == torch.uint8 and len(mask.unique()) > 1
    assert torch.equal(mask, whole_mask(student, image))


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("kind", ["16 bits", "transparent", "rotated", "CMYK"])
def test_odd_files_are_read_alike_by_us_and_by_pillow(student, tmp_path, kind, opened):
    """But a camera's turn is undone in files alone: a PIL image is segmented as it lies."""
    path = tmp_path / "odd.png"
    image = random_bytes(3, 21, 30)
    if kind == "16 bits":
        image = image[:1].expand(3, -1, -1)
        Image.fromarray(image[0].numpy().astype(np.uint16) * 257).save(path)
    if kind == "transparent":
        alpha = 255 * random_bytes(1, 21, 30).bitwise_and(1)
        save(torch.cat([image, alpha]), path)
        image = torch.where(alpha == 0, 255, image)
    if kind == "rotated":
        turn = Image.Exif()
        turn[0x0112] = 6  # its right side is to be the top's
        save(image, path, exif=turn)
        if not opened:
            image = image.rot90(-1, (1, 2))

    if kind == "CMYK":
        printed = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("CMYK")
        path = tmp_path / "odd.tiff"
        printed.save(path)
        image = torch.from_numpy(np.array(printed.convert("RGB"))).permute(2, 0, 1)

    mask = segment_image(student, Image.open(path) if opened else path)

    assert torch.equal(mask, whole_mask(student, image))


@pytest.mark.parametrize("averaged", [True, False])
def test_an_image_is_shown_as_the_model_keeps_it(averaged):
    """One column of four is white. Made smaller, all four count, or the nearest two."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    image[:, :, 1::4] = 255
    model = Reads(long_side=30, short_side=40, antialias=averaged)

    mask = segment_image(model, image)

    assert mask.shape == (80, 120)
    assert model.seen[0].shape == (3, 20, 30)
    shades = (255 * model.seen[0][..., 2:-2]).round().unique().tolist()
    assert all(abs(shade - 255 / 4) < 8 for shade in shades) == averaged


def test_a_model_has_to_say_how_images_are_shown_to_it(student):
    image = random_bytes(3, 21, 30)
    for protocol in (None, {"long_side": 2048}):
        student.protocol = protocol
        with pytest.raises(ValueError) as caught:
            segment_image(student, image)
        assert "set model.protocol = {'long_side'" in sentence(caught)

    student.protocol = {"long_side": 2048, "short_side": 0, "antialias": True, "denoise": 0.0}
    assert segment_image(student, image).shape == (21, 30)


# --- A model on a split ---------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["clip", "rectify", "distill"])
def test_the_numbers_of_a_run_are_those_of_a_count(trained, small_shapes, stage):
    """Each stage of `python train.py`, on the 5 images of the test split."""
    file = "distill.pt" if stage == "distill" else "rectify.pt"
    model = open_model(trained.out / file)
    assert isinstance(model, DeepLabV2 if stage == "distill" else ReCLIP)
    split = open_split("shapes", None, "test")

    expected = np.zeros((8, 8), int)
    for i in range(5):
        image = split.image(i)[None] / 255                              # 64 x 64, as it is seen
        grid = model(image).rectified[0]
        if stage == "clip":
            grid = torch.einsum("cd,dhw->chw", model.W_q, model.features(image)[0])
        mask = reference.enlarge(grid, model.output_stride, 64, 64).argmax(0)
        for t, p in zip(split.truth(i).flatten().tolist(), mask.flatten().tolist()):
            if t != IGNORE:
                expected[t, p] += 1

    report = json.loads((trained.out / f"eval_{stage}.json").read_text())
    assert report["confusion"] == expected.tolist()
    iou = [expected[c, c] / (expected[c].sum() + expected[:, c].sum() - expected[c, c])
           for c in range(8)]
    assert list(report["iou"]) == list(model.class_names)
    assert list(report["iou"].values()) == pytest.approx(iou)
    assert report["miou"] == pytest.approx(sum(iou) / 8)
    assert report["pixel_accuracy"] == pytest.approx(expected.trace() / expected.sum())

    protocol = report["protocol"]
    shown = {key: protocol[key] for key in ("data", "split", "images", "stage", "long_side")}
    assert shown == dict(data="shapes", split="test", images=5, stage=stage, long_side=2048)
    assert f"{stage}: shapes test, images within 2048 x 64, denoise off" in trained.printed


def test_files_of_results_say_which_weights_they_are_of(trained):
    known = set()
    for folder, stage in (("", "clip"), ("", "rectify"), ("", "distill"),
                          ("reference_only", "rectify")):
        report = json.loads((trained.out / folder / f"eval_{stage}.json").read_text())
        known.add(report["protocol"]["checkpoint_sha256"])
    assert len(known) == 4


def test_what_is_written_of_a_split(tmp_path, capsys):
    """Two images, counted together. A class that does not occur has no number; JSON has no nan."""
    truths = [torch.zeros(4, 5, dtype=torch.uint8), torch.ones(6, 3, dtype=torch.uint8)]
    masks = [truths[0].clone(), truths[1].clone()]
    masks[0][0] = 2
    masks[1][0] = 0
    split = Made([image_of(mask) for mask in masks], truths)

    beside = [(Reads(1), None)]  # whose mask is of class 2 all over
    evaluate_split(Reads(0), DATA["shapes"], split, "val", tmp_path, beside)

    text = (tmp_path / "eval_distill.json").read_text()
    report = json.loads(text)
    assert report["confusion"] == [[15, 0, 5], [3, 15, 0], [0, 0, 0]]
    assert report["iou"] == pytest.approx({CLASSES[0]: 15 / 23, "dog": 15 / 18, CLASSES[2]: None})
    assert report["protocol"]["classes_present"] == 2
    assert "NaN" not in text
    printed = capsys.readouterr().out
    assert "absent" in printed
    assert f"mIoU {50 * (15 / 23 + 15 / 18):.1f} over the 2 of 3 classes present" in printed

    # Image 1, in which all pixels differ, comes first; the model is in the last column.
    drawn = Image.open(tmp_path / "eval_distill.png")
    centers = [drawn.getpixel((76 + 144 * column, 96)) for column in range(1, 4)]
    assert centers == [DATA["shapes"].palette[c] for c in (1, 2, 1)]


# --- Masks as images ------------------------------------------------------------------------------

def test_examples_are_images_truth_and_masks_side_by_side():
    """What is not evaluated is grey in the masks too: right or wrong, it does not count.

    After 28 pixels of titles a row each, tiles of 136 pixels with gaps of 8; then the legend.
    """
    truths = torch.randint(3, (2, 17, 17), dtype=torch.uint8)
    truths[:, :5] = IGNORE
    first, last = torch.randint(3, (2, 2, 17, 17), dtype=torch.uint8)
    last[1, 6:] = first[1, 6:]               # they differ less in image 1
    split = Made([image_of(first[i], last[i]) for i in range(2)], truths)
    dataset = SimpleNamespace(palette=COLORS, classes=CLASSES)

    drawn = draw_examples([(Reads(0), None), (Reads(1), 0.5)], dataset, split)

    found = np.array(drawn)                                             # (height, width, 3)
    for row in range(2):
        tiles = [split.image(row).permute(1, 2, 0)]
        for mask in (truths[row], first[row], last[row]):
            number = torch.where(truths[row] == IGNORE, 3, mask).long()
            tiles.append(torch.tensor([*COLORS, GREY], dtype=torch.uint8)[number])
        for column, tile in enumerate(tiles):
            top, left = 28 + 144 * row, 8 + 144 * column
            large = np.kron(tile.numpy(), np.ones((8, 8, 1), np.uint8))
            assert np.array_equal(found[top:top + 136, left:left + 136], large)
    legend = {color for _, color in drawn.crop((0, 316, *drawn.size)).getcolors(10 ** 6)}
    assert set(COLORS) <= legend


def test_examples_are_those_in_which_first_and_last_masks_differ_most(monkeypatch):
    """At the share of the image's pixels, of those evaluated; equals stay in order."""
    differing = [2, 0, 15, 2, 9, 15]  # pixels in which they differ, in image 0, 1, ...
    truths, images = [], []
    for i, count in enumerate(differing):
        first, last = torch.zeros(2, 20, dtype=torch.uint8)
        last[5:5 + count] = 1
        last[:5] = (i == 1)                      # much, but not evaluated
        truth = torch.zeros(20, dtype=torch.uint8)
        truth[:5] = IGNORE
        if i == 4:
            truth[5 + count:] = IGNORE           # all that is evaluated differs
        number = torch.full((20,), i)
        truths.append(truth.view(4, 5))
        images.append(image_of(*[mask.view(4, 5) for mask in (first, last, number)]))
    split = Made(images, truths)
    shown = []

    def note(rows, titles, entries):
        shown.append(([row[0][2, 0, 0].item() for row in rows], titles))

    monkeypatch.setattr(evaluation, "draw_grid", note)
    columns = [(Reads(0, "clip"), None), (Reads(0, "rectify"), 0.25), (Reads(1, "distill"), 0.5)]
    draw_examples(columns, DATA["shapes"], split, count=4)
    draw_examples(columns, DATA["shapes"], split, count=2, among=4)
    draw_examples(columns[2:], DATA["shapes"], split, count=3)

    titles = ["image", "truth", "CLIP", "rectified 25.0", "distilled 50.0"]
    assert shown[0] == ([2, 5, 4, 0], titles)
    assert shown[1][0] == [2, 0]
    assert shown[2][0] == [0, 1, 2]


def test_each_column_of_examples_is_made_at_its_own_sides():
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    teacher, student = Reads(0, "rectify", 999, 20), Reads(0, "distill", 90, 999)
    split = Made([image_of(mask)], [mask])

    draw_examples([(teacher, None), (student, None)], DATA["shapes"], split)

    assert {tuple(image.shape) for image in teacher.seen} == {(3, 20, 30)}
    assert {tuple(image.shape) for image in student.seen} == {(3, 60, 90)}


def test_photographs_in_a_grid_are_averaged_and_keep_their_shape():
    """After a title of 20 pixels, tiles of 20 with gaps of 10."""
    stripes = torch.zeros(3, 40, 80, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    sheet = draw_grid([[stripes, stripes]], ["", ""], tile=20, gap=10)

    for left in (10, 40):
        middle = [sheet.getpixel((left + 9, y))[0] for y in range(30, 50)]
        assert middle == pytest.approx([255] * 5 + [128] * 10 + [255] * 5, abs=2)


# --- Masks of one's own images --------------------------------------------------------------------

@pytest.fixture
def stripes(tmp_path):
    """A file of 10 x 6 pixels: class 0 in three columns, then 1 in three, 2 in four."""
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2], dtype=torch.uint8).expand(6, 10)
    save(image_of(mask), tmp_path / "photos" / "stripes.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("threshold", [0.0, 0.65])
def test_what_is_written_of_an_image(stripes, tmp_path, threshold):
    """Class 1 has the probability .58, the others .72."""
    model = Reads()
    segment_images(model, Folder(stripes), tmp_path / "out", True, threshold)

    folder = tmp_path / "out" / "masks" / "distill"
    values = [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # 0: background
    if threshold:
        values[3:6] = [0, 0, 0]
    index = Image.open(folder / "stripes.png.index.png")
    assert (index.mode, index.size) == ("P", (10, 6))
    assert np.array(index).tolist() == [values] * 6
    colors = [(0, 0, 0), *COLORS]
    assert [index.convert("RGB").getpixel((x, 0)) for x in (0, 4, 9)] == [
        colors[values[x]] for x in (0, 4, 9)]

    # Enlarged to 320 pixels: half the image, half the color of the class; a background as it was.
    overlay = Image.open(folder / "stripes.png.overlay.png")
    assert overlay.width >= 320 and overlay.height > 192
    for x in (1, 4, 8):
        expected = (x // 3 if x < 6 else 2, 100, 100)
        if values[x]:
            expected = [(a + b) / 2 for a, b in zip(expected, colors[values[x]])]
        assert overlay.getpixel((32 * x + 16, 96)) == pytest.approx(expected, abs=1)

    report = json.loads((folder / "stripes.png.json").read_text(encoding="utf-8"))
    middle = "background" if threshold else "dog"
    assert list(report["areas"]) == ["a/b: c", "cat", middle]  # the largest first
    assert list(report["areas"].values()) == pytest.approx([0.4, 0.3, 0.3])
    assert report["index"] == {"a/b: c": 3, "cat": 1, middle: 0 if threshold else 2}
    assert (report["image"], report["size"]) == ("stripes.png", [10, 6])
    assert report["protocol"]["background_threshold"] == threshold

    maps = {path.name.removeprefix("stripes.png.") for path in folder.glob("*.png")}
    found = {"cat.png", "a_b_ c.png"} | (set() if threshold else {"dog.png"})
    assert maps == {"index.png", "overlay.png"} | found
    levels = []
    for c in (0, 1, 2):
        e = [math.exp(-(c - j) ** 2) for j in range(3)]
        levels.append(round(255 * e[0] / sum(e)))
    of_cat = np.array(Image.open(folder / "stripes.png.cat.png"))
    assert of_cat.tolist() == [np.repeat(levels, (3, 3, 4)).tolist()] * 6


def test_masks_stay_below_their_folder_whatever_images_are_called(tmp_path):
    """Names are absolute where two folders have a file of one name; on Windows with a drive."""
    mask = torch.zeros(5, 4, dtype=torch.uint8)
    for folder in ("a", "b"):
        save(image_of(mask), tmp_path / folder / "same.png")
    images = Folder(tmp_path / "a", tmp_path / "b")
    segment_images(Reads(), images, tmp_path / "out")
    masks = tmp_path / "out" / "masks" / "distill"
    for folder in ("a", "b"):
        below = (tmp_path / folder / "same.png").relative_to(tmp_path.anchor)
        assert (masks / f"{below}.index.png").is_file()

    images.names = [r"C:\photos\..\same.png", "../../../same.png"]
    segment_images(Reads(), images, tmp_path / "windows")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.index.png")
               if "out" not in path.parts}
    assert written == {f"windows/masks/distill/{name}.index.png"
                       for name in ("C/photos/same.png", "same.png")}


# --- Models ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, short_side", [("cvpr2024", 512), ("2025", 336)])
def test_plain_clip_is_the_query_alone(clip, recipe, short_side):
    """Shown as the recipe's rectification is, and read as it is."""
    voc = replace(DATA["voc"], prompts=("a {}", "the {}"))
    model = plain_clip(clip, voc, recipe)
    W_q = query_text_features(clip, voc.classes, voc.prompts)
    other = ReCLIP(clip, voc.classes, W_q=W_q, recipe=recipe, prompt_length=2)
    image = torch.rand(1, 3, 13, 18)

    expected = torch.einsum("cd,bdhw->bchw", W_q, other.features(image))
    close(model(image).rectified, expected, 1e-6)
    assert not model.training
    assert model.protocol == dict(
        long_side=2048, short_side=short_side, antialias=False, denoise=0.5)


def test_the_plain_clip_of_a_model_is_as_it_was_before_it_learnt(clip):
    """Of a published one too, which reads patches with a class token of its own."""
    class_token = torch.randn(clip.visual.class_embedding.numel())
    reading = {"class_token": class_token, "eps": 1e-2}
    names = ["cat", "dog", "grass"]
    model = ReCLIP(
        clip, names, W_q=torch.eye(3, 12), reading=reading, protocol={"denoise": 0.5},
        prompt_length=2,
    ).eval()
    image = torch.rand(1, 3, 13, 18)

    plain = without_biases(model)

    close(plain(image).rectified, model(image).query, 1e-6)
    assert plain.stage == "clip" and plain.protocol == model.protocol and not plain.training


# --- The command line -----------------------------------------------------------------------------

def test_plain_clip_on_a_data_set(make_voc, make_clip, merges, tmp_path):
    """By the prompts, the recipe and the numbers that are given; at the size of the truth."""
    root = make_voc({"val": 2})
    content = {"state_dict": make_clip(context=77).state_dict(), "merges": merges}
    torch.save(content, tmp_path / "tiny.pt")
    templates = ("a photo of the {}", "the {} in a scene")
    (tmp_path / "prompts.txt").write_text("\n".join(templates))
    evaluation.main([
        "--stage", "clip", "--data", "voc", "--root", str(root), "--recipe", "2025",
        "--clip", str(tmp_path / "tiny.pt"), "--prompts", str(tmp_path / "prompts.txt"),
        "--short-side", "32", "--denoise", "0.2", "--out", str(tmp_path), "--device", "cpu",
    ])

    clip = load_clip(tmp_path / "tiny.pt")
    model = plain_clip(clip, replace(DATA["voc"], prompts=templates), "2025")
    model.protocol["denoise"] = 0.2
    expected = torch.zeros(20, 20, dtype=torch.int64)
    for image, truth, _ in Evaluation(open_split("voc", root, "val"), 2048, 32, False):
        assert image.shape[1] == 32 and truth.shape[0] >= 60
        mask = predict_mask(model, image, truth.shape)
        expected += confusion_matrix(mask, truth, 20)
    report = json.loads((tmp_path / "eval_clip.json").read_text())
    assert report["confusion"] == expected.tolist()
    facts = {key: report["protocol"][key] for key in ("recipe", "denoise", "prompts", "short_side")}
    assert facts == dict(recipe="2025", denoise=0.2, prompts=list(templates), short_side=32)


def test_a_rectified_clip_is_drawn_beside_plain_clip_by_one_protocol(
    trained, small_shapes, monkeypatch
):
    calls = []
    monkeypatch.setattr(evaluation, "evaluate_split", lambda *arguments: calls.append(arguments))
    evaluation.main([
        "--checkpoint", str(trained.out / "rectify.pt"), "--long-side", "48", "--device", "cpu",
    ])

    (model, dataset, split, split_name, out, ((plain, _),), _), = calls
    assert (model.stage, plain.stage, split_name, len(split)) == ("rectify", "clip", "val", 4)
    assert plain.protocol == model.protocol and torch.equal(plain.W_q, model.W_q)
    assert model.protocol["long_side"] == 48 and model.protocol["short_side"] == 64
    assert out == trained.out


def test_a_student_needs_no_clip(trained, stripes, tmp_path, monkeypatch):
    """What it is, the file says; masks go beside it."""
    def refuse(*arguments):
        raise AssertionError("CLIP is opened")

    monkeypatch.setattr(evaluation, "load_clip", refuse)
    (tmp_path / "moved").mkdir()
    shutil.copy(trained.out / "distill.pt", tmp_path / "moved" / "mine.pt")
    (tmp_path / "moved" / "rectify.pt").write_bytes(b"learnt on a CLIP that is not here")
    evaluation.main([
        "--checkpoint", str(tmp_path / "moved" / "mine.pt"), "--images", str(stripes),
        "--device", "cpu",
    ])

    assert (tmp_path / "moved/masks/distill/stripes.png.index.png").is_file()


def test_own_images_where_a_terminal_cannot_print_their_names(trained, small_shapes, tmp_path):
    split = open_split("shapes", None, "val")
    folder = tmp_path / "Fotos \u732b"
    names = ["\u732b.png", "Gr\u00fc\u00dfe/1.png"]
    for i, name in enumerate(names):
        save(split.image(i), folder / name)
    (folder / "\u72ac.jpg").write_bytes(b"broken")

    result = command(
        "eval.py", "--images", folder, "--checkpoint", trained.out / "rectify.pt",
        "--short-side", "48", "--background-threshold", "0.9", "--out", tmp_path / "Masken \u732b",
        "--device", "cpu",
        cwd=tmp_path, PYTHONIOENCODING="ascii",
    )

    assert "2 images segmented, 1 unreadable" in result.stdout
    model = open_model(trained.out / "rectify.pt")
    model.protocol["short_side"] = 48
    for i, name in enumerate(names):
        path = tmp_path / "Masken \u732b/masks/rectify" / name
        mask = segment_image(model, split.image(i), background_threshold=0.9)
        assert 0 < (mask == IGNORE).sum() < mask.numel()
        assert torch.equal(index_of(f"{path}.index.png"), mask)
        report = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        assert report["image"] == name and sum(report["areas"].values()) == pytest.approx(1)
        assert report["protocol"]["short_side"] == 48


def test_plain_clip_is_read_by_the_first_recipe_of_its_data_set(clip):
    for dataset, recipe in (
        (own_images("own", ("cat", "dog")), "2025"), (DATA["voc"], "cvpr2024")
    ):
        model = plain_clip(clip, replace(dataset, prompts=("a {}",)))
        assert model.options.recipe == recipe
