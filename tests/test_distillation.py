"""Eq. (6)-(8) against literal loops; what each loss moves and what it leaves alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from deeplab import DeepLabV2
from reclip import (
    IGNORE,
    ReCLIP,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    text_guided_loss,
)

CLASSES = ["cat", "dog", "grass", "tree"]
C, D, PATCH, STRIDE = 4, 12, 4, 4
SIZE = (13, 18)  # of the pictures: not square, no multiple of patch or stride
WHOLE = torch.ones(2, *SIZE, dtype=torch.bool)  # two pictures without padding


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def enlarge(stride):
    """What CLIP.to_pixels and DeepLabV2.to_pixels do, for any stride (each is tested where it
    stands).
    """

    def to_pixels(grid, H, W):
        size = [side * stride for side in grid.shape[-2:]]
        return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[..., :H, :W]

    return to_pixels


@pytest.fixture
def teacher(clip):
    torch.manual_seed(0)
    W_q = F.normalize(torch.randn(C, D), dim=-1)
    return ReCLIP(clip, CLASSES, W_q=W_q, prompt_length=6, positional_gain=0.03).double().eval()


@pytest.fixture
def student(teacher):
    torch.manual_seed(1)
    W_r = F.normalize(torch.randn(C, D, dtype=torch.float64), dim=-1) / 2
    return DeepLabV2(CLASSES, teacher.W_q, W_r, student="tiny").double().train()


@pytest.fixture
def pictures():
    return torch.rand(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels():
    return torch.tensor([[True, False, True, False], [False, True, False, False]])


@pytest.fixture
def valid():
    """One picture was 9 rows high, the other 11 columns wide: 9 * 18 + 13 * 11 pixels of them."""
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[0, :9] = True
    mask[1, :, :11] = True
    return mask


def random_grid(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


# -- Eq. (6) ---------------------------------------------------------------------------------------


def test_mask_guided_loss_is_the_literal_formula():
    grid, (H, W), tau = random_grid(2, C, 4, 5), SIZE, 0.07
    pseudo = torch.randint(C, (2, H, W))
    M, want = enlarge(STRIDE)(grid, H, W).tolist(), 0
    for b in range(2):
        for i in range(H):
            for j in range(W):
                e = [math.exp(M[b][c][i][j] / tau) for c in range(C)]
                want -= math.log(e[pseudo[b, i, j]] / sum(e)) / (H * W) / 2
    close(
        mask_guided_loss(grid, pseudo, tau, enlarge(STRIDE)),
        torch.tensor(want, dtype=torch.float64),
        1e-11,
    )


def test_mask_guided_loss_in_pieces_equals_the_whole():
    grid, pseudo = random_grid(3, C, 4, 5), torch.randint(C, (3, *SIZE))
    whole = F.cross_entropy(enlarge(STRIDE)(grid, *SIZE) / 0.07, pseudo)
    pieces = mask_guided_loss(grid, pseudo, 0.07, enlarge(STRIDE), max_numbers=1)
    close(pieces, whole)
    close(*(torch.autograd.grad(loss, grid)[0] for loss in (pieces, whole)), 1e-10)


@pytest.mark.parametrize("max_numbers", [1, 2**25])  # a picture at a time; both at once
def test_padded_pixels_carry_no_label(valid, max_numbers):
    # the mean over the pixels of both pictures, not over all, and not of the pictures' means
    grid, (H, W), tau = random_grid(2, C, 4, 5), SIZE, 0.07
    pseudo = torch.randint(C, (2, H, W))
    M, want, count = enlarge(STRIDE)(grid, H, W), 0, 0
    for b in range(2):
        for i in range(H):
            for j in range(W):
                if valid[b, i, j]:
                    e = (M[b, :, i, j] / tau).exp()
                    want -= (e[pseudo[b, i, j]] / e.sum()).log()
                    count += 1
    want = want / count
    assert count == 9 * 18 + 13 * 11
    pseudo[~valid] = IGNORE
    loss = mask_guided_loss(grid, pseudo, tau, enlarge(STRIDE), max_numbers=max_numbers)
    close(loss, want, 1e-11)
    close(*(torch.autograd.grad(value, grid)[0] for value in (loss, want)), 1e-11)


# -- Eq. (7) ---------------------------------------------------------------------------------------


def test_feature_guided_loss_is_the_literal_formula():
    Z, own, (H, W) = random_grid(2, 3, 2, 3), random_grid(2, 3, 4, 5, seed=1), SIZE
    a, b = enlarge(8)(Z, H, W).tolist(), enlarge(4)(own, H, W).tolist()
    want = sum(
        abs(a[n][d][i][j] - b[n][d][i][j])
        for n in range(2)
        for d in range(3)
        for i in range(H)
        for j in range(W)
    ) / (2 * H * W)
    close(
        feature_guided_loss(Z, own, WHOLE, enlarge(8), enlarge(4)),
        torch.tensor(want, dtype=torch.float64),
    )


@pytest.mark.parametrize("channels", [1, 5, 12])  # a piece: 12 pieces; 5 + 5 + 2; all at once
def test_feature_guided_loss_in_pieces_equals_the_whole(channels):
    Z, own = random_grid(2, D, 2, 3), random_grid(2, D, 4, 5, seed=1)
    whole = D * F.l1_loss(enlarge(8)(Z, *SIZE), enlarge(4)(own, *SIZE))
    pieces = feature_guided_loss(
        Z, own, WHOLE, enlarge(8), enlarge(4), max_numbers=channels * 2 * SIZE[0] * SIZE[1]
    )
    close(pieces, whole)
    for tensor in (Z, own):
        close(
            *(torch.autograd.grad(loss, tensor, retain_graph=True)[0] for loss in (pieces, whole)),
            1e-10,
        )


@pytest.mark.parametrize("channels", [1, 2, 3])  # a piece: 3 pieces; 2 + 1; all at once
def test_padded_pixels_have_no_features_to_learn(valid, channels):
    # summed over channels, the mean over the pixels of both pictures; gradients of both sides
    Z, own, (H, W) = random_grid(2, 3, 2, 3), random_grid(2, 3, 4, 5, seed=1), SIZE
    a, b, want, count = enlarge(8)(Z, H, W), enlarge(4)(own, H, W), 0, 0
    for n in range(2):
        for i in range(H):
            for j in range(W):
                if valid[n, i, j]:
                    want += sum((a[n, d, i, j] - b[n, d, i, j]).abs() for d in range(3))
                    count += 1
    want = want / count
    loss = feature_guided_loss(
        Z, own, valid, enlarge(8), enlarge(4), max_numbers=channels * valid.numel()
    )
    close(loss, want, 1e-12)
    for tensor in (Z, own):
        gradients = [
            torch.autograd.grad(value, tensor, retain_graph=True)[0] for value in (loss, want)
        ]
        close(*gradients, 1e-12)


def test_no_map_of_the_pictures_size_waits_for_backward():
    Z, own, kept = random_grid(2, D, 4, 4), random_grid(2, D, 8, 8, seed=1), []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel() if x.is_floating_point() else 0) or x, lambda x: x
    )
    with keep:
        everywhere = torch.ones(2, 64, 64, dtype=torch.bool)
        feature_guided_loss(Z, own, everywhere, enlarge(16), enlarge(8), max_numbers=1)
        mask_guided_loss(
            own[:, :C], torch.zeros(2, 64, 64, dtype=torch.int64), 1.0, enlarge(8), max_numbers=1
        )
    assert max(kept) < 64 * 64
    with keep:
        F.l1_loss(enlarge(16)(Z, 64, 64), enlarge(8)(own, 64, 64))
    assert (
        max(kept) >= D * 64 * 64
    )  # the plain formula does keep them: the hook sees what it should


# -- text-guided -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["global", "mask"])
def test_text_guided_loss_is_the_literal_formula(labels, pool):
    M, Z = random_grid(2, C, 4, 5), F.normalize(random_grid(2, D, 4, 5, seed=1), dim=1)
    W_q, tau_1, tau = F.normalize(random_grid(C, D, seed=2), dim=1), 0.5, 0.1
    torch.manual_seed(7)
    masks = gumbel_softmax_masks(M, tau_1)
    torch.manual_seed(7)
    loss = text_guided_loss(M, Z, W_q, labels, tau_1, tau, pool)
    want = 0
    for b in range(2):
        classes = labels[b].nonzero()[:, 0].tolist()
        for k in classes:
            cells = [(i, j) for i in range(4) for j in range(5) if masks[b, k, i, j] > 0.5]
            total = sum((Z[b, :, i, j] for i, j in cells), torch.zeros(D, dtype=torch.float64))
            S = [
                (total / (20 if pool == "global" else max(1, len(cells)))) @ W_q[j]
                for j in range(C)
            ]
            e = [torch.exp(s / tau) for s in S]
            want -= torch.log(e[k] / sum(e)) / len(classes) / 2
    close(loss, want, 1e-11)


@pytest.mark.parametrize("through", ["masks", "features"])
def test_text_guided_loss_reaches_the_student_both_ways(student, pictures, labels, through):
    own = student(pictures)
    logits, Z = own.rectified, own.features
    logits, Z = (logits, Z.detach()) if through == "masks" else (logits.detach(), Z)
    text_guided_loss(logits, Z, student.W_q, labels, 0.05, 0.05).backward()
    assert all(branch.weight.grad.abs().sum() > 0 for branch in student.aspp.branches)


# -- Eq. (8) ---------------------------------------------------------------------------------------


def parts(teacher, student, pictures, labels, valid=WHOLE):
    """The three losses from first principles: each network is fed its own normalisation of the
    same pictures.
    """

    def normalised(mean, std):
        mean, std = (torch.tensor(values).double()[:, None, None] for values in (mean, std))
        return (pictures - mean) / std * valid[:, None]

    x = student.backbone(normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own = student.rectify(F.normalize(student.aspp(x), dim=1))
    with torch.no_grad():
        Z = F.normalize(
            teacher.clip.encode_image_dense(
                normalised(
                    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
                )
            ),
            dim=1,
        )
        pseudo = enlarge(PATCH)(teacher.rectify(Z).rectified, *SIZE).argmax(1)
        pseudo[~valid] = IGNORE
    return (
        mask_guided_loss(own.rectified, pseudo, teacher.tau, enlarge(STRIDE)),
        feature_guided_loss(Z, own.features, valid, enlarge(PATCH), enlarge(STRIDE)),
        text_guided_loss(
            own.rectified,
            own.features,
            teacher.W_q,
            labels,
            teacher.tau_1,
            teacher.tau,
            teacher.pool,
        ),
    )


def one_step(teacher, student, images, labels, alpha=0.5, beta=0.5, valid=WHOLE):
    """Eq. (6)-(8) as train_distillation spells them out."""
    size = images.shape[2:]
    with torch.no_grad():
        guide = teacher(images, valid)
        pseudo_labels = teacher.to_pixels(guide.rectified, *size).argmax(1)
        pseudo_labels = pseudo_labels.masked_fill(~valid, IGNORE)
    own = student(images, valid)
    mask = mask_guided_loss(own.rectified, pseudo_labels, teacher.tau, student.to_pixels)
    feature = feature_guided_loss(
        guide.features, own.features, valid, teacher.to_pixels, student.to_pixels
    )
    text = text_guided_loss(
        own.rectified, own.features, teacher.W_q, labels, teacher.tau_1, teacher.tau, teacher.pool
    )
    return distillation_loss(mask, feature, text, alpha, beta)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (0, 0), (0.5, 0), (0, 2)])
def test_distillation_loss_is_the_weighted_sum(
    teacher, student, pictures, labels, valid, alpha, beta, padded
):
    where = valid if padded else WHOLE
    torch.manual_seed(3)
    mask, feature, text = parts(teacher, student, pictures, labels, where)
    torch.manual_seed(3)
    loss = one_step(teacher, student, pictures, labels, alpha, beta, where)
    close(
        loss, mask + alpha * feature + beta * text, 1e-6
    )  # new_tensor and tensor round the means apart


def test_defaults_are_the_papers():
    assert distillation_loss(1.0, 10.0, 100.0) == 1 + 0.5 * 10 + 0.5 * 100


@pytest.mark.parametrize("term", [0, 1, 2], ids=["mask", "feature", "text"])
def test_each_loss_alone_moves_the_students_backbone(teacher, student, pictures, labels, term):
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    parts(teacher, student, pictures, labels)[term].backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    stuck = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert not stuck, stuck


def test_only_the_student_learns(teacher, student, pictures, labels):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    W_q, W_r = student.W_q.clone(), student.W_r.clone()
    optimiser = torch.optim.SGD([*student.parameters(), *teacher.parameters()], 0.1, momentum=0.9)
    for _ in range(2):
        optimiser.zero_grad()
        one_step(teacher, student, pictures, labels).backward()
        optimiser.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert torch.equal(student.W_q, W_q) and torch.equal(student.W_r, W_r)


def test_losses_under_autocast_are_in_full_precision(teacher, student, pictures, labels):
    teacher, student, pictures = teacher.float().eval(), student.float(), pictures.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = one_step(teacher, student, pictures, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and math.isfinite(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())

    # A sum would be in fp32 for one such term: so the term that must be is looked at by itself.
    own = student(pictures)
    texts = (teacher.W_q, labels, teacher.tau_1, teacher.tau, teacher.pool)
    torch.manual_seed(0)
    outside = text_guided_loss(own.rectified, own.features, *texts)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = text_guided_loss(own.rectified, own.features, *texts)
    assert torch.equal(inside, outside)
