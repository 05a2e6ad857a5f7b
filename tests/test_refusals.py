"""What the programs refuse, and in which words: one table.

A command is refused where it would go wrong without a word, or late. The sentence names what is
wrong and says what to do; what Python, argparse and torch say by themselves is not listed here.
Refusals of label files, images and lists are in test_datasets.py, of weights in test_clip_model.py.
"""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import clip_model
import eval as evaluation
import train
from clip_model import load_clip
from conftest import command, sentence
from extras import paper, plusplus, prepare, published
from reclip import ReCLIP

PROGRAMS = {
    "train.py": train,
    "eval.py": evaluation,
    "extras/prepare.py": prepare,
    "extras/published.py": published,
    "extras/plusplus.py": plusplus,
    "extras/paper.py": paper,
}

# What many lines begin or end with. The files are those of the fixture `place`.
CPU = "--clip tiny.pt --prompts prompts.txt --device cpu"
RECTIFY = f"train.py --stage rectify --data photos --classes 'cat, dog' {CPU}"
DISTILL = "train.py --stage distill --data photos --classes 'cat, dog' --device cpu --teacher"
STUDENT = f"{DISTILL} rectified/rectify.pt --student tiny"
EVALUATE = "eval.py --device cpu --checkpoint"


@pytest.mark.parametrize("line, words", [
    # Options that do not go together
    ("train.py --stage distill --prompts prompts.txt", "--prompts goes with --stage rectify or"),
    ("train.py --stage distill --tau-1 1", "--tau-1 goes with --stage rectify or all alone"),
    ("train.py --stage rectify --teacher rectify.pt", "--teacher goes with --stage distill alone"),
    ("train.py --stage rectify --exact-gelu", "--exact-gelu speaks of the file of --clip"),
    ("eval.py --stage clip --exact-gelu", "--exact-gelu speaks of the file of --clip"),
    ("train.py --classes 'cat, dog'", "--classes goes with your own images; shapes has its own"),
    ("train.py --recipe cvpr2024", "recipe is 'cvpr2024'; shapes has 2025 alone"),
    ("train.py --rectify-epochs 21", "it must not be above rectify_poly_epochs, 20"),
    ("eval.py --stage clip --checkpoint a.pt", "--checkpoint goes with --stage rectify and"),
    ("eval.py --stage rectify --prompts prompts.txt", "--prompts goes with --stage clip"),
    ("eval.py --stage rectify --recipe 2025", "--recipe goes with --stage clip"),
    ("eval.py --images photos --classes 'cat, dog'", "--classes goes with --stage clip"),
    ("eval.py --stage clip --classes 'cat, dog'", "--classes goes with --images"),
    ("eval.py --background-threshold .5", "--background-threshold goes with --images"),
    ("eval.py --probabilities", "--probabilities goes with --images"),
    ("eval.py --denoise 2", "--denoise is a probability, between 0 and 1"),
    ("eval.py --images photos --background-threshold 2", "-threshold is a probability, between"),
    (f"eval.py --stage clip --recipe cvpr2024 {CPU}", "shapes has 2025 alone"),
    ("eval.py --split train", "--split train: shapes has val, test"),
    ("extras/plusplus.py --evaluate --data photos", "--evaluate needs labels"),
    ("extras/plusplus.py --checkpoint a.pt", "--checkpoint goes with --evaluate and --images"),
    ("extras/plusplus.py --evaluate --split train", "--split train: shapes has val, test"),
    ("extras/paper.py --recipe cvpr2024", "recipe is 'cvpr2024'; shapes has 2025 alone"),

    # Your own images, their classes and prompts
    ("train.py --data nowhere", "--data nowhere is neither a folder of images nor one of voc"),
    ("train.py --data photos", "--data photos needs --classes 'cat, dog, grass'"),
    ("train.py --data photos --classes cat", "a class and everything else is 'cat, background'"),
    ("train.py --data photos --classes 'cat, Cat'", "none twice"),
    ("train.py --data photos --classes 'cat,,dog'", "none empty"),
    ("train.py --data photos --classes commas.txt", "holds a comma: write one class a line"),
    ("train.py --data photos --classes many.txt", "256 classes are named: 255 at most"),
    ("train.py --data photos --classes 'cat, dog'", "--stage all evaluates, and photos has no"),
    ("train.py --stage rectify --data broken --classes 'cat, dog'", "holds no readable image"),
    ("train.py --prompts no_name.txt", "each with {} once for the name, such as ['a photo of a"),
    ("train.py --prompts nowhere.txt", "No such file"),
    (f"{RECTIFY} --classes '{90 * 'x'}, dog'", "tokens does not fit into 77"),
    ("eval.py --data photos", "your own images have no truth to evaluate on: --images draws their"),
    ("eval.py --stage clip --images photos", "--images needs --classes 'cat, dog'"),
    ("eval.py --images nowhere", "nowhere does not exist"),
    ("eval.py --images broken", "broken holds no readable image (.bmp, .gif, .jpg, .jpeg, .png,"),

    # A data set that is not there, or lies elsewhere
    (
        "train.py --stage rectify --data voc --root empty",
        "python extras/prepare.py voc --root empty --download",
    ),
    # All three trainings of --stage all would be done before this was noticed.
    ("train.py --data voc --root listed", "val.txt is missing"),
    (
        "train.py --data voc --root unannotated",
        "SegmentationClass/2007_000033.png is missing: --stage all evaluates at its end",
    ),
    ("eval.py --data ade20k --root empty", "python extras/prepare.py ade20k --root empty"),
    ("extras/prepare.py voc --root empty", "--root must be the folder that holds VOCdevkit/VOC"),
    (
        "extras/prepare.py voc --root unlabelled/VOCdevkit",
        "--root must be the folder that holds VOCdevkit",
    ),
    ("extras/prepare.py voc --root unlabelled", "VOC2012 is not complete; move it away"),
    ("extras/prepare.py context --root unlabelled", "VOC2012 is of another year than VOC2010"),
    ("extras/prepare.py voc --root twice", "twice/VOCdevkit holds a second VOCdevkit"),
    ("extras/prepare.py ade20k --root full", "ADE20K_2021_17_01 is the full ADE20K"),
    ("extras/prepare.py voc --root damaged", "May-2012.tar does not have the md5"),
    ("extras/prepare.py context --root unmade", "trainval_merged.json is missing: --download"),

    # Weights and checkpoints
    ("train.py --stage rectify --clip nowhere.pt", "no CLIP weights at nowhere.pt"),
    ("train.py --stage rectify --clip garbage.pt", "does not hold the weights of a ViT CLIP"),
    ("train.py --stage distill --out empty", "there is no checkpoint at empty/rectify.pt"),
    (f"{DISTILL} garbage.pt", "garbage.pt is none of our checkpoints"),
    (f"{DISTILL} lost.pt", "give its weights with --clip"),
    (f"{DISTILL} rectified/rectify.pt --clip other.pt", "was learnt on another CLIP"),
    (f"{DISTILL} rectified/rectify.pt --classes 'cat, cow'", "was learnt for other classes"),
    (f"{DISTILL} plain.pt", "rectify again with prompt_length above 0 and subtract"),
    (
        f"{DISTILL} reference.pt --head query_reference_positional",
        "M_p goes with the head query_reference_positional",
    ),
    (f"{STUDENT} --backbone-weights nowhere.pth", "there is no file nowhere.pth"),
    (f"{STUDENT} --backbone-weights garbage.pt", "garbage.pt is damaged, or no file of tensors"),
    (f"{RECTIFY} --lr 1e38 --crop 16 --out diverged", "try a smaller learning rate"),
    (f"{RECTIFY} --out rectified", "rectified/rectify.pt is the end of another training (recipe "),
    (f"{RECTIFY} --out rectified", "give another --out, or --overwrite to replace it"),
    (f"{RECTIFY} --out rectified --resume", "cannot resume rectified/rectify.pt: recipe "),
    ("eval.py --out empty", "there is no checkpoint at empty/rectify.pt"),
    (f"{EVALUATE} garbage.pt", "garbage.pt is none of our checkpoints"),
    (f"{EVALUATE} rectified/rectify.pt --stage distill", "is of the stage rectify, not distill"),
    (f"{EVALUATE} reclip++.pt", "is of ReCLIP++, which extras/plusplus.py evaluates"),
    (f"{EVALUATE} lost.pt", "or put them beside the checkpoint as clip.pt"),
    (f"{EVALUATE} rectified/rectify.pt --clip other.pt", "was learnt on another CLIP"),
    (f"{EVALUATE} rectified/rectify.pt", "for other classes than those of shapes: cat, dog"),
    (f"{EVALUATE} plain.pt --images photos", "does not say how large images are shown to it"),
    (
        "eval.py --stage clip --images photos --classes 'cat, background' "
        f"--background-threshold .5 {CPU}",
        "a class is named so too: leave the option out",
    ),
    (
        "extras/plusplus.py --evaluate --checkpoint rectified/rectify.pt",
        "is of the stage rectify, not reclip++",
    ),
    ("extras/plusplus.py --evaluate --out empty", "there is no checkpoint at empty/reclip++.pt"),
    ("extras/paper.py --clip nowhere.pt", "no CLIP weights at nowhere.pt"),
    ("extras/published.py nowhere.pth --data voc", "there is no file nowhere.pth"),
    (
        "extras/published.py tiny.pt --data voc",
        "tiny.pt is not a rectification of ReCLIP's authors",
    ),
    ("extras/published.py of_59.pth --data voc", "was learnt for 59 classes, and 20 are named"),
    (
        "extras/published.py sequel.pth --data voc",
        "python extras/plusplus.py --data voc --published sequel.pth converts it",
    ),
    (
        "extras/published.py of_59.pth --data context --out rectified",
        "rectified holds checkpoints already: give another --out",
    ),
])
def test_refused(place, line, words):
    program, *arguments = shlex.split(line)

    with pytest.raises((ValueError, OSError)) as caught:
        PROGRAMS[program].main(arguments)

    assert words in sentence(caught)


def test_all_stages_at_once_run_in_one_process(place, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # set by torchrun

    with pytest.raises(ValueError, match="torchrun goes with rectify and distill"):
        train.main(["--device", "cpu"])


def test_a_refused_program_ends_with_its_sentence_and_status_1(place):
    result = command("train.py", "--data", "photos", "--classes", "cat", cwd=place, ok=False)

    assert "the class list 'cat' needs two names or more" in sentence(result)
    assert result.returncode == 1 and result.stdout == ""


# --- The files that the commands name -------------------------------------------------------------

TEXTS = {
    "prompts.txt": "a photo of the {}",
    "no_name.txt": "a photo",
    "commas.txt": "cat, dog\ngrass",
    "many.txt": "\n".join(f"class {i}" for i in range(256)),
    "unlabelled/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": "2007_000032",
    "listed/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": "2007_000032",
    "listed/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg": "",
    "unannotated/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": "2007_000032",
    "unannotated/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg": "",
    "unannotated/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg": "",
    "unannotated/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": "2007_000033",
    "unmade/VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg": "",
    "twice/VOCdevkit/VOCdevkit/VOC2012/list.txt": "",
    "full/ADE20K_2021_17_01/index.txt": "",
    "damaged/VOCtrainval_11-May-2012.tar": "no archive",
    "broken/a.png": "no image",
    "garbage.pt": "no weights",
    "empty/notes.txt": "",
}


@pytest.fixture(scope="module")
def files(make_clip, merges, tmp_path_factory):
    """A folder with all the files; made once."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    for name in ("cat.png", "dog.png"):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "photos" / name)

    for seed, name in enumerate(("tiny.pt", "other.pt")):
        state = make_clip(seed, context=77).state_dict()
        torch.save({"state_dict": state, "merges": merges}, folder / name)

    # Rectifications: a finished one; one without Reference and positional net, that does not know
    # the size of images; one with the Reference alone; one whose CLIP has gone.
    clip = load_clip(folder / "tiny.pt")
    parts = {"prompts": ["a photo of the {}"], "recipe": "2025"}
    protocol = {"long_side": 64, "short_side": 16, "antialias": False, "denoise": 0.0}
    plain = {"prompt_length": 0, "positional_channels": 0}
    reference = {"prompt_length": 4, "positional_channels": 0}
    finished = {"identity": {"seed": 0}, "step": 9, "steps": 9, "optimizer": None}
    model = ReCLIP(clip, ["cat", "dog"], protocol=protocol, **parts)
    model.save(folder / "rectified/rectify.pt", training=finished)
    ReCLIP(clip, ["cat", "dog"], **parts, **plain).save(folder / "plain.pt")
    ReCLIP(clip, ["cat", "dog"], **parts, **reference).save(folder / "reference.pt")
    clip.source = "gone.pt"
    model.save(folder / "lost.pt")

    # What a file of the authors is known by, and no more
    of_59 = {"text_encoder.prompt_token": torch.zeros(1), "proj_net.6.weight": torch.zeros(59, 4)}
    torch.save(of_59, folder / "of_59.pth")
    torch.save(of_59 | {"pe_proj.weight": torch.zeros(1)}, folder / "sequel.pth")
    torch.save({"stage": "reclip++"}, folder / "reclip++.pt")
    return folder


@pytest.fixture
def place(files, monkeypatch):
    """The folder of the files; we are in it, and nothing can be fetched."""

    def no_network(urls, *more):
        pytest.fail(f"{urls[0]} was asked for")

    monkeypatch.chdir(files)
    monkeypatch.setenv("CLIP_HOME", str(files / "empty"))
    monkeypatch.setattr(clip_model, "download", no_network)
    monkeypatch.setattr(prepare, "download", no_network)
    return files
