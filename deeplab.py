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
    STUDENTS                       what there is to choose: resnet101, resnet50, resnet50_v1c, tiny
    DeepLabV2                      all of it as one module, with save and load; it needs no CLIP
      .features                    images -> Z^
      .rectify                     Z^ -> M^D and its parts, by heads inherited from rectification
      .from_released               a student that the authors published (torchvision_names)

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
    logits = student(images).rectified                                   # images in [0, 1]
    masks = student.to_pixels(logits, *images.shape[2:]).argmax(1)       # (B, H, W)
To train one (train.train_distillation has the loop), reclip.py gives the texts of its head:
    W_q, W_r = ReCLIP.load("rectify.pt").heads()                         # (C, D) each
    student = DeepLabV2(["cat", "dog"], W_q, W_r, backbone_weights="imagenet")

`python deeplab.py` shows every tensor on the way once.

Sources: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs" (2018), which is DeepLab V2; torchvision's ResNets.
"""

import errno
import hashlib
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


def resnet50_v1c():
    """The released code's: a ResNet-50 that begins with three small convolutions for one large.

    For the authors' published students (DeepLabV2.from_released): torchvision has no weights of it.
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


def one_line(error):
    """An error's message without line breaks and not endless, to be quoted in a sentence."""
    return " ".join(str(error).split())[:200]


def load_backbone(backbone, student, source):
    """Fills the backbone with trained weights, in place.

    student: its name in STUDENTS.
    source: "imagenet", which torchvision downloads once and checks the hash of; or the path of a
        state dict in torchvision's names, with or without the classifier "fc".
    Raises FileNotFoundError, or ValueError for weights that cannot be had or do not fit.
    """
    if source == "imagenet" and student in ("tiny", "resnet50_v1c"):
        raise ValueError(f"there are no ImageNet weights for the student {student}; give a file or "
                         "None")
    try:
        if source == "imagenet":
            weights = torchvision.models.get_model_weights(student).IMAGENET1K_V1
            state = weights.get_state_dict(progress=True, check_hash=True)
        else:
            # weights_only: tensors and plain values. Any other pickle may run programs.
            state = torch.load(source, map_location="cpu", weights_only=True)

        without_classifier = {}
        for key, value in state.items():
            if not key.startswith("fc."):
                without_classifier[key] = value
        backbone.load_state_dict(without_classifier)
    except FileNotFoundError:
        raise FileNotFoundError(f"there are no backbone weights at {source}: give a file, "
                                "'imagenet' or None as backbone_weights") from None
    except Exception as error:  # no network, or whatever a broken or hostile file provokes
        raise ValueError(f"cannot fill {student} from {source} (no network, truncated, unsafe, or "
                         f"made for another network): {one_line(error)}") from error


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
    "resnet50_v1c": Student(resnet50_v1c, 2048, 8, (6, 12, 18, 24), batch_norm=True),
    "tiny": Student(tiny_resnet, 96, 4, (1, 2, 3, 4), batch_norm=False),
}


# --- The student ----------------------------------------------------------------------------------

class Logits(NamedTuple):
    """What DeepLabV2 returns."""
    query: torch.Tensor       # Z^ . W_q  (B, C, h, w), cosines
    reference: torch.Tensor   # Z^ . W_r  (B, C, h, w)
    positional: torch.Tensor  # M_p       (1, C, h, w); (1, 1, h, w) zeros in other heads
    rectified: torch.Tensor   # M^D       (B, C, h, w), the answer of the chosen head; only the
                              #           heads with W_r subtract anything
    features: torch.Tensor    # Z^        (B, D, h, w), each cell of length 1


class DeepLabV2(nn.Module):
    """The student of Sec. 3.5: images (B, 3, H, W), floats in [0, 1] -> Logits.

    class_names: C strings.
    W_q, W_r: (C, D), the heads; copied and fixed. "Symbols" above says how long their rows are.
    M_p: (1, C, h0, w0) or (1, 1, h0, w0), the teacher's positional logits on a grid of any one
        size, for the head "query_reference_positional" alone.
    student: a name in STUDENTS. resnet101: ours; resnet50: the released depth; resnet50_v1c: that
        of the published files; tiny: for shapes.
    recipe: that of the teacher (a key of reclip.RECIPES), kept in the checkpoint: eval.py takes the
        sides of this recipe, whatever sides were asked for in training. The student itself does not
        depend on it.
    head: one of HEADS.
    backbone_weights: "imagenet", a file (load_backbone says which), or None for random weights.
    freeze_batch_norm: True keeps the backbone's batch norms as they came: statistics, scale and
        shift. False trains them, which a start from random weights needs.
        None (ours): True with backbone_weights, else False.
    """

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
        recipe="2025",
    ):
        super().__init__()
        if student not in STUDENTS:
            raise ValueError(f"student is {student!r}; it must be one of {', '.join(STUDENTS)}")
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
        if W_q.ndim != 2 or W_q.shape != W_r.shape or len(class_names) != len(W_q):
            raise ValueError(f"W_q {tuple(W_q.shape)} and W_r {tuple(W_r.shape)} must both have "
                             f"one row for each of the {len(class_names)} classes")
        if head == "query_reference_positional" and M_p is None:
            raise ValueError(f"the head {head!r} needs positional logits M_p")
        if head != "query_reference_positional" and M_p is not None:
            raise ValueError(f"the head {head!r} takes no positional logits M_p")
        if freeze_batch_norm is None:
            freeze_batch_norm = backbone_weights is not None

        self.class_names = tuple(class_names)
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm
        self.recipe = recipe
        self.settings = {
            "student": student,
            "head": head,
            "freeze_batch_norm": freeze_batch_norm,
            "recipe": recipe,
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
        # (On shapes it does not come out; the README has the numbers.)
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
        The result has the precision of the images. Raises ValueError for integer images.
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
        """The head of Sec. 3.5 (Fig. 2b): Z^ (B, D, h, w) -> Logits. In the default head

            M^D = Z^ . W_q - Z^ . W_r

        which is Eq. (2)-(3) once more, without M_p. Z^ is taught to be CLIP's Z, so it inherits
        CLIP's preference for some classes, and the same W_r takes it out again.
        """
        # Never in bf16, whatever autocast says. Its numbers have 8 significant bits: around a
        # cosine of 0.2 they lie 0.001 apart, and two classes often differ by no more.
        with torch.autocast(Z.device.type, enabled=False):
            query = torch.einsum("bdhw,cd->bchw", Z, self.W_q)      # (B, C, h, w)
            reference = torch.einsum("bdhw,cd->bchw", Z, self.W_r)  # (B, C, h, w)

            # M_p depends on the place alone: one map serves every image, stretched onto its grid.
            M_p = Z.new_zeros(1, 1, 1, 1) if self.M_p is None else self.M_p
            positional = F.interpolate(
                M_p, size=Z.shape[2:], mode="bilinear", align_corners=False
            )                                                       # (1, C, h, w)

            if self.head == "original":
                rectified = self.classifier(Z)
            elif self.head == "query":
                rectified = query
            else:
                rectified = query - (reference + positional)
        return Logits(query, reference, positional, rectified, Z)

    def forward(self, images, valid=None):
        return self.rectify(self.features(images, valid))

    def to_pixels(self, grid, height, width):
        """Logits or features on cells -> on pixels: (B, any, h, w) -> (B, any, height, width)."""
        # The last cells may reach over the image's edge (h * s >= H). So the grid is enlarged by
        # the stride exactly, bilinearly, and what lies over the edge cut off. Squeezing the whole
        # grid into the image would shift every outline. (A ResNet's cell i is centered on pixel
        # s * i, almost half a cell before the middle of where it is drawn; training through this
        # function teaches the convolutions to make up for it.)
        h, w = grid.shape[-2:]
        size = (h * self.output_stride, w * self.output_stride)
        pixels = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        return pixels[..., :height, :width]

    # -- files -------------------------------------------------------------------------------------

    def fingerprint(self):
        """sha256 of all weights, as text.

        Of the tensors, not of the file: torch.save writes the file's name into it.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path):
        """Writes weights, heads, class names and settings into one file; makes a missing folder.

        Whatever happens meanwhile, the file holds its old content or the whole new one.
        Raises OSError where it cannot be written.
        """
        content = {
            "student": self.state_dict(),
            "class_names": list(self.class_names),
            "settings": self.settings,
        }
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # the data must be on the disk before the new name is
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            # torch.save turns a write that failed into a RuntimeError
            disk_errors = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
            of_the_disk = isinstance(error, RuntimeError) or error.errno in disk_errors
            question = "; is the disk full?" if of_the_disk else ""
            raise OSError(f"{path} could not be written ({one_line(error)}); what was there before "
                          f"is untouched{question}") from error
        finally:
            if temporary.exists():
                temporary.unlink()

    @classmethod
    def load(cls, path, device="cpu"):
        """A student from save's file, in eval mode, ready to segment.

        Raises FileNotFoundError, or ValueError for a file that is damaged, unsafe or no student.
        """
        try:
            # weights_only: tensors and plain values. Any other pickle may run programs.
            content = torch.load(path, map_location="cpu", weights_only=True)
            state = content["student"]
            settings = content["settings"]
            model = cls(
                content["class_names"],
                state["W_q"],
                state["W_r"],
                M_p=state.get("M_p"),
                student=settings["student"],
                head=settings["head"],
                freeze_batch_norm=settings["freeze_batch_norm"],
                recipe=settings.get("recipe", "2025"),
            )
            model.load_state_dict(state, strict=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no student at {path}: give a file that "
                                    "DeepLabV2.save or python train.py wrote") from None
        except Exception as error:  # whatever a broken or hostile file provokes
            raise ValueError(f"{path} is not a student's checkpoint, or is truncated: "
                             f"{one_line(error)}") from error
        return model.to(device).eval()

    @classmethod
    def from_released(cls, path, class_names, W_q, W_r, device="cpu"):
        """A student that the paper's authors published, in eval mode.

        class_names: the data set's, in the authors' order.
        W_q, W_r: (C, D), from the rectification that they published beside it, as
            ReCLIP.from_released(...).heads() returns them: they are not in the student's file.
        Errors: FileNotFoundError, or ValueError for a file that is no such student.
        """
        try:
            # weights_only: tensors and plain values. Any other pickle may run programs.
            content = torch.load(path, map_location="cpu", weights_only=True)
            state = content.get("state_dict", content)
            renamed = torchvision_names(state)
            # A layer that the authors' head never uses; its rows count the classes.
            class_counts = [len(state[key]) for key in state if key.endswith("conv_seg.weight")]
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no published student at {path}: the README says "
                                    "where the authors keep theirs") from None
        except Exception as error:  # whatever a broken or hostile file provokes
            raise ValueError(f"{path} is not a student's checkpoint, or is truncated: "
                             f"{one_line(error)}") from error

        for classes in class_counts:
            if classes != len(class_names):
                raise ValueError(f"{path} was learnt for {classes} classes, and {len(class_names)} "
                                 "are named: give the names of its data set")

        model = cls(class_names, W_q, W_r, student="resnet50_v1c", recipe="cvpr2024")
        heads = {"W_q": model.W_q, "W_r": model.W_r}
        try:
            model.load_state_dict(renamed | heads, strict=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole student of ReCLIP's authors, or its features "
                             f"are not as wide as W_q: {one_line(error)}") from error
        return model.to(device).eval()


# --- The authors' published files -----------------------------------------------------------------

# github.com/dogehhh/ReCLIP links to the students behind the paper's numbers. Such a file holds
#
#     backbone.stem.*                      three convolutions and batch norms
#     backbone.res_layers.L.B.*            torchvision's layer{L + 1}.B.*, with norm1 for bn1
#     decode_head.decode_module.aspp_modules.A.{conv, norm}    the branches of the ASPP
#     decode_head: the rest                an unused layer, and parts of the teacher

def torchvision_names(state):
    """The backbone and ASPP of a published student, under the names of DeepLabV2's state dict."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("backbone.stem."):
            renamed[key] = value
        elif key.startswith("backbone.res_layers."):
            _, _, layer, rest = key.split(".", 3)
            rest = rest.replace("norm", "bn")
            renamed[f"backbone.layer{int(layer) + 1}.{rest}"] = value
        elif key.startswith("decode_head.decode_module.aspp_modules."):
            _, _, _, branch, part, rest = key.split(".", 5)
            place = {"conv": 0, "norm": 1}[part]
            renamed[f"aspp.branches.{branch}.{place}.{rest}"] = value
    return renamed


# --- A guided tour --------------------------------------------------------------------------------

def show(name, tensor, note):
    """One line of the tour: name, shape, lowest and highest value, what it is."""
    low = tensor.min().item()
    high = tensor.max().item()
    print(f"{name:<11}{str(tuple(tensor.shape)):<16}{low:6.2f} to {high:5.2f}  {note}")


@torch.no_grad()
def tour():
    """Every tensor on the way from two images to their masks, on random weights.

    The numbers in a shape tell the symbols: B = 2, RGB = 3, C = 5, D = 16, H x W = 42 x 70, and at
    the tiny student's stride of 4, h x w = 11 x 18. No two are equal.
    """
    torch.manual_seed(0)
    class_names = ["cat", "dog", "sofa", "grass", "sky"]
    W_q = F.normalize(torch.randn(5, 16), dim=1)  # each row of length 1
    W_r = torch.randn(5, 16)
    W_r = W_r / W_r.norm()                        # the whole matrix of length 1
    student = DeepLabV2(class_names, W_q, W_r, student="tiny").eval()

    images = torch.rand(2, 3, 42, 70)
    logits = student(images)
    pixels = student.to_pixels(logits.rectified, 42, 70)
    masks = pixels.argmax(1)

    show("images", images, "     (B, 3, H, W)")
    show("features", logits.features, "Z^   (B, D, h, w)  each cell of length 1; Eq. (7)")
    show("W_q", student.W_q, "W_q  (C, D)        Sec. 3.1, fixed")
    show("W_r", student.W_r, "W_r  (C, D)        Sec. 3.2, fixed")
    show("query", logits.query, "     (B, C, h, w)  Z^ . W_q, cosines")
    show("reference", logits.reference, "     (B, C, h, w)  Z^ . W_r")
    show("positional", logits.positional, "M_p  (1, 1, h, w)  none in this head")
    show("rectified", logits.rectified, "M^D  (B, C, h, w)  query - reference")
    show("to_pixels", pixels, "M^D  (B, C, H, W)  bilinear, cut to the image; Eq. (6)")
    show("masks", masks, "     (B, H, W)     the class of each pixel")


if __name__ == "__main__":
    tour()
