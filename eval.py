"""Evaluation: mIoU from one confusion matrix, a table, a JSON, and a picture of the masks.

    python eval.py --stage rectify --data shapes --split test
    python eval.py --stage clip --data voc --root DIR          (the MaskCLIP baseline, same code)

What stands here
    segment                  the mask of one picture at its label's size: the protocol of the paper's tables
    strong_classes           released "prompt denoising": drop the classes that nowhere come out strong
    confusion_matrix, scores truth x prediction counts -> mIoU, IoU per class, pixel accuracy
    evaluate                 a whole split
    draw_grid                pictures, truth and masks side by side, with a legend
    Progress                 one line that tells how far a loop is

Symbols
    C classes; (H, W) size of the picture that the network sees, (H0, W0) of the label; M logits (1, C, h, w)

It sits on top of the other files; alone, the functions under "Numbers" need no more than torch and IGNORE:
    confusion = sum(confusion_matrix(mask, label, 20) for mask, label in results)
    print(scores(confusion)["miou"])
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from clip_model import load_clip, sha256_of, written_atomically
from datasets import DATA, IGNORE, Evaluation, open_split
from deeplab import DeepLabV2
from reclip import PROMPTS, ReCLIP


# --- Numbers ------------------------------------------------------------------------------------------------

def strong_classes(logits, threshold, scale=100.0):
    """Indices of the classes whose best probability softmax(scale * M) in the picture reaches the threshold, of all
    classes if none does: (1, C, h, w) -> (kept,). Not in the paper; the released evaluation does it."""
    best = (scale * logits).softmax(1).amax((0, 2, 3))  # (C,)
    kept = best >= threshold
    return (kept | ~kept.any()).nonzero()[:, 0]


def segment(logits, to_pixels, size, label_size, denoise=0.0):
    """Logits on patches -> class index of each pixel of the label: (1, C, h, w) -> (H0, W0) int64.

    Bilinear to the padded picture, the padded part cut off, then bilinear to the label's size. The released
    code stretches the padded grid onto the unpadded picture, which shifts masks by up to 15 pixels.
    """
    kept = strong_classes(logits, denoise)
    pixels = to_pixels(logits[:, kept], *size)                                                # (1, kept, H, W)
    pixels = F.interpolate(pixels, size=label_size, mode="bilinear", align_corners=False)     # (1, kept, H0, W0)
    return kept[pixels[0].argmax(0)]                                                          # (H0, W0)


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


@torch.no_grad()
def evaluate(logits_of, to_pixels, dataset, classes, denoise=0.0, device="cpu", progress=None):
    """Confusion matrix (C, C) of a whole split. logits_of: (1, 3, H, W) in [0, 1] -> M (1, C, h, w)."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for i, (picture, label, _) in enumerate(torch.utils.data.DataLoader(dataset, batch_size=None)):
        logits = logits_of(picture[None].to(device))
        mask = segment(logits, to_pixels, picture.shape[1:], label.shape, denoise)
        confusion += confusion_matrix(mask.cpu(), label, classes)
        if progress:
            progress(i + 1)
    return confusion


# --- Pictures and tables ------------------------------------------------------------------------------------

PAPER, INK, UNSEEN = (255, 255, 255), (30, 30, 30), (225, 225, 225)  # background, text, ignored pixels


def colour_mask(mask, palette):
    """(H, W) int class indices, IGNORE or 0..C-1 -> RGB picture"""
    table = torch.full((256, 3), UNSEEN[0], dtype=torch.uint8)
    table[:len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return Image.fromarray(table[mask.long()].numpy())


def to_image(picture):
    """float (3, H, W) in [0, 1] -> RGB picture"""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def draw_grid(rows, titles, classes, palette, tile=128, gap=6):
    """rows: lists of RGB pictures, one a title; each is fitted into a tile. Below: colour and name of each class."""
    font = ImageFont.load_default(13)
    width = len(titles) * (tile + gap) + gap
    columns = max(1, width // 130)
    legend = -(-len(classes) // columns) * 20
    canvas = Image.new("RGB", (width, 24 + len(rows) * (tile + gap) + gap + legend), PAPER)
    pen = ImageDraw.Draw(canvas)
    for x, title in enumerate(titles):
        pen.text((gap + x * (tile + gap) + tile / 2, 5), title, INK, font, anchor="ma")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = tile / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size],
                                 Image.NEAREST if x or scale > 1 else Image.BICUBIC)
            left, top = gap + x * (tile + gap), 24 + y * (tile + gap)
            canvas.paste(image, [left + (tile - image.width) // 2, top + (tile - image.height) // 2])
    top = 24 + len(rows) * (tile + gap) + gap
    for i, name in enumerate(classes):
        x, y = gap + i % columns * (width // columns), top + i // columns * 20
        pen.rectangle([x, y + 2, x + 12, y + 14], tuple(palette[i]), INK)
        pen.text((x + 18, y), name.split("|")[0], INK, font)
    return canvas


def print_table(classes, result, title):
    """IoU per class in two columns, mIoU below."""
    print(f"\n{title}")
    cells = [f"  {name:<16}{'absent' if value != value else f'{100 * value:6.1f}'}"
             for name, value in zip(classes, result["iou"])]
    half = -(-len(cells) // 2)
    for left, right in zip(cells[:half], cells[half:] + [""] * half):
        print(f"{left:<28}{right}")
    print(f"  mIoU {100 * result['miou']:.1f} over the {result['present']} of {len(classes)} classes present; "
          f"pixel accuracy {100 * result['pixel_accuracy']:.1f}")


def report_rows(results, title, path):
    """results: {row: fractions, one a seed}; printed as mean (least .. most) in percent, written as CSV."""
    with written_atomically(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([name, *values] for name, values in results.items())
    print(f"\n{title}, mean (least .. most) over seeds")
    for name, values in results.items():
        values = [100 * value for value in values]
        print(f"  {name:<50}{sum(values) / len(values):5.1f} ({min(values):.1f} .. {max(values):.1f})")


class Progress:
    """`Progress("eval", 1449)(12, extra="")` shows step, rate and time left: in place on a terminal, now and
    then in a log."""

    def __init__(self, name, total, first=0, per_step=1):
        self.name, self.total, self.first, self.per_step = name, total, first, per_step
        self.began, self.shown = time.perf_counter(), 0.0
        self.terminal = sys.stderr.isatty()

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


# --- Command line -------------------------------------------------------------------------------------------

def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# --stage -> which part of the model's Logits is the answer, title of its column in the picture
STAGES = {"clip": ("query", "CLIP"), "rectify": ("rectified", "rectified"), "distill": ("rectified", "distilled")}


def evaluate_stage(args, model, stage, out, others=(), checkpoint=None):
    """Evaluates one stage on one split, prints the table, writes <out>/eval_<stage>.json and .png.
    others: (model, stage) pairs whose masks stand beside this one's in the picture."""
    facts = DATA[args.data]
    denoise = facts.denoise if args.denoise is None else args.denoise
    dataset = Evaluation(open_split(args.data, args.root, args.split, args.download), facts.short_side)
    confusion = evaluate(lambda x: getattr(model(x), STAGES[stage][0]), model.to_pixels, dataset,
                         len(model.class_names), denoise, args.device, Progress(f"evaluate {stage}", len(dataset)))
    result = scores(confusion)
    print_table(model.class_names, result, f"{args.data} {args.split}, {stage}: short side {facts.short_side}, "
                f"denoise {denoise or 'off'}, {facts.background}")
    checkpoint = Path(checkpoint or out / f"{stage}.pt")
    report = {
        "miou": result["miou"], "pixel_accuracy": result["pixel_accuracy"],
        "iou": {n: None if v != v else v for n, v in zip(model.class_names, result["iou"])},
        "confusion": confusion.tolist(),
        "protocol": {"data": args.data, "split": args.split, "stage": stage, "pictures": len(dataset),
                     "short_side": facts.short_side, "denoise": denoise, "background": facts.background,
                     "classes_present": result["present"], "class_names": list(model.class_names),
                     "clip_sha256": model.clip.sha256 if stage != "distill" else None,
                     "checkpoint_sha256": sha256_of(checkpoint) if stage != "clip" else None}}
    with written_atomically(out / f"eval_{stage}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    picture = draw_examples([*others, (model, stage)], dataset, facts.palette, denoise, args.device)
    picture.save(out / f"eval_{stage}.png")
    return result


@torch.no_grad()
def draw_examples(columns, dataset, palette, denoise, device, count=6):
    """The first `count` pictures of a split with their truth and the masks of each (model, stage): not chosen, so not
    the best ones."""
    rows = []
    for picture, label, _ in (dataset[i] for i in range(min(count, len(dataset)))):
        masks = [segment(getattr(model(picture[None].to(device)), STAGES[stage][0]), model.to_pixels,
                         picture.shape[1:], label.shape, denoise).cpu() for model, stage in columns]
        rows.append([to_image(picture), *(colour_mask(mask, palette) for mask in [label, *masks])])
    titles = ["picture", "truth", *(STAGES[stage][1] for _, stage in columns)]
    return draw_grid(rows, titles, columns[0][0].class_names, palette)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="rectify", help="what to evaluate (default: rectify)")
    add("--data", choices=list(DATA), default="shapes", help="data set (default: shapes)")
    add("--split", help="split to evaluate on (default: val)", default="val")
    add("--root", default="data", help="folder that holds VOCdevkit/ (default: data)")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help="'ViT-B/16' or a weights file (default: the data set's)")
    add("--checkpoint", help="file to evaluate (default: <out>/<stage>.pt)")
    add("--out", help="where checkpoints are and results go (default: runs/<data>)")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--denoise", type=float, help="drop classes whose best probability is below; 0: off (default: as released)")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.data}"
    check(args)
    return args


def check(args):
    """What argparse cannot see; train.py calls it too."""
    if args.split not in DATA[args.data].splits:
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(DATA[args.data].splits)}")
    if args.denoise is not None and not 0 <= args.denoise <= 1:
        raise ValueError(f"--denoise {args.denoise}: a probability between 0 and 1")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available here ({str(error).splitlines()[0]})") from None


def main(argv=None):
    args = parse(argv)
    facts, out = DATA[args.data], Path(args.out)
    others = []
    if args.stage == "clip":
        model = ReCLIP(load_clip(args.clip or facts.clip, args.device), facts.classes, prompts=facts.prompts or PROMPTS)
    elif args.stage == "rectify":
        clip = load_clip(args.clip, args.device) if args.clip else None
        model = ReCLIP.load(args.checkpoint or out / "rectify.pt", clip, args.device)
        others = [(model, "clip")]
    else:
        model = DeepLabV2.load(args.checkpoint or out / "distill.pt", args.device)
        if (out / "rectify.pt").is_file():  # the teacher's masks beside the student's
            clip = load_clip(args.clip, args.device) if args.clip else None
            teacher = ReCLIP.load(out / "rectify.pt", clip, args.device)
            others = [(teacher, "clip"), (teacher, "rectify")]
    if tuple(model.class_names) != facts.classes:
        raise ValueError(f"the checkpoint was made for other classes than {args.data}'s: "
                         f"{', '.join(model.class_names)}")
    evaluate_stage(args, model.eval(), args.stage, out, others, args.checkpoint)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
