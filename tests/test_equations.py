"""The paper's equations, in its order: each against what it says, computed number by number.

Read it beside Sec. 3 of the paper. A test computes a few numbers with loops over classes, patches
and pixels, as slowly as the equation is written, and asks reclip.py for the same. The two encoders
of CLIP come from reference.py. Sizes differ from each other (B = 2, C = 4, D = 5; h = 3, w = 6),
so that no two axes can be mistaken.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import reference
from conftest import close
from eval import confusion_matrix, scores
from reclip import (
    IGNORE,
    PositionalBias,
    ReferencePrompt,
    bias_logits,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    image_level_labels,
    mask_guided_loss,
    masked_features,
    query_text_features,
    rectify_logits,
    segment,
    segmentation_logits,
    strong_classes,
    text_guided_loss,
)

B, C, D, h, w = 2, 4, 5, 3, 6


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape):
    """Vectors of length 1 along the second axis, as Z and the texts are."""
    return F.normalize(numbers(*shape), dim=1)


def one_class_each(classes):
    """(B, h, w) class numbers -> masks (B, C, h, w)."""
    return torch.stack([(classes == c).double() for c in range(C)], dim=1)


# Image 0 holds classes 0, 2 and 3; image 1 holds class 1.
LABELS = torch.tensor([[True, False, True, True], [False, True, False, False]])


# --- Sec. 3.1: directly segment with CLIP ---------------------------------------------------------

@pytest.mark.parametrize("recipe, colors, gelu", [
    ("2025", reference.CLIP_COLORS, reference.quick_gelu),
    ("cvpr2024", reference.IMAGENET_COLORS, reference.exact_gelu),
])
def test_Z_is_the_vector_of_each_patch_at_length_1(make_model, clip, recipe, colors, gelu):
    images = torch.rand(2, 3, 13, 18, dtype=torch.float64)  # 4 x 5 patches of 4 pixels, cut off
    valid = torch.ones(2, 13, 18, dtype=torch.bool)
    valid[1, 6:] = False                                    # image 1 was padded below row 6

    Z = make_model(recipe=recipe).features(images, valid)

    for b in range(2):
        pixels = reference.normalized(images[b], colors, valid[b])
        vectors = reference.patch_vectors(clip.state_dict(), pixels, gelu)
        close(Z[b], vectors / vectors.square().sum(0).sqrt())


def test_W_q_is_the_mean_of_all_prompts_and_synonyms(clip):
    clip = clip.double()
    names = ["cat", "dog | tree", "grass in the scene"]
    prompts = ["a photo of a {}.", "the {}", "{} in the scene"]

    W_q = query_text_features(clip, names, prompts)

    for name, row in zip(names, W_q):
        total = 0
        for synonym, prompt in product(name.split(" | "), prompts):
            text = prompt.replace("{}", synonym)
            ids = [clip.sot, *clip.tokenizer.encode(text), clip.eot]
            vector = reference.text_vector(clip.state_dict(), ids)
            total = total + vector / vector.norm()
        close(row, total / total.norm())


def test_M_q_is_the_cosine_of_each_patch_with_each_text():
    Z, W_q = unit(B, D, h, w), unit(C, D)

    M_q = segmentation_logits(Z, W_q)

    assert M_q.shape == (B, C, h, w)
    for b, c, y, x in product(range(B), range(C), range(h), range(w)):
        cosine = sum(Z[b, d, y, x] * W_q[c, d] for d in range(D))
        close(M_q[b, c, y, x], cosine)


# --- Sec. 3.2: Eq. (1) ----------------------------------------------------------------------------

@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("norm", ["frobenius", "class"])
def test_equation_1_a_learnt_prompt_before_each_class_name(clip, norm, per_class):
    clip = clip.double()
    names = ["cat", "dog in scene", "grass of | tree", "this photo of the"]  # the first synonym
    read = ["cat", "dog in scene", "grass of", "this photo of the"]          # 1, 3, 2, 4 tokens
    L = 5
    part = ReferencePrompt(clip, names, L, norm, per_class).double()
    with torch.no_grad():
        part.vectors += 0.1 * torch.randn_like(part.vectors)

    W_r = part(clip)

    rows = []
    for c, name in enumerate(read):
        v = part.vectors[c] if per_class else part.vectors                  # (L, E_t): v_1 .. v_L
        assert v.shape == (L, 128)
        ending = [*clip.tokenizer.encode(name), clip.eot]
        rows.append(reference.prompted_vector(clip.state_dict(), v, ending))

    # The whole matrix has length 1, or each of its rows.
    expected = torch.stack(rows)
    if norm == "frobenius":
        expected = expected / math.sqrt(sum(number ** 2 for number in expected.flatten().tolist()))
    else:
        expected = torch.stack([row / row.norm() for row in expected])
    close(W_r, expected)


@pytest.mark.parametrize("context, tokens_of_name, wanted, L", [
    (77, 2, 73, 73),   # Sec. 3.2: 77 = start + 73 + two for the name + end
    (77, 4, 73, 71),   # a longer name: the prompt is shortened
    (77, 1, 73, 73),
    (60, 4, 73, 54),
    (10, 3, 9, 5),
])
def test_start_prompt_name_and_end_fit_into_a_text(make_clip, context, tokens_of_name, wanted, L):
    clip = make_clip(context=context)
    name = " ".join("dog in the scene".split()[:tokens_of_name])

    part = ReferencePrompt(clip, ["cat", name], wanted)

    assert part.vectors.shape == (L, 128)
    assert part(clip).shape == (2, 12)


# --- Sec. 3.3: the positional net -----------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels, last_relu", [(1, True), (C, True), (C, False)])
def test_M_p_is_three_convolutions_of_the_positional_embedding(
    clip, channels, last_relu, training
):
    part = PositionalBias(128, channels, last_relu, gain=0.3).double()
    for name, value in part.state_dict().items():  # nothing at its start
        if value.ndim == 1:
            positive = "weight" in name or "var" in name
            value.copy_(torch.rand_like(value) + (0.5 if positive else -0.5))
    p = reference.positional_table(clip.state_dict(), h, w).double()
    expected = reference.positional_map(part.state_dict(), p, training, last_relu, 0.3)

    M_p = part.train(training)(clip.visual.positional_grid(h, w).double())

    assert M_p.shape == (1, channels, h, w) and M_p.std() > 0
    close(M_p[0], expected)
    assert (M_p >= 0).all() == last_relu


# --- Sec. 3.4: Eq. (2) and (3) --------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, C])
def test_equations_2_and_3_the_bias_is_subtracted(channels):
    M_q, M_r, M_p = numbers(B, C, h, w), numbers(B, C, h, w), numbers(1, channels, h, w)

    M_b = bias_logits(M_r, M_p)
    M = rectify_logits(M_q, M_b)
    plus = rectify_logits(M_q, M_b, subtract=False)         # Table 5

    for b, c, y, x in product(range(B), range(C), range(h), range(w)):
        bias = M_r[b, c, y, x] + M_p[0, c if channels == C else 0, y, x]
        close(M_b[b, c, y, x], bias)
        close(M[b, c, y, x], M_q[b, c, y, x] - bias)
        close(plus[b, c, y, x], M_q[b, c, y, x] + bias)


def test_a_bias_that_all_classes_share_changes_no_mask_and_learns_nothing():
    # Eq. (2) as printed, with n x 1 positional logits: the same for each class of a patch.
    M_q = numbers(B, C, h, w)
    M_p = (10 * numbers(1, 1, h, w)).requires_grad_()

    M = rectify_logits(M_q, M_p.expand(B, C, h, w))
    (M.softmax(1) * numbers(B, C, h, w)).sum().backward()

    assert torch.equal(M.argmax(1), M_q.argmax(1))
    close(M_p.grad, torch.zeros(1, 1, h, w, dtype=torch.float64))


# --- Eq. (4) --------------------------------------------------------------------------------------

def test_equation_4_each_patch_takes_the_class_of_its_largest_noisy_logit():
    M, tau_1 = 0.002 * numbers(B, C, h, w), 0.001
    noise = reference.gumbel_noise(7, M.shape)

    torch.manual_seed(7)
    masks = gumbel_softmax_masks(M, tau_1)

    differs = 0
    for b, y, x in product(range(B), range(h), range(w)):
        noisy = [M[b, c, y, x] / tau_1 + noise[b, c, y, x] for c in range(C)]
        best = noisy.index(max(noisy))
        close(masks[b, :, y, x], torch.eye(C, dtype=torch.float64)[best])
        differs += best != M[b, :, y, x].argmax()
    assert 0 < differs < B * h * w  # the noise decides some patches, and not all


def test_equation_4_has_the_gradient_of_the_softmax_of_the_noisy_logits():
    M, tau_1 = 0.002 * numbers(B, C, h, w), 0.002
    noise, weight = reference.gumbel_noise(7, M.shape), numbers(B, C, h, w)
    leaf = M.clone().requires_grad_()

    torch.manual_seed(7)
    (gumbel_softmax_masks(leaf, tau_1) * weight).sum().backward()

    for b, y, x in product(range(B), range(h), range(w)):
        e = [math.exp(M[b, c, y, x] / tau_1 + noise[b, c, y, x]) for c in range(C)]
        p = [number / sum(e) for number in e]
        for j in range(C):
            slopes = [p[i] * ((i == j) - p[j]) / tau_1 for i in range(C)]   # d p_i / d M_j
            total = sum(weight[b, i, y, x] * slopes[i] for i in range(C))
            close(leaf.grad[b, j, y, x], total, 1e-8)


def test_equation_4_draws_each_class_as_often_as_its_softmax_says():
    M, draws = torch.tensor([0.0, 0.005, -0.01, 0.015]), 20000
    grid = M.view(1, 4, 1, 1).expand(1, 4, 100, draws // 100)

    share = gumbel_softmax_masks(grid, tau_1=0.01).mean((0, 2, 3))

    p = (M / 0.01).softmax(0)
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((share - p).abs() < 4 * deviation).all()


# --- Which classes does an image hold? ------------------------------------------------------------

def test_classes_above_the_threshold_or_else_the_best_are_found():
    similarity = torch.tensor([
        [24.0, 22.0, 23.5, 1.0],   # two reach it
        [10.0, 22.0, 21.0, 22.9],  # none does: the best two
        [23.0, 1.0, 2.0, 3.0],     # exactly the threshold: found, and no second one is added
    ])

    labels = image_level_labels(similarity, threshold=23.0, top_k=2)

    assert labels.tolist() == [
        [True, False, True, False],
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert image_level_labels(similarity, threshold=99.0, top_k=7).all()  # 7 of 4: all


def test_the_similarity_is_100_cosines_of_the_whole_image_under_either_recipe(make_model, clip):
    thumbnails = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    clip.logit_scale.fill_(2.0)  # does not matter here

    for recipe in ("cvpr2024", "2025"):
        model = make_model(recipe=recipe)
        similarity = model.image_similarity(thumbnails)

        for b in range(3):
            pixels = reference.normalized(thumbnails[b])
            vector = reference.image_vector(clip.state_dict(), pixels)
            for c in range(4):
                close(similarity[b, c], 100 * (vector @ model.W_q[c]) / vector.norm())
        threshold = similarity.median().item()
        labels = model.image_labels(thumbnails, threshold, top_k=1)
        assert torch.equal(labels, image_level_labels(similarity, threshold, 1))


# --- Eq. (5) --------------------------------------------------------------------------------------

def test_pooled_features_are_sums_under_each_mask_over_all_patches():
    Z = unit(B, D, h, w)
    classes = torch.randint(0, C - 1, (B, h, w))            # nothing falls to the last class

    pooled = masked_features(Z, one_class_each(classes))

    for b, c, d in product(range(B), range(C), range(D)):
        under = [Z[b, d, y, x] for y in range(h) for x in range(w) if classes[b, y, x] == c]
        close(pooled[b, c, d], torch.as_tensor(sum(under) / (h * w), dtype=torch.float64))
    assert not pooled[:, C - 1].any()


def test_equation_5_each_class_that_was_found_against_all_texts():
    pooled, W_q, tau = numbers(B, C, D), unit(C, D), 0.3

    loss = contrastive_loss(pooled, W_q, LABELS, tau)

    losses = []
    for b in range(B):
        found = [c for c in range(C) if LABELS[b, c]]       # c_1 .. c_K
        total = 0
        for k in found:
            S = [sum(pooled[b, k, d] * W_q[j, d] for d in range(D)) for j in range(C)]
            e = [math.exp(S[j] / tau) for j in range(C)]
            total -= math.log(e[k] / sum(e))
        losses.append(total / len(found))
    assert loss.item() == pytest.approx(sum(losses) / B)


def test_equation_5_does_not_look_under_masks_of_absent_classes():
    pooled, W_q = numbers(B, C, D), unit(C, D)
    other = torch.where(LABELS[:, :, None], pooled, 9.0)

    close(contrastive_loss(other, W_q, LABELS, 0.3), contrastive_loss(pooled, W_q, LABELS, 0.3))


def test_equation_5_takes_a_patch_from_the_class_that_it_does_not_resemble():
    # Two patches: a cat, and a dog that CLIP takes for a cat by a hair. Following the gradient
    # gives the dog back.
    cat, dog = torch.eye(2)
    Z = torch.stack([cat, dog], dim=1)[None, :, None]       # (1, D, 1, 2)
    M = torch.tensor([[0.9, 0.505], [0.1, 0.495]])[None, :, None].requires_grad_()

    for _ in range(20):
        torch.manual_seed(1)
        masks = gumbel_softmax_masks(M, tau_1=0.1)
        labels = torch.ones(1, 2, dtype=torch.bool)
        contrastive_loss(masked_features(Z, masks), torch.eye(2), labels, tau=0.1).backward()
        with torch.no_grad():
            M -= 0.01 * M.grad
            M.grad = None

    assert M.argmax(1).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("options", [
    {},
    {"tau": 0.02, "tau_1": 0.01, "reference_norm": "class"},
    {"subtract": False, "positional_channels": 1},
    {"prompt_per_class": True, "positional_gain": 0.05, "positional_channels": None},
])
def test_all_of_the_rectification_from_the_image_to_the_loss(make_model, clip, options):
    clip.logit_scale.fill_(math.log(1 / 0.05))              # tau, where it is not given
    model = make_model(recipe="2025", **options)
    images = torch.rand(2, 3, 13, 18, dtype=torch.float64)  # 4 x 5 patches
    state = clip.state_dict()

    # Z, W_r and M_p by the reference; Eq. (2)-(5) on them.
    W_r = reference.reference_heads(
        state, model.reference.vectors, model.reference.endings,
        options.get("reference_norm", "frobenius"),
    )
    M_p = reference.positional_map(
        model.positional.state_dict(), reference.positional_table(state, 4, 5), training=True,
        gain=options.get("positional_gain", 1.0),
    )
    Z = []
    M = []
    for image in images:
        vectors = reference.patch_vectors(state, reference.normalized(image))
        Z.append(vectors / vectors.norm(dim=0))
        M.append(reference.rectified_logits(
            Z[-1], model.W_q, W_r, M_p, options.get("subtract", True)))
    Z, M = torch.stack(Z), torch.stack(M)
    noise = reference.gumbel_noise(5, M.shape)
    masks = reference.hard_masks(M, options.get("tau_1", 0.001), noise)
    expected = reference.contrastive_loss(
        Z, masks, model.W_q, LABELS, options.get("tau", 0.05))

    # The same as train.py does it.
    output = model(images)
    torch.manual_seed(5)
    found = gumbel_softmax_masks(output.rectified, model.options.tau_1)
    pooled = masked_features(output.features, found)
    loss = contrastive_loss(pooled, model.W_q, LABELS, model.tau)

    close(output.rectified, M)
    close(loss, expected, 1e-7)  # CLIP's logit scale, and so tau, is kept in single precision


# --- From logits to masks -------------------------------------------------------------------------

@pytest.mark.parametrize("image_size, label_size", [
    ((12, 16), (12, 16)),  # the grid is the image
    ((10, 13), (10, 13)),  # patches reach over its edge: their part beyond it is cut off
    ((10, 13), (25, 31)),  # and the labels are larger than what the network saw
    ((10, 13), (7, 9)),    # or smaller
])
def test_a_mask_is_the_best_class_of_the_enlarged_logits(image_size, label_size):
    logits, patch = numbers(1, C, h, w), 4

    mask = segment(logits, patch, image_size, label_size)

    pixels = reference.enlarge(logits[0], patch, *image_size)               # (C, H, W)
    rows = reference.bilinear_weights(image_size[0], label_size[0])
    columns = reference.bilinear_weights(image_size[1], label_size[1])
    pixels = rows @ pixels @ columns.T                                      # (C, H0, W0)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), pixels.argmax(0))


def test_denoising_drops_the_classes_that_are_nowhere_sure():
    logits = 0.01 * numbers(1, C, h, w)
    best = []
    for c in range(C):
        probabilities = []
        for y, x in product(range(h), range(w)):
            e = [math.exp(100 * logits[0, j, y, x]) for j in range(C)]
            probabilities.append(e[c] / sum(e))
        best.append(max(probabilities))
    threshold = sum(sorted(best)[1:3]) / 2                                  # between two of them

    kept = strong_classes(logits, threshold)
    mask = segment(logits, 4, (12, 16), (12, 16), denoise=threshold)

    assert kept.tolist() == [number >= threshold for number in best]
    pixels = reference.enlarge(logits[0], 4, 12, 16)
    pixels[~kept] = -torch.inf
    assert torch.equal(mask.long(), pixels.argmax(0))
    assert mask.unique().tolist() != segment(logits, 4, (12, 16), (12, 16)).unique().tolist()


def test_denoising_keeps_all_classes_if_none_is_sure():
    assert strong_classes(torch.zeros(1, C, h, w), 0.9).tolist() == [True] * C


def test_pixels_that_no_class_is_sure_of_are_background():
    logits, threshold = 0.01 * numbers(1, C, h, w), 0.45

    mask = segment(logits, 4, (12, 16), (12, 16), denoise=0.7, background=threshold)

    pixels = reference.enlarge(logits[0], 4, 12, 16)
    kept = strong_classes(logits, 0.7)
    assert 0 < kept.sum() < C
    best = (100 * pixels).softmax(0)[kept].amax(0)  # dropped classes keep their share
    assert 0 < (best < threshold).sum() < 12 * 16
    assert torch.equal(mask == IGNORE, best < threshold)


# --- Sec. 3.5: Eq. (6) ----------------------------------------------------------------------------

H, W = 10, 13  # pixels; 3 x 4 cells of 4 pixels reach over them


def stretched(stride):
    """to_pixels of a network with such cells."""
    return lambda grid, height, width: reference.enlarge(grid, stride, height, width)


def padded():
    """(B, H, W) bool: image 0 is 7 pixels high, image 1 is 9 wide; the rest is padding."""
    valid = torch.zeros(B, H, W, dtype=torch.bool)
    valid[0, :7] = True
    valid[1, :, :9] = True
    return valid


def test_equation_6_the_cross_entropy_with_the_teachers_mask_at_each_pixel():
    M_student, tau = numbers(B, C, h, w), 0.7
    teacher_masks = torch.randint(C, (B, H, W)).masked_fill(~padded(), IGNORE)

    loss = mask_guided_loss(M_student, teacher_masks, tau, stretched(4))

    enlarged = reference.enlarge(M_student, 4, H, W)
    total, count = 0, 0
    for b, i, j in product(range(B), range(H), range(W)):
        if padded()[b, i, j]:
            e = [math.exp(enlarged[b, c, i, j] / tau) for c in range(C)]
            total -= math.log(e[teacher_masks[b, i, j]] / sum(e))
            count += 1
    assert count == 7 * 13 + 10 * 9
    assert loss.item() == pytest.approx(total / count)


# --- Eq. (7) --------------------------------------------------------------------------------------

def test_equation_7_the_L1_distance_of_the_features_at_each_pixel():
    Z, Z_student = unit(B, D, 2, 2), unit(B, D, h, w)  # cells of 8 pixels, and of 4

    loss = feature_guided_loss(Z, Z_student, padded(), stretched(8), stretched(4))

    a = reference.enlarge(Z, 8, H, W)
    b = reference.enlarge(Z_student, 4, H, W)
    total, count = 0, 0
    for n, i, j in product(range(B), range(H), range(W)):
        if padded()[n, i, j]:
            total += sum(abs(a[n, d, i, j] - b[n, d, i, j]) for d in range(D)).item()
            count += 1
    assert loss.item() == pytest.approx(total / count)


# --- The text-guided loss, and Eq. (8) ------------------------------------------------------------

def test_the_text_guided_loss_is_equations_4_and_5_of_the_student():
    M_student, Z_student, W_q = numbers(B, C, h, w), unit(B, D, h, w), unit(C, D)
    noise = reference.gumbel_noise(7, M_student.shape)

    torch.manual_seed(7)
    loss = text_guided_loss(M_student, Z_student, W_q, LABELS, 0.5, 0.1)

    masks = reference.hard_masks(M_student, 0.5, noise)
    close(loss, reference.contrastive_loss(Z_student, masks, W_q, LABELS, 0.1))


def test_equation_8_half_of_the_last_two():
    assert distillation_loss(1.0, 10.0, 100.0) == 1 + 0.5 * 10 + 0.5 * 100
    assert distillation_loss(1.0, 10.0, 100.0, alpha=2.0, beta=3.0) == 1 + 20 + 300


# --- Sec. 4.1: mIoU -------------------------------------------------------------------------------

def test_miou_is_the_mean_of_intersection_over_union_of_the_classes_that_occur():
    truth = torch.randint(3, (6, 7))                 # class 3 occurs nowhere, but is predicted
    prediction = torch.where(torch.rand(6, 7) < 0.6, truth, torch.randint(C, (6, 7)))
    truth[0, :3] = IGNORE
    assert (prediction == 3).any()

    # Two images: their pixels are counted together.
    confusion = confusion_matrix(prediction[:2], truth[:2], C)
    confusion += confusion_matrix(prediction[2:].byte(), truth[2:].byte(), C)
    result = scores(confusion)

    pixels = [(y, x) for y in range(6) for x in range(7) if truth[y, x] != IGNORE]
    ious = []
    for c in range(3):
        is_it = {p for p in pixels if truth[p] == c}
        called_it = {p for p in pixels if prediction[p] == c}
        ious.append(len(is_it & called_it) / len(is_it | called_it))
    right = sum(bool(truth[p] == prediction[p]) for p in pixels)
    assert result["miou"] == pytest.approx(sum(ious) / 3)
    assert result["iou"][:3] == pytest.approx(ious) and math.isnan(result["iou"][3])
    assert result["present"] == 3
    assert result["pixel_accuracy"] == pytest.approx(right / len(pixels))
