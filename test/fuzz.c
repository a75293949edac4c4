// fuzz.c: what strangers may hand to astrovl, for clang's libFuzzer. One program has all targets; the environment says which:
//
//     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DASTROVL_NO_SIMD -o test/fuzz test/fuzz.c -lm
//     FUZZ=gguf test/fuzz CORPUS/            (or: make fuzz SECONDS=60, which seeds and runs each target in turn)
//
// FUZZ: gguf (a file and a whole model from memory, and an answer if it runs), image, text (a vocabulary file, a zero byte in
// its last kilobyte, then a text), schema, regex, json (lines of evaluate), index (search's file), blocks (a type, then blocks).
#include <setjmp.h>
#include <stdlib.h>

// The program ends with exit() where nothing can go on. Here that ends the run of one input.
static jmp_buf fuzz_end;
__attribute__((noreturn)) static void fuzz_exit(int status) { longjmp(fuzz_end, status + 1); }
#define exit  fuzz_exit
#define main  astrovl_main
#include "../demo.c"
#undef main
#undef exit

static astrovl_model *shipped;

static void fuzz_gguf(const unsigned char *data, size_t size) {
    astrovl_error err;
    astrovl_memory block = {data, size};
    astrovl_model *model = astrovl_open_memory(&block, 1, NULL, &err);
    astrovl_gguf *file = astrovl_gguf_open_memory(data, size, "fuzz", &err);
    for (int i = 0; file && i < astrovl_gguf_n_kv(file); i++)
        if (astrovl_gguf_kv(file, i)->count) astrovl_gguf_int(file, i, 0);
    astrovl_gguf_close(file);
    if (!model) return;
    astrovl_info info;
    astrovl_generation how;
    unsigned char gray[3 * 16 * 16];
    memset(gray, 128, sizeof gray);
    memset(&how, 0, sizeof how);
    how.max_tokens = 2;
    astrovl_get_info(model, &info);
    if (info.has_text && info.n_embd <= 256 && info.n_layer <= 4 && info.n_ctx_train <= 4096) {
        astrovl_image image = {16, 16, gray, 0};
        const int sees = info.has_vision && info.has_projector && info.image_size <= 64;
        astrovl_free(astrovl_ask(model, sees ? &image : NULL, "What is this?", &how, &err));
    }
    astrovl_close(model);
}

static void fuzz_image(const unsigned char *data, size_t size) {
    astrovl_image_options options;
    astrovl_image image;
    astrovl_error err;
    memset(&options, 0, sizeof options);
    options.max_pixels = 1 << 20;
    if (astrovl_image_decode(data, size, &options, &image, &err) == ASTROVL_OK) astrovl_image_free(&image);
}

static void fuzz_text(const unsigned char *data, size_t size) {
    const unsigned char *cut = NULL;
    for (size_t i = size > 1024 ? size - 1024 : 0; i < size && !cut; i++) cut = data[i] == 0 ? data + i : NULL;
    const char *text = (const char *)(cut ? cut + 1 : data + size);
    const size_t n = (size_t)((const char *)data + size - text);
    astrovl_error err;
    astrovl_memory block = {data, cut ? (size_t)(cut - data) : size};
    astrovl_model *model = astrovl_open_memory(&block, 1, NULL, &err);
    const astrovl_model *models[2] = {shipped, model};
    for (int m = 0; m < 2; m++) {
        static int32_t ids[4096];
        if (!models[m]) continue;
        const int got = astrovl_tokenize(models[m], text, n, 0, ids, 4096, &err);
        if (got > 0) astrovl_free(astrovl_detokenize(models[m], ids, got < 4096 ? got : 4096, &err));
        astrovl_clip_tokenize(models[m], text, n, ids, 4096, &err);
    }
    astrovl_close(model);
}

// A guide that is built must reach an end by its own masks.
static void follow_guide(astrovl_guide *guide) {
    astrovl_info info;
    astrovl_error err;
    if (!guide) return;
    astrovl_get_info(shipped, &info);
    float *logits = (float *)calloc((size_t)info.n_vocab, sizeof *logits);
    int state = 0;
    for (int left = 24; left > 0 && astrovl_guide_mask(guide, state, left, logits, &err) == ASTROVL_OK; left--) {
        int token = 0;
        while (token < info.n_vocab && logits[token] < 0) token++;         // the first that may follow
        if (token == info.n_vocab || (state = astrovl_guide_next(guide, state, token)) < 0) break;
        memset(logits, 0, (size_t)info.n_vocab * sizeof *logits);
    }
    free(logits);
    astrovl_guide_free(guide);
}

static void fuzz_schema(const unsigned char *data, size_t size) {
    astrovl_error err;
    follow_guide(astrovl_guide_schema(shipped, (const char *)data, size, &err));
}

static void fuzz_regex(const unsigned char *data, size_t size) {
    astrovl_error err;
    char *pattern = (char *)calloc(1, size + 1);
    if (size) memcpy(pattern, data, size);
    follow_guide(astrovl_guide_regex(shipped, pattern, &err));
    free(pattern);
}

static program *p;

static void fuzz_json(const unsigned char *data, size_t size) {
    const char *path = getenv("FUZZ_FILE");
    FILE *f = fopen(path ? path : "/tmp/astrovl-fuzz.jsonl", "wb");
    int n = 0;
    if (!f) return;
    fwrite(data, 1, size, f);
    fclose(f);
    read_samples(p, path ? path : "/tmp/astrovl-fuzz.jsonl", 1, &n);
}

static image_index ix;                     // outside: fuzz_exit must not lose what it holds

static void fuzz_index(const unsigned char *data, size_t size) {
    static image_index made;               // with the shipped model's header
    if (!made.path) {
        p->model = shipped;
        astrovl_get_info(shipped, &p->info);
        made = *new_index(p, "fuzz");
        made.keep_rows = 1;
    }
    ix = made;
    ix.file = size ? fmemopen((void *)data, size, "rb") : NULL;
    if (ix.file && read_index_header(&ix) == INDEX_HEADER) read_records(p, &ix);
}

static void fuzz_blocks(const unsigned char *data, size_t size) {
    static float values[1 << 16];
    if (!size) return;
    for (int64_t n = 1 << 16; n > 0; n /= 2) {
        const size_t wanted = astrovl_type_row_bytes(data[0] % 40, n);
        if (wanted && wanted <= size - 1) astrovl_dequantize(data[0] % 40, data + 1, values, n);
    }
}

static const struct { const char *name; void (*run)(const unsigned char *, size_t); } targets[] = {
    {"gguf", fuzz_gguf}, {"image", fuzz_image}, {"text", fuzz_text}, {"schema", fuzz_schema}, {"regex", fuzz_regex},
    {"json", fuzz_json}, {"index", fuzz_index}, {"blocks", fuzz_blocks}};

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static void (*run)(const unsigned char *, size_t);
    astrovl_error err;
    if (!run) {
        const char *wanted = getenv("FUZZ");
        for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
            if (wanted && strcmp(wanted, targets[i].name) == 0) run = targets[i].run;
        if (!run) fputs("FUZZ must name a target: gguf image text schema regex json index blocks\n", stderr), abort();
        shipped = astrovl_open("test/astrovl-tiny.gguf", NULL, &err);
        if (!shipped) fprintf(stderr, "%s (run it from the project's root)\n", err.message), abort();
        p = (program *)calloc(1, sizeof *p);
    }
    if (!setjmp(fuzz_end)) run(data, size);
    if (ix.file) fclose(ix.file);
    free(ix.rows);
    memset(&ix, 0, sizeof ix);
    for (block *next, *b = p->memory; b; b = next) {
        next = b->next;
        free(b);
    }
    p->memory = NULL;
    return 0;
}
