"""Training: two plain loops, one per stage of the paper.

    python train.py                                          the whole paper on shapes, on a CPU
    python train.py --stage rectify --data voc --root DIR    Sec. 3.1-3.4 on PASCAL VOC
    python train.py --stage distill --data voc --root DIR    Sec. 3.5, from what the former wrote
    python train.py --stage rectify --data FOLDER --classes "cat, dog, grass"    your own images
    torchrun --nproc_per_node=4 train.py --stage rectify --data voc --root DIR   four GPUs
    python train.py --stage rectify --data voc --root DIR --method reclip++      the sequel

What stands here
    train_rectification      stage 1: the loop of Sec. 3.1-3.4
    train_distillation       stage 2: the loop of Sec. 3.5
    learning rates, gradients of several processes, the models that the loops start from
    label_training_set       pseudo-labels of the training images (Sec. 3.4), kept by name
    Run                      bookkeeping of a loop: resume, log, save, stop
    rectify_stage, distill_stage    a stage from a data set's name on: model, pseudo-labels, loop
    main                     the command line

The hyper-parameters are datasets.Settings, with the source of each. The stream of training images
yields images, which of their pixels are valid, and names: nothing here that learns reads a label of
a data set.

Symbols: B images per step, C classes, D width of CLIP's joint space; H x W pixels, h x w patches.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from clip_model import ATTENTIONS, MODELS, load_clip, written_atomically
from datasets import (
    DATA,
    IGNORE,
    SETTINGS,
    Augment,
    Evaluation,
    Progress,
    Settings,
    Thumbnails,
    TrainingStream,
    Windows,
    find_settings,
    open_split,
    own_facts,
    read_classes,
    read_prompts,
)
from deeplab import HEADS, STUDENTS, DeepLabV2
from eval import (
    Column,
    best_device,
    check_device,
    evaluate_stage,
    find_protocol,
    plain_clip,
)
from reclip import (
    PROMPTS,
    RECIPES,
    ReCLIP,
    ReCLIPPlusPlus,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    masked_features,
    open_rectification,
    text_guided_loss,
    window_labels,
)


# --- Stage 1: rectification -----------------------------------------------------------------------

def train_rectification(model, split, labels, settings, run):
    """Sec. 3.1-3.4: learns CLIP's two biases from images alone; writes <out>/rectify.pt.

    model: a ReCLIP. Its Reference prompt and its positional net learn; CLIP stays as it is. (The
        sequel, a ReCLIPPlusPlus, is trained by the same loop.)
    split: the training images (datasets.open_split).
    labels: {name: (C,) bool}: which classes does each image hold? CLIP's own guess, which
        label_training_set makes.
    settings: datasets.Settings.
    run: bookkeeping, a Run (see below).
    -> the model, in eval mode
    """
    modules = model.learnable_modules()
    parameters = [p for module in modules.values() for p in module.parameters()]
    if not parameters:
        raise ValueError("nothing to learn: prompt_length and positional_channels are both 0")
    optimizer = torch.optim.SGD(
        parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )

    augment = Augment(
        long_side=settings.rectify_long_side,
        short_side=settings.rectify_short_side,
        crop=settings.crop,
        ratio=(settings.resize_from, settings.resize_to),
        flip=settings.flip,
        photometric=settings.photometric,
        antialias=split.antialias,
    )
    stream = TrainingStream(split, augment, run.seed)
    images_per_step = settings.rectify_batch * run.processes
    steps = math.ceil(settings.rectify_epochs * len(split) / images_per_step)

    # CLIP is frozen, so an image that is never augmented (shapes) has features that never change.
    # They are computed once, here: items 0 .. N-1 of the stream are its first epoch, each image
    # once.
    features_of = {}
    if not augment.changes:
        for images, _, names in DataLoader(stream, 32, sampler=range(len(split))):
            for name, Z in zip(names, model.features(images.to(run.device))):
                features_of[name] = Z                                   # (D, h, w)

    model.train()
    run.begin(modules, optimizer, steps, images_per_step, len(split))
    for step, images, valid, names in run.batches(stream, settings.rectify_batch):
        # Sec. 4.1: poly decay, once an epoch, as released.
        epoch = step * images_per_step // len(split)
        lr = poly_learning_rate(
            settings.lr, epoch, settings.rectify_poly_epochs, settings.poly_power
        )
        set_learning_rate(optimizer, lr)

        # Which classes do these images hold? CLIP's own guess, made once on the center square of
        # each image, which is how CLIP sees images; no annotation is opened anywhere. The crop may
        # not show all of them: the mask of a missing class then holds something else, which is
        # noise in the loss.
        present = torch.stack([labels[name] for name in names]).to(run.device)   # (B, C) bool

        # Sec. 3.1: the patches as CLIP sees them. CLIP is frozen: no gradient passes here.
        if features_of:
            Z = torch.stack([features_of[name] for name in names])               # (B, D, h, w)
        else:
            Z = model.features(images, valid)                                    # (B, D, h, w)

        # Eq. (1)-(3): what CLIP says of each patch, less its leaning towards classes and places.
        M = model.rectify(Z).rectified                                           # (B, C, h, w)

        # Eq. (4): every patch picks one class. These masks are hard, but a gradient passes through.
        # (Patches of padding take part: they fall under some mask, and count in Eq. (5)'s mean.)
        masks = gumbel_softmax_masks(M, model.tau_1)                             # (B, C, h, w)

        # Eq. (5): what lies under the mask of a class must look like the text of that class. If it
        # does not, patches of another class have come under the mask, and the loss corrects the
        # bias that let them in.
        pooled = masked_features(Z, masks, model.pool)                           # (B, C, D)
        loss = contrastive_loss(pooled, model.W_q, present, model.tau)           # scalar

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        run.require_finite(step, loss, parameters, names)
        optimizer.step()

        run.log(step, loss, lr)
        if run.save_due(step):
            model.save(run.checkpoint)
            run.save_state(step)
    return model.eval()


# --- Stage 2: distillation ------------------------------------------------------------------------

def train_distillation(teacher, student, split, labels, settings, run):
    """Sec. 3.5: the rectified CLIP teaches DeepLab V2; writes <out>/distill.pt.

    Patches of 16 pixels cannot draw an outline, and CLIP was not made to segment. DeepLab V2 was:
    its grid is twice as fine as CLIP's, and it learns what the teacher says of very many images.

    teacher: a ReCLIP, frozen.
    student: a DeepLabV2.
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

    augment = Augment(
        long_side=settings.distill_long_side,
        short_side=settings.distill_short_side,
        crop=settings.distill_crop,
        ratio=(settings.resize_from, settings.resize_to),
        flip=settings.flip,
        photometric=settings.photometric,
        antialias=split.antialias,
    )
    stream = TrainingStream(split, augment, run.seed)
    images_per_step = settings.distill_batch * run.processes
    steps = math.ceil(settings.distill_epochs * len(split) / images_per_step)

    # Eq. (6) makes probabilities of cosines with the temperature of Eq. (5); a classifier that
    # learns finds its own scale. (Eq. (4) divides by the teacher's tau_1 under every head: beside a
    # classifier's large logits its noise hardly counts.)
    mask_tau = settings.mask_tau
    if mask_tau is None:
        mask_tau = 1.0 if settings.head == "original" else teacher.tau

    student.train()
    student.to(memory_format=torch.channels_last)  # the same numbers, faster convolutions
    run.begin({"student": student}, optimizer, steps, images_per_step, len(split))
    for step, images, valid, names in run.batches(stream, settings.distill_batch):
        # Sec. 4.1: poly decay over all epochs, and never below a floor (released).
        epoch = step * images_per_step // len(split)
        lr = poly_learning_rate(
            settings.distill_lr, epoch, settings.distill_epochs, settings.poly_power
        )
        lr = max(lr, settings.distill_lr_floor)
        set_learning_rate(optimizer, lr)

        # Which classes do these images hold? CLIP's guess once more, for the text-guided loss.
        present = torch.stack([labels[name] for name in names]).to(run.device)   # (B, C) bool
        size = images.shape[2:]                                                  # (H, W)

        # What the teacher says. Its masks are the pseudo-labels M~: every pixel gets a class, and
        # none is looked up anywhere. Where an image was padded there is nothing to learn.
        with torch.no_grad():
            teacher_logits = teacher(images, valid)     # Logits: .rectified is M, .features is Z
            M = teacher.to_pixels(teacher_logits.rectified, *size)               # (B, C, H, W)
            pseudo_labels = M.argmax(1).masked_fill(~valid, IGNORE)              # (B, H, W)

        # What the student says of the same images, and how far it is from that. On a GPU its
        # convolutions run in bf16; DeepLabV2.rectify and text_guided_loss turn autocast off for
        # themselves.
        with torch.autocast(run.device_type, torch.bfloat16, enabled=run.device_type == "cuda"):
            student_logits = student(images, valid)     # Logits: .rectified is M^D, .features is Z^

            # Eq. (6): each pixel should get the class that the teacher gave it.
            mask_loss = mask_guided_loss(
                student_logits.rectified, pseudo_labels, mask_tau, student.to_pixels
            )

            # Eq. (7): its features should be the teacher's, since its head is made of CLIP's texts.
            feature_loss = 0
            if settings.alpha:
                feature_loss = feature_guided_loss(
                    teacher_logits.features, student_logits.features, valid,
                    teacher.to_pixels, student.to_pixels,
                )

            # Eq. (4)-(5) again: what lies under the student's own masks should look like their
            # texts. Here the student can find out that its teacher was wrong.
            text_loss = 0
            if settings.beta:
                text_loss = text_guided_loss(
                    student_logits.rectified, student_logits.features, teacher.W_q, present,
                    teacher.tau_1, teacher.tau, teacher.pool,
                )

            # Eq. (8): all three, the last two with half the weight.
            loss = distillation_loss(
                mask_loss, feature_loss, text_loss, settings.alpha, settings.beta
            )

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        run.require_finite(step, loss, parameters, names)
        optimizer.step()

        run.log(step, loss, lr)
        if run.save_due(step):
            student.save(run.checkpoint)
            run.save_state(step)
    return student.eval()


# --- Learning rate; gradients of several processes ------------------------------------------------

def poly_learning_rate(lr, epoch, horizon, power):
    """Sec. 4.1: lr (1 - epoch / horizon)^power. Changed once an epoch, as released."""
    return lr * (1 - min(epoch / horizon, 1)) ** power


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


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


def rank_and_world():
    """The number of this process, and of how many: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def rank_0_first():
    """Process 0 does what stands within before the others, so that they find the files it wrote."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


# --- The models that the loops start from ---------------------------------------------------------

def new_reclip(clip, facts, settings, seed):
    """A ReCLIP of a data set's classes that has learnt nothing yet; the same for the same seed."""
    torch.manual_seed(seed)
    options = {
        "prompts": facts.prompts or PROMPTS,
        "prompt_length": settings.prompt_length,
        "prompt_per_class": settings.prompt_per_class,
        "reference_norm": settings.reference_norm,
        "query_learnable": settings.query_learnable,
        "subtract": settings.subtract,
        "attention": settings.attention,
        "tau_1": settings.tau_1,
        "tau": settings.tau,
        "pool": settings.pool,
        "recipe": settings.recipe,
    }
    if settings.method == "reclip++":
        return ReCLIPPlusPlus(clip, facts.classes, **options).train()
    return ReCLIP(
        clip,
        facts.classes,
        positional_channels=settings.positional_channels,
        positional_last_relu=settings.positional_last_relu,
        positional_gain=settings.positional_gain,
        **options,
    ).train()


def new_student(teacher, settings, seed):
    """A DeepLabV2 with the heads of the teacher, a ReCLIP in eval mode; the same for the same seed.

    Table 6's heads inherit different parts; a part that the teacher does not have cannot be
    inherited.
    """
    head = settings.head
    if "reference" in head and not (teacher.subtract and teacher.reference is not None):
        raise ValueError(f"head {head!r} subtracts the Reference, which this teacher does not: "
                         "rectify again with prompt_length above 0 and subtract")
    if "positional" in head and teacher.positional is None:
        raise ValueError(f"head {head!r} subtracts positional logits, and this teacher has none: "
                         "rectify again with positional_channels not 0")

    torch.manual_seed(seed)
    with torch.no_grad():
        W_q, W_r = teacher.heads()                                      # (C, D) each
        M_p = None
        if "positional" in head:
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
        recipe=teacher.recipe,
    ).train()


# --- Image-level labels of the training images, Sec. 3.4 ------------------------------------------

def origin_of(facts, settings, clip, prompts, split):
    """What pseudo-labels depend on: kept beside them, and part of what identifies a run.

    But for the pixels: that an image was changed under its old name is not noticed.
    """
    origin = {
        "data": facts.name,
        "classes": list(facts.classes),
        "prompts": list(prompts),
        "clip": clip.sha256,
        "threshold": settings.threshold,
        "top_k": settings.top_k,
        "pictures": len(split),
        "names": crc32(repr(split.names).encode()),
    }
    if settings.label_window:
        origin["label_window"] = settings.label_window
        origin["window_sides"] = list(sides_before_windows(split, settings))
    return origin


def sides_before_windows(split, settings):
    """The sides that an image is resized within before windows are cut; 0, 0: not at all.

    As released, windows are cut from a benchmark's image as it is (those are the data sets without
    antialiasing). Images of your own may have any size, and are first resized as for training
    (ours).
    """
    if split.antialias:
        return settings.rectify_long_side, settings.rectify_short_side
    return 0, 0


def label_training_set(model, split, settings, origin, path, workers=0):
    """Sec. 3.4: the classes that CLIP finds in each training image: {name: (C,) bool}.

    They come from CLIP alone and never change, so they are made once and kept in `path` by
    image name (the released code pairs them by line number with an unsorted directory listing).
    A file that was made from something else (see origin_of), or is no such file, is made anew.
    """
    found = read_image_labels(path, origin, split.names)
    if found is None:
        if settings.label_window:
            found = find_in_windows(model, split, settings, workers)
        else:
            found = find_in_thumbnails(model, split, settings, workers)
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps({"identity": origin, "labels": found}))
        print_label_histogram(found, model.class_names)

    labels = {}
    for name, classes in found.items():
        labels[name] = torch.zeros(len(model.class_names), dtype=torch.bool)
        labels[name][classes] = True
    return labels


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


def find_in_windows(model, split, settings, workers):
    """ReCLIP++'s rule: {name: list of the class indices that some window of the image names}."""
    found = {}
    progress = Progress("image-level labels by windows", len(split))
    sides = sides_before_windows(split, settings)
    windows = Windows(split, settings.label_window, model.clip.input_resolution, *sides)
    for images, name in DataLoader(windows, batch_size=None, num_workers=workers):
        similarity = [
            model.image_similarity(some.to(model.W_q.device)) for some in images.split(64)
        ]
        row = window_labels(torch.cat(similarity))                      # (C,) bool
        found[name] = row.cpu().nonzero()[:, 0].tolist()
        progress(len(found))
    return found


def read_image_labels(path, origin, names):
    """{name: list of class indices} of an earlier run with the same origin, or None."""
    try:
        content = json.loads(path.read_text())
        if content["identity"] == origin and set(content["labels"]) == set(names):
            return content["labels"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def print_label_histogram(found, class_names):
    """In how many images was each class found? A class never found needs another name."""
    print(f"images that each class was found in, of {len(found)}:")
    for c, name in enumerate(class_names):
        count = sum(c in classes for classes in found.values())
        bar = "#" * math.ceil(40 * count / len(found))
        if count == 0:
            bar = "never: try a synonym, name | synonym"
        print(f"  {name:<20}{count:6}  {bar}")


# --- Bookkeeping ----------------------------------------------------------------------------------

class Run:
    """All that a loop needs and the paper does not speak of: resume, log, progress, save, stop.

        run = Run("rectify", Path("runs/voc"), identity)
        run.begin(modules, optimizer, steps, images_per_step, len(split))    # --resume goes on here
        for step, images, valid, names in run.batches(stream, batch_size):
            ...
            run.require_finite(step, loss, parameters, names)    # NaN ends the run before the step
            optimizer.step()
            run.log(step, loss, lr)
            if run.save_due(step):                       # every epoch, at the end, before a stop
                model.save(run.checkpoint)
                run.save_state(step)

    Files: <out>/<stage>.pt (checkpoint), <stage>_state.pt (all that a later --resume needs),
    <stage>_log.csv (step, loss, lr). Each is written beside the old one and renamed.

    identity: {name: value} of what must not differ between a run and its resumption. More may be
        added to run.identity before begin.
    Everything random in a step follows from (seed, step, process). So no generator has a state that
    would have to be kept, and on a CPU a resumed run equals an uninterrupted one to the bit.
    """

    def __init__(self, stage, out, identity, seed=0, resume=False, device="cpu", workers=0):
        self.rank, self.processes = rank_and_world()
        self.stage = stage
        self.out = Path(out)
        self.identity = identity | {"seed": seed, "processes": self.processes}
        self.seed = seed
        self.resume = resume
        self.device = device
        self.device_type = torch.device(device).type
        self.workers = workers
        self.checkpoint = self.out / f"{stage}.pt"
        self.state_path = self.out / f"{stage}_state.pt"
        self.log_path = self.out / f"{stage}_log.csv"
        self.asked_to_stop = False  # this process got a signal
        self.stopping = False       # all processes know it: the run ends after this step

    def begin(self, modules, optimizer, steps, images_per_step, images_per_epoch):
        """Takes the run to its first step: 0, or the one after the last that was saved.

        modules: {name: module}, what learns; with the optimizer, what is saved and resumed.
        steps: how many in all, of images_per_step images; images_per_epoch: how often to save.
        """
        self.modules = modules
        self.optimizer = optimizer
        self.steps = steps
        self.save_every = math.ceil(images_per_epoch / images_per_step)
        self.first = 0
        self.rows = [["step", "loss", "lr"]]

        self.out.mkdir(parents=True, exist_ok=True)
        if self.resume:
            self.first = self.load_state()
            if self.first and self.log_path.exists():
                with self.log_path.open() as file:
                    self.rows = list(csv.reader(file))[:self.first + 1]
        self.saved = self.first
        self.progress = Progress(self.stage, steps, self.first, images_per_step)
        self.began = time.perf_counter()

    def batches(self, stream, batch_size):
        """Yields (step, images (B, 3, H, W), valid (B, H, W) bool, names) until the last step.

        Images and valid (see datasets.Augment) are on the device.

        Step s of process r takes the images (s * processes + r) * batch_size and following of the
        endless stream: within an epoch no two processes share an image, and no batch is smaller
        than another.
        """
        loader = DataLoader(
            stream,
            batch_sampler=self.item_numbers(batch_size),
            num_workers=self.workers,
            pin_memory=self.device_type == "cuda",
        )
        with self.stop_signals():
            for step, (images, valid, names) in enumerate(loader, self.first):
                # What is random in a step, the noise of Eq. (4), follows from its number. Processes
                # get noise of their own, and the large primes keep it apart from the draws of the
                # stream and of other seeds.
                torch.manual_seed((self.seed + 1) * 7_368_787 + step + self.rank * 1_000_000_007)
                images = images.to(self.device, non_blocking=True)
                valid = valid.to(self.device, non_blocking=True)
                yield step, images, valid, names

                if self.stopping and step + 1 < self.steps:
                    raise KeyboardInterrupt
        self.report()

    def item_numbers(self, batch_size):
        """The numbers of the stream's items that each step takes."""
        for step in range(self.first, self.steps):
            start = (step * self.processes + self.rank) * batch_size
            yield range(start, start + batch_size)

    @contextmanager
    def stop_signals(self):
        """Within, Ctrl-C and SIGTERM let the step in progress end and be saved.

        A signal that comes too late for that, after save_due, counts for the next step.
        """
        def ask(*unused):
            self.asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def require_finite(self, step, loss, parameters, names):
        """Ends the run if loss or gradient is NaN or infinite, before the step spoils the weights.

        Gradients are averaged by now, and a mean with NaN in it is NaN: all processes end together.
        """
        value = loss.detach().clone()
        if self.processes > 1:
            dist.all_reduce(value)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf)  # infinity: measured, not clipped
        if math.isfinite(value.item()) and math.isfinite(norm.item()):
            return
        kept = "nothing had been saved yet"
        if self.saved:
            kept = f"{self.state_path} holds step {self.saved}"
        raise ValueError(f"the loss is {loss.item()}, its gradient's norm {norm:.3g}, at step "
                         f"{step} on {', '.join(names)}; the step was not taken, {kept}: try a "
                         "smaller learning rate")

    def log(self, step, loss, lr):
        """A row of the CSV (written with the next save) and the progress line."""
        value = loss.item()
        self.rows.append([step, f"{value:.6g}", f"{lr:.6g}"])
        if self.rank == 0:
            self.progress(step + 1, f"loss {value:.4f}  lr {lr:.2e}  ")

    def save_due(self, step):
        """Whether this process saves now: process 0, once an epoch, at the end, or before a stop.

        All processes must call it: here they agree whether to stop. A stop that reached one stops
        all after the same step; one that ended alone would leave the others waiting for its
        gradients.
        """
        self.stopping = self.asked_to_stop
        if self.processes > 1:
            asked = torch.tensor(int(self.asked_to_stop), device=self.device)
            dist.all_reduce(asked)
            self.stopping = bool(asked)

        last = step + 1 == self.steps
        due = (step + 1) % self.save_every == 0 or last or self.stopping
        if due:
            self.saved = step + 1
        return due and self.rank == 0

    def save_state(self, step):
        """The log, then the state. The checkpoint of the stage is written before both.

        After a kill in between, --resume goes on from the older state and writes all again.
        """
        with written_atomically(self.log_path) as temporary:
            with open(temporary, "w", newline="") as file:
                csv.writer(file).writerows(self.rows)

        state = {
            "step": step + 1,
            "identity": self.identity,
            "versions": {"torch": str(torch.__version__)},
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimizer.state_dict(),
        }
        with written_atomically(self.state_path) as temporary:
            torch.save(state, temporary)

    def load_state(self):
        """Loads what save_state wrote; returns the step to go on with. Refuses another run's."""
        path = self.state_path
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist; leave --resume out")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step = int(state["step"])
            saved_identity = state["identity"]
            written_by = state["versions"]["torch"]
            changed = []
            for key, value in self.identity.items():
                if saved_identity.get(key) != value:
                    changed.append(f"{key} was {saved_identity.get(key)!r}, now {value!r}")
            if not changed:
                for name, module in self.modules.items():
                    module.load_state_dict(state["modules"][name])
                self.optimizer.load_state_dict(state["optimiser"])
        except Exception as error:  # whatever a broken or hostile file provokes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a training state, or is truncated: "
                             f"{reason}") from error
        if changed:
            raise ValueError(f"cannot resume {path}: {'; '.join(changed)}")

        if written_by != torch.__version__:
            print(f"{path} was written by torch {written_by}: last digits may differ from here on")
        return step

    def report(self):
        """The last line of a stage: how long it took and how much memory."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if self.device_type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        seconds = time.perf_counter() - self.began
        print(f"{self.stage}: {self.steps - self.first} of {self.steps} steps in {seconds:.0f} s, "
              f"peak memory of the process so far {memory / 2 ** 30:.2f} GiB, "
              f"written to {self.out}")


# --- The two stages, from a data set's name on ----------------------------------------------------

def open_training_images(data, root, download, cache, workers, limit=2):
    """The training split. Its images are decoded once and kept in memory where that is wanted.

    cache: True, False, or None to keep them if they need less than `limit` GiB (ours).
    """
    with rank_0_first():
        split = open_split(data, root, "train", download)

    sample = range(0, len(split), max(1, len(split) // 20))
    mean_bytes = sum(split.image(i).numel() for i in sample) / len(sample)
    copies = max(1, workers)  # each worker keeps its own
    size = mean_bytes * len(split) * copies / 2 ** 30

    split.keep = cache
    if cache is None:
        split.keep = size < limit
    kept = "kept in memory" if split.keep else "not kept in memory"
    print(f"{len(split)} training images, decoded about {size:.2f} GiB: {kept}")
    return split


def rectify_stage(facts, settings, split, clip_name, labels_path, run):
    """Stage 1: a new model, its pseudo-labels, the loop. -> ReCLIP in eval mode

    clip_name: as load_clip knows it; None for the data set's. labels_path: pseudo-labels are kept
    there.
    """
    clip = load_clip(clip_name or facts.clip, run.device)
    model = new_reclip(clip, facts, settings, run.seed)

    origin = origin_of(facts, settings, clip, model.prompts, split)
    with rank_0_first():
        labels = label_training_set(model, split, settings, origin, labels_path, run.workers)

    run.identity |= origin | dataclasses.asdict(settings)
    return train_rectification(model, split, labels, settings, run)


def distill_stage(facts, settings, split, clip_name, teacher_path, labels_path, run, recipe=None):
    """Stage 2: the teacher, a new student, the loop. -> DeepLabV2 in eval mode

    teacher_path: what stage 1 wrote, or a rectification that the authors published.
    clip_name: None for the CLIP that the teacher was learnt on.
    recipe: how a published teacher reads images (None: cvpr2024); ours keeps its own.
    """
    clip = None
    if clip_name:
        clip = load_clip(clip_name, run.device)
    with rank_0_first():
        teacher = open_rectification(
            teacher_path, facts.classes, clip, recipe, run.out / "W_q.pt", run.device
        )
    if teacher.method != "reclip":
        raise ValueError(f"{teacher_path} is a ReCLIP++ checkpoint, and ReCLIP++ has no "
                         "distillation (its authors removed theirs): give one of ReCLIP's")
    if teacher.class_names != facts.classes:
        raise ValueError(f"{teacher_path} was learnt for other classes than {facts.name}'s: "
                         f"{', '.join(teacher.class_names)}")
    student = new_student(teacher, settings, run.seed)

    origin = origin_of(facts, settings, teacher.clip, teacher.prompts, split)
    with rank_0_first():
        labels = label_training_set(teacher, split, settings, origin, labels_path, run.workers)

    run.identity |= origin | dataclasses.asdict(settings)
    run.identity |= {"teacher": teacher.fingerprint(), "recipe": teacher.recipe}
    return train_distillation(teacher, student, split, labels, settings, run)


def print_table(rows, facts, split_name, labelled, settings, workers):
    """Evaluates models and prints a table in the form of the paper's Tables 2 and 4.

    rows: (title, model, stage, folder of the results, titles of earlier rows to draw beside it).
    labelled: the split with its truth. settings: datasets.Settings, for the protocols.
    """
    lines = []
    measured = {}  # title: Column
    for title, model, stage, folder, beside in rows:
        others = [measured[earlier] for earlier in beside]
        protocol = find_protocol(settings, stage)
        dataset = Evaluation(labelled, protocol.long_side, protocol.short_side)
        result = evaluate_stage(
            model, stage, facts, split_name, dataset, protocol, folder, others, workers
        )
        measured[title] = Column(model, stage, dataset, protocol, result["miou"])
        lines.append(f"  {title:<28}{100 * result['miou']:5.1f}")

    print(f"\n{facts.name} {split_name}, mIoU")
    print("\n".join(lines))


# --- Command line ---------------------------------------------------------------------------------

# Settings that are one of a few words
CHOICES = {
    "reference_norm": ("frobenius", "class"),
    "pool": ("global", "mask"),
    "attention": ATTENTIONS,
    "student": tuple(STUDENTS),
    "head": HEADS,
}


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
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help=f"{', '.join(MODELS)}, or a weights file (default: the data set's)")
    add("--prompts", type=Path,
        help="file with templates of the Query, one a line, {} for the name (default: the data "
        "set's)")
    add("--teacher", type=Path,
        help="rectification that --stage distill learns from (default: <out>/rectify.pt)")
    add("--out", type=Path,
        help="where checkpoints go (default: runs/<data>, of reclip++ runs/<data>-reclip++)")
    add("--resume", action="store_true", help="go on where the same command was stopped")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--epochs", type=int,
        help="short for --rectify-epochs, with --stage distill for --distill-epochs")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--cache", action=argparse.BooleanOptionalAction,
        help="keep decoded images in memory (default: below 2 GiB)")
    add("--split", help="split of the table of --stage all (default: test of shapes, else val)")
    add("--recipe", choices=list(RECIPES),
        help="which of the authors' two, for voc, context and ade20k (default: cvpr2024, the one "
        "published with the paper's checkpoints)")
    add("--method", choices=["reclip", "reclip++"], default="reclip",
        help="with --stage rectify: reclip++, the authors' sequel, implies --recipe 2025 "
        "(default: reclip, the paper's)")

    # Every hyper-parameter is an option too. None means: not given, so the data set's own.
    group = parser.add_argument_group(
        "hyper-parameters", "defaults in brackets, by data set, under the default recipe"
    )
    for field in dataclasses.fields(Settings):
        if field.name in ("recipe", "method"):
            continue
        spellings = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])
        kind = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*spellings, default=None, help=describe(field), **kind)
    return parser


def describe(field):
    """Help of a setting: what it is, where it is from, and its default by data set."""
    values = {name: getattr(find_settings(name), field.name) for name in SETTINGS}
    if len(set(values.values())) == 1:
        values = {"all": values["voc"]}

    shown = []
    for name, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        shown.append(f"{name} {value}")
    return f"{field.metadata['help']} [{', '.join(shown)}]"


def parse_arguments(argv=None):
    """The command line as (args, facts of the data set, settings). ValueError: it does not fit."""
    args = make_parser().parse_args(argv)
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill alone")
    if args.prompts and args.stage == "distill":
        raise ValueError("--prompts goes with --stage rectify and all; a teacher keeps its texts")
    if args.method != "reclip" and args.stage != "rectify":
        raise ValueError(f"--method {args.method} goes with --stage rectify alone")

    facts = find_facts(args.data, args.classes)
    if args.prompts:
        facts = dataclasses.replace(facts, prompts=read_prompts(args.prompts))
    if args.split and args.stage != "all":
        raise ValueError("--split goes with --stage all; eval.py evaluates a single stage")
    if args.stage == "all" and not facts.splits:
        raise ValueError(f"--stage all evaluates, and {args.data} has no labels: use "
                         "--stage rectify or distill")
    if facts.splits:
        args.split = args.split or facts.splits[-1]
    if args.split and not facts.splits:
        raise ValueError(f"--split {args.split}: your own images have no splits")
    if args.split and args.split not in facts.splits:
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(facts.splits)}")

    changes = {}  # settings that the command line gives
    for field in dataclasses.fields(Settings):
        value = getattr(args, field.name)
        if value is not None and field.name not in ("recipe", "method"):
            changes[field.name] = value
    for name in changes:
        if args.method == "reclip++" and name.startswith("positional"):
            raise ValueError(f"--{name.replace('_', '-')} goes with ReCLIP's positional net, which "
                             "ReCLIP++ does not have")
    if args.epochs is not None:
        stage = "distill" if args.stage == "distill" else "rectify"
        changes[f"{stage}_epochs"] = args.epochs
    settings = find_settings(args.data, args.recipe, args.method, **changes)
    if args.data != "shapes" and not (settings.crop and settings.distill_crop):
        raise ValueError("--crop 0 and --distill-crop 0 need images of one size; those of "
                         f"{args.data} differ")

    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    if args.out is None:
        args.out = Path("runs") / Path(args.data).resolve().name
        if args.method == "reclip++":
            args.out = args.out.with_name(f"{args.out.name}-reclip++")
    if args.teacher is None:
        args.teacher = args.out / "rectify.pt"

    check_device(args.device)
    return args, facts, settings


def find_facts(data, classes):
    """Facts of the data set that --data names, or of your own folder of images with --classes."""
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
    return own_facts(data, read_classes(classes))


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
    args, facts, settings = parse_arguments(argv)

    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if args.data == "shapes" and args.device == "cpu":
        # Tensors this small gain little from more threads, and stall on shared cores.
        torch.set_num_threads(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        args.device = join_processes(args.stage, args.device)

    split = open_training_images(args.data, args.root, args.download, args.cache, args.workers)
    labels_path = args.out / "image_labels.json"  # one file for all: nothing learnt goes into them
    run_options = (args.seed, args.resume, args.device, args.workers)
    rectification = Run("rectify", args.out, {}, *run_options)
    distillation = Run("distill", args.out, {}, *run_options)

    if args.stage == "rectify":
        rectify_stage(facts, settings, split, args.clip, labels_path, rectification)
    elif args.stage == "distill":
        distill_stage(
            facts, settings, split, args.clip, args.teacher, labels_path, distillation, args.recipe
        )
    else:
        # The second row of the table: the Reference without the positional net.
        without_positional = dataclasses.replace(settings, positional_channels=0)
        reference_only = Run("rectify", args.out / "reference_only", {}, *run_options)

        # With --resume, a run that had not been begun has no state: it begins now.
        for run in (reference_only, rectification, distillation):
            run.resume = run.resume and run.state_path.is_file()

        reference_model = rectify_stage(
            facts, without_positional, split, args.clip, labels_path, reference_only
        )
        model = rectify_stage(facts, settings, split, args.clip, labels_path, rectification)
        student = distill_stage(
            facts, settings, split, args.clip, args.teacher, labels_path, distillation
        )

        # CLIP itself: with --query-learnable the M_q of `model` is no longer CLIP's.
        plain = plain_clip(facts, model.clip, settings.attention, settings.recipe)

        # Only here is truth read, to measure what has been learnt.
        labelled = open_split(args.data, args.root, args.split, args.download)
        clip_row = "MaskCLIP (Query only)"
        both_row = "+ Reference + positional"
        rows = [
            (clip_row, plain, "clip", args.out, []),
            ("+ Reference", reference_model, "rectify", reference_only.out, []),
            (both_row, model, "rectify", args.out, [clip_row]),
            ("distilled", student, "distill", args.out, [clip_row, both_row]),
        ]
        print_table(rows, facts, args.split, labelled, settings, args.workers)
        print(f"masks: {args.out / 'eval_distill.png'}")

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped, and if a state was saved, the same command with --resume goes "
                 "on from it")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        print(f"train.py: process {dist.get_rank() + 1} failed or lost another one "
              f"({str(error).splitlines()[0]}); start all again with --resume", file=sys.stderr)
        # Not sys.exit: taking down a group that has lost a member, gloo may abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
