"""Pictures and labels: shapes (a miniature world, drawn from a seed), VOC, Context, ADE20K, and your own pictures.

What stands here
    DATA                     facts of each data set: class names, palette, evaluation protocol
    own_facts, read_classes  the same for your own pictures, whose classes you name
    Files, Folder            a split on disk: pictures, labels, names; your own pictures, without labels
    Shapes                   a split of the miniature world, the same three
    Augment                  the training transform of Sec. 4.1, random crop and flip
    TrainingStream           an endless, seeded, resumable stream of pictures. It never opens a label
    Thumbnails               each picture once, as CLIP's image encoder wants it
    Evaluation               picture, label, name
    prepare, verify          python datasets.py --prepare voc --root data --download

Symbols
    C classes; H x W pixels. Pictures are uint8 (3, H, W) or float in [0, 1]; no normalisation here, because
    CLIP and the student each have their own. Labels are uint8 (H, W): class 0..C-1, or 255 = not evaluated.

Copied elsewhere, it is used like this:
    stream = TrainingStream(open_split("voc", "data", "train"), Augment(2048, 336, 336), seed=0)
    for pictures, names in DataLoader(stream, batch_size=4, sampler=range(4000)): ...
    for picture, label, name in Evaluation(open_split("voc", "data", "val"), short_side=336): ...
"""

import argparse
import colorsys
import json
import math
import shutil
import sys
import tempfile
import urllib.request
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255                                   # in labels: not evaluated
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of your own pictures, in any case
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # whatever the name; for others Pillow starts programs
PADDING = (124, 116, 104)                      # ImageNet's mean colour, within 0.03 of zero after either normalisation


# --- Facts --------------------------------------------------------------------------------------------------

# As the paper's authors prompt with them, in the order of the label values 1..20.
VOC_CLASSES = ("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
               "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor")
CONTEXT_CLASSES = tuple(n.strip() for n in """airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle,
building, bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower,
food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, potted plant, road,
rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tv monitor, wall, water,
window, wood""".split(","))
ADE_CLASSES = tuple(n.strip() for n in """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass,
cabinet, sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box,
column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs,
runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
glass, clock, flag""".split(","))
SHAPES_CLASSES = ("coin", "ring", "box", "gem", "star", "flower", "bee", "beetle")  # twins side by side
# The tiny CLIP knows some forty words: the 85 prompts of the paper would be Greek to it.
SHAPES_PROMPTS = ("a photo of a {}", "a picture of a {}", "a good photo of a {}", "a large {}", "a small {}",
                  "a photo of one {}")


def voc_palette():
    """VOC's 256 colours, by its rule: the bits of the index, dealt to red, green and blue from the top bit down."""
    return [tuple(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
            for index in range(256)]


@dataclass(frozen=True)
class DataFacts:
    """What is fixed for a data set when a number is reported on it (its evaluation protocol)."""
    classes: tuple          # C names, in label order
    palette: list           # C colours (r, g, b)
    short_side: int         # pixels; pictures are resized to it for evaluation, ratio kept (as released)
    denoise: float          # classes whose best probability stays below are dropped (as released); 0: off
    background: str         # which pixels are not evaluated
    clip: str               # default weights: a name of load_clip's, or a file
    splits: tuple = ("val",)  # that have labels to evaluate on
    prompts: tuple = None   # of the Query; None: the paper's 85


DATA = {
    "shapes": DataFacts(SHAPES_CLASSES, [(230, 159, 0), (180, 90, 0), (0, 114, 178), (86, 180, 233), (204, 121, 167),
                                         (150, 30, 90), (120, 200, 60), (0, 120, 80)], 64, 0.0,
                        "ground pixels are ignored, 8 classes", str(Path(__file__).with_name("shapes_clip.pt")),
                        ("val", "test"), SHAPES_PROMPTS),
    "voc": DataFacts(VOC_CLASSES, voc_palette()[1:21], 336, 0.5,
                     "pixels labelled background (0) or void (255) are ignored, 20 classes", "ViT-B/16"),
    "context": DataFacts(CONTEXT_CLASSES, voc_palette()[1:60], 448, 0.6,
                         "pixels labelled 0 (none of the 59) are ignored", "ViT-B/16"),
    "ade20k": DataFacts(ADE_CLASSES, voc_palette()[1:151], 512, 0.5,  # VOC's colours, not ADE's official ones
                        "pixels labelled 0 (other) are ignored, 150 classes", "ViT-B/16"),
}


def own_facts(class_names):
    """DataFacts of your own pictures. The size is ours; the released denoising is tuned to VOC, so it is off here."""
    if len(class_names) > 254:
        raise ValueError(f"--classes names {len(class_names)} classes: 254 at most (labels are bytes, 255 = ignored)")
    return DataFacts(tuple(class_names), voc_palette()[1:1 + len(class_names)], 336, 0.0, "no labels", "ViT-B/16", ())


def read_classes(text):
    """"cat, dog | puppy", or the path of a text file with one class a line (# begins a remark), a bar between synonyms
    -> ("cat", "dog | puppy"). ValueError: fewer than two classes, an empty name, the same name twice."""
    entries = text.split(",")
    if isfile(text):
        lines = map(str.strip, Path(text).read_text("utf-8-sig", errors="replace").splitlines())
        entries = [line for line in lines if line and line[0] != "#"]
    classes = [[name.strip() for name in entry.split("|")] for entry in entries]
    names = [name.lower() for synonyms in classes for name in synonyms]  # as CLIP reads them
    if len(classes) < 2 or "" in names or len(set(names)) < len(names):
        raise ValueError(f"--classes {text}: needs two names or more, none empty, none twice (or a file of such lines)")
    return tuple(" | ".join(synonyms) for synonyms in classes)


# --- Splits on disk -----------------------------------------------------------------------------------------

# Where a data set lies, as everybody has it: base below --root; below base the pictures, the labels ({}: the split's
# folder) and the lists ("": all pictures, sorted); how many pictures a split has; the archive and its md5.
Layout = namedtuple("Layout", "base pictures labels lists official archive md5")
LAYOUTS = {
    "voc": Layout("VOCdevkit/VOC2012", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation",
                  {"train": "1464", "val": "1449"}, "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
                  "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
    "context": Layout("VOCdevkit/VOC2010", "JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext",
                      {"train": "4996, in the paper 4998", "val": "5104, in the paper 5105"},
                      "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
                      "da459979d0c395079b5c75ee67908abb"),
    "ade20k": Layout("ADEChallengeData2016", "images/{}", "annotations/{}", "", {"train": "20210", "val": "2000"},
                     "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                     "7328b3957e407ddae1d3cbf487f149ef"),
}
# Context's labels are made of this file. Its own host, the second half of the address, is reported dead.
CONTEXT_JSON = ("https://web.archive.org/web/2025id_/https://codalabuser.blob.core.windows.net/public/"
                "trainval_merged.json", "3c2d0c0656b7be9eb61928ffe885d8ce")


def read_picture(path, draft=False):
    """uint8 (H, W, 3), turned upright as its EXIF data say, transparency on white, 16 bits scaled to 8 (PIL's convert
    clips). draft: a JPEG is read to its end, but at an eighth of its size."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (1, 1) if draft else image.size)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            elif "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is named in the split's list but does not exist") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from error


class Files:
    """A split as files: `pictures[i]`, and `labels[i]` (may be missing from the disk while training).
    Label values 1..C in the files become 0..C-1, the values 0 and 255 become IGNORE."""

    def __init__(self, pictures, labels, classes):
        self.pictures, self.labels, self.classes = pictures, labels, classes
        self.names = [path.stem for path in pictures]
        self.keep, self.kept = False, {}  # keep: decoded pictures stay in memory

    def __len__(self):
        return len(self.names)

    def picture(self, i):
        """uint8 (3, H, W)"""
        picture = self.kept.get(i)
        if picture is None:
            picture = torch.from_numpy(read_picture(self.pictures[i])).permute(2, 0, 1)
        if self.keep:
            self.kept[i] = picture
        return picture

    def label(self, i):
        """uint8 (H, W)"""
        path = self.labels[i]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: evaluation needs the labels (training does not)")
        try:
            with Image.open(path, formats=FORMATS) as image:
                mode, label = image.mode, torch.from_numpy(np.array(image))
        except Exception as error:
            raise ValueError(f"{path} is not a readable label: {error}") from error
        if mode not in ("P", "L"):
            raise ValueError(f"{path} has mode {mode}, not P or L: an RGB copy of a label has lost the class numbers")
        worst = int(label[label != 255].max()) if (label != 255).any() else 0
        if worst > self.classes:
            raise ValueError(f"{path} holds the value {worst}, but there are {self.classes} classes: looks like the "
                             "60-class or 459-class labels of Context, the full ADE20K, or another data set")
        return torch.where((label == 0) | (label == 255), IGNORE, label - 1).to(torch.uint8)


class Folder(Files):
    """Your own pictures: files, and folders searched at every depth; names are paths below the folder, each unique.
    Every picture is read once; the unreadable ones are left out, told on stderr and named in .skipped."""

    def __init__(self, *paths):
        found, reasons = {}, {}  # path: name, name: why it was skipped
        for path in map(Path, paths):
            if not path.exists():
                raise FileNotFoundError(f"{path} is neither a picture nor a folder, nor one of {', '.join(DATA)}")
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found.update({p: p.relative_to(path).as_posix() for p in inside} if path.is_dir() else {path: path.name})
        if len(set(found.values())) < len(found):
            found = {path: path.resolve().as_posix() for path in found}
        for path, name in list(found.items()):
            try:
                read_picture(path, draft=True)
            except ValueError as error:
                reasons[found.pop(path)] = f"skipped {name}: {error.__cause__}"
        for line in [*reasons.values()][:10] + [f"and {len(reasons) - 10} more"] * (len(reasons) > 10):
            print(line, file=sys.stderr)
        if not found:
            raise ValueError(f"{', '.join(map(str, paths))} holds no readable picture ({', '.join(SUFFIXES)})")
        super().__init__([*found], None, 0)
        self.names, self.skipped = [*found.values()], [*reasons]

    def label(self, i):
        raise ValueError(f"{self.names[i]} has no labels")


def open_split(data, root, split, download=False):
    """The split as an object with .names, .picture(i), .label(i) and a length; data: a key of DATA, or your folder."""
    if data not in LAYOUTS:
        return Shapes(split) if data == "shapes" else Folder(data)
    layout, base = LAYOUTS[data], Path(root) / LAYOUTS[data].base
    folder = {"train": "training", "val": "validation"}.get(split, split)
    pictures, labels = base / layout.pictures.format(folder), base / layout.labels.format(folder)
    path = base / layout.lists / f"{split}.txt" if layout.lists else pictures
    if download and not path.exists():
        prepare(data, root, download)
    names = path.read_text().split() if path.is_file() else sorted(p.stem for p in path.glob("*.jpg"))
    if not names:
        raise (ValueError if path.exists() else FileNotFoundError)(
            f"{path} is {'empty' if path.exists() else 'missing'}: {misplaced(data, Path(root))}")
    return Files([pictures / f"{name}.jpg" for name in names], [labels / f"{name}.png" for name in names],
                 len(DATA[data].classes))


# --- Preparation: python datasets.py --prepare ---------------------------------------------------------------

# Context's category ids, in the order of the label values 1..59
CONTEXT_IDS = (2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144,
               158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355,
               360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458)


def misplaced(data, root):
    """What people get wrong when a data set is not found, in a sentence."""
    layout = LAYOUTS[data]
    top, _, year = layout.base.partition("/")
    patterns = (f"{top}/VOC20*",) if year else ("ADE20K_20*", "**/index_ade20k*", "**/*_seg.png")
    others = [other for pattern in patterns for other in root.glob(pattern) if other.name != year]
    if (root / top / top).is_dir():
        return f"{root / top} holds a second {top}; move the inner one to {root}"
    if (root / layout.pictures.format("training")).is_dir() or year and (root / year).is_dir():
        return f"{root} is inside of {layout.base}; --root must be the folder that holds {top}"
    if others:
        return f"{others[0]} is " + (f"of another year than {year}" if year else f"the full ADE20K, not {top}")
    return f"--root must be the folder that holds {layout.base}; datasets.py --prepare {data} --download fetches it"


def fetch(address, md5, path):
    """address -> path. It grows as a .part, with which the next call goes on, and gets its name when the md5 fits.
    OSError: the host is dead. ValueError: another md5."""
    part = path if path.is_file() else Path(f"{path}.part")
    advice = f"a copy with md5 {md5} can be put at {path}"
    if part != path:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.is_file() else 0
        print(f"fetching {address} to {part} from byte {done} on", file=sys.stderr)
        try:
            request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"})
            with (urllib.request.urlopen(request, timeout=60) as answer,
                  open(part, "ab" if answer.status == 206 else "wb") as file):  # 200: the whole file comes
                shutil.copyfileobj(answer, file)
                if answer.length:
                    raise OSError("the connection broke off; the next run goes on from there")
        except Exception as error:
            if getattr(error, "code", 0) != 416:                                # 416: the .part is whole already
                raise OSError(f"{address} could not be fetched ({error}): {advice}") from error
    if not check_integrity(part, md5):
        Path(f"{path}.part").unlink(missing_ok=True)
        raise ValueError(f"{part} does not have the md5 {md5} (a .part is deleted then): {advice}")
    part.rename(path)


def decode_rle(counts, height, width):
    """COCO's compressed run lengths -> bool (height, width); ValueError where they are damaged. A character less 48 is
    six bits: five of a number, low ones first, and whether more follow; the last one's fifth is the sign. From the
    fourth number on it is the difference to the run two before. Runs go down the columns, of zeros and ones in turn."""
    runs, number, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths hold {character!r}, or a number without an end")
        number, shift = number | (bits & 31) << shift, shift + 5
        if not bits & 32:
            runs.append(number - (bits >> 4 << shift) + (runs[-2] if len(runs) > 2 else 0))
            number, shift = 0, 0
    if shift or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths are cut off, negative, or do not add up to {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def context_labels(base, data):
    """Context's JSON -> label PNGs (0: none of the 59) and, when all are there, the lists. Interrupted, it goes on."""
    names = {category["category_id"]: category["name"] for category in data["categories"]}
    for k, name in zip(CONTEXT_IDS, CONTEXT_CLASSES):
        if names.get(k) != (name := name.replace("airplane", "aeroplane").replace(" ", "")):  # as its JSON spells it
            raise ValueError(f"category {k} is {names.get(k)}, not {name}: are VOC's 20 classes first here?")
    annotations, ids = {}, np.array((0, *CONTEXT_IDS))
    for annotation in data["annos_segmentation"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    folder, lists = base / LAYOUTS["context"].labels, base / LAYOUTS["context"].lists
    folder.mkdir(exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    images = [(image, folder / (Path(image["file_name"]).stem + ".png")) for image in data["images"]]
    for done, (image, path) in enumerate(images):
        if image["phase"] in ("train", "val") and not path.exists():
            mask = np.zeros((image["height"], image["width"]), int)
            for annotation in annotations.get(image["image_id"], ()):  # later ones cover earlier ones
                mask[decode_rle(annotation["segmentation"]["counts"], *mask.shape)] = annotation["category_id"]
            label = np.searchsorted(ids, mask).astype(np.uint8)
            if (ids[label.clip(0, 59)] != mask).any():
                raise ValueError(f"{path.stem} has a category that is none of the 59")
            Image.fromarray(label).save(f"{path}.part", "PNG")
            Path(f"{path}.part").rename(path)
        print(f"{done + 1} of {len(images)} labels", end="\r", file=sys.stderr)
    for split in ("train", "val"):
        stems = sorted(path.stem for image, path in images if image["phase"] == split)
        (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")


def prepare(data, root, download=False):
    """Fetches (with download) and unpacks what is missing and makes Context's labels; writes nowhere but in root."""
    layout, root = LAYOUTS[data], Path(root)
    base, archive = root / layout.base, root / Path(layout.archive).name
    if not base.is_dir():
        if download:
            fetch(layout.archive, layout.md5, archive)
        if not archive.is_file():
            raise FileNotFoundError(f"{base} does not exist: {misplaced(data, root)}")
        try:
            with tempfile.TemporaryDirectory(dir=root) as work:  # moved when whole: an interrupted run starts again
                shutil.unpack_archive(archive, work, **({"filter": "data"} if archive.suffix == ".tar" else {}))
                base.parent.mkdir(exist_ok=True)
                (Path(work) / layout.base).rename(base)
        except Exception as error:
            raise ValueError(f"{archive} could not be unpacked: {error}") from error
    if data == "context" and not (base / layout.lists / "val.txt").is_file():
        sources = [folder / Path(CONTEXT_JSON[0]).name for folder in (base, root)]
        source = sources[not sources[0].is_file()]
        if download:
            fetch(*CONTEXT_JSON, source)
        try:
            context_labels(base, json.loads(source.read_bytes()))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source} is missing; --download fetches it") from error
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{source} is not Context's annotation file: {error}") from error


def verify(data, root):
    """Reads all pictures and labels and says what was found; the first thing wrong is a ValueError or OSError."""
    for split, official in LAYOUTS[data].official.items():
        pairs, seen = Evaluation(open_split(data, root, split), short_side=0), set()
        for i in range(len(pairs)):
            print(f"{data} {split}: {i + 1} of {len(pairs)}", end="\r", file=sys.stderr)
            seen |= set((pairs[i][1].unique() + 1).tolist())  # as in the files; 255 + 1 = 0: ignored
        print(f"{data} {split}: {len(pairs)} pictures with labels (official: {official}), label values {min(seen)} to "
              f"{max(seen)}, {len(seen - {0})} of {len(DATA[data].classes)} classes")


# --- shapes: a miniature world, drawn from seeds, nothing stored --------------------------------------------

# It has two sides. The *web*, on which the tiny CLIP is pre-trained (tests/pretrain.py), has captioned scenes without
# habits and staged close-ups with: each class in its own half of the page and in its own colour. The *target*, to be
# segmented, drawn here, has the same classes anywhere, twins share two colours, and every pixel has a label, for
# evaluation alone. So what patches learn of place and colour from close-ups is a bias on the target.

# Grounds: hue, saturation, value, and the waves of the texture, across and down, a picture of 64 pixels.
GROUNDS = {"wood": (.08, .55, .45, 1, 9), "stone": (.6, .05, .5, 5, 5), "sand": (.12, .3, .75, 13, 13),
           "water": (.57, .5, .55, 3, 12), "grass": (.33, .55, .4, 16, 3), "leaves": (.38, .6, .28, 7, 7),
           "cloth": (.0, .4, .45, 9, 9), "snow": (.6, .07, .85, 2, 4)}
HUES = {"yellow": .14, "orange": .07, "blue": .62, "cyan": .5, "pink": .9, "red": .99, "lime": .25, "green": .36}
# Texture of a class: dark where sin(a u + .5) sin(b v + .5) > t; u, v run from -1 to 1 over the object; 0: no wave.
TEXTURES = {"coin": (9, 9, .25), "ring": (14, 0, .0), "box": (6, 6, .0), "gem": (12, 0, .1),
            "star": (5, 5, .4), "flower": (0, 9, .0), "bee": (9, 0, .0), "beetle": (10, 10, .3)}
SHAPES_SPLITS = {"train": (1000, 101), "val": (300, 102), "test": (500, 103)}  # number of pictures, seed


def draw(thing, xs, ys):
    """One object on the pixels xs, ys: coverage (H, W) in 0..1 and colours (3, H, W)."""
    name, x, y, r, hue, angle = thing
    c, s = math.cos(angle) / r, math.sin(angle) / r
    u, v = c * (xs - x) + s * (ys - y), c * (ys - y) - s * (xs - x)  # the object's own coordinates, about -1..1
    rho, phi = np.hypot(u, v), np.arctan2(v, u)
    inside = {"coin": lambda: 1 - rho, "ring": lambda: np.minimum(1 - rho, rho - .45),
              "box": lambda: .85 - np.maximum(abs(u), abs(v)), "gem": lambda: .75 * (1.05 - abs(u) - abs(v)),
              "star": lambda: .62 + .38 * np.cos(5 * phi) - rho, "flower": lambda: .8 + .2 * np.cos(6 * phi) - rho,
              "bee": lambda: 1 - np.hypot(u, v / .65), "beetle": lambda: 1 - np.hypot(u, v / .75)}[name]()
    a, b, t = TEXTURES[name]
    dark = np.sin(a * u + (.5 if a else 1.57)) * np.sin(b * v + (.5 if b else 1.57)) > t
    if name == "flower":
        dark = rho < .35
    if name == "beetle":
        dark = dark | (inside < .2) | (abs(v) < .08)
    light = np.array(colorsys.hsv_to_rgb(hue % 1, .75, .9))[:, None, None]
    return np.clip(inside * r + .5, 0, 1), light * np.where(dark, .4, 1.)


def paint(size, ground, things, rng):
    """Later things cover earlier ones: picture uint8 (3, size, size), label uint8 (size, size)."""
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    hue, saturation, value, a, b = GROUNDS[ground]
    p, q = rng.uniform(0, 6.28, 2)
    wave = np.sin(a * xs * (2 * math.pi / 64) + p) * np.sin(b * ys * (2 * math.pi / 64) + q)
    picture = np.array(colorsys.hsv_to_rgb(hue, saturation, value))[:, None, None] * (1 + .2 * wave)
    label = np.full((size, size), IGNORE, np.uint8)
    for thing in things:
        coverage, colours = draw(thing, xs, ys)
        picture = picture + coverage * (colours - picture)
        label[coverage > .5] = SHAPES_CLASSES.index(thing[0])
    gain, offset = rng.normal(1, .06, (3, 1, 1)), rng.normal(0, .03, (3, 1, 1))
    picture = picture * gain + offset + rng.normal(0, .03, picture.shape)
    return np.clip(255 * picture, 0, 255).round().astype(np.uint8), label


def new_thing(name, x, y, r, rng, own_colour=0.5):
    """(name, x, y, r, hue, angle); own_colour: how often it shows its own hue for sure, else either of the twins' two.
    One in five has any hue at all."""
    k, hues = SHAPES_CLASSES.index(name), list(HUES.values())
    twins = hues[k // 2 * 2:k // 2 * 2 + 2]
    hue = rng.choice(hues) if rng.random() < .2 else twins[k % 2] if rng.random() < own_colour else rng.choice(twins)
    return name, x, y, r, hue + rng.normal(0, .015), rng.uniform(-.5, .5)


@lru_cache(maxsize=2000)  # a training set is seen many times
def target_scene(seed, i, size=64):
    """One to four different classes that fill much of the picture, without any habit: picture and label."""
    rng = np.random.default_rng((seed, i))
    n, q = rng.integers(1, 5), size / 4
    corners = rng.permutation([(x, y) for x in (q, 3 * q) for y in (q, 3 * q)])
    things = []
    for name, corner in zip(rng.permutation(SHAPES_CLASSES)[:n], corners):
        x, y = corner + rng.uniform(-4, 4, 2) if n > 1 else rng.uniform(.3, .7, 2) * size
        r = rng.uniform(*((20, 28), (16, 21), (14, 19), (13, 18))[n - 1])
        things.append(new_thing(name, x, y, r, rng))
    return paint(size, rng.choice(list(GROUNDS)), things, rng)


class Shapes(Files):
    """A target split with the same methods as Files; picture i depends on the split's seed and i alone."""

    def __init__(self, split):
        count, self.seed = SHAPES_SPLITS[split]
        self.names = [f"{split}_{i:04}" for i in range(count)]

    def picture(self, i):
        """uint8 (3, 64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[0])

    def label(self, i):
        """uint8 (64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[1])


# --- What training and evaluation read ----------------------------------------------------------------------

class Augment:
    """Sec. 4.1, "random cropping and random flipping", with the released sizes: uint8 (3, H, W) -> float
    (3, crop, crop) in [0, 1].

    The picture is resized, ratio kept, to fit r * (long_side, short_side), r uniform in `ratio`; then a random
    crop, a random flip, and photometric distortion (brightness, contrast, saturation, hue; released, not in
    the paper). crop 0 leaves size and place alone. The released code re-draws a crop in which one class covers
    more than 75 %: that looks at labels, so it is not done here.
    """

    def __init__(self, long_side, short_side, crop, ratio=(0.5, 2.0), flip=True, photometric=True):
        self.long_side, self.short_side, self.crop, self.ratio = long_side, short_side, crop, ratio
        self.cut = v2.RandomCrop(crop, pad_if_needed=True, fill=PADDING) if crop else None
        steps = ([v2.RandomHorizontalFlip()] if flip else []) + ([v2.RandomPhotometricDistort()] if photometric else [])
        self.then = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])

    def __call__(self, picture):
        if self.cut:
            r = torch.empty(()).uniform_(*self.ratio).item()
            H, W = picture.shape[1:]
            factor = min(self.long_side * r / max(H, W), self.short_side * r / min(H, W))
            size = [max(1, round(H * factor)), max(1, round(W * factor))]
            picture = self.cut(v2.functional.resize(picture, size, antialias=True))
        return self.then(picture)


class TrainingStream(Dataset):
    """An endless stream over a split; item s is (picture float (3, H, W), name). Labels are never opened.

    Item s belongs to epoch s // N and everything random about it (order, crop, flip, colours) follows from
    (seed, s) alone. So a run can go on at any s, with any number of workers, exactly as if it had not stopped;
    `sampler=range(first, last)` is all the DataLoader needs.
    """

    def __init__(self, split, transform, seed):
        self.split, self.transform, self.seed = split, transform, seed
        self._epoch, self._order = None, None

    def __len__(self):
        return len(self.split)

    def __getitem__(self, s):
        epoch, place = divmod(s, len(self.split))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.split), generator=generator)
        i = int(self._order[place])
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(self.seed * 1_000_003 + s)
            return self.transform(self.split.picture(i)), self.split.names[i]


def resize_short_side(picture, short_side):
    """uint8 (3, H, W) -> (3, h, w), ratio kept: the short side is `short_side` pixels, unless the long one would exceed
    2048 and 4 * short_side; then it gets the larger of these. short_side 0 leaves the size alone."""
    sides, longest = picture.shape[1:], max(2048, 4 * short_side)
    if max(sides) * short_side > longest * min(sides):
        return v2.functional.resize(picture, [max(1, side * longest // max(sides)) for side in sides], antialias=True)
    return v2.functional.resize(picture, [short_side], antialias=True) if short_side else picture


class Thumbnails(Dataset):
    """Each picture as CLIP's image encoder saw pictures in its training: short side to `resolution` (bicubic),
    centre crop. Item i is (float (3, resolution, resolution) in [0, 1], name)."""

    def __init__(self, split, resolution):
        self.split = split
        self.transform = v2.Compose([
            v2.Resize(resolution, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(resolution), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        picture = self.split.picture(i)
        sides = [min(side, 4 * min(picture.shape[1:])) for side in picture.shape[1:]]  # what a strip loses anyway
        return self.transform(v2.functional.center_crop(picture, sides)), self.split.names[i]


class Evaluation(Dataset):
    """Item i is (picture float (3, H, W) in [0, 1] with the given short side, label uint8 at its own size, name)."""

    def __init__(self, split, short_side):
        self.split, self.short_side = split, short_side

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        picture, label = self.split.picture(i), self.split.label(i)
        if label.shape != picture.shape[1:]:
            raise ValueError(f"{self.split.names[i]}: the label is {tuple(label.shape)}, the picture "
                             f"{tuple(picture.shape[1:])} pixels")
        picture = resize_short_side(picture, self.short_side)
        return v2.functional.to_dtype(picture, torch.float32, scale=True), label, self.split.names[i]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetches, unpacks and verifies a data set.")
    parser.add_argument("--prepare", choices=LAYOUTS, required=True)
    parser.add_argument("--root", default="data", help="folder for the archives and all that is in them")
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    args = parser.parse_args()
    try:
        prepare(args.prepare, args.root, args.download)
        verify(args.prepare, args.root)
    except (ValueError, OSError) as error:
        sys.exit(f"datasets.py: {error}")
