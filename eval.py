"""Evaluation: mIoU on a data set, and masks of any images.

    python eval.py --stage rectify --data shapes --split test
    python eval.py --stage clip    --data voc --root DIR      (the MaskCLIP baseline, same code)
    python eval.py --stage rectify --images photos/ --checkpoint runs/photos/rectify.pt

What stands here
    confusion_matrix, scores       mIoU
    Protocol, slide, predict_mask  from one image to its mask
    predict_split, evaluate_stage  a model on a whole split
    color_mask, draw_grid, ...     images of masks
    segment_images                 masks of your own images
    main                           the command line

Symbols: C classes; (H, W) size of the image that the network sees, (H0, W0) size of the mask;
M logits (1, C, h, w).

Alone, confusion_matrix and scores need no more than torch and IGNORE:
    confusion = sum(confusion_matrix(mask, truth, 20) for mask, truth in results)
    print(scores(confusion)["miou"])
"""

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype, to_pil_image
from torchvision.utils import draw_segmentation_masks, make_grid

from clip_model import ATTENTIONS, load_clip, written_atomically
from datasets import (
    DATA,
    IGNORE,
    Evaluation,
    Folder,
    Progress,
    open_split,
    own_facts,
    read_classes,
    resize_short_side,
)
from deeplab import DeepLabV2
from reclip import PROMPTS, ReCLIP, segment

# stage: (which part of the model's Logits is the answer, the title of its masks)
STAGE_PARTS = {
    "clip": ("query", "CLIP"),
    "rectify": ("rectified", "rectified"),
    "distill": ("rectified", "distilled"),
}


# --- mIoU -----------------------------------------------------------------------------------------

def confusion_matrix(prediction, truth, classes):
    """Counts of pixels, (C, C) int64: row = truth, column = prediction, both (H, W) class indices.

    Pixels whose truth is IGNORE do not count. Matrices of images may be added: mIoU is taken of the
    sum, over all pixels of the split, and not image by image.
    """
    valid = truth != IGNORE
    pair = truth[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pair, minlength=classes ** 2).reshape(classes, classes)


def scores(confusion):
    """(C, C) counts -> {"miou", "iou", "present", "pixel_accuracy"}, fractions of 1.

    IoU of a class: pixels that are of it and are called so, over pixels that are either. iou
    holds C of them, nan where a class never occurs in the truth; miou is the mean over the
    classes that do (present of them). The released code counts absent classes as 0.
    """
    confusion = confusion.double()
    hit = confusion.diagonal()                                          # (C,)
    truth = confusion.sum(1)
    predicted = confusion.sum(0)
    iou = torch.where(truth > 0, hit / (truth + predicted - hit), torch.nan)
    return {
        "miou": iou.nanmean().item(),
        "iou": iou.tolist(),
        "present": int((truth > 0).sum()),
        "pixel_accuracy": (hit.sum() / truth.sum()).item(),
    }


# --- From an image to its mask --------------------------------------------------------------------

@dataclass(frozen=True)
class Protocol:
    """How an image becomes a mask; without it a number means nothing."""
    short_side: int                    # pixels; images are resized to it, 0: their own size
    window: int = 0                    # side of a sliding window, pixels; 0: whole images
    stride: int = 224                  # from one window to the next, pixels
    denoise: float = 0.0               # classes nowhere this probable are dropped
    background_threshold: float = 0.0  # pixels less probable than this get no class; 0: none

    def describe(self):
        seen = "whole images"
        if self.window:
            seen = f"windows of {self.window}, stride {self.stride}"
        return f"short side {self.short_side}, {seen}, denoise {self.denoise or 'off'}"


def window_starts(cells, window, stride):
    """First cells of windows that cover a row of cells; the last one ends where the row does."""
    last = max(cells - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def slide(model, part, image, window, stride):
    """Logits of a large image from overlapping windows: (1, 3, H, W) -> (1, C, h, w).

    Each window of `window` pixels sees its part alone, at a size that CLIP is used to; where
    windows overlap their logits are averaged. Windows start at whole cells, so that all share
    the grid that the whole image would have: memory does not grow with the number of pixels.

    part: name of the Logits that are wanted. window, stride: multiples of model.output_stride.
    """
    side = model.output_stride
    if window % side or stride % side:
        raise ValueError(f"window {window} and stride {stride} must be multiples of {side}, the "
                         "pixels from one cell of this model's grid to the next")
    h = -(-image.shape[2] // side)
    w = -(-image.shape[3] // side)
    size = window // side
    step = stride // side

    total = None
    count = image.new_zeros(h, w)
    for i in window_starts(h, size, step):
        for j in window_starts(w, size, step):
            seen = image[..., i * side:(i + size) * side, j * side:(j + size) * side]
            logits = getattr(model(seen), part)                         # (1, C, size or less, same)
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], h, w)
            total[..., i:i + size, j:j + size] += logits
            count[i:i + size, j:j + size] += 1
    return total / count


@torch.no_grad()
def predict_mask(model, stage, image, size, protocol):
    """float (3, H, W) in [0, 1] -> its mask at size (H0, W0), uint8, on the CPU."""
    part = STAGE_PARTS[stage][0]
    seen = image[None].to(model.W_q.device)                             # (1, 3, H, W)
    if protocol.window:
        logits = slide(model, part, seen, protocol.window, protocol.stride)
    else:
        logits = getattr(model(seen), part)                             # (1, C, h, w)
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
    """Yields (mask (H0, W0), truth (H0, W0), name) of each image of a datasets.Evaluation."""
    progress = Progress(title, len(dataset))
    loader = DataLoader(dataset, None, num_workers=workers)
    for i, (image, truth, name) in enumerate(loader):
        yield predict_mask(model, stage, image, truth.shape, protocol), truth, name
        progress(i + 1)


# --- A model on a split ---------------------------------------------------------------------------

def protocol_facts(model, stage, facts, protocol):
    """Everything without which a number or a mask means nothing, for the JSON files."""
    return {
        "data": facts.name,
        "stage": stage,
        "short_side": protocol.short_side,
        "window": protocol.window,
        "stride": protocol.stride if protocol.window else 0,
        "denoise": protocol.denoise,
        "background": facts.background,
        "class_names": list(model.class_names),
        "attention": model.settings.get("attention"),
        "clip_sha256": model.clip.sha256 if stage != "distill" else None,
    }


def evaluate_stage(
    model, stage, facts, split_name, dataset, protocol, out, others=(), workers=0
):
    """Evaluates a model on a split; prints a table, writes <out>/eval_<stage>.json and .png.

    stage: a key of STAGE_PARTS. facts: datasets.DataFacts. dataset: datasets.Evaluation.
    others: (model, stage) pairs whose masks stand beside this one's in the picture.
    -> the dict of scores
    """
    C = len(model.class_names)
    confusion = torch.zeros(C, C, dtype=torch.int64)
    for mask, truth, _ in predict_split(
        model, stage, dataset, protocol, f"evaluate {stage}", workers
    ):
        confusion += confusion_matrix(mask, truth, C)
    result = scores(confusion)

    print(f"\n{stage}: {facts.name} {split_name}, {protocol.describe()}, {facts.background}")
    print_scores(result, model.class_names)

    report = {
        "miou": result["miou"],
        "pixel_accuracy": result["pixel_accuracy"],
        "confusion": confusion.tolist(),
        "iou": {},
        "protocol": protocol_facts(model, stage, facts, protocol),
    }
    for name, iou in zip(model.class_names, result["iou"]):
        report["iou"][name] = iou if iou == iou else None  # nan, an absent class, is no JSON
    report["protocol"] |= {
        "split": split_name,
        "pictures": len(dataset),
        "classes_present": result["present"],
        "checkpoint_sha256": model.fingerprint() if stage != "clip" else None,
    }
    with written_atomically(out / f"eval_{stage}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))

    columns = [*others, (model, stage)]
    draw_examples(columns, dataset, facts, protocol).save(out / f"eval_{stage}.png")
    return result


def print_scores(result, class_names):
    """The IoU of each class in two columns, and the mean."""
    cells = []
    for name, iou in zip(class_names, result["iou"]):
        shown = f"{100 * iou:6.1f}" if iou == iou else "absent"
        cells.append(f"  {name:<16}{shown}")
    for left, right in zip_longest(cells[::2], cells[1::2], fillvalue=""):
        print(f"{left:<28}{right}")
    print(f"  mIoU {100 * result['miou']:.1f} over the {result['present']} of {len(class_names)} "
          f"classes present; pixel accuracy {100 * result['pixel_accuracy']:.1f}")


# --- Images of masks ------------------------------------------------------------------------------

WHITE = (255, 255, 255)
INK = (30, 30, 30)
GREY = (225, 225, 225)  # pixels that are not evaluated, or have no class
FONT = ImageFont.load_default(13)


def color_mask(mask, palette, truth=None):
    """Class indices (H, W) -> colors uint8 (3, H, W).

    IGNORE is grey; with truth given, so are the pixels that are not evaluated: whatever a model
    says there is neither right nor wrong, and would hide what is.
    """
    table = torch.tensor([*palette, *[GREY] * (256 - len(palette))], dtype=torch.uint8)   # (256, 3)
    if truth is not None:
        mask = torch.where(truth == IGNORE, IGNORE, mask)
    return table[mask.long()].permute(2, 0, 1)


def with_legend(image, entries):
    """A PIL image with a legend below. entries: (color, text); of synonyms the first is shown."""
    entries = [(color, text.split("|")[0].strip()) for color, text in entries]
    widths = [int(FONT.getlength(text)) for _, text in entries]
    cell = 34 + max(widths, default=0)
    columns = max(1, image.width // cell)
    lines = -(-len(entries) // columns)

    canvas = Image.new("RGB", (max(image.width, cell), image.height + 6 + 20 * lines), WHITE)
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    for i, (color, text) in enumerate(entries):
        x = 6 + i % columns * cell
        y = image.height + 4 + i // columns * 20
        pen.rectangle([x, y + 2, x + 12, y + 14], tuple(color), INK)
        pen.text((x + 18, y), text, INK, FONT)
    return canvas


def into_tile(image, tile):
    """uint8 (3, H, W) -> (3, tile, tile): scaled to fit, in the middle of white."""
    factor = tile / max(image.shape[1:])
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    image = resize(image, size, InterpolationMode.NEAREST)  # masks keep their colors
    right, below = tile - size[1], tile - size[0]
    return F.pad(image, (right // 2, right - right // 2, below // 2, below - below // 2), value=255)


def draw_grid(rows, titles, entries=(), tile=136, gap=8):
    """rows: lists of uint8 (3, H, W), one per title; entries: the legend. -> PIL image"""
    tiles = [into_tile(image, tile) for row in rows for image in row]
    grid = make_grid(tiles, nrow=len(titles), padding=gap, pad_value=255)
    canvas = Image.new("RGB", (grid.shape[2], grid.shape[1] + 20), WHITE)
    canvas.paste(to_pil_image(grid), (0, 20))
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((gap + tile / 2 + column * (tile + gap), 5), title, INK, FONT, "ma")
    return with_legend(canvas, entries)


def draw_examples(columns, dataset, facts, protocol, count=6):
    """The first images of a split (not the best): image, truth, masks of each (model, stage)."""
    titles = ["image", "truth"]
    for _, stage in columns:
        titles.append(STAGE_PARTS[stage][1])

    rows = []
    for i in range(min(count, len(dataset))):
        image, truth, _ = dataset[i]
        row = [to_dtype(image, torch.uint8, scale=True), color_mask(truth, facts.palette)]
        for model, stage in columns:
            mask = predict_mask(model, stage, image, truth.shape, protocol)
            row.append(color_mask(mask, facts.palette, truth))
        rows.append(row)
    return draw_grid(rows, titles, zip(facts.palette, facts.classes))


def draw_overlay(image, mask, palette, entries, longest=1600):
    """image uint8 (3, H, W) under its mask (H, W), with a legend; `longest` pixels at most."""
    factor = min(longest, max(320, *mask.shape)) / max(mask.shape)
    size = [max(1, round(side * factor)) for side in mask.shape]
    image = resize(image, size, antialias=True)
    mask = resize(mask[None], size, InterpolationMode.NEAREST)[0]

    found = [c for c in mask.unique().tolist() if c != IGNORE]
    if found:
        masks = torch.stack([mask == c for c in found])                 # (found, H, W)
        image = draw_segmentation_masks(image, masks, 0.5, [tuple(palette[c]) for c in found])
    return with_legend(to_pil_image(image), entries)


# --- Masks of any images --------------------------------------------------------------------------

def segment_images(model, stage, facts, images, protocol, out):
    """Three files per image below <out>/masks: NAME.index.png, NAME.overlay.png and NAME.json.

    The index PNG has the image's own size: 0 is background, 1..C are the classes.
    images: datasets.Folder. facts: its palette colors the classes.
    """
    progress = Progress("segment", len(images))
    for i, name in enumerate(images.names):
        image = images.image(i)                                         # uint8 (3, H0, W0)
        resized = resize_short_side(image, protocol.short_side)
        seen = to_dtype(resized, torch.float32, scale=True)             # (3, H, W)
        mask = predict_mask(model, stage, seen, image.shape[1:], protocol)

        counts = mask.flatten().bincount(minlength=256).double()
        areas = (counts / mask.numel()).tolist()
        found = [c for c in range(256) if areas[c]]
        found.sort(key=areas.__getitem__, reverse=True)
        names = {}
        for c in found:
            names[c] = "background" if c == IGNORE else model.class_names[c].split("|")[0].strip()

        inside = [part for part in Path(name).parts if part not in ("..", "/")]
        path = out / "masks" / Path(*inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(mask, facts.palette, f"{path}.index.png")

        entries = []
        for c in found:
            color = GREY if c == IGNORE else facts.palette[c]
            entries.append((color, f"{names[c]} {100 * areas[c]:.1f} %"))
        draw_overlay(image, mask, facts.palette, entries).save(f"{path}.overlay.png")

        report = {
            "picture": name,
            "size": [image.shape[2], image.shape[1]],
            "areas": {names[c]: areas[c] for c in found},
            "index": {names[c]: (c + 1) % 256 for c in found},
            "background_threshold": protocol.background_threshold,
            "protocol": protocol_facts(model, stage, facts, protocol),
        }
        Path(f"{path}.json").write_text(json.dumps(report, indent=1))
        progress(i + 1)
    print(f"{len(images)} images segmented, {len(images.skipped)} unreadable: {out / 'masks'}")


def save_index(mask, palette, path):
    """Class indices (H, W) as a palette PNG: 0 background (IGNORE + 1 as a byte), 1..C classes."""
    index = Image.fromarray((mask + 1).numpy())
    colors = [0, 0, 0]
    for color in palette:
        colors += color
    index.putpalette(colors)
    index.save(path)


# --- Command line ---------------------------------------------------------------------------------

def open_model(stage, path, facts, clip_name=None, device="cpu", attention="maskclip"):
    """What a stage names, in eval mode: the checkpoint at path, or for "clip" the plain CLIP."""
    clip = None  # where the checkpoint found it
    if stage == "clip" or clip_name:
        clip = load_clip(clip_name or facts.clip, device)
    if stage == "clip":
        prompts = facts.prompts or PROMPTS
        return ReCLIP(
            clip,
            facts.classes,
            prompts=prompts,
            prompt_length=0,
            positional_channels=0,
            attention=attention,
        ).eval()

    if stage == "distill":
        model = DeepLabV2.load(path, device)
    else:
        model = ReCLIP.load(path, clip, device)
    if facts.classes not in ((), model.class_names):
        raise ValueError(f"{path} was made for other classes than are asked for: "
                         f"{', '.join(model.class_names)}")
    return model


def parse_arguments(argv=None):
    """The command line as (args, facts of the data set, protocol). ValueError: it does not fit."""
    best_device = "cpu"
    if torch.backends.mps.is_available():
        best_device = "mps"
    if torch.cuda.is_available():
        best_device = "cuda"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=[*STAGE_PARTS, "paper"], default="rectify",
        metavar="{clip,rectify,distill}", help="what to evaluate (default: rectify)")
    add("--checkpoint", type=Path, help="file to evaluate (default: <out>/<stage>.pt)")
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
    add("--clip", help="'ViT-B/16' or a weights file (default: the data set's)")
    add("--out", type=Path, help="where checkpoints are and results go (default: runs/<data>)")
    add("--device", default=best_device, help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--denoise", type=float,
        help="drop classes whose best probability is below; 0: off (default: as released)")
    add("--short-side", "--short_side", type=int,
        help="pixels; 0: own size (default: the data set's)")
    add("--window", type=int, default=0,
        help="slide a window of this side over the image, pixels; 0: whole images")
    add("--stride", type=int,
        help="from window to window, pixels (default: 224, at most the window)")
    add("--background-threshold", "--background_threshold", type=float, default=0.0,
        help="with --images: pixels less probable than this are background (default: 0, off)")
    args = parser.parse_args(argv)

    if args.stage == "paper":
        raise ValueError("--stage paper is a program of its own now: python tests/paper.py")
    if args.attention and args.stage != "clip":
        raise ValueError("--attention goes with --stage clip; a checkpoint keeps its own")
    if not 0 <= args.background_threshold <= 1 or (args.background_threshold and not args.images):
        raise ValueError(f"--background-threshold {args.background_threshold} must lie in 0..1 and "
                         "goes with --images")
    knows_model = args.classes if args.stage == "clip" else (args.checkpoint or args.out)
    if args.images and not (args.data or knows_model):
        raise ValueError("--images needs --classes 'cat, dog' with --stage clip, else --checkpoint "
                         "runs/NAME/STAGE.pt")
    if args.out is None and args.images and args.checkpoint:
        args.out = args.checkpoint.parent

    facts = find_facts(args)
    args.split = args.split or (facts.splits[0] if facts.splits else None)
    if args.split not in (None, *facts.splits):
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(facts.splits)}")
    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    protocol = find_protocol(args, facts)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} is not available here ({reason})") from None
    return args, facts, protocol


def find_facts(args):
    """Facts of the data set, or of your own images; their classes may be left to the checkpoint."""
    args.data = args.data or ("pictures" if args.images else "shapes")
    if not args.images:
        if args.data in DATA and args.classes:
            raise ValueError(f"--classes goes with your own images; {args.data} has its own "
                             "classes")
        if args.data not in DATA and not Path(args.data).is_dir():
            raise ValueError(f"--data {args.data} is neither a folder of images nor one of "
                             f"{', '.join(DATA)}")
        if args.data not in DATA and not args.classes:
            raise ValueError(f"--data {args.data} needs --classes 'cat, dog, grass', or a file "
                             "with one class a line")
    if args.classes:
        return own_facts(args.data, read_classes(args.classes))
    return DATA.get(args.data) or own_facts(args.data, ())


def find_protocol(args, facts):
    """The data set's protocol, with what the command line changes."""
    short_side = facts.short_side if args.short_side is None else args.short_side
    denoise = facts.denoise if args.denoise is None else args.denoise
    stride = min(224, args.window) if args.stride is None else args.stride
    if not 0 <= denoise <= 1:
        raise ValueError(f"--denoise {denoise}: a probability between 0 and 1")
    if args.window < 0 or short_side < 0 or (args.window and not 0 < stride <= args.window):
        raise ValueError(f"--short-side {short_side} --window {args.window} --stride {stride}: "
                         "none below 0, and --stride not larger than --window")
    return Protocol(short_side, args.window, stride, denoise, args.background_threshold)


def main(argv=None):
    args, facts, protocol = parse_arguments(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # as in train.py: tensors this small stall on shared cores

    # Missing files are named before CLIP is loaded.
    if args.images:
        images = Folder(*args.images)
    else:
        split = open_split(args.data, args.root, args.split, args.download)
    path = args.checkpoint or args.out / f"{args.stage}.pt"
    model = open_model(
        args.stage, path, facts, args.clip, args.device, args.attention or "maskclip"
    )
    if not facts.classes:
        facts = own_facts(args.data, model.class_names)

    if args.images:
        segment_images(model, args.stage, facts, images, protocol, args.out)
        return
    if not facts.splits:
        raise ValueError(f"{args.data} has no labels to evaluate on; eval.py --images {args.data} "
                         "draws its masks")

    others = []
    teacher_path = args.out / "rectify.pt"
    if args.stage == "rectify":
        others = [(model, "clip")]
    elif args.stage == "distill" and teacher_path.is_file():
        teacher = open_model("rectify", teacher_path, facts, args.clip, args.device)
        others = [(teacher, "clip"), (teacher, "rectify")]
    dataset = Evaluation(split, protocol.short_side)
    evaluate_stage(
        model, args.stage, facts, args.split, dataset, protocol, args.out, others, args.workers
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
