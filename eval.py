"""Evaluation: mIoU from one confusion matrix, masks of your own pictures, and the paper's tables and figures.

    python eval.py --stage rectify --data shapes --split test
    python eval.py --stage clip --data voc --root DIR          (the MaskCLIP baseline, same code)
    python eval.py --stage rectify --images photos/ --checkpoint runs/photos/rectify.pt
    python eval.py --stage paper --data shapes                 (Sec. 4, from what train.py --stage paper left)

What stands here
    confusion_matrix, scores, distance_counts, most_confused    mIoU, and the numbers behind Figures 1(a) and 1(b)
    segmenter, predictions   the command line as a function from picture to mask; the masks of a whole split
    draw_...                 masks, overlays, curves, matrices and heat maps, drawn with Pillow
    Progress                 one line that tells how far a loop is
    report_paper             tables and figures of Sec. 4 from checkpoints

Symbols: C classes; (H, W) size of the picture that the network sees, (H0, W0) of the label; M logits (1, C, h, w)

It sits on top of the other files; alone, confusion_matrix and scores need no more than torch and IGNORE:
    confusion = sum(confusion_matrix(mask, label, 20) for mask, label in results)
    print(scores(confusion)["miou"])
"""

import argparse
import csv
import json
import sys
import time
from contextlib import suppress
from itertools import accumulate, combinations, count, pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_dtype, to_pil_image

from clip_model import ATTENTIONS, load_clip, sha256_of, written_atomically
from datasets import (DATA, IGNORE, Evaluation, Folder, Thumbnails, open_split, own_facts, read_classes,
                      resize_short_side)
from deeplab import DeepLabV2, linear_classification
from reclip import PROMPTS, ReCLIP, segment, slide


# --- Numbers ------------------------------------------------------------------------------------------------

def confusion_matrix(prediction, label, classes):
    """(H, W) int, (H, W) int with IGNORE -> (C, C) int64; row = truth, column = prediction."""
    valid = label != IGNORE
    index = label[valid].long() * classes + prediction[valid].long()
    return torch.bincount(index, minlength=classes ** 2).reshape(classes, classes)


def scores(confusion):
    """miou (mean over the classes that occur in the truth), iou (C,) with nan for those that do not,
    pixel_accuracy, present (how many occur); fractions of 1. The released code counts absent classes as 0."""
    confusion = confusion.double()
    hit, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = torch.where(truth > 0, hit / (truth + predicted - hit), torch.nan)
    return {"miou": iou.nanmean().item(), "iou": iou.tolist(), "present": int((truth > 0).sum()),
            "pixel_accuracy": (hit.sum() / truth.sum()).item()}


def distance_counts(prediction, label, classes, edges):
    """Figure 1(a), one picture: (H, W) int, (H, W) int with IGNORE -> (bins, C, 2) int64, intersection and union.
    A class's pixels are one object; its centroid's distance to the picture's centre (0 .. 1 corner) picks a bin of
    `edges` (bins + 1, rising; the outer bins take what lies beyond). Pictures without the class do not count for it."""
    counts = torch.zeros(len(edges) - 1, classes, 2, dtype=torch.int64)
    centre, valid = torch.tensor(label.shape).double() / 2, label != IGNORE
    for c in label[valid].unique().tolist():
        truth, guess = label == c, (prediction == c) & valid
        centroid = truth.nonzero().double().mean(0) + 0.5  # (2,) y, x; a pixel's centre is half a pixel in
        distance = ((centroid - centre).norm() / centre.norm()).item()
        place = sum(distance >= edge for edge in edges[1:-1])
        counts[place, c] = torch.stack([(truth & guess).sum(), (truth | guess).sum()])
    return counts


def distance_miou(counts):
    """(bins, C, 2), summed over pictures -> (bins,) mean IoU of the classes seen in that bin, nan if there is none"""
    return (counts[..., 0].double() / counts[..., 1]).nanmean(1)  # 0 / 0 is nan: the class has no object in the bin


def most_confused(confusion, k=6):
    """(C, C) counts -> the min(k, C) classes most confused with each other, rising; k >= 2. Greedy: pairs by falling
    c_ij + c_ji (shares of the truth), as long as they fit; classes that never occur come last."""
    share = confusion / confusion.sum(1, keepdim=True)
    mutual, chosen = (share + share.T).nan_to_num(-1), set()
    for pair in sorted(combinations(range(len(mutual)), 2), key=lambda pair: -mutual[pair].item()):
        chosen = chosen.union(pair) if len(chosen.union(pair)) <= k else chosen
    return sorted(chosen)


def segmenter(args, model, stage, background=0.0):
    """What the command line asks for as one function: picture float (3, H, W) in [0, 1], (H0, W0) -> mask (H0, W0)
    uint8, on the CPU. background: as for reclip.segment."""
    if args.window % model.cell or args.window and args.stride % model.cell:
        raise ValueError(f"--window {args.window} --stride {args.stride}: both must be multiples of {model.cell}, the "
                         f"side of a cell of this model's grid")
    logits_of = lambda seen: getattr(model(seen), STAGES[stage][0])             # (1, 3, H, W) -> (1, C, h, w)

    def mask_of(picture, label_size):
        seen = picture[None].to(args.device)
        logits = slide(logits_of, seen, model.cell, args.window, args.stride) if args.window else logits_of(seen)
        return segment(logits, model.cell, picture.shape[1:], label_size, args.denoise, background, model.scale).cpu()
    return mask_of


@torch.no_grad()
def predictions(args, model, stage, dataset, title):
    """Mask and label of each picture of a split, (H0, W0) uint8 both, on the CPU; title: for the progress line."""
    mask_of, progress = segmenter(args, model, stage), Progress(title, len(dataset))
    for i, (picture, label, _) in enumerate(DataLoader(dataset, None, num_workers=args.workers)):
        yield mask_of(picture, label.shape), label
        progress(i + 1)


# --- Pictures and progress ----------------------------------------------------------------------------------

PAPER, INK, UNSEEN = (255, 255, 255), (30, 30, 30), (225, 225, 225)  # background, text, ignored pixels
FONT = ImageFont.load_default(13)


def colour_mask(mask, palette):
    """(H, W) int class indices, IGNORE or 0..C-1 -> RGB picture"""
    table = np.array([*palette, *[UNSEEN] * (256 - len(palette))], np.uint8)
    return Image.fromarray(table[np.asarray(mask)])


def below(image, entries):
    """The image with a legend under it; entries: (colour, text) pairs, of synonyms the first is shown."""
    entries = [(colour, text.split("|")[0]) for colour, text in entries]
    cell = 34 + max((int(FONT.getlength(text)) for _, text in entries), default=0)
    columns = max(1, image.width // cell)
    canvas = Image.new("RGB", (max(image.width, cell), image.height + 6 + -(-len(entries) // columns) * 20), PAPER)
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(entries):
        x, y = 6 + i % columns * cell, image.height + 4 + i // columns * 20
        pen.rectangle([x, y + 2, x + 12, y + 14], tuple(colour), INK)
        pen.text((x + 18, y), text, INK, FONT)
    return canvas


def draw_grid(rows, entries=(), tile=136, gap=8):
    """rows: lists of (title, RGB picture), each fitted into a tile below its title; entries: the legend under all."""
    rows = [[(title, ImageOps.contain(image, (tile, tile), Image.BOX)) for title, image in row] for row in rows]
    tops = [*accumulate((20 + gap + max(image.height for _, image in row) for row in rows), initial=0)]
    canvas = Image.new("RGB", (gap + max(map(len, rows)) * (tile + gap), tops[-1]), PAPER)
    for row, top in zip(rows, tops):
        for (title, image), left in zip(row, count(gap, tile + gap)):
            ImageDraw.Draw(canvas).text((left + tile / 2, top + 3), title, INK, FONT, "ma")
            canvas.paste(image, (left + (tile - image.width) // 2, top + 20))
    return below(canvas, entries)


def draw_overlay(picture, mask, palette, entries):
    """picture uint8 (3, H, W) under its mask (H, W), outlined, legend below; at most 1600 pixels wide or high."""
    scale = min(1600, max(320, *mask.shape)) / max(mask.shape)
    size = [max(1, round(side * scale)) for side in reversed(mask.shape)]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(size, Image.BICUBIC)
    indices = Image.fromarray(mask.numpy()).resize(size, Image.NEAREST)
    index = np.array(indices)
    blended = Image.blend(image, colour_mask(index, palette), 0.5)
    image.paste(blended, mask=Image.fromarray(index != IGNORE))  # the background stays as it is
    image.paste(INK, mask=Image.fromarray(index != np.array(indices.filter(ImageFilter.MaxFilter(3)))))
    return below(image, entries)


class Progress:
    """Progress("eval", 1449)(12) shows step, rate and time left: in place on a terminal, now and then in a log."""

    def __init__(self, name, total, first=0, per_step=1):
        self.name, self.total, self.first, self.per_step = name, total, first, per_step
        self.began, self.shown, self.terminal = time.perf_counter(), 0.0, sys.stderr.isatty()

    def __call__(self, step, extra=""):
        now = time.perf_counter()
        if step < self.total and now - self.shown < (0.2 if self.terminal else 15):
            return
        self.shown = now
        rate = (step - self.first) / max(now - self.began, 1e-9)
        left = int((self.total - step) / rate) if rate else 0
        line = (f"{self.name}  {step}/{self.total}  {extra}{rate * self.per_step:.1f} pictures/s  "
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        end = "\n" if step >= self.total or not self.terminal else ""
        print(("\r\x1b[K" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)


# --- Figures: with Pillow alone ------------------------------------------------------------------------------

VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
SERIES = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)]  # Okabe-Ito


def heat_map(values, low, high):
    """(h, w) -> RGB picture, one pixel a value; brightness rises from low to high"""
    place = (values.cpu().double() - low) / max(high - low, 1e-12)                                       # (h, w)
    colours = np.stack([np.interp(place, np.linspace(0, 1, len(VIRIDIS)), ramp) for ramp in VIRIDIS.T], -1)
    return Image.fromarray(colours.round().astype(np.uint8))


def draw_matrices(confusions, names, titles, high=30):
    """Figure 1(b), one below the other. confusions: (k, k) counts, shown in percent of the row, the truth."""
    names, k = [name.split("|")[0] for name in names], len(names)
    wide, step = round(max(map(FONT.getlength, names))) + 20, high * (k + 2) + 14
    canvas = Image.new("RGB", (max((k + 1) * wide + 8, 360), len(titles) * step), PAPER)
    pen = ImageDraw.Draw(canvas)
    for confusion, title, top in zip(confusions, titles, count(2 * high, step)):
        percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # (k, k)
        canvas.paste(heat_map(percent, 0, 100).resize((k * wide, k * high), Image.NEAREST), (wide, top))
        pen.text((8, top - 1.5 * high), f"{title}: truth by line, prediction by column, percent", INK, FONT, "lm")
        for i, name, row in zip(count(), names, percent.tolist()):
            middle = top + (i + 0.5) * high
            pen.text((wide - 8, middle), name, INK, FONT, "rm")
            pen.text(((i + 1.5) * wide, top - 0.5 * high), name, INK, FONT, "mm")
            for j, value in enumerate(row):  # white on the scale's dark half
                pen.text(((j + 1.5) * wide, middle), f"{value:.0f}", PAPER if value < 45 else INK, FONT, "mm")
    return canvas


def draw_curves(curves, x, title, x_label):
    """curves: {name: as many y in percent as x in 0 .. 1, nan = gap}"""
    left, top, right, bottom = 44, 34, 484, 294  # the axes, pixels
    seen = [y for ys in curves.values() for y in ys if y == y] or [0]
    low = 10 * int(min(seen) // 10)
    high = max(low + 10, -10 * int(-max(seen) // 10))
    across, up = (lambda v: left + v * (right - left)), (lambda v: bottom - (v - low) / (high - low) * (bottom - top))
    canvas = Image.new("RGB", (right + 24, bottom + 52), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text(((left + right) / 2, 8), title, INK, FONT, "ma")
    pen.text(((left + right) / 2, bottom + 28), x_label, INK, FONT, "ma")
    for v in (0, 0.2, 0.4, 0.6, 0.8, 1):
        pen.line([across(v), top, across(v), bottom + 4], UNSEEN)
        pen.text((across(v), bottom + 8), f"{v:g}", INK, FONT, "ma")
    for v in range(low, high + 1, 10):
        pen.line([left - 4, up(v), right, up(v)], UNSEEN)
        pen.text((left - 8, up(v)), f"{v}", INK, FONT, "rm")
    pen.line([left, top, left, bottom, right, bottom], INK)
    for colour, ys, radius in zip(SERIES, curves.values(), count(8, -1.5)):  # falling: what is covered shows as a ring
        points = [(across(a), up(b)) if b == b else None for a, b in zip(x, ys)]
        for line in (pair for pair in pairwise(points) if None not in pair):
            pen.line(line, colour, 3)
        for point in filter(None, points):
            pen.circle(point, radius, colour)
    return below(canvas, zip(SERIES, curves))


def draw_biases(pictures, maps, classes):
    """Three lines of Figure 3, for draw_grid. pictures: {title: RGB picture}, two beside each of two rivals; maps:
    {title: (2, h, w) logits of the rivals}, one scale a map, in the third line; classes: the rivals' names."""
    pairs, scale = [*pictures.items()], torch.arange(136.).expand(10, -1)
    bounds = {title: [*map(float, logits.aminmax())] for title, logits in maps.items()}
    lines = [pairs[:2], pairs[2:], [("", Image.new("RGB", (136, 1), PAPER))] * 2]
    for line, name, i in zip(lines, classes, count()):
        line += [(title, heat_map(logits[i], *bounds[title])) for title, logits in maps.items()]
        line[2] = (f"{name.split('|')[0]}: {line[2][0]}", line[2][1])
    lines[2] += [(f"{low:.2f} to {high:.2f}", heat_map(scale, 0, 135)) for low, high in bounds.values()]
    return lines


# --- One stage: on a split, or on your own pictures ----------------------------------------------------------

# --stage -> which part of the model's Logits is the answer, title of its column in the picture
STAGES = {"clip": ("query", "CLIP"), "rectify": ("rectified", "rectified"), "distill": ("rectified", "distilled")}


def protocol_of(args, model, stage):
    """Everything without which a number or a mask means nothing."""
    return {"data": args.data, "stage": stage, "short_side": args.short_side, "window": args.window,
            "stride": args.window and args.stride, "denoise": args.denoise, "background": args.facts.background,
            "class_names": list(model.class_names), "attention": model.settings.get("attention"),
            "clip_sha256": model.clip.sha256 if stage != "distill" else None}


def protocol_line(args):
    seen = f"windows of {args.window}, stride {args.stride}" if args.window else "whole pictures"
    return (f"{args.data} {args.split}, short side {args.short_side}, {seen}, denoise {args.denoise or 'off'}, "
            f"{args.facts.background}")


def labelled(args, split):
    return Evaluation(open_split(args.data, args.root, split, args.download), args.short_side)


def evaluate_stage(args, model, stage, out, others=(), checkpoint=None):
    """Evaluates one stage on one split, prints the table, writes <out>/eval_<stage>.json and .png.
    others: (model, stage) pairs whose masks stand beside this one's in the picture."""
    dataset, C = labelled(args, args.split), len(model.class_names)
    confusion = sum(confusion_matrix(mask, label, C)
                    for mask, label in predictions(args, model, stage, dataset, f"evaluate {stage}"))
    result = scores(confusion)
    print(f"\n{stage}: {protocol_line(args)}")
    cells = [f"  {name:<16}{f'{100 * iou:6.1f}' if iou == iou else 'absent'}"
             for name, iou in zip(model.class_names, result["iou"])]
    for left, right in zip_longest(cells[::2], cells[1::2], fillvalue=""):
        print(f"{left:<28}{right}")
    print(f"  mIoU {100 * result['miou']:.1f} over the {result['present']} of {C} classes present; "
          f"pixel accuracy {100 * result['pixel_accuracy']:.1f}")
    report = {
        "miou": result["miou"], "pixel_accuracy": result["pixel_accuracy"], "confusion": confusion.tolist(),
        "iou": {n: None if v != v else v for n, v in zip(model.class_names, result["iou"])},
        "protocol": protocol_of(args, model, stage) | {
            "split": args.split, "pictures": len(dataset), "classes_present": result["present"],
            "checkpoint_sha256": sha256_of(checkpoint or out / f"{stage}.pt") if stage != "clip" else None}}
    with written_atomically(out / f"eval_{stage}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    draw_examples(args, [*others, (model, stage)], dataset).save(out / f"eval_{stage}.png")
    return result


@torch.no_grad()
def draw_examples(args, columns, dataset, count=6):
    """The first pictures of a split, so not the best ones, with their truth and the masks of each (model, stage)."""
    rows, readers = [], {STAGES[stage][1]: segmenter(args, model, stage) for model, stage in columns}
    for picture, label, _ in (dataset[i] for i in range(min(count, len(dataset)))):
        masks = {"truth": label} | {title: mask_of(picture, label.shape) for title, mask_of in readers.items()}
        rows.append([("picture", to_pil_image(picture)),
                     *((title, colour_mask(mask, args.facts.palette)) for title, mask in masks.items())])
    return draw_grid(rows, zip(args.facts.palette, args.facts.classes))


@torch.no_grad()
def segment_pictures(args, model, stage, pictures):
    """Masks of any pictures, three files each: <out>/masks/<name>.index.png, .overlay.png and .json."""
    palette, progress = args.facts.palette, Progress("segment", len(pictures))
    mask_of = segmenter(args, model, stage, args.background_threshold)
    for i, name in enumerate(pictures.names):
        picture = pictures.picture(i)                                                      # uint8 (3, H0, W0)
        seen = to_dtype(resize_short_side(picture, args.short_side), torch.float32, scale=True)
        mask = mask_of(seen, picture.shape[1:])
        areas = (mask.flatten().bincount(minlength=256).double() / mask.numel()).tolist()
        found = sorted((c for c in range(256) if areas[c]), key=lambda c: -areas[c])
        names = {c: "background" if c == IGNORE else model.class_names[c].split("|")[0].strip() for c in found}
        path = args.out / "masks" / Path(*(part for part in Path(name).parts if part not in ("..", "/")))
        path.parent.mkdir(parents=True, exist_ok=True)
        index = Image.fromarray((mask + 1).numpy())  # 0: background (255 + 1, as a byte), 1..C: the classes
        index.putpalette([0, 0, 0, *(value for colour in palette for value in colour)])
        index.save(f"{path}.index.png")
        entries = [(UNSEEN if c == IGNORE else palette[c], f"{names[c]} {100 * areas[c]:.1f} %") for c in found]
        draw_overlay(picture, mask, palette, entries).save(f"{path}.overlay.png")
        Path(f"{path}.json").write_text(json.dumps({
            "picture": name, "size": list(picture.shape[:0:-1]), "areas": {names[c]: areas[c] for c in found},
            "index": {names[c]: (c + 1) % 256 for c in found}, "background_threshold": args.background_threshold,
            "protocol": protocol_of(args, model, stage)}, indent=1))
        progress(i + 1)
    print(f"{len(pictures)} pictures segmented, {len(pictures.skipped)} unreadable: {args.out / 'masks'}")


# --- The paper's tables and figures, Sec. 4 ------------------------------------------------------------------

# train.py --stage paper writes <out>/paper/plan.json {rows, tables, seeds, clip_sha256} and the checkpoint of
# each row under paper/seed<s>/<row>/. All the rest, measuring and drawing, can be done anew from these at any time.

EDGES = [i / 10 for i in range(11)]  # Figure 1(a): bins of the distance from the centre (1: the corner; ours)


def open_row(args, plan, row, path):
    """The model of a row, in eval mode; its stage: rectify, distill, linear or, where nothing learns, clip or mean."""
    if row["stage"] == "linear":  # the one place where labels train something; nothing but this row uses the outcome
        return linear_classification(open_model(args, "distill", path), labelled(args, "train"))
    if path:
        return open_model(args, row["stage"], path)
    model = open_model(args, "clip", **row["changes"])
    if model.clip.sha256 != plan["clip_sha256"]:
        raise ValueError(f"{args.out / 'paper'} was made with another CLIP than {model.clip.source} (sha256 differs); "
                         "give the right one with --clip")
    if row["stage"] == "mean":  # control: the mean of M_q over the training pictures, subtracted
        split = Thumbnails(open_split(args.data, args.root, "train"), model.clip.input_resolution)
        with torch.no_grad():
            means = [model(pictures.to(args.device)).query.mean((2, 3)) for pictures, _ in DataLoader(split, 32)]
        model.positional.numbers.data = torch.cat(means).mean(0) / model.positional.gain            # (C,)
        model.eval()  # forgets the positional logits it knew
    return model


def measured(args, plan, name, seed):
    """{miou, confusion, distances} of a row of the plan under one seed, kept beside its checkpoint in result.json;
    measured again only if checkpoint, CLIP or protocol is another."""
    row, base = plan["rows"][name], args.out / "paper" / f"seed{seed}"
    learnt = {"rectify": f"{name}/rectify.pt", "distill": f"{name}/distill.pt", "linear": "distilled/distill.pt"}
    path = base / learnt[row["stage"]] if row["stage"] in learnt else None
    if path and not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run python train.py --stage paper, it goes on where it stopped")
    identity = [protocol_line(args), row["stage"], row["changes"], sha256_of(path) if path else plan["clip_sha256"]]
    with suppress(FileNotFoundError, ValueError, KeyError):  # not yet measured, or cut off
        known = json.loads((base / name / "result.json").read_text())
        if known["identity"] == identity:
            return known
    model, C, dataset = open_row(args, plan, row, path), len(args.facts.classes), labelled(args, args.split)
    confusion, distances = torch.zeros(C, C, dtype=torch.int64), torch.zeros(len(EDGES) - 1, C, 2, dtype=torch.int64)
    for mask, label in predictions(args, model, "rectify", dataset, f"{name}, seed {seed}"):
        confusion += confusion_matrix(mask, label, C)
        distances += distance_counts(mask, label, C, EDGES)
    result = {"identity": identity, "pictures": len(dataset), "miou": scores(confusion)["miou"],
              "confusion": confusion.tolist(), "distances": distances.tolist()}
    with written_atomically(base / name / "result.json") as temporary:
        temporary.write_text(json.dumps(result))
    return result


def report_paper(args):
    """<out>/paper/: one CSV a table, one PNG a figure, and report.md, from the plan and the checkpoints there."""
    out, titles = args.out / "paper", {"CLIP": "clip", "rectified": "both", "distilled": "distilled"}
    if not (out / "plan.json").is_file():
        raise FileNotFoundError(f"{out / 'plan.json'} is missing: run python train.py --stage paper first")
    plan = json.loads((out / "plan.json").read_text())
    seeds = lambda row: range(1 if row["stage"] in ("clip", "mean") else plan["seeds"])  # nothing random in these
    results = {name: [measured(args, plan, name, s) for s in seeds(row)] for name, row in plan["rows"].items()}
    total = lambda key: {title: sum(torch.tensor(result[key]) for result in results[name])  # over seeds
                         for title, name in titles.items() if name in results}
    draw_curves({title: (100 * distance_miou(counts)).tolist() for title, counts in total("distances").items()},
                [(a + b) / 2 for a, b in pairwise(EDGES)], "mIoU in percent, by place of the object",
                "distance of the object's centroid from the centre (1: corner)").save(out / "figure1a.png")
    confusions = total("confusion")
    chosen = most_confused(confusions["CLIP"])
    draw_matrices([confusion[chosen][:, chosen] for confusion in confusions.values()],
                  [args.facts.classes[c] for c in chosen], list(confusions)).save(out / "figure1b.png")
    draw_figure_3(args, out / "seed0" / "both" / "rectify.pt").save(out / "figure3.png")
    lines = report_lines(args, plan, {name: [100 * r["miou"] for r in rows] for name, rows in results.items()})
    with written_atomically(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\n\nwritten: {out / 'report.md'}")


def report_lines(args, plan, percent):
    """report.md, and on the way the CSV of each table; percent: {row: mIoU, one a seed}."""
    out, rows, papers = args.out / "paper", plan["rows"], ("voc", "context", "ade20k")
    column = args.data if args.data in papers else "voc"
    mean = {name: sum(values) / len(values) for name, values in percent.items()}
    show = {name: f"{mean[name]:.1f}" + f" ({min(values):.1f}..{max(values):.1f})" * (len(values) > 1)
            for name, values in percent.items()}
    published = {name: (row["paper"] or (None,) * 3)[papers.index(column)] for name, row in rows.items()}
    lines = [f"# The paper's evidence on {args.data}", "", "mIoU in percent, mean (least..most) over the seeds, "
             f"{plan['seeds']} where something learns. {protocol_line(args)}. CLIP: sha256 {plan['clip_sha256'][:12]}. "
             f"Beside it the paper's own number on {column}, by its own protocol."]
    for key, (title, names) in plan["tables"].items():
        lines += ["", f"## {title}", "", f"| row | {args.data} | paper, {column} |", "|---|---|---|"]
        lines += [f"| {rows[name]['name']} | {show[name]} | {published[name] or ''} |" for name in names]
        with written_atomically(out / f"{key}.csv") as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([["row", "mean", f"paper, {column}", "one a seed"], *(
                [rows[name]["name"], mean[name], published[name], *percent[name]] for name in names)])
    steps = {(a, b): published[b] - published[a] for _, names in plan["tables"].values()
             for a, b in pairwise(name for name in names if published[name])}
    steps |= {(name, "both"): 1.0 for name in plan["tables"].get("controls", (0, ()))[1] if name != "both"}
    lines += ["", "## What came out, and what did not", ""]
    for (a, b), step in steps.items():
        told = f"{step:+.1f} in the paper" if published[a] else "it should gain"
        lines.append(f"- {rows[a]['name']} -> {rows[b]['name']}: {mean[b] - mean[a]:+.1f} here, {told}" +
                     (": **does not come out**" if step and step * (mean[b] - mean[a]) <= 0 else ""))
    lines += ["", "## Figures", *(f"\nFigure {text}\n\n![{name}]({name}.png)" for name, text in {
        "figure1a": "1(a): mIoU over the pictures whose object of the class lies that far from the centre.",
        "figure1b": "1(b): the classes that CLIP confuses most, in percent of the pixels that went to one of them.",
        "figure3": "3: pictures chosen because rectification mends most pixels that CLIP took for one other class."
    }.items()), "", "## Training times, seconds a seed", ""]
    for name in rows:
        files = [file for seed in range(plan["seeds"]) if (file := out / f"seed{seed}" / name / "done.json").is_file()]
        times = [json.loads(file.read_text())["seconds"] for file in files]
        lines += [f"- {name}: {sum(times) / len(times):.0f}"] if times else []
    return lines


@torch.no_grad()
def draw_figure_3(args, checkpoint, count=3, among=200):
    """Heat maps of the `count` pictures, of the first `among`, in which rectification mends most pixels of one class
    that CLIP took for one other: chosen to show what it does, not how often it does it."""
    model, dataset, C = open_model(args, "rectify", checkpoint), labelled(args, args.split), len(args.facts.classes)
    readers, found, rows, seen = [segmenter(args, model, stage) for stage in ("clip", "rectify")], {}, [], set()
    for i in range(min(among, len(dataset))):
        picture, label, _ = dataset[i]
        before, after = (mask_of(picture, label.shape) for mask_of in readers)
        mended = (label != IGNORE) & (before != label) & (after == label)
        pairs = (label[mended].long() * C + before[mended]).bincount(minlength=C * C)  # truth, what CLIP took it for
        pair = divmod(int(pairs.argmax()), C)
        if pairs.max() > found.get(pair, (0,))[0]:
            masks = {"truth": label, "CLIP's mask": before, "rectified mask": after}
            found[pair] = int(pairs.max()), picture, masks
    for pair, (_, picture, masks) in sorted(found.items(), key=lambda item: -item[1][0])[:count]:
        logits = model(picture[None].to(args.device))
        maps = {title: getattr(logits, title.split()[-1]).expand_as(logits.query)[0, list(pair)]    # (2, h, w) each
                for title in ("query", "- reference", "- positional", "= rectified")}               # Eq. (2), (3)
        drawn = {title: colour_mask(mask, args.facts.palette) for title, mask in masks.items()}
        rows += draw_biases({"picture": to_pil_image(picture)} | drawn, maps, [args.facts.classes[c] for c in pair])
        seen.update(*(mask.unique().tolist() for mask in masks.values()))
    rows = rows or [[("no pixel is mended", Image.new("RGB", (136, 1), PAPER))]]
    return draw_grid(rows, [(args.facts.palette[c], args.facts.classes[c]) for c in sorted(seen - {IGNORE})])


# --- Command line -------------------------------------------------------------------------------------------

def add_common(parser):
    """The options that train.py and eval.py share."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    add("--data", help=f"{', '.join(DATA)}, or a folder of your own pictures (default: shapes)")
    add("--classes", help="for your own pictures: 'cat, dog | puppy, grass', or a file with one class a line")
    add("--split", help="split to evaluate on (default: val; test for shapes' tables: train.py and --stage paper)")
    add("--root", default="data", help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help="'ViT-B/16' or a weights file (default: the data set's)")
    add("--out", type=Path, help="where checkpoints are and results go (default: runs/<data>)")
    add("--device", default=best, help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int, help="processes that decode pictures (default: 4 beside a GPU, else 0)")
    add("--denoise", type=float, help="drop classes whose best probability is below; 0: off (default: as released)")
    add("--short-side", "--short_side", type=int, help="evaluation: pixels; 0: own size (default: the data set's)")
    add("--window", type=int, default=0, help="evaluate in sliding windows of this side, pixels; 0: whole pictures")
    add("--stride", type=int, help="distance of the windows, pixels (default: 224, at most the window)")


def settle(args):
    """Checks what argparse cannot see, and fills in what the data set decides: args.facts and defaults."""
    args.data = args.data or ("pictures" if args.images else "shapes")
    if not args.images and args.data in DATA and args.classes:
        raise ValueError(f"--classes goes with your own pictures; {args.data} has its own classes")
    if not args.images and args.data not in DATA and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data} is neither a folder of pictures nor one of {', '.join(DATA)}")
    if not args.images and args.data not in DATA and not args.classes:
        raise ValueError(f"--data {args.data} needs --classes 'cat, dog, grass' or a file with one class a line")
    own = own_facts(read_classes(args.classes) if args.classes else ())  # none: a checkpoint will name them
    args.facts = own if args.classes else DATA.get(args.data, own)
    args.split = args.split or (args.facts.splits or [None])[args.default_split]
    if args.facts.splits and args.split not in args.facts.splits:
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(args.facts.splits)}")
    args.denoise = args.facts.denoise if args.denoise is None else args.denoise
    args.short_side = args.facts.short_side if args.short_side is None else args.short_side
    if not 0 <= args.denoise <= 1:
        raise ValueError(f"--denoise {args.denoise}: a probability between 0 and 1")
    args.stride = min(224, args.window) if args.stride is None else args.stride
    if args.window < 0 or args.short_side < 0 or args.window and not 0 < args.stride <= args.window:
        raise ValueError(f"--short-side {args.short_side} --window {args.window} --stride {args.stride}: none below 0, "
                         "and --stride not larger than --window")
    args.workers = args.workers if args.workers is not None else 4 if args.device.startswith("cuda") else 0
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available here ({str(error).splitlines()[0]})") from None
    return args


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=[*STAGES, "paper"], default="rectify", help="what to evaluate (default: rectify); paper: "
        "all tables and figures from what train.py --stage paper left")
    add("--checkpoint", type=Path, help="file to evaluate (default: <out>/<stage>.pt)")
    add("--attention", choices=ATTENTIONS, help="reading of CLIP for --stage clip (default: maskclip)")
    add("--images", nargs="+", type=Path, help="segment these pictures or folders of pictures instead of a data set")
    add("--background-threshold", "--background_threshold", type=float, default=0.0,
        help="with --images: pixels whose best class is less probable than this are background (default: 0, off)")
    add_common(parser)
    args = parser.parse_args(argv)
    args.default_split = -1 if args.stage == "paper" else 0  # shapes: val is for choices, test for tables
    if args.attention and args.stage != "clip":
        raise ValueError("--attention goes with --stage clip; a checkpoint keeps its own")
    if not 0 <= args.background_threshold <= 1 or args.background_threshold and not args.images:
        raise ValueError(f"--background-threshold {args.background_threshold} must lie in 0..1 and goes with --images")
    if args.images and not (args.data or (args.classes if args.stage == "clip" else args.checkpoint or args.out)):
        raise ValueError("--images needs --classes 'cat, dog' with --stage clip, else --checkpoint runs/NAME/STAGE.pt")
    args.out = args.out or (args.images and args.checkpoint and args.checkpoint.parent)
    return settle(args)


def open_model(args, stage, path=None, **changes):
    """What --stage names, in eval mode: the checkpoint at path, or for clip the data set's CLIP under `changes`."""
    clip = load_clip(args.clip or args.facts.clip, args.device) if stage == "clip" or args.clip else None
    if stage == "clip":
        return ReCLIP(clip, args.facts.classes, prompts=args.facts.prompts or PROMPTS, prompt_length=0,
                      positional_channels=0, **changes).eval()
    model = DeepLabV2.load(path, args.device) if stage == "distill" else ReCLIP.load(path, clip, args.device)
    if args.facts.classes not in ((), model.class_names):
        raise ValueError(f"{path} was made for other classes than are asked for: {', '.join(model.class_names)}")
    return model


def main(argv=None):
    args = parse(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # as in train.py: tensors this small stall on shared cores
    if args.stage == "paper":
        return report_paper(args)
    pictures = Folder(*args.images) if args.images else labelled(args, args.split)  # missing? told before CLIP
    model = open_model(args, args.stage, args.checkpoint or args.out / f"{args.stage}.pt",
                       attention=args.attention or "maskclip")
    args.facts = args.facts if args.facts.classes else own_facts(model.class_names)
    if args.images:
        return segment_pictures(args, model, args.stage, pictures)
    if not args.facts.splits:
        raise ValueError(f"{args.data} has no labels to evaluate on; eval.py --images {args.data} draws its masks")
    others = [(model, "clip")] if args.stage == "rectify" else []
    if args.stage == "distill" and (args.out / "rectify.pt").is_file():
        teacher = open_model(args, "rectify", args.out / "rectify.pt")
        others = [(teacher, "clip"), (teacher, "rectify")]
    evaluate_stage(args, model, args.stage, args.out, others, args.checkpoint)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
