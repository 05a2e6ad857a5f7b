"""CLIP in one file: the tokenizer, the two encoders, features for every patch, and the loader.

CLIP (Radford et al., 2021) is a pair of transformers trained on 400 million images and their
captions, so that an image and its caption get similar vectors. Comparing the image's vector with
those of "a photo of a cat." and "a photo of a dog." then classifies it, without any training on
cats or dogs. ReCLIP (Sec. 3.1) asks the same question of every patch of the image.

What stands here, from top to bottom
    normalize_pixels          pixels in [0, 1] as CLIP's image encoder wants them
    Tokenizer                 text -> token ids, identical to OpenAI's (byte-pair encoding)
    ResidualAttentionBlock    a layer of either transformer
    maskclip                  how ReCLIP reads the last layer of the image tower (Sec. 3.1)
    VisionTransformer         image -> tokens; its positional embedding is p of Sec. 3.3
    CLIP                      the model; its parameter names are the keys of OpenAI's checkpoints
      .encode_image           (B, 3, H, W) -> (B, D)        one vector per image
      .encode_image_dense     (B, 3, H, W) -> (B, D, h, w)  one vector per patch: Z of Sec. 3.1
                              (not normalized yet; in the other files the vectors have length 1)
      .encode_text            (N, 77) -> (N, D)             one vector per text
      .encode_prompted        [SOT] v_1 .. v_L [name] [EOT] -> (C, D): the texts of Eq. (1)
    load_clip                 OpenAI's, Hugging Face's and OpenCLIP's files, running no code of them

Symbols
    B images, N texts, C classes, L prompt vectors (v_1 .. v_L of Eq. (1))
    H x W pixels, h x w patches (h = ceil(H / patch size), w = ceil(W / patch size)), n = h * w
    D    width of the joint space, where images and texts are compared     (ViT-B/16: 512)
    E_v  width of the vision transformer                                   (ViT-B/16: 768)
    E_t  width of the text transformer                                     (ViT-B/16: 512)
    E    either of the two, in the layers that both transformers are made of
    T    tokens in a sequence: 1 + n for an image (the class token comes first), up to 77 for a text
         (encode_prompted packs the texts of all classes into one longer sequence)
    SOT, EOT    the tokens "start of text" and "end of text"

To copy this file elsewhere: pip install torch numpy ftfy regex. Nothing else of this project is
needed.

Zero-shot classification
    import torch
    import torch.nn.functional as F
    from clip_model import load_clip, normalize_pixels

    clip = load_clip("ViT-B/16")                # downloaded once, 335 MB, and frozen
    images = torch.rand(4, 3, 224, 224)         # put yours here: RGB, float in [0, 1]
    tokens = clip.tokenize(["a photo of a cat.", "a photo of a dog."])                # (2, 77)

    texts = F.normalize(clip.encode_text(tokens), dim=1)                              # (2, 512)
    whole = F.normalize(clip.encode_image(normalize_pixels(images)), dim=1)           # (4, 512)
    probabilities = (clip.logit_scale.exp() * whole @ texts.T).softmax(dim=1)
    print(probabilities.shape)                                            # torch.Size([4, 2])

The same question asked of every patch (goes on from above; the images may have any size)
    images = torch.rand(4, 3, 320, 224)
    Z = F.normalize(clip.encode_image_dense(normalize_pixels(images)), dim=1)  # (4, 512, 20, 14)
    logits = torch.einsum("bdhw,nd->bnhw", Z, texts)                           # (4, 2, 20, 14)
    masks = clip.to_pixels(logits, 320, 224).argmax(dim=1)
    print(masks.shape)                                          # torch.Size([4, 320, 224])

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021) and openai/CLIP (MIT license) for the model; MaskCLIP (Zhou et al., "Extract Free Dense
Labels from CLIP", ECCV 2022) for the dense features. "Sec." and "Eq." are the ReCLIP paper's;
"released" is its authors' code; "ours" was chosen here.
"""

import copy
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import pickle
import sys
import urllib.request
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn

# Mean and standard deviation of CLIP's training images, red, green, blue in [0, 1] (openai/CLIP).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images, mean=MEAN, std=STD, valid=None):
    """Subtracts each color's mean, divides by its standard deviation: (..., 3, H, W) -> the same.

    images: floating point, in [0, 1].
    mean, std: three numbers each, of the images that the network was trained on.
    valid: (..., H, W) bool, where the image is: what lies outside is padding, and becomes 0, the
        mean color. None: everywhere.
    -> about zero on average. (F.normalize is something else: it makes vectors of length 1.)

    Errors: ValueError for whole numbers, such as uint8.
    """
    # In a tensor of whole numbers the mean and std would be cut to 0: a division by zero.
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give images as float in [0, 1], "
                         "e.g. images.float() / 255")

    mean = images.new_tensor(mean).view(3, 1, 1)
    std = images.new_tensor(std).view(3, 1, 1)
    images = (images - mean) / std
    if valid is not None:
        images = images.masked_fill(~valid.unsqueeze(-3), 0)
    return images


# --------------------------------------------------------------------------------------------------
# Tokenizer: text -> token ids
#
# A word that CLIP's vocabulary knows is one token, a rare word is several pieces. Byte-pair
# encoding (Sennrich et al., 2016) starts from single letters and joins neighbors, starting with the
# pair that was the most frequent when the vocabulary was made:
#     "cat"                c a t</w>  ->  c at</w>  ->  cat</w>       one token, 2368
#     "axolotl"            ->  ax o lot l</w>                         four tokens
#     "a photo of a cat."  ->  320 1125 539 320 2368 269              "." counts as a word
# "</w>" marks the end of a word: the piece "cat", with which longer words begin, is another token.
# --------------------------------------------------------------------------------------------------

@lru_cache
def byte_alphabet():
    """{byte: character}: a visible character for each of the 256 bytes.

    Merges are stored as text, so no byte may look like a space or a line break. Bytes that are
    visible Latin-1 characters stand for themselves; the others are numbered from 256 on.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]

    # The order of this dictionary is the order of the vocabulary's first 256 tokens.
    alphabet = {}
    for byte in visible:
        alphabet[byte] = chr(byte)

    spare = 256
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(spare)
            spare += 1
    return alphabet


class Tokenizer:
    """CLIP's byte-pair encoding: the same ids as OpenAI's `clip.tokenize` on any text.

    merges: (left, right) pairs of pieces that are glued together, in order of rank.

    The vocabulary follows from them: 256 byte characters, the same 256 at the end of a word, one
    token per merge, SOT and EOT.
    """

    # What counts as a word: the two special tokens, English contractions ('s, 't, ...), a run of
    # letters, one digit, or a run of anything else that is not white space (openai/CLIP).
    WORDS = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
        r"|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self, merges):
        letters = list(byte_alphabet().values())
        vocabulary = list(letters)
        vocabulary += [letter + "</w>" for letter in letters]
        vocabulary += ["".join(pair) for pair in merges]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]

        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        self.start = len(vocabulary) - 2  # id of SOT
        self.end = len(vocabulary) - 1    # id of EOT: the largest of all ids

        # Words repeat, so each is merged once and remembered.
        self._ids_of_word = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    @classmethod
    @lru_cache  # read once; all models share one copy
    def from_file(cls):
        """OpenAI's tokenizer, from bpe_simple_vocab_16e6.txt.gz in $CLIP_HOME."""
        # The file holds more merges than CLIP was trained with. It uses the first 48,894: together
        # with 2 * 256 characters, SOT and EOT these are its 49,408 tokens.
        count = 49408 - 2 * 256 - 2
        with gzip.open(find_file(VOCABULARY), "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:count + 1]  # the first line is a title
        return cls([line.split() for line in lines])

    def encode(self, text):
        """One text (str) -> its token ids (list of int), without SOT and EOT.

        As OpenAI does, the text is cleaned first: broken Unicode is mended, HTML entities are
        resolved (twice, because captions of the web are often escaped twice), white space is
        folded and upper case lowered.
        """
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()

        ids = []
        for word in self.WORDS.findall(text):
            ids += self._word_ids(word)
        return ids

    def _word_ids(self, word):
        """The ids of one word, by merging its letters."""
        if word in self._ids_of_word:
            return self._ids_of_word[word]

        alphabet = byte_alphabet()
        parts = [alphabet[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"

        # Merge the pair of lowest rank, wherever it stands in the word, until no pair is known.
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=self._rank_of)
            if best not in self.rank:
                break

            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged

        self._ids_of_word[word] = [self.ids[part] for part in parts]
        return self._ids_of_word[word]

    def _rank_of(self, pair):
        return self.rank.get(pair, math.inf)

    def __call__(self, texts, context_length=77, truncate=False):
        """A str or a list of N -> [SOT] ids [EOT] 0 0 ..., (N, context_length) int64.

        truncate: true to cut texts that are too long (EOT keeps the last place). Without it they
        are a ValueError.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)  # (N, context_length)

        for i, text in enumerate(texts):
            ids = [self.start, *self.encode(text)]
            if len(ids) >= context_length and not truncate:
                raise ValueError(f"text of {len(ids) + 1} tokens does not fit into "
                                 f"{context_length}: {text!r}; shorten it or its template, or "
                                 "give tokenize truncate=True")
            ids = ids[:context_length - 1] + [self.end]
            tokens[i, :len(ids)] = torch.tensor(ids)
        return tokens


# --------------------------------------------------------------------------------------------------
# A layer of the transformers
# --------------------------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): OpenAI's approximation of GELU.

    The weights were trained with it, so the exact GELU would give other features.
    """

    def forward(self, x):
        # sigmoid_ overwrites the temporary 1.702 * x: one tensor of (B, T, 4 E) fewer in memory.
        return x * (1.702 * x).sigmoid_()


# The order in which in_proj_weight stacks the three projections of attention. (The Query of
# Sec. 3.1 is something else: a text.)
QUERY, KEY, VALUE = 0, 1, 2


class Attention(nn.Module):
    """Multi-head self-attention: each token takes a weighted mean of all tokens' values.

    The parameters are named like nn.MultiheadAttention's, as in OpenAI's checkpoints. project and
    join_heads are methods of their own, because dense features use them without what is between.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x, part):
        """The queries, keys or values of x (B, T, E), by head: (B, heads, T, E / heads)."""
        weight = self.in_proj_weight.chunk(3)[part]                         # (E, E)
        bias = self.in_proj_bias.chunk(3)[part]                             # (E,)
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join_heads(self, x):
        """(B, heads, T, E / heads) -> (B, T, E): heads side by side, then the output layer."""
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def forward(self, x, mask=None, rows=None, causal=False):
        """Attention from x to x: (B, T, E) -> (B, T, E), or (B, len(rows), E).

        mask: bool, true where a token (row) may read another (column): (T, T), or (len(rows), T)
            together with `rows`. None: each may read all.
        rows: the positions whose output is wanted. None: all T.
        causal: true if each token may read itself and what stands before it, no more.
        """
        # Keys and values of all T tokens; queries only of the rows whose output is wanted.
        readers = x if rows is None else x[:, rows]
        q = self.project(readers, QUERY)                        # (B, heads, T or rows, E / heads)
        k = self.project(x, KEY)                                # (B, heads, T, E / heads)
        v = self.project(x, VALUE)                              # (B, heads, T, E / heads)

        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.join_heads(out)                             # (B, T or rows, E)


class ResidualAttentionBlock(nn.Module):
    """x + attention, then x + MLP, a layer norm before each of the two (pre-norm)."""

    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, hidden),
            gelu=activation(),
            c_proj=nn.Linear(hidden, width),
        ))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask=None, rows=None, causal=False):
        """(B, T, E) -> (B, T, E), or (B, len(rows), E); the arguments are Attention.forward's."""
        attended = self.attn(self.ln_1(x), mask, rows, causal)
        if rows is not None:
            x = x[:, rows]
        x = x + attended
        return x + self.mlp(self.ln_2(x))


def maskclip(block, tokens, size):
    """The last block of the image tower without query and key (Sec. 3.1, from MaskCLIP).

        x <- x + out_proj(value(ln_1(x)))        in place of   x + out_proj(sum_j a_ij value_j)
        x <- x + mlp(ln_2(x))

    Why this gives local features that can be compared with texts (an intuition: it leaves aside
    the residual, and that layer norm and MLP are not linear): CLIP was trained on the class token
    alone. In the last block the class token adds up all patches' values, weighted by the attention
    a, and that sum is what had to match the caption. So the value of a patch is a summand of a
    vector that lives where the texts live, and it tells what this patch holds. What a patch itself
    would gather here with its query, from all over the image, was never used in training, and it
    would blur what the patch shows.

    Each position is treated alone, and alike: on the grid, the value layer and the output layer are
    the two 1x1 convolutions of Sec. 3.1. That section does not mention the residual and the MLP.
    The released code keeps both, as MaskCLIP does, and so do we.

    tokens: as they enter the block, (B, 1 + n, E); the class token comes first, and is dropped.
    size: (h, w), the grid of the patches. Not needed here; functions that take the place of this
        one may need it.
    -> (B, n, E)
    """
    x = tokens[:, 1:]                                                       # (B, n, E)
    value = block.attn.project(block.ln_1(x), VALUE)                        # (B, heads, n, E/heads)
    x = x + block.attn.join_heads(value)                                    # (B, n, E)
    return x + block.mlp(block.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. Either tower has one; each walks through its blocks in its own way.

    heads, hidden: of each block; None: OpenAI's rules, 64 numbers per head and MLPs of 4 E.
    """

    def __init__(self, width, layers, activation, heads=None, hidden=None):
        super().__init__()
        heads = heads or max(1, width // 64)
        hidden = hidden or 4 * width
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, hidden, activation) for _ in range(layers)
        )


# --------------------------------------------------------------------------------------------------
# The vision tower
# --------------------------------------------------------------------------------------------------

# OpenCLIP's largest image towers (ViT-H, g and bigG) do not follow OpenAI's rules, and the shapes
# in a checkpoint do not tell the number of heads: width -> (heads, width of the MLPs).
LARGE_TOWERS = {1280: (16, 5120), 1408: (16, 6144), 1664: (16, 8192)}


class VisionTransformer(nn.Module):
    """ViT: an image is cut into patches, and each patch becomes a token.

    patch: side of a patch in pixels (ViT-B/16: 16).
    width, output_dim: E_v, D.
    grid: side of the grid of patches that the weights were trained on (ViT-B/16: 14, from images of
        224 x 224).

    Its last block is not run here: encode_image and encode_image_dense read it in different ways.
    """

    def __init__(self, patch, width, layers, grid, output_dim, activation):
        super().__init__()
        # A wrong number of heads would load, and give wrong features.
        heads, hidden = LARGE_TOWERS.get(width, (None, None))
        if width > 1024 and heads is None:
            raise ValueError(f"how many heads an image tower of width {width} has is not known: "
                             "add it to LARGE_TOWERS")

        self.patch = patch
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid * grid, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, activation, heads, hidden)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim))

    def positional_grid(self, h, w):
        """The positional embedding of an h x w grid of patches: (1, E_v, h, w).

        Attention does not know where a token stands. So one learnt vector per place is added to
        what the patch shows. It is the same for every image, whatever the image shows: this is why
        Sec. 3.3 takes it (as p) to model what CLIP prefers at a place regardless of the image.

        For a grid of another size than the trained one it is stretched like an image (bicubic).
        """
        # The first row belongs to the class token, the others to the grid, row by row.
        patches = self.positional_embedding[1:]                             # (grid * grid, E_v)
        table = patches.T.unflatten(1, (self.grid, self.grid))[None]        # (1, E_v, grid, grid)
        if (h, w) == (self.grid, self.grid):
            return table
        return F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)

    def embed(self, images):
        """Images as the first block wants them: (B, 3, H, W) -> tokens (B, 1 + n, E_v), (h, w).

        images: normalized (normalize_pixels); any size.
        """
        # Where H or W is no multiple of the patch, the image is padded on the right and below. In
        # normalized pixels 0 is the mean color, the most neutral one. CLIP.to_pixels cuts off again
        # what lies over the margin.
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % self.patch, 0, -H % self.patch))

        # A convolution whose stride is its own size: one linear map, applied to each patch alone.
        x = self.conv1(images)                                              # (B, E_v, h, w)
        h, w = x.shape[-2:]
        x = x + self.positional_grid(h, w)                                  # (B, E_v, h, w)
        x = x.flatten(2).transpose(1, 2)                                    # (B, n, E_v)

        # The class token belongs to no patch. It gathers from all of them what describes the image.
        first = self.class_embedding + self.positional_embedding[0]         # (E_v,)
        first = first.expand(len(x), 1, -1)                                 # (B, 1, E_v)
        tokens = torch.cat([first, x], dim=1)                               # (B, 1 + n, E_v)
        return self.ln_pre(tokens), (h, w)

    def before_last(self, images):
        """All blocks but the last: (B, 3, H, W) -> tokens (B, 1 + n, E_v), grid size (h, w)."""
        x, size = self.embed(images)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x, size


# --------------------------------------------------------------------------------------------------
# CLIP
# --------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """CLIP with a vision transformer. load_clip makes one from a file.

    embed_dim, vision_width, text_width: D, E_v, E_t.
    patch, grid: VisionTransformer's.
    context_length: the largest number of tokens in a text, SOT and EOT included (77).
    vocab_size: number of tokens; the last two are SOT and EOT.
    quick_gelu: true for OpenAI's weights; false for weights trained with the exact GELU.

    The weights mean nothing until load_clip fills them. (extras/pretrain.py trains some.)
    """

    def __init__(self, embed_dim, patch, vision_width, vision_layers, grid, context_length,
                 vocab_size, text_width, text_layers, quick_gelu=True):
        super().__init__()
        activation = QuickGELU if quick_gelu else nn.GELU

        # Image: (B, 3, H, W) -> joint space. Its parameters' names start with "visual.".
        self.visual = VisionTransformer(
            patch, vision_width, vision_layers, grid, embed_dim, activation
        )

        # Text: (N, context_length) -> joint space.
        self.transformer = Transformer(text_width, text_layers, activation)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))

        # CLIP's learnt temperature: exp(logit_scale) = 1 / tau. Its training began with tau = 0.07;
        # in OpenAI's weights tau is 0.01.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        self.context_length = context_length
        self.input_resolution = grid * patch  # pixels: the side of CLIP's own square images
        self.sot = vocab_size - 2
        self.eot = vocab_size - 1
        self.quick_gelu = quick_gelu

        # load_clip sets these two.
        self.tokenizer = None  # the weights' own; None for OpenAI's
        self.source = None     # the name or path that was loaded

    # ---- Images ----

    def encode_image(self, images):
        """One vector per image, for classification: (B, 3, H, W) -> (B, D).

        images: normalized (normalize_pixels).
        -> vectors not of length 1: use F.normalize before you compare.
        """
        x, _ = self.visual.before_last(images)                      # (B, 1 + n, E_v)

        # The last block in full, but for the class token alone: nothing else of it is used.
        last = self.visual.transformer.resblocks[-1]
        x = last(x, rows=[0])[:, 0]                                 # (B, E_v)
        return self.visual.ln_post(x) @ self.visual.proj            # (B, D)

    def encode_image_dense(self, images, visual=None, attention=maskclip):
        """One vector per patch, in the space of the texts: Z of Sec. 3.1 before it is normalized.

        The class token is dropped, and the last block is read so that each patch keeps what it
        shows (maskclip says why). What follows is the same as for whole images: the final layer
        norm and the projection to the joint space, now on each patch.

        images: (B, 3, H, W), normalized (normalize_pixels); any size.
        visual: a patch_tower of this CLIP's image tower; None: the tower itself.
        attention: how the last block is read; maskclip is the paper's.
        -> (B, D, h, w), h = ceil(H / patch), w = ceil(W / patch); vectors not of length 1.
        """
        visual = visual or self.visual
        x, size = visual.before_last(images)                        # (B, 1 + n, E_v)
        last = visual.transformer.resblocks[-1]
        x = attention(last, x, size)                                # (B, n, E_v)
        x = visual.ln_post(x) @ visual.proj                         # (B, n, D)
        return x.transpose(1, 2).unflatten(2, size)                 # (B, D, h, w)

    def to_pixels(self, grid, height, width):
        """A map on patches, (B, C, h, w), stretched over the image: (B, C, height, width).

        Bilinear. A patch covers patch x patch pixels, so the map first becomes as large as the
        padded image; what lies over the padding is then cut off.
        """
        h, w = grid.shape[-2:]
        padded_size = (h * self.visual.patch, w * self.visual.patch)
        pixels = F.interpolate(grid, size=padded_size, mode="bilinear", align_corners=False)
        return pixels[..., :height, :width]

    # ---- Texts ----

    def tokenizer_or_default(self):
        """The tokenizer of these weights: their own, or OpenAI's if they brought none."""
        tokenizer = self.tokenizer or Tokenizer.from_file()
        if tokenizer.end != self.eot:
            raise ValueError(f"{self.source} has {self.eot + 1} tokens, the tokenizer "
                             f"{tokenizer.end + 1}: save the weights as "
                             "{'state_dict': ..., 'merges': ...} with their own merge list")
        return tokenizer

    def tokenize(self, texts, truncate=False):
        """A str or a list of N -> (N, context_length) int64, in this model's vocabulary."""
        return self.tokenizer_or_default()(texts, self.context_length, truncate)

    def encode_text(self, tokens):
        """One vector per text: (N, context_length) int64, as `tokenize` gives them -> (N, D).

        It is the state of EOT, the only token that has read the whole text; not of length 1.
        """
        # EOT has the largest id of all, so argmax finds it. The tower is causal (no token reads
        # what comes later), so the zeros after the last EOT can be left out without any effect.
        end = tokens.argmax(-1)                                     # (N,)
        length = int(end.max()) + 1
        tokens = tokens[:, :length]                                 # (N, length)

        x = self.token_embedding(tokens) + self.positional_embedding[:length]   # (N, length, E_t)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)

        x = x[torch.arange(len(x)), end]                            # (N, E_t)
        return self.ln_final(x) @ self.text_projection              # (N, D)

    def encode_prompted(self, prompt, endings):
        """One vector per class: the texts [SOT] v_1 .. v_L [name] [EOT] of Eq. (1).

        In place of words such as "a photo of a", these texts begin with L vectors that need not be
        the embedding of any word: the prompt is learnt (Sec. 3.2), and gradients reach it.

        prompt: v_1 .. v_L, (L, E_t), the same for all classes; or (C, L, E_t), each class its own.
            (Sec. 3.2 calls their width D. They stand in the place of words, so it is E_t; in
            ViT-B/16 both are 512.)
        endings: for each class the token ids after the prompt (C lists of int): its name, then EOT.
            The state of the last one is the vector of the text. (A published model may cut a long
            name so that EOT is lost.)
        -> (C, D), not of length 1.

        The values are those of encoding one text after the other; with a shared prompt it takes
        about a tenth of the time.

        All texts begin with the same SOT v_1 .. v_L, and in a causal tower the states of these
        tokens do not depend on what follows. So they are computed once, and the names are set
        after them one by one, in a single sequence: 117 tokens in place of 20 texts of 77 for VOC.
        Two rules make this equal to separate texts. Positions: each name is numbered as if it alone
        followed the prompt. Reading: token i reads token j if j's position is not larger and j
        belongs to the prompt or to i's own text.

                      SOT v_1 v_2 | cat EOT | potted plant EOT          (L = 2, two names)
            position    0   1   2 |  3   4  |    3     4    5     which positional embedding
            owner      -1  -1  -1 |  0   0  |    1     1    1     whose token; -1: the prompt's

        So "plant" reads SOT, v_1, v_2, "potted" and itself, and nothing of the cat. Where each
        class has a prompt of its own, all of them stand behind SOT, each owned by its class. (A
        long sequence then: with 150 classes and 73 vectors it takes four times as long as texts
        side by side.)
        """
        L, E_t = prompt.shape[-2:]
        device = prompt.device
        prompt_owners = [-1] if prompt.ndim == 2 else range(len(endings))

        # The two rows of the example above, a pair for each token.
        layout = [(0, -1)]
        for c in prompt_owners:
            layout += [(1 + i, c) for i in range(L)]
        ends = []  # where in the sequence the last token of each text stands
        for c, ending in enumerate(endings):
            layout += [(1 + L + i, c) for i in range(len(ending))]
            ends.append(len(layout) - 1)
        position, owner = torch.tensor(layout, device=device).T                 # (T,) each

        # mask[i, j]: may token i (row) read token j (column)?
        not_after = position <= position[:, None]                               # (T, T)
        of_prompt = owner == -1                                                 # (T,)
        same_owner = owner == owner[:, None]                                    # (T, T)
        mask = not_after & (of_prompt | same_owner)                             # (T, T)

        start = self.token_embedding.weight[self.sot][None]                     # (1, E_t)
        prompts = prompt.reshape(-1, E_t)                                       # (L or C L, E_t)
        token_ids = torch.tensor(sum(endings, []), device=device)
        names = self.token_embedding(token_ids)                                 # (all endings, E_t)
        x = torch.cat([start, prompts, names]) + self.positional_embedding[position]
        x = x[None]                                                             # (1, T, E_t)

        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, mask)

        # Nothing comes after the last block, so it is computed for the last tokens alone.
        x = last(x, mask[ends], rows=ends)[0]                                   # (C, E_t)
        return self.ln_final(x) @ self.text_projection                          # (C, D)

    def temperature(self):
        """CLIP's tau, by which it divides cosines: 0.01 in OpenAI's weights."""
        return 1 / self.logit_scale.exp().item()

    # ---- Weights ----

    def identity(self):
        """What this CLIP is, as 64 hexadecimal digits: its tensors, its activation, its heads.

        The same weights from another file (fp16 or fp32, of OpenAI or Hugging Face) are the same.
        """
        weights = tensors_sha256(self.state_dict())
        image_heads = self.visual.transformer.resblocks[0].attn.heads
        text_heads = self.transformer.resblocks[0].attn.heads
        whole = f"{weights} {self.quick_gelu} {image_heads} {text_heads}"
        return hashlib.sha256(whole.encode()).hexdigest()


def patch_tower(visual, exact_gelu=False, class_token=None, eps=None):
    """A second VisionTransformer on the parameters of `visual`, to be run in another way.

    To read patches, the authors of ReCLIP ran CLIP's image tower with another activation than it
    was trained with (their code of 2024), with a layer norm eps of 1e-6, and with a class token of
    their own, which their published files contain. Whole images are still encoded as usual. With
    two towers nothing in the forward pass has to ask which of them is meant.

    visual: a CLIP's .visual; it stays as it is.
    exact_gelu: x * Phi(x) in the MLPs, in place of what `visual` has.
    class_token: (E_v,) in place of class_embedding; None: the same.
    eps: of the two layer norms of each block; None: the same.
    """
    # deepcopy's second argument lists what counts as copied already: here every parameter, so that
    # only the modules around them are new.
    shared = {id(parameter): parameter for parameter in visual.parameters()}
    tower = copy.deepcopy(visual, shared)

    if class_token is not None:
        tower.class_embedding = nn.Parameter(class_token.clone(), requires_grad=False)
    for block in tower.transformer.resblocks:
        if exact_gelu:
            block.mlp.gelu = nn.GELU()
        if eps is not None:
            block.ln_1.eps = eps
            block.ln_2.eps = eps
    return tower


# --------------------------------------------------------------------------------------------------
# Files: where they are, how they come, how they are written
#
# From here on it is about files, no longer about CLIP. A first reader may stop.
# --------------------------------------------------------------------------------------------------

SILENCE = 30  # seconds in which an address may send nothing, before the next one is tried
OPENAI = "https://openaipublic.azureedge.net/clip/models"
HUGGING_FACE = "https://huggingface.co/openai"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"

# OpenAI's vision transformers: their file, its sha256 (a part of its address too), the same weights
# at Hugging Face, and the sides of a patch and of an image in pixels, which tell them apart.
MODELS = {
    "ViT-B/16": (  # the paper's
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "clip-vit-base-patch16", (16, 224),
    ),
    "ViT-B/32": (
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "clip-vit-base-patch32", (32, 224),
    ),
    "ViT-L/14": (
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "clip-vit-large-patch14", (14, 224),
    ),
    "ViT-L/14@336px": (
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "clip-vit-large-patch14-336", (14, 336),
    ),
}


def sources(name):
    """Where a CLIP of MODELS, or the VOCABULARY, comes from: [(file name, address, sha256)]."""
    if name == VOCABULARY:
        url = f"https://github.com/openai/CLIP/raw/main/clip/{VOCABULARY}"
        return [(name, url, "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")]

    file, sha256, folder, _ = MODELS[name]
    return [
        (file, f"{OPENAI}/{sha256}/{file}", sha256),
        # The sha256 of Hugging Face's files is not known here.
        (f"{folder}.bin", f"{HUGGING_FACE}/{folder}/resolve/main/pytorch_model.bin", None),
    ]


def find_file(name):
    """The path of a CLIP of MODELS, or of the VOCABULARY, in $CLIP_HOME; downloaded if missing.

    $CLIP_HOME is ~/.cache/clip unless set, the folder that OpenAI's own package uses.
    """
    home = Path(os.environ.get("CLIP_HOME", "~/.cache/clip")).expanduser()
    for file, _, sha256 in sources(name):
        path = home / file
        if path.exists():
            if sha256 not in (None, digest_of(path)):
                raise ValueError(f"{path} is not the official {file} (its sha256 differs): delete "
                                 "it to have it downloaded again")
            return path

    failures = []
    for file, url, sha256 in sources(name):
        try:
            download([url], home / file, "sha256", sha256)
            return home / file
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures))


def download(urls, path, algorithm="sha256", digest=None):
    """Fetches a file to `path` from the first of its addresses that has it.

    algorithm, digest: its "sha256" or "md5", in hexadecimal digits. None: not known; that of what
        has come is printed.

    Errors: OSError of one sentence if no address gave it; then there is nothing new at `path`.
    """
    failures = []
    for url in urls:
        try:
            with written_atomically(path) as temporary:
                fetch(url, temporary)
                found = digest_of(temporary, algorithm)
                if digest not in (None, found):
                    raise OSError(f"{url} sent another file, of {algorithm} {found}")
            if digest is None:
                print(f"{path} has the {algorithm} {found}; the official one is not known here")
            return
        except OSError as error:
            failures.append(str(error))

    raise OSError(f"no address gave {Path(path).name} of {algorithm} {digest or '(not known)'} "
                  f"({', '.join(failures)}): fetch it elsewhere and put it at {path}")


def fetch(url, path):
    """Writes what an address sends to a file, with its progress on stderr.

    Errors: OSError that names the address.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "ReCLIP"})
    received = 0
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as answer, open(path, "wb") as file:
            total = int(answer.headers.get("Content-Length", 0))
            while block := answer.read(1 << 20):
                file.write(block)
                received += len(block)
                print(f"\r{url}: {received >> 20} of {total >> 20} MB", end="", file=sys.stderr)
        print(file=sys.stderr)
        if received < total:
            raise OSError(f"it broke off after {received:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from error


def digest_of(path, algorithm="sha256"):
    """The digest of a file's content, in hexadecimal digits."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(state):
    """The sha256 of {name: tensor}: of the names and the numbers (float32), sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


@contextmanager
def written_atomically(path):
    """Yields a temporary path, which becomes `path` when the block ends well.

        with written_atomically("model.pt") as temporary:
            torch.save(model.state_dict(), temporary)

    Whatever happens in between (a kill, a full disk), `path` holds either its old content or the
    whole new one. The folder is made if missing.

    Errors: OSError of one sentence if the file could not be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the new name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        # Without an errno it is our own (download raises such): it has its sentence already.
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}); what was there before is "
                      "untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Loading weights
#
# Checkpoints are pickles, and a pickle is a small program: unpickling one with Python's defaults
# runs whatever its author wrote. OpenAI's files are TorchScript archives, which carry code on top.
# Nothing here runs anything from a file: a state dict goes through torch.load(weights_only=True),
# a TorchScript archive through an unpickler that knows tensors and nothing else, and a safetensors
# file holds no program.
# --------------------------------------------------------------------------------------------------

# Types of numbers, by their names in TorchScript archives and in safetensors files.
DTYPES = {
    "HalfStorage": torch.float16, "F16": torch.float16,
    "BFloat16Storage": torch.bfloat16, "BF16": torch.bfloat16,
    "FloatStorage": torch.float32, "F32": torch.float32,
    "DoubleStorage": torch.float64, "F64": torch.float64,
    "LongStorage": torch.int64, "I64": torch.int64,
}


def tensor_in_storage(storage, offset, size, stride, *unused):
    """A tensor of a TorchScript archive: a view of a flat tensor (its storage)."""
    return storage.as_strided(size, stride, offset)  # raises if it would reach outside


class ArchiveUnpickler(pickle._Unpickler):
    """Reads the data.pkl of a TorchScript archive, and can make nothing but tensors and containers.

    It is Python's unpickler in Python. The one in C would reserve memory for as many objects as a
    hostile file merely claims to hold.
    """

    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive = archive
        self.root = root

    def find_class(self, module, name):
        """What a name in the pickle stands for. Only the names below pass; all else is refused."""
        # Classes of the archive's own code become empty objects: they keep attributes, run nothing.
        if module.startswith("__torch__"):
            return SimpleNamespace
        # build_intlist, build_tensorlist, ...: TorchScript's typed lists.
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return tensor_in_storage
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, record):
        """A storage: the archive's record data/0, data/1, ... as a flat tensor."""
        _, dtype, key, _, count = record
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(raw, dtype=dtype, count=count)  # raises if the record is too short


def read_torchscript(path):
    """All tensors of a TorchScript archive as {dotted name: tensor}; executes nothing of it.

    Such an archive is a zip: <root>/data.pkl holds the tree of modules, <root>/data/0, 1, ... the
    numbers, <root>/code/ the code. (torch.jit.load would run it; torch.load(weights_only=True)
    refuses such files.)
    """
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        tree = ArchiveUnpickler(archive, root).load()

    tensors = {}
    collect_tensors(tree, "", tensors)
    return tensors


def collect_tensors(module, prefix, tensors):
    """Puts the tensors below `module` into the dict `tensors`, named as a state dict names them."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, SimpleNamespace):
            collect_tensors(value, f"{prefix}{name}.", tensors)


def read_safetensors(path):
    """The tensors of a safetensors file as {name: tensor}.

    Such a file is 8 bytes with the length of a header; the header, in JSON: {name: {"dtype",
    "shape", "data_offsets"}}; and the numbers of all tensors.
    """
    tensors = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)

        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            raw = bytearray(file.read(end - begin))
            tensors[name] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


# Hugging Face's names of CLIP's parts, and OpenAI's.
HUGGING_FACE_NAMES = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # written like this
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection": "visual.proj",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# What files hold beside the weights; the shapes of the weights say the same.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")


def with_openai_names(tensors):
    """A state dict from OpenAI, OpenCLIP or Hugging Face -> one as OpenAI's, in float32."""
    state = {}
    for key, value in tensors.items():
        if key.split(".")[-1] in NO_WEIGHTS:
            continue
        # Training on several GPUs puts "module." first; OpenCLIP can put "text." on its text tower.
        key = key.removeprefix("module.").removeprefix("text.")
        for theirs, ours in HUGGING_FACE_NAMES.items():
            key = key.replace(theirs, ours)
        state[key] = value.float() if value.is_floating_point() else value

    # Hugging Face keeps the projections to the joint space as linear layers, (D, E), and the three
    # projections of attention apart.
    for name in ("visual.proj", "text_projection"):
        if f"{name}.weight" in state:
            state[name] = state.pop(f"{name}.weight").T.contiguous()
    for key in list(state):
        if ".q_proj." in key:
            q = state.pop(key)
            k = state.pop(key.replace("q_proj", "k_proj"))
            v = state.pop(key.replace("q_proj", "v_proj"))
            state[key.replace("q_proj.", "in_proj_")] = torch.cat([q, k, v])
    return state


def is_torchscript(path):
    """Only TorchScript archives are zip files with a folder of code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_state(path):
    """The tensors of a weights file, under OpenAI's names, and its tokenizer's merges (or None)."""
    merges = None
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
    elif is_torchscript(path):
        tensors = read_torchscript(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        merges = tensors.get("merges")
        for wrapper in ("state_dict", "model_state_dict", "model"):
            tensors = tensors.get(wrapper, tensors)
    return with_openai_names(tensors), merges


def build_clip(state, quick_gelu=True):
    """A CLIP of the sizes that the shapes in a state dict tell, without weights.

    It is on the meta device, where tensors have shapes but no memory, until the weights are
    assigned: so the model is never in memory twice.
    """
    text_width, embed_dim = state["text_projection"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = state["visual.positional_embedding"].shape[0] - 1  # without the class token

    # Each block of a tower has one ln_1: "visual.transformer.resblocks.0.ln_1.weight" is of the
    # tower "visual.transformer.", that of the texts is "transformer."
    tower_of_block = [key.split("resblocks")[0] for key in state if key.endswith(".ln_1.weight")]

    with torch.device("meta"):
        return CLIP(
            embed_dim=embed_dim,
            patch=patch,
            vision_width=vision_width,
            vision_layers=tower_of_block.count("visual.transformer."),
            grid=math.isqrt(patches),
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            text_width=text_width,
            text_layers=tower_of_block.count("transformer."),
            quick_gelu=quick_gelu,
        )


def load_clip(name_or_path="ViT-B/16", device="cpu", quick_gelu=True):
    """CLIP in eval mode, float32, frozen (no parameter requires a gradient).

    name_or_path: a name of MODELS (in $CLIP_HOME, or downloaded), or a file of a CLIP with a ViT:
        OpenAI's TorchScript archives; Hugging Face's pytorch_model.bin or model.safetensors;
        OpenCLIP's; state dicts, plain or as "state_dict", "model_state_dict" or "model" of a dict,
        which may hold the "merges" of a tokenizer of its own beside it.
    quick_gelu: false for weights that were trained with the exact GELU, as OpenCLIP's of LAION. The
        files do not tell.

    Errors: FileNotFoundError, OSError (download), ValueError (any unfit file), one sentence each.
    """
    named = name_or_path in MODELS
    path = find_file(name_or_path) if named else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}: give a file, or a name of "
                                f"{', '.join(MODELS)}")

    try:
        state, merges = read_state(path)
        clip = build_clip(state, quick_gelu)
        clip.load_state_dict(state, assign=True)
        if merges is not None:
            clip.tokenizer = Tokenizer(merges)
        if named and (clip.visual.patch, clip.input_resolution) != MODELS[name_or_path][-1]:
            raise ValueError(f"its patches or its images are not of the size of {name_or_path}")
    except Exception as error:  # a file can hold anything
        # The first sentence alone: torch's second one is advice to load the file unsafely.
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        again = "; delete it to have it downloaded again" if named else ""
        raise ValueError(f"{path} does not hold the weights of a ViT CLIP, or is damaged "
                         f"({type(error).__name__}: {reason}){again}") from error

    clip.source = name_or_path if named else str(path.resolve())
    return clip.eval().requires_grad_(False).to(device)
