"""Training: one plain loop under every stage.

    python train.py                                          the whole paper on shapes, on a laptop CPU
    python train.py --stage rectify --data voc --root DIR    Sec. 3.1-3.4 on PASCAL VOC
    python train.py --stage distill --data voc --root DIR    Sec. 3.5, from what the former wrote
    python train.py --stage rectify --data FOLDER --classes "cat, dog, grass"    your own pictures, no labels needed
    python train.py --stage paper                            every table and figure of Sec. 4, on shapes

What stands here
    Settings, SETTINGS     every hyper-parameter of the paper with its source, one instance a data set
    fit                    the loop: step, log, save, resume
    label_training_set     pseudo-labels of all training pictures (Sec. 3.4), computed once, cached by name
    rectify, distill       stages 1 and 2 of the paper
    run_all, run_paper     both stages, ending in small Tables 2 and 4; every table and figure of Sec. 4

Nothing that learns reads a label: TrainingStream and Thumbnails yield pictures and names only. The stages `all` and
`paper` read labels to evaluate, through eval.py (and there for Table 1's linear classification, by definition).
"""

import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from itertools import islice
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from clip_model import load_clip, written_atomically
from datasets import Augment, Thumbnails, TrainingStream, open_split
from deeplab import DeepLabV2
from eval import Progress, add_common, evaluate_stage, measured, report_paper, settle
from reclip import PROMPTS, ReCLIP, distillation_loss, label_histogram


# --- Hyper-parameters ---------------------------------------------------------------------------------------

def option(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Defaults are VOC's. "Sec." = the paper, "released" = its authors' code, "ours" = chosen here."""
    # Rectification, Sec. 3.1-3.4
    rectify_epochs: int = option(50, "epochs of rectification (released)")
    rectify_poly_epochs: int = option(200, "epochs over which the learning rate would reach 0 (released)")
    rectify_batch: int = option(1, "pictures a step (released)")
    lr: float = option(0.01, "learning rate of SGD (Sec. 4.1)")
    momentum: float = option(0.9, "momentum of SGD (released)")
    weight_decay: float = option(0.0005, "weight decay of SGD (Sec. 4.1)")
    poly_power: float = option(0.9, "lr * (1 - epoch / poly_epochs) ** poly_power (Sec. 4.1)")
    threshold: float = option(23.0, "image-level label: 100 cos above this (t of Sec. 3.4; value released)")
    top_k: int = option(2, "image-level labels where none passes the threshold (released)")
    prompt_length: int = option(73, "L of Eq. 1, shortened so that the longest class name fits (Sec. 3.2)")
    reference_norm: str = option("frobenius", "length of W_r: frobenius (released) or class")
    positional_channels: int = option(None, "channels of M_p: one a class if not given (released), 1 (Eq. 2), 0: none")
    positional_last_relu: bool = option(True, "ReLU behind the last batch norm of the positional net (released)")
    positional_gain: float = option(1.0, "fixed factor on M_p, for a small start (ours)")
    tau_1: float = option(0.001, "temperature of the Gumbel-softmax, Eq. 4 (released)")
    tau: float = option(None, "temperature of Eq. 5; if not given, 1 / CLIP's logit scale (released)")
    pool: str = option("global", "pooling of masked features: global (Sec. 3.4) or mask")
    attention: str = option("maskclip", "reading of CLIP's last block: maskclip (Sec. 3.1), sclip, clearclip, naclip")
    query_learnable: bool = option(False, "the Query's prompt learns too (Table 3)")
    subtract: bool = option(True, "subtract the bias; else add it (Table 5)")
    constant_bias: bool = option(False, "control: one learnt number a class in the place of the positional net (ours)")
    # Distillation, Sec. 3.5
    student: str = option("resnet101", "backbone of DeepLab V2: resnet101 (ours), resnet50 (released), tiny (shapes)")
    head: str = option("query_reference", "Table 6: original, query, query_reference, query_reference_positional")
    backbone_weights: str = option("imagenet", "start of the backbone: imagenet, a file, or none")
    distill_epochs: int = option(100, "epochs of distillation (released)")
    distill_batch: int = option(16, "pictures a step (released)")
    distill_lr: float = option(0.01, "learning rate of SGD (Sec. 4.1), poly over all epochs")
    distill_lr_floor: float = option(1e-4, "the learning rate never falls below (released)")
    distill_crop: int = option(512, "crop, and short side before it, pixels (released); 0: as for crop")
    mask_tau: float = option(None, "temperature of Eq. 6; if not given, that of Eq. 5; 1 for --head original (ours)")
    alpha: float = option(0.5, "weight of the feature-guided loss, Eq. 8; 0: none (Sec. 3.5)")
    beta: float = option(0.5, "weight of the text-guided loss, Eq. 8; 0: none (Sec. 3.5)")
    # Pictures, Sec. 4.1
    long_side: int = option(2048, "limit of the longer side when resizing for training, pixels (released)")
    crop: int = option(336, "side of the training crop, pixels (released); 0: whole pictures, all of one size (ours)")
    flip: bool = option(True, "random horizontal flip (Sec. 4.1)")
    photometric: bool = option(True, "random brightness, contrast, saturation, hue (released)")

    def __post_init__(self):
        positive = ("rectify_epochs", "rectify_poly_epochs", "rectify_batch", "top_k", "lr", "tau_1", "tau", "mask_tau",
                    "distill_epochs", "distill_batch", "distill_lr")
        for name in (*positive, "crop", "distill_crop", "distill_lr_floor", "alpha", "beta"):
            value, least = getattr(self, name), "above 0" if name in positive else "0 or more"
            if value is not None and not (value > 0 or value == 0 and name not in positive):
                raise ValueError(f"--{name} is {value}; it must be {least}")


SETTINGS = {
    "voc": Settings(),
    "context": Settings(rectify_poly_epochs=400, threshold=20.0, top_k=6, crop=480, distill_crop=480,
                        distill_epochs=150),
    "ade20k": Settings(rectify_epochs=100, rectify_poly_epochs=600, threshold=21.0, top_k=5, crop=512,
                       distill_epochs=150),
    "own": Settings(),  # pictures of your own: VOC's, whose threshold and K suit names of single, different things
    # All ours, chosen on shapes' val split. The tiny CLIP's cosines differ by .2, not .02: hence its temperatures.
    "shapes": Settings(rectify_epochs=20, rectify_poly_epochs=20, rectify_batch=32, lr=0.2, threshold=50.0, top_k=1,
                       positional_gain=0.05, tau_1=0.033, tau=0.033, crop=0, flip=False, photometric=False,
                       student="tiny", backbone_weights="none", distill_epochs=10, distill_lr=0.1, distill_crop=0),
}


# --- The loop -----------------------------------------------------------------------------------------------

def poly(lr, power, horizon):
    """Sec. 4.1's schedule, stepped once an epoch as released: epoch -> learning rate"""
    return lambda epoch: lr * (1 - min(epoch / horizon, 1)) ** power


@contextmanager
def stop_signals():
    """Within, Ctrl-C and SIGTERM only fill the list that is yielded, so that the step can end and be saved."""
    asked = []
    before = {n: signal.signal(n, lambda *_: asked.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Objective(nn.Module):
    """Modules that learn, and their loss as forward: what DistributedDataParallel wants, to average the gradients."""

    def __init__(self, modules, loss_of):
        super().__init__()
        self.parts, self.loss_of = nn.ModuleDict(modules), loss_of

    def forward(self, *batch):
        return self.loss_of(batch)


def fit(stage, args, out, *, modules, optimiser, loss_of, batches, lr_of, steps, identity, save, save_every,
        batch_size, max_norm=math.inf):
    """Runs steps first..steps-1, where first is 0 or, with --resume, what <out>/<stage>_state.pt says; of the parts of
    --stage all and paper, those that were not reached begin anew.

    modules: {name: module} that learn (or, like an average, follow); their states are what is resumed.
    batches: first step -> iterator of (batch, names); loss_of: batch -> scalar; lr_of: step -> learning rate.
    identity: what must not change between a run and its resumption, {name: value}.
    save: called after each saved state, to write what the stage is for.
    All randomness of a step follows from (seed, step, rank), so that a resumed run equals an uninterrupted one: no
    generator has a state that would have to be kept.
    """
    rank, world = rank_and_world()
    identity = identity | {"seed": args.seed, "processes": world}
    state_path, log_path = out / f"{stage}_state.pt", out / f"{stage}_log.csv"
    out.mkdir(parents=True, exist_ok=True)
    resume = args.resume and (args.stage not in ("all", "paper") or state_path.is_file())
    first = read_training_state(state_path, modules, optimiser, identity) if resume else 0
    if first and rank == 0:
        save()  # a kill may have fallen between the state and what follows from it
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    objective = Objective(modules, loss_of)
    objective = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    rows = list(csv.reader(log_path.open()))[:first + 1] if first and log_path.exists() else [["step", "loss", "lr"]]
    progress, saved, iterator = Progress(stage, steps, first, batch_size * world), first, iter(batches(first))
    with stop_signals() as asked:
        for step in range(first, steps):
            batch, names = next(iterator)
            torch.manual_seed((args.seed + 1) * 7_368_787 + step + rank * 1_000_000_007)  # not the stream's seeds
            for group in optimiser.param_groups:
                group["lr"] = lr_of(step)
            loss = objective(*batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)  # infinity: measured only
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                kept = f"{state_path} holds step {saved}" if saved else "nothing had been saved yet"
                raise ValueError(f"the loss is {value}, its gradient's norm {norm:.3g}, at step {step} on "
                                 f"{', '.join(names)}; the step was not taken, {kept}: try a smaller learning rate")
            optimiser.step()
            rows.append([step, f"{value:.6g}", f"{lr_of(step):.6g}"])
            if rank == 0:
                progress(step + 1, f"loss {value:.4f}  lr {lr_of(step):.2e}  ")
            stop = torch.tensor(len(asked), device=parameters[0].device)
            if world > 1:
                dist.all_reduce(stop)  # all end after the same step
            if (step + 1) % save_every == 0 or step + 1 == steps or stop:
                if rank == 0:
                    with written_atomically(log_path) as temporary, open(temporary, "w", newline="") as file:
                        csv.writer(file).writerows(rows)
                    write_training_state(state_path, step + 1, modules, optimiser, identity)
                    save()
                saved = step + 1
            if stop and saved < steps:
                raise KeyboardInterrupt
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = torch.cuda.max_memory_allocated(parameters[0].device) if parameters[0].is_cuda else used
    print(f"{stage}: {steps - first} of {steps} steps in {time.perf_counter() - progress.began:.0f} s, peak memory of "
          f"the process so far {used / 2 ** 30:.2f} GiB, written to {out}")


def rank_and_world():
    """Number of this process and of all: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def rank_0_first():
    """What stands within is done by rank 0 first, so that the others find the files that it wrote."""
    rank, world = rank_and_world()
    if rank:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def write_training_state(path, step, modules, optimiser, identity):
    """The old state stays until the new one is whole on the disk."""
    with written_atomically(path) as temporary:
        torch.save({"step": step, "identity": identity, "versions": {"torch": str(torch.__version__)},
                    "modules": {name: module.state_dict() for name, module in modules.items()},
                    "optimiser": optimiser.state_dict()}, temporary)


def read_training_state(path, modules, optimiser, identity):
    """Loads a state that fit wrote, refuses one of another run, and returns the step to go on with."""
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; leave --resume out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known, step, written_by = state["identity"], int(state["step"]), state["versions"]["torch"]
        changed = [f"{key} was {known.get(key)!r}, now {value!r}" for key, value in identity.items()
                   if known.get(key) != value]
        contents = [*(state["modules"][name] for name in modules), state["optimiser"]]
        for part, content in () if changed else zip([*modules.values(), optimiser], contents):
            part.load_state_dict(content)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a training state, or is truncated: {reason}") from error
    if changed:
        raise ValueError(f"cannot resume {path}: {'; '.join(changed)}")
    if written_by != torch.__version__:
        print(f"{path} was written by torch {written_by}: last digits may differ from here on")
    return step


# --- Stage 1: rectification ---------------------------------------------------------------------------------

def label_training_set(model, split, args, s, identity, path):
    """Sec. 3.4's image-level pseudo-labels of the whole training set: {name: list of class indices}.

    They come from CLIP alone and never change, so they are computed once and kept in `path`, by picture name
    (the released code pairs them by line number with an unsorted directory listing).
    """
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or not ours: computed (again)
        content = json.loads(path.read_text())
        if content["identity"] == identity and set(content["labels"]) == set(split.names):
            return content["labels"]
    loader = DataLoader(Thumbnails(split, model.clip.input_resolution), 32, num_workers=args.workers)
    labels = model.label_pictures(loader, s.threshold, s.top_k, Progress("image-level labels", len(split)))
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "labels": labels}))
    print(label_histogram(labels, model.class_names))
    return labels


def origin_of(args, s, clip, split):
    """What pseudo-labels depend on; kept beside them, and in the identity of a run."""
    return {"data": args.data, "classes": list(args.facts.classes), "prompts": list(args.facts.prompts or PROMPTS),
            "clip": clip.sha256, "threshold": s.threshold, "top_k": s.top_k, "pictures": len(split),
            "names": crc32(repr(split.names).encode())}


def training_pictures(args, limit=2):
    """The training split; with --cache, or below `limit` GiB (ours) without it, its decoded pictures stay in memory."""
    with rank_0_first():
        split = open_split(args.data, args.root, "train", args.download)
    some = [split.picture(i).numel() for i in range(0, len(split), max(1, len(split) // 20))]
    size = sum(some) / len(some) * len(split) * max(1, args.workers) / 2 ** 30  # each worker has its own copy
    split.keep = size < limit if args.cache is None else args.cache
    print(f"{len(split)} training pictures, decoded about {size:.2f} GiB: {'' if split.keep else 'not '}kept in memory")
    return split


def labelled_batches(args, stream, labels, classes, size, first, steps):
    """Batches first .. steps - 1 of the stream: ((pictures (B, 3, H, W), image-level labels (B, C) bool), names). Of
    several processes each has its own pictures; the stream never ends, so no batch is smaller than others."""
    (rank, world), cuda = rank_and_world(), args.device.startswith("cuda")
    places = (range((step * world + rank) * size, (step * world + rank + 1) * size) for step in range(first, steps))
    for pictures, names in DataLoader(stream, batch_sampler=places, num_workers=args.workers, pin_memory=cuda):
        present = torch.zeros(len(names), classes, dtype=torch.bool)  # (B, C)
        for row, name in zip(present, names):
            row[labels[name]] = True
        yield (pictures.to(args.device, non_blocking=True), present.to(args.device)), names


def rectify(args, out, shuffle=False, **changes):
    """Sec. 3.1-3.4: learns Reference prompt and positional net; writes <out>/rectify.pt. -> ReCLIP, eval mode.
    For ablations and controls: changes replace settings, shuffle deals the image-level labels to other pictures."""
    s, facts, split = dataclasses.replace(args.settings, **changes), args.facts, training_pictures(args)
    torch.manual_seed(args.seed)
    options = {name: value for name, value in dataclasses.asdict(s).items() if name in signature(ReCLIP).parameters}
    clip, prompts = load_clip(args.clip, args.device), facts.prompts or PROMPTS
    model = ReCLIP(clip, facts.classes, prompts=prompts, **options).train()
    with rank_0_first():
        origin = origin_of(args, s, model.clip, split)
        labels = label_training_set(model, split, args, s, origin, args.out / "image_labels.json")
    if shuffle:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed)).tolist()
        labels = {name: labels[split.names[i]] for name, i in zip(split.names, order)}
    stream = TrainingStream(split, Augment(s.long_side, facts.short_side, s.crop, flip=s.flip,
                                           photometric=s.photometric), args.seed)
    a_step = s.rectify_batch * rank_and_world()[1]  # pictures
    steps = math.ceil(s.rectify_epochs * len(split) / a_step)
    # CLIP is frozen: where pictures never change, neither do their features
    known, fixed = {}, not (s.crop or s.flip or s.photometric)
    for pictures, names in DataLoader(stream, 32, sampler=range(len(split))) if fixed else ():
        known |= zip(names, model.features(pictures.to(args.device)))

    def batches(first):
        """For the same reason a GPU, which a single picture leaves idle, encodes 16 pictures ahead."""
        given = labelled_batches(args, stream, labels, len(facts.classes), s.rectify_batch, first, steps)
        while ahead := list(islice(given, 16 if args.device.startswith("cuda") else 1)):
            x = torch.cat([torch.stack([known[n] for n in names]) if fixed else x for (x, _), names in ahead])
            Z = x if fixed else model.features(x)                                      # (16 B, D, h, w)
            for z, ((_, present), names) in zip(Z.split(s.rectify_batch), ahead):
                yield (z, present), names
    lr = poly(s.lr, s.poly_power, s.rectify_poly_epochs)
    learnable = {name: m for name in ("query", "reference", "positional") if (m := getattr(model, name))}
    if not learnable:
        raise ValueError("nothing to learn: --prompt_length and --positional_channels are both 0")
    optimiser = torch.optim.SGD([p for m in learnable.values() for p in m.parameters()], s.lr, s.momentum,
                                weight_decay=s.weight_decay)
    fit("rectify", args, out, modules=learnable, optimiser=optimiser, loss_of=lambda batch: model.loss(*batch),
        batches=batches, lr_of=lambda step: lr(step * a_step // len(split)), steps=steps, batch_size=s.rectify_batch,
        identity=origin | dataclasses.asdict(s),
        save=lambda: model.save(out / "rectify.pt"), save_every=math.ceil(len(split) / a_step))
    return model.eval()


# --- Stage 2: distillation -----------------------------------------------------------------------------------

def distill(args, out, **changes):
    """Sec. 3.5: the rectified CLIP of <out>/rectify.pt, frozen, teaches DeepLab V2; writes <out>/distill.pt.
    -> DeepLabV2, eval mode. changes: settings to replace, for ablations."""
    s, facts, split = dataclasses.replace(args.settings, **changes), args.facts, training_pictures(args)
    clip = load_clip(args.given_clip, args.device) if args.given_clip else None  # None: where rectify found it
    teacher = ReCLIP.load(args.teacher or out / "rectify.pt", clip, args.device)
    if teacher.class_names != facts.classes:
        raise ValueError(f"{args.teacher or out / 'rectify.pt'} was learnt for other classes than {args.data}'s: "
                         f"{', '.join(teacher.class_names)}")
    if ("reference" in s.head and not (teacher.subtract and teacher.reference)
            or "positional" in s.head and not teacher.positional):
        raise ValueError(f"--head {s.head} subtracts the parts it is named for: rectify again with them and --subtract")
    torch.manual_seed(args.seed)
    device, grid = torch.device(args.device).type, teacher.clip.visual.grid
    with torch.no_grad():
        W_q, W_r = teacher.heads()                                                                   # (C, D) each
        M_p = None
        if s.head.endswith("positional"):
            M_p = teacher.positional(teacher.clip.visual.positional_grid(grid, grid))               # (1, C, grid, grid)
    student = DeepLabV2(teacher.class_names, W_q, W_r, M_p=M_p, student=s.student, head=s.head,
                        backbone_weights=None if s.backbone_weights == "none" else s.backbone_weights).train()
    student.to(memory_format=torch.channels_last)  # the same numbers, faster convolutions
    with rank_0_first():
        origin = origin_of(args, s, teacher.clip, split)
        labels = label_training_set(teacher, split, args, s, origin, args.out / "image_labels.json")
    # Not smaller than the crop (up to 4:1): the student would learn the teacher's opinion of grey padding (ours)
    stream = TrainingStream(split, Augment(s.long_side, s.distill_crop, s.distill_crop, ratio=(1.0, 2.0), flip=s.flip,
                                           photometric=s.photometric), args.seed)
    a_step = s.distill_batch * rank_and_world()[1]  # pictures
    mask_tau = s.mask_tau or (1.0 if s.head == "original" else None)  # a classifier that learns finds its own scale
    steps = math.ceil(s.distill_epochs * len(split) / a_step)
    lr = poly(s.distill_lr, s.poly_power, s.distill_epochs)
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], s.distill_lr, s.momentum,
                                weight_decay=s.weight_decay)

    def loss_of(batch):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return distillation_loss(teacher, student, *batch, mask_tau=mask_tau, alpha=s.alpha, beta=s.beta)
    fit("distill", args, out, modules={"student": student}, optimiser=optimiser, loss_of=loss_of,
        batches=lambda first: labelled_batches(args, stream, labels, len(facts.classes), s.distill_batch, first, steps),
        lr_of=lambda step: max(lr(step * a_step // len(split)), s.distill_lr_floor), steps=steps,
        identity=origin | dataclasses.asdict(s) | {"teacher": teacher.fingerprint()}, batch_size=s.distill_batch,
        save=lambda: student.save(out / "distill.pt"), save_every=math.ceil(len(split) / a_step))
    return student.eval()


# --- Several runs and their tables ---------------------------------------------------------------------------

def pretrain(args, out):
    """How shapes_clip.pt was made; not in the paper, which starts from OpenAI's weights: hence beside the tests."""
    sys.path.append(str(Path(__file__).with_name("tests")))
    from pretrain import pretrain_clip
    pretrain_clip(args, out, fit)


def run_all(args, out):
    """Both stages and a table in the form of the paper's Tables 2 and 4."""
    plain, model = rectify(args, out / "reference_only", positional_channels=0), rectify(args, out)
    student = distill(args, out)
    rows = [("MaskCLIP (Query only)", model, "clip", out, []),
            ("+ Reference", plain, "rectify", out / "reference_only", []),
            ("+ Reference + positional", model, "rectify", out, [(model, "clip")]),
            ("distilled", student, "distill", out, [(model, "clip"), (model, "rectify")])]
    lines = [f"  {name:<28}{100 * evaluate_stage(args, *rest)['miou']:5.1f}" for name, *rest in rows]
    print("\n".join([f"\n{args.data} {args.split}, mIoU", *lines, f"masks: {out / 'eval_distill.png'}"]))


# --stage paper: what stands behind each row, stage, settings that differ, the paper's mIoU on VOC, Context, ADE20K
ROWS = {
    "clip": ("MaskCLIP (Query only)", "clip", {}, (49.5, 21.7, 9.5)),
    "reference": ("+ Reference", "rectify", {"positional_channels": 0}, (56.7, 24.4, 10.5)),
    "positional": ("+ positional net, no Reference", "rectify", {"prompt_length": 0}, None),
    "both": ("+ Reference + positional net: the rectified CLIP", "rectify", {}, (58.5, 25.8, 11.1)),
    "one_channel": ("the same, 1 channel (Eq. 2 as printed: cancels)", "rectify", {"positional_channels": 1}, None),
    "query_learnable": ("+ Reference, the Query learnable too", "rectify",
                        {"positional_channels": 0, "query_learnable": True}, (56.7, 23.7, 9.4)),
    "added": ("bias added, not subtracted", "rectify", {"subtract": False}, (57.8, 24.9, None)),
    "one_number": ("control: one learnt number a class", "rectify", {"prompt_length": 0, "constant_bias": True}, None),
    "other_labels": ("control: image-level labels of other pictures", "rectify", {"shuffle": True}, None),
    "mean_logit": ("control: minus the mean logit of each class", "mean", {"constant_bias": True}, None),
    "distilled": ("distilled: Query + Reference head, all losses", "distill", {}, (75.4, 33.8, 14.3)),
    "linear": ("linear classification on the student's features, WITH LABELS", "linear", {}, (76.1, None, None)),
    "head_original": ("original head", "distill", {"head": "original"}, (73.8, None, None)),
    "head_query": ("Query head", "distill", {"head": "query"}, (74.1, None, None)),
    "head_positional": ("with positional", "distill", {"head": "query_reference_positional"}, (75.0, None, None)),
    "loss_mask": ("mask loss", "distill", {"alpha": 0.0, "beta": 0.0}, (73.0, None, None)),
    "loss_feature": ("mask + feature loss", "distill", {"beta": 0.0}, (74.1, None, None)),
    **{f"{name}{end}": (f"{name}{end.replace('_', ', ')}", stage, {"attention": name}, None)
       for name in ("sclip", "clearclip", "naclip") for end, stage in (("", "clip"), ("_rectified", "rectify"))},
}
TABLES = {
    "table1": ("Table 1: linear classification", ("both", "distilled", "linear")),
    "table2": ("Table 2: both stages", ("clip", "both", "distilled")),
    "table3": ("Table 3: should the Query be learnable?", ("query_learnable", "reference")),
    "table4": ("Table 4: the two biases", ("clip", "reference", "positional", "both", "one_channel")),
    "table5": ("Table 5: subtract or add", ("clip", "added", "both")),
    "table6": ("Table 6: head of the student", ("head_original", "head_query", "distilled", "head_positional")),
    "table7": ("Table 7: losses of the student", ("loss_mask", "loss_feature", "distilled")),
    "controls": ("Controls (ours): what is the method's own?", ("both", "one_number", "mean_logit", "other_labels")),
    "readings": ("Four readings of CLIP's last block, plain and rectified (ours)", (
        "clip", "sclip", "clearclip", "naclip", "both", "sclip_rectified", "clearclip_rectified", "naclip_rectified")),
}


def train_row(job):
    """(args, plan, row, seed), in a process of its own: the row is trained if it is not there, and measured."""
    args, plan, name, seed = job
    if args.device == "cpu":
        torch.set_num_threads(1)
    row, folder = plan["rows"][name], args.out / "paper" / f"seed{seed}" / name
    run = argparse.Namespace(**vars(args) | {"seed": seed, "teacher": folder.parent / "both" / "rectify.pt"})
    wanted = [row["stage"], row["changes"], dataclasses.asdict(args.settings), plan["clip_sha256"]]
    done, learns = folder / "done.json", row["stage"] in ("rectify", "distill")
    if learns and not (done.is_file() and json.loads(done.read_text())["row"] == wanted):
        began = time.perf_counter()
        (rectify if row["stage"] == "rectify" else distill)(run, folder, **row["changes"])
        with written_atomically(done) as temporary:
            temporary.write_text(json.dumps({"row": wanted, "seconds": time.perf_counter() - began}))
    measured(args, plan, name, seed)
    return f"{name}, seed {seed}"


def end_with_parent():
    """A worker whose parent was killed would train on for hours; so it is asked to stop, fit saves, and it ends."""
    def wait():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def run_paper(args, out):
    """Trains the rows of Sec. 4's tables that are missing, as many at a time as there are cores (beside a GPU, one),
    and reports them. A run that was stopped goes on at the row where it stopped."""
    stages = ("clip", "mean", "rectify") + (() if args.rectification_only else ("distill", "linear"))
    rows = {name: dict(zip(("name", "stage", "changes", "paper"), row)) for name, row in ROWS.items()
            if row[1] in stages}
    tables = {key: (title, [name for name in names if name in rows]) for key, (title, names) in TABLES.items()}
    plan = {"seeds": args.seeds, "clip_sha256": load_clip(args.clip).sha256, "rows": rows,
            "tables": {key: table for key, table in tables.items() if len(table[1]) > 1}}
    with written_atomically(out / "paper" / "plan.json") as temporary:
        temporary.write_text(text := json.dumps(plan, indent=1))
    plan = json.loads(text)  # as eval.py will read it
    seeds = dict.fromkeys(stages, args.seeds) | {"clip": 1, "mean": 1}  # nothing random in these
    jobs = [[(args, plan, name, seed) for seed in range(seeds[stage]) for name in rows if ROWS[name][1] == stage]
            for stage in stages]
    open_split(args.data, args.root, "train", args.download)  # fetched, if at all, by this process alone
    at_once, began, total = os.cpu_count() if args.device == "cpu" else 1, time.perf_counter(), sum(map(len, jobs))
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        done = (title for wave in jobs for title in pool.map(train_row, wave))  # in waves: a student needs its teacher
        for ended, title in enumerate(done, 1):
            left = (time.perf_counter() - began) / ended * (total - ended) / 60
            print(f"row {ended}/{total}: {title}; about {left:.0f} min left", flush=True)
    report_paper(args)


# --- Command line -------------------------------------------------------------------------------------------

STAGES = {"all": run_all, "pretrain": pretrain, "rectify": rectify, "distill": distill, "paper": run_paper}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.set_defaults(images=None, default_split=-1)  # test for shapes: no choice was made on it
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="all", help="default: all, on shapes")
    add("--teacher", type=Path, help="rectification that --stage distill learns from (default: <out>/rectify.pt)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--resume", action="store_true", help="go on where the same command was stopped")
    add("--seeds", type=int, default=3, help="number of seeds of --stage paper (default: 3)")
    add("--rectification_only", action="store_true", help="--stage paper without the rows of distillation")
    add("--cache", action=argparse.BooleanOptionalAction, help="keep decoded pictures in memory (default: below 2 GiB)")
    add("--epochs", type=int, help="short for --rectify_epochs, with --stage distill for --distill_epochs")
    add_common(parser)
    group = parser.add_argument_group("hyper-parameters", "defaults in brackets, by data set")
    for field in dataclasses.fields(Settings):
        values = {name: getattr(s, field.name) for name, s in SETTINGS.items()}
        if len(set(values.values())) == 1:
            values = {"all": values["voc"]}
        shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in values.items())
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        group.add_argument(f"--{field.name}", help=f"{field.metadata['help']} [{shown}]", default=None, **kind)
    args = settle(parser.parse_args(argv))
    if args.stage in ("all", "paper") and not args.facts.splits:
        raise ValueError(f"--stage {args.stage} evaluates, and {args.data} has no labels: --stage rectify or distill")
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; at least 1")
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if getattr(args, f.name) is not None}
    if args.epochs is not None:
        changes[f"{args.stage if args.stage == 'distill' else 'rectify'}_epochs"] = args.epochs
    if args.stage == "pretrain" and (args.data != "shapes" or changes):
        raise ValueError("--stage pretrain makes the tiny CLIP of shapes in fixed steps: no --data, no settings")
    varied = {key for _, _, settings, _ in ROWS.values() for key in settings} & set(changes)
    if args.stage == "paper" and varied:
        raise ValueError(f"--{', --'.join(sorted(varied))}: the rows of --stage paper differ in it")
    args.settings = dataclasses.replace(SETTINGS.get(args.data, SETTINGS["own"]), **changes)
    if args.data != "shapes" and not (args.settings.crop and args.settings.distill_crop):
        raise ValueError(f"--crop 0 and --distill_crop 0 need pictures of one size; those of {args.data} differ")
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill alone")
    args.given_clip, args.clip = args.clip, args.clip or args.facts.clip
    return args


def join_processes(args):
    """Under torchrun: this process's part in the run, one GPU each (NCCL), or the CPU (gloo)."""
    if args.stage not in ("rectify", "distill"):
        raise ValueError(f"--stage {args.stage} is a matter of one process: torchrun goes with rectify and distill")
    if cuda := args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))  # rank 0 may label ADE20K
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: so many times the pictures a step and fewer steps; --lr stays")


def main(argv=None):
    args = parse(argv)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # tensors this small gain little from a second thread, and stall on shared cores
    if "TORCHELASTIC_RUN_ID" in os.environ:
        join_processes(args)
    STAGES[args.stage](args, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped, and if a state was saved, the same command with --resume goes on from it")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        sys.exit(f"train.py: process {dist.get_rank() + 1} failed or lost another one ({str(error).splitlines()[0]}); "
                 "start all again with --resume")
