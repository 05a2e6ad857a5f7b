"""A device mix-up fails here, without a GPU: tensors that only claim to be on one.

Under FakeTensorMode a tensor has a shape, a type and a device, but no numbers. An operation on
tensors of two devices is refused as it would be on a GPU. So everything is run once on "cuda:0",
but for the backward pass, which asks for the GPU itself.
"""

import pytest
import torch

import eval as evaluation
import train
from clip_model import ATTENTIONS
from deeplab import HEADS, DeepLabV2
from reclip import (
    RECIPES,
    ReCLIP,
    ReCLIPPlusPlus,
    contrastive_loss,
    distillation_loss,
    feature_guided_loss,
    gumbel_softmax_masks,
    image_level_labels,
    mask_guided_loss,
    masked_features,
    segment,
    text_guided_loss,
    window_labels,
)

fake_tensor = pytest.importorskip(
    "torch._subclasses.fake_tensor", reason="this torch has no FakeTensorMode"
)
NAMES = ["cat", "dog", "grass of", "tree"]

try:
    with fake_tensor.FakeTensorMode():
        torch.empty(1, device="cuda:0").new_tensor([1.0])
except (RuntimeError, AssertionError):
    pytest.skip("this torch's FakeTensorMode wants a GPU (2.6's does)", allow_module_level=True)


@pytest.fixture
def on_gpu(clip, monkeypatch):
    """Inside of FakeTensorMode, a function that takes a model to "cuda:0" and back out of it."""
    # Asking a fake GPU for its properties would start CUDA.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=False)

    def move(module):
        """The same module with all parameters and buffers on the fake GPU."""
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda:0")
                    part._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = torch.empty(
                        buffer.shape, dtype=buffer.dtype, device="cuda:0"
                    )
        return module

    with mode:
        yield move


def make(kind, clip, **options):
    W_q = torch.nn.functional.normalize(torch.randn(4, 12), dim=1)
    return kind(clip, NAMES, W_q=W_q, prompt_length=3, tau=0.01, **options)


@pytest.fixture
def models(clip):
    """Built outside of the mode: what is made of the CPU's numbers is made before."""
    W = torch.randn(4, 12)
    M_p = torch.randn(1, 4, 3, 3)
    students = {}
    for head in HEADS:
        positional = M_p if head.endswith("positional") else None
        students[head] = DeepLabV2(NAMES, W, W, M_p=positional, student="tiny", head=head)
    return {
        "reclip": make(ReCLIP, clip, recipe="cvpr2024"),
        "reclip++": make(ReCLIPPlusPlus, clip),
        "students": students,
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_features(models, on_gpu, attention, recipe):
    model = on_gpu(models["reclip"])
    model.attention = attention
    model.recipe = recipe
    images = torch.empty(2, 3, 13, 18, device="cuda:0")
    valid = torch.empty(2, 13, 18, dtype=torch.bool, device="cuda:0")
    Z = model.features(images, valid)
    assert Z.shape == (2, 12, 4, 5) and Z.device.type == "cuda"


@pytest.mark.parametrize("method", ["reclip", "reclip++"])
def test_loss_of_rectification(models, on_gpu, method):
    model = on_gpu(models[method]).train()
    images = torch.empty(2, 3, 13, 18, device="cuda:0")
    labels = torch.empty(2, 4, dtype=torch.bool, device="cuda:0")
    Z = model.features(images)
    masks = gumbel_softmax_masks(model.rectify(Z).rectified, model.tau_1)
    loss = contrastive_loss(masked_features(Z, masks, model.pool), model.W_q, labels, model.tau)
    assert loss.shape == () and loss.device.type == "cuda"


def test_image_level_labels(models, on_gpu):
    model = on_gpu(models["reclip"])
    side = model.clip.input_resolution
    similarity = model.image_similarity(torch.empty(5, 3, side, side, device="cuda:0"))
    assert image_level_labels(similarity, 23.0, 2).device.type == "cuda"
    assert window_labels(similarity).device.type == "cuda"


@pytest.mark.parametrize("method", ["reclip", "reclip++"])
def test_masks_of_whole_images_and_of_windows(models, on_gpu, method):
    model = on_gpu(models[method]).eval()
    image = torch.empty(1, 3, 32, 41, device="cuda:0")
    logits = model(image).rectified
    assert logits.device.type == "cuda"
    windows = evaluation.slide(model, "rectified", image, window=16, stride=8)
    for grid in (logits, windows):
        mask = segment(grid, model.output_stride, (32, 41), (64, 82), denoise=0.5, scale=10)
        assert mask.shape == (64, 82) and mask.device.type == "cuda"


@pytest.mark.parametrize("head", HEADS)
def test_loss_of_distillation(models, on_gpu, head):
    teacher = on_gpu(models["reclip"]).eval()
    student = on_gpu(models["students"][head]).train()
    images = torch.empty(2, 3, 24, 24, device="cuda:0")
    valid = torch.empty(2, 24, 24, dtype=torch.bool, device="cuda:0")
    labels = torch.empty(2, 4, dtype=torch.bool, device="cuda:0")

    with torch.no_grad():
        taught = teacher(images, valid)
        pixels = teacher.to_pixels(taught.rectified, 24, 24)
        pseudo_labels = pixels.argmax(1).masked_fill(~valid, 255)
    answer = student(images, valid)
    loss = distillation_loss(
        mask_guided_loss(answer.rectified, pseudo_labels, 0.01, student.to_pixels),
        feature_guided_loss(
            taught.features, answer.features, valid, teacher.to_pixels, student.to_pixels
        ),
        text_guided_loss(answer.rectified, answer.features, teacher.W_q, labels, 0.001, 0.01),
    )
    assert loss.shape == () and loss.device.type == "cuda"
    train.average_gradients(student.parameters())  # alone: does nothing


def test_a_mix_up_is_refused(models, on_gpu):
    """The tests above mean something: an image on the CPU is not taken by a model on the GPU."""
    model = on_gpu(models["reclip"]).eval()
    with pytest.raises(RuntimeError, match="device"):
        model(torch.empty(1, 3, 12, 12))
