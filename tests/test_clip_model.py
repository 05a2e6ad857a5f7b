"""clip_model.py against computations of its own: texts, encoders, files, downloads.

Three other CLIPs stand beside the one under test: the plain one of reference.py; OpenAI's, put
together here from torch.nn's own layers, which is also what the archives are made of; and Hugging
Face's, as a list of names. Nothing is downloaded but from a server on this machine.
"""

import gzip
import hashlib
import html
import json
import math
import os
import pickle
import re
import socket
import struct
import tracemalloc
import unicodedata
import urllib.error
import warnings
import zipfile
from collections import OrderedDict

import ftfy
import pytest
import torch
from torch import nn

import clip_model
import reference
from clip_model import CLIP, MODELS, Tokenizer, load_clip, normalize_pixels, patch_tower
from clip_model import written_atomically
from conftest import close, sentence

# 3 heads in the image tower, 2 in that of texts; no two sizes are equal.
ODD = dict(embed_dim=10, patch=5, width=192, layers=3, grid=4)
ODD |= dict(context=23, text_width=128, text_layers=1)


# --- Tokens ---------------------------------------------------------------------------------------

class LiteralBPE:
    """Byte-pair encoding on strings with spaces between the pieces (Sennrich et al., 2016)."""

    WHOLE = ["<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]

    def __init__(self, merges):
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letters = {byte: chr(byte) for byte in visible}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

        order = list(self.letters.values())
        tokens = order + [letter + "</w>" for letter in order] + [a + b for a, b in merges]
        tokens += self.WHOLE[:2]
        self.number = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}

    @staticmethod
    def kind(character):
        """" ": white space, "L": a letter, "N": a digit, "P": anything else."""
        if character.isspace():
            return " "
        category = unicodedata.category(character)[0]
        return category if category in "LN" else "P"

    def words(self, text):
        """Special tokens, contractions, runs of letters, single digits, runs of all else."""
        words = []
        i = 0
        while i < len(text):
            kind = self.kind(text[i])
            whole = [word for word in self.WHOLE if text.startswith(word, i)]
            end = i + 1
            if whole:
                end = i + len(whole[0])
            else:
                while kind in "LP" and end < len(text) and self.kind(text[end]) == kind:
                    end += 1
            if kind != " ":
                words.append(text[i:end])
            i = end
        return words

    def encode(self, text):
        ids = []
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        for word in self.words(text):
            pieces = " ".join(self.letters[byte] for byte in word.encode()) + "</w>"
            if word in self.WHOLE[:2]:
                pieces = word
            while True:
                split = pieces.split(" ")
                known = [pair for pair in zip(split, split[1:]) if pair in self.rank]
                if not known:
                    break
                a, b = min(known, key=self.rank.get)
                pair = rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)"
                pieces = re.sub(pair, lambda _: a + b, pieces)
            ids += [self.number[piece] for piece in pieces.split(" ")]
        return ids


TEXTS = [
    "",
    " \t\n ",
    "a photo of a cat.",
    "A PHOTO of the Cats, thethe catcat dogs",
    "don't we'll they've I'm he'd you're it's 'soup 'Tis rock 'n' roll ''s '' 'x",
    "café naïve Ångström İstanbul Straße ΣΟΦΟΣ cafe\u0301 nai\u0308ve",
    "cafÃ© â€œquotedâ€\x9d schÃ¶n",
    "fish &amp; chips &lt;b&gt; &eacute; &amp;amp; &amp;lt;i&amp;gt; 1 < 2 &amp;lt; 3",
    "😀👩‍👩‍👧 🇩🇪 ❤️ 猫と犬 고양이 кошка قطة बिल्ली",
    "3.14159 2024 1,000,000 ½ ² Ⅳ ٣ x2y 4th",
    "!!!???...;;;--__ #@! ... a.b,c snake_case CamelCase",
    "tabs\tand\nnew\r\nlines\u00a0and\u2003wide \u200bzero\u200dwidth",
    "in <|startoftext|> and <|ENDOFTEXT|> the text<|endoftext|> <|start|>",
    "antidisestablishmentarianism aaaaaaaaaaa bananabanana",
]


@pytest.fixture
def official(shared, monkeypatch):
    """OpenAI's vocabulary is in $CLIP_HOME. -> its merges, as read here."""
    path = shared("clip/bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setenv("CLIP_HOME", str(path.parent))
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    yield [tuple(line.split(" ")) for line in lines[1:48895]]
    Tokenizer.from_file.cache_clear()


@pytest.mark.parametrize("text, ids", [  # as printed wherever openai/CLIP is explained
    ("a photo of a cat.", [49406, 320, 1125, 539, 320, 2368, 269, 49407]),
    ("a diagram", [49406, 320, 22697, 49407]),
    ("hello world!", [49406, 3306, 1002, 256, 49407]),
    ("", [49406, 49407]),
])
def test_openais_ids_of_well_known_texts(official, text, ids):
    expected = [ids + [0] * (77 - len(ids))]

    assert Tokenizer.from_file()(text).tolist() == expected
    with torch.device("meta"):  # a CLIP that brought no tokenizer of its own has OpenAI's
        clip = CLIP(12, 4, 64, 1, 3, 77, 49408, 64, 1)
    assert clip.tokenize([text]).tolist() == expected


def test_ids_are_those_of_literal_byte_pairs(merges, official):
    for pairs in (merges, official):
        tokenizer, literal = Tokenizer(pairs), LiteralBPE(pairs)

        for text in TEXTS:
            assert tokenizer.encode(text) == literal.encode(text), text


def test_ids_by_hand():
    # "!" is token 0, "a" the 65th visible character, "!</w>" is 256; merges follow from 512 on.
    tokenizer = Tokenizer([("a", "b"), ("ab", "c</w>"), ("b", "c</w>")])
    a, b, c = (ord(letter) - ord("!") for letter in "abc")

    assert tokenizer.encode("abc ABC! bc cab") == [513, 513, 256, 514, c, a, b + 256]
    assert tokenizer("abc", context_length=5).tolist() == [[515, 513, 516, 0, 0]]


def test_a_long_text_is_refused_or_cut_before_EOT(merges):
    tokenizer = Tokenizer(merges)
    start, cat, end = tokenizer.start, tokenizer.ids["cat</w>"], tokenizer.end

    with pytest.raises(ValueError, match="cat cat cat cat dog") as caught:
        tokenizer(["a cat", "cat cat cat cat dog"], context_length=6)
    assert "truncate=True" in sentence(caught)
    cut = tokenizer(["cat cat cat cat dog", "cat"], context_length=6, truncate=True)
    just_fits = tokenizer("cat cat cat cat", context_length=6)

    assert cut.tolist() == [[start, cat, cat, cat, cat, end], [start, cat, end, 0, 0, 0]]
    assert just_fits.tolist() == cut[:1].tolist()
    assert tokenizer([], context_length=6).shape == (0, 6)


def test_a_tokenizer_of_another_vocabulary_is_refused(make_clip, merges):
    clip = make_clip()
    clip.tokenizer = Tokenizer(merges[:-1])

    with pytest.raises(ValueError) as caught:
        clip.tokenize("a cat")

    assert "'merges'" in sentence(caught)


# --- Pixels and patches ---------------------------------------------------------------------------

def test_pixels_are_normalized_and_padding_is_0():
    images = torch.rand(2, 3, 3, 5, dtype=torch.float64)
    valid = torch.rand(2, 3, 5) < 0.5

    found = normalize_pixels(images, valid=valid)

    for b in range(2):
        close(found[b], reference.normalized(images[b], valid=valid[b]), 1e-12)
        close(normalize_pixels(images[b]), reference.normalized(images[b]), 1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_of_whole_numbers_are_refused(dtype):
    with pytest.raises(ValueError) as caught:
        normalize_pixels(torch.ones(1, 3, 4, 6, dtype=dtype))

    assert f"{dtype}: give images as float" in sentence(caught)


def bicubic_weights(cells, pixels):
    """(pixels, cells): Keys' cubic with a = -.75 through the 4 nearest cells; edges repeated."""
    weights = torch.zeros(pixels, cells, dtype=torch.float64)
    for i in range(pixels):
        place = (i + 0.5) * cells / pixels - 0.5
        for cell in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - cell)
            weight = -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            if d <= 1:
                weight = 1.25 * d ** 3 - 2.25 * d ** 2 + 1
            weights[i, min(max(cell, 0), cells - 1)] += weight
    return weights


@pytest.mark.parametrize("h, w", [(3, 3), (2, 5), (7, 4), (1, 1)])
def test_the_positional_grid_is_stretched_bicubically(clip, h, w):
    clip = clip.double()
    rows = clip.visual.positional_embedding[1:]  # the first belongs to the class token
    table = torch.stack([torch.stack([rows[3 * y + x] for x in range(3)]) for y in range(3)])

    grid = clip.visual.positional_grid(h, w)

    by_hand = torch.einsum("iy,jx,yxe->eij", bicubic_weights(3, h), bicubic_weights(3, w), table)
    close(grid, by_hand[None])


def test_padding_is_the_mean_color_to_the_right_and_below(clip):
    images = torch.rand(2, 3, 13, 18)
    canvas = torch.tensor(clip_model.MEAN).view(3, 1, 1).repeat(2, 1, 16, 20)
    canvas[:, :, :13, :18] = images

    dense = clip.encode_image_dense(normalize_pixels(images))

    assert dense.shape == (2, 12, 4, 5)
    close(dense, clip.encode_image_dense(normalize_pixels(canvas)), 1e-5)


@pytest.mark.parametrize("height, width", [(7, 18), (8, 20), (1, 3)])
def test_a_map_on_patches_becomes_one_on_pixels(clip, height, width):
    grid = torch.randn(2, 3, math.ceil(height / 4), math.ceil(width / 4), dtype=torch.float64)

    close(clip.to_pixels(grid, height, width), reference.enlarge(grid, 4, height, width))


# --- The encoders ---------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, gelu, attn_mask=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=gelu(), c_proj=nn.Linear(4 * width, width)
        ))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = attn_mask

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=self.attn_mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAI(nn.Module):
    """CLIP as openai/CLIP puts it together, from PyTorch's layers, of the sizes ODD."""

    def __init__(self, clip, gelu=QuickGELU):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 192, 5, stride=5, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.empty(192))
        self.visual.positional_embedding = nn.Parameter(torch.empty(1 + 4 * 4, 192))
        self.visual.ln_pre = nn.LayerNorm(192)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.Sequential(*[Block(192, gelu) for _ in range(3)])
        self.visual.ln_post = nn.LayerNorm(192)
        self.visual.proj = nn.Parameter(torch.empty(192, 10))

        later = torch.full((23, 23), -torch.inf).triu(1)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Block(128, gelu, later))
        self.token_embedding = nn.Embedding(clip.eot + 1, 128)
        self.positional_embedding = nn.Parameter(torch.empty(23, 128))
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.empty(128, 10))
        self.logit_scale = nn.Parameter(torch.empty(()))

        self.load_state_dict(clip.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, images, tokens):
        """(B, 3, 20, 20), (N, 23) -> (B, D), (N, D)"""
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = visual.transformer.resblocks(visual.ln_pre(x + visual.positional_embedding))
        of_images = visual.ln_post(x[:, 0]) @ visual.proj

        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer.resblocks(x))
        return of_images, x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


@pytest.mark.parametrize("quick_gelu, gelu", [(True, QuickGELU), (False, nn.GELU)])
def test_both_encoders_equal_a_clip_of_pytorchs_layers(make_clip, quick_gelu, gelu):
    clip = make_clip(**ODD, quick_gelu=quick_gelu)
    images = torch.randn(2, 3, 20, 20)
    tokens = clip.tokenize(["a photo of the dog in this scene", "cat", ""])

    images_expected, texts_expected = OpenAI(clip, gelu)(images, tokens)

    close(clip.encode_image(images), images_expected, 1e-4)
    close(clip.encode_text(tokens), texts_expected, 1e-4)


# The trained size; not square; no multiple of the patch; a single patch.
@pytest.mark.parametrize("height, width", [(12, 12), (8, 20), (7, 18), (13, 5), (4, 4)])
def test_whole_images_and_patches_equal_the_plain_clip(clip, height, width):
    clip = clip.double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)

    whole = clip.encode_image(images)
    dense = clip.encode_image_dense(images)

    for b in range(2):
        close(whole[b], reference.image_vector(clip.state_dict(), images[b]))
        close(dense[b], reference.patch_vectors(clip.state_dict(), images[b]))


def test_texts_equal_the_plain_clip_whatever_stands_after_EOT(clip):
    clip = clip.double()
    texts = ["cat", "a photo of the dog in this scene", ""]
    tokens = clip.tokenize(texts)
    for row in tokens:
        end = int(row.argmax())
        row[end + 1:] = torch.randint(1, clip.eot, (clip.context_length - end - 1,))

    found = clip.encode_text(tokens)

    for text, vector in zip(texts, found):
        ids = [clip.sot, *clip.tokenizer.encode(text), clip.eot]
        close(vector, reference.text_vector(clip.state_dict(), ids))


def test_quick_gelus_gradient_survives_that_it_writes_in_place():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(clip_model.QuickGELU(), x)


def test_patches_under_autocast_are_those_of_float32_less_exactly(clip):
    images = torch.randn(2, 3, 13, 18)
    exact = clip.encode_image_dense(images)

    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.encode_image_dense(images)

    assert (rough - exact).norm() < 0.05 * exact.norm()


# In OpenAI's order; then millions of parameters, as printed wherever these models are compared, and
# the heads of both towers.
@pytest.mark.parametrize("sizes, millions, heads", [
    ((512, 16, 768, 12, 14, 77, 49408, 512, 12), 149.62, (12, 8)),      # ViT-B/16
    ((512, 32, 768, 12, 7, 77, 49408, 512, 12), 151.28, (12, 8)),       # ViT-B/32
    ((768, 14, 1024, 24, 16, 77, 49408, 768, 12), 427.62, (16, 12)),    # ViT-L/14
    ((1024, 14, 1280, 32, 16, 77, 49408, 1024, 24), 986.11, (16, 16)),  # OpenCLIP's ViT-H/14
    ((1024, 14, 1408, 40, 16, 77, 49408, 1024, 24), 1366.68, (16, 16)),             # ViT-g/14
    ((1280, 14, 1664, 48, 16, 77, 49408, 1280, 32), 2539.57, (16, 20)),             # ViT-bigG/14
])
def test_published_models_have_their_sizes_and_heads(sizes, millions, heads):
    with torch.device("meta"):  # shapes without numbers
        clip = CLIP(*sizes)

    count = sum(parameter.numel() for parameter in clip.parameters())
    assert round(count / 1e6, 2) == millions
    for tower, of_tower in zip((clip.visual.transformer, clip.transformer), heads):
        assert {block.attn.heads for block in tower.resblocks} == {of_tower}


# --- The tower that reads patches -----------------------------------------------------------------

def test_a_patch_tower_reads_otherwise_on_the_same_weights(clip, monkeypatch):
    clip = clip.double()
    token = torch.randn(128, dtype=torch.float64)
    images = torch.randn(1, 3, 9, 14, dtype=torch.float64)
    before = clip.encode_image_dense(images)

    tower = patch_tower(clip.visual, exact_gelu=True, class_token=token, eps=0.1)
    dense = clip.encode_image_dense(images, tower)

    close(clip.encode_image_dense(images), before, 0)  # the CLIP itself stays as it was
    own = dict(tower.named_parameters())
    for name, parameter in clip.visual.named_parameters():
        assert (own[name] is parameter) == (name != "class_embedding")

    norm = reference.layer_norm

    def norm_of_another_eps(state, key, x):
        return norm(state, key, x, 0.1 if "resblocks" in key else 1e-5)

    monkeypatch.setattr(reference, "layer_norm", norm_of_another_eps)
    state = clip.state_dict() | {"visual.class_embedding": token}
    close(dense[0], reference.patch_vectors(state, images[0], reference.exact_gelu))


# --- Eq. (1): prompts of vectors ------------------------------------------------------------------

NAMES = [[5, 6], [7], [5, 9, 10], [11, 12, 13, 14], [7]]  # token ids; two classes of one name


@pytest.mark.parametrize("shape", [(7, 128), (5, 7, 128)], ids=["shared", "own"])
@pytest.mark.parametrize("cut", [False, True])
def test_prompted_texts_are_those_of_one_at_a_time(clip, shape, cut):
    """In values and in gradients; cut: names that lost their EOT, as a published model has them."""
    clip = clip.double()
    endings = [name if cut else [*name, clip.eot] for name in NAMES]
    prompt = (0.1 * torch.randn(shape, dtype=torch.float64)).requires_grad_()

    found = clip.encode_prompted(prompt, endings)

    expected = []
    for c, ending in enumerate(endings):
        own = prompt if prompt.ndim == 2 else prompt[c]
        expected.append(reference.prompted_vector(clip.state_dict(), own, ending))
    expected = torch.stack(expected)
    close(found, expected)

    weights = torch.randn_like(expected)
    gradient, = torch.autograd.grad((found * weights).sum(), prompt)
    gradient_expected, = torch.autograd.grad((expected * weights).sum(), prompt)
    assert gradient_expected.abs().max() > 1e-3
    close(gradient, gradient_expected, 1e-9)


# --- Files of weights -----------------------------------------------------------------------------

def save_archive(clip, path):
    """OpenAI's form: model and code; matrices in half precision; its sizes as tensors."""
    model = OpenAI(clip)
    sizes = {"input_resolution": 20, "context_length": 23, "vocab_size": clip.eot + 1}
    for name, size in sizes.items():
        model.register_buffer(name, torch.tensor(size))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates to write such files; we only read them
        if "traced" in path.name:
            archive = torch.jit.trace(model, (torch.zeros(1, 3, 20, 20), clip.tokenize("a cat")))
        else:
            archive = torch.jit.script(model)
        for parameter in archive.parameters():
            if parameter.ndim > 1:
                storage = torch.cat([torch.zeros(1), parameter.flatten()]).half()
                parameter.data = storage[1:].view_as(parameter)  # begins behind another number
        torch.jit.save(archive, str(path))


def hugging_face(state):
    """OpenAI's names and matrices -> those of transformers.CLIPModel."""
    moved = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(23)[None],
    }
    parts = [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),  # so it is spelt
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ]
    towers = [("visual.transformer", "vision_model", 3), ("transformer", "text_model", 1)]
    for tower, model, layers in towers:
        for i in range(layers):
            block, layer = f"{tower}.resblocks.{i}", f"{model}.encoder.layers.{i}"
            parts += [
                (f"{block}.ln_1", f"{layer}.layer_norm1"),
                (f"{block}.ln_2", f"{layer}.layer_norm2"),
                (f"{block}.mlp.c_fc", f"{layer}.mlp.fc1"),
                (f"{block}.mlp.c_proj", f"{layer}.mlp.fc2"),
                (f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj"),
            ]
            for kind in ("weight", "bias"):
                stacked = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for letter, part in zip("qkv", stacked):
                    moved[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
    for ours, theirs in parts:
        moved[f"{theirs}.weight"] = state[f"{ours}.weight"]
        moved[f"{theirs}.bias"] = state[f"{ours}.bias"]
    return moved


def save_safetensors(tensors, path):
    """8 bytes: the header's length; the header; the numbers, in an order of their own."""
    types = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header = {}
    numbers = b""
    for name in sorted(tensors, reverse=True):
        tensor = tensors[name]
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": types[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(numbers), len(numbers) + len(raw)],
        }
        numbers += raw
    text = json.dumps({"__metadata__": {"format": "pt"}} | dict(sorted(header.items()))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def open_clip(state):
    """OpenCLIP's names of a custom text tower, and a buffer."""
    moved = {"text.attn_mask": torch.zeros(23, 23)}
    for name, tensor in state.items():
        of_text = not name.startswith("visual.") and name != "logit_scale"
        moved["text." + name if of_text else name] = tensor
    return moved


def module(state):
    """As training on several GPUs leaves the names."""
    return {"module." + name: tensor for name, tensor in state.items()}


def half(state):
    return {name: tensor.half() for name, tensor in state.items()}


# Files by name -> what they hold, from OpenAI's state dict; save writes them as the names say.
FORMS = {
    "traced archive.pt": None,
    "scripted archive.pt": None,
    "plain.pt": lambda state: state,
    "in half precision.pt": half,
    "from before PyTorch 1.6.pth": lambda state: state,
    "in state_dict.pt": lambda state: {"epoch": 3, "state_dict": state, "loss": torch.zeros(2)},
    "in model_state_dict.pt": lambda state: {"model_state_dict": state, "name": "x"},
    "in model.pt": lambda state: {"model": state},
    "module.pt": module,
    "module in state_dict.pt": lambda state: {"state_dict": module(state)},
    "OpenCLIP's.bin": lambda state: state | {"attn_mask": torch.zeros(23, 23)},
    "OpenCLIP's.safetensors": half,
    "OpenCLIP's with text.pt": open_clip,
    "OpenCLIP's with module.text.pt": lambda state: {"state_dict": module(open_clip(state))},
    "Hugging Face's.bin": hugging_face,
    "Hugging Face's.safetensors": hugging_face,
}


def save(clip, path):
    if "archive" in path.name:
        save_archive(clip, path)
        return
    content = FORMS[path.name](clip.state_dict())
    if path.suffix == ".safetensors":
        save_safetensors(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".pth")


@pytest.fixture
def odd_clip(make_clip):
    """A CLIP of the sizes ODD, whose numbers half precision can hold."""
    return make_clip(**ODD).half().float()


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_file_gives_the_same_clip(odd_clip, tmp_path, form):
    save(odd_clip, tmp_path / form)
    images = torch.randn(1, 3, 13, 26)
    tokens = odd_clip.tokenize("a photo of the dog")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_clip(tmp_path / form)

    assert loaded.identity() == odd_clip.identity()
    for key, expected in odd_clip.state_dict().items():
        close(loaded.state_dict()[key], expected, 0)  # in float32
    close(loaded.encode_image_dense(images), odd_clip.encode_image_dense(images), 0)
    close(loaded.encode_text(tokens), odd_clip.encode_text(tokens), 0)

    assert (loaded.context_length, loaded.input_resolution) == (23, 20)
    assert (loaded.source, loaded.tokenizer) == (str(tmp_path / form), None)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_file_may_bring_the_merges_of_its_tokenizer(tiny_clip_file, make_clip):
    tokens = load_clip(tiny_clip_file).tokenize("a photo of the dog")

    assert torch.equal(tokens, make_clip(context=77).tokenize("a photo of the dog"))


def test_a_clip_is_found_again_from_another_folder(clip, tmp_path, monkeypatch):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    monkeypatch.chdir(tmp_path)
    source = load_clip("clip.pt").source
    monkeypatch.chdir("/")

    assert load_clip(source).source == source


def test_the_sha256_of_tensors_is_that_of_names_and_float32_numbers():
    tensors = {"b": torch.tensor([[1., 2.], [3., 4.]]).T, "a": torch.tensor(0.5).half()}

    written = b"a" + struct.pack("<f", 0.5) + b"b" + struct.pack("<4f", 1, 3, 2, 4)

    assert clip_model.tensors_sha256(tensors) == hashlib.sha256(written).hexdigest()


def test_another_number_activation_or_head_count_is_another_clip(make_clip, tmp_path):
    identities = {make_clip().identity(), make_clip().double().identity()}
    assert len(identities) == 1

    torch.save(make_clip().state_dict(), tmp_path / "clip.pt")
    exact = load_clip(tmp_path / "clip.pt", quick_gelu=False).identity()
    assert exact == make_clip(quick_gelu=False).identity()

    other = make_clip()
    other.visual.proj[3, 5] += 1e-3
    identities |= {other.identity(), exact}
    for tower in ("visual.transformer", "transformer"):
        other = make_clip()
        for block in other.get_submodule(tower).resblocks:
            block.attn.heads = 4
        identities.add(other.identity())

    assert len(identities) == 5


# --- Files that are no CLIP -----------------------------------------------------------------------

def refused(path, *words):
    """load_clip says in one sentence, which names the file, what is wrong."""
    with pytest.raises(ValueError) as caught:
        load_clip(path)
    for word in (path, *words):
        assert str(word) in sentence(caught)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("visual.proj"), "visual.proj"),
    (lambda s: s.pop("text_projection"), "text_projection"),
    (lambda s: s.pop("visual.conv1.weight"), "visual.conv1.weight"),    # a ResNet has none
    (lambda s: s.pop("transformer.resblocks.0.ln_1.weight"), "transformer.resblocks.0"),
    (lambda s: s.update(logit_bias=torch.zeros(1)), "logit_bias"),      # SigLIP's
    (lambda s: s.update(epoch=3), "int"),
    (lambda s: s.update({"ln_final.bias": torch.zeros(7)}), "ln_final.bias"),
    (lambda s: s.update({"visual.positional_embedding": torch.zeros(9, 128)}), "size mismatch"),
    (lambda s: s.update({"self_attn.q_proj.bias": torch.zeros(128)}), "attn.k_proj.bias"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(1088, 3, 4, 4)}), "width 1088"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(1152, 3, 4, 4)}), "LARGE_TOWERS"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(1792, 3, 4, 4)}), "width 1792"),
])
def test_weights_that_do_not_fit_are_named(clip, tmp_path, change, words):
    state = clip.state_dict()
    change(state)
    torch.save(state, tmp_path / "clip.pt")

    refused(tmp_path / "clip.pt", words)


@pytest.mark.parametrize("content", [
    [1, 2],
    torch.zeros(3),
    {"state_dict": 3},
    {},
    b"",
    b"<html>404</html>",
    struct.pack("<Q", 1 << 40) + b"{}",  # as safetensors: a header of a terabyte
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"\xff\xfe{}",
])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_of_other_things_are_refused(tmp_path, name, content):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)

    refused(tmp_path / name)


@pytest.mark.parametrize("form", [
    "traced archive.pt",
    "plain.pt",
    "from before PyTorch 1.6.pth",
    "Hugging Face's.safetensors",
])
def test_truncated_files_are_refused(odd_clip, tmp_path, form):
    save(odd_clip, tmp_path / form)
    content = (tmp_path / form).read_bytes()

    for share in (0.001, 0.1, 0.5, 0.99):
        (tmp_path / form).write_bytes(content[:int(len(content) * share)])
        refused(tmp_path / form)


def test_an_archive_whose_numbers_are_too_few_is_refused(odd_clip, tmp_path):
    save_archive(odd_clip, tmp_path / "traced.pt")

    with zipfile.ZipFile(tmp_path / "traced.pt") as whole:
        with zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
            for name in whole.namelist():
                content = whole.read(name)
                short.writestr(name, content[:64] if "/data/" in name else content)

    refused(tmp_path / "short.pt")


def archive_of(path, data):
    """A file that looks like OpenAI's, with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/code/__torch__.py", "")
        archive.writestr("archive/data.pkl", data)


def test_hostile_files_run_nothing(hostile, tmp_path):
    bare = pickle.dumps(hostile.payload, protocol=2)
    archive_of(tmp_path / "archive.pt", bare)
    torch.save({"weight": hostile.payload}, tmp_path / "plain.pt")
    torch.save([hostile.payload], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(bare)
    (tmp_path / "bare.safetensors").write_bytes(bare)

    for name in ("archive.pt", "plain.pt", "old.pt", "bare.bin", "bare.safetensors"):
        refused(tmp_path / name)
        assert not hostile.ran(), name


@pytest.mark.parametrize("module, name", [
    ("os", "system"),
    ("builtins", "eval"),
    ("torch", "load"),
    ("torch.jit._pickle", "restore_type_tag"),
])
def test_an_archive_can_name_tensors_and_containers_alone(tmp_path, module, name):
    archive_of(tmp_path / "x.pt", f"c{module}\n{name}\n.".encode())

    refused(tmp_path / "x.pt", f"{module}.{name}")


def test_an_archive_reserves_no_memory_for_what_it_only_claims_to_hold(tmp_path):
    number = struct.pack("<I", 20_000_000)
    archive_of(tmp_path / "x.pt", b"\x80\x02Nr" + number + b".")  # None, remembered as that many

    tracemalloc.start()
    refused(tmp_path / "x.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 10_000_000  # Python's unpickler in C takes 320 MB


def test_a_missing_file_is_answered_with_the_known_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_clip(tmp_path / "nothing.pt")

    text = sentence(caught)
    assert str(tmp_path / "nothing.pt") in text
    assert "ViT-B/16, ViT-B/32, ViT-L/14, ViT-L/14@336px" in text


# --- Downloads ------------------------------------------------------------------------------------

CONTENT = b"the right file" * 100_000  # more than one block
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """$CLIP_HOME, a folder that is not there yet."""
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "new" / "clip"))
    return tmp_path / "new" / "clip"


@pytest.mark.parametrize("algorithm, digest", [
    pytest.param("sha256", SHA256, id="sha256"), pytest.param("md5", MD5, id="md5"),
])
def test_each_address_is_tried_until_one_sends_the_right_file(
    serve, monkeypatch, tmp_path, algorithm, digest
):
    monkeypatch.setattr(clip_model, "SILENCE", 0.2)
    behaviors = {
        "/gone": 404,
        "/silent": "silent",
        "/wrong": b"an error page",
        "/cut": ("cut", CONTENT[:999]),
        "/right": CONTENT,
        "/spare": CONTENT,
    }
    address = serve(behaviors)
    path = tmp_path / "new" / "file"

    clip_model.download([address + page for page in behaviors], path, algorithm, digest)

    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["file"]
    assert serve.asked == ["/gone", "/silent", "/wrong", "/cut", "/right"]


def test_when_no_address_is_right_a_sentence_says_where_to_put_the_file(serve, tmp_path):
    pages = {"/gone": 404, "/wrong": b"x", "/cut": ("cut", CONTENT)}
    address = serve(pages)
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with socket.socket() as taken:  # bound, but nobody listens: connections are refused
        taken.bind(("127.0.0.1", 0))
        urls = [f"http://127.0.0.1:{taken.getsockname()[1]}/dead", *(address + p for p in pages)]
        with pytest.raises(OSError) as caught:
            clip_model.download(urls, path, "md5", MD5)

    for words in (*urls, "404", f"md5 {MD5}", f"put it at {path}"):
        assert words in sentence(caught)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_digest_is_printed_where_none_is_known(serve, tmp_path, capsys):
    clip_model.download([serve({"/x": CONTENT}) + "/x"], tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == CONTENT
    assert SHA256 in capsys.readouterr().out


# OpenAI's own list, and where Hugging Face keeps the same weights.
@pytest.mark.parametrize("name, file, folder, sha256", [
    ("ViT-B/16", "ViT-B-16.pt", "clip-vit-base-patch16",
     "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    ("ViT-B/32", "ViT-B-32.pt", "clip-vit-base-patch32",
     "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    ("ViT-L/14", "ViT-L-14.pt", "clip-vit-large-patch14",
     "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    ("ViT-L/14@336px", "ViT-L-14-336px.pt", "clip-vit-large-patch14-336",
     "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
])
def test_missing_weights_are_asked_for_at_openai_then_at_hugging_face(
    home, monkeypatch, name, file, folder, sha256
):
    asked = []

    def no_network(request, timeout):
        assert timeout == clip_model.SILENCE
        asked.append(request.full_url)
        raise urllib.error.URLError("unreachable")

    monkeypatch.setattr(clip_model.urllib.request, "urlopen", no_network)
    with pytest.raises(OSError) as caught:
        load_clip(name)

    assert asked == [
        f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}",
        f"https://huggingface.co/openai/{folder}/resolve/main/pytorch_model.bin",
    ]
    for words in (sha256, f"put it at {home / file}", f"put it at {home / folder}.bin"):
        assert words in sentence(caught)


@pytest.fixture
def offered(odd_clip, serve, tmp_path, monkeypatch):
    """offered(OpenAI's answer, Hugging Face's) for ViT-B/16; None: the small CLIP in their form."""
    openai, face = tmp_path / "openai.pt", tmp_path / "face.bin"
    torch.save(odd_clip.state_dict(), openai)
    torch.save(hugging_face(odd_clip.state_dict()), face)
    sha256 = hashlib.sha256(openai.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "ViT-B/16", ("ViT-B-16.pt", sha256, "vit-base", (5, 20)))

    def offer(of_openai=None, of_face=None):
        address = serve({
            f"/{sha256}/ViT-B-16.pt": of_openai or openai.read_bytes(),
            "/vit-base/resolve/main/pytorch_model.bin": of_face or face.read_bytes(),
        })
        monkeypatch.setattr(clip_model, "OPENAI", address)
        monkeypatch.setattr(clip_model, "HUGGING_FACE", address)

    return offer


@pytest.mark.parametrize("of_openai, kept", [
    (None, "ViT-B-16.pt"), (404, "vit-base.bin"), (b"an error page", "vit-base.bin"),
])
def test_a_clip_by_name_is_fetched_once(odd_clip, home, serve, offered, of_openai, kept):
    offered(of_openai)

    for _ in range(2):
        loaded = load_clip()

    assert (loaded.identity(), loaded.source) == (odd_clip.identity(), "ViT-B/16")
    assert os.listdir(home) == [kept]
    assert len(serve.asked) == (1 if of_openai is None else 2)


def test_another_file_under_openais_name_is_refused_and_kept(home, offered):
    offered()
    home.mkdir(parents=True)
    (home / "ViT-B-16.pt").write_bytes(b"something else")

    with pytest.raises(ValueError) as caught:
        load_clip()

    assert f"{home / 'ViT-B-16.pt'} is not the official" in sentence(caught)
    assert (home / "ViT-B-16.pt").read_bytes() == b"something else"


@pytest.mark.parametrize("size", [(4, 20), (5, 25)])
def test_another_model_under_a_name_is_refused(home, offered, monkeypatch, size):
    offered(404)
    monkeypatch.setitem(MODELS, "ViT-B/16", (*MODELS["ViT-B/16"][:3], size))

    with pytest.raises(ValueError) as caught:
        load_clip("ViT-B/16")

    assert "not of the size of ViT-B/16" in sentence(caught)


def test_an_error_page_in_place_of_hugging_faces_file_is_to_be_deleted(home, offered):
    offered(404, b"<html>please log in</html>")

    with pytest.raises(ValueError) as caught:
        load_clip("ViT-B/16")

    assert f"{home / 'vit-base.bin'} does not hold" in sentence(caught)
    assert "delete it to have it downloaded again" in sentence(caught)


# --- Writing --------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, raised", [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, "No space left on device"), OSError),
    (RuntimeError("unexpected pos 64 vs 0\nmore of it"), OSError),  # torch.save on a full disk
])
def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, error, raised):
    path = tmp_path / "folder" / "file"
    for content in ("oldest", "old"):
        with written_atomically(path) as temporary:
            temporary.write_text(content)

    with pytest.raises(raised) as caught:
        with written_atomically(path) as temporary:
            temporary.write_text("half of the new")
            raise error

    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]
    assert raised is KeyboardInterrupt or f"{path} could not be written" in sentence(caught)


# --- What the file says about itself --------------------------------------------------------------

def test_the_examples_of_the_header_print_what_they_promise(make_clip, monkeypatch, capsys):
    # Run as they stand, but for the weights: random ones of ViT-B/16's patch and width D.
    small = make_clip(embed_dim=512, patch=16, grid=14, context=77)
    monkeypatch.setattr(clip_model, "load_clip", lambda name: small)
    lines = clip_model.__doc__.split("Zero-shot classification\n")[1].split("Sources:")[0]
    example = "\n".join(line[4:] for line in lines.splitlines() if line.startswith("    "))

    exec(example, {})

    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"# (torch\.Size\(.*\))", example)
    assert printed == promised == ["torch.Size([4, 2])", "torch.Size([4, 320, 224])"]
