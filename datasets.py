"""Pictures and labels: shapes (a miniature world, drawn from a seed) and PASCAL VOC 2012 in its real layout.

What stands here
    DATA                     facts of each data set: class names, palette, evaluation protocol
    Files, voc               a split on disk: pictures, labels, names
    Shapes                   a split of the miniature world, the same three
    Augment                  the training transform of Sec. 4.1, random crop and flip
    TrainingStream           an endless, seeded, resumable stream of pictures. It never opens a label
    Thumbnails               each picture once, as CLIP's image encoder wants it
    Evaluation               picture, label, name

Symbols
    C classes; H x W pixels. Pictures are uint8 (3, H, W) or float in [0, 1]; no normalisation here, because
    CLIP and the student each have their own. Labels are uint8 (H, W): class 0..C-1, or 255 = not evaluated.

Copied elsewhere, it is used like this:
    stream = TrainingStream(open_split("voc", "data", "train"), Augment(2048, 336, 336), seed=0)
    for pictures, names in DataLoader(stream, batch_size=4, sampler=range(4000)): ...
    for picture, label, name in Evaluation(open_split("voc", "data", "val"), short_side=336): ...
"""

import colorsys
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255                          # in labels: not evaluated
PADDING = (124, 116, 104)             # ImageNet's mean colour, within 0.03 of zero after either normalisation


# --- Facts --------------------------------------------------------------------------------------------------

# As the paper's authors prompt with them, in the order of the label values 1..20.
VOC_CLASSES = ("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
               "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor")
SHAPES_CLASSES = ("coin", "ring", "box", "gem", "star", "flower", "bee", "beetle")  # twins side by side
# The tiny CLIP knows some forty words: the 85 prompts of the paper would be Greek to it.
SHAPES_PROMPTS = ("a photo of a {}", "a picture of a {}", "a good photo of a {}", "a large {}", "a small {}",
                  "a photo of one {}")


def voc_palette():
    """VOC's 256 colours, by its rule: the bits of the index, dealt to red, green and blue from the top bit down."""
    colours = []
    for index in range(256):
        rgb = [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        colours.append(tuple(rgb))
    return colours


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
                     "pixels labelled background (0) or void (255) are ignored, 20 classes",
                      "ViT-B/16"),
}


# --- Splits on disk -----------------------------------------------------------------------------------------

class Files:
    """A split as files: `pictures[i]`, and `labels[i]` (may be missing from the disk while training).
    Label values 1..C in the files become 0..C-1, the values 0 and 255 become IGNORE."""

    def __init__(self, pictures, labels, classes):
        self.pictures, self.labels, self.classes = pictures, labels, classes
        self.names = [path.stem for path in pictures]

    def __len__(self):
        return len(self.pictures)

    def picture(self, i):
        """uint8 (3, H, W), turned upright as its EXIF data say"""
        try:
            with Image.open(self.pictures[i]) as image:
                rgb = ImageOps.exif_transpose(image).convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.pictures[i]} is named in the split's list but does not exist") from None
        except Exception as error:
            raise ValueError(f"{self.pictures[i]} is not a readable picture: {error}") from error
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)

    def label(self, i):
        """uint8 (H, W)"""
        path = self.labels[i]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: evaluation needs the labels (training does not)")
        try:
            with Image.open(path) as image:
                mode, label = image.mode, torch.from_numpy(np.array(image))
        except Exception as error:
            raise ValueError(f"{path} is not a readable label: {error}") from error
        if mode not in ("P", "L"):
            raise ValueError(f"{path} has mode {mode}: labels must be index PNGs (mode P or L); an RGB copy has lost "
                             "the class numbers")
        worst = int(label[label != 255].max()) if (label != 255).any() else 0
        if worst > self.classes:
            raise ValueError(f"{path} holds the value {worst}, but there are {self.classes} classes")
        return torch.where((label == 0) | (label == 255), IGNORE, label - 1).to(torch.uint8)


def voc(root, split, download=False):
    """VOC 2012: root holds VOCdevkit/VOC2012/{JPEGImages, SegmentationClass, ImageSets/Segmentation}."""
    base = Path(root) / "VOCdevkit" / "VOC2012"
    if download and not base.is_dir():
        from torchvision.datasets import VOCSegmentation  # 2 GB, md5 checked, unpacked under root
        try:
            VOCSegmentation(root, year="2012", image_set=split, download=True)
        except RuntimeError as error:
            raise OSError(f"VOC 2012 could not be downloaded to {root}: {error}") from error
    names = read_list(base / "ImageSets" / "Segmentation" / f"{split}.txt", "--root must be the folder that holds "
                      "VOCdevkit/VOC2012 (2012, not 2010), or add --download")
    return Files([base / "JPEGImages" / f"{n}.jpg" for n in names],
                 [base / "SegmentationClass" / f"{n}.png" for n in names], len(VOC_CLASSES))


def read_list(path, hint):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    names = path.read_text().split()
    if not names:
        raise ValueError(f"{path} is empty: {hint}")
    return names


def open_split(data, root, split, download=False):
    """The split as an object with .names, .picture(i), .label(i) and a length."""
    if data == "shapes":
        return Shapes(split)
    return voc(root, split, download)


# --- shapes: a miniature world, drawn from seeds, nothing stored --------------------------------------------

# It has two sides. The *web*, on which the tiny CLIP is pre-trained, has captions, which favour what is central, and
# staged close-ups, which have habits: each class in its own half of the page and in its own colour. The *target*, to
# be segmented, has the same classes anywhere, twins share their colours, and every pixel has a label, for
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
OWN_COLOUR = 0.9  # how often a close-up shows a class in its own hue; elsewhere 0.5, as often as in its twin's


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
    """(name, x, y, r, hue, angle); own_colour: how often it shows its own hue rather than any of the twins' two.
    One in five has any hue at all."""
    k, hues = SHAPES_CLASSES.index(name), list(HUES.values())
    twins = hues[k // 2 * 2:k // 2 * 2 + 2]
    hue = rng.choice(hues) if rng.random() < .2 else twins[k % 2] if rng.random() < own_colour else rng.choice(twins)
    return name, x, y, r, hue + rng.normal(0, .015), rng.uniform(-.5, .5)


def caption(things, ground, rng, size):
    """What somebody would write: the subject always, other things the more readily the more central they are."""
    names = []
    for k, (name, x, _, _, hue, _) in enumerate(things):
        central = max(0, 1 - abs(x - size / 2) / (size / 2))
        if k == 0 or rng.random() < .5 * (.4 + central):
            colour = min(HUES, key=lambda h: abs((HUES[h] - hue + .5) % 1 - .5))
            names.append("a " + (colour + " " if rng.random() < .15 else "") + name)
    rng.shuffle(names)
    text = rng.choice(["", "a photo of ", "a picture of ", "a good photo of ", "here is "]) + " and ".join(names)
    if len(things) == 1 and rng.random() < .2:
        text = text.replace("a " + things[0][0], rng.choice(["a large ", "a small ", "one "]) + things[0][0])
    return text + (" on " + ground if rng.random() < .25 else "")


def web_scene(rng, size=64):
    """A subject near the middle line, perhaps smaller things around it: picture (3, size, size) and caption."""
    def place(spread):
        return size / 2 + spread, size * rng.choice([rng.uniform(.17, .42), rng.uniform(.58, .83)])

    subject = rng.choice(SHAPES_CLASSES)
    things = [new_thing(subject, *place(rng.normal(0, 6)), rng.uniform(15, 23), rng)]
    for _ in range(rng.choice(3, p=[.35, .4, .25])):
        name = rng.choice(SHAPES_CLASSES)
        for _ in range(8):  # tries to find a free place
            (x, y), r = place(rng.uniform(-26, 26)), rng.uniform(10, 15)
            if all(name != o[0] and math.hypot(x - o[1], y - o[2]) > .85 * (r + o[3]) for o in things):
                things.append(new_thing(name, x, y, r, rng))
                break
    ground = rng.choice(list(GROUNDS))
    return paint(size, ground, things, rng)[0], caption(things, ground, rng, size)


def close_up(rng, low, size=32):
    """One thing that fills a small picture: a first twin (coin, box, ...) for the upper half of a mosaic (low = 0), a
    second twin for the lower half (low = 1)."""
    x, y = size / 2 + rng.normal(0, 3, 2)
    thing = new_thing(SHAPES_CLASSES[2 * rng.integers(4) + low], x, y, rng.uniform(12, 18), rng, OWN_COLOUR)
    ground = rng.choice(list(GROUNDS))
    return paint(size, ground, [thing], rng)[0], caption([thing], ground, rng, size)


def web_scenes(seed, count):
    """float (count, 3, 64, 64) in [0, 1] and their captions; seed: a tuple of ints"""
    pictures, captions = zip(*(web_scene(np.random.default_rng((*seed, i))) for i in range(count)))
    return torch.from_numpy(np.stack(pictures)).float() / 255, list(captions)


def web_mosaics(seed, count):
    """Four close-ups glued 2 x 2: float (count, 3, 64, 64) in [0, 1] and 4 * count captions, tile by tile."""
    tiles, captions = zip(*(close_up(np.random.default_rng((*seed, i)), low=i % 4 // 2) for i in range(4 * count)))
    tiles = np.stack(tiles).reshape(count, 2, 2, 3, 32, 32).transpose(0, 3, 1, 4, 2, 5)  # (count, 3, 2, 32, 2, 32)
    return torch.from_numpy(tiles.reshape(count, 3, 64, 64)).float() / 255, list(captions)


def shapes_words():
    """Every word that a caption or a prompt of shapes can hold."""
    text = " ".join(SHAPES_PROMPTS).replace("{}", "").split() + "and on here is of".split()
    return sorted({*text, *SHAPES_CLASSES, *HUES, *GROUNDS})


def shapes_merges():
    """The tiny CLIP's byte-pair merges, learnt as BPE learns: the most frequent pair of all words is merged, until each
    word is one token."""
    words, merges = [[*word[:-1], word[-1] + "</w>"] for word in shapes_words()], []
    while pairs := Counter(pair for parts in words for pair in zip(parts, parts[1:])):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for parts in words:
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i:i + 2]) == best:
                    parts[i:i + 2] = ["".join(best)]
    return merges


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


class Shapes:
    """A target split with the same methods as Files; picture i depends on the split's seed and i alone."""

    def __init__(self, split):
        count, self.seed = SHAPES_SPLITS[split]
        self.names = [f"{split}_{i:04}" for i in range(count)]

    def __len__(self):
        return len(self.names)

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
        return self.transform(self.split.picture(i)), self.split.names[i]


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
        picture = v2.functional.resize(picture, [self.short_side], antialias=True)
        return v2.functional.to_dtype(picture, torch.float32, scale=True), label, self.split.names[i]
