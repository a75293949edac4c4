"""Trains the shipped model, LLaVA-1.5 in miniature, on rendered images; on two CPU cores.

    python train.py --stage vision --steps 2450     # CLIP towers: supervised heads + contrastive loss
    python train.py --stage vlm --steps 1500 --batch 32     # projector + LLaMA, then everything together
    python train.py --stage hidden                  # what the finished tower's layer 6 says, on disk for the next stage
    python train.py --stage clip --pool work/hidden --val work/hidden_val --steps 1143 --batch 192   # CLIP's own half
    python train.py --export ../astrovl-tiny.gguf   # one GGUF file, Q8_0

Each stage writes a checkpoint every few minutes and the same command resumes it. README.md has the whole story.
What helps a transformer to learn from few images: supervised heads on every label that the renderer knows, Muon
(orthogonalised momentum) for the matrices, sinusoids as the first positions, a whitening patch embedding.
"""
import argparse
import concurrent.futures
import json
import math
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import language as lang

SIZE, PATCH, GRID = 112, 14, 8
VD, VL, VH, VF = 192, 7, 6, 768                   # vision tower: width, layers, heads, ffn
FEATURE_LAYER = 6                                 # LLaVA reads hidden_states[-2]: the output of six layers
LD, LL, LH, LKV, LF = 192, 4, 6, 2, 512           # LLaMA: width, layers, heads, key/value heads, ffn
TD, TL, TH, TF, TCTX = 128, 3, 4, 512, 77         # CLIP text tower
PROJ, VOCAB, CONTEXT = 128, 1000, 1024
HEAD = 32                                         # every attention head is 32 wide
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BOS, EOS = 1, 2
FROZEN = 0.35                                     # part of the vlm stage in which the vision tower rests


# ---- the model -------------------------------------------------------------------------------------------------

def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(32) + bias) v; q, k, v: [batch, heads, n, 32]. Two plain products: on this CPU the
    backward pass of torch's fused attention is five times slower."""
    s = torch.matmul(q * HEAD ** -0.5, k.transpose(-1, -2))
    if bias is not None:
        s = s + bias
    return torch.matmul(torch.softmax(s, -1).to(v.dtype), v)


QUICK = 1.702


class Block(nn.Module):
    """CLIP's pre-LN layer. Its quick-GELU h s(1.702 h) is silu(1.702 h) / 1.702: trained as plain SiLU, which is faster,
    with both constants inside the matrices; layout() takes them out again for the file."""
    def __init__(self, d, ffn):
        super().__init__()
        self.d = d
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, ffn), nn.Linear(ffn, d)

    def forward(self, x, bias=None, first=False):
        """first: the output of the first position alone."""
        b, n, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, n, 3, d // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        if first:
            q, x = q[:, :, :1], x[:, :1]
        x = x + self.out(attend(q, k, v, bias).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.silu(self.up(self.ln2(x))))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(3 * PATCH * PATCH, VD, bias=False)    # the convolution, as a product
        self.cls = nn.Parameter(torch.randn(VD) * 0.02)
        self.pos = nn.Parameter(torch.cat([torch.zeros(1, VD), sinusoids(VD)]))
        self.pre_ln, self.post_ln = nn.LayerNorm(VD), nn.LayerNorm(VD)
        self.blocks = nn.ModuleList(Block(VD, VF) for _ in range(VL))
        self.proj = nn.Linear(VD, PROJ, bias=False)

    def forward(self, pixels, last=True):
        """pixels: [b, 3, 112, 112] normalised -> patch features [b, 64, 192] of layer -2, embedding [b, 128] or None."""
        x = self.hidden(pixels)
        return x[:, 1:], self.embedding(x) if last else None

    def hidden(self, pixels):
        """Hidden state 6, [b, 65, 192]: all that the language model ever sees of the tower."""
        b = pixels.shape[0]
        p = pixels.view(b, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, GRID * GRID, -1)
        x = self.pre_ln(torch.cat([self.cls.expand(b, 1, VD), self.patch(p)], 1) + self.pos)
        for block in self.blocks[:FEATURE_LAYER]:
            x = block(x)
        return x

    def embedding(self, hidden):
        """CLIP's own part of the tower: the last layer, read at the class token."""
        return self.proj(self.post_ln(self.blocks[FEATURE_LAYER](hidden, first=True)[:, 0]))


class Text(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, TD), nn.Parameter(torch.randn(TCTX, TD) * 0.01)
        self.blocks = nn.ModuleList(Block(TD, TF) for _ in range(TL))
        self.post_ln, self.proj = nn.LayerNorm(TD), nn.Linear(TD, PROJ, bias=False)
        nn.init.normal_(self.tok.weight, std=0.02)

    def forward(self, ids, last):
        """ids: [b, n], causal; the embedding is read at `last`, the end-of-text token."""
        n = ids.shape[1]
        x = self.tok(ids) + self.pos[:n]
        bias = torch.full((n, n), -1e4).triu(1).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype)
        for block in self.blocks:
            x = block(x, bias)
        return self.proj(self.post_ln(x[torch.arange(len(ids)), last]))


class LlamaLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(LD)), nn.Parameter(torch.ones(LD))
        self.q, self.kv = nn.Linear(LD, LD, bias=False), nn.Linear(LD, 2 * LKV * HEAD, bias=False)
        self.out = nn.Linear(LD, LD, bias=False)
        self.gate_up, self.down = nn.Linear(LD, 2 * LF, bias=False), nn.Linear(LF, LD, bias=False)

    def forward(self, x, cos, sin, bias, past=None):
        b, n, d = x.shape
        h = F.rms_norm(x, (d,), self.norm1, 1e-5)
        q = rotate(self.q(h).view(b, n, LH, HEAD).transpose(1, 2), cos, sin)
        k, v = self.kv(h).view(b, n, 2, LKV, HEAD).permute(2, 0, 3, 1, 4)
        k = rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        kk, vv = (t.repeat_interleave(LH // LKV, 1) for t in (k, v))
        x = x + self.out(attend(q, kk, vv, bias).transpose(1, 2).reshape(b, n, d))
        g, u = self.gate_up(F.rms_norm(x, (d,), self.norm2, 1e-5)).chunk(2, -1)
        return x + self.down(F.silu(g) * u), (k, v)


def rotate(x, cos, sin):
    """RoPE as transformers lays it out: the pair of i is i + 16. x: [b, heads, n, 32]; cos, sin: [b, 1, n, 16]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, LD)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(LL))
        self.norm, self.head = nn.Parameter(torch.ones(LD)), nn.Linear(LD, VOCAB, bias=False)
        nn.init.normal_(self.tok.weight, std=0.3)
        nn.init.zeros_(self.head.weight)
        freq = 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        self.register_buffer("angles", torch.arange(CONTEXT).float()[:, None] * freq, persistent=False)

    def forward(self, x, positions, bias, past=None):
        """x: [b, n, 192]; positions: [b, n]; bias: [b, 1, n, keys] -> normed states, and each layer's (k, v)."""
        a = self.angles[positions][:, None]
        cos, sin, kept = a.cos().to(bias.dtype), a.sin().to(bias.dtype), []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, cos, sin, bias, past[i] if past else None)
            kept.append(kv)
        return F.rms_norm(x, (LD,), self.norm, 1e-5), kept


HEADS = {"class": list(lang.NAMES), "bar": [None, "no", "yes"], "arms": [None, 0, 2, 3, 4],
         "orientation": [None, "edge-on", "face-on", "inclined"], "color": list(lang.COLORS), "stars": [None, 0, 1, 2, 3, 4, 5],
         "odd": ["nothing", *lang.ODD], "rings": [None, "no", "yes"], "tail": [None, "no", "yes"],
         "dust_lane": [None, "no", "yes"], "n_galaxies": [None, 1, 2], "position": [None, *range(9)],
         "size": [None, *lang.SIZES]}
HEAD_WEIGHT = {"class": 1.0, "stars": 0.6, "arms": 0.5, "odd": 0.4, "bar": 0.4, "position": 0.3}   # the others 0.2


class Aux(nn.Module):
    """The supervised heads of training, thrown away afterwards: linear on mean- and attention-pooled patches."""
    QUERIES = 6

    def __init__(self):
        super().__init__()
        self.ln, self.score = nn.LayerNorm(VD), nn.Linear(VD, self.QUERIES)
        self.heads = nn.ModuleDict({k: nn.Linear((1 + self.QUERIES) * VD, len(v)) for k, v in HEADS.items()})
        self.where = nn.Linear((1 + self.QUERIES) * VD, 3)             # x, y, extent
        self.count = nn.Linear(VD, 1)                                  # bright stars, summed over patches

    def forward(self, patches):
        p = self.ln(patches.float())
        w = self.score(p).softmax(1)
        z = torch.cat([p.mean(1), torch.einsum("bnq,bnd->bqd", w, p).flatten(1)], 1)
        return {k: h(z) for k, h in self.heads.items()}, self.where(z), F.softplus(self.count(p) - 3).sum((1, 2))


class Model(nn.Module):
    def __init__(self, clip_vocab):
        super().__init__()
        self.vision, self.text, self.llama, self.aux = Vision(), Text(clip_vocab), Llama(), Aux()
        self.mm = nn.Sequential(nn.Linear(VD, LD), nn.GELU(), nn.Linear(LD, LD))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for d, blocks in ((VD, self.vision.blocks), (TD, self.text.blocks)):
            for block in blocks:
                init_block(block, d)
        for layer in self.llama.layers:
            for m in (layer.out, layer.down):
                nn.init.normal_(m.weight, std=0.02 / math.sqrt(2 * LL))


def sinusoids(d):
    """Fixed 2-D sinusoids as the start of the learned position embedding: [64, d]."""
    f = 1.0 / 100 ** (torch.arange(d // 4) / (d // 4))
    y, x = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    xy = [g.flatten()[:, None] * f for g in (x, y)]
    return 0.5 * torch.cat([t for a in xy for t in (a.sin(), a.cos())], 1)


def init_block(block, d):
    """Mimetic start (Trockman & Kolter 2023): Wq = Wk-like so that a token attends to its like, small outputs."""
    with torch.no_grad():
        base = torch.randn(d, d) / math.sqrt(d)
        for i, w in enumerate((base, base + 0.3 * torch.randn(d, d) / math.sqrt(d), torch.randn(d, d) / math.sqrt(d))):
            block.qkv.weight[i * d:(i + 1) * d] = w
        for m in (block.qkv, block.out, block.up, block.down):
            m.bias.zero_()
        nn.init.normal_(block.out.weight, std=0.3 / math.sqrt(d))
        nn.init.normal_(block.down.weight, std=0.3 / math.sqrt(4 * d))


def whiten_patches(vision, pixels):
    """Start of the patch embedding: the principal components of patches, each scaled to unit variance (and damped)."""
    b = pixels.shape[0]
    p = pixels.view(b, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b * GRID * GRID, -1)
    p = p - p.mean(0)
    values, vectors = torch.linalg.eigh(p.T @ p / len(p))
    values, vectors = values.flip(0)[:VD // 2], vectors.flip(1)[:, :VD // 2]
    w = (vectors / (values + 0.02 * values[0] / VD + 1e-3).sqrt()).T * 0.5
    with torch.no_grad():
        vision.patch.weight.copy_(torch.cat([w, -w]))                  # both signs: the norm keeps what they carry


# ---- the vocabularies ------------------------------------------------------------------------------------------

def train_vocabularies(work, seed):
    import sentencepiece as spm
    from tokenizers import Regex, Tokenizer, models, trainers, pre_tokenizers, normalizers
    lines = list(lang.corpus(random.Random(seed), 30000))
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=work + "/sp", model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        user_defined_symbols=[], hard_vocab_limit=True)
    clip = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()                      # normaliser and words as in CLIPTokenizer
    clip.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=1012, end_of_word_suffix="</w>", show_progress=False, min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    clip.train_from_iterator(lines, trainer)
    json.dump(json.loads(clip.to_str())["model"]["merges"], open(work + "/clip_merges.json", "w"))


def byte_letters():
    """GPT-2's letter for each byte, in the order of its vocabulary: printable bytes stand for themselves first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


class Vocabularies:
    """ids(text): LLaMA ids; caption(text): CLIP ids as transformers' CLIPTokenizer gives them."""
    def __init__(self, work):
        import sentencepiece as spm
        from transformers import CLIPTokenizer
        self.sp = spm.SentencePieceProcessor(model_file=work + "/sp.model")
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in json.load(open(work + "/clip_merges.json"))]
        letters = byte_letters()
        self.clip_tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
        self.clip_tokens += ["<|startoftext|>", "<|endoftext|>"]
        self.clip_merges = [" ".join(m) for m in merges]
        self.clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(self.clip_tokens)}, merges=merges)
        self.cache, self.clip_cache = {}, {}

    def ids(self, text):
        """One part of a prompt, as LLaVA tokenises it: with the leading-space rule, without BOS."""
        if text not in self.cache:
            if len(self.cache) > 100000:
                self.cache.clear()
            self.cache[text] = self.sp.encode(text)
        return self.cache[text]

    def caption(self, text):
        if text not in self.clip_cache:
            if len(self.clip_cache) > 100000:
                self.clip_cache.clear()
            self.clip_cache[text] = self.clip(text)["input_ids"][:TCTX]
        return self.clip_cache[text]


# ---- images and their labels -----------------------------------------------------------------------------------

class Pool:
    """Shards of render.py --pool (or of hidden states), mapped; new shards are seen by refresh()."""
    def __init__(self, folders):
        self.folders, self.shards, self.known = folders, [], set()
        self.refresh()

    def refresh(self):
        for folder in self.folders:
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name[:-6] + ".npy")
                if name.endswith(".jsonl") and path not in self.known and os.path.exists(path):
                    infos = [json.loads(line) for line in open(os.path.join(folder, name))]
                    self.shards.append((np.load(path, mmap_mode="r"), infos))
                    self.known.add(path)
        self.count = sum(len(i) for _, i in self.shards)

    def sample(self, rng, n, augment=True):
        """n images [n, 112, 112, 3] uint8 with their labels, each in one of the eight symmetries and shifted a little."""
        images, infos = np.empty((n, *self.shards[0][0].shape[1:]), self.shards[0][0].dtype), []
        for i in range(n):
            pixels, labels = self.shards[rng.randrange(len(self.shards))]
            k = rng.randrange(len(labels))
            images[i], info = symmetry(rng, pixels[k], labels[k]) if augment else (pixels[k], labels[k])
            infos.append(info)
        return images, infos


def symmetry(rng, image, info):
    bits, dx, dy = rng.randrange(8), rng.randint(-4, 4), rng.randint(-4, 4)
    swap = bits & 1 and info["odd"] != "bad column"                    # a bad column stays a column
    if swap:
        image = image.transpose(1, 0, 2)
    cols = np.clip(np.arange(SIZE) - dx, 0, SIZE - 1)
    rows = np.clip(np.arange(SIZE) - dy, 0, SIZE - 1)
    image = image[rows[::-1] if bits & 2 else rows][:, cols[::-1] if bits & 4 else cols]
    if info["position"] is not None:
        x, y = info["position"]
        x, y = (y, x) if swap else (x, y)
        x, y = x + dx / SIZE, y + dy / SIZE
        info = dict(info, position=[1 - x if bits & 4 else x, 1 - y if bits & 2 else y])
    return image, info


NOISE = None


def normalise(images, rng=None):
    """uint8 [b, 112, 112, 3] -> CLIP's pixels [b, 3, 112, 112]; with rng: brightness, tint, gamma and noise vary."""
    global NOISE
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    if rng is not None:
        b = len(x)
        g = torch.Generator().manual_seed(rng.randrange(1 << 30))
        if NOISE is None:
            NOISE = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
        gain = (1 + 0.12 * torch.randn(b, 1, 1, 1, generator=g)) * (1 + 0.04 * torch.randn(b, 3, 1, 1, generator=g))
        gamma = torch.exp(0.12 * torch.randn(b, 1, 1, 1, generator=g))
        sigma = 0.015 * torch.rand(b, 1, 1, 1, generator=g) ** 2
        start = rng.randrange(NOISE.numel() - x.numel())
        x = ((x + 1e-4) ** gamma * gain + sigma * NOISE[start:start + x.numel()].view_as(x)).clamp_(0, 1)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def targets(infos):
    """Labels of the supervised heads, as indices into HEADS; where: [b, 3] x, y, extent (NaN: not said)."""
    out = {k: torch.empty(len(infos), dtype=torch.long) for k in HEADS}
    where = torch.full((len(infos), 3), float("nan"))
    for i, info in enumerate(infos):
        truth = dict(lang.truths(info), n_galaxies=info["n_galaxies"])
        for k in HEADS:
            out[k][i] = HEADS[k].index(truth[k])
        if info["position"] is not None:
            where[i, :2] = torch.tensor(info["position"])
        if info["extent"] is not None:
            where[i, 2] = info["extent"]
    return out, where


def aux_loss(aux, patches, infos):
    truth, where = targets(infos)
    logits, place, count = aux(patches)
    loss = sum(HEAD_WEIGHT.get(k, 0.2) * F.cross_entropy(logits[k], truth[k], label_smoothing=0.05) for k in HEADS)
    known = ~where.isnan()
    loss = loss + 3 * F.smooth_l1_loss(place[known], where[known], beta=0.1)
    stars = truth["stars"] - 1
    return loss + 0.15 * F.smooth_l1_loss(count[stars >= 0], stars[stars >= 0].float()), logits, truth


def text_embeddings(model, words, texts):
    """[n, 128] of length 1."""
    ids = [words.caption(t) for t in texts]
    last = torch.tensor([len(i) - 1 for i in ids])
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, i in zip(padded, ids):
        row[:len(i)] = torch.tensor(i)
    return F.normalize(model.text(padded, last).float(), dim=-1)


def agreement_loss(model, image, text, fit):
    """CLIP's symmetric loss where several may be right: fit [images, texts] says how well each text fits each image, and the
    softmax of each row shall be shared out like that. What fits nothing counts as a wrong answer only."""
    s = model.logit_scale.exp() * image @ text.T
    parts = [F.cross_entropy(a[f.sum(1) > 0], F.normalize(f[f.sum(1) > 0], p=1, dim=1)) for a, f in ((s, fit), (s.T, fit.T))]
    return sum(parts) / 2


def contrastive_loss(model, image, infos, words, rng):
    """CLIP's symmetric loss; equal captions in a batch count as equally right."""
    captions = [lang.caption(rng, i) for i in infos]
    same = torch.tensor([[a == b for b in captions] for a in captions]).float()
    return agreement_loss(model, F.normalize(image.float(), dim=-1), text_embeddings(model, words, captions), same)


def clip_losses(model, hidden, infos, words, rng):
    """Captions; then the 22 classes, one wording of each; then some of the labels that `describe` chooses from. The images are
    always the same, so a part of the patches is left out: without that the class accuracy falls again after 1,000 steps."""
    kept = [0] + rng.sample(range(1, 1 + GRID * GRID), rng.randint(24, GRID * GRID))   # the class token and some patches
    image = model.vision.embedding(hidden[:, kept])
    captions = contrastive_loss(model, image, infos, words, rng)
    names, labels = list(lang.NAMES), rng.sample(lang.LABELS, 96)
    short = [lang.prompt(lang.pick(rng, lang.TEMPLATES), lang.pick(rng, lang.NAMES[c])) for c in names] + labels
    text = text_embeddings(model, words, short)
    image = F.normalize(image.float(), dim=-1)
    is_class = F.one_hot(torch.tensor([names.index(i["class"]) for i in infos]), len(names)).float()
    fits = torch.tensor([[fit.get(l, 0.0) for l in labels] for fit in map(lang.fitting_labels, infos)])
    return {"clip": (1.0, captions), "class": (1.0, agreement_loss(model, image, text[:len(names)], is_class)),
            "label": (0.5, agreement_loss(model, image, text[len(names):], fits))}


def class_prompts(embed_texts, templates=lang.TEMPLATES):
    """One embedding per class: the mean over the templates."""
    text = embed_texts([lang.prompt(t, names[0]) for names in lang.NAMES.values() for t in templates])
    return F.normalize(text.view(len(lang.NAMES), len(templates), -1).mean(1), dim=-1)


def clip_scores(image, embed_texts, infos, pairs=500):
    """The measures of the contrastive half: name -> (right, of). image [n, 128] and what embed_texts returns: length 1.
    Zero-shot: the nearest of the 22 classes' prompts. Retrieval: the partner is in the best tenth."""
    names, score = list(lang.NAMES), {}
    truth = torch.tensor([names.index(i["class"]) for i in infos])
    one, guess = ((image @ class_prompts(embed_texts, t).T).argmax(1) for t in (lang.TEMPLATES[:1], lang.TEMPLATES))
    score["zero-shot class, mean of ten prompts"] = (int((guess == truth).sum()), len(truth))
    score["zero-shot class, \"a photo of a ...\""] = (int((one == truth).sum()), len(truth))
    captions = embed_texts([lang.caption(random.Random("pair %d" % i), info) for i, info in enumerate(infos[:pairs])])
    s = image[:pairs] @ captions.T
    for name, a in (("image to caption", s), ("caption to image", s.T)):
        rank = (a > a.diagonal()[:, None]).sum(1)                      # how many are better than the partner
        for what, best in (("best tenth", len(a) // 10), ("best", 1)):
            score["%s, %s" % (name, what)] = (int((rank < best).sum()), len(a))
    nearest = (image @ embed_texts(lang.LABELS).T).argmax(1)
    score["nearest label fits"] = (sum(lang.LABELS[k] in lang.fitting_labels(i) for k, i in zip(nearest, infos)), len(infos))
    for i, c in enumerate(names):
        score[c] = (int((guess == truth)[truth == i].sum()), int((truth == i).sum()))
    return score


# ---- conversations ---------------------------------------------------------------------------------------------

KIND_WEIGHT = {"caption": 3.0, "class": 4.0, "stars": 6.0, "arms": 2.5, "is_a": 1.5, "orientation": 1.5}   # others 1


def conversation(rng, info, words, turns):
    """One image's row: ids after the image, whether each is an answer's, its segment (0: seen by all), its position."""
    truth = lang.truths(info)
    weights = [KIND_WEIGHT.get(k, 1.0) * (1 if k not in ("arms", "bar", "orientation") or truth[k] is not None else 0.5)
               for k in truth]
    multi = rng.random() < 0.5
    ids, answer, segment, position = [], [], [], []
    base = len(words.ids(lang.BEFORE_IMAGE)) + 1 + GRID * GRID
    for turn, kind in enumerate(rng.choices(list(truth), weights, k=turns)):
        question, text, _ = lang.qa(rng, info, kind)
        ask = words.ids(lang.next_turn(question) if multi and turn else lang.first_turn(question))
        say = words.ids(text) + [EOS]
        start = base + (len(ids) if multi else 0)
        position += range(start, start + len(ask) + len(say))
        ids, answer = ids + ask + say, answer + [0] * len(ask) + [1] * len(say)
        segment += [0 if multi else turn + 1] * (len(ask) + len(say))
    return ids, answer, segment, position


def batch_rows(rng, infos, words, turns):
    """Pads the conversations: ids, targets (-1: no loss), positions [b, n] and the attention bias [b, 1, P+n, P+n]."""
    prefix = len(words.ids(lang.BEFORE_IMAGE)) + 1 + GRID * GRID
    rows = [conversation(rng, i, words, turns) for i in infos]
    n = max(len(r[0]) for r in rows)
    ids, goal = torch.zeros(len(rows), n, dtype=torch.long), torch.full((len(rows), n), -1)
    segment = torch.full((len(rows), prefix + n), -1)
    segment[:, :prefix] = 0
    position = torch.arange(prefix + n).repeat(len(rows), 1)
    for i, (r, answer, seg, pos) in enumerate(rows):
        m = len(r)
        ids[i, :m] = torch.tensor(r)
        segment[i, prefix:prefix + m], position[i, prefix:prefix + m] = torch.tensor(seg), torch.tensor(pos)
        goal[i, :m - 1] = torch.where(torch.tensor(answer[1:]) > 0, torch.tensor(r[1:]), -1)   # what comes next
    same = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    bias = torch.zeros(same.shape, dtype=torch.bfloat16).masked_fill_(~same.tril(), -1e4)[:, None]
    return ids, goal, position, bias


def embed(model, before, patches, ids):
    """[BOS + text before the image, projected patches, text after it] as rows of the language model."""
    b = len(ids)
    rows = [model.llama.tok(before).expand(b, -1, -1), model.mm(patches).float(), model.llama.tok(ids)]
    return torch.cat(rows, 1)


def vlm_loss(model, patches, infos, words, rng, turns):
    before = torch.tensor([BOS] + words.ids(lang.BEFORE_IMAGE))
    ids, goal, position, bias = batch_rows(rng, infos, words, turns)
    states, _ = model.llama(embed(model, before, patches, ids), position, bias)
    states = states[:, -ids.shape[1]:][goal >= 0]
    logits, goal = model.llama.head(states).float(), goal[goal >= 0]
    return F.cross_entropy(logits, goal), (logits.argmax(-1) == goal).float().mean()


@torch.no_grad()
def read_images(model, words, patches):
    """What the language model keeps of the text before the image and of the image: each layer's (k, v)."""
    before = torch.tensor([BOS] + words.ids(lang.BEFORE_IMAGE))
    x = embed(model, before, patches, torch.zeros(len(patches), 0, dtype=torch.long))
    n = x.shape[1]
    return model.llama(x, torch.arange(n).expand(len(x), -1), torch.full((n, n), -1e9).triu(1).expand(len(x), 1, -1, -1))[1]


@torch.no_grad()
def generate(model, words, past, questions, limit=48):
    """Greedy answers to one question per image that read_images() has read; questions padded on the right and masked."""
    asks = [words.ids(lang.first_turn(q)) for q in questions]
    b, n, prefix = len(asks), max(map(len, asks)), past[0][0].shape[2]
    ids = torch.zeros(b, n, dtype=torch.long)
    for row, a in zip(ids, asks):
        row[:len(a)] = torch.tensor(a)
    lengths = torch.tensor([len(a) for a in asks])
    bias = torch.cat([torch.zeros(n, prefix), torch.full((n, n), -1e9).triu(1)], 1).expand(b, 1, -1, -1)
    x, past = model.llama(model.llama.tok(ids), (prefix + torch.arange(n)).expand(b, -1), bias, past)
    x = x[torch.arange(b), lengths - 1]
    keys = torch.cat([torch.zeros(b, prefix), torch.where(torch.arange(n)[None] < lengths[:, None], 0.0, -1e9)], 1)
    out, done = [[] for _ in range(b)], torch.zeros(b, dtype=torch.bool)
    for step in range(limit):
        token = model.llama.head(x).argmax(-1)
        for i in range(b):
            if not done[i] and token[i] != EOS:
                out[i].append(int(token[i]))
        done |= token == EOS
        if done.all():
            break
        keys = torch.cat([keys, torch.zeros(b, 1)], 1)
        x, past = model.llama(model.llama.tok(token)[:, None], (prefix + lengths + step)[:, None],
                              keys[:, None, None], past)
        x = x[:, 0]
    return [words.sp.decode(o).strip() for o in out]


# ---- the optimiser ---------------------------------------------------------------------------------------------

class Muon:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for everything else."""
    def __init__(self, model):
        self.groups, self.rest = {}, []
        for name, p in model.named_parameters():
            inner = p.ndim == 2 and not name.startswith("aux") and not any(
                s in name for s in ("tok", "pos", "head", "patch"))
            if inner:
                parts = 3 if "qkv" in name else 2 if "gate_up" in name or "llama" in name and ".kv" in name else 1
                tower = name.split(".")[0]
                self.groups.setdefault((tower, p.shape[0] // parts, p.shape[1], parts), []).append(p)
            else:
                self.rest.append((name, p))
        self.momentum = {id(p): torch.zeros_like(p) for ps in self.groups.values() for p in ps}
        self.adam = torch.optim.AdamW([
            {"params": [p for n, p in self.rest if n.startswith(t)], "tower": t, "weight_decay": 0.0}
            for t in ("vision", "text", "llama", "mm", "aux", "logit_scale")], lr=1e-3, betas=(0.9, 0.98), fused=True)

    def step(self, lr, rank=0, procs=1, decay=0.02):
        """lr: tower -> (Muon's rate, Adam's rate); towers that are missing rest. The processes share the orthogonalising."""
        for turn, ((tower, r, c, parts), ps) in enumerate(self.groups.items()):
            ps = [p for p in ps if p.grad is not None]
            if tower not in lr or not ps:
                continue
            for p in ps:
                self.momentum[id(p)].lerp_(p.grad, 0.05)
            update = torch.cat([p.grad.lerp(self.momentum[id(p)], 0.95).view(parts, r, c) for p in ps])
            if turn % procs == rank:
                update = orthogonalise(update).contiguous() * max(1, r / c) ** 0.5
            if procs > 1:
                dist.broadcast(update, turn % procs)
            for p, u in zip(ps, update.view(len(ps), parts * r, c)):
                p.data.mul_(1 - lr[tower][0] * decay).add_(u, alpha=-lr[tower][0])
        for group in self.adam.param_groups:
            if group["tower"] in lr:
                group["lr"] = lr[group["tower"]][1]
            else:
                for p in group["params"]:
                    p.grad = None
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for ps in self.groups.values():
            for p in ps:
                p.grad = None

    def state(self):
        return [self.adam.state_dict(), [self.momentum[id(p)] for ps in self.groups.values() for p in ps]]

    def load(self, state):
        self.adam.load_state_dict(state[0])
        for p, m in zip((p for ps in self.groups.values() for p in ps), state[1]):
            self.momentum[id(p)].copy_(m)


def orthogonalise(m):
    """Newton-Schulz: the orthogonal factor of each matrix, roughly. m: [n, rows, columns]."""
    flip = m.shape[1] > m.shape[2]                                     # so that x x^T is the small product
    x = (m.mT if flip else m).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).float()


# ---- training --------------------------------------------------------------------------------------------------

def rates(stage, progress, step):
    """Each tower's learning rates: (Muon, Adam). Warm-up, then linear down; vlm starts with the vision tower at rest."""
    warm = min(1.0, (step + 1) / 150)
    if stage == "vision":
        k = warm * min(1.0, 1.12 - progress)
        return {t: (0.02 * k, 2e-3 * k) for t in ("vision", "text", "aux", "logit_scale")}
    k = warm * min(1.0, 1.25 * (1 - progress) + 0.01)
    if stage == "clip":
        return {t: (0.006 * k, 6e-4 * k) for t in ("vision", "text", "logit_scale")}
    lr = {"llama": (0.02 * k, 3e-3 * k), "mm": (0.01 * k, 2e-3 * k)}
    if progress > FROZEN:
        j = 0.25 * k * min(1.0, (progress - FROZEN) * 20)
        lr.update({t: (0.02 * j, 2e-3 * j) for t in ("vision", "text", "aux", "logit_scale")})
    return lr


def average_gradients(model, procs):
    """One sum over the processes, as DistributedDataParallel would do it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, (flat / procs).split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def train(rank, args):
    """One of --procs processes, each with one thread and its own part of the batch: on cores that other programs use
    too, one meeting per step wastes less than OpenMP's hundreds."""
    torch.set_num_threads(args.threads)
    if args.procs > 1:
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:%d" % args.port, rank=rank, world_size=args.procs)
    words = Vocabularies(args.work)
    torch.manual_seed(args.seed)
    model = Model(len(words.clip_tokens))
    pool, val = Pool(args.pool.split(",")), Pool([args.val])
    path = "%s/%s.pt" % (args.work, args.stage)
    before = {"vlm": args.work + "/vision.pt", "clip": args.work + "/vlm.pt"}.get(args.stage)
    optim, step, spent = Muon(model), 0, 0.0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optim.load(saved["optim"])
        step, spent = saved["step"], saved["spent"]
    elif args.init:
        load_gguf(model, args.init)
    elif before and os.path.exists(before):
        model.load_state_dict(torch.load(before, weights_only=True)["model"])
    else:
        whiten_patches(model.vision, normalise(pool.sample(random.Random(args.seed), 512)[0]))
    log = open("%s/%s.log" % (args.work, args.stage), "a")
    say = lambda *a: None if rank else (print(*a, flush=True), print(*a, file=log, flush=True))
    say("start at step %d, %.0f s spent, %d images in the pool" % (step, spent, pool.count))
    loader, ahead = concurrent.futures.ThreadPoolExecutor(1), None      # the next batch is made beside this one's step
    saved_at, t0, sums = time.time(), time.time(), {}
    while True:
        progress = step / args.steps if args.steps else spent / (60 * args.minutes)
        if progress >= 1:
            break
        rng = random.Random("%d %s %d %d" % (args.seed, args.stage, step, rank))
        if step % 50 == 0:
            pool.refresh()
        batch = ahead.result() if ahead else load(pool, args, step, rank)
        ahead = loader.submit(load, pool, args, step + 1, rank)
        parts = train_step(args, model, batch, words, rng, progress, step)
        loss = sum(weight * l for weight, l in parts.values() if weight)
        loss.backward()
        if args.procs > 1:
            average_gradients(model, args.procs)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 5.0)
        optim.step(rates(args.stage, progress, step), rank, args.procs)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        for k, (_, l) in parts.items():
            sums.setdefault(k, []).append(float(l.detach()))
        step += 1
        now = time.time()
        spent, t0 = spent + now - t0, now
        if args.procs > 1:
            clock = torch.tensor(spent, dtype=torch.float64)
            dist.broadcast(clock, 0)                                   # all agree on the progress
            spent = float(clock)
        if step % 100 == 0:
            say("%s step %d %.0f s %4.1f %%  %s" % (time.strftime("%H:%M:%S"), step, spent, 100 * progress, "  ".join(
                "%s %.3f" % (k, sum(v) / len(v)) for k, v in sums.items())))
            sums = {}
        if step % args.check == 0 and rank == 0:
            say("  validation: " + check(args, model, val, words))
            t0 = time.time()
        if now - saved_at > 180 and rank == 0:
            save(path, model, optim, step, spent)
            saved_at = now
    if rank == 0:
        save(path, model, optim, step, spent)
        say("  validation: " + check(args, model, val, words))
    if args.procs > 1:
        dist.barrier()


def load(pool, args, step, rank=0):
    rng = random.Random("load %d %s %d %d" % (args.seed, args.stage, step, rank))
    if args.stage == "clip":
        hidden, infos = pool.sample(rng, args.batch, augment=False)
        return torch.from_numpy(hidden).float(), infos
    images, infos = pool.sample(rng, args.batch)
    return normalise(images, rng), infos


def train_step(args, model, batch, words, rng, progress, step):
    """The losses of one batch: name -> (weight, value). The contrastive half joins late: it learns fast on good features;
    beside the language model it gets every third step."""
    pixels, infos = batch
    if args.stage == "clip":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return clip_losses(model, pixels, infos, words, rng)
    frozen = args.stage == "vlm" and progress <= FROZEN
    paired = step % 3 == 0 if args.stage == "vlm" else progress > 0.75
    paired = paired and not frozen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if frozen:
            with torch.no_grad():
                patches, _ = model.vision(pixels, last=False)
        else:
            patches, image = model.vision(pixels, last=paired)
        if args.stage == "vlm":
            loss, right = vlm_loss(model, patches, infos, words, rng, args.turns)
        if paired:
            clip = contrastive_loss(model, image, infos, words, rng)
    if frozen:
        return {"lm": (1.0, loss), "token": (0, right)}
    aux, logits, truth = aux_loss(model.aux, patches, infos)
    right_class = (logits["class"].argmax(-1) == truth["class"]).float().mean()
    vlm = args.stage == "vlm"
    parts = {"aux": (0.5 if vlm else 1.0, aux), "class": (0, right_class)}
    if paired:
        parts["clip"] = (0.15 if vlm else 0.3, clip)
    if vlm:
        parts.update(lm=(1.5, loss), token=(0, right))
    return parts


@torch.no_grad()
def check(args, model, val, words):
    """Accuracies on validation images: the heads', and after the first stage greedy answers'; in the last stage CLIP's."""
    if args.stage == "clip":
        hidden, infos = val.shards[0]
        image = F.normalize(model.vision.embedding(torch.from_numpy(np.array(hidden)).float()), dim=-1)
        score = clip_scores(image, lambda texts: text_embeddings(model, words, texts), infos)
        return "  ".join("%s %.1f" % (k, 100 * a / b) for k, (a, b) in score.items())
    rng = random.Random(5)
    images, infos = val.sample(rng, 512, augment=False)
    right, total, patches = {}, {}, []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for i in range(0, 512, 128):
            patches.append(model.vision(normalise(images[i:i + 128]), last=False)[0])
    patches = torch.cat(patches).float()
    logits, truth = model.aux(patches)[0], targets(infos)[0]
    text = " ".join("%s %.3f" % (k, (logits[k].argmax(-1) == truth[k]).float().mean()) for k in HEADS)
    if args.stage == "vlm":
        for kind in ("class", "caption", "stars", "arms", "color", "choice", "unknowable"):
            some = [i for i in range(256) if kind in lang.truths(infos[i])]
            asked = [lang.qa(rng, infos[i], kind) for i in some]
            said = generate(model, words, read_images(model, words, patches[some]), [q for q, _, _ in asked])
            right[kind] = sum(lang.score(kind, t, s) for (_, _, t), s in zip(asked, said)) / len(some)
        text += " | said: " + " ".join("%s %.3f" % kv for kv in right.items()) + " | e.g. " + said[0]
    return text


@torch.no_grad()
def write_hidden(rank, args):
    """Hidden state 6 of every image of the pools (changed at random, as in training) and of the validation images (as they
    are), by the rounded weights of the file: the last stage trains on these and leaves everything below alone."""
    torch.set_num_threads(args.threads)
    words = Vocabularies(args.work)
    tower = load_gguf(Model(len(words.clip_tokens)), args.work + "/vlm.gguf").vision
    shards = [(folder, name, args.work + "/hidden") for folder in args.pool.split(",") for name in sorted(os.listdir(folder))]
    shards = [(args.val, name, args.work + "/hidden_val") for name in sorted(os.listdir(args.val))] + shards
    for folder, name, to in [s for s in shards if s[1].endswith(".jsonl")][rank::args.procs]:
        out = "%s/%s_%s" % (to, os.path.basename(folder), name[:-6])
        rng = random.Random("hidden %d %s %s" % (args.seed, folder, name))
        if os.path.exists(out + ".jsonl"):
            continue
        os.makedirs(to, exist_ok=True)
        images, infos = np.load("%s/%s.npy" % (folder, name[:-6])), [json.loads(line) for line in open("%s/%s" % (folder, name))]
        if folder != args.val:
            images, infos = zip(*(symmetry(rng, i, info) for i, info in zip(images, infos)))
        states = [tower.hidden(normalise(np.stack(images[i:i + 50]), rng if folder != args.val else None)).half().numpy()
                  for i in range(0, len(images), 50)]
        np.save(out + ".npy", np.concatenate(states))
        with open(out + ".new", "w") as f:
            f.write("".join(json.dumps(info) + "\n" for info in infos))
        os.replace(out + ".new", out + ".jsonl")
        print("%s %s: %d images" % (time.strftime("%H:%M:%S"), out, len(infos)), flush=True)


def save(path, model, optim, step, spent):
    torch.save({"model": model.state_dict(), "optim": optim.state(), "step": step, "spent": spent}, path + ".new")
    os.replace(path + ".new", path)


# ---- the file --------------------------------------------------------------------------------------------------

def layout(model):
    """GGUF name -> (parameter, first row, end row, heads to permute for llama.cpp's RoPE or 0, factor of the file's value)."""
    t, whole = {}, lambda p, k=1.0: (p, 0, p.shape[0] if p.ndim else 1, 0, k)
    m, v = model.llama, model.vision
    t["token_embd.weight"], t["output_norm.weight"], t["output.weight"] = whole(m.tok.weight), whole(m.norm), whole(m.head.weight)
    for i, b in enumerate(m.layers):
        n, kv = "blk.%d." % i, LKV * HEAD
        t.update({n + "attn_norm.weight": whole(b.norm1), n + "ffn_norm.weight": whole(b.norm2),
                  n + "attn_q.weight": (b.q.weight, 0, LD, LH, 1), n + "attn_k.weight": (b.kv.weight, 0, kv, LKV, 1),
                  n + "attn_v.weight": (b.kv.weight, kv, 2 * kv, 0, 1), n + "attn_output.weight": whole(b.out.weight),
                  n + "ffn_gate.weight": (b.gate_up.weight, 0, LF, 0, 1), n + "ffn_up.weight": (b.gate_up.weight, LF, 2 * LF, 0, 1),
                  n + "ffn_down.weight": whole(b.down.weight)})
    pairs = {"v.pre_ln": v.pre_ln, "v.post_ln": v.post_ln, "t.post_ln": model.text.post_ln, "mm.0": model.mm[0], "mm.2": model.mm[2]}
    t.update({"v.class_embd": whole(v.cls), "v.patch_embd.weight": whole(v.patch.weight), "v.position_embd.weight": whole(v.pos),
              "visual_projection.weight": whole(v.proj.weight), "text_projection.weight": whole(model.text.proj.weight),
              "t.token_embd.weight": whole(model.text.tok.weight), "t.position_embd.weight": whole(model.text.pos),
              "logit_scale": whole(model.logit_scale)})
    for tower, d, blocks in (("v", VD, v.blocks), ("t", TD, model.text.blocks)):
        for i, b in enumerate(blocks):
            n = "%s.blk.%d." % (tower, i)
            pairs.update({n + "ln1": b.ln1, n + "ln2": b.ln2, n + "attn_out": b.out})
            t.update({n + "ffn_up.weight": whole(b.up.weight, 1 / QUICK), n + "ffn_up.bias": whole(b.up.bias, 1 / QUICK),
                      n + "ffn_down.weight": whole(b.down.weight, QUICK), n + "ffn_down.bias": whole(b.down.bias)})
            for j, part in enumerate("qkv"):
                for kind in ("weight", "bias"):
                    t["%sattn_%s.%s" % (n, part, kind)] = (getattr(b.qkv, kind), j * d, (j + 1) * d, 0, 1)
    for name, module in pairs.items():
        t[name + ".weight"], t[name + ".bias"] = whole(module.weight), whole(module.bias)
    return t


def permuted(a, heads, back=False):
    """transformers' RoPE pairs (i, i + 16) <-> llama.cpp's (2 i, 2 i + 1), by the order of rows."""
    if not heads:
        return a
    shape = (heads, HEAD // 2, 2, -1) if back else (heads, 2, HEAD // 2, -1)
    return a.reshape(shape).swapaxes(1, 2).reshape(a.shape)


def export(model, words, path):
    from gguf import GGMLQuantizationType as Q, GGUFWriter, quants
    w = GGUFWriter(path + ".new", "llama")
    w.add_name("astrovl-tiny")
    w.add_description("LLaVA-1.5 in miniature with CLIP's text tower, trained by test/tiny/train.py on rendered images")
    w.add_license("MIT")
    w.add_file_type(7)                                                  # mostly Q8_0
    w.add_block_count(LL), w.add_context_length(CONTEXT), w.add_embedding_length(LD), w.add_feed_forward_length(LF)
    w.add_head_count(LH), w.add_head_count_kv(LKV), w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HEAD), w.add_rope_freq_base(10000.0), w.add_vocab_size(VOCAB)
    sp, n = words.sp, range(VOCAB)
    w.add_tokenizer_model("llama")
    w.add_token_list([sp.id_to_piece(i).encode() for i in n])
    w.add_token_scores([sp.get_score(i) for i in n])
    w.add_token_types([2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in n])
    w.add_bos_token_id(BOS), w.add_eos_token_id(EOS), w.add_unk_token_id(0)
    w.add_add_bos_token(True), w.add_add_eos_token(False), w.add_add_space_prefix(True)
    w.add_chat_template(lang.CHAT_TEMPLATE)
    for key, value in {"clip.has_vision_encoder": True, "clip.has_text_encoder": True, "clip.has_llava_projector": True,
                       "clip.use_gelu": False, "clip.use_silu": False}.items():
        w.add_bool(key, value)
    w.add_string("clip.projector_type", "mlp")
    w.add_string("clip.vision.mm_patch_merge_type", "flat"), w.add_string("clip.vision.image_aspect_ratio", "pad")
    for key, value in {"image_size": SIZE, "patch_size": PATCH, "embedding_length": VD, "feed_forward_length": VF,
                       "projection_dim": PROJ, "attention.head_count": VH, "block_count": VL}.items():
        w.add_uint32("clip.vision." + key, value)
    for key, value in {"context_length": TCTX, "embedding_length": TD, "feed_forward_length": TF, "projection_dim": PROJ,
                       "attention.head_count": TH, "block_count": TL}.items():
        w.add_uint32("clip.text." + key, value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5), w.add_float32("clip.text.attention.layer_norm_epsilon", 1e-5)
    w.add_array("clip.vision.image_mean", list(MEAN)), w.add_array("clip.vision.image_std", list(STD))
    w.add_array("clip.vision.feature_layer", [FEATURE_LAYER])           # hidden state 6: six layers run
    w.add_array("clip.text.tokenizer.ggml.tokens", words.clip_tokens)
    w.add_array("clip.text.tokenizer.ggml.merges", words.clip_merges)
    for name, (p, a, b, heads, factor) in layout(model).items():
        x = np.ascontiguousarray(permuted(p.detach().float().reshape(p.shape or 1).numpy()[a:b] * factor, heads))
        if name == "v.patch_embd.weight":
            w.add_tensor(name, x.reshape(VD, 3, PATCH, PATCH).astype(np.float16))
        elif x.ndim == 2 and "position" not in name:
            w.add_tensor(name, quants.quantize(x, Q.Q8_0), raw_dtype=Q.Q8_0)
        else:
            w.add_tensor(name, x.astype(np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    os.replace(path + ".new", path)
    return os.path.getsize(path)


def load_gguf(model, path):
    """Reads the shipped file back into the model: what remains after Q8_0."""
    from gguf import GGUFReader, quants
    stored = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    for name, (p, a, b, heads, factor) in layout(model).items():
        x = torch.from_numpy(np.array(stored[name], dtype=np.float32))
        with torch.no_grad():
            target = p.view(1) if p.ndim == 0 else p[a:b]
            target.copy_(permuted(x.reshape(target.shape), heads, back=True) / factor)
    return model


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", default="work", help="folder of vocabularies, checkpoints and logs")
    ap.add_argument("--pool", default="work/pool", help="folders of render.py --pool, separated by commas")
    ap.add_argument("--val", default="work/val", help="a pool of other seeds for the figures in the log")
    ap.add_argument("--stage", choices=["vocabulary", "vision", "vlm", "hidden", "clip"])
    ap.add_argument("--minutes", type=float, default=45), ap.add_argument("--steps", type=int, default=0)
    ap.add_argument("--batch", type=int, default=48), ap.add_argument("--turns", type=int, default=8)
    ap.add_argument("--check", type=int, default=500), ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--procs", type=int, default=2, help="processes, each with --threads and its own --batch")
    ap.add_argument("--threads", type=int, default=1), ap.add_argument("--port", type=int, default=29511)
    ap.add_argument("--init", help="a GGUF to start the stage from"), ap.add_argument("--export", metavar="GGUF")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    os.makedirs(args.work, exist_ok=True)
    if args.stage == "vocabulary" or not os.path.exists(args.work + "/clip_merges.json"):
        train_vocabularies(args.work, args.seed)
    if args.stage == "hidden":
        export_newest(args, args.work + "/vlm.gguf", ("vlm",))
    if args.stage in ("vision", "vlm", "hidden", "clip"):
        run = write_hidden if args.stage == "hidden" else train
        if args.procs > 1:
            torch.multiprocessing.spawn(run, (args,), args.procs)
        else:
            run(0, args)
    if args.export:
        export_newest(args, args.export, ("clip", "vlm", "vision"))


def export_newest(args, path, stages):
    """Exports the checkpoint of the latest of these stages that has one."""
    words = Vocabularies(args.work)
    model = Model(len(words.clip_tokens))
    for stage in stages:
        if os.path.exists("%s/%s.pt" % (args.work, stage)):
            model.load_state_dict(torch.load("%s/%s.pt" % (args.work, stage), weights_only=True)["model"])
            break
    print("%s: %d bytes" % (path, export(model, words, path)))


if __name__ == "__main__":
    main()
