"""Evaluation: mIoU of a model on a data set, and masks of any images.

    python eval.py --stage rectify --data shapes --split test
    python eval.py --stage clip    --data voc --root DIR      (the MaskCLIP baseline, same code)
    python eval.py --stage rectify --images photos/ --checkpoint runs/photos/rectify.pt

What stands here
    confusion_matrix, scores       mIoU
    Protocol, slide, predict_mask  from one image to its mask
    predict_split, evaluate_stage  a model on a whole split: table, JSON, image of examples
    color_mask, draw_...           masks as images
    segment_images                 masks of your own images, three files each
    plain_clip, open_student       models, as the command line names them
    main                           the command line

Symbols
    C classes; (H, W) size of the image that the network sees, (H0, W0) size of its truth and mask
    M logits (1, C, h, w), one vector of C numbers for each patch of an h x w grid
    truth: the class of each pixel as people drew it, 0..C-1 or IGNORE; it measures, never trains

Copied elsewhere, confusion_matrix and scores need no more than torch and IGNORE:
    confusion = torch.zeros(20, 20, dtype=torch.int64)
    for mask, truth in results:                               # (H0, W0) each, uint8
        confusion += confusion_matrix(mask, truth, num_classes=20)
    print(scores(confusion)["miou"])

From an image, uint8 (3, H0, W0), to its mask (H0, W0), with a checkpoint of the default recipe:
    model = ReCLIP.load("runs/voc/rectify.pt")
    seen = to_dtype(resize_within(image, 2048, 512, False), torch.float32, scale=True)  # 0 to 1
    mask = predict_mask(model, "rectify", seen, image.shape[1:], Protocol(2048, 512, denoise=0.5))
"""

import argparse
import errno
import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype, to_pil_image
from torchvision.utils import draw_segmentation_masks, make_grid

from clip_model import ATTENTIONS, MODELS, load_clip, written_atomically
from datasets import (
    DATA,
    IGNORE,
    RECIPE_SIZES,
    Evaluation,
    Folder,
    Progress,
    find_settings,
    open_split,
    own_facts,
    read_classes,
    read_prompts,
    resize_within,
)
from deeplab import DeepLabV2
from reclip import PROMPTS, RECIPES, ReCLIP, open_rectification, released_kind, segment

# Every model answers with Logits, M_q and M among them. A stage names the part that is its answer,
# and the title of its masks. "clip" reads M_q, which is MaskCLIP, unless the Query is learnt.
STAGE_PARTS = {
    "clip": ("query", "CLIP"),
    "rectify": ("rectified", "rectified"),
    "distill": ("rectified", "distilled"),
}


# --- mIoU -----------------------------------------------------------------------------------------

# One matrix of a whole split, and not one IoU per image: IoU is a ratio, and a mean of ratios
# would let a class of 3 pixels in one image weigh as much as one that fills another. In most
# images a class does not occur at all, and its ratio would be 0 / 0. Counts of pixels can simply
# be added, so the matrices of all images are, and the ratio is taken once, at the end. VOC's own
# evaluation does so too.

def confusion_matrix(prediction, truth, num_classes):
    """Counts the pixels of each pair of true and predicted class.

    prediction, truth: (H0, W0) class indices 0..C-1, integers of any kind. num_classes: C.
    -> (C, C) int64; entry [t, p]: pixels that are t and were called p.

    Pixels whose truth is IGNORE are left out, whatever was predicted there. None of the C names
    applies to them (background, ground, "other"), or it is not known which does (the void borders
    of VOC): an answer there can be called neither right nor wrong.
    """
    evaluated = truth != IGNORE                                         # (H0, W0) bool

    # The pair (t, p) as one number t * C + p, so that one histogram counts all pairs at once.
    pairs = truth[evaluated].long() * num_classes + prediction[evaluated].long()
    counts = torch.bincount(pairs, minlength=num_classes ** 2)          # (C * C,)
    return counts.reshape(num_classes, num_classes)


def scores(confusion):
    """What is reported of a confusion matrix (C, C); fractions of 1, but for the count `present`.

    -> {"miou": mean of iou over the classes that occur in the truth,
        "iou": C numbers, nan for the classes that do not occur,
        "present": how many classes occur,
        "pixel_accuracy": pixels that are right, of all that were evaluated}
    """
    confusion = confusion.double()
    hit = confusion.diagonal()                                          # (C,) pixels that are right
    truth = confusion.sum(1)                                            # (C,) pixels that are of it
    predicted = confusion.sum(0)                                        # (C,) pixels called so

    # Intersection over union: pixels that are of the class AND called so, over pixels that are one
    # OR the other. In the sum of the two the intersection is counted twice, so one is taken off.
    iou = hit / (truth + predicted - hit)                               # (C,)

    # A class that never occurs says nothing about a model: its IoU is 0 after a single stray pixel
    # and 0 / 0 without one. So the mean is over the classes that do occur. (The released code
    # counts the others as 0. Where all classes occur, as on VOC's val, both means are the same.)
    present = truth > 0
    iou = torch.where(present, iou, torch.nan)

    return {
        "miou": iou.nanmean().item(),
        "iou": iou.tolist(),
        "present": int(present.sum()),
        "pixel_accuracy": (hit.sum() / truth.sum()).item(),
    }


# --- From one image to its mask -------------------------------------------------------------------

@dataclass(frozen=True)
class Protocol:
    """How an image becomes a mask. Each field moves mIoU: compare numbers of one protocol only."""
    # An image is resized to the largest size within these two; short_side 0: not at all.
    long_side: int                     # pixels
    short_side: int                    # pixels
    window: int = 0                    # side of a sliding window, pixels; 0: the whole image
    stride: int = 224                  # from one window to the next, pixels
    denoise: float = 0.0               # threshold of reclip.strong_classes, a probability; 0: off
    background_threshold: float = 0.0  # pixels less probable than this get no class; 0: none

    def __post_init__(self):
        if self.short_side < 0:
            raise ValueError(f"short_side is {self.short_side}; it must be 0 or more pixels")
        if self.long_side < 1:
            raise ValueError(f"long_side is {self.long_side}; it must be 1 or more pixels")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; it must be 0 (no windows) or more pixels")
        if self.window and not 1 <= self.stride <= self.window:
            raise ValueError(f"stride is {self.stride}; it must lie in 1..{self.window}, the "
                             "window, or parts of the image would never be seen")
        if not 0 <= self.denoise <= 1:
            raise ValueError(f"denoise is {self.denoise}; a probability, it must lie in 0..1")
        if not 0 <= self.background_threshold <= 1:
            raise ValueError(f"background_threshold is {self.background_threshold}; a probability, "
                             "it must lie in 0..1")

    def describe(self):
        """The protocol in words, for the line above a table."""
        seen = "whole images"
        if self.window:
            seen = f"windows of {self.window}, stride {self.stride}"
        sides = f"images within {self.long_side} x {self.short_side}"
        if not self.short_side:
            sides = "images of their own size"
        return f"{sides}, {seen}, denoise {self.denoise or 'off'}"


def window_starts(cells, window, stride):
    """First cell of each window over a row of `cells`; window, stride: cells too. -> list

    The last window is moved back, so that it ends where the row ends. Of 11 cells, with windows of
    6 cells every 2:

        cells      0  1  2  3  4  5  6  7  8  9 10
        windows   [0              5]
                        [2              7]
                              [4              9]
                                 [5             10]        starts: [0, 2, 4, 5]
    """
    last = max(cells - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def slide(model, part, image, window, stride):
    """Logits of a large image from overlapping windows: (1, 3, H, W) in [0, 1] -> (1, C, h, w).

    CLIP was trained at 224 x 224 pixels. For an image many times larger its positional embedding
    is stretched far, and every patch attends to thousands of others. A window shows it a part of
    the image at a size that it is used to. Where windows overlap, what they say is averaged: a
    patch at the edge of one, where half of its surroundings are missing, lies inside another.

    part: the field of the model's Logits that is wanted, "query" or "rectified".
    window, stride: pixels, multiples of model.output_stride. All windows then start at whole cells
        and share the grid h x w that the whole image would have. So logits are added on patches,
        not on pixels, and memory does not grow with the number of windows.
    """
    output_stride = model.output_stride
    if window % output_stride or stride % output_stride:
        raise ValueError(f"window {window} and stride {stride} must be multiples of "
                         f"{output_stride}, the pixels from one cell of this model's grid to the "
                         "next")

    # From here on in cells; a cell that the image fills only in part counts, for the model pads it.
    h = math.ceil(image.shape[2] / output_stride)
    w = math.ceil(image.shape[3] / output_stride)
    size = window // output_stride
    step = stride // output_stride

    total = None                                                        # (1, C, h, w)
    count = image.new_zeros(h, w)                                       # windows over each cell
    for i in window_starts(h, size, step):
        for j in window_starts(w, size, step):
            top = i * output_stride
            left = j * output_stride
            seen = image[..., top:top + window, left:left + window]     # (1, 3, <= window, same)
            logits = getattr(model(seen), part)                         # (1, C, <= size, same)

            if total is None:
                total = logits.new_zeros(1, logits.shape[1], h, w)
            total[..., i:i + size, j:j + size] += logits
            count[i:i + size, j:j + size] += 1
    return total / count


@torch.no_grad()
def predict_mask(model, stage, image, size, protocol):
    """The mask of one image: float (3, H, W) in [0, 1] -> (H0, W0) uint8, on the CPU.

    model: a ReCLIP or DeepLabV2 in eval mode. stage: a key of STAGE_PARTS.
    image: already resized to protocol's sides (datasets.Evaluation does it).
    size: (H0, W0) of the mask that is wanted. mIoU is taken at the size of the truth.
    -> class indices 0..C-1; IGNORE for pixels below protocol.background_threshold
    """
    part = STAGE_PARTS[stage][0]
    seen = image[None].to(model.W_q.device)                             # (1, 3, H, W)

    # Which class does each patch resemble?
    if protocol.window:
        logits = slide(model, part, seen, protocol.window, protocol.stride)
    else:
        logits = getattr(model(seen), part)                             # (1, C, h, w)

    # Logits are enlarged to pixels before the best class is taken: borders then run smoothly
    # through the patches, where a mask of patches would be made of squares.
    mask = segment(
        logits,
        model.output_stride,
        image.shape[1:],
        size,
        protocol.denoise,
        protocol.background_threshold,
        model.scale,
    )
    return mask.cpu()


def predict_split(model, stage, dataset, protocol, title, workers=0):
    """Yields (mask (H0, W0) uint8, truth (H0, W0) uint8, name) of each image of a split, in order.

    dataset: a datasets.Evaluation. title: of the progress line. workers: processes that decode.
    """
    progress = Progress(title, len(dataset))
    # Images of a split differ in size: one at a time, not in batches.
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    for i, (image, truth, name) in enumerate(loader):
        mask = predict_mask(model, stage, image, truth.shape, protocol)
        yield mask, truth, name
        progress(i + 1)


# --- A model on a split ---------------------------------------------------------------------------

class Column(NamedTuple):
    """A column of masks in an image of examples."""
    model: nn.Module
    stage: str
    dataset: Evaluation  # the images at the sides of the protocol
    protocol: Protocol
    miou: float = None   # over the whole split, for the title; None: not measured


def evaluate_stage(
    model, stage, facts, split_name, dataset, protocol, out, others=(), workers=0
):
    """Evaluates a model on a split: prints a table, writes <out>/eval_<stage>.json and .png.

    model, stage, protocol: as in predict_mask.
    facts: DataFacts of the data set. dataset: Evaluation over its split split_name.
    others: Columns, of models whose masks are drawn beside this one's.
    -> the dict of scores
    """
    C = len(model.class_names)
    confusion = torch.zeros(C, C, dtype=torch.int64)
    title = f"evaluate {stage}"
    for mask, truth, _ in predict_split(model, stage, dataset, protocol, title, workers):
        confusion += confusion_matrix(mask, truth, C)
    result = scores(confusion)

    print(f"\n{stage}: {facts.name} {split_name}, recipe {model.recipe}, {protocol.describe()}, "
          f"{facts.background}")
    print_scores(result, model.class_names)

    # JSON knows no nan: an absent class has null.
    iou_of_class = {}
    for name, iou in zip(model.class_names, result["iou"]):
        iou_of_class[name] = None if math.isnan(iou) else iou
    report = {
        "miou": result["miou"],
        "pixel_accuracy": result["pixel_accuracy"],
        "confusion": confusion.tolist(),
        "iou": iou_of_class,
        "protocol": protocol_facts(model, stage, facts, protocol),
    }
    report["protocol"] |= {
        "split": split_name,
        "pictures": len(dataset),
        "classes_present": result["present"],
        # Of the tensors, not of the file: torch.save writes the file's name into it.
        "checkpoint_sha256": None if stage == "clip" else model.fingerprint(),
    }
    with written_atomically(out / f"eval_{stage}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))

    own = Column(model, stage, dataset, protocol, result["miou"])
    examples = draw_examples([*others, own], facts)
    examples.save(out / f"eval_{stage}.png")
    return result


def protocol_facts(model, stage, facts, protocol):
    """What a number or a mask depends on, for the JSON files. Their writers add what is missing."""
    return {
        "data": facts.name,
        "stage": stage,
        "recipe": model.recipe,
        "long_side": protocol.long_side,
        "short_side": protocol.short_side,
        "window": protocol.window,
        "stride": protocol.stride if protocol.window else 0,
        "denoise": protocol.denoise,
        "background": facts.background,
        "class_names": list(model.class_names),
        "attention": model.settings.get("attention"),
        "prompts": list(facts.prompts or PROMPTS) if stage == "clip" else None,
        "clip_sha256": None if stage == "distill" else model.clip.sha256,
    }


def print_scores(result, class_names):
    """The IoU of each class, two a line, and below them the mean."""
    cells = []
    for name, iou in zip(class_names, result["iou"]):
        shown = "absent" if math.isnan(iou) else f"{100 * iou:6.1f}"
        cells.append(f"  {name:<16}{shown}")

    for left, right in zip_longest(cells[::2], cells[1::2], fillvalue=""):
        print(f"{left:<28}{right}")
    print(f"  mIoU {100 * result['miou']:.1f} over the {result['present']} of {len(class_names)} "
          f"classes present; pixel accuracy {100 * result['pixel_accuracy']:.1f}")


# --- Masks as images ------------------------------------------------------------------------------

WHITE = (255, 255, 255)
INK = (30, 30, 30)
GREY = (225, 225, 225)  # pixels that are not evaluated, or have no class
FONT = ImageFont.load_default(13)


def color_mask(mask, palette, truth=None):
    """Class indices (H0, W0) -> their colors, uint8 (3, H0, W0); IGNORE is grey.

    palette: C colors (r, g, b). truth: if given, pixels that are not evaluated are grey in the mask
    too. A model has to give one of the C names to every pixel, so it floods the background with
    colors; these are neither right nor wrong, and would hide the pixels that count.
    """
    greys = [GREY] * (256 - len(palette))
    table = torch.tensor([*palette, *greys], dtype=torch.uint8)         # (256, 3)
    if truth is not None:
        mask = torch.where(truth == IGNORE, IGNORE, mask)
    return table[mask.long()].permute(2, 0, 1)


def with_legend(image, entries):
    """A PIL image with a legend below it.

    entries: (color, text) pairs; of "sofa | couch" the first synonym is shown. -> PIL image
    """
    entries = [(color, text.split("|")[0].strip()) for color, text in entries]

    # All entries are as wide as the longest: 12 pixels of color, gaps, text. As many as fit a line.
    widths = [int(FONT.getlength(text)) for _, text in entries]
    entry_width = 34 + max(widths, default=0)
    columns = max(1, image.width // entry_width)
    lines = math.ceil(len(entries) / columns)

    width = max(image.width, entry_width)
    canvas = Image.new("RGB", (width, image.height + 6 + 20 * lines), WHITE)
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    for i, (color, text) in enumerate(entries):
        line, column = divmod(i, columns)
        x = 6 + column * entry_width
        y = image.height + 4 + line * 20
        pen.rectangle([x, y + 2, x + 12, y + 14], tuple(color), INK)
        pen.text((x + 18, y), text, INK, FONT)
    return canvas


def into_tile(image, tile):
    """uint8 (3, H, W) -> (3, tile, tile): scaled until it fits, in the middle of white."""
    factor = tile / max(image.shape[1:])
    height, width = [max(1, round(side * factor)) for side in image.shape[1:]]

    # Enlarged, every pixel stays a clean square: masks keep their exact colors. Made smaller,
    # pixels are averaged: single ones, picked out, would make a speckled photograph.
    if factor < 1:
        image = resize(image, [height, width], antialias=True)
    else:
        image = resize(image, [height, width], InterpolationMode.NEAREST)

    left = (tile - width) // 2
    top = (tile - height) // 2
    padding = (left, tile - width - left, top, tile - height - top)
    return F.pad(image, padding, value=255)


def draw_grid(rows, titles, entries=(), tile=136, gap=8):
    """Rows of images under the titles of their columns, with a legend below. -> PIL image

    rows: lists of uint8 (3, H, W), of any sizes, one for each title. entries: as in with_legend.
    """
    tiles = []
    for row in rows:
        tiles += [into_tile(image, tile) for image in row]
    grid = make_grid(tiles, nrow=len(titles), padding=gap, pad_value=255)

    canvas = Image.new("RGB", (grid.shape[2], grid.shape[1] + 20), WHITE)
    canvas.paste(to_pil_image(grid), (0, 20))
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        middle = gap + column * (tile + gap) + tile / 2
        pen.text((middle, 5), title, INK, FONT, "ma")
    return with_legend(canvas, entries)


def draw_examples(columns, facts, count=6, among=100):
    """Images of a split with truth and masks, a row each. -> PIL image

    Which images? Of the first `among`, those in which the first and the last column of masks differ
    at the largest share of pixels, for better or worse. Pixels that are not evaluated count as
    equal. With one column: the first ones.

    columns: list of Column, over the same split. Each shows masks by its own protocol, the one that
        the mIoU in its title was measured with.
    facts: DataFacts.
    """
    def mask_of(column, i):
        image, truth, _ = column.dataset[i]
        return predict_mask(column.model, column.stage, image, truth.shape, column.protocol)

    titles = ["image", "truth"]
    for column in columns:
        number = "" if column.miou is None else f" {100 * column.miou:.1f}"
        titles.append(STAGE_PARTS[column.stage][1] + number)

    dataset = columns[-1].dataset
    candidates = range(min(among, len(dataset)))
    difference = {i: 0.0 for i in candidates}  # of each image, the share of its pixels
    if len(columns) > 1:
        for i in candidates:
            _, truth, _ = dataset[i]
            first = mask_of(columns[0], i)
            last = mask_of(columns[-1], i)
            differs = (first != last) & (truth != IGNORE)               # (H0, W0) bool
            difference[i] = differs.float().mean().item()

    # Images that differ alike stay in their order.
    chosen = sorted(candidates, key=difference.get, reverse=True)[:count]

    rows = []
    for i in chosen:
        image, truth, _ = dataset[i]
        row = [to_dtype(image, torch.uint8, scale=True), color_mask(truth, facts.palette)]
        for column in columns:
            row.append(color_mask(mask_of(column, i), facts.palette, truth))
        rows.append(row)
    return draw_grid(rows, titles, zip(facts.palette, facts.classes))


def draw_overlay(image, mask, palette, entries, longest=1600):
    """An image under its half transparent mask, with a legend below. -> PIL image

    image: uint8 (3, H0, W0). mask: (H0, W0) uint8; where it is IGNORE the image stays as it is.
    entries: as in with_legend. The image is drawn at most `longest` pixels wide and high; a tiny
    one is enlarged to 320.
    """
    factor = min(longest, max(320, *mask.shape)) / max(mask.shape)
    size = [max(1, round(side * factor)) for side in mask.shape]
    image = resize(image, size, antialias=True)
    mask = resize(mask[None], size, InterpolationMode.NEAREST)[0]  # there is no class 3.5

    classes = [c for c in mask.unique().tolist() if c != IGNORE]
    if classes:
        layers = torch.stack([mask == c for c in classes])              # (classes, H, W) bool
        colors = [tuple(palette[c]) for c in classes]
        image = draw_segmentation_masks(image, layers, alpha=0.5, colors=colors)
    return with_legend(to_pil_image(image), entries)


# --- Masks of any images --------------------------------------------------------------------------

def segment_images(model, stage, facts, images, protocol, out):
    """Masks of images without truth, three files each below <out>/masks:

        NAME.index.png      palette PNG of the image's own size; 0 is background, 1..C the classes
        NAME.overlay.png    the image under its mask, with a legend
        NAME.json           the share of the image that each class covers, and the protocol

    model, stage, protocol: as in predict_mask. facts: DataFacts, for its palette.
    images: datasets.Folder.
    """
    shown_names = [name.split("|")[0].strip() for name in model.class_names]
    if protocol.background_threshold and "background" in shown_names:
        raise ValueError("--background-threshold calls what is no class background, and a class is "
                         "named so too: leave the option out")

    progress = Progress("segment", len(images))
    too_long = 0
    for i, name in enumerate(images.names):
        image = images.image(i)                                         # uint8 (3, H0, W0)
        resized = resize_within(image, protocol.long_side, protocol.short_side) # uint8 (3, H, W)
        seen = to_dtype(resized, torch.float32, scale=True)             # in [0, 1]
        mask = predict_mask(model, stage, seen, image.shape[1:], protocol)

        # What was found, the largest first: a class, or IGNORE for the background.
        counts = mask.flatten().bincount(minlength=256).double()        # (256,)
        shares = (counts / mask.numel()).tolist()
        by_size = counts.argsort(descending=True, stable=True).tolist()
        found = [c for c in by_size if counts[c] > 0]

        areas = {}    # name: share of the image
        values = {}   # name: value in the index PNG
        entries = []  # of the legend
        for c in found:
            found_name = "background"
            color = GREY
            if c != IGNORE:
                found_name = shown_names[c]
                color = facts.palette[c]
            areas[found_name] = shares[c]
            values[found_name] = (c + 1) % 256
            entries.append((color, f"{found_name} {100 * shares[c]:.1f} %"))

        report = {
            "picture": name,
            "size": [image.shape[2], image.shape[1]],
            "areas": areas,
            "index": values,
            "background_threshold": protocol.background_threshold,
            "protocol": protocol_facts(model, stage, facts, protocol),
        }
        path = mask_path(out, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_index(mask, facts.palette, f"{path}.index.png")
            draw_overlay(image, mask, facts.palette, entries).save(f"{path}.overlay.png")
            Path(f"{path}.json").write_text(json.dumps(report, indent=1))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            print(f"skipped {name}: with .overlay.png its name is too long", file=sys.stderr)
            too_long += 1
        progress(i + 1)

    print(f"{len(images) - too_long} images segmented, {len(images.skipped)} unreadable: "
          f"{out / 'masks'}")


def mask_path(out, name):
    """Where the files of an image go: below <out>/masks, even if its name is an absolute path."""
    parts = [part for part in Path(name).parts if part not in ("..", "/")]
    return out / "masks" / Path(*parts)


def save_index(mask, palette, path):
    """Class indices (H0, W0) uint8 as a palette PNG: 0 background (IGNORE), 1..C the classes.

    The file holds indices and shows colors, as the label files of VOC do.
    """
    index = Image.fromarray((mask + 1).numpy())  # bytes: IGNORE + 1 = 256 = 0
    colors = [0, 0, 0]
    for color in palette:
        colors += color
    index.putpalette(colors)
    index.save(path)


# --- Command line ---------------------------------------------------------------------------------

def plain_clip(facts, clip, attention="maskclip", recipe="2025"):
    """ReCLIP without its two biases, in eval mode: M = M_q, which is MaskCLIP.

    facts: DataFacts, for class names and prompts. clip: a CLIP.
    attention, recipe: as ReCLIP takes them.
    """
    return ReCLIP(
        clip,
        facts.classes,
        prompts=facts.prompts or PROMPTS,
        prompt_length=0,
        positional_channels=0,
        attention=attention,
        recipe=recipe,
    ).eval()


def open_student(path, class_names, teacher=None, recipe=None, device="cpu"):
    """A student in eval mode: a file of DeepLabV2.save, or one that the authors published.

    class_names, teacher: of a published file, which names no classes, and whose W_q and W_r are in
        the rectification published beside it; teacher is that one, a ReCLIP.
    recipe: a student of ours keeps its own, and is refused under another.
    Errors: FileNotFoundError, ValueError, as load and from_released raise them.
    """
    if released_kind(path) == "student":
        if teacher is None or teacher.method != "reclip":
            raise ValueError(f"{path} is a student that the authors published; its W_q and W_r are "
                             "in the rectification published beside it: give that with --teacher")
        return DeepLabV2.from_released(path, class_names, *teacher.heads(), device)

    model = DeepLabV2.load(path, device)
    if recipe not in (None, model.recipe):
        raise ValueError(f"{path} was learnt under the recipe {model.recipe} and is evaluated "
                         f"under no other, such as {recipe}")
    return model


def best_device():
    """The default of --device: a GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def check_device(name):
    """ValueError if torch has no such device here."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available here ({reason})") from None


def make_parser():
    """The options of the command line, without the checks of what fits together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=list(STAGE_PARTS), default="rectify",
        help="what to evaluate (default: rectify)")
    add("--checkpoint", type=Path,
        help="file to evaluate, ours or one that the authors published (default: <out>/<stage>.pt)")
    add("--teacher", type=Path,
        help="with --stage distill: the rectification that a published student's heads come from, "
        "or whose masks are drawn beside it (default: <out>/rectify.pt)")
    add("--recipe", choices=list(RECIPES),
        help="for --stage clip and published files on voc, context and ade20k (default: cvpr2024); "
        "a checkpoint of ours keeps its own")
    add("--data", help=f"{', '.join(DATA)} (default: shapes)")
    add("--images", nargs="+", type=Path,
        help="segment these images or folders of images instead of a data set")
    add("--classes",
        help="with --stage clip --images: 'cat, dog | puppy', or a file with one class a line")
    add("--attention", choices=ATTENTIONS,
        help="attention variant of CLIP's last block for --stage clip (default: maskclip)")
    add("--split", help="split to evaluate on (default: val)")
    add("--root", default="data",
        help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help=f"{', '.join(MODELS)}, or a weights file (default: the data set's)")
    add("--prompts", type=Path,
        help="file with templates of the Query, one a line, {} for the name (default: the data "
        "set's)")
    add("--out", type=Path, help="where checkpoints are and results go (default: runs/<data>)")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--denoise", type=float,
        help="drop classes whose best probability is below; 0: off (default: as released; off on "
        "shapes and your own images)")
    add("--long-side", "--long_side", type=int,
        help="images are resized to the largest size within --long-side x --short-side, pixels "
        "(default: as the data set's recipe trains; without --data: 2048)")
    add("--short-side", "--short_side", type=int,
        help="pixels; 0: images keep their size (default: likewise; without --data: 336, of a "
        "student 512)")
    add("--window", type=int,
        help="slide a window of this side over the image, pixels; 0: whole images")
    add("--stride", type=int,
        help="from window to window, pixels (default: 224, at most the window)")
    add("--background-threshold", "--background_threshold", type=float,
        help="with --images: pixels less probable than this are background (default: 0, off)")
    return parser


def parse_arguments(argv=None):
    """The command line -> (args, DataFacts, {field of Protocol: value}), as far as they are given.

    ValueError: options that do not fit.
    """
    args = make_parser().parse_args(argv)
    if args.checkpoint and args.stage == "clip":
        raise ValueError("--checkpoint goes with --stage rectify and distill; plain CLIP has none")
    if args.clip and args.stage == "distill":
        raise ValueError("--clip goes with --stage clip and rectify; a student needs none")
    if args.prompts and args.stage != "clip":
        raise ValueError("--prompts goes with --stage clip; a checkpoint keeps its own texts")
    if args.attention and args.stage != "clip":
        raise ValueError("--attention goes with --stage clip; a checkpoint keeps its own")
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill")

    # Your own images do not say which classes to look for: a list, a checkpoint or a data set does.
    classes_known = args.data or args.classes
    if args.stage != "clip":
        classes_known = args.data or args.checkpoint or args.out
    if args.images and not classes_known:
        raise ValueError("--images needs --classes 'cat, dog' with --stage clip, else "
                         "--checkpoint runs/NAME/STAGE.pt")

    if args.images and args.data and args.data not in DATA:
        raise ValueError(f"--data {args.data} is none of {', '.join(DATA)}; beside --images it "
                         "names the data set whose classes and sizes are meant")
    if args.stride is not None and not args.window:
        raise ValueError("--stride goes with --window")

    # Where results go: beside the checkpoint that is used on your own images, else runs/<data>.
    args.data = args.data or ("pictures" if args.images else "shapes")
    if args.out is None and args.images and args.checkpoint:
        args.out = args.checkpoint.parent
    if args.out is None:
        args.out = Path("runs") / Path(args.data).resolve().name

    facts = find_facts(args.data, args.images, args.classes)
    if args.prompts:
        facts = replace(facts, prompts=read_prompts(args.prompts))
    if facts.splits:
        args.split = args.split or facts.splits[0]
    if args.split and not facts.splits:
        raise ValueError(f"--split {args.split}: your own images have no splits")
    if args.split and args.split not in facts.splits:
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(facts.splits)}")

    changes = {}  # of the protocol
    for name in ("long_side", "short_side", "window", "stride", "denoise", "background_threshold"):
        value = getattr(args, name)
        if value is not None:
            changes[name] = value
    # ValueError if they do not fit
    find_protocol(find_settings(args.data, args.recipe), args.stage, **changes)
    if args.background_threshold and not args.images:
        raise ValueError("--background-threshold goes with --images: pixels that a data set "
                         "evaluates all have a class")

    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    check_device(args.device)
    return args, facts, changes


def find_facts(data, images, classes):
    """DataFacts of the data set, or of your own images; its classes are () where a checkpoint will
    name them.

    data, images, classes: as --data, --images and --classes give them.
    """
    if not images:
        if data in DATA and classes:
            raise ValueError(f"--classes goes with your own images; {data} has its own classes")
        if data not in DATA and not Path(data).is_dir():
            raise ValueError(f"--data {data} is neither a folder of images nor one of "
                             f"{', '.join(DATA)}")
        if data not in DATA:
            raise ValueError(f"--data {data} has no truth to evaluate on; --images {data} draws "
                             "its masks")
    if classes:
        return own_facts(data, read_classes(classes))
    if data in DATA:
        return DATA[data]
    return own_facts(data, ())


def settings_of(model, stage, data):
    """The Settings of a data set under the recipe and the method that a model was learnt with."""
    method = "reclip" if stage == "distill" else model.method
    recipe = None
    if (model.recipe, data) in RECIPE_SIZES:
        recipe = model.recipe
    return find_settings(data, recipe, method)


def find_protocol(settings, stage, **changes):
    """The Protocol of a stage, with some fields changed.

    As released, the sides are those that the recipe trains at, and the student has no denoising.
    settings: datasets.Settings, those of the data set under the model's recipe.
    """
    fields = {
        "long_side": settings.rectify_long_side,
        "short_side": settings.rectify_short_side,
        "denoise": settings.denoise,
    }
    if stage == "distill":
        fields = {
            "long_side": settings.distill_long_side,
            "short_side": settings.distill_short_side,
            "denoise": 0.0,
        }
    fields |= changes
    if fields.get("window"):
        fields.setdefault("stride", min(224, fields["window"]))
    return Protocol(**fields)


def main(argv=None):
    args, facts, protocol_changes = parse_arguments(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # as in train.py: tensors this small stall on shared cores

    # Images first: if they are missing, that is said before CLIP is loaded or fetched.
    if args.images:
        images = Folder(*args.images)
    else:
        split = open_split(args.data, args.root, args.split, args.download)

    path = args.checkpoint or args.out / f"{args.stage}.pt"
    teacher_path = args.teacher or args.out / "rectify.pt"
    W_q_path = args.out / "W_q.pt"

    teacher = None
    if args.stage == "clip":
        # No checkpoint that knows its recipe: the data set's default does.
        clip = load_clip(args.clip or facts.clip, args.device)
        recipe = find_settings(args.data, args.recipe).recipe
        model = plain_clip(facts, clip, args.attention or "maskclip", recipe)
    elif args.stage == "rectify":
        clip = load_clip(args.clip, args.device) if args.clip else None
        model = open_rectification(path, facts.classes, clip, args.recipe, W_q_path, args.device)
    else:
        # A published student needs a teacher for its heads. Else the teacher is there to be drawn
        # beside the student; your own images have no such drawing, and our students need no CLIP.
        wanted = not args.images or released_kind(path) == "student"
        if args.teacher or (wanted and teacher_path.is_file()):
            teacher = open_rectification(
                teacher_path, facts.classes, None, args.recipe, W_q_path, args.device
            )
        model = open_student(path, facts.classes, teacher, args.recipe, args.device)

    if facts.classes and facts.classes != model.class_names:
        raise ValueError(f"{path} was made for other classes than are asked for: "
                         f"{', '.join(model.class_names)}")

    settings = settings_of(model, args.stage, args.data)
    protocol = find_protocol(settings, args.stage, **protocol_changes)

    if args.images:
        if not facts.classes:
            facts = own_facts(args.data, model.class_names)
        segment_images(model, args.stage, facts, images, protocol, args.out)
        return

    # In the image of examples the earlier stages stand beside this one, as far as they are there.
    # A model whose Query has learnt cannot show what CLIP said: its M_q is no longer CLIP's.
    dataset = Evaluation(split, protocol.long_side, protocol.short_side)
    others = []
    if args.stage == "rectify" and model.query is None:
        others.append(Column(model, "clip", dataset, protocol))
    if teacher is not None:
        # The teacher by its own protocol: other sides, and denoising, which the student has not.
        of_teacher = find_protocol(
            settings_of(teacher, "rectify", args.data), "rectify", **protocol_changes
        )
        seen = Evaluation(split, of_teacher.long_side, of_teacher.short_side)
        if teacher.query is None:
            others.append(Column(teacher, "clip", seen, of_teacher))
        others.append(Column(teacher, "rectify", seen, of_teacher))

    evaluate_stage(
        model, args.stage, facts, args.split, dataset, protocol, args.out, others, args.workers
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")
