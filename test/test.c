// Every C test of astrovl, one program. `./test` runs all; `./test NAME...` those whose name contains one of the words.
// Run from the repository's root: data lies in test/. It ends with a line "N passed, N failed".
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- an allocator that counts, and that fails when told to ----------------------------------------------------------

static long g_live;            // blocks allocated and not yet freed
static long g_calls;           // allocations asked for since alloc_fail_at was called
static long g_fail_at = -1;    // the call that fails (and all after it); -1: none
static size_t g_bytes, g_measure;   // g_measure 1: g_bytes adds up what is asked for (in tests of one thread)

static int alloc_refused(void) { return g_fail_at >= 0 && g_calls++ >= g_fail_at; }
static void *test_malloc(size_t size) {
    void *p = alloc_refused() ? NULL : malloc(size);
    if (g_measure) g_bytes += size;
    if (p) __sync_fetch_and_add(&g_live, 1);
    return p;
}
static void *test_realloc(void *old, size_t size) {
    void *p = alloc_refused() ? NULL : realloc(old, size);
    if (p && !old) __sync_fetch_and_add(&g_live, 1);
    return p;
}
static void test_free(void *p) {
    if (p) __sync_fetch_and_sub(&g_live, 1);
    free(p);
}
static void alloc_fail_at(long call) { g_calls = 0; g_fail_at = call; }   // -1: back to normal
static int alloc_did_fail(void) { return g_fail_at >= 0 && g_calls > g_fail_at; }

// EACH_ALLOCATION(at, failed, expression) { checks }
// Evaluates the expression again and again: its first allocation fails (and all after it), then from the second on, and so on
// until none fails. The checks run after each time: `failed` says whether one failed, `at` which. Afterwards at - 1 is the
// number of allocations. at: a long; failed: an int.
#define EACH_ALLOCATION(at, failed, ...) \
    for ((at) = 0, (failed) = 1; (failed) && \
         (alloc_fail_at(at), (void)(__VA_ARGS__), (failed) = alloc_did_fail(), alloc_fail_at(-1), 1); (at)++)

#define ASTROVL_MALLOC(size)          test_malloc(size)
#define ASTROVL_REALLOC(memory, size) test_realloc(memory, size)
#define ASTROVL_FREE(memory)          test_free(memory)
#define ASTROVL_IMPLEMENTATION
#include "../astrovl.h"

// ---- checks -----------------------------------------------------------------------------------------------------------

static int g_passed, g_failed, g_test_failed;

// One expectation; a failing one prints where and why, and the test that holds it counts as failed.
#define CHECK(condition, ...) do { if (!(condition)) { g_test_failed = 1; \
    fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); } } while (0)

static int g_n_words;
static char **g_words;

// Runs one named test, and checks that it gave back all memory.
static void run(const char *name, void (*test)(void)) {
    long live = g_live;
    clock_t start = clock();
    int i, wanted = g_n_words == 0;
    for (i = 0; i < g_n_words; i++) wanted |= strstr(name, g_words[i]) != NULL;
    if (!wanted) return;
    g_test_failed = 0;
    test();
    CHECK(g_live == live, "%s leaks %ld blocks", name, g_live - live);
    printf("%s  %s (%.1f s)\n", g_test_failed ? "FAILED" : "ok    ", name, (double)(clock() - start) / CLOCKS_PER_SEC);
    fflush(stdout);
    if (g_test_failed) g_failed++; else g_passed++;
}

// A whole file of test data; exits when it is missing, since then no test means anything.
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    long n;
    if (!f || fseek(f, 0, SEEK_END) != 0 || (n = ftell(f)) < 0) { fprintf(stderr, "%s: cannot be read\n", path); exit(1); }
    rewind(f);
    unsigned char *data = (unsigned char *)malloc((size_t)n + 1);
    if (!data || fread(data, 1, (size_t)n, f) != (size_t)n) { fprintf(stderr, "%s: cannot be read\n", path); exit(1); }
    data[n] = 0;
    fclose(f);
    *size = (size_t)n;
    return data;
}

// ---- random damage ----------------------------------------------------------------------------------------------------

// A number below n; the same ones everywhere (Knuth's MMIX generator).
static size_t random_below(uint64_t *seed, size_t n) {
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return (size_t)(*seed >> 33) % n;
}

// Damages 1 to 4 places of bytes[from] to bytes[to - 1]: another byte, one bit, or 8 bytes of a number that makes a bad size.
static void mutate(unsigned char *bytes, size_t from, size_t to, uint64_t *seed) {
    static const uint64_t bad[] = {0, 1, 8, 9, 31, 32, 255, 65536, 0x7FFFFFFF, 0xFFFFFFFF, 0x100000000ull,
                                   0x7FFFFFFFFFFFFFFFull, 0x8000000000000000ull, 0xFFFFFFFFFFFFFFFFull};
    size_t n = 1 + random_below(seed, 4), k;
    for (; n > 0; n--) {
        size_t at = from + random_below(seed, to - from), kind = random_below(seed, 4);
        uint64_t number = bad[random_below(seed, sizeof bad / sizeof *bad)];
        if (kind == 0) bytes[at] = (unsigned char)random_below(seed, 256);
        else if (kind == 1) bytes[at] = (unsigned char)(bytes[at] ^ 1u << random_below(seed, 8));
        else for (k = 0; k < 8 && at + k < to; k++) bytes[at + k] = (unsigned char)(number >> 8 * k);
    }
}

// ---- [3] numbers ----------------------------------------------------------------------------------------------------
#include <fenv.h>
#include <math.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if !defined(FE_UPWARD)                                        // WebAssembly rounds to nearest only
#define FE_UPWARD     FE_TONEAREST
#define FE_DOWNWARD   FE_TONEAREST
#define FE_TOWARDZERO FE_TONEAREST
#endif

// ---- half precision: every value, and every place where rounding changes its mind -----------------------------------

// The definition, by ldexp: (-1)^s 2^(e - 15) (1 + m / 1024), or 2^-24 m for e = 0.
static double numbers_slow_f16(int h) {
    int e = h >> 10 & 31, m = h & 1023;
    double magnitude = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? ldexp(m, -24) : ldexp(1024 + m, e - 25);
    return h >> 15 ? -magnitude : magnitude;
}

static void test_f16(void) {
    int h, sign, bad = 0;
    for (h = 0; h < 65536; h++) {
        double expected = numbers_slow_f16(h);
        float f = astrovl_f16_to_f32((uint16_t)h);
        if (expected != expected) {
            uint32_t bits = (uint32_t)(h & 0x8000) << 16 | 0x7F800000 | (uint32_t)(h & 1023) << 13;
            CHECK(f != f && avl__float_bits(f) == bits, "NaN %04x became %08x", h, (unsigned)avl__float_bits(f));
            CHECK(astrovl_f32_to_f16(f) == (h | 0x200), "NaN %04x came back as %04x", h, astrovl_f32_to_f16(f));
            continue;
        }
        bad += (double)f != expected || !signbit(f) != !(h >> 15) || astrovl_f32_to_f16(f) != h;
    }
    CHECK(bad == 0, "%d of 65,536 values are wrong", bad);
    // between two neighbours a < b: the middle goes to the even one, what lies beside the middle to the nearer one
    for (sign = 0; sign < 2; sign++)
        for (h = 0; h < 0x7C00; h++) {
            double a = numbers_slow_f16(h), b = h == 0x7BFF ? 65536 : numbers_slow_f16(h + 1);   // then comes infinity
            float middle = (float)((a + b) / 2), below = nextafterf(middle, 0), above = nextafterf(middle, 1e6f);
            int even = h & 1 ? h + 1 : h;
            if (sign) middle = -middle, below = -below, above = -above;
            bad += astrovl_f32_to_f16(middle) != (even | sign << 15);
            bad += astrovl_f32_to_f16(below) != (h | sign << 15);
            bad += astrovl_f32_to_f16(above) != ((h + 1) | sign << 15);
        }
    CHECK(bad == 0, "%d roundings are wrong", bad);
    CHECK(astrovl_f32_to_f16(1e30f) == 0x7C00 && astrovl_f32_to_f16(-INFINITY) == 0xFC00, "large values are not infinite");
    CHECK(astrovl_f32_to_f16(1e-30f) == 0 && astrovl_f32_to_f16(-1e-45f) == 0x8000, "small values are not zero");
}

static void test_bf16(void) {
    int h, bad = 0;
    for (h = 0; h < 65536; h++) {
        uint32_t bits = (uint32_t)h << 16;
        float f = astrovl_bf16_to_f32((uint16_t)h);
        int is_nan = f != f;
        if (avl__float_bits(f) != bits) bad++;
        if (astrovl_f32_to_bf16(f) != (is_nan ? (h | 0x40) : h)) bad++;
        if (is_nan || (h & 0x7FFF) == 0x7F80) continue;
        if (astrovl_f32_to_bf16(avl__float_from_bits(bits | 0x7FFF)) != h) bad++;
        if (astrovl_f32_to_bf16(avl__float_from_bits(bits | 0x8000)) != h + (h & 1)) bad++;
        if (astrovl_f32_to_bf16(avl__float_from_bits(bits | 0x8001)) != h + 1) bad++;
    }
    CHECK(bad == 0, "%d are wrong", bad);
    CHECK(astrovl_f32_to_bf16(avl__float_from_bits(0x7F800001)) == 0x7FC0, "a NaN of low bits became an infinity");
}

// ---- block formats --------------------------------------------------------------------------------------------------

// Equal bits, but any NaN for any NaN.
static int numbers_same(const float *a, const unsigned char *b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = avl__load_u32(b + 4 * i);
        if (avl__float_bits(a[i]) != bits && !(a[i] != a[i] && (bits & 0x7FFFFFFF) > 0x7F800000)) return 0;
    }
    return 1;
}

static void test_dequantize(void) {
    size_t size, at;
    int n_types = 0;
    unsigned char *gold = read_file("test/golden/types.gold", &size);
    for (at = 0; at + 8 <= size; n_types++) {
        int type = (int)avl__load_u32(gold + at), n = (int)avl__load_u32(gold + at + 4);
        size_t bytes = astrovl_type_row_bytes(type, n);
        float *values = (float *)malloc((size_t)n * 4);
        CHECK(astrovl_type_name(type) && bytes > 0 && at + 8 + bytes + (size_t)n * 4 <= size, "type %d", type);
        if (g_test_failed) { free(values); break; }
        memset(values, 0x55, (size_t)n * 4);
        CHECK(astrovl_dequantize(type, gold + at + 8, values, n) == ASTROVL_OK, "%s", astrovl_type_name(type));
        CHECK(numbers_same(values, gold + at + 8 + bytes, (size_t)n), "%s is not as gguf's", astrovl_type_name(type));
        memset(values, 0x55, (size_t)n * 4);
        avl__dequantize_row(type, gold + at + 8, values, n);
        CHECK(numbers_same(values, gold + at + 8 + bytes, (size_t)n), "%s by rows", astrovl_type_name(type));
        free(values);
        at += 8 + bytes + (size_t)n * 4;
    }
    CHECK(n_types == 13 && at == size, "%d types, %d of %d bytes", n_types, (int)at, (int)size);
    free(gold);
}

static void test_types(void) {
    static const struct { int type; const char *name; int values, bytes; } expected[] = {
        {0, "F32", 1, 4}, {1, "F16", 1, 2}, {2, "Q4_0", 32, 18}, {3, "Q4_1", 32, 20}, {6, "Q5_0", 32, 22},
        {7, "Q5_1", 32, 24}, {8, "Q8_0", 32, 34}, {10, "Q2_K", 256, 84}, {11, "Q3_K", 256, 110}, {12, "Q4_K", 256, 144},
        {13, "Q5_K", 256, 176}, {14, "Q6_K", 256, 210}, {30, "BF16", 1, 2}
    };
    uint8_t block[256] = {0};
    float values[256];
    int i, type, n = 0;
#if AVL__SIMD                          // section [13] has the sizes once more, as constants: of 256 values
#define TEST_FORM(name, type, bytes, ...) \
    CHECK(avl__find_type(type)->block_bytes * 256 / avl__find_type(type)->block_values == bytes, "%s", #name);
    AVL__BLOCK_TYPES(TEST_FORM)
    AVL__FLOAT_TYPES(TEST_FORM)
#endif
    for (i = 0; i < 13; i++) {
        int count = expected[i].values, bytes = expected[i].bytes;
        type = expected[i].type;
        CHECK(astrovl_type_name(type) && strcmp(astrovl_type_name(type), expected[i].name) == 0, "type %d", type);
        CHECK(astrovl_type_row_bytes(type, 3 * count) == (size_t)(3 * bytes), "type %d", type);
        CHECK(astrovl_type_row_bytes(type, count + 1) == (size_t)(count == 1 ? 2 * bytes : 0), "type %d", type);
        CHECK(astrovl_type_row_bytes(type, -count) == 0, "type %d", type);
        CHECK(astrovl_dequantize(type, block, values, count) == ASTROVL_OK && values[count - 1] == 0, "type %d", type);
        CHECK(astrovl_dequantize(type, block, values, 0) == ASTROVL_OK, "type %d", type);
        CHECK(astrovl_dequantize(type, block, values, -count) == ASTROVL_ERROR_ARGUMENT, "type %d", type);
        CHECK(astrovl_dequantize(type, NULL, values, count) == ASTROVL_ERROR_ARGUMENT, "type %d", type);
        CHECK(astrovl_dequantize(type, block, NULL, count) == ASTROVL_ERROR_ARGUMENT, "type %d", type);
        if (count == 1) continue;
        CHECK(astrovl_dequantize(type, block, values, count / 2) == ASTROVL_ERROR_ARGUMENT, "type %d", type);
    }
    for (type = -1; type < 100; type++) n += astrovl_type_name(type) != NULL;
    CHECK(n == 13, "%d types", n);
    CHECK(astrovl_type_row_bytes(4, 256) == 0, "type 4 is none");
    CHECK(astrovl_dequantize(4, block, values, 256) == ASTROVL_ERROR_ARGUMENT, "type 4 is none");
    CHECK(astrovl_type_row_bytes(0, INT64_MAX) == 0, "an overflow");
}

// ---- functions ------------------------------------------------------------------------------------------------------

// Distance of a float from the true value in units of the float's last place.
static double numbers_ulp(float result, long double truth) {
    float rounded = (float)truth;
    int e;
    if (truth != truth) return result != result ? 0 : 1e9;
    if (isinf(rounded) || isinf(result)) return result == rounded ? 0 : 1e9;
    frexpl(truth, &e);
    return (double)(fabsl((long double)result - truth) / ldexpl(1, e - 24 < -149 ? -149 : e - 24));
}

typedef struct numbers_function {
    const char *name;
    float (*f)(float);
    long double (*truth)(long double);
    int odd;                     // f(-x) = -f(x): 1, f(x): 2, neither: 0
    double max_ulp;
    float limit;                 // NaN for x of this magnitude and above
    uint64_t hash;               // of all results of the sweep
} numbers_function;

static void test_functions(void) {
    static const numbers_function functions[] = {
        {"expf", astrovl_expf, expl, 0, 0.5001, INFINITY, 0x4116b48121d8aec6ull},
        {"tanhf", astrovl_tanhf, tanhl, 1, 0.5001, INFINITY, 0xb02675594ee5efa2ull},
        {"erff", astrovl_erff, erfl, 1, 0.501, INFINITY, 0xa15f8c729d6e296dull},
        {"sin", avl__sin, sinl, 1, 0.5001, 8388608.0f, 0xf1c92acf7cffe2a5ull},
        {"cos", avl__cos, cosl, 2, 0.5001, 8388608.0f, 0x0370929586fd9ea1ull}
    };
    for (int i = 0; i < 5; i++) {
        const numbers_function *t = &functions[i];
        uint64_t b, hash = 14695981039346656037ull;
        double worst = 0;
        float worst_x = 0;
        int asymmetric = 0;
        for (b = 0; b < 0x100000000ull; b += 20011) {   // all exponents and signs, 214,000 values
            float x = avl__float_from_bits((uint32_t)b), y = t->f(x);
            if (x != x || (fabsf(x) >= t->limit && t->limit < INFINITY)) {
                CHECK(y != y, "%s(%g) is %g", t->name, x, y);
                continue;
            }
            double error = numbers_ulp(y, t->truth(x));
            if (error > worst) worst = error, worst_x = x;
            if (t->odd) asymmetric += t->f(-x) != (t->odd == 1 ? -y : y);
            hash = (hash ^ avl__float_bits(y)) * 1099511628211ull;
        }
        CHECK(worst <= t->max_ulp, "%s is %.4f ulp off at %a", t->name, worst, worst_x);
        CHECK(asymmetric == 0, "%s: %d signs", t->name, asymmetric);
        CHECK(hash == t->hash, "%s: the bits have changed: 0x%016llx", t->name, (unsigned long long)hash);
    }
}

static void test_function_values(void) {
    static const struct { float (*f)(float); float x, y; } values[] = {
        {astrovl_expf, 0, 1}, {astrovl_expf, -0.0f, 1},
        {astrovl_expf, INFINITY, INFINITY}, {astrovl_expf, -INFINITY, 0},
        {astrovl_expf, 88.72283935546875f, INFINITY}, {astrovl_expf, 1e30f, INFINITY}, {astrovl_expf, -1e30f, 0},
        {astrovl_expf, -103.972084045410f, 0}, {astrovl_expf, -103.972076416016f, 1.40129846e-45f},
        {astrovl_expf, -87.5f, 9.98235137e-39f}, {astrovl_expf, 1, 2.71828182846f},
        {astrovl_tanhf, INFINITY, 1}, {astrovl_tanhf, -INFINITY, -1}, {astrovl_tanhf, 1e-40f, 1e-40f},
        {astrovl_tanhf, 20, 1}, {astrovl_erff, INFINITY, 1}, {astrovl_erff, -INFINITY, -1}, {astrovl_erff, -4.5f, -1},
        {astrovl_erff, 0.5f, 0.520499877813f}, {avl__sin, 3.14159274f, -8.74227766e-8f},
        {avl__cos, 1.57079637f, -4.37113883e-8f}, {avl__cos, 0, 1}
    };
    // floats very close to a multiple of pi/2, and the largest below 2^23
    static const float hard[] = {252.898209f, 4.71238899f, 8388607.5f, -8388607.5f};
    float largest = astrovl_expf(88.722831726074f);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        float y = values[i].f(values[i].x);
        CHECK(y == values[i].y, "case %d: %.9g instead of %.9g", (int)i, y, values[i].y);
    }
    CHECK(largest > 3.4e38f && largest <= FLT_MAX, "expf(88.72283) is %g", largest);
    CHECK(avl__float_bits(avl__sin(-0.0f)) == 0x80000000 && avl__float_bits(astrovl_tanhf(-0.0f)) == 0x80000000
          && avl__float_bits(astrovl_erff(-0.0f)) == 0x80000000, "the sign of zero is lost");
    CHECK(isnan(avl__sin(INFINITY)) && isnan(avl__cos(-INFINITY)) && isnan(avl__sin(8388608.0f)), "too large an angle");
    for (size_t i = 0; i < sizeof hard / sizeof *hard; i++) {
        CHECK(numbers_ulp(avl__sin(hard[i]), sinl((long double)hard[i])) < 0.5001, "sin(%a)", hard[i]);
        CHECK(numbers_ulp(avl__cos(hard[i]), cosl((long double)hard[i])) < 0.5001, "cos(%a)", hard[i]);
    }
}

// A generator for test data: xorshift64*, 53 bits in [0, 1).
static double numbers_random(uint64_t *state) {
    *state ^= *state >> 12; *state ^= *state << 25; *state ^= *state >> 27;
    return (double)(*state * 2685821657736338717ull >> 11) / 9007199254740992.0;
}

static double numbers_relative(double result, long double truth) {
    return (double)fabsl(((long double)result - truth) / truth);
}

static void test_double_functions(void) {
    uint64_t state = 1, hash = 14695981039346656037ull;
    double worst_exp = 0, worst_log = 0, e;
    int n_wrong = 0;
    for (int i = 0; i < 100000; i++) {
        double x = (numbers_random(&state) - 0.5) * 1410, near_one = 1 + ldexp(x, -20);
        double any = ldexp(1 + numbers_random(&state), i % 2000 - 1000);
        double results[3];
        results[0] = avl__exp(x);
        results[1] = avl__log(any);
        results[2] = avl__log(near_one);
        if ((e = numbers_relative(results[0], expl(x))) > worst_exp) worst_exp = e;
        if ((e = numbers_relative(results[1], logl(any))) > worst_log) worst_log = e;
        if ((e = numbers_relative(results[2], logl(near_one))) > worst_log) worst_log = e;
        for (int k = 0; k < 3; k++) hash = (hash ^ avl__double_bits(results[k])) * 1099511628211ull;
    }
    for (int i = 0; i < 100000; i++) {   // theta^(-2i/d), the nearest float
        float theta = i % 5 ? (float)ldexp(1 + numbers_random(&state), i % 24) : i % 2 ? 10000 : 500000, inv_freq[64];
        avl__rope_frequencies(inv_freq, 128, theta, NULL, 1);
        n_wrong += inv_freq[i % 64] != (float)powl(theta, -(i % 64) / 64.0L);
    }
    CHECK(worst_exp < 3e-16, "exp: %g", worst_exp);
    CHECK(worst_log < 5e-16, "log: %g", worst_log);
    CHECK(n_wrong == 0, "RoPE: %d frequencies are not the nearest float", n_wrong);
    CHECK(hash == 0x553ab85d9e6ba7a9ull, "the bits have changed: 0x%016llx", (unsigned long long)hash);
    CHECK(avl__exp(0) == 1 && avl__log(1) == 0 && avl__log(2) == 0.6931471805599453094172, "exp, log");
}

// The result is the float whose square, half a unit less and more, encloses x: products of 25 bits are exact in double.
static void test_sqrt(void) {
    int bad = 0;
    for (uint32_t b = 1; b < 0x7F800000; b += 200003) {
        float x = avl__float_from_bits(b), y = (float)avl__sqrt((double)x);
        double low = ((double)y + nextafterf(y, 0)) / 2, high = ((double)y + nextafterf(y, 1e30f)) / 2;
        bad += !(low * low <= x && x <= high * high);
    }
    CHECK(bad == 0, "%d square roots are not the nearest float", bad);
    CHECK(avl__sqrt(0) == 0 && avl__sqrt(2) == 1.4142135623730951, "sqrt");
}

static void tests_numbers(void) {
    run("numbers: f16 exhaustively", test_f16);
    run("numbers: bf16 exhaustively", test_bf16);
    run("numbers: dequantisation equals the gguf package", test_dequantize);
    run("numbers: tensor types", test_types);
    run("numbers: exp, tanh, erf, sin, cos to 0.5 ulp", test_functions);
    run("numbers: special values", test_function_values);
    run("numbers: exp and log in double, and the frequencies of RoPE", test_double_functions);
    run("numbers: square root", test_sqrt);
}


// ====================================================================================================================
// Platform, kernels and ops: against straightforward double arithmetic with libm
// ====================================================================================================================
#include <math.h>

// Reproducible values in -1..1 for inputs.
static float test_value(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)((double)(*state >> 8) / 8388608.0 - 1.0);
}

static void test_fill(float *x, int n, uint32_t seed) {
    for (int i = 0; i < n; i++) x[i] = test_value(&seed);
}

static double test_max_difference(const float *a, const double *b, int n) {
    double worst = 0.0;
    for (int i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

static void test_messages(void) {
    char text[64];
    astrovl_string s = {"ab\xE2\x98", 4};   // a character that is not whole
    CHECK(avl__format(text, sizeof text, "%s|%lld|%.*s|%%", "x", -5ll, AVL__SHOW(s)) == 9 && strcmp(text, "x|-5|ab|%") == 0,
          "%s", text);
    avl__format(text, 8, "%s", "12345678901234567890");
    CHECK(strcmp(text, "1234567") == 0, "%s", text);
    avl__format(text, 6, "%s", "abc\xE2\x98\x86z");   // the star would be cut in half
    CHECK(strcmp(text, "abc") == 0, "%s", text);
    avl__format(text, 7, "%s", "abc\xE2\x98\x86z");
    CHECK(strcmp(text, "abc\xE2\x98\x86") == 0, "%s", text);
    avl__format(text, sizeof text, "%s", "a\033[2Jb");
    CHECK(strcmp(text, "a?[2Jb") == 0, "control characters must not reach a terminal: %s", text);
    avl__format(text, sizeof text, "%s", "\xC2\x9B\xC2\xA0");            // U+009B begins a command as well, U+00A0 does not
    CHECK(strcmp(text, "\xC2\xBF\xC2\xA0") == 0, "control characters must not reach a terminal: %s", text);
    CHECK(avl__format(text, 3, "%s", "\xF0\x9F\x98\x80") == 0 && !*text, "%s", text);
}

// A path of any length leaves room for what is wrong with it.
static void test_long_messages(void) {
    static char path[4300];
    astrovl_error err;
    for (size_t n = 300; n < sizeof path - 1; n += 7) {
        for (size_t i = 0; i < n; i++) path[i] = "/\xE2\x98\x86"[i % 4];
        path[n] = 0;
        CHECK(avl__fail(&err, ASTROVL_ERROR_FILE, "begin %s: the reason", path) == ASTROVL_ERROR_FILE, "status");
        const size_t size = strlen(err.message);
        if (n > sizeof path - 200) continue;     // what no system allows as a path
        CHECK(size > 16 && strcmp(err.message + size - 12, ": the reason") == 0, "%zu bytes: %s", n, err.message);
        CHECK(memcmp(err.message, "begin /", 7) == 0 && avl__utf8_whole(err.message, size) == size, "%zu bytes: %s", n, err.message);
        for (size_t i = 6; i < size - 12; i++)
            if (err.message[i] != path[(i - 6) % 4]) {       // whole characters, then the dots, then whole characters
                CHECK(memcmp(err.message + i, "...", 3) == 0 && ((unsigned char)err.message[i + 3] & 0xC0) != 0x80, "%s", err.message);
                break;
            }
    }
    path[4200] = 0;
    CHECK(!astrovl_gguf_open(path, 0, &err) && strstr(err.message, "cannot be opened"), "%s", err.message);
    static char too_long[20000];             // no system allows it, and the reason must be said all the more
    memset(too_long, 'x', sizeof too_long - 1);
    CHECK(!astrovl_open(too_long, NULL, &err) && strstr(err.message, "xxx: cannot be opened (no such file"), "%s", err.message);
}

static void test_growing(void) {
    int *list = NULL;
    size_t capacity = 0;
    CHECK(avl__grow(&list, &capacity, 100, sizeof *list) && capacity >= 100, "capacity %zu", capacity);
    CHECK(!avl__grow(&list, &capacity, SIZE_MAX / 2, sizeof *list) && capacity >= 100, "an impossible size must be refused");
    astrovl_free(list);
    CHECK(avl__alloc(UINT64_MAX / 2, 8) == NULL, "an overflowing product must be refused");
}

static void test_norms(void) {
    enum { N = 101 };
    float x[N], w[N], b[N], y[N];
    double e[N], mean = 0.0, var = 0.0, squares = 0.0;
    test_fill(x, N, 1), test_fill(w, N, 2), test_fill(b, N, 3);
    for (int i = 0; i < N; i++) mean += x[i], squares += (double)x[i] * x[i];
    mean /= (double)N;
    for (int i = 0; i < N; i++) var += (x[i] - mean) * (x[i] - mean);
    for (int i = 0; i < N; i++) e[i] = (x[i] - mean) / sqrt(var / (double)N + 1e-5) * w[i] + b[i];
    astrovl_layer_norm(y, x, w, b, N, 1e-5f);
    CHECK(test_max_difference(y, e, N) < 1e-6, "layer norm is off by %g", test_max_difference(y, e, N));
    for (int i = 0; i < N; i++) e[i] = x[i] / sqrt(squares / (double)N + 1e-6) * w[i];
    astrovl_rms_norm(y, x, w, N, 1e-6f);
    CHECK(test_max_difference(y, e, N) < 1e-6, "RMS norm is off by %g", test_max_difference(y, e, N));
    astrovl_rms_norm(x, x, w, N, 1e-6f);
    CHECK(memcmp(x, y, sizeof x) == 0, "in place must equal out of place");
}

static void test_activations(void) {
    enum { N = 400 };
    float x[N], y[N];
    double e[N], sum = 0.0;
    for (int i = 0; i < N; i++) x[i] = (float)(i - 200) * 0.1f;
    memcpy(y, x, sizeof x), astrovl_gelu(y, N);
    for (int i = 0; i < N; i++) e[i] = 0.5 * x[i] * (1.0 + erf(x[i] / sqrt(2.0)));
    CHECK(test_max_difference(y, e, N) < 2e-6, "GELU is off by %g", test_max_difference(y, e, N));
    memcpy(y, x, sizeof x), astrovl_quick_gelu(y, N);
    for (int i = 0; i < N; i++) e[i] = x[i] / (1.0 + exp(-1.702 * x[i]));
    CHECK(test_max_difference(y, e, N) < 2e-6, "quick-GELU is off by %g", test_max_difference(y, e, N));
    memcpy(y, x, sizeof x), astrovl_silu(y, N);
    for (int i = 0; i < N; i++) e[i] = x[i] / (1.0 + exp(-x[i]));
    CHECK(test_max_difference(y, e, N) < 2e-6, "SiLU is off by %g", test_max_difference(y, e, N));
    memcpy(y, x, sizeof x), astrovl_softmax(y, N);
    for (int i = 0; i < N; i++) sum += e[i] = exp(x[i] - (double)x[N - 1]);
    for (int i = 0; i < N; i++) e[i] /= sum;
    CHECK(test_max_difference(y, e, N) < 1e-7, "softmax is off by %g", test_max_difference(y, e, N));
    x[0] = 1000.0f, astrovl_softmax(x, 2);
    CHECK(x[0] == 1.0f && x[1] == 0.0f, "softmax must not overflow: %g %g", x[0], x[1]);
}

// The rotation itself, and what it is for: the product of two rotated vectors depends on the distance of their places.
static void test_rope(void) {
    float inv_freq[4], a[8], b[8], a2[8], b2[8];
    double e[8], near = 0.0, far = 0.0;
    avl__rope_frequencies(inv_freq, 8, 10000.0f, NULL, 1.0f);
    for (int i = 0; i < 4; i++) {
        double f = pow(10000.0, -2.0 * i / 8);
        CHECK(fabs(inv_freq[i] - f) <= 1e-7 * f, "inv_freq[%d] = %g", i, inv_freq[i]);
    }
    test_fill(a, 8, 4), test_fill(b, 8, 5);
    for (int i = 0; i < 4; i++) {
        double t = 7.0 * inv_freq[i];
        e[2 * i] = a[2 * i] * cos(t) - a[2 * i + 1] * sin(t);
        e[2 * i + 1] = a[2 * i] * sin(t) + a[2 * i + 1] * cos(t);
    }
    memcpy(a2, a, sizeof a), memcpy(b2, b, sizeof b);
    astrovl_rope(a, 8, 7, inv_freq);
    CHECK(test_max_difference(a, e, 8) < 1e-6, "rotation is off by %g", test_max_difference(a, e, 8));
    astrovl_rope(b, 8, 3, inv_freq), astrovl_rope(a2, 8, 1007, inv_freq), astrovl_rope(b2, 8, 1003, inv_freq);
    for (int i = 0; i < 8; i++) near += (double)a[i] * b[i], far += (double)a2[i] * b2[i];
    CHECK(fabs(near - far) < 1e-4, "q.k at distance 4: %g near the start, %g far from it", near, far);
}

// The order of exact mode's sum, as its comment states it.
static void test_dot_order(void) {
    enum { N = 16 * 5 + 7 };
    float a[N], b[N], lane[16] = {0};
    volatile float product;
    test_fill(a, N, 6), test_fill(b, N, 7);
    for (int i = 0; i < N; i++) {
        product = a[i] * b[i];
        lane[i % 16] += product;
    }
    for (int half = 8; half; half /= 2) for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    CHECK(avl__dot_portable(a, b, N) == lane[0], "%.9g is not %.9g", avl__dot_portable(a, b, N), lane[0]);
}

// What a session has, for operations without one; avl__run_free ends it.
static void test_run_start(avl__run *run, const avl__kernels *kernels, int n_threads) {
    memset(run, 0, sizeof *run);
    run->kernels = kernels;
    run->pool = avl__pool_new(n_threads);
    CHECK(run->pool, "no threads");
}

// Products with every stored type equal those with the same weights expanded, whatever the number of threads and rows.
static void test_products(void) {
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14};
    enum { N_IN = 512, N_OUT = 70, N_ROWS = 5 };
    static float x[N_ROWS * N_IN], y[N_ROWS * N_OUT], y1[N_ROWS * N_OUT], expanded[N_OUT * N_IN], bias[N_OUT], direct[N_ROWS * N_OUT];
    test_fill(x, N_ROWS * N_IN, 8), test_fill(bias, N_OUT, 9);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        size_t row = astrovl_type_row_bytes(types[t], N_IN), i;
        uint8_t *blocks = (uint8_t *)malloc(row * N_OUT);
        avl__run run;
        avl__linear w;
        uint32_t seed = (uint32_t)(100 + t);
        for (i = 0; i < row * N_OUT; i++) {
            seed = seed * 1664525u + 1013904223u;
            blocks[i] = (uint8_t)((seed >> 24) & 0x3B);   // no float16, bfloat16 or float32 made of such bytes is huge or NaN
        }
        CHECK(astrovl_dequantize(types[t], blocks, expanded, (int64_t)N_IN * N_OUT) == ASTROVL_OK, "type %d", types[t]);
        astrovl_linear(direct, x, expanded, bias, N_ROWS, N_IN, N_OUT);
        memset(&w, 0, sizeof w);
        w.weight = blocks, w.bias = bias, w.type = types[t], w.n_in = N_IN, w.n_out = N_OUT, w.row_bytes = row;
        for (int threads = 1; threads <= 8; threads++) {
            test_run_start(&run, avl__choose_kernels(ASTROVL_EXACT, NULL), threads);
            memset(y, 0xFF, sizeof y);   // NaN: every value must be written
            avl__apply(&run, y, x, &w, N_ROWS);
            avl__apply(&run, y1, x + 2 * N_IN, &w, 1);
            CHECK(memcmp(y, direct, sizeof y) == 0, "%s with %d threads", astrovl_type_name(types[t]), threads);
            CHECK(memcmp(y1, direct + 2 * N_OUT, N_OUT * sizeof *y1) == 0, "%s: one row differs from many", astrovl_type_name(types[t]));
            avl__run_free(&run);
        }
        free(blocks);
    }
}

// The same attention with keys and values in float16, a head's keys in a row, as the KV cache has them.
static void test_attention_of_halves(const avl__attention *floats, int n_keys) {
    const int d = floats->head_dim, n_kv = floats->n_head_kv, n = floats->n_rows * floats->n_head * d;
    const float *k = (const float *)floats->k, *v = (const float *)floats->v;
    uint16_t *halves = (uint16_t *)malloc((size_t)(2 * n_keys * n_kv * d) * 2);
    float *out = (float *)malloc((size_t)n * 4);
    avl__attention a = *floats;
    for (int h = 0; h < n_kv; h++)
        for (int j = 0; j < n_keys; j++)
            for (int i = 0; i < d; i++) {
                halves[(h * n_keys + j) * d + i] = astrovl_f32_to_f16(k[(j * n_kv + h) * d + i]);
                halves[((n_kv + h) * n_keys + j) * d + i] = astrovl_f32_to_f16(v[(j * n_kv + h) * d + i]);
            }
    a.k = halves, a.v = halves + n_kv * n_keys * d, a.out = out, a.is_half = 1;
    a.key_stride = (size_t)d, a.head_stride = (size_t)(n_keys * d);
    avl__attention_run(&a, 1);
    for (int i = 0; i < n; i++)
        CHECK(fabs(out[i] - floats->out[i]) < 1e-6, "%s: %d rows, float16: [%d] is %g, not %g", a.run->kernels->name, a.n_rows, i, out[i],
              floats->out[i]);
    free(halves), free(out);
}

// softmax(q k^T / sqrt(d)) v in double, causal with a past and grouped heads, and not causal; by each table of kernels. Where a table
// has an attention of its own, it does not show weights.
static void test_attention_by(const avl__kernels *kernels, int n_rows, int n_past, int n_head, int n_head_kv, int d, int causal) {
    int n_keys = n_past + n_rows, h, r, j, i;
    float *q = (float *)malloc((size_t)(n_rows * n_head * d) * 4), *k = (float *)malloc((size_t)(n_keys * n_head_kv * d) * 4);
    float *v = (float *)malloc((size_t)(n_keys * n_head_kv * d) * 4), *out = (float *)malloc((size_t)(n_rows * n_head * d) * 4);
    float *weights = (float *)malloc((size_t)(n_head * n_rows * n_keys) * 4);
    double worst = 0.0, worst_sum = 0.0;
    avl__run run;
    avl__attention a;
    memset(&a, 0, sizeof a);
    test_fill(q, n_rows * n_head * d, 11), test_fill(k, n_keys * n_head_kv * d, 12), test_fill(v, n_keys * n_head_kv * d, 13);
    test_run_start(&run, kernels, 3);
    for (i = 0; i < n_keys * n_head_kv * d; i++) {          // so that float16 holds them
        k[i] = astrovl_f16_to_f32(astrovl_f32_to_f16(k[i]));
        v[i] = astrovl_f16_to_f32(astrovl_f32_to_f16(v[i]));
    }
    a.key_stride = (size_t)(n_head_kv * d), a.head_stride = (size_t)d;
    a.q = q, a.k = k, a.v = v, a.out = out, a.weights = kernels->attend ? NULL : weights, a.n_rows = n_rows, a.n_past = n_past, a.n_head = n_head;
    a.n_head_kv = n_head_kv, a.head_dim = d, a.causal = causal, a.run = &run;
    avl__attention_run(&a, 1);
    for (h = 0; h < n_head; h++)
        for (r = 0; r < n_rows; r++) {
            int last = causal ? n_past + r + 1 : n_keys, kv = h / (n_head / n_head_kv);
            double p[640], sum = 0.0, shown = 0.0;
            for (j = 0; j < last; j++) {
                double s = 0.0;
                for (i = 0; i < d; i++) s += (double)q[(r * n_head + h) * d + i] * k[(j * n_head_kv + kv) * d + i];
                sum += p[j] = exp(s / sqrt((double)d));
            }
            for (i = 0; i < d; i++) {
                double e = 0.0;
                for (j = 0; j < last; j++) e += p[j] / sum * v[(j * n_head_kv + kv) * d + i];
                if (fabs(e - out[(r * n_head + h) * d + i]) > worst) worst = fabs(e - out[(r * n_head + h) * d + i]);
            }
            if (!a.weights) continue;
            for (j = 0; j < n_keys; j++) shown += weights[(h * n_rows + r) * n_keys + j];
            for (j = last; j < n_keys; j++) CHECK(weights[(h * n_rows + r) * n_keys + j] == 0.0f, "a row sees its future");
            if (fabs(shown - 1.0) > worst_sum) worst_sum = fabs(shown - 1.0);
        }
    CHECK(worst < 1e-6, "%s: %d rows after %d: off by %g", kernels->name, n_rows, n_past, worst);
    CHECK(worst_sum < 1e-5, "shown weights do not add up to 1: %g", worst_sum);
    if (kernels->attend) test_attention_of_halves(&a, n_keys);
    if (kernels->attend_coarsely) {                          // bfloat16 has 8 bits
        float *coarse = (float *)malloc((size_t)(n_rows * n_head * d) * 4);
        a.out = coarse, a.is_coarse = 1;
        avl__attention_run(&a, 1);
        for (i = 0, worst = 0.0; i < n_rows * n_head * d; i++)
            if (fabs(coarse[i] - out[i]) > worst) worst = fabs(coarse[i] - out[i]);
        CHECK(worst < 0.01, "%s: %d rows after %d, coarsely: off by %g", kernels->name, n_rows, n_past, worst);
        free(coarse);
    }
    avl__run_free(&run);
    free(q), free(k), free(v), free(out), free(weights);
}

static void test_attention_case(int n_rows, int n_past, int n_head, int n_head_kv, int d, int causal) {
    for (int i = 0; i < AVL__N_KERNELS; i++)
        if (avl__kernels_run(i)) test_attention_by(avl__all_kernels[i], n_rows, n_past, n_head, n_head_kv, d, causal);
}

static void test_attention(void) {
    test_attention_case(1, 0, 4, 4, 8, 1);
    test_attention_case(33, 0, 4, 2, 8, 1);
    test_attention_case(1, 40, 6, 2, 32, 1);
    test_attention_case(20, 7, 4, 1, 24, 1);
    test_attention_case(37, 0, 3, 3, 16, 0);
    test_attention_case(70, 0, 2, 2, 64, 0);
    test_attention_case(67, 13, 4, 2, 20, 1);
    test_attention_case(2, 150, 2, 1, 128, 1);
    test_attention_case(2, 600, 1, 1, 600, 1);
}

// ---- fast mode: every table of kernels that this processor has, against double -------------------------------------

enum { FAST_IN = 1536, FAST_OUT = 70, FAST_ROWS = 67 };

static void store_le(uint8_t *p, uint32_t value, int n) {
    for (; n > 0; n--, value >>= 8) *p++ = (uint8_t)value;
}

// Blocks of random bytes whose scales are ordinary (0), zero or denormal (1), as large as they can be (2).
static void test_fast_blocks(int type, uint8_t *blocks, size_t n_bytes, int scales, uint32_t seed) {
    static const uint8_t halves[][2] = {   // by type: the block's float16 fields, {first byte, how many in a row}
        {0, 0}, {0, 1}, {0, 1}, {0, 2}, {0, 0}, {0, 0}, {0, 1}, {0, 2}, {0, 1}, {0, 0}, {80, 2}, {108, 1}, {0, 2}, {0, 2}, {208, 1}};
    const avl__type_info *info = avl__find_type(type);
    int h, first = type == ASTROVL_TYPE_BF16 ? 0 : halves[type][0], n_halves = type == ASTROVL_TYPE_BF16 ? 1 : halves[type][1];
    for (size_t i = 0; i < n_bytes; i++) seed = seed * 1664525u + 1013904223u, blocks[i] = (uint8_t)(seed >> 24);
    for (size_t i = 0; i < n_bytes; i += (size_t)info->block_bytes)
        for (h = 0; h < n_halves || (h == 0 && info->block_values == 1); h++) {
            uint8_t *at = blocks + i + first + 2 * h;
            uint16_t half;
            seed = seed * 1664525u + 1013904223u;
            half = astrovl_f32_to_f16(scales == 2 ? 65504.0f : scales == 1 ? (float)(seed >> 30) * 6e-8f : (float)(int32_t)seed * 1e-11f);
            if (type == ASTROVL_TYPE_F32) store_le(blocks + i, avl__float_bits(astrovl_f16_to_f32(half)), 4);
            else if (type == ASTROVL_TYPE_BF16) store_le(blocks + i, astrovl_f32_to_bf16(astrovl_f16_to_f32(half)), 2);
            else store_le(at, half, 2);
        }
}

// The largest |x| of a block, which its scale is made of
static double test_block_top(const float *x, int begin, int n) {
    double top = 0.0;
    for (int i = begin; i < n && i < begin + 32; i++)
        if (fabs(x[i]) > top) top = fabs(x[i]);
    return top;
}

// What rounding may change in one product: activations move by half a step of their block of 32, 1 / 254 of its largest value. Weights of
// the float types move by as much where they are rounded like that; bfloat16 changes each by 2^-8 of itself. Beside that float32's own.
static double test_fast_bound(int is_float, const float *w, const float *x, int n) {
    double bound = 0.0, all_w = 0.0, all_x = 0.0;
    for (int b = 0; b < n; b += 32) {
        double top_x = test_block_top(x, b, n), top_w = test_block_top(w, b, n), sum_x = 0.0, sum_w = 0.0;
        for (int i = b; i < n && i < b + 32; i++) sum_x += fabs(x[i]), sum_w += fabs(w[i]);
        bound += sum_w * top_x / 250 + (is_float ? sum_x * top_w / 250 + 32 * top_x * top_w / 60000 : 0);
        all_w = top_w > all_w ? top_w : all_w, all_x += sum_x;
    }
    return bound + all_w * all_x * 3e-5 + 1e-35;
}

static void test_fast_case(const avl__kernels *kernels, int type, int n_in, int n_out, int n_rows, int scales) {
    static float x[FAST_ROWS * FAST_IN], y[FAST_ROWS * FAST_OUT], again[FAST_ROWS * FAST_OUT], expanded[FAST_OUT * FAST_IN], bias[FAST_OUT];
    size_t row = astrovl_type_row_bytes(type, n_in);
    uint8_t *blocks = (uint8_t *)malloc(row * (size_t)n_out);
    avl__linear w;
    avl__run run;
    test_fill(x, n_rows * n_in, (uint32_t)(n_in + n_rows)), test_fill(bias, n_out, 9);
    for (int i = 0; i < n_rows * n_in; i += 37) x[i] *= i % 2 ? 50.0f : 0.0f;      // activations have outliers
    if (scales == 1) memset(x, 0, (size_t)n_in * sizeof *x);
    test_fast_blocks(type, blocks, row * (size_t)n_out, scales, (uint32_t)(100 * type + n_in));
    CHECK(astrovl_dequantize(type, blocks, expanded, (int64_t)n_in * n_out) == ASTROVL_OK, "type %d", type);
    memset(&w, 0, sizeof w);
    w.weight = blocks, w.bias = bias, w.type = type, w.n_in = n_in, w.n_out = n_out, w.row_bytes = row;
    for (int threads = 1; threads <= 3; threads += 2) {
        test_run_start(&run, kernels, threads);
        memset(y, 0xFF, sizeof y);
        avl__apply(&run, y, x, &w, n_rows);
        if (threads == 1) memcpy(again, y, sizeof y);
        CHECK(memcmp(again, y, sizeof y) == 0, "%s, %s: %d threads give other bits", kernels->name, astrovl_type_name(type), threads);
        avl__run_free(&run);
    }
    for (int r = 0; r < n_rows; r++)
        for (int o = 0; o < n_out; o++) {
            const float *xr = x + (size_t)r * (size_t)n_in, *wo = expanded + (size_t)o * (size_t)n_in;
            double sum = bias[o], error;
            double bound = test_fast_bound(avl__is_float_type(type), wo, xr, n_in);
            for (int i = 0; i < n_in; i++) sum += (double)xr[i] * wo[i];
            error = fabs(sum - y[r * n_out + o]);
            CHECK(error <= bound + 1e-6 * fabs(sum), "%s, %s [%d, %d], %d rows, scales %d: y[%d][%d] is %g, not %g (bound %g)", kernels->name,
                  astrovl_type_name(type), n_out, n_in, n_rows, scales, r, o, y[r * n_out + o], sum, bound);
            if (error > bound + 1e-6 * fabs(sum)) return;
        }
    free(blocks);
}

// A NaN in a row of x makes that row of y NaN and no other; in a weight row of a float type, its column.
static void test_fast_nan(void) {
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14}, rows[] = {1, 2, 7, 20};
    enum { N_IN = 256, N_OUT = 34, ROW = 1, OUT = 33 };
    static float x[20 * N_IN], y[20 * N_OUT];
    static uint8_t blocks[N_OUT * N_IN * 4];
    for (int k = 0; k < AVL__N_KERNELS; k++)
        for (size_t t = 0; avl__kernels_run(k) && t < 4 * sizeof types / sizeof *types; t++) {
            const int type = types[t / 4], n_rows = rows[t % 4], place = (int)(t * 37 % N_IN), is_float = avl__is_float_type(type);
            const size_t row = astrovl_type_row_bytes(type, N_IN);
            avl__linear w;
            avl__run run;
            int n_wrong = 0;
            test_fill(x, n_rows * N_IN, 5);
            if (n_rows > ROW) x[ROW * N_IN + place] = NAN;
            test_fast_blocks(type, blocks, row * N_OUT, 0, 3);
            uint8_t *weight = blocks + row * OUT + (size_t)place * (type ? 2 : 4);
            if (type == ASTROVL_TYPE_F32) store_le(weight, 0x7FC00000, 4);
            else if (is_float) store_le(weight, 0x7FC0, 2);
            memset(&w, 0, sizeof w);
            w.weight = blocks, w.type = type, w.n_in = N_IN, w.n_out = N_OUT, w.row_bytes = row;
            test_run_start(&run, avl__all_kernels[k], 1);
            avl__apply(&run, y, x, &w, n_rows);
            avl__run_free(&run);
            for (int i = 0; i < n_rows * N_OUT; i++)
                n_wrong += (y[i] != y[i]) != (i / N_OUT == ROW || (is_float && i % N_OUT == OUT));
            CHECK(n_wrong == 0, "%s, %s, %d rows: %d values", avl__all_kernels[k]->name, astrovl_type_name(type), n_rows, n_wrong);
        }
}

static void test_fast_products(void) {
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14};
    static const int rows[] = {1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 31, 67}, outs[] = {1, 4, 31, 32, 33, 70}, odd[] = {1, 17, 33, 47, 588};
    for (int k = 0; k < AVL__N_KERNELS; k++)
        for (size_t t = 0; avl__kernels_run(k) && t < sizeof types / sizeof *types; t++) {
            const avl__kernels *kernels = avl__all_kernels[k];
            int values = avl__find_type(types[t])->block_values, scales;
            for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
                test_fast_case(kernels, types[t], values == 256 ? 512 : 160, outs[i % (sizeof outs / sizeof *outs)], rows[i], 0);
            for (scales = 1; scales < 3; scales++) {
                test_fast_case(kernels, types[t], 256, 34, 1, scales);
                test_fast_case(kernels, types[t], 256, 34, 9, scales);
            }
            test_fast_case(kernels, types[t], FAST_IN, 33, 7, 0);
            for (size_t i = 0; values == 1 && i < sizeof odd / sizeof *odd; i++) {
                test_fast_case(kernels, types[t], odd[i], 34, 1, 0);
                test_fast_case(kernels, types[t], odd[i], 34, 7, 0);
            }
            for (size_t i = 0; values == 32 && i < 12; i++)      // fewer blocks than are unpacked together: 1 to 3
                test_fast_case(kernels, types[t], 32 * (1 + (int)i % 3), 34, 1 + 4 * ((int)i / 3), 0);
        }
}

// A row of a product has the same bits whatever rows are computed with it: with weights in blocks, however many rows there are; with
// weights of a float type, as long as a few rows take the weights as they lie.
static void test_fast_rows_by(const avl__kernels *kernels, int type, int n_in) {
    enum { N_OUT = 34, N_ROWS = 16, MOST_IN = 1568 };
    static const int rows[] = {1, 2, 3, 4, 5, 6, 7, 12, 16};
    static float x[N_ROWS * MOST_IN], all[N_ROWS * N_OUT], y[N_ROWS * N_OUT];
    const int is_float = avl__is_float_type(type);
    size_t row = astrovl_type_row_bytes(type, n_in), i;
    uint8_t *blocks = (uint8_t *)malloc(row * N_OUT);
    avl__linear w;
    avl__run run;
    test_fill(x, N_ROWS * n_in, 31);
    for (int r = 0; r < N_ROWS * n_in; r += 211) x[r] *= 50.0f;      // blocks that deserve second pieces, others in each row
    test_fast_blocks(type, blocks, row * N_OUT, 0, (uint32_t)type);
    memset(&w, 0, sizeof w);
    w.weight = blocks, w.type = type, w.n_in = n_in, w.n_out = N_OUT, w.row_bytes = row;
    test_run_start(&run, kernels, 1);
    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int r = 0; r + rows[i] <= N_ROWS; r += rows[i]) {
            float *to = i ? y : all + r * N_OUT;             // first each row alone
            avl__product p;
            memset(&p, 0, sizeof p);
            p.y = to, p.x = x + r * n_in, p.w = &w, p.n_rows = rows[i], p.few = 1;
            if (is_float && avl__run_reserve(&run, (uint64_t)n_in, 0)) kernels->linear(&p, 0, N_OUT, avl__thread_memory(&run, 0));
            else          avl__apply(&run, to, p.x, &w, rows[i]);
            CHECK(memcmp(to, all + r * N_OUT, sizeof(float) * (size_t)(rows[i] * N_OUT)) == 0,
                  "%s, %s: %d rows from row %d on differ from single ones", kernels->name, astrovl_type_name(type), rows[i], r);
        }
    avl__run_free(&run);
    free(blocks);
}

// AVX-VNNI adds up the same integers as AVX2, so a product has the same bits.
static void test_fast_vnni(void) {
#if AVL__X86 && AVL__SIMD
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14}, rows[] = {1, 2, 9, 16};
    enum { N_IN = 512, N_OUT = 70 };
    static float x[16 * N_IN], y[2][16 * N_OUT];
    static uint8_t blocks[N_OUT * N_IN * 4];
    const avl__kernels *tables[2] = {&avl__kernels_avx2, &avl__kernels_avx_vnni};
    size_t t, i;
    CHECK(avl__all_kernels[2] == tables[1] && (!avl__kernels_run(2) || avl__kernels_run(1)), "the table's place");
    test_fill(x, 16 * N_IN, 8);
    for (t = 0; avl__kernels_run(2) && t < sizeof types / sizeof *types; t++)
        for (i = 0; i < sizeof rows / sizeof *rows; i++) {
            avl__linear w;
            memset(&w, 0, sizeof w);
            w.weight = blocks, w.type = types[t], w.n_in = N_IN, w.n_out = N_OUT, w.row_bytes = astrovl_type_row_bytes(types[t], N_IN);
            test_fast_blocks(types[t], blocks, w.row_bytes * N_OUT, 0, (uint32_t)t);
            for (size_t k = 0; k < 2; k++) {
                avl__run run;
                test_run_start(&run, tables[k], 1);
                avl__apply(&run, y[k], x, &w, rows[i]);
                avl__run_free(&run);
            }
            CHECK(memcmp(y[0], y[1], sizeof(float) * N_OUT * (size_t)rows[i]) == 0, "%s, %d rows", astrovl_type_name(types[t]), rows[i]);
        }
#endif
}

static void test_fast_rows(void) {
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14};
    for (int k = 0; k < AVL__N_KERNELS; k++)
        for (size_t t = 0; avl__kernels_run(k) && t < sizeof types / sizeof *types; t++) {
            int values = avl__find_type(types[t])->block_values;
            test_fast_rows_by(avl__all_kernels[k], types[t], values == 256 ? 1536 : 1568);
            if (values == 1) test_fast_rows_by(avl__all_kernels[k], types[t], 47);
        }
}

// Long rows are rounded by several threads, each some of the blocks: the bits are those of one thread.
static void test_fast_threads(void) {
    enum { N_IN = 8288, N_OUT = 34, N_ROWS = 20 };      // 259 blocks
    static const int types[] = {ASTROVL_TYPE_F16, ASTROVL_TYPE_Q4_0, ASTROVL_TYPE_Q8_0}, rows[] = {1, 2, 8, N_ROWS}, threads[] = {1, 2, 3, 8};
    static float x[N_ROWS * N_IN], first[N_ROWS * N_OUT], y[N_ROWS * N_OUT];
    test_fill(x, N_ROWS * N_IN, 17);
    for (int r = 0; r < N_ROWS * N_IN; r += 307) x[r] *= 40.0f;      // second pieces
    for (int k = 1; k < AVL__N_KERNELS; k++)
        for (size_t t = 0; avl__kernels_run(k) && t < sizeof types / sizeof *types; t++) {
            const size_t row = astrovl_type_row_bytes(types[t], N_IN);
            uint8_t *blocks = (uint8_t *)malloc(row * N_OUT);
            avl__linear w;
            memset(&w, 0, sizeof w);
            w.weight = blocks, w.type = types[t], w.n_in = N_IN, w.n_out = N_OUT, w.row_bytes = row;
            test_fast_blocks(types[t], blocks, row * N_OUT, 0, 5);
            for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
                for (size_t n = 0; n < sizeof threads / sizeof *threads; n++) {
                    avl__run run;
                    test_run_start(&run, avl__all_kernels[k], threads[n]);
                    avl__apply(&run, n ? y : first, x, &w, rows[i]);
                    CHECK(n == 0 || memcmp(first, y, sizeof(float) * N_OUT * (size_t)rows[i]) == 0, "%s, %s: %d rows by %d threads",
                          run.kernels->name, astrovl_type_name(types[t]), rows[i], threads[n]);
                    avl__run_free(&run);
                }
            free(blocks);
        }
}

// AArch64's tables multiply blocks by different instructions, and then compute alike.
#if AVL__NEON
static void test_fast_neon(void) {
    enum { N_IN = 512, N_OUT = 37, N_ROWS = 9 };
    static const int types[] = {2, 3, 6, 7, 8, 10, 11, 12, 13, 14};
    static float x[N_ROWS * N_IN], y[N_ROWS * N_OUT], first[N_ROWS * N_OUT];
    test_fill(x, N_ROWS * N_IN, 41);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        avl__linear w;
        uint8_t *blocks;
        memset(&w, 0, sizeof w);
        w.row_bytes = astrovl_type_row_bytes(types[t], N_IN);
        w.weight = blocks = (uint8_t *)malloc(w.row_bytes * N_OUT);
        w.type = types[t], w.n_in = N_IN, w.n_out = N_OUT;
        test_fast_blocks(types[t], blocks, w.row_bytes * N_OUT, 0, 42);
        for (int k = 1; k < AVL__N_KERNELS && avl__kernels_run(k); k++) {
            avl__run run;
            test_run_start(&run, avl__all_kernels[k], 1);
            avl__apply(&run, k == 1 ? first : y, x, &w, N_ROWS);
            CHECK(k == 1 || memcmp(first, y, sizeof y) == 0, "%s, %s: other bits", run.kernels->name, astrovl_type_name(types[t]));
            avl__run_free(&run);
        }
        free(blocks);
    }
}
#endif

static void test_fast_ops(void) {
    enum { N = 1003 };
    static float x[N], up[N], weight[N], bias[N], y[N], z[N];
    for (int k = 1; k < AVL__N_KERNELS; k++)
        for (int n = 1; avl__kernels_run(k) && n <= N; n = n < 40 ? n + 1 : n + 481)
            for (int op = 0; op < 5; op++) {
                const avl__kernels *table[2];
                double worst = 0.0, top = 1e-3;
                table[0] = avl__all_kernels[0], table[1] = avl__all_kernels[k];
                test_fill(x, n, 3), test_fill(up, n, 4), test_fill(weight, n, 5), test_fill(bias, n, 6);
                for (int i = 0; i < n; i++) x[i] *= i % 5 ? 3.0f : 40.0f;
                for (int i = 0; i < 2; i++) {
                    float *to = i ? y : z;
                    memcpy(to, x, sizeof x);
                    if (op == 0) table[i]->rms_norm(to, x, weight, n, 1e-5f);
                    if (op == 1) table[i]->layer_norm(to, x, weight, bias, n, 1e-5f);
                    if (op == 2) table[i]->gelu(to, n);
                    if (op == 3) table[i]->quick_gelu(to, n);
                    if (op == 4) table[i]->silu_product(to, up, n);
                }
                for (int i = 0; i < n; i++) {
                    if (fabs((double)y[i] - z[i]) > worst) worst = fabs((double)y[i] - z[i]);
                    if (fabs((double)z[i]) > top) top = fabs((double)z[i]);
                }
                CHECK(worst <= 2e-6 * top + (op == 1 && n < 3 ? 1 : 0), "%s: operation %d of %d values is off by %g of %g", table[1]->name, op, n, worst, top);
            }
}

// The KV cache's float16, of every length; what is too large stays finite.
static void test_fast_halves(void) {
    enum { N = 75 };
    static float x[N], back[N];
    static uint16_t halves[N];
    for (int k = 0; k < AVL__N_KERNELS; k++)
        for (int n = 1; avl__kernels_run(k) && avl__all_kernels[k]->attend && n <= N; n++) {
            const avl__kernels *kernels = avl__all_kernels[k];
            test_fill(x, n, 5);
            x[n / 2] = n % 2 ? 1e6f : -1e30f;
            kernels->to_halves(halves, x, n);
            kernels->from_halves(back, halves, n);
            for (int i = 0; i < n; i++)
                CHECK(back[i] == (i == n / 2 ? n % 2 ? 65504.0f : -65504.0f : astrovl_f16_to_f32(astrovl_f32_to_f16(x[i]))), "%s: %d of %d",
                      kernels->name, i, n);
        }
}

// One query over float16 keys and values, which are columns of longer rows: heads of every size, against double.
static void test_fast_attend_one(void) {
    enum { HEAD = 150, KEYS = 70, STRIDE = HEAD + 3 };
    static float q[HEAD], out[HEAD], weights[KEYS], rows[2 * KEYS * STRIDE];
    static uint16_t halves[2 * KEYS * STRIDE], *values = halves + KEYS * STRIDE;
    static const int n_keys[] = {1, 2, 31, 32, 33, KEYS};
    int i, j;
    test_fill(rows, 2 * KEYS * STRIDE, 8);
    for (i = 0; i < 2 * KEYS * STRIDE; i++) halves[i] = astrovl_f32_to_f16(rows[i]), rows[i] = astrovl_f16_to_f32(halves[i]);
    for (int k = 0; k < AVL__N_KERNELS; k++)
        for (int n = 1; avl__kernels_run(k) && avl__all_kernels[k]->attend && n <= HEAD; n++) {
            const avl__kernels *kernels = avl__all_kernels[k];
            test_fill(q, n, n);
            for (i = 0; i < n; i++) q[i] *= 4;
            for (int c = 0; c < (int)(sizeof n_keys / sizeof *n_keys); c++) {
                double p[KEYS], total = 0.0, sum;
                kernels->attend_one(out, q, halves, values, STRIDE, n_keys[c], n, weights);
                for (j = 0; j < n_keys[c]; j++) {
                    for (sum = 0.0, i = 0; i < n; i++) sum += (double)q[i] * rows[STRIDE * j + i];
                    total += p[j] = exp(sum / sqrt(n));
                }
                for (j = 0; j < n_keys[c]; j++)
                    CHECK(fabs(weights[j] - p[j] / total) < 1e-5, "%s: weight %d of %d, head of %d", kernels->name, j, n_keys[c], n);
                for (i = 0; i < n; i++) {
                    for (sum = 0.0, j = 0; j < n_keys[c]; j++) sum += p[j] / total * rows[(KEYS + j) * STRIDE + i];
                    CHECK(fabs(out[i] - sum) < 1e-5, "%s: column %d of %d, %d keys", kernels->name, i, n, n_keys[c]);
                }
            }
        }
}

// Nothing is read or written past an end: what a product and the vectors take lies right before a page that nobody may touch.
#if AVL__MMAP && defined(MAP_ANONYMOUS)
enum { END_BYTES = 1 << 18, END_ARRAYS = 4 };
static uint8_t *g_ends[END_ARRAYS];

static void *test_end(int array, size_t size) {    // size bytes up to the end of an array
    CHECK(size <= END_BYTES, "%d bytes", (int)size);
    return g_ends[array] - size;
}

static void test_fast_ends_by(const avl__kernels *kernels, int type, int n_in, int n_rows) {
    enum { N_OUT = 35 };
    const size_t row = astrovl_type_row_bytes(type, n_in), y_bytes = sizeof(float) * (size_t)(n_rows * N_OUT);
    float *x = (float *)test_end(0, sizeof(float) * (size_t)(n_rows * n_in)), *y = (float *)test_end(1, y_bytes);
    float *bias = (float *)test_end(2, sizeof(float) * N_OUT), *again = (float *)malloc(y_bytes);
    uint8_t *blocks = (uint8_t *)test_end(3, row * N_OUT), *copy = (uint8_t *)malloc(row * N_OUT + 100);
    avl__linear w;
    avl__run run;
    test_fill(x, n_rows * n_in, 1), test_fill(bias, N_OUT, 2);
    test_fast_blocks(type, blocks, row * N_OUT, 0, 3);
    memcpy(copy, blocks, row * N_OUT), memset(copy + row * N_OUT, 0xFF, 100);
    memset(&w, 0, sizeof w);
    w.bias = bias, w.type = type, w.n_in = n_in, w.n_out = N_OUT, w.row_bytes = row;
    test_run_start(&run, kernels, 1);
    w.weight = blocks, avl__apply(&run, y, x, &w, n_rows);
    w.weight = copy, avl__apply(&run, again, x, &w, n_rows);
    CHECK(memcmp(y, again, y_bytes) == 0, "%s, %s: what lies behind the weights counts", kernels->name, astrovl_type_name(type));
    avl__run_free(&run);
    free(again), free(copy);
}

static void test_fast_vector_ends(const avl__kernels *kernels, int n) {
    float *x = (float *)test_end(0, sizeof(float) * (size_t)n), *y = (float *)test_end(1, sizeof(float) * (size_t)n);
    uint16_t *halves = (uint16_t *)test_end(2, sizeof(uint16_t) * (size_t)n);
    uint8_t *bytes = (uint8_t *)test_end(3, (size_t)n);
    float dot, portable;
    test_fill(x, n, 1), test_fill(y, n, 2);
    kernels->rms_norm(y, y, x, n, 1e-5f), kernels->layer_norm(y, y, x, x, n, 1e-5f);
    kernels->gelu(y, n), kernels->quick_gelu(y, n), kernels->silu_product(y, x, n);
    if (kernels->attend) {
        kernels->to_halves(halves, x, n), kernels->from_halves(y, halves, n);
        kernels->attend_one(y, x, halves, halves, (size_t)n, 1, n, &dot);
        for (int i = 0; i < n; i++) CHECK(dot == 1.0f && y[i] == astrovl_f16_to_f32(halves[i]), "%s: %d of %d halves", kernels->name, i, n);
    }
    for (int i = 0; i < n; i++) halves[i] = astrovl_f32_to_f16(x[i]);
    dot = kernels->dot_f16(halves, y, n), portable = avl__dot_f16_portable(halves, y, n);
    CHECK(memcmp(&dot, &portable, sizeof dot) == 0, "%s: dot_f16 of %d has other bits", kernels->name, n);
    for (int i = 0; i < n; i++) bytes[i] = 0xFF;
}

static void test_fast_ends(void) {
    static const int types[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14}, rows[] = {1, 2, 3, 9, 17};
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int k = 0; k < END_ARRAYS; k++) {
        uint8_t *map = (uint8_t *)mmap(NULL, END_BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(map != MAP_FAILED && mprotect(map + END_BYTES, page, PROT_NONE) == 0, "no page to guard with");
        g_ends[k] = map + END_BYTES;
    }
    for (int k = 0; k < AVL__N_KERNELS; k++) {
        if (!avl__kernels_run(k)) continue;
        for (size_t t = 0; t < sizeof types / sizeof *types; t++)
            for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
                const int values = avl__find_type(types[t])->block_values;
                test_fast_ends_by(avl__all_kernels[k], types[t], values == 256 ? 512 : values == 32 ? 288 : 299, rows[i]);
            }
        for (int n = 1; n < 70; n++) test_fast_vector_ends(avl__all_kernels[k], n);
    }
    for (int k = 0; k < END_ARRAYS; k++) munmap(g_ends[k] - END_BYTES, END_BYTES + page);
}
#endif

// The whole model: fast mode's logits lie close to exact mode's, whatever the table, and do not depend on the number of threads.
static void test_fast_model(void) {
    astrovl_error err;
    astrovl_model *model = astrovl_open("test/astrovl-tiny.gguf", NULL, &err);
    static const char text[] = "A white spiral galaxy in the centre of the frame. It is inclined and it has two spiral arms. There is one bright star.";
    int32_t tokens[64];
    int n = model ? astrovl_tokenize(model, text, strlen(text), ASTROVL_ADD_SPECIAL, tokens, 64, &err) : -1, k, i;
    astrovl_info info;
    float *logits[3];        // exact mode's; one thread's and three threads' of a table
    CHECK(n > 8 && n <= 64, "tokens: %d", n);
    if (n <= 8 || n > 64) return;
    astrovl_get_info(model, &info);
    for (i = 0; i < 3; i++) logits[i] = (float *)malloc(sizeof(float) * (size_t)n * (size_t)info.n_vocab);
    for (k = -1; k < AVL__N_KERNELS; k++) {
        if (k >= 0 && !avl__kernels_run(k)) continue;     // would be as the one before it
        for (int threads = 1; threads <= 3; threads += 2) {
            float *out = logits[k < 0 ? 0 : 1 + (threads > 1)];
            astrovl_session_options o;
            astrovl_session *s;
            double aa = 0.0, bb = 0.0, ab = 0.0;
            memset(&o, 0, sizeof o);
            o.mode = k < 0 ? ASTROVL_EXACT : ASTROVL_FAST, o.n_threads = threads;
            if (k >= 0) o.isa = avl__all_kernels[k]->name;
            s = astrovl_session_new(model, &o, &err);
            CHECK(s && astrovl_eval_tokens(s, tokens, n, out, n, &err) == ASTROVL_OK, "eval: %s", err.message);
            astrovl_session_free(s);
            for (i = 0; i < n * info.n_vocab; i++) {
                double a = logits[0][i], b = out[i];
                aa += a * a, bb += b * b, ab += a * b;
            }
            CHECK(ab >= 0.999 * sqrt(aa * bb), "%s: cosine %.6f", k < 0 ? "exact" : avl__all_kernels[k]->name, ab / sqrt(aa * bb));
        }
        CHECK(k < 0 || memcmp(logits[1], logits[2], sizeof(float) * (size_t)n * (size_t)info.n_vocab) == 0, "threads change bits");
    }
    {
        astrovl_session_options o;
        memset(&o, 0, sizeof o);
        o.isa = "abacus";
        CHECK(!astrovl_session_new(model, &o, &err) && strstr(err.message, "portable"), "%s", err.message);
    }
    free(logits[0]), free(logits[1]), free(logits[2]);
    astrovl_close(model);
}

static void tests_ops(void) {
    run("platform: messages", test_messages);
    run("platform: long messages keep their end", test_long_messages);
    run("platform: growing arrays", test_growing);
    run("ops: norms", test_norms);
    run("ops: activations", test_activations);
    run("ops: rope", test_rope);
    run("kernels: order of a sum", test_dot_order);
    run("kernels: products with every type", test_products);
    run("ops: attention", test_attention);
    run("fast: products of every type and shape", test_fast_products);
    run("fast: rows do not depend on each other", test_fast_rows);
    run("fast: NaN stays NaN", test_fast_nan);
    run("fast: long rows, 1 to 8 threads", test_fast_threads);
    run("fast: AVX-VNNI as AVX2", test_fast_vnni);
#if AVL__NEON
    run("fast: the same bits by all NEON kernels", test_fast_neon);
#endif
    run("fast: norms and activations", test_fast_ops);
    run("fast: float16 of the KV cache", test_fast_halves);
    run("fast: one query over float16 keys and values", test_fast_attend_one);
#if AVL__MMAP && defined(MAP_ANONYMOUS)
    run("fast: nothing past an end", test_fast_ends);
#endif
    run("fast: a model", test_fast_model);
}

// ---- [6] GGUF -------------------------------------------------------------------------------------------------------
// Files are written here as words, which gguf_make turns into bytes after the magic "GGUF":
//   b1 h1 i1 q1  the number 1 in 1, 2, 4, 8 bytes     f1.5 d1.5  float32, float64     'text  a string with its length
//   "text        bare bytes      xN  a string of N x      zN  N zero bytes      aN  zeros up to a multiple of N

typedef struct gguf_bytes {
    unsigned char *data;
    size_t size;
} gguf_bytes;

// Memory for so many bytes: no more than that for small files, so that reading past their end is found
static size_t gguf_room(size_t size) { return size < 65536 ? size + 1 : (size / 65536 + 1) * 65536; }

static void gguf_put(gguf_bytes *b, const void *data, size_t size) {
    if (!b->data || gguf_room(b->size + size) != gguf_room(b->size))
        b->data = (unsigned char *)realloc(b->data, gguf_room(b->size + size));
    if (!b->data) exit(1);
    if (data) memcpy(b->data + b->size, data, size);
    else memset(b->data + b->size, 0, size);
    b->size += size;
}

static void gguf_put_number(gguf_bytes *b, uint64_t value, int n) {
    unsigned char bytes[8];
    for (int i = 0; i < n; i++) bytes[i] = (unsigned char)(value >> 8 * i);
    gguf_put(b, bytes, (size_t)n);
}

static gguf_bytes gguf_make(const char *words) {
    gguf_bytes b;
    memset(&b, 0, sizeof b);
    gguf_put(&b, "GGUF", 4);
    while (*words) {
        size_t n = strcspn(words, " ");
        const char *rest = words + 1;
        uint64_t value = strchr("bhiqxza", *words) ? (uint64_t)strtoull(rest, NULL, 0) : 0;   // -1 wraps, as wanted
        switch (*words) {
        case 'b': gguf_put_number(&b, value, 1); break;
        case 'h': gguf_put_number(&b, value, 2); break;
        case 'i': gguf_put_number(&b, value, 4); break;
        case 'q': gguf_put_number(&b, value, 8); break;
        case 'f': gguf_put_number(&b, avl__float_bits((float)atof(rest)), 4); break;
        case 'd': gguf_put_number(&b, avl__double_bits(atof(rest)), 8); break;
        case '"': gguf_put(&b, rest, n - 1); break;
        case '\'': gguf_put_number(&b, n - 1, 8); gguf_put(&b, rest, n - 1); break;
        case 'x': gguf_put_number(&b, value, 8); for (; value > 0; value--) gguf_put(&b, "x", 1); break;
        case 'z': gguf_put(&b, NULL, (size_t)value); break;
        case 'a': while (b.size % value) gguf_put(&b, NULL, 1); break;
        default: fprintf(stderr, "gguf_make: %s\n", words); exit(1);
        }
        words += n;
        while (*words == ' ') words++;
    }
    return b;
}

// Reads all there is through the public calls; the sum keeps the reads alive.
static double gguf_walk(const astrovl_gguf *f) {
    double sum = 0;
    uint64_t k;
    for (int i = 0; i < astrovl_gguf_n_kv(f); i++) {
        const astrovl_kv *kv = astrovl_gguf_kv(f, i);
        for (k = 0; k < kv->count + 1; k++) {
            astrovl_string s = astrovl_gguf_string(f, i, k);
            sum += (double)astrovl_gguf_int(f, i, k) + astrovl_gguf_float(f, i, k) + (double)s.size;
            if (s.size) sum += s.data[0] + s.data[s.size - 1];
        }
        CHECK(astrovl_gguf_find_kv(f, kv->key) == i, "key %s is not found", kv->key);
    }
    for (int i = 0; i < astrovl_gguf_n_tensors(f); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(f, i);
        for (k = 0; k < t->n_bytes; k++) sum += ((const unsigned char *)t->data)[k];
        CHECK(astrovl_gguf_find_tensor(f, t->name) == t, "tensor %s is not found", t->name);
        k = astrovl_type_row_bytes(t->type, t->ne[0]) * (uint64_t)(t->ne[1] * t->ne[2] * t->ne[3]);
        CHECK(t->n_bytes == k || !astrovl_type_name(t->type), "%s has %d bytes", t->name, (int)t->n_bytes);
        CHECK(t->n_bytes <= astrovl_gguf_size(f) - t->offset, "%s has %d bytes", t->name, (int)t->n_bytes);
    }
    return sum;
}

// Opens a copy that ends exactly where an allocation ends, so that a sanitizer sees a read past it.
static int gguf_try(const unsigned char *data, size_t size, astrovl_error *err) {
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    if (!copy) exit(1);
    memcpy(copy, data, size);
    memset(err, 0, sizeof *err);
    astrovl_gguf *f = astrovl_gguf_open_memory(copy, size, "m.gguf", err);
    int good = f != NULL;
    if (f) gguf_walk(f);
    astrovl_gguf_close(f);
    free(copy);
    return good;
}

// ---- files that the gguf package wrote ------------------------------------------------------------------------------

typedef struct gguf_expected {
    const char *name;
    astrovl_value_type type;
    int64_t first, second;
    double f_first, f_second;
} gguf_expected;

static void gguf_check_metadata(const astrovl_gguf *f) {
    static const gguf_expected expected[] = {
        {"u8", ASTROVL_VALUE_U8, 200, 7, 200, 7}, {"i8", ASTROVL_VALUE_I8, -100, 7, -100, 7},
        {"u16", ASTROVL_VALUE_U16, 60000, 7, 60000, 7}, {"i16", ASTROVL_VALUE_I16, -30000, 7, -30000, 7},
        {"u32", ASTROVL_VALUE_U32, 4000000000ll, 7, 4e9, 7}, {"i32", ASTROVL_VALUE_I32, -2000000000, 7, -2e9, 7},
        {"f32", ASTROVL_VALUE_F32, 1, 0, 1.5, -0.25}, {"bool", ASTROVL_VALUE_BOOL, 1, 0, 1, 0},
        {"u64", ASTROVL_VALUE_U64, INT64_MAX, 7, 18446744073709551616.0, 7},
        {"i64", ASTROVL_VALUE_I64, INT64_MIN, 7, -9223372036854775808.0, 7},
        {"f64", ASTROVL_VALUE_F64, INT64_MAX, 0, 1e300, -1e-300}
    };
    static const char *const strings[] = {"a", "", "\xE2\x96\x81the", "<0x0A>"};
    char key[64];
    int index;
    astrovl_string s;
    for (int i = 0; i < 11; i++) {
        const gguf_expected *e = &expected[i];
        sprintf(key, "test.%s", e->name);
        index = astrovl_gguf_find_kv(f, key);
        CHECK(index >= 0, "%s is missing", key);
        if (index < 0) continue;
        CHECK(astrovl_gguf_kv(f, index)->type == e->type && astrovl_gguf_kv(f, index)->item_type == e->type
              && astrovl_gguf_kv(f, index)->count == 1, "%s", key);
        CHECK(astrovl_gguf_int(f, index, 0) == e->first && astrovl_gguf_float(f, index, 0) == e->f_first, "%s", key);
        CHECK(astrovl_gguf_int(f, index, 1) == 0 && astrovl_gguf_string(f, index, 0).size == 0, "%s", key);
        sprintf(key, "test.array.%s", e->name);
        index = astrovl_gguf_find_kv(f, key);
        CHECK(index >= 0, "%s is missing", key);
        if (index < 0) continue;
        CHECK(astrovl_gguf_kv(f, index)->type == ASTROVL_VALUE_ARRAY && astrovl_gguf_kv(f, index)->item_type == e->type
              && astrovl_gguf_kv(f, index)->count == 3, "%s", key);
        CHECK(astrovl_gguf_int(f, index, 0) == e->first && astrovl_gguf_float(f, index, 2) == e->f_first, "%s", key);
        CHECK(astrovl_gguf_int(f, index, 1) == e->second && astrovl_gguf_float(f, index, 1) == e->f_second, "%s", key);
        CHECK(astrovl_gguf_int(f, index, 3) == 0 && astrovl_gguf_float(f, index, UINT64_MAX) == 0, "%s: its end", key);
    }
    index = astrovl_gguf_find_kv(f, "test.array.string");
    CHECK(index >= 0, "the array of texts is missing");
    if (index < 0) return;
    CHECK(astrovl_gguf_kv(f, index)->item_type == ASTROVL_VALUE_STRING, "the array of texts");
    CHECK(astrovl_gguf_kv(f, index)->count == 4, "the array of texts");
    for (int i = 0; i < 5; i++) {
        s = astrovl_gguf_string(f, index, (uint64_t)i);
        CHECK(s.size == (i < 4 ? strlen(strings[i]) : 0), "text %d", i);
        CHECK(i == 4 || memcmp(s.data, strings[i], s.size) == 0, "text %d", i);
        CHECK(astrovl_gguf_int(f, index, (uint64_t)i) == 0, "text %d as a number", i);
        CHECK(astrovl_gguf_float(f, index, (uint64_t)i) == 0, "text %d as a number", i);
    }
    s = astrovl_gguf_string(f, astrovl_gguf_find_kv(f, "test.string"), 0);
    CHECK(s.size == 18 && memcmp(s.data, "Crab Nebula \xE2\x98\x84 M1", 18) == 0, "%d bytes", (int)s.size);
}

// The tensors hold the first blocks of types.gold.
static void gguf_check_tensors(const astrovl_gguf *f) {
    static const int64_t rows[4][3] = {{1, 1, 1}, {4, 1, 1}, {2, 2, 1}, {2, 1, 2}};
    size_t size, at = 0;
    unsigned char *gold = read_file("test/golden/types.gold", &size);
    CHECK(astrovl_gguf_n_tensors(f) == 13, "%d tensors", astrovl_gguf_n_tensors(f));
    for (int i = 0; i < 13 && !g_test_failed; i++) {
        int type = (int)avl__load_u32(gold + at), n = (int)avl__load_u32(gold + at + 4), n_dims = i % 4 + 1;
        char name[32];
        sprintf(name, "tensor.%s", astrovl_type_name(type));
        const astrovl_tensor *t = astrovl_gguf_find_tensor(f, name);
        CHECK(t && t == astrovl_gguf_tensor(f, i), "%s", name);
        if (!t) break;
        CHECK((int)t->type == type && t->n_dims == n_dims && strcmp(t->name, name) == 0, "%s is another", name);
        CHECK(memcmp(t->ne + 1, rows[n_dims - 1], sizeof *rows) == 0, "%s has another shape", name);
        CHECK(memcmp(t->data, gold + at + 8, (size_t)t->n_bytes) == 0, "%s has other data", name);
        at += 8 + astrovl_type_row_bytes(type, n) + (size_t)n * 4;
    }
    free(gold);
}

// One golden file: mapped, read, and from memory at an odd address, as version 3 and patched to version 2.
static void test_gguf_golden(void) {
    static const char path[] = "test/golden/types_le.gguf";
    size_t size;
    unsigned char *data = read_file(path, &size), *odd = (unsigned char *)malloc(size + 1);
    if (!odd) exit(1);
    memcpy(odd + 1, data, size);
    for (int way = 0; way < 4; way++) {
        astrovl_error err;
        astrovl_gguf *f;
        if (way == 3) odd[1 + 4] = 2;
        f = way < 2 ? astrovl_gguf_open(path, way, &err) : astrovl_gguf_open_memory(odd + 1, size, NULL, &err);
        CHECK(f, "%s: %s", path, err.message);
        if (!f) break;
        CHECK(astrovl_gguf_version(f) == (way == 3 ? 2 : 3) && astrovl_gguf_size(f) == size, "way %d", way);
        CHECK(strcmp(astrovl_gguf_name(f), way < 2 ? path : "(memory)") == 0, "way %d", way);
        gguf_check_metadata(f);
        gguf_check_tensors(f);
        gguf_walk(f);
        astrovl_gguf_close(f);
    }
    free(odd);
    free(data);
}

static void test_gguf_big_endian(void) {
    astrovl_error err;
    CHECK(!astrovl_gguf_open("test/golden/types_be.gguf", 0, &err) && err.status == ASTROVL_ERROR_UNSUPPORTED &&
          strstr(err.message, "types_be.gguf: header at byte 4: this file is big-endian"), "%s", err.message);
}

// ---- files made here ------------------------------------------------------------------------------------------------

#define GGUF_EMPTY "i3 q0 q0 "
#define GGUF_KEY   "i3 q0 q1 "
#define GGUF_ONE   "i3 q1 q0 "
#define GGUF_TWO   "i3 q2 q0 "

static void test_gguf_good(void) {
    static const char *const files[] = {
        GGUF_EMPTY, "i2 q0 q0",
        GGUF_KEY "'k i8 'text", GGUF_KEY "'k i9 i8 q0", GGUF_KEY "'k i9 i0 q0", GGUF_KEY "'k i9 i7 q3 b0 b1 b2",
        GGUF_KEY "x65535 i0 b1",
        GGUF_KEY "'k i8 q3 b0 b255 b10",                               // a value may hold any bytes
        GGUF_ONE "'t i1 q1 i0 q0 a32 f1",                              // one float
        GGUF_ONE "'t i0 i0 q0 a32 f1",                                 // without dimensions: a single value
        GGUF_ONE "x1024 i1 q1 i0 q0 a32 f1",
        GGUF_ONE "'t i4 q32 q1 q2 q3 i2 q0 a32 z108",                  // six blocks of Q4_0
        GGUF_TWO "'a i1 q9 i0 q0 'b i1 q1 i0 q64 a32 z68",
        GGUF_TWO "'a i1 q9 i23 q0 'b i1 q1 i0 q64 a32 z68",            // a type that is not known: what is left
        GGUF_ONE "'t i4 q512 q1 q2 q1 i1000 q0 a32 z300",
        "i3 q1 q1 'general.alignment i4 i1 't i1 q1 i0 q0 f1",         // aligned to 1
        "i3 q1 q1 'general.alignment i10 q4096 't i1 q1 i0 q0 a4096 f1"
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        gguf_bytes b = gguf_make(files[i]);
        astrovl_error err;
        CHECK(gguf_try(b.data, b.size, &err), "%s: %s", files[i], err.message);
        free(b.data);
    }
}

// Each line breaks one rule: the message must say where and what.
static void test_gguf_bad(void) {
    enum { F = ASTROVL_ERROR_FORMAT, U = ASTROVL_ERROR_UNSUPPORTED };
    static const struct { const char *file; int status; const char *where, *what; } cases[] = {
        // header
        {"i1 i0 i0", U, "m.gguf: header at byte 4: ", "GGUF version 1; 2 and 3 are supported (convert"},
        {"i4 q0 q0", U, "header at byte 4: ", "GGUF version 4"},
        {"i0 q0 q0", U, "header at byte 4: ", "GGUF version 0"},
        {"b0 b0 b0 b3 q0 q0", U, "header at byte 4: ", "this file is big-endian"},
        {"b0 b0 b0 b1 q0 q0", U, "header at byte 4: ", "this file is big-endian"},
        {"h3", F, "header at byte 4: ", "1 x 4 bytes belong here, but the file ends at byte 6 (an incomplete download?)"},
        {"i3 i0", F, "header at byte 8: ", "1 x 8 bytes belong here, but the file ends at byte 12"},
        {"i3 q0 i0", F, "header at byte 16: ", "the file ends"},
        {"i3 q1 q0 z24", F, "tensor at byte 24: ", "its name has 0 bytes; 1 to 1024 are allowed"},
        {"i3 q2 q0 z41", F, "header at byte 8: ", "announces 2 tensors, too many for a file of 65 bytes"},
        {"i3 q0 q2 z27", F, "header at byte 16: ", "announces 2 metadata entries, too many for a file of 51 bytes"},
        {"i3 q-1 q0", F, "header at byte 8: ", "tensors, too many"},
        {"i3 q0 q0x8000000000000000", F, "header at byte 16: ", "metadata entries, too many"},
        // keys and their values
        {GGUF_KEY "q99 z20", F, "key at byte 32: ", "99 x 1 bytes belong here, but the file ends at byte 52"},
        {GGUF_KEY "q-1 z20", F, "key at byte 24: ", "its name has 18446744073709551615 bytes; 1 to 65535 are allowed"},
        {GGUF_KEY "q0 z20", F, "key at byte 24: ", "its name has 0 bytes"},
        {GGUF_KEY "x65536 i0 b0", F, "key at byte 24: ", "its name has 65536 bytes"},
        {GGUF_KEY "q3 \"a b0 \"c i0 b0", F, "key at byte 32: ", "its name has a zero byte"},
        {GGUF_KEY "'key z2 z1", F, "key 'key' at byte 35: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i13 b0", F, "key 'key' at byte 35: ", "there is no value type 13"},
        {GGUF_KEY "'key i-1 b0", F, "key 'key' at byte 35: ", "there is no value type 4294967295"},
        {GGUF_KEY "'key i10 i0", F, "key 'key' at byte 39: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i8 i0", F, "key 'key' at byte 39: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i8 q2 b0", F, "key 'key' at byte 47: ", "2 x 1 bytes"},
        {GGUF_KEY "'key i9 h0", F, "key 'key' at byte 39: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i9 i13 q0", F, "key 'key' at byte 39: ", "there is no value type 13"},
        {GGUF_KEY "'key i9 i9 q0", U, "key 'key' at byte 39: ", "arrays of arrays"},
        {GGUF_KEY "'key i9 i0 i0", F, "key 'key' at byte 43: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i9 i0 q2 b0", F, "key 'key' at byte 51: ", "2 x 1 bytes belong here"},
        {GGUF_KEY "'key i9 i10 q0x2000000000000001 q0 q0", F, "key 'key' at byte 51: ", "2305843009213693953 x 8 bytes"},
        {GGUF_KEY "'key i9 i8 q3 q0 q0 z7", F, "key 'key' at byte 51: ", "3 x 8 bytes belong here"},
        {GGUF_KEY "'key i9 i8 q2 q8 z8", F, "key 'key' at byte 67: ", "belong here, but the file ends at byte"},
        {GGUF_KEY "'key i9 i8 q2 'a q9 z8", F, "key 'key' at byte 68: ", "9 x 1 bytes belong here"},
        {"i3 q0 q3 'key i0 b0 'kex i0 b0 'key i0 b0", F, "key 'key' at byte 72: ", "the same name appears twice"},
        {GGUF_KEY "'general.alignment i4 i0", F, "key 'general.alignment' at byte 53: ", "it is 0, not a power of two"},
        {GGUF_KEY "'general.alignment i4 i48", F, "'general.alignment'", "it is 48, not a power of two"},
        {GGUF_KEY "'general.alignment i5 i-32", F, "'general.alignment'", "it is -32, not"},
        {GGUF_KEY "'general.alignment i10 q0x200000", F, "'general.alignment'", "it is 2097152, not"},
        {GGUF_KEY "'general.alignment i8 '32", F, "'general.alignment'", "it is 0, not"},
        {GGUF_KEY "'general.alignment i9 i4 q0", F, "'general.alignment'", "it is 0, not"},
        // tensors
        {GGUF_ONE "q99 z30", F, "tensor at byte 32: ", "99 x 1 bytes belong here"},
        {GGUF_ONE "x1025 z30", F, "tensor at byte 24: ", "its name has 1025 bytes; 1 to 1024 are allowed"},
        {GGUF_ONE "q3 \"a b0 \"c z30", F, "tensor at byte 32: ", "its name has a zero byte"},
        {GGUF_ONE "'abcdefghijklmnop z2", F, "tensor 'abcdefghijklmnop' at byte 48: ", "belong here, but the file ends at byte"},
        {GGUF_ONE "'abc i5 z50", F, "tensor 'abc' at byte 35: ", "it has 5 dimensions; 4 are allowed"},
        {GGUF_ONE "'abc i-1 z50", F, "tensor 'abc' at byte 35: ", "it has 4294967295 dimensions"},
        {GGUF_ONE "'abc i2 q1 i0 h0", F, "tensor 'abc' at byte 47: ", "belong here, but the file ends at byte"},
        {GGUF_ONE "'abc i2 q1 q0 i0 q0", F, "tensor 'abc' at byte 47: ", "dimension 1 is 0"},
        {GGUF_ONE "'abc i1 q0x8000000000000000 i0 q0", F, "tensor 'abc' at byte 47: ", "a shape of 9223372036854775808 x 1"},
        {GGUF_ONE "'abc i1 q1 h0 h0", F, "tensor 'abc' at byte 51: ", "belong here, but the file ends at byte"},
        {GGUF_ONE "'abc i1 q1 i-1 q0 a32 f1", F, "tensor 'abc' at byte 47: ", "there is no tensor type 4294967295"},
        {GGUF_ONE "'abc i1 q4097 i4 q0 a32 f1", F, "tensor 'abc' at byte 47: ", "in a type unknown here needs more than"},
        {GGUF_TWO "'a i1 q1 i99 q0 'b i1 q1 i0 q16 a32 z64", F, "tensor 'b' at byte 128: ", "at offset 16; it must follow"},
        {GGUF_TWO "'a i1 q1 i99 q0 'b i1 q1 i0 q-32 a32 z64", F, "tensor 'a' at byte 96: ", "18446744073709551584 x 1 bytes"},
        {GGUF_TWO "'a i1 q1 i99 q0 'b i1 q1 i0 q96 a32 z64", F, "tensor 'a' at byte 96: ", "96 x 1 bytes belong here"},
        {GGUF_ONE "'abc i1 q33 i2 q0 a32 z36", F, "tensor 'abc' at byte 47: ",
         "rows of 33 values cannot be of type Q4_0, which has blocks of 32"},
        {GGUF_ONE "'abc i1 q128 i14 q0 a32 z210", F, "tensor 'abc' at byte 47: ", "blocks of 256"},
        {GGUF_ONE "'abc i4 q4 q4 q4 q4 i0 q0 a32 z64", F, "tensor 'abc' at byte 71: ",
         "a shape of 4 x 4 x 4 x 4 in F32 needs more than the file's 160 bytes"},
        {GGUF_ONE "'abc i2 q0x100000000 q0x40000000 i0 q0 a32 f1", F, "tensor 'abc' at byte 55: ", "needs more than"},
        {GGUF_ONE "'abc i1 q0x7FFFFFFFFFFFFFFF i0 q0 a32 f1", F, "tensor 'abc' at byte 47: ", "needs more than"},
        {GGUF_ONE "'abc i4 q1 q0x80000000 q0x80000000 q4 i0 q0 a32 f1", F, "tensor 'abc' at byte 71: ", "needs more"},
        {GGUF_ONE "'abc i1 q1 i0 h0", F, "tensor 'abc' at byte 51: ", "belong here, but the file ends at byte"},
        {GGUF_ONE "'abc i1 q1 i0 q16 a32 z64", F, "tensor 'abc' at byte ",
         "its data is at offset 16; it must follow the data before, at 0"},
        {GGUF_ONE "'abc i1 q1 i0 q0 a32 z3", F, "tensor 'abc' at byte ",
         "4 x 1 bytes belong here, but the file ends at byte 67 (an incomplete download?)"},
        {GGUF_ONE "'abcd i1 q1 i0 q0", F, "tensor 'abcd' at byte ", "4 x 1 bytes belong here"},   // ends unpadded
        {GGUF_ONE "'abc i1 q1 i0 q64 a32 z64", F, "tensor 'abc' at byte ", "at offset 64; it must follow the data before, at 0"},
        {GGUF_ONE "'abc i1 q1 i0 q-32 a32 z64", F, "tensor 'abc' at byte ", "at offset 18446744073709551584; it must"},
        {GGUF_TWO "'a i1 q9 i0 q0 'b i1 q1 i0 q32 a32 z128", F, "tensor 'b' at byte 160: ", "at offset 32; it must follow"},
        {GGUF_TWO "'a i1 q1 i0 q32 'b i1 q1 i0 q0 a32 z64", F, "tensor 'a' at byte 96: ", "at offset 32; it must follow"},
        {GGUF_TWO "'b i1 q1 i0 q32 'b i1 q1 i0 q0 a32 z64", F, "tensor 'b' at byte ", "the same name appears twice"}
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gguf_bytes b = gguf_make(cases[i].file);
        astrovl_error err;
        CHECK(!gguf_try(b.data, b.size, &err), "%s was opened", cases[i].file);
        CHECK((int)err.status == cases[i].status, "%s: %s", cases[i].file, astrovl_status_name(err.status));
        CHECK(strstr(err.message, cases[i].where), "%s: %s", cases[i].file, err.message);
        CHECK(strstr(err.message, cases[i].what), "%s: %s", cases[i].file, err.message);
        free(b.data);
    }
}

static void test_gguf_other_files(void) {
    astrovl_error err;
    char name[2000] = "/tmp/";
    int i;
    gguf_bytes b = gguf_make(GGUF_ONE "x1000 i1 q33 i2 q0 a32 z36");
    CHECK(!gguf_try((const unsigned char *)"", 0, &err) && err.status == ASTROVL_ERROR_FORMAT
          && strstr(err.message, "not a GGUF"), "an empty block: %s", err.message);
    CHECK(!gguf_try((const unsigned char *)"version https://git-lfs.github.com/spec/v1\noid", 46, &err) &&
          strstr(err.message, "git lfs pull"), "a pointer: %s", err.message);
    CHECK(!gguf_try((const unsigned char *)"GGML\3\0\0\0", 8, &err) && err.status == ASTROVL_ERROR_FORMAT
          && strstr(err.message, "does not begin with \"GGUF\""), "another magic: %s", err.message);
    CHECK(!astrovl_gguf_open("test/golden/no-such.gguf", 0, &err) && err.status == ASTROVL_ERROR_FILE
          && strstr(err.message, "no-such.gguf"), "a missing file: %s", err.message);
    CHECK(!astrovl_gguf_open("test/golden", 0, &err) && err.status == ASTROVL_ERROR_FILE, "a folder: %s", err.message);
    CHECK(!astrovl_gguf_open("test/golden/types.gold", 0, &err) && err.status == ASTROVL_ERROR_FORMAT, "types.gold");
#if AVL__POSIX
    CHECK(!astrovl_gguf_open("/dev/zero", 0, &err) && err.status == ASTROVL_ERROR_FILE && strstr(err.message, "is a device"),
          "%s", err.message);
#endif
    CHECK(!astrovl_gguf_open(NULL, 0, &err) && err.status == ASTROVL_ERROR_ARGUMENT, "no name");
    CHECK(!astrovl_gguf_open_memory(NULL, 10, NULL, &err) && err.status == ASTROVL_ERROR_ARGUMENT, "no block");
    CHECK(astrovl_gguf_n_kv(NULL) == 0 && !astrovl_gguf_find_tensor(NULL, "t") && astrovl_gguf_find_kv(NULL, "k") == -1 &&
          astrovl_gguf_int(NULL, 0, 0) == 0 && !astrovl_gguf_name(NULL)[0] && !astrovl_gguf_size(NULL), "no file");
    CHECK(!astrovl_gguf_open("test/golden/types.gold", 0, NULL), "without err");
    // long names are cut, between characters, so that the reason stays readable
    for (i = 0; i < 300; i++) strcat(name, "\xE2\x98\x84");
    strcat(name, "/end.gguf");
    CHECK(!astrovl_gguf_open_memory(b.data, b.size, name, &err), "%s", err.message);
    CHECK(strncmp(err.message, "\xE2\x98\x84", 3) == 0 && strstr(err.message, "/end.gguf: tensor 'xxxx")
          && strstr(err.message, "rows of 33 values cannot be"), "%s", err.message);
    free(b.data);
    astrovl_gguf_close(NULL);
}

static void test_gguf_accessors(void) {
    gguf_bytes b = gguf_make("i3 q0 q7 'nan i6 i0x7FC00000 'inf i12 q0xFFF0000000000000 'big i12 d9.3e18 'int i5 i-5 "
                             "'text i8 'abc 'list i9 i4 q2 i6 i7 'float i6 f0.5");
    astrovl_error err;
    astrovl_gguf *f = astrovl_gguf_open_memory(b.data, b.size, "m", &err);
    CHECK(f, "%s", err.message);
    if (f) {
        CHECK(astrovl_gguf_int(f, 0, 0) == 0 && astrovl_gguf_int(f, 1, 0) == INT64_MIN
              && astrovl_gguf_int(f, 2, 0) == INT64_MAX, "floats that no integer equals");
        CHECK(!astrovl_gguf_kv(f, -1) && !astrovl_gguf_kv(f, 7), "no such entry");
        CHECK(astrovl_gguf_kv(f, 4)->n_bytes == 11 && memcmp((const char *)astrovl_gguf_kv(f, 4)->data + 8, "abc", 3) == 0 &&
              astrovl_gguf_kv(f, 5)->n_bytes == 8 && *(const char *)astrovl_gguf_kv(f, 5)->data == 6, "values as in the file");
        CHECK(!astrovl_gguf_tensor(f, 0) && !astrovl_gguf_tensor(f, -1), "no such tensor");
        CHECK(!astrovl_gguf_find_tensor(f, "x") && !astrovl_gguf_find_tensor(f, NULL), "no such tensor name");
        CHECK(astrovl_gguf_find_kv(f, "") == -1 && astrovl_gguf_find_kv(f, "zzz") == -1
              && astrovl_gguf_find_kv(f, NULL) == -1, "no such key");
        CHECK(astrovl_gguf_int(f, 7, 0) == 0 && astrovl_gguf_float(f, -1, 0) == 0
              && astrovl_gguf_string(f, 99, 0).size == 0, "values of no entry");
    }
    astrovl_gguf_close(f);
    free(b.data);
}

static int gguf_number_order(const void *context, int a, int b) {
    return ((const int *)context)[a] - ((const int *)context)[b];
}

static void test_gguf_sort(void) {
    static int numbers[3000], order[3000];
    uint64_t state = 7;
    int n, i, kind, bad = 0;
    for (n = 0; n < 3000; n = n < 20 ? n + 1 : n * 2)
        for (kind = 0; kind < 4; kind++) {   // ascending, descending, random, few different
            int seen = 0;
            for (i = 0; i < n; i++) {
                numbers[i] = kind == 0 ? i : kind == 1 ? -i : (int)random_below(&state, kind == 2 ? 1000000 : 3);
                order[i] = i;
            }
            avl__sort(order, n, gguf_number_order, numbers);
            for (i = 1; i < n; i++) bad += numbers[order[i - 1]] > numbers[order[i]];
            for (i = 0; i < n; i++) seen += order[i];
            bad += seen != n * (n - 1) / 2;
        }
    CHECK(bad == 0, "%d errors", bad);
}

// A file cut short anywhere fails, except in the zeros after the last tensor.
static void test_gguf_truncation(void) {
    size_t size, n, end = 0;
    unsigned char *data = read_file("test/golden/types_le.gguf", &size);
    astrovl_error err;
    astrovl_gguf *f = astrovl_gguf_open_memory(data, size, NULL, &err);
    const astrovl_tensor *last = astrovl_gguf_tensor(f, astrovl_gguf_n_tensors(f) - 1);
    CHECK(last, "%s", err.message);
    if (last) end = (size_t)(last->offset + last->n_bytes);
    astrovl_gguf_close(f);
    for (n = 0; n < size; n++) {
        int good = gguf_try(data, n, &err);
        CHECK(good == (n >= end), "cut to %d bytes: %s", (int)n, err.message);
        CHECK(good || err.status == ASTROVL_ERROR_FORMAT, "%d bytes: %s", (int)n, err.message);
        CHECK(good || strstr(err.message, "m.gguf: "), "%d bytes: %s", (int)n, err.message);
    }
    free(data);
}

// Random damage: nothing but a clean error or a file that can be read through.
static void test_gguf_fuzz(void) {
    enum { ROUNDS = 20000 };
    size_t size;
    unsigned char *data = read_file("test/golden/types_le.gguf", &size), *copy = (unsigned char *)malloc(size);
    uint64_t seed = 1;
    int round, opened = 0;
    astrovl_error err;
    if (!copy) exit(1);
    for (round = 0; round < ROUNDS; round++) {
        memcpy(copy, data, size);
        mutate(copy, 0, random_below(&seed, 2) ? size : 1800, &seed);   // half of them in the metadata
        if (gguf_try(copy, random_below(&seed, 64) ? size : random_below(&seed, size), &err)) opened++;
        else CHECK(err.status != ASTROVL_OK && err.message[0], "round %d: no message", round);
    }
    CHECK(opened > ROUNDS / 20 && opened < ROUNDS, "%d of %d opened: too little or too much damage", opened, ROUNDS);
    free(copy);
    free(data);
}

static void test_gguf_no_memory(void) {
    int failed;
    long at, live = g_live;
    for (int no_mmap = 0; no_mmap < 2; no_mmap++) {
        astrovl_error err = {ASTROVL_OK, ""};
        astrovl_gguf *f;
        EACH_ALLOCATION(at, failed, f = astrovl_gguf_open("test/golden/types_le.gguf", no_mmap, &err)) {
            CHECK(failed == !f, "allocation %ld", at);
            CHECK(f || err.status == ASTROVL_ERROR_MEMORY, "allocation %ld: %s", at, err.message);
            astrovl_gguf_close(f);
            CHECK(g_live == live, "allocation %ld leaks", at);
        }
        CHECK(at > 40, "only %ld allocations", at);
    }
}

static void tests_gguf(void) {
    run("gguf: golden files", test_gguf_golden);
    run("gguf: unusual but good files", test_gguf_good);
    run("gguf: each broken rule is named", test_gguf_bad);
    run("gguf: other files and long names", test_gguf_other_files);
    run("gguf: big-endian files are refused", test_gguf_big_endian);
    run("gguf: values and names", test_gguf_accessors);
    run("gguf: sorting", test_gguf_sort);
    run("gguf: cut anywhere", test_gguf_truncation);
    run("gguf: random damage", test_gguf_fuzz);
    run("gguf: allocation failures", test_gguf_no_memory);
}

// ---- text -----------------------------------------------------------------------------------------------------------
// test/golden/tokens_*.bin hold what sentencepiece and `tokenizers` make of the texts in tokens_texts.bin, with the small
// vocabularies in vocab_*.gguf (test/make_golden.py, make_tokens).

typedef struct text_case { unsigned char *data; size_t size; } text_case;

typedef struct text_reader { const unsigned char *data; size_t at; } text_reader;

static uint32_t text_u32(text_reader *r) {
    uint32_t value = avl__load_u32(r->data + r->at);
    r->at += 4;
    return value;
}

// The texts of a file written by tokens_write_texts.
static text_case *text_read_all(const char *path, int *n) {
    size_t size;
    unsigned char *file = read_file(path, &size);
    text_reader r = {file, 0};
    text_case *texts;
    *n = (int)text_u32(&r);
    texts = (text_case *)calloc((size_t)*n, sizeof *texts);
    for (int i = 0; i < *n; i++) {
        size_t times = text_u32(&r), length = text_u32(&r), k;
        texts[i].size = times * length;
        texts[i].data = (unsigned char *)calloc(times * length + 1, 1);
        for (k = 0; k < times; k++) memcpy(texts[i].data + k * length, file + r.at, length);
        r.at += length;
    }
    CHECK(r.at == size, "%s: %ld of %ld bytes read", path, (long)r.at, (long)size);
    free(file);
    return texts;
}

static void text_free_all(text_case *texts, int n) {
    for (int i = 0; i < n; i++) free(texts[i].data);
    free(texts);
}

static astrovl_model *text_open(const char *path) {
    astrovl_error err;
    astrovl_model *m = astrovl_open(path, NULL, &err);
    if (!m) {
        fprintf(stderr, "%s: %s\n", path, err.message);
        exit(1);
    }
    return m;
}

// The tokens of a text, malloc'ed.
static int32_t *text_tokens(const astrovl_model *m, const void *text, size_t size, int flags, int *n) {
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t *ids = (int32_t *)malloc((size + 3) * 4 * sizeof *ids);
    *n = astrovl_tokenize(m, (const char *)text, size, flags, ids, (int)(size + 3) * 4, &err);
    CHECK(*n >= 0, "\"%.60s\": %s", (const char *)text, err.message);
    if (*n < 0) *n = 0;
    return ids;
}

// The id of a piece, or -1.
static int32_t text_find(const astrovl_model *m, const char *piece) {
    astrovl_info info;
    astrovl_get_info(m, &info);
    for (int32_t id = 0; id < info.n_vocab; id++) {
        astrovl_string s = astrovl_token_piece(m, id);
        if (s.size == strlen(piece) && memcmp(s.data, piece, s.size) == 0) return id;
    }
    return -1;
}

static uint32_t text_hash(const int32_t *ids, size_t n) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (uint32_t)ids[i]) * 16777619u;
    return hash;
}

// What ids read as: through the gate, without the space that the tokenizer put in front. The texts may hold zero bytes.
static void text_decode(const astrovl_model *m, const int32_t *ids, int n, int space_prefix, avl__bytes *out) {
    avl__utf8_gate gate = {{0}, 0};
    for (int i = 0; i < n; i++) {
        char text[128];
        int size = astrovl_token_text(m, ids[i], text, (int)sizeof text), skip = i == 0 && space_prefix && size > 0 && text[0] == ' ';
        CHECK(size <= (int)sizeof text, "token %d has %d bytes", (int)ids[i], size);
        avl__utf8_gate_put(&gate, text + skip, (size_t)(size - skip), out);
    }
    avl__utf8_gate_flush(&gate, out);
}

static void text_print_ids(const char *what, const int32_t *ids, size_t n) {
    fprintf(stderr, "  %s:", what);
    for (size_t i = 0; i < n && i < 40; i++) fprintf(stderr, " %d", (int)ids[i]);
    fputc('\n', stderr);
}

// Every third piece of vocab_plain.gguf of two and more characters is UNUSED: SentencePiece merges to such a piece and takes
// it apart again, here it is not merged to at all. So texts that spell one (141 of 520) may get other tokens.
static int text_spells_unused(const astrovl_model *m, const text_case *text) {
    char *spelled = (char *)malloc(text->size * 3 + 1);
    size_t i, n = 0;
    int id, found = 0;
    for (i = 0; i < text->size; i++) {
        if (text->data[i] != ' ') spelled[n++] = (char)text->data[i];
        else memcpy(spelled + n, AVL__SPACE_MARK, 3), n += 3;
    }
    for (id = 3; id <= 387 && !found; id += 3) {
        astrovl_string piece = astrovl_token_piece(m, id);
        for (i = 0; i + piece.size <= n && !found; i++) found = memcmp(spelled + i, piece.data, piece.size) == 0;
    }
    free(spelled);
    return found;
}

static void text_check_vocab(const char *name) {
    char path[128];
    size_t size;
    int n_texts, n_cases, n_skipped = 0, i;
    text_case *texts = text_read_all("test/golden/tokens_texts.bin", &n_texts);
    unsigned char *golden;
    text_reader r = {NULL, 0};
    sprintf(path, "test/golden/vocab_%s.gguf", name);
    astrovl_model *m = text_open(path);
    sprintf(path, "test/golden/tokens_%s.bin", name);
    r.data = golden = read_file(path, &size);
    n_cases = (int)text_u32(&r);
    CHECK(n_texts >= 400 && n_cases >= 500, "%s: %d texts, %d cases", name, n_texts, n_cases);
    for (i = 0; i < n_cases; i++) {
        const text_case *text = &texts[text_u32(&r)];
        uint32_t flags = text_u32(&r), n = text_u32(&r), k, decoded;
        int32_t ids[600], *got;
        int n_got, same;
        got = text_tokens(m, text->data, text->size, (int)flags, &n_got);
        if (n > 600) {
            uint32_t hash = text_u32(&r);
            same = n_got == (int)n && text_hash(got, n) == hash;
        } else {
            for (k = 0; k < n; k++, r.at += 2) ids[k] = avl__load_u16(r.data + r.at);
            same = n_got == (int)n && (n == 0 || memcmp(got, ids, n * sizeof *ids) == 0);
        }
        if (!same && strcmp(name, "plain") == 0 && text_spells_unused(m, text)) {
            n_skipped++;
            same = 1;
        }
        CHECK(same, "%s, flags %d: \"%.60s\" (%ld bytes): %d tokens, wanted %ld", name, (int)flags, (char *)text->data,
              (long)text->size, n_got, (long)n);
        if (!same) {
            text_print_ids("got", got, (size_t)n_got);
            if (n <= 600) text_print_ids("wanted", ids, n);
        }
        decoded = text_u32(&r);
        if (decoded != 0xFFFFFFFFu) {   // 0xFFFFFFFE: the text itself
            const unsigned char *want = decoded == 0xFFFFFFFEu ? text->data : golden + r.at;
            size_t want_size = decoded == 0xFFFFFFFEu ? text->size : decoded;
            avl__bytes shown = {NULL, 0, 0, 0};
            text_decode(m, got, n_got, strcmp(name, "spm") == 0, &shown);
            CHECK(shown.size == want_size && (want_size == 0 || memcmp(shown.data, want, want_size) == 0),
                  "%s: \"%.60s\" reads \"%.60s\"", name, (char *)text->data, shown.data ? shown.data : "");
            astrovl_free(shown.data);
            if (decoded != 0xFFFFFFFEu) r.at += decoded;
        }
        free(got);
    }
    CHECK(r.at == size, "%s: %ld of %ld bytes read", name, (long)r.at, (long)size);
    CHECK(n_skipped <= 141, "%s: %d texts get other tokens", name, n_skipped);
    free(golden);
    astrovl_close(m);
    text_free_all(texts, n_texts);
}

static void test_text_spm(void)    { text_check_vocab("spm"); }
static void test_text_plain(void)  { text_check_vocab("plain"); }
static void test_text_gpt2(void)   { text_check_vocab("gpt2"); }
static void test_text_llama3(void) { text_check_vocab("llamabpe"); }
static void test_text_smollm(void) { text_check_vocab("smollm"); }

// Pairs of broken text and what Python's decoder shows, fed whole, byte by byte and in threes: it may not matter.
static void test_text_gate(void) {
    int n;
    text_case *texts = text_read_all("test/golden/tokens_utf8.bin", &n);
    CHECK(n > 1000, "%d texts", n);
    for (int i = 0; i + 1 < n; i += 2) {
        const text_case *text = &texts[i], *want = &texts[i + 1];
        for (size_t step = 1; step <= 10; step += step == 1 ? 2 : 7) {
            avl__bytes got = {NULL, 0, 0, 0};
            avl__utf8_gate gate;
            memset(&gate, 0, sizeof gate);
            for (size_t k = 0; k < text->size; k += step) {
                size_t shown = got.size, length, at;
                avl__utf8_gate_put(&gate, (char *)text->data + k, text->size - k < step ? text->size - k : step, &got);
                CHECK(gate.n_pending <= 3, "text %d: %ld bytes are held back", i, (long)gate.n_pending);
                for (at = shown; at < got.size; at += length)
                    CHECK(avl__utf8_read(got.data + at, got.size - at, &length) >= 0, "text %d: a broken character is shown", i);
            }
            avl__utf8_gate_flush(&gate, &got);
            CHECK(gate.n_pending == 0, "text %d: flush leaves bytes", i);
            CHECK(got.size == want->size && memcmp(got.data, want->data, want->size) == 0, "text %d in steps of %d", i, (int)step);
            astrovl_free(got.data);
        }
    }
    text_free_all(texts, n);
}

// Counts from the Unicode Character Database 16.0, as the engine in `tokenizers` has it.
static void test_text_unicode(void) {
    avl__unicode *u = (avl__unicode *)calloc(1, sizeof *u);
    long classes[5] = {0}, lower = 0, marks = 0, parts = 0, wholes = 0;
    avl__unicode_fill(u);
    for (uint32_t c = 0; c < 0x110000; c++) {
        int value = avl__run_value(u->classes, AVL__CLASS_RUNS, c);
        classes[value < 0 || value > 3 ? 4 : value]++;
        lower += avl__run_value(u->lower, AVL__LOWER_RUNS, c) != 0;
        marks += avl__run_value(u->marks, AVL__MARK_RUNS, c) != 0;
    }
    for (uint32_t c = 0; c < 4096; c++) {
        parts += u->pairs[c].x != 0 && u->pairs[c].b == 0;
        wholes += u->pairs[c].x != 0 && u->pairs[c].b != 0;
    }
    CHECK(classes[AVL__CLASS_LETTER] == 141028 && classes[AVL__CLASS_NUMBER] == 1911 && classes[AVL__CLASS_SPACE] == 25 && !classes[4],
          "%ld letters, %ld numbers, %ld spaces, %ld unknown", classes[1], classes[2], classes[3], classes[4]);
    CHECK(lower == 1487 && marks == 810, "%ld capitals, %ld marks", lower, marks);
    CHECK(parts == 1058 && wholes == 940, "%ld are taken apart, %ld put together", parts, wholes);
    free(u);
}

static void test_text_pieces(void) {
    astrovl_model *m = text_open("test/golden/vocab_spm.gguf");
    astrovl_info info;
    char text[8] = "#######";
    int32_t newline = text_find(m, "<0x0A>"), the = text_find(m, AVL__SPACE_MARK "the"), some[4];
    astrovl_get_info(m, &info);
    CHECK(info.bos_token == 1 && info.eos_token == 2 && info.n_vocab > 256, "special ids");
    CHECK(newline == 16 && the > 0, "<0x0A> is %d, the is %d", newline, the);
    CHECK(astrovl_token_text(m, newline, text, 8) == 1 && text[0] == '\n' && text[1] == '#', "newline");
    CHECK(astrovl_token_text(m, the, text, 2) == 4 && memcmp(text, " t####", 6) == 0, "a piece cut short: %s", text);
    CHECK(astrovl_token_text(m, the, NULL, 0) == 4, "length alone");
    CHECK(astrovl_token_text(m, 0, text, 8) == 0 && astrovl_token_text(m, 1, text, 8) == 0, "special tokens give no text");
    CHECK(astrovl_token_text(m, -1, text, 8) == 0 && astrovl_token_text(m, info.n_vocab, text, 8) == 0, "ids out of range");
    CHECK(astrovl_token_piece(m, -1).size == 0 && astrovl_token_piece(m, info.n_vocab).size == 0 && astrovl_token_piece(m, 1).size == 3, "pieces");
    CHECK(astrovl_token_is_end(m, 2) && !astrovl_token_is_end(m, 1) && !astrovl_token_is_end(m, -1) && !astrovl_token_is_end(m, 1 << 30), "ends");
    CHECK(astrovl_tokenize(m, "the the the", 11, 0, some, 2, NULL) == 3 && some[0] == the && some[1] == the, "room for two");
    CHECK(astrovl_tokenize(NULL, "a", 1, 0, some, 2, NULL) == -1 && astrovl_tokenize(m, NULL, 1, 0, some, 2, NULL) == -1 &&
          astrovl_tokenize(m, "a", 1, 0, NULL, 2, NULL) == -1 && !astrovl_detokenize(NULL, some, 1, NULL) &&
          !astrovl_detokenize(m, NULL, 1, NULL) && astrovl_token_piece(NULL, 1).size == 0 && astrovl_token_text(NULL, 1, text, 8) == 0 &&
          !astrovl_token_is_end(NULL, 2), "NULL");
    astrovl_close(m);
    m = text_open("test/golden/vocab_smollm.gguf");
    astrovl_get_info(m, &info);
    CHECK(astrovl_token_is_end(m, info.eos_token) && astrovl_token_is_end(m, text_find(m, "<|endoftext|>")) &&
          !astrovl_token_is_end(m, info.bos_token), "ends of the chatml vocabulary");
    CHECK(astrovl_token_text(m, text_find(m, "<extra>"), text, 8) == 7 && memcmp(text, "<extra>", 7) == 0, "added token");
    astrovl_close(m);
}

// ---- vocabularies made by hand, in gguf_make's words ----

// Opens a file of these keys.
static astrovl_model *text_make(const char *keys, gguf_bytes *file, astrovl_error *err) {
    char words[2048];
    int n = 0;
    astrovl_memory block;
    for (const char *at = keys; (at = strstr(at, "'tokenizer.ggml.")) != NULL; at++) n++;
    snprintf(words, sizeof words, "i3 q0 q%d %s a32", n, keys);
    *file = gguf_make(words);
    block.data = file->data;
    block.size = file->size;
    block.name = "hand-made";
    err->message[0] = 0;
    return astrovl_open_memory(&block, 1, NULL, err);
}

// Tokenizes text and compares with ids[n].
static void text_expect(const astrovl_model *m, const char *text, int flags, int n, const int *ids) {
    int n_got;
    int32_t *got = text_tokens(m, text, strlen(text), flags, &n_got);
    CHECK(n_got == n, "\"%s\": %d tokens, wanted %d", text, n_got, n);
    for (int i = 0; i < n && i < n_got; i++) CHECK(got[i] == ids[i], "\"%s\"[%d]: %d, wanted %d", text, i, (int)got[i], ids[i]);
    if (n_got != n) text_print_ids("got", got, (size_t)n_got);
    free(got);
}

// Equal scores: the leftmost pair first (0 and -0 are equal). Types are told by spelling. A key may be missing.
static void test_text_hand_made(void) {
    static const int aaa[] = {5, 3}, bab[] = {4, 6}, parsed[] = {1, 5, 2, 4}, whole[] = {1, 4, 4}, unknown[] = {3, 0, 4};
    gguf_bytes file;
    astrovl_error err;
    astrovl_info info;
    astrovl_model *m = text_make("'tokenizer.ggml.model i8 'llama "
        "'tokenizer.ggml.tokens i9 i8 q9 '<unk> '<s> '</s> 'a 'b 'aa 'ab '<0x41> 'a "
        "'tokenizer.ggml.scores i9 i6 q9 f0 f0 f0 f0 f0 f-0.0 f0 f-1 f-2 "
        "'tokenizer.ggml.add_space_prefix i7 b0 'tokenizer.ggml.padding_token_id i4 i9", &file, &err);
    CHECK(m, "%s", err.message);
    if (!m) return;
    astrovl_get_info(m, &info);
    CHECK(info.bos_token == 1 && info.eos_token == 2, "defaults");
    CHECK(astrovl_token_text(m, 7, NULL, 0) == 1 && astrovl_token_text(m, 0, NULL, 0) == 0, "types");
    text_expect(m, "aaa", 0, 2, aaa);
    text_expect(m, "bab", 0, 2, bab);
    text_expect(m, "aa</s>b", ASTROVL_PARSE_SPECIAL | ASTROVL_ADD_SPECIAL, 4, parsed);
    text_expect(m, "bb", ASTROVL_ADD_SPECIAL, 3, whole);
    text_expect(m, "a\xC3\xA9zb", 0, 3, unknown);   // no byte fallback: a run of unknown characters is one token
    astrovl_close(m);
    free(file.data);
}

// The order of the list of merges counts; of two merges that make one token, the first that can be made.
static void test_text_merges(void) {
    static const int abc[] = {4, 2}, abcd[] = {4, 2, 3}, all[] = {5}, bcd[] = {1, 2, 3};
    gguf_bytes file;
    astrovl_error err;
    astrovl_model *m = text_make("'tokenizer.ggml.model i8 'gpt2 'tokenizer.ggml.tokens i9 i8 q7 'a 'b 'c 'd 'ab 'abcd 'abc "
        "'tokenizer.ggml.merges i9 i8 q4 q3 \"a b32 \"b q5 \"abc b32 \"d q4 \"ab b32 \"c q5 \"abc b32 \"d", &file, &err);
    CHECK(m, "%s", err.message);
    if (!m) return;
    text_expect(m, "bcd", 0, 3, bcd);
    text_expect(m, "abcd", 0, 1, all);
    astrovl_close(m);
    free(file.data);
    m = text_make("'tokenizer.ggml.model i8 'gpt2 'tokenizer.ggml.tokens i9 i8 q6 'a 'b 'c 'd 'ab 'abcd "
        "'tokenizer.ggml.merges i9 i8 q1 q3 \"a b32 \"b", &file, &err);
    CHECK(m, "%s", err.message);
    if (!m) return;
    text_expect(m, "abc", 0, 2, abc);
    text_expect(m, "abcd", 0, 3, abcd);   // a token that no merge makes
    astrovl_close(m);
    free(file.data);
}

// A special token's id that is out of range is noted, and the usual token taken; other numbers are taken as they are.
static void test_text_special_ids(void) {
    static const struct { const char *keys; int bos, eos, noted; } cases[] = {
        {" 'tokenizer.ggml.bos_token_id i4 i3 'tokenizer.ggml.eos_token_id i4 i4", 3, 4, 0}, {"", 1, 2, 0},
        {" 'tokenizer.ggml.bos_token_id i4 i5", 1, 2, 1}, {" 'tokenizer.ggml.eos_token_id i5 i-1", 1, 2, 1},
        {" 'tokenizer.ggml.unknown_token_id i4 i-1", 1, 2, 1}, {" 'tokenizer.ggml.eot_token_id i10 q-1", 1, 2, 1},
        {" 'tokenizer.ggml.bos_token_id i10 q0x100000001", 1, 2, 1}};
    static const int unknown[] = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char keys[1024];
        gguf_bytes file;
        astrovl_error err;
        astrovl_info info;
        snprintf(keys, sizeof keys, "'tokenizer.ggml.model i8 'llama 'tokenizer.ggml.tokens i9 i8 q5 '<unk> '<s> '</s> 'a 'aa "
                 "'tokenizer.ggml.scores i9 i6 q5 f0 f0 f0 f-1 f-2 'tokenizer.ggml.add_space_prefix i7 b0%s", cases[i].keys);
        astrovl_model *m = text_make(keys, &file, &err);
        CHECK(m, "%s: %s", cases[i].keys, err.message);
        if (!m) continue;
        astrovl_get_info(m, &info);
        CHECK(info.bos_token == cases[i].bos && info.eos_token == cases[i].eos, "%s: BOS %d, EOS %d", cases[i].keys,
              info.bos_token, info.eos_token);
        CHECK(!info.note == !cases[i].noted, "%s: note \"%s\"", cases[i].keys, info.note ? info.note : "");
        text_expect(m, "z", 0, 1, unknown);
        astrovl_close(m);
        free(file.data);
    }
}

// End marks that a file types as normal text (or unused) end answers all the same, give no text, and are not what a user
// can write; in both kinds of vocabulary.
static void test_text_end_marks(void) {
    static const char *const files[] = {
        "'tokenizer.ggml.model i8 'llama 'tokenizer.ggml.tokens i9 i8 q6 '<unk> '<s> '</s> '<|im_end|> '<|eot_id|> '< "
        "'tokenizer.ggml.scores i9 i6 q6 f0 f0 f0 f0 f0 f0 'tokenizer.ggml.token_type i9 i5 q6 i2 i3 i1 i1 i5 i1 "
        "'tokenizer.ggml.add_space_prefix i7 b0 'tokenizer.ggml.eos_token_id i4 i1",
        "'tokenizer.ggml.model i8 'gpt2 'tokenizer.ggml.tokens i9 i8 q6 'a 'b '</s> '<|im_end|> '<|eot_id|> '< "
        "'tokenizer.ggml.token_type i9 i5 q6 i1 i1 i1 i1 i0 i1 'tokenizer.ggml.merges i9 i8 q0"};
    static const int parsed[] = {3}, typed[] = {5, 0};
    for (int i = 0; i < 2; i++) {
        gguf_bytes file;
        astrovl_error err;
        astrovl_model *m = text_make(files[i], &file, &err);
        CHECK(m, "%s", err.message);
        if (!m) continue;
        for (int id = 2; id < 5; id++)
            CHECK(astrovl_token_is_end(m, id) && astrovl_token_text(m, id, NULL, 0) == 0, "file %d, token %d", i, id);
        CHECK(!astrovl_token_is_end(m, 5) && !astrovl_token_is_end(m, 0), "file %d: other tokens", i);
        text_expect(m, "<|im_end|>", ASTROVL_PARSE_SPECIAL, 1, parsed);
        text_expect(m, "<|im_end|>", 0, i ? 1 : 2, typed);   // "<", and what the vocabulary cannot spell
        astrovl_close(m);
        free(file.data);
    }
}

static void text_put(gguf_bytes *b, const char *text, size_t size) {
    gguf_put_number(b, size, 8);
    gguf_put(b, text, size);
}

// Begins a SentencePiece vocabulary without scores and types: the head, then n pieces are to follow.
static gguf_bytes text_begin(int n_keys, const char *model, int n) {
    char words[200];
    snprintf(words, sizeof words, "i3 q0 q%d 'tokenizer.ggml.model i8 '%s 'tokenizer.ggml.tokens i9 i8 q%d", n_keys, model, n);
    return gguf_make(words);
}

// Puts an array of numbers, `first` n_first times and `rest` for the others.  type: 5 integers, 6 floats (0 alone)
static void text_put_array(gguf_bytes *b, const char *key, int type, int n, int n_first, int first, int rest) {
    text_put(b, key, strlen(key));
    gguf_put_number(b, 9, 4);
    gguf_put_number(b, (uint64_t)type, 4);
    gguf_put_number(b, (uint64_t)n, 8);
    for (int i = 0; i < n; i++) gguf_put_number(b, (uint64_t)(i < n_first ? first : rest), 4);
}

static astrovl_model *text_end(const gguf_bytes *file, astrovl_error *err) {
    const astrovl_memory block = {file->data, file->size, "hand-made"};
    memset(err, 0, sizeof *err);
    return astrovl_open_memory(&block, 1, NULL, err);
}

// 255 byte pieces serve all characters that need no other byte; the byte that is missing is the unknown token.
static void test_text_lacks_a_byte(void) {
    static const int accent[] = {3 + 0xC3 - 1, 3 + 0xA9 - 1}, lacking[] = {3 + 'x', 0, 3 + 'y'};
    gguf_bytes file = text_begin(4, "llama", 258);
    astrovl_error err;
    text_put(&file, "<unk>", 5);
    text_put(&file, "<s>", 3);
    text_put(&file, "</s>", 4);
    for (int byte = 0; byte < 256; byte++) {
        char piece[8];
        snprintf(piece, sizeof piece, "<0x%02X>", (unsigned)byte);
        if (byte != 0x80) text_put(&file, piece, 6);
    }
    text_put_array(&file, "tokenizer.ggml.scores", 6, 258, 0, 0, 0);
    text_put(&file, "tokenizer.ggml.add_space_prefix", 31);
    gguf_put_number(&file, 7, 4);
    gguf_put_number(&file, 0, 1);
    astrovl_model *m = text_end(&file, &err);
    CHECK(m, "%s", err.message);
    if (m) {
        text_expect(m, "\xC3\xA9", 0, 2, accent);
        int n;
        int32_t *ids = text_tokens(m, "x\xE2\x80\x80y", 5, 0, &n);   // E2 80 80: one unknown for the run
        CHECK(n == 4 && ids[0] == lacking[0] && ids[1] == 3 + 0xE2 - 1 && ids[2] == 0 && ids[3] == lacking[2], "%d tokens", n);
        free(ids);
    }
    astrovl_close(m);
    free(file.data);
}

// tokenizer.ggml.pre is missing in files of 2024: a LLaMA-3 vocabulary is recognized by its special tokens, or by its size
// and its BOS; others are read as GPT-2's, with a note.
static void test_text_no_pre(void) {
    for (int i = 0; i < 4; i++) {   // by name, by size and BOS, by size alone, neither
        const int n = i == 1 || i == 2 ? 128256 : 16;
        gguf_bytes file = text_begin(i == 1 ? 4 : 3, "gpt2", n);
        astrovl_error err;
        astrovl_info info;
        static const char *const pieces[] = {"1", "2", "3", "4", "12", "34", "1234", "\xC4\xA0"};
        for (int id = 0; id < n; id++) {
            char piece[32];
            snprintf(piece, sizeof piece, "%s%d", "<|reserved", id);
            if (id < 8) text_put(&file, pieces[id], strlen(pieces[id]));
            else if (id == 8 && i == 0) text_put(&file, "<|begin_of_text|>", 17);
            else text_put(&file, piece, strlen(piece));
        }
        text_put(&file, "tokenizer.ggml.merges", 21);
        gguf_put_number(&file, 9, 4);
        gguf_put_number(&file, 8, 4);
        gguf_put_number(&file, 3, 8);
        text_put(&file, "1 2", 3);
        text_put(&file, "3 4", 3);
        text_put(&file, "12 34", 5);
        if (i == 1) {
            text_put(&file, "tokenizer.ggml.bos_token_id", 27);
            gguf_put_number(&file, 4, 4);
            gguf_put_number(&file, 128000, 4);
        }
        astrovl_model *m = text_end(&file, &err);
        CHECK(m, "%d: %s", i, err.message);
        if (m) {
            static const int whole[] = {6}, cut[] = {4, 2, 3};   // LLaMA-3 cuts numbers into threes
            text_expect(m, "1234", 0, i < 2 ? 3 : 1, i < 2 ? cut : whole);
            astrovl_get_info(m, &info);
            CHECK(!info.note == (i < 2) && (i < 2 || strstr(info.note, "tokenizer.ggml.pre")), "%d: \"%s\"", i,
                  info.note ? info.note : "");
        }
        astrovl_close(m);
        free(file.data);
    }
}

// Finds how to end `piece` (5 bytes of a counter, then 5 free) so that it belongs into the first slot of 2048.
static void text_collide(char piece[16], int i) {
    for (uint32_t free_bytes = 0; ; free_bytes++) {
        snprintf(piece, 16, "%05x%05x", (unsigned)i, (unsigned)free_bytes);
        const uint32_t hash = avl__hash(AVL__HASH_START, piece, 10);
        if (((hash ^ hash >> 15) & 0x7FF) == 0) return;
    }
}

// A vocabulary that was made to collide is refused, soon; one that collides a little is not, and finds its pieces.
static void test_text_collisions(void) {
    for (int n = 100; n <= 1000; n += 900) {
        gguf_bytes file = text_begin(3, "llama", n);
        astrovl_error err;
        char piece[16];
        for (int i = 0; i < n; i++) {
            text_collide(piece, i);
            text_put(&file, piece, 10);
        }
        text_put_array(&file, "tokenizer.ggml.scores", 6, n, 0, 0, 0);
        const clock_t start = clock();
        astrovl_model *m = text_end(&file, &err);
        CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 1.0, "%d colliding pieces: slow", n);
        CHECK(n == 100 ? m != NULL : !m && err.status == ASTROVL_ERROR_LIMIT && strstr(err.message, "tokens"), "%d: %s", n,
              err.message);
        for (int i = 0; m && i < n; i++) {
            text_collide(piece, i);
            CHECK(text_find(m, piece) == i && avl__vocab_find(&m->vocab, piece, 10) == i, "piece %d", i);
        }
        astrovl_close(m);
        free(file.data);
    }
}

// A special token may have 256 bytes, no more: every place of a text is compared with it.
static void test_text_long_special(void) {
    for (int n = 256; n <= 257; n++) {
        gguf_bytes file = text_begin(4, "gpt2", 2);
        astrovl_error err;
        char piece[300], *text = (char *)malloc(1 << 20);
        memset(piece, '<', sizeof piece);
        memset(text, '<', 1 << 20);
        text_put(&file, "<", 1);
        text_put(&file, piece, (size_t)n);
        text_put_array(&file, "tokenizer.ggml.token_type", 5, 2, 1, 1, 3);
        text_put(&file, "tokenizer.ggml.merges", 21);
        gguf_put_number(&file, 9, 4);
        gguf_put_number(&file, 8, 4);
        gguf_put_number(&file, 0, 8);
        astrovl_model *m = text_end(&file, &err);
        CHECK(n == 256 ? m != NULL : !m && err.status == ASTROVL_ERROR_LIMIT && strstr(err.message, "tokens[1]"), "%d: %s", n,
              err.message);
        if (m) {
            const int n_tokens = astrovl_tokenize(m, text, 1 << 20, ASTROVL_PARSE_SPECIAL, NULL, 0, &err);
            CHECK(n_tokens == (1 << 20) / 256, "%d tokens", n_tokens);
            CHECK(astrovl_tokenize(m, text, 255, ASTROVL_PARSE_SPECIAL, NULL, 0, &err) == 255, "one byte less");
        }
        astrovl_close(m);
        free(file.data);
        free(text);
    }
}

#define T_LLAMA  " 'tokenizer.ggml.model i8 'llama"
#define T_GPT2   " 'tokenizer.ggml.model i8 'gpt2"
#define T_TOKENS " 'tokenizer.ggml.tokens i9 i8 q5 '<unk> '<s> '</s> 'a 'aa"
#define T_SCORES " 'tokenizer.ggml.scores i9 i6 q5 f0 f0 f0 f-1 f-2"
#define T_TYPES  " 'tokenizer.ggml.token_type i9 i5 q5 i2 i3 i3 i1 i1"
#define T_MERGES " 'tokenizer.ggml.merges i9 i8 "
#define T_GOOD   T_LLAMA T_TOKENS T_SCORES T_TYPES

// Damaged vocabularies, the status, and a word that the message must hold.
static const struct { const char *keys; astrovl_status status; const char *word; } text_damages[] = {
    {T_TOKENS T_SCORES, ASTROVL_ERROR_MODEL, ""},
    {" 'tokenizer.ggml.model i4 i1" T_TOKENS T_SCORES, ASTROVL_ERROR_FORMAT, "model"},
    {" 'tokenizer.ggml.model i8 'unigram" T_TOKENS T_SCORES, ASTROVL_ERROR_UNSUPPORTED, "unigram"},
    {T_GPT2 " 'tokenizer.ggml.pre i8 'martian" T_TOKENS, ASTROVL_ERROR_UNSUPPORTED, "martian"},
    {T_LLAMA T_SCORES, ASTROVL_ERROR_MODEL, "tokens"},
    {T_LLAMA " 'tokenizer.ggml.tokens i8 'abc" T_SCORES, ASTROVL_ERROR_FORMAT, "tokens"},
    {T_LLAMA " 'tokenizer.ggml.tokens i9 i6 q2 f0 f1" T_SCORES, ASTROVL_ERROR_FORMAT, "tokens"},
    {T_LLAMA " 'tokenizer.ggml.tokens i9 i8 q0" T_SCORES, ASTROVL_ERROR_FORMAT, "tokens"},
    {T_LLAMA " 'tokenizer.ggml.tokens i9 i8 q0x1000000000000000" T_SCORES, ASTROVL_ERROR_FORMAT, ""},
    {T_LLAMA T_TOKENS " 'tokenizer.ggml.scores i9 i6 q4 f0 f0 f0 f-1" T_TYPES, ASTROVL_ERROR_FORMAT, "scores"},
    {T_LLAMA T_TOKENS T_TYPES, ASTROVL_ERROR_FORMAT, "scores"},
    {T_LLAMA T_TOKENS " 'tokenizer.ggml.scores i9 i5 q5 i2 i3 i3 i1 i1", ASTROVL_ERROR_FORMAT, "scores"},
    {T_LLAMA T_TOKENS " 'tokenizer.ggml.scores i9 i6 q5 f0 f0 f0 f-1 i0x7FC00000", ASTROVL_ERROR_FORMAT, "scores[4]"},
    {T_LLAMA T_TOKENS T_SCORES " 'tokenizer.ggml.token_type i9 i5 q6 i2 i3 i3 i1 i1 i1", ASTROVL_ERROR_FORMAT, "token_type"},
    {T_LLAMA T_TOKENS T_SCORES " 'tokenizer.ggml.token_type i9 i6 q5 f0 f0 f0 f-1 f-2", ASTROVL_ERROR_FORMAT, "token_type"},
    {T_LLAMA T_TOKENS T_SCORES " 'tokenizer.ggml.token_type i9 i5 q5 i2 i3 i3 i1 i7", ASTROVL_ERROR_FORMAT, "token_type[4]"},
    {T_LLAMA T_TOKENS T_SCORES " 'tokenizer.ggml.token_type i9 i5 q5 i2 i3 i3 i-1 i1", ASTROVL_ERROR_FORMAT, "token_type[3]"},
    {T_GOOD " 'tokenizer.ggml.unknown_token_id i8 '0", ASTROVL_ERROR_FORMAT, "unknown_token_id"},
    {T_GOOD " 'tokenizer.ggml.add_bos_token i8 'yes", ASTROVL_ERROR_FORMAT, "add_bos_token"},
    {T_GPT2 T_TOKENS, ASTROVL_ERROR_FORMAT, "merges"},
    {T_GPT2 T_TOKENS " 'tokenizer.ggml.merges i9 i6 q1 f0", ASTROVL_ERROR_FORMAT, "merges"},
    {T_GPT2 T_TOKENS T_MERGES "q2 q3 \"a b32 \"a 'aa", ASTROVL_ERROR_FORMAT, "merges[1]"},
    {T_GPT2 T_TOKENS T_MERGES "q1 q3 \"a b32 \"b", ASTROVL_ERROR_FORMAT, "merges[0]"},
    {T_GPT2 T_TOKENS T_MERGES "q1 q1 b32", ASTROVL_ERROR_FORMAT, "merges[0]"},
    {T_GPT2 " 'tokenizer.ggml.tokens i9 i8 q3 'a 'aa 'aaa" T_MERGES "q2 q4 \"aa b32 \"a q3 \"a b32 \"a", ASTROVL_ERROR_FORMAT, "\"aaa\""},
};

static void test_text_damaged(void) {
    for (size_t i = 0; i < sizeof text_damages / sizeof *text_damages; i++) {
        gguf_bytes file;
        astrovl_error err = {ASTROVL_OK, ""};
        astrovl_model *m = text_make(text_damages[i].keys, &file, &err);
        CHECK(!m && err.status == text_damages[i].status, "%s: status %s (%s)", text_damages[i].keys, astrovl_status_name(err.status), err.message);
        CHECK(strstr(err.message, text_damages[i].word) && strstr(err.message, "hand-made"), "%s: the message is \"%s\"",
              text_damages[i].keys, err.message);
        astrovl_close(m);
        free(file.data);
    }
}

// Opens and tokenizes with the k-th allocation failing, for every k.
static void text_starve(const char *path, const char *text) {
    astrovl_error err;
    int32_t ids[400];
    astrovl_model *m;
    const int flags = ASTROVL_PARSE_SPECIAL | ASTROVL_ADD_SPECIAL;
    long k;
    int failed, n;
    EACH_ALLOCATION(k, failed, m = astrovl_open(path, NULL, &err),
                    n = m ? astrovl_tokenize(m, text, strlen(text), flags, ids, 400, &err) : -1) {
        CHECK(failed ? n == -1 && err.status == ASTROVL_ERROR_MEMORY : m && n > 20, "%s: allocation %ld: %s", path, k,
              err.message);
        astrovl_close(m);
    }
    CHECK(k >= 12, "%s: only %ld allocations", path, k);
}

static void test_text_no_memory(void) {
    static const char text[] = "What is a galaxy? There's one in the image, I'd say.</s><|im_end|>\n  \xE4\xB8\xAD \xF0\x9F\x98\x80 12345 unfathomable";
    text_starve("test/golden/vocab_spm.gguf", text);
    text_starve("test/golden/vocab_plain.gguf", text);
    text_starve("test/golden/vocab_llamabpe.gguf", text);
    text_starve("test/golden/vocab_smollm.gguf", text);
}

// A word of 200,000 letters: read back, and done in far less than the minute that a quadratic method would take.
static void text_check_long(const char *path) {
    enum { SIZE = 200000 };
    astrovl_model *m = text_open(path);
    char *text = (char *)malloc(SIZE + 1), *back;
    uint32_t random = 1;
    int n;
    for (int i = 0; i < SIZE; i++) {
        random = random * 1664525u + 1013904223u;
        text[i] = "aeinorst"[random >> 29];
    }
    text[SIZE] = 0;
    int32_t *ids = text_tokens(m, text, SIZE, 0, &n);
    back = astrovl_detokenize(m, ids, n, NULL);
    CHECK(back && strcmp(back, text) == 0 && n < SIZE * 9 / 10, "%s: %d tokens", path, n);
    astrovl_free(back);
    free(ids);
    free(text);
    astrovl_close(m);
}

static void test_text_long(void) {
    text_check_long("test/golden/vocab_spm.gguf");
    text_check_long("test/golden/vocab_llamabpe.gguf");
}

// Damaged files: opening fails with a message or works, and then whatever text gives valid ids.
static void text_mutate(const char *path, int runs) {
    static const char text[] = "<s> Hello <image>a </s>\nWhat's  12?<|im_end|>\xF0\x9F\x98\x80\xFF   \xE4\xB8\xAD";
    size_t size;
    unsigned char *original = read_file(path, &size), *copy = (unsigned char *)malloc(size);
    uint64_t random = 7;
    int run, loaded = 0, i, n;
    for (run = 0; run < runs; run++) {
        astrovl_error err;
        astrovl_info info;
        astrovl_memory block;
        memcpy(copy, original, size);
        mutate(copy, 0, size, &random);
        block.data = copy;
        block.size = random_below(&random, 16) ? size : random_below(&random, size);
        block.name = "mutant";
        err.message[0] = 0;
        astrovl_model *m = astrovl_open_memory(&block, 1, NULL, &err);
        CHECK(m || err.message[0], "run %d: no message", run);
        if (!m) continue;
        astrovl_get_info(m, &info);
        if (info.has_vocab) {
            int32_t *ids = text_tokens(m, text, sizeof text, run & 3, &n);
            loaded++;
            for (i = 0; i < n; i++) {
                char bytes[4];
                CHECK(ids[i] >= 0 && ids[i] < info.n_vocab, "run %d: id %d", run, (int)ids[i]);
                astrovl_token_text(m, ids[i], bytes, 4);
            }
            free(ids);
        }
        astrovl_close(m);
    }
    CHECK(loaded > runs / 200 && loaded < runs, "%s: %d of %d mutants load", path, loaded, runs);
    free(copy);
    free(original);
}

#ifndef TEXT_MUTANTS
#define TEXT_MUTANTS 1000
#endif
static void test_text_mutants(void) {
    text_mutate("test/golden/vocab_spm.gguf", TEXT_MUTANTS);
    text_mutate("test/golden/vocab_plain.gguf", TEXT_MUTANTS);
    text_mutate("test/golden/vocab_llamabpe.gguf", TEXT_MUTANTS);
    text_mutate("test/golden/vocab_smollm.gguf", TEXT_MUTANTS);
}

static void tests_text(void) {
    run("text: SentencePiece ids and text equal the reference's", test_text_spm);
    run("text: SentencePiece without byte fallback, with unused pieces", test_text_plain);
    run("text: GPT-2's byte-level BPE", test_text_gpt2);
    run("text: LLaMA-3's byte-level BPE", test_text_llama3);
    run("text: SmolLM's byte-level BPE", test_text_smollm);
    run("text: only whole characters pass the UTF-8 gate", test_text_gate);
    run("text: Unicode's tables", test_text_unicode);
    run("text: pieces, bytes and ends", test_text_pieces);
    run("text: a vocabulary made by hand", test_text_hand_made);
    run("text: the order of merges", test_text_merges);
    run("text: special ids out of range are noted", test_text_special_ids);
    run("text: end marks typed as normal text", test_text_end_marks);
    run("text: a vocabulary that lacks a byte's piece", test_text_lacks_a_byte);
    run("text: tokenizer.ggml.pre missing", test_text_no_pre);
    run("text: pieces chosen to collide", test_text_collisions);
    run("text: long special tokens", test_text_long_special);
    run("text: damaged vocabularies are refused with their key named", test_text_damaged);
    run("text: every allocation may fail", test_text_no_memory);
    run("text: long words take no quadratic time", test_text_long);
    run("text: mutated files", test_text_mutants);
}


// ---- images -------------------------------------------------------------------------------------------------------
// test/golden/images.pack and images_ops.txt come from make_golden.py: files and what Pillow makes of them.

typedef struct images_file {       // a record of images.pack
    char name[64];
    int width, height, orientation;
    unsigned long crc, crc_upright, size;
    const unsigned char *data;
} images_file;

static unsigned char *g_images_pack;
static size_t g_images_pack_size;

static int images_next(size_t *at, images_file *f) {   // 0 at the end
    int n = 0;
    if (!g_images_pack) g_images_pack = read_file("test/golden/images.pack", &g_images_pack_size);
    if (*at >= g_images_pack_size) return 0;
    if (sscanf((const char *)g_images_pack + *at, "%63s %d %d %d %lx %lx %lu%n", f->name, &f->width, &f->height,
               &f->orientation,
               &f->crc, &f->crc_upright, &f->size, &n) != 7) { fprintf(stderr, "images.pack: broken at %lu\n",
                                                                       (unsigned long)*at); exit(1); }
    f->data = g_images_pack + *at + n + 1;
    *at += (size_t)n + 1 + f->size;
    return 1;
}

static images_file images_find(const char *name) {
    images_file f;
    size_t at = 0;
    while (images_next(&at, &f)) if (strcmp(f.name, name) == 0) return f;
    fprintf(stderr, "images.pack has no %s\n", name);
    exit(1);
}

static unsigned long images_crc(const unsigned char *p, size_t n) {
    unsigned long c = 0xFFFFFFFFul;
    int k;
    while (n--) for (c ^= *p++, k = 0; k < 8; k++) c = c & 1 ? 0xEDB88320ul ^ c >> 1 : c >> 1;
    return c ^ 0xFFFFFFFFul;
}

static unsigned long images_pixels_crc(const astrovl_image *image) {
    return images_crc(image->rgb, (size_t)image->width * (size_t)image->height * 3);
}

// PNM files as text or of single bits are not read; Pillow reads them.
static int images_is_unsupported(const images_file *f) {
    return f->data[0] == 'P' && f->data[1] != '5' && f->data[1] != '6';
}

// Decodes as stored, from a copy of exactly `size` bytes, so that the sanitizers see a read of one byte too many. A failure
// must say why, with a status that fits, and leave no image.
static astrovl_status images_decode(const char *name, const unsigned char *data, size_t size, uint64_t max_pixels,
                                    astrovl_image *image, astrovl_error *err) {
    astrovl_image_options options = {0, 1};
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    if (size) memcpy(copy, data, size);
    options.max_pixels = max_pixels;
    memset(err, 0, sizeof *err);
    astrovl_status status = astrovl_image_decode(copy, size, &options, image, err);
    free(copy);
    if (!status) return status;
    CHECK(status == ASTROVL_ERROR_FORMAT || status == ASTROVL_ERROR_UNSUPPORTED || status == ASTROVL_ERROR_LIMIT,
          "%s: %d", name, status);
    CHECK(err->status == status && err->message[0], "%s: no message", name);
    CHECK(!image->rgb && !image->width, "%s: an image was left", name);
    return status;
}

static astrovl_image images_pattern(int kind, int width, int height) {   // as images_pattern() in the generator
    astrovl_image image;
    image.width = width;
    image.height = height;
    image.orientation = 1;
    image.rgb = (unsigned char *)malloc((size_t)width * (size_t)height * 3);
    for (int y = 0; y < height; y++) for (int x = 0; x < width; x++) for (int c = 0; c < 3; c++) {
        uint32_t h = (uint32_t)x * 73856093u ^ (uint32_t)y * 19349663u ^ (uint32_t)c * 83492791u;
        h = (h ^ h >> 15) * 2654435761u >> 24;
        image.rgb[((size_t)y * (size_t)width + (size_t)x) * 3 + (size_t)c] = (unsigned char)
            (kind == 0 ? h : kind == 1 ? (uint32_t)(x * 5 + y * 3 + c * 80) & 255
                                       : (uint32_t)(x / 3 + y / 2 + c) % 2 * 255);
    }
    return image;
}

static void test_images_files(void) {
    images_file f;
    size_t at = 0;
    int n = 0;
    while (images_next(&at, &f)) {
        astrovl_image image, upright;
        astrovl_error err;
        astrovl_status status = images_decode(f.name, f.data, f.size, 0, &image, &err);
        n++;
        if (images_is_unsupported(&f)) {
            CHECK(status == ASTROVL_ERROR_UNSUPPORTED && strstr(err.message, "PNM"), "%s: %s", f.name, err.message);
            continue;
        }
        CHECK(status == ASTROVL_OK, "%s: %s", f.name, err.message);
        if (status) continue;
        CHECK(image.width == f.width && image.height == f.height, "%s: %d x %d", f.name, image.width, image.height);
        CHECK(image.orientation == f.orientation, "%s: orientation %d", f.name, image.orientation);
        CHECK(images_pixels_crc(&image) == f.crc, "%s: pixels differ from Pillow's", f.name);
        CHECK(astrovl_image_upright(&image, &err) == ASTROVL_OK && image.orientation == 1, "%s", f.name);
        CHECK(images_pixels_crc(&image) == f.crc_upright, "%s: upright differs from Pillow's", f.name);
        CHECK(astrovl_image_decode(f.data, f.size, NULL, &upright, &err) == ASTROVL_OK && upright.orientation == 1 &&
              images_pixels_crc(&upright) == f.crc_upright, "%s: not upright by default", f.name);
        astrovl_image_free(&upright);
        astrovl_image_free(&image);
    }
    CHECK(n >= 150, "only %d files", n);
}

static void test_images_operations(void) {
    FILE *f = fopen("test/golden/images_ops.txt", "r");
    char line[200];
    int n = 0;
    if (!f) { fprintf(stderr, "test/golden/images_ops.txt: cannot be read\n"); exit(1); }
    while (fgets(line, sizeof line, f)) {
        static const unsigned char mean[3] = {122, 116, 104};
        int kind, w, h, out_w = 0, out_h = 0;
        unsigned long crc;
        astrovl_image out;
        astrovl_error err;
        astrovl_status status = ASTROVL_ERROR_FORMAT;
        if (sscanf(line, "pad %d %d %d %lx", &kind, &w, &h, &crc) != 4 &&
            sscanf(line, "%*s %d %d %d %d %d %lx", &kind, &w, &h, &out_w, &out_h,
                   &crc) != 6) { CHECK(0, "%s", line); continue; }
        astrovl_image image = images_pattern(kind, w, h);
        memset(&out, 0, sizeof out);
        memset(&err, 0, sizeof err);
        if (line[0] == 'p') status = astrovl_image_pad_square(&image, mean, &out, &err);
        if (line[0] == 'c') status = astrovl_image_center_crop(&image, out_w, out_h, &out, &err);
        if (line[0] == 'r') status = astrovl_image_resize(&image, out_w, out_h, &out, &err);
        CHECK(status == ASTROVL_OK, "%s: %s", line, err.message);
        if (!status) CHECK(images_pixels_crc(&out) == crc, "differs from Pillow's: %s", line);
        if (!status && out_w) CHECK(out.width == out_w && out.height == out_h, "%s", line);
        astrovl_image_free(&out);
        free(image.rgb);
        n++;
    }
    fclose(f);
    CHECK(n >= 80, "only %d operations", n);
}

// Every prefix of every small file is refused, or holds all pixels already.
static void test_images_truncated(void) {
    images_file f;
    size_t at = 0, size;
    while (images_next(&at, &f)) {
        for (size = 0; size < f.size && f.size <= 900; size++) {
            astrovl_image image;
            astrovl_error err;
            if (images_decode(f.name, f.data, size, 0, &image, &err) == ASTROVL_OK)
                CHECK(images_pixels_crc(&image) == f.crc, "%s: cut off at byte %lu gives other pixels", f.name,
                      (unsigned long)size);
            astrovl_image_free(&image);
        }
    }
}

// Half of a JPEG's scan, or of a PNG's data, is an error: the gray rest is not passed off as an image.
static void test_images_half(void) {
    static const char *const names[] = {"420_37x29.jpg", "420_37x29_prog.jpg", "restart.jpg", "gray.jpg", "c2_8.png",
                                        "c3_4_adam7.png", "p5.pgm", "p6.ppm"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        images_file f = images_find(names[i]);
        astrovl_image image;
        astrovl_error err;
        size_t size = f.size - (names[i][0] == 'p' ? 40 : 120);
        CHECK(images_decode(names[i], f.data, size, 0, &image, &err) == ASTROVL_ERROR_FORMAT, "%s", names[i]);
    }
}

static uint32_t images_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

// Makes the check sums of a changed PNG right again, so that the damage gets past them.
static void images_repair_png(unsigned char *p, size_t size) {
    size_t at = 8, length, k;
    for (; size >= 12 && at <= size - 12; at += length + 12) {
        unsigned long crc;
        length = (size_t)p[at] << 24 | (size_t)p[at + 1] << 16 | (size_t)p[at + 2] << 8 | p[at + 3];
        if (length > size - at - 12) return;
        crc = images_crc(p + at + 4, length + 4);
        for (k = 0; k < 4; k++) p[at + 8 + length + k] = (unsigned char)(crc >> (24 - 8 * k));
    }
}

static void test_images_mutated(void) {
    uint32_t random = 1;
    int round, i, n_ok = 0, n_bad = 0, n_files = 0;
    size_t at = 0;
    images_file files[400];
    while (n_files < 400 && images_next(&at, &files[n_files]))
        if (files[n_files].size < 3000 && !images_is_unsupported(&files[n_files])) n_files++;
    for (round = 0; round < 30000; round++) {
        const images_file *f = &files[round % n_files];
        unsigned char copy[3000];
        size_t size = f->size;
        astrovl_image image;
        astrovl_error err;
        int n = 1 + (int)(images_random(&random) % 4);
        memcpy(copy, f->data, size);
        for (i = 0; i < n; i++)
            copy[images_random(&random) % size] =
                (unsigned char)(images_random(&random) % 3 ? images_random(&random) : 255);
        if (images_random(&random) % 8 == 0) size = images_random(&random) % size;
        if (copy[0] == 0x89) images_repair_png(copy, size);
        if (images_decode(f->name, copy, size, 1 << 20, &image, &err) == ASTROVL_OK) n_ok++; else n_bad++;
        astrovl_image_free(&image);
    }
    CHECK(n_ok > 1000 && n_bad > 1000, "%d decoded, %d refused: the mutations are too strong or too weak", n_ok, n_bad);
}

// Decodes a file with `n` bytes at `at` replaced, a PNG with its check sums repaired; returns the status.
static astrovl_status images_patched(const char *name, size_t at, const char *bytes, size_t n, uint64_t max_pixels,
                                     astrovl_error *err) {
    images_file f = images_find(name);
    unsigned char *copy = (unsigned char *)malloc(f.size);
    astrovl_image image;
    astrovl_status status;
    memcpy(copy, f.data, f.size);
    memcpy(copy + at, bytes, n);
    if (copy[0] == 0x89) images_repair_png(copy, f.size);
    status = images_decode(name, copy, f.size, max_pixels, &image, err);
    astrovl_image_free(&image);
    free(copy);
    return status;
}

// where these bytes first stand in a file
static size_t images_offset(const char *name, const char *bytes, size_t n) {
    images_file f = images_find(name);
    for (size_t at = 0; at + n <= f.size; at++) if (memcmp(f.data + at, bytes, n) == 0) return at;
    fprintf(stderr, "%s lacks some bytes\n", name);
    exit(1);
}

// Small files that claim to be huge: refused by the limit, and without a limit because they hold too little.
static void test_images_bombs(void) {
    size_t sof0 = images_offset("420_37x29.jpg", "\xFF\xC0", 2), sof2 = images_offset("420_37x29_prog.jpg", "\xFF\xC2",
                                                                                      2);
    astrovl_error err;
    for (int pass = 0; pass < 2; pass++) {
        uint64_t limit = pass ? UINT64_MAX : 0;
        astrovl_status wanted = pass ? ASTROVL_ERROR_FORMAT : ASTROVL_ERROR_LIMIT;
        CHECK(images_patched("c6_16.png", 16, "\x7F\xFF\xFF\xFF\x7F\xFF\xFF\xFF", 8, limit, &err) == wanted, "%s",
              err.message);
        CHECK(images_patched("c0_1_adam7.png", 16, "\0\1\0\0\0\1\0\0", 8, limit, &err) == wanted, "%s", err.message);
        CHECK(images_patched("420_37x29.jpg", sof0 + 5, "\xFF\xFF\xFF\xFF", 4, limit, &err) == wanted, "%s",
              err.message);
        CHECK(images_patched("420_37x29_prog.jpg", sof2 + 5, "\xFF\xFF\xFF\xFF", 4, limit, &err) == wanted, "%s",
              err.message);
        CHECK(images_patched("p6.ppm", 0, "P6 999999 99999 255 ", 20, limit, &err) == wanted, "%s", err.message);
        CHECK(images_patched("p5.pgm", 0, "P5 999999 99999 255 ", 20, limit, &err) == wanted, "%s", err.message);
    }
    CHECK(images_patched("c2_8.png", 16, "\xFF\xFF\xFF\xFF\0\0\0\1", 8, UINT64_MAX, &err) == ASTROVL_ERROR_LIMIT, "%s",
          err.message);
    CHECK(images_patched("c2_8.png", 0, "", 0, 29 * 21, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(images_patched("c2_8.png", 0, "", 0, 29 * 21 - 1, &err) == ASTROVL_ERROR_LIMIT, "%s", err.message);
    CHECK(images_patched("420_37x29.jpg", 0, "", 0, 37 * 29 - 1, &err) == ASTROVL_ERROR_LIMIT, "%s", err.message);
    CHECK(images_patched("p6.ppm", 0, "", 0, 7 * 6 - 1, &err) == ASTROVL_ERROR_LIMIT, "%s", err.message);
}

// What is wrong gets the right status, and words that name the place.
static void test_images_errors(void) {
    static const struct { const char *name, *find; size_t n_find,
                         skip; const char *bytes; size_t n; astrovl_status status; const char *words; } cases[] = {
        {"c2_8.png", "IHDR", 4, 12, "\3", 1, ASTROVL_ERROR_FORMAT, "color type 2 with 3 bits"},
        {"c2_8.png", "IHDR", 4, 13, "\5", 1, ASTROVL_ERROR_FORMAT, "color type 5"},
        {"c2_8.png", "IHDR", 4, 14, "\1", 1, ASTROVL_ERROR_FORMAT, "IHDR"},
        {"c2_8.png", "IHDR", 4, 4, "\0\0\0\0", 4, ASTROVL_ERROR_FORMAT, "0 x 21"},
        {"c2_8.png", "IHDR", 4, 0, "JHDR", 4, ASTROVL_ERROR_FORMAT, "must come first"},
        {"c2_8.png", "IDAT", 4, 0, "CgBI", 4, ASTROVL_ERROR_UNSUPPORTED, "CgBI"},
        {"c3_8.png", "PLTE", 4, 0, "pLTE", 4, ASTROVL_ERROR_FORMAT, "PLTE"},
        {"c2_8.png", "IDAT", 4, 4, "\x79", 1, ASTROVL_ERROR_FORMAT, "zlib"},
        {"stored.png", "IDAT", 4, 30, "\7", 1, ASTROVL_ERROR_FORMAT, "Adler-32"},
        {"stored.png", "IDAT", 4, 7, "\0", 1, ASTROVL_ERROR_FORMAT, "stored block"},
        {"stored.png", "IDAT", 4, 6, "\7", 1, ASTROVL_ERROR_FORMAT, "unknown kind"},
        {"many_idat.png", "IDAT", 4, 0, "iDAT", 4, ASTROVL_ERROR_FORMAT, "IDAT"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 1, "\xC9", 1, ASTROVL_ERROR_UNSUPPORTED, "arithmetic"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 1, "\xC3", 1, ASTROVL_ERROR_UNSUPPORTED, "lossless"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 4, "\14", 1, ASTROVL_ERROR_UNSUPPORTED, "12 bits"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 9, "\2", 1, ASTROVL_ERROR_FORMAT, "SOF"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 5, "\0\0", 2, ASTROVL_ERROR_UNSUPPORTED, "DNL"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 14, "\x32", 1, ASTROVL_ERROR_UNSUPPORTED, "whole multiples"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 11, "\x52", 1, ASTROVL_ERROR_FORMAT, "SOF"},
        {"420_37x29.jpg", "\xFF\xDB", 2, 4, "\x07", 1, ASTROVL_ERROR_FORMAT, "DQT"},
        {"420_37x29.jpg", "\xFF\xC4", 2, 5, "\x09", 1, ASTROVL_ERROR_FORMAT, "DHT"},
        {"420_37x29_prog.jpg", "\xFF\xC4", 2, 1, "\xFE", 1, ASTROVL_ERROR_FORMAT, "Huffman table is missing"},
        {"420_37x29.jpg", "\xFF\xDB", 2, 1, "\xFE", 1, ASTROVL_ERROR_FORMAT, "quantization table is missing"},
        {"420_37x29.jpg", "\xFF\xDA", 2, 5, "\x09", 1, ASTROVL_ERROR_FORMAT, "unknown component"},
        {"420_37x29.jpg", "\xFF\xC0", 2, 1, "\xFE", 1, ASTROVL_ERROR_FORMAT, "before the frame"},
        {"420_37x29_prog.jpg", "\xFF\xDA", 2, 11, "\x77", 1, ASTROVL_ERROR_FORMAT, "progression"},
        {"restart.jpg", "\xFF\xD1", 2, 1, "\xD3", 1, ASTROVL_ERROR_FORMAT, "restart marker"},
        {"p6.ppm", "255", 3, 0, "000", 3, ASTROVL_ERROR_FORMAT, "maxval 0"},
        {"p6.ppm", "255", 3, 0, "256", 3, ASTROVL_ERROR_FORMAT, "cannot hold"},
        {"p6_65535.ppm", "65535", 5, 0, "65536", 5, ASTROVL_ERROR_FORMAT, "maxval 65536"},
        {"p6.ppm", "255", 3, 0, "2z5", 3, ASTROVL_ERROR_FORMAT, "byte 8: not a number"},
        {"p6.ppm", "255", 3, 3, "#", 1, ASTROVL_ERROR_FORMAT, "byte 10: not a number"},
        {"p6.ppm", "\r7", 2, 1, "0", 1, ASTROVL_ERROR_FORMAT, "0 x 6"},
        {"p6.ppm", "7\t6\n255", 7, 0, "2222222", 7, ASTROVL_ERROR_FORMAT, "byte 11"},
        {"p6.ppm", "P6", 2, 0, "P3", 2, ASTROVL_ERROR_UNSUPPORTED, "as text: convert it"}};
    astrovl_error err;
    astrovl_image image;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t at = images_offset(cases[i].name, cases[i].find, cases[i].n_find) + cases[i].skip;
        astrovl_status status = images_patched(cases[i].name, at, cases[i].bytes, cases[i].n, 0, &err);
        CHECK(status == cases[i].status && strstr(err.message, cases[i].words), "case %d, %s, wanted \"%s\": %d %s",
              (int)i, cases[i].name,
              cases[i].words, status, err.message);
    }
    CHECK(astrovl_image_load("test/no such file.png", NULL, &image, &err) == ASTROVL_ERROR_FILE, "%s", err.message);
    CHECK(astrovl_image_load("/dev/zero", NULL, &image, &err) == ASTROVL_ERROR_FILE && strstr(err.message, "/dev/zero"), "%s", err.message);
    CHECK(astrovl_image_load("test/golden/images_ops.txt", NULL, &image, &err) == ASTROVL_ERROR_UNSUPPORTED &&
          strstr(err.message, "images_ops.txt: neither"), "%s", err.message);
    CHECK(astrovl_image_load(NULL, NULL, &image, &err) == ASTROVL_ERROR_ARGUMENT, "no path");
    CHECK(astrovl_image_load("test/golden/models_1.png", NULL, NULL, &err) == ASTROVL_ERROR_ARGUMENT, "no image");
    CHECK(astrovl_image_upright(NULL, NULL) == ASTROVL_ERROR_ARGUMENT, "nothing to turn");
    CHECK(astrovl_image_decode(NULL, 5, NULL, &image, NULL) == ASTROVL_ERROR_ARGUMENT, "no data");
    CHECK(astrovl_image_decode("", 0, NULL, NULL, NULL) == ASTROVL_ERROR_ARGUMENT, "no image");
    CHECK(astrovl_image_decode("", 0, NULL, &image, &err) == ASTROVL_ERROR_UNSUPPORTED, "no bytes");
}

// A wrong CRC is an error up to the pixels; behind them, and in a missing end, it is not. A filter that does not exist
// is found in data whose check sums are right.
static void test_images_png_sums(void) {
    images_file f = images_find("many_idat.png");
    size_t text = images_offset("many_idat.png", "tEXt", 4) + 4, k;
    astrovl_image image;
    astrovl_error err;
    unsigned char copy[8000];
    uint32_t a = 1, b = 0;
    memcpy(copy, f.data, f.size);
    copy[text] ^= 1;
    CHECK(images_decode(f.name, copy, f.size, 0, &image, &err) == ASTROVL_ERROR_FORMAT && strstr(err.message, "tEXt") &&
          strstr(err.message, "CRC"), "%s", err.message);
    copy[text] ^= 1;
    copy[images_offset("many_idat.png", "IDAT", 4) - 5] ^= 1;   // the CRC of the chunk before it
    CHECK(images_decode(f.name, copy, f.size, 0, &image, &err) == ASTROVL_ERROR_FORMAT && strstr(err.message, "CRC"), "%s",
          err.message);
    copy[images_offset("many_idat.png", "IDAT", 4) - 5] ^= 1;
    copy[f.size - 1] ^= 1;
    for (k = 0; k <= 12; k += 12) {   // the last chunk, IEND, has 12 bytes
        CHECK(images_decode(f.name, copy, f.size - k, 0, &image, &err) == ASTROVL_OK && images_pixels_crc(&image) == f.crc,
              "its end %s", k ? "is missing" : "has a wrong CRC");
        astrovl_image_free(&image);
    }
    f = images_find("stored.png");   // zlib's header of 2 bytes, one stored block: 5 bytes, 30 rows of 1 + 120, Adler-32
    memcpy(copy, f.data, f.size);
    text = images_offset("stored.png", "IDAT", 4) + 4 + 7;
    copy[text + 121] = 7;
    for (k = 0; k < 30 * 121; k++) {
        a = (a + copy[text + k]) % 65521;
        b = (b + a) % 65521;
    }
    for (k = 0; k < 4; k++) copy[text + 30 * 121 + k] = (unsigned char)((b << 16 | a) >> (24 - 8 * k));
    images_repair_png(copy, f.size);
    CHECK(images_decode(f.name, copy, f.size, 0, &image, &err) == ASTROVL_ERROR_FORMAT &&
          strstr(err.message, "row 1 has filter 7"), "%s", err.message);
}

// A wrong CRC of IDAT chunks is a warning: the pixels have a check sum of their own, which finds damage.
static void test_images_wrong_crc(void) {
    for (int i = 0; i < 2; i++) {
        const images_file f = images_find(i ? "stored.png" : "many_idat.png");
        const size_t idat = images_offset(f.name, "IDAT", 4), length = f.data[idat - 2] * 256u + f.data[idat - 1];
        astrovl_image image;
        astrovl_error err;
        unsigned char copy[8000];
        memcpy(copy, f.data, f.size);
        copy[idat + 4 + length] ^= 1;
        CHECK(images_decode(f.name, copy, f.size, 0, &image, &err) == ASTROVL_OK && images_pixels_crc(&image) == f.crc, "%s: %s",
              f.name, err.message);
        CHECK(err.status == ASTROVL_OK && strstr(err.message, "CRC") && strstr(err.message, "IDAT"), "no warning: %s", err.message);
        astrovl_image_free(&image);
        CHECK(images_decode(f.name, f.data, f.size, 0, &image, &err) == ASTROVL_OK && !*err.message, "a warning: %s", err.message);
        astrovl_image_free(&image);
        copy[idat + 4 + length / 2] ^= 1;
        CHECK(images_decode(f.name, copy, f.size, 0, &image, &err) == ASTROVL_ERROR_FORMAT, "%s: damage was not found", f.name);
    }
}

// 16-bit gray is scaled, not clipped as Pillow does, and so is any other maxval.
static void test_images_gray16(void) {
    static const struct { const char *header; int bytes, maxval; } cases[] = {
        {"P5 %d 1 65535\n", 2, 65535}, {"P5 %d 1 4095\n", 2, 4095}, {"P5 %d 1 255\n", 1, 255}, {"P5 %d 1 15\n", 1, 15}};
    for (int i = 0; i < 4; i++) {
        const int maxval = cases[i].maxval, n = maxval + 1;
        unsigned char *file = (unsigned char *)malloc(2 * (size_t)n + 30);
        size_t size = (size_t)sprintf((char *)file, cases[i].header, n);
        astrovl_image image;
        astrovl_error err;
        int bad = 0;
        for (int v = 0; v < n; v++) {
            if (cases[i].bytes == 2) file[size++] = (unsigned char)(v >> 8);
            file[size++] = (unsigned char)v;
        }
        CHECK(images_decode("gray", file, size, 0, &image, &err) == ASTROVL_OK && image.width == n, "maxval %d: %s", maxval,
              err.message);
        for (int v = 0; v < n && image.rgb; v++) bad += image.rgb[3 * v + 1] != (int)(v * 255.0 / maxval + 0.5);   // no ties
        CHECK(bad == 0, "maxval %d: %d values are wrong", maxval, bad);
        astrovl_image_free(&image);
        free(file);
    }
}

// A copy of the file without its DHT segments, or without the one that begins with `code`; returns its size.
static size_t images_without_codes(const images_file *f, int code, unsigned char *copy) {
    size_t at = 2, to = 2, length;
    memcpy(copy, f->data, 2);
    for (; f->data[at + 1] != 0xDA; at += length) {
        length = 2 + f->data[at + 2] * 256u + f->data[at + 3];
        if (f->data[at + 1] == 0xC4 && (code < 0 || f->data[at + 4] == code)) continue;
        memcpy(copy + to, f->data + at, length);
        to += length;
    }
    memcpy(copy + to, f->data + at, f->size - at);
    return to + f->size - at;
}

// Frames of Motion-JPEG have no Huffman tables: those of T.81 annex K.3 are meant, and libjpeg's encoder uses the same.
static void test_images_motion_jpeg(void) {
    static const char *const names[] = {"420_37x29.jpg", "444_37x29.jpg", "gray.jpg", "restart.jpg", "cmyk.jpg", "quality100.jpg",
                                        "420_37x29_prog.jpg"};
    static const int codes[] = {-1, 0, 1, 0x10, 0x11};      // all, or one of them (libjpeg, too, takes its own for that one)
    for (size_t i = 0; i < 5 * (sizeof names / sizeof *names); i++) {
        const images_file f = images_find(names[i / 5]);
        unsigned char copy[8000];
        const size_t size = images_without_codes(&f, codes[i % 5], copy);
        astrovl_image image;
        astrovl_error err;
        const astrovl_status status = images_decode(f.name, copy, size, 0, &image, &err);
        if (strstr(f.name, "prog") && i % 5 == 0)
            CHECK(status == ASTROVL_ERROR_FORMAT && strstr(err.message, "Huffman table is missing"), "%s: %s", f.name, err.message);
        else if (!strstr(f.name, "prog"))
            CHECK((size < f.size || i % 5) && !status && images_pixels_crc(&image) == f.crc, "%s without table %d: %s", f.name,
                  codes[i % 5], err.message);
        astrovl_image_free(&image);
    }
}

// A progressive JPEG needs a bit for each block of each component: a file that has enough for one of three is refused
// before memory is allocated, and so is one whose height is left to a DNL marker.
static void test_images_jpeg_bounds(void) {
    unsigned char file[600] = {0xFF, 0xD8, 0xFF, 0xC2, 0, 17, 8, 0, 0, 0, 0, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0};
    astrovl_image image;
    astrovl_error err;
    for (int i = 0; i < 3; i++) {   // 4800 bits; 64 x 64 blocks, or none
        file[7] = file[9] = i == 2 ? 0 : 2;
        file[2 + 1] = i ? 0xC2 : 0xC0;
        g_bytes = 0;
        g_measure = 1;
        const astrovl_status status = images_decode("jpeg", file, sizeof file, 0, &image, &err);
        g_measure = 0;
        CHECK(status == ASTROVL_ERROR_FORMAT && (i == 2 || strstr(err.message, "cannot hold 512 x 512")), "%d: %s", i, err.message);
        CHECK(g_bytes < 2000000, "%d: %ld bytes", i, (long)g_bytes);
    }
    file[10] = 1;
    CHECK(images_decode("jpeg", file, sizeof file, 0, &image, &err) == ASTROVL_ERROR_UNSUPPORTED && strstr(err.message, "DNL"), "%s",
          err.message);
}

// Files of other kinds are told by their first bytes, with what to do.
static void test_images_other_formats(void) {
    static const struct { const char *bytes; size_t n; const char *words; } cases[] = {
        {"GIF89a", 6, "GIF: convert"}, {"II*\0\10\0\0\0", 8, "TIFF: convert"}, {"MM\0*", 4, "TIFF: convert"},
        {"RIFF\0\0\0\0WEBPVP8 ", 16, "WebP: convert"}, {"BM\x36\0", 4, "BMP: convert"},
        {"\0\0\0\14jP  \r\n\x87\n", 12, "JPEG 2000: convert"}, {"\xFF\x4F\xFF\x51", 4, "JPEG 2000: convert"},
        {"\xFF\x0A", 2, "JPEG XL: convert"}, {"\0\0\0\x1C" "ftypavif", 12, "AVIF"}, {"\0\0\0\x18" "ftypheic", 12, "HEIC"},
        {"SIMPLE  =                    T", 30, "FITS: scale"}, {"\x1F\x8B\10", 3, "gzip: unpack"}, {"PK\3\4", 4, "zip: unpack"},
        {"%PDF-1.7", 8, "PDF: convert"}, {"8BPS", 4, "PSD: convert"},
        {"version https://git-lfs.github.com/spec/v1\n", 43, "`git lfs pull`"}, {"<!DOCTYPE html>", 15, "HTML"},
        {"\r\n  <html>", 10, "HTML"}, {"<?xml version=\"1.0\"?><svg>", 26, "XML"}, {"P4 8 1\n\0", 8, "PBM: convert"},
        {"P7\n", 3, "PAM: convert"}, {"RIFF\0\0\0\0WAVE", 12, "unknown"}, {"GIF", 3, "unknown here: convert"}, {"hello", 5, "unknown"},
        {"MMMM good", 9, "unknown"}, {"PKD wrote", 9, "unknown"}, {"\xEF\xBB\xBF<html>", 9, "HTML"}, {"{\"error\": 404}", 14, "JSON"},
        {"MM\0+", 4, "TIFF"}, {"\x89PNG\n\x1a\n", 7, "PNG with converted"}, {"\n\n\n", 3, "unknown"}, {"", 0, "unknown"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        astrovl_image image;
        astrovl_error err;
        const astrovl_status status = images_decode("other", (const unsigned char *)cases[i].bytes, cases[i].n, 0, &image, &err);
        CHECK(status == ASTROVL_ERROR_UNSUPPORTED && strstr(err.message, cases[i].words), "case %d, wanted \"%s\": %s", (int)i,
              cases[i].words, err.message);
    }
}

// What the vision tower gets of an image: it is padded or cropped inside the resize, to the same bytes as one after the other,
// and without the memory for it.
static void test_images_shapes(void) {
    static const int sizes[][2] = {{40, 30}, {31, 40}, {7, 7}, {1, 1}, {1, 9}, {12, 1}, {64, 3}, {2, 301}, {99, 98}, {300, 2}, {1, 4000}};
    static const char *const models[] = {"test/golden/models_a_mmproj.gguf", "test/golden/joint_a.gguf"};   // pads, crops
    for (int which = 0; which < 2; which++) {
        astrovl_error err;
        astrovl_model *model = astrovl_open(models[which], NULL, &err);
        astrovl_info info;
        CHECK(model, "%s", err.message);
        if (!model) continue;
        astrovl_get_info(model, &info);
        const int s = info.image_size, n = s * s;
        float *pixels = (float *)malloc(3 * (size_t)n * sizeof(float));
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const int w = sizes[i][0], h = sizes[i][1], shorter = w < h ? w : h;
            unsigned char color[3];
            astrovl_image image = images_pattern((int)i % 3, w, h), shaped, wanted;
            int bad = 0;
            for (int c = 0; c < 3; c++) color[c] = (unsigned char)(model->clip.mean[c] * 255.0f);
            if (which == 0) astrovl_image_pad_square(&image, color, &shaped, &err), astrovl_image_resize(&shaped, s, s, &wanted, &err);
            else astrovl_image_resize(&image, s * w / shorter, s * h / shorter, &shaped, &err),
                 astrovl_image_center_crop(&shaped, s, s, &wanted, &err);
            CHECK(astrovl_preprocess(model, &image, pixels, &err) == ASTROVL_OK, "%s", err.message);
            for (int k = 0; k < 3 * n; k++)
                bad += (int)lrintf((pixels[k] * model->clip.std[k / n] + model->clip.mean[k / n]) * 255.0f) != wanted.rgb[k % n * 3 + k / n];
            CHECK(bad == 0, "model %d, %d x %d: %d of %d values differ", which, w, h, bad, 3 * n);
            astrovl_image_free(&shaped);
            astrovl_image_free(&wanted);
            free(image.rgb);
        }
        for (int i = 0; i < 4; i++) {   // padded, 65500 x 1 would be 13 GB
            astrovl_image image = images_pattern(0, i % 2 ? 1 : i ? 65500 : 300000, i % 2 ? i > 1 ? 65500 : 300000 : 1);
            g_bytes = 0;
            g_measure = 1;
            CHECK(astrovl_preprocess(model, &image, pixels, &err) == ASTROVL_OK, "%s", err.message);
            g_measure = 0;
            CHECK(g_bytes < 2000000 && pixels[0] == pixels[0], "%d x %d: %ld bytes", image.width, image.height, (long)g_bytes);
            free(image.rgb);
        }
        free(pixels);
        astrovl_close(model);
    }
}

// Each allocation fails in turn: every call reports it and leaves nothing behind (run() counts the blocks).
static void test_images_out_of_memory(void) {
    static const char *const names[] = {"c2_8.png", "c3_4_adam7.png", "many_idat.png", "420_37x29.jpg",
                                        "420_37x29_prog.jpg", "ycck.jpg", "exif6.jpg", "p5.pgm", "p6.ppm"};
    static const unsigned char color[3] = {1, 2, 3};
    const int n_names = (int)(sizeof names / sizeof *names);
    long fail;
    int did_fail;
    for (int op = 0; op < n_names + 5; op++)
        for (fail = 0, did_fail = 1; did_fail; fail++) {
            images_file f = images_find(names[op < n_names ? op : 0]);
            astrovl_image from = images_pattern(0, 9, 5), image, out;
            astrovl_error err;
            astrovl_status status = ASTROVL_OK;
            memset(&out, 0, sizeof out);
            (void)astrovl_image_center_crop(&from, 9, 5, &image, &err);   // the same pixels, from our allocator
            free(from.rgb);
            image.orientation = 6;
            alloc_fail_at(fail);
            switch (op - n_names) {
            case 0: status = astrovl_image_resize(&image, 4, 4, &out, &err); break;
            case 1: status = astrovl_image_resize(&image, 9, 5, &out, &err); break;
            case 2: status = astrovl_image_pad_square(&image, color, &out, &err); break;
            case 3: status = astrovl_image_center_crop(&image, 3, 3, &out, &err); break;
            case 4: status = astrovl_image_upright(&image, &err); break;
            default: status = astrovl_image_decode(f.data, f.size, NULL, &out, &err);
            }
            did_fail = alloc_did_fail();
            alloc_fail_at(-1);
            CHECK(status == (did_fail ? ASTROVL_ERROR_MEMORY : ASTROVL_OK), "%d, allocation %ld: %d", op, fail, status);
            CHECK(!did_fail || !out.rgb, "%d, allocation %ld leaves an image", op, fail);
            CHECK(did_fail || fail > 0, "%d allocates nothing?", op);
            if (op == n_names + 4)
                CHECK(image.rgb && image.orientation == (did_fail ? 6 : 1), "upright, allocation %ld", fail);
            astrovl_image_free(&image);
            astrovl_image_free(&out);
        }
}

static void test_images_arguments(void) {
    astrovl_image image = images_pattern(0, 4, 4), out, empty;
    astrovl_error err;
    memset(&empty, 0, sizeof empty);
    CHECK(astrovl_image_resize(&image, 0, 4, &out, &err) == ASTROVL_ERROR_ARGUMENT, "width 0");
    CHECK(astrovl_image_resize(&image, 4, -1, &out, &err) == ASTROVL_ERROR_ARGUMENT, "height -1");
    CHECK(astrovl_image_resize(&empty, 4, 4, &out, &err) == ASTROVL_ERROR_ARGUMENT, "empty");
    CHECK(astrovl_image_resize(NULL, 4, 4, &out, NULL) == ASTROVL_ERROR_ARGUMENT, "NULL");
    CHECK(astrovl_image_resize(&image, 4, 4, &image, &err) == ASTROVL_ERROR_ARGUMENT, "in place");
    CHECK(astrovl_image_center_crop(&image, 0, 1, &out, &err) == ASTROVL_ERROR_ARGUMENT, "crop of width 0");
    CHECK(astrovl_image_center_crop(&image, 1, 1, NULL, &err) == ASTROVL_ERROR_ARGUMENT, "crop to nowhere");
    CHECK(astrovl_image_pad_square(&empty, NULL, &out, &err) == ASTROVL_ERROR_ARGUMENT, "padding nothing");
    CHECK(astrovl_image_upright(&empty, &err) == ASTROVL_ERROR_ARGUMENT, "nothing upright");
    image.orientation = 9;
    CHECK(astrovl_image_upright(&image, &err) == ASTROVL_ERROR_ARGUMENT, "orientation 9");
    astrovl_image_free(NULL);
    free(image.rgb);
}

static void tests_images(void) {
    run("images: files decode to Pillow's pixels", test_images_files);
    run("images: resize, pad and crop give Pillow's pixels", test_images_operations);
    run("images: padding and cropping inside the resize, memory by shape", test_images_shapes);
    run("images: 16-bit gray and other maxvals are scaled to 8 bits", test_images_gray16);
    run("images: a wrong CRC of pixels is a warning", test_images_wrong_crc);
    run("images: JPEG without Huffman tables has the standard ones", test_images_motion_jpeg);
    run("images: JPEG frames larger than their file can hold", test_images_jpeg_bounds);
    run("images: other formats are named", test_images_other_formats);
    run("images: cut off at every byte", test_images_truncated);
    run("images: half a file is an error", test_images_half);
    run("images: 30,000 mutated files", test_images_mutated);
    run("images: pixel bombs", test_images_bombs);
    run("images: errors say what is wrong", test_images_errors);
    run("images: PNG check sums and filters", test_images_png_sums);
    run("images: allocation failure at every site", test_images_out_of_memory);
    run("images: arguments", test_images_arguments);
    free(g_images_pack);
    g_images_pack = NULL;
}

// ---- models: two tiny random LLaVAs against transformers -----------------------------------------------------------
// make_golden.py writes the models and what transformers computes with them: A (LLaMA-2-like: two files, F32 and F16,
// SentencePiece, MLP projector) and B (LLaMA-3-like: one file, BF16 and F16, byte-level BPE, grouped queries, scaled
// RoPE, linear projector). Exact mode must match every intermediate tensor and every greedily chosen token.

#define MODELS_IMAGE (-200)       // stands for an image in stored prompts
#define MODELS_TOLERANCE 1e-4     // of a tensor's largest value

typedef struct models_value {     // one entry of a .gold file; make_golden.py describes the format
    char     name[96];
    int      kind, n_dims, seen;  // kind 0: float32, 1: int32, 2: text
    int64_t  dims[4];
    float    largest;             // of the whole tensor
    int64_t  step, count;         // stored are the elements 0, step, 2 step, ...
    const unsigned char *data;
} models_value;

typedef struct models_gold {
    unsigned char *bytes;
    models_value  *values;
    int            n;
} models_gold;

static void models_gold_read(models_gold *g, const char *path) {
    size_t size, at = 8;
    g->bytes = read_file(path, &size);
    g->n = (int)avl__load_u32(g->bytes + 4);
    g->values = (models_value *)calloc((size_t)g->n, sizeof *g->values);
    for (int i = 0; g->values && i < g->n; i++) {
        models_value *v = &g->values[i];
        uint32_t length = avl__load_u32(g->bytes + at);
        memcpy(v->name, g->bytes + at + 4, length);
        at += 4 + length;
        v->kind = (int)avl__load_u32(g->bytes + at);
        v->n_dims = (int)avl__load_u32(g->bytes + at + 4);
        at += 8;
        for (int d = 0; d < v->n_dims; d++, at += 4) v->dims[d] = avl__load_u32(g->bytes + at);
        v->largest = avl__float_from_bits(avl__load_u32(g->bytes + at));
        v->step = avl__load_u32(g->bytes + at + 4);
        v->count = avl__load_u32(g->bytes + at + 8);
        v->data = g->bytes + at + 12;
        at += 12 + (size_t)v->count * (v->kind == 2 ? 1 : 4);
    }
    CHECK(at == size, "%s is read to its end", path);
}

static void models_gold_free(models_gold *g) {
    free(g->values);
    free(g->bytes);
}

static models_value *models_find(const models_gold *g, const char *name) {
    for (int i = 0; i < g->n; i++) if (strcmp(g->values[i].name, name) == 0) return &g->values[i];
    return NULL;
}

// RUN.FIELD, which make_golden.py always writes.
static const models_value *models_field(const models_gold *g, const char *run, const char *field) {
    char name[64];
    snprintf(name, sizeof name, "%s%s%s", run, *run ? "." : "", field);
    const models_value *v = models_find(g, name);
    if (!v) { fprintf(stderr, "golden values lack %s\n", name); exit(1); }
    return v;
}

static int32_t models_int(const models_value *v, int64_t i) {
    uint32_t bits = avl__load_u32(v->data + 4 * i);
    int32_t value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static const char *models_text(const models_gold *g, const char *run, const char *field, char *text, size_t capacity) {
    const models_value *v = models_field(g, run, field);
    size_t n = (size_t)v->count < capacity - 1 ? (size_t)v->count : capacity - 1;
    memcpy(text, v->data, n);
    text[n] = 0;
    return text;
}

// ---- opening

static const char *const models_a_files[] = {"test/golden/models_a_text.gguf", "test/golden/models_a_mmproj.gguf"};
static const char *const models_b_files[] = {"test/golden/models_b.gguf"};
static const char *const models_files[] = {"test/golden/models_a_text.gguf", "test/golden/models_a_mmproj.gguf",
                                           "test/golden/models_b.gguf"};
static const char *const models_runs[] = {"one", "two", "text"};

static astrovl_model *models_open(int which, const astrovl_open_options *options, astrovl_error *err) {
    return which == 'a' ? astrovl_open_files(models_a_files, 2, options, err)
                        : astrovl_open_files(models_b_files, 1, options, err);
}

typedef struct models_kit {       // what most tests need
    models_gold    gold;
    astrovl_model *model;
    astrovl_image  images[2];
    char           system[256];
} models_kit;

static void models_kit_open(models_kit *kit, int which) {
    astrovl_error err = {ASTROVL_OK, ""};
    memset(kit, 0, sizeof *kit);
    models_gold_read(&kit->gold, which == 'a' ? "test/golden/models_a.gold" : "test/golden/models_b.gold");
    kit->model = models_open(which, NULL, &err);
    CHECK(kit->model, "%s", err.message);
    CHECK(astrovl_image_load("test/golden/models_1.png", 0, &kit->images[0], &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_image_load("test/golden/models_2.png", 0, &kit->images[1], &err) == ASTROVL_OK, "%s", err.message);
    models_text(&kit->gold, "", "system", kit->system, sizeof kit->system);
    if (!kit->model) exit(1);     // nothing below means anything then
}

static void models_kit_close(models_kit *kit) {
    astrovl_close(kit->model);
    astrovl_image_free(&kit->images[0]);
    astrovl_image_free(&kit->images[1]);
    models_gold_free(&kit->gold);
}

static astrovl_session *models_session(const models_kit *kit, astrovl_mode mode, int n_threads, astrovl_tap tap,
                                       void *user) {
    astrovl_session_options o;
    astrovl_error err = {ASTROVL_OK, ""};
    memset(&o, 0, sizeof o);
    o.mode = mode;
    o.n_threads = n_threads;
    o.tap = tap;
    o.tap_user = user;
    astrovl_session *s = astrovl_session_new(kit->model, &o, &err);
    CHECK(s, "%s", err.message);
    if (!s) exit(1);
    return s;
}

static astrovl_generation models_options(const models_kit *kit, int max_tokens) {
    astrovl_generation o;
    memset(&o, 0, sizeof o);
    o.max_tokens = max_tokens;
    o.system = kit->system[0] ? kit->system : NULL;
    return o;
}

// Asks the question of a stored run about its first n_images images.
static char *models_ask(const models_kit *kit, astrovl_session *s, const char *run, int n_images,
                        const astrovl_generation *o, astrovl_error *err) {
    char question[256];
    models_text(&kit->gold, run, "question", question, sizeof question);
    return astrovl_chat(s, kit->images, n_images, question, o, err);
}

// ---- layer by layer

// Watches a run and compares what it sees. Text may come in several passes: a pass starts at row `base` and has `n`
// rows
// of the prompt's `total`; what comes after those is the answer, which the golden tensors do not cover.
typedef struct models_watch {
    models_gold *gold;
    int64_t base, n, total;
    double  worst;                // largest difference, relative to its tensor's largest value
    char    worst_name[96];
    int     failed;
} models_watch;

static void models_compare(models_watch *w, const models_value *v, int64_t first_row, const int64_t *shape, int n_dims,
                           const float *data) {
    int64_t rows = n_dims == 3 ? shape[1] : shape[0], columns = shape[n_dims - 1];
    int64_t all_rows = v->dims[n_dims - 2], all_columns = v->dims[n_dims - 1], k;
    for (k = 0; k < v->count; k++) {
        int64_t i = k * v->step, column = i % all_columns, head = i / all_columns / all_rows;
        int64_t row = i / all_columns % all_rows - first_row;
        float expected = avl__float_from_bits(avl__load_u32(v->data + 4 * k)), got;
        if (row < 0 || row >= rows) continue;
        got = column < columns ? data[(head * rows + row) * columns + column] : 0.0f;   // no weight on keys yet to come
        double difference = (double)got - expected;
        if (difference < 0) difference = -difference;
        if (!(difference / v->largest <= w->worst)) {
            w->worst = difference / v->largest;
            memcpy(w->worst_name, v->name, sizeof v->name);
        }
        if (!(difference <= MODELS_TOLERANCE * v->largest) && !w->failed) {
            w->failed = 1;        // the first one says where to look
            CHECK(0, "%s, row %d column %d: %.9g, expected %.9g (largest %.9g)", v->name, (int)(row + first_row),
                  (int)column, got, expected, v->largest);
        }
    }
}

static void models_on_tap(void *user, const char *name, int layer, const int64_t *shape, int n_dims,
                          const float *data) {
    models_watch *w = (models_watch *)user;
    models_value *v = models_find(w->gold, name);
    int is_text = strncmp(name, "model.", 6) == 0 || strcmp(name, "lm_head") == 0, written = -1;
    int64_t first_row = 0;
    const char *number = strstr(name, "layers.");
    if (number) written = (number[7] - '0');
    CHECK(layer == written, "%s is said to be of layer %d", name, layer);
    if (!v || v->kind != 0) { CHECK(0, "%s is not a name that transformers has", name); return; }
    if (strcmp(name, "model.embed_tokens") == 0) {
        w->base += w->n;
        w->n = shape[0];
    }
    if (is_text && w->base >= w->total) return;
    if (n_dims != v->n_dims || (n_dims == 2 && shape[1] != v->dims[1]) || (n_dims == 3 && shape[0] != v->dims[0])) {
        CHECK(0, "%s has another shape: %d dimensions, %d x %d", name, n_dims, (int)shape[0], (int)shape[1]);
        return;
    }
    if (is_text && n_dims == 3) first_row = w->base;
    if (is_text && n_dims == 2)   // both may hold the last rows only
        first_row = w->base + w->n - shape[0] - (w->total - v->dims[0]);
    models_compare(w, v, first_row, shape, n_dims, data);
    v->seen += (int)(n_dims == 3 ? shape[1] : shape[0]);
}

static void models_watch_start(models_watch *w, models_gold *gold, int64_t total) {
    memset(w, 0, sizeof *w);
    w->gold = gold;
    w->total = total;
    for (int i = 0; i < gold->n; i++) gold->values[i].seen = 0;
}

// Every tensor must have come by, with all its rows (the last two may leave out what nobody asked for).
static void models_watch_end(const models_watch *w, const char *what) {
    int i, n = 0;
    for (i = 0; i < w->gold->n; i++) {
        const models_value *v = &w->gold->values[i];
        int all = v->n_dims >= 2 ? (int)v->dims[v->n_dims - 2] : 0;
        if (v->kind != 0) continue;
        if (strcmp(v->name, "model.norm") == 0 || strcmp(v->name, "lm_head") == 0) all = 1;
        CHECK(v->seen >= all, "%s: %s was seen with %d rows of %d", what, v->name, v->seen, all);
        n++;
    }
    CHECK(n > 60, "%d tensors", n);
    if (getenv("MODELS_VERBOSE"))
        printf("    %s: %d tensors, the largest difference %.2g at %s\n", what, n, w->worst, w->worst_name);
}

static int64_t models_n_rows(const models_kit *kit, const models_value *prompt) {
    astrovl_info info;
    int64_t n = 0, i;
    astrovl_get_info(kit->model, &info);
    for (i = 0; i < prompt->count; i++) n += models_int(prompt, i) == MODELS_IMAGE ? info.n_image_tokens : 1;
    return n;
}

static void models_layers(int which) {
    models_kit kit;
    models_watch watch;
    astrovl_error err = {ASTROVL_OK, ""};
    models_kit_open(&kit, which);
    models_watch_start(&watch, &kit.gold, models_n_rows(&kit, models_field(&kit.gold, "one", "prompt")));
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, models_on_tap, &watch);
    astrovl_generation o = models_options(&kit, 3);
    char *answer = models_ask(&kit, s, "one", 1, &o, &err);
    CHECK(answer, "%s", err.message);
    models_watch_end(&watch, which == 'a' ? "model A" : "model B");
    astrovl_free(answer);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

static void models_layers_a(void) { models_layers('a'); }
static void models_layers_b(void) { models_layers('b'); }

// ---- greedy text

// Reads a stored prompt: tokens in pieces of at most `piece`, images as rows.  logits: out, of the last position
static void models_read_prompt(const models_kit *kit, astrovl_session *s, const models_value *prompt, int piece,
                               float *logits) {
    astrovl_info info;
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[1024];
    float *rows;
    int64_t i = 0;
    int image = 0, last;
    astrovl_get_info(kit->model, &info);
    rows = (float *)malloc((size_t)info.n_image_tokens * (size_t)info.n_embd * sizeof *rows);
    while (rows && i < prompt->count) {
        int n = 0;
        if (models_int(prompt, i) == MODELS_IMAGE) {
            CHECK(astrovl_encode_image(s, &kit->images[image++], rows, &err) == ASTROVL_OK, "%s", err.message);
            CHECK(astrovl_eval_embeddings(s, rows, info.n_image_tokens, NULL, 0, &err) == ASTROVL_OK, "%s",
                  err.message);
            i++;
            continue;
        }
        while (i < prompt->count && n < piece && n < 1024 && models_int(prompt, i) != MODELS_IMAGE)
            tokens[n++] = models_int(prompt, i++);
        last = i == prompt->count;
        CHECK(astrovl_eval_tokens(s, tokens, n, last ? logits : NULL, last, &err) == ASTROVL_OK, "%s", err.message);
    }
    free(rows);
}

static float *models_logits(const models_kit *kit, int rows) {
    astrovl_info info;
    float *logits;
    astrovl_get_info(kit->model, &info);
    logits = (float *)calloc((size_t)rows * (size_t)info.n_vocab, sizeof *logits);
    if (!logits) exit(1);
    return logits;
}

static size_t models_row_bytes(const models_kit *kit) {
    astrovl_info info;
    astrovl_get_info(kit->model, &info);
    return (size_t)info.n_vocab * sizeof(float);
}

// Token by token through the session's parts.
static void models_greedy(int which) {
    static const char *const runs[] = {"one", "two", "text", "turn1", "turn2"};
    models_kit kit;
    models_kit_open(&kit, which);
    for (size_t r = 0; r < sizeof runs / sizeof *runs; r++) {
        const models_value *prompt = models_field(&kit.gold, runs[r], "prompt");
        const models_value *expected = models_field(&kit.gold, runs[r], "tokens");
        astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
        float *logits = models_logits(&kit, 1);
        astrovl_info info;
        astrovl_get_info(kit.model, &info);
        models_read_prompt(&kit, s, prompt, 1024, logits);
        CHECK(astrovl_session_n_past(s) == models_n_rows(&kit, prompt), "%d rows read", astrovl_session_n_past(s));
        for (int64_t i = 0; i < expected->count; i++) {
            int32_t token = astrovl_sample(logits, info.n_vocab, NULL, NULL, 0, NULL);
            CHECK(token == models_int(expected, i), "%s: token %d is %d, transformers says %d", runs[r], (int)i,
                  (int)token, (int)models_int(expected, i));
            if (token != models_int(expected, i)) break;
            CHECK(astrovl_eval_tokens(s, &token, 1, logits, 1, NULL) == ASTROVL_OK, "token %d", (int)i);
        }
        free(logits);
        astrovl_session_free(s);
    }
    models_kit_close(&kit);
}

static void models_greedy_a(void) { models_greedy('a'); }
static void models_greedy_b(void) { models_greedy('b'); }

static void models_check_answer(const models_kit *kit, astrovl_session *s, const char *run, const char *answer) {
    const models_value *expected = models_field(&kit->gold, run, "tokens");
    char text[1024];
    int n = 0, i;
    const int32_t *tokens = astrovl_answer_tokens(s, &n);
    CHECK(n == expected->count, "%s: %d tokens, expected %d", run, n, (int)expected->count);
    for (i = 0; i < n && i < expected->count && tokens[i] == models_int(expected, i); i++) {}
    CHECK(i == expected->count, "%s: token %d is another than transformers'", run, i);
    models_text(&kit->gold, run, "text", text, sizeof text);
    CHECK(answer && strcmp(answer, text) == 0, "%s: \"%s\", expected \"%s\"", run, answer ? answer : "(none)", text);
}

// The same through templates and astrovl_chat, the two turns of a conversation too.
static void models_chat(int which) {
    models_kit kit;
    astrovl_stats stats;
    astrovl_error err = {ASTROVL_OK, ""};
    char *answer;
    models_kit_open(&kit, which);
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    astrovl_generation o = models_options(&kit, 64);
    for (size_t r = 0; r < sizeof models_runs / sizeof *models_runs; r++) {
        const models_value *prompt = models_field(&kit.gold, models_runs[r], "prompt");
        int n_images = (int)models_int(models_field(&kit.gold, models_runs[r], "n_images"), 0);
        astrovl_session_reset(s);
        answer = models_ask(&kit, s, models_runs[r], n_images, &o, &err);
        CHECK(answer, "%s", err.message);
        models_check_answer(&kit, s, models_runs[r], answer);
        astrovl_get_stats(s, &stats);
        CHECK(stats.n_prompt_tokens == models_n_rows(&kit, prompt), "%d prompt tokens", stats.n_prompt_tokens);
        CHECK(stats.n_answer_tokens == 64 && stats.stopped_by_limit, "%d answer tokens", stats.n_answer_tokens);
        astrovl_free(answer);
    }
    astrovl_session_reset(s);
    CHECK(astrovl_session_n_past(s) == 0, "%d positions after a reset", astrovl_session_n_past(s));
    o.max_tokens = (int)models_field(&kit.gold, "turn1", "tokens")->count;
    answer = models_ask(&kit, s, "turn1", 1, &o, &err);
    models_check_answer(&kit, s, "turn1", answer);
    astrovl_free(answer);
    int n_past = astrovl_session_n_past(s);
    o.max_tokens = 64;
    answer = models_ask(&kit, s, "turn2", 0, &o, &err);
    models_check_answer(&kit, s, "turn2", answer);
    astrovl_get_stats(s, &stats);
    CHECK(n_past + stats.n_prompt_tokens == models_n_rows(&kit, models_field(&kit.gold, "turn2", "prompt")),
          "the second turn read %d tokens after %d", stats.n_prompt_tokens, n_past);
    astrovl_free(answer);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

static void models_chat_a(void) { models_chat('a'); }
static void models_chat_b(void) { models_chat('b'); }

// Whether a call failed as it should; forgets the error for the next one.
static int models_failed(astrovl_error *err, int failed, astrovl_status status) {
    int right = failed && err->status == status && err->message[0];
    if (!right) fprintf(stderr, "    status %s: %s\n", astrovl_status_name(err->status), err->message);
    memset(err, 0, sizeof *err);
    return right;
}

#define FAILS(failed, status, ...) CHECK(models_failed(&err, failed, ASTROVL_ERROR_##status), __VA_ARGS__)

// ---- prompt templates

// Every template's tokens: what LLaVA's conversation.py and the models' Jinja sources write, cut up by the reference
// tokenizers.
static void models_layouts(void) {
    models_gold gold;
    int i;
    models_gold_read(&gold, "test/golden/models_layouts.gold");
    for (i = 0; i * 6 < gold.n; i++) {
        char number[16], text[256], file[64], path[96], template_name[32], system[256];
        const models_value *options;
        astrovl_open_options open;
        astrovl_generation o;
        astrovl_error err = {ASTROVL_OK, ""};
        astrovl_turn turn;
        avl__tokens tokens = {NULL, 0, 0};
        size_t t;
        snprintf(number, sizeof number, "%d", i);
        const models_value *expected = models_field(&gold, number, "tokens");
        options = models_field(&gold, number, "options");   // has a system text, turn, images, parse_special
        models_text(&gold, number, "file", file, sizeof file);
        models_text(&gold, number, "text", text, sizeof text);
        models_text(&gold, number, "system", system, sizeof system);
        models_text(&gold, number, "template", template_name, sizeof template_name);
        snprintf(path, sizeof path, "test/golden/%s", file);
        memset(&open, 0, sizeof open);
        if (strcmp(template_name, "chatml") != 0)           // which is to be recognised
            open.chat_template = (astrovl_template)astrovl_template_from_name(template_name);
        astrovl_model *m = astrovl_open(path, &open, &err);
        astrovl_session *s = m ? astrovl_session_new(m, NULL, &err) : NULL;
        CHECK(s, "%s", err.message);
        if (!s) exit(1);
        memset(&o, 0, sizeof o);
        o.system = models_int(options, 0) ? system : NULL;
        o.parse_special = models_int(options, 3);
        s->n_turns = models_int(options, 1);
        memset(&turn, 0, sizeof turn);
        turn.session = s;
        turn.text = text;
        turn.n_images = models_int(options, 2);
        avl__lay_out_turn(&turn, &o, &tokens);
        CHECK(!turn.err.status, "%s", turn.err.message);
        for (t = 0; t < tokens.size && t < (size_t)expected->count; t++) {
            int32_t id = models_int(expected, (int64_t)t);
            if (id == MODELS_IMAGE ? tokens.data[t] >= 0 : tokens.data[t] != id) break;
        }
        CHECK(t == tokens.size && t == (size_t)expected->count,
              "case %d, %s, \"%s\": %d tokens, expected %d, the first %d are right", i, template_name, text,
              (int)tokens.size, (int)expected->count, (int)t);
        astrovl_free(tokens.data);
        astrovl_session_free(s);
        astrovl_close(m);
    }
    CHECK(i >= 25, "%d cases", i);
    models_gold_free(&gold);
}

// A SentencePiece vocabulary whose ordinary tokens are single bytes and the space, with the special tokens of all templates,
// and a chat template in Jinja, or none. with_marks: <|user|> and its like are tokens, too.
static astrovl_model *models_form(const char *jinja, astrovl_template form, int with_marks, gguf_bytes *file, astrovl_error *err) {
    static const char *const special[] = {"<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>",
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>"};
    const int n_special = with_marks ? 13 : 10, n = n_special + 257;
    const astrovl_open_options how = {0, form};
    *file = text_begin(jinja ? 6 : 5, "llama", n);
    for (int i = 0; i < n_special; i++) text_put(file, special[i], strlen(special[i]));
    text_put(file, AVL__SPACE_MARK, 3);
    for (int byte = 0; byte < 256; byte++) {
        char piece[8];
        snprintf(piece, sizeof piece, "<0x%02X>", (unsigned)byte);
        text_put(file, piece, 6);
    }
    text_put_array(file, "tokenizer.ggml.token_type", 5, n, n_special, 3, 6);
    file->data[file->size - 4 * 257] = 1;
    text_put_array(file, "tokenizer.ggml.scores", 6, n, 0, 0, 0);
    text_put(file, "tokenizer.ggml.add_bos_token", 28);
    gguf_put_number(file, 7, 4);
    gguf_put_number(file, jinja == NULL, 1);
    if (jinja) {
        text_put(file, "tokenizer.chat_template", 23);
        gguf_put_number(file, 8, 4);
        text_put(file, jinja, strlen(jinja));
    }
    const astrovl_memory block = {file->data, file->size, "form.gguf"};
    memset(err, 0, sizeof *err);
    return astrovl_open_memory(&block, 1, &how, err);
}

// What a turn is laid out as: the text, special tokens in braces. SentencePiece puts a space before each part.
static void models_form_turn(const astrovl_model *m, int turn, const char *system, char out[1024], astrovl_error *err) {
    astrovl_session *s = astrovl_session_new(m, NULL, NULL);
    astrovl_turn t;
    astrovl_generation o;
    avl__tokens tokens = {NULL, 0, 0};
    size_t size = 0;
    memset(&t, 0, sizeof t);
    memset(&o, 0, sizeof o);
    o.system = system;
    t.session = s;
    t.text = turn ? "And?" : "What?";
    s->n_turns = turn;
    avl__lay_out_turn(&t, &o, &tokens);
    for (size_t i = 0; i < tokens.size; i++) {
        const astrovl_string piece = astrovl_token_piece(m, tokens.data[i]);
        const int n = astrovl_token_text(m, tokens.data[i], out + size, 1000 - (int)size);
        size += n ? (size_t)n : (size_t)snprintf(out + size, 1000 - size, "{%.*s}", (int)piece.size, piece.data);
    }
    out[size] = 0;
    *err = t.err;
    astrovl_free(tokens.data);
    astrovl_session_free(s);
}

#define LOOP "{% for message in messages %}"
#define VICUNA_SYSTEM(who) "A chat between a curious " who " and an artificial intelligence assistant. The assistant gives " \
                           "helpful, detailed, and polite answers to the " who "'s questions."
#define LLAVA_SYSTEM "You are a helpful language and vision assistant. You are able to understand the visual content that the " \
                     "user provides, and assist the user with a variety of tasks using natural language."

// The strings are what is published: LLaVA's conversation.py (conv_vicuna_v1, conv_llava_v1, conv_llava_v0,
// conv_llava_llama_2), the Jinja templates of Llama-2-chat, Mistral 7B Instruct v0.1 to v0.3, Zephyr and TinyLlama-Chat,
// Llama-3-Instruct, OpenHermes (ChatML), and mistralai/cookbook on tokenization. jinja: the part that tells them apart.
static const struct {
    const char *name, *jinja, *first, *with_system, *second;   // without a system text, with "Look.", the second turn
} models_forms[] = {
    {"vicuna_v1", LOOP "{{ message['role'].upper() + ': '}}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
     "{<s>} " VICUNA_SYSTEM("user") " USER: What? ASSISTANT:", "{<s>} Look. USER: What? ASSISTANT:", "{</s>} USER: And? ASSISTANT:"},
    {"llava_v1", NULL, "{<s>} " VICUNA_SYSTEM("human") " USER: What? ASSISTANT:", "{<s>} Look. USER: What? ASSISTANT:",
     "{</s>} USER: And? ASSISTANT:"},
    {"llava_v0", NULL, "{<s>} " VICUNA_SYSTEM("human") "###Human: What?###Assistant:", "{<s>} Look.###Human: What?###Assistant:",
     " ###Human: And?###Assistant:"},
    {"llava_llama_2", NULL, "{<s>} [INST] <<SYS>>\n" LLAVA_SYSTEM "\n<</SYS>>\n\nWhat? [/INST]",
     "{<s>} [INST] <<SYS>>\nLook.\n<</SYS>>\n\nWhat? [/INST]", " {</s>}{<s>} [INST] And? [/INST]"},
    {"llama_2", "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' %}{{ bos_token + '[INST] ' + content.strip() + "
     "' [/INST]' }}", "{<s>} [INST] What? [/INST]", "{<s>} [INST] <<SYS>>\nLook.\n<</SYS>>\n\nWhat? [/INST]",
     " {</s>}{<s>} [INST] And? [/INST]"},
    {"mistral", "{{ bos_token }}" LOOP "{{ '[INST] ' + message['content'] + ' [/INST]' }}{{ message['content'] + eos_token}}",
     "{<s>} [INST] What? [/INST]", "{<s>} [INST] Look.\n\nWhat? [/INST]", "{</s>} [INST] And? [/INST]"},
    {"mistral_v3", "{{- bos_token }}{{- \"[AVAILABLE_TOOLS] [\" }}{{- \"[INST] \" + message[\"content\"] + \"[/INST]\" }}",
     "{<s>}{[INST]} What?{[/INST]}", "{<s>}{[INST]} Look.\n\nWhat?{[/INST]}", "{</s>}{[INST]} And?{[/INST]}"},
    {"zephyr", "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
     "eos_token }}\n{% endif %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}",
     " <|user|>\nWhat?{</s>} \n<|assistant|>\n", " <|system|>\nLook.{</s>} \n<|user|>\nWhat?{</s>} \n<|assistant|>\n",
     "{</s>} \n<|user|>\nAnd?{</s>} \n<|assistant|>\n"},
    {"llama_3", LOOP "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
     "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}",
     "{<s>}{<|start_header_id|>} user{<|end_header_id|>} \n\nWhat?{<|eot_id|>}{<|start_header_id|>} assistant"
     "{<|end_header_id|>} \n\n", "{<s>}{<|start_header_id|>} system{<|end_header_id|>} \n\nLook.{<|eot_id|>}"
     "{<|start_header_id|>} user{<|end_header_id|>} \n\nWhat?{<|eot_id|>}{<|start_header_id|>} assistant{<|end_header_id|>} \n\n",
     "{<|eot_id|>}{<|start_header_id|>} user{<|end_header_id|>} \n\nAnd?{<|eot_id|>}{<|start_header_id|>} assistant"
     "{<|end_header_id|>} \n\n"},
    {"chatml", LOOP "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}",
     "{<|im_start|>} user\nWhat?{<|im_end|>} \n{<|im_start|>} assistant\n", "{<|im_start|>} system\nLook.{<|im_end|>} \n"
     "{<|im_start|>} user\nWhat?{<|im_end|>} \n{<|im_start|>} assistant\n",
     "{<|im_end|>} \n{<|im_start|>} user\nAnd?{<|im_end|>} \n{<|im_start|>} assistant\n"},
    {"plain", NULL, "{<s>} What?", "{<s>} What?", " And?"}};

// Every template by its name and, where a model publishes one in Jinja, recognized by that. A file that has one says
// add_bos_token = false here: BOS then comes where the Jinja source writes it.
static void models_forms_published(void) {
    const int n = (int)(sizeof models_forms / sizeof *models_forms);
    const char *names = ASTROVL_TEMPLATE_NAMES;
    CHECK(n == ASTROVL_TEMPLATE_PLAIN, "%d templates", n);
    for (int i = 0; i < 2 * n; i++) {
        const char *name = models_forms[i / 2].name, *jinja = i % 2 ? models_forms[i / 2].jinja : NULL;
        const int form = astrovl_template_from_name(name);
        if (i % 2 && !jinja) continue;
        CHECK(form > 0, "%s", name);
        if (i % 2 == 0) CHECK(strstr(names, name), "%s is not in ASTROVL_TEMPLATE_NAMES", name);
        for (int turn = 0; turn < 3; turn++) {
            const char *wanted = turn == 0 ? models_forms[i / 2].first : turn == 1 ? models_forms[i / 2].with_system : models_forms[i / 2].second;
            const int no_bos = jinja && !strstr(jinja, "bos_token") && turn < 2 && strncmp(wanted, "{<s>}", 5) == 0;
            const int more_bos = !jinja && models_forms[i / 2].jinja && turn < 2 && strncmp(wanted, "{<s>}", 5) != 0;
            gguf_bytes file;
            astrovl_error err;
            astrovl_info info;
            char got[1024] = "";
            astrovl_model *m = models_form(jinja, jinja ? ASTROVL_TEMPLATE_AUTO : (astrovl_template)form, 0, &file, &err);
            CHECK(m, "%s: %s", name, err.message);
            if (!m) continue;
            astrovl_get_info(m, &info);
            CHECK((int)info.chat_template == form, "%s is taken for %s", name, astrovl_template_name(info.chat_template));
            models_form_turn(m, turn == 2, turn == 1 ? "Look." : NULL, got, &err);
            CHECK(strcmp(got + 5 * more_bos, wanted + 5 * no_bos) == 0 && !err.status, "%s%s, case %d:\n  got    %s\n  wanted %s %s", name,
                  jinja ? " by Jinja" : "", turn, got, wanted, err.message);
            astrovl_close(m);
            free(file.data);
        }
    }
    gguf_bytes file;
    astrovl_error err;
    char got[1024];
    astrovl_model *m = models_form(models_forms[7].jinja, ASTROVL_TEMPLATE_AUTO, 1, &file, &err);
    models_form_turn(m, 0, "", got, &err);
    CHECK(strcmp(got, "{<|user|>} \nWhat?{</s>} \n{<|assistant|>} \n") == 0, "zephyr with tokens of its own: %s", got);
    astrovl_close(m);
    free(file.data);
}

// Templates of other forms are not taken for known ones; a turn is refused then, with the names to choose from. What else the file is good
// for still works, and so does a template that is chosen.
static void models_forms_unknown(void) {
    static const char *const unknown[] = {
        "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}",                      // Phi-3
        "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>'}}",         // Phi-4
        "{{ bos_token }}{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] }}",                  // OpenChat
        "{{'### Instruction:\n' + message['content'] + '\n\n'}}{{'### Response:\n' + eos_token}}",                     // Alpaca
        "{{ bos_token }}{{ 'User: ' + message['content'] + '\n\n' }}{{ 'Assistant: ' + message['content'] + eos_token }}", // DeepSeek
        "{{'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' + message['content'] + '<\xEF\xBD\x9C\x41ssistant\xEF\xBD\x9C>'}}",       // DeepSeek-R1
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",                       // Gemma
        "{{ '<|user|>\n' + message['content'] + '\n' }}{{ '<|assistant|>\n' + message['content'] + eos_token }}",       // Falcon 3
        "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{{ '[INST]' + message['content'] + '[/INST]' }}",        // Mistral v7
        "{{ bos_token }}{% set content = '<<SYS>>\\n' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}",               // Vigogne
        "{{-'SYSTEM: ' + message['content'] -}}{{-'USER: ' + message['content'] -}}{{-'ASSISTANT:'-}}",                // Orca
        "{{-'USER: ' + message['content'] + '\\n'-}}{{-'ASSISTANT: ' + message['content'] + '</s>\\n' -}}{{-'ASSISTANT:'-}}", // Vicuna 1.1
        "{{ 'USER: ' + message['content'] + ' '}}{{ 'ASSISTANT: ' + message['content'] + ' '}}{{ 'ASSISTANT: '}}",
        "{{ system_message }}{{ '<|im_start|>user\n' + content + '<|im_end|>\n<|im_start|>assistant\n' }}",            // Yi-1.5
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}{{'<|im_start|>assistant\\n<think>\\n'}}", // QwQ
        "{% set system_message = 'You are DBRX.' %}{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}",    // DBRX
        "{{bos_token}}{{'<|im_start|>system\n' + 'You are a function calling AI model.'}}{{'<|im_start|>' + message['role']}}",  // Hermes 2
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nAvailable functions:' + functions + '<|eot_id|>' }}",        // Functionary
        " ", "<|user|>", "<|user|>eos_token }}"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        gguf_bytes file;
        astrovl_error err;
        astrovl_info info;
        char got[1024];
        int32_t tokens[4];
        astrovl_model *m = models_form(unknown[i], ASTROVL_TEMPLATE_AUTO, 0, &file, &err);
        CHECK(m && astrovl_tokenize(m, "a", 1, 0, tokens, 4, &err) == 2, "%s: %s", unknown[i], err.message);
        astrovl_get_info(m, &info);
        CHECK(info.chat_template == ASTROVL_TEMPLATE_AUTO, "%s: is taken for %s", unknown[i],
              astrovl_template_name(info.chat_template));
        astrovl_close(m);
        free(file.data);
        m = models_form(unknown[i], ASTROVL_TEMPLATE_PLAIN, 0, &file, &err);
        models_form_turn(m, 0, NULL, got, &err);
        CHECK(!err.status && strcmp(got, strstr(unknown[i], "bos_token") ? "{<s>} What?" : " What?") == 0, "chosen: %s %s", got,
              err.message);
        astrovl_close(m);
        free(file.data);
    }
    models_kit kit;
    models_kit_open(&kit, 'a');
    kit.model->info.chat_template = ASTROVL_TEMPLATE_AUTO;   // as that of such a file
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    astrovl_error err = {ASTROVL_OK, ""};
    CHECK(!astrovl_chat(s, NULL, 0, "What?", NULL, &err) && err.status == ASTROVL_ERROR_MODEL && strstr(err.message, "models_a") &&
          strstr(err.message, "chat_template") && strstr(err.message, ASTROVL_TEMPLATE_NAMES), "\"%s\"", err.message);
    astrovl_session_free(s);
    models_kit_close(&kit);
    gguf_bytes file;
    astrovl_info info;
    astrovl_model *m = models_form("{{ bos_token }}{{- \"<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: \" }}",
                                   ASTROVL_TEMPLATE_AUTO, 0, &file, &err);
    astrovl_get_info(m, &info);
    CHECK(info.chat_template == ASTROVL_TEMPLATE_LLAMA3 && info.note && strstr(info.note, "dates"), "LLaMA 3.1: %s", info.note);
    astrovl_close(m);
    free(file.data);
    const size_t size = (size_t)4 << 20;   // recognizing takes linear time
    char *long_one = (char *)malloc(size + 1);
    for (size_t i = 0; i < size; i++) long_one[i] = "<|user|>"[i % 8];
    long_one[size] = 0;
    const clock_t start = clock();
    CHECK(avl__find_template(long_one) == ASTROVL_TEMPLATE_AUTO, "a long one");
    CHECK(strcmp(astrovl_template_name((astrovl_template)avl__find_template("{{ bos_token }}{{ '[INST] ' + text + '[/INST]' }}")),
                 "mistral_v3") == 0, "Mistral 7B Instruct v0.3 without tools");
    char system[] = "{{'<|im_start|>system\\n' + text + '<|im_end|>\\n'}}{{'<|im_start|>system\\nYou help.<|im_end|>\\n'}}";
    const char *found = avl__chatml_system(system);
    CHECK(found && strcmp(found, "You help.") == 0, "the system text that stands behind a given one: %s", found ? found : "none");
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 2.0, "slow");
    free(long_one);
}

// A vocabulary with <im_start> wants it around images, which no template writes: refused where there is a projector.
static void models_form_im_start(void) {
    static const char *const added[] = {"<im_start>", "<im_patch>"};
    size_t size;
    unsigned char *mmproj = read_file("test/golden/models_a_mmproj.gguf", &size);
    for (int i = 0; i < 2; i++) {
        gguf_bytes file = text_begin(3, "llama", 2);
        astrovl_error err = {ASTROVL_OK, ""};
        text_put(&file, "<s>", 3);
        text_put(&file, added[i], 10);
        text_put_array(&file, "tokenizer.ggml.scores", 6, 2, 0, 0, 0);
        const astrovl_memory blocks[] = {{file.data, file.size, "vocab"}, {mmproj, size, "mmproj"}};
        astrovl_model *m = astrovl_open_memory(blocks, 2, NULL, &err);
        CHECK(i ? m != NULL : !m && err.status == ASTROVL_ERROR_UNSUPPORTED && strstr(err.message, "<im_start>"), "%s: %s", added[i],
              err.message);
        astrovl_close(m);
        free(file.data);
    }
    free(mmproj);
}

// llava_v0's answers end before "###", whose tokens leave the conversation again: the next turn begins with it.
static void models_form_stops(void) {
    models_kit kit;
    astrovl_open_options open = {0, ASTROVL_TEMPLATE_LLAVA_V0};
    astrovl_error err = {ASTROVL_OK, ""};
    static const char *const written = "Hi##a###";
    models_kit_open(&kit, 'a');
    astrovl_close(kit.model);
    kit.model = astrovl_open_files(models_a_files, 2, &open, &err);
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    astrovl_generation o;
    astrovl_turn asked = {s, NULL, 0, "What?", &o, NULL, {ASTROVL_OK, ""}};
    avl__turn t;
    memset(&o, 0, sizeof o);
    memset(&t, 0, sizeof t);
    t.asked = &asked;
    t.options = &o;
    t.max_tokens = 20;
    t.logits = (float *)calloc((size_t)kit.model->llama.n_vocab, sizeof *t.logits);
    CHECK(avl__begin_turn(&t) == ASTROVL_OK, "%s", asked.err.message);
    const int n_past = s->cache.n_past;
    for (int i = 0; written[i]; i++) {
        memset(t.logits, 0, (size_t)kit.model->llama.n_vocab * sizeof *t.logits);
        t.logits[kit.model->vocab.byte_ids[(unsigned char)written[i]]] = 1;
        const int32_t token = kit.model->vocab.byte_ids[(unsigned char)written[i]];
        CHECK(avl__write_token(&t) == (i < 7), "character %d", i);
        if (i < 7) CHECK(astrovl_eval_tokens(s, &token, 1, NULL, 0, &err) == ASTROVL_OK, "%s", err.message);
    }
    avl__end_turn(&t);
    CHECK(asked.answer && strcmp(asked.answer, "Hi##a") == 0, "\"%s\"", asked.answer ? asked.answer : "");
    CHECK(s->answer.size == 5 && s->n_unread == 0 && s->cache.n_past == n_past + 5, "%d tokens, %d unread, %d read",
          (int)s->answer.size, s->n_unread, s->cache.n_past - n_past);
    astrovl_free(asked.answer);
    free(t.logits);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// A template whose special tokens the vocabulary lacks is refused when it is used.
static void models_foreign_template(void) {
    models_kit kit;
    astrovl_open_options open;
    astrovl_error err = {ASTROVL_OK, ""};
    models_kit_open(&kit, 'a');
    astrovl_close(kit.model);
    memset(&open, 0, sizeof open);
    open.chat_template = ASTROVL_TEMPLATE_CHATML;
    kit.model = astrovl_open_files(models_a_files, 2, &open, &err);
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    FAILS(!astrovl_chat(s, NULL, 0, "What?", NULL, &err), MODEL, "chatml with a LLaMA-2 vocabulary");
    CHECK(astrovl_session_n_past(s) == 0, "%d positions", astrovl_session_n_past(s));
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// ---- the same bits, however it is run

static void models_hash_bytes(uint64_t *hash, const void *data, size_t size) {   // FNV-1a
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) *hash = (*hash ^ p[i]) * 0x100000001B3u;
}

static void models_hash_tap(void *user, const char *name, int layer, const int64_t *shape, int n_dims,
                            const float *data) {
    size_t n = sizeof(float);
    for (int d = 0; d < n_dims; d++) n *= (size_t)shape[d];
    models_hash_bytes((uint64_t *)user, name, strlen(name));
    models_hash_bytes((uint64_t *)user, &layer, sizeof layer);
    models_hash_bytes((uint64_t *)user, data, n);
}

static void models_threads(void) {
    static const int counts[] = {1, 2, 3, 8};
    for (int which = 'a'; which <= 'b'; which++) {
        models_kit kit;
        models_kit_open(&kit, which);
        for (int mode = 0; mode < 2; mode++) {
            uint64_t first = 0;
            for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
                uint64_t hash = 0xCBF29CE484222325u;
                astrovl_session *s = models_session(&kit, mode ? ASTROVL_EXACT : ASTROVL_FAST, counts[c],
                                                    models_hash_tap, &hash);
                astrovl_generation o = models_options(&kit, 5);
                char *answer = astrovl_chat(s, kit.images, 2, "Which is larger?", &o, NULL);
                CHECK(answer, "no answer with %d threads", counts[c]);
                if (c == 0) first = hash;
                CHECK(hash == first, "model %c, mode %d: %d threads give other bits than one", which, mode, counts[c]);
                astrovl_free(answer);
                astrovl_session_free(s);
            }
        }
        models_kit_close(&kit);
    }
}

// Tokens for a long text: any will do.
static void models_some_tokens(int32_t *tokens, int n, int n_vocab) {
    for (int i = 0; i < n; i++) tokens[i] = (int32_t)((i * 37 + i * i % 11) % n_vocab);
}

// 600 tokens at once (more than one block of the prompt), in pieces, and one by one: the same logits of the last 200.
static void models_pieces(void) {
    enum { N = 600, WANTED = 200 };
    static const int pieces[] = {600, 7, 100, 1, 513};
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[N];
    models_kit_open(&kit, 'b');
    float *expected = models_logits(&kit, WANTED);
    size_t row = models_row_bytes(&kit);
    models_some_tokens(tokens, N, (int)(row / sizeof(float)));
    for (size_t p = 0; p < sizeof pieces / sizeof *pieces; p++) {
        astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
        int at, n;
        float *logits = models_logits(&kit, WANTED);
        for (at = 0; at < N; at += n) {
            n = N - at < pieces[p] ? N - at : pieces[p];
            int wanted = at + n <= N - WANTED ? 0 : at >= N - WANTED ? n : at + n - (N - WANTED);
            float *to = wanted ? logits + (size_t)(at + n - wanted - (N - WANTED)) * (row / sizeof(float)) : NULL;
            CHECK(astrovl_eval_tokens(s, tokens + at, n, to, wanted, &err) == ASTROVL_OK, "%s", err.message);
        }
        if (p == 0) memcpy(expected, logits, WANTED * row);
        for (at = 0; at < WANTED; at++)
            if (memcmp((char *)expected + (size_t)at * row, (char *)logits + (size_t)at * row, row) != 0) break;
        CHECK(at == WANTED, "in pieces of %d, position %d has other logits", pieces[p], N - WANTED + at);
        free(logits);
        astrovl_session_free(s);
    }
    free(expected);
    models_kit_close(&kit);
}

static void models_rewind(void) {
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[40];
    models_kit_open(&kit, 'a');
    size_t row = models_row_bytes(&kit);
    models_some_tokens(tokens, 40, (int)(row / sizeof(float)));
    float *first = models_logits(&kit, 1);
    float *second = models_logits(&kit, 1);
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    CHECK(astrovl_eval_tokens(s, tokens, 20, first, 1, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_eval_tokens(s, tokens + 20, 20, NULL, 0, &err) == ASTROVL_OK, "%s", err.message);
    FAILS(astrovl_session_rewind(s, 41, &err), ARGUMENT, "a rewind to the future");
    FAILS(astrovl_session_rewind(s, -1, &err), ARGUMENT, "a rewind before the beginning");
    CHECK(astrovl_session_rewind(s, 40, &err) == ASTROVL_OK && astrovl_session_n_past(s) == 40, "a rewind to where it is");
    CHECK(astrovl_session_rewind(s, 12, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_session_n_past(s) == 12, "%d positions after a rewind to 12", astrovl_session_n_past(s));
    CHECK(astrovl_eval_tokens(s, tokens + 12, 8, second, 1, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(memcmp(first, second, row) == 0, "other logits after a rewind");
    astrovl_session_reset(s);
    CHECK(astrovl_eval_tokens(s, tokens, 20, second, 1, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(memcmp(first, second, row) == 0, "other logits after a reset");
    free(first);
    free(second);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// The logits of run "one" in a model opened in another way must be the usual ones.
static void models_check_same(const models_kit *kit, astrovl_model *other, const char *what) {
    models_kit twin = *kit;
    float *expected = models_logits(kit, 1), *logits = models_logits(kit, 1);
    const models_value *prompt = models_field(&kit->gold, "one", "prompt");
    astrovl_session *s = models_session(kit, ASTROVL_EXACT, 2, NULL, NULL);
    models_read_prompt(kit, s, prompt, 1024, expected);
    astrovl_session_free(s);
    if (other) {
        twin.model = other;
        s = models_session(&twin, ASTROVL_EXACT, 2, NULL, NULL);
        models_read_prompt(&twin, s, prompt, 1024, logits);
        astrovl_session_free(s);
    }
    CHECK(other && memcmp(expected, logits, models_row_bytes(kit)) == 0, "%s: other logits", what);
    free(expected);
    free(logits);
}

static astrovl_model *models_open_bytes(const unsigned char *data, size_t size, astrovl_error *err) {
    astrovl_memory block;
    block.data = data;
    block.size = size;
    block.name = "block";
    return astrovl_open_memory(&block, 1, NULL, err);
}

static void models_ways_to_open(void) {
    models_kit kit;
    astrovl_open_options no_mmap;
    astrovl_memory blocks[2];
    astrovl_error err = {ASTROVL_OK, ""};
    const char *swapped[2];
    unsigned char *bytes[2];
    models_kit_open(&kit, 'a');
    memset(&no_mmap, 0, sizeof no_mmap);
    no_mmap.no_mmap = 1;
    astrovl_model *m = astrovl_open_files(models_a_files, 2, &no_mmap, &err);
    models_check_same(&kit, m, "read, not mapped");
    astrovl_close(m);
    swapped[0] = models_a_files[1];
    swapped[1] = models_a_files[0];
    m = astrovl_open_files(swapped, 2, NULL, &err);
    models_check_same(&kit, m, "files in the other order");
    astrovl_close(m);
    for (int i = 0; i < 2; i++) {
        size_t size;
        bytes[i] = read_file(models_a_files[i], &size);
        blocks[i].data = bytes[i];
        blocks[i].size = size;
        blocks[i].name = NULL;
    }
    m = astrovl_open_memory(blocks, 2, NULL, &err);
    models_check_same(&kit, m, "memory blocks");
    astrovl_close(m);
    free(bytes[0]);
    free(bytes[1]);
    models_kit_close(&kit);
}

// ---- editing a file in memory

// The bytes of a key's value (after its type), or of a tensor's entry (after its name).  NULL: not there
static unsigned char *models_after(unsigned char *data, size_t size, const char *name, int is_key) {
    size_t n = strlen(name), at;
    for (at = 0; at + n + 12 < size; at++)
        if (avl__load_u64(data + at) == n && memcmp(data + at + 8, name, n) == 0)
            return data + at + 8 + n + (is_key ? 4 : 0);
    return NULL;
}

static void models_store(unsigned char *at, uint32_t value) {
    for (int i = 0; i < 4; i++) at[i] = (unsigned char)(value >> 8 * i);
}

// Every bfloat16 of model B is a float16 too (make_golden.py sees to it): stored as that, it must compute the same.
static void models_f16_and_bf16(void) {
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    size_t size;
    unsigned char *bytes = read_file(models_b_files[0], &size);
    int i, n_changed = 0;
    models_kit_open(&kit, 'b');
    astrovl_gguf *file = astrovl_gguf_open(models_b_files[0], 0, &err);
    for (i = 0; file && i < astrovl_gguf_n_tensors(file); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
        if (t->type != ASTROVL_TYPE_BF16) continue;
        for (uint64_t j = 0; j < t->n_bytes; j += 2) {
            unsigned char *v = bytes + t->offset + j;
            uint32_t bits = (uint32_t)avl__load_u16(v) << 16, sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 0xFF;
            uint32_t half = bits & 0x7FFFFFFF ? sign | (exponent - 127 + 15) << 10 | (bits >> 13 & 0x3FF) : sign;
            v[0] = (unsigned char)half;
            v[1] = (unsigned char)(half >> 8);
        }
        models_store(models_after(bytes, size, t->name, 0) + 4 + 8 * t->n_dims, ASTROVL_TYPE_F16);
        n_changed++;
    }
    CHECK(n_changed > 20, "%d tensors are BF16", n_changed);
    astrovl_gguf_close(file);
    astrovl_model *m = models_open_bytes(bytes, size, &err);
    models_check_same(&kit, m, "F16 in place of BF16");
    astrovl_close(m);
    free(bytes);
    models_kit_close(&kit);
}

// A file whose keys contradict its tensors is refused, with the key or tensor named.
static void models_wrong_keys(void) {
    static const struct { int file; const char *key; uint32_t value; } cases[] = {
        {0, "llama.embedding_length", 25}, {0, "llama.embedding_length", 0},
        {0, "llama.block_count", 4}, {0, "llama.block_count", 0xFFFFFFFF},
        {0, "llama.feed_forward_length", 57}, {0, "llama.context_length", 0}, {0, "llama.context_length", 10 << 20},
        {0, "llama.attention.head_count", 5}, {0, "llama.attention.head_count", 0},
        {0, "llama.attention.head_count_kv", 3}, {0, "llama.attention.head_count_kv", 2},
        {0, "llama.attention.head_count_kv", 0}, {2, "llama.attention.head_count_kv", 4},
        {0, "llama.rope.dimension_count", 5}, {0, "llama.rope.dimension_count", 8},
        {1, "clip.vision.image_size", 35}, {1, "clip.vision.image_size", 0},
        {1, "clip.vision.patch_size", 5}, {1, "clip.vision.patch_size", 0},
        {1, "clip.vision.embedding_length", 24}, {1, "clip.vision.feed_forward_length", 65},
        {1, "clip.vision.attention.head_count", 5}, {1, "clip.vision.attention.head_count", 0},
        {1, "clip.vision.block_count", 3}, {1, "clip.vision.block_count", 0x7FFFFFFF},
        {1, "clip.vision.image_mean", 0xBF800000}, {1, "clip.vision.image_mean", 0x7F800000},        // -1, infinity
        {1, "clip.vision.image_std", 0}, {1, "clip.vision.image_std", 0x7FC00000},                   // NaN
        {0, "llama.attention.layer_norm_rms_epsilon", 0xB727C5AC}, {0, "llama.attention.layer_norm_rms_epsilon", 0x7FC00000},
        {0, "llama.attention.layer_norm_rms_epsilon", 0x7F800000}, {0, "llama.rope.freq_base", 0xC61C4000},   // -1e-5 above
        {0, "llama.rope.freq_base", 0x7FC00000}, {1, "clip.vision.attention.layer_norm_epsilon", 0xB727C5AC},
        {1, "clip.vision.attention.layer_norm_epsilon", 0x7FC00000}, {1, "clip.vision.attention.layer_norm_epsilon", 0x41200000},
        {2, "clip.vision.feature_layer", 4}, {2, "clip.vision.feature_layer", 0xFFFFFFFF}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        astrovl_error err = {ASTROVL_OK, ""};
        size_t size;
        unsigned char *bytes = read_file(models_files[cases[c].file], &size);
        unsigned char *at = models_after(bytes, size, cases[c].key, 1);
        CHECK(at, "%s is not in %s", cases[c].key, models_files[cases[c].file]);
        if (at) {
            int is_array = strstr(cases[c].key, "_layer") || strstr(cases[c].key, "image_mean") ||
                           strstr(cases[c].key, "image_std");   // type, count, values
            models_store(at + (is_array ? 12 : 0), cases[c].value);
            astrovl_model *m = models_open_bytes(bytes, size, &err);
            CHECK(!m && err.status == ASTROVL_ERROR_MODEL && strstr(err.message, "block"), "%s = %u: %s (%s)",
                  cases[c].key, (unsigned)cases[c].value, m ? "opened" : err.message, astrovl_status_name(err.status));
            astrovl_close(m);
        }
        free(bytes);
    }
}

// A file with another key, as gguf_make's words, put before the others; what follows stays aligned.
static unsigned char *models_with_key(const char *path, const char *words, size_t *size) {
    size_t old_size;
    unsigned char *old = read_file(path, &old_size);
    gguf_bytes key = gguf_make(words), b = gguf_make("");
    const size_t filler = 32 + (32 - (key.size - 4 + 1) % 32) % 32;          // a second key, of a text, fills up to 32
    gguf_put(&b, old + 4, 20);
    b.data[16] = (unsigned char)(b.data[16] + 2);
    gguf_put(&b, key.data + 4, key.size - 4);
    gguf_put_number(&b, 1, 8);
    gguf_put(&b, "z", 1);
    gguf_put_number(&b, ASTROVL_VALUE_STRING, 4);
    gguf_put_number(&b, filler - 20, 8);
    gguf_put(&b, NULL, filler - 20);
    gguf_put(&b, old + 24, old_size - 24);
    *size = b.size;
    free(key.data);
    free(old);
    return b.data;
}

// What would change a model's answers without a word is refused, with the key named, its value, and what to do.
static void models_refused_keys(void) {
    static const struct { int file; const char *key, *says, *advice; } cases[] = {
        {0, "'general.type i8 'adapter", "general.type is 'adapter'", "merge a LoRA adapter"},
        {1, "'general.type i8 'imatrix", "general.type is 'imatrix'", "known: 'model' 'mmproj'"},
        {0, "'llama.expert_count i4 i8", "llama.expert_count is '8'", "no mixture of experts"},
        {0, "'llama.attention.causal i7 b0", "llama.attention.causal is '0'", "embeddings"},
        {0, "'split.count i2 h3", "one of 3 files of a model (split.count)", "llama-gguf-split --merge"},
        {0, "'llama.attention.value_length i4 i7", "llama.attention.value_length is not key_length", ""},
        {0, "'llama.attention.value_length i9 i4 q3 i6 i6 i8", "value_length has different values, 6 and 8", "one for all"},
        {0, "'llama.attention.value_length i6 f6.5", "llama.attention.value_length is 6.5", ""},
        {0, "'llama.attention.value_length i9 i4 q0", "value_length is empty", ""},
        {0, "'llama.attention.value_length i8 '6", "value_length is empty or a text", ""},
        {0, "'llama.attention.sliding_window i5 i-1", "llama.attention.sliding_window is -1", ""},
        {0, "'llama.rope.scaling.type i8 'yarn", "llama.rope.scaling.type is 'yarn'", "context was extended"},
        {0, "'llama.rope.scaling.attn_factor i6 f1.5", "llama.rope.scaling.attn_factor is '1.5'", "extended"},
        {0, "'llama.rope.scaling.factor i6 f-2", "llama.rope.scaling.factor is -2", ""},
        {0, "'llama.rope.scaling.factor i6 fnan", "llama.rope.scaling.factor is nan", ""},
        {0, "'llama.rope.scale_linear i6 fnan", "llama.rope.scale_linear is nan", ""},
        {1, "'clip.use_silu i7 b1", "clip.use_silu is '1'", "GELU"},
        {1, "'clip.vision.projector_type i8 'resampler", "clip.vision.projector_type is 'resampler'", "LLaVA-1.5"},
        {1, "'clip.vision.mm_patch_merge_type i8 'spatial_unpad", "mm_patch_merge_type is 'spatial_unpad'", "tiles"},
        {1, "'clip.vision.image_grid_pinpoints i9 i5 q2 i336 i672", "image_grid_pinpoints is '336'", "tiles"},
        {1, "'clip.vision.image_aspect_ratio i8 'anyres", "image_aspect_ratio is 'anyres'", "tiles"},
        {1, "'clip.vision.image_aspect_ratio i8 'pa", "image_aspect_ratio is 'pa'", "'pad' 'square' 'crop'"},
        {1, "'clip.vision.feature_layer i9 i5 q0", "clip.vision.feature_layer is empty", ""},
        {1, "'clip.vision.feature_layer i9 i5 q2 i1 i2", "clip.vision.feature_layer has different values", ""},
        {1, "'clip.vision.feature_layer i9 i5 q1 i9", "clip.vision.feature_layer is 9", ""},
        {1, "'clip.vision.feature_layer i9 i5 q1 i-2", "clip.vision.feature_layer is -2", ""}};
    static const struct { int file; const char *key; } good[] = {
        {0, "'general.type i8 'model"}, {1, "'general.type i8 'mmproj"}, {0, "'llama.expert_count i4 i0"},
        {0, "'llama.attention.causal i7 b1"}, {0, "'split.count i2 h1"}, {1, "'clip.use_silu i7 b0"},
        {0, "'llama.attention.value_length i9 i4 q3 i6 i6 i6"}, {1, "'clip.vision.mm_patch_merge_type i8 'flat"},
        {1, "'clip.vision.image_aspect_ratio i8 'square"}, {1, "'clip.vision.feature_layer i9 i5 q1 i1"},
        {1, "'clip.vision.image_grid_pinpoints i9 i5 q0"}, {1, "'clip.vision.mm_patch_merge_type i8 '"}};
    size_t c, size;
    for (c = 0; c < sizeof cases / sizeof *cases; c++) {
        astrovl_error err = {ASTROVL_OK, ""};
        unsigned char *bytes = models_with_key(models_files[cases[c].file], cases[c].key, &size);
        astrovl_model *m = models_open_bytes(bytes, size, &err);
        CHECK(!m && (err.status == ASTROVL_ERROR_UNSUPPORTED || err.status == ASTROVL_ERROR_MODEL), "%s was opened", cases[c].key);
        CHECK(strncmp(err.message, "block: ", 7) == 0 && strstr(err.message, cases[c].says) && strstr(err.message, cases[c].advice),
              "%s: %s", cases[c].key, err.message);
        astrovl_close(m);
        free(bytes);
    }
    size_t mmproj_size;   // a color in words: the text file is asked first
    unsigned char *text = models_with_key(models_files[0], "'clip.vision.image_mean i9 i8 q3 'a 'b 'c", &size);
    unsigned char *mmproj = read_file(models_files[1], &mmproj_size);
    const astrovl_memory both[] = {{text, size, "text"}, {mmproj, mmproj_size, "mmproj"}};
    astrovl_error color = {ASTROVL_OK, ""};
    CHECK(!astrovl_open_memory(both, 2, NULL, &color) && strstr(color.message, "image_mean must hold three numbers"), "%s", color.message);
    free(text);
    free(mmproj);
    for (c = 0; c < sizeof good / sizeof *good; c++) {
        astrovl_error err = {ASTROVL_OK, ""};
        unsigned char *bytes = models_with_key(models_files[good[c].file], good[c].key, &size);
        astrovl_model *m = models_open_bytes(bytes, size, &err);
        CHECK(m, "%s: %s", good[c].key, err.message);
        astrovl_close(m);
        free(bytes);
    }
}

// RoPE's scaling as llama.cpp reads it: linear where no type is named, the old key where there is no new one, 0: none.
static void models_rope_scaling(void) {
    static const struct { const char *keys; float scale; } cases[] = {
        {"'llama.rope.scaling.factor i6 f4", 4}, {"'llama.rope.scale_linear i6 f8", 8}, {"'llama.rope.scaling.factor i6 f0", 1},
        {"'llama.rope.scale_linear i6 f0", 1}, {"'llama.rope.scaling.factor i4 i2", 2}, {"'llama.rope.scaling.type i8 'linear", 1}};
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *plain = astrovl_open(models_files[0], NULL, &err);
    size_t c, size;
    for (c = 0; c < sizeof cases / sizeof *cases; c++) {
        unsigned char *bytes = models_with_key(models_files[0], cases[c].keys, &size);
        astrovl_model *m = models_open_bytes(bytes, size, &err);
        CHECK(m, "%s: %s", cases[c].keys, err.message);
        for (int i = 0; m && i < m->llama.rope_dim / 2; i++)
            CHECK(m->llama.inv_freq[i] == plain->llama.inv_freq[i] / cases[c].scale, "%s: %g", cases[c].keys, m->llama.inv_freq[i]);
        astrovl_close(m);
        free(bytes);
    }
    astrovl_close(plain);
}

// A sliding window (Mistral's) is full attention up to its size: the context ends there.
static void models_sliding_window(void) {
    size_t size;
    unsigned char *bytes = models_with_key(models_files[0], "'llama.attention.sliding_window i4 i8", &size);
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *m = models_open_bytes(bytes, size, &err);
    astrovl_session *s = astrovl_session_new(m, NULL, &err);
    astrovl_session_options o;
    int32_t tokens[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    CHECK(s && astrovl_session_n_ctx(s) == 8 && m->info.n_ctx_train == 8, "%s", err.message);
    CHECK(astrovl_eval_tokens(s, tokens, 8, NULL, 0, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_eval_tokens(s, tokens, 1, NULL, 0, &err) == ASTROVL_ERROR_LIMIT && strstr(err.message, "-c"), "%s", err.message);
    memset(&o, 0, sizeof o);
    o.n_ctx = 9;
    CHECK(!astrovl_session_new(m, &o, &err) && strstr(err.message, "sliding window"), "%s", err.message);
    astrovl_session_free(s);
    astrovl_close(m);
    free(bytes);
}

// The bytes of a file with a tensor called otherwise (a name as long).
static unsigned char *models_renamed(const char *path, const char *old, const char *name, size_t *size) {
    unsigned char *bytes = read_file(path, size), *after = models_after(bytes, *size, old, 0);
    CHECK(after && strlen(old) == strlen(name), "%s is not in %s", old, path);
    if (after) memcpy(after - strlen(old), name, strlen(name));
    return bytes;
}

// Tensors of other kinds of models are refused, or shown as unused; an unknown type matters to those alone that need it.
static void models_other_tensors(void) {
    static const char *const files[] = {"test/astrovl-tiny.gguf", "test/golden/models_a_text.gguf",
        "test/golden/models_a_mmproj.gguf", "test/golden/models_b.gguf", "test/golden/joint_a.gguf", "test/golden/joint_b.gguf"};
    astrovl_error err = {ASTROVL_OK, ""};
    const char *twice[2];
    size_t size, f;
    unsigned char *bytes, *after;
    astrovl_model *m;
    astrovl_gguf *file;
    for (f = 0; f < sizeof files / sizeof *files; f++) {                 // a good file has no unused tensors
        m = astrovl_open(files[f], NULL, &err);
        for (int i = 0; m && i < astrovl_gguf_n_tensors(astrovl_file(m, 0)); i++)
            CHECK(astrovl_gguf_tensor(astrovl_file(m, 0), i)->is_used, "%s of %s", astrovl_gguf_tensor(astrovl_file(m, 0), i)->name, files[f]);
        astrovl_close(m);
        twice[0] = twice[1] = files[f];
        CHECK(!astrovl_open_files(twice, 2, NULL, &err) && err.status == ASTROVL_ERROR_MODEL && strstr(err.message, files[f]) &&
              strstr(err.message, "give only one"), "%s twice: %s", files[f], err.message);
    }
    bytes = models_renamed(models_a_files[1], "mm.2.bias", "mm.1.bias", &size);
    CHECK(!models_open_bytes(bytes, size, &err) && strstr(err.message, "mm.1.bias") && strstr(err.message, "Yi-VL"), "%s", err.message);
    free(bytes);
    bytes = models_renamed(models_a_files[1], "v.blk.0.attn_k.bias", "model.image_newline", &size);
    CHECK(!models_open_bytes(bytes, size, &err) && strstr(err.message, "image_newline") && strstr(err.message, "1.6"), "%s", err.message);
    free(bytes);
    bytes = models_renamed(models_a_files[1], "v.blk.0.attn_k.bias", "v.blk.0.attn_sinks.", &size);
    m = models_open_bytes(bytes, size, &err);
    file = m ? m->weights.files[0] : NULL;
    CHECK(file && !astrovl_gguf_find_tensor(file, "v.blk.0.attn_sinks.")->is_used, "%s", err.message);
    CHECK(file && astrovl_gguf_find_tensor(file, "v.blk.0.attn_v.bias")->is_used, "%s", err.message);
    after = models_after(bytes, size, "v.blk.0.attn_sinks.", 0);
    models_store(after + 4 + 8, 1000);                                   // (its type) unused, it may be of any type
    astrovl_close(m);
    m = models_open_bytes(bytes, size, &err);
    CHECK(m, "%s", err.message);
    astrovl_close(m);
    free(bytes);
    bytes = read_file(models_a_files[0], &size);
    models_store(models_after(bytes, size, "blk.0.attn_q.weight", 0) + 4 + 16, 23);
    file = astrovl_gguf_open_memory(bytes, size, NULL, &err);
    CHECK(file && astrovl_gguf_find_tensor(file, "blk.0.attn_q.weight")->type == 23, "%s", err.message);
    astrovl_gguf_close(file);
    CHECK(!models_open_bytes(bytes, size, &err) && err.status == ASTROVL_ERROR_UNSUPPORTED &&
          strstr(err.message, "blk.0.attn_q.weight is of type number 23"), "%s", err.message);
    free(bytes);
}

// What is wrong with the vision half names its file, not the language model's.
static void models_part_named(void) {
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_memory blocks[2] = {{NULL, 0, "text.gguf"}, {NULL, 0, "vision.gguf"}};
    unsigned char *text = read_file(models_a_files[0], &blocks[0].size), *vision;
    vision = models_renamed(models_a_files[1], "v.class_embd", "v.class_emba", &blocks[1].size);
    blocks[0].data = text;
    blocks[1].data = vision;
    CHECK(!astrovl_open_memory(blocks, 2, NULL, &err) && strstr(err.message, "vision.gguf: the tensor v.class_embd is missing") &&
          strstr(err.message, "SigLIP"), "%s", err.message);
    free(text);
    free(vision);
}

// NaN and infinity in weights: a vector is refused when it is loaded; a matrix ends the pass, which names the tensor that
// comes out of it. Each tensor in turn is overwritten.
static void models_no_numbers(astrovl_mode mode, const char *isa) {
    static const struct { const char *tensor, *output; } outputs[] = {
        {"token_embd", "model.embed_tokens"}, {"output.weight", "lm_head"}, {"v.patch_embd", "embeddings.patch_embedding"},
        {"mm.0", "multi_modal_projector.linear_1"}, {"mm.2", "multi_modal_projector.linear_2"}, {"attn_q", "self_attn.q_proj"},
        {"attn_k", "self_attn.k_proj"}, {"attn_v", "self_attn.v_proj"}, {"attn_out.", "self_attn.out_proj"},
        {"attn_output", "self_attn.o_proj"}, {"ffn_gate", "mlp.gate_proj"}, {"ffn_up", "mlp.up_proj"}, {"ffn_down", "mlp.down_proj"},
        {"v.blk.%d.ffn_down", "mlp.fc1"}, {"v.blk.%d.ffn_up", "mlp.fc2"}};   // the names that converters before 2025 wrote
    models_kit kit;
    astrovl_session_options o;
    int n_vectors = 0, n_matrices = 0;
    models_kit_open(&kit, 'a');
    memset(&o, 0, sizeof o);
    o.mode = mode;
    o.isa = isa;
    for (int f = 0; f < 2; f++) {
        astrovl_error err = {ASTROVL_OK, ""};
        astrovl_memory blocks[2] = {{NULL, 0, "text"}, {NULL, 0, "vision"}};
        unsigned char *bytes[2];
        astrovl_gguf *file = astrovl_gguf_open(models_a_files[f], 0, &err);
        for (int i = 0; i < 2; i++) {
            bytes[i] = read_file(models_a_files[i], &blocks[i].size);
            blocks[i].data = bytes[i];
        }
        for (int i = 0; file && i < astrovl_gguf_n_tensors(file); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
            const char *number = strstr(t->name, "blk.");
            unsigned char *at = bytes[f] + t->offset, *kept = (unsigned char *)malloc((size_t)t->n_bytes);
            astrovl_model *m;
            char where[64], layer[32] = "";
            memcpy(kept, at, (size_t)t->n_bytes);
            for (size_t k = 0; k < t->n_bytes; k++)                          // infinities, or blocks with a scale that is NaN
                at[k] = (unsigned char)(t->type == ASTROVL_TYPE_F32 ? (k % 4 == 3 ? 0x7F : k % 4 == 2 ? 0x80 : 0) :
                                        t->type == ASTROVL_TYPE_F16 ? (k % 2 ? 0x7C : 0) :
                                        t->type == ASTROVL_TYPE_BF16 ? (k % 2 ? 0x7F : 0x80) : 0xFF);
            m = astrovl_open_memory(blocks, 2, NULL, &err);
            if (!m) {
                CHECK(strstr(err.message, t->name) && strstr(err.message, "NaN"), "%s: %s", t->name, err.message);
                CHECK(t->n_dims == 1 || strstr(t->name, "position"), "%s is a matrix", t->name);
                n_vectors++;
            } else {
                astrovl_session *s = astrovl_session_new(m, &o, &err);
                char *answer = astrovl_chat(s, kit.images, 1, "What is this?", NULL, &err);
                const char *output = NULL;
                for (size_t k = 0; k < sizeof outputs / sizeof *outputs; k++) {
                    snprintf(where, sizeof where, outputs[k].tensor, number ? atoi(number + 4) : 0);
                    if (strstr(t->name, where)) output = outputs[k].output;
                }
                if (number) snprintf(layer, sizeof layer, ".layers.%d.", atoi(number + 4));
                snprintf(where, sizeof where, "%s of the %s: ", output, f ? "image" : "prompt");
                CHECK(!answer && err.status == ASTROVL_ERROR_MODEL && strstr(err.message, "NaN or infinity in ") && output &&
                      strstr(err.message, where) && strstr(err.message, layer), "%s: %s", t->name, answer ? answer : err.message);
                CHECK(astrovl_session_n_past(s) == 0, "%s: positions are left", t->name);
                astrovl_free(answer);
                astrovl_session_free(s);
                n_matrices++;
            }
            astrovl_close(m);
            memcpy(at, kept, (size_t)t->n_bytes);
            free(kept);
        }
        astrovl_gguf_close(file);
        free(bytes[0]);
        free(bytes[1]);
    }
    CHECK(n_vectors > 30 && n_matrices > 30, "%d vectors, %d matrices", n_vectors, n_matrices);
    models_kit_close(&kit);
}
static void models_no_numbers_exact(void) { models_no_numbers(ASTROVL_EXACT, NULL); }
static void models_no_numbers_fast(void) { models_no_numbers(ASTROVL_FAST, NULL); }

// Keys without which llama.cpp opens no model either: each in turn is given another name.
static void models_missing_keys(void) {
    static const struct { int file; const char *key; } cases[] = {
        {0, "llama.embedding_length"}, {0, "llama.block_count"}, {0, "llama.context_length"}, {0, "llama.feed_forward_length"},
        {0, "llama.attention.head_count"}, {0, "llama.attention.layer_norm_rms_epsilon"}, {1, "clip.vision.image_size"},
        {1, "clip.vision.patch_size"}, {1, "clip.vision.embedding_length"}, {1, "clip.vision.feed_forward_length"},
        {1, "clip.vision.block_count"}, {1, "clip.vision.attention.head_count"}, {1, "clip.vision.attention.layer_norm_epsilon"}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        astrovl_error err = {ASTROVL_OK, ""};
        size_t size;
        char name[64], says[128];
        snprintf(name, sizeof name, "%s", cases[c].key);
        name[0] = 'x';
        snprintf(says, sizeof says, "the key %s is missing", cases[c].key);
        unsigned char *bytes = models_renamed(models_files[cases[c].file], cases[c].key, name, &size);
        astrovl_model *m = models_open_bytes(bytes, size, &err);
        CHECK(!m && err.status == ASTROVL_ERROR_MODEL && strstr(err.message, says), "%s: %s", cases[c].key, m ? "opened" : err.message);
        astrovl_close(m);
        free(bytes);
    }
}

// Each tensor of each file in turn is given another name: then either the model is refused with that tensor named, or
// it lacks a part, which the calls that need it say.
static void models_missing_tensors(void) {
    int f, i, n_refused = 0;
    for (f = 0; f < 3; f++) {
        astrovl_error err = {ASTROVL_OK, ""};
        size_t size;
        unsigned char *bytes = read_file(models_files[f], &size);
        astrovl_gguf *file = astrovl_gguf_open(models_files[f], 0, &err);
        for (i = 0; file && i < astrovl_gguf_n_tensors(file); i++) {
            const char *name = astrovl_gguf_tensor(file, i)->name;
            unsigned char *after = models_after(bytes, size, name, 0);
            after[-1] ^= 1;
            astrovl_model *m = models_open_bytes(bytes, size, &err);
            if (!m) {
                int nothing = f == 1 && strcmp(name, "v.patch_embd.weight") == 0;   // is left of an mmproj without that
                CHECK(err.status == ASTROVL_ERROR_MODEL, "without %s: %s", name, err.message);
                CHECK(nothing || strstr(err.message, name), "without %s: %s", name, err.message);
                n_refused++;
            } else {
                astrovl_info info;
                astrovl_get_info(m, &info);
                CHECK(strstr(name, ".bias") || strncmp(name, "v.post_ln", 9) == 0 ||
                      strcmp(name, "output.weight") == 0 ||
                      strcmp(name, "rope_freqs.weight") == 0 || strcmp(name, "mm.2.weight") == 0 ||
                      !info.has_text || !info.has_vision || !info.has_projector, "nobody misses %s", name);
            }
            astrovl_close(m);
            after[-1] ^= 1;
        }
        CHECK(file && i > 20, "%s", err.message);
        astrovl_gguf_close(file);
        free(bytes);
    }
    CHECK(n_refused > 80, "%d tensors are missed", n_refused);
}

// ---- parts of a model

static void models_parts(void) {
    models_kit a, b;
    astrovl_info info;
    astrovl_error err = {ASTROVL_OK, ""};
    const char *mixed[2];
    float *rows;
    int32_t token = 5;
    size_t size;
    models_kit_open(&a, 'a');
    models_kit_open(&b, 'b');
    rows = (float *)malloc(16 * 24 * sizeof *rows);
    // a language model alone talks, and says what it lacks for an image
    astrovl_model *m = astrovl_open(models_a_files[0], NULL, &err);
    CHECK(m, "%s", err.message);
    astrovl_get_info(m, &info);
    CHECK(info.has_text && info.has_vocab && !info.has_vision && !info.has_projector && info.n_image_tokens == 0,
          "parts of a text file");
    FAILS(!astrovl_caption(m, &a.images[0], NULL, &err), MODEL, "a caption without a tower");
    astrovl_session *s = astrovl_session_new(m, NULL, &err);
    FAILS(astrovl_encode_image(s, &a.images[0], rows, &err) != ASTROVL_OK, MODEL, "encoding without a tower");
    astrovl_session_free(s);
    astrovl_close(m);
    // a vision tower with its projector encodes, and does not talk
    m = astrovl_open(models_a_files[1], NULL, &err);
    CHECK(m, "%s", err.message);
    astrovl_get_info(m, &info);
    CHECK(!info.has_text && !info.has_vocab && info.has_vision && info.has_projector && info.n_image_tokens == 16 &&
          info.n_embd == 24, "parts of an mmproj file");
    s = astrovl_session_new(m, NULL, &err);
    CHECK(s && rows && astrovl_encode_image(s, &a.images[0], rows, &err) == ASTROVL_OK, "%s", err.message);
    FAILS(astrovl_eval_tokens(s, &token, 1, NULL, 0, &err) != ASTROVL_OK, MODEL, "tokens without a model");
    FAILS(astrovl_eval_embeddings(s, rows, 1, NULL, 0, &err) != ASTROVL_OK, MODEL, "rows without a model");
    FAILS(!astrovl_chat(s, &a.images[0], 1, "Hello", NULL, &err), MODEL, "a dialogue without a model");
    FAILS(astrovl_tokenize(m, "Hello", 5, 0, NULL, 0, &err) < 0, MODEL, "tokens without a vocabulary");
    FAILS(!astrovl_detokenize(m, &token, 1, &err), MODEL, "text without a vocabulary");
    astrovl_session_free(s);
    astrovl_close(m);
    // a vocabulary alone tokenises
    unsigned char *bytes = read_file(models_a_files[0], &size);
    memset(bytes + 8, 0, 8);      // no tensors
    m = models_open_bytes(bytes, size, &err);
    CHECK(m, "%s", err.message);
    if (m) {
        astrovl_get_info(m, &info);
        CHECK(info.has_vocab && !info.has_text && !info.has_vision, "parts of a vocabulary");
        CHECK(astrovl_tokenize(m, "What", 4, 0, NULL, 0, &err) > 0, "%s", err.message);
        FAILS(!astrovl_ask(m, NULL, "What?", NULL, &err), MODEL, "an answer from a vocabulary");
    }
    astrovl_close(m);
    free(bytes);
    // parts of two models
    mixed[0] = models_a_files[0];
    mixed[1] = models_b_files[0];
    FAILS(!astrovl_open_files(mixed, 2, NULL, &err), MODEL, "A's text with B's projector");
    mixed[1] = "test/golden/there_is_no_such_file.gguf";
    FAILS(!astrovl_open_files(mixed, 2, NULL, &err), FILE, "a file that is not there");
    FAILS(!astrovl_open_files(mixed, 0, NULL, &err), ARGUMENT, "no files");
    FAILS(!astrovl_open("test/golden/models_1.png", NULL, &err), FORMAT, "a picture for a model");
    free(rows);
    models_kit_close(&a);
    models_kit_close(&b);
}

static void models_info(void) {
    models_kit a, b;
    astrovl_info i;
    models_kit_open(&a, 'a');
    models_kit_open(&b, 'b');
    astrovl_get_info(a.model, &i);
    CHECK(i.n_vocab == 384 && i.n_ctx_train == 512 && i.n_embd == 24 && i.n_layer == 3 && i.n_head == 4 &&
          i.n_head_kv == 4 && i.head_dim == 6 && i.n_ff == 56 && i.bos_token == 1 && i.eos_token == 2, "A's text");
    CHECK(i.image_size == 28 && i.patch_size == 7 && i.n_patches == 16 && i.vision_n_embd == 32 &&
          i.vision_n_layer == 2 && i.vision_n_head == 4 && i.vision_n_ff == 64 && i.vision_feature_layer == 2 &&
          i.n_image_tokens == 16, "A's tower");
    CHECK(i.chat_template == ASTROVL_TEMPLATE_VICUNA && strcmp(i.name, "random A") == 0, "A's template and name");
    astrovl_get_info(b.model, &i);
    CHECK(i.n_vocab == 400 && i.n_head == 4 && i.n_head_kv == 2 && i.head_dim == 8 && i.n_patches == 25 &&
          i.vision_n_layer == 3 && i.vision_feature_layer == 2 && i.rope_theta == 500000.0f &&
          i.chat_template == ASTROVL_TEMPLATE_LLAMA3, "B");
    CHECK(astrovl_n_files(a.model) == 2 && astrovl_file(a.model, 1) && !astrovl_file(a.model, 2), "A's files");
    models_kit_close(&a);
    models_kit_close(&b);
}

// ---- limits, failures, and what they leave behind

static astrovl_session *models_small_session(const models_kit *kit, int n_ctx, astrovl_progress progress, void *user) {
    astrovl_session_options o;
    astrovl_error err = {ASTROVL_OK, ""};
    memset(&o, 0, sizeof o);
    o.mode = ASTROVL_EXACT;
    o.n_threads = 2;
    o.n_ctx = n_ctx;
    o.progress = progress;
    o.progress_user = user;
    astrovl_session *s = astrovl_session_new(kit->model, &o, &err);
    CHECK(s, "%s", err.message);
    if (!s) exit(1);
    return s;
}

// Where floats are not IEEE's, exact mode says so, and fast mode works.
static void models_inexact(void) {
    models_kit kit;
    astrovl_session_options o;
    astrovl_error err;
    memset(&o, 0, sizeof o);
    models_kit_open(&kit, 'a');
    for (int i = 0; i < 6; i++) {
        const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO, FE_TONEAREST, FE_TONEAREST};
#if defined(__SSE2__)
        const unsigned control = _mm_getcsr();
        if (i >= 4) _mm_setcsr(control | (i == 4 ? 0x8000 : 0x0040));       // results, operands that are denormal become 0
#else
        if (i >= 4) break;
#endif
        if (i > 0 && i < 4 && (modes[i] == FE_TONEAREST || fesetround(modes[i]) != 0)) continue;
        o.mode = ASTROVL_EXACT;
        astrovl_session *exact = astrovl_session_new(kit.model, &o, &err);
        o.mode = ASTROVL_FAST;
        astrovl_session *fast = astrovl_session_new(kit.model, &o, NULL);
        astrovl_session *fork = exact ? astrovl_session_fork(exact, 0, NULL) : NULL;
        fesetround(FE_TONEAREST);
#if defined(__SSE2__)
        _mm_setcsr(control);
#endif
        CHECK(fast, "case %d: fast mode", i);
        CHECK(!exact == (i > 0), "case %d: %s", i, exact ? "was not noticed" : err.message);
        CHECK(exact || (err.status == ASTROVL_ERROR_UNSUPPORTED && strstr(err.message, i < 4 ? "fesetround" : "-Ofast")), "%s", err.message);
        CHECK(!exact == !fork, "a fork");
        astrovl_session_free(fork);
        astrovl_session_free(exact);
        astrovl_session_free(fast);
    }
    models_kit_close(&kit);
}

static void models_arguments(void) {
    models_kit kit;
    astrovl_session_options o;
    astrovl_image empty = {0, 0, NULL, 1};
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[4] = {3, 4, 5, 6}, beyond = 400, negative = -1;
    models_kit_open(&kit, 'b');
    float *logits = models_logits(&kit, 4);
    memset(&o, 0, sizeof o);
    o.n_ctx = 1025;
    FAILS(!astrovl_session_new(kit.model, &o, &err), ARGUMENT, "a context beyond the model's");
    o.n_ctx = -1;
    FAILS(!astrovl_session_new(kit.model, &o, &err), ARGUMENT, "a negative context");
    astrovl_session *s = models_small_session(&kit, 0, NULL, NULL);
    CHECK(astrovl_session_n_ctx(s) == 1024, "the model's own context: %d", astrovl_session_n_ctx(s));
    FAILS(astrovl_eval_tokens(s, &beyond, 1, NULL, 0, &err) != ASTROVL_OK, ARGUMENT, "token 400 of 400");
    FAILS(astrovl_eval_tokens(s, &negative, 1, NULL, 0, &err) != ASTROVL_OK, ARGUMENT, "token -1");
    FAILS(astrovl_eval_tokens(s, tokens, 0, NULL, 0, &err) != ASTROVL_OK, ARGUMENT, "no tokens");
    FAILS(astrovl_eval_tokens(s, NULL, 3, NULL, 0, &err) != ASTROVL_OK, ARGUMENT, "tokens NULL");
    FAILS(astrovl_eval_tokens(s, tokens, 3, logits, 4, &err) != ASTROVL_OK, ARGUMENT, "4 logits of 3 tokens");
    FAILS(astrovl_eval_tokens(s, tokens, 3, NULL, 1, &err) != ASTROVL_OK, ARGUMENT, "logits NULL");
    FAILS(astrovl_eval_embeddings(s, NULL, 3, NULL, 0, &err) != ASTROVL_OK, ARGUMENT, "rows NULL");
    FAILS(!astrovl_chat(s, kit.images, 2, "One <image> mark.", NULL, &err), ARGUMENT, "one mark for two images");
    FAILS(!astrovl_chat(s, NULL, 1, "What?", NULL, &err), ARGUMENT, "images NULL");
    FAILS(!astrovl_chat(s, &empty, 1, "What?", NULL, &err), ARGUMENT, "an empty image");
    FAILS(!astrovl_chat(s, NULL, 0, NULL, NULL, &err), ARGUMENT, "text NULL");
    astrovl_generation g = models_options(&kit, -1);
    FAILS(!astrovl_chat(s, NULL, 0, "What?", &g, &err), ARGUMENT, "max_tokens -1");
    g = models_options(&kit, 1);
    g.temperature = -1;
    FAILS(!astrovl_chat(s, NULL, 0, "What?", &g, &err), ARGUMENT, "a negative temperature");
    CHECK(astrovl_session_n_past(s) == 0, "%d positions after nothing but mistakes", astrovl_session_n_past(s));
    free(logits);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// Every public function, given NULL for all that may not be NULL: an error where there is one to be returned, never a crash.
// The functions on plain arrays (layers, conversions) are like memcpy: of no elements, NULL is an array.
static void models_nulls(void) {
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_image image = {0, 0, NULL, 1};
    astrovl_info info;
    astrovl_stats stats;
    astrovl_rows rows = {NULL, 1, 1};
    astrovl_hit hit;
    astrovl_fit fit;
    astrovl_memory block = {NULL, 0, NULL};
    const char *path = NULL;
    unsigned char black[3] = {0, 0, 0};
    float x[8];
    int n = -1;
    models_kit_open(&kit, 'a');
    astrovl_session *s = models_small_session(&kit, 0, NULL, NULL);
    // no model
    FAILS(!astrovl_open(NULL, NULL, &err), ARGUMENT, "open");
    FAILS(!astrovl_open_files(NULL, 1, NULL, &err), ARGUMENT, "open_files");
    FAILS(!astrovl_open_files(&path, 1, NULL, &err), ARGUMENT, "open_files, a path NULL");
    FAILS(!astrovl_open_memory(NULL, 1, NULL, &err), ARGUMENT, "open_memory");
    CHECK(!astrovl_open_memory(&block, 1, NULL, &err), "open_memory, a block NULL");
    astrovl_close(NULL);
    memset(&info, 0xFF, sizeof info);
    astrovl_get_info(NULL, &info);
    astrovl_get_info(kit.model, NULL);
    CHECK(info.has_text == 0 && info.n_embd == 0 && info.name[0] == 0, "info of no model");
    CHECK(astrovl_n_files(NULL) == 0 && !astrovl_file(NULL, 0), "files of no model");
    CHECK(astrovl_template_from_name(NULL) == -1, "a template without name");
    FAILS(!astrovl_caption(NULL, &kit.images[0], NULL, &err), ARGUMENT, "caption");
    FAILS(!astrovl_caption_file(NULL, "test/golden/models_1.png", NULL, &err), ARGUMENT, "caption_file");
    FAILS(!astrovl_caption_file(kit.model, NULL, NULL, &err), ARGUMENT, "caption_file, no path");
    FAILS(!astrovl_ask(NULL, NULL, "What?", NULL, &err), ARGUMENT, "ask");
    FAILS(!astrovl_ask(kit.model, NULL, NULL, NULL, &err), ARGUMENT, "ask, no question");
    FAILS(!astrovl_ask_file(NULL, "test/golden/models_1.png", "What?", NULL, &err), ARGUMENT, "ask_file");
    FAILS(!astrovl_ask_file(kit.model, "test/golden/models_1.png", NULL, NULL, &err), ARGUMENT, "ask_file, no question");
    FAILS(astrovl_preprocess(NULL, &kit.images[0], x, &err), ARGUMENT, "preprocess");
    FAILS(astrovl_preprocess(kit.model, NULL, x, &err), ARGUMENT, "preprocess, no image");
    FAILS(astrovl_preprocess(kit.model, &kit.images[0], NULL, &err), ARGUMENT, "preprocess, no pixels");
    FAILS(astrovl_score(NULL, &kit.images[0], &path, 1, &fit, &err), ARGUMENT, "score");
    FAILS(!astrovl_guide_regex(NULL, "a", &err), ARGUMENT, "guide_regex");
    FAILS(!astrovl_guide_schema(NULL, "{}", 2, &err), ARGUMENT, "guide_schema");
    CHECK(astrovl_guide_next(NULL, 0, 0) == -1 && !astrovl_guide_is_accepting(NULL, 0), "guide: states");
    CHECK(astrovl_guide_min_tokens(NULL, 0) == -1, "guide: an answer by no guide");
    FAILS(astrovl_guide_mask(NULL, 0, 1, x, &err), ARGUMENT, "guide_mask");
    astrovl_guide_free(NULL);
    // no session
    FAILS(!astrovl_session_new(NULL, NULL, &err), ARGUMENT, "session_new");
    FAILS(!astrovl_session_fork(NULL, 0, &err), ARGUMENT, "session_fork");
    FAILS(astrovl_session_rewind(NULL, 0, &err), ARGUMENT, "session_rewind");
    astrovl_session_free(NULL);
    astrovl_session_reset(NULL);
    CHECK(astrovl_session_n_past(NULL) == 0 && astrovl_session_n_ctx(NULL) == 0, "positions of no session");
    memset(&stats, 0xFF, sizeof stats);
    astrovl_get_stats(NULL, &stats);
    astrovl_get_stats(s, NULL);
    CHECK(stats.n_answer_tokens == 0 && !astrovl_answer_tokens(NULL, &n) && n == 0, "an answer of no session");
    astrovl_answer_tokens(s, NULL);
    FAILS(!astrovl_chat(NULL, NULL, 0, "What?", NULL, &err), ARGUMENT, "chat");
    FAILS(!astrovl_chat(s, NULL, 0, NULL, NULL, &err), ARGUMENT, "chat, no text");
    FAILS(!astrovl_chat(s, NULL, 1, "What?", NULL, &err), ARGUMENT, "chat, no images");
    FAILS(astrovl_chat_batch(NULL, 1, &err), ARGUMENT, "chat_batch");
    FAILS(astrovl_encode_image(NULL, &kit.images[0], x, &err), ARGUMENT, "encode_image");
    FAILS(astrovl_encode_image(s, NULL, x, &err), ARGUMENT, "encode_image, no image");
    FAILS(astrovl_encode_image(s, &kit.images[0], NULL, &err), ARGUMENT, "encode_image, no features");
    FAILS(astrovl_eval_tokens(NULL, &n, 1, NULL, 0, &err), ARGUMENT, "eval_tokens");
    FAILS(astrovl_eval_tokens(s, NULL, 1, NULL, 0, &err), ARGUMENT, "eval_tokens, no tokens");
    FAILS(astrovl_eval_embeddings(NULL, x, 1, NULL, 0, &err), ARGUMENT, "eval_embeddings");
    FAILS(astrovl_eval_embeddings(s, NULL, 1, NULL, 0, &err), ARGUMENT, "eval_embeddings, no rows");
    FAILS(astrovl_embed_images(NULL, &kit.images[0], 1, 1, x, &err), ARGUMENT, "embed_images");
    FAILS(astrovl_embed_texts(NULL, &path, 1, 1, x, &err), ARGUMENT, "embed_texts");
    CHECK(astrovl_sample(NULL, 0, NULL, NULL, 0, NULL) == -1, "sample of no token");
    // no text, no tokens
    FAILS(astrovl_tokenize(NULL, "a", 1, 0, NULL, 0, &err) < 0, ARGUMENT, "tokenize");
    FAILS(astrovl_tokenize(kit.model, NULL, 1, 0, NULL, 0, &err) < 0, ARGUMENT, "tokenize, no text");
    FAILS(astrovl_tokenize(kit.model, "a", 1, 0, NULL, 9, &err) < 0, ARGUMENT, "tokenize, no room");
    FAILS(astrovl_tokenize(kit.model, "a", (size_t)INT32_MAX / 8 + 1, 0, NULL, 0, &err) < 0, LIMIT, "tokenize, a long text");   // (not read)
    FAILS(astrovl_clip_tokenize(NULL, "a", 1, NULL, 0, &err) < 0, ARGUMENT, "clip_tokenize");
    FAILS(!astrovl_detokenize(NULL, &n, 1, &err), ARGUMENT, "detokenize");
    FAILS(!astrovl_detokenize(kit.model, NULL, 1, &err), ARGUMENT, "detokenize, no tokens");
    CHECK(astrovl_token_piece(NULL, 1).size == 0 && astrovl_token_text(NULL, 1, NULL, 0) == 0 && !astrovl_token_is_end(NULL, 1),
          "a token of no model");
    CHECK(astrovl_token_text(kit.model, 300, NULL, 9) > 0, "how long a token's text is");
    // images
    FAILS(astrovl_image_load(NULL, NULL, &image, &err), ARGUMENT, "image_load");
    CHECK(astrovl_image_decode(NULL, 0, NULL, &image, &err) != ASTROVL_OK, "image_decode");
    FAILS(astrovl_image_resize(NULL, 1, 1, &image, &err), ARGUMENT, "image_resize");
    FAILS(astrovl_image_pad_square(NULL, black, &image, &err), ARGUMENT, "image_pad_square");
    FAILS(astrovl_image_center_crop(NULL, 1, 1, &image, &err), ARGUMENT, "image_center_crop");
    FAILS(astrovl_image_upright(NULL, &err), ARGUMENT, "image_upright");
    astrovl_image_free(NULL);
    CHECK(!astrovl_json_strings(NULL, 1, "a", &n, &err) && !astrovl_json_strings("{}", 2, NULL, &n, &err), "json_strings");
    // search and files
    FAILS(astrovl_search(NULL, x, 1, 1, &hit, &err) < 0, ARGUMENT, "search");
    FAILS(astrovl_search(&rows, x, 1, 1, &hit, &err) < 0, ARGUMENT, "search, no data");
    rows.data = x;
    FAILS(astrovl_search(&rows, NULL, 1, 1, &hit, &err) < 0, ARGUMENT, "search, no query");
    FAILS(astrovl_search(&rows, x, 1, 1, NULL, &err) < 0, ARGUMENT, "search, no hits");
    FAILS(!astrovl_gguf_open(NULL, 0, &err), ARGUMENT, "gguf_open");
    CHECK(!astrovl_gguf_open_memory(NULL, 0, NULL, &err), "gguf_open_memory");
    astrovl_gguf_close(NULL);
    CHECK(astrovl_gguf_name(NULL) && astrovl_gguf_version(NULL) == 0 && astrovl_gguf_size(NULL) == 0,
          "gguf: what it is");
    CHECK(astrovl_gguf_n_tensors(NULL) == 0 && !astrovl_gguf_tensor(NULL, 0) &&
          !astrovl_gguf_find_tensor(NULL, "a"), "gguf: tensors");
    CHECK(astrovl_gguf_n_kv(NULL) == 0 && !astrovl_gguf_kv(NULL, 0) && astrovl_gguf_find_kv(NULL, "a") == -1,
          "gguf: keys");
    CHECK(!astrovl_gguf_find_tensor(astrovl_file(kit.model, 0), NULL) &&
          astrovl_gguf_find_kv(astrovl_file(kit.model, 0), NULL) == -1, "gguf: no name");
    CHECK(astrovl_gguf_int(NULL, 0, 0) == 0 && astrovl_gguf_float(NULL, 0, 0) == 0.0, "gguf: numbers");
    CHECK(astrovl_gguf_string(NULL, 0, 0).size == 0, "gguf: strings");
    // arrays
    astrovl_free(NULL);
    astrovl_layer_norm(NULL, NULL, NULL, NULL, 0, 1.0f);
    astrovl_rms_norm(NULL, NULL, NULL, 0, 1.0f);
    astrovl_softmax(NULL, 0);
    astrovl_gelu(NULL, 0);
    astrovl_quick_gelu(NULL, 0);
    astrovl_silu(NULL, 0);
    astrovl_rope(NULL, 0, 1, NULL);
    astrovl_linear(NULL, NULL, NULL, NULL, 0, 0, 0);
    CHECK(astrovl_dequantize(ASTROVL_TYPE_F32, NULL, NULL, 0) == ASTROVL_OK, "no values");
    CHECK(astrovl_session_n_past(s) == 0, "%d positions", astrovl_session_n_past(s));
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// A session that is warm allocates nothing for a pass of a size it has seen.
static void models_warm(void) {
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[40];
    models_kit_open(&kit, 'a');
    float *logits = models_logits(&kit, 1);
    models_some_tokens(tokens, 40, 384);
    astrovl_session *s = models_small_session(&kit, 0, NULL, NULL);
    for (int i = 0; i < 4; i++) {
        if (i == 2) alloc_fail_at(0);          // from the third time on none may be asked for
        CHECK(astrovl_session_rewind(s, 0, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(astrovl_eval_tokens(s, tokens, 39, NULL, 0, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(astrovl_eval_tokens(s, tokens + 39, 1, logits, 1, &err) == ASTROVL_OK, "%s", err.message);
    }
    CHECK(!alloc_did_fail(), "an allocation in a warm session");
    alloc_fail_at(-1);
    free(logits);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

static void models_full_context(void) {
    models_kit kit;
    astrovl_stats stats;
    astrovl_error err = {ASTROVL_OK, ""};
    int32_t tokens[41];
    char *answer, full[1024];
    models_kit_open(&kit, 'a');
    float *before = models_logits(&kit, 1);
    float *after = models_logits(&kit, 1);
    models_some_tokens(tokens, 41, 384);
    astrovl_session *s = models_small_session(&kit, 40, NULL, NULL);
    FAILS(astrovl_eval_tokens(s, tokens, 41, NULL, 0, &err) != ASTROVL_OK, LIMIT, "41 tokens in 40 places");
    CHECK(astrovl_session_n_past(s) == 0, "%d positions after a refusal", astrovl_session_n_past(s));
    CHECK(astrovl_eval_tokens(s, tokens, 39, NULL, 0, &err) == ASTROVL_OK, "%s", err.message);
    FAILS(astrovl_eval_tokens(s, tokens, 2, NULL, 0, &err) != ASTROVL_OK, LIMIT, "2 tokens in one place");
    CHECK(astrovl_session_n_past(s) == 39, "%d positions after a refusal", astrovl_session_n_past(s));
    CHECK(astrovl_eval_tokens(s, tokens + 39, 1, after, 1, &err) == ASTROVL_OK, "%s", err.message);
    FAILS(astrovl_eval_tokens(s, tokens, 1, NULL, 0, &err) != ASTROVL_OK, LIMIT, "one token in no place");
    astrovl_session_free(s);
    s = models_small_session(&kit, 40, NULL, NULL);
    CHECK(astrovl_eval_tokens(s, tokens, 40, before, 1, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(memcmp(before, after, models_row_bytes(&kit)) == 0, "refusals changed what came after");
    FAILS(!astrovl_chat(s, NULL, 0, "What?", NULL, &err), LIMIT, "a turn in a full context");
    CHECK(astrovl_session_n_past(s) == 40, "%d positions after a refused turn", astrovl_session_n_past(s));
    astrovl_session_free(s);
    // the context ends an answer, which begins as it would have; then there is no room for another turn
    int n_prompt = (int)models_n_rows(&kit, models_field(&kit.gold, "one", "prompt"));
    s = models_small_session(&kit, n_prompt + 10, NULL, NULL);
    astrovl_generation o = models_options(&kit, 64);
    answer = models_ask(&kit, s, "one", 1, &o, &err);
    astrovl_get_stats(s, &stats);
    CHECK(answer && stats.stopped_by_limit, "%s", err.message);
    CHECK(stats.n_answer_tokens >= 10 && stats.n_answer_tokens <= 11, "%d tokens in 10 places", stats.n_answer_tokens);
    models_text(&kit.gold, "one", "text", full, sizeof full);
    CHECK(answer && strncmp(answer, full, strlen(answer)) == 0, "\"%s\" is not how \"%s\" begins",
          answer ? answer : "", full);
    astrovl_free(answer);
    FAILS(!astrovl_chat(s, NULL, 0, "And?", &o, &err), LIMIT, "a turn in a full context");
    astrovl_session_free(s);
    free(before);
    free(after);
    models_kit_close(&kit);
}

typedef struct models_stopper { int calls, stop_at; } models_stopper;

static int models_stop_progress(void *user, const char *stage, int done, int total) {
    models_stopper *stopper = (models_stopper *)user;
    CHECK(strcmp(stage, "image") == 0 || strcmp(stage, "prompt") == 0, "stage %s", stage);
    CHECK(done >= 0 && done <= total && total > 0, "%s %d/%d", stage, done, total);
    return stopper->calls++ == stopper->stop_at;
}

// The two-turn conversation, and between its turns one that is cancelled, at every place where it can be: it must go on
// as if that turn had never been asked.
static void models_cancelled_turns(int which) {
    models_kit kit;
    int stop_at, n_cancelled = 0, n_reports = 1;
    models_kit_open(&kit, which);
    for (stop_at = 0; stop_at < n_reports; stop_at++) {
        models_stopper stopper = {0, -1};
        astrovl_session *s = models_small_session(&kit, 0, models_stop_progress, &stopper);
        astrovl_generation o = models_options(&kit, (int)models_field(&kit.gold, "turn1", "tokens")->count);
        astrovl_error err = {ASTROVL_OK, ""};
        char *answer = models_ask(&kit, s, "turn1", 1, &o, &err);
        models_check_answer(&kit, s, "turn1", answer);
        astrovl_free(answer);
        int n_past = astrovl_session_n_past(s);
        n_reports = stopper.calls;
        stopper.calls = 0;
        stopper.stop_at = stop_at;
        answer = astrovl_chat(s, &kit.images[1], 1, "And this one?", &o, &err);
        stopper.stop_at = -1;
        if (!answer) {
            CHECK(models_failed(&err, 1, ASTROVL_CANCELLED), "report %d said stop", stop_at);
            CHECK(astrovl_session_n_past(s) == n_past, "%d positions after a cancelled turn, %d before",
                  astrovl_session_n_past(s), n_past);
            o.max_tokens = 64;
            answer = models_ask(&kit, s, "turn2", 0, &o, &err);
            models_check_answer(&kit, s, "turn2", answer);
            n_cancelled++;
        }
        astrovl_free(answer);
        astrovl_session_free(s);
    }
    CHECK(n_cancelled >= 5, "cancelled at %d places", n_cancelled);   // before each layer that runs: 2 and 3
    models_kit_close(&kit);
}

static void models_cancelled_a(void) { models_cancelled_turns('a'); }
static void models_cancelled_b(void) { models_cancelled_turns('b'); }

// Fails the n-th allocation for every n, in each of open, session_new and chat.
static void models_out_of_memory(int which) {
    models_kit kit;
    astrovl_session *s = NULL;
    astrovl_session_options options;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *m = NULL;
    char question[256], *answer = NULL;
    long at;
    int failed;
    models_kit_open(&kit, which);
    long live = g_live;
    EACH_ALLOCATION(at, failed, m = models_open(which, NULL, &err)) {
        if (!failed) break;
        FAILS(!m, MEMORY, "open, allocation %ld", at);
        CHECK(g_live == live, "open, allocation %ld: %ld blocks leak", at, g_live - live);
    }
    CHECK(m && at > 50, "%ld allocations in open: %s", at, err.message);
    astrovl_close(m);
    memset(&options, 0, sizeof options);
    options.mode = ASTROVL_EXACT;
    options.n_threads = 3;
    live = g_live;
    EACH_ALLOCATION(at, failed, s = astrovl_session_new(kit.model, &options, &err)) {
        if (!failed) break;
        FAILS(!s, MEMORY, "session_new, allocation %ld", at);
        CHECK(g_live == live, "session_new, allocation %ld: %ld blocks leak", at, g_live - live);
    }
    CHECK(s && at > 4, "%ld allocations in session_new: %s", at, err.message);
    astrovl_generation o = models_options(&kit, (int)models_field(&kit.gold, "turn1", "tokens")->count);
    models_text(&kit.gold, "turn1", "question", question, sizeof question);
    EACH_ALLOCATION(at, failed, answer = astrovl_chat(s, kit.images, 1, question, &o, &err)) {
        if (!failed) break;
        FAILS(!answer, MEMORY, "chat, allocation %ld", at);
        CHECK(astrovl_session_n_past(s) == 0, "chat, allocation %ld: %d positions", at, astrovl_session_n_past(s));
        astrovl_session_free(s);               // each in a new session: a warm one allocates less
        s = astrovl_session_new(kit.model, &options, &err);
    }
    CHECK(at > 20, "%ld allocations in chat", at);
    models_check_answer(&kit, s, "turn1", answer);
    astrovl_free(answer);
    int n_past = astrovl_session_n_past(s);
    o.max_tokens = 64;
    models_text(&kit.gold, "turn2", "question", question, sizeof question);
    EACH_ALLOCATION(at, failed, answer = astrovl_chat(s, NULL, 0, question, &o, &err)) {   // all in one session
        if (!failed) break;
        FAILS(!answer, MEMORY, "second turn, allocation %ld", at);
        CHECK(astrovl_session_n_past(s) == n_past, "second turn, allocation %ld: %d positions", at,
              astrovl_session_n_past(s));
    }
    models_check_answer(&kit, s, "turn2", answer);
    astrovl_free(answer);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

static void models_out_of_memory_a(void) { models_out_of_memory('a'); }
static void models_out_of_memory_b(void) { models_out_of_memory('b'); }

// ---- how an answer ends, and how it is shown

typedef struct models_listener {
    char text[2048];
    int  calls, cancel_at;
} models_listener;

static int models_listen(void *user, const char *text, size_t size) {
    models_listener *l = (models_listener *)user;
    CHECK(size > 0 && ((unsigned char)text[0] & 0xC0) != 0x80, "a piece begins inside a character");
    strncat(l->text, text, size < sizeof l->text - strlen(l->text) - 1 ? size : 0);
    return l->calls++ == l->cancel_at;
}

static void models_streaming(int which) {
    models_kit kit;
    astrovl_generation o;
    astrovl_stats stats;
    models_listener heard;
    astrovl_error err = {ASTROVL_OK, ""};
    char question[256], full[1024], stop[16], *answer;
    const char *stops[2];
    models_kit_open(&kit, which);
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    models_text(&kit.gold, "one", "question", question, sizeof question);
    models_text(&kit.gold, "one", "text", full, sizeof full);
    for (size_t cut = 1; cut + 5 < strlen(full); cut += 7) {         // a stop text anywhere, mostly across tokens
        while (((unsigned char)full[cut] & 0xC0) == 0x80) cut++;
        memcpy(stop, full + cut, 5);
        stop[5] = 0;
        const char *first = strstr(full, stop);
        stops[0] = "this is nowhere in it";
        stops[1] = stop;
        memset(&heard, 0, sizeof heard);
        heard.cancel_at = -1;
        o = models_options(&kit, 64);
        o.stop = stops;
        o.n_stop = 2;
        o.on_text = models_listen;
        o.user = &heard;
        astrovl_session_reset(s);
        answer = astrovl_chat(s, kit.images, 1, question, &o, &err);
        CHECK(answer && first && strlen(answer) == (size_t)(first - full) && memcmp(answer, full, strlen(answer)) == 0,
              "stop at \"%s\": \"%s\"", stop, answer ? answer : err.message);
        CHECK(answer && strcmp(heard.text, answer) == 0, "shown \"%s\", returned \"%s\"", heard.text,
              answer ? answer : "");
        astrovl_get_stats(s, &stats);
        CHECK(!stats.stopped_by_limit || stats.n_answer_tokens == 64, "stopped by a text, not by a limit");
        astrovl_free(answer);
    }
    memset(&heard, 0, sizeof heard);                          // cancelled: the answer so far is kept
    heard.cancel_at = 2;
    o.n_stop = 0;
    astrovl_session_reset(s);
    answer = astrovl_chat(s, kit.images, 1, question, &o, &err);
    CHECK(answer && *answer && strcmp(heard.text, answer) == 0 && strncmp(answer, full, strlen(answer)) == 0 &&
          heard.calls == 3, "cancelled after 3 of %d pieces: \"%s\"", heard.calls, answer ? answer : err.message);
    astrovl_free(answer);
    o.on_text = NULL;
    answer = astrovl_chat(s, NULL, 0, "And?", &o, &err);      // and the conversation goes on
    CHECK(answer, "%s", err.message);
    astrovl_free(answer);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

static void models_streaming_a(void) { models_streaming('a'); }
static void models_streaming_b(void) { models_streaming('b'); }

// With the end token set to the ninth token of the usual answer, that answer is eight tokens long (B: one file).
static void models_end_token(void) {
    models_kit kit;
    astrovl_model *m;
    astrovl_stats stats;
    astrovl_error err = {ASTROVL_OK, ""};
    size_t size;
    unsigned char *bytes = read_file(models_b_files[0], &size);
    unsigned char *at = models_after(bytes, size, "tokenizer.ggml.eos_token_id", 1);
    char full[1024], *answer;
    int n_answer = 0, place;
    models_kit_open(&kit, 'b');
    const models_value *tokens = models_field(&kit.gold, "one", "tokens");
    models_store(at, (uint32_t)models_int(tokens, 8));
    for (place = 0; models_int(tokens, place) != models_int(tokens, 8); place++) {}
    m = models_open_bytes(bytes, size, &err);
    CHECK(m && astrovl_token_is_end(m, models_int(tokens, 8)), "%s", err.message);
    models_kit twin = kit;
    twin.model = m;
    astrovl_session *s = models_session(&twin, ASTROVL_EXACT, 1, NULL, NULL);
    astrovl_generation o = models_options(&kit, 64);
    answer = models_ask(&kit, s, "one", 1, &o, &err);
    models_text(&kit.gold, "one", "text", full, sizeof full);
    astrovl_get_stats(s, &stats);
    astrovl_answer_tokens(s, &n_answer);
    CHECK(answer && n_answer == place && stats.n_answer_tokens == place && !stats.stopped_by_limit &&
          strncmp(answer, full, strlen(answer)) == 0, "%d tokens: \"%s\"", n_answer, answer ? answer : err.message);
    astrovl_free(answer);
    astrovl_session_free(s);
    astrovl_close(m);
    free(bytes);
    models_kit_close(&kit);
}

static void models_one_call(void) {
    models_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    models_kit_open(&kit, 'a');
    astrovl_generation o = models_options(&kit, 12);
    astrovl_session *s = models_session(&kit, ASTROVL_FAST, 2, NULL, NULL);
    char *session_answer = astrovl_chat(s, kit.images, 1, ASTROVL_CAPTION_PROMPT, &o, &err);
    char *answer = astrovl_caption_file(kit.model, "test/golden/models_1.png", &o, &err);
    CHECK(answer && session_answer && strcmp(answer, session_answer) == 0, "caption: %s", err.message);
    astrovl_free(answer);
    answer = astrovl_ask(kit.model, &kit.images[0], ASTROVL_CAPTION_PROMPT, &o, &err);
    CHECK(answer && session_answer && strcmp(answer, session_answer) == 0, "ask: %s", err.message);
    astrovl_free(answer);
    astrovl_free(session_answer);
    answer = astrovl_ask(kit.model, NULL, "How many stars are there?", &o, &err);
    CHECK(answer && *answer, "a question without an image: %s", err.message);
    astrovl_free(answer);
    FAILS(!astrovl_caption_file(kit.model, "test/golden/no_such_image.png", &o, &err), FILE, "no image");
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// Changes bytes, mostly in the keys before the vocabulary, some in the vocabulary, the list of tensors and the weights
// (where they make infinities and NaNs), and runs whatever still opens: errors are fine, crashes are not.
static void models_mutated(void) {
    size_t size;
    unsigned char *bytes = read_file(models_b_files[0], &size);
    astrovl_image image = {0, 0, NULL, 1};
    astrovl_error err = {ASTROVL_OK, ""};
    uint64_t random = 7;
    int round, n_opened = 0, rounds = getenv("MODELS_ROUNDS") ? atoi(getenv("MODELS_ROUNDS")) : 300;
    astrovl_gguf *file = astrovl_gguf_open(models_b_files[0], 0, &err);
    size_t metadata = (size_t)astrovl_gguf_tensor(file, 0)->offset;
    size_t keys = (size_t)(models_after(bytes, size, "tokenizer.ggml.tokens", 1) - bytes);
    astrovl_gguf_close(file);
    CHECK(astrovl_image_load("test/golden/models_1.png", 0, &image, &err) == ASTROVL_OK, "%s", err.message);
    for (round = 0; round < rounds; round++) {
        unsigned char *copy = (unsigned char *)malloc(size);
        const size_t where = random_below(&random, 20);
        const size_t first = where < 15 ? 0 : where < 17 ? keys : metadata;
        memcpy(copy, bytes, size);
        mutate(copy, first, where < 15 ? keys : where < 17 ? metadata : size, &random);
        astrovl_model *m = models_open_bytes(copy, size, &err);
        if (m) {
            astrovl_info info;
            astrovl_get_info(m, &info);
            if (info.image_size <= 4096 && (int64_t)info.n_patches <= 4096) {
                astrovl_generation o;
                astrovl_session_options so;
                char *answer = NULL;
                memset(&o, 0, sizeof o);
                memset(&so, 0, sizeof so);
                o.max_tokens = 3;
                so.n_threads = 1;
                so.n_ctx = info.n_ctx_train < 256 ? 0 : 256;
                astrovl_session *s = astrovl_session_new(m, &so, &err);
                if (s) answer = astrovl_chat(s, &image, 1, "What is <|eot_id|> this?", &o, &err);
                n_opened += answer != NULL;
                astrovl_free(answer);
                astrovl_session_free(s);
            }
        } else {
            CHECK(err.status != ASTROVL_OK && err.message[0], "an error without words");
            if (getenv("MODELS_VERBOSE")) printf("    %s\n", err.message);
        }
        astrovl_close(m);
        free(copy);
    }
    CHECK(n_opened > rounds / 20, "%d of %d mutants ran", n_opened, rounds);
    astrovl_image_free(&image);
    free(bytes);
}

// ---- sampling

static void models_draws(const char *what, const astrovl_generation *o, const int *expected) {
    static const float logits[12] = {1.5f, -0.5f, 2.0f, 0.25f, 1.0f, -3.0f, 1.9f, 0.0f, 2.0f, -1.0f, 0.75f, 1.25f};
    uint64_t state = o->seed;
    for (int i = 0; i < 24; i++) {
        float copy[12];
        memcpy(copy, logits, sizeof copy);
        int32_t token = astrovl_sample(copy, 12, o, NULL, 0, &state);
        CHECK(token == expected[i], "%s: draw %d is %d, expected %d", what, i, (int)token, expected[i]);
    }
}

// Computed with Python: exp in double, sorting, SplitMix64 (whose first output for seed 0 is E220A8397B1DCDAF).
static const int models_draws_plain[24] = {6, 8, 11, 6, 6, 8, 10, 6, 2, 8, 4, 6, 6, 6, 4, 2, 8, 8, 8, 10, 0, 0, 6, 1};
static const int models_draws_cold[24] = {6, 8, 11, 6, 6, 8, 8, 6, 2, 8, 4, 6, 6, 6, 6, 2, 8, 8, 8, 8, 0, 0, 6, 2};
static const int models_draws_top_k[24] = {6, 8, 8, 6, 6, 8, 8, 6, 2, 8, 6, 6, 6, 6, 6, 2, 6, 8, 8, 8, 2, 2, 6, 2};
static const int models_draws_top_p[24] = {6, 8, 8, 2, 2, 8, 8, 6, 2, 8, 2, 6, 2, 6, 2, 0, 6, 8, 6, 8, 0, 0, 6, 0};
static const int models_draws_min_p[24] = {6, 8, 11, 6, 6, 8, 8, 6, 2, 8, 6, 6, 6, 6, 6, 2, 8, 8, 8, 11, 0, 0, 6, 0};
static const int models_draws_all[24] = {0, 6, 2, 6, 0, 6, 8, 8, 6, 6, 8, 6, 6, 2, 0, 0, 0, 0, 6, 6, 8, 6, 6, 6};

static void models_sampling_draws(void) {
    astrovl_generation o;
    memset(&o, 0, sizeof o);
    o.temperature = 1.0f;
    o.seed = 1;
    models_draws("temperature 1", &o, models_draws_plain);
    o.temperature = 0.5f;
    models_draws("temperature 0.5", &o, models_draws_cold);
    o.temperature = 1.0f;
    o.top_k = 3;
    models_draws("top-k 3", &o, models_draws_top_k);
    o.top_k = 0;
    o.top_p = 0.6f;
    models_draws("top-p 0.6", &o, models_draws_top_p);
    o.top_p = 0;
    o.min_p = 0.4f;
    models_draws("min-p 0.4", &o, models_draws_min_p);
    o.top_k = 6;
    o.top_p = 0.8f;
    o.min_p = 0.5f;
    o.seed = 123456789;
    models_draws("all three", &o, models_draws_all);
}

// 40,000 draws come out as often as the softmax says.
static void models_sampling_frequencies(void) {
    static const float p[5] = {0.4f, 0.1f, 0.25f, 0.2f, 0.05f};
    static const float logs[5] = {-0.91629073f, -2.30258509f, -1.38629436f, -1.60943791f, -2.99573227f};
    int counts[5] = {0, 0, 0, 0, 0}, i, n = 40000;
    uint64_t state = 99;
    astrovl_generation o;
    memset(&o, 0, sizeof o);
    o.temperature = 1.0f;
    for (i = 0; i < n; i++) {
        float copy[5];
        memcpy(copy, logs, sizeof copy);
        counts[astrovl_sample(copy, 5, &o, NULL, 0, &state)]++;
    }
    for (i = 0; i < 5; i++) {
        double share = (double)counts[i] / n, difference = share > p[i] ? share - p[i] : p[i] - share;
        CHECK(difference < 0.01, "token %d came in %.4f of the draws, its probability is %.2f", i, share, p[i]);
    }
}

static void models_sampling_edges(void) {
    astrovl_generation o;
    uint64_t state = 5;
    float ties[6] = {-1.0f, 3.0f, 0.0f, 3.0f, 3.0f, 2.0f}, copy[6], one[1] = {-7.0f};
    float penalised[4] = {2.0f, 1.9f, -1.0f, 0.5f};
    float infinite[3];
    int32_t history[5] = {0, 0, 2, 9, -4};
    memcpy(copy, ties, sizeof copy);
    CHECK(astrovl_sample(copy, 6, NULL, NULL, 0, NULL) == 1, "the lowest id wins a tie");
    memset(&o, 0, sizeof o);
    CHECK(astrovl_sample(one, 1, &o, NULL, 0, NULL) == 0, "a vocabulary of one");
    CHECK(astrovl_sample(one, 0, &o, NULL, 0, NULL) == -1, "a vocabulary of none");
    // repetition penalty 2: 2.0 -> 1.0 (once, though it was said twice), -1.0 -> -2.0; ids outside the vocabulary:
    // ignored
    o.repetition_penalty = 2.0f;
    CHECK(astrovl_sample(penalised, 4, &o, history, 5, NULL) == 1, "the penalty moves the choice");
    CHECK(penalised[0] == 1.0f && penalised[1] == 1.9f && penalised[2] == -2.0f && penalised[3] == 0.5f,
          "penalised logits %g %g %g %g", penalised[0], penalised[1], penalised[2], penalised[3]);
    o.repetition_window = 2;      // only 9 and -4 are looked at
    penalised[0] = 2.0f;
    CHECK(astrovl_sample(penalised, 4, &o, history, 5, NULL) == 0, "what lies before the window is forgotten");
    // top-k 1 and a tiny top-p are greedy, ties included
    memset(&o, 0, sizeof o);
    o.temperature = 1.0f;
    for (int i = 0; i < 50; i++) {
        o.top_k = i % 2;
        o.top_p = i % 2 ? 0.0f : 1e-6f;
        memcpy(copy, ties, sizeof copy);
        CHECK(astrovl_sample(copy, 6, &o, NULL, 0, &state) == 1, "top-k %d, top-p %g", o.top_k, o.top_p);
    }
    // a token with logit minus infinity never comes
    memset(&o, 0, sizeof o);
    o.temperature = 1.0f;
    for (int i = 0; i < 200; i++) {
        infinite[0] = infinite[2] = 0.0f;
        infinite[1] = avl__float_from_bits(0xFF800000u);
        CHECK(astrovl_sample(infinite, 3, &o, NULL, 0, &state) != 1, "an impossible token");
    }
}

// The same seed, the same text; another seed, another text.
static void models_sampling_text(void) {
    models_kit kit;
    char *texts[4];
    models_kit_open(&kit, 'a');
    astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    astrovl_generation o = models_options(&kit, 32);
    o.temperature = 1.0f;
    o.top_p = 0.9f;
    o.repetition_penalty = 1.2f;
    for (int i = 0; i < 4; i++) {
        o.seed = i == 3 ? 8 : 7;
        astrovl_session_reset(s);
        texts[i] = astrovl_chat(s, kit.images, 1, "What is in this image?", &o, NULL);
        if (!texts[i]) exit(1);
    }
    CHECK(strcmp(texts[0], texts[1]) == 0 && strcmp(texts[0], texts[2]) == 0, "one seed, two texts: \"%s\", \"%s\"",
          texts[0], texts[1]);
    CHECK(strcmp(texts[0], texts[3]) != 0, "two seeds, one text: \"%s\"", texts[0]);
    for (int i = 0; i < 4; i++) astrovl_free(texts[i]);
    astrovl_session_free(s);
    models_kit_close(&kit);
}

// ---- turns of several conversations together: everything must be as one by one

enum { BATCH_MOST = 17 };

typedef struct batch_talk {       // one conversation, and what is asked in its turn
    astrovl_session   *s;
    astrovl_generation o;
    models_listener    heard;
    char               text[256];
    int                n_images;
} batch_talk;

typedef struct batch_kit {
    const astrovl_model *model;
    const astrovl_image *images;  // 2
    astrovl_guide       *guide;
    astrovl_mode         mode;
    const char          *isa, *system;
} batch_kit;

static astrovl_session *batch_session(const batch_kit *kit, int n_ctx, const astrovl_session *parent) {
    astrovl_session_options o;
    astrovl_error err = {ASTROVL_OK, ""};
    memset(&o, 0, sizeof o);
    o.mode = kit->mode;
    o.isa = kit->isa;
    o.n_threads = 2;
    o.n_ctx = n_ctx;
    astrovl_session *s = parent ? astrovl_session_fork(parent, n_ctx, &err) : astrovl_session_new(kit->model, &o, &err);
    CHECK(s, "%s", err.message);
    if (!s) exit(1);
    return s;
}

// Conversation i's turn (0 or 1): prompts of many lengths, every way to choose tokens, and every way to end.
static void batch_ask(const batch_kit *kit, batch_talk *talk, int i, int turn) {
    static const char *const stops[] = {"no such text", "e"};
    memset(&talk->o, 0, sizeof talk->o);
    memset(&talk->heard, 0, sizeof talk->heard);
    snprintf(talk->text, sizeof talk->text, "Number %d:", i);
    for (int word = 0; word < i % 7; word++) snprintf(talk->text + strlen(talk->text), 32, " what is this?");
    talk->n_images = i > 8 ? 0 : turn == 0 ? i % 3 : i % 4 == 3;      // encoded one by one: more would show no more
    talk->heard.cancel_at = i % 8 == 7 ? 1 : -1;
    talk->o.system = kit->system;
    talk->o.max_tokens = 3 + (i * 5 + turn * 3) % 13;
    talk->o.on_text = models_listen;
    talk->o.user = &talk->heard;
    if (i % 6 == 1) talk->o.temperature = 1.0f, talk->o.seed = (uint64_t)i;
    if (i % 6 == 2) talk->o.stop = stops, talk->o.n_stop = 2;
    if (i % 6 == 3) talk->o.guide = kit->guide, talk->o.max_tokens = 12;
    if (i % 6 == 4) talk->o.repetition_penalty = 1.5f, talk->o.top_k = 5, talk->o.temperature = 0.7f;
    if (i % 6 == 5) talk->o.max_tokens = 1;
}

static astrovl_turn batch_turn(const batch_kit *kit, batch_talk *talk) {
    astrovl_turn t;
    memset(&t, 0, sizeof t);
    t.session = talk->s;
    t.images = kit->images;
    t.n_images = talk->n_images;
    t.text = talk->text;
    t.options = &talk->o;
    return t;
}

// The turn that was taken together with others against the same one taken alone.
static void batch_check(const astrovl_turn *t, const batch_talk *together, const batch_talk *alone, const char *answer, int i, int turn) {
    astrovl_stats a, b;
    int n, m;
    const int32_t *some = astrovl_answer_tokens(together->s, &n), *others = astrovl_answer_tokens(alone->s, &m);
    CHECK(t->answer && answer && strcmp(t->answer, answer) == 0, "turn %d of conversation %d: \"%s\", alone \"%s\"", turn, i,
          t->answer ? t->answer : t->err.message, answer ? answer : "");
    CHECK(n == m && (n == 0 || memcmp(some, others, (size_t)n * sizeof *some) == 0), "turn %d of conversation %d: %d tokens, alone %d", turn, i, n, m);
    CHECK(strcmp(together->heard.text, alone->heard.text) == 0 && together->heard.calls == alone->heard.calls, "shown \"%s\", alone \"%s\"",
          together->heard.text, alone->heard.text);
    CHECK(astrovl_session_n_past(together->s) == astrovl_session_n_past(alone->s), "conversation %d: %d positions, alone %d", i,
          astrovl_session_n_past(together->s), astrovl_session_n_past(alone->s));
    astrovl_get_stats(together->s, &a);
    astrovl_get_stats(alone->s, &b);
    CHECK(a.n_prompt_tokens == b.n_prompt_tokens && a.n_answer_tokens == b.n_answer_tokens && a.stopped_by_limit == b.stopped_by_limit,
          "conversation %d: other stats than alone", i);
}

// Two turns of n conversations; in the end a token read by each must give the same logits.
static void batch_compare(const batch_kit *kit, int n) {
    batch_talk together[BATCH_MOST], alone[BATCH_MOST];
    astrovl_turn turns[BATCH_MOST];
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_info info;
    float *a, *b;
    int i, turn, lengths[40] = {0}, n_lengths = 0;
    astrovl_get_info(kit->model, &info);
    a = (float *)malloc((size_t)info.n_vocab * sizeof *a);
    b = (float *)malloc((size_t)info.n_vocab * sizeof *b);
    for (i = 0; i < n; i++) {
        together[i].s = batch_session(kit, 0, i ? together[i / 2].s : NULL);
        alone[i].s = batch_session(kit, 0, NULL);
    }
    for (turn = 0; turn < 2; turn++) {
        for (i = 0; i < n; i++) {
            batch_ask(kit, &together[i], i, turn);
            turns[i] = batch_turn(kit, &together[i]);
        }
        CHECK(astrovl_chat_batch(turns, n, &err) == ASTROVL_OK, "%s", err.message);
        for (i = 0; i < n; i++) {
            int n_answer;
            batch_ask(kit, &alone[i], i, turn);
            char *answer = astrovl_chat(alone[i].s, kit->images, alone[i].n_images, alone[i].text, &alone[i].o, &err);
            batch_check(&turns[i], &together[i], &alone[i], answer, i, turn);
            astrovl_answer_tokens(alone[i].s, &n_answer);
            if (n_answer < 40) n_lengths += lengths[n_answer]++ == 0;
            astrovl_free(answer);
            astrovl_free(turns[i].answer);
        }
    }
    CHECK(n < 5 || n_lengths > 3, "answers of %d different lengths", n_lengths);
    for (i = 0; i < n; i++) {
        int32_t token = i + 5;
        CHECK(astrovl_eval_tokens(together[i].s, &token, 1, a, 1, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(astrovl_eval_tokens(alone[i].s, &token, 1, b, 1, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(memcmp(a, b, (size_t)info.n_vocab * sizeof *a) == 0, "conversation %d of %d remembers other bits", i, n);
    }
    for (i = n - 1; i >= 0; i--) {
        astrovl_session_free(together[i].s);
        astrovl_session_free(alone[i].s);
    }
    free(a);
    free(b);
}

static void batch_kit_open(batch_kit *kit, const models_kit *models) {
    astrovl_error err = {ASTROVL_OK, ""};
    memset(kit, 0, sizeof *kit);
    kit->model = models->model;
    kit->images = models->images;
    kit->mode = ASTROVL_EXACT;
    kit->system = models->system[0] ? models->system : NULL;
    kit->guide = astrovl_guide_regex(models->model, "[a-e]{2,6}", &err);
    CHECK(kit->guide, "%s", err.message);
}

static void models_batch(int which) {
    static const int sizes[] = {1, 2, 5, BATCH_MOST};
    models_kit models;
    batch_kit kit;
    models_kit_open(&models, which);
    batch_kit_open(&kit, &models);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) batch_compare(&kit, sizes[i]);
    astrovl_guide_free(kit.guide);
    models_kit_close(&models);
}

static void models_batch_a(void) { models_batch('a'); }
static void models_batch_b(void) { models_batch('b'); }

// The shipped model, with all tables of this machine that multiply integers.
static void models_batch_fast(void) {
    models_kit models;
    batch_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *tiny = astrovl_open("test/astrovl-tiny.gguf", NULL, &err), *before;
    CHECK(tiny, "%s", err.message);
    if (!tiny) return;
    models_kit_open(&models, 'a');
    before = models.model;
    models.model = tiny;
    models.system[0] = 0;
    batch_kit_open(&kit, &models);
    kit.mode = ASTROVL_FAST;
    for (int k = 0; k < AVL__N_KERNELS; k++) {
        if (!avl__kernels_run(k) || !avl__all_kernels[k]->multiply) continue;   // as the one before it; as exact mode
        kit.isa = avl__all_kernels[k]->name;
        batch_compare(&kit, 2);
        batch_compare(&kit, 4 + k);
        batch_compare(&kit, BATCH_MOST);
    }
    astrovl_guide_free(kit.guide);
    astrovl_close(tiny);
    models.model = before;
    models_kit_close(&models);
}

// Five turns, of which three fail, each in its own way; the other two, and what is said later, must not notice.
static void models_batch_failures(void) {
    enum { N = 5 };
    static const astrovl_status expected[N] = {ASTROVL_OK, ASTROVL_ERROR_LIMIT, ASTROVL_ERROR_ARGUMENT, ASTROVL_OK, ASTROVL_ERROR_ARGUMENT};
    models_kit models;
    batch_kit kit;
    batch_talk together[N], alone[N];
    astrovl_turn turns[N];
    astrovl_error err = {ASTROVL_OK, ""};
    models_kit_open(&models, 'b');
    batch_kit_open(&kit, &models);
    for (int i = 0; i < N; i++) {
        static const char first[] = "Remember this.";
        together[i].s = batch_session(&kit, i == 1 ? 200 : 0, i ? together[0].s : NULL);
        alone[i].s = batch_session(&kit, i == 1 ? 200 : 0, NULL);
        batch_ask(&kit, &together[i], i, 1);
        astrovl_free(astrovl_chat(together[i].s, NULL, 0, first, &together[i].o, NULL));
        astrovl_free(astrovl_chat(alone[i].s, NULL, 0, first, &together[i].o, NULL));
        batch_ask(&kit, &together[i], i, 0);
        batch_ask(&kit, &alone[i], i, 0);
        if (i == 1) memset(together[i].text, 'x', sizeof together[i].text - 1), together[i].text[sizeof together[i].text - 1] = 0;
        if (i == 2) together[i].o.temperature = -1.0f;
        turns[i] = batch_turn(&kit, &together[i]);
        if (i == 4) turns[i].images = NULL, turns[i].n_images = 1;
    }
    CHECK(astrovl_chat_batch(turns, N, &err) == ASTROVL_ERROR_LIMIT && strcmp(err.message, turns[1].err.message) == 0, "%s", err.message);
    for (int i = 0; i < N; i++) {
        CHECK(turns[i].err.status == expected[i] && (turns[i].err.message[0] != 0) == (expected[i] != ASTROVL_OK) &&
              (turns[i].answer == NULL) == (expected[i] != ASTROVL_OK), "turn %d: %s", i, turns[i].err.message);
        if (turns[i].answer) {
            char *answer = astrovl_chat(alone[i].s, kit.images, alone[i].n_images, alone[i].text, &alone[i].o, &err);
            batch_check(&turns[i], &together[i], &alone[i], answer, i, 0);
            astrovl_free(answer);
            astrovl_free(turns[i].answer);
        }
    }
    for (int i = 0; i < N; i++) {     // those that failed go on as if nothing had been asked
        batch_ask(&kit, &together[i], i, 1);
        batch_ask(&kit, &alone[i], i, 1);
        char *answer = astrovl_chat(together[i].s, NULL, 0, "And now?", &together[i].o, &err);
        char *other = astrovl_chat(alone[i].s, NULL, 0, "And now?", &alone[i].o, &err);
        CHECK(answer && other && strcmp(answer, other) == 0, "after the batch: \"%s\", alone \"%s\"", answer ? answer : err.message, other);
        astrovl_free(answer);
        astrovl_free(other);
    }
    for (int i = N - 1; i >= 0; i--) {
        astrovl_session_free(together[i].s);
        astrovl_session_free(alone[i].s);
    }
    astrovl_guide_free(kit.guide);
    models_kit_close(&models);
}

// The batches that there cannot be: each turn is told, and nothing is done.
static void models_batch_arguments(void) {
    models_kit models, other;
    batch_kit kit, foreign;
    batch_talk talks[4];
    astrovl_turn turns[4];
    astrovl_error err = {ASTROVL_OK, ""};
    models_kit_open(&models, 'b');
    models_kit_open(&other, 'a');
    batch_kit_open(&kit, &models);
    batch_kit_open(&foreign, &other);
    talks[0].s = batch_session(&kit, 64, NULL);
    talks[1].s = batch_session(&kit, 64, talks[0].s);
    talks[2].s = batch_session(&kit, 64, NULL);          // no fork
    talks[3].s = batch_session(&foreign, 64, NULL);      // another model
    for (int wrong = 0; wrong < 4; wrong++) {
        for (int i = 0; i < 2; i++) {
            batch_ask(&kit, &talks[i], i, 1);
            turns[i] = batch_turn(&kit, &talks[i]);
            turns[i].answer = talks[i].text;             // whatever stood there
        }
        turns[1].session = wrong == 0 ? talks[0].s : wrong == 1 ? NULL : talks[wrong].s;
        FAILS(astrovl_chat_batch(turns, 2, &err), ARGUMENT, "wrong session %d", wrong);
        for (int i = 0; i < 2; i++) CHECK(!turns[i].answer && turns[i].err.status == ASTROVL_ERROR_ARGUMENT, "turn %d: %s", i, turns[i].err.message);
        CHECK(astrovl_session_n_past(talks[0].s) == 0, "a turn was begun");
    }
    FAILS(astrovl_chat_batch(turns, 0, &err), ARGUMENT, "no turns");
    FAILS(astrovl_chat_batch(NULL, 1, &err), ARGUMENT, "turns NULL");
    FAILS(!astrovl_chat(NULL, NULL, 0, "What?", NULL, &err), ARGUMENT, "no session");
    FAILS(!astrovl_session_fork(talks[0].s, 1 << 20, &err), ARGUMENT, "a fork with a context beyond the model's");
    FAILS(!astrovl_session_fork(talks[0].s, -1, &err), ARGUMENT, "a fork with a negative context");
    for (int i = 0; i < 4; i++) astrovl_session_free(talks[i].s);     // the parent first
    astrovl_guide_free(kit.guide);
    astrovl_guide_free(foreign.guide);
    models_kit_close(&models);
    models_kit_close(&other);
}

// Every allocation of a batch fails in turn: a turn has the answer that it always has, or it says MEMORY and leaves no trace.
static void models_batch_out_of_memory(void) {
    enum { N = 3 };
    models_kit models;
    batch_kit kit;
    batch_talk talks[N];
    astrovl_turn turns[N];
    astrovl_error err = {ASTROVL_OK, ""};
    char answers[N][512];
    long at;
    int i, done, n_partly = 0;
    models_kit_open(&models, 'a');
    batch_kit_open(&kit, &models);
    for (at = -1, done = 0; !done; at++) {               // -1: as it should be; each in new sessions, which have no scratch memory yet
        int n_answers = 0;
        long live = g_live;
        for (i = 0; i < N; i++) {
            talks[i].s = batch_session(&kit, 0, i ? talks[0].s : NULL);
            batch_ask(&kit, &talks[i], i, 0);
            turns[i] = batch_turn(&kit, &talks[i]);
        }
        alloc_fail_at(at);
        astrovl_chat_batch(turns, N, &err);
        done = at >= 0 && !alloc_did_fail();
        alloc_fail_at(-1);
        for (i = 0; i < N; i++) {
            n_answers += turns[i].answer != NULL;
            if (turns[i].answer) {
                if (at < 0) snprintf(answers[i], sizeof answers[i], "%s", turns[i].answer);
                CHECK(strcmp(turns[i].answer, answers[i]) == 0, "allocation %ld: \"%s\"", at, turns[i].answer);
            } else {
                CHECK(models_failed(&turns[i].err, 1, ASTROVL_ERROR_MEMORY), "turn %d, allocation %ld", i, at);
                CHECK(err.status == ASTROVL_ERROR_MEMORY, "%s", err.message);
                CHECK(astrovl_session_n_past(talks[i].s) == 0, "allocation %ld: %d positions", at, astrovl_session_n_past(talks[i].s));
            }
            astrovl_free(turns[i].answer);
        }
        CHECK(n_answers == N || (at >= 0 && !done), "%d answers with nothing amiss", n_answers);
        n_partly += n_answers > 0 && n_answers < N;
        for (i = N - 1; i >= 0; i--) astrovl_session_free(talks[i].s);
        CHECK(g_live == live, "allocation %ld: %ld blocks leak", at, g_live - live);
    }
    CHECK(at > 40 && n_partly > 0, "%ld allocations; %d times some turns had their answers", at, n_partly);
    astrovl_guide_free(kit.guide);
    models_kit_close(&models);
}

typedef struct batch_watch { int n_rows, n_logits; } batch_watch;

static void batch_on_tap(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    batch_watch *w = (batch_watch *)user;
    (void)layer, (void)n_dims, (void)data;
    if (strcmp(name, "model.embed_tokens") == 0) w->n_rows += (int)shape[0];
    if (strcmp(name, "lm_head") != 0) return;
    w->n_logits += (int)shape[0];
    CHECK(shape[0] == 1, "the tap sees %d conversations", (int)shape[0]);
}

// Who watches sees the conversations one at a time, all rows of all layers; the prompt's logits are the same whether its other rows'
// are asked for, watched, or left out.
static void models_batch_watched(void) {
    enum { N = 30 };
    models_kit kit;
    batch_kit batch;
    batch_watch w = {0, 0};
    batch_talk talks[2];
    astrovl_turn turns[2];
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_stats stats;
    int32_t tokens[N];
    int i, which, wanted, tapped, n_expected = 0, n_answers = 0;
    for (which = 'a'; which <= 'b'; which++) {
        models_kit_open(&kit, which);
        size_t row = models_row_bytes(&kit);
        float *all = models_logits(&kit, N);
        float *some = models_logits(&kit, N);
        models_some_tokens(tokens, N, (int)(row / sizeof(float)));
        astrovl_session *s = models_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
        CHECK(astrovl_eval_tokens(s, tokens, N, all, N, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(astrovl_eval_tokens(s, tokens, 1, all, 1, &err) == ASTROVL_OK, "%s", err.message);   // row 0: what it remembers
        astrovl_session_free(s);
        for (tapped = 0; tapped < 2; tapped++)
            for (wanted = 0; wanted < N; wanted += wanted < 3 ? 1 : 8) {
                batch_watch other = {0, -N};
                s = models_session(&kit, ASTROVL_EXACT, 2, tapped && wanted < 2 ? batch_on_tap : NULL, &other);
                CHECK(astrovl_eval_tokens(s, tokens, N, some, wanted, &err) == ASTROVL_OK, "%s", err.message);
                CHECK(memcmp(some, (char *)all + row * (size_t)(N - wanted), row * (size_t)wanted) == 0, "%d rows wanted, tap %d: other logits",
                      wanted, tapped);
                CHECK(astrovl_eval_tokens(s, tokens, 1, some, 1, &err) == ASTROVL_OK, "%s", err.message);
                CHECK(memcmp(some, all, row) == 0, "%d rows wanted, tap %d: it remembers other bits", wanted, tapped);
                astrovl_session_free(s);
            }
        free(all);
        free(some);
        if (which == 'a') models_kit_close(&kit);
    }
    batch_kit_open(&batch, &kit);
    talks[0].s = models_session(&kit, ASTROVL_EXACT, 2, batch_on_tap, &w);
    talks[1].s = batch_session(&batch, 0, talks[0].s);
    for (i = 0; i < 2; i++) {
        batch_ask(&batch, &talks[i], i, 0);
        turns[i] = batch_turn(&batch, &talks[i]);
    }
    CHECK(astrovl_chat_batch(turns, 2, &err) == ASTROVL_OK, "%s", err.message);
    for (i = 0; i < 2; i++) {
        astrovl_get_stats(talks[i].s, &stats);
        n_expected += stats.n_prompt_tokens + stats.n_answer_tokens - stats.stopped_by_limit;
        n_answers += 1 + stats.n_answer_tokens - stats.stopped_by_limit;
        astrovl_free(turns[i].answer);
    }
    CHECK(w.n_rows == n_expected && w.n_logits == n_answers, "%d rows watched of %d, %d logits of %d", w.n_rows, n_expected, w.n_logits,
          n_answers);
    astrovl_session_free(talks[1].s);
    astrovl_session_free(talks[0].s);
    astrovl_guide_free(batch.guide);
    models_kit_close(&kit);
}

static void tests_models(void) {
    run("models: what the files say", models_info);
    run("models: A layer by layer as transformers", models_layers_a);
    run("models: B layer by layer as transformers", models_layers_b);
    run("models: A's greedy tokens as transformers", models_greedy_a);
    run("models: B's greedy tokens as transformers", models_greedy_b);
    run("models: A's dialogues as transformers", models_chat_a);
    run("models: B's dialogues as transformers", models_chat_b);
    run("models: prompt templates", models_layouts);
    run("models: every template as published, two turns", models_forms_published);
    run("models: unknown templates are refused", models_forms_unknown);
    run("models: a vocabulary with <im_start>", models_form_im_start);
    run("models: llava_v0's answers end before ###", models_form_stops);
    run("models: a template for another vocabulary", models_foreign_template);
    run("models: the same bits with 1, 2, 3, 8 threads", models_threads);
    run("models: the same bits in one piece and in many", models_pieces);
    run("models: rewind and reset", models_rewind);
    run("models: mapped, read, in memory", models_ways_to_open);
    run("models: F16 and BF16 of one value", models_f16_and_bf16);
    run("models: keys that contradict the tensors", models_wrong_keys);
    run("models: keys of other kinds are refused by name", models_refused_keys);
    run("models: RoPE scaling without a type, by the old key, of 0", models_rope_scaling);
    run("models: a sliding window ends the context", models_sliding_window);
    run("models: tensors of other kinds, unused ones, twice the same", models_other_tensors);
    run("models: errors name the part's file", models_part_named);
    run("models: NaN and infinity in each tensor, exact mode", models_no_numbers_exact);
    run("models: NaN and infinity in each tensor, fast mode", models_no_numbers_fast);
    run("models: each required key missing", models_missing_keys);
    run("models: every tensor missing once", models_missing_tensors);
    run("models: parts of a model", models_parts);
    run("models: exact mode where floats are not exact", models_inexact);
    run("models: wrong arguments", models_arguments);
    run("models: NULL for every argument", models_nulls);
    run("models: a warm session allocates nothing", models_warm);
    run("models: a full context", models_full_context);
    run("models: A, cancelled turns leave no trace", models_cancelled_a);
    run("models: B, cancelled turns leave no trace", models_cancelled_b);
    run("models: A out of memory at every allocation", models_out_of_memory_a);
    run("models: B out of memory at every allocation", models_out_of_memory_b);
    run("models: A's answer in pieces, with stop texts", models_streaming_a);
    run("models: B's answer in pieces, with stop texts", models_streaming_b);
    run("models: the end token", models_end_token);
    run("models: one-call functions", models_one_call);
    run("models: mutated files", models_mutated);
    run("models: sampling, fixed draws", models_sampling_draws);
    run("models: sampling, frequencies", models_sampling_frequencies);
    run("models: sampling, edges", models_sampling_edges);
    run("models: sampling, seeds", models_sampling_text);
    run("models: A's turns together as one by one", models_batch_a);
    run("models: B's turns together as one by one", models_batch_b);
    run("models: turns together as one by one, fast mode", models_batch_fast);
    run("models: turns that fail among others", models_batch_failures);
    run("models: turns that cannot go together", models_batch_arguments);
    run("models: turns together, out of memory at every allocation", models_batch_out_of_memory);
    run("models: turns together and prompts' last layers, watched", models_batch_watched);
}


// ---- [12] guided generation -----------------------------------------------------------------------------------------
// Patterns are held against a matcher of the test's own, sets of characters against every code point, masks against every token
// one by one, answers against hand-written readers of what their schemas allow. (test/real_guided.py asks the jsonschema package.)

static const char *const guide_vocabularies[] = {"test/golden/vocab_spm.gguf", "test/golden/vocab_plain.gguf",
    "test/golden/vocab_gpt2.gguf",
                                                 "test/golden/vocab_llamabpe.gguf", "test/golden/vocab_smollm.gguf"};
enum { GUIDE_SPM, GUIDE_PLAIN, GUIDE_GPT2, GUIDE_LLAMABPE, GUIDE_SMOLLM, GUIDE_N };

static int32_t guide_bytes[256];   // tokens of one byte, of the vocabulary opened last

static void guide_find_bytes(const astrovl_model *m) {
    astrovl_info info;
    char text[8];
    astrovl_get_info(m, &info);
    memset(guide_bytes, 0xFF, sizeof guide_bytes);
    for (int32_t t = info.n_vocab - 1; t >= 0; t--)
        if (astrovl_token_text(m, t, text, sizeof text) == 1 && !astrovl_token_is_end(m, t)) guide_bytes[(uint8_t)text[0]] = t;
}

static astrovl_model *guide_model(int which) {
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *m = astrovl_open(guide_vocabularies[which], NULL, &err);
    if (!m) { fprintf(stderr, "%s\n", err.message); exit(1); }
    guide_find_bytes(m);
    return m;
}

static astrovl_guide *guide_schema(const astrovl_model *m, const char *schema, astrovl_error *err) {
    return astrovl_guide_schema(m, schema, strlen(schema), err);
}

static int guide_walk(astrovl_guide *g, int state, const char *text, size_t size) {   // byte by byte; -1: refused
    for (size_t i = 0; i < size && state >= 0; i++) state = astrovl_guide_next(g, state, guide_bytes[(uint8_t)text[i]]);
    return state;
}

static int guide_accepts(astrovl_guide *g, const char *text, size_t size) {
    return astrovl_guide_is_accepting(g, guide_walk(g, 0, text, size));
}

static uint32_t guide_random(uint64_t *state, uint32_t n) { return (uint32_t)(avl__random(state) * n); }

// ---- a matcher for patterns of ASCII characters that interprets their text as it goes: from a set of places in the subject
// (bit i: before byte i) to the set of places where what it read may end

typedef struct guide_naive { const char *p, *subject; int size; } guide_naive;

static uint64_t guide_naive_alternatives(guide_naive *m, uint64_t from);

static int guide_naive_in(int kind, int c) {   // \d \w \s
    int in = (kind | 32) == 'd' ? c >= '0' && c <= '9'
           : (kind | 32) == 'w' ? (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'
                                : c == ' ' || (c >= 9 && c <= 13);
    return kind & 32 ? in : !in;
}

static int guide_naive_escaped(const char **p) {   // a character, with or without a backslash
    int c = *(*p)++, e;
    if (c != '\\') return c;
    e = *(*p)++;
    if (e == 'x') { unsigned value; sscanf(*p, "%2x", &value); *p += 2; return (int)value; }
    return e == 'n' ? 10 : e == 't' ? 9 : e == 'r' ? 13 : e;
}

static int guide_naive_set(const char **p, int c) {   // after [: whether c is in it
    int negate = **p == '^', in = 0, low, high;
    *p += negate;
    while (**p != ']') {
        if (**p == '\\' && strchr("dwsDWS", (*p)[1])) { in |= guide_naive_in((*p)[1], c); *p += 2; continue; }
        low = high = guide_naive_escaped(p);
        if ((*p)[0] == '-' && (*p)[1] != ']') { ++*p; high = guide_naive_escaped(p); }
        in |= c >= low && c <= high;
    }
    ++*p;
    return in != negate;
}

static uint64_t guide_naive_atom(guide_naive *m, uint64_t from) {
    const char *start = m->p;
    uint64_t to = 0;
    int in;
    if (*m->p == '(') {
        m->p += m->p[1] == '?' ? 3 : 1;
        to = guide_naive_alternatives(m, from);
        m->p++;
        return to;
    }
    for (int i = 0; i <= m->size; i++) {   // at size only to get past the atom
        int c = i < m->size ? (unsigned char)m->subject[i] : 1;
        m->p = start;
        if (*m->p == '.') in = c != '\n', m->p++;
        else if (*m->p == '[') m->p++, in = guide_naive_set(&m->p, c);
        else if (*m->p == '\\' && strchr("dwsDWS", m->p[1])) in = guide_naive_in(m->p[1], c), m->p += 2;
        else in = guide_naive_escaped(&m->p) == c;
        if (i < m->size && in && from >> i & 1) to |= (uint64_t)2 << i;
    }
    return to;
}

static uint64_t guide_naive_repeated(guide_naive *m, uint64_t from) {
    const char *atom = m->p, *after;
    uint64_t once = guide_naive_atom(m, from), to, now = from;
    int min = 1, max = 1, k, c = *m->p;
    if (c == '*' || c == '+' || c == '?') {
        min = c == '+', max = c == '?' ? 1 : 1000;
        m->p++;
    } else if (c == '{') {
        min = max = (int)strtol(m->p + 1, (char **)&m->p, 10);
        if (*m->p == ',') max = m->p[1] == '}' ? 1000 : (int)strtol(m->p + 1, (char **)&m->p, 10);
        while (*m->p++ != '}') {}
    } else return once;
    if (*m->p == '?') m->p++;
    after = m->p;
    for (k = 0; k < min; k++) m->p = atom, now = guide_naive_atom(m, now);
    for (to = now; k < max && now; k++) {
        m->p = atom;
        now = guide_naive_atom(m, now) & ~to;
        to |= now;
    }
    m->p = after;
    return to;
}

static uint64_t guide_naive_alternatives(guide_naive *m, uint64_t from) {
    uint64_t to = 0, now;
    for (;; m->p++) {
        for (now = from; *m->p && *m->p != '|' && *m->p != ')';) now = guide_naive_repeated(m, now);
        to |= now;
        if (*m->p != '|') return to;
    }
}

static int guide_naive_match(const char *pattern, const char *subject, int size) {
    guide_naive m;
    m.p = pattern;
    m.subject = subject;
    m.size = size;
    return (int)(guide_naive_alternatives(&m, 1) >> size & 1);
}

// Every string of up to `longest` letters, against both.
static int guide_compare(astrovl_guide *g, const char *pattern, const char *letters, int longest) {
    int n = (int)strlen(letters), size, i, k, bad = 0;
    char text[16];
    for (size = 0; size <= longest; size++) {
        int count = 1;
        for (i = 0; i < size; i++) count *= n;
        for (k = 0; k < count; k++) {
            int v = k;
            for (i = 0; i < size; i++, v /= n) text[i] = letters[v % n];
            if (guide_accepts(g, text, (size_t)size) != guide_naive_match(pattern, text, size) && bad++ == 0)
                fprintf(stderr, "    pattern %s, text %.*s: %d here\n", pattern, size, text, guide_accepts(g, text, (size_t)size));
        }
    }
    return bad;
}

static void guide_random_pattern(uint64_t *seed, int depth, char *out) {   // of the letters a, b, c and 0
    static const char *const atoms[] = {"a", "b", "c", "0", ".", "[ab]", "[^a]", "\\d", "\\w", "[b-c]", "\\D", "[\\d-]", "\\x61",
                                        "[^\\W0]"};
    static const char *const quantifiers[] = {"", "", "", "", "*", "+", "?", "{2}", "{1,}", "{0,2}", "{1,3}", "*?", "{0}",
        "{2,2}?"};
    uint32_t n = 1 + guide_random(seed, 3);
    for (; n > 0; n--) {
        if (depth < 3 && guide_random(seed, 3) == 0) {
            strcat(out, guide_random(seed, 2) ? "(" : "(?:");
            guide_random_pattern(seed, depth + 1, out);
            strcat(out, ")");
        } else strcat(out, atoms[guide_random(seed, sizeof atoms / sizeof *atoms)]);
        strcat(out, quantifiers[guide_random(seed, sizeof quantifiers / sizeof *quantifiers)]);
        if (n > 1 && guide_random(seed, 4) == 0) strcat(out, "|");
    }
}

static void test_guide_patterns(void) {
    static const char *const fixed[] = {
        "", "a", "abc", "a|b", "a|", "|", "(|a)b", "a*", "a+b?", "(ab)*", "(a|b)*c", "a{3}", "a{2,}", "a{1,3}b", "(a*)*",
        "(a?){3}", "(a|ab)(c|bc)", "((a)|(b))+", "[abc]{2}", "[^abc]", "[a-c]+0", "\\w+", "\\D*0", ".", ".*a.*", "\\.|\\*|a",
        "(a{2}){2}", "(a{0,2}b){1,2}", "a{0}", "a{0}b", "()", "(){3}a", "(a|b|c|0){0,4}", "[a\\]]", "[\\-a]", "[a-]", "a*?b+?c??",
        "0{0,}"};
    astrovl_model *m = guide_model(GUIDE_GPT2);
    astrovl_error err = {ASTROVL_OK, ""};
    uint64_t seed = 5;
    int i, limits = 0;
    for (i = 0; i < (int)(sizeof fixed / sizeof *fixed) + 600; i++) {
        char random[2000] = "";
        const char *pattern = fixed[i < (int)(sizeof fixed / sizeof *fixed) ? i : 0];
        astrovl_guide *g;
        if (i >= (int)(sizeof fixed / sizeof *fixed)) guide_random_pattern(&seed, 0, random), pattern = random;
        g = astrovl_guide_regex(m, pattern, &err);
        CHECK(g, "%s: %s", pattern, err.message);
        limits += !g;
        if (g) CHECK(guide_compare(g, pattern, "abc0", 5) == 0, "%s", pattern);
        astrovl_guide_free(g);
    }
    CHECK(limits == 0, "%d refused", limits);
    for (i = 0; i < 4; i++) {   // anchors at the ends mean nothing
        static const char *const anchored[] = {"^ab", "ab$", "^ab$", "^a|ab$"};
        astrovl_guide *g = astrovl_guide_regex(m, anchored[i], &err);
        CHECK(g && guide_accepts(g, "ab", 2) && !guide_accepts(g, "abc", 3) && !guide_accepts(g, "ab$", 3), "%s", anchored[i]);
        astrovl_guide_free(g);
    }
    astrovl_close(m);
}

// ---- characters

static void test_guide_characters(void) {
    static const struct { const char *pattern; uint32_t low, high; int inside; } sets[] = {
        {"[\\u00e4-\\u03a9]", 0xE4, 0x3A9, 1}, {"[^\\u0700-\\uFFF0]", 0x700, 0xFFF0, 0}, {"[\\ud800\\udc00-\\udbff\\udfff]",
         0x10000, 0x10FFFF, 1},
        {"[\\u0001-\\ud900\\udc05]", 1, 0x50005, 1}, {"[\xC3\xA4-\xF0\x9F\x98\x80]", 0xE4, 0x1F600, 1}, {"\xE4\xB8\xAD", 0x4E2D,
         0x4E2D, 1},
        {"[^\\uFFFF]", 0xFFFF, 0xFFFF, 0}, {".", '\n', '\n', 0}, {"[\\x7f-\\u0080]", 0x7F, 0x80, 1}, {"[\\u07ff-\\u0800]", 0x7FF,
         0x800, 1}};
    astrovl_model *m = guide_model(GUIDE_GPT2);
    astrovl_error err = {ASTROVL_OK, ""};
    uint64_t seed = 3;
    int bad;
    for (int i = 0; i < (int)(sizeof sets / sizeof *sets) + 20; i++) {
        char pattern[64], text[4];
        uint32_t low = guide_random(&seed, 0xD800), high = low + guide_random(&seed, 0xD800 - low), c;
        int inside = i & 1;
        snprintf(pattern, sizeof pattern, "[%s\\u%04x-\\u%04x]", inside ? "" : "^", (unsigned)low, (unsigned)high);
        if (i < (int)(sizeof sets / sizeof *sets)) {
            low = sets[i].low, high = sets[i].high, inside = sets[i].inside;
            strcpy(pattern, sets[i].pattern);
        }
        astrovl_guide *g = astrovl_guide_regex(m, pattern, &err);
        CHECK(g, "%s: %s", pattern, err.message);
        for (c = 0, bad = 0; g && c < 0x110000; c++)
            if (c < 0xD800 || c > 0xDFFF)
                bad += guide_accepts(g, text, avl__utf8_write(c, text)) != ((c >= low && c <= high) == inside);
        CHECK(bad == 0, "%s: %d characters are wrong", pattern, bad);
        astrovl_guide_free(g);
    }
    for (int i = 0; i < 2; i++) {   // only UTF-8 passes
        astrovl_guide *g = i ? guide_schema(m, "{\"type\": \"string\"}", &err) : astrovl_guide_regex(m, "\"[^\"\\\\]\"", &err);
        bad = 0;
        for (uint32_t c = 0; g && c < 4000000; c++) {
            char text[8] = {'"', 0, 0, 0, 0, 0, 0, 0};
            uint64_t seed_c = c;
            size_t n = c < 65536 ? 2 : 3 + c % 2, k, length;
            int valid = 1, characters = 0;
            for (k = 0; k < n; k++)
                text[1 + k] = (char)(c < 65536 ? c >> 8 * k : k == 0 ? 0xE0 + c % 22 : 0x78 + guide_random(&seed_c, 0x50));
            text[1 + n] = '"';
            if (strchr(text + 1, '"') != text + 1 + n || strchr(text, '\\') || memchr(text + 1, 0, n)) continue;
            for (k = 1; k <= n && valid; k += length, characters++) {
                int32_t character = avl__utf8_read(text + k, n + 1 - k, &length);
                valid = character >= 0 && !(i && character < 32);
            }
            valid &= i || characters == 1;
            bad += guide_accepts(g, text, n + 2) != valid;
        }
        CHECK(g && bad == 0, "%d of the byte sequences are wrong", bad);
        astrovl_guide_free(g);
    }
    astrovl_close(m);
}

// ---- masks

static const char guide_small_schema[] =
    "{\"type\": \"object\", \"properties\": {\"kinds\": {\"type\": \"array\", \"items\": {\"type\": \"string\", \"maxLength\": 6}, "
    "\"maxItems\": 3}, \"n\": {\"type\": [\"integer\", \"null\"]}, \"x\": {\"enum\": [\"a\\\"b\", 1.5, [true]]}}, "
    "\"required\": [\"n\"]}";

// The states reached first, and every token: the mask says what trying the token says; and somewhere it goes on as min_tokens
// promises.
static void guide_check_masks(const astrovl_model *m, astrovl_guide *g, const char *what) {
    static const int extra[] = {0, 1, 2, 5, 1000};
    enum { STATES = 500 };
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_info info;
    float *logits;
    int states[STATES] = {0}, n_states = 1, i, k, t, bad = 0;
    astrovl_get_info(m, &info);
    logits = (float *)malloc((size_t)info.n_vocab * sizeof *logits);
    for (k = 0; k < n_states; k++) {
        int state = states[k], n = astrovl_guide_min_tokens(g, state), promise = n == 0;
        bad += n < 0 || (n == 0) != astrovl_guide_is_accepting(g, state);
        for (i = 0; i < 5; i++) {
            int n_left = n + extra[i], any = 0;
            astrovl_status status;
            for (t = 0; t < info.n_vocab; t++) logits[t] = 1.0f;
            status = astrovl_guide_mask(g, state, n_left, logits, &err);
            for (t = 0; t < info.n_vocab; t++) {
                int next = astrovl_guide_next(g, state, t), to_end = astrovl_guide_min_tokens(g, next), known;
                int may = astrovl_token_is_end(m, t) ? n == 0 : next >= 0 && to_end <= n_left - 1;
                bad += (logits[t] == 1.0f) != may || (!may && logits[t] != -INFINITY);
                bad += astrovl_token_is_end(m, t) && next >= 0;
                promise |= next >= 0 && to_end == n - 1;
                bad += next == 0;
                any |= may;
                for (known = 0; known < n_states && states[known] != next;) known++;
                if (next > 0 && known == n_states && n_states < STATES) states[n_states++] = next;
            }
            bad += status != (any ? ASTROVL_OK : ASTROVL_ERROR_LIMIT);
        }
        if (n > 0) bad += astrovl_guide_mask(g, state, n - 1, logits, &err) != ASTROVL_ERROR_LIMIT;
        bad += !promise;
    }
    CHECK(bad == 0, "%s: %d disagreements in %d states", what, bad, n_states);
    free(logits);
}

static void test_guide_masks(void) {
    static const char *const patterns[] = {"a(b|c)*d?[0-9]{2,4}", "", "x?", "[^\"]{0,40}", ".*", " ?the (galaxy|star)s?",
        "the [a-z ]{1,20}\\."};
    astrovl_error err = {ASTROVL_OK, ""};
    for (int which = 0; which < GUIDE_N; which++) {
        astrovl_model *m = guide_model(which);
        astrovl_guide *g;
        for (int i = 0; i < (int)(sizeof patterns / sizeof *patterns); i++) {
            g = astrovl_guide_regex(m, patterns[i], &err);
            CHECK(g, "%s: %s", patterns[i], err.message);
            if (g) guide_check_masks(m, g, patterns[i]);
            astrovl_guide_free(g);
        }
        g = guide_schema(m, guide_small_schema, &err);
        if (which == GUIDE_PLAIN) FAILS(!g, MODEL, "a vocabulary without braces");
        else CHECK(g, "%s", err.message);
        if (g) guide_check_masks(m, g, guide_vocabularies[which]);
        astrovl_guide_free(g);
        astrovl_close(m);
    }
}

// Thousands of states, of a pattern that repeats itself and of one that never does, each visited twice; memory grows in few blocks.
static void test_guide_many_masks(void) {
    astrovl_model *m = guide_model(GUIDE_SMOLLM);
    astrovl_info info;
    float *logits;
    char pattern[1601] = "([ab]{3}[01]{2}){500}";
    uint64_t seed = 1;
    astrovl_get_info(m, &info);
    logits = (float *)malloc((size_t)info.n_vocab * sizeof *logits);
    for (int which = 0; which < 2; which++) {
        astrovl_error err = {ASTROVL_OK, ""};
        astrovl_guide *g;
        int bad = 0, n_states = 0;
        for (int t = 0; which && t < 1600; t++) pattern[t] = "abcde"[guide_random(&seed, 5)];
        g = astrovl_guide_regex(m, pattern, &err);
        CHECK(g, "%s", err.message);
        long live = g_live;
        for (int round = 0; g && round < 2; round++) {
            int state = 0;
            for (n_states = 0; state >= 0 && astrovl_guide_min_tokens(g, state) > 0; n_states++) {
                char byte = which ? pattern[n_states] : n_states % 5 < 3 ? 'a' : '1';
                for (int t = 0; t < info.n_vocab; t++) logits[t] = 1.0f;
                bad += astrovl_guide_mask(g, state, 100000, logits, &err) != ASTROVL_OK;
                for (int t = 0; t < info.n_vocab; t++) bad += (logits[t] == 1.0f) != (astrovl_guide_next(g, state, t) >= 0);
                state = guide_walk(g, state, &byte, 1);
            }
            CHECK(n_states == (which ? 1600 : 2500), "%d states", n_states);
        }
        CHECK(bad == 0, "%d are wrong", bad);
        CHECK(g_live - live < 10, "%ld blocks of memory", g_live - live);
        astrovl_guide_free(g);
    }
    free(logits);
    astrovl_close(m);
}

// The answer's first token may bring a space along.
static void test_guide_first_token(void) {
    astrovl_model *m = guide_model(GUIDE_SPM);
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_guide *plain = astrovl_guide_regex(m, "[a-z]{1,30}", &err), *spaced = astrovl_guide_regex(m, "( ?[a-z]){1,30}", &err);
    astrovl_info info;
    int t, n_dropped = 0, n_kept = 0;
    astrovl_get_info(m, &info);
    for (t = 0; t < info.n_vocab; t++) {
        char text[64];
        int n = astrovl_token_text(m, t, text, 64), i, letters = n > 1 && n < 30 && text[0] == ' ';
        for (i = 1; i < n && i < 64; i++) letters &= text[i] >= 'a' && text[i] <= 'z';
        if (n == 1 && text[0] == ' ') CHECK(astrovl_guide_next(plain, 0, t) < 0, "nothing but a space");
        if (!letters) continue;
        CHECK(astrovl_guide_next(plain, 0, t) == guide_walk(plain, 0, text + 1, (size_t)n - 1), "token %d", t);
        CHECK(astrovl_guide_next(spaced, 0, t) == guide_walk(spaced, 0, text, (size_t)n), "token %d", t);
        CHECK(astrovl_guide_next(plain, 0, t) >= 0 && astrovl_guide_next(spaced, 0, t) >= 0, "token %d", t);
        CHECK(astrovl_guide_next(plain, guide_walk(plain, 0, "a", 1), t) < 0, "token %d: a space within", t);
        n_dropped++;
        n_kept += astrovl_guide_next(spaced, astrovl_guide_next(spaced, 0, t), t) >= 0;
    }
    CHECK(n_dropped > 10 && n_kept > 10, "%d tokens begin with a space", n_dropped);
    CHECK(astrovl_guide_next(plain, -1, 5) < 0 && astrovl_guide_next(plain, 1 << 30, 5) < 0 &&
          astrovl_guide_next(plain, 0, -1) < 0 && astrovl_guide_next(plain, 0, 1 << 30) < 0 &&
          astrovl_guide_min_tokens(plain, -1) == -1 && !astrovl_guide_is_accepting(plain, -1), "out of range");
    CHECK(astrovl_guide_next(NULL, 0, 5) == -1 && astrovl_guide_min_tokens(NULL, 0) == -1 && !astrovl_guide_is_accepting(NULL, 0) &&
          astrovl_guide_mask(NULL, 0, 9, NULL, &err) == ASTROVL_ERROR_ARGUMENT &&
          astrovl_guide_mask(plain, 0, 9, NULL, NULL) == ASTROVL_ERROR_ARGUMENT, "NULL");
    astrovl_guide_free(plain);
    astrovl_guide_free(spaced);
    astrovl_guide_free(NULL);
    astrovl_close(m);
}

// ---- whole answers: random logits, every number of tokens from the fewest that suffice on

typedef struct guide_reader { const char *p; int bad; } guide_reader;   // of JSON with at most one space after , and :

static void guide_expect(guide_reader *r, const char *text) {
    if (strncmp(r->p, text, strlen(text)) != 0) r->bad = 1;
    else r->p += strlen(text);
}

static int guide_take(guide_reader *r, char c) {
    if (*r->p != c) return 0;
    r->p++;
    if ((c == ',' || c == ':') && *r->p == ' ') r->p++;
    return 1;
}

static void guide_key(guide_reader *r, const char *quoted) {
    guide_expect(r, quoted);
    if (!guide_take(r, ':')) r->bad = 1;
}

static void guide_text(guide_reader *r, int min, int max) {   // a string of min to max characters
    int n = 0, i;
    size_t length;
    guide_expect(r, "\"");
    while (!r->bad && *r->p != '"') {
        if ((unsigned char)*r->p < 32) r->bad = 1;
        else if (*r->p == '\\' && r->p[1] == 'u') {
            for (i = 2; i < 6; i++) if (!strchr("0123456789abcdefABCDEF", r->p[i]) || !r->p[i]) r->bad = 1;
            if ((r->p[2] == 'd' || r->p[2] == 'D') && r->p[3] > '7') r->bad = 1;
            if (!r->bad) r->p += 6;
        } else if (*r->p == '\\') {
            if (!r->p[1] || !strchr("\"\\/bfnrt", r->p[1])) r->bad = 1;
            else r->p += 2;
        } else {
            if (avl__utf8_read(r->p, strlen(r->p), &length) < 0) r->bad = 1;
            r->p += length;
        }
        n++;
    }
    guide_expect(r, "\"");
    if (n < min || (max >= 0 && n > max)) r->bad = 1;
}

static void guide_number(guide_reader *r, int is_integer) {
    int n = 0;
    guide_take(r, '-');
    if (!guide_take(r, '0')) for (; *r->p >= '0' && *r->p <= '9'; n++) r->p++; else n = 1;
    if (n < 1 || n > 15) r->bad = 1;
    if (is_integer) return;
    if (guide_take(r, '.')) {
        for (n = 0; *r->p >= '0' && *r->p <= '9'; n++) r->p++;
        if (n < 1 || n > 15) r->bad = 1;
    }
    if (*r->p == 'e' || *r->p == 'E') {
        r->p += 1 + (r->p[1] == '+' || r->p[1] == '-');
        for (n = 0; *r->p >= '0' && *r->p <= '9'; n++) r->p++;
        if (n < 1 || n > 2) r->bad = 1;
    }
}

static void guide_one_of(guide_reader *r, const char *const *choices) {   // the longest that fits
    size_t best = 0;
    for (; *choices; choices++)
        if (strncmp(r->p, *choices, strlen(*choices)) == 0 && strlen(*choices) > best) best = strlen(*choices);
    if (!best) r->bad = 1;
    r->p += best;
}

static void guide_read_paperclip(guide_reader *r) {
    int n;
    guide_expect(r, "{");
    for (int key = 0; key < 2 && !r->bad; key++) {
        if (key && !guide_take(r, ',')) r->bad = 1;
        guide_key(r, key ? "\"science_use_cases\"" : "\"objects_and_phenomena\"");
        guide_expect(r, "[");
        for (n = 1; !r->bad; n++) {
            guide_text(r, key ? 0 : 2, key ? -1 : 9);
            if (!guide_take(r, ',')) break;
        }
        if (!key && n > 4) r->bad = 1;
        guide_expect(r, "]");
    }
    guide_expect(r, "}");
}

static void guide_read_optional(guide_reader *r) {
    int n = 0;
    guide_expect(r, "{");
    if (strncmp(r->p, "\"a\"", 3) == 0) guide_key(r, "\"a\""), guide_number(r, 1), n = 1;
    if (strncmp(r->p + n, " \"b/", 4) == 0 || strncmp(r->p + n, "\"b/", 3) == 0) {
        if (n && !guide_take(r, ',')) r->bad = 1;
        guide_key(r, "\"b/\\\"~\"");
        guide_number(r, 0);
        n = 1;
    }
    if (n && !guide_take(r, ',')) r->bad = 1;
    guide_key(r, "\"c\"");
    if (*r->p == 't') guide_expect(r, "true"); else guide_expect(r, "false");
    if (guide_take(r, ',')) {
        guide_key(r, "\"d\"");
        if (*r->p == '"') guide_text(r, 3, 3); else guide_expect(r, "null");
    }
    guide_expect(r, "}");
}

static void guide_read_choices(guide_reader *r) {
    static const char *const values[] = {"\"spiral\"", "\"a\\\\b\\\"\\u000a\xC3\xA9\"", "null", "{\"x\":[1,2.50,{}],\"y\":\"\"}",
        "-0", "1", "15e-1", NULL};
    int n = 0;
    guide_expect(r, "[");
    if (*r->p != ']') do guide_one_of(r, values), n++; while (!r->bad && guide_take(r, ','));
    guide_expect(r, "]");
    if (n < 2 || n > 5) r->bad = 1;
}

static void guide_read_any(guide_reader *r) {
    if (*r->p == '[') {
        guide_expect(r, "[");
        do guide_number(r, 1); while (!r->bad && guide_take(r, ','));
        guide_expect(r, "]");
    } else if (*r->p == '{') {
        guide_expect(r, "{");
        guide_key(r, "\"k\"");
        guide_expect(r, "[");
        if (*r->p != ']') do guide_expect(r, "7"); while (!r->bad && guide_take(r, ','));
        guide_expect(r, "]}");
    } else guide_text(r, 0, 1);
}

static void guide_read_numbers(guide_reader *r) {
    guide_expect(r, "[");
    guide_number(r, 0);
    if (!guide_take(r, ',')) r->bad = 1;
    guide_number(r, 0);
    guide_expect(r, "]");
}

static const struct { const char *schema; void (*read)(guide_reader *r); } guide_schemas[] = {
    {"{\"$schema\": \"https://json-schema.org/draft/2020-12/schema\", \"type\": \"object\", \"properties\": "
     "{\"objects_and_phenomena\": {\"type\": \"array\", \"items\": {\"type\": \"string\", \"minLength\": 2, \"maxLength\": "
     "9}, \"minItems\": 1, \"maxItems\": 4}, \"science_use_cases\": {\"type\": \"array\", \"description\": \"x\", \"items\": "
     "{\"type\": \"string\"}, \"minItems\": 1}}, \"required\": [\"science_use_cases\", \"objects_and_phenomena\"]}",
     guide_read_paperclip},
    {"{\"properties\": {\"a\": {\"type\": \"integer\"}, \"b/\\\"~\": {\"type\": \"number\"}, \"c\": {\"type\": \"boolean\"}, "
     "\"d\": {\"type\": [\"string\", \"null\"], \"minLength\": 3, \"maxLength\": 3}}, \"required\": [\"c\"], "
     "\"additionalProperties\": false}", guide_read_optional},
    {"{\"items\": {\"enum\": [\"spiral\", \"a\\\\b\\\"\\n\\u00e9\", null, {\"x\": [1, 2.50, { }], \"y\": \"\"}, -0, 1, "
     "15e-1]}, \"minItems\": 2, \"maxItems\": 5}", guide_read_choices},
    {"{\"anyOf\": [{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"minItems\": 1}, {\"properties\": {\"k\": "
     "{\"items\": {\"const\": 7}}}, \"required\": [\"k\"]}, {\"type\": \"string\", \"maxLength\": 1}]}", guide_read_any},
    {"{\"items\": {\"type\": \"number\"}, \"minItems\": 2, \"maxItems\": 2}", guide_read_numbers}};
enum { GUIDE_N_SCHEMAS = sizeof guide_schemas / sizeof *guide_schemas };

// One answer of at most n_left tokens, each drawn by random logits. Returns its text (free), or NULL if a promise is broken.
static char *guide_answer(const astrovl_model *m, astrovl_guide *g, int n_left, float *logits, int n_vocab, uint64_t *seed) {
    astrovl_generation o;
    avl__bytes text = {NULL, 0, 0, 0};
    int state = 0, i, dead = 0;
    memset(&o, 0, sizeof o);
    o.temperature = 0.25f;
    avl__bytes_put(&text, "", 0);
    for (; n_left > 0 && !dead; n_left--) {
        astrovl_error err = {ASTROVL_OK, ""};
        int32_t token;
        char bytes[64];
        size_t n;
        for (i = 0; i < n_vocab; i++) logits[i] = (float)avl__random(seed);
        if (astrovl_guide_mask(g, state, n_left, logits, &err) != ASTROVL_OK) break;   // the answer is complete
        token = astrovl_sample(logits, n_vocab, &o, NULL, 0, seed);
        if (astrovl_token_is_end(m, token)) break;
        n = (size_t)astrovl_token_text(m, token, bytes, 64);
        size_t skip = state == 0 && bytes[0] == ' ';
        avl__bytes_put(&text, bytes + skip, n - skip);
        state = astrovl_guide_next(g, state, token);
        dead = state < 0;
    }
    if (!dead && astrovl_guide_is_accepting(g, state)) return text.data;
    fprintf(stderr, "    broken off: %s\n", text.data);
    astrovl_free(text.data);
    return NULL;
}

#ifndef GUIDE_ANSWERS
#define GUIDE_ANSWERS 200
#endif
static void test_guide_answers(void) {
    int which, i, k, n_bad = 0, n_short = 0;
    uint64_t seed = 11;
    for (which = 0; which < GUIDE_N; which++) {
        astrovl_model *m = guide_model(which);
        astrovl_info info;
        float *logits;
        astrovl_get_info(m, &info);
        logits = (float *)malloc((size_t)info.n_vocab * sizeof *logits);
        for (i = 0; i < GUIDE_N_SCHEMAS && which != GUIDE_PLAIN; i++) {
            astrovl_error err = {ASTROVL_OK, ""};
            astrovl_guide *g = guide_schema(m, guide_schemas[i].schema, &err);
            CHECK(g, "schema %d: %s", i, err.message);
            for (k = 0; g && k < GUIDE_ANSWERS; k++) {
                int n_left = astrovl_guide_min_tokens(g, 0) + (k % 4 == 3 ? 200 : k / 4 % 20);
                char *text = guide_answer(m, g, n_left, logits, info.n_vocab, &seed);
                guide_reader r;
                r.p = text ? text : "";
                r.bad = 0;
                guide_schemas[i].read(&r);
                if (r.bad || *r.p) fprintf(stderr, "    schema %d, %d tokens: %s\n", i, n_left, text ? text : "none");
                n_bad += r.bad || *r.p;
                n_short += n_left < 20;
                astrovl_free(text);
            }
            astrovl_guide_free(g);
        }
        free(logits);
        astrovl_close(m);
    }
    CHECK(astrovl_expf(-INFINITY) == 0.0f, "what may not follow has a probability");
    CHECK(n_bad == 0, "%d answers are wrong", n_bad);
    CHECK(n_short > 100, "%d short ones", n_short);
}

// ---- what is refused

static void test_guide_bad_patterns(void) {
#define FORMAT      ASTROVL_ERROR_FORMAT
#define UNSUPPORTED ASTROVL_ERROR_UNSUPPORTED
#define LIMIT       ASTROVL_ERROR_LIMIT
    static const struct { const char *pattern; astrovl_status status; const char *words; } bad[] = {
        {"a(b", FORMAT, "byte 1"}, {"ab)", FORMAT, "byte 2"}, {"[abc", FORMAT, "byte 0"}, {"a[]b", FORMAT, "byte 1"},
        {"[^]", FORMAT, "empty set"}, {"[b-a]", FORMAT, "backwards"}, {"[\\d-z]", FORMAT, "range"}, {"[a-\\d]", FORMAT, "range"},
        {"*a", FORMAT, "byte 0"}, {"a|+", FORMAT, "byte 2"}, {"a**", FORMAT, "byte 2"}, {"a{2}{3}", FORMAT, "byte 4"},
        {"a*+", FORMAT, "quantifier"}, {"{2}", FORMAT, "byte 0"}, {"a{", FORMAT, "byte 1"}, {"a{2", FORMAT, "byte 1"},
        {"a{,2}", FORMAT, "byte 1"}, {"a{3,2}", FORMAT, "byte 1"}, {"a{x}", FORMAT, "byte 1"}, {"[\\", UNSUPPORTED, "byte 1"},
        {"[a-\\", UNSUPPORTED, "byte 3"}, {"a\\", UNSUPPORTED, "byte 1"}, {"\\x1", FORMAT, "hexadecimal"},
        {"\\u12g4", FORMAT, "hexadecimal"}, {"\\ud800", FORMAT, "surrogate"}, {"[\\udc00]", FORMAT, "surrogate"},
        {"\\ud800\\u0041", FORMAT, "surrogate"}, {"\\bword", UNSUPPORTED, "byte 0"}, {"(a)\\1", UNSUPPORTED, "byte 3"},
        {"\\p{L}", UNSUPPORTED, "byte 0"}, {"(?=a)", UNSUPPORTED, "byte 0"}, {"a(?<!b)", UNSUPPORTED, "byte 1"},
        {"(?P<x>a)", UNSUPPORTED, "byte 0"}, {"a^b", UNSUPPORTED, "byte 1"}, {"(a$)", UNSUPPORTED, "byte 2"},
        {"a\\$$b", UNSUPPORTED, "byte 3"}, {"[^\\d\\D]", FORMAT, "no character"}, {"\xFF", FORMAT, "UTF-8"},
        {"[\xC3]", FORMAT, "byte 1"}, {"a\xE4\xB8", FORMAT, "byte 1"}, {"a{262145}", LIMIT, "byte 2"},
        {"a{99999999999999999999}", LIMIT, "byte 2"}, {"(((a{1000}){1000}){1000}){1000}", LIMIT, "states"},
        {"a{200000}b{200000}", LIMIT, "{ }"}};
#undef FORMAT
#undef UNSUPPORTED
#undef LIMIT
    astrovl_model *m = guide_model(GUIDE_SPM);
    astrovl_error err = {ASTROVL_OK, ""};
    char deep[300] = "";
    astrovl_guide *g;
    for (int i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
        double start = avl__seconds();
        g = astrovl_guide_regex(m, bad[i].pattern, &err);
        CHECK(!g && err.status == bad[i].status && strstr(err.message, bad[i].words), "%s: %s: %s", bad[i].pattern,
              astrovl_status_name(err.status), err.message);
        CHECK(avl__seconds() - start < 20, "%s takes %.1f seconds", bad[i].pattern, avl__seconds() - start);
        astrovl_guide_free(g);
    }
    FAILS(!(g = astrovl_guide_regex(m, NULL, &err)), ARGUMENT, "NULL");
    FAILS(!astrovl_guide_regex(NULL, "a", &err), ARGUMENT, "NULL");
    for (int i = 0; i < 64; i++) strcat(deep, "(");
    strcat(deep, "a");
    for (int i = 0; i < 64; i++) strcat(deep, ")");
    g = astrovl_guide_regex(m, deep, &err);
    CHECK(g && guide_accepts(g, "a", 1), "64 groups: %s", err.message);
    astrovl_guide_free(g);
    memmove(deep + 1, deep, strlen(deep) + 1);
    strcat(deep, ")");
    FAILS(!astrovl_guide_regex(m, deep, &err), LIMIT, "65 groups");
    astrovl_close(m);
}

static void test_guide_bad_schemas(void) {
#define FORMAT      ASTROVL_ERROR_FORMAT
#define UNSUPPORTED ASTROVL_ERROR_UNSUPPORTED
#define LIMIT       ASTROVL_ERROR_LIMIT
#define OBJECT(inside) "{\"type\": \"object\", \"properties\": {" inside "}}"
    static const struct { const char *schema; astrovl_status status; const char *words; } bad[] = {
        {"", FORMAT, "byte 0"}, {"{", FORMAT, "byte 1"}, {"[]", UNSUPPORTED, "root"}, {"true", UNSUPPORTED, "object"},
        {"{}", UNSUPPORTED, "root"}, {"{\"title\": \"x\"}", UNSUPPORTED, "type"}, {"{\"type\": \"real\"}", FORMAT, "at /type"},
        {"{\"type\": 3}", FORMAT, "at /type"}, {"{\"type\": []}", FORMAT, "at /type"},
        {"{\"type\": [\"string\", 1]}", FORMAT, "at /type"},
        {"{\"type\": \"string\", \"pattern\": \"a\"}", UNSUPPORTED, "at /pattern"},
        {"{\"type\": \"integer\", \"minimum\": 0}", UNSUPPORTED, "at /minimum"}, {"{\"oneOf\": []}", UNSUPPORTED, "at /oneOf"},
        {"{\"$ref\": \"#\"}", UNSUPPORTED, "at /$ref"},
        {"{\"type\": \"array\", \"items\": {\"type\": \"null\"}, \"uniqueItems\": true}", UNSUPPORTED, "at /uniqueItems"},
        {OBJECT("\"a/b~\": {\"type\": \"array\", \"items\": {\"not\": {}}}"), UNSUPPORTED, "at /properties/a~1b~0/items/not"},
        {OBJECT("\"a\": {\"anyOf\": [{\"type\": \"null\"}, {\"type\": \"x\"}]}"), FORMAT, "at /properties/a/anyOf/1/type"},
        {OBJECT("\"a\": {}"), UNSUPPORTED, "at /properties/a"}, {OBJECT("\"a\": true"), UNSUPPORTED, "at /properties/a"},
        {"{\"type\": \"array\"}", UNSUPPORTED, "items"},
        {"{\"type\": \"array\", \"items\": [{\"type\": \"null\"}]}", UNSUPPORTED, "at /items"},
        {"{\"items\": {\"type\": \"null\"}, \"minItems\": 3, \"maxItems\": 2}", FORMAT, "minItems"},
        {"{\"type\": \"string\", \"minLength\": 3, \"maxLength\": 2}", FORMAT, "minLength"},
        {"{\"type\": \"string\", \"maxLength\": -1}", FORMAT, "at /maxLength"},
        {"{\"type\": \"string\", \"maxLength\": 1.5}", FORMAT, "at /maxLength"},
        {"{\"type\": \"string\", \"minLength\": \"1\"}", FORMAT, "at /minLength"},
        {"{\"type\": \"string\", \"maxLength\": 99999999999999999999}", LIMIT, "maxLength"},
        {"{\"type\": \"string\", \"minLength\": 9999999}", LIMIT, "maxLength"}, {"{\"enum\": []}", FORMAT, "value"},
        {"{\"enum\": 1}", FORMAT, "array"}, {"{\"enum\": [1, 2.5], \"type\": \"string\"}", FORMAT, "value"},
        {"{\"const\": 1.5, \"type\": \"integer\"}", FORMAT, "value"}, {"{\"enum\": [1], \"const\": 1}", UNSUPPORTED, "const"},
        {"{\"enum\": [\"abc\"], \"maxLength\": 2}", UNSUPPORTED, "only type"}, {"{\"anyOf\": []}", FORMAT, "at /anyOf"},
        {"{\"anyOf\": {}}", FORMAT, "at /anyOf"},
        {"{\"anyOf\": [{\"type\": \"null\"}], \"type\": \"null\"}", UNSUPPORTED, "beside"},
        {"{\"type\": \"object\", \"properties\": []}", FORMAT, "properties"},
        {"{\"type\": \"object\", \"required\": [\"a\"]}", UNSUPPORTED, "at /required/0"},
        {"{\"type\": \"object\", \"required\": \"a\"}", FORMAT, "required"},
        {"{\"type\": \"object\", \"required\": [1]}", FORMAT, "required"},
        {"{\"type\": \"object\", \"additionalProperties\": {\"type\": \"null\"}}", UNSUPPORTED, "additionalProperties"},
        {"{\"type\": \"null\", \"type\": \"null\"}", FORMAT, "at /type: a second"},
        {OBJECT("\"a\": {\"type\": \"null\"}, \"\\u0061\": {\"type\": \"null\"}"), FORMAT, "at /properties/a: a second"}};
#undef OBJECT
#undef FORMAT
#undef UNSUPPORTED
#undef LIMIT
    static const struct { const char *schema, *yes[4], *no[4]; } good[] = {
        {"{\"type\": \"object\"}", {"{}"}, {"{\"a\":1}", "{ }"}},
        {"{\"type\": [\"integer\", \"boolean\"]}", {"-12", "true", "0", "9"}, {"01", "-0", "null", "1234567890123456"}},
        {"{\"enum\": [1, 1.0, 20e-1, 2.5, 0.0e5, \"1\", true], \"type\": \"integer\"}", {"1", "1.0", "20e-1", "0.0e5"},
         {"2.5", "\"1\"", "true", "2"}},
        {"{\"type\": \"number\"}", {"1.5e-12", "0", "-0.000000000000001", "123456789012345.123456789012345E+99"},
         {"1.", ".5", "1e100", "1.1234567890123456"}},
        {"{\"type\": \"string\", \"maxLength\": 2}", {"\"\"", "\"\\ud7FF\\n\"", "\"\xF0\x9F\x98\x80\xC3\xA4\"", "\"\\u0000/\""},
         {"\"abc\"", "\"\\ud800\"", "\"\n\"", "\"\\x\""}},
        {"{\"const\": {\"b\": [1, {}], \"\\u0001\": \"\\/\"}}", {"{\"b\":[1,{}],\"\\u0001\":\"/\"}"},
         {"{\"b\": [1,{}],\"\\u0001\":\"/\"}", "{}"}},
        {"{\"items\": {\"type\": \"null\"}, \"maxItems\": 0}", {"[]"}, {"[null]", "[ ]"}},
        {"{\"items\": {\"type\": \"null\"}, \"minItems\": 2}", {"[null,null]", "[null, null, null,null]"},
         {"[null]", "[null ,null]", "[null,  null]", "[]"}},
        {"{\"properties\": {\"a\": {\"type\": \"null\"}, \"b\": {\"type\": \"null\"}, \"c\": {\"type\": \"null\"}}}",
         {"{}", "{\"a\":null, \"c\": null}", "{\"b\":null}", "{\"a\":null,\"b\":null,\"c\":null}"}, {"{\"b\":null,\"a\":null}",
          "{,\"c\":null}", "{\"a\":null,}", "{\"a\":null\"b\":null}"}}};
    astrovl_model *m = guide_model(GUIDE_SPM);
    astrovl_error err = {ASTROVL_OK, ""};
    char *deep = (char *)malloc(20000);
    astrovl_guide *g;
    for (int i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
        g = guide_schema(m, bad[i].schema, &err);
        CHECK(!g && err.status == bad[i].status && strstr(err.message, bad[i].words), "%s: %s: %s", bad[i].schema,
              astrovl_status_name(err.status), err.message);
        astrovl_guide_free(g);
    }
    for (int i = 0; i < (int)(sizeof good / sizeof *good); i++) {
        g = guide_schema(m, good[i].schema, &err);
        CHECK(g, "%s: %s", good[i].schema, err.message);
        for (int k = 0; g && k < 4 && good[i].yes[k]; k++)
            CHECK(guide_accepts(g, good[i].yes[k], strlen(good[i].yes[k])), "%s refuses %s", good[i].schema, good[i].yes[k]);
        for (int k = 0; g && k < 4 && good[i].no[k]; k++)
            CHECK(!guide_accepts(g, good[i].no[k], strlen(good[i].no[k])), "%s accepts %s", good[i].schema, good[i].no[k]);
        astrovl_guide_free(g);
    }
    for (int k = 60; k <= 66; k += 6) {   // k arrays in arrays: 64 levels of values are read
        deep[0] = 0;
        for (int i = 0; i < k; i++) strcat(deep, "{\"items\": ");
        strcat(deep, "{\"type\": \"null\"}");
        for (int i = 0; i < k; i++) strcat(deep, "}");
        g = guide_schema(m, deep, &err);
        if (k == 66) FAILS(!g, LIMIT, "%d levels", k);
        else CHECK(g, "%d levels: %s", k, err.message);
        astrovl_guide_free(g);
    }
    FAILS(!astrovl_guide_schema(m, NULL, 0, &err), ARGUMENT, "NULL");
    FAILS(!astrovl_guide_schema(NULL, "{}", 2, &err), ARGUMENT, "NULL");
    {   // 100,000 faults take no longer than a text of that length does
        char *many = (char *)malloc(250000);
        double start = avl__seconds();
        strcpy(many, "{\"anyOf\": [1");
        for (int i = 0; i < 100000; i++) memcpy(many + 12 + 2 * i, ",1", 3);
        memcpy(many + 12 + 200000, "]}", 3);
        FAILS(!guide_schema(m, many, &err), UNSUPPORTED, "100,000 faults");
        CHECK(avl__seconds() - start < 1, "100,000 faults take %.1f seconds", avl__seconds() - start);
        free(many);
    }
    free(deep);
    astrovl_close(m);
}

// Bytes changed, cut out and put in: a message or a guide, and never a crash.
#ifndef GUIDE_MUTANTS
#define GUIDE_MUTANTS 2000
#endif
static void test_guide_mutants(void) {
    static const char pattern[] = "^([a-c]{1,3}|\\d+(?:x|\\u00e4)?)*[^\\s\\]-]\\x41{2,}.\\W$";
    static const char glue[] = "{}[]()|*+?\\\",:-^$.0123456789aduxt \xC3\xA4";
    astrovl_model *m = guide_model(GUIDE_GPT2);
    uint64_t seed = 9;
    int i, k, n_made = 0, n_refused = 0;
    for (i = 0; i < GUIDE_MUTANTS; i++) {
        const char *from = i % 2 ? pattern : guide_schemas[i / 2 % GUIDE_N_SCHEMAS].schema;
        size_t n = strlen(from), at;
        char *text = (char *)malloc(n + 16), *exact;   // exact: in memory of its own size
        astrovl_error err = {ASTROVL_OK, ""};
        memcpy(text, from, n + 1);
        for (k = (int)guide_random(&seed, 4); k >= 0 && n > 2; k--) {
            at = guide_random(&seed, (uint32_t)n - 1);
            switch (guide_random(&seed, 3)) {
            case 0: text[at] = glue[guide_random(&seed, sizeof glue - 1)]; break;
            case 1: memmove(text + at, text + at + 1, n - at), n--; break;
            default: memmove(text + at + 1, text + at, n + 1 - at), n++, text[at] = glue[guide_random(&seed, sizeof glue - 1)];
            }
        }
        exact = (char *)malloc(n + (i % 2));
        memcpy(exact, text, n + (i % 2));
        astrovl_guide *g = i % 2 ? astrovl_guide_regex(m, exact, &err) : astrovl_guide_schema(m, exact, n, &err);
        CHECK(g || (err.status && err.status != ASTROVL_ERROR_MEMORY && err.message[0]), "%s: no message", text);
        if (g) n_made++; else n_refused++;
        astrovl_guide_free(g);
        free(text);
        free(exact);
    }
    CHECK(n_made > GUIDE_MUTANTS / 20 && n_refused > GUIDE_MUTANTS / 4, "%d made, %d refused", n_made, n_refused);
    astrovl_close(m);
}

// ---- allocations that fail

static void test_guide_no_memory(void) {
    astrovl_model *m = guide_model(GUIDE_SMOLLM);
    astrovl_info info;
    float *logits;
    astrovl_get_info(m, &info);
    logits = (float *)calloc((size_t)info.n_vocab, sizeof *logits);
    for (int kind = 0; kind < 4; kind++) {
        long at;
        int done, n;
        for (at = 0, done = 0; !done; at++) {
            astrovl_error err = {ASTROVL_OK, ""};
            astrovl_guide *g = NULL;
            char **list = NULL;
            astrovl_status status = ASTROVL_OK;
            long live = g_live;
            if (kind == 3) g = guide_schema(m, guide_small_schema, &err);
            alloc_fail_at(at);
            if (kind == 0) g = astrovl_guide_regex(m, "[^a-y]{1,3}(b|c.*){2}|x", &err);
            if (kind == 1) g = guide_schema(m, guide_schemas[at % 2 ? 1 : 2].schema, &err);
            if (kind == 2) list = astrovl_json_strings("{\"a\": [\"x\", \"y\"], \"b\": [1, {}, \"\"]}", 35, "a", &n, &err);
            if (kind == 3) status = astrovl_guide_mask(g, 0, 1000, logits, &err);
            done = !alloc_did_fail();
            alloc_fail_at(-1);
            CHECK(kind == 3 ? done == !status : done == (g || list), "kind %d, allocation %ld", kind, at);
            if (!done)
                CHECK(err.status == ASTROVL_ERROR_MEMORY && err.message[0], "kind %d, allocation %ld: %s", kind, at, err.message);
            if (kind == 3 && !done) CHECK(astrovl_guide_mask(g, 0, 1000, logits, &err) == ASTROVL_ERROR_MEMORY, "it sticks");
            if (kind == 1 && at < 200) done = 0;   // two schemas take turns
            if (kind == 1 && at > 400) done = 1;
            astrovl_guide_free(g);
            astrovl_free(list);
            CHECK(g_live == live, "kind %d, allocation %ld: %ld blocks leak", kind, at, g_live - live);
        }
        CHECK(at > (kind < 2 ? 15 : kind == 2 ? 2 : 1), "kind %d: only %ld allocations", kind, at);
    }
    free(logits);
    astrovl_close(m);
}

// ---- JSON lines

static void test_json_strings(void) {
    static const struct { const char *json, *key; int n; const char *texts[4]; } good[] = {
        {"{\"a\": \"x\"}", "a", 1, {"x"}}, {" \t\r\n{ \"a\" : [ \"x\" , \"\" ] , \"b\":null}\n", "a", 2, {"x", ""}},
        {"{\"a\": []}", "a", 0, {NULL}}, {"{}", "a", 0, {NULL}}, {"{\"b\": {\"a\": \"no\"}}", "a", 0, {NULL}},
        {"{\"\": \"empty\"}", "", 1, {"empty"}}, {"{\"a\": 1, \"\\u0061\": \"last\"}", "a", 1, {"last"}},
        {"{\"\\u0061\": \"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e4\\ud83d\\ude00\xC3\xA4\"}", "a", 1,
         {"\"\\/\b\f\n\r\t\xC3\xA4\xF0\x9F\x98\x80\xC3\xA4"}},
        {"{\"n\": [-0, 0.5, 1e5, 2E-07, -12.5e+3, true, false, null, [[]], {\"x\":{}}], \"a\": [\"1\",\"2\",\"3\"]}", "a", 3,
         {"1", "2", "3"}},
        {"{\"a\": \"\x7F\xEF\xBB\xBF\"}", "a", 1, {"\x7F\xEF\xBB\xBF"}}};
    static const struct { const char *json, *words; } bad[] = {
        {"", "byte 0"}, {"[]", "object"}, {"\"a\"", "object"}, {"{", "byte 1"}, {"{\"a\"}", "byte 4"}, {"{\"a\":}", "byte 5"},
        {"{\"a\":1,}", "byte 7"}, {"{a:1}", "byte 1"}, {"{\"a\":1 \"b\":2}", "byte 7"}, {"{} x", "byte 3"},
        {"{\"a\":[1,]}", "byte 8"}, {"{\"a\":01}", "byte 6"}, {"{\"a\":+1}", "byte 5"}, {"{\"a\":1.}", "byte 7"},
        {"{\"a\":.5}", "byte 5"}, {"{\"a\":1e}", "byte 7"}, {"{\"a\":-}", "byte 6"}, {"{\"a\":nul}", "byte 5"},
        {"{\"a\":True}", "byte 5"}, {"{\"a\":'x'}", "byte 5"}, {"{\"a\":\"x}", "ends"}, {"{\"a\":\"\n\"}", "control"},
        {"{\"a\":\"\\x\"}", "escape"}, {"{\"a\":\"\\u12\"}", "escape"}, {"{\"a\":\"\\ud800\"}", "surrogate"},
        {"{\"a\":\"\\ude00\\ud83d\"}", "surrogate"}, {"{\"a\":\"\\ud800\\ud800\"}", "surrogate"}, {"{\"a\":\"\xFF\"}", "UTF-8"},
        {"{\"a\":\"\xC0\x80\"}", "UTF-8"}, {"{\"a\":\"\xED\xA0\x80\"}", "UTF-8"}, {"{\"a\":\"\xE4\xB8\"}", "UTF-8"},
        {"{\"a\":1}", "\"a\""},
        {"{\"a\":null}", "\"a\""}, {"{\"a\":{}}", "\"a\""}, {"{\"a\":[\"x\",1]}", "byte 10"}, {"{\"a\":\"x\\u0000y\"}", "zero"},
        {"\xEF\xBB\xBF{}", "byte 0"}, {"{\"a\":\"x\"\0}", "byte 8"}, {"{\"a\":1 /* */}", "byte 7"}, {"{\"a\":\"\\", "escape"},
        {"{\"a\":\"\\ud83d\\u", "surrogate"}};
    astrovl_error err = {ASTROVL_OK, ""};
    char deep[200];
    char **list;
    int n;
    for (int i = 0; i < (int)(sizeof good / sizeof *good); i++) {
        list = astrovl_json_strings(good[i].json, strlen(good[i].json), good[i].key, &n, &err);
        CHECK(list && n == good[i].n, "%s: %d: %s", good[i].json, n, err.message);
        for (int k = 0; list && k < n && k < 4; k++) CHECK(strcmp(list[k], good[i].texts[k]) == 0, "%s: %s", good[i].json, list[k]);
        astrovl_free(list);
        for (int k = 0; k < (int)strlen(good[i].json); k++) {   // every beginning, in memory of its own size
            char *part = (char *)malloc((size_t)k + (k == 0));
            memcpy(part, good[i].json, (size_t)k);
            list = astrovl_json_strings(part, (size_t)k, good[i].key, &n, &err);
            CHECK(n == (list ? good[i].n : 0), "%s, cut at %d", good[i].json, k);
            astrovl_free(list);
            free(part);
        }
    }
    for (int i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
        size_t size = strlen(bad[i].json) + 2 * (strcmp(bad[i].words, "byte 8") == 0 &&
            bad[i].json[7] == '"');   // the one with a zero byte
        memset(&err, 0, sizeof err);
        list = astrovl_json_strings(bad[i].json, size, "a", &n, &err);
        CHECK(!list && n == 0 && err.status == ASTROVL_ERROR_FORMAT && strstr(err.message, bad[i].words), "%s: %s: %s", bad[i].json,
              astrovl_status_name(err.status), err.message);
        astrovl_free(list);
    }
    for (int i = 60; i < 70; i++) {   // i arrays in an object
        strcpy(deep, "{\"b\":");
        for (int k = 0; k < i; k++) strcat(deep, "[");
        for (int k = 0; k < i; k++) strcat(deep, "]");
        strcat(deep, "}");
        list = astrovl_json_strings(deep, strlen(deep), "a", &n, &err);
        if (i < 64) CHECK(list && n == 0, "%d levels", i);
        else FAILS(!list, LIMIT, "%d levels", i);
        astrovl_free(list);
    }
    FAILS(!astrovl_json_strings(NULL, 0, "a", &n, &err), ARGUMENT, "no text");
    FAILS(!astrovl_json_strings("{}", 2, NULL, &n, &err), ARGUMENT, "no key");
    FAILS(!astrovl_json_strings("{}", 2, "a", NULL, &err), ARGUMENT, "no count");
}

// ---- through a conversation

typedef struct guide_stream { avl__bytes text; int stop_after; } guide_stream;

static int guide_collect(void *user, const char *text, size_t size) {
    guide_stream *s = (guide_stream *)user;
    avl__bytes_put(&s->text, text, size);
    return s->stop_after > 0 && (int)s->text.size >= s->stop_after;
}

static void test_guide_chat(void) {
    static const char *const models[] = {"test/golden/models_b.gguf", "test/astrovl-tiny.gguf"};
    astrovl_error err = {ASTROVL_OK, ""};
    for (int which = 0; which < 2; which++) {
        astrovl_model *m = astrovl_open(models[which], NULL, &err), *other = guide_model(GUIDE_SPM);
        astrovl_session_options so;
        memset(&so, 0, sizeof so);
        so.n_threads = 1;
        astrovl_session *s = astrovl_session_new(m, &so, &err);
        CHECK(m && s, "%s", err.message);
        guide_find_bytes(m);
        for (int i = 0; s && i < GUIDE_N_SCHEMAS; i++) {
            astrovl_guide *g = guide_schema(m, guide_schemas[i].schema, &err);
            int n = astrovl_guide_min_tokens(g, 0);
            CHECK(g, "%s", err.message);
            for (int extra = -1; g && extra < 6; extra++) {
                static const int more[] = {0, 1, 3, 8, 30, 60};
                astrovl_generation o;
                guide_stream stream;
                astrovl_stats stats;
                guide_reader r;
                int n_tokens;
                memset(&o, 0, sizeof o);
                memset(&stream, 0, sizeof stream);
                o.guide = g;
                o.max_tokens = n + (extra < 0 ? -1 : more[extra]);
                o.temperature = extra % 2 ? 0.0f : 1.0f;
                o.repetition_penalty = extra == 3 ? 1.3f : 0.0f;
                o.top_k = extra == 4 ? 3 : 0;
                o.min_p = extra == 2 ? 0.5f : 0.0f;
                o.seed = (uint64_t)extra;
                o.on_text = guide_collect;
                o.user = &stream;
                astrovl_session_reset(s);
                char *answer = astrovl_chat(s, NULL, 0, "What is in the image?", &o, &err);
                if (extra < 0) {
                    FAILS(!answer, LIMIT, "%d tokens", o.max_tokens);
                    continue;
                }
                CHECK(answer, "%s", err.message);
                if (!answer) continue;
                r.p = answer;
                r.bad = 0;
                guide_schemas[i].read(&r);
                CHECK(!r.bad && !*r.p, "schema %d, %d tokens: %s", i, o.max_tokens, answer);
                CHECK(stream.text.data && strcmp(stream.text.data, answer) == 0, "streamed: %s", stream.text.data);
                astrovl_answer_tokens(s, &n_tokens);
                astrovl_get_stats(s, &stats);
                CHECK(n_tokens == stats.n_answer_tokens && n_tokens <= o.max_tokens && !stats.stopped_by_limit, "%d tokens",
                      n_tokens);
                astrovl_free(answer);
                astrovl_free(stream.text.data);
            }
            astrovl_guide_free(g);
        }
        if (s) {   // what cannot be had together; a context that is nearly full; a listener who has heard enough
            static const char *const stop[] = {"x"};
            astrovl_guide *g = astrovl_guide_regex(m, "[a-e]{4,40}", &err), *foreign = astrovl_guide_regex(other, "a",
                &err), *empty = astrovl_guide_regex(m, "", &err);
            astrovl_generation o;
            guide_stream stream;
            memset(&o, 0, sizeof o);
            memset(&stream, 0, sizeof stream);
            astrovl_session_reset(s);
            o.guide = foreign;
            FAILS(!astrovl_chat(s, NULL, 0, "x", &o, &err), ARGUMENT, "another model's guide");
            o.guide = g;
            o.stop = stop;
            o.n_stop = 1;
            FAILS(!astrovl_chat(s, NULL, 0, "x", &o, &err), ARGUMENT, "stop texts");
            o.n_stop = 0;
            o.guide = empty;
            char *answer = astrovl_chat(s, NULL, 0, "x", &o, &err);
            CHECK(answer && !*answer, "an empty answer: %s", answer ? answer : err.message);
            astrovl_free(answer);
            int n_prompt = astrovl_session_n_past(s);
            o.guide = g;
            for (int i = 1; i < 12; i++) {
                so.n_ctx = n_prompt + i;
                astrovl_session *tight = astrovl_session_new(m, &so, &err);
                answer = astrovl_chat(tight, NULL, 0, "x", &o, &err);
                if (i + 1 < astrovl_guide_min_tokens(g, 0)) FAILS(!answer, LIMIT, "%d positions", i);
                else CHECK(answer && guide_accepts(g, answer, strlen(answer)), "%d positions: %s", i,
                           answer ? answer : err.message);
                astrovl_free(answer);
                astrovl_session_free(tight);
            }
            o.on_text = guide_collect;
            o.user = &stream;
            stream.stop_after = 1;
            astrovl_session_reset(s);
            answer = astrovl_chat(s, NULL, 0, "x", &o, &err);
            CHECK(answer && *answer && strspn(answer, "abcde") == strlen(answer), "cancelled: %s", answer ? answer : err.message);
            astrovl_free(answer);
            astrovl_free(stream.text.data);
            astrovl_guide_free(g);
            astrovl_guide_free(foreign);
            astrovl_guide_free(empty);
        }
        astrovl_session_free(s);
        astrovl_close(m);
        astrovl_close(other);
    }
}

static void tests_guide(void) {
    run("guide: patterns, against a naive matcher", test_guide_patterns);
    run("guide: sets of characters, against every code point", test_guide_characters);
    run("guide: masks, against every token one by one", test_guide_masks);
    run("guide: masks of many states", test_guide_many_masks);
    run("guide: the first token's space", test_guide_first_token);
    run("guide: random answers keep to their schemas, however few tokens they may have", test_guide_answers);
    run("guide: patterns that are refused", test_guide_bad_patterns);
    run("guide: schemas that are refused, and their languages", test_guide_bad_schemas);
    run("guide: mutated patterns and schemas", test_guide_mutants);
    run("guide: every allocation may fail", test_guide_no_memory);
    run("guide: strings of JSON lines", test_json_strings);
    run("guide: conversations", test_guide_chat);
}

// ---- joint: CLIP's two towers against transformers ------------------------------------------------------------------
// make_golden.py writes two tiny random models: A as clip.cpp's files are (no merges, no logit_scale), B with PAPERCLIP's dense
// heads; and what CLIPModel and CLIPTokenizer make of images and texts.

enum { JOINT_IMAGES = 3, JOINT_TEXTS = 5, JOINT_DIMS = 20 };

typedef struct joint_kit {
    models_gold    gold;
    astrovl_model *model;
    astrovl_image  images[JOINT_IMAGES];
    char           text[JOINT_TEXTS][256];
    const char    *texts[JOINT_TEXTS];
} joint_kit;

static void joint_kit_open(joint_kit *kit, int which) {
    static const char *const images[] = {"test/golden/models_1.png", "test/golden/models_2.png", "test/golden/joint_image.png"};
    astrovl_error err = {ASTROVL_OK, ""};
    memset(kit, 0, sizeof *kit);
    models_gold_read(&kit->gold, which == 'a' ? "test/golden/joint_a.gold" : "test/golden/joint_b.gold");
    kit->model = astrovl_open(which == 'a' ? "test/golden/joint_a.gguf" : "test/golden/joint_b.gguf", NULL, &err);
    CHECK(kit->model, "%s", err.message);
    if (!kit->model) exit(1);
    for (int i = 0; i < JOINT_IMAGES; i++) CHECK(astrovl_image_load(images[i], 0, &kit->images[i], &err) == ASTROVL_OK, "%s", err.message);
    for (int i = 0; i < JOINT_TEXTS; i++) {
        char field[16];
        sprintf(field, "%d", i);
        kit->texts[i] = models_text(&kit->gold, "text", field, kit->text[i], sizeof kit->text[i]);
    }
}

static void joint_kit_close(joint_kit *kit) {
    astrovl_close(kit->model);
    for (int i = 0; i < JOINT_IMAGES; i++) astrovl_image_free(&kit->images[i]);
    models_gold_free(&kit->gold);
}

static astrovl_session *joint_session(const joint_kit *kit, astrovl_mode mode, int n_threads, astrovl_tap tap, void *user) {
    models_kit m;
    memset(&m, 0, sizeof m);
    m.model = kit->model;
    return models_session(&m, mode, n_threads, tap, user);
}

// All values of a stored tensor, against `got`.
static void joint_check(const joint_kit *kit, const char *name, const float *got, double tolerance) {
    const models_value *v = models_field(&kit->gold, "", name);
    int64_t i, bad = -1;
    for (i = 0; i < v->count; i++) {
        double difference = (double)got[i * v->step] - avl__float_from_bits(avl__load_u32(v->data + 4 * i));
        if (!((difference < 0 ? -difference : difference) <= tolerance * v->largest)) bad = i;
    }
    CHECK(bad < 0, "%s[%d] is %.9g, expected %.9g", name, (int)(bad * v->step), got[bad * v->step],
          avl__float_from_bits(avl__load_u32(v->data + 4 * bad)));
}

static void joint_info(void) {
    joint_kit kit;
    astrovl_info info;
    joint_kit_open(&kit, 'a');
    astrovl_get_info(kit.model, &info);
    CHECK(info.has_joint_image && info.has_joint_text && info.n_embd_joint == JOINT_DIMS && info.clip_text_n_ctx == 24 &&
          info.clip_text_n_embd == 32 && info.clip_text_n_layer == 2 && info.clip_text_n_head == 4 && info.clip_text_n_ff == 72,
          "A: %d numbers, %d positions", info.n_embd_joint, info.clip_text_n_ctx);
    CHECK(info.logit_scale == 100.0f && !info.has_text && !info.has_vocab && info.has_vision, "A: logit_scale %g", info.logit_scale);
    joint_kit_close(&kit);
    joint_kit_open(&kit, 'b');
    astrovl_get_info(kit.model, &info);
    joint_check(&kit, "logit_scale", &info.logit_scale, 1e-6);
    joint_kit_close(&kit);
}

// ---- the tokenizer

static void joint_tokens(int which) {
    size_t size;
    int n_texts, n_cases, i, n_same = 0, n_skipped = 0;
    text_case *texts = text_read_all("test/golden/joint_texts.bin", &n_texts);
    unsigned char *golden = read_file("test/golden/joint_tokens.bin", &size);
    text_reader r = {NULL, 0};
    joint_kit kit;
    static int32_t ids[16384];
    joint_kit_open(&kit, which);
    r.data = golden;
    n_cases = (int)text_u32(&r);
    CHECK(n_cases == n_texts && n_cases >= 500, "%d texts, %d cases", n_texts, n_cases);
    for (i = 0; i < n_cases; i++) {
        const text_case *text = &texts[text_u32(&r)];
        uint32_t flags = text_u32(&r), n = text_u32(&r), k;
        astrovl_error err = {ASTROVL_OK, ""};
        int got = astrovl_clip_tokenize(kit.model, (const char *)text->data, text->size, ids, 16384, &err), same = got == (int)n;
        // CJK compatibility ideographs, here U+F900 and U+2F81A, stay as they are: CLIPTokenizer makes other characters of them.
        if (strstr((const char *)text->data, "\xEF\xA4\x80")) {
            r.at += 2 * n + 4;
            n_skipped++;
            continue;
        }
        CHECK(flags == 3, "flags %d", (int)flags);
        if (n > 600) same = same && text_u32(&r) == text_hash(ids, n);
        else for (k = 0; k < n; k++, r.at += 2) same = same && ids[k] == avl__load_u16(r.data + r.at);
        CHECK(same, "%c: \"%.60s\" (%ld bytes): %d tokens, wanted %d", which, (const char *)text->data, (long)text->size, got, (int)n);
        if (!same && n <= 600) {
            text_print_ids("got", ids, (size_t)(got < 0 ? 0 : got));
            for (k = 0, r.at -= 2 * n; k < n; k++, r.at += 2) ids[k] = avl__load_u16(r.data + r.at);
            text_print_ids("wanted", ids, n);
        }
        n_same += same;
        CHECK(text_u32(&r) == 0xFFFFFFFFu, "case %d", i);
    }
    CHECK(r.at == size && n_skipped == 1 && n_same == n_cases - 1, "%d of %d the same", n_same, n_cases);
    free(golden);
    text_free_all(texts, n_texts);
    joint_kit_close(&kit);
}

static void joint_tokens_a(void) { joint_tokens('a'); }   // merges recovered from the vocabulary's order
static void joint_tokens_b(void) { joint_tokens('b'); }

// A megabyte of one letter's marks in falling classes, of Hangul, of one word: no quadratic time, and no crash.
static void joint_long_texts(void) {
    static const char *const units[] = {"\xCC\x81\xCC\xA3\xCC\xB4", "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", "a", "\xC7\xBA", " ", "\xFF"};
    joint_kit kit;
    size_t u, n = 300000, i;
    char *text = (char *)malloc(n);
    joint_kit_open(&kit, 'a');
    for (u = 0; text && u < sizeof units / sizeof *units; u++) {
        astrovl_error err = {ASTROVL_OK, ""};
        for (i = 0; i < n; i++) text[i] = units[u][i % strlen(units[u])];
        CHECK(astrovl_clip_tokenize(kit.model, text, n, NULL, 0, &err) >= 2, "%s", err.message);
    }
    free(text);
    joint_kit_close(&kit);
}

// A zero byte is a word of its own, behind a composed letter too.
static void joint_zero_byte(void) {
    static const char *const texts[] = {"\xC3\xA9", "\0", "z", "\xC3\xA9\0z"};
    static const size_t sizes[] = {2, 1, 1, 4};
    int32_t parts[32], ids[32];
    int n_parts = 0, n = 0, i;
    joint_kit kit;
    joint_kit_open(&kit, 'a');
    for (i = 0; i < 4; i++) {
        n = astrovl_clip_tokenize(kit.model, texts[i], sizes[i], ids, 32, NULL);   // start and end token included
        if (i < 3) memcpy(parts + n_parts, ids + 1, (size_t)(n - 2) * sizeof *ids);
        if (i < 3) n_parts += n - 2;
    }
    CHECK(n == n_parts + 2 && memcmp(ids + 1, parts, (size_t)n_parts * sizeof *ids) == 0, "%d tokens, not %d", n - 2, n_parts);
    joint_kit_close(&kit);
}

// The start and the end token, one of which stands for a text, are there whatever a file's keys say.
static void joint_no_ends(void) {
    static const char *const keys[] = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "x"};
    static const char *texts[1500];
    size_t size, at = 24, i;
    unsigned char *file = read_file("test/golden/joint_a.gguf", &size), *bytes = (unsigned char *)calloc(size + 96, 1);
    float *rows = (float *)malloc(sizeof(float) * 1500 * JOINT_DIMS);
    astrovl_error err = {ASTROVL_OK, ""};
    memcpy(bytes, file, 24);
    bytes[16] = (unsigned char)(bytes[16] + 3);           // entries; these take 96 bytes: the tensors stay aligned
    for (i = 0; i < 3; at += strlen(keys[i]) + 13, i++) {
        bytes[at] = (unsigned char)strlen(keys[i]);
        memcpy(bytes + at + 8, keys[i], strlen(keys[i]));
        bytes[at + 8 + strlen(keys[i])] = ASTROVL_VALUE_BOOL;
    }
    memcpy(bytes + at, file + 24, size - 24);
    for (i = 0; i < 1500; i++) texts[i] = "";
    astrovl_model *m = models_open_bytes(bytes, size + 96, &err);
    CHECK(at == 120 && astrovl_clip_tokenize(m, "", 0, NULL, 0, &err) == 2, "%s", err.message);
    astrovl_session *s = astrovl_session_new(m, NULL, &err);
    CHECK(astrovl_embed_texts(s, texts, 1500, 1, rows, &err) == ASTROVL_OK, "%s", err.message);
    astrovl_session_free(s);
    astrovl_close(m);
    free(rows);
    free(bytes);
    free(file);
}

// ---- layer by layer, and what comes out

static void joint_on_tap(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    models_watch *w = (models_watch *)user;
    models_value *v = models_find(w->gold, name);
    const char *number = strstr(name, "layers.");
    CHECK(layer == (number ? number[7] - '0' : -1), "%s is said to be of layer %d", name, layer);
    if (strstr(name, "_projection.head.act")) {                  // between PAPERCLIP's two dense layers; the goldens have their output
        CHECK(n_dims == 2 && shape[0] == 1, "%s: %d dimensions", name, n_dims);
        return;
    }
    if (!v || v->kind != 0) { CHECK(0, "%s is not a name that transformers has", name); return; }
    if (n_dims != v->n_dims || shape[0] != v->dims[0] || shape[1] != v->dims[1] || (n_dims == 3 && shape[2] != v->dims[2])) {
        CHECK(0, "%s has another shape: %d dimensions, %d x %d", name, n_dims, (int)shape[0], (int)shape[1]);
        return;
    }
    models_compare(w, v, 0, shape, n_dims, data);
    v->seen++;
}

static void joint_layers(int which) {
    joint_kit kit;
    models_watch watch;
    astrovl_error err = {ASTROVL_OK, ""};
    float image[JOINT_DIMS], text[JOINT_DIMS];
    int i, n = 0;
    joint_kit_open(&kit, which);
    models_watch_start(&watch, &kit.gold, 0);
    astrovl_session *s = joint_session(&kit, ASTROVL_EXACT, 2, joint_on_tap, &watch);
    CHECK(astrovl_embed_images(s, kit.images, 1, 0, image, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_embed_texts(s, kit.texts, 1, 0, text, &err) == ASTROVL_OK, "%s", err.message);
    for (i = 0; i < kit.gold.n; i++) {
        const models_value *v = &kit.gold.values[i];
        int tower = strncmp(v->name, "vision_model", 12) == 0 || strncmp(v->name, "text_model", 10) == 0 || strstr(v->name, "projection");
        n += tower;
        CHECK(!tower || v->seen == 1, "%s was seen %d times", v->name, v->seen);
    }
    CHECK(n >= 68, "%d tensors", n);
    if (getenv("MODELS_VERBOSE")) printf("    %c: %d tensors, the largest difference %.2g at %s\n", which, n, watch.worst, watch.worst_name);
    astrovl_session_free(s);
    joint_kit_close(&kit);
}

static void joint_layers_a(void) { joint_layers('a'); }
static void joint_layers_b(void) { joint_layers('b'); }

// CLIP's loss, all pairs as one batch: the mean over both directions of -log softmax(scale * cosines)[i][i]
static float joint_loss(const float *images, const float *texts, float scale) {
    double loss = 0;
    for (int direction = 0; direction < 2; direction++)
        for (int i = 0; i < JOINT_IMAGES; i++) {
            const float *query = (direction ? texts : images) + i * JOINT_DIMS, *items = direction ? images : texts;
            double own = (double)avl__dot_portable(query, items + i * JOINT_DIMS, JOINT_DIMS), sum = 0;
            for (int j = 0; j < JOINT_IMAGES; j++)
                sum += exp(scale * ((double)avl__dot_portable(query, items + j * JOINT_DIMS, JOINT_DIMS) - own));
            loss += log(sum) / (2 * JOINT_IMAGES);
        }
    return (float)loss;
}

static void joint_scores(int which) {
    joint_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    float images[JOINT_IMAGES * JOINT_DIMS], texts[JOINT_TEXTS * JOINT_DIMS], cosines[JOINT_IMAGES * JOINT_TEXTS], all[JOINT_IMAGES * JOINT_TEXTS];
    float unit[JOINT_IMAGES * JOINT_DIMS], loss;
    astrovl_info info;
    joint_kit_open(&kit, which);
    astrovl_get_info(kit.model, &info);
    astrovl_session *s = joint_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    CHECK(astrovl_embed_images(s, kit.images, JOINT_IMAGES, 0, images, &err) == ASTROVL_OK, "%s", err.message);
    CHECK(astrovl_embed_texts(s, kit.texts, JOINT_TEXTS, 0, texts, &err) == ASTROVL_OK, "%s", err.message);
    joint_check(&kit, "images", images, MODELS_TOLERANCE);
    joint_check(&kit, "texts", texts, MODELS_TOLERANCE);
    CHECK(astrovl_embed_images(s, kit.images, JOINT_IMAGES, 1, unit, &err) == ASTROVL_OK, "%s", err.message);
    for (int i = 0; i < JOINT_IMAGES; i++) {
        double length = 0.0;
        for (int k = 0; k < JOINT_DIMS; k++) length += (double)unit[i * JOINT_DIMS + k] * unit[i * JOINT_DIMS + k];
        CHECK(length > 0.99999 && length < 1.00001, "image %d has length %g", i, length);
    }
    CHECK(astrovl_embed_texts(s, kit.texts, JOINT_TEXTS, 1, texts, &err) == ASTROVL_OK, "%s", err.message);
    astrovl_session_free(s);
    const models_value *order = models_field(&kit.gold, "", "order");
    for (int i = 0; i < JOINT_IMAGES; i++) {
        float *row = cosines + i * JOINT_TEXTS, *p = all + i * JOINT_TEXTS, total = 0.0f;
        astrovl_fit fits[JOINT_TEXTS];
        for (int j = 0; j < JOINT_TEXTS; j++) row[j] = avl__dot_portable(unit + i * JOINT_DIMS, texts + j * JOINT_DIMS, JOINT_DIMS);
        for (int j = 1; j < JOINT_TEXTS; j++) {
            int before = models_int(order, i * JOINT_TEXTS + j - 1), after = models_int(order, i * JOINT_TEXTS + j);
            CHECK(row[before] >= row[after], "image %d: text %d stands before %d", i, before, after);
        }
        // The one-call score is fast mode's: what rounding does to so small and random a model is seen in the second digit.
        CHECK(astrovl_score(kit.model, &kit.images[i], kit.texts, JOINT_TEXTS, fits, &err) == ASTROVL_OK, "%s", err.message);
        for (int j = 0; j < JOINT_TEXTS; j++) {
            total += fits[j].probability;
            CHECK(fabs((double)fits[j].cosine - row[j]) < 0.02, "image %d, text %d: %g in fast mode, %g", i, j, fits[j].cosine, row[j]);
            p[j] = info.logit_scale * row[j];
        }
        CHECK(total > 0.9999f && total < 1.0001f, "probabilities sum to %g", total);
        astrovl_softmax(p, JOINT_TEXTS);
    }
    joint_check(&kit, "cosines", cosines, MODELS_TOLERANCE);
    joint_check(&kit, "probabilities", all, 2e-3);   // 100 times a cosine's difference, exponentiated
    s = joint_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    CHECK(astrovl_embed_texts(s, kit.texts, JOINT_IMAGES, 1, texts, &err) == ASTROVL_OK, "%s", err.message);
    loss = joint_loss(unit, texts, info.logit_scale);
    joint_check(&kit, "loss", &loss, 1e-4);
    astrovl_session_free(s);
    joint_kit_close(&kit);
}

static void joint_scores_a(void) { joint_scores('a'); }
static void joint_scores_b(void) { joint_scores('b'); }

// Together or one by one, 1 to 8 threads: the same bits.
static void joint_batches(void) {
    enum { N = 40 };
    joint_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_image many[N];
    const char *words[N];
    static float together[N * JOINT_DIMS], one[JOINT_DIMS], texts[N * JOINT_DIMS];
    joint_kit_open(&kit, 'b');
    for (int i = 0; i < N; i++) {
        many[i] = kit.images[i % JOINT_IMAGES];
        words[i] = kit.texts[i * 7 % JOINT_TEXTS];
    }
    for (int threads = 1; threads <= 8; threads++) {
        astrovl_session *s = joint_session(&kit, threads % 2 ? ASTROVL_EXACT : ASTROVL_FAST, threads, NULL, NULL);
        CHECK(astrovl_embed_images(s, many, N, 1, together, &err) == ASTROVL_OK, "%s", err.message);
        CHECK(astrovl_embed_texts(s, words, N, 1, texts, &err) == ASTROVL_OK, "%s", err.message);
        for (int i = 0; i < N; i += 9) {
            CHECK(astrovl_embed_images(s, &many[i], 1, 1, one, &err) == ASTROVL_OK, "%s", err.message);
            CHECK(memcmp(one, together + i * JOINT_DIMS, sizeof one) == 0, "%d threads: image %d", threads, i);
            CHECK(astrovl_embed_texts(s, &words[i], 1, 1, one, &err) == ASTROVL_OK, "%s", err.message);
            CHECK(memcmp(one, texts + i * JOINT_DIMS, sizeof one) == 0, "%d threads: text %d", threads, i);
        }
        CHECK(astrovl_embed_images(s, many, 0, 1, NULL, &err) == ASTROVL_OK && astrovl_embed_texts(s, words, 0, 1, NULL, &err) == ASTROVL_OK,
              "none: %s", err.message);
        astrovl_session_free(s);
    }
    joint_kit_close(&kit);
}

// A tower whose weights are infinite gives an error, not an embedding, and a query of NaN finds nothing.
static void joint_no_numbers(void) {
    static const struct { const char *file, *tensor, *where; } damaged[] = {
        {"test/golden/joint_a.gguf", "v.blk.0.ffn_down.weight", "vision_model.encoder.layers.0.mlp.fc1 of the image: "},
        {"test/golden/joint_a.gguf", "v.patch_embd.weight", "vision_model.embeddings.patch_embedding of the image: "},
        {"test/golden/joint_a.gguf", "visual_projection.weight", "visual_projection of the embeddings: "},
        {"test/golden/joint_a.gguf", "t.blk.1.attn_v.weight", "text_model.encoder.layers.1.self_attn.v_proj of the text: "},
        {"test/golden/joint_a.gguf", "text_projection.weight", "text_projection of the embeddings: "},
        {"test/golden/joint_b.gguf", "v.head.0.weight", "visual_projection.head.act of the embeddings: "},
        {"test/golden/joint_b.gguf", "t.head.2.weight", "text_projection.head of the embeddings: "}};
    static const uint16_t row[2] = {0x3C00, 0};
    joint_kit kit;
    float query[2] = {1.0f, 0.0f};
    astrovl_rows rows = {row, 1, 2};
    astrovl_hit hit;
    joint_kit_open(&kit, 'a');
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        astrovl_error err = {ASTROVL_OK, ""};
        size_t size;
        unsigned char *bytes = read_file(damaged[i].file, &size);
        astrovl_gguf *file = astrovl_gguf_open(damaged[i].file, 0, &err);
        const astrovl_tensor *t = astrovl_gguf_find_tensor(file, damaged[i].tensor);
        const int is_f32 = t && t->type == ASTROVL_TYPE_F32, is_half = t && t->type == ASTROVL_TYPE_F16;
        for (size_t k = 0; t && k < t->n_bytes; k++)
            bytes[t->offset + k] = (unsigned char)(is_f32 ? (k % 4 == 3 ? 0x7F : k % 4 == 2 ? 0x80 : 0) : is_half ? (k % 2 ? 0x7C : 0) : 0xFF);
        astrovl_model *m = models_open_bytes(bytes, size, &err);
        astrovl_fit fits[2];
        CHECK(t && m, "%s: %s", damaged[i].tensor, err.message);
        CHECK(astrovl_score(m, kit.images, kit.texts, 2, fits, &err) == ASTROVL_ERROR_MODEL &&
              strstr(err.message, "NaN or infinity in ") && strstr(err.message, damaged[i].where), "%s: %s", damaged[i].tensor,
              err.message);
        astrovl_gguf_close(file);
        astrovl_close(m);
        free(bytes);
    }
    CHECK(astrovl_search(&rows, query, 1, 1, &hit, NULL) == 1, "a query of numbers");
    query[1] = avl__float_from_bits(0x7FC00000);
    CHECK(astrovl_search(&rows, query, 1, 1, &hit, NULL) == -1, "a query of NaN");
    joint_kit_close(&kit);
}

static void joint_errors(void) {
    joint_kit kit;
    models_kit llava;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_image empty = {0, 0, NULL, 1};
    const char *nothing[1] = {NULL};
    astrovl_fit fit;
    float out[64];
    joint_kit_open(&kit, 'a');
    astrovl_session *s = joint_session(&kit, ASTROVL_EXACT, 1, NULL, NULL);
    FAILS(astrovl_embed_images(s, &empty, 1, 1, out, &err) != ASTROVL_OK, ARGUMENT, "an empty image");
    FAILS(astrovl_embed_images(s, NULL, 1, 1, out, &err) != ASTROVL_OK, ARGUMENT, "no image");
    FAILS(astrovl_embed_images(s, kit.images, -1, 1, out, &err) != ASTROVL_OK, ARGUMENT, "-1 images");
    FAILS(astrovl_embed_texts(s, nothing, 1, 1, out, &err) != ASTROVL_OK, ARGUMENT, "a NULL text");
    FAILS(astrovl_embed_texts(s, NULL, 1, 1, out, &err) != ASTROVL_OK, ARGUMENT, "no texts");
    FAILS(astrovl_score(kit.model, kit.images, kit.texts, 0, &fit, &err) != ASTROVL_OK, ARGUMENT, "no texts to score");
    FAILS(!astrovl_chat(s, NULL, 0, "What?", NULL, &err), MODEL, "a chat with CLIP");
    astrovl_session_free(s);
    models_kit_open(&llava, 'a');
    s = models_session(&llava, ASTROVL_EXACT, 1, NULL, NULL);
    CHECK(astrovl_embed_images(s, kit.images, 1, 1, out, &err) == ASTROVL_ERROR_MODEL && strstr(err.message, "visual_projection"),
          "images with LLaVA: %s", err.message);
    FAILS(astrovl_embed_texts(s, kit.texts, 1, 1, out, &err) != ASTROVL_OK, MODEL, "texts with LLaVA");
    FAILS(astrovl_clip_tokenize(llava.model, "a", 1, NULL, 0, &err) < 0, MODEL, "tokens with LLaVA");
    astrovl_session_free(s);
    models_kit_close(&llava);
    joint_kit_close(&kit);
}

// ---- hostile files and memory

// The file without one of its tensors or keys (its name is changed): refused with its name, or not needed.
static void joint_missing(void) {
    static const char *const files[] = {"test/golden/joint_a.gguf", "test/golden/joint_b.gguf"};
    int f, i, n_refused = 0;
    for (f = 0; f < 2; f++) {
        astrovl_error err = {ASTROVL_OK, ""};
        size_t size;
        unsigned char *bytes = read_file(files[f], &size);
        astrovl_gguf *file = astrovl_gguf_open(files[f], 0, &err);
        int n_tensors = astrovl_gguf_n_tensors(file);
        for (i = 0; i < n_tensors + astrovl_gguf_n_kv(file); i++) {
            const char *name = i < n_tensors ? astrovl_gguf_tensor(file, i)->name : astrovl_gguf_kv(file, i - n_tensors)->key;
            unsigned char *after = models_after(bytes, size, name, 0);
            after[-1] ^= 1;
            astrovl_model *m = models_open_bytes(bytes, size, &err);
            n_refused += !m;
            if (!m) CHECK(err.message[0] && (strstr(err.message, name) || strstr(err.message, "vocabulary")), "without %s: %s", name, err.message);
            astrovl_close(m);
            after[-1] ^= 1;
        }
        astrovl_gguf_close(file);
        free(bytes);
    }
    CHECK(n_refused > 100, "%d are missed", n_refused);
}

static void joint_mutated(void) {
    size_t size;
    unsigned char *bytes = read_file("test/golden/joint_b.gguf", &size);
    astrovl_error err = {ASTROVL_OK, ""};
    uint64_t random = 11;
    int round, n_ran = 0;
    astrovl_gguf *file = astrovl_gguf_open("test/golden/joint_b.gguf", 0, &err);
    joint_kit kit;
    size_t metadata = (size_t)astrovl_gguf_tensor(file, 0)->offset;
    astrovl_gguf_close(file);
    joint_kit_open(&kit, 'b');
    for (round = 0; round < 300; round++) {
        unsigned char *copy = (unsigned char *)malloc(size);
        astrovl_info info;
        memcpy(copy, bytes, size);
        mutate(copy, 0, random_below(&random, 10) ? metadata : size, &random);
        astrovl_model *m = models_open_bytes(copy, size, &err);
        if (m) {
            astrovl_session *s;
            astrovl_get_info(m, &info);
            s = info.n_patches <= 4096 && info.image_size <= 1024 ? astrovl_session_new(m, NULL, &err) : NULL;
            float *out = (float *)malloc(sizeof(float) * JOINT_TEXTS * (size_t)(info.n_embd_joint + 1));
            if (s) n_ran += astrovl_embed_images(s, kit.images, 1, 1, out, &err) == ASTROVL_OK;
            if (s) n_ran += astrovl_embed_texts(s, kit.texts, JOINT_TEXTS, 1, out, &err) == ASTROVL_OK;
            astrovl_session_free(s);
            free(out);
        } else CHECK(err.status != ASTROVL_OK && err.message[0], "an error without words");
        astrovl_close(m);
        free(copy);
    }
    CHECK(n_ran > 30, "%d ran", n_ran);
    joint_kit_close(&kit);
    free(bytes);
}

static void joint_out_of_memory(int which) {
    const char *path = which == 'a' ? "test/golden/joint_a.gguf" : "test/golden/joint_b.gguf";
    joint_kit kit;
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_model *m;
    astrovl_status status;
    float out[8 * JOINT_DIMS];
    astrovl_fit fits[JOINT_TEXTS];
    long at;
    int failed;
    joint_kit_open(&kit, which);
    long live = g_live;
    EACH_ALLOCATION(at, failed, m = astrovl_open(path, NULL, &err)) {
        if (failed) FAILS(!m, MEMORY, "open, allocation %ld", at);
        astrovl_close(m);
        CHECK(g_live == live, "open, allocation %ld: %ld blocks leak", at, g_live - live);
    }
    CHECK(at > 50, "%ld allocations in open", at);
    astrovl_session *s = joint_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    EACH_ALLOCATION(at, failed, status = astrovl_embed_images(s, kit.images, 2, 1, out, &err),
                    status = status ? status : astrovl_embed_texts(s, kit.texts, 2, 1, out, &err)) {
        if (failed) FAILS(status, MEMORY, "embedding, allocation %ld", at);
        astrovl_session_free(s);               // each in a new session: a warm one allocates less
        s = joint_session(&kit, ASTROVL_EXACT, 2, NULL, NULL);
    }
    astrovl_session_free(s);
    CHECK(at > 10, "%ld allocations in embedding", at);
    EACH_ALLOCATION(at, failed, status = astrovl_score(kit.model, kit.images, kit.texts, JOINT_TEXTS, fits, &err))
        if (failed) FAILS(status, MEMORY, "score, allocation %ld", at);
    joint_kit_close(&kit);
}

static void joint_out_of_memory_a(void) { joint_out_of_memory('a'); }
static void joint_out_of_memory_b(void) { joint_out_of_memory('b'); }

// ---- search and metrics, against the plainest way to compute them

// Small multiples of 1/64: many rows are equal, so that the order of equals is tested too.
static uint16_t *joint_rows(int n, int d, uint64_t seed) {
    uint16_t *rows = (uint16_t *)malloc(sizeof *rows * (size_t)n * (size_t)d + 1);
    for (int i = 0; rows && i < n * d; i++) {
        uint16_t h = astrovl_f32_to_f16((float)((int)(avl__random(&seed) * 5) - 2) / (d > 8 ? 64 : 1));
        unsigned char b[2];
        b[0] = (unsigned char)h;
        b[1] = (unsigned char)(h >> 8);
        memcpy((unsigned char *)rows + 2 * (size_t)i, b, 2);
    }
    return rows;
}

static void joint_search_case(int n, int d, int k, int n_threads, int odd) {
    uint16_t *rows = joint_rows(n, d, (uint64_t)(n * 31 + d));
    unsigned char *place = (unsigned char *)malloc((size_t)n * (size_t)d * 2 + 2);
    float *query = (float *)malloc(sizeof(float) * (size_t)d), *x = (float *)malloc(sizeof(float) * (size_t)d);
    astrovl_hit *hits = (astrovl_hit *)malloc(sizeof *hits * (size_t)k);
    char *taken = (char *)calloc((size_t)n + 1, 1);
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_rows index;
    uint64_t seed = 5;
    int found;
    index.data = place + odd, index.n_rows = n, index.n_dims = d;
    memcpy(place + odd, rows, (size_t)n * (size_t)d * 2);
    for (int j = 0; j < d; j++) query[j] = (float)avl__random(&seed) - 0.5f;
    found = astrovl_search(&index, query, k, n_threads, hits, &err);
    CHECK(found == (k < n ? k : n), "%d of %d rows, %d dims: %d hits", k, n, d, found);
    for (int h = 0; h < found; h++) {
        int best = -1;
        float score = 0.0f;
        for (int i = 0; i < n; i++) {
            float s;
            if (taken[i]) continue;
            for (int j = 0; j < d; j++) x[j] = astrovl_f16_to_f32(avl__load_u16(place + odd + 2 * ((size_t)i * (size_t)d + (size_t)j)));
            s = avl__dot_portable(x, query, d);
            if (best < 0 || s > score) { best = i; score = s; }
        }
        taken[best] = 1;
        CHECK(hits[h].row == best && hits[h].score == score, "%d rows, %d dims, hit %d: row %d (%.9g), wanted %d (%.9g)", n, d, h,
              (int)hits[h].row, hits[h].score, best, score);
    }
    free(rows); free(place); free(query); free(x); free(hits); free(taken);
}

static void joint_search(void) {
    astrovl_error err = {ASTROVL_OK, ""};
    astrovl_hit hits[4];
    float query[4] = {1, 0, 0, 0};
    uint8_t rows[24] = {0};   // three rows of four float16, little-endian
    astrovl_rows none = {NULL, 0, 4}, flat = {NULL, 3, 0}, lost = {NULL, 3, 4}, vast = {NULL, INT64_MAX, 4}, three = {NULL, 3, 4};
    int failed, n;
    long at;
    none.data = flat.data = vast.data = three.data = rows;
    for (int threads = 1; threads <= 8; threads++) joint_search_case(9000, 20, 17, threads, threads % 2);
    joint_search_case(1, 1, 3, 1, 0);
    joint_search_case(50, 512, 50, 2, 1);
    joint_search_case(300, 67, 300, 3, 0);
    joint_search_case(40000, 3, 5, 2, 0);
    CHECK(astrovl_search(&none, query, 4, 1, hits, &err) == 0, "no rows");
    FAILS(astrovl_search(&flat, query, 4, 1, hits, &err) < 0, ARGUMENT, "no dims");
    FAILS(astrovl_search(&three, query, 0, 1, hits, &err) < 0, ARGUMENT, "k 0");
    FAILS(astrovl_search(&lost, query, 1, 1, hits, &err) < 0, ARGUMENT, "no rows' address");
    FAILS(astrovl_search(&vast, query, 1, 1, hits, &err) < 0, ARGUMENT, "more rows than there is memory");
    rows[9] = 0x7E;    // row 1: NaN: the last
    rows[17] = 0xBC;   // row 2: -1
    CHECK(astrovl_search(&three, query, 3, 1, hits, &err) == 3 && hits[0].row == 0 && hits[1].row == 2 && hits[2].row == 1,
          "%d %d %d", (int)hits[0].row, (int)hits[1].row, (int)hits[2].row);
    CHECK(astrovl_search(&three, query, INT_MAX, 1, hits, &err) == 3, "all rows, however large k is: %s", err.message);
    EACH_ALLOCATION(at, failed, n = astrovl_search(&three, query, 3, 2, hits, &err))
        if (failed) FAILS(n < 0, MEMORY, "search, allocation %ld", at);
    CHECK(at > 2, "%ld allocations", at);
}

static void tests_joint(void) {
    run("joint: what the files say", joint_info);
    run("joint: A's tokens as CLIPTokenizer, merges recovered", joint_tokens_a);
    run("joint: B's tokens as CLIPTokenizer", joint_tokens_b);
    run("joint: long texts", joint_long_texts);
    run("joint: a zero byte", joint_zero_byte);
    run("joint: no start and end token", joint_no_ends);
    run("joint: A layer by layer as CLIPModel", joint_layers_a);
    run("joint: B layer by layer as CLIPModel", joint_layers_b);
    run("joint: A's embeddings, scores, order, loss", joint_scores_a);
    run("joint: B's embeddings, scores, order, loss", joint_scores_b);
    run("joint: the same bits together and one by one, 1 to 8 threads", joint_batches);
    run("joint: wrong arguments and missing towers", joint_errors);
    run("joint: NaN and infinity are errors", joint_no_numbers);
    run("joint: every tensor and key missing once", joint_missing);
    run("joint: mutated files", joint_mutated);
    run("joint: A out of memory at every allocation", joint_out_of_memory_a);
    run("joint: B out of memory at every allocation", joint_out_of_memory_b);
    run("joint: search", joint_search);
}

int main(int argc, char **argv) {
    g_words = argv + 1;
    g_n_words = argc - 1;
    tests_numbers();
    tests_ops();
    tests_gguf();
    tests_text();
    tests_images();
    tests_models();
    tests_guide();
    tests_joint();
    printf("%d passed, %d failed\n", g_passed, g_failed);
    return g_failed > 0;
}

