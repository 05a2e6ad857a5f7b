"""Evaluation: mIoU of a model on a data set, and masks of any images.

    python eval.py --stage rectify --data voc --root DIR      the checkpoint runs/voc/rectify.pt
    python eval.py --stage clip    --data voc --root DIR      the MaskCLIP baseline, same code
    python eval.py --images photos/ --checkpoint runs/photos/rectify.pt

What stands here
    confusion_matrix, scores       mIoU
    predict_mask                   from one image to its mask
    segment_image                  the same in one call, for an image of any kind
    predict_split, evaluate_split  a model on a whole split: table, JSON, image of examples
    color_mask, draw_...           masks as images
    segment_images                 masks of your own images
    plain_clip, without_biases     MaskCLIP: a new one, and that of a rectified CLIP
    open_model                     the model of a checkpoint
    main                           the command line

Symbols
    C classes; (H, W) size of the image that the network sees, (H0, W0) size of its truth and mask
    M logits (1, C, h, w), one vector of C numbers for each patch of an h x w grid
    truth: the class of each pixel as people drew it, 0..C-1 or IGNORE; it measures, never trains

Masks in a program of your own:
    model = open_model("runs/photos/rectify.pt")              # or distill.pt
    mask = segment_image(model, "cat.jpg")                    # (H0, W0) uint8
    print(model.class_names[mask[100, 200]])

Copied elsewhere, confusion_matrix and scores need no more than torch and IGNORE:
    confusion = torch.zeros(20, 20, dtype=torch.int64)
    for mask, truth in results:                               # (H0, W0) each, uint8
        confusion += confusion_matrix(mask, truth, num_classes=20)
    print(scores(confusion)["miou"])
"""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_pil_image

from clip_model import MODELS, load_clip, maskclip, tensors_sha256, written_atomically
from datasets import (
    DATA,
    IGNORE,
    Evaluation,
    Folder,
    Progress,
    open_split,
    own_images,
    read_classes,
    read_image,
    read_lines,
    resize_within,
    to_float,
    to_rgb,
    voc_palette,
)
from deeplab import DeepLabV2
from reclip import ReCLIP, read_checkpoint, segment


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

    predicted = prediction[evaluated].long()
    if (predicted >= num_classes).any():
        raise ValueError(f"the prediction holds {int(predicted.max())}, and there are "
                         f"{num_classes} classes: a mask with a background cannot be evaluated")

    # The pair (t, p) as one number t * C + p, so that one histogram counts all pairs at once.
    pairs = truth[evaluated].long() * num_classes + predicted
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

# A model keeps how evaluation shows it images, its .protocol: {"long_side", "short_side",
# "antialias", "denoise"}. Each of the four moves mIoU: compare numbers of one protocol only.

def protocol_of(model):
    """model.protocol. ValueError: a model that was made by hand has none yet."""
    protocol = model.protocol or {}
    if not {"long_side", "short_side", "antialias", "denoise"} <= protocol.keys():
        raise ValueError("the model does not say how large images are shown to it: set "
                         "model.protocol = {'long_side': 2048, 'short_side': 512, 'antialias': "
                         "False, 'denoise': 0.0}")
    return protocol


def make_protocol(stage, dataset, recipe=None, **given):
    """The .protocol of a model of the stage "rectify" or "distill": the sides it is trained at.

    An image is resized to the largest size within the two sides, pixels (short side 0: not at all);
    antialias: when it is made smaller (datasets.resize_within); denoise: the threshold of
    reclip.strong_classes, 0: off, as released for students.

    dataset: a datasets.DataSet. recipe: None for its default one. given: hyper-parameters that
    differ from the recipe's, by name.
    """
    numbers = dataset.hyper_parameters(recipe) | given
    return {
        "long_side": numbers[f"{stage}_long_side"],
        "short_side": numbers[f"{stage}_short_side"],
        "antialias": dataset.antialias,
        "denoise": numbers["denoise"] if stage == "rectify" else 0.0,
    }


@torch.no_grad()
def predict_mask(model, image, size, background_threshold=0.0, probabilities=False):
    """The mask of one image: float (3, H, W) in [0, 1] -> (H0, W0) uint8, on the CPU.

    model: a ReCLIP or DeepLabV2 in eval mode.
    image: already resized to the sides of model.protocol (datasets.Evaluation does it).
    size: (H0, W0) of the mask that is wanted. mIoU is taken at the size of the truth.
    background_threshold: pixels less probable than this get no class; 0: none.
    probabilities: True adds softmax(scale * M) of each pixel, before any class is dropped.
    -> class indices 0..C-1, IGNORE for pixels below background_threshold;
       with probabilities: (mask, float (C, H0, W0))
    """
    # Which class does each patch resemble?
    seen = image[None].to(model.W_q.device)                             # (1, 3, H, W)
    logits = model(seen).rectified                                      # (1, C, h, w)

    # Logits are enlarged to pixels before the best class is taken: borders then run smoothly
    # through the patches, where a mask of patches would be made of squares.
    mask = segment(
        logits,
        model.output_stride,
        image.shape[1:],
        size,
        model.protocol["denoise"],
        background_threshold,
        model.scale,
    ).cpu()
    if not probabilities:
        return mask

    pixels = model.to_pixels(logits, *image.shape[1:])                  # (1, C, H, W)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return mask, (model.scale * pixels[0]).softmax(0).cpu()             # (C, H0, W0)


def segment_image(model, image, probabilities=False, background_threshold=0.0):
    """The mask of an image: the class of each pixel, (H0, W0) uint8, at the image's own size.

    model: a ReCLIP or DeepLabV2 in eval mode; it keeps how large images are shown to it.
    image: a path; a PIL image, taken as it lies; or a tensor (3, H0, W0), uint8 or float in [0, 1].
    probabilities, background_threshold, and what is returned: as in predict_mask.
    """
    if not isinstance(image, torch.Tensor):
        pixels = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        image = torch.from_numpy(pixels).permute(2, 0, 1)               # uint8 (3, H0, W0)

    protocol = protocol_of(model)
    sides = (protocol["long_side"], protocol["short_side"])
    seen = to_float(resize_within(image, *sides, protocol["antialias"]))
    return predict_mask(model, seen, image.shape[1:], background_threshold, probabilities)


def as_seen(model, split):
    """A datasets.Evaluation over a split: images as the model's .protocol says."""
    protocol = protocol_of(model)
    return Evaluation(
        split, protocol["long_side"], protocol["short_side"], protocol["antialias"]
    )


def predict_split(model, split, title, workers=0):
    """Yields (mask (H0, W0) uint8, truth (H0, W0) uint8, name) of each image of a split, in order.

    title: of the progress line. workers: processes that decode.
    """
    pairs = as_seen(model, split)
    progress = Progress(title, len(pairs))
    # Images of a split differ in size: one at a time, not in batches.
    loader = DataLoader(pairs, batch_size=None, num_workers=workers)
    for i, (image, truth, name) in enumerate(loader):
        yield predict_mask(model, image, truth.shape), truth, name
        progress(i + 1)


# --- A model on a split ---------------------------------------------------------------------------

def evaluate_split(model, dataset, split, split_name, out, beside=(), workers=0):
    """Evaluates a model on a split: prints a table, writes <out>/eval_<stage>.json and .png.

    model: in eval mode; it knows its stage and its protocol.
    dataset: the datasets.DataSet. split: its images and truth (datasets.open_split).
    beside: (model, mIoU) pairs whose masks are drawn beside this one's, each by its own protocol;
        mIoU None: not measured.
    -> the dict of scores
    """
    stage = model.stage
    C = len(model.class_names)
    confusion = torch.zeros(C, C, dtype=torch.int64)
    for mask, truth, _ in predict_split(model, split, f"evaluate {stage}", workers):
        confusion += confusion_matrix(mask, truth, C)
    result = scores(confusion)

    print(f"\n{stage}: {dataset.name} {split_name}, {in_words(model.protocol)}, "
          f"{dataset.background}")
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
        "protocol": facts_of(model) | {
            "data": dataset.name,
            "split": split_name,
            "background": dataset.background,
            "images": len(split),
            "classes_present": result["present"],
        },
    }
    with written_atomically(Path(out) / f"eval_{stage}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")

    examples = draw_examples([*beside, (model, result["miou"])], dataset, split)
    examples.save(Path(out) / f"eval_{stage}.png")
    return result


def in_words(protocol):
    """A model's .protocol in words, for the line above a table."""
    sides = f"images within {protocol['long_side']} x {protocol['short_side']}"
    if not protocol["short_side"]:
        sides = "images of their own size"
    return f"{sides}, denoise {protocol['denoise'] or 'off'}"


def facts_of(model):
    """What a number or a mask depends on, for the JSON files. -> dict"""
    facts = {
        "stage": model.stage,
        **protocol_of(model),
        "class_names": list(model.class_names),
        # Of the tensors, not of the file: torch.save writes the file's name into it.
        "checkpoint_sha256": tensors_sha256(model.learnt()),
    }
    if isinstance(model, ReCLIP):
        facts |= {
            "recipe": model.options.recipe,
            "prompts": list(model.prompts),
            "attention": model.attention.__name__,
            "clip_sha256": model.clip.identity(),
        }
    return facts


def print_scores(result, class_names):
    """The IoU of each class, and below them the mean."""
    for name, iou in zip(class_names, result["iou"]):
        shown = "absent" if math.isnan(iou) else f"{100 * iou:6.1f}"
        print(f"  {name:<28}{shown}")
    print(f"  mIoU {100 * result['miou']:.1f} over the {result['present']} of {len(class_names)} "
          f"classes present; pixel accuracy {100 * result['pixel_accuracy']:.1f}")


# --- Masks as images ------------------------------------------------------------------------------

WHITE = (255, 255, 255)
INK = (30, 30, 30)
GREY = (225, 225, 225)  # pixels that are not evaluated, or have no class
TITLES = {"clip": "CLIP", "rectify": "rectified", "distill": "distilled", "reclip++": "ReCLIP++"}
try:
    FONT = ImageFont.load_default(13)
except TypeError:
    FONT = ImageFont.load_default()  # before Pillow 10.1: one size, and Latin letters alone


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


def draw_grid(rows, titles, entries=(), tile=136, gap=8):
    """Rows of images under the titles of their columns, with a legend below. -> PIL image

    rows: lists of uint8 (3, H, W), of any sizes, one for each title; each is scaled until it fits a
        square of `tile` pixels. entries: as in with_legend.
    """
    step = tile + gap
    canvas = Image.new("RGB", (gap + len(titles) * step, 20 + gap + len(rows) * step), WHITE)
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        pen.text((gap + j * step + (tile - FONT.getlength(title)) / 2, 5), title, INK, FONT)

    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            # Enlarged, every pixel stays a clean square: masks keep their exact colors. Made
            # smaller, pixels are averaged: single ones, picked out, would make a speckled image.
            image = to_pil_image(image)
            method = Image.Resampling.NEAREST
            if max(image.size) > tile:
                method = Image.Resampling.BOX
            square = ImageOps.pad(image, (tile, tile), method, WHITE)
            canvas.paste(square, (gap + j * step, 20 + gap + i * step))
    return with_legend(canvas, entries)


def draw_examples(columns, dataset, split, count=6, among=100):
    """Images of a split with truth and masks, a row each. -> PIL image

    Which images? Of the first `among`, those in which the first and the last column of masks differ
    at the largest share of pixels, for better or worse. Pixels that are not evaluated count as
    equal. With one column: the first ones.

    columns: (model, mIoU for the title or None) pairs. Each model shows masks by its own protocol,
        the one that the mIoU was measured with.
    dataset: a datasets.DataSet, for palette and names. split: as in evaluate_split.
    """
    def mask_of(model, i):
        image, truth, _ = as_seen(model, split)[i]
        return predict_mask(model, image, truth.shape)

    candidates = range(min(among, len(split)))
    difference = {i: 0.0 for i in candidates}  # of each image, the share of its pixels
    if len(columns) > 1:
        progress = Progress("choose examples", len(candidates))
        for i in candidates:
            first = mask_of(columns[0][0], i)
            last = mask_of(columns[-1][0], i)
            differs = (first != last) & (split.truth(i) != IGNORE)      # (H0, W0) bool
            difference[i] = differs.float().mean().item()
            progress(i + 1)

    # Images that differ alike stay in their order.
    chosen = sorted(candidates, key=difference.get, reverse=True)[:count]

    titles = ["image", "truth"]
    for model, miou in columns:
        number = "" if miou is None else f" {100 * miou:.1f}"
        titles.append(TITLES[model.stage] + number)

    rows = []
    for i in chosen:
        truth = split.truth(i)
        row = [split.image(i), color_mask(truth, dataset.palette)]
        for model, _ in columns:
            row.append(color_mask(mask_of(model, i), dataset.palette, truth))
        rows.append(row)
    return draw_grid(rows, titles, zip(dataset.palette, dataset.classes))


def draw_overlay(image, mask, palette, entries, longest=1600):
    """An image under its half transparent mask, with a legend below. -> PIL image

    image: uint8 (3, H0, W0). mask: (H0, W0) uint8; where it is IGNORE the image stays as it is.
    entries: as in with_legend. The image is drawn at most `longest` pixels wide and high; a tiny
    one is enlarged to 320.
    """
    factor = min(longest, max(320, *mask.shape)) / max(mask.shape)
    size = [max(1, round(side * factor)) for side in mask.shape]
    image = resize(image, size, antialias=True)
    mask = resize(mask[None], size, InterpolationMode.NEAREST)          # there is no class 3.5

    mixed = (image.float() + color_mask(mask[0], palette)) / 2          # (3, H, W)
    mixed = torch.where(mask == IGNORE, image, mixed.byte())
    return with_legend(to_pil_image(mixed), entries)


# --- Masks of any images --------------------------------------------------------------------------

def segment_images(model, images, out, probabilities=False, background_threshold=0.0):
    """Masks of images without truth, below <out>/masks/<stage>:

        NAME.index.png      palette PNG of the image's own size; 0 is background, 1..C the classes
        NAME.overlay.png    the image under its mask, with a legend
        NAME.json           the share of the image that each class covers, and the protocol
        NAME.<class>.png    with probabilities: that of each class that was found, 0..255 for 0..1

    model, probabilities, background_threshold: as in segment_image. images: datasets.Folder.
    """
    shown_names = [name.split("|")[0].strip() for name in model.class_names]
    if background_threshold and "background" in shown_names:
        raise ValueError("--background-threshold calls what is no class background, and a class is "
                         "named so too: leave the option out")
    palette = voc_palette()[1:]
    facts = facts_of(model) | {"background_threshold": background_threshold}
    folder = Path(out) / "masks" / model.stage

    progress = Progress("segment", len(images))
    for i, name in enumerate(images.names):
        image = images.image(i)                                         # uint8 (3, H0, W0)
        result = segment_image(model, image, probabilities, background_threshold)
        mask = result[0] if probabilities else result                   # (H0, W0) uint8

        # What was found, the largest first: a class, or IGNORE for the background.
        counts = mask.flatten().bincount(minlength=256)                 # (256,)
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
                color = palette[c]
            areas[found_name] = counts[c].item() / mask.numel()
            values[found_name] = (c + 1) % 256
            entries.append((color, f"{found_name} {100 * areas[found_name]:.1f} %"))

        path = path_below(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(mask, palette, f"{path}.index.png")
        draw_overlay(image, mask, palette, entries).save(f"{path}.overlay.png")
        report = {
            "image": name,
            "size": [image.shape[2], image.shape[1]],
            "areas": areas,
            "index": values,
            "protocol": facts,
        }
        Path(f"{path}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        if probabilities:
            for c in found:
                if c != IGNORE:
                    class_name = re.sub(r'[<>:"/\\|?*]', "_", shown_names[c])
                    levels = (255 * result[1][c]).round().byte()        # (H0, W0)
                    Image.fromarray(levels.numpy()).save(f"{path}.{class_name}.png")
        progress(i + 1)

    print(f"{len(images)} images segmented, {len(images.skipped)} unreadable: {folder}")


def path_below(folder, name):
    """Where the files of an image go: below the folder, even if its name is an absolute path."""
    # A Windows path knows drives and both slashes, on every system. Of C: the letter stays, since
    # two drives may hold images of one name.
    path = PureWindowsPath(name)
    drive = re.sub(r"\W", "", path.anchor)
    parts = [part for part in path.relative_to(path.anchor).parts if part != ".."]
    return folder.joinpath(drive, *parts)


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


# --- Models ---------------------------------------------------------------------------------------

def plain_clip(clip, dataset, recipe=None, attention=maskclip):
    """MaskCLIP, in eval mode: ReCLIP without its two biases, so that M = M_q.

    dataset: a datasets.DataSet, for class names, prompts and protocol.
    recipe: one of the data set's; None: its default. attention: as ReCLIP takes it.
    """
    model = ReCLIP(
        clip,
        dataset.classes,
        prompts=dataset.prompts,
        attention=attention,
        protocol=make_protocol("rectify", dataset, recipe),
        recipe=recipe or next(iter(dataset.recipes)),
        prompt_length=0,
        positional_channels=0,
    )
    model.stage = "clip"
    return model.eval()


def without_biases(model):
    """The plain CLIP that a ReCLIP started from: the same in all but what was learnt."""
    plain = ReCLIP(
        model.clip,
        model.class_names,
        W_q=model.W_q,
        prompts=model.prompts,
        attention=model.attention,
        reading=model.reading,
        protocol=model.protocol,
        recipe=model.options.recipe,
        prompt_length=0,
        positional_channels=0,
    )
    plain.stage = "clip"
    return plain.eval()


def open_model(path, clip=None, device="cpu", stage=None):
    """The model of a checkpoint, in eval mode: a ReCLIP or a DeepLabV2, whichever it holds.

    clip: the CLIP that a rectification was learnt on; None: ReCLIP.load looks for it.
    stage: "rectify" or "distill", if it must be that.
    Errors: FileNotFoundError, ValueError.
    """
    found = read_checkpoint(path, stage)["stage"]
    if found == "reclip++":
        raise ValueError(f"{path} is of ReCLIP++, which extras/plusplus.py evaluates")
    if found == "distill":
        return DeepLabV2.load(path, device)
    return ReCLIP.load(path, clip, device)


# --- Command line ---------------------------------------------------------------------------------

def best_device():
    """The default of --device: a GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def make_parser():
    """The options of the command line, without the checks of what fits together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=["clip", "rectify", "distill"],
        help="what to evaluate (default: what the checkpoint is of, else rectify)")
    add("--checkpoint", type=Path, help="file to evaluate (default: <out>/<stage>.pt)")
    add("--recipe",
        help="with --stage clip: a recipe of the data set (default: its first one); a checkpoint "
        "keeps its own")
    add("--data", help=f"{', '.join(DATA)} (default: shapes)")
    add("--images", nargs="+", type=Path,
        help="segment these images or folders of images instead of a data set")
    add("--classes",
        help="with --stage clip --images: 'cat, dog | puppy', or a file with one class a line")
    add("--split", help="split to evaluate on (default: val)")
    add("--root", default="data",
        help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--clip",
        help=f"{', '.join(MODELS)}, or a weights file (default: the checkpoint's, the data set's)")
    add("--exact-gelu", action="store_true",
        help="the file of --clip was trained with GELU (LAION's), not OpenAI's QuickGELU")
    add("--prompts", type=Path,
        help="with --stage clip: file with templates of the Query, one a line, {} for the name "
        "(default: the data set's)")
    add("--out", type=Path,
        help="where results go (default: the folder of --checkpoint, else runs/<data>)")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--denoise", type=float,
        help="drop classes whose best probability is below; 0: off (default: the checkpoint's)")
    add("--long-side", type=int,
        help="images are resized to the largest size within --long-side x --short-side, pixels "
        "(default: the checkpoint's)")
    add("--short-side", type=int,
        help="pixels; 0: images keep their size (default: the checkpoint's)")
    add("--background-threshold", type=float, default=0.0,
        help="with --images: pixels less probable than this are background (default: 0, off)")
    add("--probabilities", action="store_true",
        help="with --images: also an image of the probability of each class that was found")
    return parser


def parse_arguments(argv=None):
    """The command line. ValueError: options that do not go together."""
    args = make_parser().parse_args(argv)
    if args.checkpoint and args.stage == "clip":
        raise ValueError("--checkpoint goes with --stage rectify and distill; plain CLIP has none")
    for name in ("classes", "prompts", "recipe"):
        if getattr(args, name) and args.stage != "clip":
            raise ValueError(f"--{name} goes with --stage clip; a checkpoint keeps its own")
    for name in ("classes", "background_threshold", "probabilities"):
        if getattr(args, name) and not args.images:
            raise ValueError(f"--{name.replace('_', '-')} goes with --images")
    if args.exact_gelu and not args.clip:
        raise ValueError("--exact-gelu speaks of the file of --clip: give both")
    if args.split and args.images:
        raise ValueError("--split goes with a data set, not with --images")

    for name in ("denoise", "background_threshold"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a probability, between 0 and 1")

    args.data = args.data or ("images" if args.images else "shapes")
    # Results go beside the checkpoint; a checkpoint that is not named lies beside the results.
    if args.out is None and args.checkpoint:
        args.out = args.checkpoint.parent
    if args.out is None:
        args.out = Path("runs") / Path(args.data).resolve().name
    if args.checkpoint is None:
        args.checkpoint = args.out / f"{args.stage or 'rectify'}.pt"

    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    return args


def find_dataset(args):
    """The DataSet to evaluate on, or whose classes plain CLIP looks for in your own images."""
    if args.classes:
        dataset = own_images("images", read_classes(args.classes))
    elif args.data in DATA:
        dataset = DATA[args.data]
    elif args.images:
        raise ValueError("--images needs --classes 'cat, dog' with --stage clip")
    else:
        raise ValueError(f"--data {args.data} is none of {', '.join(DATA)}; your own images have "
                         "no truth to evaluate on: --images draws their masks")
    if args.prompts:
        dataset = replace(dataset, prompts=tuple(read_lines(args.prompts)))
    return dataset


def main(argv=None):
    args = parse_arguments(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # more would stall where another program needs a core

    # Images first: if they are missing, that is said before CLIP is loaded or fetched.
    if args.stage == "clip" or not args.images:
        dataset = find_dataset(args)
    if args.images:
        images = Folder(*args.images)
    else:
        split_name = args.split or dataset.splits[0]
        if split_name not in dataset.splits:
            raise ValueError(f"--split {split_name}: {args.data} has {', '.join(dataset.splits)}")
        split = open_split(args.data, args.root, split_name)

    clip = None
    if args.clip or args.stage == "clip":
        clip = load_clip(args.clip or dataset.clip, args.device, not args.exact_gelu)
    if args.stage == "clip":
        model = plain_clip(clip, dataset, args.recipe)
    else:
        model = open_model(args.checkpoint, clip, args.device, args.stage)

    for name in ("long_side", "short_side", "denoise"):
        value = getattr(args, name)
        if value is not None:
            model.protocol = (model.protocol or {}) | {name: value}

    if args.images:
        segment_images(model, images, args.out, args.probabilities, args.background_threshold)
        return
    if model.class_names != dataset.classes:
        raise ValueError(f"{args.checkpoint} was made for other classes than those of {args.data}: "
                         f"{', '.join(model.class_names)}")
    beside = []  # of a rectified CLIP, plain CLIP's masks are drawn beside
    if model.stage == "rectify":
        beside.append((without_biases(model), None))
    evaluate_split(model, dataset, split, split_name, args.out, beside, args.workers)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # names in a script that the terminal cannot print
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")
