"""shapes, a miniature world: 64 x 64 images of eight classes, drawn from seeds, nothing stored.

It is ours, not the paper's: a whole run of the method takes minutes on a CPU there.

What stands here, from top to bottom
    GROUNDS, HUES, TEXTURES   what the world is made of
    Thing, new_thing          an object of a class: its place, size, hue and turn
    draw, paint               an object, and an image of several with its truth, as numpy arrays
    target_scene              one to four different classes that fill much of an image
    Shapes                    a split of such images: what open_split("shapes", ...) gives

The biases of its tiny CLIP are planted. It is pre-trained on the *web* (extras/pretrain.py):
captioned scenes, in which a class stands anywhere, and close-ups, in which each class keeps to its
own half of the image and mostly to its own color; and captions sometimes name a color by the class
that has it, "a box the color of a coin". The *target*, to be segmented, is drawn here and breaks
these habits: the same classes stand anywhere, and a thing shows its own hue in only 62.5 % of
cases, its twin's in 22.5 %, any other in 15 %. Every pixel has its truth, for evaluation alone. So
what the patches learnt on the web is a bias on the target, of the kind that the paper rectifies.

Names, mask colors, prompts and hyper-parameters of shapes stand among the data sets, in
datasets.py. Symbols: H x W pixels; u, v the coordinates of an object.

    split = Shapes("val")
    image, truth = split.image(0), split.truth(0)     # uint8 (3, 64, 64), (64, 64)
"""

import colorsys
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from datasets import IGNORE, SHAPES_CLASSES

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
    """A Thing of that class, place and size, with a random hue and a small random turn.

    own_color: one thing in five gets any of the eight hues. Of the others, this share get their
        class's own hue, and the rest their own or their twin's, at even odds.
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
    """How deep points lie within the outline of a class: above 0 inside, below 0 outside.

    u, v: (H, W), the object's own coordinates: right and down, about -1 to 1 over the object.
    -> (H, W)
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
    return 1 - np.hypot(u, v / 0.75)  # beetle: a rounder ellipse


def is_dark(name, u, v):
    """Where the texture of a class is dark: u, v (H, W), as for depth -> bool (H, W)."""
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

    -> its coverage (H, W), 1 inside and 0 outside with an edge one pixel wide; its colors (3, H, W)
        in [0, 1]
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

    -> the image, uint8 (3, size, size), and its truth, uint8 (size, size), as numpy arrays
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
    """One to four different classes that fill much of an image -> (image, truth), as from paint."""
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
    """A split of the target, used like Files; image i follows from the split's seed and i alone.

    split: "train", "val" or "test".
    """

    def __init__(self, split):
        if split not in SHAPES_SPLITS:
            raise ValueError(f"shapes has no split {split}, only {', '.join(SHAPES_SPLITS)}")
        count, self.seed = SHAPES_SPLITS[split]
        self.names = [f"{split}_{i:04}" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """uint8 (3, 64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[0].copy())

    def truth(self, i):
        """uint8 (64, 64)"""
        return torch.from_numpy(target_scene(self.seed, i)[1].copy())
