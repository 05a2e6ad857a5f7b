"""CLIP in one file: the tokenizer, the two encoders, features for every patch, and the loader.

CLIP (Radford et al., 2021) is a pair of transformers trained on 400 million images and their
captions, so that an image and its caption get similar vectors. Comparing the image's vector with
those of "a photo of a cat." and "a photo of a dog." then classifies it, without any training on
cats or dogs. ReCLIP (Sec. 3.1) asks the same question of every patch of the image.

What stands here, from top to bottom
    normalize_pixels          pixels in [0, 1] as CLIP's image encoder wants them
    Tokenizer, tokenize       text -> token ids, identical to OpenAI's (byte-pair encoding)
    ResidualAttentionBlock    a layer of either transformer
      .value_path             its last layer as MaskCLIP and ReCLIP read it (Sec. 3.1)
      .read_patches           that, and how later papers read it (ATTENTIONS)
    VisionTransformer         image -> tokens; its positional embedding is p of Sec. 3.3
    patch_tower               the same weights, run with another activation or class token
    CLIP                      the model; its parameter names are the keys of OpenAI's checkpoints
      .encode_image           (B, 3, H, W) -> (B, D)        one vector per image
      .encode_image_dense     (B, 3, H, W) -> (B, D, h, w)  one vector per patch: Z of Sec. 3.1
                              (not normalized yet; in the other files the vectors have length 1)
      .encode_text            (N, 77) -> (N, D)             one vector per text
      .encode_prompted        [SOT] v_1 .. v_L [name] [EOT] -> (C, D): the texts of Eq. (1)
    load_clip                 OpenAI's files and plain state dicts, without running code from them
    tour                      python clip_model.py: the shapes of all of it on one small image

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

To copy this file elsewhere: pip install torch ftfy regex. Nothing else of this project is needed.

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
(2021) and openai/CLIP (MIT license) for the model; read_patches names those of the dense features.
"Sec." and "Eq." are the ReCLIP paper's; "released" is its authors' code; "ours" was chosen here.
"""

import copy
import gzip
import hashlib
import html
import http.client
import math
import os
import pickle
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

# The ways in which encode_image_dense can read the last block; the first is the paper's.
ATTENTIONS = ("maskclip", "sclip", "clearclip", "naclip")

# OpenAI's vision transformers by their names, and the files that hold them.
MODELS = {
    "ViT-B/16": "ViT-B-16.pt",  # the paper's
    "ViT-B/32": "ViT-B-32.pt",
    "ViT-L/14": "ViT-L-14.pt",
    "ViT-L/14@336px": "ViT-L-14-336px.pt",
}

# What is downloaded when it is missing: file name -> (url, sha256).
OPENAI = "https://openaipublic.azureedge.net/clip/models"
FILES = {
    "ViT-B-16.pt": (
        f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
    "ViT-B-32.pt": (
        f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "ViT-L-14.pt": (
        f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "ViT-L-14-336px.pt": (
        f"{OPENAI}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/"
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
    "bpe_simple_vocab_16e6.txt.gz": (
        "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    ),
}


def normalize_pixels(images, mean=MEAN, std=STD, valid=None):
    """Subtracts the mean and divides by the standard deviation of each color.

    Args:
        images: (..., 3, H, W), floating point, in [0, 1].
        mean, std: three numbers each, of the images that the network was trained on.
        valid: (..., H, W) bool, where the image is: what lies outside is padding, and becomes 0,
            the mean color. None: everywhere.

    Returns: the same shape; about zero on average. (F.normalize is something else: it makes
    vectors of length 1.)
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

    Args:
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
    def from_file(cls, path=None):
        """The tokenizer of a bpe_simple_vocab_16e6.txt.gz.

        Args:
            path: the file; None for the one in $CLIP_HOME, which is downloaded if missing.

        Errors: ValueError for a file of something else; those of find_file.
        """
        path = Path(path) if path else find_file("bpe_simple_vocab_16e6.txt.gz")

        # The file holds more merges than CLIP was trained with. It uses the first 48,894: together
        # with 2 * 256 characters, SOT and EOT these are its 49,408 tokens.
        count = 49408 - 2 * 256 - 2
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:count + 1]  # the first line is a title

            merges = []
            for line in lines:
                left, right = line.split()
                merges.append((left, right))
            if len(merges) < count:
                raise ValueError(f"{len(merges)} merges")
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not CLIP's BPE vocabulary of {count:,} merges ({error}); "
                             "delete it to have it downloaded again") from error
        return cls(merges)

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
        """Texts as the text encoder wants them: [SOT] ids [EOT] 0 0 ...

        Args:
            texts: a str, or a list of N of them.
            context_length: tokens per row, SOT and EOT included.
            truncate: true to cut texts that are too long (EOT keeps the last place).

        Returns: (N, context_length) int64.
        Errors: ValueError that names the text which is too long, unless `truncate`.
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


def tokenize(texts, context_length=77, truncate=False, bpe_path=None):
    """A str or a list of N -> (N, context_length) int64, in OpenAI's vocabulary.

    bpe_path: its file; None for the one in $CLIP_HOME, which is downloaded if missing.
    """
    return Tokenizer.from_file(bpe_path)(texts, context_length, truncate)


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


QUERY, KEY, VALUE = 0, 1, 2  # the order in which in_proj_weight stacks the three projections


class Attention(nn.Module):
    """Multi-head self-attention: each token takes a weighted mean of all tokens' values.

    The parameters are named like nn.MultiheadAttention's, as in OpenAI's checkpoints. The three
    steps are methods of their own, because dense features use them in other combinations.
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
        """Attention from x to x.

        Args:
            x: (B, T, E).
            mask: bool, true where a token (row) may read another (column): (T, T), or
                (len(rows), T) together with `rows`. None: each may read all.
            rows: the positions whose output is wanted. None: all T.
            causal: true if each token may read itself and what stands before it, no more.

        Returns: (B, T, E), or (B, len(rows), E).
        """
        # Keys and values of all T tokens; queries only of the rows whose output is wanted.
        readers = x if rows is None else x[:, rows]
        q = self.project(readers, QUERY)                        # (B, heads, T or rows, E / heads)
        k = self.project(x, KEY)                                # (B, heads, T, E / heads)
        v = self.project(x, VALUE)                              # (B, heads, T, E / heads)

        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.join_heads(out)                             # (B, T or rows, E)


def nearness(h, w, like, std=5.0):
    """What NACLIP adds to the attention logits, so that patches read their neighbors more.

        exp(-d^2 / (2 std^2))    for two patches that lie d patches apart; 0 for the class token

    Args:
        h, w: size of the grid of patches.
        like: a tensor of the dtype and on the device wanted.
        std: in patches; 5 is NACLIP's released value.

    Returns: (n, 1 + n), a row per patch that reads; first column: the class token.
    """
    y = torch.arange(h, dtype=like.dtype, device=like.device)
    x = torch.arange(w, dtype=like.dtype, device=like.device)

    # d^2 = dy^2 + dx^2, so the Gaussian of d is a Gaussian of dy times one of dx. The Kronecker
    # product multiplies every pair of them, in the order in which the grid is flattened.
    of_rows = torch.exp(-(y[:, None] - y).square() / (2 * std ** 2))        # (h, h)
    of_columns = torch.exp(-(x[:, None] - x).square() / (2 * std ** 2))     # (w, w)
    patches = torch.kron(of_rows, of_columns)                               # (n, n)

    return F.pad(patches, (1, 0))                                           # (n, 1 + n)


class ResidualAttentionBlock(nn.Module):
    """x + attention, then x + MLP, a layer norm before each of the two (pre-norm)."""

    def __init__(self, width, heads, activation=QuickGELU):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=activation(),
            c_proj=nn.Linear(4 * width, width),
        ))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask=None, rows=None, causal=False):
        """(B, T, E) -> (B, T, E), or (B, len(rows), E); the arguments are Attention.forward's."""
        attended = self.attn(self.ln_1(x), mask, rows, causal)
        if rows is not None:
            x = x[:, rows]
        x = x + attended
        return x + self.mlp(self.ln_2(x))

    def value_path(self, x):
        """The block without query and key (Sec. 3.1, from MaskCLIP): (B, T, E) -> (B, T, E).

            x <- x + out_proj(value(ln_1(x)))        in place of   x + out_proj(sum_j a_ij value_j)
            x <- x + mlp(ln_2(x))

        Why this gives local features that can be compared with texts: CLIP was trained on the class
        token alone. In the last block the class token adds up all patches' values, weighted by the
        attention a, and that sum is what had to match the caption. So the value of a patch is a
        summand of a vector that lives where the texts live, and it tells what this patch holds.
        What a patch itself would gather here with its query, from all over the image, was never
        used in training, and it would blur what the patch shows. (An intuition: it leaves out the
        residual, and that layer norm and MLP are not linear.)

        Each position is treated alone, and alike: on the grid, the value layer and the output
        layer are the two 1x1 convolutions of Sec. 3.1. That section does not mention the residual
        and the MLP. The released code keeps both, as MaskCLIP does, and so do we.
        """
        value = self.attn.project(self.ln_1(x), VALUE)              # (B, heads, T, E / heads)
        x = x + self.attn.join_heads(value)                         # (B, T, E)
        return x + self.mlp(self.ln_2(x))

    def read_patches(self, x, size, attention):
        """The block as papers on segmentation read it, when it is the last of CLIP's.

        Args:
            x: tokens (B, 1 + n, E), the class token first.
            size: (h, w), the grid of the patches.
            attention: the variant:
                "maskclip"   MaskCLIP (Zhou et al., ECCV 2022), the paper's: value_path
                "sclip"      SCLIP (Wang et al., ECCV 2024): queries are compared with queries, keys
                             with keys, and what both read is added
                "clearclip"  ClearCLIP (Lan et al., ECCV 2024): queries with queries; no residual,
                             no MLP
                "naclip"     NACLIP (Hajimiri et al., "Pay Attention to Your Neighbours", WACV
                             2025) in its "reduced" form: keys with keys, near ones more; no
                             residual, no MLP

        Returns: (B, n, E), the patches without the class token.
        Errors: ValueError for any other variant.
        """
        if attention == "maskclip":
            return self.value_path(x[:, 1:])

        # The other three keep attention, but between vectors of one kind. A patch then reads mostly
        # itself and the patches that look like it, so it averages over its own object.
        # The class token is read like a patch, but it reads nothing: only patches are wanted.
        y = self.ln_1(x)
        v = self.attn.project(y, VALUE)                             # (B, heads, 1 + n, E / heads)

        if attention == "sclip":
            q = self.attn.project(y, QUERY)
            k = self.attn.project(y, KEY)
            by_queries = F.scaled_dot_product_attention(q[:, :, 1:], q, v)
            by_keys = F.scaled_dot_product_attention(k[:, :, 1:], k, v)
            x = x[:, 1:] + self.attn.join_heads(by_queries + by_keys)
            return x + self.mlp(self.ln_2(x))

        if attention == "clearclip":
            # ClearCLIP's finding: what the residual carries is mostly noise for segmentation.
            q = self.attn.project(y, QUERY)
            by_queries = F.scaled_dot_product_attention(q[:, :, 1:], q, v)
            return self.attn.join_heads(by_queries)

        if attention == "naclip":
            k = self.attn.project(y, KEY)
            bonus = nearness(*size, v)                              # (n, 1 + n)
            by_keys = F.scaled_dot_product_attention(k[:, :, 1:], k, v, attn_mask=bonus)
            return self.attn.join_heads(by_keys)

        raise ValueError(f"attention variant {attention!r} has no branch in "
                         "ResidualAttentionBlock.read_patches: write one")


class Transformer(nn.Module):
    """A stack of blocks. Either tower has one; each walks through its blocks in its own way."""

    def __init__(self, width, layers, activation):
        super().__init__()
        # OpenAI's rule: 64 numbers per head. The shapes in a checkpoint do not tell the number.
        heads = max(1, width // 64)
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation) for _ in range(layers)
        )


# --------------------------------------------------------------------------------------------------
# The vision tower
# --------------------------------------------------------------------------------------------------

class VisionTransformer(nn.Module):
    """ViT: an image is cut into patches, and each patch becomes a token.

    Args:
        patch: side of a patch in pixels (ViT-B/16: 16).
        width: E_v.
        layers: number of blocks.
        grid: side of the grid of patches that the weights were trained on (ViT-B/16: 14, from
            images of 224 x 224).
        output_dim: D.
        activation: class of the non-linearity of the MLPs.

    Its last block is not run here: encode_image and encode_image_dense read it in different ways.
    """

    def __init__(self, patch, width, layers, grid, output_dim, activation=QuickGELU):
        super().__init__()
        self.patch = patch
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid * grid, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, activation)
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
        """Images as the first block wants them.

        Args:
            images: (B, 3, H, W), normalized (normalize_pixels); any size.

        Returns: tokens (B, 1 + n, E_v), and the grid's size (h, w).
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
        first = first.expand(len(x), 1, -1).to(x.dtype)  # (B, 1, E_v); autocast may make x half
        tokens = torch.cat([first, x], dim=1)                               # (B, 1 + n, E_v)
        return self.ln_pre(tokens), (h, w)

    def before_last(self, images):
        """All blocks but the last: (B, 3, H, W) -> tokens (B, 1 + n, E_v), grid size (h, w)."""
        x, size = self.embed(images)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x, size


def patch_tower(visual, exact_gelu=False, class_token=None, eps=None):
    """The same image tower once more, to be run in another way; its weights are not copied.

    To read patches, the authors of ReCLIP ran the tower with another activation than CLIP was
    trained with (their code of 2024), with a layer norm eps of 1e-6, and with a class token of
    their own, which their published files contain. Whole images are still encoded as usual. So the
    tower exists twice on the same parameters, and each of the two is an ordinary VisionTransformer:
    nothing in the forward pass has to ask which of them is meant.

    Args:
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
# CLIP
# --------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """CLIP with a vision transformer. load_clip makes one from a file.

    Args:
        embed_dim: D.
        patch, vision_width, vision_layers, grid: VisionTransformer's.
        context_length: the largest number of tokens in a text, SOT and EOT included (77).
        vocab_size: number of tokens; the last two are SOT and EOT.
        text_width, text_layers: E_t, and the number of blocks of the text tower.
        quick_gelu: true for OpenAI's weights; false for weights trained with the exact GELU.

    The weights are not initialized: call reset_parameters, or load some.
    """

    def __init__(
        self,
        embed_dim,
        patch,
        vision_width,
        vision_layers,
        grid,
        context_length,
        vocab_size,
        text_width,
        text_layers,
        quick_gelu=True,
    ):
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

        # load_clip sets these three.
        self.tokenizer = None  # the weights' own; None for OpenAI's
        self.source = None     # the name or path that was loaded
        self.sha256 = None     # of that file

    # ---- Images ----

    def encode_image(self, images):
        """One vector per image, for classification.

        Args:
            images: (B, 3, H, W), normalized (normalize_pixels).

        Returns: (B, D), not of length 1: use F.normalize before you compare.
        """
        x, _ = self.visual.before_last(images)                      # (B, 1 + n, E_v)

        # The last block in full, but for the class token alone: nothing else of it is used.
        last = self.visual.transformer.resblocks[-1]
        x = last(x, rows=[0])[:, 0]                                 # (B, E_v)
        return self.visual.ln_post(x) @ self.visual.proj            # (B, D)

    def encode_image_dense(self, images, attention="maskclip", visual=None):
        """One vector per patch, in the space of the texts: Z of Sec. 3.1 before it is normalized.

        The class token is dropped, and the last block is read so that each patch keeps what it
        shows (ResidualAttentionBlock.value_path says why). What follows is the same as for whole
        images: the final layer norm and the projection to the joint space, now on each patch.

        Args:
            images: (B, 3, H, W), normalized (normalize_pixels); any size.
            attention: one of ATTENTIONS; "maskclip" is the paper's.
            visual: a patch_tower of this CLIP's image tower; None: the tower itself.

        Returns: (B, D, h, w), h = ceil(H / patch), w = ceil(W / patch); vectors not of length 1.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; it must be one of "
                             f"{', '.join(ATTENTIONS)}")

        visual = visual or self.visual
        x, size = visual.before_last(images)                        # (B, 1 + n, E_v)
        last = visual.transformer.resblocks[-1]
        x = last.read_patches(x, size, attention)                   # (B, n, E_v)
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
        """One vector per text.

        Args:
            tokens: (N, context_length) int64, as `tokenize` gives them.

        Returns: (N, D), not of length 1: the state of EOT, the only token that has read the
        whole text.
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

        Args:
            prompt: v_1 .. v_L, (L, E_t), the same for all classes; or (C, L, E_t), each class its
                own. (Sec. 3.2 calls their width D. They stand in the place of words, so it is E_t;
                in ViT-B/16 both are 512.)
            endings: for each class the token ids after the prompt (C lists of int): its name, then
                EOT. The state of the last one is the vector of the text. (A published file may cut
                a long name so that EOT is lost: reclip.cut_ending.)

        Returns: (C, D), not of length 1.

        The values are those of encoding one text after the other, at about a tenth of the time.
        All texts begin with the same SOT v_1 .. v_L, and in a causal tower the states of these
        tokens do not depend on what follows. So they are computed once, and the names are set
        after them one by one, in a single sequence: 117 tokens in place of 20 texts of 77 for VOC.
        Two rules make this equal to separate texts. Positions: each name is numbered as if it alone
        followed the prompt. Reading: token i reads token j if j's position is not larger and j
        belongs to the prompt or to i's own text.

                      SOT v_1 v_2 | cat EOT | potted plant EOT          (L = 2, two names)
            position    0   1   2 |  3   4  |    3     4    5     which positional embedding
            owner      -1  -1  -1 |  0   0  |    1     1    1     whose token; -1: the prompt's

        So "plant" reads SOT, v_1, v_2, "potted" and itself.

        Prompts that differ from class to class leave nothing to share: see _encode_own_prompts.
        """
        if prompt.ndim == 3:
            return self._encode_own_prompts(prompt, endings)

        # The two rows of the example above, and where the last tokens stand in the sequence.
        prefix_length = 1 + len(prompt)
        positions = list(range(prefix_length))
        owners = [-1] * prefix_length
        token_ids = []  # of all endings
        last_places = []
        for c, ending in enumerate(endings):
            token_ids += ending
            positions += range(prefix_length, prefix_length + len(ending))
            owners += [c] * len(ending)
            last_places.append(len(positions) - 1)

        device = prompt.device
        position = torch.tensor(positions, device=device)                       # (T,)
        owner = torch.tensor(owners, device=device)                             # (T,)
        token_ids = torch.tensor(token_ids, device=device)                      # (T - 1 - L,)
        ends = torch.tensor(last_places, device=device)                         # (C,)

        # mask[i, j]: may token i (row) read token j (column)?
        not_after = position <= position[:, None]                               # (T, T)
        of_prompt = owner == -1                                                 # (T,)
        same_owner = owner == owner[:, None]                                    # (T, T)
        mask = not_after & (of_prompt | same_owner)                             # (T, T)

        start = self.token_embedding.weight[self.sot][None]                     # (1, E_t)
        names = self.token_embedding(token_ids)                                 # (T - 1 - L, E_t)
        x = torch.cat([start, prompt, names]) + self.positional_embedding[position]
        x = x[None]                                                             # (1, T, E_t)

        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, mask)

        # Nothing comes after the last block, so it is computed for the last tokens alone.
        x = last(x, mask[ends], rows=ends)[0]                                   # (C, E_t)
        return self.ln_final(x) @ self.text_projection                          # (C, D)

    def _encode_own_prompts(self, prompts, endings):
        """encode_prompted for a prompt (C, L, E_t) per class: C texts side by side.

        Shorter texts are filled up with EOTs at their end. The tower is causal, so the token that
        is read, the last of the text itself, does not see them.
        """
        C, L, _ = prompts.shape
        longest = max(len(ending) for ending in endings)
        token_ids = []
        last_places = []
        for ending in endings:
            filling = [self.eot] * (longest - len(ending))
            token_ids.append([*ending, *filling])
            last_places.append(L + len(ending))

        device = prompts.device
        token_ids = torch.tensor(token_ids, device=device)              # (C, longest)
        ends = torch.tensor(last_places, device=device)                 # (C,)

        start = self.token_embedding.weight[self.sot].expand(C, 1, -1)  # (C, 1, E_t)
        names = self.token_embedding(token_ids)                         # (C, longest, E_t)
        x = torch.cat([start, prompts, names], 1)                       # (C, T, E_t)
        x = x + self.positional_embedding[:x.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)

        x = x[torch.arange(C, device=device), ends]                     # (C, E_t)
        return self.ln_final(x) @ self.text_projection                  # (C, D)

    # ---- Weights ----

    @torch.no_grad()
    def reset_parameters(self):
        """OpenAI's initialization of the text tower, for both towers, with biases 0 (ours).

        For training from scratch and for tests. Returns the model.
        """
        for tower in (self.visual.transformer, self.transformer):
            width = tower.resblocks[0].ln_1.weight.numel()
            layers = len(tower.resblocks)

            # Each block adds two outputs to the residual stream. The more blocks, the smaller they
            # start, so that the sum of all has about the same size at any depth.
            into_std = width ** -0.5
            onto_stream_std = width ** -0.5 * (2 * layers) ** -0.5
            hidden_std = (2 * width) ** -0.5

            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=into_std)
                nn.init.normal_(block.attn.out_proj.weight, std=onto_stream_std)
                nn.init.normal_(block.mlp.c_fc.weight, std=hidden_std)
                nn.init.normal_(block.mlp.c_proj.weight, std=onto_stream_std)

                nn.init.zeros_(block.attn.in_proj_bias)
                nn.init.zeros_(block.attn.out_proj.bias)
                nn.init.zeros_(block.mlp.c_fc.bias)
                nn.init.zeros_(block.mlp.c_proj.bias)

        visual_std = self.visual.class_embedding.numel() ** -0.5            # 1 / sqrt(E_v)
        nn.init.normal_(self.visual.class_embedding, std=visual_std)
        nn.init.normal_(self.visual.positional_embedding, std=visual_std)
        nn.init.normal_(self.visual.proj, std=visual_std)

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=len(self.text_projection) ** -0.5)
        return self


# --------------------------------------------------------------------------------------------------
# Files: where they are, how they come, how they are written
#
# From here on nothing is about CLIP itself. A first reader may go on at tour, the end of this file.
# --------------------------------------------------------------------------------------------------

def sha256_of(path):
    """The sha256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
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
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the new name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        # An OSError without a number was not raised by the system: it is a sentence already.
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}); what was there before is "
                      "untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def download(url, path, sha256):
    """Fetches `url` to `path`. The file appears only when it is whole and its sha256 is right."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url} ({error}); fetch it elsewhere and put it at "
                      f"{path}") from error
    except RuntimeError as error:
        raise ValueError(f"{url} did not give the file with sha256 {sha256}; nothing was kept: try "
                         f"again, or fetch it elsewhere and put it at {path}") from error


def find_file(name):
    """The path of one of FILES in $CLIP_HOME, downloaded if missing.

    $CLIP_HOME is ~/.cache/clip unless set, the folder that OpenAI's own package uses.

    Errors: OSError (no download), ValueError (a file that is not the official one).
    """
    folder = Path(os.environ.get("CLIP_HOME", "~/.cache/clip")).expanduser()
    path = folder / name
    url, sha256 = FILES[name]

    if not path.exists():
        download(url, path, sha256)
    elif sha256_of(path) != sha256:
        raise ValueError(f"{path} is not the official {name} (its sha256 differs): delete it to "
                         "have it downloaded again")
    return path


# --------------------------------------------------------------------------------------------------
# Loading weights
#
# Checkpoints are pickles, and a pickle is a small program: unpickling one with Python's defaults
# runs whatever its author wrote. OpenAI's files are TorchScript archives, which carry code on top.
# Nothing here runs anything from a file: a state dict goes through torch.load(weights_only=True),
# and a TorchScript archive through an unpickler that knows tensors and nothing else.
# --------------------------------------------------------------------------------------------------

STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
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
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, record):
        """A storage: the archive's record data/0, data/1, ... as a flat tensor."""
        _, dtype, key, _, count = record
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype, count=count)  # raises if the record is too short


def read_torchscript(path):
    """All tensors of a TorchScript archive as {dotted name: tensor}; executes nothing of it.

    Such an archive is a zip: <root>/data.pkl holds the tree of modules, <root>/data/0, 1, ... the
    numbers. (torch.jit.load would run its code; torch.load(weights_only=True) refuses it.)
    """
    with zipfile.ZipFile(path) as archive:
        trees = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not trees:
            raise ValueError("it holds no data.pkl")
        tree = ArchiveUnpickler(archive, trees[0].removesuffix("/data.pkl")).load()

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


def read_state(path):
    """The tensors of a checkpoint file.

    Returns: the state dict, floating-point tensors as float32; and the merge list of its tokenizer
    (None: OpenAI's).
    Errors: FileNotFoundError, or ValueError for any file that cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}: give a file, or a name of "
                                f"{', '.join(MODELS)}")

    merges = None
    try:
        members = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()

        # Weights hardly compress. What claims to unpack to so much would only fill the memory.
        unpacked = sum(member.file_size for member in members)
        if unpacked > 10 * os.path.getsize(path):
            raise ValueError("it would unpack to more than ten times its size")

        # Only TorchScript archives have a folder of code.
        if any("/code/" in member.filename for member in members):
            tensors = read_torchscript(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if "state_dict" in tensors:
                merges = tensors.get("merges")
                tensors = tensors["state_dict"]

        # What ReCLIP's authors published holds a whole CLIP beside what was learnt.
        prefix = "module.clip."
        if any(key.startswith(prefix) for key in tensors):
            tensors = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

        # OpenAI's archives hold three plain numbers beside the weights; the shapes say the same.
        state = {}
        for key, value in tensors.items():
            if key in ("input_resolution", "context_length", "vocab_size"):
                continue
            state[key] = value.float() if value.is_floating_point() else value
    except Exception as error:  # whatever a broken or hostile file provokes ends in one sentence
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"cannot read CLIP weights from {path} (truncated, not a checkpoint, or "
                         f"unsafe): {reason}") from error
    return state, merges


def count_layers(state, prefix):
    """How many blocks a tower has: the different numbers after `prefix` in the keys."""
    numbers = set()
    for key in state:
        if key.startswith(prefix):
            numbers.add(key.removeprefix(prefix).split(".")[0])
    return len(numbers)


def build_clip(state, quick_gelu=True):
    """A CLIP of the sizes that the shapes in a state dict tell, without weights.

    It is on the meta device, where tensors have shapes but no memory, until the weights are
    assigned: so the model is never in memory twice.
    """
    embed_dim = state["text_projection"].shape[1]
    text_width = state["ln_final.weight"].shape[0]
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = state["visual.positional_embedding"].shape[0] - 1  # without the class token

    with torch.device("meta"):
        return CLIP(
            embed_dim=embed_dim,
            patch=patch,
            vision_width=vision_width,
            vision_layers=count_layers(state, "visual.transformer.resblocks."),
            grid=math.isqrt(patches),
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            text_width=text_width,
            text_layers=count_layers(state, "transformer.resblocks."),
            quick_gelu=quick_gelu,
        )


def load_clip(name_or_path="ViT-B/16", device="cpu", quick_gelu=True):
    """CLIP in eval mode, float32, frozen (no parameter requires a gradient).

    Args:
        name_or_path: a name of MODELS (in $CLIP_HOME, or downloaded; checked by sha256), or a file:
            one of OpenAI's TorchScript archives of a ViT; a plain state dict, possibly as
            {"state_dict": ..., "merges": [...]} with its own tokenizer; or a rectification that
            ReCLIP's authors published, of which the CLIP inside is taken.
        device: where the model is to be.
        quick_gelu: False for OpenCLIP's LAION weights, which were trained with the exact GELU.

    Errors: FileNotFoundError, OSError (download), ValueError (any unfit file), one sentence each.
    """
    if name_or_path in MODELS:
        path = find_file(MODELS[name_or_path])
    else:
        path = Path(name_or_path)

    state, merges = read_state(path)
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{path} is a CLIP with a ResNet; the features of patches need a ViT, "
                         "such as ViT-B/16")

    try:
        clip = build_clip(state, quick_gelu)
        clip.load_state_dict(state, strict=True, assign=True)
        if merges is not None:
            clip.tokenizer = Tokenizer([(left, right) for left, right in merges])
            if clip.tokenizer.end != clip.eot:
                raise ValueError("its merge list does not fit its token embedding")
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the weights of a ViT CLIP: {reason}") from error

    if name_or_path in MODELS:
        clip.source = name_or_path
    else:
        clip.source = str(path.resolve())
    clip.sha256 = sha256_of(path)
    return clip.eval().requires_grad_(False).to(device)


# --------------------------------------------------------------------------------------------------
# A guided tour: python clip_model.py
# --------------------------------------------------------------------------------------------------

def show(name, tensor, note):
    """One line of a tour: name, shape, range, what it is."""
    shape = str(tuple(tensor.shape))
    print(f"{name:<22}{shape:<18}{tensor.min().item():8.3f} .. {tensor.max().item():<8.3f}{note}")


@torch.no_grad()
def tour():
    """A piece of an image of `shapes` and its class names, through this repository's small CLIP."""
    from datasets import DATA, open_split  # for the tour alone; nothing else here needs it

    clip = load_clip(DATA["shapes"].clip)
    names = DATA["shapes"].classes
    split = open_split("shapes", None, "train")

    H, W = 64, 48  # not square, so that h and w differ
    image = split.image(0)[None, :, :H, :W].float() / 255                   # (1, 3, H, W)
    truth = split.truth(0)[:H, :W]                                          # (H, W)

    patch = clip.visual.patch
    h, w = math.ceil(H / patch), math.ceil(W / patch)
    print(f"B = 1 image of H x W = {H} x {W} pixels, h x w = {h} x {w} patches, n = {h * w}")
    print(f"N = C = {len(names)} classes, L = 5 prompt vectors")
    print(f"D = {clip.text_projection.shape[1]}, E_v = {clip.visual.class_embedding.shape[0]}, "
          f"E_t = {clip.text_projection.shape[0]}: all the same in this small CLIP")
    print()
    print(f"{'name':<22}{'shape':<18}{'smallest .. largest':<28}what it is")

    # The image, as pixels, as tokens, as one vector, and as one vector per patch.
    pixels = normalize_pixels(image)
    embedded, _ = clip.visual.embed(pixels)
    Z = clip.encode_image_dense(pixels)
    show("image", image, "(B, 3, H, W), in [0, 1]")
    show("normalize_pixels", pixels, "(B, 3, H, W)")
    show("positional_grid", clip.visual.positional_grid(h, w), "(1, E_v, h, w): p of Sec. 3.3")
    show("embed", embedded, "(B, 1 + n, E_v): class token, patches")
    show("encode_image", clip.encode_image(pixels), "(B, D): the whole image")
    show("encode_image_dense", Z, "(B, D, h, w): Z of Sec. 3.1, not normalized yet")

    # The texts. Any L vectors do as a prompt: here those of the vocabulary's first five tokens.
    tokens = clip.tokenize([f"a photo of a {name}" for name in names])
    texts = clip.encode_text(tokens)
    prompt = clip.token_embedding.weight[:5]
    endings = [[*clip.tokenizer.encode(name), clip.eot] for name in names]
    prompted = clip.encode_prompted(prompt, endings)
    show("tokenize", tokens, "(N, context_length): [SOT] ids [EOT] 0 ..")
    show("encode_text", texts, "(N, D): one vector per text")
    show("encode_prompted", prompted, "(C, D): the texts of Eq. (1)")

    # What all of it is for: how much does each patch resemble each text?
    cosines = torch.einsum("bdhw,nd->bnhw", F.normalize(Z, dim=1), F.normalize(texts, dim=1))
    show("their cosines", cosines, "(B, N, h, w): M_q of Sec. 3.1, with one text per class")

    print()
    print("Left, the text that each patch resembles most; right, what its middle pixel shows")
    print("(a dot: the ground, which is no class). ReCLIP is about the difference.")
    print("    " + ", ".join(f"{c} {name}" for c, name in enumerate(names)))
    nearest = cosines[0].argmax(dim=0)                                      # (h, w)
    middle = truth[patch // 2::patch, patch // 2::patch]                    # (h, w)
    for y in range(h):
        left = [str(c) for c in nearest[y].tolist()]
        right = [str(c) if c < len(names) else "." for c in middle[y].tolist()]
        print("    " + " ".join(left) + "      " + " ".join(right))


if __name__ == "__main__":
    tour()
