"""What users ask for: OpenAI's other ViTs, templates of their own, a data set of their own in
Cityscapes' layout, and folders of odd images.

Nothing is downloaded. The weights are random, at the sizes that OpenAI published; SLOW=1 also
makes and loads the two large ones, 0.9 GB each.
"""

import dataclasses
import gzip
import json
import os
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import clip_model
import datasets
import eval as evaluation
import train
from clip_model import Tokenizer, build_clip, load_clip, sha256_of
from conftest import ROOT, WORDS, merges_of
from datasets import (
    IGNORE,
    SHAPES_PROMPTS,
    Evaluation,
    open_split,
    read_prompts,
)
from eval import Protocol, predict_mask
from reclip import (
    PROMPTS,
    ReCLIP,
    contrastive_loss,
    gumbel_softmax_masks,
    masked_features,
    query_text_features,
)
from test_clip_model import same_weights, save_torchscript

SLOW = bool(os.environ.get("SLOW"))
SHAPES_CLIP = ROOT / "shapes_clip.pt"


def one_sentence(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


# --- OpenAI's other ViTs by name ------------------------------------------------------------------

# Name, file, and the two parts of its address, as OpenAI's own list has them.
HOST = "https://openaipublic.azureedge.net/clip/models/"
ADDRESSES = [
    (
        "ViT-B/32",
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    (
        "ViT-L/14",
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    (
        "ViT-L/14@336px",
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
]
NAMES = ("ViT-B/16", "ViT-B/32", "ViT-L/14", "ViT-L/14@336px")


class Size(NamedTuple):
    """A published CLIP in numbers."""
    patch: int
    grid: int
    resolution: int
    width: int
    heads: int
    layers: int
    text_width: int
    text_heads: int
    D: int
    parameters: int  # in all, as printed wherever these models are compared


SIZES = {
    "ViT-B/32": Size(32, 7, 224, 768, 12, 12, 512, 8, 512, 151_277_313),
    "ViT-L/14": Size(14, 16, 224, 1024, 16, 24, 768, 12, 768, 427_616_513),
    "ViT-L/14@336px": Size(14, 24, 336, 1024, 16, 24, 768, 12, 768, 427_944_193),
}


def published_shapes(size):
    """{key: shape} of OpenAI's file, written down here and not asked of the project's CLIP."""
    shapes = {
        "positional_embedding": (77, size.text_width),
        "text_projection": (size.text_width, size.D),
        "logit_scale": (),
        "token_embedding.weight": (49408, size.text_width),
        "ln_final.weight": (size.text_width,),
        "ln_final.bias": (size.text_width,),
        "visual.class_embedding": (size.width,),
        "visual.positional_embedding": (size.grid ** 2 + 1, size.width),
        "visual.proj": (size.width, size.D),
        "visual.conv1.weight": (size.width, 3, size.patch, size.patch),
        "visual.ln_pre.weight": (size.width,),
        "visual.ln_pre.bias": (size.width,),
        "visual.ln_post.weight": (size.width,),
        "visual.ln_post.bias": (size.width,),
    }
    towers = [("visual.", size.width, size.layers), ("", size.text_width, 12)]
    for tower, width, layers in towers:
        for i in range(layers):
            block = f"{tower}transformer.resblocks.{i}."
            shapes[block + "attn.in_proj_weight"] = (3 * width, width)
            shapes[block + "attn.in_proj_bias"] = (3 * width,)
            shapes[block + "attn.out_proj.weight"] = (width, width)
            shapes[block + "attn.out_proj.bias"] = (width,)
            shapes[block + "mlp.c_fc.weight"] = (4 * width, width)
            shapes[block + "mlp.c_fc.bias"] = (4 * width,)
            shapes[block + "mlp.c_proj.weight"] = (width, 4 * width)
            shapes[block + "mlp.c_proj.bias"] = (width,)
            for norm in ("ln_1", "ln_2"):
                shapes[f"{block}{norm}.weight"] = (width,)
                shapes[f"{block}{norm}.bias"] = (width,)
    return shapes


def made_weights(size):
    """Random weights of these shapes in half precision, as OpenAI stores them."""
    state = {}
    for key, shape in published_shapes(size).items():
        tensor = torch.empty(shape).uniform_(-0.04, 0.04)
        if ".ln_" in f".{key}" and key.endswith("weight"):
            tensor += 1
        state[key] = tensor.half()
    state["logit_scale"] = torch.tensor(100.0).log()
    return state


def has_size(clip, size):
    """Everything that the shapes of a file tell of its model."""
    visual = clip.visual
    vision_blocks = visual.transformer.resblocks
    text_blocks = clip.transformer.resblocks
    assert (visual.patch, visual.grid, clip.input_resolution) == size[:3]
    assert (len(vision_blocks), len(text_blocks)) == (size.layers, 12)
    assert {block.attn.heads for block in vision_blocks} == {size.heads}
    assert {block.attn.heads for block in text_blocks} == {size.text_heads}
    assert visual.class_embedding.shape == (size.width,)
    assert clip.positional_embedding.shape == (77, size.text_width)
    assert visual.proj.shape == (size.width, size.D)
    assert clip.text_projection.shape == (size.text_width, size.D)
    assert (clip.context_length, clip.sot, clip.eot) == (77, 49406, 49407)
    assert sum(p.numel() for p in clip.parameters()) == size.parameters


@pytest.fixture
def home(tmp_path, monkeypatch):
    """$CLIP_HOME, an empty folder, with no way to the network."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("CLIP_HOME", str(folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # fails if it is called
    return folder


def make_official(monkeypatch, path):
    """From now on this file is what belongs at its name."""
    monkeypatch.setitem(clip_model.FILES, path.name, ("nowhere", sha256_of(path)))


@pytest.fixture
def vocabulary(home, monkeypatch):
    """A made vocabulary of OpenAI's length in $CLIP_HOME, in the place of the official one."""
    merges = merges_of(WORDS)
    merges += [(f"no{i}", "word") for i in range(48894 - len(merges))]
    lines = ["a title", *(" ".join(pair) for pair in merges)]
    path = home / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    make_official(monkeypatch, path)

    # It is read once for all models: not to be mixed up with that of other tests.
    Tokenizer.from_file.cache_clear()
    yield path
    Tokenizer.from_file.cache_clear()


@pytest.mark.parametrize("name, file, address, sha256", ADDRESSES, ids=NAMES[1:])
def test_addresses_are_openais(name, file, address, sha256):
    assert clip_model.MODELS[name] == file
    assert clip_model.FILES[file] == (HOST + address, sha256)


def test_these_names_are_known():
    assert tuple(clip_model.MODELS) == NAMES


@pytest.mark.parametrize("name", SIZES)
def test_a_clip_is_built_from_the_published_shapes(name):
    """On the meta device, which has shapes and no numbers: keys, sizes, dense features."""
    size = SIZES[name]
    state = {}
    for key, shape in published_shapes(size).items():
        state[key] = torch.empty(shape, device="meta")

    clip = build_clip(state)
    clip.load_state_dict(state, strict=True, assign=True)
    has_size(clip, size)

    # 3 patches and 5 pixels down, 4 patches and 1 pixel across.
    image = torch.empty(2, 3, 3 * size.patch + 5, 4 * size.patch + 1, device="meta")
    for attention in clip_model.ATTENTIONS:
        assert clip.encode_image_dense(image, attention).shape == (2, size.D, 4, 5)
    square = torch.empty(2, 3, size.resolution, size.resolution, device="meta")
    assert clip.encode_image(square).shape == (2, size.D)


LARGE = pytest.mark.skipif(not SLOW, reason="makes a file of 0.9 GB; SLOW=1 runs it")


@pytest.mark.parametrize("name", [
    "ViT-B/32",
    pytest.param("ViT-L/14", marks=LARGE),
    pytest.param("ViT-L/14@336px", marks=LARGE),
])
def test_a_full_size_clip_by_its_name(name, home, vocabulary, monkeypatch):
    """A TorchScript archive such as OpenAI's: loaded, features, one step of rectification."""
    size = SIZES[name]
    state = made_weights(size)
    path = home / clip_model.MODELS[name]
    sizes = {"input_resolution": size.resolution, "context_length": 77, "vocab_size": 49408}
    save_torchscript(path, state, **{key: torch.tensor(value) for key, value in sizes.items()})
    make_official(monkeypatch, path)

    clip = load_clip(name)
    path.unlink()  # so large that it is not left behind
    has_size(clip, size)
    same_weights(clip, state)
    assert clip.source == name

    # The texts come with the vocabulary of $CLIP_HOME, since the file brought none.
    model = ReCLIP(
        clip,
        ["cat", "dog | tree", "grass"],
        prompts=["a photo of the {}", "the {} in a scene"],
        prompt_length=3,
        positional_gain=0.01,
        tau_1=0.1,  # so that a single step has a gradient everywhere
    ).train()
    assert model.output_stride == size.patch
    assert model.tau == pytest.approx(0.01)  # from the logit_scale of the file

    images = torch.rand(2, 3, 2 * size.patch + 3, 3 * size.patch + 1)
    thumbnails = torch.rand(2, 3, size.resolution, size.resolution)
    labels = model.image_labels(thumbnails, threshold=23.0, top_k=2)
    Z = model.features(images)
    assert Z.shape == (2, size.D, 3, 4)
    assert torch.allclose(Z.norm(dim=1), torch.ones(2, 3, 4))

    M = model.rectify(Z).rectified
    masks = gumbel_softmax_masks(M, model.tau_1)
    pooled = masked_features(Z, masks, model.pool)
    loss = contrastive_loss(pooled, model.W_q, labels, model.tau)
    loss.backward()
    assert loss.isfinite()
    for part in model.learnable_modules().values():
        for parameter in part.parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any()
    assert all(p.grad is None for p in clip.parameters())

    # And masks: to the pixels of an image that is no multiple of the patch.
    with torch.no_grad():
        logits = model.eval()(images).rectified
    height, width = images.shape[2:]
    assert model.to_pixels(logits, height, width).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", ["ViT-B/64", "vit-b/32", "ViT-L-14", "RN50", "nowhere.pt"])
def test_unknown_names_are_answered_with_the_known_ones(name, home):
    with pytest.raises(FileNotFoundError) as caught:
        load_clip(name)
    one_sentence(caught, name, ", ".join(NAMES))


@pytest.mark.parametrize("program", [train, evaluation])
def test_help_names_them(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    assert ", ".join(NAMES) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", NAMES)
def test_another_file_at_the_name_is_refused(name, home, tiny_clip_file):
    """Weights that could be loaded, but are not OpenAI's: nothing is loaded, nothing deleted."""
    file = clip_model.MODELS[name]
    shutil.copy(tiny_clip_file, home / file)
    with pytest.raises(ValueError) as caught:
        load_clip(name)
    one_sentence(caught, home / file, "is not the official", "sha256")
    assert sha256_of(home / file) == sha256_of(tiny_clip_file)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_fetched_from_its_address(name, home, tiny_clip_file, monkeypatch):
    file = clip_model.MODELS[name]
    asked = []

    def fetch(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        shutil.copy(tiny_clip_file, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert load_clip(name).source == name
    assert asked == [clip_model.FILES[file]]
    assert os.listdir(home) == [file]


def test_a_checkpoint_remembers_the_name(make_voc, tiny_clip_file, home, tmp_path, monkeypatch):
    """train.py --clip ViT-B/32, then eval.py without --clip: found in $CLIP_HOME again."""
    shutil.copy(tiny_clip_file, home / "ViT-B-32.pt")
    make_official(monkeypatch, home / "ViT-B-32.pt")
    photos = make_voc({"train": 2}) / "VOCdevkit/VOC2012/JPEGImages"
    out = tmp_path / "out"
    train.main([
        "--stage", "rectify", "--data", str(photos), "--classes", "cat, dog", "--crop", "32",
        "--clip", "ViT-B/32", "--epochs", "1", "--out", str(out), "--device", "cpu",
    ])
    content = torch.load(out / "rectify.pt", weights_only=True)
    assert content["clip"]["source"] == "ViT-B/32"

    command = [
        "--stage", "rectify", "--images", str(photos), "--short-side", "32",
        "--checkpoint", str(out / "rectify.pt"), "--device", "cpu",
    ]
    evaluation.main(command)
    assert len(list((out / "masks").glob("*.json"))) == 2

    # Learnt on another CLIP than the one that is found there now.
    with open(home / "ViT-B-32.pt", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="sha256"):
        evaluation.main(command)


# --- Templates of the Query: --prompts FILE -------------------------------------------------------

TEMPLATES = ("a large {}", "one {} of a photo", "{}")
CONTENT = b"\xef\xbb\xbf# mine\n\n  a large {}  \r\none {} of a photo\n\t# not: a {}\n{}\n\n"
OTHERS = "a photo of a {}\n"


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "my prompts.txt"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def few_shapes(monkeypatch):
    """The first images of each split, for speed."""
    monkeypatch.setitem(datasets.SHAPES_SPLITS, "train", (32, 101))
    monkeypatch.setitem(datasets.SHAPES_SPLITS, "val", (6, 102))


@pytest.fixture
def coins(tmp_path):
    """A folder of three images of shapes."""
    folder = tmp_path / "coins"
    folder.mkdir()
    split = open_split("shapes", None, "train")
    for i in range(3):
        Image.fromarray(split.image(i).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def texts_of(classes, templates):
    """W_q of these templates, by the CLIP of shapes."""
    return query_text_features(load_clip(SHAPES_CLIP), classes, templates)


def learnt_texts(out):
    return torch.load(out / "rectify.pt", weights_only=True)["learnt"]["W_q"]


def plain_model(classes, templates):
    """What eval.py --stage clip is to read."""
    clip = load_clip(SHAPES_CLIP)
    model = ReCLIP(clip, classes, prompts=templates, prompt_length=0, positional_channels=0)
    return model.eval()


def test_remarks_and_blank_lines_are_skipped(prompts_file):
    assert read_prompts(prompts_file) == TEMPLATES
    assert read_prompts(str(prompts_file)) == TEMPLATES


@pytest.mark.parametrize("method", ["reclip", "reclip++"])
def test_prompts_reach_training_on_shapes(prompts_file, few_shapes, tmp_path, method):
    """Exactly these: W_q is theirs to the bit, and neither the data set's nor the 85."""
    out = tmp_path / "out"
    command = [
        "--stage", "rectify", "--epochs", "1", "--device", "cpu", "--method", method,
        "--out", str(out), "--prompts",
    ]
    train.main([*command, str(prompts_file)])
    classes = datasets.SHAPES_CLASSES
    expected = texts_of(classes, TEMPLATES)
    assert torch.equal(learnt_texts(out), expected)
    assert not torch.allclose(expected, texts_of(classes, SHAPES_PROMPTS), atol=1e-3)

    # The pseudo-labels are of these texts too, and a run with others is not gone on with.
    labels = json.loads((out / "image_labels.json").read_text())
    assert labels["identity"]["prompts"] == list(TEMPLATES)
    other = tmp_path / "other.txt"
    other.write_text(OTHERS)
    with pytest.raises(ValueError, match="cannot resume .*: prompts was .*one {} of") as caught:
        train.main([*command, str(other), "--resume"])
    one_sentence(caught)

    # Begun anew, it has the others, in its labels as well.
    train.main([*command, str(other)])
    assert torch.equal(learnt_texts(out), texts_of(classes, ["a photo of a {}"]))
    labels = json.loads((out / "image_labels.json").read_text())
    assert labels["identity"]["prompts"] == ["a photo of a {}"]


def test_prompts_reach_training_on_own_images(prompts_file, coins, tmp_path):
    """With synonyms, each of which goes through all templates."""
    out = tmp_path / "out"
    command = [
        "--stage", "rectify", "--data", str(coins), "--classes", "coin, ring | box, star",
        "--clip", str(SHAPES_CLIP), "--epochs", "1", "--crop", "32", "--rectify-short-side", "32",
        "--out", str(out), "--device", "cpu",
    ]
    train.main([*command, "--prompts", str(prompts_file)])
    expected = texts_of(["coin", "ring | box", "star"], TEMPLATES)
    assert torch.equal(learnt_texts(out), expected)


def test_distillation_keeps_the_labels_of_its_teachers_prompts(
    prompts_file, few_shapes, tmp_path
):
    """They are not made anew, and not taken for those of the data set's own prompts."""
    command = ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    train.main(["--stage", "rectify", *command, "--prompts", str(prompts_file)])
    labels = (tmp_path / "image_labels.json").read_bytes()
    train.main(["--stage", "distill", *command])
    assert (tmp_path / "image_labels.json").read_bytes() == labels


def test_the_row_of_clip_is_clip_even_if_the_query_learns(few_shapes, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(train, "print_table", lambda rows, *more: shown.append(rows))
    train.main([
        "--rectify-epochs", "1", "--distill-epochs", "1", "--query-learnable", "--device", "cpu",
        "--out", str(tmp_path),
    ])
    (clip_row, _, both_row, _), = shown
    assert clip_row[2] == "clip" and clip_row[1].query is None and both_row[1].query is not None
    assert torch.equal(clip_row[1].heads()[0], both_row[1].W_q)


def test_a_class_named_background_beside_a_threshold(coins, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a {}")
    command = [
        "--stage", "clip", "--images", str(coins), "--classes", "coin, background", "--prompts",
        str(short), "--clip", str(SHAPES_CLIP), "--device", "cpu", "--out", str(tmp_path),
    ]
    with pytest.raises(ValueError, match="a class is named so too") as caught:
        evaluation.main([*command, "--background-threshold", "0.5"])
    one_sentence(caught)
    evaluation.main(command)
    areas = json.loads((tmp_path / "masks" / "0.png.json").read_text())["areas"]
    assert sum(areas.values()) == pytest.approx(1)


def test_prompts_go_with_all_stages_at_once(prompts_file):
    _, facts, _ = train.parse_arguments(["--prompts", str(prompts_file)])
    assert facts.prompts == TEMPLATES
    assert facts.classes == datasets.SHAPES_CLASSES
    assert datasets.DATA["shapes"].prompts == SHAPES_PROMPTS  # others do not notice


def test_prompts_reach_the_evaluation_of_plain_clip(prompts_file, few_shapes, tmp_path):
    """The confusion matrix of the file, counted again with a model of these templates."""
    command = ["--stage", "clip", "--out", str(tmp_path), "--device", "cpu"]
    evaluation.main(command)
    without = json.loads((tmp_path / "eval_clip.json").read_text())
    evaluation.main([*command, "--prompts", str(prompts_file)])
    report = json.loads((tmp_path / "eval_clip.json").read_text())

    model = plain_model(datasets.SHAPES_CLASSES, TEMPLATES)
    expected = np.zeros((8, 8), int)
    for image, truth, _ in Evaluation(open_split("shapes", None, "val"), 2048, 64):
        mask = predict_mask(model, "clip", image, truth.shape, Protocol(2048, 64)).numpy()
        counted = truth.numpy() != IGNORE
        np.add.at(expected, (truth.numpy()[counted], mask[counted]), 1)
    assert report["confusion"] == expected.tolist()
    assert report["confusion"] != without["confusion"]


def test_prompts_reach_the_masks_of_own_images(prompts_file, coins, tmp_path):
    out = tmp_path / "out"
    evaluation.main([
        "--stage", "clip", "--images", str(coins), "--classes", "coin, ring, star, bee",
        "--clip", str(SHAPES_CLIP), "--prompts", str(prompts_file), "--short-side", "64",
        "--out", str(out), "--device", "cpu",
    ])
    model = plain_model(["coin", "ring", "star", "bee"], TEMPLATES)
    folder = open_split(str(coins), None, None)
    for i in range(3):
        image = folder.image(i) / 255
        mask = predict_mask(model, "clip", image, (64, 64), Protocol(2048, 64))
        index = np.array(Image.open(out / "masks" / f"{i}.png.index.png"))
        assert np.array_equal(index, mask.numpy() + 1)


@pytest.mark.parametrize("program, options", [
    (train, ["--stage", "distill"]),
    (evaluation, ["--stage", "rectify"]),
    (evaluation, ["--checkpoint", "runs/shapes/rectify.pt"]),
    (evaluation, ["--images", ".", "--checkpoint", "runs/shapes/rectify.pt"]),
    (evaluation, ["--stage", "distill"]),
])
def test_what_has_its_texts_already_takes_no_prompts(program, options, prompts_file, tmp_path):
    with pytest.raises(ValueError) as caught:
        program.main([*options, "--prompts", str(prompts_file), "--out", str(tmp_path / "out")])
    one_sentence(caught, "--prompts goes with --stage")
    assert not (tmp_path / "out").exists()


BAD_PROMPTS = [
    ("a photo of a cat", "'a photo of a cat'"),
    ("a {}\na {} and a {}", "'a {} and a {}'"),
    ("a {}\na {name}", "'a {name}'"),
    ("a {0}", "'a {0}'"),
    ("a {!r}", "'a {!r}'"),
    ("a {{}}", "'a {{}}'"),
    ("a {} }", "'a {} }'"),
    ("a {} {x}", "'a {} {x}'"),
    ("a { }", "'a { }'"),
    ("", "holds no prompt"),
    ("\n \n# a {}\n", "holds no prompt"),
]
COMMANDS = [(train, ["--stage", "rectify", "--epochs", "1"]), (evaluation, ["--stage", "clip"])]


@pytest.mark.parametrize("program, options", COMMANDS)
@pytest.mark.parametrize("content, words", BAD_PROMPTS)
def test_bad_prompts_are_named(program, options, content, words, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        program.main([*options, "--prompts", str(path), "--out", str(tmp_path), "--device", "cpu"])
    one_sentence(caught, path, words)


@pytest.mark.parametrize("program, options", COMMANDS)
@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_missing_prompts_are_named(program, options, name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        program.main([*options, "--prompts", str(tmp_path / name), "--device", "cpu"])
    one_sentence(caught, f"there is no file of prompts at {tmp_path / name}")


@pytest.mark.parametrize("program, options", COMMANDS)
def test_prompts_that_are_too_long_are_named(program, options, few_shapes, tmp_path):
    """The text is in the sentence, with the name that it was first too long for."""
    path = tmp_path / "prompts.txt"
    path.write_text("a {}\n" + "a large " * 100 + "{}")
    with pytest.raises(ValueError) as caught:
        program.main([*options, "--prompts", str(path), "--out", str(tmp_path), "--device", "cpu"])
    one_sentence(caught, "tokens does not fit", "a large a large a large coin")
    assert os.listdir(tmp_path) == [path.name]


# --- Another data set is one entry: Cityscapes ----------------------------------------------------

# The official ids of the 19 classes that are evaluated, from Cityscapes' own table.
CITY_IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CITY_NAMES = {
    "train": [
        "aachen/aachen_000000_000019",
        "aachen/aachen_000001_000019",
        "bochum/bochum_000000_000313",
    ],
    "val": ["frankfurt/frankfurt_000000_000294", "munster/munster_000000_000019"],
}


def write_city(base, split, name, label, rng):
    """An image and all that lies beside its label in the official archives."""
    image = base / "leftImg8bit" / split / f"{name}_leftImg8bit.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save(image)

    beside = base / "gtFine" / split / name
    beside.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(f"{beside}_gtFine_labelIds.png")
    Image.fromarray(label.astype(np.uint16) * 1000).save(f"{beside}_gtFine_instanceIds.png")
    Image.new("RGBA", (96, 48), "red").save(f"{beside}_gtFine_color.png")
    beside.with_name(f"{beside.name}_gtFine_polygons.json").write_text("{}")


@pytest.fixture
def cityscapes(tmp_path, monkeypatch):
    """Cityscapes as a user adds it, on made files: the README's entries in three tables.

    -> the folder that holds it. Every id occurs in every label.
    """
    readme = (ROOT / "README.md").read_text()
    entries = readme.split("```python\n")[1].split("```")[0]
    for table in (datasets.LAYOUTS, datasets.DATA, datasets.SETTINGS):
        monkeypatch.setitem(table, "cityscapes", None)  # taken out again after the test
    exec(entries, dict(vars(datasets)))
    assert datasets.DATA["cityscapes"].classes == tuple(CITY_IDS)
    monkeypatch.setitem(datasets.SETTINGS, "cityscapes", dataclasses.replace(
        datasets.SETTINGS["cityscapes"],
        rectify_long_side=96,
        rectify_short_side=48,
        crop=32,
        denoise=0.0,
    ))

    rng = np.random.default_rng(0)
    for split, names in CITY_NAMES.items():
        for name in names:
            blocks = rng.permutation(np.resize([*range(34), 255], 72)).reshape(6, 12)
            label = np.kron(blocks, np.ones((8, 8))).astype(np.uint8)
            write_city(tmp_path / "cityscapes", split, name, label, rng)
    return tmp_path


@pytest.fixture
def city_options(cityscapes, tiny_clip_file, tmp_path):
    """Options that train.py and eval.py share."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of the {}")
    return [
        "--data", "cityscapes", "--root", str(cityscapes), "--clip", str(tiny_clip_file),
        "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--device", "cpu",
    ]


def test_files_are_found_in_the_folders_of_the_cities(cityscapes):
    for split, names in CITY_NAMES.items():
        files = open_split("cityscapes", cityscapes, split)
        assert files.names == names
        assert len(files) == len(names)
        for i, name in enumerate(names):
            path = cityscapes / "cityscapes/leftImg8bit" / split / f"{name}_leftImg8bit.png"
            expected = np.array(Image.open(path))
            assert np.array_equal(files.image(i).permute(1, 2, 0).numpy(), expected)
            files.truth(i)


def test_two_cities_may_hold_files_of_the_same_name(cityscapes):
    """Pseudo-labels are kept by name, so the names must differ."""
    rng = np.random.default_rng(1)
    label = np.full((48, 96), 7, np.uint8)
    for city in ("aachen", "bochum"):
        write_city(cityscapes / "cityscapes", "train", f"{city}/same", label, rng)
    names = open_split("cityscapes", cityscapes, "train").names
    assert {"aachen/same", "bochum/same"} <= set(names)
    assert len(set(names)) == 5


def test_scattered_ids_become_the_classes(cityscapes):
    """Against the table, value by value; an id beyond it is an error that names the file."""
    files = open_split("cityscapes", cityscapes, "val")
    classes = list(CITY_IDS)
    class_of = {value: classes.index(name) for name, value in CITY_IDS.items()}
    for i, name in enumerate(CITY_NAMES["val"]):
        path = cityscapes / "cityscapes/gtFine/val" / f"{name}_gtFine_labelIds.png"
        values = np.array(Image.open(path))
        assert set(values.flat) == {*range(34), 255}
        expected = [class_of.get(value, IGNORE) for value in values.flatten().tolist()]
        assert files.truth(i).flatten().tolist() == expected

    values[3, 4] = 34
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError) as caught:
        files.truth(1)
    one_sentence(caught, path, "holds the value 34")


def test_the_data_set_is_verified(cityscapes, capsys):
    datasets.main(["--prepare", "cityscapes", "--root", str(cityscapes)])
    assert capsys.readouterr().out.splitlines() == [
        "cityscapes train: 3 images with labels (official: 2975), 19 of 19 classes occur",
        "cityscapes val: 2 images with labels (official: 500), 19 of 19 classes occur",
    ]


def test_an_evaluation_on_cityscapes_is_a_count_on_its_files(
    cityscapes, city_options, tiny_clip_file, tmp_path
):
    """eval.py --stage clip: the confusion matrix, from the label files by the table above."""
    evaluation.main(["--stage", "clip", *city_options])
    report = json.loads((tmp_path / "out/eval_clip.json").read_text())
    assert report["protocol"]["pictures"] == 2
    assert report["protocol"]["classes_present"] == 19
    assert report["protocol"]["class_names"] == list(CITY_IDS)

    clip = load_clip(tiny_clip_file)
    prompts = ["a photo of the {}"]
    model = ReCLIP(
        clip, list(CITY_IDS), prompts=prompts, prompt_length=0, positional_channels=0
    ).eval()
    values_of = list(CITY_IDS.values())
    expected = np.zeros((19, 19), int)
    for name in CITY_NAMES["val"]:
        folder = cityscapes / "cityscapes"
        image = np.array(Image.open(folder / "leftImg8bit/val" / f"{name}_leftImg8bit.png"))
        values = np.array(Image.open(folder / "gtFine/val" / f"{name}_gtFine_labelIds.png"))
        image = torch.from_numpy(image).permute(2, 0, 1) / 255
        mask = predict_mask(model, "clip", image, (48, 96), Protocol(96, 48))
        for value, prediction in zip(values.flatten().tolist(), mask.flatten().tolist()):
            if value in values_of:
                expected[values_of.index(value), prediction] += 1
    assert report["confusion"] == expected.tolist()


def test_miou_on_cityscapes_by_hand(cityscapes, city_options, tmp_path, monkeypatch):
    """A model that says road in the upper half and car in the lower one.

    frankfurt    upper half: road, 2304 pixels                            all right
                 lower half: car, 1152 pixels, and static, not evaluated  all right
    munster      a quarter: road, 1152 pixels                             all right
                 a quarter: sky, 1152 pixels                              called road
                 lower half: 255, not evaluated
    """
    first = np.full((48, 96), 7, np.uint8)
    first[24:, :48] = 26
    first[24:, 48:] = 4
    second = np.full((48, 96), 7, np.uint8)
    second[12:24] = 23
    second[24:] = 255
    for name, label in zip(CITY_NAMES["val"], (first, second)):
        path = cityscapes / "cityscapes/gtFine/val" / f"{name}_gtFine_labelIds.png"
        Image.fromarray(label).save(path)

    def halves(model, stage, image, size, protocol):
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[24:] = list(CITY_IDS).index("car")
        return mask

    monkeypatch.setattr(evaluation, "predict_mask", halves)
    evaluation.main(["--stage", "clip", *city_options])
    report = json.loads((tmp_path / "out/eval_clip.json").read_text())
    iou = report["iou"]
    assert iou["road"] == pytest.approx(3456 / (3456 + 1152))
    assert (iou["car"], iou["sky"]) == (1, 0)
    assert {name for name, value in iou.items() if value is not None} == {"road", "car", "sky"}
    assert report["miou"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert report["pixel_accuracy"] == pytest.approx(4608 / 5760)


def test_training_on_cityscapes_opens_no_label(cityscapes, city_options, tmp_path, capsys):
    """One epoch without the folder of the labels, then mIoU with it."""
    labels = cityscapes / "cityscapes/gtFine"
    labels.rename(tmp_path / "away")
    train.main(["--stage", "rectify", "--epochs", "1", *city_options])
    out = tmp_path / "out"
    found = json.loads((out / "image_labels.json").read_text())["labels"]
    assert sorted(found) == CITY_NAMES["train"]
    assert "rectify: 3 of 3 steps" in capsys.readouterr().out

    (tmp_path / "away").rename(labels)
    options = [option for option in city_options if option != "--prompts"]
    options.remove(str(tmp_path / "prompts.txt"))
    evaluation.main(["--stage", "rectify", *options])
    report = json.loads((out / "eval_rectify.json").read_text())
    assert 0 <= report["miou"] <= 1
    assert report["protocol"]["data"] == "cityscapes"
    assert report["protocol"]["short_side"] == 48


def test_a_new_data_set_is_in_the_help_and_has_no_recipe(cityscapes, capsys):
    for program in (train, evaluation):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        assert "cityscapes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not with cityscapes"):
        datasets.find_settings("cityscapes", "2025")
    sequel = datasets.find_settings("cityscapes", method="reclip++")
    assert (sequel.method, sequel.rectify_short_side) == ("reclip++", 48)


@pytest.mark.parametrize("download", [False, True])
def test_a_new_data_set_that_is_missing_is_named(cityscapes, tmp_path, download):
    """Nothing can be fetched, for it has no address: still one sentence, and nothing is written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises((ValueError, OSError)) as caught:
        open_split("cityscapes", empty, "val", download)
    one_sentence(caught, "cityscapes", empty)
    assert os.listdir(empty) == []


@pytest.mark.parametrize("damage, words", [
    ("gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png", "is missing"),
    ("leftImg8bit/val", "is missing"),
])
def test_missing_files_of_a_new_data_set_are_named(cityscapes, damage, words):
    path = cityscapes / "cityscapes" / damage
    path.rename(cityscapes / "away")
    with pytest.raises((ValueError, OSError), match=words) as caught:
        datasets.verify("cityscapes", cityscapes)
    one_sentence(caught, path)


# --- Own images -----------------------------------------------------------------------------------

# Orientation 6 of EXIF: the camera lay on its side.
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6

BAD = ("empty.jpg", "a text.png", "cut.JPEG", "sub/cut progressive.jpg", "._photo.jpg")


@pytest.fixture
def odd_folder(tmp_path):
    """(folder, {name: (width, height) as it is seen}) of the readable images; BAD are there too."""
    folder = tmp_path / "own images"
    for below in ("sub/deep", "other"):
        (folder / below).mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {}

    def noise(height, width, *channels):
        return Image.fromarray(rng.integers(0, 256, (height, width, *channels), dtype=np.uint8))

    def keep(name, image, size=None, **options):
        image.save(folder / name, **options)
        sizes[name] = size or image.size

    keep("two words, and a comma.png", noise(20, 30, 3))
    keep("Grüße aus Köln.JPG", noise(21, 31, 3))
    keep("u\u0308 in two parts.png", noise(20, 31, 3))
    keep("100% {} #1 [a]'s.png", noise(22, 30, 3))
    keep("猫.webp", noise(20, 30, 3))
    keep("many.dots.in.it.png", noise(20, 33, 3))
    keep("grey.png", noise(20, 30))
    keep("grey.jpg", noise(23, 30))
    keep("transparent.png", noise(20, 30, 4))
    sixteen_bits = rng.integers(0, 65536, (25, 30)).astype(np.uint16)
    keep("sixteen bits.png", Image.fromarray(sixteen_bits))
    keep("palette.png", noise(20, 30, 3).quantize(7), transparency=3)
    keep("cmyk.jpg", noise(26, 30, 3).convert("CMYK"))
    keep("one pixel.png", noise(1, 1, 3))
    keep("line.png", noise(1, 3000, 3))
    keep("column.png", noise(3000, 1, 3))
    keep("progressive.jpg", noise(40, 50, 3), progressive=True)
    keep("lies on its side.jpg", noise(20, 34, 3), size=(20, 34), exif=ON_ITS_SIDE)
    keep("a burst.jpg", noise(24, 36, 3), format="MPO", save_all=True,
         append_images=[noise(24, 36, 3)])
    keep("a jpeg named.png", noise(20, 35, 3), format="JPEG")
    keep("same.png", noise(27, 30, 3))
    keep("sub/same.png", noise(28, 30, 3))
    keep("sub/deep/same.png", noise(29, 30, 3))
    keep("other/same.png", noise(30, 31, 3))

    plain = (folder / "Grüße aus Köln.JPG").read_bytes()
    progressive = (folder / "progressive.jpg").read_bytes()
    contents = (
        b"",
        b"not an image\n",
        plain[:len(plain) * 2 // 3],
        progressive[:len(progressive) * 2 // 3],
        b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",  # what a Mac leaves on other disks
    )
    for name, content in zip(BAD, contents, strict=True):
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not even tried")
    return folder, sizes


def test_odd_images_are_trained_on_and_get_three_files_each(
    odd_folder, tiny_clip_file, tmp_path, capsys
):
    folder, sizes = odd_folder
    out = tmp_path / "out"
    train.main([
        "--stage", "rectify", "--data", str(folder), "--classes", "cat, dog, tree",
        "--clip", str(tiny_clip_file), "--crop", "32", "--rectify-short-side", "32",
        "--epochs", "1", "--out", str(out), "--device", "cpu",
    ])
    skipped = re.findall(r"^skipped (.+?): .", capsys.readouterr().err, re.MULTILINE)
    assert sorted(skipped) == sorted(BAD)
    labels = json.loads((out / "image_labels.json").read_text())["labels"]
    assert labels.keys() == sizes.keys()

    evaluation.main([
        "--stage", "rectify", "--images", str(folder), "--checkpoint", str(out / "rectify.pt"),
        "--short-side", "32", "--device", "cpu",
    ])
    printed = capsys.readouterr()
    assert f"{len(sizes)} images segmented, {len(BAD)} unreadable" in printed.out
    for name in BAD:
        assert f"skipped {name}" in printed.err

    written = {path.relative_to(out / "masks").as_posix() for path in (out / "masks").rglob("*.*")}
    expected = set()
    for name in sizes:
        expected |= {f"{name}.index.png", f"{name}.overlay.png", f"{name}.json"}
    assert written == expected

    for name, size in sizes.items():
        with Image.open(out / "masks" / f"{name}.index.png") as index:
            assert (index.mode, index.size) == ("P", size), name
            assert set(np.array(index).flat) <= {1, 2, 3}
        with Image.open(out / "masks" / f"{name}.overlay.png") as overlay:
            overlay.load()
        report = json.loads((out / "masks" / f"{name}.json").read_text())
        assert report["picture"] == name
        assert report["size"] == list(size)
        assert sum(report["areas"].values()) == pytest.approx(1)
