// astrovl.h 0.2.0: astronomy's vision-language models in one C header.                                  MIT license
//
// Runs AstroLLaVA (arXiv 2504.08583) and other models built like LLaVA-1.5 (a CLIP vision tower, a projector, a
// LLaMA-family language model) from the GGUF files that llama.cpp uses, and PAPERCLIP (arXiv 2403.08851) and other
// two-tower CLIPs from the files that clip.cpp uses. C99 or C++11, libc and libm; POSIX threads and mmap where there
// are any. The reference is transformers in float32 and Pillow; exact mode gives the same bits on every machine.
//
// ====================================================================================================================
// [0] Manual
// ====================================================================================================================
// Contents (search for the number in brackets)
//   [1] API          every public declaration, documented where it stands
//   [2] platform     configuration, errors, memory, byte order, files, time, threads
//   [3] numbers      f16, bf16 and the block formats to float32; exp, tanh, erf, sin, cos that are the same everywhere
//   [4] ops          the audit tap; norms, softmax, activations, RoPE, products, attention: plain C, in one fixed order
//   [5] GGUF         reading the files; weights across several files
//   [6] text         SentencePiece, byte-level BPE and CLIP tokenizers
//   [7] images       PNG, JPEG, PNM; resize, pad, crop
//   [8] CLIP         the vision tower and its preprocessing, the text tower
//   [9] LLaMA        the language model and its KV cache
//   [10] VLM         models, sessions, the projector, prompt templates, images spliced into the sequence
//   [11] generation  sampling, guided answers (JSON schemas, patterns), stop rules, streaming, turns, captions
//   [12] contrastive embeddings of images and texts, scores, search
//   [13] SIMD        the kernels for vector registers: one template, and the choice at run time
//
// ---- How to use it -------------------------------------------------------------------------------------------------
// In exactly one .c or .cpp file of your project, write
//     #define ASTROVL_IMPLEMENTATION
//     #include "astrovl.h"
// and include it without the define wherever else you call it. Compile with -O2 or -O3; link with -lm, and with
// -pthread unless ASTROVL_NO_THREADS is defined. A caption is one call:
//     astrovl_error err;
//     astrovl_model *model = astrovl_open("astrovl-tiny.gguf", NULL, &err);
//     char *text = model ? astrovl_caption_file(model, "m51.jpg", NULL, &err) : NULL;
//     puts(text ? text : err.message);
//     astrovl_free(text);
//     astrovl_close(model);
//
// The real AstroLLaVA comes as two files, the language model and the vision half ("mmproj"):
//     const char *files[] = {"astrollava-q4_0.gguf", "astrollava-mmproj-f16.gguf"};
//     model = astrovl_open_files(files, 2, NULL, &err);
//
// A conversation, streamed to the terminal as it is written (astrovl_chat_batch runs several at once, which is faster):
//     static int show(void *user, const char *text, size_t size) {
//         (void)user;
//         return fwrite(text, 1, size, stdout) != size;       // non-zero stops the answer
//     }
//     astrovl_generation how = {0};                           // all zeros: greedy, 256 tokens
//     how.on_text = show;
//     astrovl_image image;
//     if (astrovl_image_load("m51.jpg", NULL, &image, &err) == ASTROVL_OK) {
//         astrovl_session *s = astrovl_session_new(model, NULL, &err);
//         astrovl_free(astrovl_chat(s, &image, 1, "What kind of galaxy is this?", &how, &err));
//         astrovl_free(astrovl_chat(s, NULL, 0, "Is it seen edge-on or face-on?", &how, &err));   // (the image stays)
//         astrovl_session_free(s);
//         astrovl_image_free(&image);
//     }
//
// An answer of a given form: here a regular expression's, with astrovl_guide_schema JSON that keeps to a schema.
//     how.guide = astrovl_guide_regex(model, "(spiral|elliptical|irregular), [0-9] arms", &err);
//     text = astrovl_ask_file(model, "m51.jpg", "Which class of galaxy, and how many arms?", &how, &err);
//     astrovl_guide_free(how.guide);
//
// Which words fit an image? And with embeddings kept, which images fit words?
//     const char *words[] = {"a spiral galaxy", "a globular cluster"};
//     astrovl_fit fits[2];
//     astrovl_score(model, &image, words, 2, fits, &err);
//     astrovl_embed_images(s, images, n, 1, rows, &err);          // [n][n_embd_joint], store them as float16
//     astrovl_embed_texts(s, words, 1, 1, query, &err);
//     astrovl_rows index = {rows_f16, n, n_embd_joint};
//     n_hits = astrovl_search(&index, query, 10, 0, hits, &err);
//
// Looking inside: a callback, the tap (`tap` in a session's options), gets every intermediate tensor of a transformer.
//     static void look(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
//         if (strcmp(name, "model.layers.0.self_attn.attn_weights") == 0) ...  // [n_head][n_new][n_keys]
//     }
//
// The tap's names are transformers' (but for context, q_rope, k_rope, act), here in the order of the calls. I is the
// layer; rows are of this pass. Where no shape is given, it is [rows][n_embd] of the tower or model.
//     image   pixel_values [3][S][S]   vision_model.embeddings.patch_embedding   vision_model.embeddings
//             vision_model.pre_layrnorm   and for each layer, with vision_model.encoder.layers.I before it,
//             .layer_norm1   .self_attn.q_proj .k_proj .v_proj .attn_weights [n_head][rows][rows] .context .out_proj
//             .layer_norm2   .mlp.fc1 .activation_fn [rows][n_ff] .fc2   and the layer's own name: its output
//     LLaVA   image_features   multi_modal_projector.linear_1 .act [rows][n_hidden] .linear_2   (or .linear alone)
//     CLIP    vision_model.post_layernorm [1][n_embd]   visual_projection.head.act .head (PAPERCLIP's)
//             visual_projection [1][n_embd_joint]
//             text_model.embeddings   text_model.encoder.layers.I as above   text_model.final_layer_norm
//             text_projection.head.act .head   text_projection [1][n_embd_joint]
//     text    model.embed_tokens   and for each layer, with model.layers.I before it,
//             .input_layernorm   .self_attn.q_proj [rows][n_head head_dim] .k_proj .v_proj [rows][n_head_kv head_dim]
//             .q_rope .k_rope .attn_weights [n_head][rows][n_past + rows] .context [rows][n_head head_dim] .o_proj
//             .post_attention_layernorm   .mlp.gate_proj .up_proj .act [rows][n_ff] .down_proj   and its own name
//             model.norm [n_logits][n_embd]   lm_head [n_logits][n_vocab]
//
// ---- Rules ---------------------------------------------------------------------------------------------------------
// Errors: a call that fails returns a status other than ASTROVL_OK (or NULL, or -1) and fills the astrovl_error it was
// given. A NULL handle, or NULL where a pointer is needed, is such a failure (ARGUMENT), or gives zeros. Nothing is
// printed, no signal raised, no process ended. Input files may be hostile: every size in them is checked before use.
// Threads: a model is read-only once it is open: any number of threads and sessions may share it. A session, together
// with its forks, belongs to one thread at a time; its worker threads sleep between calls, and do not survive a fork()
// of the process. There is no global state.
// Memory: what a function returns is released with astrovl_free, handles with their own function; both allow NULL.
// Weights are used in place, in the mapped file: a 4 GB model costs 4 GB of page cache and no copy (a file that is cut
// short meanwhile ends the process by SIGBUS, unless it was opened with no_mmap). Only vectors are expanded. A session
// holds the KV cache, n_ctx * n_layer * n_head_kv * head_dim * 4 bytes (8 with portable kernels, as in exact mode), of
// which the system gives only what has been written, and the activations of at most 512 rows.
//
// ---- Two modes -----------------------------------------------------------------------------------------------------
// ASTROVL_EXACT computes in float32 with one fixed order for every sum, no fused multiply-add, and its own exp, erf,
// sin and cos made of + - * / and sqrt: the same bits with every compiler, on every processor with IEEE arithmetic.
// Options that break this are refused by the compiler where macros show them, else by the session (UNSUPPORTED).
// ASTROVL_FAST (default) uses vector instructions, rounds activations to 8-bit integers in blocks of 32, and keeps the
// KV cache in float16. Weights of a float type are multiplied with activations of bfloat16 (AVX-512 BF16), of 14-bit
// integers (other x86-64 processors) or of float32 (all others). Results never depend on the number of threads.
// The best kernels for the processor are chosen at run time; `isa` in a session's options (for the astrovl program, the
// environment variable ASTROVL_ISA) sets an upper limit. From the simplest to the best:
//     x86-64    portable, avx2, avx_vnni, avx512 (with VNNI), avx512_bf16
//     AArch64   portable, neon, neon_dotprod
//     others    portable, generic: gcc's and clang's vector types, where the target has vector registers
//
// ---- Configuration: define before the implementation ---------------------------------------------------------------
//   ASTROVL_API                   put before every public function; extern by default
//   ASTROVL_MALLOC(size), ASTROVL_REALLOC(memory, size), ASTROVL_FREE(memory)   all or none; any may return NULL
//   ASTROVL_NO_THREADS            no pthreads: one thread does all
//   ASTROVL_NO_MMAP               files are read, not mapped
//   ASTROVL_NO_FILES              no files: models and images come as memory blocks (of stdio, only vsnprintf is used)
//   ASTROVL_NO_SIMD               portable kernels alone
//   ASTROVL_NO_EXACT              options that break exact mode are accepted: its sessions are refused instead
//   ASTROVL_MAX_PIXELS            largest image that is decoded, 2^28 pixels by default
//   ASTROVL_DEFAULT_CONTEXT       KV cache of a session that names no size: 4096 tokens (or the model's, if less)
//   ASTROVL_MAX_THREADS           64
//   ASTROVL_HEADER_NAME           this file's name if it is not "astrovl.h": the file includes itself by it

// ====================================================================================================================
// [1] API
// The public declarations. Errors, threads and ownership are the manual's rules; and for all declarations:
// - err may be NULL; on success it is left alone. Failures are named below without ASTROVL_ERROR_; ARGUMENT and MEMORY,
//   which are possible wherever there is an err, are not. (astrovl_image_load may leave a warning when all went well.)
// - arrays are row-major, the slowest dimension written first: [n_tokens][n_embd]. "out" is the caller's memory.
// - option structs may be all zeros (or the pointer NULL): zero always means the sensible default.
// ====================================================================================================================

#ifndef AVL__ISA        // section [13] includes this file again for each instruction set
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

#define ASTROVL_VERSION_MAJOR 0
#define ASTROVL_VERSION_MINOR 2
#define ASTROVL_VERSION_PATCH 0
#define ASTROVL_VERSION       "0.2.0"

// ---- status and errors ---------------------------------------------------------------------------------------------
typedef enum astrovl_status {
    ASTROVL_OK = 0,
    ASTROVL_ERROR_ARGUMENT,      // the caller's mistake: a parameter is missing or out of range
    ASTROVL_ERROR_MEMORY,        // an allocation failed
    ASTROVL_ERROR_FILE,          // a file cannot be opened or read
    ASTROVL_ERROR_FORMAT,        // a file's bytes break its format's rules
    ASTROVL_ERROR_UNSUPPORTED,   // well-formed, but of a kind this header does not implement
    ASTROVL_ERROR_MODEL,         // the files lack a part that the call needs, or their shapes do not fit together
    ASTROVL_ERROR_LIMIT,         // larger than a limit: the context is full, an image has too many pixels
    ASTROVL_CANCELLED            // a callback asked to stop
} astrovl_status;

typedef struct astrovl_error {
    astrovl_status status;
    char message[480];           // one line of UTF-8: names the file, tensor, key or byte, and what to do about it
} astrovl_error;
ASTROVL_API const char *astrovl_status_name(astrovl_status status);   // "ok", "format", ...
ASTROVL_API void astrovl_free(void *memory);

// ---- GGUF files ----------------------------------------------------------------------------------------------------
// Source: the GGUF specification (ggml-org/ggml, docs/gguf.md): versions 2 and 3, little-endian; types by its numbers.
typedef enum astrovl_type {
    ASTROVL_TYPE_F32 = 0, ASTROVL_TYPE_F16 = 1, ASTROVL_TYPE_Q4_0 = 2, ASTROVL_TYPE_Q4_1 = 3, ASTROVL_TYPE_Q5_0 = 6,
    ASTROVL_TYPE_Q5_1 = 7, ASTROVL_TYPE_Q8_0 = 8, ASTROVL_TYPE_Q2_K = 10, ASTROVL_TYPE_Q3_K = 11,
    ASTROVL_TYPE_Q4_K = 12, ASTROVL_TYPE_Q5_K = 13, ASTROVL_TYPE_Q6_K = 14, ASTROVL_TYPE_BF16 = 30
} astrovl_type;
typedef enum astrovl_value_type {
    ASTROVL_VALUE_U8 = 0, ASTROVL_VALUE_I8 = 1, ASTROVL_VALUE_U16 = 2, ASTROVL_VALUE_I16 = 3, ASTROVL_VALUE_U32 = 4,
    ASTROVL_VALUE_I32 = 5, ASTROVL_VALUE_F32 = 6, ASTROVL_VALUE_BOOL = 7, ASTROVL_VALUE_STRING = 8,
    ASTROVL_VALUE_ARRAY = 9, ASTROVL_VALUE_U64 = 10, ASTROVL_VALUE_I64 = 11, ASTROVL_VALUE_F64 = 12
} astrovl_value_type;

typedef struct astrovl_gguf astrovl_gguf;
typedef struct astrovl_string {  // not zero-terminated
    const char *data;
    size_t      size;
} astrovl_string;
typedef struct astrovl_tensor {  // of a file, owned by the file's handle, as is astrovl_kv
    const char   *name;
    int           type;          // astrovl_type, or the number of a type that cannot be read here
    int           is_used;       // 1: a model has been opened from the file, and reads it
    int           n_dims;        // 1 to 4
    int64_t       ne[4];         // GGUF's order, rows' length first: [n_out][n_in] has ne = {n_in, n_out}; unused: 1
    uint64_t      offset, n_bytes;   // offset: from the file's first byte
    const void   *data;          // little-endian blocks on every host; no alignment is promised
} astrovl_tensor;
typedef struct astrovl_kv {      // one metadata entry
    const char         *key;
    astrovl_value_type  type;
    astrovl_value_type  item_type;   // of an array's elements; otherwise equal to type
    uint64_t            count;       // elements of an array; otherwise 1
    const void         *data;        // as in the file: little-endian; a string is its u64 length and its bytes
    uint64_t            n_bytes;
} astrovl_kv;

// Opens a file, mapped where the platform can and `no_mmap` is 0, or a block of memory, which must outlive the handle
// (name: for messages). Every offset, size, type and string is checked. NULL and err: FILE, FORMAT, UNSUPPORTED.
ASTROVL_API astrovl_gguf *astrovl_gguf_open(const char *path, int no_mmap, astrovl_error *err);
ASTROVL_API astrovl_gguf *astrovl_gguf_open_memory(const void *data, size_t size, const char *name, astrovl_error *err);
ASTROVL_API void astrovl_gguf_close(astrovl_gguf *file);
ASTROVL_API const char *astrovl_gguf_name(const astrovl_gguf *file);
ASTROVL_API int astrovl_gguf_version(const astrovl_gguf *file);         // 2 or 3
ASTROVL_API uint64_t astrovl_gguf_size(const astrovl_gguf *file);       // bytes
ASTROVL_API int astrovl_gguf_n_tensors(const astrovl_gguf *file);
ASTROVL_API const astrovl_tensor *astrovl_gguf_tensor(const astrovl_gguf *file, int index);             // NULL: absent
ASTROVL_API const astrovl_tensor *astrovl_gguf_find_tensor(const astrovl_gguf *file, const char *name); // NULL: absent
ASTROVL_API int astrovl_gguf_n_kv(const astrovl_gguf *file);
ASTROVL_API const astrovl_kv *astrovl_gguf_kv(const astrovl_gguf *file, int index);                     // NULL: absent
ASTROVL_API int astrovl_gguf_find_kv(const astrovl_gguf *file, const char *key);                     // index, or -1
// Element `i` of entry `index` (i = 0 for a scalar), converted; a boolean is 0 or 1. 0, or an empty string, for an
// element that does not exist, a number asked of a string or a string asked of a number.
ASTROVL_API int64_t astrovl_gguf_int(const astrovl_gguf *file, int index, uint64_t i);
ASTROVL_API double astrovl_gguf_float(const astrovl_gguf *file, int index, uint64_t i);
ASTROVL_API astrovl_string astrovl_gguf_string(const astrovl_gguf *file, int index, uint64_t i);
ASTROVL_API const char *astrovl_type_name(int type);                    // "Q4_K"; NULL for an unknown type
// Bytes of a row of n_values; 0 if the type is unknown or n_values is not a multiple of its block.
ASTROVL_API size_t astrovl_type_row_bytes(int type, int64_t n_values);
// Expands n_values to float32, exactly as ggml does. ARGUMENT: an unknown type, or a part of a block.
ASTROVL_API astrovl_status astrovl_dequantize(int type, const void *blocks, float *values, int64_t n_values);
// IEEE half precision and bfloat16, as bits; to the nearest value, ties to even, when narrowing.
ASTROVL_API float astrovl_f16_to_f32(uint16_t half);
ASTROVL_API float astrovl_bf16_to_f32(uint16_t half);
ASTROVL_API uint16_t astrovl_f32_to_f16(float value);
ASTROVL_API uint16_t astrovl_f32_to_bf16(float value);

// ---- models --------------------------------------------------------------------------------------------------------
typedef struct astrovl_model   astrovl_model;     // weights, vocabulary, settings: immutable, shared by threads
typedef struct astrovl_session astrovl_session;   // KV cache, scratch memory, threads: one caller at a time
typedef struct astrovl_guide   astrovl_guide;     // what an answer may look like: a regular expression or a JSON schema
typedef enum astrovl_template {    // of prompts
    ASTROVL_TEMPLATE_AUTO = 0,     // by tokenizer.chat_template (recognized by its markers, not interpreted)
    ASTROVL_TEMPLATE_VICUNA,       // "vicuna_v1": AstroLLaVA, LLaVA-1.5 (its training)
    ASTROVL_TEMPLATE_LLAVA,        // "llava_v1": the same with "human" for "user" (LLaVA's own inference scripts)
    ASTROVL_TEMPLATE_LLAVA_V0,     // "llava_v0": ###Human:
    ASTROVL_TEMPLATE_LLAVA_LLAMA2, // "llava_llama_2": [INST] <<SYS>>, with LLaVA's system text
    ASTROVL_TEMPLATE_LLAMA2,       // "llama_2": the same without
    ASTROVL_TEMPLATE_MISTRAL,      // "mistral": [INST] in spaces, no <<SYS>> (Mistral 7B v0.1 and v0.2)
    ASTROVL_TEMPLATE_MISTRAL_V3,   // "mistral_v3": [INST] is a token (v0.3)
    ASTROVL_TEMPLATE_ZEPHYR,       // "zephyr": <|user|>, </s>: TinyLlama too
    ASTROVL_TEMPLATE_LLAMA3,       // "llama_3": <|start_header_id|>user<|end_header_id|>
    ASTROVL_TEMPLATE_CHATML,       // "chatml": <|im_start|>user: SmolLM2 and many others
    ASTROVL_TEMPLATE_PLAIN         // "plain": no markers, the model continues the text
} astrovl_template;
#define ASTROVL_TEMPLATE_NAMES \
    "vicuna_v1, llava_v1, llava_v0, llava_llama_2, llama_2, mistral, mistral_v3, zephyr, llama_3, chatml, plain"

typedef struct astrovl_open_options {
    int              no_mmap;      // 1: read the file into memory instead of mapping it
    astrovl_template chat_template;
} astrovl_open_options;
typedef struct astrovl_memory {    // a model file that lies in memory
    const void *data;
    size_t      size;
    const char *name;              // for messages; may be NULL
} astrovl_memory;
// Opens a model of one or several GGUF files (text model, mmproj, contrastive towers: tensors are found by name across
// all), or of blocks of memory, which must outlive it. Any part may be absent; astrovl_get_info says what there is.
// NULL and err, the first problem: FILE, FORMAT, UNSUPPORTED, MODEL.
ASTROVL_API astrovl_model *astrovl_open(const char *path, const astrovl_open_options *options, astrovl_error *err);
ASTROVL_API astrovl_model *astrovl_open_files(const char *const *paths, int n_paths,
                                              const astrovl_open_options *options, astrovl_error *err);
ASTROVL_API astrovl_model *astrovl_open_memory(const astrovl_memory *blocks, int n_blocks,
                                               const astrovl_open_options *options, astrovl_error *err);
ASTROVL_API void astrovl_close(astrovl_model *model);                   // after its sessions

typedef struct astrovl_info {
    int has_vocab, has_text, has_vision, has_projector;
    astrovl_template chat_template;                     // AUTO: the files' is not recognized, and one must be chosen
    const char *name;                                   // general.name, or ""; valid until astrovl_close
    const char *note;                                   // what the files ask for and is not followed; NULL: nothing
    int n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff;     // the language model (LLaMA)
    float rope_theta, rms_norm_eps;
    int bos_token, eos_token;                           // -1: none
    int image_size, patch_size, n_patches, vision_n_embd, vision_n_layer, vision_n_head, vision_n_ff;   // CLIP
    int vision_feature_layer;                           // how many layers run before the features are taken
    int n_image_tokens;                                 // rows that one image takes in the sequence
    int has_joint_image, has_joint_text;                // contrastive: images (texts) can be embedded
    int n_embd_joint;                                   // length of an embedding
    float logit_scale;                                  // what cosines are multiplied by before softmax (CLIP: 100)
    int clip_text_n_ctx, clip_text_n_embd, clip_text_n_layer, clip_text_n_head, clip_text_n_ff, clip_text_n_vocab;
    uint64_t n_params, n_weight_bytes;
} astrovl_info;
ASTROVL_API void astrovl_get_info(const astrovl_model *model, astrovl_info *info);
ASTROVL_API int astrovl_n_files(const astrovl_model *model);
ASTROVL_API const astrovl_gguf *astrovl_file(const astrovl_model *model, int index);   // owned by the model
ASTROVL_API const char *astrovl_template_name(astrovl_template t);                      // "vicuna_v1", ...
ASTROVL_API int astrovl_template_from_name(const char *name);                           // -1: no such template

// ---- one-call API --------------------------------------------------------------------------------------------------
typedef struct astrovl_image {
    int            width, height;
    unsigned char *rgb;            // [height][width][3], sRGB as in the file
    int            orientation;    // EXIF's, 1 to 8; 1: upright, as astrovl_image_load makes it
} astrovl_image;
typedef struct astrovl_generation {    // how text is chosen and when it ends
    int      max_tokens;           // 0: 256
    float    temperature;          // 0: greedy (then top_k, top_p, min_p and seed are unused)
    int      top_k;                // keep the k likeliest; 0: all
    float    top_p;                // keep the smallest set with this probability (Holtzman et al. 2020); 0 or 1: all
    float    min_p;                // drop what is less likely than min_p * the likeliest; 0: none
    float    repetition_penalty;   // logits of seen tokens / p if > 0, * p otherwise (Keskar et al. 2019); 0 or 1: off
    int      repetition_window;    // over the last n generated tokens; 0: 64
    uint64_t seed;                 // the same seed gives the same choices on every machine
    const char *const *stop;       // [n_stop] texts that end the answer (and are left out of it)
    int      n_stop;
    const char *system;            // system prompt; NULL: the template's own; "": none
    astrovl_guide *guide;          // NULL: free text; else the answer keeps to it, and ends within max_tokens
    int      parse_special;        // 1: special tokens in the user's text are taken as such (trusted text only)
    // Called with each new piece of text, whole characters; a non-zero return cancels (the answer so far is kept).
    int    (*on_text)(void *user, const char *text, size_t size);
    void    *user;
} astrovl_generation;
// Each returns the answer, zero-terminated UTF-8 (astrovl_free), or NULL and err. They open a session of their own (all
// processors, fast mode); use a session to keep it, to talk on, or to choose threads and mode.
ASTROVL_API char *astrovl_caption(const astrovl_model *model, const astrovl_image *image,
                                  const astrovl_generation *options, astrovl_error *err);
ASTROVL_API char *astrovl_caption_file(const astrovl_model *model, const char *image_path,
                                       const astrovl_generation *options, astrovl_error *err);
ASTROVL_API char *astrovl_ask(const astrovl_model *model, const astrovl_image *image, const char *question,
                              const astrovl_generation *options, astrovl_error *err);
ASTROVL_API char *astrovl_ask_file(const astrovl_model *model, const char *image_path, const char *question,
                                   const astrovl_generation *options, astrovl_error *err);
#define ASTROVL_CAPTION_PROMPT "Describe this image."

// ---- sessions ------------------------------------------------------------------------------------------------------
typedef enum astrovl_mode { ASTROVL_FAST = 0, ASTROVL_EXACT } astrovl_mode;      // see the manual
// Gets an intermediate tensor the moment it is computed; must not call back into the session. Valid during the call:
// name ("model.layers.0.self_attn.q_proj"; the manual lists all), shape ([n_dims], slowest first), data.
// layer: the layer's number, or -1 outside the layers
typedef void (*astrovl_tap)(void *user, const char *name, int layer, const int64_t *shape, int n_dims,
                            const float *data);
// Long work reports the layers of stage "image" or "prompt". Non-zero cancels it (CANCELLED), unless done is total.
typedef int (*astrovl_progress)(void *user, const char *stage, int done, int total);

typedef struct astrovl_session_options {
    astrovl_mode     mode;
    int              n_threads;    // 0: one per processor
    int              n_ctx;        // tokens the KV cache holds; 0: the model's, at most ASTROVL_DEFAULT_CONTEXT
    astrovl_tap      tap;          // NULL: none
    void            *tap_user;
    astrovl_progress progress;     // NULL: none
    void            *progress_user;
    const char      *isa;          // fast mode uses none better than these (see the manual); NULL: no limit
} astrovl_session_options;
// A conversation, still empty.
ASTROVL_API astrovl_session *astrovl_session_new(const astrovl_model *model, const astrovl_session_options *options,
                                                 astrovl_error *err);
// Another one, which shares the parent's mode, threads, scratch memory, tap and progress: it costs only its KV cache.
// n_ctx: as in the options; 0: the parent's.   A parent and its forks may be freed in any order.
ASTROVL_API astrovl_session *astrovl_session_fork(const astrovl_session *parent, int n_ctx, astrovl_error *err);
ASTROVL_API void astrovl_session_free(astrovl_session *s);
ASTROVL_API void astrovl_session_reset(astrovl_session *s);             // forgets the conversation
ASTROVL_API int astrovl_session_n_past(const astrovl_session *s);       // positions the KV cache holds now
ASTROVL_API int astrovl_session_n_ctx(const astrovl_session *s);

// One turn of a conversation: the user says `text` about `images` (n_images may be 0), the model answers. Where `text`
// has the marker <image> n_images times, the images stand there; where it has none, they stand before the text, each
// followed by a newline (as in LLaVA). Earlier turns stay in the KV cache. Returns the answer (astrovl_free), or NULL
// and err (LIMIT when the context is full, MODEL when a part is missing); the conversation is then what it was before.
ASTROVL_API char *astrovl_chat(astrovl_session *s, const astrovl_image *images, int n_images, const char *text,
                               const astrovl_generation *options, astrovl_error *err);

typedef struct astrovl_turn {   // of one of several conversations: what astrovl_chat takes and gives
    astrovl_session          *session;
    const astrovl_image      *images;
    int                       n_images;
    const char               *text;
    const astrovl_generation *options;
    char                     *answer;      // out (astrovl_free); NULL if this turn failed
    astrovl_error             err;         // out: why; its status is ASTROVL_OK if there is an answer
} astrovl_turn;
// Turns of conversations of distinct sessions, one and its forks, each with the answer that astrovl_chat would give.
// The prompts are read one by one; then all answers are written together, a token of each per step, so that a step
// reads the weights from memory once (for every 16 conversations) and costs little more than one conversation's.
// Options may differ; turns that end early or fail do not disturb the others. Returns ASTROVL_OK if every turn has its
// answer, else the first failed turn's status; ARGUMENT, for all turns, if these sessions cannot go together.
ASTROVL_API astrovl_status astrovl_chat_batch(astrovl_turn *turns, int n_turns, astrovl_error *err);

typedef struct astrovl_stats {     // of the last turn; in a batch, a step's time is divided evenly among its turns
    double encode_seconds, prompt_seconds, decode_seconds;   // encoding images, reading the prompt, writing the answer
    int    n_prompt_tokens, n_answer_tokens;                 // of the prompt: image rows included
    int    stopped_by_limit;       // 1: max_tokens or the context ended the answer, not the model
} astrovl_stats;
ASTROVL_API void astrovl_get_stats(const astrovl_session *s, astrovl_stats *stats);
// The last answer's tokens, owned by the session, valid until the next turn.
ASTROVL_API const int32_t *astrovl_answer_tokens(const astrovl_session *s, int *n_tokens);

// ---- the parts of a session, one by one ----------------------------------------------------------------------------
// The vision tower's input, made as the model's files say (pad to square or center crop, bicubic resize, 1/255, mean
// and standard deviation).   pixels: out, [3][image_size][image_size].   MODEL: no vision tower.
ASTROVL_API astrovl_status astrovl_preprocess(const astrovl_model *model, const astrovl_image *image, float *pixels,
                                              astrovl_error *err);
// Encodes an image (not yet preprocessed) to the rows that the language model reads in its place.
// features: out, [n_image_tokens][n_embd].   MODEL: no vision tower or projector.
// Source: LLaVA-1.5 (arXiv 2310.03744) section 3; transformers' LlavaModel.get_image_features.
ASTROVL_API astrovl_status astrovl_encode_image(astrovl_session *s, const astrovl_image *image, float *features,
                                                astrovl_error *err);
// Appends tokens (or embeddings, [n_rows][n_embd]) to the sequence; after a failure it is what it was before.
// logits: out, [n_logits][n_vocab], of the last n_logits positions; NULL with n_logits 0: none.   LIMIT: no room
ASTROVL_API astrovl_status astrovl_eval_tokens(astrovl_session *s, const int32_t *tokens, int n_tokens, float *logits,
                                               int n_logits, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_eval_embeddings(astrovl_session *s, const float *rows, int n_rows, float *logits,
                                                   int n_logits, astrovl_error *err);
// Forgets all positions from n_past on (to branch a conversation or to retry). ARGUMENT if the session holds fewer.
ASTROVL_API astrovl_status astrovl_session_rewind(astrovl_session *s, int n_past, astrovl_error *err);
// The next token by the rules of `options`; changes logits [n_vocab] in place.
// history: [n_history] the tokens generated so far;   random_state: set it to the seed before the first call
ASTROVL_API int32_t astrovl_sample(float *logits, int n_vocab, const astrovl_generation *options,
                                   const int32_t *history, int n_history, uint64_t *random_state);

// ---- guided generation ---------------------------------------------------------------------------------------------
// Keeps an answer inside a regular language: after each token, only those may follow whose bytes continue to a text
// that matches a pattern or a JSON schema (Willard & Louf 2023, arXiv 2307.09702; PAPERCLIP's summaries are made so).
// A guide is extended while it is used: it belongs to one thread at a time. Several answers, one after another or in a
// batch, may share it. The model must outlive it.
// A pattern that the whole answer matches. Understood: literals, . [a-z] [^a-z] \d \w \s \D \W \S \n \t \r \xHH \uHHHH,
// groups ( ) and (?: ), |, * + ? {m} {m,} {m,n}; ^ and $ at the ends. UTF-8; . is any character but a line feed.
// FORMAT and UNSUPPORTED name the byte of the pattern, LIMIT: it is too large, MODEL: the vocabulary cannot spell it.
ASTROVL_API astrovl_guide *astrovl_guide_regex(const astrovl_model *model, const char *pattern, astrovl_error *err);
// JSON that validates against a schema (json-schema.org, draft 2020-12), of which this part is understood:
//   any      type (one or a list), enum, const, anyOf; title, description, default, examples, $schema, $id and $comment
//            are passed over;   array: items, minItems, maxItems;   string: minLength, maxLength (characters)
//   object   properties (written in their order), required (others may be left out), additionalProperties (never made)
// Integers have at most 15 digits and are not -0; other numbers have at most 15 digits before and after the point.
// Between the parts stands at most one space. Failures as above, with the place in the schema: "/properties/objects".
ASTROVL_API astrovl_guide *astrovl_guide_schema(const astrovl_model *model, const char *json, size_t size,
                                                astrovl_error *err);
ASTROVL_API void astrovl_guide_free(astrovl_guide *guide);

// For sampling loops of your own (astrovl_generation.guide does all this). States are numbers; an answer starts in 0.
// The state after a token; -1 where the token may not follow, or on a failure, which the next astrovl_guide_mask tells.
ASTROVL_API int astrovl_guide_next(astrovl_guide *guide, int state, int32_t token);
ASTROVL_API int astrovl_guide_is_accepting(const astrovl_guide *guide, int state);      // 1: the answer may end here
// Tokens that suffice to bring the answer to an end from here (0 in an accepting state). -1: no such state.
ASTROVL_API int astrovl_guide_min_tokens(const astrovl_guide *guide, int state);
// Sets the logits [n_vocab] of tokens to -infinity that lead to no match, or after which n_left - 1 more would not
// suffice to end; end tokens may follow in accepting states. LIMIT if none may follow. If memory is out, or more than
// 2^20 expressions were met, MEMORY or LIMIT stick: the guide must be freed.
ASTROVL_API astrovl_status astrovl_guide_mask(astrovl_guide *guide, int state, int n_left, float *logits,
                                              astrovl_error *err);

// ---- contrastive: images and texts in one space (CLIP, PAPERCLIP) --------------------------------------------------
// Embeds images (or texts: UTF-8, lower-cased and cleaned as by transformers' CLIPTokenizer, cut at the tower's number
// of positions). Several go through the tower together; the rows are the same as one by one. MODEL: no such tower.
// normalize: 1: each row divided by its length (cosines are then products);   embeddings: out, [n][n_embd_joint]
// Source: CLIP (arXiv 2103.00020) section 2.3; transformers' CLIPModel.get_image_features and get_text_features.
ASTROVL_API astrovl_status astrovl_embed_images(astrovl_session *s, const astrovl_image *images, int n_images,
                                                int normalize, float *embeddings, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_embed_texts(astrovl_session *s, const char *const *texts, int n_texts, int normalize,
                                               float *embeddings, astrovl_error *err);
// Token ids of a text for the text tower, start and end token included, not cut: as astrovl_tokenize.
ASTROVL_API int astrovl_clip_tokenize(const astrovl_model *model, const char *text, size_t size, int32_t *tokens,
                                      int capacity, astrovl_error *err);
typedef struct astrovl_fit {       // of a text to an image
    float cosine;
    float probability;             // softmax(logit_scale * cosine) over all texts
} astrovl_fit;
// fits: out, [n_texts]. Opens a session of its own: where speed counts, keep one and embed the texts once. MODEL.
ASTROVL_API astrovl_status astrovl_score(const astrovl_model *model, const astrovl_image *image,
                                         const char *const *texts, int n_texts, astrovl_fit *fits, astrovl_error *err);

typedef struct astrovl_rows {      // to be searched
    const void *data;              // [n_rows][n_dims] float16, little-endian, any alignment
    int64_t     n_rows;
    int         n_dims;
} astrovl_rows;
typedef struct astrovl_hit {
    int64_t row;
    float   score;
} astrovl_hit;
// The k rows with the largest products with the query, best first, the earlier row first among equals. All rows are
// compared, and summed in exact mode's order: the result is exact, and the same on every machine.
// query: [n_dims];   n_threads: 0: one per processor;   hits: out, [k].   Returns how many (at most k), or -1.
ASTROVL_API int astrovl_search(const astrovl_rows *rows, const float *query, int k, int n_threads, astrovl_hit *hits,
                               astrovl_error *err);

// The strings of one member of a JSON object (RFC 8259), such as a line of a .jsonl file: a string, or an array of
// strings. One block of memory, texts included (astrovl_free).   *n: how many, 0 if there is no such member
// NULL and err: FORMAT names the byte where the text breaks JSON's rules, or the member that is of another kind.
ASTROVL_API char **astrovl_json_strings(const char *json, size_t size, const char *key, int *n, astrovl_error *err);

// ---- text ----------------------------------------------------------------------------------------------------------
#define ASTROVL_ADD_SPECIAL   1    // BOS and EOS as the vocabulary asks
#define ASTROVL_PARSE_SPECIAL 2    // "<s>" in the text becomes the token (trusted text only)
// Text to token ids, as transformers' tokenizers do it. Returns how many there are: IF MORE THAN CAPACITY, THE REST WAS
// NOT WRITTEN. -1 and err: MODEL (no vocabulary), LIMIT (a text above 256 MB).
// text: [size] any bytes; what is not UTF-8 counts as U+FFFD;   tokens: out, [capacity]; NULL with capacity 0 to count
ASTROVL_API int astrovl_tokenize(const astrovl_model *model, const char *text, size_t size, int flags, int32_t *tokens,
                                 int capacity, astrovl_error *err);
// A token's spelling in the vocabulary ("▁the", "<0x0A>", "Ġthe"), owned by the model; empty for an id out of range.
ASTROVL_API astrovl_string astrovl_token_piece(const astrovl_model *model, int32_t token);
// The bytes a token stands for in running text: special tokens give none, and a character may take several tokens.
// Writes at most capacity bytes, without a terminating zero; returns how many there are.
ASTROVL_API int astrovl_token_text(const astrovl_model *model, int32_t token, char *text, int capacity);
// Token ids to text, zero-terminated (astrovl_free), without the space that the tokenizer put in front.
ASTROVL_API char *astrovl_detokenize(const astrovl_model *model, const int32_t *tokens, int n, astrovl_error *err);
ASTROVL_API int astrovl_token_is_end(const astrovl_model *model, int32_t token);   // 1: EOS, <|im_end|>, <|eot_id|>...

// ---- images --------------------------------------------------------------------------------------------------------
// The reference is Pillow's convert("RGB"): PNG is matched exactly, JPEG as libjpeg-turbo's default decodes it. Images
// that a function makes are new memory (astrovl_image_free).
typedef struct astrovl_image_options {
    uint64_t max_pixels;           // larger images are a LIMIT error; 0: ASTROVL_MAX_PIXELS
    int      as_stored;            // 1: pixels as the file has them, image->orientation tells how to turn them
} astrovl_image_options;
// Decodes a PNG, JPEG or PNM file (P5, P6), told apart by its first bytes, and applies its EXIF orientation.
// FILE, FORMAT (damaged), UNSUPPORTED, LIMIT; image is then empty. After OK err->message is empty, or a warning: a PNG
// with a wrong CRC of its pixels, which unpack to what their own check sum says.
ASTROVL_API astrovl_status astrovl_image_load(const char *path, const astrovl_image_options *options,
                                              astrovl_image *image, astrovl_error *err);
ASTROVL_API astrovl_status astrovl_image_decode(const void *data, size_t size, const astrovl_image_options *options,
                                                astrovl_image *image, astrovl_error *err);
ASTROVL_API void astrovl_image_free(astrovl_image *image);
// Turns and mirrors an image that was loaded as_stored by its orientation, and sets that to 1.
ASTROVL_API astrovl_status astrovl_image_upright(astrovl_image *image, astrovl_error *err);
// Pillow's resize(..., BICUBIC): antialiased, a = -0.5, in 8-bit fixed point. out may not be image itself.
ASTROVL_API astrovl_status astrovl_image_resize(const astrovl_image *image, int width, int height, astrovl_image *out,
                                                astrovl_error *err);
// The image centered on a square of its longer side, filled with `color` (NULL: black). LLaVA's expand2square.
ASTROVL_API astrovl_status astrovl_image_pad_square(const astrovl_image *image, const unsigned char color[3],
                                                    astrovl_image *out, astrovl_error *err);
// The middle width x height pixels (transformers' center_crop; black outside the image).
ASTROVL_API astrovl_status astrovl_image_center_crop(const astrovl_image *image, int width, int height,
                                                     astrovl_image *out, astrovl_error *err);

// ---- layers: each operation on plain arrays, one thread, for teaching and auditing ---------------------------------
// As memcpy, these check nothing: the arrays have to be as long as is said.
// y[i] = (x[i] - mean) / sqrt(var + eps) * weight[i] + bias[i]      LayerNorm (Ba et al. 2016), CLIP's norm
ASTROVL_API void astrovl_layer_norm(float *y, const float *x, const float *weight, const float *bias, int n, float eps);
// y[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]                   RMSNorm (Zhang & Sennrich 2019), LLaMA's norm
ASTROVL_API void astrovl_rms_norm(float *y, const float *x, const float *weight, int n, float eps);
// x[i] = exp(x[i] - max) / sum exp(x - max)
ASTROVL_API void astrovl_softmax(float *x, int n);
// GELU (Hendrycks & Gimpel 2016): x * Phi(x);  quick-GELU (CLIP): x * sigmoid(1.702 x);  SiLU: x * sigmoid(x)
ASTROVL_API void astrovl_gelu(float *x, int64_t n);
ASTROVL_API void astrovl_quick_gelu(float *x, int64_t n);
ASTROVL_API void astrovl_silu(float *x, int64_t n);
// Rotates the pairs (x[2i], x[2i+1]) of one head by position * inv_freq[i] (Su et al. 2021; GGUF's interleaved order).
// x: [head_dim]; inv_freq: [head_dim / 2]. Angles below 2^23 (beyond: NaN).
ASTROVL_API void astrovl_rope(float *x, int head_dim, int position, const float *inv_freq);
// y[n_rows][n_out] = x[n_rows][n_in] * w[n_out][n_in]^T + bias[n_out]  (bias may be NULL); w float32; exact mode's sums
ASTROVL_API void astrovl_linear(float *y, const float *x, const float *w, const float *bias, int n_rows, int n_in,
                                int n_out);
// Exact mode's functions: only + - * / and sqrt of IEEE arithmetic, so the same bits everywhere.
ASTROVL_API float astrovl_expf(float x);
ASTROVL_API float astrovl_tanhf(float x);
ASTROVL_API float astrovl_erff(float x);
#ifdef __cplusplus
}
#endif
#endif // ASTROVL_H

// ====================================================================================================================
// [2] Platform
// What the rest needs from the machine: memory, files, threads, time. Each part has a fallback in standard C, so the
// header builds where there is nothing else.
// ====================================================================================================================

#ifdef ASTROVL_IMPLEMENTATION
#ifndef ASTROVL__IMPLEMENTED
#define ASTROVL__IMPLEMENTED

// What the machine has, AVL__POSIX to AVL__SIMD: 1, or not defined, which #if takes as 0
#if defined(__unix__) || defined(__APPLE__) || defined(__wasi__)
#define AVL__POSIX 1
#endif

#include <float.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>    // vsnprintf; files, unless ASTROVL_NO_FILES
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if AVL__POSIX
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>
#endif
#if AVL__POSIX && !defined(ASTROVL_NO_THREADS) && !defined(__wasm__) && defined(__GNUC__)   // for atomic operations
#define AVL__THREADS 1
#include <pthread.h>
#endif
#if AVL__POSIX && !defined(ASTROVL_NO_FILES) && !defined(ASTROVL_NO_MMAP) && !defined(__wasm__)
#define AVL__MMAP 1
#include <sys/mman.h>
#endif
// Which kernels section [13] compiles: for x86 and AArch64 those of several instruction sets, chosen at run time; for
// other processors one for the vector registers that the compiler may use. They assume little-endian bytes.
#if !defined(ASTROVL_NO_SIMD) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 10)
#define AVL__VECTORS 1
#endif
#if AVL__VECTORS && defined(__x86_64__) && !defined(ASTROVL_TEST_GENERIC)
#define AVL__X86 1
#include <immintrin.h>
#endif
#if AVL__VECTORS && defined(__aarch64__) && !defined(__AARCH64EB__)
#define AVL__NEON 1
#include <arm_neon.h>
#if AVL__POSIX && defined(__linux__)
#include <sys/auxv.h>
#endif
#endif
#if AVL__X86 || AVL__NEON || \
    (AVL__VECTORS && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && \
     (defined(__SSE2__) || defined(__VSX__) || defined(__loongarch_sx) || defined(__wasm_simd128__) || \
      (defined(__riscv_vector) && (defined(__clang__) || __GNUC__ >= 14))))
#define AVL__SIMD 1
#endif

// Exact mode rounds every product and every sum. What no macro shows, avl__why_inexact finds at run time.
// FLT_EVAL_METHOD 2 is x87; 1 is s390x with -std=c99, which gcc can undo. gcc has its own pragma against fused sums.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "astrovl.h: compile its implementation without -Ofast, -ffast-math and -ffinite-math-only"
#elif !defined(ASTROVL_NO_EXACT) && (defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
                                     FLT_EVAL_METHOD < 0 || FLT_EVAL_METHOD == 2)
#error "astrovl.h: exact mode needs -msse2 -mfpmath=sse on 32-bit x86, and no -funsafe-math; or define ASTROVL_NO_EXACT"
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#if FLT_EVAL_METHOD == 1
#pragma GCC optimize("excess-precision=fast")
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- configuration (the manual describes each) ---------------------------------------------------------------------

#ifndef ASTROVL_MALLOC
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

#if defined(__GNUC__)   // lets the compiler compare a message's format with its arguments
#define AVL__PRINTF(text, arguments) __attribute__((format(printf, text, arguments)))   // parameters, counted from 1
#else
#define AVL__PRINTF(text, arguments)
#endif

// How many of `size` bytes of UTF-8 are whole characters: less than size if the last character is cut off.
static size_t avl__utf8_whole(const char *text, size_t size) {
    size_t i = size;
    while (i > 0 && ((unsigned char)text[i - 1] & 0xC0) == 0x80) i--;   // back over the bytes that continue a character
    const unsigned char lead = i > 0 ? (unsigned char)text[i - 1] : 0;
    return size - i < (lead >= 0xF0 ? 3u : lead >= 0xE0 ? 2u : lead >= 0xC0 ? 1u : 0u) ? i - 1 : size;
}

// An astrovl_string, which has no zero at its end and may be long, as the arguments of %.*s
#define AVL__SHOW(s) (int)avl__utf8_whole((s).data, (s).size < 96 ? (s).size : 96), (s).data

// As snprintf, but a text that does not fit is cut between characters, and control characters (in UTF-8 0 to 1F, 7F and
// C2 80 to C2 9F) become '?' or U+00BF, so that names from hostile files cannot drive a terminal. Returns the length.
AVL__PRINTF(3, 0) static size_t avl__format_v(char *text, size_t capacity, const char *format, va_list args) {
    int n = vsnprintf(text, capacity, format, args);
    const size_t size = n < 0 ? 0 : (size_t)n < capacity ? (size_t)n : avl__utf8_whole(text, capacity - 1);
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)text[i] < 32 || text[i] == 127) text[i] = '?';
        else if (i > 0 && text[i - 1] == '\xC2' && (text[i] & 0xE0) == 0x80) text[i] = '\xBF';
    text[size] = 0;
    return size;
}

AVL__PRINTF(3, 4) static size_t avl__format(char *text, size_t capacity, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const size_t size = avl__format_v(text, capacity, format, args);
    va_end(args);
    return size;
}

// In a function with the parameters (..., const char *format, ...): formats them into the array `text`.
#define AVL__FORMAT_PARAMETERS(text, format) \
    do { \
        va_list args; \
        va_start(args, format); \
        avl__format_v(text, sizeof(text), format, args); \
        va_end(args); \
    } while (0)

// Fills err (if given) and returns status, so that a failing function can end with `return avl__fail(...)`. What is too
// long loses its middle: a file's name comes first, the reason last.
AVL__PRINTF(3, 4) static astrovl_status avl__fail(astrovl_error *err, astrovl_status status, const char *format, ...) {
    if (!err) return status;
    char whole[4096 + sizeof err->message];            // the longest path, and the reason
    AVL__FORMAT_PARAMETERS(whole, format);
    const size_t size = strlen(whole), capacity = sizeof err->message;
    const size_t end = size < capacity ? 0 : avl__utf8_whole(whole, size - (capacity - 128));
    err->status = status;
    avl__format(err->message, capacity, "%.*s%s%s", end ? (int)avl__utf8_whole(whole, 100) : 0, whole, end ? "..." : "",
                whole + end);
    return status;
}

ASTROVL_API const char *astrovl_status_name(astrovl_status status) {
    static const char *const names[] = {
        "ok", "argument", "memory", "file", "format", "unsupported", "model", "limit", "cancelled"};
    return (unsigned)status < sizeof names / sizeof *names ? names[status] : "unknown";
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Room for count elements of size bytes, not zeroed, never 0 bytes; NULL when the product overflows or memory is out.
static void *avl__alloc_raw(uint64_t count, size_t size) {
    if (size && count > (uint64_t)(SIZE_MAX / 2) / size) return NULL;
    return ASTROVL_MALLOC(count && size ? (size_t)count * size : 1);
}

static void *avl__alloc(uint64_t count, size_t size) {   // zeroed
    void *memory = avl__alloc_raw(count, size);
    if (memory) memset(memory, 0, (size_t)count * size);
    return memory;
}

static float *avl__alloc_floats(uint64_t count) { return (float *)avl__alloc_raw(count, sizeof(float)); }

// Grows *array (of elements of size bytes) to hold `needed`, doubling; 0 when memory is out: *array then stays.
static int avl__grow(void *array, size_t *capacity, size_t needed, size_t size) {
    void *old;
    size_t wanted = *capacity < 16 ? 16 : *capacity;
    if (needed <= *capacity) return 1;
    while (wanted < needed && wanted <= SIZE_MAX / 4) wanted *= 2;
    if (wanted < needed || wanted > SIZE_MAX / 2 / size) return 0;
    memcpy(&old, array, sizeof old);         // array is the address of a pointer of any type
    void *memory = ASTROVL_REALLOC(old, wanted * size);
    if (!memory) return 0;
    memcpy(array, &memory, sizeof memory);
    *capacity = wanted;
    return 1;
}

ASTROVL_API void astrovl_free(void *memory) { if (memory) ASTROVL_FREE(memory); }

// A growing byte string, zero-terminated once something was put. `failed` sticks, so it is checked once, at the end.
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
    char *copy = (char *)avl__alloc((uint64_t)size + 1, 1);
    if (copy && size) memcpy(copy, text, size);
    return copy;
}

#define AVL__LINE 64   // cache-line size: no vector load from a buffer aligned to it straddles two lines

// The first multiple of AVL__LINE at or after p
static void *avl__align(void *p) { return (uint8_t *)p + (AVL__LINE - (uintptr_t)p % AVL__LINE) % AVL__LINE; }

// ---- byte order ----------------------------------------------------------------------------------------------------
// Values are put together from single bytes: right on every host, and compilers turn it into one load.

static uint16_t avl__load_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t avl__load_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t avl__load_u64(const uint8_t *p) { return avl__load_u32(p) | (uint64_t)avl__load_u32(p + 4) << 32; }
static uint16_t avl__load_u16be(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t avl__load_u32be(const uint8_t *p) {
    return (uint32_t)avl__load_u16be(p) << 16 | avl__load_u16be(p + 2);
}
static uint64_t avl__load_number(const uint8_t *p, int n) {   // of n bytes, 0 to 8
    uint64_t value = 0;
    while (n > 0) value = value << 8 | p[--n];
    return value;
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

typedef enum avl__file_kind { AVL__FILE_BORROWED, AVL__FILE_READ, AVL__FILE_MAPPED } avl__file_kind;

typedef struct avl__file {
    uint8_t       *data;        // read-only
    size_t         size;
    avl__file_kind kind;        // how data is released: not at all, with ASTROVL_FREE, with munmap
} avl__file;

static void avl__file_close(avl__file *file) {
#if AVL__MMAP
    if (file->kind == AVL__FILE_MAPPED) munmap(file->data, file->size);
#endif
    if (file->kind == AVL__FILE_READ) ASTROVL_FREE(file->data);
    memset(file, 0, sizeof *file);
}

// Maps a file of any size, or reads what cannot be mapped, up to `limit` bytes.
static astrovl_status avl__file_open(const char *path, int no_mmap, size_t limit, avl__file *file, astrovl_error *err) {
    memset(file, 0, sizeof *file);
    if (!path) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no file name was given");
#ifdef ASTROVL_NO_FILES
    (void)no_mmap;
    (void)limit;
    return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED,
                     "%s: built without files; give the bytes with the _memory or _decode call", path);
#else
    astrovl_status status = ASTROVL_OK;
    size_t capacity = 0, n = 1;
#if AVL__POSIX
    struct stat st;
    const int is_there = stat(path, &st) == 0;
    if (is_there && S_ISCHR(st.st_mode))
        return avl__fail(err, ASTROVL_ERROR_FILE, "%s: is a device, not a file", path);
#endif
#if AVL__MMAP   // a pipe and an empty file cannot be mapped, and a pipe that is opened twice loses bytes
    const int fd = no_mmap || !is_there || !S_ISREG(st.st_mode) ? -1 : open(path, O_RDONLY);
    void *data = MAP_FAILED;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0 && (uint64_t)st.st_size <= SIZE_MAX)
        data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (fd >= 0) close(fd);
    if (data != MAP_FAILED) {
        file->data = (uint8_t *)data;
        file->size = (size_t)st.st_size;
        file->kind = AVL__FILE_MAPPED;
        return ASTROVL_OK;
    }
#endif
    FILE *stream = fopen(path, "rb");
    if (!stream)
        return avl__fail(err, ASTROVL_ERROR_FILE, "%.4000s: cannot be opened (no such file, or no permission)", path);
    (void)no_mmap;
    file->kind = AVL__FILE_READ;
    while (n > 0 && !status) {
        const int has_room = avl__grow(&file->data, &capacity, file->size + 65536, 1);
        n = has_room ? fread(file->data + file->size, 1, capacity - file->size, stream) : 0;
        file->size += n;
        if (!has_room)
            status = avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory after reading %lld bytes", path,
                               (long long)file->size);
        else if (file->size > limit)
            status = avl__fail(err, ASTROVL_ERROR_LIMIT, "%s: has more than %lld bytes", path, (long long)limit);
        else if (n == 0 && ferror(stream))
            status = avl__fail(err, ASTROVL_ERROR_FILE, "%s: cannot be read (is it a folder?)", path);
    }
    fclose(stream);
    if (status) avl__file_close(file);
    return status;
#endif
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

// ---- threads -------------------------------------------------------------------------------------------------------
// A pool runs one job at a time: job(context, i, thread) for every i below n_items. Results cannot depend on the number
// of threads, because no job adds up across items. Without threads the pool is a loop.

typedef void (*avl__job)(void *context, int item, int thread);

// A job is handed over by counting `generation` up; n_busy counts the workers that have not finished it. The next
// job of a pass follows within microseconds, sooner than the system wakes a thread, so a waiting thread spins before it
// sleeps.
typedef struct avl__pool {
    int             n_threads;      // the caller, thread 0, included
#if AVL__THREADS
    pthread_t       threads[ASTROVL_MAX_THREADS];   // from 1 on
    pthread_mutex_t lock;           // for sleeping only
    pthread_cond_t  changed;        // generation, or n_busy to 0
    avl__job        job;            // job, context, n_items: written while no worker is busy
    void           *context;
    int             n_items;
    int             next_item, n_busy, n_started, n_sleeping, generation, quit;   // atomic
#endif
} avl__pool;

#if AVL__THREADS
static int avl__atomic_load(const int *value) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }
static void avl__atomic_store(int *value, int to) { __atomic_store_n(value, to, __ATOMIC_SEQ_CST); }
static int avl__atomic_add(int *value, int more) { return __atomic_add_fetch(value, more, __ATOMIC_SEQ_CST); }

// Waits for *value to become other than `is`: spins for some ten microseconds, then sleeps. A sleeper counts itself in
// n_sleeping before its last look at the value, and avl__pool_notify is called after the change: no wake-up is missed.
static void avl__pool_wait(avl__pool *pool, const int *value, int is) {
    for (int i = 0; i < 2000; i++) {
        if (avl__atomic_load(value) != is) return;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&pool->lock);
    avl__atomic_add(&pool->n_sleeping, 1);
    while (avl__atomic_load(value) == is) pthread_cond_wait(&pool->changed, &pool->lock);
    avl__atomic_add(&pool->n_sleeping, -1);
    pthread_mutex_unlock(&pool->lock);
}

static void avl__pool_notify(avl__pool *pool) {
    if (avl__atomic_load(&pool->n_sleeping) == 0) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->lock);
}

static void avl__pool_work(avl__pool *pool, int thread) {   // takes items until none is left
    int item;
    while ((item = avl__atomic_add(&pool->next_item, 1) - 1) < pool->n_items) pool->job(pool->context, item, thread);
}

static void *avl__pool_main(void *argument) {
    avl__pool *pool = (avl__pool *)argument;
    int thread = avl__atomic_add(&pool->n_started, 1), generation = 0;
    for (;;) {
        avl__pool_wait(pool, &pool->generation, generation);
        if (avl__atomic_load(&pool->quit)) return NULL;
        generation = avl__atomic_load(&pool->generation);
        avl__pool_work(pool, thread);
        if (avl__atomic_add(&pool->n_busy, -1) == 0) avl__pool_notify(pool);
    }
}
#endif

// n_threads: the caller included, 0: one for each processor; fewer if the system refuses to start as many. NULL when
// memory is out.
static avl__pool *avl__pool_new(int n_threads) {
    avl__pool *pool = (avl__pool *)avl__alloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->n_threads = 1;
#if AVL__THREADS
    const long n = n_threads ? n_threads : sysconf(_SC_NPROCESSORS_ONLN);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->changed, NULL);
    for (; pool->n_threads < n && pool->n_threads < ASTROVL_MAX_THREADS; pool->n_threads++)
        if (pthread_create(&pool->threads[pool->n_threads], NULL, avl__pool_main, pool) != 0) break;
#endif
    (void)n_threads;
    return pool;
}

static void avl__pool_free(avl__pool *pool) {
    if (!pool) return;
#if AVL__THREADS
    avl__atomic_store(&pool->quit, 1);
    avl__atomic_add(&pool->generation, 1);
    avl__pool_notify(pool);
    while (pool->n_threads > 1) pthread_join(pool->threads[--pool->n_threads], NULL);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->lock);
#endif
    ASTROVL_FREE(pool);
}

static void avl__pool_run(avl__pool *pool, avl__job job, void *context, int n_items) {
#if AVL__THREADS
    if (n_items > 1 && pool->n_threads > 1) {
        pool->job = job;
        pool->context = context;
        pool->n_items = n_items;
        avl__atomic_store(&pool->next_item, 0);
        avl__atomic_store(&pool->n_busy, pool->n_threads - 1);
        avl__atomic_add(&pool->generation, 1);
        avl__pool_notify(pool);
        avl__pool_work(pool, 0);
        for (int n; (n = avl__atomic_load(&pool->n_busy)) > 0;) avl__pool_wait(pool, &pool->n_busy, n);
        return;
    }
#endif
    (void)pool;
    for (int i = 0; i < n_items; i++) job(context, i, 0);
}

// ====================================================================================================================
// [3] Numbers
// How a model's numbers are written in a file, and the functions that need more than + - * /:
// - half precision (IEEE 754 binary16) and bfloat16, to float32 and back;
// - the GGUF block formats to float32 (layouts: ggml's ggml-common.h; the results are the `gguf` Python package's, bit
//   for bit);
// - exp, tanh, erf, and log, sin, cos for rotary embeddings, from IEEE + - * / sqrt alone: each of these operations has
//   one correct result, so the functions give the same bits on every machine, which no libm promises.
// ====================================================================================================================

#include <math.h>   // only sqrt, whose result IEEE 754 fixes to the last bit

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
// of a byte, lowest first, and f16 is 2 bytes of half precision. Each function expands one block. The order of the
// float operations is part of the format: it decides the last bit.

static float avl__load_f16(const uint8_t *p) { return astrovl_f16_to_f32(avl__load_u16(p)); }

// Q4_0, 18 bytes for 32 values:   0 d f16 | 2 qs[16]
//   y[j] = d * (qs[j][0:3] - 8)     y[j + 16] = d * (qs[j][4:7] - 8)     j < 16
// Q4_1, 20 bytes for 32 values:   0 d f16 | 2 m f16 | 4 qs[16]
//   y[j] = d * qs[j][0:3] + m       y[j + 16] = d * qs[j][4:7] + m
// Q5_0, 22 bytes for 32 values:   0 d f16 | 2 qh u32 | 6 qs[16]      bit j of qh is the fifth bit of value j
//   y[j] = d * (qs[j][0:3] + 16 qh[j] - 16)     y[j + 16] = d * (qs[j][4:7] + 16 qh[j + 16] - 16)
// Q5_1, 24 bytes for 32 values:   0 d f16 | 2 m f16 | 4 qh u32 | 8 qs[16]
//   y[j] = d * (qs[j][0:3] + 16 qh[j]) + m      y[j + 16] = d * (qs[j][4:7] + 16 qh[j + 16]) + m
static void avl__dequantize_32(const uint8_t *b, float *y, int has_min, int has_5_bits) {
    const uint8_t *qh = b + (has_min ? 4 : 2), *qs = qh + (has_5_bits ? 4 : 0);
    const float d = avl__load_f16(b), m = has_min ? avl__load_f16(b + 2) : 0.0f;
    const uint32_t high = has_5_bits ? avl__load_u32(qh) : 0;
    const int offset = has_min ? 0 : has_5_bits ? 16 : 8;
    for (int j = 0; j < 32; j++) {
        const int low = j < 16 ? qs[j] & 15 : qs[j - 16] >> 4;
        y[j] = d * (float)((low | (int)(high >> j & 1) << 4) - offset);
        if (has_min) y[j] += m;                                          // not "+ 0": that would turn -0 into 0
    }
}
static void avl__dequantize_q4_0(const uint8_t *b, float *y) { avl__dequantize_32(b, y, 0, 0); }
static void avl__dequantize_q4_1(const uint8_t *b, float *y) { avl__dequantize_32(b, y, 1, 0); }
static void avl__dequantize_q5_0(const uint8_t *b, float *y) { avl__dequantize_32(b, y, 0, 1); }
static void avl__dequantize_q5_1(const uint8_t *b, float *y) { avl__dequantize_32(b, y, 1, 1); }

// Q8_0, 34 bytes for 32 values:   0 d f16 | 2 qs i8[32]
//   y[j] = d * qs[j]
static void avl__dequantize_q8_0(const uint8_t *b, float *y) {
    const float d = avl__load_f16(b);
    for (int j = 0; j < 32; j++) y[j] = d * (float)(int8_t)b[2 + j];
}

// Q2_K, 84 bytes for 256 values in 16 groups of 16:   0 scales[16] | 16 qs[64] | 80 d f16 | 82 dmin f16
// Value i lies in group g = i / 16; its bits are a pair of qs[32 (i / 128) + i % 32], pair (i / 32) % 4.
//   y[i] = (d * scales[g][0:3]) * q - (dmin * scales[g][4:7])
static void avl__dequantize_q2_k(const uint8_t *b, float *y) {
    const float d = avl__load_f16(b + 80), dmin = avl__load_f16(b + 82);
    for (int g = 0; g < 16; g++) {
        const uint8_t *qs = b + 16 + g / 8 * 32 + g % 2 * 16;
        float scale = d * (float)(b[g] & 15), minimum = dmin * (float)(b[g] >> 4);
        int shift = g / 2 % 4 * 2;
        for (int j = 0; j < 16; j++) y[16 * g + j] = scale * (float)(qs[j] >> shift & 3) - minimum;
    }
}

// Q3_K, 110 bytes for 256 values in 16 groups of 16:   0 hmask[32] | 32 qs[64] | 96 scales[12] | 108 d f16
// The two low bits of value i lie as in Q2_K; bit i / 32 of hmask[i % 32] says that 4 is NOT subtracted.
// Scale g has 6 bits: low four in nibble g / 8 of scales[g % 8], high two in pair g / 4 of scales[8 + g % 4]; minus 32.
//   y[i] = (d * (scale[g] - 32)) * (q - (hmask bit ? 0 : 4))
static void avl__dequantize_q3_k(const uint8_t *b, float *y) {
    const float d = avl__load_f16(b + 108);
    for (int g = 0; g < 16; g++) {
        const uint8_t *qs = b + 32 + g / 8 * 32 + g % 2 * 16, *hmask = b + g % 2 * 16;
        int low = b[96 + g % 8] >> g / 8 * 4 & 15, high = b[104 + g % 4] >> g / 4 * 2 & 3, shift = g / 2 % 4 * 2;
        float scale = d * (float)((low | high << 4) - 32);
        for (int j = 0; j < 16; j++)
            y[16 * g + j] = scale * (float)((qs[j] >> shift & 3) - (hmask[j] >> g / 2 & 1 ? 0 : 4));
    }
}

// Q4_K, 144 bytes for 256 values in 8 groups of 32:   0 d f16 | 2 dmin f16 | 4 s[12] | 16 qs[128]
// Q5_K, 176 bytes:                                    0 d f16 | 2 dmin f16 | 4 s[12] | 16 qh[32] | 48 qs[128]
// Groups 2k and 2k + 1 are the low and the high nibbles of qs[32 k] to qs[32 k + 31]; bit g of qh[j] is the fifth bit
// of value 32 g + j. s packs the 6-bit scale and minimum of group g:
//   g < 4:    scale = s[g][0:5]                         minimum = s[g + 4][0:5]
//   g >= 4:   scale = s[g + 4][0:3], s[g - 4][6:7]      minimum = s[g + 4][4:7], s[g][6:7]
//   y[i] = (d * scale[g]) * q - (dmin * minimum[g])
static void avl__dequantize_k(const uint8_t *b, float *y, int has_5_bits) {
    const float d = avl__load_f16(b), dmin = avl__load_f16(b + 2);
    const uint8_t *s = b + 4, *qh = b + 16, *qs = qh + (has_5_bits ? 32 : 0);
    for (int g = 0; g < 8; g++, y += 32) {
        const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
        const int minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
        const float dg = d * (float)scale, mg = dmin * (float)minimum;
        for (int j = 0; j < 32; j++) {
            const int high = has_5_bits ? qh[j] >> g & 1 : 0;
            y[j] = dg * (float)((qs[g / 2 * 32 + j] >> g % 2 * 4 & 15) | high << 4) - mg;
        }
    }
}
static void avl__dequantize_q4_k(const uint8_t *b, float *y) { avl__dequantize_k(b, y, 0); }
static void avl__dequantize_q5_k(const uint8_t *b, float *y) { avl__dequantize_k(b, y, 1); }

// Q6_K, 210 bytes for 256 values in 16 groups of 16:   0 ql[128] | 128 qh[64] | 192 scales i8[16] | 208 d f16
// Value i: its low four bits are nibble (i / 64) % 2 of ql[64 (i / 128) + i % 64]; its high two lie in qh as Q2_K's do
// in qs.
//   y[i] = (d * scales[i / 16]) * (q - 32)
static void avl__dequantize_q6_k(const uint8_t *b, float *y) {
    const float d = avl__load_f16(b + 208);
    for (int g = 0; g < 16; g++) {
        const uint8_t *ql = b + g / 8 * 64 + g % 4 * 16, *qh = b + 128 + g / 8 * 32 + g % 2 * 16;
        float scale = d * (float)(int8_t)b[192 + g];
        int low_shift = g / 4 % 2 * 4, high_shift = g / 2 % 4 * 2;
        for (int j = 0; j < 16; j++)
            y[16 * g + j] = scale * (float)(((ql[j] >> low_shift & 15) | (qh[j] >> high_shift & 3) << 4) - 32);
    }
}

// ---- the table of types --------------------------------------------------------------------------------------------

typedef struct avl__type_info {
    int         type;                       // an astrovl_type
    const char *name;
    int         block_values, block_bytes;
    void      (*dequantize)(const uint8_t *block, float *values);   // one block; NULL: no blocks, just values
} avl__type_info;

static const avl__type_info avl__types[] = {
    {ASTROVL_TYPE_F32,  "F32",  1,   4,   NULL},
    {ASTROVL_TYPE_F16,  "F16",  1,   2,   NULL},
    {ASTROVL_TYPE_Q4_0, "Q4_0", 32,  18,  avl__dequantize_q4_0},
    {ASTROVL_TYPE_Q4_1, "Q4_1", 32,  20,  avl__dequantize_q4_1},
    {ASTROVL_TYPE_Q5_0, "Q5_0", 32,  22,  avl__dequantize_q5_0},
    {ASTROVL_TYPE_Q5_1, "Q5_1", 32,  24,  avl__dequantize_q5_1},
    {ASTROVL_TYPE_Q8_0, "Q8_0", 32,  34,  avl__dequantize_q8_0},
    {ASTROVL_TYPE_Q2_K, "Q2_K", 256, 84,  avl__dequantize_q2_k},
    {ASTROVL_TYPE_Q3_K, "Q3_K", 256, 110, avl__dequantize_q3_k},
    {ASTROVL_TYPE_Q4_K, "Q4_K", 256, 144, avl__dequantize_q4_k},
    {ASTROVL_TYPE_Q5_K, "Q5_K", 256, 176, avl__dequantize_q5_k},
    {ASTROVL_TYPE_Q6_K, "Q6_K", 256, 210, avl__dequantize_q6_k},
    {ASTROVL_TYPE_BF16, "BF16", 1,   2,   NULL}
};

static const avl__type_info *avl__find_type(int type) {   // NULL: a type this header lacks
    for (size_t i = 0; i < sizeof avl__types / sizeof *avl__types; i++)
        if (avl__types[i].type == type) return &avl__types[i];
    return NULL;
}

// type is known, n_values a multiple of its block.  F32: 4 bytes, a little-endian float.  F16, BF16: 2 bytes, a half
static void avl__dequantize_row(int type, const void *blocks, float *values, int64_t n_values) {
    const avl__type_info *info = avl__find_type(type);
    const uint8_t *b = (const uint8_t *)blocks;
    float *y = values, *end = values + n_values;
    if (type == ASTROVL_TYPE_F32)
        for (; y < end; y++, b += 4) *y = avl__float_from_bits(avl__load_u32(b));
    else if (type == ASTROVL_TYPE_F16)
        for (; y < end; y++, b += 2) *y = avl__load_f16(b);
    else if (type == ASTROVL_TYPE_BF16)
        for (; y < end; y++, b += 2) *y = astrovl_bf16_to_f32(avl__load_u16(b));
    else
        for (; y < end; y += info->block_values, b += info->block_bytes) info->dequantize(b, y);
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
    if (n_values > 0) avl__dequantize_row(type, blocks, values, n_values);
    return ASTROVL_OK;
}

// ---- exponential and logarithm -------------------------------------------------------------------------------------
// The float functions compute in double and round once at the end. The double's error is below 0.001 ulp (units in the
// last place) of the float, so the result is within 0.501 ulp of the true value: nearly always the nearest float.

#define AVL__LN2      0.6931471805599453094172
#define AVL__LN2_HIGH 0.693147180369123816490    // the upper 32 bits of ln 2: n * LN2_HIGH is exact for |n| < 2^21
#define AVL__LN2_LOW  1.90821492927058770002e-10 // the rest
#define AVL__LOG2_E   1.4426950408889634074

// Adding 1.5 * 2^52 leaves a double no bits for a fraction: the sum is x rounded to an integer (ties to even), which
// also stands in its low bits. For |x| < 2^31.
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

// exp(x) = 2^n exp(r),  n = round(x / ln 2),  r = x - n ln 2,  |r| <= 0.347;   exp(r) = 1 + r + r^2/2! + ... + r^9/9!
// Truncation error < 1e-11. Instead of branches, x is clamped to limits whose exp rounds to 0 or infinity as a float.
ASTROVL_API float astrovl_expf(float x) {
    const double v = x < -104.0f ? -104.0 : x > 89.0f ? 89.0 : (double)x;
    int n;
    const double r = v - avl__round(v * AVL__LOG2_E, &n) * AVL__LN2;
    double sum = 1.0 + r * (1.0 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 +
          r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880)))))))));
    sum *= avl__double_from_bits((uint64_t)(1023u + (uint32_t)n) << 52);
    return x != x ? x : (float)sum;
}

// The same in double: ln 2 in two parts, so that r keeps all its bits, and 13 terms (r^14 / 14! < 5e-18).
// Relative error below 3e-16.  |x| < 708
static double avl__exp(double x) {
    int n;
    const double k = avl__round(x * AVL__LOG2_E, &n), r = (x - k * AVL__LN2_HIGH) - k * AVL__LN2_LOW;
    const double sum = 1.0 + r * (1.0 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 +
          r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800 +
          r * (1.0 / 479001600 + r * (1.0 / 6227020800.0)))))))))))));
    return sum * avl__double_from_bits((uint64_t)(1023u + (uint32_t)n) << 52);
}

// log(x) = e ln 2 + log(m),  x = 2^e m,  sqrt(1/2) <= m <= sqrt(2)
// log(m) = 2 (s + s^3/3 + s^5/5 + ... + s^21/21),  s = (m - 1) / (m + 1),  |s| < 0.172: truncation error < 1e-18
// Relative error below 5e-16.  x: a normal number > 0
static double avl__log(double x) {
    const uint64_t bits = avl__double_bits(x);
    double e = (double)((int)(bits >> 52) - 1023), sum = 0;
    double m = avl__double_from_bits((bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e += 1;
    }
    const double s = (m - 1) / (m + 1), q = s * s;
    for (int k = 21; k >= 1; k -= 2) sum = 1.0 / k + q * sum;
    return e * AVL__LN2_HIGH + (2 * s * sum + e * AVL__LN2_LOW);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1);  below 1/16, where that would cancel:  x - x^3/3 + 2 x^5/15 - 17 x^7/315
// Truncation error < 5e-12 relative; from 1/16 on cancellation costs 4 of a double's 53 bits.
ASTROVL_API float astrovl_tanhf(float x) {
    double v = x < 0 ? -(double)x : (double)x, q = v * v, y;
    if (x != x) return x;
    if (v < 0.0625) return (float)((double)x * (1 - q * (1.0 / 3 - q * (2.0 / 15 - q * (17.0 / 315)))));
    y = v > 10 ? 1 : 1 - 2 / (avl__exp(2 * v) + 1);   // tanh(10) = 1 - 4e-9 is 1 as a float
    return (float)(x < 0 ? -y : y);
}

// erf(x) = 2/sqrt(pi) integral_0^x exp(-t^2) dt
//   |x| < 2    2/sqrt(pi) x sum_k (-x^2)^k / (k! (2k + 1)),  k <= 12 below 1, k <= 23 below 2: error < 1e-11
//   |x| >= 2   1 - exp(-x^2) / sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...)))), Laplace's continued fraction;
//              16 levels give the difference from 1, which is below 0.005, to 1e-8
ASTROVL_API float astrovl_erff(float x) {
    static const double c[] = {   // 1 / (k! (2k+1))
        1.0, 1.0 / (1 * 3.0), 1.0 / (2 * 5.0), 1.0 / (6 * 7.0), 1.0 / (24 * 9.0), 1.0 / (120 * 11.0),
        1.0 / (720 * 13.0), 1.0 / (5040 * 15.0), 1.0 / (40320 * 17.0), 1.0 / (362880 * 19.0), 1.0 / (3628800 * 21.0),
        1.0 / (39916800 * 23.0), 1.0 / (479001600 * 25.0), 1.0 / (6227020800.0 * 27), 1.0 / (87178291200.0 * 29),
        1.0 / (1307674368000.0 * 31), 1.0 / (20922789888000.0 * 33), 1.0 / (355687428096000.0 * 35),
        1.0 / (6402373705728000.0 * 37), 1.0 / (121645100408832000.0 * 39), 1.0 / (2432902008176640000.0 * 41),
        1.0 / (51090942171709440000.0 * 43), 1.0 / (1124000727777607680000.0 * 45),
        1.0 / (25852016738884976640000.0 * 47)
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

// sin(x + quadrant pi/2) for |x| < 2^23; NaN beyond.
// x = n pi/2 + r, |r| <= pi/4; by n mod 4 the result is sin r, cos r, -sin r, -cos r.
//   r: near a multiple of pi/2 nearly all digits of the difference cancel, so pi/2 comes in three parts, the first two
//      of 30 bits: their products with n (at most 23 bits) are exact, and so are the differences (Cody & Waite 1980)
//   sin r = r - r^3/3! + ... + r^13/13!,   cos r = 1 - r^2/2! + ... + r^12/12!:   truncation error < 1e-12
static float avl__sin_quadrant(float x, int quadrant) {
    double y;
    int n;
    if (!(x < 8388608.0f && x > -8388608.0f)) return avl__float_from_bits(0x7FC00000);
    const double k = avl__round((double)x * 0.63661977236758134308, &n);   // 2/pi
    const double r = (((double)x - k * 1.570796325802803) - k * 9.920935791635221e-10) - k * 5.170182981794105e-19;
    const double q = r * r;
    n += quadrant;
    if (n & 1)
        y = 1 - q * (1.0 / 2 - q * (1.0 / 24 - q * (1.0 / 720 - q * (1.0 / 40320 - q * (1.0 / 3628800 -
            q * (1.0 / 479001600))))));
    else
        y = r * (1 - q * (1.0 / 6 - q * (1.0 / 120 - q * (1.0 / 5040 - q * (1.0 / 362880 - q * (1.0 / 39916800 -
            q * (1.0 / 6227020800.0)))))));
    return (float)(n & 2 ? -y : y);
}

static float avl__sin(float x) { return avl__sin_quadrant(x, 0); }
static float avl__cos(float x) { return avl__sin_quadrant(x, 1); }

// Why numbers are not exact in this build or process, and what to do; NULL: they are. The operands are volatile, which
// makes the compiler do this at run time, as it does everything else.
static const char *avl__why_inexact(void) {
    static const volatile float v[] = {1, 1.25f * FLT_EPSILON, 1.75f * FLT_EPSILON, 1 / 4096.0f, 41, -0.0f, FLT_MIN};
    const float one = v[0], x = one + v[3], low = one + v[1] - one, high = one + v[2] - one;
    const volatile double tenth = 0.1;
    if (tenth == (float)tenth) return "double is too short; compile without -fsingle-precision-constant";
    if (FLT_EVAL_METHOD < 0 || FLT_EVAL_METHOD == 2) return "x87 rounds too late; compile with -msse2 -mfpmath=sse";
    if (low != FLT_EPSILON || high != 2 * FLT_EPSILON || v[4] / 41 != 1 || 1 / (v[5] + 0.0f) < 0)
        return "sums are reordered or not rounded to nearest; compile without -funsafe-math-optimizations and "
               "-fno-signed-zeros, and do not use fesetround";
    if (x * x - (one + 2 * v[3]) != 0)
        return "products are not rounded before they are added; compile with -ffp-contract=off";
    return v[6] * 0.5f * 2 == FLT_MIN ? NULL : "tiny numbers become 0; link everything without -Ofast and -ffast-math";
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
// [4] Ops
// The operations that both transformers are made of, on rows of float32: norms, softmax, activations, RoPE, products
// with a weight matrix, attention. The public ones work on plain arrays, for teaching and auditing; those that are
// worth several threads take an avl__run.
//
// The few loops in which all the time goes stand behind one table of function pointers. Here are its structures and the
// portable table, which exact mode uses; the tables for vector registers come last, in section [13].
//
// Exact mode fixes the order of every sum. A dot product of n values keeps 16 partial sums; value i goes to sum i % 16,
// in order of i, as a rounded product then a rounded addition; then the 16 are folded 8 + 8, 4 + 4, 2 + 2, 1 + 1.
// Sixteen because that is one AVX-512 register, two of AVX, four of SSE or NEON, or sixteen plain variables: each
// computes the same bits. Fast mode rounds activations to small integers, 32 at a time, and multiplies integers.
// ====================================================================================================================

// ---- the table of kernels ------------------------------------------------------------------------------------------

// A weight matrix in place, in its stored format:  y = x W^T + bias
typedef struct avl__linear {
    const void  *weight;       // [n_out] rows of n_in values
    const float *bias;         // [n_out], or NULL
    int          type;         // astrovl_type of the weight
    int          n_in, n_out;
    size_t       row_bytes;
} avl__linear;

// Rows of activations as integers of 8 or 16 bits, bfloat16 or float32 (section [13]), x = e q for 32 values. `group`
// rows are multiplied at a time, and their words lie side by side: rows that lay a power of two apart would evict each
// other from the L1 cache.
typedef struct avl__quants {
    int8_t  *q;                // [n_groups][n_blocks][8, 16 or 32 words][group][4]
    float   *scale;            // [n_groups][n_blocks][group]                e
    int32_t *bias;             // [n_groups][n_blocks][n_parts][group]       -offset * sum of q
    float   *sum;              // [n_groups][n_blocks][n_parts][group]       e * sum of q
    int      n_blocks, n_groups, group, float_kind;
} avl__quants;

enum { AVL__QUANT_FLOATS = 1 + 2 + 2 + 32 };   // of a block: scale, bias, sum, and at most 32 words

// One product:  y[n_rows][n_out] = x[n_rows][n_in] W^T + bias
typedef struct avl__product {
    float             *y;
    const float       *x;
    const avl__linear *w;
    int                n_rows;
    int                few;    // 1: too few rows to be worth packing whole weight rows
    int                ahead;  // columns from those that a thread is given to those that it will probably be given next
    avl__quants        quants; // x rounded, where `multiply` is used
} avl__product;

// Attention of one head for neighboring queries. Rows of q and out lie q_stride floats apart, of k and v kv_stride.
typedef struct avl__tile {
    float       *out;          // [n][head_dim]
    const float *q, *k, *v;    // [n][head_dim], [n_keys][head_dim] twice
    size_t       q_stride, kv_stride;
    int          n, n_keys, n_visible;   // query i sees the first n_visible + i keys, at most all
    int          head_dim;
} avl__tile;

typedef struct avl__kernels {
    const char *name;
    // columns first..last-1 of a product.  scratch: this thread's memory, at least [n_in] floats
    void (*linear)(const avl__product *p, int first, int last, float *scratch);
    // sum over i of half[i] * x[i], half: little-endian float16 at any address. The same bits in every table
    float (*dot_f16)(const void *half, const float *x, int n);
    // the operations that the public functions describe; x = silu(x) * up
    void (*rms_norm)(float *y, const float *x, const float *weight, int n_embd, float eps);
    void (*layer_norm)(float *y, const float *x, const float *weight, const float *bias, int n_embd, float eps);
    void (*gelu)(float *x, int64_t n);
    void (*quick_gelu)(float *x, int64_t n);
    void (*silu_product)(float *x, const float *up, int64_t n);

    // The rest is NULL or 0 in the portable table.
    // blocks begin..end-1 of rows first..first+n_rows-1 of x to p->quants
    void (*quantize)(const avl__product *p, int first, int n_rows, int begin, int end);
    // columns first..last-1 of the product with p->quants.  scratch: [n_in][64] + 8192 floats
    void (*multiply)(const avl__product *p, int first, int last, float *scratch);
    // attention; in bfloat16, NULL where the processor does not multiply it.
    // scratch: [n_keys][32] + [head_dim][32] floats; in bfloat16 [n_keys][head_dim] more, head_dim rounded up to 32s
    void (*attend)(const avl__tile *t, float *scratch);
    void (*attend_coarsely)(const avl__tile *t, float *scratch);
    // attention of one query [head_dim] over n_keys keys and values in float16, `stride` from one to the next.
    // weights: out, [n_keys]
    void (*attend_one)(float *out, const float *q, const uint16_t *k, const uint16_t *v, size_t stride, int n_keys,
                       int head_dim, float *weights);
    // to float16, where what is too large becomes the largest, and back
    void (*to_halves)(uint16_t *y, const float *x, int64_t n);
    void (*from_halves)(float *y, const uint16_t *x, int n);
    int group;                       // rows of activations of a tile, at most
    int float_kind, float_group;     // how weights of float types are multiplied (AVL__AS_...), and rows of their tiles
    int n_few, few_group;            // rows that count as few, at most; rows of their tiles
} avl__kernels;

#define AVL__LANES 16

static float avl__fold_lanes(float *lane) {
    for (int half = AVL__LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static float avl__dot_portable(const float *a, const float *b, int n) {
    float lane[AVL__LANES] = {0};
    int i = 0;
    for (; i + AVL__LANES <= n; i += AVL__LANES)
        for (int j = 0; j < AVL__LANES; j++) lane[j] += a[i + j] * b[i + j];
    for (int j = 0; i + j < n; j++) lane[j] += a[i + j] * b[i + j];
    return avl__fold_lanes(lane);
}

static float avl__dot_f16_portable(const void *half, const float *x, int n) {
    float lane[AVL__LANES] = {0};
    for (int i = 0; i < n; i++) lane[i % AVL__LANES] += avl__load_f16((const uint8_t *)half + 2 * (size_t)i) * x[i];
    return avl__fold_lanes(lane);
}

// Each weight row is expanded once and then multiplied with every row of x while it is in the cache.
static void avl__linear_portable(const avl__product *p, int first, int last, float *scratch) {
    const avl__linear *w = p->w;
    for (int out = first; out < last; out++) {
        float bias = w->bias ? w->bias[out] : 0.0f;
        avl__dequantize_row(w->type, (const uint8_t *)w->weight + (size_t)out * w->row_bytes, scratch, w->n_in);
        for (int r = 0; r < p->n_rows; r++)
            p->y[(size_t)r * w->n_out + out] = avl__dot_portable(p->x + (size_t)r * w->n_in, scratch, w->n_in) + bias;
    }
}

static void avl__silu_product(float *x, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + astrovl_expf(-x[i])) * up[i];
}

static const avl__kernels avl__kernels_portable = {
    "portable", avl__linear_portable, avl__dot_f16_portable, astrovl_rms_norm, astrovl_layer_norm, astrovl_gelu,
    astrovl_quick_gelu, avl__silu_product, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, 0, 1, 0, 0};

static int avl__is_float_type(int type) {
    return type == ASTROVL_TYPE_F32 || type == ASTROVL_TYPE_F16 || type == ASTROVL_TYPE_BF16;
}

static const avl__kernels *avl__choose_kernels(astrovl_mode mode, const char *isa);      // section [13]

// ---- how a pass is run ---------------------------------------------------------------------------------------------

// Execution context: kernels, threads, memory, callbacks. A session and its forks share one.
enum { AVL__MAX_TAKEN = 16 };              // buffers of a pass; embedding an image takes 12, the most

typedef struct avl__run {
    const avl__kernels *kernels;
    avl__pool          *pool;
    int                 n_sessions;
    astrovl_session_options options;       // of the first session: tap and progress
    struct { float *data; uint64_t size; } taken[AVL__MAX_TAKEN];   // avl__take's buffers, kept from pass to pass
    int                 n_taken;           // by this pass
    float              *work;              // [n_threads][thread_floats]: an expanded weight row, a pack, or scores;
    size_t              work_capacity;     //   behind them, the rounded activations of the product under way
    size_t              thread_floats;
    int                 always_panels;     // 1: a row's bits must not depend on how many there are
    int                 failed;            // 1: memory has run out in this pass, 2: `tensor` holds NaN or infinity;
    char                tensor[160];       //   no product is computed any more
} avl__run;

// Begins a pass: what the one before has taken is free again.
static void avl__run_begin(avl__run *run, int always_panels) {
    run->n_taken = 0;
    run->always_panels = always_panels;
    run->failed = 0;
}

// n floats, aligned to a cache line, until the next pass begins. NULL when memory has run out in this pass.
static float *avl__take(avl__run *run, uint64_t n) {
    const int i = run->n_taken++;
    if (!run->failed && run->taken[i].size < n) {
        astrovl_free(run->taken[i].data);
        run->taken[i].data = avl__alloc_floats(n + AVL__LINE);
        run->taken[i].size = run->taken[i].data ? n : 0;
        run->failed = !run->taken[i].data;
    }
    return run->failed ? NULL : (float *)avl__align(run->taken[i].data);
}

// Room for n_floats of each thread, and for n_shared behind them. 0, and run->failed, when memory is out.
static int avl__run_reserve(avl__run *run, uint64_t n_floats, uint64_t n_shared) {
    const uint64_t each = n_floats + AVL__LINE - n_floats % AVL__LINE;
    const uint64_t n = each * (uint64_t)run->pool->n_threads + n_shared + 2 * AVL__LINE;
    if (n > SIZE_MAX / 8 || !avl__grow(&run->work, &run->work_capacity, (size_t)n, sizeof(float))) run->failed = 1;
    if (!run->failed) run->thread_floats = (size_t)each;
    return !run->failed;
}

static float *avl__thread_memory(const avl__run *run, int thread) {   // thread n_threads: what is behind them
    return (float *)avl__align(run->work) + (size_t)thread * run->thread_floats;
}

static void avl__run_free(avl__run *run) {
    if (run->pool) avl__pool_free(run->pool);
    for (int i = 0; i < AVL__MAX_TAKEN; i++) astrovl_free(run->taken[i].data);
    astrovl_free(run->work);
}

// Where a pass stands: MEMORY if a product or avl__take has failed, MODEL after NaN, CANCELLED if the caller wants it.
// what: "image", "prompt" ...;  total: of `done`, as is reported; 0: nothing is reported
static astrovl_status avl__pass_status(const avl__run *run, const char *what, int done, int total, astrovl_error *err) {
    if (run->failed == 1) return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the %s", what);
    if (run->failed)
        return avl__fail(err, ASTROVL_ERROR_MODEL, "NaN or infinity in %s of the %s: the model's weights are damaged "
                         "or too large", run->tensor, what);
    const astrovl_session_options *o = &run->options;
    if (total && o->progress && o->progress(o->progress_user, what, done, total) && done < total)
        return avl__fail(err, ASTROVL_CANCELLED, "cancelled while reading the %s", what);
    return ASTROVL_OK;
}

// ---- the audit tap -------------------------------------------------------------------------------------------------

// Whether all of x [n] are numbers: the exponent of a NaN or an infinity is all ones, and adding one to it carries.
static int avl__are_numbers(const float *x, int64_t n) {
    uint32_t bits[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) bits[j] |= (avl__float_bits(x[i + j]) & 0x7FFFFFFF) + 0x00800000;
    for (; i < n; i++) bits[0] |= (avl__float_bits(x[i]) & 0x7FFFFFFF) + 0x00800000;
    for (int j = 1; j < 8; j++) bits[0] |= bits[j];
    return bits[0] >> 31 == 0;
}

// Calls the tap with data [d0][d1][d2] (sizes of 0 at the end are no dimensions), named prefix.layer.name as modules of
// transformers are; empty parts and layer -1 are left out. With or without a tap, the pass fails if data holds NaN or
// infinity, which weights that are such or too large make, and which fast mode's integers would hide from all that
// follows. A product's last row shows this of its weights; what has no `name`, a module's output, is checked in full.
static void avl__tap3(avl__run *run, const char *prefix, int layer, const char *name, const float *data, int64_t d0,
                      int64_t d1, int64_t d2) {
    const int64_t shape[3] = {d0, d1, d2}, row = d2 > 0 ? d2 : d1 > 0 ? d1 : d0;
    const int64_t n = d0 * (d1 > 0 ? d1 : 1) * (d2 > 0 ? d2 : 1), start = *name ? n - row : 0;
    char number[16] = "";
    if (run->failed || !data) return;
    if (!avl__are_numbers(data + start, n - start)) run->failed = 2;
    if (!run->failed && !run->options.tap) return;
    if (layer >= 0) avl__format(number, sizeof number, ".%d", layer);
    avl__format(run->tensor, sizeof run->tensor, "%s%s%s%s", prefix, number, *name ? "." : "", name);
    if (run->failed) return;
    run->options.tap(run->options.tap_user, run->tensor, layer, shape, d2 > 0 ? 3 : d1 > 0 ? 2 : 1, data);
}

static void avl__tap(avl__run *run, const char *prefix, int layer, const char *name, const float *data,
                     int64_t n_rows, int64_t n_columns) {
    avl__tap3(run, prefix, layer, name, data, n_rows, n_columns, 0);
}

// ---- norms, softmax, activations (formulas: section [1]) -----------------------------------------------------------
// Sums run in double, first value to last: more digits than a float32 sum of any order, at no measurable cost.

ASTROVL_API void astrovl_layer_norm(float *y, const float *x, const float *weight, const float *bias, int n_embd,
                                    float eps) {
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < n_embd; i++) sum += x[i];
    const float mean = (float)(sum / n_embd);
    for (int i = 0; i < n_embd; i++) {
        double d = (double)x[i] - mean;
        squares += d * d;
    }
    const float scale = (float)(1.0 / avl__sqrt(squares / n_embd + eps));
    for (int i = 0; i < n_embd; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

ASTROVL_API void astrovl_rms_norm(float *y, const float *x, const float *weight, int n_embd, float eps) {
    double squares = 0.0;
    for (int i = 0; i < n_embd; i++) squares += (double)x[i] * x[i];
    const float scale = (float)(1.0 / avl__sqrt(squares / n_embd + eps));
    for (int i = 0; i < n_embd; i++) y[i] = x[i] * scale * weight[i];
}

ASTROVL_API void astrovl_softmax(float *x, int n) {   // subtracting the maximum keeps exp in range
    float max = n > 0 ? x[0] : 0.0f;
    double sum = 0.0;
    for (int i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int i = 0; i < n; i++) {
        x[i] = astrovl_expf(x[i] - max);
        sum += x[i];
    }
    const float scale = (float)(1.0 / sum);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

ASTROVL_API void astrovl_gelu(float *x, int64_t n) {   // Phi(x) = (1 + erf(x / sqrt 2)) / 2
    for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + astrovl_erff(x[i] * 0.70710678118654752f));
}

ASTROVL_API void astrovl_quick_gelu(float *x, int64_t n) {   // what OpenAI's CLIP was trained with
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + astrovl_expf(-1.702f * x[i]));
}

ASTROVL_API void astrovl_silu(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + astrovl_expf(-x[i]));
}

// A norm or an activation by several threads: y and x [n], of which an item is n_item values (or what is left)
typedef struct avl__row_job {
    const avl__kernels *kernels;
    float              *y;
    const float        *x, *weight, *bias;   // of a norm: [n_item]
    float               eps;
    const float        *up;
    void              (*activation)(float *x, int64_t n);
    int64_t             n, n_item;
} avl__row_job;

static void avl__row_item(void *context, int item, int thread) {
    const avl__row_job *job = (const avl__row_job *)context;
    const int64_t first = item * job->n_item, left = job->n - first, n = left < job->n_item ? left : job->n_item;
    float *y = job->y + first;
    (void)thread;
    if (job->up)              job->kernels->silu_product(y, job->up + first, n);
    else if (job->activation) job->activation(y, n);
    else if (job->bias)       job->kernels->layer_norm(y, job->x + first, job->weight, job->bias, (int)n, job->eps);
    else                      job->kernels->rms_norm(y, job->x + first, job->weight, (int)n, job->eps);
}

// LayerNorm of each row, or RMSNorm if bias is NULL.  x, y: [n_rows][n_embd]
static void avl__norm_rows(const avl__run *run, float *y, const float *x, const float *weight, const float *bias,
                           int n_rows, int n_embd, float eps) {
    avl__row_job job = {run->kernels, y, x, weight, bias, eps, NULL, NULL, (int64_t)n_rows * n_embd, n_embd};
    avl__pool_run(run->pool, avl__row_item, &job, n_rows);
}

// x = activation(x), or silu(x) * up if up is not NULL.  x, up: [n]
static void avl__activate(avl__run *run, float *x, int64_t n, void (*activation)(float *x, int64_t n),
                          const float *up) {
    avl__row_job job = {run->kernels, x, x, NULL, NULL, 0.0f, up, activation, n, 8192};
    avl__pool_run(run->pool, avl__row_item, &job, (int)((n + job.n_item - 1) / job.n_item));
}

static void avl__add(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

// ---- RoPE ----------------------------------------------------------------------------------------------------------
// Position m turns the pair (x[2i], x[2i+1]) of every head by the angle m * inv_freq[i]: the dot product of a query at
// m and a key at n then depends on m - n only (Su et al. 2021, equation 34). llama.cpp's converter stores the rows of q
// and k so that the pairs are neighbors; transformers pairs i with i + head_dim / 2.

// inv_freq[i] = theta^(-2i / head_dim) / factor[i], rounded to float32 as transformers does; factors (rope_freqs.weight
// of LLaMA-3, [head_dim / 2]) may be NULL; linear_scale divides positions (rope.scaling.type = linear), 1 for none
static void avl__rope_frequencies(float *inv_freq, int head_dim, float theta, const float *factors,
                                  float linear_scale) {
    for (int i = 0; i < head_dim / 2; i++) {
        float f = (float)avl__exp(-2.0 * i / head_dim * avl__log(theta));
        if (factors) f /= factors[i];
        inv_freq[i] = f / linear_scale;
    }
}

// cos_sin: out, {cos, sin, -sin} of an angle
static void avl__rope_cos_sin(float *cos_sin, float angle) {
    cos_sin[0] = avl__cos(angle);
    cos_sin[1] = avl__sin(angle);
    cos_sin[2] = -cos_sin[1];
}

// Rotates the first rope_dim values of every head of a row x [n_head][head_dim].  cos_sin: [rope_dim / 2][3]
//   (x0, x1) = (x0 cos - x1 sin, x0 sin + x1 cos), with -sin read from memory and added. Of a subtraction beside an
// addition, gcc 12's vectorizer makes one fused vfmaddsub even where contraction is switched off, and exact mode's bits
// would differ.
static void avl__rope_row(float *x, int n_head, int head_dim, int rope_dim, const float *cos_sin) {
    for (int h = 0; h < n_head; h++, x += head_dim)
        for (int i = 0; i < rope_dim / 2; i++) {
            const float x0 = x[2 * i], x1 = x[2 * i + 1], *c = cos_sin + 3 * i;
            x[2 * i] = x0 * c[0] + x1 * c[2];
            x[2 * i + 1] = x0 * c[1] + x1 * c[0];
        }
}

ASTROVL_API void astrovl_rope(float *x, int head_dim, int position, const float *inv_freq) {
    for (int i = 0; i < head_dim / 2; i++) {
        float cos_sin[3];
        avl__rope_cos_sin(cos_sin, (float)position * inv_freq[i]);
        avl__rope_row(x + 2 * i, 1, 2, 2, cos_sin);   // one pair, as a head of its own
    }
}

// ---- products ------------------------------------------------------------------------------------------------------

enum {
    AVL__SHARED_PRODUCTS = 3,      // products of the same activations: queries, keys and values
    AVL__QUANTIZE_BLOCKS = 256,    // fewer blocks of activations than this are rounded by one thread
    AVL__LINEAR_CHUNK = 32,        // columns of y that a thread takes at a time, or a multiple of it:
    AVL__STREAM_ROWS = 32,         //   for so many rows or fewer, reading the weights is the limit,
    AVL__LINEAR_CHUNKS = 16,       //   and each thread takes about so many chunks
    AVL__FEW_FLOAT_ROWS = 16       // so many rows or fewer are multiplied with weights of a float type in float32. More
                                   // are rounded first, with other bits, so that all rows that are decoded together
                                   // (AVL__STEP_ROWS) must count as few.
};

typedef struct avl__linear_job {
    const avl__run *run;
    avl__product    product[AVL__SHARED_PRODUCTS];
    int             n_items[AVL__SHARED_PRODUCTS];
    int             n_parts;       // a group of rows is rounded in so many parts
    int             chunk;         // columns of y that a thread takes at a time
    void          (*columns)(const avl__product *p, int first, int last, float *scratch);
} avl__linear_job;

static void avl__linear_item(void *context, int item, int thread) {
    const avl__linear_job *job = (const avl__linear_job *)context;
    const avl__product *p = job->product;
    for (const int *n_items = job->n_items; item >= *n_items; p++) item -= *n_items++;
    const int first = item * job->chunk, last = first + job->chunk;
    job->columns(p, first, last < p->w->n_out ? last : p->w->n_out, avl__thread_memory(job->run, thread));
}

static void avl__quantize_item(void *context, int item, int thread) {
    const avl__linear_job *job = (const avl__linear_job *)context;
    const avl__product *p = job->product;
    const int first = item / job->n_parts * p->quants.group, left = p->n_rows - first, n_blocks = p->quants.n_blocks;
    const int size = (n_blocks + job->n_parts - 1) / job->n_parts, begin = item % job->n_parts * size;
    (void)thread;
    job->run->kernels->quantize(p, first, left < p->quants.group ? left : p->quants.group, begin,
                                begin + size < n_blocks ? begin + size : n_blocks);
}

// n (at most AVL__SHARED_PRODUCTS) products of the same x:  y[i][n_rows][n_out] = x[n_rows][n_in] W[i]^T + bias.
// For weights of one type x is rounded once, and threads are started once.
static void avl__apply_each(avl__run *run, float *const *y, const float *x, const avl__linear *const *w, int n,
                            int n_rows) {
    static const int group_sizes[] = {4, 6, 12};
    const avl__kernels *kernels = run->kernels;
    const int is_float = avl__is_float_type(w[0]->type), n_threads = run->pool->n_threads, n_in = w[0]->n_in;
    const int few = n_rows <= (is_float ? AVL__FEW_FLOAT_ROWS : kernels->n_few) && !run->always_panels;
    const int is_rounded = kernels->multiply && !(few && is_float);
    int n_shared = 0, n_out = 0, n_items = 0;
    avl__quants q;
    avl__linear_job job;
    memset(&q, 0, sizeof q);
    memset(&job, 0, sizeof job);
    q.n_blocks = (n_in + 31) / 32;
    const uint64_t n_quants = ((uint64_t)n_rows + 16) * (uint64_t)q.n_blocks;        // the last group need not be full
    if (!avl__run_reserve(run, is_rounded ? (uint64_t)n_in * 64 + 8192 : (uint64_t)n_in,
                          is_rounded ? n_quants * AVL__QUANT_FLOATS : 0)) return;
    if (is_rounded) {                  // groups are as large as tiles, about equal, or few
        const int most = is_float ? kernels->float_group : kernels->group, n_tiles = (n_rows + most - 1) / most;
        const int *size = group_sizes;
        while (*size < (n_rows + n_tiles - 1) / n_tiles) size++;
        q.group = !few ? *size : n_rows == 1 ? 1 : kernels->few_group;
        q.n_groups = (n_rows + q.group - 1) / q.group;
        q.float_kind = kernels->float_kind;
        const size_t n_scales = (size_t)q.n_blocks * (size_t)q.n_groups * (size_t)q.group;
        q.scale = avl__thread_memory(run, n_threads);
        q.bias = (int32_t *)(void *)(q.scale + n_scales);
        q.sum = (float *)(void *)(q.bias + 2 * n_scales);
        q.q = (int8_t *)avl__align(q.sum + 2 * n_scales);
    }
    for (; n_shared < n && w[n_shared]->type == w[0]->type; n_shared++) n_out += w[n_shared]->n_out;
    job.run = run;
    job.columns = is_rounded ? kernels->multiply : kernels->linear;
    job.chunk = AVL__LINEAR_CHUNK;
    if (n_rows <= AVL__STREAM_ROWS) job.chunk *= 1 + n_out / (AVL__LINEAR_CHUNK * AVL__LINEAR_CHUNKS * n_threads);
    for (int i = 0; i < n_shared; i++) {
        const avl__product p = {y[i], x, w[i], n_rows, few, job.chunk * n_threads, q};
        job.product[i] = p;
        job.n_items[i] = (w[i]->n_out + job.chunk - 1) / job.chunk;
        n_items += job.n_items[i];
    }
    if (is_rounded) {                  // few rows make few groups; long ones are rounded in parts
        job.n_parts = q.n_groups < n_threads && (int64_t)q.n_blocks * n_rows >= AVL__QUANTIZE_BLOCKS ? n_threads : 1;
        avl__pool_run(run->pool, avl__quantize_item, &job, q.n_groups * job.n_parts);
    }
    avl__pool_run(run->pool, avl__linear_item, &job, n_items);
    if (n_shared < n) avl__apply_each(run, y + n_shared, x, w + n_shared, n - n_shared, n_rows);   // of other types
}

// y[n_rows][n_out] = x[n_rows][n_in] W^T + bias
static void avl__apply(avl__run *run, float *y, const float *x, const avl__linear *w, int n_rows) {
    avl__apply_each(run, &y, x, &w, 1, n_rows);
}

ASTROVL_API void astrovl_linear(float *y, const float *x, const float *w, const float *bias, int n_rows, int n_in,
                                int n_out) {
    for (int r = 0; r < n_rows; r++, x += n_in, y += n_out)
        for (int o = 0; o < n_out; o++)
            y[o] = avl__dot_portable(x, w + (size_t)o * n_in, n_in) + (bias ? bias[o] : 0.0f);
}

// ---- attention -----------------------------------------------------------------------------------------------------
// out = softmax(q k^T / sqrt(head_dim)) v for every head (Vaswani et al. 2017, equation 1). With fewer key than query
// heads, n_head / n_head_kv neighboring query heads share one (Ainslie et al. 2023). A causal row sees the keys up to
// its own position.
typedef struct avl__attention {
    const float *q;               // [n_rows][n_head][head_dim]
    const void  *k, *v;           // [n_past + n_rows][n_head_kv][head_dim], float or, if is_half, float16
    size_t       key_stride;      // values from one key of a head to the next
    size_t       head_stride;     // from one head to the next
    float       *out;             // [n_rows][n_head][head_dim]
    float       *weights;         // [n_head][n_rows][n_past + n_rows] for the tap, or NULL
    int          n_rows, n_past, n_head, n_head_kv, head_dim, causal;
    int          is_half;
    int          is_coarse;       // 1: rows may be rounded to bfloat16, as the products were that made them
    avl__run    *run;
} avl__attention;

enum { AVL__TILE_QUERIES = 32, AVL__ITEM_QUERIES = 320 };   // of a head: of a tile; that a thread takes at a time

// One query row of one head.  kv_head: where the head's keys and values begin;  scores: [n_past + n_rows]
static void avl__attend(const avl__attention *a, int head, size_t kv_head, int row, float *scores) {
    const int n_keys = a->causal ? a->n_past + row + 1 : a->n_past + a->n_rows, d = a->head_dim;
    const float *q = a->q + ((size_t)row * a->n_head + head) * d;
    float *out = a->out + (q - a->q);
    if (a->is_half) {
        const uint16_t *k = (const uint16_t *)a->k + kv_head, *v = (const uint16_t *)a->v + kv_head;
        a->run->kernels->attend_one(out, q, k, v, a->key_stride, n_keys, d, scores);
    } else {
        const float *k = (const float *)a->k + kv_head, *v = (const float *)a->v + kv_head;
        const float scale = (float)(1.0 / avl__sqrt((double)d));
        for (int j = 0; j < n_keys; j++) scores[j] = avl__dot_portable(q, k + (size_t)j * a->key_stride, d) * scale;
        astrovl_softmax(scores, n_keys);
        memset(out, 0, (size_t)d * sizeof(float));
        for (int j = 0; j < n_keys; j++, v += a->key_stride)
            for (int i = 0; i < d; i++) out[i] += scores[j] * v[i];
    }
    if (a->weights) {
        const size_t n_all = (size_t)a->n_past + a->n_rows;
        float *weights = a->weights + ((size_t)head * a->n_rows + row) * n_all;
        memset(weights, 0, n_all * sizeof(float));
        memcpy(weights, scores, (size_t)n_keys * sizeof(float));
    }
}

// n query rows of one head, from row `first` on. A head's keys lie as far apart as all heads are wide, often a power of
// two, so that they would share a few lines of a cache: they are copied side by side first, as floats.
static void avl__attend_tile(const avl__attention *a, int head, size_t kv_head, int first, int n, float *scratch) {
    const avl__kernels *kernels = a->run->kernels;
    const size_t dim = (size_t)a->head_dim, q_stride = (size_t)a->n_head * dim;
    const size_t at = (size_t)first * q_stride + (size_t)head * dim;
    const int n_keys = a->causal ? a->n_past + first + n : a->n_past + a->n_rows;
    const int n_visible = a->causal ? a->n_past + first + 1 : n_keys;
    float *k = scratch, *v = k + (size_t)n_keys * dim;
    avl__tile tile = {a->out + at, a->q + at, k, v, q_stride, dim, n, n_keys, n_visible, a->head_dim};
    if (a->is_coarse && !a->is_half && kernels->attend_coarsely) {     // copies them itself
        tile.k = (const float *)a->k + kv_head;
        tile.v = (const float *)a->v + kv_head;
        tile.kv_stride = a->key_stride;
        kernels->attend_coarsely(&tile, scratch);
        return;
    }
    for (int j = 0; j < n_keys; j++, k += dim, v += dim) {
        const size_t key = kv_head + (size_t)j * a->key_stride;
        if (a->is_half) {
            kernels->from_halves(k, (const uint16_t *)a->k + key, a->head_dim);
            kernels->from_halves(v, (const uint16_t *)a->v + key, a->head_dim);
        } else {
            memcpy(k, (const float *)a->k + key, dim * sizeof(float));
            memcpy(v, (const float *)a->v + key, dim * sizeof(float));
        }
    }
    for (int i = 0; i < n; i += AVL__TILE_QUERIES) {                   // each with the keys that it sees
        tile.n = n - i < AVL__TILE_QUERIES ? n - i : AVL__TILE_QUERIES;
        if (a->causal) tile.n_visible = n_visible + i;
        if (a->causal) tile.n_keys = tile.n_visible + tile.n - 1;
        kernels->attend(&tile, v);
        tile.out += AVL__TILE_QUERIES * q_stride;
        tile.q += AVL__TILE_QUERIES * q_stride;
    }
}

static int avl__attention_items(const avl__attention *a) {
    return (a->n_rows + AVL__ITEM_QUERIES - 1) / AVL__ITEM_QUERIES * a->n_head;
}

static void avl__attention_item(void *context, int item, int thread) {
    const avl__attention *a = (const avl__attention *)context;
    const int n_items = avl__attention_items(a), head = item % n_items % a->n_head;
    const int first = item % n_items / a->n_head * AVL__ITEM_QUERIES, left = a->n_rows - first;
    const int n = left < AVL__ITEM_QUERIES ? left : AVL__ITEM_QUERIES;
    const size_t kv_head = (size_t)(head / (a->n_head / a->n_head_kv)) * a->head_stride;
    float *scratch = avl__thread_memory(a->run, thread);
    a += item / n_items;
    if (a->run->kernels->attend && !a->weights && a->n_rows > 1) avl__attend_tile(a, head, kv_head, first, n, scratch);
    else
        for (int row = first; row < first + n; row++) avl__attend(a, head, kv_head, row, scratch);
}

// a: [n], of as many rows and heads each
static void avl__attention_run(avl__attention *a, int n) {
    uint64_t n_keys = 0, dim = (uint64_t)a->head_dim + 32;
    for (int i = 0; i < n; i++)
        if (n_keys < (uint64_t)a[i].n_past + (uint64_t)a[i].n_rows)
            n_keys = (uint64_t)a[i].n_past + (uint64_t)a[i].n_rows;
    // Each thread needs room for scores, or for what avl__attend_tile copies and the kernels' scratch memory.
    if (!avl__run_reserve(a->run, a->run->kernels->attend ? (2 * n_keys + 32) * dim : n_keys, 0)) return;
    avl__pool_run(a->run->pool, avl__attention_item, a, n * avl__attention_items(a));
}

// ====================================================================================================================
// [5] GGUF
// The file format of models (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian:
//
//     "GGUF"   u32 version   u64 n_tensors   u64 n_kv
//     n_kv times        string key, u32 value type, value                        metadata
//     n_tensors times   string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset
//     zeros up to a multiple of general.alignment (32); the tensors' data, one after the other, each aligned likewise
//
// A string is u64 length and bytes; an array is u32 item type, u64 count and the items. Files may be hostile, so
// each number is checked against the bytes that remain before it is used to read, multiply or allocate; the memory
// taken is bounded by a small multiple of the file's size. Later sections rely on what is checked here: names are
// without zero bytes, tensors lie within the file, their rows are whole blocks. Tensors are used where they lie, at any
// address: `data` promises no alignment.
// ====================================================================================================================

#define AVL__GGUF_MAX_KEY       65535      // the specification's limit
#define AVL__GGUF_MAX_NAME      1024       // of a tensor; the specification's is 64
#define AVL__GGUF_MAX_ALIGNMENT (1 << 20)

// ---- sorting and finding names -------------------------------------------------------------------------------------
// Heapsort and binary search: no input makes them slow, as chosen names can make a hash table.

typedef int (*avl__order)(const void *context, int a, int b);   // < 0: item a comes first; > 0: item b

// Sorts order[n], item numbers, ascending.
static void avl__sort(int *order, int n, avl__order compare, const void *context) {
    int64_t start = n / 2, end = n;
    while (end > 1) {
        int64_t parent, child;
        int item;
        if (start > 0) {
            item = order[--start];    // first a heap is built, largest on top,
        } else {
            item = order[--end];      // then the top is taken off, again and again
            order[end] = order[0];
        }
        for (parent = start; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && compare(context, order[child], order[child + 1]) < 0) child++;
            if (compare(context, item, order[child]) >= 0) break;
            order[parent] = order[child];
        }
        order[parent] = item;
    }
}

static astrovl_string avl__string(const char *data, size_t size) {
    astrovl_string s = {size ? data : "", size};   // memcmp takes no NULL
    return s;
}
static int avl__string_is(astrovl_string s, const char *text) {
    return s.size == strlen(text) && memcmp(s.data, text, s.size) == 0;
}
static int avl__begins(const char *text, const char *start) { return strncmp(text, start, strlen(start)) == 0; }

// The keys, or the names of the tensors
typedef struct avl__names {
    char **name;        // [count], zero-terminated, owned, as the file lists them
    int   *order;       // [count], sorts them
    int    count;
} avl__names;

static int avl__names_order(const void *context, int a, int b) {
    const avl__names *names = (const avl__names *)context;
    return strcmp(names->name[a], names->name[b]);
}

static int avl__names_find(const avl__names *names, const char *name) {   // -1: absent
    int low = 0, high = name ? names->count : 0;
    while (low < high) {
        int middle = low + (high - low) / 2, item = names->order[middle], side = strcmp(name, names->name[item]);
        if (side == 0) return item;
        if (side < 0) high = middle;
        else low = middle + 1;
    }
    return -1;
}

static void avl__names_free(avl__names *names) {
    for (int i = 0; names->name && i < names->count; i++) astrovl_free(names->name[i]);
    astrovl_free(names->name);
    astrovl_free(names->order);
}

// ---- the cursor ----------------------------------------------------------------------------------------------------

typedef struct avl__gguf_entry {
    astrovl_kv      kv;
    const uint8_t **strings;      // [kv.count], owned: where each string's length stands; NULL for numbers
} avl__gguf_entry;

struct astrovl_gguf {
    avl__file        file;
    char            *name;
    int              version;
    avl__names       keys, tensor_names;
    avl__gguf_entry *entries;     // [keys.count]
    astrovl_tensor  *tensors;     // [tensor_names.count]
};

// Where reading stands. The first failure is kept; after it all reads give 0.
typedef struct avl__gguf_reader {
    astrovl_gguf  *f;
    uint64_t       at;            // the next byte
    uint64_t       alignment;     // of the tensors' data
    uint64_t       field;         // for messages: the first byte of what was read last,
    const char    *kind, *name;   // what is being read ("header", "key", "tensor") and its name ("": not known yet)
    astrovl_status status;
    astrovl_error *err;
} avl__gguf_reader;

// "model.gguf: key 'llama.block_count' at byte 1234: <reason>", long names cut between characters
AVL__PRINTF(3, 4) static void avl__gguf_fail(avl__gguf_reader *r, astrovl_status status, const char *format, ...) {
    const char *path = r->f->name, *quote = *r->name ? "'" : "";
    size_t skip = strlen(path) > 128 ? strlen(path) - 128 : 0;
    char reason[200], name[100];
    if (r->status) return;
    while (skip && ((unsigned char)path[skip] & 0xC0) == 0x80) skip++;
    AVL__FORMAT_PARAMETERS(reason, format);
    avl__format(name, sizeof name, "%s", r->name);
    r->status = avl__fail(r->err, status, "%s: %s%s%s%s%s at byte %llu: %s", path + skip, r->kind, *quote ? " " : "",
                          quote, name, quote, (unsigned long long)r->field, reason);
}

// Takes the next count * size bytes; NULL if the file ends before.
static const uint8_t *avl__gguf_take(avl__gguf_reader *r, unsigned long long count, unsigned long long size) {
    unsigned long long end = r->f->file.size;
    r->field = r->at;
    if (r->at > end || count > (end - r->at) / size)
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "%llu x %llu bytes belong here, but the file ends at byte %llu "
                       "(an incomplete download?)", count, size, end);
    if (r->status) return NULL;
    r->at += count * size;
    return r->f->file.data + r->field;
}

static unsigned long long avl__gguf_uint(avl__gguf_reader *r, int n) {   // a number of n bytes
    const uint8_t *p = avl__gguf_take(r, 1, (unsigned)n);
    return p ? avl__load_number(p, n) : 0;
}

// ---- metadata and tensors ------------------------------------------------------------------------------------------

static int avl__value_bytes(uint64_t type) {   // 0: of no fixed size; -1: no such type
    static const signed char bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};   // by astrovl_value_type
    return type < sizeof bytes ? bytes[type] : -1;
}

static void avl__gguf_read_entry(avl__gguf_reader *r, int index) {
    avl__gguf_entry *e = &r->f->entries[index];
    unsigned long long type = avl__gguf_uint(r, 4), item_type = type;
    e->kv.key = r->name;
    if (type == ASTROVL_VALUE_ARRAY) item_type = avl__gguf_uint(r, 4);
    if (avl__value_bytes(item_type) < 0)
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "there is no value type %llu", item_type);
    if (item_type == ASTROVL_VALUE_ARRAY)
        avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "arrays of arrays are not supported");
    e->kv.count = type == ASTROVL_VALUE_ARRAY ? avl__gguf_uint(r, 8) : 1;
    if (r->status) return;
    e->kv.type = (astrovl_value_type)type;
    e->kv.item_type = (astrovl_value_type)item_type;
    uint64_t start = r->at;
    e->kv.data = r->f->file.data + start;
    if (item_type != ASTROVL_VALUE_STRING) {
        avl__gguf_take(r, e->kv.count, (unsigned)avl__value_bytes(item_type));
    } else if (avl__gguf_take(r, e->kv.count, 8)) {   // their lengths, at least: this bounds the allocation
        r->at = start;
        e->strings = (const uint8_t **)avl__alloc_raw(e->kv.count, sizeof *e->strings);
        if (!e->strings) avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
        for (uint64_t i = 0; i < e->kv.count && !r->status; i++) {
            e->strings[i] = r->f->file.data + r->at;
            avl__gguf_take(r, avl__gguf_uint(r, 8), 1);
        }
    }
    e->kv.n_bytes = r->at - start;
    if (r->status || strcmp(r->name, "general.alignment") != 0) return;
    r->alignment = (unsigned long long)astrovl_gguf_int(r->f, index, 0);
    if (r->alignment < 1 || r->alignment > AVL__GGUF_MAX_ALIGNMENT || (r->alignment & (r->alignment - 1)) != 0)
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it is %lld, not a power of two up to %d", (long long)r->alignment,
                       AVL__GGUF_MAX_ALIGNMENT);
}

static void avl__gguf_read_tensor(avl__gguf_reader *r, int index) {
    astrovl_tensor *t = &r->f->tensors[index];
    unsigned long long ne[4] = {1, 1, 1, 1}, size = r->f->file.size;
    t->name = r->name;
    const unsigned long long n_dims = avl__gguf_uint(r, 4);
    if (n_dims > 4) avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it has %llu dimensions; 4 are allowed", n_dims);
    for (int i = 0; i < (int)n_dims && !r->status; i++) {
        ne[i] = avl__gguf_uint(r, 8);
        if (ne[i] == 0) avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "dimension %d is 0", i);
    }
    const unsigned long long type = avl__gguf_uint(r, 4);
    const avl__type_info other = {0, "a type unknown here", 1, 1, NULL};   // its bytes are told by the next tensor
    const avl__type_info *info = avl__find_type((int)(type & INT_MAX));
    if (!info) info = &other;
    if (type > INT_MAX) avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "there is no tensor type %llu", type);
    if (ne[0] % (unsigned)info->block_values != 0)
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "rows of %llu values cannot be of type %s, which has blocks of %d",
                       ne[0], info->name, info->block_values);
    if (r->status) return;
    t->type = (int)type;
    t->n_dims = n_dims == 0 ? 1 : (int)n_dims;   // none: a single value
    t->n_bytes = (unsigned)info->block_bytes;
    for (int i = 0; i < 4; i++) {                    // n_bytes stays within the file: no product overflows
        const unsigned long long n = i == 0 ? ne[0] / (unsigned)info->block_values : ne[i];
        if (n > (info == &other ? 8 * size : size) / t->n_bytes) {   // no type has less than a bit per value
            avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "a shape of %llu x %llu x %llu x %llu in %s needs more than the "
                           "file's %llu bytes", ne[0], ne[1], ne[2], ne[3], info->name, size);
            return;
        }
        t->n_bytes *= n;
        t->ne[i] = (int64_t)ne[i];
    }
    t->offset = avl__gguf_uint(r, 8);
}

// ---- the whole file ------------------------------------------------------------------------------------------------

// Reads how many names follow, each with at least n bytes, and makes room for them and for an item of each.
static void *avl__gguf_read_count(avl__gguf_reader *r, avl__names *names, const char *things, unsigned long long n,
                                  size_t item) {
    unsigned long long count = avl__gguf_uint(r, 8), size = r->f->file.size;
    if (!r->status && (count > (size - r->at) / n || count > INT_MAX))
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "it announces %llu %s, too many for a file of %llu bytes", count,
                       things, size);
    if (r->status) return NULL;
    names->count = (int)count;
    names->name = (char **)avl__alloc(count, sizeof *names->name);
    names->order = (int *)avl__alloc(count, sizeof *names->order);
    void *items = avl__alloc(count, item);
    if (!names->name || !names->order || !items) avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
    return items;
}

// A list of named things: names of 1 to max_name bytes, none of them zero; `read` reads what follows name i.
static void avl__gguf_read_list(avl__gguf_reader *r, avl__names *names, const char *kind, unsigned long long max_name,
                                void (*read)(avl__gguf_reader *r, int i)) {
    for (int i = 0; i < names->count && !r->status; i++) {
        r->kind = kind;
        r->name = "";
        const unsigned long long size = avl__gguf_uint(r, 8);
        if (size < 1 || size > max_name)
            avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its name has %llu bytes; 1 to %llu are allowed", size, max_name);
        const char *text = (const char *)avl__gguf_take(r, size, 1);
        if (text && memchr(text, 0, (size_t)size)) avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "its name has a zero byte");
        if (!r->status) names->name[i] = avl__copy_text(text, (size_t)size);
        if (!names->name[i]) avl__gguf_fail(r, ASTROVL_ERROR_MEMORY, "out of memory");
        else r->name = names->name[i];
        names->order[i] = i;
        read(r, i);
    }
    if (r->status) return;
    r->field = r->at;
    avl__sort(names->order, names->count, avl__names_order, names);
    for (int i = 1; i < names->count; i++) {
        r->name = names->name[names->order[i]];
        if (strcmp(r->name, names->name[names->order[i - 1]]) == 0)
            avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "the same name appears twice in the list that ends here");
    }
}

// Takes ownership of the file: it is closed on failure too.
static astrovl_gguf *avl__gguf_read(avl__file *file, const char *name, astrovl_error *err) {
    astrovl_gguf *f = (astrovl_gguf *)avl__alloc(1, sizeof *f);
    avl__gguf_reader reader = {f, 4, 32, 0, "header", "", ASTROVL_OK, err}, *r = &reader;
    unsigned long long version, start = 0;
    if (f) f->name = avl__copy_text(name, strlen(name));
    if (!f || !f->name) {
        avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory", name);
        avl__file_close(file);
        astrovl_free(f);
        return NULL;
    }
    f->file = *file;
    if (file->size < 4 || memcmp(file->data, "GGUF", 4) != 0)
        avl__gguf_fail(r, ASTROVL_ERROR_FORMAT, "this is not a GGUF file: it does not begin with \"GGUF\"%s",
                       file->size > 8 && memcmp(file->data, "version ", 8) == 0 ?
                       ", but points to one: \"git lfs pull\" gets it" : " (convert.py makes one of a checkpoint)");
    version = avl__gguf_uint(r, 4);
    if (version != 0 && (version & 0xFFFF) == 0)   // a small number in the other byte order
        avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "this file is big-endian; only little-endian files are supported "
                       "(convert it with gguf-convert-endian, from the Python package gguf)");
    if (version != 2 && version != 3)
        avl__gguf_fail(r, ASTROVL_ERROR_UNSUPPORTED, "GGUF version %llu; 2 and 3 are supported%s", version,
                       version == 1 ? " (convert the model again, with a new converter)" : "");
    f->version = (int)version;
    f->tensors = (astrovl_tensor *)avl__gguf_read_count(r, &f->tensor_names, "tensors", 25, sizeof *f->tensors);
    f->entries = (avl__gguf_entry *)avl__gguf_read_count(r, &f->keys, "metadata entries", 14, sizeof *f->entries);
    avl__gguf_read_list(r, &f->keys, "key", AVL__GGUF_MAX_KEY, avl__gguf_read_entry);
    avl__gguf_read_list(r, &f->tensor_names, "tensor", AVL__GGUF_MAX_NAME, avl__gguf_read_tensor);
    for (int i = 0; i < f->tensor_names.count && !r->status; i++) {   // the data, one tensor's after the other
        astrovl_tensor *t = &f->tensors[i];
        r->name = t->name;
        r->at = (r->at + r->alignment - 1) / r->alignment * r->alignment;
        r->field = r->at;
        if (i == 0) start = r->at;
        if (t->offset != r->at - start)
            avl__gguf_fail(r, ASTROVL_ERROR_FORMAT,
                           "its data is at offset %llu; it must follow the data before, at %llu",
                           (unsigned long long)t->offset, r->at - start);
        t->offset = r->at;
        if (!avl__find_type(t->type))   // it has what is left before the next tensor
            t->n_bytes = (i + 1 < f->tensor_names.count ? start + t[1].offset : file->size) - t->offset;
        t->data = avl__gguf_take(r, t->n_bytes, 1);
    }
    if (!r->status) return f;
    astrovl_gguf_close(f);
    return NULL;
}

ASTROVL_API astrovl_gguf *astrovl_gguf_open(const char *path, int no_mmap, astrovl_error *err) {
    avl__file file;
    return avl__file_open(path, no_mmap, SIZE_MAX / 4, &file, err) ? NULL : avl__gguf_read(&file, path, err);
}

ASTROVL_API astrovl_gguf *astrovl_gguf_open_memory(const void *data, size_t size, const char *name,
                                                   astrovl_error *err) {
    avl__file file = {(uint8_t *)data, size, AVL__FILE_BORROWED};
    if (!name) name = "(memory)";
    if (data) return avl__gguf_read(&file, name, err);
    avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%s: no memory block was given", name);
    return NULL;
}

ASTROVL_API void astrovl_gguf_close(astrovl_gguf *file) {
    if (!file) return;
    for (int i = 0; file->entries && i < file->keys.count; i++) astrovl_free((void *)file->entries[i].strings);
    avl__names_free(&file->keys);
    avl__names_free(&file->tensor_names);
    astrovl_free(file->entries);
    astrovl_free(file->tensors);
    avl__file_close(&file->file);
    astrovl_free(file->name);
    astrovl_free(file);
}

ASTROVL_API const char *astrovl_gguf_name(const astrovl_gguf *file) { return file ? file->name : ""; }
ASTROVL_API int astrovl_gguf_version(const astrovl_gguf *file) { return file ? file->version : 0; }
ASTROVL_API uint64_t astrovl_gguf_size(const astrovl_gguf *file) { return file ? file->file.size : 0; }
ASTROVL_API int astrovl_gguf_n_tensors(const astrovl_gguf *file) { return file ? file->tensor_names.count : 0; }
ASTROVL_API int astrovl_gguf_n_kv(const astrovl_gguf *file) { return file ? file->keys.count : 0; }
ASTROVL_API const astrovl_tensor *astrovl_gguf_tensor(const astrovl_gguf *file, int index) {
    return index >= 0 && index < astrovl_gguf_n_tensors(file) ? &file->tensors[index] : NULL;
}
ASTROVL_API const astrovl_tensor *astrovl_gguf_find_tensor(const astrovl_gguf *file, const char *name) {
    return file ? astrovl_gguf_tensor(file, avl__names_find(&file->tensor_names, name)) : NULL;
}
ASTROVL_API const astrovl_kv *astrovl_gguf_kv(const astrovl_gguf *file, int index) {
    return index >= 0 && index < astrovl_gguf_n_kv(file) ? &file->entries[index].kv : NULL;
}
ASTROVL_API int astrovl_gguf_find_kv(const astrovl_gguf *file, const char *key) {
    return file ? avl__names_find(&file->keys, key) : -1;
}

// Element i of entry `index`, and its type; NULL where there is none.
static const uint8_t *avl__gguf_element(const astrovl_gguf *f, int index, uint64_t i, astrovl_value_type *type) {
    const astrovl_kv *kv = astrovl_gguf_kv(f, index);
    if (!kv || i >= kv->count) return NULL;
    *type = kv->item_type;
    if (*type == ASTROVL_VALUE_STRING) return f->entries[index].strings[i];
    return (const uint8_t *)kv->data + i * (uint64_t)avl__value_bytes(*type);
}

ASTROVL_API int64_t astrovl_gguf_int(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_value_type type = ASTROVL_VALUE_STRING;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    uint64_t value = avl__load_number(p, avl__value_bytes(type));   // 0 for a string: no bytes are read
    double x;
    switch (type) {
    case ASTROVL_VALUE_BOOL: return value != 0;
    case ASTROVL_VALUE_I8:  return (int8_t)value;
    case ASTROVL_VALUE_I16: return (int16_t)value;
    case ASTROVL_VALUE_I32: return (int32_t)value;
    case ASTROVL_VALUE_I64: return (int64_t)value;
    case ASTROVL_VALUE_F32: case ASTROVL_VALUE_F64:   // towards zero; what does not fit becomes the nearest that does
        x = astrovl_gguf_float(file, index, i);
        if (x >= -9223372036854775808.0) return x < 9223372036854775808.0 ? (int64_t)x : INT64_MAX;
        return x < 0 ? INT64_MIN : 0;
    default: return value > (uint64_t)INT64_MAX ? INT64_MAX : (int64_t)value;
    }
}

ASTROVL_API double astrovl_gguf_float(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_value_type type = ASTROVL_VALUE_STRING;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    if (type == ASTROVL_VALUE_F32) return (double)avl__float_from_bits(avl__load_u32(p));
    if (type == ASTROVL_VALUE_F64) return avl__double_from_bits(avl__load_u64(p));
    if (type == ASTROVL_VALUE_U64) return (double)avl__load_u64(p);
    return (double)astrovl_gguf_int(file, index, i);
}

ASTROVL_API astrovl_string astrovl_gguf_string(const astrovl_gguf *file, int index, uint64_t i) {
    astrovl_value_type type = ASTROVL_VALUE_STRING;
    const uint8_t *p = avl__gguf_element(file, index, i, &type);
    if (!p || type != ASTROVL_VALUE_STRING) return avl__string(NULL, 0);
    return avl__string((const char *)p + 8, (size_t)avl__load_u64(p));
}

// ---- metadata keys by kind -----------------------------------------------------------------------------------------
// Reads entries of one file. The first failure sticks: later calls find nothing, and the caller looks at `status` once.

typedef struct avl__keys {
    const astrovl_gguf *file;
    const char         *prefix;     // before every name, such as "tokenizer.ggml."
    astrovl_error      *err;
    astrovl_status      status;
} avl__keys;

typedef enum avl__key_kind { AVL__KEY_INT, AVL__KEY_FLOAT, AVL__KEY_STRING } avl__key_kind;   // booleans are integers

// Fails with "model.gguf: tokenizer.ggml.scores" and the formatted rest.
static void avl__key_fail(avl__keys *k, astrovl_status status, const char *name, const char *format, ...) {
    char reason[256];
    if (k->status) return;
    AVL__FORMAT_PARAMETERS(reason, format);
    k->status = avl__fail(k->err, status, "%s: %s%s%s", astrovl_gguf_name(k->file), k->prefix, name, reason);
}

// The index of an entry of the given kind; -1 if it is absent (which is no failure) or anything else (which is).
//   count   elements of an array; -1: an array of any length; 0: no array
static int avl__key(avl__keys *k, const char *name, avl__key_kind kind, int64_t count) {
    static const char *const kinds[] = {"integer", "float", "string"};
    char key[128];
    if (k->status) return -1;
    avl__format(key, sizeof key, "%s%s", k->prefix, name);
    int index = astrovl_gguf_find_kv(k->file, key);
    if (index < 0) return -1;
    const astrovl_kv *kv = astrovl_gguf_kv(k->file, index);
    avl__key_kind found = kv->item_type == ASTROVL_VALUE_STRING ? AVL__KEY_STRING :
            kv->item_type == ASTROVL_VALUE_F32 || kv->item_type == ASTROVL_VALUE_F64 ? AVL__KEY_FLOAT : AVL__KEY_INT;
    if (found != kind || (kv->type == ASTROVL_VALUE_ARRAY) != (count != 0)) {
        avl__key_fail(k, ASTROVL_ERROR_FORMAT, name, count ? " is no array of %ss" : " is no %s", kinds[kind]);
    } else if (count > 0 && kv->count != (uint64_t)count) {
        avl__key_fail(k, ASTROVL_ERROR_FORMAT, name, " has %lld elements, not %lld", (long long)kv->count,
                      (long long)count);
    }
    return k->status ? -1 : index;
}

static astrovl_string avl__key_text(avl__keys *k, const char *name) {   // empty if the entry is absent
    int index = avl__key(k, name, AVL__KEY_STRING, 0);
    return astrovl_gguf_string(k->file, index, 0);
}

// An integer or boolean within low..high; missing: what stands for an absent entry.
static int avl__key_number(avl__keys *k, const char *name, int low, int high, int missing) {
    int index = avl__key(k, name, AVL__KEY_INT, 0);
    int64_t value = index < 0 ? missing : astrovl_gguf_int(k->file, index, 0);
    if (index < 0 || (value >= low && value <= high)) return (int)value;
    avl__key_fail(k, ASTROVL_ERROR_FORMAT, name, " is %lld; %d to %d is possible", (long long)value, low, high);
    return missing;
}

// ---- weights across files ------------------------------------------------------------------------------------------
// A model may lie in one file or in several; a tensor or key is looked for in each, in the order they were given.
// Matrices are used where they lie; vectors and position tables are expanded to float32 once and owned here.
// The first failure sticks: later calls load nothing and return empty or the least legal values, which are safe to
// compute with, so that a loader can ask for everything and look at `status` once.

typedef struct avl__weights {
    astrovl_gguf **files;          // [n_files], owned
    int            n_files;
    float        **vectors;        // [n_vectors], owned
    size_t         n_vectors, vectors_capacity;
    astrovl_status status;         // of loading
    astrovl_error *err;
    const astrovl_gguf *part;      // the file of the part that is being loaded, for messages
} avl__weights;

#define AVL__ASK_FOR_FILE "the model is of another kind (SigLIP's tower, ...), or a file was not given"

// Fails with "FILE: what the format says".  file: NULL: that of the part that is being loaded, or the first one
static void avl__load_fail(avl__weights *w, const astrovl_gguf *file, astrovl_status status, const char *format, ...) {
    char what[400];
    if (w->status) return;
    AVL__FORMAT_PARAMETERS(what, format);
    if (!file) file = w->part ? w->part : w->files[0];
    w->status = avl__fail(w->err, status, "%s: %s", astrovl_gguf_name(file), what);
}

// file: out, where the tensor is; may be NULL.  NULL: absent
static const astrovl_tensor *avl__find_tensor(const avl__weights *w, const char *name, const astrovl_gguf **file) {
    for (int f = 0; f < w->n_files; f++) {
        const astrovl_tensor *t = astrovl_gguf_find_tensor(w->files[f], name);
        if (t && file) *file = w->files[f];
        if (t) return t;
    }
    return NULL;
}

// The file that has tensors whose names begin so; NULL: none has.
static const astrovl_gguf *avl__find_part(const avl__weights *w, const char *start) {
    for (int f = 0; f < w->n_files; f++)
        for (int i = 0; i < astrovl_gguf_n_tensors(w->files[f]); i++)
            if (avl__begins(astrovl_gguf_tensor(w->files[f], i)->name, start)) return w->files[f];
    return NULL;
}

// The file that has a key, with its index there; NULL: none has.
static const astrovl_gguf *avl__find_key(const avl__weights *w, const char *key, int *index) {
    for (int f = 0; f < w->n_files; f++)
        if ((*index = astrovl_gguf_find_kv(w->files[f], key)) >= 0) return w->files[f];
    return NULL;
}

static astrovl_string avl__load_string(const avl__weights *w, const char *key) {   // empty: absent, or no text
    int index;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    return astrovl_gguf_string(file, index, 0);
}

// A number in min..max (which no NaN is), or an array of equal ones, such as one for each layer.
// fallback: for an absent key; below 0: the key must be there.   format: of the key
static double avl__load_value(avl__weights *w, double min, double max, double fallback, const char *format, ...) {
    char key[96];
    int index;
    AVL__FORMAT_PARAMETERS(key, format);
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    const double value = kv ? astrovl_gguf_float(file, index, 0) : fallback;
    if (!kv && fallback < 0)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "the key %s is missing; " AVL__ASK_FOR_FILE, key);
    if (kv && (kv->count == 0 || kv->item_type == ASTROVL_VALUE_STRING))
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "%s is empty or a text, where a number belongs", key);
    for (uint64_t i = 1; kv && i < kv->count; i++) {
        const double other = astrovl_gguf_float(file, index, i);
        if (!(other >= value && other <= value))
            avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "%s has different values, %.9g and %.9g; one for all "
                           "layers is supported", key, value, other);
    }
    if (!(value >= min && value <= max) || (min >= 1 && (double)(int64_t)value < value))   // these are whole
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "%s is %.15g; %.9g to %.9g is possible", key, value, min, max);
    return w->status ? min : value;
}

// Fails with "FILE: tensor NAME is [4096, 32]; what the format says", the shape slowest first.
static void avl__load_misfit(avl__weights *w, const astrovl_gguf *file, const astrovl_tensor *t, const char *format,
                             ...) {
    char wanted[128], shape[96];
    size_t at = 0;
    AVL__FORMAT_PARAMETERS(wanted, format);
    for (int d = t->n_dims - 1; d >= 0; d--)
        at += avl__format(shape + at, 96 - at, "%s%lld%s", at ? ", " : "[", (long long)t->ne[d], d ? "" : "]");
    avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "tensor %s is %s; %s", t->name, shape, wanted);
}

// A tensor that must be there; NULL after a failure.
static const astrovl_tensor *avl__load_tensor(avl__weights *w, const char *name, const astrovl_gguf **file) {
    astrovl_tensor *t = (astrovl_tensor *)avl__find_tensor(w, name, file);
    if (!t)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "the tensor %s is missing; " AVL__ASK_FOR_FILE, name);
    else if (!avl__find_type(t->type))
        avl__load_fail(w, *file, ASTROVL_ERROR_UNSUPPORTED, "tensor %s is of type number %d; take a file in F32, F16, "
                       "BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K", name, t->type);
    else
        t->is_used = 1;
    return w->status ? NULL : t;
}

// A tensor of `count` values as float32, owned by w; NULL after a failure.  format: of its name
static const float *avl__load_vector(avl__weights *w, int64_t count, const char *format, ...) {
    char name[128];
    const astrovl_gguf *file = NULL;
    AVL__FORMAT_PARAMETERS(name, format);
    const astrovl_tensor *t = avl__load_tensor(w, name, &file);
    if (!t) return NULL;
    if (t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3] != count) {   // the reader has checked that this does not overflow
        avl__load_misfit(w, file, t, "the model's keys ask for %lld values", (long long)count);
        return NULL;
    }
    float *values = avl__alloc_floats((uint64_t)count);
    if (!values || !avl__grow(&w->vectors, &w->vectors_capacity, w->n_vectors + 1, sizeof *w->vectors)) {
        astrovl_free(values);
        avl__load_fail(w, file, ASTROVL_ERROR_MEMORY, "out of memory for tensor %s", name);
        return NULL;
    }
    w->vectors[w->n_vectors++] = values;
    avl__dequantize_row(t->type, t->data, values, count);
    if (!avl__are_numbers(values, count))
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "tensor %s holds NaN or infinity; convert the model again", name);
    return values;
}

// The matrix NAME.weight [n_out][n_in] in place (further dimensions folded into n_in), and NAME.bias [n_out] if there
// is one. n_out 0: as many rows as the file has; the result says how many.  format: of NAME
static avl__linear avl__load_linear(avl__weights *w, int n_in, int n_out, const char *format, ...) {
    char prefix[112], name[128];
    const astrovl_gguf *file = NULL;
    avl__linear linear = {NULL, NULL, 0, 0, 0, 0};
    AVL__FORMAT_PARAMETERS(prefix, format);
    avl__format(name, sizeof name, "%s.weight", prefix);
    const astrovl_tensor *t = avl__load_tensor(w, name, &file);
    if (!t) return linear;
    int64_t n_rows = t->ne[t->n_dims - 1], row = t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3] / n_rows;
    if (t->n_dims < 2 || row != n_in || (n_out ? n_rows != n_out : n_rows > 1 << 20)) {
        if (n_out) avl__load_misfit(w, file, t, "the model's keys ask for [%d, %d]", n_out, n_in);
        else       avl__load_misfit(w, file, t, "it must be a matrix with rows of %d values", n_in);
        return linear;
    }
    linear.weight = t->data;
    linear.type = t->type;
    linear.n_in = n_in;
    linear.n_out = (int)n_rows;
    linear.row_bytes = (size_t)(t->n_bytes / (uint64_t)n_rows);   // whole blocks: every row of ne[0] is
    avl__format(name, sizeof name, "%s.bias", prefix);
    if (avl__find_tensor(w, name, NULL)) linear.bias = avl__load_vector(w, n_rows, "%s", name);
    return linear;
}

// ====================================================================================================================
// [6] Text
// Text to token ids and back, by the vocabulary that a GGUF file carries in its tokenizer.ggml.* keys.
//   llama  SentencePiece's BPE (Kudo & Richardson 2018): a text is spelled with U+2581 for a space, and characters are
//          merged to pieces. What no piece spells becomes bytes.
//   gpt2   byte-level BPE (Radford et al. 2019): a regular expression cuts the text into words, and in each word bytes,
//          spelled as printable characters, are merged to tokens. Nothing is unknown.
//   CLIP   byte-level BPE of its own kind: the text is composed and lower-cased first, white space is dropped, and the
//          last byte of a word is a symbol of its own ("y</w>").
// One rule merges all three, that of tiktoken: of all neighbors whose joined spelling is a token with a rank, the pair
// with the lowest rank is merged, the leftmost of equals, until there is no such pair. The ranks come from the scores
// (llama), from the order of the list of merges (gpt2, CLIP), or from the ids (CLIP's files without such a list).
// For a vocabulary that BPE training made, this is the same as looking for the listed pairs: if a token was learned as
// "a b" at rank r, then everywhere that it is spelled, ranks below r have made a and b of it, and no other two halves.
// Ids equal those of transformers: LlamaTokenizer with legacy=True, CLIPTokenizer, and the `tokenizers` package for
// byte-level BPE. A text of n characters takes O(n log n) time, with spaces in it or without.
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
    uint32_t c = s[0];   // the second byte's range is narrower after four of the first bytes:
    uint32_t low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    *length = 1;
    if (c < 0x80) return (int32_t)c;
    if (c < 0xC2 || c > 0xF4) return AVL__UTF8_BAD;
    size_t n = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    c &= 0x7Fu >> n;
    for (size_t i = 1; i < n; i++) {
        *length = i;
        if (i == size) return AVL__UTF8_CUT;
        if (s[i] < low || s[i] > high) return AVL__UTF8_BAD;
        c = c << 6 | (s[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *length = n;
    return (int32_t)c;
}

// Writes a code point (below 0x110000, no surrogate) as UTF-8; returns its length.
static size_t avl__utf8_write(uint32_t c, char *text) {
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4, i;
    for (i = n - 1; i > 0; i--, c >>= 6) text[i] = (char)(0x80 | (c & 0x3F));
    text[0] = (char)(n == 1 ? c : (0xF00u >> n | c) & 0xFF);   // 110..., 1110..., 11110...
    return n;
}

// A decoder for text that comes in pieces: holds back the first bytes of a character until it is whole. Bytes that
// belong to no character become U+FFFD, as in Python's incremental decoder with errors="replace".
typedef struct avl__utf8_gate {
    char   pending[4];
    size_t n_pending;      // at most 3 between calls
} avl__utf8_gate;

// Appends to out what is whole. A gate starts as all zeros.
static void avl__utf8_gate_put(avl__utf8_gate *gate, const char *bytes, size_t size, avl__bytes *out) {
    for (size_t i = 0, length; i < size; i++) {
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

// The end of the text: an unfinished character becomes one U+FFFD.
static void avl__utf8_gate_flush(avl__utf8_gate *gate, avl__bytes *out) {
    if (gate->n_pending) avl__bytes_put(out, AVL__REPLACEMENT, 3);
    gate->n_pending = 0;
}

// ---- Unicode -------------------------------------------------------------------------------------------------------
// Properties of Unicode 16.0, as the engine in `tokenizers` 0.23 has them: test/make_golden.py (tokens_unicode_tables)
// asked it about every code point and wrote these strings. They hold numbers: a character from ']' to '~' is a digit in
// base 34 with more to follow, one from '#' to 'Z' the last digit, in base 56 ("_&" is 2 * 56 + 3 = 115). A signed
// number is stored as 0, 1, 2, 3, 4 ... for 0, -1, 1, -2, 2 ...
//
// Three tables are runs of characters with one value: the gap to the run before, and 4 * (count - 1) + the class; or
// the gap, 4 * (count - 1) + (stride - 1), and the value (signed). What is in no run has the value 0.

#define AVL__CLASS_RUNS 831     // value: an avl__class
#define AVL__LOWER_RUNS 185     // value: the lower-case letter less the capital
#define AVL__MARK_RUNS  334     // value: a mark's canonical combining class

static const char avl__class_table[] =
    ",65&2I*^P)^P-&=&,$*)$$&%#$$-$^D$_,$}H'P14*$$$_44$(%0$$)$$,$$$^8$bT$fT+hP$_H%$)_T^2^T'0P`$8I'($d$$$2(*(#I#,%$3$$_(@"
    "c4.$1I#_4,('$(^@'$,$&$:^L*L(^H$84_X^%`P&$5$*H'I$^('@%(%^@$<$$&0&$3$0($,'I#(%9%$+8'(%^@$<$($($(B0$$*I%,3D$,$^@$<$($"
    "4&$5$2('I,$.@%(%^@$<$($4&$A($,'I$$#9.$$8&,$0&($$$(&(&,&P9$8U5@$,$^D$^(&$=,%$%('I+=$$'@$,$^D$H$4&$B($('I$(4D$,$_T%$"
    "3$(,$=#,'^5$8(^0&^H$D$$%<BI4`8$(/<,IJ($$$4$^H$$$H$(,$%4$$,I%0C$B^9/@$_@>4_&`$7$#I)8'0&$&(*,'T/$$I)_H$$($%`$$tL$0%<"
    "$$$0%_T$0%_4$0%<$$$0%^$$a$$0%aL1^9&^(3c(%8&^g0%^,#&#^P(b4&-#@*^00^41^01T$,2`HF$'$&I)I9I)c4*4%_8$$(aX-_,JI#_(%4.`('"
    "^P)MH^D,`LNI)I0$^H`44@&IL_(0(#I#`(=_@?I&,#I#_@%L(`$%,L0$8$(&$(jH^+pP%8%_H%8%@$$$$$$$_,%`L$<$$&,$<&0%8'T(,$<&N@*(&R"
    "&3%#$%9($#I)T^P$'$%H$$&4)$$$$$$0$L%0(4'$$`E#(#5iYa1^9^Ah1_)q/m4)0&(,%%_H$$($%`X*$3^D,<$<$<$<$<$<$<$<^;$e3&'(#%<E*4"
    "%-#('c(),$c8$0(`$$cH&1-_0S^(CIAA$^%CIJ^%bKjyP^+^ioD^.`0%p,&^(#I#(7`43_,%aX#IJD%d4%aL%($$$@8^($,$0$^D09-`H1`@?I;8&$"
    "$($I#^X-^D<_$*`4?$#I)4$H#I#4$_T:,$@'I)^D&$&`@$$&(%4%$$$;,%L*,/8%8%8,<$<$`$$X)e,0I)tlX/^D'`<akWw(%d@I</4($$H$T$4$$$"
    "($($dHDvT5a@%`PKP_'4$fD6I*^P)^P.c4&8%8%8%,FP$^P$^4$($^$%XEeL/`-/a%4)a7_$&`<3^U'_0#1,^8#%#@#%(_H-_(%_@'@$5Mh0%I)_@'"
    "_@'_P+`H/L$^$$<$($L$^$$<$(&`H/s,,^@-@;8$_X$D^08%$$`($(&$%^D%A#^D%=#_,+ES^4$((5#^@#9'^P^1`X')#(#^)%`1#$20$,$_$-E:_$"
    "#)$_$#-C@$^X)53`P-^@%A#^4(A#^0:=^;b,Z`D0`D*9#_@/I)I#^X,^D`U_-$_X)(3,^&_$#I#$+^@.1>^0Q^<#=7^D/`L=_)$(%$0`,C^L*I,_@2"
    "I'$%$+_<&$/`810.I#$$$'^9.^0$^L6(^*<$$$0$^$$H*`44I.@%(%^@$<$($4&$5$/4AH$$%$$_H$$<$$$O`L50(I(,A`87($$+I_Y`4L0G`87$.I"
    "I`$0$*I)^9?^T8Q'<`4`(_'a@#^5/@%$%@$($^H2$$$1I^1@%_L3$$$?$-_P*$8$.`06$5b,`B_42I)D$_D4$2_%(_(_#<$($_H8$,I)8$($_01$*I"
    "bA^42$$T$_8?I^A$2^=N^|P^QdU4jX^j'cT2_e@48<ej4(^dD`q,_(5I{Y^cD*_,$I)bD$I)_(5`830/I$=$^<(^4dK`,&I`Aa@#^E^Tb4($^-T^+("
    "$$?i{0+_q8LHatB0$<$($qL2$@,%$10+y0^d/dD(T&D*H_cIIw9^9/^9^W^M_:c$$b$$(%$%(%0$P$$$<$aD$0%@$<$^X$0$4$$&<$u0%^L$^L$_,$"
    "^L$_,$^L$_,$^L$_,$^L$@%`A}#_,)8aHa8_E`,-<%I'$bL_(5`('Ie9^X'I`Q_(%$#IeH<$0$($^$$k$%ESaP*$'Ik*a-$-$1^7`-$^%`=0$^T$($"
    "$%$$H$0$$$$)$'$$$$$$,$($$%$$$$$$$$$$($$%0$<$0$0$$$H$^,(,$4$^,g7U^lNIo9_rv8CeuH)lP%i`@1ltL2^g8^g%^aHwUgiL(ex8";

static const char avl__lower_table[] =
    "^,^O^+^P^C^+$;^+D^H%&,%%@%%^D%$#a4#,%&#d?#(%$#d7##%$'d5##%%#_Q##d/##d1##%$#d5##d9$#dA##d=##%&#dA##dE$#dG#,%$#dO##%"
    "$#dO%#%$#dO##%$'dM#(%$#dQ##%&#%*#'##%$#'##%$#'#D%%D%%#'#(%$#`<##^Z#^8%$#aF$D%*#hhA##%$#bP##hh;%#%$#cX##_=##_A#4%b,"
    "(%&#%+#a+)#^7$+^5$#_3$'_1$^+^+$C^+F#3+P%(#_*%#%$#0##%%+aF#^'_S#_/^+S^,%,^T%$#A#<%%`8%%_G^K^nD_Gdr;$#dr;(#dr;iUbG^c"
    "y##73^b.#%)`#`b:%+`b:bKb4%,#d~X$`8%,?2+72-?2+?2+72.02+?2;?2+?2+?2+'2#'_F##4./`&##4.'2#'`B/'2#'`Z##0.'aB#'a>##4b4#d"
    "{<&#ex8##et&)#^#P^'C6#%kE^OW}S`7^KS#%$#hfH##a].##hf(%,%$#hgZ##hfT##hh(##hh&$#%%#%+'hi0#`@%+(%'#%mg@^D%6X%_:<%&_,%-"
    "(%$#^``R#4%'#%$#^gjZ%(%&H%$#^gkZ##^gl8##^gl0##^gkT##^gkZ$#^gj.##^gk&##^gj4##~+#@%$#^J##^gkX##^`bJ#(%$#^gm0#@%$#^gu"
    "$;#%hu>^O^+rP_O^;_;_?^;_OK^9$^#^9$;^9$'^9|E`C_3_P^?^+^n5_/^+hmS_/^+^+^KYmkZ_7^/";

static const char avl__mark_table[] =
    "jK^;e/##e3#/dS##e3##dK#3dS#'d/#/dS#'d/#KdS#3%#/dS#+e/%#e/%#eC##e/#+dS#+e/#'dS$+e/#/dS##e/##e3#'dS##e/##e5#'e7##e5#"
    "'e7##e5#Se/aV3e/aL#dS#/e/##dS#+e/##dW##dS#7e/#7dS#'e/##dS#'e/##dW##e+##e/##7##9##;##=##?##A##C##E##G#'I##K##M##O$#"
    "Q$#S##U$#e/##dS$#G^3?e/##^'##^)##^+S#Y##^###^%##^'##^)##^+##^-##^/#'e/#'dS#3e/##dS#'e/##dS3#^1^P;e/%/e/##dS##e/%'e"
    "/$#dS#'e/##dSF#^3A#e/##dS#'e/##dS#'e/#+dS##e/#'dS##e/##dS#+e/##dS##e/##dS##e/##dS##e/##dS#'e/_S;e/##dS##e/E/e/$Ce/"
    "$+e/$3e/N+dS_+We/$#dS#'e/##dS#'e/##dS#+e/#+dS##Y##^###^%#+e/##dS#'e/#'dS#3e/^'#13#5&#e/##dS#'e/^R#13#5^Y#13#5^Y#13"
    "#5^Y#13#5_2#5_2#5*#`###`1^P#13#5_2#5_/#5^X'`I##50/`Q^W'a/1/a7^7'dS>#dS$#dS$#dKZ#aE##aG$#aK(/aG%#aG$'e/##5$'e/^)#dS"
    "_##1$'5^=#dSiR+e/mW#5B#5_P#5-#e/`F#e+_B#dW##e/##dS`V#e/##dS^2#57?e/%#dSS3e/#7dS#'e/##dS_)#12#5I#e/##dS#;e/Y'5^%#1."
    "'5^.#1_K+e/$#%#3dS#'e/#/dS##e/$;%'#dS)#e/&'e/`A'e/##dS#;e/##dS#'e/##e7##dG##dS##d/#_Ce/(#e/##e5##dS##e/##dSiS'e/#'"
    "%#/e/#+%#'e/'#e/&'%##e/##dS##e/#'%#/dS##e/^qQ+e/_@#5^K_/e/fU#dO##e+##e3##dW#'e#^T'3lyG#e/'Ge/C'e/^;'e/aW#5`8#5>^/e"
    "/^$+dSH#5^J#1/#5a2#e/$'e/##dS%'e/('e/$#e/W#5a9#5gs##WjL;e/#;dS#'e/n8#dSa%#dS_H3e/{%#dS$#e/K#e/##%##dS'#5_X#e/##dSu"
    "B#5^##5^$#5##1^0+e/S'5^)#1^7#5,#1^U#5##1`-#1##5^<#13#5;;e/&3e/`H#5&#1_.#5##1a>#5##1_1#5_)#5##1_&#5t.#5gpK3%^&;e/g}"
    "*#%_wY'dK#+%&#e'#3dK+?dS%3e/#'dSA/e/_G+e/^yN;e/$^+e/%;e/$'e/$3e/^b@;dS^X7e/##1";

// What composes (Unicode Standard Annex 15, form C), grouped by the second character: its distance from the group
// before, 2 * the size of the group + (1 if its pairs compose, 0 if they are only taken apart); for each pair how far
// the whole lies beyond the one before, and the first character (signed). A second character 0 stands for none. Hangul
// is done by arithmetic; the 1,002 CJK compatibility ideographs are left out, and stay as they are.
static const char avl__pair_table[] =
    "#^-kSx;$%%GT`.-sN,a;`vEx%%%%%%%%^%%%%%^)_B&^Q.^L%%+1+.+^7+^.&4$yL-z#%)%w(&ek/$%b0dr.'{N$a7f)iu)$%jK`$`;_5++'+)/*/*"
    ";++'+)/*/a%`I$^+?c.$^+f2~90)^.^%0)`lByN$%^&_%$%ReN$^+H_I$^+,^+$%2_$$^+4N$^+,c+$%0?$%*i0$^+2ed)$%*1$%*1$%*1$%*1$%*1"
    "$%*1$%*1$%*1$%*1$%*1$%+3*1$%*1$%(dl:%+%'%'%/%/%+^)^Z1+%'&dp;(dnD+^L&drE(dpP+^6&x4.x)%7$%kWxK#a.`<_5++'+)/*/&+'3++'"
    "+)/*/&+,^V$^+UP$^+,^&$^+3Z$^+(^($^+AT$^+^H`?$^+?c<$^+(`7$^+$^($^+$>$^+cY_R$wE%+$'$'%/%/$+$^-?T$+$'$'$G?:$/$+(5S_5,"
    "1^2U,1`l7|@$^+0^A$%:_:$^+$bR$^+0^&$^+0`K$^+(`)$%$f$$^+FeS$%,fN$^+D_I$^+,^+$%2_$$^+4N$^+,c+$%0?$%>d{#$%*1$%*1$%*1$%"
    "*1$%*1$%*1$%*1$%*1$%*1$%*1$%+3*1$%*1$%^L`'3_1$^,`=_5++'+)/*/*;++'+)/*/0^N$^+6Z$^+*^($^+2^&$^+JP$^+:Z$^+$^&$^+`|$^("
    "$^+>e`G$%<Q$%4I$%$^$`>_51='%1G1='%V^6$^+^*J$^+`{V^($^+P_K$^+,^+$%*cN$^+*`E$^+4N$^+,c+$%0?$%,i0$^+$^DaC_5$^+4Z$^+:Z"
    "$^+DV$^+@V$^+^U`I$^++^Z$^+$h?$%$iD$^+,f3$%^(fT$^+$^,$^+&h-$%$mN$^+i2~)$^+.L$^+`j,^_:$^+:e]A$%F^1$%c'dbN+^*;^;+^*+^"
    "C+^*%^,aE_5$^+4Z$^+,^&$^+0^&$^+DV$^+@V$^+i$~G.8C^+H9^N^D$^+1^6$^+(X$^+`j@oL$%_Lds1$%a<de2+^*;^;+^*+^C+^*$^HaM_9$^+"
    ".^&$^+,^&$^+2^&^6E$^+`%_$$^+*F$^+`v.^D$^+*^&$^+6^&$^+&^&$^+@X$^+&^($^+4^&$^+$^&$^+*^($^+&e1$%$-$%$dx-$%$e_P$^+>^$$"
    "^+&^($^+&^($^+/f7$^X`?_5*+'+*/)/+;*+'+*/)/&+_,^*g%zK$;BK$;,=P_9)@^5^I)^-_._>$^+*c#$%$cX$^+$^($^+(^($^+$V$^+&c'$%$c"
    "J$^+&^>$^+&Z$^+&Z$^+`j(^_H$^+J`U$^+Na-$%,fR$^+*^($^+-*$Taa%_5$^+(`=$^+,^+$%*cN$^+*`E$^+(bL$^+(V$^+(`E$^+,c+$%*hR$^"
    "+(h/$%,i0$^+$0`@_5C^+_<:$^+`|4'$'$0c#_Q$^+BV$^+m$~G$^+$^6aO_9$^+$^($^+.^($^+ET$^+,^&$^+3Z$^+*^($^+&^($^+;V$^+^:_$$"
    "^+$R$^+$V$^+$V$^+(`I$^+/c<$^+$Z$^+(hS$dQ$pJQ^.$^+&@f+_5$^+&Z$^+&Z$^+&V$^+&^$$^+&^$$^+gT^_A$%%<f-_5$^+&Z$^+&Z$^+&V$"
    "^+&^$$^+&^$$^+%@abK~M+^*+^3+^*+^/+^*+^/+^*+^7+^*+^73++^*_/S$DabL~M+^*+^3+^*+^/+^*+^/+^*+^7+^*+^7+^*+^3+^*_/S*^**,d"
    ";_Q$^+1V$^++^@a^/_7$^+*^&$^+:Z$^+0^$$^+&^($^+.^($^+&^($^+6Z$^+*^($^+,^($^+4^&$^+,^($^+,^$$^+0_$$^+:Z$^+4Z$^+$V$^+8"
    "gU$%$hR$^+.h/$%&i0$^+$(a`-`%$^+$(a^+_5$^+$,fC_Y$^+$^($^+$P`B_9C^+^&Z$^+6Z$^+'^($^+,^&$^+3Z$^+*^($^+&^($^+`@^H$^+`v"
    "B^,$^+:Z$^+$8aG_5$^+6Z$^+8Z$^+^.J$^+_*^6$^+(<a^=_;$^+(^($^+FT$^+0^&$^+HV$^+(^($^+$(a^U_C$^+%0a^E_=$^+4Z$^+^2J$^+$F"
    "a^1_7$^+*^&$^+HT$^+(^($^+0^&$^+8Z$^+2^&$^+HV$^+$F*%bvWhnU#^DanEf]S$'6'B_+$+$&X^M(-&);S%'>Q&1&'%):fb0%fc+.J$fb<$'$f"
    "c/$%&=$%&)$%*)$%&1$%&)$%FY$/$%$'T^H$%$K$%*^+$%$%$%-^&abQeh;$%*1$%:Q$%*1$%*1$%*1$%:Q$%+3*1$%*1$%^2dl:.xL(xY,do3*do."
    "$E+dpS*dq$$/2&&_2ae#eh;$%$%$%$%$%$%$%$%$%$%$%$%$%$%$%$E$%$%$%$%$%$%$%$%$%$%$%$%$%$%$%$^M$%$%$%$%$%$%$%$%$%$%$%$%$%"
    "$%$%&%$dlH$,&do7(dp4)dmY$dlD$4&doS(dpHIdn%$dl0$-&dp;(dqLh*%~vX^p=&'~vZ^q72^.$%~w2^p+$%~wN^p5&O~w3^p+$%$%$%$%$%$%%'"
    "$%$%$%$%%'%'$%%'$%%'$%$%$%$%&)~wO^p-$7$5%'~w-^q%%^|~;$'~w.^q%%^|~;_D&y%^s1$0y&^s1$^-%'_MaY%J4E$&y(^s1j23^eK_l%$%$%"
    "$-$-$%$5$+#*^dT_lK+3&)_3)^h'_q%$%%=%&^gN_r9<&^gO_r9^P/^iF_v/&/F^.$%$-&AaC'^nW_~M$%%&^nF`^);&^nC`^)$&^nG`^)^R(^pU`b"
    "G$%<(^oW``O^#^S_2&^s+`g/^W&^u=`kO6*^u3`kA*1'+$&^u;`kO^S(^wM`p7$%<&^wO`p7_&(^z5`uE&)(&^z7`uE3&^z9`uEd.%__Fab-%%__Ha"
    "b-/)__Iad?%%,_6X'__<a`;^;_S%7_^Na`?-7(-(-(-Z^Y-7(-(-(-_*&_bQahE^m::`rAdf%%'%'%'%''+L^=%'&'$%%)_zO^LcmOi~A%'%'%'%'%"
    "'%'%'%'%'%'%'&)%'%'*1&)&)&)&);^T-`)1?%'%'%'%'%'%'%'%'%'%'%'&)%'%'*1&)&)&)&);^T&_E$%$%$%'9$8cn<j]Q&)&)&)&)^?`#&)&)&"
    ")&){aC*^_s-_bg5%'27^X(^_uQ_blM$%fB&^`]>_c]Q<&^`]?_c]Qc,&^`d'_ck%-&^`d&_ck%&&^`d)_ck%a5(^`hE_ct+$%ve)+^yp9`taA$%^G`"
    "=$%,)^yp;`taQ^H`3$%$)^yp<`taQ^I`3$%$%^yp=`taQ$%^yp>`taQ$%^yp?`taQ";

typedef enum avl__class {
    AVL__CLASS_OTHER, AVL__CLASS_LETTER, AVL__CLASS_NUMBER, AVL__CLASS_SPACE, AVL__CLASS_END   // \p{L}, \p{N}, \s
} avl__class;

typedef struct avl__char_run {
    uint32_t first, count, stride;
    int32_t  value;
} avl__char_run;

// What two characters compose to, {first, second, whole, 0}, or how one is taken apart, {whole, 0, first, second}
typedef struct avl__pair { uint32_t a, b, x, y; } avl__pair;

typedef struct avl__unicode {
    avl__char_run classes[AVL__CLASS_RUNS], lower[AVL__LOWER_RUNS], marks[AVL__MARK_RUNS];
    avl__pair     pairs[4096];     // hash table by a and b; x 0: empty
} avl__unicode;

static uint32_t avl__table_number(const char **at) {   // *at moves behind the number
    uint32_t number = 0;
    while (**at >= ']') number = number * 34 + (uint32_t)(*(*at)++ - ']');
    return number * 56 + (uint32_t)(*(*at)++ - '#');
}

static int32_t avl__table_signed(const char **at) {
    uint32_t n = avl__table_number(at);
    return n & 1 ? -(int32_t)(n / 2) - 1 : (int32_t)(n / 2);
}

static void avl__table_runs(const char *at, avl__char_run *runs, int n, int classes) {
    uint32_t end = 0;
    for (int i = 0; i < n; i++) {
        runs[i].first = end + avl__table_number(&at);
        uint32_t code = avl__table_number(&at);
        runs[i].count = code / 4 + 1;
        runs[i].stride = classes ? 1 : code % 4 + 1;
        runs[i].value = classes ? (int32_t)(code % 4) : avl__table_signed(&at);
        end = runs[i].first + (runs[i].count - 1) * runs[i].stride + 1;
    }
}

// The value of the run that a character is in; 0: it is in none.
static int32_t avl__run_value(const avl__char_run *runs, int n, uint32_t c) {
    int low = 0, high = n;   // runs[low - 1].first <= c < runs[high].first
    while (low < high) {
        int middle = (low + high) / 2;
        if (runs[middle].first <= c) low = middle + 1;
        else high = middle;
    }
    if (low == 0) return 0;
    c -= runs[low - 1].first;
    return c % runs[low - 1].stride == 0 && c / runs[low - 1].stride < runs[low - 1].count ? runs[low - 1].value : 0;
}

static avl__pair *avl__find_pair(avl__unicode *u, uint32_t a, uint32_t b) {   // or the empty slot where it would go
    uint32_t at = (a * 0x9E3779B1u ^ b * 0x85EBCA6Bu) >> 20;
    while (u->pairs[at].x && (u->pairs[at].a != a || u->pairs[at].b != b)) at = (at + 1) % 4096;
    return &u->pairs[at];
}

static void avl__unicode_fill(avl__unicode *u) {   // u is all zeros
    const char *at = avl__pair_table;
    uint32_t second = 0;
    avl__table_runs(avl__class_table, u->classes, AVL__CLASS_RUNS, 1);
    avl__table_runs(avl__lower_table, u->lower, AVL__LOWER_RUNS, 0);
    avl__table_runs(avl__mark_table, u->marks, AVL__MARK_RUNS, 0);
    while (*at) {
        second += avl__table_number(&at);
        uint32_t first = 0, whole = 0;
        for (uint32_t code = avl__table_number(&at); code > 1; code -= 2) {
            whole += avl__table_number(&at);
            first += (uint32_t)avl__table_signed(&at);
            avl__pair apart = {whole, 0, first, second}, together = {first, second, whole, 0};
            *avl__find_pair(u, whole, 0) = apart;
            if (code & 1) *avl__find_pair(u, first, second) = together;
        }
    }
}

// The class of the character at text[at..end), and its length. Valid UTF-8 is expected.
static avl__class avl__class_at(const avl__unicode *u, const char *text, size_t at, size_t end, size_t *length) {
    *length = 0;
    if (at >= end) return AVL__CLASS_END;
    uint32_t c = (uint32_t)avl__utf8_read(text + at, end - at, length), lower = c | 32;
    if (c >= ' ' && c < 128)   // the most frequent, without a search
        return c == ' ' ? AVL__CLASS_SPACE : lower >= 'a' && lower <= 'z' ? AVL__CLASS_LETTER :
               c >= '0' && c <= '9' ? AVL__CLASS_NUMBER : AVL__CLASS_OTHER;
    return (avl__class)avl__run_value(u->classes, AVL__CLASS_RUNS, c);
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

// ---- composing and lower case, for CLIP ----------------------------------------------------------------------------
// Unicode's normalization form C: every character is taken apart, marks are sorted by class, and a letter is put
// together with the marks behind it ("e" and a combining acute become one character).

// Hangul syllables are made of a lead, a vowel and perhaps a tail, by arithmetic (the Unicode Standard 3.12).
enum {
    AVL__HANGUL = 0xAC00, AVL__LEAD = 0x1100, AVL__VOWEL = 0x1161, AVL__TAIL = 0x11A7,
    AVL__N_LEADS = 19, AVL__N_VOWELS = 21, AVL__N_TAILS = 28, AVL__N_SYLLABLES = 19 * 21 * 28
};

// While a text is composed, the class of a code point stands above its 21 bits.
enum { AVL__POINT_BITS = 21, AVL__POINT_MASK = (1 << AVL__POINT_BITS) - 1 };

// Appends a character taken apart as far as it goes; 0: memory is out. Each mark goes before those of a higher class,
// but at most 30 places: Unicode's Stream-Safe Text Format has no more on one letter.
static int avl__decompose(avl__tokens *points, avl__unicode *u, uint32_t c) {
    const avl__pair *pair = avl__find_pair(u, c, 0);
    uint32_t s = c - AVL__HANGUL;
    size_t at = points->size;
    if (s < AVL__N_SYLLABLES)
        return avl__tokens_put(points, (int32_t)(AVL__LEAD + s / (AVL__N_VOWELS * AVL__N_TAILS))) &&
               avl__tokens_put(points, (int32_t)(AVL__VOWEL + s / AVL__N_TAILS % AVL__N_VOWELS)) &&
               (s % AVL__N_TAILS == 0 || avl__tokens_put(points, (int32_t)(AVL__TAIL + s % AVL__N_TAILS)));
    if (pair->x)
        return avl__decompose(points, u, pair->x) && (!pair->y || avl__decompose(points, u, pair->y));
    int32_t rank = avl__run_value(u->marks, AVL__MARK_RUNS, c);
    int32_t point = (int32_t)c | rank << AVL__POINT_BITS;
    if (!avl__tokens_put(points, point)) return 0;
    for (; rank && at > 0 && points->size - at <= 30 && points->data[at - 1] >> AVL__POINT_BITS > rank; at--)
        points->data[at] = points->data[at - 1];
    points->data[at] = point;
    return 1;
}

// What two characters compose to, or 0.
static uint32_t avl__composed(avl__unicode *u, uint32_t first, uint32_t second) {
    if (first - AVL__LEAD < AVL__N_LEADS && second - AVL__VOWEL < AVL__N_VOWELS)
        return AVL__HANGUL + ((first - AVL__LEAD) * AVL__N_VOWELS + (second - AVL__VOWEL)) * AVL__N_TAILS;
    if (first - AVL__HANGUL < AVL__N_SYLLABLES && (first - AVL__HANGUL) % AVL__N_TAILS == 0 && second > AVL__TAIL &&
        second - AVL__TAIL < AVL__N_TAILS) return first + (second - AVL__TAIL);
    return second ? avl__find_pair(u, first, second)->x : 0;   // (first, 0) is how first is taken apart
}

// Composes text (valid UTF-8) and makes it lower case; 0: memory is out.
static int avl__clean(avl__unicode *u, avl__bytes *text) {
    avl__tokens points = {NULL, 0, 0};
    size_t at, length, starter = (size_t)-1, n = 0;   // the first n points are composed; starter: the last of class 0
    int32_t last = 0;                                 // the class of point n - 1
    int ok = 1;
    for (at = 0; at < text->size && ok; at += length)
        ok = avl__decompose(&points, u, (uint32_t)avl__utf8_read(text->data + at, text->size - at, &length));
    text->size = 0;
    for (at = 0; at < points.size; at++) {
        int32_t rank = points.data[at] >> AVL__POINT_BITS;
        uint32_t whole = 0;
        if (starter != (size_t)-1 && (n == starter + 1 || (last > 0 && last < rank)))   // nothing stands between
            whole = avl__composed(u, (uint32_t)points.data[starter], (uint32_t)(points.data[at] & AVL__POINT_MASK));
        if (whole) points.data[starter] = (int32_t)whole;
        else {
            if (rank == 0) starter = n;
            last = rank;
            points.data[n++] = points.data[at];
        }
    }
    for (at = 0; at < n; at++) {
        char utf8[4];
        uint32_t c = (uint32_t)(points.data[at] & AVL__POINT_MASK);
        uint32_t lower = c == 0x130 ? 'i' : c + (uint32_t)avl__run_value(u->lower, AVL__LOWER_RUNS, c);
        avl__bytes_put(text, utf8, avl__utf8_write(lower, utf8));
        if (c == 0x130) avl__bytes_put(text, "\xCC\x87", 2);   // becomes two characters, i and a dot above
    }
    astrovl_free(points.data);
    return ok && !text->failed;
}

// ---- vocabularies --------------------------------------------------------------------------------------------------

// The kind of a vocabulary; all but the first are byte-level, and differ in how a text is cut into words.
typedef enum avl__vocab_kind {
    AVL__VOCAB_SPM, AVL__VOCAB_GPT2, AVL__VOCAB_LLAMA3, AVL__VOCAB_SMOLLM, AVL__VOCAB_CLIP
} avl__vocab_kind;

// tokenizer.ggml.token_type
enum {
    AVL__TOKEN_NORMAL = 1, AVL__TOKEN_UNKNOWN, AVL__TOKEN_CONTROL, AVL__TOKEN_USER_DEFINED, AVL__TOKEN_UNUSED,
    AVL__TOKEN_BYTE
};

enum {
    AVL__MARKERS = 1 << AVL__TOKEN_CONTROL | 1 << AVL__TOKEN_UNKNOWN | 1 << AVL__TOKEN_USER_DEFINED,   // found in texts
    AVL__MAX_TOKENS = 1 << 26,         // keeps the size of every table within 32 bits
    AVL__MAX_MARKER = 256,             // bytes of a special token, which is looked for at every place of a text
    AVL__MAX_PROBES = 256              // for a piece; 2^26 random ones need about a hundred
};

#define AVL__NEVER    UINT32_MAX       // the rank of a token that no merge makes
#define AVL__WORD_END "</w>"           // what CLIP's vocabulary writes after a word's last byte

typedef struct avl__piece_slot {
    uint32_t hash;
    int32_t  id;                       // -1: empty
} avl__piece_slot;

typedef struct avl__vocab {
    avl__vocab_kind  kind;
    int              n_tokens;
    int              bos, eos, unk, eot;       // -1: none
    int              add_bos, add_eos;
    int              add_space_prefix;         // SPM: a space goes before every part of a text
    astrovl_string  *pieces;           // [n_tokens] spellings, pointing into the file
    uint8_t         *types;            // [n_tokens] AVL__TOKEN_*
    uint8_t         *ends;             // [n_tokens] 1: ends an answer
    uint32_t        *rank;             // [n_tokens] which merge goes first, or AVL__NEVER
    avl__piece_slot *slots;            // [mask + 1] finds a piece: open addressing, at most half full
    uint32_t         mask;
    int32_t          byte_ids[256];    // the token of a single byte, or -1
    uint8_t          marker_types[256];        // [byte] 1 << type, of the AVL__MARKERS that begin with this byte
    size_t           longest_marker;   // bytes
    avl__unicode    *unicode;          // byte-level kinds
    const char      *note;             // what a key says and was not followed; NULL: nothing
} avl__vocab;

static void avl__vocab_free(avl__vocab *v) {
    astrovl_free(v->pieces);
    astrovl_free(v->types);
    astrovl_free(v->ends);
    astrovl_free(v->rank);
    astrovl_free(v->slots);
    astrovl_free(v->unicode);
    memset(v, 0, sizeof *v);
}

// FNV-1a; a hash goes on where that of the bytes before it ended.
#define AVL__HASH_START 2166136261u
static uint32_t avl__hash(uint32_t hash, const char *data, size_t size) {
    for (size_t i = 0; i < size; i++) hash = (hash ^ (uint8_t)data[i]) * 16777619u;
    return hash;
}

// The slot of a piece, or the empty one where it would go; NULL if neither is near (chosen pieces can collide).
static avl__piece_slot *avl__vocab_slot(const avl__vocab *v, uint32_t hash, const char *piece, size_t size) {
    uint32_t at = (hash ^ hash >> 15) & v->mask;
    for (int n = 0; n < AVL__MAX_PROBES; n++, at = (at + 1) & v->mask) {
        avl__piece_slot *slot = &v->slots[at];
        if (slot->id < 0) return slot;
        if (slot->hash != hash || v->pieces[slot->id].size != size) continue;
        if (memcmp(v->pieces[slot->id].data, piece, size) == 0) return slot;
    }
    return NULL;
}

// The id of a piece, or -1; of several with one spelling, the first.
static int32_t avl__vocab_find(const avl__vocab *v, const char *piece, size_t size) {
    const avl__piece_slot *slot = avl__vocab_slot(v, avl__hash(AVL__HASH_START, piece, size), piece, size);
    return slot ? slot->id : -1;
}

static astrovl_string avl__vocab_piece(const avl__vocab *v, int32_t id) {
    return id < 0 || id >= v->n_tokens ? avl__string(NULL, 0) : v->pieces[id];
}
static int avl__vocab_is_end(const avl__vocab *v, int32_t id) { return id >= 0 && id < v->n_tokens && v->ends[id]; }

// The longest token of the given types (bits 1 << type) that text starts with, or -1.
static int32_t avl__find_marker(const avl__vocab *v, int types, const char *text, size_t size) {
    uint32_t hash = AVL__HASH_START;
    int32_t best = -1;
    if (size == 0 || !(v->marker_types[(uint8_t)text[0]] & types)) return -1;
    for (size_t n = 1; n <= v->longest_marker && n <= size; n++) {
        hash = avl__hash(hash, text + n - 1, 1);
        const avl__piece_slot *slot = avl__vocab_slot(v, hash, text, n);
        if (slot && slot->id >= 0 && types >> v->types[slot->id] & 1) best = slot->id;
    }
    return best;
}

// ---- loading -------------------------------------------------------------------------------------------------------

static void avl__load_kind(avl__vocab *v, avl__keys *k) {
    static const struct { const char *pre; avl__vocab_kind kind; } rules[] = {
        {"llama-bpe", AVL__VOCAB_LLAMA3}, {"llama3", AVL__VOCAB_LLAMA3}, {"llama-v3", AVL__VOCAB_LLAMA3},
        {"smollm", AVL__VOCAB_SMOLLM}, {"gpt-2", AVL__VOCAB_GPT2}, {"default", AVL__VOCAB_GPT2}, {"", AVL__VOCAB_GPT2}
    };
    astrovl_string model = avl__key_text(k, "model"), pre = avl__key_text(k, "pre");
    int i = 0;
    if (avl__string_is(model, "llama")) return;   // kind 0
    if (!avl__string_is(model, "gpt2"))
        avl__key_fail(k, ASTROVL_ERROR_UNSUPPORTED, "model", " is \"%.*s\", not llama or gpt2", AVL__SHOW(model));
    while (i < 7 && !avl__string_is(pre, rules[i].pre)) i++;
    if (i < 7) v->kind = rules[i].kind;
    else avl__key_fail(k, ASTROVL_ERROR_UNSUPPORTED, "pre", " is \"%.*s\", not llama-bpe, smollm or gpt-2",
                       AVL__SHOW(pre));
}

// The spellings of the tokens and the table that finds them.
static void avl__load_pieces(avl__vocab *v, avl__keys *k) {
    int index = avl__key(k, "tokens", AVL__KEY_STRING, -1), i;
    uint64_t count = index < 0 ? 0 : astrovl_gguf_kv(k->file, index)->count;
    if (index < 0)
        avl__key_fail(k, ASTROVL_ERROR_MODEL, "tokens", " is missing: no vocabulary; convert again with its tokenizer");
    else if (count == 0 || count > AVL__MAX_TOKENS)
        avl__key_fail(k, ASTROVL_ERROR_FORMAT, "tokens", " is empty, or has more than 2^26 elements");
    if (k->status) return;
    v->n_tokens = (int)count;
    for (v->mask = 15; v->mask + 1 < 2 * count; ) v->mask = 2 * v->mask + 1;
    v->pieces = (astrovl_string *)avl__alloc_raw(count, sizeof *v->pieces);
    v->types = (uint8_t *)avl__alloc(count, 1);
    v->ends = (uint8_t *)avl__alloc(count, 1);
    v->rank = (uint32_t *)avl__alloc_raw(count, sizeof *v->rank);
    v->slots = (avl__piece_slot *)avl__alloc_raw((uint64_t)v->mask + 1, sizeof *v->slots);
    v->unicode = (avl__unicode *)avl__alloc(v->kind != AVL__VOCAB_SPM, sizeof *v->unicode);
    if (!v->pieces || !v->types || !v->ends || !v->rank || !v->slots || !v->unicode)
        avl__key_fail(k, ASTROVL_ERROR_MEMORY, "tokens", ": out of memory");
    if (k->status) return;
    if (v->kind != AVL__VOCAB_SPM) avl__unicode_fill(v->unicode);
    memset(v->rank, 0xFF, (size_t)count * sizeof *v->rank);             // every rank is AVL__NEVER
    memset(v->slots, 0xFF, ((size_t)v->mask + 1) * sizeof *v->slots);   // every id is -1
    for (i = 0; i < v->n_tokens && !k->status; i++) {
        astrovl_string s = astrovl_gguf_string(k->file, index, (uint64_t)i);
        uint32_t hash = avl__hash(AVL__HASH_START, s.data, s.size);
        v->pieces[i] = s;
        avl__piece_slot *slot = avl__vocab_slot(v, hash, s.data, s.size);
        if (!slot) avl__key_fail(k, ASTROVL_ERROR_LIMIT, "tokens", " are chosen to collide in a hash table");
        if (!slot || slot->id >= 0) continue;
        slot->hash = hash;
        slot->id = i;
    }
}

// "<0x4F>" -> 0x4F; other spellings -> -1
static int avl__byte_piece(astrovl_string piece) {
    static const char digits[] = "0123456789ABCDEF";
    if (piece.size != 6 || memcmp(piece.data, "<0x", 3) != 0 || piece.data[5] != '>') return -1;
    const char *high = (const char *)memchr(digits, piece.data[3], 16);
    const char *low = (const char *)memchr(digits, piece.data[4], 16);
    return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

// The special tokens, by key or else by their usual spelling; the types of all tokens; and which end an answer: EOS,
// EOT, and the usual end marks (a model may end its turn with another than its EOS), special even if typed normal.
static void avl__load_types(avl__vocab *v, avl__keys *k) {
    static const char *const marks[] = {"</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
                                        "<|endoftext|>", "<|end|>", "<end_of_turn>", "<EOT>"};
    const struct { const char *key; int *id; const char *usual, *clip; } special[] = {
        {"bos_token_id", &v->bos, "<s>", "<|startoftext|>"}, {"eos_token_id", &v->eos, "</s>", "<|endoftext|>"},
        {"unknown_token_id", &v->unk, "<unk>", "<|endoftext|>"}, {"eot_token_id", &v->eot, NULL, NULL}};
    int spm = v->kind == AVL__VOCAB_SPM, index, id, byte;
    for (int i = 0; i < 4 && !k->status; i++) {
        const char *usual = spm ? special[i].usual : v->kind == AVL__VOCAB_CLIP ? special[i].clip : NULL;
        index = avl__key(k, special[i].key, AVL__KEY_INT, 0);
        const int64_t value = index < 0 ? -1 : astrovl_gguf_int(k->file, index, 0);
        const int is_token = value >= 0 && value < v->n_tokens;
        if (index >= 0 && !is_token) v->note = "a special token's id is out of range; the usual token is taken";
        *special[i].id = is_token ? (int)value : usual ? avl__vocab_find(v, usual, strlen(usual)) : -1;
    }
    if (k->status) return;
    if (v->kind == AVL__VOCAB_GPT2 && avl__key_text(k, "pre").size == 0) {   // files older than this key
        int llama3 = avl__vocab_find(v, "<|begin_of_text|>", 17) >= 0 || (v->n_tokens >= 128256 && v->bos == 128000);
        if (llama3) v->kind = AVL__VOCAB_LLAMA3;
        else v->note = "tokenizer.ggml.pre is missing; text is cut into words as for GPT-2";
    }
    v->add_bos = avl__key_number(k, "add_bos_token", 0, INT_MAX, spm || v->kind == AVL__VOCAB_LLAMA3) != 0;
    v->add_eos = avl__key_number(k, "add_eos_token", 0, INT_MAX, 0) != 0;
    v->add_space_prefix = spm && avl__key_number(k, "add_space_prefix", 0, INT_MAX, 1) != 0;
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if ((id = avl__vocab_find(v, marks[i], strlen(marks[i]))) >= 0) v->ends[id] = 1;
    index = avl__key(k, "token_type", AVL__KEY_INT, v->n_tokens);
    memset(v->byte_ids, 0xFF, sizeof v->byte_ids);   // every id is -1
    for (id = 0; id < v->n_tokens && !k->status; id++) {
        int64_t type = AVL__TOKEN_NORMAL;   // a file without types: told by spelling
        byte = spm ? avl__byte_piece(v->pieces[id]) : -1;
        if (index >= 0) type = astrovl_gguf_int(k->file, index, (uint64_t)id);
        else if (id == v->bos || id == v->eos) type = AVL__TOKEN_CONTROL;
        else if (id == v->unk) type = AVL__TOKEN_UNKNOWN;
        else if (byte >= 0) type = AVL__TOKEN_BYTE;
        if (type < 0 || type > AVL__TOKEN_BYTE)
            avl__key_fail(k, ASTROVL_ERROR_FORMAT, "token_type", "[%d] is %lld, outside 0 to 6", id, (long long)type);
        if (type == 0) type = AVL__TOKEN_NORMAL;    // 0: undefined
        if (v->ends[id] && (type == AVL__TOKEN_NORMAL || type == AVL__TOKEN_UNUSED)) type = AVL__TOKEN_CONTROL;
        v->types[id] = (uint8_t)type;
        if (type == AVL__TOKEN_BYTE && byte >= 0 && v->byte_ids[byte] < 0) v->byte_ids[byte] = id;
        const astrovl_string piece = v->pieces[id];
        if (k->status || !piece.size || !(AVL__MARKERS >> type & 1)) continue;
        v->marker_types[(uint8_t)piece.data[0]] |= (uint8_t)(1 << type);
        if (piece.size > v->longest_marker) v->longest_marker = piece.size;
        if (piece.size > AVL__MAX_MARKER) avl__key_fail(k, ASTROVL_ERROR_LIMIT, "tokens", "[%d] is special, and longer "
                                                        "than %d bytes", id, AVL__MAX_MARKER);
    }
    if (v->eos >= 0) v->ends[v->eos] = 1;
    if (v->eot >= 0) v->ends[v->eot] = 1;
}

// SPM's ranks: the scores as integers that sort the other way round. The bits of a float sort like the float once a
// negative one's are inverted and a positive one's sign is set.
static void avl__load_scores(avl__vocab *v, avl__keys *k) {
    int index = avl__key(k, "scores", AVL__KEY_FLOAT, v->n_tokens), i;
    if (index < 0) avl__key_fail(k, ASTROVL_ERROR_FORMAT, "scores", " is missing: a llama vocabulary needs it");
    for (i = 0; i < v->n_tokens && !k->status; i++) {
        float score = (float)astrovl_gguf_float(k->file, index, (uint64_t)i) + 0.0f;   // no -0
        uint32_t bits = avl__float_bits(score);
        if (score != score) avl__key_fail(k, ASTROVL_ERROR_FORMAT, "scores", "[%d] is not a number", i);
        if (v->types[i] == AVL__TOKEN_NORMAL || v->types[i] == AVL__TOKEN_USER_DEFINED)
            v->rank[i] = ~(bits >> 31 ? ~bits : bits | 0x80000000u);
    }
}

// Byte-level BPE spells each byte as one printable character (GPT-2's bytes_to_unicode): the printable bytes of Latin-1
// as themselves, the other 68 in their order as U+0100 and up. CLIP marks a word's last one.
static size_t avl__spell_byte(uint32_t byte, int ends_word, char spelling[8]) {   // returns its length
    uint32_t c = byte <= 32 ? 256 + byte : byte >= 127 && byte <= 160 ? 289 + (byte - 127) : byte == 173 ? 323 : byte;
    size_t n = avl__utf8_write(c, spelling);
    if (ends_word) memcpy(spelling + n, AVL__WORD_END, 4);
    return ends_word ? n + 4 : n;
}

static int avl__char_to_byte(int32_t c) {   // -1: a character that spells no byte
    if (c >= 256 && c <= 323) return c <= 288 ? c - 256 : c <= 322 ? c - 289 + 127 : 173;
    return (c > 32 && c < 127) || (c > 160 && c < 256 && c != 173) ? c : -1;
}

// The ranks of byte-level BPE: the single symbols 0, then the place of a token's merge ("left right") in the list. Both
// halves and what they make must be tokens, and of each token's merges one must join what earlier lines make.
static void avl__load_merges(avl__vocab *v, avl__keys *k) {
    const uint32_t too_early = AVL__NEVER - 1;   // named by a merge, but not made by one yet
    int clip = v->kind == AVL__VOCAB_CLIP, index = avl__key(k, "merges", AVL__KEY_STRING, -1), i, count, byte, end;
    avl__bytes joined = {NULL, 0, 0, 0};
    char spelling[8];
    if (index < 0 && !clip) avl__key_fail(k, ASTROVL_ERROR_FORMAT, "merges", " is missing: a gpt2 vocabulary needs it");
    if (index >= 0 && astrovl_gguf_kv(k->file, index)->count > AVL__MAX_TOKENS)
        avl__key_fail(k, ASTROVL_ERROR_FORMAT, "merges", " has more than 2^26 elements");
    if (k->status) return;
    for (byte = 0; byte < 256; byte++)
        for (end = 0; end <= clip; end++) {
            int32_t id = avl__vocab_find(v, spelling, avl__spell_byte((uint32_t)byte, end, spelling));
            if (id >= 0) v->rank[id] = 0;
            if (!end) v->byte_ids[byte] = id;
        }
    for (i = 0; index < 0 && i < v->n_tokens; i++)   // clip.cpp's files list no merges, but ids are in their order
        if (v->types[i] == AVL__TOKEN_NORMAL && v->rank[i]) v->rank[i] = (uint32_t)i + 1;
    count = index < 0 ? 0 : (int)astrovl_gguf_kv(k->file, index)->count;
    for (i = 0; i < count && !k->status; i++) {
        astrovl_string line = astrovl_gguf_string(k->file, index, (uint64_t)i);
        const char *space = line.size > 1 ? (const char *)memchr(line.data + 1, ' ', line.size - 1) : NULL;
        const size_t size = space ? (size_t)(space - line.data) : line.size, behind = space ? line.size - size - 1 : 0;
        if (!space) avl__key_fail(k, ASTROVL_ERROR_FORMAT, "merges", "[%d] has no space between two pieces", i);
        joined.size = 0;
        avl__bytes_put(&joined, line.data, size);
        avl__bytes_put(&joined, line.data + (line.size - behind), behind);
        if (joined.failed) avl__key_fail(k, ASTROVL_ERROR_MEMORY, "merges", ": out of memory");
        int32_t left = avl__vocab_find(v, line.data, size);
        int32_t right = avl__vocab_find(v, line.data + (line.size - behind), behind);
        int32_t id = avl__vocab_find(v, joined.data, joined.size);
        if (left < 0 || right < 0 || id < 0)
            avl__key_fail(k, ASTROVL_ERROR_FORMAT, "merges", "[%d] \"%.*s\" names a piece that is no token", i,
                          AVL__SHOW(line));
        else if (v->rank[left] < too_early && v->rank[right] < too_early) {
            if (v->rank[id] >= too_early) v->rank[id] = (uint32_t)i + 1;
        } else if (v->rank[id] == AVL__NEVER) v->rank[id] = too_early;
    }
    astrovl_free(joined.data);
    for (i = 0; i < v->n_tokens; i++)
        if (v->rank[i] == too_early)
            avl__key_fail(k, ASTROVL_ERROR_FORMAT, "merges", " make \"%.*s\" of pieces not made before",
                          AVL__SHOW(v->pieces[i]));
}

//   prefix  before every key: "tokenizer.ggml."
//   clip    1: the vocabulary of CLIP's text tower, whose kind no key tells
// The file must outlive the vocabulary, which points into it.
static astrovl_status avl__vocab_load(avl__vocab *v, const astrovl_gguf *file, const char *prefix, int clip,
                                      astrovl_error *err) {
    avl__keys k = {file, prefix, err, ASTROVL_OK};
    memset(v, 0, sizeof *v);
    if (clip) v->kind = AVL__VOCAB_CLIP;
    else avl__load_kind(v, &k);
    avl__load_pieces(v, &k);
    avl__load_types(v, &k);
    if (clip) v->add_bos = v->add_eos = 1;   // whatever the keys say: the tower needs one token at least
    if (v->kind == AVL__VOCAB_SPM) avl__load_scores(v, &k);
    else avl__load_merges(v, &k);
    if (clip && (v->bos < 0 || v->eos < 0))
        avl__key_fail(&k, ASTROVL_ERROR_MODEL, "tokens", " lacks <|startoftext|> or <|endoftext|>");
    if (k.status) avl__vocab_free(v);
    return k.status;
}

// ---- merging -------------------------------------------------------------------------------------------------------
// The symbols of a spelling are a linked list; a heap holds every pair of neighbors that could be merged, the best on
// top. Merging a pair lets the left symbol grow over the right one and offers the two new pairs. A pair of which
// a merge has changed a symbol stays in the heap; when it is taken out, its size is not the symbols' any more.

typedef struct avl__symbol {
    int32_t start, size;    // bytes of the spelling; size 0: swallowed by the symbol on its left
    int32_t prev, next;     // -1: none
    int32_t id;             // -1: not a token (yet)
    int32_t frozen;         // 1: takes part in no merge
} avl__symbol;

typedef struct avl__candidate {
    uint64_t order;         // rank << 32 | index of the left symbol: the lowest goes first
    int32_t  size;          // bytes of both
    int32_t  id;            // of the token they make
} avl__candidate;

// Everything that turning one text into tokens needs. `failed` (memory is out) sticks.
typedef struct avl__encoder {
    const avl__vocab *v;
    avl__tokens      *out;
    avl__bytes        text;        // byte-level: the text in valid UTF-8; CLIP: composed and in lower case, too
    avl__bytes        spelling;    // what symbols stand for: SPM all of the text, byte-level one word
    avl__symbol      *symbols;
    size_t            n_symbols, symbol_capacity;
    avl__candidate   *heap;
    size_t            n_heap, heap_capacity;
    int32_t           known[4096]; // byte-level: [id % 4096] id + 1 of a word that was seen to merge to that one token
    int               failed;
} avl__encoder;

static void avl__put_id(avl__encoder *e, int32_t id) { e->failed |= !avl__tokens_put(e->out, id); }

// Appends a symbol of the next `size` bytes of the spelling; there must be room for it.
static void avl__put_symbol(avl__encoder *e, size_t size, int32_t id, int frozen) {
    avl__symbol *s = &e->symbols[e->n_symbols];
    s->prev = (int32_t)e->n_symbols++ - 1;
    s->start = s->prev < 0 ? 0 : s[-1].start + s[-1].size;
    s->size = (int32_t)size;
    s->next = -1;
    s->id = id;
    s->frozen = frozen;
    if (s->prev >= 0) s[-1].next = s->prev + 1;
}

// Puts the pair that starts with symbol `left` on the heap if it makes a token.
static void avl__offer_pair(avl__encoder *e, int32_t left) {
    const avl__vocab *v = e->v;
    const avl__symbol *s = &e->symbols[left < 0 ? 0 : left];
    avl__candidate c;
    size_t at = e->n_heap;
    if (left < 0 || s->next < 0 || s->frozen || e->symbols[s->next].frozen) return;
    c.size = s->size + e->symbols[s->next].size;
    c.id = avl__vocab_find(v, e->spelling.data + s->start, (size_t)c.size);
    if (c.id < 0 || v->rank[c.id] == AVL__NEVER) return;
    c.order = (uint64_t)v->rank[c.id] << 32 | (uint32_t)left;
    e->failed |= !avl__grow(&e->heap, &e->heap_capacity, e->n_heap + 1, sizeof *e->heap);
    if (e->failed) return;
    for (e->n_heap++; at > 0 && c.order < e->heap[(at - 1) / 2].order; at = (at - 1) / 2)
        e->heap[at] = e->heap[(at - 1) / 2];
    e->heap[at] = c;
}

static avl__candidate avl__take_pair(avl__encoder *e) {   // the heap is not empty
    avl__candidate top = e->heap[0], last = e->heap[--e->n_heap];
    size_t at = 0, child;
    while ((child = 2 * at + 1) < e->n_heap) {
        if (child + 1 < e->n_heap && e->heap[child + 1].order < e->heap[child].order) child++;
        if (last.order < e->heap[child].order) break;
        e->heap[at] = e->heap[child];
        at = child;
    }
    e->heap[at] = last;
    return top;
}

// Merges the symbols and appends their tokens. A symbol that is no token becomes its bytes, where these are tokens, or
// the unknown token, once for a run of such bytes.
static void avl__merge(avl__encoder *e) {
    const avl__vocab *v = e->v;
    int was_unknown = 0;
    for (int32_t index = 0; index < (int32_t)e->n_symbols; index++) avl__offer_pair(e, index);
    while (e->n_heap) {
        avl__candidate c = avl__take_pair(e);
        const int32_t index = (int32_t)(uint32_t)c.order;
        avl__symbol *left = &e->symbols[index], *right;
        if (left->size == 0 || left->next < 0) continue;
        right = &e->symbols[left->next];
        if (left->size + right->size != c.size) continue;
        left->size = c.size;
        left->id = c.id;
        left->next = right->next;
        right->size = 0;
        if (left->next >= 0) e->symbols[left->next].prev = index;
        avl__offer_pair(e, left->prev);
        avl__offer_pair(e, index);
    }
    for (int32_t index = e->n_symbols ? 0 : -1; index >= 0; index = e->symbols[index].next) {
        const avl__symbol *s = &e->symbols[index];
        if (s->id >= 0) avl__put_id(e, s->id);
        was_unknown &= s->id < 0;
        for (int32_t i = 0; s->id < 0 && i < s->size; i++) {
            const int32_t byte = v->byte_ids[(uint8_t)e->spelling.data[s->start + i]];
            if (byte >= 0) avl__put_id(e, byte);
            else if (v->unk >= 0 && !was_unknown) avl__put_id(e, v->unk);
            was_unknown = byte < 0;
        }
    }
    e->n_symbols = 0;
    e->spelling.size = 0;
}

// ---- SentencePiece -------------------------------------------------------------------------------------------------

static void avl__encode_spm(avl__encoder *e, const char *text, size_t size) {
    const avl__vocab *v = e->v;
    avl__bytes *spelling = &e->spelling;
    size_t length;
    if (v->add_space_prefix) avl__bytes_put_text(spelling, AVL__SPACE_MARK);
    for (size_t at = 0; at < size; at += length) {
        int32_t c = avl__utf8_read(text + at, size - at, &length);
        if (c == ' ') avl__bytes_put_text(spelling, AVL__SPACE_MARK);
        else if (c >= 0) avl__bytes_put(spelling, text + at, length);
        else {
            avl__bytes_put_text(spelling, AVL__REPLACEMENT);   // each byte that is not UTF-8
            length = 1;
        }
    }
    e->failed |= spelling->failed;
    for (size_t at = 0; at < spelling->size && !e->failed; at += length) {
        int32_t id = avl__find_marker(v, 1 << AVL__TOKEN_USER_DEFINED, spelling->data + at, spelling->size - at);
        int frozen = id >= 0;   // a user-defined token is found in any text and stays as it is
        if (frozen) length = v->pieces[id].size;
        else {
            avl__utf8_read(spelling->data + at, spelling->size - at, &length);
            id = avl__vocab_find(v, spelling->data + at, length);
            if (id >= 0 && v->rank[id] == AVL__NEVER) id = -1;
        }
        e->failed |= !avl__grow(&e->symbols, &e->symbol_capacity, e->n_symbols + 1, sizeof *e->symbols);
        if (!e->failed) avl__put_symbol(e, length, id, frozen);
    }
    if (!e->failed) avl__merge(e);
}

// ---- byte-level BPE ------------------------------------------------------------------------------------------------
// \s, \p{L}, \p{N} are classes SPACE, LETTER, NUMBER; [^\s\p{L}\p{N}] is OTHER.

// The end of the run of one class (wanted 1), or of what is not of that class (wanted 0).
static size_t avl__run_end(const avl__unicode *u, const char *text, size_t at, size_t end, avl__class of, int wanted) {
    avl__class c;
    size_t length;
    while ((c = avl__class_at(u, text, at, end, &length)) != AVL__CLASS_END && (c == of) == wanted) at += length;
    return at;
}

// 's|'t|'re|'ve|'m|'ll|'d: the length of one, or 0. fold: in capitals as well (the long s, U+017F, folds to s too).
static size_t avl__contraction(const char *text, size_t size, int fold) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d", "\xC5\xBF"};
    for (int i = 0; i < (fold ? 8 : 7) && size > 0 && *text == '\''; i++) {
        const char *ending = endings[i];
        size_t at = 1;
        for (; *ending && at < size && (text[at] == *ending || (fold && text[at] == *ending - 32)); at++) ending++;
        if (!*ending) return at;
    }
    return 0;
}

// The end of the word that starts at text[at], at < end:
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   SmolLM   the same in the parts that are left when every \p{N} has been made a word
//   LLaMA-3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
//            \s*[\r\n]+|\s+(?!\S)|\s+
//   CLIP     's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+   White space is a word here; the caller drops it.
static size_t avl__word_end(const avl__vocab *v, const char *text, size_t at, size_t end) {
    const avl__unicode *u = v->unicode;
    int llama3 = v->kind == AVL__VOCAB_LLAMA3, i;
    size_t length, first = at + (text[at] == ' '), last = at, newline = 0;
    size_t n = avl__contraction(text + at, end - at, llama3);
    avl__class c = avl__class_at(u, text, at, end, &length);
    if (n) return at + n;
    if (v->kind == AVL__VOCAB_CLIP)
        return c == AVL__CLASS_NUMBER ? at + length : avl__run_end(u, text, at + length, end, c, 1);
    if (llama3 && c == AVL__CLASS_NUMBER) {
        for (i = 0; i < 3 && avl__class_at(u, text, at, end, &length) == AVL__CLASS_NUMBER; i++) at += length;
        return at;
    }
    if (llama3 && c != AVL__CLASS_LETTER && text[at] != '\r' && text[at] != '\n') {
        n = avl__run_end(u, text, at + length, end, AVL__CLASS_LETTER, 1);
        if (n > at + length) return n;
    }
    c = avl__class_at(u, text, first, end, &length);
    if (c == AVL__CLASS_OTHER || c == AVL__CLASS_LETTER || (c == AVL__CLASS_NUMBER && !llama3)) {
        n = avl__run_end(u, text, first + length, end, c, 1);
        while (llama3 && c == AVL__CLASS_OTHER && n < end && (text[n] == '\r' || text[n] == '\n')) n++;
        return n;
    }
    for (n = at; avl__class_at(u, text, n, end, &length) == AVL__CLASS_SPACE; n += length) {
        last = n;
        if (text[n] == '\r' || text[n] == '\n') newline = n + 1;
    }
    if (llama3 && newline) return newline;
    return n < end && last > at ? last : n;   // the last space before a word goes with the word
}

// A byte whose symbol the vocabulary lacks (SmolLM2 lacks some control characters) gives nothing, as in `tokenizers`,
// unless there is a token for the unknown (CLIP). LLaMA-3 takes a word that is a token as it stands.
static void avl__encode_word(avl__encoder *e, const char *word, size_t size) {
    const avl__vocab *v = e->v;
    const int clip = v->kind == AVL__VOCAB_CLIP, llama3 = v->kind == AVL__VOCAB_LLAMA3;
    e->failed |= !avl__grow(&e->spelling.data, &e->spelling.capacity, 2 * size + 8, 1) ||
                 !avl__grow(&e->symbols, &e->symbol_capacity, size, sizeof *e->symbols);
    for (size_t i = 0; i < size && !e->failed; i++) {
        char *spelling = e->spelling.data + e->spelling.size;
        const int ends_word = clip && i + 1 == size;
        size_t n = avl__spell_byte((uint8_t)word[i], ends_word, spelling);
        const int32_t id = ends_word ? avl__vocab_find(v, spelling, n) : v->byte_ids[(uint8_t)word[i]];
        if (id < 0 && (!clip || v->unk < 0)) continue;
        avl__put_symbol(e, n, id < 0 ? v->unk : id, id < 0);
        e->spelling.size += n;
    }
    if (e->failed) return;
    const int32_t id = e->n_symbols == size ? avl__vocab_find(v, e->spelling.data, e->spelling.size) : -1;
    if (id >= 0 && (e->known[id % 4096] == id + 1 || (llama3 && v->types[id] == AVL__TOKEN_NORMAL))) {
        e->n_symbols = 1;
        e->symbols->id = id;
        e->symbols->next = -1;
    }
    avl__merge(e);
    if (id >= 0 && e->symbols->next < 0) e->known[id % 4096] = id + 1;
}

static void avl__encode_words(avl__encoder *e, const char *text, size_t size) {
    const avl__vocab *v = e->v;
    avl__utf8_gate gate = {{0}, 0};
    int clip = v->kind == AVL__VOCAB_CLIP;
    size_t at, part = 0, end, length;   // part: how far the word rule may look
    e->text.size = 0;
    avl__utf8_gate_put(&gate, text, size, &e->text);
    avl__utf8_gate_flush(&gate, &e->text);
    e->failed |= e->text.failed || (clip && !avl__clean(v->unicode, &e->text));
    text = e->text.data;
    size = e->text.size;
    for (at = 0; at < size && !e->failed; at = end) {
        if (at == part) {
            part = v->kind == AVL__VOCAB_SMOLLM ? avl__run_end(v->unicode, text, at, size, AVL__CLASS_NUMBER, 0) : size;
            if (part == at) {   // a number stands alone
                avl__utf8_read(text + at, size - at, &length);
                part += length;
            }
        }
        end = avl__word_end(v, text, at, part);
        if (clip && avl__class_at(v->unicode, text, at, end, &length) == AVL__CLASS_SPACE) continue;
        avl__encode_word(e, text + at, end - at);
    }
}

// ---- text to tokens ------------------------------------------------------------------------------------------------

// Appends the tokens of any bytes to out; on failure out is as before. flags: ASTROVL_ADD_SPECIAL |
// ASTROVL_PARSE_SPECIAL. The text between special tokens is encoded part by part, each as if it stood alone: so in SPM
// each gets a space in front. (SPM finds its user-defined tokens in any text, byte-level BPE only with PARSE_SPECIAL.)
static astrovl_status avl__vocab_encode(const avl__vocab *v, const char *text, size_t size, int flags, avl__tokens *out,
                                        astrovl_error *err) {
    int types = AVL__MARKERS & ~(v->kind == AVL__VOCAB_SPM ? 1 << AVL__TOKEN_USER_DEFINED : 0);
    size_t before = out->size, at, end;
    avl__encoder e;
    if (size > INT32_MAX / 8)   // 3 bytes for one that is not UTF-8, spelled as 6: a spelling's size fits an int32_t
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "a text of %lld bytes is too long", (long long)size);
    memset(&e, 0, sizeof e);
    e.v = v;
    e.out = out;
    if ((flags & ASTROVL_ADD_SPECIAL) && v->add_bos && v->bos >= 0) avl__put_id(&e, v->bos);
    for (at = 0; at < size && !e.failed; ) {
        int32_t id = -1;
        for (end = flags & ASTROVL_PARSE_SPECIAL ? at : size; end < size; end++)
            if ((id = avl__find_marker(v, types, text + end, size - end)) >= 0) break;
        if (end > at && v->kind == AVL__VOCAB_SPM) avl__encode_spm(&e, text + at, end - at);
        else if (end > at) avl__encode_words(&e, text + at, end - at);
        if (id >= 0) avl__put_id(&e, id);
        at = end + (id >= 0 ? v->pieces[id].size : 0);
    }
    if ((flags & ASTROVL_ADD_SPECIAL) && v->add_eos && v->eos >= 0) avl__put_id(&e, v->eos);
    astrovl_free(e.symbols);
    astrovl_free(e.heap);
    astrovl_free(e.text.data);
    astrovl_free(e.spelling.data);
    if (!e.failed) return ASTROVL_OK;
    out->size = before;
    return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a text of %lld bytes", (long long)size);
}

// ---- tokens to text ------------------------------------------------------------------------------------------------

// The bytes a token stands for in running text: copies at most capacity of them, returns how many there are, never more
// than its piece has. Special tokens give none. A character may be spread over several tokens: avl__utf8_gate puts it
// together.
static int avl__vocab_token_bytes(const avl__vocab *v, int32_t id, char *text, int capacity) {
    astrovl_string piece = avl__vocab_piece(v, id);
    int type = piece.size ? v->types[id] : (int)AVL__TOKEN_CONTROL, n = 0, c;
    int spm = v->kind == AVL__VOCAB_SPM, literal = spm || type == AVL__TOKEN_USER_DEFINED;
    size_t length;
    if (type == AVL__TOKEN_CONTROL || type == AVL__TOKEN_UNKNOWN || piece.size > INT32_MAX) return 0;
    for (size_t i = 0; i < piece.size && !literal; i += length)
        literal = avl__char_to_byte(avl__utf8_read(piece.data + i, piece.size - i, &length)) < 0;
    for (size_t i = 0; i < piece.size; i += length) {
        length = 1;
        c = (uint8_t)piece.data[i];
        if (type == AVL__TOKEN_BYTE) {
            c = avl__byte_piece(piece);
            length = piece.size;
        } else if (!literal) {
            c = avl__char_to_byte(avl__utf8_read(piece.data + i, piece.size - i, &length));
        } else if (spm && piece.size - i >= 3 && memcmp(piece.data + i, AVL__SPACE_MARK, 3) == 0) {
            c = ' ';
            length = 3;
        }
        if (c >= 0 && n < capacity) text[n] = (char)c;
        n += c >= 0;
    }
    return n;
}

// Appends a token's text, of any length, to b.
static void avl__put_token(const avl__vocab *v, int32_t id, avl__bytes *b) {
    size_t size = avl__vocab_piece(v, id).size;
    b->failed |= !avl__grow(&b->data, &b->capacity, b->size + size + 1, 1);
    if (b->failed) return;
    b->size += (size_t)avl__vocab_token_bytes(v, id, b->data + b->size, (int)size);
    b->data[b->size] = 0;
}

// ====================================================================================================================
// [7] Images
// Files to 8-bit RGB, and the few whole-image operations of the models' preprocessing. The reference is Pillow, which
// prepared the models' training data: Image.open(f).convert("RGB") and Image.resize(..., BICUBIC).
// PNG: ISO/IEC 15948, with zlib and deflate of RFC 1950 and RFC 1951. JPEG: ITU-T T.81, JFIF and Adobe's conventions,
// with the integer arithmetic of libjpeg's default decoder. PNM: the netpbm manual pages.
// No decoder allocates more than a small multiple of what the file's bytes can expand to.
// ====================================================================================================================

// ---- whole images -------------------------------------------------------------------------------------------------

ASTROVL_API void astrovl_image_free(astrovl_image *image) {
    if (!image) return;
    astrovl_free(image->rgb);
    memset(image, 0, sizeof *image);
}

// Allocates width x height pixels, not initialized.
static astrovl_status avl__image_new(astrovl_image *image, int width, int height, astrovl_error *err) {
    const astrovl_image made = {width, height, (uint8_t *)avl__alloc_raw((uint64_t)width * (uint64_t)height, 3), 1};
    memset(image, 0, sizeof *image);
    if (!made.rgb)
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for an image of %d x %d pixels", width, height);
    *image = made;
    return ASTROVL_OK;
}

static unsigned char *avl__image_pixel(const astrovl_image *image, int x, int y) {
    return image->rgb + ((size_t)y * (size_t)image->width + (size_t)x) * 3;
}

// Checks the arguments of an operation that makes `out`, of width x height pixels, from `image`.
static astrovl_status avl__image_check(const astrovl_image *image, int width, int height, const astrovl_image *out,
                                       astrovl_error *err) {
    if (!image || !image->rgb || image->width < 1 || image->height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the image is empty: no pixels, or a width or height below 1");
    if (!out || out == image)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the result must be an image other than the input");
    if (width < 1 || height < 1)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a result of %d x %d pixels", width, height);
    return ASTROVL_OK;
}

// ---- what the decoders share --------------------------------------------------------------------------------------

// The file that a decoder reads, and what its caller wants.
typedef struct avl__image_file {
    const char    *format;          // "PNG", "JPEG" or "PNM", for messages
    const uint8_t *data;
    size_t         size, at;        // at: the byte, chunk or segment to read next
    uint64_t       max_pixels;
    int            orientation;     // 0: the file does not say
    astrovl_image *image;           // result
    astrovl_error *err;
} avl__image_file;

// "JPEG: at byte 57: " and the message
AVL__PRINTF(3, 4) static astrovl_status avl__image_fail(const avl__image_file *in, astrovl_status status,
                                                        const char *format, ...) {
    astrovl_error what;
    AVL__FORMAT_PARAMETERS(what.message, format);
    return avl__fail(in->err, status, "%s: at byte %lld: %s", in->format, (long long)in->at, what.message);
}

#define AVL__BROKEN(in, ...) avl__image_fail(in, ASTROVL_ERROR_FORMAT, __VA_ARGS__)

// Checks the size that a file claims, before anything is allocated for it.
static astrovl_status avl__image_check_size(const avl__image_file *in, uint32_t width, uint32_t height) {
    if (width && height && width <= INT_MAX && height <= INT_MAX && (uint64_t)width * height <= in->max_pixels)
        return ASTROVL_OK;
    return avl__image_fail(in, width && height ? ASTROVL_ERROR_LIMIT : ASTROVL_ERROR_FORMAT,
                           "%lld x %lld pixels are not between 1 and the limit of %llu", (long long)width,
                           (long long)height, (unsigned long long)in->max_pixels);
}

// The orientation in EXIF data (a small TIFF file): tag 0x0112 of its first directory; 1, upright, if absent or broken.
static int avl__exif_orientation(const uint8_t *tiff, size_t size) {
    if (size < 8 || (memcmp(tiff, "II*\0", 4) != 0 && memcmp(tiff, "MM\0*", 4) != 0)) return 1;
    uint16_t (*number)(const uint8_t *) = tiff[0] == 'M' ? avl__load_u16be : avl__load_u16;
    size_t at = tiff[0] == 'M' ? avl__load_u32be(tiff + 4) : avl__load_u32(tiff + 4);
    if (at > size - 2) return 1;
    const uint8_t *entry = tiff + at + 2;   // tag (2 bytes), type (2), count (4), value (4)
    for (int n = number(tiff + at); n > 0 && tiff + size - entry >= 12; n--, entry += 12)
        if (number(entry) == 0x0112)
            return number(entry + 2) == 3 && number(entry + 8) - 1u < 8 ? number(entry + 8) : 1;
    return 1;
}

// ---- bits and Huffman codes ---------------------------------------------------------------------------------------

// A canonical Huffman code: codes of one length are consecutive numbers and follow those of smaller length (RFC 1951
// section 3.2.2, T.81 annex C).
#define AVL__HUFFMAN_FAST 10   // codes up to this many bits take one look-up, the longer and rarer ones a search

typedef struct avl__huffman {
    uint16_t count[17];                     // input: number of codes of each length, 1 to 16
    uint16_t symbol[288];                   // input: symbols in the order of their codes
    uint16_t fast[1 << AVL__HUFFMAN_FAST];  // by the next bits: symbol * 32 + code length; 0: a longer code, or none
    uint32_t limit[17];                     // all codes of up to this length, padded to 16 bits, are below it
    uint32_t base[17];                      // index in symbol of a code of this length, minus the code (mod 2^32)
} avl__huffman;

// Fills the tables from count and symbol. Returns 0 if there are more codes than the lengths have room for.
static int avl__huffman_build(avl__huffman *h) {
    uint32_t code = 0, index = 0;
    memset(h->fast, 0, sizeof h->fast);
    for (int length = 1; length <= 16; length++, code *= 2) {
        uint32_t end = code + h->count[length];
        uint32_t n_fill = length <= AVL__HUFFMAN_FAST ? 1u << (AVL__HUFFMAN_FAST - length) : 0;   // any bits may follow
        if (end > 1u << length) return 0;
        h->base[length] = index - code;
        for (; code < end; code++, index++)
            for (uint32_t i = 0; i < n_fill; i++)
                h->fast[code * n_fill + i] = (uint16_t)(h->symbol[index] << 5 | length);
        h->limit[length] = code << (16 - length);
    }
    return 1;
}

// Bytes, read bit by bit from the highest bit of each to the lowest.
typedef struct avl__bits {
    const uint8_t *data;
    size_t         size, at;       // at: next byte to read
    uint64_t       bits;           // read and not yet used; the highest bit is next
    int            n;              // how many of them are valid; below 0: zeros beyond the data's end were used
} avl__bits;

// Afterwards at least 56 bits are valid, unless the data ends.
static void avl__bits_refill(avl__bits *b) {
    const uint8_t *p = b->data + b->at;
    if (b->size - b->at >= 8) {
        b->bits |= ((uint64_t)avl__load_u32be(p) << 32 | avl__load_u32be(p + 4)) >> b->n;
        b->at += (size_t)(63 - b->n) >> 3;
        b->n |= 56;
    } else
        for (; b->n <= 56 && b->at < b->size; b->n += 8) b->bits |= (uint64_t)b->data[b->at++] << (56 - b->n);
}

static unsigned avl__bits_take(avl__bits *b, int n) {   // the next 0 to 16 bits
    if (b->n < n) avl__bits_refill(b);
    unsigned value = (unsigned)(b->bits >> 32 >> (32 - n));
    b->bits <<= n;
    b->n -= n;
    return value;
}

// The next symbol, or -1 for a bit pattern that is no code.
static int avl__bits_symbol(avl__bits *b, const avl__huffman *h) {
    if (b->n < 16) avl__bits_refill(b);
    unsigned entry = h->fast[b->bits >> (64 - AVL__HUFFMAN_FAST)];
    if (!entry) {
        uint32_t next = (uint32_t)(b->bits >> 48);
        int length = AVL__HUFFMAN_FAST + 1;
        while (length <= 16 && next >= h->limit[length]) length++;
        if (length > 16) return -1;
        entry = (unsigned)h->symbol[h->base[length] + (next >> (16 - length))] << 5 | (unsigned)length;
    }
    b->bits <<= entry & 31;
    b->n -= (int)(entry & 31);
    return (int)(entry >> 5);
}

// ---- inflate: zlib data (RFC 1950) of known unpacked size ---------------------------------------------------------
// Deflate is a sequence of Huffman-coded literals and of (length, distance) copies from what was already written. It
// fills bytes from their lowest bit on, codes with their first bit first, numbers with their lowest bit first. The bits
// of every input byte are reversed beforehand, so that codes can be looked up; numbers are reversed back when read.
// Functions that can fail return NULL or the fault: the rest of a sentence that begins with "the compressed data".

typedef struct avl__inflate {
    avl__bits    bits;
    uint8_t     *out;              // [n_out + 266]: a copy may run over the end
    size_t       n_out, n;         // n: how much is written; above n_out if the data goes on when `out` is full
    avl__huffman literals, distances;
} avl__inflate;

static unsigned avl__reverse16(unsigned bits) {   // bit 0 becomes bit 15, ...
    bits = (bits & 0x5555) << 1 | (bits >> 1 & 0x5555);
    bits = (bits & 0x3333) << 2 | (bits >> 2 & 0x3333);
    bits = (bits & 0x0F0F) << 4 | (bits >> 4 & 0x0F0F);
    return (bits & 0x00FF) << 8 | (bits >> 8 & 0x00FF);
}

static unsigned avl__inflate_number(avl__inflate *s, int n) {   // of n <= 16 bits
    return avl__reverse16(avl__bits_take(&s->bits, n)) >> (16 - n);
}

// Lengths and distances are stored like floats: the symbol holds an exponent and the n bits below the leading 1, the
// remaining bits follow it (RFC 1951, 3.2.5).
static unsigned avl__inflate_float(avl__inflate *s, unsigned symbol, int n) {
    int exponent = (int)(symbol >> n) - 1;
    if (exponent <= 0) return symbol;
    return ((symbol & ((1u << n) - 1)) | 1u << n) << exponent | avl__inflate_number(s, exponent);
}

// Builds a code from the length of each symbol's code, 0: unused. Returns 0 if they describe no prefix code, or one
// that leaves bit patterns unused (allowed: a single code of one bit, or none at all, as few distances are written).
static int avl__inflate_code(avl__huffman *h, const uint8_t *lengths, int n_symbols) {
    int n = 0;
    memset(h->count, 0, sizeof h->count);
    for (int length = 1; length <= 16; length++)
        for (int i = 0; i < n_symbols; i++)
            if (lengths[i] == length) {
                h->symbol[n++] = (uint16_t)i;
                h->count[length]++;
            }
    return avl__huffman_build(h) && (h->limit[16] == 65536 || n == h->count[1]);
}

// A block's codes, fixed ones (kind 1: RFC 1951, 3.2.6) or its own (kind 2: 3.2.7), whose lengths are themselves
// Huffman-coded, with repeats. Then literals and copies until the block ends, or until `out` is full.
static const char *avl__inflate_block(avl__inflate *s, unsigned kind) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[288 + 32];
    int n_literals = 288, n_distances = 32;
    for (int i = 0; i < 320; i++) lengths[i] = (uint8_t)(i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : i < 288 ? 8 : 5);
    if (kind == 2) {
        memset(lengths, 0, sizeof lengths);
        n_literals = 257 + (int)avl__inflate_number(s, 5);
        n_distances = 1 + (int)avl__inflate_number(s, 5);
        int n_lengths = 4 + (int)avl__inflate_number(s, 4);
        if (n_literals > 286 || n_distances > 30) return "names too many codes";
        for (int i = 0; i < n_lengths; i++) lengths[order[i]] = (uint8_t)avl__inflate_number(s, 3);
        if (!avl__inflate_code(&s->literals, lengths, 19)) return "has a broken code of code lengths";
        for (int i = 0; i < n_literals + n_distances;) {
            int symbol = avl__bits_symbol(&s->bits, &s->literals);
            if (symbol < 0 || (symbol == 16 && i == 0)) return "has a code length that means nothing";
            int length = symbol < 16 ? symbol : symbol == 16 ? lengths[i - 1] : 0;
            int repeat = symbol < 16 ? 1 : symbol < 18 ? 3 : 11;   // and 2, 3 or 7 bits for 16, 17 and 18
            if (symbol >= 16) repeat += (int)avl__inflate_number(s, symbol < 18 ? symbol - 14 : 7);
            if (s->bits.n < 0) return "ends too early";
            if (repeat > n_literals + n_distances - i) return "repeats a code length too often";
            while (repeat--) lengths[i++] = (uint8_t)length;
        }
        if (lengths[256] == 0) return "has a block without an end";
    }
    if (!avl__inflate_code(&s->literals, lengths, n_literals) ||
        !avl__inflate_code(&s->distances, lengths + n_literals, n_distances))
        return "has a broken Huffman code";
    while (s->n <= s->n_out) {
        int symbol = avl__bits_symbol(&s->bits, &s->literals);
        if (s->bits.n < 0) return "ends too early";
        if (symbol < 0 || symbol > 285) return "has an unknown code";
        if (symbol == 256) return NULL;
        if (symbol < 256) {
            s->out[s->n++] = (uint8_t)symbol;
            continue;
        }
        size_t size = symbol == 285 ? 258 : 3 + avl__inflate_float(s, (unsigned)symbol - 257, 2);
        symbol = avl__bits_symbol(&s->bits, &s->distances);
        if (symbol < 0 || symbol > 29) return "has an unknown distance code";
        size_t distance = 1 + avl__inflate_float(s, (unsigned)symbol, 1);
        if (s->bits.n < 0) return "ends too early";
        if (distance > s->n) return "refers to bytes before its start";
        uint8_t *to = s->out + s->n, *end = to + size;
        s->n += size;
        if (distance >= 8)   // writes up to 7 bytes too many, which are overwritten later
            for (; to < end; to += 8) memcpy(to, to - distance, 8);
        else   // the two overlap, which repeats a pattern
            for (; to < end; to++) *to = *(to - distance);
    }
    return NULL;
}

// Unpacks exactly s->n_out bytes. Fewer in the data is an error; if there are more, the rest is ignored and the check
// sum, which covers it, is not compared (as Pillow does).
static const char *avl__inflate_run(avl__inflate *s) {
    unsigned method = avl__inflate_number(s, 8), flags = avl__inflate_number(s, 8), is_last = 0;
    if ((method & 15) != 8 || method >> 4 > 7 || (flags & 32) || (method << 8 | flags) % 31 != 0)
        return "does not start as zlib data";
    while (!is_last && s->n <= s->n_out) {
        is_last = avl__inflate_number(s, 1);
        unsigned kind = avl__inflate_number(s, 2);
        if (s->bits.n < 0) return "ends too early";
        if (kind == 3) return "has a block of unknown kind";
        const char *problem = kind > 0 ? avl__inflate_block(s, kind) : NULL;
        if (problem) return problem;
        if (kind > 0) continue;
        avl__bits_take(&s->bits, s->bits.n & 7);   // stored bytes, from the next whole byte on
        int64_t size = avl__inflate_number(s, 16);
        if ((size ^ 0xFFFF) != avl__inflate_number(s, 16)) return "has a broken stored block";
        if (size > (int64_t)(s->bits.size - s->bits.at) + s->bits.n / 8) return "ends too early";
        for (; size > 0 && s->n <= s->n_out; size--) s->out[s->n++] = (uint8_t)avl__inflate_number(s, 8);
    }
    if (s->n < s->n_out) return "holds fewer bytes than the image has";
    if (s->n > s->n_out) return NULL;
    uint64_t a = 1, b = 0, sum = 0;
    for (size_t i = 0; i < s->n; i++) {   // Adler-32: a = 1 + sum of bytes, b = sum of the a's, both modulo 65521
        a += s->out[i];
        b += a;
        if (i % 65536 == 0) b %= 65521;   // before it overflows
    }
    avl__bits_take(&s->bits, s->bits.n & 7);
    for (int i = 0; i < 4; i++) sum = sum << 8 | avl__inflate_number(s, 8);
    if (s->bits.n < 0) return "ends before its check sum";
    return sum == (b % 65521 << 16 | a % 65521) ? NULL : "does not match its check sum (Adler-32)";
}

// ---- PNG ----------------------------------------------------------------------------------------------------------
// As Pillow converts to RGB: alpha and tRNS are dropped without blending; 16-bit color keeps the high byte; gray of 1,
// 2 and 4 bits is scaled to 0..255; a palette index without a color is black. Gamma and color profiles are not applied.
// One difference: 16-bit gray (without alpha) is scaled to 0..255. Pillow clips it at 255, so that nearly all is white.

typedef struct avl__png {
    avl__image_file *in;                // in->at: the chunk being read
    uint32_t         width, height;
    int              depth, color, interlaced, n_channels, has_palette;
    uint8_t          colors[256][3];    // RGB of every sample value, for palettes and for gray of up to 8 bits
    avl__bytes       idat;              // the contents of the IDAT chunks, joined
    avl__inflate     inflate;
    uint8_t         *rows;              // a row of zeros, then the unpacked rows of all passes
} avl__png;

static astrovl_status avl__png_header(avl__png *png, const uint8_t *p, size_t size) {
    static const uint8_t n_channels[7] = {1, 0, 3, 1, 2, 0, 4};        // by color type
    static const uint32_t depths[7] = {0x10116, 0, 0x10100, 0x116, 0x10100, 0, 0x10100};   // bit d: depth d is allowed
    if (size != 13 || png->width) return AVL__BROKEN(png->in, "IHDR must have 13 bytes and come once");
    png->width = avl__load_u32be(p);
    png->height = avl__load_u32be(p + 4);
    png->depth = p[8];
    png->color = p[9];
    png->interlaced = p[12];
    if (png->color > 6 || png->depth > 16 || !(depths[png->color] >> png->depth & 1))
        return AVL__BROKEN(png->in, "IHDR: color type %d with %d bits does not exist", png->color, png->depth);
    if (p[10] != 0 || p[11] != 0 || p[12] > 1)
        return AVL__BROKEN(png->in, "IHDR: unknown compression, filter or interlace method");
    png->n_channels = n_channels[png->color];
    if (png->color == 0 && png->depth <= 8)
        for (int i = 0; i < 1 << png->depth; i++) memset(png->colors[i], i * 255 / ((1 << png->depth) - 1), 3);
    return avl__image_check_size(png->in, png->width, png->height);
}

// Walks the chunks (length, name, data, CRC). After the IDAT chunks a broken or cut-off file is accepted: no pixel is
// missing. In them a wrong CRC is noted, as their data has a check sum of its own.
static astrovl_status avl__png_chunks(avl__png *png) {
    avl__image_file *in = png->in;
    astrovl_status status = ASTROVL_OK;
    int is_past = 0;   // the IDAT chunks have ended
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++) table[i] = table[i] & 1 ? 0xEDB88320u ^ table[i] >> 1 : table[i] >> 1;
    }
    for (in->at = 8; !status;) {
        const uint8_t *p = in->data + in->at;
        size_t left = in->size - in->at, size = left < 8 ? 0 : avl__load_u32be(p);
        int is_cut = left < 12 || size > left - 12;
        char name[5] = "";
        if (left >= 8) memcpy(name, p + 4, 4);
        const int is_idat = strcmp(name, "IDAT") == 0;
        is_past |= png->idat.data && !is_idat;
        uint32_t crc = 0xFFFFFFFFu;
        for (size_t i = 0; i < size + 4 && !is_cut; i++) crc = table[(crc ^ p[4 + i]) & 255] ^ crc >> 8;
        int is_bad = is_cut || ~crc != avl__load_u32be(p + 8 + size);
        if (is_bad && is_past) return ASTROVL_OK;
        if (is_bad && (is_cut || !is_idat))
            return AVL__BROKEN(in, "chunk \"%s\": %s", name, is_cut ? "the file ends inside it" : "its CRC is wrong");
        if (is_bad) avl__image_fail(in, ASTROVL_OK, "a wrong CRC in the pixels' data (IDAT), which is taken as it is");
        p += 8;
        if (png->width == 0 && strcmp(name, "IHDR") != 0) return AVL__BROKEN(in, "IHDR must come first");
        if (strcmp(name, "IHDR") == 0) status = avl__png_header(png, p, size);
        else if (strcmp(name, "IEND") == 0) return ASTROVL_OK;
        else if (strcmp(name, "eXIf") == 0) in->orientation = avl__exif_orientation(p, size);
        else if (strcmp(name, "PLTE") == 0) {
            if (size == 0 || size % 3 != 0 || size > 768) return AVL__BROKEN(in, "PLTE: not 1 to 256 RGB colors");
            png->has_palette = png->color == 3;   // for true color it is only a suggestion
            if (png->has_palette) memcpy(png->colors, p, size);
        } else if (is_idat) {
            if (is_past) return AVL__BROKEN(in, "IDAT chunks must follow each other");
            avl__bytes_put(&png->idat, (const char *)p, size);
            if (png->idat.failed) return avl__image_fail(in, ASTROVL_ERROR_MEMORY, "out of memory");
        } else if (!(name[0] & 32))
            return avl__image_fail(in, ASTROVL_ERROR_UNSUPPORTED, "\"%s\": a critical chunk of unknown kind", name);
        in->at += size + 12;
    }
    return status;
}

// The neighbor whose value is nearest to left + up - up_left (ISO 15948, 9.4).
static int avl__paeth(int left, int up, int up_left) {
    int to_left = abs(up - up_left), to_up = abs(left - up_left), to_up_left = abs(left + up - 2 * up_left);
    up = to_up <= to_up_left ? up : up_left;
    return to_left <= to_up && to_left <= to_up_left ? left : up;
}

// Unpacks the IDAT data, undoes the filters, converts to RGB. Deflate expands 1032 : 1 at most: 258 bytes from 2 bits.
static astrovl_status avl__png_pixels(avl__png *png) {
    // A pass {x, y, dx, dy}: every dx-th pixel of every dy-th row from (x, y) on, stored as an image of its own. An
    // interlaced image has passes 0 to 6 (Adam7), any other only pass 7.
    static const uint8_t passes[8][4] = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4},
                                         {1, 0, 2, 2}, {0, 1, 1, 2}, {0, 0, 1, 1}};
    const avl__image_file *in = png->in;
    avl__inflate *inflate = &png->inflate;
    int depth = png->depth, n_channels = png->n_channels;
    int first = png->interlaced ? 0 : 7, end = png->interlaced ? 7 : 8;
    if (png->color == 3 && !png->has_palette) return AVL__BROKEN(in, "color type 3, but no palette (PLTE)");
    uint32_t width[8], height[8];
    uint64_t row_bytes[8], size = 0, longest = 1 + ((uint64_t)png->width * (uint64_t)(depth * n_channels) + 7) / 8;
    for (int i = first; i < end; i++) {
        const uint8_t *pass = passes[i];
        width[i] = (png->width + pass[2] - 1 - pass[0]) / pass[2];
        height[i] = width[i] ? (png->height + pass[3] - 1 - pass[1]) / pass[3] : 0;   // no pixels: no rows
        row_bytes[i] = 1 + ((uint64_t)width[i] * (uint64_t)(depth * n_channels) + 7) / 8;   // 1: the row's filter
        if (height[i] > ((uint64_t)png->idat.size * 1032 - size) / row_bytes[i])
            return AVL__BROKEN(in, "%lld bytes of IDAT data cannot hold %lld x %lld pixels", (long long)png->idat.size,
                               (long long)png->width, (long long)png->height);
        size += height[i] * row_bytes[i];
    }
    png->rows = (uint8_t *)avl__alloc_raw(longest + size + 266, 1);
    if (!png->rows) return avl__image_fail(in, ASTROVL_ERROR_MEMORY, "out of memory");
    memset(png->rows, 0, (size_t)longest);
    uint8_t *row = png->rows + longest, *packed = (uint8_t *)png->idat.data;
    for (size_t i = 0; i < png->idat.size; i++) packed[i] = (uint8_t)(avl__reverse16(packed[i]) >> 8);
    inflate->bits.data = packed;
    inflate->bits.size = png->idat.size;
    inflate->out = row;
    inflate->n_out = (size_t)size;
    const char *problem = avl__inflate_run(inflate);
    if (problem)
        return AVL__BROKEN(in, "the compressed data %s, about byte %lld of %lld in the IDAT chunks", problem,
                           (long long)inflate->bits.at, (long long)png->idat.size);
    astrovl_status status = avl__image_new(in->image, (int)png->width, (int)png->height, in->err);
    int bytes = depth == 16 ? 2 : 1, pixel = bytes * n_channels, mask = (1 << depth) - 1;
    int next = n_channels >= 3 ? bytes : 0;                 // from a channel to the next; 0: gray, three times
    size_t before = (size_t)(depth * n_channels + 7) / 8;   // from a byte of the pixel on the left to this one's
    for (int i = first; i < end && !status; i++) {
        const uint8_t *pass = passes[i], *up = png->rows;
        for (uint32_t y = 0; y < height[i]; y++) {
            int filter = *row++;
            if (filter > 4)
                return AVL__BROKEN(in, "row %lld has filter %d, which does not exist", (long long)y, filter);
            for (size_t k = 0; k < row_bytes[i] - 1 && filter; k++) {   // a byte is stored minus its prediction
                int left = k < before ? 0 : row[k - before], up_left = k < before ? 0 : up[k - before];
                row[k] = (uint8_t)(row[k] + (filter == 1 ? left : filter == 2 ? up[k] : filter == 3 ?
                                             (left + up[k]) / 2 : avl__paeth(left, up[k], up_left)));
            }
            uint8_t *rgb = avl__image_pixel(in->image, pass[0], (int)(pass[1] + y * pass[3]));
            for (size_t x = 0; x < width[i]; x++, rgb += 3 * pass[2]) {
                const uint8_t *p = row + x * (size_t)pixel;
                size_t bit = x * (size_t)depth;
                if (n_channels == 1 && depth <= 8)
                    memcpy(rgb, png->colors[row[bit / 8] >> (8 - depth - (int)(bit % 8)) & mask], 3);
                else if (n_channels == 1) memset(rgb, (avl__load_u16be(p) + 128) / 257, 3);   // 16-bit gray
                else {
                    rgb[0] = p[0];
                    rgb[1] = p[next];
                    rgb[2] = p[2 * next];
                }
            }
            up = row;
            row += row_bytes[i] - 1;
        }
    }
    return status;
}

static astrovl_status avl__png_decode(avl__image_file *in) {
    avl__png png;
    memset(&png, 0, sizeof png);
    png.in = in;
    astrovl_status status = avl__png_chunks(&png);
    if (!status) status = avl__png_pixels(&png);
    astrovl_free(png.idat.data);
    astrovl_free(png.rows);
    return status;
}

// ---- PNM ----------------------------------------------------------------------------------------------------------
// P5 (gray) and P6 (RGB), binary, samples of 8 bits, or 16 if maxval is above 255, scaled to 0..255 (ties to even): as
// by Pillow, except that it clips 16-bit gray.

static int avl__is_space(int c) { return c == ' ' || (c >= 9 && c <= 13); }

static astrovl_status avl__pnm_decode(avl__image_file *in) {
    const uint8_t *p = in->data;
    size_t n_channels = p[1] == '6' ? 3 : 1;
    uint32_t header[3] = {0, 0, 0};   // width, height, maxval
    in->at = 2;
    for (int i = 0; i < 3; i++) {
        while (in->at < in->size && (avl__is_space(p[in->at]) || p[in->at] == '#'))
            if (p[in->at++] == '#')   // a comment, to the end of its line
                while (in->at < in->size && p[in->at] != '\n' && p[in->at] != '\r') in->at++;
        for (; in->at < in->size && p[in->at] >= '0' && p[in->at] <= '9' && header[i] < 100000000; in->at++)
            header[i] = header[i] * 10 + (uint32_t)(p[in->at] - '0');
        if (in->at == in->size || (!avl__is_space(p[in->at]) && (p[in->at] != '#' || i == 2)))
            return AVL__BROKEN(in, "not a number of the header (width, height, maxval)");
    }
    in->at++;
    const uint32_t maxval = header[2];
    if (maxval < 1 || maxval > 65535) return AVL__BROKEN(in, "maxval %d is not 1 to 65535", (int)maxval);
    astrovl_status status = avl__image_check_size(in, header[0], header[1]);
    if (status) return status;
    size_t bytes = maxval > 255 ? 2 : 1, n = (in->size - in->at) / (n_channels * bytes);
    if ((uint64_t)header[0] * header[1] > n)
        return AVL__BROKEN(in, "the rest of the file cannot hold %d x %d pixels", (int)header[0], (int)header[1]);
    status = avl__image_new(in->image, (int)header[0], (int)header[1], in->err);
    for (n = 0; n < 3 * (size_t)header[0] * header[1] && !status; n++) {
        const uint8_t *sample = p + in->at + (n_channels == 3 ? n : n / 3) * bytes;
        uint32_t twice = (bytes == 2 ? avl__load_u16be(sample) : *sample) * 510u + maxval, value = twice / (2 * maxval);
        if (twice % (2 * maxval) == 0) value -= value & 1;
        in->image->rgb[n] = (uint8_t)(value < 255 ? value : 255);
    }
    return status;
}

// ---- JPEG: the coded data -----------------------------------------------------------------------------------------
// Huffman-coded baseline, extended and progressive files of 8 bits, in the integer arithmetic of libjpeg's default
// decoder: inverse DCT "islow", triangle ("fancy") upsampling, YCbCr to RGB in 16-bit fixed point. Damaged or missing
// scan data is an error (libjpeg fills in gray); junk between segments is skipped.

typedef struct avl__jpeg_component {
    int      id, h, v;                    // h, v: sampling factors, blocks of an MCU across and down
    int      table;                       // number of its quantization table
    uint16_t quant[64];                   // that table as of the component's first scan; quant[0] is 0 until then
    int      width, height;               // samples
    int      stride, n_blocks;            // blocks that are stored, of whole MCUs: in a row, in all
    uint8_t *samples;                     // [8 * n_blocks / stride][8 * stride]
    int16_t *coefficients;                // progressive: [n_blocks / stride][stride][64], natural order
    const avl__huffman *dc, *ac;          // of the current scan
    int      predicted;                   // DC value of the block before
} avl__jpeg_component;

typedef struct avl__jpeg {
    avl__image_file *in;
    uint8_t       *packed;                // [in->size]: what `bits` reads
    avl__bits      bits;                  // a scan's data up to the next marker
    uint8_t       *rows;                  // scratch of avl__jpeg_pixels, [4][width + 8]; a row has up to width + 3
    int            width, height, n_components, is_progressive, max_h, max_v, mcus_x, mcus_y;
    avl__jpeg_component component[4];
    int            first, last, high, low;   // coefficients and bit positions of the current scan (Ss, Se, Ah, Al)
    int            end_of_band;           // blocks to come without further coefficients (EOBRUN)
    int            restart_interval, n_scans, has_jfif, adobe;   // adobe: 1 + its transform; 0: none
    uint16_t       table[4][64];          // quantization tables, natural order; table[i][0] is 0 if not defined
    avl__huffman   code[2][4];            // DC, AC
} avl__jpeg;

static const uint8_t avl__zigzag[64] = {   // natural index of the k-th coefficient in the file
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63};

// A signed number of n bits (T.81, F.2.2.1): those that begin with 0 stand for the negative ones.
static int avl__jpeg_signed(avl__jpeg *j, int n) {
    int value = (int)avl__bits_take(&j->bits, n);
    return n == 0 || value >> (n - 1) ? value : value - (1 << n) + 1;
}

// A scan holds, for each block, the coefficients first to last in zigzag order, without their lowest `low` bits. A
// sequential file has all 64 and all bits of a component in one scan; a progressive one sends bands, and later scans
// that add one bit each (high = low + 1).
// Reads a block's part of a band's first scan (T.81, F.2.2 and G.1.2). Returns 0 if the data makes no sense.
static int avl__jpeg_read_first(avl__jpeg *j, avl__jpeg_component *c, int16_t *block) {
    int k = j->first;
    if (k == 0) {   // DC: the difference from the block before
        int size = avl__bits_symbol(&j->bits, c->dc);
        if (size < 0 || size > 15) return 0;
        c->predicted = (int16_t)(uint16_t)(c->predicted + avl__jpeg_signed(j, size));
        block[0] = (int16_t)(uint16_t)((unsigned)c->predicted << j->low);
        k = 1;
    }
    for (; k <= j->last && j->end_of_band == 0; k++) {   // AC: `run` zeros, then a number of `size` bits
        int symbol = avl__bits_symbol(&j->bits, c->ac), size = symbol & 15, run = symbol >> 4;
        if (symbol < 0) return 0;
        if (size == 0 && run < 15) {   // the band ends here, and so it does in the next 2^run - 1 + (`run` bits) blocks
            j->end_of_band = (1 << run) + (int)avl__bits_take(&j->bits, run);
            break;
        }
        k += run;
        if (size == 0) continue;   // sixteen zeros
        if (k > j->last) return 0;
        block[avl__zigzag[k]] = (int16_t)(uint16_t)((unsigned)avl__jpeg_signed(j, size) << j->low);
    }
    if (j->end_of_band > 0) j->end_of_band--;
    return 1;
}

// Reads a block's part of a later scan. Coefficients that are known to be non-zero get one more bit; among them, in AC
// bands, stand the new ones, which are +1 or -1 at this bit (T.81, G.1.2.3). Returns 0 if the data makes no sense.
static int avl__jpeg_read_refinement(avl__jpeg *j, avl__jpeg_component *c, int16_t *block) {
    int k = j->first, bit = 1 << j->low;
    if (k == 0) {
        if (avl__bits_take(&j->bits, 1)) block[0] = (int16_t)(block[0] | bit);
        return 1;
    }
    while (k <= j->last) {
        int n_zeros = 64, value = 0;   // zeros to pass before `value`; 64: no new coefficient in this block
        if (j->end_of_band == 0) {
            int symbol = avl__bits_symbol(&j->bits, c->ac);
            if (symbol < 0 || (symbol & 15) > 1) return 0;
            n_zeros = symbol >> 4;
            if (symbol & 15) value = avl__bits_take(&j->bits, 1) ? bit : -bit;
            else if (n_zeros < 15) {
                j->end_of_band = (1 << n_zeros) + (int)avl__bits_take(&j->bits, n_zeros);
                n_zeros = 64;
            }
        }
        for (; k <= j->last && n_zeros >= 0; k++) {
            int16_t *known = &block[avl__zigzag[k]];
            if (*known == 0) {
                if (n_zeros-- == 0) *known = (int16_t)value;
            } else if (avl__bits_take(&j->bits, 1) && !(abs(*known) & bit))   // moves away from zero
                *known = (int16_t)(*known < 0 ? *known - bit : *known + bit);
        }
    }
    if (j->end_of_band > 0) j->end_of_band--;
    return 1;
}

// ---- JPEG: inverse DCT --------------------------------------------------------------------------------------------
// Loeffler, Ligtenberg and Moschytz (ICASSP 1989): 11 multiplications for 8 points. Columns, then rows; constants
// have 13 fractional bits, the values in between 2. Unsigned, so that hostile coefficients wrap around.

// out[i], i = 0..7: the inverse DCT of in[0], in[8], ... in[56], times 2^13 sqrt(8), rounded to units of 2^n_bits
static void avl__idct_8(const int32_t *in, int n_bits, int32_t out[8]) {
    uint32_t x0 = (uint32_t)in[0], x1 = (uint32_t)in[8], x2 = (uint32_t)in[16], x3 = (uint32_t)in[24];
    uint32_t x4 = (uint32_t)in[32], x5 = (uint32_t)in[40], x6 = (uint32_t)in[48], x7 = (uint32_t)in[56];
    // even half: a rotation by 3 pi / 8 of (x2, x6), and butterflies
    uint32_t r = (x2 + x6) * 4433u;                  // 0.541196100
    uint32_t s2 = r - x6 * 15137u;                   // 1.847759065
    uint32_t s3 = r + x2 * 6270u;                    // 0.765366865
    uint32_t half = 1u << (n_bits - 1), s0 = ((x0 + x4) << 13) + half, s1 = ((x0 - x4) << 13) + half;
    if (!(x1 | x2 | x3 | x4 | x5 | x6 | x7)) {   // common, and the general sums would give the same
        for (int i = 0; i < 8; i++) out[i] = (int32_t)s0 >> n_bits;
        return;
    }
    // odd half
    uint32_t t = (x7 + x3 + x5 + x1) * 9633u;        // 1.175875602
    uint32_t a = t - (x7 + x3) * 16069u;             // 1.961570560
    uint32_t b = t - (x5 + x1) * 3196u;              // 0.390180644
    uint32_t c = (x7 + x1) * 7373u;                  // 0.899976223
    uint32_t d = (x5 + x3) * 20995u;                 // 2.562915447
    uint32_t e0 = s0 + s3, e3 = s0 - s3, e1 = s1 + s2, e2 = s1 - s2;
    uint32_t o0 = x1 * 12299u + b - c;               // 1.501321110
    uint32_t o1 = x3 * 25172u + a - d;               // 3.072711026
    uint32_t o2 = x5 * 16819u + b - d;               // 2.053119869
    uint32_t o3 = x7 * 2446u + a - c;                // 0.298631336
    out[0] = (int32_t)(e0 + o0) >> n_bits;
    out[7] = (int32_t)(e0 - o0) >> n_bits;
    out[1] = (int32_t)(e1 + o1) >> n_bits;
    out[6] = (int32_t)(e1 - o1) >> n_bits;
    out[2] = (int32_t)(e2 + o2) >> n_bits;
    out[5] = (int32_t)(e2 - o2) >> n_bits;
    out[3] = (int32_t)(e3 + o3) >> n_bits;
    out[4] = (int32_t)(e3 - o3) >> n_bits;
}

static uint8_t avl__clip8(int32_t x) { return (uint8_t)((uint32_t)x <= 255 ? x : x < 0 ? 0 : 255); }

// Block (x, y) of a component: coefficients, [8][8] in natural order, to samples.
static void avl__jpeg_transform(avl__jpeg_component *c, int x, int y, const int16_t block[64]) {
    uint8_t *out = c->samples + ((size_t)y * (size_t)c->stride * 8 + (size_t)x) * 8;
    int32_t values[64], columns[64], row[8];   // columns: after the first pass, transposed
    for (int i = 0; i < 64; i++) values[i] = block[i] * c->quant[i];
    for (int k = 0; k < 8; k++) avl__idct_8(values + k, 13 - 2, columns + 8 * k);
    for (int k = 0; k < 8; k++, out += (size_t)c->stride * 8) {
        avl__idct_8(columns + k, 13 + 2 + 3, row);
        for (int i = 0; i < 8; i++) out[i] = avl__clip8(row[i] + 128);
    }
}

// ---- JPEG: segments and scans -------------------------------------------------------------------------------------
// p, size: a segment's contents, after its marker and length

// Quantization tables (DQT, marker DB) or Huffman codes (DHT, C4).
static astrovl_status avl__jpeg_tables(avl__jpeg *j, int marker, const uint8_t *p, size_t size) {
    for (size_t n; size > 0; p += n, size -= n) {
        int kind = p[0] >> 4, number = p[0] & 15;   // kind: 1 for values of 16 bits (DQT), for AC codes (DHT)
        n = marker == 0xC4 ? 17 : kind ? 129 : 65;
        for (int i = 1; i <= 16 && marker == 0xC4 && size >= 17; i++) n += p[i];
        if (kind > 1 || number > 3 || size < n || n > 17 + 256)
            return AVL__BROKEN(j->in, "a broken table (%s)", marker == 0xC4 ? "DHT" : "DQT");
        avl__huffman *h = &j->code[kind][number];
        if (marker == 0xC4) {
            for (int i = 1; i <= 16; i++) h->count[i] = p[i];
            for (size_t i = 17; i < n; i++) h->symbol[i - 17] = p[i];
            if (!avl__huffman_build(h)) return AVL__BROKEN(j->in, "a Huffman table (DHT) with too many codes");
        } else
            for (int i = 0; i < 64; i++)
                j->table[number][avl__zigzag[i]] = kind ? avl__load_u16be(p + 1 + 2 * i) : p[1 + i];
    }
    return ASTROVL_OK;
}

// SOF: the image's size and components. Allocates their memory, if the file is large enough for one bit a block.
static astrovl_status avl__jpeg_frame(avl__jpeg *j, int marker, const uint8_t *p, size_t size) {
    avl__image_file *in = j->in;
    if (marker > 0xC2)
        return avl__image_fail(in, ASTROVL_ERROR_UNSUPPORTED, "SOF%d: arithmetic, lossless and hierarchical coding are "
                               "not supported", marker - 0xC0);
    if (j->n_components || size < 6 || size != 6 + 3 * (size_t)p[5])
        return AVL__BROKEN(in, "a second frame (SOF), or one of wrong length");
    if (p[0] != 8 || (p[5] != 1 && p[5] != 3 && p[5] != 4))
        return avl__image_fail(in, ASTROVL_ERROR_UNSUPPORTED, "%d components of %d bits are not supported", p[5], p[0]);
    j->height = avl__load_u16be(p + 1);
    j->width = avl__load_u16be(p + 3);
    if (j->height == 0 && j->width > 0)
        return avl__image_fail(in, ASTROVL_ERROR_UNSUPPORTED, "a height that a DNL marker gives is not supported");
    astrovl_status status = avl__image_check_size(in, (uint32_t)j->width, (uint32_t)j->height);
    if (status) return status;
    j->is_progressive = marker == 0xC2;
    j->n_components = p[5];
    avl__jpeg_component *c, *end = j->component + j->n_components;
    for (c = j->component, p += 6; c < end; c++, p += 3) {
        c->id = p[0];
        c->h = p[1] >> 4;
        c->v = p[1] & 15;
        c->table = p[2];
        if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4 || c->table > 3)
            return AVL__BROKEN(in, "a frame (SOF) with a broken component");
        if (c->h > j->max_h) j->max_h = c->h;
        if (c->v > j->max_v) j->max_v = c->v;
    }
    j->packed = (uint8_t *)avl__alloc_raw(in->size, 1);
    j->rows = (uint8_t *)avl__alloc_raw(4, (size_t)j->width + 8);
    j->mcus_x = (j->width - 1) / (8 * j->max_h) + 1;
    j->mcus_y = (j->height - 1) / (8 * j->max_v) + 1;
    uint64_t n_coded = 0;   // blocks of all components
    for (c = j->component; c < end; c++) {
        if (j->max_h % c->h || j->max_v % c->v)
            return avl__image_fail(in, ASTROVL_ERROR_UNSUPPORTED, "sampling factors are not whole multiples");
        c->width = (j->width * c->h + j->max_h - 1) / j->max_h;
        c->height = (j->height * c->v + j->max_v - 1) / j->max_v;
        c->stride = j->mcus_x * c->h;
        c->n_blocks = c->stride * j->mcus_y * c->v;
        n_coded += (uint64_t)((c->width + 7) / 8 * ((c->height + 7) / 8));
        if (n_coded > 8 * (uint64_t)in->size)
            return AVL__BROKEN(in, "%lld bytes cannot hold %d x %d pixels", (long long)in->size, j->width, j->height);
        c->samples = (uint8_t *)avl__alloc_raw((uint64_t)c->n_blocks, 64);
        if (j->is_progressive) c->coefficients = (int16_t *)avl__alloc((uint64_t)c->n_blocks, 64 * sizeof(int16_t));
        if (!j->packed || !j->rows || !c->samples || (j->is_progressive && !c->coefficients))
            return avl__image_fail(in, ASTROVL_ERROR_MEMORY, "out of memory");
    }
    return ASTROVL_OK;
}

// Moves to the next marker, FF and a byte that is neither 00 nor FF, and returns that byte; 0: there is none.
static int avl__jpeg_find_marker(avl__image_file *in) {
    for (; in->size - in->at >= 2; in->at++) {
        int byte = in->data[in->at + 1];
        if (in->data[in->at] == 0xFF && byte != 0 && byte != 0xFF) return byte;
    }
    in->at = in->size;
    return 0;
}

// SOS: which components and coefficients come next, with which codes. Then the scan's data: MCU after MCU, each of
// h x v blocks of each component, or of a single block if the scan has a single component.
static astrovl_status avl__jpeg_scan(avl__jpeg *j, const uint8_t *p, size_t size) {
    // The DHT segment of T.81's annex K.3: the codes of files that lack some, as frames of Motion-JPEG do
    static const char hex[] =
        "0000010501010101010100000000000000000102030405060708090A0B0100030101010101010101010000000000000102030405"
        "060708090A0B100002010303020403050504040000017D01020300041105122131410613516107227114328191A1082342B1C115"
        "52D1F02433627282090A161718191A25262728292A3435363738393A434445464748494A535455565758595A636465666768696A"
        "737475767778797A838485868788898A92939495969798999AA2A3A4A5A6A7A8A9AAB2B3B4B5B6B7B8B9BAC2C3C4C5C6C7C8C9CA"
        "D2D3D4D5D6D7D8D9DAE1E2E3E4E5E6E7E8E9EAF1F2F3F4F5F6F7F8F9FA1100020102040403040705040400010277000102031104"
        "052131061241510761711322328108144291A1B1C109233352F0156272D10A162434E125F11718191A262728292A35363738393A"
        "434445464748494A535455565758595A636465666768696A737475767778797A82838485868788898A92939495969798999AA2A3"
        "A4A5A6A7A8A9AAB2B3B4B5B6B7B8B9BAC2C3C4C5C6C7C8C9CAD2D3D4D5D6D7D8D9DAE2E3E4E5E6E7E8E9EAF2F3F4F5F6F7F8F9FA";
    uint8_t codes[416] = {0};
    avl__image_file *in = j->in;
    avl__jpeg_component *scan[4];
    int n = size ? p[0] : 0, n_blocks = 0;
    if (j->n_components == 0) return AVL__BROKEN(in, "a scan (SOS) before the frame (SOF)");
    if (n < 1 || n > 4 || size != 4 + 2 * (size_t)n) return AVL__BROKEN(in, "a scan (SOS) of wrong length");
    if (++j->n_scans > 256)   // files have about ten, and each scan visits the whole image
        return avl__image_fail(in, ASTROVL_ERROR_LIMIT, "too many scans");
    for (int i = 0; i < 832; i++)
        codes[i / 2] = (uint8_t)(codes[i / 2] << 4 | (hex[i] - (hex[i] > '9' ? 'A' - 10 : '0')));
    for (int i = 0; i < 4 && !j->is_progressive; i++)
        if (!j->code[i / 2][i % 2].limit[16])   // as libjpeg does
            (void)avl__jpeg_tables(j, 0xC4, codes + (i < 2 ? 29 * i : 179 * i - 300), i < 2 ? 29 : 179);
    j->first = j->is_progressive ? p[1 + 2 * n] : 0;
    j->last = j->is_progressive ? p[2 + 2 * n] : 63;
    j->high = j->is_progressive ? p[3 + 2 * n] >> 4 : 0;
    j->low = j->is_progressive ? p[3 + 2 * n] & 15 : 0;
    if (j->is_progressive && (j->last > 63 || j->low > 13 || (j->high && j->high != j->low + 1) ||
                              (j->first == 0 ? j->last != 0 : j->last < j->first || n != 1)))
        return AVL__BROKEN(in, "a scan (SOS) with impossible progression parameters");
    for (int i = 0; i < n; i++) {
        avl__jpeg_component *c = NULL;
        int dc = p[2 + 2 * i] >> 4, ac = p[2 + 2 * i] & 15;
        for (int k = 0; k < j->n_components && !c; k++)
            if (j->component[k].id == p[1 + 2 * i]) c = &j->component[k];
        for (int k = 0; k < i; k++)
            if (scan[k] == c) c = NULL;
        if (!c || dc > 3 || ac > 3) return AVL__BROKEN(in, "a scan (SOS) with an unknown component or table");
        c->dc = &j->code[0][dc];
        c->ac = &j->code[1][ac];
        if ((j->first == 0 && j->high == 0 && !c->dc->limit[16]) || (j->last > 0 && !c->ac->limit[16]))
            return AVL__BROKEN(in, "a scan (SOS) whose Huffman table is missing");
        if (!c->quant[0]) memcpy(c->quant, j->table[c->table], sizeof c->quant);
        if (!c->quant[0]) return AVL__BROKEN(in, "a scan (SOS) whose quantization table is missing");
        scan[i] = c;
        n_blocks += c->h * c->v;
    }
    if (n > 1 && n_blocks > 10) return AVL__BROKEN(in, "a scan (SOS) with more than 10 blocks per MCU");
    int n_x = n == 1 ? (scan[0]->width + 7) / 8 : j->mcus_x, n_y = n == 1 ? (scan[0]->height + 7) / 8 : j->mcus_y;
    for (int mcu = 0; mcu < n_x * n_y; mcu++) {
        if (mcu == 0 || (j->restart_interval && mcu % j->restart_interval == 0)) {   // predictions and runs start anew
            if (mcu > 0 && avl__jpeg_find_marker(in) != 0xD0 + (mcu / j->restart_interval - 1) % 8)
                return AVL__BROKEN(in, "not the restart marker (RST) that is due");
            in->at += mcu > 0 ? 2 : 4 + size;   // past the restart marker or SOS
            // The data until the next marker goes to `packed`, where FF 00 becomes FF.
            memset(&j->bits, 0, sizeof j->bits);
            j->bits.data = j->packed;
            size_t k = in->at;
            avl__jpeg_find_marker(in);
            for (; k < in->at; k += in->data[k] == 0xFF ? 2 : 1) j->packed[j->bits.size++] = in->data[k];
            j->end_of_band = 0;
            for (int i = 0; i < n; i++) scan[i]->predicted = 0;
        }
        for (int i = 0; i < n; i++) {
            avl__jpeg_component *c = scan[i];
            int h = n == 1 ? 1 : c->h, v = n == 1 ? 1 : c->v;
            for (int b = 0; b < h * v; b++) {
                int x = mcu % n_x * h + b % h, y = mcu / n_x * v + b / h;
                int16_t local[64], *block = local;
                if (j->is_progressive) block = c->coefficients + ((size_t)y * (size_t)c->stride + (size_t)x) * 64;
                else memset(local, 0, sizeof local);
                if (!(j->high ? avl__jpeg_read_refinement(j, c, block) : avl__jpeg_read_first(j, c, block)))
                    return AVL__BROKEN(in, "the scan's data before it is damaged: no such code");
                if (!j->is_progressive) avl__jpeg_transform(c, x, y, block);
            }
        }
        if (j->bits.n < 0)
            return AVL__BROKEN(in, "the scan's data ends in row %d of %d of its blocks: the file is cut off or damaged",
                               mcu / n_x, n_y);
    }
    return ASTROVL_OK;
}

// Reads segment after segment: to the end (EOI) of a progressive file, which may improve any pixel until then; of
// others until each component has been in a scan.
static astrovl_status avl__jpeg_segments(avl__jpeg *j) {
    avl__image_file *in = j->in;
    astrovl_status status = ASTROVL_OK;
    for (in->at = 2; !status;) {
        int marker = avl__jpeg_find_marker(in);
        size_t left = in->size - in->at, size = left < 4 ? 0 : avl__load_u16be(in->data + in->at + 2);
        int is_complete = j->n_components > 0;
        for (int i = 0; i < j->n_components; i++) is_complete = is_complete && j->component[i].quant[0];
        if (is_complete && (!j->is_progressive || marker == 0xD9)) return ASTROVL_OK;
        if (marker == 0 || marker == 0xD9)
            return AVL__BROKEN(in, "the end of the file (EOI) comes before that of its image");
        if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {   // a marker without contents
            in->at += 2;
            continue;
        }
        if (size < (marker == 0xDD ? 4 : 2) || size > left - 2)
            return AVL__BROKEN(in, "a segment of wrong length, or the file ends inside it");
        const uint8_t *p = in->data + in->at + 4;
        size -= 2;
        if (marker == 0xDA) status = avl__jpeg_scan(j, p, size);
        else if (marker == 0xDB || marker == 0xC4) status = avl__jpeg_tables(j, marker, p, size);
        else if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC8 && marker != 0xCC)
            status = avl__jpeg_frame(j, marker, p, size);
        else if (marker == 0xDD) j->restart_interval = avl__load_u16be(p);
        else if (marker == 0xE0 && size >= 14 && memcmp(p, "JFIF", 5) == 0) j->has_jfif = 1;
        else if (marker == 0xE1 && size >= 6 && memcmp(p, "Exif\0", 6) == 0 && in->orientation == 0)
            in->orientation = avl__exif_orientation(p + 6, size - 6);
        else if (marker == 0xEE && size >= 12 && memcmp(p, "Adobe", 5) == 0) j->adobe = 1 + p[11];
        if (marker != 0xDA) in->at += 4 + size;   // a scan moves to its own end
    }
    return status;
}

// Returns row y of a component at the image's full width: in place if it needs no upsampling, else written to `out`.
// A chroma sample that stands for two pixels lies between them: each pixel takes 3/4 of its own sample and 1/4 of the
// neighbor on its side, where there is one. Rounding goes alternately down and up. Other ratios than 2 are repetition.
//   down:     v[i] = 3 own[i] + beside[i]       own, beside: the sample rows nearest to the pixel row
//   across:   out[2i] = 3 v[i] + v[i-1],  out[2i+1] = 3 v[i] + v[i+1]       in sixteenths
static const uint8_t *avl__jpeg_row(const avl__jpeg *j, const avl__jpeg_component *c, int y, uint8_t *out) {
    int ratio_x = j->max_h / c->h, ratio_y = j->max_v / c->v, n = c->width, row = y / ratio_y;
    int is_smooth = ratio_y <= 2 && (ratio_x == 1 || (ratio_x == 2 && n > 2));
    int other = ratio_y != 2 || !is_smooth ? row : y % 2 ? row + 1 : row - 1;
    if (other < 0 || other >= c->height) other = row;
    const uint8_t *own = c->samples + (size_t)row * (size_t)c->stride * 8;
    const uint8_t *beside = c->samples + (size_t)other * (size_t)c->stride * 8;
    if (ratio_x == 1 && ratio_y == 1) return own;
    int odd = ratio_x == 1 ? 4 + y % 2 * 4 : ratio_y == 1 ? 8 : 7, even = ratio_x == 1 ? odd : 15 - odd;   // rounding
    uint8_t *to = out;
    for (int i = 0, before = 3 * own[0] + beside[0], v = before, next; i < n; i++, before = v, v = next) {
        next = i + 1 < n ? 3 * own[i + 1] + beside[i + 1] : v;
        if (ratio_x == 2 && is_smooth) {
            *to++ = (uint8_t)((3 * v + before + even) >> 4);
            *to++ = (uint8_t)((3 * v + next + odd) >> 4);
        } else
            for (int k = 0; k < ratio_x; k++) *to++ = (uint8_t)((4 * v + even) >> 4);
    }
    return out;
}

// YCbCr to RGB: R = Y + 1.402 Cr, G = Y - 0.344136 Cb - 0.714136 Cr, B = Y + 1.772 Cb, with 16 fractional bits   (JFIF)
// CMYK to RGB: R = K (255 - C) / 255. Pillow takes four components for Adobe's inverted ones (255 less the ink),
// whether a marker says so or not.
static astrovl_status avl__jpeg_pixels(const avl__jpeg *j) {
    const avl__jpeg_component *c = j->component;
    // libjpeg's rules for what the components mean: without a marker, three are YCbCr unless they are called R, G and B
    int is_rgb = j->has_jfif ? 0 : j->adobe ? j->adobe == 1 :
                 c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B';
    int is_ycc = j->n_components == 4 ? j->adobe > 1 : j->n_components == 3 && !is_rgb;
    astrovl_status status = avl__image_new(j->in->image, j->width, j->height, j->in->err);
    for (int y = 0; y < j->height && !status; y++) {
        uint8_t *rgb = avl__image_pixel(j->in->image, 0, y);
        const uint8_t *row[4];
        for (int i = 0; i < j->n_components; i++)
            row[i] = avl__jpeg_row(j, &c[i], y, j->rows + (size_t)i * ((size_t)j->width + 8));
        if (j->n_components == 1) row[1] = row[2] = row[0];
        for (int x = 0; x < j->width; x++, rgb += 3) {
            int luma = row[0][x], cb = row[1][x] - 128, cr = row[2][x] - 128;   // NOLINT: all three are set above
            if (is_ycc) {
                rgb[0] = avl__clip8(luma + ((91881 * cr + 32768) >> 16));
                rgb[1] = avl__clip8(luma + ((-22554 * cb - 46802 * cr + 32768) >> 16));
                rgb[2] = avl__clip8(luma + ((116130 * cb + 32768) >> 16));
            } else
                for (int i = 0; i < 3; i++) rgb[i] = row[i][x];
            for (int i = 0; i < 3 && j->n_components == 4; i++) {
                int k = row[3][x], product = (is_ycc ? rgb[i] : 255 - rgb[i]) * k + 128;
                rgb[i] = avl__clip8(k - (((product >> 8) + product) >> 8));
            }
        }
    }
    return status;
}

static astrovl_status avl__jpeg_decode(avl__image_file *in) {
    avl__jpeg j;
    memset(&j, 0, sizeof j);
    j.in = in;
    astrovl_status status = avl__jpeg_segments(&j);
    for (int i = 0; i < j.n_components && j.is_progressive && !status; i++) {
        avl__jpeg_component *c = &j.component[i];
        for (int k = 0; k < c->n_blocks; k++)
            avl__jpeg_transform(c, k % c->stride, k / c->stride, c->coefficients + (size_t)k * 64);
        astrovl_free(c->coefficients);   // at once: they are the largest part of the memory, 2 bytes for each sample
        c->coefficients = NULL;
    }
    if (!status) status = avl__jpeg_pixels(&j);
    for (int i = 0; i < 4; i++) {
        astrovl_free(j.component[i].coefficients);
        astrovl_free(j.component[i].samples);
    }
    astrovl_free(j.packed);
    astrovl_free(j.rows);
    return status;
}

// ---- any format ---------------------------------------------------------------------------------------------------

ASTROVL_API astrovl_status astrovl_image_decode(const void *data, size_t size, const astrovl_image_options *options,
                                                astrovl_image *image, astrovl_error *err) {
    // Formats by their first bytes ('?': any). Those that are not decoded may have white space before them.
    static const struct { const char *bytes, *name; astrovl_status (*decode)(avl__image_file *); } formats[] = {
        {"\x89PNG\r\n\x1a\n", "PNG", avl__png_decode}, {"\xFF\xD8\xFF", "JPEG", avl__jpeg_decode},
        {"P5", "PNM", avl__pnm_decode}, {"P6", "PNM", avl__pnm_decode}, {"GIF8", "GIF", NULL}, {"II*", "TIFF", NULL},
        {"II+", "TIFF", NULL}, {"MM?*", "TIFF", NULL}, {"MM?+", "TIFF", NULL}, {"BM", "BMP", NULL},
        {"RIFF????WEBP", "WebP", NULL}, {"????jP  ", "JPEG 2000", NULL}, {"\xFF\x4F\xFF", "JPEG 2000", NULL},
        {"????JXL ", "JPEG XL", NULL}, {"\xFF\x0A", "JPEG XL", NULL}, {"????ftyp", "AVIF, HEIC or a film", NULL},
        {"8BPS", "PSD", NULL}, {"%PDF", "PDF", NULL}, {"P1", "PBM", NULL}, {"P4", "PBM", NULL},
        {"P2", "PGM as text", NULL}, {"P3", "PPM as text", NULL}, {"P7", "PAM", NULL},
        {"\x1F\x8B", "gzip: unpack it", NULL}, {"PK\3\4", "zip: unpack it", NULL},
        {"SIMPLE  =", "FITS: scale its values to 8 or 16 bits and save them as PNG", NULL},
        {"<", "HTML or XML: get the image itself", NULL}, {"\xEF\xBB\xBF<", "HTML or XML: get the image itself", NULL},
        {"{", "JSON: get the image itself", NULL}, {"version https://git-lfs", "git-lfs: run `git lfs pull`", NULL},
        {"\x89PNG", "PNG with converted line ends: get it again, as binary", NULL}};
    const uint8_t *p = (const uint8_t *)data;
    if (image) memset(image, 0, sizeof *image);
    if (!image || !data) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no data to decode, or no image for the result");
    uint64_t max_pixels = options && options->max_pixels ? options->max_pixels : ASTROVL_MAX_PIXELS;
    size_t n_spaces = 0;
    while (n_spaces < size && avl__is_space(p[n_spaces])) n_spaces++;
    for (size_t i = 0, n; i < sizeof formats / sizeof *formats; i++) {
        const char *bytes = formats[i].bytes, *name = formats[i].name;
        const size_t at = formats[i].decode ? 0 : n_spaces;
        for (n = 0; at + n < size && bytes[n] && (bytes[n] == '?' || (uint8_t)bytes[n] == p[at + n]); n++) {}
        if (bytes[n]) continue;
        if (!formats[i].decode)
            return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "neither PNG, JPEG nor binary PNM (P5, P6), but %s%s",
                             name, strchr(name, ':') ? "" : ": convert it to PNG or JPEG");
        avl__image_file in = {name, p, size, 0, max_pixels, 0, image, err};
        avl__fail(err, ASTROVL_OK, "%s", "");
        astrovl_status status = formats[i].decode(&in);
        if (!status && in.orientation) image->orientation = in.orientation;
        if (!status && !(options && options->as_stored)) status = astrovl_image_upright(image, err);
        if (status) astrovl_image_free(image);
        return status;
    }
    return avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "neither PNG, JPEG nor binary PNM (P5, P6), but a format unknown "
                     "here: convert it to PNG or JPEG");
}

ASTROVL_API astrovl_status astrovl_image_load(const char *path, const astrovl_image_options *options,
                                              astrovl_image *image, astrovl_error *err) {
    astrovl_error inner;
    avl__file file;
    if (image) memset(image, 0, sizeof *image);
    astrovl_status status = avl__file_open(path, 0, (size_t)1 << 28, &file, err);   // at most 256 MB if not mapped
    if (status) return status;
    if (file.size == 0) status = avl__fail(&inner, ASTROVL_ERROR_FORMAT, "the file is empty");
    else status = astrovl_image_decode(file.data, file.size, options, image, &inner);
    avl__file_close(&file);
    return avl__fail(err, status, "%s%s%s", *inner.message ? path : "", *inner.message ? ": " : "", inner.message);
}

// ---- orientation --------------------------------------------------------------------------------------------------

// EXIF's orientations 1 to 8. Pixel (x, y) of the result is pixel (x, y) of the stored image, with the two exchanged
// (5 to 8), then x (2, 3, 7, 8) and y (3, 4, 6, 7) counted from the far end.
ASTROVL_API astrovl_status astrovl_image_upright(astrovl_image *image, astrovl_error *err) {
    astrovl_image out = {0, 0, NULL, 0};
    astrovl_status status = avl__image_check(image, 1, 1, &out, err);
    if (status) return status;
    int o = image->orientation, swap = o >= 5;
    if (o < 0 || o > 8) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "orientation %d: EXIF has 1 to 8", o);
    if (o == 0) image->orientation = 1;
    if (o <= 1) return ASTROVL_OK;
    status = avl__image_new(&out, swap ? image->height : image->width, swap ? image->width : image->height, err);
    if (status) return status;
    for (int y = 0; y < out.height; y++)
        for (int x = 0; x < out.width; x++) {
            int from_x = swap ? y : x, from_y = swap ? x : y;
            if (o == 2 || o == 3 || o == 7 || o == 8) from_x = image->width - 1 - from_x;
            if (o == 3 || o == 4 || o == 6 || o == 7) from_y = image->height - 1 - from_y;
            memcpy(avl__image_pixel(&out, x, y), avl__image_pixel(image, from_x, from_y), 3);
        }
    astrovl_image_free(image);
    *image = out;
    return ASTROVL_OK;
}

// ---- resizing, padding, cropping ----------------------------------------------------------------------------------
// Pillow's BICUBIC. Each output pixel is a weighted mean of the input pixels around its center, within 2 or, so that it
// averages where it shrinks, 2 times the reduction: along one axis, then along the other, with weights of 22 fractional
// bits and rounding to 8 bits after each. The image may lie in the middle of a larger input of one color, and the
// result in that of a larger output. Neither is stored: making a long and thin image square takes no memory.

#define AVL__RESIZE_BITS 22   // 32 - 8 bits of the pixel - 2 for sums above 255 and the sign

// Keys' cubic convolution kernel with a = -1/2 (IEEE Trans. ASSP 29, 1981)
static double avl__bicubic(double x) {
    if (x < 0.0) x = -x;
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return 0.0;
}

typedef struct avl__axis {
    int64_t  n_in, n_image, n_out, n;   // pixels of the input, the image, the output and the result
    int64_t  first, n_taps;             // a pixel of the result is made of n_taps pixels of the image from `first` on
    int32_t *weights, outside;          // their weights, and the sum of those of the pixels outside of the image
} avl__axis;

// Fills first, n_taps, weights and outside for pixel i of the result.
static void avl__axis_weigh(avl__axis *a, int64_t i) {
    const double scale = (double)a->n_in / (double)a->n_out, stretch = scale < 1.0 ? 1.0 : scale, step = 1.0 / stretch;
    const double center = ((double)((a->n_out - a->n) / 2 + i) + 0.5) * scale;
    const double low = center - 2.0 * stretch + 0.5, high = center + 2.0 * stretch + 0.5;
    const int64_t begin = low < 0.0 ? 0 : (int64_t)low, end = high > (double)a->n_in ? a->n_in : (int64_t)high;
    const int64_t at = (a->n_in - a->n_image) / 2;   // of the image in the input
    double sum = 0.0;
    a->first = begin < at ? 0 : begin < at + a->n_image ? begin - at : a->n_image;
    a->n_taps = a->outside = 0;
    for (int64_t k = begin; k < end; k++) sum += avl__bicubic(((double)k - center + 0.5) * step);
    for (int64_t k = begin; k < end; k++) {
        const double w = avl__bicubic(((double)k - center + 0.5) * step) / sum * (double)(1 << AVL__RESIZE_BITS);
        const int32_t weight = (int32_t)(w < 0.0 ? w - 0.5 : w + 0.5);
        if (k < at || k >= at + a->n_image) a->outside += weight;
        else a->weights[a->n_taps++] = weight;
    }
}

// Makes that pixel in n lines.   step, line: bytes to the next pixel along the axis and to the next line
static void avl__axis_mix(const avl__axis *a, const unsigned char color[3], int64_t n, const uint8_t *from, size_t step,
                          size_t line, uint8_t *to, size_t to_line) {
    const int32_t half = 1 << (AVL__RESIZE_BITS - 1), n_taps = (int32_t)a->n_taps, *weights = a->weights;
    for (from += (size_t)a->first * step; n > 0; n--, from += line, to += to_line) {
        int32_t r = half + a->outside * color[0], g = half + a->outside * color[1], b = half + a->outside * color[2];
        const uint8_t *p = from;
        for (int32_t k = 0; k < n_taps; k++, p += step) {
            r += weights[k] * p[0];
            g += weights[k] * p[1];
            b += weights[k] * p[2];
        }
        to[0] = avl__clip8(r >> AVL__RESIZE_BITS);
        to[1] = avl__clip8(g >> AVL__RESIZE_BITS);
        to[2] = avl__clip8(b >> AVL__RESIZE_BITS);
    }
}

// in, out: size of the input and the output, across and down;   color: of the input outside of the image (NULL: black)
static astrovl_status avl__resize(const astrovl_image *image, const int64_t in[2], const int64_t out[2], int width,
                                  int height, const unsigned char color[3], astrovl_image *result, astrovl_error *err) {
    // Along x first, which is across, as in Pillow up to 12, which prepared the training data. Images over 100 times as
    // high as wide are an exception when they are made lower: x is down. (Pillow 13 takes the faster order.)
    const int x = in[1] > 100 * in[0] && out[1] < in[1], y = !x;
    const size_t step[2] = {3, 3 * (size_t)image->width}, to_step[2] = {3, 3 * (size_t)width};
    avl__axis axis[3] = {{in[0], image->width, out[0], width, 0, 0, NULL, 0},
                         {in[1], image->height, out[1], height, 0, 0, NULL, 0}, {1, 0, 1, 1, 0, 0, NULL, 0}};
    // The result is made in stripes along y, of which the weights along x and the image's rows are kept.
    const int64_t n_rows = axis[y].n_image, n_weights = 4 * (in[0] / out[0] + in[1] / out[1] + 4);
    const int64_t wanted = 1 + (1 << 18) / (n_rows + n_weights), n_stripe = wanted < axis[x].n ? wanted : axis[x].n;
    if (!color) color = (const unsigned char *)"\0\0";
    astrovl_status status = avl__image_new(result, width, height, err);
    if (status) return status;
    const uint64_t column_bytes = sizeof(avl__axis) + (uint64_t)(4 * n_weights + 3 * n_rows);
    avl__axis *columns = (avl__axis *)avl__alloc_raw((uint64_t)n_stripe * column_bytes + 4 * (uint64_t)n_weights, 1);
    if (!columns) {
        astrovl_image_free(result);
        return avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for resizing to %d x %d", width, height);
    }
    int32_t *weights = (int32_t *)(columns + n_stripe);                  // [1 + n_stripe][n_weights], the first along y
    uint8_t *rows = (uint8_t *)(weights + n_weights * (n_stripe + 1));   // [n_rows][n_stripe][3]
    const size_t stride = 3 * (size_t)n_stripe;
    axis[y].weights = axis[2].weights = weights;
    avl__axis_weigh(&axis[y], 0);
    const int64_t first = axis[y].first;
    avl__axis_weigh(&axis[y], axis[y].n - 1);
    const int64_t end = axis[y].first + axis[y].n_taps;   // only rows `first` to end - 1 are needed
    for (int64_t x0 = 0, n; x0 < axis[x].n; x0 += n) {
        int64_t n_seen = 0;
        n = axis[x].n - x0 < n_stripe ? axis[x].n - x0 : n_stripe;
        for (int64_t i = 0; i < n; i++) {
            columns[i] = axis[x];
            columns[i].weights = weights + n_weights * (i + 1);
            avl__axis_weigh(&columns[i], x0 + i);
            n_seen += columns[i].n_taps;
        }
        for (int64_t row = first; row < end && n_seen; row += 8)   // so few that memory is read in its order
            for (int64_t i = 0; i < n; i++)
                avl__axis_mix(&columns[i], color, end - row < 8 ? end - row : 8, image->rgb + (size_t)row * step[y],
                              step[x], step[y], rows + (size_t)row * stride + 3 * i, stride);
        avl__axis *along_y = n_seen ? &axis[y] : &axis[2];   // a stripe outside of the image has its color
        for (int64_t i = 0; i < axis[y].n; i++) {
            avl__axis_weigh(along_y, n_seen ? i : 0);
            avl__axis_mix(along_y, color, n, rows, stride, 3,
                          result->rgb + (size_t)i * to_step[y] + (size_t)x0 * to_step[x], to_step[x]);
        }
    }
    astrovl_free(columns);
    return ASTROVL_OK;
}

ASTROVL_API astrovl_status astrovl_image_resize(const astrovl_image *image, int width, int height, astrovl_image *out,
                                                astrovl_error *err) {
    astrovl_status status = avl__image_check(image, width, height, out, err);
    if (status) return status;
    const int64_t in_size[2] = {image->width, image->height}, out_size[2] = {width, height};
    return avl__resize(image, in_size, out_size, width, height, NULL, out, err);
}

ASTROVL_API astrovl_status astrovl_image_pad_square(const astrovl_image *image, const unsigned char color[3],
                                                    astrovl_image *out, astrovl_error *err) {
    astrovl_status status = avl__image_check(image, 1, 1, out, err);
    if (status) return status;
    int side = image->width > image->height ? image->width : image->height;
    const int64_t square[2] = {side, side};
    return avl__resize(image, square, square, side, side, color, out, err);
}

// The middle of an input that is as wide as the result, or wider by one so that the image is in its middle.
ASTROVL_API astrovl_status astrovl_image_center_crop(const astrovl_image *image, int width, int height,
                                                     astrovl_image *out, astrovl_error *err) {
    astrovl_status status = avl__image_check(image, width, height, out, err);
    if (status) return status;
    const int64_t w = image->width, h = image->height;
    const int64_t input[2] = {w - 2 * ((w - width) >> 1), h - 2 * ((h - height) >> 1)};
    return avl__resize(image, input, input, width, height, NULL, out, err);
}

// ====================================================================================================================
// [8] CLIP
// Two transformers (Radford et al. 2021) of the same pre-norm layers.
// Vision (Dosovitskiy et al. 2021): an image of S x S pixels is cut into (S / P)^2 patches; each becomes one row of
// n_embd numbers, a learned class row stands before them, learned positions are added, and a norm comes before the
// layers. LLaVA reads the patches' rows after the last layer but one; in CLIP the class row after all layers stands for
// the image. Text: one row per token, positions added, attention to earlier tokens only; the end token's row after all
// layers stands for the text. Both go through a norm, two dense layers (only in PAPERCLIP's models with frozen
// backbones), and a projection to the length that they share.
// Names: v.*, t.*, visual_projection, text_projection; clip.vision.* and clip.text.* of mmproj and clip.cpp's files.
// ====================================================================================================================

typedef struct avl__tower_layer {
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;   // [n_embd]
    avl__linear  q, k, v, out;                                            // [n_embd][n_embd]
    avl__linear  fc1, fc2;                                                // [n_ff][n_embd], [n_embd][n_ff]
} avl__tower_layer;

typedef struct avl__tower {
    int   n_embd, n_head, n_ff, n_layer;      // n_layer: layers the file has
    int   is_text;                            // 1: a row attends to the rows up to its own only
    int   use_gelu;                           // 1: GELU, 0: quick-GELU
    float eps;
    avl__tower_layer *layers;                 // [n_layer], owned
    const float *position_embd;               // [1 + n_patches or n_ctx][n_embd]
    const float *norm_weight, *norm_bias;     // [n_embd]; from here on unused where the files have no joint space
    avl__linear  dense[2];                    // PAPERCLIP's head: W2 gelu(W1 x + b1) + b2; CLIP has none
    avl__linear  projection;                  // [n_embd_joint][n_embd]
} avl__tower;

typedef struct avl__clip {
    avl__tower tower;
    int   image_size, patch_size, n_patches;  // S, P, (S / P)^2
    int   n_run;                              // layers run before LLaVA's features are taken
    int   pad_square;                         // 1: pad with the mean color (LLaVA); 0: resize and crop (CLIP)
    float mean[3], std[3];
    const float *class_embd, *pre_norm_weight, *pre_norm_bias;   // [n_embd]
    avl__linear  patch_embd;                  // [n_embd][3][P][P]
} avl__clip;

typedef struct avl__clip_text {
    avl__tower   tower;
    int          n_ctx;
    avl__linear  token_embd;                  // [n_vocab][n_embd]
} avl__clip_text;

// ---- loading -------------------------------------------------------------------------------------------------------

static void avl__tower_load(avl__tower *tower, avl__weights *w, int is_text) {
    const char *p = is_text ? "t" : "v", *keys = is_text ? "clip.text" : "clip.vision";
    const int d = tower->n_embd = (int)avl__load_value(w, 1, 65536, -1, "%s.embedding_length", keys);
    const int n_ff = tower->n_ff = (int)avl__load_value(w, 1, 1 << 20, -1, "%s.feed_forward_length", keys);
    tower->n_layer = (int)avl__load_value(w, 1, 1024, -1, "%s.block_count", keys);
    tower->n_head = (int)avl__load_value(w, 1, 65536, -1, "%s.attention.head_count", keys);
    tower->eps = (float)avl__load_value(w, 0, 1, -1, "%s.attention.layer_norm_epsilon", keys);
    tower->is_text = is_text;
    tower->use_gelu = (int)avl__load_value(w, 0, 255, 0, "clip.use_gelu") != 0;
    if (d % tower->n_head != 0)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "%s.* asks for %d heads over %d values", keys, tower->n_head, d);
    tower->layers = (avl__tower_layer *)avl__alloc((uint64_t)tower->n_layer, sizeof *tower->layers);
    if (!tower->layers) avl__load_fail(w, NULL, ASTROVL_ERROR_MEMORY, "out of memory for a CLIP tower");
    for (int i = 0; i < tower->n_layer && !w->status; i++) {
        avl__tower_layer *layer = &tower->layers[i];
        layer->norm1_weight = avl__load_vector(w, d, "%s.blk.%d.ln1.weight", p, i);
        layer->norm1_bias   = avl__load_vector(w, d, "%s.blk.%d.ln1.bias", p, i);
        layer->norm2_weight = avl__load_vector(w, d, "%s.blk.%d.ln2.weight", p, i);
        layer->norm2_bias   = avl__load_vector(w, d, "%s.blk.%d.ln2.bias", p, i);
        layer->q   = avl__load_linear(w, d, d, "%s.blk.%d.attn_q", p, i);
        layer->k   = avl__load_linear(w, d, d, "%s.blk.%d.attn_k", p, i);
        layer->v   = avl__load_linear(w, d, d, "%s.blk.%d.attn_v", p, i);
        layer->out = avl__load_linear(w, d, d, "%s.blk.%d.attn_out", p, i);
        // Converters before 2025 called fc1 "ffn_down" and fc2 "ffn_up"; the shape tells, since fc2 reads n_ff values.
        char name[64];
        avl__format(name, sizeof name, "%s.blk.%d.ffn_up.weight", p, i);
        const astrovl_tensor *up = avl__find_tensor(w, name, NULL);
        const int is_swapped = up && up->ne[0] == n_ff && n_ff != d;
        layer->fc1 = avl__load_linear(w, d, n_ff, "%s.blk.%d.%s", p, i, is_swapped ? "ffn_down" : "ffn_up");
        layer->fc2 = avl__load_linear(w, n_ff, d, "%s.blk.%d.%s", p, i, is_swapped ? "ffn_up" : "ffn_down");
    }
    const int is_joint = is_text || avl__find_tensor(w, "visual_projection.weight", NULL);
    if (is_joint || avl__find_tensor(w, "v.post_ln.weight", NULL)) {     // LLaVA's files may have it, and do without
        tower->norm_weight = avl__load_vector(w, d, "%s.post_ln.weight", p);
        tower->norm_bias = avl__load_vector(w, d, "%s.post_ln.bias", p);
    }
    if (!is_joint) return;
    int n = d;
    if (avl__find_tensor(w, is_text ? "t.head.0.weight" : "v.head.0.weight", NULL)) {
        tower->dense[0] = avl__load_linear(w, d, 0, "%s.head.0", p);
        tower->dense[1] = avl__load_linear(w, tower->dense[0].n_out, 0, "%s.head.2", p);
        n = tower->dense[1].n_out;
    }
    tower->projection = avl__load_linear(w, n, 0, is_text ? "text_projection" : "visual_projection");
}

// Three numbers of a key, each in min..max, or OpenAI CLIP's own.
static void avl__clip_load_color(avl__weights *w, const char *key, double min, double max, const float *fallback,
                                 float *color) {
    int index;
    const astrovl_gguf *file = avl__find_key(w, key, &index);
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    if (kv && (kv->count != 3 || kv->item_type == ASTROVL_VALUE_STRING))
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "%s must hold three numbers", key);
    for (int c = 0; c < 3; c++) {
        color[c] = file ? (float)astrovl_gguf_float(file, index, (uint64_t)c) : fallback[c];
        if (!(color[c] >= min && color[c] <= max))
            avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "%s holds %.9g; it must lie between %.9g and %.9g", key,
                           (double)color[c], min, max);
    }
}

static void avl__clip_load(avl__clip *clip, avl__weights *w, astrovl_info *info) {
    static const float clip_mean[3] = {0.48145466f, 0.4578275f, 0.40821073f};
    static const float clip_std[3] = {0.26862954f, 0.26130258f, 0.27577711f};
    const int s = info->image_size = clip->image_size = (int)avl__load_value(w, 1, 8192, -1, "clip.vision.image_size");
    const int p = info->patch_size = clip->patch_size = (int)avl__load_value(w, 1, s, -1, "clip.vision.patch_size");
    info->n_patches = clip->n_patches = (s / p) * (s / p);
    if (clip->n_patches > 65536)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "clip.vision.* asks for %d patches", clip->n_patches);
    avl__clip_load_color(w, "clip.vision.image_mean", 0.0, 1.0, clip_mean, clip->mean);
    avl__clip_load_color(w, "clip.vision.image_std", 1e-7, 1e6, clip_std, clip->std);
    // LLaVA-1.5 pads, and its mmproj files do not say so; a tower without a projector is CLIP's own, which crops.
    const astrovl_string aspect = avl__load_string(w, "clip.vision.image_aspect_ratio");
    clip->pad_square = aspect.size ? avl__string_is(aspect, "pad") : avl__find_tensor(w, "mm.0.weight", NULL) != NULL;
    avl__tower_load(&clip->tower, w, 0);
    const int d = info->vision_n_embd = clip->tower.n_embd;
    const int n_layer = info->vision_n_layer = clip->tower.n_layer;
    info->vision_n_head = clip->tower.n_head;
    info->vision_n_ff = clip->tower.n_ff;
    // LLaVA's features come after all layers but the last (transformers: vision_feature_layer -2), unless a file says
    // otherwise. A file without the final norm lacks the last layer too: its converter has dropped what is not used.
    const int depth = n_layer - (avl__find_tensor(w, "v.post_ln.weight", NULL) && n_layer > 1);
    info->vision_feature_layer = clip->n_run = (int)avl__load_value(w, 0, n_layer, depth, "clip.vision.feature_layer");
    clip->class_embd = avl__load_vector(w, d, "v.class_embd");
    clip->patch_embd = avl__load_linear(w, 3 * p * p, d, "v.patch_embd");
    clip->tower.position_embd = avl__load_vector(w, (int64_t)(1 + clip->n_patches) * d, "v.position_embd.weight");
    clip->pre_norm_weight = avl__load_vector(w, d, "v.pre_ln.weight");
    clip->pre_norm_bias = avl__load_vector(w, d, "v.pre_ln.bias");
    info->has_joint_image = clip->tower.projection.weight != NULL;
    info->n_embd_joint = clip->tower.projection.n_out;
}

static void avl__clip_text_load(avl__clip_text *text, avl__weights *w, astrovl_info *info) {
    avl__tower_load(&text->tower, w, 1);
    const int d = info->clip_text_n_embd = text->tower.n_embd;
    info->clip_text_n_layer = text->tower.n_layer;
    info->clip_text_n_head = text->tower.n_head;
    info->clip_text_n_ff = text->tower.n_ff;
    info->clip_text_n_ctx = text->n_ctx = (int)avl__load_value(w, 2, 65536, -1, "clip.text.context_length");
    text->token_embd = avl__load_linear(w, d, 0, "t.token_embd");
    info->clip_text_n_vocab = text->token_embd.n_out;
    text->tower.position_embd = avl__load_vector(w, (int64_t)text->n_ctx * d, "t.position_embd.weight");
    const int n_joint = text->tower.projection.n_out;
    if (info->has_joint_image && n_joint != info->n_embd_joint)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "images are embedded in %d numbers, texts in %d; these towers "
                       "belong to different models", info->n_embd_joint, n_joint);
    info->has_joint_text = 1;
    info->n_embd_joint = n_joint;
}

// Brings an image to the tower's size: padded to a square with the mean color and resized (LLaVA), or with the short
// side resized and the middle cut out (CLIP). Then pixels[c][y][x] = (rgb / 255 - mean[c]) / std[c].
// pixels: out, [3][S][S].   Source: transformers' CLIPImageProcessor, LLaVA's expand2square
static astrovl_status avl__clip_preprocess(const avl__clip *clip, const astrovl_image *image, float *pixels,
                                           astrovl_error *err) {
    const int size = clip->image_size;
    const size_t n = (size_t)size * size;
    astrovl_image sized = {0, 0, NULL, 1};
    astrovl_status status = avl__image_check(image, 1, 1, &sized, err);
    if (status) return status;
    const int64_t w = image->width, h = image->height, longer = w > h ? w : h, shorter = w < h ? w : h;
    const int64_t side = clip->pad_square ? longer : shorter, in_h = clip->pad_square ? side : h;
    const int64_t in[2] = {clip->pad_square ? side : w, in_h}, resized[2] = {size * in[0] / side, size * in[1] / side};
    unsigned char color[3];
    for (int c = 0; c < 3; c++) color[c] = (unsigned char)(clip->mean[c] * 255.0f);   // LLaVA's int(): 122 116 104
    status = avl__resize(image, in, resized, size, size, color, &sized, err);
    for (size_t c = 0; c < 3 && !status; c++)
        for (size_t i = 0; i < n; i++)
            pixels[c * n + i] = ((float)sized.rgb[3 * i + c] * (float)(1.0 / 255.0) - clip->mean[c]) / clip->std[c];
    astrovl_image_free(&sized);
    return status;
}

// ---- the towers ----------------------------------------------------------------------------------------------------

// Rows of several images or texts, one sequence after the other, through the first n_layers layers, in place:
//     x += out attention(q h, k h, v h)    with h = layer_norm1(x)
//     x += fc2 activation(fc1 h)           with h = layer_norm2(x)
// x: [n][n_embd], the residual stream;   lengths: [n_sequences] rows of each, n in all; NULL: all the same
static astrovl_status avl__tower_run(const avl__tower *tower, avl__run *run, float *x, int n, const int *lengths,
                                     int n_sequences, int n_layers, astrovl_error *err) {
    const char *name = tower->is_text ? "text_model.encoder.layers" : "vision_model.encoder.layers";
    const char *what = tower->is_text ? "text" : "image";
    const int d = tower->n_embd, n_ff = tower->n_ff, n_reports = tower->is_text ? 0 : n_layers;
    const uint64_t n_wide = (uint64_t)n * d;
    float *h = avl__take(run, n_wide);                          // [n][n_embd]
    float *mixed = avl__take(run, n_wide);                      // [n][n_head][head_dim], and so q, k and v
    float *const qkv[] = {avl__take(run, n_wide), avl__take(run, n_wide), avl__take(run, n_wide)};
    float *hidden = avl__take(run, (uint64_t)n * n_ff);         // [n][n_ff]
    avl__attention a;
    memset(&a, 0, sizeof a);
    a.run = run;
    a.weights = run->options.tap ? avl__take(run, (uint64_t)tower->n_head * n * n) : NULL;   // [n_head][n][n]
    a.n_head = a.n_head_kv = tower->n_head;
    a.head_dim = d / tower->n_head;
    a.key_stride = (size_t)d;
    a.head_stride = (size_t)a.head_dim;
    a.causal = tower->is_text;
    for (int i = 0; i < n_layers; i++) {
        const avl__tower_layer *layer = &tower->layers[i];
        const avl__linear *const qkv_weights[] = {&layer->q, &layer->k, &layer->v};
        const astrovl_status status = avl__pass_status(run, what, i, n_reports, err);
        if (status) return status;
        avl__norm_rows(run, h, x, layer->norm1_weight, layer->norm1_bias, n, d, tower->eps);
        avl__tap(run, name, i, "layer_norm1", h, n, d);
        avl__apply_each(run, qkv, h, qkv_weights, 3, n);
        avl__tap(run, name, i, "self_attn.q_proj", qkv[0], n, d);
        avl__tap(run, name, i, "self_attn.k_proj", qkv[1], n, d);
        avl__tap(run, name, i, "self_attn.v_proj", qkv[2], n, d);
        a.is_coarse = avl__is_float_type(layer->q.type);
        size_t at = 0;
        for (int j = 0; j < n_sequences; j++, at += (size_t)a.n_rows * d) {
            a.n_rows = lengths ? lengths[j] : n / n_sequences;
            a.q = qkv[0] + at;
            a.k = qkv[1] + at;
            a.v = qkv[2] + at;
            a.out = mixed + at;
            avl__attention_run(&a, 1);
        }
        avl__tap3(run, name, i, "self_attn.attn_weights", a.weights, tower->n_head, n, n);
        avl__tap(run, name, i, "self_attn.context", mixed, n, d);
        avl__apply(run, h, mixed, &layer->out, n);
        avl__tap(run, name, i, "self_attn.out_proj", h, n, d);
        avl__add(x, h, (int64_t)n * d);

        avl__norm_rows(run, h, x, layer->norm2_weight, layer->norm2_bias, n, d, tower->eps);
        avl__tap(run, name, i, "layer_norm2", h, n, d);
        avl__apply(run, hidden, h, &layer->fc1, n);
        avl__tap(run, name, i, "mlp.fc1", hidden, n, n_ff);
        avl__activate(run, hidden, (int64_t)n * n_ff, tower->use_gelu ? run->kernels->gelu : run->kernels->quick_gelu,
                      NULL);
        avl__tap(run, name, i, "mlp.activation_fn", hidden, n, n_ff);
        avl__apply(run, h, hidden, &layer->fc2, n);
        avl__tap(run, name, i, "mlp.fc2", h, n, d);
        avl__add(x, h, (int64_t)n * d);
        avl__tap(run, name, i, "", x, n, d);
    }
    return avl__pass_status(run, what, n_layers, n_reports, err);
}

// Normed rows [n][n_embd] that stand for images or texts to the shared space.  embeddings: out, [n][n_embd_joint]
static astrovl_status avl__joint_run(const avl__tower *tower, avl__run *run, const float *rows, int n, int normalize,
                                     float *embeddings, astrovl_error *err) {
    const int n_dims = tower->projection.n_out;
    const char *name = tower->is_text ? "text_projection" : "visual_projection";
    if (tower->dense[0].weight) {
        const int n_hidden = tower->dense[0].n_out, n_out = tower->dense[1].n_out;
        float *hidden = avl__take(run, (uint64_t)n * n_hidden);
        float *out = avl__take(run, (uint64_t)n * n_out);
        avl__apply(run, hidden, rows, &tower->dense[0], n);
        for (int64_t i = 0; i < (int64_t)n * n_hidden && !run->failed; i++) {      // GELU as flax, PAPERCLIP's, has it
            const float x = hidden[i];
            hidden[i] = 0.5f * x * (1.0f + astrovl_tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));  // sqrt(2 / pi)
        }
        avl__tap(run, name, -1, "head.act", hidden, n, n_hidden);
        avl__apply(run, out, hidden, &tower->dense[1], n);
        avl__tap(run, name, -1, "head", out, n, n_out);
        rows = out;
    }
    avl__apply(run, embeddings, rows, &tower->projection, n);
    avl__tap(run, name, -1, "", embeddings, n, n_dims);
    for (int r = 0; r < n && normalize && !run->failed; r++, embeddings += n_dims) {
        const float length = (float)avl__sqrt((double)avl__dot_portable(embeddings, embeddings, n_dims));
        for (int i = 0; i < n_dims && length > 0.0f; i++) embeddings[i] /= length;
    }
    return avl__pass_status(run, "embeddings", 0, 0, err);
}

// n images through the first n_layers layers.  x: out, [n][1 + n_patches][n_embd]
static astrovl_status avl__clip_run(const avl__clip *clip, avl__run *run, const astrovl_image *images, int n,
                                    int n_layers, float *x, astrovl_error *err) {
    const int d = clip->tower.n_embd, p = clip->patch_size, s = clip->image_size, n_rows = 1 + clip->n_patches;
    float *pixels = avl__take(run, (uint64_t)3 * s * s);                       // [3][S][S]
    float *patches = avl__take(run, (uint64_t)clip->n_patches * 3 * p * p);    // [n_patches][3][P][P]
    for (int i = 0; i < n; i++, images++) {
        astrovl_status status = avl__pass_status(run, "image", 0, 0, err);
        if (!status) status = avl__clip_preprocess(clip, images, pixels, err);
        if (status) return status;
        avl__tap3(run, "pixel_values", -1, "", pixels, 3, s, s);
        float *row = x + (size_t)i * n_rows * d, *to = patches;
        for (int py = 0; py < s / p; py++)     // a convolution with stride P is a product over cut-out patches
            for (int px = 0; px < s / p; px++)
                for (int c = 0; c < 3; c++)
                    for (int y = 0; y < p; y++, to += p)
                        memcpy(to, pixels + ((size_t)c * s + py * p + y) * s + px * p, (size_t)p * sizeof(float));
        avl__apply(run, row + d, patches, &clip->patch_embd, clip->n_patches);
        avl__tap(run, "vision_model.embeddings", -1, "patch_embedding", row + d, clip->n_patches, d);
        memcpy(row, clip->class_embd, (size_t)d * sizeof(float));
        avl__add(row, clip->tower.position_embd, (int64_t)n_rows * d);
        avl__tap(run, "vision_model.embeddings", -1, "", row, n_rows, d);
        avl__norm_rows(run, row, row, clip->pre_norm_weight, clip->pre_norm_bias, n_rows, d, clip->tower.eps);
        avl__tap(run, "vision_model.pre_layrnorm", -1, "", row, n_rows, d);   // transformers' spelling
    }
    return avl__tower_run(&clip->tower, run, x, n * n_rows, NULL, n, n_layers, err);
}

// Rows of an embedding table: x[r] = table[tokens[r]].  x: out, [n][n_in of the table]
static void avl__embed_tokens(const avl__linear *table, const int32_t *tokens, int n, float *x) {
    const uint8_t *rows = (const uint8_t *)table->weight;
    for (int r = 0; r < n; r++, x += table->n_in)
        avl__dequantize_row(table->type, rows + (size_t)tokens[r] * table->row_bytes, x, table->n_in);
}

// ====================================================================================================================
// [9] LLaMA
// The language model (Touvron et al. 2023): a decoder of pre-norm layers on rows of n_embd numbers,
//     x += wo attention(rope(wq h), rope(wk h), wv h)   with h = rms_norm(x), attending to all earlier rows by a cache
//     x += w_down (silu(w_gate h) * w_up h)             with h = rms_norm(x)                 (SwiGLU, Shazeer 2020)
// then a norm and a product with the output matrix, which gives a logit for every token of the vocabulary. Names and
// keys: llama.cpp's GGUF files of architecture "llama" (LLaMA-1/2/3, Vicuna, SmolLM2 and others).
// ====================================================================================================================

typedef struct avl__llama_layer {
    const float *attention_norm, *ffn_norm;   // [n_embd]
    avl__linear  q, k, v, o;                  // q: [n_head head_dim][n_embd]; k, v: [n_head_kv head_dim][n_embd]
    avl__linear  gate, up, down;              // [n_ff][n_embd] twice, [n_embd][n_ff]
} avl__llama_layer;

typedef struct avl__llama {
    int   n_vocab, n_embd, n_layer, n_head, n_head_kv, head_dim, rope_dim, n_ff;
    float rms_norm_eps;
    avl__linear       token_embd;             // [n_vocab][n_embd]
    avl__linear       output;                 // [n_vocab][n_embd]; the same matrix where the file has none ("tied")
    const float      *output_norm;            // [n_embd]
    float            *inv_freq;               // [rope_dim / 2], owned
    avl__llama_layer *layers;                 // [n_layer], owned
} avl__llama;

// file: the one that holds the layers
static void avl__llama_load(avl__llama *m, avl__weights *w, const astrovl_gguf *file, astrovl_info *info) {
    const astrovl_string type = astrovl_gguf_string(file, astrovl_gguf_find_kv(file, "general.architecture"), 0);
    if (!avl__string_is(type, "llama"))
        avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "the language model is of architecture \"%.*s\"; this runs "
                       "\"llama\": take a model of that family", AVL__SHOW(type));
    const int d = info->n_embd = m->n_embd = (int)avl__load_value(w, 1, 1 << 20, -1, "llama.embedding_length");
    info->n_layer = m->n_layer = (int)avl__load_value(w, 1, 1024, -1, "llama.block_count");
    info->n_ctx_train = (int)avl__load_value(w, 1, 1 << 24, -1, "llama.context_length");
    const double window = avl__load_value(w, 0, 1e18, 0, "llama.attention.sliding_window");
    if (window >= 1 && window < info->n_ctx_train) info->n_ctx_train = (int)window;   // in it, attention is full
    info->n_ff = m->n_ff = (int)avl__load_value(w, 1, 1 << 22, -1, "llama.feed_forward_length");
    info->n_head = m->n_head = (int)avl__load_value(w, 1, d, -1, "llama.attention.head_count");
    info->n_head_kv = m->n_head_kv = (int)avl__load_value(w, 1, m->n_head, m->n_head, "llama.attention.head_count_kv");
    info->head_dim = m->head_dim = (int)avl__load_value(w, 2, 65536, d / m->n_head, "llama.attention.key_length");
    if ((int)avl__load_value(w, 1, 1e9, m->head_dim, "llama.attention.value_length") != m->head_dim)
        avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "llama.attention.value_length is not key_length");
    m->rope_dim = (int)avl__load_value(w, 2, m->head_dim, m->head_dim, "llama.rope.dimension_count");
    info->rope_theta = (float)avl__load_value(w, 1e-30, 1e30, 10000, "llama.rope.freq_base");
    info->rms_norm_eps = (float)avl__load_value(w, 0, 1, -1, "llama.attention.layer_norm_rms_epsilon");
    m->rms_norm_eps = info->rms_norm_eps;
    if (m->n_head % m->n_head_kv != 0 || m->rope_dim % 2 != 0 || (int64_t)m->n_head * m->head_dim > 1 << 20)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "%d query heads cannot share %d key heads of %d values (%d of "
                       "them rotated)", m->n_head, m->n_head_kv, m->head_dim, m->rope_dim);
    // RoPE's frequencies. LLaMA-3 stores a divisor for each (rope_freqs.weight); "linear" scaling, which is meant where
    // no type is named, divides all positions (in files of 2023 by rope.scale_linear; 0 stands for 1).
    const int half = m->rope_dim / 2, has_factors = avl__find_tensor(w, "rope_freqs.weight", NULL) != NULL;
    const float *factors = has_factors ? avl__load_vector(w, half, "rope_freqs.weight") : NULL;
    const double old_scale = avl__load_value(w, 0, 1e6, 0, "llama.rope.scale_linear");
    float linear_scale = (float)avl__load_value(w, 0, 1e6, old_scale, "llama.rope.scaling.factor");
    if (!(linear_scale > 0.0f) || avl__string_is(avl__load_string(w, "llama.rope.scaling.type"), "none"))
        linear_scale = 1.0f;
    m->inv_freq = avl__alloc_floats((uint64_t)half);
    m->layers = (avl__llama_layer *)avl__alloc((uint64_t)m->n_layer, sizeof *m->layers);
    if (!m->inv_freq || !m->layers)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MEMORY, "out of memory for the language model");
    if (!w->status) avl__rope_frequencies(m->inv_freq, m->rope_dim, info->rope_theta, factors, linear_scale);
    for (int i = 0; i < half && !w->status; i++)
        if (!(m->inv_freq[i] >= 0.0f && m->inv_freq[i] * (float)info->n_ctx_train < 8388608.0f))   // avl__sin's limit
            avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "in a context of %d tokens, the angles of the rotary "
                           "embedding (llama.rope.*, rope_freqs.weight) are negative or reach 2^23", info->n_ctx_train);
    m->token_embd = avl__load_linear(w, d, 0, "token_embd");
    info->n_vocab = m->n_vocab = m->token_embd.n_out;
    m->output_norm = avl__load_vector(w, d, "output_norm.weight");
    m->output = m->token_embd;
    if (avl__find_tensor(w, "output.weight", NULL)) m->output = avl__load_linear(w, d, m->n_vocab, "output");
    for (int i = 0; i < m->n_layer && !w->status; i++) {
        const int n_q = m->n_head * m->head_dim, n_kv = m->n_head_kv * m->head_dim;
        avl__llama_layer *layer = &m->layers[i];
        layer->q    = avl__load_linear(w, d, n_q, "blk.%d.attn_q", i);
        layer->k    = avl__load_linear(w, d, n_kv, "blk.%d.attn_k", i);
        layer->v    = avl__load_linear(w, d, n_kv, "blk.%d.attn_v", i);
        layer->o    = avl__load_linear(w, n_q, d, "blk.%d.attn_output", i);
        layer->gate = avl__load_linear(w, d, m->n_ff, "blk.%d.ffn_gate", i);
        layer->up   = avl__load_linear(w, d, m->n_ff, "blk.%d.ffn_up", i);
        layer->down = avl__load_linear(w, m->n_ff, d, "blk.%d.ffn_down", i);
        layer->attention_norm = avl__load_vector(w, d, "blk.%d.attn_norm.weight", i);
        layer->ffn_norm       = avl__load_vector(w, d, "blk.%d.ffn_norm.weight", i);
    }
}

// ---- the KV cache --------------------------------------------------------------------------------------------------
// Keys (already rotated) and values of every earlier position, so that a new token costs one row, not the whole text.

typedef struct avl__kv_cache {
    void  *k, *v;          // [n_layer][n_head_kv][n_ctx][head_dim], touched only as far as n_past
    size_t value_bytes;    // 4: float32; 2, in fast mode: float16, which takes half the time to read
    int    n_ctx, n_past;
} avl__kv_cache;

// cache: zeros.   0: out of memory
static int avl__kv_cache_init(avl__kv_cache *cache, const avl__llama *m, int n_ctx, size_t value_bytes) {
    const uint64_t n = (uint64_t)m->n_layer * (uint64_t)n_ctx * (uint64_t)(m->n_head_kv * m->head_dim);   // below 2^55
    cache->n_ctx = n_ctx;
    cache->value_bytes = value_bytes;
    cache->k = avl__alloc_raw(n + AVL__LINE, value_bytes);
    cache->v = avl__alloc_raw(n + AVL__LINE, value_bytes);
    return cache->k && cache->v;
}

static void avl__kv_cache_free(avl__kv_cache *cache) {
    astrovl_free(cache->k);
    astrovl_free(cache->v);
}

// Where a key (kv: cache->k) or value (cache->v) [head_dim] lies; that of the head's next position follows it.
static void *avl__kv_at(const avl__kv_cache *cache, const avl__llama *m, void *kv, int layer, int head, int position) {
    const size_t row = ((size_t)layer * m->n_head_kv + head) * cache->n_ctx + position;
    return (uint8_t *)avl__align(kv) + row * m->head_dim * cache->value_bytes;
}

// ---- the forward pass ----------------------------------------------------------------------------------------------
// The rows of a pass follow one another in one cache, or they belong to several conversations, a row each. Only
// attention depends on which cache a row belongs to; all else is done row by row, so that a step of many conversations
// reads every weight once.

enum { AVL__STEP_ROWS = 16 };   // conversations in a step, at most: up to so many rows, the kernels compute each as if
                                // it were alone, so an answer does not depend on what is written beside it

// What the steps of a layer need that depend on caches and heads
typedef struct avl__llama_pass {
    const avl__llama *m;
    avl__run         *run;
    avl__kv_cache *const *caches;   // [n_caches]: one for all rows, or one for each row (then at most AVL__STEP_ROWS)
    int    n_caches, n, n_each;     // rows, and rows of a cache
    int    layer;                   // the current one
    float *q, *mixed;               // [n][n_head][head_dim]
    float *k, *v;                   // [n][n_head_kv][head_dim], then copied to the caches
    float *cos_sin;                 // [n][rope_dim / 2][3]   of each row's angles, in all layers
    float *shown;                   // [n][n_head][head_dim], only for the tap
    float *weights;                 // [n_head][n][n_past + n], only for the tap, which sees one cache at a time
} avl__llama_pass;

// Rotates a row's query and key, and puts key and value into its cache.
static void avl__llama_row_item(void *context, int row, int thread) {
    const avl__llama_pass *p = (const avl__llama_pass *)context;
    const avl__llama *m = p->m;
    const avl__kv_cache *cache = p->caches[row / p->n_each];
    const int d = m->head_dim, position = cache->n_past + row % p->n_each;
    const float *cos_sin = p->cos_sin + (size_t)row * (size_t)(m->rope_dim / 2) * 3;
    float *k = p->k + (size_t)row * m->n_head_kv * d;
    const float *v = p->v + (size_t)row * m->n_head_kv * d;
    (void)thread;
    avl__rope_row(p->q + (size_t)row * m->n_head * d, m->n_head, d, m->rope_dim, cos_sin);
    avl__rope_row(k, m->n_head_kv, d, m->rope_dim, cos_sin);
    for (int i = 0; i < 2 * m->n_head_kv; i++) {        // each head's key, then its value
        const float *from = (i % 2 ? v : k) + (size_t)(i / 2) * d;
        void *to = avl__kv_at(cache, m, i % 2 ? cache->v : cache->k, p->layer, i / 2, position);
        if (cache->value_bytes == 2) p->run->kernels->to_halves((uint16_t *)to, from, d);
        else                         memcpy(to, from, (size_t)d * sizeof(float));
    }
}

// mixed = softmax(q k^T / sqrt(head_dim)) v over each row's cache
static void avl__llama_attend(const avl__llama_pass *p) {
    const avl__llama *m = p->m;
    const size_t q_row = (size_t)m->n_head * m->head_dim;
    avl__attention attentions[AVL__STEP_ROWS];
    memset(attentions, 0, sizeof attentions);
    for (int c = 0; c < p->n_caches; c++) {
        const avl__kv_cache *cache = p->caches[c];
        avl__attention *a = &attentions[c];
        a->run = p->run;
        a->q = p->q + (size_t)c * q_row;
        a->k = avl__kv_at(cache, m, cache->k, p->layer, 0, 0);
        a->v = avl__kv_at(cache, m, cache->v, p->layer, 0, 0);
        a->out = p->mixed + (size_t)c * q_row;
        a->weights = p->weights;
        a->n_rows = p->n_each;
        a->n_past = cache->n_past;
        a->n_head = m->n_head;
        a->n_head_kv = m->n_head_kv;
        a->head_dim = m->head_dim;
        a->key_stride = (size_t)m->head_dim;
        a->head_stride = (size_t)m->head_dim * (size_t)cache->n_ctx;
        a->causal = 1;
        a->is_half = cache->value_bytes == 2;
    }
    avl__attention_run(attentions, p->n_caches);
}

// Shows heads [n][n_head][head_dim] with each head's rotated values in transformers' order: GGUF keeps the pair
// (i, i + half) as neighbors, so that value 2i here is i there and 2i + 1 is i + half.
static void avl__llama_tap_heads(const avl__llama_pass *p, const char *name, const float *heads, int n_head) {
    const int d = p->m->head_dim, half = p->m->rope_dim / 2;
    const size_t n = (size_t)p->n * n_head * d;
    if (p->shown) memcpy(p->shown, heads, n * sizeof(float));
    for (size_t at = 0; at < n && p->shown; at += d)
        for (int i = 0; i < half; i++) {
            p->shown[at + i]        = heads[at + 2 * i];
            p->shown[at + i + half] = heads[at + 2 * i + 1];
        }
    avl__tap(p->run, "model.layers", p->layer, name, p->shown ? p->shown : heads, p->n, (int64_t)n_head * d);
}

// Appends n positions to one cache, or one to each of n caches (at most AVL__STEP_ROWS); the caller has checked that
// there is room. After a failure, the caches hold the positions they held before.
//   tokens [n], or NULL and embeddings [n][n_embd]
//   logits  out, [n_logits][n_vocab], of the last n_logits positions; of all if there are several caches
static astrovl_status avl__llama_eval(const avl__llama *m, avl__run *run, avl__kv_cache *const *caches, int n_caches,
                                      const int32_t *tokens, const float *embeddings, int n, float *logits,
                                      int n_logits, astrovl_error *err) {
    const int d = m->n_embd, half = m->rope_dim / 2, n_reports = n > n_caches ? m->n_layer : 0;
    const int n_q = m->n_head * m->head_dim, n_kv = m->n_head_kv * m->head_dim;
    const uint64_t rows = (uint64_t)n;
    const char *what = n > n_caches ? "prompt" : "answer", *name = "model.layers";
    avl__llama_pass p = {m, run, caches, n_caches, n, n / n_caches, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    avl__run_begin(run, 0);
    p.q = avl__take(run, rows * n_q);
    p.mixed = avl__take(run, rows * n_q);
    p.k = avl__take(run, rows * n_kv);
    p.v = avl__take(run, rows * n_kv);
    p.cos_sin = avl__take(run, rows * half * 3);
    if (run->options.tap) {
        p.shown = avl__take(run, rows * n_q);
        p.weights = avl__take(run, rows * m->n_head * (caches[0]->n_past + rows));
    }
    float *x = avl__take(run, rows * d);                // [n][n_embd]   the residual stream
    float *h = avl__take(run, rows * d);                // [n][n_embd]   what goes into a product or comes out of it
    float *gate = avl__take(run, rows * m->n_ff);       // [n][n_ff]
    float *up = avl__take(run, rows * m->n_ff);         // [n][n_ff]
    float *const qkv[] = {p.q, p.k, p.v}, *const gate_up[] = {gate, up};
    if (run->failed) return avl__pass_status(run, what, 0, 0, err);
    if (embeddings) memcpy(x, embeddings, (size_t)n * d * sizeof(float));
    else            avl__embed_tokens(&m->token_embd, tokens, n, x);
    avl__tap(run, "model.embed_tokens", -1, "", x, n, d);
    for (int row = 0; row < n; row++) {
        const float position = (float)(caches[row / p.n_each]->n_past + row % p.n_each);
        for (int i = 0; i < half; i++)
            avl__rope_cos_sin(p.cos_sin + ((size_t)row * half + i) * 3, position * m->inv_freq[i]);
    }
    for (int i = 0; i < m->n_layer; i++) {
        const avl__llama_layer *layer = &m->layers[i];
        const avl__linear *const qkv_weights[] = {&layer->q, &layer->k, &layer->v};
        const avl__linear *const gate_up_weights[] = {&layer->gate, &layer->up};
        p.layer = i;
        avl__norm_rows(run, h, x, layer->attention_norm, NULL, n, d, m->rms_norm_eps);
        avl__tap(run, name, i, "input_layernorm", h, n, d);
        avl__apply_each(run, qkv, h, qkv_weights, 3, n);
        avl__llama_tap_heads(&p, "self_attn.q_proj", p.q, m->n_head);
        avl__llama_tap_heads(&p, "self_attn.k_proj", p.k, m->n_head_kv);
        avl__tap(run, name, i, "self_attn.v_proj", p.v, n, n_kv);
        const astrovl_status status = avl__pass_status(run, what, i, n_reports, err);
        if (status) return status;                      // a failed product does not reach the caches
        avl__pool_run(run->pool, avl__llama_row_item, &p, n);
        avl__llama_tap_heads(&p, "self_attn.q_rope", p.q, m->n_head);
        avl__llama_tap_heads(&p, "self_attn.k_rope", p.k, m->n_head_kv);
        avl__llama_attend(&p);
        if (i == m->n_layer - 1 && !run->options.tap) {   // the rest is needed only for the rows with logits
            memmove(x, x + (size_t)(n - n_logits) * d, (size_t)n_logits * d * sizeof(float));
            memmove(p.mixed, p.mixed + (size_t)(n - n_logits) * n_q, (size_t)n_logits * n_q * sizeof(float));
            n = n_logits;
            if (n == 0) break;
        }
        avl__tap3(run, name, i, "self_attn.attn_weights", p.weights, m->n_head, n, caches[0]->n_past + n);
        avl__tap(run, name, i, "self_attn.context", p.mixed, n, n_q);
        avl__apply(run, h, p.mixed, &layer->o, n);
        avl__tap(run, name, i, "self_attn.o_proj", h, n, d);
        avl__add(x, h, (int64_t)n * d);

        avl__norm_rows(run, h, x, layer->ffn_norm, NULL, n, d, m->rms_norm_eps);
        avl__tap(run, name, i, "post_attention_layernorm", h, n, d);
        avl__apply_each(run, gate_up, h, gate_up_weights, 2, n);
        avl__tap(run, name, i, "mlp.gate_proj", gate, n, m->n_ff);
        avl__tap(run, name, i, "mlp.up_proj", up, n, m->n_ff);
        avl__activate(run, gate, (int64_t)n * m->n_ff, NULL, up);
        avl__tap(run, name, i, "mlp.act", gate, n, m->n_ff);
        avl__apply(run, h, gate, &layer->down, n);
        avl__tap(run, name, i, "mlp.down_proj", h, n, d);
        avl__add(x, h, (int64_t)n * d);
        avl__tap(run, name, i, "", x, n, d);
    }
    if (n_logits > 0) {
        avl__norm_rows(run, h, x + (size_t)(n - n_logits) * d, m->output_norm, NULL, n_logits, d, m->rms_norm_eps);
        avl__tap(run, "model.norm", -1, "", h, n_logits, d);
        avl__apply(run, logits, h, &m->output, n_logits);
        avl__tap(run, "lm_head", -1, "", logits, n_logits, m->n_vocab);
    }
    const astrovl_status status = avl__pass_status(run, what, m->n_layer, n_reports, err);
    for (int i = 0; i < n_caches && !status; i++) caches[i]->n_past += p.n_each;
    return status;
}

// ====================================================================================================================
// [10] VLM
// Opening a model's files, sessions that run it, and LLaVA (Liu et al. 2023) itself, which is three short steps. The
// vision tower turns an image into one row per patch; a projector brings each row to the language model's width; the
// rows stand in the sequence where the prompt says <image>, and are read as the rows of tokens are.
// ====================================================================================================================

struct astrovl_model {
    avl__weights     weights;
    astrovl_info     info;              // filled while opening
    avl__vocab       vocab;
    avl__llama       llama;
    avl__clip        clip;
    avl__clip_text   clip_text;
    avl__vocab       clip_vocab;        // the text tower's
    avl__linear      projector[2];      // W2 gelu(W1 x + b1) + b2  (mlp2x_gelu), or the first one alone (linear)
    int              n_projector;       // 0: none
    char            *jinja;             // tokenizer.chat_template
    const char      *system;            // the system text of a conversation that brings none; NULL: none
};

struct astrovl_session {
    const astrovl_model *model;
    avl__run            *run;           // shared with its forks
    avl__kv_cache        cache;         // n_ctx 0: the model has no language model
    avl__tokens          answer;        // the last answer's tokens
    int                  n_unread;      // tokens at the answer's end that the cache does not hold yet
    int                  n_turns;
    astrovl_stats        stats;
};

// ---- templates -----------------------------------------------------------------------------------------------------
// A turn is laid out as `turn`; before those after the first stands `between`. %p is `system_part` in a first turn with
// a system text, else nothing; %s the system text, %u the user's text with its images; %b and %e are the vocabulary's
// BOS and EOS (nothing where it has none), "% " its token for one space; {...} is a special token, which the vocabulary
// must have; (...) one that is written as text where it has none.

#define AVL__CURIOUS(who) "A chat between a curious " who " and an artificial intelligence assistant. The assistant " \
                          "gives helpful, detailed, and polite answers to the " who "'s questions."

typedef struct avl__template {
    const char *name;
    const char *system;          // the template's own system text; NULL: none
    const char *system_part, *turn, *between;
    const char *stop;            // text that ends an answer; "": tokens do
} avl__template;

static const avl__template avl__templates[] = {                     // in the order of astrovl_template
    {"auto", NULL, NULL, NULL, NULL, NULL},   // opening chooses one of the others; four are LLaVA's conversation.py
    {"vicuna_v1", AVL__CURIOUS("user"), "%s ", "%pUSER: %u ASSISTANT:", "%e", ""},
    {"llava_v1", AVL__CURIOUS("human"), "%s ", "%pUSER: %u ASSISTANT:", "%e", ""},
    {"llava_v0", AVL__CURIOUS("human"), "%s", "%p###Human: %u###Assistant:", "", "###"},
    {"llava_llama_2",
     "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
     "provides, and assist the user with a variety of tasks using natural language.",
     "<<SYS>>\n%s\n<</SYS>>\n\n", "[INST] %p%u [/INST]", "% %e%b", ""},
    {"llama_2", NULL, "<<SYS>>\n%s\n<</SYS>>\n\n", "[INST] %p%u [/INST]", "% %e%b", ""},
    {"mistral", NULL, "%s\n\n", "[INST] %p%u [/INST]", "%e", ""},   // mistralai/cookbook, tokenization: V1,
    {"mistral_v3", NULL, "%s\n\n", "{[INST]}%p%u{[/INST]}", "%e", ""},   // V2 and V3
    {"zephyr", NULL, "(<|system|>)\n%s%e\n", "%p(<|user|>)\n%u%e\n(<|assistant|>)\n", "%e\n", ""},
    {"llama_3", NULL, "{<|start_header_id|>}system{<|end_header_id|>}\n\n%s{<|eot_id|>}",
     "%p{<|start_header_id|>}user{<|end_header_id|>}\n\n%u{<|eot_id|>}{<|start_header_id|>}assistant{<|end_header_id|>}"
     "\n\n", "{<|eot_id|>}", ""},
    {"chatml", NULL, "{<|im_start|>}system\n%s{<|im_end|>}\n",
     "%p{<|im_start|>}user\n%u{<|im_end|>}\n{<|im_start|>}assistant\n", "{<|im_end|>}\n", ""},
    {"plain", NULL, "", "%u", "", ""}};

ASTROVL_API const char *astrovl_template_name(astrovl_template t) {
    return (unsigned)t <= ASTROVL_TEMPLATE_PLAIN ? avl__templates[t].name : "unknown";
}

ASTROVL_API int astrovl_template_from_name(const char *name) {
    for (int t = 0; name && t <= ASTROVL_TEMPLATE_PLAIN; t++)
        if (strcmp(avl__templates[t].name, name) == 0) return t;
    return -1;
}

// Which template a model's Jinja source is, by the last row of which it has `mark`, and `then` behind it in the same
// expression.  AUTO: none of these
static int avl__find_template(const char *jinja) {
    static const struct { const char *mark, *then, *name; } rows[] = {
        {"ASSISTANT:", "", "vicuna_v1"}, {"SYSTEM: ", "", "auto"}, {"curious human", "", "llava_v1"},
        {"USER: ", "\n'", "auto"}, {"USER: ", "\\n'", "auto"}, {"'ASSISTANT: ' }", "", "auto"},
        {"'ASSISTANT: '}", "", "auto"}, {"###Human:", "", "llava_v0"}, {"[INST]", "", "mistral"},
        {"<<SYS>>", "", "auto"}, {"bos_token", "[INST]", "llama_2"}, {"[INST] '", "'[/INST]'", "mistral_v3"},
        {"[AVAILABLE_TOOLS]", "", "mistral_v3"}, {"[SYSTEM_PROMPT]", "", "auto"},
        {"<|user|>", "eos_token }}\n", "zephyr"}, {"<|user|>", "eos_token + '\\n", "zephyr"},
        {"<|im_start|>", "role", "chatml"}, {"<|im_start|>system", "", "chatml"}, {"<|im_sep|>", "", "auto"},
        {"<end_of_utterance>", "", "auto"}, {"<|start_header_id|>", "", "llama_3"},
        {"system_message = 'You", "", "auto"}, {"system_message = \"You", "", "auto"}, {"function calling", "", "auto"},
        {"assistant\\n<think>", "", "auto"}, {"/no_think", "", "auto"}, {"functions", "", "auto"}};
    const char *name = "auto";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (const char *at = strstr(jinja, rows[i].mark); at; at = strstr(at, rows[i].mark))
            for (const char *end = at + strcspn(at, "}"); at < end; at++)
                if (avl__begins(at, rows[i].then)) name = rows[i].name;
    return astrovl_template_from_name(name);
}

// The system text that a chatml template writes when a conversation brings none, in the model's own Jinja source: what
// stands there between <|im_start|>system, a line's end (as such, or written \n) and <|im_end|>, if it is plain text.
// It is zero-terminated in place.  NULL: none
static const char *avl__chatml_system(char *jinja) {
    static const char start[] = "<|im_start|>system";
    for (char *text = jinja; (text = strstr(text, start)) != NULL;) {
        char *end = strstr(text, "<|im_end|>");
        text += sizeof start - 1;
        if (!end || text + strcspn(text, "'\"") < end) continue;
        *end = 0;
        return *text == '\n' ? text + 1 : strncmp(text, "\\n", 2) == 0 ? text + 2 : NULL;
    }
    return NULL;
}

// ---- opening a model -----------------------------------------------------------------------------------------------

// Keys whose value, where a file has them, must be one of these, and what to do about another.
static const struct { const char *key, *known, *advice; } avl__known_values[] = {
    {"general.type", "'model' 'mmproj'", "give a model; merge a LoRA adapter into its own"},
    {"llama.expert_count", "'0'", "take a model that is no mixture of experts"},
    {"llama.attention.causal", "'1'", "take a model that writes text, not one for embeddings"},
    {"llama.rope.scaling.type", "'none' 'linear'", "take the model as it was before its context was extended"},
    {"llama.rope.scaling.attn_factor", "'1'", "take the model as it was before its context was extended"},
    {"clip.use_silu", "'0'", "take a CLIP tower, which has GELU or quick-GELU"},
    {"clip.projector_type", "'mlp' 'linear'", "take a model built like LLaVA-1.5"},
    {"clip.vision.projector_type", "'mlp' 'linear'", "take a model built like LLaVA-1.5"},
    {"clip.vision.mm_patch_merge_type", "'flat'", "take LLaVA-1.5; 1.6 cuts images into tiles"},
    {"clip.vision.image_grid_pinpoints", "no list", "take LLaVA-1.5; 1.6 cuts images into tiles"},
    {"clip.vision.image_aspect_ratio", "'pad' 'square' 'crop'", "take LLaVA-1.5; 1.6 cuts images into tiles"}};

// Counts what a file holds, and refuses what would otherwise be passed over silently.
static void avl__open_file(astrovl_model *m, const astrovl_gguf *file) {
    avl__weights *w = &m->weights;
    for (size_t i = 0; i < sizeof avl__known_values / sizeof *avl__known_values; i++) {
        const char *key = avl__known_values[i].key, *known = avl__known_values[i].known;
        const int index = astrovl_gguf_find_kv(file, key);
        const astrovl_kv *kv = astrovl_gguf_kv(file, index);
        const astrovl_string text = astrovl_gguf_string(file, index, 0);
        char value[100];
        if (!kv || kv->count == 0 || (kv->item_type == ASTROVL_VALUE_STRING && text.size == 0)) continue;
        if (text.size) avl__format(value, sizeof value, "'%.*s'", AVL__SHOW(text));
        else           avl__format(value, sizeof value, "'%.9g'", astrovl_gguf_float(file, index, 0));
        if (!strstr(known, value))
            avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "%s is %s; known: %s; %s", key, value, known,
                           avl__known_values[i].advice);
    }
    const int n_parts = (int)astrovl_gguf_int(file, astrovl_gguf_find_kv(file, "split.count"), 0);
    if (n_parts > w->n_files)
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "this is one of %d files of a model (split.count): give all, or "
                       "join them (llama-gguf-split --merge FIRST.gguf WHOLE.gguf)", n_parts);
    for (int i = 0; i < astrovl_gguf_n_tensors(file); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
        const astrovl_gguf *first = file;
        avl__find_tensor(w, t->name, &first);
        if (first != file)
            avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "the tensor %s is also in %s: give only one of the two models",
                           t->name, astrovl_gguf_name(first));
        if (strstr(t->name, "image_newline") ||
            (avl__begins(t->name, "mm.") && !avl__begins(t->name, "mm.0.") && !avl__begins(t->name, "mm.2.")))
            avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "the tensor %s is of another projector than LLaVA-1.5's "
                           "(Yi-VL's has norms, LLaVA-1.6's tiles): take LLaVA-1.5", t->name);
        m->info.n_params += (uint64_t)t->ne[0] * (uint64_t)t->ne[1] * (uint64_t)t->ne[2] * (uint64_t)t->ne[3];
        m->info.n_weight_bytes += t->n_bytes;
    }
}

// mm.0 and mm.2 of an mmproj file (1 is the GELU between them, without weights); mm.0 alone is LLaVA-1.0's linear one.
static void avl__open_projector(astrovl_model *m) {
    avl__weights *w = &m->weights;
    const astrovl_gguf *file = NULL;
    if (!avl__find_tensor(w, "mm.0.weight", &file)) return;
    if (m->vocab.n_tokens && avl__vocab_find(&m->vocab, "<im_start>", 10) >= 0)
        avl__load_fail(w, file, ASTROVL_ERROR_UNSUPPORTED, "this model wants the tokens <im_start> and <im_end> around "
                       "an image (mm_use_im_start_end), which only early versions of LLaVA did");
    m->n_projector = avl__find_tensor(w, "mm.2.weight", NULL) ? 2 : 1;
    int n = m->clip.tower.n_embd;
    for (int i = 0; i < m->n_projector; i++) {
        m->projector[i] = avl__load_linear(w, n, 0, "mm.%d", 2 * i);
        n = m->projector[i].n_out;
    }
    if (m->info.has_text && n != m->llama.n_embd)
        avl__load_fail(w, file, ASTROVL_ERROR_MODEL, "the projector gives rows of %d values, the language model reads "
                       "%d; these files belong to different models", n, m->llama.n_embd);
    m->info.has_projector = 1;
    m->info.n_embd = n;            // also without a language model: the caller sizes astrovl_encode_image's rows by it
    m->info.n_image_tokens = m->clip.n_patches;
}

// The text tower. Its vocabulary stands under keys of its own where the file has a language model as well, else where
// clip.cpp puts it.
static void avl__open_clip_text(astrovl_model *m) {
    avl__weights *w = &m->weights;
    const float *scale = avl__find_tensor(w, "logit_scale", NULL) ? avl__load_vector(w, 1, "logit_scale") : NULL;
    m->info.logit_scale = scale ? astrovl_expf(scale[0]) : 100.0f;   // CLIP's own; clip.cpp's files leave it out
    if (!(m->info.logit_scale > 0.0f && m->info.logit_scale <= FLT_MAX))
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "logit_scale is out of range");
    const astrovl_gguf *part = w->part = avl__find_part(w, "t.");
    if (!part) return;
    avl__clip_text_load(&m->clip_text, w, &m->info);
    int index;
    const astrovl_gguf *file = avl__find_key(w, "clip.text.tokenizer.ggml.tokens", &index);
    const char *keys = file ? "clip.text.tokenizer.ggml." : "tokenizer.ggml.";
    if (!w->status) w->status = avl__vocab_load(&m->clip_vocab, file ? file : part, keys, 1, w->err);
    if (m->clip_vocab.n_tokens > m->clip_text.token_embd.n_out)
        avl__load_fail(w, part, ASTROVL_ERROR_MODEL, "the text tower's vocabulary has %d tokens, t.token_embd.weight "
                       "only %d rows", m->clip_vocab.n_tokens, m->clip_text.token_embd.n_out);
}

// Loads all parts that the files hold.
static void avl__open_parts(astrovl_model *m, int chat_template) {
    avl__weights *w = &m->weights;
    astrovl_info *info = &m->info;
    int index;
    const astrovl_gguf *file = avl__find_key(w, "tokenizer.ggml.model", &index);
    if (file) w->status = avl__vocab_load(&m->vocab, file, "tokenizer.ggml.", 0, w->err);
    info->has_vocab = file != NULL;
    info->n_vocab = m->vocab.n_tokens;
    info->bos_token = file ? m->vocab.bos : -1;
    info->eos_token = file ? m->vocab.eos : -1;
    const astrovl_gguf *layers = avl__find_part(w, "blk.");
    info->has_text = layers != NULL;
    w->part = layers;
    if (layers) avl__llama_load(&m->llama, w, layers, info);
    if (layers && m->vocab.n_tokens > m->llama.n_vocab)
        avl__load_fail(w, layers, ASTROVL_ERROR_MODEL, "the vocabulary has %d tokens, token_embd.weight only %d rows",
                       m->vocab.n_tokens, m->llama.n_vocab);
    w->part = avl__find_part(w, "v.");
    info->has_vision = w->part != NULL;
    if (info->has_vision) avl__clip_load(&m->clip, w, info);
    if (info->has_vision) avl__open_projector(m);
    avl__open_clip_text(m);
    if (!info->has_vocab && !info->has_text && !info->has_vision && !info->has_joint_text)
        avl__load_fail(w, NULL, ASTROVL_ERROR_MODEL, "holds no part of a model that this header knows (no vocabulary, "
                       "no LLaMA, no CLIP tower)");
    const astrovl_string name = avl__load_string(w, "general.name");
    const astrovl_string jinja = avl__load_string(w, "tokenizer.chat_template");
    info->name = avl__copy_text(name.data, name.size);
    m->jinja = avl__copy_text(jinja.data, jinja.size);
    if (!info->name || !m->jinja) avl__load_fail(w, NULL, ASTROVL_ERROR_MEMORY, "out of memory for a model");
    info->note = m->vocab.note ? m->vocab.note : m->clip_vocab.note;
    if (chat_template == ASTROVL_TEMPLATE_AUTO && jinja.size && m->jinja) {
        chat_template = avl__find_template(m->jinja);
        if (chat_template == ASTROVL_TEMPLATE_LLAMA2 && m->n_projector) chat_template = ASTROVL_TEMPLATE_LLAVA_LLAMA2;
        if (chat_template == ASTROVL_TEMPLATE_LLAMA3 && strstr(m->jinja, "Cutting Knowledge"))
            info->note = "the dates that LLaMA 3.1's template writes before the system text are left out";
    } else if (chat_template == ASTROVL_TEMPLATE_AUTO)             // LLaVA-1.5's files often carry no template
        chat_template = m->n_projector ? ASTROVL_TEMPLATE_VICUNA : ASTROVL_TEMPLATE_PLAIN;
    info->chat_template = (astrovl_template)chat_template;
    m->system = avl__templates[chat_template].system;
    if (m->jinja && chat_template == ASTROVL_TEMPLATE_CHATML) m->system = avl__chatml_system(m->jinja);
}

// Opens n files by their paths or, if these are NULL, in memory.
static astrovl_model *avl__open(const char *const *paths, const astrovl_memory *blocks, int n,
                                const astrovl_open_options *options, astrovl_error *err) {
    const int chat_template = options ? options->chat_template : ASTROVL_TEMPLATE_AUTO;
    if (n < 1 || (!paths && !blocks) || (unsigned)chat_template > ASTROVL_TEMPLATE_PLAIN) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no model file was given, or chat_template is %d", chat_template);
        return NULL;
    }
    astrovl_model *m = (astrovl_model *)avl__alloc(1, sizeof *m);
    if (m) m->weights.files = (astrovl_gguf **)avl__alloc((uint64_t)n, sizeof *m->weights.files);
    if (!m || !m->weights.files) {
        astrovl_free(m);
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a model");
        return NULL;
    }
    avl__weights *w = &m->weights;
    w->err = err;
    for (int i = 0; i < n && !w->status; i++) {
        w->files[i] = paths ? astrovl_gguf_open(paths[i], options ? options->no_mmap : 0, err)
                            : astrovl_gguf_open_memory(blocks[i].data, blocks[i].size, blocks[i].name, err);
        if (w->files[i]) w->n_files++;
        else w->status = ASTROVL_ERROR_FILE;                       // or another, which err has
    }
    for (int i = 0; i < w->n_files && !w->status; i++) avl__open_file(m, w->files[i]);
    if (!w->status) avl__open_parts(m, chat_template);
    w->err = NULL;
    if (!w->status) return m;
    astrovl_close(m);
    return NULL;
}

ASTROVL_API astrovl_model *astrovl_open_files(const char *const *paths, int n_paths,
                                              const astrovl_open_options *options, astrovl_error *err) {
    return avl__open(paths, NULL, n_paths, options, err);
}

ASTROVL_API astrovl_model *astrovl_open(const char *path, const astrovl_open_options *options, astrovl_error *err) {
    return avl__open(&path, NULL, 1, options, err);
}

ASTROVL_API astrovl_model *astrovl_open_memory(const astrovl_memory *blocks, int n_blocks,
                                               const astrovl_open_options *options, astrovl_error *err) {
    return avl__open(NULL, blocks, n_blocks, options, err);
}

ASTROVL_API void astrovl_close(astrovl_model *model) {
    if (!model) return;
    avl__vocab_free(&model->vocab);
    astrovl_free(model->llama.layers);
    astrovl_free(model->llama.inv_freq);
    avl__vocab_free(&model->clip_vocab);
    astrovl_free(model->clip.tower.layers);
    astrovl_free(model->clip_text.tower.layers);
    astrovl_free((void *)model->info.name);
    astrovl_free(model->jinja);
    for (size_t i = 0; i < model->weights.n_vectors; i++) astrovl_free(model->weights.vectors[i]);
    astrovl_free(model->weights.vectors);
    for (int f = 0; f < model->weights.n_files; f++) astrovl_gguf_close(model->weights.files[f]);
    astrovl_free(model->weights.files);
    astrovl_free(model);
}

ASTROVL_API int astrovl_n_files(const astrovl_model *model) { return model ? model->weights.n_files : 0; }

ASTROVL_API const astrovl_gguf *astrovl_file(const astrovl_model *model, int index) {
    return index >= 0 && index < astrovl_n_files(model) ? model->weights.files[index] : NULL;
}

ASTROVL_API void astrovl_get_info(const astrovl_model *model, astrovl_info *info) {
    if (!info) return;
    memset(info, 0, sizeof *info);
    info->name = "";
    if (model) *info = model->info;
}

// The parts of a model that a call may need, in the order of avl__need's list.
enum {
    AVL__PART_TEXT = 1, AVL__PART_VOCAB = 2, AVL__PART_VISION = 4, AVL__PART_PROJECTOR = 8,
    AVL__PART_JOINT_IMAGE = 16, AVL__PART_JOINT_TEXT = 32
};

// MODEL, with the first part in words that the model lacks.  model: NULL: ARGUMENT
static astrovl_status avl__need(const astrovl_model *model, int parts, astrovl_error *err) {
    static const char *const lacks[] = {
        "no language model (token_embd.weight, blk.*) in the model's files; give the text model's file too",
        "no vocabulary (tokenizer.ggml.*) in the model's files",
        "no vision tower (v.* tensors) in the model's files; give the mmproj file too",
        "no projector (mm.0.weight) in the model's files",
        "images cannot be embedded: no vision tower with visual_projection.weight in the model's files",
        "texts cannot be embedded: no CLIP text tower (t.*) in the model's files"};
    if (!model) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no model or session was given");
    const astrovl_info *info = &model->info;
    const int has[] = {info->has_text, info->has_vocab, info->has_vision, info->has_projector, info->has_joint_image,
                       info->has_joint_text};
    for (int i = 0; i < 6; i++)
        if ((parts & 1 << i) && !has[i])
            return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: %s", astrovl_gguf_name(model->weights.files[0]), lacks[i]);
    return ASTROVL_OK;
}

// ---- text, by the model's vocabulary -------------------------------------------------------------------------------

static int avl__tokenize(const astrovl_model *model, int part, const char *text, size_t size, int flags,
                         int32_t *tokens, int capacity, astrovl_error *err) {
    avl__tokens list = {NULL, 0, 0};
    if (avl__need(model, part, err) != ASTROVL_OK) return -1;
    if ((!text && size) || (!tokens && capacity > 0)) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no text or no room for its tokens was given");
        return -1;
    }
    const avl__vocab *vocab = part == AVL__PART_VOCAB ? &model->vocab : &model->clip_vocab;
    const astrovl_status status = avl__vocab_encode(vocab, text, size, flags, &list, err);
    const int n = (int)list.size;                      // a byte gives at most 3 tokens, and 2^29 bytes are the limit
    if (n && capacity > 0) memcpy(tokens, list.data, (size_t)(n < capacity ? n : capacity) * sizeof *tokens);
    astrovl_free(list.data);
    return status ? -1 : n;
}

ASTROVL_API int astrovl_tokenize(const astrovl_model *model, const char *text, size_t size, int flags, int32_t *tokens,
                                 int capacity, astrovl_error *err) {
    return avl__tokenize(model, AVL__PART_VOCAB, text, size, flags, tokens, capacity, err);
}

ASTROVL_API astrovl_string astrovl_token_piece(const astrovl_model *model, int32_t token) {
    return model ? avl__vocab_piece(&model->vocab, token) : avl__string("", 0);
}

ASTROVL_API int astrovl_token_text(const astrovl_model *model, int32_t token, char *text, int capacity) {
    return model ? avl__vocab_token_bytes(&model->vocab, token, text, text ? capacity : 0) : 0;
}

ASTROVL_API int astrovl_token_is_end(const astrovl_model *model, int32_t token) {
    return model ? avl__vocab_is_end(&model->vocab, token) : 0;
}

ASTROVL_API char *astrovl_detokenize(const astrovl_model *model, const int32_t *tokens, int n_tokens,
                                     astrovl_error *err) {
    if (avl__need(model, AVL__PART_VOCAB, err) != ASTROVL_OK) return NULL;
    if (!tokens && n_tokens > 0) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no tokens were given");
        return NULL;
    }
    const avl__vocab *vocab = &model->vocab;
    avl__bytes text = {NULL, 0, 0, 0};
    int32_t first = -1;                                // the first token that gives text
    avl__bytes_put(&text, "", 0);
    for (int i = 0; i < n_tokens; i++) {
        if (text.size == 0) first = tokens[i];
        avl__put_token(vocab, tokens[i], &text);
    }
    if (text.failed) {
        astrovl_free(text.data);
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the text of %d tokens", n_tokens);
        return NULL;
    }
    if (text.size && *text.data == ' ' && vocab->add_space_prefix && vocab->types[first] != AVL__TOKEN_BYTE)
        memmove(text.data, text.data + 1, text.size);  // without the space put before a text (which is not <0x20>)
    return text.data;
}

// ---- sessions ------------------------------------------------------------------------------------------------------

// A session with a KV cache of its own.  parent: whose run it shares; NULL: none;   n_ctx: 0: the default
static astrovl_session *avl__session_new(const astrovl_model *model, const astrovl_session *parent,
                                         const astrovl_session_options *options, int n_ctx, astrovl_error *err) {
    astrovl_session_options o;
    if (avl__need(model, 0, err) != ASTROVL_OK) return NULL;
    const int n_train = model->info.n_ctx_train;   // NOLINT: avl__need refuses NULL
    memset(&o, 0, sizeof o);
    if (options) o = *options;
    if (!n_ctx)
        n_ctx = parent ? parent->cache.n_ctx : n_train < ASTROVL_DEFAULT_CONTEXT ? n_train : ASTROVL_DEFAULT_CONTEXT;
    const avl__kernels *kernels = avl__choose_kernels(o.mode, o.isa);
    if (o.n_threads < 0 || (o.mode != ASTROVL_FAST && o.mode != ASTROVL_EXACT) || !kernels || n_ctx < 0 ||
        (model->info.has_text && n_ctx > n_train)) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "session options out of range: mode %d, n_threads %d, n_ctx %d (the "
                  "model, or its sliding window, has %d), isa \"%s\" (portable; x86-64: avx2, avx_vnni, avx512, "
                  "avx512_bf16; AArch64: neon, neon_dotprod; others: generic)", (int)o.mode, o.n_threads, n_ctx,
                  n_train, o.isa ? o.isa : "NULL");
        return NULL;
    }
    astrovl_session *s = (astrovl_session *)avl__alloc(1, sizeof *s);
    if (s) s->run = parent ? parent->run : (avl__run *)avl__alloc(1, sizeof *s->run);
    if (s && s->run) {
        avl__run *run = s->run;
        if (!parent) {
            run->kernels = kernels;
            run->options = o;
            run->pool = avl__pool_new(o.n_threads);
        }
        run->n_sessions++;
        s->model = model;
        if (run->pool && !model->info.has_text) return s;
        if (run->pool && avl__kv_cache_init(&s->cache, &model->llama, n_ctx, run->kernels->attend ? 2 : 4)) return s;
    }
    astrovl_session_free(s);
    avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a session; ask for less context than %d tokens", n_ctx);
    return NULL;
}

ASTROVL_API astrovl_session *astrovl_session_new(const astrovl_model *model, const astrovl_session_options *options,
                                                 astrovl_error *err) {
    const char *obstacle = options && options->mode == ASTROVL_EXACT ? avl__why_inexact() : NULL;
    if (obstacle) avl__fail(err, ASTROVL_ERROR_UNSUPPORTED, "exact mode is impossible here: %s", obstacle);
    return obstacle ? NULL : avl__session_new(model, NULL, options, options ? options->n_ctx : 0, err);
}

ASTROVL_API astrovl_session *astrovl_session_fork(const astrovl_session *parent, int n_ctx, astrovl_error *err) {
    return avl__session_new(parent ? parent->model : NULL, parent, NULL, n_ctx, err);
}

ASTROVL_API void astrovl_session_free(astrovl_session *s) {
    if (!s) return;
    if (s->run && --s->run->n_sessions == 0) {
        avl__run_free(s->run);
        astrovl_free(s->run);
    }
    avl__kv_cache_free(&s->cache);
    astrovl_free(s->answer.data);
    astrovl_free(s);
}

ASTROVL_API astrovl_status astrovl_session_rewind(astrovl_session *s, int n_past, astrovl_error *err) {
    if (!s || n_past < 0 || n_past > s->cache.n_past)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "rewind to %d of %d tokens", n_past, astrovl_session_n_past(s));
    if (n_past < s->cache.n_past) s->n_unread = 0;
    s->cache.n_past = n_past;
    return ASTROVL_OK;
}

ASTROVL_API void astrovl_session_reset(astrovl_session *s) {
    if (!s) return;
    astrovl_session_rewind(s, 0, NULL);
    s->n_turns = 0;
    s->answer.size = 0;
}

ASTROVL_API int astrovl_session_n_past(const astrovl_session *s) { return s ? s->cache.n_past : 0; }
ASTROVL_API int astrovl_session_n_ctx(const astrovl_session *s) { return s ? s->cache.n_ctx : 0; }

ASTROVL_API void astrovl_get_stats(const astrovl_session *s, astrovl_stats *stats) {
    if (stats) memset(stats, 0, sizeof *stats);
    if (stats && s) *stats = s->stats;
}

ASTROVL_API const int32_t *astrovl_answer_tokens(const astrovl_session *s, int *n_tokens) {
    if (n_tokens) *n_tokens = s ? (int)s->answer.size : 0;
    return s ? s->answer.data : NULL;
}

// ---- images to rows ------------------------------------------------------------------------------------------------

ASTROVL_API astrovl_status astrovl_preprocess(const astrovl_model *model, const astrovl_image *image, float *pixels,
                                              astrovl_error *err) {
    astrovl_status status = avl__need(model, AVL__PART_VISION, err);
    if (!status && !pixels) status = avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no room for the pixels was given");
    return status ? status : avl__clip_preprocess(&model->clip, image, pixels, err);
}

// features = W2 gelu(W1 x + b1) + b2, x the tower's rows of the patches        LLaVA-1.5, section 3.4
ASTROVL_API astrovl_status astrovl_encode_image(astrovl_session *s, const astrovl_image *image, float *features,
                                                astrovl_error *err) {
    const astrovl_model *m = s ? s->model : NULL;
    astrovl_status status = avl__need(m, AVL__PART_VISION | AVL__PART_PROJECTOR, err);
    if (!status && !features) status = avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no room for the image's rows was given");
    if (status) return status;
    const avl__clip *clip = &m->clip;
    const avl__linear *first = &m->projector[0], *second = &m->projector[1];
    const int n = clip->n_patches, n_embd = clip->tower.n_embd, n_hidden = first->n_out;
    const int is_mlp = m->n_projector == 2;
    const char *name = "multi_modal_projector";
    avl__run *run = s->run;
    avl__run_begin(run, 1);
    float *x = avl__take(run, (uint64_t)(1 + n) * n_embd);             // [1 + n][n_embd]
    float *hidden = is_mlp ? avl__take(run, (uint64_t)n * n_hidden) : features;   // [n][n_hidden]
    status = avl__clip_run(clip, run, image, 1, clip->n_run, x, err);
    if (status) return status;
    x += n_embd;                                                       // without the class row
    avl__tap(run, "image_features", -1, "", x, n, n_embd);
    avl__apply(run, hidden, x, first, n);
    avl__tap(run, name, -1, is_mlp ? "linear_1" : "linear", hidden, n, n_hidden);
    if (is_mlp) {
        avl__activate(run, hidden, (int64_t)n * n_hidden, run->kernels->gelu, NULL);
        avl__tap(run, name, -1, "act", hidden, n, n_hidden);
        avl__apply(run, features, hidden, second, n);
        avl__tap(run, name, -1, "linear_2", features, n, second->n_out);
    }
    return avl__pass_status(run, "image", 0, 0, err);
}

// ---- rows through the language model -------------------------------------------------------------------------------

// A long prompt is read in blocks of 512 positions, so that memory for activations stays small; in exact mode, the
// logits are the same.   tokens, rows: one of them is NULL
static astrovl_status avl__eval(astrovl_session *s, const int32_t *tokens, const float *rows, int n, float *logits,
                                int n_logits, astrovl_error *err) {
    astrovl_status status = avl__need(s ? s->model : NULL, AVL__PART_TEXT, err);
    if (status) return status;
    const avl__llama *llama = &s->model->llama;
    avl__kv_cache *cache = &s->cache;
    const int n_before = cache->n_past;
    if ((!tokens && !rows) || n < 1 || n_logits < 0 || n_logits > n || (n_logits > 0 && !logits))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%d tokens or rows, %d rows of logits, or NULL", n, n_logits);
    if (n > cache->n_ctx - n_before)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "the context is full: it holds %d positions, %d are taken, and %d "
                         "more are needed; n_ctx (-c) can be up to %d for this model", cache->n_ctx, n_before, n,
                         s->model->info.n_ctx_train);
    for (int i = 0; tokens && i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= llama->n_vocab)
            return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "token %d; the model has %d", (int)tokens[i], llama->n_vocab);
    for (int done = 0, n_block; done < n && !status; done += n_block) {
        n_block = n - done < 512 ? n - done : 512;
        int n_wanted = done + n_block - (n - n_logits);          // rows of this block that logits are wanted of
        n_wanted = n_wanted < 0 ? 0 : n_wanted > n_block ? n_block : n_wanted;
        status = avl__llama_eval(llama, s->run, &cache, 1, tokens ? tokens + done : NULL,
                                 rows ? rows + (size_t)done * llama->n_embd : NULL, n_block, logits, n_wanted, err);
        if (n_wanted) logits += (size_t)n_wanted * llama->n_vocab;
    }
    if (status) cache->n_past = n_before;
    return status;
}

ASTROVL_API astrovl_status astrovl_eval_tokens(astrovl_session *s, const int32_t *tokens, int n_tokens, float *logits,
                                               int n_logits, astrovl_error *err) {
    return avl__eval(s, tokens, NULL, n_tokens, logits, n_logits, err);
}

ASTROVL_API astrovl_status astrovl_eval_embeddings(astrovl_session *s, const float *rows, int n_rows, float *logits,
                                                   int n_logits, astrovl_error *err) {
    return avl__eval(s, NULL, rows, n_rows, logits, n_logits, err);
}

// ---- prompts -------------------------------------------------------------------------------------------------------
// A turn is laid out as the template says, into tokens where -1 - i stands for image i. Text between images and special
// tokens is tokenized as one part, as LLaVA's tokenizer_image_token does; the template's own special tokens are put in
// as such, so that "<|im_end|>" in a user's text remains ten characters.

typedef struct avl__prompt {
    astrovl_turn *turn;       // whose err keeps the first failure
    const astrovl_generation *options;
    const char   *system, *system_part;
    avl__bytes    text;       // of the part under way
    avl__tokens  *tokens;
} avl__prompt;

// Ends the part under way, and puts a token after it.  INT32_MIN: none
static void avl__prompt_token(avl__prompt *p, int32_t token) {
    astrovl_error *err = &p->turn->err;
    if (err->status) return;
    if (p->text.size)
        avl__vocab_encode(&p->turn->session->model->vocab, p->text.data, p->text.size,
                          p->options->parse_special ? ASTROVL_PARSE_SPECIAL : 0, p->tokens, err);
    p->text.size = 0;
    if (p->text.failed || (token != INT32_MIN && !avl__tokens_put(p->tokens, token)))
        avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the prompt");
}

// The user's text with its images: at their marks, or all before the text, each on a line of its own.
static void avl__prompt_user(avl__prompt *p) {
    static const char image[] = "<image>";
    const char *text = p->turn->text;
    const size_t size = strlen(image);
    const int n_images = p->turn->n_images;
    int n_marks = 0;
    for (const char *mark = text; (mark = strstr(mark, image)) != NULL; mark += size) n_marks++;
    if (n_marks && n_images && n_marks != n_images)
        avl__fail(&p->turn->err, ASTROVL_ERROR_ARGUMENT, "%d <image> marks in the text, %d images", n_marks, n_images);
    for (int i = 0; i < n_images && !p->turn->err.status; i++) {
        const char *mark = n_marks ? strstr(text, image) : text;
        avl__bytes_put(&p->text, text, (size_t)(mark - text));
        avl__prompt_token(p, -1 - i);
        if (n_marks) text = mark + size;
        else avl__bytes_put_text(&p->text, "\n");
    }
    avl__bytes_put_text(&p->text, text);
}

// Writes out a part of a template; the table of templates says what stands for what.
static void avl__prompt_layout(avl__prompt *p, const char *layout) {
    const astrovl_model *m = p->turn->session->model;
    for (; *layout && !p->turn->err.status; layout++) {
        int32_t token = -1;
        if (*layout == '{' || *layout == '(') {
            const astrovl_string piece = {layout + 1, strcspn(layout + 1, "})")};
            token = avl__vocab_find(&m->vocab, piece.data, piece.size);
            if (token < 0 && *layout == '(') avl__bytes_put(&p->text, piece.data, piece.size);
            else if (token < 0)
                avl__fail(&p->turn->err, ASTROVL_ERROR_MODEL, "the %s template needs the token %.*s, which this "
                          "vocabulary lacks; choose another template", astrovl_template_name(m->info.chat_template),
                          AVL__SHOW(piece));
            layout += piece.size + 1;
        } else if (*layout != '%') {
            avl__bytes_put(&p->text, layout, 1);
        } else {
            switch (*++layout) {
            case 'p': avl__prompt_layout(p, p->system_part); break;
            case 's': avl__bytes_put_text(&p->text, p->system); break;
            case 'u': avl__prompt_user(p); break;
            case 'b': token = m->vocab.bos; break;
            case 'e': token = m->vocab.eos; break;
            default:  token = avl__vocab_find(&m->vocab, AVL__SPACE_MARK, 3); break;
            }
        }
        if (token >= 0) avl__prompt_token(p, token);
    }
}

// The tokens of a turn: first the end of the last answer that the cache does not hold yet, then the prompt. Failures
// stand in turn->err.   tokens: out, empty before
static void avl__lay_out_turn(astrovl_turn *turn, const astrovl_generation *o, avl__tokens *tokens) {
    const astrovl_session *s = turn->session;
    const astrovl_model *m = s->model;
    const avl__template *t = &avl__templates[m->info.chat_template];
    avl__prompt p = {turn, o, o->system ? o->system : m->system, "", {NULL, 0, 0, 0}, tokens};
    if (s->n_turns == 0 && p.system && *p.system) p.system_part = t->system_part;
    for (size_t i = (size_t)s->n_unread; i > 0; i--) avl__prompt_token(&p, s->answer.data[s->answer.size - i]);
    if (s->n_turns > 0) avl__prompt_layout(&p, t->between);
    else if ((m->vocab.add_bos || strstr(m->jinja, "bos_token")) && m->vocab.bos >= 0)
        avl__prompt_token(&p, m->vocab.bos);   // where a template names bos_token, it begins with it
    avl__prompt_layout(&p, t->turn);
    avl__prompt_token(&p, INT32_MIN);
    astrovl_free(p.text.data);
}

// ====================================================================================================================
// [11] Generation
// From logits to text: penalties, truncation and sampling; answers that keep to a pattern or a JSON schema; stop texts
// and streaming; then the calls that put it together, from a turn of a conversation to a caption in one line.
// ====================================================================================================================

// ---- sampling ------------------------------------------------------------------------------------------------------

// The number (count = 1) or the sum (count = 0) of the values of p that are at least `threshold`.
static double avl__amount_above(const float *p, int n, float threshold, int count) {
    double amount = 0.0;
    for (int i = 0; i < n; i++) if (p[i] >= threshold) amount += count ? 1.0 : (double)p[i];
    return amount;
}

// Keeps the largest values of p >= 0 until their number or sum reaches `wanted`, among equals the lowest index first,
// and zeroes the rest. The smallest value to keep is found by bisection over the bits of positive floats, which are
// ordered like the floats themselves: 31 passes over p, without sorting and without memory.
static void avl__keep_largest(float *p, int n, double wanted, int count) {
    uint32_t bits = 0;   // of the highest threshold that enough values reach; 0: all together are not enough
    for (uint32_t bit = 1u << 30; bit; bit >>= 1)
        if (avl__amount_above(p, n, avl__float_from_bits(bits | bit), count) >= wanted) bits |= bit;
    const float cut = avl__float_from_bits(bits);
    double kept = avl__amount_above(p, n, avl__float_from_bits(bits + 1), count);
    for (int i = 0; i < n; i++) {
        if (p[i] > cut) continue;
        if (p[i] < cut || kept >= wanted) p[i] = 0.0f;
        else kept += count ? 1.0 : (double)p[i];
    }
}

ASTROVL_API int32_t astrovl_sample(float *logits, int n_vocab, const astrovl_generation *options,
                                   const int32_t *history, int n_history, uint64_t *random_state) {
    if (!logits || n_vocab < 1 || (n_history > 0 && !history)) return -1;
    const float penalty = options ? options->repetition_penalty : 0.0f;
    const int window = options && options->repetition_window > 0 ? options->repetition_window : 64;
    const int first = n_history > window ? n_history - window : 0;
    for (int i = first; i < n_history && penalty > 0.0f; i++) {
        const int32_t t = history[i];
        int j = first;
        while (history[j] != t) j++;
        if (j == i && t >= 0 && t < n_vocab)   // each token once
            logits[t] = logits[t] > 0.0f ? logits[t] / penalty : logits[t] * penalty;
    }
    int32_t token = 0;
    for (int i = 1; i < n_vocab; i++) if (logits[i] > logits[token]) token = i;
    if (!options || !(options->temperature > 0.0f)) return token;
    if (!random_state) return -1;
    const float max = logits[token];
    for (int i = 0; i < n_vocab; i++) logits[i] = astrovl_expf((logits[i] - max) / options->temperature);
    if (options->top_k > 0 && options->top_k < n_vocab) avl__keep_largest(logits, n_vocab, options->top_k, 1);
    if (options->top_p > 0.0f && options->top_p < 1.0f)
        avl__keep_largest(logits, n_vocab, options->top_p * avl__amount_above(logits, n_vocab, 0.0f, 0), 0);
    double total = 0.0;
    for (int i = 0; i < n_vocab; i++) {
        if (!(logits[i] >= options->min_p)) logits[i] = 0.0f;   // the largest is 1; NaN goes, too
        total += logits[i];
    }
    double at = avl__random(random_state) * total;
    for (int i = 0; i < n_vocab && at >= 0.0; i++) {
        if (!(logits[i] > 0.0f)) continue;
        token = i;   // the last possible token takes what rounding leaves
        at -= logits[i];
    }
    return token;
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
#define AVL__GUIDE_FAR    (1 << 18)    // bytes of a pattern or schema, and of the shortest answer; counts in them
#define AVL__GUIDE_NEVER  (1LL << 40)  // as a number of bytes: one-byte tokens cannot spell any end
#define AVL__GUIDE_DEPTH  64           // groups in groups, values in values
#define AVL__GUIDE_TOKEN  32           // bytes; longer tokens (mostly runs of dashes) never follow
#define AVL__GUIDE_HEADS  (1 << 16)    // of the hash table of nodes

enum {
    AVL__NONE,       // matches nothing at all: node 0
    AVL__EMPTY,      // matches the empty text: node 1
    AVL__RANGE,      // one byte from a to b
    AVL__ROW,        // min to max times a, then b; max -1: no limit; min is 0 if a matches the empty text
    AVL__ALT         // a or b; a is no ALT, and a larger number than those in b: a set has one node
};

typedef struct avl__re {
    int32_t  kind, a, b, min, max;
    int32_t  chain;               // the next node of the same place in `heads`; 0: none
    uint32_t mark;                // guide.mark when it was last put into an alternative
    int64_t  least;               // bytes of the shortest text that matches and that one-byte tokens can spell: as many
                                  // tokens suffice to end the answer (0: it may end here). At most FAR, or NEVER
    int32_t  next;                // the derivatives' place in guide.next; -1: none is known yet
} avl__re;

typedef struct avl__trie {        // of the tokens' bytes: a node's children stand behind it, up to `end`
    int32_t token, end;           // token: the one that ends here, or -1
    uint8_t byte, depth;
} avl__trie;

struct astrovl_guide {
    const astrovl_model *model;
    const char   *name;                           // for messages
    astrovl_error failure;                        // the first one
    uint64_t      work;                           // steps of the call under way
    int           start;                          // the whole expression; callers name it state 0
    avl__re      *nodes;
    size_t        n_nodes, node_capacity;
    int32_t       heads[AVL__GUIDE_HEADS];        // nodes by their hash
    avl__tokens   next, stack;                    // derivatives, [][n_classes], -1: unknown yet; parts of new nodes
    uint32_t      mark;
    uint8_t       classes[256], byte_of[256];     // bytes that no RANGE tells apart are a class; its lowest byte
    int           n_classes;
    avl__trie    *trie;
    size_t        n_trie, trie_capacity;
    uint8_t       is_token[256];                  // 1: this byte is a token by itself
    uint8_t      *mask;                           // [n_vocab] 1: this token may follow
};

static int avl__guide_fail(astrovl_guide *g, astrovl_status status) {   // MEMORY or LIMIT; returns NONE
    if (!g->failure.status)
        avl__fail(&g->failure, status, "%s: %s", g->name, status == ASTROVL_ERROR_MEMORY ? "out of memory" : "needs "
                  "too many states or steps; lower the counts (in a pattern those in { }; maxItems, maxLength)");
    return AVL__NONE;
}

static void avl__guide_put(astrovl_guide *g, avl__tokens *list, int x) {
    if (list->size >= AVL__GUIDE_TABLE) avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    else if (!avl__tokens_put(list, x)) avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
}

static void avl__push(astrovl_guide *g, int x) { avl__guide_put(g, &g->stack, x); }

// The node of that kind with these parts, a new one if there is none yet.
static int avl__re_make(astrovl_guide *g, int kind, int a, int b, int min, int max) {
    const int32_t key[5] = {kind, a, b, min, max};
    const uint32_t hash = avl__hash(AVL__HASH_START, (const char *)key, sizeof key);
    int32_t *head = &g->heads[(hash ^ hash >> 15) % AVL__GUIDE_HEADS];
    if (g->failure.status) return AVL__NONE;
    for (int x = *head; x != 0; x = g->nodes[x].chain, g->work++)
        if (memcmp(&g->nodes[x], key, sizeof key) == 0) return x;
    if (g->n_nodes == AVL__GUIDE_NODES || g->work > AVL__GUIDE_WORK) return avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    if (!avl__grow(&g->nodes, &g->node_capacity, g->n_nodes + 1, sizeof *g->nodes))
        return avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
    const int has_parts = kind > AVL__RANGE;
    const int64_t least_a = has_parts ? g->nodes[a].least : 0, least_b = has_parts ? g->nodes[b].least : 0;
    int64_t least = kind == AVL__EMPTY ? 0 : AVL__GUIDE_NEVER;
    for (int byte = a; kind == AVL__RANGE && byte <= b; byte++) if (g->is_token[byte]) least = 1;
    if (kind == AVL__ROW) least = min * least_a + least_b;
    if (kind == AVL__ALT) least = least_a < least_b ? least_a : least_b;
    if (least > AVL__GUIDE_FAR) least = least < AVL__GUIDE_NEVER ? AVL__GUIDE_FAR : AVL__GUIDE_NEVER;
    const avl__re node = {kind, a, b, min, max, *head, 0, least, -1};
    g->nodes[g->n_nodes] = node;
    return *head = (int32_t)g->n_nodes++;
}

static int avl__re_row(astrovl_guide *g, int a, int min, int max, int b) {
    if (a == AVL__NONE || b == AVL__NONE) return AVL__NONE;
    if (a == AVL__EMPTY || max == 0) return b;
    if (b == AVL__EMPTY && min == 1 && max == 1) return a;
    if (g->nodes[a].least == 0) min = 0;   // the empty text fills up the count
    return avl__re_make(g, AVL__ROW, a, b, min, max);
}

static int avl__re_cat(astrovl_guide *g, int a, int b) { return avl__re_row(g, a, 1, 1, b); }
static int avl__re_range(astrovl_guide *g, int low, int high) { return avl__re_make(g, AVL__RANGE, low, high, 0, 0); }

static int avl__int_order(const void *context, int a, int b) {
    (void)context;
    return (a > b) - (a < b);
}

// The alternative of the nodes from stack[base] on, which are taken off.
static int avl__re_alt(astrovl_guide *g, size_t base) {
    const size_t end = g->stack.size;
    int x = AVL__NONE;
    g->mark++;
    for (size_t i = base; i < end; i++)
        for (x = g->stack.data[i]; x != AVL__NONE; x = g->nodes[x].kind == AVL__ALT ? g->nodes[x].b : AVL__NONE) {
            int member = g->nodes[x].kind == AVL__ALT ? g->nodes[x].a : x;
            g->work++;
            if (g->nodes[member].mark != g->mark) avl__push(g, member);
            g->nodes[member].mark = g->mark;
        }
    if (g->stack.size > end + 1) avl__sort(g->stack.data + end, (int)(g->stack.size - end), avl__int_order, NULL);
    for (size_t i = end; i < g->stack.size; i++)
        x = i > end ? avl__re_make(g, AVL__ALT, g->stack.data[i], x, 0, 0) : g->stack.data[i];
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
    for (; size > 0; size--)
        then = avl__re_cat(g, avl__re_range(g, (uint8_t)data[size - 1], (uint8_t)data[size - 1]), then);
    return then;
}

// The last n bytes of the characters from low to high, six bits in each but the first, which has `lead` above its bits.
// Either the first bytes are equal, or all values may follow each of them; else there are two parts.
static int avl__re_utf8(astrovl_guide *g, uint32_t lead, uint32_t low, uint32_t high, int n) {
    if (n == 0) return AVL__EMPTY;
    const int shift = 6 * (n - 1);
    const uint32_t rest = ((uint32_t)1 << shift) - 1, a = low >> shift, b = high >> shift;
    if (a == b || ((low & rest) == 0 && (high & rest) == rest)) {
        int range = avl__re_range(g, (int)(lead | a), (int)(lead | b));
        return avl__re_cat(g, range, avl__re_utf8(g, 0x80, low & rest, high & rest, n - 1));
    }
    const uint32_t middle = low & rest ? low | rest : (high & ~rest) - 1;
    return avl__re_or(g, avl__re_utf8(g, lead, low, middle, n), avl__re_utf8(g, lead, middle + 1, high, n));
}

// Pushes the characters from low to high; surrogates are none.
static void avl__push_characters(astrovl_guide *g, uint32_t low, uint32_t high) {
    static const struct { uint32_t low, high, lead; int n; } forms[] = {{0, 0x7F, 0, 1}, {0x80, 0x7FF, 0xC0, 2},
        {0x800, 0xD7FF, 0xE0, 3}, {0xE000, 0xFFFF, 0xE0, 3}, {0x10000, 0x10FFFF, 0xF0, 4}};
    for (int i = 0; i < 5; i++) {
        uint32_t from = low > forms[i].low ? low : forms[i].low, to = high < forms[i].high ? high : forms[i].high;
        if (from <= to) avl__push(g, avl__re_utf8(g, forms[i].lead, from, to, forms[i].n));
    }
}

// ---- guided generation: derivatives --------------------------------------------------------------------------------
//   d(RANGE) = EMPTY if the byte is in it, else NONE        d(ALT) = the alternative of the members' derivatives
//   d(a{min,max} b) = d(a) a{min-1,max-1} b, and also d(b) if min is 0
// d(a) b is multiplied out, (x|y) b = x b | y b, so that a derivative is a set of at most as many sequences as the
// pattern has places (Antimirov 1996, doi 10.1016/0304-3975(95)00182-4).

// The derivative of node x by the bytes of class c, computed where it is not known yet. Only the parts a are looked at
// by recursion, no deeper than the pattern is nested; a row of parts that may all be empty takes a loop.
static int avl__re_step(astrovl_guide *g, int x, int c) {
    if (g->nodes[x].next < 0) {
        g->nodes[x].next = (int32_t)g->next.size;
        for (int i = 0; i < g->n_classes; i++) avl__guide_put(g, &g->next, -1);
    }
    if (g->failure.status || g->work > AVL__GUIDE_WORK) return avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    const size_t place = (size_t)g->nodes[x].next + (size_t)c;
    if (g->next.data[place] >= 0) return g->next.data[place];
    const size_t base = g->stack.size;
    for (int more = 1, i = x; more; g->work++) {
        const avl__re e = g->nodes[i];
        int d = AVL__NONE, then = AVL__EMPTY;
        if (e.kind == AVL__RANGE) d = e.a <= g->byte_of[c] && g->byte_of[c] <= e.b ? AVL__EMPTY : AVL__NONE;
        else if (e.kind > AVL__RANGE) d = avl__re_step(g, e.a, c);
        if (e.kind == AVL__ROW && d != AVL__NONE)
            then = avl__re_row(g, e.a, e.min > 0 ? e.min - 1 : 0, e.max < 0 ? -1 : e.max - 1, e.b);
        for (; g->nodes[d].kind == AVL__ALT; d = g->nodes[d].b) avl__push(g, avl__re_cat(g, g->nodes[d].a, then));
        avl__push(g, avl__re_cat(g, d, then));
        more = e.kind == AVL__ALT || (e.kind == AVL__ROW && e.min == 0);
        i = e.b;
    }
    return g->next.data[place] = avl__re_alt(g, base);
}

// ---- guided generation: tokens -------------------------------------------------------------------------------------

// A token's bytes; returns how many, 0: it never follows
static int avl__guide_token_bytes(const astrovl_guide *g, int32_t token, char text[AVL__GUIDE_TOKEN]) {
    const avl__vocab *v = &g->model->vocab;
    int n = avl__vocab_is_end(v, token) ? 0 : avl__vocab_token_bytes(v, token, text, AVL__GUIDE_TOKEN);
    return n <= AVL__GUIDE_TOKEN ? n : 0;
}

static int avl__guide_token_order(const void *vocab, int a, int b) {   // by spelling: equal beginnings are neighbors
    const astrovl_string s = ((const avl__vocab *)vocab)->pieces[a], t = ((const avl__vocab *)vocab)->pieces[b];
    const int side = memcmp(s.data, t.data, s.size < t.size ? s.size : t.size);
    return side ? side : (s.size > t.size) - (s.size < t.size);
}

static void avl__guide_read_tokens(astrovl_guide *g) {
    const avl__vocab *v = &g->model->vocab;
    const int n_vocab = g->model->info.n_vocab, n_tokens = v->n_tokens < n_vocab ? v->n_tokens : n_vocab;
    int *order = (int *)avl__alloc_raw((uint64_t)n_tokens, sizeof *order);
    g->mask = (uint8_t *)avl__alloc_raw((uint64_t)n_vocab, 1);
    if (!order || !g->mask) avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
    for (int i = 0; order && i < n_tokens; i++) order[i] = i;
    if (order) avl__sort(order, n_tokens, avl__guide_token_order, v);
    char text[AVL__GUIDE_TOKEN];
    int open[AVL__GUIDE_TOKEN], n_open = 0;   // nodes of the last token
    for (int i = 0; i <= n_tokens && !g->failure.status; i++) {   // behind the last token, all nodes are closed
        const int n = i < n_tokens ? avl__guide_token_bytes(g, order[i], text) : 0;   // NOLINT: without order, g failed
        int shared = 0;
        if (n == 1) g->is_token[(uint8_t)text[0]] = 1;
        while (shared < n_open && shared < n - 1 && (uint8_t)text[shared] == g->trie[open[shared]].byte) shared++;
        while (n_open > shared) g->trie[open[--n_open]].end = (int32_t)g->n_trie;
        for (; n_open < n && !g->failure.status; n_open++) {
            const avl__trie node = {n_open == n - 1 ? order[i] : -1, 0, (uint8_t)text[n_open], (uint8_t)n_open};
            open[n_open] = (int)g->n_trie;
            if (!avl__grow(&g->trie, &g->trie_capacity, g->n_trie + 1, sizeof node))
                avl__guide_fail(g, ASTROVL_ERROR_MEMORY);
            else g->trie[g->n_trie++] = node;
        }
    }
    astrovl_free(order);
}

// The node of a state that a caller names; NONE: there is no such state.
static int avl__guide_node(const astrovl_guide *g, int state) {
    if (!g || state < 0 || (size_t)state >= g->n_nodes) return AVL__NONE;
    return state ? state : g->start;
}

// SentencePiece vocabularies begin an answer with a token that begins with a space ("_{"): where the answer itself may
// not, that space is dropped from the first token. Returns the bytes dropped, 0 or 1.
static int avl__guide_skip(astrovl_guide *g, int state, const char *bytes, size_t size) {
    return state == 0 && size > 0 && *bytes == ' ' && avl__re_step(g, g->start, g->classes[(uint8_t)' ']) == AVL__NONE;
}

ASTROVL_API astrovl_status astrovl_guide_mask(astrovl_guide *g, int state, int n_left, float *logits,
                                              astrovl_error *err) {
    int at[AVL__GUIDE_TOKEN + 1] = {avl__guide_node(g, state)};   // nodes after the bytes of one token
    if (!g || !logits) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a guide and logits are needed");
    const int n_vocab = g->model->info.n_vocab;
    const int64_t least = g->nodes[at[0]].least, limit = n_left < AVL__GUIDE_FAR ? n_left : AVL__GUIDE_FAR;
    if (least == AVL__GUIDE_NEVER)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "%d is no state that the guide's answer can be in", state);
    if (n_left < least && !g->failure.status)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "to end as its guide asks, the answer may need %d more tokens; it "
                         "has %d", (int)least, n_left);
    g->work = 0;
    const int skip = avl__guide_skip(g, state, " ", 1);
    int any = 0;
    for (int i = 0; i < n_vocab; i++) g->mask[i] = least == 0 && avl__vocab_is_end(&g->model->vocab, i);
    for (size_t i = 0; i < g->n_trie && !g->failure.status;) {
        const avl__trie *t = &g->trie[i];
        const int is_skipped = skip && t->depth == 0 && t->byte == ' ';
        const int x = is_skipped ? at[0] : avl__re_step(g, at[t->depth], g->classes[t->byte]);
        at[t->depth + 1] = x;
        if (t->token >= 0 && g->nodes[x].least < limit && !is_skipped) g->mask[t->token] = 1;
        i = x == AVL__NONE ? (size_t)t->end : i + 1;
    }
    if (g->failure.status) return avl__fail(err, g->failure.status, "%s", g->failure.message);
    for (int i = 0; i < n_vocab; i++) {
        any |= g->mask[i];
        if (!g->mask[i]) logits[i] = avl__float_from_bits(0xFF800000u);   // -infinity
    }
    return any ? ASTROVL_OK : avl__fail(err, ASTROVL_ERROR_LIMIT, "nothing may follow: the answer is complete");
}

ASTROVL_API int astrovl_guide_next(astrovl_guide *guide, int state, int32_t token) {
    int x = avl__guide_node(guide, state);
    char text[AVL__GUIDE_TOKEN];
    if (x == AVL__NONE || token >= guide->model->info.n_vocab) return -1;
    const int n = avl__guide_token_bytes(guide, token, text);
    guide->work = 0;
    const int skip = avl__guide_skip(guide, state, text, (size_t)n);
    for (int i = skip; i < n; i++) x = avl__re_step(guide, x, guide->classes[(uint8_t)text[i]]);
    return n == skip || guide->nodes[x].least == AVL__GUIDE_NEVER ? -1 : x;
}

ASTROVL_API int astrovl_guide_is_accepting(const astrovl_guide *guide, int state) {
    return astrovl_guide_min_tokens(guide, state) == 0;
}

ASTROVL_API int astrovl_guide_min_tokens(const astrovl_guide *guide, int state) {
    const int x = avl__guide_node(guide, state);
    return x == AVL__NONE || guide->nodes[x].least == AVL__GUIDE_NEVER ? -1 : (int)guide->nodes[x].least;
}

ASTROVL_API void astrovl_guide_free(astrovl_guide *guide) {
    if (!guide) return;
    astrovl_free(guide->mask);
    astrovl_free(guide->nodes);
    astrovl_free(guide->next.data);
    astrovl_free(guide->stack.data);
    astrovl_free(guide->trie);
    astrovl_free(guide);
}

// ---- patterns ------------------------------------------------------------------------------------------------------

typedef struct avl__json_value {   // see below
    char           kind;    // its first byte: { [ " t f n; of any number '0'
    int            end;     // in the list of values
    astrovl_string text;    // a string's characters, zero-terminated; all else as it stands in the text
} avl__json_value;

typedef struct avl__reader {                  // of a pattern, or of JSON
    const char      *name, *text, *limit, *p; // for messages; from text to its limit, a zero byte; what comes next
    int              depth;
    astrovl_error   *err;                     // the first failure sticks; p is then the limit
    astrovl_guide   *g;                       // what a pattern or a schema becomes
    avl__json_value *values;                  // of JSON
    size_t           n_values, capacity;
} avl__reader;

static int avl__read_fail(avl__reader *r, const char *at, astrovl_status status, const char *what) {   // returns NONE
    if (!r->err->status) avl__fail(r->err, status, "%s, byte %d: %s", r->name, (int)(at - r->text), what);
    r->p = r->limit;
    return AVL__NONE;
}

#define AVL__READ_WRONG(r, at, what) avl__read_fail(r, at, ASTROVL_ERROR_FORMAT, what)

static int avl__accept(avl__reader *r, char c) {
    const int is_here = *r->p == c;
    r->p += is_here;
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

// A character of a zero-terminated text, as it stands there or after a backslash: one of `letters`, which means the one
// of `meanings` in its place, or u and XXXX or two units of UTF-16, XXXX\uXXXX. Its bytes in *size. AVL__UTF8_BAD or
// AVL__UTF8_CUT; AVL__ESCAPE_BAD: no such escape; half a surrogate pair is returned as it stands.
#define AVL__ESCAPE_BAD (-3)
static int32_t avl__char_read(const char *p, const char *letters, const char *meanings, size_t *size) {
    if (*p != '\\') return avl__utf8_read(p, 4, size);   // 4: it stops at the final zero
    const char *letter = p[1] ? strchr(letters, p[1]) : NULL;
    *size = letter ? 2 : 6;
    if (letter) return meanings[letter - letters];
    const int32_t unit = p[1] == 'u' ? avl__hex(p + 2, 4) : -1;
    if (unit < 0) return AVL__ESCAPE_BAD;
    const int32_t low = unit >= 0xD800 && unit < 0xDC00 && p[6] == '\\' && p[7] == 'u' ? avl__hex(p + 8, 4) : -1;
    if (low < 0xDC00 || low > 0xDFFF) return unit;
    *size = 12;
    return 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
}

static int avl__regex_char(avl__reader *r) {
#define AVL__PUNCTUATION "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"   // a backslash before it makes it literal
    const char *start = r->p;
    const int is_hex = start[0] == '\\' && start[1] == 'x';
    size_t size = 4;
    int32_t c = AVL__UTF8_CUT;
    if (is_hex) c = avl__hex(start + 2, 2);
    else if (*start) c = avl__char_read(start, "ntrfv" AVL__PUNCTUATION, "\n\t\r\f\v" AVL__PUNCTUATION, &size);
    if (c >= 0xD800 && c <= 0xDFFF) return AVL__READ_WRONG(r, start, "half a surrogate pair is no character");
    if (c < 0 && (is_hex || (c == AVL__ESCAPE_BAD && start[1] == 'u')))
        return AVL__READ_WRONG(r, start, "\\x takes two hexadecimal digits, \\u four");
    if (c == AVL__ESCAPE_BAD)
        return avl__read_fail(r, start, ASTROVL_ERROR_UNSUPPORTED, "this escape is not understood; those that are: \\d "
                              "\\w \\s \\D \\W \\S \\n \\t \\r \\f \\v \\xHH \\uHHHH, punctuation");
    if (c < 0) return AVL__READ_WRONG(r, start, "the pattern ends too early, or is not UTF-8");
    r->p += size;
    return c;
}

// A set of characters is collected on the stack, as numbers that sort: where a range begins 2 low, where it has ended
// 2 (high + 1) + 1; the other way round for a range that is taken away. A character is in the set if more ranges are
// open there than taken away.
static void avl__set_add(avl__reader *r, int low, int high, int take_away) {
    avl__push(r->g, 2 * low + take_away);
    avl__push(r->g, 2 * high + 3 - take_away);
}

// Adds \d, \w, \s or one of their complements to a set (ASCII, as in JSON schema's patterns). 0: something else is here
static int avl__regex_class(avl__reader *r, int take_away) {
    const char c = *r->p == '\\' ? r->p[1] : (char)0, kind = (char)(c | 32);
    const char *bounds = kind == 'd' ? "09" : kind == 'w' ? "09AZ__az" : kind == 's' ? "\t\r  " : NULL;
    if (!bounds) return 0;
    r->p += 2;
    if (c != kind) avl__set_add(r, 0, 0x10FFFF, take_away);
    for (; *bounds; bounds += 2) avl__set_add(r, bounds[0], bounds[1], take_away != (c != kind));
    return 1;
}

static int avl__regex_alternatives(avl__reader *r);

static int avl__regex_atom(avl__reader *r) {   // after a failure, numbers may be left on the stack
    astrovl_guide *g = r->g;
    const char *start = r->p;
    const size_t base = g->stack.size;
    if (*start && strchr("*+?{", *start))
        return AVL__READ_WRONG(r, start, "nothing stands here to be repeated (a literal one is written \\*, \\+ ...)");
    if (*start == '^' || *start == '$')
        return avl__read_fail(r, start, ASTROVL_ERROR_UNSUPPORTED, "^ and $ may stand only at the pattern's ends");
    if (avl__accept(r, '(')) {
        if (avl__accept(r, '?') && !avl__accept(r, ':'))
            return avl__read_fail(r, start, ASTROVL_ERROR_UNSUPPORTED, "a group may begin with (?: but no other (?");
        if (++r->depth > AVL__GUIDE_DEPTH)
            return avl__read_fail(r, start, ASTROVL_ERROR_LIMIT, "groups are nested more than 64 deep");
        int x = avl__regex_alternatives(r);
        r->depth--;
        return avl__accept(r, ')') ? x : AVL__READ_WRONG(r, start, "this ( is not closed");
    }
    // a set of characters: one character or class, or those in brackets, or all but those
    const int is_list = avl__accept(r, '['), is_dot = !is_list && avl__accept(r, '.');
    const int negate = is_dot || (is_list && avl__accept(r, '^'));
    if (is_list && *r->p == ']') return AVL__READ_WRONG(r, start, "an empty set (a ] in a set is written \\])");
    if (negate) avl__set_add(r, 0, 0x10FFFF, 0);
    if (is_dot) avl__set_add(r, '\n', '\n', 1);
    else do {
        const char *at = r->p;
        const int is_class = avl__regex_class(r, negate), low = is_class ? 0 : avl__regex_char(r);
        int high = low;
        if (is_list && r->p[0] == '-' && r->p[1] != ']') {
            r->p++;
            if (is_class || avl__regex_class(r, negate)) return AVL__READ_WRONG(r, at, "a class at a range's end");
            high = avl__regex_char(r);
        }
        if (high < low) return AVL__READ_WRONG(r, at, "a range that runs backwards");
        if (!is_class) avl__set_add(r, low, high, negate);
    } while (is_list && *r->p && *r->p != ']');
    if (is_list && !avl__accept(r, ']')) return AVL__READ_WRONG(r, start, "this [ is not closed");
    const size_t end = g->stack.size;
    int n_open = 0, from = 0;
    if (end > base) avl__sort(g->stack.data + base, (int)(end - base), avl__int_order, NULL);
    for (size_t i = base; i < end && !g->failure.status; i++) {
        const int point = g->stack.data[i] >> 1, was_open = n_open > 0;
        n_open += g->stack.data[i] & 1 ? -1 : 1;
        if ((n_open > 0) == was_open) continue;
        if (was_open && point > from) avl__push_characters(g, (uint32_t)from, (uint32_t)point - 1);
        from = point;
    }
    const int x = avl__re_alt(g, end);
    return x ? x : AVL__READ_WRONG(r, start, "a set that no character is in");
}

// Reads a decimal number. Once it is above AVL__GUIDE_FAR, the digits that follow are skipped. -1: none is here
static int avl__count_read(const char **p) {
    int n = -1;
    for (; **p >= '0' && **p <= '9'; ++*p) if (n <= AVL__GUIDE_FAR) n = (n < 0 ? 0 : n) * 10 + (**p - '0');
    return n;
}

static int avl__regex_repeated(avl__reader *r) {   // an atom with its quantifier, if it has one
    const size_t base = r->g->stack.size;
    const int atom = avl__regex_atom(r);
    const char *start = r->p;
    int min = *start == '+', max = *start == '?' ? 1 : -1;
    r->g->stack.size = base;
    if (!*start || !strchr("*+?{", *start)) return atom;
    r->p++;
    if (*start == '{') {
        min = avl__count_read(&r->p);
        max = avl__accept(r, ',') ? avl__count_read(&r->p) : min;
        if (min > AVL__GUIDE_FAR || max > AVL__GUIDE_FAR)
            return avl__read_fail(r, start + 1, ASTROVL_ERROR_LIMIT, "a count of more than 262,144");
        if (min < 0 || (max >= 0 && max < min) || !avl__accept(r, '}'))
            return AVL__READ_WRONG(r, start, "{m}, {m,} or {m,n} with m <= n is expected (a literal { is \\{)");
    }
    avl__accept(r, '?');   // as few as possible or as many: the same language
    if (*r->p && strchr("*+?{", *r->p)) return AVL__READ_WRONG(r, r->p, "a quantifier after a quantifier");
    return avl__re_row(r->g, atom, min, max, AVL__EMPTY);
}

static int avl__regex_alternatives(avl__reader *r) {
    astrovl_guide *g = r->g;
    const size_t base = g->stack.size;
    do {
        const size_t first = g->stack.size;
        while (*r->p && *r->p != '|' && *r->p != ')' && strcmp(r->p, "$") != 0) avl__push(g, avl__regex_repeated(r));
        int x = AVL__EMPTY;
        while (g->stack.size > first) x = avl__re_cat(g, g->stack.data[--g->stack.size], x);
        avl__push(g, x);
    } while (avl__accept(r, '|'));
    return avl__re_alt(g, base);
}

// A whole pattern as an expression. It matches all of an answer, so ^ and $ at its ends say nothing.
static int avl__re_pattern(astrovl_guide *g, const char *pattern) {
    avl__reader r = {"pattern", pattern, pattern + strlen(pattern), pattern, 0, &g->failure, g, NULL, 0, 0};
    avl__accept(&r, '^');
    const int x = avl__regex_alternatives(&r);
    avl__accept(&r, '$');
    return *r.p ? AVL__READ_WRONG(&r, r.p, "this ) closes nothing") : x;
}

// ---- JSON (RFC 8259) -----------------------------------------------------------------------------------------------
// A text becomes a list of its values in the order of their first bytes. A member is its name, then its value. A value
// ends at the place in the list of what follows it and all it contains; a name where its member ends. So the items of
// an array, and the names of an object, are v + 1, then the `end` of the one before, up to the `end` of v.

static void avl__json_space(avl__reader *j) { j->p += strspn(j->p, " \t\n\r"); }

// Decodes the string at j->p in its place: its characters take no more bytes decoded than escaped, and the final zero
// stands where the last quote stood or before.
static astrovl_string avl__json_string(avl__reader *j) {
    char *to = (char *)++j->p;   // in the copy that avl__json_open made
    astrovl_string string = {to, 0};
    while (*j->p != '"') {
        size_t size;
        const int32_t c = avl__char_read(j->p, "\"\\/bfnrt", "\"\\/\b\f\n\r\t", &size);
        const char *wrong = j->p == j->limit ? "the text ends within a string" :
                            (uint8_t)*j->p < 32 ? "a control character must be escaped" :
                            c == AVL__ESCAPE_BAD ? "an escape is one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX" :
                            c < 0 ? "these bytes are not UTF-8" :
                            c >= 0xD800 && c <= 0xDFFF ? "half a surrogate pair is no character" : NULL;
        if (wrong) AVL__READ_WRONG(j, j->p, wrong);
        if (wrong) return string;
        j->p += size;
        to += avl__utf8_write((uint32_t)c, to);
    }
    j->p++;
    *to = 0;
    string.size = (size_t)(to - string.data);
    return string;
}

static void avl__json_read(avl__reader *j) {   // one value, with white space before and behind it
    avl__json_space(j);
    const size_t i = j->n_values;
    const char *p = j->p, kind = *p, close = kind == '{' ? '}' : ']';
    avl__json_value value = {kind, 0, {p, 0}};
    if (!avl__grow(&j->values, &j->capacity, i + 1, sizeof value))
        avl__read_fail(j, p, ASTROVL_ERROR_MEMORY, "out of memory");
    if (j->err->status) return;
    j->n_values++;
    if (kind == '"') value.text = avl__json_string(j);
    else if (kind == '{' || kind == '[') {
        j->p++;
        if (++j->depth > AVL__GUIDE_DEPTH) avl__read_fail(j, p, ASTROVL_ERROR_LIMIT, "nested more than 64 deep");
        avl__json_space(j);
        for (int more = *j->p != close; more && !j->err->status; more = avl__accept(j, ',')) {
            const size_t name = j->n_values;
            if (kind == '{') {
                avl__json_space(j);
                if (*j->p != '"') AVL__READ_WRONG(j, j->p, "a member's name is expected");
                avl__json_read(j);
                if (!avl__accept(j, ':')) AVL__READ_WRONG(j, j->p, "a colon is expected");
            }
            avl__json_read(j);
            if (kind == '{' && !j->err->status) j->values[name].end = (int)j->n_values;
        }
        if (!avl__accept(j, close)) AVL__READ_WRONG(j, j->p, "a comma or the closing bracket is expected");
        j->depth--;
    } else {
        const char *word = kind == 't' ? "true" : kind == 'f' ? "false" : "null";
        size_t n = strlen(word);
        if (strncmp(p, word, n) != 0) {   // -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?
            value.kind = '0';
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
        value.text.size = (size_t)(j->p - value.text.data);
        if (n == 0) AVL__READ_WRONG(j, j->p, "a value is expected");
    }
    avl__json_space(j);
    value.end = (int)j->n_values;
    if (!j->err->status) j->values[i] = value;
}

// Reads a whole text; *err must be zero before. The caller frees j->text and j->values.
static void avl__json_open(avl__reader *j, const char *name, const char *text, size_t size, astrovl_error *err) {
    const char *copy = avl__copy_text(text, size), *limit = copy ? copy + size : NULL;
    const avl__reader reader = {name, copy, limit, copy, 0, err, NULL, NULL, 0, 0};
    *j = reader;
    if (copy) avl__json_read(j);
    else avl__fail(err, ASTROVL_ERROR_MEMORY, "%s: out of memory", name);
    if (j->p < j->limit) AVL__READ_WRONG(j, j->p, "nothing may follow the value");
}

static int avl__json_is(const avl__json_value *value, const char *text) {   // whether it is a string that spells text
    return value->kind == '"' && avl__string_is(value->text, text);
}

// The value of an object's member, the last of that name, as in Python; 0: there is none
static int avl__json_find(const avl__reader *j, int object, const char *name) {
    int found = 0;
    for (int i = object + 1; i < j->values[object].end; i = j->values[i].end)
        if (avl__json_is(&j->values[i], name)) found = i + 1;
    return found;
}

ASTROVL_API char **astrovl_json_strings(const char *json, size_t size, const char *key, int *n, astrovl_error *err) {
    astrovl_error failure = {ASTROVL_OK, ""};
    avl__reader j;
    char **list = NULL;
    if (n) *n = 0;
    if (!json || !n || !key) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "JSON: no text, no member's name or no count");
        return NULL;
    }
    avl__json_open(&j, "JSON", json, size, &failure);
    if (!failure.status && j.values->kind != '{') AVL__READ_WRONG(&j, j.text, "an object is expected");  // NOLINT: set
    const int found = failure.status ? 0 : avl__json_find(&j, 0, key);
    const int first = found ? found + (j.values[found].kind == '[') : 0, end = found ? j.values[found].end : 0;
    for (int i = first; i < end && !failure.status; i++) {
        const avl__json_value *v = &j.values[i];
        const int is_text = v->kind == '"';
        if (!is_text || memchr(v->text.data, 0, v->text.size))
            avl__fail(&failure, ASTROVL_ERROR_FORMAT, "JSON, byte %d: \"%s\" %s",
                      (int)(v->text.data - j.text) - is_text, key,
                      is_text ? "has a zero character" : "is neither a string nor an array of strings");
    }
    // with their quotes the strings were longer in the JSON text
    if (!failure.status && !(list = (char **)avl__alloc_raw((size_t)(end - first) * sizeof *list + size, 1)))
        avl__fail(&failure, ASTROVL_ERROR_MEMORY, "JSON: out of memory");
    char *text = list ? (char *)(list + (end - first)) : NULL;
    for (int i = first; list && i < end; i++) {
        list[i - first] = (char *)memcpy(text, j.values[i].text.data, j.values[i].text.size + 1);
        text += j.values[i].text.size + 1;
    }
    astrovl_free((void *)j.text);
    astrovl_free(j.values);
    if (list) *n = end - first;
    else avl__fail(err, failure.status, "%s", failure.message);
    return list;
}

// ---- schemas -------------------------------------------------------------------------------------------------------

enum { AVL__OBJECT, AVL__ARRAY, AVL__STRING, AVL__INTEGER, AVL__NUMBER, AVL__BOOLEAN, AVL__NULL, AVL__N_KINDS };

static const char *const avl__kinds[] = {"object", "array", "string", "integer", "number", "boolean", "null"};

static const char *const avl__kind_patterns[AVL__N_KINDS] = {   // string: a character
    "", "", "[^\"\\\\\\x00-\\x1F]|\\\\([\"\\\\/bfnrt]|u([\\dA-CEFa-cef][\\dA-Fa-f]|[Dd][0-7])[\\dA-Fa-f]{2})",
    "0|-?[1-9]\\d{0,14}", "-?(0|[1-9]\\d{0,14})(\\.\\d{1,15})?([eE][+-]?\\d{1,2})?", "true|false", "null"};

// The first AVL__N_RULES restrict the values; the others are notes, which are passed over.
static const char *const avl__keywords[] = {
    "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "minLength", "maxLength",
    "enum", "const", "anyOf", "title", "description", "default", "examples", "$schema", "$id", "$comment"};
enum { AVL__N_RULES = 12, AVL__N_KEYWORDS = 19 };

// Fails, naming the place of a value or a member as a JSON pointer (RFC 6901). Returns NONE.
static int avl__schema_fail(avl__reader *j, int place, astrovl_status status, const char *what) {
    avl__bytes path = {NULL, 0, 0, 0};
    if (j->err->status) return AVL__NONE;
    for (int v = 0; v < place;) {   // down to the item or member that it is in
        const int is_object = j->values[v].kind == '{';
        int index = 0;
        char step[24];
        for (v++; j->values[v].end <= place; v = j->values[v].end) index++;
        avl__format(step, sizeof step, is_object ? "/" : "/%d", index);
        avl__bytes_put_text(&path, step);
        for (const char *c = j->values[v].text.data; is_object && *c; c++)
            avl__bytes_put(&path, *c == '~' ? "~0" : *c == '/' ? "~1" : c, *c == '~' || *c == '/' ? 2 : 1);
        if (is_object && v < place) v++;
    }
    avl__fail(j->err, status, "schema, at %s: %s", path.size ? path.data : "its root", what);
    astrovl_free(path.data);
    return AVL__NONE;
}

#define AVL__SCHEMA_WRONG(j, place, what)   avl__schema_fail(j, place, ASTROVL_ERROR_FORMAT, what)
#define AVL__SCHEMA_UNKNOWN(j, place, what) avl__schema_fail(j, place, ASTROVL_ERROR_UNSUPPORTED, what)

static int avl__schema_count(avl__reader *j, int schema, const char *keyword, int if_absent) {
    const int place = avl__json_find(j, schema, keyword);
    const astrovl_string text = j->values[place].text;
    const char *p = text.data;
    if (!place) return if_absent;
    const int n = j->values[place].kind == '0' ? avl__count_read(&p) : -1;
    if (n < 0 || p < text.data + text.size) AVL__SCHEMA_WRONG(j, place, "a whole number, not negative, is expected");
    if (n > AVL__GUIDE_FAR) avl__guide_fail(j->g, ASTROVL_ERROR_LIMIT);
    return n;
}

// Items with commas between them in brackets, or the characters of a string in quotes
static int avl__schema_list(avl__reader *j, int schema, int item, int is_array) {
    astrovl_guide *g = j->g;
    const char *ends = is_array ? "[]" : "\"\"";
    const int min = avl__schema_count(j, schema, is_array ? "minItems" : "minLength", 0);
    const int max = avl__schema_count(j, schema, is_array ? "maxItems" : "maxLength", -1);
    if (max >= 0 && min > max)
        return AVL__SCHEMA_WRONG(j, schema, "the least (minItems, minLength) is more than the most");
    const int end = avl__re_text(g, ends + 1, 1, AVL__EMPTY);
    const int next = is_array ? avl__re_cat(g, avl__re_pattern(g, ", ?"), item) : item;
    const int more = avl__re_row(g, next, min > 1 ? min - 1 : 0, max > 0 ? max - 1 : max, end);
    const int x = max == 0 ? AVL__NONE : avl__re_cat(g, item, more);
    return avl__re_text(g, ends, 1, min == 0 ? avl__re_or(g, x, end) : x);
}

// A value as an answer spells it, without white space, its strings with no escapes but those that JSON asks for; then
// another expression
static int avl__schema_literal(avl__reader *j, int v, int then) {
    astrovl_guide *g = j->g;
    const avl__json_value *value = &j->values[v];
    const int is_object = value->kind == '{', is_text = value->kind == '"';
    const size_t base = g->stack.size;
    if (is_object || value->kind == '[') {
        then = avl__re_text(g, is_object ? "}" : "]", 1, then);
        for (int i = v + 1; i < value->end; i = j->values[i].end) avl__push(g, i);
        while (g->stack.size > base) {
            const int i = g->stack.data[--g->stack.size];
            if (is_object) then = avl__re_text(g, ":", 1, avl__schema_literal(j, i + 1, then));
            then = avl__schema_literal(j, i, then);
            if (g->stack.size > base) then = avl__re_text(g, ",", 1, then);
        }
        return avl__re_text(g, is_object ? "{" : "[", 1, then);
    }
    if (is_text) then = avl__re_text(g, "\"", 1, then);
    for (size_t i = value->text.size; i > 0; i--) {
        const uint8_t c = (uint8_t)value->text.data[i - 1];
        char spelled[8] = {(char)c, 0};
        if (c == '"' || c == '\\') avl__format(spelled, sizeof spelled, "\\%c", c);
        if (c < 32) avl__format(spelled, sizeof spelled, "\\u%04x", c);
        then = avl__re_text(g, spelled, strlen(spelled), then);
    }
    return is_text ? avl__re_text(g, "\"", 1, then) : then;
}

static int avl__schema_expr(avl__reader *j, int schema);

// Members in the order of `properties`. They are put together from the last to the first, as two expressions: what
// follows where nothing is written yet, and what follows a member.
static int avl__schema_object(avl__reader *j, int schema) {
    astrovl_guide *g = j->g;
    const avl__json_value *values = j->values;
    const int properties = avl__json_find(j, schema, "properties"), required = avl__json_find(j, schema, "required");
    const int additional = avl__json_find(j, schema, "additionalProperties");
    const size_t base = g->stack.size;   // from here on 3 numbers a member: its name, its value, 1 if it is required
    size_t i;
    if (properties && values[properties].kind != '{') return AVL__SCHEMA_WRONG(j, properties, "an object is expected");
    if (required && values[required].kind != '[') return AVL__SCHEMA_WRONG(j, required, "an array is expected");
    if (additional && values[additional].kind != 't' && values[additional].kind != 'f')
        return AVL__SCHEMA_UNKNOWN(j, additional, "only true and false are understood (none is ever written)");
    for (int p = properties + 1; properties && p < values[properties].end; p = values[p].end) {
        const int name = avl__schema_literal(j, p, AVL__EMPTY);
        for (i = base; i < g->stack.size && g->stack.data[i] != name;) i += 3;
        if (i < g->stack.size) return AVL__SCHEMA_WRONG(j, p, "a second member of the same name");
        avl__push(g, name);
        avl__push(g, avl__schema_expr(j, p + 1));
        avl__push(g, 0);
    }
    for (int p = required + 1; required && p < values[required].end; p = values[p].end) {
        if (values[p].kind != '"') return AVL__SCHEMA_WRONG(j, p, "required is an array of names");
        const int name = avl__schema_literal(j, p, AVL__EMPTY);
        for (i = base; i < g->stack.size && g->stack.data[i] != name;) i += 3;
        if (i >= g->stack.size) return AVL__SCHEMA_UNKNOWN(j, p, "properties says nothing about this one");
        if (!g->failure.status) g->stack.data[i + 2] = 1;
    }
    const int comma = avl__re_pattern(g, ", ?"), colon = avl__re_pattern(g, ": ?");
    int first = avl__re_text(g, "}", 1, AVL__EMPTY), later = first;
    for (i = g->stack.size; i > base && !g->failure.status; i -= 3) {
        const int name = g->stack.data[i - 3], is_required = g->stack.data[i - 1];
        const int member = avl__re_cat(g, name, avl__re_cat(g, colon, g->stack.data[i - 2]));
        const int alone = avl__re_cat(g, member, later), after = avl__re_cat(g, comma, alone);
        first = is_required ? alone : avl__re_or(g, alone, first);
        later = is_required ? after : avl__re_or(g, after, later);
    }
    g->stack.size = base;
    return avl__re_text(g, "{", 1, first);
}

// Whether a number is whole, in any spelling: 3, 3.0, 30e-1. It is if the point, moved by the exponent, stands behind
// the last digit that is not 0.
static int avl__json_is_whole(astrovl_string number) {
    const char *p = number.data, *end = p + number.size;
    int n_digits = 0, last = 0, point = -1;   // digits up to the last one that is not 0, and up to the point
    for (; p < end && (*p | 32) != 'e'; p++) {
        if (*p == '.') point = n_digits;
        n_digits += *p >= '0';
        if (*p > '0') last = n_digits;
    }
    const int is_negative = p < end && p[1] == '-';
    p += p < end ? 1 + (p[1] == '-' || p[1] == '+') : 0;
    const int exponent = p < end ? avl__count_read(&p) : 0;
    return last == 0 || (point < 0 ? n_digits : point) + (is_negative ? -exponent : exponent) >= last;
}

static int avl__schema_expr(avl__reader *j, int schema) {
    astrovl_guide *g = j->g;
    const avl__json_value *values = j->values;
    const size_t base = g->stack.size;
    int n_rules = 0;
    if (values[schema].kind != '{') return AVL__SCHEMA_UNKNOWN(j, schema, "a schema is an object here");  // NOLINT: set
    for (int p = schema + 1; p < values[schema].end; p = values[p].end) {
        int key = 0;
        while (key < AVL__N_KEYWORDS && !avl__json_is(&values[p], avl__keywords[key])) key++;
        if (key == AVL__N_KEYWORDS)   // passed over, it would be broken by the answer
            return AVL__SCHEMA_UNKNOWN(j, p, "this keyword is not understood; those that are: type, properties, "
                                       "required, additionalProperties (true, false), items, minItems, maxItems, "
                                       "minLength, maxLength, enum, const, anyOf");
        if (avl__json_find(j, schema, avl__keywords[key]) != p + 1)
            return AVL__SCHEMA_WRONG(j, p, "a second member of the same name");
        n_rules += key < AVL__N_RULES;
    }
    const int type = avl__json_find(j, schema, "type"), any_of = avl__json_find(j, schema, "anyOf");
    const int items = avl__json_find(j, schema, "items"), choices = avl__json_find(j, schema, "enum");
    const int choice = choices ? choices : avl__json_find(j, schema, "const");
    int kinds = type ? 0 : (1 << AVL__N_KINDS) - 1;   // one bit each
    for (int p = type + (values[type].kind == '['); type && p < values[type].end; p = values[p].end) {
        int kind = 0;
        while (kind < AVL__N_KINDS && !avl__json_is(&values[p], avl__kinds[kind])) kind++;
        kinds |= 1 << kind;
    }
    if (kinds == 0 || kinds >= 1 << AVL__N_KINDS)
        return AVL__SCHEMA_WRONG(j, type, "a type is object, array, string, integer, number, boolean, null or a list");
    if (choice) {
        if (n_rules > 1 + (type != 0))
            return AVL__SCHEMA_UNKNOWN(j, schema, "beside enum or const only type is understood");
        if (choices && values[choices].kind != '[') return AVL__SCHEMA_WRONG(j, choices, "enum is an array of values");
        for (int p = choice + (choices != 0); p < values[choice].end; p = values[p].end) {
            static const char begins[] = "{[\"i0tn";   // as `kind` in values; booleans as true
            const char first = values[p].kind == 'f' ? 't' : values[p].kind;
            int kind = 1 << (strchr(begins, first) - begins);
            if (first == '0' && avl__json_is_whole(values[p].text)) kind |= 1 << AVL__INTEGER;
            if (kinds & kind) avl__push(g, avl__schema_literal(j, p, AVL__EMPTY));
        }
        const int x = avl__re_alt(g, base);
        return x ? x : AVL__SCHEMA_WRONG(j, schema, "no value is left to choose from");
    }
    if (any_of) {
        if (n_rules > 1) return AVL__SCHEMA_UNKNOWN(j, schema, "beside anyOf no other keyword is understood");
        if (values[any_of].kind != '[' || values[any_of].end == any_of + 1)
            return AVL__SCHEMA_WRONG(j, any_of, "an array of schemas is expected");
        for (int p = any_of + 1; p < values[any_of].end; p = values[p].end) avl__push(g, avl__schema_expr(j, p));
        return avl__re_alt(g, base);
    }
    if (!type) kinds = avl__json_find(j, schema, "properties") ? 1 << AVL__OBJECT : items ? 1 << AVL__ARRAY : 0;
    if (!kinds)
        return AVL__SCHEMA_UNKNOWN(j, schema, "a type (or enum, const, anyOf) is needed: any value is not understood");
    for (int kind = 0; kind < AVL__N_KINDS && !g->failure.status; kind++) {
        if (!(kinds >> kind & 1)) continue;
        int x = kind == AVL__OBJECT ? avl__schema_object(j, schema) : avl__re_pattern(g, avl__kind_patterns[kind]);
        if (kind == AVL__ARRAY && !items)
            return AVL__SCHEMA_UNKNOWN(j, schema, "an array needs items: any at all are not understood");
        if (kind == AVL__ARRAY) x = avl__schema_expr(j, items);
        if (kind == AVL__ARRAY || kind == AVL__STRING) x = avl__schema_list(j, schema, x, kind == AVL__ARRAY);
        avl__push(g, x);
    }
    return avl__re_alt(g, base);
}

// ---- from a pattern or a schema to a guide -------------------------------------------------------------------------

static astrovl_guide *avl__guide_build(const astrovl_model *model, const char *text, size_t size, int is_schema,
                                       astrovl_error *err) {
    if (!model || !text) avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a guide needs a model, and a pattern or schema");
    if (!model || !text || avl__need(model, AVL__PART_VOCAB, err) != ASTROVL_OK) return NULL;
    astrovl_guide *g = (astrovl_guide *)avl__alloc(1, sizeof *g);
    if (!g) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a guide");
    if (!g) return NULL;
    g->model = model;
    g->name = is_schema ? "schema" : "pattern";
    avl__guide_read_tokens(g);
    for (int kind = AVL__NONE; kind <= AVL__EMPTY; kind++) avl__re_make(g, kind, 0, 0, 0, 0);
    if (size > AVL__GUIDE_FAR)
        avl__fail(&g->failure, ASTROVL_ERROR_LIMIT, "%s: it has more than 262,144 bytes", g->name);
    if (!g->failure.status && !is_schema) g->start = avl__re_pattern(g, text);
    if (!g->failure.status && is_schema) {
        avl__reader schema;
        avl__json_open(&schema, g->name, text, size, &g->failure);
        schema.g = g;
        if (!g->failure.status) g->start = avl__schema_expr(&schema, 0);
        astrovl_free((void *)schema.text);
        astrovl_free(schema.values);
    }
    uint8_t begins[257] = {1};
    for (size_t i = 0; i < g->n_nodes; i++)
        if (g->nodes[i].kind == AVL__RANGE) begins[g->nodes[i].a] = begins[g->nodes[i].b + 1] = 1;
    for (int byte = 0; byte < 256; byte++) {
        if (begins[byte]) g->byte_of[g->n_classes++] = (uint8_t)byte;
        g->classes[byte] = (uint8_t)(g->n_classes - 1);
    }
    const int64_t least = g->failure.status ? 0 : g->nodes[g->start].least;
    if (least == AVL__GUIDE_NEVER)
        avl__fail(&g->failure, ASTROVL_ERROR_MODEL, "%s: the model's vocabulary cannot spell any such answer", g->name);
    if (least == AVL__GUIDE_FAR) avl__guide_fail(g, ASTROVL_ERROR_LIMIT);
    if (!g->failure.status) return g;
    avl__fail(err, g->failure.status, "%s", g->failure.message);
    astrovl_guide_free(g);
    return NULL;
}

ASTROVL_API astrovl_guide *astrovl_guide_regex(const astrovl_model *model, const char *pattern, astrovl_error *err) {
    return avl__guide_build(model, pattern, pattern ? strlen(pattern) : 0, 0, err);
}

ASTROVL_API astrovl_guide *astrovl_guide_schema(const astrovl_model *model, const char *json, size_t size,
                                                astrovl_error *err) {
    return avl__guide_build(model, json, size, 1, err);
}

// ---- turns ---------------------------------------------------------------------------------------------------------
// One conversation's turn, or turns of several that are written together: one token of each per step. A step takes as
// long as reading the weights from memory, which is done once for all of them.

typedef struct avl__turn {
    astrovl_turn    *asked;
    const astrovl_generation *options;
    float           *logits;                 // [n_vocab], of the position before the next token
    uint64_t         random_state;
    int              max_tokens, n_before;   // n_before: positions in the cache before this turn
    // the answer as it grows
    avl__tokens      tokens;
    avl__bytes       piece, text;            // the last token's bytes; the answer's whole characters
    avl__utf8_gate   gate;
    size_t           n_shown;                // bytes of text given to on_text
    int              state;                  // of the guide, if there is one
    int              is_cut;                 // a stop text was met or on_text returned non-zero: nothing more is shown
} avl__turn;

// Reads what a turn asks, images spliced in, up to the logits that its answer begins with. asked->err has a failure.
static astrovl_status avl__begin_turn(avl__turn *t) {
    astrovl_turn *asked = t->asked;
    const astrovl_generation *o = t->options;
    astrovl_session *s = asked->session;
    astrovl_error *err = &asked->err;
    const astrovl_model *m = s->model;
    double start = avl__seconds();
    memset(&s->stats, 0, sizeof s->stats);
    if (avl__need(m, AVL__PART_TEXT | AVL__PART_VOCAB, err) != ASTROVL_OK) return err->status;
    if (m->info.chat_template == ASTROVL_TEMPLATE_AUTO)
        return avl__fail(err, ASTROVL_ERROR_MODEL, "%s: its tokenizer.chat_template is none of the known ones; choose "
                         "another: " ASTROVL_TEMPLATE_NAMES, astrovl_gguf_name(m->weights.files[0]));
    if (!asked->text || asked->n_images < 0 || asked->n_images > 4096 || (asked->n_images > 0 && !asked->images))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a turn needs a text, and as many images as it says");
    int is_wrong = o->max_tokens < 0 || o->top_k < 0 || o->n_stop < 0 || !(o->temperature >= 0.0f && o->top_p >= 0.0f &&
                   o->min_p >= 0.0f && o->min_p <= 1.0f && o->repetition_penalty >= 0.0f);
    for (int i = 0; i < o->n_stop && !is_wrong; i++) is_wrong = !o->stop || !o->stop[i];
    if (is_wrong)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "options: one is negative, min_p above 1, or a stop text NULL");
    if (o->guide && (o->guide->model != m || o->n_stop > 0))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "the guide is another model's, or has stop texts beside it");
    const int n_least = o->guide ? astrovl_guide_min_tokens(o->guide, 0) : 0;
    if (t->max_tokens < n_least)
        return avl__fail(err, ASTROVL_ERROR_LIMIT, "the answer may need %d tokens to end as its guide asks; max_tokens "
                         "is %d", n_least, t->max_tokens);
    avl__tokens tokens = {NULL, 0, 0};
    avl__lay_out_turn(asked, o, &tokens);
    const int n_embd = m->llama.n_embd, n_patches = m->clip.n_patches;
    const int64_t n_rows = (int64_t)tokens.size + (int64_t)asked->n_images * (n_patches - 1);
    if (!err->status && n_rows >= s->cache.n_ctx - s->cache.n_past)
        avl__fail(err, ASTROVL_ERROR_LIMIT, "the context is full: of %d positions (-c, n_ctx) %d are taken, and this "
                  "turn needs %lld and room for an answer", s->cache.n_ctx, s->cache.n_past, (long long)n_rows);
    float *rows = err->status ? NULL : avl__alloc_floats((uint64_t)n_rows * n_embd), *row = rows;
    avl__bytes_put(&t->text, "", 0);
    if (!err->status && !rows) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the prompt");
    for (size_t i = 0; i < tokens.size && !err->status; i++) {
        const int32_t token = tokens.data[i];
        if (token >= 0) avl__embed_tokens(&m->llama.token_embd, &token, 1, row);
        else astrovl_encode_image(s, &asked->images[-1 - token], row, err);
        row += (size_t)(token >= 0 ? 1 : n_patches) * n_embd;
    }
    s->stats.encode_seconds = avl__seconds() - start;
    start = avl__seconds();
    if (!err->status) avl__eval(s, NULL, rows, (int)n_rows, t->logits, 1, err);
    s->stats.prompt_seconds = avl__seconds() - start;
    s->stats.n_prompt_tokens = (int)n_rows;
    astrovl_free(rows);
    astrovl_free(tokens.data);
    return err->status;
}

static void avl__show(avl__turn *t, size_t end) {   // what is new up to that byte
    const astrovl_generation *o = t->options;
    const char *text = t->text.data + t->n_shown;
    if (end > t->n_shown && o->on_text && o->on_text(o->user, text, end - t->n_shown)) t->is_cut = 1;
    t->n_shown = end;
}

// Writes the token after t->logits, and shows its text. Returns 1 if the answer goes on once this token is read; 0 when
// the model, the guide, a stop text or a limit ends it, or on a failure (asked->err). The last token is left unread:
// the next turn reads it.
static int avl__write_token(avl__turn *t) {
    astrovl_session *s = t->asked->session;
    const astrovl_generation *o = t->options;
    astrovl_guide *guide = o->guide;
    astrovl_error *err = &t->asked->err;
    const int n_most = t->max_tokens - (int)t->tokens.size, n_room = s->cache.n_ctx - s->cache.n_past + 1;
    const int n_left = n_most < n_room ? n_most : n_room;
    if (guide && astrovl_guide_mask(guide, t->state, n_left, t->logits, err) != ASTROVL_OK) return 0;
    const int32_t token = astrovl_sample(t->logits, s->model->llama.n_vocab, o, t->tokens.data, (int)t->tokens.size,
                                         &t->random_state);
    const int is_end = avl__vocab_is_end(&s->model->vocab, token);
    int next = guide && !is_end ? astrovl_guide_next(guide, t->state, token) : 0;
    if (guide && is_end && !astrovl_guide_is_accepting(guide, t->state)) next = -1;
    if (next < 0) avl__fail(err, ASTROVL_ERROR_MODEL, "no token can be chosen: the model's logits are not numbers");
    if (guide && guide->failure.status) *err = guide->failure;
    if (err->status || is_end) return 0;
    t->piece.size = 0;
    avl__put_token(&s->model->vocab, token, &t->piece);
    t->text.failed |= t->piece.failed || !avl__tokens_put(&t->tokens, token);   // what avl__end_turn looks at
    if (t->text.failed) return 0;
    size_t skip = 0;
    if (guide) skip = (size_t)avl__guide_skip(guide, t->state, t->piece.data, t->piece.size);
    else if (t->text.size + t->gate.n_pending == 0) skip = strspn(t->piece.data, " \n");   // the first white space
    avl__utf8_gate_put(&t->gate, t->piece.data + skip, t->piece.size - skip, &t->text);
    if (t->text.failed) return 0;
    size_t n_clear = t->text.size;       // bytes from here on may begin a stop text, and are not shown yet
    for (size_t at = t->n_shown; at < t->text.size; at++)
        for (int i = guide ? 0 : -1; i < o->n_stop; i++) {       // -1: the template's
            const char *stop = i < 0 ? avl__templates[s->model->info.chat_template].stop : o->stop[i];
            const size_t size = strlen(stop), rest = t->text.size - at;
            if (!size || memcmp(t->text.data + at, stop, size < rest ? size : rest) != 0) continue;
            if (at < n_clear) n_clear = at;
            if (size > rest) continue;
            t->is_cut = 1;               // the answer ends before it
            for (int n = (int)rest; i < 0 && n > 0 && t->tokens.size; )   // the next turn begins with it
                n -= avl__vocab_token_bytes(&s->model->vocab, t->tokens.data[--t->tokens.size], NULL, 0);
            t->text.size = n_clear = at;
            t->text.data[at] = 0;
        }
    avl__show(t, n_clear);
    t->state = next;
    if (t->is_cut || (guide && next == AVL__EMPTY)) return 0;
    s->stats.stopped_by_limit = n_left <= 1;
    return n_left > 1;
}

// Hands the answer over and keeps its tokens in the conversation; or puts the conversation back, if the turn failed.
static void avl__end_turn(avl__turn *t) {
    astrovl_session *s = t->asked->session;
    astrovl_error *err = &t->asked->err;
    if (!err->status && !t->is_cut) {   // what was held back is shown, an unfinished character as U+FFFD
        avl__utf8_gate_flush(&t->gate, &t->text);
        if (t->text.failed) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for the answer");
        else avl__show(t, t->text.size);
    }
    astrovl_free(t->piece.data);
    astrovl_free(err->status ? t->text.data : NULL);
    astrovl_free(err->status ? t->tokens.data : s->answer.data);
    if (err->status) s->cache.n_past = t->n_before;
    if (err->status) return;
    t->asked->answer = t->text.data;
    s->answer = t->tokens;
    const int n_past = t->n_before + s->stats.n_prompt_tokens + (int)t->tokens.size;
    if (s->cache.n_past > n_past) s->cache.n_past = n_past;
    s->n_unread = n_past - s->cache.n_past;
    s->n_turns++;
    s->stats.n_answer_tokens = (int)t->tokens.size;
}

// Writes the answers, each to its end. Those that go on are moved to the front, and read the token just written, up to
// AVL__STEP_ROWS in one pass.   turns: [n], in any order afterwards;  logits: scratch, [n][n_vocab]
static void avl__write_answers(avl__turn *turns, int n, float *logits) {
    const avl__llama *llama = &turns->asked->session->model->llama;
    avl__run *run = turns->asked->session->run;
    const int n_most = run->options.tap ? 1 : AVL__STEP_ROWS;   // the tap sees one conversation at a time
    double start = avl__seconds();
    for (int n_going; n > 0; n = n_going) {
        n_going = 0;
        for (int i = 0; i < n; i++) {
            if (!turns[i].asked->err.status && avl__write_token(&turns[i])) {
                const avl__turn going = turns[i];
                turns[i] = turns[n_going];
                turns[n_going++] = going;
            } else avl__end_turn(&turns[i]);
        }
        for (int first = 0; first < n_going; first += n_most) {
            const int n_rows = n_going - first < n_most ? n_going - first : n_most;
            avl__turn *t = turns + first;
            avl__kv_cache *caches[AVL__STEP_ROWS];
            int32_t tokens[AVL__STEP_ROWS];
            astrovl_error failure = {ASTROVL_OK, ""};
            for (int i = 0; i < n_rows; i++) {
                caches[i] = &t[i].asked->session->cache;
                tokens[i] = t[i].tokens.data[t[i].tokens.size - 1];
                t[i].logits = logits + (size_t)(first + i) * llama->n_vocab;
            }
            avl__llama_eval(llama, run, caches, n_rows, tokens, NULL, n_rows, t->logits, n_rows, &failure);
            for (int i = 0; i < n_rows; i++) t[i].asked->err = failure;
        }
        const double now = avl__seconds();
        for (int i = 0; i < n; i++) turns[i].asked->session->stats.decode_seconds += (now - start) / n;
        start = now;
    }
}

ASTROVL_API astrovl_status astrovl_chat_batch(astrovl_turn *turns, int n_turns, astrovl_error *err) {
    astrovl_error failure = {ASTROVL_OK, ""};
    astrovl_generation defaults;
    memset(&defaults, 0, sizeof defaults);
    if (!turns || n_turns < 1) return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a batch of no turns");
    for (int i = 0; i < n_turns && !failure.status; i++) {
        int is_wrong = !turns[i].session || turns[i].session->run != turns->session->run;
        for (int j = 0; j < i; j++) is_wrong |= turns[j].session == turns[i].session;
        if (is_wrong)
            avl__fail(&failure, ASTROVL_ERROR_ARGUMENT, "turn %d has no session, an earlier turn's, or one that shares "
                      "nothing with turn 0's (astrovl_session_fork)", i);
    }
    const int n_vocab = failure.status ? 0 : turns->session->model->llama.n_vocab;   // NOLINT: checked above
    avl__turn *room = (avl__turn *)avl__alloc((uint64_t)n_turns, sizeof *room);
    float *logits = avl__alloc_floats((uint64_t)n_turns * n_vocab);
    if (!failure.status && (!room || !logits)) avl__fail(&failure, ASTROVL_ERROR_MEMORY, "out of memory for a batch");
    for (int i = 0; i < n_turns; i++) {
        turns[i].answer = NULL;
        turns[i].err = failure;
        if (failure.status) continue;
        avl__turn *t = &room[i];
        t->asked = &turns[i];
        t->options = turns[i].options ? turns[i].options : &defaults;
        t->logits = logits + (size_t)i * n_vocab;
        t->random_state = t->options->seed;
        t->max_tokens = t->options->max_tokens > 0 ? t->options->max_tokens : 256;
        t->n_before = turns[i].session->cache.n_past;
        avl__begin_turn(t);
    }
    if (!failure.status) avl__write_answers(room, n_turns, logits);
    astrovl_free(room);
    astrovl_free(logits);
    for (int i = 0; i < n_turns && !failure.status; i++) failure = turns[i].err;
    return failure.status ? avl__fail(err, failure.status, "%s", failure.message) : ASTROVL_OK;
}

ASTROVL_API char *astrovl_chat(astrovl_session *s, const astrovl_image *images, int n_images, const char *text,
                               const astrovl_generation *options, astrovl_error *err) {
    astrovl_turn turn = {s, images, n_images, text, options, NULL, {ASTROVL_OK, ""}};
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
    if (astrovl_image_load(image_path, NULL, &image, err) != ASTROVL_OK) return NULL;
    char *answer = astrovl_ask(model, &image, question, options, err);
    astrovl_image_free(&image);
    return answer;
}

ASTROVL_API char *astrovl_caption_file(const astrovl_model *model, const char *image_path,
                                       const astrovl_generation *options, astrovl_error *err) {
    return astrovl_ask_file(model, image_path, ASTROVL_CAPTION_PROMPT, options, err);
}

// ====================================================================================================================
// [12] Contrastive
// CLIP (Radford et al. 2021) and PAPERCLIP (Mishra-Sharma et al. 2024): an image and a text that belong together have
// embeddings that point the same way. So a text can be looked for among images, and an image among texts.
//     cosine(a, b) = a . b / (|a| |b|);    p(text j | image i) = softmax_j(logit_scale * cosine(image_i, text_j))
// ====================================================================================================================

enum { AVL__JOINT_ROWS = 1024 };   // of a pass through a tower: enough for all threads, few enough for the CPU's caches
enum { AVL__JOINT_FLAGS = ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL };

ASTROVL_API astrovl_status astrovl_embed_images(astrovl_session *s, const astrovl_image *images, int n_images,
                                                int normalize, float *embeddings, astrovl_error *err) {
    astrovl_status status = avl__need(s ? s->model : NULL, AVL__PART_JOINT_IMAGE, err);
    if (status) return status;
    if (n_images < 0 || (n_images > 0 && (!images || !embeddings)))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no images or no room for their embeddings was given");
    const avl__clip *clip = &s->model->clip;   // NOLINT: avl__need refuses NULL
    const avl__tower *tower = &clip->tower;
    avl__run *run = s->run;
    const int n_dims = s->model->info.n_embd_joint, d = tower->n_embd, n_rows = 1 + clip->n_patches;
    const int n_pass = run->options.tap ? 1 : 1 + AVL__JOINT_ROWS / n_rows;          // the tap sees them one by one
    for (int n; n_images > 0 && !status; n_images -= n, images += n, embeddings += (size_t)n * n_dims) {
        n = n_images < n_pass ? n_images : n_pass;
        avl__run_begin(run, 1);
        float *x = avl__take(run, (uint64_t)n * n_rows * d);                         // [n][n_rows][n_embd]
        status = avl__clip_run(clip, run, images, n, tower->n_layer, x, err);
        if (status) return status;
        for (int i = 1; i < n; i++)                                                  // the class rows: [n][n_embd]
            memcpy(x + (size_t)i * d, x + (size_t)i * n_rows * d, (size_t)d * sizeof(float));
        avl__norm_rows(run, x, x, tower->norm_weight, tower->norm_bias, n, d, tower->eps);
        avl__tap(run, "vision_model.post_layernorm", -1, "", x, n, d);
        status = avl__joint_run(tower, run, x, n, normalize, embeddings, err);
    }
    return status;
}

ASTROVL_API astrovl_status astrovl_embed_texts(astrovl_session *s, const char *const *texts, int n_texts, int normalize,
                                               float *embeddings, astrovl_error *err) {
    const astrovl_model *m = s ? s->model : NULL;
    astrovl_status status = avl__need(m, AVL__PART_JOINT_TEXT, err);
    avl__tokens tokens = {NULL, 0, 0};
    int lengths[AVL__JOINT_ROWS];                                // enough: a text has two tokens at least
    if (status) return status;
    if (n_texts < 0 || (n_texts > 0 && (!texts || !embeddings)))
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no texts or no room for their embeddings was given");
    const avl__clip_text *clip = &m->clip_text;   // NOLINT: avl__need refuses NULL
    const avl__tower *tower = &clip->tower;
    const int d = tower->n_embd, n_dims = m->info.n_embd_joint;
    const int32_t end = m->clip_vocab.eos;
    avl__run *run = s->run;
    for (int done = 0, n; done < n_texts && !status; done += n, embeddings += (size_t)n * n_dims) {
        const int n_most = run->options.tap ? 1 : n_texts - done;   // the tap sees them one by one
        tokens.size = 0;
        for (n = 0; n < n_most && tokens.size < AVL__JOINT_ROWS && !status; n++) {
            const char *text = texts[done + n];
            const size_t before = tokens.size, most = before + (size_t)clip->n_ctx;
            status = text ? avl__vocab_encode(&m->clip_vocab, text, strlen(text), AVL__JOINT_FLAGS, &tokens, err)
                          : avl__fail(err, ASTROVL_ERROR_ARGUMENT, "text %d is NULL", done + n);
            if (tokens.size > most) {                            // cut to the tower's positions
                tokens.size = most;
                tokens.data[most - 1] = end;   // NOLINT: size is not 0
            }
            lengths[n] = (int)(tokens.size - before);
        }
        const int n_rows = (int)tokens.size;
        avl__run_begin(run, 1);
        float *x = avl__take(run, (uint64_t)n_rows * d);         // [n_rows][n_embd], the texts one after the other
        if (!status) status = avl__pass_status(run, "text", 0, 0, err);
        if (status) break;
        avl__embed_tokens(&clip->token_embd, tokens.data, n_rows, x);
        for (int i = 0, at = 0; i < n; at += lengths[i++])
            avl__add(x + (size_t)at * d, tower->position_embd, (int64_t)lengths[i] * d);
        avl__tap(run, "text_model.embeddings", -1, "", x, n_rows, d);
        status = avl__tower_run(tower, run, x, n_rows, lengths, n, tower->n_layer, err);
        if (status) break;
        avl__norm_rows(run, x, x, tower->norm_weight, tower->norm_bias, n_rows, d, tower->eps);
        avl__tap(run, "text_model.final_layer_norm", -1, "", x, n_rows, d);
        for (int i = 0, at = 0; i < n; at += lengths[i++]) {     // a text is its first end token's row, or its last
            int j = at;
            while (j + 1 < at + lengths[i] && tokens.data[j] != end) j++;   // NOLINT: rows come from tokens
            memmove(x + (size_t)i * d, x + (size_t)j * d, (size_t)d * sizeof(float));
        }
        status = avl__joint_run(tower, run, x, n, normalize, embeddings, err);
    }
    astrovl_free(tokens.data);
    return status;
}

ASTROVL_API int astrovl_clip_tokenize(const astrovl_model *model, const char *text, size_t size, int32_t *tokens,
                                      int capacity, astrovl_error *err) {
    return avl__tokenize(model, AVL__PART_JOINT_TEXT, text, size, AVL__JOINT_FLAGS, tokens, capacity, err);
}

ASTROVL_API astrovl_status astrovl_score(const astrovl_model *model, const astrovl_image *image,
                                         const char *const *texts, int n_texts, astrovl_fit *fits, astrovl_error *err) {
    astrovl_status status = avl__need(model, AVL__PART_JOINT_IMAGE | AVL__PART_JOINT_TEXT, err);
    if (status) return status;
    if (n_texts < 1 || !fits)
        return avl__fail(err, ASTROVL_ERROR_ARGUMENT, "no texts or no room for their fits was given");
    astrovl_session *s = astrovl_session_new(model, NULL, err);
    if (!s) return ASTROVL_ERROR_MEMORY;
    const size_t n_dims = (size_t)model->info.n_embd_joint;
    float *rows = avl__alloc_floats(((uint64_t)n_texts + 1) * n_dims);       // [1 + n_texts][n_dims], the image's first
    if (!rows) status = avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for %d embeddings", n_texts);
    if (!status) status = astrovl_embed_images(s, image, 1, 1, rows, err);
    if (!status) status = astrovl_embed_texts(s, texts, n_texts, 1, rows + n_dims, err);
    const int n = status ? 0 : n_texts;
    for (int j = 0; j < n; j++)
        fits[j].cosine = avl__dot_portable(rows, rows + ((size_t)j + 1) * n_dims, (int)n_dims);
    for (int j = 0; j < n; j++) rows[j] = model->info.logit_scale * fits[j].cosine;   // in the rows' place
    astrovl_softmax(rows, n);
    for (int j = 0; j < n; j++) fits[j].probability = rows[j];
    astrovl_session_free(s);
    astrovl_free(rows);
    return status;
}

// ---- search --------------------------------------------------------------------------------------------------------
// Each thread goes through slices of the rows and keeps the best k of each, sorted. Of n rows in random order, about
// k ln(n / k) get into such a list.

// Puts a hit into a list of *n hits, best first, of which the best k are kept.
static void avl__hits_insert(astrovl_hit *hits, int *n, int k, astrovl_hit hit) {
    if (*n == k && !(hit.score > hits[k - 1].score)) return;     // on a tie, the row that came first stays
    if (*n < k) (*n)++;
    int at = *n - 1;
    for (; at > 0 && hit.score > hits[at - 1].score; at--) hits[at] = hits[at - 1];
    hits[at] = hit;
}

typedef struct avl__search {
    const avl__kernels *kernels;
    astrovl_rows        rows;
    const float        *query;
    int                 k, n_slices;
    astrovl_hit        *hits;       // [n_slices][k]
} avl__search;

static void avl__search_slice(void *context, int slice, int thread) {
    const avl__search *s = (const avl__search *)context;
    const int64_t end = s->rows.n_rows * (slice + 1) / s->n_slices;
    const int n_dims = s->rows.n_dims;
    astrovl_hit hit;
    int n_hits = 0;
    (void)thread;
    for (hit.row = s->rows.n_rows * slice / s->n_slices; hit.row < end; hit.row++) {
        hit.score = s->kernels->dot_f16((const uint8_t *)s->rows.data + (size_t)hit.row * 2 * n_dims, s->query, n_dims);
        if (!(hit.score >= -FLT_MAX)) hit.score = -FLT_MAX;      // NaN, in a damaged index: comes last
        avl__hits_insert(s->hits + (size_t)slice * s->k, &n_hits, s->k, hit);
    }
}

ASTROVL_API int astrovl_search(const astrovl_rows *rows, const float *query, int k, int n_threads, astrovl_hit *hits,
                               astrovl_error *err) {
    if (!rows || rows->n_rows < 0 || rows->n_dims < 1 || k < 1 || n_threads < 0 || !query || !hits ||
        (rows->n_rows > 0 && !rows->data) || (uint64_t)rows->n_rows > SIZE_MAX / 2 / (uint64_t)rows->n_dims ||
        !avl__are_numbers(query, rows->n_dims)) {
        avl__fail(err, ASTROVL_ERROR_ARGUMENT, "a search needs rows, a query of numbers and room for k hits");
        return -1;
    }
    const int n_each = k < rows->n_rows ? k : (int)rows->n_rows;   // hits of a slice, which has at least as many rows
    const int64_t n_slices = rows->n_rows / (k > 4096 ? k : 4096);
    avl__search s = {avl__choose_kernels(ASTROVL_FAST, NULL), *rows, query, n_each, 1, NULL};
    if (n_slices > 1) s.n_slices = n_slices > 256 ? 256 : (int)n_slices;
    s.hits = (astrovl_hit *)avl__alloc_raw((uint64_t)s.n_slices * (uint64_t)n_each, sizeof *s.hits);
    avl__pool *pool = avl__pool_new(n_threads);
    int n = pool && s.hits ? 0 : -1;
    if (n < 0) avl__fail(err, ASTROVL_ERROR_MEMORY, "out of memory for a search");
    else       avl__pool_run(pool, avl__search_slice, &s, s.n_slices);
    for (int slice = 0; slice < s.n_slices && n >= 0; slice++)
        for (int i = 0; i < n_each; i++) avl__hits_insert(hits, &n, k, s.hits[(size_t)slice * n_each + i]);
    avl__pool_free(pool);
    astrovl_free(s.hits);
    return n;
}

// ====================================================================================================================
// [13] SIMD kernels
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
// Three ways to multiply. Block formats are added up by one function (add_block) in one order, so that a row's bits do
// not depend on how many rows are multiplied with it. (Weights of a float type have packs for many rows only; a few
// rows are multiplied with them in float32, as they lie in memory: see linear.)
//   many rows (image, prompt)   32 weight rows are packed, then meet the activations in tiles of up to 6 rows (bf16:
//                               12) whose accumulators stay in registers. The dot-product instruction is the limit.
//   2 to 8 rows (batches)       AVX-512: eight rows meet a block while it is in registers, so that the next block is
//                               unpacked by units that products leave idle. Others, which have too few registers for
//                               it: packs of 16 blocks, which stay in the L1 cache, and tiles of 4 rows.
//   one row (writing)           blocks are multiplied as they are unpacked; nothing is stored. Reading memory is the
//                               limit, so the weights that come next are prefetched.
// Tile sizes: 6 rows x 2 registers take 12 integer and 12 float accumulators, 2 registers of weights and 1 of
// activations, 27 of 32 (AVX2 with its 16 registers: 4 rows, float accumulators in memory). 2 loads of weights and 6
// broadcasts serve 12 multiplications. A pack of 4096 columns takes 160 KB of the L2 cache.
// ====================================================================================================================

#if AVL__SIMD

// `type`, `kind` and numbers of rows are constants wherever an AVL__INLINE function is called, so every format and tile
// is code of its own; AVL__UNROLL keeps arrays of registers in registers.
#if defined(__OPTIMIZE__)
#define AVL__INLINE static inline __attribute__((always_inline))
#else
#define AVL__INLINE static inline      // without optimization, copies of everything would only cost compile time
#endif
#define AVL__APART  static __attribute__((noinline))
#if defined(__clang__)
#define AVL__UNROLL _Pragma("clang loop unroll(full)")
#else
#define AVL__UNROLL _Pragma("GCC unroll 24")
#endif
#define AVL__EACH(i, n) AVL__UNROLL for (int i = 0; i < (n); i++)   // NOLINT: i is a name

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
    AVL__FEW = 8,             // rows of activations, at most, that are multiplied as weights are unpacked
    AVL__AHEAD = 6144         // bytes to prefetch ahead in a row
};

AVL__INLINE int avl__words_of(int kind) { return kind == AVL__AS_F32 ? 32 : kind >= AVL__AS_PAIRS ? 16 : 8; }

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
#define AVL__ALL_TYPES(F) AVL__BLOCK_TYPES(F) AVL__FLOAT_TYPES(F)

typedef struct avl__block_form {
    size_t bytes;
    int    offset, n_parts, has_min, run;
} avl__block_form;

AVL__INLINE avl__block_form avl__block_form_of(int type) {
    const avl__block_form none = {0, 0, 1, 0, 0};
#define AVL__FORM(name, type, ...) \
    case type: { \
        const avl__block_form form = {__VA_ARGS__}; \
        return form; \
    }
    switch (type) {
    AVL__ALL_TYPES(AVL__FORM)
    default: return none;
    }
}

AVL__INLINE int avl__is_k_quant(int type) { return type >= ASTROVL_TYPE_Q2_K && type <= ASTROVL_TYPE_Q6_K; }

// How many blocks are unpacked at a time, and where those begin that have block b: the last ones overlap those before,
// or begin before the row does (below 0) if it has fewer blocks.
AVL__INLINE int avl__group_of(int type) { return avl__is_k_quant(type) ? 8 : avl__is_float_type(type) ? 1 : 4; }
AVL__INLINE int avl__group_begin(int type, int b, int n_blocks) {
    const int n = avl__group_of(type);
    return b + n <= n_blocks ? b : n_blocks - n;
}

AVL__INLINE void avl__prefetch_lines(const void *p, size_t n) {
    for (size_t i = 0; i < n; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

// Hardware prefetching stops at the end of a 4 KB page: if p lies in a page's first n bytes, the next page's first
// lines are asked for.
AVL__INLINE void avl__prefetch_page(const void *p, size_t n) {
    if (((uintptr_t)p & 4095) < n) avl__prefetch_lines((const void *)(((uintptr_t)p | 4095) + 1), 256);
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
#define AVL__DEFINE_DOT(name, assembly, r) \
    AVL__INLINE avl__vi AVL_(name)(avl__vi acc, avl__vu w, avl__vu a) { \
        __asm__(assembly : "+" r(acc) : r(w), r(a)); /* NOLINT: strings */ \
        return acc; \
    }
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

#if AVL__X86

// The instructions of AVX-VNNI, by assembly: older compilers lack the intrinsics. {vex} tells them from AVX-512's.
#if defined(ASTROVL_TEST_EVEX_VNNI)
#define AVL__VNNI(name) "%{evex%} " name " {%2, %1, %0|%0, %1, %2}"
#elif (defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && __GNUC__ >= 11)
#define AVL__VNNI(name) "%{vex%} " name " {%2, %1, %0|%0, %1, %2}"
#else
#define AVL__VNNI(name) ""              // older assemblers: the table is there, but never chosen
#endif

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

// sdot by its encoding: assemblers refuse its name unless the whole file is compiled for it. .Lavl_v7 is 7.
#define AVL__SDOT(code) \
                  ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t" \
                  ".equ .Lavl_v\\i,\\i\n\t.endr\n\t" \
                  ".inst " #code " + (.Lavl_%2 << 16) + (.Lavl_%1 << 5) + .Lavl_%0"

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
#if defined(ASTROVL_TEST_EVEX_VNNI)
    if (i == 2) return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else                      // asked of the processor itself: older compilers do not know the name
    unsigned a = 7, b, c = 1, d;
    if (i == 2) __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (i == 2) return avl__kernels_run(1) && sizeof AVL__VNNI("") > 1 && (a >> 4 & 1);
#endif
    if (i == 3)            // which implies avx512f
        return avl__kernels_run(1) && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    if (i == 4) return avl__kernels_run(3) && __builtin_cpu_supports("avx512bf16");
#elif AVL__SIMD && AVL__NEON && defined(__ARM_FEATURE_DOTPROD)      // as all processors of Macs have it
    return 1;
#elif AVL__SIMD && AVL__NEON && AVL__POSIX && defined(__linux__)
    if (i == 2) return (int)(getauxval(AT_HWCAP) >> 20 & 1);     // HWCAP_ASIMDDP
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
// The template of [13]: included once for each instance (AVL__ISA). AVL__WIDE: its byte product adds up in 32 bits.
// AVL__BASE: the instance from which it takes all but the products.
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
AVL__DEFINE_VOID(store, (void *p, avl__vf v), memcpy(p, &v, sizeof v))
AVL__DEFINE(avl__vf, splat, (float x), x - __extension__(avl__vf){0})
AVL__DEFINE(avl__vi, splat_int, (int32_t x), x + __extension__(avl__vi){0})
AVL__INLINE avl__vu AVL_(splat_word)(const void *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return (avl__vu)AVL_(splat_int)(word);
}
AVL__DEFINE(avl__vf, to_float, (avl__vi v), __builtin_convertvector(v, avl__vf))

// ---- what instruction sets do by themselves ------------------------------------------------------------------------
// fma(a, b, c)              a b + c
// dot_bytes(acc, w, a)      acc + w a of four columns of bytes, w unsigned; if not AVL__WIDE acc is two int16, which
//                           widen(acc) adds up to an int32
// dot_signed, dot_pairs     the same of signed bytes, of two int16; acc always has 32 bits
// dot_lane(acc, w, a, i)    the same of signed bytes and of word i of a alone
// dot_two                   dot_bytes of two words, whose products add up before those of neighboring columns do
// dot_bf16(acc, w, a)       of two bfloat16; acc is a float
// load_16(p, stride)        16 bytes at p, p + 4 stride, p + 8 stride ...
// zip_low32, zip_high32 ... words of a and b in turn, from the lower or the upper half of each 128 bits
// middle(a, b)              the upper half of each lane of a, below the lower half of b
// add_bits(u, bits, i)      u, with bits 4 i to 4 i + 3 of each lane added to its four bytes as 16
// half(w), load_halves(p)   float16 to float: the lower half of each lane; AVL__W in memory
// round(x)                  to the nearest integer, |x| < 2^22;   scale_2(x, n): x 2^n
// load_some, store_some     the first n floats, n <= 0 and n > AVL__W included; loads fill up with zeros

#if AVL__W == 16

#define AVL__MM(name) _mm512_##name
#define AVL__INT      __m512i
#define AVL__TILE     6               // rows of activations whose integer and float accumulators fit in registers
#define AVL__TILE_SIZES(F) F(4) F(6) F(12)
#define AVL__STEP     1               // words of a block that are multiplied together

AVL__DEFINE(avl__vi, dot_bytes, (avl__vi acc, avl__vu w, avl__vu a),
            _mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a))
AVL__DEFINE(avl__vi, dot_pairs, (avl__vi acc, avl__vu w, avl__vu a),
            _mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)a))
AVL__DEFINE(avl__vi, widen, (avl__vi acc), acc)
AVL__DEFINE(avl__vf, dot_bf16, (avl__vf acc, avl__vu w, avl__vu a), _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a))
AVL__DEFINE(avl__vu, to_bf16, (avl__vf first, avl__vf second), _mm512_cvtne2ps_pbh(second, first))
AVL__DEFINE(__mmask16, first_lanes, (int64_t n), n >= 16 ? 0xFFFF : n > 0 ? (1 << n) - 1 : 0)
AVL__DEFINE(avl__vf, load_some, (const float *p, int64_t n), _mm512_maskz_loadu_ps(AVL_(first_lanes)(n), p))
AVL__DEFINE_VOID(store_some, (float *p, int64_t n, avl__vf v), _mm512_mask_storeu_ps(p, AVL_(first_lanes)(n), v))
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
AVL__INLINE avl__vu AVL_(add_bits)(avl__vu u, avl__vu bits, int i) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    const __m512i four = _mm512_shuffle_epi8((__m512i)bits, _mm512_add_epi8(first, _mm512_set1_epi8((char)(i / 2))));
    const __mmask64 is_set = _mm512_test_epi8_mask(four, _mm512_set1_epi32(i % 2 ? (int)0x80402010 : 0x08040201));
    return (avl__vu)_mm512_mask_add_epi8((__m512i)u, is_set, (__m512i)u, _mm512_set1_epi8(16));
}
// 16 bytes to some lanes: a load, where insertion takes a shuffle. In assembly, or gcc makes shuffles of it again.
#define AVL__INSERT_16(v, lanes, p) \
    __asm__("vbroadcasti32x4 {%1, %0%{%2%}|%0%{%2%}, %1}" \
            : "+v"(v) : "m"(*(const uint8_t (*)[16])(p)), "Yk"((__mmask16)(lanes)))
AVL__INLINE avl__vu AVL_(load_16)(const uint8_t *p, size_t stride) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)p));
    AVL__INSERT_16(v, 0x00F0, p + 4 * stride);
    AVL__INSERT_16(v, 0x0F00, p + 8 * stride);
    AVL__INSERT_16(v, 0xF000, p + 12 * stride);
    return (avl__vu)v;
}

#elif AVL__W == 8

#define AVL__MM(name) _mm256_##name
#define AVL__INT      __m256i
#define AVL__TILE     4
#define AVL__TILE_SIZES(F) F(4)
#define AVL__STEP     1

AVL__DEFINE(avl__vi, widen, (avl__vi acc), _mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)))
#if AVL__WIDE
AVL__DEFINE_DOT(dot_bytes, AVL__VNNI("vpdpbusd"), "x")
AVL__DEFINE_DOT(dot_pairs, AVL__VNNI("vpdpwssd"), "x")
#else
AVL__INLINE avl__vi AVL_(now)(__m256i sum) {      // or gcc computes a block's products first and runs out of registers
    __asm__("" : "+x"(sum));
    return (avl__vi)sum;
}
AVL__DEFINE(avl__vi, dot_bytes, (avl__vi acc, avl__vu w, avl__vu a),
            AVL_(now)(_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)a))))
AVL__DEFINE(avl__vi, dot_pairs, (avl__vi acc, avl__vu w, avl__vu a),
            AVL_(now)(_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)w, (__m256i)a))))
AVL__INLINE avl__vi AVL_(dot_signed)(avl__vi acc, avl__vu w, avl__vu a) {   // |w| (a sign(w)): two of them fit in int16
    const __m256i signed_a = _mm256_sign_epi8((__m256i)a, (__m256i)w);
    acc += AVL_(widen)((avl__vi)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), signed_a));
    return AVL_(now)((__m256i)acc);
}
#endif
AVL__DEFINE(__m256i, first_lanes, (int n),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
AVL__DEFINE(avl__vf, load_some, (const float *p, int64_t n),
            n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, AVL_(first_lanes)((int)n)))
AVL__DEFINE_VOID(store_some, (float *p, int64_t n, avl__vf v),
                 n >= 8 ? _mm256_storeu_ps(p, v) : _mm256_maskstore_ps(p, AVL_(first_lanes)((int)n), v))
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
AVL__INLINE avl__vu AVL_(add_bits)(avl__vu u, avl__vu bits, int i) {
    const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    const __m256i place = _mm256_add_epi8(first, _mm256_set1_epi8((char)(i / 2)));
    const avl__vu four = (avl__vu)_mm256_shuffle_epi8((__m256i)(i % 2 ? bits : bits << 4), place) & 0x80402010u;
    return u | (avl__vu)_mm256_min_epu8((__m256i)four, _mm256_set1_epi8(16));
}
AVL__DEFINE(avl__vu, load_16, (const uint8_t *p, size_t stride),
            _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(const void *)(p + 4 * stride)),
                             _mm_loadu_si128((const __m128i *)(const void *)p)))

#else   // four lanes: NEON, or what the compiler makes of vectors (SSE2, VSX, LSX, WASM SIMD, RISC-V V)

#define AVL__TILE 6
#define AVL__TILE_SIZES(F) F(4) F(6)

#if AVL__WIDE
#define AVL__STEP 1
AVL__DEFINE_DOT(dot_lane0, AVL__SDOT(0x4F80E000), "w")
AVL__DEFINE_DOT(dot_lane1, AVL__SDOT(0x4FA0E000), "w")
AVL__DEFINE_DOT(dot_lane2, AVL__SDOT(0x4F80E800), "w")
AVL__DEFINE_DOT(dot_lane3, AVL__SDOT(0x4FA0E800), "w")
AVL__DEFINE(avl__vi, dot_lane, (avl__vi acc, avl__vu w, avl__vu a, int i),
            i == 0 ? AVL_(dot_lane0)(acc, w, a) : i == 1 ? AVL_(dot_lane1)(acc, w, a) :
            i == 2 ? AVL_(dot_lane2)(acc, w, a) : AVL_(dot_lane3)(acc, w, a))
AVL__DEFINE(avl__vi, widen, (avl__vi acc), acc)
#elif AVL__NEON       // products of eight bytes are eight int16; neighbors are added up
#define AVL__STEP 2
AVL__DEFINE(avl__vs, products, (int8x16_t w, int8x16_t a),
            vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)))
AVL__INLINE avl__vi AVL_(dot_two)(avl__vi acc, avl__vu w0, avl__vu a0, avl__vu w1, avl__vu a1) {
    const int8x16_t w = (int8x16_t)w0, a = (int8x16_t)a0, v = (int8x16_t)w1, b = (int8x16_t)a1;
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vget_low_s8(v), vget_low_s8(b));
    return (avl__vi)((avl__vs)acc + (avl__vs)vpaddq_s16(low, vmlal_high_s8(vmull_high_s8(w, a), v, b)));
}
AVL__DEFINE(avl__vi, widen, (avl__vi acc), vpaddlq_s16((int16x8_t)acc))
AVL__DEFINE(avl__vi, dot_bytes, (avl__vi acc, avl__vu w, avl__vu a),
            (avl__vs)acc + AVL_(products)((int8x16_t)w, (int8x16_t)a))
AVL__DEFINE(avl__vi, dot_signed, (avl__vi acc, avl__vu w, avl__vu a),
            vpadalq_s16((int32x4_t)acc, (int16x8_t)AVL_(products)((int8x16_t)w, (int8x16_t)a)))
#else
#define AVL__STEP 1
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
AVL__INLINE avl__vf AVL_(load_some)(const float *p, int64_t n) {
    avl__vf v = {0};
    if (n >= 4) memcpy(&v, p, sizeof v);
    else if (n > 0) memcpy(&v, p, 4 * (size_t)n);
    return v;
}
AVL__INLINE void AVL_(store_some)(float *p, int64_t n, avl__vf v) {
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
AVL__DEFINE(avl__vu, load_16, (const uint8_t *p, size_t stride), AVL_(load)(p + 0 * stride))
AVL__DEFINE(avl__vu, add_bits, (avl__vu u, avl__vu bits, int i),
            u | ((bits >> 4 * i & 15) * 0x02040810u & 0x10101010u))
AVL__DEFINE(avl__vu, zip_low32, (avl__vu a, avl__vu b), __extension__(avl__vu){a[0], b[0], a[1], b[1]})
AVL__DEFINE(avl__vu, zip_high32, (avl__vu a, avl__vu b), __extension__(avl__vu){a[2], b[2], a[3], b[3]})
AVL__DEFINE(avl__vu, zip_low64, (avl__vu a, avl__vu b), __extension__(avl__vu){a[0], a[1], b[0], b[1]})
AVL__DEFINE(avl__vu, zip_high64, (avl__vu a, avl__vu b), __extension__(avl__vu){a[2], a[3], b[2], b[3]})

#if AVL__NEON
AVL__DEFINE(avl__vf, fma, (avl__vf a, avl__vf b, avl__vf c), vfmaq_f32(c, a, b))
AVL__DEFINE(avl__vu, middle, (avl__vu a, avl__vu b), vsliq_n_u32(vshrq_n_u32(a, 16), b, 16))
AVL__DEFINE(avl__vf, half, (avl__vu w), vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(w))))
AVL__DEFINE(avl__vf, load_halves, (const void *p), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))))
AVL__DEFINE_VOID(store_halves, (void *p, avl__vf v), vst1_u16((uint16_t *)p, vreinterpret_u16_f16(vcvt_f16_f32(v))))
#else
AVL__DEFINE(avl__vf, fma, (avl__vf a, avl__vf b, avl__vf c), a * b + c)
AVL__DEFINE(avl__vu, middle, (avl__vu a, avl__vu b), a >> 16 | b << 16)
AVL__INLINE avl__vf AVL_(half)(avl__vu w) {       // without float32 denormals, which are slow on some processors
    const avl__vu exponent = w >> 10 & 31, is_normal = (avl__vu)(exponent != 0) & 1;
    const avl__vi mantissa = (avl__vi)((w & 1023) | is_normal << 10);
    const avl__vf power = (avl__vf)((exponent + 103 - is_normal) << 23);                  // 2^(max(exponent, 1) - 25)
    const avl__vu not_finite = (avl__vu)(exponent == 31) & 0x7F800000;
    return (avl__vf)((avl__vu)(__builtin_convertvector(mantissa, avl__vf) * power) | not_finite | (w & 0x8000) << 16);
}
AVL__INLINE avl__vf AVL_(load_halves)(const void *p) {
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return AVL_(half)(__extension__(avl__vu){h[0], h[1], h[2], h[3]});
}
AVL__INLINE void AVL_(store_halves)(void *p, avl__vf v) {
    uint16_t h[4];
    for (int i = 0; i < 4; i++) h[i] = astrovl_f32_to_f16(v[i]);
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

AVL__INLINE avl__vi AVL_(dot_words)(int kind, avl__vi acc, avl__vu w, avl__vu a, int r) {
    (void)kind;
    (void)r;
#if AVL__W == 4 && AVL__WIDE
    return AVL_(dot_lane)(acc, w, a, r % 4);
#else
#if AVL__SIGNED_Q8
    if (kind == AVL__AS_SIGNED) return AVL_(dot_signed)(acc, w, a);
#endif
#if AVL__W > 4
    if (kind == AVL__AS_PAIRS) return AVL_(dot_pairs)(acc, w, a);
#endif
    return AVL_(dot_bytes)(acc, w, a);
#endif
}

AVL__INLINE avl__vf AVL_(dot_floats)(int kind, avl__vf acc, avl__vu w, avl__vu a) {
#if AVL__W == 16
    if (kind == AVL__AS_BF16) return AVL_(dot_bf16)(acc, w, a);
#endif
    (void)kind;
    return AVL_(fma)((avl__vf)w, (avl__vf)a, acc);
}

// ---- the product of a block ----------------------------------------------------------------------------------------

AVL__INLINE int AVL_(kind_of)(int type) {
    if (avl__is_float_type(type)) return AVL__AS_PAIRS;
    return type == ASTROVL_TYPE_Q8_0 && AVL__SIGNED_Q8 ? AVL__AS_SIGNED : AVL__AS_BYTES;
}

// How the words of a pack are multiplied. AVX2 takes less time for pairs of int16 than for signed bytes, whose products
// do not add up in int16; for few rows, whose packs are soon used up, bytes are not worth widening.
AVL__INLINE int AVL_(pack_kind)(const avl__product *p) {
    if (avl__is_float_type(p->w->type)) return p->quants.float_kind;
    if (p->w->type == ASTROVL_TYPE_Q8_0 && AVL__W == 8 && !AVL__WIDE && !p->few) return AVL__AS_PAIRS;
    return AVL__AS_BYTES;
}

// AVL__STEP words of m registers of weight rows times those of n rows of activations.
//   u: [AVL__STEP][m];  q: [AVL__STEP][n], of which up to 12 bytes more are read;  acc: [n][m]
AVL__INLINE void AVL_(add_words)(int kind, int n, int m, const avl__vu *u, const int8_t *q, avl__vi *acc) {
    avl__vu w[2 * AVL__STEP], a[AVL__STEP];
    AVL__EACH(i, m * AVL__STEP) w[i] = u[i];                   // or gcc loads them for each row
    AVL__EACH(r, n) {
        AVL__EACH(k, AVL__STEP)
            if (AVL__W == 4 && AVL__WIDE) a[k] = (avl__vu)AVL_(load)(q + r / 4 * 16);     // the words of four rows
            else                          a[k] = AVL_(splat_word)(q + 4 * (n * k + r));
        AVL__EACH(c, m) {
            avl__vi *to = acc + m * r + c;
#if AVL__STEP == 2
            if (kind == AVL__AS_BYTES) {
                *to = AVL_(dot_two)(*to, w[c], a[0], w[m + c], a[1]);
                continue;
            }
#endif
            AVL__EACH(k, AVL__STEP) *to = AVL_(dot_words)(kind, *to, w[m * k + c], a[k], r);
        }
    }
}

// The micro-kernel for integers: a block of m registers of weight rows times n rows of activations, whose blocks are
// x's from `at` on. The sum of a block (or of half of it) is exact: it is made in int32, at first in int16 where `run`
// words fit. Then acc += d e (sum of u q) + m e (sum of q).
//   u: [8 or 16 words][m];  d, min: [n_parts][m];  acc: [n][m]
AVL__INLINE void AVL_(add_block)(int type, int n, int m, const avl__vu *u, const avl__vf *d, const avl__vf *min,
                                 const avl__quants *x, size_t at, avl__vf *acc) {
    const avl__block_form f = avl__block_form_of(type);
    const int kind = AVL_(kind_of)(type), n_words = avl__words_of(kind) / f.n_parts;
    const int run = AVL__WIDE ? 0 : f.run, n_run = run && run < n_words ? run : n_words;
    const int8_t *q = x->q + 4 * (size_t)avl__words_of(kind) * at;
    avl__vi sum[2 * AVL__FEW], some[2 * AVL__FEW];
    AVL__EACH(part, f.n_parts) {
        const int32_t *bias = x->bias + f.n_parts * at + n * part;
        const float *q_sum = x->sum + f.n_parts * at + n * part;
        AVL__EACH(r, n)
            AVL__EACH(c, m) sum[m * r + c] = AVL_(splat_int)(f.has_min || kind != AVL__AS_BYTES ? 0 : bias[r]);
        AVL__UNROLL
        for (int i = 0; i < n_words; i += n_run) {
            AVL__EACH(r, n * m) some[r] = run ? AVL_(splat_int)(0) : sum[r];
            if (AVL__W > 4 || n * m == 1) {
                AVL__UNROLL
                for (int k = 0; k < n_run; k += AVL__STEP)
                    AVL_(add_words)(kind, n, m, u + m * k, q + 4 * n * k, some);
            } else                                        // unrolled, gcc's scheduler for NEON runs out of registers
                for (int k = 0; k < n_run; k += AVL__STEP)
                    AVL_(add_words)(kind, n, m, u + m * k, q + 4 * n * k, some);
            AVL__EACH(r, n * m) sum[r] = run ? sum[r] + AVL_(widen)(some[r]) : some[r];
            u += m * n_run;
            q += 4 * n * n_run;
        }
        AVL__EACH(c, m)
            AVL__EACH(r, n) {
                avl__vf *to = acc + m * r + c;
                *to = AVL_(fma)(AVL_(to_float)(sum[m * r + c]), d[m * part + c] * x->scale[at + (size_t)r], *to);
                if (f.has_min) *to = AVL_(fma)(min[m * part + c], AVL_(splat)(q_sum[r]), *to);
            }
    }
}

// The micro-kernel for floats: n_words words of n rows of a times those of two registers of b, n_columns lanes of which
// exist. In memory, the rows of a lie a_row words apart, their words a_word, those of b b_word.  acc: [n][2]
AVL__INLINE void AVL_(add_floats)(int kind, int n, int n_words, const void *a, size_t a_row, size_t a_word,
                                  const void *b, size_t b_word, int n_columns, avl__vf *acc) {
    for (int i = 0; i < n_words; i++) {
        const float *word = (const float *)a + a_word * (size_t)i, *words = (const float *)b + b_word * (size_t)i;
        avl__vf w[2];
        AVL__EACH(c, 2) w[c] = AVL_(load_some)(words + AVL__W * c, n_columns - AVL__W * c);
        AVL__EACH(r, n) {
            avl__vu x;                                         // with four lanes, one load for four rows
            if (AVL__W == 4 && n > 1 && a_row == 1) x = (avl__vu)AVL_(splat)(AVL_(load)(word + r / 4 * 4)[r % 4]);
            else                                    x = AVL_(splat_word)(word + a_row * (size_t)r);
            AVL__EACH(c, 2) acc[2 * r + c] = AVL_(dot_floats)(kind, acc[2 * r + c], (avl__vu)w[c], x);
        }
    }
}

// ---- unpacking weights ---------------------------------------------------------------------------------------------

// AVL__W weight rows in memory
typedef struct AVL_(rows) {
    const uint8_t *at;            // the first one
    const uint8_t *row[4];        // the first four, where groups of blocks begin
    size_t         stride;        // bytes from one to the next
    int            n;             // how many there are; others are taken for zeros
} AVL_(rows);

// Where the blocks of AVL__W weight rows go: into a pack of two such registers (u, d, min, kind), or at once, without
// being stored, into products with a few rows of activations (acc).
typedef struct AVL_(blocks) {
    avl__vu *u;                   // [blocks][words][2]
    avl__vf *d, *min;             // [blocks][n_parts][2]
    const avl__quants *x;
    int      kind;
    int      b;                   // which block of x, or of the pack, is the first one here
    avl__vf *acc;                 // [n]
    const char *next;             // the rows to prefetch meanwhile
} AVL_(blocks);

// Transposes the 16 bytes from byte `at` on of AVL__W rows: w[i] is word i of every row.
AVL__INLINE void AVL_(transpose)(AVL_(rows) rows, int at, avl__vu *w) {
    avl__vu v[4], low01, low23, high01, high23;
    AVL__EACH(i, 4) v[i] = AVL_(load_16)(rows.row[i] + at, rows.stride);
    low01 = AVL_(zip_low32)(v[0], v[1]);
    low23 = AVL_(zip_low32)(v[2], v[3]);
    high01 = AVL_(zip_high32)(v[0], v[1]);
    high23 = AVL_(zip_high32)(v[2], v[3]);
    w[0] = AVL_(zip_low64)(low01, low23);
    w[1] = AVL_(zip_high64)(low01, low23);
    w[2] = AVL_(zip_low64)(high01, high23);
    w[3] = AVL_(zip_high64)(high01, high23);
}

// Block j: its words w [8], its d and m [n_parts].  n: rows of activations, 0: it is stored
AVL__INLINE void AVL_(put_block)(int n, int type, AVL_(blocks) to, int j, const avl__vu *w, const avl__vf *d,
                                 const avl__vf *min) {
    const avl__block_form f = avl__block_form_of(type);
    const int b = to.b + j;
    if (n) {
        AVL_(add_block)(type, n, 1, w, d, min, to.x, (size_t)n * (size_t)b, to.acc);
        return;
    }
    AVL__EACH(i, 8)
        if (type == ASTROVL_TYPE_Q8_0 && to.kind == AVL__AS_PAIRS) {
            to.u[2 * (16 * b + 2 * i)] = (avl__vu)((avl__vs)(w[i] << 8) >> 8);
            to.u[2 * (16 * b + 2 * i + 1)] = (avl__vu)((avl__vs)w[i] >> 8);
        } else to.u[2 * (8 * b + i)] = w[i];
    AVL__EACH(i, f.n_parts) {
        to.d[2 * (f.n_parts * b + i)] = d[i];
        if (f.has_min) to.min[2 * (f.n_parts * b + i)] = min[i];
    }
}

// The transposed word at byte p of four blocks, p a multiple of 4; the same for an even p
#define AVL__WORD(p) t[(p) < size / 4 * 16 ? (p) / 4 : size / 4 * 4 + ((p) - last) / 4]
#define AVL__EVEN(p) ((p) % 4 ? AVL_(middle)(AVL__WORD((p) - 2), AVL__WORD((p) + 2)) : AVL__WORD(p))

// Four blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, without those before block `first`. Pieces of 16 bytes are transposed
// just before the first block that needs them; the last piece ends where the blocks do.
AVL__INLINE void AVL_(unpack_simple)(int n, int type, AVL_(rows) rows, int first, AVL_(blocks) to) {
    const avl__block_form f = avl__block_form_of(type);
    const int size = (int)f.bytes / 8, is_8_bits = type == ASTROVL_TYPE_Q8_0, last = 4 * size - 16;
    const int has_5_bits = type == ASTROVL_TYPE_Q5_0 || type == ASTROVL_TYPE_Q5_1;
    const size_t step = f.bytes * AVL__W / 2 / (size_t)((size + 3) / 4);                      // prefetched with a piece
    avl__vu t[36], w[8];
    AVL__EACH(j, 4) {
        const int begin = size * j, end = begin + size;
        avl__vf d, min = {0};
        AVL__UNROLL
        for (int i = (begin + 15) / 16; i < (end + 15) / 16; i++) {
            if (n) avl__prefetch_lines(to.next + step * (size_t)i, step);
            AVL_(transpose)(rows, 16 * i < last ? 16 * i : last, t + 4 * i);
        }
        if (j < first) continue;
        d = AVL_(half)(AVL__EVEN(begin));
        if (f.has_min) min = AVL_(half)(AVL__EVEN(begin) >> 16);
        AVL__EACH(i, 8) {
            w[i] = AVL__EVEN(end - (is_8_bits ? 32 - 4 * i : 16 - i % 4 * 4));
            if (is_8_bits && !AVL__SIGNED_Q8) w[i] ^= 0x80808080u;                            // q + 128
            if (!is_8_bits) w[i] = (i < 4 ? w[i] : w[i] >> 4) & 0x0F0F0F0Fu;
            if (has_5_bits) w[i] = AVL_(add_bits)(w[i], AVL__EVEN(end - 20), i);
        }
        AVL_(put_block)(n, type, to, j, w, &d, &min);
    }
}

// The d and m of a super-block: d and m of the whole times small integers, bytes of transposed words.  scales, mins:
// out, a byte for each of the parts;  d, min: out
AVL__INLINE void AVL_(unpack_scales)(int type, AVL_(rows) rows, avl__vu *scales, avl__vu *mins, avl__vf *d,
                                     avl__vf *min) {
    avl__vu w[4], last[4], halves;
    if (type == ASTROVL_TYPE_Q2_K) {
        AVL_(transpose)(rows, 0, w);
        AVL_(transpose)(rows, 68, last);
        halves = last[3];
        AVL__EACH(i, 4) {
            scales[i] = w[i] & 0x0F0F0F0Fu;
            mins[i] = w[i] >> 4 & 0x0F0F0F0Fu;
        }
    } else if (type == ASTROVL_TYPE_Q3_K) {                   // 12 bytes from 96 on, then d, then the super-block ends
        AVL_(transpose)(rows, 94, w);
        AVL__EACH(i, 3) w[i] = AVL_(middle)(w[i], w[i + 1]);
        halves = w[3] >> 16;
        AVL__EACH(i, 4) {
            scales[i] = (w[i % 2] >> i / 2 * 4 & 0x0F0F0F0Fu) | (w[2] >> 2 * i & 0x03030303u) << 4;
            scales[i] = ((scales[i] | 0x80808080u) - 0x20202020u) ^ 0x80808080u;      // - 32 in each byte
        }
    } else if (type == ASTROVL_TYPE_Q6_K) {
        AVL_(transpose)(rows, 192, scales);
        AVL_(transpose)(rows, 194, last);
        halves = last[3] >> 16;
    } else {                                                  // Q4_K and Q5_K
        AVL_(transpose)(rows, 0, w);
        halves = w[0];
        scales[0] = w[1] & 0x3F3F3F3Fu;
        scales[1] = (w[3] & 0x0F0F0F0Fu) | (w[1] >> 2 & 0x30303030u);
        mins[0] = w[2] & 0x3F3F3F3Fu;
        mins[1] = (w[3] >> 4 & 0x0F0F0F0Fu) | (w[2] >> 2 & 0x30303030u);
    }
    *d = AVL_(half)(halves);
    *min = -AVL_(half)(halves >> 16);
}

// A super-block of a K-quant (layouts: section [3]). Blocks share bytes: words `low` of low bits, `high` of those
// above, transposed just before the first block that needs them.
AVL__INLINE void AVL_(unpack_super)(int n, int type, AVL_(rows) rows, AVL_(blocks) to) {
    const avl__block_form f = avl__block_form_of(type);
    const int is_2_bits = type == ASTROVL_TYPE_Q2_K, is_3_bits = type == ASTROVL_TYPE_Q3_K;
    const int is_5_bits = type == ASTROVL_TYPE_Q5_K, is_6_bits = type == ASTROVL_TYPE_Q6_K;
    const int n_shared = is_2_bits || is_3_bits ? 4 : 2;      // blocks that share 32 bytes of low bits
    const uint32_t mask = n_shared == 4 ? 0x03030303u : 0x0F0F0F0Fu;
    const uint32_t high_mask = is_3_bits ? 0x04040404u : is_5_bits ? 0x10101010u : is_6_bits ? 0x30303030u : 0;
    const int low_bits = is_6_bits ? 0 : is_3_bits ? 32 : is_5_bits ? 48 : 16;
    const int high_bits = is_6_bits ? 128 : is_5_bits ? 16 : 0;
    const size_t step = f.bytes * AVL__W / 8;                 // prefetched with a block
    avl__vu low[2][8], high[8], w[8], scales[4], mins[4];
    avl__vf d, min, part_d[2], part_min[2];
    AVL_(unpack_scales)(type, rows, scales, mins, &d, &min);
    if (is_3_bits || is_5_bits)
        AVL__EACH(i, 2) AVL_(transpose)(rows, high_bits + 16 * i, high + 4 * i);
    for (int half = 0; half < 2; half++)
        AVL__EACH(j, 4) {
            const int piece = is_6_bits ? j % 2 : j / n_shared;
            const int shift = 8 / n_shared * (is_6_bits ? j / 2 : j % n_shared);
            const int up = (is_3_bits ? 2 : 4) - (is_6_bits ? 2 * j : j);          // high bits: shifted to their place
            const int place = low_bits + 32 * (half * 4 / n_shared + piece);
            if (n) avl__prefetch_lines(to.next + step * (size_t)(4 * half + j), step);
            AVL__EACH(i, 2) {
                if (shift == 0) AVL_(transpose)(rows, place + 16 * i, low[piece] + 4 * i);
                if (is_6_bits && j == 0) AVL_(transpose)(rows, high_bits + 32 * half + 16 * i, high + 4 * i);
            }
            AVL__EACH(i, 8) {
                w[i] = low[piece][i] >> shift & mask;
                if (high_mask) w[i] |= (up > 0 ? high[i] << up : high[i] >> -up) & high_mask;
            }
            AVL__EACH(k, f.n_parts) {
                const int part = f.n_parts * j + k, word = f.n_parts * half + part / 4, top = 24 - part % 4 * 8;
                avl__vi scale = (avl__vi)(scales[word] << top >> 24);
                if (is_3_bits || is_6_bits) scale = (avl__vi)(scales[word] << top) >> 24;
                part_d[k] = d * AVL_(to_float)(scale);
                if (f.has_min) part_min[k] = min * AVL_(to_float)((avl__vi)(mins[word] << top >> 24));
            }
            AVL_(put_block)(n, type, to, 4 * half + j, w, part_d, part_min);
            if ((is_3_bits || is_5_bits) && j == 3)
                AVL__EACH(i, 8) high[i] = high[i] >> 4;
        }
}

// 32 columns of a float type, to a pack
AVL__INLINE void AVL_(unpack_floats)(int type, AVL_(rows) rows, AVL_(blocks) to) {
    avl__vu *u = to.u + 2 * avl__words_of(to.kind) * to.b, w[4];
    avl__vf x[32], max = {0}, zero = max, inverse;
    for (int k = 0; k < (type == ASTROVL_TYPE_F32 ? 8 : 4); k++) {
        AVL_(transpose)(rows, 16 * k, w);
        AVL__EACH(i, 4)
            if (type == ASTROVL_TYPE_F32) x[4 * k + i] = (avl__vf)w[i];
            else {
                const int is_half = type == ASTROVL_TYPE_F16;
                x[8 * k + 2 * i] = is_half ? AVL_(half)(w[i]) : (avl__vf)(w[i] << 16);
                x[8 * k + 2 * i + 1] = is_half ? AVL_(half)(w[i] >> 16) : (avl__vf)(w[i] & 0xFFFF0000u);
            }
    }
    if (to.kind == AVL__AS_F32)
        for (int i = 0; i < 32; i++) u[2 * i] = (avl__vu)x[i];
    else if (to.kind == AVL__AS_BF16)
        for (int i = 0; i < 16; i++) u[2 * i] = AVL_(pair_bf16)(x[2 * i], x[2 * i + 1]);
    else {
        for (int i = 0; i < 32; i++) {
            max = AVL_(max)(max, AVL_(abs)(x[i]));
            zero = AVL_(fma)(x[i], AVL_(splat)(0.0f), zero);          // NaN if one of x is
        }
        to.d[2 * to.b] = max * (1.0f / 8191.0f) + zero;
        inverse = (avl__vf)((avl__vi)(8191.0f / max) & (avl__vi)(max > 1e-30f));
        for (int i = 0; i < 16; i++) {
            const avl__vi low = AVL_(to_int)(x[2 * i] * inverse), high = AVL_(to_int)(x[2 * i + 1] * inverse);
            u[2 * i] = (avl__vu)((low & 0xFFFF) | high << 16);
        }
    }
}

// The group of blocks (avl__group_of) from block b on, without those before block `first` of it, of AVL__W weight rows.
// Nothing beyond the end of a row or of the matrix is read: a group that is shorter, or has fewer rows, is copied, with
// zeros in place of what is not there.
AVL__INLINE void AVL_(unpack)(int n, int type, AVL_(rows) rows, int b, int first, int n_in, AVL_(blocks) to) {
    const int group = avl__group_of(type), from = b < 0 ? 0 : b, is_whole = b >= 0 && n_in - 32 * b >= 32 * group;
    const size_t size = avl__block_form_of(type).bytes, n_columns = (size_t)(is_whole ? 32 * group : n_in - 32 * from);
    const size_t place = size * (size_t)(from - b) / 8;       // of block `from` in a copy
    uint8_t copy[AVL__W][8 * 34];
    rows.at += size * (size_t)from / 8;
    if (rows.n < AVL__W || !is_whole) {
        memset(copy, 0, sizeof copy);
        for (int r = 0; r < rows.n; r++)
            memcpy(copy[r] + place, rows.at + (size_t)r * rows.stride, size * n_columns / 256);
        rows.at = copy[0];
        rows.stride = sizeof copy[0];
    }
    AVL__EACH(i, 4) {
        rows.row[i] = rows.at + rows.stride * (size_t)i;
        __asm__("" : "+r"(rows.row[i]));                      // or gcc computes the address of every piece in advance
    }
    if (avl__is_float_type(type))   AVL_(unpack_floats)(type, rows, to);
    else if (avl__is_k_quant(type)) AVL_(unpack_super)(n, type, rows, to);
    else                            AVL_(unpack_simple)(n, type, rows, first, to);
}

// A function for each type: compilers take long over one that holds them all.
#define AVL__UNPACK(name, type, ...) \
    AVL__APART void AVL_(unpack_##name)(AVL_(rows) rows, int b, int first, int n_in, AVL_(blocks) to) { \
        AVL_(unpack)(0, type, rows, b, first, n_in, to); \
    }
#define AVL__UNPACK_CASE(name, type, ...) case type: AVL_(unpack_##name)(rows, begin, j - begin, w->n_in, to); break;
AVL__ALL_TYPES(AVL__UNPACK)

// ---- rounding activations ------------------------------------------------------------------------------------------

// Block b of row r: x = e q with q of 8 or 16 bits, or bfloat16, or float32
AVL__INLINE void AVL_(quantize_block)(int kind, const avl__product *p, int r, int b) {
    enum { N = 32 / AVL__W };
    const avl__block_form f = avl__block_form_of(p->w->type);
    const avl__quants *to = &p->quants;
    const float *from = p->x + (size_t)r * p->w->n_in + 32 * (size_t)b;
    const size_t group = (size_t)to->group, place = (size_t)r % group;
    const size_t block = (size_t)r / group * (size_t)to->n_blocks + (size_t)b;
    const int is_float = avl__is_float_type(p->w->type), n_words = avl__words_of(kind);
    const float limit = is_float ? 8191.0f : 127.0f;
    avl__vf x[N], max = {0}, sums[2] = {{0}, {0}};
    avl__vi q[N];
    union {
        avl__vf floats[N];
        int16_t pairs[32];
        int8_t  bytes[32];
    } words;
    int32_t wide[32];
    int8_t *out = to->q + 4 * (group * (size_t)n_words * block + place);
    AVL__EACH(i, N) {
        x[i] = AVL_(load_some)(from + AVL__W * i, p->w->n_in - 32 * b - AVL__W * i);
        max = AVL_(max)(max, AVL_(abs)(x[i]));
    }
    if (kind < AVL__AS_BF16) {
        const float top = AVL_(max_lanes)(max), e = top / limit, inverse = top > 1e-30f ? limit / top : 0.0f;
        to->scale[block * group + place] = e;
        AVL__EACH(i, N) {
            q[i] = AVL_(to_int)(x[i] * inverse);
            sums[2 * i / N] += AVL_(fma)(x[i], AVL_(splat)(0.0f), AVL_(to_float)(q[i]));      // NaN if x is
        }
        if (f.n_parts == 1) sums[0] += sums[1];
        for (int i = 0; i < f.n_parts; i++) {
            const size_t at = (block * f.n_parts + (size_t)i) * group + place;
            const float sum = AVL_(add_lanes)(sums[i]);
            if (sum != sum) to->scale[block * group + place] = sum;
            to->bias[at] = sum == sum ? -f.offset * (int)sum : 0;
            to->sum[at] = e * sum;
        }
        memcpy(wide, q, sizeof wide);
        if (kind != AVL__AS_PAIRS)
            for (int i = 0; i < 32; i++) words.bytes[i] = (int8_t)wide[i];
        else
            for (int i = 0; i < 32; i++) {                    // of Q8_0 columns 0 and 2, 1 and 3: see put_block
                const int other = i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i;
                words.pairs[i] = (int16_t)wide[is_float ? i : other];
            }
    } else {
#if AVL__W == 16
        x[0] = (avl__vf)AVL_(to_bf16)(x[0], x[1]);
#endif
        memcpy(words.floats, x, sizeof x);
    }
    for (int i = 0; i < n_words; i++) memcpy(out + 4 * group * (size_t)i, (const int8_t *)&words + 4 * i, 4);
}

static void AVL_(quantize)(const avl__product *p, int first, int n_rows, int begin, int end) {
    const int kind = AVL_(pack_kind)(p);
    for (int b = begin; b < end; b++)
        for (int r = first; r < first + n_rows; r++) AVL_(quantize_block)(kind, p, r, b);
}

// ---- products ------------------------------------------------------------------------------------------------------

// A tile: n_blocks packed blocks of two registers of weight rows, of a type that is multiplied as `type` is (F16: pairs
// of int16, F32: words of floats), times n rows of activations, whose blocks are x's from `at` on. Meanwhile, `ahead`
// bytes at `next` are prefetched.  acc: [n][2]
AVL__INLINE void AVL_(tile_of)(int type, int n, AVL_(blocks) pack, int n_blocks, size_t at, const char *next,
                               size_t ahead, avl__vf *acc) {
    const int is_float = type == ASTROVL_TYPE_F32, n_parts = avl__block_form_of(type).n_parts;
    const int kind = !is_float ? AVL_(kind_of)(type) : AVL__W == 16 ? AVL__AS_BF16 : AVL__AS_F32;
    const int n_words = avl__words_of(kind);
    const size_t step = 64 * (ahead / (64 * (size_t)n_blocks) + 1);              // prefetched with a block
    for (int b = 0; b < n_blocks; b++, at += (size_t)n) {
        const int8_t *q = pack.x->q + 4 * (size_t)n_words * at;
        if (step * (size_t)b < ahead) avl__prefetch_lines(next + step * (size_t)b, step);
        if (is_float) AVL_(add_floats)(kind, n, n_words, q, 1, (size_t)n, pack.u, 2 * AVL__W, 2 * AVL__W, acc);
        else          AVL_(add_block)(type, n, 2, pack.u, pack.d, pack.min, pack.x, at, acc);
        pack.u += 2 * n_words;
        pack.d += 2 * n_parts;
        pack.min += 2 * n_parts;
    }
}

// sum[n][2] = a tile of n rows, or += if its blocks are not a row's first ones. Types of the same form share code.
#define AVL__TILE_OF(type) AVL_(tile_of)(type, N, *pack, n_blocks, at, next, ahead, acc)
#define AVL__TILE_FUNCTION(n) \
    AVL__APART void AVL_(tile_##n)(int type, const AVL_(blocks) *pack, int n_blocks, size_t at, const char *next, \
                                   size_t ahead, int is_first, avl__vf *sum) { \
        enum { N = (n) }; \
        const avl__block_form f = avl__block_form_of(type); \
        const int kind = pack->kind, is_wide = AVL__WIDE || f.run != 4; \
        avl__vf acc[2 * N]; \
        AVL__EACH(r, 2 * N) acc[r] = is_first ? AVL_(splat)(0.0f) : sum[r]; \
        if (N > AVL__TILE || (AVL__W != 8 && kind >= AVL__AS_BF16)) AVL__TILE_OF(ASTROVL_TYPE_F32); \
        else if (AVL__W > 4 && kind == AVL__AS_PAIRS)               AVL__TILE_OF(ASTROVL_TYPE_F16); \
        else if (type == ASTROVL_TYPE_Q8_0 && AVL__SIGNED_Q8)       AVL__TILE_OF(ASTROVL_TYPE_Q8_0); \
        else if (type == ASTROVL_TYPE_Q2_K)                         AVL__TILE_OF(ASTROVL_TYPE_Q2_K); \
        else if (f.n_parts == 2)                                    AVL__TILE_OF(ASTROVL_TYPE_Q6_K); \
        else if (!is_wide && f.has_min)                             AVL__TILE_OF(ASTROVL_TYPE_Q5_1); \
        else if (!is_wide)                                          AVL__TILE_OF(ASTROVL_TYPE_Q5_0); \
        else if (f.has_min)                                         AVL__TILE_OF(ASTROVL_TYPE_Q4_1); \
        else                                                        AVL__TILE_OF(ASTROVL_TYPE_Q4_0); \
        AVL__EACH(r, 2 * N) sum[r] = acc[r]; \
    }
#define AVL__TILE_CASE(n) case n: AVL_(tile_##n)(w->type, &pack[c], n_blocks, at, next, ahead, b == 0, sum); break;
AVL__TILE_SIZES(AVL__TILE_FUNCTION)

// AVL__W weight rows from row `out` on, of those before row `last`
AVL__INLINE AVL_(rows) AVL_(weight_rows)(const avl__linear *w, int out, int last) {
    AVL_(rows) rows;
    rows.at = (const uint8_t *)w->weight + (size_t)out * w->row_bytes;
    rows.stride = w->row_bytes;
    rows.n = last - out < AVL__W ? last - out : AVL__W;
    return rows;
}

// y = sum + bias: n_rows rows from `row` on, AVL__W columns from `out` on, those before `last`.  sum: [n_rows][stride]
AVL__INLINE void AVL_(store_sums)(const avl__product *p, int row, int n_rows, int out, int last, const avl__vf *sum,
                                  int stride) {
    float *y = p->y + (size_t)row * p->w->n_out + out;
    avl__vf bias = {0};
    if (p->w->bias) bias = AVL_(load_some)(p->w->bias + out, last - out);
    for (int r = 0; r < n_rows; r++, y += p->w->n_out) AVL_(store_some)(y, last - out, sum[stride * r] + bias);
}

// n rows of activations: columns first..last-1. Weights are multiplied as they are unpacked.
AVL__INLINE void AVL_(multiply_few)(int n, int type, const avl__product *p, int first, int last) {
    const size_t bytes = avl__block_form_of(type).bytes * AVL__W * (size_t)avl__group_of(type) / 8;      // of a group
    const int n_blocks = p->quants.n_blocks;
    for (int out = first; out < last; out += AVL__W) {
        const AVL_(rows) rows = AVL_(weight_rows)(p->w, out, last);
        avl__vf acc[AVL__FEW], sum[AVL__FEW];                 // acc stays in registers: no index of it varies
        AVL_(blocks) to = {NULL, NULL, NULL, &p->quants, AVL__AS_BYTES, 0, acc, NULL};
        to.next = avl__next_rows(p, first, last, out, AVL__W);
        AVL__EACH(r, n) acc[r] = AVL_(splat)(0.0f);
        for (int b = 0; b < n_blocks; b += avl__group_of(type), to.next += bytes) {
            to.b = avl__group_begin(type, b, n_blocks);
            avl__prefetch_page(to.next, bytes);
            AVL_(unpack)(n, type, rows, to.b, b - to.b, p->w->n_in, to);
        }
        AVL__EACH(r, n) sum[r] = acc[r];
        AVL_(store_sums)(p, 0, p->n_rows, out, last, sum, 1);
    }
}

#define AVL__FEW_FUNCTION(name, type, ...) \
    AVL__APART void AVL_(few_##name)(const avl__product *p, int first, int last) { \
        if (p->n_rows == 1)    AVL_(multiply_few)(1, type, p, first, last); \
        else if (AVL__W == 16) AVL_(multiply_few)(AVL__FEW, type, p, first, last); \
    }
#define AVL__FEW_CASE(name, type, ...) case type: AVL_(few_##name)(p, first, last); return;
AVL__BLOCK_TYPES(AVL__FEW_FUNCTION)

// Columns first..last-1. 32 weight rows are packed, whole or (p->few) sixteen blocks at a time; all groups of rows of
// activations meet the pack, while the next 32 weight rows are prefetched.
static void AVL_(multiply)(const avl__product *p, int first, int last, float *scratch) {
    enum { N_REGISTERS = AVL__PACK_ROWS / AVL__W, N_PAIRS = N_REGISTERS / 2 };
    const avl__linear *w = p->w;
    const avl__quants *x = &p->quants;
    const int kind = AVL_(pack_kind)(p), n_words = avl__words_of(kind), n_parts = avl__block_form_of(w->type).n_parts;
    const int group = avl__group_of(w->type), slice = p->few ? 16 : x->n_blocks;                 // blocks of a pack
    const size_t u_size = 2 * (size_t)(slice * n_words), d_size = 2 * (size_t)(slice * n_parts);
    const size_t n_tiles = (size_t)x->n_groups * N_PAIRS;
    AVL_(blocks) pack[N_PAIRS];
    avl__vf sums[2][N_PAIRS][2 * AVL__MAX_TILE];              // of all groups, where their sums have to wait for slices
    if (p->few && (x->group == 1 || AVL__W == 16))
        switch (w->type) {
        AVL__BLOCK_TYPES(AVL__FEW_CASE)
        default: return;
        }
    memset(pack, 0, sizeof pack);
    for (int c = 0; c < N_PAIRS; c++) {
        pack[c].u = (avl__vu *)(void *)scratch + u_size * (size_t)c;
        pack[c].d = (avl__vf *)(void *)scratch + u_size * N_PAIRS + d_size * (size_t)c;
        pack[c].min = pack[c].d + d_size * N_PAIRS;
        pack[c].kind = kind;
        pack[c].x = x;
    }
    for (int out = first; out < last; out += AVL__PACK_ROWS) {
        const char *next = avl__next_rows(p, first, last, out, AVL__PACK_ROWS);
        for (int b = 0; b < x->n_blocks; b += slice) {
            const int n_blocks = x->n_blocks - b < slice ? x->n_blocks - b : slice;
            const size_t ahead = AVL__PACK_ROWS * w->row_bytes * (size_t)n_blocks / ((size_t)x->n_blocks * n_tiles);
            for (int i = 0; i < N_REGISTERS && out + AVL__W * i < last; i++)
                for (int j = b; j < b + n_blocks; j += group) {
                    const int begin = avl__group_begin(w->type, j, x->n_blocks);
                    const AVL_(rows) rows = AVL_(weight_rows)(w, out + AVL__W * i, last);
                    AVL_(blocks) to = pack[i / 2];
                    to.u += i % 2;
                    to.d += i % 2;
                    to.min += i % 2;
                    to.b = begin - b;
                    switch (w->type) {
                    AVL__ALL_TYPES(AVL__UNPACK_CASE)
                    default: break;
                    }
                }
            for (int g = 0; g < x->n_groups; g++) {
                const int row = g * x->group, n_rows = p->n_rows - row < x->group ? p->n_rows - row : x->group;
                const size_t at = (size_t)x->group * ((size_t)x->n_blocks * (size_t)g + (size_t)b);
                const float *y = p->y + (size_t)row * w->n_out + out;
                for (int r = 0; r < n_rows; r++, y += w->n_out) avl__prefetch_lines(y, 4 * AVL__PACK_ROWS + 1);
                for (int c = 0; c < N_PAIRS && out + 2 * AVL__W * c < last; c++, next += ahead) {
                    avl__vf *sum = sums[p->few ? g : 0][c];
                    switch (x->group) {
                    AVL__TILE_SIZES(AVL__TILE_CASE)
                    default: break;
                    }
                    for (int i = 0; i < 2 && b + n_blocks == x->n_blocks; i++)
                        AVL_(store_sums)(p, row, n_rows, out + AVL__W * (2 * c + i), last, sum + i, 2);
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
    if (n > 0) memcpy(&some, p, n < AVL__W ? 2 * (size_t)n : sizeof some);
    if (type == ASTROVL_TYPE_F16) return AVL_(load_halves)(&some);
    return (avl__vf)(__builtin_convertvector(some, avl__vu) << 16);
}

// Adds the products of n columns (at most AVL__W) of n_rows rows, x, and m weight rows, both from the first column on.
AVL__INLINE void AVL_(add_columns)(int type, int n_rows, int m, const avl__linear *w, const uint8_t *row,
                                   const float *x, int n, avl__vf (*acc)[2]) {
    const size_t stride = (size_t)w->n_in, row_bytes = w->row_bytes;
    avl__vf v[2];
    AVL__EACH(o, m) v[o] = AVL_(load_numbers)(type, row + (size_t)o * row_bytes, n);
    AVL__EACH(r, n_rows) {
        const avl__vf a = AVL_(load_some)(x + (size_t)r * stride, n);
        AVL__EACH(o, m) acc[r][o] = AVL_(fma)(v[o], a, acc[r][o]);
    }
}

// n rows of activations, from row r0 on, times m weight rows, from row `out` on, while those at `next` (NULL: none) are
// prefetched. Every sum is made in the same order, whatever is computed beside it.
AVL__INLINE void AVL_(linear_rows)(int type, int n, int m, const avl__product *p, int r0, int out, const char *next) {
    const avl__linear *w = p->w;
    const uint8_t *row = (const uint8_t *)w->weight + (size_t)out * w->row_bytes;
    const float *x = p->x + (size_t)r0 * w->n_in;
    const size_t size = type == ASTROVL_TYPE_F32 ? 4 : 2;
    const int each = AVL__W == 4 && n > 1 ? 8 : 32;      // columns of code without a loop: what registers allow
    avl__vf even[4][2] = {{{0}}}, odd[4][2] = {{{0}}};
    int left = w->n_in;
    for (; left >= 32; left -= 32) {
        for (int o = 0; next && o < m; o++) {
            avl__prefetch_lines(next + (size_t)o * w->row_bytes, 32 * size);
            avl__prefetch_page(next + (size_t)o * w->row_bytes, 32 * size);
        }
        if (next) next += 32 * size;
        for (int i = 0; i < 32; i += each, x += each, row += (size_t)each * size)
            AVL__EACH(k, each / AVL__W)
                AVL_(add_columns)(type, n, m, w, row + AVL__W * size * (size_t)k, x + AVL__W * k, AVL__W,
                                  k % 2 ? odd : even);
    }
    for (; left > 0; left -= AVL__W, x += AVL__W, row += AVL__W * size)
        AVL_(add_columns)(type, n, m, w, row, x, left, even);
    AVL__EACH(r, n)
        AVL__EACH(o, m)
            p->y[(size_t)(r0 + r) * w->n_out + out + o] =
                AVL_(add_lanes)(even[r][o] + odd[r][o]) + (w->bias ? w->bias[out + o] : 0.0f);
}

AVL__INLINE void AVL_(linear_of)(int type, const avl__product *p, int first, int last) {
    for (int out = first, m; out < last; out += m) {
        const char *ahead = (const char *)p->w->weight + (size_t)out * p->w->row_bytes + AVL__AHEAD;
        int r = 0;
        m = p->n_rows >= 4 && last - out >= 2 ? 2 : 1;
        for (; m == 2 && r + 4 <= p->n_rows; r += 4)
            AVL_(linear_rows)(type, 4, 2, p, r, out, r ? NULL : avl__next_rows(p, first, last, out, 2));
        for (; r < p->n_rows; r++)
            for (int o = 0; o < m; o++) AVL_(linear_rows)(type, 1, 1, p, r, out + o, r ? NULL : ahead);
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
    avl__vf sum[N];
    AVL__EACH(j, N) sum[j] = AVL_(splat)(0.0f);
    for (int i = 0; i < n; i += AVL__LANES)
        AVL__EACH(j, N) {
            const int at = i + AVL__W * j;
            const avl__vf h = AVL_(load_numbers)(ASTROVL_TYPE_F16, (const uint8_t *)half + 2 * at, n - at);
            sum[j] += h * AVL_(load_some)(x + at, n - at);
        }
    for (int m = N / 2; m > 0; m /= 2)
        for (int j = 0; j < m; j++) sum[j] += sum[j + m];
    return AVL_(add_lanes)(sum[0]);
}

// e^x to about 2e-7: 2^n 2^f, n the integer nearest to x / ln 2, 2^f by its Taylor series
AVL__INLINE avl__vf AVL_(exp)(avl__vf x) {
    static const float term[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    const avl__vf t = AVL_(max)(x, AVL_(splat)(-104.0f)) * 1.44269504f, n = AVL_(round)(t), f = t - n;
    avl__vf p = AVL_(splat)(1.54035304e-4f);                  // ln(2)^6 / 6!
    AVL__EACH(i, 6) p = AVL_(fma)(p, f, AVL_(splat)(term[i]));
    return AVL_(scale_2)(p, n);
}

// x / (1 + e^(-a x))
AVL__INLINE avl__vf AVL_(sigmoid_product)(avl__vf x, float a) { return x / (1.0f + AVL_(exp)(x * -a)); }

static void AVL_(quick_gelu)(float *x, int64_t n) {
    for (; n > 0; n -= AVL__W, x += AVL__W)
        AVL_(store_some)(x, n, AVL_(sigmoid_product)(AVL_(load_some)(x, n), 1.702f));
}

static void AVL_(silu_product)(float *x, const float *up, int64_t n) {
    for (; n > 0; n -= AVL__W, x += AVL__W, up += AVL__W)
        AVL_(store_some)(x, n, AVL_(sigmoid_product)(AVL_(load_some)(x, n), 1.0f) * AVL_(load_some)(up, n));
}

// x Phi(x), with 1 - Phi by formula 7.1.26 of Abramowitz and Stegun, whose error is below 1.5e-7
static void AVL_(gelu)(float *x, int64_t n) {
    static const float term[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    for (; n > 0; n -= AVL__W, x += AVL__W) {
        const avl__vf v = AVL_(load_some)(x, n), z = AVL_(abs)(v) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
        avl__vf p = AVL_(splat)(1.061405429f);
        AVL__EACH(i, 4) p = AVL_(fma)(p, t, AVL_(splat)(term[i]));
        p = p * t * AVL_(exp)(-z * z) * 0.5f;
        AVL_(store_some)(x, n, AVL_(max)(v, AVL_(splat)(0.0f)) - AVL_(abs)(v) * p);     // x (1 - p), or x p if x < 0
    }
}

static void AVL_(rms_norm)(float *y, const float *x, const float *weight, int n, float eps) {
    avl__vf squares = AVL_(splat)(0.0f);
    for (int i = 0; i < n; i += AVL__W) {
        const avl__vf v = AVL_(load_some)(x + i, n - i);
        squares = AVL_(fma)(v, v, squares);
    }
    const float scale = (float)(1.0 / avl__sqrt((double)AVL_(add_lanes)(squares) / n + eps));
    for (int i = 0; i < n; i += AVL__W)
        AVL_(store_some)(y + i, n - i, AVL_(load_some)(x + i, n - i) * scale * AVL_(load_some)(weight + i, n - i));
}

// The first n lanes of v; x in the others
AVL__INLINE avl__vf AVL_(fill)(avl__vf v, int n, float x) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const avl__vi is_first = (avl__vi)((avl__vi)AVL_(load)(lanes) < AVL_(splat_int)(n));
    return (avl__vf)(((avl__vi)v & is_first) | ((avl__vi)AVL_(splat)(x) & ~is_first));
}

static void AVL_(layer_norm)(float *y, const float *x, const float *weight, const float *bias, int n, float eps) {
    avl__vf sum = AVL_(splat)(0.0f), squares = sum;
    for (int i = 0; i < n; i += AVL__W) sum += AVL_(load_some)(x + i, n - i);
    const float mean = AVL_(add_lanes)(sum) / (float)n;
    for (int i = 0; i < n; i += AVL__W) {
        const avl__vf d = AVL_(fill)(AVL_(load_some)(x + i, n - i) - mean, n - i, 0.0f);
        squares = AVL_(fma)(d, d, squares);
    }
    const float scale = (float)(1.0 / avl__sqrt((double)AVL_(add_lanes)(squares) / n + eps));
    for (int i = 0; i < n; i += AVL__W) {
        const avl__vf d = (AVL_(load_some)(x + i, n - i) - mean) * scale;
        const avl__vf v = AVL_(fma)(d, AVL_(load_some)(weight + i, n - i), AVL_(load_some)(bias + i, n - i));
        AVL_(store_some)(y + i, n - i, v);
    }
}

// x = softmax(scale x)
static void AVL_(softmax)(float *x, int n, float scale) {
    avl__vf sum = AVL_(splat)(0.0f), max = AVL_(splat)(-FLT_MAX);
    for (int i = 0; i < n; i += AVL__W)
        max = AVL_(max)(max, AVL_(fill)(AVL_(load_some)(x + i, n - i), n - i, -FLT_MAX));
    const float top = AVL_(max_lanes)(max);
    for (int i = 0; i < n; i += AVL__W) {
        const avl__vf p = AVL_(exp)((AVL_(load_some)(x + i, n - i) - top) * scale);
        AVL_(store_some)(x + i, n - i, p);
        sum += AVL_(fill)(p, n - i, 0.0f);
    }
    const float inverse = 1.0f / AVL_(add_lanes)(sum);
    for (int i = 0; i < n; i += AVL__W) AVL_(store_some)(x + i, n - i, AVL_(load_some)(x + i, n - i) * inverse);
}

static void AVL_(to_halves)(uint16_t *y, const float *x, int64_t n) {
    for (; n >= AVL__W; n -= AVL__W, x += AVL__W, y += AVL__W)
        AVL_(store_halves)(y, AVL_(min)(AVL_(max)(AVL_(load)(x), AVL_(splat)(-65504.0f)), AVL_(splat)(65504.0f)));
    for (; n > 0; n--, x++, y++) *y = astrovl_f32_to_f16(*x > 65504.0f ? 65504.0f : *x < -65504.0f ? -65504.0f : *x);
}

static void AVL_(from_halves)(float *y, const uint16_t *x, int n) {
    for (int i = 0; i < n; i += AVL__W)
        AVL_(store_some)(y + i, n - i, AVL_(load_numbers)(ASTROVL_TYPE_F16, x + i, n - i));
}

// ---- attention -----------------------------------------------------------------------------------------------------
// 32 queries at a time lie across the lanes: scores[key][32] = K q^T needs only the queries transposed, softmax runs
// down a column, and nothing is added across a register. Then out = P V with the columns of V across the lanes. All in
// words of float32, or of two bfloat16: of columns in K q^T, of keys in P V.

// A tile of the product below: n rows, at most two registers of columns
AVL__INLINE void AVL_(float_tile)(int kind, int n, int n_columns, int n_words, const float *a, size_t a_row,
                                  size_t a_word, const float *b, size_t b_word, float *y, size_t y_row) {
    avl__vf acc[2 * 8];
    AVL__EACH(i, 2 * n) acc[i] = AVL_(splat)(0.0f);
    AVL_(add_floats)(kind, n, n_words, a, a_row, a_word, b, b_word, n_columns, acc);
    AVL__EACH(r, n)
        AVL__EACH(c, 2) AVL_(store_some)(y + y_row * (size_t)r + AVL__W * c, n_columns - AVL__W * c, acc[2 * r + c]);
}

// y[n_rows][n_columns] = a b, matrices of words. Rows of a lie a_row words apart, the n_words words of a row a_word;
// rows of b and y lie b_row and y_row apart.
AVL__INLINE void AVL_(multiply_floats)(int kind, int n_rows, int n_columns, int n_words, const float *a, size_t a_row,
                                       size_t a_word, const float *b, size_t b_row, float *y, size_t y_row) {
    enum { MANY = AVL__W == 16 ? 8 : AVL__TILE, WIDTH = 2 * AVL__W };           // a tile whose sums fit in registers
    for (int c = 0; c < n_columns; c += WIDTH)
        for (int r = 0; r < n_rows;) {
            const float *from = a + a_row * (size_t)r;
            float *to = y + y_row * (size_t)r + c;
            if (n_rows - r >= MANY && n_columns - c >= WIDTH) {
                AVL_(float_tile)(kind, MANY, WIDTH, n_words, from, a_row, a_word, b + c, b_row, to, y_row);
                r += MANY;
            } else {
                AVL_(float_tile)(kind, 1, n_columns - c, n_words, from, a_row, a_word, b + c, b_row, to, y_row);
                r++;
            }
        }
}

// Pairs of rows to words of two bfloat16, which may be stored where the rows were: [(n_rows + 1) / 2][n_padded]
AVL__INLINE void AVL_(pair_rows)(float *to, const float *from, size_t stride, int n_rows, int n_columns, int n_padded) {
    for (int i = 0; i < n_rows; i += 2, from += 2 * stride, to += n_padded)
        for (int c = 0; c < n_padded; c += AVL__W) {
            const avl__vf second = AVL_(load_some)(from + stride + c, i + 1 < n_rows ? n_columns - c : 0);
            AVL_(store)(to + c, (avl__vf)AVL_(pair_bf16)(AVL_(load_some)(from + c, n_columns - c), second));
        }
}

// scores[n_keys][32] to e^(score - largest);  inverse: out, [32], 1 over each column's sum
AVL__INLINE void AVL_(softmax_columns)(float *scores, int n_keys, float *inverse) {
    for (int c = 0; c < 32; c += AVL__W) {
        avl__vf max = AVL_(splat)(-FLT_MAX), sum = AVL_(splat)(0.0f);
        for (int j = 0; j < n_keys; j++) max = AVL_(max)(max, AVL_(load)(scores + 32 * (size_t)j + c));
        for (int j = 0; j < n_keys; j++) {
            const avl__vf p = AVL_(exp)(AVL_(load)(scores + 32 * (size_t)j + c) - max);
            AVL_(store)(scores + 32 * (size_t)j + c, p);
            sum += p;
        }
        AVL_(store)(inverse + c, 1.0f / sum);
    }
}

// keys: [n_keys][key_stride], values: [n_keys, or of bfloat16 half as many][v_stride], words of `kind`;
// scratch: [n_keys][32] and [head_dim][32]
AVL__INLINE void AVL_(attend_as)(int kind, const avl__tile *t, const float *keys, size_t key_stride,
                                 const float *values, size_t v_stride, float *scratch) {
    const float scale = (float)(1.0 / avl__sqrt((double)t->head_dim));
    const int is_bf16 = kind == AVL__AS_BF16, n_padded = is_bf16 ? (t->head_dim + 31) / 32 * 32 : t->head_dim;
    const int n_words = is_bf16 ? n_padded / 2 : n_padded, n_values = is_bf16 ? (t->n_keys + 1) / 2 : t->n_keys;
    float *queries = scratch, *scores = queries + 32 * (size_t)n_padded, inverse[32];
    for (int first = 0; first < t->n; first += 32) {
        const int n_queries = t->n - first < 32 ? t->n - first : 32;
        float *out = t->out + (size_t)first * t->q_stride;
        memset(queries, 0, 32 * (size_t)n_padded * sizeof *queries);
        for (int i = 0; i < n_queries; i++) {
            const float *q = t->q + (size_t)(first + i) * t->q_stride;
            for (int d = 0; d < t->head_dim; d++) queries[32 * d + i] = q[d] * scale;
        }
        if (is_bf16) AVL_(pair_rows)(queries, queries, 32, n_padded, 32, 32);
        AVL_(multiply_floats)(kind, t->n_keys, 32, n_words, keys, key_stride, 1, queries, 32, scores, 32);
        for (int j = t->n_visible + first; j < t->n_keys; j++)       // causal: key n_visible + i from query i + 1 on
            for (int i = 0; i < 32 && i <= j - t->n_visible - first; i++) scores[32 * (size_t)j + (size_t)i] = -FLT_MAX;
        AVL_(softmax_columns)(scores, t->n_keys, inverse);
        if (is_bf16) AVL_(pair_rows)(scores, scores, 32, t->n_keys, 32, 32);
        AVL_(multiply_floats)(kind, n_queries, t->head_dim, n_values, scores, 1, 32, values, v_stride, out,
                              t->q_stride);
        for (int i = 0; i < n_queries; i++, out += t->q_stride)
            for (int d = 0; d < t->head_dim; d += AVL__W)
                AVL_(store_some)(out + d, t->head_dim - d, AVL_(load_some)(out + d, t->head_dim - d) * inverse[i]);
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
    for (int j = 0; j < t->n_keys; j++)
        for (int d = 0; d < n; d += 32) {
            const float *k = t->k + (size_t)j * t->kv_stride + d;
            const int left = t->head_dim - d;
            const avl__vf low = AVL_(load_some)(k, left), high = AVL_(load_some)(k + 16, left - 16);
            AVL_(store)(keys + ((size_t)j * n + d) / 2, (avl__vf)AVL_(to_bf16)(low, high));
        }
    AVL_(pair_rows)(values, t->v, t->kv_stride, t->n_keys, t->head_dim, n);
    AVL_(attend_as)(AVL__AS_BF16, t, keys, (size_t)n / 2, values, (size_t)n, scratch);
}
#endif

// One query, n registers of columns of n_keys keys or values; the last register has `left` columns.
//   is_mix 0: weights[j] += q kv[j];   1: out += sum of weights[j] kv[j]
AVL__INLINE void AVL_(one_columns)(int is_mix, int n, int left, float *out, const float *q, const uint16_t *kv,
                                   size_t stride, int n_keys, float *weights) {
    avl__vf acc[8];
    AVL__EACH(i, n) acc[i] = AVL_(load_some)((is_mix ? out : q) + AVL__W * i, i + 1 < n ? AVL__W : left);
    for (int j = 0; j < n_keys; j++, kv += stride) {
        avl__vf score = AVL_(splat)(0.0f);
        avl__prefetch_page(kv, 2 * stride);
        AVL__EACH(i, n) {
            const avl__vf x = AVL_(load_numbers)(ASTROVL_TYPE_F16, kv + AVL__W * i, i + 1 < n ? AVL__W : left);
            if (is_mix) acc[i] = AVL_(fma)(AVL_(splat)(weights[j]), x, acc[i]);
            else        score = AVL_(fma)(acc[i], x, score);
        }
        if (!is_mix) weights[j] += AVL_(add_lanes)(score);
    }
    if (is_mix)
        AVL__EACH(i, n) AVL_(store_some)(out + AVL__W * i, i + 1 < n ? AVL__W : left, acc[i]);
}

// All columns, for blocks of 16 keys, so that those of wide heads are still in the L1 cache when their next columns are
// wanted
AVL__INLINE void AVL_(one_pass)(int is_mix, float *out, const float *q, const uint16_t *kv, size_t stride, int n_keys,
                                int head_dim, float *weights) {
    for (int j = 0; j < n_keys; j += 16)
        for (int d = 0, n; d < head_dim; d += AVL__W * n) {
            const int m = n_keys - j < 16 ? n_keys - j : 16, left = head_dim - d, last = left < AVL__W ? left : AVL__W;
            const uint16_t *from = kv + (size_t)j * stride + d;
            n = left >= 8 * AVL__W ? 8 : left >= 4 * AVL__W ? 4 : 1;
            if (n == 8)      AVL_(one_columns)(is_mix, 8, AVL__W, out + d, q + d, from, stride, m, weights + j);
            else if (n == 4) AVL_(one_columns)(is_mix, 4, AVL__W, out + d, q + d, from, stride, m, weights + j);
            else             AVL_(one_columns)(is_mix, 1, last, out + d, q + d, from, stride, m, weights + j);
        }
}

static void AVL_(attend_one)(float *out, const float *q, const uint16_t *k, const uint16_t *v, size_t stride,
                             int n_keys, int head_dim, float *weights) {
    memset(weights, 0, (size_t)n_keys * sizeof *weights);
    AVL_(one_pass)(0, out, q, k, stride, n_keys, head_dim, weights);
    AVL_(softmax)(weights, n_keys, (float)(1.0 / avl__sqrt((double)head_dim)));
    memset(out, 0, (size_t)head_dim * sizeof *out);
    AVL_(one_pass)(1, out, q, v, stride, n_keys, head_dim, weights);
}

#endif   // AVL__WHOLE

// ---- the tables ----------------------------------------------------------------------------------------------------

#define AVL__TABLE(isa, coarsely, float_kind, float_group) \
    static const avl__kernels AVL__JOIN(kernels, isa) = { \
        AVL__STRING(isa), AVL_BASE_(linear), AVL_BASE_(dot_f16), \
        AVL_BASE_(rms_norm), AVL_BASE_(layer_norm), AVL_BASE_(gelu), AVL_BASE_(quick_gelu), AVL_BASE_(silu_product), \
        AVL_(quantize), AVL_(multiply), AVL_BASE_(attend), coarsely, AVL_BASE_(attend_one), AVL_BASE_(to_halves), \
        AVL_BASE_(from_halves), AVL__TILE, float_kind, float_group, AVL__FEW, AVL__W == 16 ? AVL__FEW : 4};

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
#undef AVL__STEP
#undef AVL__SIGNED_Q8

#endif   // AVL__ISA
