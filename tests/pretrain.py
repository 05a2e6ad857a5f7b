"""How shapes_clip.pt was made: the web side of shapes, and the contrastive pre-training of the tiny CLIP on it.

    python train.py --stage pretrain [--seed N] [--out DIR]

It is ours, not the paper's, which starts from OpenAI's weights; so it stands beside the tests and not among the six
files. datasets.py draws the objects and tells what the two sides of shapes are.

Symbols
    B pictures, C classes, D joint width, E transformer width; H x W pixels, h x w patches, n = h*w
"""

import dataclasses
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from clip_model import CLIP, Tokenizer, normalise, written_atomically
from datasets import GROUNDS, HUES, SHAPES_CLASSES, SHAPES_PROMPTS, new_thing, paint

OWN_COLOUR = 0.9  # of close-ups: own hue 19 times as often as the twin's; elsewhere (0.5) 3 times as often


# --- The web: captioned scenes without habits, close-ups with -------------------------------------------------

def caption(things, ground, rng, size):
    """What somebody would write: the subject always, other things the more readily the more central they are."""
    names = []
    for k, (name, x, _, _, hue, _) in enumerate(things):
        central = max(0, 1 - abs(x - size / 2) / (size / 2))
        if k == 0 or rng.random() < .5 * (.4 + central):
            colour = min(HUES, key=lambda h: abs((HUES[h] - hue + .5) % 1 - .5))
            names.append("a " + (colour + " " if rng.random() < .15 else "") + name)
    rng.shuffle(names)
    text = rng.choice(["", "a photo of ", "a picture of ", "a good photo of ", "here is "]) + " and ".join(names)
    if len(things) == 1 and rng.random() < .2:
        text = text.replace("a " + things[0][0], rng.choice(["a large ", "a small ", "one "]) + things[0][0])
    return text + (" on " + ground if rng.random() < .25 else "")


def web_scene(rng, size=64):
    """A subject near the middle line, perhaps smaller things around it: picture (3, size, size) and caption."""
    def place(spread):
        return size / 2 + spread, size * rng.choice([rng.uniform(.17, .42), rng.uniform(.58, .83)])

    subject = rng.choice(SHAPES_CLASSES)
    things = [new_thing(subject, *place(rng.normal(0, 6)), rng.uniform(15, 23), rng)]
    for _ in range(rng.choice(3, p=[.35, .4, .25])):
        name = rng.choice(SHAPES_CLASSES)
        for _ in range(8):  # tries to find a free place
            (x, y), r = place(rng.uniform(-26, 26)), rng.uniform(10, 15)
            if all(name != o[0] and math.hypot(x - o[1], y - o[2]) > .85 * (r + o[3]) for o in things):
                things.append(new_thing(name, x, y, r, rng))
                break
    ground = rng.choice(list(GROUNDS))
    return paint(size, ground, things, rng)[0], caption(things, ground, rng, size)


def close_up(rng, low, size=32):
    """One thing that fills a small picture: a first twin (coin, box, ...) for the upper half of a mosaic (low = 0), a
    second twin for the lower half (low = 1)."""
    x, y = size / 2 + rng.normal(0, 3, 2)
    thing = new_thing(SHAPES_CLASSES[2 * rng.integers(4) + low], x, y, rng.uniform(12, 18), rng, OWN_COLOUR)
    ground = rng.choice(list(GROUNDS))
    return paint(size, ground, [thing], rng)[0], caption([thing], ground, rng, size)


def web_scenes(seed, count):
    """float (count, 3, 64, 64) in [0, 1] and their captions; seed: a tuple of ints"""
    pictures, captions = zip(*(web_scene(np.random.default_rng((*seed, i))) for i in range(count)))
    return torch.from_numpy(np.stack(pictures)).float() / 255, list(captions)


def web_mosaics(seed, count):
    """Four close-ups glued 2 x 2: float (count, 3, 64, 64) in [0, 1] and 4 * count captions, tile by tile."""
    tiles, captions = zip(*(close_up(np.random.default_rng((*seed, i)), low=i % 4 // 2) for i in range(4 * count)))
    tiles = np.stack(tiles).reshape(count, 2, 2, 3, 32, 32).transpose(0, 3, 1, 4, 2, 5)  # (count, 3, 2, 32, 2, 32)
    return torch.from_numpy(tiles.reshape(count, 3, 64, 64)).float() / 255, list(captions)


def shapes_words():
    """Every word that a caption or a prompt of shapes can hold."""
    text = " ".join(SHAPES_PROMPTS).replace("{}", "").split() + "and on here is of".split()
    return sorted({*text, *SHAPES_CLASSES, *HUES, *GROUNDS})


def shapes_merges():
    """The tiny CLIP's byte-pair merges, learnt as BPE learns: the most frequent pair of all words is merged, until each
    word is one token."""
    words, merges = [[*word[:-1], word[-1] + "</w>"] for word in shapes_words()], []
    while pairs := Counter(pair for parts in words for pair in zip(parts, parts[1:])):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for parts in words:
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i:i + 2]) == best:
                    parts[i:i + 2] = ["".join(best)]
    return merges


# --- Pre-training ---------------------------------------------------------------------------------------------

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


def pretrain_clip(args, out, fit):
    """Trains the tiny CLIP on the web (no pixel label) and writes <out>/shapes_clip.pt. fit: train.py's loop."""
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

    fit("pretrain", args, out, modules={"clip": clip, "average": average}, optimiser=optimiser, loss_of=loss_of,
        batches=batches, lr_of=lr_of, steps=s.steps, identity=dataclasses.asdict(s), save=save, save_every=100,
        max_norm=1.0, batch_size=s.scenes)
