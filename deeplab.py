"""DeepLab V2 with heads made of texts: the student that learns from the rectified CLIP (Sec. 3.5).

The student in one drawing. What stands in [brackets] learns; the heads W_q and W_r are fixed.

    image (B, 3, H, W) in [0, 1]
      |
      |  minus ImageNet's mean, over its standard deviation
      v
    [backbone]  ResNet-101; the last two of its stages dilate instead of striding
      |
      |  (B, 2048, h, w): one cell of the grid per 8 x 8 pixels (tiny, for shapes: 96, 4 x 4)
      |
      +-------------------+--------------------+--------------------+
      v                   v                    v                    v
    [3x3, dilation 6]   [3x3, dilation 12]   [3x3, dilation 18]   [3x3, dilation 24]   ASPP
      |                   |                    |                    |
      +-------------------+------- (+) --------+--------------------+
                                    |
                                    |  each cell's vector divided by its length
                                    v
                            Z^ (B, D, h, w)  <-------- Eq. (7): be like the Z of CLIP, frozen
                                    |
                        +-----------+-----------+
                        |                       |
                  Z^ . rows of W_q        Z^ . rows of W_r
                        v                       v
                query (B, C, h, w)      reference (B, C, h, w)
                        |                       |
                        +--------> (-) <--------+
                                    |
                                    v
                           M^D (B, C, h, w)  <-------- text-guided loss: masks made of M^D,
                                    |                  Eq. (4), pool Z^; what they pool must
                                    |                  resemble the text of its class, Eq. (5)
                                    |
                                    |  to_pixels: bilinear, s times larger, cut to H x W
                                    v
                          pixels (B, C, H, W)  <------ Eq. (6): give every pixel the class
                                    |                  that the rectified CLIP gave it
                                    |  argmax over C
                                    v
                              masks (B, H, W)

The losses stand in reclip.py: feature_guided_loss, text_guided_loss, mask_guided_loss.

What stands here
    dilated_resnet, tiny_resnet    the backbones
    ASPP                           four dilated convolutions, summed: the end of DeepLab V2
    STUDENTS                       what there is to choose: resnet101, resnet50, tiny; at the end of
                                   the file also resnet50_v1c, that of the authors
    DeepLabV2                      all of it as one module, with save and load; it needs no CLIP
      .features                    images -> Z^
      .rectify                     Z^ -> M^D, by heads inherited from rectification

Symbols
    B images, C classes, D width of CLIP's joint space; H x W pixels, h x w cells of the grid
    s    output stride: one cell is s x s pixels; h = ceil(H / s), w = ceil(W / s)
    Z^   the student's features    (B, D, h, w)         each cell of length 1, as in CLIP's Z
    W_q  query text features       (C, D)               each row of length 1
    W_r  reference text features   (C, D)               the whole matrix of length 1 (Frobenius
                                                        norm), so a row has about 1 / sqrt(C)
    M_p  positional logits         (1, C, h0, w0)       not in the default head (Table 6)
    M^D  the student's logits      (B, C, h, w)

W_q and W_r come from a rectified CLIP, as ReCLIP.heads() in reclip.py returns them. Products of
vectors of length 1 are cosines: that is what the query logits are, and M^D is a cosine less a mild
correction. It is mild because the rows of W_r are short: a reference with rows of length 1 would
be as strong as the query. (train.py --reference-norm class makes such ones.)

Copied elsewhere (with torch and torchvision installed), it is used like this:
    student = DeepLabV2.load("distill.pt")                               # trained, in eval mode
    with torch.no_grad():
        logits = student(images).rectified                               # images in [0, 1]
    masks = student.to_pixels(logits, *images.shape[2:]).argmax(1)       # (B, H, W)
To train one (train.train_distillation has the loop), reclip.py gives the texts of its head:
    W_q, W_r = ReCLIP.load("rectify.pt").heads()                         # (C, D) each
    student = DeepLabV2(["cat", "dog"], W_q, W_r, backbone_weights="imagenet")

Sources: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs" (2018), which is DeepLab V2; torchvision's ResNets.
"""

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, values in [0, 1] (torchvision)
STD = (0.229, 0.224, 0.225)

# The rows of Table 6 with the paper's mIoU on VOC. "original" is a classifier that learns; the
# others are inherited from rectification and fixed.
HEADS = (
    "original",                    # 73.8
    "query",                       # 74.1
    "query_reference",             # 75.4, the default
    "query_reference_positional",  # 75.0
)


# --- Backbones ------------------------------------------------------------------------------------

def dilated_resnet(name):
    """torchvision's ResNet, made for dense features: (B, 3, H, W) -> (B, 2048, h, w) at stride 8.

    name: "resnet50" or "resnet101". The parts keep torchvision's names: its state dicts fit.
    """
    # A ResNet halves its grid five times, to one cell per 32 x 32 pixels: a distant person is one
    # cell, and no enlarging brings the outline back. So its last two stages do not stride, and
    # the grid is four times finer on each side. Their kernels were trained on the coarse grids,
    # though. With dilation 2, then 4, their taps lie as many pixels apart as in training: the
    # ImageNet weights see what they know.
    net = torchvision.models.get_model(name, replace_stride_with_dilation=[False, True, True])

    # The pooling and the classifier at the end would throw the places away.
    parts = OrderedDict(net.named_children())
    del parts["avgpool"]
    del parts["fc"]
    return nn.Sequential(parts)


def resnet101():
    """The depth of Chen et al.; the paper names DeepLab V2 and no depth."""
    return dilated_resnet("resnet101")


def resnet50():
    """The depth of the released code."""
    return dilated_resnet("resnet50")


def residual_block(channels_in, channels_out, stride):
    """Two 3x3 convolutions and a shortcut: ResNet's block, which torchvision builds.

    The shortcut is a 1x1 convolution where the number of channels changes, else the identity.
    """
    shortcut = None
    if channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    return BasicBlock(channels_in, channels_out, stride, shortcut)


def tiny_resnet():
    """For the 64 x 64 images of shapes (ours): (B, 3, H, W) -> (B, 96, h, w) at stride 4.

    0.2 M parameters.
    """
    return nn.Sequential(
        # stem: (B, 24, H/2, W/2)
        nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        # stage 1: (B, 24, H/2, W/2)
        residual_block(24, 24, stride=1),
        # stage 2: (B, 48, H/4, W/4)
        residual_block(24, 48, stride=2),
        # stage 3: (B, 96, H/4, W/4)
        residual_block(48, 96, stride=1),
    )


def read_file(path):
    """What torch.save wrote at path. Errors: FileNotFoundError, or ValueError for another file."""
    try:
        # weights_only: tensors and plain values. Any other pickle may run programs.
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except Exception as error:  # torch and pickle have no one kind of error for it
        raise ValueError(f"{path} is damaged, or no file of tensors") from error


def load_backbone(backbone, name, source):
    """Fills the backbone with trained weights, in place.

    name: its row of STUDENTS, which for "imagenet" must be torchvision's name of the network too.
    source: "imagenet", which torchvision downloads once and checks the hash of; or the path of a
        state dict in torchvision's names. What the backbone has not, such as the classifier, is
        left out; nothing of the backbone may be missing.
    """
    if source == "imagenet":
        if name not in torchvision.models.list_models():
            raise ValueError(f"torchvision has no ImageNet weights for {name}: give "
                             "backbone_weights a file, or none")
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise OSError(f"ImageNet's weights of {name} could not be fetched ({error}): give "
                          "backbone_weights a file, or none") from error
    else:
        state = read_file(source)

    try:
        wanted = backbone.state_dict().keys()
        backbone.load_state_dict({key: state[key] for key in wanted & state.keys()})
    except (AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} does not hold the weights of {name}, under torchvision's names "
                         f"({reason})") from error


# --- ASPP -----------------------------------------------------------------------------------------

class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab V2: (B, channels, h, w) -> (B, D, h, w).

    3x3 convolutions side by side, alike but for their dilation, and summed.

    rates: dilations of the branches: distances between a kernel's taps, in cells (the default:
        Chen et al.). A kernel spans 2 * rate + 1 cells: at stride 8 the four see 104, 200, 296
        and 392 pixels.
    batch_norm: True ends each branch in batch norm and ReLU, as the released code does.
    """

    def __init__(self, channels, D, rates=(6, 12, 18, 24), batch_norm=False):
        super().__init__()
        branches = []
        for rate in rates:
            # padding = dilation: the grid keeps its size
            conv = nn.Conv2d(channels, D, 3, padding=rate, dilation=rate, bias=not batch_norm)
            if batch_norm:
                branches.append(nn.Sequential(conv, nn.BatchNorm2d(D), nn.ReLU()))
            else:
                branches.append(conv)
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        # A bus fills the image in one photo and a corner in the next. Each branch looks at one
        # distance and adds its vote in all D dimensions. Nothing selects among them: the sum is one
        # sparse and very wide convolution, which reaches over a small thing and a large one alike.
        #
        # No batch norm and no ReLU after the sum; DeepLabV2.features only scales each vector to
        # length 1. The released code ends each branch in batch norm and ReLU: such features are
        # never negative. Many of CLIP's numbers are, and Eq. (7) asks for them.
        return sum(branch(x) for branch in self.branches)


# --- What there is to choose ----------------------------------------------------------------------

class Student(NamedTuple):
    """A row of STUDENTS."""
    build: Callable     # () -> backbone: (B, 3, H, W) -> (B, channels, h, w)
    channels: int       # of the backbone's features
    output_stride: int  # s, pixels
    rates: tuple        # of the ASPP after the backbone, cells
    batch_norm: bool    # of the ASPP: batch norm and ReLU in its branches


STUDENTS = {
    "resnet101": Student(resnet101, 2048, 8, (6, 12, 18, 24), batch_norm=False),
    "resnet50": Student(resnet50, 2048, 8, (6, 12, 18, 24), batch_norm=False),
    "tiny": Student(tiny_resnet, 96, 4, (1, 2, 3, 4), batch_norm=False),
}


# --- The student ----------------------------------------------------------------------------------

class Output(NamedTuple):
    """What DeepLabV2 returns."""
    rectified: torch.Tensor  # M^D  (B, C, h, w), the answer of the chosen head
    features: torch.Tensor   # Z^   (B, D, h, w), each cell of length 1


class DeepLabV2(nn.Module):
    """The student of Sec. 3.5: images (B, 3, H, W), floats in [0, 1] -> Output.

    class_names: C strings.
    W_q, W_r: (C, D), the heads; copied and fixed. "Symbols" above says how long their rows are.
    M_p: (1, C, h0, w0) or (1, 1, h0, w0), the teacher's positional logits on a grid of any one
        size, for the head "query_reference_positional" alone.
    student: a name in STUDENTS. resnet101: ours; resnet50: the released depth; tiny: for shapes.
    head: one of HEADS.
    backbone_weights: "imagenet", a file (load_backbone says which), or None for random weights.
    freeze_batch_norm: True keeps the backbone's batch norms as they came: statistics, scale and
        shift. False trains them, which a start from random weights needs.
        None (ours): True with backbone_weights, else False.
    protocol: how images are shown to it, a dict of long_side, short_side, antialias and denoise,
        kept in the checkpoint for eval.py. The student itself does not depend on it.
    """

    stage = "distill"

    def __init__(
        self,
        class_names,
        W_q,
        W_r,
        *,
        M_p=None,
        student="resnet101",
        head="query_reference",
        backbone_weights=None,
        freeze_batch_norm=None,
        protocol=None,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
        if W_q.ndim != 2 or W_q.shape != W_r.shape or len(class_names) != len(W_q):
            raise ValueError(f"W_q {tuple(W_q.shape)} and W_r {tuple(W_r.shape)} must both have "
                             f"one row for each of the {len(class_names)} classes")
        if (head == "query_reference_positional") != (M_p is not None):
            raise ValueError("M_p goes with the head query_reference_positional, and with no "
                             "other: rectify with positional_channels not 0, or give another head")
        if freeze_batch_norm is None:
            freeze_batch_norm = backbone_weights is not None

        self.class_names = tuple(class_names)
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm
        self.protocol = protocol
        self.settings = {
            "student": student,
            "head": head,
            "freeze_batch_norm": freeze_batch_norm,
        }
        C, D = W_q.shape

        # What makes Z^ of an image: the backbone and the ASPP. They learn.
        choice = STUDENTS[student]
        self.output_stride = choice.output_stride
        self.backbone = choice.build()
        self.aspp = ASPP(choice.channels, D, choice.rates, choice.batch_norm)
        if backbone_weights is not None:
            load_backbone(self.backbone, student, backbone_weights)
        for norm in self.batch_norms():
            norm.requires_grad_(not freeze_batch_norm)

        # The heads are buffers, which no optimizer sees: the features must come to the texts. The
        # paper finds that better than a learnt head (Table 6: 75.4 against 73.8). Our reading: the
        # student is taught by guesses alone, and a head that learnt would bend to their mistakes.
        # (On shapes it does not come out; extras/README.md has the numbers.)
        self.register_buffer("W_q", W_q.detach().clone())
        self.register_buffer("W_r", W_r.detach().clone())
        self.register_buffer("M_p", None if M_p is None else M_p.detach().clone())

        # Table 6's "Ori. Head": a learnt 1x1 convolution on Z^ (ours). DeepLab V2 itself goes from
        # the backbone to C channels at once; with Z^ between, Eq. (7)-(8) serve all heads.
        self.classifier = nn.Conv2d(D, C, 1) if head == "original" else None

        self.to(W_q.device)

    def batch_norms(self):
        """The backbone's batch norms. (Those of resnet50_v1c's ASPP are never frozen.)"""
        return [part for part in self.backbone.modules() if isinstance(part, nn.BatchNorm2d)]

    def train(self, mode=True):
        """Training or eval mode, as in any nn.Module; frozen batch norms stay in eval mode."""
        super().train(mode)
        # ImageNet's statistics are those of a million images, and the weights were trained with
        # them. The 2 to 16 crops that fit into memory would replace them by rough estimates, new
        # ones at each step. Hence DeepLab V2 freezes its batch norms, and so do we where it
        # starts from ImageNet's weights (or a file's).
        for norm in self.batch_norms():
            norm.train(mode and not self.freeze_batch_norm)
        return self

    @property
    def scale(self):
        """Factor on M^D for probabilities, softmax(scale * M^D), in evaluation alone.

        100 (released), since cosines lie so close together that their own softmax is nearly flat; 1
        for the head "original", which learns its own scale. (Training has mask_tau, Eq. (6).)
        """
        return 1 if self.head == "original" else 100

    def features(self, images, valid=None):
        """Z^: images (B, 3, H, W), floats in [0, 1] -> (B, D, h, w), each cell of length 1.

        valid: (B, H, W) bool, False where an image was padded; None: nowhere. Padding becomes 0,
        ImageNet's mean color.
        The result has the precision of the images. Errors: ValueError for integer images.
        """
        if not images.is_floating_point():
            # Cast to integers, MEAN and STD are 0, and a division by 0 gives nan without a word.
            raise ValueError(f"images are {images.dtype}; they must be floats in [0, 1], which "
                             "images.float() / 255 makes of uint8")
        mean = images.new_tensor(MEAN).view(3, 1, 1)
        std = images.new_tensor(STD).view(3, 1, 1)
        pixels = (images - mean) / std            # (B, 3, H, W)
        if valid is not None:
            pixels = pixels.masked_fill(~valid[:, None], 0)
        x = self.backbone(pixels)                 # (B, channels, h, w)
        x = self.aspp(x)                          # (B, D, h, w), bf16 under autocast

        # In CLIP's space only the direction of a vector has a meaning: its Z and its texts are of
        # length 1. With Z^ of length 1 too, Eq. (7) compares like with like, the products with the
        # texts are cosines as the teacher's are, and no cell gains by growing longer.
        return F.normalize(x.to(images.dtype), dim=1)

    def rectify(self, Z):
        """The head of Sec. 3.5 (Fig. 2b): Z^ (B, D, h, w) -> Output. In the default head

            M^D = Z^ . W_q - Z^ . W_r

        which is Eq. (2)-(3) once more, without M_p. Z^ is taught to be CLIP's Z, so it inherits
        CLIP's preference for some classes, and the same W_r takes it out again.
        """
        # Never in bf16: train.py runs .features alone under autocast. Numbers of bf16 have 8
        # significant bits: around a cosine of 0.2 they lie 0.001 apart, and two classes often
        # differ by no more.
        if self.head == "original":
            return Output(self.classifier(Z), Z)

        query = torch.einsum("bdhw,cd->bchw", Z, self.W_q)              # (B, C, h, w), cosines
        if self.head == "query":
            return Output(query, Z)

        bias = torch.einsum("bdhw,cd->bchw", Z, self.W_r)               # (B, C, h, w)
        if self.head == "query_reference_positional":
            # M_p depends on the place alone: one map serves every image, stretched onto its grid.
            bias = bias + F.interpolate(
                self.M_p, size=Z.shape[2:], mode="bilinear", align_corners=False
            )                                                           # (B, C, h, w)
        return Output(query - bias, Z)

    def forward(self, images, valid=None):
        return self.rectify(self.features(images, valid))

    def to_pixels(self, grid, height, width):
        """Logits or features on cells -> on pixels: (B, any, h, w) -> (B, any, height, width)."""
        # The last cells may reach over the image's edge (h * s >= H). So the grid is enlarged by
        # the stride exactly, bilinearly, and what lies over the edge cut off. Squeezing the whole
        # grid into the image would shift every outline.
        h, w = grid.shape[-2:]
        stride = self.output_stride
        if (h, w) != (math.ceil(height / stride), math.ceil(width / stride)):
            raise ValueError(f"{h} x {w} cells of {stride} pixels are not those of an image of "
                             f"{height} x {width}: the backbone must have this stride, and round "
                             "the number of cells up, as convolutions with padding do")
        size = (h * stride, w * stride)
        pixels = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        return pixels[..., :height, :width]

    # -- files -------------------------------------------------------------------------------------

    def learnt(self):
        """What the checkpoint keeps: backbone, ASPP, heads. -> {name: tensor}"""
        return self.state_dict()

    def save(self, path, **more):
        """Writes weights, heads, class names and settings into one file; makes a missing folder.

        Whatever happens meanwhile, the file holds its old content or the whole new one.
        more: what else it is to hold; train.py puts there what a stopped run goes on from.
        Errors: OSError where it cannot be written.
        """
        content = {
            "stage": self.stage,
            "learnt": self.learnt(),
            "class_names": list(self.class_names),
            "settings": self.settings,
            "protocol": self.protocol,
            **more,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # the data must be on the disk before the new name is
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch.save makes either of a full disk
            raise OSError(f"{path} could not be written ({error}); what was there before is "
                          "untouched") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path, device="cpu"):
        """A student from save's file, in eval mode, ready to segment.

        Errors: FileNotFoundError, or ValueError for a file that is damaged or no student's.
        """
        content = read_file(path)
        if not isinstance(content, dict) or content.get("stage") != cls.stage:
            raise ValueError(f"{path} is not a student's checkpoint")

        state = content["learnt"]
        model = cls(
            content["class_names"],
            state["W_q"],
            state["W_r"],
            M_p=state.get("M_p"),
            protocol=content["protocol"],
            **content["settings"],
        )
        model.load_state_dict(state)
        return model.to(device).eval()


# --- The backbone of published students -----------------------------------------------------------

def resnet50_v1c():
    """A ResNet-50 that begins with three small convolutions for one large; outputs as above.

    extras/published.py reads the authors' students into it; torchvision has no weights for it.
    """
    net = dilated_resnet("resnet50")
    stem = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    )
    parts = OrderedDict(stem=stem)
    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        parts[name] = net.get_submodule(name)
    return nn.Sequential(parts)


STUDENTS["resnet50_v1c"] = Student(resnet50_v1c, 2048, 8, (6, 12, 18, 24), batch_norm=True)
