"""ReCLIP (Sec. 3): CLIP's two biases, learnt from images and subtracted; its student's losses.

The method in one drawing. Only what stands in [brackets] learns; CLIP is frozen everywhere.

    image -- CLIP's image encoder --> Z --+-- W_q: "a photo of a cat." ----> M_q ----------+
                                          |                                                |
                                          +-- W_r: [v_1] .. [v_L] cat -----> M_r --+     minus --> M
                                                                                   +-- M_b +       |
    CLIP's positional embedding p ---------------- [positional net] ------> M_p ---+               |
                                                                                                   |
    loss <---- does the vector under <---- Z, pooled     <---- one mask per <---- Gumbel-softmax --+
    Eq. (5)    mask c resemble text c?     under each mask     class              Eq. (4)

What stands here, in the paper's order
    RECIPES                         how CLIP is run: the authors' code of 2024, and of 2025
    query_text_features             Sec. 3.1    W_q, the frozen classifier
    ReferencePrompt                 Eq. (1)     W_r, from learnable vectors: class-preference bias
    PositionalBias                  Sec. 3.3    M_p, from CLIP's positions: space-preference bias
    bias_logits, rectify_logits     Eq. (2)-(3) M_b = M_r + M_p;  M = M_q - M_b
    gumbel_softmax_masks            Eq. (4)     hard masks that let a gradient through
    image_level_labels              Sec. 3.4    which classes does the image hold?
    masked_features, contrastive_loss  Eq. (5)
    ReCLIP                          all of that as one module, with save and load
    segment                         a mask of pixels from the logits of patches
    mask_guided_loss, feature_guided_loss, text_guided_loss, distillation_loss   Eq. (6)-(8)
    open_rectification, ...         the files that the authors published (ReCLIP.from_released)
    ReCLIPPlusPlus                  the authors' sequel, which is not this paper

Symbols
    B images, C classes, D width of CLIP's joint space; H x W pixels, h x w patches, n = h * w
    L prompt vectors, E_t width of CLIP's text transformer, E_v of its vision transformer
    Z    features            (B, D, h, w)  CLIP's patch features, each of length 1
    W_q  query text features (C, D)        rows of length 1
    W_r  reference features  (C, D)        rows of length about 1 / sqrt(C)
    M_q, M_r, M_b, M    logits   (B, C, h, w)
    M_p  positional logits  (1, C, h, w)   the same for all images; (1, 1, h, w) with one channel
    (The paper writes n x C for one image. We keep the grid, h x w = n, and the batch.)

Cosines lie too close together for a softmax. Three temperatures divide them and one factor
multiplies them, each for a task of its own (values: VOC's):
    tau_1     0.001  Eq. (4)  small: a patch takes its best class, noise decides only near ties
    tau       0.01   Eq. (5)  CLIP's own temperature, 1 / exp(logit_scale)
    mask_tau  0.01   Eq. (6)  as Eq. (5)'s, for the student's logits at each pixel; Table 6's learnt
                              classifier finds its own scale and has 1
    scale     100    evaluation only: softmax(100 M) where a threshold on a probability is asked for

Copied elsewhere (with clip_model.py), it is used like this:
    model = ReCLIP(load_clip("ViT-B/16"), ["cat", "dog", "grass"])

    # one step of training: images (B, 3, H, W) in [0, 1], thumbnails of them (B, 3, 224, 224)
    labels = model.image_labels(thumbnails, threshold=23, top_k=2)           # (B, C) bool
    Z = model.features(images)                                               # (B, D, h, w)
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)    # (B, C, h, w)
    loss = contrastive_loss(masked_features(Z, masks), model.W_q, labels, model.tau)
    loss.backward()

    # the mask of one image (1, 3, H, W)
    logits = model.eval()(image).rectified                                   # (1, C, h, w)
    mask = segment(logits, model.output_stride, (H, W), (H, W))              # (H, W) uint8

Where the paper and its authors' released code differ, a comment says so; where both are worth a
run, a named argument chooses.
"""

import hashlib
import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_model import (
    ATTENTIONS,
    MEAN,
    STD,
    load_clip,
    normalize_pixels,
    patch_tower,
    sha256_of,
    show,
    written_atomically,
)

IGNORE = 255  # in masks: no class


# --- Two recipes ----------------------------------------------------------------------------------

class Recipe(NamedTuple):
    """How CLIP is run for the features of patches."""
    exact_gelu: bool  # in its image tower; False: CLIP's own activation
    mean: tuple       # of the images, red, green, blue in [0, 1]
    std: tuple


# The authors' code exists in two states. On every data set they differ in the two things below;
# sizes and epochs, which depend on the data set, are RECIPE_SIZES in datasets.py.
#
# cvpr2024 was published together with the paper's checkpoints, so we infer that it made the paper's
# numbers. For patches it runs CLIP's image tower with another activation and normalization than
# CLIP was trained with. 2025 runs it as it was trained, and so do we on shapes and on images of
# your own. In both, texts and whole images (the pseudo-labels) are encoded as CLIP was trained.
# Where nothing is said, ReCLIP() takes 2025, and train.py on the benchmarks cvpr2024.
RECIPES = {
    "cvpr2024": Recipe(True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "2025": Recipe(False, MEAN, STD),                                        # CLIP's
}


# --- Sec. 3.1: the Query --------------------------------------------------------------------------

# The prompts of the Query: the 80 templates of CLIP's ImageNet ensemble and 5 "in the scene" ones
# (MaskCLIP's list, which the authors use too), built from their parts. [a] is "a" or "the".

_PHOTOS = ("bad", "black and white", "blurry", "bright", "close-up", "cropped", "dark", "good",
           "jpeg corrupted", "low resolution", "pixelated")
_WORKS = ("doodle", "drawing", "painting", "photo", "rendering", "rendition", "sculpture", "sketch",
          "tattoo")
_LOOKS = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MADE = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")

_WITH_ARTICLE = (
    *(f"a {word} photo of [a] {{}}." for word in _PHOTOS),
    *(f"a {word} of [a] {{}}." for word in _WORKS),
    *(f"a photo of [a] {word} {{}}." for word in _LOOKS),
    *(f"[a] {word} {{}}." for word in _MADE),
    "art of [a] {}.",
    "graffiti of [a] {}.",
    "itap of [a] {}.",
    "[a] {} in a video game.",
    "there is [a] {} in the scene.",
    "this is [a] {} in the scene.",
)
PROMPTS = (
    *(template.replace("[a]", "a") for template in _WITH_ARTICLE),
    *(template.replace("[a]", "the") for template in _WITH_ARTICLE),
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "itap of my {}.",
    "this is one {} in the scene.",
)


@torch.no_grad()
def query_text_features(clip, class_names, prompts=PROMPTS):
    """W_q (Sec. 3.1): for each class the normalized mean of its normalized text features, (C, D).

    One sentence about a cat is as much about the sentence as about the cat; the mean over many
    keeps what they share. "sofa | couch" is one class with two names, and both go into the
    mean: each is one more way to find it.
    """
    device = clip.logit_scale.device
    rows = []

    for name in class_names:
        synonyms = [synonym.strip() for synonym in name.split("|")]
        texts = [prompt.format(synonym) for synonym in synonyms for prompt in prompts]
        tokens = clip.tokenize(texts).to(device)                        # (texts, context)
        features = F.normalize(clip.encode_text(tokens), dim=-1)        # (texts, D)
        rows.append(F.normalize(features.mean(0), dim=-1))              # (D,)

    return torch.stack(rows)                                            # (C, D)


def segmentation_logits(features, text_features):
    """M_q of Sec. 3.1 and M_r of Sec. 3.2: Z (B, D, h, w) and W (C, D) -> (B, C, h, w).

    The texts are the weights of a 1x1 convolution: each patch is compared with each text. With W_q
    this is a cosine, for both have length 1, and its argmax over C is MaskCLIP's segmentation.
    """
    return torch.einsum("bdhw,cd->bchw", features, text_features)


# --- Sec. 3.2: the Reference, class-preference bias -----------------------------------------------

class ReferencePrompt(nn.Module):
    """Eq. (1): R_i = [v_1][v_2]...[v_L][CLS_i], with the same L learnable vectors for all classes.

    clip -> W_r (C, D). On the patches of a cow CLIP's logit for "dog" may be too high (Fig. 1b).
    M_r = Z . W_r learns that excess, of each class and on each kind of patch, and M_q - M_r is free
    of it. W_r is not a free C x D matrix but comes from texts: so it stays among the directions
    that CLIP's text encoder can make, and the L shared vectors are all that is learnt.

    class_names: the Reference reads the first synonym only, the Query all of them. For a bias one
        text per class is enough, since the vectors before it are learnt.
    length: L. Sec. 3.2 has 73 = 77 - 2 (start and end) - 2 (name), whatever the name; the released
        code cuts longer names off. We shorten the prompt instead, so that the longest name fits.
    cut_names: True cuts as the released code does; for the files that it wrote.
    prompt_per_class: True gives each class L vectors of its own (ours; CoOp's class-specific
        contexts). The paper shares them "for efficiency". With a shared prompt the rows of W_r
        differ only by what the text encoder makes of that prompt before each name. A small encoder
        makes nearly the same of it before every name: it moves all rows alike, and what all classes
        share cancels.
    norm: the paper does not say how long W_r is. "frobenius" (released) divides by the norm of the
        whole C x D matrix: a row has length about 1 / sqrt(C), and M_r is a mild correction to M_q.
        "class" gives each row length 1: M_r is then as large as M_q itself.
    """

    def __init__(
        self,
        clip,
        class_names,
        length=73,
        norm="frobenius",
        prompt_per_class=False,
        cut_names=False,
    ):
        super().__init__()
        if norm not in ("frobenius", "class"):
            raise ValueError(f"reference_norm is {norm!r}; it must be 'frobenius' or 'class'")

        # What follows the prompt in the text of each class: its name and EOT, which is read.
        tokenizer = clip.tokenizer_or_default()
        names = [tokenizer.encode(name.split("|")[0]) for name in class_names]
        self.endings = [[*name, clip.eot] for name in names]            # C lists of token ids
        if cut_names:
            self.endings = [cut_ending(ending) for ending in self.endings]
        longest = max(len(ending) for ending in self.endings)

        length = min(length, clip.context_length - 1 - longest)
        if length < 1:
            raise ValueError(f"no room for a prompt: the longest class name has {longest - 1} of "
                             f"this CLIP's {clip.context_length} tokens, or prompt_length is "
                             "below 1")

        # Released: every vector starts as the embedding of token 0 ("!"). They do not stay equal,
        # because each stands at another position of the text.
        first = clip.token_embedding.weight[0].detach()                 # (E_t,)
        vectors = first.repeat(length, 1)                               # (L, E_t)
        if prompt_per_class:
            vectors = vectors.repeat(len(class_names), 1, 1)            # (C, L, E_t)
        self.vectors = nn.Parameter(vectors)
        self.norm = norm

    def forward(self, clip):
        W_r = clip.encode_prompted(self.vectors, self.endings)          # (C, D)
        if self.norm == "frobenius":
            return W_r / W_r.norm()
        return W_r / W_r.norm(dim=-1, keepdim=True)


# --- Sec. 3.3: the positional net, space-preference bias ------------------------------------------

class PositionalBias(nn.Module):
    """Sec. 3.3: three 3x3 convolutions with batch norm, p (1, E_v, h, w) -> M_p (1, C, h, w).

    CLIP is better at the center of an image than near its border (Fig. 1a): presumably because
    people photograph what they name, and put it there. What CLIP is told of places is its
    positional embedding p. So a function of p can say how CLIP leans at each place, and as p is no
    image, it can say nothing else: M_p is the same for all images of one size.

    channels: the paper has one, shared by all classes (Eq. (2)). A logit that all classes share
        cancels in every softmax and argmax over classes: it changes no mask and receives no
        gradient. The released code has C, one per class, and so do we; channels=1 is the
        paper's version.
    last_relu: released: a ReLU after the last batch norm too, hence M_p >= 0. The paper: not said.
    gain: fixed factor on the output (ours; 1, as in the paper, everywhere but on shapes). After a
        batch norm M_p starts with a spread of about 1, more than the cosines of different classes
        differ by (0.02 in OpenAI's CLIP, 0.2 in that of shapes): at first M_p decides the masks.
        The 20 epochs of shapes are too short to tame it. There a small factor makes M_p start
        small and, since gradients carry it too, move calmly.
    """

    def __init__(self, width, channels, last_relu=True, gain=1.0):
        super().__init__()
        sizes = (width, 512, 256, channels)                             # as released
        layers = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            # no bias: the batch norm after the convolution has one
            conv = nn.Conv2d(size_in, size_out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(size_out), nn.ReLU()]
        if not last_relu:
            layers.pop()

        self.net = nn.Sequential(*layers)
        self.gain = gain

    def forward(self, positional_grid):
        return self.gain * self.net(positional_grid)


# --- Sec. 3.4: rectification and its loss ---------------------------------------------------------

def bias_logits(reference_logits, positional_logits):
    """Eq. (2): M_b = M_r + M_p*.

    M_r (B, C, h, w) depends on what a patch shows, M_p (1, C, h, w) on where it is. The star is
    the expansion of M_p over images (and classes, if it has one channel), done by broadcasting.
    """
    return reference_logits + positional_logits


def rectify_logits(query_logits, bias, subtract=True):
    """Eq. (3): M = M_q - M_b, all (B, C, h, w): what CLIP says, minus what it would say anyway.

    subtract: False adds M_b instead (Table 5). A bias that is free could take either sign. Ours is
        not: M_p >= 0, since its net ends in a ReLU, and W_r must come from texts. So plus and minus
        are different models; the paper measures minus to be better and speculates that it is the
        better prior.
    """
    if subtract:
        return query_logits - bias
    return query_logits + bias


def gumbel_softmax_masks(rectified_logits, tau_1=0.001):
    """Eq. (4): M^ = Gumbel-Softmax(M, tau_1), (B, C, h, w) -> masks (B, C, h, w).

    Each patch is 1 for one class and 0 for the rest, as with an argmax over classes. But an argmax
    has no gradient. Here the forward value is a sample of softmax(M / tau_1), namely the argmax of
    M / tau_1 + Gumbel noise, and the gradient is that of the softmax of the same noisy logits
    (straight-through). It is large only where two classes nearly tie: training moves the borders
    of masks.

    The temperature divides the logits before the noise is added, as released (logits x 1000).
    Dividing noise and logits together, as in the usual formula, would drown cosines that differ by
    hundredths in noise of spread 1: masks would be random.
    """
    return F.gumbel_softmax(rectified_logits / tau_1, tau=1.0, hard=True, dim=1)


def image_level_labels(similarity, threshold, top_k):
    """Sec. 3.4: similarity of whole images to texts (B, C) -> labels (B, C) bool, c_1 .. c_K.

    A class is taken to be in the image if its similarity reaches the threshold t; if none does, the
    top_k best are (released). So each image has at least one. CLIP is good at this question: it was
    trained on whole images. These labels are guesses of CLIP; no annotation is read.
    """
    labels = similarity >= threshold                                    # (B, C)

    top_k = min(top_k, similarity.shape[1])
    best = torch.zeros_like(labels)
    best.scatter_(1, similarity.topk(top_k, dim=1).indices, True)       # (B, C)

    return torch.where(labels.any(1, keepdim=True), labels, best)


def masked_features(features, masks, pool="global"):
    """Z_g of Sec. 3.4 and its pooling: Z (B, D, h, w), masks (B, C, h, w) -> (B, C, D).

    One vector per class: the sum of the patches under its mask, divided by n or by their number.

    pool: "global" (the paper's "global average pooling", and released) divides by all n patches, so
        a small mask gives a short vector, and the loss rewards finding the whole object too. "mask"
        divides by the mask's own area.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)             # (B, C, D)
    if pool == "global":
        return total / masks[0, 0].numel()

    area = masks.sum((2, 3)).clamp(min=1)                               # (B, C)
    return total / area[:, :, None]


def contrastive_loss(pooled, W_q, labels, tau):
    """Eq. (5): L = -1/K sum_k log( exp(S[c_k, c_k] / tau) / sum_j exp(S[c_k, j] / tau) ).

    pooled: masked features (B, C, D). W_q: (C, D).
    labels: (B, C) bool, which classes each image holds.
    -> scalar, the mean over images

    This is how a bias is learnt without any label of a pixel. If the masks are right, what is
    pooled under the cat mask looks like "cat" and like no other text, and the loss is low.
    """
    # S[b, c, j]: how much the patches under mask c resemble text j. If dog patches slipped into the
    # cat mask, S[cat, dog] is high; the gradient then lowers M[cat] there, first of all where cat
    # and dog nearly tie. M_q is frozen, so only the bias can move: it comes to know where "cat" is
    # claimed too easily.
    S = torch.einsum("bcd,jd->bcj", pooled, W_q)                        # (B, C, C)

    # For each mask the log probability of its own text among all C texts: the diagonal j = c.
    log_p = F.log_softmax(S / tau, dim=-1).diagonal(dim1=1, dim2=2)     # (B, C)

    # Only masks of classes that the image holds count. The mask of an absent class holds whatever
    # was left over, and there is nothing that it should look like. (K is at least 1, so that an
    # image without any label adds 0 and not 0 / 0.)
    K = labels.sum(1).clamp(min=1)                                      # (B,)
    return -((log_p * labels).sum(1) / K).mean()


# --- All of it as one module ----------------------------------------------------------------------

class Logits(NamedTuple):
    """What ReCLIP says of each patch, part by part."""
    query: torch.Tensor       # M_q (B, C, h, w), cosines
    reference: torch.Tensor   # M_r (B, C, h, w)
    positional: torch.Tensor  # M_p (1, C, h, w), or (1, 1, h, w) with one channel
    rectified: torch.Tensor   # M   (B, C, h, w)
    features: torch.Tensor    # Z   (B, D, h, w), each patch of length 1


# State-dict keys with these prefixes are CLIP's weights; our checkpoints leave them out.
FROZEN = ("clip.", "dense_visual.")


def _forget_cache(model, incompatible_keys):
    """Hook after load_state_dict: what was computed from the old weights is no longer true."""
    model._cache.clear()


class ReCLIP(nn.Module):
    """CLIP, frozen, with what is learnt about its biases: images (B, 3, H, W) in [0, 1] -> Logits.

    clip: a CLIP of load_clip's. It is frozen in place (requires_grad off, eval mode) and kept, not
        copied.
    class_names: C strings, synonyms separated by "|": ["cat | kitten", "dog", "grass"].
    prompts: templates of the Query, with {} for the name.
    W_q: (C, D), if it is known already; then the prompts are not read.
    prompt_length: L of Eq. (1); 0 for no Reference.
    prompt_per_class: each class has L vectors of its own (ours); the paper's are shared.
    positional_channels: channels of M_p: None for C (released), 1 as the paper prints, 0 for no
        positional net (Table 4's second row).
    tau: temperature of Eq. (5); None for CLIP's own, 1 / exp(logit_scale), 0.01 in OpenAI's.
    attention: how CLIP's last block is read, one of clip_model.ATTENTIONS.
    query_learnable: Table 3: a learnt prompt for M_q too. Both prompts start alike: at first the
        rows of both heads point the same way, and differ in length alone. Eq. (5) still compares
        with CLIP's own W_q (ours): a loss that could move its own targets would have a trivial
        minimum.
    subtract: Table 5: False adds the bias.
    recipe: a key of RECIPES, how CLIP is run for patches: "2025" as it was trained; "cvpr2024",
        with which the paper's numbers were probably made, is train.py's default on the benchmarks.
    cut_names, reference_norm, positional_last_relu, positional_gain, tau_1, pool: see the functions
        above.

    Errors: ValueError for a value outside of these choices, or class names that do not work.
    """
    method = "reclip"  # in the checkpoint; ReCLIPPlusPlus has another

    def __init__(
        self,
        clip,
        class_names,
        *,
        prompt_length=73,
        prompt_per_class=False,
        reference_norm="frobenius",
        query_learnable=False,
        positional_channels=None,
        positional_last_relu=True,
        positional_gain=1.0,
        subtract=True,
        attention="maskclip",
        tau_1=0.001,
        tau=None,
        pool="global",
        recipe="2025",
        cut_names=False,
        prompts=PROMPTS,
        W_q=None,
    ):
        super().__init__()
        check_class_names(class_names)
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}")
        C = len(class_names)
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a list of templates, such as 'a photo of a {}.'")
        if not tau_1 > 0 or not (tau is None or tau > 0):
            raise ValueError(f"tau_1 is {tau_1} and tau {tau}; temperatures must be above 0")
        if pool not in ("global", "mask"):
            raise ValueError(f"pool is {pool!r}; it must be 'global' or 'mask'")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; it must be one of "
                             f"{', '.join(ATTENTIONS)}")
        if positional_channels not in (None, 0, 1, C):
            raise ValueError(f"positional_channels is {positional_channels}; it must be 0, 1 or "
                             f"the number of classes, {C}")

        # Kept in the checkpoint, so that load builds the same module again.
        self.settings = {
            "prompt_length": prompt_length,
            "prompt_per_class": prompt_per_class,
            "reference_norm": reference_norm,
            "query_learnable": query_learnable,
            "positional_channels": positional_channels,
            "positional_last_relu": positional_last_relu,
            "positional_gain": positional_gain,
            "subtract": subtract,
            "attention": attention,
            "tau_1": tau_1,
            "tau": tau,
            "pool": pool,
            "recipe": recipe,
            "cut_names": cut_names,
            "prompts": list(prompts),
        }
        self.clip = clip.requires_grad_(False).eval()
        self.recipe = recipe
        self.released = None  # class token and eps of a published file (from_released)
        self.make_dense_visual()
        self.class_names = tuple(class_names)
        self.prompts = tuple(prompts)
        self.subtract = subtract
        self.attention = attention
        self.pool = pool
        self.tau_1 = tau_1
        self.tau = 1 / clip.logit_scale.exp().item() if tau is None else tau
        self.scale = 100                          # as released
        self.output_stride = clip.visual.patch    # pixels from one patch to the next

        if W_q is None:
            W_q = query_text_features(clip, class_names, prompts)
        self.register_buffer("W_q", W_q)          # (C, D)

        # The parts that learn. None where an ablation leaves one out.
        self.query = None
        self.reference = None
        self.positional = None
        if query_learnable:
            self.query = ReferencePrompt(
                clip, class_names, prompt_length, "class", prompt_per_class, cut_names
            )
        if prompt_length:
            self.reference = ReferencePrompt(
                clip, class_names, prompt_length, reference_norm, prompt_per_class, cut_names
            )
        channels = C if positional_channels is None else positional_channels
        if channels:
            width = clip.visual.class_embedding.numel()                 # E_v
            self.positional = PositionalBias(width, channels, positional_last_relu, positional_gain)

        # In eval mode W_r, and M_p of each grid size, are the same for every image: computed once.
        # train(), eval(), load_state_dict of the whole model and .to() clear them. After a change
        # of one part alone call eval() once more.
        self._cache = {}
        self.register_load_state_dict_post_hook(_forget_cache)
        self.to(clip.logit_scale.device)

    def train(self, mode=True):
        """As in every module; CLIP stays in eval mode."""
        self._cache.clear()
        super().train(mode)
        self.clip.eval()
        self.dense_visual.eval()
        return self

    def _apply(self, *args, **kwargs):
        """Every .to(), .double(), .cuda() passes through here."""
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    # -- from an image to its logits ---------------------------------------------------------------

    def make_dense_visual(self, class_token=None, eps=None):
        """Makes dense_visual: CLIP's image tower on the same weights, with the recipe's activation.

        class_token, eps: of a published file (see patch_tower); None: CLIP's.
        Only the features of patches use it. Whole images go through CLIP's own tower, so the
        pseudo-labels do not depend on the recipe.
        """
        exact_gelu = RECIPES[self.recipe].exact_gelu
        self.dense_visual = patch_tower(self.clip.visual, exact_gelu, class_token, eps)

    def make_released_dense_visual(self, state):
        """Makes dense_visual with the class token of a published file and the eps of its code."""
        class_token = state["vit.cls_token"].float()                    # (1, 1, E_v)
        class_token = class_token.reshape(self.clip.visual.class_embedding.shape)
        self.released = {"class_token": class_token, "eps": 1e-6}
        self.make_dense_visual(**self.released)

    @torch.no_grad()
    def features(self, images, valid=None):
        """Z (Sec. 3.1): images (B, 3, H, W) in [0, 1] -> (B, D, h, w), each patch of length 1.

        valid: (B, H, W) bool, False where an image was padded; None: nowhere.
        No gradient: CLIP is frozen. Length 1, so that products with W_q are cosines.
        """
        recipe = RECIPES[self.recipe]
        pixels = normalize_pixels(images, recipe.mean, recipe.std, valid)
        Z = self.clip.encode_image_dense(pixels, self.attention, self.dense_visual)
        return F.normalize(Z, dim=1)                                    # (B, D, h, w)

    def heads(self):
        """Weights of the two segmentation heads, which the student inherits: W_q, W_r (C, D).

        With query_learnable the first is what was learnt in its place; without a Reference the
        second is 0.
        """
        W_q = self.W_q
        if self.query is not None:
            W_q = self._once("query", self.query, self.clip)
        W_r = torch.zeros_like(self.W_q)
        if self.reference is not None:
            W_r = self._once("reference", self.reference, self.clip)
        return W_q, W_r

    def positional_logits(self, h, w):
        """M_p on a grid of h x w patches, (1, C, h, w); (1, 1, h, w) zeros without a net."""
        if self.positional is None:
            return self.W_q.new_zeros(1, 1, h, w)
        p = self.clip.visual.positional_grid(h, w)                      # (1, E_v, h, w)
        return self._once((h, w), self.positional, p)

    def _once(self, key, module, argument):
        """module(argument); in eval mode computed once for each key, and without a gradient."""
        if self.training:
            return module(argument)
        if key not in self._cache:
            self._cache[key] = module(argument).detach()
        return self._cache[key]

    def rectify(self, Z):
        """Eq. (1)-(3) on features Z (B, D, h, w): all logits, by name."""
        W_q, W_r = self.heads()                                         # (C, D) each
        M_q = segmentation_logits(Z, W_q)                               # (B, C, h, w)
        M_r = segmentation_logits(Z, W_r)                               # (B, C, h, w)
        M_p = self.positional_logits(*Z.shape[2:])                      # (1, C, h, w)
        M_b = bias_logits(M_r, M_p)                                     # (B, C, h, w)
        M = rectify_logits(M_q, M_b, self.subtract)                     # (B, C, h, w)
        return Logits(M_q, M_r, M_p, M, Z)

    def forward(self, images, valid=None):
        return self.rectify(self.features(images, valid))

    def to_pixels(self, grid, height, width):
        """(B, C, h, w) on patches -> (B, C, height, width) on pixels, bilinear."""
        return self.clip.to_pixels(grid, height, width)

    # -- which classes does an image hold? ---------------------------------------------------------

    @torch.no_grad()
    def image_similarity(self, thumbnails):
        """100 cos between images and W_q: (B, 3, R, R) in [0, 1] -> (B, C).

        A thumbnail is the center square of an image (datasets.Thumbnails), as CLIP sees images. R
        is CLIP's own resolution (224): the class token was trained on such images alone. The factor
        100 is as released, whatever this CLIP's logit scale, so that thresholds read like 23.
        """
        image_features = self.clip.encode_image(normalize_pixels(thumbnails))    # (B, D)
        return 100 * F.normalize(image_features, dim=-1) @ self.W_q.T

    def image_labels(self, thumbnails, threshold, top_k):
        """Pseudo-labels of Sec. 3.4: (B, 3, R, R) in [0, 1] -> (B, C) bool."""
        return image_level_labels(self.image_similarity(thumbnails), threshold, top_k)

    # -- what was learnt, alone --------------------------------------------------------------------

    def learnable_modules(self):
        """{name: module} of the parts that learn, all but CLIP: such as reference, positional."""
        parts = self.named_children()
        return {name: part for name, part in parts if f"{name}." not in FROZEN}

    def learnt(self):
        """{key: tensor}: the prompts, the positional net, and W_q.

        W_q is not learnt, but kept, so that loading needs no 85 x C texts.
        """
        state = self.state_dict()
        return {key: value for key, value in state.items() if not key.startswith(FROZEN)}

    def fingerprint(self):
        """sha256 of what was learnt, as text.

        Of the tensors, not of the file: torch.save writes the file's name into it.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.learnt().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path):
        """What was learnt, class names, settings and CLIP's identity, in one file.

        CLIP's own weights are not in it: 19 MB for VOC instead of 600. OSError if it cannot be
        written; the old file then stays as it was.
        """
        content = {
            "method": self.method,
            "learnt": self.learnt(),
            "class_names": list(self.class_names),
            "settings": self.settings,
            "clip": {
                "source": self.clip.source,
                "sha256": self.clip.sha256,
                "quick_gelu": self.clip.quick_gelu,
            },
            "released": self.released,
        }
        with written_atomically(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path, clip=None, device=None):
        """A working segmenter from save's file, in eval mode. No code from the file is executed.

        Of the sequel's file it makes a ReCLIPPlusPlus.

        clip: None to load the CLIP that it was learnt on, from where it was found then; or that
            same CLIP, already loaded.
        device: None for that of `clip`; without a clip, the CPU.
        Errors: FileNotFoundError; ValueError for a file that is none of save's, or of another CLIP.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            learnt = content["learnt"]
            class_names = content["class_names"]
            settings = dict(content["settings"])
            W_q = learnt["W_q"]
            source = content["clip"]["source"]
            sha256 = content["clip"]["sha256"]
            quick_gelu = content["clip"].get("quick_gelu", True)
            released = content.get("released")
            method = content.get("method", "reclip")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no rectification at {path}: learn one first, with "
                                    "python train.py --stage rectify") from None
        except Exception as error:  # whatever a broken or hostile file provokes
            reason = str(error).split("\n")[0][:200]
            raise ValueError(f"{path} is not a rectification checkpoint, or is truncated: "
                             f"{reason}") from error

        # Files of earlier versions name a control that now stands in extras/paper.py.
        if settings.pop("constant_bias", False):
            raise ValueError(f"{path} holds the control with one number per class, which is no "
                             "ReCLIP; extras/paper.py trains and measures it")

        if device is None:
            device = "cpu" if clip is None else clip.logit_scale.device
        if clip is None:
            clip = load_clip(source, device, quick_gelu)
        if clip.sha256 != sha256:
            raise ValueError(f"{path} was learnt on another CLIP than {clip.source} (their sha256 "
                             f"differ); load the one it was learnt on, {source}")

        try:
            of_method = {"reclip": ReCLIP, "reclip++": ReCLIPPlusPlus}[method]
            model = of_method(clip, class_names, W_q=W_q, **settings)
            if released is not None:
                model.released = released
                model.make_dense_visual(**released)
            state = model.state_dict()
            frozen = {key: state[key] for key in state if key.startswith(FROZEN)}
            model.load_state_dict(learnt | frozen, strict=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} does not fit this version: {reason}") from error
        return model.to(device).eval()

    @classmethod
    def from_released(cls, path, class_names, recipe="cvpr2024", W_q=None, device="cpu"):
        """A segmenter from a rectification that the paper's authors published, in eval mode.

        No other weights are needed: the file holds the whole CLIP. (But OpenAI's vocabulary is.)
        "The authors' published files", near the end of reclip.py, says what is in it and why it is
        read as it is.

        class_names: the data set's, in the authors' order (datasets.VOC_CLASSES and so on).
        recipe: the files do not say which; that it is the paper's is inferred (see RECIPES).
        W_q: (C, D), if it is known from an earlier time; else it is made of 85 C texts: seconds on
            a GPU, minutes on a CPU.
        Errors: FileNotFoundError; ValueError for a file that is none of theirs, or of other
            classes.
        """
        state = read_released(path)
        if "pe_proj.weight" in state:
            raise ValueError(f"{path} is a ReCLIP++ checkpoint, which is another method: "
                             "ReCLIPPlusPlus.from_released loads it")
        require_classes(path, state, "proj_net.6.weight", class_names)
        clip = load_clip(path, device)
        W_q = check_or_make_W_q(W_q, clip, class_names)

        with whole_file(path):
            vectors = state["text_encoder.prompt_token"][0].float()             # (L, E_t)
            model = cls(
                clip,
                class_names,
                W_q=W_q,
                prompt_length=len(vectors),
                cut_names=True,
                recipe=recipe,
            )
            model.reference.load_state_dict({"vectors": vectors})
            model.positional.net.load_state_dict(fold_biases(state))
            model.make_released_dense_visual(state)
        return model.to(device).eval()


def check_class_names(class_names):
    """ValueError unless class_names is a list of two or more, no name empty, none there twice."""
    names = []
    if not isinstance(class_names, str):
        for entry in class_names:
            names += [name.strip() for name in entry.split("|")]
    repeated = len(set(names)) < len(names)
    if isinstance(class_names, str) or len(class_names) < 2 or repeated or "" in names:
        raise ValueError("class names must be a list of two or more, all different, none empty: "
                         f"{class_names}")


# --- From logits to masks -------------------------------------------------------------------------

def strong_classes(logits, threshold, scale=100.0):
    """Prompt denoising: which classes does the whole image speak for? (1, C, h, w) -> (C,) bool.

    Among C texts there is always one that fits a patch of wall or shadow a little better than the
    rest, so a few patches get the name of something that is not in the image at all. An object that
    is there has at least one patch that is sure of it. So a class whose best probability
    softmax(scale * M) anywhere in the image stays below the threshold is dropped, and its patches
    go to the best of the others. If no class passes, all stay. (The released code then drops all,
    so that class 0 wins everywhere.) Not in the paper; the released evaluation does it.
    """
    # In fp32: ReCLIP++'s threshold on VOC is 1.0, which a probability reaches only by rounding.
    best = (scale * logits.float()).softmax(1).amax((0, 2, 3))          # (C,)
    kept = best >= threshold
    return kept | ~kept.any()


def centers_on_grid(mask_side, image_side, cells, output_stride, device):
    """Where the centers of the mask's pixels lie on a row of cells: (mask_side,), for grid_sample.

    The mask spans image_side pixels of the image that the network saw, the cells span
    cells * output_stride of them. grid_sample counts from -1 (left edge of the grid) to 1 (right
    edge). What lies beyond the center of an outermost cell takes that cell's value.
    """
    centers = torch.arange(mask_side, device=device) + 0.5              # in pixels of the mask
    centers = centers * (image_side / mask_side)                        # in pixels of the image
    positions = centers * (2 / (cells * output_stride)) - 1             # -1 .. 1 over the grid
    half_cell = 1 / cells
    return positions.clamp(half_cell - 1, 1 - half_cell)


def segment(
    logits,
    output_stride,
    image_size,
    label_size,
    denoise=0.0,
    background=0.0,
    scale=100.0,
):
    """The mask of one image: logits on patches (1, C, h, w) -> class of each pixel (H0, W0), uint8.

    output_stride: pixels of the seen image from one cell of the grid to the next.
    image_size: (H, W) of the image that the network saw. The cells may reach over its edge, where
        it was padded.
    label_size: (H0, W0) of the mask that is wanted. The grid is read bilinearly at the center of
        each of its pixels. (The released code stretches the padded grid onto the unpadded image,
        which shifts masks by up to 15 pixels.)
    denoise: threshold of strong_classes; 0 keeps every class.
    background: pixels whose best probability softmax(scale * M) stays below it become IGNORE;
        0 for none.
    Errors: ValueError for a batch.
    """
    if len(logits) != 1:
        raise ValueError(f"segment takes the logits of one image, (1, C, h, w), not {len(logits)}: "
                         "images of a batch may want masks of different sizes; call it for each")
    if logits.shape[1] > IGNORE:
        raise ValueError(f"a mask of bytes has room for {IGNORE} classes, not {logits.shape[1]}")
    kept = strong_classes(logits, denoise, scale)                       # (C,) bool
    C, h, w = logits.shape[1:]
    y = centers_on_grid(label_size[0], image_size[0], h, output_stride, logits.device)    # (H0,)
    x = centers_on_grid(label_size[1], image_size[1], w, output_stride, logits.device)    # (W0,)

    # C numbers per pixel of a large image would not fit into memory: some rows at a time.
    rows_at_once = max(1, 2 ** 24 // (C * len(x)))
    strips = []
    for y_strip in y.split(rows_at_once):
        positions = torch.stack(torch.meshgrid(x, y_strip, indexing="xy"), -1)  # (rows, W0, 2)
        positions = positions.to(logits.dtype)
        pixels = F.grid_sample(logits, positions[None], align_corners=False)[0] # (C, rows, W0)

        # The best class of each pixel, among those that denoising has left.
        dropped = ~kept[:, None, None]                                          # (C, 1, 1)
        strip = pixels.masked_fill(dropped, -torch.inf).argmax(0)               # (rows, W0)

        if background:
            # Dropped classes still take their share of the probability.
            probability = (scale * pixels).softmax(0)                           # (C, rows, W0)
            best = probability.masked_fill(dropped, 0).amax(0)                  # (rows, W0)
            strip[best < background] = IGNORE
        strips.append(strip.byte())
    return torch.cat(strips)                                                    # (H0, W0)


# --- Sec. 3.5: the losses of distillation ---------------------------------------------------------

# The student has .features, .rectify and .to_pixels, as ReCLIP has; deeplab.py holds the paper's.
#
# Eq. (6) and (7) speak of maps at the image's size. At 512 x 512 pixels the features alone are
# 512 x 262,144 numbers per image, twice. So both losses are summed over groups (of images, of
# channels): a group is enlarged, reduced to a number and forgotten. The sum is the same.

def sum_over_groups(function, groups, *others):
    """The sum of function(*group, *others) over all groups, with one of them in memory at a time.

    For that, backward computes each group once more (torch.utils.checkpoint). A single group is
    computed as usual.
    """
    if len(groups) == 1:
        return function(*groups[0], *others)
    total = 0
    for group in groups:
        total = total + checkpoint(
            function, *group, *others, use_reentrant=False, preserve_rng_state=False
        )
    return total


def summed_cross_entropy(student_logits, pseudo_labels, tau, to_pixels):
    """Eq. (6) before the mean: (images, C, h, w), (images, H, W) -> scalar, summed over pixels."""
    pixels = to_pixels(student_logits / tau, *pseudo_labels.shape[1:])  # (images, C, H, W)
    return F.cross_entropy(pixels, pseudo_labels, ignore_index=IGNORE, reduction="sum")


def mask_guided_loss(student_logits, pseudo_labels, tau, to_pixels, max_numbers=2 ** 25):
    """Eq. (6): L_mask = -1/(HW) sum_ij log P_ij(M~_ij), P = softmax of the student's M^D.

    The teacher's mask M~ is taken for the truth, errors included. Why the student can still become
    better than its teacher (our reading): it has to find what many masks have in common, and errors
    that fall here in one image and there in another are not that.

    student_logits: M^D on the student's grid (B, C, h, w).
    pseudo_labels: M~ (B, H, W) int64; IGNORE where an image was padded.
    tau: the logits are cosines; as in Eq. (5) a temperature makes probabilities of them. (Eq. (6)
        prints none.)
    to_pixels: the student's.
    max_numbers: of the enlarged logits in memory at once; images go through in groups of that
        size.
    -> scalar, the mean over the pixels of all images, without the padding
    """
    C = student_logits.shape[1]
    images_at_once = max(1, max_numbers // (C * pseudo_labels[0].numel()))
    groups = list(zip(student_logits.split(images_at_once), pseudo_labels.split(images_at_once)))
    total = sum_over_groups(summed_cross_entropy, groups, tau, to_pixels)
    return total / (pseudo_labels != IGNORE).sum()


def summed_l1(Z, Z_student, valid, to_pixels, student_to_pixels):
    """Eq. (7) before the mean: (B, channels, h, w), (B, channels, h', w') -> scalar, a sum.

    An L1 norm is a sum over channels, so groups of channels may be added. Of a cosine, an L2
    norm or anything else that couples channels this is not true: such a loss needs all D at once.
    """
    # channels last: the same numbers, but a CPU enlarges them more than twice as fast
    Z = Z.contiguous(memory_format=torch.channels_last)
    Z_student = Z_student.contiguous(memory_format=torch.channels_last)
    H, W = valid.shape[1:]
    difference = to_pixels(Z, H, W) - student_to_pixels(Z_student, H, W)    # (B, channels, H, W)
    return (difference.abs() * valid[:, None]).sum()


def feature_guided_loss(Z, Z_student, valid, to_pixels, student_to_pixels, max_numbers=2 ** 25):
    """Eq. (7): L_feat = || Z - Z^ ||_1, both enlarged to the image's size (H, W).

    The student's head is made of CLIP's texts, which only mean something to features of CLIP's
    space: this loss brings the student's features there.

    Z: the teacher's features (B, D, h, w), enlarged by to_pixels.
    Z_student: Z^ (B, D, h', w'), enlarged by student_to_pixels.
    valid: (B, H, W) bool, the pixels of the images; False where they were padded.
    max_numbers: of one enlarged map in memory at once; channels go through in groups of that
        size, which is right for L1 alone (see summed_l1).
    -> scalar: the norm is summed over the D features of a pixel, the mean is over pixels (ours).
        The paper does not say; but a mean over D too would make this term D times weaker, next to
        nothing beside Eq. (6).
    """
    channels_at_once = max(1, max_numbers // valid.numel())
    groups = list(zip(Z.split(channels_at_once, 1), Z_student.split(channels_at_once, 1)))
    total = sum_over_groups(summed_l1, groups, valid, to_pixels, student_to_pixels)
    return total / valid.sum()


def text_guided_loss(student_logits, Z_student, W_q, labels, tau_1, tau, pool="global"):
    """L_text of Sec. 3.5: Eq. (4)-(5) once more, with the student's own features and masks.

    Eq. (6) and (7) hand down what the teacher knows, errors included; this one asks, as in
    rectification, whether what the student calls a cat looks like "cat".

    student_logits: M^D (B, C, h, w). Z_student: Z^ (B, D, h, w). labels: (B, C) bool.
    -> scalar
    (Released: the teacher's masks, and no gradient to the student.)
    """
    # In bf16 S would be rounded to steps of .001, and S / tau to steps of .1.
    with torch.autocast(Z_student.device.type, enabled=False):
        masks = gumbel_softmax_masks(student_logits, tau_1)             # (B, C, h, w)
        pooled = masked_features(Z_student, masks, pool)                # (B, C, D)
        return contrastive_loss(pooled, W_q, labels, tau)


def distillation_loss(mask_loss, feature_loss, text_loss, alpha=0.5, beta=0.5):
    """Eq. (8): L_distill = L_mask + alpha L_feat + beta L_text; alpha = beta = 0.5 (Sec. 3.5)."""
    return mask_loss + alpha * feature_loss + beta * text_loss


# --- The authors' published files -----------------------------------------------------------------

# github.com/dogehhh/ReCLIP links to the checkpoints behind the paper's numbers. One of stage 1
# holds, under names that begin with "module.":
#
#     clip.*                          OpenAI's CLIP, under OpenAI's names: load_clip takes it
#     vit.*, text_encoder.*           its two towers once more; of these only what differs is read:
#     vit.cls_token                   the class token that reads patches, from a file of its own
#     text_encoder.prompt_token       v_1 .. v_73 of Eq. (1)
#     proj_net.{0,3,6}, {1,4,7}       the positional net: convolutions with bias, batch norms
#
# Under the recipe that a file was trained with, the logits are the authors' own if three habits of
# their code are kept: that class token and eps 1e-6 in the layer norms of the image tower's blocks
# (make_released_dense_visual), names cut to three tokens (cut_ending), and convolutions with biases
# (fold_biases).

def released_kind(path):
    """Which of the authors' files is this? "ReCLIP", "ReCLIP++", "student", or None: another file.

    Decided by its keys; whatever cannot be read is None, and whoever loads it says why.
    """
    try:
        keys = read_tensors(path, "meta").keys()
    except Exception:  # whatever a broken or hostile file provokes
        return None
    if "module.pe_proj.weight" in keys:
        return "ReCLIP++"
    if "module.text_encoder.prompt_token" in keys:
        return "ReCLIP"
    if "decode_head.decode_module.aspp_modules.0.conv.weight" in keys:
        return "student"
    return None


def open_rectification(path, class_names, clip=None, recipe=None, W_q_path=None, device="cpu"):
    """A rectification in eval mode: a file of ReCLIP.save, or one that the authors published.

    class_names: needed for the authors' files, which do not name their classes.
    clip: as ReCLIP.load takes it.
    recipe: of an authors' file; None: cvpr2024, of ReCLIP++ 2025, since it has no other. A file of
        ours has been learnt under one and keeps it.
    W_q_path: a file in which the W_q of an authors' file is kept for the next time; None: it is not
        kept.
    Errors: FileNotFoundError, ValueError, as load and from_released raise them.
    """
    kind = released_kind(path)
    if kind is None:
        model = ReCLIP.load(path, clip, device)
        if recipe not in (None, model.recipe):
            raise ValueError(f"{path} was learnt under the recipe {model.recipe} and is read under "
                             f"no other, such as {recipe}")
        return model

    if clip is not None:
        raise ValueError(f"{path} is a checkpoint that the authors published; it holds its own "
                         "CLIP, and no other can be given")
    origin = {"file": sha256_of(path), "class_names": list(class_names)}
    W_q = read_kept_W_q(W_q_path, origin, device)

    if kind == "ReCLIP++":
        if recipe not in (None, "2025"):
            raise ValueError(f"{path} is a ReCLIP++ checkpoint, whose recipe is 2025, not {recipe}")
        model = ReCLIPPlusPlus.from_released(path, class_names, W_q, device)
    else:
        model = ReCLIP.from_released(path, class_names, recipe or "cvpr2024", W_q, device)
    if W_q is None and W_q_path is not None:
        with written_atomically(W_q_path) as temporary:
            torch.save({"origin": origin, "W_q": model.W_q.cpu()}, temporary)
    return model


def read_kept_W_q(path, origin, device):
    """The W_q (C, D) that open_rectification kept in a file, or None: it must be made anew.

    origin: what it must have been made from.
    """
    if path is None:
        return None
    try:
        kept = torch.load(path, map_location=device, weights_only=True)
        if kept["origin"] == origin:
            return kept["W_q"]
    except Exception:  # not there, or whatever a broken file provokes
        pass
    return None


def read_tensors(path, device="cpu"):
    """The tensors of a file {name: tensor}, whether or not they stand in a "state_dict" of it."""
    content = torch.load(path, map_location=device, weights_only=True)
    return content.get("state_dict", content)


def read_released(path):
    """A published checkpoint of stage 1 as {name without "module.": tensor}.

    Errors: FileNotFoundError; ValueError for another file.
    """
    try:
        state = {}
        for key, value in read_tensors(path).items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{key} is no tensor")
            state[key.removeprefix("module.")] = value
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no published rectification at {path}: the README says "
                                "where the authors keep theirs") from None
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path} is not a checkpoint, or is truncated: {reason}") from error

    if "text_encoder.prompt_token" not in state:
        raise ValueError(f"{path} is not a rectification of ReCLIP's authors: it has no prompt "
                         "(text_encoder.prompt_token)")
    return state


def require_classes(path, state, key, class_names):
    """ValueError unless the tensor `key`, with a row per class, is there and has as many rows."""
    if key not in state:
        raise ValueError(f"{path} is not a whole rectification of ReCLIP's authors: it has no "
                         f"{key}")
    classes = state[key].shape[0] if state[key].ndim else 0
    if classes != len(class_names):
        raise ValueError(f"{path} was learnt for {classes} classes, and {len(class_names)} are "
                         "named: give the names of its data set, in the authors' order")


@contextmanager
def whole_file(path):
    """Within, what is missing in a published file or does not fit ends in one sentence."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a whole rectification of ReCLIP's authors: "
                         f"{reason}") from error


def cut_ending(ending):
    """How the authors read a text: [name, EOT] cut to three tokens, of which the largest is read.

    EOT has the largest id of all; so this is EOT as usual, unless the name is too long. Of "chest
    of drawers" the three words are left, and whichever has the largest id is read; what stands
    after it is not seen, since the tower is causal. Three names of ADE20K are cut like this.
    """
    kept = ending[:3]
    read = kept.index(max(kept))
    return kept[:read + 1]


def fold_biases(state):
    """The positional net of a published file, for PositionalBias.net, which has no biases.

    A batch norm subtracts its running mean. Whether b is added before that or the mean is lower by
    b comes to the same.
    """
    net = {}
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        net[f"{conv}.weight"] = state[f"proj_net.{conv}.weight"]
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            net[f"{norm}.{name}"] = state[f"proj_net.{norm}.{name}"]
        bias = state[f"proj_net.{conv}.bias"]
        mean = state[f"proj_net.{norm}.running_mean"]
        if bias.shape != mean.shape:
            raise ValueError(f"proj_net.{conv}.bias does not fit proj_net.{norm}.running_mean")
        net[f"{norm}.running_mean"] = mean - bias
    return net


def check_or_make_W_q(W_q, clip, class_names):
    """W_q (C, D), checked; or made, with a line on stderr that counts the classes.

    85 texts a class take seconds on a GPU and minutes on a CPU.
    """
    D = clip.text_projection.shape[1]
    if W_q is not None:
        if W_q.shape != (len(class_names), D):
            raise ValueError(f"W_q is {tuple(W_q.shape)}; it must have one row of {D} numbers for "
                             f"each of the {len(class_names)} classes")
        return W_q.to(clip.logit_scale.device)

    rows = []
    for done, name in enumerate(class_names, start=1):
        rows.append(query_text_features(clip, [name]))                  # (1, D)
        print(f"\rtexts of {done} of {len(class_names)} classes", end="", file=sys.stderr)
    print(file=sys.stderr)
    return torch.cat(rows)


# --- The sequel: ReCLIP++, which is not this paper ------------------------------------------------

class ReCLIPPlusPlus(ReCLIP):
    """ReCLIP++ (the same authors, arXiv 2408.06747): the frame of ReCLIP with two changes.

        ReCLIP                                      ReCLIP++
        M_b = Z . W_r + M_p                         M_b = P . W_r,  P a linear map of p
        M   = M_q - M_b                             M   = M_q - M_b
        Eq. (4) makes masks of M                    Eq. (4) makes masks of M' = decoder([Z ; M])

    The bias. In the paper's ReCLIP the place has one map for all classes, which cancels; in the
    released code it has a free map for each class, and the Reference knows no place. Here position
    and Reference meet in one product: each place has a vector P in the space of texts, and leans to
    the classes whose Reference it resembles. So the maps of all classes come from one P and are
    tied to the texts. M_b no longer depends on the image; what a patch shows comes in through M_q
    and the decoder.

    The masks. M is one number per patch and class, and each patch speaks for itself. The decoder, a
    5x5 convolution, also sees the features Z and the neighbors: it learns, by the same loss, to
    give a patch the class that its surroundings speak for.

    As in ReCLIP, CLIP is frozen and Eq. (4)-(5) are the loss; Logits.rectified is M', from which
    masks, loss and mIoU are read; .reference is M_b, and .positional is 0.

    tau_1: of Eq. (4): M' comes out of a batch norm and is far larger than a cosine (released).
    options: as ReCLIP's, but for those of the positional net, which is not there.
    """
    method = "reclip++"

    def __init__(self, clip, class_names, *, tau_1=0.01, positional_channels=0, **options):
        super().__init__(
            clip, class_names, tau_1=tau_1, positional_channels=positional_channels, **options
        )
        if positional_channels != 0 or self.reference is None:
            raise ValueError("ReCLIP++ has no positional net (positional_channels 0) and cannot do "
                             "without a Reference (prompt_length above 0)")
        C, D = self.W_q.shape
        width = clip.visual.class_embedding.numel()                     # E_v

        self.position_projection = nn.Conv2d(width, D, 1)
        conv = nn.Conv2d(D + C, C, 5, padding=2)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # released
        self.decoder = nn.Sequential(conv, nn.BatchNorm2d(C))
        self.scale = 10                                                 # as released
        self.to(clip.logit_scale.device)

    def rectify(self, Z):
        """Features Z (B, D, h, w) -> Logits, with M' (B, C, h, w) as the rectified ones."""
        W_q, W_r = self.heads()                                         # (C, D) each
        M_q = segmentation_logits(Z, W_q)                               # (B, C, h, w)

        # One vector for each place, the same for all images: how CLIP leans there.
        h, w = Z.shape[2:]
        p = self.clip.visual.positional_grid(h, w)                      # (1, E_v, h, w)
        P = self._once(("P", h, w), self.position_projection, p)        # (1, D, h, w)
        M_b = segmentation_logits(P, W_r).expand_as(M_q)                # (B, C, h, w)
        M = rectify_logits(M_q, M_b, self.subtract)                     # (B, C, h, w)

        decoded = self.decoder(torch.cat([Z, M], dim=1))                # M' (B, C, h, w)
        return Logits(M_q, M_b, Z.new_zeros(1, 1, h, w), decoded, Z)

    @classmethod
    def from_released(cls, path, class_names, W_q=None, device="cpu"):
        """A segmenter from a ReCLIP++ checkpoint that the authors published, in eval mode.

        Arguments and errors are ReCLIP.from_released's; the recipe is 2025's.
        """
        state = read_released(path)
        if "pe_proj.weight" not in state:
            raise ValueError(f"{path} is not a ReCLIP++ checkpoint (it has no pe_proj.weight)")
        require_classes(path, state, "decoder_conv2.weight", class_names)
        clip = load_clip(path, device)
        W_q = check_or_make_W_q(W_q, clip, class_names)

        with whole_file(path):
            vectors = state["text_encoder.prompt_token"][0].float()     # (L, E_t)
            model = cls(clip, class_names, W_q=W_q, prompt_length=len(vectors), cut_names=True)
            model.reference.load_state_dict({"vectors": vectors})
            renamed = {
                "pe_proj": model.position_projection,
                "decoder_conv2": model.decoder[0],
                "decoder_norm2": model.decoder[1],
            }
            for prefix, module in renamed.items():
                module.load_state_dict({
                    key.removeprefix(f"{prefix}."): value
                    for key, value in state.items()
                    if key.startswith(f"{prefix}.")
                })
            model.make_released_dense_visual(state)
        return model.to(device).eval()


def window_labels(similarity):
    """ReCLIP++'s image-level labels: similarity of n windows to texts (n, C) -> (C,) bool.

    Each window names the class that it resembles most, and the image holds all that are named: so a
    small thing is found that would be lost in the whole image, and no threshold has to be chosen.
    The price: a window of mere background names a class too.
    """
    found = torch.zeros(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    found[similarity.argmax(1)] = True
    return found


# --- A guided tour --------------------------------------------------------------------------------

def tour():
    """A crop of one image of shapes through Eq. (1)-(5), before anything is learnt."""
    from datasets import DATA, SETTINGS, open_split  # for the tour alone; the module needs neither
    torch.manual_seed(0)
    facts = DATA["shapes"]
    settings = SETTINGS["shapes"]
    split = open_split("shapes", None, "train")
    model = ReCLIP(
        load_clip(facts.clip),
        facts.classes,
        prompts=facts.prompts,
        positional_gain=settings.positional_gain,
        tau_1=settings.tau_1,
        tau=settings.tau,
    ).train()

    # 64 x 48 pixels: h = 8 and w = 6 differ, so that the axes can be told apart (h = C by chance).
    whole = split.image(0)[None].float() / 255
    image = whole[..., 8:56]
    in_truth = [facts.classes[c] for c in split.truth(0).unique() if c != IGNORE]
    print(f"The image holds {', '.join(in_truth)}.")

    logits = model(image)
    M_b = bias_logits(logits.reference, logits.positional)
    masks = gumbel_softmax_masks(logits.rectified, model.tau_1)
    similarity = model.image_similarity(whole)
    labels = image_level_labels(similarity, settings.threshold, settings.top_k)
    guessed = [name for name, found in zip(facts.classes, labels[0]) if found]
    pooled = masked_features(logits.features, masks)
    S = torch.einsum("bcd,jd->bcj", pooled, model.W_q)
    loss = contrastive_loss(pooled, model.W_q, labels, model.tau)
    mask = segment(logits.rectified, model.output_stride, image.shape[2:], image.shape[2:])

    show("image", image, "I          (B, 3, H, W)")
    show("features", logits.features, "Z          (B, D, h, w)  Sec. 3.1, each patch of length 1")
    show("W_q", model.W_q, "W_q        (C, D)        Sec. 3.1, mean over prompts")
    show("reference(clip)", model.reference(model.clip), "W_r        (C, D)        Eq. (1)")
    show("query_logits", logits.query, "M_q        (B, C, h, w)  Sec. 3.1, cosines")
    show("reference_logits", logits.reference, "M_r        (B, C, h, w)  Sec. 3.2")
    show("positional_logits", logits.positional, "M_p        (1, C, h, w)  Sec. 3.3")
    show("bias_logits", M_b, "M_b        (B, C, h, w)  Eq. (2)")
    show("rectified_logits", logits.rectified, "M          (B, C, h, w)  Eq. (3)")
    show("masks", masks, "M^         (B, C, h, w)  Eq. (4), one class per patch")
    show("image_similarity", similarity, "100 cos    (B, C)        Sec. 3.4, of the whole image")
    show("image_level_labels", labels.float(),
         f"c_1..c_K   (B, C)        Sec. 3.4: {', '.join(guessed)}")
    show("masked_features", pooled, "Z_g pooled (B, C, D)     Sec. 3.4, global average")
    show("S", S, "S          (B, C, C)     Sec. 3.4, mask c against text j")
    show("contrastive_loss", loss, "L          ()            Eq. (5)")
    show("segment", mask, "mask       (H, W)        argmax of M at each pixel")


if __name__ == "__main__":
    tour()
