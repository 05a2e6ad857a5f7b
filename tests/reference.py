"""The arithmetic of the paper once more, slow and plain: what the tests compare with.

CLIP (openai/CLIP; MaskCLIP for patches), one step of ReCLIP, and the student's head, written from
their formulas with matrix products and loops, for one image at a time. Nothing here imports the
code under test. `state` is always a state dict; widths, layers and grids are read off its tensors.

    image_vector, patch_vectors, text_vector, prompted_vector       CLIP
    enlarge                                                         from patches to pixels
    query_heads, reference_heads, positional_map, rectified_logits  Eq. (1)-(3)
    gumbel_noise, hard_masks, contrastive_loss                      Eq. (4)-(5)
    student_logits                                                  Sec. 3.5

Symbols as in reclip.py; h x w patches, n = h * w.
"""

import math

import torch
import torch.nn.functional as F

CLIP_COLORS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- CLIP -----------------------------------------------------------------------------------------

def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def exact_gelu(x):
    """x times the probability that a normal variable is below x."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def normalized(image, colors=CLIP_COLORS, valid=None):
    """(3, H, W) in [0, 1] -> mean off, by the deviation; 0 outside of valid (H, W)."""
    out = torch.zeros_like(image)
    for channel, (mean, deviation) in enumerate(zip(*colors)):
        out[channel] = (image[channel] - mean) / deviation
        if valid is not None:
            out[channel][~valid] = 0
    return out


def layer_norm(state, key, x, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[key + "weight"] + state[key + "bias"]


def linear(state, key, x):
    return x @ state[key + "weight"].T + state[key + "bias"]


def mlp(state, key, x, gelu):
    hidden = gelu(linear(state, key + "mlp.c_fc.", layer_norm(state, key + "ln_2.", x)))
    return linear(state, key + "mlp.c_proj.", hidden)


def attention(state, key, x, causal):
    """(T, E) -> (T, E), head by head; a head has 64 numbers. causal: nobody reads what follows."""
    projected = x @ state[key + "in_proj_weight"].T + state[key + "in_proj_bias"]
    queries, keys, values = projected.chunk(3, dim=1)                   # (T, E) each
    heads = max(1, x.shape[1] // 64)
    size = x.shape[1] // heads

    out = []
    for head in range(heads):
        part = slice(size * head, size * (head + 1))
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(size)   # (T, T)
        if causal:
            later = torch.ones_like(scores).triu(1).bool()
            scores = scores.masked_fill(later, -torch.inf)
        out.append(scores.softmax(1) @ values[:, part])
    return linear(state, key + "out_proj.", torch.cat(out, dim=1))


def block(state, key, x, gelu, causal=False):
    x = x + attention(state, key + "attn.", layer_norm(state, key + "ln_1.", x), causal)
    return x + mlp(state, key, x, gelu)


def block_keys(state, tower):
    """"visual.transformer.resblocks.0.", ..., for each block of a tower."""
    keys = []
    while f"{tower}.resblocks.{len(keys)}.ln_1.weight" in state:
        keys.append(f"{tower}.resblocks.{len(keys)}.")
    return keys


def positional_table(state, h, w):
    """p of Sec. 3.3, (E_v, h, w): the positional embedding but for the class token, as a grid."""
    rows = state["visual.positional_embedding"][1:]
    side = math.isqrt(len(rows))
    table = rows.T.reshape(1, -1, side, side)
    return F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)[0]


def embedded(state, pixels):
    """Pixels (3, H, W), normalized -> tokens (1 + n, E_v), patch by patch; and (h, w)."""
    kernel = state["visual.conv1.weight"]                               # (E_v, 3, patch, patch)
    patch = kernel.shape[-1]
    h, w = math.ceil(pixels.shape[1] / patch), math.ceil(pixels.shape[2] / patch)
    canvas = pixels.new_zeros(3, h * patch, w * patch)
    canvas[:, :pixels.shape[1], :pixels.shape[2]] = pixels
    table = positional_table(state, h, w)

    tokens = [state["visual.class_embedding"] + state["visual.positional_embedding"][0]]
    for y in range(h):
        for x in range(w):
            window = canvas[:, patch * y:patch * (y + 1), patch * x:patch * (x + 1)]
            tokens.append((kernel * window).sum((1, 2, 3)) + table[:, y, x])
    return layer_norm(state, "visual.ln_pre.", torch.stack(tokens)), (h, w)


def image_vector(state, pixels, gelu=quick_gelu):
    """CLIP's vector of an image, (3, H, W) normalized -> (D,): what the class token becomes."""
    x, _ = embedded(state, pixels)
    for key in block_keys(state, "visual.transformer"):
        x = block(state, key, x, gelu)
    return layer_norm(state, "visual.ln_post.", x[0]) @ state["visual.proj"]


def patch_vectors(state, pixels, gelu=quick_gelu):
    """MaskCLIP's vector of each patch, (3, H, W) normalized -> (D, h, w).

    As image_vector, but in the last block each patch takes its own value instead of what it attends
    to, and the class token is dropped.
    """
    x, size = embedded(state, pixels)
    *keys, last = block_keys(state, "visual.transformer")
    for key in keys:
        x = block(state, key, x, gelu)

    x = x[1:]                                                           # (n, E_v)
    weight = state[last + "attn.in_proj_weight"].chunk(3)[2]
    bias = state[last + "attn.in_proj_bias"].chunk(3)[2]
    value = layer_norm(state, last + "ln_1.", x) @ weight.T + bias
    x = x + linear(state, last + "attn.out_proj.", value)
    x = x + mlp(state, last, x, gelu)
    x = layer_norm(state, "visual.ln_post.", x) @ state["visual.proj"]  # (n, D)
    return x.T.reshape(-1, *size)


def vector_of_words(state, words, gelu):
    """Word embeddings (T, E_t) of one text, from SOT to the word that is read -> (D,)."""
    x = words + state["positional_embedding"][:len(words)]
    for key in block_keys(state, "transformer"):
        x = block(state, key, x, gelu, causal=True)
    return layer_norm(state, "ln_final.", x[-1]) @ state["text_projection"]


def text_vector(state, ids, gelu=quick_gelu):
    """ids: SOT, the text, EOT; nothing after it -> (D,)."""
    return vector_of_words(state, state["token_embedding.weight"][torch.tensor(ids)], gelu)


def prompted_vector(state, prompt, ending, gelu=quick_gelu):
    """SOT, the vectors of a prompt (L, E_t), then the token ids of a name and EOT -> (D,)."""
    table = state["token_embedding.weight"]
    words = [table[len(table) - 2][None], prompt, table[torch.tensor(ending)]]
    return vector_of_words(state, torch.cat(words), gelu)


# --- From patches to pixels -----------------------------------------------------------------------

def bilinear_weights(cells, pixels):
    """(pixels, cells): how much each cell of a row counts at the center of each pixel.

    Row and pixels span the same length. Between two cells' centers it is linear; beyond the
    outermost ones their values stay.
    """
    weights = torch.zeros(pixels, cells, dtype=torch.float64)
    for i in range(pixels):
        place = (i + 0.5) * cells / pixels - 0.5  # in cells, from the center of the first
        place = min(max(place, 0), cells - 1)
        left = min(int(place), max(cells - 2, 0))
        weights[i, left] += 1 - (place - left)
        if cells > 1:
            weights[i, left + 1] += place - left
    return weights


def enlarge(grid, stride, H, W):
    """(..., h, w) -> (..., H, W): each cell becomes stride pixels; what is too much is cut off."""
    rows = bilinear_weights(grid.shape[-2], stride * grid.shape[-2])[:H].to(grid)
    columns = bilinear_weights(grid.shape[-1], stride * grid.shape[-1])[:W].to(grid)
    return rows @ grid @ columns.T


# --- One step of ReCLIP ---------------------------------------------------------------------------

def query_heads(state, tokenizer, class_names, prompts):
    """W_q (C, D) of Sec. 3.1: the mean over prompts and synonyms, at length 1 before and after."""
    rows = []
    for name in class_names:
        total = 0
        for synonym in name.split("|"):
            for prompt in prompts:
                text = prompt.replace("{}", synonym.strip())
                ids = [tokenizer.start, *tokenizer.encode(text), tokenizer.end]
                vector = text_vector(state, ids)
                total = total + vector / vector.square().sum().sqrt()
        rows.append(total / total.square().sum().sqrt())
    return torch.stack(rows)


def reference_heads(state, prompts, endings, norm="frobenius"):
    """W_r (C, D) of Eq. (1). prompts: (L, E_t) or (C, L, E_t). endings: ids of each name, EOT."""
    rows = []
    for c, ending in enumerate(endings):
        prompt = prompts if prompts.ndim == 2 else prompts[c]
        rows.append(prompted_vector(state, prompt, ending))
    W_r = torch.stack(rows)
    if norm == "frobenius":
        return W_r / W_r.square().sum().sqrt()
    return W_r / W_r.square().sum(1, keepdim=True).sqrt()


def convolution(weight, x):
    """3x3 with a frame of zeros, no bias: (O, I, 3, 3), (I, h, w) -> (O, h, w)."""
    h, w = x.shape[1:]
    framed = x.new_zeros(len(x), h + 2, w + 2)
    framed[:, 1:-1, 1:-1] = x
    out = 0
    for dy in range(3):
        for dx in range(3):
            shifted = framed[:, dy:dy + h, dx:dx + w]
            out = out + torch.einsum("oi,ihw->ohw", weight[:, :, dy, dx], shifted)
    return out


def positional_map(net, p, training=False, last_relu=True, gain=1.0):
    """M_p of Sec. 3.3, (E_v, h, w) -> (channels, h, w). net: the state dict of PositionalBias."""
    x = p
    for i in (0, 3, 6):
        x = convolution(net[f"net.{i}.weight"], x)
        mean, variance = net[f"net.{i + 1}.running_mean"], net[f"net.{i + 1}.running_var"]
        if training:
            mean, variance = x.mean((1, 2)), x.var((1, 2), unbiased=False)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        x = x * net[f"net.{i + 1}.weight"][:, None, None] + net[f"net.{i + 1}.bias"][:, None, None]
        if i < 6 or last_relu:
            x = x.clamp(min=0)
    return gain * x


def rectified_logits(Z, W_q, W_r, M_p, subtract=True):
    """Eq. (2)-(3) for one image: Z (D, h, w), M_p (C or 1, h, w) -> M (C, h, w)."""
    M_q = torch.tensordot(W_q, Z, dims=1)
    M_b = torch.tensordot(W_r, Z, dims=1) + M_p
    return M_q - M_b if subtract else M_q + M_b


def gumbel_noise(seed, shape, dtype=torch.float64):
    """The noise that PyTorch draws after manual_seed: minus the log of exponential samples."""
    torch.manual_seed(seed)
    return -torch.empty(shape, dtype=dtype).exponential_().log()


def hard_masks(M, tau_1, noise):
    """Eq. (4), forward: (B, C, h, w) -> 1 where M / tau_1 + noise is largest among C, else 0."""
    best = (M / tau_1 + noise).argmax(1)                                # (B, h, w)
    return torch.stack([(best == c).to(M) for c in range(M.shape[1])], dim=1)


def contrastive_loss(Z, masks, W_q, labels, tau):
    """Sec. 3.4's pooling and Eq. (5): the mean over images of the mean over the classes found."""
    of_images = []
    for b in range(len(Z)):
        found = labels[b].nonzero()[:, 0].tolist()
        total = 0
        for c in found:
            pooled = (masks[b, c] * Z[b]).mean((1, 2))                  # (D,), of all patches
            similarities = torch.stack([pooled @ text for text in W_q]) # S[c, j]
            total = total - (similarities / tau).softmax(0)[c].log()
        of_images.append(total / len(found))
    return sum(of_images) / len(of_images)


# --- The student's head ---------------------------------------------------------------------------

def student_logits(Z, W_q, W_r, M_p=None):
    """M^D of Sec. 3.5 for one image: Z^ (D, h, w) -> (C, h, w); M_p (C or 1, h0, w0), if any."""
    positional = 0
    if M_p is not None:
        rows = bilinear_weights(M_p.shape[-2], Z.shape[-2]).to(M_p)
        columns = bilinear_weights(M_p.shape[-1], Z.shape[-1]).to(M_p)
        positional = rows @ M_p @ columns.T
    return rectified_logits(Z, W_q, W_r, positional)
