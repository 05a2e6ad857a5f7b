"""DeepLab V2 against literal loops, closed forms, and what it must refuse."""

import ast
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
from deeplab import ASPP, HEADS, DeepLabV2

C, D = 5, 16
NAMES = ["cat", "dog", "sofa | couch", "grass", "sky"]


def heads(seed=0):
    g = torch.Generator().manual_seed(seed)
    W_q, W_r = F.normalize(torch.randn(2, C, D, generator=g), dim=-1)
    return W_q, W_r / C ** 0.5


def tiny(**changes):
    torch.manual_seed(1)
    return DeepLabV2(NAMES, *heads(), **{"student": "tiny", **changes})


def literal_conv(x, weight, bias, rate):
    """3x3 convolution with holes of rate - 1, by the definition, zero outside: (1, I, h, w) -> (1, O, h, w)"""
    _, _, h, w = x.shape
    out = torch.zeros(1, len(weight), h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            total = bias.clone()
            for a in range(3):
                for b in range(3):
                    y, z = i + (a - 1) * rate, j + (b - 1) * rate
                    if 0 <= y < h and 0 <= z < w:
                        total = total + weight[:, :, a, b] @ x[0, :, y, z]
            out[0, :, i, j] = total
    return out


def test_aspp_is_the_sum_of_literal_dilated_convolutions():
    torch.manual_seed(0)
    aspp, x = ASPP(3, 4, rates=(1, 2, 3, 5)).double(), torch.randn(1, 3, 7, 6, dtype=torch.float64)
    want = sum(literal_conv(x, c.weight, c.bias, rate) for c, rate in zip(aspp.branches, (1, 2, 3, 5)))
    torch.testing.assert_close(aspp(x), want, rtol=0, atol=1e-12)


def test_aspp_of_the_paper_and_features_of_either_sign():
    aspp = ASPP(3, 4)
    assert [c.dilation for c in aspp.branches] == [(r, r) for r in (6, 12, 18, 24)]
    assert all(c.bias is not None for c in aspp.branches)
    negative = (tiny().eval().features(torch.rand(2, 3, 64, 64)) < 0).float().mean()
    assert 0.2 < negative < 0.8


def test_full_size_resnet101():
    torch.manual_seed(0)
    student = DeepLabV2(NAMES, *heads()).eval()
    with torch.no_grad():
        out = student(torch.rand(1, 3, 64, 96))
    assert out.rectified.shape == (1, C, 8, 12) and out.features.shape == (1, D, 8, 12)  # stride 8
    # DeepLab V2: no stride behind conv3_x, dilation 2 and 4 instead (torchvision gives a stage's first block the
    # dilation of the stage before)
    assert [student.backbone.layer3[i].conv2.dilation[0] for i in (0, 1, -1)] == [1, 2, 2]
    assert [student.backbone.layer4[i].conv2.dilation[0] for i in (0, 1, -1)] == [2, 4, 4]
    assert len(student.backbone.layer3) == 23


@pytest.mark.parametrize("H, W", [(64, 64), (48, 96), (61, 90), (5, 7)])
def test_grid_and_pixels_of_any_size(H, W):
    student = tiny().eval()
    out = student(torch.rand(2, 3, H, W))
    assert out.rectified.shape == (2, C, -(-H // 4), -(-W // 4))
    assert student.to_pixels(out.rectified, H, W).shape == (2, C, H, W)


def test_to_pixels_is_literal_bilinear_interpolation():
    torch.manual_seed(0)
    student, grid, (H, W) = tiny(), torch.randn(1, 2, 3, 4, dtype=torch.float64), (10, 15)
    want = torch.zeros(1, 2, H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):  # cell k's centre lies at pixel 4 k + 1.5; outside the outermost centres it is constant
            y, x = min(max((i - 1.5) / 4, 0), 2), min(max((j - 1.5) / 4, 0), 3)
            a, b = min(int(y), 1), min(int(x), 2)
            want[..., i, j] = sum(grid[..., a + s, b + t] * abs(1 - s - (y - a)) * abs(1 - t - (x - b))
                                  for s in (0, 1) for t in (0, 1))
    torch.testing.assert_close(student.to_pixels(grid, H, W), want, rtol=0, atol=1e-12)


def test_features_are_normalised_and_pictures_are_too():
    student, pictures = tiny().eval(), torch.rand(2, 3, 40, 56)
    Z = student.features(pictures)
    torch.testing.assert_close(Z.norm(dim=1), torch.ones(2, 10, 14))
    x = torch.stack([(pictures[:, c] - m) / s for c, (m, s) in
                     enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])], 1)
    torch.testing.assert_close(Z, F.normalize(student.aspp(student.backbone(x)), dim=1))


def test_default_head_is_the_literal_subtraction():
    W_q, W_r = heads()
    out = tiny().eval()(torch.rand(2, 3, 48, 64))
    Z = out.features.permute(0, 2, 3, 1)  # (B, h, w, D)
    torch.testing.assert_close(out.rectified.permute(0, 2, 3, 1), Z @ W_q.T - Z @ W_r.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.query.permute(0, 2, 3, 1), Z @ W_q.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.reference.permute(0, 2, 3, 1), Z @ W_r.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("channels", [1, C])
def test_heads_of_table_6(head, channels):
    M_p = torch.rand(1, channels, 14, 14) if head == "query_reference_positional" else None
    student = tiny(head=head, M_p=M_p).eval()
    out = student(torch.rand(2, 3, 48, 64))
    zero = torch.zeros(1, 1, 12, 16)
    positional = F.interpolate(M_p, size=(12, 16), mode="bilinear", align_corners=False) if M_p is not None else zero
    torch.testing.assert_close(out.positional, positional)
    want = {"query": out.query, "query_reference": out.query - out.reference,
            "query_reference_positional": out.query - out.reference - positional}
    if head == "original":
        want["original"] = F.conv2d(out.features, student.classifier.weight, student.classifier.bias)
    torch.testing.assert_close(out.rectified, want[head])
    learns = [name for name, _ in student.named_parameters() if not name.startswith(("backbone.", "aspp."))]
    assert learns == (["classifier.weight", "classifier.bias"] if head == "original" else [])


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_stays_bit_identical(frozen):
    student = tiny(freeze_batch_norm=frozen, head="query_reference_positional", M_p=torch.rand(1, C, 8, 8)).train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    optimiser = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        student(torch.rand(2, 3, 32, 48)).rectified[:, 0].mean().backward()
        optimiser.step()
    norms = {f"backbone.{name}.{key}" for name, m in student.backbone.named_modules()
             if isinstance(m, nn.BatchNorm2d) for key in m.state_dict()}
    assert len(norms) == 5 * 9  # of tiny's nine batch norms
    for key, value in student.state_dict().items():
        fixed = key in ("W_q", "W_r", "M_p") or frozen and key in norms
        assert torch.equal(value, before[key]) == fixed, key


def test_batch_norm_follows_the_start(tmp_path):
    torch.save(tiny().backbone.state_dict(), tmp_path / "b.pt")
    assert tiny().train().backbone[1].training
    assert not tiny(backbone_weights=tmp_path / "b.pt").train().backbone[1].training
    assert tiny(backbone_weights=tmp_path / "b.pt", freeze_batch_norm=False).train().backbone[1].training


def test_autocast_leaves_the_head_in_full_precision():
    student, pictures = tiny().eval(), torch.rand(1, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        out = student(pictures)
    assert {x.dtype for x in out} == {torch.float32}
    torch.testing.assert_close(out.rectified, student.rectify(out.features).rectified, rtol=0, atol=0)


# -- files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(tmp_path, head):
    M_p = torch.rand(1, 1, 14, 14) if head == "query_reference_positional" else None
    student = tiny(head=head, M_p=M_p, freeze_batch_norm=True).eval()
    student.save(tmp_path / "distill.pt")
    again, pictures = DeepLabV2.load(tmp_path / "distill.pt"), torch.rand(1, 3, 45, 64)
    assert again.class_names == tuple(NAMES) and again.settings == student.settings and not again.training
    for a, b in zip(again(pictures), student(pictures)):
        assert torch.equal(a, b)
    assert os.listdir(tmp_path) == ["distill.pt"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "distill.pt"
    tiny().save(path)
    old = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        tiny(head="query").save(path)
    assert path.read_bytes() == old


def test_backbone_weights_in_torchvisions_names(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    for m in net.modules():  # not the fresh 0 and 1, which a loader could forget unseen
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    torch.save(net.state_dict(), tmp_path / "r50.pth")
    student = DeepLabV2(NAMES, *heads(), student="resnet50", backbone_weights=tmp_path / "r50.pth").eval()
    x = torch.randn(1, 3, 33, 48)
    with torch.no_grad():
        want = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        want = net.layer4(net.layer3(net.layer2(net.layer1(want))))
        torch.testing.assert_close(student.backbone(x), want)
    assert want.shape == (1, 2048, 5, 6)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_file_was_run",)


def one_sentence(info, *parts):
    message = str(info.value)
    assert "\n" not in message and all(part in message for part in parts), message


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


def test_missing_files_end_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError) as info:
        DeepLabV2.load(tmp_path / "none.pt")
    one_sentence(info, "none.pt", "--stage distill")
    with pytest.raises(FileNotFoundError) as info:
        tiny(backbone_weights=tmp_path / "none.pt")
    one_sentence(info, "none.pt", "imagenet")


def test_no_network_ends_in_one_sentence(monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError) as info:
        DeepLabV2(NAMES, *heads(), student="resnet50", backbone_weights="imagenet")
    one_sentence(info, "Name or service not known", "imagenet")


@pytest.mark.parametrize("changes, part", [
    ({"student": "vgg"}, "resnet101"), ({"head": "both"}, "query_reference"),
    ({"head": "query_reference_positional"}, "needs"), ({"M_p": torch.zeros(1, 1, 2, 2)}, "takes no"),
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


def test_tour_prints_every_tensor(capsys):
    deeplab.tour()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["pictures", *deeplab.Logits._fields, "to_pixels", "masks"]


def test_the_module_stands_alone():
    imports = [node for node in ast.walk(ast.parse(Path(deeplab.__file__).read_text()))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {name.split(".")[0] for node in imports
             for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert roots <= {"torch", "torchvision"} | sys.stdlib_module_names
