// What guided decoding costs: the paper's schema against free decoding, in turns, on a model of yours.
//     make bench-guided MODEL=FILE.gguf [TOKENS=100]
// Prints the medians of 9 rounds, milliseconds a token, and their ratio.
#define ASTROVL_IMPLEMENTATION
#include "../astrovl.h"
#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 9 };

static const char schema[] =
    "{\"type\": \"object\", \"required\": [\"objects_and_phenomena\", \"science_use_cases\"], \"properties\": {"
    "\"objects_and_phenomena\": {\"type\": \"array\", \"items\": {\"type\": \"string\", \"maxLength\": 80}, \"minItems\": 1, \"maxItems\": 5},"
    "\"science_use_cases\": {\"type\": \"array\", \"items\": {\"type\": \"string\", \"maxLength\": 80}, \"minItems\": 1, \"maxItems\": 5}}}";

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Milliseconds a token of one answer; ends the program on failure.
static double milliseconds(astrovl_session *s, astrovl_guide *guide, int n_tokens, uint64_t seed) {
    astrovl_generation how;
    astrovl_error err;
    astrovl_stats stats;
    char *text;
    memset(&how, 0, sizeof how);
    how.max_tokens = n_tokens;
    how.temperature = 1.0f;
    how.seed = seed;
    how.guide = guide;
    astrovl_session_reset(s);
    text = astrovl_chat(s, NULL, 0, "Summarize: we image the arcs around a cluster of galaxies and map its dark matter.", &how, &err);
    if (!text) { fprintf(stderr, "%s\n", err.message); exit(1); }
    astrovl_free(text);
    astrovl_get_stats(s, &stats);
    return stats.decode_seconds * 1e3 / (stats.n_answer_tokens > 0 ? stats.n_answer_tokens : 1);
}

int main(int argc, char **argv) {
    astrovl_error err;
    astrovl_model *model = argc > 1 ? astrovl_open(argv[1], NULL, &err) : NULL;
    astrovl_session *s = model ? astrovl_session_new(model, NULL, &err) : NULL;
    astrovl_guide *guide = s ? astrovl_guide_schema(model, schema, strlen(schema), &err) : NULL;
    double free_ms[ROUNDS], guided_ms[ROUNDS];
    int n_tokens = argc > 2 ? atoi(argv[2]) : 100, r;
    astrovl_info info;
    if (!guide) {
        fprintf(stderr, "%s\n", argc > 1 ? err.message : "usage: bench_guided MODEL.gguf [TOKENS]");
        return 1;
    }
    for (r = 0; r < ROUNDS; r++) {
        free_ms[r] = milliseconds(s, NULL, n_tokens, (uint64_t)r);
        guided_ms[r] = milliseconds(s, guide, n_tokens, (uint64_t)r);
    }
    qsort(free_ms, ROUNDS, sizeof *free_ms, by_size);
    qsort(guided_ms, ROUNDS, sizeof *guided_ms, by_size);
    astrovl_get_info(model, &info);
    printf("vocabulary of %d: free %.3f ms a token, guided %.3f, ratio %.3f\n", info.n_vocab, free_ms[ROUNDS / 2],
           guided_ms[ROUNDS / 2], guided_ms[ROUNDS / 2] / free_ms[ROUNDS / 2]);
    astrovl_guide_free(guide);
    astrovl_session_free(s);
    astrovl_close(model);
    return 0;
}
