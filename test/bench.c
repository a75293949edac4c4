// How fast models run here, beside what this machine allows; and how accurate fast mode is.
//
//     make bench          search, the shipped model and guided decoding; with LLAMA_CPP=DIR also beside llama.cpp
//     cc -O2 -o test/bench test/bench.c -lm -pthread
//     test/bench [OPTIONS] [search | accuracy TEXTFILE | guided]
//       (nothing)         a model: encoding one image, reading a prompt, writing after it; then answers together
//       search            finding the best 10 of random rows in memory, beside reading the same memory once
//       accuracy FILE     fast mode's logits on a text's first tokens against exact mode's: cosine, perplexity, ...
//       guided            what an answer that keeps to a JSON schema costs, against free decoding
//     -m, --model FILE    a GGUF file; again for more parts (else: the shipped model)
//     --synthetic NAME[:TYPE]   a model of random weights: llava-1.5-7b, smollm2-135m or nano (TYPE: q4_0, f16, ...)
//     --dir DIR           where --synthetic keeps its files (default: $TMPDIR, or /tmp)
//     -p, --prompt N      positions of the prompt (default 620)
//     -n, --tokens N      tokens written after it (default 32); accuracy: of the text (512); guided: of an answer (100)
//     -b, --batch N       answers written together, against one alone (default 8; 0: none)
//     --rounds N          medians are of N rounds (default 3; search and guided 9)
//     --rows N, --dims N  search: rows (default 1000000), numbers in a row (512)
//     -j, --threads N     processors to use (default: all)
//     --json              one JSON object
//     ASTROVL_ISA=avx2 (portable, avx_vnni, avx512; neon) in the environment measures simpler kernels.
//
// A speed says little by itself: machines differ, and a shared one changes from second to second. So each is compared
// with the machine's own limit, measured beside it, in turns. Images and prompts are limited by arithmetic: their
// operations (two for each product in matrices and attention) a second are compared with what the processor does in
// registers alone with the instruction that the kernels use. Writing is limited by memory: the weights that a token
// needs, and the keys and values before it, are compared with merely reading the weights, done after each token.
//
// It looks inside the header where the public functions do not reach: the kernels' name, the threads, the KV cache.
#define ASTROVL_IMPLEMENTATION
#include "../astrovl.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#if AVL__POSIX
#include <sys/resource.h>
#endif

static struct {
    const char *models[16], *synthetic, *dir;
    int n_models, prompt, tokens, batch, rounds, rows, dims, threads, json;
} o = {{NULL}, NULL, NULL, 0, 620, 0, 8, 0, 1000000, 512, 0, 0};

static astrovl_error g_err;

// ---- tools ---------------------------------------------------------------------------------------------------------

// Ends the program with a message, as printf.
#define die(...) (fprintf(stderr, "bench: " __VA_ARGS__), fputc('\n', stderr), exit(1))
#define check(call) ((call) ? die("%s", g_err.message) : (void)0)        // a call that returns a status

static void *new_memory(size_t n, size_t size) {
    void *memory = size && n > SIZE_MAX / 2 / size ? NULL : calloc(n ? n : 1, size);
    if (!memory) die("out of memory");
    return memory;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {             // sorts them
    qsort(values, (size_t)n, sizeof *values, by_size);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

static void print_json_string(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if ((unsigned char)*text < 32) printf("\\u%04x", (unsigned)*text);
        else if (strchr("\"\\", *text)) printf("\\%c", *text);
        else putchar(*text);
    }
    putchar('"');
}

// The most memory that the process has held, mapped files as far as they were read included; 0: not known
static double peak_memory(void) {
#if AVL__POSIX
    struct rusage usage;
    memset(&usage, 0, sizeof usage);
    getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
    return (double)usage.ru_maxrss;
#else
    return (double)usage.ru_maxrss * 1024;
#endif
#else
    return 0;
#endif
}

static astrovl_session *new_session(const astrovl_model *model, astrovl_mode mode, int n_ctx) {
    astrovl_session_options options;
    memset(&options, 0, sizeof options);
    options.mode = mode;
    options.n_threads = o.threads;
    options.n_ctx = n_ctx;
    options.isa = getenv("ASTROVL_ISA");
    astrovl_session *s = astrovl_session_new(model, &options, &g_err);
    if (!s) die("%s", g_err.message);
    return s;
}

// ---- the limits: reading memory, arithmetic ------------------------------------------------------------------------

typedef struct block { const void *data; size_t n_bytes; } block;
typedef struct reading {
    const block *blocks;
    uint64_t     sums[ASTROVL_MAX_THREADS];                // unused; they keep the loads from being dropped
} reading;

enum { SLICES = 16 };                                      // of a block, so that all threads end together

// Adds up two words of each 64-byte cache line, which memory delivers as a whole: as few instructions as with 32-byte
// vectors, so that memory is the limit.
static void read_slice(void *context, int item, int thread) {
    reading *r = (reading *)context;
    const block *b = &r->blocks[item / SLICES];
    size_t step = b->n_bytes / SLICES, at = step * (size_t)(item % SLICES);
    size_t end = item % SLICES == SLICES - 1 ? b->n_bytes : at + step;
    uint64_t sum[4] = {0}, word;                           // four sums: the additions do not wait for each other
    for (; at + 128 <= end; at += 128)
        for (int i = 0; i < 4; i++) {
            memcpy(&word, (const char *)b->data + at + 32 * i, 8);
            sum[i] += word;
        }
    for (int i = 0; i < 4; i++) r->sums[thread] += sum[i];
}

// Seconds that reading the blocks once takes
static double measure_reading(avl__pool *pool, const block *blocks, int n_blocks) {
    reading r;
    double start = avl__seconds();
    volatile uint64_t keep;
    memset(&r, 0, sizeof r);
    r.blocks = blocks;
    avl__pool_run(pool, read_slice, &r, n_blocks * SLICES);
    keep = r.sums[0];
    (void)keep;
    return avl__seconds() - start;
}

// n rounds of one instruction on 12 independent accumulators, which hide its latency. Returns the operations.
typedef double (*arithmetic)(int64_t n);

static double float32_arithmetic(int64_t n) {
    volatile float keep = 0.999f;                          // unknown at compile time
    float sums[12][16], x = keep;
    for (int i = 0; i < 12; i++)
        for (int j = 0; j < 16; j++) sums[i][j] = (float)(i + j);
    for (int64_t r = 0; r < n; r++)
        for (int i = 0; i < 12; i++)
            for (int j = 0; j < 16; j++) sums[i][j] = sums[i][j] * x + x;
    for (int i = 0; i < 12; i++)
        for (int j = 0; j < 16; j++) keep = sums[i][j];
    return (double)n * 12 * 16 * 2;
}

#if AVL__X86 && AVL__SIMD
// step: of accumulator a[i] with x;  n_operations: of a step, products and sums
#define ARITHMETIC(name, isa, vector, set, as, step, n_operations) \
    __attribute__((target(isa))) static double name(int64_t n) { \
        volatile int keep = 0x01010101; \
        const vector x = as(set(keep)); \
        vector a[12]; \
        AVL__EACH(i, 12) a[i] = as(set(keep + i)); \
        for (int64_t r = 0; r < n; r++) { \
            AVL__EACH(i, 12) step; \
        } \
        AVL__EACH(i, 12) __asm__ volatile("" : : "v"(a[i])); \
        return (double)n * 12 * (n_operations); \
    }
#define NO_CAST(x) x
ARITHMETIC(vpdpbusd_512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32, NO_CAST,
           a[i] = _mm512_dpbusd_epi32(a[i], x, x), 128)
ARITHMETIC(vpdpwssd_512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32, NO_CAST,
           a[i] = _mm512_dpwssd_epi32(a[i], x, x), 64)
ARITHMETIC(vdpbf16ps_512, "avx512f,avx512bf16", __m512, _mm512_set1_epi32, _mm512_castsi512_ps,
           a[i] = _mm512_dpbf16_ps(a[i], (__m512bh)x, (__m512bh)x), 64)
ARITHMETIC(vpdpbusd_256, "avx2", __m256i, _mm256_set1_epi32, NO_CAST,
           __asm__(AVL__VNNI("vpdpbusd") : "+x"(a[i]) : "x"(x), "x"(x)), 64)
ARITHMETIC(vpdpwssd_256, "avx2", __m256i, _mm256_set1_epi32, NO_CAST,
           __asm__(AVL__VNNI("vpdpwssd") : "+x"(a[i]) : "x"(x), "x"(x)), 32)
ARITHMETIC(vpmaddubsw_256, "avx2", __m256i, _mm256_set1_epi32, NO_CAST,
           a[i] = _mm256_add_epi16(a[i], _mm256_maddubs_epi16(a[i], x)), 64)   // of a[i]: else it is computed once
ARITHMETIC(vpmaddwd_256, "avx2", __m256i, _mm256_set1_epi32, NO_CAST,
           a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(a[i], x)), 32)
#endif

// The instruction that these kernels multiply many rows with: [weights in blocks, float weights]
static const struct { const char *kernels, *names[2]; arithmetic run[2]; } instructions[] = {
#if AVL__X86 && AVL__SIMD
    {"avx512_bf16", {"vpdpbusd, 512 bits", "vdpbf16ps, 512 bits"}, {vpdpbusd_512, vdpbf16ps_512}},
    {"avx512", {"vpdpbusd, 512 bits", "vpdpwssd, 512 bits"}, {vpdpbusd_512, vpdpwssd_512}},
    {"avx_vnni", {"vpdpbusd, 256 bits", "vpdpwssd, 256 bits"}, {vpdpbusd_256, vpdpwssd_256}},
    {"avx2", {"vpmaddubsw and vpaddw, 256 bits", "vpmaddwd and vpaddd, 256 bits"}, {vpmaddubsw_256, vpmaddwd_256}},
#endif
    {NULL, {"float32 * and +, as compiled", "float32 * and +, as compiled"}, {float32_arithmetic, float32_arithmetic}}};

typedef struct peak {
    arithmetic run;
    int64_t    n;
    double     operations[8 * ASTROVL_MAX_THREADS];        // of each item
} peak;

static void peak_item(void *context, int item, int thread) {
    peak *p = (peak *)context;
    (void)thread;
    p->operations[item] = p->run(p->n);
}

// Operations a second of all threads; *name: what was measured. Rounds are doubled until they take 20 ms, so that
// threads are awake and clocks are up; then the best of five counts.
static double measure_peak(const astrovl_session *s, int type, const char **name) {
    const int is_float = avl__is_float_type(type), n_items = 8 * s->run->pool->n_threads;
    double best = 0, sum, start, time;
    int i = 0, left = 5;
    peak p;
    while (instructions[i].kernels && strcmp(instructions[i].kernels, s->run->kernels->name) != 0) i++;
    memset(&p, 0, sizeof p);
    *name = instructions[i].names[is_float];
    p.run = instructions[i].run[is_float];
    for (p.n = 256; left > 0;) {
        start = avl__seconds();
        avl__pool_run(s->run->pool, peak_item, &p, n_items);
        time = avl__seconds() - start;
        if (time < 0.02) {
            p.n *= 2;
            continue;
        }
        for (sum = 0, i = 0; i < n_items; i++) sum += p.operations[i];
        if (sum / time > best) best = sum / time;
        left--;
    }
    return best;
}

// ---- models of random weights: speed and memory depend on shapes alone ---------------------------------------------

typedef struct tensor {
    char    name[48];
    int     type, n_dims;
    int64_t ne[4];
    double  value;                                         // of all numbers; NAN: random
} tensor;

typedef struct shape {
    const char *name;
    int tied;                                              // no output matrix: the embeddings serve as one
    int n_vocab, n_ctx, n_embd, n_layer, n_head, n_head_kv, n_ff;
    int image_size, patch_size, v_embd, v_layer, v_head, v_ff;
} shape;

static const shape shapes[] = {
    {"llava-1.5-7b", 0, 32000, 4096, 4096, 32, 32, 32, 11008, 336, 14, 1024, 23, 16, 4096},   // layers that are run
    {"smollm2-135m", 1, 49152, 8192, 576, 30, 9, 3, 1536, 0, 0, 0, 0, 0, 0},
    {"nano", 0, 512, 1024, 256, 2, 4, 2, 256, 28, 7, 64, 2, 4, 128}};

static tensor g_tensors[1024];
static int    g_n_tensors;

static void add_tensor(const char *name, int type, double value, int n_dims, int64_t n0, int64_t n1) {
    tensor *t = &g_tensors[g_n_tensors++];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->type = type;
    t->value = value;
    t->n_dims = n_dims;
    t->ne[0] = n0;
    t->ne[1] = n1;
    t->ne[2] = t->ne[3] = 1;
}

// Rows that are no whole blocks take a type of smaller blocks, as `astrovl quantize` chooses.
static void add_matrix(const char *name, int type, int n_in, int n_out) {
    if (n_in % 256 != 0 && type >= ASTROVL_TYPE_Q2_K && type <= ASTROVL_TYPE_Q6_K)
        type = type == ASTROVL_TYPE_Q4_K ? ASTROVL_TYPE_Q5_0 : type == ASTROVL_TYPE_Q5_K ? ASTROVL_TYPE_Q5_1 :
               type == ASTROVL_TYPE_Q6_K ? ASTROVL_TYPE_Q8_0 : ASTROVL_TYPE_Q4_0;
    add_tensor(name, type, NAN, 2, n_in, n_out);
}

static void add_language_model(const shape *m, int type) {
    const int n_kv = m->n_embd / m->n_head * m->n_head_kv;
    const struct { const char *part; int n_in, n_out; } parts[] = {
        {"attn_q", m->n_embd, m->n_embd}, {"attn_k", m->n_embd, n_kv}, {"attn_v", m->n_embd, n_kv},
        {"attn_output", m->n_embd, m->n_embd}, {"ffn_gate", m->n_embd, m->n_ff}, {"ffn_up", m->n_embd, m->n_ff},
        {"ffn_down", m->n_ff, m->n_embd}, {"attn_norm", m->n_embd, 0}, {"ffn_norm", m->n_embd, 0}};
    char name[48];
    add_matrix("token_embd.weight", type, m->n_embd, m->n_vocab);
    add_tensor("output_norm.weight", ASTROVL_TYPE_F32, 1, 1, m->n_embd, 1);
    if (!m->tied) add_matrix("output.weight", type, m->n_embd, m->n_vocab);
    for (int i = 0; i < m->n_layer; i++)
        for (int k = 0; k < 9; k++) {
            snprintf(name, sizeof name, "blk.%d.%s.weight", i, parts[k].part);
            if (parts[k].n_out) add_matrix(name, type, parts[k].n_in, parts[k].n_out);
            else add_tensor(name, ASTROVL_TYPE_F32, 1, 1, parts[k].n_in, 1);
        }
}

static void add_vision_tower(const shape *m) {
    const int n = m->v_embd, side = m->image_size / m->patch_size, f16 = ASTROVL_TYPE_F16, f32 = ASTROVL_TYPE_F32;
    const struct { const char *part; int n_in, n_out; } parts[] = {
        {"attn_q", n, n}, {"attn_k", n, n}, {"attn_v", n, n}, {"attn_out", n, n}, {"ffn_up", n, m->v_ff},
        {"ffn_down", m->v_ff, n}, {"ln1", 0, n}, {"ln2", 0, n}};
    char name[48];
    add_tensor("v.class_embd", f32, NAN, 1, n, 1);
    add_tensor("v.patch_embd.weight", f16, NAN, 4, m->patch_size, m->patch_size);
    g_tensors[g_n_tensors - 1].ne[2] = 3;
    g_tensors[g_n_tensors - 1].ne[3] = n;
    add_tensor("v.position_embd.weight", f32, NAN, 2, n, side * side + 1);
    add_tensor("v.pre_ln.weight", f32, 1, 1, n, 1);
    add_tensor("v.pre_ln.bias", f32, 0, 1, n, 1);
    for (int i = 0; i < m->v_layer; i++)
        for (int k = 0; k < 8; k++) {
            snprintf(name, sizeof name, "v.blk.%d.%s.weight", i, parts[k].part);
            if (parts[k].n_in) add_matrix(name, f16, parts[k].n_in, parts[k].n_out);
            else add_tensor(name, f32, 1, 1, parts[k].n_out, 1);
            snprintf(name, sizeof name, "v.blk.%d.%s.bias", i, parts[k].part);
            add_tensor(name, f32, 0, 1, parts[k].n_out, 1);
        }
    for (int k = 0; k < 3; k += 2) {                           // the projector
        snprintf(name, sizeof name, "mm.%d.weight", k);
        add_matrix(name, f16, k ? m->n_embd : n, m->n_embd);
        snprintf(name, sizeof name, "mm.%d.bias", k);
        add_tensor(name, f32, 0, 1, m->n_embd, 1);
    }
}

static void put(FILE *f, uint64_t value, int n_bytes) {
    for (; n_bytes > 0; n_bytes--, value >>= 8) putc((int)(value & 255), f);
}
static void put_text(FILE *f, const char *text) {
    put(f, strlen(text), 8);
    fputs(text, f);
}
static void put_float(FILE *f, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    put(f, bits, 4);
}
static void put_key(FILE *f, const char *key, int type) {
    put_text(f, key);
    put(f, (uint64_t)type, 4);
}
static void put_array(FILE *f, const char *key, int item_type, int n) {
    put_key(f, key, ASTROVL_VALUE_ARRAY);
    put(f, (uint64_t)item_type, 4);
    put(f, (uint64_t)n, 8);
}

typedef struct number { const char *key; int value; } number;
static void put_numbers(FILE *f, const number *numbers, int n) {
    for (int i = 0; i < n; i++) {
        put_key(f, numbers[i].key, ASTROVL_VALUE_U32);
        put(f, (uint64_t)numbers[i].value, 4);
    }
}

// A made-up SentencePiece vocabulary: three special tokens, 256 bytes, the space, all words of one, two, ... letters.
static void put_vocabulary(FILE *f, int n_vocab) {
    static const char *const special[3] = {"<unk>", "<s>", "</s>"};
    char text[16];
    put_key(f, "tokenizer.ggml.model", ASTROVL_VALUE_STRING);
    put_text(f, "llama");
    put_array(f, "tokenizer.ggml.tokens", ASTROVL_VALUE_STRING, n_vocab);
    for (int i = 0; i < n_vocab; i++) {
        char *at = text + sizeof text - 1;
        *at = 0;
        for (int k = i - 259; k > 0; k = (k - 1) / 26) *--at = (char)('a' + (k - 1) % 26);
        if (i >= 3 && i < 259) snprintf(at = text, sizeof text, "<0x%02X>", (unsigned)i - 3);
        put_text(f, i < 3 ? special[i] : i == 259 ? "\xE2\x96\x81" : at);
    }
    put_array(f, "tokenizer.ggml.scores", ASTROVL_VALUE_F32, n_vocab);
    for (int i = 0; i < n_vocab; i++) put_float(f, i < 260 ? 0.0f : (float)(260 - i));
    put_array(f, "tokenizer.ggml.token_type", ASTROVL_VALUE_I32, n_vocab);
    // unknown, control, byte, normal
    for (int i = 0; i < n_vocab; i++) put(f, i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1, 4);
}

enum { N_TEXT_KEYS = 20, N_VISION_KEYS = 19 };             // that put_metadata writes

static void put_metadata(FILE *f, const shape *m, int file_type, int is_vision) {
    const number common[] = {{"general.file_type", file_type}, {"general.quantization_version", 2}};
    const number text[] = {
        {"llama.vocab_size", m->n_vocab}, {"llama.context_length", m->n_ctx}, {"llama.embedding_length", m->n_embd},
        {"llama.block_count", m->n_layer}, {"llama.feed_forward_length", m->n_ff},
        {"llama.attention.head_count", m->n_head}, {"llama.attention.head_count_kv", m->n_head_kv},
        {"llama.rope.dimension_count", m->n_head ? m->n_embd / m->n_head : 0}, {"tokenizer.ggml.unknown_token_id", 0},
        {"tokenizer.ggml.bos_token_id", 1}, {"tokenizer.ggml.eos_token_id", 2}};
    const number vision[] = {
        {"clip.vision.image_size", m->image_size}, {"clip.vision.patch_size", m->patch_size},
        {"clip.vision.embedding_length", m->v_embd}, {"clip.vision.feed_forward_length", m->v_ff},
        {"clip.vision.block_count", m->v_layer}, {"clip.vision.attention.head_count", m->v_head},
        {"clip.vision.projection_dim", m->n_embd}};
    static const char *const flags[] = {"clip.has_vision_encoder", "clip.has_llava_projector", "clip.use_gelu"};
    static const char *const halves[] = {"clip.vision.image_mean", "clip.vision.image_std"};
    put_key(f, "general.architecture", ASTROVL_VALUE_STRING);
    put_text(f, is_vision ? "clip" : "llama");
    put_key(f, "general.name", ASTROVL_VALUE_STRING);
    put_text(f, m->name);
    put_numbers(f, common, 2);
    put_key(f, is_vision ? "clip.vision.attention.layer_norm_epsilon" : "llama.attention.layer_norm_rms_epsilon",
            ASTROVL_VALUE_F32);
    put_float(f, 1e-5f);
    if (!is_vision) {
        put_numbers(f, text, 11);
        put_vocabulary(f, m->n_vocab);
        return;
    }
    for (int i = 0; i < 3; i++) {
        put_key(f, flags[i], ASTROVL_VALUE_BOOL);
        put(f, i < 2, 1);
    }
    put_key(f, "clip.projector_type", ASTROVL_VALUE_STRING);
    put_text(f, "mlp");
    put_numbers(f, vision, 7);
    for (int i = 0; i < 2; i++) {
        put_array(f, halves[i], ASTROVL_VALUE_F32, 3);
        for (int k = 0; k < 3; k++) put_float(f, 0.5f);
    }
    put_array(f, "clip.vision.feature_layer", ASTROVL_VALUE_I32, 1);
    put(f, (uint64_t)m->v_layer, 4);                       // all layers are run
}

// Random numbers, in a circle of this many: a prime number of the largest blocks, so that neighboring rows of any
// length are different stretches of it.
enum { CIRCLE = 1031 * 256 };

// Blocks of random bits whose scale d makes the numbers' standard deviation about 0.02; m = ratio d centers them on 0.
static unsigned char *random_blocks(int type) {
    static const struct { int type, d_at, m_at; float d, ratio; } scales[] = {
        {ASTROVL_TYPE_Q4_0, 0, -1, 4.3e-3f, 0},  {ASTROVL_TYPE_Q4_1, 0, 2, 4.3e-3f, -7.5f},
        {ASTROVL_TYPE_Q5_0, 0, -1, 2.2e-3f, 0},  {ASTROVL_TYPE_Q5_1, 0, 2, 2.2e-3f, -15.5f},
        {ASTROVL_TYPE_Q8_0, 0, -1, 2.7e-4f, 0},  {ASTROVL_TYPE_Q2_K, 80, 82, 1.4e-3f, 1.5f},
        {ASTROVL_TYPE_Q3_K, 108, -1, 4.7e-4f, 0}, {ASTROVL_TYPE_Q4_K, 0, 2, 8e-5f, 7.5f},
        {ASTROVL_TYPE_Q5_K, 0, 2, 4e-5f, 15.5f}, {ASTROVL_TYPE_Q6_K, 208, -1, 1.5e-5f, 0}};
    const size_t n = astrovl_type_row_bytes(type, CIRCLE), n_blocks = avl__is_float_type(type) ? CIRCLE : 0;
    unsigned char *blocks = (unsigned char *)new_memory(n, 1), *at = blocks;
    uint64_t state = 1;
    size_t i, k = 0, block_bytes;
    for (i = 0; i < n; i++) blocks[i] = (unsigned char)(avl__random(&state) * 256);
    for (i = 0; i < n_blocks; i++) {                       // floats: the bits of numbers in -0.035 to 0.035
        float x = (float)(avl__random(&state) - 0.5) * 0.07f;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (type == ASTROVL_TYPE_F16) bits = astrovl_f32_to_f16(x);
        if (type == ASTROVL_TYPE_BF16) bits = astrovl_f32_to_bf16(x);
        for (k = 0; k < n / CIRCLE; k++, bits >>= 8) *at++ = (unsigned char)bits;
    }
    if (n_blocks) return blocks;
    while (scales[k].type != type) k++;
    block_bytes = astrovl_type_row_bytes(type, type >= ASTROVL_TYPE_Q2_K ? 256 : 32);
    for (; at < blocks + n; at += block_bytes) {
        const uint16_t d = astrovl_f32_to_f16(scales[k].d), m = astrovl_f32_to_f16(scales[k].d * scales[k].ratio);
        at[scales[k].d_at] = (unsigned char)d;
        at[scales[k].d_at + 1] = (unsigned char)(d >> 8);
        if (scales[k].m_at < 0) continue;
        at[scales[k].m_at] = (unsigned char)m;
        at[scales[k].m_at + 1] = (unsigned char)(m >> 8);
    }
    return blocks;
}

static uint64_t tensor_bytes(const tensor *t) {
    return astrovl_type_row_bytes(t->type, t->ne[0]) * (uint64_t)(t->ne[1] * t->ne[2] * t->ne[3]);
}

static void put_data(FILE *f, const tensor *t, int index) {
    static unsigned char *circles[ASTROVL_TYPE_BF16 + 1];  // made when first wanted
    const size_t n = astrovl_type_row_bytes(t->type, CIRCLE);
    uint64_t left = tensor_bytes(t), i;
    size_t at = astrovl_type_row_bytes(t->type, index * 7919 % 1031 * 256), some;
    if (!(t->value != t->value)) {
        for (i = 0; i < left / 4; i++) put_float(f, (float)t->value);
        return;
    }
    if (!circles[t->type]) circles[t->type] = random_blocks(t->type);
    for (; left > 0; left -= some, at = 0) {
        some = left < n - at ? (size_t)left : n - at;
        fwrite(circles[t->type] + at, 1, some, f);
    }
}

static void pad(FILE *f, uint64_t size) {
    for (; size % 32 != 0; size++) putc(0, f);
}

// Writes the tensors declared to a model file. It has another name until it is complete.
static void write_model(const char *path, const shape *m, int file_type, int is_vision) {
    char part[4096];
    uint64_t offset = 0;
    FILE *f;
    snprintf(part, sizeof part, "%s.part", path);
    if (!(f = fopen(part, "wb"))) die("%s: cannot be created (no such folder, or no permission)", part);
    put(f, 0x46554747, 4);                                 // "GGUF"
    put(f, 3, 4);
    put(f, (uint64_t)g_n_tensors, 8);
    put(f, is_vision ? N_VISION_KEYS : N_TEXT_KEYS, 8);
    put_metadata(f, m, file_type, is_vision);
    for (int i = 0; i < g_n_tensors; i++) {
        const tensor *t = &g_tensors[i];
        put_text(f, t->name);
        put(f, (uint64_t)t->n_dims, 4);
        for (int k = 0; k < t->n_dims; k++) put(f, (uint64_t)t->ne[k], 8);
        put(f, (uint64_t)t->type, 4);
        put(f, offset, 8);
        offset += (tensor_bytes(t) + 31) / 32 * 32;
    }
    pad(f, (uint64_t)ftell(f));
    for (int i = 0; i < g_n_tensors && !ferror(f); i++) {
        put_data(f, &g_tensors[i], i);
        pad(f, tensor_bytes(&g_tensors[i]));
    }
    int failed = ferror(f) != 0;
    failed |= fclose(f) != 0;
    if (failed) remove(part);
    if (failed || rename(part, path) != 0) die("%s: cannot be written (is the disk full?)", path);
}

// --synthetic: writes the files that are not there yet, and takes them as the model.
static void use_synthetic(void) {
    static const struct { const char *name; int type, file_type; } types[] = {
        {"F32", ASTROVL_TYPE_F32, 0}, {"F16", ASTROVL_TYPE_F16, 1}, {"BF16", ASTROVL_TYPE_BF16, 32},
        {"Q4_0", ASTROVL_TYPE_Q4_0, 2}, {"Q4_1", ASTROVL_TYPE_Q4_1, 3}, {"Q5_0", ASTROVL_TYPE_Q5_0, 8},
        {"Q5_1", ASTROVL_TYPE_Q5_1, 9}, {"Q8_0", ASTROVL_TYPE_Q8_0, 7}, {"Q2_K", ASTROVL_TYPE_Q2_K, 10},
        {"Q3_K", ASTROVL_TYPE_Q3_K, 11}, {"Q4_K", ASTROVL_TYPE_Q4_K, 14}, {"Q5_K", ASTROVL_TYPE_Q5_K, 16},
        {"Q6_K", ASTROVL_TYPE_Q6_K, 18}};
    static char paths[2][4096];
    const char *colon = strchr(o.synthetic, ':'), *dir = o.dir ? o.dir : getenv("TMPDIR");
    const size_t length = colon ? (size_t)(colon - o.synthetic) : strlen(o.synthetic);
    char wanted[8] = "Q4_0";
    int m, t;
    if (colon) snprintf(wanted, sizeof wanted, "%.7s", colon + 1);
    for (char *c = wanted; *c; c++)
        if (*c >= 'a' && *c <= 'z') *c = (char)(*c - 32);
    for (t = 0; t < 13 && strcmp(types[t].name, wanted) != 0; t++) {}
    for (m = 0; m < 3 && (strlen(shapes[m].name) != length || memcmp(shapes[m].name, o.synthetic, length) != 0); m++) {}
    if (t == 13 || m == 3)
        die("--synthetic wants llava-1.5-7b, smollm2-135m or nano, and perhaps :q8_0 or so, not \"%s\"", o.synthetic);
    for (int i = 0; i < (shapes[m].image_size ? 2 : 1); i++) { // the language model, the vision tower
        astrovl_info info;
        snprintf(paths[i], sizeof paths[i], "%s/astrovl-%s-%s%s.gguf", dir && *dir ? dir : "/tmp", shapes[m].name,
                 i ? "mmproj-" : "", i ? "F16" : wanted);
        astrovl_model *model = astrovl_open(paths[i], NULL, NULL);
        if (model) astrovl_get_info(model, &info);
        if (!model || strcmp(info.name, shapes[m].name) != 0) {
            g_n_tensors = 0;
            if (i) add_vision_tower(&shapes[m]);
            else add_language_model(&shapes[m], types[t].type);
            write_model(paths[i], &shapes[m], i ? 1 : types[t].file_type, i);
        }
        astrovl_close(model);
        fprintf(stderr, "%s: a model of random weights, kept for the next time\n", paths[i]);
        o.models[o.n_models++] = paths[i];
    }
}

// ---- a model's speed -----------------------------------------------------------------------------------------------

enum { QUESTION = 35 };                                    // positions after an image, to time an answer's first token

// One kind of work
typedef struct pace {
    int         n;                                         // images, positions or tokens; 0: the model cannot do it
    double      seconds;                                   // for all n
    double      work;                                      // operations, or bytes that must be read
    double      limit;                                     // work a second
    double      reached;                                   // work / seconds / limit
    int         type;                                      // of its feed-forward weights
    const char *limit_name;                                // what the limit is
} pace;

typedef struct speed {
    pace   image, prompt, answer;
    double first_token_seconds;                            // of an image and QUESTION positions; 0: not measured
    double file_bytes, cache_bytes;                        // the model's files; the KV cache as far as it was used
    block  weights[16 * 128];                              // that a token needs
    int    n_weights;
} speed;

static int begins(const char *text, const char *start) { return strncmp(text, start, strlen(start)) == 0; }

static int has_tensor(const astrovl_model *model, const char *name) {
    int f, found = 0;
    for (f = 0; f < astrovl_n_files(model); f++)
        found |= astrovl_gguf_find_tensor(astrovl_file(model, f), name) != NULL;
    return found;
}

static double position_bytes(const astrovl_session *s, const astrovl_info *m) {
    return 2.0 * m->n_layer * m->n_head_kv * m->head_dim * (double)s->cache.value_bytes;
}

// Cuts what is to be read and written to a context of two positions or more.
static void cut_to_context(int n_ctx, int *n_prompt, int *n_answer) {
    if (*n_answer > n_ctx - 1) *n_answer = n_ctx - 1;
    if (*n_prompt > n_ctx - *n_answer) *n_prompt = n_ctx - *n_answer;
}

// How much work each kind is, from the tensors' shapes. Two operations for each weight and row; for attention, head_dim
// products to score a pair of positions and head_dim to mix it in.
static void count_work(const astrovl_session *s, const astrovl_info *m, speed *v) {
    const double rows = m->n_patches + 1.0, n = v->prompt.n, n_answer = v->answer.n;
    const int n_layer = m->has_projector ? m->vision_feature_layer : m->vision_n_layer;
    double layers = 0, output = 0, image = 0, bytes = 0;
    for (int f = 0; f < astrovl_n_files(s->model); f++) {
        const astrovl_gguf *file = astrovl_file(s->model, f);
        v->file_bytes += (double)astrovl_gguf_size(file);
        for (int i = 0; i < astrovl_gguf_n_tensors(file); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
            const double values = (double)t->ne[0] * (double)t->ne[1] * (double)t->ne[2] * (double)t->ne[3];
            int is_output = strcmp(t->name, "output.weight") == 0;
            if (strcmp(t->name, "token_embd.weight") == 0) is_output = !has_tensor(s->model, "output.weight");
            if (t->n_dims < 2) continue;
            if (is_output) output = values;
            if (begins(t->name, "blk.")) layers += values;
            if (is_output || begins(t->name, "blk.")) {
                v->weights[v->n_weights].data = t->data;
                v->weights[v->n_weights++].n_bytes = (size_t)t->n_bytes;
                bytes += (double)t->n_bytes;
            }
            if (begins(t->name, "v.blk.") && atoi(t->name + 6) < n_layer) image += rows * values;
            if (begins(t->name, "v.patch_embd") || (begins(t->name, "mm.") && m->has_projector))
                image += m->n_patches * values;
            if (strcmp(t->name, "blk.0.ffn_up.weight") == 0)
                v->prompt.type = v->answer.type = (int)t->type;
            if (strcmp(t->name, "v.blk.0.ffn_up.weight") == 0) v->image.type = (int)t->type;
        }
    }
    v->image.work = 2 * (image + 2.0 * n_layer * rows * rows * m->vision_n_embd);
    v->prompt.work = 2 * (n * layers + output + 2.0 * m->n_layer * m->n_head * m->head_dim * n * (n + 1) / 2);
    v->answer.work = n_answer * bytes + (n_answer * n + n_answer * (n_answer + 1) / 2) * position_bytes(s, m);
}

// rows: room for the image's rows and QUESTION more;  logits: [n_vocab]
static void measure_image(astrovl_session *s, const astrovl_info *m, float *rows, float *logits, speed *v) {
    const int n = m->n_image_tokens + QUESTION;
    astrovl_image image = {640, 480, NULL, 1};
    image.rgb = (unsigned char *)new_memory(640 * 480, 3);
    for (int i = 0; i < 640 * 480 * 3; i++) image.rgb[i] = (unsigned char)(i >> 8 ^ i);       // any picture
    astrovl_session_reset(s);
    double start = avl__seconds();
    if (m->has_projector) check(astrovl_encode_image(s, &image, rows, &g_err));
    else check(astrovl_embed_images(s, &image, 1, 0, rows, &g_err));
    v->image.seconds = avl__seconds() - start;
    if (m->has_projector && n <= astrovl_session_n_ctx(s)) {
        check(astrovl_eval_embeddings(s, rows, n, logits, 1, &g_err));
        v->first_token_seconds = avl__seconds() - start;
    }
    astrovl_session_reset(s);
    free(image.rgb);
}

// After each token the weights are read again, alone: a shared machine's memory may be twice as fast a second later.
static void measure_text(astrovl_session *s, const int32_t *tokens, float *logits, speed *v) {
    double start = avl__seconds(), read_seconds = 0, bytes = 0;
    check(astrovl_eval_tokens(s, tokens, v->prompt.n, logits, 1, &g_err));
    v->prompt.seconds = avl__seconds() - start;
    for (int i = 0; i < v->answer.n; i++) {
        start = avl__seconds();
        check(astrovl_eval_tokens(s, tokens + i % v->prompt.n, 1, logits, 1, &g_err));
        v->answer.seconds += avl__seconds() - start;
        read_seconds += measure_reading(s->run->pool, v->weights, v->n_weights);
    }
    for (int i = 0; i < v->n_weights; i++) bytes += (double)v->weights[i].n_bytes;
    v->answer.limit = v->answer.n * bytes / read_seconds;
    v->answer.limit_name = "reading weights";
    astrovl_session_reset(s);
}

static void measure_round(astrovl_session *s, const astrovl_info *m, speed *v) {
    const int n_ctx = m->has_text ? astrovl_session_n_ctx(s) : 0;
    const size_t n_rows = (size_t)(m->n_image_tokens + QUESTION) * (size_t)m->n_embd;
    float *rows = (float *)new_memory(n_rows + (size_t)m->n_embd_joint, sizeof *rows);
    float *logits = (float *)new_memory((size_t)m->n_vocab, sizeof *logits);
    int32_t *tokens;
    int i, n, n_prompt = o.prompt, n_answer = o.tokens;
    memset(v, 0, sizeof *v);
    if (m->has_text) {
        cut_to_context(n_ctx, &n_prompt, &n_answer);
        v->prompt.n = n_prompt;
        v->answer.n = n_answer;
    }
    v->image.n = m->has_projector ? m->has_text : m->has_joint_image;
    if (!m->has_text && !v->image.n) die("neither a language model nor a whole vision tower to measure");
    count_work(s, m, v);
    tokens = (int32_t *)new_memory((size_t)v->prompt.n, sizeof *tokens);
    for (i = 0; i < v->prompt.n; i++) tokens[i] = (int32_t)((int64_t)i * 7919 % m->n_vocab);
    n = v->image.n && m->has_projector ? m->n_image_tokens + QUESTION : 0;
    if (n > n_ctx || n < v->prompt.n + v->answer.n) n = v->prompt.n + v->answer.n;
    if (m->has_text) v->cache_bytes = n * position_bytes(s, m);
    if (v->image.n) measure_image(s, m, rows, logits, v);
    if (m->has_text) measure_text(s, tokens, logits, v);
    if (v->prompt.n) v->prompt.limit = measure_peak(s, v->prompt.type, &v->prompt.limit_name);
    if (v->image.n) v->image.limit = measure_peak(s, v->image.type, &v->image.limit_name);
    free(rows);
    free(logits);
    free(tokens);
}

// Several answers written together, and one alone
typedef struct together {
    int    n, n_prompt, n_answer;
    double seconds, one_seconds, gain, cache_bytes;        // gain: n * one_seconds / seconds
} together;

// Seconds for a token of each of n answers, which have n_past positions.  logits: scratch, [AVL__STEP_ROWS][n_vocab]
static double measure_step(astrovl_session *s, avl__kv_cache *caches, int n, int n_past, float *logits) {
    const avl__llama *m = &s->model->llama;
    avl__kv_cache *group[AVL__STEP_ROWS];
    int32_t tokens[AVL__STEP_ROWS];
    double start = avl__seconds();
    int k;
    for (int i = 0; i < n; i += k) {
        for (k = 0; k < AVL__STEP_ROWS && i + k < n; k++) {
            group[k] = &caches[i + k];
            group[k]->n_past = n_past;
            tokens[k] = (int32_t)((int64_t)(n_past + i + k) * 7919 % m->n_vocab);
        }
        check(avl__llama_eval(m, s->run, group, k, tokens, NULL, k, logits, k, &g_err));
    }
    return avl__seconds() - start;
}

// Each answer has a KV cache of its own whose n_prompt positions are made up: what they hold does not change the time.
// One alone and all together take turns token by token, so that a ratio is of one moment.
static void measure_together(astrovl_session *s, const astrovl_info *m, together *b) {
    avl__kv_cache *caches = (avl__kv_cache *)new_memory((size_t)o.batch, sizeof *caches);
    float *logits = (float *)new_memory((size_t)AVL__STEP_ROWS * (size_t)m->n_vocab, sizeof *logits);
    double one[99], all[99], gain[99];
    memset(b, 0, sizeof *b);
    b->n = o.batch;
    b->n_prompt = o.prompt;
    b->n_answer = o.tokens;
    cut_to_context(astrovl_session_n_ctx(s), &b->n_prompt, &b->n_answer);
    size_t size = (size_t)(position_bytes(s, m) / 2) * (size_t)(b->n_prompt + b->n_answer);
    b->cache_bytes = 2.0 * (double)size * b->n;
    for (int i = 0; i < b->n; i++) {
        if (!avl__kv_cache_init(&caches[i], &s->model->llama, b->n_prompt + b->n_answer, s->cache.value_bytes))
            die("out of memory for the KV caches of %d answers", b->n);
        memset(caches[i].k, 0x3C, size + AVL__LINE * caches[i].value_bytes);   // middling numbers, as float16 (1.06) and as float (0.01)
        memset(caches[i].v, 0x3C, size + AVL__LINE * caches[i].value_bytes);
    }
    for (int i = 0; i < o.rounds; i++) {
        one[i] = all[i] = 0;
        for (int step = b->n_prompt; step < b->n_prompt + b->n_answer; step++) {
            one[i] += measure_step(s, caches, 1, step, logits);
            all[i] += measure_step(s, caches, b->n, step, logits);
        }
        gain[i] = b->n * one[i] / all[i];
    }
    b->one_seconds = median(one, o.rounds);
    b->seconds = median(all, o.rounds);
    b->gain = median(gain, o.rounds);
    for (int i = 0; i < b->n; i++) avl__kv_cache_free(&caches[i]);
    free(caches);
    free(logits);
}

static void print_pace(const char *key, const char *what, int is_bytes, const pace *x) {
    if (!x->n) return;
    if (o.json)
        printf(", \"%s\": {\"n\": %d, \"seconds\": %.9g, \"per_second\": %.9g, \"%s\": %.9g, "
               "\"limit_per_second\": %.9g, \"reached\": %.9g, \"type\": \"%s\", \"limit\": \"%s\"}", key, x->n,
               x->seconds, x->n / x->seconds, is_bytes ? "bytes" : "operations", x->work, x->limit, x->reached,
               astrovl_type_name(x->type), x->limit_name);
    else
        printf("  %-18s %5d %9.3f s %9.1f /s  %8.1f of %6.1f %s %4.0f %%  %s; %s\n", what, x->n, x->seconds,
               x->n / x->seconds, x->work / x->seconds * 1e-9, x->limit * 1e-9, is_bytes ? "GB/s " : "GOP/s",
               100 * x->reached, astrovl_type_name(x->type), x->limit_name);
}

static void print_speed(const astrovl_info *m, const speed *v, const together *b, double memory) {
    const double per_second = b->n ? (double)b->n * b->n_answer / b->seconds : 0;
    const double alone = b->n ? b->n_answer / b->one_seconds : 0;
    if (o.json) {
        printf("{\"name\": ");
        print_json_string(m->name);
        printf(", \"rounds\": %d", o.rounds);
    } else printf("%s, medians of %d rounds; at the right: of what the machine allows\n", m->name, o.rounds);
    print_pace("image", "one image", 0, &v->image);
    print_pace("prompt", "prompt, positions", 0, &v->prompt);
    print_pace("answer", "answer, tokens", 1, &v->answer);
    if (o.json) {
        if (v->first_token_seconds > 0) printf(", \"first_token_seconds\": %.9g", v->first_token_seconds);
        if (b->n)
            printf(", \"batch\": {\"n\": %d, \"prompt\": %d, \"tokens\": %d, \"per_second\": %.9g, "
                   "\"alone_per_second\": %.9g, \"ratio\": %.9g, \"kv_caches\": %.0f}", b->n, b->n_prompt, b->n_answer,
                   per_second, alone, b->gain, b->cache_bytes);
        printf(", \"memory\": {\"peak\": %.0f, \"files\": %.0f, \"kv_cache\": %.0f}}\n", memory, v->file_bytes,
               v->cache_bytes);
        return;
    }
    if (v->first_token_seconds > 0)
        printf("  image and question %15.3f s to the first token\n", v->first_token_seconds);
    if (b->n)
        printf("  %d answers together %15.1f /s, %.2f times the %.1f /s of one alone (%d tokens after %d positions "
               "each; KV caches %.1f MB)\n", b->n, per_second, b->gain, alone, b->n_answer, b->n_prompt,
               b->cache_bytes * 1e-6);
    printf("  memory%s: at most %.1f MB; files %.1f MB, KV cache %.1f MB\n", b->n ? " for one" : "", memory * 1e-6,
           v->file_bytes * 1e-6, v->cache_bytes * 1e-6);
}

static void bench_model(const astrovl_model *model) {
    static speed v;
    static double all[10][99];                             // [3 kinds][seconds, limit, reached], first token; by round
    pace *const paces[3] = {&v.image, &v.prompt, &v.answer};
    const int n = o.prompt + o.tokens;
    astrovl_info m;
    astrovl_session *s;
    together b;
    astrovl_get_info(model, &m);
    s = new_session(model, ASTROVL_FAST,
                    n <= ASTROVL_DEFAULT_CONTEXT || !m.has_text ? 0 : n < m.n_ctx_train ? n : m.n_ctx_train);
    for (int i = 0; i < o.rounds; i++) {
        measure_round(s, &m, &v);
        for (int k = 0; k < 3; k++) {
            if (!paces[k]->n) continue;
            all[3 * k][i] = paces[k]->seconds;
            all[3 * k + 1][i] = paces[k]->limit;
            all[3 * k + 2][i] = paces[k]->work / paces[k]->seconds / paces[k]->limit;
        }
        all[9][i] = v.first_token_seconds;
    }
    for (int k = 0; k < 3; k++) {
        paces[k]->seconds = median(all[3 * k], o.rounds);
        paces[k]->limit = median(all[3 * k + 1], o.rounds);
        paces[k]->reached = median(all[3 * k + 2], o.rounds);
    }
    v.first_token_seconds = median(all[9], o.rounds);
    double memory = peak_memory();                                // before the next, whose memory is not one answer's
    memset(&b, 0, sizeof b);
    if (m.has_text && o.batch) measure_together(s, &m, &b);
    print_speed(&m, &v, &b, memory);
    astrovl_session_free(s);
}

// ---- search --------------------------------------------------------------------------------------------------------

static void bench_search(void) {
    const size_t n = (size_t)o.rows * (size_t)o.dims;
    unsigned char *rows = (unsigned char *)new_memory(n, 2);
    float *query = (float *)new_memory((size_t)o.dims, sizeof *query);
    avl__pool *pool = avl__pool_new(o.threads);
    block whole = {NULL, 2 * n};
    const astrovl_rows f16 = {rows, o.rows, o.dims};
    double search[99], read[99], start, gigabytes = (double)n * 2e-9, ratio;
    uint64_t state = 1;
    astrovl_hit hits[10];
    if (!pool) die("out of memory");
    whole.data = rows;
    for (size_t k = 0; k < n; k++) {                              // float16 of both signs, from 0.1 to 2
        int half = 0x2E00 + (int)(avl__random(&state) * 0xE00) + (avl__random(&state) < 0.5 ? 0x8000 : 0);
        rows[2 * k] = (unsigned char)(half & 0xFF);
        rows[2 * k + 1] = (unsigned char)(half >> 8);
    }
    for (int i = 0; i < o.dims; i++) query[i] = (float)sin(i);
    for (int i = 0; i < o.rounds; i++) {
        start = avl__seconds();
        if (astrovl_search(&f16, query, 10, o.threads, hits, &g_err) < 0) die("%s", g_err.message);
        search[i] = avl__seconds() - start;
        read[i] = measure_reading(pool, &whole, 1);
    }
    ratio = median(search, o.rounds) / median(read, o.rounds);
    if (o.json)
        printf("{\"rows\": %d, \"dims\": %d, \"search_seconds\": %.9g, \"read_seconds\": %.9g, \"ratio\": %.9g}\n",
               o.rows, o.dims, median(search, o.rounds), median(read, o.rounds), ratio);
    else
        printf("%d rows of %d float16, medians of %d rounds\n  search, the best 10  %9.2f ms  %6.2f GB/s\n"
               "  reading them once    %9.2f ms  %6.2f GB/s\n  ratio                %9.2f\n", o.rows, o.dims, o.rounds,
               median(search, o.rounds) * 1e3, gigabytes / median(search, o.rounds), median(read, o.rounds) * 1e3,
               gigabytes / median(read, o.rounds), ratio);
    avl__pool_free(pool);
    free(rows);
    free(query);
}

// ---- accuracy ------------------------------------------------------------------------------------------------------

// How far fast mode's logits are from exact mode's: sums over positions, then means
typedef struct likeness {
    double cosine, least_cosine;           // of a position's logits: the mean, the least
    double difference;                     // the largest of two logits
    double same;                           // share of positions with the same most likely token
    double perplexity;                     // exp(mean of -log p(the next token))
} likeness;

// -log softmax(logits)[token]
static double surprise(const float *logits, int n, int32_t token) {
    double most = logits[0], sum = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > most) most = logits[i];
    for (int i = 0; i < n; i++) sum += exp(logits[i] - most);
    return log(sum) + most - logits[token];
}

// Adds a position.  a, b: [n];  next: the token that follows, or -1
static void compare_logits(likeness *sums, const float *a, const float *b, int n, int32_t next) {
    double aa = 0, bb = 0, ab = 0, cosine;
    int i, best_a = 0, best_b = 0;
    for (i = 0; i < n; i++) {
        double x = a[i], y = b[i];
        aa += x * x;
        bb += y * y;
        ab += x * y;
        if (fabs(x - y) > sums->difference) sums->difference = fabs(x - y);
        if (a[i] > a[best_a]) best_a = i;
        if (b[i] > b[best_b]) best_b = i;
    }
    cosine = ab / sqrt(aa * bb);
    sums->cosine += cosine;
    if (cosine < sums->least_cosine) sums->least_cosine = cosine;
    sums->same += best_a == best_b;
    if (next >= 0) sums->perplexity += surprise(a, n, next);
}

static void print_likeness(const likeness *x, int n, int is_steps, double exact) {
    const double perplexity = exp(x->perplexity / (n - 1));
    if (o.json)
        printf(", \"%s\": {\"mean_cosine\": %.9g, \"least_cosine\": %.9g, \"largest_difference\": %.9g, "
               "\"same_token\": %.9g, \"perplexity\": %.9g, \"perplexity_ratio\": %.9g}", is_steps ? "steps" : "prompt",
               x->cosine / n, x->least_cosine, x->difference, x->same / n, perplexity, perplexity / exact);
    else
        printf("  %-25s %9.6f %9.6f %12.4g %10.2f %% %12.5g %9.5f\n",
               is_steps ? "one by one, as answers" : "read together, as prompts", x->cosine / n, x->least_cosine,
               x->difference, 100 * x->same / n, perplexity, perplexity / exact);
}

static char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    long n;
    if (!f || fseek(f, 0, SEEK_END) != 0 || (n = ftell(f)) < 0) die("%s: cannot be read", path);
    rewind(f);
    char *text = (char *)new_memory((size_t)n + 1, 1);
    *size = fread(text, 1, (size_t)n, f);
    if (ferror(f)) die("%s: cannot be read", path);
    fclose(f);
    return text;
}

static void bench_accuracy(const astrovl_model *model, const char *path) {
    enum { BLOCK = 512 };                                  // positions whose logits are held at once
    likeness prompt = {0, 1, 0, 0, 0}, steps = {0, 1, 0, 0, 0};
    double exact = 0;                                      // exact mode's perplexity
    astrovl_info m;
    astrovl_session *fast;
    float *ours, *theirs;
    int32_t *tokens;
    size_t size;
    char *text = read_file(path, &size);
    int some;
    astrovl_get_info(model, &m);
    int n = astrovl_tokenize(model, text, size, ASTROVL_ADD_SPECIAL, NULL, 0, &g_err);
    if (n < 0) die("%s", g_err.message);
    if (!m.has_text) die("%s: there is no language model in it", o.models[0]);
    tokens = (int32_t *)new_memory((size_t)n, sizeof *tokens);
    astrovl_tokenize(model, text, size, ASTROVL_ADD_SPECIAL, tokens, n, &g_err);
    if (n > o.tokens) n = o.tokens;
    if (n > m.n_ctx_train) n = m.n_ctx_train;
    if (n < 2) die("%s: two tokens at least are wanted", path);
    fast = new_session(model, ASTROVL_FAST, n);
    astrovl_session *reference = new_session(model, ASTROVL_EXACT, n);
    ours = (float *)new_memory((size_t)BLOCK * (size_t)m.n_vocab, sizeof *ours);
    theirs = (float *)new_memory((size_t)BLOCK * (size_t)m.n_vocab, sizeof *theirs);
    for (int i = 0; i < n; i += some) {
        some = n - i < BLOCK ? n - i : BLOCK;
        check(astrovl_eval_tokens(reference, tokens + i, some, theirs, some, &g_err));
        for (int k = 0; k < some; k++) {
            const float *row = theirs + (size_t)k * (size_t)m.n_vocab;
            const int32_t next = i + k == n - 1 ? -1 : tokens[i + k + 1];
            check(astrovl_eval_tokens(fast, tokens + i + k, 1, ours, 1, &g_err));
            compare_logits(&steps, ours, row, m.n_vocab, next);
            if (next >= 0) exact += surprise(row, m.n_vocab, next);
        }
        check(astrovl_session_rewind(fast, i, &g_err));
        check(astrovl_eval_tokens(fast, tokens + i, some, ours, some, &g_err));
        for (int k = 0; k < some; k++)
            compare_logits(&prompt, ours + (size_t)k * (size_t)m.n_vocab, theirs + (size_t)k * (size_t)m.n_vocab,
                           m.n_vocab, i + k == n - 1 ? -1 : tokens[i + k + 1]);
    }
    exact = exp(exact / (n - 1));
    if (o.json) {
        printf("{\"name\": ");
        print_json_string(m.name);
        printf(", \"tokens\": %d, \"exact_perplexity\": %.9g", n, exact);
    } else
        printf("%s, %d tokens: fast mode's logits against exact mode's, whose perplexity is %.5g\n"
               "%36s %9s %12s %12s %12s %9s\n", m.name, n, exact, "cosine, mean", "least", "difference", "same token",
               "perplexity", "ratio");
    print_likeness(&prompt, n, 0, exact);
    print_likeness(&steps, n, 1, exact);
    if (o.json) puts("}");
    astrovl_session_free(fast);
    astrovl_session_free(reference);
    free(ours);
    free(theirs);
    free(tokens);
    free(text);
}

// ---- guided decoding -----------------------------------------------------------------------------------------------

// Milliseconds a token of one answer
static double measure_answer(astrovl_session *s, astrovl_guide *guide, int round) {
    astrovl_generation how;
    astrovl_stats stats;
    char *text;
    memset(&how, 0, sizeof how);
    how.max_tokens = o.tokens;
    how.temperature = 1;
    how.seed = (uint64_t)round;
    how.guide = guide;
    astrovl_session_reset(s);
    text = astrovl_chat(s, NULL, 0, "Summarize: we image the arcs around a cluster of galaxies and map its dark "
                        "matter.", &how, &g_err);
    if (!text) die("%s", g_err.message);
    astrovl_free(text);
    astrovl_get_stats(s, &stats);
    return stats.decode_seconds * 1e3 / (stats.n_answer_tokens > 0 ? stats.n_answer_tokens : 1);
}

// PAPERCLIP's schema against free decoding, in turns
static void bench_guided(const astrovl_model *model) {
#define LIST \
    "{\"type\": \"array\", \"items\": {\"type\": \"string\", \"maxLength\": 80}, \"minItems\": 1, \"maxItems\": 5}"
    static const char schema[] =
        "{\"type\": \"object\", \"required\": [\"objects_and_phenomena\", \"science_use_cases\"], \"properties\": {"
        "\"objects_and_phenomena\": " LIST ", \"science_use_cases\": " LIST "}}";
    astrovl_session *s = new_session(model, ASTROVL_FAST, 0);
    astrovl_guide *guide = astrovl_guide_schema(model, schema, strlen(schema), &g_err);
    double free_ms[99], guided_ms[99], ratio;
    astrovl_info m;
    if (!guide) die("%s", g_err.message);
    for (int i = 0; i < o.rounds; i++) {
        free_ms[i] = measure_answer(s, NULL, i);
        guided_ms[i] = measure_answer(s, guide, i);
    }
    ratio = median(guided_ms, o.rounds) / median(free_ms, o.rounds);
    astrovl_get_info(model, &m);
    if (o.json)
        printf("{\"vocabulary\": %d, \"free_ms\": %.9g, \"guided_ms\": %.9g, \"ratio\": %.9g}\n", m.n_vocab,
               median(free_ms, o.rounds), median(guided_ms, o.rounds), ratio);
    else
        printf("vocabulary of %d: free %.3f ms a token, guided %.3f, ratio %.3f\n", m.n_vocab,
               median(free_ms, o.rounds), median(guided_ms, o.rounds), ratio);
    astrovl_guide_free(guide);
    astrovl_session_free(s);
}

// ---- options -------------------------------------------------------------------------------------------------------

static void parse_options(int argc, char **argv, const char **words, int *n_words) {
    static const struct { const char *name; char letter; int *value, least, most; } numbers[] = {
        {"prompt", 'p', &o.prompt, 1, 1000000}, {"tokens", 'n', &o.tokens, 1, 1000000}, {"batch", 'b', &o.batch, 0, 64},
        {"rounds", 0, &o.rounds, 1, 99}, {"rows", 0, &o.rows, 1, 100000000}, {"dims", 0, &o.dims, 1, 65536},
        {"threads", 'j', &o.threads, 1, ASTROVL_MAX_THREADS}};
    int k;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = argv[i + 1];
        if (*name != '-') {
            if (*n_words == 2) die("too many words; test/bench.c begins with a list of options");
            words[(*n_words)++] = name;
            continue;
        }
        if (strcmp(name, "--json") == 0) {
            o.json = 1;
            continue;
        }
        if (!value) die("%s wants a value, or is unknown; test/bench.c begins with a list of options", name);
        i++;
        if (strcmp(name, "-m") == 0 || strcmp(name, "--model") == 0) {
            if (o.n_models == 14) die("too many files");
            o.models[o.n_models++] = value;
        } else if (strcmp(name, "--synthetic") == 0) o.synthetic = value;
        else if (strcmp(name, "--dir") == 0) o.dir = value;
        else {
            for (k = 0; k < 7; k++) {
                if (begins(name, "--") && strcmp(name + 2, numbers[k].name) == 0) break;
                if (numbers[k].letter && name[1] == numbers[k].letter && !name[2]) break;
            }
            if (k == 7) die("there is no option %s; test/bench.c begins with a list of options", name);
            *numbers[k].value = atoi(value);
            if (*numbers[k].value < numbers[k].least || *numbers[k].value > numbers[k].most)
                die("--%s wants a number from %d to %d, not %s", numbers[k].name, numbers[k].least, numbers[k].most,
                    value);
        }
    }
}

int main(int argc, char **argv) {
    static char shipped[4096];
    const char *words[2] = {"", ""};
    int n_words = 0, n, is_search, is_accuracy, is_guided;
    parse_options(argc, argv, words, &n_words);
    is_search = strcmp(words[0], "search") == 0;
    is_accuracy = strcmp(words[0], "accuracy") == 0;
    is_guided = strcmp(words[0], "guided") == 0;
    if (n_words != is_search + 2 * is_accuracy + is_guided)
        die("wanted: bench, bench search, bench accuracy TEXTFILE, or bench guided");
    if (!o.rounds) o.rounds = is_search || is_guided ? 9 : 3;
    if (!o.tokens) o.tokens = is_accuracy ? 512 : is_guided ? 100 : 32;
    if (is_search) {
        bench_search();
        return 0;
    }
    if (o.synthetic && o.n_models) die("one of --model and --synthetic");
    if (o.synthetic) use_synthetic();
    if (!o.n_models) {                                     // the shipped model lies beside this program
        for (n = (int)strlen(argv[0]); n > 0 && argv[0][n - 1] != '/' && argv[0][n - 1] != '\\'; n--) {}
        snprintf(shipped, sizeof shipped, "%.*sastrovl-tiny.gguf", n, argv[0]);
        o.models[o.n_models++] = shipped;
    }
    astrovl_model *model = astrovl_open_files(o.models, o.n_models, NULL, &g_err);
    if (!model) die("%s", g_err.message);
    if (is_accuracy) bench_accuracy(model, words[1]);
    else if (is_guided) bench_guided(model);
    else bench_model(model);
    astrovl_close(model);
    return 0;
}
