"""reclip.py against independent computations: literal loops over Eq. (1)-(5), closed forms,
statistics.
"""

import inspect
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reclip
from clip_model import ATTENTIONS, QuickGELU, load_clip, normalize_pixels
from reclip import (
    PROMPTS,
    PositionalBias,
    ReCLIP,
    ReferencePrompt,
    bias_logits,
    contrastive_loss,
    gumbel_softmax_masks,
    image_level_labels,
    masked_features,
    query_text_features,
    rectify_logits,
    segmentation_logits,
    segment,
)
from test_clip_model import (
    encode_prompted_plain,
    layer_norm,
    plain_block,
    plain_embed,
    plain_image,
    plain_mlp,
    quick_gelu,
)

CLASSES = ["cat", "dog", "grass", "tree"]


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def make_model(clip):
    """A ReCLIP in float64 on the small CLIP, random W_q (rows of length 1), prompt and batch
    norms not at their start.
    """

    def make(seed=0, classes=CLASSES, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            W_q = F.normalize(torch.randn(len(classes), 12), dim=-1)
            prompt_noise = 0.1 * torch.randn(73, 128)
            model = ReCLIP(
                clip.double(), classes, W_q=W_q, **{"prompt_length": 6} | settings
            ).double()
            with torch.no_grad():
                model.reference.vectors += prompt_noise[: model.reference.vectors.shape[-2]]
        return model

    return make


def pictures(batch=2, height=13, width=18):
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def loss_of(model, Z, labels):
    """Eq. (1)-(5) as train_rectification spells them out; scalar."""
    masks = reclip.gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)
    pooled = masked_features(Z, masks, model.pool)
    return contrastive_loss(pooled, model.W_q, labels, model.tau)


def noise_of(seed, logits):
    """The Gumbel noise that PyTorch draws for these logits: minus the logarithm of exponential
    samples.
    """
    torch.manual_seed(seed)
    return -torch.empty_like(logits).exponential_().log()


# --------------------------------------------------------------------------------------------------
# Sec. 3.1: the Query
# --------------------------------------------------------------------------------------------------


def test_prompts_are_the_published_ones(shared):
    lines = shared("clip/prompt_templates_85.txt").read_text().splitlines()
    assert len(PROMPTS) == 85 and len(lines) == 85 and set(PROMPTS) == set(lines)


def test_prompts():
    assert len(PROMPTS) == len(set(PROMPTS)) == 85
    assert all(
        prompt.count("{}") == 1 and prompt.format("cat").count("cat") == 1 for prompt in PROMPTS
    )
    assert {"a photo of a {}.", "itap of my {}.", "this is one {} in the scene."} <= set(PROMPTS)


def test_query_text_features(clip):
    # text by text: normalize_pixels, mean over prompts and synonyms, normalize_pixels
    clip, prompts = clip.double(), PROMPTS[::17]
    expected = []
    for synonyms in (["cat"], ["dog", "tree"], ["grass in the scene"]):
        total = torch.zeros(12, dtype=torch.float64)
        for synonym in synonyms:
            for prompt in prompts:
                feature = clip.encode_text(clip.tokenize(prompt.replace("{}", synonym)))[0]
                total += feature / feature.square().sum().sqrt()
        expected.append(total / total.square().sum().sqrt())
    close(
        query_text_features(clip, ["cat", "dog | tree", "grass in the scene"], prompts),
        torch.stack(expected),
    )


def test_query_uses_all_prompts_by_default(clip):
    W_q = ReCLIP(clip, ["cat", "dog"]).W_q
    texts = [[prompt.format(name) for prompt in PROMPTS] for name in ("cat", "dog")]
    each = torch.stack([clip.encode_text(clip.tokenize(t)) for t in texts])  # (C, 85, D)
    total = (each / each.square().sum(-1, keepdim=True).sqrt()).sum(1)
    close(W_q, total / total.square().sum(-1, keepdim=True).sqrt(), 1e-5)


# --------------------------------------------------------------------------------------------------
# Sec. 3.2: the Reference
# --------------------------------------------------------------------------------------------------

NAMES = ["cat", "dog in scene", "grass of | tree", "this photo of the"]  # 1, 3, 2, 4 tokens


@pytest.mark.parametrize("norm", ["frobenius", "class"])
@pytest.mark.parametrize("per_class", [False, True])
def test_reference_prompt(clip, norm, per_class):
    # Eq. 1 one text at a time; the whole matrix or each row gets length 1
    clip = clip.double()
    reference = ReferencePrompt(clip, NAMES, length=5, norm=norm, prompt_per_class=per_class)
    assert reference.vectors.shape == ((4, 5, 128) if per_class else (5, 128))
    reference.vectors.data += 0.1 * torch.randn_like(reference.vectors)
    ids = [
        clip.tokenizer.encode(name)
        for name in ("cat", "dog in scene", "grass of", "this photo of the")
    ]
    assert [len(i) for i in ids] == [1, 3, 2, 4]
    W = encode_prompted_plain(clip, reference.vectors, [[*i, clip.eot] for i in ids])
    total = (
        sum(v * v for v in W.flatten()).sqrt()
        if norm == "frobenius"
        else W.square().sum(1).sqrt()[:, None]
    )
    close(reference(clip), W / total)


@pytest.mark.parametrize(
    "wanted, context, longest, length",
    [
        (73, 77, 2, 73),
        (73, 77, 4, 71),
        (73, 60, 4, 54),
        (73, 77, 1, 73),
        (9, 77, 2, 9),
        (9, 10, 3, 5),
    ],
)
def test_prompt_length(make_clip, wanted, context, longest, length):
    # start, L vectors, the longest name and end fill the text: L = min(73, context - 2 -
    # longest name)
    clip = make_clip(context=context)
    name = " ".join("dog in the scene".split()[:longest])  # a token a word
    reference = ReferencePrompt(clip, ["cat", name], wanted)
    assert reference.vectors.shape == (length, 128)
    assert reference(clip).shape == (2, 12)


def test_prompt_starts_as_token_0(clip):
    vectors = ReferencePrompt(clip, CLASSES, 7).vectors
    assert (
        all(torch.equal(v, clip.token_embedding.weight[0]) for v in vectors)
        and vectors.requires_grad
    )


def test_prompts_per_class_start_as_the_shared_one(clip):
    # the same texts before anything is learnt; then each class's loss moves its own vectors alone
    clip = clip.double()
    shared = ReferencePrompt(clip, CLASSES, 7)
    own = ReferencePrompt(clip, CLASSES, 7, prompt_per_class=True)
    assert torch.equal(own.vectors, shared.vectors.expand(4, -1, -1))
    close(own(clip), shared(clip))

    clip.encode_prompted(own.vectors, own.endings)[1].sum().backward()
    moved = own.vectors.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [False, True, False, False]


def test_name_too_long_for_the_text(make_clip):
    with pytest.raises(ValueError, match="no room for a prompt"):
        ReferencePrompt(make_clip(context=6), ["cat", "dog in the scene"])


# --------------------------------------------------------------------------------------------------
# Sec. 3.3: the positional net
# --------------------------------------------------------------------------------------------------


def convolution(weight, x):
    """3x3, a frame of zeros, no bias: (O, I, 3, 3), (I, h, w) -> (O, h, w), one shift at a time."""
    h, w = x.shape[1:]
    framed, out = x.new_zeros(len(x), h + 2, w + 2), 0
    framed[:, 1:-1, 1:-1] = x
    for dy in range(3):
        for dx in range(3):
            out = out + (
                weight[:, :, dy, dx] @ framed[:, dy : dy + h, dx : dx + w].flatten(1)
            ).unflatten(1, (h, w))
    return out


def plain_positional(state, x, training, last_relu):
    """Convolution, batch norm, ReLU, three times, on (W, h, w)."""
    for i in (0, 3, 6):
        x = convolution(state[f"net.{i}.weight"], x)
        mean, variance = state[f"net.{i + 1}.running_mean"], state[f"net.{i + 1}.running_var"]
        if training:
            mean, variance = x.mean((1, 2)), x.var((1, 2), unbiased=False)
        scale = state[f"net.{i + 1}.weight"] / (variance + 1e-5).sqrt()
        x = (x - mean[:, None, None]) * scale[:, None, None] + state[f"net.{i + 1}.bias"][
            :, None, None
        ]
        if i < 6 or last_relu:
            x = torch.where(x > 0, x, 0)
    return x


def scrambled(net):
    """Nothing at its start: weights, biases and running statistics of the batch norms are
    random.
    """
    for key, value in net.state_dict().items():
        if value.ndim == 1:
            value.copy_(torch.rand_like(value) + (0.5 if "weight" in key or "var" in key else -0.5))
    return net.double()


@pytest.mark.parametrize("channels, last_relu", [(1, True), (1, False), (4, True), (4, False)])
def test_positional_bias(clip, channels, last_relu):
    net = scrambled(PositionalBias(128, channels, last_relu))
    grid = clip.visual.positional_grid(4, 5).double()
    for training in (True, False):
        expected = plain_positional(
            net.state_dict(), grid[0], training, last_relu
        )  # before the statistics move
        close(net.train(training)(grid)[0], expected)
    assert (expected.min() >= 0) == last_relu and expected.std() > 0


def test_positional_widths(clip):
    # released: 768 -> 512 -> 256 -> C
    shapes = [p.shape for p in PositionalBias(768, 20).parameters() if p.ndim == 4]
    assert shapes == [(512, 768, 3, 3), (256, 512, 3, 3), (20, 256, 3, 3)]


def test_running_statistics(clip):
    # batch norm keeps 0.9 old + 0.1 new, the new variance over n - 1
    net, grid = PositionalBias(128, 3).double(), clip.visual.positional_grid(4, 5).double()
    x = convolution(net.net[0].weight, grid[0])
    net.train()(grid)
    close(net.net[1].running_mean, 0.1 * x.mean((1, 2)))
    close(net.net[1].running_var, 0.9 + 0.1 * x.var((1, 2), unbiased=True))


def test_gain_changes_nothing_but_the_scale():
    # same seed: all weights equal to the bit, and M_p is the gain times the plain one
    nets = []
    for gain in (1.0, 0.05):
        torch.manual_seed(0)
        nets.append(PositionalBias(128, 3, gain=gain))
    plain, small = (net.state_dict() for net in nets)
    assert all(torch.equal(plain[key], small[key]) for key in plain)
    grid = torch.randn(1, 128, 5, 7)
    torch.testing.assert_close(nets[1](grid), 0.05 * nets[0](grid))


# --------------------------------------------------------------------------------------------------
# Eq. (2), (3)
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_logits_position_by_position(channels):
    Z, W_q, W_r = torch.randn(2, 5, 3, 4), torch.randn(4, 5), torch.randn(4, 5)
    M_p = torch.randn(1, channels, 3, 4)
    M_r = segmentation_logits(Z, W_r)
    M = rectify_logits(segmentation_logits(Z, W_q), bias_logits(M_r, M_p))
    assert M.shape == (2, 4, 3, 4)
    for b, c, y, x in np.ndindex(2, 4, 3, 4):
        query = sum(float(Z[b, d, y, x] * W_q[c, d]) for d in range(5))
        reference = sum(float(Z[b, d, y, x] * W_r[c, d]) for d in range(5))
        positional = float(M_p[0, c if channels > 1 else 0, y, x])
        assert float(M_r[b, c, y, x]) == pytest.approx(reference, abs=1e-5)
        assert float(M[b, c, y, x]) == pytest.approx(query - reference - positional, abs=1e-5)


@pytest.mark.parametrize("channels", [None, 1, 0])
def test_parts_of_the_model(make_model, clip, channels):
    # forward = Eq. 1-3 of its parts; Z has length 1
    model, images = make_model(positional_channels=channels).eval(), pictures()
    out = model(images)
    dense = clip.encode_image_dense(normalize_pixels(images))
    close(out.features, dense / dense.square().sum(1, keepdim=True).sqrt())
    close(
        out.query,
        torch.stack(
            [torch.tensordot(z, model.W_q, ([0], [1])).permute(2, 0, 1) for z in out.features]
        ),
    )
    W_r = encode_prompted_plain(clip, model.reference.vectors, model.reference.endings)
    close(
        out.reference,
        torch.stack(
            [
                torch.tensordot(z, W_r / W_r.norm(), ([0], [1])).permute(2, 0, 1)
                for z in out.features
            ]
        ),
    )
    M_p = torch.zeros(1, 4, 5, dtype=torch.float64)
    if channels != 0:
        state = {k: v for k, v in model.positional.state_dict().items()}
        M_p = plain_positional(state, clip.visual.positional_grid(4, 5)[0], False, True)
    assert len(M_p) == (4 if channels is None else 1)
    close(out.positional[0], M_p)
    close(out.rectified, out.query - out.reference - M_p)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_of_the_features(make_model, clip, attention):
    model, images = make_model(attention=attention).eval(), pictures()
    dense = clip.encode_image_dense(normalize_pixels(images), attention)
    close(model(images).features, dense / dense.square().sum(1, keepdim=True).sqrt())


def test_adding_the_bias(make_model):
    # Table 5: the same parts, the other sign
    images = pictures()
    subtracted, added = (make_model(subtract=s).eval()(images) for s in (True, False))
    for part in ("query", "reference", "positional"):
        assert torch.equal(getattr(subtracted, part), getattr(added, part))
    close(added.rectified, added.query + added.reference + added.positional)
    close(subtracted.rectified + added.rectified, 2 * added.query)


def test_learnable_query(make_model, clip):
    # Table 3: M_q from a prompt of its own, each row of length 1, while Eq. (5) keeps CLIP's texts
    model, images = make_model(query_learnable=True, positional_channels=0), pictures()
    start = make_model(query_learnable=True)
    assert torch.equal(start.query.vectors, clip.token_embedding.weight[0].expand(6, -1))
    model.query.vectors.data += 0.1 * torch.randn_like(model.query.vectors)
    out = model.eval()(images)
    W = encode_prompted_plain(clip, model.query.vectors, model.query.endings)
    close(
        out.query,
        torch.einsum("bdhw,cd->bchw", out.features, W / W.square().sum(1, keepdim=True).sqrt()),
    )
    close(out.rectified, out.query - out.reference)
    close(out.reference, make_model().eval()(images).reference)
    assert torch.equal(model.W_q, make_model().W_q)  # the same seed's, given from outside
    assert make_model().query is None


def test_queries_that_start_alike_differ_in_scale(clip):
    out = ReCLIP(clip, CLASSES, W_q=torch.eye(4, 12), prompt_length=5, query_learnable=True).eval()(
        pictures().float()
    )
    ratio = out.query / out.reference  # |W_r| = 1 as a whole, about 1 / 2 a row
    assert ratio.std(dim=(0, 2, 3)).max() < 1e-3 and 1.5 < ratio.mean() < 2.5


def test_a_positional_logit_shared_by_all_classes_does_nothing(make_model):
    # Eq. 2 as printed: it cancels in argmax, in the Gumbel masks, in the loss, in every gradient
    without, shared, per_class = (
        make_model(positional_channels=c, tau_1=0.05).train() for c in (0, 1, None)
    )
    images, labels = pictures(), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    losses, masks = [], []
    for model in (without, shared, per_class):
        rectified = model(images).rectified
        torch.manual_seed(3)
        masks.append((rectified.argmax(1), gumbel_softmax_masks(rectified, 0.05).argmax(1)))
        torch.manual_seed(3)
        losses.append(loss_of(model, model.features(images), labels))
        losses[-1].backward()
    assert shared(images).positional.std() > 0.1  # it is there, and yet:
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    close(losses[0], losses[1], 1e-12)
    gradients = [m.reference.vectors.grad for m in (without, shared)]
    assert gradients[0].abs().max() > 1e-5
    close(gradients[0], gradients[1], 1e-9 * gradients[0].abs().max().item())
    size = [
        max(p.grad.abs().max().item() for p in m.positional.parameters())
        for m in (shared, per_class)
    ]
    assert (
        size[0] < 1e-9 * size[1] and size[1] > 1e-5
    )  # with a channel a class there is something to learn


# --------------------------------------------------------------------------------------------------
# Eq. (4)
# --------------------------------------------------------------------------------------------------


def test_gumbel_masks_forward():
    # one-hot along classes, at the argmax of M / tau_1 + noise
    M = torch.randn(2, 4, 3, 5, dtype=torch.float64) * 0.002
    g = noise_of(7, M)
    torch.manual_seed(7)
    masks = gumbel_softmax_masks(M, tau_1=0.001)
    best = (M / 0.001 + g).argmax(1)
    for b, c, y, x in np.ndindex(2, 4, 3, 5):
        assert abs(masks[b, c, y, x].item() - float(c == best[b, y, x])) < 1e-12
    assert not torch.equal(best, M.argmax(1))  # the noise matters at this scale


def test_gumbel_masks_backward():
    # straight-through: d mask_i / d M_j is that of softmax(M / tau_1 + g), p_i (delta_ij - p_j)
    # / tau_1
    M = (torch.randn(2, 4, 3, 5, dtype=torch.float64) * 0.002).requires_grad_()
    g, weight = noise_of(7, M.detach()), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.manual_seed(7)
    (gumbel_softmax_masks(M, tau_1=0.002) * weight).sum().backward()
    e = (M.detach() / 0.002 + g).exp()
    p = e / e.sum(1, keepdim=True)
    expected = torch.zeros_like(p)
    for b, j, y, x in np.ndindex(2, 4, 3, 5):
        expected[b, j, y, x] = sum(
            weight[b, i, y, x] * p[b, i, y, x] * (float(i == j) - p[b, j, y, x]) / 0.002
            for i in range(4)
        )
    close(M.grad, expected)


def test_gumbel_masks_are_samples_of_the_softmax():
    M, draws = torch.tensor([0.0, 0.5, -1.0, 1.5]) * 0.01, 20000
    torch.manual_seed(0)
    masks = gumbel_softmax_masks(M.view(1, 4, 1, 1).expand(1, 4, 100, draws // 100), tau_1=0.01)
    p = np.exp([0.0, 0.5, -1.0, 1.5])
    p = p / p.sum()
    error = np.abs(masks.mean((0, 2, 3)).numpy() - p)
    assert (error < 4 * np.sqrt(p * (1 - p) / draws)).all()  # four standard deviations


# --------------------------------------------------------------------------------------------------
# Image-level labels, Eq. (5)
# --------------------------------------------------------------------------------------------------


def test_image_level_labels():
    similarity = torch.tensor(
        [
            [24.0, 22.0, 23.5, 1.0],  # two pass
            [10.0, 22.0, 21.0, 22.9],  # none passes: the two best
            [23.0, 1.0, 2.0, 3.0],  # equal to the threshold is enough (released): no second one
            [1.0, 2.0, 30.0, 3.0],
        ]
    )  # one passes: no second one is added
    expected = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert image_level_labels(similarity, 23, 2).int().tolist() == expected
    assert image_level_labels(similarity, 99, 7).all()  # top_k above C: all classes
    assert image_level_labels(similarity, 23, 2).dtype == torch.bool


def test_image_labels(make_model, clip):
    # 100 cos between the whole picture and W_q, whatever the logit scale
    model, thumbnails = make_model(), pictures(3, 12, 12)
    similarity = torch.empty(3, 4, dtype=torch.float64)
    for b, c in np.ndindex(3, 4):
        v = clip.encode_image(normalize_pixels(thumbnails[b : b + 1]))[0]
        similarity[b, c] = 100 * (v * model.W_q[c]).sum() / v.square().sum().sqrt()
    close(model.image_similarity(thumbnails), similarity)
    threshold = model.image_similarity(thumbnails).flatten().sort().values[6].item()  # reaches it
    for b in range(3):
        passing = [c for c in range(4) if similarity[b, c] > threshold - 1e-9] or [
            int(similarity[b].argmax())
        ]
        assert model.image_labels(thumbnails, threshold, 1)[b].nonzero()[:, 0].tolist() == passing


def slow_pool(Z, masks, pool):
    B, C, h, w = masks.shape
    pooled = torch.zeros(B, C, Z.shape[1], dtype=Z.dtype)
    for b, c in np.ndindex(B, C):
        area = float(masks[b, c].sum())
        for y, x in np.ndindex(h, w):
            pooled[b, c] += (
                masks[b, c, y, x] * Z[b, :, y, x] / (h * w if pool == "global" else max(area, 1.0))
            )
    return pooled


@pytest.mark.parametrize("pool", ["global", "mask"])
def test_masked_features(pool):
    Z = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    masks = (
        F.one_hot(torch.randint(0, 3, (2, 3, 5)), 4).permute(0, 3, 1, 2).double()
    )  # class 3 has no patch
    pooled = masked_features(Z, masks, pool)
    close(pooled, slow_pool(Z, masks, pool))
    assert pooled[:, 3].abs().max() == 0


def slow_loss(pooled, W_q, labels, tau):
    losses = []
    for b in range(len(pooled)):
        found = [c for c in range(len(W_q)) if labels[b, c]]
        total = 0
        for c in found:
            S = [(pooled[b, c] * W_q[j]).sum() for j in range(len(W_q))]
            total = total - (torch.exp(S[c] / tau) / sum(torch.exp(s / tau) for s in S)).log()
        losses.append(total / len(found))
    return sum(losses) / len(losses)


def test_contrastive_loss():
    # Eq. 5 as printed: only the K classes found count, against all C texts; K differs between
    # the pictures
    pooled, W_q = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([[True, False, True, True], [False, True, False, False]])
    close(contrastive_loss(pooled, W_q, labels, 0.3), slow_loss(pooled, W_q, labels, 0.3))
    changed = pooled.clone()
    changed[0, 1], changed[1, [0, 2, 3]] = 9.0, -9.0
    close(contrastive_loss(changed, W_q, labels, 0.3), contrastive_loss(pooled, W_q, labels, 0.3))


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[True, False, True, True], [False, True, False, False]])


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(pool="mask", tau=0.02, tau_1=0.01, reference_norm="class"),
        dict(subtract=False),
        dict(query_learnable=True),
    ],
)
def test_loss_from_beginning_to_end(make_model, clip, settings):
    # Eq. 1-5 by the loops above, with the same noise
    clip.logit_scale.data.fill_(np.log(1 / 0.05))
    model, images = make_model(**settings).eval(), pictures()
    M, Z = model(images).rectified.detach(), model(images).features
    torch.manual_seed(5)
    loss = loss_of(model, model.features(images), LABELS)
    tau_1, tau = (
        settings.get("tau_1", 0.001),
        settings.get("tau", 0.05),
    )  # tau: 1 / exp(logit scale)
    best = (M / tau_1 + noise_of(5, M)).argmax(1)
    masks = torch.stack([(best == c).double() for c in range(4)], dim=1)
    expected = slow_loss(
        slow_pool(Z, masks, settings.get("pool", "global")), model.W_q, LABELS, tau
    )
    close(loss.detach(), expected, 1e-6)


def test_loss_of_a_batch_is_the_mean_over_pictures(make_model, monkeypatch):
    model, images = make_model().train(), pictures()
    monkeypatch.setattr(
        reclip,
        "gumbel_softmax_masks",  # no noise
        lambda M, tau_1: F.one_hot(M.argmax(1), 4).permute(0, 3, 1, 2).double(),
    )
    single = [
        loss_of(model, model.features(images[i : i + 1]), LABELS[i : i + 1]) for i in range(2)
    ]
    close(loss_of(model, model.features(images), LABELS), (single[0] + single[1]) / 2)
    assert (single[0] - single[1]).abs() > 1e-6


def test_only_what_is_learnt_gets_gradients(make_model):
    model = make_model(tau_1=0.05).train()
    loss_of(model, model.features(pictures()), LABELS).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("clip."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert not model.features(pictures().requires_grad_()).requires_grad
    assert not model.W_q.requires_grad and "W_q" in model.state_dict()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "reference",
        "positional",
    }


@pytest.mark.parametrize(
    "settings, parts",
    [
        (dict(query_learnable=True), {"query", "reference", "positional"}),
        (dict(subtract=False), {"reference", "positional"}),
    ],
)
def test_gradients_of_the_ablations(make_model, settings, parts):
    model = make_model(tau_1=0.05, **settings).train()
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in learnt} == parts
    loss_of(model, model.features(pictures()), LABELS).backward()
    for name, parameter in learnt.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_learnt_query_does_not_move_the_targets(make_model, monkeypatch):
    # Eq. (5) with masks that carry no gradient: nothing is left that the prompts could move
    model = make_model(query_learnable=True).train()
    monkeypatch.setattr(reclip, "gumbel_softmax_masks", lambda M, tau_1: M.detach().softmax(1))
    assert not loss_of(model, model.features(pictures()), LABELS).requires_grad


def fixed_loss(model, images, labels, draws=10):
    """The loss in the mean over the same draws of noise each time."""
    total = 0
    for seed in range(draws):
        torch.manual_seed(seed)
        total += loss_of(model, model.features(images), labels).item() / draws
    return total


@pytest.mark.parametrize("channels", [0, None])  # the prompt alone, and with the positional net
def test_training_lowers_the_loss_and_leaves_clip_alone(make_model, clip, channels):
    model, images = make_model(positional_channels=channels, tau_1=0.1).train(), pictures()
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    W_q, start = model.W_q.clone(), fixed_loss(model, images, LABELS)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=0.01 if channels is None else 0.1, momentum=0.9)
    for step in range(30):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss_of(model, model.features(images), LABELS).backward()
        optimizer.step()
    end = fixed_loss(model, images, LABELS)
    assert end < start - 0.02, (start, end)
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())
    assert torch.equal(model.W_q, W_q)


def test_eval_forgets_after_training(make_model):
    # in eval mode W_r and M_p are computed once: a step in between must show
    model, images = make_model().eval(), pictures()
    old = model(images)
    assert torch.equal(model(images).rectified, old.rectified)
    model.train()
    loss_of(model, model.features(images), LABELS).backward()
    with torch.no_grad():
        for parameter in (model.reference.vectors, *model.positional.parameters()):
            parameter -= 0.1 * parameter.grad.sign()
    new = model.eval()(images)
    W_r = encode_prompted_plain(model.clip, model.reference.vectors, model.reference.endings)
    close(new.reference, torch.einsum("bdhw,cd->bchw", new.features, W_r / W_r.norm()))
    grid = model.clip.visual.positional_grid(4, 5)[0]
    close(new.positional[0], plain_positional(model.positional.state_dict(), grid, False, True))
    assert (
        (new.reference - old.reference).abs().max()
        > 1e-4
        < (new.positional - old.positional).abs().max()
    )


def test_eval_computes_texts_once(make_model, clip, monkeypatch):
    calls, compute, model = [], clip.encode_prompted, make_model().eval()
    monkeypatch.setattr(clip, "encode_prompted", lambda *args: calls.append(1) or compute(*args))
    for _ in range(3):
        model(pictures())
    assert len(calls) == 1
    model.train()(pictures())
    model(pictures())
    assert len(calls) == 3  # in training the prompt moves: each time


def test_each_size_of_picture_has_its_own_positional_logits(make_model):
    model = make_model().eval()
    for size in ((13, 18), (18, 13), (13, 18)):
        h, w = -(-size[0] // 4), -(-size[1] // 4)
        grid = model.clip.visual.positional_grid(h, w)[0]
        close(
            model(pictures(1, *size)).positional[0],
            plain_positional(model.positional.state_dict(), grid, False, True),
        )


def test_eval_uses_running_statistics_and_moves_nothing(make_model):
    model, images = make_model().train(), pictures()
    train = model(images).positional
    moved = model.positional.net[1].running_mean.clone()
    assert moved.abs().max() > 0
    assert (model.eval()(images).positional - train).abs().max() > 1e-3
    assert torch.equal(model.positional.net[1].running_mean, moved)


def test_clip_stays_in_eval_mode(make_model):
    assert not any(m.training for m in make_model().train().clip.modules())


# --------------------------------------------------------------------------------------------------
# The two recipes, and padding
# --------------------------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# How CLIP reads patches under each: activation of its image tower, mean and std of the images.
READINGS = {"cvpr2024": (F.gelu, *IMAGENET), "2025": (quick_gelu, *OPENAI)}


def plain_pixels(image, mean, std, valid=None):
    """(3, H, W) in [0, 1] -> normalized, and 0 outside of valid (H, W)."""
    out = torch.zeros_like(image)
    for color in range(3):
        out[color] = (image[color] - mean[color]) / std[color]
        if valid is not None:
            out[color][~valid] = 0
    return out


def plain_features(state, pixels, gelu):
    """Z of one image (3, H, W) on the small CLIP: its first block, then each patch's own value."""
    h, w = -(-pixels.shape[1] // 4), -(-pixels.shape[2] // 4)
    x = plain_embed(state, pixels, 4, 3)
    x = plain_block(state, "visual.transformer.resblocks.0.", x, gelu=gelu)[0, 1:]     # (n, E_v)

    key = "visual.transformer.resblocks.1."
    _, _, weight = state[key + "attn.in_proj_weight"].chunk(3)
    _, _, bias = state[key + "attn.in_proj_bias"].chunk(3)
    value = layer_norm(state, key + "ln_1.", x) @ weight.T + bias
    x = x + value @ state[key + "attn.out_proj.weight"].T + state[key + "attn.out_proj.bias"]
    x = x + plain_mlp(state, key, layer_norm(state, key + "ln_2.", x), gelu)
    x = layer_norm(state, "visual.ln_post.", x) @ state["visual.proj"]                 # (n, D)
    return (x / x.norm(dim=1, keepdim=True)).T.unflatten(1, (h, w))


def padding(height, width, *sizes):
    """(B, height, width) bool: True in the upper left corner of each image, of its size."""
    valid = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for mask, (rows, columns) in zip(valid, sizes):
        mask[:rows, :columns] = True
    return valid


@pytest.mark.parametrize("recipe", READINGS)
@pytest.mark.parametrize("padded", [False, True])
def test_features_under_a_recipe(make_model, clip, recipe, padded):
    # exact GELU and ImageNet's mean and std, or CLIP's own; padding is 0 after normalization
    model, images = make_model(recipe=recipe), pictures()
    valid = padding(13, 18, (13, 11), (6, 18)) if padded else None
    gelu, mean, std = READINGS[recipe]
    expected = []
    for b in range(2):
        pixels = plain_pixels(images[b], mean, std, valid[b] if padded else None)
        expected.append(plain_features(clip.state_dict(), pixels, gelu))
    close(model.features(images, valid), torch.stack(expected))
    close(model(images, valid).features, torch.stack(expected))


def test_what_the_padding_holds_does_not_matter(make_model):
    for recipe in READINGS:
        model, images = make_model(recipe=recipe), pictures()
        valid = padding(13, 18, (9, 9), (13, 2))
        other = torch.where(valid[:, None], images, pictures() * 9)
        assert torch.equal(model.features(images, valid), model.features(other, valid))
        assert not torch.equal(model.features(images), model.features(other))
        assert torch.equal(model.features(images, torch.ones_like(valid)), model.features(images))


@pytest.mark.parametrize("recipe", READINGS)
def test_padding_is_exactly_0_where_it_enters_clip(make_model, recipe):
    # also where CLIP itself pads 13 x 18 pixels to whole patches, 16 x 20
    model, images, valid = make_model(recipe=recipe), pictures(), padding(13, 18, (5, 18), (13, 7))
    seen = []
    for tower in {model.dense_visual, model.clip.visual}:
        tower.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.features(images, valid)

    (pixels,) = seen
    assert pixels.shape == (2, 3, 16, 20)
    inside = torch.zeros(2, 16, 20, dtype=torch.bool)
    inside[:, :13, :18] = valid
    assert (pixels[(~inside)[:, None].expand_as(pixels)] == 0).all()
    _, mean, std = READINGS[recipe]
    for b in range(2):
        close(pixels[b, :, :13, :18], plain_pixels(images[b], mean, std, valid[b]), 1e-14)


def test_normalize_pixels_of_padded_images():
    images, valid = pictures(), padding(13, 18, (5, 18), (13, 7))
    for mean, std in (IMAGENET, OPENAI):
        expected = torch.stack([plain_pixels(images[b], mean, std, valid[b]) for b in range(2)])
        close(normalize_pixels(images, mean, std, valid), expected, 1e-14)
        close(normalize_pixels(images[1], mean, std, valid[1]), expected[1], 1e-14)


def test_whole_images_are_read_the_same_under_both_recipes(make_model, clip):
    # so are the pseudo-labels: CLIP's own activation, mean and std, as it was trained
    thumbnails, kept = pictures(3, 12, 12), []
    for recipe in READINGS:
        model = make_model(recipe=recipe)
        model.features(pictures())
        kept.append(
            (
                clip.encode_image(thumbnails),
                model.image_similarity(thumbnails),
                model.image_labels(thumbnails, 20, 2),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*kept))

    state = clip.state_dict()
    for b in range(3):
        close(kept[0][0][b], plain_image(state, thumbnails[b], 4, 3, gelu=quick_gelu))
        vector = plain_image(state, plain_pixels(thumbnails[b], *OPENAI), 4, 3, gelu=quick_gelu)
        close(kept[0][1][b], 100 * model.W_q @ (vector / vector.norm()))


def test_texts_are_read_the_same_under_both_recipes(make_model):
    W_q, W_r = make_model(recipe="cvpr2024").heads()
    same_W_q, same_W_r = make_model(recipe="2025").heads()
    assert torch.equal(W_q, same_W_q) and torch.equal(W_r, same_W_r)


def test_the_patch_tower_shares_its_weights(make_model, clip):
    # before and after a move to another type, which makes new tensors; and CLIP stays as it was
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    model = make_model(recipe="cvpr2024")
    for _ in range(2):
        own = dict(model.clip.visual.named_parameters())
        again = dict(model.dense_visual.named_parameters())
        assert own.keys() == again.keys() and len(own) > 20
        assert all(own[key].data_ptr() == again[key].data_ptr() for key in own)
        assert not any(parameter.requires_grad for parameter in again.values())
        model = model.float()
    assert all(torch.equal(value, before[key]) for key, value in clip.double().state_dict().items())

    activations = {type(block.mlp.gelu) for block in model.dense_visual.transformer.resblocks}
    assert activations == {torch.nn.GELU}
    activations = {type(block.mlp.gelu) for block in clip.visual.transformer.resblocks}
    assert activations == {QuickGELU}

    # All parameters, each once: a recipe adds none.
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in make_model(recipe="2025").parameters())


def test_the_patch_tower_is_nothing_that_was_learnt(make_model):
    keys = [list(make_model(recipe=recipe).learnt()) for recipe in READINGS]
    assert keys[0] == keys[1]
    assert {key.split(".")[0] for key in keys[0]} == {"reference", "positional", "W_q"}


def test_a_recipe_that_is_none(make_model):
    with pytest.raises(ValueError, match="recipe is '2024'; it must be one of cvpr2024, 2025"):
        make_model(recipe="2024")


@pytest.mark.parametrize("recipe", READINGS)
def test_a_checkpoint_keeps_its_recipe(make_model, clip, tmp_path, recipe):
    model, images = make_model(recipe=recipe).float().eval(), pictures().float()
    model.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not [key for key in content["learnt"] if key.startswith(("clip.", "dense_visual."))]

    loaded = ReCLIP.load(tmp_path / "model.pt", clip)
    assert loaded.recipe == loaded.settings["recipe"] == recipe
    valid = padding(13, 18, (13, 11), (6, 18))
    for a, b in zip(loaded(images, valid), model(images, valid)):
        assert torch.equal(a, b)

    # asked for by its own name or by none, and under no other
    path = tmp_path / "model.pt"
    for asked in (None, recipe):
        assert reclip.open_rectification(path, CLASSES, clip, asked).recipe == recipe
    (other,) = READINGS.keys() - {recipe}
    with pytest.raises(ValueError, match=f"was learnt under the recipe {recipe} ") as caught:
        reclip.open_rectification(path, CLASSES, clip, other)
    assert "\n" not in str(caught.value) and f"such as {other}" in str(caught.value)
    assert "model.pt" in str(caught.value)
    assert "--" not in str(caught.value)


def test_checkpoints_from_before_the_recipes(make_model, clip, tmp_path):
    # they ran CLIP as it was trained, which is 2025's way
    model, images = make_model(recipe="2025").float().eval(), pictures().float()
    model.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("recipe", "cut_names"):
        del content["settings"][name]
    del content["released"]
    torch.save(content, tmp_path / "model.pt")
    loaded = ReCLIP.load(tmp_path / "model.pt", clip)
    assert loaded.recipe == "2025" and loaded.settings == model.settings
    assert torch.equal(loaded(images).rectified, model(images).rectified)


# --------------------------------------------------------------------------------------------------
# Saving and loading
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(clip, merges, tmp_path):
    """A trained-looking model on a CLIP from a file, saved: (path, model)."""
    torch.save({"state_dict": clip.state_dict(), "merges": merges}, tmp_path / "clip.pt")
    model = ReCLIP(
        load_clip(tmp_path / "clip.pt"),
        ["cat | dog", "grass", "tree"],
        prompt_length=5,
        tau=0.03,
        reference_norm="class",
        positional_channels=1,
        positional_last_relu=False,
        tau_1=0.01,
        pool="mask",
        positional_gain=0.3,
        W_q=F.normalize(torch.randn(3, 12), dim=-1),
    )
    model.reference.vectors.data += 0.1 * torch.randn_like(model.reference.vectors)
    model.train()(pictures().float())  # moves the running statistics
    model.save(tmp_path / "model.pt")
    return tmp_path / "model.pt", model.eval()


@pytest.mark.parametrize("given", [False, True])
def test_save_and_load(saved, given):
    path, model = saved
    loaded, images = ReCLIP.load(path, model.clip if given else None), pictures().float()
    assert not loaded.training and loaded.class_names == model.class_names
    assert (loaded.tau, loaded.tau_1, loaded.pool, loaded.settings) == (
        0.03,
        0.01,
        "mask",
        model.settings,
    )
    assert loaded.settings["positional_gain"] == 0.3 and loaded.settings["prompt_length"] == 5
    for a, b in zip(loaded(images), model(images)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        dict(attention="naclip"),
        dict(query_learnable=True, positional_channels=0),
        dict(subtract=False),
        dict(prompt_per_class=True),
        dict(prompt_per_class=True, query_learnable=True),
    ],
)
def test_save_and_load_of_the_ablations(make_model, clip, tmp_path, settings):
    model, images = make_model(**settings).float(), pictures().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.eval().save(tmp_path / "model.pt")
    loaded = ReCLIP.load(tmp_path / "model.pt", clip)
    assert loaded.settings == model.settings and settings.items() <= loaded.settings.items()
    for a, b in zip(loaded(images), model(images)):
        assert torch.equal(a, b)


def test_settings_name_each_argument(make_model):
    # a new argument of the constructor that save forgot would be lost on the way
    arguments = {
        name for name, p in inspect.signature(ReCLIP).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    assert make_model().settings.keys() == arguments - {"W_q"}


def test_checkpoint_from_before_the_ablations(saved):
    path, model = saved
    content = torch.load(path, weights_only=True)
    for name in ("attention", "query_learnable", "subtract", "prompt_per_class", "prompts"):
        del content["settings"][name]
    torch.save(content, path)
    loaded, images = ReCLIP.load(path, model.clip), pictures().float()
    assert loaded.prompts == PROMPTS
    loaded.settings["prompts"] = model.settings["prompts"]  # these are not known any more
    assert loaded.settings == model.settings and loaded.attention == "maskclip"
    assert loaded.reference.vectors.shape == (5, 128)  # the shared prompt
    assert torch.equal(loaded(images).rectified, model(images).rectified)


def test_files_with_the_constant_bias_of_earlier_versions(saved):
    # False: dropped. True: a control that is no ReCLIP, refused in one sentence
    path, model = saved
    content = torch.load(path, weights_only=True)
    content["settings"]["constant_bias"] = False
    torch.save(content, path)
    assert ReCLIP.load(path, model.clip).settings == model.settings
    content["settings"]["constant_bias"] = True
    torch.save(content, path)
    with pytest.raises(ValueError, match="one number per class.*extras/paper.py") as caught:
        ReCLIP.load(path, model.clip)
    assert "\n" not in str(caught.value)


def test_cached_texts_follow_a_move(make_model):
    # a model that has run in eval mode keeps W_r and M_p; .float() and .double() must not leave
    # them
    model, images = make_model().eval(), pictures()
    before = model(images)
    after = model.float()(images.float())
    assert after.rectified.dtype == torch.float32
    close(after.rectified.double(), before.rectified, 1e-5)
    close(model.double()(images).reference, before.reference, 1e-5)


def test_cached_texts_follow_loaded_weights(make_model):
    model, other = make_model().eval(), make_model(seed=1).eval()
    images = pictures()
    model(images)
    model.load_state_dict(other.state_dict())
    close(model(images).rectified, other(images).rectified)


def test_a_model_can_be_pickled(make_model):
    model, images = make_model().eval(), pictures()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images).rectified, model(images).rectified)


def test_uint8_images_are_refused(make_model):
    with pytest.raises(ValueError, match=r"float.*\[0, 1\]") as caught:
        make_model()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def test_segment_refuses_a_batch():
    with pytest.raises(ValueError, match=r"one image, \(1, C, h, w\), not 2"):
        reclip.segment(torch.zeros(2, 3, 4, 4), 4, (16, 16), (16, 16))


def test_prompts_that_do_not_fit_say_what_to_do(make_clip):
    clip = make_clip(context=10)
    with pytest.raises(ValueError, match="shorten it or its template") as caught:
        ReCLIP(clip, ["cat", "dog"])
    assert "\n" not in str(caught.value)


def test_saved_file_holds_no_clip(saved):
    path, model = saved
    content = torch.load(path, weights_only=True)
    assert not any(key.startswith("clip") for key in content["learnt"])
    assert {"W_q", "reference.vectors"} <= content["learnt"].keys()


def test_another_clip_is_refused(saved, make_clip):
    path, _ = saved
    with pytest.raises(ValueError, match="another CLIP"):
        ReCLIP.load(path, make_clip(seed=1))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_truncated_model(saved, share):
    path, model = saved
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="model.pt") as caught:
        ReCLIP.load(path, model.clip)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickled without care, it runs a shell command."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def test_hostile_model_runs_nothing(saved):
    path, model = saved
    sentinel = path.with_name("sentinel")
    torch.save({"learnt": Hostile(sentinel)}, path)
    pickle.loads(pickle.dumps(Hostile(sentinel)))
    assert sentinel.exists()  # the payload works
    sentinel.unlink()
    with pytest.raises(ValueError, match="model.pt"):
        ReCLIP.load(path, model.clip)
    assert not sentinel.exists()


def test_files_that_hold_no_model(saved, tmp_path):
    torch.save({"learnt": {}, "class_names": ["a"]}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        ReCLIP.load(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        ReCLIP.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    "classes, settings, word",
    [
        (["cat", "dog", "cat"], {}, "'cat', 'dog', 'cat'"),
        (["cat"], {}, "two or more"),
        (["cat", "dog"], {"pool": "max"}, "max"),
        (["cat", "dog"], {"reference_norm": "rows"}, "rows"),
        (["cat", "dog"], {"attention": "naklip"}, "naklip.*maskclip, sclip, clearclip, naclip"),
        (["cat", "dog"], {"query_learnable": True, "prompt_length": 0}, "prompt_length"),
    ],
)
def test_unfit_arguments(clip, classes, settings, word):
    with pytest.raises(ValueError, match=word):
        ReCLIP(clip, classes, W_q=torch.zeros(len(classes), 12), **settings)


def test_a_clip_of_exact_gelu_is_loaded_as_such(make_clip, merges, tmp_path):
    # LAION's CLIPs: the file does not tell, so the checkpoint must
    torch.save(
        {"state_dict": make_clip().state_dict(), "merges": [list(pair) for pair in merges]},
        tmp_path / "c.pt",
    )
    clip = load_clip(tmp_path / "c.pt", quick_gelu=False)
    model = ReCLIP(clip, ["cat", "dog"], prompts=["a {}"]).eval()
    model.save(tmp_path / "r.pt")
    images = torch.rand(1, 3, 8, 12)
    assert torch.equal(ReCLIP.load(tmp_path / "r.pt")(images).rectified, model(images).rectified)
    quick = ReCLIP(load_clip(tmp_path / "c.pt"), ["cat", "dog"], prompts=["a {}"]).eval()
    assert not torch.equal(quick(images).query, model(images).query)


def test_a_learnable_query_has_a_prompt_per_class_too(clip):
    model = ReCLIP(
        clip, ["cat", "dog", "tree"], W_q=torch.eye(3, 12), prompt_length=5, prompt_per_class=True,
        query_learnable=True, positional_channels=0,
    )
    before, _ = model.heads()
    model.query.vectors.data[1] += 0.1 * torch.randn(5, 128)
    after, _ = model.heads()
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, False, True]


@pytest.mark.parametrize("options, words", [
    ({"prompts": "a photo of a {}."}, "prompts must be a list of templates"),
    ({"prompts": []}, "prompts must be a list of templates"),
    ({"tau_1": 0.0}, "temperatures must be above 0"),
    ({"tau": -1.0}, "temperatures must be above 0"),
])
def test_prompts_and_temperatures_are_checked(clip, options, words):
    with pytest.raises(ValueError, match=words):
        ReCLIP(clip, ["cat", "dog"], W_q=torch.eye(2, 12), **options)


def test_a_mask_of_bytes_has_room_for_255_classes():
    assert segment(torch.zeros(1, 255, 2, 2), 8, (16, 16), (16, 16)).shape == (16, 16)
    with pytest.raises(ValueError, match="room for 255 classes, not 256"):
        segment(torch.zeros(1, 256, 2, 2), 8, (16, 16), (16, 16))
