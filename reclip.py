"""ReCLIP (Sec. 3): CLIP's two biases, learnt without labels and subtracted; then the losses of its student.

What stands here, in the paper's order
    PROMPTS, query_text_features    Sec. 3.1   W_q, the frozen classifier
    ReferencePrompt                 Eq. (1)    W_r, from learnable word vectors: class-preference bias
    PositionalBias, ConstantBias    Sec. 3.3   M_p, from CLIP's positional embedding: space-preference bias; its control
    bias_logits, rectify_logits     Eq. (2, 3) M_b = M_r + M_p;  M = M_q - M_b
    gumbel_softmax_masks            Eq. (4)    differentiable hard masks
    image_level_labels              Sec. 3.4   which classes does the picture hold?
    masked_features, contrastive_loss  Eq. (5)
    ReCLIP                          all of that as one module, with save and load
    segment, slide                  masks of pixels from logits of patches; sliding windows
    mask_guided_loss, feature_guided_loss, text_guided_loss, distillation_loss   Eq. (6), (7), Sec. 3.5, Eq. (8)

Symbols
    B pictures, C classes, D joint width of CLIP; H x W pixels, h x w patches, n = h*w
    L prompt vectors, E width of CLIP's transformers
    Z    features            (B, D, h, w)  CLIP's patch features, each of length 1
    W_q  query text features (C, D)        W_r  reference text features (C, D)
    M_q  query_logits, M_r reference_logits, M_p positional_logits, M rectified_logits: (B, C, h, w)
    (the paper writes n x C for one picture; we keep the grid, h x w = n, and the batch)

Copied elsewhere (with clip_model.py), it is used like this:
    model = ReCLIP(load_clip("ViT-B/16"), ["cat", "dog", "grass"])   # pictures in [0, 1], (B, 3, H, W)
    labels = model.image_labels(thumbnails, threshold=23, top_k=2)   # thumbnails (B, 3, 224, 224)
    loss = model.loss(model.features(pictures), labels); loss.backward()
    masks = model.eval()(pictures).rectified.argmax(1)               # (B, h, w)
    mask = segment(model(picture).rectified, model.cell, (H, W), (H, W))  # (H, W)

Where the paper and its authors' released code differ, a comment says so and a named argument offers both.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_model import ATTENTIONS, load_clip, normalise, show, written_atomically

IGNORE = 255  # in masks: no class


# --- Sec. 3.1: the Query -----------------------------------------------------------------------------------

# 80 templates of CLIP's ImageNet ensemble and 5 "in the scene" ones (MaskCLIP's list), built from their parts.

_PHOTOS = ("bad", "black and white", "blurry", "bright", "close-up", "cropped", "dark", "good", "jpeg corrupted",
           "low resolution", "pixelated")
_WORKS = ("doodle", "drawing", "painting", "photo", "rendering", "rendition", "sculpture", "sketch", "tattoo")
_LOOKS = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MADE = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")

PROMPTS = tuple(template.replace("[a]", article) for article in ("a", "the") for template in (
    *(f"a {word} photo of [a] {{}}." for word in _PHOTOS),
    *(f"a {word} of [a] {{}}." for word in _WORKS),
    *(f"a photo of [a] {word} {{}}." for word in _LOOKS),
    *(f"[a] {word} {{}}." for word in _MADE),
    "art of [a] {}.", "graffiti of [a] {}.", "itap of [a] {}.", "[a] {} in a video game.",
    "there is [a] {} in the scene.", "this is [a] {} in the scene.",
)) + ("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.",
      "this is one {} in the scene.")


@torch.no_grad()
def query_text_features(clip, class_names, prompts=PROMPTS):
    """W_q (Sec. 3.1): per class the mean of the normalised text features of all prompts, normalised: (C, D).
    "sofa | couch" is one class: both names go into the mean."""
    device, rows = clip.logit_scale.device, []
    for name in class_names:
        texts = [prompt.format(synonym.strip()) for synonym in name.split("|") for prompt in prompts]
        features = F.normalize(clip.encode_text(clip.tokenize(texts).to(device)), dim=-1)  # (texts, D)
        rows.append(F.normalize(features.mean(0), dim=-1))
    return torch.stack(rows)                                                                # (C, D)


# --- Sec. 3.2: the Reference, class-preference bias ---------------------------------------------------------

class ReferencePrompt(nn.Module):
    """Eq. (1): R_i = [v_1][v_2]...[v_L][CLS], the same L learnable vectors for all classes; () -> W_r (C, D).

    norm: the paper does not say how long W_r is. "frobenius" (released) divides by the norm of the whole
        C x D matrix, so that a row has length about 1/sqrt(C) and M_r is a mild correction to M_q;
        "class" gives each row length 1.
    """

    def __init__(self, clip, class_names, length=73, norm="frobenius"):
        super().__init__()
        if norm not in ("frobenius", "class"):
            raise ValueError(f"reference_norm is {norm!r}; it must be 'frobenius' or 'class'")
        text = clip.tokenizer_or_default()
        self.names = [text.encode(name.split("|")[0]) for name in class_names]
        # Sec. 3.2 has 73 = 77 - 2 (start, end) - 2 (name), whatever the name; the released code cuts longer
        # names off. We shorten the prompt instead, so that the longest name fits.
        length = min(length, clip.context_length - 2 - max(map(len, self.names)))
        if length < 1:
            raise ValueError(f"no room for a prompt: of this CLIP's {clip.context_length} tokens the longest class "
                             f"name needs {max(map(len, self.names))}, or prompt_length is below 1")
        # Released: all vectors start as the embedding of token 0 ("!"). They leave each other because each
        # stands at another place of the text.
        self.vectors = nn.Parameter(clip.token_embedding.weight[0].detach().repeat(length, 1))  # (L, E)
        self.norm = norm

    def forward(self, clip):
        W_r = clip.encode_prompted(self.vectors, self.names)                                    # (C, D)
        return W_r / (W_r.norm() if self.norm == "frobenius" else W_r.norm(dim=-1, keepdim=True))


# --- Sec. 3.3: the positional net, space-preference bias ----------------------------------------------------

class PositionalBias(nn.Module):
    """Sec. 3.3: three 3x3 convolutions, each with batch norm, over CLIP's positional embedding:
    (1, E, h, w) -> M_p (1, channels, h, w), the same for all pictures of one size.

    channels: the paper has one, shared by all classes (Eq. 2). A logit that all classes share cancels in
        every softmax and argmax over classes: it can change no mask and receives no gradient. The released
        code has C, one a class, and so do we by default; 1 is offered as the paper's text.
    last_relu: released: a ReLU behind the last batch norm too, hence M_p >= 0. The paper does not say.
    gain: fixed factor on the output (ours; 1 is the paper's). Behind a batch norm M_p starts with a spread of
        about 1, while the cosines of different classes differ by far less: a short run cannot recover from that.
        A small factor makes it start small and, as gradients carry it too, move calmly.
    """

    def __init__(self, width, channels, last_relu=True, gain=1.0):
        super().__init__()
        layers, sizes = [], (width, 512, 256, channels)  # widths as released
        for i, o in zip(sizes, sizes[1:]):
            conv = nn.Conv2d(i, o, 3, padding=1, bias=False)  # the batch norm has a bias already
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(o), nn.ReLU()]
        self.net = nn.Sequential(*(layers if last_relu else layers[:-1]))
        self.gain = gain

    def forward(self, positional_grid):
        return self.gain * self.net(positional_grid)


class ConstantBias(nn.Module):
    """A control in the place of PositionalBias (ours): one learnt number a class, the same at every position; it tells
    what the positional net gains by knowing the place. (1, E, h, w) -> (1, channels, h, w)

    gain: a number receives the gradients of all positions at once and would never settle; the factor calms it.
    """
    gain = 0.1

    def __init__(self, channels):
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(channels))  # (C,)

    def forward(self, positional_grid):
        return self.gain * self.numbers[:, None, None].expand(1, -1, *positional_grid.shape[2:])


# --- Sec. 3.4: rectification and its loss -------------------------------------------------------------------

def segmentation_logits(features, text_features):
    """The 1x1 convolution of Sec. 3.1, 3.2: Z (B, D, h, w), W (C, D) -> (B, C, h, w)"""
    return torch.einsum("bdhw,cd->bchw", features, text_features)


def bias_logits(reference_logits, positional_logits):
    """Eq. (2): M_b = M_r + M_p*; M_p (1, 1 or C, h, w) is expanded over pictures and classes."""
    return reference_logits + positional_logits


def rectify_logits(query_logits, bias, subtract=True):
    """Eq. (3): M = M_q - M_b; without subtract, Table 5's other choice: M_q + M_b"""
    return query_logits - bias if subtract else query_logits + bias


def gumbel_softmax_masks(rectified_logits, tau_1=0.001):
    """Eq. (4): hard masks with a gradient, (B, C, h, w) -> (B, C, h, w), one class a patch is 1, the rest 0.

    Forward: one-hot argmax of M / tau_1 + Gumbel noise, a sample of softmax(M / tau_1). Backward: the
    gradient of that softmax (straight-through). The temperature divides the logits before the noise is
    added, as released (logits x 1000); dividing noise and logits together would drown cosines in noise.
    """
    return F.gumbel_softmax(rectified_logits / tau_1, tau=1.0, hard=True, dim=1)


def image_level_labels(similarity, threshold, top_k):
    """Sec. 3.4: classes whose similarity (B, C) is above the threshold; if there is none, the top_k best, as
    released. -> (B, C) bool, at least one true a picture"""
    labels = similarity > threshold
    best = torch.zeros_like(labels).scatter_(1, similarity.topk(min(top_k, similarity.shape[1]), dim=1).indices, True)
    return torch.where(labels.any(1, keepdim=True), labels, best)


def label_histogram(labels, class_names):
    """How many pictures each class was found in, as text: do the names fit? labels: {name: class indices}"""
    counts = [sum(c in found for found in labels.values()) for c in range(len(class_names))]
    return "\n".join([f"pictures that each class was found in, of {len(labels)}:", *(
        f"  {name:<20}{n:6}  {'#' * math.ceil(40 * n / len(labels)) or 'never: try a synonym, name | synonym'}"
        for name, n in zip(class_names, counts))])


def masked_features(features, masks, pool="global"):
    """Z_g of Sec. 3.4, pooled: Z (B, D, h, w), masks (B, C, h, w) -> (B, C, D).

    pool: "global" divides by all n patches (paper and released: "global average pooling"), so a small mask
        gives a short vector and the loss also asks for area; "mask" divides by the mask's own area.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)
    if pool == "global":
        return total / masks[0, 0].numel()
    return total / masks.sum((2, 3)).clamp(min=1)[:, :, None]


def contrastive_loss(pooled, W_q, labels, tau):
    """Eq. (5): pooled masked features (B, C, D), W_q (C, D), image-level labels (B, C) bool -> scalar.

    S[c_k, j] is the product of pooled feature c_k with the text of class j; the masked feature of each class
    found in the picture must be told from all C texts. Mean over a picture's K classes, then over pictures.
    """
    S = torch.einsum("bcd,jd->bcj", pooled, W_q)                   # (B, C, C)
    log_p = F.log_softmax(S / tau, dim=-1).diagonal(dim1=1, dim2=2)  # (B, C): log of the fraction, j = c_k
    K = labels.sum(1).clamp(min=1)                                 # (B,)
    return -((log_p * labels).sum(1) / K).mean()


# --- All of it ----------------------------------------------------------------------------------------------

class Logits(NamedTuple):
    query: torch.Tensor       # M_q (B, C, h, w), cosines
    reference: torch.Tensor   # M_r (B, C, h, w)
    positional: torch.Tensor  # M_p (1, 1 or C, h, w)
    rectified: torch.Tensor   # M   (B, C, h, w)
    features: torch.Tensor    # Z   (B, D, h, w), each patch of length 1


class ReCLIP(nn.Module):
    """CLIP, frozen, with what is learnt about its biases. Pictures come in [0, 1], (B, 3, H, W).

    class_names: C strings. prompt_length: 0 for no Reference. positional_channels: None for C; 1 as the paper
    prints; 0 for no positional net (Table 4's second row). tau: None for 1 / (CLIP's own logit scale), 0.01 for
    OpenAI's. attention: how CLIP's last block is read (CLIP.encode_image_dense).
    The other arguments stand with the functions above that use them. Ablations and a control:
    query_learnable: Table 3, a learnt prompt behind M_q too. Both prompts start alike, M_q and M_r differ only in scale
        then. Eq. (5) keeps CLIP's W_q (ours): a loss that could move its own targets would have a trivial minimum.
    subtract: Table 5, False adds the bias. constant_bias: True puts ConstantBias in the place of the positional net.
    """

    def __init__(self, clip, class_names, *, prompt_length=73, reference_norm="frobenius", query_learnable=False,
                 positional_channels=None, positional_last_relu=True, positional_gain=1.0, constant_bias=False,
                 subtract=True, attention="maskclip", tau_1=0.001, tau=None, pool="global", prompts=PROMPTS, W_q=None):
        super().__init__()
        for name, value, choices in (("pool", pool, ("global", "mask")), ("attention", attention, ATTENTIONS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        names = [part.strip() for name in class_names for part in name.split("|")]
        if isinstance(class_names, str) or len(class_names) < 2 or len(set(names)) < len(names) or "" in names:
            raise ValueError(f"class names must be a list of two or more, all different, none empty: {class_names}")
        if positional_channels not in (None, 0, 1, len(class_names)):
            raise ValueError(f"positional_channels is {positional_channels}; it must be 0, 1 or the number of classes")
        self.settings = dict(
            prompt_length=prompt_length, reference_norm=reference_norm, query_learnable=query_learnable,
            positional_channels=positional_channels, positional_last_relu=positional_last_relu,
            positional_gain=positional_gain, constant_bias=constant_bias, subtract=subtract, attention=attention,
            tau_1=tau_1, tau=tau, pool=pool)
        self.clip, self.class_names = clip.requires_grad_(False).eval(), tuple(class_names)
        self.attention, self.subtract = attention, subtract
        self.tau_1, self.pool, self.cell = tau_1, pool, clip.visual.patch  # cell: side of a patch, pixels
        self.scale = 100  # factor on cosines where probabilities are wanted (as released)
        self.tau = 1 / clip.logit_scale.exp().item() if tau is None else tau
        self.register_buffer("W_q", query_text_features(clip, class_names, prompts) if W_q is None else W_q)  # (C, D)
        self.query = ReferencePrompt(clip, class_names, prompt_length, "class") if query_learnable else None
        self.reference = ReferencePrompt(clip, class_names, prompt_length, reference_norm) if prompt_length else None
        channels = len(class_names) if positional_channels is None else positional_channels
        width = clip.visual.class_embedding.numel()
        self.positional = None
        if constant_bias:
            self.positional = ConstantBias(len(class_names))
        elif channels:
            self.positional = PositionalBias(width, channels, positional_last_relu, positional_gain)
        self._known = {}  # in eval mode texts and M_p do not change: computed once
        self.register_load_state_dict_post_hook(lambda module, keys: module._known.clear())
        self.to(clip.logit_scale.device)

    def train(self, mode=True):
        self._known = {}
        super().train(mode)
        self.clip.eval()
        return self

    def _once(self, key, compute):
        if self.training:
            return compute()
        if key not in self._known:
            self._known[key] = compute().detach()
        return self._known[key]

    @torch.no_grad()
    def features(self, pictures):
        """Z: (B, 3, H, W) in [0, 1] -> (B, D, h, w), each patch of length 1. No gradient: CLIP is frozen."""
        return F.normalize(self.clip.encode_image_dense(normalise(pictures), self.attention), dim=1)

    def heads(self):
        """The weights of the two segmentation heads, W_q or what was learnt in its place, and W_r: (C, D) each."""
        query = self._once("query", lambda: self.query(self.clip)) if self.query else self.W_q
        if not self.reference:
            return query, torch.zeros_like(query)
        return query, self._once("reference", lambda: self.reference(self.clip))

    def rectify(self, Z):
        """Eq. (1)-(3) on features Z (B, D, h, w), all parts by name."""
        query, reference = (segmentation_logits(Z, W) for W in self.heads())
        h, w = Z.shape[2:]
        positional = Z.new_zeros(1, 1, h, w)
        if self.positional:
            positional = self._once((h, w), lambda: self.positional(self.clip.visual.positional_grid(h, w)))
        rectified = rectify_logits(query, bias_logits(reference, positional), self.subtract)
        return Logits(query, reference, positional, rectified, Z)

    def forward(self, pictures):
        return self.rectify(self.features(pictures))

    def to_pixels(self, grid, height, width):
        """(B, C, h, w) on patches -> (B, C, height, width) on pixels"""
        return self.clip.to_pixels(grid, height, width)

    @torch.no_grad()
    def image_similarity(self, thumbnails):
        """100 cos between whole pictures and W_q: (B, 3, R, R) in [0, 1] at CLIP's own resolution -> (B, C).
        The factor is as released, whatever this CLIP's logit scale, so that thresholds read like 23."""
        return 100 * F.normalize(self.clip.encode_image(normalise(thumbnails)), dim=-1) @ self.W_q.T

    def image_labels(self, thumbnails, threshold, top_k):
        """Pseudo-labels of Sec. 3.4 -> (B, C) bool."""
        return image_level_labels(self.image_similarity(thumbnails), threshold, top_k)

    def label_pictures(self, batches, threshold, top_k, progress):
        """Pseudo-labels of many pictures: batches of (thumbnails, names) -> {name: list of class indices}"""
        labels = {}
        for thumbnails, names in batches:
            found = self.image_labels(thumbnails.to(self.W_q.device), threshold, top_k)
            labels |= {name: row.nonzero()[:, 0].tolist() for name, row in zip(names, found.cpu())}
            progress(len(labels))
        return labels

    def loss(self, Z, labels):
        """Eq. (1)-(5): features Z (B, D, h, w), image-level labels (B, C) bool -> scalar."""
        logits = self.rectify(Z)
        masks = gumbel_softmax_masks(logits.rectified, self.tau_1)
        return contrastive_loss(masked_features(logits.features, masks, self.pool), self.W_q, labels, self.tau)

    # -- what was learnt, alone -------------------------------------------------------------------------

    def learnt(self):
        """The prompts' vectors, the positional net and W_q (kept so that loading needs no 85 x C texts)."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("clip.")}

    def fingerprint(self):
        """sha256 of what was learnt; the file's own would change with every writing of the same numbers."""
        digest = hashlib.sha256()
        for key, value in sorted(self.learnt().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path):
        """What was learnt, with class names, settings and CLIP's identity, in one file, written atomically."""
        content = {"learnt": self.learnt(), "class_names": list(self.class_names), "settings": self.settings,
                   "clip": {"source": self.clip.source, "sha256": self.clip.sha256,
                            "quick_gelu": self.clip.quick_gelu}}
        with written_atomically(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path, clip=None, device="cpu"):
        """A working segmenter from save's file, in eval mode. clip: None to load the one it was learnt on,
        from where it was found then; or that same CLIP, already loaded."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            learnt, names = content["learnt"], content["class_names"]
            source, sha256 = content["clip"]["source"], content["clip"]["sha256"]
        except FileNotFoundError:
            raise FileNotFoundError(f"no rectification at {path}: run python train.py --stage rectify first") from None
        except Exception as error:
            reason = str(error).split("\n")[0][:200]
            raise ValueError(f"{path} is not a rectification checkpoint, or is truncated: {reason}") from error
        clip = clip or load_clip(source, device, content["clip"].get("quick_gelu", True))
        if clip.sha256 != sha256:
            raise ValueError(f"{path} was learnt on another CLIP than {clip.source} (sha256 differs); give the "
                             f"right one with --clip")
        try:
            model = cls(clip, names, W_q=learnt["W_q"], **content["settings"])
            model.load_state_dict(learnt | {f"clip.{k}": v for k, v in clip.state_dict().items()}, strict=True)
        except Exception as error:
            raise ValueError(f"{path} does not fit this version: {' '.join(str(error).split())[:200]}") from error
        return model.to(device).eval()


# --- From logits to masks ----------------------------------------------------------------------------------

def strong_classes(logits, threshold, scale=100.0):
    """Indices of the classes whose best probability softmax(scale * M) in the picture reaches the threshold, of all
    classes if none does: (1, C, h, w) -> (kept,). Not in the paper; the released evaluation does it."""
    best = (scale * logits).softmax(1).amax((0, 2, 3))  # (C,)
    kept = best >= threshold
    return (kept | ~kept.any()).nonzero()[:, 0]


def segment(logits, cell, size, label_size, denoise=0.0, background=0.0, scale=100.0):
    """Logits on cells -> class index of each pixel of the label: (1, C, h, w) -> (H0, W0) uint8.

    cell: side of a cell of the grid in pixels of the picture that the network saw, whose size is (H, W): h cells may
        reach over its edge. The grid is read bilinearly at the centre of each of the label's pixels. (The released
        code stretches the padded grid onto the unpadded picture, which shifts masks by up to 15 pixels.)
    background: pixels whose best probability, softmax(scale * M), stays below it become IGNORE; 0: none.
    """
    kept = strong_classes(logits, denoise, scale)
    # place of each pixel in the grid, -1 .. 1, held between the centres of the outermost cells
    y, x = (((torch.arange(pixels, device=logits.device) + 0.5) * (2 * side / pixels / (cells * cell)) - 1)
            .clamp(1 / cells - 1, 1 - 1 / cells) for pixels, side, cells in zip(label_size, size, logits.shape[2:]))
    strips = []
    for rows in y.split(max(1, 2 ** 24 // (logits.shape[1] * len(x)))):  # a large picture would not fit into memory
        places = torch.stack(torch.meshgrid(x, rows, indexing="xy"), -1)                   # (1, rows, W0, 2) below
        pixels = F.grid_sample(logits, places[None], align_corners=False)[0]               # (C, rows, W0)
        strip = kept[pixels[kept].argmax(0)]                                               # (rows, W0)
        if background:
            strip[(scale * pixels).softmax(0)[kept].amax(0) < background] = IGNORE
        strips.append(strip.byte())
    return torch.cat(strips)


def slide(logits_of, picture, cell, window, stride):
    """Logits of a picture (1, 3, H, W) from overlapping windows of `window` pixels, `stride` apart: each sees its part
    alone, the logits that cover a cell are averaged -> (1, C, h, w), the grid that the whole picture would give.
    Windows start at whole cells, so that all share one grid: memory does not grow with the picture's pixels."""
    h, w = (-(-side // cell) for side in picture.shape[2:])
    n, step = window // cell, stride // cell
    top, left = ([min(i, max(cells - n, 0)) for i in range(0, max(cells - n, 0) + step, step)] for cells in (h, w))
    total, count = None, picture.new_zeros(h, w)
    for i, j in ((i, j) for i in top for j in left):
        part = logits_of(picture[..., i * cell:(i + n) * cell, j * cell:(j + n) * cell])   # (1, C, n or less, same)
        total = part.new_zeros(1, part.shape[1], h, w) if total is None else total
        total[..., i:i + n, j:j + n] += part
        count[i:i + n, j:j + n] += 1
    return total / count                                                                   # (1, C, h, w)


# --- Sec. 3.5: distillation --------------------------------------------------------------------------------

# The student is any module with .features, .rectify and .to_pixels (deeplab.py).


def sum_in_pieces(function, *tensors):
    """Sum of function(*piece) over pieces of the tensors (iterables of equal length), exactly, one piece in memory.

    Eq. 6 and 7 speak of maps at the picture's size: at 512 x 512 the features alone are 512 x 262,144 numbers a
    picture, twice. Their loss is a sum over pictures or channels, so each piece is enlarged, reduced
    to a number and forgotten; backward enlarges it once more instead of keeping it.
    """
    pieces = list(zip(*tensors))
    if len(pieces) == 1:  # small enough to be kept
        return function(*pieces[0])
    return sum(checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces)


def mask_guided_loss(student_logits, pseudo_labels, tau, to_pixels, piece=2 ** 25):
    """Eq. (6): cross-entropy at the picture's size, mean over all pixels. Student's M^D on its grid (B, C, h, w),
    the teacher's masks (B, H, W) int64 -> scalar; to_pixels is the student's.

    tau: the logits are cosines; as in Eq. (5) a temperature makes probabilities of them (Eq. 6 prints none).
    piece: elements of the enlarged logits in memory at once; the pictures go through in groups of that size.
    """
    def one(logits, labels):  # (pictures, C, h, w), (pictures, H, W)
        return F.cross_entropy(to_pixels(logits / tau, *labels.shape[1:]), labels, reduction="sum")

    together = max(1, piece // (student_logits.shape[1] * pseudo_labels[0].numel()))
    return sum_in_pieces(one, student_logits.split(together), pseudo_labels.split(together)) / pseudo_labels.numel()


def feature_guided_loss(Z, Z_student, size, to_pixels, student_to_pixels, piece=2 ** 25):
    """Eq. (7): L1 between Z (B, D, h, w) of the teacher and Z^ (B, D, h', w') of the student, both enlarged to the
    picture's size (H, W) by their own to_pixels. Norm over the D features of a pixel, mean over pixels (ours): the
    paper does not say, but the mean over D too would make this term D times weaker, next to nothing beside Eq. 6.

    piece: elements of one enlarged map in memory at once; the channels go through in groups of that size.
    """
    def one(z, z_student):  # (B, channels, h, w), (B, channels, h', w')
        # channels last: the same numbers, but a CPU enlarges them more than twice as fast
        z, z_student = (x.contiguous(memory_format=torch.channels_last) for x in (z, z_student))
        return (to_pixels(z, *size) - student_to_pixels(z_student, *size)).abs().sum()

    B, (H, W) = len(Z), size
    channels = max(1, piece // (B * H * W))
    return sum_in_pieces(one, Z.split(channels, 1), Z_student.split(channels, 1)) / (B * H * W)


def text_guided_loss(student_logits, Z_student, W_q, labels, tau_1, tau, pool="global"):
    """Sec. 3.5: Eq. (4, 5) with the student's features (B, D, h, w) and the masks of its own logits (B, C, h, w);
    labels (B, C) bool -> scalar. (Released: the teacher's masks, and no gradient to the student.)"""
    with torch.autocast(Z_student.device.type, enabled=False):  # bf16 is too coarse for S / tau
        masks = gumbel_softmax_masks(student_logits, tau_1)
        return contrastive_loss(masked_features(Z_student, masks, pool), W_q, labels, tau)


def distillation_loss(teacher, student, pictures, labels, *, mask_tau=None, alpha=0.5, beta=0.5):
    """Eq. (8): L_mask + alpha L_feat + beta L_text. teacher: a ReCLIP in eval mode; student: a DeepLabV2; the same
    pictures (B, 3, H, W) in [0, 1] for both, each normalises them its own way; image-level labels (B, C) bool.

    alpha, beta: 0 leaves a term out (Table 7). mask_tau: temperature of Eq. (6), None for that of Eq. (5).
    """
    if teacher.training:
        raise ValueError("the teacher must be in eval mode: its batch norms would learn from the student's pictures")
    size = pictures.shape[2:]
    with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
        guide = teacher(pictures)
        pseudo_labels = teacher.to_pixels(guide.rectified, *size).argmax(1)  # (B, H, W): all pixels, no truth
    own = student(pictures)
    loss = mask_guided_loss(own.rectified, pseudo_labels, mask_tau or teacher.tau, student.to_pixels)
    if alpha:
        loss = loss + alpha * feature_guided_loss(guide.features, own.features, size, teacher.to_pixels,
                                                  student.to_pixels)
    if beta:
        loss = loss + beta * text_guided_loss(own.rectified, own.features, teacher.W_q, labels, teacher.tau_1,
                                              teacher.tau, teacher.pool)
    return loss


# --- A guided tour ------------------------------------------------------------------------------------------

def tour():
    """One picture of shapes through Eq. (1)-(5), before anything is learnt."""
    from datasets import DATA, open_split  # for the tour alone; the module does not need it
    torch.manual_seed(0)
    facts, split = DATA["shapes"], open_split("shapes", None, "train")
    model = ReCLIP(load_clip(facts.clip), facts.classes, prompts=facts.prompts, positional_gain=0.05,
                   tau_1=0.033, tau=0.033).train()  # as train.py sets them for shapes
    picture = split.picture(0)[None].float() / 255
    print(f"The picture holds {', '.join(facts.classes[c] for c in split.label(0).unique() if c < 255)}.")
    show("picture", picture, "I          (B, 3, H, W)")
    logits = model(picture)
    similarity = model.image_similarity(picture)
    labels = image_level_labels(similarity, threshold=50, top_k=1)
    masks = gumbel_softmax_masks(logits.rectified, model.tau_1)
    pooled = masked_features(logits.features, masks)
    show("features", logits.features, "Z          (B, D, h, w)  Sec. 3.1, each patch of length 1")
    show("W_q", model.W_q, "W_q        (C, D)        Sec. 3.1, mean over prompts")
    show("reference(clip)", model.reference(model.clip), "W_r        (C, D)        Eq. 1 through the text encoder")
    show("query_logits", logits.query, "M_q        (B, C, h, w)  Sec. 3.1, cosines")
    show("reference_logits", logits.reference, "M_r        (B, C, h, w)  Sec. 3.2")
    show("positional_logits", logits.positional, "M_p        (1, C, h, w)  Sec. 3.3")
    show("bias_logits", bias_logits(logits.reference, logits.positional), "M_b        (B, C, h, w)  Eq. 2")
    show("rectified_logits", logits.rectified, "M          (B, C, h, w)  Eq. 3")
    show("masks", masks, "M^         (B, C, h, w)  Eq. 4, one class a patch")
    show("image_similarity", similarity, "100 cos    (B, C)        Sec. 3.4")
    show("image_level_labels", labels.float(), "c_1..c_K   (B, C)        Sec. 3.4: " + ", ".join(
        name for name, found in zip(facts.classes, labels[0]) if found))
    show("masked_features", pooled, "Z_g pooled (B, C, D)     Sec. 3.4, global average")
    show("contrastive_loss", contrastive_loss(pooled, model.W_q, labels, model.tau), "L          ()            Eq. 5")


if __name__ == "__main__":
    tour()
