"""Pictures and labels: shapes (a miniature world, drawn from a seed) and PASCAL VOC 2012 in its real layout.

What stands here
    DATA                     facts of each data set: class names, palette, evaluation protocol
    Files, voc               a split on disk: pictures, labels, names
    Shapes                   a split of the miniature world, the same three
    Augment                  the training transform of Sec. 4.1, random crop and flip
    TrainingStream           an endless, seeded, resumable stream of pictures. It never opens a label
    Thumbnails               each picture once, as CLIP's image encoder wants it
    Evaluation               picture, label, name
    colour_mask, legend      masks as pictures

Symbols
    C classes; H x W pixels. Pictures are uint8 (3, H, W) or float in [0, 1]; no normalisation here, because
    CLIP and the student each have their own. Labels are uint8 (H, W): class 0..C-1, or 255 = not evaluated.

Copied elsewhere, it is used like this:
    stream = TrainingStream(open_split("voc", "data", "train"), Augment(2048, 336, 336), seed=0)
    for pictures, names in DataLoader(stream, batch_size=4, sampler=range(4000)): ...
    for picture, label, name in Evaluation(open_split("voc", "data", "val"), short_side=336): ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255                          # in labels: not evaluated
PADDING = (124, 116, 104)             # ImageNet's mean colour, within 0.03 of zero after either normalisation

# ---------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------

# As the paper's authors prompt with them, in the order of the label values 1..20.
VOC_CLASSES = ("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
               "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor")


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


DATA = {
    "shapes": DataFacts(("coin","ring"), voc_palette()[1:9], 64, 0.0, "ground ignored", "shapes_clip.pt", ("val","test")),
    "voc": DataFacts(VOC_CLASSES, voc_palette()[1:21], 336, 0.5,
                     "pixels labelled background (0) or void (255) are ignored, 20 classes",
                      "ViT-B/16"),
}

# ---------------------------------------------------------------------------------------------------------
# Splits on disk
# ---------------------------------------------------------------------------------------------------------


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
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"{path} has mode {image.mode}: labels must be index PNGs (mode P or L); an RGB "
                                 "copy has lost the class numbers")
            label = torch.from_numpy(np.array(image))
        worst = int(label[label != 255].max()) if (label != 255).any() else 0
        if worst > self.classes:
            raise ValueError(f"{path} holds the value {worst}, but there are {self.classes} classes")
        return torch.where((label == 0) | (label == 255), IGNORE, label - 1).to(torch.uint8)


def voc(root, split, download=False):
    """VOC 2012: root holds VOCdevkit/VOC2012/{JPEGImages, SegmentationClass, ImageSets/Segmentation}."""
    base = Path(root) / "VOCdevkit" / "VOC2012"
    if download and not base.is_dir():
        from torchvision.datasets import VOCSegmentation  # 2 GB, md5 checked, unpacked under root
        VOCSegmentation(root, year="2012", image_set=split, download=True)
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
    return {"voc": voc}[data](root, split, download)

# SHAPES HERE

# ---------------------------------------------------------------------------------------------------------
# What training and evaluation read
# ---------------------------------------------------------------------------------------------------------


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
