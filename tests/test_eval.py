"""eval.py: the confusion matrix, mIoU, the protocol's steps, and what is written."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
from conftest import ROOT
from datasets import DATA, IGNORE, open_split
from eval import GREY, WHITE, color_mask, confusion_matrix, draw_grid, scores, slide
from reclip import segment, strong_classes


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
    assert strong_classes(logits, 0.5).tolist() == [True, True, False]
    flat = torch.zeros(1, 3, 2, 2)
    assert strong_classes(flat, 0.5).all()  # none passes: none is dropped
    assert strong_classes(logits, 0.0).all()  # switched off


def test_segment_stays_in_place():
    """A 20 x 30 picture in 8-pixel cells: a 3 x 4 grid over 24 x 32; the mask's edge must stand where the
    grid's edge stands, not be stretched with the padding."""
    grid = torch.zeros(1, 2, 3, 4)
    grid[:, 0] = 0.5
    grid[:, 1, :, 2:] = 1.0  # right half of the padded picture: from x = 16
    mask = segment(grid, 8, (20, 30), (20, 30))
    assert (mask[:, :16] == 0).all() and (mask[:, 16:] == 1).all()
    double = segment(grid, 8, (20, 30), (40, 60))
    assert (double[:, :31] == 0).all() and (double[:, 33:] == 1).all()


def test_segment_is_bilinear_and_strips_leave_no_seam(monkeypatch):
    """Against torch's own enlarging of the padded grid; then in strips of one row each."""
    grid = torch.randn(1, 5, 4, 6)
    expected = F.interpolate(grid, scale_factor=16, mode="bilinear")[0, :, :60, :90].argmax(0)
    assert torch.equal(segment(grid, 16, (60, 90), (60, 90)).long(), expected)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, *more: split(self, 1, *more))
    assert torch.equal(segment(grid, 16, (60, 90), (60, 90)).long(), expected)


def test_segment_with_dropped_class_and_background():
    """Class 0 is dropped by denoising, so its index must not shift the others; weak pixels become background."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 0.5
    logits[0, 1, 0, 0] = 1.0
    assert segment(logits, 1, (2, 2), (2, 2), denoise=0.5).tolist() == [[1, 2], [2, 2]]
    logits[0, :, 1, 1] = torch.tensor([0.0, 0.0, 0.001])  # softmax(100 * that): 0.36 at best
    assert segment(logits, 1, (2, 2), (2, 2), background=0.4).tolist() == [[1, 2], [2, IGNORE]]
    assert segment(logits, 1, (2, 2), (2, 2), background=0.3).tolist() == [[1, 2], [2, 2]]
    # a class that denoising dropped still takes its share of the probability
    logits[0, :, 1, 1] = torch.tensor([0.004, 0.0, 0.004])
    assert segment(logits, 1, (2, 2), (2, 2), denoise=0.5, background=0.45).tolist() == [[1, 2], [2, IGNORE]]
    assert segment(logits, 1, (2, 2), (2, 2), denoise=0.5, background=0.35).tolist() == [[1, 2], [2, 2]]


class WindowMean:
    """A model of output stride 4 whose logits depend on the whole of what it is shown."""
    output_stride = 4

    def __call__(self, image):
        h, w = (-(-side // 4) for side in image.shape[2:])
        mean = image.mean((2, 3))[:, :2, None, None].expand(1, 2, h, w)
        logits = mean + torch.arange(h * w).view(1, 1, h, w)
        return SimpleNamespace(rectified=logits)


def window_mean(image):
    return WindowMean()(image).rectified


def test_sliding_windows_by_hand():
    """A 22 x 38 picture, cells of 4 (6 x 10 of them), windows of 16 every 8: each cell against the mean over the windows
    that cover it, listed by hand."""
    picture = torch.rand(1, 3, 22, 38)
    result = slide(WindowMean(), "rectified", picture, 16, 8)
    expected = [[[] for _ in range(10)] for _ in range(6)]
    for top in (0, 2):                # the last one is moved back: 6 cells hold no window at 4
        for left in (0, 2, 4, 6):
            part = window_mean(picture[..., 4 * top:4 * top + 16, 4 * left:4 * left + 16])[0]
            for i in range(part.shape[1]):
                for j in range(part.shape[2]):
                    expected[top + i][left + j].append(part[:, i, j])
    expected = torch.stack([torch.stack([torch.stack(cell).mean(0) for cell in row], 1) for row in expected], 1)
    assert result.shape == (1, 2, 6, 10) and torch.allclose(result[0], expected, atol=1e-6)
    whole = slide(WindowMean(), "rectified", picture, 64, 64)
    assert torch.equal(whole, window_mean(picture))  # a window larger than the picture is the picture


def test_masks_are_grey_where_nothing_is_evaluated():
    """In the truth and in a model's mask alike: what a model says there is neither right nor wrong."""
    palette = [(255, 0, 0), (0, 255, 0)]
    truth, mask = torch.tensor([[0, 1], [IGNORE, 1]]), torch.tensor([[1, 1], [0, 0]])
    colors = color_mask(truth, palette)
    assert colors.dtype == torch.uint8 and colors.shape == (3, 2, 2)
    assert [tuple(colors[:, y, x].tolist()) for y, x in ((0, 0), (0, 1), (1, 0))] == [*palette, GREY]
    colors = color_mask(mask, palette, truth)
    assert [tuple(colors[:, y, x].tolist()) for y, x in ((0, 0), (1, 0), (1, 1))] == [
        (0, 255, 0), GREY, (255, 0, 0)]


def test_the_picture_of_an_evaluation_has_grey_ground(tmp_path):
    """Each column of masks has exactly the truth's grey pixels."""
    dataset = evaluation.Evaluation(open_split("shapes", None, "val"), 64)
    facts = DATA["shapes"]
    model = evaluation.open_model("clip", None, facts)
    protocol = evaluation.Protocol(64)
    sheet = evaluation.draw_examples([(model, "clip")], dataset, facts, protocol, count=2)
    grey = (np.array(sheet.convert("RGB")) == GREY).all(-1)
    truth, clip = grey[20:300, 152:288], grey[20:300, 296:432]
    assert np.array_equal(truth, clip) and 0.1 < truth.mean() < 0.9


def test_drawing():
    """A title of 20 pixels, then tiles of 40 with gaps of 10: they begin at 10 and 60, from 30 on."""
    palette = [(255, 0, 0), (0, 255, 0)]
    image = color_mask(torch.tensor([[0, 1], [IGNORE, 1]]), palette)
    entries = [((0, 0, 255), "a | b"), ((255, 255, 0), "c")]
    wide = torch.zeros(3, 50, 200, dtype=torch.uint8)
    sheet = draw_grid([[image, wide]] * 2, ["image", ""], entries, tile=40, gap=10)
    for top in (30, 80):
        places = ((10, 0), (30, 0), (11, 39), (49, 39))
        assert [sheet.getpixel((x, top + y)) for x, y in places] == [
            (255, 0, 0), (0, 255, 0), GREY, (0, 255, 0)]
        assert sheet.getpixel((60, top + 16)) == (0, 0, 0)  # 200 x 50 fills 40 x 10, in the middle
        assert sheet.getpixel((60, top + 14)) == sheet.getpixel((60, top + 25)) == WHITE
    assert {(0, 0, 255), (255, 255, 0)} <= {color for _, color in sheet.getcolors(10 ** 6)}


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


@pytest.fixture
def odd_pictures(tmp_path):
    """Thirty files such as people keep: every format and mode, 1 x 1 to 6000 x 4000, five of them broken."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more" / "deep").mkdir(parents=True)
    noise = lambda H, W, *c: Image.fromarray(rng.integers(0, 256, (H, W, *c), dtype=np.uint8))
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
    Image.fromarray(rng.integers(0, 65536, (30, 44)).astype(np.uint16)).save(folder / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(30, 44, 3).save(folder / "turned.jpg", exif=turned)
    for i in range(13):
        noise(30 + i, 70 - 3 * i, 3).save(folder / "more" / ("deep" if i % 2 else "") / f"same {i // 2}.jpg")
    whole = (folder / "turned.jpg").read_bytes()
    for name, content in {"zero.jpg": b"", "text.jpg": b"not a picture", "cut.jpg": whole[:len(whole) // 2],
                          "cut.png": (folder / "grey.png").read_bytes()[:90], "page.webp": b"<html>"}.items():
        (folder / name).write_bytes(content)
    assert sum(path.is_file() for path in folder.rglob("*")) == 30
    return folder


def test_thirty_odd_pictures_are_trained_on_and_segmented(odd_pictures, tiny_clip_file, tmp_path, capsys):
    """25 of 30 are readable. Masks have the pictures' own sizes, areas are those of the index PNG."""
    import train
    train.main(["--stage", "rectify", "--data", str(odd_pictures), "--classes", "cat | grass, dog, tree", "--clip",
                str(tiny_clip_file), "--crop", "32", "--epochs", "1", "--out", str(tmp_path / "out"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert "images that each class was found in, of 25" in printed.out and "cat | grass" in printed.out
    for name in ("zero.jpg", "text.jpg", "cut.jpg", "cut.png", "page.webp"):
        assert f"skipped {name}" in printed.err
    evaluation.main(["--stage", "rectify", "--images", str(odd_pictures), "--checkpoint",
                     str(tmp_path / "out" / "rectify.pt"), "--device", "cpu", "--background-threshold", "0.5"])
    masks, sizes = tmp_path / "out" / "masks", {"large.jpg": (6000, 4000), "one.png": (1, 1), "ribbon.png": (900, 3),
                                                "turned.jpg": (30, 44), "more/deep/same 0.jpg": None}
    assert len(list(masks.rglob("*.json"))) == 25
    for name, size in sizes.items():
        index = Image.open(masks / f"{name}.index.png")
        report = json.loads((masks / f"{name}.json").read_text())
        assert index.mode == "P" and size in (None, index.size) and report["size"] == list(index.size)
        values, counts = np.unique(np.array(index), return_counts=True)
        assert set(values) <= {0, 1, 2, 3} and sum(report["areas"].values()) == pytest.approx(1)
        for value, count in zip(values, counts):
            label = ("background", "cat", "dog", "tree")[value]
            assert report["areas"][label] == pytest.approx(count / counts.sum()) and report["index"][label] == value
        assert Image.open(masks / f"{name}.overlay.png").mode == "RGB"


@pytest.mark.parametrize("options, words", [
    (["--stage", "clip", "--images", "."], "--images needs --classes"),
    (["--data", "nowhere"], "--data nowhere is neither a folder"),
    (["--data", "."], "has no truth to evaluate on"),
    (["--data", "voc", "--classes", "a, b"], "--classes goes with your own images"),
    (["--stage", "clip", "--window", "60", "--stride", "24"], "multiples of 8"),
    (["--window", "64", "--stride", "0"], "stride is 0"), (["--background-threshold", "0.5"], "goes with --images"),
    (["--background-threshold", "2"], "must lie in 0..1"),
    (["--attention", "sclip"], "--attention goes with --stage clip"),
    (["--stage", "clip", "--images", "nothing.jpg", "--classes", "coin, ring"], "nothing.jpg")])
def test_options_that_do_not_fit_end_in_one_sentence(options, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        evaluation.main([*options, "--clip", str(ROOT / "shapes_clip.pt"), "--out", str(tmp_path), "--device", "cpu"])
    assert "\n" not in str(caught.value)


def test_windows_and_attention_reach_the_evaluation(tmp_path):
    """On shapes: the protocol says what was done, and each reading and window gives other masks."""
    seen = set()
    for options in ([], ["--attention", "sclip"], ["--attention", "naclip"], ["--window", "48", "--stride", "16"]):
        evaluation.main(["--stage", "clip", "--out", str(tmp_path), "--device", "cpu", *options])
        report = json.loads((tmp_path / "eval_clip.json").read_text())
        assert report["protocol"]["attention"] == (options[1] if "--attention" in options else "maskclip")
        assert report["protocol"]["window"] == (48 if "--window" in options else 0)
        seen.add(report["miou"])
    assert len(seen) == 4


@pytest.mark.parametrize("data, raw", [
    ("voc", "VOCdevkit/VOC2012/SegmentationClass"), ("context", "VOCdevkit/VOC2010/SegmentationClassContext"),
    ("ade20k", "ADEChallengeData2016/annotations/validation")])
def test_miou_on_real_labels_equals_a_count_on_the_raw_files(shared, data, raw):
    """Made predictions (the truth moved by ten pixels, wrapped around) on the real label files; counted again from the
    PNGs' own values, with numpy and without the project."""
    folder = shared(raw)
    split, facts = open_split(data, folder.parents[str(raw).count("/")], "val"), DATA[data]
    C, confusion, hit, either = len(facts.classes), 0, {}, {}
    for i in range(len(split)):
        label = split.truth(i)
        prediction = torch.where(label == IGNORE, 0, label).roll(10, 1)
        confusion = confusion + confusion_matrix(prediction, label, C)
        values = np.array(Image.open(folder / f"{split.names[i]}.png")).astype(int)
        seen = (values != 0) & (values != 255)
        guess = np.roll(np.where(seen, values, 1), 10, 1)
        for c in range(1, C + 1):
            hit[c] = hit.get(c, 0) + int((seen & (values == c) & (guess == c)).sum())
            either[c] = either.get(c, 0) + int((seen & ((values == c) | (guess == c))).sum())
    present = {int(v) for i in range(len(split)) for v in np.unique(Image.open(folder / f"{split.names[i]}.png"))} - {0, 255}
    expected = sum(hit[c] / either[c] for c in present) / len(present)
    result = scores(confusion)
    assert 0.2 < expected < 1 and abs(result["miou"] - expected) < 1e-12 and result["present"] == len(present)


def test_images_need_to_know_by_which_model():
    with pytest.raises(ValueError, match="--images needs .* --checkpoint runs/NAME/STAGE.pt"):
        evaluation.parse_arguments(["--stage", "distill", "--images", "."])
    args, _, _ = evaluation.parse_arguments(
        ["--stage", "distill", "--images", ".", "--checkpoint", "a/b.pt"])
    assert args.out.name == "a"
    for window, stride in (("64", 64), ("336", 224)):
        _, _, protocol = evaluation.parse_arguments(["--window", window])
        assert protocol.stride == stride


@pytest.mark.parametrize("spelling", ["--short-side", "--short_side"])
def test_hyphens_and_underscores_are_the_same(spelling):
    _, _, protocol = evaluation.parse_arguments([spelling, "32"])
    assert protocol.short_side == 32
