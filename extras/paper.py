"""A program that makes the paper's evidence (Sec. 4): all tables, Figures 1 and 3, and controls.

    python extras/paper.py                                all of it on shapes, about 40 minutes
    python extras/paper.py --data voc --root DIR          the same on PASCAL VOC, context or ade20k
    python extras/paper.py --rectification-only           without the rows that need a student
    python extras/paper.py --report-only                  the report anew, from what is there

Rows that are missing are trained, several at a time; stopped, the same command goes on where it
stopped. In <out>/paper (by default runs/shapes/paper) it leaves

    report.md                every number beside the paper's, and what did not come out
    table1.csv .. table7.csv, sequel.csv, controls.csv, attention.csv
    figure1a.png             mIoU by the distance of the object from the center of the image
    figure1b.png             confusion matrices of the classes that CLIP confuses most
    figure3.png              heat maps of M_q, M_r, M_p and M
    plan.json                which rows there are, of how many seeds, of which CLIP
    seed0/both/ ...          of each row the checkpoint, training.json (from what it was trained)
                             and result.json (what was measured)

Made again from the same checkpoints, all these files are the same to the byte. On another processor
the last digits differ, and training amplifies them: to see by how much, hold torch's libraries to
another instruction set, with ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 in the environment.

What stands here
    ROWS, TABLES             every row: what is trained, which settings differ, the paper's numbers
    ConstantBias             a control: one number per class in the place of the positional net
    train_row                a row with train.py's two loops, in a process of its own
    linear_classification    Table 1's "LC": how good are the student's features? (with labels)
    measured_row             mIoU of a row, and the numbers behind Figure 1
    distance_counts, most_confused    Figures 1(a) and 1(b)
    draw_...                 the figures, with Pillow
    write_report             tables, figures, report.md

Only linear_classification trains something with labels, by its very definition, and nothing else
uses what it makes. Everywhere else labels are read to evaluate, and never to train.

Symbols: C classes, D width of CLIP's joint space; (H, W) size of an image, (H0, W0) of its truth
(pixel labels), h x w patches.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_model import load_clip, written_atomically  # noqa: E402  (the path comes first)
from datasets import (  # noqa: E402
    DATA,
    IGNORE,
    DataFacts,
    Evaluation,
    Settings,
    Thumbnails,
    find_settings,
    open_split,
)
from deeplab import DeepLabV2  # noqa: E402
from eval import (  # noqa: E402
    FONT,
    GREY,
    INK,
    WHITE,
    check_device,
    color_mask,
    confusion_matrix,
    find_protocol,
    predict_mask,
    predict_split,
    scores,
    with_legend,
)
from reclip import FROZEN, PROMPTS, RECIPES, ReCLIP  # noqa: E402
from train import (  # noqa: E402
    Run,
    label_training_set,
    new_reclip,
    new_student,
    origin_of,
    train_distillation,
    train_rectification,
)


# --- Rows and tables ------------------------------------------------------------------------------

# What stands behind a row, in the order in which rows are made: a student needs its teacher, and
# the linear classifier needs its student.
#   clip      nothing is learnt: plain CLIP, in one of its attention variants
#   mean      nothing is learnt: a control, the mean logit of each class subtracted
#   rectify   stage 1 of the paper
#   distill   stage 2, from the row "both"
#   linear    a linear classifier on the features of the row "distilled"
STAGES = ("clip", "mean", "rectify", "distill", "linear")


class Row(NamedTuple):
    title: str
    stage: str          # one of STAGES
    changes: dict = {}  # settings that differ from the data set's own
    # The paper's mIoU on VOC, Context, ADE20K (the sequel's own, of "plusplus"); None: not given
    paper: tuple = (None, None, None)
    control: str = ""   # "one number": ConstantBias; "other labels": those of other images


NO_POSITIONAL = {"positional_channels": 0}
NO_REFERENCE = {"prompt_length": 0}
NEITHER = NO_POSITIONAL | NO_REFERENCE

ROWS = {
    # Rectification: Tables 2 to 5
    "clip": Row("MaskCLIP (Query only)", "clip", paper=(49.5, 21.7, 9.5)),
    "reference": Row("+ Reference", "rectify", NO_POSITIONAL, (56.7, 24.4, 10.5)),
    "positional": Row("+ positional net, no Reference", "rectify", NO_REFERENCE),
    "both": Row(
        "+ Reference + positional net: the rectified CLIP", "rectify", paper=(58.5, 25.8, 11.1)
    ),
    "one_channel": Row(
        "the same, 1 channel (Eq. (2) as printed: cancels)", "rectify", {"positional_channels": 1}
    ),
    "query_learnable": Row(
        "+ Reference, the Query learnable too",
        "rectify",
        NO_POSITIONAL | {"query_learnable": True},
        (56.7, 23.7, 9.4),
    ),
    "reference_shared": Row(
        "+ Reference, one prompt for all classes (Eq. (1) as printed)",
        "rectify",
        NO_POSITIONAL | {"prompt_per_class": False},
    ),
    "both_shared": Row(
        "both, one prompt for all classes", "rectify", {"prompt_per_class": False}
    ),
    "reference_per_class": Row(
        "+ Reference, a prompt for each class (ours)",
        "rectify",
        NO_POSITIONAL | {"prompt_per_class": True},
    ),
    "both_per_class": Row(
        "both, a prompt for each class (ours)", "rectify", {"prompt_per_class": True}
    ),
    "added": Row("bias added, not subtracted", "rectify", {"subtract": False}, (57.8, 24.9, None)),

    # The authors' sequel, which is not in the paper
    "plusplus": Row("ReCLIP++, the sequel (quoted: its authors)", "rectify",
                    {"method": "reclip++"}, (85.4, 36.1, 16.4)),

    # Controls (ours): each could explain the gain in a simpler way than the paper does
    "one_number": Row(
        "control: one learnt number per class", "rectify", NEITHER, control="one number"
    ),
    "other_labels": Row(
        "control: image-level labels of other images", "rectify", control="other labels"
    ),
    "mean_logit": Row("control: minus the mean logit of each class", "mean"),

    # Distillation: Tables 1, 2, 6 and 7
    "distilled": Row(
        "distilled: Query + Reference head, all losses", "distill", paper=(75.4, 33.8, 14.3)
    ),
    "linear": Row(
        "linear classification on the student's features, WITH LABELS",
        "linear",
        paper=(76.1, None, None),
    ),
    "head_original": Row("original head", "distill", {"head": "original"}, (73.8, None, None)),
    "head_query": Row("Query head", "distill", {"head": "query"}, (74.1, None, None)),
    "head_positional": Row(
        "with positional", "distill", {"head": "query_reference_positional"}, (75.0, None, None)
    ),
    "loss_mask": Row("mask loss", "distill", {"alpha": 0.0, "beta": 0.0}, (73.0, None, None)),
    "loss_feature": Row("mask + feature loss", "distill", {"beta": 0.0}, (74.1, None, None)),

    # Attention variants of CLIP's last block that came after the paper (ours)
    "sclip": Row("sclip", "clip", {"attention": "sclip"}),
    "clearclip": Row("clearclip", "clip", {"attention": "clearclip"}),
    "naclip": Row("naclip", "clip", {"attention": "naclip"}),
    "sclip_rectified": Row("sclip, rectified", "rectify", {"attention": "sclip"}),
    "clearclip_rectified": Row("clearclip, rectified", "rectify", {"attention": "clearclip"}),
    "naclip_rectified": Row("naclip, rectified", "rectify", {"attention": "naclip"}),
}

# name of the CSV -> title, rows in order
TABLES = {
    "table1": ("Table 1: linear classification", ("both", "distilled", "linear")),
    "table2": ("Table 2: both stages", ("clip", "both", "distilled")),
    "table3": ("Table 3: should the Query be learnable?", ("query_learnable", "reference")),
    "table4": (
        "Table 4: the two biases",
        (
            "clip", "reference", "positional", "both", "one_channel",
            "reference_shared", "both_shared", "reference_per_class", "both_per_class",
        ),
    ),
    "table5": ("Table 5: subtract or add", ("clip", "added", "both")),
    "sequel": ("ReCLIP++, the authors' sequel (not in the paper)", ("clip", "both", "plusplus")),
    "table6": (
        "Table 6: head of the student",
        ("head_original", "head_query", "distilled", "head_positional"),
    ),
    "table7": ("Table 7: losses of the student", ("loss_mask", "loss_feature", "distilled")),
    "controls": (
        "Controls (ours): what is the method's own?",
        ("both", "one_number", "mean_logit", "other_labels"),
    ),
    "attention": (
        "Four attention variants of CLIP's last block, plain and rectified (ours)",
        (
            "clip", "sclip", "clearclip", "naclip",
            "both", "sclip_rectified", "clearclip_rectified", "naclip_rectified",
        ),
    ),
}


class Plan(NamedTuple):
    """What a report is made of; kept in plan.json."""
    rows: dict        # {name: Row}
    tables: dict      # {name of the CSV: (title, names of rows)}
    seeds: int        # of each row that learns
    clip_sha256: str


def make_plan(settings, rectification_only, seeds, clip_sha256):
    """ROWS and TABLES, or what of them can be had without a student.

    settings: the data set's own. The rows "shared" and "per class" ask what the other kind of
        prompt would bring; those of its own kind would be earlier rows once more.
    """
    stages = STAGES
    if rectification_only:
        stages = ("clip", "mean", "rectify")

    rows = {}
    for name, row in ROWS.items():
        own_kind = row.changes.get("prompt_per_class") == settings.prompt_per_class
        if row.stage in stages and not own_kind:
            rows[name] = row

    tables = {}
    for key, (title, names) in TABLES.items():
        left = [name for name in names if name in rows]
        if len(left) > 1:  # a table of one row compares nothing
            tables[key] = (title, left)
    return Plan(rows, tables, seeds, clip_sha256)


def write_plan(plan, path):
    """plan.json: --report-only then shows the rows that were made, whatever ROWS says by then."""
    rows = {name: row._asdict() for name, row in plan.rows.items()}
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(plan._asdict() | {"rows": rows}, indent=1))


def read_plan(path):
    """What write_plan wrote; FileNotFoundError if nothing has been made yet."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run python extras/paper.py first, without "
                                "--report-only")
    try:
        content = json.loads(path.read_text())
        rows = {name: Row(**row) for name, row in content["rows"].items()}
        return Plan(**(content | {"rows": rows}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version: run python extras/paper.py "
                         "without --report-only") from error


def seeds_of(row, plan):
    """The seeds that a row is made with: one where nothing is random, for nothing is learnt."""
    if row.stage in ("clip", "mean"):
        return range(1)
    return range(plan.seeds)


class Experiment(NamedTuple):
    """What all rows have in common."""
    facts: DataFacts
    settings: Settings   # the data set's own; rows change some
    sequel: Settings     # of the row with ReCLIP++
    root: str            # where the data set lies
    clip: str            # name or file of CLIP's weights
    origin: dict         # what ReCLIP's image-level labels depend on (train.origin_of)
    out: Path            # runs/<data>
    split: str           # that is evaluated
    device: str
    workers: int         # processes that decode images

    def row_folder(self, name, seed):
        """Where checkpoint, training.json and result.json of a row lie."""
        return self.out / "paper" / f"seed{seed}" / name

    def settings_of(self, row):
        """The Settings that a row is trained with."""
        settings = self.settings
        if row.changes.get("method") == "reclip++":
            settings = self.sequel
        return dataclasses.replace(settings, **row.changes)

    def protocol_of(self, row):
        """A Protocol: students are evaluated at the distillation's sides, all else at stage 1's."""
        stage = "distill" if row.stage in ("distill", "linear") else "rectify"
        return find_protocol(self.settings_of(row), stage)

    def labelled(self, split_name, protocol):
        """Images of a split with their truth."""
        split = open_split(self.facts.name, self.root, split_name)
        return Evaluation(split, protocol.long_side, protocol.short_side)


# --- Training a row -------------------------------------------------------------------------------

class ConstantBias(nn.Module):
    """A control in the place of PositionalBias (ours): one learnt number per class, at all places.

    (1, E, h, w) -> (1, channels, h, w). What the positional net gains over it, it gains by knowing
    the place.

    gain: a number receives the gradients of all places at once and would never settle; the factor
        calms it.
    """
    gain = 0.1

    def __init__(self, channels):
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(channels))              # (C,)

    def forward(self, positional_grid):
        h, w = positional_grid.shape[2:]
        return self.gain * self.numbers[:, None, None].expand(1, -1, h, w)


def train_row(experiment, row, name, seed):
    """Trains a row, unless it is there already, with the settings that are asked for now."""
    if row.stage not in ("rectify", "distill"):
        return
    folder = experiment.row_folder(name, seed)
    settings = experiment.settings_of(row)
    teacher_path = experiment.row_folder("both", seed) / "rectify.pt"

    # What the row is made from. A checkpoint that was made from something else does not count.
    identity = experiment.origin | dataclasses.asdict(settings) | {"control": row.control}
    if row.stage == "distill":
        identity["teacher"] = fingerprint_of(teacher_path)

    record_path = folder / "training.json"
    known = read_json(record_path)
    begun = known is not None and known.get("identity") == identity
    if begun and known["finished"]:
        return

    # A row that was stopped goes on from its last saved step, with the same result to the bit.
    resume = begun and (folder / f"{row.stage}_state.pt").is_file()
    write_json(record_path, {"identity": identity, "finished": False, "seconds": None})

    began = time.perf_counter()
    split = open_split(experiment.facts.name, experiment.root, "train")
    clip = load_clip(experiment.clip, experiment.device)
    run = Run(row.stage, folder, identity, seed, resume, experiment.device, experiment.workers)
    if row.stage == "rectify":
        model = new_reclip(clip, experiment.facts, settings, seed)
        if row.control == "one number":
            model.positional = ConstantBias(len(model.class_names)).to(experiment.device)
        labels = image_labels(experiment, model, split, settings)
        if row.control == "other labels":
            labels = shuffled(labels, split.names, seed)
        train_rectification(model, split, labels, settings, run)
    else:
        teacher = ReCLIP.load(teacher_path, clip, experiment.device)
        student = new_student(teacher, settings, seed)
        labels = image_labels(experiment, teacher, split, settings)
        train_distillation(teacher, student, split, labels, settings, run)

    seconds = None  # of a row that was stopped, nobody knows how long it took in all
    if not resume:
        seconds = time.perf_counter() - began
    write_json(record_path, {"identity": identity, "finished": True, "seconds": seconds})


def image_labels(experiment, model, split, settings):
    """The image-level labels of the training images (Sec. 3.4), the same file for all rows.

    But the sequel's row has labels of its own, where it finds them in windows.
    """
    path = experiment.out / "image_labels.json"
    origin = experiment.origin
    if settings.label_window:
        path = experiment.out / "window_labels.json"
        origin = origin_of(experiment.facts, settings, model.clip, model.prompts, split)
    return label_training_set(model, split, settings, origin, path, experiment.workers)


def shuffled(labels, names, seed):
    """Deals the image-level labels to other images: as many of each class, but elsewhere."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {name: labels[names[i]] for name, i in zip(names, order)}


def fingerprint_of(path):
    """The model's own fingerprint(), from the checkpoint: sha256 of the weights in it.

    The file's own would change with every writing of the same weights.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content["learnt"] if "learnt" in content else content["student"]
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def read_json(path):
    """The content, a dict, or None if there is no such file, or it was cut off."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content))


# --- The model of a row ---------------------------------------------------------------------------

def open_row(experiment, row, path):
    """The model behind a row, in eval mode; path: its checkpoint, None where nothing was learnt."""
    if row.stage == "distill":
        return DeepLabV2.load(path, experiment.device)
    if row.stage == "linear":
        student = DeepLabV2.load(path, experiment.device)
        pairs = experiment.labelled("train", experiment.protocol_of(row))
        return linear_classification(student, pairs)

    clip = load_clip(experiment.clip, experiment.device)
    if row.control == "one number":
        return load_constant_bias(path, clip, experiment.device)
    if row.stage == "rectify":
        return ReCLIP.load(path, clip, experiment.device)

    settings = dataclasses.replace(experiment.settings, **(row.changes | NEITHER))
    model = new_reclip(clip, experiment.facts, settings, seed=0).eval()
    if row.stage == "mean":
        split = open_split(experiment.facts.name, experiment.root, "train")
        subtract_mean_logit(model, Thumbnails(split, clip.input_resolution))
    return model


def load_constant_bias(path, clip, device):
    """The control "one number" from its checkpoint; ReCLIP.load knows no such part."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    learnt = content["learnt"]
    model = ReCLIP(clip, content["class_names"], W_q=learnt["W_q"], **content["settings"])
    model.positional = ConstantBias(len(content["class_names"]))
    frozen = {key: value for key, value in model.state_dict().items() if key.startswith(FROZEN)}
    model.load_state_dict(learnt | frozen, strict=True)
    return model.to(device).eval()


@torch.no_grad()
def subtract_mean_logit(model, thumbnails):
    """A control: M_q minus its mean over the patches of all thumbnails, class by class.

    It shows what a constant per class brings without any training.
    """
    means = []
    for images, _ in DataLoader(thumbnails, 32):
        M_q = model(images.to(model.W_q.device)).query                  # (B, C, h, w)
        means.append(M_q.mean((2, 3)))                                  # (B, C)
    mean = torch.cat(means).mean(0)                                     # (C,)

    model.positional = ConstantBias(len(mean)).to(mean.device)
    model.positional.numbers.copy_(mean / ConstantBias.gain)
    model.eval()  # forgets the positional logits that it knew


def linear_classification(student, pairs, epochs=5, lr=0.01):
    """Table 1's "LC", after MaskContrast: a linear classifier on the student's pixel features.

    It is trained WITH LABELS, to tell how good the frozen features are. Nothing else in this
    project learns from a label.

    student: a DeepLabV2. pairs: (image (3, H, W) in [0, 1], truth (H0, W0) with 255 for ignored,
        name) by index, as datasets.Evaluation has them.
    Truth is read at the centers of the grid's cells. Adam, its epochs and learning rate are ours.
    -> the student, its head replaced by the classifier, in eval mode
    """
    C, D = student.W_q.shape
    device = student.W_q.device
    student.eval().requires_grad_(False)
    classifier = nn.Conv2d(D, C, 1).to(device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr)

    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)

        for i in torch.randperm(len(pairs), generator=generator).tolist():
            image, truth, _ = pairs[i]
            Z = student.features(image[None].to(device))                # (1, D, h, w)

            # The truth's pixel under the center of each cell. (It may be larger than the image.)
            h, w = Z.shape[2:]
            rows = pixels_at_centers(h, student.output_stride, image.shape[1], truth.shape[0])
            columns = pixels_at_centers(w, student.output_stride, image.shape[2], truth.shape[1])
            small = truth[rows][:, columns][None].long()                # (1, h, w)
            if not (small < C).any():
                continue  # nothing but ignored pixels: no loss

            loss = F.cross_entropy(classifier(Z), small.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    student.classifier = classifier
    student.head = "original"
    return student


def pixels_at_centers(cells, output_stride, image_side, truth_side):
    """Which pixels of the truth lie under the centers of a row of cells? (cells,) int64"""
    in_image = (torch.arange(cells) + 0.5) * output_stride
    return (in_image * truth_side / image_side).long().clamp(max=truth_side - 1)


# --- Measuring a row ------------------------------------------------------------------------------

# Figure 1(a): bins of the distance from the center. Ours: unequal, since few objects stand in the
# very middle of an image; each holds more than 100 of the objects in shapes' test split.
EDGES = [0, 0.3, 0.4, 0.5, 0.6, 0.8]


def distance_counts(prediction, truth, classes, edges):
    """Figure 1(a), one image: (H, W) int, (H, W) int with IGNORE -> (bins, C, 2) int64.

    The last axis counts pixels: intersection and union of prediction and truth. All pixels of a
    class are one object. The distance of its centroid from the center of the image (0 .. 1, the
    corner) picks one bin of `edges` (bins + 1 of them, rising; the outer bins take what lies
    beyond). An image without the class does not count for it.
    """
    counts = torch.zeros(len(edges) - 1, classes, 2, dtype=torch.int64)
    center = torch.tensor(truth.shape).double() / 2                     # (2,) y, x
    valid = truth != IGNORE

    for c in truth[valid].unique().tolist():
        of_class = truth == c                                           # (H, W)
        claimed = (prediction == c) & valid                             # (H, W)

        # The middle of a pixel is half a pixel away from its index.
        centroid = of_class.nonzero().double().mean(0) + 0.5            # (2,) y, x
        distance = ((centroid - center).norm() / center.norm()).item()
        place = sum(distance >= edge for edge in edges[1:-1])

        counts[place, c, 0] = (of_class & claimed).sum()
        counts[place, c, 1] = (of_class | claimed).sum()
    return counts


def distance_miou(counts):
    """(bins, C, 2), summed over images -> (bins,): mean IoU of the classes seen; nan: none was."""
    iou = counts[..., 0].double() / counts[..., 1]                      # (bins, C); 0 / 0 is nan
    return iou.nanmean(1)


def most_confused(confusion, k=6):
    """Figure 1(b): (C, C) counts -> indices of the k classes most confused with each other, rising.

    A greedy choice: pairs by falling c_ij + c_ji (shares of the truth), as long as they fit;
    k >= 2. Classes that never occur come last. If there are no more than k classes, all.
    """
    share = confusion / confusion.sum(1, keepdim=True)                  # (C, C)
    mutual = (share + share.T).nan_to_num(-1)                           # (C, C)

    pairs = list(combinations(range(len(mutual)), 2))
    pairs.sort(key=lambda pair: -mutual[pair].item())
    chosen = set()
    for pair in pairs:
        if len(chosen.union(pair)) <= k:
            chosen.update(pair)
    return sorted(chosen)


def measured_row(experiment, plan, name, seed):
    """{"miou", "confusion" (C, C), "distances" (bins, C, 2), ...} of a row under one seed.

    Kept beside its checkpoint in result.json; measured again only if checkpoint, CLIP, protocol or
    row is another.
    """
    row = plan.rows[name]
    path = None
    if row.stage in ("rectify", "distill"):
        path = experiment.row_folder(name, seed) / f"{row.stage}.pt"
    elif row.stage == "linear":
        path = experiment.row_folder("distilled", seed) / "distill.pt"
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run python extras/paper.py without "
                                "--report-only, it goes on where it stopped")

    identity = {
        "protocol": describe_protocol(experiment, row),
        "stage": row.stage,
        "changes": row.changes,
        "control": row.control,
        "edges": EDGES,
        "clip": plan.clip_sha256,
        "checkpoint": fingerprint_of(path) if path else None,
    }
    result_path = experiment.row_folder(name, seed) / "result.json"
    known = read_json(result_path)
    if known is not None and known.get("identity") == identity:
        return known

    model = open_row(experiment, row, path)
    protocol = experiment.protocol_of(row)
    dataset = experiment.labelled(experiment.split, protocol)
    C = len(experiment.facts.classes)
    confusion = torch.zeros(C, C, dtype=torch.int64)
    distances = torch.zeros(len(EDGES) - 1, C, 2, dtype=torch.int64)
    for mask, truth, _ in predict_split(
        model, "rectify", dataset, protocol, f"{name}, seed {seed}", experiment.workers
    ):
        confusion += confusion_matrix(mask, truth, C)
        distances += distance_counts(mask, truth, C, EDGES)

    result = {
        "identity": identity,
        "pictures": len(dataset),
        "miou": scores(confusion)["miou"],
        "confusion": confusion.tolist(),
        "distances": distances.tolist(),
    }
    write_json(result_path, result)
    return result


def describe_protocol(experiment, row):
    """All without which the number of a row means nothing, in a line."""
    facts = experiment.facts
    recipe = experiment.settings_of(row).recipe
    return (f"{facts.name} {experiment.split}, recipe {recipe}, "
            f"{experiment.protocol_of(row).describe()}, {facts.background}")


# --- All rows, several at a time ------------------------------------------------------------------

def make_rows(experiment, plan):
    """Trains and measures all rows of the plan, as many at a time as there are cores.

    Beside a GPU one at a time. A run that was stopped goes on at the row where it stopped.
    """
    at_once = 1
    if experiment.device == "cpu":
        at_once = os.cpu_count()
    total = sum(len(seeds_of(row, plan)) for row in plan.rows.values())
    ended = 0
    began = time.perf_counter()

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, context, start_worker, (experiment.device,)) as pool:
        # In waves, since a student needs its teacher.
        for stage in STAGES:
            names = [name for name, row in plan.rows.items() if row.stage == stage]
            jobs = []
            for seed in range(plan.seeds):
                for name in names:
                    if seed in seeds_of(plan.rows[name], plan):
                        jobs.append((experiment, plan, name, seed))

            for title in pool.map(make_row, jobs):
                ended += 1
                seconds_a_row = (time.perf_counter() - began) / ended
                left = seconds_a_row * (total - ended) / 60
                print(f"row {ended}/{total}: {title}; about {left:.0f} min left", flush=True)


def make_row(job):
    """In a process of its own: one row under one seed."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise KeyboardInterrupt  # the program was killed: begin no other row

    experiment, plan, name, seed = job
    train_row(experiment, plan.rows[name], name, seed)
    measured_row(experiment, plan, name, seed)
    return f"{name}, seed {seed}"


def start_worker(device):
    """What a process does first: settles how it computes, and sees to it that it ends."""
    if device == "cpu":
        torch.set_num_threads(1)  # there is one process per core already
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as train.py
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A worker whose parent was killed would train on for hours: it is asked to save and to end."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # the loop finishes its step, saves, and stops
    time.sleep(20)
    os._exit(1)


# --- Drawing, with Pillow -------------------------------------------------------------------------

# matplotlib's viridis at five places, and Okabe and Ito's colors: for color-blind readers too
VIRIDIS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]
)
SERIES = [
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)
]


def first_name(class_name):
    """Of synonyms the first is shown."""
    return class_name.split("|")[0].strip()


def heat_map(values, low, high):
    """(h, w) -> RGB image, one pixel per value; brightness rises from low to high."""
    place = (values.cpu().double() - low) / max(high - low, 1e-12)      # (h, w), 0 .. 1
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(place, stops, VIRIDIS[:, channel]) for channel in range(3)]
    colors = np.stack(channels, -1)                                     # (h, w, 3)
    return Image.fromarray(colors.round().astype(np.uint8))


def draw_tiles(rows, entries=(), tile=136, gap=8):
    """Rows of titled images. rows: lists of (title, RGB image); entries: of the legend below.

    Each image is fitted into a square of `tile` pixels.
    """
    fitted = []
    for row in rows:
        fitted.append(
            [(title, ImageOps.contain(image, (tile, tile), Image.BOX)) for title, image in row]
        )
    heights = [20 + gap + max(image.height for _, image in row) for row in fitted]
    width = gap + max(len(row) for row in fitted) * (tile + gap)

    canvas = Image.new("RGB", (width, sum(heights)), WHITE)
    pen = ImageDraw.Draw(canvas)
    top = 0
    for row, height in zip(fitted, heights):
        left = gap
        for title, image in row:
            pen.text((left + tile / 2, top + 3), title, INK, FONT, "ma")
            canvas.paste(image, (left + (tile - image.width) // 2, top + 20))
            left += tile + gap
        top += height
    return with_legend(canvas, entries)


def draw_curves(curves, x, title, x_label):
    """Figure 1(a). curves: {name: y in percent, one for each x; nan leaves a gap}. x: in 0 .. 1."""
    left, top, right, bottom = 44, 34, 484, 294    # the axes, pixels
    seen = [y for ys in curves.values() for y in ys if not math.isnan(y)]
    low = 10 * int(min(seen, default=0) // 10)
    high = max(low + 10, -10 * int(-max(seen, default=0) // 10))

    def across(value):
        return left + value * (right - left)

    def up(value):
        return bottom - (value - low) / (high - low) * (bottom - top)

    canvas = Image.new("RGB", (right + 24, bottom + 52), WHITE)
    pen = ImageDraw.Draw(canvas)
    pen.text(((left + right) / 2, 8), title, INK, FONT, "ma")
    pen.text(((left + right) / 2, bottom + 28), x_label, INK, FONT, "ma")
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        pen.line([across(value), top, across(value), bottom + 4], GREY)
        pen.text((across(value), bottom + 8), f"{value:g}", INK, FONT, "ma")
    for value in range(low, high + 1, 10):
        pen.line([left - 4, up(value), right, up(value)], GREY)
        pen.text((left - 8, up(value)), f"{value}", INK, FONT, "rm")
    pen.line([left, top, left, bottom, right, bottom], INK)

    radius = 8  # falling from curve to curve: what is covered still shows as a ring
    for color, ys in zip(SERIES, curves.values()):
        points = [(across(a), up(b)) for a, b in zip(x, ys, strict=True)]
        for (x_1, y_1), (x_2, y_2) in pairwise(points):
            if not math.isnan(y_1) and not math.isnan(y_2):
                pen.line([x_1, y_1, x_2, y_2], color, 3)
        for point in points:
            if not math.isnan(point[1]):
                pen.circle(point, radius, color)
        radius -= 1.5
    return with_legend(canvas, zip(SERIES, curves))


def draw_matrices(confusions, class_names, titles, high=30):
    """Figure 1(b), one below the other.

    confusions: (k, k) counts each, shown in percent of the row, which is the truth. high: height
    of a cell, pixels.
    """
    names = [first_name(name) for name in class_names]
    k = len(names)
    wide = round(max(FONT.getlength(name) for name in names)) + 20
    step = high * (k + 2) + 14                     # from one matrix to the next
    canvas = Image.new("RGB", (max((k + 1) * wide + 8, 360), len(titles) * step), WHITE)
    pen = ImageDraw.Draw(canvas)

    top = 2 * high
    for confusion, title in zip(confusions, titles):
        percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)     # (k, k)
        cells = heat_map(percent, 0, 100).resize((k * wide, k * high), Image.NEAREST)
        canvas.paste(cells, (wide, top))
        heading = f"{title}: truth by line, prediction by column, percent"
        pen.text((8, top - 1.5 * high), heading, INK, FONT, "lm")

        for i, name in enumerate(names):
            middle = top + (i + 0.5) * high
            pen.text((wide - 8, middle), name, INK, FONT, "rm")
            pen.text(((i + 1.5) * wide, top - 0.5 * high), name, INK, FONT, "mm")
            for j, value in enumerate(percent[i].tolist()):
                color = WHITE if value < 45 else INK               # white on the dark half
                pen.text(((j + 1.5) * wide, middle), f"{value:.0f}", color, FONT, "mm")
        top += step
    return canvas


# --- Figure 3 -------------------------------------------------------------------------------------

@torch.no_grad()
def draw_figure_3(model, facts, dataset, protocol, count=3, among=200):
    """Figure 3: M_q, M_r, M_p and M of two classes, one of which CLIP took for the other.

    Which images? Each of the first `among` stands for one pair (true class, what CLIP took it for):
    the one of which rectification mends most pixels there. For each pair its best image is kept,
    and the `count` best of these are shown. So they show what rectification does, not how often.

    model: a ReCLIP in eval mode. dataset: an Evaluation. -> RGB image
    """
    C = len(facts.classes)
    mended_pixels = {}  # (true class, what CLIP took it for) -> how many, in the best image so far
    best = {}           # the same pair -> that image, its truth, CLIP's mask, the rectified mask
    for i in range(min(among, len(dataset))):
        image, truth, _ = dataset[i]
        before = predict_mask(model, "clip", image, truth.shape, protocol)
        after = predict_mask(model, "rectify", image, truth.shape, protocol)

        mended = (truth != IGNORE) & (before != truth) & (after == truth)           # (H0, W0)
        pairs = truth[mended].long() * C + before[mended]
        counts = pairs.bincount(minlength=C * C)
        pair = divmod(int(counts.argmax()), C)
        most = int(counts.max())
        if most > mended_pixels.get(pair, 0):
            mended_pixels[pair] = most
            best[pair] = (image, truth, before, after)

    rows = []
    shown = set()
    ranked = sorted(mended_pixels, key=mended_pixels.get, reverse=True)
    for pair in ranked[:count]:
        image, truth, before, after = best[pair]
        logits = model(image[None].to(model.W_q.device))
        maps = {}  # Eq. (2), (3): M = M_q - (M_r + M_p)
        for title, M in (
            ("query", logits.query),
            ("- reference", logits.reference),
            ("- positional", logits.positional),
            ("= rectified", logits.rectified),
        ):
            maps[title] = M.expand_as(logits.query)[0, list(pair)]                  # (2, h, w)

        images = {"image": to_pil_image(image)}
        for title, mask in (("truth", truth), ("CLIP's mask", before), ("rectified mask", after)):
            images[title] = to_pil_image(color_mask(mask, facts.palette, truth))
            shown.update(mask[truth != IGNORE].tolist())
        rows += rows_of_tiles(images, maps, [facts.classes[c] for c in pair])

    if not rows:
        rows = [[("no pixel is mended", Image.new("RGB", (136, 1), WHITE))]]
    return draw_tiles(rows, [(facts.palette[c], facts.classes[c]) for c in sorted(shown)])


def rows_of_tiles(images, maps, rivals):
    """Three rows of Figure 3, for draw_tiles: a row for each of two classes, and the scales.

    images: {title: RGB image}, four of them, two beside each class.
    maps: {title: (2, h, w) logits of the two}; each map has a scale of its own for both classes,
        which stands below them.
    rivals: the classes' names.
    """
    bounds = {}
    for title, logits in maps.items():
        low, high = logits.aminmax()
        bounds[title] = (low.item(), high.item())

    titled = list(images.items())
    rows = [titled[:2], titled[2:]]
    for of_class, name in enumerate(rivals):
        prefix = f"{first_name(name)}: "           # before the first title of the row
        for title, logits in maps.items():
            rows[of_class].append((prefix + title, heat_map(logits[of_class], *bounds[title])))
            prefix = ""

    nothing = ("", Image.new("RGB", (136, 1), WHITE))
    scale = heat_map(torch.arange(136.).expand(10, -1), 0, 135)
    scales = [(f"{low:.2f} to {high:.2f}", scale) for low, high in bounds.values()]
    return [*rows, [nothing, nothing, *scales]]


# --- The report -----------------------------------------------------------------------------------

PUBLISHED = ("voc", "context", "ade20k")  # the order of Row.paper


def write_report(experiment, plan):
    """A CSV for each table, a PNG for each figure, and report.md, which is printed too."""
    folder = experiment.out / "paper"

    # Whatever is not measured yet is measured now; after make_rows all of it is.
    results = {}  # {name of the row: one result per seed}
    for name, row in plan.rows.items():
        results[name] = [
            measured_row(experiment, plan, name, seed) for seed in seeds_of(row, plan)
        ]
    percent = {}  # {name of the row: mIoU of each seed}
    for name, measured in results.items():
        percent[name] = [100 * result["miou"] for result in measured]

    curves = distance_curves(results)
    write_figures(experiment, results, curves, folder)
    for key, (_, names) in plan.tables.items():
        write_table(plan, names, percent, paper_column(experiment), folder / f"{key}.csv")

    lines = [
        *heading_lines(experiment, plan),
        *table_lines(experiment, plan, percent),
        *comparison_lines(experiment, plan, percent),
        *figure_lines(curves),
        *training_time_lines(experiment, plan),
    ]
    with written_atomically(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwritten: {folder / 'report.md'}")


# What Figures 1(a) and 1(b) compare: title -> name of the row
FIGURE_ROWS = {"CLIP": "clip", "rectified": "both", "distilled": "distilled"}


def distance_curves(results):
    """Figure 1(a): {title: mIoU in percent, one for each bin of EDGES}, of all seeds together."""
    curves = {}
    for title, name in FIGURE_ROWS.items():
        if name in results:
            counts = sum(torch.tensor(result["distances"]) for result in results[name])
            curves[title] = (100 * distance_miou(counts)).tolist()
    return curves


def write_figures(experiment, results, curves, folder):
    """Figures 1(a), 1(b) and 3, as PNG files. curves: those of distance_curves."""
    facts = experiment.facts
    confusions = {}
    for title, name in FIGURE_ROWS.items():
        if name in results:
            confusions[title] = sum(torch.tensor(result["confusion"]) for result in results[name])

    middles = [(a + b) / 2 for a, b in pairwise(EDGES)]
    draw_curves(
        curves,
        middles,
        "mIoU in percent, by place of the object",
        "distance of the object's centroid from the center (1: corner)",
    ).save(folder / "figure1a.png")

    chosen = most_confused(confusions["CLIP"])
    draw_matrices(
        [confusion[chosen][:, chosen] for confusion in confusions.values()],
        [facts.classes[c] for c in chosen],
        list(confusions),
    ).save(folder / "figure1b.png")

    clip = load_clip(experiment.clip, experiment.device)
    path = experiment.row_folder("both", 0) / "rectify.pt"
    rectified = ReCLIP.load(path, clip, experiment.device)
    protocol = experiment.protocol_of(ROWS["both"])
    dataset = experiment.labelled(experiment.split, protocol)
    figure_3 = draw_figure_3(rectified, facts, dataset, protocol)
    figure_3.save(folder / "figure3.png")


def paper_column(experiment):
    """Whose numbers of the paper stand beside ours: VOC's, if it has none on this data set."""
    if experiment.facts.name in PUBLISHED:
        return experiment.facts.name
    return "voc"


def mean_of(values):
    return sum(values) / len(values)


def write_table(plan, names, percent, column, path):
    """The CSV of one table."""
    with written_atomically(path) as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            titles = [f"seed {seed}" for seed in range(plan.seeds)]
            writer.writerow(["row", "mean", f"paper, {column}", *titles])
            for name in names:
                row = plan.rows[name]
                published = row.paper[PUBLISHED.index(column)]
                writer.writerow([row.title, mean_of(percent[name]), published, *percent[name]])


def heading_lines(experiment, plan):
    """The top of report.md: what was measured, how, and with which CLIP."""
    return [
        f"# The paper's evidence on {experiment.facts.name}",
        "",
        f"mIoU in percent, mean (least..most) over the seeds, {plan.seeds} where something learns. "
        f"{describe_protocol(experiment, ROWS['both'])}. CLIP: sha256 {plan.clip_sha256[:12]}. "
        f"Beside it the paper's own number on {paper_column(experiment)}, by its own protocol.",
    ]


def table_lines(experiment, plan, percent):
    """A table of Markdown for each table of the paper: ours, and the paper's number beside it."""
    column = paper_column(experiment)
    lines = []
    for title, names in plan.tables.values():
        lines += ["", f"## {title}", ""]
        lines += [f"| row | {experiment.facts.name} | paper, {column} |", "|---|---|---|"]
        for name in names:
            values = percent[name]
            shown = f"{mean_of(values):.1f}"
            if len(values) > 1:
                shown += f" ({min(values):.1f}..{max(values):.1f})"
            published = plan.rows[name].paper[PUBLISHED.index(column)]
            lines.append(f"| {plan.rows[name].title} | {shown} | {published or ''} |")
    return lines


def comparison_lines(experiment, plan, percent):
    """Which steps of the paper's tables go the same way here, and does "both" beat the controls?"""
    published = {}
    for name, row in plan.rows.items():
        published[name] = row.paper[PUBLISHED.index(paper_column(experiment))]

    # The sequel's number is its authors', on VOC: no step of the paper leads to it.
    steps = {}  # (from, to) -> gain that is expected; of the controls only the sign
    for _, names in plan.tables.values():
        in_paper = [name for name in names if published[name] and name != "plusplus"]
        for a, b in pairwise(in_paper):
            steps[a, b] = published[b] - published[a]
    if "controls" in plan.tables:
        _, names = plan.tables["controls"]
        for name in names:
            if name != "both":
                steps[name, "both"] = 1.0

    lines = ["", "## What came out, and what did not", ""]
    for (a, b), step in steps.items():
        gain = mean_of(percent[b]) - mean_of(percent[a])
        expected = f"{step:+.1f} in the paper" if published[a] else "it should gain"
        line = f"- {plan.rows[a].title} -> {plan.rows[b].title}: {gain:+.1f} here, {expected}"
        if step and step * gain <= 0:
            line += ": **does not come out**"
        lines.append(line)
    return lines


def figure_lines(curves):
    """The figures with their captions, and the numbers behind Figure 1(a)."""
    captions = {
        "figure1a": "1(a): mIoU over the images whose object of the class lies that far from the "
                    "center.",
        "figure1b": "1(b): the classes that CLIP confuses most, in percent of the pixels that went "
                    "to one of them.",
        "figure3": "3: images chosen because rectification mends most pixels that CLIP took for "
                   "one other class.",
    }
    lines = ["", "## Figures"]
    for name, text in captions.items():
        lines += ["", f"Figure {text}", "", f"![{name}]({name}.png)"]

    lines += ["", f"Figure 1(a) in numbers, by distance {EDGES}:", ""]
    for title, values in curves.items():
        shown = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"- {title}: {shown}")
    return lines


def training_time_lines(experiment, plan):
    """How long each row took, mean over seeds; rows that were stopped and resumed are left out."""
    lines = ["", "## Training times, seconds a seed", ""]
    for name, row in plan.rows.items():
        seconds = []
        for seed in seeds_of(row, plan):
            record = read_json(experiment.row_folder(name, seed) / "training.json")
            if record is not None and record["seconds"] is not None:
                seconds.append(record["seconds"])
        if seconds:
            lines.append(f"- {name}: {mean_of(seconds):.0f}")
    return lines


# --- Command line ---------------------------------------------------------------------------------

def parse_arguments(argv=None):
    best_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", choices=list(DATA), default="shapes", help="data set (default: shapes)")
    add("--root", default="data",
        help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--clip", help="a name that clip_model.MODELS knows, or a weights file (default: the data "
        "set's)")
    add("--out", type=Path, help="results go to <out>/paper (default: runs/<data>)")
    add("--split", help="split to evaluate on (default: test of shapes, else val)")
    add("--seeds", type=int, default=3, help="how many times each row is trained (default: 3)")
    add("--recipe", choices=list(RECIPES),
        help="which of the authors' two, for voc, context and ade20k (default: cvpr2024)")
    add("--epochs", type=int,
        help="of every training, to see that it works (default: the data set's)")
    add("--rectification-only", "--rectification_only", action="store_true",
        help="without the rows that need a student")
    add("--report-only", "--report_only", action="store_true",
        help="train nothing: tables, figures and report from what is there")
    add("--device", default=best_device, help="cpu or cuda (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    args = parser.parse_args(argv)

    facts = DATA[args.data]
    args.split = args.split or facts.splits[-1]  # test of shapes: no choice was made on it
    if args.split not in facts.splits:
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(facts.splits)}")
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; at least 1")
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs is {args.epochs}; at least 1")

    args.out = args.out or Path("runs") / args.data
    args.clip = args.clip or facts.clip
    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    check_device(args.device)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # tensors this small gain little from more threads

    facts = DATA[args.data]
    changes = {}
    if args.epochs:
        changes = {"rectify_epochs": args.epochs, "distill_epochs": args.epochs}
    settings = find_settings(args.data, args.recipe, **changes)
    sequel = find_settings(args.data, method="reclip++", **changes)

    plan_path = args.out / "paper" / "plan.json"
    plan = None
    if args.report_only:
        plan = read_plan(plan_path)
    clip = load_clip(args.clip)
    train_split = open_split(args.data, args.root, "train")
    experiment = Experiment(
        facts=facts,
        settings=settings,
        sequel=sequel,
        root=args.root,
        clip=args.clip,
        origin=origin_of(facts, settings, clip, facts.prompts or PROMPTS, train_split),
        out=args.out,
        split=args.split,
        device=args.device,
        workers=args.workers,
    )

    if plan is None:
        plan = make_plan(settings, args.rectification_only, args.seeds, clip.sha256)
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(plan, plan_path)
        make_rows(experiment, plan)
    elif plan.clip_sha256 != clip.sha256:
        raise ValueError(f"{plan_path.parent} was made with another CLIP than {args.clip} (their "
                         "sha256 differ); give the right one with --clip")
    write_report(experiment, plan)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"paper.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("paper.py: stopped; the same command goes on where it stopped")
