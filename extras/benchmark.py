"""A program that measures how fast and how large ReCLIP's parts are, beside a plain computation.

    python extras/benchmark.py            on one CPU thread (12 minutes) or a GPU
    python extras/benchmark.py --quick    the same on sizes too small to mean anything, in seconds

It needs no network and no data: weights are random, and images are drawn.

What is measured
    rectification   one training step on one image, by parts; ViT-B/16, at the crops of the recipe
                    2025 (VOC 336, Context 480, ADE20K 512). "Plain" computes what the released code
                    computes: loss and gradients are the same. Besides, the FLOP/s of our step and
                    of our image encoder, as a share of a large matrix product's
    evaluation      image file -> mask at the size of the truth, VOC under the recipe 2025
    data            image file -> augmented crop
    distillation    one training step of ResNet-101 on 512 x 512: 2 images on a CPU, 16 on a GPU

How
    Time: rivals and matrix product take turns; after a round that does not count, minimum and
    median of --repeat rounds (of distillation two at most).
    Memory: each rival's first two steps in a fresh process: the peak (VmHWM, reset through
    /proc/self/clear_refs; ru_maxrss would be inherited from the parent) less what was held
    before. A tiny step goes first, so that the libraries' own pages do not count. On a GPU: what
    torch has allocated. (/proc is Linux's; elsewhere memory on the CPU is nan.)

Why ours is faster and smaller
    - The texts of all classes begin alike: [SOT] v_1 .. v_L. This prefix is encoded once, and
      the names lie packed behind it: 117 tokens in place of 20 texts of 77 for VOC
      (CLIP.encode_prompted).
    - Of the last blocks only what is read is computed: the value path of the image encoder, the
      EOTs of the text encoder. Plain computes them whole, as released.
    - Attention weights are never kept as a matrix (scaled_dot_product_attention).
    The image encoder is three quarters of our step, and either side runs it at about the speed
    of the matrix product.

Symbols: B images, C classes, D width of the joint space, E of a transformer; H x W pixels, h x w
patches, n = h * w; L prompt vectors.
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_model import CLIP, Tokenizer, normalize_pixels, written_atomically  # noqa: E402
from datasets import DATA, Files  # noqa: E402
from deeplab import DeepLabV2  # noqa: E402
from eval import as_seen, make_protocol, predict_mask  # noqa: E402
from extras.pretrain import initialize, learn_merges  # noqa: E402
from reclip import (  # noqa: E402
    ReCLIP,
    bias_logits,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    masked_features,
    rectify_logits,
    segmentation_logits,
    text_guided_loss,
)
from train import hyper_parameters, require_finite, training_stream  # noqa: E402

# data set -> side of the crop, and how many image-level labels an image has (mean, as released)
SIZES = {"voc": (336, 2), "context": (480, 23), "ade20k": (512, 44)}
PARTS = (
    "image encoder", "text encoder", "positional net", "loss", "backward", "optimizer", "step"
)


# --- The model: random weights, a vocabulary of its own -------------------------------------------

VIT_B_16 = {
    "embed_dim": 512,
    "patch": 16,
    "vision_width": 768,
    "vision_layers": 12,
    "grid": 14,
    "text_width": 512,
    "text_layers": 12,
}
TINY = {  # those of shapes
    "embed_dim": 128,
    "patch": 8,
    "vision_width": 128,
    "vision_layers": 3,
    "grid": 8,
    "text_width": 128,
    "text_layers": 2,
}


def build_model(names, quick, device):
    """A ReCLIP in training, the same weights at every call: ViT-B/16's sizes; quick: tiny ones.

    Its vocabulary is made of the class names' own words, each of them one token, as nearly all
    are in OpenAI's. So nothing needs to be downloaded, and texts are as long as in earnest.
    """
    torch.manual_seed(0)
    words = sorted({word for name in names for word in name.split()})
    tokenizer = Tokenizer(learn_merges(words))
    sizes = TINY if quick else VIT_B_16
    clip = CLIP(context_length=77, vocab_size=len(tokenizer.ids), **sizes)
    clip = initialize(clip).to(device)
    clip.tokenizer = tokenizer

    # At random, for 85 prompts of each class would take minutes.
    W_q = torch.randn(len(names), clip.text_projection.shape[1], device=device)     # (C, D)
    return ReCLIP(clip, names, W_q=F.normalize(W_q, dim=-1), recipe="2025", tau=0.01).train()


# --- One step of rectification, ours --------------------------------------------------------------

# As train.train_rectification takes it. `lap` is told into which part the time since its last call
# went; `kind` is "ours", or "bf16": ours, with the image encoder in bf16.

def our_features(model, images, kind):
    """Z of Sec. 3.1: (B, 3, H, W) in [0, 1] -> (B, D, h, w)."""
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "bf16"):
        return model.features(images).float()                           # (B, D, h, w)


def our_loss(model, Z, labels, lap):
    """Eq. (1)-(5), with model.rectify(Z) taken apart."""
    lap("loss")
    W_q, W_r = model.heads()                                            # (C, D) each
    lap("text encoder")
    M_p = model.positional_logits(*Z.shape[2:])                         # (1, C, h, w)
    lap("positional net")

    M_b = bias_logits(segmentation_logits(Z, W_r), M_p)                 # (B, C, h, w)
    M = rectify_logits(segmentation_logits(Z, W_q), M_b)                # (B, C, h, w)
    masks = gumbel_softmax_masks(M, model.options.tau_1)                # (B, C, h, w)
    pooled = masked_features(Z, masks)                                  # (B, C, D)
    loss = contrastive_loss(pooled, model.W_q, labels, model.tau)
    lap("loss")
    return loss


# --- The same step, plainly -----------------------------------------------------------------------

# On the same model's weights, as the released code computes it.

def plain_block(block, x, mask=0.0, value_path=False):
    """A transformer block, (B, T, E) -> (B, T, E), with its attention weights as a matrix.

    mask: is added to that matrix. value_path: without attention (Sec. 3.1).
    """
    y = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    by_head = y.unflatten(-1, (3, block.attn.heads, -1))            # (B, T, 3, heads, E / heads)
    q, k, v = by_head.permute(2, 0, 3, 1, 4)                        # (B, heads, T, E / heads)
    if not value_path:
        weights = (q @ k.mT / q.shape[-1] ** .5 + mask).softmax(-1)     # (B, heads, T, T)
        v = weights @ v
    x = x + block.attn.out_proj(v.transpose(1, 2).flatten(2))

    y = block.mlp.c_fc(block.ln_2(x))                                   # (B, T, 4 E)
    return x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))


def plain_positional_grid(visual, h, w):
    """CLIP's positional embedding, stretched to h x w patches."""
    grid = visual.positional_embedding[1:].T.unflatten(1, (visual.grid, visual.grid))[None]
    return F.interpolate(grid, size=(h, w), mode="bicubic")             # (1, E, h, w)


@torch.no_grad()
def plain_features(model, images):
    """Z, (B, D, h, w)"""
    visual = model.clip.visual
    x = visual.conv1(normalize_pixels(images))                          # (B, E, h, w)
    h, w = x.shape[2:]
    class_token = visual.class_embedding.expand(len(x), 1, -1)          # (B, 1, E)
    x = torch.cat([class_token, x.flatten(2).mT], 1)                    # (B, 1 + n, E)

    patch_positions = plain_positional_grid(visual, h, w)[0].flatten(1).T           # (n, E)
    positions = torch.cat([visual.positional_embedding[:1], patch_positions])
    x = visual.ln_pre(x + positions)

    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = plain_block(block, x)
    values = plain_block(last, x, value_path=True)
    plain_block(last, x)  # released: computed too, and never used

    Z = (visual.ln_post(values) @ visual.proj)[:, 1:]                   # (B, n, D)
    return F.normalize(Z.mT.unflatten(2, (h, w)), dim=1)                # (B, D, h, w)


def plain_reference_head(clip, reference):
    """Eq. (1) with all tokens of every class: -> W_r (C, D)"""
    C = len(reference.endings)
    L, E = reference.vectors.shape
    length = clip.context_length

    behind_prompt = []
    for ending in reference.endings:
        padding = [0] * (length - 1 - L - len(ending))
        behind_prompt.append([*ending, *padding])
    behind_prompt = torch.tensor(behind_prompt, device=clip.logit_scale.device)  # (C, length-1-L)

    start = clip.token_embedding.weight[clip.sot].expand(C, 1, E)
    prompt = reference.vectors.expand(C, L, E)
    x = torch.cat([start, prompt, clip.token_embedding(behind_prompt)], 1)          # (C, length, E)
    x = x + clip.positional_embedding
    mask = x.new_full((length, length), -math.inf).triu(1)
    for block in clip.transformer.resblocks:
        x = plain_block(block, x, mask)

    eot = 1 + L + behind_prompt.argmax(1)                               # (C,)
    W_r = clip.ln_final(x)[torch.arange(C), eot] @ clip.text_projection # (C, D)
    return W_r / W_r.norm()


def plain_loss(model, Z, labels, lap):
    """Eq. (1)-(5), image by image and class by class."""
    lap("loss")
    W_r = plain_reference_head(model.clip, model.reference)             # (C, D)
    lap("text encoder")
    M_p = model.positional(plain_positional_grid(model.clip.visual, *Z.shape[2:]))  # (1, C, h, w)
    lap("positional net")

    M_q = torch.einsum("bdhw,cd->bchw", Z, model.W_q)                   # (B, C, h, w)
    M_r = torch.einsum("bdhw,cd->bchw", Z, W_r)                         # (B, C, h, w)
    masks = F.gumbel_softmax((M_q - (M_r + M_p)) / model.options.tau_1, hard=True, dim=1)

    losses = []
    for z, mask, row in zip(Z, masks, labels):
        present = row.nonzero()[:, 0]                                   # (K,)
        pooled = torch.stack([(z * mask[c]).mean((1, 2)) for c in present])         # (K, D)
        losses.append(F.cross_entropy(pooled @ model.W_q.T / model.tau, present))
    loss = sum(losses) / len(Z)
    lap("loss")
    return loss


class Step:
    """A training step of rectification on one image; step() -> {part: seconds}.

    kind: "ours", "bf16" (ours, the image encoder in bf16; on a GPU), or "plain".
    present: how many classes the image holds.
    """

    def __init__(self, kind, names, crop, present, quick, device):
        self.kind = kind
        self.model = build_model(names, quick, device)
        self.images = torch.rand(1, 3, crop, crop, device=device)
        self.labels = torch.arange(len(names), device=device)[None] < present       # (1, C)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, 0.01, 0.9, weight_decay=5e-4)
        self.steps = 0

    def lap(self, part):
        """The time since the last lap went into `part`."""
        last = self.last
        self.last = now()
        self.times[part] += self.last - last

    def features(self):
        if self.kind == "plain":
            return plain_features(self.model, self.images)
        return our_features(self.model, self.images, self.kind)

    def __call__(self):
        self.steps += 1
        torch.manual_seed(self.steps)  # the same Gumbel noise for all
        self.times = defaultdict(float)
        self.last = now()

        Z = self.features()                                             # (1, D, h, w)
        self.lap("image encoder")
        if self.kind == "plain":
            loss = plain_loss(self.model, Z, self.labels, self.lap)
        else:
            loss = our_loss(self.model, Z, self.labels, self.lap)

        self.optimizer.zero_grad()
        loss.backward()
        self.lap("backward")
        require_finite(loss, self.parameters, self.steps, ["noise"])
        self.loss = loss.item()
        self.optimizer.step()
        self.lap("optimizer")
        return self.times | {"step": sum(self.times.values())}


# --- Measuring ------------------------------------------------------------------------------------

def now():
    """Seconds; on a GPU when all that was asked of it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, *arguments):
    began = now()
    function(*arguments)
    return now() - began


def minimum_and_median(values):
    return {"min": min(values), "median": statistics.median(values)}


def extra_memory(job):
    """Peak MiB while the job runs, above what was held before."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20

    if sys.platform != "linux":
        job()
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    before = process_status("VmRSS")
    job()
    return process_status("VmHWM") - before


def process_status(field):
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}")


def in_fresh_process(function, *arguments):
    """function(*arguments) where nothing else has used memory yet."""
    threads = (torch.get_num_threads(),)
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, threads) as pool:
        return pool.apply(function, arguments)


def step_memory(kind, names, crop, present, quick, device):
    """Extra MiB of the first two steps, for in_fresh_process."""
    Step(kind, ["box", "gem"], 64, 1, True, device)()
    step = Step(kind, names, crop, present, quick, device)

    def two_steps():
        step()
        step()  # here the optimizer's momentum is there too
    return extra_memory(two_steps)


# --- What is measured -----------------------------------------------------------------------------

def rectification(data, quick, device, repeat):
    """One training step, ours and plain: -> what goes into the JSON."""
    names = DATA[data].classes
    crop, present = SIZES[data]
    if quick:
        crop, present = 64, len(names)
    kinds = ["ours", "plain"]
    if device.startswith("cuda"):
        kinds.append("bf16")
    steps = {kind: Step(kind, names, crop, present, quick, device) for kind in kinds}
    ours = steps["ours"]
    plain = steps["plain"]

    # The round that does not count: operations are counted, and the two sides compared.
    flop = {}
    for part, job in (("image encoder", ours.features), ("step", ours)):
        with FlopCounterMode(display=False) as counter:
            job()
        flop[part] = counter.get_total_flops()
    for kind in kinds[1:]:
        steps[kind]()

    loss, plain_loss = ours.loss, plain.loss
    if abs(loss - plain_loss) > 1e-4 * abs(plain_loss):
        raise ValueError(f"{data}: our loss is {loss}, the plain one {plain_loss}: these are not "
                         "the same step")
    apart = max(
        ((p.grad - q.grad).norm() / q.grad.norm()).item()
        for p, q in zip(ours.parameters, plain.parameters)
    )

    # Turns, so that a noisy moment falls on all alike.
    side = 8192 if device.startswith("cuda") else 2048
    if quick:
        side = 64
    matrix = torch.randn(side, side, device=device)
    matmul = []
    rounds = defaultdict(list)
    for _ in range(repeat):
        matmul.append(seconds_of(torch.matmul, matrix, matrix))
        for kind in kinds:
            rounds[kind].append(steps[kind]())

    seconds = {}
    for kind in kinds:
        seconds[kind] = {}
        for part in PARTS:
            seconds[kind][part] = minimum_and_median([times[part] for times in rounds[kind]])
    flop_per_second = 2 * side ** 3 / min(matmul)

    times_faster = {}
    for key, value in seconds["ours"]["step"].items():
        times_faster[key] = seconds["plain"]["step"][key] / value
    share_of_matmul = {}
    for part, count in flop.items():
        share_of_matmul[part] = count / seconds["ours"][part]["min"] / flop_per_second
    extra = {}
    for kind in kinds:
        extra[kind] = in_fresh_process(step_memory, kind, names, crop, present, quick, device)
    return {
        "classes": len(names),
        "crop": crop,
        "loss": loss,
        "plain_loss": plain_loss,
        "gradients_apart": apart,
        "seconds": seconds,
        "times_faster": times_faster,
        "extra_MiB": extra,
        "GFLOP": {part: count / 1e9 for part, count in flop.items()},
        "matmul_GFLOP_per_s": flop_per_second / 1e9,
        "share_of_matmul": share_of_matmul,
    }


def files(quick, device, repeat, count=4):
    """Evaluation and the data pipeline, on smooth JPEGs of 500 x 375: seconds per image."""
    voc = DATA["voc"]
    model = build_model(voc.classes, quick, device).eval()
    given = {"rectify_short_side": 64} if quick else {}
    _, settings = hyper_parameters(voc, "2025", **given)
    model.protocol = make_protocol("rectify", voc, "2025", **given)

    with tempfile.TemporaryDirectory() as folder:
        jpegs = [Path(folder, f"{i}.jpg") for i in range(count)]
        pngs = [Path(folder, f"{i}.png") for i in range(count)]
        for jpeg, png in zip(jpegs, pngs):
            noise = Image.effect_noise((32, 24), 60).resize((500, 375), Image.BICUBIC)
            noise.convert("RGB").save(jpeg, quality=90)
            Image.new("L", (500, 375), 1).save(png)
        split = Files(range(count), jpegs, pngs, range(1, 21))
        pairs = as_seen(model, split)
        stream = training_stream(split, model, settings.crop, settings, seed=0)

        def evaluate():
            for i in range(count):
                image, truth, _ = pairs[i]
                predict_mask(model, image, truth.shape)

        def load():
            for i in range(count):
                stream[i]

        evaluation_times = []
        data_times = []
        for round_ in range(repeat + 1):
            evaluation_seconds = seconds_of(evaluate) / count
            data_seconds = seconds_of(load) / count
            if round_ > 0:  # the first does not count
                evaluation_times.append(evaluation_seconds)
                data_times.append(data_seconds)
    return {
        "evaluation": minimum_and_median(evaluation_times),
        "data": minimum_and_median(data_times),
    }


def distillation(quick, device, repeat):
    """One training step of the student, as train.train_distillation takes it."""
    names = DATA["voc"].classes
    cuda = device.startswith("cuda")
    B = 16 if cuda else 2
    crop = 64 if quick else 512
    teacher = build_model(names, quick, device).eval()
    student = DeepLabV2(
        names, teacher.W_q, teacher.W_q / 4, student="tiny" if quick else "resnet101"
    ).train()
    student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4)
    images = torch.rand(B, 3, crop, crop, device=device)
    labels = torch.eye(B, len(names), device=device).bool()             # (B, C)
    valid = torch.ones(B, crop, crop, dtype=torch.bool, device=device)

    def step():
        with torch.no_grad():
            taught = teacher(images, valid)
            teacher_masks = teacher.to_pixels(taught.rectified, crop, crop).argmax(1)   # (B, H, W)

        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            Z_student = student.features(images, valid)                 # (B, D, h', w')
        M_student = student.rectify(Z_student).rectified                # (B, C, h', w')

        mask_loss = mask_guided_loss(M_student, teacher_masks, teacher.tau, student.to_pixels)
        feature_loss = feature_guided_loss(
            taught.features, Z_student, valid, teacher.to_pixels, student.to_pixels
        )
        text_loss = text_guided_loss(
            M_student, Z_student, teacher.W_q, labels, teacher.options.tau_1, teacher.tau
        )
        loss = distillation_loss(mask_loss, feature_loss, text_loss)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    memory = extra_memory(step)
    seconds = [seconds_of(step) for _ in range(repeat)]
    return {"images": B, "extra_MiB": memory, "seconds": minimum_and_median(seconds)}


# --- Report ---------------------------------------------------------------------------------------

def print_rectification(data, result):
    seconds = result["seconds"]
    memory = result["extra_MiB"]
    crop = result["crop"]
    print(f"\nRectification, {data}: {result['classes']} classes, {crop} x {crop}; loss "
          f"{result['loss']:.6f}, plain {result['plain_loss']:.6f}, gradients "
          f"{result['gradients_apart']:.0e} apart")

    heading = "".join(f"{kind:<22}" for kind in seconds)
    print(f"{'ms, minimum (median)':<22}{heading}times faster")
    for part in PARTS:
        line = f"  {part:<16}"
        for times in seconds.values():
            line += f"{1e3 * times[part]['min']:10.1f} ({1e3 * times[part]['median']:8.1f})  "
        for key in ("min", "median"):
            line += f"{seconds['plain'][part][key] / seconds['ours'][part][key]:8.1f}"
        print(line)

    line = f"  {'extra MiB':<16}"
    for value in memory.values():
        line += f"{value:10.0f}{'':12}"
    print(f"{line}{memory['plain'] / memory['ours']:8.1f} times smaller")

    shares = []
    for part, share in result["share_of_matmul"].items():
        shares.append(f"{part} {share:.0%}")
    speed = result["matmul_GFLOP_per_s"]
    print(f"  of the matrix product's {speed:.0f} GFLOP/s: {', '.join(shares)}")


def main(argv=None):
    best_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", default=best_device, help="cpu or cuda (default: the best there is)")
    add("--threads", type=int, default=1, help="of the CPU (default: 1)")
    add("--repeat", type=int, default=5, help="rounds (default: 5)")
    add("--json", default="runs/benchmark.json",
        help="where all numbers go (default: runs/benchmark.json)")
    add("--quick", action="store_true",
        help="VOC alone, tiny networks, one round: to see that it works")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    repeat = 1 if args.quick else args.repeat
    how = (args.quick, args.device, repeat)
    report = {
        "device": args.device,
        "threads": args.threads,
        "torch": torch.__version__,
        "quick": args.quick,
        "rectification": {},
    }

    for data in ["voc"] if args.quick else SIZES:
        report["rectification"][data] = rectification(data, *how)
        print_rectification(data, report["rectification"][data])

    report |= files(*how)
    for name in ("evaluation", "data"):
        print(f"{name}: {1 / report[name]['min']:.1f} images/s")

    result = in_fresh_process(distillation, args.quick, args.device, min(2, repeat))
    report["distillation"] = result
    print(f"distillation: {result['seconds']['min']:.2f} s a step of {result['images']} images, "
          f"{result['extra_MiB']:.0f} MiB")

    with written_atomically(args.json) as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"benchmark.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("benchmark.py: stopped, nothing was written")
