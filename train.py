"""Training: two plain loops, one per stage of the paper.

    python train.py                                          the whole paper on shapes, on a CPU
    python train.py --stage rectify --data voc --root DIR    Sec. 3.1-3.4 on PASCAL VOC
    python train.py --stage distill --data voc --root DIR    Sec. 3.5, from what the former wrote
    python train.py --stage rectify --data FOLDER --classes "cat, dog, grass"    your own images
    torchrun --nproc_per_node=4 train.py --stage rectify --data voc --root DIR   four GPUs

What stands here
    train_rectification      stage 1: the loop of Sec. 3.1-3.4
    train_distillation       stage 2: the loop of Sec. 3.5
    learning rates, gradients of several processes, the models that the loops start from
    label_training_set       pseudo-labels of the training images (Sec. 3.4), kept by name
    Run                      bookkeeping of a loop: resume, log, save, stop
    main                     the command line

The hyper-parameters are datasets.Settings, with the source of each. The stream of training
images yields images and names only: nothing here that learns reads a label of a data set.

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

from clip_model import load_clip, written_atomically
from datasets import (
    DATA,
    SETTINGS,
    Augment,
    Evaluation,
    Progress,
    Settings,
    Thumbnails,
    TrainingStream,
    open_split,
    own_facts,
    read_classes,
)
from deeplab import DeepLabV2
from eval import Protocol, evaluate_stage
from reclip import (
    PROMPTS,
    ReCLIP,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    masked_features,
    text_guided_loss,
)


# --- Stage 1: rectification -----------------------------------------------------------------------

def train_rectification(model, split, labels, settings, run):
    """Sec. 3.1-3.4: learns CLIP's two biases from images alone; writes <out>/rectify.pt.

    model: a ReCLIP. Its Reference prompt and its positional net learn; CLIP stays as it is.
    split: the training images (datasets.open_split).
    labels: {name: (C,) bool}: which classes does each image hold? CLIP's own guess
    (label_training_set).
    settings: datasets.Settings. run: bookkeeping, see below.
    """
    modules = model.bias_modules()
    parameters = [p for module in modules.values() for p in module.parameters()]
    if not parameters:
        raise ValueError("nothing to learn: prompt_length and positional_channels are both 0")
    optimizer = torch.optim.SGD(
        parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )

    augment = Augment(
        settings.long_side,
        settings.rectify_short_side,
        settings.crop,
        flip=settings.flip,
        photometric=settings.photometric,
    )
    stream = TrainingStream(split, augment, run.seed)
    images_per_step = settings.rectify_batch * run.processes
    steps = math.ceil(settings.rectify_epochs * len(split) / images_per_step)

    # CLIP is frozen, so an image that never changes (shapes) has features that never change.
    known = {}
    if not augment.changes:
        for images, names in DataLoader(stream, 32, sampler=range(len(split))):
            for name, Z in zip(names, model.features(images.to(run.device))):
                known[name] = Z                                         # (D, h, w)

    model.train()
    run.begin(modules, optimizer, steps, images_per_step, len(split))
    for step, images, names in run.batches(stream, settings.rectify_batch):
        # Sec. 4.1: poly decay; once an epoch, as released. On VOC the horizon is 200 epochs and the
        # training ends after 50 (released), so that the learning rate never comes near 0.
        epoch = step * images_per_step // len(split)
        lr = poly_learning_rate(
            settings.lr, epoch, settings.rectify_poly_epochs, settings.poly_power
        )
        set_learning_rate(optimizer, lr)

        # Which classes do these images hold? By CLIP's own guess; no annotation is opened anywhere.
        present = torch.stack([labels[name] for name in names]).to(run.device)         # (B, C) bool

        # Sec. 3.1: the patches as CLIP sees them. CLIP is frozen: no gradient passes here.
        if known:
            Z = torch.stack([known[name] for name in names])                          # (B, D, h, w)
        else:
            Z = model.features(images)                                                # (B, D, h, w)

        # Eq. (1)-(3): what CLIP says of each patch, less its leaning towards classes and places.
        M = model.rectify(Z).rectified                                                # (B, C, h, w)

        # Eq. (4): every patch picks one class. These masks are hard, but a gradient passes through.
        masks = gumbel_softmax_masks(M, model.tau_1)                                  # (B, C, h, w)

        # Eq. (5): what lies under the mask of a class must look like the text of that class.
        # Where it does not, the mask took patches of another class, and the bias that let it is
        # corrected.
        pooled = masked_features(Z, masks, model.pool)                                   # (B, C, D)
        loss = contrastive_loss(pooled, model.W_q, present, model.tau)                   # scalar

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        run.require_finite(step, loss, parameters, names)
        optimizer.step()

        run.log(step, loss, lr)
        if run.time_to_save(step):
            model.save(run.checkpoint)
            run.save_state(step)
    return model.eval()


# --- Stage 2: distillation ------------------------------------------------------------------------

def train_distillation(teacher, student, split, labels, settings, run):
    """Sec. 3.5: the rectified CLIP teaches DeepLab V2; writes <out>/distill.pt.

    Patches of 16 pixels cannot draw an outline, and CLIP was not made to segment. The student has a
    finer grid, is made for it, and sees the teacher's opinion of very many images, whose errors are
    not the same from image to image.

    teacher: a ReCLIP, frozen. student: a DeepLabV2. The others: as in train_rectification.
    """
    teacher.eval()  # in training its batch norms would learn from the student's images
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, settings.distill_lr, settings.momentum, weight_decay=settings.weight_decay
    )

    # Never smaller than the crop (up to 4:1): the student would learn the teacher's opinion of grey
    # padding (ours).
    augment = Augment(
        settings.long_side,
        settings.distill_crop,
        settings.distill_crop,
        ratio=(1.0, 2.0),
        flip=settings.flip,
        photometric=settings.photometric,
    )
    stream = TrainingStream(split, augment, run.seed)
    images_per_step = settings.distill_batch * run.processes
    steps = math.ceil(settings.distill_epochs * len(split) / images_per_step)

    # Eq. (6) makes probabilities of cosines with the temperature of Eq. (5); a classifier that
    # learns finds its own scale.
    mask_tau = settings.mask_tau
    if mask_tau is None:
        mask_tau = 1.0 if settings.head == "original" else teacher.tau

    student.train()
    student.to(memory_format=torch.channels_last)  # the same numbers, faster convolutions
    run.begin({"student": student}, optimizer, steps, images_per_step, len(split))
    for step, images, names in run.batches(stream, settings.distill_batch):
        epoch = step * images_per_step // len(split)
        lr = poly_learning_rate(
            settings.distill_lr, epoch, settings.distill_epochs, settings.poly_power
        )
        lr = max(lr, settings.distill_lr_floor)
        set_learning_rate(optimizer, lr)

        present = torch.stack([labels[name] for name in names]).to(run.device)         # (B, C) bool
        size = images.shape[2:]                                                          # (H, W)

        # What the teacher sees and says. Its masks are the pseudo-labels: every pixel gets a class.
        with torch.no_grad():
            guide = teacher(images)
            pseudo_labels = teacher.to_pixels(guide.rectified, *size).argmax(1)          # (B, H, W)

        # What the student says of the same images. (In bf16 on a GPU; its head stays in fp32.)
        with torch.autocast(run.device_type, torch.bfloat16, enabled=run.device_type == "cuda"):
            own = student(images)

            # Eq. (6): the student's masks should be the teacher's.
            mask_loss = mask_guided_loss(
                own.rectified, pseudo_labels, mask_tau, student.to_pixels
            )

            # Eq. (7): its features should be the teacher's, since its head is made of CLIP's texts.
            feature_loss = 0
            if settings.alpha:
                feature_loss = feature_guided_loss(
                    guide.features, own.features, size, teacher.to_pixels, student.to_pixels
                )

            # Eq. (4)-(5) again: what lies under the student's own masks should look like their
            # texts.
            text_loss = 0
            if settings.beta:
                text_loss = text_guided_loss(
                    own.rectified, own.features, teacher.W_q, present,
                    teacher.tau_1, teacher.tau, teacher.pool,
                )

            # Eq. (8)
            loss = distillation_loss(
                mask_loss, feature_loss, text_loss, settings.alpha, settings.beta
            )

        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        run.require_finite(step, loss, parameters, names)
        optimizer.step()

        run.log(step, loss, lr)
        if run.time_to_save(step):
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
    so that their weights stay equal.
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
    return ReCLIP(
        clip,
        facts.classes,
        prompts=facts.prompts or PROMPTS,
        prompt_length=settings.prompt_length,
        reference_norm=settings.reference_norm,
        query_learnable=settings.query_learnable,
        positional_channels=settings.positional_channels,
        positional_last_relu=settings.positional_last_relu,
        positional_gain=settings.positional_gain,
        subtract=settings.subtract,
        attention=settings.attention,
        tau_1=settings.tau_1,
        tau=settings.tau,
        pool=settings.pool,
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
        if head.endswith("positional"):
            grid = teacher.clip.visual.grid
            M_p = teacher.positional_logits(grid, grid)                 # (1, 1 or C, grid, grid)

    weights = None if settings.backbone_weights == "none" else settings.backbone_weights
    return DeepLabV2(
        teacher.class_names,
        W_q,
        W_r,
        M_p=M_p,
        student=settings.student,
        head=head,
        backbone_weights=weights,
    ).train()


# --- Pseudo-labels of the training images, Sec. 3.4 -----------------------------------------------

def origin_of(facts, settings, clip, split):
    """All that pseudo-labels depend on: kept beside them, and part of what identifies a run."""
    return {
        "data": facts.name,
        "classes": list(facts.classes),
        "prompts": list(facts.prompts or PROMPTS),
        "clip": clip.sha256,
        "threshold": settings.threshold,
        "top_k": settings.top_k,
        "pictures": len(split),
        "names": crc32(repr(split.names).encode()),
    }


def label_training_set(model, split, settings, origin, path, workers=0):
    """Sec. 3.4: the classes that CLIP finds in each training image: {name: (C,) bool}.

    They come from CLIP alone and never change, so they are made once and kept in `path` by
    image name (the released code pairs them by line number with an unsorted directory listing).
    A file that was made from something else (see origin_of), or is no such file, is made anew.
    """
    found = read_image_labels(path, origin, split.names)
    if found is None:
        found = {}
        progress = Progress("image-level labels", len(split))
        thumbnails = Thumbnails(split, model.clip.input_resolution)
        for images, names in DataLoader(thumbnails, 32, num_workers=workers):
            batch = model.image_labels(
                images.to(model.W_q.device), settings.threshold, settings.top_k
            )                                                           # (B, C) bool
            for name, row in zip(names, batch.cpu()):
                found[name] = row.nonzero()[:, 0].tolist()
            progress(len(found))

        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps({"identity": origin, "labels": found}))
        print_label_histogram(found, model.class_names)

    labels = {}
    for name, classes in found.items():
        labels[name] = torch.zeros(len(model.class_names), dtype=torch.bool)
        labels[name][classes] = True
    return labels


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
    """In how many images was each class found? A class never found wants another name."""
    print(f"images that each class was found in, of {len(found)}:")
    for c, name in enumerate(class_names):
        count = sum(c in classes for classes in found.values())
        bar = "#" * math.ceil(40 * count / len(found))
        print(f"  {name:<20}{count:6}  {bar or 'never: try a synonym, name | synonym'}")


# --- Bookkeeping ----------------------------------------------------------------------------------

class Run:
    """All that a loop needs and the paper does not speak of: resume, log, progress, save, stop.

        run = Run("rectify", Path("runs/voc"), identity)
        run.begin(modules, optimizer, steps, images_per_step, epoch)   # --resume continues here
        for step, images, names in run.batches(stream, batch_size):
            ...
            run.require_finite(step, loss, parameters, names)     # NaN ends the run before the step
            optimizer.step()
            run.log(step, loss, lr)
            if run.time_to_save(step):                                 # each epoch, the end, Ctrl-C
                model.save(run.checkpoint)
                run.save_state(step)

    Files: <out>/<stage>.pt (checkpoint), <stage>_state.pt (all that a later --resume needs),
    <stage>_log.csv (step, loss, lr). Each is written beside the old one and renamed.

    identity: {name: value} of what must not differ between a run and its resumption.
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
        self.asked_to_stop = False

    def begin(self, modules, optimizer, steps, images_per_step, images_per_epoch):
        """modules: {name: module} whose states are saved and resumed; steps: how many in all."""
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
        """Yields (step, images (B, 3, H, W) on the device, their names) until the last step.

        Step s of process r takes the images (s * processes + r) * batch_size and following of the
        endless stream: processes never share an image, and no batch is smaller than another.
        """
        loader = DataLoader(
            stream,
            batch_sampler=self.places(batch_size),
            num_workers=self.workers,
            pin_memory=self.device_type == "cuda",
        )
        with self.stop_signals():
            for step, (images, names) in enumerate(loader, self.first):
                # Not the seeds of the stream; another one in each process.
                torch.manual_seed((self.seed + 1) * 7_368_787 + step + self.rank * 1_000_000_007)
                yield step, images.to(self.device, non_blocking=True), names

                if self.asked_to_stop and step + 1 < self.steps:
                    raise KeyboardInterrupt
        self.report()

    def places(self, batch_size):
        """Where in the stream the images of each step stand."""
        for step in range(self.first, self.steps):
            start = (step * self.processes + self.rank) * batch_size
            yield range(start, start + batch_size)

    @contextmanager
    def stop_signals(self):
        """Within, Ctrl-C and SIGTERM let the step in progress end and be saved."""
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

    def time_to_save(self, step):
        """True once an epoch, behind the last step, and when the run was asked to stop.

        Only process 0 writes. A stop that reached one process stops all of them behind the same
        step.
        """
        if self.processes > 1:
            stop = torch.tensor(int(self.asked_to_stop), device=self.device)
            dist.all_reduce(stop)
            self.asked_to_stop = bool(stop)
        last = step + 1 == self.steps
        due = (step + 1) % self.save_every == 0 or last or self.asked_to_stop
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
            known = state["identity"]
            written_by = state["versions"]["torch"]
            changed = []
            for key, value in self.identity.items():
                if known.get(key) != value:
                    changed.append(f"{key} was {known.get(key)!r}, now {value!r}")
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


# --- Command line ---------------------------------------------------------------------------------

def parse_arguments(argv=None):
    """The command line as (args, facts of the data set, settings). ValueError: it does not fit."""
    best_device = "cpu"
    if torch.backends.mps.is_available():
        best_device = "mps"
    if torch.cuda.is_available():
        best_device = "cuda"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=["all", "rectify", "distill", "paper", "pretrain"], default="all",
        metavar="{all,rectify,distill}", help="all: both stages and a table (default)")
    add("--data", default="shapes",
        help=f"{', '.join(DATA)}, or a folder of your own images (default: shapes)")
    add("--classes",
        help="for your own images: 'cat, dog | puppy, grass', or a file with one class a line")
    add("--root", default="data",
        help="folder that holds VOCdevkit/ or ADEChallengeData2016/ (default: data)")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help="'ViT-B/16' or a weights file (default: the data set's)")
    add("--teacher", type=Path,
        help="rectification that --stage distill learns from (default: <out>/rectify.pt)")
    add("--out", type=Path, help="where checkpoints go (default: runs/<data>)")
    add("--resume", action="store_true", help="go on where the same command was stopped")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--epochs", type=int,
        help="short for --rectify-epochs, with --stage distill for --distill-epochs")
    add("--device", default=best_device, help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int,
        help="processes that decode images (default: 4 beside a GPU, else 0)")
    add("--cache", action=argparse.BooleanOptionalAction,
        help="keep decoded images in memory (default: below 2 GiB)")
    add("--split", help="split of the table of --stage all (default: test of shapes, else val)")
    add("--short-side", "--short_side", type=int,
        help="evaluation of --stage all: pixels; 0: own size (default: the data set's)")
    add("--denoise", type=float, help="evaluation of --stage all: drop classes whose best "
        "probability is below; 0: off (default: as released)")

    group = parser.add_argument_group("hyper-parameters", "defaults in brackets, by data set")
    for field in dataclasses.fields(Settings):
        spellings = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*spellings, default=None, help=describe(field), **kind)
    args = parser.parse_args(argv)

    if args.stage in ("paper", "pretrain"):
        raise ValueError(f"--stage {args.stage} is a program of its own now: "
                         f"python tests/{args.stage}.py")
    facts = find_facts(args)
    settings = find_settings(args, facts)
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill alone")
    if args.stage == "all" and not facts.splits:
        raise ValueError(f"--stage all evaluates, and {args.data} has no labels: use "
                         "--stage rectify or distill")
    args.split = args.split or (facts.splits[-1] if facts.splits else None)
    if args.split not in (None, *facts.splits):
        raise ValueError(f"--split {args.split}: {args.data} has {', '.join(facts.splits)}")
    args.short_side = facts.short_side if args.short_side is None else args.short_side
    args.denoise = facts.denoise if args.denoise is None else args.denoise
    if not 0 <= args.denoise <= 1 or args.short_side < 0:
        raise ValueError(f"--denoise {args.denoise} --short-side {args.short_side}: a probability "
                         "between 0 and 1, and a number of pixels")

    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    args.out = args.out or Path("runs") / Path(args.data).resolve().name
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} is not available here ({reason})") from None
    return args, facts, settings


def describe(field):
    """Help of a setting: what it is, where it is from, and its default by data set."""
    values = {name: getattr(settings, field.name) for name, settings in SETTINGS.items()}
    if len(set(values.values())) == 1:
        values = {"all": values["voc"]}
    shown = []
    for name, value in values.items():
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return f"{field.metadata['help']} [{', '.join(shown)}]"


def find_facts(args):
    """Facts of the data set that --data names, or of your own folder of images."""
    if args.data in DATA:
        if args.classes:
            raise ValueError(f"--classes goes with your own images; {args.data} has its own "
                             "classes")
        return DATA[args.data]
    if not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data} is neither a folder of images nor one of "
                         f"{', '.join(DATA)}")
    if not args.classes:
        raise ValueError(f"--data {args.data} needs --classes 'cat, dog, grass', or a file with "
                         "one class a line")
    return own_facts(args.data, read_classes(args.classes))


def find_settings(args, facts):
    """The data set's settings, with those that the command line gives."""
    changes = {}
    for field in dataclasses.fields(Settings):
        value = getattr(args, field.name)
        if value is not None:
            changes[field.name] = value
    if args.epochs is not None:
        changes["distill_epochs" if args.stage == "distill" else "rectify_epochs"] = args.epochs

    settings = dataclasses.replace(SETTINGS.get(args.data, SETTINGS["own"]), **changes)
    if args.data != "shapes" and not (settings.crop and settings.distill_crop):
        raise ValueError("--crop 0 and --distill-crop 0 need images of one size; those of "
                         f"{args.data} differ")
    return settings


def open_training_images(args, limit=2):
    """The training split; below `limit` GiB (ours), or with --cache, images are decoded once."""
    with rank_0_first():
        split = open_split(args.data, args.root, "train", args.download)

    sample = range(0, len(split), max(1, len(split) // 20))
    mean_bytes = sum(split.image(i).numel() for i in sample) / len(sample)
    copies = max(1, args.workers)  # each worker keeps its own
    size = mean_bytes * len(split) * copies / 2 ** 30
    split.keep = size < limit if args.cache is None else args.cache
    print(f"{len(split)} training images, decoded about {size:.2f} GiB: "
          f"{'' if split.keep else 'not '}kept in memory")
    return split


def rectify_stage(args, facts, settings, split, out):
    """--stage rectify: a new model, its pseudo-labels, the loop. -> ReCLIP in eval mode"""
    clip = load_clip(args.clip or facts.clip, args.device)
    model = new_reclip(clip, facts, settings, args.seed)
    origin = origin_of(facts, settings, clip, split)
    with rank_0_first():
        labels = label_training_set(
            model, split, settings, origin, args.out / "image_labels.json", args.workers
        )

    identity = origin | dataclasses.asdict(settings)
    resume = args.resume and (args.stage == "rectify" or (out / "rectify_state.pt").is_file())
    run = Run("rectify", out, identity, args.seed, resume, args.device, args.workers)
    return train_rectification(model, split, labels, settings, run)


def distill_stage(args, facts, settings, split):
    """--stage distill: the teacher, a new student, the loop. -> DeepLabV2 in eval mode"""
    path = args.teacher or args.out / "rectify.pt"
    clip = None  # from where the teacher found it
    if args.clip:
        clip = load_clip(args.clip, args.device)
    teacher = ReCLIP.load(path, clip, args.device)
    if teacher.class_names != facts.classes:
        raise ValueError(f"{path} was learnt for other classes than {args.data}'s: "
                         f"{', '.join(teacher.class_names)}")

    student = new_student(teacher, settings, args.seed)
    origin = origin_of(facts, settings, teacher.clip, split)
    with rank_0_first():
        labels = label_training_set(
            teacher, split, settings, origin, args.out / "image_labels.json", args.workers
        )

    identity = origin | dataclasses.asdict(settings) | {"teacher": teacher.fingerprint()}
    resume = args.resume and (args.stage == "distill" or (args.out / "distill_state.pt").is_file())
    run = Run("distill", args.out, identity, args.seed, resume, args.device, args.workers)
    return train_distillation(teacher, student, split, labels, settings, run)


def all_stages(args, facts, settings, split):
    """--stage all: both stages, and a table in the form of the paper's Tables 2 and 4."""
    without_positional = dataclasses.replace(settings, positional_channels=0)
    out = args.out / "reference_only"
    reference_only = rectify_stage(args, facts, without_positional, split, out)
    rectified = rectify_stage(args, facts, settings, split, args.out)
    student = distill_stage(args, facts, settings, split)

    protocol = Protocol(short_side=args.short_side, denoise=args.denoise)
    labelled = Evaluation(
        open_split(args.data, args.root, args.split, args.download), args.short_side
    )
    columns = [(rectified, "clip"), (rectified, "rectify")]  # beside the student in the picture
    rows = [
        ("MaskCLIP (Query only)", rectified, "clip", args.out, []),
        ("+ Reference", reference_only, "rectify", out, []),
        ("+ Reference + positional", rectified, "rectify", args.out, columns[:1]),
        ("distilled", student, "distill", args.out, columns),
    ]
    lines = []
    for title, model, stage, folder, others in rows:
        result = evaluate_stage(
            model, stage, facts, args.split, labelled, protocol, folder, others, args.workers
        )
        lines.append(f"  {title:<28}{100 * result['miou']:5.1f}")

    print(f"\n{args.data} {args.split}, mIoU")
    print("\n".join(lines))
    print(f"masks: {args.out / 'eval_distill.png'}")


def join_processes(args):
    """Under torchrun: this process's part in the run, one GPU each (NCCL), or the CPU (gloo)."""
    if args.stage == "all":
        raise ValueError("--stage all is a matter of one process: torchrun goes with rectify and "
                         "distill")
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "nccl"
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)

    # An hour, since the others wait while process 0 labels all of ADE20K.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: so many times the images per step, and fewer "
              "steps; the learning rate stays")


def main(argv=None):
    args, facts, settings = parse_arguments(argv)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if args.data == "shapes" and args.device == "cpu":
        # Tensors this small gain little from more threads, and stall on shared cores.
        torch.set_num_threads(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        join_processes(args)

    split = open_training_images(args)
    if args.stage == "rectify":
        rectify_stage(args, facts, settings, split, args.out)
    elif args.stage == "distill":
        distill_stage(args, facts, settings, split)
    else:
        all_stages(args, facts, settings, split)

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
        sys.exit(f"train.py: process {dist.get_rank() + 1} failed or lost another one "
                 f"({str(error).splitlines()[0]}); start all again with --resume")
