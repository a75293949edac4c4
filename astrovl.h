// astrovl.h 0.1.0: astronomy's vision-language models in one C header.                                       MIT licence
//
// Runs AstroLLaVA (arXiv 2504.08583) and whatever else is built like LLaVA-1.5: a CLIP vision tower, a projector, and a
// LLaMA-family language model, out of the GGUF files that llama.cpp uses; and PAPERCLIP (arXiv 2403.08851) and any other CLIP of
// two towers, out of the files that clip.cpp uses. C99 or C++11, libc and libm; POSIX threads and mmap
// where there are any. The reference is transformers in float32 and Pillow; exact mode gives the same bits on every machine.
//
// ====================================================================================================================
// [0] Manual
// ====================================================================================================================
//
// Contents (search for the number in brackets)
//   [0] manual       this text
//   [1] API          every public declaration, documented where it stands
//   [2] platform     configuration, errors, memory, byte order, files, time, threads
//   [3] numbers      f16, bf16 and the block formats to float32 and back; exp, tanh, erf, sin, cos that are the same everywhere
//   [4] kernels      the inner loops, one table per instruction set
//   [5] ops          the audit tap; norms, softmax, activations, RoPE, products, attention
//   [6] GGUF         the files: reading, writing, quantising; weights across several files
//   [7] text         SentencePiece, byte-level BPE and CLIP tokenizers
//   [8] images       PNG, JPEG, PNM; resize, pad, crop
//   [9] CLIP         the vision tower and its preprocessing, the text tower
//   [10] LLaMA       the language model and its KV cache
//   [11] VLM         models, sessions, the projector, prompt templates, images spliced into the sequence
//   [12] generation  sampling, guided answers (JSON schemas, patterns), stop rules, streaming, turns, captions
//   [13] contrastive embeddings of images and texts, scores, search, metrics
//   [14] measuring   how fast a model is, and what the machine allows; how good it is
//   [15] SIMD        the kernels for vector registers: one template, and the choice at run time
//
// ---- How to use it ------------------------------------------------------------------------------------------------
// Copy this file into your project. In exactly one .c or .cpp file write
//
//     #define ASTROVL_IMPLEMENTATION
//     #include "astrovl.h"
//
// and include it without the define wherever else you call it. Link with -lm, and with -pthread unless ASTROVL_NO_THREADS is
// defined. Nothing else is needed: no build system, no generated files, no options. -O2 or -O3 matter for speed.
//
// A caption is one call:
//
//     astrovl_error err;
//     astrovl_model *model = astrovl_open("astrovl-tiny.gguf", NULL, &err);
//     char *text = model ? astrovl_caption_file(model, "m51.jpg", NULL, &err) : NULL;
//     puts(text ? text : err.message);
//     astrovl_free(text);
//     astrovl_close(model);
//
// The real AstroLLaVA comes as two files, the language model and the vision half ("mmproj"):
//
//     const char *files[] = {"astrollava-q4_0.gguf", "astrollava-mmproj-f16.gguf"};
//     model = astrovl_open_files(files, 2, NULL, &err);
//
// A conversation, streamed to the terminal as it is written:
//
//     static int show(void *user, const char *text, size_t size) {
//         (void)user;
//         return fwrite(text, 1, size, stdout) != size;       // non-zero stops the answer
//     }
//     astrovl_generation how = {0};                           // all zeros: greedy, 256 tokens
//     how.on_text = show;
//     astrovl_image image;
//     if (astrovl_image_load("m51.jpg", 0, &image, &err) == ASTROVL_OK) {
//         astrovl_session *s = astrovl_session_new(model, NULL, &err);
//         astrovl_free(astrovl_chat(s, &image, 1, "What kind of galaxy is this?", &how, &err));
//         astrovl_free(astrovl_chat(s, NULL, 0, "Is it seen edge-on or face-on?", &how, &err));   // the image is remembered
//         astrovl_session_free(s);
//         astrovl_image_free(&image);
//     }
//
// Several conversations, here captions, together: one token of each per step, for which the weights are read from memory once and
// not once for each. The answers are those that astrovl_chat gives.
//
//     astrovl_turn turns[4] = {{0}};
//     astrovl_session_options more = {0};
//     for (i = 0; i < 4; i++) {
//         turns[i].session = more.share = astrovl_session_new(model, &more, &err);     // the others share what the first one has
//         turns[i].images = &images[i], turns[i].n_images = 1, turns[i].text = ASTROVL_CAPTION_PROMPT;
//     }
//     astrovl_chat_batch(turns, 4, &err);                     // gives turns[i].answer, or NULL and turns[i].err
//     for (i = 3; i >= 0; i--) astrovl_free(turns[i].answer), astrovl_session_free(turns[i].session);
//
// An answer that a program can read: JSON that keeps to a schema, whatever the model would rather say.
//
//     const char *schema = "{\"type\": \"object\", \"required\": [\"class\", \"arms\"], \"properties\": {"
//                          " \"class\": {\"enum\": [\"spiral\", \"elliptical\"]}, \"arms\": {\"type\": \"integer\"}}}";
//     astrovl_guide *guide = astrovl_guide_schema(model, schema, strlen(schema), &err);
//     how.guide = guide;
//     text = astrovl_ask_file(model, "m51.jpg", "Which class of galaxy, and how many arms?", &how, &err);
//     astrovl_guide_free(guide);
//
// Which words fit an image? And with embeddings kept, which images fit words?
//
//     const char *words[] = {"a spiral galaxy", "a globular cluster"};
//     float cosines[2], probabilities[2];
//     astrovl_score(model, &image, words, 2, cosines, probabilities, &err);
//
//     astrovl_embed_images(s, images, n, 1, rows, &err);          // [n][n_embd_joint], store them as float16
//     astrovl_embed_texts(s, words, 1, 1, query, &err);
//     n_hits = astrovl_search(rows_f16, n, n_embd_joint, query, 10, 0, hits, &err);
//
// A model made smaller:
//
//     astrovl_gguf *file = astrovl_gguf_open("llava-f16.gguf", 0, &err);
//     if (file) astrovl_quantize_file(file, "llava-q4_k_m.gguf", "q4_k_m", 0, NULL, NULL, NULL, &err);
//     astrovl_gguf_close(file);
//
// Looking inside: every intermediate tensor of both transformers passes by, under the name that transformers gives it.
//
//     static void look(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
//         if (strcmp(name, "model.layers.0.self_attn.attn_weights") == 0) ...  // [n_head][n_new][n_keys]
//     }
//     astrovl_session_options o = {0};
//     o.mode = ASTROVL_EXACT;
//     o.tap = look;
//     astrovl_session *s = astrovl_session_new(model, &o, &err);
//
// The parts by themselves: astrovl_encode_image gives the rows that stand for an image, astrovl_eval_tokens and
// astrovl_eval_embeddings append to the sequence and give logits, astrovl_sample draws the next token. The layers one by one
// (astrovl_rms_norm, astrovl_rope, ...) are plain functions on float arrays.
//
// ---- Errors ---------------------------------------------------------------------------------------------------------
// A failing call returns a status other than ASTROVL_OK (or NULL, or -1) and fills the astrovl_error it was given with one line
// that names the file and the tensor, key or byte. Nothing is printed, no signal raised, no process ended. Input files may be
// hostile: every size in them is checked before it is used. What a failed call had begun is undone: after a failed turn the
// conversation is what it was before.
//
// ---- Threads and memory ---------------------------------------------------------------------------------------------
// A model is read-only once it is open: any number of threads and sessions may share it. A session belongs to one thread at a
// time; it runs its own worker threads (n_threads, by default one per processor), which sleep between calls. There is no global
// state. Results do not depend on the number of threads. Sessions that `share` another's threads and scratch memory count as one.
// Weights are used where they lie, in the mapped file: a 4 GB model costs 4 GB of page cache and no copy. Expanded are only
// vectors (norms, biases) and position tables. A session holds the KV cache, n_ctx * n_layer * n_head_kv * head_dim * 8 bytes,
// of which the system gives only what has been written, and the activations of at most 512 rows.
//
// ---- Two modes ------------------------------------------------------------------------------------------------------
// ASTROVL_FAST (default) uses the best kernels there are for the machine. ASTROVL_EXACT computes in float32 with one fixed order
// for every sum, no fused multiply-add, and its own exp, erf, sin and cos made of + - * / and sqrt: the same bits with every
// compiler, on every processor with IEEE arithmetic, for every number of threads. It needs FLT_EVAL_METHOD == 0 (on 32-bit x86
// that is -msse2 -mfpmath=sse; the x87 rounds differently) and no -ffast-math, which is refused.
// Fast mode rounds activations to integers in blocks of 32 and multiplies integers (weights of a float type: bfloat16 or float32), with
// what the processor has of AVX2, AVX-VNNI, AVX-512 VNNI and BF16, or of AArch64's NEON, dot products, and matrix products (I8MM and
// BF16). Elsewhere both modes compute alike. The `isa` of a session's options, or the program's environment variable ASTROVL_ISA,
// forces simpler kernels: portable, avx2, avx_vnni, avx512, avx512_bf16; on AArch64 portable, neon, neon_dotprod, neon_i8mm.
//
// ---- Configuration: define before the implementation ----------------------------------------------------------------
//   ASTROVL_API                   put before every public function: extern by default; static, or your DLL's export word
//   ASTROVL_MALLOC(size)          the allocator, all three or none; a NULL return is handled everywhere
//   ASTROVL_REALLOC(memory, size)
//   ASTROVL_FREE(memory)
//   ASTROVL_NO_THREADS            no pthreads: one thread does all
//   ASTROVL_NO_MMAP               files are read, not mapped
//   ASTROVL_NO_FILES              no stdio at all: models and images come as memory blocks
//   ASTROVL_BARE                  neither POSIX nor Windows: standard C alone
//   ASTROVL_MAX_PIXELS            largest image that is decoded, 2^28 pixels by default
//   ASTROVL_DEFAULT_CONTEXT       KV cache of a session that does not ask for a size: 4096 tokens (or the model's, if less)
//   ASTROVL_MAX_THREADS           64
//   ASTROVL_NO_SIMD               portable kernels alone
//   ASTROVL_HEADER_NAME           this file's name, which it includes itself by: "astrovl.h"
//

// ====================================================================================================================
// [1] API
// The public declarations. Conventions for all of them:
// - a function that can fail takes `astrovl_error *err` last; err may be NULL. On success err is left alone.
// - arrays are row-major, the slowest dimension written first: [n_tokens][n_embd].
// - option structs may be all zeros (or the pointer NULL): zero always means the sensible default.
// - memory that a function returns is released with astrovl_free(), handles with their own function.
// ==================================================================================================================

#ifndef AVL__ISA        // section [15] includes this file again for each instruction set
#ifndef ASTROVL_H
#define ASTROVL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef ASTROVL_API
#define ASTROVL_API extern
#endif

#define ASTROVL_VERSION "0.1.0"

// ---- status and errors ------------------------------------------------------------------------------------------

typedef enum astrovl_status {
    ASTROVL_OK = 0,
    ASTROVL_ERROR_ARGUMENT,      // the caller's mistake: a parameter is missing or out of range
    ASTROVL_ERROR_MEMORY,        // an allocation failed
    ASTROVL_ERROR_FILE,          // a file cannot be opened, read or written
    ASTROVL_ERROR_FORMAT,        // a file's bytes break its format's rules
    ASTROVL_ERROR_UNSUPPORTED,   // well-formed, but of a kind this header does not implement
    ASTROVL_ERROR_MODEL,         // the files lack a part that the call needs, or their shapes do not fit together
    ASTROVL_ERROR_LIMIT,         // larger than a limit: the context is full, an image has too many pixels
    ASTROVL_CANCELLED            // a callback asked to stop
} astrovl_status;

// What went wrong, in words: names the file, tensor, key or byte offset, and where it can, what to do about it.
typedef struct astrovl_error {
    astrovl_status status;
    char message[480];           // one line, zero-terminated, UTF-8
} astrovl_error;

ASTROVL_API const char *astrovl_status_name(astrovl_status status);   // "ok", "format", ...: static memory

// Long work reports: stage "image" or "prompt", layers done of all, or "tensors". A non-zero return cancels (but not once done is
// total).
typedef int (*astrovl_progress)(void *user, const char *stage, int done, int total);

// Releases memory that a function below returned (text, arrays). NULL is allowed.
ASTROVL_API void astrovl_free(void *memory);

// ---- GGUF files -------------------------------------------------------------------------------------------------
// Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little- and big-endian.

// Tensor types, with GGUF's numbers.
typedef enum astrovl_type {
    ASTROVL_TYPE_F32 = 0, ASTROVL_TYPE_F16 = 1,
    ASTROVL_TYPE_Q4_0 = 2, ASTROVL_TYPE_Q4_1 = 3, ASTROVL_TYPE_Q5_0 = 6, ASTROVL_TYPE_Q5_1 = 7, ASTROVL_TYPE_Q8_0 = 8,
    ASTROVL_TYPE_Q2_K = 10, ASTROVL_TYPE_Q3_K = 11, ASTROVL_TYPE_Q4_K = 12, ASTROVL_TYPE_Q5_K = 13, ASTROVL_TYPE_Q6_K = 14,
    ASTROVL_TYPE_BF16 = 30
} astrovl_type;

// Metadata value types, with GGUF's numbers.
typedef enum astrovl_value_type {
    ASTROVL_VALUE_U8 = 0, ASTROVL_VALUE_I8 = 1, ASTROVL_VALUE_U16 = 2, ASTROVL_VALUE_I16 = 3, ASTROVL_VALUE_U32 = 4,
    ASTROVL_VALUE_I32 = 5, ASTROVL_VALUE_F32 = 6, ASTROVL_VALUE_BOOL = 7, ASTROVL_VALUE_STRING = 8,
    ASTROVL_VALUE_ARRAY = 9, ASTROVL_VALUE_U64 = 10, ASTROVL_VALUE_I64 = 11, ASTROVL_VALUE_F64 = 12
} astrovl_value_type;

typedef struct astrovl_gguf astrovl_gguf;

// Bytes with a length; not zero-terminated.
typedef struct astrovl_string {
    const char *data;
    size_t      size;
} astrovl_string;

// One tensor of a file. ne is GGUF's order: ne[0] is the length of a row, so a matrix [n_out][n_in] has ne = {n_in, n_out}.
typedef struct astrovl_tensor {
    const char   *name;          // zero-terminated, owned by the file's handle
    astrovl_type  type;
    int           n_dims;        // 1 to 4
    int64_t       ne[4];         // unused ones are 1
    uint64_t      offset;        // in the file, from its first byte
    uint64_t      n_bytes;
    const void   *data;          // little-endian blocks, whatever the file's and the host's order; no alignment is promised
} astrovl_tensor;

// One metadata entry.
typedef struct astrovl_kv {
    const char         *key;     // zero-terminated, owned by the handle
    astrovl_value_type  type;
    astrovl_value_type  item_type;   // of an array's elements; otherwise equal to type
    uint64_t            count;   // elements of an array; otherwise 1
} astrovl_kv;

// Opens a file, mapped into memory where the platform can and `no_mmap` is 0. Every offset, size, type and string in it is
// checked here, once. Returns NULL and err (FILE, FORMAT, UNSUPPORTED, MEMORY).
ASTROVL_API astrovl_gguf *astrovl_gguf_open(const char *path, int no_mmap, astrovl_error *err);
// The same for a file that lies in memory; the block is not copied and must outlive the handle. name: for messages.
ASTROVL_API astrovl_gguf *astrovl_gguf_open_memory(const void *data, size_t size, const char *name, astrovl_error *err);
ASTROVL_API void astrovl_gguf_close(astrovl_gguf *file);                // NULL is allowed
ASTROVL_API const char *astrovl_gguf_name(const astrovl_gguf *file);
ASTROVL_API int astrovl_gguf_version(const astrovl_gguf *file);         // 2 or 3
ASTROVL_API int astrovl_gguf_big_endian(const astrovl_gguf *file);
ASTROVL_API uint64_t astrovl_gguf_size(const astrovl_gguf *file);       // bytes
ASTROVL_API int astrovl_gguf_n_tensors(const astrovl_gguf *file);
ASTROVL_API const astrovl_tensor *astrovl_gguf_tensor(const astrovl_gguf *file, int index);
ASTROVL_API const astrovl_tensor *astrovl_gguf_find_tensor(const astrovl_gguf *file, const char *name);   // NULL: absent
ASTROVL_API int astrovl_gguf_n_kv(const astrovl_gguf *file);
ASTROVL_API const astrovl_kv *astrovl_gguf_kv(const astrovl_gguf *file, int index);
ASTROVL_API int astrovl_gguf_find_kv(const astrovl_gguf *file, const char *key);                          // index, or -1
// Element `i` of entry `index` (i = 0 for a scalar), converted. A number asked of a string entry is 0; a string asked of a
// number entry is empty; i out of range likewise. Booleans are 0 and 1.
ASTROVL_API int64_t astrovl_gguf_int(const astrovl_gguf *file, int index, uint64_t i);
ASTROVL_API double astrovl_gguf_float(const astrovl_gguf *file, int index, uint64_t i);
ASTROVL_API astrovl_string astrovl_gguf_string(const astrovl_gguf *file, int index, uint64_t i);

ASTROVL_API const char *astrovl_type_name(int type);                    // "Q4_K", or NULL for a type this header lacks
// Bytes of a row of n_values; 0 if the type is unknown or n_values is not a multiple of its block.
ASTROVL_API size_t astrovl_type_row_bytes(int type, int64_t n_values);
// Expands n_values (a multiple of the type's block) to float32, exactly as the format defines them.
// Source: ggml's ggml-common.h block layouts. Returns ARGUMENT for an unknown type or a broken block count.
ASTROVL_API astrovl_status astrovl_dequantize(int type, const void *blocks, float *values, int64_t n_values);
// Rounds n_values (a multiple of the type's block) of float32 to blocks: little-endian, on every host the same bytes, at any
// alignment. F16 and BF16 as the functions below; Q4_0 to Q8_0 to the bits of the `gguf` Python package; Q2_K to Q6_K with
// scales fitted to a small root-mean-square error, about that of llama.cpp's quantiser without an importance matrix or less.
// F32, F16 and BF16 hold infinity and NaN. The others do not: NaN counts as 0, and infinity, as every value too large for a
// block, becomes what comes closest to it when the block's scales are at their largest half, 65504. A block's other values are
// then as coarse as that scale. Returns ARGUMENT for an unknown type or a broken block count.
ASTROVL_API astrovl_status astrovl_quantize(int type, const float *values, void *blocks, int64_t n_values);
// IEEE half precision and bfloat16, as bits; to the nearest value, ties to even, when narrowing.
ASTROVL_API float astrovl_f16_to_f32(uint16_t half);
ASTROVL_API float astrovl_bf16_to_f32(uint16_t half);
ASTROVL_API uint16_t astrovl_f32_to_f16(float value);
ASTROVL_API uint16_t astrovl_f32_to_bf16(float value);

// ---- writing GGUF files -----------------------------------------------------------------------------------------
#ifndef ASTROVL_NO_FILES
// Version 3, little-endian on every host, alignment 32. What is written is called PATH.part until it is finished, and takes the
// name PATH then: a file of that name stays whole until the end, even one that is being read (so a file may be quantised onto
// itself). Names and values are copied. The functions that return nothing keep the first mistake, or that memory ran out, for the
// next _write or _finish to report.
typedef struct astrovl_gguf_writer astrovl_gguf_writer;

// NULL and err: FILE (PATH is a folder or a device, or PATH.part cannot be created or exists), MEMORY.
ASTROVL_API astrovl_gguf_writer *astrovl_gguf_create(const char *path, astrovl_error *err);
// One metadata entry. value: the address of a variable of that type in C (uint8_t ... double, astrovl_string; BOOL: uint8_t).
ASTROVL_API void astrovl_gguf_put(astrovl_gguf_writer *w, const char *key, astrovl_value_type type, const void *value);
// The same for an array. values: [count] of such variables.
ASTROVL_API void astrovl_gguf_put_array(astrovl_gguf_writer *w, const char *key, astrovl_value_type item_type, const void *values,
                                        uint64_t count);
// An entry of another file, as it is there. (general.alignment is passed over: it is another for this file.)
ASTROVL_API void astrovl_gguf_copy(astrovl_gguf_writer *w, const astrovl_gguf *from, int index);
// Declares a tensor: 1 to 4 dimensions, ne[0] the length of a row, which must be whole blocks.
ASTROVL_API void astrovl_gguf_put_tensor(astrovl_gguf_writer *w, const char *name, astrovl_type type, int n_dims,
                                         const int64_t *ne);
// Once all is declared: the tensors' data, little-endian blocks, one tensor after the other as declared, each in one or more
// pieces. FILE (is the disk full?), ARGUMENT (more than the tensor holds, the same name twice ...), MEMORY.
ASTROVL_API astrovl_status astrovl_gguf_write(astrovl_gguf_writer *w, const void *data, size_t size, astrovl_error *err);
// Brings the file to the disk under its name. Releases w in any case; on failure nothing is left of the file. As _write.
ASTROVL_API astrovl_status astrovl_gguf_finish(astrovl_gguf_writer *w, astrovl_error *err);
ASTROVL_API void astrovl_gguf_discard(astrovl_gguf_writer *w);          // releases w, removes the file; NULL is allowed

// What became of a file's tensors.
typedef struct astrovl_quantize_report {
    int n_tensors, n_changed;      // of all: those whose type is another now
    int n_fallbacks;               // rows that are no multiple of the wanted type's block: got another type
    int n_requantized;             // quantised before already: what was lost then is not regained, and more is lost now
} astrovl_quantize_report;

// Writes a copy of a model file with its weight matrices in another type. Metadata and the order of the tensors stay, but
// general.file_type and general.quantization_version. Recipes, in any case:
//   f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k      every matrix gets this type
//   q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m      llama.cpp's mixes: this type, but more bits where it pays:
//     all     output.weight (token_embd.weight if there is none) Q6_K; and of n blocks, in
//     q3_k_m  attn_v Q4_K, of blocks 0 and 1 Q5_K; ffn_down Q4_K, of the first n/16 Q5_K; attn_output Q4_K
//     q3_k_l  attn_v, ffn_down, attn_output Q5_K
//     q4_k_s  attn_v of the first 4 blocks, ffn_down of the first n/8 Q5_K
//     q4_k_m, q5_k_m  attn_v and ffn_down Q6_K in the first and the last eighth of the blocks and every third between
//     (70B models, 80 blocks whose heads share keys: attn_v at least Q5_K)
// Left as they are: vectors, norms, position and patch embeddings, and what is not called *.weight. Rows that are no multiple of
// 256: Q2_K and Q3_K become Q4_0, Q4_K Q5_0, Q5_K Q5_1, Q6_K Q8_0; of 32: F16. The bytes are the same on every machine and for
// every n_threads (0: one per processor). Memory taken: some MB. progress may be NULL, report (out) too.
// Source: llama.cpp's llama-quant.cpp for the rules.  ARGUMENT (no such recipe), FILE, MEMORY, CANCELLED: nothing is left behind.
ASTROVL_API astrovl_status astrovl_quantize_file(const astrovl_gguf *in, const char *out_path, const char *recipe, int n_threads,
                                                 astrovl_progress progress, void *user, astrovl_quantize_report *report,
                                                 astrovl_error *err);
#endif

// ---- models -----------------------------------------------------------------------------------------------------

typedef struct astrovl_model   astrovl_model;     // weights, vocabulary, settings: immutable, shared by threads
typedef struct astrovl_session astrovl_session;   // KV cache, scratch memory, threads: one caller at a time
typedef struct astrovl_guide   astrovl_guide;     // what an answer may look like: a regular expression or a JSON schema

// Prompt templates. AUTO reads tokenizer.chat_template (recognised by its markers, not interpreted).
typedef enum astrovl_template {
    ASTROVL_TEMPLATE_AUTO = 0,
    ASTROVL_TEMPLATE_VICUNA,       // "vicuna_v1": AstroLLaVA, LLaVA-1.5 (its training)
    ASTROVL_TEMPLATE_LLAVA,        // "llava_v1": the same but for one word ("human" for "user"; LLaVA's own inference scripts)
    ASTROVL_TEMPLATE_LLAMA2,       // "llava_llama_2": [INST] <<SYS>>
    ASTROVL_TEMPLATE_LLAMA3,       // <|start_header_id|>user<|end_header_id|>
    ASTROVL_TEMPLATE_CHATML,       // <|im_start|>user: SmolLM2 and many others
    ASTROVL_TEMPLATE_PLAIN         // no markers: the model continues the text
} astrovl_template;

typedef struct astrovl_open_options {
    int              no_mmap;      // 1: read the file into memory instead of mapping it
    astrovl_template chat_template;  // AUTO: from the file
    // NULL: opening ends at the first problem. Else this is told each broken file, each missing or misshapen tensor, key and part
    // of a tokenizer, a line each, and opening goes on to find them all; if there was one, it fails in the end (MODEL). Problems
    // are then also parts of no use alone: a language model without tokenizer, an mmproj file without language model ...
    void           (*on_problem)(void *user, const char *message);
    void            *user;
} astrovl_open_options;

// A model file that lies in memory.
typedef struct astrovl_memory {
    const void *data;
    size_t      size;
    const char *name;              // for messages; may be NULL
} astrovl_memory;

// Opens a model of one or several GGUF files (text model, mmproj, contrastive towers: tensors are found by name across all).
// Any part may be absent; astrovl_get_info says what there is. Weights stay in the mapped file: nothing is copied but the
// small vectors. Returns NULL and err (FILE, FORMAT, UNSUPPORTED, MODEL, MEMORY).
ASTROVL_API astrovl_model *astrovl_open(const char *path, const astrovl_open_options *options, astrovl_error *err);
ASTROVL_API astrovl_model *astrovl_open_files(const char *const *paths, int n_paths, const astrovl_open_options *options,
                                              astrovl_error *err);
ASTROVL_API astrovl_model *astrovl_open_memory(const astrovl_memory *blocks, int n_blocks, const astrovl_open_options *options,
                                               astrovl_error *err);
ASTROVL_API void astrovl_close(astrovl_model *model);                   // after its sessions; NULL is allowed

// What a model consists of.
typedef struct astrovl_info {
    int has_vocab, has_text, has_vision, has_projector;
    astrovl_template chat_template;
    const char *name;                                   // general.name, or ""
    // language model (LLaMA)
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff;
    float rope_theta, rms_norm_eps;
    int bos_token, eos_token;                           // -1: none
    // vision tower (CLIP)
    int image_size, patch_size, n_patches, vision_n_embd, vision_n_layer, vision_n_head, vision_n_ff;
    int vision_feature_layer;                           // how many layers run before the features are taken
    int n_image_tokens;                                 // rows that one image takes in the sequence
    // contrastive (CLIP): both towers, the text tower
    int has_joint_image, has_joint_text;                // images (texts) can be embedded
    int n_embd_joint;                                   // length of an embedding
    float logit_scale;                                  // what cosines are multiplied by before softmax (CLIP: 100)
    int clip_text_n_ctx, clip_text_n_embd, clip_text_n_layer, clip_text_n_head, clip_text_n_ff, clip_text_n_vocab;
    uint64_t n_params, n_weight_bytes;
} astrovl_info;

ASTROVL_API void astrovl_get_info(const astrovl_model *model, astrovl_info *info);
ASTROVL_API int astrovl_n_files(const astrovl_model *model);
ASTROVL_API const astrovl_gguf *astrovl_file(const astrovl_model *model, int index);   // owned by the model
#ifndef ASTROVL_NO_FILES
// Writes a model file of random weights: to measure speed and memory, or to test a program, where no real model is at hand. What
// it says is noise. llama.cpp runs it, too.
// sizes   has_text: a language model of n_vocab (at least 260) made-up tokens, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;
//         has_vision: a tower of image_size, patch_size and vision_*, and LLaVA-1.5's projector to n_embd; or both; and name
// type    of the matrices; where a row is not whole blocks of it, as astrovl_quantize_file chooses
// tied    1: there is no output matrix, the embeddings serve as one
// progress may be NULL.  ARGUMENT (sizes that make no model), FILE, MEMORY, CANCELLED: nothing is left behind.
ASTROVL_API astrovl_status astrovl_write_random(const char *path, const astrovl_info *sizes, astrovl_type type, int tied,
                                                astrovl_progress progress, void *user, astrovl_error *err);
// The sizes of "llava-1.5-7b", "smollm2-135m" (a language model alone) or "nano" (a LLaVA of a megabyte). 0: no such name.
ASTROVL_API int astrovl_known_sizes(const char *name, astrovl_info *sizes, int *tied);
#endif
ASTROVL_API const char *astrovl_template_name(astrovl_template t);                      // "vicuna_v1", ...
ASTROVL_API int astrovl_template_from_name(const char *name);                           // -1: no such template

// ---- one-call API -----------------------------------------------------------------------------------------------

typedef struct astrovl_image {
    int            width, height;
    unsigned char *rgb;            // [height][width][3], sRGB as in the file
    int            orientation;    // EXIF tag 0x0112: 1 to 8, 1 when absent (1 = upright)
} astrovl_image;

// How text is chosen and when it ends. All zeros: greedy, at most 256 tokens.
typedef struct astrovl_generation {
    int      max_tokens;           // 0: 256
    float    temperature;          // 0: greedy (the rest of this block is then unused but repetition_penalty)
    int      top_k;                // keep the k likeliest; 0: all
    float    top_p;                // keep the smallest set with this probability (Holtzman et al. 2020); 0 or 1: all
    float    min_p;                // drop what is less likely than min_p * the likeliest; 0: none
    float    repetition_penalty;   // logits of seen tokens / p if > 0, * p otherwise (Keskar et al. 2019); 0 or 1: off
    int      repetition_window;    // over the last n generated tokens; 0: 64
    uint64_t seed;                 // the same seed gives the same choices on every machine
    const char *const *stop;       // [n_stop] texts that end the answer (and are left out of it)
    int      n_stop;
    const char *system;            // system prompt; NULL: the template's own; "": none
    astrovl_guide *guide;          // NULL: free text; else the answer keeps to it, and ends as it asks within max_tokens
    int      parse_special;        // 1: special tokens written in the user's text are taken as such (trusted text only)
    // Called with each new piece of text, never a broken UTF-8 character; a non-zero return cancels (the answer so far is kept).
    int    (*on_text)(void *user, const char *text, size_t size);
    void    *user;
} astrovl_generation;

// Each returns the answer, zero-terminated UTF-8, to be freed with astrovl_free; NULL and err on failure. They open a session
// of their own (all processors, fast mode); use a session to keep it, to talk on, or to choose threads and mode.
ASTROVL_API char *astrovl_caption(const astrovl_model *model, const astrovl_image *image, const astrovl_generation *options,
                                  astrovl_error *err);
ASTROVL_API char *astrovl_caption_file(const astrovl_model *model, const char *image_path, const astrovl_generation *options,
                                       astrovl_error *err);
ASTROVL_API char *astrovl_ask(const astrovl_model *model, const astrovl_image *image, const char *question,
                              const astrovl_generation *options, astrovl_error *err);
ASTROVL_API char *astrovl_ask_file(const astrovl_model *model, const char *image_path, const char *question,
                                   const astrovl_generation *options, astrovl_error *err);

#define ASTROVL_CAPTION_PROMPT "Describe this image."

// ---- sessions ---------------------------------------------------------------------------------------------------

typedef enum astrovl_mode {
    ASTROVL_FAST = 0,              // the best kernels this machine has; repeatable here, whatever the thread count
    ASTROVL_EXACT                  // the same bits on every machine, compiler and thread count
} astrovl_mode;

// Sees an intermediate tensor the moment it is computed. It must not call back into the session.
// name    as transformers names the module: "vision_model.encoder.layers.3.mlp.fc1", "model.layers.0.self_attn.q_proj"
// layer   the layer's number, or -1 outside the layers
// shape   [n_dims], slowest first;   data   float32, valid during the call
typedef void (*astrovl_tap)(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data);

typedef struct astrovl_session_options {
    astrovl_mode     mode;
    int              n_threads;    // 0: one per processor
    int              n_ctx;        // tokens the KV cache holds; 0: the model's, at most ASTROVL_DEFAULT_CONTEXT
    astrovl_tap      tap;          // NULL: none
    void            *tap_user;
    astrovl_progress progress;     // NULL: none
    void            *progress_user;
    const char      *isa;          // fast mode's kernels are none better than "portable", "avx2", "avx_vnni", "avx512" or
                                   // "avx512_bf16", on AArch64 "portable", "neon", "neon_dotprod" or "neon_i8mm"; NULL: the best
                                   // for this processor
    astrovl_session *share;        // another session of the model, freed after this one: its mode, threads, scratch memory, tap and
                                   // progress serve both, never at the same time, and this one costs its KV cache alone. NULL: none
} astrovl_session_options;

// The model must outlive the session. Returns NULL and err (ARGUMENT, MEMORY).
ASTROVL_API astrovl_session *astrovl_session_new(const astrovl_model *model, const astrovl_session_options *options,
                                                 astrovl_error *err);
ASTROVL_API void astrovl_session_free(astrovl_session *s);              // NULL is allowed
ASTROVL_API void astrovl_session_reset(astrovl_session *s);             // forgets the conversation
ASTROVL_API int astrovl_session_n_past(const astrovl_session *s);       // positions the KV cache holds now
ASTROVL_API int astrovl_session_n_ctx(const astrovl_session *s);

// One turn of a conversation: the user says `text` about `images` (n_images may be 0), the model answers. Where `text` has the
// marker <image> n_images times, the images stand there; where it has none, they stand before the text, each followed by a
// newline (LLaVA's habit). Earlier turns stay in the KV cache. Returns the answer (astrovl_free), or NULL and err: LIMIT when
// the context is full, MODEL when a part is missing. A failed turn leaves the conversation as it was before it.
ASTROVL_API char *astrovl_chat(astrovl_session *s, const astrovl_image *images, int n_images, const char *text,
                               const astrovl_generation *options, astrovl_error *err);

// A turn of one of several conversations: what astrovl_chat takes and gives.
typedef struct astrovl_turn {
    astrovl_session          *session;
    const astrovl_image      *images;
    int                       n_images;
    const char               *text;
    const astrovl_generation *options;
    char                     *answer;      // out: to be freed with astrovl_free; NULL if this turn failed
    astrovl_error             err;         // out: why; its status is ASTROVL_OK if there is an answer
} astrovl_turn;

// Turns of n_turns conversations, each with the answer that astrovl_chat would give. The prompts are read one after another; then all
// answers are written together, a token of each per step. A step of one conversation spends its time on fetching the weights from
// memory; a step of several fetches them as often, once (for every 16 conversations once), and so costs little more.
// The sessions are distinct, and all share one of them (see astrovl_session_options.share). Options may differ; a turn that ends
// early leaves the others to go on, and so does one that fails, whose conversation is then as it was before.
// Returns ASTROVL_OK if every turn has its answer, else what the first one without says: ARGUMENT, for all of them, if these sessions
// cannot go together.
ASTROVL_API astrovl_status astrovl_chat_batch(astrovl_turn *turns, int n_turns, astrovl_error *err);

// What the last turn took. In a batch, a step's time is shared out evenly among the turns that it served: those of all turns add up
// to what the batch took.
typedef struct astrovl_stats {
    double encode_seconds;         // images through the vision tower and projector
    double prompt_seconds;         // reading the prompt
    double decode_seconds;         // writing the answer
    int    n_prompt_tokens;        // image rows included
    int    n_answer_tokens;
    int    stopped_by_limit;       // 1: max_tokens or the context ended the answer, not the model
} astrovl_stats;
ASTROVL_API void astrovl_get_stats(const astrovl_session *s, astrovl_stats *stats);
// The last answer's tokens, owned by the session, valid until the next turn.
ASTROVL_API const int32_t *astrovl_answer_tokens(const astrovl_session *s, int *n_tokens);

// ---- the parts of a session, one by one -------------------------------------------------------------------------

// Brings an image to the vision tower's input as the model's files say (pad to square or centre crop, bicubic resize,
// 1/255, mean and standard deviation). pixels: out, [3][image_size][image_size].
ASTROVL_API astrovl_status astrovl_preprocess(const astrovl_model *model, const astrovl_image *image, float *pixels,
                                              astrovl_error *err);

// Encodes one image to the rows that the language model reads in its place.
// image     8-bit RGB, any size; padded or cropped as the model's files say
// features  out, [n_image_tokens][n_embd], caller's memory
// Returns MODEL if the model has no vision tower or projector (err says what is missing).
// Source: LLaVA-1.5 (arXiv 2310.03744) section 3; transformers' LlavaModel.get_image_features.
ASTROVL_API astrovl_status astrovl_encode_image(astrovl_session *s, const astrovl_image *image, float *features,
                                                astrovl_error *err);

// Appends tokens (or rows of embeddings, [n][n_embd]) to the sequence.
// logits    out, [n_logits][n_vocab], of the last n_logits positions; NULL with n_logits = 0 to compute none
// Returns LIMIT when the context would overflow (the sequence is then unchanged).
ASTROVL_API astrovl_status astrovl_eval_tokens(astrovl_session *s, const int32_t *tokens, int n_tokens, float *logits,
                                               int n_logits, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_eval_embeddings(astrovl_session *s, const float *rows, int n_rows, float *logits,
                                                   int n_logits, astrovl_error *err);
// Forgets all positions from n_past on (to branch a conversation or to retry).
ASTROVL_API void astrovl_session_rewind(astrovl_session *s, int n_past);

// The next token by the rules of `options`; changes logits [n_vocab] in place.
// history [n_history] the tokens generated so far;   random_state: set it to the seed before the first call
ASTROVL_API int32_t astrovl_sample(float *logits, int n_vocab, const astrovl_generation *options, const int32_t *history,
                                   int n_history, uint64_t *random_state);

// ---- guided generation ------------------------------------------------------------------------------------------

// Keeps an answer inside a regular language: after each token, only those may follow whose bytes continue to a text
// that matches a pattern or a JSON schema (Willard & Louf 2023, arXiv 2307.09702; PAPERCLIP's summaries are made so).
// States are found as answers reach them, and remembered: a guide belongs to one thread at a time, also where it is not
// const below. Several answers, one after another or in a batch, may share it. The model must outlive it.

// A pattern that the whole answer matches. Understood: literals, . [a-z] [^a-z] \d \w \s \D \W \S \n \t \r \xHH \uHHHH,
// groups ( ) and (?: ), |, * + ? {m} {m,} {m,n}; ^ and $ at the ends. UTF-8; . is any character but a line feed.
// NULL and err: FORMAT or UNSUPPORTED name the byte of the pattern, LIMIT if it is too large, MODEL if the vocabulary
// cannot spell any such answer.
ASTROVL_API astrovl_guide *astrovl_guide_regex(const astrovl_model *model, const char *pattern, astrovl_error *err);
// JSON that validates against a schema (json-schema.org, draft 2020-12), of which this part is understood:
//   type           object, array, string, integer, number, boolean, null, or a list of these
//   object         properties (written in their order), required (the others may be left out), additionalProperties (none is
//                  ever written)
//   array          items, minItems, maxItems
//   string         minLength, maxLength (characters)
//   any            enum, const, anyOf; title, description, default, examples, $schema, $id, $comment are passed over
// Integers have at most 15 digits and are not -0; other numbers have at most 15 digits before and after the point.
// Between the parts stands at most one space.
// NULL and err: FORMAT or UNSUPPORTED name the place in the schema ("/properties/objects/items"), LIMIT and MODEL as
// above.
ASTROVL_API astrovl_guide *astrovl_guide_schema(const astrovl_model *model, const char *json, size_t size,
                                                astrovl_error *err);
ASTROVL_API void astrovl_guide_free(astrovl_guide *guide);              // NULL is allowed
// For sampling loops of your own (astrovl_generation.guide does all this). States are numbers; an answer starts in 0.
// The state after a token; -1 where the token may not follow, or on a failure, which the next astrovl_guide_mask tells.
ASTROVL_API int astrovl_guide_next(astrovl_guide *guide, int state, int32_t token);
// 1 if the answer may end here.
ASTROVL_API int astrovl_guide_is_accepting(const astrovl_guide *guide, int state);
// Tokens that suffice to bring the answer to an end from here (0 in an accepting state). -1: no such state.
ASTROVL_API int astrovl_guide_min_tokens(astrovl_guide *guide, int state);
// Sets the logits [n_vocab] of all tokens that may not follow to -infinity: those that lead to no match, and those
// after which n_left - 1 more tokens would not suffice to end. End tokens may follow in accepting states.
// ARGUMENT; LIMIT if nothing may follow, or n_left tokens do not suffice. When memory is out, or the expressions ever met
// exceed 2^20, MEMORY or LIMIT stick: the guide must be freed.
ASTROVL_API astrovl_status astrovl_guide_mask(astrovl_guide *guide, int state, int n_left, float *logits,
                                              astrovl_error *err);

// ---- contrastive: images and texts in one space (CLIP, PAPERCLIP) ------------------------------------------------

// Embeds images (or texts) as rows of n_embd_joint numbers. Source: CLIP (Radford et al. 2021, arXiv 2103.00020) section 2.3;
// transformers' CLIPModel.get_image_features and get_text_features.
// normalize   1: each row divided by its length (cosines are then products), 0: as the towers give it
// embeddings  out, [n][n_embd_joint], caller's memory.  Several images go through the tower together; the rows are the same as
// one by one. A text longer than the tower's positions is cut (its last token stays the end token). Any UTF-8; lower-cased and
// cleaned as transformers' CLIPTokenizer does.   Returns MODEL if the model lacks the tower.
ASTROVL_API astrovl_status astrovl_embed_images(astrovl_session *s, const astrovl_image *images, int n_images, int normalize,
                                                float *embeddings, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_embed_texts(astrovl_session *s, const char *const *texts, int n_texts, int normalize,
                                               float *embeddings, astrovl_error *err);
// Token ids of a text for the text tower, start and end token included, not cut: as astrovl_tokenize.
ASTROVL_API int astrovl_clip_tokenize(const astrovl_model *model, const char *text, size_t size, int32_t *tokens, int capacity,
                                      astrovl_error *err);
// How well each text fits an image: cosines and, if not NULL, probabilities = softmax(logit_scale * cosine) over the texts.
// cosines, probabilities: out, [n_texts]. Opens a session of its own (all processors, fast mode).
ASTROVL_API astrovl_status astrovl_score(const astrovl_model *model, const astrovl_image *image, const char *const *texts,
                                         int n_texts, float *cosines, float *probabilities, astrovl_error *err);

// A row found, and how well it fits.
typedef struct astrovl_hit {
    int64_t row;
    float   score;
} astrovl_hit;

// The k rows with the largest products with the query, best first, the earlier row first among equals. All rows are compared:
// the result is exact. rows: [n_rows][n_dims] float16, little-endian (as in an index file, any alignment); query: [n_dims].
// hits: out, [k].  n_threads 0: one per processor.  Returns how many there are (fewer than k if there are fewer rows), or -1.
// Scores are summed in exact mode's order: the same on every machine.
ASTROVL_API int astrovl_search(const void *rows, int64_t n_rows, int n_dims, const float *query, int k, int n_threads,
                               astrovl_hit *hits, astrovl_error *err);

// Metrics of a set of n pairs (PAPERCLIP, arXiv 2403.08851, section 4); images, texts: [n][n_dims], normalised, row i of one
// belonging to row i of the other.
// The mean over both directions of -log softmax(logit_scale * cosines)[i][i]   (CLIP's loss, the whole set as one batch)
ASTROVL_API double astrovl_contrastive_loss(const float *images, const float *texts, int n, int n_dims, float logit_scale);
// ranks[i], out: how many rows of `items` fit row i of `queries` better than its partner does (0: the partner is first). Rows
// equal to the partner's count as better if they come earlier.
ASTROVL_API void astrovl_retrieval_ranks(const float *queries, const float *items, int n, int n_dims, int32_t *ranks);
// The share of ranks among the best k percent: ranks[i] < floor(percent / 100 * n).
ASTROVL_API double astrovl_top_k_accuracy(const int32_t *ranks, int n, double percent);
// Seconds that n_threads (0: one per processor) take to read a block of memory once: the ceiling to hold astrovl_search against.
ASTROVL_API double astrovl_measure_read(const void *data, size_t size, int n_threads);

// ---- measuring --------------------------------------------------------------------------------------------------

ASTROVL_API double astrovl_seconds(void);   // since some moment, to measure spans
// Operations a second (a product and a sum are two) that n_threads (0: one per processor) reach in registers alone, with the
// instruction that fast mode multiplies many rows by weights of this type with. isa: as of a session's options. Takes a fifth of a
// second. 0 if there is no such isa or type, or memory is out.
ASTROVL_API double astrovl_measure_peak(int type, const char *isa, int n_threads);

// One kind of work: what it took, and what this machine could do at most.
typedef struct astrovl_pace {
    int    n;                      // images, positions or tokens; 0: the model cannot do it
    double seconds;                // for all n
    double work;                   // reading: operations, two for each product in matrices and attention; writing: bytes of weights,
                                   // keys and values that must be read
    double limit;                  // work a second: astrovl_measure_peak's; in writing, reading the weights alone, after each token
    double reached;                // work / seconds / limit
    int    type;                   // of most weights
} astrovl_pace;
typedef struct astrovl_speed {
    astrovl_pace image, prompt, answer;    // encoding one image; reading n_prompt positions; writing n_answer tokens after them
    double   first_token_seconds;  // of an image (encoding included) and ASTROVL_QUESTION more positions; 0: no such model, or no room
    uint64_t file_bytes, cache_bytes;      // the model's files; the KV cache as far as it was used
    uint64_t peak_bytes;           // the most memory this process has held, files as far as they were read; 0: the system does not say
} astrovl_speed;
#define ASTROVL_QUESTION 35
// Medians of n_rounds, each of which measures all, since machines change their speed. Ends the conversation. Tokens are the same
// whatever the model says; what does not fit the context is cut. CLIP alone embeds its image. The first round also pays for
// fetching the files from the disk. progress (may be NULL): stage "rounds".  ARGUMENT (counts below 1), MODEL (neither a language
// model nor a whole vision tower), MEMORY, CANCELLED.
ASTROVL_API astrovl_status astrovl_measure_model(astrovl_session *s, int n_prompt, int n_answer, int n_rounds,
                                                 astrovl_progress progress, void *user, astrovl_speed *speed, astrovl_error *err);

// Answers written together, as astrovl_chat_batch does, and one alone.
typedef struct astrovl_batch_speed {
    int      n, n_prompt, n_answer;        // answers; the positions before each; the tokens of each
    double   seconds, one_seconds;         // all n together; one alone
    double   gain;                         // n * one_seconds / seconds: so many times the tokens a second
    uint64_t cache_bytes;                  // all n KV caches
} astrovl_batch_speed;
// Medians of n_rounds, each of which writes one answer and n_batch together, token by token in turns, so that a gain is of one moment.
// Each answer has a KV cache of its own, whose n_prompt positions are made up instead of read: what they hold does not change the time.
// The session's conversation is left alone. What does not fit its context is cut. The rest is as above.
ASTROVL_API astrovl_status astrovl_measure_batch(astrovl_session *s, int n_prompt, int n_answer, int n_batch, int n_rounds,
                                                 astrovl_progress progress, void *user, astrovl_batch_speed *speed,
                                                 astrovl_error *err);

// Medians of n_rounds, each of which searches n_rows of n_dims random float16 for the best 10 (astrovl_search), then reads the same
// memory once (astrovl_measure_read). seconds: out, [search, reading].  ARGUMENT (counts below 1), MEMORY.
ASTROVL_API astrovl_status astrovl_measure_search(int64_t n_rows, int n_dims, int n_rounds, int n_threads, double seconds[2],
                                                  astrovl_error *err);

// How far logits are from others at the same positions of a text.
typedef struct astrovl_likeness {
    double cosine, least_cosine;           // of a position's logits: the mean, the least
    double difference;                     // the largest of two logits
    double same;                           // share of positions with the same likeliest token
    double perplexity, ratio;              // exp(mean of -log p(the next token)); that over the reference's. NaN for one token
} astrovl_likeness;
typedef struct astrovl_accuracy {
    astrovl_likeness prompt, steps;        // tokens read together, as a prompt is; one after another, as an answer is written
    double reference_perplexity;
} astrovl_accuracy;
// What a session (fast mode, say) makes of a text, held against a reference (exact mode; of the same model, or of one with the same
// vocabulary). tokens: at least one. Ends both conversations.  ARGUMENT (no token, other vocabularies), MODEL (no language model),
// LIMIT (the text is longer than a context), MEMORY, CANCELLED (by a session's progress).
ASTROVL_API astrovl_status astrovl_measure_accuracy(astrovl_session *s, astrovl_session *reference, const int32_t *tokens,
                                                    int n_tokens, astrovl_accuracy *accuracy, astrovl_error *err);

// How well a set of n pairs is told apart (PAPERCLIP, arXiv 2403.08851, sections 3.3 and 4.1).
typedef struct astrovl_retrieval {
    double loss;                   // astrovl_contrastive_loss
    double share[2][101];          // [image -> text, text -> image][k]: partner among the best k percent (astrovl_top_k_accuracy)
    double mean[2], median[2];     // cosines of [pairs, wrong pairs]
} astrovl_retrieval;
// images, texts: [n][n_dims], normalised, row i of one belonging to row i of the other;  cosines: out, [pairs, wrong pairs][n],
// each ascending. Wrong pairs are drawn by a fixed sequence: one of each image, one of each text.
// ARGUMENT (fewer than two pairs), MEMORY.
ASTROVL_API astrovl_status astrovl_measure_retrieval(const float *images, const float *texts, int n, int n_dims, float logit_scale,
                                                     float *cosines, astrovl_retrieval *r, astrovl_error *err);
// Which of n words (or terms of several words) a text names first, of those that begin there the longest; as whole words, in any
// case of ASCII's letters. -1: none.
ASTROVL_API int astrovl_first_named(const char *text, const char *const *words, int n);

// ---- JSON lines -------------------------------------------------------------------------------------------------

// The strings of one member of a JSON object (RFC 8259), such as a line of a .jsonl file: a string, or an array of strings.
// *n: how many, 0 if there is no such member. One block of memory, texts included (astrovl_free). NULL and err: FORMAT names the
// byte where the text breaks JSON's rules, or the member that is of another kind.
ASTROVL_API char **astrovl_json_strings(const char *json, size_t size, const char *key, int *n, astrovl_error *err);

// ---- text -------------------------------------------------------------------------------------------------------

#define ASTROVL_ADD_SPECIAL   1    // BOS/EOS as the vocabulary asks
#define ASTROVL_PARSE_SPECIAL 2    // "<s>" in the text becomes the token (trusted text only)

// Text to token ids. tokens: out, at most `capacity`; returns how many there are (if more than capacity, the rest was not
// written), or -1 and err (MODEL: no vocabulary; MEMORY). Any bytes are accepted, valid UTF-8 or not.
ASTROVL_API int astrovl_tokenize(const astrovl_model *model, const char *text, size_t size, int flags, int32_t *tokens,
                                 int capacity, astrovl_error *err);
// A token's entry in the vocabulary, as the file spells it ("▁the", "<0x0A>", "Ġthe"); empty for an id out of range.
ASTROVL_API astrovl_string astrovl_token_piece(const astrovl_model *model, int32_t token);
// The bytes a token stands for in running text; special tokens give none. Returns the count (which may exceed capacity).
ASTROVL_API int astrovl_token_text(const astrovl_model *model, int32_t token, char *text, int capacity);
// Token ids to text, zero-terminated (astrovl_free); a leading space that the tokenizer added is removed. NULL and err.
ASTROVL_API char *astrovl_detokenize(const astrovl_model *model, const int32_t *tokens, int n_tokens, astrovl_error *err);
// 1 if the token ends an answer (EOS, <|im_end|>, <|eot_id|> ...).
ASTROVL_API int astrovl_token_is_end(const astrovl_model *model, int32_t token);

// ---- images -----------------------------------------------------------------------------------------------------
// The reference is Pillow: convert("RGB") of PNG is matched to the bit, JPEG within 1 level of libjpeg-turbo's default.

// Decodes PNG, JPEG or PNM (told by the first bytes) to RGB. max_pixels: 0 means ASTROVL_MAX_PIXELS. The pixels are as stored:
// apply astrovl_image_upright for EXIF. Release with astrovl_image_free.
ASTROVL_API astrovl_status astrovl_image_load(const char *path, uint64_t max_pixels, astrovl_image *image, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_image_decode(const void *data, size_t size, uint64_t max_pixels, astrovl_image *image,
                                                astrovl_error *err);
ASTROVL_API void astrovl_image_free(astrovl_image *image);
// Turns and mirrors the pixels in `image` by its EXIF orientation and sets that to 1.
ASTROVL_API astrovl_status astrovl_image_upright(astrovl_image *image, astrovl_error *err);
// Pillow's resize(..., BICUBIC): antialiased, a = -0.5, in 8-bit fixed point. out is new memory; it may not alias image.
ASTROVL_API astrovl_status astrovl_image_resize(const astrovl_image *image, int width, int height, astrovl_image *out,
                                                astrovl_error *err);
// The image centred on a square of its longer side, filled with `color` (LLaVA's expand2square).
ASTROVL_API astrovl_status astrovl_image_pad_square(const astrovl_image *image, const unsigned char color[3],
                                                    astrovl_image *out, astrovl_error *err);
// The middle width x height pixels (transformers' center_crop; black outside the image).
ASTROVL_API astrovl_status astrovl_image_center_crop(const astrovl_image *image, int width, int height, astrovl_image *out,
                                                     astrovl_error *err);

// ---- layers: each operation on plain arrays, one thread, for teaching and auditing ------------------------------

// y[i] = (x[i] - mean) / sqrt(var + eps) * weight[i] + bias[i]      LayerNorm (Ba et al. 2016), CLIP's norm
ASTROVL_API void astrovl_layer_norm(float *y, const float *x, const float *weight, const float *bias, int n_embd, float eps);
// y[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]                   RMSNorm (Zhang & Sennrich 2019), LLaMA's norm
ASTROVL_API void astrovl_rms_norm(float *y, const float *x, const float *weight, int n_embd, float eps);
// x[i] = exp(x[i] - max) / sum exp(x - max)
ASTROVL_API void astrovl_softmax(float *x, int n);
// GELU (Hendrycks & Gimpel 2016): x * Phi(x);  quick-GELU (CLIP): x * sigmoid(1.702 x);  SiLU: x * sigmoid(x)
ASTROVL_API void astrovl_gelu(float *x, int64_t n);
ASTROVL_API void astrovl_quick_gelu(float *x, int64_t n);
ASTROVL_API void astrovl_silu(float *x, int64_t n);
// Rotates the pairs (x[2i], x[2i+1]) of one head by position * inv_freq[i] (Su et al. 2021; GGUF's interleaved order).
// x: [head_dim]; inv_freq: [head_dim / 2]
ASTROVL_API void astrovl_rope(float *x, int head_dim, int position, const float *inv_freq);
// y[n_rows][n_out] = x[n_rows][n_in] * w[n_out][n_in]^T + bias[n_out]  (bias may be NULL); w float32; exact mode's order
ASTROVL_API void astrovl_linear(float *y, const float *x, const float *w, const float *bias, int n_rows, int n_in, int n_out);
// Exact mode's functions: only + - * / and sqrt of IEEE arithmetic, so the same bits everywhere.
ASTROVL_API float astrovl_expf(float x);
ASTROVL_API float astrovl_tanhf(float x);
ASTROVL_API float astrovl_erff(float x);
ASTROVL_API float astrovl_sinf(float x);
ASTROVL_API float astrovl_cosf(float x);

#ifdef __cplusplus
}
#endif
#endif // ASTROVL_H

// ====================================================================================================================
// [2] Platform
// What the rest needs from the machine and cannot compute: memory, files, threads, time. Everything below this section is
// plain arithmetic on arrays. Each part has a fallback in standard C, so the header builds where there is nothing else.
// ====================================================================================================================

#ifdef ASTROVL_IMPLEMENTATION
#ifndef ASTROVL__IMPLEMENTED
#define ASTROVL__IMPLEMENTED

#if defined(__FAST_MATH__)
#error "astrovl.h: exact mode promises IEEE arithmetic; compile its implementation without -ffast-math"
#endif

#if defined(_WIN32) || defined(__wasm__) || defined(ASTROVL_BARE)
#define AVL__POSIX 0
#else
#define AVL__POSIX 1
#endif

#include <float.h>
#include <limits.h>
#include <stdarg.h>
#include <string.h>
#ifndef ASTROVL_NO_FILES
#include <errno.h>
#include <stdio.h>
#if AVL__POSIX
#include <fcntl.h>
#include <sys/stat.h>
#endif
#endif
#if AVL__POSIX && !defined(ASTROVL_NO_THREADS) && defined(__GNUC__)   // clang says so too; for its atomic operations
#define AVL__THREADS 1
#include <pthread.h>
#else
#define AVL__THREADS 0
#endif
#if AVL__POSIX && !defined(ASTROVL_NO_FILES) && !defined(ASTROVL_NO_MMAP)
#define AVL__MMAP 1
#include <sys/mman.h>
#else
#define AVL__MMAP 0
#endif
#if AVL__POSIX
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>
#else
#include <time.h>
#endif
#if defined(__x86_64__) && !defined(ASTROVL_TEST_GENERIC) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10))
#define AVL__X86 1           // instruction sets beyond the build's are compiled per function and chosen at run time
#if !defined(__clang__)
#pragma GCC diagnostic push       // gcc 12's own header trips over its idiom for "any value" (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#define AVL__X86 0
#endif
#if defined(__aarch64__) && !defined(__AARCH64EB__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10))
#define AVL__NEON 1          // the same on AArch64
#include <arm_neon.h>
#if AVL__POSIX && defined(__linux__)
#include <sys/auxv.h>
#elif AVL__POSIX && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#else
#define AVL__NEON 0
#endif
// Vector extensions of gcc and clang, where there are registers for them; the kernels assume little-endian bytes.
#if defined(ASTROVL_NO_SIMD)
#define AVL__SIMD 0
#elif AVL__X86 || AVL__NEON
#define AVL__SIMD 1
#elif ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10)) && \
    __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && (defined(__SSE2__) || defined(__VSX__) || defined(__loongarch_sx) || \
    defined(__wasm_simd128__) || (defined(__riscv_vector) && (defined(__clang__) || __GNUC__ >= 14)))
#define AVL__SIMD 1
#else
#define AVL__SIMD 0
#endif

// Exact mode's sums must not be contracted into fused multiply-adds. gcc ignores the standard pragma and has its own.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- configuration (the manual describes each) ---------------------------------------------------------------------

#ifndef ASTROVL_MALLOC
#include <stdlib.h>
#define ASTROVL_MALLOC(size)           malloc(size)
#define ASTROVL_REALLOC(memory, size)  realloc(memory, size)
#define ASTROVL_FREE(memory)           free(memory)
#endif
#ifndef ASTROVL_MAX_PIXELS
#define ASTROVL_MAX_PIXELS ((uint64_t)1 << 28)
#endif
#ifndef ASTROVL_DEFAULT_CONTEXT
#define ASTROVL_DEFAULT_CONTEXT 4096
#endif
#ifndef ASTROVL_MAX_THREADS
#define ASTROVL_MAX_THREADS 64
#endif

// ---- errors --------------------------------------------------------------------------------------------------------

// Appends text to message[capacity] at *at, cutting what does not fit at a character's start.
static void avl__message_put(char *message, size_t capacity, size_t *at, const char *text, size_t size) {
    size_t i;
    for (i = 0; i < size && *at + 1 < capacity; i++) {
        unsigned char c = (unsigned char)text[i];
        message[(*at)++] = c < 32 || c == 127 ? '?' : (char)c;   // names from hostile files must not drive a terminal
    }
    if (i < size && ((unsigned char)text[i] & 0xC0) == 0x80) {   // cut within a UTF-8 character: its first bytes go too
        while (*at > 0 && ((unsigned char)message[*at - 1] & 0xC0) == 0x80) (*at)--;
        if (*at > 0) (*at)--;
    }
    message[*at] = 0;
}

static void avl__message_put_int(char *message, size_t capacity, size_t *at, int64_t value) {
    char digits[24];
    size_t n = sizeof digits;
    uint64_t v = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do digits[--n] = (char)('0' + v % 10), v /= 10; while (v);
    if (value < 0) digits[--n] = '-';
    avl__message_put(message, capacity, at, digits + n, sizeof digits - n);
}

// Formats like printf, for the few conversions that messages need and no locale can change: %s (char *), %S (astrovl_string),
// %d (int), %l (int64_t), %c, %%.
static void avl__format_v(char *message, size_t capacity, const char *format, va_list args) {
    size_t at = 0;
    message[0] = 0;
    for (; *format; format++) {
        if (*format != '%') { avl__message_put(message, capacity, &at, format, 1); continue; }
        switch (*++format) {
        case 's': { const char *s = va_arg(args, const char *); avl__message_put(message, capacity, &at, s, strlen(s)); break; }
        case 'S': { astrovl_string s = va_arg(args, astrovl_string); avl__message_put(message, capacity, &at, s.data, s.size); break; }
        case 'd': avl__message_put_int(message, capacity, &at, va_arg(args, int)); break;
        case 'l': avl__message_put_int(message, capacity, &at, va_arg(args, int64_t)); break;
        case 'c': { char c = (char)va_arg(args, int); avl__message_put(message, capacity, &at, &c, 1); break; }
        case '%': avl__message_put(message, capacity, &at, "%", 1); break;
        default: return;
        }
    }
}

static void avl__format(char *text, size_t capacity, const char *format, ...) {
    va_list args;
    va_start(args, format);
    avl__format_v(text, capacity, format, args);
    va_end(args);
}

// Fills err (if given) and returns status, so that a failing function can end with `return avl__fail(...)`.
static astrovl_status avl__fail(astrovl_error *err, astrovl_status status, const char *format, ...) {
    if (err) {
        va_list args;
        err->status = status;
        va_start(args, format);
        avl__format_v(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return status;
}

ASTROVL_API const char *astrovl_status_name(astrovl_status status) {
    static const char *const names[] = {"ok", "argument", "memory", "file", "format", "unsupported", "model", "limit", "cancelled"};
    return (unsigned)status < sizeof names / sizeof *names ? names[status] : "unknown";
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Room for count elements of size bytes, all zero; NULL when the product overflows or memory is out. Never a zero-size block.
static void *avl__alloc(uint64_t count, size_t size) {
    void *memory;
    if (size && count > (uint64_t)(SIZE_MAX / 2) / size) return NULL;
    memory = ASTROVL_MALLOC(count && size ? (size_t)count * size : 1);
    if (memory) memset(memory, 0, count && size ? (size_t)count * size : 1);
    return memory;
}

// The same without zeroing, for buffers that are written before they are read.
static void *avl__alloc_raw(uint64_t count, size_t size) {
    if (size && count > (uint64_t)(SIZE_MAX / 2) / size) return NULL;
    return ASTROVL_MALLOC(count && size ? (size_t)count * size : 1);
}

static float *avl__alloc_floats(uint64_t count) { return (float *)avl__alloc_raw(count, sizeof(float)); }

// Grows *array (of element size) to hold at least `needed`, doubling; 0 when memory is out (then *array stays as it was).
static int avl__grow(void *array, size_t *capacity, size_t needed, size_t size) {
    void *old, *memory;
    size_t wanted = *capacity < 16 ? 16 : *capacity;
    if (needed <= *capacity) return 1;
    while (wanted < needed) {
        if (wanted > SIZE_MAX / 4) return 0;
        wanted *= 2;
    }
    if (wanted > SIZE_MAX / 2 / size) return 0;
    memcpy(&old, array, sizeof old);   // array is the address of a pointer of any type
    memory = ASTROVL_REALLOC(old, wanted * size);
    if (!memory) return 0;
    memcpy(array, &memory, sizeof memory);
    *capacity = wanted;
    return 1;
}

ASTROVL_API void astrovl_free(void *memory) {
    if (memory) ASTROVL_FREE(memory);
}

// A growing byte string, always zero-terminated once something was put. `failed` sticks, so it is checked once, at the end.
typedef struct avl__bytes {
    char  *data;
    size_t size, capacity;
    int    failed;
} avl__bytes;

static void avl__bytes_put(avl__bytes *b, const char *data, size_t size) {
    if (b->failed || size > SIZE_MAX / 4 || !avl__grow(&b->data, &b->capacity, b->size + size + 1, 1)) {
        b->failed = 1;
        return;
    }
    if (size) memcpy(b->data + b->size, data, size);
    b->size += size;
    b->data[b->size] = 0;
}

static void avl__bytes_put_text(avl__bytes *b, const char *text) { avl__bytes_put(b, text, strlen(text)); }

static char *avl__copy_text(const char *text, size_t size) {   // zero-terminated copy, or NULL
    char *copy = (char *)avl__alloc_raw((uint64_t)size + 1, 1);
    if (!copy) return NULL;
    if (size) memcpy(copy, text, size);
    copy[size] = 0;
    return copy;
}

enum { AVL__LINE = 64 };     // bytes of a line of the caches, and of the longest registers: two lines take a processor twice the time

// The first line's beginning that is not before p, less than a line on
static void *avl__align(void *p) { return (uint8_t *)p + (AVL__LINE - (uintptr_t)p % AVL__LINE) % AVL__LINE; }

// Asks for the lines of memory that n bytes at p lie in, so that nobody will wait for them later.
static void avl__prefetch(const void *p, size_t n) {
#if defined(__GNUC__)
    const char *at = (const char *)p, *last = at + n - 1;
    for (; at < last; at += AVL__LINE) __builtin_prefetch(at);
    __builtin_prefetch(last);
#else
    (void)p, (void)n;
#endif
}

// ---- byte order ----------------------------------------------------------------------------------------------------
// Values are put together from single bytes: right on every host, and compilers turn it into one load.

static uint16_t avl__load_u16(const void *p) {
    const uint8_t *b = (const uint8_t *)p;
    return (uint16_t)(b[0] | b[1] << 8);
}
static uint32_t avl__load_u32(const void *p) {
    const uint8_t *b = (const uint8_t *)p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}
static uint64_t avl__load_u64(const void *p) {
    return (uint64_t)avl__load_u32(p) | (uint64_t)avl__load_u32((const uint8_t *)p + 4) << 32;
}
static void avl__store_u16(void *p, uint16_t value) {
    uint8_t *b = (uint8_t *)p;
    b[0] = (uint8_t)value;
    b[1] = (uint8_t)(value >> 8);
}
static void avl__store_u32(void *p, uint32_t value) {
    avl__store_u16(p, (uint16_t)value);
    avl__store_u16((uint8_t *)p + 2, (uint16_t)(value >> 16));
}
static uint16_t avl__load_u16be(const void *p) {
    const uint8_t *b = (const uint8_t *)p;
    return (uint16_t)(b[0] << 8 | b[1]);
}
static uint32_t avl__load_u32be(const void *p) {
    const uint8_t *b = (const uint8_t *)p;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | (uint32_t)b[3];
}
static float avl__float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static uint32_t avl__float_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

// ---- files ---------------------------------------------------------------------------------------------------------

// A file's bytes, mapped or read.
typedef struct avl__file {
    const uint8_t *data;
    size_t         size;
    int            mapped;      // 1: release with munmap; 0: with ASTROVL_FREE
} avl__file;

#ifndef ASTROVL_NO_FILES
// Reads a whole stream whose size need not be known (a pipe has none). A device may never end: what has more than `limit` bytes is
// refused, and what does not begin with `magic` (four bytes, or NULL) is not read on; its parser will say what it thinks of it.
static astrovl_status avl__read_stream(FILE *stream, const char *path, size_t limit, const char *magic, avl__file *file,
                                       astrovl_error *err) {
    uint8_t *data = NULL;
    size_t size = 0, capacity = 0, n;
    for (;;) {
        if (size > limit) {
            astrovl_free(data);
            return avl__fail(err, ASTROVL_ERROR_LIMIT, "%s: has more than %l bytes (is it a device?)", path, (int64_t)limit);
        }
        if (!avl__grow(&data, &capacity, size + 65536, 1)) {
            astrovl_free(data);
            return avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory after reading %l bytes", path, (int64_t)size);
        }
        n = fread(data + size, 1, capacity - size, stream);
        size += n;
        if (n == 0 || (magic && size >= 4 && memcmp(data, magic, 4) != 0)) break;
    }
    if (ferror(stream)) {
        astrovl_free(data);
        return avl__fail(err, ASTROVL_ERROR_FILE, "%s: cannot be read (is it a folder?)", path);
    }
    file->data = data;
    file->size = size;
    file->mapped = 0;
    return ASTROVL_OK;
}

static astrovl_status avl__file_read(const char *path, size_t limit, const char *magic, avl__file *file, astrovl_error *err) {
    astrovl_status status;
    FILE *stream = fopen(path, "rb");
    if (!stream) return avl__fail(err, ASTROVL_ERROR_FILE, "%s: cannot be opened (no such file, or no permission)", path);
    status = avl__read_stream(stream, path, limit, magic, file, err);
    fclose(stream);
    return status;
}
#endif

#if AVL__MMAP
// Maps a regular file; returns 0 where that cannot be done (a pipe, an empty file), and reading is tried instead.
static int avl__file_map(const char *path, avl__file *file) {
    struct stat st;
    void *data;
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size <= 0 || (uint64_t)st.st_size > SIZE_MAX) {
        close(fd);
        return 0;
    }
    data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (data == MAP_FAILED) return 0;
    file->data = (const uint8_t *)data;
    file->size = (size_t)st.st_size;
    file->mapped = 1;
    return 1;
}
#endif

// limit, magic: as above, for what is read; a file that is mapped may have any size
static astrovl_status avl__file_open(const char *path, int no_mmap, size_t limit, const char *magic, avl__file *file,
                                     astrovl_error *err) {
    memset(file, 0, sizeof *file);
    if (!path) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no file name was given");
#if AVL__MMAP
    if (!no_mmap && avl__file_map(path, file)) return ASTROVL_OK;
#endif
    (void)no_mmap;
    (void)limit;
    (void)magic;
#ifndef ASTROVL_NO_FILES
    return avl__file_read(path, limit, magic, file, err);
#else
    return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "%s: built without files; give the bytes with the _memory or _decode call", path);
#endif
}

static void avl__file_close(avl__file *file) {
#if AVL__MMAP
    if (file->mapped) {
        void *data;
        memcpy(&data, &file->data, sizeof data);   // munmap takes no const
        munmap(data, file->size);
        memset(file, 0, sizeof *file);
        return;
    }
#endif
    if (file->data) {
        void *data;
        memcpy(&data, &file->data, sizeof data);
        ASTROVL_FREE(data);
    }
    memset(file, 0, sizeof *file);
}

// ---- time ----------------------------------------------------------------------------------------------------------

static double avl__seconds(void) {   // wall clock, for measuring spans
#if AVL__POSIX
    struct timeval now;
    gettimeofday(&now, NULL);
    return (double)now.tv_sec + (double)now.tv_usec * 1e-6;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

// The most memory that the process has held, mapped files as far as they were read included; 0: not known here.
static uint64_t avl__peak_memory(void) {
#if AVL__POSIX
    struct rusage usage;
    memset(&usage, 0, sizeof usage);
    getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
    return (uint64_t)usage.ru_maxrss;          // bytes there, kB elsewhere
#else
    return (uint64_t)usage.ru_maxrss * 1024;
#endif
#else
    return 0;
#endif
}

// ---- threads -------------------------------------------------------------------------------------------------------
// A pool runs one job at a time: job(context, i) for every i below n_items, item i always as a whole by one thread. Results
// cannot depend on the number of threads, because no job adds up across items.

typedef void (*avl__job)(void *context, int item, int thread);

typedef struct avl__pool avl__pool;

#if AVL__THREADS
// A job is handed over by counting `generation` up. Within a pass the next job follows in microseconds, less than the system needs
// to wake a thread, so whoever waits looks again and again for some ten microseconds before it sleeps. Either side that goes to
// sleep first says so (n_sleeping, caller_sleeps) and then looks once more, so that no call to wake it is missed.
struct avl__pool {
    pthread_t       threads[ASTROVL_MAX_THREADS];
    int             n_started;      // workers; the caller is one more
    pthread_mutex_t lock;           // for sleeping alone
    pthread_cond_t  wake, done;
    avl__job        job;            // these three belong to the caller until it counts generation up, and again once n_busy is 0
    void           *context;
    int             n_items;
    int             next_item, n_busy, generation, n_sleeping, caller_sleeps, quit;   // atomic
};

enum { AVL__SPINS = 2000 };

static int avl__atomic_load(const int *value) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }
static void avl__atomic_store(int *value, int to) { __atomic_store_n(value, to, __ATOMIC_SEQ_CST); }
static int avl__atomic_add(int *value, int more) { return __atomic_add_fetch(value, more, __ATOMIC_SEQ_CST); }   // the new value

// Waits a little for *value to become other than `is`. Returns whether it has.
static int avl__spin_while(const int *value, int is) {
    int i;
    for (i = 0; i < AVL__SPINS; i++) {
        if (avl__atomic_load(value) != is) return 1;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    return 0;
}

static void avl__pool_work(avl__pool *pool, int thread) {   // takes items until none is left
    int item;
    while ((item = avl__atomic_add(&pool->next_item, 1) - 1) < pool->n_items) pool->job(pool->context, item, thread);
}

typedef struct avl__pool_start { avl__pool *pool; int thread; } avl__pool_start;

static void *avl__pool_main(void *argument) {
    avl__pool_start start = *(avl__pool_start *)argument;
    avl__pool *pool = start.pool;
    int seen = 0;
    ASTROVL_FREE(argument);
    for (;;) {
        if (!avl__spin_while(&pool->generation, seen)) {
            pthread_mutex_lock(&pool->lock);
            avl__atomic_add(&pool->n_sleeping, 1);
            while (avl__atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
            avl__atomic_add(&pool->n_sleeping, -1);
            pthread_mutex_unlock(&pool->lock);
        }
        if (avl__atomic_load(&pool->quit)) return NULL;
        seen = avl__atomic_load(&pool->generation);
        avl__pool_work(pool, start.thread);
        if (avl__atomic_add(&pool->n_busy, -1) == 0 && avl__atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

// Tells the workers that something is new.
static void avl__pool_call(avl__pool *pool) {
    avl__atomic_add(&pool->generation, 1);
    if (avl__atomic_load(&pool->n_sleeping) == 0) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static void avl__pool_free(avl__pool *pool) {
    int i;
    if (!pool) return;
    avl__atomic_store(&pool->quit, 1);
    avl__pool_call(pool);
    for (i = 0; i < pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    ASTROVL_FREE(pool);
}

static int avl__n_processors(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > ASTROVL_MAX_THREADS ? ASTROVL_MAX_THREADS : (int)n;
}

// n_threads: the caller included. A thread that the system refuses is done without; NULL only when memory is out.
static avl__pool *avl__pool_new(int n_threads) {
    avl__pool *pool = (avl__pool *)avl__alloc(1, sizeof *pool);
    int i;
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (i = 1; i < n_threads && i < ASTROVL_MAX_THREADS; i++) {
        avl__pool_start *start = (avl__pool_start *)avl__alloc(1, sizeof *start);
        if (!start) {
            avl__pool_free(pool);
            return NULL;
        }
        start->pool = pool;
        start->thread = i;
        if (pthread_create(&pool->threads[pool->n_started], NULL, avl__pool_main, start) != 0) {
            ASTROVL_FREE(start);
            break;
        }
        pool->n_started++;
    }
    return pool;
}

static void avl__pool_run(avl__pool *pool, avl__job job, void *context, int n_items) {
    int busy;
    if (n_items <= 1 || pool->n_started == 0) {
        int i;
        for (i = 0; i < n_items; i++) job(context, i, 0);
        return;
    }
    pool->job = job;
    pool->context = context;
    pool->n_items = n_items;
    avl__atomic_store(&pool->next_item, 0);
    avl__atomic_store(&pool->n_busy, pool->n_started);
    avl__pool_call(pool);
    avl__pool_work(pool, 0);
    for (busy = avl__atomic_load(&pool->n_busy); busy > 0; busy = avl__atomic_load(&pool->n_busy)) {
        if (avl__spin_while(&pool->n_busy, busy)) continue;
        pthread_mutex_lock(&pool->lock);
        avl__atomic_store(&pool->caller_sleeps, 1);
        while (avl__atomic_load(&pool->n_busy) > 0) pthread_cond_wait(&pool->done, &pool->lock);
        avl__atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
}

static int avl__pool_n_threads(const avl__pool *pool) { return pool->n_started + 1; }

#else   // without threads the pool is a loop

struct avl__pool { int unused; };
static avl__pool *avl__pool_new(int n_threads) { (void)n_threads; return (avl__pool *)avl__alloc(1, sizeof(avl__pool)); }
static void avl__pool_free(avl__pool *pool) { astrovl_free(pool); }
static int avl__n_processors(void) { return 1; }
static int avl__pool_n_threads(const avl__pool *pool) { (void)pool; return 1; }
static void avl__pool_run(avl__pool *pool, avl__job job, void *context, int n_items) {
    int i;
    (void)pool;
    for (i = 0; i < n_items; i++) job(context, i, 0);
}
#endif

// ====================================================================================================================
// [3] Numbers
// How a model's numbers are written in a file, and what is computed from them with more than + - * /:
// - half precision (IEEE 754 binary16) and bfloat16, to float32 and back;
// - the GGUF block formats to float32 (layouts: ggml's ggml-common.h; the results are the `gguf` Python package's, bit
//   for bit), and float32 to them;
// - exp, tanh, erf, sin, cos, and pow for rotary embeddings, from IEEE + - * / sqrt alone: each of these operations has
//   one correct result, so the functions give the same bits on every machine, which no libm promises.
// ====================================================================================================================

#include <math.h>   // sqrt alone: IEEE 754 fixes their result to the last bit

static double avl__sqrt(double x) { return sqrt(x); }

// ---- half precision ------------------------------------------------------------------------------------------------
//   binary16   s eeeee mmmmmmmmmm        e = 1..30: (-1)^s 2^(e-15) (1 + m/2^10)    e = 0: (-1)^s 2^-24 m
//   bfloat16   s eeeeeeee mmmmmmm        the upper half of a float32
// e all ones: infinity (m = 0) or NaN (m > 0). Narrowing rounds to nearest, ties to even.

ASTROVL_API float astrovl_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h & 0x7C00u;
    uint32_t normal = ((uint32_t)(h & 0x7FFF) << 13) + (112u << 23);              // exponent bias 15 becomes 127
    uint32_t tiny = avl__float_bits((float)(h & 0x3FF) * (1.0f / 16777216));      // m / 2^24 is exact
    uint32_t bits = exponent == 0 ? tiny : exponent == 0x7C00 ? normal + (112u << 23) : normal;
    return avl__float_from_bits(bits | sign);
}

// value / 2^shift (shift 1 to 24), rounded to nearest, ties to even
static uint32_t avl__round_shift(uint32_t value, uint32_t shift) {
    uint32_t quotient = value >> shift, rest = value & ((1u << shift) - 1), half = 1u << (shift - 1);
    return quotient + (rest > half || (rest == half && (quotient & 1)));
}

ASTROVL_API uint16_t astrovl_f32_to_f16(float f) {
    uint32_t bits = avl__float_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF, h;
    uint32_t exponent = magnitude >> 23, mantissa = (magnitude & 0x7FFFFF) | 0x800000;
    if (magnitude > 0x7F800000) h = 0x7E00 | (magnitude >> 13 & 0x3FF);                  // NaN stays NaN, made quiet
    else if (exponent >= 127 + 16) h = 0x7C00;                                           // from 2^16 on: infinity
    else if (exponent >= 127 - 14) h = avl__round_shift(magnitude, 13) - (112u << 10);   // may carry up to infinity
    else if (exponent >= 127 - 25) h = avl__round_shift(mantissa, 126 - exponent);       // subnormal, in units of 2^-24
    else h = 0;
    return (uint16_t)(sign | h);
}

ASTROVL_API float astrovl_bf16_to_f32(uint16_t h) { return avl__float_from_bits((uint32_t)h << 16); }

ASTROVL_API uint16_t astrovl_f32_to_bf16(float f) {
    uint32_t bits = avl__float_bits(f);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);   // NaN stays NaN, made quiet
    return (uint16_t)avl__round_shift(bits, 16);                                  // may carry up to infinity
}

// ---- block formats -------------------------------------------------------------------------------------------------
// A row of a weight matrix is stored in blocks of 32 or 256 values that share a scale d (and a minimum m):
//     y = d * q + m, or d * q - m, with small integers q.
// Q4_0 to Q8_0 have one scale for 32 values; the K formats ("super-blocks" of 256) store the scales of their groups of
// 16 or 32 as small integers too. Below, "2 qs[16]" is a field of 16 bytes that begins at byte 2, [i:j] are bits i to j
// of a byte, lowest first, and f16 is 2 bytes of half precision. Each function expands n_blocks blocks. The order of
// the float operations is part of the format: it decides the last bit.

static float avl__load_f16(const uint8_t *p) { return astrovl_f16_to_f32(avl__load_u16(p)); }

// F32, 4 bytes: one little-endian float.   F16, BF16, 2 bytes: one little-endian half.
static void avl__dequantize_f32(const uint8_t *b, float *y, int64_t n_blocks) {
    for (; n_blocks > 0; n_blocks--, b += 4, y++) *y = avl__float_from_bits(avl__load_u32(b));
}
static void avl__dequantize_f16(const uint8_t *b, float *y, int64_t n_blocks) {
    for (; n_blocks > 0; n_blocks--, b += 2, y++) *y = avl__load_f16(b);
}
static void avl__dequantize_bf16(const uint8_t *b, float *y, int64_t n_blocks) {
    for (; n_blocks > 0; n_blocks--, b += 2, y++) *y = astrovl_bf16_to_f32(avl__load_u16(b));
}

// Q4_0, 18 bytes for 32 values:   0 d f16 | 2 qs[16]
//   y[j] = d * (qs[j][0:3] - 8)     y[j + 16] = d * (qs[j][4:7] - 8)     j < 16
static void avl__dequantize_q4_0(const uint8_t *b, float *y, int64_t n_blocks) {
    int j;
    for (; n_blocks > 0; n_blocks--, b += 18, y += 32) {
        float d = avl__load_f16(b);
        for (j = 0; j < 16; j++) {
            y[j] = d * (float)((b[2 + j] & 15) - 8);
            y[j + 16] = d * (float)((b[2 + j] >> 4) - 8);
        }
    }
}

// Q4_1, 20 bytes for 32 values:   0 d f16 | 2 m f16 | 4 qs[16]
//   y[j] = d * qs[j][0:3] + m       y[j + 16] = d * qs[j][4:7] + m
static void avl__dequantize_q4_1(const uint8_t *b, float *y, int64_t n_blocks) {
    int j;
    for (; n_blocks > 0; n_blocks--, b += 20, y += 32) {
        float d = avl__load_f16(b), m = avl__load_f16(b + 2);
        for (j = 0; j < 16; j++) {
            y[j] = d * (float)(b[4 + j] & 15) + m;
            y[j + 16] = d * (float)(b[4 + j] >> 4) + m;
        }
    }
}

// Q5_0, 22 bytes for 32 values:   0 d f16 | 2 qh u32 | 6 qs[16]      bit j of qh is the fifth bit of value j
//   y[j] = d * (qs[j][0:3] + 16 qh[j] - 16)     y[j + 16] = d * (qs[j][4:7] + 16 qh[j + 16] - 16)
static void avl__dequantize_q5_0(const uint8_t *b, float *y, int64_t n_blocks) {
    int j;
    for (; n_blocks > 0; n_blocks--, b += 22, y += 32) {
        float d = avl__load_f16(b);
        uint32_t qh = avl__load_u32(b + 2);
        for (j = 0; j < 16; j++) {
            y[j] = d * (float)((int)((b[6 + j] & 15) | (qh >> j & 1) << 4) - 16);
            y[j + 16] = d * (float)((int)((uint32_t)(b[6 + j] >> 4) | (qh >> (j + 16) & 1) << 4) - 16);
        }
    }
}

// Q5_1, 24 bytes for 32 values:   0 d f16 | 2 m f16 | 4 qh u32 | 8 qs[16]
//   y[j] = d * (qs[j][0:3] + 16 qh[j]) + m      y[j + 16] = d * (qs[j][4:7] + 16 qh[j + 16]) + m
static void avl__dequantize_q5_1(const uint8_t *b, float *y, int64_t n_blocks) {
    int j;
    for (; n_blocks > 0; n_blocks--, b += 24, y += 32) {
        float d = avl__load_f16(b), m = avl__load_f16(b + 2);
        uint32_t qh = avl__load_u32(b + 4);
        for (j = 0; j < 16; j++) {
            y[j] = d * (float)((int)((b[8 + j] & 15) | (qh >> j & 1) << 4)) + m;
            y[j + 16] = d * (float)((int)((uint32_t)(b[8 + j] >> 4) | (qh >> (j + 16) & 1) << 4)) + m;
        }
    }
}

// Q8_0, 34 bytes for 32 values:   0 d f16 | 2 qs i8[32]
//   y[j] = d * qs[j]
static void avl__dequantize_q8_0(const uint8_t *b, float *y, int64_t n_blocks) {
    int j;
    for (; n_blocks > 0; n_blocks--, b += 34, y += 32) {
        float d = avl__load_f16(b);
        for (j = 0; j < 32; j++) y[j] = d * (float)(int8_t)b[2 + j];
    }
}

// Q2_K, 84 bytes for 256 values in 16 groups of 16:   0 scales[16] | 16 qs[64] | 80 d f16 | 82 dmin f16
// Value i lies in group g = i / 16; its bits are a pair of qs[32 (i / 128) + i % 32], pair (i / 32) % 4.
//   y[i] = (d * scales[g][0:3]) * q - (dmin * scales[g][4:7])
static void avl__dequantize_q2_k(const uint8_t *b, float *y, int64_t n_blocks) {
    int g, j;
    for (; n_blocks > 0; n_blocks--, b += 84, y += 256) {
        float d = avl__load_f16(b + 80), dmin = avl__load_f16(b + 82);
        for (g = 0; g < 16; g++) {
            const uint8_t *qs = b + 16 + g / 8 * 32 + g % 2 * 16;
            float scale = d * (float)(b[g] & 15), minimum = dmin * (float)(b[g] >> 4);
            int shift = g / 2 % 4 * 2;
            for (j = 0; j < 16; j++) y[16 * g + j] = scale * (float)(qs[j] >> shift & 3) - minimum;
        }
    }
}

// Q3_K, 110 bytes for 256 values in 16 groups of 16:   0 hmask[32] | 32 qs[64] | 96 scales[12] | 108 d f16
// The two low bits of value i lie as in Q2_K; bit i / 32 of hmask[i % 32] says that 4 is NOT subtracted.
// Scale g has 6 bits: low four in nibble g / 8 of scales[g % 8], high two in pair g / 4 of scales[8 + g % 4]; minus 32.
//   y[i] = (d * (scale[g] - 32)) * (q - (hmask bit ? 0 : 4))
static int avl__q3_k_scale(const uint8_t *s, int g) {   // s: scales[12]
    int low = s[g % 8] >> g / 8 * 4 & 15, high = s[8 + g % 4] >> g / 4 * 2 & 3;
    return (low | high << 4) - 32;
}

static void avl__dequantize_q3_k(const uint8_t *b, float *y, int64_t n_blocks) {
    int g, j;
    for (; n_blocks > 0; n_blocks--, b += 110, y += 256) {
        float d = avl__load_f16(b + 108);
        for (g = 0; g < 16; g++) {
            const uint8_t *qs = b + 32 + g / 8 * 32 + g % 2 * 16, *hmask = b + g % 2 * 16;
            float scale = d * (float)avl__q3_k_scale(b + 96, g);
            int shift = g / 2 % 4 * 2;
            for (j = 0; j < 16; j++)
                y[16 * g + j] = scale * (float)((qs[j] >> shift & 3) - (hmask[j] >> g / 2 & 1 ? 0 : 4));
        }
    }
}

// The 6-bit scale and minimum of group g (of 8) that Q4_K and Q5_K pack into 12 bytes s:
//   g < 4:    scale = s[g][0:5]                         minimum = s[g + 4][0:5]
//   g >= 4:   scale = s[g + 4][0:3], s[g - 4][6:7]      minimum = s[g + 4][4:7], s[g][6:7]
static void avl__unpack_scale(const uint8_t *s, int g, int *scale, int *minimum) {
    if (g < 4) {
        *scale = s[g] & 63;
        *minimum = s[g + 4] & 63;
    } else {
        *scale = (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
        *minimum = s[g + 4] >> 4 | s[g] >> 6 << 4;
    }
}

// Q4_K, 144 bytes for 256 values in 8 groups of 32:   0 d f16 | 2 dmin f16 | 4 scales[12] | 16 qs[128]
// Groups 2k and 2k + 1 are the low and the high nibbles of qs[32 k] to qs[32 k + 31].
//   y[i] = (d * scale[g]) * q - (dmin * minimum[g])
static void avl__dequantize_q4_k(const uint8_t *b, float *y, int64_t n_blocks) {
    int g, j, scale, minimum;
    for (; n_blocks > 0; n_blocks--, b += 144, y += 256) {
        float d = avl__load_f16(b), dmin = avl__load_f16(b + 2);
        for (g = 0; g < 8; g++) {
            const uint8_t *qs = b + 16 + g / 2 * 32;
            float dg, mg;
            avl__unpack_scale(b + 4, g, &scale, &minimum);
            dg = d * (float)scale;
            mg = dmin * (float)minimum;
            for (j = 0; j < 32; j++) y[32 * g + j] = dg * (float)(qs[j] >> g % 2 * 4 & 15) - mg;
        }
    }
}

// Q5_K, 176 bytes for 256 values in 8 groups of 32:   0 d f16 | 2 dmin f16 | 4 scales[12] | 16 qh[32] | 48 qs[128]
// As Q4_K; bit g of qh[j] is the fifth bit of value 32 g + j.
static void avl__dequantize_q5_k(const uint8_t *b, float *y, int64_t n_blocks) {
    int g, j, scale, minimum;
    for (; n_blocks > 0; n_blocks--, b += 176, y += 256) {
        float d = avl__load_f16(b), dmin = avl__load_f16(b + 2);
        for (g = 0; g < 8; g++) {
            const uint8_t *qh = b + 16, *qs = b + 48 + g / 2 * 32;
            float dg, mg;
            avl__unpack_scale(b + 4, g, &scale, &minimum);
            dg = d * (float)scale;
            mg = dmin * (float)minimum;
            for (j = 0; j < 32; j++)
                y[32 * g + j] = dg * (float)((qs[j] >> g % 2 * 4 & 15) | (qh[j] >> g & 1) << 4) - mg;
        }
    }
}

// Q6_K, 210 bytes for 256 values in 16 groups of 16:   0 ql[128] | 128 qh[64] | 192 scales i8[16] | 208 d f16
// Value i: its low four bits are nibble (i / 64) % 2 of ql[64 (i / 128) + i % 64]; its high two lie in qh as Q2_K's do
// in qs.
//   y[i] = (d * scales[i / 16]) * (q - 32)
static void avl__dequantize_q6_k(const uint8_t *b, float *y, int64_t n_blocks) {
    int g, j;
    for (; n_blocks > 0; n_blocks--, b += 210, y += 256) {
        float d = avl__load_f16(b + 208);
        for (g = 0; g < 16; g++) {
            const uint8_t *ql = b + g / 8 * 64 + g % 4 * 16, *qh = b + 128 + g / 8 * 32 + g % 2 * 16;
            float scale = d * (float)(int8_t)b[192 + g];
            int low_shift = g / 4 % 2 * 4, high_shift = g / 2 % 4 * 2;
            for (j = 0; j < 16; j++)
                y[16 * g + j] = scale * (float)(((ql[j] >> low_shift & 15) | (qh[j] >> high_shift & 3) << 4) - 32);
        }
    }
}

// ---- to block formats ----------------------------------------------------------------------------------------------
// The other way: each function below makes one block, laid out as above, of float32 values that are finite and at most
// AVL__QUANTIZE_MAX: avl__quantize_row sees to that.
//   Q4_0 to Q8_0: the rules of ggml and of the `gguf` Python package, whose bits these are.
//   Q2_K to Q6_K: the format leaves the choice of the scales to the writer. Here they make the sum of squared errors small,
//   every value counting the same; test/real_quants.py compares with llama.cpp, which gives larger values more weight.

#define AVL__QUANTIZE_MAX  1e9f              // more than any block can hold (65504 * 128 * 32); its square is no overflow
#define AVL__QUANTIZE_MIN  1e-12f            // so little that a K block makes it 0: its least step is the least half, 6e-8
#define AVL__F16_LIMIT     65519.99609375f   // the largest float that becomes a finite half (65504)
#define AVL__FLOAT_ROUNDER 12582912.0f       // 1.5 * 2^23 rounds floats as AVL__ROUNDER does doubles, for |x| < 2^22

static float avl__magnitude(float x) { return avl__float_from_bits(avl__float_bits(x) & 0x7FFFFFFF); }
static float avl__clamp(float x, float low, float high) {   // two steps: compilers make them two instructions
    float y = x < low ? low : x;
    return y > high ? high : y;
}

static float avl__round_between(float x, float low, float high) {   // to the nearest integer of low..high, ties to even
    return (avl__clamp(x, low, high) + AVL__FLOAT_ROUNDER) - AVL__FLOAT_ROUNDER;
}

static float avl__extreme(const float *x, int n) {   // the first of the values of largest magnitude, with its sign
    float extreme = x[0];
    int i;
    for (i = 1; i < n; i++)
        if (avl__magnitude(x[i]) > avl__magnitude(extreme)) extreme = x[i];
    return extreme;
}

static void avl__range(const float *x, int n, float *least, float *largest) {
    int i;
    *least = *largest = x[0];
    for (i = 1; i < n; i++) {
        if (x[i] < *least) *least = x[i];
        if (x[i] > *largest) *largest = x[i];
    }
}

static float avl__store_f16(uint8_t *p, float d) {   // returns what was stored, which is finite
    avl__store_u16(p, astrovl_f32_to_f16(avl__clamp(d, -AVL__F16_LIMIT, AVL__F16_LIMIT)));
    return avl__load_f16(p);
}

// Puts a field of `bits` bits, taken from bit `shift` of each code, where every format has it: the first `stride` codes go to
// the lowest bits of `stride` bytes, the next `stride` codes to the bits above, until the bytes are full; then come the next.
static void avl__pack(uint8_t *out, const uint8_t *codes, int n, int shift, int bits, int stride) {
    int mask = (1 << bits) - 1, at, j;
    memset(out, 0, (size_t)(n * bits / 8));
    for (; n > 0; n -= stride * 8 / bits, out += stride)
        for (at = 0; at < 8; at += bits, codes += stride)
            for (j = 0; j < stride; j++) out[j] = (uint8_t)(out[j] | (codes[j] >> shift & mask) << at);
}

static void avl__quantize_f32(const float *x, uint8_t *b) { avl__store_u32(b, avl__float_bits(*x)); }
static void avl__quantize_f16(const float *x, uint8_t *b) { avl__store_u16(b, astrovl_f32_to_f16(*x)); }
static void avl__quantize_bf16(const float *x, uint8_t *b) { avl__store_u16(b, astrovl_f32_to_bf16(*x)); }

// 1 / d; but 0 where that is no finite float, since so small a d is stored as 0 and leaves nothing to choose
static float avl__reciprocal(float d) {
    float r = d == 0 ? 0 : 1 / d;
    return avl__magnitude(r) <= FLT_MAX ? r : 0;
}

// Q4_0, Q4_1, Q5_0, Q5_1: d f16 | m f16 (Q4_1, Q5_1) | fifth bits u32 (Q5) | nibbles
//   Q4_0, Q5_0   d = -x / 2^(bits - 1), x the value of largest magnitude       q = floor(x / d + 2^(bits - 1) + 1/2)
//   Q4_1, Q5_1   d = (largest - m) / (2^bits - 1), m the least value           q = floor((x - m) / d + 1/2)
static void avl__quantize_simple(const float *x, uint8_t *b, int bits, int has_minimum) {
    int top = (1 << bits) - 1, middle = 1 << (bits - 1), j;
    float least, largest, inverse, d, m = 0, offset = has_minimum ? 0.5f : (float)middle + 0.5f;
    uint8_t codes[32];
    avl__range(x, 32, &least, &largest);
    if (has_minimum) m = avl__clamp(least, -AVL__F16_LIMIT, AVL__F16_LIMIT);
    d = has_minimum ? (largest - m) / (float)top : avl__extreme(x, 32) / (float)-middle;
    d = avl__clamp(d, -AVL__F16_LIMIT, AVL__F16_LIMIT);
    inverse = avl__reciprocal(d);
    for (j = 0; j < 32; j++) codes[j] = (uint8_t)avl__clamp((x[j] - m) * inverse + offset, 0, (float)top);
    avl__store_f16(b, d), b += 2;
    if (has_minimum) avl__store_f16(b, m), b += 2;
    if (bits == 5) avl__pack(b, codes, 32, 4, 1, 1), b += 4;
    avl__pack(b, codes, 32, 0, 4, 16);
}
static void avl__quantize_q4_0(const float *x, uint8_t *b) { avl__quantize_simple(x, b, 4, 0); }
static void avl__quantize_q4_1(const float *x, uint8_t *b) { avl__quantize_simple(x, b, 4, 1); }
static void avl__quantize_q5_0(const float *x, uint8_t *b) { avl__quantize_simple(x, b, 5, 0); }
static void avl__quantize_q5_1(const float *x, uint8_t *b) { avl__quantize_simple(x, b, 5, 1); }

// Q8_0:   d = largest magnitude / 127     q = x / d, rounded to nearest, ties away from zero
static void avl__quantize_q8_0(const float *x, uint8_t *b) {
    float d = avl__clamp(avl__magnitude(avl__extreme(x, 32)) / 127, 0, AVL__F16_LIMIT), inverse = avl__reciprocal(d);
    int j;
    avl__store_f16(b, d);
    for (j = 0; j < 32; j++) {
        float q = avl__clamp(avl__magnitude(x[j] * inverse), 0, 127);
        int whole = (int)q;
        whole += q - (float)whole >= 0.5f;
        b[2 + j] = (uint8_t)(x[j] < 0 ? -whole : whole);
    }
}

// The K formats. Were the integers q of a group known, least squares would give its scale in closed form; given the scale, the
// best q is x / scale, rounded. So several scales are guessed, q rounded by each and a scale fitted to these q; the fit with
// the least error wins. A guess puts the end of the group's range up to 0.9 steps inside or outside the end of q's range: to clip
// the extreme value may pay, since the steps are finer then for all others.
#define AVL__GUESSES    3
#define AVL__GUESS_STEP 0.3f

// y = d q, low <= q <= high.   E = sum (x - d q)^2 is least for
//   d = sum x q / sum q^2       and then E = sum x^2 - (sum x q)^2 / sum q^2
// Returns that d. It is negative where the value of largest magnitude has the sign that q has one integer less of.
static float avl__fit_scale(const float *x, int n, int low, int high) {
    float extreme = avl__extreme(x, n), end = (float)(-low > high ? low : high), gain = 0, scale = 0;
    int guess, i;
    if (avl__magnitude(extreme) < AVL__QUANTIZE_MIN) return 0;
    for (guess = -AVL__GUESSES; guess <= AVL__GUESSES; guess++) {
        float inverse = (end + AVL__GUESS_STEP * (float)guess) / extreme, sum_xq = 0, sum_qq = 0;
        for (i = 0; i < n; i++) {
            float q = avl__round_between(x[i] * inverse, (float)low, (float)high);
            sum_xq += x[i] * q;
            sum_qq += q * q;
        }
        if (sum_xq * sum_xq > gain * sum_qq) {
            gain = sum_xq * sum_xq / sum_qq;
            scale = sum_xq / sum_qq;
        }
    }
    return scale;
}

// y = d q - m, 0 <= q <= high, m >= 0.   With low the least of x and 0, u = x - low and r = m + low, which keeps digits from
// cancelling, E = sum (x - d q + m)^2 = sum (u - d q + r)^2 is least for
//   d = (n sum u q - sum u sum q) / (n sum q^2 - (sum q)^2)     r = (d sum q - sum u) / n
// or, where that would make m negative, for r = low and d = sum (u + low) q / sum q^2.
// Returns that m; d comes from avl__fit_scale, once the minima have been rounded. n is 16 or 32.
static float avl__fit_minimum(const float *x, int n, int high) {
    float low, top, u[32], sum_u = 0, minimum;
    double least = 0;
    int guess, i;
    avl__range(x, n, &low, &top);
    if (low > 0) low = 0;
    minimum = -low;
    if (top - low < AVL__QUANTIZE_MIN) return minimum;
    for (i = 0; i < n; i++) {
        u[i] = x[i] - low;
        sum_u += u[i];
    }
    for (guess = -AVL__GUESSES; guess <= AVL__GUESSES; guess++) {
        float inverse = ((float)high + AVL__GUESS_STEP * (float)guess) / (top - low), sum_q = 0, sum_qq = 0, sum_uq = 0;
        double determinant, d, r, error;   // error: E less sum u^2, which all guesses share
        for (i = 0; i < n; i++) {
            float q = avl__round_between(u[i] * inverse, 0, (float)high);
            sum_q += q;
            sum_qq += q * q;
            sum_uq += u[i] * q;
        }
        determinant = n * (double)sum_qq - (double)sum_q * (double)sum_q;   // 0: all q are equal, so all x are, and m is 0
        d = determinant > 0 ? (n * (double)sum_uq - (double)sum_u * (double)sum_q) / determinant : 0;
        r = (d * (double)sum_q - (double)sum_u) / n;
        if (r < (double)low) r = (double)low, d = ((double)sum_uq + r * (double)sum_q) / (double)sum_qq;
        error = d * (d * (double)sum_qq - 2 * (double)sum_uq) + r * (n * r + 2 * ((double)sum_u - d * (double)sum_q));
        if (error < least) least = error, minimum = (float)(r - (double)low);
    }
    return minimum;
}

// The codes q - low of y = step q - minimum, low <= q <= high.
static void avl__encode(const float *x, int n, float step, float minimum, int low, int high, uint8_t *codes) {
    int i;
    for (i = 0; i < n; i++) {
        float q = step == 0 ? 0 : (x[i] + minimum) / step;
        codes[i] = (uint8_t)((int)avl__round_between(q, (float)low, (float)high) - low);
    }
}

// The groups' scales (or minima) s become integers the same way: s = d code. Stores d at p, and returns what was stored.
static float avl__encode_scales(const float *s, int n, int low, int high, uint8_t *p, uint8_t *codes) {
    float d = avl__store_f16(p, avl__fit_scale(s, n, low, high));
    avl__encode(s, n, d, 0, low, high, codes);
    return d;
}

// Q3_K, Q6_K:   y = (d scale[g]) q with 16 groups; scale + half_scales and q + half become scales[16] and codes[256].
static void avl__encode_symmetric(const float *x, int half, int half_scales, uint8_t *d_at, uint8_t *scales, uint8_t *codes) {
    float s[16], d;
    int g;
    for (g = 0; g < 16; g++) s[g] = avl__fit_scale(x + 16 * g, 16, -half, half - 1);
    d = avl__encode_scales(s, 16, -half_scales, half_scales - 1, d_at, scales);
    for (g = 0; g < 16; g++)
        avl__encode(x + 16 * g, 16, d * (float)(scales[g] - half_scales), 0, -half, half - 1, codes + 16 * g);
}

// Q2_K, Q4_K, Q5_K:   y = (d scale[g]) q - dmin minimum[g]; dmin is stored behind d, the minima behind the scales.
static void avl__encode_affine(const float *x, int n_groups, int high, int high_scale, uint8_t *d_at, uint8_t *scales,
                               uint8_t *codes) {
    float m[16] = {0}, s[16] = {0}, u[32] = {0}, d, dmin;
    uint8_t *minima = scales + n_groups;
    int n = 256 / n_groups, g, i;
    for (g = 0; g < n_groups; g++) m[g] = avl__fit_minimum(x + n * g, n, high);
    dmin = avl__encode_scales(m, n_groups, 0, high_scale, d_at + 2, minima);
    for (g = 0; g < n_groups; g++) {
        for (i = 0; i < n; i++) u[i] = x[n * g + i] + dmin * (float)minima[g];
        s[g] = avl__clamp(avl__fit_scale(u, n, 0, high), 0, AVL__QUANTIZE_MAX);   // below 0 only where all u are next to 0
    }
    d = avl__encode_scales(s, n_groups, 0, high_scale, d_at, scales);
    for (g = 0; g < n_groups; g++)
        avl__encode(x + n * g, n, d * (float)scales[g], dmin * (float)minima[g], 0, high, codes + n * g);
}

static void avl__quantize_q2_k(const float *x, uint8_t *b) {
    uint8_t scales[32], codes[256];
    avl__encode_affine(x, 16, 3, 15, b + 80, scales, codes);
    avl__pack(b, scales, 32, 0, 4, 16);
    avl__pack(b + 16, codes, 256, 0, 2, 32);
}

static void avl__quantize_q3_k(const float *x, uint8_t *b) {
    uint8_t scales[16], codes[256];
    avl__encode_symmetric(x, 4, 32, b + 108, scales, codes);
    avl__pack(b, codes, 256, 2, 1, 32);
    avl__pack(b + 32, codes, 256, 0, 2, 32);
    avl__pack(b + 96, scales, 16, 0, 4, 8);
    avl__pack(b + 104, scales, 16, 4, 2, 4);
}

static void avl__pack_scales(const uint8_t *scale, const uint8_t *minimum, uint8_t *s) {   // avl__unpack_scale's inverse
    int g;
    for (g = 0; g < 4; g++) {
        s[g] = (uint8_t)(scale[g] | scale[g + 4] >> 4 << 6);
        s[g + 4] = (uint8_t)(minimum[g] | minimum[g + 4] >> 4 << 6);
        s[g + 8] = (uint8_t)((scale[g + 4] & 15) | (minimum[g + 4] & 15) << 4);
    }
}

static void avl__quantize_q4_k(const float *x, uint8_t *b) {
    uint8_t scales[16], codes[256];
    avl__encode_affine(x, 8, 15, 63, b, scales, codes);
    avl__pack_scales(scales, scales + 8, b + 4);
    avl__pack(b + 16, codes, 256, 0, 4, 32);
}

static void avl__quantize_q5_k(const float *x, uint8_t *b) {
    uint8_t scales[16], codes[256];
    avl__encode_affine(x, 8, 31, 63, b, scales, codes);
    avl__pack_scales(scales, scales + 8, b + 4);
    avl__pack(b + 16, codes, 256, 4, 1, 32);
    avl__pack(b + 48, codes, 256, 0, 4, 32);
}

static void avl__quantize_q6_k(const float *x, uint8_t *b) {
    uint8_t scales[16], codes[256];
    int g;
    avl__encode_symmetric(x, 32, 128, b + 208, scales, codes);
    avl__pack(b, codes, 256, 0, 4, 64);
    avl__pack(b + 128, codes, 256, 4, 2, 32);
    for (g = 0; g < 16; g++) b[192 + g] = (uint8_t)(scales[g] - 128);
}

// ---- the table of types --------------------------------------------------------------------------------------------

// What there is to know about a tensor type. A big-endian file has the multi-byte fields of each block in its own
// order: halves and words say where fields of 2 and 4 bytes lie, {first byte, how many in a row}.
typedef struct avl__type_info {
    int         type;                       // an astrovl_type
    const char *name;
    int         block_values, block_bytes;
    uint8_t     halves[2], words[2];
    void      (*dequantize)(const uint8_t *blocks, float *values, int64_t n_blocks);
    void      (*quantize)(const float *values, uint8_t *block);   // one block
} avl__type_info;

static const avl__type_info avl__types[] = {
    {ASTROVL_TYPE_F32,  "F32",  1,   4,   {0, 0},   {0, 1}, avl__dequantize_f32, avl__quantize_f32},
    {ASTROVL_TYPE_F16,  "F16",  1,   2,   {0, 1},   {0, 0}, avl__dequantize_f16, avl__quantize_f16},
    {ASTROVL_TYPE_Q4_0, "Q4_0", 32,  18,  {0, 1},   {0, 0}, avl__dequantize_q4_0, avl__quantize_q4_0},
    {ASTROVL_TYPE_Q4_1, "Q4_1", 32,  20,  {0, 2},   {0, 0}, avl__dequantize_q4_1, avl__quantize_q4_1},
    {ASTROVL_TYPE_Q5_0, "Q5_0", 32,  22,  {0, 1},   {2, 1}, avl__dequantize_q5_0, avl__quantize_q5_0},
    {ASTROVL_TYPE_Q5_1, "Q5_1", 32,  24,  {0, 2},   {4, 1}, avl__dequantize_q5_1, avl__quantize_q5_1},
    {ASTROVL_TYPE_Q8_0, "Q8_0", 32,  34,  {0, 1},   {0, 0}, avl__dequantize_q8_0, avl__quantize_q8_0},
    {ASTROVL_TYPE_Q2_K, "Q2_K", 256, 84,  {80, 2},  {0, 0}, avl__dequantize_q2_k, avl__quantize_q2_k},
    {ASTROVL_TYPE_Q3_K, "Q3_K", 256, 110, {108, 1}, {0, 0}, avl__dequantize_q3_k, avl__quantize_q3_k},
    {ASTROVL_TYPE_Q4_K, "Q4_K", 256, 144, {0, 2},   {0, 0}, avl__dequantize_q4_k, avl__quantize_q4_k},
    {ASTROVL_TYPE_Q5_K, "Q5_K", 256, 176, {0, 2},   {0, 0}, avl__dequantize_q5_k, avl__quantize_q5_k},
    {ASTROVL_TYPE_Q6_K, "Q6_K", 256, 210, {208, 1}, {0, 0}, avl__dequantize_q6_k, avl__quantize_q6_k},
    {ASTROVL_TYPE_BF16, "BF16", 1,   2,   {0, 1},   {0, 0}, avl__dequantize_bf16, avl__quantize_bf16}
};

static const avl__type_info *avl__find_type(int type) {   // NULL: a type this header lacks
    size_t i;
    for (i = 0; i < sizeof avl__types / sizeof *avl__types; i++)
        if (avl__types[i].type == type) return &avl__types[i];
    return NULL;
}

// The same without checks, for the kernels: type is known, n_values a multiple of its block.
static void avl__dequantize_row(int type, const void *blocks, float *values, int64_t n_values) {
    const avl__type_info *info = avl__find_type(type);
    info->dequantize((const uint8_t *)blocks, values, n_values / info->block_values);
}

// NaN as 0, and nothing beyond AVL__QUANTIZE_MAX
static void avl__finite(const float *values, float *x, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] = values[i] == values[i] ? avl__clamp(values[i], -AVL__QUANTIZE_MAX, AVL__QUANTIZE_MAX) : 0;
}

static void avl__quantize_row(int type, const float *values, void *blocks, int64_t n_values) {   // without checks, too
    const avl__type_info *info = avl__find_type(type);
    uint8_t *block = (uint8_t *)blocks;
    float x[256];
    for (; n_values > 0; n_values -= info->block_values, values += info->block_values, block += info->block_bytes) {
        if (info->block_values > 1) avl__finite(values, x, info->block_values);
        info->quantize(info->block_values > 1 ? x : values, block);
    }
}

ASTROVL_API const char *astrovl_type_name(int type) {
    const avl__type_info *info = avl__find_type(type);
    return info ? info->name : NULL;
}

ASTROVL_API size_t astrovl_type_row_bytes(int type, int64_t n_values) {
    const avl__type_info *info = avl__find_type(type);
    if (!info || n_values < 0 || n_values % info->block_values != 0) return 0;
    if ((uint64_t)(n_values / info->block_values) > SIZE_MAX / (size_t)info->block_bytes) return 0;
    return (size_t)(n_values / info->block_values) * (size_t)info->block_bytes;
}

ASTROVL_API astrovl_status astrovl_dequantize(int type, const void *blocks, float *values, int64_t n_values) {
    const avl__type_info *info = avl__find_type(type);
    if (!info || n_values < 0 || n_values % info->block_values != 0) return ASTROVL_ERROR_ARGUMENT;
    if (n_values > 0 && (!blocks || !values)) return ASTROVL_ERROR_ARGUMENT;
    avl__dequantize_row(type, blocks, values, n_values);
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_quantize(int type, const float *values, void *blocks, int64_t n_values) {
    const avl__type_info *info = avl__find_type(type);
    if (!info || n_values < 0 || n_values % info->block_values != 0) return ASTROVL_ERROR_ARGUMENT;
    if (n_values > 0 && (!blocks || !values)) return ASTROVL_ERROR_ARGUMENT;
    avl__quantize_row(type, values, blocks, n_values);
    return ASTROVL_OK;
}

// ---- exponential and logarithm -------------------------------------------------------------------------------------
// The float functions compute in double and round once at the end: the error is half a unit in the last place (ulp)
// plus the double's error, which is below 0.001 ulp of the float. So a result is the float nearest to the true value,
// but where that lies within 0.001 ulp of the middle between two floats.

#define AVL__LN2      0.6931471805599453094172
#define AVL__LN2_HIGH 0.693147180369123816490    // the upper 32 bits of ln 2: n * LN2_HIGH is exact for |n| < 2^21
#define AVL__LN2_LOW  1.90821492927058770002e-10 // the rest
#define AVL__LOG2_E   1.4426950408889634074

// Adding 1.5 * 2^52 pushes a double's fraction out of its 52 bits: what remains is x rounded to an integer (ties to
// even), which also stands in the low bits of the sum. For |x| < 2^31.
#define AVL__ROUNDER 6755399441055744.0

static uint64_t avl__double_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static double avl__double_from_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static double avl__round(double x, int *integer) {
    double sum = x + AVL__ROUNDER;
    uint32_t low = (uint32_t)avl__double_bits(sum);
    *integer = low < 0x80000000u ? (int)low : -(int)(0xFFFFFFFFu - low) - 1;
    return sum - AVL__ROUNDER;
}
static double avl__power_of_2(int n) { return avl__double_from_bits((uint64_t)(1023 + n) << 52); }   // |n| <= 1022

// exp(x) = 2^n exp(r),  n = round(x / ln 2),  r = x - n ln 2,  |r| <= 0.347;   exp(r) = 1 + r + r^2/2! + ... + r^9/9!
// What the series leaves out is below 1e-11. There are no branches: where x is too small or too large, a limit stands
// for it that is sure to become 0 or infinity when the double is rounded to float.
ASTROVL_API float astrovl_expf(float x) {
    double v = x < -104.0f ? -104.0 : x > 89.0f ? 89.0 : (double)x, r, sum;
    int n;
    r = v - avl__round(v * AVL__LOG2_E, &n) * AVL__LN2;
    sum = 1.0 + r * (1.0 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 +
          r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880)))))))));
    sum *= avl__double_from_bits((uint64_t)(1023u + (uint32_t)n) << 52);
    return x != x ? x : (float)sum;   // a NaN as it came
}

// The same in double: ln 2 in two parts, so that r keeps all its bits, and 13 terms (r^14 / 14! < 5e-18).
// Relative error below 3e-16 where the result is a normal number.
static double avl__exp(double x) {
    double k, r, sum;
    int n;
    if (x != x) return x;
    if (x > 709.79) return HUGE_VAL;
    if (x < -745.2) return 0;
    k = avl__round(x * AVL__LOG2_E, &n);
    r = (x - k * AVL__LN2_HIGH) - k * AVL__LN2_LOW;
    sum = 1.0 + r * (1.0 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 +
          r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800 +
          r * (1.0 / 479001600 + r * (1.0 / 6227020800.0)))))))))))));
    return sum * avl__power_of_2(n / 2) * avl__power_of_2(n - n / 2);   // two steps: 2^n may be no normal double
}

// a * b = product + *error, exactly (Dekker 1971): halves of 26 bits, whose products need no rounding
static double avl__two_product(double a, double b, double *error) {
    double p = a * b, t, a1, a2, b1, b2;
    t = 134217729.0 * a; a1 = t - (t - a); a2 = a - a1;   // 2^27 + 1
    t = 134217729.0 * b; b1 = t - (t - b); b2 = b - b1;
    *error = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2;
    return p;
}

// log(x) = e ln 2 + log(m),  x = 2^e m,  sqrt(1/2) <= m <= sqrt(2)
// log(m) = 2 (s + s^3/3 + s^5/5 + ... + s^21/21),  s = (m - 1) / (m + 1),  |s| < 0.172: what is left out is below 1e-18
// Returns the result's double and in *low what that lacks: some 10 bits more, which avl__pow needs because it
// multiplies the logarithm and its error. x > 0 and finite.
static double avl__log_parts(double x, double *low) {
    uint64_t bits = avl__double_bits(x);
    double e, m, f, s, s_low, p, p_low, q, tail, high;
    int k;
    e = 0;
    if (bits >> 52 == 0) bits = avl__double_bits(x * 4503599627370496.0), e = -52;   // subnormal: times 2^52
    e += (double)(int)(bits >> 52) - 1023;
    m = avl__double_from_bits((bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
    if (m > 1.4142135623730951) m *= 0.5, e += 1;
    f = m - 1;                                         // exact
    s = f / (2 + f);
    p = avl__two_product(s, 2 + f, &p_low);
    s_low = (f - p - p_low - s * (f - ((2 + f) - 2))) / (2 + f);   // what s lacks: the remainder, and that of 2 + f
    q = s * s;
    for (tail = 0, k = 21; k >= 3; k -= 2) tail = q * (1.0 / k + tail);
    p = e * AVL__LN2_HIGH;                             // exact
    tail = 2 * (s_low + s * tail) + e * AVL__LN2_LOW;
    high = p + 2 * s;                                  // |p| > |2 s| or p = 0, so what this sum loses is found exactly
    tail += 2 * s - (high - p);                        // (Dekker's fast two-sum)
    *low = tail - ((high + tail) - high);
    return high + tail;
}

static double avl__log(double x) {   // x > 0 and finite
    double low, high = avl__log_parts(x, &low);
    return high + low;
}

// x^y = exp(y log x) for x > 0, with y log x as a sum high + low: exp(high + low) = exp(high) (1 + low).
// Relative error below 5e-16 where the result is a normal number.
static double avl__pow(double x, double y) {
    double log_low, log_high = avl__log_parts(x, &log_low);
    double low, high = avl__two_product(y, log_high, &low), result = avl__exp(high);
    low += y * log_low;
    return result > DBL_MAX ? result : result + result * low;
}

// tanh(x) = 1 - 2 / (exp(2x) + 1);  below 1/16, where that would cancel:  x - x^3/3 + 2 x^5/15 - 17 x^7/315
// What the series leaves out is below 5e-12 relative; from 1/16 on cancellation costs 4 of a double's 53 bits.
ASTROVL_API float astrovl_tanhf(float x) {
    double v = x < 0 ? -(double)x : (double)x, q = v * v, y;
    if (x != x) return x;
    if (v < 0.0625) return (float)((double)x * (1 - q * (1.0 / 3 - q * (2.0 / 15 - q * (17.0 / 315)))));
    y = v > 10 ? 1 : 1 - 2 / (avl__exp(2 * v) + 1);   // tanh(10) = 1 - 4e-9 is 1 as a float
    return (float)(x < 0 ? -y : y);
}

// erf(x) = 2/sqrt(pi) integral_0^x exp(-t^2) dt
//   |x| < 2    2/sqrt(pi) x sum_k (-x^2)^k / (k! (2k + 1)),  k <= 12 below 1, k <= 23 below 2: leaves out 1e-11
//   |x| >= 2   1 - exp(-x^2) / sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...)))), Laplace's continued fraction;
//              16 levels give the difference from 1, which is below 0.005, to 1e-8
ASTROVL_API float astrovl_erff(float x) {
    static const double c[] = {   // 1 / (k! (2k+1))
        1.0, 1.0 / (1 * 3.0), 1.0 / (2 * 5.0), 1.0 / (6 * 7.0), 1.0 / (24 * 9.0), 1.0 / (120 * 11.0),
        1.0 / (720 * 13.0), 1.0 / (5040 * 15.0), 1.0 / (40320 * 17.0), 1.0 / (362880 * 19.0), 1.0 / (3628800 * 21.0),
        1.0 / (39916800 * 23.0), 1.0 / (479001600 * 25.0), 1.0 / (6227020800.0 * 27), 1.0 / (87178291200.0 * 29),
        1.0 / (1307674368000.0 * 31),
        1.0 / (20922789888000.0 * 33), 1.0 / (355687428096000.0 * 35), 1.0 / (6402373705728000.0 * 37),
        1.0 / (121645100408832000.0 * 39), 1.0 / (2432902008176640000.0 * 41), 1.0 / (51090942171709440000.0 * 43),
        1.0 / (1124000727777607680000.0 * 45), 1.0 / (25852016738884976640000.0 * 47)
    };
    double v = x < 0 ? -(double)x : (double)x, q = v * v, sum;
    int k = v < 1 ? 12 : 23;
    if (x != x) return x;
    if (v < 2) {
        for (sum = c[k]; k > 0; k--) sum = c[k - 1] - q * sum;
        return (float)(1.1283791670955125739 * (double)x * sum);
    }
    for (sum = v, k = 16; k > 0; k--) sum = v + 0.5 * k / sum;
    sum = v > 4 ? 1 : 1 - avl__exp(-q) * 0.56418958354775628695 / sum;   // erf(4) = 1 - 1.5e-8 is 1 as a float
    return (float)(x < 0 ? -sum : sum);
}

// ---- sine and cosine -----------------------------------------------------------------------------------------------
// x = n pi/2 + r, |r| <= pi/4; by n mod 4, sin(x) = sin r, cos r, -sin r, -cos r. The whole care is in r: x close to a
// multiple of pi/2 cancels nearly all digits of the difference.

// The first 224 bits of 2/pi after the binary point.
static const uint32_t avl__two_over_pi[7] = {
    0xA2F9836Eu, 0x4E441529u, 0xFC2757D1u, 0xF534DDC0u, 0xDB629599u, 0x3C439041u, 0xFE5163ABu
};

// For |x| >= 2^23 (Payne & Hanek 1983). x = m 2^e with an integer m < 2^24 and 0 <= e <= 104. Only x 2/pi modulo 4 is
// wanted, so the bits of 2^e 2/pi that weigh 4 or more may be left out: the next 96 (2 before the point, 94 after it)
// times m, modulo 4, give n and a fraction. Of that 64 bits are used; for the float closest to a multiple of pi/2
// (7.7e28) it begins with 29 zeros, which leaves 35.
static double avl__reduce_large(float x, int *n) {
    uint32_t bits = avl__float_bits(x), m = (bits & 0x7FFFFF) | 0x800000, word[3];
    int first = (int)(bits >> 23 & 255) - 150 - 2, i;   // the window's first bit in avl__two_over_pi; may be -2
    uint64_t carry = 0;
    uint32_t high, low;                                 // the first 64 bits of the fraction
    double fraction;
    for (i = 2; i >= 0; i--) {
        int at = first + 32 * i, index = (at + 32) / 32 - 1, shift = (at + 32) % 32;
        uint64_t pair = (uint64_t)(index < 0 ? 0 : avl__two_over_pi[index]) << 32 | avl__two_over_pi[index + 1];
        carry += (pair << shift >> 32 & 0xFFFFFFFFu) * m;
        word[i] = (uint32_t)carry;
        carry >>= 32;
    }
    *n = (int)(word[0] >> 30);
    high = word[0] << 2 | word[1] >> 30;
    low = word[1] << 2 | word[2] >> 30;
    if (high >> 31) {                                   // more than half: the next n, and a negative rest
        *n += 1;
        fraction = -((double)~high / 4294967296.0 + (double)~low / 18446744073709551616.0);
    } else
        fraction = (double)high / 4294967296.0 + (double)low / 18446744073709551616.0;
    if (bits >> 31) *n = -*n, fraction = -fraction;
    return fraction * 1.57079632679489661923;
}

// x - n pi/2 for |x| < 2^23 (Cody & Waite 1980): pi/2 in three parts, the first two of 30 bits, so that their products
// with n (at most 23 bits) are exact, and so are the differences as long as they cancel.
static double avl__reduce(float x, int *n) {
    double k;
    if (x >= 8388608.0f || x <= -8388608.0f) return avl__reduce_large(x, n);
    k = avl__round((double)x * 0.63661977236758134308, n);
    return (((double)x - k * 1.570796325802803) - k * 9.920935791635221e-10) - k * 5.170182981794105e-19;
}

// sin r = r - r^3/3! + ... + r^13/13!,   cos r = 1 - r^2/2! + ... + r^12/12!:   right to 1e-12 for |r| <= pi/4
// quadrant 0: sin r, 1: cos r, 2: -sin r, 3: -cos r
static float avl__sin_quadrant(double r, int quadrant) {
    double q = r * r, y;
    if (quadrant & 1)
        y = 1 - q * (1.0 / 2 - q * (1.0 / 24 - q * (1.0 / 720 - q * (1.0 / 40320 - q * (1.0 / 3628800 -
            q * (1.0 / 479001600))))));
    else
        y = r * (1 - q * (1.0 / 6 - q * (1.0 / 120 - q * (1.0 / 5040 - q * (1.0 / 362880 - q * (1.0 / 39916800 -
            q * (1.0 / 6227020800.0)))))));
    return (float)(quadrant & 2 ? -y : y);
}

// Right to 0.501 ulp for every float; NaN for infinities.
ASTROVL_API float astrovl_sinf(float x) {
    int n;
    double r;
    if (x != x) return x;
    if (x > FLT_MAX || x < -FLT_MAX) return avl__float_from_bits(0x7FC00000);
    r = avl__reduce(x, &n);
    return avl__sin_quadrant(r, n & 3);
}

ASTROVL_API float astrovl_cosf(float x) {   // cos x = sin(x + pi/2)
    int n;
    double r;
    if (x != x) return x;
    if (x > FLT_MAX || x < -FLT_MAX) return avl__float_from_bits(0x7FC00000);
    r = avl__reduce(x, &n);
    return avl__sin_quadrant(r, (n + 1) & 3);
}

// ---- random numbers ------------------------------------------------------------------------------------------------

// 53 random bits as a number in [0, 1).  SplitMix64 (Steele, Lea & Flood 2014): 64 bits of state, no bad seeds
static double avl__random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double)(z >> 11) * (1.0 / 9007199254740992.0);
}


// ====================================================================================================================
// [4] Kernels
// The few loops in which all the time goes, behind one table of function pointers: products of activations with a weight
// matrix in any stored format, attention, norms and activations. A kernel for a new instruction set is one more table with a
// few short functions; the model code above knows only the table.
//
// Exact mode fixes the order of every sum. A dot product of n values keeps 16 partial sums; value i goes to sum i % 16, in
// order of i, as a rounded product then a rounded addition; then the 16 are folded 8 + 8, 4 + 4, 2 + 2, 1 + 1. Sixteen
// because that is one AVX-512 register, two of AVX, four of SSE or NEON, or sixteen plain variables: each computes the same
// bits.
//
// Fast mode multiplies small integers. Every block format says of 32 neighbouring weights
//     w[i] = d (u[i] - offset) + m,        u[i] a byte, d and m floats of the block (or of each half of it);
// activations are rounded, row by row, to x[i] = e q[i] with -127 <= q[i] <= 127 and one e for 32 values. Then
//     sum over a block of w[i] x[i] = d e (sum of u[i] q[i] - offset sum of q[i]) + m e (sum of q[i]),
// and the first sum is what processors are best at: four bytes times four bytes, added up in 32 bits, in one instruction
// (vpdpbusd of AVX-512 VNNI and AVX-VNNI, sdot of NEON). The other two sums depend on the activations alone and are made once per row.
//
// One row of activations (writing an answer) is bound by reading the weights from memory, if the arithmetic keeps up: eight weight
// rows, or sixteen, are multiplied as they stream by, and what comes next is asked for meanwhile (AVL__AHEAD, avl__next_rows). Every
// block's sum is made whole while it is an integer, for which any order is right; so the rows' sums come to lie side by side, as in a
// panel.
// Many rows (an image, a prompt) are bound by arithmetic: 32 weight rows become a panel in the thread's cache, turned so that
// one register holds the same four columns of 16 rows (of 8 with AVX2's shorter ones, of 4 with NEON's); every row of activations
// then passes over it, six at a time. 6 x 2 registers of integer sums, 6 x 2 of float sums, 2 of weights and 1 of activations are
// 27 of 32; a panel of 4096 columns is 160 KB, which stays in the second-level cache while 6 activation rows of 4 KB stay in the
// first. The panel is the only copy of weights there ever is.
// Some rows (answers written together) are between the two: weights are turned, block by block, in registers or in the first-level
// cache, meet all rows there, and meanwhile the next ones are asked for.
// All ways do the same float operations in the same order, so a row's bits do not depend on what is computed beside it: a caption
// is the same alone and among others.
// ====================================================================================================================

// A weight matrix in place, in its stored format:  y = x W^T + bias
typedef struct avl__linear {
    const void  *weight;       // [n_out] rows of n_in values
    const float *bias;         // [n_out], or NULL
    int          type;         // astrovl_type of the weight
    int          n_in, n_out;
    size_t       row_bytes;
} avl__linear;

// Rows of activations as integers of 8 or 16 bits, bfloat16 or float32 (section [15]), x = e q for 32 values.
// A pack of weights meets `group` rows at a time. What it reads of them together lies together, word by word: rows that lay a
// power of two apart would evict each other from the first-level cache. For one row, group is 1.
typedef struct avl__quants {
    int8_t  *q;                // [n_groups][n_blocks][8, 16 or 32 words][group][4]
    float   *scale;            // [n_groups][n_blocks][group]                e
    int32_t *bias;             // [n_groups][n_blocks][n_parts][group]       -offset * sum of q
    float   *sum;              // [n_groups][n_blocks][n_parts][group]       e * sum of q
    int      n_blocks, n_groups, group, float_kind;
} avl__quants;

enum { AVL__QUANT_BYTES = 4 + 8 + 8 + 128 };   // of a block: scale, bias, sum, and at most 32 words

// One product:  y[n_rows][n_out] = x[n_rows][n_in] W^T + bias
typedef struct avl__product {
    float             *y;
    const float       *x;
    const avl__linear *w;
    int                n_rows;
    int                few;    // 1: too few rows to be worth panels
    int                ahead;  // columns from those that a thread is given to those that it will probably take next
    avl__quants        quants; // x rounded, where `multiply` is used
} avl__product;

// Attention of one head for some neighbouring queries; rows of q and out lie q_stride floats apart, of k and v kv_stride.
typedef struct avl__tile {
    float       *out;          // [n][head_dim]
    const float *q, *k, *v;    // [n][head_dim], [n_keys][head_dim] twice
    size_t       q_stride, kv_stride;
    int          n;            // for attend at most AVL__TILE_QUERIES
    int          n_keys, n_visible;   // query i sees the first n_visible + i keys, at most all
    int          head_dim;
} avl__tile;

enum { AVL__TILE_QUERIES = 32 };

typedef struct avl__kernels {
    const char *name;
    // sum over i of a[i] * b[i]
    float (*dot)(const float *a, const float *b, int n);
    // y[i] += a * x[i]
    void (*axpy)(float *y, float a, const float *x, int n);
    // Columns first..last-1 of a product.  scratch: memory of this thread's own, at least [n_in] floats
    void (*linear)(const avl__product *p, int first, int last, float *scratch);
    // sum over i of half[i] * x[i], half: little-endian float16 at any address.  The same bits in every table
    float (*dot_f16)(const void *half, const float *x, int n);
    // the operations of section [5] that the public functions describe
    void (*rms_norm)(float *y, const float *x, const float *weight, int n_embd, float eps);
    void (*layer_norm)(float *y, const float *x, const float *weight, const float *bias, int n_embd, float eps);
    void (*gelu)(float *x, int64_t n);
    void (*quick_gelu)(float *x, int64_t n);
    void (*silu_product)(float *x, const float *up, int64_t n);              // x = silu(x) * up
    // NULL in exact mode: rounds blocks begin..end-1 of rows first..first+n_rows-1 of x; columns first..last-1 of the product with x
    // rounded; attention
    void (*quantize)(const avl__product *p, int first, int n_rows, int begin, int end);
    void (*multiply)(const avl__product *p, int first, int last, float *scratch);
    void (*attend)(const avl__tile *t, float *scratch);
    void (*attend_coarsely)(const avl__tile *t, float *scratch);   // the same for any number of queries, in bfloat16; or NULL
    // NULL where attend is: attention of one query [head_dim] over n_keys keys and values in float16, `stride` from one to the next
    // (weights: out, [n_keys]), and to float16 and back (what is too large becomes the largest)
    void (*attend_one)(float *out, const float *q, const uint16_t *k, const uint16_t *v, size_t stride, int n_keys, int head_dim, float *weights);
    void (*to_halves)(uint16_t *y, const float *x, int64_t n);
    void (*from_halves)(float *y, const uint16_t *x, int n);
    int group, float_kind, float_group;   // rows of activations of a tile, at most; how rounded floats are multiplied, and their rows
    int n_few;                            // up to so many rows weights in blocks are not packed as a whole
} avl__kernels;

#define AVL__LANES 16

static float avl__fold_lanes(float *lane) {
    int half, i;
    for (half = AVL__LANES / 2; half > 0; half /= 2)
        for (i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static float avl__dot_portable(const float *a, const float *b, int n) {
    float lane[AVL__LANES] = {0};
    int i, j;
    for (i = 0; i + AVL__LANES <= n; i += AVL__LANES)
        for (j = 0; j < AVL__LANES; j++) lane[j] += a[i + j] * b[i + j];
    for (j = 0; i + j < n; j++) lane[j] += a[i + j] * b[i + j];
    return avl__fold_lanes(lane);
}

static float avl__dot_f16_portable(const void *half, const float *x, int n) {
    const uint8_t *h = (const uint8_t *)half;
    float lane[AVL__LANES] = {0};
    int i, j;
    for (i = 0; i < n; i += AVL__LANES)
        for (j = 0; j < AVL__LANES && i + j < n; j++) lane[j] += astrovl_f16_to_f32(avl__load_u16(h + 2 * (i + j))) * x[i + j];
    return avl__fold_lanes(lane);
}

// Eight sums, so that the processor waits for memory and not for an addition.
static uint64_t avl__read_portable(const void *data, size_t size) {
    const uint8_t *bytes = (const uint8_t *)data;
    uint64_t sum[8] = {0}, word;
    size_t at = 0;
    int i;
    for (; at + 64 <= size; at += 64)
        for (i = 0; i < 8; i++) {
            memcpy(&word, bytes + at + 8 * i, sizeof word);
            sum[i] += word;
        }
    for (; at < size; at++) sum[0] += bytes[at];
    for (i = 1; i < 8; i++) sum[0] += sum[i];
    return sum[0];
}

static void avl__axpy_portable(float *y, float a, const float *x, int n) {
    int i;
    for (i = 0; i < n; i++) y[i] += a * x[i];
}

// Each weight row is expanded once and then meets every row of x while it is in the cache.
static void avl__linear_portable(const avl__product *p, int first, int last, float *scratch) {
    const avl__linear *w = p->w;
    int out, r;
    for (out = first; out < last; out++) {
        float bias = w->bias ? w->bias[out] : 0.0f;
        avl__dequantize_row(w->type, (const uint8_t *)w->weight + (size_t)out * w->row_bytes, scratch, w->n_in);
        for (r = 0; r < p->n_rows; r++)
            p->y[(size_t)r * w->n_out + out] = avl__dot_portable(p->x + (size_t)r * w->n_in, scratch, w->n_in) + bias;
    }
}

static void avl__silu_product(float *x, const float *up, int64_t n) {
    int64_t i;
    astrovl_silu(x, n);
    for (i = 0; i < n; i++) x[i] *= up[i];
}

// Three times the sums of a dot product, each a product and a sum after the other. Their starts differ: a compiler must not take
// them for one.
static double avl__peak_portable(int type, int64_t n) {
    float lane[3][AVL__LANES], factor;
    volatile float keep = 0.999f;   // nothing is known about it while compiling, and what it is given must be computed
    int64_t r;
    int i, j;
    (void)type;
    factor = keep;
    for (i = 0; i < 3; i++)
        for (j = 0; j < AVL__LANES; j++) lane[i][j] = (float)(i + j);
    for (r = 0; r < n; r++)
        for (i = 0; i < 3; i++)
            for (j = 0; j < AVL__LANES; j++) lane[i][j] = lane[i][j] * factor + factor;
    for (i = 0; i < 3; i++) keep = keep + avl__fold_lanes(lane[i]);
    return (double)n * (3 * AVL__LANES * 2);
}

static const avl__kernels avl__kernels_portable = {
    "portable", avl__dot_portable, avl__axpy_portable, avl__linear_portable, avl__dot_f16_portable, astrovl_rms_norm,
    astrovl_layer_norm, astrovl_gelu, astrovl_quick_gelu, avl__silu_product, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, 0, 1, 0};

static int avl__is_float_type(int type) {
    return type == ASTROVL_TYPE_F32 || type == ASTROVL_TYPE_F16 || type == ASTROVL_TYPE_BF16;
}

#if !AVL__SIMD
#define AVL__KERNEL_NAMES "portable"
#elif AVL__X86
#define AVL__KERNEL_NAMES "portable, avx2, avx_vnni, avx512, avx512_bf16"
#elif AVL__NEON
#define AVL__KERNEL_NAMES "portable, neon, neon_dotprod"
#else
#define AVL__KERNEL_NAMES "portable, generic"
#endif

static const avl__kernels *avl__choose_kernels(astrovl_mode mode, const char *isa);      // section [15]

// ====================================================================================================================
// [5] Ops
// The operations that both transformers are made of, on rows of float32: norms, softmax, activations, RoPE, products with
// a weight matrix, attention. The public ones work on plain arrays for whoever wants to take a model apart; the ones that
// are worth several threads take an avl__run, the circumstances under which a pass runs.
// ====================================================================================================================

// ---- how a pass is run ---------------------------------------------------------------------------------------------

typedef struct avl__run {
    const avl__kernels *kernels;
    avl__pool          *pool;
    astrovl_tap         tap;               // NULL: nobody watches
    void               *tap_user;
    astrovl_progress    progress;          // NULL: nobody waits
    void               *progress_user;
    float              *rows;              // activations of the pass under way
    size_t              rows_capacity;
    float              *thread_memory;     // [n_threads][thread_floats]: an expanded weight row or panel, or attention scores
    size_t              thread_capacity;
    size_t              thread_floats;
    uint8_t            *quants;            // activations as integers, of the product under way
    size_t              quants_capacity;
    int                 always_panels;     // 1: a row's bits must not depend on how many there are
} avl__run;

enum { AVL__CARVED = 12 };     // parts that a pass's activations have, at most

// Makes room for a pass, before it starts, so that nothing inside it can fail: n_rows_floats to carve activations from, and
// n_thread_floats for each thread. No product of the pass has more rows than n_rows or longer ones than n_thread_floats, nor are
// there more keys or longer heads than that. 0 when memory is out.
static int avl__run_reserve(avl__run *run, uint64_t n_rows_floats, uint64_t n_thread_floats, uint64_t n_rows) {
    uint64_t n_threads = (uint64_t)avl__pool_n_threads(run->pool);
    if (run->kernels->multiply) {
        uint64_t n_blocks = n_thread_floats / 32 + 1;
        n_rows += 16;                                        // the last group need not be full
        if (n_blocks > SIZE_MAX / 1024 / n_rows) return 0;
        if (!avl__grow(&run->quants, &run->quants_capacity, (size_t)(n_rows * n_blocks * AVL__QUANT_BYTES), 1)) return 0;
        n_thread_floats = n_thread_floats * 64 + 4096;       // attention takes 32 for each key and value of a head, a panel 16 for
                                                             // each column of whole blocks
    }
    if (n_rows_floats > SIZE_MAX / 8 || n_thread_floats > SIZE_MAX / 8 / n_threads) return 0;
    n_rows_floats += AVL__CARVED * AVL__LINE / sizeof(float);
    n_thread_floats += AVL__LINE - n_thread_floats % AVL__LINE;
    if (!avl__grow(&run->rows, &run->rows_capacity, (size_t)n_rows_floats, sizeof(float))) return 0;
    if (!avl__grow(&run->thread_memory, &run->thread_capacity, (size_t)(n_thread_floats * n_threads + AVL__LINE), sizeof(float))) return 0;
    run->thread_floats = (size_t)n_thread_floats;
    return 1;
}

static float *avl__thread_memory(const avl__run *run, int thread) {
    return (float *)avl__align(run->thread_memory) + (size_t)thread * run->thread_floats;
}

// Takes n floats off a block that avl__run_reserve measured out.
static float *avl__carve(float **block, uint64_t n) {
    float *taken = (float *)avl__align(*block);
    *block = taken + n;
    return taken;
}

// Reports progress; non-zero when the caller wants to stop.
static int avl__report(const avl__run *run, const char *stage, int done, int total) {
    return run->progress ? run->progress(run->progress_user, stage, done, total) : 0;
}

// ---- the audit tap -------------------------------------------------------------------------------------------------

// Shows data [d0][d1][d2] (sizes of 0 at the end are no dimensions) under the name prefix.layer.name, as transformers names
// modules; empty parts are left out. Costs one comparison when nobody watches.
static void avl__tap3(const avl__run *run, const char *prefix, int layer, const char *name, const float *data, int64_t d0,
                      int64_t d1, int64_t d2) {
    char full[160];
    int64_t shape[3];
    int n_dims = d2 > 0 ? 3 : d1 > 0 ? 2 : 1;
    if (!run->tap) return;
    shape[0] = d0;
    shape[1] = d1;
    shape[2] = d2;
    if (layer < 0) avl__format(full, sizeof full, "%s%s%s", prefix, *prefix && *name ? "." : "", name);
    else           avl__format(full, sizeof full, "%s.%d%s%s", prefix, layer, *name ? "." : "", name);
    run->tap(run->tap_user, full, layer, shape, n_dims, data);
}

static void avl__tap(const avl__run *run, const char *prefix, int layer, const char *name, const float *data, int64_t n_rows,
                     int64_t n_columns) {
    avl__tap3(run, prefix, layer, name, data, n_rows, n_columns, 0);
}

// ---- norms ---------------------------------------------------------------------------------------------------------
// Sums run in double, first value to last: more digits than a float32 sum of any order, at no cost that can be measured.

// y[i] = (x[i] - mean) / sqrt(var + eps) * weight[i] + bias[i]
ASTROVL_API void astrovl_layer_norm(float *y, const float *x, const float *weight, const float *bias, int n_embd, float eps) {
    double sum = 0.0, squares = 0.0;
    float mean, scale;
    int i;
    for (i = 0; i < n_embd; i++) sum += x[i];
    mean = (float)(sum / n_embd);
    for (i = 0; i < n_embd; i++) {
        double d = (double)x[i] - mean;
        squares += d * d;
    }
    scale = (float)(1.0 / avl__sqrt(squares / n_embd + eps));
    for (i = 0; i < n_embd; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// y[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]
ASTROVL_API void astrovl_rms_norm(float *y, const float *x, const float *weight, int n_embd, float eps) {
    double squares = 0.0;
    float scale;
    int i;
    for (i = 0; i < n_embd; i++) squares += (double)x[i] * x[i];
    scale = (float)(1.0 / avl__sqrt(squares / n_embd + eps));
    for (i = 0; i < n_embd; i++) y[i] = x[i] * scale * weight[i];
}

typedef struct avl__norm_job {
    const avl__run *run;
    float          *y;
    const float    *x, *weight, *bias;     // bias NULL: an RMS norm
    int             n_embd;
    float           eps;
} avl__norm_job;

static void avl__norm_item(void *context, int r, int thread) {
    avl__norm_job *job = (avl__norm_job *)context;
    float *y = job->y + (size_t)r * job->n_embd;
    const float *x = job->x + (size_t)r * job->n_embd;
    (void)thread;
    if (job->bias) job->run->kernels->layer_norm(y, x, job->weight, job->bias, job->n_embd, job->eps);
    else           job->run->kernels->rms_norm(y, x, job->weight, job->n_embd, job->eps);
}

// x, y: [n_rows][n_embd]
static void avl__layer_norm_rows(const avl__run *run, float *y, const float *x, const float *weight, const float *bias, int n_rows,
                                 int n_embd, float eps) {
    avl__norm_job job = {run, y, x, weight, bias, n_embd, eps};
    avl__pool_run(run->pool, avl__norm_item, &job, n_rows);
}

static void avl__rms_norm_rows(const avl__run *run, float *y, const float *x, const float *weight, int n_rows, int n_embd,
                               float eps) {
    avl__layer_norm_rows(run, y, x, weight, NULL, n_rows, n_embd, eps);
}

// ---- softmax and activations ---------------------------------------------------------------------------------------

// x[i] = exp(x[i] - max x) / sum of the same. Subtracting the maximum changes nothing but keeps exp in range.
ASTROVL_API void astrovl_softmax(float *x, int n) {
    double sum = 0.0;
    float max, scale;
    int i;
    if (n <= 0) return;
    max = x[0];
    for (i = 1; i < n; i++) if (x[i] > max) max = x[i];
    for (i = 0; i < n; i++) {
        x[i] = astrovl_expf(x[i] - max);
        sum += x[i];
    }
    scale = (float)(1.0 / sum);
    for (i = 0; i < n; i++) x[i] *= scale;
}

// x Phi(x), Phi the normal distribution's integral: x (1 + erf(x / sqrt 2)) / 2
ASTROVL_API void astrovl_gelu(float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + astrovl_erff(x[i] * 0.70710678118654752f));
}

// x sigmoid(1.702 x): OpenAI's CLIP was trained with this approximation, so it is what its weights mean
ASTROVL_API void astrovl_quick_gelu(float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = x[i] / (1.0f + astrovl_expf(-1.702f * x[i]));
}

// x sigmoid(x)
ASTROVL_API void astrovl_silu(float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = x[i] / (1.0f + astrovl_expf(-x[i]));
}

// An elementwise activation over many values, in threads.
typedef struct avl__activation_job {
    float  *x;
    int64_t n;
    void  (*activation)(float *x, int64_t n);
    void  (*silu_product)(float *x, const float *up, int64_t n);
    const float *up;
} avl__activation_job;

enum { AVL__ACTIVATION_CHUNK = 8192 };

static void avl__activation_item(void *context, int item, int thread) {
    avl__activation_job *job = (avl__activation_job *)context;
    int64_t first = (int64_t)item * AVL__ACTIVATION_CHUNK, n = job->n - first;
    (void)thread;
    if (n > (int64_t)AVL__ACTIVATION_CHUNK) n = (int64_t)AVL__ACTIVATION_CHUNK;
    if (job->up) job->silu_product(job->x + first, job->up + first, n);
    else         job->activation(job->x + first, n);
}

// up: NULL, or what silu(x) is multiplied by
static void avl__activate(avl__run *run, float *x, int64_t n, void (*activation)(float *x, int64_t n), const float *up) {
    avl__activation_job job;
    job.silu_product = run->kernels->silu_product;
    job.up = up;
    job.x = x;
    job.n = n;
    job.activation = activation;
    avl__pool_run(run->pool, avl__activation_item, &job, (int)((n + AVL__ACTIVATION_CHUNK - 1) / AVL__ACTIVATION_CHUNK));
}

static void avl__add(float *y, const float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) y[i] += x[i];
}

// ---- RoPE ----------------------------------------------------------------------------------------------------------
// Position m turns the pair (x[2i], x[2i+1]) of every head by the angle m * inv_freq[i]: the dot product of a query at m and
// a key at n then depends on m - n only (Su et al. 2021, equation 34). llama.cpp's converter stores the rows of q and k so
// that the pairs are neighbours; transformers pairs i with i + head_dim / 2.

// inv_freq[i] = theta^(-2i / head_dim) / factor[i], rounded to float32 as transformers does; factors (rope_freqs.weight of
// LLaMA-3, [head_dim / 2]) may be NULL; linear_scale divides positions (rope.scaling.type = linear), 1 for none
static void avl__rope_frequencies(float *inv_freq, int head_dim, float theta, const float *factors, float linear_scale) {
    int i;
    for (i = 0; i < head_dim / 2; i++) {
        float f = (float)(1.0 / avl__pow(theta, 2.0 * i / head_dim));
        if (factors) f /= factors[i];
        inv_freq[i] = f / linear_scale;
    }
}

// turn: out, {cos, sin, -sin} of an angle
static void avl__rope_turn(float *turn, float angle) {
    turn[0] = astrovl_cosf(angle);
    turn[1] = astrovl_sinf(angle);
    turn[2] = -turn[1];
}

// (x0, x1) = (x0 cos - x1 sin, x0 sin + x1 cos), with -sin read from memory and added. As a subtraction beside an addition, gcc
// 12's vectoriser makes both one fused vfmaddsub even where contraction is switched off, and exact mode's bits would differ.
static void avl__rope_pair(float *x, const float *turn) {
    float x0 = x[0], x1 = x[1];
    x[0] = x0 * turn[0] + x1 * turn[2];
    x[1] = x0 * turn[1] + x1 * turn[0];
}

ASTROVL_API void astrovl_rope(float *x, int head_dim, int position, const float *inv_freq) {
    float turn[3];
    int i;
    for (i = 0; i < head_dim / 2; i++) {
        avl__rope_turn(turn, (float)position * inv_freq[i]);
        avl__rope_pair(x + 2 * i, turn);
    }
}

// The first rope_dim values of every head of a row x [n_head][head_dim].  turns: its position's, [rope_dim / 2][3]
static void avl__rope_row(float *x, int n_head, int head_dim, int rope_dim, const float *turns) {
    int h, i;
    for (h = 0; h < n_head; h++, x += head_dim)
        for (i = 0; i < rope_dim / 2; i++) avl__rope_pair(x + 2 * i, turns + 3 * i);
}

// ---- products ------------------------------------------------------------------------------------------------------

enum { AVL__SHARED_PRODUCTS = 3 };  // with the same activations: queries, keys and values

typedef struct avl__linear_job {
    const avl__run *run;
    avl__product    product[AVL__SHARED_PRODUCTS];
    int             n_items[AVL__SHARED_PRODUCTS];
    int             n_parts;       // of a group of rows that are rounded, a thread's each
    int             chunk;         // columns of y that a thread takes at a time
    void          (*columns)(const avl__product *p, int first, int last, float *scratch);
} avl__linear_job;

enum { AVL__QUANTIZE_BLOCKS = 256 };   // fewer than so many are rounded by one thread sooner than handed to several
enum { AVL__LINEAR_CHUNK = 32 };    // columns of y that a thread takes at a time, or a multiple of it
enum { AVL__STREAM_ROWS = 32, AVL__LINEAR_CHUNKS = 16 };   // up to so many rows weights are streamed: so many parts for each thread
// Up to so many rows fast mode multiplies weights as they lie; more are worth a panel. For quantised weights both ways give the same
// bits. For floats they do not, so all rows that are decoded together (AVL__STEP_ROWS) must go the same way as one alone.
enum { AVL__FEW_FLOAT_ROWS = 16 };

static void avl__linear_item(void *context, int item, int thread) {
    const avl__linear_job *job = (const avl__linear_job *)context;
    const avl__product *p = job->product;
    const int *n_items = job->n_items;
    int first, last;
    for (; item >= *n_items; p++) item -= *n_items++;
    first = item * job->chunk;
    last = first + job->chunk;
    job->columns(p, first, last < p->w->n_out ? last : p->w->n_out, avl__thread_memory(job->run, thread));
}

// How many rows there are of the group of activations that begins with row `first`.
static int avl__group_rows(const avl__product *p, int first) {
    return p->n_rows - first < p->quants.group ? p->n_rows - first : p->quants.group;
}

static void avl__quantize_item(void *context, int item, int thread) {
    const avl__linear_job *job = (const avl__linear_job *)context;
    const avl__product *p = job->product;
    const int first = item / job->n_parts * p->quants.group, n_blocks = p->quants.n_blocks;
    const int size = (n_blocks + job->n_parts - 1) / job->n_parts, begin = item % job->n_parts * size;
    (void)thread;
    job->run->kernels->quantize(p, first, avl__group_rows(p, first), begin, begin + size < n_blocks ? begin + size : n_blocks);
}

// Rounds x of a job's products. Few rows make few groups, but they may be long.
static void avl__quantize_all(avl__linear_job *job) {
    const avl__quants *quants = &job->product[0].quants;
    const int n_threads = avl__pool_n_threads(job->run->pool), n = quants->n_groups;
    job->n_parts = n < n_threads && quants->n_blocks * job->product[0].n_rows >= AVL__QUANTIZE_BLOCKS ? n_threads : 1;
    avl__pool_run(job->run->pool, avl__quantize_item, job, n * job->n_parts);
}

// Rows of activations of a tile, at most `most`, so that all groups are about as large.
static int avl__tile_rows(int n_rows, int most) {
    static const int sizes[] = {2, 4, 6, 12};
    const int n_groups = (n_rows + most - 1) / most, n = (n_rows + n_groups - 1) / n_groups;
    int i = 0;
    while (sizes[i] < n) i++;
    return sizes[i];
}

// Where x of a product is to be rounded to, in run->quants.
static avl__quants avl__quants_for(const avl__run *run, const avl__product *p) {
    const avl__kernels *kernels = run->kernels;
    avl__quants q;
    size_t n;
    q.n_blocks = (p->w->n_in + 31) / 32;
    q.group = avl__tile_rows(p->n_rows, avl__is_float_type(p->w->type) ? kernels->float_group : kernels->group);
    if (p->few && p->n_rows == 1) q.group = 1;
    q.n_groups = (p->n_rows + q.group - 1) / q.group;
    q.float_kind = kernels->float_kind;
    n = (size_t)q.n_blocks * (size_t)q.n_groups * (size_t)q.group;
    q.scale = (float *)(void *)run->quants;
    q.bias = (int32_t *)(void *)(q.scale + n);
    q.sum = (float *)(void *)(q.bias + 2 * n);
    q.q = (int8_t *)avl__align(q.sum + 2 * n);
    return q;
}

// n (at most AVL__SHARED_PRODUCTS) products of the same x with weights of one type:
//     y[i][n_rows][n_out] = x[n_rows][n_in] W[i]^T + bias.
// Rows are rounded once for all, and the threads meet once.
static void avl__apply_shared(avl__run *run, float *const *y, const float *x, const avl__linear *const *w, int n, int n_rows) {
    const avl__kernels *kernels = run->kernels;
    const int is_float = avl__is_float_type(w[0]->type);
    const int few = n_rows <= (is_float ? AVL__FEW_FLOAT_ROWS : kernels->n_few) && !run->always_panels;
    int n_out = 0, n_items = 0, i;
    avl__linear_job job;
    memset(&job, 0, sizeof job);
    job.run = run;
    job.columns = kernels->linear;
    for (i = 0; i < n; i++) {
        const avl__product product = {y[i], x, w[i], n_rows, few, 0, {NULL, NULL, NULL, NULL, 0, 0, 0, 0}};
        job.product[i] = product;
        n_out += w[i]->n_out;
    }
    if (kernels->multiply && !(few && is_float)) {
        const avl__quants quants = avl__quants_for(run, job.product);
        job.columns = kernels->multiply;
        job.product[0].quants = quants;
        avl__quantize_all(&job);
        for (i = 0; i < n; i++) job.product[i].quants = quants;
    }
    job.chunk = AVL__LINEAR_CHUNK;
    if (n_rows <= AVL__STREAM_ROWS) job.chunk *= 1 + n_out / (AVL__LINEAR_CHUNK * AVL__LINEAR_CHUNKS * avl__pool_n_threads(run->pool));
    for (i = 0; i < n; i++) {
        n_items += job.n_items[i] = (w[i]->n_out + job.chunk - 1) / job.chunk;
        job.product[i].ahead = job.chunk * avl__pool_n_threads(run->pool);
    }
    avl__pool_run(run->pool, avl__linear_item, &job, n_items);
}

// y[n_rows][n_out] = x[n_rows][n_in] W^T + bias
static void avl__apply(avl__run *run, float *y, const float *x, const avl__linear *w, int n_rows) {
    avl__apply_shared(run, &y, x, &w, 1, n_rows);
}

// The same for two or three weights and outputs; what their types allow is shared.
static void avl__apply_each(avl__run *run, float *const *y, const float *x, const avl__linear *const *w, int n, int n_rows) {
    int i, end;
    for (i = 0; i < n; i = end) {
        for (end = i + 1; end < n && w[end]->type == w[i]->type; end++) {}
        avl__apply_shared(run, y + i, x, w + i, end - i, n_rows);
    }
}

ASTROVL_API void astrovl_linear(float *y, const float *x, const float *w, const float *bias, int n_rows, int n_in, int n_out) {
    int r, o;
    for (r = 0; r < n_rows; r++)
        for (o = 0; o < n_out; o++)
            y[(size_t)r * n_out + o] = avl__dot_portable(x + (size_t)r * n_in, w + (size_t)o * n_in, n_in) + (bias ? bias[o] : 0.0f);
}

// ---- attention -----------------------------------------------------------------------------------------------------
// out = softmax(q k^T / sqrt(head_dim)) v for every head (Vaswani et al. 2017, equation 1). With fewer key than query heads,
// n_head / n_head_kv neighbouring query heads share one (Ainslie et al. 2023). A causal row sees the keys up to its own place.
typedef struct avl__attention {
    const float *q;               // [n_rows][n_head][head_dim]
    const void  *k, *v;           // [n_past + n_rows][n_head_kv][head_dim], float or, if is_half, float16; key_stride values from
                                  // one key of a head to the next, head_stride from one head to the next
    float       *out;             // [n_rows][n_head][head_dim]
    float       *weights;         // [n_head][n_rows][n_past + n_rows] for the tap, or NULL
    int          n_rows, n_past, n_head, n_head_kv, head_dim, causal;
    const avl__run *run;
    size_t       key_stride, head_stride;
    int          is_half;
    int          is_coarse;       // 1: rows may be rounded to bfloat16, as the products were that made them
} avl__attention;

// Where the keys and values of a query head begin.
static size_t avl__head_begin(const avl__attention *a, int head) { return (size_t)(head / (a->n_head / a->n_head_kv)) * a->head_stride; }

// One query row of one head.  scores: [n_past + n_rows]
static void avl__attend(const avl__attention *a, int head, int row, float *scores) {
    const avl__kernels *kernels = a->run->kernels;
    int n_keys = a->causal ? a->n_past + row + 1 : a->n_past + a->n_rows, j;
    size_t kv_head = avl__head_begin(a, head), at = ((size_t)row * a->n_head + head) * a->head_dim;
    if (a->is_half)
        kernels->attend_one(a->out + at, a->q + at, (const uint16_t *)a->k + kv_head, (const uint16_t *)a->v + kv_head, a->key_stride, n_keys,
                            a->head_dim, scores);
    else {
        const float *k = (const float *)a->k + kv_head, *v = (const float *)a->v + kv_head;
        const float scale = (float)(1.0 / avl__sqrt((double)a->head_dim));
        for (j = 0; j < n_keys; j++) scores[j] = kernels->dot(a->q + at, k + (size_t)j * a->key_stride, a->head_dim) * scale;
        astrovl_softmax(scores, n_keys);
        memset(a->out + at, 0, (size_t)a->head_dim * sizeof(float));
        for (j = 0; j < n_keys; j++) kernels->axpy(a->out + at, scores[j], v + (size_t)j * a->key_stride, a->head_dim);
    }
    if (a->weights) {
        size_t n_all = (size_t)a->n_past + a->n_rows;
        float *weights = a->weights + ((size_t)head * a->n_rows + row) * n_all;
        memset(weights, 0, n_all * sizeof(float));
        memcpy(weights, scores, (size_t)n_keys * sizeof(float));
    }
}

// What avl__attend_tile takes of a thread's memory: floats, of which avl__run_reserve makes 64 times as many in fast mode.
static uint64_t avl__attend_tile_floats(uint64_t n_keys, int head_dim) {
    return n_keys * (2 + (uint64_t)head_dim / 32) + (uint64_t)head_dim;
}

// n query rows of one head, from row `first` on. Float16 becomes float; and since a head's rows lie as far apart as all heads' are wide,
// which is often a power of two and then puts them all into the same few places of a cache, they are first laid side by side.
static void avl__attend_tile(const avl__attention *a, int head, int first, int n, float *scratch) {
    const avl__kernels *kernels = a->run->kernels;
    const size_t q_stride = (size_t)a->n_head * a->head_dim, kv_head = avl__head_begin(a, head), dim = (size_t)a->head_dim;
    const size_t at = (size_t)first * q_stride + (size_t)head * a->head_dim;
    const int n_keys = a->causal ? a->n_past + first + n : a->n_past + a->n_rows, is_coarse = a->is_coarse && kernels->attend_coarsely;
    avl__tile tile = {a->out + at, a->q + at, NULL, NULL, q_stride, dim, n, n_keys, a->causal ? a->n_past + first + 1 : n_keys, a->head_dim};
    int i, j;
    if (is_coarse && !a->is_half) {             // which lays them side by side as it rounds them
        tile.k = (const float *)a->k + kv_head, tile.v = (const float *)a->v + kv_head, tile.kv_stride = a->key_stride;
    } else {
        float *k = scratch, *v = k + (size_t)n_keys * dim;
        for (j = 0; j < n_keys; j++) {
            const size_t key = kv_head + (size_t)j * a->key_stride, to = (size_t)j * dim;
            if (a->is_half) {
                kernels->from_halves(k + to, (const uint16_t *)a->k + key, a->head_dim);
                kernels->from_halves(v + to, (const uint16_t *)a->v + key, a->head_dim);
            } else {
                memcpy(k + to, (const float *)a->k + key, dim * sizeof(float));
                memcpy(v + to, (const float *)a->v + key, dim * sizeof(float));
            }
        }
        tile.k = k, tile.v = v;
        scratch = v + (size_t)n_keys * dim;
    }
    if (is_coarse) {
        kernels->attend_coarsely(&tile, scratch);
        return;
    }
    for (i = 0; i < n; i += AVL__TILE_QUERIES) {
        avl__tile some = tile;
        some.out += (size_t)i * q_stride;
        some.q += (size_t)i * q_stride;
        some.n = n - i < AVL__TILE_QUERIES ? n - i : AVL__TILE_QUERIES;
        some.n_visible = tile.n_visible + i < n_keys ? tile.n_visible + i : n_keys;
        if (a->causal) some.n_keys = some.n_visible + some.n - 1;
        kernels->attend(&some, scratch);
    }
}

enum { AVL__ITEM_QUERIES = 10 * AVL__TILE_QUERIES };     // queries of a head that a thread takes at a time: they share the head's keys

static int avl__attention_items(const avl__attention *a) {
    return (a->n_rows + AVL__ITEM_QUERIES - 1) / AVL__ITEM_QUERIES * a->n_head;
}

static void avl__attention_item(void *context, int item, int thread) {
    const avl__attention *first_one = (const avl__attention *)context, *a = first_one + item / avl__attention_items(first_one);
    int rest = item % avl__attention_items(a), head = rest % a->n_head, first = rest / a->n_head * AVL__ITEM_QUERIES;
    int n = a->n_rows - first, row;
    if (n > AVL__ITEM_QUERIES) n = AVL__ITEM_QUERIES;
    if (a->run->kernels->attend && !a->weights && a->n_rows > 1) avl__attend_tile(a, head, first, n, avl__thread_memory(a->run, thread));
    else
        for (row = first; row < first + n; row++) avl__attend(a, head, row, avl__thread_memory(a->run, thread));
}

// a: [n], of as many rows and heads each
static void avl__attention_run(avl__attention *a, int n) {
    avl__pool_run(a->run->pool, avl__attention_item, a, n * avl__attention_items(a));
}

// Floats that the tap's copy of the attention weights takes: none when nobody watches.
static uint64_t avl__attention_weights_floats(const avl__run *run, int n_head, int n_rows, int n_keys) {
    return run->tap ? (uint64_t)n_head * n_rows * n_keys : 0;
}

// ====================================================================================================================
// [6] GGUF
// The file format of models (ggml-org/ggml, docs/gguf.md), versions 2 and 3, in either byte order:
//
//     "GGUF"   u32 version   u64 n_tensors   u64 n_kv
//     n_kv times        string key, u32 value type, value                        metadata
//     n_tensors times   string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset
//     zeros up to a multiple of general.alignment (32); tensor data, each at its offset from here
//
// A string is u64 length and bytes; an array is u32 item type, u64 count and the items. A file comes from anywhere, so
// each number is checked against the bytes that remain before it is used to read, multiply or allocate; the memory
// taken is bounded by a small multiple of the file's size. Later sections rely on what is checked here: names are
// without zero bytes, tensors lie within the file and apart from each other, their rows are whole blocks.
// A big-endian file's tensors are copied once and brought to little-endian; all others are used where they lie, at any
// address: `data` promises no alignment.
// ====================================================================================================================

#define AVL__GGUF_MAX_KEY       65535      // the specification's limit
#define AVL__GGUF_MAX_NAME      1024       // of a tensor; the specification's is 64
#define AVL__GGUF_MAX_ALIGNMENT (1 << 20)

// Names that can be found: name[i] are zero-terminated copies, order sorts them (strcmp).
typedef struct avl__names {
    char **name;
    int   *order;
    int    count;
} avl__names;

typedef struct avl__gguf_entry {
    astrovl_kv      kv;
    const uint8_t  *values;       // the first element, in the file's byte order
    const uint8_t **strings;      // an array's strings, [count]: where each one's length stands; otherwise NULL
} avl__gguf_entry;

struct astrovl_gguf {
    avl__file        file;
    int              owns_file;   // 0: the caller's memory block
    char            *name;
    int              version, big_endian;
    avl__names       keys, tensor_names;
    avl__gguf_entry *entries;     // [keys.count]
    astrovl_tensor  *tensors;     // [tensor_names.count]
    uint8_t         *converted;   // a big-endian file's tensor data as little-endian; otherwise NULL
};

// ---- sorting and finding -------------------------------------------------------------------------------------------
// Heapsort and binary search: no input makes them slow, which a hash table cannot say of names that an attacker chose.

typedef int (*avl__order)(const void *context, int a, int b);   // < 0: item a comes first; > 0: item b

// Sorts order[n], item numbers, ascending.
static void avl__sort(int *order, int n, avl__order compare, const void *context) {
    int64_t start = n / 2, end = n;
    while (end > 1) {
        int64_t parent, child;
        int item;
        if (start > 0) item = order[--start];                   // first a heap is built, largest on top,
        else item = order[--end], order[end] = order[0];        // then the top is taken off, again and again
        for (parent = start; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && compare(context, order[child], order[child + 1]) < 0) child++;
            if (compare(context, item, order[child]) >= 0) break;
            order[parent] = order[child];
        }
        order[parent] = item;
    }
}

static int avl__names_order(const void *context, int a, int b) {
    const avl__names *names = (const avl__names *)context;
    return strcmp(names->name[a], names->name[b]);
}

static int avl__begins(const char *text, const char *start) { return strncmp(text, start, strlen(start)) == 0; }

static int avl__names_find(const avl__names *names, const char *name) {   // -1: absent
    int low = 0, high = names->count;
    if (!name) return -1;
    while (low < high) {
        int middle = low + (high - low) / 2, item = names->order[middle], side = strcmp(name, names->name[item]);
        if (side == 0) return item;
        if (side < 0) high = middle; else low = middle + 1;
    }
    return -1;
}

// ---- reading with every step checked -------------------------------------------------------------------------------

// Where reading stands, and what is being read, for messages. The functions below return 0 after filling err.
typedef struct avl__gguf_reader {
    astrovl_gguf  *f;
    uint64_t       at;            // the next byte
    uint64_t       field;         // where the field in question begins
    const char    *kind;          // "header", "key" or "tensor"
    astrovl_string name;          // the key's or tensor's; empty while that is being read
    astrovl_error *err;
} avl__gguf_reader;

// At most n bytes of a text's start (n > 0) or end (n < 0), cut between UTF-8 characters.
static astrovl_string avl__excerpt(const char *text, size_t size, int n) {
    astrovl_string s;
    size_t cut = size > (size_t)(n < 0 ? -n : n) ? size - (size_t)(n < 0 ? -n : n) : 0;   // bytes to leave out
    s.data = text;
    s.size = size - cut;
    if (cut == 0) return s;
    if (n < 0) {
        for (s.data += cut; s.size > 0 && ((unsigned char)*s.data & 0xC0) == 0x80; s.data++) s.size--;
    } else
        while (s.size > 0 && ((unsigned char)text[s.size] & 0xC0) == 0x80) s.size--;
    return s;
}

// "model.gguf: key 'llama.block_count' at byte 1234: <reason>"
static int avl__gguf_fail(const avl__gguf_reader *r, astrovl_status status, const char *format, ...) {
    const char *path = r->f->name, *quote = r->name.size ? "'" : "", *space = r->name.size ? " " : "";
    astrovl_string file = avl__excerpt(path, strlen(path), -128), name = avl__excerpt(r->name.data, r->name.size, 96);
    char reason[200];
    va_list args;
    va_start(args, format);
    avl__format_v(reason, sizeof reason, format, args);
    va_end(args);
    avl__fail(r->err, status, "%S: %s%s%s%S%s at byte %l: %s", file, r->kind, space, quote, name, quote,
              (int64_t)r->field, reason);
    return 0;
}

static uint64_t avl__gguf_rest(const avl__gguf_reader *r) { return r->f->file.size - r->at; }

// Are n more bytes there?
static int avl__gguf_need(const avl__gguf_reader *r, uint64_t n) {
    if (n <= avl__gguf_rest(r)) return 1;
    return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "the file ends here, after %l bytes (an incomplete download?)",
                          (int64_t)r->f->file.size);
}

// An unsigned number of n bytes (1, 2, 4, 8).
static uint64_t avl__load_number(const uint8_t *p, int n, int big_endian) {
    uint64_t value = 0;
    int i;
    for (i = 0; i < n; i++) value = value << 8 | p[big_endian ? i : n - 1 - i];
    return value;
}

static uint64_t avl__gguf_load(const astrovl_gguf *f, const uint8_t *p, int n) { return avl__load_number(p, n, f->big_endian); }

static int avl__gguf_read(avl__gguf_reader *r, int n, uint64_t *value) {
    r->field = r->at;
    if (!avl__gguf_need(r, (uint64_t)n)) return 0;
    *value = avl__gguf_load(r->f, r->f->file.data + r->at, n);
    r->at += (uint64_t)n;
    return 1;
}

static int avl__gguf_read_string(avl__gguf_reader *r, astrovl_string *s) {
    uint64_t size;
    if (!avl__gguf_read(r, 8, &size)) return 0;
    if (size > avl__gguf_rest(r))
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "a text reaches past the file's end, at %l bytes (an incomplete "
                              "download?)", (int64_t)r->f->file.size);
    s->data = (const char *)r->f->file.data + r->at;
    s->size = (size_t)size;
    r->at += size;
    return 1;
}

// A key or tensor name: 1 to `limit` bytes, none of them zero. *copy is zero-terminated.
static int avl__gguf_read_name(avl__gguf_reader *r, const char *kind, size_t limit, char **copy) {
    astrovl_string s;
    r->kind = kind;
    r->name.size = 0;
    if (!avl__gguf_read_string(r, &s)) return 0;
    if (s.size == 0) return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its name is empty");
    if (s.size > limit)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its name has %l bytes; %d are allowed", (int64_t)s.size,
                              (int)limit);
    r->name = s;
    if (memchr(s.data, 0, s.size)) return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its name has a zero byte");
    *copy = avl__copy_text(s.data, s.size);
    return *copy ? 1 : avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
}

// ---- metadata ------------------------------------------------------------------------------------------------------

static int avl__value_bytes(uint64_t type) {   // 0: of no fixed size; -1: no such type
    static const signed char bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};   // by astrovl_value_type
    return type < sizeof bytes ? bytes[type] : -1;
}

// A value type's number, which must be one of the specification's.
static int avl__gguf_read_type(avl__gguf_reader *r, astrovl_value_type *type) {
    uint64_t number;
    if (!avl__gguf_read(r, 4, &number)) return 0;
    if (avl__value_bytes(number) < 0)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "there is no value type %l", (int64_t)number);
    *type = (astrovl_value_type)number;
    return 1;
}

// The strings of an array; their places are kept, so that each can be found at once.
static int avl__gguf_read_strings(avl__gguf_reader *r, avl__gguf_entry *e) {
    uint64_t i;
    astrovl_string s;
    e->strings = (const uint8_t **)avl__alloc_raw(e->kv.count, sizeof *e->strings);
    if (!e->strings) return avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory for %l texts", (int64_t)e->kv.count);
    for (i = 0; i < e->kv.count; i++) {
        e->strings[i] = r->f->file.data + r->at;
        if (!avl__gguf_read_string(r, &s)) return 0;
    }
    return 1;
}

static int avl__gguf_read_entry(avl__gguf_reader *r, avl__gguf_entry *e, char **key) {
    uint64_t i, bytes;
    astrovl_string s;
    if (!avl__gguf_read_name(r, "key", AVL__GGUF_MAX_KEY, key)) return 0;
    e->kv.key = *key;
    if (!avl__gguf_read_type(r, &e->kv.type)) return 0;
    e->kv.item_type = e->kv.type;
    e->kv.count = 1;
    if (e->kv.type == ASTROVL_VALUE_ARRAY) {
        if (!avl__gguf_read_type(r, &e->kv.item_type)) return 0;
        if (e->kv.item_type == ASTROVL_VALUE_ARRAY)
            return avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "arrays of arrays are not supported");
        if (!avl__gguf_read(r, 8, &e->kv.count)) return 0;
    }
    e->values = r->f->file.data + r->at;
    if (e->kv.type == ASTROVL_VALUE_STRING) return avl__gguf_read_string(r, &s);
    bytes = e->kv.item_type == ASTROVL_VALUE_STRING ? 8 : (uint64_t)avl__value_bytes(e->kv.item_type);
    if (e->kv.type != ASTROVL_VALUE_ARRAY) {
        r->field = r->at;
        if (!avl__gguf_need(r, bytes)) return 0;
    } else if (e->kv.count > avl__gguf_rest(r) / bytes)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "%l values of at least %d bytes reach past the file's end, at "
                              "%l bytes", (int64_t)e->kv.count, (int)bytes, (int64_t)r->f->file.size);
    if (e->kv.item_type == ASTROVL_VALUE_STRING) return avl__gguf_read_strings(r, e);
    for (i = 0; e->kv.item_type == ASTROVL_VALUE_BOOL && i < e->kv.count; i++)
        if (r->field = r->at + i, e->values[i] > 1)
            return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "a truth value is %d, neither 0 nor 1", e->values[i]);
    r->at += e->kv.count * bytes;
    return 1;
}

// Element i of entry `index`, and its type; NULL where there is none.
static const uint8_t *avl__gguf_element(const astrovl_gguf *f, int index, uint64_t i, astrovl_value_type *type) {
    const avl__gguf_entry *e;
    if (index < 0 || index >= f->keys.count || i >= f->entries[index].kv.count) return NULL;
    e = &f->entries[index];
    *type = e->kv.item_type;
    return e->strings ? e->strings[i] : e->values + i * (uint64_t)avl__value_bytes(*type);
}

static int64_t avl__double_to_int(double x) {   // towards zero; what does not fit becomes the nearest that does
    if (x != x) return 0;
    return x >= 9223372036854775808.0 ? INT64_MAX : x < -9223372036854775808.0 ? INT64_MIN : (int64_t)x;
}

ASTROVL_API int64_t astrovl_gguf_int(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_value_type type;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    uint64_t value = p ? avl__gguf_load(file, p, avl__value_bytes(type)) : 0;   // 0 for a string: no bytes are read
    if (!p) return 0;
    switch (type) {
    case ASTROVL_VALUE_I8:  return (int8_t)value;
    case ASTROVL_VALUE_I16: return (int16_t)value;
    case ASTROVL_VALUE_I32: return (int32_t)value;
    case ASTROVL_VALUE_I64: return (int64_t)value;
    case ASTROVL_VALUE_F32: return avl__double_to_int((double)avl__float_from_bits((uint32_t)value));
    case ASTROVL_VALUE_F64: return avl__double_to_int(avl__double_from_bits(value));
    default: return value > (uint64_t)INT64_MAX ? INT64_MAX : (int64_t)value;
    }
}

ASTROVL_API double astrovl_gguf_float(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_value_type type;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    if (p && type == ASTROVL_VALUE_F32) return (double)avl__float_from_bits((uint32_t)avl__gguf_load(file, p, 4));
    if (p && type == ASTROVL_VALUE_F64) return avl__double_from_bits(avl__gguf_load(file, p, 8));
    if (p && type == ASTROVL_VALUE_U64) return (double)avl__gguf_load(file, p, 8);
    return (double)astrovl_gguf_int(file, index, i);
}

ASTROVL_API astrovl_string astrovl_gguf_string(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_string s = {"", 0};
    astrovl_value_type type;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    if (p && type == ASTROVL_VALUE_STRING) {
        s.data = (const char *)p + 8;
        s.size = (size_t)avl__gguf_load(file, p, 8);
    }
    return s;
}

// ---- tensors -------------------------------------------------------------------------------------------------------

// Rows of whole blocks, and a size that the file can hold; with that, no later product of dimensions overflows.
static int avl__gguf_size_tensor(const avl__gguf_reader *r, astrovl_tensor *t) {
    const avl__type_info *info = avl__find_type(t->type);
    uint64_t limit = r->f->file.size, bytes = (uint64_t)info->block_bytes;
    uint64_t counts[4];
    int i;
    if (t->ne[0] % info->block_values != 0)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "rows of %l values cannot be of type %s, which has blocks of %d",
                              t->ne[0], info->name, info->block_values);
    counts[0] = (uint64_t)(t->ne[0] / info->block_values);
    for (i = 1; i < 4; i++) counts[i] = (uint64_t)t->ne[i];
    for (i = 0; i < 4; i++) {
        if (counts[i] > limit / bytes)
            return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "a shape of %l x %l x %l x %l in %s needs more than the "
                                  "file's %l bytes", t->ne[0], t->ne[1], t->ne[2], t->ne[3], info->name,
                                  (int64_t)limit);
        bytes *= counts[i];
    }
    t->n_bytes = bytes;
    return 1;
}

static int avl__gguf_read_tensor(avl__gguf_reader *r, astrovl_tensor *t, char **name) {
    uint64_t n_dims, value;
    int i;
    if (!avl__gguf_read_name(r, "tensor", AVL__GGUF_MAX_NAME, name)) return 0;
    t->name = *name;
    if (!avl__gguf_read(r, 4, &n_dims)) return 0;
    if (n_dims > 4)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it has %l dimensions; 4 are allowed", (int64_t)n_dims);
    t->n_dims = n_dims == 0 ? 1 : (int)n_dims;   // none: a single value
    for (i = 0; i < 4; i++) {
        value = 1;
        if (i < (int)n_dims && !avl__gguf_read(r, 8, &value)) return 0;
        if (value == 0 || value > (uint64_t)INT64_MAX)
            return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "dimension %d is %s", i, value ? "too large" : "0");
        t->ne[i] = (int64_t)value;
    }
    if (!avl__gguf_read(r, 4, &value)) return 0;
    if (value > INT_MAX || !avl__find_type((int)value))
        return avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "its type is number %l, which is not supported: convert it "
                              "to F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K", (int64_t)value);
    t->type = (astrovl_type)value;
    return avl__gguf_size_tensor(r, t) && avl__gguf_read(r, 8, &t->offset);
}

// Turns offsets from the data section's start into the file's, once they are known to lie within it.
static int avl__gguf_place_tensor(avl__gguf_reader *r, astrovl_tensor *t, uint64_t start, uint64_t alignment) {
    uint64_t size = r->f->file.size;
    r->name.data = t->name;
    r->name.size = strlen(t->name);
    if (t->offset % alignment != 0)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its data's offset %l is not a multiple of the alignment, %l",
                              (int64_t)t->offset, (int64_t)alignment);
    if (start > size || t->offset > size - start || t->n_bytes > size - start - t->offset)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its %l bytes of data at offset %l reach past the file's end, "
                              "at %l bytes (an incomplete download?)", (int64_t)t->n_bytes, (int64_t)t->offset,
                              (int64_t)size);
    t->offset += start;
    t->data = r->f->file.data + t->offset;
    return 1;
}

static int avl__tensor_order(const void *context, int a, int b) {
    const astrovl_tensor *tensors = (const astrovl_tensor *)context;
    return tensors[a].offset < tensors[b].offset ? -1 : tensors[a].offset > tensors[b].offset;
}

// No byte may belong to two tensors. order: scratch, [n_tensors]
static int avl__gguf_check_overlap(avl__gguf_reader *r, int *order) {
    const astrovl_tensor *t = r->f->tensors;
    int i, n = r->f->tensor_names.count;
    avl__sort(order, n, avl__tensor_order, t);
    for (i = 1; i < n; i++) {
        const astrovl_tensor *a = &t[order[i - 1]], *b = &t[order[i]];
        if (b->offset - a->offset >= a->n_bytes) continue;
        r->field = b->offset;
        r->name.data = b->name;
        r->name.size = strlen(b->name);
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its data overlaps that of '%S'",
                              avl__excerpt(a->name, strlen(a->name), 96));
    }
    return 1;
}

// Reverses the multi-byte fields of each block (see avl__types).
static void avl__swap_blocks(const avl__type_info *info, uint8_t *b, uint64_t n_bytes) {
    uint8_t *end = b + n_bytes, *p, t;
    int i;
    for (; b < end; b += info->block_bytes) {
        for (i = 0, p = b + info->halves[0]; i < info->halves[1]; i++, p += 2) t = p[0], p[0] = p[1], p[1] = t;
        for (i = 0, p = b + info->words[0]; i < info->words[1]; i++, p += 4) {
            t = p[0], p[0] = p[3], p[3] = t;
            t = p[1], p[1] = p[2], p[2] = t;
        }
    }
}

// A big-endian file: all tensors' data, in little-endian order, one after the other in new memory.
static int avl__gguf_convert(avl__gguf_reader *r) {
    astrovl_gguf *f = r->f;
    uint64_t total = 0, at = 0;
    int i;
    for (i = 0; i < f->tensor_names.count; i++) total += (f->tensors[i].n_bytes + 63) / 64 * 64;
    f->converted = (uint8_t *)avl__alloc_raw(total, 1);
    if (!f->converted)
        return avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory for a copy of %l bytes", (int64_t)total);
    for (i = 0; i < f->tensor_names.count; i++) {
        astrovl_tensor *t = &f->tensors[i];
        memcpy(f->converted + at, t->data, (size_t)t->n_bytes);
        avl__swap_blocks(avl__find_type(t->type), f->converted + at, t->n_bytes);
        t->data = f->converted + at;
        at += (t->n_bytes + 63) / 64 * 64;
    }
    return 1;
}

// ---- the whole file ------------------------------------------------------------------------------------------------

// Magic and version. The version's small number tells the byte order.
static int avl__gguf_read_version(avl__gguf_reader *r) {
    const uint8_t *data = r->f->file.data;
    uint64_t version;
    r->kind = "header";
    if (r->f->file.size < 4 || memcmp(data, "GGUF", 4) != 0)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "this is not a GGUF file: it does not begin with \"GGUF\"");
    r->at = 4;
    if (!avl__gguf_need(r, 4)) return 0;
    r->f->big_endian = avl__load_u16(data + 4) == 0;
    if (!avl__gguf_read(r, 4, &version)) return 0;
    if (version != 2 && version != 3)
        return avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "GGUF version %l; 2 and 3 are supported%s",
                              (int64_t)version, version == 1 ? " (convert the model again, with a new converter)" : "");
    r->f->version = (int)version;
    return 1;
}

// A count of things that take at least n bytes each.
static int avl__gguf_read_count(avl__gguf_reader *r, const char *things, uint64_t n, int *count) {
    uint64_t value;
    if (!avl__gguf_read(r, 8, &value)) return 0;
    if (value > avl__gguf_rest(r) / n || value > INT_MAX)
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it announces %l %s, too many for a file of %l bytes",
                              (int64_t)value, things, (int64_t)r->f->file.size);
    *count = (int)value;
    return 1;
}

// Room for the order of all names, which is as yet that in which they came.
static int avl__names_order_alloc(avl__names *names) {
    int i;
    names->order = (int *)avl__alloc((uint64_t)names->count, sizeof *names->order);
    for (i = 0; names->order && i < names->count; i++) names->order[i] = i;
    return names->order != NULL;
}

static int avl__names_alloc(const avl__gguf_reader *r, avl__names *names) {
    names->name = (char **)avl__alloc((uint64_t)names->count, sizeof *names->name);
    return (names->name && avl__names_order_alloc(names)) || avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
}

static void avl__names_free(avl__names *names) {
    int i;
    for (i = 0; names->name && i < names->count; i++) astrovl_free(names->name[i]);
    astrovl_free(names->name);
    astrovl_free(names->order);
}

// Sorts the names. Returns one that is there twice, or NULL.
static const char *avl__names_sort(avl__names *names) {
    int i;
    avl__sort(names->order, names->count, avl__names_order, names);
    for (i = 1; i < names->count; i++)
        if (avl__names_order(names, names->order[i - 1], names->order[i]) == 0) return names->name[names->order[i]];
    return NULL;
}

static int avl__gguf_sort_names(avl__gguf_reader *r, avl__names *names) {
    const char *twice = avl__names_sort(names);
    if (!twice) return 1;
    r->name.data = twice;
    r->name.size = strlen(twice);
    return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "the same name appears twice in the list that ends here");
}

static int avl__gguf_read_metadata(avl__gguf_reader *r) {
    astrovl_gguf *f = r->f;
    int i;
    if (!avl__names_alloc(r, &f->keys)) return 0;
    f->entries = (avl__gguf_entry *)avl__alloc((uint64_t)f->keys.count, sizeof *f->entries);
    if (!f->entries) return avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
    for (i = 0; i < f->keys.count; i++)
        if (!avl__gguf_read_entry(r, &f->entries[i], &f->keys.name[i])) return 0;
    r->field = r->at;
    return avl__gguf_sort_names(r, &f->keys);
}

static int avl__gguf_read_alignment(avl__gguf_reader *r, uint64_t *alignment) {
    int index = avl__names_find(&r->f->keys, "general.alignment");
    int64_t value = index < 0 ? 32 : astrovl_gguf_int(r->f, index, 0);
    if (value < 1 || value > AVL__GGUF_MAX_ALIGNMENT || (value & (value - 1)) != 0) {
        r->field = (uint64_t)(r->f->entries[index].values - r->f->file.data);
        r->name.data = "general.alignment";
        r->name.size = strlen(r->name.data);
        return avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it is %l, not a power of two up to %d", value,
                              AVL__GGUF_MAX_ALIGNMENT);
    }
    *alignment = (uint64_t)value;
    return 1;
}

static int avl__gguf_read_tensors(avl__gguf_reader *r, uint64_t alignment) {
    astrovl_gguf *f = r->f;
    uint64_t start;
    int i, good, *order;
    if (!avl__names_alloc(r, &f->tensor_names)) return 0;
    f->tensors = (astrovl_tensor *)avl__alloc((uint64_t)f->tensor_names.count, sizeof *f->tensors);
    if (!f->tensors) return avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
    for (i = 0; i < f->tensor_names.count; i++)
        if (!avl__gguf_read_tensor(r, &f->tensors[i], &f->tensor_names.name[i])) return 0;
    r->field = r->at;
    if (!avl__gguf_sort_names(r, &f->tensor_names)) return 0;
    start = (r->at + alignment - 1) / alignment * alignment;
    for (i = 0; i < f->tensor_names.count; i++)
        if (!avl__gguf_place_tensor(r, &f->tensors[i], start, alignment)) return 0;
    order = (int *)avl__alloc_raw((uint64_t)f->tensor_names.count, sizeof *order);
    if (!order) return avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
    memcpy(order, f->tensor_names.order, (size_t)f->tensor_names.count * sizeof *order);
    good = avl__gguf_check_overlap(r, order);
    astrovl_free(order);
    return good && (!f->big_endian || avl__gguf_convert(r));
}

static int avl__gguf_read_all(avl__gguf_reader *r) {
    uint64_t alignment = 0;
    return avl__gguf_read_version(r)
        && avl__gguf_read_count(r, "tensors", 25, &r->f->tensor_names.count)   // 25, 14: the least that one takes
        && avl__gguf_read_count(r, "metadata entries", 14, &r->f->keys.count)
        && avl__gguf_read_metadata(r)
        && avl__gguf_read_alignment(r, &alignment)
        && avl__gguf_read_tensors(r, alignment);
}

// Takes the file over: it is closed on failure too.
static astrovl_gguf *avl__gguf_new(avl__file *file, int owns_file, const char *name, astrovl_error *err) {
    astrovl_gguf *f = (astrovl_gguf *)avl__alloc(1, sizeof *f);
    avl__gguf_reader r;
    memset(&r, 0, sizeof r);
    if (f) f->name = avl__copy_text(name, strlen(name));
    if (!f || !f->name) {
        if (owns_file) avl__file_close(file);
        astrovl_free(f);
        avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory", name);
        return NULL;
    }
    f->file = *file;
    f->owns_file = owns_file;
    r.f = f;
    r.err = err;
    r.name.data = "";
    if (avl__gguf_read_all(&r)) return f;
    astrovl_gguf_close(f);
    return NULL;
}

ASTROVL_API astrovl_gguf *astrovl_gguf_open(const char *path, int no_mmap, astrovl_error *err) {
    avl__file file;
    if (avl__file_open(path, no_mmap, SIZE_MAX / 4, "GGUF", &file, err) != ASTROVL_OK) return NULL;
    return avl__gguf_new(&file, 1, path, err);
}

ASTROVL_API astrovl_gguf *astrovl_gguf_open_memory(const void *data, size_t size, const char *name,
                                                   astrovl_error *err) {
    avl__file file;
    memset(&file, 0, sizeof file);
    file.data = (const uint8_t *)data;
    file.size = size;
    if (data) return avl__gguf_new(&file, 0, name ? name : "(memory)", err);
    avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%s: no memory block was given", name ? name : "(memory)");
    return NULL;
}

ASTROVL_API void astrovl_gguf_close(astrovl_gguf *file) {
    int i;
    if (!file) return;
    for (i = 0; file->entries && i < file->keys.count; i++) astrovl_free((void *)file->entries[i].strings);
    avl__names_free(&file->keys);
    avl__names_free(&file->tensor_names);
    astrovl_free(file->entries);
    astrovl_free(file->tensors);
    astrovl_free(file->converted);
    if (file->owns_file) avl__file_close(&file->file);
    astrovl_free(file->name);
    astrovl_free(file);
}

ASTROVL_API const char *astrovl_gguf_name(const astrovl_gguf *file) { return file->name; }
ASTROVL_API int astrovl_gguf_version(const astrovl_gguf *file) { return file->version; }
ASTROVL_API int astrovl_gguf_big_endian(const astrovl_gguf *file) { return file->big_endian; }
ASTROVL_API uint64_t astrovl_gguf_size(const astrovl_gguf *file) { return file->file.size; }
ASTROVL_API int astrovl_gguf_n_tensors(const astrovl_gguf *file) { return file->tensor_names.count; }
ASTROVL_API int astrovl_gguf_n_kv(const astrovl_gguf *file) { return file->keys.count; }
ASTROVL_API const astrovl_tensor *astrovl_gguf_tensor(const astrovl_gguf *file, int index) {
    return index >= 0 && index < file->tensor_names.count ? &file->tensors[index] : NULL;
}
ASTROVL_API const astrovl_tensor *astrovl_gguf_find_tensor(const astrovl_gguf *file, const char *name) {
    return astrovl_gguf_tensor(file, avl__names_find(&file->tensor_names, name));
}
ASTROVL_API const astrovl_kv *astrovl_gguf_kv(const astrovl_gguf *file, int index) {
    return index >= 0 && index < file->keys.count ? &file->entries[index].kv : NULL;
}
ASTROVL_API int astrovl_gguf_find_kv(const astrovl_gguf *file, const char *key) {
    return avl__names_find(&file->keys, key);
}

#ifndef ASTROVL_NO_FILES
// ---- writing -------------------------------------------------------------------------------------------------------
// Metadata and the tensors' descriptions are gathered in memory, as they will stand in the file, since their number comes first
// in it; the tensors' data, which may be larger than memory, goes straight to the disk.

enum { AVL__GGUF_ALIGNMENT = 32 };

struct astrovl_gguf_writer {
    char         *path, *part;         // the file's name, and the one it has until it is finished
    FILE         *file;
    int           part_exists;
    avl__bytes    metadata, descriptions;
    avl__names    keys, tensor_names;
    uint64_t     *n_bytes;             // [tensor_names.count], of each tensor's data
    size_t        keys_capacity, names_capacity, n_bytes_capacity;
    uint64_t      offset;              // of the next tensor's data
    int           started;             // all is declared, and what stands before the data written
    int           n_whole;             // tensors whose data are written,
    uint64_t      n_written;           // and how many bytes of the next one's
    astrovl_error problem;             // the first one
};

static void avl__writer_fail(astrovl_gguf_writer *w, astrovl_status status, const char *name, const char *what) {
    if (!w->problem.status)
        avl__fail(&w->problem, status, "%S: %S%s%s", avl__excerpt(w->path, strlen(w->path), -128),
                  avl__excerpt(name, strlen(name), 96), *name ? ": " : "", what);
}

static void avl__put_number(avl__bytes *b, uint64_t value, int n) {
    char bytes[8];
    int i;
    for (i = 0; i < n; i++) bytes[i] = (char)(value >> 8 * i & 0xFF);
    avl__bytes_put(b, bytes, (size_t)n);
}

static void avl__put_string(avl__bytes *b, const char *data, size_t size) {
    avl__put_number(b, size, 8);
    avl__bytes_put(b, data, size);
}

// Writes a name's place in `list` and puts it into `names`. Returns 0 if it cannot be one.
static int avl__writer_name(astrovl_gguf_writer *w, avl__bytes *list, avl__names *names, size_t *capacity, const char *name,
                            size_t limit) {
    size_t size = name ? strlen(name) : 0;
    if (w->problem.status) return 0;
    if (w->started) avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, name ? name : "", "is declared after data were written");
    else if (size < 1 || size > limit) avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, "a name", "is empty or too long");
    else if (!avl__grow(&names->name, capacity, (size_t)names->count + 1, sizeof *names->name) ||
             !(names->name[names->count] = avl__copy_text(name, size)))
        avl__writer_fail(w, ASTROVL_ERROR_MEMORY, name, "out of memory");
    if (w->problem.status) return 0;
    names->count++;
    avl__put_string(list, name, size);
    return 1;
}

// What stands before an entry's values.
static int avl__writer_entry(astrovl_gguf_writer *w, const char *key, astrovl_value_type type, astrovl_value_type item_type,
                             uint64_t count) {
    if (avl__value_bytes(item_type) < 0 || item_type == ASTROVL_VALUE_ARRAY)
        avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, key ? key : "", "there is no such type of value");
    if (!avl__writer_name(w, &w->metadata, &w->keys, &w->keys_capacity, key, AVL__GGUF_MAX_KEY)) return 0;
    avl__put_number(&w->metadata, (uint64_t)type, 4);
    if (type == ASTROVL_VALUE_ARRAY) avl__put_number(&w->metadata, (uint64_t)item_type, 4), avl__put_number(&w->metadata, count, 8);
    return 1;
}

static void avl__writer_values(astrovl_gguf_writer *w, const char *key, astrovl_value_type type, astrovl_value_type item_type,
                               const void *values, uint64_t count) {
    const uint16_t probe = 1;
    int n = avl__value_bytes(item_type), big_endian = *(const uint8_t *)&probe == 0;   // of the host
    uint64_t i;
    if (!avl__writer_entry(w, key, type, item_type, count)) return;
    for (i = 0; i < count; i++) {
        if (item_type == ASTROVL_VALUE_STRING) {
            const astrovl_string *s = (const astrovl_string *)values + i;
            avl__put_string(&w->metadata, s->data, s->size);
        } else {
            uint64_t value = avl__load_number((const uint8_t *)values + i * (uint64_t)n, n, big_endian);
            avl__put_number(&w->metadata, item_type == ASTROVL_VALUE_BOOL ? value != 0 : value, n);
        }
    }
}

ASTROVL_API void astrovl_gguf_put(astrovl_gguf_writer *w, const char *key, astrovl_value_type type, const void *value) {
    avl__writer_values(w, key, type, type, value, 1);
}

ASTROVL_API void astrovl_gguf_put_array(astrovl_gguf_writer *w, const char *key, astrovl_value_type item_type, const void *values,
                                        uint64_t count) {
    avl__writer_values(w, key, ASTROVL_VALUE_ARRAY, item_type, values, count);
}

ASTROVL_API void astrovl_gguf_copy(astrovl_gguf_writer *w, const astrovl_gguf *from, int index) {
    const astrovl_kv *kv = astrovl_gguf_kv(from, index);
    uint64_t i;
    if (!kv || strcmp(kv->key, "general.alignment") == 0) return;
    if (!avl__writer_entry(w, kv->key, kv->type, kv->item_type, kv->count)) return;
    for (i = 0; i < kv->count; i++) {
        astrovl_value_type type = kv->item_type;
        const uint8_t *p = avl__gguf_element(from, index, i, &type);
        astrovl_string s = astrovl_gguf_string(from, index, i);
        if (type == ASTROVL_VALUE_STRING) avl__put_string(&w->metadata, s.data, s.size);
        else avl__put_number(&w->metadata, avl__gguf_load(from, p, avl__value_bytes(type)), avl__value_bytes(type));
    }
}

ASTROVL_API void astrovl_gguf_put_tensor(astrovl_gguf_writer *w, const char *name, astrovl_type type, int n_dims,
                                         const int64_t *ne) {
    const avl__type_info *info = avl__find_type(type);
    int i, good = info && n_dims >= 1 && n_dims <= 4 && ne[0] % info->block_values == 0;
    uint64_t bytes = good ? (uint64_t)info->block_bytes : 1, n;
    for (i = 0; good && i < n_dims; i++, bytes *= n) {
        n = (uint64_t)(i ? ne[i] : ne[0] / info->block_values);
        good = ne[i] > 0 && n <= (uint64_t)INT64_MAX / 2 / bytes;
    }
    if (!good) avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, name ? name : "", "no tensor has this type and shape");
    if (!avl__writer_name(w, &w->descriptions, &w->tensor_names, &w->names_capacity, name, AVL__GGUF_MAX_NAME)) return;
    if (!avl__grow(&w->n_bytes, &w->n_bytes_capacity, (size_t)w->tensor_names.count, sizeof *w->n_bytes)) {
        avl__writer_fail(w, ASTROVL_ERROR_MEMORY, name, "out of memory");
        return;
    }
    w->n_bytes[w->tensor_names.count - 1] = bytes;
    avl__put_number(&w->descriptions, (uint64_t)n_dims, 4);
    for (i = 0; i < n_dims; i++) avl__put_number(&w->descriptions, (uint64_t)ne[i], 8);
    avl__put_number(&w->descriptions, (uint64_t)type, 4);
    avl__put_number(&w->descriptions, w->offset, 8);
    w->offset += (bytes + AVL__GGUF_ALIGNMENT - 1) / AVL__GGUF_ALIGNMENT * AVL__GGUF_ALIGNMENT;
}

// Writes bytes, then zeros up to the alignment after `size` bytes in all (0: none).
static void avl__writer_out(astrovl_gguf_writer *w, const void *data, size_t n, uint64_t size) {
    static const char zeros[AVL__GGUF_ALIGNMENT] = {0};
    size_t pad = (size_t)((AVL__GGUF_ALIGNMENT - size % AVL__GGUF_ALIGNMENT) % AVL__GGUF_ALIGNMENT);
    if (w->problem.status) return;
    if ((n && fwrite(data, 1, n, w->file) != n) || (pad && fwrite(zeros, 1, pad, w->file) != pad))
        avl__writer_fail(w, ASTROVL_ERROR_FILE, "", "cannot be written (is the disk full?)");
}

// Checks what was declared, and writes it.
static void avl__writer_start(astrovl_gguf_writer *w) {
    avl__bytes head = {NULL, 0, 0, 0};
    const char *twice = NULL;
    if (w->started++) return;
    avl__bytes_put(&head, "GGUF\3\0\0", 8);
    avl__put_number(&head, (uint64_t)w->tensor_names.count, 8);
    avl__put_number(&head, (uint64_t)w->keys.count, 8);
    if (!avl__names_order_alloc(&w->keys) || !avl__names_order_alloc(&w->tensor_names) || head.failed || w->metadata.failed ||
        w->descriptions.failed) avl__writer_fail(w, ASTROVL_ERROR_MEMORY, "", "out of memory");
    else if ((twice = avl__names_sort(&w->keys)) != NULL || (twice = avl__names_sort(&w->tensor_names)) != NULL)
        avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, twice, "is declared twice");
    avl__writer_out(w, head.data, head.size, 0);
    avl__writer_out(w, w->metadata.data, w->metadata.size, 0);
    avl__writer_out(w, w->descriptions.data, w->descriptions.size, head.size + w->metadata.size + w->descriptions.size);
    astrovl_free(head.data);
}

static astrovl_status avl__writer_status(const astrovl_gguf_writer *w, astrovl_error *err) {
    if (err && w->problem.status) *err = w->problem;
    return w->problem.status;
}

ASTROVL_API astrovl_status astrovl_gguf_write(astrovl_gguf_writer *w, const void *data, size_t size, astrovl_error *err) {
    avl__writer_start(w);
    if (size == 0 || w->problem.status) return avl__writer_status(w, err);
    if (w->n_whole == w->tensor_names.count) avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, "", "all tensors have their data already");
    else if (size > w->n_bytes[w->n_whole] - w->n_written)
        avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, w->tensor_names.name[w->n_whole], "these are more data than it holds");
    if (w->problem.status) return avl__writer_status(w, err);
    w->n_written += size;
    avl__writer_out(w, data, size, w->n_written == w->n_bytes[w->n_whole] ? w->n_written : 0);
    if (w->n_written == w->n_bytes[w->n_whole]) w->n_whole++, w->n_written = 0;
    return avl__writer_status(w, err);
}

#if AVL__POSIX
static int avl__sync_file(const char *path) {   // has what was written reached the disk? (any descriptor of the file will do)
    int fd = open(path, O_RDONLY), good = fd < 0 || fsync(fd) == 0 || errno == EINVAL;   // EINVAL: this file system needs no syncing
    if (fd >= 0) close(fd);
    return good;
}
static int avl__is_no_plain_file(const char *path) {   // a folder or a device, which renaming would replace
    struct stat st;
    return stat(path, &st) == 0 && !S_ISREG(st.st_mode);
}
#else   // standard C knows of none of this
static int avl__sync_file(const char *path) { (void)path; return 1; }
static int avl__is_no_plain_file(const char *path) { (void)path; return 0; }
#endif

ASTROVL_API astrovl_status astrovl_gguf_finish(astrovl_gguf_writer *w, astrovl_error *err) {
    astrovl_status status;
    int closed;
    avl__writer_start(w);
    if (!w->problem.status && w->n_whole < w->tensor_names.count)
        avl__writer_fail(w, ASTROVL_ERROR_ARGUMENT, w->tensor_names.name[w->n_whole], "its data are not complete");
    closed = fclose(w->file) == 0;
    w->file = NULL;
    if (!w->problem.status && (!closed || !avl__sync_file(w->part)))
        avl__writer_fail(w, ASTROVL_ERROR_FILE, "", "cannot be written (is the disk full?)");
#if !AVL__POSIX
    if (!w->problem.status) remove(w->path);    // only POSIX's rename replaces
#endif
    if (!w->problem.status && rename(w->part, w->path) != 0)
        avl__writer_fail(w, ASTROVL_ERROR_FILE, "", "cannot be given this name (is it a folder, or in use?)");
    w->part_exists = w->problem.status != ASTROVL_OK;
    status = avl__writer_status(w, err);
    astrovl_gguf_discard(w);
    return status;
}

ASTROVL_API void astrovl_gguf_discard(astrovl_gguf_writer *w) {
    if (!w) return;
    if (w->file) fclose(w->file);
    if (w->part_exists) remove(w->part);
    avl__names_free(&w->keys);
    avl__names_free(&w->tensor_names);
    astrovl_free(w->metadata.data);
    astrovl_free(w->descriptions.data);
    astrovl_free(w->n_bytes);
    astrovl_free(w->path);
    astrovl_free(w->part);
    astrovl_free(w);
}

ASTROVL_API astrovl_gguf_writer *astrovl_gguf_create(const char *path, astrovl_error *err) {
    astrovl_gguf_writer *w = (astrovl_gguf_writer *)avl__alloc(1, sizeof *w);
    size_t size = path ? strlen(path) : 0;
    if (w) w->path = avl__copy_text(path ? path : "", size), w->part = (char *)avl__alloc_raw((uint64_t)size + 6, 1);
    if (!w || !w->path || !w->part) {
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for writing a file");
        astrovl_gguf_discard(w);
        return NULL;
    }
    memcpy(w->part, w->path, size);
    memcpy(w->part + size, ".part", 6);
    if (!size) avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no file name was given");
    else if (avl__is_no_plain_file(path)) avl__fail(err, ASTROVL_ERROR_FILE, "%s: is a folder or a device; name a file", path);
    else if ((w->file = fopen(w->part, AVL__POSIX ? "wbx" : "wb")) == NULL)   // x: two programs do not write the same
        avl__fail(err, ASTROVL_ERROR_FILE, "%s: %s", w->part, errno == EEXIST ? "exists: another program is writing it, or was "
                  "killed (then delete it)" : "cannot be created (no such folder, or no permission)");
    w->part_exists = w->file != NULL;
    if (w->file) return w;
    astrovl_gguf_discard(w);
    return NULL;
}

// ---- quantising a file ---------------------------------------------------------------------------------------------
// Which type a matrix gets: facts of llama.cpp's llama-quant.cpp, where they were found by measuring perplexities. Losses in
// attn_v and ffn_down cost most, and in the first and last blocks.

// Some of n blocks, by their number
enum { AVL__NO_BLOCK, AVL__FIRST_2, AVL__FIRST_4, AVL__FIRST_16TH, AVL__FIRST_8TH, AVL__ENDS_AND_THIRDS };

typedef struct avl__recipe {
    const char *name;
    int         file_type;                        // general.file_type, llama.cpp's number
    int         type;                             // of every matrix but these:
    struct { int blocks, type, rest; } v, down;   // attn_v, ffn_down: the type in some of the blocks, and in the rest
    int         attention_output, output;         // attn_output; output.weight, or token_embd.weight where it serves as both
} avl__recipe;

#define AVL__PLAIN(name, number, T) {name, number, ASTROVL_TYPE_##T, {0, 0, ASTROVL_TYPE_##T}, {0, 0, ASTROVL_TYPE_##T}, \
                                     ASTROVL_TYPE_##T, ASTROVL_TYPE_##T}
#define AVL__MIX(name, number, T, v_blocks, V, V_rest, down_blocks, DOWN, DOWN_rest, OUT) \
    {name, number, ASTROVL_TYPE_##T, {AVL__##v_blocks, ASTROVL_TYPE_##V, ASTROVL_TYPE_##V_rest}, \
     {AVL__##down_blocks, ASTROVL_TYPE_##DOWN, ASTROVL_TYPE_##DOWN_rest}, ASTROVL_TYPE_##OUT, ASTROVL_TYPE_Q6_K}
static const avl__recipe avl__recipes[] = {
    AVL__PLAIN("f32", 0, F32),   AVL__PLAIN("f16", 1, F16),   AVL__PLAIN("bf16", 32, BF16),
    AVL__PLAIN("q4_0", 2, Q4_0), AVL__PLAIN("q4_1", 3, Q4_1), AVL__PLAIN("q5_0", 8, Q5_0),  AVL__PLAIN("q5_1", 9, Q5_1),
    AVL__PLAIN("q8_0", 7, Q8_0), AVL__PLAIN("q2_k", 10, Q2_K), AVL__PLAIN("q3_k", 11, Q3_K), AVL__PLAIN("q4_k", 14, Q4_K),
    AVL__PLAIN("q5_k", 16, Q5_K), AVL__PLAIN("q6_k", 18, Q6_K),
    //                      base  attn_v: these blocks, the rest  ffn_down                       attn_output
    AVL__MIX("q3_k_s", 11, Q3_K, NO_BLOCK, Q3_K, Q3_K,            NO_BLOCK, Q3_K, Q3_K,          Q3_K),
    AVL__MIX("q3_k_m", 12, Q3_K, FIRST_2, Q5_K, Q4_K,             FIRST_16TH, Q5_K, Q4_K,        Q4_K),
    AVL__MIX("q3_k_l", 13, Q3_K, NO_BLOCK, Q5_K, Q5_K,            NO_BLOCK, Q5_K, Q5_K,          Q5_K),
    AVL__MIX("q4_k_s", 14, Q4_K, FIRST_4, Q5_K, Q4_K,             FIRST_8TH, Q5_K, Q4_K,         Q4_K),
    AVL__MIX("q4_k_m", 15, Q4_K, ENDS_AND_THIRDS, Q6_K, Q4_K,     ENDS_AND_THIRDS, Q6_K, Q4_K,   Q4_K),
    AVL__MIX("q5_k_s", 16, Q5_K, NO_BLOCK, Q5_K, Q5_K,            NO_BLOCK, Q5_K, Q5_K,          Q5_K),
    AVL__MIX("q5_k_m", 17, Q5_K, ENDS_AND_THIRDS, Q6_K, Q5_K,     ENDS_AND_THIRDS, Q6_K, Q5_K,   Q5_K),
};

static int avl__block_is_among(int blocks, int i, int n) {
    switch (blocks) {
    case AVL__FIRST_2:    return i < 2;
    case AVL__FIRST_4:    return i < 4;
    case AVL__FIRST_16TH: return i < n / 16;
    case AVL__FIRST_8TH:  return i < n / 8;
    case AVL__ENDS_AND_THIRDS: return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
    default: return 0;
    }
}

static const avl__recipe *avl__find_recipe(const char *name, astrovl_error *err) {
    char known[160] = "";
    size_t i, k, at = 0;
    for (i = 0; i < sizeof avl__recipes / sizeof *avl__recipes; i++) {
        const char *other = avl__recipes[i].name;
        for (k = 0; name && other[k] && (name[k] >= 'A' && name[k] <= 'Z' ? name[k] + 32 : name[k]) == other[k]; k++) {}
        if (name && !other[k] && !name[k]) return &avl__recipes[i];
        avl__message_put(known, sizeof known, &at, " ", i > 0);
        avl__message_put(known, sizeof known, &at, other, strlen(other));
    }
    avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no quantisation is called \"%s\"; there are: %s", name ? name : "", known);
    return NULL;
}

// "v.blk.12.attn_v.weight": block 12 of tower 1, and what follows in *rest; -1 for a tensor outside the blocks. Towers: 0
// language model, 1 vision, 2 text.
static int avl__block_of(const char *name, int *tower, const char **rest) {
    static const char *const prefixes[] = {"blk.", "v.blk.", "t.blk."};
    int block = 0;
    for (*tower = 0; *tower < 3; ++*tower) {
        size_t n = strlen(prefixes[*tower]);
        if (strncmp(name, prefixes[*tower], n) != 0) continue;
        for (name += n; *name >= '0' && *name <= '9' && block < 100000; name++) block = block * 10 + (*name - '0');
        *rest = name + 1;
        return *name == '.' ? block : -1;
    }
    return -1;
}

// Is it a weight matrix, which may be stored with fewer bits?
static int avl__is_quantizable(const astrovl_tensor *t) {
    size_t n = strlen(t->name);
    return t->ne[1] * t->ne[2] * t->ne[3] > 1 && n > 7 && strcmp(t->name + n - 7, ".weight") == 0 && !strstr(t->name, "_norm.") &&
           !strstr(t->name, "position_embd") && !strstr(t->name, "patch_embd") && !strstr(t->name, "ffn_gate_inp");
}

// 70B models: 80 blocks, whose heads share keys and values.
static int avl__is_70b(const astrovl_gguf *in, int n_blocks) {
    int heads = astrovl_gguf_find_kv(in, "llama.attention.head_count");
    int shared = astrovl_gguf_find_kv(in, "llama.attention.head_count_kv");
    return n_blocks == 80 && shared >= 0 && astrovl_gguf_int(in, shared, 0) != astrovl_gguf_int(in, heads, 0);
}

// What a recipe asks for. n_blocks: [3], of each tower
static int avl__recipe_type(const avl__recipe *r, const astrovl_gguf *in, const int *n_blocks, const astrovl_tensor *t) {
    const char *part = "";
    int tower, type, block = avl__block_of(t->name, &tower, &part), n = block < 0 ? 0 : n_blocks[tower];
    if (strcmp(t->name, "output.weight") == 0) return r->output;
    if (strcmp(t->name, "token_embd.weight") == 0) return astrovl_gguf_find_tensor(in, "output.weight") ? r->type : r->output;
    if (block < 0) return r->type;
    if (avl__begins(part, "ffn_down")) return avl__block_is_among(r->down.blocks, block, n) ? r->down.type : r->down.rest;
    if (avl__begins(part, "attn_out")) return r->attention_output;
    if (!avl__begins(part, "attn_v.")) return r->type;
    type = avl__block_is_among(r->v.blocks, block, n) ? r->v.type : r->v.rest;
    if (r->output == r->type || type == ASTROVL_TYPE_Q6_K || tower != 0 || !avl__is_70b(in, n)) return type;
    return ASTROVL_TYPE_Q5_K;   // attn_v is small there, and worth it
}

// The type itself, or one as good whose blocks fit into rows of n values.
static int avl__type_for_rows(int type, int64_t n) {
    if (n % avl__find_type(type)->block_values == 0) return type;
    if (n % 32 != 0) return ASTROVL_TYPE_F16;
    return type == ASTROVL_TYPE_Q4_K ? ASTROVL_TYPE_Q5_0 : type == ASTROVL_TYPE_Q5_K ? ASTROVL_TYPE_Q5_1 :
           type == ASTROVL_TYPE_Q6_K ? ASTROVL_TYPE_Q8_0 : ASTROVL_TYPE_Q4_0;
}

// Chooses all types, and declares what the new file holds. types: out, [n_tensors]
static void avl__quantize_declare(astrovl_gguf_writer *w, const astrovl_gguf *in, const avl__recipe *recipe, int *types,
                                  astrovl_quantize_report *report) {
    int n_blocks[3] = {0, 0, 0};
    uint32_t file_type = (uint32_t)recipe->file_type, version = 2;
    const char *rest;
    int i, tower, n = astrovl_gguf_n_tensors(in);
    for (i = 0; i < n; i++) {
        int block = avl__block_of(in->tensors[i].name, &tower, &rest);
        if (block >= 0 && n_blocks[tower] <= block) n_blocks[tower] = block + 1;
    }
    for (i = 0; i < astrovl_gguf_n_kv(in); i++) {
        const char *key = astrovl_gguf_kv(in, i)->key;
        if (strcmp(key, "general.file_type") != 0 && strcmp(key, "general.quantization_version") != 0) astrovl_gguf_copy(w, in, i);
    }
    astrovl_gguf_put(w, "general.file_type", ASTROVL_VALUE_U32, &file_type);
    astrovl_gguf_put(w, "general.quantization_version", ASTROVL_VALUE_U32, &version);
    for (i = 0; i < n; i++) {
        const astrovl_tensor *t = &in->tensors[i];
        int wanted = avl__is_quantizable(t) ? avl__recipe_type(recipe, in, n_blocks, t) : (int)t->type;
        types[i] = avl__type_for_rows(wanted, t->ne[0]);
        report->n_fallbacks += types[i] != wanted;
        report->n_changed += types[i] != (int)t->type;
        report->n_requantized += types[i] != (int)t->type && avl__find_type(t->type)->block_values > 1 &&
                                 avl__find_type(types[i])->block_values > 1;
        astrovl_gguf_put_tensor(w, t->name, (astrovl_type)types[i], t->n_dims, t->ne);
    }
    report->n_tensors = n;
}

// A tensor goes through in chunks, each chunk in pieces that the threads share. Both are multiples of every type's block, and
// blocks do not depend on each other.
#define AVL__PIECE_VALUES (1 << 14)
#define AVL__CHUNK_VALUES (1 << 20)

typedef struct avl__quantize_job {
    astrovl_gguf_writer  *w;
    avl__pool            *pool;
    astrovl_progress      progress;
    void                 *user;
    int                   done, total;    // tensors
    const astrovl_tensor *t;              // the tensor in work, and what it becomes
    int                   type;
    int64_t               first, n;       // the chunk: n values from `first` on
    float                *values;         // [n_threads][PIECE_VALUES]
    uint8_t              *blocks;         // the chunk's, as they will be
} avl__quantize_job;

static void avl__quantize_piece(void *context, int item, int thread) {
    const avl__quantize_job *job = (const avl__quantize_job *)context;
    int64_t at = (int64_t)item * AVL__PIECE_VALUES, n = job->n - at < AVL__PIECE_VALUES ? job->n - at : AVL__PIECE_VALUES;
    float *values = job->values + (size_t)thread * AVL__PIECE_VALUES;
    const uint8_t *data = (const uint8_t *)job->t->data + astrovl_type_row_bytes(job->t->type, job->first + at);
    avl__dequantize_row(job->t->type, data, values, n);
    avl__quantize_row(job->type, values, job->blocks + astrovl_type_row_bytes(job->type, at), n);
}

static astrovl_status avl__quantize_tensor(avl__quantize_job *job, astrovl_error *err) {
    int64_t total = job->t->ne[0] * job->t->ne[1] * job->t->ne[2] * job->t->ne[3];
    astrovl_status status = ASTROVL_OK;
    for (job->first = 0; job->first < total && !status; job->first += job->n) {
        const uint8_t *blocks = job->blocks;
        job->n = total - job->first < AVL__CHUNK_VALUES ? total - job->first : AVL__CHUNK_VALUES;
        if (job->progress && job->progress(job->user, "tensors", job->done, job->total))
            return avl__fail(err, ASTROVL_CANCELLED, "%s: quantising was cancelled", job->w->path);
        if (job->type == (int)job->t->type) blocks = (const uint8_t *)job->t->data + astrovl_type_row_bytes(job->type, job->first);
        else avl__pool_run(job->pool, avl__quantize_piece, job, (int)((job->n + AVL__PIECE_VALUES - 1) / AVL__PIECE_VALUES));
        status = astrovl_gguf_write(job->w, blocks, astrovl_type_row_bytes(job->type, job->n), err);
    }
    return status;
}

ASTROVL_API astrovl_status astrovl_quantize_file(const astrovl_gguf *in, const char *out_path, const char *recipe, int n_threads,
                                                 astrovl_progress progress, void *user, astrovl_quantize_report *report,
                                                 astrovl_error *err) {
    const avl__recipe *r = avl__find_recipe(recipe, err);
    astrovl_quantize_report counts = {0, 0, 0, 0};
    astrovl_status status = ASTROVL_OK;
    astrovl_error failure;
    avl__quantize_job job;
    int *types;
    if (!r) return ASTROVL_ERROR_ARGUMENT;
    memset(&job, 0, sizeof job);
    job.progress = progress;
    job.user = user;
    job.total = astrovl_gguf_n_tensors(in);
    job.w = astrovl_gguf_create(out_path, &failure);
    if (!job.w) return avl__fail(err, failure.status, "%s", failure.message);
    job.pool = avl__pool_new(n_threads > 0 ? n_threads : avl__n_processors());
    types = (int *)avl__alloc_raw((uint64_t)job.total, sizeof *types);
    job.values = job.pool ? avl__alloc_floats((uint64_t)avl__pool_n_threads(job.pool) * AVL__PIECE_VALUES) : NULL;
    job.blocks = (uint8_t *)avl__alloc_raw(AVL__CHUNK_VALUES, sizeof(float));   // no type takes more
    if (!types || !job.values || !job.blocks) {
        status = ASTROVL_ERROR_MEMORY;
        avl__fail(err, status, "out of memory for quantising");
    } else {
        avl__quantize_declare(job.w, in, r, types, &counts);
    }
    for (; job.done < job.total && !status; job.done++) {
        job.t = &in->tensors[job.done];
        job.type = types[job.done];
        status = avl__quantize_tensor(&job, err);
    }
    avl__pool_free(job.pool);
    astrovl_free(types);
    astrovl_free(job.values);
    astrovl_free(job.blocks);
    if (status) astrovl_gguf_discard(job.w);
    else status = astrovl_gguf_finish(job.w, err);
    if (!status && progress) progress(user, "tensors", job.total, job.total);
    if (!status && report) *report = counts;
    return status;
}
#endif

// ---- weights across files ------------------------------------------------------------------------------------------
// A model may lie in one file or in several; a tensor or key is looked for in each, in the order they were given. Matrices
// are used where they lie; vectors and position tables are expanded to float32 once and owned here.

typedef struct avl__weights {
    astrovl_gguf **files;          // [n_files], owned
    int            n_files;
    float        **vectors;        // [n_vectors], owned
    size_t         n_vectors, vectors_capacity;
    const astrovl_open_options *options;   // while a model is being opened
    int            n_problems;     // that options->on_problem was told
} avl__weights;

static void avl__weights_free(avl__weights *w) {
    size_t i;
    int f;
    for (i = 0; i < w->n_vectors; i++) astrovl_free(w->vectors[i]);
    astrovl_free(w->vectors);
    for (f = 0; f < w->n_files; f++) astrovl_gguf_close(w->files[f]);
    astrovl_free(w->files);
    memset(w, 0, sizeof *w);
}

// As avl__fail, of a model whose parts do not make one. Where the caller wants to know all problems, he is told this one, and
// loading goes on as if all were well; what is unknown then stays 0.
static astrovl_status avl__problem(avl__weights *w, astrovl_error *err, astrovl_status status, const char *format, ...) {
    astrovl_error problem;
    va_list args;
    va_start(args, format);
    avl__format_v(problem.message, sizeof problem.message, format, args);
    va_end(args);
    if (!w->options || !w->options->on_problem) return avl__fail(err, status, "%s", problem.message);
    w->options->on_problem(w->options->user, problem.message);
    w->n_problems++;
    return ASTROVL_OK;
}

static const astrovl_tensor *avl__find_tensor(const avl__weights *w, const char *name, const astrovl_gguf **file) {
    int f;
    for (f = 0; f < w->n_files; f++) {
        const astrovl_tensor *t = astrovl_gguf_find_tensor(w->files[f], name);
        if (t) {
            if (file) *file = w->files[f];
            return t;
        }
    }
    return NULL;
}

// The file that has tensors whose names begin so; NULL when none has.
static const astrovl_gguf *avl__find_part(const avl__weights *w, const char *start) {
    int f, i;
    for (f = 0; f < w->n_files; f++)
        for (i = 0; i < w->files[f]->tensor_names.count; i++)
            if (avl__begins(w->files[f]->tensor_names.name[i], start)) return w->files[f];
    return NULL;
}

// The file that has a key, with its index there; NULL when none has.
static const astrovl_gguf *avl__find_key(const avl__weights *w, const char *key, int *index) {
    int f;
    for (f = 0; f < w->n_files; f++)
        if ((*index = astrovl_gguf_find_kv(w->files[f], key)) >= 0) return w->files[f];
    return NULL;
}

static astrovl_string avl__key_string(const avl__weights *w, const char *key) {
    astrovl_string none = {"", 0};
    int index;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    return file && astrovl_gguf_kv(file, index)->type == ASTROVL_VALUE_STRING ? astrovl_gguf_string(file, index, 0) : none;
}

static double avl__key_float(const avl__weights *w, const char *key, double fallback) {
    int index;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    return file ? astrovl_gguf_float(file, index, 0) : fallback;
}

// An integer that must lie in min..max; fallback (if >= 0) stands in for an absent key.
static astrovl_status avl__key_int(avl__weights *w, const char *key, int64_t min, int64_t max, int64_t fallback, int *value,
                                   astrovl_error *err) {
    int index;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    int64_t v = file ? astrovl_gguf_int(file, index, 0) : fallback;
    if (!file && fallback < 0)
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: the key %s is missing; is the file that holds it among those given?",
                            astrovl_gguf_name(w->files[0]), key);
    if (v < min || v > max)
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: %s is %l; it must lie between %l and %l",
                            astrovl_gguf_name(file ? file : w->files[0]), key, v, min, max);
    *value = (int)v;
    return ASTROVL_OK;
}

// Writes "[4096, 32]", a tensor's shape slowest first, into text.
static void avl__describe_shape(const astrovl_tensor *t, char *text, size_t capacity) {
    char part[32];
    size_t at = 0;
    int d;
    text[0] = 0;
    for (d = t->n_dims - 1; d >= 0; d--) {
        avl__format(part, sizeof part, "%s%l%s", d == t->n_dims - 1 ? "[" : ", ", t->ne[d], d == 0 ? "]" : "");
        avl__message_put(text, capacity, &at, part, strlen(part));
    }
}

static astrovl_status avl__missing_tensor(avl__weights *w, const char *name, astrovl_error *err) {
    return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: the tensor %s is missing; is the file that holds it among those given?",
                        astrovl_gguf_name(w->files[0]), name);
}

// Expands a tensor of `count` values (0: their number is unknown, after problems) to float32.
static astrovl_status avl__load_vector(avl__weights *w, const char *name, int64_t count, const float **out, astrovl_error *err) {
    const astrovl_gguf *file = NULL;
    const astrovl_tensor *t = avl__find_tensor(w, name, &file);
    int64_t total = 1;
    float *values;
    int d;
    if (!t) return avl__missing_tensor(w, name, err);
    if (!count) return ASTROVL_OK;
    for (d = 0; d < t->n_dims; d++) total *= t->ne[d];   // the reader has checked that this does not overflow
    if (total != count) {
        char shape[96];
        avl__describe_shape(t, shape, sizeof shape);
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: tensor %s is %s; the model's keys ask for %l values",
                            astrovl_gguf_name(file), name, shape, count);
    }
    values = avl__alloc_floats((uint64_t)count);
    if (!values || !avl__grow(&w->vectors, &w->vectors_capacity, w->n_vectors + 1, sizeof *w->vectors)) {
        astrovl_free(values);
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory for tensor %s", astrovl_gguf_name(file), name);
    }
    w->vectors[w->n_vectors++] = values;
    avl__dequantize_row(t->type, t->data, values, count);
    *out = values;
    return ASTROVL_OK;
}

// The same for a tensor that may be absent: *out is then NULL.
static astrovl_status avl__load_optional_vector(avl__weights *w, const char *name, int64_t count, const float **out,
                                                astrovl_error *err) {
    *out = NULL;
    return avl__find_tensor(w, name, NULL) ? avl__load_vector(w, name, count, out, err) : ASTROVL_OK;
}

// Points `linear` at PREFIX.weight [n_out][n_in] (further dimensions folded into n_in) and expands PREFIX.bias, if there is one.
// A size of 0 is unknown, after problems.
static astrovl_status avl__load_linear(avl__weights *w, const char *prefix, int n_in, int n_out, avl__linear *linear,
                                       astrovl_error *err) {
    char name[128], shape[96];
    const astrovl_gguf *file = NULL;
    const astrovl_tensor *t;
    int64_t row = 1;
    int d;
    avl__format(name, sizeof name, "%s.weight", prefix);
    t = avl__find_tensor(w, name, &file);
    if (!t) return avl__missing_tensor(w, name, err);
    for (d = 0; d < t->n_dims - 1; d++) row *= t->ne[d];
    if (!n_in || !n_out) return ASTROVL_OK;
    if (t->n_dims < 2 || row != n_in || t->ne[t->n_dims - 1] != n_out) {
        avl__describe_shape(t, shape, sizeof shape);
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: tensor %s is %s; the model's keys ask for [%d, %d]",
                            astrovl_gguf_name(file), name, shape, n_out, n_in);
    }
    linear->weight = t->data;
    linear->type = t->type;
    linear->n_in = n_in;
    linear->n_out = n_out;
    linear->row_bytes = (size_t)(t->n_bytes / (uint64_t)n_out);   // whole blocks: every row of ne[0] is
    avl__format(name, sizeof name, "%s.bias", prefix);
    return avl__load_optional_vector(w, name, n_out, &linear->bias, err);
}

// A matrix whose number of rows only the file knows.
static astrovl_status avl__load_tall_linear(avl__weights *w, const char *prefix, int n_in, avl__linear *linear, astrovl_error *err) {
    char name[128];
    const astrovl_gguf *file = NULL;
    const astrovl_tensor *t;
    avl__format(name, sizeof name, "%s.weight", prefix);
    t = avl__find_tensor(w, name, &file);
    if (t && (t->n_dims != 2 || t->ne[1] > 1 << 20))
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: tensor %s is no matrix", astrovl_gguf_name(file), name);
    return avl__load_linear(w, prefix, n_in, t ? (int)t->ne[1] : 0, linear, err);
}

// ====================================================================================================================
// [7] Text
// Text to token ids and back, by the vocabulary and the rules that a GGUF file carries in its tokenizer.ggml.* keys.
//   llama  SentencePiece's BPE (Kudo & Richardson 2018): of all adjacent pairs that form a piece of the vocabulary, the
//          one with the best score is merged, again and again. A space is U+2581; what no piece spells goes as bytes.
//   gpt2   byte-level BPE (Radford et al. 2019): a regular expression cuts the text into words; in each, the pair that
//          stands first in a list of merges is merged, again and again. Any byte is a symbol, so nothing is unknown.
//   CLIP's text tower has a byte-level BPE of its own kind: the text is composed and lower-cased first, white space is
//          dropped, and a word's last byte is a symbol of its own ("y</w>").
// Ids equal those of transformers: LlamaTokenizer with legacy=True, CLIPTokenizer, and the `tokenizers` package for
// byte-level BPE.
// The regular expressions are written out by hand, over tables of Unicode's letters and numbers. Both kinds merge
// through one heap, so a text of n characters takes O(n log n) time, with spaces in it or without.
// ====================================================================================================================

// ---- UTF-8 ---------------------------------------------------------------------------------------------------------

#define AVL__UTF8_BAD (-1)   // no character starts with these bytes
#define AVL__UTF8_CUT (-2)   // a character starts here, but the text ends within it

#define AVL__REPLACEMENT "\xEF\xBF\xBD"   // U+FFFD
#define AVL__SPACE_MARK  "\xE2\x96\x81"   // U+2581, SentencePiece's space

// The code point at the start of text (size > 0), and in *length its bytes. Overlong forms and surrogates are BAD. For
// BAD and CUT *length is the longest piece that could have begun a character, at least 1: what a decoder replaces by
// one U+FFFD (the Unicode Standard 3.9, "maximal subpart"; Python's errors="replace").
static int32_t avl__utf8_read(const char *text, size_t size, size_t *length) {
    const uint8_t *s = (const uint8_t *)text;
    uint32_t c = s[0], low = 0x80, high = 0xBF;   // the second byte's range is narrower after four of the first bytes
    size_t n, i;
    *length = 1;
    if (c < 0x80) return (int32_t)c;
    if (c < 0xC2 || c > 0xF4) return AVL__UTF8_BAD;
    n = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (c == 0xE0) low = 0xA0;
    if (c == 0xED) high = 0x9F;
    if (c == 0xF0) low = 0x90;
    if (c == 0xF4) high = 0x8F;
    c &= 0x7Fu >> n;
    for (i = 1; i < n; i++) {
        *length = i;
        if (i == size) return AVL__UTF8_CUT;
        if (s[i] < low || s[i] > high) return AVL__UTF8_BAD;
        c = c << 6 | (s[i] & 0x3Fu);
        low = 0x80, high = 0xBF;
    }
    *length = n;
    return (int32_t)c;
}

// Writes a code point (below 0x110000, no surrogate) as UTF-8; returns its length.
static size_t avl__utf8_write(uint32_t c, char *text) {
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4, i;
    for (i = n - 1; i > 0; i--, c >>= 6) text[i] = (char)(0x80 | (c & 0x3F));
    text[0] = (char)(lead[n == 1 ? 0 : n] | c);
    return n;
}

// Tokens end anywhere, characters too: the gate lets whole characters through and holds back the first bytes of one.
// Bytes that belong to no character come out as U+FFFD, as from Python's incremental decoder with errors="replace".
typedef struct avl__utf8_gate {
    char   pending[4];
    size_t n_pending;      // at most 3 between calls
} avl__utf8_gate;

// Appends to out what may be shown now. A gate starts as all zeros.
static void avl__utf8_gate_put(avl__utf8_gate *gate, const char *bytes, size_t size, avl__bytes *out) {
    size_t i, length;
    for (i = 0; i < size; i++) {
        gate->pending[gate->n_pending++] = bytes[i];
        while (gate->n_pending) {
            int32_t c = avl__utf8_read(gate->pending, gate->n_pending, &length);
            if (c == AVL__UTF8_CUT) break;
            if (c == AVL__UTF8_BAD) avl__bytes_put(out, AVL__REPLACEMENT, 3);
            else avl__bytes_put(out, gate->pending, length);
            gate->n_pending -= length;
            memmove(gate->pending, gate->pending + length, gate->n_pending);
        }
    }
}

// The end of the text: a character that never became whole is one U+FFFD.
static void avl__utf8_gate_flush(avl__utf8_gate *gate, avl__bytes *out) {
    if (gate->n_pending) avl__bytes_put(out, AVL__REPLACEMENT, 3);
    gate->n_pending = 0;
}

// ---- classes of characters -----------------------------------------------------------------------------------------
// \p{L} and \p{N} of Unicode 16.0, the version of the engine in `tokenizers` 0.23; test/make_golden.py
// (tokens_class_tables) asked that engine about every code point and wrote these strings. A set of characters is the
// sorted list of code points where membership changes, from outside to inside and back. Stored are the differences of
// that list, in base 26: a capital letter is a digit with more to follow, a small letter the last one ("Cn" is 2 * 26 +
// 13 = 65, the letter A).

#define AVL__LETTER_BOUNDS 1354
#define AVL__NUMBER_BOUNDS 288

static const char avl__letter_table[] =
    "CnBagBaBvbkbebfxbBfbRqemofhbbbEzfbccebbgbbdbbbubDfbFjiGkbBmcbgBpCtBbeeBtBrBjcbDvbbpchckdcbqbbBeBdDllbyBhjcebfweb"
    "jbdbxzhlfybgrBqCgCcdbsbhkpqeicccwbhbbdedbqbncbdockbigeccwbhbcbcbcBfebbtdqjbdbwbhbcbfdbsbpcxblicccwbhbcbfdbBecbdp"
    "brbbgddbedcbbbcdcdddmwbCaibdbxbqdbBadcbccBebeibdbxbkbfdbBfcbcpcrjbdbBpcbqbfdidygfsdybjbbchCgBwbcmhCgcbbbfbybbbkb"
    "cjbcfbbveBgbClibBkBbfElBrubqgeedbdchdenmbrBmbbfbcBrbMvbechbbbecBpbecBhbechbbbecpbCfbecCpBlqqDicgdXwcrbBafCxgihsn"
    "tosonbdpCaBjbebCpDlhfcBibbfCskBfBxBecflBseBaCcxjCbDebDpBvriCcBenckBsBaBkBpdkBkclfBrcdBpebgbcdbfHkCmKscgcBmcgcibb"
    "bbbbbBfcCbbhbbddbhdecgenfdbhEmbnbqnDxbebckbbdfgbbbbbbeblceffebCacDZfIvgedcmBmbbfbcCehbqxjhbhbhbhbhbhbhbhDcbSbcBq"
    "ffceDigdbDmbefBrbDqrBgBwqTsJToCmBGUfCpBucKjdqkcuBvqBfcCsBxjcDzcCpccbbbivqbdbebxBdCaoByCkgdbbclBckxzBdhBvBcbqfbkk"
    "fbBpxdbiuxdbdBybbdccfcbbbydclhdmgcgcgjhbhbBrbogElBdQNsmxeBxMNcOccEcBmhmffbbkbnbfbbbcbcbEeBhNzsCmcCcBomEmfbFfBkBa"
    "gBalDldgcgcgcdBjmbBabtbcbpcoBiEtOzBddBxBvBgnubigBmkBecBkeiBwGcsBkeBkeBoiCamlbpbhbcblbpbhbcdCamLzjwkiygbBqbjCrgcb"
    "bBsbcdbcxkxjBfCntbckwkBaCsCegcCmbpebdbBdBqBddBdBjibBcBbCckwktnsEgCvCdBznBznBkBmBcjxJqBqgcqdChBdkbiwBqsBuvBbxmCbC"
    "fccbnBtBgzBaBkBdbcbiBjdbmBwoevbbbBjsbztcClhbbbebpbkhBvBmicccwbhbcbfdbsbmfBekbbcbbBmbbzbbbBsCbseudBeBwucbbHcBvBpe"
    "BkBwubChBrnbCtBbBlhHdBsEmCmBficbcibcbypbbbDqicBnqbbbBcbkBohbvblButbsCvHrBhBfjbBlrbBxBeEihbcbBmvbzgbcbBgobMptpbbn"
    "bBiEubDbBJmIwHoDXkDtpBPgrgzFXrfWlKDdBeCPuVxhBfrDbrBesBwqeBfvftQqBtIdCmEyCxfbConCmcbbBcJCaiBVqBpkNFrebhbcbLfpbBdd"
    "cboeiPgDKuEdfndjhkIWkDhbCtbccbcccebmbbbhbCnbecibhbBcbebfbbdhbNcczbzbBfbzbBfbzbBfbzbBfbzbiCSyBfggKbCkFqBtkhqbMjBe"
    "sBsSqBcIuBecbTbhbebcbpbHpChCqhbBUiebBbbcbbcbbkbebbbbgbebbbbbbdbcbbcbbbbbbbbbbcbbcebhbebebbbkbrfdbfbrGOaCLFcBgGDu"
    "gIocINqoLBlpXyDQwUwCFyHHzfGFg";

static const char avl__number_table[] =
    "BwkEqcfbcdCDlkFekHqkPwkEokegEekEokEokcgEgnElkihDzkEahhtEfkDskEokCsuKikCskBBruBHxdJfkgkwkLokEylGjkgkHakDikFekgkBO"
    "gbdggkHqBzcfBByCiDawYgBeCBhbBDxbzjodNfeFikBeibpBgkBnpBRSakHgkMigFykBmkHqkwkDikPqkBFMckSzBtmCfrcNdBbBkeBdbibFefHu"
    "kBKgizhBnjCxfwgGeccqcBuCmjCacBedCxfEaiyiBphMsgBwkgkKsBfGckBqeEihFeBeEykCikFokhuJrkNekEokOkkDykguCymQetDpkZmkDiBd"
    "ItkCskQgkDyvBPbEhXAfkDMckDikFekbhUgkKcxBJSzkCEwumuEezBQrByDNckQgkTikJnkBBojEykBElChbdbeCyBtbpBLanEDfk";

// The next number of a table; *at moves behind it.
static uint32_t avl__table_number(const char **at) {
    uint32_t number = 0;
    while (**at >= 'A' && **at <= 'Z') number = number * 26 + (uint32_t)(*(*at)++ - 'A');
    return number * 26 + (uint32_t)(*(*at)++ - 'a');
}

// The same for numbers of both signs, stored as 0, -1, 1, -2, 2 ...
static int32_t avl__table_signed(const char **at) {
    uint32_t n = avl__table_number(at);
    return n & 1 ? -(int32_t)(n / 2) - 1 : (int32_t)(n / 2);
}

// Fills bounds[n] from a table.
static void avl__expand_table(const char *table, uint32_t *bounds, int n) {
    uint32_t bound = 0;
    int i;
    for (i = 0; i < n; i++) bounds[i] = bound += avl__table_number(&table);
}

// A code point is inside if the count of bounds not above it is odd.
static int avl__in_bounds(uint32_t c, const uint32_t *bounds, int n) {
    int low = 0, high = n;   // bounds[0..low) <= c < bounds[high..n)
    while (low < high) {
        int middle = (low + high) / 2;
        if (bounds[middle] <= c) low = middle + 1;
        else high = middle;
    }
    return low & 1;
}

typedef enum avl__class {
    AVL__CLASS_END, AVL__CLASS_OTHER, AVL__CLASS_LETTER, AVL__CLASS_NUMBER, AVL__CLASS_SPACE
} avl__class;

// \s: Unicode's White_Space property.
static int avl__is_white_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// A growing list of token ids (or code points). All zeros is an empty one; release data with astrovl_free.
typedef struct avl__tokens {
    int32_t *data;
    size_t   size, capacity;
} avl__tokens;

static int avl__tokens_put(avl__tokens *tokens, int32_t id) {   // 0: memory is out
    if (!avl__grow(&tokens->data, &tokens->capacity, tokens->size + 1, sizeof *tokens->data)) return 0;
    tokens->data[tokens->size++] = id;
    return 1;
}

// ---- cleaning, for CLIP --------------------------------------------------------------------------------------------
// CLIP's text is composed (Unicode's normalisation form C: "e" and a combining acute become one character; Unicode
// Standard Annex 15) and lower-cased. Again test/make_golden.py (tokens_clean_tables) asked the engine in `tokenizers`.
// The tables hold numbers in base 26 as above; a number of either sign is stored as 0, -1, 1, -2, 2 ...
//   lower case   runs: first (less the last run's), 2 * (count - 1) + (stride - 1), lower less capital (signed)
//   classes      runs of marks: first (less the last run's), count, canonical combining class
//   seconds      the characters that stand second in a pair (signed differences)
//   pairs        whole (less the last one), its first character (signed difference), and 0 if that is all of it, else
//                1 + 2 * the second's number + (1 if the pair is composed again, which a few are not)

#define AVL__LOWER_RUNS 185
#define AVL__MARK_RUNS  334
#define AVL__SECONDS    84
#define AVL__PAIRS      2060

static const char avl__lower_table[] =
    "CnByCmExBsCmymCmBoBvcByfchpcrBtcBuaJhbfciaQebdceaPwbacccPucacdaGcbaPobaPqbaccaPubaPycaQgbaQcbaceaQgbaQkcaQmbfcga"
    "QubaccaQudaccaQubacccQscdceaQwbaceaciaebaccaebaccaebrctrctaebdceaHlbaEhbBncBoaJzcrcyaBFYkbaccaMnbaBFYedaccaOzbaF"
    "ibaFmbjcLmdcgacjaIyhaCyceCweaEyccEwdBgCmsqCmBsaqjxcBcaEpdaccanbacdeJzdBeGeqCkCmDcBhcBqCbcCcaBebncpDrcDtCwDsEIpCw"
    "VMuBnaVMugaVMuBBvGcEKZoDckqDGrachDgIXjBteIXjMlFtcGcaWNtcDrcEaopqkpqopqopqkprhppopBgopqopqopqcpccFrcarmgGpearmcpc"
    "cHrocpccIpcanmcJvccJrcarLmaWGfeaYUvbaYLnhaCeBuBeBgBjacBFnByCaCTuDqDsDsaccaBFUjbaLHjbaBFTddfcgaBFXfbaBFUvbaBFXlba"
    "BFXjcacdacjcBFZxcDvcEddchacBTYkBtcCmBbcGgncqCjcCtdceaEANvbjcnaccaEVChddcgtcuaEVElbaEVFhbaEVEzbaEVEfbaEVElcaEVApb"
    "aEVClbaEVAvbaCTkbpcqaDrbaEVEjbaEARvbdceaEVHdbpcqaEVXxzacBHAiByCmBVzDaDcGuCsDcHkuDamBcDaqmDaicDaCQeDwEyIaBqCmEHkC"
    "kCmBGLcCkCmDsBwCcBUIyCoCq";

static const char avl__mark_table[] =
    "BDovIwvbIybeImebIybbIibfImfcHuceImecHuclImlfbfeImedIwfbIwdbJgbbIwbdImddIwdcImddIwdeImebIwbbIybcImcbIwbbIzbcJacbI"
    "zbcJacbIzbnIwLcfIwKkbImbeIwebImbdIwdbIobbImbgIwggImgcIwcbImbcIwcbIobbIubbIwbbkbblbbmbbnbbobbpbbqbbrbbsbctcbubbvb"
    "bwcbxcbybbzcbIwbbImcbsCviIwibBebbBfbbBgBxbBbbbBcbbBdbbBebbBfbbBgbbBhbbBibcIwccImcfIwfbImbcIwcbImrbBjDyhIwjeIwebI"
    "mbbIwdcIwdbImbcIwcbImBkbBkBfbIwbbImbcIwcbImbcIwcdImdbIwbcImcbIwbbImbdIwdbImbbIwbbImbbIwbbImbbIwbbImbcIwGghIwhbIm"
    "bbIwBjeIwfjIwkdIwefIwBwdImEtoIwpbImbcIwcbImbcIwcbImbdIwddImdbBbbbBcbbBdbdIwdbImbcIwccImcfIwCnbhrbjebIwbbImbcIwEb"
    "bhrbjEhbhrbjEhbhrbjEhbhrbjEybjEybjibDgbbDnDybhrbjEybjEvbjEgcDzcbjoeEdEicEoqeEsDccImBdbImcbImcbIiCebEzbbFacbFcgeF"
    "agbFaccIwcbjccIwCmbImEjbhccjDgbImBBsdIwBKpbjBgbjGcbjlbIwHwbIuFobIobbIwbbImImbIwbbImCubjviIwkbImBxfIwfgImgcIwcbIm"
    "EpbhqbjBnbIwbbImbhIwCjcjCibhmcjCrbhFxdIwebbbfImfcIwceImebIwchblbImhbIwecIwHscIwcbImbhIwhbImbcIwcbJabbIgbbImbbHub"
    "BlIwBqbIwbbIzbbImbbIwbbImBBtcIwccbceIwedbdcIwgbIwecbcbIwbbImbbIwbcbceImebIwEOddIwFobjDtBgIwWobIkbbIubbIybbIobcIq"
    "EdciBSQgbIwfkIwBqcIwDecIwKsbjHibjBcsIwCxdImBobjDsbhnbjJgbIwccIwcbImdcIwhcIwdbIwCbbjJnbjBDZtbBaBDqhIwhhImhcIwBLnb"
    "ImItbImFufIwCMxbImcbIwBpbIwbbbbbImfbjGkbIwbbImCAybjCfbjCgbjbbhCsdIwBzcjCmbhCzbjkbhEdbjbbhGxbhbbjDebhrbjzhIwkfIwI"
    "cbjebhEubjbbhJsbjbbhExbjEpbjbbhEmbjBYabjBDUvfbCmhIwBEVubbHWpcIicdbgbIsbfIiniImkfIwfcImBgeIwFwdIwFFihIwirIwthIwic"
    "IwdfIwDHihImEmgIwgbh";

static const char avl__second_table[] =
    "CHcccckeCgCreCqCnkbBgxeBqCKoccCFeKaByCbJwVsBvByCbLyBxLsJucBnJoByIwkBgBKidFdeyNkIJeSFvdBchgdtCbucDogzBIJqcBGMtguc"
    "tifmHUFmIkBPeByBBitBaSqFMEmscccc";

static const char *const avl__pair_table[] = {   // in parts: C99 promises no string above 4,095 characters
    "HkFacbaebagbaibakbamceobecbaebagbakbicbaebagbakckibccbaebagbaibakdmcbaebagbakbiedqcbaebagbaibakbamceobecbaebagba"
    "kbicbaebagbakckibccbaebagbaibakdmcbaebagbakbiecakbEhqbCmqbClsbCmsbClubCmubChebCmebClgbCmgbClwbCmwbClybCmybCjybCm"
    "ydCjqbCmqbClsbCmsbClwbCmwbClubCmubClybCmybChgbCmgbClsbCmsbClwbCmwbClobCmobCjgbCmgdCjibCmibClqbCmqbClsbCmsbClubCm"
    "ubClwecgbCmgbCjobCmocCjebCmebClobCmobClybCmyfChebCmebClobCmobClybCmyeCjqbCmqbClsbCmsbClBabCmBadCfebCmebClobCmobC"
    "lybCmybCjebCmebClgbCmgbClobCmobClybCmybCjobCmobClybCmydCjibCmibClqbCmqbClsbCmsbClmbCmmbClBabCmBabClubCmubChgbCmg"
    "bChgbCmgbClkbcebCmebClwbCmwbClybCmyBiDhBcbCmBcoBzBcbCmBcBdDzybCmybBvybCmybBzybCmybBzybCmybHyqbCmqbClebCmebClybCm"
    "ybClcbCmccEhqbCmqbYuqbcqbBBdqbCmqdMfybCmybCdybCmybCdubCmubBDeqbcqbDzybQwybBQlyeCrebCmedBxcbCmcbGsebCmebCjebCmebB"
    "bebCmebObBebCmBebClBgbCmBgbCdBebCmBebClBgbCmBgbCdBebCmBebClBgbCmBgbBzBebCmBebClBgbCmBgbCfBebCmBebClBgbCmBgbCfBeb"
    "CmBebClBgbCmBgbCpBibCmBibCjBibCmBidDjybCmyhCzwbCmwbCdobCmobIsqbCmqbCnqbCmqbMtwbCmwbBIkqbcqbBKdqbCmqKjBXuabcacBka"
    "bvdBwGbakBXbahIkebCFiebCEdabCEmebeebeecmecmebiebCoeBaDtkbykbyebiebeebeebBkeBaBjkbykblebmebiefsebakBsFecbakcdeezk"
    "fBoebdcbwslvsBgCmsxfcbakcdeeCskfCdebdcbwsyDuBebcBeCwHhsbCmsoCxsbCmsbClkbCmkdCbsbCmsdMokbckbOzkbCmkbCjkbCmkdCjqbC"
    "mqbClkbCmkbBzkbCmkdNckbckbOlkbCmkbDfqbCmqbClkbCmkbClBabCmBabCdkbCmkdCdkbCmkLlBKqBkbaBmbCoBmbCnBobCsBmFyKsBmcBnBm"
    "rBiBmXaBUaBqiqBqdgBqBkChBpbcBpbcBpbkBpbkBpbcBpbsBpbiBpEeLsBsbaBuqCxBvbcBvcBaBvDgKcBxdmBxBjCpBxbcBxbkBxdBeBxJaVwC"
    "adaCcbaCeqCxCfbcCfCdIqCiCcEaCkbcCkbbCiEuJwCmEqJiCohoCobaCqcaCsbiCoExJoCubcCubbCwFmLiCycaDabgCybfDcNtBBuDdkuDdfkD"
    "dfkDdfkDdnCbDfkDuDhcaDjbFaDlccDljFbDlsCoDdkuDdfkDdfkDdfkDdnCbDfEfLmDoEDcIGeDqceDqceDqceDqceDqeiDqBpDeDqceDqdeDqb"
    "cDqcgDqBAzULtDsbCmDsbCjwbCmwbClDubCmDubClDwbCmDwbHuebCmebMnwbCmwbClDubCmDubClDwbCmDwbClobCmobClDybCmDybNkcbccbbe"
    "bcebPvDybCmDybClEabCmEabBIssbcsbBLdwbCmwbCjqbCmqbCjwbCmwbClDubCmDubClkbCmkbClobCmobClEcbCmEcbCjEabCmEabHwebCmebM"
    "pebCmebClDubCmDubClDwbCmDwbCjDubCmDubWOqqbcqbWRdDwbCmDwbClDybCmDybCjebCmebClwbCmwbClDubCmDubCjwbCmwbClDubCmDubCl"
    "DwbCmDwbClDybCmDybHyebCmebClkbCmkbGscbccbbebcebTlebCmebClwbCmwbChwbCmwbClDubCmDubWQyqbcqbWTlDwbCmDwbCjwbCmwbClDu"
    "bCmDubRuwbcwbkwbcwbVZewbcwbWTxwbCmwbClDubCmDubClDwbCmDwbClDybCmDybCjEebCmEebClEabCmEabClDybCmDybSsebcebckbckbVhi"
    "bCmibClDubCmDubCjcbCmcbClebCmebClkbCmkbClwbCmwbClDubCmDubCjwbCmwbClkbCmkbCjwbCmwbCjgbCmgbClDubCmDubClDwbCmDwbBjD"
    "wbykbgmbemcUewfYlDubCmDubClEgbCmEgbHmebCmebClcbCmcbClEgbCmEgbClibCmibWNsgbcgbWLhebcebbcbccbbEgbcEgbbibcibWLesbcs"
    "bWZvDubCmDubClEgbCmEgbClibCmibHuebCmebClcbCmcbClEgbCmEgbClibCmibWOygbcgbXBjEgbCmEgbClDubCmDubBzDubCmDubClEgbCmEg"
    "bHuebCmebClcbCmcbClEgbCmEgbClibCmibWPsgbcgbWCnebcebbcbccbbEgbcEgbbibcibbDubcDubZnDubCmDubClEgbCmEgbYeebcebbcbccb"
    "bEgbcEgbbibcibbDubcDubBAjcbCmcbClDubCmDubClEgbCmEgbClibCmihCLkEibaEkbURucbccbbebcebbEmbcEmbUUhEibaEkbUUwcbccbbeb"
    "cebbEmbcEmbUSdEibaEkbUSscbccbbebcedUVfEibaEkbUVucbccbbebcedUTfEibaEkbUTucbccbbebcebbEmbcEmbUWhEibaEkbUWwcbccbbeb"
    "cebbEmbcEmbUUhEibaEkbUUwcbccbbebcebbEmbcEmbUXjEibaEkbUXycbccbbebcebbEmbcEmbUVbEibaEkbUVqcbccbbebcedUYdEibaEkbUYs"
    "cbccbbebcedUVvEibaEkbUWkcbccbbebcebbEmbcEmcUYxEkcUZoccaecaEmbUWtEibaEkbUXicbccbbebcebbEmbcEmbUZvEibaEkbVAkcbccbb"
    "ebcebbEmbcEmbUZvcbjabscbpabucbrabwcbtabBgcbBaabncbqabhcbkadUPoEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEo"
    "bcEobcEobcEobBiEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobcEobDuEobcEobcEobcEobcEobcEobcEobcEobc"
    "EobcEobcEobcEobcEobcEobcEobcEobVAhsbaqbVAkEobVAjEobjEockEmbVFuEobVIfsbaqbacbvabwEocDcadCIjEmbXImEobVAfEobrEocsEm"
    "bVGoEobVJdcbzabBecbBbabBcEobVImcbaebaEmbVFvsbaqbBicbEladDeEmbBiEmbDtsbaqbacbBdacVOicbaebaEmbVJtsbaqbmcbCbabBiEib"
    "aEkbiEmbmEmbCxsbaqbacbBtabBmEkbCGncbCEkabCJxadXOqEobUZlEobkEocjEmbVIwEobVMbcbBlabCgcbBzabCaEobCGfadXSmabcaLhVMha"
    "eCOhabJkaEhYVuEqbeEqteEqBfEqEqbiEqbdEqCbDuEqfkEqdgEqyBwEqceEqBbBuEqdoEqdeEqcgEqxZUjEqcZWiEqlBnEqbZUvEqbeEqbZWmEq"
    "bcEqdBaEqbcEqdgEqbcEqhgEqbcEqdoEqbcEqdgEqbcEqBjCcEqbmEqbcEqbeEqBxDpEqbcEqbBoEqbcEqhCmEqbcEq",
    "bcEqbcEqCiKCkabcaCXuDXvEpCBoECyEsceEsceEsceEsceEsceEsceEsceEsceEsceEsceEsceEsdgEsceEsceEshoEsbaEucgEsbaEucgEsbaE"
    "ucgEsbaEucgEsbaEuxEbEskGsEsoBcEsceEsceEsceEsceEsceEsceEsceEsceEsceEsceEsceEsdgEsceEsceEshoEsbaEucgEsbaEucgEsbaEu"
    "cgEsbaEucgEsbaEuxEbEsdFqEsbcEsbcEsbcEsewEsCXTiCRDuabBCHbabBEEmabBNnabWSbabYSjabEIgabCFJaabaabCBGfabBQUqabBTRfabC"
    "VyabGOyabPMsabGXkabFCmabBDeabYmabFTmabBDFdabCJaabCVsabCHmabMKkabJZmabGLyabCFDlabDTmabRVyabFJqabPFgabSDmabBXCdabO"
    "CkabQOyabCSsabBDGfabXNqabETqabBFHxabGHmabEUoabEFsabWPgabBXLnabBReabWsabNOmabEPiabFMoabDRiabGXgabEOoabGqabFTeabHA"
    "kabDFmabBYcabBCJbabSsabDDiabERiabLNyabIScabOXdabBLVxabERaabWGeabDDcabKRvabEWeabPDgabHTaabBVBhabCRsabKJqabCWkabXu"
    "abKSeabUiabSGeabBZCrabBIQkabBJJhabBfabBENwabCToabEScabOAqabIHtabBEVhabFLuabYZoabBUArabKJkabDEcabOTeabBLqabBAAjab"
    "BCSeabBFFzabMBkabNItabXHmabFOhabRYaabBFIrabDMsabXFiabKBoabEVqabXLfabBBGeabBAQhabHFvabYEgabXRtabNLyabBDIjabCBuabH"
    "kabRFkabPLsabEEyabGJeabFHqabBVPrabZqabDYgabEDuabFEwabHTiabGYqabVPmabDPiabDEgabEgabCFSnabPHeabDOkabBBFiabBLBnabCJ"
    "gabIqabBZgabHZmabBQiabCMaabDZmabDEaabBWwabLDuabHTfabIMsabCKcabBXJxabKuabBPkabVGgabSEeabBLoabBHGbabXcabCRkabGFmab"
    "MOeabGQzabBBSbabGDeabDTcabBJyabBUyabOVsabOcabIMkabNgabNPcabDPsabGiabQaabCCYrabBFXuabSFcabDUuabBOUfabNXlabBTwabIK"
    "eabGgabHCeabDIwabFXoabDJsabLEaabISmabLKsabBREvabBKCiabBZGbabPWmabJgabEAmabBAsabECwabZwabCImabDNmabURsabCBSzabMRy"
    "abBNPsabCBGjabJUqabMTeabZEuabBKBtabBHyabFEkabIRgabBANeabBZUfabBLkabGIeabHIqabYgabBAqabDFmabFKkabBKqabHGwabHBwabB"
    "kabGTqabDWeabBZFxabUVeabUEbabWMwabCCuabNEiabMQcabEIiabBSyabBPRrabESeabPGcabFKbabGoabBCmabHLjabBQjabUGsabBTXfabBN"
    "TcabBLCpabDxabJOoabDEgabTSgabZGbabNIoabEWhabBEScabFGnabKPuabJRfabBGJfabKHhabDKqadBZgacKRsadPPjabZFsabCTkabBWeabC"
    "qaboabDgabWOkabUDrabCHaacEUsacDSmadDZkabPeaeGAmabBaabDkabDLoabJStabELeabCBUvabYcabHwabBDgabCcabIkabBTgabIcabHoab"
    "BKiabIaabCVoabuabDDsabQiabCyabHsabCOgabLiabNmabBMmabDTkabMoabUiabBTgabOoabBMsabDJiabNiabwabbabqabmaboabDsabcabNs"
    "abFaabYoabBRkabBqabEiabXmabLiabBLoabKuabaabBKuabDPaabKiabBByabEiabBFoabEcabCAuabKaabFBiabVwabEqabBQGhabOBLaabNBY"
    "padBNIxabCScabFxabBLnabBIwabEoabZeabDyabBZyabFnabFgabFqabBWqabGwabLeabBgabUuabPgabCUeaboabLcabFgabXaabJcabFjabKi"
    "abDnabLgabFcabBEuabGuabEeabUaabWaabMoabiabEoabDDmabFaabBEcabBFoabBfabGsabTkabZwabESoabEDfabJkabJmabZeabLmabEcabR"
    "kabeabNeabBiabByabGqabtabBEmabBLiabUwabOkabRgabLuabZkabPiabCNaabMcabCRsabBJcabFiabBgabWwabEkabDlabEeabfabBhabFwa"
    "bGgabBDkabBRcabYeabWsabRaabDBgabHyabIwabKgabCuabyabDsabCDyabDLkabLLKuablabITuabORXfabDKgabCoabPLMeabHZiabZTuabNZ"
    "FrabFuaCqEMKvEvcByExlrEzbaFbbHDWaEzbaFbbHDXxExbaFdbaFfbcFfbcFfbcFfbcFfbcFfbcFfceFfbcFfbcFfbcFfbcFfceFfceFfbcFfce"
    "FfbcFfceFfbcFfbcFfbcFfbcFfbBpFhbhFjbuFjbsFjIBsHUAcFmceFmpuFmFbKuFobcFoUuBPaFqbaFsOdBCmFubaFwcaFyJsTqGabcGaCTBnFM"
    "CqGbbcGbboGdbaGfbaGhbaGjbaGlDjGyGbbcGbbcGdbcGdbbGfbcGfEHLgLHMrabjabsabMRJuabMQNrabGaabBaabFmabJgabCkabGaabBvabVJ"
    "dabNOQyabMSYbaboabBgabBmabMRYwabNNSvabVSuabCyabMSAuabMRZzabBaabCDzabCEqabsabQUKaabQUFbabBcabWBvabWGeabwabDkabkab"
    "WGpabWMuabeabCcabBsabwabcabBiabDwabqabsabByabuabeabaabaabMUGoabLYIpabVSdabBqabMUXcabMUWdabmabBqabLsabHvabBgabCma"
    "bEmabGmabCaabFeabBgabCoabaabBqabBkabqabBeabBAeabUxabVaabPfabCsabDJdabFFyabWdabCyabByabJzabMwabbabJmabMYLsabMYGha"
    "bkabBeabBoabqabEyabMZGmabFcabMZAxabDqabyabGbabKyabBAWlabBcabBBHwabEeabaabNAFkabMZVdabBqabBeabyabNARiabNAQjaboabC"
    "NaabCKvabBBThabBBYcabBcabGiabDxabNCIoabNBUnabNBUsabNBRjabfabBiabHuabcabBCOjabBCQmabDiabBqabDkabBCUvabOGMcabOGKba"
    "bBCYiabgabgabBoabQXWyabQXSxabNEMwabaabMDZjabBAKrabaabBDBhabOTFeabBJSeabOZRbabsabBDEtabBDIkabDyabuabCqabKmabBDTla"
    "bChabBDXgabNGBgabNFXhabJyabiabeabdabDoabBoabCuabBbabwabDqabBoabiabCaabwabFcabGmabCsabJoabNHEmabNHFxabEzabIiabCca"
    "bHmabNHKsabNHFxabHdabCdabBFKvabBFZqabBqabCkabCxabBFVxabBGMoabCgabNJJgabNJAbabViabNlabBGSlabBGYaabBGZhabCtabREqab"
    "gabQFuabHrabTTiabBUBvabBASaabiabmabEsabvabNKTcabOSChabBHWcabIzabPuabDyabNKIqabNKHxabInabSwabBILhabBIOwabHmabFmab"
    "OqabNKKcabNKGdabBJKvabBJQgabNLOmabNLKnabBJPzabBJSiabDmabCcabcabNMOaabWJbabWRmabNMLbabNNTsa",
    "bNNKzabBcabHvabNmabDcabEkabEdabDcabBeabBaabNNDiabNNJnabTiabEwabBLHlabBLOqabhabNNMaabNOBvabBCsabNNKaabDsabNNGxabI"
    "wabCbabfabBMGvabBMKmabDyablabEeabLUIyabLTXfabNOHgabNOAnabNOZuabNOOzabBaabCcabNQGmabNQCtabBqabNQYiabReabNQXvabBia"
    "bBOBdabBODeabBOCfabaabBOOsabBqabBqabBoabFiabBORdabBOYcabNSUmabNSSlabNSZoabNSVrabMMHyabMLVpabNURqabBuabKuabPKDbab"
    "yabBPPoabNVAcabbabDaabCaabNVBtabcabaabDiabBPSjabBPXkabBPWjabGeabPMPaabNWJtabEuabEyabBQIzabPNXeabNXDnabNXMmabDiab"
    "NXLjabHcabBQZfabBRFuabuabkabNYYcabXaabaabNZIvabBRCxabPRFuabNZMfabgabBRQxabPRTiabNZHzabBSBzabBSDsabjabCgabOBMaabO"
    "BEjabBSFrabBSNkabEoabFeabBSTdabPVGaabCkabPVFnabPVQuabOCCrabOCKmabOCIjabHuabwabODFmabFqabODEbabODOiabODNbabMRKwab"
    "OLIhabBUCoabGgabBUEpabBUJeabBDEvabPHPkabBcabBNMpabsabMQKrabgabKHwabCEYvabBVBwablabBkabBKHnabBKJcabeabuabDeabOFWm"
    "abOFWnabEiabFkabFsabKpabLwabDgabIqabTzabJeabeabBgabOFWuabXuabLnabQBVnabBWHwabeabCsabOKRwabOKLvabOGYyabQDLtabiabQ"
    "DVsabWgabQERdabBXDyabyabwabeabEyabCnabKiabDjabLqabGfabFeabCcabBXTlabBYAmabCmabBYAhabBYHqabgabOKEiabOJVjaboabBYMr"
    "abBYOwabCLUzabQXGoabOeabQKDzabsabBZKcabFyabMcabPqabOLXuabOLRdabBsabGyabHcabOMZgabDMGrabLAMbabBdabEaabLBAaabLAIla"
    "bHsabOQRkabCcabOPSrabHeabCmabOQHuabOQGzabVyabMgabcabHbabBDiabCeabORQwabOQObabCFNvabCFRgabOROaabQWYzabCGFqabBRFta"
    "bBRNeabOTIyabQkabRABvabqabCGQmabOUWyabRBItabRBToabOVEjabaabCiabOVYgabOVJzabCGVtabCHBgabJsabCcabEqabCHFrabRFXsabO"
    "XWtabXgabOoabCISzabCkabCIYuabPAJmabRJHjabRJLqabUkabKcabPARzabCJQvabCJVqabkaboabuaboabCwabPCXua"};

// Characters first, first + stride, ... with one value: what to add for lower case, or a mark's class.
typedef struct avl__char_run {
    uint32_t first, count, stride;
    int32_t  value;
} avl__char_run;

typedef struct avl__pair {
    uint32_t whole, first, second;    // second 0: none
    int      composes;
    int      next;                    // the next pair in its bucket, -1: none
} avl__pair;

typedef struct avl__cleaner {
    avl__char_run lower[AVL__LOWER_RUNS];
    avl__char_run marks[AVL__MARK_RUNS];
    avl__pair     pairs[AVL__PAIRS];             // ascending by whole
    int           buckets[1024];                 // of pairs that compose, by avl__pair_bucket
} avl__cleaner;

static uint32_t avl__pair_bucket(uint32_t first, uint32_t second) {
    return (first * 0x9E3779B1u ^ second * 0x85EBCA6Bu) >> 22;
}

static void avl__fill_cleaner(avl__cleaner *c) {
    const char *lower = avl__lower_table, *mark = avl__mark_table, *second = avl__second_table, *pair = avl__pair_table[0];
    uint32_t seconds[AVL__SECONDS], at = 0, code;
    int i, part = 0;
    for (i = 0; i < AVL__LOWER_RUNS; i++) {
        c->lower[i].first = at += avl__table_number(&lower);
        code = avl__table_number(&lower);
        c->lower[i].count = code / 2 + 1;
        c->lower[i].stride = code % 2 + 1;
        c->lower[i].value = avl__table_signed(&lower);
    }
    for (i = 0, at = 0; i < AVL__MARK_RUNS; i++) {
        c->marks[i].first = at += avl__table_number(&mark);
        c->marks[i].count = avl__table_number(&mark);
        c->marks[i].stride = 1;
        c->marks[i].value = (int32_t)avl__table_number(&mark);
    }
    for (i = 0, at = 0; i < AVL__SECONDS; i++) seconds[i] = at += (uint32_t)avl__table_signed(&second);
    memset(c->buckets, 0xFF, sizeof c->buckets);   // every bucket is -1
    for (i = 0, at = 0; i < AVL__PAIRS; i++) {
        avl__pair *p = &c->pairs[i];
        if (!*pair) pair = avl__pair_table[++part];
        p->whole = at += avl__table_number(&pair);
        p->first = (i ? p[-1].first : 0) + (uint32_t)avl__table_signed(&pair);
        code = avl__table_number(&pair);
        p->second = code ? seconds[(code - 1) / 2] : 0;
        p->composes = code ? (int)((code - 1) % 2) : 0;
        if (p->composes) {
            int *bucket = &c->buckets[avl__pair_bucket(p->first, p->second)];
            p->next = *bucket;
            *bucket = i;
        }
    }
}

// The value of the run that a character is in; 0: it is in none.
static int32_t avl__run_value(const avl__char_run *runs, int n, uint32_t point) {
    int low = 0, high = n;   // runs[low - 1].first <= point < runs[high].first
    while (low < high) {
        int middle = (low + high) / 2;
        if (runs[middle].first <= point) low = middle + 1;
        else high = middle;
    }
    if (low == 0) return 0;
    point -= runs[low - 1].first;
    return point % runs[low - 1].stride == 0 && point / runs[low - 1].stride < runs[low - 1].count ? runs[low - 1].value : 0;
}

// Hangul syllables are made of a lead, a vowel and perhaps a tail, by arithmetic (the Unicode Standard 3.12).
enum { AVL__HANGUL = 0xAC00, AVL__LEAD = 0x1100, AVL__VOWEL = 0x1161, AVL__TAIL = 0x11A7, AVL__N_LEADS = 19, AVL__N_VOWELS = 21,
       AVL__N_TAILS = 28, AVL__N_SYLLABLES = AVL__N_LEADS * AVL__N_VOWELS * AVL__N_TAILS };

// What a pair composes to, or 0.
static uint32_t avl__composed(const avl__cleaner *c, uint32_t first, uint32_t second) {
    int i;
    if (first - AVL__LEAD < AVL__N_LEADS && second - AVL__VOWEL < AVL__N_VOWELS)
        return AVL__HANGUL + ((first - AVL__LEAD) * AVL__N_VOWELS + (second - AVL__VOWEL)) * AVL__N_TAILS;
    if (first - AVL__HANGUL < AVL__N_SYLLABLES && (first - AVL__HANGUL) % AVL__N_TAILS == 0 && second > AVL__TAIL &&
        second - AVL__TAIL < AVL__N_TAILS) return first + (second - AVL__TAIL);
    for (i = c->buckets[avl__pair_bucket(first, second)]; i >= 0; i = c->pairs[i].next)
        if (c->pairs[i].first == first && c->pairs[i].second == second) return c->pairs[i].whole;
    return 0;
}

// A list of code points: the class of each stands above its 21 bits, so that ordering need not look it up again.
enum { AVL__POINT_BITS = 21, AVL__POINT_MASK = (1 << AVL__POINT_BITS) - 1 };

static int avl__points_put(avl__tokens *points, const avl__cleaner *c, uint32_t point) {   // 0: memory is out
    return avl__tokens_put(points, (int32_t)point | avl__run_value(c->marks, AVL__MARK_RUNS, point) << AVL__POINT_BITS);
}

// Appends a character taken apart as far as it goes; 0: memory is out.
static int avl__decompose(avl__tokens *points, const avl__cleaner *c, uint32_t point) {
    int low = 0, high = AVL__PAIRS;
    if (point - AVL__HANGUL < AVL__N_SYLLABLES) {
        uint32_t s = point - AVL__HANGUL, tail = s % AVL__N_TAILS;
        return avl__points_put(points, c, AVL__LEAD + s / (AVL__N_VOWELS * AVL__N_TAILS)) &&
               avl__points_put(points, c, AVL__VOWEL + s / AVL__N_TAILS % AVL__N_VOWELS) &&
               (tail == 0 || avl__points_put(points, c, AVL__TAIL + tail));
    }
    while (low < high) {
        int middle = (low + high) / 2;
        if (c->pairs[middle].whole < point) low = middle + 1;
        else high = middle;
    }
    if (low == AVL__PAIRS || c->pairs[low].whole != point) return avl__points_put(points, c, point);
    return avl__decompose(points, c, c->pairs[low].first) &&
           (c->pairs[low].second == 0 || avl__decompose(points, c, c->pairs[low].second));
}

// Each run of marks sorted by class, equal ones in their order: a counting sort, since a hostile text may be one long run.
// copy: [n]
static void avl__order_marks(int32_t *points, int32_t *copy, size_t n) {
    size_t from, to, i;
    for (from = 0; from < n; from = to + 1) {
        size_t starts[257] = {0};
        int sorted = 1;
        for (to = from; to < n && points[to] >> AVL__POINT_BITS; to++) {
            starts[(points[to] >> AVL__POINT_BITS) + 1]++;
            sorted &= to == from || points[to - 1] >> AVL__POINT_BITS <= points[to] >> AVL__POINT_BITS;
        }
        if (sorted) continue;
        for (i = 1; i < 257; i++) starts[i] += starts[i - 1];
        for (i = from; i < to; i++) copy[starts[points[i] >> AVL__POINT_BITS]++] = points[i];
        memcpy(points + from, copy, (to - from) * sizeof *points);
    }
}

// Puts characters together with the marks behind them, unless a mark of the same or a higher class stands between. Returns how
// many are left.
static size_t avl__compose(const avl__cleaner *c, int32_t *points, size_t n) {
    size_t i, out = 0, starter = (size_t)-1;
    int32_t last = 0;   // the class of the point before; 0: one that stands by itself
    for (i = 0; i < n; i++) {
        int32_t rank = points[i] >> AVL__POINT_BITS;
        uint32_t whole = 0;
        if (starter != (size_t)-1 && (out == starter + 1 || (last > 0 && last < rank)))
            whole = avl__composed(c, (uint32_t)points[starter], (uint32_t)(points[i] & AVL__POINT_MASK));
        if (whole) {
            points[starter] = (int32_t)whole;
            continue;
        }
        if (rank == 0) starter = out;
        last = rank;
        points[out++] = points[i];
    }
    return out;
}

// Appends text (valid UTF-8), composed and in lower case; 0: memory is out.
static int avl__clean(const avl__cleaner *c, const char *text, size_t size, avl__bytes *out) {
    avl__tokens points = {NULL, 0, 0};
    size_t at, length, i;
    int32_t *copy = NULL;
    int ok = 1;
    for (at = 0; at < size && ok; at += length) ok = avl__decompose(&points, c, (uint32_t)avl__utf8_read(text + at, size - at, &length));
    if (ok) copy = (int32_t *)avl__alloc_raw(points.size, sizeof *copy);
    if (copy) {
        avl__order_marks(points.data, copy, points.size);
        points.size = avl__compose(c, points.data, points.size);
        for (i = 0; i < points.size; i++) {
            char utf8[4];
            uint32_t point = (uint32_t)(points.data[i] & AVL__POINT_MASK);
            uint32_t lower = point == 0x130 ? 'i' : point + (uint32_t)avl__run_value(c->lower, AVL__LOWER_RUNS, point);
            avl__bytes_put(out, utf8, avl__utf8_write(lower, utf8));
            if (point == 0x130) avl__bytes_put(out, "\xCC\x87", 2);   // the one capital that two characters stand for: i and a dot
        }
    }
    ok = copy != NULL && !out->failed;
    astrovl_free(copy);
    astrovl_free(points.data);
    return ok;
}

// ---- vocabularies --------------------------------------------------------------------------------------------------

typedef enum avl__vocab_kind { AVL__VOCAB_SPM = 1, AVL__VOCAB_BPE } avl__vocab_kind;

// How a byte-level BPE text is cut into words.
typedef enum avl__word_rule { AVL__WORDS_GPT2, AVL__WORDS_LLAMA3, AVL__WORDS_SMOLLM, AVL__WORDS_CLIP } avl__word_rule;

// tokenizer.ggml.token_type
enum {
    AVL__TOKEN_NORMAL = 1, AVL__TOKEN_UNKNOWN, AVL__TOKEN_CONTROL, AVL__TOKEN_USER_DEFINED, AVL__TOKEN_UNUSED,
    AVL__TOKEN_BYTE
};

typedef struct avl__piece_slot {
    uint32_t hash;
    int32_t  id;              // -1: empty
} avl__piece_slot;

// left and right become id. An earlier merge (lower rank) goes first.
typedef struct avl__merge_slot {
    int32_t  left, right;     // left -1: empty
    int32_t  id;
    uint32_t rank;
} avl__merge_slot;

// A set of tokens that are looked for in running text as they are spelled (their type is in the set).
typedef struct avl__markers {
    uint8_t  types[8];        // [type]: 1 if tokens of this type belong to the set
    uint8_t  first[256];      // [byte]: 1 if one of them starts with it
    size_t  *lengths;         // [n_lengths] the lengths that occur, ascending
    size_t   n_lengths, capacity;
} avl__markers;

typedef struct avl__vocab {
    avl__vocab_kind  kind;
    avl__word_rule   rule;             // BPE
    int              n_tokens;
    int              bos, eos, unk, pad, eot;              // -1: none
    int              add_bos, add_eos;
    int              add_space_prefix;                     // SPM: a space goes before every part of a text
    int              whole_words;                          // BPE: a word that is a piece stays one (ignore_merges)
    int              has_bytes, has_unused;                // SPM: all <0xNN> are there; there are tokens of type UNUSED
    astrovl_string  *pieces;           // [n_tokens], pointing into the file
    uint8_t         *types;            // [n_tokens] AVL__TOKEN_*
    uint8_t         *ends;             // [n_tokens] 1: ends an answer
    uint32_t        *order;            // [n_tokens] SPM: scores as integers, the best score the lowest
    size_t           longest;          // bytes of the longest piece
    avl__piece_slot *piece_slots;      // [piece_mask + 1] open addressing, at most half full
    uint32_t         piece_mask;
    avl__merge_slot *merge_slots;      // [merge_mask + 1] the same
    uint32_t         merge_mask;
    int32_t          byte_ids[256];    // the token of a single byte, or -1
    int32_t          last_byte_ids[256];   // CLIP: of one that ends a word
    avl__cleaner    *cleaner;          // CLIP
    avl__markers     special;          // tokens that PARSE_SPECIAL finds
    avl__markers     user_defined;     // SPM: tokens that are found in any text
    uint32_t         letters[AVL__LETTER_BOUNDS], numbers[AVL__NUMBER_BOUNDS];
} avl__vocab;

#define AVL__MAX_TOKENS (1 << 26)      // keeps every table's size within 32 bits

static void avl__vocab_free(avl__vocab *v) {
    astrovl_free(v->pieces);
    astrovl_free(v->types);
    astrovl_free(v->ends);
    astrovl_free(v->order);
    astrovl_free(v->piece_slots);
    astrovl_free(v->merge_slots);
    astrovl_free(v->cleaner);
    astrovl_free(v->special.lengths);
    astrovl_free(v->user_defined.lengths);
    memset(v, 0, sizeof *v);
}

static int avl__string_is(astrovl_string s, const char *text) {
    return s.size == strlen(text) && memcmp(s.data, text, s.size) == 0;
}

// The class of the character at text[at..end), and its length. Valid UTF-8 is expected.
static avl__class avl__class_at(const avl__vocab *v, const char *text, size_t at, size_t end, size_t *length) {
    uint32_t c;
    *length = 0;
    if (at >= end) return AVL__CLASS_END;
    c = (uint32_t)avl__utf8_read(text + at, end - at, length);
    if (avl__is_white_space(c)) return AVL__CLASS_SPACE;
    if (avl__in_bounds(c, v->letters, AVL__LETTER_BOUNDS)) return AVL__CLASS_LETTER;
    if (avl__in_bounds(c, v->numbers, AVL__NUMBER_BOUNDS)) return AVL__CLASS_NUMBER;
    return AVL__CLASS_OTHER;
}

// ---- finding pieces ------------------------------------------------------------------------------------------------

// FNV-1a; a hash goes on where that of the bytes before it ended.
#define AVL__HASH_START 2166136261u
static uint32_t avl__hash(uint32_t hash, const char *data, size_t size) {
    size_t i;
    for (i = 0; i < size; i++) hash = (hash ^ (uint8_t)data[i]) * 16777619u;
    return hash;
}

// The slot of the piece a + b, or the empty one where it would go. hash: of both.
static avl__piece_slot *avl__piece_slot_of(const avl__vocab *v, uint32_t hash, astrovl_string a, astrovl_string b) {
    uint32_t at = (hash ^ hash >> 15) & v->piece_mask;
    for (;; at = (at + 1) & v->piece_mask) {
        avl__piece_slot *slot = &v->piece_slots[at];
        const astrovl_string *piece;
        if (slot->id < 0) return slot;
        if (slot->hash != hash) continue;
        piece = &v->pieces[slot->id];
        if (piece->size == a.size + b.size && memcmp(piece->data, a.data, a.size) == 0 &&
            memcmp(piece->data + a.size, b.data, b.size) == 0) return slot;
    }
}

static astrovl_string avl__string(const char *data, size_t size) {
    astrovl_string s;
    s.data = size ? data : "";   // memcmp takes no NULL
    s.size = size;
    return s;
}

// The id of the piece a + b, or -1; of several with one spelling, the first.
static int avl__vocab_find_joined(const avl__vocab *v, astrovl_string a, astrovl_string b) {
    uint32_t hash = avl__hash(avl__hash(AVL__HASH_START, a.data, a.size), b.data, b.size);
    return avl__piece_slot_of(v, hash, a, b)->id;
}

static int avl__vocab_find(const avl__vocab *v, const char *piece, size_t size) {
    return avl__vocab_find_joined(v, avl__string(piece, size), avl__string(NULL, 0));
}

static astrovl_string avl__vocab_piece(const avl__vocab *v, int32_t id) {
    return id < 0 || id >= v->n_tokens ? avl__string(NULL, 0) : v->pieces[id];
}

static int avl__vocab_is_end(const avl__vocab *v, int32_t id) { return id >= 0 && id < v->n_tokens && v->ends[id]; }

// Room for n entries in a table of a power of two slots, at most half full.
static uint32_t avl__table_slots(uint32_t n) {
    uint32_t slots = 16;
    while (slots < 2 * n) slots *= 2;
    return slots;
}

// The slot of the merge of two ids, or the empty one where it would go.
static avl__merge_slot *avl__merge_slot_of(const avl__vocab *v, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t at = (uint32_t)(pair * 0x9E3779B97F4A7C15u >> 32) & v->merge_mask;
    for (;; at = (at + 1) & v->merge_mask) {
        avl__merge_slot *slot = &v->merge_slots[at];
        if (slot->left < 0 || (slot->left == left && slot->right == right)) return slot;
    }
}

// Adds a token's spelling to a set; 0: memory is out.
static int avl__markers_add(avl__markers *m, astrovl_string piece) {
    size_t i = m->n_lengths;
    if (piece.size == 0) return 1;
    m->first[(uint8_t)piece.data[0]] = 1;
    while (i > 0 && m->lengths[i - 1] > piece.size) i--;
    if (i > 0 && m->lengths[i - 1] == piece.size) return 1;
    if (!avl__grow(&m->lengths, &m->capacity, m->n_lengths + 1, sizeof *m->lengths)) return 0;
    memmove(m->lengths + i + 1, m->lengths + i, (m->n_lengths - i) * sizeof *m->lengths);
    m->lengths[i] = piece.size;
    m->n_lengths++;
    return 1;
}

// The longest token of a set that text starts with, or -1. The text is hashed once, stopping at every length that
// occurs.
static int32_t avl__markers_match(const avl__vocab *v, const avl__markers *m, const char *text, size_t size) {
    uint32_t hash = AVL__HASH_START;
    size_t i, done = 0;
    int32_t best = -1;
    if (size == 0 || !m->first[(uint8_t)text[0]]) return -1;
    for (i = 0; i < m->n_lengths && m->lengths[i] <= size; i++) {
        int32_t id;
        hash = avl__hash(hash, text + done, m->lengths[i] - done);
        done = m->lengths[i];
        id = avl__piece_slot_of(v, hash, avl__string(text, done), avl__string(NULL, 0))->id;
        if (id >= 0 && m->types[v->types[id]]) best = id;
    }
    return best;
}

// ---- loading -------------------------------------------------------------------------------------------------------

// Where a vocabulary is read from, and where errors go.
typedef struct avl__vocab_source {
    const astrovl_gguf *file;
    const char         *prefix;
    astrovl_error      *err;
} avl__vocab_source;

typedef struct avl__vocab_key { char text[128]; } avl__vocab_key;

static avl__vocab_key avl__vocab_key_of(const avl__vocab_source *from, const char *name) {
    avl__vocab_key key;
    avl__format(key.text, sizeof key.text, "%s%s", from->prefix, name);
    return key;
}

static astrovl_status avl__vocab_fail(const avl__vocab_source *from, const char *name, const char *what) {
    return avl__fail(from->err, ASTROVL_ERROR_FORMAT, "%s: %s%s %s", astrovl_gguf_name(from->file), from->prefix, name,
                     what);
}

static astrovl_status avl__vocab_no_memory(const avl__vocab_source *from) {
    return avl__fail(from->err, ASTROVL_ERROR_MEMORY, "%s: out of memory for the vocabulary",
                     astrovl_gguf_name(from->file));
}

static int avl__is_int_type(astrovl_value_type type) {   // booleans count
    return type != ASTROVL_VALUE_F32 && type != ASTROVL_VALUE_F64 && type != ASTROVL_VALUE_STRING &&
           type != ASTROVL_VALUE_ARRAY;
}

// The entry's index, or -1 if it is absent.
static int avl__vocab_entry(const avl__vocab_source *from, const char *name) {
    avl__vocab_key key = avl__vocab_key_of(from, name);
    return astrovl_gguf_find_kv(from->file, key.text);
}

static astrovl_value_type avl__vocab_type(const avl__vocab_source *from, int index) {
    return astrovl_gguf_kv(from->file, index)->type;
}
static astrovl_value_type avl__vocab_item_type(const avl__vocab_source *from, int index) {
    return astrovl_gguf_kv(from->file, index)->item_type;
}
static uint64_t avl__vocab_count(const avl__vocab_source *from, int index) {
    return astrovl_gguf_kv(from->file, index)->count;
}

static astrovl_status avl__vocab_text(const avl__vocab_source *from, const char *name, astrovl_string *text) {
    int index = avl__vocab_entry(from, name);
    *text = avl__string(NULL, 0);
    if (index < 0) return ASTROVL_OK;
    if (avl__vocab_type(from, index) != ASTROVL_VALUE_STRING) return avl__vocab_fail(from, name, "is no string");
    *text = astrovl_gguf_string(from->file, index, 0);
    return ASTROVL_OK;
}

static astrovl_status avl__vocab_flag(const avl__vocab_source *from, const char *name, int *flag) {
    int index = avl__vocab_entry(from, name);
    if (index < 0) return ASTROVL_OK;
    if (!avl__is_int_type(avl__vocab_type(from, index))) return avl__vocab_fail(from, name, "is no boolean");
    *flag = astrovl_gguf_int(from->file, index, 0) != 0;
    return ASTROVL_OK;
}

// A token's id; *id keeps its value where the key is absent.
static astrovl_status avl__vocab_id(const avl__vocab_source *from, const avl__vocab *v, const char *name, int *id) {
    int index = avl__vocab_entry(from, name);
    int64_t value;
    if (index < 0) return ASTROVL_OK;
    if (!avl__is_int_type(avl__vocab_type(from, index))) return avl__vocab_fail(from, name, "is no integer");
    value = astrovl_gguf_int(from->file, index, 0);
    if (value < 0 || value >= v->n_tokens) {
        return avl__fail(from->err, ASTROVL_ERROR_FORMAT, "%s: %s%s is %l, but there are %d tokens",
                         astrovl_gguf_name(from->file), from->prefix, name, value, v->n_tokens);
    }
    *id = (int)value;
    return ASTROVL_OK;
}

// An array's entry; *index is -1 if it is absent.
static astrovl_status avl__vocab_array(const avl__vocab_source *from, const char *name, int *index) {
    *index = avl__vocab_entry(from, name);
    if (*index >= 0 && avl__vocab_type(from, *index) != ASTROVL_VALUE_ARRAY) {
        return avl__vocab_fail(from, name, "is no array");
    }
    return ASTROVL_OK;
}

// The same for an array with one element per token.
static astrovl_status avl__vocab_array_of(const avl__vocab_source *from, const avl__vocab *v, const char *name,
                                          int *index) {
    astrovl_status status = avl__vocab_array(from, name, index);
    uint64_t count;
    if (status != ASTROVL_OK || *index < 0) return status;
    count = avl__vocab_count(from, *index);
    if (count == (uint64_t)v->n_tokens) return ASTROVL_OK;
    return avl__fail(from->err, ASTROVL_ERROR_FORMAT, "%s: %s%s has %l elements for %d tokens",
                     astrovl_gguf_name(from->file), from->prefix, name, (int64_t)count, v->n_tokens);
}

// Which algorithm and which rule.
static astrovl_status avl__vocab_load_kind(avl__vocab *v, const avl__vocab_source *from) {
    astrovl_string model, pre;
    astrovl_status status = avl__vocab_text(from, "model", &model);
    if (status == ASTROVL_OK) status = avl__vocab_text(from, "pre", &pre);
    if (status != ASTROVL_OK) return status;
    if (model.size == 0) {
        return avl__fail(from->err, ASTROVL_ERROR_MODEL, "%s: has no vocabulary (no %smodel)",
                         astrovl_gguf_name(from->file), from->prefix);
    }
    if (avl__string_is(model, "llama")) {
        v->kind = AVL__VOCAB_SPM;
        v->add_bos = v->add_space_prefix = 1;
        return ASTROVL_OK;
    }
    if (!avl__string_is(model, "gpt2")) {
        return avl__fail(from->err, ASTROVL_ERROR_UNSUPPORTED,
                         "%s: the tokenizer model \"%S\" is not supported (llama and gpt2 are)",
                         astrovl_gguf_name(from->file), model);
    }
    v->kind = AVL__VOCAB_BPE;
    if (avl__string_is(pre, "llama-bpe") || avl__string_is(pre, "llama3") || avl__string_is(pre, "llama-v3")) {
        v->rule = AVL__WORDS_LLAMA3;
        v->add_bos = v->whole_words = 1;
    } else if (avl__string_is(pre, "smollm")) {
        v->rule = AVL__WORDS_SMOLLM;
    } else if (pre.size == 0 || avl__string_is(pre, "gpt-2") || avl__string_is(pre, "default")) {
        v->rule = AVL__WORDS_GPT2;
    } else {
        return avl__fail(from->err, ASTROVL_ERROR_UNSUPPORTED,
                         "%s: the pre-tokenizer \"%S\" is not supported (llama-bpe, smollm and gpt-2 are)",
                         astrovl_gguf_name(from->file), pre);
    }
    return ASTROVL_OK;
}

// The tokens' spellings and the table that finds them.
static astrovl_status avl__vocab_load_pieces(avl__vocab *v, const avl__vocab_source *from) {
    int index, i;
    uint32_t slots;
    uint64_t count;
    astrovl_status status = avl__vocab_array(from, "tokens", &index);
    if (status != ASTROVL_OK) return status;
    if (index < 0) {
        return avl__fail(from->err, ASTROVL_ERROR_MODEL, "%s: has no vocabulary (no %stokens)",
                         astrovl_gguf_name(from->file), from->prefix);
    }
    count = avl__vocab_count(from, index);
    if (avl__vocab_item_type(from, index) != ASTROVL_VALUE_STRING) {
        return avl__vocab_fail(from, "tokens", "is no array of strings");
    }
    if (count == 0 || count > AVL__MAX_TOKENS) {
        return avl__vocab_fail(from, "tokens", "is empty, or has more than 2^26 elements");
    }
    slots = avl__table_slots((uint32_t)count);
    v->n_tokens = (int)count;
    v->pieces = (astrovl_string *)avl__alloc_raw(count, sizeof *v->pieces);
    v->types = (uint8_t *)avl__alloc(count, 1);
    v->ends = (uint8_t *)avl__alloc(count, 1);
    v->piece_slots = (avl__piece_slot *)avl__alloc_raw(slots, sizeof *v->piece_slots);
    if (!v->pieces || !v->types || !v->ends || !v->piece_slots) return avl__vocab_no_memory(from);
    v->piece_mask = slots - 1;
    memset(v->piece_slots, 0xFF, slots * sizeof *v->piece_slots);   // every id is -1
    for (i = 0; i < v->n_tokens; i++) {
        astrovl_string piece = astrovl_gguf_string(from->file, index, (uint64_t)i);
        uint32_t hash = avl__hash(AVL__HASH_START, piece.data, piece.size);
        avl__piece_slot *slot = avl__piece_slot_of(v, hash, avl__string(piece.data, piece.size), avl__string(NULL, 0));
        v->pieces[i] = avl__string(piece.data, piece.size);
        if (piece.size > v->longest) v->longest = piece.size;
        if (slot->id >= 0) continue;
        slot->hash = hash;
        slot->id = i;
    }
    return ASTROVL_OK;
}

#define AVL__CLIP_START "<|startoftext|>"
#define AVL__CLIP_END   "<|endoftext|>"
#define AVL__WORD_END   "</w>"             // what CLIP's vocabulary writes after a word's last byte

// The ids of the special tokens, by key or else by their usual spelling, and whether a text gets some of them.
static astrovl_status avl__vocab_load_ids(avl__vocab *v, const avl__vocab_source *from) {
    astrovl_status status;
    int spm = v->kind == AVL__VOCAB_SPM;
    v->bos = spm ? avl__vocab_find(v, "<s>", 3) : v->cleaner ? avl__vocab_find(v, AVL__CLIP_START, strlen(AVL__CLIP_START)) : -1;
    v->eos = spm ? avl__vocab_find(v, "</s>", 4) : v->cleaner ? avl__vocab_find(v, AVL__CLIP_END, strlen(AVL__CLIP_END)) : -1;
    v->unk = spm ? avl__vocab_find(v, "<unk>", 5) : v->cleaner ? v->eos : -1;
    v->pad = v->eot = -1;
    status = avl__vocab_id(from, v, "bos_token_id", &v->bos);
    if (status == ASTROVL_OK) status = avl__vocab_id(from, v, "eos_token_id", &v->eos);
    if (status == ASTROVL_OK) status = avl__vocab_id(from, v, "unknown_token_id", &v->unk);
    if (status == ASTROVL_OK) status = avl__vocab_id(from, v, "eot_token_id", &v->eot);
    if (status == ASTROVL_OK) status = avl__vocab_flag(from, "add_bos_token", &v->add_bos);
    if (status == ASTROVL_OK) status = avl__vocab_flag(from, "add_eos_token", &v->add_eos);
    if (status == ASTROVL_OK && spm) status = avl__vocab_flag(from, "add_space_prefix", &v->add_space_prefix);
    // Some writers give a padding id just past the vocabulary. It is never used here, so that is no reason to refuse
    // the file.
    if (status == ASTROVL_OK && avl__vocab_id(from, v, "padding_token_id", &v->pad) != ASTROVL_OK) v->pad = -1;
    return status;
}

// "<0x4F>" -> 0x4F; other spellings -> -1
static int avl__byte_piece(astrovl_string piece) {
    static const char digits[] = "0123456789ABCDEF";
    const char *high, *low;
    if (piece.size != 6 || memcmp(piece.data, "<0x", 3) != 0 || piece.data[5] != '>') return -1;
    high = (const char *)memchr(digits, piece.data[3], 16);
    low = (const char *)memchr(digits, piece.data[4], 16);
    return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

// Types as the file gives them; a file without them is told by spelling.
static astrovl_status avl__vocab_load_types(avl__vocab *v, const avl__vocab_source *from) {
    int index, i;
    astrovl_status status = avl__vocab_array_of(from, v, "token_type", &index);
    if (status != ASTROVL_OK) return status;
    if (index >= 0 && !avl__is_int_type(avl__vocab_item_type(from, index))) {
        return avl__vocab_fail(from, "token_type", "is no array of integers");
    }
    for (i = 0; i < v->n_tokens; i++) {
        int64_t type = AVL__TOKEN_NORMAL;
        if (index >= 0) type = astrovl_gguf_int(from->file, index, (uint64_t)i);
        else if (i == v->bos || i == v->eos) type = AVL__TOKEN_CONTROL;
        else if (i == v->unk) type = AVL__TOKEN_UNKNOWN;
        else if (v->kind == AVL__VOCAB_SPM && avl__byte_piece(v->pieces[i]) >= 0) type = AVL__TOKEN_BYTE;
        if (type < 0 || type > AVL__TOKEN_BYTE) {
            return avl__vocab_fail(from, "token_type", "holds a type outside 0 to 6");
        }
        v->types[i] = type == 0 ? (uint8_t)AVL__TOKEN_NORMAL : (uint8_t)type;   // 0: undefined
        if (v->types[i] == AVL__TOKEN_UNUSED) v->has_unused = 1;
    }
    return ASTROVL_OK;
}

// Which tokens end an answer: by id, and the usual end marks among the special tokens (a model may end its turn with
// another than its EOS).
static void avl__vocab_mark_ends(avl__vocab *v) {
    static const char *const marks[] = {"</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
                                        "<|endoftext|>", "<|end|>", "<end_of_turn>", "<EOT>"};
    size_t i;
    for (i = 0; i < sizeof marks / sizeof *marks; i++) {
        int id = avl__vocab_find(v, marks[i], strlen(marks[i]));
        if (id >= 0 && (v->types[id] == AVL__TOKEN_CONTROL || v->types[id] == AVL__TOKEN_USER_DEFINED)) v->ends[id] = 1;
    }
    if (v->eos >= 0) v->ends[v->eos] = 1;
    if (v->eot >= 0) v->ends[v->eot] = 1;
}

static astrovl_status avl__vocab_load_markers(avl__vocab *v, const avl__vocab_source *from) {
    int i;
    v->special.types[AVL__TOKEN_CONTROL] = v->special.types[AVL__TOKEN_UNKNOWN] = 1;
    // SentencePiece knows its user-defined tokens in any text; in byte-level BPE they are added tokens like the special
    // ones.
    if (v->kind == AVL__VOCAB_BPE) v->special.types[AVL__TOKEN_USER_DEFINED] = 1;
    else v->user_defined.types[AVL__TOKEN_USER_DEFINED] = 1;
    for (i = 0; i < v->n_tokens; i++) {
        int type = v->types[i], ok = 1;
        if (v->special.types[type]) ok = avl__markers_add(&v->special, v->pieces[i]);
        if (v->user_defined.types[type]) ok = avl__markers_add(&v->user_defined, v->pieces[i]);
        if (!ok) return avl__vocab_no_memory(from);
    }
    return ASTROVL_OK;
}

// SPM: scores become integers that sort the other way round, so that both kinds of BPE merge the lowest first. The bits
// of a float sort like the float once a negative one's are inverted and a positive one's sign is set.
static astrovl_status avl__vocab_load_scores(avl__vocab *v, const avl__vocab_source *from) {
    int index, i;
    astrovl_status status = avl__vocab_array_of(from, v, "scores", &index);
    if (status != ASTROVL_OK) return status;
    if (index < 0) return avl__vocab_fail(from, "scores", "is missing: a llama vocabulary needs it");
    if (avl__vocab_item_type(from, index) != ASTROVL_VALUE_F32) {
        return avl__vocab_fail(from, "scores", "is no array of floats");
    }
    v->order = (uint32_t *)avl__alloc_raw((uint64_t)v->n_tokens, sizeof *v->order);
    if (!v->order) return avl__vocab_no_memory(from);
    for (i = 0; i < v->n_tokens; i++) {
        float score = (float)astrovl_gguf_float(from->file, index, (uint64_t)i) + 0.0f;   // no -0
        uint32_t bits = avl__float_bits(score);
        if (score != score) return avl__vocab_fail(from, "scores", "holds a score that is not a number");
        v->order[i] = ~(bits >> 31 ? ~bits : bits | 0x80000000u);
    }
    return ASTROVL_OK;
}

static void avl__vocab_find_byte_pieces(avl__vocab *v) {
    int i;
    memset(v->byte_ids, 0xFF, sizeof v->byte_ids);
    for (i = 0; i < v->n_tokens; i++) {
        int byte = v->types[i] == AVL__TOKEN_BYTE ? avl__byte_piece(v->pieces[i]) : -1;
        if (byte >= 0 && v->byte_ids[byte] < 0) v->byte_ids[byte] = i;
    }
    v->has_bytes = 1;
    for (i = 0; i < 256; i++) v->has_bytes &= v->byte_ids[i] >= 0;
}

// Byte-level BPE spells each byte as one printable character (GPT-2's bytes_to_unicode): the printable bytes of Latin-1
// as themselves, the other 68 in their order as U+0100 and up.
static uint32_t avl__byte_to_char(uint32_t byte) {
    if (byte <= 32) return 256 + byte;
    if (byte >= 127 && byte <= 160) return 289 + (byte - 127);
    return byte == 173 ? 323 : byte;
}

static int avl__char_to_byte(int32_t c) {   // -1: a character that spells no byte
    if (c >= 256 && c <= 288) return c - 256;
    if (c >= 289 && c <= 322) return c - 289 + 127;
    if (c == 323) return 173;
    return c > 32 && c < 256 && avl__byte_to_char((uint32_t)c) == (uint32_t)c ? c : -1;
}

static size_t avl__byte_spelling(uint32_t byte, char spelling[4]) {   // its length in UTF-8
    return avl__utf8_write(avl__byte_to_char(byte), spelling);
}

static astrovl_status avl__vocab_alloc_merges(avl__vocab *v, const avl__vocab_source *from, uint32_t count) {
    uint32_t slots = avl__table_slots(count);
    v->merge_slots = (avl__merge_slot *)avl__alloc_raw(slots, sizeof *v->merge_slots);
    if (!v->merge_slots) return avl__vocab_no_memory(from);
    v->merge_mask = slots - 1;
    memset(v->merge_slots, 0xFF, slots * sizeof *v->merge_slots);   // every left is -1
    return ASTROVL_OK;
}

static void avl__merge_put(avl__vocab *v, int32_t left, int32_t right, int32_t id, uint32_t rank) {
    avl__merge_slot *slot = avl__merge_slot_of(v, left, right);
    if (slot->left >= 0) return;   // the first of equals counts
    slot->left = left;
    slot->right = right;
    slot->id = id;
    slot->rank = rank;
}

// BPE: the merges, "left right" in the order of their rank. Both and what they make must be tokens.
static astrovl_status avl__vocab_load_merges(avl__vocab *v, const avl__vocab_source *from) {
    int index;
    uint32_t count, i;
    astrovl_status status = avl__vocab_array(from, "merges", &index);
    if (status != ASTROVL_OK) return status;
    if (index < 0 && v->cleaner) return avl__vocab_alloc_merges(v, from, (uint32_t)v->n_tokens);   // recovered later
    if (index < 0) return avl__vocab_fail(from, "merges", "is missing: a gpt2 vocabulary needs it");
    if (avl__vocab_item_type(from, index) != ASTROVL_VALUE_STRING) {
        return avl__vocab_fail(from, "merges", "is no array of strings");
    }
    if (avl__vocab_count(from, index) > AVL__MAX_TOKENS) {
        return avl__vocab_fail(from, "merges", "has more than 2^26 elements");
    }
    count = (uint32_t)avl__vocab_count(from, index);
    status = avl__vocab_alloc_merges(v, from, count);
    if (status != ASTROVL_OK) return status;
    for (i = 0; i < count; i++) {
        astrovl_string text = astrovl_gguf_string(from->file, index, i), a, b;
        const char *space = text.size > 1 ? (const char *)memchr(text.data + 1, ' ', text.size - 1) : NULL;
        int32_t left, right, id;
        if (!space) {
            return avl__fail(from->err, ASTROVL_ERROR_FORMAT, "%s: %smerges[%d] has no space between two pieces",
                             astrovl_gguf_name(from->file), from->prefix, (int)i);
        }
        a = avl__string(text.data, (size_t)(space - text.data));
        b = avl__string(space + 1, text.size - a.size - 1);
        left = avl__vocab_find(v, a.data, a.size);
        right = avl__vocab_find(v, b.data, b.size);
        id = avl__vocab_find_joined(v, a, b);
        if (left < 0 || right < 0 || id < 0) {
            return avl__fail(from->err, ASTROVL_ERROR_FORMAT, "%s: %smerges[%d] \"%S\" names a piece that is no token",
                             astrovl_gguf_name(from->file), from->prefix, (int)i, text);
        }
        avl__merge_put(v, left, right, id, i);
    }
    return ASTROVL_OK;
}

// The parts that only byte-level BPE has.
static astrovl_status avl__vocab_load_bpe(avl__vocab *v, const avl__vocab_source *from) {
    uint32_t byte;
    avl__expand_table(avl__letter_table, v->letters, AVL__LETTER_BOUNDS);
    avl__expand_table(avl__number_table, v->numbers, AVL__NUMBER_BOUNDS);
    for (byte = 0; byte < 256; byte++) {
        char spelling[4];
        astrovl_string s = avl__string(spelling, avl__byte_spelling(byte, spelling));
        v->byte_ids[byte] = avl__vocab_find(v, s.data, s.size);
        v->last_byte_ids[byte] = avl__vocab_find_joined(v, s, avl__string(AVL__WORD_END, strlen(AVL__WORD_END)));
    }
    return avl__vocab_load_merges(v, from);
}

// All parts of a vocabulary whose kind is known.
static astrovl_status avl__vocab_load_parts(avl__vocab *v, const avl__vocab_source *from) {
    astrovl_status status = avl__vocab_load_pieces(v, from);
    if (status == ASTROVL_OK) status = avl__vocab_load_ids(v, from);
    if (status == ASTROVL_OK) status = avl__vocab_load_types(v, from);
    if (status == ASTROVL_OK) status = avl__vocab_load_markers(v, from);
    if (status != ASTROVL_OK) return status;
    avl__vocab_mark_ends(v);
    if (v->kind == AVL__VOCAB_BPE) return avl__vocab_load_bpe(v, from);
    avl__vocab_find_byte_pieces(v);
    return avl__vocab_load_scores(v, from);
}

// ---- merging -------------------------------------------------------------------------------------------------------
// The symbols of a text are a linked list; a heap holds every adjacent pair that could be merged, the best on top.
// Merging a pair lets the left symbol grow over the right one and offers the two new pairs. Pairs that a merge has
// overtaken stay in the heap, and are known, when they come up, by their length.

typedef struct avl__symbol {
    int32_t start, size;    // bytes of the text; size 0: swallowed by the symbol on its left
    int32_t prev, next;     // -1: none
    int32_t id;             // -1: not a token (yet)
    int32_t frozen;         // 1: takes part in no merge
} avl__symbol;

typedef struct avl__candidate {
    uint32_t order;         // the lowest goes first, of equals the leftmost
    int32_t  left;          // index of the left symbol
    int32_t  size;          // bytes of both
    int32_t  id;            // of the token they make
} avl__candidate;

// Everything that turning one text into tokens needs.
typedef struct avl__encoder {
    const avl__vocab *v;
    avl__tokens      *out;
    const char       *text;        // what symbols point into
    avl__symbol      *symbols;
    size_t            n_symbols, symbol_capacity;
    avl__candidate   *heap;
    size_t            n_heap, heap_capacity;
    int32_t          *splits;      // SPM with UNUSED tokens: [n_tokens] bytes of the left half it was merged from
    avl__bytes        buffer;      // the text as its tokenizer normalises it
    avl__bytes        cleaned;     // CLIP: the same, composed and in lower case
    avl__bytes        spelling;    // a word in byte-level spelling
} avl__encoder;

static void avl__encoder_free(avl__encoder *e) {
    astrovl_free(e->symbols);
    astrovl_free(e->heap);
    astrovl_free(e->splits);
    astrovl_free(e->buffer.data);
    astrovl_free(e->cleaned.data);
    astrovl_free(e->spelling.data);
}

// Appends a symbol to the list; 0: memory is out.
static int avl__symbol_put(avl__encoder *e, size_t start, size_t size, int32_t id, int frozen) {
    avl__symbol *s;
    if (!avl__grow(&e->symbols, &e->symbol_capacity, e->n_symbols + 1, sizeof *e->symbols)) return 0;
    s = &e->symbols[e->n_symbols];
    s->start = (int32_t)start;
    s->size = (int32_t)size;
    s->prev = (int32_t)e->n_symbols - 1;
    s->next = -1;
    s->id = id;
    s->frozen = frozen;
    if (e->n_symbols) e->symbols[e->n_symbols - 1].next = (int32_t)e->n_symbols;
    e->n_symbols++;
    return 1;
}

static int avl__candidate_before(const avl__candidate *a, const avl__candidate *b) {
    return a->order < b->order || (a->order == b->order && a->left < b->left);
}

static int avl__heap_put(avl__encoder *e, const avl__candidate *candidate) {   // 0: memory is out
    size_t at = e->n_heap;
    if (!avl__grow(&e->heap, &e->heap_capacity, e->n_heap + 1, sizeof *e->heap)) return 0;
    e->n_heap++;
    while (at > 0 && avl__candidate_before(candidate, &e->heap[(at - 1) / 2])) {
        e->heap[at] = e->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    e->heap[at] = *candidate;
    return 1;
}

static avl__candidate avl__heap_take(avl__encoder *e) {   // the heap is not empty
    avl__candidate top = e->heap[0], last = e->heap[--e->n_heap];
    size_t at = 0, child;
    while ((child = 2 * at + 1) < e->n_heap) {
        if (child + 1 < e->n_heap && avl__candidate_before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!avl__candidate_before(&e->heap[child], &last)) break;
        e->heap[at] = e->heap[child];
        at = child;
    }
    e->heap[at] = last;
    return top;
}

// Text can become these by merging; the others are never spelled by accident.
static int avl__is_mergeable(const avl__vocab *v, int32_t id) {
    int type = v->types[id];
    return type == AVL__TOKEN_NORMAL || type == AVL__TOKEN_USER_DEFINED || type == AVL__TOKEN_UNUSED;
}

// What two adjacent symbols make: 0 if nothing.
static int avl__merge_of(const avl__encoder *e, const avl__symbol *left, const avl__symbol *right,
                         avl__candidate *candidate) {
    const avl__vocab *v = e->v;
    candidate->size = left->size + right->size;
    if (v->kind == AVL__VOCAB_SPM) {
        if (left->frozen || right->frozen || (size_t)candidate->size > v->longest) return 0;
        candidate->id = avl__vocab_find(v, e->text + left->start, (size_t)candidate->size);
        if (candidate->id < 0 || !avl__is_mergeable(v, candidate->id)) return 0;
        candidate->order = v->order[candidate->id];
    } else {
        const avl__merge_slot *slot = avl__merge_slot_of(v, left->id, right->id);
        if (slot->left < 0) return 0;
        candidate->id = slot->id;
        candidate->order = slot->rank;
    }
    return 1;
}

// Offers the pair that starts with symbol `left`; 0: memory is out.
static int avl__offer_pair(avl__encoder *e, int32_t left) {
    avl__candidate candidate;
    int32_t right = left < 0 ? -1 : e->symbols[left].next;
    if (right < 0 || !avl__merge_of(e, &e->symbols[left], &e->symbols[right], &candidate)) return 1;
    candidate.left = left;
    return avl__heap_put(e, &candidate);
}

// Merges the symbols until no pair makes a token; 0: memory is out.
static int avl__merge_symbols(avl__encoder *e) {
    size_t i;
    e->n_heap = 0;
    for (i = 0; i + 1 < e->n_symbols; i++)
        if (!avl__offer_pair(e, (int32_t)i)) return 0;
    while (e->n_heap) {
        avl__candidate c = avl__heap_take(e);
        avl__symbol *left = &e->symbols[c.left], *right;
        if (left->size == 0 || left->next < 0) continue;
        right = &e->symbols[left->next];
        if (left->size + right->size != c.size) continue;
        if (e->splits) e->splits[c.id] = left->size;
        left->size = c.size;
        left->id = c.id;
        left->next = right->next;
        right->size = 0;
        if (left->next >= 0) e->symbols[left->next].prev = c.left;
        if (!avl__offer_pair(e, left->prev) || !avl__offer_pair(e, c.left)) return 0;
    }
    return 1;
}

// ---- SentencePiece -------------------------------------------------------------------------------------------------

// The text as pieces spell it: a space in front, spaces as U+2581, a byte that is not UTF-8 as U+FFFD.
static void avl__spm_normalize(avl__encoder *e, const char *text, size_t size) {
    size_t at = 0, length;
    e->buffer.size = 0;
    if (e->v->add_space_prefix) avl__bytes_put_text(&e->buffer, AVL__SPACE_MARK);
    while (at < size) {
        int32_t c;
        if (text[at] == ' ') {
            avl__bytes_put_text(&e->buffer, AVL__SPACE_MARK);
            at++;
            continue;
        }
        c = avl__utf8_read(text + at, size - at, &length);
        if (c < 0) {
            avl__bytes_put_text(&e->buffer, AVL__REPLACEMENT);
            length = 1;
        } else avl__bytes_put(&e->buffer, text + at, length);
        at += length;
    }
}

// One symbol per character, or per user-defined token, which stays as it is.
static int avl__spm_split(avl__encoder *e) {
    const avl__vocab *v = e->v;
    size_t at = 0, size = e->buffer.size, length;
    e->text = e->buffer.data;
    e->n_symbols = 0;
    while (at < size) {
        int32_t id = avl__markers_match(v, &v->user_defined, e->text + at, size - at);
        int frozen = id >= 0;
        if (frozen) length = v->pieces[id].size;
        else {
            avl__utf8_read(e->text + at, size - at, &length);
            id = avl__vocab_find(v, e->text + at, length);
            if (id >= 0 && !avl__is_mergeable(v, id)) id = -1;
        }
        if (!avl__symbol_put(e, at, length, id, frozen)) return 0;
        at += length;
    }
    return 1;
}

// Undoes the last merge of a symbol whose token is UNUSED; 0 if there was none. Its right half is the symbol that stood
// there.
static int avl__spm_undo_merge(avl__encoder *e, int32_t index) {
    avl__symbol *s = &e->symbols[index], *right;
    int32_t left_size = s->id >= 0 && e->splits && e->v->types[s->id] == AVL__TOKEN_UNUSED ? e->splits[s->id] : 0;
    int32_t low = index, high = (int32_t)e->n_symbols - 1;
    if (left_size == 0) return 0;
    while (low < high) {
        int32_t middle = low + (high - low + 1) / 2;
        if (e->symbols[middle].start <= s->start + left_size) low = middle;
        else high = middle - 1;
    }
    right = &e->symbols[low];
    right->size = s->size - left_size;
    right->next = s->next;
    right->id = avl__vocab_find(e->v, e->text + right->start, (size_t)right->size);
    s->size = left_size;
    s->next = low;
    s->id = avl__vocab_find(e->v, e->text + s->start, (size_t)left_size);
    return 1;
}

// Appends the tokens of all symbols; 0: memory is out. A symbol that is no token goes as its bytes, or as the unknown
// token, once for a run of such symbols.
static int avl__spm_emit(avl__encoder *e) {
    const avl__vocab *v = e->v;
    int32_t index = e->n_symbols ? 0 : -1;
    int was_unknown = 0;
    for (; index >= 0; index = e->symbols[index].next) {
        const avl__symbol *s = &e->symbols[index];
        int32_t i;
        while (avl__spm_undo_merge(e, index)) {}
        if (s->id >= 0) {
            if (!avl__tokens_put(e->out, s->id)) return 0;
        } else if (v->has_bytes) {
            for (i = 0; i < s->size; i++)
                if (!avl__tokens_put(e->out, v->byte_ids[(uint8_t)e->text[s->start + i]])) return 0;
        } else if (v->unk >= 0 && !was_unknown) {
            if (!avl__tokens_put(e->out, v->unk)) return 0;
        }
        was_unknown = s->id < 0;
    }
    return 1;
}

static int avl__spm_encode(avl__encoder *e, const char *text, size_t size) {   // 0: memory is out
    if (e->v->has_unused && !e->splits) {
        e->splits = (int32_t *)avl__alloc((uint64_t)e->v->n_tokens, sizeof *e->splits);
        if (!e->splits) return 0;
    }
    avl__spm_normalize(e, text, size);
    return !e->buffer.failed && avl__spm_split(e) && avl__merge_symbols(e) && avl__spm_emit(e);
}

// ---- byte-level BPE: words -----------------------------------------------------------------------------------------
// Each function returns where the word that starts at text[at] ends, at < end. \s, \p{L}, \p{N} are classes SPACE,
// LETTER, NUMBER; [^\s\p{L}\p{N}] is OTHER.

// The end of the run of one class.
static size_t avl__run_end(const avl__vocab *v, const char *text, size_t at, size_t end, avl__class wanted) {
    size_t length;
    while (avl__class_at(v, text, at, end, &length) == wanted) at += length;
    return at;
}

// 's|'t|'re|'ve|'m|'ll|'d: the length of one, or 0. fold: in capitals as well (the long s, U+017F, folds to s too).
static size_t avl__contraction(const char *text, size_t size, int fold) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    size_t i, n;
    if (size < 2 || text[0] != '\'') return 0;
    if (fold && size > 2 && memcmp(text + 1, "\xC5\xBF", 2) == 0) return 3;
    for (i = 0; i < sizeof endings / sizeof *endings; i++) {
        for (n = 0; endings[i][n] && n + 1 < size; n++) {
            char c = text[n + 1];
            if (fold && c >= 'A' && c <= 'Z') c = (char)(c + 32);
            if (c != endings[i][n]) break;
        }
        if (!endings[i][n]) return n + 1;
    }
    return 0;
}

// \s+(?!\S)|\s+: white space that ends the text; otherwise all but its last character, which goes to the next word.
static size_t avl__spaces_end(const avl__vocab *v, const char *text, size_t at, size_t end) {
    size_t next = at, last = at, length;
    while (avl__class_at(v, text, next, end, &length) == AVL__CLASS_SPACE) {
        last = next;
        next += length;
    }
    return next < end && last > at ? last : next;
}

// GPT-2: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static size_t avl__word_gpt2(const avl__vocab *v, const char *text, size_t at, size_t end) {
    size_t length, n = avl__contraction(text + at, end - at, 0), first = at + (text[at] == ' ');
    avl__class c = avl__class_at(v, text, first, end, &length);
    if (n) return at + n;
    if (c == AVL__CLASS_SPACE || c == AVL__CLASS_END) return avl__spaces_end(v, text, at, end);
    return avl__run_end(v, text, first, end, c);
}

// LLaMA-3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
//          \s*[\r\n]+|\s+(?!\S)|\s+
static size_t avl__word_llama3(const avl__vocab *v, const char *text, size_t at, size_t end) {
    size_t length, next_length, i, newline = 0, n = avl__contraction(text + at, end - at, 1);
    avl__class c = avl__class_at(v, text, at, end, &length);
    if (n) return at + n;
    if (c == AVL__CLASS_LETTER) return avl__run_end(v, text, at, end, c);
    if (c == AVL__CLASS_NUMBER) {
        for (i = 0; i < 3 && avl__class_at(v, text, at, end, &length) == AVL__CLASS_NUMBER; i++) at += length;
        return at;
    }
    if (text[at] != '\r' && text[at] != '\n' &&
        avl__class_at(v, text, at + length, end, &next_length) == AVL__CLASS_LETTER) {
        return avl__run_end(v, text, at + length, end, AVL__CLASS_LETTER);
    }
    i = at + (text[at] == ' ');
    if (avl__class_at(v, text, i, end, &next_length) == AVL__CLASS_OTHER) {
        i = avl__run_end(v, text, i, end, AVL__CLASS_OTHER);
        while (i < end && (text[i] == '\r' || text[i] == '\n')) i++;
        return i;
    }
    for (i = at; avl__class_at(v, text, i, end, &length) == AVL__CLASS_SPACE; i += length)
        if (text[i] == '\r' || text[i] == '\n') newline = i + 1;
    return newline ? newline : avl__spaces_end(v, text, at, end);
}

// CLIP: 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+   White space is a word here, which the caller drops.
static size_t avl__word_clip(const avl__vocab *v, const char *text, size_t at, size_t end) {
    size_t length, n = avl__contraction(text + at, end - at, 0);
    avl__class c = avl__class_at(v, text, at, end, &length);
    if (n) return at + n;
    return c == AVL__CLASS_NUMBER ? at + length : avl__run_end(v, text, at, end, c);
}

// SmolLM: every \p{N} stands alone; GPT-2's rule cuts what lies between, without seeing past it. Returns the end of
// such a part.
static size_t avl__digit_part_end(const avl__vocab *v, const char *text, size_t at, size_t end) {
    size_t length;
    avl__class c = avl__class_at(v, text, at, end, &length);
    if (c == AVL__CLASS_NUMBER) return at + length;
    while (c != AVL__CLASS_NUMBER && c != AVL__CLASS_END) {
        at += length;
        c = avl__class_at(v, text, at, end, &length);
    }
    return at;
}

// ---- byte-level BPE: tokens ----------------------------------------------------------------------------------------

// The token that a whole word is, or -1.
static int32_t avl__whole_word(avl__encoder *e, const char *word, size_t size) {
    size_t i;
    int32_t id;
    if (size > e->v->longest) return -1;
    e->spelling.size = 0;
    for (i = 0; i < size; i++) {
        char spelling[4];
        size_t n = avl__byte_spelling((uint8_t)word[i], spelling);
        avl__bytes_put(&e->spelling, spelling, n);
    }
    if (e->spelling.failed) return -1;   // the caller looks at `failed`
    id = avl__vocab_find(e->v, e->spelling.data, e->spelling.size);
    return id >= 0 && e->v->types[id] == AVL__TOKEN_NORMAL ? id : -1;
}

// A byte whose symbol the vocabulary lacks (SmolLM2 lacks some control characters) gives nothing, as in `tokenizers`, unless
// there is a token for the unknown (CLIP).
static int avl__bpe_encode_word(avl__encoder *e, const char *word, size_t size) {   // 0: memory is out
    const avl__vocab *v = e->v;
    int32_t index, id = v->whole_words ? avl__whole_word(e, word, size) : -1;
    size_t i;
    if (e->spelling.failed) return 0;
    if (id >= 0) return avl__tokens_put(e->out, id);
    e->n_symbols = 0;
    for (i = 0; i < size; i++) {
        id = (v->cleaner && i + 1 == size ? v->last_byte_ids : v->byte_ids)[(uint8_t)word[i]];
        if (id < 0 && v->cleaner) id = v->unk;
        if (id >= 0 && !avl__symbol_put(e, i, 1, id, 0)) return 0;
    }
    if (e->n_symbols == 0) return 1;
    if (!avl__merge_symbols(e)) return 0;
    for (index = 0; index >= 0; index = e->symbols[index].next)
        if (!avl__tokens_put(e->out, e->symbols[index].id)) return 0;
    return 1;
}

static int avl__bpe_encode(avl__encoder *e, const char *text, size_t size) {   // 0: memory is out
    const avl__vocab *v = e->v;
    avl__utf8_gate gate;
    size_t at = 0, part = 0, end;   // part: how far the word rule may look
    memset(&gate, 0, sizeof gate);
    e->buffer.size = 0;
    avl__utf8_gate_put(&gate, text, size, &e->buffer);   // valid UTF-8 from here on
    avl__utf8_gate_flush(&gate, &e->buffer);
    if (e->buffer.failed) return 0;
    text = e->buffer.data;
    size = e->buffer.size;
    if (v->cleaner) {
        e->cleaned.size = 0;
        if (!avl__clean(v->cleaner, text, size, &e->cleaned)) return 0;
        text = e->cleaned.data;
        size = e->cleaned.size;
    }
    for (; at < size; at = end) {
        size_t length;
        if (v->rule == AVL__WORDS_CLIP) {
            end = avl__word_clip(v, text, at, size);
            if (avl__class_at(v, text, at, end, &length) != AVL__CLASS_SPACE && !avl__bpe_encode_word(e, text + at, end - at)) return 0;
            continue;
        }
        if (at == part) part = v->rule == AVL__WORDS_SMOLLM ? avl__digit_part_end(v, text, at, size) : size;
        end = v->rule == AVL__WORDS_LLAMA3 ? avl__word_llama3(v, text, at, part) : avl__word_gpt2(v, text, at, part);
        if (!avl__bpe_encode_word(e, text + at, end - at)) return 0;
    }
    return 1;
}

// ---- text to tokens ------------------------------------------------------------------------------------------------

// Where the next special token starts (size if there is none), and its id.
static size_t avl__next_special(const avl__vocab *v, const char *text, size_t at, size_t size, int32_t *id) {
    for (; at < size; at++)
        if ((*id = avl__markers_match(v, &v->special, text + at, size - at)) >= 0) return at;
    *id = -1;
    return size;
}

// The text between special tokens is encoded part by part, each as if it stood alone: so in SPM each gets a space in
// front.
static int avl__encode_parts(avl__encoder *e, const char *text, size_t size, int parse_special) {   // 0: memory is out
    size_t at = 0, end;
    int32_t id = -1;
    while (at < size) {
        end = parse_special ? avl__next_special(e->v, text, at, size, &id) : size;
        if (end > at && !(e->v->kind == AVL__VOCAB_SPM ? avl__spm_encode(e, text + at, end - at)
                                                       : avl__bpe_encode(e, text + at, end - at))) return 0;
        if (id >= 0 && !avl__tokens_put(e->out, id)) return 0;
        at = end + (id >= 0 ? e->v->pieces[id].size : 0);
    }
    return 1;
}

// Appends the tokens of any bytes to out; on failure out is as before. flags: ASTROVL_ADD_SPECIAL |
// ASTROVL_PARSE_SPECIAL.
static astrovl_status avl__vocab_encode(const avl__vocab *v, const char *text, size_t size, int flags, avl__tokens *out,
                                        astrovl_error *err) {
    avl__encoder e;
    size_t before = out->size;
    int ok = 1;
    if (size > INT32_MAX / 4) {
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "a text of %l bytes is too long", (int64_t)size);
    }
    memset(&e, 0, sizeof e);
    e.v = v;
    e.out = out;
    if ((flags & ASTROVL_ADD_SPECIAL) && v->add_bos && v->bos >= 0) ok = avl__tokens_put(out, v->bos);
    ok = ok && avl__encode_parts(&e, text, size, flags & ASTROVL_PARSE_SPECIAL);
    if (ok && (flags & ASTROVL_ADD_SPECIAL) && v->add_eos && v->eos >= 0) ok = avl__tokens_put(out, v->eos);
    avl__encoder_free(&e);
    if (ok) return ASTROVL_OK;
    out->size = before;
    return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the tokens of a text of %l bytes", (int64_t)size);
}

// ---- CLIP's vocabulary ---------------------------------------------------------------------------------------------

// The symbols that a piece starts from: one per byte's character, the last one with its "</w>". 0: memory is out; *whole: 0 if
// the piece holds a symbol that is no token.
static int avl__clip_split_piece(avl__encoder *e, astrovl_string piece, int *whole) {
    size_t at = 0, length, end = strlen(AVL__WORD_END);
    size_t text = piece.size > end && memcmp(piece.data + piece.size - end, AVL__WORD_END, end) == 0 ? piece.size - end : piece.size;
    e->n_symbols = 0;
    *whole = text > 0 && piece.size < 65536;
    for (; at < text && *whole; at += length) {
        int32_t id;
        avl__utf8_read(piece.data + at, text - at, &length);
        if (at + length == text) length = piece.size - at;
        id = avl__vocab_find(e->v, piece.data + at, length);
        *whole = id >= 0;
        if (*whole && !avl__symbol_put(e, at, length, id, 0)) return 0;
    }
    return 1;
}

// clip.cpp's files hold no merges. They are recovered from the order of the vocabulary, in which every merge appended the token
// it makes: a token's own pair is what its characters come to by the merges before it. 0: memory is out.
static int avl__clip_recover_merges(avl__vocab *v) {
    avl__encoder e;
    int32_t id;
    int ok = 1, whole;
    memset(&e, 0, sizeof e);
    e.v = v;
    for (id = 0; id < v->n_tokens && ok; id++) {
        const avl__symbol *left, *right;
        if (v->types[id] != AVL__TOKEN_NORMAL) continue;
        ok = avl__clip_split_piece(&e, v->pieces[id], &whole);
        if (!ok || !whole || e.n_symbols < 2) continue;
        ok = avl__merge_symbols(&e);
        left = &e.symbols[0];
        if (!ok || left->next < 0) continue;
        right = &e.symbols[left->next];
        if (right->next < 0) avl__merge_put(v, left->id, right->id, id, (uint32_t)id);
    }
    avl__encoder_free(&e);
    return ok;
}

// CLIP's kind is not told by a key.
static astrovl_status avl__vocab_load_clip(avl__vocab *v, const avl__vocab_source *from) {
    astrovl_status status;
    v->kind = AVL__VOCAB_BPE;
    v->rule = AVL__WORDS_CLIP;
    v->add_bos = v->add_eos = 1;
    v->cleaner = (avl__cleaner *)avl__alloc(1, sizeof *v->cleaner);
    if (!v->cleaner) return avl__vocab_no_memory(from);
    avl__fill_cleaner(v->cleaner);
    status = avl__vocab_load_parts(v, from);
    if (status != ASTROVL_OK) return status;
    if (v->bos < 0 || v->eos < 0)
        return avl__fail(from->err, ASTROVL_ERROR_MODEL, "%s: CLIP's vocabulary lacks %s", astrovl_gguf_name(from->file),
                         v->bos < 0 ? AVL__CLIP_START : AVL__CLIP_END);
    return avl__vocab_entry(from, "merges") < 0 && !avl__clip_recover_merges(v) ? avl__vocab_no_memory(from) : ASTROVL_OK;
}

// ---- a vocabulary as a whole ---------------------------------------------------------------------------------------

// prefix: "tokenizer.ggml.", before every key;  clip: 1 for the vocabulary of CLIP's text tower, 0 for a language model's. The file
// must outlive the vocabulary, which points into it.
static astrovl_status avl__vocab_load(avl__vocab *v, const astrovl_gguf *file, const char *prefix, int clip, astrovl_error *err) {
    avl__vocab_source from;
    astrovl_status status;
    from.file = file;
    from.prefix = prefix;
    from.err = err;
    memset(v, 0, sizeof *v);
    if (clip) status = avl__vocab_load_clip(v, &from);
    else {
        status = avl__vocab_load_kind(v, &from);
        if (status == ASTROVL_OK) status = avl__vocab_load_parts(v, &from);
    }
    if (status != ASTROVL_OK) avl__vocab_free(v);
    return status;
}

// ---- tokens to text ------------------------------------------------------------------------------------------------

// Copies what fits and returns how long the whole is.
typedef struct avl__text_out { char *text; int capacity, size; } avl__text_out;

static void avl__text_put(avl__text_out *out, char c) {
    if (out->size < out->capacity) out->text[out->size] = c;
    out->size++;
}

static void avl__put_literally(avl__text_out *out, astrovl_string piece) {
    size_t i;
    for (i = 0; i < piece.size; i++) avl__text_put(out, piece.data[i]);
}

static void avl__put_spm_piece(avl__text_out *out, astrovl_string piece) {
    size_t i = 0;
    while (i < piece.size) {
        int space = piece.size - i >= 3 && memcmp(piece.data + i, AVL__SPACE_MARK, 3) == 0;
        avl__text_put(out, space ? ' ' : piece.data[i]);
        i += space ? 3 : 1;
    }
}

// Characters back to bytes; a piece with a character that spells no byte is text as it stands.
static void avl__put_bpe_piece(avl__text_out *out, astrovl_string piece) {
    size_t i, length;
    int size = out->size;
    for (i = 0; i < piece.size; i += length) {
        int byte = avl__char_to_byte(avl__utf8_read(piece.data + i, piece.size - i, &length));
        if (byte < 0) {
            out->size = size;
            avl__put_literally(out, piece);
            return;
        }
        avl__text_put(out, (char)byte);
    }
}

// The bytes a token stands for in running text: copies at most capacity of them, returns how many there are. Special
// tokens give none. A character may be spread over several tokens: avl__utf8_gate puts it together.
static int avl__vocab_token_bytes(const avl__vocab *v, int32_t id, char *text, int capacity) {
    avl__text_out out;
    astrovl_string piece = avl__vocab_piece(v, id);
    out.text = text;
    out.capacity = capacity;
    out.size = 0;
    if (id < 0 || id >= v->n_tokens || piece.size > INT32_MAX) return 0;
    switch (v->types[id]) {
    case AVL__TOKEN_CONTROL:
    case AVL__TOKEN_UNKNOWN: break;
    case AVL__TOKEN_BYTE:
        if (avl__byte_piece(piece) >= 0) avl__text_put(&out, (char)avl__byte_piece(piece));
        break;
    default:
        if (v->kind == AVL__VOCAB_SPM) avl__put_spm_piece(&out, piece);
        else if (v->types[id] == AVL__TOKEN_USER_DEFINED) avl__put_literally(&out, piece);
        else avl__put_bpe_piece(&out, piece);
    }
    return out.size;
}

// ====================================================================================================================
// [8] Images
// Files to 8-bit RGB, and the few whole-image operations that the models' preprocessing needs. The reference is Pillow,
// because the models learned from pixels that it produced: Image.open(f).convert("RGB") and Image.resize(..., BICUBIC).
// PNG: ISO/IEC 15948, with zlib and deflate after RFC 1950 and RFC 1951. JPEG: ITU-T T.81 and the JFIF and Adobe
// conventions, with the integer arithmetic of libjpeg's default decoder. PNM: the netpbm manual pages.
// A decoder here never allocates more than a small multiple of what the file's bytes could expand to.
// ==================================================================================================================

// ---- whole images -------------------------------------------------------------------------------------------------

ASTROVL_API void astrovl_image_free(astrovl_image *image) {
    if (!image) return;
    astrovl_free(image->rgb);
    memset(image, 0, sizeof *image);
}

// Fills `image` with width x height pixels of new memory, not yet written.
static astrovl_status avl__image_new(astrovl_image *image, int width, int height, astrovl_error *err) {
    memset(image, 0, sizeof *image);
    image->rgb = (unsigned char *)avl__alloc_raw((uint64_t)width * (uint64_t)height, 3);
    if (!image->rgb)
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for an image of %d x %d pixels", width, height);
    image->width = width;
    image->height = height;
    image->orientation = 1;
    return ASTROVL_OK;
}

static size_t avl__image_at(const astrovl_image *image, int x, int y) {   // index of pixel (x, y)'s red in rgb
    return ((size_t)y * (size_t)image->width + (size_t)x) * 3;
}

static astrovl_status avl__image_check(const astrovl_image *image, const void *out, astrovl_error *err) {
    if (!image || !image->rgb || image->width < 1 || image->height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the image is empty: no pixels, or a width or height below 1");
    if (!out || out == (const void *)image)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the result needs an image of its own to be put into");
    return ASTROVL_OK;
}

// A file's claim about its size, judged before anything is allocated for it.
static astrovl_status avl__image_check_size(const char *format, uint32_t width, uint32_t height, uint64_t max_pixels,
                                            astrovl_error *err) {
    if (width == 0 || height == 0)
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "%s: the header gives a size of %l x %l pixels", format,
                         (int64_t)width, (int64_t)height);
    if (width > INT_MAX || height > INT_MAX || (uint64_t)width * height > max_pixels)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "%s: %l x %l pixels are more than the limit of %l", format,
                         (int64_t)width, (int64_t)height, (int64_t)(max_pixels > INT64_MAX ? INT64_MAX : max_pixels));
    return ASTROVL_OK;
}

// Tag 0x0112 of the first directory of EXIF data (a TIFF file in miniature); 1, upright, where it is absent or broken.
static int avl__exif_orientation(const uint8_t *tiff, size_t size) {
    uint32_t at, i, n;
    int big;
    if (size < 8 || (memcmp(tiff, "II*\0", 4) != 0 && memcmp(tiff, "MM\0*", 4) != 0)) return 1;
    big = tiff[0] == 'M';
    at = big ? avl__load_u32be(tiff + 4) : avl__load_u32(tiff + 4);
    if (at > size - 2) return 1;
    n = big ? avl__load_u16be(tiff + at) : avl__load_u16(tiff + at);
    for (i = 0; i < n && size - at - 2 >= 12 * ((size_t)i + 1); i++) {
        const uint8_t *entry = tiff + at + 2 + 12 * (size_t)i;   // tag, type, count, value
        int tag = big ? avl__load_u16be(entry) : avl__load_u16(entry);
        int type = big ? avl__load_u16be(entry + 2) : avl__load_u16(entry + 2);
        int value = big ? avl__load_u16be(entry + 8) : avl__load_u16(entry + 8);
        if (tag == 0x0112) return type == 3 && value >= 1 && value <= 8 ? value : 1;
    }
    return 1;
}

// ---- inflate: zlib data (RFC 1950) of known unpacked size ---------------------------------------------------------
// Deflate is a sequence of Huffman-coded literals and of (length, distance) copies from what was already written.

#define AVL__INFLATE_FAST 10   // codes up to this many bits are found by one look-up; the longer, rarer ones bit by bit

typedef struct avl__inflate_code {
    uint16_t fast[1 << AVL__INFLATE_FAST];   // by the next bits: symbol * 16 + code length, or 0: a longer code
    uint16_t count[16];                      // codes of each length
    uint16_t symbol[288];                    // in the order of their codes
} avl__inflate_code;

typedef struct avl__inflate_state {
    const uint8_t *in;
    size_t         n_in, at;       // next byte to read
    uint64_t       bits;           // read and not yet used; the lowest bit is next
    int            n_bits;         // how many of them are real; what lies above is zero or a preview of in[at]
    uint8_t       *out;
    size_t         n_out, n;       // size and how much is written
    int            too_much;       // the data goes on when `out` is full
    avl__inflate_code literals, distances;
} avl__inflate_state;

// Afterwards at least 56 bits are there, unless the input ends.
static void avl__inflate_refill(avl__inflate_state *s) {
    if (s->n_in - s->at >= 8) {
        s->bits |= avl__load_u64(s->in + s->at) << s->n_bits;
        s->at += (size_t)(63 - s->n_bits) >> 3;
        s->n_bits |= 56;
        return;
    }
    for (; s->n_bits <= 56 && s->at < s->n_in; s->n_bits += 8) s->bits |= (uint64_t)s->in[s->at++] << s->n_bits;
}

// The next n <= 16 bits of what refill made ready. Past the input's end n_bits falls below 0; callers check.
static unsigned avl__inflate_bits(avl__inflate_state *s, int n) {
    unsigned value = (unsigned)(s->bits & (((uint64_t)1 << n) - 1));
    s->bits >>= n;
    s->n_bits -= n;
    return value;
}

// Builds the canonical code with these lengths (RFC 1951, 3.2.2): codes of one length are consecutive, in symbol
// order, and follow those of smaller length. Returns 0 if the lengths do not describe a prefix code that uses all bit
// patterns (a single code of one bit, or none at all, is allowed: that is how few distances are written).
static int avl__inflate_code_new(avl__inflate_code *code, const uint8_t *lengths, int n) {
    unsigned first[16], next = 0;
    int i, length, left = 1, used = 0, place[16];
    memset(code, 0, sizeof *code);
    for (i = 0; i < n; i++) code->count[lengths[i]]++;
    code->count[0] = 0;
    for (length = 1, place[0] = 0; length < 16; length++) {
        left = left * 2 - code->count[length];
        if (left < 0) return 0;
        next = (next + code->count[length - 1]) * 2;
        first[length] = next;
        place[length] = used;
        used += code->count[length];
    }
    if (left > 0 && used > code->count[1]) return 0;
    for (i = 0; i < n; i++) {
        unsigned word, reversed = 0, step;
        length = lengths[i];
        if (length == 0) continue;
        code->symbol[place[length]++] = (uint16_t)i;
        word = first[length]++;
        if (length > AVL__INFLATE_FAST) continue;
        for (step = 0; step < (unsigned)length; step++) reversed |= (word >> step & 1) << (length - 1 - (int)step);
        for (step = reversed; step < 1u << AVL__INFLATE_FAST; step += 1u << length)   // any bits may follow
            code->fast[step] = (uint16_t)(i * 16 + length);
    }
    return 1;
}

// The next symbol, or -1 for a bit pattern that is no code.
static int avl__inflate_symbol(avl__inflate_state *s, const avl__inflate_code *code) {
    unsigned entry = code->fast[s->bits & ((1u << AVL__INFLATE_FAST) - 1)];
    int length, word = 0, first = 0, index = 0;
    if (entry) {
        s->bits >>= entry & 15;
        s->n_bits -= (int)(entry & 15);
        return (int)(entry >> 4);
    }
    for (length = 1; length < 16; length++) {   // word: the bits so far; first: the smallest code of this length
        word = word * 2 + (int)avl__inflate_bits(s, 1);
        if (word - first < code->count[length]) return code->symbol[index + word - first];
        index += code->count[length];
        first = (first + code->count[length]) * 2;
    }
    return -1;
}

static astrovl_status avl__inflate_fail(const avl__inflate_state *s, const char *what, astrovl_error *err) {
    return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNG: the compressed data %s, about byte %l of %l in the IDAT chunks",
                     what,
                     (int64_t)s->at, (int64_t)s->n_in);
}

static astrovl_status avl__inflate_stored(avl__inflate_state *s, astrovl_error *err) {
    size_t size;
    (void)avl__inflate_bits(s, s->n_bits & 7);
    s->at -= (size_t)s->n_bits / 8;   // whole bytes go back to the input
    s->bits = 0;
    s->n_bits = 0;
    if (s->n_in - s->at < 4) return avl__inflate_fail(s, "ends too early", err);
    size = avl__load_u16(s->in + s->at);
    if ((size ^ 0xFFFF) != avl__load_u16(s->in + s->at + 2))
        return avl__inflate_fail(s, "has a broken stored block", err);
    s->at += 4;
    if (size > s->n_in - s->at) return avl__inflate_fail(s, "ends too early", err);
    s->too_much = size > s->n_out - s->n;
    if (s->too_much) size = s->n_out - s->n;
    if (size) memcpy(s->out + s->n, s->in + s->at, size);
    s->at += size;
    s->n += size;
    return ASTROVL_OK;
}

// Reads a block's own codes (RFC 1951, 3.2.7): their lengths are themselves Huffman-coded, with repeats.
static astrovl_status avl__inflate_codes(avl__inflate_state *s, astrovl_error *err) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[288 + 32];
    int i, n_literals, n_distances, n_lengths;
    avl__inflate_refill(s);
    n_literals = (int)avl__inflate_bits(s, 5) + 257;
    n_distances = (int)avl__inflate_bits(s, 5) + 1;
    n_lengths = (int)avl__inflate_bits(s, 4) + 4;
    if (n_literals > 286 || n_distances > 30) return avl__inflate_fail(s, "names too many codes", err);
    memset(lengths, 0, sizeof lengths);
    for (i = 0; i < n_lengths; i++) {
        avl__inflate_refill(s);
        lengths[order[i]] = (uint8_t)avl__inflate_bits(s, 3);
    }
    if (!avl__inflate_code_new(&s->literals, lengths, 19))
        return avl__inflate_fail(s, "has a broken code of code lengths", err);
    memset(lengths, 0, sizeof lengths);
    for (i = 0; i < n_literals + n_distances;) {
        int symbol, repeat = 1;
        uint8_t length = 0;
        avl__inflate_refill(s);
        symbol = avl__inflate_symbol(s, &s->literals);
        if (symbol < 0) return avl__inflate_fail(s, "has an unknown code length", err);
        if (symbol < 16) length = (uint8_t)symbol;
        else if (symbol == 16) {
            if (i == 0) return avl__inflate_fail(s, "repeats a code length before the first", err);
            length = lengths[i - 1];
            repeat = 3 + (int)avl__inflate_bits(s, 2);
        } else repeat = symbol == 17 ? 3 + (int)avl__inflate_bits(s, 3) : 11 + (int)avl__inflate_bits(s, 7);
        if (s->n_bits < 0) return avl__inflate_fail(s, "ends too early", err);
        if (repeat > n_literals + n_distances - i) return avl__inflate_fail(s, "repeats a code length too often", err);
        while (repeat--) lengths[i++] = length;
    }
    if (lengths[256] == 0) return avl__inflate_fail(s, "has a block without an end", err);
    if (!avl__inflate_code_new(&s->literals, lengths, n_literals) ||
        !avl__inflate_code_new(&s->distances, lengths + n_literals, n_distances))
        return avl__inflate_fail(s, "has a broken Huffman code", err);
    return ASTROVL_OK;
}

static void avl__inflate_fixed_codes(avl__inflate_state *s) {   // RFC 1951, 3.2.6
    uint8_t lengths[288];
    int i;
    for (i = 0; i < 288; i++) lengths[i] = (uint8_t)(i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8);
    (void)avl__inflate_code_new(&s->literals, lengths, 288);
    memset(lengths, 5, 32);
    (void)avl__inflate_code_new(&s->distances, lengths, 32);
}

// Copies `size` bytes from `distance` back; the two may overlap, which repeats a pattern. There is room for them.
static void avl__inflate_copy(avl__inflate_state *s, size_t distance, size_t size) {
    uint8_t *to = s->out + s->n, *end = to + size;
    const uint8_t *from = to - distance;
    if (distance >= 8 && s->n_out - s->n >= size + 8)   // may write up to 7 bytes too many: they are overwritten later
        for (; to < end; to += 8, from += 8) memcpy(to, from, 8);
    else while (to < end) *to++ = *from++;
    s->n += size;
}

// Literals and copies until the block ends, or until `out` is full.
static astrovl_status avl__inflate_block(avl__inflate_state *s, astrovl_error *err) {
    static const uint16_t length_base[29] = {3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59,
                                             67, 83,
                                             99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_bits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5,
                                            5, 5, 5, 0};
    static const uint16_t distance_base[30] = {1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513,
                                               769,
                                               1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    for (;;) {
        size_t size, distance;
        int symbol;
        if (s->n_bits < 48)
            avl__inflate_refill(s);   // one literal, or a whole copy, takes at most 15 + 5 + 15 + 13 = 48 bits
        symbol = avl__inflate_symbol(s, &s->literals);
        if (s->n_bits < 0) return avl__inflate_fail(s, "ends too early", err);
        if (symbol == 256) return ASTROVL_OK;
        if (symbol >= 0 && symbol < 256) {
            s->too_much = s->n == s->n_out;
            if (s->too_much) return ASTROVL_OK;
            s->out[s->n++] = (uint8_t)symbol;
            continue;
        }
        if (symbol < 0 || symbol > 285) return avl__inflate_fail(s, "has an unknown code", err);
        size = length_base[symbol - 257] + avl__inflate_bits(s, length_bits[symbol - 257]);
        symbol = avl__inflate_symbol(s, &s->distances);
        if (symbol < 0 || symbol > 29) return avl__inflate_fail(s, "has an unknown distance code", err);
        distance = distance_base[symbol] + avl__inflate_bits(s, symbol < 2 ? 0 : symbol / 2 - 1);
        if (s->n_bits < 0) return avl__inflate_fail(s, "ends too early", err);
        if (distance > s->n) return avl__inflate_fail(s, "refers to bytes before its start", err);
        s->too_much = size > s->n_out - s->n;
        avl__inflate_copy(s, distance, s->too_much ? s->n_out - s->n : size);
        if (s->too_much) return ASTROVL_OK;
    }
}

// a = 1 + sum of bytes, b = sum of the a's, both modulo 65521      Adler-32 (RFC 1950)
static uint32_t avl__adler32(const uint8_t *data, size_t size) {
    uint32_t a = 1, b = 0;
    while (size > 0) {
        size_t n = size < 5552 ? size : 5552;   // as many as cannot overflow 32 bits
        size -= n;
        while (n--) { a += *data++; b += a; }
        a %= 65521;
        b %= 65521;
    }
    return b << 16 | a;
}

// The sum of all unpacked bytes stands behind the last block.
static astrovl_status avl__inflate_check_sum(avl__inflate_state *s, astrovl_error *err) {
    (void)avl__inflate_bits(s, s->n_bits & 7);
    s->at -= (size_t)s->n_bits / 8;   // whole bytes go back to the input
    if (s->n_in - s->at < 4) return avl__inflate_fail(s, "ends before its check sum", err);
    if (avl__load_u32be(s->in + s->at) != avl__adler32(s->out, s->n))
        return avl__inflate_fail(s, "does not match its check sum (Adler-32)", err);
    return ASTROVL_OK;
}

// Unpacks exactly s->n_out bytes. Fewer in the data is an error; more are left alone, as in Pillow, and not summed.
static astrovl_status avl__inflate_run(avl__inflate_state *s, astrovl_error *err) {
    int last = 0;
    if (s->n_in < 2 || (s->in[0] & 15) != 8 || s->in[0] >> 4 > 7 || (s->in[1] & 32) || avl__load_u16be(s->in) % 31 != 0)
        return avl__inflate_fail(s, "does not start as zlib data", err);
    s->at = 2;
    while (!last && !s->too_much) {
        astrovl_status status = ASTROVL_OK;
        unsigned kind;
        avl__inflate_refill(s);
        last = (int)avl__inflate_bits(s, 1);
        kind = avl__inflate_bits(s, 2);
        if (s->n_bits < 0) return avl__inflate_fail(s, "ends too early", err);
        if (kind == 3) return avl__inflate_fail(s, "has a block of unknown kind", err);
        if (kind == 1) avl__inflate_fixed_codes(s);
        if (kind == 2) status = avl__inflate_codes(s, err);
        if (!status) status = kind == 0 ? avl__inflate_stored(s, err) : avl__inflate_block(s, err);
        if (status) return status;
    }
    if (s->n < s->n_out) return avl__inflate_fail(s, "holds fewer bytes than the image has", err);
    return s->too_much ? ASTROVL_OK : avl__inflate_check_sum(s, err);
}

// ---- PNG ----------------------------------------------------------------------------------------------------------
// As Pillow converts to RGB: alpha and tRNS are dropped without blending; 16-bit colour keeps the high byte, but
// 16-bit gray (without alpha) is clipped at 255, so that such files come out nearly white; gray of 1, 2 and 4 bits is
// scaled to 0..255; a palette index without a colour is black. Gamma and colour profiles are not applied.

typedef struct avl__png {
    const uint8_t *data;
    size_t         size, at;            // at: the chunk being read
    uint32_t       crc_table[8][256];
    uint32_t       width, height;
    int            depth, color, interlaced;
    int            n_channels;
    uint8_t        colors[256][3];      // RGB of every sample value, for palettes and for gray of up to 8 bits
    int            has_palette;
    uint8_t       *idat;                // the contents of the IDAT chunks, joined
    size_t         idat_size, idat_capacity;
    int            orientation;
} avl__png;

// Tables of the CRC of ISO 3309 for eight bytes at a time: table[k][b] is the effect of byte b with k bytes after it.
static void avl__png_make_crc_table(avl__png *png) {
    uint32_t i, k, c;
    for (i = 0; i < 256; i++) {
        for (c = i, k = 0; k < 8; k++) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
        png->crc_table[0][i] = c;
    }
    for (k = 1; k < 8; k++)
        for (i = 0; i < 256; i++) {
            c = png->crc_table[k - 1][i];
            png->crc_table[k][i] = png->crc_table[0][c & 255] ^ c >> 8;
        }
}

static uint32_t avl__png_crc(const avl__png *png, const uint8_t *p, size_t n) {
    const uint32_t (*t)[256] = png->crc_table;
    uint32_t c = 0xFFFFFFFFu;
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t a = avl__load_u32(p) ^ c, b = avl__load_u32(p + 4);
        c = t[7][a & 255] ^ t[6][a >> 8 & 255] ^ t[5][a >> 16 & 255] ^ t[4][a >> 24] ^
            t[3][b & 255] ^ t[2][b >> 8 & 255] ^ t[1][b >> 16 & 255] ^ t[0][b >> 24];
    }
    for (; n > 0; n--, p++) c = t[0][(c ^ *p) & 255] ^ c >> 8;
    return ~c;
}

// PNG: chunk "IDAT" at byte 57: `what`
static astrovl_status avl__png_fail(const avl__png *png, astrovl_status status, const char *what, astrovl_error *err) {
    astrovl_string name;
    if (png->size - png->at < 8) return avl__fail(err, status, "PNG: at byte %l: %s", (int64_t)png->at, what);
    name.data = (const char *)png->data + png->at + 4;
    name.size = 4;
    return avl__fail(err, status, "PNG: chunk \"%S\" at byte %l: %s", name, (int64_t)png->at, what);
}

static astrovl_status avl__png_header(avl__png *png, const uint8_t *p, size_t size, uint64_t max_pixels,
                                      astrovl_error *err) {
    static const uint8_t n_channels[7] = {1, 0, 3, 1, 2, 0, 4};        // by colour type
    static const uint32_t depths[7] = {0x10116, 0, 0x10100, 0x116, 0x10100, 0, 0x10100};   // bit d: depth d is allowed
    int i;
    if (size != 13) return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "IHDR must have 13 bytes", err);
    png->width = avl__load_u32be(p);
    png->height = avl__load_u32be(p + 4);
    png->depth = p[8];
    png->color = p[9];
    png->interlaced = p[12];
    if (png->color > 6 || png->depth > 16 || !(depths[png->color] >> png->depth & 1))
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNG: IHDR: colour type %d with %d bits does not exist", png->color,
                         png->depth);
    if (p[10] != 0 || p[11] != 0 || p[12] > 1)
        return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "unknown compression, filter or interlace method", err);
    png->n_channels = n_channels[png->color];
    if (png->color == 0 && png->depth <= 8)
        for (i = 0; i < 1 << png->depth; i++) memset(png->colors[i], i * 255 / ((1 << png->depth) - 1), 3);
    return avl__image_check_size("PNG", png->width, png->height, max_pixels, err);
}

static astrovl_status avl__png_palette(avl__png *png, const uint8_t *p, size_t size, astrovl_error *err) {
    if (size == 0 || size % 3 != 0 || size > 768)
        return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "not 1 to 256 RGB colours", err);
    if (png->color != 3) return ASTROVL_OK;   // for true colour it is only a suggestion
    memcpy(png->colors, p, size);
    png->has_palette = 1;
    return ASTROVL_OK;
}

static astrovl_status avl__png_chunk(avl__png *png, const uint8_t *p, size_t size, uint64_t max_pixels,
                                     astrovl_error *err) {
    const char *name = (const char *)p - 4;
    if (png->width == 0 && memcmp(name, "IHDR", 4) != 0)
        return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "IHDR must come first", err);
    if (memcmp(name, "IHDR", 4) == 0) {
        if (png->width) return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "a second header", err);
        return avl__png_header(png, p, size, max_pixels, err);
    }
    if (memcmp(name, "PLTE", 4) == 0) return avl__png_palette(png, p, size, err);
    if (memcmp(name, "eXIf", 4) == 0) png->orientation = avl__exif_orientation(p, size);
    else if (memcmp(name, "IDAT", 4) == 0) {
        if (!avl__grow(&png->idat, &png->idat_capacity, png->idat_size + size, 1))
            return avl__png_fail(png, ASTROVL_ERROR_MEMORY, "out of memory", err);
        if (size) memcpy(png->idat + png->idat_size, p, size);
        png->idat_size += size;
    } else if (!(name[0] & 32) && memcmp(name, "IEND", 4) != 0)
        return avl__png_fail(png, ASTROVL_ERROR_UNSUPPORTED, "a critical chunk of unknown kind", err);
    return ASTROVL_OK;
}

// Walks the chunks (length, name, data, CRC). Behind the pixels a cut-off file is forgiven: no pixel is missing.
static astrovl_status avl__png_chunks(avl__png *png, uint64_t max_pixels, astrovl_error *err) {
    int state = 0;   // 0: before the IDAT chunks, 1: among them, 2: behind
    for (png->at = 8;;) {
        const uint8_t *p = png->data + png->at;
        size_t left = png->size - png->at, size = left < 8 ? 0 : avl__load_u32be(p);
        int is_idat = left >= 8 && memcmp(p + 4, "IDAT", 4) == 0;
        astrovl_status status;
        if (state == 1 && !is_idat) state = 2;
        if (left < 12 || size > left - 12) {
            if (state == 2) return ASTROVL_OK;
            return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "the file ends inside it", err);
        }
        if (avl__png_crc(png, p + 4, size + 4) != avl__load_u32be(p + 8 + size)) {
            if (state == 2) return ASTROVL_OK;
            return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "its bytes do not match its check sum (CRC)", err);
        }
        if (is_idat && state == 2)
            return avl__png_fail(png, ASTROVL_ERROR_FORMAT, "IDAT chunks must follow each other", err);
        if (is_idat) state = 1;
        status = avl__png_chunk(png, p + 8, size, max_pixels, err);
        if (status) return status;
        if (memcmp(p + 4, "IEND", 4) == 0) return ASTROVL_OK;
        png->at += size + 12;
    }
}

// The neighbour whose value is nearest to left + up - up_left (ISO 15948, 9.4).
static int avl__paeth(int left, int up, int up_left) {
    int to_left = up - up_left, to_up = left - up_left, to_up_left = to_left + to_up;
    to_left = to_left < 0 ? -to_left : to_left;
    to_up = to_up < 0 ? -to_up : to_up;
    to_up_left = to_up_left < 0 ? -to_up_left : to_up_left;
    up = to_up <= to_up_left ? up : up_left;
    return to_left <= to_up && to_left <= to_up_left ? left : up;
}

// Undoes a row's filter: row[i] += prediction from the bytes a pixel to the left, above, and both (0 outside).
// up: the row above, or NULL;   step: bytes of a pixel, at least 1
static int avl__png_unfilter(uint8_t *row, const uint8_t *up, size_t n, size_t step, int filter) {
    size_t i, first = step < n ? step : n;
    if (filter > 4) return 0;
    if (!up) filter = filter == 2 ? 0 : filter == 3 ? 5 : filter == 4 ? 1 : filter;   // 5: half of the left alone
    switch (filter) {
    case 1: for (i = first; i < n; i++) row[i] = (uint8_t)(row[i] + row[i - step]); break;
    case 2: for (i = 0; i < n; i++) row[i] = (uint8_t)(row[i] + up[i]); break;
    case 3:
        for (i = 0; i < first; i++) row[i] = (uint8_t)(row[i] + up[i] / 2);
        for (; i < n; i++) row[i] = (uint8_t)(row[i] + (row[i - step] + up[i]) / 2);
        break;
    case 4:
        for (i = 0; i < first; i++) row[i] = (uint8_t)(row[i] + up[i]);
        for (; i < n; i++) row[i] = (uint8_t)(row[i] + avl__paeth(row[i - step], up[i], up[i - step]));
        break;
    case 5: for (i = first; i < n; i++) row[i] = (uint8_t)(row[i] + row[i - step] / 2); break;
    default: break;
    }
    return 1;
}

// n pixels of an unfiltered row to RGB; the next pixel's place is `step` bytes on.
static void avl__png_row(const avl__png *png, const uint8_t *row, uint32_t n, uint8_t *rgb, size_t step) {
    int depth = png->depth, mask = (1 << depth) - 1, is_rgb = png->color == 2 || png->color == 6;
    size_t sample = depth == 16 ? 2 : 1, pixel = sample * (size_t)png->n_channels;
    uint32_t i;
    if (png->color == 2 && depth == 8 && step == 3) memcpy(rgb, row, (size_t)n * 3);
    else if (png->n_channels == 1 && depth <= 8)
        for (i = 0; i < n; i++, rgb += step) {
            size_t bit = (size_t)i * (size_t)depth;
            memcpy(rgb, png->colors[row[bit / 8] >> (8 - depth - (int)(bit % 8)) & mask], 3);
        }
    else if (png->n_channels == 1)
        for (i = 0; i < n; i++, rgb += step, row += 2) memset(rgb, row[0] ? 255 : row[1], 3);
    else
        for (i = 0; i < n; i++, rgb += step, row += pixel) {
            rgb[0] = row[0];
            rgb[1] = row[is_rgb ? sample : 0];
            rgb[2] = row[is_rgb ? 2 * sample : 0];
        }
}

// A grid of pixels that is stored as an image of its own: all of them, or one of Adam7's seven passes.
typedef struct avl__png_pass {
    uint32_t x, y, dx, dy, width, height;
    uint64_t row_bytes;                  // without the filter byte
} avl__png_pass;

static int avl__png_passes(const avl__png *png, avl__png_pass passes[7]) {   // returns how many there are
    static const uint8_t adam7[7][4] = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4},
                                        {1, 0, 2, 2}, {0, 1, 1, 2}};
    static const uint8_t whole[4] = {0, 0, 1, 1};
    int i, n = 0;
    for (i = 0; i < (png->interlaced ? 7 : 1); i++) {
        const uint8_t *grid = png->interlaced ? adam7[i] : whole;
        avl__png_pass *p = &passes[n];
        if (png->width <= grid[0] || png->height <= grid[1]) continue;   // an empty pass takes no bytes
        p->x = grid[0];
        p->y = grid[1];
        p->dx = grid[2];
        p->dy = grid[3];
        p->width = (png->width - p->x + p->dx - 1) / p->dx;
        p->height = (png->height - p->y + p->dy - 1) / p->dy;
        p->row_bytes = ((uint64_t)p->width * (uint64_t)(png->depth * png->n_channels) + 7) / 8;
        n++;
    }
    return n;
}

// Unpacks the IDAT data to filtered rows: raw, of all passes. Deflate expands at most 1032 : 1 (258 bytes from 2
// bits), so a small file that claims to be a huge image is found out before memory is taken.
static astrovl_status avl__png_inflate(avl__png *png, const avl__png_pass *passes, int n_passes, uint8_t **raw,
                                       astrovl_error *err) {
    uint64_t limit = (uint64_t)png->idat_size * 1032, size = 0;
    avl__inflate_state *s;
    astrovl_status status;
    int i;
    for (i = 0; i < n_passes; i++) {
        if (passes[i].height > (limit - size) / (passes[i].row_bytes + 1))
            return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNG: %l bytes of IDAT data cannot hold %l x %l pixels",
                             (int64_t)png->idat_size,
                             (int64_t)png->width, (int64_t)png->height);
        size += passes[i].height * (passes[i].row_bytes + 1);
    }
    s = (avl__inflate_state *)avl__alloc(1, sizeof *s);
    *raw = (uint8_t *)avl__alloc_raw(size, 1);
    if (!s || !*raw) {
        astrovl_free(s);
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "PNG: out of memory for %l bytes of pixels", (int64_t)size);
    }
    s->in = png->idat;
    s->n_in = png->idat_size;
    s->out = *raw;
    s->n_out = (size_t)size;
    status = avl__inflate_run(s, err);
    astrovl_free(s);
    return status;
}

static astrovl_status avl__png_pixels(const avl__png *png, const avl__png_pass *passes, int n_passes, uint8_t *raw,
                                      astrovl_image *image, astrovl_error *err) {
    size_t step = (size_t)(png->depth * png->n_channels + 7) / 8;
    int i;
    for (i = 0; i < n_passes; i++) {
        const avl__png_pass *p = &passes[i];
        size_t n = (size_t)p->row_bytes;
        uint8_t *up = NULL;
        uint32_t y;
        for (y = 0; y < p->height; y++, up = raw + 1, raw += n + 1) {
            if (!avl__png_unfilter(raw + 1, up, n, step, raw[0]))
                return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNG: row %l has filter %d, which does not exist",
                                 (int64_t)y, raw[0]);
            avl__png_row(png, raw + 1, p->width, image->rgb + avl__image_at(image, (int)p->x, (int)(p->y + y * p->dy)),
                         3 * (size_t)p->dx);
        }
    }
    return ASTROVL_OK;
}

static astrovl_status avl__png_decode_in(avl__png *png, uint64_t max_pixels, astrovl_image *image, astrovl_error *err) {
    avl__png_pass passes[7];
    uint8_t *raw = NULL;
    int n_passes;
    astrovl_status status = avl__png_chunks(png, max_pixels, err);
    if (status) return status;
    if (png->color == 3 && !png->has_palette)
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNG: an image of colour type 3 lacks its palette (chunk PLTE)");
    n_passes = avl__png_passes(png, passes);
    status = avl__png_inflate(png, passes, n_passes, &raw, err);
    astrovl_free(png->idat);
    png->idat = NULL;
    if (!status) status = avl__image_new(image, (int)png->width, (int)png->height, err);
    if (!status) status = avl__png_pixels(png, passes, n_passes, raw, image, err);
    if (!status) image->orientation = png->orientation;
    astrovl_free(raw);
    return status;
}

static astrovl_status avl__png_decode(const uint8_t *data, size_t size, uint64_t max_pixels, astrovl_image *image,
                                      astrovl_error *err) {
    avl__png *png = (avl__png *)avl__alloc(1, sizeof *png);
    astrovl_status status;
    if (!png) return avl__fail(err, ASTROVL_ERROR_MEMORY, "PNG: out of memory");
    png->data = data;
    png->size = size;
    png->orientation = 1;
    avl__png_make_crc_table(png);
    status = avl__png_decode_in(png, max_pixels, image, err);
    astrovl_free(png->idat);
    astrovl_free(png);
    return status;
}

// ---- PNM ----------------------------------------------------------------------------------------------------------
// P1 to P3 are text, P4 to P6 binary; bitmap, gray, colour. As Pillow scales them: samples up to maxval become
// round(sample / maxval * 255), halves to even; gray with maxval above 255 becomes round(sample / maxval * 65535) and
// is then clipped at 255, so that such files come out nearly white. A comment (# to the end of its line) counts as
// white space.

typedef struct avl__pnm {
    const uint8_t *data;
    size_t         size, at;
    int            kind;            // 1 to 6
    uint32_t       width, height, maxval;
} avl__pnm;

static int avl__is_space(int c) { return c == ' ' || (c >= 9 && c <= 13); }

static void avl__pnm_skip_space(avl__pnm *p) {
    for (; p->at < p->size && (avl__is_space(p->data[p->at]) || p->data[p->at] == '#'); p->at++)
        if (p->data[p->at] == '#')
            while (p->at + 1 < p->size && p->data[p->at] != '\n' && p->data[p->at] != '\r') p->at++;
}

// A decimal number from 0 to limit, and what ends it: white space, a comment or the file's end.
static astrovl_status avl__pnm_number(avl__pnm *p, uint32_t limit, uint32_t *value, astrovl_error *err) {
    uint64_t v = 0;
    size_t start;
    avl__pnm_skip_space(p);
    if (p->at == p->size)
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: the file ends at byte %l where a number should be",
                         (int64_t)p->at);
    for (start = p->at; p->at < p->size && p->data[p->at] >= '0' && p->data[p->at] <= '9'; p->at++) {
        v = v * 10 + (uint64_t)(p->data[p->at] - '0');
        if (v > limit)
            return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: the number at byte %l is above %l", (int64_t)start,
                             (int64_t)limit);
    }
    if (p->at == start || (p->at < p->size && !avl__is_space(p->data[p->at]) && p->data[p->at] != '#'))
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: byte %l is not part of a number", (int64_t)p->at);
    *value = (uint32_t)v;
    return ASTROVL_OK;
}

static astrovl_status avl__pnm_header(avl__pnm *p, uint64_t max_pixels, astrovl_error *err) {
    // the least that a pixel takes; a text sample takes a byte
    static const uint8_t bits[7] = {0, 1, 8, 24, 1, 8, 24};
    int is_bitmap = p->kind == 1 || p->kind == 4;
    uint64_t row_bytes;
    astrovl_status status = avl__pnm_number(p, INT_MAX, &p->width, err);
    if (!status) status = avl__pnm_number(p, INT_MAX, &p->height, err);
    p->maxval = 1;
    if (!status && !is_bitmap) status = avl__pnm_number(p, 65535, &p->maxval, err);
    if (!status) status = avl__image_check_size("PNM", p->width, p->height, max_pixels, err);
    if (status) return status;
    if (p->maxval == 0) return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: maxval is 0");
    if (p->kind >= 4 && p->at < p->size) {   // one character of white space, or a comment, ends a binary file's header
        if (p->data[p->at] == '#')
            while (p->at + 1 < p->size && p->data[p->at] != '\n' && p->data[p->at] != '\r') p->at++;
        p->at++;
    }
    row_bytes = p->kind == 1 ? p->width : ((uint64_t)p->width * bits[p->kind] * (p->kind > 4 &&
                                                                                 p->maxval > 255 ? 2 : 1) + 7) / 8;
    if (p->height > (p->size - p->at) / row_bytes)
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: %l bytes after the header cannot hold %l x %l pixels",
                         (int64_t)(p->size - p->at),
                         (int64_t)p->width, (int64_t)p->height);
    return ASTROVL_OK;
}

// round(sample / maxval * top) in double, halves to even as Python rounds, then clipped to 8 bits.
static uint8_t avl__pnm_scale(uint32_t sample, uint32_t maxval, double top) {
    double v = (double)sample / (double)maxval * top;
    uint32_t floor_v = (uint32_t)v;
    double rest = v - (double)floor_v;
    if (rest > 0.5 || (rest == 0.5 && (floor_v & 1))) floor_v++;
    return (uint8_t)(floor_v > 255 ? 255 : floor_v);
}

static astrovl_status avl__pnm_bits(avl__pnm *p, astrovl_image *image, astrovl_error *err) {   // P1, P4: 1 is black
    int x, y;
    for (y = 0; y < image->height; y++) {
        unsigned char *rgb = image->rgb + avl__image_at(image, 0, y);
        for (x = 0; x < image->width; x++, rgb += 3) {
            int bit;
            if (p->kind == 4) bit = p->data[p->at + (size_t)x / 8] >> (7 - x % 8) & 1;
            else {
                avl__pnm_skip_space(p);
                if (p->at == p->size || (p->data[p->at] != '0' && p->data[p->at] != '1'))
                    return avl__fail(err, ASTROVL_ERROR_FORMAT, "PNM: byte %l is neither 0 nor 1", (int64_t)p->at);
                bit = p->data[p->at++] == '1';
            }
            memset(rgb, bit ? 0 : 255, 3);
        }
        if (p->kind == 4) p->at += ((size_t)image->width + 7) / 8;
    }
    return ASTROVL_OK;
}

static astrovl_status avl__pnm_samples(avl__pnm *p, astrovl_image *image, astrovl_error *err) {   // P2, P3, P5, P6
    int n_channels = p->kind == 3 || p->kind == 6 ? 3 : 1, is_wide = p->maxval > 255, c;
    double top = n_channels == 1 && is_wide ? 65535.0 : 255.0;
    size_t i, n = (size_t)image->width * (size_t)image->height;
    for (i = 0; i < n; i++) {
        unsigned char *rgb = image->rgb + 3 * i;
        for (c = 0; c < n_channels; c++) {
            uint32_t v;
            if (p->kind <= 3) {
                astrovl_status status = avl__pnm_number(p, p->maxval, &v, err);
                if (status) return status;
            } else {
                v = is_wide ? avl__load_u16be(p->data + p->at) : p->data[p->at];
                p->at += is_wide ? 2 : 1;
            }
            rgb[c] = p->maxval == 255 ? (uint8_t)v : avl__pnm_scale(v, p->maxval, top);
        }
        if (n_channels == 1) rgb[1] = rgb[2] = rgb[0];
    }
    return ASTROVL_OK;
}

static astrovl_status avl__pnm_decode(const uint8_t *data, size_t size, uint64_t max_pixels, astrovl_image *image,
                                      astrovl_error *err) {
    avl__pnm p;
    astrovl_status status;
    memset(&p, 0, sizeof p);
    p.data = data;
    p.size = size;
    p.kind = data[1] - '0';
    p.at = 2;
    status = avl__pnm_header(&p, max_pixels, err);
    if (!status) status = avl__image_new(image, (int)p.width, (int)p.height, err);
    if (status) return status;
    return p.kind == 1 || p.kind == 4 ? avl__pnm_bits(&p, image, err) : avl__pnm_samples(&p, image, err);
}

// ---- JPEG: bits and Huffman codes ---------------------------------------------------------------------------------
// Huffman-coded baseline, extended and progressive files of 8 bits. What libjpeg's default decoder computes in
// integers is computed here in the same integers: inverse DCT "islow", triangle ("fancy") upsampling, YCbCr to RGB in
// 16-bit fixed point. Damaged or missing scan data is an error (libjpeg fills in gray); junk between segments is
// skipped.

#define AVL__JPEG_FAST 9         // codes up to this many bits are found by one look-up
#define AVL__JPEG_MAX_SCANS 256  // real files have about ten; each one visits the whole image

typedef struct avl__jpeg_code {
    uint16_t fast[1 << AVL__JPEG_FAST];   // by the next bits: code length * 256 + symbol, or 0: a longer code, or none
    uint8_t  count[17];                   // codes of each length
    uint8_t  symbol[256];                 // in the order of their codes
    int      is_defined;
} avl__jpeg_code;

typedef struct avl__jpeg_component {
    int      id, h, v;                    // sampling factors: blocks per MCU
    int      table;                       // number of its quantisation table
    int      is_latched;                  // quant is set: it is the table as of the component's first scan
    uint16_t quant[64];                   // in zigzag order, as the file has it
    int      width, height;               // samples
    int      blocks_x, blocks_y;          // blocks that hold samples
    int      stride;                      // blocks in a stored row: whole MCUs
    uint8_t *samples;                     // [8 * rows of blocks][8 * stride]
    int16_t *coefficients;                // progressive: [rows of blocks][stride][64], natural order
    const avl__jpeg_code *dc, *ac;        // of the current scan
    int      predicted;                   // DC value of the block before
} avl__jpeg_component;

typedef struct avl__jpeg {
    const uint8_t *data;
    size_t         size, at;
    uint64_t       bits;                  // the highest bit is next
    int            n_bits, n_invented;    // valid bits; how many were added as zeros because the data ended
    int            width, height, n_components, is_progressive, max_h, max_v, mcus_x, mcus_y;
    avl__jpeg_component component[4];
    avl__jpeg_component *scan[4];         // the current scan's components
    int            n_scan, first, last, high, low;   // and its coefficients and bit positions (Ss, Se, Ah, Al)
    int            end_of_band;           // progressive: blocks without further coefficients still to come (EOBRUN)
    int            restart_interval, n_scans;
    int            has_jfif, adobe_transform;        // -1: no Adobe marker
    int            orientation;
    int            has_table[4];
    uint16_t       table[4][64];
    avl__jpeg_code code[2][4];            // DC, AC
} avl__jpeg;

static const uint8_t avl__zigzag[64] = {   // natural index of the k-th coefficient in the file
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static astrovl_status avl__jpeg_fail(const avl__jpeg *j, astrovl_status status, const char *what, astrovl_error *err) {
    return avl__fail(err, status, "JPEG: at byte %l: %s", (int64_t)j->at, what);
}

// Afterwards at least 32 bits are there. FF 00 in the data stands for FF; FF and anything else is a marker, which
// ends it: from there on zeros are invented, and counted.
static void avl__jpeg_refill(avl__jpeg *j) {
    while (j->n_bits <= 32 && j->size - j->at >= 4) {
        uint32_t x = avl__load_u32be(j->data + j->at);
        if ((x & ~(x + 0x01010101u)) & 0x80808080u)
            break;   // perhaps an FF: a byte with its high bit set that loses it by + 1
        j->bits |= (uint64_t)x << (32 - j->n_bits);
        j->n_bits += 32;
        j->at += 4;
    }
    while (j->n_bits <= 56) {
        uint64_t byte = 0;
        if (j->at < j->size && (j->data[j->at] != 0xFF || (j->size - j->at > 1 && j->data[j->at + 1] == 0))) {
            byte = j->data[j->at];
            j->at += byte == 0xFF ? 2 : 1;
        } else j->n_invented += 8;
        j->bits |= byte << (56 - j->n_bits);
        j->n_bits += 8;
    }
}

static unsigned avl__jpeg_bits(avl__jpeg *j, int n) {   // the next n <= 16 bits; refill made them ready
    unsigned value = (unsigned)(j->bits >> 32 >> (32 - n));
    j->bits <<= n;
    j->n_bits -= n;
    return value;
}

static int avl__jpeg_overrun(const avl__jpeg *j) { return j->n_bits < j->n_invented; }   // were invented bits used?

// T.81 annex C: codes of one length are consecutive and follow those of smaller length. Returns 0 if they do not fit.
static int avl__jpeg_code_new(avl__jpeg_code *code, const uint8_t count[16], const uint8_t *symbols, int n) {
    unsigned word = 0, i, k = 0, length;
    memset(code, 0, sizeof *code);
    memcpy(code->symbol, symbols, (size_t)n);
    for (length = 1; length <= 16; length++, word *= 2) {
        code->count[length] = count[length - 1];
        for (i = 0; i < count[length - 1]; i++, word++, k++) {
            unsigned shift = AVL__JPEG_FAST - length, fill;
            if (word >> length) return 0;
            if (length > AVL__JPEG_FAST) continue;
            for (fill = 0; fill < 1u << shift; fill++)
                code->fast[(word << shift) + fill] = (uint16_t)(length << 8 | code->symbol[k]);
        }
    }
    code->is_defined = 1;
    return 1;
}

// The next symbol, or -1 for a bit pattern that is no code.
static int avl__jpeg_symbol(avl__jpeg *j, const avl__jpeg_code *code) {
    unsigned entry = code->fast[j->bits >> (64 - AVL__JPEG_FAST)];
    int length, word = 0, first = 0, index = 0;
    if (entry) {
        j->bits <<= entry >> 8;
        j->n_bits -= (int)(entry >> 8);
        return (int)(entry & 255);
    }
    for (length = 1; length <= 16; length++) {   // word: the bits so far; first: the smallest code of this length
        word = word * 2 + (int)avl__jpeg_bits(j, 1);
        if (word - first < code->count[length]) return code->symbol[index + word - first];
        index += code->count[length];
        first = (first + code->count[length]) * 2;
    }
    return -1;
}

// A signed number of n bits (T.81, F.2.2.1): those that begin with 0 stand for the negative ones.
static int avl__jpeg_signed(avl__jpeg *j, int n) {
    int value = (int)avl__jpeg_bits(j, n);
    return n == 0 || value >> (n - 1) ? value : value - (1 << n) + 1;
}

// ---- JPEG: blocks of coefficients ---------------------------------------------------------------------------------
// Each function reads one block of the current scan, and returns 0 if the data makes no sense.

// The DC value: the difference to the block before is stored.
static int avl__jpeg_dc(avl__jpeg *j, avl__jpeg_component *c) {
    int size;
    avl__jpeg_refill(j);
    size = avl__jpeg_symbol(j, c->dc);
    if (size < 0 || size > 15) return 0;
    c->predicted = (int16_t)(uint16_t)(c->predicted + avl__jpeg_signed(j, size));
    return 1;
}

// Sequential files: the whole block (T.81, F.2.2), already multiplied by the quantisation table.
static int avl__jpeg_block(avl__jpeg *j, avl__jpeg_component *c, int32_t block[64]) {
    int k;
    memset(block, 0, 64 * sizeof *block);
    if (!avl__jpeg_dc(j, c)) return 0;
    block[0] = c->predicted * c->quant[0];
    for (k = 1; k < 64; k++) {
        int symbol, size;
        if (j->n_bits < 32) avl__jpeg_refill(j);
        symbol = avl__jpeg_symbol(j, c->ac);
        if (symbol < 0) return 0;
        size = symbol & 15;
        if (size == 0) {
            if (symbol != 0xF0) break;   // end of block
            k += 15;                     // sixteen zeros
            continue;
        }
        k += symbol >> 4;
        if (k > 63) return 0;
        block[avl__zigzag[k]] = avl__jpeg_signed(j, size) * c->quant[k];
    }
    return 1;
}

static int avl__jpeg_dc_first(avl__jpeg *j, avl__jpeg_component *c, int16_t *block) {
    if (!avl__jpeg_dc(j, c)) return 0;
    block[0] = (int16_t)(uint16_t)((unsigned)c->predicted << j->low);
    return 1;
}

static int avl__jpeg_dc_refine(avl__jpeg *j, int16_t *block) {
    avl__jpeg_refill(j);
    if (avl__jpeg_bits(j, 1)) block[0] = (int16_t)(block[0] | 1 << j->low);
    return 1;
}

// The length of a run of blocks that end here: 2^n plus n bits, n < 15; this block is not counted (T.81, G.1.2.2).
static void avl__jpeg_read_end_of_band(avl__jpeg *j, int n) {
    j->end_of_band = (1 << n) - 1 + (int)avl__jpeg_bits(j, n);
}

static int avl__jpeg_ac_first(avl__jpeg *j, avl__jpeg_component *c, int16_t *block) {
    int k;
    if (j->end_of_band > 0) {
        j->end_of_band--;
        return 1;
    }
    for (k = j->first; k <= j->last; k++) {
        int symbol, size, run;
        if (j->n_bits < 32) avl__jpeg_refill(j);
        symbol = avl__jpeg_symbol(j, c->ac);
        if (symbol < 0) return 0;
        size = symbol & 15;
        run = symbol >> 4;
        if (size == 0 && run < 15) {
            avl__jpeg_read_end_of_band(j, run);
            break;
        }
        k += run;
        if (size == 0) continue;
        if (k > j->last) return 0;
        block[avl__zigzag[k]] = (int16_t)(uint16_t)((unsigned)avl__jpeg_signed(j, size) << j->low);
    }
    return 1;
}

// One more bit for each coefficient that is already known to be non-zero: it moves it away from zero.
static void avl__jpeg_refine(avl__jpeg *j, int16_t *coefficient) {
    if (j->n_bits < 32) avl__jpeg_refill(j);
    if (avl__jpeg_bits(j, 1) && !((*coefficient < 0 ? -*coefficient : *coefficient) >> j->low & 1))
        *coefficient = (int16_t)(*coefficient + (*coefficient < 0 ? -(1 << j->low) : 1 << j->low));
}

// Between the new coefficients, which all are +1 or -1 at this bit, the known ones get their bit (T.81, G.1.2.3).
static int avl__jpeg_ac_refine(avl__jpeg *j, avl__jpeg_component *c, int16_t *block) {
    int k = j->first;
    while (k <= j->last && j->end_of_band == 0) {
        int symbol, run, value = 0;
        if (j->n_bits < 32) avl__jpeg_refill(j);
        symbol = avl__jpeg_symbol(j, c->ac);
        if (symbol < 0 || (symbol & 15) > 1) return 0;
        run = symbol >> 4;
        if (symbol & 15) value = avl__jpeg_bits(j, 1) ? 1 << j->low : -(1 << j->low);
        else if (run < 15) {
            avl__jpeg_read_end_of_band(j, run);
            j->end_of_band++;   // this block's rest is part of it
            break;
        }
        for (; k <= j->last; k++) {   // passes `run` zeros, then stands on the zero that becomes `value`
            int16_t *coefficient = &block[avl__zigzag[k]];
            if (*coefficient) avl__jpeg_refine(j, coefficient);
            else if (run-- == 0) {
                *coefficient = (int16_t)value;
                k++;
                break;
            }
        }
    }
    if (j->end_of_band > 0) {
        for (; k <= j->last; k++)
            if (block[avl__zigzag[k]]) avl__jpeg_refine(j, &block[avl__zigzag[k]]);
        j->end_of_band--;
    }
    return 1;
}

// ---- JPEG: inverse DCT --------------------------------------------------------------------------------------------
// Loeffler, Ligtenberg and Moschytz (ICASSP 1989): 11 multiplications for 8 points. Columns, then rows; constants
// have 13 fractional bits, the values in between 2. Sums are unsigned, so that hostile coefficients wrap around
// instead of overflowing.

// out[i * 8], i = 0..7: the inverse DCT of in[0], in[8], ... in[56], times 2^13 sqrt(8)
static void avl__idct_8(const int32_t *in, uint32_t out[8]) {
    uint32_t x0 = (uint32_t)in[0], x1 = (uint32_t)in[8], x2 = (uint32_t)in[16], x3 = (uint32_t)in[24];
    uint32_t x4 = (uint32_t)in[32], x5 = (uint32_t)in[40], x6 = (uint32_t)in[48], x7 = (uint32_t)in[56];
    // even half: a rotation by 3 pi / 8 of (x2, x6), and butterflies
    uint32_t r = (x2 + x6) * 4433u;                  // 0.541196100
    uint32_t s2 = r - x6 * 15137u;                   // 1.847759065
    uint32_t s3 = r + x2 * 6270u;                    // 0.765366865
    uint32_t s0 = (x0 + x4) << 13, s1 = (x0 - x4) << 13;
    uint32_t e0 = s0 + s3, e3 = s0 - s3, e1 = s1 + s2, e2 = s1 - s2;
    // odd half
    uint32_t t = (x7 + x3 + x5 + x1) * 9633u;        // 1.175875602
    uint32_t a = t - (x7 + x3) * 16069u;             // 1.961570560
    uint32_t b = t - (x5 + x1) * 3196u;              // 0.390180644
    uint32_t c = (x7 + x1) * 7373u;                  // 0.899976223
    uint32_t d = (x5 + x3) * 20995u;                 // 2.562915447
    uint32_t o0 = x1 * 12299u + b - c;               // 1.501321110
    uint32_t o1 = x3 * 25172u + a - d;               // 3.072711026
    uint32_t o2 = x5 * 16819u + b - d;               // 2.053119869
    uint32_t o3 = x7 * 2446u + a - c;                // 0.298631336
    out[0] = e0 + o0;
    out[7] = e0 - o0;
    out[1] = e1 + o1;
    out[6] = e1 - o1;
    out[2] = e2 + o2;
    out[5] = e2 - o2;
    out[3] = e3 + o3;
    out[4] = e3 - o3;
}

static int32_t avl__idct_round(uint32_t x, int n) { return (int32_t)(x + (1u << (n - 1))) >> n; }

static uint8_t avl__clip8(int32_t x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

// block: [8][8] coefficients, natural order, multiplied by the quantisation table;   out: 8 rows, `stride` bytes apart
static void avl__idct(const int32_t block[64], uint8_t *out, size_t stride) {
    int32_t columns[64];   // after the first pass, transposed
    uint32_t sums[8];
    int x, y, i;
    for (x = 0; x < 8; x++) {
        const int32_t *in = block + x;
        if (!(in[8] | in[16] | in[24] | in[32] | in[40] | in[48] | in[56])) {   // very common: a constant column
            for (i = 0; i < 8; i++) columns[x * 8 + i] = (int32_t)((uint32_t)in[0] << 2);
            continue;
        }
        avl__idct_8(in, sums);
        for (i = 0; i < 8; i++) columns[x * 8 + i] = avl__idct_round(sums[i], 13 - 2);
    }
    for (y = 0; y < 8; y++, out += stride) {
        avl__idct_8(columns + y, sums);
        for (i = 0; i < 8; i++) out[i] = avl__clip8(avl__idct_round(sums[i], 13 + 2 + 3) + 128);
    }
}

// ---- JPEG: segments and scans -------------------------------------------------------------------------------------

static astrovl_status avl__jpeg_quantisation(avl__jpeg *j, const uint8_t *p, size_t size, astrovl_error *err) {   // DQT
    while (size > 0) {
        int is_wide = p[0] >> 4, number = p[0] & 15, i;
        size_t bytes = is_wide ? 129 : 65;
        if (is_wide > 1 || number > 3 || size < bytes)
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "broken quantisation table (DQT)", err);
        for (i = 0; i < 64; i++) j->table[number][i] = is_wide ? avl__load_u16be(p + 1 + 2 * i) : p[1 + i];
        j->has_table[number] = 1;
        p += bytes;
        size -= bytes;
    }
    return ASTROVL_OK;
}

static astrovl_status avl__jpeg_huffman(avl__jpeg *j, const uint8_t *p, size_t size, astrovl_error *err) {   // DHT
    while (size > 0) {
        size_t n = 0;
        int i;
        for (i = 1; i <= 16 && size >= 17; i++) n += p[i];
        if (size < 17 + n || n > 256 || p[0] >> 4 > 1 || (p[0] & 15) > 3 ||
            !avl__jpeg_code_new(&j->code[p[0] >> 4][p[0] & 3], p + 1, p + 17, (int)n))
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "broken Huffman table (DHT)", err);
        p += 17 + n;
        size -= 17 + n;
    }
    return ASTROVL_OK;
}

// The components' sizes in blocks and their memory. A block takes at least one bit of a scan, so a small file that
// claims to be a huge image is found out first.
static astrovl_status avl__jpeg_allocate(avl__jpeg *j, astrovl_error *err) {
    uint64_t n_blocks = 0;
    int i;
    j->mcus_x = (j->width - 1) / (8 * j->max_h) + 1;
    j->mcus_y = (j->height - 1) / (8 * j->max_v) + 1;
    for (i = 0; i < j->n_components; i++) {
        avl__jpeg_component *c = &j->component[i];
        c->width = (j->width * c->h + j->max_h - 1) / j->max_h;
        c->height = (j->height * c->v + j->max_v - 1) / j->max_v;
        c->blocks_x = (c->width + 7) / 8;
        c->blocks_y = (c->height + 7) / 8;
        c->stride = j->mcus_x * c->h;
        n_blocks += (uint64_t)c->blocks_x * (uint64_t)c->blocks_y;
    }
    if (n_blocks > 8 * (uint64_t)j->size)
        return avl__fail(err, ASTROVL_ERROR_FORMAT, "JPEG: %l bytes cannot hold %d x %d pixels", (int64_t)j->size,
                         j->width, j->height);
    for (i = 0; i < j->n_components; i++) {
        avl__jpeg_component *c = &j->component[i];
        uint64_t blocks = (uint64_t)c->stride * (uint64_t)(j->mcus_y * c->v);
        c->samples = (uint8_t *)avl__alloc_raw(blocks, 64);
        if (j->is_progressive) c->coefficients = (int16_t *)avl__alloc(blocks, 64 * sizeof(int16_t));
        if (!c->samples || (j->is_progressive && !c->coefficients))
            return avl__fail(err, ASTROVL_ERROR_MEMORY, "JPEG: out of memory for %d x %d pixels", j->width, j->height);
    }
    return ASTROVL_OK;
}

static astrovl_status avl__jpeg_frame(avl__jpeg *j, int marker, const uint8_t *p, size_t size, uint64_t max_pixels,
                                      astrovl_error *err) {   // SOF
    int i;
    astrovl_status status;
    if (marker >= 0xC9)
        return avl__jpeg_fail(j, ASTROVL_ERROR_UNSUPPORTED, "arithmetic coding is not supported, only Huffman", err);
    if (marker > 0xC2)
        return avl__jpeg_fail(j, ASTROVL_ERROR_UNSUPPORTED, "lossless and hierarchical coding are not supported", err);
    if (j->n_components) return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a second frame (SOF)", err);
    if (size < 6 || size != 6 + 3 * (size_t)p[5])
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a frame (SOF) of wrong length", err);
    if (p[0] != 8)
        return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "JPEG: %d bits per sample are not supported, only 8", p[0]);
    if (p[5] != 1 && p[5] != 3 && p[5] != 4)
        return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "JPEG: %d components are not supported, only 1, 3 or 4", p[5]);
    j->height = avl__load_u16be(p + 1);
    j->width = avl__load_u16be(p + 3);
    if (j->height == 0 && j->width > 0)
        return avl__jpeg_fail(j, ASTROVL_ERROR_UNSUPPORTED,
                              "the height is left to a DNL marker, which is not supported", err);
    status = avl__image_check_size("JPEG", (uint32_t)j->width, (uint32_t)j->height, max_pixels, err);
    if (status) return status;
    j->is_progressive = marker == 0xC2;
    j->n_components = p[5];
    j->max_h = j->max_v = 1;
    for (i = 0, p += 6; i < j->n_components; i++, p += 3) {
        avl__jpeg_component *c = &j->component[i];
        c->id = p[0];
        c->h = p[1] >> 4;
        c->v = p[1] & 15;
        c->table = p[2];
        if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4 || c->table > 3)
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a frame (SOF) with a broken component", err);
        if (c->h > j->max_h) j->max_h = c->h;
        if (c->v > j->max_v) j->max_v = c->v;
    }
    for (i = 0; i < j->n_components; i++)
        if (j->max_h % j->component[i].h || j->max_v % j->component[i].v)
            return avl__jpeg_fail(j, ASTROVL_ERROR_UNSUPPORTED,
                                  "sampling factors that are no whole multiples are not supported", err);
    return avl__jpeg_allocate(j, err);
}

// SOS: which components and coefficients come next, with which codes.
static astrovl_status avl__jpeg_scan_header(avl__jpeg *j, const uint8_t *p, size_t size, astrovl_error *err) {
    int i, k, n = size ? p[0] : 0, n_blocks = 0;
    if (j->n_components == 0)
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) before the frame (SOF)", err);
    if (n < 1 || n > 4 || size != 4 + 2 * (size_t)n)
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) of wrong length", err);
    if (++j->n_scans > AVL__JPEG_MAX_SCANS) return avl__jpeg_fail(j, ASTROVL_ERROR_LIMIT, "too many scans", err);
    j->n_scan = n;
    j->first = j->is_progressive ? p[1 + 2 * n] : 0;
    j->last = j->is_progressive ? p[2 + 2 * n] : 63;
    j->high = j->is_progressive ? p[3 + 2 * n] >> 4 : 0;
    j->low = j->is_progressive ? p[3 + 2 * n] & 15 : 0;
    if (j->is_progressive && (j->last > 63 || j->low > 13 || (j->high && j->high != j->low + 1) ||
                              (j->first == 0 ? j->last != 0 : j->last < j->first || n != 1)))
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) with impossible progression parameters", err);
    for (i = 0; i < n; i++) {
        avl__jpeg_component *c = NULL;
        int dc = p[2 + 2 * i] >> 4, ac = p[2 + 2 * i] & 15;
        for (k = 0; k < j->n_components && !c; k++)
            if (j->component[k].id == p[1 + 2 * i]) c = &j->component[k];
        for (k = 0; k < i; k++)
            if (j->scan[k] == c) c = NULL;
        if (!c || dc > 3 || ac > 3)
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) with an unknown component or table", err);
        c->dc = &j->code[0][dc];
        c->ac = &j->code[1][ac];
        if ((j->first == 0 && j->high == 0 && !c->dc->is_defined) || (j->last > 0 && !c->ac->is_defined))
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) whose Huffman table is missing", err);
        if (!c->is_latched) {
            if (!j->has_table[c->table])
                return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) whose quantisation table is missing", err);
            memcpy(c->quant, j->table[c->table], sizeof c->quant);
            c->is_latched = 1;
        }
        j->scan[i] = c;
        n_blocks += c->h * c->v;
    }
    if (n > 1 && n_blocks > 10)
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a scan (SOS) with more than 10 blocks per MCU", err);
    return ASTROVL_OK;
}

static int avl__jpeg_scan_block(avl__jpeg *j, avl__jpeg_component *c, int x, int y) {
    size_t at = (size_t)y * (size_t)c->stride + (size_t)x;
    if (j->is_progressive) {
        int16_t *block = c->coefficients + at * 64;
        if (j->first == 0) return j->high ? avl__jpeg_dc_refine(j, block) : avl__jpeg_dc_first(j, c, block);
        return j->high ? avl__jpeg_ac_refine(j, c, block) : avl__jpeg_ac_first(j, c, block);
    } else {
        int32_t block[64];
        if (!avl__jpeg_block(j, c, block)) return 0;
        avl__idct(block, c->samples + (size_t)y * (size_t)c->stride * 64 + (size_t)x * 8, (size_t)c->stride * 8);
        return 1;
    }
}

// One MCU: h x v blocks of each component, or a single block if the scan has a single component.
static int avl__jpeg_mcu(avl__jpeg *j, int x, int y) {
    int i, bx, by;
    if (j->n_scan == 1) return avl__jpeg_scan_block(j, j->scan[0], x, y);
    for (i = 0; i < j->n_scan; i++) {
        avl__jpeg_component *c = j->scan[i];
        for (by = 0; by < c->v; by++)
            for (bx = 0; bx < c->h; bx++)
                if (!avl__jpeg_scan_block(j, c, x * c->h + bx, y * c->v + by)) return 0;
    }
    return 1;
}

// Forgets what led to here, at a scan's start and at each restart marker.
static void avl__jpeg_reset(avl__jpeg *j) {
    int i;
    j->bits = 0;
    j->n_bits = j->n_invented = 0;
    j->end_of_band = 0;
    for (i = 0; i < j->n_scan; i++) j->scan[i]->predicted = 0;
}

// Stands on the bytes that the bit buffer has read ahead: moves to the next marker, FF and a byte that is neither 00
// nor FF.
static int avl__jpeg_find_marker(avl__jpeg *j) {
    for (; j->size - j->at >= 2; j->at++)
        if (j->data[j->at] == 0xFF && j->data[j->at + 1] != 0 && j->data[j->at + 1] != 0xFF) return j->data[j->at + 1];
    j->at = j->size;
    return 0;
}

static astrovl_status avl__jpeg_scan(avl__jpeg *j, astrovl_error *err) {
    int is_single = j->n_scan == 1, x, y, until_restart = j->restart_interval, n_restarts = 0;
    int n_x = is_single ? j->scan[0]->blocks_x : j->mcus_x, n_y = is_single ? j->scan[0]->blocks_y : j->mcus_y;
    avl__jpeg_reset(j);
    for (y = 0; y < n_y; y++)
        for (x = 0; x < n_x; x++) {
            if (j->restart_interval && until_restart-- == 0) {
                if (avl__jpeg_find_marker(j) != 0xD0 + (n_restarts++ & 7))
                    return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT,
                                          "the restart marker (RST) that should be here is missing", err);
                j->at += 2;
                avl__jpeg_reset(j);
                until_restart = j->restart_interval - 1;
            }
            if (!avl__jpeg_mcu(j, x, y))
                return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "the scan's data is damaged: no such code", err);
            if (avl__jpeg_overrun(j))
                return avl__fail(err, ASTROVL_ERROR_FORMAT,
                                 "JPEG: the scan's data ends at byte %l, in row %d of %d of its blocks: "
                                 "the file is cut off or damaged", (int64_t)j->at, y, n_y);
        }
    return ASTROVL_OK;
}

static void avl__jpeg_app(avl__jpeg *j, int marker, const uint8_t *p, size_t size) {
    if (marker == 0xE0 && size >= 14 && memcmp(p, "JFIF", 5) == 0) j->has_jfif = 1;
    if (marker == 0xE1 && size >= 6 && memcmp(p, "Exif\0", 6) == 0 && j->orientation == 0)
        j->orientation = avl__exif_orientation(p + 6, size - 6);
    if (marker == 0xEE && size >= 12 && memcmp(p, "Adobe", 5) == 0) j->adobe_transform = p[11];
}

// One segment: its marker, and size bytes at p. SOS is followed by its scan's data.
static astrovl_status avl__jpeg_segment(avl__jpeg *j, int marker, const uint8_t *p, size_t size, uint64_t max_pixels,
                                        astrovl_error *err) {
    astrovl_status status;
    if (marker == 0xDB) return avl__jpeg_quantisation(j, p, size, err);
    if (marker == 0xC4) return avl__jpeg_huffman(j, p, size, err);
    if (marker == 0xDD && size < 2)
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "a restart interval (DRI) of wrong length", err);
    if (marker == 0xDD) j->restart_interval = avl__load_u16be(p);
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC8 && marker != 0xCC)
        return avl__jpeg_frame(j, marker, p, size, max_pixels, err);
    if (marker >= 0xE0 && marker <= 0xEF) avl__jpeg_app(j, marker, p, size);
    if (marker != 0xDA) return ASTROVL_OK;
    status = avl__jpeg_scan_header(j, p, size, err);
    if (status) return status;
    j->at += 2 + 2 + size;
    return avl__jpeg_scan(j, err);
}

static int avl__jpeg_is_complete(const avl__jpeg *j) {   // has every component been in a scan?
    int i;
    for (i = 0; i < j->n_components; i++)
        if (!j->component[i].is_latched) return 0;
    return j->n_components > 0;
}

// Reads segment after segment: to the end (EOI) of a progressive file, which may improve any pixel until then; of
// others until all components are there.
static astrovl_status avl__jpeg_segments(avl__jpeg *j, uint64_t max_pixels, astrovl_error *err) {
    for (j->at = 2; j->is_progressive || !avl__jpeg_is_complete(j);) {
        int marker = avl__jpeg_find_marker(j);
        size_t size, before;
        astrovl_status status;
        if (marker == 0) return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "the file ends before its image does", err);
        if (marker == 0xD9) break;
        if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) { j->at += 2; continue; }   // stand alone
        size = j->size - j->at < 4 ? 0 : avl__load_u16be(j->data + j->at + 2);
        if (size < 2 || size > j->size - j->at - 2)
            return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "the file ends inside a segment", err);
        before = j->at;
        status = avl__jpeg_segment(j, marker, j->data + j->at + 4, size - 2, max_pixels, err);
        if (status) return status;
        if (j->at == before) j->at += 2 + size;
    }
    if (!avl__jpeg_is_complete(j))
        return avl__jpeg_fail(j, ASTROVL_ERROR_FORMAT, "the end (EOI) comes before the whole image", err);
    return ASTROVL_OK;
}

static void avl__jpeg_progressive_samples(avl__jpeg_component *c) {
    int32_t block[64];
    int x, y, k;
    for (y = 0; y < c->blocks_y; y++)
        for (x = 0; x < c->blocks_x; x++) {
            const int16_t *in = c->coefficients + ((size_t)y * (size_t)c->stride + (size_t)x) * 64;
            for (k = 0; k < 64; k++) block[avl__zigzag[k]] = in[avl__zigzag[k]] * c->quant[k];
            avl__idct(block, c->samples + (size_t)y * (size_t)c->stride * 64 + (size_t)x * 8, (size_t)c->stride * 8);
        }
}

// ---- JPEG: samples to pixels --------------------------------------------------------------------------------------

// A chroma sample that stands for two pixels lies between them: each pixel takes 3/4 of its own sample and 1/4 of the
// neighbour on its side, where there is one. Rounding goes alternately down and up. Other ratios than 2 are repetition.
//   upright:  v[i] = 3 own[i] + beside[i]       own, beside: the sample rows nearest to the pixel row
//   across:   out[2i] = 3 v[i] + v[i-1],  out[2i+1] = 3 v[i] + v[i+1]

static void avl__jpeg_widen(const uint8_t *own, int n, uint8_t *out) {   // across alone, in quarters
    int i;
    out[0] = own[0];
    out[2 * n - 1] = own[n - 1];
    for (i = 0; i < n - 1; i++) {
        out[2 * i + 1] = (uint8_t)((3 * own[i] + own[i + 1] + 2) >> 2);
        out[2 * i + 2] = (uint8_t)((3 * own[i + 1] + own[i] + 1) >> 2);
    }
}

static void avl__jpeg_widen_both(const uint8_t *own, const uint8_t *beside, int n, uint8_t *out) {   // in sixteenths
    int i, v = 3 * own[0] + beside[0];
    out[0] = (uint8_t)((4 * v + 8) >> 4);
    for (i = 0; i < n - 1; i++) {
        int next = 3 * own[i + 1] + beside[i + 1];
        out[2 * i + 1] = (uint8_t)((3 * v + next + 7) >> 4);
        out[2 * i + 2] = (uint8_t)((3 * next + v + 8) >> 4);
        v = next;
    }
    out[2 * n - 1] = (uint8_t)((4 * v + 7) >> 4);
}

// Row y of a component at the image's full size: where it lies, if nothing had to be done, or in `out`.
static const uint8_t *avl__jpeg_row(const avl__jpeg *j, const avl__jpeg_component *c, int y, uint8_t *out) {
    int ratio_x = j->max_h / c->h, ratio_y = j->max_v / c->v, row = y / ratio_y, x, i;
    int other = y % ratio_y == 0 ? row - 1 : row + 1;   // the row beside, if ratio_y is 2
    const uint8_t *own = c->samples + (size_t)row * (size_t)c->stride * 8, *beside;
    other = other < 0 ? 0 : other >= c->height ? c->height - 1 : other;
    beside = c->samples + (size_t)other * (size_t)c->stride * 8;
    if (ratio_x == 1 && ratio_y == 2)
        for (x = 0; x < c->width; x++) out[x] = (uint8_t)((3 * own[x] + beside[x] + 1 + y % 2) >> 2);
    else if (ratio_x == 1) return own;
    else if (ratio_x == 2 && ratio_y == 1 && c->width > 2) avl__jpeg_widen(own, c->width, out);
    else if (ratio_x == 2 && ratio_y == 2 && c->width > 2) avl__jpeg_widen_both(own, beside, c->width, out);
    else
        for (x = 0; x < c->width; x++)
            for (i = 0; i < ratio_x; i++) out[x * ratio_x + i] = own[x];
    return out;
}

// R = Y + 1.402 Cr, G = Y - 0.344136 Cb - 0.714136 Cr, B = Y + 1.772 Cb, with 16 fractional bits   (JFIF)
static void avl__jpeg_rgb(const uint8_t *luma, const uint8_t *blue, const uint8_t *red, int n, uint8_t *rgb) {
    int i;
    for (i = 0; i < n; i++, rgb += 3) {
        int y = luma[i], cb = blue[i] - 128, cr = red[i] - 128;
        rgb[0] = avl__clip8(y + ((91881 * cr + 32768) >> 16));
        rgb[1] = avl__clip8(y + ((-22554 * cb - 46802 * cr + 32768) >> 16));
        rgb[2] = avl__clip8(y + ((116130 * cb + 32768) >> 16));
    }
}

// R = K (255 - C') / 255: Pillow takes four components for Adobe's inverted CMYK, whether a marker says so or not.
// rgb: holds 255 - C', 255 - M', 255 - Y';   black: K'    (primed: 255 less the ink)
static void avl__jpeg_apply_black(const uint8_t *black, int n, uint8_t *rgb) {
    int i;
    for (i = 0; i < 3 * n; i++) {
        int k = black[i / 3], product = rgb[i] * k + 128;
        rgb[i] = avl__clip8(k - (((product >> 8) + product) >> 8));
    }
}

// What the components mean: libjpeg's rules. Without a marker, three are YCbCr unless they are called R, G and B.
static int avl__jpeg_is_ycc(const avl__jpeg *j) {
    const avl__jpeg_component *c = j->component;
    if (j->n_components == 4) return j->adobe_transform > 0;
    if (j->has_jfif) return 1;
    if (j->adobe_transform >= 0) return j->adobe_transform != 0;
    return !(c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B');
}

static void avl__jpeg_pixels(const avl__jpeg *j, uint8_t *scratch, astrovl_image *image) {
    int is_ycc = avl__jpeg_is_ycc(j), n = j->width, i, x, y;
    for (y = 0; y < j->height; y++) {
        uint8_t *rgb = image->rgb + avl__image_at(image, 0, y);
        const uint8_t *row[4];
        for (i = 0; i < j->n_components; i++)
            row[i] = avl__jpeg_row(j, &j->component[i], y, scratch + (size_t)i * ((size_t)n + 8));
        if (j->n_components == 1) row[1] = row[2] = row[0];
        if (j->n_components > 1 && is_ycc) avl__jpeg_rgb(row[0], row[1], row[2], n, rgb);
        else
            for (x = 0; x < n; x++)
                for (i = 0; i < 3; i++) rgb[3 * x + i] = row[i][x];
        if (j->n_components < 4) continue;
        for (x = 0; x < 3 * n && !is_ycc; x++) rgb[x] = (uint8_t)(255 - rgb[x]);
        avl__jpeg_apply_black(row[3], n, rgb);
    }
}

static astrovl_status avl__jpeg_decode_in(avl__jpeg *j, uint64_t max_pixels, astrovl_image *image, astrovl_error *err) {
    uint8_t *scratch;
    int i;
    astrovl_status status = avl__jpeg_segments(j, max_pixels, err);
    if (!status) status = avl__image_new(image, j->width, j->height, err);
    if (status) return status;
    scratch = (uint8_t *)avl__alloc_raw((uint64_t)j->n_components, (size_t)j->width + 8);   // rows of up to width + 3
    if (!scratch) return avl__fail(err, ASTROVL_ERROR_MEMORY, "JPEG: out of memory");
    for (i = 0; i < j->n_components && j->is_progressive; i++) avl__jpeg_progressive_samples(&j->component[i]);
    avl__jpeg_pixels(j, scratch, image);
    astrovl_free(scratch);
    if (j->orientation) image->orientation = j->orientation;
    return ASTROVL_OK;
}

static astrovl_status avl__jpeg_decode(const uint8_t *data, size_t size, uint64_t max_pixels, astrovl_image *image,
                                       astrovl_error *err) {
    avl__jpeg *j = (avl__jpeg *)avl__alloc(1, sizeof *j);
    astrovl_status status;
    int i;
    if (!j) return avl__fail(err, ASTROVL_ERROR_MEMORY, "JPEG: out of memory");
    j->data = data;
    j->size = size;
    j->adobe_transform = -1;
    status = avl__jpeg_decode_in(j, max_pixels, image, err);
    for (i = 0; i < 4; i++) {
        astrovl_free(j->component[i].samples);
        astrovl_free(j->component[i].coefficients);
    }
    astrovl_free(j);
    return status;
}

// ---- any format ---------------------------------------------------------------------------------------------------

ASTROVL_API astrovl_status astrovl_image_decode(const void *data, size_t size, uint64_t max_pixels,
                                                astrovl_image *image,
                                                astrovl_error *err) {
    const uint8_t *p = (const uint8_t *)data;
    astrovl_status status;
    if (!image) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no image was given to decode into");
    memset(image, 0, sizeof *image);
    if (!data) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no data was given to decode");
    if (max_pixels == 0) max_pixels = ASTROVL_MAX_PIXELS;
    if (size >= 8 && memcmp(p, "\x89PNG\r\n\x1a\n", 8) == 0) status = avl__png_decode(p, size, max_pixels, image, err);
    else if (size >= 3 && memcmp(p, "\xFF\xD8\xFF", 3) == 0) status = avl__jpeg_decode(p, size, max_pixels, image, err);
    else if (size >= 3 && p[0] == 'P' && p[1] >= '1' && p[1] <= '6' && (avl__is_space(p[2]) || p[2] == '#'))
        status = avl__pnm_decode(p, size, max_pixels, image, err);
    else return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED,
                          "neither PNG, JPEG nor PNM (P1 to P6): its %l bytes start with none of "
                          "their signatures", (int64_t)size);
    if (status) astrovl_image_free(image);
    return status;
}

#define AVL__IMAGE_BYTES ((size_t)1 << 28)   // of an image file that cannot be mapped

ASTROVL_API astrovl_status astrovl_image_load(const char *path, uint64_t max_pixels, astrovl_image *image,
                                              astrovl_error *err) {
    astrovl_error inner;
    avl__file file;
    astrovl_status status;
    if (!image) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no image was given to load into");
    memset(image, 0, sizeof *image);
    status = avl__file_open(path, 0, AVL__IMAGE_BYTES, NULL, &file, err);
    if (status) return status;
    if (file.size == 0) status = avl__fail(&inner, ASTROVL_ERROR_FORMAT, "the file is empty");
    else status = astrovl_image_decode(file.data, file.size, max_pixels, image, &inner);
    avl__file_close(&file);
    return status ? avl__fail(err, status, "%s: %s", path, inner.message) : ASTROVL_OK;
}

// ---- orientation, padding, cropping -------------------------------------------------------------------------------

// EXIF's eight: 2, 3, 6... say how the stored image is to be mirrored and turned. Pixel (x, y) of the result is
// pixel (x, y) of the stored one, with the two exchanged (5 to 8), then x (2, 3, 7, 8) and y (3, 4, 6, 7) counted
// from the far end.
ASTROVL_API astrovl_status astrovl_image_upright(astrovl_image *image, astrovl_error *err) {
    astrovl_image out = {0, 0, NULL, 1};
    astrovl_status status = avl__image_check(image, &out, err);
    int o, swap, x, y;
    if (status) return status;
    o = image->orientation;
    if (o < 0 || o > 8) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "orientation %d: EXIF has 1 to 8", o);
    image->orientation = 1;
    if (o <= 1) return ASTROVL_OK;
    swap = o >= 5;
    status = avl__image_new(&out, swap ? image->height : image->width, swap ? image->width : image->height, err);
    if (status) {
        image->orientation = o;
        return status;
    }
    for (y = 0; y < out.height; y++)
        for (x = 0; x < out.width; x++) {
            int from_x = swap ? y : x, from_y = swap ? x : y;
            if (o == 2 || o == 3 || o == 7 || o == 8) from_x = image->width - 1 - from_x;
            if (o == 3 || o == 4 || o == 6 || o == 7) from_y = image->height - 1 - from_y;
            memcpy(out.rgb + avl__image_at(&out, x, y), image->rgb + avl__image_at(image, from_x, from_y), 3);
        }
    astrovl_image_free(image);
    *image = out;
    return ASTROVL_OK;
}

// out(x, y) = image(x + left, y + top), `color` outside; left and top may be negative.
static void avl__image_window(const astrovl_image *image, int left, int top, const unsigned char color[3],
                              astrovl_image *out) {
    int x, y, begin = left < 0 ? -left : 0, end = image->width - left < out->width ? image->width - left : out->width;
    for (y = 0; y < out->height; y++) {
        unsigned char *row = out->rgb + avl__image_at(out, 0, y);
        int is_inside = y + top >= 0 && y + top < image->height;
        for (x = 0; x < out->width; x++)
            if (!is_inside || x < begin || x >= end) memcpy(row + 3 * (size_t)x, color, 3);
        if (is_inside && end > begin)
            memcpy(row + 3 * (size_t)begin, image->rgb + avl__image_at(image, begin + left, y + top),
                   3 * (size_t)(end - begin));
    }
}

ASTROVL_API astrovl_status astrovl_image_pad_square(const astrovl_image *image, const unsigned char color[3],
                                                    astrovl_image *out, astrovl_error *err) {
    static const unsigned char black[3] = {0, 0, 0};
    int side;
    astrovl_status status = avl__image_check(image, out, err);
    if (status) return status;
    side = image->width > image->height ? image->width : image->height;
    status = avl__image_new(out, side, side, err);
    if (status) return status;
    avl__image_window(image, -((side - image->width) / 2), -((side - image->height) / 2), color ? color : black, out);
    return ASTROVL_OK;
}

// floor((size - window) / 2), also where the window is larger than the image
static int avl__crop_offset(int size, int window) {
    return size >= window ? (size - window) / 2 : -((window - size + 1) / 2);
}

ASTROVL_API astrovl_status astrovl_image_center_crop(const astrovl_image *image, int width, int height,
                                                     astrovl_image *out,
                                                     astrovl_error *err) {
    static const unsigned char black[3] = {0, 0, 0};
    astrovl_status status = avl__image_check(image, out, err);
    if (status) return status;
    if (width < 1 || height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a crop of %d x %d pixels", width, height);
    status = avl__image_new(out, width, height, err);
    if (status) return status;
    avl__image_window(image, avl__crop_offset(image->width, width), avl__crop_offset(image->height, height), black,
                      out);
    return ASTROVL_OK;
}

// ---- resizing -----------------------------------------------------------------------------------------------------
// Pillow's BICUBIC. Each output pixel is a weighted mean of the input pixels within `support` of its centre, where
// the kernel is stretched by the reduction (so that it averages when it shrinks); along the rows, then along the
// columns, with weights of 22 fractional bits and rounding to 8 bits after each. That is the order of Pillow up to
// 12, which prepared the models' training data (images over 100 times as high as wide, made lower, go the other way
// round); Pillow 13 chooses the order by its cost, and where it chooses the other, its pixels differ in their
// rounding and clipping.

#define AVL__RESIZE_BITS 22   // 32 - 8 bits of the pixel - 2 for sums above 255 and the sign

// Keys' cubic convolution kernel with a = -1/2 (IEEE Trans. ASSP 29, 1981)
static double avl__bicubic(double x) {
    if (x < 0.0) x = -x;
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return 0.0;
}

// The weights of one axis: output i is the sum over k < count[i] of weight[i * stride + k] * input[first[i] + k].
typedef struct avl__resize_axis {
    int     *first, *count;   // [n_out]
    int32_t *weight;          // [n_out][stride]
    size_t   stride;
} avl__resize_axis;

static void avl__resize_axis_free(avl__resize_axis *axis) {
    astrovl_free(axis->first);
    astrovl_free(axis->count);
    astrovl_free(axis->weight);
}

// The weights of output i, normalised to a sum of 1 and rounded away from zero at halves. w: scratch, [stride]
static void avl__resize_weights(avl__resize_axis *axis, int i, int n_in, double scale, double *w) {
    double stretch = scale < 1.0 ? 1.0 : scale, support = 2.0 * stretch, step = 1.0 / stretch;
    double centre = ((double)i + 0.5) * scale, sum = 0.0;
    double low = centre - support + 0.5, high = centre + support + 0.5;
    int32_t *weight = axis->weight + (size_t)i * axis->stride;
    int first = low < 0.0 ? 0 : (int)low, end = high > (double)n_in ? n_in : (int)high, k;
    for (k = 0; k < end - first; k++) {
        w[k] = avl__bicubic(((double)(k + first) - centre + 0.5) * step);
        sum += w[k];
    }
    for (k = 0; k < end - first; k++) {
        double v = (sum != 0.0 ? w[k] / sum : w[k]) * (double)(1 << AVL__RESIZE_BITS);
        weight[k] = (int32_t)(v < 0.0 ? v - 0.5 : v + 0.5);
    }
    axis->first[i] = first;
    axis->count[i] = end - first;
}

static astrovl_status avl__resize_axis_new(avl__resize_axis *axis, int n_in, int n_out, astrovl_error *err) {
    double scale = (double)n_in / (double)n_out;
    double *w;
    int i;
    axis->stride = (size_t)(2.0 * (scale < 1.0 ? 1.0 : scale)) * 2 + 3;   // 2 * support + 1 at least
    axis->first = (int *)avl__alloc_raw((uint64_t)n_out, sizeof(int));
    axis->count = (int *)avl__alloc_raw((uint64_t)n_out, sizeof(int));
    axis->weight = (int32_t *)avl__alloc_raw((uint64_t)n_out * axis->stride, sizeof(int32_t));
    w = (double *)avl__alloc_raw(axis->stride, sizeof(double));
    if (!axis->first || !axis->count || !axis->weight || !w) {
        astrovl_free(w);
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for resizing %d to %d pixels", n_in, n_out);
    }
    for (i = 0; i < n_out; i++) avl__resize_weights(axis, i, n_in, scale, w);
    astrovl_free(w);
    return ASTROVL_OK;
}

static uint8_t avl__resize_round(int32_t sum) {   // 22 fractional bits, the half already added
    return sum < 0 ? 0 : avl__clip8(sum >> AVL__RESIZE_BITS);
}

static void avl__resize_rows(const astrovl_image *image, const avl__resize_axis *axis, astrovl_image *out) {
    int x, y, k;
    for (y = 0; y < out->height; y++) {
        unsigned char *to = out->rgb + avl__image_at(out, 0, y);
        for (x = 0; x < out->width; x++, to += 3) {
            const unsigned char *from = image->rgb + avl__image_at(image, axis->first[x], y);
            const int32_t *w = axis->weight + (size_t)x * axis->stride;
            int32_t r = 1 << (AVL__RESIZE_BITS - 1), g = r, b = r;
            for (k = 0; k < axis->count[x]; k++, from += 3) {
                r += w[k] * from[0];
                g += w[k] * from[1];
                b += w[k] * from[2];
            }
            to[0] = avl__resize_round(r);
            to[1] = avl__resize_round(g);
            to[2] = avl__resize_round(b);
        }
    }
}

// sums: scratch, [3 * width]
static void avl__resize_columns(const astrovl_image *image, const avl__resize_axis *axis, int32_t *sums,
                                astrovl_image *out) {
    size_t n = 3 * (size_t)out->width, i;
    int y, k;
    for (y = 0; y < out->height; y++) {
        unsigned char *to = out->rgb + avl__image_at(out, 0, y);
        for (i = 0; i < n; i++) sums[i] = 1 << (AVL__RESIZE_BITS - 1);
        for (k = 0; k < axis->count[y]; k++) {
            const unsigned char *from = image->rgb + avl__image_at(image, 0, axis->first[y] + k);
            int32_t w = axis->weight[(size_t)y * axis->stride + (size_t)k];
            for (i = 0; i < n; i++) sums[i] += w * from[i];
        }
        for (i = 0; i < n; i++) to[i] = avl__resize_round(sums[i]);
    }
}

// Each changes one axis, into new memory.
static astrovl_status avl__resize_width(const astrovl_image *image, int width, astrovl_image *out, astrovl_error *err) {
    avl__resize_axis axis = {NULL, NULL, NULL, 0};
    astrovl_status status = avl__resize_axis_new(&axis, image->width, width, err);
    if (!status) status = avl__image_new(out, width, image->height, err);
    if (!status) avl__resize_rows(image, &axis, out);
    avl__resize_axis_free(&axis);
    return status;
}

static astrovl_status avl__resize_height(const astrovl_image *image, int height, astrovl_image *out,
                                         astrovl_error *err) {
    avl__resize_axis axis = {NULL, NULL, NULL, 0};
    int32_t *sums = (int32_t *)avl__alloc_raw((uint64_t)image->width * 3, sizeof(int32_t));
    astrovl_status status = sums ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for resizing");
    if (!status) status = avl__resize_axis_new(&axis, image->height, height, err);
    if (!status) status = avl__image_new(out, image->width, height, err);
    if (!status) avl__resize_columns(image, &axis, sums, out);
    avl__resize_axis_free(&axis);
    astrovl_free(sums);
    return status;
}

ASTROVL_API astrovl_status astrovl_image_resize(const astrovl_image *image, int width, int height, astrovl_image *out,
                                                astrovl_error *err) {
    astrovl_image half;   // one axis done
    int columns_first;
    astrovl_status status = avl__image_check(image, out, err);
    if (status) return status;
    memset(out, 0, sizeof *out);
    if (width < 1 || height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a size of %d x %d pixels", width, height);
    if (width == image->width && height == image->height) {
        status = avl__image_new(out, width, height, err);
        if (!status) memcpy(out->rgb, image->rgb, (size_t)width * (size_t)height * 3);
        return status;
    }
    if (width == image->width) return avl__resize_height(image, height, out, err);
    if (height == image->height) return avl__resize_width(image, width, out, err);
    columns_first = image->height > 100 * (int64_t)image->width && height < image->height;
    status = columns_first ? avl__resize_height(image, height, &half, err)
                           : avl__resize_width(image, width, &half, err);
    if (status) return status;
    status = columns_first ? avl__resize_width(&half, width, out, err)
                           : avl__resize_height(&half, height, out, err);
    astrovl_image_free(&half);
    return status;
}


// ====================================================================================================================
// [9] CLIP
// Two transformers (Radford et al. 2021), made of the same pre-norm layers:
//     x += attention(layer_norm1(x));   x += fc2(activation(fc1(layer_norm2(x))))
// The vision tower (Dosovitskiy et al. 2021): an image of S x S pixels is cut into (S / P)^2 patches; each becomes one row of
// n_embd numbers, a learned class row stands before them, learned positions are added, and a norm comes before the layers.
// LLaVA reads the patches' rows after the last layer but one; for CLIP the class row after all layers stands for the image.
// The text tower: one row per token, positions added, attention to earlier tokens only; the end token's row after all layers
// stands for the text. Each goes through a norm, perhaps two dense layers (PAPERCLIP's frozen backbones), and a projection to
// the length that both share.
// Names: v.*, t.*, visual_projection, text_projection; clip.vision.* and clip.text.* keys of mmproj and clip.cpp's GGUF files.
// ====================================================================================================================

typedef struct avl__tower_layer {
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;   // [n_embd]
    avl__linear  q, k, v, out;                                            // [n_embd][n_embd]
    avl__linear  fc1, fc2;                                                // [n_ff][n_embd], [n_embd][n_ff]
} avl__tower_layer;

typedef struct avl__tower {
    int   n_embd, n_head, n_ff, n_layer;      // n_layer: layers the file has
    int   use_gelu;                           // 1: GELU, 0: quick-GELU
    float eps;
    avl__tower_layer *layers;                 // [n_layer], owned
} avl__tower;

// From the row that stands for an image or a text to the space that both share.
typedef struct avl__joint {
    const float *norm_weight, *norm_bias;     // [n_embd]
    avl__linear  dense[2];                    // PAPERCLIP's head: W2 gelu(W1 x + b1) + b2
    int          n_dense;                     // 2, or 0: none
    avl__linear  projection;                  // [n_embd_joint][n_embd]
} avl__joint;

typedef struct avl__clip {
    avl__tower tower;
    avl__joint joint;                         // if has_joint
    int   image_size, patch_size, n_patches;
    int   n_run;                              // layers run before LLaVA's features are taken
    int   has_joint;
    int   pad_square;                         // 1: pad with the mean colour (LLaVA); 0: resize the short side and crop (CLIP)
    float mean[3], std[3];
    const float *class_embd;                  // [n_embd]
    const float *position_embd;               // [1 + n_patches][n_embd]
    const float *pre_norm_weight, *pre_norm_bias;
    avl__linear  patch_embd;                  // [n_embd][3][P][P]
} avl__clip;

typedef struct avl__clip_text {
    avl__tower   tower;
    avl__joint   joint;
    int          n_ctx, n_vocab;
    avl__linear  token_embd;                  // [n_vocab][n_embd]
    const float *position_embd;               // [n_ctx][n_embd]
} avl__clip_text;

// ---- loading -------------------------------------------------------------------------------------------------------

static astrovl_status avl__tower_load_layer(avl__tower *tower, avl__weights *w, const char *prefix, int i, astrovl_error *err) {
    avl__tower_layer *layer = &tower->layers[i];
    const struct { const char *name; avl__linear *linear; } square[] = {
        {"attn_q", &layer->q}, {"attn_k", &layer->k}, {"attn_v", &layer->v}, {"attn_out", &layer->out}};
    const struct { const char *name; const float **vector; } norms[] = {
        {"ln1.weight", &layer->norm1_weight}, {"ln1.bias", &layer->norm1_bias},
        {"ln2.weight", &layer->norm2_weight}, {"ln2.bias", &layer->norm2_bias}};
    const astrovl_tensor *up;
    const char *fc1 = "ffn_up", *fc2 = "ffn_down";
    char name[64];
    astrovl_status status = ASTROVL_OK;
    size_t n;
    for (n = 0; n < 4 && !status; n++) {
        avl__format(name, sizeof name, "%s.blk.%d.%s", prefix, i, square[n].name);
        status = avl__load_linear(w, name, tower->n_embd, tower->n_embd, square[n].linear, err);
    }
    for (n = 0; n < 4 && !status; n++) {
        avl__format(name, sizeof name, "%s.blk.%d.%s", prefix, i, norms[n].name);
        status = avl__load_vector(w, name, tower->n_embd, norms[n].vector, err);
    }
    // Converters before 2025 called fc1 "ffn_down" and fc2 "ffn_up"; the shape tells, since fc2 reads n_ff values.
    avl__format(name, sizeof name, "%s.blk.%d.ffn_up.weight", prefix, i);
    up = avl__find_tensor(w, name, NULL);
    if (up && up->ne[0] == tower->n_ff && tower->n_ff != tower->n_embd) {
        fc1 = "ffn_down";
        fc2 = "ffn_up";
    }
    if (!status) {
        avl__format(name, sizeof name, "%s.blk.%d.%s", prefix, i, fc1);
        status = avl__load_linear(w, name, tower->n_embd, tower->n_ff, &layer->fc1, err);
    }
    if (!status) {
        avl__format(name, sizeof name, "%s.blk.%d.%s", prefix, i, fc2);
        status = avl__load_linear(w, name, tower->n_ff, tower->n_embd, &layer->fc2, err);
    }
    return status;
}

// prefix: "v" or "t", of the tensors; key_prefix: "clip.vision." or "clip.text."
static astrovl_status avl__tower_load(avl__tower *tower, avl__weights *w, const char *prefix, const char *key_prefix,
                                      astrovl_error *err) {
    const struct { const char *name; int max, *value; } sizes[] = {
        {"embedding_length", 65536, &tower->n_embd}, {"feed_forward_length", 1 << 20, &tower->n_ff},
        {"block_count", 1024, &tower->n_layer}, {"attention.head_count", 65536, &tower->n_head}};
    const astrovl_gguf *file;
    astrovl_status status = ASTROVL_OK;
    char key[64];
    int i, index;
    for (i = 0; i < 4 && !status; i++) {
        avl__format(key, sizeof key, "%s%s", key_prefix, sizes[i].name);
        status = avl__key_int(w, key, 1, sizes[i].max, -1, sizes[i].value, err);
    }
    if (!status && tower->n_head && tower->n_embd % tower->n_head != 0)
        status = avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: %s* asks for %d heads over %d values",
                              astrovl_gguf_name(w->files[0]), key_prefix, tower->n_head, tower->n_embd);
    if (status) return status;
    avl__format(key, sizeof key, "%sattention.layer_norm_epsilon", key_prefix);
    tower->eps = (float)avl__key_float(w, key, 1e-5);
    file = avl__find_key(w, "clip.use_gelu", &index);
    tower->use_gelu = file ? astrovl_gguf_int(file, index, 0) != 0 : 0;
    tower->layers = (avl__tower_layer *)avl__alloc((uint64_t)tower->n_layer, sizeof *tower->layers);
    if (!tower->layers) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a CLIP tower");
    for (i = 0; i < tower->n_layer && !status; i++) status = avl__tower_load_layer(tower, w, prefix, i, err);
    return status;
}

// prefix: "v" or "t";   projection: "visual_projection" or "text_projection"
static astrovl_status avl__joint_load(avl__joint *joint, avl__weights *w, const char *prefix, const char *projection, int n_embd,
                                      astrovl_error *err) {
    char name[64];
    astrovl_status status;
    avl__format(name, sizeof name, "%s.post_ln.weight", prefix);
    status = avl__load_vector(w, name, n_embd, &joint->norm_weight, err);
    avl__format(name, sizeof name, "%s.post_ln.bias", prefix);
    if (!status) status = avl__load_vector(w, name, n_embd, &joint->norm_bias, err);
    avl__format(name, sizeof name, "%s.head.0.weight", prefix);
    if (!status && avl__find_tensor(w, name, NULL)) {
        joint->n_dense = 2;
        avl__format(name, sizeof name, "%s.head.0", prefix);
        status = avl__load_tall_linear(w, name, n_embd, &joint->dense[0], err);
        avl__format(name, sizeof name, "%s.head.2", prefix);
        if (!status) status = avl__load_tall_linear(w, name, joint->dense[0].n_out, &joint->dense[1], err);
    }
    if (status) return status;
    return avl__load_tall_linear(w, projection, joint->n_dense ? joint->dense[1].n_out : n_embd, &joint->projection, err);
}

// Three numbers of a key, or OpenAI CLIP's own.
static void avl__clip_load_color(const avl__weights *w, const char *key, const float *fallback, float *color) {
    int index, c;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    int whole = file && astrovl_gguf_kv(file, index)->count == 3;
    for (c = 0; c < 3; c++) color[c] = whole ? (float)astrovl_gguf_float(file, index, (uint64_t)c) : fallback[c];
}

// How many layers run before LLaVA takes its features (transformers: vision_feature_layer -2, all but the last layer). A file
// may say so; else one with the final norm holds the whole tower, one without had its unused last layer dropped by the converter.
static astrovl_status avl__clip_choose_depth(avl__clip *clip, avl__weights *w, astrovl_error *err) {
    int index, deepest = 0;
    uint64_t i;
    const astrovl_gguf *file = avl__find_key(w, "clip.vision.feature_layer", &index);
    if (!file) {
        clip->n_run = clip->tower.n_layer - (avl__find_tensor(w, "v.post_ln.weight", NULL) && clip->tower.n_layer > 1);
        return ASTROVL_OK;
    }
    for (i = 0; i < astrovl_gguf_kv(file, index)->count; i++) {
        int64_t layer = astrovl_gguf_int(file, index, i);
        if (layer < 0 || layer > clip->tower.n_layer)
            return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: clip.vision.feature_layer is %l; the tower has %d layers",
                                astrovl_gguf_name(file), layer, clip->tower.n_layer);
        if (layer > deepest) deepest = (int)layer;
    }
    if (i > 1)
        return avl__problem(w, err, ASTROVL_ERROR_UNSUPPORTED, "%s: features joined from %l layers (clip.vision.feature_layer): "
                            "LLaVA takes one", astrovl_gguf_name(file), (int64_t)i);
    clip->n_run = deepest;
    return ASTROVL_OK;
}

static astrovl_status avl__clip_load_sizes(avl__clip *clip, avl__weights *w, astrovl_error *err) {
    static const float clip_mean[3] = {0.48145466f, 0.4578275f, 0.40821073f}, clip_std[3] = {0.26862954f, 0.26130258f, 0.27577711f};
    astrovl_string aspect = avl__key_string(w, "clip.vision.image_aspect_ratio");
    int c;
    astrovl_status status = avl__key_int(w, "clip.vision.image_size", 1, 8192, -1, &clip->image_size, err);
    if (!status)
        status = avl__key_int(w, "clip.vision.patch_size", 1, clip->image_size ? clip->image_size : 8192, -1, &clip->patch_size, err);
    if (status || !clip->image_size || !clip->patch_size) return status;
    clip->n_patches = (clip->image_size / clip->patch_size) * (clip->image_size / clip->patch_size);
    if (clip->n_patches > 65536)
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: clip.vision.* asks for %d patches", astrovl_gguf_name(w->files[0]),
                            clip->n_patches);
    avl__clip_load_color(w, "clip.vision.image_mean", clip_mean, clip->mean);
    avl__clip_load_color(w, "clip.vision.image_std", clip_std, clip->std);
    for (c = 0; c < 3; c++)
        if (!(clip->std[c] > 0.0f))
            return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: clip.vision.image_std must be positive",
                                astrovl_gguf_name(w->files[0]));
    // LLaVA-1.5 pads, and its mmproj files do not say so; a tower without a projector is CLIP's own, which crops.
    clip->pad_square = aspect.size ? avl__string_is(aspect, "pad") : avl__find_tensor(w, "mm.0.weight", NULL) != NULL;
    return ASTROVL_OK;
}

static astrovl_status avl__clip_load(avl__clip *clip, avl__weights *w, astrovl_error *err) {
    int patch_values, n_embd, n_rows;
    astrovl_status status = avl__clip_load_sizes(clip, w, err);
    if (!status) status = avl__tower_load(&clip->tower, w, "v", "clip.vision.", err);
    if (!status) status = avl__clip_choose_depth(clip, w, err);
    if (status) return status;
    patch_values = 3 * clip->patch_size * clip->patch_size;
    n_embd = clip->tower.n_embd;
    n_rows = clip->n_patches ? 1 + clip->n_patches : 0;
    status = avl__load_vector(w, "v.class_embd", n_embd, &clip->class_embd, err);
    if (!status) status = avl__load_linear(w, "v.patch_embd", patch_values, n_embd, &clip->patch_embd, err);
    if (!status) status = avl__load_vector(w, "v.position_embd.weight", (int64_t)n_rows * n_embd, &clip->position_embd, err);
    if (!status) status = avl__load_vector(w, "v.pre_ln.weight", n_embd, &clip->pre_norm_weight, err);
    if (!status) status = avl__load_vector(w, "v.pre_ln.bias", n_embd, &clip->pre_norm_bias, err);
    clip->has_joint = avl__find_tensor(w, "visual_projection.weight", NULL) != NULL;
    if (!status && clip->has_joint) status = avl__joint_load(&clip->joint, w, "v", "visual_projection", n_embd, err);
    return status;
}

static astrovl_status avl__clip_text_load(avl__clip_text *text, avl__weights *w, astrovl_error *err) {
    astrovl_status status = avl__tower_load(&text->tower, w, "t", "clip.text.", err);
    int n_embd = text->tower.n_embd;
    if (!status) status = avl__key_int(w, "clip.text.context_length", 2, 65536, -1, &text->n_ctx, err);
    if (!status) status = avl__load_tall_linear(w, "t.token_embd", n_embd, &text->token_embd, err);
    text->n_vocab = text->token_embd.n_out;
    if (!status) status = avl__load_vector(w, "t.position_embd.weight", (int64_t)text->n_ctx * n_embd, &text->position_embd, err);
    if (!status) status = avl__joint_load(&text->joint, w, "t", "text_projection", n_embd, err);
    return status;
}

// ---- preprocessing -------------------------------------------------------------------------------------------------

// pixels[c][y][x] = (rgb / 255 - mean[c]) / std[c], of an image that has the tower's size.  transformers' CLIPImageProcessor
static void avl__clip_normalize(const avl__clip *clip, const astrovl_image *image, float *pixels) {
    size_t n = (size_t)clip->image_size * clip->image_size, i;
    int c;
    for (c = 0; c < 3; c++)
        for (i = 0; i < n; i++)
            pixels[(size_t)c * n + i] = ((float)image->rgb[3 * i + (size_t)c] * (float)(1.0 / 255.0) - clip->mean[c]) / clip->std[c];
}

// Pads to a square with the mean colour and resizes (LLaVA), or resizes the short side and crops the middle (CLIP).
static astrovl_status avl__clip_preprocess(const avl__clip *clip, const astrovl_image *image, float *pixels, astrovl_error *err) {
    astrovl_image shaped = {0, 0, NULL, 1}, sized = {0, 0, NULL, 1};
    int size = clip->image_size, c;
    astrovl_status status;
    if (!image || !image->rgb || image->width < 1 || image->height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the image is empty");
    if (clip->pad_square) {
        unsigned char color[3];
        for (c = 0; c < 3; c++) color[c] = (unsigned char)(clip->mean[c] * 255.0f);   // truncated as LLaVA's int(): 122 116 104
        status = astrovl_image_pad_square(image, color, &shaped, err);
        if (!status) status = astrovl_image_resize(&shaped, size, size, &sized, err);
    } else {   // the long side as transformers' get_resize_output_image_size: int(size * long / short)
        int w = image->width, h = image->height;
        int64_t rw = w <= h ? size : (int64_t)size * w / h, rh = w <= h ? (int64_t)size * h / w : size;
        if (rw > 65535 || rh > 65535)
            return avl__fail(err, ASTROVL_ERROR_LIMIT, "an image of %d x %d pixels is too narrow to be cropped to a square", w, h);
        status = astrovl_image_resize(image, (int)rw, (int)rh, &shaped, err);
        if (!status) status = astrovl_image_center_crop(&shaped, size, size, &sized, err);
    }
    if (!status) avl__clip_normalize(clip, &sized, pixels);
    astrovl_image_free(&shaped);
    astrovl_image_free(&sized);
    return status;
}

// ---- the towers ----------------------------------------------------------------------------------------------------

// One pass through a tower: the rows of several images or texts, one after the other. Only attention knows where each ends.
typedef struct avl__tower_pass {
    int        n_rows, n_sequences;
    const int *lengths;         // [n_sequences] rows of each; NULL: all the same
    int        causal;
    const char *prefix;         // for the tap: "vision_model.encoder.layers"
    // carved from the run's block
    float *x;                   // [n_rows][n_embd]   the residual stream
    float *normed;              // [n_rows][n_embd]
    float *q, *k, *v, *mixed;   // [n_rows][n_embd]
    float *hidden;              // [n_rows][n_ff], or what else asks for its room
    float *weights;             // [n_head][n][n], only for the tap, which sees sequences one by one
} avl__tower_pass;

static uint64_t avl__max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

// n_longest: rows of the longest sequence;   n_hidden, n_thread: floats that the caller needs in `hidden` and for each thread
static int avl__tower_reserve(const avl__tower *tower, const avl__joint *joint, avl__run *run, avl__tower_pass *pass, int n_longest,
                              uint64_t n_hidden, uint64_t n_thread) {
    uint64_t n = (uint64_t)pass->n_rows, wide = n * (uint64_t)tower->n_embd;
    uint64_t weights = avl__attention_weights_floats(run, tower->n_head, n_longest, n_longest);
    uint64_t head = joint && joint->n_dense ? avl__max_u64((uint64_t)joint->dense[0].n_out, (uint64_t)joint->dense[1].n_out) : 0;
    float *block;
    n_hidden = avl__max_u64(avl__max_u64(n_hidden, n * (uint64_t)tower->n_ff), 2 * (uint64_t)pass->n_sequences * head);
    n_thread = avl__max_u64(n_thread, avl__attend_tile_floats((uint64_t)n_longest, tower->n_embd / tower->n_head));
    n_thread = avl__max_u64(n_thread, avl__max_u64(head, (uint64_t)tower->n_embd));
    n_thread = avl__max_u64(n_thread, (uint64_t)tower->n_ff);
    if (!avl__run_reserve(run, 6 * wide + n_hidden + weights, n_thread, n)) return 0;
    run->always_panels = 1;                // an embedding is the same alone and among others
    block = run->rows;
    pass->x = avl__carve(&block, wide);
    pass->normed = avl__carve(&block, wide);
    pass->q = avl__carve(&block, wide);
    pass->k = avl__carve(&block, wide);
    pass->v = avl__carve(&block, wide);
    pass->mixed = avl__carve(&block, wide);
    pass->hidden = avl__carve(&block, n_hidden);
    pass->weights = weights ? avl__carve(&block, weights) : NULL;
    return 1;
}

static void avl__tower_attend(const avl__tower *tower, avl__run *run, avl__tower_pass *pass, int layer) {
    int i, n, d = tower->n_embd;
    size_t at = 0;
    for (i = 0; i < pass->n_sequences; i++, at += (size_t)n * (size_t)d) {
        avl__attention attention = {pass->q + at, pass->k + at, pass->v + at, pass->mixed + at, pass->weights, 0, 0, tower->n_head,
                                    tower->n_head, d / tower->n_head, pass->causal, run, (size_t)d, (size_t)(d / tower->n_head), 0,
                                    avl__is_float_type(tower->layers[layer].q.type)};
        n = pass->lengths ? pass->lengths[i] : pass->n_rows / pass->n_sequences;
        attention.n_rows = n;
        avl__attention_run(&attention, 1);
        avl__tap3(run, pass->prefix, layer, "self_attn.attn_weights", pass->weights, tower->n_head, n, n);
    }
}

static void avl__tower_layer_run(const avl__tower *tower, avl__run *run, avl__tower_pass *pass, int i) {
    const avl__tower_layer *layer = &tower->layers[i];
    const avl__linear *const weights[] = {&layer->q, &layer->k, &layer->v};
    float *const qkv[] = {pass->q, pass->k, pass->v};
    const char *prefix = pass->prefix;
    int d = tower->n_embd, n = pass->n_rows;
    avl__layer_norm_rows(run, pass->normed, pass->x, layer->norm1_weight, layer->norm1_bias, n, d, tower->eps);
    avl__tap(run, prefix, i, "layer_norm1", pass->normed, n, d);
    avl__apply_each(run, qkv, pass->normed, weights, 3, n);
    avl__tap(run, prefix, i, "self_attn.q_proj", pass->q, n, d);
    avl__tap(run, prefix, i, "self_attn.k_proj", pass->k, n, d);
    avl__tap(run, prefix, i, "self_attn.v_proj", pass->v, n, d);
    avl__tower_attend(tower, run, pass, i);
    avl__tap(run, prefix, i, "self_attn.context", pass->mixed, n, d);
    avl__apply(run, pass->normed, pass->mixed, &layer->out, n);
    avl__tap(run, prefix, i, "self_attn.out_proj", pass->normed, n, d);
    avl__add(pass->x, pass->normed, (int64_t)n * d);

    avl__layer_norm_rows(run, pass->normed, pass->x, layer->norm2_weight, layer->norm2_bias, n, d, tower->eps);
    avl__tap(run, prefix, i, "layer_norm2", pass->normed, n, d);
    avl__apply(run, pass->hidden, pass->normed, &layer->fc1, n);
    avl__tap(run, prefix, i, "mlp.fc1", pass->hidden, n, tower->n_ff);
    avl__activate(run, pass->hidden, (int64_t)n * tower->n_ff, tower->use_gelu ? run->kernels->gelu : run->kernels->quick_gelu, NULL);
    avl__tap(run, prefix, i, "mlp.activation_fn", pass->hidden, n, tower->n_ff);
    avl__apply(run, pass->normed, pass->hidden, &layer->fc2, n);
    avl__tap(run, prefix, i, "mlp.fc2", pass->normed, n, d);
    avl__add(pass->x, pass->normed, (int64_t)n * d);
    avl__tap(run, prefix, i, "", pass->x, n, d);
}

// GELU as flax has it by default, which PAPERCLIP's heads use: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
static void avl__gelu_tanh(float *x, int64_t n) {
    int64_t i;
    for (i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + astrovl_tanhf(0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

// The rows that stand for the sequences, normed already, to the shared space.  rows: [n_sequences][n_embd] in pass->normed;
// embeddings: out, [n_sequences][n_embd_joint]
static void avl__joint_run(const avl__joint *joint, avl__run *run, avl__tower_pass *pass, const char *name, float *embeddings) {
    const float *rows = pass->normed;
    int n = pass->n_sequences;
    if (joint->n_dense) {
        float *out = pass->hidden + (size_t)n * (size_t)joint->dense[0].n_out;
        avl__apply(run, pass->hidden, rows, &joint->dense[0], n);
        avl__gelu_tanh(pass->hidden, (int64_t)n * joint->dense[0].n_out);
        avl__apply(run, out, pass->hidden, &joint->dense[1], n);
        avl__tap(run, name, -1, "head", out, n, joint->dense[1].n_out);
        rows = out;
    }
    avl__apply(run, embeddings, rows, &joint->projection, n);
    avl__tap(run, name, -1, "", embeddings, n, joint->projection.n_out);
}

// ---- images --------------------------------------------------------------------------------------------------------

// patches[n_patches][3][P][P] from pixels[3][S][S]: a convolution with stride P is a product over cut-out patches
static void avl__clip_cut_patches(const avl__clip *clip, const float *pixels, float *patches) {
    int p = clip->patch_size, s = clip->image_size, n = s / p, py, px, c, y;
    for (py = 0; py < n; py++)
        for (px = 0; px < n; px++)
            for (c = 0; c < 3; c++)
                for (y = 0; y < p; y++, patches += p)
                    memcpy(patches, pixels + ((size_t)c * s + py * p + y) * s + px * p, (size_t)p * sizeof(float));
}

// One image's rows. x: out, [1 + n_patches][n_embd];   patches: [n_patches][3][P][P], scratch
static void avl__clip_embed(const avl__clip *clip, avl__run *run, const float *pixels, float *x, float *patches) {
    int n = 1 + clip->n_patches, d = clip->tower.n_embd;
    avl__clip_cut_patches(clip, pixels, patches);
    avl__apply(run, x + d, patches, &clip->patch_embd, clip->n_patches);
    avl__tap(run, "vision_model.embeddings", -1, "patch_embedding", x + d, clip->n_patches, d);
    memcpy(x, clip->class_embd, (size_t)d * sizeof(float));
    avl__add(x, clip->position_embd, (int64_t)n * d);
    avl__tap(run, "vision_model.embeddings", -1, "", x, n, d);
    avl__layer_norm_rows(run, x, x, clip->pre_norm_weight, clip->pre_norm_bias, n, d, clip->tower.eps);
    avl__tap(run, "vision_model.pre_layrnorm", -1, "", x, n, d);   // transformers' spelling
}

// pixels [n_images][3][S][S] through the first n_layers layers; the rows are left in pass->x [n_images][1 + n_patches][n_embd].
static astrovl_status avl__clip_run(const avl__clip *clip, avl__run *run, const float *pixels, int n_images, int n_layers,
                                    avl__tower_pass *pass, astrovl_error *err) {
    int n = 1 + clip->n_patches, i;
    size_t s = (size_t)clip->image_size, patch = 3 * (size_t)clip->patch_size * (size_t)clip->patch_size;
    memset(pass, 0, sizeof *pass);
    pass->n_rows = n_images * n;
    pass->n_sequences = n_images;
    pass->prefix = "vision_model.encoder.layers";
    if (!avl__tower_reserve(&clip->tower, &clip->joint, run, pass, n, (size_t)clip->n_patches * patch, patch))
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for encoding an image");
    for (i = 0; i < n_images; i++)
        avl__clip_embed(clip, run, pixels + (size_t)i * 3 * s * s, pass->x + (size_t)i * (size_t)n * (size_t)clip->tower.n_embd, pass->hidden);
    for (i = 0; i < n_layers; i++) {
        if (avl__report(run, "image", i, n_layers)) return avl__fail(err, ASTROVL_CANCELLED, "cancelled while encoding an image");
        avl__tower_layer_run(&clip->tower, run, pass, i);
    }
    avl__report(run, "image", n_layers, n_layers);
    return ASTROVL_OK;
}

// LLaVA's features: pixels [3][S][S] to the patches' rows after n_run layers.  features: out, [n_patches][n_embd]
static astrovl_status avl__clip_encode(const avl__clip *clip, avl__run *run, const float *pixels, float *features,
                                       astrovl_error *err) {
    avl__tower_pass pass;
    size_t d = (size_t)clip->tower.n_embd;
    astrovl_status status = avl__clip_run(clip, run, pixels, 1, clip->n_run, &pass, err);
    if (status) return status;
    memcpy(features, pass.x + d, (size_t)clip->n_patches * d * sizeof(float));
    avl__tap(run, "image_features", -1, "", features, clip->n_patches, clip->tower.n_embd);
    return ASTROVL_OK;
}

// CLIP's: the class rows after all layers, in the shared space.  embeddings: out, [n_images][n_embd_joint]
static astrovl_status avl__clip_embed_images(const avl__clip *clip, avl__run *run, const float *pixels, int n_images, float *embeddings,
                                             astrovl_error *err) {
    avl__tower_pass pass;
    size_t d = (size_t)clip->tower.n_embd, n = 1 + (size_t)clip->n_patches;
    int i;
    astrovl_status status = avl__clip_run(clip, run, pixels, n_images, clip->tower.n_layer, &pass, err);
    if (status) return status;
    for (i = 0; i < n_images; i++) memcpy(pass.mixed + (size_t)i * d, pass.x + (size_t)i * n * d, d * sizeof(float));
    avl__layer_norm_rows(run, pass.normed, pass.mixed, clip->joint.norm_weight, clip->joint.norm_bias, n_images, clip->tower.n_embd,
                         clip->tower.eps);
    avl__tap(run, "vision_model.post_layernorm", -1, "", pass.normed, n_images, clip->tower.n_embd);
    avl__joint_run(&clip->joint, run, &pass, "visual_projection", embeddings);
    return ASTROVL_OK;
}

// ---- texts ---------------------------------------------------------------------------------------------------------

// Rows of an embedding table: x[r] = table[tokens[r]].  x: out, [n][n_in of the table]
static void avl__embed_tokens(const avl__linear *table, const int32_t *tokens, int n, float *x) {
    const uint8_t *rows = (const uint8_t *)table->weight;
    int r;
    for (r = 0; r < n; r++)
        avl__dequantize_row(table->type, rows + (size_t)tokens[r] * table->row_bytes, x + (size_t)r * (size_t)table->n_in, table->n_in);
}

// tokens: those of n_texts texts, one after the other;   lengths: [n_texts], each 1 to n_ctx;   end: the end token, whose first
// row stands for a text (the last row, where there is none);   embeddings: out, [n_texts][n_embd_joint]
static astrovl_status avl__clip_embed_texts(const avl__clip_text *text, avl__run *run, const int32_t *tokens, const int *lengths,
                                            int n_texts, int32_t end, float *embeddings, astrovl_error *err) {
    avl__tower_pass pass;
    int i, j, d = text->tower.n_embd, longest = 0, at = 0;
    memset(&pass, 0, sizeof pass);
    for (i = 0; i < n_texts; i++) {
        pass.n_rows += lengths[i];
        if (lengths[i] > longest) longest = lengths[i];
    }
    pass.n_sequences = n_texts;
    pass.lengths = lengths;
    pass.causal = 1;
    pass.prefix = "text_model.encoder.layers";
    if (!avl__tower_reserve(&text->tower, &text->joint, run, &pass, longest, 0, 0))
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for encoding a text");
    avl__embed_tokens(&text->token_embd, tokens, pass.n_rows, pass.x);
    for (i = 0; i < n_texts; at += lengths[i++]) avl__add(pass.x + (size_t)at * (size_t)d, text->position_embd, (int64_t)lengths[i] * d);
    avl__tap(run, "text_model.embeddings", -1, "", pass.x, pass.n_rows, d);
    for (i = 0; i < text->tower.n_layer; i++) avl__tower_layer_run(&text->tower, run, &pass, i);
    avl__layer_norm_rows(run, pass.x, pass.x, text->joint.norm_weight, text->joint.norm_bias, pass.n_rows, d, text->tower.eps);
    avl__tap(run, "text_model.final_layer_norm", -1, "", pass.x, pass.n_rows, d);
    for (i = 0, at = 0; i < n_texts; at += lengths[i++]) {
        for (j = 0; j + 1 < lengths[i] && tokens[at + j] != end; j++) {}
        memcpy(pass.normed + (size_t)i * (size_t)d, pass.x + (size_t)(at + j) * (size_t)d, (size_t)d * sizeof(float));
    }
    avl__joint_run(&text->joint, run, &pass, "text_projection", embeddings);
    return ASTROVL_OK;
}

// ====================================================================================================================
// [10] LLaMA
// The language model (Touvron et al. 2023): a decoder of pre-norm layers on rows of n_embd numbers,
//     x += wo attention(rope(wq n), rope(wk n), wv n)   with n = rms_norm(x), attending to all earlier rows through a cache
//     x += w_down (silu(w_gate n) * w_up n)             with n = rms_norm(x)                          (SwiGLU, Shazeer 2020)
// then a norm and a product with the output matrix, which gives a logit for every token of the vocabulary. Names and keys:
// llama.cpp's GGUF files of architecture "llama" (LLaMA-1/2/3, Vicuna, SmolLM2 and others).
// ====================================================================================================================

typedef struct avl__llama_layer {
    const float *attention_norm, *ffn_norm;   // [n_embd]
    avl__linear  q, k, v, o;                  // q: [n_head head_dim][n_embd]; k, v: [n_head_kv head_dim][n_embd]
    avl__linear  gate, up, down;              // [n_ff][n_embd] twice, [n_embd][n_ff]
} avl__llama_layer;

typedef struct avl__llama {
    int   n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, head_dim, rope_dim, n_ff;
    float rope_theta, rms_norm_eps;
    avl__linear       token_embd;             // [n_vocab][n_embd]
    avl__linear       output;                 // [n_vocab][n_embd]; the same matrix where the file has none ("tied")
    const float      *output_norm;            // [n_embd]
    float            *inv_freq;               // [rope_dim / 2], owned
    avl__llama_layer *layers;                 // [n_layer], owned
} avl__llama;

static astrovl_status avl__llama_load_sizes(avl__llama *m, avl__weights *w, astrovl_error *err) {
    astrovl_status status = avl__key_int(w, "llama.embedding_length", 1, 1 << 20, -1, &m->n_embd, err);
    if (!status) status = avl__key_int(w, "llama.block_count", 1, 1024, -1, &m->n_layer, err);
    if (!status) status = avl__key_int(w, "llama.context_length", 1, 1 << 24, -1, &m->n_ctx_train, err);
    if (!status) status = avl__key_int(w, "llama.feed_forward_length", 1, 1 << 22, -1, &m->n_ff, err);
    if (!status)
        status = avl__key_int(w, "llama.attention.head_count", 1, m->n_embd ? m->n_embd : 1 << 20, -1, &m->n_head, err);
    if (status || !m->n_embd || !m->n_head) return status;
    status = avl__key_int(w, "llama.attention.head_count_kv", 1, m->n_head, m->n_head, &m->n_head_kv, err);
    if (!status) status = avl__key_int(w, "llama.attention.key_length", 2, 65536, m->n_embd / m->n_head, &m->head_dim, err);
    if (status || !m->n_head_kv || !m->head_dim) return status;
    status = avl__key_int(w, "llama.rope.dimension_count", 2, m->head_dim, m->head_dim, &m->rope_dim, err);
    if (status || !m->rope_dim) return status;
    if (m->n_head % m->n_head_kv != 0 || m->rope_dim % 2 != 0 || (int64_t)m->n_head * m->head_dim > 1 << 20)
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: %d query heads cannot share %d key heads of %d values (%d of them "
                            "rotated)", astrovl_gguf_name(w->files[0]), m->n_head, m->n_head_kv, m->head_dim, m->rope_dim);
    m->rope_theta = (float)avl__key_float(w, "llama.rope.freq_base", 10000.0);
    m->rms_norm_eps = (float)avl__key_float(w, "llama.attention.layer_norm_rms_epsilon", 1e-5);
    if (!(m->rope_theta > 0.0f && m->rope_theta < 1e30f) || !(m->rms_norm_eps >= 0.0f && m->rms_norm_eps < 1.0f))
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: llama.rope.freq_base or llama.attention.layer_norm_rms_epsilon is out "
                            "of range", astrovl_gguf_name(w->files[0]));
    return ASTROVL_OK;
}

// LLaMA-3 stores one divisor per frequency (rope_freqs.weight); "linear" scaling divides every position by one factor.
static astrovl_status avl__llama_load_rope(avl__llama *m, avl__weights *w, astrovl_error *err) {
    const float *factors = NULL;
    float linear_scale = 1.0f;
    astrovl_string type = avl__key_string(w, "llama.rope.scaling.type");
    astrovl_status status = avl__load_optional_vector(w, "rope_freqs.weight", m->rope_dim / 2, &factors, err);
    int i;
    if (status) return status;
    if (avl__string_is(type, "linear"))
        linear_scale = (float)avl__key_float(w, "llama.rope.scaling.factor", 1.0);
    else if (type.size && !avl__string_is(type, "none") && !factors)
        return avl__problem(w, err, ASTROVL_ERROR_UNSUPPORTED, "%s: RoPE scaling of type %S (known: none, linear, and "
                            "rope_freqs.weight)", astrovl_gguf_name(w->files[0]), type);
    if (!(linear_scale > 0.0f && linear_scale < 1e6f))
        return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: llama.rope.scaling.factor is out of range",
                            astrovl_gguf_name(w->files[0]));
    for (i = 0; factors && i < m->rope_dim / 2; i++)
        if (!(factors[i] > 0.0f))
            return avl__problem(w, err, ASTROVL_ERROR_MODEL, "%s: rope_freqs.weight holds a factor that is not positive",
                                astrovl_gguf_name(w->files[0]));
    m->inv_freq = avl__alloc_floats((uint64_t)m->rope_dim / 2);
    if (!m->inv_freq) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the language model");
    avl__rope_frequencies(m->inv_freq, m->rope_dim, m->rope_theta, factors, linear_scale);
    return ASTROVL_OK;
}

// Weights of 8 bits are exact enough for the rounding of activations to be seen in the logits (SmolLM2, 512 tokens of two texts, cosine
// with exact mode: 0.9996 and 0.9998). So what comes out of a norm, whose largest values stand out, gets 16 bits where it is large:
// 0.99993, and reading a prompt takes a ninth more arithmetic. The same for attention's output and ffn_down's input changes little.
static astrovl_status avl__llama_load_layer(avl__llama *m, avl__weights *w, int i, astrovl_error *err) {
    avl__llama_layer *layer = &m->layers[i];
    int n_q = m->n_head * m->head_dim, n_kv = m->n_head_kv * m->head_dim;
    const struct { const char *name; int n_in, n_out, is_normed; avl__linear *linear; } linears[] = {
        {"attn_q", m->n_embd, n_q, 1, &layer->q},          {"attn_k", m->n_embd, n_kv, 1, &layer->k},
        {"attn_v", m->n_embd, n_kv, 1, &layer->v},         {"attn_output", n_q, m->n_embd, 0, &layer->o},
        {"ffn_gate", m->n_embd, m->n_ff, 1, &layer->gate}, {"ffn_up", m->n_embd, m->n_ff, 1, &layer->up},
        {"ffn_down", m->n_ff, m->n_embd, 0, &layer->down}};
    char name[64];
    astrovl_status status = ASTROVL_OK;
    size_t n;
    for (n = 0; n < sizeof linears / sizeof *linears && !status; n++) {
        avl__format(name, sizeof name, "blk.%d.%s", i, linears[n].name);
        status = avl__load_linear(w, name, linears[n].n_in, linears[n].n_out, linears[n].linear, err);
    }
    avl__format(name, sizeof name, "blk.%d.attn_norm.weight", i);
    if (!status) status = avl__load_vector(w, name, m->n_embd, &layer->attention_norm, err);
    avl__format(name, sizeof name, "blk.%d.ffn_norm.weight", i);
    if (!status) status = avl__load_vector(w, name, m->n_embd, &layer->ffn_norm, err);
    return status;
}

static astrovl_status avl__llama_load(avl__llama *m, avl__weights *w, astrovl_error *err) {
    astrovl_status status = avl__llama_load_sizes(m, w, err);
    int i;
    if (!status) status = avl__llama_load_rope(m, w, err);
    if (!status) status = avl__load_tall_linear(w, "token_embd", m->n_embd, &m->token_embd, err);
    if (!status) status = avl__load_vector(w, "output_norm.weight", m->n_embd, &m->output_norm, err);
    if (status) return status;
    m->n_vocab = m->token_embd.n_out;
    m->output = m->token_embd;
    if (avl__find_tensor(w, "output.weight", NULL)) status = avl__load_linear(w, "output", m->n_embd, m->n_vocab, &m->output, err);
    if (status) return status;
    m->layers = (avl__llama_layer *)avl__alloc((uint64_t)m->n_layer, sizeof *m->layers);
    if (!m->layers) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the language model");
    for (i = 0; i < m->n_layer && !status; i++) status = avl__llama_load_layer(m, w, i, err);
    return status;
}

// ---- the KV cache --------------------------------------------------------------------------------------------------
// Keys (already rotated) and values of every earlier position, so that a new token costs one row and not the whole text.

typedef struct avl__kv_cache {
    void  *k, *v;          // [n_layer][n_head_kv][n_ctx][head_dim], touched only as far as n_past: one head's keys follow one another
    size_t value_bytes;    // 4: float; 2, in fast mode: float16, of which reading takes half the time
    int    n_ctx, n_past;
} avl__kv_cache;

static int avl__kv_cache_init(avl__kv_cache *cache, const avl__llama *m, int n_ctx, size_t value_bytes) {
    uint64_t row = (uint64_t)m->n_head_kv * m->head_dim, n = (uint64_t)m->n_layer * (uint64_t)n_ctx;
    if (n > SIZE_MAX / 16 / row) return 0;
    cache->n_ctx = n_ctx;
    cache->n_past = 0;
    cache->value_bytes = value_bytes;
    cache->k = avl__alloc_raw(n * row + AVL__LINE, value_bytes);
    cache->v = avl__alloc_raw(n * row + AVL__LINE, value_bytes);
    return cache->k && cache->v;
}

static void avl__kv_cache_free(avl__kv_cache *cache) {
    astrovl_free(cache->k);
    astrovl_free(cache->v);
}

// Where a layer's keys or values begin.
static uint8_t *avl__kv_layer(const avl__kv_cache *cache, const avl__llama *m, void *k_or_v, int layer) {
    return (uint8_t *)avl__align(k_or_v) + (size_t)layer * m->n_head_kv * cache->n_ctx * m->head_dim * cache->value_bytes;
}

// Where a layer's key or value of a head at a position lies.
static uint8_t *avl__kv_at(const avl__kv_cache *cache, const avl__llama *m, uint8_t *layer, int head, int position) {
    return layer + ((size_t)head * cache->n_ctx + (size_t)position) * m->head_dim * cache->value_bytes;
}

// Puts a row's values [n_head_kv][head_dim] at a position of a layer's keys or values.
static void avl__kv_put(const avl__kernels *kernels, const avl__kv_cache *cache, const avl__llama *m, uint8_t *layer, const float *values,
                        int position) {
    int head;
    for (head = 0; head < m->n_head_kv; head++, values += m->head_dim) {
        uint8_t *to = avl__kv_at(cache, m, layer, head, position);
        if (cache->value_bytes == 2) kernels->to_halves((uint16_t *)(void *)to, values, m->head_dim);
        else                         memcpy(to, values, (size_t)m->head_dim * sizeof(float));
    }
}

// ---- the forward pass ----------------------------------------------------------------------------------------------
// The rows of a pass follow one another in one cache, or they belong to several conversations, a row each. Only attention can tell:
// all else is done row by row, so that a step of many conversations reads every weight once, and not once for each.

enum { AVL__STEP_ROWS = 16 };   // conversations in a step, at most: up to so many rows the kernels compute every row as if it were
                                // alone, so an answer does not depend on what is written beside it

typedef struct avl__llama_pass {
    const avl__llama *m;
    avl__run         *run;
    avl__kv_cache *const *caches;   // [n_caches]: one for all rows, or one for each (then at most AVL__STEP_ROWS)
    int    n_caches, n;
    float *x;                // [n][n_embd]   the residual stream
    float *normed;           // [n][n_embd]
    float *q, *mixed;        // [n][n_head][head_dim]
    float *k, *v;            // [n][n_head_kv][head_dim], on their way into the caches
    float *gate, *up;        // [n][n_ff]
    float *turns;            // [n][rope_dim / 2][3]   cosine, sine, -sine of each row's angles, for all layers
    float *shown;            // [n][n_head][head_dim], only for the tap
    float *weights;          // [n_head][n][n_past + n], only for the tap, which sees one cache at a time
} avl__llama_pass;

static int avl__llama_reserve(avl__llama_pass *p) {
    const avl__llama *m = p->m;
    avl__run *run = p->run;
    const int n = p->n;
    uint64_t wide = (uint64_t)n * m->n_embd, heads = (uint64_t)n * m->n_head * m->head_dim, hidden = (uint64_t)n * m->n_ff;
    const int is_half = p->caches[0]->value_bytes == 2;
    uint64_t kv = (uint64_t)n * m->n_head_kv * m->head_dim, turns = (uint64_t)n * (m->rope_dim / 2) * 3;
    uint64_t weights = avl__attention_weights_floats(run, m->n_head, n, p->caches[0]->n_past + n), shown = run->tap ? heads : 0;
    uint64_t thread = (uint64_t)m->n_embd, n_keys = 0;
    float *block;
    int c;
    for (c = 0; c < p->n_caches; c++)
        if (n_keys < (uint64_t)p->caches[c]->n_past + n) n_keys = (uint64_t)p->caches[c]->n_past + n;
    if (is_half && p->n_caches == 1) n_keys = avl__attend_tile_floats(n_keys, m->head_dim);
    if (thread < n_keys) thread = n_keys;
    if (thread < (uint64_t)m->n_ff) thread = (uint64_t)m->n_ff;
    if (thread < (uint64_t)m->n_head * m->head_dim) thread = (uint64_t)m->n_head * m->head_dim;
    if (!avl__run_reserve(run, 2 * wide + 2 * heads + 2 * kv + 2 * hidden + turns + shown + weights, thread, (uint64_t)n)) return 0;
    run->always_panels = 0;
    block = run->rows;
    p->x = avl__carve(&block, wide);
    p->normed = avl__carve(&block, wide);
    p->q = avl__carve(&block, heads);
    p->mixed = avl__carve(&block, heads);
    p->k = avl__carve(&block, kv);
    p->v = avl__carve(&block, kv);
    p->gate = avl__carve(&block, hidden);
    p->up = avl__carve(&block, hidden);
    p->turns = avl__carve(&block, turns);
    p->shown = shown ? avl__carve(&block, shown) : NULL;
    p->weights = weights ? avl__carve(&block, weights) : NULL;
    return 1;
}

// Shows heads [n][n_head][head_dim] with each head's rotated values in transformers' order: GGUF keeps the pair (i, i + half)
// as neighbours, so that value 2i here is i there and 2i + 1 is i + half.
static void avl__llama_tap_heads(const avl__llama_pass *p, int layer, const char *name, const float *heads, int n_head) {
    const avl__llama *m = p->m;
    int row, i, half = m->rope_dim / 2;
    if (!p->run->tap) return;
    memcpy(p->shown, heads, (size_t)p->n * n_head * m->head_dim * sizeof(float));
    for (row = 0; row < p->n * n_head; row++)
        for (i = 0; i < half; i++) {
            p->shown[(size_t)row * m->head_dim + i]        = heads[(size_t)row * m->head_dim + 2 * i];
            p->shown[(size_t)row * m->head_dim + i + half] = heads[(size_t)row * m->head_dim + 2 * i + 1];
        }
    avl__tap(p->run, "model.layers", layer, name, p->shown, p->n, (int64_t)n_head * m->head_dim);
}

// Where row `row` of a pass stands.
static int avl__llama_position(const avl__llama_pass *p, int row) {
    const int n_each = p->n / p->n_caches;
    return p->caches[row / n_each]->n_past + row % n_each;
}

// Every layer turns the rows by the same angles.
static void avl__llama_turns(const avl__llama_pass *p) {
    const int half = p->m->rope_dim / 2;
    float *turn = p->turns;
    int row, i;
    for (row = 0; row < p->n; row++)
        for (i = 0; i < half; i++, turn += 3) avl__rope_turn(turn, (float)avl__llama_position(p, row) * p->m->inv_freq[i]);
}

typedef struct avl__row_job {
    const avl__llama_pass *p;
    int layer, skipped;        // rows without a query
} avl__row_job;

// Turns a row's query and key, and puts key and value into its cache. Every head's are elsewhere there: all are asked for first, or each
// would be waited for.
static void avl__llama_row_item(void *context, int row, int thread) {
    const avl__row_job *job = (const avl__row_job *)context;
    const avl__llama_pass *p = job->p;
    const avl__llama *m = p->m;
    const avl__kv_cache *cache = p->caches[row / (p->n / p->n_caches)];
    const size_t q_row = (size_t)m->n_head * m->head_dim, kv_row = (size_t)m->n_head_kv * m->head_dim;
    const float *turns = p->turns + (size_t)row * (size_t)(m->rope_dim / 2) * 3;
    const int position = avl__llama_position(p, row);
    uint8_t *keys = avl__kv_layer(cache, m, cache->k, job->layer), *values = avl__kv_layer(cache, m, cache->v, job->layer);
    int head;
    (void)thread;
    for (head = 0; head < m->n_head_kv; head++) {
        avl__prefetch(avl__kv_at(cache, m, keys, head, position), (size_t)m->head_dim * cache->value_bytes);
        avl__prefetch(avl__kv_at(cache, m, values, head, position), (size_t)m->head_dim * cache->value_bytes);
    }
    if (row >= job->skipped) avl__rope_row(p->q + (size_t)(row - job->skipped) * q_row, m->n_head, m->head_dim, m->rope_dim, turns);
    avl__rope_row(p->k + (size_t)row * kv_row, m->n_head_kv, m->head_dim, m->rope_dim, turns);
    avl__kv_put(p->run->kernels, cache, m, keys, p->k + (size_t)row * kv_row, position);
    avl__kv_put(p->run->kernels, cache, m, values, p->v + (size_t)row * kv_row, position);
}

// Queries of the last n_wanted rows; keys and values of all, into the caches.
static void avl__llama_qkv(const avl__llama_pass *p, int i, int n_wanted) {
    const avl__llama *m = p->m;
    const avl__llama_layer *layer = &m->layers[i];
    const int skipped = p->n - n_wanted;
    const avl__linear *const weights[] = {&layer->q, &layer->k, &layer->v};
    float *const qkv[] = {p->q, p->k, p->v};
    avl__row_job job = {p, i, skipped};
    avl__rms_norm_rows(p->run, p->normed, p->x, layer->attention_norm, p->n, m->n_embd, m->rms_norm_eps);
    avl__tap(p->run, "model.layers", i, "input_layernorm", p->normed, p->n, m->n_embd);
    if (skipped && n_wanted) avl__apply(p->run, p->q, p->normed + (size_t)skipped * m->n_embd, &layer->q, n_wanted);
    avl__apply_each(p->run, qkv + (skipped > 0), p->normed, weights + (skipped > 0), 3 - (skipped > 0), p->n);
    avl__llama_tap_heads(p, i, "self_attn.q_proj", p->q, m->n_head);
    avl__llama_tap_heads(p, i, "self_attn.k_proj", p->k, m->n_head_kv);
    avl__tap(p->run, "model.layers", i, "self_attn.v_proj", p->v, p->n, (int64_t)m->n_head_kv * m->head_dim);
    avl__pool_run(p->run->pool, avl__llama_row_item, &job, p->n);
    avl__llama_tap_heads(p, i, "self_attn.q_rope", p->q, m->n_head);
    avl__llama_tap_heads(p, i, "self_attn.k_rope", p->k, m->n_head_kv);
}

// Leaves the pass with its last n_wanted rows alone: fewer than all (of one cache) where nobody needs the others' output.
static void avl__llama_attention(avl__llama_pass *p, int i, int n_wanted) {
    const avl__llama *m = p->m;
    const size_t q_row = (size_t)m->n_head * m->head_dim;
    const int n_each = p->n / p->n_caches, skipped = p->n - n_wanted;
    avl__attention attentions[AVL__STEP_ROWS];
    int c;
    avl__llama_qkv(p, i, n_wanted);
    p->x += (size_t)skipped * m->n_embd;
    p->n = n_wanted;
    if (n_wanted == 0) return;
    for (c = 0; c < p->n_caches; c++) {
        const avl__kv_cache *cache = p->caches[c];
        const size_t head_dim = (size_t)m->head_dim, head_stride = head_dim * (size_t)cache->n_ctx;
        const avl__attention attention = {p->q + c * q_row, avl__kv_layer(cache, m, cache->k, i), avl__kv_layer(cache, m, cache->v, i),
                                          p->mixed + c * q_row, p->weights, n_each - skipped, cache->n_past + skipped, m->n_head,
                                          m->n_head_kv, m->head_dim, 1, p->run, head_dim, head_stride, cache->value_bytes == 2, 0};
        attentions[c] = attention;
    }
    avl__attention_run(attentions, p->n_caches);
    avl__tap3(p->run, "model.layers", i, "self_attn.attn_weights", p->weights, m->n_head, p->n, p->caches[0]->n_past + p->n);
    avl__tap(p->run, "model.layers", i, "self_attn.context", p->mixed, p->n, (int64_t)q_row);
    avl__apply(p->run, p->normed, p->mixed, &m->layers[i].o, p->n);
    avl__tap(p->run, "model.layers", i, "self_attn.o_proj", p->normed, p->n, m->n_embd);
    avl__add(p->x, p->normed, (int64_t)p->n * m->n_embd);
}

static void avl__llama_mlp(const avl__llama_pass *p, int i) {
    const avl__llama *m = p->m;
    const avl__llama_layer *layer = &m->layers[i];
    const avl__linear *const weights[] = {&layer->gate, &layer->up};
    float *const hidden[] = {p->gate, p->up};
    avl__rms_norm_rows(p->run, p->normed, p->x, layer->ffn_norm, p->n, m->n_embd, m->rms_norm_eps);
    avl__tap(p->run, "model.layers", i, "post_attention_layernorm", p->normed, p->n, m->n_embd);
    avl__apply_each(p->run, hidden, p->normed, weights, 2, p->n);
    avl__tap(p->run, "model.layers", i, "mlp.gate_proj", p->gate, p->n, m->n_ff);
    avl__tap(p->run, "model.layers", i, "mlp.up_proj", p->up, p->n, m->n_ff);
    avl__activate(p->run, p->gate, (int64_t)p->n * m->n_ff, NULL, p->up);
    avl__tap(p->run, "model.layers", i, "mlp.act", p->gate, p->n, m->n_ff);
    avl__apply(p->run, p->normed, p->gate, &layer->down, p->n);
    avl__tap(p->run, "model.layers", i, "mlp.down_proj", p->normed, p->n, m->n_embd);
    avl__add(p->x, p->normed, (int64_t)p->n * m->n_embd);
    avl__tap(p->run, "model.layers", i, "", p->x, p->n, m->n_embd);
}

// Appends n positions to one cache, or one to each of n caches (at most AVL__STEP_ROWS); the caller has checked that there is room.
//   tokens [n], or NULL and embeddings [n][n_embd]
//   logits  out, [n_logits][n_vocab], of the last n_logits positions; of all if there are several caches
static astrovl_status avl__llama_eval(const avl__llama *m, avl__run *run, avl__kv_cache *const *caches, int n_caches,
                                      const int32_t *tokens, const float *embeddings, int n, float *logits, int n_logits,
                                      astrovl_error *err) {
    avl__llama_pass p;
    const float *last;
    int is_prompt = n > n_caches, i;
    memset(&p, 0, sizeof p);
    p.m = m;
    p.run = run;
    p.caches = caches;
    p.n_caches = n_caches;
    p.n = n;
    if (!avl__llama_reserve(&p)) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for reading %d tokens", n);
    if (embeddings) memcpy(p.x, embeddings, (size_t)n * m->n_embd * sizeof(float));
    else            avl__embed_tokens(&m->token_embd, tokens, n, p.x);
    avl__tap(run, "model.embed_tokens", -1, "", p.x, n, m->n_embd);
    avl__llama_turns(&p);
    for (i = 0; i < m->n_layer; i++) {
        if (is_prompt && avl__report(run, "prompt", i, m->n_layer))
            return avl__fail(err, ASTROVL_CANCELLED, "cancelled while reading the prompt");
        avl__llama_attention(&p, i, i + 1 < m->n_layer || run->tap ? n : n_logits);   // of the last layer nobody reads more
        if (p.n) avl__llama_mlp(&p, i);
    }
    if (is_prompt) avl__report(run, "prompt", m->n_layer, m->n_layer);
    for (i = 0; i < n_caches; i++) caches[i]->n_past += n / n_caches;
    if (n_logits == 0) return ASTROVL_OK;
    last = p.x + (size_t)(p.n - n_logits) * m->n_embd;
    avl__rms_norm_rows(run, p.normed, last, m->output_norm, n_logits, m->n_embd, m->rms_norm_eps);
    avl__tap(run, "model.norm", -1, "", p.normed, n_logits, m->n_embd);
    avl__apply(run, logits, p.normed, &m->output, n_logits);
    avl__tap(run, "lm_head", -1, "", logits, n_logits, m->n_vocab);
    return ASTROVL_OK;
}


// ====================================================================================================================
// [11] VLM
// The whole: a model out of files, a session that runs it, and LLaVA (Liu et al. 2023) itself, which is three short steps.
// The vision tower turns an image into one row per patch; a projector brings each row to the language model's width; the rows
// stand in the sequence where the prompt says <image>. From there on the language model cannot tell rows from words.
// ====================================================================================================================

struct astrovl_model {
    avl__weights     weights;
    avl__vocab       vocab;
    avl__llama       llama;
    avl__clip        clip;
    avl__clip_text   clip_text;
    avl__vocab       clip_vocab;        // the text tower's
    float            logit_scale;       // what cosines are multiplied by before softmax
    avl__linear      projector[2];      // W2 gelu(W1 x + b1) + b2  (mlp2x_gelu), or the first one alone (linear)
    int              n_projector;       // 0: none
    int              has_vocab, has_text, has_vision, has_clip_text;
    astrovl_template chat_template;
    char            *name;              // general.name
};

struct astrovl_session {
    const astrovl_model *model;
    avl__run             own;
    avl__run            *run;           // its own, or that of the session it shares
    avl__kv_cache        cache;         // n_ctx 0: the model has no language model
    avl__tokens          answer;        // the last answer's tokens
    int                  n_unread;      // tokens at the answer's end that the cache does not hold yet
    int                  n_turns;
    astrovl_stats        stats;
};

// ---- templates -----------------------------------------------------------------------------------------------------

static const struct { const char *name; astrovl_template value; } avl__template_names[] = {
    {"auto", ASTROVL_TEMPLATE_AUTO},       {"vicuna_v1", ASTROVL_TEMPLATE_VICUNA}, {"llava_v1", ASTROVL_TEMPLATE_LLAVA},
    {"llava_llama_2", ASTROVL_TEMPLATE_LLAMA2}, {"llama_3", ASTROVL_TEMPLATE_LLAMA3}, {"chatml", ASTROVL_TEMPLATE_CHATML},
    {"plain", ASTROVL_TEMPLATE_PLAIN}};

enum { AVL__N_TEMPLATES = sizeof avl__template_names / sizeof *avl__template_names };

ASTROVL_API const char *astrovl_template_name(astrovl_template t) {
    int i;
    for (i = 0; i < AVL__N_TEMPLATES; i++) if (avl__template_names[i].value == t) return avl__template_names[i].name;
    return "unknown";
}

ASTROVL_API int astrovl_template_from_name(const char *name) {
    int i;
    for (i = 0; name && i < AVL__N_TEMPLATES; i++)
        if (strcmp(avl__template_names[i].name, name) == 0) return avl__template_names[i].value;
    return -1;
}

// Where `needle` begins in text, or NULL.
static const char *avl__find_text(astrovl_string text, const char *needle) {
    size_t n = strlen(needle), i;
    for (i = 0; n <= text.size && i <= text.size - n; i++)
        if (memcmp(text.data + i, needle, n) == 0) return text.data + i;
    return NULL;
}

// Each family of chat templates writes markers that no other does.
static astrovl_template avl__recognize_template(const avl__weights *w, int has_projector) {
    astrovl_string jinja = avl__key_string(w, "tokenizer.chat_template");
    if (avl__find_text(jinja, "<|im_start|>"))        return ASTROVL_TEMPLATE_CHATML;
    if (avl__find_text(jinja, "<|start_header_id|>")) return ASTROVL_TEMPLATE_LLAMA3;
    if (avl__find_text(jinja, "[INST]"))              return ASTROVL_TEMPLATE_LLAMA2;
    if (avl__find_text(jinja, "curious human"))       return ASTROVL_TEMPLATE_LLAVA;
    if (avl__find_text(jinja, "USER:"))               return ASTROVL_TEMPLATE_VICUNA;
    return has_projector ? ASTROVL_TEMPLATE_VICUNA : ASTROVL_TEMPLATE_PLAIN;   // LLaVA-1.5's files often carry no template
}

// ---- opening a model -----------------------------------------------------------------------------------------------

static astrovl_status avl__open_vocab(astrovl_model *m, astrovl_error *err) {
    int index;
    const astrovl_gguf *file = avl__find_key(&m->weights, "tokenizer.ggml.model", &index);
    if (!file) return ASTROVL_OK;
    m->has_vocab = 1;
    return avl__vocab_load(&m->vocab, file, "tokenizer.ggml.", 0, err);
}

static astrovl_status avl__open_text(astrovl_model *m, astrovl_error *err) {
    const astrovl_gguf *file = avl__find_part(&m->weights, "blk.");
    astrovl_string architecture = {"", 0};
    astrovl_status status;
    int key;
    if (!file) return ASTROVL_OK;
    m->has_text = 1;
    key = astrovl_gguf_find_kv(file, "general.architecture");
    if (key >= 0) architecture = astrovl_gguf_string(file, key, 0);
    if (!avl__string_is(architecture, "llama"))
        return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "%s: the language model is of architecture \"%S\"; this runs \"llama\": "
                         "take a model of that family", astrovl_gguf_name(file), architecture);
    status = avl__llama_load(&m->llama, &m->weights, err);
    if (!status && m->has_vocab && m->llama.n_vocab && m->vocab.n_tokens > m->llama.n_vocab)
        status = avl__fail(err, ASTROVL_ERROR_MODEL, "%s: the vocabulary has %d tokens, token_embd.weight only %d rows",
                           astrovl_gguf_name(file), m->vocab.n_tokens, m->llama.n_vocab);
    return status;
}

static astrovl_status avl__open_vision(astrovl_model *m, astrovl_error *err) {
    if (!avl__find_part(&m->weights, "v.")) return ASTROVL_OK;
    m->has_vision = 1;
    return avl__clip_load(&m->clip, &m->weights, err);
}

// The text tower's vocabulary: under keys of its own where the file has a language model as well, else where clip.cpp puts it.
static astrovl_status avl__open_clip_vocab(astrovl_model *m, astrovl_error *err) {
    static const char *const prefixes[] = {"clip.text.tokenizer.ggml.", "tokenizer.ggml."};
    const astrovl_gguf *file = NULL;
    char key[64];
    int i, index;
    for (i = 0; i < 2; i++) {
        avl__format(key, sizeof key, "%stokens", prefixes[i]);
        file = i == 0 ? avl__find_key(&m->weights, key, &index) : avl__find_part(&m->weights, "t.");
        if (file && astrovl_gguf_find_kv(file, key) >= 0) return avl__vocab_load(&m->clip_vocab, file, prefixes[i], 1, err);
    }
    return avl__problem(&m->weights, err, ASTROVL_ERROR_MODEL, "%s: the text tower has no vocabulary (tokenizer.ggml.tokens); convert "
                        "the model again with its tokenizer", astrovl_gguf_name(file));
}

static astrovl_status avl__open_clip_text(astrovl_model *m, astrovl_error *err) {
    const astrovl_gguf *file = NULL;
    const float *scale = NULL;
    astrovl_status status = avl__load_optional_vector(&m->weights, "logit_scale", 1, &scale, err);
    if (status) return status;
    m->logit_scale = scale ? astrovl_expf(scale[0]) : 100.0f;   // where CLIP's training ends; clip.cpp's files leave it out
    if (!(m->logit_scale > 0.0f && m->logit_scale <= FLT_MAX))
        return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: logit_scale is out of range", astrovl_gguf_name(m->weights.files[0]));
    file = avl__find_part(&m->weights, "t.");
    if (!file) return ASTROVL_OK;
    status = avl__clip_text_load(&m->clip_text, &m->weights, err);
    if (!status) status = avl__open_clip_vocab(m, err);
    if (!status && m->clip_text.n_vocab && m->clip_vocab.n_tokens > m->clip_text.n_vocab)
        status = avl__fail(err, ASTROVL_ERROR_MODEL, "%s: the text tower's vocabulary has %d tokens, t.token_embd.weight only %d rows",
                           astrovl_gguf_name(file), m->clip_vocab.n_tokens, m->clip_text.n_vocab);
    if (!status && m->clip.joint.projection.n_out && m->clip_text.joint.projection.n_out &&
        m->clip.joint.projection.n_out != m->clip_text.joint.projection.n_out)
        status = avl__fail(err, ASTROVL_ERROR_MODEL, "%s: images are embedded in %d numbers, texts in %d; these towers belong to different "
                           "models", astrovl_gguf_name(file), m->clip.joint.projection.n_out, m->clip_text.joint.projection.n_out);
    m->has_clip_text = 1;
    return status;
}

// mm.0 and mm.2 of an mmproj file (1 is the GELU between them, which has no weights); mm.0 alone is LLaVA-1.0's linear one.
static astrovl_status avl__open_projector(astrovl_model *m, astrovl_error *err) {
    const astrovl_gguf *file = NULL;
    astrovl_string type = avl__key_string(&m->weights, "clip.projector_type");
    astrovl_status status;
    int n_out;
    if (!avl__find_tensor(&m->weights, "mm.0.weight", &file) || !m->has_vision) return ASTROVL_OK;
    if (type.size && !avl__string_is(type, "mlp") && !avl__string_is(type, "linear"))
        return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "%s: a projector of type \"%S\"; LLaVA's are \"mlp\" and \"linear\"",
                         astrovl_gguf_name(file), type);
    status = avl__load_tall_linear(&m->weights, "mm.0", m->clip.tower.n_embd, &m->projector[0], err);
    m->n_projector = 1;
    if (!status && avl__find_tensor(&m->weights, "mm.2.weight", &file)) {
        status = avl__load_tall_linear(&m->weights, "mm.2", m->projector[0].n_out, &m->projector[1], err);
        m->n_projector = 2;
    }
    n_out = m->projector[m->n_projector - 1].n_out;
    if (!status && m->llama.n_embd && n_out && n_out != m->llama.n_embd)
        status = avl__fail(err, ASTROVL_ERROR_MODEL, "%s: the projector gives rows of %d values, the language model reads %d; "
                           "these files belong to different models", astrovl_gguf_name(file), n_out, m->llama.n_embd);
    return status;
}

// Parts that are whole, but of no use without others. Opening allows that; who asks for all problems is told.
static void avl__tell_gaps(astrovl_model *m) {
    int joint_image = m->clip.has_joint, i;
    const struct { int is_so; const char *what; } gaps[] = {
        {m->has_text && !m->has_vocab, "the language model has no tokenizer (tokenizer.ggml.*): convert it again with "
         "tokenizer.model or tokenizer.json next to its weights"},
        {m->n_projector && !m->has_text, "there is no language model, which answers are made with: give its file as well (-m FILE)"},
        {m->has_vision && !m->n_projector && !joint_image, "the vision tower has neither a projector (mm.0.weight) nor a projection "
         "(visual_projection.weight): convert it again, with that part"},
        {joint_image && !m->has_clip_text && !m->has_text, "there is no text tower (t.*), which images are compared with: give its "
         "file as well (-m FILE), or convert the model again with both towers"},
        {m->has_clip_text && !joint_image, "there is no vision tower with a projection (v.*, visual_projection.weight), which texts "
         "are compared with: give its file as well (-m FILE), or convert the model again with both towers"},
        {m->has_vocab && !m->has_text && !m->has_vision && !m->has_clip_text, "there is a vocabulary and nothing else: give the "
         "file with the weights as well (-m FILE)"}};
    for (i = 0; i < (int)(sizeof gaps / sizeof *gaps); i++)
        if (gaps[i].is_so)
            avl__problem(&m->weights, NULL, ASTROVL_ERROR_MODEL, "%s: %s", astrovl_gguf_name(m->weights.files[0]), gaps[i].what);
}

static astrovl_status avl__open_parts(astrovl_model *m, const astrovl_open_options *options, astrovl_error *err) {
    static astrovl_status (*const parts[])(astrovl_model *, astrovl_error *) = {
        avl__open_vocab, avl__open_text, avl__open_vision, avl__open_projector, avl__open_clip_text};
    astrovl_string name = avl__key_string(&m->weights, "general.name");
    astrovl_status status = ASTROVL_OK;
    astrovl_error problem;
    size_t i;
    for (i = 0; i < sizeof parts / sizeof *parts && !status; i++) {
        status = parts[i](m, &problem);
        if (status == ASTROVL_ERROR_MEMORY) return avl__fail(err, status, "%s", problem.message);
        if (status) status = avl__problem(&m->weights, err, status, "%s", problem.message);
    }
    if (!status && !m->weights.n_problems && !m->has_vocab && !m->has_text && !m->has_vision && !m->has_clip_text)
        status = avl__problem(&m->weights, err, ASTROVL_ERROR_MODEL, "%s: holds no part of a model that this header knows (no "
                              "vocabulary, no LLaMA, no CLIP tower)", astrovl_gguf_name(m->weights.files[0]));
    if (!status && options && options->on_problem) avl__tell_gaps(m);
    if (!status && m->weights.n_problems)
        status = avl__fail(err, ASTROVL_ERROR_MODEL, "%s: the model has %d problems, which were told one by one",
                           astrovl_gguf_name(m->weights.files[0]), m->weights.n_problems);
    m->weights.options = NULL;
    if (status) return status;
    m->chat_template = options ? options->chat_template : ASTROVL_TEMPLATE_AUTO;
    if (m->chat_template == ASTROVL_TEMPLATE_AUTO) m->chat_template = avl__recognize_template(&m->weights, m->n_projector);
    m->name = avl__copy_text(name.data, name.size);
    return m->name ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a model");
}

// A model with room for n files, still empty; NULL and err.
static astrovl_model *avl__model_new(int n_files, const astrovl_open_options *options, astrovl_error *err) {
    astrovl_model *m;
    if (n_files < 1) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no model file was given");
        return NULL;
    }
    m = (astrovl_model *)avl__alloc(1, sizeof *m);
    if (m) m->weights.files = (astrovl_gguf **)avl__alloc((uint64_t)n_files, sizeof *m->weights.files);
    if (!m || !m->weights.files) {
        astrovl_free(m);
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a model");
        return NULL;
    }
    m->weights.options = options;
    return m;
}

// Takes a file that was opened, or what was wrong with it. Returns 0 when opening the model ends with it.
static int avl__model_add(astrovl_model *m, astrovl_gguf *file, const astrovl_error *failure, astrovl_error *err) {
    if (file) return m->weights.files[m->weights.n_files++] = file, 1;
    if (failure->status != ASTROVL_ERROR_MEMORY)
        return avl__problem(&m->weights, err, failure->status, "%s", failure->message) == ASTROVL_OK;
    avl__fail(err, failure->status, "%s", failure->message);
    return 0;
}

// Finishes opening once the files are there, or closes everything.
static astrovl_model *avl__model_finish(astrovl_model *m, int n_files, const astrovl_open_options *options, astrovl_error *err) {
    if (m->weights.n_files == n_files && avl__open_parts(m, options, err) == ASTROVL_OK) return m;
    if (m->weights.n_files < n_files && m->weights.n_problems)   // of what these files lack, nothing can be said
        avl__fail(err, ASTROVL_ERROR_MODEL, "%d of %d files cannot be used", n_files - m->weights.n_files, n_files);
    astrovl_close(m);
    return NULL;
}

ASTROVL_API astrovl_model *astrovl_open_files(const char *const *paths, int n_paths, const astrovl_open_options *options,
                                              astrovl_error *err) {
    astrovl_model *m = avl__model_new(paths ? n_paths : 0, options, err);
    astrovl_error failure;
    int i;
    if (!m) return NULL;
    for (i = 0; paths && i < n_paths; i++)
        if (!avl__model_add(m, astrovl_gguf_open(paths[i], options ? options->no_mmap : 0, &failure), &failure, err)) break;
    return avl__model_finish(m, n_paths, options, err);
}

ASTROVL_API astrovl_model *astrovl_open(const char *path, const astrovl_open_options *options, astrovl_error *err) {
    return astrovl_open_files(&path, 1, options, err);
}

ASTROVL_API astrovl_model *astrovl_open_memory(const astrovl_memory *blocks, int n_blocks, const astrovl_open_options *options,
                                               astrovl_error *err) {
    astrovl_model *m = avl__model_new(blocks ? n_blocks : 0, options, err);
    astrovl_error failure;
    int i;
    if (!m) return NULL;
    for (i = 0; blocks && i < n_blocks; i++)
        if (!avl__model_add(m, astrovl_gguf_open_memory(blocks[i].data, blocks[i].size, blocks[i].name, &failure), &failure, err))
            break;
    return avl__model_finish(m, n_blocks, options, err);
}

ASTROVL_API void astrovl_close(astrovl_model *model) {
    if (!model) return;
    avl__vocab_free(&model->vocab);
    astrovl_free(model->llama.layers);
    astrovl_free(model->llama.inv_freq);
    avl__vocab_free(&model->clip_vocab);
    astrovl_free(model->clip.tower.layers);
    astrovl_free(model->clip_text.tower.layers);
    astrovl_free(model->name);
    avl__weights_free(&model->weights);
    astrovl_free(model);
}

ASTROVL_API int astrovl_n_files(const astrovl_model *model) { return model->weights.n_files; }

ASTROVL_API const astrovl_gguf *astrovl_file(const astrovl_model *model, int index) {
    return index >= 0 && index < model->weights.n_files ? model->weights.files[index] : NULL;
}

static int avl__n_embd_joint(const astrovl_model *m) {
    return m->has_clip_text ? m->clip_text.joint.projection.n_out : m->clip.has_joint ? m->clip.joint.projection.n_out : 0;
}

static void avl__count_weights(const avl__weights *w, astrovl_info *info) {
    int f, i, d;
    for (f = 0; f < w->n_files; f++)
        for (i = 0; i < astrovl_gguf_n_tensors(w->files[f]); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(w->files[f], i);
            uint64_t n = 1;
            for (d = 0; d < t->n_dims; d++) n *= (uint64_t)t->ne[d];
            info->n_params += n;
            info->n_weight_bytes += t->n_bytes;
        }
}

ASTROVL_API void astrovl_get_info(const astrovl_model *model, astrovl_info *info) {
    const avl__llama *llama = &model->llama;
    const avl__clip *clip = &model->clip;
    memset(info, 0, sizeof *info);
    info->has_vocab = model->has_vocab;
    info->has_text = model->has_text;
    info->has_vision = model->has_vision;
    info->has_projector = model->n_projector > 0;
    info->chat_template = model->chat_template;
    info->name = model->name;
    info->n_vocab = model->has_text ? llama->n_vocab : model->has_vocab ? model->vocab.n_tokens : 0;
    info->n_ctx_train = llama->n_ctx_train;
    info->n_embd = llama->n_embd;
    info->n_layer = llama->n_layer;
    info->n_head = llama->n_head;
    info->n_head_kv = llama->n_head_kv;
    info->head_dim = llama->head_dim;
    info->n_ff = llama->n_ff;
    info->rope_theta = llama->rope_theta;
    info->rms_norm_eps = llama->rms_norm_eps;
    info->bos_token = model->has_vocab ? model->vocab.bos : -1;
    info->eos_token = model->has_vocab ? model->vocab.eos : -1;
    info->image_size = clip->image_size;
    info->patch_size = clip->patch_size;
    info->n_patches = clip->n_patches;
    info->vision_n_embd = clip->tower.n_embd;
    info->vision_n_layer = clip->tower.n_layer;
    info->vision_n_head = clip->tower.n_head;
    info->vision_n_ff = clip->tower.n_ff;
    info->vision_feature_layer = clip->n_run;
    info->n_image_tokens = model->n_projector ? clip->n_patches : 0;
    info->has_joint_image = model->has_vision && clip->has_joint;
    info->has_joint_text = model->has_clip_text;
    info->n_embd_joint = avl__n_embd_joint(model);
    info->logit_scale = model->logit_scale;
    info->clip_text_n_ctx = model->clip_text.n_ctx;
    info->clip_text_n_embd = model->clip_text.tower.n_embd;
    info->clip_text_n_layer = model->clip_text.tower.n_layer;
    info->clip_text_n_head = model->clip_text.tower.n_head;
    info->clip_text_n_ff = model->clip_text.tower.n_ff;
    info->clip_text_n_vocab = model->clip_text.n_vocab;
    avl__count_weights(&model->weights, info);
}

#ifndef ASTROVL_NO_FILES
// ---- models of random weights --------------------------------------------------------------------------------------
// Speed and memory depend on shapes alone. One pool of numbers is made and rounded once to each type in use; every matrix is a
// stretch of it, over and over, that begins at a place of its own. Norms are ones, biases zeros.

// A prime number of the largest blocks: neighbouring rows of a matrix, whatever their length, are different stretches.
enum { AVL__NOISE = 1031 * 256, AVL__NOISE_TYPES = ASTROVL_TYPE_BF16 + 1 };

typedef struct avl__noise {
    astrovl_gguf_writer *w;
    const astrovl_info  *sizes;
    int                  type;                       // of matrices
    int                  writing;                    // the tensors are gone through twice: to declare them, and to write them
    int                  n_tensors, n_written;
    float               *values;                     // [AVL__NOISE], nearly normal, standard deviation 0.02
    uint8_t             *blocks[AVL__NOISE_TYPES];   // the same as each type, made when it is first wanted
    astrovl_progress     progress;
    void                *user;
    astrovl_error        failure;                    // the first
} avl__noise;

// The values as blocks of a type; NULL: out of memory.
static const uint8_t *avl__noise_blocks(avl__noise *n, int type) {
    uint64_t state = 1;
    int i;
    if (!n->values) {
        n->values = avl__alloc_floats(AVL__NOISE);
        for (i = 0; n->values && i < AVL__NOISE; i++)   // the sum of four uniform numbers has the variance 1/3
            n->values[i] = 0.03464f * (float)(avl__random(&state) + avl__random(&state) + avl__random(&state) + avl__random(&state) - 2.0);
    }
    if (!n->blocks[type]) {
        n->blocks[type] = (uint8_t *)avl__alloc_raw(1, astrovl_type_row_bytes(type, AVL__NOISE));
        if (n->blocks[type] && n->values) avl__quantize_row(type, n->values, n->blocks[type], AVL__NOISE);
    }
    return n->values ? n->blocks[type] : NULL;
}

// The tensor's n_bytes, out of a circle of `size` bytes.
static void avl__noise_write(avl__noise *n, const uint8_t *circle, size_t size, size_t at, uint64_t n_bytes) {
    if (n->failure.status) return;
    if (!circle) avl__fail(&n->failure, ASTROVL_ERROR_MEMORY, "out of memory for random weights");
    else if (n->progress && n->progress(n->user, "tensors", n->n_written, n->n_tensors))
        avl__fail(&n->failure, ASTROVL_CANCELLED, "%s: writing it was cancelled", n->w->path);
    for (; n_bytes > 0 && !n->failure.status; at = 0) {
        size_t piece = n_bytes < size - at ? (size_t)n_bytes : size - at;
        astrovl_gguf_write(n->w, circle + at, piece, &n->failure);
        n_bytes -= piece;
    }
    n->n_written++;
}

// name: with %d for the layer
static void avl__noise_tensor(avl__noise *n, const char *name, int layer, int type, int n_dims, const int64_t *ne) {
    uint64_t n_values = 1;
    char whole[64];
    int i;
    if (!n->writing) {
        avl__format(whole, sizeof whole, name, layer);
        astrovl_gguf_put_tensor(n->w, whole, (astrovl_type)type, n_dims, ne);
        n->n_tensors++;
    } else if (!n->failure.status) {
        for (i = 0; i < n_dims; i++) n_values *= (uint64_t)ne[i];
        avl__noise_write(n, avl__noise_blocks(n, type), astrovl_type_row_bytes(type, AVL__NOISE),
                         astrovl_type_row_bytes(type, n->n_written * 7919 % 1031 * 256), astrovl_type_row_bytes(type, (int64_t)n_values));
    }
}

static void avl__noise_matrix(avl__noise *n, const char *name, int layer, int n_in, int n_out) {
    const int64_t ne[2] = {n_in, n_out};
    avl__noise_tensor(n, name, layer, avl__type_for_rows(n->type, n_in), 2, ne);
}

// n_values times the same number
static void avl__noise_vector(avl__noise *n, const char *name, int layer, int n_values, float value) {
    const int64_t ne = n_values;
    uint8_t circle[1024];
    int i;
    if (!n->writing) { avl__noise_tensor(n, name, layer, ASTROVL_TYPE_F32, 1, &ne); return; }
    for (i = 0; i < 256; i++) avl__quantize_row(ASTROVL_TYPE_F32, &value, circle + 4 * i, 1);
    avl__noise_write(n, circle, sizeof circle, 0, 4 * (uint64_t)n_values);
}

static void avl__noise_text(avl__noise *n, int tied) {
    const astrovl_info *m = n->sizes;
    int i, n_kv = m->n_embd / m->n_head * m->n_head_kv;
    avl__noise_matrix(n, "token_embd.weight", 0, m->n_embd, m->n_vocab);
    avl__noise_vector(n, "output_norm.weight", 0, m->n_embd, 1.0f);
    if (!tied) avl__noise_matrix(n, "output.weight", 0, m->n_embd, m->n_vocab);
    for (i = 0; i < m->n_layer; i++) {
        avl__noise_vector(n, "blk.%d.attn_norm.weight", i, m->n_embd, 1.0f);
        avl__noise_matrix(n, "blk.%d.attn_q.weight", i, m->n_embd, m->n_embd);
        avl__noise_matrix(n, "blk.%d.attn_k.weight", i, m->n_embd, n_kv);
        avl__noise_matrix(n, "blk.%d.attn_v.weight", i, m->n_embd, n_kv);
        avl__noise_matrix(n, "blk.%d.attn_output.weight", i, m->n_embd, m->n_embd);
        avl__noise_vector(n, "blk.%d.ffn_norm.weight", i, m->n_embd, 1.0f);
        avl__noise_matrix(n, "blk.%d.ffn_gate.weight", i, m->n_embd, m->n_ff);
        avl__noise_matrix(n, "blk.%d.ffn_up.weight", i, m->n_embd, m->n_ff);
        avl__noise_matrix(n, "blk.%d.ffn_down.weight", i, m->n_ff, m->n_embd);
    }
}

static void avl__noise_vision(avl__noise *n) {
    static const char *const parts[] = {"attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"};
    const astrovl_info *m = n->sizes;
    const int side = m->image_size / m->patch_size, n_embd = m->vision_n_embd;
    const int64_t patch[4] = {m->patch_size, m->patch_size, 3, n_embd}, positions[2] = {n_embd, side * side + 1};
    char name[64];
    int i, k;
    avl__noise_tensor(n, "v.class_embd", 0, ASTROVL_TYPE_F32, 1, positions);
    avl__noise_tensor(n, "v.patch_embd.weight", 0, ASTROVL_TYPE_F16, 4, patch);
    avl__noise_tensor(n, "v.position_embd.weight", 0, ASTROVL_TYPE_F32, 2, positions);
    avl__noise_vector(n, "v.pre_ln.weight", 0, n_embd, 1.0f);
    avl__noise_vector(n, "v.pre_ln.bias", 0, n_embd, 0.0f);
    for (i = 0; i < m->vision_n_layer; i++) {
        avl__noise_vector(n, "v.blk.%d.ln1.weight", i, n_embd, 1.0f);
        avl__noise_vector(n, "v.blk.%d.ln1.bias", i, n_embd, 0.0f);
        avl__noise_vector(n, "v.blk.%d.ln2.weight", i, n_embd, 1.0f);
        avl__noise_vector(n, "v.blk.%d.ln2.bias", i, n_embd, 0.0f);
        for (k = 0; k < 6; k++) {
            const int n_in = k == 5 ? m->vision_n_ff : n_embd, n_out = k == 4 ? m->vision_n_ff : n_embd;
            avl__format(name, sizeof name, "v.blk.%d.%s.weight", i, parts[k]);
            avl__noise_matrix(n, name, 0, n_in, n_out);
            avl__format(name, sizeof name, "v.blk.%d.%s.bias", i, parts[k]);
            avl__noise_vector(n, name, 0, n_out, 0.0f);
        }
    }
    avl__noise_matrix(n, "mm.0.weight", 0, n_embd, m->n_embd);
    avl__noise_vector(n, "mm.0.bias", 0, m->n_embd, 0.0f);
    avl__noise_matrix(n, "mm.2.weight", 0, m->n_embd, m->n_embd);
    avl__noise_vector(n, "mm.2.bias", 0, m->n_embd, 0.0f);
}

static void avl__put_int(astrovl_gguf_writer *w, const char *key, int value) {
    const uint32_t number = (uint32_t)value;
    astrovl_gguf_put(w, key, ASTROVL_VALUE_U32, &number);
}

static void avl__put_text(astrovl_gguf_writer *w, const char *key, const char *text) {
    const astrovl_string string = {text, strlen(text)};
    astrovl_gguf_put(w, key, ASTROVL_VALUE_STRING, &string);
}

// A vocabulary of SentencePiece's kind: three special tokens, 256 bytes, the space, and all words of one, two, three ... letters.
static void avl__put_made_up_vocabulary(astrovl_gguf_writer *w, int n_vocab, astrovl_error *err) {
    static const char *const special[3] = {"<unk>", "<s>", "</s>"};
    static const char digits[] = "0123456789ABCDEF";
    astrovl_string *tokens = (astrovl_string *)avl__alloc((uint64_t)n_vocab, sizeof *tokens);
    char (*texts)[16] = (char (*)[16])avl__alloc((uint64_t)n_vocab, sizeof *texts);
    float *scores = avl__alloc_floats((uint64_t)n_vocab);
    int32_t *types = (int32_t *)avl__alloc((uint64_t)n_vocab, sizeof *types);
    int i, k, good = tokens && texts && scores && types;
    for (i = 0; good && i < n_vocab; i++) {
        char *text = texts[i], *end = text + sizeof *texts;
        if (i < 3) avl__format(text, sizeof *texts, "%s", special[i]);
        else if (i < 259) avl__format(text, sizeof *texts, "<0x%c%c>", digits[(i - 3) / 16], digits[(i - 3) % 16]);
        else if (i == 259) avl__format(text, sizeof *texts, "\xE2\x96\x81");
        else {
            for (k = i - 259; k > 0; k = (k - 1) / 26) *--end = (char)('a' + (k - 1) % 26);   // written from behind
            text = end;
        }
        tokens[i].data = text;
        tokens[i].size = i < 260 ? strlen(text) : (size_t)(texts[i] + sizeof *texts - end);
        scores[i] = i < 260 ? 0.0f : (float)(260 - i);
        types[i] = i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1;   // unknown, control, byte, normal
    }
    if (good) {
        avl__put_text(w, "tokenizer.ggml.model", "llama");
        astrovl_gguf_put_array(w, "tokenizer.ggml.tokens", ASTROVL_VALUE_STRING, tokens, (uint64_t)n_vocab);
        astrovl_gguf_put_array(w, "tokenizer.ggml.scores", ASTROVL_VALUE_F32, scores, (uint64_t)n_vocab);
        astrovl_gguf_put_array(w, "tokenizer.ggml.token_type", ASTROVL_VALUE_I32, types, (uint64_t)n_vocab);
        avl__put_int(w, "tokenizer.ggml.unknown_token_id", 0);
        avl__put_int(w, "tokenizer.ggml.bos_token_id", 1);
        avl__put_int(w, "tokenizer.ggml.eos_token_id", 2);
    }
    astrovl_free(tokens);
    astrovl_free(texts);
    astrovl_free(scores);
    astrovl_free(types);
    if (!good) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a vocabulary");
}

static void avl__put_random_text(astrovl_gguf_writer *w, const astrovl_info *m, astrovl_error *err) {
    const float eps = 1e-5f;
    avl__put_int(w, "llama.vocab_size", m->n_vocab);
    avl__put_int(w, "llama.context_length", m->n_ctx_train);
    avl__put_int(w, "llama.embedding_length", m->n_embd);
    avl__put_int(w, "llama.block_count", m->n_layer);
    avl__put_int(w, "llama.feed_forward_length", m->n_ff);
    avl__put_int(w, "llama.attention.head_count", m->n_head);
    avl__put_int(w, "llama.attention.head_count_kv", m->n_head_kv);
    avl__put_int(w, "llama.rope.dimension_count", m->n_embd / m->n_head);
    astrovl_gguf_put(w, "llama.attention.layer_norm_rms_epsilon", ASTROVL_VALUE_F32, &eps);
    avl__put_made_up_vocabulary(w, m->n_vocab, err);
}

static void avl__put_random_vision(astrovl_gguf_writer *w, const astrovl_info *m) {
    static const float half[3] = {0.5f, 0.5f, 0.5f}, eps = 1e-5f;
    const uint8_t yes = 1, no = 0;
    const int32_t layer = m->vision_n_layer;
    astrovl_gguf_put(w, "clip.has_vision_encoder", ASTROVL_VALUE_BOOL, &yes);
    astrovl_gguf_put(w, "clip.has_llava_projector", ASTROVL_VALUE_BOOL, &yes);
    astrovl_gguf_put(w, "clip.use_gelu", ASTROVL_VALUE_BOOL, &no);
    avl__put_text(w, "clip.projector_type", "mlp");
    avl__put_int(w, "clip.vision.image_size", m->image_size);
    avl__put_int(w, "clip.vision.patch_size", m->patch_size);
    avl__put_int(w, "clip.vision.embedding_length", m->vision_n_embd);
    avl__put_int(w, "clip.vision.feed_forward_length", m->vision_n_ff);
    avl__put_int(w, "clip.vision.block_count", m->vision_n_layer);
    avl__put_int(w, "clip.vision.attention.head_count", m->vision_n_head);
    avl__put_int(w, "clip.vision.projection_dim", m->n_embd);
    astrovl_gguf_put(w, "clip.vision.attention.layer_norm_epsilon", ASTROVL_VALUE_F32, &eps);
    astrovl_gguf_put_array(w, "clip.vision.image_mean", ASTROVL_VALUE_F32, half, 3);
    astrovl_gguf_put_array(w, "clip.vision.image_std", ASTROVL_VALUE_F32, half, 3);
    astrovl_gguf_put_array(w, "clip.vision.feature_layer", ASTROVL_VALUE_I32, &layer, 1);   // all layers are run
}

// Positive, and heads that share out their values evenly.
static int avl__is_model(const astrovl_info *m) {
    const int text[] = {m->n_ctx_train, m->n_layer, m->n_head, m->n_head_kv, m->n_ff, m->n_vocab - 259};
    const int vision[] = {m->image_size, m->patch_size, m->vision_n_embd, m->vision_n_layer, m->vision_n_head, m->vision_n_ff};
    int i, good = (m->has_text || m->has_vision) && m->n_embd > 0;
    for (i = 0; i < 6; i++) good = good && (!m->has_text || text[i] > 0) && (!m->has_vision || vision[i] > 0);
    if (good && m->has_text) good = m->n_embd % (2 * m->n_head) == 0 && m->n_head % m->n_head_kv == 0 && m->n_layer <= 1024;
    if (good && m->has_vision) good = m->vision_n_embd % m->vision_n_head == 0 && m->patch_size <= m->image_size &&
                                      m->image_size <= 8192 && m->vision_n_layer <= 1024;
    return good;
}

ASTROVL_API astrovl_status astrovl_write_random(const char *path, const astrovl_info *sizes, astrovl_type type, int tied,
                                                astrovl_progress progress, void *user, astrovl_error *err) {
    avl__noise n;
    int i;
    if (!sizes || !avl__find_type(type) || !avl__is_model(sizes))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no model has such sizes or such a type");
    memset(&n, 0, sizeof n);
    n.sizes = sizes;
    n.type = type;
    n.progress = progress;
    n.user = user;
    n.w = astrovl_gguf_create(path, &n.failure);
    if (n.w) {
        avl__put_text(n.w, "general.architecture", sizes->has_text ? "llama" : "clip");
        avl__put_text(n.w, "general.name", sizes->name ? sizes->name : "");
        avl__put_int(n.w, "general.file_type", avl__find_recipe(astrovl_type_name(type), NULL)->file_type);
        avl__put_int(n.w, "general.quantization_version", 2);
        if (sizes->has_text) avl__put_random_text(n.w, sizes, &n.failure);
        if (sizes->has_vision) avl__put_random_vision(n.w, sizes);
    }
    for (n.writing = 0; n.writing < 2 && !n.failure.status; n.writing++) {
        if (sizes->has_text) avl__noise_text(&n, tied);
        if (sizes->has_vision) avl__noise_vision(&n);
    }
    for (i = 0; i < AVL__NOISE_TYPES; i++) astrovl_free(n.blocks[i]);
    astrovl_free(n.values);
    if (n.failure.status) astrovl_gguf_discard(n.w);
    else astrovl_gguf_finish(n.w, &n.failure);
    if (n.failure.status) return avl__fail(err, n.failure.status, "%s", n.failure.message);
    if (progress) progress(user, "tensors", n.n_tensors, n.n_tensors);
    return ASTROVL_OK;
}

ASTROVL_API int astrovl_known_sizes(const char *name, astrovl_info *sizes, int *tied) {
    static const struct { const char *name; int tied, text[7], vision[6]; } known[] = {
        // n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_ff;  image_size, patch_size, n_embd, n_layer, n_head, n_ff
        {"llava-1.5-7b", 0, {32000, 4096, 4096, 32, 32, 32, 11008}, {336, 14, 1024, 23, 16, 4096}},   // the layers that are run
        {"smollm2-135m", 1, {49152, 8192, 576, 30, 9, 3, 1536}, {0, 0, 0, 0, 0, 0}},
        {"nano", 0, {512, 1024, 256, 2, 4, 2, 256}, {28, 7, 64, 2, 4, 128}}};
    size_t i, k;
    for (i = 0; i < sizeof known / sizeof *known && strcmp(name, known[i].name) != 0; i++) {}
    if (i == sizeof known / sizeof *known) return 0;
    memset(sizes, 0, sizeof *sizes);
    sizes->name = known[i].name;
    *tied = known[i].tied;
    sizes->has_text = 1;
    sizes->has_vision = known[i].vision[0] > 0;
    {
        int *const text[7] = {&sizes->n_vocab, &sizes->n_ctx_train, &sizes->n_embd, &sizes->n_layer, &sizes->n_head, &sizes->n_head_kv,
                              &sizes->n_ff};
        int *const vision[6] = {&sizes->image_size, &sizes->patch_size, &sizes->vision_n_embd, &sizes->vision_n_layer,
                                &sizes->vision_n_head, &sizes->vision_n_ff};
        for (k = 0; k < 7; k++) *text[k] = known[i].text[k];
        for (k = 0; k < 6; k++) *vision[k] = known[i].vision[k];
    }
    return 1;
}
#endif

// ---- text, by the model's vocabulary -------------------------------------------------------------------------------

static astrovl_status avl__need_vocab(const astrovl_model *m, astrovl_error *err) {
    return m->has_vocab ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MODEL, "%s: no vocabulary (tokenizer.ggml.*) in the model's files",
                                                 astrovl_gguf_name(m->weights.files[0]));
}

static int avl__tokenize(const avl__vocab *vocab, const char *text, size_t size, int flags, int32_t *tokens, int capacity,
                         astrovl_error *err) {
    avl__tokens list = {NULL, 0, 0};
    int n = -1;
    if (avl__vocab_encode(vocab, text, size, flags, &list, err) == ASTROVL_OK) {
        if (list.size > INT_MAX) {
            avl__fail(err, ASTROVL_ERROR_LIMIT, "a text of more than 2^31 tokens");
        } else {
            n = (int)list.size;
            if (n > 0 && capacity > 0) memcpy(tokens, list.data, (size_t)(n < capacity ? n : capacity) * sizeof *tokens);
        }
    }
    astrovl_free(list.data);
    return n;
}

ASTROVL_API int astrovl_tokenize(const astrovl_model *model, const char *text, size_t size, int flags, int32_t *tokens, int capacity,
                                 astrovl_error *err) {
    return avl__need_vocab(model, err) ? -1 : avl__tokenize(&model->vocab, text, size, flags, tokens, capacity, err);
}

ASTROVL_API astrovl_string astrovl_token_piece(const astrovl_model *model, int32_t token) {
    astrovl_string none = {"", 0};
    return model->has_vocab ? avl__vocab_piece(&model->vocab, token) : none;
}

ASTROVL_API int astrovl_token_text(const astrovl_model *model, int32_t token, char *text, int capacity) {
    return model->has_vocab ? avl__vocab_token_bytes(&model->vocab, token, text, capacity) : 0;
}

ASTROVL_API int astrovl_token_is_end(const astrovl_model *model, int32_t token) {
    return model->has_vocab ? avl__vocab_is_end(&model->vocab, token) : 0;
}

// Does the token begin with the space that SentencePiece puts before a text? A space of its own (<0x20>) does not count.
static int avl__begins_with_mark(const avl__vocab *vocab, int32_t token) {
    astrovl_string piece = avl__vocab_piece(vocab, token);
    return vocab->add_space_prefix && piece.size >= 3 && memcmp(piece.data, AVL__SPACE_MARK, 3) == 0;
}

// Appends a token's text, of any length, to b.
static void avl__put_token(const avl__vocab *vocab, int32_t token, avl__bytes *b) {
    char small[64];
    int n = avl__vocab_token_bytes(vocab, token, small, (int)sizeof small);
    if (n <= (int)sizeof small) {
        avl__bytes_put(b, small, (size_t)n);
    } else if (b->failed || !avl__grow(&b->data, &b->capacity, b->size + (size_t)n + 1, 1)) {
        b->failed = 1;
    } else {
        avl__vocab_token_bytes(vocab, token, b->data + b->size, n);
        b->size += (size_t)n;
        b->data[b->size] = 0;
    }
}

ASTROVL_API char *astrovl_detokenize(const astrovl_model *model, const int32_t *tokens, int n_tokens, astrovl_error *err) {
    avl__bytes text = {NULL, 0, 0, 0};
    int i, added_space = 0;
    if (avl__need_vocab(model, err) != ASTROVL_OK) return NULL;
    avl__bytes_put(&text, "", 0);
    for (i = 0; i < n_tokens; i++) {
        size_t before = text.size;
        avl__put_token(&model->vocab, tokens[i], &text);
        if (before == 0 && text.size > 0) added_space = avl__begins_with_mark(&model->vocab, tokens[i]);
    }
    if (text.failed) {
        astrovl_free(text.data);
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the text of %d tokens", n_tokens);
        return NULL;
    }
    if (added_space) memmove(text.data, text.data + 1, text.size);
    return text.data;
}

// ---- sessions ------------------------------------------------------------------------------------------------------

static astrovl_status avl__run_init(avl__run *run, const astrovl_session_options *o, astrovl_error *err) {
    run->kernels = avl__choose_kernels(o->mode, o->isa);
    if (!run->kernels)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "there are no kernels called \"%s\"; this build has %s", o->isa, AVL__KERNEL_NAMES);
    run->tap = o->tap;
    run->tap_user = o->tap_user;
    run->progress = o->progress;
    run->progress_user = o->progress_user;
    run->pool = avl__pool_new(o->n_threads > 0 ? o->n_threads : avl__n_processors());
    return run->pool ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a session");
}

static astrovl_status avl__session_init(astrovl_session *s, const astrovl_session_options *o, astrovl_error *err) {
    const avl__llama *llama = &s->model->llama;
    int n_ctx = o->n_ctx ? o->n_ctx : llama->n_ctx_train < ASTROVL_DEFAULT_CONTEXT ? llama->n_ctx_train : ASTROVL_DEFAULT_CONTEXT;
    astrovl_status status;
    if (o->n_threads < 0 || o->n_ctx < 0 || (o->mode != ASTROVL_FAST && o->mode != ASTROVL_EXACT))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "session options: n_threads %d, n_ctx %d, mode %d", o->n_threads, o->n_ctx, (int)o->mode);
    if (s->model->has_text && n_ctx > llama->n_ctx_train)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a context of %d tokens; the model was made for %d", n_ctx, llama->n_ctx_train);
    if (o->share && o->share->model != s->model)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a session can share only with one of the same model");
    s->run = o->share ? o->share->run : &s->own;
    status = o->share ? ASTROVL_OK : avl__run_init(&s->own, o, err);
    if (!status && s->model->has_text && !avl__kv_cache_init(&s->cache, llama, n_ctx, s->run->kernels->attend ? 2 : 4))
        status = avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a session with a context of %d tokens; ask for a smaller one",
                           n_ctx);
    return status;
}

ASTROVL_API astrovl_session *astrovl_session_new(const astrovl_model *model, const astrovl_session_options *options, astrovl_error *err) {
    astrovl_session_options defaults;
    astrovl_session *s = (astrovl_session *)avl__alloc(1, sizeof *s);
    if (!s) {
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a session");
        return NULL;
    }
    memset(&defaults, 0, sizeof defaults);
    s->model = model;
    if (avl__session_init(s, options ? options : &defaults, err) != ASTROVL_OK) {
        astrovl_session_free(s);
        return NULL;
    }
    return s;
}

ASTROVL_API void astrovl_session_free(astrovl_session *s) {
    if (!s) return;
    if (s->own.pool) avl__pool_free(s->own.pool);   // of a session that shares another's, all these are empty
    astrovl_free(s->own.rows);
    astrovl_free(s->own.thread_memory);
    astrovl_free(s->own.quants);
    avl__kv_cache_free(&s->cache);
    astrovl_free(s->answer.data);
    astrovl_free(s);
}

ASTROVL_API void astrovl_session_rewind(astrovl_session *s, int n_past) {
    if (n_past >= 0 && n_past < s->cache.n_past) {
        s->cache.n_past = n_past;
        s->n_unread = 0;
    }
}

ASTROVL_API void astrovl_session_reset(astrovl_session *s) {
    s->cache.n_past = 0;
    s->n_unread = 0;
    s->n_turns = 0;
    s->answer.size = 0;
}

ASTROVL_API int astrovl_session_n_past(const astrovl_session *s) { return s->cache.n_past; }
ASTROVL_API int astrovl_session_n_ctx(const astrovl_session *s) { return s->cache.n_ctx; }
ASTROVL_API void astrovl_get_stats(const astrovl_session *s, astrovl_stats *stats) { *stats = s->stats; }

ASTROVL_API const int32_t *astrovl_answer_tokens(const astrovl_session *s, int *n_tokens) {
    *n_tokens = (int)s->answer.size;
    return s->answer.data;
}

// ---- images to rows ------------------------------------------------------------------------------------------------

static astrovl_status avl__need_vision(const astrovl_model *m, astrovl_error *err) {
    return m->has_vision ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MODEL, "%s: no vision tower (v.* tensors) in the model's files; "
                                                  "give the mmproj file too", astrovl_gguf_name(m->weights.files[0]));
}

static astrovl_status avl__need_text(const astrovl_model *m, astrovl_error *err) {
    return m->has_text ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MODEL, "%s: no language model (token_embd.weight, blk.*) in the "
                                                "model's files; give the text model's file too", astrovl_gguf_name(m->weights.files[0]));
}

ASTROVL_API astrovl_status astrovl_preprocess(const astrovl_model *model, const astrovl_image *image, float *pixels, astrovl_error *err) {
    astrovl_status status = avl__need_vision(model, err);
    return status ? status : avl__clip_preprocess(&model->clip, image, pixels, err);
}

// features [n_patches][vision n_embd] to rows [n_patches][n_embd]:  W2 gelu(W1 x + b1) + b2   (LLaVA-1.5, section 3.4)
static astrovl_status avl__project(const astrovl_model *m, avl__run *run, const float *features, float *rows, astrovl_error *err) {
    const avl__linear *first = &m->projector[0], *second = &m->projector[1];
    int n = m->clip.n_patches;
    uint64_t widest = (uint64_t)(first->n_in > first->n_out ? first->n_in : first->n_out);
    if (!avl__run_reserve(run, (uint64_t)n * first->n_out, widest, (uint64_t)n)) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the projector");
    if (m->n_projector == 1) {
        avl__apply(run, rows, features, first, n);
        avl__tap(run, "multi_modal_projector", -1, "linear", rows, n, first->n_out);
        return ASTROVL_OK;
    }
    avl__apply(run, run->rows, features, first, n);
    avl__tap(run, "multi_modal_projector", -1, "linear_1", run->rows, n, first->n_out);
    avl__activate(run, run->rows, (int64_t)n * first->n_out, run->kernels->gelu, NULL);
    avl__tap(run, "multi_modal_projector", -1, "act", run->rows, n, first->n_out);
    avl__apply(run, rows, run->rows, second, n);
    avl__tap(run, "multi_modal_projector", -1, "linear_2", rows, n, second->n_out);
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_encode_image(astrovl_session *s, const astrovl_image *image, float *features, astrovl_error *err) {
    const astrovl_model *m = s->model;
    astrovl_status status = avl__need_vision(m, err);
    float *pixels, *rows;
    if (status) return status;
    if (!m->n_projector)
        return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: no projector (mm.0.weight) in the model's files", astrovl_gguf_name(m->weights.files[0]));
    pixels = avl__alloc_floats((uint64_t)3 * m->clip.image_size * m->clip.image_size);
    rows = avl__alloc_floats((uint64_t)m->clip.n_patches * m->clip.tower.n_embd);
    if (!pixels || !rows) {
        status = avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for encoding an image");
    } else {
        status = avl__clip_preprocess(&m->clip, image, pixels, err);
        if (!status) avl__tap3(s->run, "pixel_values", -1, "", pixels, 3, m->clip.image_size, m->clip.image_size);
        if (!status) status = avl__clip_encode(&m->clip, s->run, pixels, rows, err);
        if (!status) status = avl__project(m, s->run, rows, features, err);
    }
    astrovl_free(pixels);
    astrovl_free(rows);
    return status;
}

// ---- rows through the language model -------------------------------------------------------------------------------

// A long prompt is read in blocks, so that memory for activations stays small; the numbers are the same.
enum { AVL__PROMPT_BLOCK = 512 };

static astrovl_status avl__eval(astrovl_session *s, const int32_t *tokens, const float *rows, int n, float *logits, int n_logits,
                                astrovl_error *err) {
    const avl__llama *llama = &s->model->llama;
    avl__kv_cache *cache = &s->cache;
    int n_before = cache->n_past, done, i;
    astrovl_status status = avl__need_text(s->model, err);
    if (status) return status;
    if (n < 1 || n_logits < 0 || n_logits > n || (n_logits > 0 && !logits))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%d tokens to read and %d rows of logits wanted", n, n_logits);
    if (n > s->cache.n_ctx - s->cache.n_past)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "the context is full: it holds %d positions, %d are taken, and %d more are needed",
                         s->cache.n_ctx, s->cache.n_past, n);
    for (i = 0; tokens && i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= llama->n_vocab)
            return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "token %d at place %d; the model has %d", (int)tokens[i], i, llama->n_vocab);
    for (done = 0; done < n && !status; ) {
        int block = n - done < AVL__PROMPT_BLOCK ? n - done : AVL__PROMPT_BLOCK;
        int skipped = n - n_logits - done;                       // of this block, rows before the first wanted one
        int wanted = skipped >= block ? 0 : skipped < 0 ? block : block - skipped;
        status = avl__llama_eval(llama, s->run, &cache, 1, tokens ? tokens + done : NULL, rows ? rows + (size_t)done * llama->n_embd : NULL,
                                 block, wanted ? logits + (size_t)(done + block - wanted - (n - n_logits)) * llama->n_vocab : NULL, wanted, err);
        done += block;
    }
    if (status) s->cache.n_past = n_before;
    return status;
}

ASTROVL_API astrovl_status astrovl_eval_tokens(astrovl_session *s, const int32_t *tokens, int n_tokens, float *logits, int n_logits,
                                               astrovl_error *err) {
    if (!tokens) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no tokens were given");
    return avl__eval(s, tokens, NULL, n_tokens, logits, n_logits, err);
}

ASTROVL_API astrovl_status astrovl_eval_embeddings(astrovl_session *s, const float *rows, int n_rows, float *logits, int n_logits,
                                                   astrovl_error *err) {
    if (!rows) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no rows were given");
    return avl__eval(s, NULL, rows, n_rows, logits, n_logits, err);
}

// ---- prompts -------------------------------------------------------------------------------------------------------
// A turn is laid out as the template says, into tokens where -1 - i stands for image i. Text between images and special tokens
// is tokenised as one part, as LLaVA's tokenizer_image_token does; the template's own special tokens are put in as such, so a
// user who types "<|im_end|>" has typed ten characters.

typedef struct avl__prompt {
    const astrovl_session *s;
    int           parse_special;
    avl__bytes    text;       // of the part under way
    avl__tokens   tokens;
    astrovl_status status;    // the first failure sticks
    astrovl_error *err;
} avl__prompt;

static void avl__prompt_token(avl__prompt *p, int32_t token) {
    if (!p->status && !avl__tokens_put(&p->tokens, token)) p->status = avl__fail(p->err, ASTROVL_ERROR_MEMORY, "out of memory for the prompt");
}

// Ends the part under way.
static void avl__prompt_flush(avl__prompt *p) {
    if (p->text.failed && !p->status) p->status = avl__fail(p->err, ASTROVL_ERROR_MEMORY, "out of memory for the prompt");
    if (!p->status && p->text.size)
        p->status = avl__vocab_encode(&p->s->model->vocab, p->text.data, p->text.size, p->parse_special ? ASTROVL_PARSE_SPECIAL : 0,
                                      &p->tokens, p->err);
    p->text.size = 0;
}

static void avl__prompt_text(avl__prompt *p, const char *text) { avl__bytes_put_text(&p->text, text); }

static void avl__prompt_special(avl__prompt *p, const char *piece) {
    int token = avl__vocab_find(&p->s->model->vocab, piece, strlen(piece));
    avl__prompt_flush(p);
    if (token < 0 && !p->status)
        p->status = avl__fail(p->err, ASTROVL_ERROR_MODEL, "the %s template needs the token %s, which this vocabulary lacks; choose another template",
                              astrovl_template_name(p->s->model->chat_template), piece);
    avl__prompt_token(p, token);
}

// BOS or EOS, where the vocabulary has them.
static void avl__prompt_mark(avl__prompt *p, int token) {
    avl__prompt_flush(p);
    if (token >= 0) avl__prompt_token(p, token);
}

#define AVL__IMAGE_MARK "<image>"

static int avl__count_marks(const char *text) {
    int n = 0;
    for (; (text = strstr(text, AVL__IMAGE_MARK)) != NULL; text += sizeof AVL__IMAGE_MARK - 1) n++;
    return n;
}

// The user's text with its images: at their marks, or all before the text, each on a line of its own.
static void avl__prompt_user(avl__prompt *p, const char *text, int n_images) {
    int image, marked = avl__count_marks(text);
    const char *mark;
    if (marked && n_images && marked != n_images) {
        if (!p->status) p->status = avl__fail(p->err, ASTROVL_ERROR_ARGUMENT, "the text has %d <image> marks, and %d images were given", marked, n_images);
        return;
    }
    for (image = 0; !marked && image < n_images; image++) {
        avl__prompt_flush(p);
        avl__prompt_token(p, -1 - image);
        avl__prompt_text(p, "\n");
    }
    for (image = 0; n_images && (mark = strstr(text, AVL__IMAGE_MARK)) != NULL; image++) {
        avl__bytes_put(&p->text, text, (size_t)(mark - text));
        avl__prompt_flush(p);
        avl__prompt_token(p, -1 - image);
        text = mark + sizeof AVL__IMAGE_MARK - 1;
    }
    avl__prompt_text(p, text);
}

// The system text that a chatml template writes when a conversation brings none, in the model's own Jinja source: what stands
// there between <|im_start|>system, a line's end (as such, or written \n) and <|im_end|>, if it is plain text.
static void avl__prompt_chatml_system(avl__prompt *p) {
    static const char open[] = "<|im_start|>system";
    astrovl_string jinja = avl__key_string(&p->s->model->weights, "tokenizer.chat_template"), rest;
    const char *start = avl__find_text(jinja, open), *end;
    size_t skip;
    if (!start) return;
    rest.data = start + sizeof open - 1;
    rest.size = jinja.size - (size_t)(rest.data - jinja.data);
    skip = rest.size > 1 && *rest.data == '\n' ? 1 : rest.size > 2 && rest.data[0] == '\\' && rest.data[1] == 'n' ? 2 : 0;
    rest.data += skip;
    rest.size -= skip;
    end = avl__find_text(rest, "<|im_end|>");
    if (!skip || !end) return;
    if (memchr(rest.data, '\'', (size_t)(end - rest.data)) || memchr(rest.data, '"', (size_t)(end - rest.data))) return;
    avl__bytes_put(&p->text, rest.data, (size_t)(end - rest.data));
}

// LLaVA's conversation.py: conv_vicuna_v1 and conv_llava_v1 differ in one word.
//   SYSTEM USER: text ASSISTANT: answer</s>USER: text ASSISTANT:
static void avl__prompt_vicuna(avl__prompt *p, const char *text, int n_images, const char *system, const char *person) {
    if (p->s->n_turns == 0) {
        if (system) {
            avl__prompt_text(p, system);
        } else {
            avl__prompt_text(p, "A chat between a curious ");
            avl__prompt_text(p, person);
            avl__prompt_text(p, " and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the ");
            avl__prompt_text(p, person);
            avl__prompt_text(p, "'s questions.");
        }
        if (!system || *system) avl__prompt_text(p, " ");
    } else {
        avl__prompt_mark(p, p->s->model->vocab.eos);
    }
    avl__prompt_text(p, "USER: ");
    avl__prompt_user(p, text, n_images);
    avl__prompt_text(p, " ASSISTANT:");
}

//   <s>[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\ntext [/INST] answer </s><s>[INST] text [/INST]      LLaVA's conv_llava_llama_2
static void avl__prompt_llama2(avl__prompt *p, const char *text, int n_images, const char *system) {
    int first = p->s->n_turns == 0;
    if (!system) system = "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
                          "provides, and assist the user with a variety of tasks using natural language.";
    if (!first) {
        int space = avl__vocab_find(&p->s->model->vocab, AVL__SPACE_MARK, 3);   // the space before </s> is a part of its own
        avl__prompt_mark(p, space);
        avl__prompt_mark(p, p->s->model->vocab.eos);
        avl__prompt_mark(p, p->s->model->vocab.bos);
    }
    avl__prompt_text(p, "[INST] ");
    if (first && *system) {
        avl__prompt_text(p, "<<SYS>>\n");
        avl__prompt_text(p, system);
        avl__prompt_text(p, "\n<</SYS>>\n\n");
    }
    avl__prompt_user(p, text, n_images);
    avl__prompt_text(p, " [/INST]");
}

// One message of LLaMA-3:  <|start_header_id|>role<|end_header_id|>\n\n
static void avl__prompt_llama3_header(avl__prompt *p, const char *role) {
    avl__prompt_special(p, "<|start_header_id|>");
    avl__prompt_text(p, role);
    avl__prompt_special(p, "<|end_header_id|>");
    avl__prompt_text(p, "\n\n");
}

static void avl__prompt_llama3(avl__prompt *p, const char *text, int n_images, const char *system) {
    if (p->s->n_turns > 0) {
        avl__prompt_special(p, "<|eot_id|>");
    } else if (system && *system) {
        avl__prompt_llama3_header(p, "system");
        avl__prompt_text(p, system);
        avl__prompt_special(p, "<|eot_id|>");
    }
    avl__prompt_llama3_header(p, "user");
    avl__prompt_user(p, text, n_images);
    avl__prompt_special(p, "<|eot_id|>");
    avl__prompt_llama3_header(p, "assistant");
}

//   <|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n
static void avl__prompt_chatml(avl__prompt *p, const char *text, int n_images, const char *system) {
    if (p->s->n_turns > 0) {
        avl__prompt_special(p, "<|im_end|>");
        avl__prompt_text(p, "\n");
    } else {
        size_t before = p->text.size;
        if (system) avl__prompt_text(p, system);
        else        avl__prompt_chatml_system(p);
        if (p->text.size > before) {   // the text is known now: put its opening before it
            avl__bytes content = p->text;
            memset(&p->text, 0, sizeof p->text);
            avl__prompt_special(p, "<|im_start|>");
            avl__prompt_text(p, "system\n");
            avl__bytes_put(&p->text, content.data, content.size);
            if (content.failed) p->text.failed = 1;
            astrovl_free(content.data);
            avl__prompt_special(p, "<|im_end|>");
            avl__prompt_text(p, "\n");
        }
    }
    avl__prompt_special(p, "<|im_start|>");
    avl__prompt_text(p, "user\n");
    avl__prompt_user(p, text, n_images);
    avl__prompt_special(p, "<|im_end|>");
    avl__prompt_text(p, "\n");
    avl__prompt_special(p, "<|im_start|>");
    avl__prompt_text(p, "assistant\n");
}

// Lays out one turn; p->tokens is the caller's to free, whatever the status.
static astrovl_status avl__prompt_turn(avl__prompt *p, const char *text, int n_images, const char *system) {
    const avl__vocab *vocab = &p->s->model->vocab;
    if (p->s->n_turns == 0 && vocab->add_bos) avl__prompt_mark(p, vocab->bos);
    switch (p->s->model->chat_template) {
    case ASTROVL_TEMPLATE_LLAMA2: avl__prompt_llama2(p, text, n_images, system); break;
    case ASTROVL_TEMPLATE_LLAMA3: avl__prompt_llama3(p, text, n_images, system); break;
    case ASTROVL_TEMPLATE_CHATML: avl__prompt_chatml(p, text, n_images, system); break;
    case ASTROVL_TEMPLATE_PLAIN:  avl__prompt_user(p, text, n_images); break;
    case ASTROVL_TEMPLATE_LLAVA:  avl__prompt_vicuna(p, text, n_images, system, "human"); break;
    default:                      avl__prompt_vicuna(p, text, n_images, system, "user"); break;
    }
    avl__prompt_flush(p);
    astrovl_free(p->text.data);
    if (!p->status && p->tokens.size == 0) p->status = avl__fail(p->err, ASTROVL_ERROR_ARGUMENT, "the prompt is empty");
    return p->status;
}

// Tokens of a turn with images spliced in.  rows: out, [n_rows][n_embd], n_rows as counted by avl__count_rows
static int64_t avl__count_rows(const astrovl_model *m, const avl__tokens *tokens) {
    int64_t n = 0;
    size_t i;
    for (i = 0; i < tokens->size; i++) n += tokens->data[i] < 0 ? m->clip.n_patches : 1;
    return n;
}

static astrovl_status avl__splice(astrovl_session *s, const avl__tokens *tokens, const astrovl_image *images, float *rows, astrovl_error *err) {
    astrovl_status status = ASTROVL_OK;
    size_t i;
    for (i = 0; i < tokens->size && !status; i++) {
        int32_t token = tokens->data[i];
        if (token >= 0) {
            avl__embed_tokens(&s->model->llama.token_embd, &token, 1, rows);
            rows += s->model->llama.n_embd;
        } else {
            status = astrovl_encode_image(s, &images[-1 - token], rows, err);
            rows += (size_t)s->model->clip.n_patches * s->model->llama.n_embd;
        }
    }
    return status;
}


// ====================================================================================================================
// [12] Generation
// From logits to text: penalties, truncation and sampling; answers that keep to a pattern or a JSON schema; stop texts
// and streaming; then the calls that put it together, from a turn of a conversation to a caption in one line.
// ====================================================================================================================

// ---- sampling ------------------------------------------------------------------------------------------------------

// logits of recent tokens: divided by the penalty if positive, multiplied if negative (Keskar et al. 2019, CTRL)
static void avl__penalize(float *logits, int n_vocab, const astrovl_generation *o, const int32_t *history,
                          int n_history) {
    int window = o->repetition_window > 0 ? o->repetition_window : 64;
    int first = n_history > window ? n_history - window : 0, i, j;
    if (!(o->repetition_penalty > 0.0f) || o->repetition_penalty == 1.0f) return;
    for (i = first; i < n_history; i++) {
        int32_t t = history[i];
        for (j = first; j < i && history[j] != t; j++) {}
        if (j < i || t < 0 || t >= n_vocab) continue;   // each token once
        logits[t] = logits[t] > 0.0f ? logits[t] / o->repetition_penalty : logits[t] * o->repetition_penalty;
    }
}

static int32_t avl__argmax(const float *x, int n) {
    int32_t best = 0;
    int i;
    for (i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

// The number (count = 1) or the sum (count = 0) of the values of p that are at least `threshold`.
static double avl__amount_above(const float *p, int n, float threshold, int count) {
    double amount = 0.0;
    int i;
    for (i = 0; i < n; i++) if (p[i] >= threshold) amount += count ? 1.0 : (double)p[i];
    return amount;
}

// Keeps the largest values of p >= 0 until their number or sum reaches `wanted`, among equals the lowest index first,
// and zeroes the rest. The smallest value to keep is found by bisection over the bits of positive floats, which are
// ordered like the floats themselves: 31 passes over p, without sorting and without memory.
static void avl__keep_largest(float *p, int n, double wanted, int count) {
    uint32_t low = 1, high = 0x7F800000u;   // values from `low` on suffice, or are all; from `high` on not
    float cut;
    double kept;
    int i;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (avl__amount_above(p, n, avl__float_from_bits(middle), count) >= wanted) low = middle;
        else high = middle;
    }
    cut = avl__float_from_bits(low);
    kept = avl__amount_above(p, n, avl__float_from_bits(high), count);
    for (i = 0; i < n; i++) {
        if (p[i] > cut) continue;
        if (p[i] < cut || kept >= wanted) p[i] = 0.0f;
        else kept += count ? 1.0 : (double)p[i];
    }
}

ASTROVL_API int32_t astrovl_sample(float *logits, int n_vocab, const astrovl_generation *options,
                                   const int32_t *history, int n_history, uint64_t *random_state) {
    float max;
    double total = 0.0, at;
    int32_t last = 0;
    int i;
    if (!logits || n_vocab < 1 || (n_history > 0 && !history)) return -1;
    if (options) avl__penalize(logits, n_vocab, options, history, n_history);
    if (!options || !(options->temperature > 0.0f)) return avl__argmax(logits, n_vocab);
    if (!random_state) return -1;
    max = logits[avl__argmax(logits, n_vocab)];
    for (i = 0; i < n_vocab; i++) logits[i] = astrovl_expf((logits[i] - max) / options->temperature);
    if (options->top_k > 0 && options->top_k < n_vocab) avl__keep_largest(logits, n_vocab, options->top_k, 1);
    if (options->top_p > 0.0f && options->top_p < 1.0f)
        avl__keep_largest(logits, n_vocab, options->top_p * avl__amount_above(logits, n_vocab, 0.0f, 0), 0);
    for (i = 0; i < n_vocab; i++) {
        if (!(logits[i] >= options->min_p)) logits[i] = 0.0f;   // the largest is 1; NaN goes, too
        total += logits[i];
    }
    at = avl__random(random_state) * total;
    for (i = 0; i < n_vocab; i++) {
        if (!(logits[i] > 0.0f)) continue;
        last = i;   // the last possible token takes what rounding leaves
        at -= logits[i];
        if (at < 0.0) break;
    }
    return last;
}

// ---- guided generation: expressions --------------------------------------------------------------------------------
// A pattern or a schema becomes a regular expression over bytes. The derivative of an expression by a byte describes
// what may follow that byte (Brzozowski 1964, doi 10.1145/321239.321249; Owens, Reppy & Turon 2009, doi
// 10.1017/S0956796808007090). So an answer's state is the derivative by the answer's bytes, and a token may follow if
// the derivative by its bytes matches anything (Willard & Louf 2023, arXiv 2307.09702).
// Equal expressions are one node, and nodes never change: they stand in a table that only grows, and refer to each
// other by their numbers. Derivatives are computed when they are first needed, and remembered. The first failure sticks
// to the guide; from then on all new expressions are NONE.

#define AVL__GUIDE_NODES  (1 << 20)    // expressions
#define AVL__GUIDE_TABLE  (1 << 25)    // known derivatives
#define AVL__GUIDE_WORK   (1 << 26)    // steps of one call: a second or two
#define AVL__GUIDE_FAR    (1 << 18)    // bytes of the shortest answer; counts in patterns and schemas
#define AVL__GUIDE_NEVER  INT32_MAX    // the vocabulary cannot spell an end
#define AVL__GUIDE_TEXT   (1 << 18)    // bytes of a pattern or schema
#define AVL__GUIDE_DEPTH  64           // groups in groups, values in values
#define AVL__GUIDE_TOKEN  32           // bytes; longer tokens (mostly runs of dashes) never follow
#define AVL__GUIDE_MASKS  1024         // masks that are kept
#define AVL__GUIDE_HEADS  (1 << 16)    // of the hash table of nodes

enum {
    AVL__NONE,       // matches nothing at all: node 0
    AVL__EMPTY,      // matches the empty text: node 1
    AVL__RANGE,      // one byte from a to b
    AVL__CAT,        // a, then b
    AVL__ALT,        // a or b; a is no ALT, and a larger number than those in b: a set has one node
    AVL__REPEAT      // min to max times a; max -1: no limit
};

typedef struct avl__re {
    int32_t  kind, a, b, min, max;
    int32_t  chain;               // the next node of the same place in `heads`; 0: none
    uint32_t mark;                // the last alternative it was put in
    int32_t  least, first;        // bytes of the shortest text that matches and that one-byte tokens can spell (0: the
                                  // answer may end here); its first byte
    int32_t  worst, min_tokens;   // the most that `least` can be later on; tokens that spell the text, -1: unknown yet
    int32_t  next;                // the derivatives' place in guide.next; -1: none is known yet
    int32_t  blurred, mask;       // the node whose mask this one has, too; that mask's place, if mask_owner agrees
} avl__re;

typedef struct avl__guide_token {
    uint32_t start;               // in guide.bytes
    uint8_t  size, shared;        // 0: it never follows; how many of its first bytes the token before has, too
} avl__guide_token;

struct astrovl_guide {
    const astrovl_model *model;
    const char   *name, *advice;                  // for messages
    astrovl_error failure;                        // the first one
    uint64_t      work;                           // of the call under way
    int           start;                          // the whole expression; callers name it state 0
    avl__re      *nodes;
    size_t        n_nodes, node_capacity;
    int32_t       heads[AVL__GUIDE_HEADS];        // nodes by their hash
    avl__tokens   next, stack;                    // derivatives, [][n_classes], -1: unknown yet; parts of new nodes
    uint32_t      mark;
    uint8_t       classes[256], byte_of[256];     // bytes that no RANGE tells apart are a class; its lowest byte
    int           n_classes;
    avl__guide_token *tokens;                     // [n_vocab]
    int          *order, n_order;                 // those with bytes, sorted by them
    char         *bytes;
    int           n_vocab, longest;               // longest: bytes of the longest token
    uint8_t       is_token[256];                  // 1: this byte is a token by itself
    int           n_words, n_masks;               // bit t % 32 of a mask's word t / 32 says that token t may follow
    uint32_t     *masks[AVL__GUIDE_MASKS], *scratch;
    int           mask_owner[AVL__GUIDE_MASKS];   // a blurred node; -1: free
};

static int avl__guide_fail(astrovl_guide *g, astrovl_status status) {   // MEMORY or LIMIT; returns NONE
    if (g->failure.status) return AVL__NONE;
    if (status == ASTROVL_ERROR_MEMORY) avl__fail(&g->failure, status, "%s: out of memory", g->name);
    else avl__fail(&g->failure, status, "%s: needs too many states or steps; %s", g->name, g->advice);
    return AVL__NONE;
}

static void avl__guide_put(astrovl_guide *g, avl__tokens *list, int x) {
    if (list->size >= AVL__GUIDE_TABLE) avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    else if (!avl__tokens_put(list, x)) avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
}

static void avl__push(astrovl_guide *g, int x) { avl__guide_put(g, &g->stack, x); }

// n times a bytes and b more
static int avl__re_bytes(int n, int a, int b) {
    int64_t sum = (int64_t)n * a + b;
    if (b == AVL__GUIDE_NEVER || (n > 0 && a == AVL__GUIDE_NEVER)) return AVL__GUIDE_NEVER;
    return sum < AVL__GUIDE_FAR ? (int)sum : AVL__GUIDE_FAR;
}

static int avl__re_cat(astrovl_guide *g, int a, int b);
static int avl__re_or(astrovl_guide *g, int a, int b);
static int avl__re_repeat(astrovl_guide *g, int a, int min, int max);

// What a new node says about the texts it matches, from what its parts say about theirs; and its blurred node. A mask
// asks what one token can do, so counts above the longest token's bytes make no difference: they become longest + 1 at
// least and no limit at most. So all states far from the end of a long string share a mask.
static void avl__re_finish(astrovl_guide *g, int node) {
    avl__re x = g->nodes[node];
    const avl__re a = g->nodes[x.kind > AVL__RANGE ? x.a : 0], b = g->nodes[x.kind > AVL__RANGE ? x.b : 0];
    int most = g->longest, min = x.min > most ? most + 1 : x.min, max = x.max > most ? -1 : x.max;
    int same = a.blurred == x.a && b.blurred == x.b;
    x.blurred = node;
    x.least = x.kind == AVL__EMPTY ? 0 : AVL__GUIDE_NEVER;
    if (x.kind == AVL__RANGE) {
        for (x.first = x.a; x.first < x.b && !g->is_token[x.first];) x.first++;
        x.worst = g->is_token[x.first];
        if (x.worst) x.least = 1;
    } else if (x.kind == AVL__CAT) {
        x.first = a.least == 0 ? b.first : a.first;
        x.least = avl__re_bytes(1, a.least, b.least);
        x.worst = b.least == AVL__GUIDE_NEVER ? 0 : avl__re_bytes(1, a.worst, b.least);
        if (b.worst > x.worst) x.worst = b.worst;
        if (!same) x.blurred = avl__re_cat(g, a.blurred, b.blurred);
    } else if (x.kind == AVL__ALT) {
        x.first = a.least < b.least ? a.first : b.first;
        x.least = a.least < b.least ? a.least : b.least;
        x.worst = a.worst > b.worst ? a.worst : b.worst;
        if (!same) x.blurred = avl__re_or(g, a.blurred, b.blurred);
    } else if (x.kind == AVL__REPEAT) {
        x.first = a.first;
        x.least = avl__re_bytes(x.min, a.least, 0);
        x.worst = avl__re_bytes(x.min > 1 && a.least != AVL__GUIDE_NEVER ? x.min - 1 : 0, a.least, a.worst);
        if (!same || min != x.min || max != x.max) x.blurred = avl__re_repeat(g, a.blurred, min, max);
    }
    x.min_tokens = x.least == 0 ? 0 : -1;
    g->nodes[node] = x;
}

// The node of that kind with these parts, a new one if there is none yet.
static int avl__re_make(astrovl_guide *g, int kind, int a, int b, int min, int max) {
    const int32_t key[5] = {kind, a, b, min, max};
    uint32_t hash = AVL__HASH_START;
    int32_t *head;
    int i;
    avl__re x;
    memset(&x, 0, sizeof x);
    memcpy(&x, key, sizeof key);
    x.next = -1;
    if (g->failure.status) return AVL__NONE;
    for (i = 0; i < 5; i++) hash = (hash ^ (uint32_t)key[i]) * 16777619u;
    head = &g->heads[(hash ^ hash >> 15) % AVL__GUIDE_HEADS];
    for (i = *head; i != 0; i = g->nodes[i].chain, g->work++) if (memcmp(&g->nodes[i], key, sizeof key) == 0) return i;
    if (g->n_nodes == AVL__GUIDE_NODES || g->work > AVL__GUIDE_WORK) return avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    if (!avl__grow(&g->nodes, &g->node_capacity, g->n_nodes + 1, sizeof x))
        return avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
    i = (int)g->n_nodes++;
    x.chain = *head;
    *head = i;
    g->nodes[i] = x;
    avl__re_finish(g, i);
    return i;
}

static int avl__re_cat(astrovl_guide *g, int a, int b) {
    if (a == AVL__NONE || b == AVL__NONE) return AVL__NONE;
    if (a == AVL__EMPTY || b == AVL__EMPTY) return a == AVL__EMPTY ? b : a;
    return avl__re_make(g, AVL__CAT, a, b, 0, 0);
}

static int avl__re_repeat(astrovl_guide *g, int a, int min, int max) {
    if (a == AVL__NONE || (min == 1 && max == 1)) return a;
    if (a == AVL__EMPTY || max == 0) return AVL__EMPTY;
    if (g->nodes[a].least == 0) min = 0;   // the empty text fills up the count
    return avl__re_make(g, AVL__REPEAT, a, 0, min, max);
}

static int avl__int_order(const void *context, int a, int b) {
    (void)context;
    return (a > b) - (a < b);
}

// One of the nodes from stack[base] on, which are taken off.
static int avl__re_alt(astrovl_guide *g, size_t base) {
    size_t end = g->stack.size, i;
    int x;
    g->mark++;
    for (i = base; i < end; i++)
        for (x = g->stack.data[i]; x != AVL__NONE; x = g->nodes[x].kind == AVL__ALT ? g->nodes[x].b : AVL__NONE) {
            int member = g->nodes[x].kind == AVL__ALT ? g->nodes[x].a : x;
            g->work++;
            if (g->nodes[member].mark != g->mark) avl__push(g, member);
            g->nodes[member].mark = g->mark;
        }
    x = g->stack.size > end ? g->stack.data[end] : AVL__NONE;
    if (g->stack.size > end + 1) {
        avl__sort(g->stack.data + end, (int)(g->stack.size - end), avl__int_order, NULL);
        x = g->stack.data[end];
        for (i = end + 1; i < g->stack.size; i++) x = avl__re_make(g, AVL__ALT, g->stack.data[i], x, 0, 0);
    }
    g->stack.size = base;
    return x;
}

static int avl__re_or(astrovl_guide *g, int a, int b) {
    size_t base = g->stack.size;
    avl__push(g, a);
    avl__push(g, b);
    return avl__re_alt(g, base);
}

// These bytes, then another expression.
static int avl__re_text(astrovl_guide *g, const char *data, size_t size, int then) {
    for (; size > 0; size--) {
        int byte = (uint8_t)data[size - 1];
        then = avl__re_cat(g, avl__re_make(g, AVL__RANGE, byte, byte, 0, 0), then);
    }
    return then;
}

// Pushes the characters from low to high (surrogates are none) as sequences of byte ranges: the encodings of each piece
// are all combinations of one range for each byte.
static void avl__push_characters(astrovl_guide *g, uint32_t low, uint32_t high) {
    static const uint32_t tops[] = {0x7F, 0x7FF, 0xD7FF, 0xFFFF, 0x10FFFF};   // encodings get longer, or a gap begins
    while (low <= high && !g->failure.status) {
        uint32_t top, last, m = 0;
        char from[4], to[4];
        size_t n, n_free, i = 0;
        int piece = AVL__EMPTY;
        if (low >= 0xD800 && low < 0xE000) low = 0xE000;
        while (tops[i] < low) i++;
        top = tops[i] < high ? tops[i] : high;
        if (low > top) return;
        n = avl__utf8_write(low, from);
        for (n_free = n - 1; n_free > 0; n_free--) {   // trailing bytes that run through all their 64 values
            m = ((uint32_t)1 << 6 * n_free) - 1;
            if ((low & m) == 0 && (low | m) <= top) break;
        }
        if (n_free == 0) m = 0;
        if (n_free < n - 1 && (low | (m << 6 | 0x3F)) < top) top = low | (m << 6 | 0x3F);   // one byte before varies
        last = ((top + 1) & ~m) - 1;
        avl__utf8_write(last, to);
        for (i = n; i-- > 0;) {
            int range = avl__re_make(g, AVL__RANGE, (uint8_t)from[i], (uint8_t)to[i], 0, 0);
            piece = avl__re_cat(g, range, piece);
        }
        avl__push(g, piece);
        low = last + 1;
    }
}

// ---- guided generation: derivatives --------------------------------------------------------------------------------
//   d(RANGE) = EMPTY if the byte is in it, else NONE        d(ALT) = the alternative of the members' derivatives
//   d(a b) = d(a) b, or also d(b) if a matches ""           d(a{min,max}) = d(a) a{min-1,max-1}
// d(a) b is multiplied out, (x|y) b = x b | y b, so that a derivative is a set of at most as many sequences as the
// pattern has places (Antimirov 1996, doi 10.1016/0304-3975(95)00182-4).

static int avl__re_derive(astrovl_guide *g, int x, int c);

// The derivative of node x by the bytes of class c.
static int avl__re_step(astrovl_guide *g, int x, int c) {
    int row = g->nodes[x].next, known = row < 0 ? -1 : g->next.data[row + c];
    return known >= 0 ? known : avl__re_derive(g, x, c);
}

// Pushes d(a) b for each member of d(a).
static void avl__push_products(astrovl_guide *g, int a, int c, int b) {
    int d = avl__re_step(g, a, c);
    for (; g->nodes[d].kind == AVL__ALT; d = g->nodes[d].b) avl__push(g, avl__re_cat(g, g->nodes[d].a, b));
    avl__push(g, avl__re_cat(g, d, b));
}

// The derivative where it is not known yet.
static int avl__re_derive(astrovl_guide *g, int x, int c) {
    const avl__re e = g->nodes[x];
    size_t base = g->stack.size;
    int i, y;
    if (g->failure.status) return AVL__NONE;
    switch (e.kind) {
    case AVL__RANGE: return e.a <= g->byte_of[c] && g->byte_of[c] <= e.b ? AVL__EMPTY : AVL__NONE;
    case AVL__CAT:
        // In a row of parts that may all be empty, the last one's derivative comes first: no recursion along the row.
        for (i = x; g->nodes[i].kind == AVL__CAT && g->nodes[g->nodes[i].a].least == 0; i = g->nodes[i].b) {
            const avl__re *b = &g->nodes[g->nodes[i].b];
            if (b->next >= 0 && g->next.data[b->next + c] >= 0) break;
            avl__push(g, g->nodes[i].b);
        }
        while (g->stack.size > base) avl__re_step(g, g->stack.data[--g->stack.size], c);
        avl__push_products(g, e.a, c, e.b);
        if (g->nodes[e.a].least == 0) avl__push(g, avl__re_step(g, e.b, c));
        break;
    case AVL__ALT:
        for (i = x; g->nodes[i].kind == AVL__ALT; i = g->nodes[i].b) avl__push(g, avl__re_step(g, g->nodes[i].a, c));
        avl__push(g, avl__re_step(g, i, c));
        break;
    case AVL__REPEAT:
        y = avl__re_repeat(g, e.a, e.min > 0 ? e.min - 1 : 0, e.max < 0 ? -1 : e.max - 1);
        avl__push_products(g, e.a, c, y);
        break;
    default: return AVL__NONE;
    }
    y = avl__re_alt(g, base);
    if (g->nodes[x].next < 0) {
        size_t row = g->next.size;
        for (i = 0; i < g->n_classes; i++) avl__guide_put(g, &g->next, -1);
        if (g->failure.status) return AVL__NONE;
        g->nodes[x].next = (int32_t)row;
    }
    g->next.data[g->nodes[x].next + c] = y;
    return y;
}

// ---- guided generation: tokens -------------------------------------------------------------------------------------

static int avl__guide_token_order(const void *context, int a, int b) {   // by bytes; what ends first comes first
    const astrovl_guide *g = (const astrovl_guide *)context;
    const avl__guide_token *s = &g->tokens[a], *t = &g->tokens[b];
    int side = memcmp(g->bytes + s->start, g->bytes + t->start, s->size < t->size ? s->size : t->size);
    return side ? side : s->size != t->size ? s->size - t->size : a - b;
}

static void avl__guide_read_tokens(astrovl_guide *g) {
    const avl__vocab *v = &g->model->vocab;
    avl__bytes bytes = {NULL, 0, 0, 0};
    avl__guide_token *t, *before;
    char text[AVL__GUIDE_TOKEN];
    int i, n;
    g->n_vocab = g->model->has_text ? g->model->llama.n_vocab : v->n_tokens;
    g->n_words = g->n_vocab / 32 + 1;
    g->tokens = (avl__guide_token *)avl__alloc((uint64_t)g->n_vocab, sizeof *g->tokens);
    g->order = (int *)avl__alloc_raw((uint64_t)g->n_vocab, sizeof *g->order);
    g->scratch = (uint32_t *)avl__alloc_raw((uint64_t)g->n_words, sizeof *g->scratch);
    for (i = 0; g->tokens && g->order && i < g->n_vocab; i++) {   // ids beyond the vocabulary have no bytes
        n = avl__vocab_is_end(v, i) ? 0 : avl__vocab_token_bytes(v, i, text, AVL__GUIDE_TOKEN);
        if (n < 1 || n > AVL__GUIDE_TOKEN) continue;
        g->tokens[i].start = (uint32_t)bytes.size;
        g->tokens[i].size = (uint8_t)n;
        g->order[g->n_order++] = i;
        if (n > g->longest) g->longest = n;
        if (n == 1) g->is_token[(uint8_t)text[0]] = 1;
        avl__bytes_put(&bytes, text, (size_t)n);
    }
    g->bytes = bytes.data;
    if (!g->tokens || !g->order || !g->scratch || bytes.failed) avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
    if (g->failure.status) return;
    avl__sort(g->order, g->n_order, avl__guide_token_order, g);
    for (i = 1; i < g->n_order; i++) {
        t = &g->tokens[g->order[i]];
        before = &g->tokens[g->order[i - 1]];
        while (t->shared < t->size && t->shared < before->size &&
               g->bytes[t->start + t->shared] == g->bytes[before->start + t->shared]) t->shared++;
    }
}

// The first place in g->order whose token's byte `depth` is at least `byte`, of the places from low to high, whose
// tokens have the same bytes before.
static int avl__guide_narrow(const astrovl_guide *g, int low, int high, int depth, int byte) {
    while (low < high) {
        int middle = low + (high - low) / 2;
        const avl__guide_token *t = &g->tokens[g->order[middle]];
        if (t->size > depth && (uint8_t)g->bytes[t->start + (uint32_t)depth] >= byte) high = middle;
        else low = middle + 1;
    }
    return low;
}

// The fewest tokens that spell the shortest text from node x to an end, or NEVER. If they are k > 0, some token leads
// to a node where they are at most k - 1; so an answer that allows a token only where enough are left can always end.
static int avl__min_tokens(astrovl_guide *g, int x) {
    size_t base = g->stack.size;
    if (g->nodes[x].least == AVL__GUIDE_NEVER) return AVL__GUIDE_NEVER;
    for (; g->nodes[x].min_tokens < 0 && !g->failure.status; x = avl__re_step(g, x, g->classes[g->nodes[x].first]))
        avl__push(g, x);
    while (g->stack.size > base && !g->failure.status) {   // from the end: a token, and those after it
        int depth, low = 0, high = g->n_order, best = AVL__GUIDE_NEVER, y = g->stack.data[--g->stack.size], n;
        x = y;
        for (depth = 0; depth < g->longest && g->nodes[y].least > 0; depth++) {
            int byte = g->nodes[y].first;
            low = avl__guide_narrow(g, low, high, depth, byte);
            high = avl__guide_narrow(g, low, high, depth, byte + 1);
            if (low == high) break;
            y = avl__re_step(g, y, g->classes[byte]);
            n = g->nodes[y].min_tokens + 1;
            if (g->tokens[g->order[low]].size == depth + 1 && n < best) best = n;
        }
        g->nodes[x].min_tokens = best;
    }
    return g->failure.status ? AVL__GUIDE_NEVER : g->nodes[x].min_tokens;
}

// The node of a state that a caller names; NONE: there is no such state.
static int avl__guide_node(const astrovl_guide *g, int state) {
    if (!g || state < 0 || (size_t)state >= g->n_nodes) return AVL__NONE;
    return state ? state : g->start;
}

// SentencePiece vocabularies begin an answer with a token that begins with a space ("_{"): where the answer itself may
// not, that space is dropped from the first token. Returns the bytes dropped, 0 or 1.
static size_t avl__guide_skip(astrovl_guide *g, int state, const char *bytes, size_t size) {
    if (state != 0 || size == 0 || bytes[0] != ' ') return 0;
    return avl__re_step(g, g->start, g->classes[(uint8_t)bytes[0]]) == AVL__NONE;
}

// Bits of the tokens that may follow node x, if `limit` more tokens are to suffice after them. A token's walk begins
// where that of the token before it passed their last shared byte; if that one was refused earlier, so is this one.
static void avl__mask_fill(astrovl_guide *g, int x, int skip, int limit, uint32_t *mask) {
    const avl__vocab *vocab = &g->model->vocab;
    int at[AVL__GUIDE_TOKEN + 1], i, n, reached = 0;
    memset(mask, 0, (size_t)g->n_words * sizeof *mask);
    at[0] = x;
    for (i = 0; i < g->n_order && !g->failure.status; i++) {
        const int id = g->order[i];
        const avl__guide_token *t = &g->tokens[id];
        const char *bytes = g->bytes + t->start;
        if (t->shared > reached) continue;
        n = t->shared;
        if (n == 0 && skip && bytes[0] == ' ') at[++n] = x;
        for (; n < t->size; n++) {
            at[n + 1] = avl__re_step(g, at[n], g->classes[(uint8_t)bytes[n]]);
            if (at[n + 1] == AVL__NONE) break;
        }
        reached = n;
        if (n < t->size || (skip && n == 1 && bytes[0] == ' ')) continue;
        if (g->nodes[at[n]].least > limit && avl__min_tokens(g, at[n]) > limit) continue;
        mask[id / 32] |= (uint32_t)1 << id % 32;
    }
    for (i = 0; g->nodes[x].least == 0 && i < g->n_vocab && i < vocab->n_tokens; i++)
        if (vocab->ends[i]) mask[i / 32] |= (uint32_t)1 << i % 32;
}

ASTROVL_API astrovl_status astrovl_guide_mask(astrovl_guide *guide, int state, int n_left, float *logits,
                                              astrovl_error *err) {
    astrovl_guide *g = guide;
    const float never = avl__float_from_bits(0xFF800000u);   // -infinity
    int x = avl__guide_node(g, state), any = 0, skip, owner, slot, i;
    uint32_t *mask;
    if (!g || !logits) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a guide and logits are needed");
    if (g->nodes[x].least == AVL__GUIDE_NEVER)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%d is no state that the guide's answer can be in", state);
    g->work = 0;
    if (n_left < g->nodes[x].least && n_left < avl__min_tokens(g, x) && !g->failure.status)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "to end as its guide asks, the answer needs at least %d more "
                         "tokens; it has %d", g->nodes[x].min_tokens, n_left);
    skip = (int)avl__guide_skip(g, state, " ", 1);
    mask = g->scratch;
    owner = state ? g->nodes[x].blurred : 0;   // whose mask it is; 0: the start's
    slot = g->nodes[owner].mask;
    if (n_left <= g->nodes[x].worst) {
        avl__mask_fill(g, x, skip, n_left - 1, mask);
    } else if (g->mask_owner[slot] == owner) {
        mask = g->masks[slot];
    } else {
        slot = g->n_masks % AVL__GUIDE_MASKS;
        if (!g->masks[slot]) g->masks[slot] = (uint32_t *)avl__alloc_raw((uint64_t)g->n_words, sizeof *mask);
        mask = g->masks[slot];
        g->mask_owner[slot] = -1;
        if (mask) avl__mask_fill(g, g->nodes[x].blurred, skip, AVL__GUIDE_NEVER - 1, mask);
        else avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
        if (!g->failure.status) {
            g->nodes[owner].mask = slot;
            g->mask_owner[slot] = owner;
            g->n_masks++;
        }
    }
    if (g->failure.status) return avl__fail(err, g->failure.status, "%s", g->failure.message);
    for (i = 0; i < g->n_vocab; i++) {
        if (mask[i / 32] >> i % 32 & 1) any = 1;
        else logits[i] = never;
    }
    return any ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_LIMIT, "nothing may follow: the answer is complete");
}

ASTROVL_API int astrovl_guide_next(astrovl_guide *guide, int state, int32_t token) {
    int x = avl__guide_node(guide, state), i, n, skip;
    const char *text;
    if (x == AVL__NONE || token < 0 || token >= guide->n_vocab) return -1;
    text = guide->bytes + guide->tokens[token].start;
    n = guide->tokens[token].size;
    guide->work = 0;
    skip = (int)avl__guide_skip(guide, state, text, (size_t)n);
    for (i = skip; i < n; i++) x = avl__re_step(guide, x, guide->classes[(uint8_t)text[i]]);
    return n == skip || guide->nodes[x].least == AVL__GUIDE_NEVER ? -1 : x;
}

ASTROVL_API int astrovl_guide_is_accepting(const astrovl_guide *guide, int state) {
    int x = avl__guide_node(guide, state);
    return x != AVL__NONE && guide->nodes[x].least == 0;
}

ASTROVL_API int astrovl_guide_min_tokens(astrovl_guide *guide, int state) {
    int x = avl__guide_node(guide, state), n;
    if (x == AVL__NONE) return -1;
    guide->work = 0;
    n = avl__min_tokens(guide, x);
    return n == AVL__GUIDE_NEVER ? -1 : n;
}

ASTROVL_API void astrovl_guide_free(astrovl_guide *guide) {
    int i;
    if (!guide) return;
    for (i = 0; i < AVL__GUIDE_MASKS; i++) astrovl_free(guide->masks[i]);
    astrovl_free(guide->nodes);
    astrovl_free(guide->next.data);
    astrovl_free(guide->stack.data);
    astrovl_free(guide->tokens);
    astrovl_free(guide->order);
    astrovl_free(guide->bytes);
    astrovl_free(guide->scratch);
    astrovl_free(guide);
}

// ---- patterns ------------------------------------------------------------------------------------------------------

typedef struct avl__regex {
    astrovl_guide *g;
    const char    *text;      // zero-terminated, but at most `size` bytes are read
    size_t         size, at;
    int            depth;
} avl__regex;

static int avl__regex_fail(avl__regex *r, size_t at, astrovl_status status, const char *what) {   // returns NONE
    if (!r->g->failure.status) avl__fail(&r->g->failure, status, "pattern, byte %d: %s", (int)at, what);
    return AVL__NONE;
}

static int avl__regex_wrong(avl__regex *r, size_t at, const char *what) {
    return avl__regex_fail(r, at, ASTROVL_ERROR_FORMAT, what);
}

static int avl__regex_peek(const avl__regex *r) {   // -1: the end, or something has failed
    return r->at < r->size && !r->g->failure.status ? (uint8_t)r->text[r->at] : -1;
}

static int avl__regex_take(avl__regex *r, int c) {
    int is_here = avl__regex_peek(r) == c;
    r->at += (size_t)is_here;
    return is_here;
}

// n hexadecimal digits of a zero-terminated text, or -1
static int32_t avl__hex(const char *p, int n) {
    int32_t value = 0;
    for (; n > 0; n--, p++) {
        int c = *p >= 'A' && *p <= 'F' ? *p - 'A' + 'a' : *p;
        if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f')) return -1;
        value = value << 4 | (c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return value;
}

// The code point after \u, written XXXX or as two units of UTF-16, XXXX\uXXXX, and in *size its bytes. Half a surrogate
// pair is returned as it stands; -1: these are no four digits.
static int32_t avl__unicode_escape(const char *p, size_t *size) {
    int32_t unit = avl__hex(p, 4), low;
    *size = 4;
    if (unit < 0xD800 || unit >= 0xDC00 || p[4] != '\\' || p[5] != 'u') return unit;
    low = avl__hex(p + 6, 4);
    if (low < 0xDC00 || low > 0xDFFF) return unit;
    *size = 10;
    return 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
}

// A character that stands for itself, or after a backslash.
static int avl__regex_char(avl__regex *r) {
    static const char letters[] = "ntrfv", meanings[] = "\n\t\r\f\v";
    size_t start = r->at, length = 2;
    int32_t c = avl__regex_peek(r) < 0 ? AVL__UTF8_BAD : avl__utf8_read(r->text + start, r->size - start, &length);
    if (c < 0) return avl__regex_wrong(r, start, "the pattern ends too early, or is not UTF-8");
    r->at += length;
    if (c != '\\') return c;
    c = avl__regex_peek(r);
    r->at++;
    if (c > 0 && strchr(letters, c)) return meanings[strchr(letters, c) - letters];
    if (c == 'x' || c == 'u') {
        length = 2;
        c = c == 'x' ? avl__hex(r->text + r->at, 2) : avl__unicode_escape(r->text + r->at, &length);
        r->at += length;
        if (c < 0) return avl__regex_wrong(r, start, "\\x takes two hexadecimal digits, \\u four");
        return c < 0xD800 || c > 0xDFFF ? c : avl__regex_wrong(r, start, "half a surrogate pair is no character");
    }
    if (c < 0x21 || c > 0x7E || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z'))
        return avl__regex_fail(r, start, ASTROVL_ERROR_UNSUPPORTED, "this escape is not understood; those that are: "
                               "\\d \\w \\s \\D \\W \\S \\n \\t \\r \\f \\v \\xHH \\uHHHH and \\ before punctuation");
    return c;
}

// A set of characters is collected on the stack, as numbers that sort: 2 low, and 2 (high + 1) + 1 where a range has
// ended.
static void avl__set_add(avl__regex *r, int low, int high) {
    avl__push(r->g, 2 * low);
    avl__push(r->g, 2 * high + 3);
}

// The set from stack[base] on, or all characters but those, as an expression; NONE if it is empty.
static int avl__set_finish(avl__regex *r, size_t base, int negate) {
    astrovl_guide *g = r->g;
    size_t end = g->stack.size, i;
    int n_open = 0, from = 0, x;
    if (g->failure.status) return AVL__NONE;
    avl__sort(g->stack.data + base, (int)(end - base), avl__int_order, NULL);
    for (i = base; i < end && !g->failure.status; i++) {
        int point = g->stack.data[i] >> 1, was_open = n_open > 0;
        n_open += g->stack.data[i] & 1 ? -1 : 1;
        if ((n_open > 0) == was_open) continue;
        if (was_open != negate && point > from) avl__push_characters(g, (uint32_t)from, (uint32_t)point - 1);
        from = point;
    }
    if (negate) avl__push_characters(g, (uint32_t)from, 0x10FFFF);
    x = avl__re_alt(g, end);
    if (g->stack.size > base) g->stack.size = base;
    return x;
}

// Adds \d, \w, \s or one of their complements to a set (ASCII, as in JSON schema's patterns). 0: something else is here
static int avl__regex_class(avl__regex *r) {
    static const char *const bounds[] = {"09", "09AZ__az", "\t\r  "};
    int c = avl__regex_peek(r) == '\\' && r->at + 1 < r->size ? r->text[r->at + 1] : 0, kind = c | 32, low = 0;
    const char *p = kind == 'd' ? bounds[0] : kind == 'w' ? bounds[1] : kind == 's' ? bounds[2] : NULL;
    if (!p) return 0;
    r->at += 2;
    for (; *p; low = p[1] + 1, p += 2) {
        if (c == kind) avl__set_add(r, p[0], p[1]);
        else avl__set_add(r, low, p[0] - 1);
    }
    if (c != kind) avl__set_add(r, low, 0x10FFFF);
    return 1;
}

static int avl__regex_brackets(avl__regex *r) {   // after [
    size_t base = r->g->stack.size, open = r->at - 1;
    int negate = avl__regex_take(r, '^'), x;
    if (avl__regex_peek(r) == ']') return avl__regex_wrong(r, open, "an empty set (a ] in a set is written \\])");
    while (avl__regex_peek(r) >= 0 && avl__regex_peek(r) != ']') {
        size_t at = r->at;
        int is_class = avl__regex_class(r), low = is_class ? 0 : avl__regex_char(r), high = low;
        if (r->at + 2 <= r->size && r->text[r->at] == '-' && r->text[r->at + 1] != ']') {
            r->at++;
            if (is_class || avl__regex_class(r))
                return avl__regex_wrong(r, at, "a range goes from a character to another");
            high = avl__regex_char(r);
        }
        if (high < low) return avl__regex_wrong(r, at, "a range that runs backwards");
        if (!is_class) avl__set_add(r, low, high);
    }
    if (!avl__regex_take(r, ']')) return avl__regex_wrong(r, open, "this [ is not closed");
    x = avl__set_finish(r, base, negate);
    return x ? x : avl__regex_wrong(r, open, "a set that no character is in");
}

static int avl__regex_alternatives(avl__regex *r);

static int avl__regex_atom(avl__regex *r) {
    size_t at = r->at, base = r->g->stack.size;
    int c = avl__regex_peek(r), x, negate;
    if (c > 0 && strchr("*+?{", c))
        return avl__regex_wrong(r, at, "nothing stands here to be repeated (a literal one is written \\*, \\+ ...)");
    if (c == '^' || c == '$')
        return avl__regex_fail(r, at, ASTROVL_ERROR_UNSUPPORTED, "^ and $ may stand only at the ends of the pattern");
    if (avl__regex_take(r, '[')) return avl__regex_brackets(r);
    if (avl__regex_take(r, '(')) {
        if (avl__regex_take(r, '?') && !avl__regex_take(r, ':'))
            return avl__regex_fail(r, at, ASTROVL_ERROR_UNSUPPORTED, "a group may begin with (?: but no other (?");
        if (++r->depth > AVL__GUIDE_DEPTH)
            return avl__regex_fail(r, at, ASTROVL_ERROR_LIMIT, "groups are nested more than 64 deep");
        x = avl__regex_alternatives(r);
        r->depth--;
        return avl__regex_take(r, ')') ? x : avl__regex_wrong(r, at, "this ( is not closed");
    }
    negate = avl__regex_take(r, '.');
    if (negate || !avl__regex_class(r)) {
        c = negate ? '\n' : avl__regex_char(r);
        avl__set_add(r, c, c);
    }
    return avl__set_finish(r, base, negate);
}

static int avl__regex_count(avl__regex *r) {   // -1: no number is here
    size_t at = r->at;
    int n = 0;
    for (; avl__regex_peek(r) >= '0' && avl__regex_peek(r) <= '9'; r->at++) {
        n = n * 10 + (avl__regex_peek(r) - '0');
        if (n > AVL__GUIDE_FAR) return avl__regex_fail(r, at, ASTROVL_ERROR_LIMIT, "a count of more than 262,144");
    }
    return r->at > at ? n : -1;
}

static int avl__regex_repeated(avl__regex *r) {   // an atom with its quantifier, if it has one
    int atom = avl__regex_atom(r), c = avl__regex_peek(r), min = c == '+', max = c == '?' ? 1 : -1;
    size_t at = r->at;
    if (c < 1 || !strchr("*+?{", c)) return atom;
    r->at++;
    if (c == '{') {
        min = avl__regex_count(r);
        max = avl__regex_take(r, ',') ? avl__regex_count(r) : min;
        if (min < 0 || (max >= 0 && max < min) || !avl__regex_take(r, '}'))
            return avl__regex_wrong(r, at, "{m}, {m,} or {m,n} with m <= n is expected (a literal { is written \\{)");
    }
    avl__regex_take(r, '?');   // as few as possible or as many: the same language
    c = avl__regex_peek(r);
    return c > 0 && strchr("*+?{", c) ? avl__regex_wrong(r, r->at, "a quantifier after a quantifier")
                                      : avl__re_repeat(r->g, atom, min, max);
}

static int avl__regex_alternatives(avl__regex *r) {
    astrovl_guide *g = r->g;
    size_t base = g->stack.size;
    do {
        size_t first = g->stack.size;
        int x = AVL__EMPTY, c;
        while ((c = avl__regex_peek(r)) >= 0 && c != '|' && c != ')' && !(c == '$' && r->at + 1 == r->size))
            avl__push(g, avl__regex_repeated(r));
        while (g->stack.size > first) x = avl__re_cat(g, g->stack.data[--g->stack.size], x);
        avl__push(g, x);
    } while (avl__regex_take(r, '|'));
    return avl__re_alt(g, base);
}

// A whole pattern as an expression. It matches all of an answer, so ^ and $ at its ends say nothing.
static int avl__re_pattern(astrovl_guide *g, const char *pattern) {
    avl__regex r = {NULL, NULL, 0, 0, 0};
    int x;
    r.g = g;
    r.text = pattern;
    r.size = strlen(pattern);
    if (r.size > AVL__GUIDE_TEXT) return avl__regex_fail(&r, AVL__GUIDE_TEXT, ASTROVL_ERROR_LIMIT, "it is too long");
    avl__regex_take(&r, '^');
    x = avl__regex_alternatives(&r);
    avl__regex_take(&r, '$');
    return r.at < r.size ? avl__regex_wrong(&r, r.at, "this ) closes nothing") : x;
}

// ---- JSON (RFC 8259) -----------------------------------------------------------------------------------------------
// A text is validated once, in a copy that ends with a zero byte. After that a value is a pointer to its first byte, a
// member a pointer to its name, and the accessors rely on text that is known to be right.

static const char *avl__json_space(const char *p) { return p + strspn(p, " \t\n\r"); }

// Reads one character of a string, plain or escaped, as UTF-8. Returns what follows it; NULL: none is here.
static const char *avl__json_char(const char *p, char utf8[4], size_t *size) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *letter = *p == '\\' && p[1] ? strchr(letters, p[1]) : NULL;
    size_t length = 0;
    int32_t c;
    if (*p != '\\') c = (uint8_t)*p < 32 ? -1 : avl__utf8_read(p, 4, &length);   // 4: it stops at the final zero
    else if (letter) c = meanings[letter - letters];
    else c = p[1] == 'u' ? avl__unicode_escape(p + 2, &length) : -1;
    if (c < 0 || (c >= 0xD800 && c <= 0xDFFF)) return NULL;
    *size = avl__utf8_write((uint32_t)c, utf8);
    return p + length + (*p == '\\' ? 2 : 0);
}

static const char *avl__json_after(const char *p) {   // what follows a value
    int depth = 0;
    if (!strchr("\"{[", *p)) return p + strcspn(p, ",]} \t\n\r");
    do {
        if (*p == '"') for (p++; *p != '"'; p++) p += *p == '\\';
        depth += (*p == '{' || *p == '[') - (*p == '}' || *p == ']');
        p++;
    } while (depth > 0);
    return p;
}

static const char *avl__json_first(const char *p) {   // item or member; NULL: there is none
    p = avl__json_space(p + 1);
    return *p == ']' || *p == '}' ? NULL : p;
}

static const char *avl__json_next(const char *p) {   // item; NULL: that was the last one
    p = avl__json_space(avl__json_after(p));
    return *p == ',' ? avl__json_space(p + 1) : NULL;
}

static const char *avl__json_value(const char *member) {
    return avl__json_space(avl__json_space(avl__json_after(member)) + 1);
}

static const char *avl__json_next_member(const char *p) { return avl__json_next(avl__json_value(p)); }

static int avl__json_is(const char *p, const char *text) {   // whether p is a string that spells text
    char utf8[4];
    size_t n;
    if (*p++ != '"') return 0;
    for (; *p != '"'; text += n) {
        p = avl__json_char(p, utf8, &n);
        if (!*text || strncmp(text, utf8, n) != 0) return 0;
    }
    return !*text;
}

// The value of an object's member; NULL: it has none of that name. Of several, the last, as in Python.
static const char *avl__json_get(const char *object, const char *name) {
    const char *p, *found = NULL;
    for (p = avl__json_first(object); p; p = avl__json_next_member(p))
        if (avl__json_is(p, name)) found = avl__json_value(p);
    return found;
}

typedef struct avl__json {
    const char    *name, *text, *end, *p;   // name: for messages
    int            depth;
    astrovl_error *err;                     // the first failure sticks; p is then at the end, where a zero byte is
} avl__json;

static void avl__json_fail(avl__json *j, astrovl_status status, const char *what) {
    if (!j->err->status) avl__fail(j->err, status, "%s, byte %d: %s", j->name, (int)(j->p - j->text), what);
    j->p = j->end;
}

static void avl__json_expect(avl__json *j, char c, const char *what) {   // white space, then c
    j->p = avl__json_space(j->p);
    if (*j->p == c) j->p++;
    else avl__json_fail(j, ASTROVL_ERROR_FORMAT, what);
}

static void avl__json_check_string(avl__json *j, const char *what) {
    const char *p;
    char utf8[4];
    size_t n;
    avl__json_expect(j, '"', what);
    for (p = j->p; p && *p != '"'; p = avl__json_char(p, utf8, &n)) j->p = p;
    if (p) j->p = p + 1;
    else avl__json_fail(j, ASTROVL_ERROR_FORMAT, j->p == j->end ? "the text ends within a string" :
                        (uint8_t)*j->p < 32 ? "a control character must be escaped" :
                        *j->p != '\\' ? "these bytes are not UTF-8" :
                        j->p[1] == 'u' && avl__hex(j->p + 2, 4) >= 0 ? "half a surrogate pair is no character" :
                        "an escape is one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
}

// Validates a value, and moves j->p behind it.
static void avl__json_check(avl__json *j) {
    const char *p = j->p = avl__json_space(j->p), *word = *p == 't' ? "true" : *p == 'f' ? "false" : "null";
    char open = *p, close = open == '{' ? '}' : ']';
    size_t n = strlen(word);
    int more;
    if (open == '"') {
        avl__json_check_string(j, "");
    } else if (open == '{' || open == '[') {
        if (++j->depth > AVL__GUIDE_DEPTH) avl__json_fail(j, ASTROVL_ERROR_LIMIT, "nested more than 64 deep");
        else j->p = avl__json_space(p + 1);
        more = !j->err->status && *j->p != close;
        while (more) {
            if (open == '{') {
                avl__json_check_string(j, "a member's name is expected");
                avl__json_expect(j, ':', "a colon is expected");
            }
            avl__json_check(j);
            j->p = avl__json_space(j->p);
            more = *j->p == ',';
            j->p += more;
        }
        avl__json_expect(j, close, open == '{' ? "a comma or } is expected" : "a comma or ] is expected");
        j->depth--;
    } else {
        if (strncmp(p, word, n) != 0) {   // -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?
            p += *p == '-';
            n = *p == '0' ? 1 : strspn(p, "0123456789");
            if (n && p[n] == '.') {
                p += n + 1;
                n = strspn(p, "0123456789");
            }
            if (n && (p[n] == 'e' || p[n] == 'E')) {
                p += n + 1 + (p[n + 1] == '+' || p[n + 1] == '-');
                n = strspn(p, "0123456789");
            }
        }
        j->p = p + n;
        if (n == 0) avl__json_fail(j, ASTROVL_ERROR_FORMAT, "a value is expected");
    }
}

// Copies and validates a whole text. Returns the copy (astrovl_free), or NULL with *err, which must be zero before.
static char *avl__json_read(const char *name, const char *text, size_t size, astrovl_error *err) {
    char *copy = avl__copy_text(text, size);
    avl__json j = {name, copy, copy ? copy + size : NULL, copy, 0, err};
    if (!copy) avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory", name);
    if (!copy) return NULL;
    avl__json_check(&j);
    j.p = avl__json_space(j.p);
    if (j.p < j.end) avl__json_fail(&j, ASTROVL_ERROR_FORMAT, "nothing may follow the value");
    if (!err->status) return copy;
    astrovl_free(copy);
    return NULL;
}

ASTROVL_API char **astrovl_json_strings(const char *json, size_t size, const char *key, int *n, astrovl_error *err) {
    astrovl_error failure = {ASTROVL_OK, ""};
    const char *object, *found = NULL, *p, *at, *wrong = NULL;
    char *copy = NULL, **list = NULL, *text, utf8[4];
    size_t n_strings = 0, length;
    int is_array;
    if (n) *n = 0;
    if (!json || !n || !key) avl__fail(&failure, ASTROVL_ERROR_ARGUMENT, "JSON: no text, no member's name or no count");
    else copy = avl__json_read("JSON", json, size, &failure);
    object = copy ? avl__json_space(copy) : NULL;
    if (object && *object == '{') found = avl__json_get(object, key);
    else if (object) avl__fail(&failure, ASTROVL_ERROR_FORMAT, "JSON, byte 0: an object is expected");
    is_array = found && *found == '[';
    for (p = is_array ? avl__json_first(found) : found; p; p = is_array ? avl__json_next(p) : NULL) n_strings++;
    if (!failure.status && !(list = (char **)avl__alloc_raw(n_strings * sizeof *list + size, 1)))
        avl__fail(&failure, ASTROVL_ERROR_MEMORY, "JSON: out of memory");
    text = list ? (char *)(list + n_strings) : NULL;   // with their quotes the strings were longer in the JSON text
    n_strings = 0;
    for (p = is_array ? avl__json_first(found) : found; p && list; p = is_array ? avl__json_next(p) : NULL) {
        if (*p != '"') wrong = "is neither a string nor an array of strings";
        list[n_strings++] = text;
        for (at = p + 1; !wrong && *at != '"'; text += length) {
            at = avl__json_char(at, utf8, &length);
            memcpy(text, utf8, length);
            if (!*utf8) wrong = "has a zero character";
        }
        if (wrong) avl__fail(&failure, ASTROVL_ERROR_FORMAT, "JSON, byte %d: \"%s\" %s", (int)(p - copy), key, wrong);
        if (wrong) break;
        *text++ = 0;
    }
    astrovl_free(copy);
    if (!failure.status) {
        *n = (int)n_strings;
        return list;
    }
    astrovl_free(list);
    avl__fail(err, failure.status, "%s", failure.message);
    return NULL;
}

// ---- schemas -------------------------------------------------------------------------------------------------------

enum { AVL__OBJECT, AVL__ARRAY, AVL__STRING, AVL__INTEGER, AVL__NUMBER, AVL__BOOLEAN, AVL__NULL, AVL__N_KINDS };

static const char *const avl__kinds[AVL__N_KINDS] = {
    "object", "array", "string", "integer", "number", "boolean", "null"};

enum { AVL__N_KEYWORDS = 19, AVL__N_NOTES = 7 };

static const char *const avl__keywords[AVL__N_KEYWORDS] = {   // the notes say nothing about the values
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "type", "properties", "required",
    "additionalProperties", "items", "minItems", "maxItems", "minLength", "maxLength", "enum", "const", "anyOf"};

typedef struct avl__schema {
    astrovl_guide *g;
    const char    *text;     // all of it
    int            character, integer, number, boolean, comma, colon;   // expressions that many values share
} avl__schema;

// Fails, naming the place of p, a value or a member, as a JSON pointer (RFC 6901). Returns NONE.
static int avl__schema_fail(avl__schema *s, const char *p, astrovl_status status, const char *what) {
    const char *value = s->text, *item = NULL, *next;
    avl__bytes path = {NULL, 0, 0, 0};
    char text[24];
    size_t n;
    while (value != p && item != p) {   // down to the item or member that p is or lies in
        int is_object = *value == '{', i = 0;
        for (next = avl__json_first(value); next && next <= p; i++) {
            item = next;
            next = is_object ? avl__json_next_member(item) : avl__json_next(item);
        }
        value = is_object ? avl__json_value(item) : item;
        avl__format(text, sizeof text, "/%d", i - 1);
        avl__bytes_put(&path, text, is_object ? 1 : strlen(text));
        for (next = item + 1; is_object && *next != '"';) {
            next = avl__json_char(next, text, &n);
            if (*text == '~' || *text == '/') avl__bytes_put(&path, *text == '~' ? "~0" : "~1", 2);
            else avl__bytes_put(&path, text, n);
        }
    }
    if (!s->g->failure.status)
        avl__fail(&s->g->failure, status, "schema, at %s: %s", path.size ? path.data : "its root", what);
    astrovl_free(path.data);
    return AVL__NONE;
}

static int avl__schema_wrong(avl__schema *s, const char *p, const char *what) {
    return avl__schema_fail(s, p, ASTROVL_ERROR_FORMAT, what);
}

static int avl__schema_unknown(avl__schema *s, const char *p, const char *what) {
    return avl__schema_fail(s, p, ASTROVL_ERROR_UNSUPPORTED, what);
}

// The kinds of values that a type allows, one bit each.
static int avl__schema_kinds(avl__schema *s, const char *type) {
    const char *item;
    int kinds = 0, i;
    for (item = *type == '[' ? avl__json_first(type) : type; item; item = *type == '[' ? avl__json_next(item) : NULL) {
        for (i = 0; i < AVL__N_KINDS && !avl__json_is(item, avl__kinds[i]);) i++;
        kinds |= 1 << i;
    }
    if (kinds > 0 && kinds < 1 << AVL__N_KINDS) return kinds;
    return avl__schema_wrong(s, type, "a type is object, array, string, integer, number, boolean, null or a list");
}

static int avl__schema_count(avl__schema *s, const char *value, int absent) {   // a limit, such as minItems
    const char *p = value, *end = value ? avl__json_after(value) : NULL;
    int n = 0;
    if (!value) return absent;
    for (; p < end && *p >= '0' && *p <= '9' && n <= AVL__GUIDE_FAR; p++) n = n * 10 + (*p - '0');
    if (n > AVL__GUIDE_FAR) return avl__guide_fail(s->g, ASTROVL_ERROR_LIMIT);
    return p == end ? n : avl__schema_wrong(s, value, "a whole number, not negative, is expected");
}

// Items with `between` between them, in brackets or quotes; their number lies between two limits.
static int avl__schema_list(avl__schema *s, const char *least, const char *most, int item, int between,
                            const char *ends) {
    astrovl_guide *g = s->g;
    int min = avl__schema_count(s, least, 0), max = avl__schema_count(s, most, -1), end, more, x;
    if (max >= 0 && min > max) avl__schema_wrong(s, least, "the least (minItems, minLength) is more than the most");
    end = avl__re_text(g, ends + 1, 1, AVL__EMPTY);
    more = avl__re_repeat(g, avl__re_cat(g, between, item), min > 1 ? min - 1 : 0, max > 0 ? max - 1 : max);
    x = max == 0 ? AVL__NONE : avl__re_cat(g, item, avl__re_cat(g, more, end));
    return avl__re_text(g, ends, 1, min == 0 ? avl__re_or(g, x, end) : x);
}

// A value as it stands in the schema, without white space, and its strings without escapes that need not be.
static int avl__schema_literal(avl__schema *s, const char *p) {
    static const char hex[] = "0123456789abcdef";
    const char *end = avl__json_after(p);
    avl__bytes text = {NULL, 0, 0, 0};
    char c[4], escaped[] = "\\u00xx";
    int in_string = 0, x;
    size_t n;
    while (p < end) {
        if (in_string && *p != '"') {
            p = avl__json_char(p, c, &n);
            escaped[4] = hex[c[0] >> 4 & 15];
            escaped[5] = hex[c[0] & 15];
            if (*c == '"' || *c == '\\') avl__bytes_put(&text, "\\", 1);
            if ((uint8_t)*c < 32) avl__bytes_put(&text, escaped, 6);
            else avl__bytes_put(&text, c, n);
            continue;
        }
        in_string ^= *p == '"';
        if (!strchr(" \t\n\r", *p)) avl__bytes_put(&text, p, 1);
        p++;
    }
    if (text.failed) x = avl__guide_fail(s->g, ASTROVL_ERROR_MEMORY);
    else x = avl__re_text(s->g, text.data, text.size, AVL__EMPTY);
    astrovl_free(text.data);
    return x;
}

static int avl__schema_expr(avl__schema *s, const char *schema);

// Members in the order of `properties`. They are put together from the last to the first, as two expressions: what
// follows where nothing is written yet, and what follows a member.
static int avl__schema_object(avl__schema *s, const char *schema) {
    const char *properties = avl__json_get(schema, "properties"), *required = avl__json_get(schema, "required"), *p;
    const char *additional = avl__json_get(schema, "additionalProperties");
    astrovl_guide *g = s->g;
    size_t base = g->stack.size, n, i;
    int first = avl__re_text(g, "}", 1, AVL__EMPTY), later = first, name;
    uint32_t known = g->mark + 1;   // the mark of properties' names (equal texts are one node); + 1: required, too
    g->mark += 2;
    if (properties && *properties != '{') return avl__schema_wrong(s, properties, "properties is an object");
    if (required && *required != '[') return avl__schema_wrong(s, required, "required is an array of names");
    if (additional && *additional != 't' && *additional != 'f')
        return avl__schema_unknown(s, additional, "only true and false are understood (none is ever written)");
    for (p = properties ? avl__json_first(properties) : NULL; p; p = avl__json_next_member(p)) {
        name = avl__schema_literal(s, p);
        if (g->nodes[name].mark == known) avl__schema_wrong(s, p, "a second member of the same name");
        g->nodes[name].mark = known;
        avl__push(g, name);
    }
    for (p = required ? avl__json_first(required) : NULL; p; p = avl__json_next(p)) {
        name = *p == '"' ? avl__schema_literal(s, p) : AVL__NONE;
        if (*p != '"') avl__schema_wrong(s, p, "required is an array of names");
        if (g->nodes[name].mark < known) avl__schema_unknown(s, p, "properties says nothing about this one");
        g->nodes[name].mark = known + 1;
    }
    n = g->stack.size - base;
    for (i = 0; i < n && !g->failure.status; i++) avl__push(g, g->nodes[g->stack.data[base + i]].mark > known);
    for (p = n > 0 ? avl__json_first(properties) : NULL; p && !g->failure.status; p = avl__json_next_member(p))
        avl__push(g, avl__schema_expr(s, avl__json_value(p)));
    for (i = n; i > 0 && !g->failure.status; i--) {   // on the stack: n names, n times whether it is required, n values
        const int32_t *item = g->stack.data + base + i - 1;
        int is_required = item[n], member = avl__re_cat(g, item[0], avl__re_cat(g, s->colon, item[2 * n]));
        int alone = avl__re_cat(g, member, later), after = avl__re_cat(g, s->comma, alone);
        first = is_required ? alone : avl__re_or(g, alone, first);
        later = is_required ? after : avl__re_or(g, after, later);
    }
    if (g->stack.size > base) g->stack.size = base;
    return avl__re_text(g, "{", 1, first);
}

// Whether a number is whole, in any spelling: 3, 3.0, 30e-1.
static int avl__json_is_whole(const char *p) {
    int zeros = 0, fraction = 0, exponent = 0, after_point = 0, nonzero = 0, sign;
    for (p += *p == '-'; *p == '.' || (*p >= '0' && *p <= '9'); p++) {
        after_point |= *p == '.';
        if (*p == '.') continue;
        fraction += after_point;
        zeros = *p == '0' ? zeros + 1 : 0;   // at the end of the digits
        nonzero |= *p != '0';
    }
    sign = *p && p[1] == '-' ? -1 : 1;
    if (*p == 'e' || *p == 'E') p += 1 + strspn(p + 1, "+-");
    for (; *p >= '0' && *p <= '9' && exponent < AVL__GUIDE_TEXT; p++) exponent = exponent * 10 + (*p - '0');
    return !nonzero || sign * exponent - fraction + zeros >= 0;
}

static int avl__schema_expr(avl__schema *s, const char *schema) {
    astrovl_guide *g = s->g;
    const char *p, *type, *values, *constant, *any_of, *items;
    size_t base = g->stack.size;
    int n_keywords = 0, kinds, kind, i, x;
    uint32_t seen = 0;
    if (*schema != '{') return avl__schema_unknown(s, schema, "a schema is an object here");
    for (p = avl__json_first(schema); p; p = avl__json_next_member(p)) {
        for (i = 0; i < AVL__N_KEYWORDS && !avl__json_is(p, avl__keywords[i]);) i++;
        if (i == AVL__N_KEYWORDS)   // passed over, it would be broken by the answer
            return avl__schema_unknown(s, p, "this keyword is not understood; those that are: type, properties, "
                                       "required, additionalProperties (true, false), items, minItems, maxItems, "
                                       "minLength, maxLength, enum, const, anyOf");
        if (seen >> i & 1) return avl__schema_wrong(s, p, "a second member of the same name");
        seen |= (uint32_t)1 << i;
        n_keywords += i >= AVL__N_NOTES;
    }
    type = avl__json_get(schema, "type");
    values = avl__json_get(schema, "enum");
    constant = avl__json_get(schema, "const");
    any_of = avl__json_get(schema, "anyOf");
    items = avl__json_get(schema, "items");
    kinds = type ? avl__schema_kinds(s, type) : (1 << AVL__N_KINDS) - 1;
    if (values || constant) {
        if (n_keywords > 1 + (type != NULL))
            return avl__schema_unknown(s, schema, "beside enum or const only type is understood");
        if (values && *values != '[') return avl__schema_wrong(s, values, "enum is an array of values");
        for (p = values ? avl__json_first(values) : constant; p; p = values ? avl__json_next(p) : NULL) {
            kind = *p == '{' ? AVL__OBJECT : *p == '[' ? AVL__ARRAY : *p == '"' ? AVL__STRING : *p == 'n' ? AVL__NULL :
                   *p == 't' || *p == 'f' ? AVL__BOOLEAN : AVL__NUMBER;
            i = kind == AVL__NUMBER && avl__json_is_whole(p) ? 1 << AVL__INTEGER : 0;
            if (kinds & (1 << kind | i)) avl__push(g, avl__schema_literal(s, p));
        }
        x = avl__re_alt(g, base);
        return x ? x : avl__schema_wrong(s, schema, "no value is left to choose from");
    }
    if (any_of) {
        if (n_keywords > 1) return avl__schema_unknown(s, schema, "beside anyOf no other keyword is understood");
        if (*any_of != '[' || !avl__json_first(any_of))
            return avl__schema_wrong(s, any_of, "an array of schemas is expected");
        for (p = avl__json_first(any_of); p && !g->failure.status; p = avl__json_next(p))
            avl__push(g, avl__schema_expr(s, p));
        return avl__re_alt(g, base);
    }
    if (!type) kinds = avl__json_get(schema, "properties") ? 1 << AVL__OBJECT : items ? 1 << AVL__ARRAY : 0;
    if (!kinds)
        return avl__schema_unknown(s, schema, "a type (or enum, const, anyOf) is needed: any value is not understood");
    for (kind = 0; kind < AVL__N_KINDS && !g->failure.status; kind++) {
        if (!(kinds >> kind & 1)) continue;
        switch (kind) {
        case AVL__OBJECT:  x = avl__schema_object(s, schema); break;
        case AVL__ARRAY:
            if (!items) return avl__schema_unknown(s, schema, "an array needs items: any at all are not understood");
            x = avl__schema_expr(s, items);
            x = avl__schema_list(s, avl__json_get(schema, "minItems"), avl__json_get(schema, "maxItems"), x, s->comma,
                                 "[]");
            break;
        case AVL__STRING:
            x = avl__schema_list(s, avl__json_get(schema, "minLength"), avl__json_get(schema, "maxLength"),
                                 s->character, AVL__EMPTY, "\"\"");
            break;
        case AVL__INTEGER: x = s->integer; break;
        case AVL__NUMBER:  x = s->number; break;
        case AVL__BOOLEAN: x = s->boolean; break;
        default:           x = avl__re_text(g, "null", 4, AVL__EMPTY); break;
        }
        avl__push(g, x);
    }
    return avl__re_alt(g, base);
}

// The whole schema as an expression.
static int avl__re_schema(astrovl_guide *g, const char *json, size_t size) {
    char *copy = size > AVL__GUIDE_TEXT ? NULL : avl__json_read("schema", json, size, &g->failure);
    avl__schema s;
    int x;
    if (size > AVL__GUIDE_TEXT) avl__fail(&g->failure, ASTROVL_ERROR_LIMIT, "schema: it has more than 262,144 bytes");
    if (!copy) return AVL__NONE;
    s.g = g;
    s.text = avl__json_space(copy);
    s.character = avl__re_pattern(g, "[^\"\\\\\\x00-\\x1F]|\\\\([\"\\\\/bfnrt]|"
                                "u([\\dA-CEFa-cef][\\dA-Fa-f]|[Dd][0-7])[\\dA-Fa-f]{2})");
    s.integer = avl__re_pattern(g, "0|-?[1-9]\\d{0,14}");
    s.number = avl__re_pattern(g, "-?(0|[1-9]\\d{0,14})(\\.\\d{1,15})?([eE][+-]?\\d{1,2})?");
    s.boolean = avl__re_pattern(g, "true|false");
    s.comma = avl__re_pattern(g, ", ?");
    s.colon = avl__re_pattern(g, ": ?");
    x = avl__schema_expr(&s, s.text);
    astrovl_free(copy);
    return x;
}

// ---- from a pattern or a schema to a guide -------------------------------------------------------------------------

static astrovl_guide *avl__guide_build(const astrovl_model *model, const char *text, size_t size, int is_schema,
                                       astrovl_error *err) {
    astrovl_guide *g;
    uint8_t begins[257] = {0};
    int byte, least;
    size_t i;
    if (!model || !text) avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a guide needs a model, and a pattern or schema");
    if (!model || !text || avl__need_vocab(model, err) != ASTROVL_OK) return NULL;
    g = (astrovl_guide *)avl__alloc(1, sizeof *g);
    if (!g) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a guide");
    if (!g) return NULL;
    g->model = model;
    g->name = is_schema ? "schema" : "pattern";
    g->advice = is_schema ? "lower maxItems and maxLength, or leave them out" : "lower the counts in { }";
    memset(g->mask_owner, 0xFF, sizeof g->mask_owner);
    avl__guide_read_tokens(g);
    avl__re_make(g, AVL__NONE, 0, 0, 0, 0);
    avl__re_make(g, AVL__EMPTY, 0, 0, 0, 0);
    if (!g->failure.status) g->start = is_schema ? avl__re_schema(g, text, size) : avl__re_pattern(g, text);
    for (i = 0; i < g->n_nodes; i++) {
        if (g->nodes[i].kind != AVL__RANGE) continue;
        begins[g->nodes[i].a] = 1;
        begins[g->nodes[i].b + 1] = 1;
    }
    for (byte = 0; byte < 256; byte++) {
        if (byte == 0 || begins[byte]) g->byte_of[g->n_classes++] = (uint8_t)byte;
        g->classes[byte] = (uint8_t)(g->n_classes - 1);
    }
    least = g->failure.status ? 0 : g->nodes[g->start].least;
    if (least == AVL__GUIDE_NEVER)
        avl__fail(&g->failure, ASTROVL_ERROR_MODEL, "%s: the model's vocabulary cannot spell any such answer", g->name);
    if (least == AVL__GUIDE_FAR) avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    if (!g->failure.status) avl__min_tokens(g, g->start);
    if (!g->failure.status) return g;
    avl__fail(err, g->failure.status, "%s", g->failure.message);
    astrovl_guide_free(g);
    return NULL;
}

ASTROVL_API astrovl_guide *astrovl_guide_regex(const astrovl_model *model, const char *pattern, astrovl_error *err) {
    return avl__guide_build(model, pattern, 0, 0, err);
}

ASTROVL_API astrovl_guide *astrovl_guide_schema(const astrovl_model *model, const char *json, size_t size,
                                                astrovl_error *err) {
    return avl__guide_build(model, json, size, 1, err);
}

// ---- turns ---------------------------------------------------------------------------------------------------------
// One conversation's turn, or turns of several that are written together: one token of each per step, so that the
// weights, whose way from memory is what a step takes, are read once for all.

typedef struct avl__turn {
    astrovl_turn    *asked;
    const astrovl_generation *options;
    astrovl_session *s;
    float           *logits;                 // [n_vocab], of the position before the next token
    uint64_t         random_state;
    int              max_tokens, n_before;   // n_before: positions in the cache before this turn
    // the answer as it grows
    avl__tokens      tokens;
    int              n_unread;               // of them, at the end, not in the cache yet
    avl__bytes       piece, text;            // the last token's bytes; the answer's whole characters
    avl__utf8_gate   gate;
    size_t           n_shown;                // bytes of text given to on_text
    int              state;                  // of the guide, if there is one
    int              is_cut;                 // a stop text was met or on_text returned non-zero: nothing more is shown
} avl__turn;

static void avl__show(avl__turn *t, size_t end) {   // what is new up to that byte
    size_t from = t->n_shown;
    if (end <= from) return;
    t->n_shown = end;
    if (t->options->on_text && t->options->on_text(t->options->user, t->text.data + from, end - from)) t->is_cut = 1;
}

// Appends a token's text to the answer, and shows it. Returns 0 when memory is out.
static int avl__put_answer(avl__turn *t, int32_t token) {
    const astrovl_generation *o = t->options;
    size_t before = t->text.size, end, held_back = 0, skip, at, n;
    int i;
    t->piece.size = 0;
    avl__put_token(&t->s->model->vocab, token, &t->piece);
    if (t->piece.failed) return 0;
    skip = o->guide ? avl__guide_skip(o->guide, t->state, t->piece.data, t->piece.size) : 0;
    avl__utf8_gate_put(&t->gate, t->piece.data + skip, t->piece.size - skip, &t->text);
    if (t->text.failed) return 0;
    if (before == 0 && !o->guide) {   // a free answer's first white space is dropped
        n = strspn(t->text.data, " \n");
        t->text.size -= n;
        memmove(t->text.data, t->text.data + n, t->text.size + 1);
    }
    end = t->text.size;   // or where the first stop text begins; bytes that may turn out to begin one are not shown yet
    for (i = 0; i < o->n_stop; i++) {
        size_t size = strlen(o->stop[i]);
        for (at = before > size ? before - size : 0; size && at < end && size <= t->text.size - at; at++)
            if (memcmp(t->text.data + at, o->stop[i], size) == 0) end = at;
        for (n = size; n > held_back; n--)
            if (n <= t->text.size - t->n_shown && memcmp(t->text.data + t->text.size - n, o->stop[i], n) == 0)
                held_back = n;
    }
    if (end < t->text.size) {
        t->is_cut = 1;
        t->text.size = end;
        t->text.data[end] = 0;
        held_back = 0;
    }
    avl__show(t, t->text.size - held_back);
    return 1;
}

// Writes the token after t->logits. Returns 1 if the answer goes on once this token is read; 0 when the model, the
// guide, a stop text or a limit ends it, or on a failure (asked->err). The last token is left unread: the next turn
// reads it.
static int avl__write_token(avl__turn *t) {
    astrovl_session *s = t->s;
    const astrovl_generation *o = t->options;
    astrovl_guide *guide = o->guide;
    astrovl_error *err = &t->asked->err;
    int n_left = t->max_tokens - (int)t->tokens.size, n_room = s->cache.n_ctx - s->cache.n_past + 1, is_end, next = 0;
    int32_t token;
    if (guide && avl__guide_node(guide, t->state) == AVL__EMPTY) return 0;
    if (n_left > n_room) n_left = n_room;
    if (guide && astrovl_guide_mask(guide, t->state, n_left, t->logits, err) != ASTROVL_OK) return 0;
    token = astrovl_sample(t->logits, s->model->llama.n_vocab, o, t->tokens.data, (int)t->tokens.size,
                           &t->random_state);
    is_end = avl__vocab_is_end(&s->model->vocab, token);
    if (guide && !is_end) next = astrovl_guide_next(guide, t->state, token);
    if (guide && is_end && !astrovl_guide_is_accepting(guide, t->state)) next = -1;
    if (guide && guide->failure.status)
        avl__fail(err, guide->failure.status, "%s", guide->failure.message);
    else if (next < 0)
        avl__fail(err, ASTROVL_ERROR_MODEL, "no token can be chosen: the model's logits are not numbers");
    else if (!is_end && (!avl__tokens_put(&t->tokens, token) || !avl__put_answer(t, token)))
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the answer");
    if (err->status || is_end) return 0;
    t->state = next;
    t->n_unread = 1;
    if (t->is_cut || (guide && next == AVL__EMPTY)) return 0;
    s->stats.stopped_by_limit = (int)t->tokens.size >= t->max_tokens || s->cache.n_past >= s->cache.n_ctx;
    return !s->stats.stopped_by_limit;
}

// Reads the token that each of n turns has just written, n at most AVL__STEP_ROWS.  logits: out, [n][n_vocab]
static void avl__read_tokens(avl__turn *turns, int n, float *logits) {
    const avl__llama *llama = &turns->s->model->llama;
    avl__kv_cache *caches[AVL__STEP_ROWS];
    int32_t tokens[AVL__STEP_ROWS];
    astrovl_error failure;
    int i;
    for (i = 0; i < n; i++) {
        const avl__tokens *written = &turns[i].tokens;
        caches[i] = &turns[i].s->cache;
        tokens[i] = written->data[written->size - 1];
        turns[i].logits = logits + (size_t)i * llama->n_vocab;
        turns[i].n_unread = 0;
    }
    if (avl__llama_eval(llama, turns->s->run, caches, n, tokens, NULL, n, logits, n, &failure) == ASTROVL_OK) return;
    for (i = 0; i < n; i++) turns[i].asked->err = failure;
}

static astrovl_status avl__check_turn(const avl__turn *t, astrovl_error *err) {
    const astrovl_turn *asked = t->asked;
    const astrovl_generation *o = t->options;
    const astrovl_model *m = t->s->model;
    astrovl_status status = avl__need_text(m, err);
    int i;
    if (!status) status = avl__need_vocab(m, err);
    if (!status && asked->n_images > 0) status = avl__need_vision(m, err);
    if (status) return status;
    if (asked->n_images > 0 && !m->n_projector)
        return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: no projector (mm.0.weight) in the model's files",
                         astrovl_gguf_name(m->weights.files[0]));
    if (!asked->text || asked->n_images < 0 || (asked->n_images > 0 && !asked->images) || asked->n_images > 4096)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a turn needs a text, and as many images as it says");
    if (o->max_tokens < 0 || o->top_k < 0 || o->n_stop < 0 || (o->n_stop > 0 && !o->stop) ||
        !(o->temperature >= 0.0f) || !(o->top_p >= 0.0f) || !(o->min_p >= 0.0f && o->min_p <= 1.0f) ||
        !(o->repetition_penalty >= 0.0f))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "generation options out of range: none may be negative, and "
                         "min_p is at most 1");
    for (i = 0; i < o->n_stop; i++)
        if (!o->stop[i]) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "stop text %d is NULL", i);
    if (!o->guide) return ASTROVL_OK;
    if (o->guide->model != m) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the guide was made for another model");
    if (o->n_stop > 0)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a guided answer ends as its guide says: give it no stop texts");
    i = astrovl_guide_min_tokens(o->guide, 0);
    if (t->max_tokens < i)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "the answer needs at least %d tokens to end as its guide asks, and "
                         "may have %d", i, t->max_tokens);
    return ASTROVL_OK;
}

// The tokens of a turn: first the end of the last answer that the cache does not hold yet, then the prompt.
static astrovl_status avl__lay_out_turn(astrovl_session *s, int n_images, const char *text, const astrovl_generation *o,
                                        avl__tokens *tokens, astrovl_error *err) {
    avl__prompt p;
    astrovl_status status;
    int i;
    memset(&p, 0, sizeof p);
    p.s = s;
    p.parse_special = o->parse_special;
    p.err = err;
    for (i = s->n_unread; i > 0; i--) avl__prompt_token(&p, s->answer.data[s->answer.size - (size_t)i]);
    status = avl__prompt_turn(&p, text, n_images, o->system);
    *tokens = p.tokens;
    return status;
}

// Reads what a turn asks, images spliced in, up to the logits that its answer begins with.
static void avl__begin_turn(avl__turn *t) {
    astrovl_session *s = t->s;
    astrovl_error *err = &t->asked->err;
    avl__tokens tokens = {NULL, 0, 0};
    int64_t n_rows = 0;
    float *rows = NULL;
    double start = avl__seconds();
    memset(&s->stats, 0, sizeof s->stats);
    if (avl__check_turn(t, err) != ASTROVL_OK) return;
    avl__lay_out_turn(s, t->asked->n_images, t->asked->text, t->options, &tokens, err);
    avl__bytes_put(&t->text, "", 0);
    if (!err->status && t->text.failed) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the answer");
    if (!err->status) n_rows = avl__count_rows(s->model, &tokens);
    if (!err->status && n_rows >= s->cache.n_ctx - s->cache.n_past)
        avl__fail(err, ASTROVL_ERROR_LIMIT, "the context is full: it holds %d positions, %d are taken, and this turn "
                  "needs %d and room for an answer", s->cache.n_ctx, s->cache.n_past, (int)n_rows);
    if (!err->status && !(rows = avl__alloc_floats((uint64_t)n_rows * s->model->llama.n_embd)))
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a prompt of %d rows", (int)n_rows);
    if (!err->status) avl__splice(s, &tokens, t->asked->images, rows, err);
    s->stats.encode_seconds = avl__seconds() - start;
    start = avl__seconds();
    if (!err->status) avl__eval(s, NULL, rows, (int)n_rows, t->logits, 1, err);
    s->stats.prompt_seconds = avl__seconds() - start;
    s->stats.n_prompt_tokens = (int)n_rows;
    astrovl_free(rows);
    astrovl_free(tokens.data);
}

// Hands the answer over and keeps its tokens in the conversation; or puts the conversation back, if the turn has
// failed.
static void avl__end_turn(avl__turn *t) {
    astrovl_session *s = t->s;
    astrovl_error *err = &t->asked->err;
    if (!err->status && !t->is_cut) {   // what was held back is shown, an unfinished character as U+FFFD
        avl__utf8_gate_flush(&t->gate, &t->text);
        if (t->text.failed) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the answer");
        else avl__show(t, t->text.size);
    }
    astrovl_free(t->piece.data);
    if (err->status) {
        astrovl_free(t->text.data);
        astrovl_free(t->tokens.data);
        s->cache.n_past = t->n_before;
        return;
    }
    astrovl_free(s->answer.data);
    s->answer = t->tokens;
    s->n_unread = t->n_unread;
    s->n_turns++;
    s->stats.n_answer_tokens = (int)t->tokens.size;
    t->asked->answer = t->text.data;
}

// Writes the answers, each to its end. The turns that go on are moved to the front.
// turns: [n], in any order afterwards;  logits: scratch, [n][n_vocab]
static void avl__write_answers(avl__turn *turns, int n, float *logits) {
    const int group = turns->s->run->tap ? 1 : AVL__STEP_ROWS;   // the tap sees one conversation at a time
    const size_t n_vocab = (size_t)turns->s->model->llama.n_vocab;
    double start = avl__seconds(), now;
    int n_going, i;
    for (; n > 0; n = n_going, start = now) {
        for (i = 0, n_going = 0; i < n; i++) {
            if (!turns[i].asked->err.status && avl__write_token(&turns[i])) {
                avl__turn going = turns[i];
                turns[i] = turns[n_going];
                turns[n_going++] = going;
            } else {
                avl__end_turn(&turns[i]);
            }
        }
        for (i = 0; i < n_going; i += group)
            avl__read_tokens(turns + i, n_going - i < group ? n_going - i : group, logits + i * n_vocab);
        now = avl__seconds();
        for (i = 0; i < n; i++) turns[i].s->stats.decode_seconds += (now - start) / n;
    }
}

static astrovl_status avl__check_batch(const astrovl_turn *turns, int n, astrovl_error *err) {
    int i, j;
    if (!turns || n < 1) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a batch of %d turns", turns ? n : 0);
    for (i = 0; i < n; i++) {
        if (!turns[i].session) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "turn %d of a batch has no session", i);
        if (turns[i].session->run != turns->session->run)
            return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "turn %d of a batch: its session does not share turn 0's "
                             "(astrovl_session_options.share)", i);
        for (j = 0; j < i; j++)
            if (turns[i].session == turns[j].session)
                return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "turns %d and %d of a batch are of one session", j, i);
    }
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_chat_batch(astrovl_turn *turns, int n_turns, astrovl_error *err) {
    astrovl_generation defaults;
    astrovl_error failure;
    avl__turn *room = NULL;
    float *logits = NULL;
    int i;
    memset(&defaults, 0, sizeof defaults);
    memset(&failure, 0, sizeof failure);
    if (avl__check_batch(turns, n_turns, &failure) == ASTROVL_OK) {
        room = (avl__turn *)avl__alloc((uint64_t)n_turns, sizeof *room);
        logits = avl__alloc_floats((uint64_t)n_turns * turns->session->model->llama.n_vocab);
        if (!room || !logits) avl__fail(&failure, ASTROVL_ERROR_MEMORY, "out of memory for %d turns", n_turns);
    }
    for (i = 0; turns && i < n_turns; i++) {
        turns[i].answer = NULL;
        turns[i].err = failure;
    }
    for (i = 0; i < n_turns && !failure.status; i++) {
        avl__turn *t = &room[i];
        t->asked = &turns[i];
        t->s = turns[i].session;
        t->options = turns[i].options ? turns[i].options : &defaults;
        t->logits = logits + (size_t)i * t->s->model->llama.n_vocab;
        t->random_state = t->options->seed;
        t->max_tokens = t->options->max_tokens > 0 ? t->options->max_tokens : 256;
        t->n_before = t->s->cache.n_past;
        avl__begin_turn(t);
    }
    if (!failure.status) avl__write_answers(room, n_turns, logits);
    astrovl_free(room);
    astrovl_free(logits);
    for (i = 0; i < n_turns && !failure.status; i++) failure = turns[i].err;
    return failure.status ? avl__fail(err, failure.status, "%s", failure.message) : ASTROVL_OK;
}

ASTROVL_API char *astrovl_chat(astrovl_session *s, const astrovl_image *images, int n_images, const char *text,
                               const astrovl_generation *options, astrovl_error *err) {
    astrovl_turn turn;
    memset(&turn, 0, sizeof turn);
    turn.session = s;
    turn.images = images;
    turn.n_images = n_images;
    turn.text = text;
    turn.options = options;
    astrovl_chat_batch(&turn, 1, err);
    return turn.answer;
}

// ---- one call ------------------------------------------------------------------------------------------------------

ASTROVL_API char *astrovl_ask(const astrovl_model *model, const astrovl_image *image, const char *question,
                              const astrovl_generation *options, astrovl_error *err) {
    astrovl_session *s = astrovl_session_new(model, NULL, err);
    char *answer = s ? astrovl_chat(s, image, image ? 1 : 0, question, options, err) : NULL;
    astrovl_session_free(s);
    return answer;
}

ASTROVL_API char *astrovl_caption(const astrovl_model *model, const astrovl_image *image,
                                  const astrovl_generation *options, astrovl_error *err) {
    return astrovl_ask(model, image, ASTROVL_CAPTION_PROMPT, options, err);
}

ASTROVL_API char *astrovl_ask_file(const astrovl_model *model, const char *image_path, const char *question,
                                   const astrovl_generation *options, astrovl_error *err) {
    astrovl_image image;
    char *answer = NULL;
    if (astrovl_image_load(image_path, 0, &image, err) != ASTROVL_OK) return NULL;
    if (astrovl_image_upright(&image, err) == ASTROVL_OK) answer = astrovl_ask(model, &image, question, options, err);
    astrovl_image_free(&image);
    return answer;
}

ASTROVL_API char *astrovl_caption_file(const astrovl_model *model, const char *image_path,
                                       const astrovl_generation *options, astrovl_error *err) {
    return astrovl_ask_file(model, image_path, ASTROVL_CAPTION_PROMPT, options, err);
}

// ====================================================================================================================
// [13] Contrastive
// CLIP (Radford et al. 2021) and PAPERCLIP (Mishra-Sharma et al. 2024): an image and a text that belong together have embeddings
// that point the same way. So a text can be looked for among images, an image among texts, and both directions be measured.
//     cosine(a, b) = a . b / (|a| |b|);    p(text j | image i) = softmax_j(logit_scale * cosine(image_i, text_j))
// ====================================================================================================================

// ---- embeddings ----------------------------------------------------------------------------------------------------

static astrovl_status avl__need_joint_image(const astrovl_model *m, astrovl_error *err) {
    if (m->has_vision && m->clip.has_joint) return ASTROVL_OK;
    return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: images cannot be embedded: no %s in the model's files", astrovl_gguf_name(m->weights.files[0]),
                     m->has_vision ? "visual_projection.weight" : "vision tower (v.*)");
}

static astrovl_status avl__need_joint_text(const astrovl_model *m, astrovl_error *err) {
    return m->has_clip_text ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_MODEL, "%s: texts cannot be embedded: no CLIP text tower (t.*) in "
                                                     "the model's files", astrovl_gguf_name(m->weights.files[0]));
}

// x[r] /= |x[r]|, in place; x: [n_rows][n_dims]
static void avl__normalize_rows(float *x, int n_rows, int n_dims) {
    int r, i;
    for (r = 0; r < n_rows; r++, x += n_dims) {
        float length = (float)avl__sqrt((double)avl__dot_portable(x, x, n_dims));
        for (i = 0; i < n_dims && length > 0.0f; i++) x[i] /= length;
    }
}

// How many rows go through a tower together: enough to keep all threads busy, little enough to stay near the cache.
enum { AVL__JOINT_ROWS = 1024 };

// One pass over n images.  pixels: [n][3][S][S], scratch
static astrovl_status avl__embed_image_pass(astrovl_session *s, const astrovl_image *images, int n, float *pixels, float *embeddings,
                                            astrovl_error *err) {
    const avl__clip *clip = &s->model->clip;
    size_t size = (size_t)clip->image_size;
    int i;
    for (i = 0; i < n; i++) {
        astrovl_status status = avl__clip_preprocess(clip, &images[i], pixels + 3 * size * size * (size_t)i, err);
        if (status) return status;
    }
    if (n == 1) avl__tap3(s->run, "pixel_values", -1, "", pixels, 3, clip->image_size, clip->image_size);
    return avl__clip_embed_images(clip, s->run, pixels, n, embeddings, err);
}

ASTROVL_API astrovl_status astrovl_embed_images(astrovl_session *s, const astrovl_image *images, int n_images, int normalize,
                                                float *embeddings, astrovl_error *err) {
    const avl__clip *clip = &s->model->clip;
    int n_pass, i, n, n_dims = avl__n_embd_joint(s->model);
    float *pixels;
    astrovl_status status = avl__need_joint_image(s->model, err);
    if (status) return status;
    if (n_images < 0 || (n_images > 0 && (!images || !embeddings)))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "astrovl_embed_images needs images and room for their embeddings");
    n_pass = s->run->tap ? 1 : 1 + AVL__JOINT_ROWS / (1 + clip->n_patches);   // the tap sees images one by one
    if (n_pass > n_images) n_pass = n_images;
    pixels = avl__alloc_floats((uint64_t)n_pass * 3 * (uint64_t)clip->image_size * (uint64_t)clip->image_size);
    if (!pixels) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d images", n_pass);
    for (i = 0; i < n_images && !status; i += n) {
        n = n_images - i < n_pass ? n_images - i : n_pass;
        status = avl__embed_image_pass(s, images + i, n, pixels, embeddings + (size_t)i * (size_t)n_dims, err);
    }
    astrovl_free(pixels);
    if (!status && normalize) avl__normalize_rows(embeddings, n_images, n_dims);
    return status;
}

// Appends a text's tokens, cut to the tower's positions.  *length: out, how many
static astrovl_status avl__clip_tokens(const astrovl_model *m, const char *text, avl__tokens *tokens, int *length, astrovl_error *err) {
    size_t before = tokens->size, n_ctx = (size_t)m->clip_text.n_ctx;
    astrovl_status status = avl__vocab_encode(&m->clip_vocab, text, strlen(text), ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL, tokens, err);
    if (status) return status;
    if (tokens->size - before > n_ctx) {
        tokens->size = before + n_ctx;
        tokens->data[tokens->size - 1] = m->clip_vocab.eos;
    }
    *length = (int)(tokens->size - before);
    return ASTROVL_OK;
}

// One pass over the first texts, as many as fit.  lengths: [n_texts], scratch;   *n_done: out
static astrovl_status avl__embed_text_pass(astrovl_session *s, const char *const *texts, int n_texts, int *lengths, int *n_done,
                                           float *embeddings, astrovl_error *err) {
    const astrovl_model *m = s->model;
    avl__tokens tokens = {NULL, 0, 0};
    astrovl_status status = ASTROVL_OK;
    int n;
    for (n = 0; n < n_texts && tokens.size < AVL__JOINT_ROWS && !(n > 0 && s->run->tap) && !status; n++)
        status = texts[n] ? avl__clip_tokens(m, texts[n], &tokens, &lengths[n], err)
                          : avl__fail(err, ASTROVL_ERROR_ARGUMENT, "text %d is NULL", n);
    if (!status) status = avl__clip_embed_texts(&m->clip_text, s->run, tokens.data, lengths, n, m->clip_vocab.eos, embeddings, err);
    astrovl_free(tokens.data);
    *n_done = n;
    return status;
}

ASTROVL_API astrovl_status astrovl_embed_texts(astrovl_session *s, const char *const *texts, int n_texts, int normalize,
                                               float *embeddings, astrovl_error *err) {
    int i, n = 0, n_dims = avl__n_embd_joint(s->model), *lengths;
    astrovl_status status = avl__need_joint_text(s->model, err);
    if (status) return status;
    if (n_texts < 0 || (n_texts > 0 && (!texts || !embeddings)))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "astrovl_embed_texts needs texts and room for their embeddings");
    lengths = (int *)avl__alloc((uint64_t)n_texts, sizeof *lengths);
    if (!lengths) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d texts", n_texts);
    for (i = 0; i < n_texts && !status; i += n)
        status = avl__embed_text_pass(s, texts + i, n_texts - i, lengths, &n, embeddings + (size_t)i * (size_t)n_dims, err);
    astrovl_free(lengths);
    if (!status && normalize) avl__normalize_rows(embeddings, n_texts, n_dims);
    return status;
}

ASTROVL_API int astrovl_clip_tokenize(const astrovl_model *model, const char *text, size_t size, int32_t *tokens, int capacity,
                                      astrovl_error *err) {
    if (avl__need_joint_text(model, err) != ASTROVL_OK) return -1;
    return avl__tokenize(&model->clip_vocab, text, size, ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL, tokens, capacity, err);
}

// cosines[j] of an image with texts [n_texts], through embeddings [1 + n_texts][n_dims]
static astrovl_status avl__score(astrovl_session *s, const astrovl_image *image, const char *const *texts, int n_texts, float *embeddings,
                                 float *cosines, astrovl_error *err) {
    int n_dims = avl__n_embd_joint(s->model), j;
    astrovl_status status = astrovl_embed_images(s, image, 1, 1, embeddings, err);
    if (!status) status = astrovl_embed_texts(s, texts, n_texts, 1, embeddings + n_dims, err);
    for (j = 0; j < n_texts && !status; j++) cosines[j] = avl__dot_portable(embeddings, embeddings + (size_t)(j + 1) * (size_t)n_dims, n_dims);
    return status;
}

ASTROVL_API astrovl_status astrovl_score(const astrovl_model *model, const astrovl_image *image, const char *const *texts,
                                         int n_texts, float *cosines, float *probabilities, astrovl_error *err) {
    astrovl_session *s;
    float *embeddings;
    astrovl_status status;
    int j;
    if (n_texts < 1 || !cosines) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "astrovl_score needs texts and room for their cosines");
    embeddings = avl__alloc_floats(((uint64_t)n_texts + 1) * (uint64_t)avl__n_embd_joint(model));
    if (!embeddings) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d embeddings", n_texts);
    s = astrovl_session_new(model, NULL, err);
    status = s ? avl__score(s, image, texts, n_texts, embeddings, cosines, err) : ASTROVL_ERROR_MEMORY;
    astrovl_session_free(s);
    astrovl_free(embeddings);
    if (!status && probabilities) {
        for (j = 0; j < n_texts; j++) probabilities[j] = model->logit_scale * cosines[j];
        astrovl_softmax(probabilities, n_texts);
    }
    return status;
}

// ---- search --------------------------------------------------------------------------------------------------------
// Each thread goes through its slices of the rows and keeps the best k of each in a heap, the worst on top.

static int avl__hit_is_better(astrovl_hit a, astrovl_hit b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// Puts `hit` where hits[at] was, the n hits being a heap but for that place.
static void avl__hits_sink(astrovl_hit *hits, int n, int at, astrovl_hit hit) {
    int child;
    while ((child = 2 * at + 1) < n) {
        if (child + 1 < n && avl__hit_is_better(hits[child], hits[child + 1])) child++;
        if (!avl__hit_is_better(hit, hits[child])) break;
        hits[at] = hits[child];
        at = child;
    }
    hits[at] = hit;
}

// Keeps the best k of all that were offered.
static void avl__hits_offer(astrovl_hit *hits, int *n, int k, astrovl_hit hit) {
    if (*n == k) {
        if (avl__hit_is_better(hit, hits[0])) avl__hits_sink(hits, k, 0, hit);
    } else {
        int at = (*n)++;
        for (; at > 0 && avl__hit_is_better(hits[(at - 1) / 2], hit); at = (at - 1) / 2) hits[at] = hits[(at - 1) / 2];
        hits[at] = hit;
    }
}

typedef struct avl__search {
    const avl__kernels *kernels;
    const uint8_t      *rows;
    const float        *query;
    int64_t             n_rows;
    int                 n_dims, k, n_slices;
    astrovl_hit        *hits;       // [n_slices][k]
    int                *n_hits;     // [n_slices]
} avl__search;

static void avl__search_slice(void *context, int slice, int thread) {
    const avl__search *search = (const avl__search *)context;
    int64_t row = search->n_rows * slice / search->n_slices, end = search->n_rows * (slice + 1) / search->n_slices;
    astrovl_hit *hits = search->hits + (size_t)slice * (size_t)search->k, hit;
    (void)thread;
    for (; row < end; row++) {
        hit.row = row;
        hit.score = search->kernels->dot_f16(search->rows + (size_t)row * 2 * (size_t)search->n_dims, search->query, search->n_dims);
        if (!(hit.score >= -FLT_MAX)) hit.score = -FLT_MAX;   // not a number: a row of a damaged index comes last
        avl__hits_offer(hits, &search->n_hits[slice], search->k, hit);
    }
}

// The slices' hits joined into the first slice's, best first; returns how many.
static int avl__search_join(avl__search *search, astrovl_hit *hits) {
    int n = 0, slice, i;
    for (slice = 0; slice < search->n_slices; slice++)
        for (i = 0; i < search->n_hits[slice]; i++) avl__hits_offer(hits, &n, search->k, search->hits[(size_t)slice * (size_t)search->k + (size_t)i]);
    for (i = n - 1; i > 0; i--) {   // the worst of the heap goes to its end, again and again
        astrovl_hit worst = hits[0], last = hits[i];
        avl__hits_sink(hits, i, 0, last);
        hits[i] = worst;
    }
    return n;
}

ASTROVL_API int astrovl_search(const void *rows, int64_t n_rows, int n_dims, const float *query, int k, int n_threads,
                               astrovl_hit *hits, astrovl_error *err) {
    avl__search search;
    int64_t slice_rows = k > 4096 ? k : 4096;
    int n = -1;
    avl__pool *pool;
    if (n_rows < 0 || n_dims < 1 || k < 1 || n_threads < 0 || !query || !hits || (n_rows > 0 && !rows) ||
        (uint64_t)n_rows > SIZE_MAX / 2 / (uint64_t)n_dims) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "astrovl_search needs rows, a query and room for k hits");
        return -1;
    }
    memset(&search, 0, sizeof search);
    search.kernels = avl__choose_kernels(ASTROVL_FAST, NULL);
    search.rows = (const uint8_t *)rows;
    search.query = query;
    search.n_rows = n_rows;
    search.n_dims = n_dims;
    search.k = k;
    search.n_slices = n_rows / slice_rows > 256 ? 256 : n_rows / slice_rows > 1 ? (int)(n_rows / slice_rows) : 1;
    pool = avl__pool_new(n_threads ? n_threads : avl__n_processors());
    search.hits = (astrovl_hit *)avl__alloc_raw((uint64_t)search.n_slices * (uint64_t)k, sizeof *search.hits);
    search.n_hits = (int *)avl__alloc((uint64_t)search.n_slices, sizeof *search.n_hits);
    if (pool && search.hits && search.n_hits) {
        avl__pool_run(pool, avl__search_slice, &search, search.n_slices);
        n = avl__search_join(&search, hits);
    } else avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a search");
    if (pool) avl__pool_free(pool);
    astrovl_free(search.hits);
    astrovl_free(search.n_hits);
    return n;
}

enum { AVL__READ_SLICES = 64 };

typedef struct avl__read {
    const avl__kernels *kernels;
    const uint8_t      *data;
    size_t              size;
    uint64_t            sums[AVL__READ_SLICES];
} avl__read;

static void avl__read_slice(void *context, int slice, int thread) {
    avl__read *read = (avl__read *)context;
    size_t step = read->size / AVL__READ_SLICES, at = step * (size_t)slice;
    (void)thread;
    read->sums[slice] = avl__read_portable(read->data + at, slice == AVL__READ_SLICES - 1 ? read->size - at : step);
}

ASTROVL_API double astrovl_measure_read(const void *data, size_t size, int n_threads) {
    avl__read read;
    double start, seconds;
    volatile uint64_t keep = 0;   // so that no compiler leaves the reading out
    int i;
    avl__pool *pool = avl__pool_new(n_threads > 0 ? n_threads : avl__n_processors());
    if (!pool) return 0.0;
    memset(&read, 0, sizeof read);
    read.kernels = avl__choose_kernels(ASTROVL_FAST, NULL);
    read.data = (const uint8_t *)data;
    read.size = size;
    start = avl__seconds();
    avl__pool_run(pool, avl__read_slice, &read, AVL__READ_SLICES);
    seconds = avl__seconds() - start;
    for (i = 0; i < AVL__READ_SLICES; i++) keep = keep + read.sums[i];
    avl__pool_free(pool);
    return seconds;
}

// ---- metrics -------------------------------------------------------------------------------------------------------

// -log softmax(scale * x . items)[i], summed over the n pairs (x, items[i])
static double avl__cross_entropy(const float *queries, const float *items, int n, int n_dims, float scale) {
    double total = 0.0;
    int i, j;
    for (i = 0; i < n; i++) {
        const float *query = queries + (size_t)i * (size_t)n_dims;
        double own = (double)scale * (double)avl__dot_portable(query, items + (size_t)i * (size_t)n_dims, n_dims), sum = 0.0;
        for (j = 0; j < n; j++)
            sum += avl__exp((double)scale * (double)avl__dot_portable(query, items + (size_t)j * (size_t)n_dims, n_dims) - own);
        total += sum <= DBL_MAX ? avl__log(sum) : sum;
    }
    return total;
}

ASTROVL_API double astrovl_contrastive_loss(const float *images, const float *texts, int n, int n_dims, float logit_scale) {
    if (n < 1) return 0.0;
    return (avl__cross_entropy(images, texts, n, n_dims, logit_scale) + avl__cross_entropy(texts, images, n, n_dims, logit_scale)) /
           (2.0 * n);
}

ASTROVL_API void astrovl_retrieval_ranks(const float *queries, const float *items, int n, int n_dims, int32_t *ranks) {
    int i, j;
    for (i = 0; i < n; i++) {
        const float *query = queries + (size_t)i * (size_t)n_dims;
        float own = avl__dot_portable(query, items + (size_t)i * (size_t)n_dims, n_dims);
        ranks[i] = 0;
        for (j = 0; j < n; j++) {
            float other = avl__dot_portable(query, items + (size_t)j * (size_t)n_dims, n_dims);
            ranks[i] += other > own || (other == own && j < i);
        }
    }
}

ASTROVL_API double astrovl_top_k_accuracy(const int32_t *ranks, int n, double percent) {
    // A hundredth of a percent of rounding must not lose a rank: 0.07 * 100 is a little less than 7 in binary.
    double limit = percent / 100.0 * n * (1.0 + 1e-12);
    int found = 0, i;
    for (i = 0; i < n; i++) found += (double)ranks[i] + 1.0 <= limit;   // ranks[i] < floor(limit)
    return n > 0 ? (double)found / n : 0.0;
}


// ====================================================================================================================
// [14] Measuring
// A speed says little by itself: machines differ, and change with the hour. So each is held against what the same machine could do
// at most, measured beside it. Reading an image or a prompt is bound by arithmetic, so its limit is the processor's, in registers
// alone; writing needs every weight for each token, so its limit is reading them from memory.
// How good a model is: its logits beside a reference's, its embeddings of pairs, the words of its answers.
// ====================================================================================================================

ASTROVL_API double astrovl_seconds(void) { return avl__seconds(); }

enum { AVL__PEAK_ITEMS = 8 };   // for each thread: one that is late has less to do

typedef struct avl__peak {
    const avl__kernels *kernels;
    int                 type;
    int64_t             n;                                            // rounds of an item
    double              made[AVL__PEAK_ITEMS * ASTROVL_MAX_THREADS];  // operations, by item
} avl__peak;

static void avl__peak_item(void *context, int item, int thread) {
    avl__peak *peak = (avl__peak *)context;
    (void)thread;
    peak->made[item] = avl__peak_portable(peak->type, peak->n);
}

// Rounds are doubled until they take 20 ms, so that threads are awake and clocks up; then the best of five counts.
static double avl__measure_peak(const avl__kernels *kernels, avl__pool *pool, int type) {
    const int n_items = AVL__PEAK_ITEMS * avl__pool_n_threads(pool);
    double best = 0.0, operations, start, seconds;
    avl__peak peak;
    int i, left = 5;
    memset(&peak, 0, sizeof peak);
    peak.kernels = kernels;
    peak.type = type;
    for (peak.n = 256; left > 0 && peak.n < (int64_t)1 << 40;) {
        start = avl__seconds();
        avl__pool_run(pool, avl__peak_item, &peak, n_items);
        seconds = avl__seconds() - start;
        if (seconds < 0.02) { peak.n *= 2; continue; }
        for (operations = 0.0, i = 0; i < n_items; i++) operations += peak.made[i];
        if (operations / seconds > best) best = operations / seconds;
        left--;
    }
    return best;
}

ASTROVL_API double astrovl_measure_peak(int type, const char *isa, int n_threads) {
    const avl__kernels *kernels = avl__choose_kernels(ASTROVL_FAST, isa);
    avl__pool *pool = kernels && avl__find_type(type) ? avl__pool_new(n_threads > 0 ? n_threads : avl__n_processors()) : NULL;
    double best = pool ? avl__measure_peak(kernels, pool, type) : 0.0;
    avl__pool_free(pool);
    return best;
}

// The language model's matrices, by number: seven of each layer, and last the output matrix.
static const avl__linear *avl__llama_matrix(const avl__llama *m, int i) {
    const avl__llama_layer *layer = &m->layers[i / 7];
    if (i == 7 * m->n_layer) return &m->output;
    switch (i % 7) {
    case 0: return &layer->q;
    case 1: return &layer->k;
    case 2: return &layer->v;
    case 3: return &layer->o;
    case 4: return &layer->gate;
    case 5: return &layer->up;
    default: return &layer->down;
    }
}

enum { AVL__MATRIX_SLICES = 8 };

typedef struct avl__read_weights {
    const avl__kernels *kernels;
    const avl__llama   *model;
    uint64_t            sums[ASTROVL_MAX_THREADS];   // the readers' results, which nobody wants
} avl__read_weights;

static void avl__read_weights_item(void *context, int item, int thread) {
    avl__read_weights *read = (avl__read_weights *)context;
    const avl__linear *w = avl__llama_matrix(read->model, item / AVL__MATRIX_SLICES);
    size_t size = (size_t)w->n_out * w->row_bytes, step = size / AVL__MATRIX_SLICES, slice = (size_t)item % AVL__MATRIX_SLICES;
    read->sums[thread] += avl__read_portable((const uint8_t *)w->weight + slice * step,
                                              slice == AVL__MATRIX_SLICES - 1 ? size - slice * step : step);
}

// Seconds that reading all weights which a token needs takes, where they lie.
static double avl__measure_weights(const avl__kernels *kernels, avl__pool *pool, const avl__llama *model) {
    avl__read_weights read;
    double start = avl__seconds();
    memset(&read, 0, sizeof read);
    read.kernels = kernels;
    read.model = model;
    avl__pool_run(pool, avl__read_weights_item, &read, (7 * model->n_layer + 1) * AVL__MATRIX_SLICES);
    return avl__seconds() - start;
}

// One product for each weight and row; for attention, head_dim to score a pair of positions and head_dim to mix it in.
static double avl__n_weights(const avl__linear *w) { return (double)w->n_in * w->n_out; }

static double avl__prompt_work(const avl__llama *m, int n_prompt) {
    double products = avl__n_weights(&m->output), n = n_prompt;   // logits of the last position alone
    int i;
    for (i = 0; i < 7 * m->n_layer; i++) products += n * avl__n_weights(avl__llama_matrix(m, i));
    return 2.0 * (products + 2.0 * m->n_layer * m->n_head * m->head_dim * n * (n + 1.0) / 2.0);
}

static double avl__weights_bytes(const avl__llama *m) {
    double n_bytes = 0.0;
    int i;
    for (i = 0; i <= 7 * m->n_layer; i++) n_bytes += (double)avl__llama_matrix(m, i)->n_out * (double)avl__llama_matrix(m, i)->row_bytes;
    return n_bytes;
}

// Bytes of one position of the KV cache.
static double avl__position_bytes(const astrovl_session *s) {
    const avl__llama *m = &s->model->llama;
    return 2.0 * m->n_layer * m->n_head_kv * m->head_dim * (double)s->cache.value_bytes;
}

// Token i sees n_prompt + i + 1 positions.
static double avl__answer_work(const astrovl_session *s, int n_prompt, int n_answer) {
    const double n = n_answer, n_positions = n * n_prompt + n * (n + 1.0) / 2.0;
    return n * avl__weights_bytes(&s->model->llama) + n_positions * avl__position_bytes(s);
}

static double avl__image_work(const astrovl_model *m) {
    const avl__tower *t = &m->clip.tower;
    double n = m->clip.n_patches, rows = n + 1.0, products = n * avl__n_weights(&m->clip.patch_embd);
    int i;
    for (i = 0; i < (m->n_projector ? m->clip.n_run : t->n_layer); i++) {
        const avl__tower_layer *layer = &t->layers[i];
        products += rows * (avl__n_weights(&layer->q) + avl__n_weights(&layer->k) + avl__n_weights(&layer->v) +
                            avl__n_weights(&layer->out) + avl__n_weights(&layer->fc1) + avl__n_weights(&layer->fc2));
        products += 2.0 * rows * rows * t->n_embd;
    }
    for (i = 0; i < m->n_projector; i++) products += n * avl__n_weights(&m->projector[i]);
    return 2.0 * products;
}

// Any picture.
static void avl__paint(astrovl_image *image) {
    int64_t i;
    for (i = 0; image->rgb && i < (int64_t)image->width * image->height * 3; i++) image->rgb[i] = (unsigned char)(i >> 8 ^ i);
}

// rows: room for the image's rows (or its one embedding) and ASTROVL_QUESTION more;  logits: [n_vocab]
static astrovl_status avl__measure_image(astrovl_session *s, float *rows, float *logits, astrovl_speed *speed, astrovl_error *err) {
    const int n = s->model->clip.n_patches + ASTROVL_QUESTION;
    astrovl_image image = {640, 480, NULL, 1};
    astrovl_status status = ASTROVL_OK;
    double start;
    image.rgb = (unsigned char *)avl__alloc_raw(640 * 480, 3);
    if (!image.rgb) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for an image");
    avl__paint(&image);
    astrovl_session_reset(s);
    start = avl__seconds();
    if (s->model->n_projector) status = astrovl_encode_image(s, &image, rows, err);
    else status = astrovl_embed_images(s, &image, 1, 0, rows, err);
    speed->image.seconds = avl__seconds() - start;
    if (!status && s->model->n_projector && n <= s->cache.n_ctx) {
        status = astrovl_eval_embeddings(s, rows, n, logits, 1, err);
        speed->first_token_seconds = avl__seconds() - start;
    }
    astrovl_session_reset(s);
    astrovl_image_free(&image);
    return status;
}

// After each token of the answer the weights are read once more, alone: memory may be twice as fast a second later.
// tokens: [speed->prompt.n]
static astrovl_status avl__measure_text(astrovl_session *s, const int32_t *tokens, float *logits, astrovl_speed *speed,
                                        astrovl_error *err) {
    astrovl_status status;
    double start = avl__seconds(), reading = 0.0;
    int i;
    status = astrovl_eval_tokens(s, tokens, speed->prompt.n, logits, 1, err);
    speed->prompt.seconds = avl__seconds() - start;
    for (i = 0; i < speed->answer.n && !status; i++) {
        start = avl__seconds();
        status = astrovl_eval_tokens(s, tokens + i % speed->prompt.n, 1, logits, 1, err);
        speed->answer.seconds += avl__seconds() - start;
        reading += avl__measure_weights(s->run->kernels, s->run->pool, &s->model->llama);
    }
    if (reading > 0.0) speed->answer.limit = speed->answer.n * avl__weights_bytes(&s->model->llama) / reading;
    astrovl_session_reset(s);
    return status;
}

// Cuts what is to be read and written to a context of two positions or more.
static void avl__measure_cut(int n_ctx, int *n_prompt, int *n_answer) {
    if (*n_answer > n_ctx - 1) *n_answer = n_ctx - 1;
    if (*n_prompt > n_ctx - *n_answer) *n_prompt = n_ctx - *n_answer;
}

// What is to be measured of the language model, and how much work it is.
static void avl__measure_prepare(const astrovl_session *s, int n_prompt, int n_answer, astrovl_speed *speed) {
    const avl__llama *m = &s->model->llama;
    int n_ctx = s->cache.n_ctx, n = s->model->n_projector ? s->model->clip.n_patches + ASTROVL_QUESTION : 0;
    avl__measure_cut(n_ctx, &n_prompt, &n_answer);
    speed->answer.n = n_answer;
    speed->prompt.n = n_prompt;
    speed->prompt.work = avl__prompt_work(m, speed->prompt.n);
    speed->answer.work = avl__answer_work(s, speed->prompt.n, speed->answer.n);
    speed->prompt.type = speed->answer.type = m->layers[0].up.type;
    if (n > n_ctx || n < speed->prompt.n + speed->answer.n) n = speed->prompt.n + speed->answer.n;
    speed->cache_bytes = (uint64_t)(n * avl__position_bytes(s));
}

static void avl__measure_peaks(const astrovl_session *s, astrovl_speed *speed) {
    const avl__kernels *kernels = s->run->kernels;
    if (speed->prompt.n) speed->prompt.limit = avl__measure_peak(kernels, s->run->pool, speed->prompt.type);
    if (speed->image.n) speed->image.limit = avl__measure_peak(kernels, s->run->pool, speed->image.type);
}

static astrovl_status avl__measure_round(astrovl_session *s, int n_prompt, int n_answer, astrovl_speed *speed, astrovl_error *err) {
    const astrovl_model *m = s->model;
    astrovl_status status = ASTROVL_OK;
    int32_t *tokens;
    float *rows, *logits;
    int i;
    memset(speed, 0, sizeof *speed);
    if (n_prompt < 1 || n_answer < 1 || (m->has_text && s->cache.n_ctx < 2))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "measuring needs a position to read and one to write");
    if (m->has_text) avl__measure_prepare(s, n_prompt, n_answer, speed);
    if ((m->has_text && m->n_projector) || (m->has_vision && !m->n_projector && m->clip.has_joint)) {
        speed->image.n = 1;
        speed->image.work = avl__image_work(m);
        speed->image.type = m->clip.tower.layers[0].fc1.type;
    }
    if (!m->has_text && !speed->image.n)
        return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: neither a language model nor a whole vision tower to measure",
                         astrovl_gguf_name(m->weights.files[0]));
    rows = avl__alloc_floats((uint64_t)(m->clip.n_patches + ASTROVL_QUESTION) * (uint64_t)m->llama.n_embd +
                             (uint64_t)avl__n_embd_joint(m));
    logits = avl__alloc_floats((uint64_t)m->llama.n_vocab);
    tokens = (int32_t *)avl__alloc((uint64_t)speed->prompt.n, sizeof *tokens);
    if (!rows || !logits || !tokens) status = avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for measuring");
    for (i = 0; !status && i < speed->prompt.n; i++) tokens[i] = (int32_t)((int64_t)i * 7919 % m->llama.n_vocab);
    if (!status && speed->image.n) status = avl__measure_image(s, rows, logits, speed, err);
    if (!status && m->has_text) status = avl__measure_text(s, tokens, logits, speed, err);
    if (!status) avl__measure_peaks(s, speed);
    for (i = 0; i < astrovl_n_files(m); i++) speed->file_bytes += astrovl_gguf_size(astrovl_file(m, i));
    speed->peak_bytes = avl__peak_memory();
    astrovl_free(rows);
    astrovl_free(logits);
    astrovl_free(tokens);
    return status;
}

// Sorts the values.
static double avl__median(double *values, int n) {
    int i, k;
    for (i = 1; i < n; i++) {
        double value = values[i];
        for (k = i; k > 0 && values[k - 1] > value; k--) values[k] = values[k - 1];
        values[k] = value;
    }
    return (values[(n - 1) / 2] + values[n / 2]) / 2.0;
}

ASTROVL_API astrovl_status astrovl_measure_model(astrovl_session *s, int n_prompt, int n_answer, int n_rounds,
                                                 astrovl_progress progress, void *user, astrovl_speed *speed, astrovl_error *err) {
    astrovl_pace *const paces[3] = {&speed->image, &speed->prompt, &speed->answer};
    astrovl_status status = ASTROVL_OK;
    double *all;                                   // [3][seconds, limit, reached][n_rounds], and [n_rounds] for the first token
    int i, k;
    if (n_rounds < 1) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "measuring needs a round at least");
    all = (double *)avl__alloc((uint64_t)n_rounds, 10 * sizeof *all);
    if (!all) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d rounds", n_rounds);
    for (i = 0; i < n_rounds && !status; i++) {
        if (progress && progress(user, "rounds", i, n_rounds)) status = avl__fail(err, ASTROVL_CANCELLED, "measuring was cancelled");
        if (!status) status = avl__measure_round(s, n_prompt, n_answer, speed, err);
        for (k = 0; k < 3 && !status; k++) {
            if (paces[k]->n == 0) continue;
            all[(3 * k + 0) * n_rounds + i] = paces[k]->seconds;
            all[(3 * k + 1) * n_rounds + i] = paces[k]->limit;
            all[(3 * k + 2) * n_rounds + i] = paces[k]->work / paces[k]->seconds / paces[k]->limit;
        }
        all[9 * n_rounds + i] = speed->first_token_seconds;
    }
    for (k = 0; k < 3 && !status; k++) {
        paces[k]->seconds = avl__median(all + (3 * k + 0) * n_rounds, n_rounds);
        paces[k]->limit = avl__median(all + (3 * k + 1) * n_rounds, n_rounds);
        paces[k]->reached = avl__median(all + (3 * k + 2) * n_rounds, n_rounds);
    }
    if (!status) speed->first_token_seconds = avl__median(all + 9 * n_rounds, n_rounds);
    astrovl_free(all);
    if (!status && progress) progress(user, "rounds", n_rounds, n_rounds);
    return status;
}

// Writes a token of each of n answers, which have n_past positions.  logits: scratch, [AVL__STEP_ROWS][n_vocab];  seconds: in, out
static astrovl_status avl__measure_step(const astrovl_session *s, avl__kv_cache *caches, int n, int n_past, float *logits, double *seconds,
                                        astrovl_error *err) {
    const avl__llama *m = &s->model->llama;
    astrovl_status status = ASTROVL_OK;
    avl__kv_cache *group[AVL__STEP_ROWS];
    int32_t tokens[AVL__STEP_ROWS];
    double start = avl__seconds();
    int i, k;
    for (i = 0; i < n && !status; i += k) {
        for (k = 0; k < AVL__STEP_ROWS && i + k < n; k++) {
            group[k] = &caches[i + k];
            group[k]->n_past = n_past;
            tokens[k] = (int32_t)((int64_t)(n_past + i + k) * 7919 % m->n_vocab);
        }
        status = avl__llama_eval(m, s->run, group, k, tokens, NULL, k, logits, k, err);
    }
    *seconds += avl__seconds() - start;
    return status;
}

// The rounds of astrovl_measure_batch.  caches: [speed->n], zeros;  logits: as above;  all: [3][n_rounds]
static astrovl_status avl__measure_together(const astrovl_session *s, avl__kv_cache *caches, float *logits, double *all, int n_rounds,
                                            astrovl_progress progress, void *user, astrovl_batch_speed *speed, astrovl_error *err) {
    const avl__llama *m = &s->model->llama;
    const int n_ctx = speed->n_prompt + speed->n_answer;
    const size_t size = (size_t)m->n_layer * m->n_head_kv * m->head_dim * n_ctx * s->cache.value_bytes;
    astrovl_status status = ASTROVL_OK;
    double *one = all, *together = all + n_rounds, *gain = all + 2 * n_rounds;
    int i, step;
    for (i = 0; i < speed->n; i++) {
        if (!avl__kv_cache_init(&caches[i], m, n_ctx, s->cache.value_bytes))
            return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the KV caches of %d answers", speed->n);
        memset(caches[i].k, 0x3C, size);           // numbers of middling size, as float16 (1.06) and as float (0.01)
        memset(caches[i].v, 0x3C, size);
    }
    speed->cache_bytes = (uint64_t)speed->n * 2 * size;
    for (i = 0; i < n_rounds && !status; i++) {
        if (progress && progress(user, "rounds", i, n_rounds)) status = avl__fail(err, ASTROVL_CANCELLED, "measuring was cancelled");
        one[i] = together[i] = 0.0;
        for (step = speed->n_prompt; step < n_ctx && !status; step++) {
            status = avl__measure_step(s, caches, 1, step, logits, &one[i], err);
            if (!status) status = avl__measure_step(s, caches, speed->n, step, logits, &together[i], err);
        }
        gain[i] = speed->n * one[i] / together[i];
    }
    if (status) return status;
    speed->one_seconds = avl__median(one, n_rounds);
    speed->seconds = avl__median(together, n_rounds);
    speed->gain = avl__median(gain, n_rounds);
    if (progress) progress(user, "rounds", n_rounds, n_rounds);
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_measure_batch(astrovl_session *s, int n_prompt, int n_answer, int n_batch, int n_rounds,
                                                 astrovl_progress progress, void *user, astrovl_batch_speed *speed,
                                                 astrovl_error *err) {
    astrovl_status status = avl__need_text(s->model, err);
    avl__kv_cache *caches;
    float *logits;
    double *all;
    int i;
    memset(speed, 0, sizeof *speed);
    if (status) return status;
    if (n_prompt < 1 || n_answer < 1 || n_batch < 1 || n_rounds < 1 || s->cache.n_ctx < 2)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "measuring needs a round, an answer, a position before it and one to write");
    avl__measure_cut(s->cache.n_ctx, &n_prompt, &n_answer);
    speed->n = n_batch, speed->n_prompt = n_prompt, speed->n_answer = n_answer;
    caches = (avl__kv_cache *)avl__alloc((uint64_t)n_batch, sizeof *caches);
    logits = avl__alloc_floats((uint64_t)AVL__STEP_ROWS * (uint64_t)s->model->llama.n_vocab);
    all = (double *)avl__alloc((uint64_t)n_rounds, 3 * sizeof *all);
    if (!caches || !logits || !all) status = avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for measuring %d answers", n_batch);
    else status = avl__measure_together(s, caches, logits, all, n_rounds, progress, user, speed, err);
    for (i = 0; caches && i < n_batch; i++) avl__kv_cache_free(&caches[i]);
    astrovl_free(caches);
    astrovl_free(logits);
    astrovl_free(all);
    return status;
}

// Random numbers of both signs, from 0.1 to 2, as float16.
static void avl__random_halves(uint8_t *rows, int64_t n) {
    uint64_t state = 1;
    for (; n > 0; n--, rows += 2) {
        int half = 0x2E00 + (int)(avl__random(&state) * 0xE00) + (avl__random(&state) < 0.5 ? 0x8000 : 0);
        rows[0] = (uint8_t)(half & 0xFF);
        rows[1] = (uint8_t)(half >> 8);
    }
}

ASTROVL_API astrovl_status astrovl_measure_search(int64_t n_rows, int n_dims, int n_rounds, int n_threads, double seconds[2],
                                                  astrovl_error *err) {
    astrovl_status status = ASTROVL_OK;
    astrovl_hit hits[10];
    uint8_t *rows;
    float *query;
    double *all;                                   // [search, reading][n_rounds]
    int i;
    if (n_rows < 1 || n_dims < 1 || n_rounds < 1 || n_rows > INT64_MAX / 2 / n_dims)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "measuring a search needs a row, a number in it and a round at least");
    rows = (uint8_t *)avl__alloc_raw((uint64_t)n_rows * n_dims, 2);
    query = avl__alloc_floats((uint64_t)n_dims);
    all = (double *)avl__alloc((uint64_t)n_rounds, 2 * sizeof *all);
    if (!rows || !query || !all) {
        status = ASTROVL_ERROR_MEMORY;
        avl__fail(err, status, "out of memory for %l rows", n_rows);
    }
    if (!status) avl__random_halves(rows, n_rows * n_dims);
    for (i = 0; i < n_dims && !status; i++) query[i] = astrovl_sinf((float)i);
    for (i = 0; i < n_rounds && !status; i++) {
        double start = avl__seconds();
        if (astrovl_search(rows, n_rows, n_dims, query, 10, n_threads, hits, err) < 0) status = ASTROVL_ERROR_MEMORY;
        all[i] = avl__seconds() - start;
        if (!status) all[n_rounds + i] = astrovl_measure_read(rows, (size_t)n_rows * n_dims * 2, n_threads);
    }
    for (i = 0; i < 2 && !status; i++) seconds[i] = avl__median(all + i * n_rounds, n_rounds);
    astrovl_free(rows);
    astrovl_free(query);
    astrovl_free(all);
    return status;
}

// -log softmax(logits)[token]
static double avl__surprise(const float *logits, int n, int32_t token) {
    double most = logits[0], sum = 0.0;
    int i;
    for (i = 1; i < n; i++) if (logits[i] > most) most = logits[i];
    for (i = 0; i < n; i++) sum += avl__exp(logits[i] - most);
    return sum <= DBL_MAX ? avl__log(sum) + most - logits[token] : sum;   // not finite: nor are the logits
}

// Adds a position to the sums.  a, b: [n];  next: the token that follows, or -1
static void avl__compare_logits(astrovl_likeness *sums, const float *a, const float *b, int n, int32_t next) {
    double aa = 0.0, bb = 0.0, ab = 0.0, cosine;
    int i, best_a = 0, best_b = 0;
    for (i = 0; i < n; i++) {
        double x = a[i], y = b[i], difference = x > y ? x - y : y - x;
        aa += x * x;
        bb += y * y;
        ab += x * y;
        if (difference > sums->difference) sums->difference = difference;
        if (a[i] > a[best_a]) best_a = i;
        if (b[i] > b[best_b]) best_b = i;
    }
    cosine = ab / sqrt(aa * bb);
    sums->cosine += cosine;
    if (cosine < sums->least_cosine) sums->least_cosine = cosine;
    sums->same += best_a == best_b;
    if (next >= 0) sums->perplexity += avl__surprise(a, n, next);
}

// From the sums over n positions to means.  reference: the other's perplexity
static void avl__finish_likeness(astrovl_likeness *sums, int n, double reference) {
    sums->cosine /= n;
    sums->same /= n;
    sums->perplexity = n > 1 ? avl__exp(sums->perplexity / (n - 1)) : HUGE_VAL - HUGE_VAL;
    sums->ratio = sums->perplexity / reference;
}

enum { AVL__ACCURACY_BLOCK = AVL__PROMPT_BLOCK };    // positions whose logits are held at once: so many are read together anyway

// Compares the next n of the tokens, at most a block.  logits: scratch, [2][n][n_vocab]
static astrovl_status avl__measure_likeness(astrovl_session *s, astrovl_session *reference, const int32_t *tokens, int n, int is_last,
                                            float *logits, astrovl_accuracy *sums, astrovl_error *err) {
    const int n_vocab = s->model->llama.n_vocab, n_past = s->cache.n_past;
    float *row = logits, *rows = logits + (size_t)n * n_vocab;         // s's, the reference's
    astrovl_status status = astrovl_eval_tokens(reference, tokens, n, rows, n, err);
    int i;
    for (i = 0; i < n && !status; i++, rows += n_vocab) {
        int32_t next = is_last && i == n - 1 ? -1 : tokens[i + 1];
        status = astrovl_eval_tokens(s, tokens + i, 1, row, 1, err);
        if (status) return status;
        avl__compare_logits(&sums->steps, row, rows, n_vocab, next);
        if (next >= 0) sums->reference_perplexity += avl__surprise(rows, n_vocab, next);
    }
    astrovl_session_rewind(s, n_past);
    if (!status) status = astrovl_eval_tokens(s, tokens, n, logits, n, err);
    if (status) return status;
    for (i = 0, rows -= (size_t)n * n_vocab; i < n; i++, row += n_vocab, rows += n_vocab)
        avl__compare_logits(&sums->prompt, row, rows, n_vocab, is_last && i == n - 1 ? -1 : tokens[i + 1]);
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_measure_accuracy(astrovl_session *s, astrovl_session *reference, const int32_t *tokens,
                                                    int n_tokens, astrovl_accuracy *accuracy, astrovl_error *err) {
    const int n_vocab = s->model->llama.n_vocab, block = n_tokens < AVL__ACCURACY_BLOCK ? n_tokens : AVL__ACCURACY_BLOCK;
    astrovl_status status = avl__need_text(s->model, err);
    float *logits;
    int done, n;
    memset(accuracy, 0, sizeof *accuracy);
    accuracy->prompt.least_cosine = accuracy->steps.least_cosine = 1.0;
    if (status) return status;
    if (!tokens || n_tokens < 1 || reference->model->llama.n_vocab != n_vocab || s == reference)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "accuracy needs a text, and two sessions with one vocabulary");
    logits = avl__alloc_floats((uint64_t)2 * block * n_vocab);
    if (!logits) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the logits of %d positions", block);
    astrovl_session_reset(s);
    astrovl_session_reset(reference);
    for (done = 0; done < n_tokens && !status; done += n) {
        n = n_tokens - done < block ? n_tokens - done : block;
        status = avl__measure_likeness(s, reference, tokens + done, n, done + n == n_tokens, logits, accuracy, err);
    }
    accuracy->reference_perplexity = n_tokens > 1 ? avl__exp(accuracy->reference_perplexity / (n_tokens - 1)) : HUGE_VAL - HUGE_VAL;
    avl__finish_likeness(&accuracy->prompt, n_tokens, accuracy->reference_perplexity);
    avl__finish_likeness(&accuracy->steps, n_tokens, accuracy->reference_perplexity);
    astrovl_session_reset(s);
    astrovl_session_reset(reference);
    astrovl_free(logits);
    return status;
}

// ---- how good a model is -------------------------------------------------------------------------------------------

static int avl__by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

// A permutation of 0 to n - 1 that is one cycle: no number stays where it is (Sattolo 1986).
static void avl__one_cycle(int32_t *order, int n) {
    uint64_t state = 1;
    int i;
    for (i = 0; i < n; i++) order[i] = i;
    for (i = n - 1; i > 0; i--) {
        int other = (int)(avl__random(&state) * i);
        int32_t t = order[i];
        order[i] = order[other];
        order[other] = t;
    }
}

ASTROVL_API astrovl_status astrovl_measure_retrieval(const float *images, const float *texts, int n, int n_dims, float logit_scale,
                                                     float *cosines, astrovl_retrieval *r, astrovl_error *err) {
    int32_t *order;                 // ranks, then each image's text
    int i, k;
    memset(r, 0, sizeof *r);
    if (n < 2 || n_dims < 1) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "retrieval is measured on two pairs or more");
    order = (int32_t *)avl__alloc((uint64_t)n, sizeof *order);
    if (!order) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d pairs", n);
    r->loss = astrovl_contrastive_loss(images, texts, n, n_dims, logit_scale);
    for (i = 0; i < 2; i++) {
        astrovl_retrieval_ranks(i ? texts : images, i ? images : texts, n, n_dims, order);
        for (k = 1; k <= 100; k++) r->share[i][k] = astrovl_top_k_accuracy(order, n, k);
    }
    for (i = 0; i < n; i++) order[i] = i;
    for (k = 0; k < 2; k++, cosines += n) {
        for (i = 0; i < n; i++) {
            astrovl_linear(&cosines[i], images + (size_t)i * n_dims, texts + (size_t)order[i] * n_dims, NULL, 1, n_dims, 1);
            r->mean[k] += cosines[i] / (double)n;
        }
        qsort(cosines, (size_t)n, sizeof *cosines, avl__by_value);
        r->median[k] = (cosines[(n - 1) / 2] + cosines[n / 2]) / 2.0;
        avl__one_cycle(order, n);
    }
    astrovl_free(order);
    return ASTROVL_OK;
}

// ASCII's letters and digits, the former made small; 0: another character
static int avl__letter(char c) { return c >= 'A' && c <= 'Z' ? c + 32 : (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ? c : 0; }

// The bytes of `word` if it stands at text[at] as whole words; otherwise 0.
static size_t avl__term_at(const char *text, size_t at, const char *word) {
    size_t n = strlen(word), i;
    if (at > 0 && avl__letter(text[at - 1]) && avl__letter(word[0])) return 0;
    for (i = 0; i < n; i++)
        if (text[at + i] != word[i] && (!avl__letter(word[i]) || avl__letter(text[at + i]) != avl__letter(word[i]))) return 0;
    return n && avl__letter(text[at + n]) && avl__letter(word[n - 1]) ? 0 : n;
}

ASTROVL_API int astrovl_first_named(const char *text, const char *const *words, int n) {
    size_t at, size, most = 0;
    int i, best = -1;
    for (at = 0; text[at] && best < 0; at++)
        for (i = 0; i < n; i++)
            if ((size = avl__term_at(text, at, words[i])) > most) most = size, best = i;
    return best;
}


// ====================================================================================================================
// [15] SIMD kernels
// The kernels of section [4] for processors with vector registers, written once. The second half of this section is a
// template: the header includes itself for each instruction set, with AVL__ISA (the suffix of every name) and AVL__W
// (32-bit lanes of a register) defined. Registers are the vector extensions of gcc and clang; an instruction set adds
// some twenty functions of a line or two.
//
// Algebra. Every block format stores 32 neighboring weights as
//     w[i] = d (u[i] - offset) + m        u[i] a byte; d and m floats of the block, or of each half of it
// and activations are rounded to x[i] = e q[i] with |q[i]| <= 127 and one e for 32 values. A block then contributes
//     sum w[i] x[i] = d e (sum u[i] q[i] - offset sum q[i]) + m e sum q[i].
// The first sum is a dot product of bytes, four columns at a time in a 32-bit lane (a "word": vpdpbusd, sdot). The
// others depend on the activations alone and are computed when these are rounded (avl__quants: bias, sum).
//
// Transposition. 16 bytes of each of AVL__W weight rows are transposed, four rows by four words in every 128 bits:
//     row 0:  a0 a1 a2 a3         w[0]:  a0 b0 c0 d0
//     row 1:  b0 b1 b2 b3    ->   w[1]:  a1 b1 c1 d1
//     row 2:  c0 c1 c2 c3         w[2]:  a2 b2 c2 d2
//     row 3:  d0 d1 d2 d3         w[3]:  a3 b3 c3 d3
// From there on a register holds the same word of AVL__W rows. Unpacking a format is shifts and masks on words, the
// same for every instruction set, and the sums of AVL__W rows lie side by side: no additions across a register.
//
// Three ways to multiply, which do the same float operations in the same order, so that a row's bits do not depend on
// how many rows are multiplied with it:
//   many rows (image, prompt)   32 weight rows are packed, then meet the activations in tiles of up to 6 rows (bf16:
//                               12) whose accumulators stay in registers. The dot-product instruction is the limit.
//   2 to 8 rows (batches)       the same with packs of eight blocks, which stay in the L1 cache. Unpacking is the
//                               limit.
//   one row (writing)           words are multiplied as they are unpacked; nothing is stored. Reading memory is the
//                               limit, so the weights that come next are prefetched.
// Tile sizes: 6 rows x 2 registers take 12 integer and 12 float accumulators, 2 registers of weights and 1 of
// activations, 27 of 32 (AVX2 with its 16 registers: 4 rows, float accumulators in memory). 2 loads of weights and 6
// broadcasts serve 12 multiplications. A pack of 4096 columns takes 160 KB of the L2 cache.
// ====================================================================================================================

#if AVL__SIMD

// `type`, `kind` and numbers of rows are constants wherever an AVL__INLINE function is called, so every format and tile
// is code of its own; AVL__UNROLL keeps arrays of registers in registers.
#define AVL__INLINE static inline __attribute__((always_inline))
#define AVL__APART  static __attribute__((noinline))
#if defined(__clang__)
#define AVL__UNROLL _Pragma("clang loop unroll(full)")
#else
#define AVL__UNROLL _Pragma("GCC unroll 16")
#endif
#define AVL__EACH(i, n) AVL__UNROLL for (i = 0; i < n; i++)

// How the 32-bit words of weights and activations are multiplied
enum {
    AVL__AS_BYTES,     // four columns, weights unsigned, activations signed
    AVL__AS_SIGNED,    // four columns, both signed: Q8_0, where the instruction set does not want them unsigned
    AVL__AS_PAIRS,     // two int16 columns: floats rounded to +-8191, one scale for 32, whose products fit in 32 bits
    AVL__AS_BF16,      // two bfloat16 columns, accumulated in float32
    AVL__AS_F32        // one float32 column
};

enum {
    AVL__PACK_ROWS = 32,      // weight rows of a pack
    AVL__MAX_TILE = 12,       // rows of activations of a tile, at most
    AVL__FEW = 8,             // rows of activations, at most, for packs of eight blocks
    AVL__AHEAD = 6144         // bytes to prefetch ahead in a row
};

AVL__INLINE int avl__words_of(int kind) { return kind == AVL__AS_F32 ? 32 : kind >= AVL__AS_PAIRS ? 16 : 8; }

AVL__INLINE uint32_t avl__word_at(const void *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

// The formats: name, type, bytes of eight blocks (of a super-block), and
//   offset    see above
//   n_parts   2: each half of a block has its own d and m
//   has_min   0: m is 0
//   run       words of four columns whose products u q add up in int16, as two sums; 0: none (Q8_0: see dot_signed)
#define AVL__BLOCK_TYPES(F) \
    F(q4_0, ASTROVL_TYPE_Q4_0, 8 * 18, 8, 1, 0, 8) \
    F(q4_1, ASTROVL_TYPE_Q4_1, 8 * 20, 0, 1, 1, 8) \
    F(q5_0, ASTROVL_TYPE_Q5_0, 8 * 22, 16, 1, 0, 4) \
    F(q5_1, ASTROVL_TYPE_Q5_1, 8 * 24, 0, 1, 1, 4) \
    F(q8_0, ASTROVL_TYPE_Q8_0, 8 * 34, 128, 1, 0, 0) \
    F(q2_k, ASTROVL_TYPE_Q2_K, 84, 0, 2, 1, 4) \
    F(q3_k, ASTROVL_TYPE_Q3_K, 110, 4, 2, 0, 2) \
    F(q4_k, ASTROVL_TYPE_Q4_K, 144, 0, 1, 1, 8) \
    F(q5_k, ASTROVL_TYPE_Q5_K, 176, 0, 1, 1, 4) \
    F(q6_k, ASTROVL_TYPE_Q6_K, 210, 32, 2, 0, 2)
#define AVL__FLOAT_TYPES(F) \
    F(f32, ASTROVL_TYPE_F32, 8 * 128, 0, 1, 0, 0) \
    F(f16, ASTROVL_TYPE_F16, 8 * 64, 0, 1, 0, 0) \
    F(bf16, ASTROVL_TYPE_BF16, 8 * 64, 0, 1, 0, 0)

typedef struct avl__block_form {
    size_t bytes;
    int    offset, n_parts, has_min, run;
} avl__block_form;

AVL__INLINE avl__block_form avl__block_form_of(int type) {
    avl__block_form f = {0, 0, 1, 0, 0};
#define AVL__FORM(name, type, ...) \
    case type: { \
        const avl__block_form form = {__VA_ARGS__}; \
        f = form; \
    } break;
    switch (type) {
    AVL__BLOCK_TYPES(AVL__FORM)
    AVL__FLOAT_TYPES(AVL__FORM)
    default: break;
    }
    return f;
}

AVL__INLINE int avl__is_k_quant(int type) { return type >= ASTROVL_TYPE_Q2_K && type <= ASTROVL_TYPE_Q6_K; }

// Blocks are unpacked eight at a time, b at first: where the eight begin. The last ones overlap those before them.
AVL__INLINE int avl__group_begin(int b, int n_blocks) { return b + 8 <= n_blocks || n_blocks < 8 ? b : n_blocks - 8; }

// Stores the n words of block b of row r of the activations.
AVL__INLINE void avl__store_words(const avl__quants *to, int r, int b, const void *words, int n) {
    const size_t block = (size_t)(r / to->group) * to->n_blocks + (size_t)b, stride = 4 * (size_t)to->group;
    int8_t *q = to->q + stride * (size_t)n * block + 4 * (r % to->group);
    int i;
    AVL__EACH(i, n) memcpy(q + stride * (size_t)i, (const uint8_t *)words + 4 * i, 4);
}

// Hardware prefetching stops at the end of a 4 KB page: if p lies in a page's first n bytes, the next page's first
// lines are asked for.
AVL__INLINE void avl__prefetch_page(const void *p, size_t n) {
    const char *next = (const char *)(((uintptr_t)p | 4095) + 1);
    int i;
    for (i = 0; i < 4 && ((uintptr_t)p & 4095) < n; i++) __builtin_prefetch(next + 64 * i, 0, 2);
}

AVL__INLINE void avl__prefetch_bytes(const char *p, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 3);
    avl__prefetch_page(p, n);
}

// Where n sums of each of n_rows rows will be stored, y[n_rows][stride]
AVL__INLINE void avl__prefetch_sums(const float *y, size_t stride, int n_rows, int n) {
    int r;
    for (r = 0; r < n_rows; r++, y += stride) {
        __builtin_prefetch(y, 0, 3);
        __builtin_prefetch(y + n / 2, 0, 3);
        __builtin_prefetch(y + n - 1, 0, 3);
    }
}

// The n weight rows to prefetch while rows out..out+n-1, of rows first..last-1, are multiplied: the next ones, or the
// first of the rows that this thread will probably be given next.
AVL__INLINE const char *avl__next_rows(const avl__product *p, int first, int last, int out, int n) {
    const int next = last - out >= 2 * n ? out + n : first + p->ahead;
    return (const char *)p->w->weight + (size_t)(next + n <= p->w->n_out ? next : out) * p->w->row_bytes;
}

// ---- the instances -------------------------------------------------------------------------------------------------

#define AVL__JOIN_2(name, isa) avl__##name##_##isa
#define AVL__JOIN(name, isa)   AVL__JOIN_2(name, isa)
#define AVL_(name)             AVL__JOIN(name, AVL__ISA)       // a name of this instance
#define AVL_BASE_(name)        AVL__JOIN(name, AVL__BASE)      // of the instance that it shares all but products with
#define AVL__DEFINE(result, name, parameters, ...) \
    AVL__INLINE result AVL_(name) parameters { return (result)(__VA_ARGS__); }
#define AVL__DEFINE_VOID(name, parameters, ...) \
    AVL__INLINE void AVL_(name) parameters { __VA_ARGS__; }
#define AVL__STRING_2(text)    #text
#define AVL__STRING(text)      AVL__STRING_2(text)
#define avl__vf                AVL_(vf)                        // a register of float32, uint32, int32, int16
#define avl__vu                AVL_(vu)
#define avl__vi                AVL_(vi)
#define avl__vs                AVL_(vs)

// Between these two, compilers may use the instructions of `target`.
#define AVL__PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define AVL__BEGIN(isa) AVL__PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define AVL__END        AVL__PRAGMA(clang attribute pop)
#else
#define AVL__BEGIN(isa) AVL__PRAGMA(GCC push_options) AVL__PRAGMA(GCC target(isa))
#define AVL__END        AVL__PRAGMA(GCC pop_options)
#endif

#ifndef ASTROVL_HEADER_NAME
#define ASTROVL_HEADER_NAME "astrovl.h"
#endif

// Every instance says whether its byte product adds up in 32 bits (AVL__WIDE), and may take all but the products from
// another instance (AVL__BASE).

#if AVL__X86

// The instructions of AVX-VNNI, by assembly: compilers learnt the intrinsics later. {vex} tells them from AVX-512's.
#if defined(ASTROVL_TEST_EVEX_VNNI)
#define AVL__VNNI(name) "%{evex%} " name " {%2, %1, %0|%0, %1, %2}"
#elif (defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && __GNUC__ >= 11)
#define AVL__VNNI(name) "%{vex%} " name " {%2, %1, %0|%0, %1, %2}"
#else
#define AVL__VNNI(name) ""              // older assemblers: the table is there, but never chosen
#endif

// Asked of the processor itself: compilers learnt the name later.
static int avl__has_avx_vnni(void) {
#if defined(ASTROVL_TEST_EVEX_VNNI)
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
    unsigned a = 7, b, c = 1, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return sizeof AVL__VNNI("") > 1 && (a >> 4 & 1);
#endif
}

// Two tables: only avx512_bf16 uses bfloat16 instructions (float_kind).
AVL__BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#define AVL__ISA  avx512
#define AVL__W    16
#define AVL__WIDE 1
#include ASTROVL_HEADER_NAME
AVL__END

AVL__BEGIN("avx2,fma,f16c")
#define AVL__ISA  avx2
#define AVL__W    8
#define AVL__WIDE 0
#include ASTROVL_HEADER_NAME
#define AVL__ISA  avx_vnni
#define AVL__BASE avx2
#define AVL__W    8
#define AVL__WIDE 1
#include ASTROVL_HEADER_NAME
AVL__END

#elif AVL__NEON

// sdot as a number: compilers and assemblers know the instruction only where all code may use it. .Lavl_v7 is 7.
#define AVL__SDOT ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t" \
                  ".equ .Lavl_v\\i,\\i\n\t.endr\n\t" \
                  ".inst 0x4E809400 + (.Lavl_%2 << 16) + (.Lavl_%1 << 5) + .Lavl_%0"

#define AVL__ISA  neon
#define AVL__W    4
#define AVL__WIDE 0
#include ASTROVL_HEADER_NAME
#define AVL__ISA  neon_dotprod
#define AVL__BASE neon
#define AVL__W    4
#define AVL__WIDE 1
#include ASTROVL_HEADER_NAME

#else

#define AVL__ISA  generic
#define AVL__W    4
#define AVL__WIDE 0
#include ASTROVL_HEADER_NAME

#endif
#endif  // AVL__SIMD

// ---- the choice at run time ----------------------------------------------------------------------------------------

// All tables of this build, the simplest first
static const avl__kernels *const avl__all_kernels[] = {
    &avl__kernels_portable,
#if AVL__SIMD && AVL__X86
    &avl__kernels_avx2, &avl__kernels_avx_vnni, &avl__kernels_avx512, &avl__kernels_avx512_bf16,
#elif AVL__SIMD && AVL__NEON
    &avl__kernels_neon, &avl__kernels_neon_dotprod,
#elif AVL__SIMD
    &avl__kernels_generic,
#endif
};

enum { AVL__N_KERNELS = sizeof avl__all_kernels / sizeof *avl__all_kernels };

// Does this processor, and its system, have what table i needs?
static int avl__kernels_run(int i) {
#if AVL__SIMD && AVL__X86
    if (i == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (i == 2) return avl__kernels_run(1) && avl__has_avx_vnni();
    if (i == 3)
        return avl__kernels_run(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    if (i == 4) return avl__kernels_run(3) && __builtin_cpu_supports("avx512bf16");
#elif AVL__SIMD && AVL__NEON && AVL__POSIX && defined(__linux__)
    if (i == 2) return (int)(getauxval(AT_HWCAP) >> 20 & 1);     // HWCAP_ASIMDDP
#elif AVL__SIMD && AVL__NEON && AVL__POSIX && defined(__APPLE__)
    if (i == 2) {
        int has = 0;
        size_t size = sizeof has;
        return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
    }
#endif
    return i < 2;
}

// The table for a mode: exact always runs the portable one, fast the best that this processor has, but none better than
// `isa` (NULL: no limit). NULL if there is no table of that name.
static const avl__kernels *avl__choose_kernels(astrovl_mode mode, const char *isa) {
    const avl__kernels *best = &avl__kernels_portable;
    int i;
    for (i = 0; i < AVL__N_KERNELS; i++) {
        if (avl__kernels_run(i)) best = avl__all_kernels[i];
        if (isa && strcmp(isa, avl__all_kernels[i]->name) == 0) break;
    }
    if (isa && i == AVL__N_KERNELS) return NULL;
    return mode == ASTROVL_EXACT ? &avl__kernels_portable : best;
}

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#endif // ASTROVL__IMPLEMENTED
#endif // ASTROVL_IMPLEMENTATION

#else   // AVL__ISA

// ====================================================================================================================
// The template of [15]: included once for each instance (AVL__ISA). AVL__WIDE: the byte product adds up in 32 bits.
// ====================================================================================================================

#ifndef AVL__BASE
#define AVL__BASE  AVL__ISA
#define AVL__WHOLE 1             // not only products, but vectors and attention, too
#endif

typedef float    avl__vf __attribute__((vector_size(4 * AVL__W)));
typedef uint32_t avl__vu __attribute__((vector_size(4 * AVL__W)));
typedef int32_t  avl__vi __attribute__((vector_size(4 * AVL__W)));
typedef int16_t  avl__vs __attribute__((vector_size(4 * AVL__W)));

// ---- registers -----------------------------------------------------------------------------------------------------

AVL__INLINE avl__vf AVL_(load)(const void *p) {
    avl__vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
AVL__DEFINE(avl__vu, load_words, (const void *p), AVL_(load)(p))
AVL__DEFINE_VOID(store, (void *p, avl__vf v), memcpy(p, &v, sizeof v))
AVL__DEFINE_VOID(store_words, (void *p, avl__vu v), memcpy(p, &v, sizeof v))
AVL__DEFINE(avl__vf, splat, (float x), x - __extension__(avl__vf){0})
AVL__DEFINE(avl__vi, splat_int, (int32_t x), x + __extension__(avl__vi){0})
AVL__DEFINE(avl__vu, splat_word, (const void *p), AVL_(splat_int)((int32_t)avl__word_at(p)))
AVL__DEFINE(avl__vf, to_float, (avl__vi v), __builtin_convertvector(v, avl__vf))

// ---- what instruction sets do by themselves ------------------------------------------------------------------------
// fma(a, b, c)              a b + c
// dot_bytes(acc, w, a)      acc + w a of four columns of bytes, w unsigned; if not AVL__WIDE acc is two int16, which
//                           widen(acc) adds up to an int32
// dot_signed, dot_pairs     the same of signed bytes, of two int16; acc always has 32 bits
// dot_bf16(acc, w, a)       of two bfloat16; acc is a float
// load_16(row, at)          16 bytes from byte `at` on of rows 0, 4, 8 ...
// zip_low32, zip_high32 ... words of a and b in turn, from the lower or the upper half of each 128 bits
// middle(a, b)              the upper half of each lane of a, below the lower half of b
// half(w), load_halves(p)   float16 to float: the lower half of each lane; AVL__W in memory
// round(x)                  to the nearest integer, |x| < 2^22;   scale_2(x, n): x 2^n
// load_some, store_some     the first n floats, n <= 0 and n > AVL__W included; loads fill up with zeros

#if AVL__W == 16

#define AVL__MM(name) _mm512_##name
#define AVL__INT      __m512i
#define AVL__TILE     6               // rows of activations whose integer and float accumulators fit in registers
#define AVL__TILE_SIZES(F) F(2) F(4) F(6) F(12)

AVL__DEFINE(avl__vi, dot_bytes, (avl__vi acc, avl__vu w, avl__vu a),
            _mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a))
AVL__DEFINE(avl__vi, dot_pairs, (avl__vi acc, avl__vu w, avl__vu a),
            _mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)a))
AVL__DEFINE(avl__vi, widen, (avl__vi acc), acc)
AVL__DEFINE(avl__vf, dot_bf16, (avl__vf acc, avl__vu w, avl__vu a), _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a))
AVL__DEFINE(avl__vu, to_bf16, (avl__vf first, avl__vf second), _mm512_cvtne2ps_pbh(second, first))
AVL__DEFINE(__mmask16, first_lanes, (int n), n >= 16 ? 0xFFFF : n > 0 ? (1 << n) - 1 : 0)
AVL__DEFINE(avl__vf, load_some, (const float *p, int n), _mm512_maskz_loadu_ps(AVL_(first_lanes)(n), p))
AVL__DEFINE_VOID(store_some, (float *p, int n, avl__vf v), _mm512_mask_storeu_ps(p, AVL_(first_lanes)(n), v))
AVL__DEFINE(float, add_lanes, (avl__vf v), _mm512_reduce_add_ps(v))
AVL__DEFINE(float, max_lanes, (avl__vf v), _mm512_reduce_max_ps(v))
AVL__DEFINE(avl__vf, round, (avl__vf x), _mm512_roundscale_ps(x, 8))
AVL__DEFINE(avl__vf, scale_2, (avl__vf x, avl__vf n), _mm512_scalef_ps(x, n))
AVL__DEFINE(avl__vf, half, (avl__vu w), _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)w)))
AVL__DEFINE(avl__vf, load_halves, (const void *p), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)))
AVL__DEFINE_VOID(store_halves, (void *p, avl__vf v), _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, 8)))
AVL__DEFINE(avl__vu, middle, (avl__vu a, avl__vu b),
            _mm512_rol_epi32(_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)b, (__m512i)a), 16))
AVL__INLINE avl__vu AVL_(pair_bf16)(avl__vf low, avl__vf high) {         // a column of each in a lane
    static const int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (avl__vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)AVL_(to_bf16)(low, high));
}
AVL__INLINE avl__vu AVL_(load_16)(const uint8_t *const *row, size_t at) {   // broadcasts, since insertions are shuffles
    __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(row[0] + at)));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, _mm_loadu_si128((const __m128i *)(const void *)(row[4] + at)));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, _mm_loadu_si128((const __m128i *)(const void *)(row[8] + at)));
    v = _mm512_mask_broadcast_i32x4(v, 0xF000, _mm_loadu_si128((const __m128i *)(const void *)(row[12] + at)));
    return (avl__vu)v;
}

#elif AVL__W == 8

#define AVL__MM(name) _mm256_##name
#define AVL__INT      __m256i
#define AVL__TILE     4
#define AVL__TILE_SIZES(F) F(2) F(4)

AVL__DEFINE(avl__vi, widen, (avl__vi acc), _mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)))
#if AVL__WIDE
AVL__INLINE avl__vi AVL_(dot_bytes)(avl__vi acc, avl__vu w, avl__vu a) {
    __asm__(AVL__VNNI("vpdpbusd") : "+x"(acc) : "x"(w), "x"(a));
    return acc;
}
AVL__INLINE avl__vi AVL_(dot_pairs)(avl__vi acc, avl__vu w, avl__vu a) {
    __asm__(AVL__VNNI("vpdpwssd") : "+x"(acc) : "x"(w), "x"(a));
    return acc;
}
#else           // empty assembly: add now, or gcc computes a block's products first and runs out of registers
AVL__INLINE avl__vi AVL_(dot_bytes)(avl__vi acc, avl__vu w, avl__vu a) {
    acc = (avl__vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
    __asm__("" : "+x"(acc));
    return acc;
}
AVL__INLINE avl__vi AVL_(dot_pairs)(avl__vi acc, avl__vu w, avl__vu a) {
    acc += (avl__vi)_mm256_madd_epi16((__m256i)w, (__m256i)a);
    __asm__("" : "+x"(acc));
    return acc;
}
AVL__INLINE avl__vi AVL_(dot_signed)(avl__vi acc, avl__vu w, avl__vu a) {   // |w| (a sign(w)): two of them fit in int16
    const __m256i signed_a = _mm256_sign_epi8((__m256i)a, (__m256i)w);
    acc += AVL_(widen)((avl__vi)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), signed_a));
    __asm__("" : "+x"(acc));
    return acc;
}
#endif
AVL__DEFINE(__m256i, first_lanes, (int n),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
AVL__DEFINE(avl__vf, load_some, (const float *p, int n),
            n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, AVL_(first_lanes)(n)))
AVL__DEFINE_VOID(store_some, (float *p, int n, avl__vf v),
            n >= 8 ? _mm256_storeu_ps(p, v) : _mm256_maskstore_ps(p, AVL_(first_lanes)(n), v))
AVL__INLINE float AVL_(add_lanes)(avl__vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
AVL__INLINE float AVL_(max_lanes)(avl__vf v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
AVL__DEFINE(avl__vf, round, (avl__vf x), _mm256_round_ps(x, 8))
AVL__INLINE avl__vf AVL_(half)(avl__vu w) {
    const __m256i v = _mm256_and_si256((__m256i)w, _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x88)));
}
AVL__DEFINE(avl__vf, load_halves, (const void *p), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)))
AVL__DEFINE_VOID(store_halves, (void *p, avl__vf v), _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, 0)))
AVL__INLINE avl__vu AVL_(middle)(avl__vu a, avl__vu b) {
    const __m128i swap = _mm_set_epi64x(0x0D0C0F0E09080B0A, 0x0504070601000302);
    const __m256i mixed = _mm256_blend_epi16((__m256i)b, (__m256i)a, 0xAA);
    return (avl__vu)_mm256_shuffle_epi8(mixed, _mm256_broadcastsi128_si256(swap));
}
AVL__DEFINE(avl__vu, load_16, (const uint8_t *const *row, size_t at),
            _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(const void *)(row[4] + at)),
                             _mm_loadu_si128((const __m128i *)(const void *)(row[0] + at))))

#else   // four lanes: NEON, or what the compiler makes of vectors (SSE2, VSX, LSX, WASM SIMD, RISC-V V)

#define AVL__TILE 6
#define AVL__TILE_SIZES(F) F(2) F(4) F(6)

#if AVL__WIDE
AVL__INLINE avl__vi AVL_(dot_bytes)(avl__vi acc, avl__vu w, avl__vu a) {
    __asm__(AVL__SDOT : "+w"(acc) : "w"(w), "w"(a));
    return acc;
}
AVL__DEFINE(avl__vi, dot_signed, (avl__vi acc, avl__vu w, avl__vu a), AVL_(dot_bytes)(acc, w, a))
AVL__DEFINE(avl__vi, widen, (avl__vi acc), acc)
#else
AVL__DEFINE(avl__vi, widen, (avl__vi acc), (acc << 16 >> 16) + (acc >> 16))
AVL__INLINE avl__vi AVL_(dot_bytes)(avl__vi acc, avl__vu w, avl__vu a) {
    const avl__vs even = (avl__vs)(w & 0x00FF00FFu) * ((avl__vs)(a << 8) >> 8);
    const avl__vs odd = (avl__vs)(w >> 8 & 0x00FF00FFu) * ((avl__vs)a >> 8);
    return (avl__vi)((avl__vs)acc + even + odd);
}
AVL__INLINE avl__vi AVL_(dot_signed)(avl__vi acc, avl__vu w, avl__vu a) {
    const avl__vs even = ((avl__vs)(w << 8) >> 8) * ((avl__vs)(a << 8) >> 8);
    const avl__vs odd = ((avl__vs)w >> 8) * ((avl__vs)a >> 8);
    return acc + AVL_(widen)((avl__vi)(even + odd));
}
#endif
AVL__INLINE avl__vf AVL_(load_some)(const float *p, int n) {
    avl__vf v = {0};
    if (n >= 4) memcpy(&v, p, sizeof v);
    else if (n > 0) memcpy(&v, p, 4 * (size_t)n);
    return v;
}
AVL__INLINE void AVL_(store_some)(float *p, int n, avl__vf v) {
    if (n >= 4) memcpy(p, &v, sizeof v);
    else if (n > 0) memcpy(p, &v, 4 * (size_t)n);
}
AVL__DEFINE(avl__vf, max, (avl__vf a, avl__vf b), ((avl__vi)a & (avl__vi)(a > b)) | ((avl__vi)b & ~(avl__vi)(a > b)))
AVL__DEFINE(avl__vf, min, (avl__vf a, avl__vf b), -AVL_(max)(-a, -b))
AVL__DEFINE(float, add_lanes, (avl__vf v), (v[0] + v[2]) + (v[1] + v[3]))
AVL__INLINE float AVL_(max_lanes)(avl__vf v) {
    const float low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
    return low > high ? low : high;
}
AVL__DEFINE(avl__vf, round, (avl__vf x), (x + 12582912.0f) - 12582912.0f)                 // floats of 2^23 are integers
AVL__DEFINE(avl__vu, middle, (avl__vu a, avl__vu b), a >> 16 | b << 16)
AVL__DEFINE(avl__vu, load_16, (const uint8_t *const *row, size_t at), AVL_(load_words)(row[0] + at))
AVL__DEFINE(avl__vu, zip_low32, (avl__vu a, avl__vu b), __extension__(avl__vu){a[0], b[0], a[1], b[1]})
AVL__DEFINE(avl__vu, zip_high32, (avl__vu a, avl__vu b), __extension__(avl__vu){a[2], b[2], a[3], b[3]})
AVL__DEFINE(avl__vu, zip_low64, (avl__vu a, avl__vu b), __extension__(avl__vu){a[0], a[1], b[0], b[1]})
AVL__DEFINE(avl__vu, zip_high64, (avl__vu a, avl__vu b), __extension__(avl__vu){a[2], a[3], b[2], b[3]})

#if AVL__NEON
AVL__DEFINE(avl__vf, fma, (avl__vf a, avl__vf b, avl__vf c), vfmaq_f32(c, a, b))
AVL__DEFINE(avl__vf, half, (avl__vu w), vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(w))))
AVL__DEFINE(avl__vf, load_halves, (const void *p), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))))
AVL__DEFINE_VOID(store_halves, (void *p, avl__vf v), vst1_u16((uint16_t *)p, vreinterpret_u16_f16(vcvt_f16_f32(v))))
#else
AVL__DEFINE(avl__vf, fma, (avl__vf a, avl__vf b, avl__vf c), a * b + c)
AVL__INLINE avl__vf AVL_(half)(avl__vu w) {       // without float32 denormals, which are slow on some processors
    const avl__vu exponent = w >> 10 & 31, is_normal = (avl__vu)(exponent != 0) & 1;
    const avl__vi mantissa = (avl__vi)((w & 1023) | is_normal << 10);
    const avl__vf power = (avl__vf)((exponent + 103 - is_normal) << 23);                  // 2^(max(exponent, 1) - 25)
    return (avl__vf)((avl__vu)(__builtin_convertvector(mantissa, avl__vf) * power) | (w & 0x8000) << 16);
}
AVL__INLINE avl__vf AVL_(load_halves)(const void *p) {
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return AVL_(half)(__extension__(avl__vu){h[0], h[1], h[2], h[3]});
}
AVL__INLINE void AVL_(store_halves)(void *p, avl__vf v) {
    uint16_t h[4];
    int i;
    for (i = 0; i < 4; i++) h[i] = astrovl_f32_to_f16(v[i]);
    memcpy(p, h, sizeof h);
}
#endif
#endif

#if AVL__W > 4
AVL__DEFINE(avl__vf, fma, (avl__vf a, avl__vf b, avl__vf c), AVL__MM(fmadd_ps)(a, b, c))
AVL__DEFINE(avl__vf, max, (avl__vf a, avl__vf b), AVL__MM(max_ps)(a, b))
AVL__DEFINE(avl__vf, min, (avl__vf a, avl__vf b), AVL__MM(min_ps)(a, b))
AVL__DEFINE(avl__vu, zip_low32, (avl__vu a, avl__vu b), AVL__MM(unpacklo_epi32)((AVL__INT)a, (AVL__INT)b))
AVL__DEFINE(avl__vu, zip_high32, (avl__vu a, avl__vu b), AVL__MM(unpackhi_epi32)((AVL__INT)a, (AVL__INT)b))
AVL__DEFINE(avl__vu, zip_low64, (avl__vu a, avl__vu b), AVL__MM(unpacklo_epi64)((AVL__INT)a, (AVL__INT)b))
AVL__DEFINE(avl__vu, zip_high64, (avl__vu a, avl__vu b), AVL__MM(unpackhi_epi64)((AVL__INT)a, (AVL__INT)b))
#undef AVL__MM
#undef AVL__INT
#endif

#if AVL__W < 16
AVL__INLINE avl__vf AVL_(scale_2)(avl__vf x, avl__vf n) {     // in two steps, so that x 2^n may be denormal or infinite
    const avl__vi whole = __builtin_convertvector(AVL_(min)(n, AVL_(splat)(160.0f)), avl__vi), half = whole >> 1;
    return x * (avl__vf)((half + 127) << 23) * (avl__vf)((whole - half + 127) << 23);
}
AVL__DEFINE(avl__vu, round_bf16, (avl__vf v), (avl__vu)v + 0x7FFF + ((avl__vu)v >> 16 & 1))
AVL__DEFINE(avl__vu, pair_bf16, (avl__vf low, avl__vf high),
            AVL_(round_bf16)(low) >> 16 | (AVL_(round_bf16)(high) & 0xFFFF0000u))
#endif

#define AVL__SIGNED_Q8 (AVL__W == 4 || !AVL__WIDE)       // VNNI wants unsigned weights

AVL__DEFINE(avl__vi, to_int, (avl__vf v), __builtin_convertvector(AVL_(round)(v), avl__vi))
AVL__DEFINE(avl__vf, abs, (avl__vf v), (avl__vu)v & 0x7FFFFFFFu)

AVL__INLINE avl__vi AVL_(dot_words)(int kind, avl__vi acc, avl__vu w, avl__vu a) {
#if AVL__SIGNED_Q8
    if (kind == AVL__AS_SIGNED) return AVL_(dot_signed)(acc, w, a);
#endif
#if AVL__W > 4
    if (kind == AVL__AS_PAIRS) return AVL_(dot_pairs)(acc, w, a);
#endif
    return AVL_(dot_bytes)(acc, w, a);
}

AVL__INLINE avl__vf AVL_(dot_floats)(int kind, avl__vf acc, avl__vu w, avl__vu a) {
#if AVL__W == 16
    if (kind == AVL__AS_BF16) return AVL_(dot_bf16)(acc, w, a);
#endif
    (void)kind;
    return AVL_(fma)((avl__vf)w, (avl__vf)a, acc);
}

// Transposes the 16 bytes from byte `at` on of AVL__W rows: w[i] is word i of every row.
AVL__INLINE void AVL_(transpose)(const uint8_t *const *row, size_t at, avl__vu *w) {
    const avl__vu v0 = AVL_(load_16)(row, at), v1 = AVL_(load_16)(row + 1, at);
    const avl__vu v2 = AVL_(load_16)(row + 2, at), v3 = AVL_(load_16)(row + 3, at);
    const avl__vu low01 = AVL_(zip_low32)(v0, v1), low23 = AVL_(zip_low32)(v2, v3);
    const avl__vu high01 = AVL_(zip_high32)(v0, v1), high23 = AVL_(zip_high32)(v2, v3);
    w[0] = AVL_(zip_low64)(low01, low23);
    w[1] = AVL_(zip_high64)(low01, low23);
    w[2] = AVL_(zip_low64)(high01, high23);
    w[3] = AVL_(zip_high64)(high01, high23);
}

// ---- unpacking weights ---------------------------------------------------------------------------------------------

AVL__INLINE int AVL_(kind_of)(int type) {
    return type == ASTROVL_TYPE_Q8_0 && AVL__SIGNED_Q8 ? AVL__AS_SIGNED : AVL__AS_BYTES;
}

// How many words' products add up in int16; 0: they add up in int32
AVL__INLINE int AVL_(run_of)(int type) { return AVL__WIDE ? 0 : avl__block_form_of(type).run; }

// Where the blocks of a register of weight rows go: into a pack of two such registers (is_dot = 0), or, without being
// stored, into dot products with one row of activations (is_dot = 1).
typedef struct AVL_(blocks) {
    avl__vu      *u;             // [blocks][words][2]
    avl__vf      *d, *minus_m;   // [blocks][n_parts][2]
    const int8_t *q;             // the row of activations: [blocks][8 words][4]
    const float  *e, *e_sum;     // its scales and sums: [blocks], [blocks][n_parts]
    avl__vi      *acc;           // [blocks][n_parts]
    avl__vf      *sum;           // of all blocks
} AVL_(blocks);

// Adds block j's share to the sums of the rows.
AVL__INLINE void AVL_(add_block)(int type, AVL_(blocks) to, int j) {
    const avl__block_form f = avl__block_form_of(type);
    int part;
    AVL__EACH(part, f.n_parts) {
        const int i = f.n_parts * j + part;
        *to.sum = AVL_(fma)(AVL_(to_float)(to.acc[i]), to.d[2 * i] * to.e[j], *to.sum);
        if (f.has_min) *to.sum = AVL_(fma)(-to.minus_m[2 * i], AVL_(splat)(to.e_sum[i]), *to.sum);
    }
}

// n words of block j, from word `first` on, all of one part
AVL__INLINE void AVL_(put_words)(int is_dot, int type, AVL_(blocks) to, int j, int first, int n, const avl__vu *w) {
    const int n_parts = avl__block_form_of(type).n_parts, kind = AVL_(kind_of)(type), run = AVL_(run_of)(type);
    const int part = n_parts * j + (n_parts == 2 ? first / 4 : 0), at = 8 * j + first;
    avl__vi acc = {0}, partial = acc;
    int i;
    if (is_dot) acc = to.acc[part];
    AVL__EACH(i, n) {
        if (!is_dot)   to.u[2 * (at + i)] = w[i];
        else if (!run) acc = AVL_(dot_words)(kind, acc, w[i], AVL_(splat_word)(to.q + 4 * (at + i)));
        else           partial = AVL_(dot_bytes)(partial, w[i], AVL_(splat_word)(to.q + 4 * (at + i)));
        if (is_dot && run && ((i + 1) % run == 0 || i + 1 == n)) {
            acc += AVL_(widen)(partial);
            partial = AVL_(splat_int)(0);
        }
    }
    if (is_dot) to.acc[part] = acc;
}

// The word at byte `at`, an even one, of transposed words
AVL__INLINE avl__vu AVL_(word)(const avl__vu *t, int at) {
    return at % 4 ? AVL_(middle)(t[at / 4], t[at / 4 + 1]) : t[at / 4];
}

// Blocks first..last-1 of eight, of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0: eight of them are a multiple of 16 bytes. Meanwhile
// n_next bytes from `next` on are prefetched.
AVL__INLINE void AVL_(unpack_simple)(int is_dot, int type, const uint8_t *const *row, size_t at, int first, int last,
                                     const char *next, size_t n_next, AVL_(blocks) to) {
    const avl__block_form f = avl__block_form_of(type);
    const int size = (int)f.bytes / 8, is_8_bits = type == ASTROVL_TYPE_Q8_0;
    const int has_5_bits = type == ASTROVL_TYPE_Q5_0 || type == ASTROVL_TYPE_Q5_1;
    const size_t step = n_next / ((size_t)size / 2);
    avl__vu t[69], w[8];
    int i, j;
    __asm__("" : "=m"(t));                                    // or gcc warns of words that are skipped
    for (i = first * size / 16; i < size / 2; i++) {
        avl__prefetch_bytes(next + step * (size_t)i, step);
        AVL_(transpose)(row, at + 16 * (size_t)i, t + 4 * i);
    }
    AVL__EACH(j, 8) {
        const avl__vu scales = AVL_(word)(t, size * j);
        const avl__vu fifth = AVL_(word)(t, size * (j + 1) - (has_5_bits ? 20 : 4));
        if (j < first || j >= last) continue;
        to.d[2 * j] = AVL_(half)(scales);
        if (f.has_min) to.minus_m[2 * j] = -AVL_(half)(scales >> 16);
        AVL__EACH(i, 8) {
            w[i] = AVL_(word)(t, size * (j + 1) - (is_8_bits ? 32 - 4 * i : 16 - i % 4 * 4));
            if (is_8_bits && !AVL__SIGNED_Q8) w[i] ^= 0x80808080u;                       // q + 128
            if (!is_8_bits) w[i] = (i < 4 ? w[i] : w[i] >> 4) & 0x0F0F0F0Fu;
            if (has_5_bits) w[i] |= (fifth >> 4 * i & 15) * 0x02040810u & 0x10101010u;    // a bit to each byte
        }
        AVL_(put_words)(is_dot, type, to, j, 0, 8, w);
        if (is_dot) AVL_(add_block)(type, to, j);
    }
}

// The d and -m of a super-block: d and m of the whole times small integers, bytes of transposed words
AVL__INLINE void AVL_(unpack_super_scales)(int type, const uint8_t *const *row, size_t at, AVL_(blocks) to) {
    const avl__block_form f = avl__block_form_of(type);
    avl__vu w[4], last[4], scales[4], mins[4], halves;
    avl__vf d, m;
    int i, is_signed = 0;
    switch (type) {
    case ASTROVL_TYPE_Q2_K:
        AVL_(transpose)(row, at, w);
        AVL_(transpose)(row, at + 68, last);
        halves = last[3];
        AVL__EACH(i, 4) {
            scales[i] = w[i] & 0x0F0F0F0Fu;
            mins[i] = w[i] >> 4 & 0x0F0F0F0Fu;
        }
        break;
    case ASTROVL_TYPE_Q3_K:                                   // 12 bytes from 96 on, then d, then the super-block ends
        AVL_(transpose)(row, at + 94, w);
        AVL__EACH(i, 3) w[i] = AVL_(middle)(w[i], w[i + 1]);
        halves = w[3] >> 16;
        AVL__EACH(i, 4) {
            scales[i] = (w[i % 2] >> i / 2 * 4 & 0x0F0F0F0Fu) | (w[2] >> 2 * i & 0x03030303u) << 4;
            scales[i] = ((scales[i] | 0x80808080u) - 0x20202020u) ^ 0x80808080u;      // - 32 in each byte
        }
        is_signed = 1;
        break;
    case ASTROVL_TYPE_Q6_K:
        AVL_(transpose)(row, at + 192, scales);
        AVL_(transpose)(row, at + 194, last);
        halves = last[3] >> 16;
        is_signed = 1;
        break;
    default:                                                  // Q4_K and Q5_K
        AVL_(transpose)(row, at, w);
        halves = w[0];
        scales[0] = w[1] & 0x3F3F3F3Fu;
        scales[1] = (w[3] & 0x0F0F0F0Fu) | (w[1] >> 2 & 0x30303030u);
        mins[0] = w[2] & 0x3F3F3F3Fu;
        mins[1] = (w[3] >> 4 & 0x0F0F0F0Fu) | (w[2] >> 2 & 0x30303030u);
        break;
    }
    d = AVL_(half)(halves);
    m = AVL_(half)(halves >> 16);
    AVL__EACH(i, 8 * f.n_parts) {
        const avl__vu scale = scales[i / 4] << (24 - i % 4 * 8);
        to.d[2 * i] = d * AVL_(to_float)(is_signed ? (avl__vi)scale >> 24 : (avl__vi)(scale >> 24));
        if (f.has_min) to.minus_m[2 * i] = m * AVL_(to_float)((avl__vi)(mins[i / 4] >> i % 4 * 8 & 255));
    }
}

// A super-block of a K-quant (layouts: section [3]). Its blocks share bytes: words w of low bits and x of those above.
AVL__INLINE void AVL_(unpack_super)(int is_dot, int type, const uint8_t *const *row, size_t at, const char *next,
                                    size_t n_next, AVL_(blocks) to) {
    const int n_shared = type == ASTROVL_TYPE_Q2_K || type == ASTROVL_TYPE_Q3_K ? 4 : 2;      // blocks in a byte
    const uint32_t mask = n_shared == 4 ? 0x03030303u : 0x0F0F0F0Fu;
    const int is_5_bits = type == ASTROVL_TYPE_Q5_K;
    const size_t low_bits = type == ASTROVL_TYPE_Q6_K ? 0 : type == ASTROVL_TYPE_Q3_K ? 32 : is_5_bits ? 48 : 16;
    const size_t step = n_next * (size_t)n_shared / 16;
    avl__vu w[4], x[4], u[4];
    int h, i, k, n;
    AVL_(unpack_super_scales)(type, row, at, to);
    for (h = 0; h < 2; h++, at += 16)                         // the first and the last 16 columns of each block
        AVL__EACH(n, 8 / n_shared) {
            avl__prefetch_bytes(next, step);
            next += step;
            AVL_(transpose)(row, at + low_bits + 32 * (size_t)n, w);
            if (type == ASTROVL_TYPE_Q3_K && n == 0) AVL_(transpose)(row, at, x);
            if (is_5_bits && n == 0) AVL_(transpose)(row, at + 16, x);
            if (type == ASTROVL_TYPE_Q6_K && n % 2 == 0) AVL_(transpose)(row, at + 128 + 16 * (size_t)n, x);
            AVL__EACH(k, n_shared) {
                const int j = type == ASTROVL_TYPE_Q6_K ? n / 2 * 4 + n % 2 + 2 * k : n * n_shared + k;
                AVL__EACH(i, 4) {
                    u[i] = w[i] >> 8 / n_shared * k & mask;
                    if (type == ASTROVL_TYPE_Q3_K) u[i] |= (x[i] >> j & 0x01010101u) << 2;
                    if (is_5_bits) u[i] |= (x[i] >> j & 0x01010101u) << 4;
                    if (type == ASTROVL_TYPE_Q6_K) u[i] |= (x[i] >> j % 4 * 2 & 0x03030303u) << 4;
                }
                AVL_(put_words)(is_dot, type, to, j, 4 * h, 4, u);
            }
        }
}

// 32 columns of a float type
AVL__INLINE void AVL_(unpack_floats)(int type, int kind, const uint8_t *const *row, size_t at, avl__vu *u, avl__vf *d) {
    avl__vf x[32], max = {0}, inverse;
    avl__vu w[4];
    int i, k;
    for (k = 0; k < (type == ASTROVL_TYPE_F32 ? 8 : 4); k++) {
        AVL_(transpose)(row, at + 16 * (size_t)k, w);
        AVL__EACH(i, 4)
            if (type == ASTROVL_TYPE_F32) x[4 * k + i] = (avl__vf)w[i];
            else if (type == ASTROVL_TYPE_F16) {
                x[8 * k + 2 * i] = AVL_(half)(w[i]);
                x[8 * k + 2 * i + 1] = AVL_(half)(w[i] >> 16);
            } else {
                x[8 * k + 2 * i] = (avl__vf)(w[i] << 16);
                x[8 * k + 2 * i + 1] = (avl__vf)(w[i] & 0xFFFF0000u);
            }
    }
    if (kind == AVL__AS_F32)
        for (i = 0; i < 32; i++) u[2 * i] = (avl__vu)x[i];
    else if (kind == AVL__AS_BF16)
        for (i = 0; i < 16; i++) u[2 * i] = AVL_(pair_bf16)(x[2 * i], x[2 * i + 1]);
    else {
        for (i = 0; i < 32; i++) max = AVL_(max)(max, AVL_(abs)(x[i]));
        *d = max * (1.0f / 8191.0f);
        inverse = (avl__vf)((avl__vi)(8191.0f / max) & (avl__vi)(max > 1e-30f));
        for (i = 0; i < 16; i++) {
            const avl__vi low = AVL_(to_int)(x[2 * i] * inverse), high = AVL_(to_int)(x[2 * i + 1] * inverse);
            u[2 * i] = (avl__vu)((low & 0xFFFF) | high << 16);
        }
    }
}

// Copies n bytes of each row, from byte `at` on, and zeros behind them.
AVL__INLINE void AVL_(pad_rows)(const uint8_t *const *row, size_t at, size_t n, uint8_t (*padded)[8 * 34],
                                const uint8_t **copy) {
    int r;
    for (r = 0; r < AVL__W; r++) {
        memset(padded[r], 0, sizeof padded[r]);
        memcpy(padded[r], row[r] + at, n);
        copy[r] = padded[r];
    }
}

// Blocks b + first to b + 7 of a register of weight rows, as many as n_in columns have. Nothing beyond a row's end is
// read: the last eight blocks overlap those before (avl__group_begin), and what is shorter is copied.
AVL__INLINE void AVL_(unpack)(int is_dot, int type, int kind, const uint8_t *const *row, int b, int first, int n_in,
                              const char *next, size_t n_next, AVL_(blocks) to) {
    const size_t size = avl__block_form_of(type).bytes / 8, value = type == ASTROVL_TYPE_F32 ? 4 : 2;
    uint8_t padded[AVL__W][8 * 34];
    const uint8_t *copy[AVL__W];
    int j;
    if (avl__is_k_quant(type)) {
        AVL_(unpack_super)(is_dot, type, row, (size_t)(b / 8) * avl__block_form_of(type).bytes, next, n_next, to);
    } else if (!avl__is_float_type(type)) {
        if (n_in < 256) {
            AVL_(pad_rows)(row, 0, size * (size_t)(n_in / 32), padded, copy);
            row = copy;
        }
        AVL_(unpack_simple)(is_dot, type, row, size * (size_t)b, first, n_in / 32 - b, next, n_next, to);
    } else {
        for (j = first; j < 8 && 32 * (b + j) < n_in; j++) {
            const size_t at = size * (size_t)(b + j), left = (size_t)(n_in - 32 * (b + j));
            avl__vu *u = to.u + 2 * avl__words_of(kind) * j;
            if (left < 32) AVL_(pad_rows)(row, at, value * left, padded, copy);
            AVL_(unpack_floats)(type, kind, left < 32 ? copy : row, left < 32 ? 0 : at, u, to.d + 2 * j);
        }
    }
}

// AVL__W weight rows times one row of activations: the operations of a tile in its order.
AVL__INLINE avl__vf AVL_(dot_rows_of)(int type, const uint8_t *const *row, int n_in, const avl__quants *x,
                                      const char *next) {
    const avl__block_form f = avl__block_form_of(type);
    const int has_bias = f.offset && AVL_(kind_of)(type) == AVL__AS_BYTES;
    avl__vf d[32], minus_m[32], sum = {0};
    avl__vi acc[16];
    AVL_(blocks) to = {NULL, d, minus_m, NULL, NULL, NULL, acc, &sum};
    int done, i, j;
    for (done = 0; done < x->n_blocks; done += 8) {
        const int b = avl__group_begin(done, x->n_blocks), first = done - b;
        const int32_t *bias = x->bias + f.n_parts * b;
        to.q = x->q + 32 * (size_t)b;
        to.e = x->scale + b;
        to.e_sum = x->sum + f.n_parts * b;
        AVL__EACH(i, 8 * f.n_parts) acc[i] = AVL_(splat_int)(has_bias ? bias[i] : 0);
        AVL_(unpack)(1, type, AVL__AS_BYTES, row, b, first, n_in, next, AVL__W * f.bytes, to);
        next += AVL__W * f.bytes;
        if (avl__is_k_quant(type))
            AVL__EACH(j, 8) AVL_(add_block)(type, to, j);
    }
    return sum;
}

// A function for each type: compilers take long over one that holds them all.
#define AVL__UNPACK(name, type, ...) \
    AVL__APART void AVL_(unpack_##name)(int kind, const uint8_t *const *row, int b, int first, int n_in, \
                                        const char *next, size_t n_next, AVL_(blocks) to) { \
        AVL_(unpack)(0, type, kind, row, b, first, n_in, next, n_next, to); \
    }
#define AVL__DOT(name, type, ...) \
    AVL__APART void AVL_(dot_##name)(const uint8_t *const *row, int n_in, const avl__quants *x, const char *next, \
                                     avl__vf *sum) { \
        *sum = AVL_(dot_rows_of)(type, row, n_in, x, next); \
    }
#define AVL__UNPACK_CASE(name, type, ...) \
    case type: AVL_(unpack_##name)(kind, row, b, first, n_in, next, n_next, to); break;
#define AVL__DOT_CASE(name, type, ...) case type: AVL_(dot_##name)(row, n_in, x, next, sum); break;

AVL__BLOCK_TYPES(AVL__UNPACK)
AVL__FLOAT_TYPES(AVL__UNPACK)
AVL__BLOCK_TYPES(AVL__DOT)

static void AVL_(unpack_any)(int type, int kind, const uint8_t *const *row, int b, int first, int n_in,
                             const char *next, size_t n_next, AVL_(blocks) to) {
    switch (type) {
    AVL__BLOCK_TYPES(AVL__UNPACK_CASE)
    AVL__FLOAT_TYPES(AVL__UNPACK_CASE)
    default: break;
    }
}

static void AVL_(dot_rows)(int type, const uint8_t *const *row, int n_in, const avl__quants *x, const char *next,
                           avl__vf *sum) {
    switch (type) {
    AVL__BLOCK_TYPES(AVL__DOT_CASE)
    default: break;
    }
}

// ---- rounding activations ------------------------------------------------------------------------------------------

// 32 integers to int16, to int8
AVL__INLINE void AVL_(narrow_16)(const avl__vi *q, void *to) {
    typedef int16_t shorts __attribute__((vector_size(2 * AVL__W)));
    int i;
    for (i = 0; i < 32 / AVL__W; i++) {
        const shorts low = __builtin_convertvector(q[i], shorts);
        memcpy((int16_t *)to + AVL__W * i, &low, sizeof low);
    }
}
#if AVL__W == 8
AVL__INLINE void AVL_(narrow_8)(const avl__vi *q, void *to) {           // gcc converts these one by one
    const __m256i low = _mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
#else
AVL__INLINE void AVL_(narrow_8)(const avl__vi *q, void *to) {
    typedef int8_t bytes __attribute__((vector_size(AVL__W)));
    int i;
    for (i = 0; i < 32 / AVL__W; i++) {
        const bytes low = __builtin_convertvector(q[i], bytes);
        memcpy((int8_t *)to + AVL__W * i, &low, sizeof low);
    }
}
#endif

// Block b of row r: x = e q with q of 8 or 16 bits, or bfloat16, or float32
AVL__INLINE void AVL_(quantize_block)(int kind, const avl__product *p, int r, int b) {
    enum { N = 32 / AVL__W };
    const avl__block_form f = avl__block_form_of(p->w->type);
    const avl__quants *to = &p->quants;
    const float *from = p->x + (size_t)r * p->w->n_in + 32 * (size_t)b;
    const float limit = kind == AVL__AS_PAIRS ? 8191.0f : 127.0f;
    const size_t block = (size_t)(r / to->group) * to->n_blocks + (size_t)b, place = (size_t)(r % to->group);
    avl__vf x[N], max = {0}, sums[2] = {{0}, {0}};
    avl__vi q[N];
    float top, e, sum;
    uint32_t words[16];
    int i;
    for (i = 0; i < N; i++) {
        x[i] = AVL_(load_some)(from + AVL__W * i, p->w->n_in - 32 * b - AVL__W * i);
        max = AVL_(max)(max, AVL_(abs)(x[i]));
    }
    if (kind == AVL__AS_F32) {
        avl__store_words(to, r, b, x, 32);
        return;
    }
#if AVL__W == 16
    if (kind == AVL__AS_BF16) {
        const avl__vu pairs = AVL_(to_bf16)(x[0], x[1]);
        avl__store_words(to, r, b, &pairs, 16);
        return;
    }
#endif
    top = AVL_(max_lanes)(max);
    e = top / limit;
    to->scale[block * to->group + place] = e;
    for (i = 0; i < N; i++) {
        q[i] = AVL_(to_int)(x[i] * (top > 1e-30f ? limit / top : 0.0f));
        sums[2 * i / N] += AVL_(to_float)(q[i]);
    }
    if (kind == AVL__AS_PAIRS) {
        AVL_(narrow_16)(q, words);
        avl__store_words(to, r, b, words, 16);
        return;
    }
    AVL_(narrow_8)(q, words);
    avl__store_words(to, r, b, words, 8);
    if (f.n_parts == 1) sums[0] += sums[1];
    for (i = 0; i < f.n_parts; i++) {
        const size_t at = (block * f.n_parts + (size_t)i) * to->group + place;
        sum = AVL_(add_lanes)(sums[i]);
        to->bias[at] = -f.offset * (int)sum;
        to->sum[at] = e * sum;
    }
}

static void AVL_(quantize)(const avl__product *p, int first, int n_rows, int begin, int end) {
    const int kind = avl__is_float_type(p->w->type) ? p->quants.float_kind : AVL__AS_BYTES;
    int r, b;
    for (b = begin; b < end; b++)
        for (r = first; r < first + n_rows; r++)
            if (kind == AVL__AS_BYTES)      AVL_(quantize_block)(AVL__AS_BYTES, p, r, b);
            else if (kind == AVL__AS_PAIRS) AVL_(quantize_block)(AVL__AS_PAIRS, p, r, b);
            else if (AVL__W == 16)          AVL_(quantize_block)(AVL__AS_BF16, p, r, b);
            else                            AVL_(quantize_block)(AVL__AS_F32, p, r, b);
}

// ---- products ------------------------------------------------------------------------------------------------------

// A tile: a group of rows of activations times two registers of weight rows, over some blocks
typedef struct AVL_(tile) {
    const avl__quants *x;
    size_t             at;         // in x: blocks before the group's first one here, times its rows
    AVL_(blocks)       pack;
    int                n_blocks;
    const char        *next;       // prefetched meanwhile, `step` bytes for each block
    size_t             step;
} AVL_(tile);

// The micro-kernel for integers: n rows, and blocks of the form of `type`. Each block (or half) is summed up in int32,
// where it fits at first in int16 (partial), then scaled and added to the float accumulators.
AVL__INLINE void AVL_(tile_integers)(int type, int n, const AVL_(tile) *t, avl__vf (*acc)[2]) {
    const avl__block_form f = avl__block_form_of(type);
    const int kind = avl__is_float_type(type) ? AVL__AS_PAIRS : AVL_(kind_of)(type), n_parts = f.n_parts;
    const int n_words = avl__words_of(kind) / n_parts, run = AVL_(run_of)(type);
    const int n_run = run && run < n_words ? run : n_words;
    const int8_t *q = t->x->q + 4 * (size_t)(n_words * n_parts) * t->at;
    const float *scale = t->x->scale + t->at, *sum = t->x->sum + t->at * n_parts;
    const int32_t *bias = t->x->bias + t->at * n_parts;
    const avl__vu *u = t->pack.u;
    const avl__vf *d = t->pack.d, *minus_m = t->pack.minus_m;
    int b, part, i, r, c;
    for (b = 0; b < t->n_blocks; b++) {
        avl__prefetch_bytes(t->next + t->step * (size_t)b, t->step);
        AVL__EACH(part, n_parts) {
            avl__vi sum32[AVL__TILE][2], partial[AVL__TILE][2];
            AVL__EACH(i, n_words) {
                const avl__vu w[2] = {u[2 * i], u[2 * i + 1]};         // or gcc loads them for each row
                AVL__EACH(r, n)
                    if (i % n_run == 0)
                        partial[r][0] = partial[r][1] = AVL_(splat_int)(kind == AVL__AS_BYTES && !run ? bias[r] : 0);
                AVL__EACH(r, n) {
                    const avl__vu a = AVL_(splat_word)(q + 4 * (n * i + r));
                    AVL__EACH(c, 2) partial[r][c] = AVL_(dot_words)(kind, partial[r][c], w[c], a);
                }
                if ((i + 1) % n_run) continue;
                AVL__EACH(r, n)
                    AVL__EACH(c, 2) {
                        if (run && i < n_run) sum32[r][c] = AVL_(splat_int)(bias[r]);
                        if (run) sum32[r][c] += AVL_(widen)(partial[r][c]);
                        else     sum32[r][c] = partial[r][c];
                    }
            }
            AVL__EACH(c, 2)
                AVL__EACH(r, n) {
                    acc[r][c] = AVL_(fma)(AVL_(to_float)(sum32[r][c]), d[c] * scale[r], acc[r][c]);
                    if (f.has_min) acc[r][c] = AVL_(fma)(-minus_m[c], AVL_(splat)(sum[r]), acc[r][c]);
                }
            u += 2 * n_words;
            q += 4 * n * n_words;
            d += 2;
            minus_m += 2;
            bias += n;
            sum += n;
        }
        scale += n;
    }
}

// The micro-kernel for bfloat16 and float32
AVL__INLINE void AVL_(tile_floats)(int kind, int n, const AVL_(tile) *t, avl__vf (*acc)[2]) {
    const int n_words = avl__words_of(kind);
    const int8_t *q = t->x->q + 4 * (size_t)n_words * t->at;
    const avl__vu *u = t->pack.u;
    int b, i, r, c;
    for (b = 0; b < t->n_blocks; b++) {
        avl__prefetch_bytes(t->next + t->step * (size_t)b, t->step);
        for (i = 0; i < n_words; i++, u += 2, q += 4 * n) {
            const avl__vu w[2] = {u[0], u[1]};
            AVL__EACH(r, n) {
                const avl__vu a = AVL_(splat_word)(q + 4 * r);
                AVL__EACH(c, 2) acc[r][c] = AVL_(dot_floats)(kind, acc[r][c], w[c], a);
            }
        }
    }
}

// A tile of n rows; accumulators are copied into registers for it.
AVL__INLINE void AVL_(tile_rows)(int n, int type, const AVL_(tile) *t, avl__vf (*sum)[2]) {
    const avl__block_form f = avl__block_form_of(type);
    avl__vf acc[AVL__MAX_TILE][2];
    int r;
    AVL__EACH(r, n) {
        acc[r][0] = sum[r][0];
        acc[r][1] = sum[r][1];
    }
    if (n > AVL__TILE || (AVL__W != 8 && avl__is_float_type(type) && t->x->float_kind != AVL__AS_PAIRS))
        AVL_(tile_floats)(AVL__W == 16 ? AVL__AS_BF16 : AVL__AS_F32, n, t, acc);
    else if (AVL__W > 4 && avl__is_float_type(type)) AVL_(tile_integers)(ASTROVL_TYPE_F16, n, t, acc);
    else if (type == ASTROVL_TYPE_Q8_0)              AVL_(tile_integers)(ASTROVL_TYPE_Q8_0, n, t, acc);
    else if (type == ASTROVL_TYPE_Q2_K)              AVL_(tile_integers)(ASTROVL_TYPE_Q2_K, n, t, acc);
    else if (f.n_parts == 2)                         AVL_(tile_integers)(ASTROVL_TYPE_Q6_K, n, t, acc);
    else if (!AVL__WIDE && f.run == 4 && f.has_min)  AVL_(tile_integers)(ASTROVL_TYPE_Q5_1, n, t, acc);
    else if (!AVL__WIDE && f.run == 4)               AVL_(tile_integers)(ASTROVL_TYPE_Q5_0, n, t, acc);
    else if (f.has_min)                              AVL_(tile_integers)(ASTROVL_TYPE_Q4_1, n, t, acc);
    else                                             AVL_(tile_integers)(ASTROVL_TYPE_Q4_0, n, t, acc);
    AVL__EACH(r, n) {
        sum[r][0] = acc[r][0];
        sum[r][1] = acc[r][1];
    }
}

#define AVL__TILE_FUNCTION(n) \
    AVL__APART void AVL_(tile_##n)(int type, const AVL_(tile) *t, avl__vf (*sum)[2]) { \
        AVL_(tile_rows)(n, type, t, sum); \
    }
#define AVL__TILE_CASE(n) case n: AVL_(tile_##n)(type, t, sum); break;
AVL__TILE_SIZES(AVL__TILE_FUNCTION)

static void AVL_(tile_any)(int type, const AVL_(tile) *t, avl__vf (*sum)[2]) {
    switch (t->x->group) {
    AVL__TILE_SIZES(AVL__TILE_CASE)
    default: break;
    }
}

// Pointers to n weight rows from row `out` on; the last one stands in for those from `last` on.
AVL__INLINE void AVL_(weight_rows)(const avl__linear *w, int out, int last, int n, const uint8_t **row) {
    int r;
    for (r = 0; r < n; r++)
        row[r] = (const uint8_t *)w->weight + (size_t)(out + r < last ? out + r : last - 1) * w->row_bytes;
}

// Columns first..last-1 of one row
static void AVL_(multiply_row)(const avl__product *p, int first, int last) {
    const avl__linear *w = p->w;
    const uint8_t *row[AVL__W];
    avl__vf sum;
    int out;
    for (out = first; out < last; out += AVL__W) {
        AVL_(weight_rows)(w, out, last, AVL__W, row);
        AVL_(dot_rows)(w->type, row, w->n_in, &p->quants, avl__next_rows(p, first, last, out, AVL__W), &sum);
        if (w->bias) sum += AVL_(load_some)(w->bias + out, last - out);
        AVL_(store_some)(p->y + out, last - out, sum);
    }
}

// Columns first..last-1. 32 weight rows are packed, whole or (p->few) eight blocks at a time; each pack meets all
// groups of rows. Meanwhile the next 32 rows are prefetched, spread evenly over unpacking and tiles.
static void AVL_(multiply)(const avl__product *p, int first, int last, float *scratch) {
    enum { N_REGISTERS = AVL__PACK_ROWS / AVL__W, N_PAIRS = N_REGISTERS / 2 };
    const avl__linear *w = p->w;
    const avl__quants *x = &p->quants;
    const avl__block_form f = avl__block_form_of(w->type);
    const int kind = avl__is_float_type(w->type) ? x->float_kind : AVL__AS_BYTES;
    const int n_parts = f.n_parts, n_words = avl__words_of(kind);
    const int slice = p->few || x->n_blocks < 8 ? 8 : x->n_blocks;                  // blocks of a pack
    const size_t u_size = 2 * (size_t)(slice * n_words), d_size = 2 * (size_t)(slice * n_parts);
    const size_t pack_bytes = AVL__PACK_ROWS * (p->few ? f.bytes : w->row_bytes);
    const size_t n_fill = p->few ? pack_bytes / N_REGISTERS / (1 + (size_t)p->n_rows / 2) : 0;    // by one unpacking
    const uint8_t *row[AVL__PACK_ROWS];
    AVL_(blocks) pack[N_PAIRS];
    avl__vf sums[2][N_PAIRS][AVL__MAX_TILE][2];               // of a group, or of the two that few rows make
    int out, b, j, r, c, g, i;
    if (p->few && x->group == 1) {
        AVL_(multiply_row)(p, first, last);
        return;
    }
    memset(pack, 0, sizeof pack);
    for (c = 0; c < N_PAIRS; c++) {
        pack[c].u = (avl__vu *)(void *)scratch + u_size * (size_t)c;
        pack[c].d = (avl__vf *)(void *)scratch + u_size * N_PAIRS + d_size * (size_t)c;
        pack[c].minus_m = pack[c].d + d_size * N_PAIRS;
    }
    for (out = first; out < last; out += AVL__PACK_ROWS) {
        const int n_columns = last - out < AVL__PACK_ROWS ? last - out : AVL__PACK_ROWS;
        const char *next = avl__next_rows(p, first, last, out, AVL__PACK_ROWS);
        AVL_(weight_rows)(w, out, last, AVL__PACK_ROWS, row);
        for (b = 0; b < x->n_blocks; b += slice) {
            const int n_slice = x->n_blocks - b < slice ? x->n_blocks - b : slice;
            const size_t n_steps = (size_t)(x->n_groups * N_PAIRS * n_slice);
            const int skip = p->few ? b - avl__group_begin(b, x->n_blocks) : 0;      // blocks in front, packed before
            AVL_(tile) t;
            for (j = b; j < b + n_slice; j += 8)
                for (i = 0; i < N_REGISTERS; i++) {
                    const int begin = avl__group_begin(j, x->n_blocks), at = begin + skip - b;
                    AVL_(blocks) to = pack[i / 2];
                    to.u += 2 * n_words * at + i % 2;
                    to.d += 2 * n_parts * at + i % 2;
                    to.minus_m += 2 * n_parts * at + i % 2;
                    AVL_(unpack_any)(w->type, kind, row + AVL__W * i, begin, j - begin, w->n_in, next, n_fill, to);
                    next += n_fill;
                }
            t.x = x;
            t.n_blocks = n_slice;
            t.step = (pack_bytes - N_REGISTERS * n_fill + n_steps - 1) / n_steps;
            for (g = 0; g < x->n_groups; g++) {
                const int n_rows = p->n_rows - g * x->group < x->group ? p->n_rows - g * x->group : x->group;
                float *y = p->y + (size_t)(g * x->group) * w->n_out + out;
                avl__prefetch_sums(y, (size_t)w->n_out, n_rows, n_columns);
                for (c = 0; c < N_PAIRS && 2 * AVL__W * c < n_columns; c++) {
                    avl__vf (*sum)[2] = sums[p->few ? g : 0][c];
                    if (b == 0) memset(sum, 0, (size_t)x->group * sizeof *sum);
                    t.at = (size_t)x->group * ((size_t)x->n_blocks * (size_t)g + (size_t)b);
                    t.pack = pack[c];
                    t.pack.u += 2 * n_words * skip;
                    t.pack.d += 2 * n_parts * skip;
                    t.pack.minus_m += 2 * n_parts * skip;
                    t.next = next;
                    AVL_(tile_any)(w->type, &t, sum);
                    next += t.step * (size_t)n_slice;
                    for (i = 0; i < 2 && b + n_slice == x->n_blocks; i++) {
                        const int at = AVL__W * (2 * c + i);
                        avl__vf bias = {0};
                        if (w->bias) bias = AVL_(load_some)(w->bias + out + at, n_columns - at);
                        for (r = 0; r < n_rows; r++)
                            AVL_(store_some)(y + (size_t)r * w->n_out + at, n_columns - at, sum[r][i] + bias);
                    }
                }
            }
        }
    }
}

#if AVL__WHOLE

// ---- a few rows times weights of a float type ----------------------------------------------------------------------

// The first n numbers of a float type, at most a register, zeros behind
AVL__INLINE avl__vf AVL_(load_numbers)(int type, const void *p, int n) {
    typedef uint16_t shorts __attribute__((vector_size(2 * AVL__W)));
    shorts some = {0};
    if (type == ASTROVL_TYPE_F32) return AVL_(load_some)((const float *)p, n);
    if (type == ASTROVL_TYPE_F16 && n >= AVL__W) return AVL_(load_halves)(p);
    memcpy(&some, p, n < AVL__W ? 2 * (size_t)n : sizeof some);
    if (type == ASTROVL_TYPE_F16) return AVL_(load_halves)(&some);
    return (avl__vf)(__builtin_convertvector(some, avl__vu) << 16);
}

// Adds the products of n columns (at most AVL__W), from column i on, of n_rows rows and m weight rows.
AVL__INLINE void AVL_(add_columns)(int type, int n_rows, int m, const avl__linear *w, const uint8_t *row,
                                   const float *x, int i, int n, avl__vf (*acc)[2]) {
    const size_t size = type == ASTROVL_TYPE_F32 ? 4 : 2;
    avl__vf v[2];
    int r, o;
    AVL__EACH(o, m) v[o] = AVL_(load_numbers)(type, row + (size_t)o * w->row_bytes + size * (size_t)i, n);
    AVL__EACH(r, n_rows) {
        const avl__vf a = AVL_(load_some)(x + (size_t)r * w->n_in + i, n);
        AVL__EACH(o, m) acc[r][o] = AVL_(fma)(v[o], a, acc[r][o]);
    }
}

// n_rows rows of activations, from row r0 on, times m weight rows, from row `out` on. Every sum is made in the same
// order, whatever is computed beside it.
AVL__INLINE void AVL_(linear_rows)(int type, int n_rows, int m, const avl__product *p, int r0, int out,
                                   const char *next) {
    const avl__linear *w = p->w;
    const uint8_t *row = (const uint8_t *)w->weight + (size_t)out * w->row_bytes;
    const float *x = p->x + (size_t)r0 * w->n_in;
    const size_t step = (type == ASTROVL_TYPE_F32 ? 4 : 2) * 2 * AVL__W;
    avl__vf even[4][2], odd[4][2];
    int i, r, o;
    AVL__EACH(r, n_rows)
        AVL__EACH(o, m) even[r][o] = odd[r][o] = AVL_(splat)(0.0f);
    for (i = 0; i + 2 * AVL__W <= w->n_in; i += 2 * AVL__W) {
        for (o = 0; next && o < m; o++)
            avl__prefetch_bytes(next + (size_t)i / (2 * AVL__W) * step + (size_t)o * w->row_bytes, step);
        AVL_(add_columns)(type, n_rows, m, w, row, x, i, AVL__W, even);
        AVL_(add_columns)(type, n_rows, m, w, row, x, i + AVL__W, AVL__W, odd);
    }
    for (; i < w->n_in; i += AVL__W) AVL_(add_columns)(type, n_rows, m, w, row, x, i, w->n_in - i, even);
    AVL__EACH(r, n_rows)
        AVL__EACH(o, m)
            p->y[(size_t)(r0 + r) * w->n_out + out + o] =
                AVL_(add_lanes)(even[r][o] + odd[r][o]) + (w->bias ? w->bias[out + o] : 0.0f);
}

AVL__INLINE void AVL_(linear_of)(int type, const avl__product *p, int first, int last) {
    int out, r, m;
    for (out = first; out < last; out += m) {
        const char *next = (const char *)p->w->weight + (size_t)out * p->w->row_bytes + AVL__AHEAD;
        m = p->n_rows >= 4 && last - out >= 2 ? 2 : 1;
        if (m == 2) next = avl__next_rows(p, first, last, out, 2);
        for (r = 0; r < p->n_rows; next = NULL) {
            const int n = m == 2 && p->n_rows - r >= 4 ? 4 : 1;
            if (n == 4)      AVL_(linear_rows)(type, 4, 2, p, r, out, next);
            else if (m == 2) AVL_(linear_rows)(type, 1, 2, p, r, out, next);
            else             AVL_(linear_rows)(type, 1, 1, p, r, out, next);
            r += n;
        }
    }
}

static void AVL_(linear)(const avl__product *p, int first, int last, float *scratch) {
    (void)scratch;
    if (p->w->type == ASTROVL_TYPE_F32)      AVL_(linear_of)(ASTROVL_TYPE_F32, p, first, last);
    else if (p->w->type == ASTROVL_TYPE_F16) AVL_(linear_of)(ASTROVL_TYPE_F16, p, first, last);
    else                                     AVL_(linear_of)(ASTROVL_TYPE_BF16, p, first, last);
}

// ---- vectors of floats ---------------------------------------------------------------------------------------------

// The sixteen sums of exact mode, without fused multiply-adds: the same bits in every table
static float AVL_(dot_f16)(const void *half, const float *x, int n) {
    enum { N = AVL__LANES / AVL__W };
    const uint8_t *h = (const uint8_t *)half;
    avl__vf sum[N];
    float lane[AVL__LANES];
    int i, j;
    memset(sum, 0, sizeof sum);
    for (i = 0; i + AVL__LANES <= n; i += AVL__LANES)
        AVL__EACH(j, N) sum[j] += AVL_(load_halves)(h + 2 * (i + AVL__W * j)) * AVL_(load)(x + i + AVL__W * j);
    memcpy(lane, sum, sizeof lane);
    for (j = 0; i + j < n; j++) lane[j] += astrovl_f16_to_f32(avl__load_u16(h + 2 * (i + j))) * x[i + j];
    return avl__fold_lanes(lane);
}

// e^x to about 2e-7: 2^n 2^f, n the integer nearest to x / ln 2, 2^f by its Taylor series
AVL__INLINE avl__vf AVL_(exp)(avl__vf x) {
    static const float term[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    const avl__vf t = AVL_(max)(x, AVL_(splat)(-104.0f)) * 1.44269504f, n = AVL_(round)(t), f = t - n;
    avl__vf p = AVL_(splat)(1.54035304e-4f);                  // ln(2)^6 / 6!
    int i;
    AVL__EACH(i, 6) p = AVL_(fma)(p, f, AVL_(splat)(term[i]));
    return AVL_(scale_2)(p, n);
}

// x / (1 + e^(-a x))
AVL__INLINE avl__vf AVL_(sigmoid_product)(avl__vf x, float a) { return x / (1.0f + AVL_(exp)(x * -a)); }

static void AVL_(quick_gelu)(float *x, int64_t n) {
    for (; n > 0; n -= AVL__W, x += AVL__W) {
        const int m = n < AVL__W ? (int)n : AVL__W;
        AVL_(store_some)(x, m, AVL_(sigmoid_product)(AVL_(load_some)(x, m), 1.702f));
    }
}

static void AVL_(silu_product)(float *x, const float *up, int64_t n) {
    for (; n > 0; n -= AVL__W, x += AVL__W, up += AVL__W) {
        const int m = n < AVL__W ? (int)n : AVL__W;
        AVL_(store_some)(x, m, AVL_(sigmoid_product)(AVL_(load_some)(x, m), 1.0f) * AVL_(load_some)(up, m));
    }
}

// x Phi(x), with 1 - Phi by formula 7.1.26 of Abramowitz and Stegun, whose error is below 1.5e-7
static void AVL_(gelu)(float *x, int64_t n) {
    static const float term[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    int i;
    for (; n > 0; n -= AVL__W, x += AVL__W) {
        const int m = n < AVL__W ? (int)n : AVL__W;
        const avl__vf v = AVL_(load_some)(x, m), z = AVL_(abs)(v) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
        avl__vf p = AVL_(splat)(1.061405429f);
        AVL__EACH(i, 4) p = AVL_(fma)(p, t, AVL_(splat)(term[i]));
        p = p * t * AVL_(exp)(-z * z) * 0.5f;
        AVL_(store_some)(x, m, AVL_(max)(v, AVL_(splat)(0.0f)) - AVL_(abs)(v) * p);     // x (1 - p), or x p if x < 0
    }
}

static void AVL_(rms_norm)(float *y, const float *x, const float *weight, int n, float eps) {
    avl__vf squares[2] = {{0}, {0}};
    float scale;
    int i;
    for (i = 0; i < n; i += AVL__W) {
        const avl__vf v = AVL_(load_some)(x + i, n - i);
        squares[i / AVL__W % 2] = AVL_(fma)(v, v, squares[i / AVL__W % 2]);
    }
    scale = (float)(1.0 / avl__sqrt((double)AVL_(add_lanes)(squares[0] + squares[1]) / n + eps));
    for (i = 0; i < n; i += AVL__W)
        AVL_(store_some)(y + i, n - i, AVL_(load_some)(x + i, n - i) * scale * AVL_(load_some)(weight + i, n - i));
}

static void AVL_(layer_norm)(float *y, const float *x, const float *weight, const float *bias, int n, float eps) {
    avl__vf sum = AVL_(splat)(0.0f), squares = sum;
    float mean, scale, rest = 0.0f;
    int i;
    for (i = 0; i < n; i += AVL__W) sum += AVL_(load_some)(x + i, n - i);
    mean = AVL_(add_lanes)(sum) / (float)n;
    for (i = 0; i + AVL__W <= n; i += AVL__W) {
        const avl__vf d = AVL_(load)(x + i) - mean;
        squares = AVL_(fma)(d, d, squares);
    }
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    scale = (float)(1.0 / avl__sqrt((double)(AVL_(add_lanes)(squares) + rest) / n + eps));
    for (i = 0; i < n; i += AVL__W) {
        const avl__vf d = (AVL_(load_some)(x + i, n - i) - mean) * scale;
        const avl__vf v = AVL_(fma)(d, AVL_(load_some)(weight + i, n - i), AVL_(load_some)(bias + i, n - i));
        AVL_(store_some)(y + i, n - i, v);
    }
}

// x = softmax(scale x)
static void AVL_(softmax)(float *x, int n, float scale) {
    avl__vf sum = AVL_(splat)(0.0f), max = AVL_(splat)(-FLT_MAX);
    float top = -FLT_MAX, rest = 0.0f;
    int i;
    for (i = 0; i + AVL__W <= n; i += AVL__W) max = AVL_(max)(max, AVL_(load)(x + i));
    for (; i < n; i++) top = top > x[i] ? top : x[i];
    top = top > AVL_(max_lanes)(max) ? top : AVL_(max_lanes)(max);
    for (i = 0; i < n; i += AVL__W) {
        const avl__vf p = AVL_(exp)((AVL_(load_some)(x + i, n - i) - top) * scale);
        AVL_(store_some)(x + i, n - i, p);
        if (n - i >= AVL__W) sum += p;
    }
    for (i = n / AVL__W * AVL__W; i < n; i++) rest += x[i];
    rest = 1.0f / (AVL_(add_lanes)(sum) + rest);
    for (i = 0; i < n; i += AVL__W) AVL_(store_some)(x + i, n - i, AVL_(load_some)(x + i, n - i) * rest);
}

static void AVL_(to_halves)(uint16_t *y, const float *x, int64_t n) {
    for (; n >= AVL__W; n -= AVL__W, x += AVL__W, y += AVL__W)
        AVL_(store_halves)(y, AVL_(min)(AVL_(max)(AVL_(load)(x), AVL_(splat)(-65504.0f)), AVL_(splat)(65504.0f)));
    for (; n > 0; n--, x++, y++) *y = astrovl_f32_to_f16(*x > 65504.0f ? 65504.0f : *x < -65504.0f ? -65504.0f : *x);
}

static void AVL_(from_halves)(float *y, const uint16_t *x, int n) {
    int i = 0;
    for (; i + AVL__W <= n; i += AVL__W) AVL_(store)(y + i, AVL_(load_halves)(x + i));
    for (; i < n; i++) y[i] = astrovl_f16_to_f32(x[i]);
}

// ---- attention -----------------------------------------------------------------------------------------------------
// 32 queries at a time lie across the lanes: scores[key][32] = K q^T needs only the queries transposed, softmax runs
// down a column, and nothing is added across a register. Then out = P V with the columns of V across the lanes. All in
// words of float32, or of two bfloat16: of columns in K q^T, of keys in P V.

// scores[n][32] of n keys [n][stride], n_words each, with two registers of queries.  queries: [n_words][32]
AVL__INLINE void AVL_(score_keys)(int kind, int n, const float *keys, size_t stride, int n_words, const float *queries,
                                  float scale, float *scores) {
    avl__vf acc[8][2];
    int j, d, c;
    AVL__EACH(j, n) acc[j][0] = acc[j][1] = AVL_(splat)(0.0f);
    for (d = 0; d < n_words; d++, queries += 32) {
        const avl__vu q[2] = {AVL_(load_words)(queries), AVL_(load_words)(queries + AVL__W)};
        AVL__EACH(j, n) {
            const avl__vu key = AVL_(splat_word)(keys + (size_t)j * stride + (size_t)d);
            AVL__EACH(c, 2) acc[j][c] = AVL_(dot_floats)(kind, acc[j][c], q[c], key);
        }
    }
    AVL__EACH(j, n)
        AVL__EACH(c, 2) AVL_(store)(scores + 32 * j + AVL__W * c, acc[j][c] * scale);
}

// scores[n_keys][32] to e^(score - largest), bfloat16 in pairs of keys; inverse: out, [32], 1 over each column's sum
AVL__INLINE void AVL_(softmax_columns)(int kind, float *scores, int n_keys, float *inverse) {
    const int n = kind == AVL__AS_BF16 ? 2 : 1;
    int i, j, c;
    for (c = 0; c < 32; c += AVL__W) {
        avl__vf max = AVL_(splat)(-FLT_MAX), sum = AVL_(splat)(0.0f), p[2];
        for (j = 0; j < n_keys; j++) max = AVL_(max)(max, AVL_(load)(scores + 32 * (size_t)j + c));
        for (j = 0; j < n_keys; j += n) {
            float *to = scores + 32 * (size_t)(j / n) + c;
            AVL__EACH(i, n) {
                p[i] = AVL_(splat)(0.0f);
                if (i == 0 || j + i < n_keys) p[i] = AVL_(exp)(AVL_(load)(scores + 32 * (size_t)(j + i) + c) - max);
                sum += p[i];
            }
            if (n == 1) AVL_(store)(to, p[0]);
            else        AVL_(store_words)(to, AVL_(pair_bf16)(p[0], p[1]));
        }
        AVL_(store)(inverse + c, 1.0f / sum);
    }
}

// Two registers of columns, n_columns of which exist, of the outputs of n queries.  values: [n_words][stride]
AVL__INLINE void AVL_(mix_values)(int kind, int n, float *out, size_t out_stride, const float *values, size_t stride,
                                  int n_words, int n_columns, const float *scores, const float *inverse) {
    avl__vf acc[8][2];
    int i, j, c;
    AVL__EACH(i, n) acc[i][0] = acc[i][1] = AVL_(splat)(0.0f);
    for (j = 0; j < n_words; j++, values += stride, scores += 32) {
        avl__vf v[2];
        AVL__EACH(c, 2) v[c] = AVL_(load_some)(values + AVL__W * c, n_columns - AVL__W * c);
        AVL__EACH(i, n) {
            const avl__vu p = AVL_(splat_word)(scores + i);
            AVL__EACH(c, 2) acc[i][c] = AVL_(dot_floats)(kind, acc[i][c], (avl__vu)v[c], p);
        }
    }
    AVL__EACH(i, n)
        AVL__EACH(c, 2)
            AVL_(store_some)(out + (size_t)i * out_stride + AVL__W * c, n_columns - AVL__W * c, acc[i][c] * inverse[i]);
}

// keys: [n_keys][key_stride], values: [n_keys, or of bfloat16 half as many][v_stride], words of `kind`;
// scratch: [n_keys][32] and [head_dim][32]
AVL__INLINE void AVL_(attend_as)(int kind, const avl__tile *t, const float *keys, size_t key_stride,
                                 const float *values, size_t v_stride, float *scratch) {
    enum { MANY = AVL__W == 16 ? 8 : AVL__TILE };              // keys, or queries, whose accumulators fit in registers
    const float scale = (float)(1.0 / avl__sqrt((double)t->head_dim));
    const int n_padded = kind == AVL__AS_BF16 ? (t->head_dim + 31) / 32 * 32 : t->head_dim;
    const int n_words = kind == AVL__AS_BF16 ? n_padded / 2 : n_padded;
    const int n_values = kind == AVL__AS_BF16 ? (t->n_keys + 1) / 2 : t->n_keys;
    float *queries = scratch, *scores = queries + 32 * (size_t)n_padded, inverse[32];
    int first, i, j, d, c, n;
    for (first = 0; first < t->n; first += 32) {
        const int n_queries = t->n - first < 32 ? t->n - first : 32;
        for (d = 0; d < n_padded; d++)
            for (i = 0; i < 32; i++) {
                const size_t at = (size_t)(first + i) * t->q_stride + (size_t)d;
                queries[32 * d + i] = d < t->head_dim && i < n_queries ? t->q[at] : 0.0f;
            }
        for (d = 0; d < n_words && kind == AVL__AS_BF16; d++)
            for (c = 0; c < 32; c += AVL__W) {
                const float *two = queries + 64 * (size_t)d + c;
                AVL_(store_words)(queries + 32 * d + c, AVL_(pair_bf16)(AVL_(load)(two), AVL_(load)(two + 32)));
            }
        for (j = 0; j < t->n_keys; j += n) {
            const float *k = keys + (size_t)j * key_stride;
            float *s = scores + 32 * (size_t)j;
            n = t->n_keys - j >= MANY ? MANY : 1;
            for (c = 0; c < 32; c += 2 * AVL__W)
                if (n == MANY) AVL_(score_keys)(kind, MANY, k, key_stride, n_words, queries + c, scale, s + c);
                else           AVL_(score_keys)(kind, 1, k, key_stride, n_words, queries + c, scale, s + c);
        }
        for (j = t->n_visible + first; j < t->n_keys; j++)           // causal: key n_visible + i from query i + 1 on
            for (i = 0; i < 32 && i <= j - t->n_visible - first; i++) scores[32 * (size_t)j + (size_t)i] = -FLT_MAX;
        AVL_(softmax_columns)(kind, scores, t->n_keys, inverse);
        for (d = 0; d < t->head_dim; d += 2 * AVL__W)
            for (i = 0; i < n_queries; i += n) {
                float *out = t->out + (size_t)(first + i) * t->q_stride + d;
                const float *v = values + d, *s = scores + i;
                const int left = t->head_dim - d, is_whole = left >= 2 * AVL__W;
                n = n_queries - i >= MANY ? MANY : 1;
                if (n == MANY && is_whole)
                    AVL_(mix_values)(kind, MANY, out, t->q_stride, v, v_stride, n_values, 2 * AVL__W, s, inverse + i);
                else if (n == MANY)
                    AVL_(mix_values)(kind, MANY, out, t->q_stride, v, v_stride, n_values, left, s, inverse + i);
                else
                    AVL_(mix_values)(kind, 1, out, t->q_stride, v, v_stride, n_values, left, s, inverse + i);
            }
    }
}

static void AVL_(attend)(const avl__tile *t, float *scratch) {
    AVL_(attend_as)(AVL__AS_F32, t, t->k, t->kv_stride, t->v, t->kv_stride, scratch);
}

#if AVL__W == 16
// In bfloat16: keys and values are rounded once for all queries, with zeros up to a multiple of 32 columns.
// scratch: [n_keys][32 + head_dim] + [head_dim][32] floats
static void AVL_(attend_coarsely)(const avl__tile *t, float *scratch) {
    const int n = (t->head_dim + 31) / 32 * 32;
    float *keys = scratch + 32 * (size_t)(t->n_keys + n), *values = keys + (size_t)t->n_keys * n / 2;
    int j, d;
    for (j = 0; j < t->n_keys; j++)
        for (d = 0; d < n; d += 32) {
            const float *k = t->k + (size_t)j * t->kv_stride + d;
            const int left = t->head_dim - d;
            const avl__vf low = AVL_(load_some)(k, left), high = AVL_(load_some)(k + 16, left - 16);
            AVL_(store_words)(keys + ((size_t)j * n + d) / 2, AVL_(to_bf16)(low, high));
        }
    for (j = 0; j < t->n_keys; j += 2)
        for (d = 0; d < n; d += 16) {
            const float *v = t->v + (size_t)j * t->kv_stride + d;
            const int left = t->head_dim - d, is_pair = j + 1 < t->n_keys;
            const avl__vf second = AVL_(load_some)(v + (is_pair ? t->kv_stride : 0), is_pair ? left : 0);
            AVL_(store_words)(values + (size_t)n * (j / 2) + d, AVL_(pair_bf16)(AVL_(load_some)(v, left), second));
        }
    AVL_(attend_as)(AVL__AS_BF16, t, keys, (size_t)n / 2, values, (size_t)n, scratch);
}
#endif

// One query. scores[j] += q k[j] of n registers of columns; the last one has `left` columns.
AVL__INLINE void AVL_(score_halves)(int n, int left, const float *q, const uint16_t *k, size_t stride, int n_keys,
                                    float *scores) {
    avl__vf of_q[8];
    int i, j;
    AVL__EACH(i, n) of_q[i] = AVL_(load_some)(q + AVL__W * i, i + 1 < n ? AVL__W : left);
    for (j = 0; j < n_keys; j++, k += stride) {
        avl__vf score = AVL_(splat)(0.0f);
        avl__prefetch_page(k, 2 * stride);
        AVL__EACH(i, n) {
            const avl__vf key = AVL_(load_numbers)(ASTROVL_TYPE_F16, k + AVL__W * i, i + 1 < n ? AVL__W : left);
            score = AVL_(fma)(of_q[i], key, score);
        }
        scores[j] += AVL_(add_lanes)(score);
    }
}

// out += sum of weights[j] v[j], likewise
AVL__INLINE void AVL_(mix_halves)(int n, int left, float *out, const uint16_t *v, size_t stride, int n_keys,
                                  const float *weights) {
    avl__vf acc[8];
    int i, j;
    AVL__EACH(i, n) acc[i] = AVL_(load_some)(out + AVL__W * i, i + 1 < n ? AVL__W : left);
    for (j = 0; j < n_keys; j++, v += stride) {
        avl__prefetch_page(v, 2 * stride);
        AVL__EACH(i, n) {
            const avl__vf value = AVL_(load_numbers)(ASTROVL_TYPE_F16, v + AVL__W * i, i + 1 < n ? AVL__W : left);
            acc[i] = AVL_(fma)(AVL_(splat)(weights[j]), value, acc[i]);
        }
    }
    AVL__EACH(i, n) AVL_(store_some)(out + AVL__W * i, i + 1 < n ? AVL__W : left, acc[i]);
}

// Blocks of 16 keys, so that those of wide heads are still in the L1 cache when their next columns are wanted
static void AVL_(attend_one)(float *out, const float *q, const uint16_t *k, const uint16_t *v, size_t stride,
                             int n_keys, int head_dim, float *weights) {
    int d, j, n;
    memset(weights, 0, (size_t)n_keys * sizeof *weights);
    for (j = 0; j < n_keys; j += 16)
        for (d = 0; d < head_dim; d += AVL__W * n) {
            const int m = n_keys - j < 16 ? n_keys - j : 16, left = head_dim - d;
            const uint16_t *from = k + (size_t)j * stride + d;
            n = left >= 8 * AVL__W ? 8 : left >= 4 * AVL__W ? 4 : 1;
            if (n == 8)      AVL_(score_halves)(8, AVL__W, q + d, from, stride, m, weights + j);
            else if (n == 4) AVL_(score_halves)(4, AVL__W, q + d, from, stride, m, weights + j);
            else             AVL_(score_halves)(1, left < AVL__W ? left : AVL__W, q + d, from, stride, m, weights + j);
        }
    AVL_(softmax)(weights, n_keys, (float)(1.0 / avl__sqrt((double)head_dim)));
    memset(out, 0, (size_t)head_dim * sizeof *out);
    for (j = 0; j < n_keys; j += 16)
        for (d = 0; d < head_dim; d += AVL__W * n) {
            const int m = n_keys - j < 16 ? n_keys - j : 16, left = head_dim - d;
            const uint16_t *from = v + (size_t)j * stride + d;
            n = left >= 8 * AVL__W ? 8 : left >= 4 * AVL__W ? 4 : 1;
            if (n == 8)      AVL_(mix_halves)(8, AVL__W, out + d, from, stride, m, weights + j);
            else if (n == 4) AVL_(mix_halves)(4, AVL__W, out + d, from, stride, m, weights + j);
            else             AVL_(mix_halves)(1, left < AVL__W ? left : AVL__W, out + d, from, stride, m, weights + j);
        }
}

#endif   // AVL__WHOLE

// ---- the tables ----------------------------------------------------------------------------------------------------

#define AVL__TABLE(isa, coarsely, float_kind, float_group) \
    static const avl__kernels AVL__JOIN(kernels, isa) = { \
        AVL__STRING(isa), avl__dot_portable, avl__axpy_portable, AVL_BASE_(linear), AVL_BASE_(dot_f16), \
        AVL_BASE_(rms_norm), AVL_BASE_(layer_norm), AVL_BASE_(gelu), AVL_BASE_(quick_gelu), AVL_BASE_(silu_product), \
        AVL_(quantize), AVL_(multiply), AVL_BASE_(attend), coarsely, AVL_BASE_(attend_one), AVL_BASE_(to_halves), \
        AVL_BASE_(from_halves), AVL__TILE, float_kind, float_group, AVL__FEW};

#if AVL__W == 16
AVL__TABLE(avx512, NULL, AVL__AS_PAIRS, AVL__TILE)
AVL__TABLE(avx512_bf16, AVL_(attend_coarsely), AVL__AS_BF16, AVL__MAX_TILE)
#else
AVL__TABLE(AVL__ISA, NULL, AVL__W == 8 ? AVL__AS_PAIRS : AVL__AS_F32, AVL__TILE)
#endif

#undef AVL__ISA
#undef AVL__BASE
#undef AVL__W
#undef AVL__WIDE
#undef AVL__WHOLE
#undef AVL__TILE
#undef AVL__TILE_SIZES
#undef AVL__SIGNED_Q8

#endif   // AVL__ISA
