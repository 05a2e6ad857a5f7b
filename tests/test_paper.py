"""--stage paper: the numbers and pixels of Figures 1 and 3 by hand, the report from hand-made checkpoints against an
independent count, which rows are trained again, and linear classification."""

import csv
import json
import math
import shutil

import pytest
import torch
from PIL import Image

import datasets
import eval as evaluation
import train
from clip_model import load_clip
from conftest import ROOT
from datasets import DATA, IGNORE, Evaluation, open_split
from deeplab import DeepLabV2, linear_classification
from eval import INK, PAPER, SERIES, VIRIDIS, distance_counts, distance_miou, most_confused
from reclip import ReCLIP, segment

NAN = math.nan


def rgb(fraction):
    """The scale's colour at a fraction, by hand."""
    left = min(int(fraction * 4), 3)
    dark, bright = VIRIDIS[left].tolist(), VIRIDIS[left + 1].tolist()
    return tuple(round(a + (fraction * 4 - left) * (b - a)) for a, b in zip(dark, bright))


# --- Numbers ------------------------------------------------------------------------------------------------

def test_distance_by_hand():
    """8 x 6 (half diagonal 5, centre y 4, x 3): one pixel at row 7, column 5 has its centre at (7.5, 5.5), hence
    sqrt(3.5^2 + 2.5^2) / 5 = 0.860 away; a 2 x 2 block around the centre is 0 away."""
    label = torch.full((8, 6), IGNORE)
    label[7, 5], label[3:5, 2:4] = 0, 2
    prediction = torch.zeros(8, 6, dtype=torch.int64)
    prediction[3, 2:4] = 2
    counts = distance_counts(prediction, label, 4, [0, 0.5, 0.85, 0.87, 1])
    expected = torch.zeros(4, 4, 2, dtype=torch.int64)
    expected[2, 0] = torch.tensor([1, 3])  # right: its pixel; two of the block's are false positives
    expected[0, 2] = torch.tensor([2, 4])  # the many 0s on IGNORE pixels count nowhere
    assert torch.equal(counts, expected)
    assert distance_miou(counts).tolist() == pytest.approx([0.5, NAN, 1 / 3, NAN], nan_ok=True)


@pytest.mark.parametrize("column, place", [(3, 0), (4, 1), (5, 2), (6, 2)])
def test_a_bin_begins_at_its_edge(column, place):
    """6 x 8: half diagonal 5, centre x 4. A bar of two columns: its centroid is (column + 1 - 4) / 5 away."""
    label = torch.full((6, 8), IGNORE)
    label[:, column:column + 2] = 1
    counts = distance_counts(label, label, 2, [0, 0.2, 0.4, 0.5])  # the last: 0.6 lies beyond the edges
    assert counts[place, 1].tolist() == [12, 12] and counts.sum() == 24
    assert distance_counts(label, torch.full_like(label, IGNORE), 2, [0, 1]).sum() == 0  # nothing to evaluate


def test_miou_by_sets():
    generator, edges, classes = torch.Generator().manual_seed(0), [0, 0.1, 0.3, 1], 5
    counts, slow = torch.zeros(3, classes, 2, dtype=torch.int64), {}
    for size in [(12, 17), (20, 9), (8, 30)]:
        label = torch.full(size, IGNORE, dtype=torch.uint8)
        for c in torch.randperm(classes, generator=generator)[:3].tolist():
            y, x = (int(torch.randint(0, length - 4, (), generator=generator)) for length in size)
            label[y:y + 5, x:x + 4] = c
        prediction = torch.randint(0, classes, size, generator=generator)
        counts += distance_counts(prediction, label, classes, edges)
        valid = [(y, x) for y in range(size[0]) for x in range(size[1]) if label[y, x] != IGNORE]
        for c in range(classes):
            truth, guess = ({p for p in valid if mask[p] == c} for mask in (label, prediction))
            if truth:
                y, x = (sum(p[i] + 0.5 for p in truth) / len(truth) - size[i] / 2 for i in (0, 1))
                place = next(b for b in range(3) if math.hypot(y, x) / (math.hypot(*size) / 2) < edges[b + 1])
                both, either = slow.get((place, c), (0, 0))
                slow[place, c] = both + len(truth & guess), either + len(truth | guess)
    for place, miou in enumerate(distance_miou(counts).tolist()):
        ious = [both / either for (b, _), (both, either) in slow.items() if b == place]
        assert miou == pytest.approx(sum(ious) / len(ious)) if ious else math.isnan(miou)


def test_most_confused_by_hand():
    """Pairs in order: (0, 4), (1, 4), (3, 5), then (0, 2). Class 2 is rare: its counts are small, its share counts."""
    confusion = 100 * torch.eye(6, dtype=torch.int64)
    confusion[0, 4] = confusion[4, 0] = 400
    confusion[1, 4] = 300
    confusion[3, 5] = confusion[5, 3] = 40
    confusion[2] = torch.tensor([3, 0, 10, 0, 0, 0])
    assert most_confused(confusion, 3) == [0, 1, 4]
    assert most_confused(confusion, 4) == [0, 1, 2, 4]  # one place is left: (3, 5) does not fit, (0, 2) does
    assert most_confused(confusion, 6) == most_confused(confusion, 9) == list(range(6))
    assert most_confused(torch.tensor([[9, 1, 9], [1, 9, 0], [0, 0, 0]]), 2) == [0, 1]  # class 2 never occurs: last


# --- Pixels -------------------------------------------------------------------------------------------------

def test_matrix_cells():
    """Row sums 10, 4, 0: cells are percent of the row. A cell's corners show the scale, its middle a number."""
    confusion = torch.tensor([[6, 3, 1], [0, 1, 3], [0, 0, 0]])
    image = evaluation.draw_matrices([confusion, confusion.flip(1)], ["a|b", "bee", "c"], ["one", "two"])
    wide = round(evaluation.FONT.getlength("bee")) + 20
    for top, flip in ((60, 1), (60 + 5 * 30 + 14, -1)):
        for y, row in enumerate([[0.6, 0.3, 0.1], [0, 0.25, 0.75], [0] * 3]):
            for x, fraction in enumerate(row[::flip]):
                box = wide * (x + 1), top + 30 * y, wide * (x + 2), top + 30 * (y + 1)
                for corner in [(box[0], box[1]), (box[2] - 1, box[3] - 1)]:
                    assert image.getpixel(corner) == pytest.approx(rgb(fraction), abs=1)
                colours = {colour for _, colour in image.crop(box).getcolors(10 ** 4)}
                ink, other = (PAPER, INK) if fraction < 0.45 else (INK, PAPER)
                assert min(math.dist(c, ink) for c in colours) < 40 and other not in colours


def test_curve_markers_and_gaps():
    """Axes from pixel 44 to 484 are 0 to 1, from 294 up to 34 are 30 to 100: hence 440 and 260 pixels."""
    x, one, two = [0, 0.25, 0.5, 0.75, 1], [30, 40, NAN, 100, 50], [80, 80, 80, 80, 80]
    image = evaluation.draw_curves({"one": one, "two": two}, x, "title", "x")
    place = lambda a, b: (round(44 + 440 * a), round(294 - 260 * (b - 30) / 70))
    for colour, ys in zip(SERIES, (one, two)):
        assert all(image.getpixel(place(a, b)) == colour for a, b in zip(x, ys) if b == b)
    assert image.getpixel(place(0.625, 80)) == SERIES[1]                         # a line between two markers
    for a in (0.375, 0.45, 0.55, 0.625):                                         # none beside a gap
        assert SERIES[0] not in [image.getpixel((place(a, 0)[0], y)) for y in range(34, 294)]
    assert image.getpixel((12, 294 + 52 + 12)) == SERIES[0]                      # legend
    evaluation.draw_curves({"nothing yet": [NAN] * 5}, x, "", "")                # drawn, empty
    again = evaluation.draw_curves({"one": one, "two": two}, x, "title", "x")
    assert again.tobytes() == image.tobytes()


def test_biases_stand_in_their_places():
    """Tiles of 136 every 144 from 8, lines of maps at 20 and 184: both classes on one scale, which stands below."""
    maps = {kind: torch.linspace(i, i + 1, 128).reshape(2, 8, 8) for i, kind in enumerate("abcd")}
    shades = {name: Image.new("RGB", (40, 40), (10 * i,) * 3) for i, name in enumerate("efgh")}
    lines = evaluation.draw_biases(shades, maps, ("cat|kitten", "dog"))
    assert [[title for title, _ in line[2:]] for line in lines] == [
        ["cat: a", "b", "c", "d"], ["dog: a", "b", "c", "d"], [f"{i}.00 to {i + 1}.00" for i in range(4)]]
    image = evaluation.draw_grid(lines)
    for i, (x, y) in enumerate([(8, 20), (152, 20), (8, 184), (152, 184)]):
        assert image.getpixel((x, y)) == image.getpixel((x + 135, y + 135)) == (10 * i,) * 3
    for x in (296, 440, 584, 728):
        for y, fractions in (20, (0, 63 / 127)), (184, (64 / 127, 1)), (348, (0, 1)):  # first and last value
            for corner, fraction in zip([(x, y), (x + 135, y + (135 if y < 348 else 9))], fractions):
                assert image.getpixel(corner) == pytest.approx(rgb(fraction), abs=1)
    flat = evaluation.heat_map(torch.zeros(2, 3), 0, 0)  # a constant map, as M_p is where it is all zero
    assert flat.size == (3, 2) and flat.getpixel((2, 1)) == rgb(0)


# --- The report, end to end ---------------------------------------------------------------------------------

ROWS = {"clip": ("CLIP", "clip", {}, (49.5, 21.7, 9.5)), "both": ("both biases", "rectify", {}, (58.5, None, 11.1)),
        "one_number": ("one number", "rectify", {"prompt_length": 0, "constant_bias": True}, None),
        "mean_logit": ("minus the mean", "mean", {"constant_bias": True}, None),
        "even": ("as good as CLIP", "clip", {}, (49.5, 21.7, 9.5))}
TABLES = {"table3": ("Table 3", ("clip", "even")), "table4": ("Table 4", ("clip", "both")),
          "controls": ("Controls", ("both", "one_number", "mean_logit"))}



@pytest.fixture
def small(monkeypatch, tmp_path):
    """shapes with 8 pictures and a plan of four rows, in this process; -> arguments of both programs"""
    monkeypatch.setattr(datasets, "SHAPES_SPLITS", {"train": (8, 101), "val": (4, 102), "test": (6, 103)})
    for name, value in {"ROWS": ROWS, "TABLES": TABLES}.items():
        monkeypatch.setattr(train, name, value, raising=False)

    class Here:
        __init__ = __exit__ = lambda self, *rest: None
        __enter__, map = lambda self: self, staticmethod(map)
    monkeypatch.setattr(train, "ProcessPoolExecutor", Here)
    return ["--stage", "paper", "--out", str(tmp_path), "--device", "cpu"]


def test_report_equals_an_independent_count(small, tmp_path, capsys):
    """Hand-made checkpoints; all that the report says is counted again from the models' own masks, pixel by pixel."""
    with pytest.raises(FileNotFoundError, match="plan.json is missing: run python train.py --stage paper first"):
        evaluation.main(small)
    clip, facts, out = load_clip(str(ROOT / "shapes_clip.pt")), DATA["shapes"], tmp_path / "paper"
    make = lambda **changes: ReCLIP(clip, facts.classes, prompts=facts.prompts, prompt_length=4, **changes)
    models = {"clip": ReCLIP(clip, facts.classes, prompts=facts.prompts, prompt_length=0, positional_channels=0),
              "both": make(positional_gain=0.5), "one_number": make(constant_bias=True),
              "mean_logit": make(constant_bias=True)}
    models["one_number"].positional.numbers.data = torch.linspace(-1, 1, 8)
    train_set = torch.stack([picture for picture, _, _ in Evaluation(open_split("shapes", "", "train"), 64)])
    with torch.no_grad():
        models["mean_logit"].positional.numbers.data = 10 * models["clip"].eval()(train_set).query.mean((0, 2, 3))
    models["even"] = models["clip"]
    models["mean_logit"].reference = None  # -> M_q minus its mean over the training pictures
    plan = {"seeds": 1, "clip_sha256": clip.sha256, "tables": TABLES, "rows": {
        name: dict(zip(("name", "stage", "changes", "paper"), row)) for name, row in ROWS.items()}}
    for name in ("both", "one_number"):
        (out / "seed0" / name).mkdir(parents=True)
    (out / "plan.json").write_text(json.dumps(plan))
    models["both"].save(out / "seed0" / "both" / "rectify.pt")
    with pytest.raises(FileNotFoundError, match="one_number/rectify.pt is missing: run python train.py --stage paper"):
        evaluation.main(small)
    models["one_number"].save(out / "seed0" / "one_number" / "rectify.pt")
    evaluation.main(small)
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert set(files) == {"plan.json", "report.md", "table3.csv", "table4.csv", "controls.csv", "figure1a.png", "figure1b.png",
                          "figure3.png"}
    mious, pictures = {}, list(Evaluation(open_split("shapes", "", "test"), 64))
    for name, model in models.items():
        both, either = torch.zeros(8), torch.zeros(8)
        for picture, label, _ in pictures:
            with torch.no_grad():
                mask = segment(model.eval()(picture[None]).rectified, 8, (64, 64), (64, 64))
            for c in range(8):
                both[c] += ((mask == c) & (label == c)).sum()
                either[c] += (((mask == c) & (label != IGNORE)) | (label == c)).sum()
        seen = [c for c in range(8) if any((label == c).any() for _, label, _ in pictures)]
        assert len(seen) < 8  # classes that do not occur are left out
        mious[name] = 100 * sum((both[c] / either[c]).item() for c in seen) / len(seen)
        known = json.loads((out / "seed0" / name / "result.json").read_text())
        assert known["miou"] * 100 == pytest.approx(mious[name]) and known["pictures"] == 6
    assert len(set(mious.values())) == 4
    for key, (_, names) in TABLES.items():
        header, *lines = csv.reader((out / f"{key}.csv").open())
        assert header == ["row", "mean", "paper, voc", "one a seed"]
        for name, line in zip(names, lines, strict=True):
            assert line[0] == ROWS[name][0] and [float(v) for v in line[1:4:2]] == pytest.approx([mious[name]] * 2)
            assert line[2] == (str(ROWS[name][3][0]) if ROWS[name][3] else "")
    report = files["report.md"].decode()
    assert f"| both biases | {mious['both']:.1f} | 58.5 |" in report
    assert f"| one number | {mious['one_number']:.1f} |  |" in report
    for other, told in ("clip", "+9.0 in the paper"), ("one_number", "it should gain"), ("mean_logit", "it should gain"):
        gain = mious["both"] - mious[other]
        said = f"- {ROWS[other][0]} -> {ROWS['both'][0]}: {gain:+.1f} here, {told}"
        assert said + ("" if gain > 0 else ": **does not come out**") in report.splitlines()

    assert "- CLIP -> as good as CLIP: +0.0 here, +0.0 in the paper" in report.splitlines()

    def unchanged():
        evaluation.main(small)
        assert files == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    unchanged()
    (out / "seed0" / "both" / "result.json").unlink()
    (out / "seed0" / "clip" / "result.json").write_text("{")  # cut off
    unchanged()
    (out / "plan.json").write_text(json.dumps(plan | {"clip_sha256": "another"}))
    with pytest.raises(ValueError, match="made with another CLIP"):
        evaluation.main(small)


def test_nothing_mended_and_one_channel(small, tmp_path):
    """A Reference and M_p that change no mask: Figure 3 says so. One channel of M_p is shown for both rivals."""
    clip, facts = load_clip(str(ROOT / "shapes_clip.pt")), DATA["shapes"]
    args = evaluation.parse(small)
    for channels, name in ((0, "none"), (1, "one")):
        model = ReCLIP(clip, facts.classes, prompts=facts.prompts, prompt_length=4 * channels, positional_gain=0.5,
                       positional_channels=channels)
        model.save(tmp_path / f"{name}.pt")
        image = evaluation.draw_figure_3(args, tmp_path / f"{name}.pt")
        assert image.height < 60 if name == "none" else image.height > 400 and image.width == 872


def test_a_row_is_trained_once(small, tmp_path, monkeypatch):
    """A row whose done.json fits is not trained again; one whose settings, or whose plan, are others, is."""
    trained, rectify = [], train.rectify
    monkeypatch.setattr(train, "rectify", lambda args, out, **changes: (trained.append(out.name),
                                                                        rectify(args, out, **changes)))
    command = [*small, "--seeds", "1", "--rectify_epochs", "1", "--rectify_batch", "4", "--momentum", "0"]
    train.main(command)
    assert trained == ["both", "one_number"]
    report = (tmp_path / "paper" / "report.md").read_text()
    train.main(command)
    assert trained == ["both", "one_number"] and (tmp_path / "paper" / "report.md").read_text() == report
    shutil.rmtree(tmp_path / "paper" / "seed0" / "one_number")  # as if stopped before it
    train.main(command)
    assert trained == ["both", "one_number", "one_number"]
    monkeypatch.setitem(train.ROWS, "both", ("both biases", "rectify", {"subtract": False}, None))
    train.main(command)
    assert trained[3:] == ["both"]
    train.main([*command, "--lr", "0.1"])
    assert trained[4:] == ["both", "one_number"]
    with pytest.raises(ValueError, match="--constant_bias: the rows of --stage paper differ in it"):
        train.main([*command, "--constant_bias"])


# --- Linear classification ----------------------------------------------------------------------------------

class Told(DeepLabV2):
    """A student whose features tell the class of each 4 x 4 block by a direction of their own: no text knows it."""

    def features(self, pictures):
        levels = (pictures[:, 0, 2::4, 2::4] * 2).round().long()                                    # (B, h, w), 0..2
        return torch.eye(6)[[4, 1, 5]][levels].permute(0, 3, 1, 2)                                  # (B, 6, h, w)


def test_linear_classification_learns_what_can_be_told():
    labels = torch.randint(0, 3, (6, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2).byte()  # (6, 16, 20)
    pictures = (labels / 2)[:, None].expand(-1, 3, -1, -1)                                          # (6, 3, 16, 20)

    def student():
        torch.manual_seed(0)
        return Told(["a", "b", "c"], torch.zeros(3, 6), torch.zeros(3, 6), student="tiny")
    model, untouched = student(), student().state_dict()
    linear_classification(model, [(p, y, "") for p, y in zip(pictures, labels)], epochs=20, lr=0.1)
    assert not model.training and model.head == "original"
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items() if key in untouched)
    masks = model.to_pixels(model(pictures).rectified, 16, 20).argmax(1)
    assert torch.equal(masks[:, 2::4, 2::4], labels[:, 2::4, 2::4].long())

    def weights(hidden):  # ignored: the right half of each label, and all of the last one
        shown = labels.clone()
        shown[:, :, 12:], shown[5] = IGNORE, IGNORE
        seen = pictures.clone()
        seen[:, :, :, 12:], seen[5] = hidden, hidden
        torch.manual_seed(1)
        return linear_classification(student(), [(p, y, "") for p, y in zip(seen, shown)]).classifier.weight
    assert torch.equal(weights(0.0), weights(1.0))
