"""Compares `astrovl tokens` with the reference tokenizers on real vocabularies.

    LLAMA_CPP_PYTHON=SOURCE python3 test/real_tokens.py [--program ./astrovl] [--cache ~/.cache/astrovl]
                                                                                  (test/real_common.py says what it needs)

SmolLM2's vocabulary is in its model. OpenAI's vocabulary of CLIP (49,408 tokens) is in the package open_clip_torch; it is compared with
transformers' CLIPTokenizer, once with its merges and once without, as clip.cpp's files are. LLaMA-2's, LLaMA-3's and GPT-2's are
in SOURCE/vendor/llama.cpp/models, as vocabulary-only GGUFs with texts and expected ids beside them (.inp, .out).
The reference is rebuilt from each vocabulary with the packages sentencepiece and tokenizers, and all texts of
test/golden/tokens_texts.bin are compared, those that hold a "<" with special tokens parsed, too.
"""
import gzip
import os
import struct
import subprocess
import sys
import tempfile

import real_common
from real_common import ROOT

LLAMA_CPP_VOCABULARIES = ("llama-spm", "gpt-2", "llama-bpe")


def astrovl_ids(program, model, text, special, *options):
    command = [program, "tokens", "--ids", "-m", model] + (["--special"] if special else []) + list(options)
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("%s\n%s" % (" ".join(command), done.stderr.decode("utf-8", "replace")))
    return [int(word) for word in done.stdout.split()]


def compare(title, program, model, cases, *options):
    """cases: (text, special, ids). Says how many agree."""
    wrong = 0
    for text, special, want in cases:
        got = astrovl_ids(program, model, text, special, *options)
        if got != want:
            wrong += 1
            if wrong <= 10:
                print("  %r%s\n    astrovl   %s\n    reference %s" % (text[:80], " (special)" if special else "", got[:30], want[:30]))
    print("%-32s %s: %d of %d equal" % (os.path.basename(model), title, len(cases) - wrong, len(cases)), flush=True)
    real_common.counts[True] += len(cases) - wrong
    real_common.counts[False] += wrong


def llama_cpp_cases(model):
    """The texts and ids that llama.cpp made with transformers and keeps beside the vocabulary."""
    with open(model + ".inp", "rb") as f:
        texts = f.read().split(b"\n__ggml_vocab_test__\n")
    with open(model + ".out") as f:
        ids = [[int(word) for word in line.split()] for line in f.read().split("\n")]
    return [(text, False, want) for text, want in zip(texts, ids)]


def golden_texts(name="tokens_texts.bin"):
    with open(os.path.join(ROOT, "test", "golden", name), "rb") as f:
        data = f.read()
    texts, at = [], 4
    while at < len(data):
        times, size = struct.unpack_from("<II", data, at)
        texts.append(data[at + 8:at + 8 + size] * times)
        at += 8 + size
    return texts


def metadata(model):
    import gguf
    fields = gguf.GGUFReader(model).fields
    names = ("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "add_bos_token")
    keys = [(name, "tokenizer.ggml." + name) for name in names]
    return {name: fields[key].contents() for name, key in keys if key in fields}


def sentencepiece_reference(m):
    """SentencePiece with the vocabulary's pieces, scores and types; special tokens as LlamaTokenizer(legacy=True) has them."""
    import sentencepiece

    def field(number, data):   # a length-delimited field of a protocol buffer
        size, head = len(data), bytes([number << 3 | 2])
        while size > 127:
            head += bytes([size & 127 | 128])
            size >>= 7
        return head + bytes([size]) + data
    proto = b"".join(field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
                     for piece, score, kind in zip(m["tokens"], m["scores"], m["token_type"]))
    proto += field(2, b"\x18\x02\x98\x02\x01")                           # trainer_spec: model_type BPE, byte_fallback
    proto += field(3, field(1, b"identity") + b"\x18\x01\x20\x00\x28\x01")   # normalizer_spec: dummy prefix, no space removed
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    special = {piece.encode(): i for i, piece in enumerate(m["tokens"]) if m["token_type"][i] in (2, 3)}

    def encode(text, parse):
        ids, at, start = [m["bos_token_id"]] if parse else [], 0, 0
        while at < len(text):
            hits = [s for s in special if text.startswith(s, at)] if parse else []
            if not hits:
                at += 1
                continue
            token = max(hits, key=len)
            ids += sp.encode(text[start:at]) if at > start else []
            ids.append(special[token])
            at = start = at + len(token)
        return ids + (sp.encode(text[start:]) if start < len(text) else [])
    return encode


LLAMA3_RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level_reference(m):
    """A tokenizer of the `tokenizers` package from the vocabulary's merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    pre, llama3 = m.get("pre", "gpt-2"), m.get("pre") == "llama-bpe"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    steps = {"llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_RULE), "isolated")], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    vocab = {piece: i for i, piece in enumerate(m["tokens"])}
    merges = [(merge[0] + merge[1:].split(" ", 1)[0], merge[1:].split(" ", 1)[1]) for merge in m["merges"]]

    def build(added):
        t = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=llama3))
        t.pre_tokenizer = pre_tokenizers.Sequence(steps.get(pre, []) + [byte_level])
        t.add_special_tokens([AddedToken(piece, normalized=False) for piece in added])
        return t
    plain = build([])
    parsing = build([piece for piece, kind in zip(m["tokens"], m["token_type"]) if kind in (3, 4)])
    bos = [m["bos_token_id"]] if m.get("add_bos_token", llama3) else []

    def encode(text, parse):
        ids = (parsing if parse else plain).encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
        return (bos if parse else []) + ids
    return encode


def rebuilt_cases(model):
    m = metadata(model)
    encode = sentencepiece_reference(m) if m["model"] == "llama" else byte_level_reference(m)
    texts = golden_texts()
    return [(text, special, encode(text, special)) for text in texts for special in ((False, True) if b"<" in text else (False,))]


def write_clip(path, tokens, merges):
    """A CLIP text tower of almost no size around a vocabulary: `astrovl tokens --clip` asks for a model that can be opened."""
    import gguf
    import numpy
    w = gguf.GGUFWriter(path, "clip")
    for key, value in (("embedding_length", 2), ("feed_forward_length", 2), ("block_count", 1), ("attention.head_count", 1),
                       ("context_length", 77)):
        w.add_uint32("clip.text." + key, value)
    w.add_token_list(tokens)
    if merges:
        w.add_token_merges([" ".join(m) for m in merges])
    shapes = {"token_embd.weight": (len(tokens), 2), "position_embd.weight": (77, 2), "post_ln.weight": (2,), "post_ln.bias": (2,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        shapes["blk.0.%s.weight" % name] = (2, 2)
    for name in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
        shapes["blk.0." + name] = (2,)
    for name, shape in shapes.items():
        w.add_tensor("t." + name, numpy.zeros(shape, numpy.float32))
    w.add_tensor("text_projection.weight", numpy.zeros((2, 2), numpy.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


def compare_clip(program, path):
    """OpenAI's list of merges: its vocabulary is the bytes, the bytes that end a word, and what the merges make, in this order."""
    from transformers import CLIPTokenizer
    with gzip.open(path) as f:
        merges = [tuple(line.split()) for line in f.read().decode().split("\n")[1:49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    reference = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    # (one text has a CJK compatibility ideograph, which astrovl keeps as it is: README.md)
    texts = [t for t in golden_texts("joint_texts.bin") if "\uf900" not in t.decode("utf-8", "replace")]
    cases = [(t, True, reference(t.decode("utf-8", "replace"))["input_ids"]) for t in texts]
    for title, given in (("with merges", merges), ("without merges", [])):
        with tempfile.TemporaryDirectory() as folder:
            write_clip(os.path.join(folder, "clip.gguf"), tokens, given)
            compare(title, program, os.path.join(folder, "clip.gguf"), cases, "--clip")


def main():
    args = real_common.arguments(__doc__).parse_args()
    vocabularies = [real_common.llama_cpp("LLAMA_CPP_PYTHON", "vendor/llama.cpp/models/ggml-vocab-%s.gguf" % name) for name in LLAMA_CPP_VOCABULARIES]
    for model in filter(None, vocabularies):
        compare("llama.cpp's texts", args.program, model, llama_cpp_cases(model))
        compare("rebuilt reference", args.program, model, rebuilt_cases(model))
    model = real_common.fetch(args.cache, real_common.SMOLLM2)
    compare("rebuilt reference", args.program, model, rebuilt_cases(model))
    compare_clip(args.program, real_common.fetch(args.cache, real_common.CLIP_MERGES))
    if not all(vocabularies): real_common.skip("the vocabularies " + ", ".join(LLAMA_CPP_VOCABULARIES), "LLAMA_CPP_PYTHON")
    return real_common.end()


if __name__ == "__main__":
    sys.exit(main())
