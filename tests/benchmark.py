"""How fast and how large ReCLIP's parts are, beside a plain computation of the same step, in one run.

    python tests/benchmark.py            on one CPU thread (ten minutes) or a GPU
    python tests/benchmark.py --quick    the same on sizes too small to mean anything, in seconds

What is measured
    rectification   one training step on one picture at VOC's, Context's and ADE's size, by parts; ViT-B/16 with random
                    weights. `Plain` computes what the released code computes; loss and gradients are the same. Besides
                    the FLOP/s of our step and of our image encoder, as a share of a large matmul's
    evaluation      picture file -> mask at the label's size, at VOC's size
    data            picture file -> augmented crop
    distillation    one training step of ResNet-101 on 512 x 512: 2 pictures on a CPU, 16 on a GPU
How
    Time: rivals and matmul take turns; after a round that does not count, minimum and median of --repeat rounds.
    Memory: each rival's first two steps in a fresh process: the peak (VmHWM, reset through /proc/self/clear_refs;
    ru_maxrss would be inherited from the parent) minus what was held before. A tiny step goes first, so that the
    libraries' own pages do not count. On a GPU: what torch has allocated.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_model import CLIP, load_clip, normalise, written_atomically  # noqa: E402  (the path comes first)
from datasets import DATA, Augment, Evaluation, Files, TrainingStream  # noqa: E402
from deeplab import DeepLabV2  # noqa: E402
from reclip import ReCLIP, ReferencePrompt, distillation_loss, segment  # noqa: E402

# data -> crop; image-level labels a picture (mean, as released); targets on one CPU thread: times faster, times smaller
SIZES = {"voc": (336, 2, 3.4, 6), "context": (480, 23, 4.7, 13), "ade20k": (512, 44, 11, 20)}
SHARES = {"step": .75, "image encoder": .85}  # targets, of the matmul's FLOP/s
PARTS = ("image encoder", "text encoder", "positional net", "loss", "backward", "optimiser", "step")


# --- The plain computation ----------------------------------------------------------------------------------

def plain_block(block, x, mask=0.0, value_path=False):
    """Attention weights as a matrix, a mask that is added to it; value_path: without attention (Sec. 3.1).
    (B, N, E) -> (B, N, E)"""
    y = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = (part.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2) for part in y.chunk(3, -1))
    if not value_path:
        v = (q @ k.mT / q.shape[-1] ** .5 + mask).softmax(-1) @ v                       # (B, heads, N, E / heads)
    x = x + block.attn.out_proj(v.transpose(1, 2).flatten(2))
    y = block.mlp.c_fc(block.ln_2(x))                                                   # (B, N, 4 E)
    return x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class PlainReference(ReferencePrompt):
    def forward(self, clip):
        """Eq. (1) with all tokens of every class: -> W_r (C, D)"""
        C, N, (L, E) = len(self.names), clip.context_length, self.vectors.shape
        rest = [[*name, clip.eot] + [0] * (N - 2 - L - len(name)) for name in self.names]
        rest = torch.tensor(rest, device=self.vectors.device)                           # (C, N - 1 - L)
        start = clip.token_embedding.weight[clip.sot].expand(C, 1, E)
        x = torch.cat([start, self.vectors.expand(C, L, E), clip.token_embedding(rest)], 1)  # (C, N, E)
        x, mask = x + clip.positional_embedding, x.new_full((N, N), -math.inf).triu(1)
        for block in clip.transformer.resblocks:
            x = plain_block(block, x, mask)
        W_r = clip.ln_final(x)[torch.arange(C), 1 + L + rest.argmax(1)] @ clip.text_projection  # (C, D)
        return W_r / W_r.norm()


class Plain(ReCLIP):
    """The training step as the released code computes it."""

    def __init__(self, clip, class_names, **settings):
        super().__init__(clip, class_names, **settings)
        self.reference = PlainReference(clip, class_names).to(self.W_q.device)

    def grid(self, h, w):
        visual = self.clip.visual
        grid = visual.positional_embedding[1:].T.unflatten(1, (visual.grid, visual.grid))[None]
        return F.interpolate(grid, size=(h, w), mode="bicubic")                         # (1, E, h, w)

    @torch.no_grad()
    def features(self, pictures):
        visual = self.clip.visual
        x = visual.conv1(normalise(pictures))                                           # (B, E, h, w)
        size = x.shape[2:]
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], 1)  # (B, 1 + n, E)
        x = visual.ln_pre(x + torch.cat([visual.positional_embedding[:1], self.grid(*size)[0].flatten(1).T]))
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = plain_block(block, x)
        values, _ = plain_block(last, x, value_path=True), plain_block(last, x)  # the latter released, but never used
        Z = (visual.ln_post(values) @ visual.proj)[:, 1:]                               # (B, n, D)
        return F.normalize(Z.mT.unflatten(2, size), dim=1)                              # (B, D, h, w)

    def loss(self, Z, labels):
        W_r, M_p = self.reference(self.clip), self.positional(self.grid(*Z.shape[2:]))
        M_q, M_r = (torch.einsum("bdhw,cd->bchw", Z, W) for W in (self.W_q, W_r))       # (B, C, h, w)
        masks = F.gumbel_softmax((M_q - (M_r + M_p)) / self.tau_1, hard=True, dim=1)    # (B, C, h, w)
        losses = []
        for z, mask, row in zip(Z, masks, labels):
            present = row.nonzero()[:, 0]                                               # (K,)
            pooled = torch.stack([(z * mask[c]).mean((1, 2)) for c in present])         # (K, D)
            losses.append(F.cross_entropy(pooled @ self.W_q.T / self.tau, present))
        return sum(losses) / len(Z)


# --- One step, by parts -------------------------------------------------------------------------------------

def now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(kind, names, quick, device):
    """ReCLIP or Plain, the same weights for all: ViT-B/16 at random; quick: the tiny CLIP of shapes."""
    torch.manual_seed(0)
    clip = (load_clip(DATA["shapes"].clip) if quick else
            CLIP(512, 16, 768, 12, 14, 77, 49408, 512, 12).reset_parameters()).to(device)
    W_q = F.normalize(torch.randn(len(names), clip.text_projection.shape[1], device=device), dim=-1)
    return (Plain if kind == "plain" else ReCLIP)(clip, names, W_q=W_q, tau=0.01).train()


class Step:
    """A training step as train.py takes it; () -> {part: seconds}. kind: ours, plain, or bf16: ours, with the image
    encoder under autocast."""

    def __init__(self, kind, names, crop, present, quick, device):
        self.kind, self.seen, self.model = kind, 0, build(kind, names, quick, device)
        self.pictures = torch.rand(1, 3, crop, crop, device=device)
        self.labels = torch.arange(len(names), device=device)[None] < present             # (1, C)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(self.parameters, 0.01, 0.9, weight_decay=5e-4)
        for module, part in ((self.model.reference, "text encoder"), (self.model.positional, "positional net")):
            module.register_forward_pre_hook(lambda *_: self.lap("loss"))  # what came before it
            module.register_forward_hook(lambda *_, part=part: self.lap(part))

    def lap(self, part):
        """The time since the last lap went into `part`."""
        last, self.last = self.last, now()
        self.times[part] += self.last - last

    def features(self):
        with torch.autocast("cuda", torch.bfloat16, enabled=self.kind == "bf16"):
            return self.model.features(self.pictures).float()

    def __call__(self):
        self.seen += 1
        torch.manual_seed(self.seen)  # the same Gumbel noise for all
        self.times, self.last = defaultdict(float), now()
        Z = self.features()
        self.lap("image encoder")
        loss = self.model.loss(Z, self.labels)
        self.lap("loss")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.lap("backward")
        nn.utils.clip_grad_norm_(self.parameters, math.inf)
        self.loss = loss.item()
        self.optimiser.step()
        self.lap("optimiser")
        return self.times | {"step": sum(self.times.values())}


# --- Measuring ----------------------------------------------------------------------------------------------

def timed(function):
    """A job: () -> {"all": seconds}"""
    def job():
        began = now()
        function()
        return {"all": now() - began}
    return job


def take_turns(jobs, repeat):
    """{name: job} -> {name: {part: {"min", "median"} in seconds}}; a noisy moment falls on all alike."""
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(repeat)]
    return {name: {part: {"min": min(seconds), "median": statistics.median(seconds)} for part in rounds[0][name]
                   for seconds in [[r[name][part] for r in rounds]]} for name in jobs}


def extra_memory(job):
    """Peak MiB while the job runs, above what was held before"""
    def held(field):
        if cuda:
            return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[field]() / 2 ** 20
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

    cuda = torch.cuda.is_initialized()
    torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    job()
    return held("VmHWM") - before


def in_fresh_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def step_memory(kind, names, crop, present, quick, device):
    Step(kind, ["box", "gem"], 64, 1, True, device)()
    step = Step(kind, names, crop, present, quick, device)
    return extra_memory(lambda: (step(), step()))  # in the second, the optimiser's momentum is there too


def rectification(data, quick, device, repeat):
    names, (crop, present, *_) = DATA[data].classes, SIZES[data]
    size = names, 64 if quick else crop, len(names) if quick else present, quick, device
    steps = {kind: Step(kind, *size) for kind in ("ours", "plain", "bf16")[:3 if device.startswith("cuda") else 2]}
    ours, plain, flop = steps["ours"], steps["plain"], {}
    for part, job in (("image encoder", ours.features), ("step", ours)):
        with FlopCounterMode(display=False) as counter:
            job()
        flop[part] = counter.get_total_flops()
    for kind in steps.keys() - {"ours"}:
        steps[kind]()
    loss, plain_loss = ours.loss, plain.loss
    assert abs(loss - plain_loss) <= 1e-4 * abs(plain_loss), f"{data}: the loss is {loss}, plainly {plain_loss}"
    apart = max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in zip(ours.parameters, plain.parameters))
    side = 64 if quick else 8192 if device.startswith("cuda") else 2048
    matrix = torch.randn(side, side, device=device)
    times = take_turns({"matmul": timed(lambda: matrix @ matrix)} | steps, repeat)
    speed = 2 * side ** 3 / times.pop("matmul")["all"]["min"]                  # FLOP/s
    return {"classes": len(names), "crop": size[1], "loss": loss, "plain_loss": plain_loss,
            "gradients_apart": apart, "seconds": times,
            "times_faster": {key: times["plain"]["step"][key] / value for key, value in times["ours"]["step"].items()},
            "extra_MiB": {kind: in_fresh_process(step_memory, kind, *size) for kind in steps},
            "GFLOP": {part: count / 1e9 for part, count in flop.items()}, "matmul_GFLOP_per_s": speed / 1e9,
            "share_of_matmul": {part: flop[part] / times["ours"][part]["min"] / speed for part in flop}}


def files(quick, device, repeat, count=4):
    """Evaluation and the data pipeline, on smooth JPEGs of 500 x 375: {name: {"min", "median"}} in seconds a picture"""
    model, facts = build("ours", DATA["voc"].classes, quick, device).eval(), DATA["voc"]

    @torch.no_grad()
    def evaluate():
        for picture, label, _ in (dataset[i] for i in range(count)):
            logits = model(picture[None].to(device)).rectified
            segment(logits, model.cell, picture.shape[1:], label.shape, facts.denoise).cpu()

    with tempfile.TemporaryDirectory() as folder:
        split = Files(*([Path(folder, f"{i}.{kind}") for i in range(count)] for kind in ("jpg", "png")), 20)
        for jpeg, png in zip(split.pictures, split.labels):
            Image.effect_noise((32, 24), 60).resize((500, 375), Image.BICUBIC).convert("RGB").save(jpeg, quality=90)
            Image.new("L", (500, 375), 1).save(png)
        dataset = Evaluation(split, 64 if quick else facts.short_side)
        stream = TrainingStream(split, Augment(2048, facts.short_side, 336), seed=0)
        jobs = {"evaluation": timed(evaluate), "data": timed(lambda: [stream[i] for i in range(count)])}
        take_turns(jobs, 1)
        times = take_turns(jobs, repeat)
    return {name: {key: seconds / count for key, seconds in t["all"].items()} for name, t in times.items()}


def distillation(quick, device, repeat):
    names, cuda, crop = DATA["voc"].classes, device.startswith("cuda"), 64 if quick else 512
    teacher, pictures = build("ours", names, quick, device).eval(), 16 if cuda else 2
    student = DeepLabV2(names, teacher.W_q, teacher.W_q / 4, student="tiny" if quick else "resnet101").train()
    optimiser = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4)
    batch = torch.rand(pictures, 3, crop, crop, device=device), torch.eye(pictures, len(names), device=device).bool()

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):  # as train.py
            loss = distillation_loss(teacher, student, *batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    memory = extra_memory(step)
    return {"pictures": pictures, "extra_MiB": memory, "seconds": take_turns({"": timed(step)}, repeat)[""]["all"]}


# --- Report -------------------------------------------------------------------------------------------------

def print_rectification(data, r):
    seconds, memory, (*_, faster, smaller) = r["seconds"], r["extra_MiB"], SIZES[data]
    print(f"\nRectification, {data}: {r['classes']} classes, {r['crop']} x {r['crop']}; loss {r['loss']:.6f}, plain "
          f"{r['plain_loss']:.6f}, gradients {r['gradients_apart']:.0e} apart\n{'ms, minimum (median)':<22}"
          + "".join(f"{kind:<22}" for kind in seconds) + "times faster")
    for part in PARTS:
        cells = "".join(f"{1e3 * t[part]['min']:10.1f} ({1e3 * t[part]['median']:8.1f})  " for t in seconds.values())
        ratios = (seconds["plain"][part][key] / seconds["ours"][part][key] for key in ("min", "median"))
        print(f"  {part:<16}{cells}" + "{:8.1f}{:8.1f}".format(*ratios) + f"   target {faster}" * (part == "step"))
    print(f"  {'extra MiB':<16}" + "".join(f"{value:10.0f}{'':12}" for value in memory.values())
          + f"{memory['plain'] / memory['ours']:8.1f} times smaller   target {smaller}")
    print(f"  of the matmul's {r['matmul_GFLOP_per_s']:.0f} GFLOP/s: "
          + ", ".join(f"{part} {r['share_of_matmul'][part]:.0%} (target {SHARES[part]:.0%})" for part in SHARES))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="of the CPU (default: 1)")
    add("--repeat", type=int, default=5, help="rounds (default: 5)")
    add("--json", default="runs/benchmark.json", help="where all numbers go (default: runs/benchmark.json)")
    add("--quick", action="store_true", help="VOC alone, tiny networks, one round: to see that it works")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    how = args.quick, args.device, 1 if args.quick else args.repeat
    report = {"device": args.device, "threads": args.threads, "torch": torch.__version__, "quick": args.quick,
              "targets": {"SIZES": SIZES, "SHARES": SHARES}, "rectification": {}}
    for data in ["voc"] if args.quick else SIZES:
        report["rectification"][data] = rectification(data, *how)
        print_rectification(data, report["rectification"][data])
    report |= files(*how)
    report["distillation"] = d = in_fresh_process(distillation, args.quick, args.device, min(2, how[2]))
    for name in ("evaluation", "data"):
        print(f"{name}: {1 / report[name]['min']:.1f} pictures/s")
    print(f"distillation: {d['seconds']['min']:.2f} s a step of {d['pictures']} pictures, {d['extra_MiB']:.0f} MiB")
    with written_atomically(args.json) as temporary:
        temporary.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
