"""Training: two plain loops, one per stage of the paper.

    python train.py                                          the whole paper on shapes, on a CPU
    python train.py --stage rectify --data voc               Sec. 3.1-3.4 on PASCAL VOC
    python train.py --stage distill --data voc               Sec. 3.5, from what the former wrote
    python train.py --stage rectify --data FOLDER --classes "cat, dog, grass"    your own images
    torchrun --nproc_per_node=4 train.py --stage rectify --data voc              four GPUs

What stands here
    train_rectification      stage 1: the loop of Sec. 3.1-3.4
    train_distillation       stage 2: the loop of Sec. 3.5
    Settings                 every hyper-parameter of the two loops, with unit and source
    hyper_parameters         where each gets its value: the default, the data set, the command line
    training_stream, frozen_features, poly_learning_rate, require_finite, average_gradients
    new_reclip, new_student  the models that the loops start from
    label_training_set       pseudo-labels of the training images (Sec. 3.4), kept by name
    Run                      bookkeeping of a loop: resume, log, save
    rectify, distill         a stage from a data set on: model, pseudo-labels, loop
    main                     the command line, with join_processes and keep_freed_memory

The stream of training images yields images, which of their pixels are valid, and names: nothing
here that learns reads a label of a data set.

Symbols: B images per step, C classes, D width of CLIP's joint space; H x W pixels, h x w patches.
"""

import argparse
import csv
import ctypes
import dataclasses
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from zlib import crc32

# OpenMP's threads wait for each other by spinning, and stall where another program needs a core: a
# step of shapes took 2 s in place of 0.1. Here they soon sleep. (To be set before torch's import.)
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from clip_model import MODELS, load_clip, tensors_sha256, written_atomically
from datasets import (
    DATA,
    Augment,
    Progress,
    Thumbnails,
    TrainingStream,
    open_split,
    own_images,
    read_classes,
    read_lines,
    resize_within,
    to_float,
)
from deeplab import HEADS, STUDENTS, DeepLabV2
from eval import (
    best_device,
    evaluate_split,
    make_protocol,
    protocol_of,
    without_biases,
)
from reclip import (
    IGNORE,
    Options,
    ReCLIP,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    masked_features,
    option,
    read_checkpoint,
    text_guided_loss,
)


# --- Stage 1: rectification -----------------------------------------------------------------------

def train_rectification(model, split, labels, settings, run):
    """Sec. 3.1-3.4: learns CLIP's two biases from images alone; writes <out>/rectify.pt.

    model: a ReCLIP. Its Reference prompt and its positional net learn; CLIP stays as it is.
    split: the training images (datasets.open_split).
    labels: {name: (C,) bool}: which classes does each image hold? CLIP's own guess, which
        label_training_set makes.
    settings: a Settings. run: bookkeeping, a Run.
    -> the model, in eval mode
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    stream = training_stream(split, model, settings.crop, settings, run.seed)
    features = frozen_features(model, stream, run.device)

    model.train()
    identity = identity_of(model, split, labels, settings, run)
    run.begin(model, optimizer, settings.rectify_epochs, settings.rectify_batch, stream, identity)
    for step, images, valid, names in run.batches():
        # All that is random in a step, the noise of Eq. (4), follows from its number.
        torch.manual_seed(run.noise_seed(step))

        # Sec. 4.1: poly decay, once an epoch, as released. (Its horizon may lie behind the end of
        # the training: recipe 2025.)
        lr = poly_learning_rate(
            settings.lr, run.epoch(step), settings.rectify_poly_epochs, settings.poly_power
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Which classes do these images hold? CLIP's own guess, made once on the center square of
        # each image, which is how CLIP sees images; no annotation is opened anywhere. The crop may
        # not show all of them: the mask of a missing class then holds something else, which is
        # noise in the loss.
        present = torch.stack([labels[name] for name in names]).to(run.device)   # (B, C) bool

        # Sec. 3.1: the patches as CLIP sees them. CLIP is frozen: no gradient passes here.
        Z = features(images, valid, names)                                       # (B, D, h, w)

        # Eq. (1)-(3): what CLIP says of each patch, less its leaning towards classes and places.
        M = model.rectify(Z).rectified                                           # (B, C, h, w)

        # Eq. (4): every patch picks one class. These masks are hard, but a gradient passes through.
        # (Patches of padding take part: they fall under some mask, and count in Eq. (5)'s mean.)
        masks = gumbel_softmax_masks(M, model.options.tau_1)                     # (B, C, h, w)

        # Eq. (5): what lies under the mask of a class must look like the text of that class. If it
        # does not, patches of another class have come under the mask, and the loss corrects the
        # bias that let them in.
        pooled = masked_features(Z, masks)                                       # (B, C, D)
        loss = contrastive_loss(pooled, model.W_q, present, model.tau)           # scalar

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        require_finite(loss, parameters, step, names)
        optimizer.step()

        run.log(step, loss=loss.item(), lr=lr)
        run.save(step)
    return model.eval()


# --- Stage 2: distillation ------------------------------------------------------------------------

def train_distillation(teacher, student, split, labels, settings, run):
    """Sec. 3.5: the rectified CLIP teaches DeepLab V2; writes <out>/distill.pt.

    Patches of 16 pixels cannot draw an outline, and CLIP was not made to segment. DeepLab V2 was:
    its grid is twice as fine as CLIP's, and it learns what the teacher says of very many images.

    teacher: a ReCLIP, frozen. student: a DeepLabV2.
    split, labels, settings, run: as in train_rectification.
    -> the student, in eval mode
    """
    # Eval mode: M_p stays what stage 1 learnt. In train mode the batch norms of its net would use
    # the statistics of this stage's grid, and M_p would change.
    teacher.eval()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, settings.distill_lr, settings.momentum, weight_decay=settings.weight_decay
    )
    stream = training_stream(split, student, settings.distill_crop, settings, run.seed)
    features = frozen_features(teacher, stream, run.device)

    # Eq. (6) needs a temperature: Eq. (5)'s for heads of cosines, 1 for a classifier, which learns
    # its own scale.
    mask_tau = settings.mask_tau
    if mask_tau is None:
        mask_tau = 1.0 if settings.head == "original" else teacher.tau

    student.train()
    student.to(memory_format=torch.channels_last)  # the same but for rounding, and faster
    identity = identity_of(teacher, split, labels, settings, run)
    identity["teacher"] = tensors_sha256(teacher.learnt())
    run.begin(student, optimizer, settings.distill_epochs, settings.distill_batch, stream, identity)
    for step, images, valid, names in run.batches():
        torch.manual_seed(run.noise_seed(step))

        # Sec. 4.1: poly decay over all epochs, and never below a floor (released).
        lr = poly_learning_rate(
            settings.distill_lr, run.epoch(step), settings.distill_epochs, settings.poly_power
        )
        lr = max(lr, settings.distill_lr_floor)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Which classes do these images hold? CLIP's guess once more, for the text-guided loss.
        present = torch.stack([labels[name] for name in names]).to(run.device)   # (B, C) bool
        H, W = images.shape[2:]

        # What the teacher says. Its masks M~ are taken for the truth: every pixel gets a class, and
        # none is looked up anywhere. Where an image was padded there is nothing to learn.
        with torch.no_grad():
            Z = features(images, valid, names)                                   # (B, D, h, w)
            M = teacher.to_pixels(teacher.rectify(Z).rectified, H, W)            # (B, C, H, W)
            teacher_masks = M.argmax(1).masked_fill(~valid, IGNORE)              # (B, H, W)

        # What the student sees in the same images. On a GPU its convolutions run in bf16; what
        # follows does not: bf16 would round cosines to steps of .001, about what classes differ by.
        with torch.autocast(run.device_type, torch.bfloat16, enabled=run.device_type == "cuda"):
            Z_student = student.features(images, valid)                          # (B, D, h', w')
        M_student = student.rectify(Z_student).rectified                         # (B, C, h', w')

        # Eq. (6): each pixel should get the class that the teacher gave it.
        mask_loss = mask_guided_loss(M_student, teacher_masks, mask_tau, student.to_pixels)

        # Eq. (7): its features should be the teacher's, since its head is made of CLIP's texts.
        feature_loss = feature_guided_loss(
            Z, Z_student, valid, teacher.to_pixels, student.to_pixels
        )

        # Eq. (4)-(5) again: what lies under the student's own masks should look like their texts.
        # Here the student can find out that its teacher was wrong.
        text_loss = text_guided_loss(
            M_student, Z_student, teacher.W_q, present, teacher.options.tau_1, teacher.tau
        )

        # Eq. (8): all three, the last two with half the weight.
        loss = distillation_loss(
            mask_loss, feature_loss, text_loss, settings.alpha, settings.beta
        )

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        require_finite(loss, parameters, step, names)
        optimizer.step()

        run.log(
            step,
            loss=loss.item(),
            mask=mask_loss.item(),
            feature=feature_loss.item(),
            text=text_loss.item(),
            lr=lr,
        )
        run.save(step)
    return student.eval()


# --- Hyper-parameters -----------------------------------------------------------------------------

REQUIRED = dataclasses.MISSING  # no default: each entry of datasets.DATA gives it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every hyper-parameter of the two loops, with unit and source. (The model's: reclip.Options.)

    "released": the authors' code, on all three benchmarks. Fields without a default differ between
    data sets: see the entries of datasets.DATA.
    """
    # Rectification, Sec. 3.1-3.4
    rectify_epochs: int = option(REQUIRED, "epochs of rectification")
    rectify_poly_epochs: int = option(
        REQUIRED,
        "the learning rate would reach 0 after so many epochs; rectify_epochs may be fewer")
    rectify_batch: int = option(1, "images a step (released)")
    lr: float = option(0.01, "learning rate of SGD (Sec. 4.1)")
    momentum: float = option(0.9, "momentum of SGD (released)")
    weight_decay: float = option(0.0005, "weight decay of SGD (Sec. 4.1)")
    poly_power: float = option(
        0.9, "learning rate = lr * (1 - epoch / rectify_poly_epochs) ** poly_power; of the student "
        "likewise, over distill_epochs (Sec. 4.1)")
    threshold: float = option(
        REQUIRED, "an image holds a class if 100 * cosine reaches it (t of Sec. 3.4)")
    top_k: int = option(REQUIRED, "image-level labels where no class passes the threshold")

    # Distillation, Sec. 3.5
    student: str = option(
        "resnet101", "backbone of DeepLab V2: resnet101 (ours), resnet50, resnet50_v1c (released), "
        "tiny (shapes)", tuple(STUDENTS))
    head: str = option("query_reference", "head of the student, Table 6", HEADS)
    backbone_weights: str = option(
        "imagenet", "start of the backbone: imagenet (ours), a file, or none")
    distill_epochs: int = option(REQUIRED, "epochs of distillation")
    distill_batch: int = option(16, "images a step (released)")
    distill_lr: float = option(0.01, "learning rate of SGD (Sec. 4.1), poly over all epochs")
    distill_lr_floor: float = option(1e-4, "the learning rate never falls below (released)")
    mask_tau: float = option(
        None, "temperature of Eq. (6); if not given, that of Eq. (5); 1 for head original (ours)")
    alpha: float = option(0.5, "weight of the feature-guided loss, Eq. (8) (Sec. 3.5)")
    beta: float = option(0.5, "weight of the text-guided loss, Eq. (8) (Sec. 3.5)")

    # Images, Sec. 4.1. In training an image is resized, its ratio kept, to the largest size that
    # fits into r * long side by r * short side, with r drawn from resize_from .. resize_to; then it
    # is cropped. Evaluation resizes it likewise, with r = 1.
    rectify_long_side: int = option(REQUIRED, "rectification: longer side at r = 1, pixels")
    rectify_short_side: int = option(REQUIRED, "rectification: shorter side at r = 1, pixels")
    crop: int = option(
        REQUIRED,
        "rectification: side of the crop, pixels; 0: whole images, all of one size (ours)")
    distill_long_side: int = option(REQUIRED, "distillation: longer side at r = 1, pixels")
    distill_short_side: int = option(REQUIRED, "distillation: shorter side at r = 1, pixels")
    distill_crop: int = option(REQUIRED, "distillation: as crop")
    resize_from: float = option(0.5, "least r (released)")
    resize_to: float = option(2.0, "largest r (released)")
    flip: bool = option(True, "random horizontal flip (Sec. 4.1)")
    photometric: bool = option(True, "random brightness, contrast, saturation, hue (released)")

    # Evaluation of the rectified CLIP; a student is evaluated without (released)
    denoise: float = option(
        REQUIRED, "a class that reaches this probability nowhere in an image is dropped; 0: off")

    def __post_init__(self):
        if self.rectify_epochs > self.rectify_poly_epochs:
            raise ValueError(f"rectify_epochs is {self.rectify_epochs}; it must not be above "
                             f"rectify_poly_epochs, {self.rectify_poly_epochs}, from which on the "
                             "learning rate is 0")


def hyper_parameters(dataset, recipe=None, **given):
    """Each hyper-parameter has its value from one of three places; a later one wins:

        1. the default in reclip.Options or Settings
        2. the entry of the data set in datasets.DATA, under the recipe
        3. the command line: `given`

    dataset: a datasets.DataSet. recipe: one of the entry's; None: its first.
    -> Options of the model, Settings of the loops
    """
    recipe = recipe or next(iter(dataset.recipes))
    values = {"recipe": recipe} | dataset.hyper_parameters(recipe) | given

    of_model = {}
    for field in dataclasses.fields(Options):
        if field.name in values:
            of_model[field.name] = values.pop(field.name)
    return Options(**of_model), Settings(**values)


# --- What the loops are made of -------------------------------------------------------------------

def training_stream(split, model, crop, settings, seed):
    """The endless stream of augmented images (Sec. 4.1), at the sides of the model's .protocol."""
    protocol = protocol_of(model)
    augment = Augment(
        protocol["long_side"],
        protocol["short_side"],
        crop,
        ratio=(settings.resize_from, settings.resize_to),
        flip=settings.flip,
        photometric=settings.photometric,
        antialias=protocol["antialias"],
    )
    return TrainingStream(split, augment, seed)


def frozen_features(model, stream, device):
    """-> function (images, valid, names) -> Z (B, D, h, w), the features of Sec. 3.1.

    It is model.features(images, valid). But CLIP is frozen, so an image that is never augmented
    (shapes) has features that never change: those are computed once, here, and found by name.
    """
    if stream.transform.changes:
        return lambda images, valid, names: model.features(images, valid)

    known = {}  # name -> Z (D, h, w)
    # items 0 .. N-1 of the stream are its first epoch: each image once
    for images, _, names in DataLoader(stream, 32, sampler=range(len(stream))):
        known.update(zip(names, model.features(images.to(device))))
    return lambda images, valid, names: torch.stack([known[name] for name in names])


def poly_learning_rate(lr, epoch, horizon, power):
    """Sec. 4.1: lr (1 - epoch / horizon)^power. By epochs, as released, not by steps."""
    return lr * (1 - min(epoch / horizon, 1)) ** power


def require_finite(loss, parameters, step, names):
    """Ends the training if loss or gradient is NaN or infinite, before it spoils the weights."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(loss + norm):
        raise ValueError(f"the loss is {loss.item()}, its gradient's norm {norm.item():.3g}, at "
                         f"step {step} on {', '.join(names)}; the step was not taken: try a "
                         "smaller learning rate")


def average_gradients(parameters):
    """Under torchrun: replaces each gradient by its mean over the processes; alone: does nothing.

    All processes start from the same weights (the same seed) and take the same averaged step,
    so that their weights stay equal. (The running statistics of batch norms are each process's own;
    those of process 0 are saved.)
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@contextmanager
def rank_0_first():
    """Process 0 does what stands within before the others, so that they find the file it wrote."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


# --- The models that the loops start from ---------------------------------------------------------

def new_reclip(clip, dataset, options, settings, seed, kind=ReCLIP):
    """A ReCLIP of a data set's classes that has learnt nothing yet; the same for the same seed.

    kind: ReCLIP, or a class that is made like it.
    """
    torch.manual_seed(seed)
    return kind(
        clip,
        dataset.classes,
        prompts=dataset.prompts,
        protocol=make_protocol("rectify", dataset, options.recipe, **dataclasses.asdict(settings)),
        **dataclasses.asdict(options),
    ).train()


def new_student(teacher, dataset, settings, seed):
    """A DeepLabV2 with the heads of the teacher, a ReCLIP in eval mode; the same for the same seed.

    Table 6's heads inherit different parts; what the teacher does not have, or the student does not
    know, cannot be inherited.
    """
    head = settings.head
    if "reference" in head and not (teacher.options.subtract and teacher.reference is not None):
        raise ValueError(f"head {head!r} subtracts the Reference, which this teacher does not: "
                         "rectify again with prompt_length above 0 and subtract")
    learnt = {key.split(".")[0] for key in teacher.learnt()}
    unknown = learnt - {"W_q", "query", "reference", "positional"}
    if unknown:
        raise ValueError(f"the teacher has learnt {', '.join(sorted(unknown))}, which "
                         "DeepLabV2.rectify does not know: write it there too")

    torch.manual_seed(seed)
    with torch.no_grad():
        W_q, W_r = teacher.heads()                                      # (C, D) each
        M_p = None
        if "positional" in head and teacher.positional is not None:
            grid = teacher.clip.visual.grid
            M_p = teacher.positional_logits(grid, grid)                 # (1, C, grid, grid)

    weights = None if settings.backbone_weights == "none" else settings.backbone_weights
    return DeepLabV2(
        teacher.class_names,
        W_q,
        W_r,
        M_p=M_p,
        student=settings.student,
        head=head,
        backbone_weights=weights,
        protocol=make_protocol("distill", dataset, **dataclasses.asdict(settings)),
    ).train()


# --- Image-level labels of the training images, Sec. 3.4 ------------------------------------------

def label_training_set(model, split, settings, path, workers=0):
    """Sec. 3.4: the classes that CLIP finds in each training image: {name: (C,) bool}.

    They come from CLIP alone and never change, so they are made once and kept in `path` by
    image name (the released code pairs them by line number with an unsorted directory listing).
    A file that was made from something else is made anew. (How they are found stands apart from how
    they are kept: extras/plusplus.py finds them in another way.)
    """
    how = {"threshold": settings.threshold, "top_k": settings.top_k}
    find = partial(find_in_thumbnails, model, split, settings, workers)
    return kept_labels(model, split, path, how, find)


def kept_labels(model, split, path, how, find):
    """{name: (C,) bool} of what find() has found, {name: list of class indices}, kept in `path`.

    how: {name: value}, what find() depends on beside the model's texts, its CLIP and the images.
    """
    identity = how | {
        "classes": list(model.class_names),
        "prompts": list(model.prompts),
        "clip": model.clip.identity(),
        "images": images_crc(split),
    }
    found = read_image_labels(path, identity)
    if found is None:
        found = find()
        with written_atomically(path) as temporary:
            content = json.dumps({"identity": identity, "labels": found})
            temporary.write_text(content, encoding="utf-8")
        print_label_histogram(found, model.class_names)

    labels = {}
    for name, classes in found.items():
        labels[name] = torch.zeros(len(model.class_names), dtype=torch.bool)
        labels[name][classes] = True
    return labels


def images_crc(split):
    """A number for the images of a split: their names, and the sizes of their files."""
    sizes = [path.stat().st_size for path in getattr(split, "image_paths", [])]
    return crc32(repr((split.names, sizes)).encode())


def find_in_thumbnails(model, split, settings, workers):
    """ReCLIP's rule (Sec. 3.4): {name: list of the class indices found in its thumbnail}."""
    found = {}
    progress = Progress("image-level labels", len(split))
    thumbnails = Thumbnails(split, model.clip.input_resolution)
    for images, names in DataLoader(thumbnails, 32, num_workers=workers):
        batch = model.image_labels(
            images.to(model.W_q.device), settings.threshold, settings.top_k
        )                                                               # (B, C) bool
        for name, row in zip(names, batch.cpu()):
            found[name] = row.nonzero()[:, 0].tolist()
        progress(len(found))
    return found


def read_image_labels(path, identity):
    """{name: list of class indices} of an earlier run with the same identity, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if content.get("identity") != identity:
        return None
    return content["labels"]


def print_label_histogram(found, class_names):
    """In how many images was each class found? A class never found needs another name."""
    print(f"images that each class was found in, of {len(found)}:")
    for c, name in enumerate(class_names):
        count = sum(c in classes for classes in found.values())
        advice = "" if count else "  never: try a synonym, name | synonym"
        print(f"  {name:<20}{count:6}{advice}")


# --- Bookkeeping ----------------------------------------------------------------------------------

def identity_of(model, split, labels, settings, run):
    """{name: value}: what must not differ when a training is resumed.

    All hyper-parameters are in it, those of the other stage too: so nobody has to decide which of
    them matter (and stage 1 is not resumed with another --distill-lr).
    """
    identity = dataclasses.asdict(model.options) | dataclasses.asdict(settings)
    classes_found = [(name, row.nonzero().tolist()) for name, row in labels.items()]
    return identity | {
        "class_names": list(model.class_names),
        "prompts": list(model.prompts),
        "clip": model.clip.identity(),
        "images": images_crc(split),
        "labels": crc32(repr(classes_found).encode()),
        "seed": run.seed,
        "processes": run.processes,
        "threads": torch.get_num_threads() if run.device_type == "cpu" else None,
    }


class Run:
    """All that a loop needs and the paper does not speak of: resume, log, progress, save.

        run = Run("rectify", Path("runs/voc"))
        run.begin(model, optimizer, epochs, batch, stream, identity)    # --resume goes on here
        for step, images, valid, names in run.batches():
            torch.manual_seed(run.noise_seed(step))
            ...
            run.log(step, loss=loss.item(), lr=lr)
            run.save(step)                                  # once an epoch, and at the end

    Two files, <out>/<stage>.pt and <stage>_log.csv. The checkpoint holds all that --resume needs
    too; it is written beside the old one and renamed, so that whatever stops the program costs an
    epoch at most. Everything random in a step follows from (seed, step, process). So no generator
    has a state that would have to be kept, and on a CPU a resumed training equals an uninterrupted
    one to the bit.
    """

    def __init__(
        self, stage, out, seed=0, device="cpu", workers=0, resume=False, overwrite=False
    ):
        self.stage = stage
        self.seed = seed
        self.device = device
        self.device_type = torch.device(device).type
        self.workers = workers
        self.resume = resume
        self.overwrite = overwrite
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.checkpoint = Path(out) / f"{stage}.pt"
        self.log_path = Path(out) / f"{stage}_log.csv"

    def begin(self, model, optimizer, epochs, batch, stream, identity):
        """Takes the training to its first step: 0, or the one after the last that was saved.

        batch: images a step, of each process. identity: see identity_of.
        """
        self.model = model
        self.optimizer = optimizer
        self.batch = batch
        self.stream = stream
        self.identity = identity
        self.images_per_step = batch * self.processes
        self.steps = math.ceil(epochs * len(stream) / self.images_per_step)
        self.save_every = math.ceil(len(stream) / self.images_per_step)

        self.first = 0
        if self.checkpoint.is_file() and not self.overwrite:
            self.first = self.earlier_step()
        elif self.resume and self.rank == 0:
            print(f"there is no {self.checkpoint} to go on with: the training begins")
        self.rows = []       # of the log, since the last save
        self.columns = None  # of the log
        if self.rank == 0:
            self.cut_log()
        self.progress = Progress(self.stage, self.steps, self.first, self.images_per_step)
        self.began = time.perf_counter()

    def earlier_step(self):
        """What does the checkpoint that is there mean for this training? -> its first step

            of the same training, --resume          it is loaded
            of another training, --resume           refused
            the end of another training             refused
            all else, without --resume              it is replaced: the training begins anew

        (A file that train.py did not write counts as the end of another.)
        """
        content = read_checkpoint(self.checkpoint)
        training = content.get("training") or {"identity": {}, "step": 0, "steps": 0}
        earlier = training["identity"]
        changed = []
        for key in self.identity:
            if earlier.get(key) != self.identity[key]:
                changed.append(f"{key} was {earlier.get(key)!r}, now {self.identity[key]!r}")

        if changed and self.resume:
            raise ValueError(f"cannot resume {self.checkpoint}: {'; '.join(changed)}")
        if changed and training["step"] == training["steps"]:
            raise ValueError(f"{self.checkpoint} is the end of another training ({changed[0]}): "
                             "give another --out, or --overwrite to replace it")
        if not self.resume:
            return 0

        self.model.load_state_dict(content["learnt"])
        if training["optimizer"] is not None:
            self.optimizer.load_state_dict(training["optimizer"])
        return training["step"]

    def cut_log(self):
        """Leaves of an earlier log the rows before the first step."""
        kept = []
        if self.first and self.log_path.is_file():
            with self.log_path.open(newline="", encoding="utf-8") as file:
                kept = list(csv.reader(file))[:self.first + 1]
        if kept:
            self.columns = kept[0]
        with written_atomically(self.log_path) as temporary:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(kept)

    def batches(self):
        """Yields (step, images (B, 3, H, W), valid (B, H, W) bool, names) until the last step.

        Images and valid (see datasets.Augment) are on the device.
        """
        on_cuda = self.device_type == "cuda"
        loader = DataLoader(
            self.stream,
            batch_sampler=self.item_numbers(),
            num_workers=self.workers,
            pin_memory=on_cuda,
        )
        for step, (images, valid, names) in enumerate(loader, self.first):
            images = images.to(self.device, non_blocking=on_cuda)
            valid = valid.to(self.device, non_blocking=on_cuda)
            yield step, images, valid, names

        if self.rank == 0:
            seconds = time.perf_counter() - self.began
            print(f"{self.stage}: {self.steps - self.first} of {self.steps} steps in "
                  f"{seconds:.0f} s, written to {self.checkpoint.parent}")

    def item_numbers(self):
        """The numbers of the stream's items that each step takes.

        Step s of process r takes the images (s * processes + r) * batch and following of the
        endless stream: within an epoch no two processes share an image, and no batch is smaller
        than another.
        """
        for step in range(self.first, self.steps):
            start = (step * self.processes + self.rank) * self.batch
            yield range(start, start + self.batch)

    def epoch(self, step):
        return step * self.images_per_step // len(self.stream)

    def noise_seed(self, step):
        """A seed for each (seed, step, process), far from those of other processes."""
        return (self.seed + 1) * 7_368_787 + step + self.rank * 1_000_000_007

    def log(self, step, **numbers):
        """A row of the CSV (written with the next save) and the progress line."""
        if self.rank > 0:
            return
        columns = ["step", *numbers]
        if self.columns is None:
            self.columns = columns
            self.rows.append(columns)
        if self.columns != columns:
            raise ValueError(f"{self.log_path} has other columns than {', '.join(columns)}: give "
                             "another --out, or begin anew with --overwrite")
        self.rows.append([step, *(f"{number:.6g}" for number in numbers.values())])
        shown = "".join(f"{name} {number:.4g}  " for name, number in numbers.items())
        self.progress(step + 1, shown)

    def save(self, step):
        """Once an epoch and at the end, in process 0: the log, then the checkpoint."""
        done = step + 1
        finished = done == self.steps
        if self.rank > 0 or (done % self.save_every and not finished):
            return

        try:
            with self.log_path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self.rows)
            self.rows = []
        except OSError as error:  # on Windows a table that is open elsewhere; later it may go in
            print(f"{self.log_path} could not be written ({error})", file=sys.stderr)

        optimizer = None if finished else self.optimizer.state_dict()
        self.model.save(self.checkpoint, training={
            "identity": self.identity,
            "step": done,
            "steps": self.steps,
            "optimizer": optimizer,
        })


# --- The two stages, from a data set on -----------------------------------------------------------

def rectify(dataset, options, settings, split, clip, labels_path, run):
    """Stage 1: a new model, its pseudo-labels, the loop. -> ReCLIP in eval mode"""
    model = new_reclip(clip, dataset, options, settings, run.seed)
    with rank_0_first():
        labels = label_training_set(model, split, settings, labels_path, run.workers)
    model = train_rectification(model, split, labels, settings, run)
    if run.rank == 0:
        print_spreads(model, split)
    return model


@torch.no_grad()
def print_spreads(model, split):
    """How far do M_q, M_r and M_p hold the classes apart? On the first image, mean over patches.

    A bias is a correction. Where its spread is above that of M_q, masks show how CLIP leans, and no
    longer what the image shows: in short trainings it can end so, by M_p above all.
    """
    sides = (model.protocol["long_side"], model.protocol["short_side"])
    image = resize_within(split.image(0), *sides, model.protocol["antialias"])
    output = model(to_float(image)[None].to(model.W_q.device))
    spreads = {}
    for name, logits in (
        ("M_q", output.query),
        ("M_r", output.reference),
        ("M_p", output.positional),
        ("bias", output.rectified - output.query),
    ):
        spreads[name] = logits.std(1, correction=0).mean().item()

    shown = ", ".join(f"{name} {spread:.3f}" for name, spread in spreads.items())
    print(f"standard deviation over classes: {shown}")
    if spreads["bias"] > spreads["M_q"]:
        print("the bias outweighs what CLIP sees: train longer, or with a smaller "
              "--positional-gain or --lr")


def distill(dataset, settings, split, teacher, labels_path, run):
    """Stage 2: a new student, the loop. teacher: a ReCLIP. -> DeepLabV2 in eval mode"""
    if teacher.class_names != dataset.classes:
        raise ValueError(f"the teacher was learnt for other classes than {dataset.name}'s: "
                         f"{', '.join(teacher.class_names)}")
    student = new_student(teacher, dataset, settings, run.seed)
    with rank_0_first():
        labels = label_training_set(teacher, split, settings, labels_path, run.workers)
    return train_distillation(teacher, student, split, labels, settings, run)


# --- Command line ---------------------------------------------------------------------------------

def make_parser():
    """The options of the command line, without the checks of what fits together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=["all", "rectify", "distill"], default="all",
        help="all: both stages and a table (default)")
    add("--data", default="shapes",
        help=f"{', '.join(DATA)}, or a folder of your own images (default: shapes)")
    add("--classes",
        help="for your own images: 'cat, dog | puppy, grass', or a file with one class a line")
    add("--root", default="data",
        help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--clip", help=f"{', '.join(MODELS)}, or a weights file (default: the data set's)")
    add("--exact-gelu", action="store_true",
        help="the file of --clip was trained with GELU (LAION's), not OpenAI's QuickGELU")
    add("--prompts", type=Path,
        help="file with templates of the Query, one a line, {} for the name (default: the data "
        "set's)")
    add("--teacher", type=Path,
        help="rectification that --stage distill learns from (default: <out>/rectify.pt)")
    add("--out", type=Path, help="where checkpoints go (default: runs/<data>)")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true",
        help="go on where the same command was stopped, if there is something to go on with")
    earlier.add_argument("--overwrite", action="store_true",
        help="replace a finished checkpoint of other settings")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--epochs", type=int,
        help="short for --rectify-epochs, with --stage distill for --distill-epochs")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--threads", type=int,
        help="of the CPU (default: 2 on shapes, else torch's own); sums depend on it, so that a "
        "training is resumed with as many")

    # Every hyper-parameter is an option too. None means: not given, so the data set's own.
    group = parser.add_argument_group("hyper-parameters", "defaults in brackets, by data set")
    for field in (*dataclasses.fields(Options), *dataclasses.fields(Settings)):
        spelling = f"--{field.name.replace('_', '-')}"
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(spelling, default=None, help=describe(field), **kind)
    return parser


def describe(field):
    """Help of a hyper-parameter: what it is, where it is from, its default and the data sets'."""
    shown = []
    if field.default is not REQUIRED:
        shown.append(str(field.default))
    for dataset in (*DATA.values(), own_images("your own images", ("one", "two"))):
        for recipe in dataset.recipes:
            values = dataset.hyper_parameters(recipe)
            if values.get(field.name, field.default) != field.default:
                shown.append(f"{dataset.name} {recipe}: {values[field.name]}")
    return f"{field.metadata['help']} [{', '.join(shown)}]"


def parse_arguments(argv=None):
    """The command line -> (args, DataSet, Options, Settings). ValueError: it does not fit."""
    args = make_parser().parse_args(argv)
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill alone")
    # A student takes prompts and options from its teacher; given here, they would change nothing.
    for name in ("prompts", *(field.name for field in dataclasses.fields(Options))):
        if args.stage == "distill" and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --stage rectify or all alone")
    if args.exact_gelu and not args.clip:
        raise ValueError("--exact-gelu speaks of the file of --clip: give both")

    dataset = find_dataset(args.data, args.classes)
    if args.prompts:
        dataset = dataclasses.replace(dataset, prompts=tuple(read_lines(args.prompts)))
    if args.stage == "all" and not dataset.splits:
        raise ValueError(f"--stage all evaluates, and {args.data} has no labels: use "
                         "--stage rectify or distill")

    given = {}  # hyper-parameters of the command line
    for field in (*dataclasses.fields(Options), *dataclasses.fields(Settings)):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = value
    if args.epochs is not None:
        stage = "distill" if args.stage == "distill" else "rectify"
        given[f"{stage}_epochs"] = args.epochs
    options, settings = hyper_parameters(dataset, given.pop("recipe", None), **given)

    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    args.teacher = args.teacher or args.out / "rectify.pt"
    return args, dataset, options, settings


def find_dataset(data, classes):
    """The DataSet that --data names, or that of your own folder of images with --classes."""
    if data in DATA:
        if classes:
            raise ValueError(f"--classes goes with your own images; {data} has its own classes")
        return DATA[data]
    if not Path(data).is_dir():
        raise ValueError(f"--data {data} is neither a folder of images nor one of "
                         f"{', '.join(DATA)}")
    if not classes:
        raise ValueError(f"--data {data} needs --classes 'cat, dog, grass', or a file with one "
                         "class a line")
    return own_images(data, read_classes(classes))


def keep_freed_memory():
    """Lets the C library keep what large temporaries leave free, for those of the next step.

    Linux's (glibc) gives it back to the system at once, and takes it anew page by page: 15 % of a
    step of shapes. Other systems' are left alone.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every Linux has glibc
        if mallopt is not None:
            mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: its maximum, 32 MB
            mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD: up to 1 GB is kept


def join_processes(stage, device):
    """Under torchrun: this process's part in the run, on one GPU each (NCCL) or the CPU (gloo).

    -> the device of this process
    """
    if stage == "all":
        raise ValueError("--stage all runs in one process: torchrun goes with rectify and "
                         "distill")
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "nccl"
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)

    # An hour, since the others wait while process 0 labels all of ADE20K.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: each step has that many times the images, and "
              "there are fewer steps; the learning rate stays")
    return device


def main(argv=None):
    args, dataset, options, settings = parse_arguments(argv)

    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if args.threads or args.data == "shapes":
        torch.set_num_threads(args.threads or 2)
    if args.device == "cpu":
        keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        args.device = join_processes(args.stage, args.device)

    split = open_split(args.data, args.root, "train")
    if args.stage == "all":
        split_name = dataset.splits[-1]  # test of shapes, else val
        labelled = open_split(args.data, args.root, split_name)
        if dataset.annotations and not labelled.annotation_paths[0].is_file():
            raise FileNotFoundError(f"{labelled.annotation_paths[0]} is missing: --stage all "
                                    "evaluates at its end, and needs the annotations")
    labels_path = args.out / "image_labels.json"  # one file for all: nothing learnt goes into them
    run_of = partial(
        Run,
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    clip = None
    if args.clip or args.stage != "distill":
        clip = load_clip(args.clip or dataset.clip, args.device, not args.exact_gelu)

    if args.stage == "distill":
        teacher = ReCLIP.load(args.teacher, clip, args.device)
        distill(dataset, settings, split, teacher, labels_path, run_of("distill", args.out))
    elif args.stage == "rectify":
        rectify(dataset, options, settings, split, clip, labels_path, run_of("rectify", args.out))
    else:
        # The second row of the table: the Reference without the positional net.
        no_positional = dataclasses.replace(options, positional_channels=0)
        run = run_of("rectify", args.out / "reference_only")
        reference_only = rectify(dataset, no_positional, settings, split, clip, labels_path, run)

        run = run_of("rectify", args.out)
        model = rectify(dataset, options, settings, split, clip, labels_path, run)

        run = run_of("distill", args.out)
        student = distill(dataset, settings, split, model, labels_path, run)

        # Only here is truth read, to measure what has been learnt.
        rows = [
            ("MaskCLIP (Query only)", without_biases(model), args.out),
            ("+ Reference", reference_only, args.out / "reference_only"),
            ("+ Reference + positional", model, args.out),
            ("distilled", student, args.out),
        ]
        print_table(rows, dataset, labelled, split_name, args.workers)
        print(f"masks: {args.out / 'eval_distill.png'}")

    if dist.is_initialized():
        dist.destroy_process_group()


def print_table(rows, dataset, labelled, split_name, workers):
    """Evaluates models and prints a table in the form of the paper's Tables 2 and 4.

    rows: (title, model, folder of its results). labelled: the split with its truth.
    In the image of examples the masks of the rows so far, of the same folder, stand side by side.
    """
    lines = []
    beside = {}  # folder: (model, miou) of its rows so far
    for title, model, folder in rows:
        earlier = beside.setdefault(folder, [])
        result = evaluate_split(model, dataset, labelled, split_name, folder, earlier, workers)
        earlier.append((model, result["miou"]))
        lines.append(f"  {title:<28}{100 * result['miou']:5.1f}")

    print(f"\n{dataset.name} {split_name}, mIoU")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # names in a script that the terminal cannot print
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command with --resume goes on from the last epoch")
