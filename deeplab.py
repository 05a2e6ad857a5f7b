"""DeepLab V2 with a head of texts: the student into which the rectified CLIP is distilled (Sec. 3.5).

What stands here
    ASPP                 four dilated convolutions, summed: the end of DeepLab V2
    STUDENTS             the backbones: resnet101 (the paper's size), resnet50, and tiny for 64 x 64 pictures
    DeepLabV2            backbone, ASPP and head as one module, with save and load; it needs no CLIP
      .features          (B, 3, H, W) -> Z^ (B, D, h, w), which Eq. 7 makes resemble CLIP's features
      .rectify           Z^ -> logits, by the head inherited from rectification
    linear_classification  Table 1's "LC": how good are the features? (with labels)

Symbols
    B pictures, C classes, D joint width of CLIP; H x W pixels, s stride of the student, h x w its grid, h = ceil(H/s)
    Z^   features (B, D, h, w), each of length 1 as CLIP's Z is
    W_q, W_r  query and reference text features (C, D);  M_p  positional logits (1, 1 or C, any grid)

Copied elsewhere, it is used like this:
    student = DeepLabV2(["cat", "dog"], W_q, W_r, backbone_weights="imagenet")   # pictures in [0, 1], (B, 3, H, W)
    masks = student.to_pixels(student(pictures).rectified, H, W).argmax(1)       # (B, H, W)
`python deeplab.py` shows every tensor on the way once.

Source: Chen et al., "DeepLab: Semantic Image Segmentation with ... Atrous Convolution ..." (2018); torchvision.
"""

import os
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training pictures, in [0, 1] units (torchvision)
STD = (0.229, 0.224, 0.225)

# Table 6: "original" is a classifier that learns; the others are inherited from rectification and fixed.
HEADS = ("original", "query", "query_reference", "query_reference_positional")


# --- Backbones and ASPP -------------------------------------------------------------------------------------

def dilated_resnet(name):
    """torchvision's ResNet, whose last two stages dilate instead of striding, so that s is 8 and not 32, without its
    pooling and classifier. The parts keep their names: they are the keys of torchvision's state dicts."""
    net = torchvision.models.get_model(name, replace_stride_with_dilation=[False, True, True])
    return nn.Sequential(OrderedDict(list(net.named_children())[:-2]))


def tiny_resnet(width=24):
    """A stem and three residual blocks: (B, 3, H, W) -> (B, 4 width, H/4, W/4), 0.2 M parameters."""
    def block(i, o, stride):
        shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else None
        return BasicBlock(i, o, stride, shortcut)

    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         block(width, width, 1), block(width, 2 * width, 2), block(2 * width, 4 * width, 1))


# name -> (backbone: (B, 3, H, W) -> (B, channels, h, w); channels; s; dilations of the ASPP behind it)
STUDENTS = {
    "resnet101": (partial(dilated_resnet, "resnet101"), 2048, 8, (6, 12, 18, 24)),
    "resnet50": (partial(dilated_resnet, "resnet50"), 2048, 8, (6, 12, 18, 24)),  # the released code's size
    "tiny": (tiny_resnet, 96, 4, (1, 2, 3, 4)),
}


def load_backbone(backbone, student, source):
    """source: "imagenet", downloaded once, hash checked; or a file, a state dict in torchvision's names."""
    if source == "imagenet" and student == "tiny":
        raise ValueError("there are no ImageNet weights for the tiny student; give a file or none")
    try:
        if source == "imagenet":
            weights = torchvision.models.get_model_weights(student).IMAGENET1K_V1
            state = weights.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    except FileNotFoundError:
        raise FileNotFoundError(f"no backbone weights at {source}: give a file or 'imagenet'") from None
    except Exception as error:  # no network, or whatever a broken or hostile file provokes
        raise ValueError(f"cannot fill {student} from {source} (no network, truncated, made for another network, or "
                         f"unsafe): {' '.join(str(error).split())[:200]}") from error


class ASPP(nn.Module):
    """DeepLab V2's pyramid: 3x3 convolutions of several dilations, summed, (B, channels, h, w) -> (B, D, h, w).

    Nothing stands behind the sum. The released code ends each branch in batch norm and ReLU: such features are
    never negative and cannot match CLIP's (Eq. 7).
    """

    def __init__(self, channels, D, rates=(6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, D, 3, padding=rate, dilation=rate) for rate in rates)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


# --- The student --------------------------------------------------------------------------------------------

class Logits(NamedTuple):
    query: torch.Tensor       # Z^ W_q^T (B, C, h, w), cosines
    reference: torch.Tensor   # Z^ W_r^T (B, C, h, w)
    positional: torch.Tensor  # M_p      (1, 1 or C, h, w), zero without a positional head
    rectified: torch.Tensor   # M^D      (B, C, h, w), what the chosen head says
    features: torch.Tensor    # Z^       (B, D, h, w), each cell of length 1


class DeepLabV2(nn.Module):
    """Pictures in [0, 1], (B, 3, H, W) -> Logits.

    class_names: C strings. W_q, W_r (C, D): the heads, fixed. M_p (1, 1 or C, h0, w0): the teacher's positional logits
    at one grid size, for the last of HEADS only. student: one of STUDENTS. backbone_weights: "imagenet", a file,
    or None for random.
    freeze_batch_norm: True keeps the backbone's batch norms as they came, statistics, scale and shift, as DeepLab V2
        does: ImageNet's statistics are those of a million pictures, not of the 2 to 16 crops that fit into memory.
        False trains them, which a random start needs. None (ours): True with backbone_weights, else False.
    """

    def __init__(self, class_names, W_q, W_r, *, M_p=None, student="resnet101", head="query_reference",
                 backbone_weights=None, freeze_batch_norm=None):
        super().__init__()
        if student not in STUDENTS:
            raise ValueError(f"student is {student!r}; it must be one of {', '.join(STUDENTS)}")
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
        if W_q.ndim != 2 or W_q.shape != W_r.shape or len(class_names) != len(W_q):
            raise ValueError(f"W_q {tuple(W_q.shape)} and W_r {tuple(W_r.shape)} must both have one row for each of "
                             f"the {len(class_names)} classes")
        if (M_p is not None) != (head == "query_reference_positional"):
            raise ValueError(f"the head {head!r} {'takes no' if M_p is not None else 'needs'} positional logits M_p")
        frozen = backbone_weights is not None if freeze_batch_norm is None else freeze_batch_norm
        self.settings = dict(student=student, head=head, freeze_batch_norm=frozen)
        self.class_names, self.head, self.frozen = tuple(class_names), head, frozen
        build, channels, self.cell, rates = STUDENTS[student]  # cell: side of a cell of the grid, pixels
        self.backbone, self.aspp = build(), ASPP(channels, W_q.shape[1], rates)
        if backbone_weights is not None:
            load_backbone(self.backbone, student, backbone_weights)
        self.batch_norms = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self.batch_norms:
            norm.requires_grad_(not frozen)
        for name, tensor in (("W_q", W_q), ("W_r", W_r), ("M_p", M_p)):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        # Table 6's "Ori. Head": a learnt 1x1 convolution on Z^, where the paper's DeepLab has C channels at once; with
        # Z^ kept, Eq. 7 and 8 are the same for all heads (ours).
        C, D = W_q.shape
        self.classifier = nn.Conv2d(D, C, 1) if head == "original" else None
        self.to(W_q.device)

    def train(self, mode=True):
        super().train(mode)
        for norm in self.batch_norms:
            norm.train(mode and not self.frozen)
        return self

    @property
    def scale(self):
        """Factor on logits where probabilities are wanted: 100 for cosines (as released), a learnt head has its own."""
        return 1 if self.head == "original" else 100

    def features(self, pictures):
        """Z^: (B, 3, H, W) in [0, 1] -> (B, D, h, w), each cell of length 1, in the precision of the pictures."""
        mean, std = (pictures.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        x = self.aspp(self.backbone((pictures - mean) / std))  # (B, D, h, w), bf16 under autocast
        return F.normalize(x.to(pictures.dtype), dim=1)

    def rectify(self, Z):
        """The head of Sec. 3.5 (Fig. 2b) on features Z^ (B, D, h, w), all parts by name. Never in bf16: its steps of
        .001 at a cosine of .2 are as large as the gaps between classes."""
        with torch.autocast(Z.device.type, enabled=False):
            query, reference = (torch.einsum("bdhw,cd->bchw", Z, W) for W in (self.W_q, self.W_r))
            # M_p depends on the place alone: the teacher's one map serves any picture, stretched onto its grid.
            positional = Z.new_zeros(1, 1, 1, 1) if self.M_p is None else self.M_p
            positional = F.interpolate(positional, size=Z.shape[2:], mode="bilinear", align_corners=False)
            rectified = query - (reference + positional)  # Eq. (2, 3)
            if self.head == "original":
                rectified = self.classifier(Z)
            elif self.head == "query":
                rectified = query
        return Logits(query, reference, positional, rectified, Z)

    def forward(self, pictures):
        return self.rectify(self.features(pictures))

    def to_pixels(self, grid, height, width):
        """(B, C, h, w) -> (B, C, height, width): bilinear by the stride, what lies over the picture's edge cut off."""
        size = [side * self.cell for side in grid.shape[-2:]]
        return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    def save(self, path):
        """Student, head, class names and settings in one file: it holds the old content or the whole new one."""
        content = {"student": self.state_dict(), "class_names": list(self.class_names), "settings": self.settings}
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # the data must be on the disk before the new name is
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}): is the disk full? What was "
                          "there before is untouched") from error
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path, device="cpu"):
        """A working segmenter from save's file, in eval mode."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state, names = content["student"], content["class_names"]
            model = cls(names, state["W_q"], state["W_r"], M_p=state.get("M_p"), **content["settings"])
            model.load_state_dict(state, strict=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"no student at {path}: run python train.py --stage distill first") from None
        except Exception as error:
            raise ValueError(f"{path} is not a student's checkpoint, or is truncated: "
                             f"{' '.join(str(error).split())[:200]}") from error
        return model.to(device).eval()


def linear_classification(student, pairs, epochs=5, lr=0.01):
    """Table 1's "LC", after MaskContrast: a linear classifier on the frozen student's pixel features, trained WITH
    LABELS to tell how good the features are. Nothing else in this project learns from a label.

    pairs: (picture (3, H, W) in [0, 1], label (H, W) with 255 for ignored, name) by index, as datasets.Evaluation has
    them. Labels are read at the centres of the grid's cells. Adam, its epochs and learning rate are ours.
    -> the student, its head replaced by the classifier, in eval mode
    """
    C, D = student.W_q.shape
    device, order = student.W_q.device, torch.Generator().manual_seed(0)
    student.eval().requires_grad_(False)
    classifier = nn.Conv2d(D, C, 1).to(device)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.Adam(classifier.parameters(), lr)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)
        for i in torch.randperm(len(pairs), generator=order).tolist():
            picture, label, _ = pairs[i]
            Z = student.features(picture[None].to(device))                                       # (1, D, h, w)
            ys, xs = (((torch.arange(cells) + 0.5) * student.cell * side / seen).long().clamp(max=side - 1)
                      for cells, side, seen in zip(Z.shape[2:], label.shape, picture.shape[1:]))
            small = label[ys][:, xs][None].long()                                                   # (1, h, w)
            if (small < C).any():
                loss = F.cross_entropy(classifier(Z), small.to(device), ignore_index=255)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    student.classifier, student.head = classifier, "original"
    return student


def tour():
    """Every tensor on the way from a picture to its mask, on random weights."""
    torch.manual_seed(0)
    W_q, W_r = F.normalize(torch.randn(2, 8, 128), dim=-1)  # C = 8, D = 128
    student, pictures = DeepLabV2(list("abcdefgh"), W_q, W_r / 8 ** 0.5, student="tiny"), torch.rand(2, 3, 64, 90)
    with torch.no_grad():
        logits = student.eval()(pictures)
    pixels = student.to_pixels(logits.rectified, 64, 90)
    rows = {"pictures": pictures, **logits._asdict(), "to_pixels": pixels, "masks": pixels.argmax(1)}
    notes = ("(B, 3, H, W), normalised inside", "Z^ W_q^T (B, C, h, w), h = ceil(H / 4); Sec. 3.1",
             "Z^ W_r^T; Sec. 3.2", "M_p; Sec. 3.3; none in this head (Table 6)", "M^D, the subtraction of Sec. 3.5",
             "Z^ (B, D, h, w), each of length 1; Eq. 7 compares it with CLIP's Z", "M^D (B, C, H, W), for Eq. 6",
             "the class of each pixel")
    for (name, x), note in zip(rows.items(), notes, strict=True):
        print(f"{name:<11}{str(tuple(x.shape)):<19}{x.min().item():6.2f} to {x.max().item():5.2f}  {note}")


if __name__ == "__main__":
    tour()
