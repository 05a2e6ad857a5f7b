"""datasets.py: the lists, label files and images that people have; training and evaluation of them.

From top to bottom: names and colors; text files; splits and truth; odd images; folders; resizing,
augmentation and the stream; what evaluation reads.
"""

import colorsys
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

import datasets
import eval as evaluation
from conftest import ROOT, close, command, sentence
from datasets import (
    DATA,
    IGNORE,
    Augment,
    Evaluation,
    Files,
    Folder,
    Progress,
    Thumbnails,
    TrainingStream,
    distort_colors,
    open_split,
    read_classes,
    read_image,
    read_lines,
    resize_within,
    size_within,
    to_float,
    voc_palette,
)


@pytest.fixture
def voc_root(make_voc):
    return make_voc({"train": 5, "val": 3})


def noise(height, width, *channels):
    """A PIL image of random pixels."""
    values = torch.randint(0, 256, (height, width, *channels), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def numbered(height, width):
    """uint8 (3, H, W): red says the row of a pixel, green its column; neither is ever 0."""
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    image[0] = torch.arange(height)[:, None] + 1
    image[1] = torch.arange(width) + 1
    return image


# --- Class names and colors -----------------------------------------------------------------------

def test_palette_is_the_one_printed_in_vocs_development_kit():
    palette = voc_palette()

    assert palette[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert palette[20] == (0, 64, 128) and palette[255] == (224, 224, 192)
    assert DATA["voc"].palette[DATA["voc"].classes.index("person")] == (192, 128, 128)


@pytest.mark.parametrize("data, list_of_names", [
    ("voc", "voc20"), ("context", "context59"), ("ade20k", "ade150"),
])
def test_classes_are_those_the_authors_prompt_with(shared, data, list_of_names):
    entry = DATA[data]

    prompted = shared(f"classes/{list_of_names}_prompted.txt").read_text().split("\n")

    assert list(entry.classes) == prompted[:len(entry.classes)]
    assert len(entry.classes) == len(set(entry.palette)) == len(set(entry.label_values))


# --- Text files as people have them ---------------------------------------------------------------

@pytest.mark.parametrize("text, classes", [
    (" cat, dog|puppy ,grass", ("cat", "dog | puppy", "grass")),
    ("cat, background", ("cat", "background")),
    (", ".join(f"class {i}" for i in range(2000)), tuple(f"class {i}" for i in range(2000))),
    ("a\0, b", ("a\0", "b")),  # a path can be neither as long as the one above, nor hold a NUL
])
def test_classes_as_a_list(text, classes):
    assert read_classes(text) == classes


TWO = ("café", "犬 | 小犬")
LINES = "café\n犬|小犬\n"


@pytest.mark.parametrize("content", [
    LINES.encode("utf-8"),
    LINES.encode("utf-8-sig"),
    LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    LINES.replace("\n", "\r").encode("utf-8"),
    "# mine\n\n  café \n\n# a remark\n 犬 | 小犬".encode(),
], ids=["utf-8", "with a mark", "windows", "old mac", "remarks"])
def test_a_text_file_gives_whole_names(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)

    assert read_classes(str(tmp_path / "classes.txt")) == TWO


@pytest.mark.parametrize("content", [
    "café\nnoël\n".encode("latin-1"),
    "猫\n犬\n".encode("shift_jis"),
    "cat\ndog\n".encode("utf-16"),
    "cat\ndog\n".encode("utf-16-le"),   # without its mark
], ids=["latin-1", "shift_jis", "utf-16", "utf-16 without a mark"])
@pytest.mark.parametrize("read", [read_classes, read_lines])
def test_a_text_file_of_another_encoding_is_refused_by_name(tmp_path, read, content):
    path = tmp_path / "names.txt"
    path.write_bytes(content)

    with pytest.raises(ValueError) as caught:
        read(str(path))

    assert sentence(caught) == f"{path} is not text in UTF-8: save it in that encoding"


def test_prompts_are_lines_with_one_place_for_the_name(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# of mine\r\na photo of a {}.\r\n\r\n{} in snow\r\n".encode())

    assert read_lines(path) == ["a photo of a {}.", "{} in snow"]


def test_names_in_any_script_are_trained_on_where_a_terminal_cannot_print_them(
    tiny_clip_file, tmp_path
):
    for name in ("Grüße.png", "猫.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        noise(20, 30, 3).save(tmp_path / "photos" / name)
    (tmp_path / "classes.txt").write_text(LINES, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a photo of the {}")

    command(
        "train.py", "--stage", "rectify", "--data", "photos", "--classes", "classes.txt",
        "--prompts", "prompts.txt", "--clip", tiny_clip_file, "--epochs", "1", "--crop", "16",
        "--rectify-short-side", "16", "--device", "cpu",
        cwd=tmp_path, PYTHONIOENCODING="ascii",
    )

    assert (tmp_path / "runs/photos/rectify.pt").is_file()


# --- Splits and their truth -----------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png",
    "JPEGImages/2007_000032.jpg",
    "2007_000032.jpg",
    "2007_000032.png",
    "JPEGImages/2007_000032",
    "2007_000032 -1",
])
def test_a_list_in_another_style_is_answered_with_a_line_as_it_should_be(voc_root, line):
    path = voc_root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_text(f"{line}\n")

    with pytest.raises(FileNotFoundError) as caught:
        open_split("voc", voc_root, "train")

    assert f"is missing: the images are not there, or '{line}' in {path} is" in sentence(caught)
    assert sentence(caught).endswith("like 2007_000032")


def write_label(path, values, dtype=np.uint8):
    Image.fromarray(np.array(values, dtype)).save(path)
    return path


def test_vocs_labels_are_read_by_index_0_and_255_are_ignored(voc_root):
    split = open_split("voc", voc_root, "val")
    path = voc_root / "VOCdevkit/VOC2012/SegmentationClass/val_1.png"
    values = np.array(Image.open(path))  # of a palette image: indices; each of 0..20, and 255

    truth = split.truth(1)

    assert truth.dtype == torch.uint8 and truth.shape == (67, 93)
    for value in (*range(21), 255):
        expected = IGNORE if value in (0, 255) else value - 1
        assert set(truth.numpy()[values == value]) == {expected}


@pytest.mark.parametrize("label_values, ignored, labels, truth", [
    ((0, 1, 2), (0, 255), [[0, 1, 2], [2, 255, 0]], [[0, 1, 2], [2, 255, 0]]),
    ((11, 7, 33), (0, 4), [[7, 11, 33], [4, 0, 7]], [[1, 0, 2], [255, 255, 1]]),
    ((40000, 300, 65535), (0,), [[300, 65535], [0, 40000]], [[1, 2], [255, 0]]),
], ids=["from 0", "scattered", "of 16 bits"])
def test_labels_may_have_any_values(tmp_path, label_values, ignored, labels, truth):
    kind = np.uint16 if max(label_values) > 255 else np.uint8
    path = write_label(tmp_path / "a.png", labels, kind)
    as_older_pillow_opens_16_bits = write_label(tmp_path / "a.tif", labels, np.int32)

    for path in (path, as_older_pillow_opens_16_bits):
        assert Files(["a"], [path], [path], label_values, ignored).truth(0).tolist() == truth


@pytest.mark.parametrize("data, classes", [("ade20k", 150), ("context", 59)])
def test_labels_of_a_benchmark_that_start_at_0_are_refused(tmp_path, data, classes):
    """Shifted by one, sky would be read as floor; only 255, which stands for 0 there, tells."""
    entry = DATA[data]
    path = write_label(tmp_path / "from_0.png", [[0, 1, classes - 1, 255]])

    with pytest.raises(ValueError) as caught:
        Files(["a"], [path], [path], entry.label_values, entry.ignored_values).truth(0)

    assert "from_0.png holds the value 255" in sentence(caught)
    assert "labels that start at 0" in sentence(caught)


IMAGE = "JPEGImages/val_0.jpg"
LABEL = "SegmentationClass/val_0.png"


@pytest.mark.parametrize("file, content, words", [
    (IMAGE, None, "val_0.jpg is missing: the images are not there"),
    ("JPEGImages/val_1.jpg", None, "val_1.jpg does not exist"),
    (IMAGE, b"no image", "val_0.jpg is not a readable image"),
    (LABEL, None, "val_0.png is missing: evaluation needs the annotations (training does not)"),
    (LABEL, b"no image", "val_0.png is not a readable annotation"),
    (LABEL, np.zeros((60, 90, 3)), "val_0.png has mode RGB"),
    (LABEL, np.full((60, 90), 21), "the value 21, which stands for none of the 20 classes"),
    (LABEL, np.ones((9, 8)), "val_0: the annotation is (9, 8), the image (60, 90) pixels"),
    ("ImageSets/Segmentation/val.txt", b"# nothing", "val.txt is empty"),
])
def test_what_is_wrong_with_a_split_is_named(voc_root, file, content, words):
    path = voc_root / "VOCdevkit/VOC2012" / file
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_label(path, content)

    with pytest.raises((ValueError, OSError)) as caught:
        pairs = Evaluation(open_split("voc", voc_root, "val"), 2048, 64, antialias=False)
        for i in (1, 0):
            pairs[i]

    assert words in sentence(caught)


@pytest.mark.parametrize("data, labels, counts", [
    ("voc", "VOCdevkit/VOC2012/SegmentationClass", (3, 17)),
    ("context", "VOCdevkit/VOC2010/SegmentationClassContext", (2, 2)),
    ("ade20k", "ADEChallengeData2016/annotations/validation", (3, 5)),
])
def test_real_files_of_the_benchmarks(shared, data, labels, counts):
    """Value v is class v - 1; 0 and VOC's borders are ignored."""
    root = shared("classes").parent

    split = open_split(data, root, "val")

    assert (len(open_split(data, root, "train")), len(split)) == counts
    for i, name in enumerate(split.names):
        values = np.array(Image.open(shared(f"{labels}/{name}.png"))).astype(int)
        expected = np.where((values == 0) | (values == 255), IGNORE, values - 1)
        assert np.array_equal(split.truth(i), expected)
        assert split.image(i).shape == (3, *values.shape)


@pytest.fixture
def cities(tmp_path, monkeypatch):
    """Two images in the layout of Cityscapes, which is an entry of DATA as in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entry = readme[readme.index('DATA["cityscapes"]'):].split("```")[0]
    monkeypatch.setitem(DATA, "cityscapes", None)  # it is taken out again after the test
    exec(entry, dict(vars(datasets)))

    for city in ("zurich", "aachen"):
        images = tmp_path / "cityscapes/leftImg8bit/train" / city
        labels = tmp_path / "cityscapes/gtFine/train" / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        noise(2, 3, 3).save(images / "same 1_leftImg8bit.png")
        write_label(labels / "same 1_gtFine_labelIds.png", [[7, 26, 4], [0, 255, 33]])
        noise(2, 3, 3).save(images / "same 1_rightImg8bit.png")  # these two are not meant
        noise(2, 3).save(labels / "same 1_gtFine_instanceIds.png")
    return tmp_path


def test_a_data_set_of_ones_own_is_one_entry(cities):
    """With folders at any depth, suffixes and label values of its own."""
    split = open_split("cityscapes", cities, "train")

    # Pseudo-labels are kept by name: two cities may hold files of one name, so the city is in it.
    assert split.names == ["aachen/same 1", "zurich/same 1"]
    pixels = Image.open(cities / "cityscapes/leftImg8bit/train/zurich/same 1_leftImg8bit.png")
    assert np.array_equal(split.image(1).permute(1, 2, 0), np.array(pixels))

    road, car, bicycle = map(DATA["cityscapes"].classes.index, ("road", "car", "bicycle"))
    expected = [[road, car, IGNORE], [IGNORE, IGNORE, bicycle]]
    assert split.truth(1).tolist() == expected


# --- Odd images -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, color, suffix, expected", [
    ("L", 77, "png", (77, 77, 77)),
    ("L", 50, "JPEG", (50, 50, 50)),
    ("1", 1, "png", (255, 255, 255)),
    ("RGB", (9, 8, 7), "PNG", (9, 8, 7)),
    ("RGBA", (200, 0, 0, 0), "png", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
    ("LA", (100, 0), "png", (255, 255, 255)),
    ("CMYK", (0, 0, 0, 0), "jpg", (255, 255, 255)),
])
def test_every_kind_of_color_becomes_rgb_and_what_is_transparent_white(
    tmp_path, mode, color, suffix, expected
):
    Image.new(mode, (8, 5), color).save(tmp_path / f"a.{suffix}")

    image = read_image(tmp_path / f"a.{suffix}")

    assert image.shape == (5, 8, 3) and image.dtype == np.uint8
    assert (image == expected).all()


def test_a_color_of_the_palette_may_be_transparent(tmp_path):
    image = noise(5, 8, 3).quantize(4)
    image.save(tmp_path / "a.png", transparency=3)

    expected = np.array(image.convert("RGB"))
    expected[np.array(image) == 3] = 255
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)


def test_an_image_is_turned_as_its_camera_was(tmp_path):
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6  # to be turned clockwise
    image = noise(8, 16, 3)
    image.save(tmp_path / "a.png", exif=on_its_side)

    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(image, -1))


RAMP = np.linspace(0, 1, 40 * 30).reshape(40, 30)  # from black to white


@pytest.mark.parametrize("white, kind, suffix", [
    *((2 ** bits - 1, np.uint16, "png") for bits in (8, 10, 12, 14, 16)),
    *((2 ** bits - 1, np.uint16, "tif") for bits in (8, 10, 12, 14, 16)),
    (1, np.float32, "tif"),
    (255, np.float32, "tif"),
])
def test_gray_values_that_do_not_fill_their_range_are_scaled(tmp_path, white, kind, suffix):
    values = RAMP * white
    if kind == np.uint16:
        values = values.round()
    Image.fromarray(values.astype(kind)).save(tmp_path / f"a.{suffix}")

    image = read_image(tmp_path / f"a.{suffix}")

    assert abs(image - 255 * RAMP[:, :, None]).max() <= 1


@pytest.mark.parametrize("values", [
    (RAMP * 1000).astype(np.float32),
    (RAMP - 1).astype(np.float32),
    np.full((4, 5), np.nan, np.float32),
    (RAMP * 100000).astype(np.int32),
], ids=["floats to 1000", "below 0", "nan", "beyond 16 bits"])
def test_values_of_which_nobody_knows_what_is_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")

    with pytest.raises(ValueError, match="a.tif is not .* its values, .* are not within 0.."):
        read_image(tmp_path / "a.tif")


def png(width, height, bits, pixels):
    """The bytes of a PNG, color, of `bits` a channel: Pillow writes none of 16."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_fewer_bits_in_16_of_a_color_image_are_refused(tmp_path, bits):
    """Of 16 bits a color, Pillow gives the upper 8: of 12 bits 4 would be left."""
    values = (RAMP * (2 ** bits - 1)).round().astype(">u2")
    rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(30, 40, 16, rows))

    if bits == 16:
        assert abs(read_image(tmp_path / "a.png") - 255 * RAMP[:, :, None]).max() <= 1
        return
    with pytest.raises(ValueError, match="a.png .*below a quarter of its 16 bits: save it with 8"):
        read_image(tmp_path / "a.png")


def test_a_tensor_is_bytes_or_floats_from_0_to_1():
    floats = torch.rand(3, 4, 5, dtype=torch.float64)
    levels = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)

    assert torch.equal(to_float(floats), floats.float())
    close(to_float(levels), levels.float() / 255, 1e-7)


@pytest.mark.parametrize("image", [
    torch.full((3, 4, 5), 255.0),
    torch.full((3, 4, 5), -1.0),
    torch.full((3, 4, 5), torch.nan),
    torch.full((3, 4, 5), 255, dtype=torch.int64),
    torch.full((3, 4, 5), 4095, dtype=torch.uint16),
], ids=["floats to 255", "floats from -1", "nan", "int64", "uint16"])
def test_a_tensor_of_other_values_is_refused(image):
    with pytest.raises(ValueError, match="neither uint8 nor float in 0..1: divide it by"):
        to_float(image)


def test_a_file_that_claims_to_be_huge_is_named(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(2 ** 31 - 1, 2 ** 31 - 1, 8, bytes(100)))

    with pytest.raises(ValueError, match="bomb.png is not a readable image: Image size"):
        read_image(path)
    with pytest.raises(ValueError, match="bomb.png is not a readable annotation"):
        Files(["a"], [path], [path], range(1, 21)).truth(0)


@pytest.mark.skipif(sys.platform == "win32", reason="the program that is set out is a shell script")
def test_an_image_starts_no_program(tmp_path, monkeypatch):
    """Pillow draws PostScript by starting Ghostscript, whatever the file's name is."""
    ghostscript = tmp_path / "bin/gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'started'}'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)  # is looked for anew
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(OSError):
        Image.open(path).load()  # who opens it without care starts the program
    (tmp_path / "started").unlink()

    for read in (read_image, Folder, lambda path: Files(["a"], [path], [path], [1]).truth(0)):
        with pytest.raises(ValueError):
            read(path)

    assert not (tmp_path / "started").exists()


# --- Folders of one's own images ------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    """Four good images at three depths, in the order of their names; the rest is no image."""
    folder = tmp_path / "my photos"
    (folder / "sub/deep").mkdir(parents=True)
    for name in ("b.png", "sub/a.JPG", "sub/b.png", "sub/deep/c.WebP", "cut.jpg", "cut.png"):
        noise(50, 70, 3).save(folder / name)
    for name in ("cut.jpg", "cut.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    return folder


GOOD = ["b.png", "sub/a.JPG", "sub/b.png", "sub/deep/c.WebP"]


def test_a_folder_leaves_out_what_it_cannot_read_and_says_so(photos, capsys):
    folder = open_split(str(photos), "no root", "train")

    assert folder.names == GOOD and len(folder) == 4
    pixels = np.array(Image.open(photos / "sub/b.png"))
    assert np.array_equal(folder.image(2).permute(1, 2, 0), pixels)

    skipped = ["cut.jpg", "cut.png", "empty.png", "text.jpg"]
    assert sorted(folder.skipped) == skipped
    printed = capsys.readouterr().err
    assert re.findall(r"^skipped (\S+): .", printed, re.MULTILINE) == skipped


def test_files_of_other_kinds_are_counted_and_named(photos, capsys):
    for name in ("1.heic", "2.HEIC", "sub/3.heic", "4.cr2", "notes.txt", "sub/.DS_Store"):
        (photos / name).write_bytes(b"")

    assert Folder(photos).names == GOOD
    printed = capsys.readouterr().err
    assert "left out 6 files of other kinds than .bmp" in printed
    assert "3 .heic, 1 .cr2, 1 .txt, 1 .DS_Store" in printed


def test_what_our_own_programs_drew_is_left_out_and_said(
    photos, tiny_clip_file, tmp_path, monkeypatch, capsys
):
    """`--data .` after an evaluation: masks, overlays and maps of probability lie among photos."""
    (tmp_path / "prompts.txt").write_text("a photo of the {}")
    evaluation.main([
        "--stage", "clip", "--images", str(photos), "--classes", "cat, dog | st. bernard",
        "--clip", str(tiny_clip_file), "--prompts", str(tmp_path / "prompts.txt"),
        "--short-side", "16", "--probabilities", "--out", str(photos), "--device", "cpu",
    ])
    real_photos = ("eval_me.png", "sub/masks/carnival.png", "cards/7.index.png")
    for name in ("eval_rectify.png", "eval_rectify.json", *real_photos):
        (photos / name).parent.mkdir(exist_ok=True)
        noise(9, 8, 3).save(photos / name, format="PNG")
    drawn = len(list((photos / "masks/clip").rglob("*.png"))) + 1  # and eval_rectify.png
    assert drawn > 4 * 2  # of each image index, overlay, and the maps of what was found
    capsys.readouterr()

    monkeypatch.chdir(photos)
    names = Folder(".").names

    assert set(names) == {*GOOD, *real_photos}
    assert f"left out {drawn} images that eval.py drew" in capsys.readouterr().err
    monkeypatch.chdir(photos / "masks")
    with pytest.raises(ValueError, match="holds no readable image"):
        Folder(".")  # nor from within


def test_images_of_one_name_are_told_apart_by_their_whole_path(photos, monkeypatch):
    assert Folder(photos / "sub/a.JPG", photos / "sub/deep").names == ["a.JPG", "c.WebP"]

    one, other = photos / "b.png", photos / "sub/b.png"
    assert Folder(one, other).names == [one.as_posix(), other.as_posix()]

    monkeypatch.chdir(photos)
    assert Folder(".", photos, one).names == GOOD  # given twice, it is still one image


# --- Resizing -------------------------------------------------------------------------------------

def size_by_fractions(height, width, long_side, short_side):
    """The largest size within both sides, rounded to the nearest pixel; without floats."""
    factor = min(
        Fraction(long_side) / max(height, width),
        Fraction(short_side) / min(height, width),
    )
    return [max(1, int(side * factor + Fraction(1, 2))) for side in (height, width)]


def test_sizes_are_those_of_exact_fractions():
    assert size_within(375, 500, 2048, 336) == [336, 448]
    assert size_within(281, 500, 520, 520) == [292, 520]  # Context: the long side decides
    assert size_within(1, 5000, 2048, 336) == [1, 2048]   # 0.41: a pixel is the least
    assert size_within(3, 5, 4.5, 4.5) == [3, 5]          # a half is rounded up

    for height, width in torch.randint(1, 700, (300, 2)).tolist():
        for sides in ((2048, 512), (2048, 336), (520, 520)):
            expected = size_by_fractions(height, width, *sides)
            assert size_within(height, width, *sides) == expected


def bilinear(image, height, width):
    """(3, H, W) -> float64 (3, height, width): each pixel from the nearest four, as OpenCV does."""
    image = image.double()
    H, W = image.shape[1:]
    out = torch.zeros(3, height, width, dtype=torch.float64)
    for y in range(height):
        v = min(max((y + 0.5) * H / height - 0.5, 0), H - 1)
        top, below = int(v), min(int(v) + 1, H - 1)
        for x in range(width):
            u = min(max((x + 0.5) * W / width - 0.5, 0), W - 1)
            left, right = int(u), min(int(u) + 1, W - 1)
            upper = image[:, top, left] * (1 - u % 1) + image[:, top, right] * (u % 1)
            lower = image[:, below, left] * (1 - u % 1) + image[:, below, right] * (u % 1)
            out[:, y, x] = upper * (1 - v % 1) + lower * (v % 1)
    return out


@pytest.mark.parametrize("size, sides", [
    ((60, 91), (2048, 20)),  # made smaller
    ((30, 41), (2048, 53)),  # made larger
    ((91, 60), (30, 30)),
])
def test_benchmarks_are_resized_without_antialiasing(size, sides):
    """Fine structure comes out rough, as in the authors' code; smooth where that is asked for."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    new = size_by_fractions(*size, *sides)

    rough = resize_within(image, *sides, antialias=False)
    smooth = resize_within(image, *sides, antialias=True)

    # torchvision rounds after the rows and once more after the columns
    close(rough.double(), bilinear(image, *new), 1.01)
    averaged = F.interpolate(image[None].double(), new, mode="bilinear", antialias=True)[0]
    close(smooth.double(), averaged, 1.01)
    if new[0] < size[0]:
        assert (smooth.double() - rough).abs().mean() > 20


# --- Augmentation ---------------------------------------------------------------------------------

def augmented(image, long_side, short_side, crop, ratio, flip):
    """Sec. 4.1 pixel by pixel: resize, crop, flip, pad -> levels float64 (3, crop, crop), valid."""
    r = torch.empty(()).uniform_(*ratio).item()
    height, width = size_within(*image.shape[1:], r * long_side, r * short_side)
    image = bilinear(image, height, width)
    top = torch.randint(0, max(height - crop, 0) + 1, ()).item()
    left = torch.randint(0, max(width - crop, 0) + 1, ()).item()
    mirrored = flip and torch.rand(()).item() < 0.5
    rows, columns = min(height, crop), min(width, crop)

    out = torch.zeros(3, crop, crop, dtype=torch.float64)
    valid = torch.zeros(crop, crop, dtype=torch.bool)
    for y in range(rows):
        for x in range(columns):
            seen_x = columns - 1 - x if mirrored else x
            out[:, y, x] = image[:, top + y, left + seen_x]
            valid[y, x] = True
    return out, valid


@pytest.mark.parametrize("size, ratio, flip", [
    ((20, 31), (0.5, 2.0), True),   # sometimes larger than the crop on one axis, on both, on none
    ((31, 20), (0.5, 2.0), False),
    ((12, 40), (1.0, 1.0), True),   # never as high as the crop: padded below
    ((40, 12), (1.0, 1.0), True),   # never as wide: padded on the right
])
def test_augmentation_against_a_literal_loop(size, ratio, flip):
    image = numbered(*size)
    augment = Augment(90, 20, 24, ratio, flip, photometric=False, antialias=False)
    for seed in range(6):
        torch.manual_seed(seed)
        expected, expected_valid = augmented(image, 90, 20, 24, ratio, flip)

        torch.manual_seed(seed)
        out, valid = augment(image)

        assert out.dtype == torch.float32 and torch.equal(valid, expected_valid)
        close(255 * out.double(), expected, 1.01)  # rounded twice, in resizing
        assert (out[:, ~valid] == 0).all()


@pytest.mark.parametrize("crop, flip, photometric, changes", [
    (0, False, False, False),
    (24, False, False, True),
    (0, True, False, True),
    (0, False, True, True),
])
def test_augment_knows_whether_it_changes_images(crop, flip, photometric, changes):
    augment = Augment(100, 40, crop, flip=flip, photometric=photometric, antialias=True)
    image = numbered(20, 31)

    seen = [(255 * augment(image)[0]).round().byte() for _ in range(20)]
    differs = [not torch.equal(levels, image) for levels in seen]

    assert augment.changes is changes
    assert any(differs) == changes


def turned(image, turn):
    """(3, H, W) with all hues turned by that part of the circle, pixel by pixel."""
    out = np.zeros(image.shape)
    for y, x in np.ndindex(image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    return out


def distorted(image):
    """The four changes of color, literally; (3, H, W) -> the same, and which of them happened."""
    happens = (torch.rand(5) < 0.5).tolist()
    brightness, contrast, saturation, hue, contrast_first = happens
    levels = torch.empty(()).uniform_(-32, 32).item()
    contrast_factor = torch.empty(()).uniform_(0.5, 1.5).item()
    saturation_factor = torch.empty(()).uniform_(0.5, 1.5).item()
    steps = torch.empty(()).uniform_(-18, 18).item()

    if brightness:
        image = np.clip(image + levels / 255, 0, 1)  # white stays white: nothing wraps
    if contrast and contrast_first:
        image = np.clip(image * contrast_factor, 0, 1)
    if saturation:
        # The distance from gray, times the factor: gray stays gray.
        gray = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        image = np.clip(gray + saturation_factor * (image - gray), 0, 1)
    if hue:
        image = turned(image, steps / 180)
    if contrast and not contrast_first:
        image = np.clip(image * contrast_factor, 0, 1)
    return image, tuple(happens)


def test_colors_are_distorted_as_by_a_literal_loop():
    image = torch.rand(3, 4, 5)
    image[:, 0, :3] = torch.tensor([[0.9, 0.1, 0.1], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).T
    seen = set()
    for seed in range(120):
        torch.manual_seed(seed)
        expected, happens = distorted(image.double().numpy())

        torch.manual_seed(seed)
        out = distort_colors(image)

        close(out.double(), torch.from_numpy(expected), 1e-5)
        seen.add(happens)
    assert len(seen) > 28  # of the 32 there are


# --- The stream of training images ----------------------------------------------------------------

@pytest.fixture
def stream(voc_root):
    """A stream over five images; it could open a label, which is not there."""
    shutil.rmtree(voc_root / "VOCdevkit/VOC2012/SegmentationClass")
    augment = Augment(2048, 64, 48, antialias=False)
    return TrainingStream(open_split("voc", voc_root, "train"), augment, seed=3)


def test_every_epoch_shows_each_image_once_in_another_order(stream):
    epochs = [[stream[s][2] for s in range(first, first + 5)] for first in (0, 5, 10)]

    for epoch in epochs:
        assert sorted(epoch) == sorted(stream.split.names)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_item_follows_from_seed_and_number_alone(stream):
    """So a run goes on at any item, with any number of workers, as if it had never stopped."""
    items = [stream[s] for s in range(12)]

    other = TrainingStream(stream.split, stream.transform, seed=3)
    torch.rand(5)  # the caller's random numbers do not matter
    before = torch.random.get_rng_state()
    again = {s: other[s] for s in (11, 2, 7)}
    assert torch.equal(torch.random.get_rng_state(), before)  # nor do they notice

    for s, item in enumerate(DataLoader(stream, None, sampler=range(4, 9), num_workers=2), 4):
        again[s] = item
    for s, (image, valid, name) in again.items():
        assert torch.equal(image, items[s][0]) and torch.equal(valid, items[s][1])
        assert name == items[s][2]


def test_an_image_looks_different_each_time_and_under_each_seed(stream):
    one_image = Files(["a"], stream.split.image_paths[:1], None, ())

    seed_3 = TrainingStream(one_image, stream.transform, seed=3)
    seed_4 = TrainingStream(one_image, stream.transform, seed=4)

    assert not torch.equal(seed_3[0][0], seed_3[1][0])
    assert not torch.equal(seed_3[0][0], seed_4[0][0])


def test_the_second_epoch_of_a_seed_is_not_the_first_of_the_next(stream):
    next_seed = TrainingStream(stream.split, stream.transform, seed=4)

    assert [stream[s][2] for s in range(5, 10)] != [next_seed[s][2] for s in range(5)]


# --- What evaluation and pseudo-labels read -------------------------------------------------------

def test_evaluation_resizes_the_image_and_keeps_the_truth_at_its_size(voc_root):
    split = open_split("voc", voc_root, "val")
    for antialias in (False, True):
        for sides in ((2048, 50), (70, 70), (9, 0)):
            image, truth, name = Evaluation(split, *sides, antialias)[1]

            expected = resize_within(split.image(1), *sides, antialias)
            close(image, expected.float() / 255, 1e-7)
            assert torch.equal(truth, split.truth(1)) and name == "val_1"
    assert image.shape[1:] == truth.shape == (67, 93)  # short side 0: its own size


@pytest.mark.parametrize("size", [(40, 100), (100, 40), (37, 31)])
def test_thumbnails_are_clips_own_preprocessing_on_benchmarks_too(tmp_path, size):
    noise(*size, 3).save(tmp_path / "a.png")
    split = Files(["a"], [tmp_path / "a.png"], None, (1, 2))

    image, name = Thumbnails(split, 24)[0]

    clips_own = v2.Compose([
        v2.Resize(24, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(24),
        v2.ToDtype(torch.float32, scale=True),
    ])
    assert torch.equal(image, clips_own(split.image(0))) and name == "a"


def test_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([100.0, 105.0, 106.0, 130.0])
    monkeypatch.setattr(datasets.time, "perf_counter", lambda: next(clock))

    progress = Progress("eval", total=80, first=10, per_step=2)
    progress(20)  # 10 steps in 5 s: 4 images/s, and 60 steps left
    progress(21)  # a second later: too early
    progress(80, "loss 1  ")

    assert capsys.readouterr().err.splitlines() == [
        "eval  20/80  4.0 images/s  0:00:30 left",
        "eval  80/80  loss 1  4.7 images/s  0:00:00 left",
    ]


def test_the_file_copied_elsewhere_works_alone(voc_root):
    shutil.copy(ROOT / "datasets.py", voc_root)
    program = (
        "from datasets import *; print(*Evaluation(open_split('voc', '.', 'val'), 9, 0, False)[1])"
    )

    result = subprocess.run(
        [sys.executable, "-c", program], cwd=voc_root, capture_output=True, text=True
    )

    assert result.stdout.endswith("val_1\n"), result.stderr
