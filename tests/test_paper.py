"""paper.py: the numbers and pixels of Figures 1 and 3 by hand, the report from hand-made
checkpoints against an independent count, which rows are trained again, linear classification."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from extras import paper
import train
from clip_model import load_clip
from conftest import ROOT
from datasets import DATA, IGNORE, SETTINGS, Evaluation, open_split
from deeplab import DeepLabV2
from eval import Protocol
from extras.paper import (
    INK,
    SERIES,
    VIRIDIS,
    WHITE,
    ConstantBias,
    Plan,
    Row,
    distance_counts,
    distance_miou,
    linear_classification,
    most_confused,
)
from reclip import ReCLIP, segment

NAN = math.nan


def rgb(fraction):
    """The scale's color at a fraction, by hand."""
    left = min(int(fraction * 4), 3)
    dark, bright = VIRIDIS[left].tolist(), VIRIDIS[left + 1].tolist()
    return tuple(round(a + (fraction * 4 - left) * (b - a)) for a, b in zip(dark, bright))


# --- Numbers --------------------------------------------------------------------------------------

def test_distance_by_hand():
    """8 x 6 (half diagonal 5, center y 4, x 3): one pixel at row 7, column 5 has its center at
    (7.5, 5.5), hence sqrt(3.5^2 + 2.5^2) / 5 = 0.860 away; a 2 x 2 block around the center is 0
    away."""
    truth = torch.full((8, 6), IGNORE)
    truth[7, 5] = 0
    truth[3:5, 2:4] = 2
    prediction = torch.zeros(8, 6, dtype=torch.int64)
    prediction[3, 2:4] = 2

    counts = distance_counts(prediction, truth, 4, [0, 0.5, 0.85, 0.87, 1])
    expected = torch.zeros(4, 4, 2, dtype=torch.int64)
    expected[2, 0] = torch.tensor([1, 3])  # its pixel; two of the block's are wrong
    expected[0, 2] = torch.tensor([2, 4])  # the many 0s on IGNORE pixels count nowhere
    assert torch.equal(counts, expected)
    assert distance_miou(counts).tolist() == pytest.approx([0.5, NAN, 1 / 3, NAN], nan_ok=True)


@pytest.mark.parametrize("column, place", [(3, 0), (4, 1), (5, 2), (6, 2)])
def test_a_bin_begins_at_its_edge(column, place):
    """6 x 8: half diagonal 5, center x 4. A bar of two columns: its centroid is
    (column + 1 - 4) / 5 away."""
    truth = torch.full((6, 8), IGNORE)
    truth[:, column:column + 2] = 1
    counts = distance_counts(truth, truth, 2, [0, 0.2, 0.4, 0.5])  # 0.6 lies beyond
    assert counts[place, 1].tolist() == [12, 12] and counts.sum() == 24

    nothing = torch.full_like(truth, IGNORE)
    assert distance_counts(truth, nothing, 2, [0, 1]).sum() == 0


def test_miou_by_sets():
    """Sums over three images against sets of pixels."""
    generator = torch.Generator().manual_seed(0)
    edges, classes = [0, 0.1, 0.3, 1], 5
    counts = torch.zeros(3, classes, 2, dtype=torch.int64)
    slow = {}
    for size in [(12, 17), (20, 9), (8, 30)]:
        truth = torch.full(size, IGNORE, dtype=torch.uint8)
        for c in torch.randperm(classes, generator=generator)[:3].tolist():
            y, x = (int(torch.randint(0, side - 4, (), generator=generator)) for side in size)
            truth[y:y + 5, x:x + 4] = c
        prediction = torch.randint(0, classes, size, generator=generator)
        counts += distance_counts(prediction, truth, classes, edges)

        valid = [(y, x) for y in range(size[0]) for x in range(size[1]) if truth[y, x] != IGNORE]
        for c in range(classes):
            true_pixels = {p for p in valid if truth[p] == c}
            claimed = {p for p in valid if prediction[p] == c}
            if true_pixels:
                y = sum(p[0] + 0.5 for p in true_pixels) / len(true_pixels) - size[0] / 2
                x = sum(p[1] + 0.5 for p in true_pixels) / len(true_pixels) - size[1] / 2
                distance = math.hypot(y, x) / (math.hypot(*size) / 2)
                place = next(b for b in range(3) if distance < edges[b + 1])
                both, either = slow.get((place, c), (0, 0))
                both += len(true_pixels & claimed)
                either += len(true_pixels | claimed)
                slow[place, c] = both, either

    for place, miou in enumerate(distance_miou(counts).tolist()):
        ious = [both / either for (b, _), (both, either) in slow.items() if b == place]
        assert miou == pytest.approx(sum(ious) / len(ious)) if ious else math.isnan(miou)


def test_most_confused_by_hand():
    """Pairs in order: (0, 4), (1, 4), (3, 5), then (0, 2). Class 2 is rare: its counts are small,
    its share counts."""
    confusion = 100 * torch.eye(6, dtype=torch.int64)
    confusion[0, 4] = confusion[4, 0] = 400
    confusion[1, 4] = 300
    confusion[3, 5] = confusion[5, 3] = 40
    confusion[2] = torch.tensor([3, 0, 10, 0, 0, 0])
    assert most_confused(confusion, 3) == [0, 1, 4]
    assert most_confused(confusion, 4) == [0, 1, 2, 4]  # not (3, 5): no room
    assert most_confused(confusion, 6) == most_confused(confusion, 9) == list(range(6))
    never = torch.tensor([[9, 1, 9], [1, 9, 0], [0, 0, 0]])
    assert most_confused(never, 2) == [0, 1]  # class 2 never occurs: last


# --- Pixels ---------------------------------------------------------------------------------------

def test_matrix_cells():
    """Row sums 10, 4, 0: cells are percent of the row. A cell's corners show the scale, its middle
    a number."""
    confusion = torch.tensor([[6, 3, 1], [0, 1, 3], [0, 0, 0]])
    image = paper.draw_matrices([confusion, confusion.flip(1)], ["a|b", "bee", "c"], ["one", "two"])
    wide = round(paper.FONT.getlength("bee")) + 20
    for top, flip in ((60, 1), (60 + 5 * 30 + 14, -1)):
        for y, row in enumerate([[0.6, 0.3, 0.1], [0, 0.25, 0.75], [0] * 3]):
            for x, fraction in enumerate(row[::flip]):
                box = wide * (x + 1), top + 30 * y, wide * (x + 2), top + 30 * (y + 1)
                for corner in [(box[0], box[1]), (box[2] - 1, box[3] - 1)]:
                    assert image.getpixel(corner) == pytest.approx(rgb(fraction), abs=1)
                colors = {color for _, color in image.crop(box).getcolors(10 ** 4)}
                ink, other = (WHITE, INK) if fraction < 0.45 else (INK, WHITE)
                assert min(math.dist(c, ink) for c in colors) < 40 and other not in colors


def test_curve_markers_and_gaps():
    """Axes from pixel 44 to 484 are 0 to 1, from 294 up to 34 are 30 to 100: hence 440 and 260."""
    x, one, two = [0, 0.25, 0.5, 0.75, 1], [30, 40, NAN, 100, 50], [80, 80, 80, 80, 80]
    image = paper.draw_curves({"one": one, "two": two}, x, "title", "x")

    def place(a, b):
        return round(44 + 440 * a), round(294 - 260 * (b - 30) / 70)

    for color, ys in zip(SERIES, (one, two)):
        assert all(image.getpixel(place(a, b)) == color for a, b in zip(x, ys) if b == b)
    assert image.getpixel(place(0.625, 80)) == SERIES[1]            # a line between two markers
    for a in (0.375, 0.45, 0.55, 0.625):                            # none beside a gap
        column = place(a, 0)[0]
        assert SERIES[0] not in [image.getpixel((column, y)) for y in range(34, 294)]
    assert image.getpixel((12, 294 + 52 + 12)) == SERIES[0]         # legend
    paper.draw_curves({"nothing yet": [NAN] * 5}, x, "", "")        # drawn, empty
    again = paper.draw_curves({"one": one, "two": two}, x, "title", "x")
    assert again.tobytes() == image.tobytes()


def test_biases_stand_in_their_places():
    """Tiles of 136 every 144 from 8, rows of maps at 20 and 184: both classes on one scale, which
    stands below."""
    maps = {}
    for i, kind in enumerate("abcd"):
        maps[kind] = torch.linspace(i, i + 1, 128).reshape(2, 8, 8)
    shades = {}
    for i, name in enumerate("efgh"):
        shades[name] = Image.new("RGB", (40, 40), (10 * i,) * 3)
    rows = paper.rows_of_tiles(shades, maps, ("cat|kitten", "dog"))
    assert [[title for title, _ in row[2:]] for row in rows] == [
        ["cat: a", "b", "c", "d"],
        ["dog: a", "b", "c", "d"],
        [f"{i}.00 to {i + 1}.00" for i in range(4)],
    ]

    image = paper.draw_tiles(rows)
    for i, (x, y) in enumerate([(8, 20), (152, 20), (8, 184), (152, 184)]):
        assert image.getpixel((x, y)) == image.getpixel((x + 135, y + 135)) == (10 * i,) * 3
    for x in (296, 440, 584, 728):
        for y, fractions in (20, (0, 63 / 127)), (184, (64 / 127, 1)), (348, (0, 1)):
            last = (x + 135, y + (135 if y < 348 else 9))
            for corner, fraction in zip([(x, y), last], fractions):
                assert image.getpixel(corner) == pytest.approx(rgb(fraction), abs=1)

    flat = paper.heat_map(torch.zeros(2, 3), 0, 0)  # a constant map, as M_p is where it is all zero
    assert flat.size == (3, 2) and flat.getpixel((2, 1)) == rgb(0)


# --- The report, end to end -----------------------------------------------------------------------

ROWS = {
    "clip": Row("CLIP", "clip", paper=(49.5, 21.7, 9.5)),
    "both": Row("both biases", "rectify", paper=(58.5, None, 11.1)),
    "one_number": Row("one number", "rectify", paper.NEITHER, control="one number"),
    "mean_logit": Row("minus the mean", "mean"),
    "even": Row("as good as CLIP", "clip", paper=(49.5, 21.7, 9.5)),
}
TABLES = {
    "table3": ("Table 3", ("clip", "even")),
    "table4": ("Table 4", ("clip", "both")),
    "controls": ("Controls", ("both", "one_number", "mean_logit")),
}
FIGURES = {"figure1a.png", "figure1b.png", "figure3.png"}


class InThisProcess:
    """In the place of ProcessPoolExecutor."""

    def __init__(self, *unused):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        return None


@pytest.fixture
def small(monkeypatch, tmp_path):
    """shapes with 8 images, five rows, few and short steps, in this process; -> arguments"""
    splits = {"train": (8, 101), "val": (4, 102), "test": (4, 103)}
    monkeypatch.setattr(datasets, "SHAPES_SPLITS", splits)
    monkeypatch.setattr(paper, "ROWS", ROWS)
    monkeypatch.setattr(paper, "TABLES", TABLES)
    monkeypatch.setattr(paper, "ProcessPoolExecutor", InThisProcess)
    few = dataclasses.replace(SETTINGS["shapes"], rectify_batch=4, momentum=0.0)
    monkeypatch.setitem(SETTINGS, "shapes", few)
    return ["--out", str(tmp_path), "--device", "cpu", "--epochs", "1", "--seeds", "1"]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_report_equals_an_independent_count(small, tmp_path):
    """Hand-made checkpoints; all that the report says is counted again from the models' own masks,
    pixel by pixel."""
    again = [*small, "--report-only"]
    with pytest.raises(FileNotFoundError, match="plan.json is missing: run python extras/paper.py"):
        paper.main(again)

    clip, facts, out = load_clip(DATA["shapes"].clip), DATA["shapes"], tmp_path / "paper"

    def make(**changes):
        return ReCLIP(clip, facts.classes, prompts=facts.prompts, **changes).eval()
    models = {
        "clip": make(prompt_length=0, positional_channels=0),
        "both": make(prompt_length=4, positional_gain=0.5),
        "one_number": make(prompt_length=4, positional_channels=0),
        "mean_logit": make(prompt_length=0, positional_channels=0),
    }
    models["even"] = models["clip"]
    models["one_number"].positional = ConstantBias(8)
    models["one_number"].positional.numbers.data = torch.linspace(-1, 1, 8)
    pairs = Evaluation(open_split("shapes", "", "train"), 64, 64)
    train_images = torch.stack([x for x, _, _ in pairs])
    with torch.no_grad():  # -> M_q minus its mean over the training images
        mean = models["clip"](train_images).query.mean((0, 2, 3))
    models["mean_logit"].positional = ConstantBias(8)
    models["mean_logit"].positional.numbers.data = 10 * mean

    plan = Plan(ROWS, TABLES, 1, clip.sha256)
    for name in ("both", "one_number"):
        (out / "seed0" / name).mkdir(parents=True)
    paper.write_plan(plan, out / "plan.json")
    models["both"].save(out / "seed0" / "both" / "rectify.pt")
    with pytest.raises(FileNotFoundError, match="one_number/rectify.pt is missing: run python"):
        paper.main(again)
    models["one_number"].save(out / "seed0" / "one_number" / "rectify.pt")
    paper.main(again)

    files = files_in(out)
    tables = {f"{key}.csv" for key in TABLES}
    assert set(files) == {"plan.json", "report.md", *tables, *FIGURES}
    mious, images = {}, list(Evaluation(open_split("shapes", "", "test"), 64, 64))
    for name, model in models.items():
        both, either = torch.zeros(8), torch.zeros(8)
        for image, truth, _ in images:
            with torch.no_grad():
                mask = segment(model.eval()(image[None]).rectified, 8, (64, 64), (64, 64))
            for c in range(8):
                both[c] += ((mask == c) & (truth == c)).sum()
                either[c] += (((mask == c) & (truth != IGNORE)) | (truth == c)).sum()
        seen = [c for c in range(8) if any((truth == c).any() for _, truth, _ in images)]
        assert len(seen) < 8  # classes that do not occur are left out
        mious[name] = 100 * sum((both[c] / either[c]).item() for c in seen) / len(seen)
        known = json.loads((out / "seed0" / name / "result.json").read_text())
        assert known["miou"] * 100 == pytest.approx(mious[name]) and known["pictures"] == 4
    assert len(set(mious.values())) == 4

    for key, (_, names) in TABLES.items():
        header, *lines = csv.reader((out / f"{key}.csv").open())
        assert header == ["row", "mean", "paper, voc", "seed 0"]
        for name, line in zip(names, lines, strict=True):
            assert line[0] == ROWS[name].title
            assert [float(v) for v in line[1:4:2]] == pytest.approx([mious[name]] * 2)
            assert line[2] == (str(ROWS[name].paper[0]) if ROWS[name].paper[0] else "")

    report = files["report.md"].decode()
    assert f"| both biases | {mious['both']:.1f} | 58.5 |" in report
    assert f"| one number | {mious['one_number']:.1f} |  |" in report
    for other, expected in (
        ("clip", "+9.0 in the paper"),
        ("one_number", "it should gain"),
        ("mean_logit", "it should gain"),
    ):
        gain = mious["both"] - mious[other]
        said = f"- {ROWS[other].title} -> both biases: {gain:+.1f} here, {expected}"
        if gain <= 0:
            said += ": **does not come out**"
        assert said in report.splitlines()
    assert "- CLIP -> as good as CLIP: +0.0 here, +0.0 in the paper" in report.splitlines()

    paper.main(again)
    assert files_in(out) == files
    (out / "seed0" / "both" / "result.json").unlink()
    (out / "seed0" / "clip" / "result.json").write_text("{")  # cut off
    paper.main(again)
    assert files_in(out) == files
    paper.write_plan(plan._replace(clip_sha256="another"), out / "plan.json")
    with pytest.raises(ValueError, match="made with another CLIP"):
        paper.main(again)


def figure_3(model):
    facts = DATA["shapes"]
    dataset = Evaluation(open_split("shapes", "", "test"), 64, 64)
    return paper.draw_figure_3(model, facts, dataset, Protocol(64, 64))


def test_nothing_mended_and_one_channel(small):
    """Reference and M_p that change no mask: Figure 3 says so. One channel of M_p is shown for both
    classes."""
    clip, facts = load_clip(DATA["shapes"].clip), DATA["shapes"]
    nothing = ReCLIP(
        clip, facts.classes, prompts=facts.prompts, prompt_length=0, positional_channels=0
    )
    assert figure_3(nothing.eval()).height < 60

    one = ReCLIP(
        clip, facts.classes, prompts=facts.prompts, prompt_length=4, positional_channels=1,
        positional_gain=0.5,
    )
    image = figure_3(one.eval())
    assert image.height > 400 and image.width == 872


def test_figure_3_leaves_unevaluated_pixels_grey(small):
    """Truth and both masks are grey at the same places: where nothing is evaluated."""
    clip, facts = load_clip(DATA["shapes"].clip), DATA["shapes"]
    model = ReCLIP(clip, facts.classes, prompts=facts.prompts, positional_gain=0.5).eval()
    image = figure_3(model)
    grey = paper.color_mask(torch.tensor([[IGNORE]]), facts.palette)[:, 0, 0].tolist()

    def grey_pixels(x, y):
        tile = torch.from_numpy(np.array(image.crop((x, y, x + 136, y + 136))))     # (136, 136, 3)
        return (tile == torch.tensor(grey)).all(-1)
    truth, before, after = grey_pixels(152, 20), grey_pixels(8, 184), grey_pixels(152, 184)
    assert 0.05 < truth.float().mean() < 0.95
    assert torch.equal(truth, before) and torch.equal(truth, after)


# --- Which rows are trained -----------------------------------------------------------------------

def record_trainings(monkeypatch):
    """-> list that fills with (row that is trained, whether it is resumed)"""
    trained = []
    for name in ("train_rectification", "train_distillation"):
        loop = getattr(paper, name)

        def recorded(*arguments, loop=loop):
            run = arguments[-1]
            trained.append((run.out.name, run.resume))
            return loop(*arguments)
        monkeypatch.setattr(paper, name, recorded)
    return trained


def test_a_row_is_trained_once(small, tmp_path, monkeypatch):
    """A row that is there is not trained again; with other settings it is."""
    trained = record_trainings(monkeypatch)
    paper.main(small)
    assert trained == [("both", False), ("one_number", False)]
    before = files_in(tmp_path / "paper")
    paper.main(small)
    assert len(trained) == 2 and files_in(tmp_path / "paper") == before

    shutil.rmtree(tmp_path / "paper" / "seed0" / "one_number")  # as if stopped before it
    paper.main(small)
    assert trained[2:] == [("one_number", False)]
    monkeypatch.setitem(paper.ROWS, "both", Row("both biases", "rectify", {"subtract": False}))
    paper.main(small)
    assert trained[3:] == [("both", False)]
    paper.main([*small, "--epochs", "2"])
    assert trained[4:] == [("both", False), ("one_number", False)]


def learnt(path):
    content = torch.load(path, weights_only=True)
    return content.get("learnt", content.get("student"))


def test_a_stopped_row_goes_on_to_the_bit(small, tmp_path, monkeypatch):
    """Stopped in the second epoch, the row "both" goes on behind the first, and a student of
    another teacher is trained anew."""
    student = {"distilled": Row("distilled", "distill")}
    monkeypatch.setattr(paper, "ROWS", {"clip": ROWS["clip"], "both": ROWS["both"]} | student)
    monkeypatch.setattr(paper, "TABLES", {"table2": ("Table 2", ("clip", "both", "distilled"))})
    command = [*small[2:], "--epochs", "2", "--out"]
    paper.main([*command, str(tmp_path / "whole")])

    calls = []
    loss_of = train.contrastive_loss

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:  # two steps an epoch
            raise KeyboardInterrupt
        return loss_of(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "contrastive_loss", stopped)
        paper.main([*command, str(tmp_path / "parts")])

    trained = record_trainings(monkeypatch)
    paper.main([*command, str(tmp_path / "parts")])
    assert trained == [("both", True), ("distilled", False)]
    for file in ("both/rectify.pt", "distilled/distill.pt"):
        whole = learnt(tmp_path / "whole" / "paper" / "seed0" / file)
        parts = learnt(tmp_path / "parts" / "paper" / "seed0" / file)
        assert all(torch.equal(whole[key], parts[key]) for key in whole)

    monkeypatch.setitem(paper.ROWS, "both", Row("both biases", "rectify", {"pool": "mask"}))
    paper.main([*command, str(tmp_path / "parts")])
    assert trained[2:] == [("both", False), ("distilled", False)]


def test_fingerprint_is_the_models_own(small, tmp_path):
    clip, facts = load_clip(DATA["shapes"].clip), DATA["shapes"]
    model = ReCLIP(clip, facts.classes, prompts=facts.prompts)
    model.save(tmp_path / "rectify.pt")
    assert paper.fingerprint_of(tmp_path / "rectify.pt") == model.fingerprint()
    student = DeepLabV2(facts.classes, model.W_q, model.W_q / 2, student="tiny")
    student.save(tmp_path / "distill.pt")
    assert paper.fingerprint_of(tmp_path / "distill.pt") == student.fingerprint()


def test_controls_are_what_they_say(small, tmp_path, monkeypatch):
    """The other labels are the same labels on other images; the one number moves, alike at all
    places, and ReCLIP.load refuses its checkpoint in a sentence."""
    labels = {name: torch.tensor([i]) for i, name in enumerate("abcdef")}
    dealt = paper.shuffled(labels, list("abcdef"), seed=3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    assert [dealt[name].item() for name in "abcdef"] == order != list(range(6))

    paper.main(small)
    path = tmp_path / "paper" / "seed0" / "one_number" / "rectify.pt"
    clip = load_clip(DATA["shapes"].clip)
    model = paper.load_constant_bias(path, clip, "cpu")
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 48))
    assert logits.positional.shape == (1, 8, 8, 6) and logits.positional.abs().max() > 0
    assert torch.equal(logits.positional, logits.positional[..., :1, :1].expand(1, 8, 8, 6))
    assert torch.equal(logits.rectified, logits.query - logits.positional)
    with pytest.raises(ValueError, match="rectify.pt does not fit") as caught:
        ReCLIP.load(path, clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, words", [
    (["--split", "nonsense"], "--split nonsense: shapes has val, test"),
    (["--seeds", "0"], "--seeds is 0"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--device", "cuda:99"], "--device cuda:99 is not available"),
    (["--clip", "nothing.pt"], "nothing.pt"),
    (["--data", "voc", "--root", "nowhere", "--clip", "shapes_clip.pt"], "nowhere/VOCdevkit"),
])
def test_bad_input_ends_in_one_sentence(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        paper.main([*options, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_tables_name_rows_that_exist():
    """And every row stands in a table; without students only whole comparisons are left."""
    named = {name for _, names in paper.TABLES.values() for name in names}
    assert named == set(paper.ROWS)
    assert {row.stage for row in paper.ROWS.values()} == set(paper.STAGES)
    plan = paper.make_plan(SETTINGS["voc"], True, 3, "sha256")
    assert {row.stage for row in plan.rows.values()} == {"clip", "mean", "rectify"}
    assert set(plan.tables) == {
        "table2", "table3", "table4", "table5", "sequel", "controls", "attention",
    }


@pytest.mark.parametrize("data, other", [("voc", "per_class"), ("shapes", "shared")])
def test_no_row_is_made_twice(data, other):
    """Each data set has its own kind of prompt; the table shows the other kind beside it."""
    plan = paper.make_plan(SETTINGS[data], False, 1, "sha256")
    left_out = {"per_class": "shared", "shared": "per_class"}[other]
    missing = {f"reference_{left_out}", f"both_{left_out}"}
    assert set(paper.ROWS) - set(plan.rows) == missing
    assert {f"reference_{other}", f"both_{other}"} <= set(plan.tables["table4"][1])


def is_running(process):
    """A process that ended may stay in the table, as a zombie (Z), until somebody asks for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(
    "SLOW" not in os.environ or sys.platform != "linux",
    reason="takes half a minute, and reads /proc; SLOW=1 runs it",
)
def test_workers_end_with_their_parent_and_save(tmp_path):
    """kill -9 of the program: its workers save the step they are at, begin no other row, and no
    process is left."""
    command = [sys.executable, str(ROOT / "tests" / "paper.py"), "--rectification-only"]
    program = subprocess.Popen([*command, "--device", "cpu", "--out", str(tmp_path)])
    rows = tmp_path / "paper" / "seed0"
    while not list(rows.glob("*/rectify_state.pt")):
        assert program.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    begun = {path.parent.name for path in rows.glob("*/training.json")}
    program.send_signal(signal.SIGKILL)
    program.wait()

    ended = time.monotonic() + 40
    while any(is_running(child) for child in children):
        assert time.monotonic() < ended
        time.sleep(0.5)
    assert {path.parent.name for path in rows.glob("*/training.json")} == begun
    for name in begun:
        state = torch.load(rows / name / "rectify_state.pt", weights_only=True)
        assert 0 < state["step"] < 625
        assert not json.loads((rows / name / "training.json").read_text())["finished"]


# --- Linear classification ------------------------------------------------------------------------

class Directions(DeepLabV2):
    """A student whose features tell the class of each 4 x 4 block by a direction of their own: no
    text knows it."""

    def features(self, images, valid=None):
        levels = (images[:, 0, 2::4, 2::4] * 2).round().long()                  # (B, h, w), 0..2
        return torch.eye(6)[[4, 1, 5]][levels].permute(0, 3, 1, 2)              # (B, 6, h, w)


def test_linear_classification_learns_what_can_be_told():
    blocks = torch.randint(0, 3, (6, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    truths = blocks.byte()                                                          # (6, 16, 20)
    images = (truths / 2)[:, None].expand(-1, 3, -1, -1)                            # (6, 3, 16, 20)

    def student():
        torch.manual_seed(0)
        return Directions(["a", "b", "c"], torch.zeros(3, 6), torch.zeros(3, 6), student="tiny")

    model, untouched = student(), student().state_dict()
    pairs = [(image, truth, "") for image, truth in zip(images, truths)]
    linear_classification(model, pairs, epochs=20, lr=0.1)
    assert not model.training and model.head == "original"
    for key, value in model.state_dict().items():
        assert key not in untouched or torch.equal(value, untouched[key])
    masks = model.to_pixels(model(images).rectified, 16, 20).argmax(1)
    assert torch.equal(masks[:, 2::4, 2::4], truths[:, 2::4, 2::4].long())

    def weights(hidden):  # ignored: the right half of each truth, and all of the last one
        shown = truths.clone()
        shown[:, :, 12:] = IGNORE
        shown[5] = IGNORE
        seen = images.clone()
        seen[:, :, :, 12:] = hidden
        seen[5] = hidden
        torch.manual_seed(1)
        pairs = [(image, truth, "") for image, truth in zip(seen, shown)]
        return linear_classification(student(), pairs).classifier.weight
    assert torch.equal(weights(0.0), weights(1.0))


def test_truth_is_read_under_the_centers_of_cells():
    """A truth twice as large as the image: of cells of 4 pixels, pixels 2 and 6 are 4 and 12 there;
    a cell whose center lies over the edge reads the last pixel."""
    assert paper.pixels_at_centers(2, 4, 8, 16).tolist() == [4, 12]
    assert paper.pixels_at_centers(3, 4, 9, 9).tolist() == [2, 6, 8]
