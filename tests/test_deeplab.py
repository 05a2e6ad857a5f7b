"""DeepLab V2 against literal loops, closed forms, and what it must refuse."""

import ast
import errno
import hashlib
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import deeplab
from deeplab import ASPP, HEADS, STUDENTS, DeepLabV2

C, D = 5, 16
NAMES = ["cat", "dog", "sofa | couch", "grass", "sky"]


def heads(seed=0):
    """W_q with rows of length 1, W_r with rows of length 1 / sqrt(C)."""
    generator = torch.Generator().manual_seed(seed)
    W_q, W_r = F.normalize(torch.randn(2, C, D, generator=generator), dim=-1)
    return W_q, W_r / C ** 0.5


def tiny(**changes):
    """The same tiny student each time, but for the changes."""
    torch.manual_seed(1)
    return DeepLabV2(NAMES, *heads(), **{"student": "tiny", **changes})


def positional_for(head, channels=1):
    """M_p where the head needs one."""
    if head == "query_reference_positional":
        return torch.rand(1, channels, 14, 14)
    return None


def one_sentence(info, *parts):
    """The caught error's message is one line and holds the parts."""
    message = str(info.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert "--" not in message, "a library's error speaks of arguments, not of flags"


# -- backbones and ASPP ----------------------------------------------------------------------------

def literal_conv(x, weight, bias, rate):
    """3x3 convolution with holes of rate - 1, by the definition, zero outside.

    (1, I, h, w) -> (1, O, h, w)
    """
    _, _, h, w = x.shape
    out = torch.zeros(1, len(weight), h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            total = bias.clone()
            for a in range(3):
                for b in range(3):
                    y = i + (a - 1) * rate
                    z = j + (b - 1) * rate
                    if 0 <= y < h and 0 <= z < w:
                        total = total + weight[:, :, a, b] @ x[0, :, y, z]
            out[0, :, i, j] = total
    return out


def test_aspp_is_the_sum_of_literal_dilated_convolutions():
    torch.manual_seed(0)
    rates = (1, 2, 3, 5)
    aspp = ASPP(3, 4, rates=rates).double()
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)
    want = torch.zeros(1, 4, 7, 6, dtype=torch.float64)
    for branch, rate in zip(aspp.branches, rates, strict=True):
        want += literal_conv(x, branch.weight, branch.bias, rate)
    torch.testing.assert_close(aspp(x), want, rtol=0, atol=1e-12)


def test_aspp_of_the_paper_and_features_of_either_sign():
    aspp = ASPP(3, 4)
    assert [branch.dilation for branch in aspp.branches] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    assert all(branch.bias is not None for branch in aspp.branches)
    negative = (tiny().eval().features(torch.rand(2, 3, 64, 64)) < 0).float().mean()
    assert 0.2 < negative < 0.8


def test_full_size_resnet101():
    torch.manual_seed(0)
    student = DeepLabV2(NAMES, *heads()).eval()
    with torch.no_grad():
        out = student(torch.rand(1, 3, 64, 96))
    assert student.output_stride == 8
    assert out.rectified.shape == (1, C, 8, 12) and out.features.shape == (1, D, 8, 12)

    # DeepLab V2: no stride behind conv3_x, dilation 2 and 4 instead (torchvision gives a stage's
    # first block the dilation of the stage before)
    layer3, layer4 = student.backbone.layer3, student.backbone.layer4
    assert [layer3[i].conv2.dilation[0] for i in (0, 1, -1)] == [1, 2, 2]
    assert [layer4[i].conv2.dilation[0] for i in (0, 1, -1)] == [2, 4, 4]
    assert len(layer3) == 23


@pytest.mark.parametrize("name", ["resnet50", "tiny"])
def test_what_the_table_of_students_promises(name):
    row = STUDENTS[name]
    s = row.output_stride
    with torch.no_grad():
        x = row.build().eval()(torch.rand(1, 3, 5 * s, 7 * s))
    assert x.shape == (1, row.channels, 5, 7)
    student = DeepLabV2(NAMES, *heads(), student=name)
    assert [branch.dilation[0] for branch in student.aspp.branches] == list(row.rates)


# -- features, heads, pixels -----------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(64, 64), (48, 96), (61, 90), (5, 7)])
def test_grid_and_pixels_of_any_size(H, W):
    student = tiny().eval()
    out = student(torch.rand(2, 3, H, W))
    assert student.output_stride == 4
    assert out.rectified.shape == (2, C, -(-H // 4), -(-W // 4))
    assert student.to_pixels(out.rectified, H, W).shape == (2, C, H, W)


def test_to_pixels_is_literal_bilinear_interpolation():
    torch.manual_seed(0)
    student = tiny()
    grid = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    H, W = 10, 15
    want = torch.zeros(1, 2, H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            # cell k's centre lies at pixel 4 k + 1.5; outside the outermost centres it is constant
            y = min(max((i - 1.5) / 4, 0), 2)
            x = min(max((j - 1.5) / 4, 0), 3)
            a = min(int(y), 1)  # the cell above and to the left
            b = min(int(x), 2)
            for down in (0, 1):
                for right in (0, 1):
                    weight = abs(1 - down - (y - a)) * abs(1 - right - (x - b))
                    want[..., i, j] += grid[..., a + down, b + right] * weight
    torch.testing.assert_close(student.to_pixels(grid, H, W), want, rtol=0, atol=1e-12)


def test_features_are_normalized_and_images_are_too():
    student = tiny().eval()
    images = torch.rand(2, 3, 40, 56)
    Z = student.features(images)
    torch.testing.assert_close(Z.norm(dim=1), torch.ones(2, 10, 14))

    red = (images[:, 0] - 0.485) / 0.229
    green = (images[:, 1] - 0.456) / 0.224
    blue = (images[:, 2] - 0.406) / 0.225
    x = torch.stack([red, green, blue], 1)
    torch.testing.assert_close(Z, F.normalize(student.aspp(student.backbone(x)), dim=1))


@pytest.mark.parametrize("name", ["tiny", "resnet50", "resnet50_v1c"])
def test_padding_is_exactly_0_where_it_enters_the_backbone(name):
    """After ImageNet's normalization, whatever the padding held before; the image is untouched."""
    student = tiny(student=name).eval()
    first = next(part for part in student.backbone.modules() if isinstance(part, nn.Conv2d))
    seen = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    images = torch.rand(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :10] = True
    valid[1, :, :7] = True
    with torch.no_grad():
        padded = student.features(images, valid)
        through_forward = student(images, valid).features
        whole = student.features(images)

    expected = torch.zeros(2, 3, 24, 32)
    for color, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected[:, color] = (images[:, color] - mean) / std
    torch.testing.assert_close(seen[2], expected)
    expected[0, :, 10:] = 0
    expected[1, :, :, 7:] = 0
    assert (seen[0] == 0).sum() == (expected == 0).sum() == 3 * (14 * 32 + 24 * 25)
    torch.testing.assert_close(seen[0], expected)
    assert torch.equal(seen[0], seen[1]) and torch.equal(padded, through_forward)
    assert not torch.equal(padded, whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_refused(dtype):
    """MEAN and STD, cast to integers, are 0: the features would be nan without a word."""
    images = torch.ones(1, 3, 16, 24, dtype=dtype)
    for use in (tiny().features, tiny()):
        with pytest.raises(ValueError) as info:
            use(images)
        one_sentence(info, f"images are {dtype}", "[0, 1]", "/ 255")
    assert tiny().eval().features(images.float()).isfinite().all()


def test_default_head_is_the_literal_subtraction():
    W_q, W_r = heads()
    out = tiny().eval()(torch.rand(2, 3, 48, 64))
    Z = out.features.permute(0, 2, 3, 1)  # (B, h, w, D)
    for logits, want in (
        (out.query, Z @ W_q.T),
        (out.reference, Z @ W_r.T),
        (out.rectified, Z @ W_q.T - Z @ W_r.T),
    ):
        torch.testing.assert_close(logits.permute(0, 2, 3, 1), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("channels", [1, C])
def test_heads_of_table_6(head, channels):
    M_p = positional_for(head, channels)
    student = tiny(head=head, M_p=M_p).eval()
    out = student(torch.rand(2, 3, 48, 64))

    positional = torch.zeros(1, 1, 12, 16)
    if M_p is not None:
        positional = F.interpolate(M_p, size=(12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out.positional, positional)

    if head == "original":
        want = F.conv2d(out.features, student.classifier.weight, student.classifier.bias)
    elif head == "query":
        want = out.query
    elif head == "query_reference":
        want = out.query - out.reference
    else:
        want = out.query - out.reference - positional
    torch.testing.assert_close(out.rectified, want)

    # what learns outside of backbone and ASPP
    learns = [name for name, _ in student.named_parameters()
              if not name.startswith(("backbone.", "aspp."))]
    if head == "original":
        assert learns == ["classifier.weight", "classifier.bias"] and student.scale == 1
    else:
        assert learns == [] and student.scale == 100


# -- what learns and what does not -----------------------------------------------------------------

@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_stays_bit_identical(frozen):
    M_p = torch.rand(1, C, 8, 8)
    student = tiny(freeze_batch_norm=frozen, head="query_reference_positional", M_p=M_p).train()
    before = {key: value.clone() for key, value in student.state_dict().items()}

    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.rand(2, 3, 32, 48)).rectified[:, 0].mean().backward()
        optimizer.step()

    norms = set()
    for name, module in student.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for key in module.state_dict():
                norms.add(f"backbone.{name}.{key}")
    assert len(norms) == 5 * 9  # of tiny's nine batch norms
    for key, value in student.state_dict().items():
        fixed = key in ("W_q", "W_r", "M_p") or frozen and key in norms
        assert torch.equal(value, before[key]) == fixed, key


def test_batch_norm_follows_the_start(tmp_path):
    weights = tmp_path / "b.pt"
    torch.save(tiny().backbone.state_dict(), weights)
    assert tiny().train().backbone[1].training
    assert not tiny(backbone_weights=weights).train().backbone[1].training
    assert tiny(backbone_weights=weights, freeze_batch_norm=False).train().backbone[1].training


def test_the_heads_are_copies():
    W_q, W_r = heads()
    student = DeepLabV2(NAMES, W_q.requires_grad_(), W_r, student="tiny")
    W_r.zero_()
    assert not student.W_q.requires_grad and student.W_r.abs().sum() > 0


def test_autocast_leaves_the_head_in_full_precision():
    student = tiny().eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = student(torch.rand(1, 3, 32, 48))
    assert {x.dtype for x in out} == {torch.float32}
    again = student.rectify(out.features).rectified
    torch.testing.assert_close(out.rectified, again, rtol=0, atol=0)


# -- files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(tmp_path, head):
    student = tiny(head=head, M_p=positional_for(head), freeze_batch_norm=True).eval()
    student.save(tmp_path / "distill.pt")
    again = DeepLabV2.load(tmp_path / "distill.pt")
    assert again.class_names == tuple(NAMES) and again.settings == student.settings
    assert not again.training
    images = torch.rand(1, 3, 45, 64)
    for a, b in zip(again(images), student(images), strict=True):
        assert torch.equal(a, b)
    assert os.listdir(tmp_path) == ["distill.pt"]


@pytest.mark.parametrize("recipe", ["cvpr2024", "2025"])
def test_a_checkpoint_keeps_its_recipe(tmp_path, recipe):
    """It says at which sides to evaluate. The student's own numbers do not depend on it."""
    student = tiny(recipe=recipe).eval()
    student.save(tmp_path / "distill.pt")
    loaded = DeepLabV2.load(tmp_path / "distill.pt")
    assert loaded.recipe == recipe and loaded.settings == student.settings
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(loaded(images).rectified, tiny().eval()(images).rectified)


def test_checkpoints_from_before_the_recipes(tmp_path):
    tiny(recipe="2025").save(tmp_path / "distill.pt")
    content = torch.load(tmp_path / "distill.pt", weights_only=True)
    del content["settings"]["recipe"]
    torch.save(content, tmp_path / "distill.pt")
    assert DeepLabV2.load(tmp_path / "distill.pt").recipe == "2025"


def test_the_checkpoint_keeps_its_format(tmp_path):
    """Files of earlier versions hold these keys but the recipe, and must go on being read."""
    tiny(head="original").save(tmp_path / "distill.pt")
    content = torch.load(tmp_path / "distill.pt", weights_only=True)
    assert set(content) == {"student", "class_names", "settings"}
    assert set(content["settings"]) == {"student", "head", "freeze_batch_norm", "recipe"}
    own = [key for key in content["student"] if not key.startswith("backbone.")]
    branches = [f"aspp.branches.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    assert own == ["W_q", "W_r", *branches, "classifier.weight", "classifier.bias"]
    convolutions = [key for key, x in content["student"].items()
                    if key.startswith("backbone.") and x.ndim == 4]
    assert convolutions == [f"backbone.{key}.weight" for key in (
        "0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "4.downsample.0",
        "5.conv1", "5.conv2", "5.downsample.0")]


def test_save_makes_the_missing_folder(tmp_path):
    path = tmp_path / "runs" / "voc" / "distill.pt"
    student = tiny()
    student.save(str(path))
    assert DeepLabV2.load(str(path)).fingerprint() == student.fingerprint()
    assert os.listdir(path.parent) == ["distill.pt"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "distill.pt"
    tiny().save(path)
    old = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError) as info:
        tiny(head="query").save(path)
    one_sentence(info, str(path), "no space left on device", "untouched")
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["distill.pt"]


@pytest.mark.parametrize("error, of_the_disk", [
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (OSError(errno.EFBIG, "File too large"), True),
    (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), True),
    (PermissionError(errno.EACCES, "Permission denied"), False),
])
def test_only_errors_of_the_disk_speak_of_the_disk(tmp_path, monkeypatch, error, of_the_disk):
    def fails(content, file):
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError) as info:
        tiny().save(tmp_path / "distill.pt")
    one_sentence(info, "distill.pt could not be written", "untouched")
    assert ("disk full" in str(info.value)) == of_the_disk
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError) as info:
        tiny().save(tmp_path / "runs" / "distill.pt")
    one_sentence(info, "distill.pt could not be written")
    assert "disk full" not in str(info.value) and (tmp_path / "runs").read_text() == "a file"


def test_fingerprint_is_of_the_weights_alone(tmp_path):
    student = tiny()
    digest = hashlib.sha256()
    state = student.state_dict()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().tobytes())
    first = student.fingerprint()
    assert first == digest.hexdigest()

    # not of the file's name, nor of the order in memory
    student.save(tmp_path / "a.pt")
    assert DeepLabV2.load(tmp_path / "a.pt").fingerprint() == first
    assert student.to(memory_format=torch.channels_last).fingerprint() == first

    # one number of a head, or of the batch norms' statistics
    student.W_r[3, 7] += 1e-3
    second = student.fingerprint()
    student.backbone[1].running_mean[2] += 1e-3
    assert len({first, second, student.fingerprint()}) == 3


@pytest.mark.parametrize("head", HEADS)
def test_a_student_can_be_pickled(head):
    student = tiny(head=head, M_p=positional_for(head))
    again = pickle.loads(pickle.dumps(student))
    assert again.fingerprint() == student.fingerprint() and again.settings == student.settings


def test_backbone_weights_in_torchvisions_names(tmp_path):
    torch.manual_seed(0)
    dilation = [False, True, True]
    net = torchvision.models.resnet50(replace_stride_with_dilation=dilation).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # not the fresh 0 and 1, which a loader could forget unseen
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    weights = tmp_path / "r50.pth"
    torch.save(net.state_dict(), weights)

    student = DeepLabV2(NAMES, *heads(), student="resnet50", backbone_weights=weights).eval()
    x = torch.randn(1, 3, 33, 48)
    with torch.no_grad():
        want = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        want = net.layer4(net.layer3(net.layer2(net.layer1(want))))
        torch.testing.assert_close(student.backbone(x), want)
    assert want.shape == (1, 2048, 5, 6)


# -- what is refused -------------------------------------------------------------------------------

class Hostile:
    """Unpickled without care, it runs a shell command."""

    def __reduce__(self):
        return os.system, ("touch hostile_file_was_run",)


def broken(folder, kind):
    path = folder / f"{kind}.pt"
    tiny().save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "wrong":
        torch.save({"learnt": {"W_q": torch.ones(2, 2)}}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "hostile":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    elif kind == "text":
        path.write_text("hello")
    return path


@pytest.mark.parametrize("kind", ["truncated", "wrong", "list", "hostile", "text"])
def test_unfit_files_end_in_one_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = broken(tmp_path, kind)
    with pytest.raises(ValueError) as info:
        DeepLabV2.load(path)
    one_sentence(info, str(path), "not a student's checkpoint")
    with pytest.raises(ValueError) as info:
        tiny(backbone_weights=path)
    one_sentence(info, str(path), "cannot fill tiny")
    assert not (tmp_path / "hostile_file_was_run").exists()


def test_a_checkpoint_opens_no_other_file(tmp_path):
    """Settings that name backbone weights would have them read, or downloaded: they are ignored."""
    tiny().save(tmp_path / "distill.pt")
    content = torch.load(tmp_path / "distill.pt", weights_only=True)
    content["settings"]["backbone_weights"] = str(tmp_path / "none.pt")
    torch.save(content, tmp_path / "distill.pt")
    assert DeepLabV2.load(tmp_path / "distill.pt").fingerprint() == tiny().fingerprint()


def test_missing_files_end_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError) as info:
        DeepLabV2.load(tmp_path / "none.pt")
    one_sentence(info, "none.pt", "DeepLabV2.save", "train.py")
    with pytest.raises(FileNotFoundError) as info:
        tiny(backbone_weights=tmp_path / "none.pt")
    one_sentence(info, "none.pt", "imagenet", "backbone_weights")


def test_no_network_ends_in_one_sentence(monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError) as info:
        DeepLabV2(NAMES, *heads(), student="resnet50", backbone_weights="imagenet")
    one_sentence(info, "Name or service not known", "imagenet")


@pytest.mark.parametrize("changes, part", [
    ({"student": "vgg"}, "resnet101"),
    ({"head": "both"}, "query_reference"),
    ({"head": "query_reference_positional"}, "needs"),
    ({"M_p": torch.zeros(1, 1, 2, 2)}, "takes no"),
    ({"backbone_weights": "imagenet"}, "tiny"),
])
def test_bad_arguments(changes, part):
    with pytest.raises(ValueError) as info:
        tiny(**changes)
    one_sentence(info, part)


@pytest.mark.parametrize("names, rows, reference_rows", [(NAMES[:4], C, C), (NAMES, C, 4)])
def test_heads_that_do_not_fit_the_classes(names, rows, reference_rows):
    W_q, W_r = heads()
    with pytest.raises(ValueError) as info:
        DeepLabV2(names, W_q[:rows], W_r[:reference_rows], student="tiny")
    one_sentence(info, "classes")


# -- the file itself -------------------------------------------------------------------------------

def test_tour_prints_every_tensor(capsys):
    """Up to the mask, in shapes whose numbers all differ."""
    deeplab.tour()
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["images", "features", "W_q", "W_r", "query", "reference", "positional",
                     "rectified", "to_pixels", "masks"]
    assert set(deeplab.Logits._fields) <= set(names)
    B, D, h, w = 2, 16, 11, 18
    H, W = 42, 70
    for line, shape in zip(lines, [
        (B, 3, H, W), (B, D, h, w), (C, D), (C, D), (B, C, h, w), (B, C, h, w), (1, 1, h, w),
        (B, C, h, w), (B, C, H, W), (B, H, W),
    ], strict=True):
        assert str(shape) in line, line
    assert len({B, 3, C, D, h, w, H, W}) == 8


def test_the_module_stands_alone():
    """It can be copied into a project that has torch and torchvision."""
    roots = set()
    for node in ast.walk(ast.parse(Path(deeplab.__file__).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots <= {"torch", "torchvision"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", ["resnet101", "resnet50", "resnet50_v1c"])
def test_large_students_end_in_the_aspp_of_deeplab_v2(name):
    """Four dilations (Chen et al.); batch norm in the branches of the published student alone."""
    branches = DeepLabV2(NAMES, *heads(), student=name).aspp.branches
    convs = [part for part in branches.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in branches.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [conv.dilation for conv in convs] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    assert len(norms) == (4 if name == "resnet50_v1c" else 0)


def test_autocast_leaves_the_length_of_features_in_full_precision():
    """Rounded to bf16, lengths would be off by some thousandths."""
    student = tiny().eval()
    with torch.autocast("cpu", torch.bfloat16):
        lengths = student.features(torch.rand(1, 3, 32, 48)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(1, 8, 12), rtol=0, atol=1e-6)


def test_batch_norms_of_the_aspp_are_never_frozen():
    """A backbone's weights hold no statistics for them."""
    student = DeepLabV2(NAMES, *heads(), student="resnet50_v1c", freeze_batch_norm=True).train()
    for part, learns in ((student.backbone, False), (student.aspp, True)):
        norms = [norm for norm in part.modules() if isinstance(norm, nn.BatchNorm2d)]
        assert {norm.training for norm in norms} == {learns}
        assert {norm.weight.requires_grad for norm in norms} == {learns}
