"""Images and their truth: shapes (a miniature world), VOC, Context, ADE20K, and images of your own.

What stands here, from top to bottom
    DATA, own_facts          facts of each data set: class names, colors, evaluation protocol
    SETTINGS, RECIPE_SIZES   the hyper-parameters on each data set, with their sources
    LAYOUTS, open_split      where the files of a data set lie; one split of it, opened
    Files, Folder            a split on disk: images, truth, names; your own images, without truth
    Augment                  the training transform of Sec. 4.1: random crop, random flip
    TrainingStream           an endless, seeded, resumable stream of images. It never opens a label
    Thumbnails               each image once, as CLIP's image encoder wants it
    Windows                  each image cut into windows, for the sequel's image-level labels
    Evaluation               image, truth, name
    Progress                 one line: how far, how fast, how long still
    Shapes, target_scene     a split of the miniature world, drawn from a seed
    prepare, verify          python datasets.py --prepare voc --root data --download

Words and symbols
    C classes; H x W pixels, H' x W' after resizing.
    image        uint8 (3, H, W), 0 to 255, or float (3, H, W) in [0, 1]. Not normalized by mean and
                 standard deviation here, because CLIP and the student each have their own
    truth        uint8 (H, W): the class 0..C-1 of each pixel, or 255 = IGNORE = not evaluated
    annotation   the file that truth is read from; its values differ from one data set to the next

Sources of numbers: "Sec. 4.1" = the paper, "released" = its authors' code, "ours" = chosen here.

Copied elsewhere (it needs torch, torchvision, numpy and Pillow), it is used like this:

    split = open_split("voc", "data", "train")
    augment = Augment(long_side=2048, short_side=512, crop=512, antialias=split.antialias)
    stream = TrainingStream(split, augment, seed=0)
    for images, valid, names in DataLoader(stream, batch_size=4, sampler=range(4000)):
        ...                               # 1000 times; images: float (4, 3, 512, 512) in [0, 1]

    for image, truth, name in Evaluation(open_split("voc", "data", "val"), 2048, 512):
        ...                               # image float (3, H', W'), truth uint8 (H, W)
"""

import argparse
import colorsys
import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255  # in truth: this pixel is not evaluated


# --- Facts: class names, colors, protocol ---------------------------------------------------------

def split_names(text):
    """"airplane, bicycle" -> ("airplane", "bicycle")"""
    return tuple(name.strip() for name in text.split(","))


# All names as the paper's authors prompt CLIP with them, in the order of the label values.
VOC_CLASSES = split_names("""
    airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse,
    motorbike, person, potted plant, sheep, sofa, train, tv monitor""")

CONTEXT_CLASSES = split_names("""
    airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus,
    cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
    floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse,
    person, plate, platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky,
    snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window, wood""")

ADE_CLASSES = split_names("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
    sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water,
    painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock,
    wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs,
    runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind,
    coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
    computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
    chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
    apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van,
    ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
    basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
    microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor,
    bulletin board, shower, radiator, glass, clock, flag""")

# The miniature world. Twins, two classes that are easily taken for each other, stand side by side.
# The colors below are those of masks; HUES, further down, has those that things are painted in.
SHAPES_CLASSES = ("coin", "ring", "box", "gem", "star", "flower", "bee", "beetle")

# Its tiny CLIP knows some forty words: the 85 prompts for real images would be Greek to it.
SHAPES_PROMPTS = (
    "a photo of a {}",
    "a picture of a {}",
    "a good photo of a {}",
    "a large {}",
    "a small {}",
    "a photo of one {}",
)

SHAPES_PALETTE = [
    (230, 159, 0),    # coin: orange
    (180, 90, 0),     # ring: brown
    (0, 114, 178),    # box: blue
    (86, 180, 233),   # gem: light blue
    (204, 121, 167),  # star: pink
    (150, 30, 90),    # flower: dark red
    (120, 200, 60),   # bee: light green
    (0, 120, 80),     # beetle: dark green
]


def voc_palette():
    """VOC's 256 colors (r, g, b), by its rule.

    The bits of the index, from the lowest up, are dealt in turn to red, green and blue, and fill
    each from its highest bit down: 1 = red 128, 2 = green 128, 4 = blue 128, 8 = red 64, and so
    on. So neighboring indices get colors that lie far apart.
    """
    palette = []
    for index in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            if index >> bit & 1:
                color[bit % 3] += 128 >> (bit // 3)
        palette.append(tuple(color))
    return palette


@dataclass(frozen=True)
class DataFacts:
    """What is fixed for a data set, whatever the recipe."""
    name: str                 # the key in DATA; of your own images: a name for them
    classes: tuple            # C names, in the order of the class indices
    palette: list             # C colors (r, g, b)
    background: str           # in words: which pixels are not evaluated
    clip: str                 # default weights: a name that load_clip knows, or a file
    splits: tuple = ("val",)  # those that eval.py may report on
    prompts: tuple = None     # of the Query; None: the 85 of MaskCLIP and the released code


DATA = {
    "shapes": DataFacts(
        name="shapes",
        classes=SHAPES_CLASSES,
        palette=SHAPES_PALETTE,
        background="ground pixels are ignored, 8 classes",
        clip=str(Path(__file__).with_name("extras") / "shapes_clip.pt"),
        splits=("val", "test"),
        prompts=SHAPES_PROMPTS,
    ),
    "voc": DataFacts(
        name="voc",
        classes=VOC_CLASSES,
        palette=voc_palette()[1:21],
        background="pixels labelled background (0) or void (255) are ignored, 20 classes",
        clip="ViT-B/16",
    ),
    "context": DataFacts(
        name="context",
        classes=CONTEXT_CLASSES,
        palette=voc_palette()[1:60],
        background="pixels labelled 0 (none of the 59) are ignored",
        clip="ViT-B/16",
    ),
    "ade20k": DataFacts(
        name="ade20k",
        classes=ADE_CLASSES,
        palette=voc_palette()[1:151],  # VOC's colors, not ADE's official ones
        background="pixels labelled 0 (other) are ignored, 150 classes",
        clip="ViT-B/16",
    ),
}


def own_facts(name, class_names):
    """Returns the DataFacts of your own images, which have no truth.

    Args:
        name: a name for them: train.py gives the folder, eval.py "pictures".
        class_names: the classes to look for, at most 254 (truth and masks are bytes; 255 = IGNORE).
    """
    if len(class_names) > 254:
        raise ValueError(
            f"{len(class_names)} classes are named: 254 at most (masks are bytes, 255 = ignored)"
        )
    return DataFacts(
        name=name,
        classes=tuple(class_names),
        palette=voc_palette()[1:1 + len(class_names)],
        background="no labels",
        clip="ViT-B/16",
        splits=(),
    )


def read_classes(text):
    """Reads class names as a person writes them: "cat, dog|puppy" -> ("cat", "dog | puppy").

    A bar separates synonyms. `text` may also be the path of a text file with one class a line
    (read_lines). ValueError: fewer than two classes, an empty name, a name twice, or a comma in a
    line.
    """
    if isfile(text):  # unlike Path.is_file, it says no to a list that is too long for a path
        entries = read_lines(text)
        for entry in entries:
            if "," in entry:
                raise ValueError(f"'{entry}' in {text} holds a comma: write one class a line")
    else:
        entries = text.split(",")

    classes = []    # synonyms joined again, with the spaces where we want them
    all_names = []  # of all classes together, in lower case, as CLIP reads them
    for entry in entries:
        synonyms = [name.strip() for name in entry.split("|")]
        classes.append(" | ".join(synonyms))
        all_names += [name.lower() for name in synonyms]

    if len(classes) < 2 or "" in all_names or len(set(all_names)) < len(all_names):
        raise ValueError(
            f"the class list '{text}' needs two names or more, none empty, none twice "
            "(or a file of such lines)"
        )
    return tuple(classes)


def read_lines(path):
    """The lines of a text file without the empty ones and the remarks, which begin with #."""
    lines = []
    for line in Path(path).read_text("utf-8-sig", errors="replace").splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            lines.append(line)
    return lines


def read_prompts(path):
    """Reads templates of the Query from a file (read_lines), with {} for the class name.

    Errors: FileNotFoundError; ValueError for no template, or a line that has not {} once.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of prompts at {path}")
    prompts = read_lines(path)
    for prompt in prompts:
        if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2:
            raise ValueError(f"the prompt '{prompt}' of {path} must have {{}} once, where the "
                             "class name goes, and no other braces")
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write templates, one a line, such as "
                         "'a photo of a {}.'")
    return tuple(prompts)


# --- Settings: the hyper-parameters of training ---------------------------------------------------

def option(default, help):
    """A field of Settings; `help` is what --help of train.py prints about it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every hyper-parameter, with unit and source; find_settings gives those of a data set.

    The defaults here are those of your own images, which are VOC's under the recipe 2025. On voc,
    context and ade20k the recipe's row of RECIPE_SIZES replaces sides, epochs and denoising, so
    `Settings()` or `SETTINGS["voc"]` alone is no recipe.

    train.py turns each field into an option of its command line, and keeps them all with a run, so
    that a run is not resumed under other settings.
    """

    recipe: str = option("2025", "which of the authors' two: cvpr2024 or 2025 (reclip.RECIPES)")
    method: str = option("reclip", "reclip, the paper's, or reclip++, its sequel")

    # Rectification, Sec. 3.1-3.4: the loop
    rectify_epochs: int = option(51, "epochs of rectification (released)")
    rectify_poly_epochs: int = option(
        200, "the learning rate falls as if training ended, at 0, after so many epochs (released)")
    rectify_batch: int = option(1, "images a step (released)")
    lr: float = option(0.01, "learning rate of SGD (Sec. 4.1)")
    momentum: float = option(0.9, "momentum of SGD (released)")
    weight_decay: float = option(0.0005, "weight decay of SGD (Sec. 4.1)")
    poly_power: float = option(
        0.9, "learning rate = lr * (1 - epoch / rectify_poly_epochs) ** poly_power (Sec. 4.1)")

    # Rectification: the image-level labels
    threshold: float = option(
        23.0, "an image holds a class if 100 * cosine reaches it (t of Sec. 3.4; value released)")
    top_k: int = option(2, "image-level labels where no class passes the threshold (released)")
    label_window: int = option(
        0, "side of the windows that image-level labels are found in, pixels (ReCLIP++); 0: no "
        "windows, the threshold decides")

    # Rectification: the model
    prompt_length: int = option(
        73, "L of Eq. (1), in tokens; shortened so that the longest class name fits (Sec. 3.2)")
    prompt_per_class: bool = option(
        False, "each class has L vectors of its own (ours); the paper's are shared")
    reference_norm: str = option("frobenius", "length of W_r: frobenius (released) or class")
    positional_channels: int = option(
        None, "channels of M_p: one a class if not given (released), 1 (Eq. (2)), 0: no M_p")
    positional_last_relu: bool = option(
        True, "ReLU after the last batch norm of the positional net (released)")
    positional_gain: float = option(1.0, "fixed factor on M_p, for a small start (ours)")
    tau_1: float = option(0.001, "temperature of the Gumbel-softmax, Eq. (4) (released)")
    tau: float = option(
        None, "temperature of Eq. (5); if not given, 1 / exp(CLIP's logit_scale) (released)")
    pool: str = option("global", "pooling of masked features: global (Sec. 3.4) or mask")
    attention: str = option(
        "maskclip", "attention variant of CLIP's last block: maskclip (Sec. 3.1), sclip, "
        "clearclip, naclip")
    query_learnable: bool = option(False, "the Query's prompt learns too (Table 3)")
    subtract: bool = option(True, "subtract the bias; else add it (Table 5)")

    # Distillation, Sec. 3.5
    student: str = option(
        "resnet101", "backbone of DeepLab V2: resnet101 (ours), resnet50, resnet50_v1c (released), "
        "tiny (shapes)")
    head: str = option(
        "query_reference", "Table 6: original, query, query_reference, query_reference_positional")
    backbone_weights: str = option(
        "imagenet", "start of the backbone: imagenet (ours), a file, or none")
    distill_epochs: int = option(100, "epochs of distillation (released)")
    distill_batch: int = option(16, "images a step (released)")
    distill_lr: float = option(0.01, "learning rate of SGD (Sec. 4.1), poly over all epochs")
    distill_lr_floor: float = option(1e-4, "the learning rate never falls below (released)")
    mask_tau: float = option(
        None, "temperature of Eq. (6); if not given, that of Eq. (5); 1 for head original (ours)")
    alpha: float = option(0.5, "weight of the feature-guided loss, Eq. (8); 0: none (Sec. 3.5)")
    beta: float = option(0.5, "weight of the text-guided loss, Eq. (8); 0: none (Sec. 3.5)")

    # Images, Sec. 4.1. In training an image is resized, smaller or larger, to the largest size
    # within r times the two sides, with r drawn from resize_from .. resize_to; then it is cropped.
    # Evaluation resizes it likewise, with r = 1. The sides are RECIPE_SIZES'.
    rectify_long_side: int = option(2048, "rectification: longer side at r = 1, pixels (released)")
    rectify_short_side: int = option(336, "rectification: shorter side at r = 1, pixels (released)")
    crop: int = option(
        336, "rectification: side of the crop, pixels (released); 0: whole images, all of one size "
        "(ours)")
    distill_long_side: int = option(2048, "distillation: longer side at r = 1, pixels (released)")
    distill_short_side: int = option(512, "distillation: shorter side at r = 1, pixels (released)")
    distill_crop: int = option(
        512, "distillation: side of the crop, pixels (released); 0: whole images, all of one size "
        "(ours)")
    resize_from: float = option(0.5, "least r (released)")
    resize_to: float = option(2.0, "largest r (released)")
    flip: bool = option(True, "random horizontal flip (Sec. 4.1)")
    photometric: bool = option(True, "random brightness, contrast, saturation, hue (released)")

    # Evaluation of the rectified CLIP; a student is evaluated without (released)
    denoise: float = option(
        0.5, "in the table of --stage all, a class that reaches this probability nowhere in an "
        "image is dropped (released); 0: off")

    def __post_init__(self):
        above_0 = (
            "rectify_epochs", "rectify_poly_epochs", "rectify_batch", "lr", "top_k", "tau_1", "tau",
            "distill_epochs", "distill_batch", "distill_lr", "mask_tau", "rectify_long_side",
            "rectify_short_side", "distill_long_side", "distill_short_side", "resize_from",
        )
        at_least_0 = (
            "momentum", "weight_decay", "poly_power", "prompt_length", "positional_gain",
            "distill_lr_floor", "alpha", "beta", "crop", "distill_crop", "label_window",
        )

        # "not value > 0" rather than "value <= 0": so nan is refused too.
        for name in above_0:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name in at_least_0:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        if not 0 <= self.denoise <= 1:
            raise ValueError(f"denoise is {self.denoise}; a probability, it must lie in 0..1")
        if self.rectify_epochs > self.rectify_poly_epochs:
            raise ValueError(f"rectify_epochs is {self.rectify_epochs}; it must not be above "
                             f"rectify_poly_epochs, {self.rectify_poly_epochs}, from which on the "
                             "learning rate is 0")
        if not self.resize_from <= self.resize_to:
            raise ValueError(f"resize_from is {self.resize_from}; it must not be above resize_to, "
                             f"{self.resize_to}")


class RecipeSizes(NamedTuple):
    """A row of RECIPE_SIZES: what the authors' two recipes set for each data set.

    Denoising and distillation, which both set alike, stand here too: a data set's numbers in one
    place.
    """
    # Rectification, and the evaluation of the rectified CLIP at the same sides
    rectify_long_side: int
    rectify_short_side: int
    crop: int
    rectify_epochs: int
    rectify_poly_epochs: int
    denoise: float
    # Distillation, and the evaluation of the student at the same sides, without denoising
    distill_long_side: int
    distill_short_side: int
    distill_crop: int
    distill_epochs: int


# The authors' two recipes as far as they depend on the data set (reclip.RECIPES has the rest, and
# says where they come from). In 2025 the epochs are numbered from 0 and the run stops after number
# 50 (ADE20K: 100) of a schedule laid out for more.
RECIPE_SIZES = {
    #                            rectification                            distillation
    #                            long  short crop  epochs poly  denoise   long  short crop  epochs
    ("cvpr2024", "voc"):
        RecipeSizes(             2048, 512,  512,  200,   200,  0.5,      2048, 512,  512,  100),
    ("cvpr2024", "context"):
        RecipeSizes(             520,  520,  480,  150,   150,  0.6,      520,  520,  480,  150),
    ("cvpr2024", "ade20k"):
        RecipeSizes(             2048, 512,  512,  150,   150,  0.5,      2048, 512,  512,  150),
    ("2025", "voc"):
        RecipeSizes(             2048, 336,  336,  51,    200,  0.5,      2048, 512,  512,  100),
    ("2025", "context"):
        RecipeSizes(             2048, 448,  480,  51,    400,  0.6,      520,  520,  480,  150),
    ("2025", "ade20k"):
        RecipeSizes(             2048, 512,  512,  101,   600,  0.5,      2048, 512,  512,  150),
}
DEFAULT_RECIPE = "cvpr2024"  # of the three benchmarks: the one that the paper's numbers belong to

BENCHMARKS = ("voc", "context", "ade20k")  # those with published recipes

# What does not depend on the recipe; of a benchmark, find_settings adds the row of RECIPE_SIZES.
SETTINGS = {
    "voc": Settings(),
    "context": Settings(threshold=20.0, top_k=6),
    "ade20k": Settings(threshold=21.0, top_k=5),
    # Images of your own: VOC's, whose threshold and top_k suit names of single, different things.
    # CLIP runs as it was trained. Denoising is tuned to VOC, so it is off (ours).
    "own": Settings(denoise=0.0),
    # All ours, chosen on shapes' val split. The cosines of its tiny CLIP differ by 0.2 where those
    # of OpenAI's differ by 0.02: hence its higher temperatures and threshold. Each class has its
    # own prompt: a shared one gained 5.0 on val where this gained 8.4 (three CLIPs, three seeds),
    # as a text encoder of two layers makes much the same of it before every name.
    "shapes": Settings(
        rectify_epochs=20,
        rectify_poly_epochs=20,
        rectify_batch=32,
        lr=2.0,
        threshold=45.0,
        top_k=1,
        prompt_length=4,
        prompt_per_class=True,
        positional_gain=0.05,
        tau_1=0.02,
        tau=0.033,
        student="tiny",
        backbone_weights="none",
        distill_epochs=13,
        distill_batch=8,
        distill_lr=0.1,
        rectify_short_side=64,
        crop=0,
        distill_short_side=64,
        distill_crop=0,
        flip=False,
        photometric=False,
        denoise=0.0,
    ),
}


# What ReCLIP++ changes in the recipe 2025; released, but for "own" and "shapes". label_window is a
# sixth of the crop; denoise is a threshold of softmax(10 M'), where ReCLIP has softmax(100 M).
PLUSPLUS = {
    "voc": {"tau_1": 0.01, "label_window": 56, "denoise": 1.0},
    "context": {"tau_1": 0.01, "label_window": 80, "denoise": 0.85},
    "ade20k": {"tau_1": 0.01, "label_window": 85, "denoise": 0.5},
    "own": {"tau_1": 0.01, "label_window": 56},
    # Ours, chosen on val, over three CLIPs: without windows, the released learning rate. An image
    # of 64 pixels holds few, large things, and windows of 40 name classes that are not there
    # (precision 0.73 against 0.87): 55 mIoU in place of 60.
    "shapes": {"tau_1": 0.01, "label_window": 0, "lr": 0.01},
}


def find_settings(data, recipe=None, method="reclip", **changes):
    """The Settings of a data set (a key of SETTINGS, or your own folder), with some changed.

    In this order: SETTINGS, the recipe's row of RECIPE_SIZES, for the sequel PLUSPLUS, `changes`.
    recipe: "cvpr2024" or "2025" on the benchmarks; None: cvpr2024, of reclip++ 2025. Elsewhere it
        must be None: CLIP runs as it was trained, which .recipe calls "2025".
    method: "reclip", or "reclip++", which has the recipe 2025 alone.
    Errors: ValueError for a recipe or method that is not there.
    """
    if method not in ("reclip", "reclip++"):
        raise ValueError(f"method is {method!r}; it must be reclip or reclip++")
    if method == "reclip++" and recipe == "cvpr2024":
        raise ValueError("reclip++ has the recipe 2025 alone, not cvpr2024")

    settings = SETTINGS.get(data, SETTINGS["own"])
    if data in BENCHMARKS:
        recipe = recipe or ("2025" if method == "reclip++" else DEFAULT_RECIPE)
        if (recipe, data) not in RECIPE_SIZES:
            raise ValueError(f"recipe is {recipe!r}; it must be cvpr2024 or 2025")
        sizes = RECIPE_SIZES[recipe, data]._asdict()
        settings = dataclasses.replace(settings, recipe=recipe, **sizes)
    elif recipe is not None:
        raise ValueError(f"a recipe goes with voc, context and ade20k alone, not with {data}: "
                         "other images are read by CLIP as it was trained")

    if method == "reclip++":
        sequel = PLUSPLUS.get(data, PLUSPLUS["own"])
        settings = dataclasses.replace(settings, method=method, **sequel)
    return dataclasses.replace(settings, **changes)


# --- Splits on disk: where the files lie ----------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie, as everybody has it, and what its annotations mean.

    A labelled data set of your own needs three entries: one here, one in DATA, one in SETTINGS.
    """
    base: str               # below root: the folder that holds it all
    images: str             # below base: the images; {} stands for the folder of the split
    annotations: str        # below base: the label files, likewise
    lists: str              # below base: <split>.txt with the names; "": all images, sorted by name
    image_suffix: str       # name + this = file of the image
    annotation_suffix: str  # name + this = label file
    label_values: tuple     # the value that each class has in the label files, in class order;
                            # any ids: 0, 1, 2, ...; 1, 2, 3, ...; Cityscapes' 7, 8, 11, ...
    official: dict          # number of images of each split, in words
    archive: str = ""       # address of the archive; "": not to be had without a login
    md5: str = ""           # of the archive
    ignored_values: tuple = (0, 255)  # not evaluated, unless a class has them; any other: error
    split_folders: dict = dataclasses.field(default_factory=dict)  # what {} becomes, by split
    antialias: bool = False   # when an image is made smaller (see resize_within); False: released


LAYOUTS = {
    "voc": Layout(
        base="VOCdevkit/VOC2012",
        images="JPEGImages",
        annotations="SegmentationClass",
        lists="ImageSets/Segmentation",
        image_suffix=".jpg",
        annotation_suffix=".png",
        label_values=tuple(range(1, 21)),  # 0: background, 255: void
        official={"train": "1464", "val": "1449"},
        archive="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        md5="6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "context": Layout(
        base="VOCdevkit/VOC2010",
        images="JPEGImages",
        annotations="SegmentationClassContext",
        lists="ImageSets/SegmentationContext",
        image_suffix=".jpg",
        annotation_suffix=".png",
        label_values=tuple(range(1, 60)),  # 0: none of the 59
        official={"train": "4996, in the paper 4998", "val": "5104, in the paper 5105"},
        archive="http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
        md5="da459979d0c395079b5c75ee67908abb",
    ),
    "ade20k": Layout(
        base="ADEChallengeData2016",
        images="images/{}",
        annotations="annotations/{}",
        lists="",
        image_suffix=".jpg",
        annotation_suffix=".png",
        label_values=tuple(range(1, 151)),  # 0: other
        official={"train": "20210", "val": "2000"},
        archive="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        md5="7328b3957e407ddae1d3cbf487f149ef",
        split_folders={"train": "training", "val": "validation"},
    ),
}


def open_split(data, root, split, download=False):
    """Opens a split: an object with .names, .image(i), .truth(i), .antialias and a length.

    Args:
        data: a key of DATA, or the path of a folder with your own images.
        root: the folder that holds VOCdevkit or ADEChallengeData2016; shapes and folders need none.
        split: "train" or "val" (shapes: also "test"); a folder has no splits.
        download: fetch the data set first if it is missing.
    """
    if data == "shapes":
        return Shapes(split)
    if data not in LAYOUTS:
        return Folder(data)

    layout = LAYOUTS[data]
    base = Path(root) / layout.base
    split_folder = layout.split_folders.get(split, split)
    images = base / layout.images.format(split_folder)
    annotations = base / layout.annotations.format(split_folder)

    # What says which images belong to the split: a list of names, else the folder itself.
    source = images
    if layout.lists:
        source = base / layout.lists / f"{split}.txt"
    if download and not source.exists():
        prepare(data, root, download)

    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: {misplaced(data, root)}")
    if layout.lists:
        names = source.read_text().split()
    else:
        # At every depth: Cityscapes has a folder for each city. Sorted: a file system lists a
        # folder in any order it likes, and not twice in the same one.
        names = []
        for path in sorted(images.rglob(f"*{layout.image_suffix}")):
            below = path.relative_to(images).as_posix()  # "aachen/aachen_0_leftImg8bit.png"
            names.append(below.removesuffix(layout.image_suffix))
    if not names:
        raise ValueError(f"{source} is empty: {misplaced(data, root)}")

    files = Files(
        [images / f"{name}{layout.image_suffix}" for name in names],
        [annotations / f"{name}{layout.annotation_suffix}" for name in names],
        layout.label_values,
        layout.ignored_values,
        layout.antialias,
    )
    files.names = names  # with the folder: two folders may hold files of one name
    return files


# --- Splits on disk: reading the files ------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of your own images, in upper or lower case

# What a file may hold, whatever its name says. For some other formats Pillow starts programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def read_image(path, draft=False):
    """Reads any image as uint8 (H, W, 3).

    It is turned upright as its EXIF data say; what is transparent becomes white; 16 bits are scaled
    to 8 (Pillow's own conversion would clip them). FileNotFoundError, or ValueError: not readable.

    Args:
        draft: only find out whether the file is readable. A JPEG is then decoded to its end, but at
            an eighth of its size, which is much faster.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if draft:
                image.draft(None, (1, 1))  # as small as its format allows; only JPEG knows this

            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                scaled = np.asarray(image).clip(0, 65535) / 257  # 65535 -> 255
                image = Image.fromarray(scaled.round().astype(np.uint8))
            elif "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))

            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist, though the list of the split or its folder named it"
        ) from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


class Files:
    """A split as files on disk.

    Args:
        image_paths: the images.
        annotation_paths: their label files. For training they need not exist.
        label_values: the value of each class in the label files, 0 to 65535, in class order.
        ignored_values: values of pixels that are not evaluated, except where a class has the value
            (so a data set whose labels start at 0 need not change the default).
        antialias: how its images are made smaller (see resize_within).

    Attributes:
        names: the images' file names without suffix.
        keep: set it to True, and images that were decoded once stay in memory.
    """

    def __init__(
        self,
        image_paths,
        annotation_paths,
        label_values,
        ignored_values=(0, 255),
        antialias=True,
    ):
        self.image_paths = image_paths
        self.annotation_paths = annotation_paths
        self.label_values = tuple(label_values)
        self.antialias = antialias
        self.names = [path.stem for path in image_paths]
        self.keep = False
        self._decoded = {}  # index -> image

        if len(self.label_values) > 254:
            raise ValueError(
                f"there are {len(self.label_values)} label values, one a class: 254 at most "
                "(truth is bytes, 255 = ignored)"
            )

        # Value in a label file -> class index, IGNORE, or -1: the value must not occur. For VOC:
        #     value      0    1   2  ...  20   21  ...  254   255
        #     class    255    0   1  ...  19   -1  ...   -1   255
        self._class_of = np.full(2 ** 16, -1, np.int16)
        self._class_of[list(ignored_values)] = IGNORE
        self._class_of[list(self.label_values)] = np.arange(len(self.label_values))

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """uint8 (3, H, W)"""
        image = self._decoded.get(i)
        if image is None:
            image = torch.from_numpy(read_image(self.image_paths[i])).permute(2, 0, 1)
        if self.keep:
            self._decoded[i] = image
        return image

    def truth(self, i):
        """uint8 (H, W): class index or IGNORE. FileNotFoundError, ValueError: what is wrong."""
        path = self.annotation_paths[i]
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: evaluation needs the annotations (training does not)"
            )
        try:
            with Image.open(path, formats=FORMATS) as file:
                mode = file.mode
                values = np.array(file)  # (H, W); of a palette image the index, not the color
        except Exception as error:
            raise ValueError(f"{path} is not a readable annotation: {error}") from error

        if mode not in ("P", "L", "I;16"):
            raise ValueError(
                f"{path} has mode {mode}, not P, L or I;16: an RGB copy of an annotation has lost "
                "the class numbers"
            )

        classes = self._class_of[values]  # (H, W)
        if (classes < 0).any():
            raise ValueError(
                f"{path} holds the value {values[classes < 0].max()}, which stands for none of the "
                f"{len(self.label_values)} classes: looks like the 60-class or 459-class labels of "
                "Context, the full ADE20K, or another data set"
            )
        return torch.from_numpy(classes.astype(np.uint8))


class Folder(Files):
    """Your own images, without truth: files, and folders that are searched at every depth.

    Every image is read once, so that a broken one does not stop a long run later: the unreadable
    ones are left out, reported on stderr and named in .skipped. FileNotFoundError: a path does not
    exist. ValueError: no readable image.

    Attributes:
        names: paths below the folder (of a file: its name); if two are alike, all are absolute.
        skipped: names of the images that could not be read.
    """

    def __init__(self, *paths):
        names = {}  # path -> name
        for path in paths:
            path = Path(path)
            if path.is_dir():
                for file in sorted(path.rglob("*")):
                    if file.suffix.lower() in SUFFIXES and file.is_file():
                        names[file.absolute()] = file.relative_to(path).as_posix()
            elif path.exists():
                names[path.absolute()] = path.name
            else:
                raise FileNotFoundError(
                    f"{path} is neither an image nor a folder of images"
                )

        # Two folders may both hold a cat.jpg; masks and labels are kept by name: names must differ.
        if len(set(names.values())) < len(names):
            names = {path: path.as_posix() for path in names}

        readable = {}  # path -> name
        reports = []
        self.skipped = []
        for path, name in names.items():
            try:
                read_image(path, draft=True)
                readable[path] = name
            except ValueError as error:
                reports.append(f"skipped {name}: {error.__cause__}")
                self.skipped.append(name)

        if len(reports) > 10:
            reports[10:] = [f"and {len(reports) - 10} more"]
        for report in reports:
            print(report, file=sys.stderr)
        if not readable:
            raise ValueError(
                f"{', '.join(map(str, paths))} holds no readable image ({', '.join(SUFFIXES)})"
            )

        super().__init__(list(readable), annotation_paths=None, label_values=())
        self.names = list(readable.values())

    def truth(self, i):
        raise ValueError(f"{self.names[i]} has no labels")


# --- What training and evaluation read ------------------------------------------------------------

def size_within(height, width, long_side, short_side):
    """The largest size (H', W'), ratio kept, within long_side by short_side pixels; rounded."""
    factor = min(long_side / max(height, width), short_side / min(height, width))
    return [max(1, int(side * factor + 0.5)) for side in (height, width)]


def resize_within(image, long_side, short_side, antialias=True):
    """uint8 (3, H, W) -> (3, H', W'), smaller or larger, to size_within; short_side 0: it stays.

    antialias: where an image is made smaller, True averages all old pixels under a new one; False
        interpolates between the nearest four and skips the rest (as the released code does, through
        OpenCV: fine structure comes out rougher).
    """
    if short_side == 0:
        return image
    size = size_within(*image.shape[1:], long_side, short_side)
    return v2.functional.resize(image, size, antialias=antialias)


def distort_colors(image):
    """Random changes of color, so that nothing learnt hangs on the light of a photograph.

    As released, except saturation: torchvision blends with gray, the released code scales S of HSV.

    float (3, H, W) in [0, 1] -> the same. Each of the four happens half of the time: brightness, up
    to 32 of 255 levels added or taken off; contrast, all values times 0.5 to 1.5; saturation times
    0.5 to 1.5; hue, turned by up to 18 of 180 steps. Contrast comes before or after the last two.
    """
    brightness, contrast, saturation, hue, contrast_first = (torch.rand(5) < 0.5).tolist()
    levels = torch.empty(()).uniform_(-32, 32).item()
    contrast_factor = torch.empty(()).uniform_(0.5, 1.5).item()
    saturation_factor = torch.empty(()).uniform_(0.5, 1.5).item()
    turn = torch.empty(()).uniform_(-18, 18).item() / 180  # 1: once round the circle of hues

    if brightness:
        image = (image + levels / 255).clamp(0, 1)
    if contrast and contrast_first:
        image = (image * contrast_factor).clamp(0, 1)
    if saturation:
        image = v2.functional.adjust_saturation(image, saturation_factor)
    if hue:
        image = v2.functional.adjust_hue(image, turn)
    if contrast and not contrast_first:
        image = (image * contrast_factor).clamp(0, 1)
    return image


class Augment:
    """The training transform: uint8 (3, H, W) -> (image, valid).

    image: float (3, crop, crop) in [0, 1].
    valid: bool (crop, crop), False on the padding, which is on the right and below where the image
        is smaller than the crop. A network sets it to 0 after its own normalization, so that
        padding has the mean color, whatever that is for it.

    "Random cropping and random flipping" (Sec. 4.1), with the released sizes and, as released,
    photometric distortion. The released code draws a crop again in which one class covers more than
    75 %: that looks at the truth, so it is not done here.

    Args:
        long_side, short_side: pixels; before the crop the image is resized, smaller or larger but
            its ratio kept, to the largest size within r * long_side by r * short_side.
        crop: side of the random square, pixels; 0: neither resize nor crop, the image stays whole.
        ratio: r is drawn uniformly between these two (default: released).
        flip: mirror left to right, half of the time.
        photometric: distort_colors.
        antialias: as in resize_within.

    Attributes:
        changes: whether the same image may look different each time it comes. If not, whatever is
            computed from it alone (CLIP's features) need be computed only once.
    """

    def __init__(
        self,
        long_side,
        short_side,
        crop,
        ratio=(0.5, 2.0),
        flip=True,
        photometric=True,
        antialias=True,
    ):
        self.long_side = long_side
        self.short_side = short_side
        self.crop = crop
        self.ratio = ratio
        self.flip = flip
        self.photometric = photometric
        self.antialias = antialias
        self.changes = bool(crop or flip or photometric)

    def __call__(self, image):
        if self.crop:
            # Objects are seen at many sizes: r < 1 shows more of the scene, r > 1 shows details.
            r = torch.empty(()).uniform_(*self.ratio).item()
            image = resize_within(
                image, r * self.long_side, r * self.short_side, self.antialias
            )

            # Any place where the crop fits; where the image is smaller, all of it.
            H, W = image.shape[1:]
            top = torch.randint(max(H - self.crop, 0) + 1, ()).item()
            left = torch.randint(max(W - self.crop, 0) + 1, ()).item()
            image = image[:, top:top + self.crop, left:left + self.crop]

        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)

        image = v2.functional.to_dtype(image, torch.float32, scale=True)  # 0..255 -> 0..1
        if self.photometric:
            image = distort_colors(image)

        valid = torch.ones(image.shape[1:], dtype=torch.bool)
        if self.crop:
            below = self.crop - image.shape[1]
            right = self.crop - image.shape[2]
            image = F.pad(image, (0, right, 0, below))
            valid = F.pad(valid, (0, right, 0, below))
        return image, valid


class TrainingStream(Dataset):
    """An endless stream over a split. No label is opened.

    Item s is (image float (3, H, W) in [0, 1], valid bool (H, W), name): see Augment.

    Item s belongs to epoch s // N (N images in the split), and everything random about it follows
    from (seed, s) alone: the order of an epoch from (seed, epoch), crop, flip and colors from
    (seed, s). There is no random state that a run would have to save, so it can go on at any s,
    with any number of workers, exactly as if it had never stopped. For the DataLoader,
    `sampler=range(first, last)` is enough.
    """

    def __init__(self, split, transform, seed):
        self.split = split
        self.transform = transform
        self.seed = seed
        self._epoch = None  # the epoch that ._order belongs to
        self._order = None  # (N,) indices of the images

    def __len__(self):
        return len(self.split)  # of one epoch; s may go on as far as it likes

    def __getitem__(self, s):
        epoch, place = divmod(s, len(self.split))

        # A new order for each epoch, computed once and kept while the items stay in that epoch.
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.split), generator=generator)
            self._epoch = epoch
        i = int(self._order[place])

        # The transform draws from torch's global generator: it is seeded for this item, and set
        # back afterwards, so that the caller's own random numbers do not notice. Neighboring seeds
        # are 1,000,003 apart: a longer run (ADE20K's) reuses draws of the next one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + s)
            image, valid = self.transform(self.split.image(i))
        return image, valid, self.split.names[i]


class Thumbnails(Dataset):
    """Each image once, by CLIP's own preprocessing: short side resized, then a center crop.

    Item i is (float (3, resolution, resolution) in [0, 1], name).
    """

    def __init__(self, split, resolution):
        self.split = split
        self.resolution = resolution

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        image = self.split.image(i)

        # A strip of 1 x 30000 pixels would become gigantic when its short side is resized. Of its
        # long side only the center survives the crop anyway, so it is cut to 4 : 1 first.
        H, W = image.shape[1:]
        longest = 4 * min(H, W)
        image = v2.functional.center_crop(image, [min(H, longest), min(W, longest)])

        # Bicubic, as CLIP's own preprocessing.
        bicubic = InterpolationMode.BICUBIC
        image = v2.functional.resize(image, [self.resolution], bicubic, antialias=True)
        image = v2.functional.center_crop(image, [self.resolution, self.resolution])
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        return image, self.split.names[i]


def window_corners(height, width, side):
    """Upper left corners (y, x) of ReCLIP++'s windows: every half side, as released."""
    stride = max(1, side // 2)
    corners = []
    for y in range(0, height - side, stride):
        for x in range(0, width - side, stride):
            corners.append((y, x))
    return corners


class Windows(Dataset):
    """Each image once, cut into windows for ReCLIP++'s image-level labels.

    Item i is (float (n, 3, resolution, resolution) in [0, 1], name): n windows of side x side
    pixels, each enlarged to what CLIP's image encoder wants. An image that is too small for any is
    one window as a whole (the released code finds no class in it).

    long_side, short_side: the image is resized within these before; 0: it keeps its size.
    """

    def __init__(self, split, side, resolution, long_side=0, short_side=0):
        self.split = split
        self.side = side
        self.resolution = resolution
        self.long_side = long_side
        self.short_side = short_side

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        image = resize_within(self.split.image(i), self.long_side, self.short_side)
        side = self.side
        corners = window_corners(*image.shape[1:], side)
        windows = [image[:, y:y + side, x:x + side] for y, x in corners] or [image]

        bicubic = InterpolationMode.BICUBIC
        size = [self.resolution, self.resolution]
        windows = [v2.functional.resize(w, size, bicubic, antialias=True) for w in windows]
        windows = v2.functional.to_dtype(torch.stack(windows), torch.float32, scale=True)
        return windows, self.split.names[i]


class Evaluation(Dataset):
    """Images with their truth: item i is (image, truth, name).

    image: float (3, H', W') in [0, 1], resized as resize_within does; short_side 0: its own size.
    truth: uint8 (H, W), at the size of the file, because a number is reported at that size.
    """

    def __init__(self, split, long_side, short_side):
        self.split = split
        self.long_side = long_side
        self.short_side = short_side

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        image = self.split.image(i)
        truth = self.split.truth(i)
        name = self.split.names[i]
        if truth.shape != image.shape[1:]:
            raise ValueError(
                f"{name}: the annotation is {tuple(truth.shape)}, the image "
                f"{tuple(image.shape[1:])} pixels"
            )

        image = resize_within(image, self.long_side, self.short_side, self.split.antialias)
        return v2.functional.to_dtype(image, torch.float32, scale=True), truth, name


class Progress:
    """Shows on stderr how far a loop is: in place on a terminal, a line now and then in a log.

        progress = Progress("eval", total=1449)
        progress(12)                            # eval  12/1449  8.3 images/s  0:02:53 left

    Args:
        name: what is being done.
        total: number of steps.
        first: the step that a resumed run goes on from; the rate counts from there.
        per_step: images a step.
    """

    def __init__(self, name, total, first=0, per_step=1):
        self.name = name
        self.total = total
        self.first = first
        self.per_step = per_step
        self.terminal = sys.stderr.isatty()
        self.began = time.perf_counter()
        self.shown = 0.0  # when the line was last written

    def __call__(self, step, extra=""):
        """step: number of steps done. extra: more to show, with a space at its end."""
        now = time.perf_counter()
        interval = 0.2 if self.terminal else 15  # seconds
        if step < self.total and now - self.shown < interval:
            return
        self.shown = now

        rate = (step - self.first) / max(now - self.began, 1e-9)  # steps a second
        left = 0
        if rate:
            left = int((self.total - step) / rate)  # seconds
        line = (
            f"{self.name}  {step}/{self.total}  {extra}{rate * self.per_step:.1f} images/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )

        if self.terminal:
            line = "\r\x1b[K" + line  # back to the beginning of the line, which is cleared
        end = "\n" if step >= self.total or not self.terminal else ""
        print(line, end=end, file=sys.stderr, flush=True)


# --- shapes: a miniature world, drawn from seeds, nothing stored ----------------------------------

# The biases of its tiny CLIP are planted. It is pre-trained on the *web* (extras/pretrain.py):
# captioned scenes, in which a class stands anywhere, and close-ups, in which each class keeps to
# its own half of the image and mostly to its own color; and captions sometimes name a color by the
# class that has it, "a box the color of a coin". The *target*, to be segmented, is drawn
# here and breaks these habits: the same classes stand anywhere, and a thing shows its own hue in
# only 62.5 % of cases, its twin's in 22.5 %, any other in 15 %. Every pixel has its truth, for
# evaluation alone. So what the patches learnt on the web is a bias on the target, of the kind that
# the paper rectifies.

# Split -> number of images, seed
SHAPES_SPLITS = {"train": (1000, 101), "val": (300, 102), "test": (500, 103)}

# Grounds: color as (hue, saturation, value), and how many waves of the texture go across and down
# an image of 64 pixels.
GROUNDS = {
    "wood": (0.08, 0.55, 0.45, 1, 9),
    "stone": (0.6, 0.05, 0.5, 5, 5),
    "sand": (0.12, 0.3, 0.75, 13, 13),
    "water": (0.57, 0.5, 0.55, 3, 12),
    "grass": (0.33, 0.55, 0.4, 16, 3),
    "leaves": (0.38, 0.6, 0.28, 7, 7),
    "cloth": (0.0, 0.4, 0.45, 9, 9),
    "snow": (0.6, 0.07, 0.85, 2, 4),
}

# Each class's own hue, in the order of SHAPES_CLASSES: a coin is yellow, a ring orange, and so on.
HUES = {
    "yellow": 0.14,   # coin
    "orange": 0.07,   # ring
    "blue": 0.62,     # box
    "cyan": 0.5,      # gem
    "pink": 0.9,      # star
    "red": 0.99,      # flower
    "lime": 0.25,     # bee
    "green": 0.36,    # beetle
}

# Texture of a class (a, b, t): dark where sin(a u + 0.5) sin(b v + 0.5) > t, with u and v the
# thing's own coordinates (see depth). The larger a and b, the finer the pattern; the larger t, the
# less is dark. 0: no wave in that direction, so stripes.
# The flower is not here: it has no waves but a dark disk in the middle.
TEXTURES = {
    "coin": (9, 9, 0.25),      # spots
    "ring": (14, 0, 0.0),      # fine stripes
    "box": (6, 6, 0.0),        # checks
    "gem": (12, 0, 0.1),       # stripes
    "star": (5, 5, 0.4),       # few, coarse spots
    "bee": (9, 0, 0.0),        # broad stripes
    "beetle": (10, 10, 0.3),   # spots; is_dark adds a rim and a line
}


class Thing(NamedTuple):
    """An object to be drawn."""
    name: str     # of its class
    x: float      # center, pixels from the left
    y: float      # center, pixels from the top
    r: float      # radius, pixels
    hue: float    # 0..1, round the color wheel
    angle: float  # radians


def new_thing(name, x, y, r, rng, own_color=0.5):
    """Returns a Thing of that class, place and size, with a random hue and a small random turn.

    Args:
        own_color: one thing in five gets any of the eight hues. Of the others, this share get
            their class's own hue, and the rest their own or their twin's, at even odds.
    """
    hues = list(HUES.values())
    k = SHAPES_CLASSES.index(name)
    first_twin = k // 2 * 2  # twins are 0 and 1, 2 and 3, ...
    twin_hues = hues[first_twin:first_twin + 2]

    if rng.random() < 0.2:
        hue = rng.choice(hues)
    elif rng.random() < own_color:
        hue = hues[k]
    else:
        hue = rng.choice(twin_hues)

    hue = hue + rng.normal(0, 0.015)
    angle = rng.uniform(-0.5, 0.5)
    return Thing(name, x, y, r, hue, angle)


def depth(name, u, v):
    """How deep points lie within the outline of a class: (H, W), above 0 inside, below 0 outside.

    u, v: (H, W), the object's own coordinates: right and down, about -1 to 1 over the object.
    """
    rho = np.hypot(u, v)    # distance from the center
    phi = np.arctan2(v, u)  # direction from the center

    if name == "coin":  # a disk
        return 1 - rho
    if name == "ring":  # a disk with a hole of radius 0.45
        return np.minimum(1 - rho, rho - 0.45)
    if name == "box":  # a square of half side 0.85
        return 0.85 - np.maximum(abs(u), abs(v))
    if name == "gem":  # a square on its tip; 0.75 makes its edges about as sharp as the others'
        return 0.75 * (1.05 - abs(u) - abs(v))
    if name == "star":  # five tips: the radius swings five times between 0.24 and 1
        return 0.62 + 0.38 * np.cos(5 * phi) - rho
    if name == "flower":  # six petals: between 0.6 and 1
        return 0.8 + 0.2 * np.cos(6 * phi) - rho
    if name == "bee":  # an ellipse, 0.65 as high as wide
        return 1 - np.hypot(u, v / 0.65)
    if name == "beetle":  # a rounder ellipse
        return 1 - np.hypot(u, v / 0.75)
    raise ValueError(f"{name} is none of {', '.join(SHAPES_CLASSES)}")


def is_dark(name, u, v):
    """bool (H, W): where the texture of a class is dark. u, v as for depth."""
    if name == "flower":  # a disk in the middle
        return np.hypot(u, v) < 0.35

    # sin(0 * u + 1.57) = 1: no wave in that direction.
    a, b, t = TEXTURES[name]
    phase_u = 0.5 if a else 1.57
    phase_v = 0.5 if b else 1.57
    waves = np.sin(a * u + phase_u) * np.sin(b * v + phase_v) > t

    if name == "beetle":  # also a rim, and a line along its back
        return waves | (depth(name, u, v) < 0.2) | (abs(v) < 0.08)
    return waves


def draw(thing, xs, ys):
    """Draws a thing on pixels with the coordinates xs, ys (H, W).

    Returns its coverage (H, W), 1 inside and 0 outside with an edge one pixel wide, and its colors
    (3, H, W) in [0, 1].
    """
    # Move the thing's center to the origin, turn it upright, and divide by its radius.
    cos = math.cos(thing.angle) / thing.r
    sin = math.sin(thing.angle) / thing.r
    u = cos * (xs - thing.x) + sin * (ys - thing.y)  # (H, W)
    v = cos * (ys - thing.y) - sin * (xs - thing.x)  # (H, W)

    coverage = np.clip(depth(thing.name, u, v) * thing.r + 0.5, 0, 1)
    color = np.array(colorsys.hsv_to_rgb(thing.hue % 1, 0.75, 0.9))[:, None, None]  # (3, 1, 1)
    colors = color * np.where(is_dark(thing.name, u, v), 0.4, 1.0)  # (3, H, W)
    return coverage, colors


def paint(size, ground, things, rng):
    """Paints a ground and things on it; later things cover earlier ones.

    Returns the image, uint8 (3, size, size), and its truth, uint8 (size, size), as numpy arrays.
    """
    ys, xs = np.mgrid[:size, :size].astype(np.float32)

    # The ground: one color, 20 % lighter and darker in waves that begin anywhere.
    hue, saturation, value, a, b = GROUNDS[ground]
    p, q = rng.uniform(0, 6.28, 2)
    wave = np.sin(a * xs * (2 * math.pi / 64) + p) * np.sin(b * ys * (2 * math.pi / 64) + q)
    color = np.array(colorsys.hsv_to_rgb(hue, saturation, value))[:, None, None]  # (3, 1, 1)
    image = color * (1 + 0.2 * wave)  # (3, size, size)
    truth = np.full((size, size), IGNORE, np.uint8)

    for thing in things:
        coverage, colors = draw(thing, xs, ys)
        image = image + coverage * (colors - image)
        truth[coverage > 0.5] = SHAPES_CLASSES.index(thing.name)

    # A camera: gain and offset of each color channel, and noise on each pixel.
    gain = rng.normal(1, 0.06, (3, 1, 1))
    offset = rng.normal(0, 0.03, (3, 1, 1))
    image = image * gain + offset + rng.normal(0, 0.03, image.shape)
    return np.clip(255 * image, 0, 255).round().astype(np.uint8), truth


@lru_cache(maxsize=2000)  # a training set is seen many times
def target_scene(seed, i):
    """Draws one to four different classes that fill much of the image: (image, truth) of paint."""
    rng = np.random.default_rng((seed, i))
    size = 64  # side of the image, pixels
    n = rng.integers(1, 5)

    # A single thing stands anywhere. Several get a quarter of the image each, and each is of
    # another class. The quarters meet up to 10 pixels beside the middle, on either axis: some
    # things stand in the middle of the image, and its border cuts off others.
    q = size / 4
    centers = rng.permutation([(q, q), (q, 3 * q), (3 * q, q), (3 * q, 3 * q)])
    meeting_point = rng.uniform(-10, 10, 2)
    classes = rng.permutation(SHAPES_CLASSES)

    # The more things, the smaller they are.
    least, most = {1: (18, 26), 2: (16, 21), 3: (14, 19), 4: (13, 18)}[n]  # radius, pixels

    things = []
    for name, center in zip(classes[:n], centers):
        if n > 1:
            x, y = center + meeting_point + rng.uniform(-4, 4, 2)
        else:
            x, y = rng.uniform(0.15, 0.85, 2) * size
        r = rng.uniform(least, most)
        things.append(new_thing(name, x, y, r, rng))

    ground = rng.choice(list(GROUNDS))
    return paint(size, ground, things, rng)


class Shapes:
    """A split of the target, used like Files; image i follows from the split's seed and i alone."""

    def __init__(self, split):
        if split not in SHAPES_SPLITS:
            raise ValueError(f"shapes has no split {split}, only {', '.join(SHAPES_SPLITS)}")
        count, self.seed = SHAPES_SPLITS[split]
        self.antialias = True
        self.names = [f"{split}_{i:04}" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """uint8 (3, 64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[0])

    def truth(self, i):
        """uint8 (64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[1])


# --- Preparation: python datasets.py --prepare ----------------------------------------------------

# From here on nothing is about the paper. A first reader may stop.

# Context's annotations are made of this file. Its own host, the second half of the address, is
# reported dead.
CONTEXT_JSON = (
    "https://web.archive.org/web/2025id_/"
    "https://codalabuser.blob.core.windows.net/public/trainval_merged.json"
)
CONTEXT_JSON_MD5 = "3c2d0c0656b7be9eb61928ffe885d8ce"

# The ids of its 59 categories, in the order of CONTEXT_CLASSES.
CONTEXT_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104,
    105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295,
    296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427,
    440, 445, 454, 458,
)


def misplaced(data, root):
    """Says in half a sentence why a data set is not found: what people get wrong, looked for."""
    root = Path(root)
    layout = LAYOUTS[data]
    top, _, year = layout.base.partition("/")  # "VOCdevkit", "VOC2012"; ADE20K has only the first
    train_images = layout.images.format(layout.split_folders.get("train", "train"))

    if (root / top / top).is_dir():
        return f"{root / top} holds a second {top}; move the inner one to {root}"

    if (root / train_images).is_dir() or (year and (root / year).is_dir()):
        return f"{root} is inside of {layout.base}; root must be the folder that holds {top}"

    for other in root.glob("VOCdevkit/VOC20*"):
        if year and other.name != year:
            return f"{other} is of another year than {year}"

    if data == "ade20k":
        for pattern in ("ADE20K_20*", "**/index_ade20k*", "**/*_seg.png"):
            for other in root.glob(pattern):
                return f"{other} is the full ADE20K, not {top}"

    return f"root must be the folder that holds {layout.base}; {fetched_by(data, root)}"


def fetched_by(data, root):
    """The end of a sentence about something that is missing."""
    if not LAYOUTS[data].archive:
        return f"{data} must be fetched by hand"
    return f"python datasets.py --prepare {data} --root {root} --download fetches it"


def fetch(url, md5, path):
    """Downloads a file to `path`, unless it is there already, and checks its md5.

    OSError: it cannot be fetched. ValueError: it has another md5. A file that was there is never
    touched, and one that is broken or half fetched never gets the name `path`.
    """
    advice = f"a copy with md5 {md5} can be put at {path}"
    if path.is_file():
        if not check_integrity(path, md5):
            raise ValueError(f"{path} does not have the md5 {md5}: move it away; {advice}")
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Beside its later place, on the same disk, so that the finished file need only be renamed.
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            download_url(url, work, path.name, md5)
            (Path(work) / path.name).rename(path)
    except RuntimeError as error:  # download_url's way of saying that the md5 is another
        raise ValueError(
            f"what {url} sent does not have the md5 {md5} (did the connection break off?): {advice}"
        ) from error
    except Exception as error:
        raise OSError(f"{url} could not be fetched ({error}): {advice}") from error


def unpack(archive, base, root):
    """Unpacks the folder `base` of an archive to root / base. ValueError: what is wrong with it."""
    # A tar may try to write outside its folder or to link there: Python's filter "data" refuses.
    # A zip has no filter and needs none: Python drops such paths from it.
    options = {}
    if archive.suffix == ".tar":
        options["filter"] = "data"

    try:
        # Into a temporary folder that is renamed at the end: an interrupted run leaves no half of a
        # data set that would be taken for the whole.
        with tempfile.TemporaryDirectory(dir=root) as work:
            shutil.unpack_archive(archive, work, **options)
            (root / base).parent.mkdir(exist_ok=True)
            (Path(work) / base).rename(root / base)
    except Exception as error:
        raise ValueError(f"{archive} could not be unpacked: {error}") from error


def decode_rle(counts, height, width):
    """COCO's compressed run lengths -> bool (height, width). ValueError: they are damaged.

    A mask is a list of runs down its columns: so many zeros, so many ones, and so on in turn. Each
    number takes one character or more, of code 48 + six bits: the lower five belong to the number,
    low ones first, and the sixth says that another character of the same number follows. The fifth
    bit of the last character is the sign. From the fourth number on, not the run itself is written
    but its difference to the run two before.

    Example: "123O0", 2 x 5 pixels, reads 1, 2, 3, -1, 0. Runs: 1, 2, 3, 2 - 1 = 1, 3 + 0 = 3.
    """
    runs = []
    number = 0  # what has been read of the present number
    shift = 0   # its bits so far

    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths hold {character!r}, or a number without an end")
        number |= (bits & 31) << shift
        shift += 5

        if not bits & 32:  # the last character of this number
            if bits & 16:  # negative: two's complement
                number -= 1 << shift
            if len(runs) > 2:
                number += runs[-2]
            runs.append(number)
            number = 0
            shift = 0

    if shift or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"run lengths are cut off, negative, or do not add up to {height} x {width} pixels"
        )
    is_one = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_one, runs).reshape(width, height).T  # column by column


def context_labels(base, content):
    """Makes Context's label files (0: none of the 59 classes; 1..59) and the lists of its splits.

    The lists are written last: while they are missing, the data set is not complete. After an
    interruption the next run goes on with the first label file that is missing.

    Args:
        base: the folder VOC2010.
        content: the content of trainval_merged.json.
    """
    layout = LAYOUTS["context"]

    # Label files with another order of classes circulate; the numbers would be wrong in silence.
    found = {category["category_id"]: category["name"] for category in content["categories"]}
    for k, name in zip(CONTEXT_IDS, CONTEXT_CLASSES):
        spelled = name.replace("airplane", "aeroplane").replace(" ", "")  # as the JSON does
        if found.get(k) != spelled:
            raise ValueError(
                f"category {k} is {found.get(k)}, not {spelled}: are VOC's 20 classes first here?"
            )

    annotations = {}  # image id -> its annotations, in the order of the file
    for annotation in content["annos_segmentation"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)

    folder = base / layout.annotations
    lists = base / layout.lists
    folder.mkdir(exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)

    splits = {"train": [], "val": []}  # -> names; the JSON's third phase, test, has no annotations
    progress = Progress("context annotations", len(content["images"]))
    for done, image in enumerate(content["images"], start=1):
        if image["phase"] in splits:
            path = folder / (Path(image["file_name"]).stem + layout.annotation_suffix)
            splits[image["phase"]].append(path.stem)
            if not path.exists():
                write_context_label(path, image, annotations.get(image["image_id"], []))
        progress(done)

    for split, names in splits.items():
        (lists / f"{split}.txt").write_text("\n".join(sorted(names)) + "\n")


def write_context_label(path, image, annotations):
    """Writes one label file. `image`: its entry in the JSON; `annotations`: those of this image."""
    categories = np.zeros((image["height"], image["width"]), int)  # (H, W) of category ids
    for annotation in annotations:  # later ones cover earlier ones
        mask = decode_rle(annotation["segmentation"]["counts"], *categories.shape)
        categories[mask] = annotation["category_id"]

    # Category id -> its place in the sorted list of ids: 0 -> 0, 2 -> 1, 9 -> 2, ..., 458 -> 59.
    ids = np.array((0, *CONTEXT_IDS))
    label = np.searchsorted(ids, categories).astype(np.uint8)
    if (ids[label.clip(0, 59)] != categories).any():
        raise ValueError(f"{path.stem} has a category that is none of the 59")

    # Renamed when whole: a label that exists is complete.
    part = Path(f"{path}.part")
    Image.fromarray(label).save(part, "PNG")
    part.rename(path)


def prepare(data, root, download=False):
    """Unpacks a data set and, for Context, makes its label files.

    What is there already is left alone. ValueError, OSError: what is wrong, and what to do.

    Args:
        data: a key of LAYOUTS.
        root: the folder of the archives and of all that is in them; nothing is written elsewhere.
        download: fetch the archives that are missing.
    """
    layout = LAYOUTS[data]
    root = Path(root)
    base = root / layout.base

    if not base.is_dir():
        archive = root / Path(layout.archive).name
        if download and layout.archive:
            fetch(layout.archive, layout.md5, archive)
        if not archive.is_file():
            raise FileNotFoundError(f"{base} does not exist: {misplaced(data, root)}")
        unpack(archive, layout.base, root)

    if data == "context" and not (base / layout.lists / "val.txt").is_file():
        source = base / Path(CONTEXT_JSON).name
        if not source.is_file():
            source = root / Path(CONTEXT_JSON).name
        if download:
            fetch(CONTEXT_JSON, CONTEXT_JSON_MD5, source)
        if not source.is_file():
            raise FileNotFoundError(f"{source} is missing; {fetched_by(data, root)}")
        try:
            context_labels(base, json.loads(source.read_bytes()))
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{source} is not Context's annotation file: {error}") from error


def verify(data, root):
    """Reads all images and annotations of a data set and prints what was found, a line a split.

    The line names the classes that occur in no label file: after a mistake in label_values, or with
    another data set's labels, there are many. The first thing wrong is a ValueError or OSError.
    """
    classes = DATA[data].classes
    for split, official in LAYOUTS[data].official.items():
        pairs = Evaluation(open_split(data, root, split), long_side=0, short_side=0)
        progress = Progress(f"{data} {split}", len(pairs))
        seen = set()
        for i in range(len(pairs)):
            _, truth, _ = pairs[i]
            seen.update(truth.unique().tolist())
            progress(i + 1)

        missing = [name for c, name in enumerate(classes) if c not in seen]
        line = (
            f"{data} {split}: {len(pairs)} images with labels (official: {official}), "
            f"{len(classes) - len(missing)} of {len(classes)} classes occur"
        )
        if missing:
            line += f"; in no label: {', '.join(missing)}"
        print(line)


def main(argv=None):
    """The command line: prepare, then verify."""
    parser = argparse.ArgumentParser(description="Fetches, unpacks and verifies a data set.")
    parser.add_argument("--prepare", choices=list(LAYOUTS), required=True, help="the data set")
    parser.add_argument(
        "--root", default="data", help="folder for the archives and all that is in them"
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    args = parser.parse_args(argv)
    prepare(args.prepare, args.root, args.download)
    verify(args.prepare, args.root)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"datasets.py: {error}")
    except KeyboardInterrupt:
        sys.exit("datasets.py: stopped; the same command begins anew what is not there yet")
