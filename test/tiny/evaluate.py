"""Measures the shipped model: on 1,000 rendered images of unseen seeds, and on real photographs.

    python evaluate.py MODEL.gguf                    # seeds 0..999, with PyTorch on the exported weights
    python evaluate.py MODEL.gguf --clip             # the contrastive half on the same seeds: zero-shot classes, retrieval
    python evaluate.py MODEL.gguf --real             # Debian's stellarium-data, which no training has touched
    python evaluate.py MODEL.gguf --program ../../astrovl    # the same questions through the compiled program
    python evaluate.py MODEL.gguf --golden DIR       # ten images with prompt ids and greedy answers, for the C tests
    python evaluate.py MODEL.gguf --transformers DIR # the same model as LlavaForConditionalGeneration + CLIPModel

An answer counts as right when its meaning is the truth (language.score), not when its words are.
"""
import argparse
import glob
import json
import os
import random
import subprocess
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import language as lang
import train

REAL = "/usr/share/stellarium/nebulae/default"
GROUPS = {"class": "object class, free question", "caption": "object class named in the caption",
          "is_a": "yes/no: is this a ...?", "bar": "yes/no: bar", "rings": "yes/no: rings", "tail": "yes/no: tail",
          "dust_lane": "yes/no: dust lane", "two": "yes/no: two galaxies", "choice": "choice: a ... or a ...?",
          "orientation": "choice: edge-on, face-on, inclined", "stars": "counting: bright stars", "arms": "counting: spiral arms",
          "color": "dominant colour", "position": "place in the frame, of nine", "size": "size in the frame, of three",
          "odd": "what is odd, of six", "unknowable": "honest about what no image says",
          "cannot": "honest where this image does not say"}
TOGETHER = {"yes/no and choice": ["is_a", "bar", "rings", "tail", "dust_lane", "two", "choice", "orientation"],
            "counting": ["stars", "arms"], "honesty": ["unknowable", "cannot"]}

# What the photographs of stellarium-data show, from the catalogues: file name (without -author and .png) -> accepted
# classes. A galaxy between two morphologies has both; clusters of galaxies, the Magellanic Clouds' mosaics, dwarfs of no
# morphology that the model knows and files of unclear content are left out. "t", "l", "b" are the spirals.
SPIRAL = {"t": "tight_spiral", "l": "loose_spiral", "b": "barred_spiral", "d": "disturbed", "m": "merging",
          "r": "round_smooth", "o": "in_between_smooth", "c": "cigar_smooth", "n": "edge_on_no_bulge", "e": "edge_on_bulge"}
PHOTOS = {
    "globular_cluster": """m2 m3 m4 m5 m9 m10 m12 m13 m14 m15 m19 m22 m28 m30 m53 m54 m55 m56 m62 m68 m69 m70 m71 m72 m75
        m79 m80 m92 m107 n104 n288 n362 n1261 n1851 n1978 n2298 n2419 n2808 n3201 n4147 n4372 n4833 n5053 n5139 n5286 n5466
        n5634 n5694 n5824 n5897 n5927 n5986 n6101 n6139 n6229 n6235 n6284 n6287 n6293 n6304 n6316 n6352 n6356 n6362 n6366
        n6388 n6397 n6401 n6441 n6496 n6522 n6539 n6541 n6544 n6553 n6569 n6584 n6624 n6652 n6712 n6752 n6760 n6934 n7006
        n7492 ic4499""",
    "open_cluster": """m6 m7 m11 m18 m21 m23 m25 m26 m29 m34 m35 m36 m37 m38 m39 m41 m44 m46 m47 m48 m50 m52 m67 m93 m103
        n225 n457 n654 n663 n752 n869 n1502 n2158 n2362 n2477 n2506 n2516 n2547 n3114 n3293 n3532 n3572 n3766 n4755 n6025
        n6087 n6124 n6231 n6633 n7789 ic2395 ic4756 pleiades""",
    "planetary_nebula": """Jones Medusa abell31 abell33 abell39 m27dumont m57dumont m76 m97dumont ic1295 ic3568 ic418 ic4406
        ic4593 ic4634 n40 n246 n1360 n1501 n1514 n1535 n2022 n2346 n2371 n2392 n2440 n2818 n2867 n3132 n3195 n3242 n3699
        n3918 n4361 n5189 n5307 n5315 n5882 n6210 n6302 n6309 n6369 n6445 n6537 n6543 n6563 n6572 n6741 n6751 n6781 n6818
        n6826 n6884 n6891 n6894 n6905 n7008 n7009 n7027 n7293 n7354 n7662 calabash sh2""",
    "emission_nebula": """GammaCygni etaCarinae m8 m16 m17 m20 m42 m78 n281 ic405 ic410 ic1396 ic1805 ic1848 ic2118 ic2169
        ic2177 ic2944 ic4628 ic5146 n1333 n1491 n1499 n1579 n1788 n1931 n2170 n2174 n2244 n2264 n2282 n2359 n2467 n3199 n3603
        n6188 n6334 n6357 n6590 n6823 n6888 n6914 n7000 n7023 n7129 n7380 n7538 n7635 n7822 rcw158 rcw32 rcw38 rcw49 rcw53
        ic2220 ic2631 n5367 n6726""",
    "supernova_remnant": "m1dumont cas cassiopeia_a ic443 n6960 abell85 n2736 velasnr",
    "dark_nebula": "barnard142 barnard150 barnard173 barnard207 barnard22 barnard72 darkshark ldn1622 ldn673 lbn438 vdb152",
    "star_field": "m24 m73",
}
GALAXY_PHOTOS = """m31:tle m33:lt m51:mtl m49:ro m58:b m59:o m60:rom m61:blt m63:tl m64:t m65:tl m66:bld m74:tl m77:tl m81:tl
    m82:dnc m83:blt m85:ro m88:tl m89:ro m90:tl m91:b m94:t m95:b m96:tb m98:tln m99:lt m100:lt m101:lt m102:ec m104:e m105:ro
    m106:ltb m108:nl m109:b n1023:ocb n1042:lt n1055:e n1097:b n1232:lt n1300:b n1313:bld n1316:dro n134:tn n1365:b n1398:bt
    n1407:ro n1433:b n147:oc n1532:dme n1549:orm n1560:n n1566:ltb n1672:b n1792:tl n1808:bt n185:or n1961:tld n2146:dbt n2207:m
    n2403:lt n2442:lbd n2613:tn n2623:dm n2655:dro n2683:ne n2775:tr n2805:ld n2841:t n2903oleg:btl n2936:md n2976:lon n2997:lt
    n3077:do n3079:en n3115:ec n3198:btl n3227:mb n3310:td n3314:m n3344:btl n3359:b n3486:tl n3504:b n3521:t n3621:lt n3628:end
    n3640:orm n3690h:md n3718oleg:db n3808:m n3923:o n3938:tl n4038:md n404:r n4216:e n4236:nb n4244:n n4274:tb n4394:b n4395:ld
    n4414:t n4449:d n4450:tb n4490:dm n4494:ro n45:l n4526:ec n4535:bl n4559:lt n4565:e n4567:m n4631:nd n4636:ro n4651:td
    n4656:nd n4676:m n4697:oc n4725:bt n474:dr n488:t n4945:ne n5005:t n5033:t n5068:bl n5102:oc n5128:de n520:dm n5216:m
    n5248:lt n5257h:m n5363:or n5426:m n5474:ld n55:n n5566:tbm n5906:ne n6027:m n6050h:m n613:b n6240:md n6503:tln n660:db
    n672:mb n6744:blt n6769:m n6868:ro n6946dumont:l n7318:m n7331:t n7424:bl n7479:b n7640:bn n7714:dm n772:tl n7742:bt n7793:lt
    n7814:e n891:en n918:tlb n925:bl n936:b n247:ltn n253:tln n300:lt n3109:n ic342:lt ic2574:ld ic883h:md u10214:dm u1810:m
    u3697:n u8335h:m u9618h:m"""


def photographs():
    """[(path, accepted classes)] of the photographs whose content is known."""
    table = {name: {cls} for cls, names in PHOTOS.items() for name in names.split()}
    table.update({n: {SPIRAL[c] for c in cs} for n, cs in (x.split(":") for x in GALAXY_PHOTOS.split())})
    table.update({"sh2-188": {"planetary_nebula"}, "ic434": {"emission_nebula", "dark_nebula"}, "sh2-240": {"supernova_remnant"},
                  "sh2-136": {"dark_nebula", "emission_nebula"}, "n2261": {"emission_nebula"}, "n1555": {"emission_nebula"},
                  "m24": {"star_field", "open_cluster"}, "m73": {"star_field", "open_cluster"},
                  "vdb152": {"dark_nebula", "emission_nebula"}, "pleiades": {"open_cluster", "emission_nebula"}})
    for s in "101 106 132 155 170 261 264 297 308 80".split():
        table["sh2-" + s] = {"emission_nebula"}
    del table["sh2"]
    out = []
    for path in sorted(glob.glob(REAL + "/*.png")):
        base = os.path.basename(path)[:-4]
        name = base if base in table else "-".join(base.split("-")[:2]) if "-".join(base.split("-")[:2]) in table else base.split("-")[0]
        if name in table:
            out.append((path, table[name]))
    return out


def prepare(image):
    """A Pillow image as LLaVA's processor sees it: RGB, padded to a square with the mean colour, 112 x 112 bicubic."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((train.SIZE, train.SIZE), Image.BICUBIC))


class Torch:
    """Answers with PyTorch on the weights of the exported file."""
    def __init__(self, gguf, work, checkpoint=None):
        self.words = train.Vocabularies(work)
        self.model = train.Model(len(self.words.clip_tokens)).eval()
        if checkpoint:
            self.model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        else:
            train.load_gguf(self.model, gguf)

    @torch.no_grad()
    def features(self, images):
        return torch.cat([self.model.vision(train.normalise(images[i:i + 64]), last=False)[0]
                          for i in range(0, len(images), 64)])

    @torch.no_grad()
    def embed_images(self, images):
        return torch.cat([F.normalize(self.model.vision(train.normalise(images[i:i + 50]))[1], dim=-1)
                          for i in range(0, len(images), 50)])

    @torch.no_grad()
    def embed_texts(self, texts):
        return train.text_embeddings(self.model, self.words, texts)

    def answers(self, images, which, questions):
        """which: index of the image of each question."""
        if getattr(self, "seen", None) is not images:
            self.seen, patches = images, self.features(images)
            parts = [train.read_images(self.model, self.words, patches[i:i + 100]) for i in range(0, len(images), 100)]
            self.past = [tuple(torch.cat([p[layer][j] for p in parts]) for j in (0, 1)) for layer in range(train.LL)]
        out = []
        for i in range(0, len(which), 100):
            past = [(k[which[i:i + 100]], v[which[i:i + 100]]) for k, v in self.past]
            out += train.generate(self.model, self.words, past, questions[i:i + 100])
        return out


class Program:
    """Answers with the compiled program: one call per wording of a question, on all the images that it is asked about."""
    def __init__(self, program, gguf):
        self.command, self.folder = [program, "ask", "-m", gguf, "--json", "--quiet"], tempfile.TemporaryDirectory()
        self.embed = [program, "embed", "-m", gguf, "--quiet", "-o", self.folder.name + "/rows.npy"]

    def path(self, i):
        return "%s/%05d.png" % (self.folder.name, i)

    def rows(self, arguments):
        subprocess.run(self.embed + arguments, check=True)
        return torch.from_numpy(np.load(self.embed[-1]))

    def embed_images(self, images):
        for i, image in enumerate(images):
            Image.fromarray(image).save(self.path(i))
        return self.rows([self.path(i) for i in range(len(images))])

    def embed_texts(self, texts):
        return self.rows([a for text in texts for a in ("--text", text)])

    def answers(self, images, which, questions):
        for i in set(which):
            Image.fromarray(images[i]).save(self.path(i))
        out = [None] * len(which)
        for question in sorted(set(questions)):
            places = [k for k, q in enumerate(questions) if q == question]
            for start in range(0, len(places), 200):
                some = places[start:start + 200]
                done = subprocess.run(self.command + [self.path(which[k]) for k in some] + [question], capture_output=True, text=True, check=True)
                for k, line in zip(some, done.stdout.splitlines()):
                    out[k] = json.loads(line)["text"]
        return out


def draw(count):
    import render
    pairs = [render.render(seed) for seed in range(count)]
    return np.stack([p[0] for p in pairs]), [p[1] for p in pairs]


def rendered(answerer, count, folder):
    """The table of accuracies on seeds 0..count-1: name -> (right, asked)."""
    images, infos = draw(count)
    score, mistakes = {}, []
    for kind in lang.KINDS:
        rng = random.Random("evaluate " + kind)
        which = [i for i in range(count) if kind in lang.truths(infos[i])]
        asked = [lang.qa(rng, infos[i], kind) for i in which]
        said = answerer.answers(images, which, [q for q, _, _ in asked])
        for i, (question, _, truth), text in zip(which, asked, said):
            key = "cannot" if truth is None and kind != "unknowable" else kind
            right = lang.score(kind, truth, text)
            a, b = score.get(key, (0, 0))
            score[key] = (a + right, b + 1)
            mistakes += [] if right else [dict(seed=i, question=question, truth=truth, said=text)]
    for name, kinds in TOGETHER.items():
        score[name] = tuple(sum(score[k][j] for k in kinds if k in score) for j in (0, 1))
    if folder:
        json.dump(mistakes, open(os.path.join(folder, "mistakes.json"), "w"), indent=0)
    return score


def show(score, keys):
    print("| what, on unseen rendered images | right | of | accuracy |\n|---|---|---|---|")
    for key in keys:
        if key in score:
            right, total = score[key]
            name = "**all %s**" % key if key in TOGETHER else GROUPS.get(key, key)
            print("| %s | %d | %d | %.1f %% |" % (name, right, total, 100 * right / total))


def real(answerer, captions):
    photos = photographs()
    images = np.stack([prepare(Image.open(p)) for p, _ in photos])
    every = list(range(len(photos)))
    said = answerer.answers(images, every, ["What is this?"] * len(photos))
    told = answerer.answers(images, every, ["Describe this image."] * len(photos))
    named = [lang.named_class(s) for s in said]
    right = sum(n in ok for n, (_, ok) in zip(named, photos))
    group = sum(n is not None and any(lang.group_of(n) == lang.group_of(c) for c in ok) for n, (_, ok) in zip(named, photos))
    in_caption = sum(lang.named_class(t) in ok for t, (_, ok) in zip(told, photos))
    print("real photographs: class %d of %d (%.1f %%), named in the caption %d (%.1f %%), at least the kind (galaxy, nebula, "
          "cluster ...) %d (%.1f %%)" % (right, len(photos), 100 * right / len(photos), in_caption,
                                         100 * in_caption / len(photos), group, 100 * group / len(photos)))
    per = {}
    for n, (_, ok) in zip(named, photos):
        row = per.setdefault("galaxies" if ok & set(lang.GALAXIES) else "/".join(sorted(ok)), {})
        row[n if n not in ok else "right"] = row.get(n if n not in ok else "right", 0) + 1
    for key, row in per.items():
        print("  %-34s %s" % (key, ", ".join("%s %d" % kv for kv in sorted(row.items(), key=lambda kv: (kv[0] != "right", -kv[1])))))
    for i in random.Random(3).sample(every, min(captions, len(every))):
        print("  %-22s %s %s" % (os.path.basename(photos[i][0]), "ok " if named[i] in photos[i][1] else "-- ", told[i]))


def real_clip(answerer):
    """Zero-shot classes of the same photographs, and labels that `describe` would name for some of them."""
    photos = photographs()
    image = answerer.embed_images(np.stack([prepare(Image.open(p)) for p, _ in photos]))
    guess = (image @ train.class_prompts(answerer.embed_texts).T).argmax(1).tolist()
    named = [list(lang.NAMES)[g] for g in guess]
    right = sum(n in ok for n, (_, ok) in zip(named, photos))
    group = sum(any(lang.group_of(n) == lang.group_of(c) for c in ok) for n, (_, ok) in zip(named, photos))
    print("real photographs, zero-shot: class %d of %d (%.1f %%), at least the kind %d (%.1f %%)" % (
        right, len(photos), 100 * right / len(photos), group, 100 * group / len(photos)))
    best = (image @ answerer.embed_texts(lang.LABELS).T).topk(3, 1).indices.tolist()
    for i in random.Random(3).sample(range(len(photos)), 14):
        print("    %-22s %s" % (os.path.basename(photos[i][0]), "; ".join(lang.LABELS[k] for k in best[i])))


def heads(answerer):
    """The same photographs through the class head of training (needs a checkpoint): confusions by kind."""
    photos = photographs()
    images = np.stack([prepare(Image.open(p)) for p, _ in photos])
    with torch.no_grad():
        guess = answerer.model.aux(answerer.features(images))[0]["class"].argmax(-1).tolist()
    names, table, right = list(lang.NAMES), {}, 0
    for g, (path, ok) in zip(guess, photos):
        right += names[g] in ok
        if names[g] not in ok:
            table.setdefault("%s -> %s" % ("galaxy" if ok & set(lang.GALAXIES) else min(ok), names[g]), []).append(
                os.path.basename(path)[:-4])
    group = sum(any(lang.group_of(names[g]) == lang.group_of(c) for c in ok) for g, (_, ok) in zip(guess, photos))
    print("class head on real photographs: %d of %d (%.1f %%); kind %.1f %%" % (
        right, len(photos), 100 * right / len(photos), 100 * group / len(photos)))
    for key, files in sorted(table.items(), key=lambda kv: -len(kv[1])):
        print("  %3d %s: %s" % (len(files), key, " ".join(files[:12])))


def golden(answerer, folder):
    """Ten images as PNG and check.json: prompt ids (-200 stands for the image), greedy answer and its ids."""
    import render
    os.makedirs(folder + "/check", exist_ok=True)
    out, words = [], answerer.words
    questions = ["Describe this image.", "What is this?", "How many bright stars are there?", "How far away is it?"]
    for seed in range(10):
        image = render.render(seed)[0]
        path = "%s/check/%03d.png" % (folder, seed)
        Image.fromarray(image).save(path)
        for q in questions:
            ids = [train.BOS] + words.ids(lang.BEFORE_IMAGE) + [-200] + words.ids(lang.first_turn(q))
            text = answerer.answers(image[None], [0], [q])[0]
            out.append({"image": path, "question": q, "prompt_ids": ids, "answer": text, "answer_ids": words.ids(text)})
    json.dump(out, open(folder + "/check.json", "w"), indent=1)
    print("%s/check.json: %d answers" % (folder, len(out)))


def as_transformers(gguf, answerer, folder):
    """The exported weights as transformers' LLaVA and CLIP: largest difference from our PyTorch, and equal greedy ids."""
    import transformers as tf
    m, v = answerer.model, answerer.model.vision
    vision = dict(hidden_size=train.VD, intermediate_size=train.VF, num_hidden_layers=train.VL, num_attention_heads=train.VH,
                  image_size=train.SIZE, patch_size=train.PATCH, hidden_act="quick_gelu", projection_dim=train.PROJ)
    text = dict(vocab_size=len(answerer.words.clip_tokens), hidden_size=train.TD, intermediate_size=train.TF,
                num_hidden_layers=train.TL, num_attention_heads=train.TH, max_position_embeddings=train.TCTX,
                hidden_act="quick_gelu", projection_dim=train.PROJ, eos_token_id=len(answerer.words.clip_tokens) - 1,
                bos_token_id=len(answerer.words.clip_tokens) - 2)
    llama = tf.LlamaConfig(vocab_size=train.VOCAB + 32, hidden_size=train.LD, intermediate_size=train.LF, num_hidden_layers=train.LL,
                           num_attention_heads=train.LH, num_key_value_heads=train.LKV, rms_norm_eps=1e-5,
                           max_position_embeddings=train.CONTEXT, rope_theta=10000.0, tie_word_embeddings=False)
    llava = tf.LlavaForConditionalGeneration(tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision), text_config=llama, image_token_id=train.VOCAB, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=64)).eval()
    clip = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=train.PROJ)).eval()
    state = {}

    def blocks(ours, prefix):
        for i, b in enumerate(ours):
            p = "%s.encoder.layers.%d." % (prefix, i)
            d = b.d
            for j, n in enumerate("qkv"):
                state[p + "self_attn.%s_proj.weight" % n] = b.qkv.weight[j * d:(j + 1) * d]
                state[p + "self_attn.%s_proj.bias" % n] = b.qkv.bias[j * d:(j + 1) * d]
            for theirs, module, wk, bk in (("self_attn.out_proj", b.out, 1, 1), ("layer_norm1", b.ln1, 1, 1),
                                           ("layer_norm2", b.ln2, 1, 1), ("mlp.fc1", b.up, 1 / train.QUICK, 1 / train.QUICK),
                                           ("mlp.fc2", b.down, train.QUICK, 1)):
                state[p + theirs + ".weight"], state[p + theirs + ".bias"] = module.weight * wk, module.bias * bk

    def tower(prefix):
        e = prefix + ".embeddings."
        state[e + "class_embedding"], state[e + "position_embedding.weight"] = v.cls, v.pos
        state[e + "patch_embedding.weight"] = v.patch.weight.view(train.VD, 3, train.PATCH, train.PATCH)
        for theirs, module in (("pre_layrnorm", v.pre_ln), ("post_layernorm", v.post_ln)):
            state["%s.%s.weight" % (prefix, theirs)], state["%s.%s.bias" % (prefix, theirs)] = module.weight, module.bias
        blocks(v.blocks, prefix)

    def fill(model):
        known = model.state_dict()
        missing = [k for k in known if k not in state and "position_ids" not in k and "rotary" not in k]
        extra = [k for k in state if k not in known]
        assert not missing and not extra, (missing[:5], extra[:5])
        model.load_state_dict({k: s.detach() for k, s in state.items()}, strict=False)

    keys = list(llava.state_dict())
    base = next(k for k in keys if "patch_embedding" in k).split(".embeddings.")[0]
    lm = next(k for k in keys if "embed_tokens" in k).split(".embed_tokens")[0]
    mm = next(k for k in keys if "linear_1.weight" in k).split(".linear_1")[0]
    grow = lambda w: torch.cat([w, torch.full((32, w.shape[1]), 0.0)])
    tower(base)
    for a, b in (("linear_1", m.mm[0]), ("linear_2", m.mm[2])):
        state["%s.%s.weight" % (mm, a)], state["%s.%s.bias" % (mm, a)] = b.weight, b.bias
    state[lm + ".embed_tokens.weight"], state[lm + ".norm.weight"] = grow(m.llama.tok.weight), m.llama.norm
    state["lm_head.weight"] = grow(m.llama.head.weight)
    for i, b in enumerate(m.llama.layers):
        p, kv = "%s.layers.%d." % (lm, i), train.LKV * train.HEAD
        state.update({p + "self_attn.q_proj.weight": b.q.weight, p + "self_attn.k_proj.weight": b.kv.weight[:kv],
                      p + "self_attn.v_proj.weight": b.kv.weight[kv:], p + "self_attn.o_proj.weight": b.out.weight,
                      p + "mlp.gate_proj.weight": b.gate_up.weight[:train.LF], p + "mlp.up_proj.weight": b.gate_up.weight[train.LF:],
                      p + "mlp.down_proj.weight": b.down.weight, p + "input_layernorm.weight": b.norm1,
                      p + "post_attention_layernorm.weight": b.norm2})
    fill(llava)
    state.clear()
    tower("vision_model")
    blocks(m.text.blocks, "text_model")
    state.update({"text_model.embeddings.token_embedding.weight": m.text.tok.weight,
                  "text_model.embeddings.position_embedding.weight": m.text.pos, "logit_scale": m.logit_scale,
                  "text_model.final_layer_norm.weight": m.text.post_ln.weight, "text_model.final_layer_norm.bias": m.text.post_ln.bias,
                  "visual_projection.weight": v.proj.weight, "text_projection.weight": m.text.proj.weight})
    fill(clip)
    if folder:
        llava.save_pretrained(folder + "/llava"), clip.save_pretrained(folder + "/clip")
    import render
    worst, equal, n = 0.0, 0, 0
    for seed in range(5):
        image, info = render.render(seed)
        pixels = train.normalise(image[None])
        with torch.no_grad():
            patches, embedding = v(pixels)
            theirs = clip.get_image_features(pixel_values=pixels)
            theirs = getattr(theirs, "pooler_output", theirs)
            worst = max(worst, float((theirs - embedding).abs().max() / embedding.abs().max()))
            words = answerer.words.caption(lang.caption(random.Random(seed), info))
            ours = m.text(torch.tensor([words]), torch.tensor([len(words) - 1]))
            theirs = clip.get_text_features(input_ids=torch.tensor([words]))
            theirs = getattr(theirs, "pooler_output", theirs)
            worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
            for q in ("Describe this image.", "What is this?"):
                ids = [train.BOS] + answerer.words.ids(lang.BEFORE_IMAGE) + [train.VOCAB] * 64 + answerer.words.ids(lang.first_turn(q))
                said = llava.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, attention_mask=torch.ones(1, len(ids)),
                                      max_new_tokens=48, do_sample=False, eos_token_id=train.EOS, pad_token_id=train.EOS)
                said = answerer.words.sp.decode([i for i in said[0, len(ids):].tolist() if i not in (train.EOS, train.VOCAB)])
                equal, n = equal + (said.strip() == answerer.answers(image[None], [0], [q])[0]), n + 1
    print("transformers: embeddings differ by at most %.1e; greedy answers equal %d of %d" % (worst, equal, n))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model"), ap.add_argument("--work", default="work"), ap.add_argument("--count", type=int, default=1000)
    ap.add_argument("--program"), ap.add_argument("--checkpoint"), ap.add_argument("--real", action="store_true")
    ap.add_argument("--heads", action="store_true"), ap.add_argument("--clip", action="store_true")
    ap.add_argument("--captions", type=int, default=40)
    ap.add_argument("--golden", metavar="DIR"), ap.add_argument("--transformers", metavar="DIR"), ap.add_argument("--mistakes", metavar="DIR")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    answerer = Program(args.program, args.model) if args.program else Torch(args.model, args.work, args.checkpoint)
    if args.heads:
        heads(answerer)
    elif args.golden:
        golden(answerer, args.golden)
    elif args.transformers is not None:
        as_transformers(args.model, answerer, args.transformers)
    elif args.clip and args.real:
        real_clip(answerer)
    elif args.clip:
        images, infos = draw(args.count)
        score = train.clip_scores(answerer.embed_images(images), answerer.embed_texts, infos)
        show(score, score)
    elif args.real:
        real(answerer, args.captions)
    else:
        show(rendered(answerer, args.count, args.mistakes), list(GROUPS) + list(TOGETHER))


if __name__ == "__main__":
    main()
