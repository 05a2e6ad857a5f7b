"""Images and their truth: shapes (a miniature world), VOC, Context, ADE20K, and images of your own.

What stands here, from top to bottom
    DataSet, DATA            one entry a data set: class names, colors, protocol, hyper-parameters,
                             and where its files lie
    own_images               such an entry for images of your own
    read_classes             class names as a person writes them
    open_split               one split of a data set, opened
    Files, Folder            a split on disk: images, truth, names; your own images, without truth
    Augment                  the training transform of Sec. 4.1: random crop, random flip
    TrainingStream           an endless, seeded, resumable stream of images. It never opens a label
    Thumbnails               each image once, as CLIP's image encoder wants it
    Evaluation               image, truth, name
    Progress                 one line: how far, how fast, how long still

Words and symbols
    C classes; H x W pixels, H' x W' after resizing.
    image        uint8 (3, H, W), 0 to 255, or float (3, H, W) in [0, 1]. Not normalized by mean and
                 standard deviation here, because CLIP and the student each have their own
    truth        uint8 (H, W): the class 0..C-1 of each pixel, or 255 = IGNORE = not evaluated
    annotation   the file that truth is read from; its values differ from one data set to the next

Sources of numbers: "Sec. 4.1" = the paper, "released" = its authors' code, "ours" = chosen here.

Copied elsewhere (it needs torch, torchvision, numpy and Pillow), it is used like this:

    split = open_split("voc", "data", "train")
    augment = Augment(long_side=2048, short_side=512, crop=512, antialias=False)
    stream = TrainingStream(split, augment, seed=0)
    for images, valid, names in DataLoader(stream, batch_size=4, sampler=range(4000)):
        ...                               # 1000 times; images: float (4, 3, 512, 512) in [0, 1]

    for image, truth, name in Evaluation(open_split("voc", "data", "val"), 2048, 512, False):
        ...                               # image float (3, H', W'), truth uint8 (H, W)

Only shapes needs more: extras/shapes.py draws it, extras/shapes_clip.pt is its tiny CLIP.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255  # in truth: this pixel is not evaluated


# --- Class names and colors -----------------------------------------------------------------------

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
# The colors are those of masks; HUES in extras/shapes.py has those that things are painted in.
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


# --- Data sets: one entry each --------------------------------------------------------------------

@dataclass(frozen=True)
class DataSet:
    """All that is fixed for a data set. A labelled one of your own is one more entry of DATA.

    Its hyper-parameters are fields of train.Settings and reclip.Options: those that have no default
    there (epochs, sides, crops, threshold, top_k, denoise), and those that differ from it.
    """
    name: str                 # the key in DATA; of your own images: a name for them
    classes: tuple            # C names, in the order of the class indices
    palette: list             # C colors (r, g, b)
    background: str           # in words: which pixels are not evaluated
    clip: str                 # default weights: a name that load_clip knows, or a file
    numbers: dict             # hyper-parameters, the same under every recipe
    recipes: dict             # recipe -> further hyper-parameters; the first one is the default
    splits: tuple = ("val",)  # those that eval.py may report on
    prompts: tuple = None     # of the Query; None: the 85 of MaskCLIP and the released code
    antialias: bool = False   # when an image is made smaller (see resize_within); False: released

    # Where the files lie, as everybody has them, and what the label files mean
    base: str = ""            # below root: the folder that holds it all
    images: str = ""          # below base: the images; {} stands for the folder of the split
    annotations: str = ""     # below base: the label files, likewise
    lists: str = ""           # below base: <split>.txt with names; "": all images, sorted by name
    image_suffix: str = ".jpg"       # name + this = file of the image
    annotation_suffix: str = ".png"  # name + this = label file
    split_folders: dict = field(default_factory=dict)  # what {} becomes, by split

    # The value that each class has in the label files, in class order; any ids: 0, 1, 2, ...; 1, 2,
    # 3, ...; Cityscapes' 7, 8, 11, ... And the values of pixels that are not evaluated, unless a
    # class has them. A value of neither list is an error.
    label_values: tuple = ()
    ignored_values: tuple = (0, 255)

    def __post_init__(self):
        if len(self.classes) > 255:
            raise ValueError(f"{len(self.classes)} classes are named: 255 at most (masks are "
                             "bytes, and 255 is no class)")

    def hyper_parameters(self, recipe=None):
        """{name: value} under a recipe; None: the default one. ValueError: there is none such."""
        if recipe is None:
            recipe = next(iter(self.recipes))
        if recipe not in self.recipes:
            raise ValueError(
                f"recipe is {recipe!r}; {self.name} has {' and '.join(self.recipes)} alone"
            )
        return self.numbers | self.recipes[recipe]


# The authors' code exists in two states, whose numbers are the two recipes of the benchmarks:
# cvpr2024, which made the paper's numbers (we infer), and 2025 (reclip.RECIPES has the rest). In
# 2025 the epochs are numbered from 0, and the run stops after number 50 (ADE20K: 100) of a schedule
# laid out for more. Distillation and denoising are the same in both.
DATA = {
    "voc": DataSet(
        name="voc",
        classes=VOC_CLASSES,
        palette=voc_palette()[1:21],
        background="pixels labelled background (0) or void (255) are ignored, 20 classes",
        clip="ViT-B/16",
        numbers=dict(
            threshold=23.0, top_k=2,
            denoise=0.5,
            distill_long_side=2048, distill_short_side=512, distill_crop=512,
            distill_epochs=100,
        ),
        recipes={
            "cvpr2024": dict(
                rectify_long_side=2048, rectify_short_side=512, crop=512,
                rectify_epochs=200, rectify_poly_epochs=200,
            ),
            "2025": dict(
                rectify_long_side=2048, rectify_short_side=336, crop=336,
                rectify_epochs=51, rectify_poly_epochs=200,
            ),
        },
        base="VOCdevkit/VOC2012",
        images="JPEGImages",
        annotations="SegmentationClass",
        lists="ImageSets/Segmentation",
        label_values=tuple(range(1, 21)),  # 0: background, 255: void
    ),
    "context": DataSet(
        name="context",
        classes=CONTEXT_CLASSES,
        palette=voc_palette()[1:60],
        background="pixels labelled 0 (none of the 59) are ignored",
        clip="ViT-B/16",
        numbers=dict(
            threshold=20.0, top_k=6,
            denoise=0.6,
            distill_long_side=520, distill_short_side=520, distill_crop=480,
            distill_epochs=150,
        ),
        recipes={
            "cvpr2024": dict(
                rectify_long_side=520, rectify_short_side=520, crop=480,
                rectify_epochs=150, rectify_poly_epochs=150,
            ),
            "2025": dict(
                rectify_long_side=2048, rectify_short_side=448, crop=480,
                rectify_epochs=51, rectify_poly_epochs=400,
            ),
        },
        base="VOCdevkit/VOC2010",
        images="JPEGImages",
        annotations="SegmentationClassContext",
        lists="ImageSets/SegmentationContext",
        label_values=tuple(range(1, 60)),
        ignored_values=(0,),  # none of the 59. 255 must stay an error: it occurs only in copies
                              # whose labels start at 0, which would be read shifted by one
    ),
    "ade20k": DataSet(
        name="ade20k",
        classes=ADE_CLASSES,
        palette=voc_palette()[1:151],  # VOC's colors, not ADE's official ones
        background="pixels labelled 0 (other) are ignored, 150 classes",
        clip="ViT-B/16",
        numbers=dict(
            threshold=21.0, top_k=5,
            denoise=0.5,
            distill_long_side=2048, distill_short_side=512, distill_crop=512,
            distill_epochs=150,
        ),
        recipes={
            "cvpr2024": dict(
                rectify_long_side=2048, rectify_short_side=512, crop=512,
                rectify_epochs=150, rectify_poly_epochs=150,
            ),
            "2025": dict(
                rectify_long_side=2048, rectify_short_side=512, crop=512,
                rectify_epochs=101, rectify_poly_epochs=600,
            ),
        },
        base="ADEChallengeData2016",
        images="images/{}",
        annotations="annotations/{}",
        label_values=tuple(range(1, 151)),
        ignored_values=(0,),  # other; not 255, as above
        split_folders={"train": "training", "val": "validation"},
    ),
    # The miniature world. All numbers are ours, chosen on its val split. The cosines of its tiny
    # CLIP differ by 0.2 where those of OpenAI's differ by 0.02: hence its higher temperatures and
    # threshold. Each class has its own prompt: a shared one gained 5.0 on val where this gained 8.4
    # (three CLIPs, three seeds), as a text encoder of two layers makes much the same of it before
    # every name.
    "shapes": DataSet(
        name="shapes",
        classes=SHAPES_CLASSES,
        palette=SHAPES_PALETTE,
        background="ground pixels are ignored, 8 classes",
        clip=str(Path(__file__).with_name("extras") / "shapes_clip.pt"),
        numbers=dict(
            rectify_epochs=20, rectify_poly_epochs=20,
            rectify_batch=32, lr=2.0,
            threshold=45.0, top_k=1,
            prompt_length=4, prompt_per_class=True,
            positional_gain=0.05,
            tau_1=0.02, tau=0.033,
            denoise=0.0,
            rectify_long_side=2048, rectify_short_side=64, crop=0,
            student="tiny", backbone_weights="none",
            distill_epochs=13, distill_batch=8, distill_lr=0.1,
            distill_long_side=2048, distill_short_side=64, distill_crop=0,
            flip=False, photometric=False,
        ),
        recipes={"2025": {}},  # no other: it runs CLIP as CLIP was trained
        splits=("val", "test"),
        prompts=SHAPES_PROMPTS,
        antialias=True,
    ),
}


def own_images(name, class_names):
    """The DataSet of your own images, which have no truth.

    Its numbers are VOC's under the recipe 2025, whose threshold and top_k suit names of single,
    different things. Denoising is tuned to VOC, so it is off (ours). A folder gives few steps, of
    few images, and two more numbers are ours. M_p starts small, at a quarter of CLIP's temperature
    (positional_gain None): by itself it is far larger than what CLIP's cosines differ by. And the
    learning rate is a tenth, so that no single image pulls the bias far. Images made smaller are
    antialiased (ours). Tried on 20 images of shapes as such a folder, for which plain CLIP has 44.2
    mIoU (the folder of tests/test_long_runs.py, with --positional-gain and --lr; the first row at
    commit a0a220d):

        positional_gain       lr       mIoU, seeds
        1                     0.01     35.7, 38.8
        CLIP's temperature    0.01     40.8 .. 47.8 (six)
        a quarter of it       0.01     42.7 .. 48.5 (nine)
        no M_p                0.01     41.8 .. 45.6 (six)
        a quarter of it       0.001    43.6 .. 47.5 (nine)

    name: a name for them. class_names: the classes to look for.
    """
    voc = DATA["voc"]
    return DataSet(
        name=name,
        classes=tuple(class_names),
        palette=voc_palette()[1:1 + len(class_names)],
        background="no labels",
        clip=voc.clip,
        numbers=voc.numbers | voc.recipes["2025"] | {
            "denoise": 0.0,
            "positional_gain": None,
            "lr": 0.001,
        },
        recipes={"2025": {}},  # no other: it runs CLIP as CLIP was trained
        splits=(),
        antialias=True,
    )


# --- Lists that people write ----------------------------------------------------------------------

def read_classes(text):
    """Reads class names as a person writes them: "cat, dog|puppy" -> ("cat", "dog | puppy").

    text: a bar separates synonyms. It may also be the path of a text file with one class a line
        (read_lines).
    Errors: ValueError for fewer than two classes, an empty name, a name twice, a comma in a line.
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
            f"the class list '{text}' needs two names or more, none empty, none twice (or a file "
            "of such lines); a class and everything else is 'cat, background'"
        )
    return tuple(classes)


def read_lines(path):
    """The lines of a text file without the empty ones and the remarks, which begin with #.

    UTF-8, with a byte-order mark or without, and the line ends of any system. ValueError: another
    encoding, whose names would come out wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:  # UTF-16 is full of zeros
        raise ValueError(f"{path} is not text in UTF-8: save it in that encoding")

    lines = []
    for line in text.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            lines.append(line)
    return lines


# --- Splits on disk -------------------------------------------------------------------------------

def open_split(data, root, split):
    """Opens a split: an object with .names, .image(i), .truth(i) and a length.

    data: a key of DATA, or the path of a folder with your own images.
    root: the folder that holds VOCdevkit or ADEChallengeData2016; shapes and folders need none.
    split: "train" or "val" (shapes: also "test"); a folder has no splits.
    """
    if data == "shapes":
        from extras.shapes import Shapes  # drawn, not read; this file copied alone has no shapes
        return Shapes(split)
    if data not in DATA:
        return Folder(data)

    entry = DATA[data]
    base = Path(root) / entry.base
    split_folder = entry.split_folders.get(split, split)
    images = base / entry.images.format(split_folder)
    annotations = base / entry.annotations.format(split_folder)

    # What says which images belong to the split: a list of names, else the folder itself.
    source = images
    if entry.lists:
        source = base / entry.lists / f"{split}.txt"
    if not source.exists():
        raise FileNotFoundError(
            f"{source} is missing: python extras/prepare.py {data} --root {root} --download "
            "fetches the paper's data sets, and without --download says what lies in a wrong place"
        )

    names = []
    if entry.lists:
        names = read_lines(source)
    else:
        # At every depth: Cityscapes has a folder for each city. Sorted: a file system lists a
        # folder in any order it likes, and not twice in the same one.
        for path in sorted(images.rglob(f"*{entry.image_suffix}")):
            below = path.relative_to(images).as_posix()  # "aachen/aachen_0_leftImg8bit.png"
            names.append(below.removesuffix(entry.image_suffix))

    if not names:
        raise ValueError(f"{source} is empty")

    image_paths = [images / f"{name}{entry.image_suffix}" for name in names]
    annotation_paths = [annotations / f"{name}{entry.annotation_suffix}" for name in names]
    if not image_paths[0].is_file():
        raise FileNotFoundError(
            f"{image_paths[0]} is missing: the images are not there, or '{names[0]}' in {source} "
            "is not a name alone, without folder, suffix and label file, like 2007_000032"
        )
    return Files(names, image_paths, annotation_paths, entry.label_values, entry.ignored_values)


# Your own images, in upper or lower case; and what a file may hold, whatever its name says (for
# some other formats Pillow starts programs).
SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def read_image(path, draft=False):
    """Reads any image file as uint8 (H, W, 3), upright as its EXIF data say; see to_rgb.

    draft: only find out whether the file is readable. A JPEG is then decoded to its end, but at an
        eighth of its size, which is much faster.
    Errors: FileNotFoundError; ValueError if it is not readable.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if draft:
                image.draft(None, (1, 1))  # as small as its format allows; only JPEG knows this
            deep = any(";16" in str(tile) for tile in image.tile)  # 16 bits a color, in the file

            image = ImageOps.exif_transpose(image)
            gray = image.mode.startswith("I")
            if deep and not gray and np.asarray(image.convert("RGB")).max() < 64:
                # Pillow has kept the upper 8 of the 16 bits: of 12 bits only 4 are left.
                raise ValueError("its brightest value is below a quarter of its 16 bits: save it "
                                 "with 8 bits a color")
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def to_rgb(image):
    """A PIL image of any mode -> uint8 (H, W, 3).

    What is transparent becomes white; gray values of more than 8 bits, and floats, are scaled
    (Pillow's own conversion would clip them).
    """
    if image.mode.startswith("I"):
        image = scale_gray(image, (255, 1023, 4095, 16383, 65535))  # 8, 10, 12, 14, 16 bits
    elif image.mode == "F":
        image = scale_gray(image, (1, 255))
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def scale_gray(image, tops):
    """Brings a gray image to 0..255. Files do not say what stands for white.

    So it is the least of `tops` that no value exceeds: cameras and microscopes store 12 bits in 16,
    and the image would be black if 65535 were white.
    """
    values = np.asarray(image).astype(float)  # (H, W)
    for top in tops:
        if values.min() >= 0 and values.max() <= top:
            return Image.fromarray((values * 255 / top).round().astype(np.uint8))
    raise ValueError(f"its values, {values.min()} to {values.max()}, are not within 0..{tops[-1]}")


class Files:
    """A split as files on disk.

    names: of the images, all different; what is kept of an image is kept by its name.
    image_paths: the images.
    annotation_paths: their label files. For training they need not exist.
    label_values: the value of each class in the label files, 0 to 65535, in class order.
    ignored_values: values of pixels that are not evaluated, except where a class has the value (so
        a data set whose labels start at 0 need not change the default).
    """

    def __init__(
        self, names, image_paths, annotation_paths, label_values, ignored_values=(0, 255)
    ):
        self.names = names
        self.image_paths = image_paths
        self.annotation_paths = annotation_paths
        self.label_values = tuple(label_values)

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
        return torch.from_numpy(read_image(self.image_paths[i])).permute(2, 0, 1)

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

        if mode not in ("P", "L", "I;16", "I"):  # I: 16 bits, as Pillow before 10.4 opens them
            raise ValueError(
                f"{path} has mode {mode}, not P, L or I;16: an RGB copy of an annotation has lost "
                "the class numbers"
            )

        classes = self._class_of[values]  # (H, W)
        if (classes < 0).any():
            raise ValueError(
                f"{path} holds the value {values[classes < 0].max()}, which stands for none of the "
                f"{len(self.label_values)} classes: looks like labels that start at 0 and have 255 "
                "for what is ignored, the 60-class or 459-class labels of Context, the full "
                "ADE20K, or another data set"
            )
        return torch.from_numpy(classes.astype(np.uint8))


class Folder(Files):
    """Your own images, without truth: files, and folders that are searched at every depth.

    Every image is read once, so that a broken one does not stop a long run later: the unreadable
    ones are left out, reported on stderr and named in .skipped. Its .names are paths below the
    folder (of a file: its name); if two are alike, all are absolute.

    Errors: FileNotFoundError if a path does not exist; ValueError if no image is readable.
    """

    def __init__(self, *paths):
        names = {}  # path -> name
        for path in paths:
            path = Path(path)
            if path.is_dir():
                for file in find_images(path):
                    names[file.absolute()] = file.relative_to(path).as_posix()
            else:
                names[path.absolute()] = path.name

        # Two folders may both hold a cat.jpg; masks and labels are kept by name: names must differ.
        if len(set(names.values())) < len(names):
            names = {path: path.as_posix() for path in names}

        readable = {}  # path -> name
        reports = []
        self.skipped = []
        progress = Progress("look at images", len(names))
        for done, (path, name) in enumerate(names.items(), start=1):
            try:
                read_image(path, draft=True)
                readable[path] = name
            except ValueError as error:
                reports.append(f"skipped {name}: {error.__cause__}")
                self.skipped.append(name)
            progress(done)

        if len(reports) > 10:
            reports[10:] = [f"and {len(reports) - 10} more"]
        for report in reports:
            print(report, file=sys.stderr)
        if not readable:
            raise ValueError(
                f"{', '.join(map(str, paths))} holds no readable image ({', '.join(SUFFIXES)})"
            )

        super().__init__(
            list(readable.values()), list(readable), annotation_paths=None, label_values=()
        )


def find_images(folder):
    """The paths of a folder's images, at every depth and sorted.

    Left out, and counted on stderr: files of other kinds, and what eval.py drew, since training on
    masks would spoil a model without a word. A folder of masks is known by its NAME.index.png, an
    image of examples, eval_STAGE.png, by the JSON beside it.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]

    mask_folders = set()
    for file in files:
        if file.name.endswith(".index.png") and "masks" in file.absolute().parts:
            mask_folders.add(file.parent)

    images = []
    drawn = 0
    others = Counter()  # suffix -> number of files
    for file in files:
        is_examples = file.name.startswith("eval_") and file.with_suffix(".json").is_file()
        if file.suffix.lower() not in SUFFIXES:
            others[file.suffix.lower() or file.name] += 1
        elif file.parent in mask_folders or is_examples:
            drawn += 1
        else:
            images.append(file)

    if drawn:
        print(f"{folder}: left out {drawn} images that eval.py drew", file=sys.stderr)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(10))
        print(f"{folder}: left out {others.total()} files of other kinds than "
              f"{', '.join(SUFFIXES)}: {kinds}", file=sys.stderr)
    return images


# --- What training and evaluation read ------------------------------------------------------------

def size_within(height, width, long_side, short_side):
    """The largest size (H', W'), ratio kept, within long_side by short_side pixels; rounded."""
    factor = min(long_side / max(height, width), short_side / min(height, width))
    return [max(1, int(side * factor + 0.5)) for side in (height, width)]


def resize_within(image, long_side, short_side, antialias):
    """Resizes an image (3, H, W) -> (3, H', W') to size_within; short_side 0: it stays.

    antialias: where an image is made smaller, True averages all old pixels under a new one; False
        interpolates between the nearest four and skips the rest (as the released code does, through
        OpenCV: fine structure comes out rougher).
    """
    if short_side == 0:
        return image
    size = size_within(*image.shape[1:], long_side, short_side)
    return v2.functional.resize(image, size, antialias=antialias)


def to_float(image):
    """uint8, or float in [0, 1] (a little beyond, after resizing) -> float32 in the same range.

    ValueError: other values, which would come out black or burnt.
    """
    if image.dtype != torch.uint8:
        if not image.is_floating_point() or not (image.min() > -1 and image.max() < 2):
            raise ValueError(
                f"an image of {image.dtype} is neither uint8 nor float in 0..1: divide it by the "
                "value that stands for white"
            )
    return v2.functional.to_dtype(image, torch.float32, scale=True)


def distort_colors(image):
    """Random changes of color of an image, float (3, H, W) in [0, 1] -> the same.

    So nothing that is learnt hangs on the light of a photograph. Each of the four happens half of
    the time: brightness, up to 32 of 255 levels added or taken off; contrast, all values times 0.5
    to 1.5; saturation times 0.5 to 1.5; hue, turned by up to 18 of 180 steps. Contrast comes before
    or after the last two. As released, except saturation: torchvision blends with gray, the
    released code scales S of HSV.
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
    """The training transform: uint8 (3, H, W) -> image float (3, crop, crop) in [0, 1], valid bool.

    valid (crop, crop) is False on the padding, which is on the right and below where the image is
    smaller than the crop. A network sets it to 0 after its own normalization, so that padding has
    the mean color, whatever that is for it.

    "Random cropping and random flipping" (Sec. 4.1), with the released sizes and, as released,
    photometric distortion. The released code draws a crop again in which one class covers more than
    75 %: that looks at the truth, so it is not done here.

    long_side, short_side: pixels; before the crop the image is resized, smaller or larger but its
        ratio kept, to the largest size within r * long_side by r * short_side.
    crop: side of the random square, pixels; 0: neither resize nor crop, the image stays whole.
    ratio: r is drawn uniformly between these two (default: released).
    flip: mirror left to right, half of the time.
    photometric: distort_colors.
    antialias: as in resize_within.

    Its .changes says whether the same image may look different each time it comes. If not, whatever
    is computed from it alone (CLIP's features) need be computed only once.
    """

    def __init__(
        self,
        long_side,
        short_side,
        crop,
        ratio=(0.5, 2.0),
        flip=True,
        photometric=True,
        *,
        antialias,
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

        image = to_float(image)
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
        return len(self.split)  # of one epoch; what the DataLoader asks for, its sampler says

    def __getitem__(self, s):
        epoch, place = divmod(s, len(self.split))

        # A new order for each epoch, computed once and kept while the items stay in that epoch.
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.split), generator=generator)
            self._epoch = epoch
        i = int(self._order[place])

        # The transform draws from torch's global generator: it is seeded for this item, and set
        # back afterwards, so that the caller's own random numbers do not notice. (torch.manual_seed
        # would turn to each kind of GPU too, and take longer than the transform. A run of more than
        # 1,000,003 items, ADE20K's, shares draws with the next seed.)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + s)
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
        bicubic = InterpolationMode.BICUBIC
        image = self.split.image(i)
        image = v2.functional.resize(image, [self.resolution], bicubic, antialias=True)
        image = v2.functional.center_crop(image, [self.resolution, self.resolution])
        return to_float(image), self.split.names[i]


class Evaluation(Dataset):
    """Images with their truth: item i is (image, truth, name).

    image: float (3, H', W') in [0, 1], resized as resize_within does; short_side 0: its own size.
    truth: uint8 (H, W), at the size of the file, because a number is reported at that size.
    """

    def __init__(self, split, long_side, short_side, antialias):
        self.split = split
        self.long_side = long_side
        self.short_side = short_side
        self.antialias = antialias

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

        image = resize_within(image, self.long_side, self.short_side, self.antialias)
        return to_float(image), truth, name


class Progress:
    """Shows on stderr how far a loop is: in place on a terminal, a line now and then in a log.

        progress = Progress("eval", total=1449)
        progress(12)                            # eval  12/1449  8.3 images/s  0:02:53 left

    name: what is being done. total: number of steps.
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
        """Shows it. step: number of steps done. extra: more to show, with a space at its end."""
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
