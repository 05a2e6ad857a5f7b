"""deeplab.py: the backbones against torchvision's own, ASPP and heads against their formulas, and
what a student keeps in its file.

The losses that it learns from are in test_equations.py, its training in test_train.py.
"""

import ast
import os
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import deeplab
import reference
from conftest import close, sentence
from deeplab import ASPP, HEADS, STUDENTS, DeepLabV2, Student

NAMES = ["cat", "dog", "sofa | couch", "grass", "sky"]
C, D = 5, 16


def texts():
    """W_q with rows of length 1, and W_r, whose rows are shorter; the same each time."""
    generator = torch.Generator().manual_seed(0)
    W_q, W_r = F.normalize(torch.randn(2, C, D, generator=generator), dim=-1)
    return W_q, W_r / C ** 0.5


def tiny(**changes):
    """A tiny student in eval mode, the same each time but for the changes."""
    torch.manual_seed(1)
    return DeepLabV2(NAMES, *texts(), **{"student": "tiny", **changes}).eval()


def M_p_for(head):
    """M_p for the one head that has it."""
    if head == "query_reference_positional":
        return torch.rand(1, C, 7, 5)
    return None


def without_backbone(monkeypatch, name):
    """Students of this name are built without their backbone, which takes seconds."""
    monkeypatch.setitem(STUDENTS, name, STUDENTS[name]._replace(build=nn.Identity))


def batch_norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


# --- Backbones ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, blocks", [("resnet50", 6), ("resnet101", 23)])
def test_dilation_moves_no_weight(tmp_path, name, blocks):
    """Every fourth cell of the fine grid is a cell of torchvision's own, coarse one."""
    net = torchvision.models.get_model(name).eval()
    for norm in batch_norms(net):
        norm.running_mean.normal_(std=0.1)  # not as a new one has it: that would hide a loss
        norm.running_var.uniform_(0.5, 2)
    torch.save(net.state_dict(), tmp_path / "trained.pth")
    student = tiny(student=name, backbone_weights=tmp_path / "trained.pth")

    pixels = torch.randn(1, 3, 65, 80)
    with torch.no_grad():
        fine = student.backbone(pixels)
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        coarse = net.layer4(net.layer3(net.layer2(net.layer1(x))))

    assert coarse.shape == (1, 2048, 3, 3)    # one cell per 32 x 32 pixels
    assert fine.shape == (1, 2048, 9, 10)     # per 8 x 8
    close(fine[..., ::4, ::4] / coarse.max(), coarse / coarse.max(), 1e-5)
    assert len(student.backbone.layer3) == blocks


@pytest.mark.parametrize("name", ["resnet50_v1c", "tiny"])
def test_backbones_keep_what_the_table_of_students_says(name):
    row = STUDENTS[name]
    s = row.output_stride

    with torch.no_grad():
        x = row.build().eval()(torch.rand(1, 3, 5 * s - 1, 7 * s + 1))

    assert x.shape == (1, row.channels, 5, 8)


@pytest.mark.parametrize("source", ["a file", "imagenet"])
def test_any_network_of_torchvision_is_filled_by_its_names(tmp_path, monkeypatch, source):
    """What the backbone has not, here the classifier, stays in the file."""
    net = torchvision.models.get_model("squeezenet1_1")
    torch.save(net.state_dict(), tmp_path / "trained.pth")
    if source == "a file":
        source = tmp_path / "trained.pth"
    asked = []

    def fetched(url, **options):
        asked.append(url)
        return net.state_dict()

    def build():
        return nn.Sequential(OrderedDict(
            features=torchvision.models.get_model("squeezenet1_1").features,
        ))

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    monkeypatch.setitem(STUDENTS, "squeezenet1_1", Student(build, 512, 16, (1, 2), False))
    student = tiny(student="squeezenet1_1", backbone_weights=source)

    pixels = torch.randn(1, 3, 40, 50)
    assert torch.equal(student.backbone(pixels), net.features(pixels))
    assert len(asked) == (source == "imagenet") and all("squeezenet1_1" in url for url in asked)


def test_no_weight_of_a_backbone_may_be_missing(tmp_path):
    state = tiny().backbone.state_dict()
    del state["4.conv1.weight"]

    for content, words in (
        (state, "4.conv1.weight"), ({"state_dict": state}, "0.weight"), ([], "")
    ):
        torch.save(content, tmp_path / "trained.pth")
        with pytest.raises(ValueError, match=f"does not hold the weights of tiny.*{words}"):
            tiny(backbone_weights=tmp_path / "trained.pth")


# --- ASPP -----------------------------------------------------------------------------------------

def dilated_convolution(weight, bias, x, rate):
    """3x3, taps `rate` cells apart, zero outside: (O, I, 3, 3), (O,), (I, h, w) -> (O, h, w)."""
    h, w = x.shape[1:]
    out = torch.zeros(len(weight), h, w, dtype=x.dtype) + bias[:, None, None]
    for i in range(h):
        for j in range(w):
            for a in range(3):
                for b in range(3):
                    y = i + (a - 1) * rate
                    z = j + (b - 1) * rate
                    if 0 <= y < h and 0 <= z < w:
                        out[:, i, j] += weight[:, :, a, b] @ x[:, y, z]
    return out


@pytest.mark.parametrize("batch_norm", [False, True])
def test_aspp_is_the_sum_of_dilated_convolutions(batch_norm):
    """In the published student each of them ends in batch norm (here as new) and ReLU."""
    rates = (1, 2, 3, 5)
    aspp = ASPP(3, 4, rates, batch_norm).double().eval().requires_grad_(False)
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)

    expected = 0
    for branch, rate in zip(aspp.branches, rates, strict=True):
        if batch_norm:
            of_rate = dilated_convolution(branch[0].weight, torch.zeros(4), x[0], rate)
            expected = expected + of_rate.clamp(min=0) / (1 + branch[1].eps) ** 0.5
        else:
            expected = expected + dilated_convolution(branch.weight, branch.bias, x[0], rate)
    close(aspp(x)[0], expected)


@pytest.mark.parametrize("name, channels, rates, norms", [
    ("resnet101", 2048, [6, 12, 18, 24], 0),
    ("resnet50", 2048, [6, 12, 18, 24], 0),
    ("resnet50_v1c", 2048, [6, 12, 18, 24], 4),  # the published student's
    ("tiny", 96, [1, 2, 3, 4], 0),
])
def test_students_end_in_the_aspp_of_deeplab_v2(monkeypatch, name, channels, rates, norms):
    without_backbone(monkeypatch, name)
    branches = tiny(student=name).aspp.branches

    convolutions = [part for part in branches.modules() if isinstance(part, nn.Conv2d)]
    assert [conv.dilation for conv in convolutions] == [(rate, rate) for rate in rates]
    assert all(conv.weight.shape == (D, channels, 3, 3) for conv in convolutions)
    assert len(batch_norms(branches)) == norms


# --- Features -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_the_aspp_of_the_backbone_at_length_1(dtype):
    """Of either sign, as CLIP's are, and of the precision of the images."""
    student = tiny().to(dtype)
    images = torch.rand(2, 3, 22, 30, dtype=dtype)

    Z = student.features(images)

    pixels = [reference.normalized(image, reference.IMAGENET_COLORS) for image in images]
    x = student.aspp(student.backbone(torch.stack(pixels)))             # (B, D, h, w)
    close(Z, x / x.square().sum(1, keepdim=True).sqrt(), 1e-6)
    assert Z.dtype == dtype and Z.shape == (2, D, 6, 8)
    assert 0.2 < (Z < 0).float().mean() < 0.8


def test_autocast_rounds_the_features_but_not_their_length():
    """In bf16 lengths would be off by some thousandths."""
    with torch.autocast("cpu", torch.bfloat16):
        Z = tiny().features(torch.rand(1, 3, 32, 48))

    assert Z.dtype == torch.float32
    close(Z.norm(dim=1), torch.ones(1, 8, 12), 1e-6)


@pytest.mark.parametrize("call", ["features", "forward"])
def test_padding_is_0_where_it_enters_the_backbone(call):
    """Whatever it held; the images themselves are as without it."""
    student = tiny()
    entered = []
    student.backbone.register_forward_pre_hook(lambda part, inputs: entered.append(inputs[0]))
    images = torch.rand(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :10] = True
    valid[1, :, :7] = True

    getattr(student, call)(images, valid)

    for b in range(2):
        expected = reference.normalized(images[b], reference.IMAGENET_COLORS, valid[b])
        assert (expected == 0).sum() == 3 * (~valid[b]).sum()
        close(entered[0][b], expected, 1e-6)
        assert torch.equal(entered[0][b] == 0, expected == 0)


# --- Heads ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", HEADS)
def test_heads_of_table_6(head):
    M_p = M_p_for(head)
    student = tiny(head=head, M_p=M_p)
    W_q, W_r = texts()

    output = student(torch.rand(2, 3, 45, 62))                          # 12 x 16 cells

    for Z, M in zip(output.features, output.rectified, strict=True):
        if head == "original":
            kernel, bias = student.classifier.weight[:, :, 0, 0], student.classifier.bias
            expected = torch.einsum("cd,dhw->chw", kernel, Z) + bias[:, None, None]
        elif head == "query":
            expected = torch.einsum("cd,dhw->chw", W_q, Z)
        else:
            expected = reference.student_logits(Z, W_q, W_r, None if M_p is None else M_p[0])
        close(M, expected, 1e-6)
    learns = {name.split(".")[0] for name, _ in student.named_parameters()}
    assert learns == {"backbone", "aspp"} | ({"classifier"} if head == "original" else set())
    assert student.scale == (1 if head == "original" else 100)


def test_texts_are_copied():
    W_q, W_r = texts()
    student = DeepLabV2(NAMES, W_q.requires_grad_(), W_r, student="tiny")
    W_r.zero_()

    assert not student.W_q.requires_grad
    assert torch.equal(student.W_r, texts()[1])


# --- From cells to pixels -------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(12, 16), (10, 13), (9, 15), (1, 2)])
def test_cells_become_4_x_4_pixels_and_what_reaches_over_the_edge_is_cut_off(H, W):
    student = tiny()
    grid = student(torch.rand(2, 3, H, W)).rectified.double()

    assert grid.shape == (2, C, -(-H // 4), -(-W // 4))
    close(student.to_pixels(grid, H, W), reference.enlarge(grid, 4, H, W))


def test_a_backbone_of_another_stride_or_that_rounds_down_is_refused(monkeypatch):
    """Its last row would be missing, and everything else a little too far down."""
    floored = nn.Conv2d(3, 6, 4, stride=4)
    monkeypatch.setitem(STUDENTS, "floored", Student(lambda: floored, 6, 4, (1, 2), False))
    student = tiny(student="floored")
    grid = student(torch.rand(1, 3, 16, 27)).rectified                  # 4 x 6 cells

    assert student.to_pixels(grid, 16, 24).shape == (1, C, 16, 24)
    for H, W in ((16, 27), (8, 12)):  # (8, 12): as if the row in STUDENTS had twice its stride
        with pytest.raises(ValueError) as caught:
            student.to_pixels(grid, H, W)
        assert f"4 x 6 cells of 4 pixels are not those of an image of {H} x {W}" in sentence(caught)


# --- What learns ----------------------------------------------------------------------------------

@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_stays_as_it_was_to_the_bit(frozen):
    student = tiny(
        freeze_batch_norm=frozen,
        head="query_reference_positional",
        M_p=M_p_for("query_reference_positional"),
    ).train()
    before = {key: value.clone() for key, value in student.state_dict().items()}

    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.rand(2, 3, 32, 48)).rectified[:, 0].mean().backward()
        optimizer.step()

    fixed = {"W_q", "W_r", "M_p"}
    if frozen:
        for name, module in student.backbone.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                fixed |= {f"backbone.{name}.{key}" for key in module.state_dict()}
    unchanged = {key for key, value in student.state_dict().items()
                 if torch.equal(value, before[key])}
    assert unchanged == fixed


def test_batch_norms_are_frozen_where_the_backbone_has_been_trained(tmp_path):
    torch.save(tiny().backbone.state_dict(), tmp_path / "trained.pth")
    start = {"backbone_weights": tmp_path / "trained.pth"}

    assert tiny().train().backbone[1].training
    assert not tiny(**start).train().backbone[1].training
    assert tiny(**start, freeze_batch_norm=False).train().backbone[1].training


def test_batch_norms_of_the_aspp_always_learn(monkeypatch):
    """A trained backbone brings no statistics for them."""
    without_backbone(monkeypatch, "resnet50_v1c")
    student = tiny(student="resnet50_v1c", freeze_batch_norm=True).train()

    for norm in batch_norms(student.aspp):
        assert norm.training and norm.weight.requires_grad


# --- Files ----------------------------------------------------------------------------------------

PROTOCOL = {"long_side": 90, "short_side": 40, "antialias": True, "denoise": 0.25}


@pytest.mark.parametrize("head", HEADS)
def test_a_loaded_student_is_the_saved_one(tmp_path, head):
    path = tmp_path / "runs" / "mine" / "distill.pt"                    # folders that are not there
    student = tiny(head=head, M_p=M_p_for(head), freeze_batch_norm=True, protocol=PROTOCOL)
    student.backbone[1].running_mean += 0.5

    student.save(str(path), training={"step": 3})
    loaded = DeepLabV2.load(str(path))

    assert os.listdir(path.parent) == ["distill.pt"]
    assert torch.load(path, weights_only=True)["training"] == {"step": 3}
    assert loaded.class_names == tuple(NAMES) and loaded.protocol == PROTOCOL
    assert not loaded.training and not loaded.train().backbone[1].training
    images = torch.rand(1, 3, 45, 62)
    for found, expected in zip(loaded.eval()(images), student(images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("error", [
    OSError("no space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "distill.pt"
    tiny().save(path)
    old = path.read_bytes()

    def full_disk(content, file):
        file.write(old[:5000])
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError) as caught:
        tiny(head="query").save(path)
    assert f"{path} could not be written" in sentence(caught)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["distill.pt"]


@pytest.mark.parametrize("kind", [
    "missing", "cut in half", "text", "a list", "a rectification", "hostile",
])
def test_files_that_are_no_students_end_in_a_sentence(tmp_path, hostile, kind):
    path = tmp_path / "distill.pt"
    tiny().save(path)
    if kind == "missing":
        path.unlink()
    if kind == "cut in half":
        os.truncate(path, path.stat().st_size // 2)
    if kind == "text":
        path.write_text("distill")
    if kind == "a list":
        torch.save([1, 2], path)
    if kind == "a rectification":
        torch.save({"stage": "rectify"}, path)
    if kind == "hostile":
        torch.save({"stage": "distill", "learnt": hostile.payload}, path)

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        DeepLabV2.load(path)
    assert str(path) in sentence(caught)
    if kind not in ("a list", "a rectification"):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            tiny(backbone_weights=path)
        assert str(path) in sentence(caught)
    assert not hostile.ran()


# --- What would be silently wrong -----------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_of_whole_numbers_are_refused(dtype):
    """Mean and deviation, cast to whole numbers, are 0."""
    with pytest.raises(ValueError) as caught:
        tiny()(torch.ones(1, 3, 16, 24, dtype=dtype))
    assert "must be floats in [0, 1], which images.float() / 255 makes" in sentence(caught)


@pytest.mark.parametrize("changes, words", [
    ({"head": "both"}, "it must be one of original, query, query_reference"),
    ({"head": "query_reference_positional"}, "M_p goes with the head query_reference_positional"),
    ({"M_p": torch.zeros(1, 1, 2, 2)}, "M_p goes with the head query_reference_positional"),
    ({"backbone_weights": "imagenet"}, "torchvision has no ImageNet weights for tiny"),
    ({"class_names": NAMES[:4]}, "one row for each of the 4 classes"),
    ({"W_r": torch.zeros(4, D)}, "W_q (5, 16) and W_r (4, 16)"),
])
def test_parts_that_do_not_fit_are_refused(changes, words):
    W_q, W_r = texts()
    arguments = {"class_names": NAMES, "W_q": W_q, "W_r": W_r, "student": "tiny"}
    with pytest.raises(ValueError) as caught:
        DeepLabV2(**arguments | changes)
    assert words in sentence(caught)


# --- The file itself ------------------------------------------------------------------------------

def test_it_stands_alone_but_for_torch_and_torchvision():
    imported = set()
    for node in ast.walk(ast.parse(Path(deeplab.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)

    packages = {name.split(".")[0] for name in imported}
    assert packages <= {"torch", "torchvision"} | sys.stdlib_module_names


def test_the_example_in_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().save("distill.pt")
    example = deeplab.__doc__.split("it is used like this:\n")[1].split("To train one")[0]
    names = {"DeepLabV2": DeepLabV2, "images": torch.rand(2, 3, 50, 70), "torch": torch}

    exec(textwrap.dedent(example), names)

    assert names["masks"].shape == (2, 50, 70)
