"""Training: one plain loop under every stage.

    python train.py                                          the whole paper on shapes, on a laptop CPU
    python train.py --stage rectify --data voc --root DIR    Sec. 3.1-3.4 on PASCAL VOC
    python train.py --stage distill --data voc --root DIR    Sec. 3.5, from what the former wrote
    python train.py --stage pretrain                         the tiny CLIP behind shapes, from scratch

What stands here
    Settings, SETTINGS     every hyper-parameter of the paper with its source, one instance a data set
    fit                    the loop: step, log, save, resume
    label_training_set     pseudo-labels of all training pictures (Sec. 3.4), computed once, cached by name
    rectify, distill       stages 1 and 2 of the paper
    pretrain               contrastive pre-training of the tiny CLIP (ours; not in the paper)
    run_all                both stages, ending in small Tables 2 and 4
    run_paper              Tables 4, 6 and 7 with controls, over several seeds

Nothing that learns reads a label: TrainingStream and Thumbnails yield pictures and names only. The stages `all` and
`paper` read labels to evaluate, through eval.py.
"""

import argparse
import csv
import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from clip_model import CLIP, Tokenizer, load_clip, normalise, written_atomically
from datasets import (DATA, Augment, Evaluation, Thumbnails, TrainingStream, open_split, shapes_merges, web_mosaics,
                      web_scenes)
from deeplab import DeepLabV2
from eval import Progress, best_device, check, evaluate, evaluate_stage, report_rows, scores
from reclip import PROMPTS, ReCLIP, distillation_loss


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
        for name in positive:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in ("crop", "distill_crop", "distill_lr_floor", "alpha", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be below 0")


SETTINGS = {
    "voc": Settings(),
    # All ours, chosen on shapes' val split. The tiny CLIP's cosines differ by .2, not .02: hence its temperatures.
    "shapes": Settings(rectify_epochs=20, rectify_poly_epochs=20, rectify_batch=32, lr=0.2, threshold=50.0, top_k=1,
                       positional_gain=0.05, tau_1=0.033, tau=0.033, crop=0, flip=False, photometric=False,
                       student="tiny", backbone_weights="none", distill_epochs=10, distill_lr=0.1, distill_crop=0),
}


# --- The loop -----------------------------------------------------------------------------------------------

def poly(lr, power, horizon):
    """Sec. 4.1's schedule, stepped once an epoch as released: epoch -> learning rate"""
    return lambda epoch: lr * (1 - min(epoch / horizon, 1)) ** power


def fit(stage, *, out, modules, optimiser, loss_of, batches, lr_of, steps, seed, identity, resume=False,
        save=None, save_every=1000, max_norm=math.inf, batch_size=1):
    """Runs steps first..steps-1, where first is 0 or, with resume, what <out>/<stage>_state.pt says.

    modules: {name: module} that learn (or, like an average, follow); their states are what is resumed.
    batches: first step -> iterator of (batch, names); loss_of: batch -> scalar; lr_of: step -> learning rate.
    identity: what must not change between a run and its resumption, {name: value}.
    save: called after each saved state, to write what the stage is for.
    All randomness of a step follows from (seed, step), so that a resumed run equals an uninterrupted one.
    """
    state_path, log_path = out / f"{stage}_state.pt", out / f"{stage}_log.csv"
    first = read_training_state(state_path, modules, optimiser, identity) if resume else 0
    if first and save:
        save()  # a kill may have fallen between the state and what follows from it
    saved, parameters = first, [p for group in optimiser.param_groups for p in group["params"]]
    rows = list(csv.reader(log_path.open()))[1:first + 1] if first and log_path.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(stage, steps, first, per_step=batch_size)
    iterator = iter(batches(first))
    with log_path.open("w", newline="") as file:
        log = csv.writer(file)
        log.writerows([["step", "loss", "lr"], *rows])
        for step in range(first, steps):
            batch, names = next(iterator)
            torch.manual_seed((seed + 1) * 7_368_787 + step)  # Gumbel noise; apart from the stream's own seeds
            for group in optimiser.param_groups:
                group["lr"] = lr_of(step)
            loss = loss_of(batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)  # infinity: measured only
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                kept = f"{state_path} holds step {saved}" if saved else "nothing had been saved yet"
                raise ValueError(f"the loss is {value}, its gradient's norm {norm:.3g}, at step {step} on "
                                 f"{', '.join(names)}; the step was not taken, {kept}: try a smaller learning rate")
            optimiser.step()
            log.writerow([step, f"{value:.6g}", f"{lr_of(step):.6g}"])
            progress(step + 1, f"loss {value:.4f}  lr {lr_of(step):.2e}  ")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                file.flush()
                with written_atomically(state_path) as temporary:
                    torch.save({"step": step + 1, "identity": identity, "optimiser": optimiser.state_dict(),
                                "modules": {name: m.state_dict() for name, m in modules.items()}}, temporary)
                saved = step + 1
                if save:
                    save()
    if parameters[0].is_cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{stage}: {steps - first} steps in {time.perf_counter() - progress.began:.0f} s, peak memory "
          f"of the process so far {peak / 2 ** 30:.2f} GiB")


def read_training_state(path, modules, optimiser, identity):
    """Loads a state that fit wrote, refuses one of another run, and returns the step to go on with."""
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; leave --resume out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["identity"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a training state, or is truncated: {reason}") from error
    changed = [f"{key} was {known.get(key)!r}, now {value!r}" for key, value in identity.items()
               if known.get(key) != value]
    if changed:
        raise ValueError(f"cannot resume {path}: {'; '.join(changed)}")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


# --- Stage 1: rectification ---------------------------------------------------------------------------------

def label_training_set(model, split, args, s, identity, path):
    """Sec. 3.4's image-level pseudo-labels of the whole training set: {name: list of class indices}.

    They come from CLIP alone and never change, so they are computed once and kept in `path`, by picture name
    (the released code pairs them by line number with an unsorted directory listing).
    """
    try:
        content = json.loads(path.read_text())
        if content["identity"] == identity and set(content["labels"]) == set(split.names):
            return content["labels"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours: computed (again)
    labels, loader = {}, DataLoader(Thumbnails(split, model.clip.input_resolution), 32, num_workers=args.workers)
    progress = Progress("image-level labels", len(split))
    for thumbnails, names in loader:
        found = model.image_labels(thumbnails.to(args.device), s.threshold, s.top_k)
        labels |= {name: row.nonzero()[:, 0].tolist() for name, row in zip(names, found.cpu())}
        progress(len(labels))
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "labels": labels}))
    return labels


def origin_of(args, s, clip):
    """What pseudo-labels depend on; kept beside them, and in the identity of a run."""
    facts = DATA[args.data]
    return {"data": args.data, "classes": list(facts.classes), "prompts": list(facts.prompts or PROMPTS),
            "clip": clip.sha256, "threshold": s.threshold, "top_k": s.top_k}


def identity_of(origin, s, args, pictures, foreign):
    """What a run must have in common with its resumption: all but the settings of the other stage (foreign)."""
    own = {key: value for key, value in dataclasses.asdict(s).items() if not key.startswith(foreign)}
    return origin | own | {"seed": args.seed, "pictures": pictures}


def resumable(args, out, stage):
    """With --resume, a stage of its own insists on a state to go on from; of the parts of `all` and `paper`, those
    that were not reached begin anew."""
    return args.resume and (args.stage not in ("all", "paper") or (out / f"{stage}_state.pt").is_file())


def labelled_batches(args, stream, labels, classes, size, first, steps):
    """Batches first .. steps - 1 of the stream: ((pictures (B, 3, H, W), image-level labels (B, C) bool), names)"""
    sampler = range(first * size, steps * size)
    for pictures, names in DataLoader(stream, size, sampler=sampler, num_workers=args.workers):
        present = torch.zeros(len(names), classes, dtype=torch.bool)  # (B, C)
        for row, name in zip(present, names):
            row[labels[name]] = True
        yield (pictures.to(args.device), present.to(args.device)), names


def rectify(args, out, prepare=None, shuffle=False, **changes):
    """Sec. 3.1-3.4: learns Reference prompt and positional net; writes <out>/rectify.pt. -> ReCLIP, eval mode.
    For ablations and controls: changes replace settings, prepare(model) is called before training, shuffle deals the
    image-level labels to other pictures."""
    s, facts = dataclasses.replace(args.settings, **changes), DATA[args.data]
    torch.manual_seed(args.seed)
    model = ReCLIP(load_clip(args.clip, args.device), facts.classes, prompt_length=s.prompt_length,
                   prompts=facts.prompts or PROMPTS, reference_norm=s.reference_norm,
                   positional_channels=s.positional_channels,
                   positional_last_relu=s.positional_last_relu, positional_gain=s.positional_gain,
                   tau_1=s.tau_1, tau=s.tau, pool=s.pool).train()
    if prepare:
        prepare(model)
    split = open_split(args.data, args.root, "train", args.download)
    origin = origin_of(args, s, model.clip)
    labels = label_training_set(model, split, args, s, origin, args.out / "image_labels.json")
    if shuffle:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed)).tolist()
        labels = {name: labels[split.names[i]] for name, i in zip(split.names, order)}
    stream = TrainingStream(split, Augment(s.long_side, facts.short_side, s.crop, flip=s.flip,
                                           photometric=s.photometric), args.seed)
    steps = math.ceil(s.rectify_epochs * len(split) / s.rectify_batch)

    # CLIP is frozen: where pictures never change, neither do their features
    known, fixed = {}, not (s.crop or s.flip or s.photometric)
    for pictures, names in DataLoader(stream, 32, sampler=range(len(split))) if fixed else ():
        known |= zip(names, model.features(pictures.to(args.device)))

    def batches(first):
        for (pictures, present), names in labelled_batches(args, stream, labels, len(facts.classes), s.rectify_batch,
                                                           first, steps):
            yield (torch.stack([known[n] for n in names]) if fixed else model.features(pictures), present), names

    lr = poly(s.lr, s.poly_power, s.rectify_poly_epochs)
    learnable = {name: m for name, m in (("reference", model.reference), ("positional", model.positional)) if m}
    if not learnable:
        raise ValueError("nothing to learn: --prompt_length and --positional_channels are both 0")
    optimiser = torch.optim.SGD([p for m in learnable.values() for p in m.parameters()], s.lr, s.momentum,
                                weight_decay=s.weight_decay)
    fit("rectify", out=out, modules=learnable, optimiser=optimiser, loss_of=lambda batch: model.loss(*batch),
        batches=batches, lr_of=lambda step: lr(step * s.rectify_batch // len(split)), steps=steps, seed=args.seed,
        identity=identity_of(origin, s, args, len(split), ("distill", "student", "head", "alpha", "beta", "mask_tau",
                                                           "backbone")),
        resume=resumable(args, out, "rectify"),
        save=lambda: model.save(out / "rectify.pt"), save_every=math.ceil(len(split) / s.rectify_batch),
        batch_size=s.rectify_batch)
    return model.eval()


# --- Stage 2: distillation -----------------------------------------------------------------------------------


def distill(args, out, **changes):
    """Sec. 3.5: the rectified CLIP of <out>/rectify.pt, frozen, teaches DeepLab V2; writes <out>/distill.pt.
    -> DeepLabV2, eval mode. changes: settings to replace, for ablations."""
    s, facts = dataclasses.replace(args.settings, **changes), DATA[args.data]
    clip = load_clip(args.given_clip, args.device) if args.given_clip else None  # None: where rectify found it
    teacher = ReCLIP.load(args.teacher or out / "rectify.pt", clip, args.device)
    if teacher.class_names != facts.classes:
        raise ValueError(f"{args.teacher or out / 'rectify.pt'} was learnt for other classes than {args.data}'s: "
                         f"{', '.join(teacher.class_names)}")
    if ((s.head.startswith("query_reference") and not teacher.reference)
            or (s.head.endswith("positional") and not teacher.positional)):
        raise ValueError(f"--head {s.head} needs a teacher with the parts it is named for; rectify again with them")
    torch.manual_seed(args.seed)
    device, grid = torch.device(args.device).type, teacher.clip.visual.grid
    with torch.no_grad():
        W_r = teacher.reference(teacher.clip) if teacher.reference else torch.zeros_like(teacher.W_q)  # (C, D)
        M_p = None
        if s.head.endswith("positional"):
            M_p = teacher.positional(teacher.clip.visual.positional_grid(grid, grid))               # (1, C, grid, grid)
    student = DeepLabV2(teacher.class_names, teacher.W_q, W_r, M_p=M_p, student=s.student, head=s.head,
                        backbone_weights=None if s.backbone_weights == "none" else s.backbone_weights).train()
    split = open_split(args.data, args.root, "train", args.download)
    origin = origin_of(args, s, teacher.clip)
    labels = label_training_set(teacher, split, args, s, origin, args.out / "image_labels.json")
    # Never smaller than the crop: the student would learn the teacher's opinion of grey padding (ours)
    stream = TrainingStream(split, Augment(s.long_side, s.distill_crop, s.distill_crop, ratio=(1.0, 2.0), flip=s.flip,
                                           photometric=s.photometric), args.seed)
    steps = math.ceil(s.distill_epochs * len(split) / s.distill_batch)
    lr = poly(s.distill_lr, s.poly_power, s.distill_epochs)
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], s.distill_lr, s.momentum,
                                weight_decay=s.weight_decay)

    def loss_of(batch):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return distillation_loss(teacher, student, *batch, mask_tau=s.mask_tau, alpha=s.alpha, beta=s.beta)

    fit("distill", out=out, modules={"student": student}, optimiser=optimiser, loss_of=loss_of,
        batches=lambda first: labelled_batches(args, stream, labels, len(facts.classes), s.distill_batch, first, steps),
        lr_of=lambda step: max(lr(step * s.distill_batch // len(split)), s.distill_lr_floor), steps=steps,
        seed=args.seed,
        identity=identity_of(origin | {"teacher": teacher.fingerprint()}, s, args, len(split),
                             ("rectify", "crop", "lr", "tau", "pool", "prompt", "reference", "positional")),
        resume=resumable(args, out, "distill"),
        save=lambda: student.save(out / "distill.pt"), save_every=math.ceil(len(split) / s.distill_batch),
        batch_size=s.distill_batch)
    return student.eval()


# --- Before stage 1: the tiny CLIP of shapes (ours; the paper starts from OpenAI's weights) -----------------

def info_nce(images, texts, scale):
    """CLIP's loss: (B, D), (B, D) -> scalar; picture i belongs to text i, both ways round."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def picture_features(clip, images, mosaic, blind):
    """(B, 3, H, W) -> class-token features and mean patch features, (B, D) each, or (4 B, D) for mosaics of 2 x 2
    tiles, one row a tile.

    Two aids that OpenAI's CLIP never had; a model this small, trained for minutes, finds no local features
    without them. blind: the class token reads no patch before the last block, so that what it needs must be
    said by the patches themselves. mosaic: in the last block the class token reads one tile only.
    """
    visual = clip.visual
    x, (h, w) = visual.embed(normalise(images))                                    # (B, 1 + n, E)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    mask[0, 1:] = not blind
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x, mask)
    if mosaic:
        first, patches = x[:, :1], x[:, 1:].unflatten(1, (2, h // 2, 2, w // 2))    # (B, 2, h/2, 2, w/2, E)
        patches = patches.transpose(2, 3).reshape(4 * len(x), h * w // 4, -1)       # (4 B, n / 4, E)
        x = torch.cat([first.repeat_interleave(4, 0), patches], 1)                  # (4 B, 1 + n / 4, E)
    whole = visual.ln_post(last(x, rows=[0])[:, 0]) @ visual.proj                   # (B or 4 B, D)
    dense = F.normalize(visual.ln_post(last.value_path(x[:, 1:])) @ visual.proj, dim=-1).mean(1)  # the same
    return whole, dense


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """All ours, chosen on the val split."""
    mosaic_steps: int = 350     # first phase: mosaics only
    steps: int = 1000           # both phases
    mosaic_share: float = 0.25  # of the second phase's steps
    mosaics: int = 48           # pictures a step; 4 captions each
    scenes: int = 96            # pictures a step
    dense_weight: float = 1.0   # of the dense term beside the class token's 1; on mosaics only
    lr_mosaics: float = 2.5e-3
    lr_scenes: float = 2e-3
    weight_decay: float = 0.05  # of matrices


def pretrain(args, out):
    """Trains the tiny CLIP on captioned web scenes of shapes (no pixel label) and writes <out>/shapes_clip.pt."""
    s = PretrainSettings()
    torch.manual_seed(args.seed)
    merges = shapes_merges()
    tokenizer = Tokenizer(merges)
    clip = CLIP(embed_dim=128, patch=8, vision_width=128, vision_layers=3, grid=8, context_length=16,
                vocab_size=len(tokenizer.ids), text_width=128, text_layers=2).reset_parameters().to(args.device)
    average = torch.optim.swa_utils.AveragedModel(clip, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    matrices = [p for p in clip.parameters() if p.ndim > 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": s.weight_decay},
                                   {"params": [p for p in clip.parameters() if p.ndim <= 1], "weight_decay": 0.0}],
                                  betas=(0.9, 0.98))
    optimiser.register_step_post_hook(lambda *_: average.update_parameters(clip))

    def lr_of(step):  # warm-up, then constant for the mosaics; again warm-up, then a cosine to 0 for the scenes
        if step < s.mosaic_steps:
            return s.lr_mosaics * min(1, (step + 1) / 40)
        k, n = step - s.mosaic_steps, s.steps - s.mosaic_steps
        return s.lr_scenes * min(1, (k + 1) / 40) * (1 + math.cos(math.pi * k / n)) / 2

    def batches(first):
        for step in range(first, s.steps):
            chance = torch.rand((), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step))
            first_phase = step < s.mosaic_steps
            mosaic = first_phase or bool(chance < s.mosaic_share)
            seed = (args.seed, step)
            pictures, captions = web_mosaics(seed, s.mosaics) if mosaic else web_scenes(seed, s.scenes)
            tokens = tokenizer(captions, clip.context_length, truncate=True)
            yield (pictures.to(args.device), tokens.to(args.device), mosaic, first_phase), captions[:1]

    def loss_of(batch):
        pictures, tokens, mosaic, first_phase = batch
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            whole, dense = picture_features(clip, pictures, mosaic, blind=first_phase)
            texts = clip.encode_text(tokens)
        scale = clip.logit_scale.exp().clamp(max=100)
        loss = info_nce(whole.float(), texts.float(), scale)
        return loss + s.dense_weight * info_nce(dense.float(), texts.float(), scale) if mosaic else loss

    def save():
        state = {key: value.half() for key, value in average.module.state_dict().items()}
        with written_atomically(out / "shapes_clip.pt") as temporary:
            torch.save({"state_dict": state, "merges": [list(pair) for pair in merges]}, temporary)

    fit("pretrain", out=out, modules={"clip": clip, "average": average}, optimiser=optimiser, loss_of=loss_of,
        batches=batches, lr_of=lr_of, steps=s.steps, seed=args.seed, save=save, save_every=100, max_norm=1.0,
        identity=dataclasses.asdict(s) | {"seed": args.seed}, resume=args.resume, batch_size=s.scenes)


# --- Several runs and their tables ---------------------------------------------------------------------------

def run_all(args, out):
    """Both stages and a table in the form of the paper's Tables 2 and 4."""
    plain = rectify(args, out / "reference_only", positional_channels=0)
    model = rectify(args, out)
    student = distill(args, out)
    rows = [("MaskCLIP (Query only)", model, "clip", out, []),
            ("+ Reference", plain, "rectify", out / "reference_only", []),
            ("+ Reference + positional", model, "rectify", out, [(model, "clip")]),
            ("distilled", student, "distill", out, [(model, "clip"), (model, "rectify")])]
    results = [(name, evaluate_stage(args, *rest)["miou"]) for name, *rest in rows]
    print(f"\n{args.data} {args.split}, mIoU" + "".join(f"\n  {name:<28}{100 * miou:5.1f}" for name, miou in results))
    print(f"masks: {out / 'eval_distill.png'}")


class ClassNumbers(nn.Module):
    """A control in the place of M_p: one number a class, the same everywhere."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = nn.Parameter(numbers.view(1, -1, 1, 1))

    def forward(self, positional_grid):
        return self.numbers.expand(-1, -1, *positional_grid.shape[2:])


def mean_logits(args, model):
    """(C,): the mean of M_q over all patches of the training pictures."""
    split = open_split(args.data, args.root, "train")
    loader = DataLoader(Thumbnails(split, model.clip.input_resolution), 32, num_workers=args.workers)
    with torch.no_grad():
        means = [model(pictures.to(args.device)).query.mean((2, 3)) for pictures, _ in loader]  # (B, C) each
    return torch.cat(means).mean(0)


def run_paper(args, out):
    """Table 4, 6 and 7 over several seeds, with the controls that tell how much of a gain is the method's: the paper's
    one-channel positional net (which cancels: the noise floor), one learnt number a class, subtraction of the
    mean logit, and training on the image-level labels of other pictures."""
    def numbers(model):
        model.positional = ClassNumbers(torch.zeros(len(model.class_names), device=args.device))

    rectified = {
        "+ Reference": dict(positional_channels=0),
        "+ positional": dict(prompt_length=0),
        "+ Reference + positional": dict(),
        "+ Reference + positional, 1 channel": dict(positional_channels=1),
        # one number receives the gradients of all positions at once: at the full learning rate it never settles
        "control: one number a class": dict(prompt_length=0, prepare=numbers, lr=0.01 * args.settings.lr),
        "control: labels of other pictures": dict(shuffle=True),
    }
    distilled = {
        "distilled: mask loss (Table 7)": dict(alpha=0.0, beta=0.0),
        "distilled: mask + feature (Table 7)": dict(beta=0.0),
        "distilled: mask + feature + text (Tables 6, 7)": dict(),
        # a classifier that learns finds its own scale: no temperature
        "distilled: original head (Table 6)": dict(head="original", mask_tau=1.0),
        "distilled: Query head (Table 6)": dict(head="query"),
        "distilled: Query, Reference, positional (Table 6)": dict(head="query_reference_positional"),
    }
    facts = DATA[args.data]
    dataset = Evaluation(open_split(args.data, args.root, args.split), facts.short_side)

    def miou(model, kind="rectified"):
        confusion = evaluate(lambda x: getattr(model(x), kind), model.to_pixels, dataset, len(facts.classes),
                             facts.denoise, args.device)
        return scores(confusion)["miou"]

    plain = ReCLIP(load_clip(args.clip, args.device), facts.classes, prompts=facts.prompts or PROMPTS, prompt_length=0)
    plain.positional = ClassNumbers(mean_logits(args, plain))
    results = {"MaskCLIP (Query only)": [miou(plain.eval(), "query")] * args.seeds,
               "control: minus the mean logit": [miou(plain)] * args.seeds}  # nothing random in these two
    for seed in range(args.seeds):
        run = argparse.Namespace(**{**vars(args), "seed": seed})
        folders = {name: out / "paper" / f"seed{seed}" / f"row{row}" for row, name in enumerate(rectified | distilled)}
        run.teacher = folders["+ Reference + positional"] / "rectify.pt"
        for train_stage, rows in ((rectify, rectified), (distill, {} if args.rectification_only else distilled)):
            for name, changes in rows.items():
                results.setdefault(name, []).append(miou(train_stage(run, folders[name], **changes)))
    report_rows(results, f"{args.data} {args.split}, {args.clip}: mIoU", out / "paper" / "tables.csv")


# --- Command line -------------------------------------------------------------------------------------------

STAGES = {"all": run_all, "pretrain": pretrain, "rectify": rectify, "distill": distill, "paper": run_paper}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="all", help="default: all, on shapes")
    add("--data", choices=list(SETTINGS), default="shapes", help="data set (default: shapes)")
    add("--root", default="data", help="folder that holds VOCdevkit/ (default: data)")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add("--clip", help="'ViT-B/16' or a weights file (default: the data set's)")
    add("--teacher", help="rectification that --stage distill learns from (default: <out>/rectify.pt)")
    add("--out", help="where everything is written (default: runs/<data>)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    add("--workers", type=int, help="processes that decode pictures (default: 4 beside a GPU, else 0)")
    add("--resume", action="store_true", help="go on where the same command was stopped")
    add("--split", help="what --stage all and paper evaluate on (default: test for shapes, else val)")
    add("--seeds", type=int, default=3, help="number of seeds of --stage paper (default: 3)")
    add("--rectification_only", action="store_true", help="--stage paper without the rows of distillation")
    add("--epochs", type=int, help="short for --rectify_epochs, with --stage distill for --distill_epochs")
    group = parser.add_argument_group("hyper-parameters", "defaults in brackets, by data set")
    for field in dataclasses.fields(Settings):
        values = {name: getattr(s, field.name) for name, s in SETTINGS.items()}
        shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in values.items())
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        group.add_argument(f"--{field.name}", help=f"{field.metadata['help']} [{shown}]", default=None, **kind)
    args = parser.parse_args(argv)
    if args.stage == "pretrain" and (args.data != "shapes" or args.epochs):
        raise ValueError("--stage pretrain makes the tiny CLIP of shapes, in the steps of PretrainSettings: it takes "
                         "neither --data nor --epochs")
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; it must be at least 1")
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if getattr(args, f.name) is not None}
    if args.epochs is not None:
        changes[f"{args.stage if args.stage == 'distill' else 'rectify'}_epochs"] = args.epochs
    args.settings = dataclasses.replace(SETTINGS[args.data], **changes)
    if args.data != "shapes" and not (args.settings.crop and args.settings.distill_crop):
        raise ValueError(f"--crop 0 and --distill_crop 0 need pictures of one size; those of {args.data} differ")
    if args.teacher and args.stage != "distill":
        raise ValueError("--teacher goes with --stage distill alone")
    args.given_clip, args.clip = args.clip, args.clip or DATA[args.data].clip
    args.workers = args.workers if args.workers is not None else 4 if args.device.startswith("cuda") else 0
    args.out = Path(args.out or f"runs/{args.data}")
    args.denoise = None  # evaluate_stage: the data set's own
    args.split = args.split or DATA[args.data].splits[-1]  # the last is the one that no choice was made on
    check(args)
    return args


def main(argv=None):
    args = parse(argv)
    if args.data == "shapes" and args.device == "cpu":
        torch.set_num_threads(1)  # tensors this small gain little from a second thread, and stall on shared cores
    STAGES[args.stage](args, args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"train.py: out of memory, try a smaller batch or crop ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command with --resume goes on from the last saved state")
