"""CLIP in one file: the tokenizer, the two encoders, the loader, and MaskCLIP's dense features.

What stands here
    Tokenizer, tokenize       text -> token ids, identical to OpenAI's (byte-pair encoding)
    CLIP                      the model; its parameter names are the keys of OpenAI's checkpoints
      .encode_image           (B, 3, H, W) -> (B, D)        one vector a picture
      .encode_image_dense     (B, 3, H, W) -> (B, D, h, w)  one vector a patch (Sec. 3.1; or another of ATTENTIONS)
      .encode_text            (N, 77) -> (N, D)             one vector a text
      .encode_prompted        [SOT] v_1..v_L [name] [EOT] -> (C, D)  (the text encoder under Eq. 1)
    load_clip                 official TorchScript archives and plain state dicts, without running code from them

Symbols
    B pictures, N texts or tokens, C classes; H x W pixels, h x w patches (h = ceil(H / patch size)), n = h*w
    D joint width of image and text, E width of a transformer (ViT-B/16: 768, 512), L prompt vectors, T names' tokens

Copied elsewhere, it is used like this:
    clip = load_clip("ViT-B/16")
    text = clip.encode_text(clip.tokenize(["a photo of a cat.", "a photo of a dog."]))  # (2, D)
    dense = clip.encode_image_dense(normalise(pictures))                                # (B, D, h, w)

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021) and
openai/CLIP (MIT licence) for the model; ResidualAttentionBlock.read_patches names those of the dense features.
"""

import gzip
import hashlib
import html
import http.client
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

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, in [0, 1] units (openai/CLIP)
STD = (0.26862954, 0.26130258, 0.27577711)

ATTENTIONS = ("maskclip", "sclip", "clearclip", "naclip")  # how CLIP.encode_image_dense may read the last block

# file name -> (address, sha256). For the weights, the address carries the sha256 itself.
FILES = {
    "ViT-B-16.pt": (
        "https://openaipublic.azureedge.net/clip/models/"
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "bpe_simple_vocab_16e6.txt.gz": (
        "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}


def normalise(images):
    """Pictures in [0, 1], (B, 3, H, W), as CLIP wants them: minus its mean, over its standard deviation."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


# --- Files: where they are, how they come, how they are written ---------------------------------------------

def sha256_of(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_atomically(path):
    """Yields a temporary path, renamed onto `path` only when the block ends well: whatever happens in between (a kill,
    a full disk), `path` holds either its old content or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the new name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter; an OSError without a number is a sentence
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}): is the disk full? What was there "
                      "before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def download(url, path, sha256):
    """Fetches `url` to `path`, checks its sha256, and leaves nothing behind when either fails."""
    with written_atomically(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                total, done = int(answer.headers.get("Content-Length") or 0), 0
                while block := answer.read(1 << 20):
                    done += file.write(block)
                    print(f"\r{Path(path).name}: {done >> 20} of {total >> 20 or '?'} MB", end="", file=sys.stderr)
                print(file=sys.stderr)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"cannot download {url} ({error}); fetch it elsewhere and put it at {path}") from error
        if sha256_of(temporary) != sha256:
            raise ValueError(f"{url} did not give the file with sha256 {sha256}; nothing was kept, try again "
                             f"or put the right file at {path}")


def find_file(name):
    """Path of one of FILES in $CLIP_HOME (default ~/.cache/clip, OpenAI's own cache), downloaded if missing."""
    path = Path(os.environ.get("CLIP_HOME", "~/.cache/clip")).expanduser() / name
    url, sha256 = FILES[name]
    if not path.exists():
        download(url, path, sha256)
    elif sha256_of(path) != sha256:
        raise ValueError(f"{path} is not the official {name} (its sha256 differs): delete it to download it again")
    return path


# --- Tokenizer: text -> ids ---------------------------------------------------------------------------------

@lru_cache
def byte_alphabet():
    """{byte: printable character}: byte-pair encoding works on text, so each of the 256 bytes gets a visible
    character. Printable ones stand for themselves; the rest (spaces, controls) are numbered from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Tokenizer:
    """CLIP's byte-pair encoding: the same ids as OpenAI's `clip.tokenize` on any text.
    merges: (left, right) pairs in order of rank. The vocabulary follows from them: 256 byte characters, the same 256
    at the end of a word ("</w>"), one token a merge, start and end of text.
    """

    WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
                          r"|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, merges):
        letters = list(byte_alphabet().values())
        vocabulary = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        self.start, self.end = len(vocabulary) - 2, len(vocabulary) - 1
        # words repeat: each is merged once
        self._of_word = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    @classmethod
    @lru_cache  # read once, one copy for all models
    def from_file(cls, path=None):
        """From a bpe_simple_vocab_16e6.txt.gz: the given one, else the one in $CLIP_HOME, else a download."""
        path = Path(path) if path else find_file("bpe_simple_vocab_16e6.txt.gz")
        count = 49152 - 256 - 2  # CLIP uses the first 48,894 merges: with bytes and specials, 49,408 tokens
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:count + 1]  # behind a title, the merges by rank
            merges = [(left, right) for left, right in map(str.split, lines)]
            if len(merges) < count:
                raise ValueError(f"{len(merges)} merges")
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not CLIP's BPE vocabulary of {count:,} merges ({error}); delete it to have "
                             "it downloaded again") from error
        return cls(merges)

    def encode(self, text):
        """Ids of one text, without start and end. As OpenAI does: Unicode is mended, HTML entities resolved (twice),
        white space folded, upper case lowered."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in self.WORDS.findall(text) for i in self._word_ids(word)]

    def _word_ids(self, word):
        if word not in self._of_word:
            parts = [byte_alphabet()[b] for b in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:  # merge the pair of lowest rank, everywhere, until no pair is known
                best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
                if best not in self.rank:
                    break
                merged = []
                for part in parts:
                    if merged and (merged[-1], part) == best:
                        merged[-1] += part
                    else:
                        merged.append(part)
                parts = merged
            self._of_word[word] = [self.ids[part] for part in parts]
        return self._of_word[word]

    def __call__(self, texts, context_length=77, truncate=False):
        """str or list of N str -> [SOT] ids [EOT] 0 0 ..., (N, context_length) int64. A text too long is an error that
        names it, or is cut, its last place kept for EOT, when `truncate` is true."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)  # (N, context_length)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)]
            if len(ids) >= context_length and not truncate:
                raise ValueError(f"text of {len(ids) + 1} tokens does not fit into {context_length}: {text!r}; "
                                 "shorten it or pass truncate=True")
            ids = ids[:context_length - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def tokenize(texts, context_length=77, truncate=False, bpe_path=None):
    """OpenAI's vocabulary: str or list of N str -> (N, context_length) int64."""
    return Tokenizer.from_file(bpe_path)(texts, context_length, truncate)


# --- Transformer --------------------------------------------------------------------------------------------

class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; the weights were trained with it, so exact GELU would be wrong."""

    def forward(self, x):
        return x * (1.702 * x).sigmoid_()  # in place: one tensor of four times the width fewer


class Attention(nn.Module):
    """Multi-head self-attention; parameters named like nn.MultiheadAttention's, as in the checkpoint."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # query, key and value, stacked
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x, part):
        """part 0, 1, 2: queries, keys, values of x (B, N, E) -> (B, heads, N, E / heads)"""
        weight, bias = self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, mask=None, rows=None):
        """x (B, N, E); mask, boolean, true = may be read: (N, N), or (len(rows), N) when `rows` names the
        positions whose output is wanted; mask "causal" lets each position read itself and what is before."""
        q = self.project(x if rows is None else x[:, rows], 0)  # (B, heads, N or rows, E / heads)
        k, v = self.project(x, 1), self.project(x, 2)           # (B, heads, N, E / heads)
        causal = isinstance(mask, str)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))    # (B, N or rows, E)


def nearness(h, w, like, std=5.0):
    """NACLIP's bonus for neighbours (its released std): exp(-d^2 / (2 std^2)) for patches of the h x w grid that are d
    patches apart, 0 for the class token: (n, 1 + n), of the type and on the device of `like`."""
    sides = (torch.arange(side, dtype=like.dtype, device=like.device) for side in (h, w))
    rows, columns = (torch.exp(-(i[:, None] - i).square() / (2 * std ** 2)) for i in sides)  # (h, h), (w, w)
    return F.pad(torch.kron(rows, columns), (1, 0))  # a Gaussian of d is one of the rows times one of the columns


class ResidualAttentionBlock(nn.Module):
    """x + attention, then x + two-layer perceptron, both behind a layer norm (pre-norm)."""

    def __init__(self, width, heads, activation=QuickGELU):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=activation(),
                                             c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask=None, rows=None):
        """(B, N, E) -> (B, N, E), or (B, len(rows), E) where only some positions are needed"""
        x = (x if rows is None else x[:, rows]) + self.attn(self.ln_1(x), mask, rows)
        return x + self.mlp(self.ln_2(x))

    def value_path(self, x):
        """MaskCLIP's last block (the paper's Sec. 3.1): no query and no key; each position keeps its own
        value, projected, which equals a 1x1 convolution of the grid. The paper does not mention the residual
        and the perceptron; the released code keeps both, as MaskCLIP does, and so do we. (B, N, E) -> same"""
        x = x + self.attn.out_proj(self.attn.project(self.ln_1(x), 2).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))

    def read_patches(self, x, size, attention):
        """The last block as segmenters read it: tokens (B, 1 + n, E) of a grid of `size` (h, w) -> (B, n, E).
        "maskclip"   MaskCLIP (Zhou et al., ECCV 2022), the paper's: value_path
        "sclip"      SCLIP (Wang et al., ECCV 2024): queries read queries, keys read keys, and both are added
        "clearclip"  ClearCLIP (Lan et al., ECCV 2024): queries read queries; no residual, no perceptron
        "naclip"     Pay Attention to Your Neighbours (Hajimiri et al., WACV 2025), its "reduced" form: keys read keys,
                     near ones more; no residual, no perceptron
        """
        if attention == "maskclip":
            return self.value_path(x[:, 1:])                        # the class token ends here
        y, read = self.ln_1(x), F.scaled_dot_product_attention
        q, k, v = (self.attn.project(y, part) for part in range(3))  # (B, heads, 1 + n, E / heads)
        if attention == "naclip":
            out = read(k[:, :, 1:], k, v, attn_mask=nearness(*size, v))
        else:
            out = read(q[:, :, 1:], q, v)                           # (B, heads, n, E / heads)
        if attention == "sclip":
            out = out + read(k[:, :, 1:], k, v)
        out = self.attn.out_proj(out.transpose(1, 2).flatten(2))    # (B, n, E)
        if attention != "sclip":
            return out
        x = x[:, 1:] + out
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, activation):
        super().__init__()
        heads = max(1, width // 64)  # OpenAI's rule; a state dict does not tell the number of heads
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))


class VisionTransformer(nn.Module):
    def __init__(self, patch, width, layers, grid, output_dim, activation=QuickGELU):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))  # class token first
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim))

    def positional_grid(self, h, w):
        """The patches' positional embedding, bicubically resized: (1, E, h, w). Also p in Sec. 3.3."""
        grid = self.positional_embedding[1:].T.unflatten(1, (self.grid, self.grid))[None]  # (1, E, grid, grid)
        if (h, w) == (self.grid, self.grid):
            return grid
        return F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)

    def embed(self, images):
        """Normalised pictures (B, 3, H, W) -> tokens (B, 1 + n, E) and the grid's size (h, w).
        H and W that are no multiple of the patch are padded right and bottom with zeros (the mean colour);
        `to_pixels` cuts what lies over the padding off again."""
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % self.patch, 0, -H % self.patch))
        x = self.conv1(images)                                                      # (B, E, h, w)
        h, w = x.shape[-2:]
        x = (x + self.positional_grid(h, w)).flatten(2).transpose(1, 2)             # (B, n, E)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first.to(x.dtype), x], dim=1)), (h, w)        # (B, 1 + n, E)

    def before_last(self, images):
        """The tokens (B, 1 + n, E) as the last block finds them, and the grid's size (h, w)."""
        x, size = self.embed(images)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x, size


class CLIP(nn.Module):
    """CLIP with a vision transformer. load_clip sets .tokenizer, .source (name or path) and .sha256 of its file."""

    def __init__(self, embed_dim, patch, vision_width, vision_layers, grid, context_length, vocab_size,
                 text_width, text_layers, quick_gelu=True):
        super().__init__()
        activation = QuickGELU if quick_gelu else nn.GELU
        self.visual = VisionTransformer(patch, vision_width, vision_layers, grid, embed_dim, activation)
        self.transformer = Transformer(text_width, text_layers, activation)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # exp of it is 1 / tau
        self.context_length, self.input_resolution = context_length, grid * patch  # tokens; pixels, a square's side
        self.sot, self.eot = vocab_size - 2, vocab_size - 1  # ids of start and end of text
        self.tokenizer, self.source, self.sha256, self.quick_gelu = None, None, None, quick_gelu

    def tokenizer_or_default(self):
        tokenizer = self.tokenizer or Tokenizer.from_file()
        if tokenizer.end != self.eot:
            raise ValueError(f"{self.source} has {self.eot + 1} tokens, the tokenizer {tokenizer.end + 1}: save the "
                             "weights as {'state_dict': ..., 'merges': ...} with their own merge list")
        return tokenizer

    def tokenize(self, texts, truncate=False):
        """In this model's own vocabulary and length; OpenAI's if the weights brought none. -> (N, context)"""
        return self.tokenizer_or_default()(texts, self.context_length, truncate)

    def encode_image(self, images):
        """Normalised pictures (B, 3, H, W) -> (B, D), not normalised."""
        x, _ = self.visual.before_last(images)                                      # (B, 1 + n, E)
        x = self.visual.transformer.resblocks[-1](x, rows=[0])[:, 0]                # (B, E): only the class token
        return self.visual.ln_post(x) @ self.visual.proj                            # (B, D)

    def encode_image_dense(self, images, attention="maskclip"):
        """Normalised pictures (B, 3, H, W) -> patch features Z in the joint space (B, D, h, w), not normalised,
        with h = ceil(H / patch). attention: one of ATTENTIONS (read_patches); "maskclip" is the paper's (Sec. 3.1)."""
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; it must be one of {', '.join(ATTENTIONS)}")
        x, size = self.visual.before_last(images)                                   # (B, 1 + n, E)
        x = self.visual.transformer.resblocks[-1].read_patches(x, size, attention)  # (B, n, E)
        x = self.visual.ln_post(x) @ self.visual.proj                               # (B, n, D)
        return x.transpose(1, 2).unflatten(2, size)                                 # (B, D, h, w)

    def to_pixels(self, grid, height, width):
        """(B, C, h, w) on patches -> (B, C, height, width) on pixels, bilinear, the padded part cut off."""
        size = [side * self.visual.patch for side in grid.shape[-2:]]
        return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    def encode_text(self, tokens):
        """(N, context) int64 -> (N, D), not normalised: the state at EOT, which has the largest id."""
        end = tokens.argmax(-1)                             # (N,)
        tokens = tokens[:, :int(end.max()) + 1]             # causal: what stands behind EOT is never read
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (N, length, E)
        for block in self.transformer.resblocks:
            x = block(x, "causal")
        x = x[torch.arange(len(x)), end]                    # (N, E)
        return self.ln_final(x) @ self.text_projection      # (N, D)

    def encode_prompted(self, prompt, names):
        """The texts [SOT] v_1..v_L [name] [EOT] (Eq. 1): prompt (L, E); names: C lists of token ids -> (C, D).

        The same as one text at a time, an order of magnitude faster. All share [SOT] v_1..v_L, and as the transformer
        is causal, the states of that prefix do not depend on what follows: it is encoded once. Behind it lie the names,
            SOT v_1 .. v_L | name_1 EOT | name_2 EOT | ... ,
        and the mask lets each token read the prefix and its own name only: 117 positions instead of 20 x 77 for VOC.
        Of the last block only the EOT positions are computed.
        """
        P, ends = 1 + len(prompt), [len(name) + 1 for name in names]
        ids = torch.tensor([i for name in names for i in (*name, self.eot)], device=prompt.device)      # (T,)
        place = torch.cat([torch.arange(P), *(P + torch.arange(n) for n in ends)]).to(prompt.device)    # (P+T,)
        owner = torch.repeat_interleave(torch.arange(-1, len(names)), torch.tensor([P, *ends])).to(prompt.device)
        mask = (place <= place[:, None]) & ((owner == -1) | (owner == owner[:, None]))            # (P+T, P+T)
        eot = P - 1 + torch.tensor(ends, device=prompt.device).cumsum(0)                                # (C,)

        start = self.token_embedding.weight[self.sot][None]                                             # (1, E)
        x = torch.cat([start, prompt, self.token_embedding(ids)]) + self.positional_embedding[place]
        x = x[None]                                                                               # (1, P+T, E)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, mask)
        x = last(x, mask[eot], rows=eot)[0]                                                             # (C, E)
        return self.ln_final(x) @ self.text_projection                                                  # (C, D)

    @torch.no_grad()
    def reset_parameters(self):
        """OpenAI's initialisation, for training from scratch and for tests; load_clip overwrites all of it."""
        for tower in (self.visual.transformer, self.transformer):
            width, layers = tower.resblocks[0].ln_1.weight.numel(), len(tower.resblocks)
            into, back = width ** -0.5, width ** -0.5 * (2 * layers) ** -0.5  # back: onto the residual stream
            for block in tower.resblocks:
                for weight, std in ((block.attn.in_proj_weight, into), (block.attn.out_proj.weight, back),
                                    (block.mlp.c_fc.weight, (2 * width) ** -0.5), (block.mlp.c_proj.weight, back)):
                    nn.init.normal_(weight, std=std)
                for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, *(block.mlp[i].bias for i in (0, 2))):
                    nn.init.zeros_(bias)
        scale = self.visual.class_embedding.numel() ** -0.5
        for tensor, std in ((self.visual.class_embedding, scale), (self.visual.positional_embedding, scale),
                            (self.visual.proj, scale), (self.token_embedding.weight, 0.02),
                            (self.positional_embedding, 0.01),
                            (self.text_projection, len(self.text_projection) ** -0.5)):
            nn.init.normal_(tensor, std=std)
        return self


# --- Loading ------------------------------------------------------------------------------------------------

def build_clip(state, quick_gelu=True):
    """A CLIP whose sizes are read off the shapes of its state dict, on the meta device (no weights yet)."""
    def layers(prefix):
        return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})

    embed_dim, text_width = state["text_projection"].shape[1], state["ln_final.weight"].shape[0]
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    with torch.device("meta"):
        return CLIP(embed_dim, patch, width, layers("visual.transformer.resblocks."), grid,
                    context_length=state["positional_embedding"].shape[0],
                    vocab_size=state["token_embedding.weight"].shape[0], text_width=text_width,
                    text_layers=layers("transformer.resblocks."), quick_gelu=quick_gelu)


def read_torchscript(path):
    """All tensors of a TorchScript archive as {dotted name: tensor}, without executing anything from it.

    Such an archive is a zip: data.pkl is the tree of modules, data/0, data/1, ... are the raw storages. The unpickler
    knows tensors and the module tree and refuses every other name, so a hostile file can do no more than fail.
    (torch.jit.load would run its code; torch.load(weights_only=True) refuses it.)
    """
    def tensor_from(flat, offset, size, stride, *unused):
        return flat.as_strided(size, stride, offset)  # raises when it would reach outside the storage

    known = {("torch", f"{name}Storage"): dtype for name, dtype in dict(
        Half=torch.float16, BFloat16=torch.bfloat16, Float=torch.float32, Double=torch.float64, Long=torch.int64,
        Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}
    known |= {("torch._utils", "_rebuild_tensor_v2"): tensor_from, ("collections", "OrderedDict"): dict}

    class Unpickler(pickle._Unpickler):  # the one in Python: the one in C makes room for any number of objects
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return SimpleNamespace  # for every class of the archive: it keeps attributes and runs nothing
            if module == "torch.jit._pickle" and name.startswith("build_"):
                return list
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return known[module, name]

        def persistent_load(self, record):
            _, dtype, key, _, count = record
            raw = bytearray(archive.read(f"{root}/data/{key}"))
            return torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)

    def flatten(module, prefix=""):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, SimpleNamespace):
                yield from flatten(value, prefix + name + ".")

    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        return dict(flatten(Unpickler(archive.open(f"{root}/data.pkl")).load()))


def read_state(path):
    """The tensors of a checkpoint file, fp32, and the merge list of its tokenizer (None: OpenAI's)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}: give --clip a file or the name 'ViT-B/16'")
    merges = None
    try:
        members = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        if sum(member.file_size for member in members) > 10 * os.path.getsize(path):
            raise ValueError("it would unpack to more than ten times its size")
        if any("/code/" in member.filename for member in members):
            state = read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if "state_dict" in state:
                state, merges = state["state_dict"], state.get("merges")
        scalars = ("input_resolution", "context_length", "vocab_size")  # they stand beside the weights
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()
                 if key not in scalars}
    except Exception as error:  # whatever a broken or hostile file provokes ends in one sentence
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"cannot read CLIP weights from {path} (truncated, not a checkpoint, or unsafe): "
                         f"{reason}") from error
    return state, merges


def load_clip(name_or_path="ViT-B/16", device="cpu", quick_gelu=True):
    """CLIP in eval mode, fp32, frozen.
    name_or_path: "ViT-B/16" ($CLIP_HOME or a download, checked by sha256), or a file: an official TorchScript
        archive, or a plain state dict, possibly as {"state_dict": ..., "merges": [...]} with its own tokenizer.
    quick_gelu: False for OpenCLIP's LAION weights, which were trained with the exact GELU.
    Errors: FileNotFoundError, OSError (download), ValueError (any unfit file), each with one sentence.
    """
    path = find_file("ViT-B-16.pt") if name_or_path == "ViT-B/16" else Path(name_or_path)
    state, merges = read_state(path)
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{path} is a CLIP with a ResNet; ReCLIP needs the patches of a ViT, such as ViT-B/16")
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
    clip.source = name_or_path if name_or_path == "ViT-B/16" else str(path.resolve())
    clip.sha256 = sha256_of(path)
    return clip.eval().requires_grad_(False).to(device)


# --- A guided tour ------------------------------------------------------------------------------------------

def show(name, tensor, note):
    """One line of a tour: name, shape, range, what it is."""
    print(f"{name:<22}{str(tuple(tensor.shape)):<18}{tensor.min().item():8.3f} .. {tensor.max().item():<8.3f}{note}")


@torch.no_grad()
def tour():
    """One picture of shapes and three texts through the tiny CLIP."""
    from datasets import DATA, open_split  # for the tour alone; the module does not need it
    clip, split = load_clip(DATA["shapes"].clip), open_split("shapes", None, "train")
    picture = split.picture(0)[None].float() / 255
    names = DATA["shapes"].classes[:3]
    tokens = clip.tokenize([f"a photo of a {name}" for name in names])
    prompt = clip.token_embedding.weight[0].repeat(5, 1)
    show("picture", picture, "(B, 3, H, W) in [0, 1]")
    show("tokens", tokens, f"(N, context): [SOT] ids [EOT] 0 .. of 'a photo of a {' / '.join(names)}'")
    show("positional_grid", clip.visual.positional_grid(8, 8), "(1, E, h, w): p of Sec. 3.3")
    show("encode_image", clip.encode_image(normalise(picture)), "(B, D): the whole picture")
    show("encode_image_dense", clip.encode_image_dense(normalise(picture)), "(B, D, h, w): Z of Sec. 3.1")
    show("encode_text", clip.encode_text(tokens), "(N, D)")
    show("encode_prompted", clip.encode_prompted(prompt, [clip.tokenizer.encode(name) for name in names]),
         "(C, D): [SOT] v_1..v_5 [name] [EOT] of Eq. (1)")


if __name__ == "__main__":
    tour()
