"""The authors' published checkpoints against a literal computation of what their code does with
them.

Nobody can put the real files here. So the tests write files of exactly their keys and shapes with
random numbers in them, and compute the logits once more in plain torch.nn.functional, straight
from the tensors of the file: no line of the project takes part in that.
"""

import copy
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import reclip
import train
from clip_model import Tokenizer, load_clip, sha256_of
from datasets import ADE_CLASSES, CONTEXT_CLASSES, VOC_CLASSES
from deeplab import DeepLabV2
from reclip import PROMPTS, RECIPES, ReCLIP

CLASSES = {"voc": VOC_CLASSES, "context": CONTEXT_CLASSES, "ade20k": ADE_CLASSES}

# Of each recipe what it does with the images that CLIP's patches are made of.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
FACTS = {
    "cvpr2024": {"exact_gelu": True, **IMAGENET},
    "2025": {"exact_gelu": False, **OPENAI},
}

# D 512 as in the real files, for the student's features have that width. The rest may be small:
# two heads of 64 in either tower.
SMALL = {
    "D": 512, "patch": 16, "E_v": 128, "vision_layers": 3, "grid": 4,
    "E_t": 128, "text_layers": 2, "vocabulary": 1000,
}
FULL = {
    "D": 512, "patch": 16, "E_v": 768, "vision_layers": 12, "grid": 14,
    "E_t": 512, "text_layers": 12, "vocabulary": 49408,
}


# --- A vocabulary ---------------------------------------------------------------------------------

# The three names of ADE that are too long for three tokens, in OpenAI's own pieces. Their ids have
# OpenAI's order too: the largest of a name is its third, its second and its first.
PIECES = {"skyscraper": ("sky*", "scra*", "per"), "conveyer": ("conve*", "yer")}
IN_ORDER = ("of", "chest", "drawers", "per", "sky*", "scra*", "yer", "belt", "conve*")
CUT = ("chest of drawers", "skyscraper", "conveyer belt")
WORD = re.compile(r"[a-z]+|[^a-z\s]")


class Words(Tokenizer):
    """A made vocabulary: a token for each word of the class names and prompts, but for PIECES."""

    def __init__(self, vocabulary):
        texts = [*PROMPTS, *VOC_CLASSES, *CONTEXT_CLASSES, *ADE_CLASSES]
        words = set(WORD.findall(" ".join(texts).lower()))
        in_order = [*IN_ORDER, *sorted(words - set(IN_ORDER))]
        self.ids = {word: i for i, word in enumerate(in_order, 1)}  # 0 is "!", and pads
        self.start = vocabulary - 2
        self.end = vocabulary - 1
        assert len(self.ids) < self.start

    def encode(self, text):
        ids = []
        for word in WORD.findall(text.lower()):
            ids += [self.ids[piece] for piece in PIECES.get(word, (word,))]
        return ids


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch):
    """A published file brings no vocabulary: it is OpenAI's, and here the made one stands for it.

    -> a function that chooses its size
    """

    def of_size(size):
        words = Words(size)

        def from_file(path=None):
            return words

        monkeypatch.setattr(Tokenizer, "from_file", from_file)
        return words

    of_size(SMALL["vocabulary"])
    return of_size


def three_tokens(names, tokenizer):
    """[name, EOT] cut to three tokens or filled up with zeros, as the authors do: (C, 3)."""
    rows = []
    for name in names:
        ids = [*tokenizer.encode(name), tokenizer.end, 0, 0]
        rows.append(ids[:3])
    return torch.tensor(rows)


# --- Published files, made ------------------------------------------------------------------------

def blocks(tensors, prefix, width, layers, normal):
    """The keys of a transformer, OpenAI's names."""
    for i in range(layers):
        name = f"{prefix}transformer.resblocks.{i}."
        std = width ** -0.5
        tensors[name + "attn.in_proj_weight"] = normal(3 * width, width, std=std)
        tensors[name + "attn.in_proj_bias"] = normal(3 * width, std=0.05)
        tensors[name + "attn.out_proj.weight"] = normal(width, width, std=std)
        tensors[name + "attn.out_proj.bias"] = normal(width, std=0.05)
        tensors[name + "mlp.c_fc.weight"] = normal(4 * width, width, std=std)
        tensors[name + "mlp.c_fc.bias"] = normal(4 * width, std=0.05)
        tensors[name + "mlp.c_proj.weight"] = normal(width, 4 * width, std=std / 2)
        tensors[name + "mlp.c_proj.bias"] = normal(width, std=0.05)
        for norm in ("ln_1", "ln_2"):
            tensors[f"{name}{norm}.weight"] = 1 + normal(width, std=0.1)
            tensors[f"{name}{norm}.bias"] = normal(width, std=0.1)


def clip_tensors(normal, D, patch, E_v, vision_layers, grid, E_t, text_layers, vocabulary):
    """OpenAI's state dict of a ViT CLIP: 302 tensors with twelve layers a tower."""
    visual = {
        "class_embedding": normal(E_v, std=0.5),
        "positional_embedding": normal(1 + grid * grid, E_v, std=0.5),
        "proj": normal(E_v, D, std=E_v ** -0.5).half(),
        "conv1.weight": normal(E_v, 3, patch, patch, std=0.05),
        # A small scale: what the blocks read is then so small that their eps can be seen.
        "ln_pre.weight": 0.01 + normal(E_v, std=0.002),
        "ln_pre.bias": normal(E_v, std=0.002),
    }
    blocks(visual, "", E_v, vision_layers, normal)
    visual["ln_post.weight"] = 1 + normal(E_v, std=0.1)
    visual["ln_post.bias"] = normal(E_v, std=0.1)

    text = {
        "positional_embedding": normal(77, E_t, std=0.2),
        "text_projection": normal(E_t, D, std=E_t ** -0.5).half(),
        "token_embedding.weight": normal(vocabulary, E_t),
    }
    blocks(text, "", E_t, text_layers, normal)
    text["ln_final.weight"] = 1 + normal(E_t, std=0.1)
    text["ln_final.bias"] = normal(E_t, std=0.1)
    return visual, text, torch.tensor(100.0).log()


def positional_net(C, E_v, normal):
    """module.proj_net: three convolutions with a bias and their batch norms, and ReLUs between."""
    net = {}
    channels = (E_v, 512, 256, C)
    for i in range(3):
        fan_in = 9 * channels[i]
        out = channels[i + 1]
        net[f"{3 * i}.weight"] = normal(out, channels[i], 3, 3, std=fan_in ** -0.5)
        net[f"{3 * i}.bias"] = normal(out, std=0.5)
        net |= batch_norm(f"{3 * i + 1}", out, normal)
    return net


def batch_norm(name, channels, normal):
    return {
        f"{name}.weight": 1 + normal(channels, std=0.1),
        f"{name}.bias": normal(channels, std=0.1),
        f"{name}.running_mean": normal(channels, std=0.3),
        f"{name}.running_var": normal(channels).square() + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(74700),
    }


def twice(net):
    """module.conv1-3 and module.norm1-3 are the layers of proj_net again, under other names."""
    again = {}
    for i in range(3):
        for key, tensor in net.items():
            layer, name = key.split(".")
            if int(layer) == 3 * i:
                again[f"conv{i + 1}.{name}"] = tensor
            if int(layer) == 3 * i + 1:
                again[f"norm{i + 1}.{name}"] = tensor
    return again


def seeded_normal(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return std * torch.randn(shape, generator=generator)

    return normal


def rectification(C, seed=0, sizes=SMALL):
    """A published rectification; of the real size it has 647 keys. Doubles share their memory."""
    normal = seeded_normal(seed)
    visual, text, logit_scale = clip_tensors(normal, **sizes)
    E_v, E_t = sizes["E_v"], sizes["E_t"]

    state = {}
    for key, tensor in visual.items():
        state[f"clip.visual.{key}"] = tensor
        if key not in ("proj", "class_embedding"):
            state[f"vit.{key}"] = tensor
    for key, tensor in text.items():
        state[f"clip.{key}"] = tensor
        state[f"text_encoder.{key}"] = tensor
    state["clip.logit_scale"] = logit_scale
    state["logit_scale"] = logit_scale
    state["proj.weight"] = visual["proj"].float().T[:, :, None, None].contiguous()

    # What differs from CLIP, and what was learnt.
    state["vit.cls_token"] = normal(1, 1, E_v, std=0.5)
    state["text_encoder.prompt_token"] = normal(1, 73, E_t)
    net = positional_net(C, E_v, normal)
    for key, tensor in net.items():
        state[f"proj_net.{key}"] = tensor
    state |= twice(net)
    return {f"module.{key}": tensor for key, tensor in state.items()}


def sequel(C, seed=0):
    """A published ReCLIP++: one layer for the positions, and a decoder, in the place of the net."""
    normal = seeded_normal(seed)
    state = {}
    for key, tensor in rectification(C, seed).items():
        if not key.startswith(("module.proj_net.", "module.conv", "module.norm")):
            state[key] = tensor
    state["module.pe_proj.weight"] = normal(SMALL["D"], SMALL["E_v"], 1, 1)
    state["module.pe_proj.bias"] = normal(SMALL["D"])
    state["module.decoder_conv2.weight"] = normal(C, SMALL["D"] + C, 5, 5)
    state["module.decoder_conv2.bias"] = normal(C)
    return state | batch_norm("module.decoder_norm2", C, normal)


# The four stages of ResNet-50: blocks, channels inside a block, stride.
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 1), (3, 512, 1))


def published_student(C, sizes=SMALL):
    """A published student with its 552 keys, all of the real size but the teacher's parts."""
    normal = seeded_normal(5)

    def convolution(name, out, channels, side):
        fan_in = channels * side * side
        return {f"{name}.weight": normal(out, channels, side, side, std=(2 / fan_in) ** 0.5)}

    state = {}
    for i, (out, channels) in enumerate([(32, 3), (32, 32), (64, 32)]):
        state |= convolution(f"backbone.stem.{3 * i}", out, channels, 3)
        state |= batch_norm(f"backbone.stem.{3 * i + 1}", out, normal)

    channels = 64
    for stage, (count, inside, _) in enumerate(STAGES):
        for b in range(count):
            name = f"backbone.res_layers.{stage}.{b}."
            state |= convolution(name + "conv1", inside, channels, 1)
            state |= batch_norm(name + "norm1", inside, normal)
            state |= convolution(name + "conv2", inside, inside, 3)
            state |= batch_norm(name + "norm2", inside, normal)
            state |= convolution(name + "conv3", 4 * inside, inside, 1)
            state |= batch_norm(name + "norm3", 4 * inside, normal)
            if b == 0:
                state |= convolution(name + "downsample.0", 4 * inside, channels, 1)
                state |= batch_norm(name + "downsample.1", 4 * inside, normal)
            channels = 4 * inside

    for i in range(4):
        name = f"decode_head.decode_module.aspp_modules.{i}."
        state |= convolution(name + "conv", 512, 2048, 3)
        state |= batch_norm(name + "norm", 512, normal)
    state["decode_head.decode_module.conv_seg.weight"] = normal(C, 512, 1, 1)
    state["decode_head.decode_module.conv_seg.bias"] = normal(C)

    # Of the teacher, which nobody asks; of its CLIP the image tower alone.
    visual, _, logit_scale = clip_tensors(normal, **sizes)
    for key, tensor in visual.items():
        state[f"decode_head.clip.visual.{key}"] = tensor
    net = positional_net(C, sizes["E_v"], normal)
    teacher = {f"proj_net.{key}": tensor for key, tensor in net.items()} | twice(net)
    teacher["proj.weight"] = visual["proj"].float().T[:, :, None, None].contiguous()
    teacher["logit_scale"] = logit_scale
    return state | {f"decode_head.{key}": tensor for key, tensor in teacher.items()}


@pytest.fixture(scope="module")
def student_file(tmp_path_factory):
    """245 MB: written once, never changed by a test, and not left behind."""
    path = tmp_path_factory.mktemp("published") / "student.pth"
    torch.save(published_student(20), path)
    yield path
    path.unlink()


def written(folder, state, name="reclip.pth"):
    path = Path(folder) / name
    torch.save(state, path)
    return path


def unit_rows(C, D=512, seed=7):
    """Any W_q: rows of length 1."""
    return F.normalize(seeded_normal(seed)(C, D), dim=1)


def pictures(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- The literal computation ----------------------------------------------------------------------

def in_double(state):
    return {key: tensor.double() for key, tensor in state.items()}


def layer_norm(x, state, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(x, state, name, mask=None):
    """torch's own multi-head attention: (N, T, E) -> (N, T, E)."""
    x = x.transpose(0, 1)
    width = x.shape[-1]
    out, _ = F.multi_head_attention_forward(
        x, x, x, width, width // 64,
        state[name + "in_proj_weight"], state[name + "in_proj_bias"],
        None, None, False, 0.0,
        state[name + "out_proj.weight"], state[name + "out_proj.bias"],
        training=False, need_weights=False, attn_mask=mask,
    )
    return out.transpose(0, 1)


def mlp(x, state, name, exact_gelu):
    hidden = F.linear(x, state[name + "c_fc.weight"], state[name + "c_fc.bias"])
    if exact_gelu:
        hidden = F.gelu(hidden)
    else:
        hidden = hidden * torch.sigmoid(1.702 * hidden)
    return F.linear(hidden, state[name + "c_proj.weight"], state[name + "c_proj.bias"])


def count_blocks(state, prefix):
    return len([key for key in state if key.startswith(prefix) and key.endswith("ln_1.weight")])


def positions(state, h, w):
    """The positional embedding of the patches, stretched to the grid: (1, E_v, h, w)."""
    table = state["module.vit.positional_embedding"][1:]
    grid = int(len(table) ** 0.5)
    table = table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    return F.interpolate(table, (h, w), mode="bicubic", align_corners=False)


def literal_Z(
    state, images, exact_gelu, mean, std, eps=1e-6, class_token="module.vit.cls_token"
):
    """Images (B, 3, H, W) in [0, 1] -> (B, D, h, w), each patch of length 1."""
    mean = torch.tensor(mean, dtype=images.dtype).view(3, 1, 1)
    std = torch.tensor(std, dtype=images.dtype).view(3, 1, 1)
    images = (images - mean) / std
    kernel = state["module.vit.conv1.weight"]
    patch = kernel.shape[-1]
    images = F.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))

    x = F.conv2d(images, kernel, stride=patch)
    B, E, h, w = x.shape
    x = (x + positions(state, h, w)).reshape(B, E, h * w).transpose(1, 2)
    first = state[class_token].reshape(-1) + state["module.vit.positional_embedding"][0]
    x = torch.cat([first.expand(B, 1, E), x], 1)
    x = layer_norm(x, state, "module.vit.ln_pre")

    prefix = "module.vit.transformer.resblocks."
    last = count_blocks(state, prefix) - 1
    for i in range(last):
        name = f"{prefix}{i}."
        x = x + attention(layer_norm(x, state, name + "ln_1", eps), state, name + "attn.")
        x = x + mlp(layer_norm(x, state, name + "ln_2", eps), state, name + "mlp.", exact_gelu)

    # The last block: value layer and output layer alone, with the residual and the MLP.
    name = f"{prefix}{last}."
    x = x[:, 1:]
    v = layer_norm(x, state, name + "ln_1", eps)
    v = F.linear(
        v, state[name + "attn.in_proj_weight"][2 * E:], state[name + "attn.in_proj_bias"][2 * E:]
    )
    v = F.linear(v, state[name + "attn.out_proj.weight"], state[name + "attn.out_proj.bias"])
    v = v + x
    v = v + mlp(layer_norm(v, state, name + "ln_2", eps), state, name + "mlp.", exact_gelu)

    v = layer_norm(v, state, "module.vit.ln_post").transpose(1, 2).reshape(B, E, h, w)
    Z = F.conv2d(v, state["module.proj.weight"])
    return Z / Z.norm(dim=1, keepdim=True)


def literal_texts(state, x, places):
    """Embedded texts (N, 77, E_t), read at the places (N,) -> (N, D); always CLIP's own GELU."""
    x = x + state["module.text_encoder.positional_embedding"]
    T = x.shape[1]
    causal = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)

    prefix = "module.text_encoder.transformer.resblocks."
    for i in range(count_blocks(state, prefix)):
        name = f"{prefix}{i}."
        x = x + attention(layer_norm(x, state, name + "ln_1"), state, name + "attn.", causal)
        x = x + mlp(layer_norm(x, state, name + "ln_2"), state, name + "mlp.", False)

    x = layer_norm(x, state, "module.text_encoder.ln_final")[torch.arange(len(x)), places]
    return x @ state["module.clip.text_projection"]


def literal_W_r(state, three, start, places=None):
    """[SOT] 73 vectors [three tokens], all 77 positions of each class.

    three: (C, 3) token ids. start: the id of SOT. places: 74 + argmax unless given.
    """
    C = len(three)
    table = state["module.text_encoder.token_embedding.weight"]
    prompt = state["module.text_encoder.prompt_token"].expand(C, 73, -1)
    x = torch.cat([table[start].expand(C, 1, -1), prompt, table[three]], 1)         # (C, 77, E_t)
    if places is None:
        places = 74 + three.argmax(1)
    W_r = literal_texts(state, x, places)
    return W_r / W_r.norm()


def literal_W_q(state, names, tokenizer):
    """The mean of the 85 texts of a class; means and texts of length 1."""
    rows = []
    table = state["module.text_encoder.token_embedding.weight"]
    for name in names:
        tokens = torch.zeros(len(PROMPTS), 77, dtype=torch.int64)
        for i, prompt in enumerate(PROMPTS):
            ids = [tokenizer.start, *tokenizer.encode(prompt.format(name)), tokenizer.end]
            tokens[i, :len(ids)] = torch.tensor(ids)
        texts = literal_texts(state, table[tokens], tokens.argmax(1))
        mean = (texts / texts.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def literal_M_p(state, h, w):
    """Convolution with its bias, batch norm of the file's statistics, ReLU; three times."""
    x = positions(state, h, w)
    for i in range(3):
        conv, norm = f"module.proj_net.{3 * i}.", f"module.proj_net.{3 * i + 1}."
        x = F.conv2d(x, state[conv + "weight"], state[conv + "bias"], padding=1)
        x = F.batch_norm(
            x, state[norm + "running_mean"], state[norm + "running_var"],
            state[norm + "weight"], state[norm + "bias"], training=False,
        )
        x = F.relu(x)
    return x


def literal_logits(state, images, W_q, three, start, places=None, **how):
    """Query, Reference, positional and rectified logits of a published file.

    how: the arguments of literal_Z, a row of FACTS.
    """
    Z = literal_Z(state, images, **how)
    M_q = torch.einsum("bdhw,cd->bchw", Z, W_q)
    M_r = torch.einsum("bdhw,cd->bchw", Z, literal_W_r(state, three, start, places))
    M_p = literal_M_p(state, *Z.shape[2:])
    return M_q, M_r, M_p, M_q - (M_r + M_p)


def norm_relu(x, state, name, relu=True):
    x = F.batch_norm(
        x, state[f"{name}.running_mean"], state[f"{name}.running_var"],
        state[f"{name}.weight"], state[f"{name}.bias"], training=False,
    )
    return F.relu(x) if relu else x


def literal_student(state, images, W_q, W_r):
    """The published student: images (B, 3, H, W) in [0, 1] -> its features, its logits."""
    mean = torch.tensor(IMAGENET["mean"], dtype=images.dtype).view(3, 1, 1)
    std = torch.tensor(IMAGENET["std"], dtype=images.dtype).view(3, 1, 1)
    x = (images - mean) / std

    for i, stride in enumerate((2, 1, 1)):
        x = F.conv2d(x, state[f"backbone.stem.{3 * i}.weight"], stride=stride, padding=1)
        x = norm_relu(x, state, f"backbone.stem.{3 * i + 1}")
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    # The first block of a stage still has the dilation of the stage before.
    for stage, (count, _, first_stride) in enumerate(STAGES):
        first_dilation, later_dilation = ((1, 1), (1, 1), (1, 2), (2, 4))[stage]
        for b in range(count):
            name = f"backbone.res_layers.{stage}.{b}."
            stride, dilation = 1, later_dilation
            shortcut = x
            if b == 0:
                stride, dilation = first_stride, first_dilation
                shortcut = F.conv2d(x, state[name + "downsample.0.weight"], stride=stride)
                shortcut = norm_relu(shortcut, state, name + "downsample.1", relu=False)
            x = norm_relu(F.conv2d(x, state[name + "conv1.weight"]), state, name + "norm1")
            x = F.conv2d(
                x, state[name + "conv2.weight"], stride=stride, padding=dilation, dilation=dilation
            )
            x = norm_relu(x, state, name + "norm2")
            x = F.conv2d(x, state[name + "conv3.weight"])
            x = F.relu(norm_relu(x, state, name + "norm3", relu=False) + shortcut)

    total = 0
    for i, rate in enumerate((6, 12, 18, 24)):
        name = f"decode_head.decode_module.aspp_modules.{i}."
        branch = F.conv2d(x, state[name + "conv.weight"], padding=rate, dilation=rate)
        total = total + norm_relu(branch, state, name + "norm")
    Z = total / total.norm(dim=1, keepdim=True)
    return Z, torch.einsum("bdhw,cd->bchw", Z, W_q - W_r)


# --- The files and the recipes --------------------------------------------------------------------

def test_the_made_files_have_as_many_keys_as_the_published_ones():
    twelve = SMALL | {"vision_layers": 12, "text_layers": 12}
    state = rectification(20, sizes=twelve)
    assert len(state) == 647 and all(key.startswith("module.") for key in state)
    assert len([key for key in state if key.startswith("module.clip.")]) == 302
    assert len(published_student(20, twelve)) == 552


def test_recipes_are_the_published_ones():
    assert list(RECIPES) == ["cvpr2024", "2025"]
    for name, facts in FACTS.items():
        recipe = RECIPES[name]
        assert recipe.exact_gelu == facts["exact_gelu"]
        assert tuple(recipe.mean) == facts["mean"] and tuple(recipe.std) == facts["std"]


# --- Rectification --------------------------------------------------------------------------------

# Folded biases are rounded to fp32 once, before the model is made double.
CLOSE = {"rtol": 0, "atol": 1e-6}
NAMES_OF_PARTS = ("query", "reference", "positional", "rectified")


@pytest.mark.parametrize("recipe", FACTS)
@pytest.mark.parametrize("data", CLASSES)
def test_logits_are_those_of_the_literal_computation(data, recipe, vocabulary, tmp_path):
    """Not square, and no side a multiple of 16; then the grid that the weights were trained on."""
    names = CLASSES[data]
    state = rectification(len(names))
    W_q = unit_rows(len(names))
    path = written(tmp_path, state)
    model = ReCLIP.from_released(path, names, recipe=recipe, W_q=W_q)
    assert model.recipe == recipe and not model.training and model.class_names == names
    words = vocabulary(SMALL["vocabulary"])
    three = three_tokens(names, words)

    for shape in ((2, 3, 43, 90), (1, 3, 64, 64)):
        images = pictures(*shape)
        wanted = literal_logits(
            in_double(state), images.double(), W_q.double(), three, words.start, **FACTS[recipe]
        )
        single = model.float()(images)
        for part, want in zip(NAMES_OF_PARTS, wanted):
            found = getattr(single, part)
            torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-5, msg=part)

        double = model.double()(images.double())
        for part, want in zip(NAMES_OF_PARTS, wanted):
            torch.testing.assert_close(getattr(double, part), want, **CLOSE, msg=part)


MISTAKES = {
    "CLIP's own class token": {"class_token": "module.clip.visual.class_embedding"},
    "the usual eps": {"eps": 1e-5},
    "the other GELU": {"exact_gelu": False},
    "the other mean": {"mean": OPENAI["mean"]},
    "the other std": {"std": OPENAI["std"]},
}


def test_each_fact_moves_the_logits_by_far_more_than_the_tests_tolerate(vocabulary):
    """Else a loader that ignores one would pass."""
    names = [*CUT, *VOC_CLASSES]
    state = in_double(rectification(23))
    W_q = unit_rows(23).double()
    images = pictures(1, 3, 43, 58).double()
    words = vocabulary(SMALL["vocabulary"])
    three = three_tokens(names, words)

    def logits(state=state, **mistake):
        how = FACTS["cvpr2024"] | mistake
        return literal_logits(state, images, W_q, three, words.start, **how)[3]

    right = logits()
    for mistake, change in MISTAKES.items():
        assert (logits(**change) - right).abs().max() > 1e-4, mistake

    # Cut names read at their last token, as if EOT were there.
    places = 74 + three.argmax(1)
    places[:3] = 76
    assert (logits(places=places) - right).abs().max() > 1e-4

    for i in (0, 3, 6):
        key = f"module.proj_net.{i}.bias"
        without = state | {key: torch.zeros_like(state[key])}
        assert (logits(without) - right).abs().max() > 1e-2, key


def test_three_names_of_ade_are_read_as_the_authors_read_them(vocabulary, tmp_path):
    """Cut to three tokens, at the largest id, where no EOT is; the others at their EOT."""
    path = written(tmp_path, rectification(150))
    model = ReCLIP.from_released(path, ADE_CLASSES, W_q=unit_rows(150))
    W_r = model.heads()[1]
    words = vocabulary(SMALL["vocabulary"])
    three = three_tokens(ADE_CLASSES, words)
    cut = [ADE_CLASSES.index(name) for name in CUT]
    assert three[cut].argmax(1).tolist() == [2, 1, 0] and words.end not in three[cut]

    # Our own way for our own files: one vector fewer, so that the longest name fits whole, and
    # every text read at its EOT.
    clip = load_clip(path)
    prompt = model.reference.vectors
    endings = [[*words.encode(name), words.end] for name in ADE_CLASSES]
    ours = clip.encode_prompted(prompt[:72], endings)
    assert F.cosine_similarity(W_r[cut], ours[cut]).max() < 0.99

    # The other 147 have room behind 73 vectors, and nothing is cut.
    others = [c for c in range(150) if c not in cut]
    whole = clip.encode_prompted(prompt, [endings[c] for c in others])
    torch.testing.assert_close(
        F.cosine_similarity(W_r[others], whole), torch.ones(147), rtol=0, atol=1e-5
    )


def test_names_in_openais_own_vocabulary(shared, monkeypatch, tmp_path):
    """Which names are cut, and the Reference of all 150, with the ids of the real vocabulary."""
    monkeypatch.undo()
    path = shared("clip/bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setenv("CLIP_HOME", str(path.parent))
    tokenizer = Tokenizer.from_file(path)
    for names in CLASSES.values():
        long = [name for name in names if len(tokenizer.encode(name)) > 2]
        assert long == (list(CUT) if names == ADE_CLASSES else [])
    three = three_tokens(ADE_CLASSES, tokenizer)
    assert three_tokens(CUT, tokenizer).argmax(1).tolist() == [2, 1, 0]

    state = rectification(150, sizes=SMALL | {"vocabulary": 49408})
    published = written(tmp_path, state)
    model = ReCLIP.from_released(published, ADE_CLASSES, W_q=unit_rows(150)).double()
    wanted = literal_W_r(in_double(state), three, tokenizer.start)
    torch.testing.assert_close(model.heads()[1], wanted, **CLOSE)


def test_W_q_is_made_from_the_text_tower_of_the_file(vocabulary, tmp_path):
    state = rectification(20)
    model = ReCLIP.from_released(written(tmp_path, state), VOC_CLASSES)
    assert model.W_q.shape == (20, 512)
    wanted = literal_W_q(in_double(state), VOC_CLASSES[10:12], vocabulary(SMALL["vocabulary"]))
    torch.testing.assert_close(model.W_q[10:12].double(), wanted, rtol=0, atol=2e-6)


def test_files_may_have_all_doubles_as_tensors_of_their_own(tmp_path):
    """Or share their memory with them, as the size of the published files tells: all the same."""
    state = rectification(20)
    images, W_q = pictures(1, 3, 40, 56), unit_rows(20)
    apart = {key: tensor.clone() for key, tensor in state.items()}
    for name, tensors in (("together", state), ("apart", apart)):
        written(tmp_path, tensors, name)
    together, apart = [
        ReCLIP.from_released(tmp_path / name, VOC_CLASSES, W_q=W_q)(images).rectified
        for name in ("together", "apart")
    ]
    assert torch.equal(together, apart)


# --- The image tower for patches ------------------------------------------------------------------

@pytest.fixture
def voc_file(tmp_path):
    return written(tmp_path, rectification(20))


@pytest.fixture
def model(voc_file):
    return ReCLIP.from_released(voc_file, VOC_CLASSES, W_q=unit_rows(20))


def shared_parameters(model):
    """{name: whether both readings have the same numbers in memory}"""
    plain = dict(model.clip.visual.named_parameters())
    shared = {}
    for name, parameter in model.dense_visual.named_parameters():
        shared[name] = parameter.data_ptr() == plain[name].data_ptr()
    assert shared.keys() == plain.keys()
    return shared


def assert_shared(model):
    shared = shared_parameters(model)
    assert [name for name, same in shared.items() if not same] == ["class_embedding"]


@pytest.mark.parametrize("recipe", FACTS)
def test_whole_images_and_texts_are_encoded_by_plain_clip(voc_file, recipe):
    model = ReCLIP.from_released(voc_file, VOC_CLASSES, recipe=recipe, W_q=unit_rows(20))
    model(pictures(1, 3, 40, 56))
    plain = load_clip(voc_file)
    images = pictures(2, 3, 64, 64)
    assert torch.equal(model.clip.encode_image(images), plain.encode_image(images))
    dense = plain.encode_image_dense(images)
    assert torch.equal(model.clip.encode_image_dense(images), dense)
    assert model.clip.state_dict().keys() == plain.state_dict().keys()
    tokens = plain.tokenize("a photo of a cat.")
    assert torch.equal(model.clip.encode_text(tokens), plain.encode_text(tokens))

    # Pseudo-labels: CLIP's own constants, whatever the recipe of the dense features.
    mean = torch.tensor(OPENAI["mean"]).view(3, 1, 1)
    std = torch.tensor(OPENAI["std"]).view(3, 1, 1)
    vectors = F.normalize(plain.encode_image((images - mean) / std), dim=1)
    wanted = 100 * vectors @ model.W_q.T
    torch.testing.assert_close(model.image_similarity(images), wanted, rtol=0, atol=1e-4)


def test_load_clip_reads_what_the_published_file_holds(voc_file):
    """The 302 tensors of OpenAI's state dict, as float32, under OpenAI's names."""
    state = torch.load(voc_file, weights_only=True)
    plain = load_clip(voc_file).state_dict()
    published = {}
    for key, tensor in state.items():
        if key.startswith("module.clip."):
            published[key.removeprefix("module.clip.")] = tensor.float()
    assert plain.keys() == published.keys()
    for key, tensor in published.items():
        assert plain[key].dtype == torch.float32 and torch.equal(plain[key], tensor), key


def test_both_readings_share_their_weights(model, voc_file):
    assert_shared(model)
    assert not any(parameter.requires_grad for parameter in model.dense_visual.parameters())
    token = torch.load(voc_file, weights_only=True)["module.vit.cls_token"]
    assert torch.equal(model.dense_visual.class_embedding, token.flatten())
    assert not torch.equal(model.clip.visual.class_embedding, token.flatten())


def test_a_patch_tower_is_nothing_that_was_learnt(model):
    """Only prompt, net and W_q; the class token may stand beside them, once."""
    keys = model.learnt().keys()
    assert not [key for key in keys if "dense_visual" in key or key.startswith("clip.")]
    numbers = sum(tensor.numel() for tensor in model.learnt().values())
    net = sum(tensor.numel() for tensor in model.positional.state_dict().values())
    own = numbers - net - 73 * SMALL["E_t"] - 20 * SMALL["D"]
    assert own in (0, SMALL["E_v"])


def test_both_readings_stay_together(model):
    """Another type, twice there and back; training and evaluation."""
    images = pictures(1, 3, 40, 56)
    before = model(images).rectified
    for move in (model.double, model.float, model.train, model.eval):
        move()
        assert_shared(model)
        types = {parameter.dtype for parameter in model.dense_visual.parameters()}
        assert types == {model.clip.visual.proj.dtype}
    model.to(torch.float64)
    assert_shared(model)
    assert model(images.double()).rectified.dtype == torch.float64
    model.to(torch.float32)
    assert torch.equal(model(images).rectified, before)
    assert not model.train().clip.training and not model.dense_visual.training


@pytest.mark.parametrize("make", ["pickle", "deepcopy"])
def test_a_copy_in_memory_is_the_same(model, make):
    images = pictures(1, 3, 40, 56)
    wanted = model(images).rectified
    if make == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        again = copy.deepcopy(model)
    assert torch.equal(again(images).rectified, wanted)
    assert_shared(again)
    assert again.clip.visual.proj.data_ptr() != model.clip.visual.proj.data_ptr()


def test_moving_changes_no_copy_of_the_clip_elsewhere(voc_file):
    """Two models of one CLIP, of two recipes: each reads it in its own way, one after another."""
    clip = load_clip(voc_file)
    images = pictures(1, 3, 40, 56)
    models = {}
    for recipe in FACTS:
        torch.manual_seed(0)
        model = ReCLIP(clip, VOC_CLASSES, W_q=unit_rows(20), recipe=recipe).eval()
        models[recipe] = model
    first = {recipe: model.features(images) for recipe, model in models.items()}
    assert (first["2025"] - first["cvpr2024"]).abs().max() > 1e-3
    for recipe, model in models.items():
        assert torch.equal(model.features(images), first[recipe])


# --- Kept in our own format -----------------------------------------------------------------------

@pytest.mark.parametrize("recipe", FACTS)
@pytest.mark.parametrize("data", ["voc", "ade20k"])
def test_a_copy_in_our_own_format_comes_back_the_same(data, recipe, tmp_path):
    names = CLASSES[data]
    path = written(tmp_path, rectification(len(names)))
    model = ReCLIP.from_released(path, names, recipe=recipe, W_q=unit_rows(len(names)))
    images = pictures(2, 3, 43, 90)
    wanted = model(images)
    model.save(tmp_path / "copy.pt")

    again = ReCLIP.load(tmp_path / "copy.pt")
    found = again(images)
    for part in ("query", "reference", "positional", "rectified", "features"):
        assert torch.equal(getattr(found, part), getattr(wanted, part)), part
    assert again.recipe == recipe and again.class_names == names
    assert again.fingerprint() == model.fingerprint()
    assert_shared(again)

    # A copy of the copy too.
    again.save(tmp_path / "second.pt")
    assert torch.equal(ReCLIP.load(tmp_path / "second.pt")(images).rectified, wanted.rectified)

    content = torch.load(tmp_path / "copy.pt", weights_only=True)
    assert content["clip"]["source"] == str(path.resolve())
    assert content["clip"]["sha256"] == sha256_of(path)
    # CLIP itself is not in it.
    small = 1.1 * sum(tensor.nbytes for tensor in content["learnt"].values()) + 100_000
    assert (tmp_path / "copy.pt").stat().st_size < small


def test_a_copy_whose_published_file_is_gone(model, voc_file, tmp_path):
    model.save(tmp_path / "copy.pt")
    away = voc_file.rename(tmp_path / "elsewhere.pth")
    one_sentence(ReCLIP.load, tmp_path / "copy.pt", error=FileNotFoundError, names="reclip.pth")

    # The same file at another place may be given; another file may not.
    images = pictures(1, 3, 40, 56)
    again = ReCLIP.load(tmp_path / "copy.pt", load_clip(away))
    assert torch.equal(again(images).rectified, model(images).rectified)
    written(tmp_path, rectification(20, seed=1))
    one_sentence(ReCLIP.load, tmp_path / "copy.pt", names="sha256")


# --- The student ----------------------------------------------------------------------------------

def heads(C=20, D=512):
    W_r = seeded_normal(8)(C, D)
    return unit_rows(C, D), W_r / W_r.norm()


def test_student_is_the_literal_computation(student_file):
    """v1c stem, dilated stages, ASPP with batch norm and ReLU; sides of odd numbers."""
    W_q, W_r = heads()
    student = DeepLabV2.from_released(student_file, VOC_CLASSES, W_q, W_r)
    assert not student.training and student.class_names == VOC_CLASSES
    state = torch.load(student_file, weights_only=True)
    images = pictures(2, 3, 45, 70)

    with torch.no_grad():
        found = student(images)
    assert found.rectified.shape == (2, 20, 6, 9) and student.output_stride == 8
    Z, M = literal_student(
        in_double(state), images.double(), W_q.double(), W_r.double()
    )
    torch.testing.assert_close(found.features.double(), Z, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.rectified.double(), M, rtol=0, atol=1e-4)
    assert (found.features >= 0).all()  # four ReLUs, summed

    with torch.no_grad():
        double = student.double()(images.double())
    torch.testing.assert_close(double.features, Z, rtol=0, atol=1e-9)
    torch.testing.assert_close(double.rectified, M, rtol=0, atol=1e-9)


def test_student_comes_back_from_our_own_format(student_file, tmp_path):
    student = DeepLabV2.from_released(student_file, VOC_CLASSES, *heads())
    student.save(tmp_path / "distill.pt")
    again = DeepLabV2.load(tmp_path / "distill.pt")
    images = pictures(1, 3, 45, 70)
    with torch.no_grad():
        assert torch.equal(again(images).rectified, student(images).rectified)
    assert again.fingerprint() == student.fingerprint()
    # The teacher's parts and the unused classifier have been left behind.
    assert sum(parameter.numel() for parameter in again.parameters()) < 62_000_000


# --- What is refused ------------------------------------------------------------------------------

def one_sentence(call, *arguments, error=ValueError, names="", flags=False, **keywords):
    """The call ends in an error of one line that names what it should."""
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message and names in message and len(message) < 600, message
    assert flags or not re.search(r"(^|\s)--\w", message), "a library speaks of arguments"
    return message


def test_wrong_number_of_classes(voc_file, student_file):
    """Another list than the file's; the message has both numbers."""
    message = one_sentence(
        ReCLIP.from_released, voc_file, CONTEXT_CLASSES, W_q=unit_rows(59), names="reclip.pth"
    )
    assert "20" in message and "59" in message
    one_sentence(ReCLIP.from_released, voc_file, VOC_CLASSES[:19], names="reclip.pth")
    one_sentence(ReCLIP.from_released, voc_file, "a, b")
    one_sentence(ReCLIP.from_released, voc_file, VOC_CLASSES, W_q=unit_rows(59))
    one_sentence(ReCLIP.from_released, voc_file, VOC_CLASSES, W_q=unit_rows(20, 64))
    one_sentence(DeepLabV2.from_released, student_file, VOC_CLASSES, *heads(C=59))
    one_sentence(DeepLabV2.from_released, student_file, VOC_CLASSES, *heads(D=64))


def test_the_sequel_is_no_reclip(tmp_path):
    path = written(tmp_path, sequel(20), "reclip++.pth")
    message = one_sentence(ReCLIP.from_released, path, VOC_CLASSES, names="reclip++.pth")
    assert "ReCLIP++" in message.replace(str(path), "")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(voc_file, tmp_path, share):
    """Of a length of 0 up to all but the last hundredth, where the zip has its directory."""
    content = voc_file.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[:int(share * len(content))])
    one_sentence(ReCLIP.from_released, path, VOC_CLASSES, names="cut.pth")
    one_sentence(DeepLabV2.from_released, path, VOC_CLASSES, *heads(), names="cut.pth")
    one_sentence(load_clip, path, names="cut.pth")


class Hostile:
    """Unpickled without care, it runs a shell command."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def test_hostile_files_run_nothing(root, tmp_path):
    sentinel = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Hostile(sentinel)))
    assert sentinel.exists()  # the payload works
    sentinel.unlink()

    path = tmp_path / "hostile.pth"
    state = rectification(20)
    contents = (
        Hostile(sentinel),
        state | {"module.vit.cls_token": Hostile(sentinel)},
        state | {"module.more": Hostile(sentinel)},
    )
    for content in contents:
        for write in (torch.save, write_pickle):
            write(content, path)
            one_sentence(ReCLIP.from_released, path, VOC_CLASSES, names="hostile.pth")
            one_sentence(
                DeepLabV2.from_released, path, VOC_CLASSES, *heads(), names="hostile.pth"
            )
            one_sentence(load_clip, path, names="hostile.pth")
            for options in (
                ["--stage", "rectify", "--checkpoint", path],
                ["--stage", "distill", "--checkpoint", path, "--teacher", path],
            ):
                refused_by_command(
                    evaluation.main, root, tmp_path / "out", *options, names="hostile.pth"
                )
    assert not sentinel.exists()


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "nothing.pth"
    one_sentence(
        ReCLIP.from_released, path, VOC_CLASSES, error=FileNotFoundError, names="nothing.pth"
    )
    one_sentence(
        DeepLabV2.from_released, path, VOC_CLASSES, *heads(), error=FileNotFoundError,
        names="nothing.pth",
    )


def test_one_kind_of_file_given_as_the_other(voc_file, student_file, model, tmp_path):
    one_sentence(ReCLIP.from_released, student_file, VOC_CLASSES, names="student.pth")
    one_sentence(DeepLabV2.from_released, voc_file, VOC_CLASSES, *heads(), names="reclip.pth")
    one_sentence(load_clip, student_file, names="student.pth")

    # Ours are not the authors', and theirs not ours.
    model.save(tmp_path / "ours.pt")
    one_sentence(ReCLIP.from_released, tmp_path / "ours.pt", VOC_CLASSES, names="ours.pt")
    one_sentence(
        DeepLabV2.from_released, tmp_path / "ours.pt", VOC_CLASSES, *heads(), names="ours.pt"
    )
    one_sentence(ReCLIP.load, voc_file, names="reclip.pth")
    one_sentence(DeepLabV2.load, student_file, names="student.pth")


@pytest.mark.parametrize("content", [
    {}, [], torch.zeros(3), 5, {"state_dict": {}}, {"module.clip.visual.proj": 5},
])
def test_files_that_hold_something_else(content, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    one_sentence(ReCLIP.from_released, path, VOC_CLASSES, names="other.pth")
    one_sentence(DeepLabV2.from_released, path, VOC_CLASSES, *heads(), names="other.pth")
    one_sentence(load_clip, path, names="other.pth")


@pytest.mark.parametrize("key", [
    "module.vit.cls_token",
    "module.text_encoder.prompt_token",
    "module.proj_net.3.bias",
    "module.proj_net.7.running_var",
    "module.clip.visual.proj",
    "module.clip.transformer.resblocks.1.ln_2.bias",
])
def test_a_key_is_missing_or_of_another_shape(key, tmp_path):
    state = rectification(20)
    tensor = state.pop(key)
    path = written(tmp_path, state, "short.pth")
    one_sentence(
        ReCLIP.from_released, path, VOC_CLASSES, W_q=unit_rows(20), names="short.pth"
    )
    written(tmp_path, state | {key: tensor[..., :-1].clone()}, "short.pth")
    one_sentence(
        ReCLIP.from_released, path, VOC_CLASSES, W_q=unit_rows(20), names="short.pth"
    )


@pytest.mark.parametrize("key", [
    "module.vit.cls_token",
    "module.text_encoder.prompt_token",
    "module.proj_net.6.weight",
    "module.proj_net.0.bias",
    "module.proj_net.1.running_mean",
    "module.clip.visual.proj",
])
def test_a_key_holds_something_else(key, tmp_path):
    """A number in the place of a tensor, and a tensor of one number, which would fit everywhere."""
    state = rectification(20)
    for value in (5, None, torch.zeros(()), torch.zeros([1] * state[key].ndim)):
        path = written(tmp_path, state | {key: value}, "odd.pth")
        one_sentence(
            ReCLIP.from_released, path, VOC_CLASSES, W_q=unit_rows(20), names="odd.pth"
        )


def test_a_students_key_is_missing(student_file, tmp_path):
    state = torch.load(student_file, weights_only=True, mmap=True)
    for key in (
        "backbone.stem.3.weight",
        "decode_head.decode_module.aspp_modules.2.norm.running_mean",
        "backbone.res_layers.2.0.downsample.1.bias",
    ):
        # Without the wide layers: the file is small, and each of these keys is missing too.
        some = {k: t for k, t in state.items() if k != key and "aspp_modules.3.conv" not in k}
        some = {k: t.clone() for k, t in some.items() if t.numel() < 10_000}
        path = written(tmp_path, some, "short.pth")
        one_sentence(
            DeepLabV2.from_released, path, VOC_CLASSES, *heads(), names="short.pth"
        )


def test_an_unknown_recipe(voc_file):
    for recipe in ("2024", None, ""):
        message = one_sentence(
            ReCLIP.from_released, voc_file, VOC_CLASSES, recipe=recipe, W_q=unit_rows(20)
        )
        assert "cvpr2024" in message and "2025" in message


# --- Command lines --------------------------------------------------------------------------------

@pytest.fixture
def root(make_voc):
    """A made VOC: three training images and one to evaluate on, of 60 x 90 pixels and more."""
    return make_voc({"train": 3, "val": 1})


def run(main, root, out, *options):
    """A command line on the made VOC, without what it prints of progress."""
    options = ["--data", "voc", "--root", root, "--out", out, "--device", "cpu", *options]
    main([str(option) for option in options])


def refused_by_command(main, root, out, *options, names=""):
    """A command line that must end in one sentence. -> the sentence"""
    return one_sentence(
        run, main, root, out, *options, error=(ValueError, OSError), names=names, flags=True
    )


def result(out, stage):
    return json.loads((out / f"eval_{stage}.json").read_text())


def refuse_texts(monkeypatch):
    """From here on nobody may encode the texts of the Query."""

    def query_text_features(*arguments, **keywords):
        raise AssertionError("the texts of the Query are encoded once more")

    for module in (reclip, evaluation, train):
        monkeypatch.setattr(module, "query_text_features", query_text_features, raising=False)


@pytest.mark.parametrize("recipe, side", [("cvpr2024", 512), ("2025", 336)])
def test_eval_of_a_published_rectification(recipe, side, voc_file, root, tmp_path, monkeypatch):
    """Its recipe's sides; W_q is kept; a copy in our own format is measured the same."""
    out = tmp_path / "out"
    options = ["--stage", "rectify", "--checkpoint", voc_file]
    if recipe == "2025":
        options += ["--recipe", "2025"]
    run(evaluation.main, root, out, *options)
    first = result(out, "rectify")
    protocol = first["protocol"]
    assert protocol["recipe"] == recipe
    assert (protocol["long_side"], protocol["short_side"]) == (2048, side)
    assert protocol["denoise"] == 0.5 and protocol["clip_sha256"] == sha256_of(voc_file)
    assert sum(map(sum, first["confusion"])) > 0

    # The second time no text is encoded.
    assert (out / "W_q.pt").is_file()
    with monkeypatch.context() as patch:
        refuse_texts(patch)
        run(evaluation.main, root, out, *options)
    assert result(out, "rectify") == first

    model = ReCLIP.from_released(voc_file, VOC_CLASSES, recipe=recipe)
    assert protocol["checkpoint_sha256"] == model.fingerprint()
    model.save(tmp_path / "copy.pt")
    run(evaluation.main, root, out, "--stage", "rectify", "--checkpoint", tmp_path / "copy.pt")
    again = result(out, "rectify")
    assert again["protocol"] == protocol and again["confusion"] == first["confusion"]


def test_W_q_of_one_file_is_not_used_for_another(voc_file, root, tmp_path):
    """Two published files, one folder for the results."""
    other = written(tmp_path, rectification(20, seed=1), "other.pth")
    options = ["--stage", "rectify", "--short-side", "64", "--checkpoint"]
    run(evaluation.main, root, tmp_path / "one", *options, voc_file)
    run(evaluation.main, root, tmp_path / "one", *options, other)
    run(evaluation.main, root, tmp_path / "fresh", *options, other)
    assert result(tmp_path / "one", "rectify") == result(tmp_path / "fresh", "rectify")


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_broken_W_q_is_made_anew_or_refused(content, voc_file, root, tmp_path):
    out = tmp_path / "out"
    options = ["--stage", "rectify", "--short-side", "64", "--checkpoint", voc_file]
    run(evaluation.main, root, out, *options)
    first = result(out, "rectify")
    if content is None:
        torch.save({"W_q": torch.zeros(3, 4)}, out / "W_q.pt")
    else:
        (out / "W_q.pt").write_bytes(content)
    try:
        run(evaluation.main, root, out, *options)
    except ValueError as error:
        assert "W_q.pt" in str(error) and "\n" not in str(error)
    else:
        assert result(out, "rectify") == first


@pytest.mark.parametrize("teacher", ["published", "ours"])
def test_eval_of_a_published_student(teacher, voc_file, student_file, root, tmp_path, monkeypatch):
    """W_q and W_r are the teacher's, whichever form it has; and no denoising."""
    model = ReCLIP.from_released(voc_file, VOC_CLASSES)
    given = voc_file
    if teacher == "ours":
        given = tmp_path / "ours.pt"
        model.save(given)
    out = tmp_path / "out"
    seen = []

    # A student of the real size takes seconds for an image of 512 x 768 pixels. What it would see
    # is noted, and it is shown a part.
    def predict_mask(model, stage, image, size, protocol):
        if stage == "distill":
            seen.append(tuple(image.shape[1:]))
            kept.append(model)
        return original(model, stage, image[:, :40, :56], size, protocol)

    kept = []
    original = evaluation.predict_mask
    monkeypatch.setattr(evaluation, "predict_mask", predict_mask)
    run(evaluation.main, root, out, "--stage", "distill", "--checkpoint", student_file,
        "--teacher", given)

    protocol = result(out, "distill")["protocol"]
    assert (protocol["long_side"], protocol["short_side"]) == (2048, 512)
    assert protocol["denoise"] == 0
    assert protocol["recipe"] == "cvpr2024"
    assert set(seen) == {(512, 768)}
    student = kept[0]
    W_q, W_r = model.heads()
    assert torch.equal(student.W_q, W_q) and torch.equal(student.W_r, W_r)


@pytest.mark.parametrize("recipe", FACTS)
def test_train_distills_from_a_published_rectification(recipe, voc_file, root, tmp_path):
    """One epoch; then its student is evaluated without naming the teacher again."""
    out = tmp_path / "out"
    run(train.main, root, out, "--stage", "distill", "--teacher", voc_file, "--recipe", recipe,
        "--student", "tiny", "--backbone-weights", "none", "--distill-crop", "32",
        "--distill-batch", "2", "--epochs", "1", "--workers", "0")
    student = DeepLabV2.load(out / "distill.pt")
    W_q, W_r = ReCLIP.from_released(voc_file, VOC_CLASSES).heads()
    assert torch.equal(student.W_q, W_q) and torch.equal(student.W_r, W_r)
    rows = (out / "distill_log.csv").read_text().splitlines()
    assert len(rows) == 1 + 2  # a title, and two steps of two for three images
    assert (out / "W_q.pt").is_file()

    run(evaluation.main, root, out, "--stage", "distill", "--short-side", "64",
        "--checkpoint", out / "distill.pt")
    protocol = result(out, "distill")["protocol"]
    assert protocol["short_side"] == 64 and protocol["recipe"] == recipe


def test_plain_clip_of_a_published_file(voc_file, root, tmp_path):
    """The paper's MaskCLIP row can be had from the same file: the Query alone is the same."""
    run(evaluation.main, root, tmp_path, "--stage", "clip", "--clip", voc_file,
        "--short-side", "64")
    assert result(tmp_path, "clip")["protocol"]["clip_sha256"] == sha256_of(voc_file)


def test_masks_of_own_images_by_a_published_file(voc_file, root, tmp_path):
    """It does not name its classes: the data set does."""
    folder = root / "VOCdevkit" / "VOC2012" / "JPEGImages"
    run(evaluation.main, root, tmp_path / "out", "--stage", "rectify", "--checkpoint", voc_file,
        "--images", folder / "val_0.jpg", "--short-side", "64")
    masks = [path.name for path in (tmp_path / "out" / "masks").rglob("*.json")]
    assert len(masks) == 1
    report = json.loads(next((tmp_path / "out" / "masks").rglob("*.json")).read_text())
    assert report["protocol"]["class_names"] == list(VOC_CLASSES)


def test_real_photographs(voc_file, shared, tmp_path):
    """Two of VOC's own, the lists of a folder that links to the rest."""
    real = shared("VOCdevkit/VOC2012")
    base = tmp_path / "real" / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (base / folder).symlink_to(real / folder)
    names = (real / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:2]
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names) + "\n")
    run(evaluation.main, tmp_path / "real", tmp_path / "out", "--stage", "rectify",
        "--checkpoint", voc_file)
    assert result(tmp_path / "out", "rectify")["protocol"]["pictures"] == 2


def test_commands_refuse_what_does_not_fit(voc_file, student_file, root, tmp_path):
    """A student as rectification and the reverse; a student alone; no such file."""

    def refused(*options, main=evaluation.main, names=""):
        return refused_by_command(main, root, tmp_path / "out", *options, names=names)

    refused("--stage", "rectify", "--checkpoint", student_file, names="student.pth")
    refused("--stage", "distill", "--checkpoint", voc_file, "--teacher", voc_file,
            names="reclip.pth")
    message = refused("--stage", "distill", "--checkpoint", student_file, names="student.pth")
    assert "--teacher" in message
    refused("--stage", "distill", "--checkpoint", student_file, "--teacher", student_file,
            names="student.pth")
    refused("--stage", "rectify", "--checkpoint", tmp_path / "none.pth", names="none.pth")
    refused("--stage", "distill", "--teacher", student_file, main=train.main, names="student.pth")

    # argparse knows the recipes, and leaves with its usage.
    with pytest.raises(SystemExit):
        run(evaluation.main, root, tmp_path, "--recipe", "2024", "--checkpoint", voc_file)


def test_a_teacher_that_is_not_there_is_named(student_file, root, tmp_path):
    """Not the student, which was given and is right."""
    refused_by_command(
        evaluation.main, root, tmp_path / "out", "--stage", "distill",
        "--checkpoint", student_file, "--teacher", tmp_path / "none.pth", names="none.pth",
    )


# --- The real size --------------------------------------------------------------------------------

def test_a_rectification_of_the_real_size(vocabulary, tmp_path):
    """ViT-B/16 and 20 classes: 647 keys, 590 MiB, fp32 against a literal computation in fp32.

    Some 6 seconds and 2.5 GiB of memory.
    """
    state = rectification(20, sizes=FULL)
    assert len(state) == 647
    path = written(tmp_path, state)
    assert 585 < path.stat().st_size / 2 ** 20 < 595
    words = vocabulary(FULL["vocabulary"])
    W_q = unit_rows(20)
    model = ReCLIP.from_released(path, VOC_CLASSES, W_q=W_q)
    path.unlink()  # pytest would keep it, of the last three runs
    assert model.clip.input_resolution == 224 and model.reference.vectors.shape == (73, 512)

    images = pictures(1, 3, 70, 90)
    floats = {key: tensor.float() for key, tensor in state.items()}
    wanted = literal_logits(
        floats, images, W_q, three_tokens(VOC_CLASSES, words), words.start, **FACTS["cvpr2024"]
    )
    found = model(images)
    for part, want in zip(NAMES_OF_PARTS, wanted):
        torch.testing.assert_close(getattr(found, part), want, rtol=0, atol=1e-4, msg=part)
