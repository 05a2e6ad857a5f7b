"""What the tests share: the repository on the path, a small random CLIP, and the data lent with
the project.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other

from clip_model import CLIP, Tokenizer  # noqa: E402  (the path comes first)
from datasets import voc_palette  # noqa: E402

WORDS = "cat dog grass tree photo of the a this is in scene".split()


def merges_of(words):
    """Merges that make one token of each word, letter by letter from the left."""
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if tuple(parts[:2]) not in merges:
                merges.append(tuple(parts[:2]))
            parts = [parts[0] + parts[1], *parts[2:]]
    return merges


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, alone or with all the others."""
    torch.manual_seed(0)


@pytest.fixture
def merges():
    return merges_of(WORDS)


@pytest.fixture
def make_clip(merges):
    """Builds a small CLIP: random weights in all layers (layer norms and biases too), 2 heads a
    tower.
    """

    def make(
        seed=0,
        embed_dim=12,
        patch=4,
        width=128,
        layers=2,
        grid=3,
        context=60,
        text_width=128,
        text_layers=2,
        quick_gelu=True,
    ):
        vocabulary = 2 * 256 + len(merges) + 2
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clip = CLIP(
                embed_dim,
                patch,
                width,
                layers,
                grid,
                context,
                vocabulary,
                text_width,
                text_layers,
                quick_gelu,
            ).reset_parameters()
            with torch.no_grad():
                for name, parameter in clip.named_parameters():
                    if name != "logit_scale":
                        parameter.add_(0.05 * torch.randn_like(parameter))
        clip.tokenizer = Tokenizer(merges)
        clip.source, clip.sha256 = "made in a test", f"seed {seed}"
        return clip.eval().requires_grad_(False)

    return make


@pytest.fixture
def clip(make_clip):
    return make_clip()


@pytest.fixture
def shared():
    """Path of a file lent with the project; the test is skipped, and says so, where the file is
    not there.
    """

    def path(name):
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not here")
        return DATA / name

    return path


@pytest.fixture
def make_voc(tmp_path):
    """Writes a VOC 2012 of the exact real layout: palette PNGs with the values 0..20 and 255,
    odd sizes.
    """

    def make(counts):
        base, rng = tmp_path / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (base / folder).mkdir(parents=True)
        for split, count in counts.items():
            names = [f"{split}_{i}" for i in range(count)]
            (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
                "\n".join(names) + "\n"
            )
            for i, name in enumerate(names):
                H, W = 60 + 7 * i, 90 + 3 * i
                Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8)).save(
                    base / "JPEGImages" / f"{name}.jpg"
                )
                blocks = rng.choice([*range(21), 255], (20, 20))
                # each value stands in each label
                blocks[:3, :9] = np.resize([*range(21), 255], (3, 9))
                label = Image.fromarray(
                    np.kron(blocks, np.ones((10, 10)))[:H, :W].astype(np.uint8), mode="P"
                )
                label.putpalette([value for color in voc_palette() for value in color])
                label.save(base / "SegmentationClass" / f"{name}.png")
        return tmp_path

    return make


@pytest.fixture
def tiny_clip_file(make_clip, merges, tmp_path):
    """A small CLIP with its own merge list, in a file."""
    clip = make_clip(context=77)
    torch.save(
        {"state_dict": clip.state_dict(), "merges": [list(pair) for pair in merges]},
        tmp_path / "tiny.pt",
    )
    return tmp_path / "tiny.pt"
