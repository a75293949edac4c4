#!/usr/bin/env python3
"""convert.py among its neighbours: its files in llama.cpp, llama.cpp's own in astrovl, a real SmolLM2 through both, and its memory.

    LLAMA_CPP=BUILD LLAMA_CPP_PYTHON=SOURCE python3 test/real_convert.py [--program ./astrovl] [--cache ~/.cache/astrovl] [CHECK...]

test/real_common.py says what it needs; llama-cpp-python's bindings are used as they lie in SOURCE. Without the two folders only
`memory` and `smollm2` against transformers are run.

llama.cpp puts the class token behind the patches of a CLIP tower instead of before them (issues 25814; pull request 25844 is open),
so images give other features there than in LLaVA, with whoever's file. The checks with images use its libmtmd with that line
corrected, compiled here beside the build's own objects, and show what the uncorrected one says.
"""
import json
import os
import struct
import subprocess
import sys
import tempfile
import time

import real_common
from real_common import BUILD, ROOT, SOURCE, check

CONVERT = os.path.join(ROOT, "convert.py")
SMOLLM2_TOKENS, SMOLLM2_TIE = 32, 0.005


def convert(*arguments):
    done = subprocess.run([sys.executable, CONVERT, "--quiet", *arguments], stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def astrovl(program, *arguments):
    return json.loads(subprocess.run([program, *arguments, "--exact", "--quiet", "--json"], check=True, stdout=subprocess.PIPE).stdout)


def by_type(path, wanted="F32"):               # -> {name: values}: what a GGUF file's tensors are worth
    import gguf
    return {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def metadata(path):
    import gguf
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


# ---- llama.cpp, in a process of its own: it ends the process that gives it a file it did not expect -------------------------

def llama_cpp(mtmd=None, **job):
    """text, mmproj, image: files; prompt: a text (with <image>) or ids; n -> {"ids", "tokens", "logits", "text"}"""
    paths = [os.path.join(SOURCE)] + [p for p in sys.path if "site-packages" in p] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "LLAMA_CPP_LIB_PATH": os.path.join(BUILD, "bin"),
           "MTMD_CPP_LIB": mtmd or os.path.join(BUILD, "bin")}
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--worker"], input=json.dumps(job).encode(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=env)
    if done.returncode:
        raise RuntimeError("llama.cpp ends with status %d: %s" % (done.returncode, done.stderr[-500:].decode(errors="replace")))
    return json.loads(done.stdout)


def worker():
    import ctypes
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd
    job, byref = json.load(sys.stdin), ctypes.byref
    silent = llama.llama_log_callback(lambda *_: None)
    for log_set in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(job["text"].encode(), llama.llama_model_default_params())
    assert model, "the text model is not loaded"
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0     # float32, no flash attention
    context, vocab = llama.llama_init_from_model(model, settings), llama.llama_model_get_vocab(model)
    n_vocab = llama.llama_vocab_n_tokens(vocab)

    def logits():
        return [float(x) for x in llama.llama_get_logits_ith(context, -1)[:n_vocab]]

    def evaluate(ids):
        held = (ctypes.c_int32 * len(ids))(*ids)       # the batch only points to it
        assert llama.llama_decode(context, llama.llama_batch_get_one(held, len(ids))) == 0

    if job.get("mmproj"):
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu = settings.warmup = settings.print_timings = False
        settings.n_threads, settings.flash_attn_type = 1, 0
        tower = mtmd.mtmd_init_from_file(job["mmproj"].encode(), model, settings)
        assert tower, "the mmproj is not loaded"
        image = mtmd.mtmd_helper_bitmap_init_from_file(tower, job["image"].encode(), False)
        assert image, "the image is not loaded"
        text, chunks, past = mtmd.mtmd_input_text(), mtmd.mtmd_input_chunks_init(), llama.llama_pos(0)
        text.text = job["prompt"].encode().replace(b"<image>", mtmd.mtmd_get_marker(tower) or mtmd.mtmd_default_marker())
        text.text_len, text.add_special, text.parse_special = len(text.text), True, True
        assert mtmd.mtmd_tokenize(tower, chunks, byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(image), 1) == 0
        ids = []
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk, n = mtmd.mtmd_input_chunks_get(chunks, i), ctypes.c_size_t()
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                ids += list(mtmd.mtmd_input_chunk_get_tokens_text(chunk, byref(n))[:n.value])
            else:
                ids += [-200] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        assert mtmd.mtmd_helper_eval_chunks(tower, context, chunks, 0, 0, 1024, True, byref(past)) == 0
    else:
        ids = job["prompt"]
        if isinstance(ids, str):
            data = ids.encode()
            room = (ctypes.c_int32 * (len(data) + 16))()
            ids = list(room[:llama.llama_tokenize(vocab, data, len(data), room, len(room), True, True)])
        evaluate(ids)
    result = {"ids": ids, "logits": logits(), "tokens": []}
    last = result["logits"]
    while True:
        result["tokens"].append(max(range(n_vocab), key=last.__getitem__))
        if len(result["tokens"]) >= job["n"]:
            break
        evaluate(result["tokens"][-1:])
        last = logits()
    json.dump(result, sys.stdout)


def corrected_mtmd(folder):
    """libmtmd.so of the build with llama.cpp's issue 25814 corrected -> its folder"""
    models = os.path.join(SOURCE, "vendor", "llama.cpp", "tools", "mtmd", "models")
    with open(os.path.join(models, "llava.cpp")) as f:
        text = f.read()
    wrong = "ggml_concat(ctx0, inp, model.class_embedding, 1)"
    if wrong not in text:
        return os.path.join(BUILD, "bin")      # a llama.cpp that has the correction
    file, base = os.path.join(folder, "llava.cpp"), os.path.join(SOURCE, "vendor", "llama.cpp")
    with open(file, "w") as f:
        f.write(text.replace(wrong, "ggml_concat(ctx0, model.class_embedding, inp, 1)"))
    objects = os.path.join(BUILD, "tools", "mtmd", "CMakeFiles", "mtmd.dir")
    others = [os.path.join(at, n) for at, _, names in os.walk(objects) for n in names if n.endswith(".o") and n != "llava.cpp.o"]
    places = [models, os.path.dirname(models)] + [os.path.join(base, p) for p in ("ggml/include", "include", "vendor")]
    subprocess.run(["c++", "-O2", "-DNDEBUG", "-fPIC", "-DLLAMA_SHARED", "-DGGML_SHARED", *["-I" + p for p in places], "-c", file, "-o", file + ".o"], check=True)
    subprocess.run(["c++", "-shared", "-o", os.path.join(folder, "libmtmd.so"), *others, file + ".o", os.path.join(BUILD, "vendor/hash/libvendor-hash.a"),
                    "-L" + os.path.join(BUILD, "bin"), "-Wl,-rpath," + os.path.join(BUILD, "bin"), "-lllama", "-lggml", "-lggml-cpu", "-lggml-base"], check=True)
    return folder


# ---- the checks ------------------------------------------------------------------------------------------------------------

def largest_difference(a, b):                  # of two lists of logits, by the largest of them
    return max(abs(x - y) for x, y in zip(a, b)) / max(map(abs, b))


def checkpoints(work):
    """test/golden/convert/ laid out -> [(layout, arguments of convert.py, model, run)], what transformers says"""
    import test_convert as tests
    layouts = [(name, tests.lay_out(name, work), *tests.LAYOUTS[name][-2:]) for name in ("llama2", "llama3", "smollm", "llama2_json", "llava_v5", "llava_new",
                                                                                        "llava_old", "liuhaotian", "projector")]
    image = os.path.join(work, "image.png")    # of the towers' own size: nobody has to resize it
    with open(image, "wb") as f:
        f.write(tests.png(28, 28, lambda x, y: (x * 9 % 256, y * 9 % 256, x * y % 256)))
    return layouts, tests.read_json(tests.CHECKPOINTS, "expected.json"), image


def check_to(program, cache, work):
    """Our files, there."""
    layouts, expected, image = checkpoints(work)
    mtmd = corrected_mtmd(work)
    question = expected["question"]
    for layout, arguments, model, run in layouts:
        out = os.path.join(work, layout + ".gguf")
        convert("-o", out, *arguments)
        if run == "text":
            wanted = expected[model]["text"]
            seen = llama_cpp(text=out, prompt=question, n=len(wanted["tokens"]))
            check("to llama.cpp, %s" % layout, seen["tokens"] == wanted["tokens"], "%d tokens as transformers'; logits differ by %.1e of the largest" %
                  (len(wanted["tokens"]), largest_difference(seen["logits"], wanted["logits"])))
            continue
        mmproj = out.replace(".gguf", "-mmproj.gguf")
        ours = astrovl(program, "ask", "-m", out, "-m", mmproj, image, question, "--template", "plain", "--system", "", "--max-tokens", "12")
        seen = [llama_cpp(text=out, mmproj=mmproj, image=image, prompt="<image>\n" + question, n=12, mtmd=m)["tokens"] for m in (mtmd, None)]
        same = next((i for i, (a, b) in enumerate(zip(seen[0], ours["tokens"]["ids"])) if a != b), len(seen[0]))
        check("to llama.cpp, %s with an image" % layout, seen[0] == ours["tokens"]["ids"], "%d of 12 tokens as astrovl's (and %d with issue 25814 left in)" %
              (same, sum(a == b for a, b in zip(seen[1], ours["tokens"]["ids"]))))


THEIRS = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
if sys.argv[2]:                                # the rule is found by a hash over a real vocabulary's ids
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: sys.argv_rule
sys.argv_rule = sys.argv[2]
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [script] + sys.argv[3:]
runpy.run_path(script, run_name="__main__")
"""


def their_text(folder, out, rule=""):
    base = os.path.join(SOURCE, "vendor", "llama.cpp")
    subprocess.run([sys.executable, "-c", THEIRS, base, rule, folder, "--outfile", out, "--outtype", "auto"], check=True, stdout=subprocess.PIPE,
                   stderr=subprocess.STDOUT)


def compare_files(name, ours, theirs):
    """The same tensors with the same values, and no key that means something else."""
    import numpy as np
    a, b = by_type(ours), by_type(theirs)
    same = lambda x, y: x.shape == y.shape and np.array_equal(x, y)
    differ = [n for n in sorted(set(a) & set(b)) if not same(a[n][1], b[n][1]) and not (n == "rope_freqs.weight" and np.allclose(a[n][1], b[n][1], 1e-6, 0))]
    check("%s: tensors" % name, set(a) == set(b) and not differ, "%d of %d the same%s" % (
        len(set(a) & set(b)) - len(differ), len(set(a) | set(b)), ", but %s" % sorted(set(a) ^ set(b) | set(differ))[:4] if set(a) != set(b) or differ else ""))
    a, b = metadata(ours), metadata(theirs)
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):   # they make <unk>, <s>, </s> control tokens of score -1000
        if a["tokenizer.ggml.model"] == "llama":
            a[key], b[key] = a[key][3:], b[key][3:]
    close = lambda x, y: x == y or isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 1e-6 * abs(x)
    unlike = {k: (a[k], b[k]) for k in a if k in b and not close(a[k], b[k]) and not k.startswith("general.")}
    check("%s: keys" % name, not unlike, "%d shared and equal; only ours %s; only theirs %s%s" % (
        sum(k in b for k in a), sorted(k for k in a if k not in b and not k.startswith("general.")), sorted(k for k in b if k not in a and not k.startswith("general.")),
        "; unlike: %.300s" % {k: [str(v)[:60] for v in pair] for k, pair in unlike.items()} if unlike else ""))


def check_from(program, cache, work):
    """Files of llama.cpp's converters, here."""
    layouts, expected, image = checkpoints(work)
    question = expected["question"]
    for layout, arguments, model, run in layouts[:3]:
        theirs, ours, folder = os.path.join(work, "theirs-%s.gguf" % layout), os.path.join(work, "ours-%s.gguf" % layout), os.path.join(work, layout)
        their_text(folder, theirs, {"llama3": "llama-bpe", "smollm": "smollm"}.get(layout, ""))
        convert("-o", ours, folder)
        wanted = expected[model]["text"]["tokens"]
        seen = astrovl(program, "chat", "-m", theirs, "--template", "plain", "--max-tokens", str(len(wanted)), "--prompt", question)["tokens"]["ids"]
        check("from llama.cpp, %s" % layout, seen == wanted, "%d tokens as transformers'" % len(wanted))
        compare_files("beside llama.cpp's converter, %s" % layout, ours, theirs)
    # the scripts of LLaVA-1.5's time: the projector cut out of a checkpoint, the tower from CLIP's folder
    legacy = os.path.join(SOURCE, "vendor", "llama.cpp", "tools", "mtmd", "legacy-models")
    _, arguments, model, _ = next(entry for entry in layouts if entry[0] == "projector")
    folder, tower = os.path.dirname(arguments[0]), arguments[arguments.index("--vision") + 1]
    os.rename(os.path.join(folder, "mm_projector.bin"), os.path.join(folder, "pytorch_model.bin"))
    # (today's torch.load reads tensors alone unless told otherwise, which is all there is)
    subprocess.run([sys.executable, os.path.join(legacy, "llava_surgery.py"), "-m", folder], check=True, stdout=subprocess.PIPE)
    subprocess.run([sys.executable, os.path.join(legacy, "convert_image_encoder_to_gguf.py"), "-m", tower, "--llava-projector", os.path.join(folder, "llava.projector"),
                    "-o", os.path.join(work, "legacy")], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.rename(os.path.join(folder, "pytorch_model.bin"), os.path.join(folder, "mm_projector.bin"))
    theirs, text, ours = os.path.join(work, "legacy", "mmproj-model-f16.gguf"), os.path.join(work, "theirs-llama2.gguf"), os.path.join(work, "ours.gguf")
    convert("-o", ours, *arguments)
    answers = [astrovl(program, "ask", "-m", text, "-m", mmproj, image, question, "--template", "plain", "--system", "", "--max-tokens", "12")["tokens"]["ids"]
               for mmproj in (theirs, ours.replace(".gguf", "-mmproj.gguf"))]
    check("from llama.cpp, mmproj of the legacy scripts", answers[0] == answers[1], "12 tokens as with ours")
    import numpy as np
    a, b = by_type(ours.replace(".gguf", "-mmproj.gguf")), by_type(theirs)
    swap = lambda n: n.replace("ffn_up", "ffn_?").replace("ffn_down", "ffn_up").replace("ffn_?", "ffn_down")
    b = b if np.array_equal(a["v.blk.0.ffn_up.weight"][1].shape, b["v.blk.0.ffn_up.weight"][1].shape) else {swap(n): t for n, t in b.items()}
    missing = [n for n in b if n not in a or not np.array_equal(a[n][1].reshape(-1), b[n][1].reshape(-1))]
    check("beside the legacy scripts, mmproj", not missing, "%d tensors as theirs; only ours: %s" % (len(b) - len(missing), sorted(set(a) - set(b))[-3:]))


def gap(model, ids):                           # between the likeliest token and the next, in logits
    import torch
    with torch.no_grad():
        first, second = torch.topk(model(input_ids=torch.tensor([ids])).logits[0, -1], 2).values.tolist()
    return first - second


def check_answer(name, model, ids, wanted, tokens, detail=""):
    """The same tokens; where two were as good as equally likely, either."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, wanted)) if a != b), min(len(tokens), len(wanted)))
    tie = same < min(len(tokens), len(wanted)) and gap(model, ids + wanted[:same])
    check(name, tokens == wanted or 0 < tie < SMOLLM2_TIE, "%d of %d tokens as transformers'%s%s" % (
        same, len(wanted), " (then two that are %.4f apart)" % tie if tie else "", detail))


def check_smollm2(program, cache, work):
    """A real model: its GGUF -> a Hugging Face folder, by transformers -> convert.py -> the same answers."""
    import gguf
    import jinja2
    import torch
    import transformers
    import real_models
    torch.set_num_threads(1)
    path = real_common.fetch(cache, real_common.SMOLLM2)
    reader = gguf.GGUFReader(path)
    folder, out = os.path.join(work, "SmolLM2-135M-Instruct"), os.path.join(work, "smollm2.gguf")
    model, tokenizer = real_models.reference_model(reader).half(), real_models.reference_tokenizer(reader)
    model.save_pretrained(folder)
    template = reader.fields["tokenizer.chat_template"].contents()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                         unk_token="<|endoftext|>", pad_token="<|im_end|>").save_pretrained(folder)
    began = time.time()
    convert("-o", out, folder)
    print("        %.0f MB in %.1f s" % (os.path.getsize(out) / 1e6, time.time() - began))
    model = model.float().eval()
    render, end = jinja2.Environment().from_string(template), reader.fields["tokenizer.ggml.eos_token_id"].contents()
    real_models.N_TOKENS = SMOLLM2_TOKENS
    for prompt in real_models.PROMPTS:
        ids = tokenizer.encode(render.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True), add_special_tokens=False).ids
        wanted, _ = real_models.reference_answer(model, ids, end)
        n, tokens, text = real_models.program_answer(program, out, prompt)
        check_answer("SmolLM2 rebuilt, %.32s..." % prompt, model, ids, wanted, tokens[:SMOLLM2_TOKENS] if n == len(ids) else [], ": %.60r" % text)
        if SOURCE and BUILD:
            seen = llama_cpp(text=out, prompt=ids, n=len(wanted))
            with torch.no_grad():
                difference = largest_difference(seen["logits"], model(input_ids=torch.tensor([ids])).logits[0, -1].tolist())
            check_answer("        in llama.cpp", model, ids, wanted, seen["tokens"], "; logits differ by %.1e of the largest" % difference)
            mine = llama_cpp(text=out, prompt=prompt, n=1)["ids"]
            check("        its tokens there", mine == tokenizer.encode(prompt, add_special_tokens=False).ids, "%d ids" % len(mine))
    if SOURCE and BUILD:
        theirs = os.path.join(work, "theirs.gguf")
        their_text(folder, theirs, "smollm")
        compare_files("beside llama.cpp's converter, SmolLM2", out, theirs)


def check_memory(program, cache, work):
    """Two gigabytes of zeros in a few large tensors: moved, not held."""
    folder, width, n_ff, n_vocab, n_layer = os.path.join(work, "sparse"), 4096, 11008, 32000, 4
    os.mkdir(folder)
    shapes = {"model.embed_tokens.weight": [n_vocab, width], "model.norm.weight": [width], "lm_head.weight": [n_vocab, width]}
    for i in range(n_layer):
        for name, shape in (("self_attn.q_proj", [width, width]), ("self_attn.k_proj", [width, width]), ("self_attn.v_proj", [width, width]),
                            ("self_attn.o_proj", [width, width]), ("mlp.gate_proj", [n_ff, width]), ("mlp.up_proj", [n_ff, width]),
                            ("mlp.down_proj", [width, n_ff]), ("input_layernorm", [width]), ("post_attention_layernorm", [width])):
            shapes["model.layers.%d.%s.weight" % (i, name)] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": n_ff, "vocab_size": n_vocab,
                   "num_hidden_layers": n_layer, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}, f)
    with open(os.path.join(ROOT, "test", "golden", "convert", "spm", "tokenizer.model"), "rb") as f, open(os.path.join(folder, "tokenizer.model"), "wb") as g:
        g.write(f.read())
    out, began = os.path.join(work, "sparse.gguf"), time.time()
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, CONVERT, "--quiet", "-o", out, folder])
    _, status, usage = os.wait4(pid, 0)
    check("memory", status == 0 and usage.ru_maxrss < 1 << 20, "%.1f GB in %.1f s with %.0f MB" % (
        os.path.getsize(out) / 1e9 if status == 0 else 0, time.time() - began, usage.ru_maxrss / 1024))


def main():
    if sys.argv[1:] == ["--worker"]:
        return worker()
    parser = real_common.arguments(__doc__)
    parser.add_argument("checks", nargs="*", default=["memory", "to", "from", "smollm2"],       # memory first: a child's peak counts
                        help="memory, to, from, smollm2 (default: all)")                        # what its parent held when it began
    args = parser.parse_args()
    real_common.llama_cpp("LLAMA_CPP", "bin", "libmtmd.so"), real_common.llama_cpp("LLAMA_CPP_PYTHON", "llama_cpp", "mtmd_cpp.py")
    for name in args.checks:
        if name != "memory" and not (SOURCE and BUILD):
            real_common.skip("`%s` with llama.cpp" % name, "LLAMA_CPP or LLAMA_CPP_PYTHON")
            if name != "smollm2": continue
        with tempfile.TemporaryDirectory() as work:
            {"to": check_to, "from": check_from, "smollm2": check_smollm2, "memory": check_memory}[name](args.program, args.cache, work)
    return real_common.end()


if __name__ == "__main__":
    sys.exit(main())
