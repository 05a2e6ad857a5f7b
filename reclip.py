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

What stands here, the equations in the paper's order
    query_text_features             Sec. 3.1    W_q, the frozen classifier
    ReferencePrompt                 Eq. (1)     W_r, from learnable vectors: class-preference bias
    PositionalBias                  Sec. 3.3    M_p, from CLIP's positions: space-preference bias
    bias_logits, rectify_logits     Eq. (2)-(3) M_b = M_r + M_p;  M = M_q - M_b
    gumbel_softmax_masks            Eq. (4)     hard masks that let a gradient through
    image_level_labels              Sec. 3.4    which classes does the image hold?
    masked_features, contrastive_loss  Eq. (5)
    Options, ReCLIP                 all of that as one module, with save and load
    check_texts, read_checkpoint, find_clip   what ReCLIP needs for names and files
    strong_classes, segment         a mask of pixels from the logits of patches
    mask_guided_loss, feature_guided_loss, text_guided_loss, distillation_loss   Eq. (6)-(8)
    RECIPES, PROMPTS                how the authors run CLIP; the 85 templates of the Query
    tour                            python reclip.py: an image through Eq. (1)-(5), in numbers

Symbols
    B images, C classes, D width of CLIP's joint space; H x W pixels, h x w patches, n = h * w
    L prompt vectors, E_t width of CLIP's text transformer, E_v of its vision transformer
    Z    features            (B, D, h, w)  CLIP's patch features, each of length 1
    W_q  query text features (C, D)        rows of length 1
    W_r  reference features  (C, D)        rows of length about 1 / sqrt(C)
    M_q, M_r, M_b, M    logits   (B, C, h, w)
    M_p  positional logits  (1, C, h, w)   the same for all images; (1, 1, h, w) with one channel
    (The paper writes n x C for one image. We keep the grid, h x w = n, and the batch.)

Cosines lie too close together for a softmax. So they are divided by a temperature (here with the
values of OpenAI's CLIP):
    in Eq. (4)     tau_1     0.001    a patch takes its best class, noise decides only near ties
    in Eq. (5)     tau       0.01     CLIP's own temperature, 1 / exp(logit_scale)
    in Eq. (6)     mask_tau  0.01     tau once more, for the student's logits at each pixel
    in evaluation  1 / 100            for probabilities: softmax(scale * M) with scale = 100

Copied elsewhere (with clip_model.py), it is used like this:
    model = ReCLIP(load_clip("ViT-B/16"), ["cat", "dog", "grass"])

    # one step of training: images (B, 3, H, W) in [0, 1], thumbnails of them (B, 3, 224, 224)
    labels = model.image_labels(thumbnails, threshold=23, top_k=2)           # (B, C) bool
    Z = model.features(images)                                               # (B, D, h, w)
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, tau_1=0.001)    # (B, C, h, w)
    loss = contrastive_loss(masked_features(Z, masks), model.W_q, labels, model.tau)
    loss.backward()

    # the mask of one image (1, 3, H, W)
    logits = model.eval()(image).rectified                                   # (1, C, h, w)
    mask = segment(logits, model.output_stride, (H, W), (H, W))              # (H, W) uint8

Where the paper and its authors' released code differ, a comment says so; where both are worth a
run, a field of Options chooses. "ours" was chosen here. The defaults are for the paper's long
trainings; a folder of your own wants recipe="2025", positional_gain=None and a tenth of the
learning rate (datasets.own_images says why).
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_model import (
    MEAN,
    MODELS,
    STD,
    load_clip,
    maskclip,
    normalize_pixels,
    patch_tower,
    written_atomically,
)

IGNORE = 255  # in masks: no class


# --- Sec. 3.1: the Query --------------------------------------------------------------------------

@torch.no_grad()
def query_text_features(clip, class_names, prompts=None):
    """W_q (Sec. 3.1): for each class the normalized mean of its normalized text features, (C, D).

    One sentence about a cat is as much about the sentence as about the cat; the mean over many
    keeps what they share. "sofa | couch" is one class with two names, and both go into the
    mean: each is one more way to find it.

    prompts: templates with {} for the name; None: PROMPTS.
    """
    device = clip.logit_scale.device
    rows = []

    for name in class_names:
        synonyms = [synonym.strip() for synonym in name.split("|")]
        texts = [prompt.format(synonym) for synonym in synonyms for prompt in prompts or PROMPTS]
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
    M_r = Z . W_r is to learn that excess, of each class and on each kind of patch, so that
    M_q - M_r is free of it. W_r is not a free C x D matrix but comes from texts: so it stays among
    the directions that CLIP's text encoder can make, and L vectors are all that is learnt.

    class_names: the Reference reads the first synonym only, the Query all of them. For a bias one
        text per class is enough, since the vectors before it are learnt.
    length: L. Sec. 3.2 has 73 = 77 - 2 (start and end) - 2 (name), whatever the name; the released
        code cuts longer names off. We shorten the prompt instead, so that the longest name fits.
    norm: the paper does not say how long W_r is. "frobenius" (released) divides by the norm of the
        whole C x D matrix: a row has length about 1 / sqrt(C), and M_r is a mild correction to M_q.
        "class" gives each row length 1: M_r is then as large as M_q itself.
    prompt_per_class: True gives each class L vectors of its own (ours; CoOp's class-specific
        contexts). The paper shares them "for efficiency". But with a small text encoder one prompt
        moves all rows of W_r by nearly the same vector, and a logit that all classes share changes
        no mask. So shapes has it.
    cut_names: for the files that the authors published; see cut_ending.
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
        self.norm = norm

        # What follows the prompt in the text of each class: its name, and EOT, where it is read.
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

    def forward(self, clip):
        W_r = clip.encode_prompted(self.vectors, self.endings)          # (C, D)
        if self.norm == "frobenius":
            return W_r / W_r.norm()
        return W_r / W_r.norm(dim=-1, keepdim=True)


# --- Sec. 3.3: the positional net, space-preference bias ------------------------------------------

class PositionalBias(nn.Module):
    """Sec. 3.3: three 3x3 convolutions with batch norm, p (1, E_v, h, w) -> M_p (1, C, h, w).

    (The paper says no more of the net; the ReLUs between and the widths are as released.)

    CLIP is better at the center of an image than near its border (Fig. 1a): presumably because
    people photograph what they name, and put it there. What CLIP is told of places is its
    positional embedding p. So a function of p can say how CLIP leans at each place, and as p is no
    image, it can say nothing else: M_p is the same for all images of one size.

    channels: the paper has one, shared by all classes (Eq. (2)). A logit that all classes share
        cancels in every softmax and argmax over classes: it changes no mask and receives no
        gradient. The released code has C, one per class, and so do we; channels=1 is the
        paper's version.
    last_relu: released: a ReLU after the last batch norm too, hence M_p >= 0. (The paper ends with
        the batch norm.)
    gain: fixed factor on the output (ours; 1, as in the paper, on the benchmarks). By its batch
        norm M_p starts with a spread of 0.6, while cosines of different classes differ by 0.02 (in
        OpenAI's CLIP): at first M_p decides the masks. The paper's long trainings shrink it. For a
        short one a small gain lets it start small and, since gradients carry the gain too, move
        calmly (datasets.own_images has numbers).
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

    subtract: False adds M_b instead (Table 5). The two are not equivalent: W_r must come from
        texts, and with its last ReLU M_p is never below 0, so neither can just change its sign. The
        paper measures minus to be better, and speculates that it is the better prior.
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

    softmax(M / tau_1 + g), as released: the temperature divides the logits before the noise g is
    added. The usual formula divides both, softmax((M + g) / tau_1): there cosines that differ by
    hundredths would drown in noise of spread 1, and masks would be random.
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


def masked_features(features, masks):
    """Z_g of Sec. 3.4 and its pooling: Z (B, D, h, w), masks (B, C, h, w) -> (B, C, D).

    One vector per class: the patches under its mask are summed, and divided by the number of all n
    patches (the paper's "global average pooling", and released). So a small mask gives a short
    vector, and the loss rewards finding the whole object too.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)             # (B, C, D)
    return total / masks[0, 0].numel()


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
    # was left over, and there is nothing that it should look like.
    # (clamp: an image without any label adds 0, not 0 / 0)
    K = labels.sum(1).clamp(min=1)                                      # (B,)
    return -((log_p * labels).sum(1) / K).mean()


# --- All of it as one module ----------------------------------------------------------------------

def option(default, help, choices=None):
    """A field of a dataclass of options: its default, what it is and whose, what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """What can be chosen about a ReCLIP. The defaults are the paper's and its released code's.

    The checkpoint keeps them, and train.py makes an option of its command line of each.
    """
    recipe: str = option(
        "cvpr2024", "how CLIP is run for patches: RECIPES in reclip.py; 2025 on shapes and on your "
        "own images", ("cvpr2024", "2025"))
    prompt_length: int = option(
        73, "L of Eq. (1), in tokens (Sec. 3.2); shortened so that the longest class name fits "
        "(ours); 0: no Reference")
    prompt_per_class: bool = option(
        False, "each class has L vectors of its own (ours); the paper's are shared")
    reference_norm: str = option(
        "frobenius", "length of W_r: of the whole matrix (released) or of each class",
        ("frobenius", "class"))
    query_learnable: bool = option(False, "the Query's prompt learns too (Table 3)")
    positional_channels: int = option(
        None, "channels of M_p: one a class if not given (released), 1 (Eq. (2)), 0: no M_p")
    positional_last_relu: bool = option(
        True, "ReLU after the last batch norm of the positional net (released)")
    positional_gain: float = option(
        1.0, "fixed factor on M_p, so that it starts small (ours); None: CLIP's temperature / 4")
    subtract: bool = option(True, "subtract the bias; else add it (Table 5)")
    tau_1: float = option(0.001, "temperature of the Gumbel-softmax, Eq. (4) (released)")
    tau: float = option(
        None, "temperature of Eq. (5); if not given, 1 / exp(CLIP's logit_scale) (released)")
    cut_names: bool = option(
        False, "class names cut to three tokens: published files (cut_ending in reclip.py)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}; it must be {' or '.join(choices)}")


class Output(NamedTuple):
    """What ReCLIP says of each patch, part by part."""
    query: torch.Tensor       # M_q (B, C, h, w), cosines
    reference: torch.Tensor   # M_r (B, C, h, w)
    positional: torch.Tensor  # M_p (1, C, h, w), or (1, 1, h, w) with one channel
    rectified: torch.Tensor   # M   (B, C, h, w)
    features: torch.Tensor    # Z   (B, D, h, w), each patch of length 1


# State-dict keys with these prefixes are CLIP's weights; our checkpoints leave them out.
FROZEN = ("clip.", "dense_visual.")


class ReCLIP(nn.Module):
    """CLIP, frozen, with what is learnt about its biases: images (B, 3, H, W) in [0, 1] -> Output.

    clip: a CLIP of load_clip's. It is frozen in place (requires_grad off, eval mode) and kept, not
        copied.
    class_names: C strings, synonyms separated by "|": ["cat | kitten", "dog", "grass"].
    W_q: (C, D), if it is known already; then the prompts are not read.
    prompts: templates of the Query, with {} for the name; None: PROMPTS.
    attention: how CLIP's last block is read, a function like clip_model.maskclip (the paper's).
        extras/paper.py has others. Its name goes into the checkpoint.
    reading: None, but for checkpoints that extras/published.py has converted: their class token and
        layer norm eps, {"class_token": (E_v,), "eps": 1e-6}.
    protocol: how evaluation shows it images, kept in the checkpoint for eval.py: {"long_side": ..,
        "short_side": .., "antialias": .., "denoise": ..}.
    options: fields of Options, by name: ReCLIP(clip, names, tau_1=0.01).

    In eval mode W_q, W_r and M_p are made once: after a change by hand, call eval() again.
    """
    stage = "rectify"  # in the checkpoint: what kind of file it is

    def __init__(
        self,
        clip,
        class_names,
        *,
        W_q=None,
        prompts=None,
        attention=maskclip,
        reading=None,
        protocol=None,
        **options,
    ):
        super().__init__()
        check_texts(class_names, prompts)
        options = Options(**options)
        self.options = options
        self.class_names = tuple(class_names)
        self.prompts = tuple(prompts or PROMPTS)
        self.attention = attention
        self.reading = reading
        self.protocol = protocol
        self.scale = 100                          # as released
        self.output_stride = clip.visual.patch    # pixels from one patch to the next
        self.tau = options.tau
        if self.tau is None:
            self.tau = clip.temperature()

        # Texts and whole images (the pseudo-labels) are encoded by CLIP as it was trained. For
        # patches the recipe may run the same weights in another way.
        self.clip = clip.requires_grad_(False).eval()
        exact_gelu = RECIPES[options.recipe].exact_gelu
        self.dense_visual = patch_tower(clip.visual, exact_gelu, **(reading or {}))

        if W_q is None:
            W_q = query_text_features(clip, class_names, self.prompts)
        self.register_buffer("W_q", W_q)          # (C, D)

        # The parts that learn. None where an ablation leaves one out.
        self.query = None
        self.reference = None
        self.positional = None
        if options.query_learnable:
            # Table 3: a second prompt, in the place of the Query's. Its rows have length 1 (those
            # of W_r are shorter). Eq. (5) still compares with CLIP's own W_q (ours): a loss that
            # could move its own targets would have a trivial minimum.
            self.query = ReferencePrompt(
                clip,
                class_names,
                options.prompt_length,
                norm="class",
                prompt_per_class=options.prompt_per_class,
                cut_names=options.cut_names,
            )
        if options.prompt_length:
            self.reference = ReferencePrompt(
                clip,
                class_names,
                options.prompt_length,
                norm=options.reference_norm,
                prompt_per_class=options.prompt_per_class,
                cut_names=options.cut_names,
            )
        channels = options.positional_channels
        if channels is None:
            channels = len(class_names)
        if channels:
            width = clip.visual.class_embedding.numel()                 # E_v
            gain = options.positional_gain
            if gain is None:
                gain = clip.temperature() / 4
            self.positional = PositionalBias(width, channels, options.positional_last_relu, gain)

        # In eval mode nothing learns, so the heads, and M_p on the grid of the last image, are made
        # once and kept. They are no part of the state dict.
        self.register_buffer("kept_heads", None, persistent=False)      # (2, C, D)
        self.register_buffer("kept_M_p", None, persistent=False)        # (1, C, h, w)
        self.to(clip.logit_scale.device)

    def train(self, mode=True):
        """As in every module; CLIP stays in eval mode, and what eval mode keeps is made anew."""
        super().train(mode)
        self.clip.eval()
        self.dense_visual.eval()
        self.kept_heads = None
        self.kept_M_p = None
        if not mode:
            with torch.no_grad():
                self.kept_heads = torch.stack(self.heads())             # (2, C, D)
        return self

    # -- from an image to its logits ---------------------------------------------------------------

    @torch.no_grad()
    def features(self, images, valid=None):
        """Z (Sec. 3.1): images (B, 3, H, W) in [0, 1] -> (B, D, h, w), each patch of length 1.

        valid: (B, H, W) bool, False where an image was padded; None: nowhere.
        No gradient: CLIP is frozen. Length 1, so that products with W_q are cosines.
        """
        recipe = RECIPES[self.options.recipe]
        pixels = normalize_pixels(images, recipe.mean, recipe.std, valid)
        Z = self.clip.encode_image_dense(pixels, self.dense_visual, self.attention)
        return F.normalize(Z, dim=1)                                    # (B, D, h, w)

    def heads(self):
        """Weights of the two segmentation heads, which the student inherits: W_q, W_r (C, D).

        With query_learnable the first is what was learnt in its place; without a Reference the
        second is 0.
        """
        if self.kept_heads is not None:
            W_q, W_r = self.kept_heads
            return W_q, W_r

        W_q = self.W_q
        if self.query is not None:
            W_q = self.query(self.clip)
        W_r = torch.zeros_like(self.W_q)
        if self.reference is not None:
            W_r = self.reference(self.clip)
        return W_q, W_r

    def positional_logits(self, h, w):
        """M_p on a grid of h x w patches, (1, C, h, w); (1, 1, h, w) zeros without a net."""
        if self.positional is None:
            return self.W_q.new_zeros(1, 1, h, w)
        if self.kept_M_p is not None and self.kept_M_p.shape[2:] == (h, w):
            return self.kept_M_p

        p = self.clip.visual.positional_grid(h, w)                      # (1, E_v, h, w)
        M_p = self.positional(p)                                        # (1, C, h, w)
        if not self.training:
            M_p = M_p.detach()
            self.kept_M_p = M_p
        return M_p

    def rectify(self, Z):
        """Eq. (1)-(3) on features Z (B, D, h, w): all logits, by name."""
        W_q, W_r = self.heads()                                         # (C, D) each
        M_q = segmentation_logits(Z, W_q)                               # (B, C, h, w)
        M_r = segmentation_logits(Z, W_r)                               # (B, C, h, w)
        M_p = self.positional_logits(*Z.shape[2:])                      # (1, C, h, w)
        M_b = bias_logits(M_r, M_p)                                     # (B, C, h, w)
        M = rectify_logits(M_q, M_b, self.options.subtract)             # (B, C, h, w)
        return Output(M_q, M_r, M_p, M, Z)

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

    # -- files: what was learnt, without CLIP ------------------------------------------------------

    def learnt(self):
        """{key: tensor}: the prompts, the positional net, and W_q.

        W_q is not learnt, but kept, so that loading needs no 85 x C texts.
        """
        state = self.state_dict()
        return {key: value for key, value in state.items() if not key.startswith(FROZEN)}

    def load_state_dict(self, state, strict=True, assign=False):
        """As in every module, but CLIP's weights may be left out, as `learnt` does.

        They are put in from here, so that `strict` still misses what was learnt.
        """
        own = self.state_dict()
        frozen = {key: value for key, value in own.items() if key.startswith(FROZEN)}
        result = super().load_state_dict(frozen | dict(state), strict, assign)
        self.train(self.training)  # what eval mode keeps was made of the old weights
        return result

    def save(self, path, **more):
        """What was learnt, class names, options and CLIP's identity, in one file.

        CLIP's own weights are not in it: 19 MB for VOC instead of 600.
        more: further entries of the file, such as train.py's for --resume.
        Errors: OSError if it cannot be written; the old file then stays as it was.
        """
        content = {
            "stage": self.stage,
            "learnt": self.learnt(),
            "class_names": list(self.class_names),
            "options": dataclasses.asdict(self.options),
            "prompts": list(self.prompts),
            "attention": self.attention.__name__,
            "reading": self.reading,
            "protocol": self.protocol,
            "clip": {
                "source": self.clip.source,
                "identity": self.clip.identity(),
                "quick_gelu": self.clip.quick_gelu,
            },
        }
        with written_atomically(path) as temporary:
            torch.save(content | more, temporary)

    @classmethod
    def load(cls, path, clip=None, device=None, attention=maskclip):
        """A working segmenter from save's file, in eval mode. No code from the file is executed.

        clip: the CLIP that it was learnt on, from whatever file; None: find_clip looks for it.
        device: None for that of `clip`; without a clip, the CPU.
        attention: the function of that name, if it was learnt with another than MaskCLIP's.
        Errors: FileNotFoundError; ValueError for a file that is none of save's, or of another CLIP.
        """
        content = read_checkpoint(path, cls.stage)
        if attention.__name__ != content["attention"]:
            raise ValueError(f"{path} was learnt with the attention {content['attention']}, not "
                             f"{attention.__name__}: give load that function (extras/paper.py)")

        known = content["clip"]
        if clip is None:
            source = find_clip(path, known["source"])
            clip = load_clip(source, device or "cpu", known["quick_gelu"])
        if clip.identity() != known["identity"]:
            raise ValueError(f"{path} was learnt on another CLIP than {clip.source}: give the "
                             f"weights of {known['source']} with --clip (or another activation, by "
                             "--exact-gelu)")

        learnt = content["learnt"]
        model = cls(
            clip,
            content["class_names"],
            W_q=learnt["W_q"],
            prompts=content["prompts"],
            attention=attention,
            reading=content["reading"],
            protocol=content["protocol"],
            **content["options"],
        )
        model.load_state_dict(learnt)
        return model.to(device or clip.logit_scale.device).eval()


def check_texts(class_names, prompts):
    """ValueError unless both are lists (a string would be taken apart into letters), and each
    prompt has its place for the name. prompts: None for PROMPTS.
    """
    if isinstance(class_names, str):
        raise ValueError("class names must be a list, such as ['cat', 'dog | puppy']: "
                         f"{class_names}")
    if prompts is None:
        return
    if isinstance(prompts, str) or not prompts or any(text.count("{}") != 1 for text in prompts):
        raise ValueError("prompts must be a list of templates, each with {} once for the name, "
                         f"such as ['a photo of a {{}}.']: {prompts}")


def read_checkpoint(path, stage=None):
    """What a save() of ours wrote, as a dict. stage: the kind that is wanted; None: any."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["stage"]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint at {path}: train one first, or say where "
                                "it is") from None
    except Exception as error:
        raise ValueError(f"{path} is none of our checkpoints, or is damaged; extras/published.py "
                         "converts the authors' own") from error
    if stage not in (None, found):
        raise ValueError(f"{path} is of the stage {found}, not {stage}")
    return content


def find_clip(checkpoint_path, source):
    """Where is the CLIP that a checkpoint was learnt on? -> a name or a path, for load_clip

    source: where it was then. The checkpoint may have come from another machine. So its own folder
    is looked into first (clip.pt), then `source`, then for a file of that name.
    """
    folder = Path(checkpoint_path).parent
    clip_home = Path(os.environ.get("CLIP_HOME", "~/.cache/clip")).expanduser()
    places = [folder / "clip.pt"]
    if source in MODELS:
        places = [*places, source]
    elif source:
        name = PureWindowsPath(source).name  # it knows both slashes, on every system
        places = [*places, Path(source), folder / name, clip_home / name]

    for place in places:
        if place in MODELS or Path(place).is_file():
            return place
    raise FileNotFoundError(f"{checkpoint_path} was learnt on the CLIP of {source}, which is not "
                            "there: give its weights with --clip, or put them beside the "
                            "checkpoint as clip.pt")


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
    return kept | ~kept.any()  # all, if none is kept


def segment(
    logits,
    output_stride,
    image_size,
    mask_size,
    denoise=0.0,
    background=0.0,
    scale=100.0,
):
    """The mask of one image: logits on patches (1, C, h, w) -> class of each pixel (H0, W0), uint8.

    The logits are enlarged bilinearly, first to the image that the network saw, then to the mask,
    and each pixel gets its best class:

        pixels = interpolate(logits, (h * output_stride, w * output_stride))[:, :, :H, :W]
        mask = interpolate(pixels, (H0, W0)).argmax(1)

    The code gives the same, with one class after the other: C numbers for each pixel of a large
    image need much memory.

    output_stride: pixels of the seen image from one cell of the grid to the next.
    image_size: (H, W) of the image that the network saw. The cells may reach over its edge, where
        it was padded. (The released code stretches the padded grid onto the unpadded image, which
        shifts masks by up to 15 pixels.)
    mask_size: (H0, W0) of the mask that is wanted.
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

    H, W = image_size
    padded_size = [side * output_stride for side in logits.shape[2:]]
    mask = torch.zeros(mask_size, dtype=torch.uint8, device=logits.device)
    best = logits.new_full(mask_size, -torch.inf)   # (H0, W0), the logit of the class in `mask`
    total = best.clone()                            # (H0, W0), log sum_c exp(scale * M_c) so far
    for c in range(logits.shape[1]):
        pixels = F.interpolate(logits[:, c:c + 1], size=padded_size, mode="bilinear")
        pixels = pixels[..., :H, :W]                                    # (1, 1, H, W)
        pixels = F.interpolate(pixels, size=mask_size, mode="bilinear")[0, 0]    # (H0, W0)

        if background:
            total = total.logaddexp(scale * pixels)  # dropped classes keep their share
        pixels = torch.where(kept[c], pixels, -torch.inf)  # a dropped class wins nowhere
        mask[pixels > best] = c
        best = best.maximum(pixels)

    if background:
        mask[(scale * best - total).exp() < background] = IGNORE
    return mask                                                         # (H0, W0)


# --- Sec. 3.5: the losses of distillation ---------------------------------------------------------

# The student has .features, .rectify and .to_pixels, as ReCLIP has; deeplab.py holds the paper's.

def mask_guided_loss(student_logits, teacher_masks, tau, to_pixels):
    """Eq. (6): L_mask = -1/(HW) sum_ij log P_ij(M~_ij), P = softmax of the student's M^D.

    The teacher's mask M~ is taken for the truth, errors included. Why the student can still become
    better than its teacher (our reading): it has to find what many masks have in common, and errors
    that fall here in one image and there in another are not that.

    student_logits: M^D on the student's grid (B, C, h, w).
    teacher_masks: M~ (B, H, W) int64; IGNORE where an image was padded.
    tau: the logits are cosines; as in Eq. (5) a temperature makes probabilities of them. (Eq. (6)
        prints none.)
    to_pixels: the student's.
    -> scalar, the mean over the pixels of all images, without the padding
    """
    C = student_logits.shape[1]
    H, W = teacher_masks.shape[1:]

    # For all images at once: cross_entropy(to_pixels(logits / tau, H, W), teacher_masks).
    def of_some_images(logits, masks):
        pixels = to_pixels(logits / tau, H, W)                          # (images, C, H, W)
        return F.cross_entropy(pixels, masks, ignore_index=IGNORE, reduction="sum")

    total = sum_in_groups(of_some_images, 0, C * H * W, student_logits, teacher_masks)
    return total / (teacher_masks != IGNORE).sum()


def feature_guided_loss(Z, Z_student, valid, to_pixels, student_to_pixels):
    """Eq. (7): L_feat = || Z - Z^ ||_1, both enlarged to the image's size (H, W).

    The student's head is made of CLIP's texts, which only mean something to features of CLIP's
    space: this loss brings the student's features there.

    Z: the teacher's features (B, D, h, w), enlarged by to_pixels.
    Z_student: Z^ (B, D, h', w'), enlarged by student_to_pixels.
    valid: (B, H, W) bool, the pixels of the images; False where they were padded.
    -> scalar: the norm is summed over the D features of a pixel, the mean is over pixels (ours).
        The paper does not say; but a mean over D too would make this term D times weaker, next to
        nothing beside Eq. (6).
    """
    H, W = valid.shape[1:]

    # For all channels at once: the mean over valid pixels of
    # (student_to_pixels(Z_student, H, W) - to_pixels(Z, H, W)).abs().sum(1).
    # An L1 norm is a sum over channels, so groups of channels may be added. Of a cosine, an L2
    # norm or anything else that couples channels this is not true: such a loss needs all D at once.
    def of_some_channels(Z, Z_student):
        # channels last: the same but for rounding, and a CPU enlarges it more than twice as fast
        Z = Z.contiguous(memory_format=torch.channels_last)
        Z_student = Z_student.contiguous(memory_format=torch.channels_last)
        difference = student_to_pixels(Z_student, H, W) - to_pixels(Z, H, W)  # (B, channels, H, W)
        return (difference.abs().sum(1) * valid).sum()                  # an L1 norm at each pixel

    total = sum_in_groups(of_some_channels, 1, valid.numel(), Z, Z_student)
    return total / valid.sum()


def text_guided_loss(student_logits, Z_student, W_q, labels, tau_1, tau):
    """L_text of Sec. 3.5: Eq. (4)-(5) once more, with the student's own features and masks.

    Eq. (6) and (7) hand down what the teacher knows, errors included; this one asks, as in
    rectification, whether what the student calls a cat looks like "cat".

    student_logits: M^D (B, C, h, w). Z_student: Z^ (B, D, h, w). labels: (B, C) bool.
    -> scalar
    (Released: the teacher's masks, and no gradient to the student.)
    """
    masks = gumbel_softmax_masks(student_logits, tau_1)                 # (B, C, h, w)
    pooled = masked_features(Z_student, masks)                          # (B, C, D)
    return contrastive_loss(pooled, W_q, labels, tau)


def distillation_loss(mask_loss, feature_loss, text_loss, alpha=0.5, beta=0.5):
    """Eq. (8): L_distill = L_mask + alpha L_feat + beta L_text; alpha = beta = 0.5 (Sec. 3.5)."""
    return mask_loss + alpha * feature_loss + beta * text_loss


MOST_NUMBERS = 2 ** 25  # of an enlarged map in memory at once


def sum_in_groups(function, dim, numbers, *tensors):
    """function(*tensors), a sum over dimension `dim`, with a part of that dimension at a time.

    Eq. (6) and (7) speak of maps at the image's size. At 512 x 512 pixels the features alone are
    512 x 262,144 numbers per image, twice. So a group (of images, of channels) is enlarged, reduced
    to a number and forgotten; backward computes it once more. What fits at once is done plainly.

    numbers: of the enlarged map, for each index of `dim`.
    """
    size = max(1, MOST_NUMBERS // numbers)
    groups = list(zip(*[tensor.split(size, dim) for tensor in tensors]))
    if len(groups) == 1:
        return function(*tensors)

    total = 0
    for group in groups:
        total = total + checkpoint(
            function, *group, use_reentrant=False, preserve_rng_state=False
        )
    return total


# --- The authors' two recipes, and the prompts ----------------------------------------------------

class Recipe(NamedTuple):
    """How CLIP is run for the features of patches."""
    exact_gelu: bool  # in its image tower; False: CLIP's own activation
    mean: tuple       # of the images, red, green, blue in [0, 1]
    std: tuple


# The authors' code exists in two states. On every data set they differ in the two things below;
# sizes and epochs, which depend on the data set, stand in its entry in datasets.py.
#
# cvpr2024 was published together with the paper's checkpoints, so we infer that it made the paper's
# numbers. For patches it runs CLIP's image tower with another activation and normalization than
# CLIP was trained with. 2025 runs it as it was trained, and so do we on shapes and on images of
# your own. In both, texts and whole images (the pseudo-labels) are encoded as CLIP was trained.
RECIPES = {
    "cvpr2024": Recipe(True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "2025": Recipe(False, MEAN, STD),                                        # CLIP's
}


def cut_ending(ending):
    """How the authors read a text: [name, EOT] cut to three tokens, of which the largest is read.

    EOT has the largest id of all; so this is EOT as usual, unless the name is too long. Of "chest
    of drawers" the three words are left, and whichever has the largest id is read; what stands
    after it is not seen, since the tower is causal. Three names of ADE20K are cut like this.
    """
    kept = ending[:3]
    read = kept.index(max(kept))
    return kept[:read + 1]


# The prompts of the Query: the 80 templates of CLIP's ImageNet ensemble and 5 "in the scene" ones
# (MaskCLIP's list, which the authors use too).
PROMPTS = (
    "a bad photo of a {}.",
    "a black and white photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of a {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a dark photo of a {}.",
    "a good photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a low resolution photo of a {}.",
    "a pixelated photo of a {}.",
    "a doodle of a {}.",
    "a drawing of a {}.",
    "a painting of a {}.",
    "a photo of a {}.",
    "a rendering of a {}.",
    "a rendition of a {}.",
    "a sculpture of a {}.",
    "a sketch of a {}.",
    "a tattoo of a {}.",
    "a photo of a clean {}.",
    "a photo of a cool {}.",
    "a photo of a dirty {}.",
    "a photo of a hard to see {}.",
    "a photo of a large {}.",
    "a photo of a nice {}.",
    "a photo of a small {}.",
    "a photo of a weird {}.",
    "a cartoon {}.",
    "a embroidered {}.",
    "a origami {}.",
    "a plastic {}.",
    "a plushie {}.",
    "a toy {}.",
    "art of a {}.",
    "graffiti of a {}.",
    "itap of a {}.",
    "a {} in a video game.",
    "there is a {} in the scene.",
    "this is a {} in the scene.",
    "a bad photo of the {}.",
    "a black and white photo of the {}.",
    "a blurry photo of the {}.",
    "a bright photo of the {}.",
    "a close-up photo of the {}.",
    "a cropped photo of the {}.",
    "a dark photo of the {}.",
    "a good photo of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a low resolution photo of the {}.",
    "a pixelated photo of the {}.",
    "a doodle of the {}.",
    "a drawing of the {}.",
    "a painting of the {}.",
    "a photo of the {}.",
    "a rendering of the {}.",
    "a rendition of the {}.",
    "a sculpture of the {}.",
    "a sketch of the {}.",
    "a tattoo of the {}.",
    "a photo of the clean {}.",
    "a photo of the cool {}.",
    "a photo of the dirty {}.",
    "a photo of the hard to see {}.",
    "a photo of the large {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "the embroidered {}.",
    "the origami {}.",
    "the plastic {}.",
    "the plushie {}.",
    "the toy {}.",
    "art of the {}.",
    "graffiti of the {}.",
    "itap of the {}.",
    "the {} in a video game.",
    "there is the {} in the scene.",
    "this is the {} in the scene.",
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "itap of my {}.",
    "this is one {} in the scene.",
)


# --- A guided tour --------------------------------------------------------------------------------

def show(name, tensor, note):
    """One line of the tour: name, shape, range, what it is."""
    shape = str(tuple(tensor.shape))
    print(f"{name:<22}{shape:<18}{tensor.min().item():8.3f} .. {tensor.max().item():<8.3f}{note}")


def tour():
    """A crop of one image of shapes through Eq. (1)-(5), before anything is learnt."""
    from datasets import DATA, open_split  # for the tour alone; the module does not need it
    torch.manual_seed(0)
    shapes = DATA["shapes"]
    numbers = shapes.hyper_parameters()
    split = open_split("shapes", None, "train")
    model = ReCLIP(
        load_clip(shapes.clip),
        shapes.classes,
        prompts=shapes.prompts,
        recipe="2025",
        positional_gain=numbers["positional_gain"],
        tau_1=numbers["tau_1"],
        tau=numbers["tau"],
    ).train()

    # 64 x 48 pixels: h = 8 and w = 6 differ, so that the axes can be told apart (h = C by chance).
    whole = split.image(0)[None].float() / 255
    image = whole[..., 8:56]
    in_truth = [shapes.classes[c] for c in split.truth(0).unique() if c != IGNORE]
    print(f"The image holds {', '.join(in_truth)}.")

    logits = model(image)
    M_b = bias_logits(logits.reference, logits.positional)
    masks = gumbel_softmax_masks(logits.rectified, numbers["tau_1"])
    similarity = model.image_similarity(whole)
    labels = image_level_labels(similarity, numbers["threshold"], numbers["top_k"])
    guessed = [name for name, found in zip(shapes.classes, labels[0]) if found]
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
