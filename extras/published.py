"""The authors' published checkpoints, converted once into our own.

    python extras/published.py RECTIFICATION STUDENT --data voc --out runs/published
    python eval.py --checkpoint runs/published/rectify.pt --data voc --root data
    python eval.py --checkpoint runs/published/distill.pt --data voc --root data
    python train.py --stage distill --data voc --root data --teacher runs/published/rectify.pt

github.com/dogehhh/ReCLIP links to the checkpoints behind the paper's numbers (on Google Drive; a
browser is needed). RECTIFICATION is one of stage 1, STUDENT (it may be left out) the one of stage 2
beside it. Afterwards eval.py and train.py work as with checkpoints of our own: --out then holds

    clip.pt       the CLIP of the rectification; ReCLIP.load finds it beside the checkpoint
    rectify.pt    what was learnt in stage 1, as ReCLIP.save writes it
    distill.pt    the student, as DeepLabV2.save writes it

and may be moved as a whole; the downloaded files are needed no more. (But OpenAI's vocabulary is.)
The sequel's files, ReCLIP++, are converted by extras/plusplus.py.

What stands here
    read                       a file of theirs, as {name: tensor}
    rectification              stage 1: path -> ReCLIP
      reading, folded          two steps that are more than renaming
    student                    stage 2: path -> DeepLabV2
      torchvision_names        its layers under our names
    main                       the command line

Symbols: C classes, D width of CLIP's joint space, L prompt vectors; E_v and E_t the widths of
CLIP's image tower and text tower.

A rectification (647 tensors, 590 MiB) holds, under names that begin with "module.":

    clip.*                          OpenAI's CLIP, under OpenAI's names
    vit.*, text_encoder.*, proj.*   its two towers once more; of these only what differs is read:
    vit.cls_token                   the class token that reads patches, from a file of its own
    text_encoder.prompt_token       v_1 .. v_73 of Eq. (1)
    proj_net.{0,3,6}, {1,4,7}       the positional net: convolutions with bias, batch norms
    conv1-3, norm1-3                the same layers again

Under the recipe that a file was trained with, the logits are the authors' own if three habits of
their code are kept: that class token and eps 1e-6 in the layer norms of the image tower's blocks
(reading), names cut to three tokens (Options.cut_names), and convolutions with biases (folded).

A student (552 tensors) holds

    backbone.stem.*                 three convolutions and batch norms
    backbone.res_layers.L.B.*       torchvision's layer{L + 1}.B.*, with norm1 for bn1
    decode_head.decode_module.aspp_modules.A.{conv, norm}    the branches of the ASPP
    decode_head: the rest           an unused layer, and parts of the teacher

and not the W_q and W_r of its head: they come from the rectification beside it.

Copied elsewhere (with clip_model.py, reclip.py and deeplab.py), without any conversion:
    model = rectification("voc_rectification.pth", VOC_CLASSES)      # ReCLIP, in eval mode
    small = student("voc_student.pth", VOC_CLASSES, *model.heads())  # DeepLabV2, in eval mode
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_model import build_clip, written_atomically  # noqa: E402  (the path comes first)
from datasets import DATA  # noqa: E402
from deeplab import DeepLabV2, read_file  # noqa: E402
from eval import best_device, make_protocol  # noqa: E402
from reclip import RECIPES, ReCLIP  # noqa: E402

# The data sets of the paper, whose classes are named in the authors' order (see datasets.py).
PUBLISHED = ("voc", "context", "ade20k")


def read(path, needed, kind):
    """A published file as {name without "module.": tensor}.

    needed: a name that files of this kind have, and no others; kind: the kind in words.
    Errors: FileNotFoundError; ValueError for another file.
    """
    content = read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {kind} of ReCLIP's authors: it holds no names")
    state = {}
    for name, tensor in content.get("state_dict", content).items():
        state[name.removeprefix("module.")] = tensor
    if needed not in state:
        raise ValueError(f"{path} is not {kind} of ReCLIP's authors: it has no {needed}")
    return state


def require_classes(path, rows, class_names):
    """ValueError unless the file's tensor `rows`, with a row for each class, fits the names."""
    if len(rows) != len(class_names):
        raise ValueError(f"{path} was learnt for {len(rows)} classes, and {len(class_names)} are "
                         "named: give the names of its data set, in the authors' order")


# --- Stage 1 --------------------------------------------------------------------------------------

def rectification(path, class_names, recipe="cvpr2024", W_q=None, device="cpu"):
    """A ReCLIP in eval mode from a rectification that the paper's authors published.

    No other weights are needed: the file holds the whole CLIP.

    class_names: the data set's, in the authors' order (datasets.VOC_CLASSES and so on).
    recipe: the files do not say which; that it is the paper's is inferred (see reclip.RECIPES).
    W_q: (C, D), if it is known; else it is made of 85 C texts, in seconds on a GPU and minutes on a
        CPU.
    Errors: ValueError for a file that is none of theirs, or of other classes.
    """
    state = read(path, "text_encoder.prompt_token", "a rectification")
    if "pe_proj.weight" in state:
        raise ValueError(f"{path} is a ReCLIP++ checkpoint, which is another method: "
                         f"python extras/plusplus.py --data voc --published {path} converts it")
    require_classes(path, state["proj_net.6.weight"], class_names)

    clip = clip_inside(state, device)
    vectors = state["text_encoder.prompt_token"][0].float()             # (L, E_t)
    model = ReCLIP(
        clip,
        class_names,
        W_q=W_q,
        reading=reading(state),
        recipe=recipe,
        prompt_length=len(vectors),
        cut_names=True,
    )
    model.reference.load_state_dict({"vectors": vectors})
    model.positional.net.load_state_dict(folded(state))
    return model.eval()


def clip_inside(state, device="cpu"):
    """The CLIP that a published file holds, as load_clip makes one of a file of its own."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("clip."):
            tensors[name.removeprefix("clip.")] = tensor.float()

    clip = build_clip(tensors)
    clip.load_state_dict(tensors, assign=True)
    return clip.eval().requires_grad_(False).to(device)


def reading(state):
    """How their code reads patches: with a class token of its own, and another eps.

    The class token (E_v,) takes part in the attention of every block but the last, so it moves the
    features of all patches. The eps is that of the two layer norms of each block.
    """
    return {"class_token": state["vit.cls_token"].float().flatten(), "eps": 1e-6}


def folded(state):
    """The positional net of a published file, for PositionalBias.net, which has no biases.

    A batch norm subtracts its running mean. Whether b is added before that or the mean is lower by
    b comes to the same.
    """
    net = {}
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        net[f"{conv}.weight"] = state[f"proj_net.{conv}.weight"]
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            net[f"{norm}.{name}"] = state[f"proj_net.{norm}.{name}"]
        net[f"{norm}.running_mean"] = net[f"{norm}.running_mean"] - state[f"proj_net.{conv}.bias"]
    return net


def save_with_clip(model, path):
    """Writes a converted model to `path`, and the CLIP inside it beside that, as clip.pt."""
    beside = path.parent / "clip.pt"
    with written_atomically(beside) as temporary:
        torch.save(model.clip.state_dict(), temporary)
    model.clip.source = str(beside.resolve())
    model.save(path)
    print(f"{path} is written, with its CLIP beside it")


def require_new_folder(out):
    """ValueError if there are checkpoints in the folder `out`: a conversion would replace them."""
    if any(out.glob("*.pt")):
        raise ValueError(f"{out} holds checkpoints already: give another --out")


# --- Stage 2 --------------------------------------------------------------------------------------

def student(path, class_names, W_q, W_r, device="cpu"):
    """A DeepLabV2 in eval mode from a student that the paper's authors published.

    class_names: the data set's, in the authors' order.
    W_q, W_r: (C, D), the heads of the rectification published beside it: ReCLIP.heads().
    Errors: ValueError for a file that is none of theirs, or of other classes.
    """
    state = read(path, "decode_head.decode_module.aspp_modules.0.conv.weight", "a student")
    # a layer that their head never uses; its rows count the classes
    require_classes(path, state["decode_head.decode_module.conv_seg.weight"], class_names)

    model = DeepLabV2(class_names, W_q, W_r, student="resnet50_v1c")
    heads = {"W_q": model.W_q, "W_r": model.W_r}
    model.load_state_dict(torchvision_names(state) | heads)
    return model.to(device).eval()


def torchvision_names(state):
    """The backbone and ASPP of a published student, under the names of DeepLabV2's state dict."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("backbone.stem."):
            renamed[key] = value
        elif key.startswith("backbone.res_layers."):
            _, _, layer, rest = key.split(".", 3)
            rest = rest.replace("norm", "bn")
            renamed[f"backbone.layer{int(layer) + 1}.{rest}"] = value
        elif key.startswith("decode_head.decode_module.aspp_modules."):
            _, _, _, branch, part, rest = key.split(".", 5)
            place = {"conv": 0, "norm": 1}[part]
            renamed[f"aspp.branches.{branch}.{place}.{rest}"] = value
    return renamed


# --- Command line ---------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("rectification", type=Path, help="the authors' file of stage 1")
    add("student", type=Path, nargs="?", help="the authors' file of stage 2")
    add("--data", choices=PUBLISHED, required=True, help="the data set it was learnt on")
    add("--recipe", choices=list(RECIPES), default="cvpr2024",
        help="how it was learnt (default: cvpr2024, published together with these files)")
    add("--out", type=Path, help="folder of the result (default: runs/<data>-published)")
    add("--device", default=best_device(), help="cpu, cuda, mps (default: the best there is)")
    args = parser.parse_args(argv)

    dataset = DATA[args.data]
    out = args.out or Path("runs") / f"{args.data}-published"
    require_new_folder(out)
    teacher = rectification(args.rectification, dataset.classes, args.recipe, device=args.device)
    teacher.protocol = make_protocol("rectify", dataset, args.recipe)
    if args.student:
        learner = student(args.student, dataset.classes, *teacher.heads(), args.device)
        learner.protocol = make_protocol("distill", dataset, args.recipe)

    save_with_clip(teacher, out / "rectify.pt")
    if args.student:
        learner.save(out / "distill.pt")
        print(f"{out / 'distill.pt'} is written")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"published.py: {error}")
