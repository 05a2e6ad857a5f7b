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
    seed0/both/ ...          of each row the checkpoint, result.json (what was measured) and
                             training.json (how long the training took)

Made again from the same checkpoints, all these files are the same to the byte. On another processor
the last digits differ, and training amplifies them: to see by how much, hold torch's libraries to
another instruction set, with ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 in the environment.

What stands here
    ROWS, TABLES             every row: what is trained, which numbers differ, the paper's mIoU
    sclip, clearclip, naclip CLIP's last block as later papers read it, in place of MaskCLIP's way
    ConstantBias             a control: one number per class in the place of the positional net
    train_row                a row with train.py's two loops, in a process of its own
    linear_classification    Table 1's "LC": how good are the student's features? (with labels)
    measured_row             mIoU of a row, and the numbers behind Figure 1
    distance_counts, most_confused    Figures 1(a) and 1(b)
    draw_...                 the figures, with Pillow
    write_report             tables, figures, report.md

Only linear_classification trains something with labels, by its very definition, and nothing else
uses what it makes. Everywhere else labels are read to evaluate, and never to train.

Symbols: B images, C classes, D width of CLIP's joint space, E of its image tower; (H, W) size of an
image, (H0, W0) of its truth (pixel labels), h x w patches, n = h * w.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
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
from clip_model import (  # noqa: E402  (the path comes first)
    KEY,
    QUERY,
    VALUE,
    load_clip,
    maskclip,
    tensors_sha256,
    written_atomically,
)
from datasets import DATA, IGNORE, DataSet, Thumbnails, open_split  # noqa: E402
from deeplab import DeepLabV2  # noqa: E402
from eval import (  # noqa: E402
    FONT,
    GREY,
    INK,
    WHITE,
    as_seen,
    best_device,
    color_mask,
    confusion_matrix,
    in_words,
    make_protocol,
    plain_clip,
    predict_mask,
    predict_split,
    scores,
    with_legend,
    without_biases,
)
from extras import plusplus  # noqa: E402
from reclip import RECIPES, ReCLIP, read_checkpoint  # noqa: E402
from train import (  # noqa: E402
    Run,
    distill,
    hyper_parameters,
    label_training_set,
    new_reclip,
    train_rectification,
)


# --- Rows and tables ------------------------------------------------------------------------------

# What stands behind a row, in the order in which rows are made: a student needs its teacher, and
# the linear classifier needs its student.
#   clip      nothing is learnt: plain CLIP, in one of its attention variants
#   mean      nothing is learnt: a control, the mean logit of each class subtracted
#   rectify   stage 1 of the paper
#   reclip++  the authors' sequel
#   distill   stage 2, from the row "both"
#   linear    a linear classifier on the features of the row "distilled"
STAGES = ("clip", "mean", "rectify", "reclip++", "distill", "linear")
LEARNING = ("rectify", "reclip++", "distill")


class Row(NamedTuple):
    title: str
    stage: str          # one of STAGES
    changes: dict = {}  # fields of reclip.Options and train.Settings, where they differ
    # The paper's mIoU on VOC, Context, ADE20K (the sequel's own, of "plusplus"); None: not given
    paper: tuple = (None, None, None)
    control: str = ""   # "one number": ConstantBias; "other labels": those of other images
    attention: str = "maskclip"  # a key of ATTENTIONS


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
    "plusplus": Row(
        "ReCLIP++, the sequel (quoted: its authors)", "reclip++", paper=(85.4, 36.1, 16.4)
    ),

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
    "sclip": Row("sclip", "clip", attention="sclip"),
    "clearclip": Row("clearclip", "clip", attention="clearclip"),
    "naclip": Row("naclip", "clip", attention="naclip"),
    "sclip_rectified": Row("sclip, rectified", "rectify", attention="sclip"),
    "clearclip_rectified": Row("clearclip, rectified", "rectify", attention="clearclip"),
    "naclip_rectified": Row("naclip, rectified", "rectify", attention="naclip"),
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


def chosen_rows(options, rectification_only):
    """{name: Row}: ROWS, or what of them can be had without a student.

    options: the data set's own. The rows "shared" and "per class" ask what the other kind of
        prompt would bring; those of its own kind would be earlier rows once more.
    """
    rows = {}
    for name, row in ROWS.items():
        needs_student = row.stage in ("distill", "linear")
        own_kind = row.changes.get("prompt_per_class") == options.prompt_per_class
        if not own_kind and not (rectification_only and needs_student):
            rows[name] = row
    return rows


def chosen_tables(rows):
    """TABLES, with those of their rows that are there; a table of one row compares nothing."""
    tables = {}
    for key, (title, names) in TABLES.items():
        left = [name for name in names if name in rows]
        if len(left) > 1:
            tables[key] = (title, left)
    return tables


class Experiment(NamedTuple):
    """What all rows have in common."""
    dataset: DataSet
    recipe: str
    epochs: int          # of every training; None: the data set's own
    root: str            # where the data set lies
    clip: str            # name or file of CLIP's weights
    clip_identity: str   # CLIP.identity() of it
    out: Path            # runs/<data>
    split: str           # that is evaluated
    rows: dict           # {name: Row}
    seeds: int           # of each row that learns
    device: str
    workers: int         # processes that decode images

    def seeds_of(self, row):
        """The seeds that a row is made with: one where nothing is random, for nothing is learnt."""
        if row.stage in ("clip", "mean"):
            return range(1)
        return range(self.seeds)

    def row_folder(self, name, seed):
        """Where checkpoint, training.json and result.json of a row lie."""
        return self.out / "paper" / f"seed{seed}" / name

    def changes_of(self, row):
        """{name: value} of the hyper-parameters in which a row differs from the data set's own."""
        changes = dict(row.changes)
        if self.epochs:
            changes |= {"rectify_epochs": self.epochs, "distill_epochs": self.epochs}
        return changes

    def labelled(self, split_name):
        """A split with its truth."""
        return open_split(self.dataset.name, self.root, split_name)


# --- Attention variants ---------------------------------------------------------------------------

# How later papers on segmentation read CLIP's last block: functions like clip_model.maskclip, for
# ReCLIP(attention=...). They keep attention, but between vectors of one kind. A patch then reads
# mostly itself and the patches that look like it, so it averages over its own object. The class
# token is read like a patch, but it reads nothing: only patches are wanted.
#
# block: CLIP's last ResidualAttentionBlock. tokens: (B, 1 + n, E), the class token first.
# size: (h, w) of the grid of patches. -> (B, n, E)

def sclip(block, tokens, size):
    """SCLIP (Wang et al., ECCV 2024): queries are compared with queries, keys with keys, and what
    both read is added."""
    y = block.ln_1(tokens)
    q = block.attn.project(y, QUERY)                            # (B, heads, 1 + n, E / heads)
    k = block.attn.project(y, KEY)
    v = block.attn.project(y, VALUE)

    by_queries = F.scaled_dot_product_attention(q[:, :, 1:], q, v)
    by_keys = F.scaled_dot_product_attention(k[:, :, 1:], k, v)
    x = tokens[:, 1:] + block.attn.join_heads(by_queries + by_keys)
    return x + block.mlp(block.ln_2(x))


def clearclip(block, tokens, size):
    """ClearCLIP (Lan et al., ECCV 2024): queries with queries; no residual, no MLP.

    Its finding: what the residual carries is mostly noise for segmentation.
    """
    y = block.ln_1(tokens)
    q = block.attn.project(y, QUERY)                            # (B, heads, 1 + n, E / heads)
    v = block.attn.project(y, VALUE)

    by_queries = F.scaled_dot_product_attention(q[:, :, 1:], q, v)
    return block.attn.join_heads(by_queries)


def naclip(block, tokens, size):
    """NACLIP (Hajimiri et al., "Pay Attention to Your Neighbours", WACV 2025) in its "reduced"
    form: keys with keys, near ones more; no residual, no MLP."""
    y = block.ln_1(tokens)
    k = block.attn.project(y, KEY)                              # (B, heads, 1 + n, E / heads)
    v = block.attn.project(y, VALUE)

    bonus = nearness(*size, v)                                  # (n, 1 + n)
    by_keys = F.scaled_dot_product_attention(k[:, :, 1:], k, v, attn_mask=bonus)
    return block.attn.join_heads(by_keys)


def nearness(h, w, like, std=5.0):
    """What NACLIP adds to the attention logits, so that patches read their neighbors more.

        exp(-d^2 / (2 std^2))    for two patches that lie d patches apart; 0 for the class token

    h, w: size of the grid of patches.
    like: a tensor of the dtype and on the device wanted.
    std: in patches; 5 is NACLIP's released value.
    -> (n, 1 + n), a row per patch that reads; first column: the class token
    """
    y = torch.arange(h, dtype=like.dtype, device=like.device)
    x = torch.arange(w, dtype=like.dtype, device=like.device)

    # d^2 = dy^2 + dx^2, so the Gaussian of d is a Gaussian of dy times one of dx. The Kronecker
    # product multiplies every pair of them, in the order in which the grid is flattened.
    of_rows = torch.exp(-(y[:, None] - y).square() / (2 * std ** 2))        # (h, h)
    of_columns = torch.exp(-(x[:, None] - x).square() / (2 * std ** 2))     # (w, w)
    patches = torch.kron(of_rows, of_columns)                               # (n, n)
    return F.pad(patches, (1, 0))                                           # (n, 1 + n)


ATTENTIONS = {"maskclip": maskclip, "sclip": sclip, "clearclip": clearclip, "naclip": naclip}


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


def train_row(experiment, name, seed):
    """Trains a row, unless it is there. One that was stopped goes on, with the same result.

    Errors: ValueError (of Run) if it was begun with other numbers than are asked for now.
    """
    row = experiment.rows[name]
    folder = experiment.row_folder(name, seed)
    device = experiment.device
    changes = experiment.changes_of(row)
    options, settings = hyper_parameters(experiment.dataset, experiment.recipe, **changes)
    split = open_split(experiment.dataset.name, experiment.root, "train")
    clip = load_clip(experiment.clip, device)
    labels_path = experiment.out / "image_labels.json"  # one for all: nothing learnt goes into it

    run = Run(row.stage, folder, seed, device, experiment.workers, resume=True)
    is_new = not run.checkpoint.is_file()
    began = time.perf_counter()
    if row.stage == "distill":
        teacher = ReCLIP.load(experiment.row_folder("both", seed) / "rectify.pt", clip)
        distill(experiment.dataset, settings, split, teacher, labels_path, run)
    elif row.stage == "reclip++":
        plusplus.train(experiment.dataset, split, clip, run, **changes)
    else:
        model = new_reclip(clip, experiment.dataset, options, settings, seed)
        model.attention = ATTENTIONS[row.attention]
        if row.control == "one number":
            model.positional = ConstantBias(len(model.class_names)).to(device)
        labels = label_training_set(model, split, settings, labels_path, experiment.workers)
        if row.control == "other labels":
            labels = shuffled(labels, split.names, seed)
        train_rectification(model, split, labels, settings, run)

    if is_new:  # of a row that was stopped, nobody knows how long it took in all
        write_json(folder / "training.json", {"seconds": time.perf_counter() - began})


def shuffled(labels, names, seed):
    """Deals the image-level labels to other images: as many of each class, but elsewhere."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {name: labels[names[i]] for name, i in zip(names, order)}


def read_json(path):
    """The content, or None if there is no such file, or it was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


# --- The model of a row ---------------------------------------------------------------------------

def open_row(experiment, row, path):
    """The model behind a row, in eval mode; path: its checkpoint, None where nothing was learnt."""
    device = experiment.device
    if row.stage == "distill":
        return DeepLabV2.load(path, device)
    if row.stage == "linear":
        student = DeepLabV2.load(path, device)
        return linear_classification(student, as_seen(student, experiment.labelled("train")))

    clip = load_clip(experiment.clip, device)
    if row.control == "one number":
        return load_constant_bias(path, clip)
    if row.stage == "reclip++":
        return plusplus.ReCLIPPlusPlus.load(path, clip)
    if row.stage == "rectify":
        return ReCLIP.load(path, clip, attention=ATTENTIONS[row.attention])

    attention = ATTENTIONS[row.attention]
    model = plain_clip(clip, experiment.dataset, experiment.recipe, attention=attention)
    if row.stage == "mean":
        split = open_split(experiment.dataset.name, experiment.root, "train")
        subtract_mean_logit(model, Thumbnails(split, clip.input_resolution))
    return model


def load_constant_bias(path, clip):
    """The control "one number" from its checkpoint; ReCLIP.load knows no such part."""
    content = read_checkpoint(path, "rectify")
    model = ReCLIP(
        clip,
        content["class_names"],
        W_q=content["learnt"]["W_q"],
        protocol=content["protocol"],
        **content["options"],
    )
    model.positional = ConstantBias(len(model.class_names))
    model.load_state_dict(content["learnt"])
    return model.to(clip.logit_scale.device).eval()


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


def measured_row(experiment, name, seed):
    """{"miou", "confusion" (C, C), "distances" (bins, C, 2), ...} of a row under one seed.

    Kept beside its checkpoint in result.json; measured again only if checkpoint, CLIP, protocol or
    row is another.
    """
    row = experiment.rows[name]
    path = None
    protocol = make_protocol("rectify", experiment.dataset, experiment.recipe)
    learnt = None
    if row.stage == "linear":
        path = experiment.row_folder("distilled", seed) / "distill.pt"
    elif row.stage in LEARNING:
        path = experiment.row_folder(name, seed) / f"{row.stage}.pt"
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run the same command without "
                                    "--report-only, it goes on where it stopped")
        content = read_checkpoint(path)
        protocol = content["protocol"]
        learnt = tensors_sha256(content["learnt"])

    identity = {
        "row": [row.stage, row.changes, row.control, row.attention],
        "data": [experiment.dataset.name, experiment.split, experiment.recipe],
        "protocol": protocol,
        "edges": EDGES,
        "clip": experiment.clip_identity,
        "learnt": learnt,
    }
    result_path = experiment.row_folder(name, seed) / "result.json"
    known = read_json(result_path)
    if known is not None and known["identity"] == identity:
        return known

    model = open_row(experiment, row, path)
    split = experiment.labelled(experiment.split)
    C = len(experiment.dataset.classes)
    confusion = torch.zeros(C, C, dtype=torch.int64)
    distances = torch.zeros(len(EDGES) - 1, C, 2, dtype=torch.int64)
    title = f"{name}, seed {seed}"
    for mask, truth, _ in predict_split(model, split, title, experiment.workers):
        confusion += confusion_matrix(mask, truth, C)
        distances += distance_counts(mask, truth, C, EDGES)

    result = {
        "identity": identity,
        "images": len(split),
        "miou": scores(confusion)["miou"],
        "confusion": confusion.tolist(),
        "distances": distances.tolist(),
    }
    write_json(result_path, result)
    return result


# --- All rows, several at a time ------------------------------------------------------------------

def make_rows(experiment):
    """Trains and measures all rows, as many at a time as there are cores; beside a GPU one."""
    at_once = 1
    if experiment.device == "cpu":
        at_once = os.cpu_count()
    total = sum(len(experiment.seeds_of(row)) for row in experiment.rows.values())
    ended = 0
    began = time.perf_counter()

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, context, start_worker, (experiment.device,)) as pool:
        # In waves, since a student needs its teacher.
        for stage in STAGES:
            jobs = []
            for seed in range(experiment.seeds):
                for name, row in experiment.rows.items():
                    if row.stage == stage and seed in experiment.seeds_of(row):
                        jobs.append((experiment, name, seed))

            for title in pool.map(make_row, jobs):
                ended += 1
                seconds_a_row = (time.perf_counter() - began) / ended
                left = seconds_a_row * (total - ended) / 60
                print(f"row {ended}/{total}: {title}; about {left:.0f} min left", flush=True)


def make_row(job):
    """In a process of its own: one row under one seed."""
    experiment, name, seed = job
    try:
        if experiment.rows[name].stage in LEARNING:
            train_row(experiment, name, seed)
        measured_row(experiment, name, seed)
    except KeyboardInterrupt:
        os._exit(1)  # Ctrl-C reaches this process too, and the pool would hand it the next row
    return f"{name}, seed {seed}"


def start_worker(device):
    """What a process does first: settles how it computes, and sees to it that it ends."""
    if device == "cpu":
        torch.set_num_threads(1)  # there is one process per core already
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as train.py
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A worker whose parent was killed would train on for hours. What is saved stays."""
    multiprocessing.parent_process().join()
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
        for a, b in points:
            if not math.isnan(b):
                pen.ellipse([a - radius, b - radius, a + radius, b + radius], color)
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
def draw_figure_3(model, dataset, pairs, count=3, among=200):
    """Figure 3: M_q, M_r, M_p and M of two classes, one of which CLIP took for the other.

    Which images? Each of the first `among` stands for one rivalry (true class, what CLIP took it
    for): the one of which rectification mends most pixels there. For each rivalry its best image is
    kept, and the `count` best of these are shown. So they show what rectification does, not how
    often. Rivals that both have a map M_p come first: see silent_classes.

    model: a ReCLIP in eval mode. dataset: its DataSet. pairs: an Evaluation. -> RGB image
    """
    plain = without_biases(model)
    C = len(dataset.classes)
    mended_pixels = {}  # (true class, what CLIP took it for) -> how many, in the best image so far
    best = {}           # the same rivals -> that image, its truth, CLIP's mask, the rectified mask
    for i in range(min(among, len(pairs))):
        image, truth, _ = pairs[i]
        before = predict_mask(plain, image, truth.shape)
        after = predict_mask(model, image, truth.shape)

        mended = (truth != IGNORE) & (before != truth) & (after == truth)           # (H0, W0)
        codes = truth[mended].long() * C + before[mended]
        counts = codes.bincount(minlength=C * C)
        rivals = divmod(int(counts.argmax()), C)
        most = int(counts.max())
        if most > mended_pixels.get(rivals, 0):
            mended_pixels[rivals] = most
            best[rivals] = (image, truth, before, after)

    silent = silent_classes(model)

    def rank(rivals):
        return silent.isdisjoint(rivals), mended_pixels[rivals]

    rows = []
    shown = set()
    for rivals in sorted(mended_pixels, key=rank, reverse=True)[:count]:
        image, truth, before, after = best[rivals]
        logits = model(image[None].to(model.W_q.device))
        maps = {}  # Eq. (2), (3): M = M_q - (M_r + M_p)
        for title, M in (
            ("query", logits.query),
            ("- reference", logits.reference),
            ("- positional", logits.positional),
            ("= rectified", logits.rectified),
        ):
            maps[title] = M.expand_as(logits.query)[0, list(rivals)]                # (2, h, w)

        images = {"image": to_pil_image(image)}
        for title, mask in (("truth", truth), ("CLIP's mask", before), ("rectified mask", after)):
            images[title] = to_pil_image(color_mask(mask, dataset.palette, truth))
            shown.update(mask[truth != IGNORE].tolist())
        rows += rows_of_tiles(images, maps, [dataset.classes[c] for c in rivals])

    if not rows:
        rows = [[("no pixel is mended", Image.new("RGB", (136, 1), WHITE))]]
    return draw_tiles(rows, [(dataset.palette[c], dataset.classes[c]) for c in sorted(shown)])


def silent_classes(model):
    """The classes whose M_p is 0 at all places, behind the last ReLU: a set of indices."""
    grid = model.clip.visual.grid
    M_p = model.positional_logits(grid, grid)                           # (1, C, grid, grid)
    return set((M_p == 0).all(3).all(2)[0].nonzero()[:, 0].tolist())


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


def write_report(experiment):
    """A CSV for each table, a PNG for each figure, and report.md, which is printed too."""
    folder = experiment.out / "paper"

    # Whatever is not measured yet is measured now; after make_rows all of it is.
    results = {}  # {name of the row: one result per seed}
    for name, row in experiment.rows.items():
        results[name] = [measured_row(experiment, name, seed) for seed in experiment.seeds_of(row)]
    percent = {}  # {name of the row: mIoU of each seed}
    for name, measured in results.items():
        percent[name] = [100 * result["miou"] for result in measured]

    tables = chosen_tables(experiment.rows)
    for key, (_, names) in tables.items():
        write_table(experiment, names, percent, folder / f"{key}.csv")

    clip = load_clip(experiment.clip, experiment.device)
    rectified = ReCLIP.load(experiment.row_folder("both", 0) / "rectify.pt", clip)
    curves = distance_curves(results)
    write_figures(experiment, results, curves, rectified, folder)

    lines = [
        *heading_lines(experiment),
        *table_lines(experiment, tables, percent),
        *comparison_lines(experiment, tables, percent),
        *figure_lines(curves, rectified),
        *training_time_lines(experiment),
    ]
    with written_atomically(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
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


def write_figures(experiment, results, curves, rectified, folder):
    """Figures 1(a), 1(b) and 3, as PNG files. curves: those of distance_curves; rectified: a ReCLIP
    for Figure 3."""
    dataset = experiment.dataset
    middles = [(a + b) / 2 for a, b in pairwise(EDGES)]
    draw_curves(
        curves,
        middles,
        "mIoU in percent, by place of the object",
        "distance of the object's centroid from the center (1: corner)",
    ).save(folder / "figure1a.png")

    confusions = {}
    for title, name in FIGURE_ROWS.items():
        if name in results:
            confusions[title] = sum(torch.tensor(result["confusion"]) for result in results[name])
    chosen = most_confused(confusions["CLIP"])
    draw_matrices(
        [confusion[chosen][:, chosen] for confusion in confusions.values()],
        [dataset.classes[c] for c in chosen],
        list(confusions),
    ).save(folder / "figure1b.png")

    pairs = as_seen(rectified, experiment.labelled(experiment.split))
    draw_figure_3(rectified, dataset, pairs).save(folder / "figure3.png")


def published_miou(experiment, row):
    """The paper's mIoU of a row, or None: on VOC, if the paper does not know the data set."""
    return row.paper[PUBLISHED.index(paper_column(experiment))]


def paper_column(experiment):
    """Whose numbers of the paper stand beside ours: VOC's, if it has none on this data set."""
    if experiment.dataset.name in PUBLISHED:
        return experiment.dataset.name
    return "voc"


def mean_of(values):
    return sum(values) / len(values)


def write_table(experiment, names, percent, path):
    """The CSV of one table."""
    with written_atomically(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            titles = [f"seed {seed}" for seed in range(experiment.seeds)]
            writer.writerow(["row", "mean", f"paper, {paper_column(experiment)}", *titles])
            for name in names:
                row = experiment.rows[name]
                values = percent[name]
                published = published_miou(experiment, row)
                writer.writerow([row.title, mean_of(values), published, *values])


def heading_lines(experiment):
    """The top of report.md: what was measured, how, and with which CLIP."""
    dataset = experiment.dataset
    protocol = make_protocol("rectify", dataset, experiment.recipe)
    return [
        f"# The paper's evidence on {dataset.name}",
        "",
        "mIoU in percent, mean (least..most) over the seeds, "
        f"{experiment.seeds} where something learns. {dataset.name} {experiment.split}, recipe "
        f"{experiment.recipe}, {in_words(protocol)}, {dataset.background}. CLIP: "
        f"{experiment.clip_identity[:12]}. Beside it the paper's own number on "
        f"{paper_column(experiment)}, by its own protocol.",
    ]


def table_lines(experiment, tables, percent):
    """A table of Markdown for each table of the paper: ours, and the paper's number beside it."""
    lines = []
    for title, names in tables.values():
        lines += ["", f"## {title}", ""]
        lines += [f"| row | {experiment.dataset.name} | paper, {paper_column(experiment)} |"]
        lines += ["|---|---|---|"]
        for name in names:
            row = experiment.rows[name]
            values = percent[name]
            shown = f"{mean_of(values):.1f}"
            if len(values) > 1:
                shown += f" ({min(values):.1f}..{max(values):.1f})"
            published = published_miou(experiment, row) or ""
            lines.append(f"| {row.title} | {shown} | {published} |")
    return lines


def comparison_lines(experiment, tables, percent):
    """Which steps of the paper's tables go the same way here, and does "both" beat the controls?"""
    published = {}
    for name, row in experiment.rows.items():
        published[name] = published_miou(experiment, row)

    # The sequel's number is its authors', on VOC: no step of the paper leads to it.
    steps = {}  # (from, to) -> gain that is expected; of the controls only the sign
    for _, names in tables.values():
        in_paper = [name for name in names if published[name] and name != "plusplus"]
        for a, b in pairwise(in_paper):
            steps[a, b] = published[b] - published[a]
    if "controls" in tables:
        _, names = tables["controls"]
        for name in names:
            if name != "both":
                steps[name, "both"] = 1.0

    lines = ["", "## What came out, and what did not", ""]
    for (a, b), step in steps.items():
        gain = mean_of(percent[b]) - mean_of(percent[a])
        titles = f"{experiment.rows[a].title} -> {experiment.rows[b].title}"
        expected = f"{step:+.1f} in the paper" if published[a] else "it should gain"
        line = f"- {titles}: {gain:+.1f} here, {expected}"
        if step and step * gain <= 0:
            line += ": **does not come out**"
        lines.append(line)
    return lines


def figure_lines(curves, rectified):
    """The figures with their captions, and the numbers behind Figure 1(a)."""
    captions = {
        "figure1a": "1(a): mIoU over the images whose object of the class lies that far from the "
                    "center.",
        "figure1b": "1(b): the classes that CLIP confuses most, in percent of the pixels that went "
                    "to one of them.",
        "figure3": "3: images chosen because rectification mends most pixels that CLIP took for "
                   "one other class. Both classes share the scale of a map, which stands below it.",
    }
    silent = [first_name(rectified.class_names[c]) for c in sorted(silent_classes(rectified))]
    if silent:
        captions["figure3"] += (
            f" M_p is 0 at all places for {', '.join(silent)}: the last ReLU of the positional net "
            "cuts their maps off. Pairs of which both classes have a map come first."
        )

    lines = ["", "## Figures"]
    for name, text in captions.items():
        lines += ["", f"Figure {text}", "", f"![{name}]({name}.png)"]

    lines += ["", f"Figure 1(a) in numbers, by distance {EDGES}:", ""]
    for title, values in curves.items():
        shown = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"- {title}: {shown}")
    return lines


def training_time_lines(experiment):
    """How long each row took, mean over seeds; rows that were stopped and resumed are left out."""
    lines = ["", "## Training times, seconds a seed", ""]
    for name, row in experiment.rows.items():
        seconds = []
        for seed in experiment.seeds_of(row):
            record = read_json(experiment.row_folder(name, seed) / "training.json")
            if record is not None:
                seconds.append(record["seconds"])
        if seconds:
            lines.append(f"- {name}: {mean_of(seconds):.0f}")
    return lines


# --- Command line ---------------------------------------------------------------------------------

def parse_arguments(argv=None):
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
    add("--rectification-only", action="store_true", help="without the rows that need a student")
    add("--report-only", action="store_true",
        help="train nothing: what the same command without it made is reported anew")
    add("--device", default=best_device(), help="cpu or cuda (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    args = parser.parse_args(argv)

    dataset = DATA[args.data]
    args.split = args.split or dataset.splits[-1]  # test of shapes: no choice was made on it
    args.out = args.out or Path("runs") / args.data
    args.clip = args.clip or dataset.clip
    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # tensors this small gain little from more threads

    dataset = DATA[args.data]
    options, _ = hyper_parameters(dataset, args.recipe)
    experiment = Experiment(
        dataset=dataset,
        recipe=options.recipe,
        epochs=args.epochs,
        root=args.root,
        clip=args.clip,
        clip_identity=load_clip(args.clip).identity(),
        out=args.out,
        split=args.split,
        rows=chosen_rows(options, args.rectification_only),
        seeds=args.seeds,
        device=args.device,
        workers=args.workers,
    )
    if not args.report_only:
        make_rows(experiment)
    write_report(experiment)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"paper.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("paper.py: stopped; the same command goes on where it stopped")
