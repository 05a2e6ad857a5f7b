"""ReCLIP as a module: what learns and what does not, what it keeps, its files, and its losses.

The equations themselves are in test_equations.py.
"""

import copy
import os
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import reclip
import reference
from clip_model import QuickGELU, load_clip, maskclip
from conftest import close, sentence
from datasets import own_images
from reclip import (
    PROMPTS,
    PositionalBias,
    ReCLIP,
    ReferencePrompt,
    contrastive_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    mask_guided_loss,
    masked_features,
    query_text_features,
    segment,
    text_guided_loss,
)

CLASSES = ["cat", "dog", "grass", "tree"]
LABELS = torch.tensor([[True, False, True, True], [False, True, False, False]])


def images(batch=2, height=13, width=18):
    """Float images of 4 x 5 patches, which reach over their edges."""
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def padding():
    """Which pixels of images() hold the image: 13 x 11 of the first, 6 x 18 of the second."""
    valid = torch.zeros(2, 13, 18, dtype=torch.bool)
    valid[0, :, :11] = True
    valid[1, :6] = True
    return valid


def loss_of(model, Z):
    """Eq. (1)-(5) as a step of training has them."""
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.options.tau_1)
    pooled = masked_features(Z, masks)
    return contrastive_loss(pooled, model.W_q, LABELS, model.tau)


def learnt_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake(model):
    """Moves all that can learn, in place."""
    with torch.no_grad():
        for parameter in learnt_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)


def same(output, other):
    """Two Outputs are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(output, other, strict=True))


# --- The prompts ----------------------------------------------------------------------------------

def test_the_prompts_are_the_published_ones(shared):
    lines = shared("clip/prompt_templates_85.txt").read_text(encoding="utf-8").splitlines()

    assert sorted(PROMPTS) == sorted(lines) and len(PROMPTS) == 85


def test_the_query_reads_all_prompts_unless_told(clip):
    W_q = ReCLIP(clip, ["cat", "dog"]).W_q

    close(W_q, query_text_features(clip, ["cat", "dog"], PROMPTS), 1e-6)
    few = ReCLIP(clip, ["cat", "dog"], prompts=["the {}"]).W_q
    close(few, query_text_features(clip, ["cat", "dog"], ["the {}"]), 1e-6)
    assert (few - W_q).abs().max() > 0.01


def test_a_prompt_starts_as_token_0(clip):
    shared = ReferencePrompt(clip, CLASSES, 7)
    own = ReferencePrompt(clip, CLASSES, 7, prompt_per_class=True)

    assert torch.equal(shared.vectors, clip.token_embedding.weight[0].expand(7, -1))
    assert torch.equal(own.vectors, shared.vectors.expand(4, -1, -1))
    close(own(clip), shared(clip), 1e-6)


def test_each_class_moves_its_own_prompt_alone(clip):
    part = ReferencePrompt(clip, CLASSES, 7, norm="class", prompt_per_class=True)

    part(clip)[1, 0].backward()

    moved = part.vectors.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [False, True, False, False]


def test_a_learnable_query_has_a_prompt_per_class_too(make_model):
    model = make_model(query_learnable=True, prompt_per_class=True)
    before, _ = model.heads()

    with torch.no_grad():
        model.query.vectors[1] += 0.1 * torch.randn(6, 128)
    after, _ = model.heads()

    changed = (after - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False, False]


# --- What learns, and what does not ---------------------------------------------------------------

@pytest.mark.parametrize("options, parts", [
    ({}, {"reference", "positional"}),
    ({"query_learnable": True}, {"query", "reference", "positional"}),
    ({"positional_channels": 0}, {"reference"}),
    ({"prompt_length": 0}, {"positional"}),
    ({"subtract": False, "prompt_per_class": True}, {"reference", "positional"}),
])
def test_gradients_reach_what_learns_and_nothing_else(make_model, options, parts):
    model = make_model(tau_1=0.05, **options)

    Z = model.features(images().requires_grad_())
    loss_of(model, Z).backward()

    assert not Z.requires_grad
    assert {name.split(".")[0] for name in learnt_parameters(model)} == parts
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None and name.startswith(("clip.", "dense_visual.")), name
    assert not model.W_q.requires_grad


def test_a_learnt_query_does_not_move_the_targets_of_the_loss(make_model):
    # Eq. (5) compares with CLIP's own W_q: through masks that carry no gradient, nothing is left.
    model = make_model(query_learnable=True)
    Z = model.features(images())

    masks = model.rectify(Z).rectified.detach().softmax(1)
    loss = contrastive_loss(masked_features(Z, masks), model.W_q, LABELS, model.tau)

    assert not loss.requires_grad
    W_q, _ = model.heads()
    assert W_q.requires_grad and (W_q - model.W_q).abs().max() > 0.1


def test_training_lowers_the_loss_and_leaves_clip_as_it_was(make_model, clip):
    model = make_model(tau_1=0.1)
    Z = model.features(images())
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    W_q = model.W_q.clone()

    def mean_loss():
        total = 0
        for seed in range(10):
            torch.manual_seed(seed)
            total += loss_of(model, Z).item() / 10
        return total

    start = mean_loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(30):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss_of(model, Z).backward()
        optimizer.step()

    assert mean_loss() < start - 0.02
    assert torch.equal(model.W_q, W_q)
    assert not any(part.training for part in clip.modules())
    for key, value in clip.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_clip_that_could_learn_is_frozen(clip):
    clip.train().requires_grad_()

    ReCLIP(clip, ["cat", "dog"], W_q=torch.eye(2, 12))

    assert not any(part.training for part in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())


# --- Images: two recipes, and padding -------------------------------------------------------------

@pytest.mark.parametrize("recipe, colors", [
    ("cvpr2024", reference.IMAGENET_COLORS),
    ("2025", reference.CLIP_COLORS),
])
def test_padding_is_0_where_it_enters_clip(make_model, recipe, colors):
    # Also where CLIP itself pads 13 x 18 pixels to whole patches, 16 x 20.
    model, some, valid = make_model(recipe=recipe), images(), padding()
    seen = []
    for tower in {model.dense_visual, model.clip.visual}:
        tower.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    model.features(some, valid)

    expected = torch.zeros(2, 3, 16, 20, dtype=torch.float64)
    for b in range(2):
        expected[b, :, :13, :18] = reference.normalized(some[b], colors, valid[b])
    (pixels,) = seen
    close(pixels, expected, 1e-14)
    assert torch.equal(pixels == 0, expected == 0)


def test_what_the_padding_holds_does_not_matter(make_model):
    model, some, valid = make_model(), images(), padding()
    other = torch.where(valid[:, None], some, 9 * images())

    assert same(model(some, valid), model(other, valid))
    assert not torch.equal(model.features(some), model.features(other))


def test_a_recipe_changes_the_patches_and_not_the_texts(make_model):
    model, other = make_model(recipe="cvpr2024"), make_model(recipe="2025")

    assert all(torch.equal(a, b) for a, b in zip(model.heads(), other.heads()))
    some = images()
    assert (model.features(some) - other.features(some)).abs().max() > 0.01


def test_the_patch_tower_is_clips_own_weights_run_in_another_way(make_model, clip):
    model = make_model(recipe="cvpr2024")

    for moved in (model, model.float(), copy.deepcopy(model)):
        own = dict(moved.clip.visual.named_parameters())
        for name, parameter in moved.dense_visual.named_parameters():
            assert parameter.data_ptr() == own[name].data_ptr(), name
            assert not parameter.requires_grad
    for block in model.dense_visual.transformer.resblocks:
        assert isinstance(block.mlp.gelu, torch.nn.GELU)
    for block in clip.visual.transformer.resblocks:
        assert isinstance(block.mlp.gelu, QuickGELU)


def test_the_last_block_is_read_as_asked(make_model):
    def first_row(block, tokens, size):
        """Every patch gets what MaskCLIP gives the first patch of its row."""
        assert size == (4, 5)
        patches = maskclip(block, tokens, size).unflatten(1, size)
        return patches[:, :, :1].expand(-1, -1, 5, -1).flatten(1, 2)

    some = images()
    Z = make_model(attention=first_row).features(some)

    close(Z, make_model().features(some)[..., :1].expand(-1, -1, -1, 5))


def test_whole_numbers_are_refused(make_model):
    with pytest.raises(ValueError, match=r"float in \[0, 1\]"):
        make_model()(torch.zeros(1, 3, 8, 12, dtype=torch.uint8))


# --- What eval mode keeps -------------------------------------------------------------------------

def expected_output(model, some):
    """The logits of a model in eval mode, by the reference, image by image."""
    state, net = model.clip.state_dict(), model.positional.state_dict()
    h, w = -(-some.shape[2] // 4), -(-some.shape[3] // 4)
    M_p = reference.positional_map(net, reference.positional_table(state, h, w))
    W_r = reference.reference_heads(state, model.reference.vectors, model.reference.endings)
    Z = model.features(some)
    return torch.stack([reference.rectified_logits(z, model.W_q, W_r, M_p) for z in Z])


def test_eval_computes_texts_once_and_training_each_time(make_model, clip, monkeypatch):
    model = make_model()
    calls = []
    encode = clip.encode_prompted
    monkeypatch.setattr(clip, "encode_prompted", lambda *them: calls.append(1) or encode(*them))

    model.eval()
    for _ in range(3):
        model(images())
    assert len(calls) == 1

    model.train()
    model(images())
    model(images())
    assert len(calls) == 3


def test_eval_after_a_step_of_training_sees_the_step(make_model):
    model, some = make_model().eval(), images()
    before = model(some)

    shake(model.train())
    model(some)  # moves the running statistics of the batch norms
    after = model.eval()(some)

    close(after.rectified, expected_output(model, some).detach())
    assert (after.reference - before.reference).abs().max() > 1e-4
    assert (after.positional - before.positional).abs().max() > 1e-4


def test_eval_uses_the_running_statistics_and_moves_none(make_model):
    model, some = make_model(), images()
    p = model.clip.visual.positional_grid(4, 5)
    first = reference.convolution(model.positional.net[0].weight, p[0])
    old = copy.deepcopy(model.positional.net[1])

    model(some)
    norm = model.positional.net[1]
    close(norm.running_mean, 0.9 * old.running_mean + 0.1 * first.mean((1, 2)))
    close(norm.running_var, 0.9 * old.running_var + 0.1 * first.var((1, 2), unbiased=True))

    moved = copy.deepcopy(norm.state_dict())
    model.eval()(some)
    assert all(torch.equal(value, moved[key]) for key, value in norm.state_dict().items())


def test_each_size_of_image_has_its_own_positional_logits(make_model):
    model = make_model().eval()

    for height, width in ((13, 18), (13, 30), (18, 13), (30, 13), (13, 18)):
        some = images(1, height, width)
        close(model(some).rectified, expected_output(model, some).detach())


def test_what_is_kept_follows_a_move_to_another_type(make_model):
    model, some = make_model().eval(), images()
    before = model(some)

    single = model.float()(some.float())
    double = model.double()(some)

    assert all(part.dtype == torch.float32 for part in single)
    for part, one, two in zip(before, single, double):
        close(one.double(), part, 1e-5)
        close(two, part, 1e-5)


def test_what_is_kept_follows_loaded_weights(make_model):
    model, other, some = make_model().eval(), make_model(seed=1).eval(), images()
    model(some)

    model.load_state_dict(other.learnt())

    assert same(model(some), other(some))


def test_a_model_can_be_copied_and_pickled(make_model):
    model, some = make_model().eval(), images()

    assert same(copy.deepcopy(model)(some), model(some))
    assert same(pickle.loads(pickle.dumps(model))(some), model(some))


# --- Files ----------------------------------------------------------------------------------------

@pytest.fixture
def saved(clip, merges, tmp_path):
    """.path of a model's file, and the .model, on a CLIP of a file; its options are unusual."""

    class Saved:
        path = tmp_path / "here" / "model.pt"
        clip_path = tmp_path / "there" / "my_clip.pt"

    Saved.clip_path.parent.mkdir()
    torch.save({"state_dict": clip.state_dict(), "merges": merges}, Saved.clip_path)
    Saved.path.parent.mkdir()
    Saved.model = ReCLIP(
        load_clip(Saved.clip_path),
        ["cat | dog", "grass", "tree"],
        prompts=["the {}", "this {}"],
        protocol={"long_side": 64, "short_side": 20, "antialias": True, "denoise": 0.25},
        prompt_length=5, prompt_per_class=True, query_learnable=True, reference_norm="class",
        positional_channels=1, positional_last_relu=False, positional_gain=0.3, subtract=False,
        tau_1=0.01, tau=0.03, recipe="2025", cut_names=True,
    )
    shake(Saved.model)
    Saved.model.train()(images().float())  # moves the running statistics
    Saved.model.eval().save(Saved.path, training={"step": 7})
    return Saved


def test_a_loaded_model_is_the_saved_one(saved):
    model, some = saved.model, images().float()

    loaded = ReCLIP.load(saved.path)

    assert not loaded.training
    assert same(loaded(some, padding()), model(some, padding()))
    assert asdict(loaded.options) == asdict(model.options)
    for name in ("class_names", "prompts", "protocol", "tau", "scale", "output_stride"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert same(loaded.heads(), model.heads())


@pytest.mark.parametrize("options", [
    {},
    {"positional_channels": 0, "prompt_per_class": True},
    {"prompt_length": 0},
    {"reading": {"class_token": torch.linspace(-1, 1, 128), "eps": 1e-2}, "recipe": "2025"},
])
def test_models_with_other_parts_are_loaded_as_they_were(make_model, clip, tmp_path, options):
    model, some = make_model(**options).float().eval(), images().float()
    model.save(tmp_path / "model.pt")

    loaded = ReCLIP.load(tmp_path / "model.pt", clip)

    assert same(loaded(some), model(some))
    if "reading" in options:
        assert not torch.equal(make_model(recipe="2025").float().features(some), model(some)[-1])


def test_a_file_holds_no_clip_and_what_is_to_be_put_in(saved):
    content = reclip.read_checkpoint(saved.path, "rectify")

    parts = {key.split(".")[0] for key in content["learnt"]}
    assert parts == {"W_q", "query", "reference", "positional"}
    assert content["training"] == {"step": 7}
    assert content["clip"]["source"] == str(saved.clip_path.resolve())


def test_a_file_of_another_stage_is_refused(saved):
    class Other(ReCLIP):
        stage = "other"

    with pytest.raises(ValueError) as caught:
        Other.load(saved.path)
    assert "is of the stage rectify, not other" in sentence(caught)

    Other.save(saved.model, saved.path)
    assert reclip.read_checkpoint(saved.path)["stage"] == "rectify"  # the model's, not the caller's


def test_the_same_clip_from_any_file_will_do(saved, tmp_path, monkeypatch):
    some = images().float()
    expected = saved.model(some)
    monkeypatch.setenv("CLIP_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()

    # Where the checkpoint says; beside the checkpoint, under two names; in $CLIP_HOME.
    places = [
        saved.clip_path,
        saved.path.with_name("clip.pt"),
        saved.path.with_name("my_clip.pt"),
        tmp_path / "home" / "my_clip.pt",
    ]
    here = saved.clip_path
    for place in places:
        here = here.rename(place)
        assert same(ReCLIP.load(saved.path)(some), expected), place

    windows_path = "C:\\weights\\" + saved.clip_path.name
    assert reclip.find_clip(saved.path, windows_path) == here

    here.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(FileNotFoundError) as caught:
        ReCLIP.load(saved.path)
    assert "my_clip.pt" in sentence(caught) and "--clip" in sentence(caught)
    assert same(ReCLIP.load(saved.path, load_clip(tmp_path / "elsewhere.pt"))(some), expected)


def test_clip_pt_beside_a_checkpoint_comes_first(saved, make_clip, merges):
    torch.save(
        {"state_dict": make_clip(seed=1).state_dict(), "merges": merges},
        saved.path.with_name("clip.pt"),
    )

    with pytest.raises(ValueError) as caught:
        ReCLIP.load(saved.path)
    assert "was learnt on another CLIP" in sentence(caught) and "--clip" in sentence(caught)


def test_another_activation_is_another_clip(saved, make_clip, merges, tmp_path):
    with pytest.raises(ValueError, match="another CLIP"):
        ReCLIP.load(saved.path, load_clip(saved.clip_path, quick_gelu=False))

    # LAION's: their file does not tell, so the checkpoint must.
    exact = load_clip(saved.clip_path, quick_gelu=False)
    model, some = ReCLIP(exact, ["cat", "dog"], prompts=["a {}"]).eval(), images().float()
    model.save(tmp_path / "exact.pt")
    assert same(ReCLIP.load(tmp_path / "exact.pt")(some), model(some))


def test_an_attention_of_ones_own_has_to_be_given_again(make_model, clip, tmp_path):
    def backwards(block, tokens, size):
        return maskclip(block, tokens, size).flip(1)

    model, some = make_model(attention=backwards).float().eval(), images().float()
    model.save(tmp_path / "model.pt")

    with pytest.raises(ValueError) as caught:
        ReCLIP.load(tmp_path / "model.pt", clip)
    assert "backwards" in sentence(caught)
    loaded = ReCLIP.load(tmp_path / "model.pt", clip, attention=backwards)
    assert same(loaded(some), model(some))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut in half", "another file", "hostile"])
def test_files_that_are_no_model_are_refused_in_a_sentence(saved, hostile, damage):
    path = saved.path
    if damage == "missing":
        path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "cut in half":
        os.truncate(path, path.stat().st_size // 2)
    if damage == "another file":
        torch.save({"weight": torch.zeros(3)}, path)
    if damage == "hostile":
        torch.save({"stage": "rectify", "learnt": hostile.payload}, path)

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ReCLIP.load(path)

    assert "model.pt" in sentence(caught)
    assert not hostile.ran()


# --- What is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("classes, options, words", [
    ("cat, dog", {}, "class names must be a list"),
    (["cat", "dog"], {"prompts": "a photo of a {}."}, "prompts must be a list of templates"),
    (["cat", "dog"], {"prompts": ["a {}", "a photo"]}, "each with {} once"),
    (["cat", "dog"], {"prompts": ["a {} {}"]}, "each with {} once"),
    (["cat", "dog"], {"prompts": []}, "prompts must be a list of templates"),
    (["cat", "dog"], {"reference_norm": "l2"},
     "reference_norm is 'l2'; it must be frobenius or class"),
    (["cat", "dog"], {"recipe": "2024"}, "recipe is '2024'"),
    (["cat", "dog"], {"reference_norm": "rows"}, "reference_norm is 'rows'"),
    (["cat", " ".join(60 * ["the"])], {}, "no room for a prompt: the longest class name has 60"),
])
def test_what_would_be_silently_wrong_is_refused(clip, classes, options, words):
    with pytest.raises(ValueError) as caught:
        ReCLIP(clip, classes, W_q=torch.eye(2, 12), **options)
    assert words in sentence(caught)


def test_segment_takes_one_image_of_up_to_255_classes():
    assert segment(torch.zeros(1, 255, 2, 3), 8, (16, 24), (16, 24)).shape == (16, 24)

    with pytest.raises(ValueError, match=r"one image, \(1, C, h, w\), not 2"):
        segment(torch.zeros(2, 3, 4, 5), 4, (16, 20), (16, 20))
    with pytest.raises(ValueError, match="room for 255 classes, not 256"):
        segment(torch.zeros(1, 256, 2, 3), 8, (16, 24), (16, 24))


# --- Large images: strips of masks, groups of maps ------------------------------------------------

def test_a_large_mask_is_the_same_in_strips():
    # 100 classes on 900 x 400 pixels, 36 M numbers: more than are kept in memory at once.
    logits, threshold = 0.02 * torch.randn(1, 100, 3, 2), 0.2

    mask = segment(logits, 4, (11, 7), (900, 400), background=threshold)

    rows = reference.bilinear_weights(11, 900) @ reference.bilinear_weights(3, 12)[:11]
    columns = reference.bilinear_weights(7, 400) @ reference.bilinear_weights(2, 8)[:7]
    pixels = rows.float() @ logits[0] @ columns.float().T           # (100, 900, 400)
    first, second = pixels.topk(2, dim=0).values
    probability = (100 * pixels).softmax(0).amax(0)
    clear = (first - second > 1e-5) & ((probability - threshold).abs() > 1e-5)
    expected = pixels.argmax(0).masked_fill(probability < threshold, reclip.IGNORE)
    assert clear.float().mean() > 0.99
    assert 0.1 < (expected == reclip.IGNORE).float().mean() < 0.9
    assert torch.equal(mask[clear].long(), expected[clear])


@pytest.fixture
def grids():
    """Logits and features of a student (cells of 4 pixels) and features of a teacher (of 8)."""
    M = torch.randn(3, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    Z_student = torch.randn(3, 12, 4, 5, dtype=torch.float64, requires_grad=True)
    Z = torch.randn(3, 12, 2, 3, dtype=torch.float64, requires_grad=True)
    return M, Z_student, Z


def stretched(stride):
    def to_pixels(grid, height, width):
        grid = F.interpolate(grid, scale_factor=stride, mode="bilinear")
        return grid[..., :height, :width]
    return to_pixels


def both_losses(M, Z_student, Z, height=13, width=18):
    """Eq. (6) and Eq. (7), with some padding."""
    valid = torch.ones(3, height, width, dtype=torch.bool)
    valid[1, :, 11:] = False
    masks = torch.arange(3 * height * width).view(3, height, width) % 4
    masks = masks.masked_fill(~valid, reclip.IGNORE)
    return (
        mask_guided_loss(M, masks, 0.07, stretched(4)),
        feature_guided_loss(Z, Z_student, valid, stretched(8), stretched(4)),
    )


@pytest.mark.parametrize("at_once", [1, 5 * 3 * 13 * 18])  # one by one; 5 channels, then 5, then 2
def test_losses_in_groups_are_those_of_the_whole(grids, monkeypatch, at_once):
    whole = both_losses(*grids)
    whole_gradients = torch.autograd.grad(sum(whole), grids)

    monkeypatch.setattr(reclip, "MOST_NUMBERS", at_once)
    parts = both_losses(*grids)
    gradients = torch.autograd.grad(sum(parts), grids)

    for a, b in zip([*parts, *gradients], [*whole, *whole_gradients], strict=True):
        close(a, b, 1e-12)


def test_no_map_of_the_images_size_waits_for_backward(grids, monkeypatch):
    def largest_kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel() * x.is_floating_point()) or x, lambda x: x
        ):
            both_losses(*grids)
        return max(sizes)

    assert largest_kept() >= 3 * 12 * 13 * 18  # plainly, all channels of all pixels are kept
    monkeypatch.setattr(reclip, "MOST_NUMBERS", 1)
    assert largest_kept() <= 3 * 12 * 4 * 5    # in groups, no more than the grids


@pytest.mark.parametrize("through", ["masks", "features"])
def test_the_text_guided_loss_reaches_the_student_through_both(grids, through):
    M, Z_student, _ = grids
    W_q = F.normalize(torch.randn(4, 12, dtype=torch.float64), dim=1)
    labels = torch.ones(3, 4, dtype=torch.bool)
    inputs = (M, Z_student.detach()) if through == "masks" else (M.detach(), Z_student)

    text_guided_loss(*inputs, W_q, labels, tau_1=0.5, tau=0.1).backward()

    reached = M if through == "masks" else Z_student
    assert reached.grad.abs().amax((1, 2, 3)).min() > 0


# --- Start, gain and names ------------------------------------------------------------------------

def test_a_gain_changes_nothing_but_the_scale_of_M_p():
    nets = []
    for gain in (1.0, 0.05):
        torch.manual_seed(0)
        nets.append(PositionalBias(128, 3, gain=gain))
    p = torch.randn(1, 128, 5, 7)

    for a, b in zip(*[net.state_dict().values() for net in nets], strict=True):
        assert torch.equal(a, b)
    close(nets[1](p), 0.05 * nets[0](p), 1e-7)


def test_images_of_your_own_start_M_p_at_a_quarter_of_CLIPs_temperature(clip):
    gain = own_images("images", ["cat", "dog"]).numbers["positional_gain"]

    model = ReCLIP(clip, ["cat", "dog"], positional_gain=gain)

    assert model.positional.gain == pytest.approx(clip.temperature() / 4)
    assert ReCLIP(clip, ["cat", "dog"]).positional.gain == 1


def test_names_are_cut_as_the_authors_published_files_have_them(clip):
    # Three tokens of [name, EOT] are left, and the largest id among them is read.
    words = ["the", "photo", "of", "cat", "dog"]
    the, photo, of, cat, dog = [clip.tokenizer.encode(word)[0] for word in words]
    names = ["cat dog", "photo of the cat", "the photo of cat", "cat dog of the"]

    part = ReferencePrompt(clip, names, 5, cut_names=True)

    assert cat < dog < photo < of < the
    assert part.endings == [[cat, dog, clip.eot], [photo, of, the], [the], [cat, dog, of]]
    assert ReferencePrompt(clip, names, 5).endings[2] == [the, photo, of, cat, clip.eot]


# --- To be read -----------------------------------------------------------------------------------

def test_the_example_in_the_docstring_runs(clip, monkeypatch):
    example = reclip.__doc__.split("it is used like this:")[1].split("\nWhere the paper")[0]
    code = "\n".join(line.removeprefix("    ") for line in example.splitlines())
    H, W = 13, 18
    names = vars(reclip) | {
        "load_clip": lambda name: clip,
        "images": torch.rand(2, 3, H, W),
        "thumbnails": torch.rand(2, 3, 12, 12),
        "image": torch.rand(1, 3, H, W),
        "H": H,
        "W": W,
    }

    exec(code, names)

    assert names["labels"].shape == (2, 3) and names["mask"].shape == (H, W)
    assert names["model"].reference.vectors.grad is not None


def test_the_tour_shows_every_step(capsys):
    reclip.tour()

    printed = capsys.readouterr().out
    for symbol in ("Z ", "W_q", "W_r", "M_q", "M_r", "M_p", "M_b", "M^", "S ", "Eq. (5)"):
        assert symbol in printed


@pytest.mark.parametrize("last_relu", [True, False])
def test_the_last_relu_of_the_positional_net_is_an_option(make_model, last_relu):
    M_p = make_model(positional_last_relu=last_relu).positional_logits(4, 5)
    assert (M_p >= 0).all() == last_relu
