/* eval_compare.c - `quattuor eval compare`: two models over the same text (eval/compare.h). */
#include "base/checked.h"
#include "base/status.h"
#include "cli/eval.h"
#include "eval/compare.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME "eval compare"
#define CONTEXT_TOKENS 16 /* shown before a place */
#define SHOWN_LAYERS 4
#define MAX_TABLE 64

struct flags {
  struct qtr_model_flags model; /* of both, but for the directory and the precision */
  struct qtr_option_list models, precisions;
  const char *text;
  int32_t window, tokens;
  bool no_layers, json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "model",
     .argument = "DIR",
     .kind = QTR_OPTION_LIST,
     .offset = AT(models),
     .help = "Given twice: A, the reference, then B. They may be the same directory in two precisions."},
    {.name = "precision",
     .argument = "P",
     .kind = QTR_OPTION_LIST,
     .offset = AT(precisions),
     .help = "Such as w4a8kv4; given twice: A's, then B's. Default: as the files say."},
    {.name = "window",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(window),
     .min = 2,
     .max = 1 << 24,
     .help = "Tokens of a window. Default 2048."},
    {.name = "tokens",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(tokens),
     .min = 2,
     .max = INT32_MAX,
     .help = "Only the first N tokens of the text. Default: all."},
    {.name = "no-layers", .kind = QTR_OPTION_FLAG, .offset = AT(no_layers), .help = "Leave the hidden states alone."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: kl (mean, median, p90, p99, max), top1_agreement, perplexity_a, perplexity_b, perplexity_ratio, "
             "worst_tokens, layers, worst_layers and more."},
    {0}};
#undef AT

/* The model's options without those that are given for each model here. out: (MAX_TABLE) */
static void shared_options(struct qtr_option *out) {
  size_t n = 0;
  for (const struct qtr_option *o = qtr_model_options_table; o->name && n + 1 < MAX_TABLE; o++) {
    if (strcmp(o->name, "model") != 0 && strcmp(o->name, "precision") != 0) out[n++] = *o;
  }
  out[n] = (struct qtr_option){0};
}

static enum qtr_status open_models(struct flags *flags, struct qtr_engine *engine[2], struct qtr_error *err) {
  qtr_eval_size_for_windows(&flags->model, flags->window);
  for (size_t i = 0; i < 2; i++) {
    flags->model.model = flags->models.item[i];
    flags->model.precision = i < flags->precisions.n ? flags->precisions.item[i] : NULL;
    enum qtr_status status = qtr_open_engine(&flags->model, &engine[i], err);
    if (status) return qtr_error_prefix(err, "model %c", i == 0 ? 'A' : 'B');
  }
  return QTR_OK;
}

/* The text in A's tokens, which must be B's. */
static enum qtr_status read_text(struct qtr_engine *const engine[2], const char *path, int32_t **token, size_t *n_tokens,
                                 struct qtr_error *err) {
  int32_t *other = NULL;
  size_t n_other = 0;
  enum qtr_status status = qtr_eval_read_stream(engine[0], path, token, n_tokens, err);
  if (status) return status;
  status = qtr_eval_read_stream(engine[1], path, &other, &n_other, err);
  if (status == QTR_ERR_NOT_FOUND) return QTR_OK; /* B has no tokenizer of its own: it takes A's */
  if (status) return status;
  for (size_t i = 0; i < QTR_MAX(*n_tokens, n_other) && !status; i++) {
    int32_t a = i < *n_tokens ? (*token)[i] : -1, b = i < n_other ? other[i] : -1;
    if (a == b) continue;
    status = qtr_fail(err, QTR_ERR_ARGUMENT,
                      "the tokenizers differ: token %zu of the text is %d for A and %d for B (-1: the end); only models "
                      "with the same tokens can be compared",
                      i, a, b);
  }
  free(other);
  return status;
}

/* ---- output ---- */

/* Tokens as text; on failure a question mark. malloc'ed, NULL when out of memory. */
static char *text_of(struct qtr_engine *engine, const int32_t *token, size_t n) {
  struct qtr_error err;
  char *text = NULL;
  size_t len;
  return qtr_engine_detokenize(engine, token, n, &text, &len, &err) ? strdup("?") : text;
}

static json_t *text_json(struct qtr_engine *engine, const int32_t *token, size_t n) {
  char *text = text_of(engine, token, n);
  json_t *json = text ? json_string(text) : NULL;
  free(text);
  return json;
}

static json_t *place_json(struct qtr_engine *engine, const struct qtr_compare_place *p, const int32_t *token,
                          size_t window) {
  size_t before = QTR_MIN(p->index, (size_t)CONTEXT_TOKENS);
  return json_pack("{s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "index", (json_int_t)p->index,
                   "window", (json_int_t)(p->index / window), "position", (json_int_t)(p->index % window), "kl",
                   qtr_json_number(p->kl, 6), "context", text_json(engine, token + p->index - before, before), "target",
                   text_json(engine, &p->target, 1), "target_p_a", qtr_json_number((double)p->p_target_a, 4), "target_p_b",
                   qtr_json_number((double)p->p_target_b, 4), "best_a", text_json(engine, &p->best_a, 1), "best_b",
                   text_json(engine, &p->best_b, 1), "best_p_a", qtr_json_number((double)p->p_best_a, 4), "best_p_b",
                   qtr_json_number((double)p->p_best_b, 4), "token", json_integer(p->target));
}

/* What layers are ranked by: the error, or where it has no meaning the angles. */
static double badness(const struct qtr_compare_result *r, size_t state) {
  return r->same_basis ? r->layer[state].error : r->layer[state].cosine_error;
}

/* The layers with the largest errors, worst first. */
static size_t rank_layers(const struct qtr_compare_result *r, size_t worst[SHOWN_LAYERS]) {
  size_t n = 0;
  for (size_t s = 1; r->layer && s <= r->n_layers; s++) {
    size_t at = n;
    while (at > 0 && badness(r, worst[at - 1]) < badness(r, s)) at--;
    if (at == SHOWN_LAYERS) continue;
    if (n < SHOWN_LAYERS) n++;
    memmove(worst + at + 1, worst + at, (n - 1 - at) * sizeof *worst);
    worst[at] = s;
  }
  return n;
}

static json_t *layers_json(const struct qtr_compare_result *r) {
  json_t *layers = json_array();
  for (size_t s = 0; r->layer && s <= r->n_layers; s++) {
    const struct qtr_compare_layer *l = &r->layer[s];
    (void)json_array_append_new(
        layers, json_pack("{s:i, s:o, s:o, s:o}", "layer", (int)s - 1, "error", qtr_json_number(l->error, 6), "cosine_error",
                          qtr_json_number(l->cosine_error, 6), "norm_ratio", qtr_json_number(l->norm_ratio, 6)));
  }
  return layers;
}

static bool print_as_json(const struct flags *flags, struct qtr_engine *const engine[2], const int32_t *token,
                          const struct qtr_compare_result *r) {
  struct qtr_engine_info info[2];
  size_t worst[SHOWN_LAYERS], n_worst = rank_layers(r, worst);
  json_t *places = json_array(), *worst_layers = json_array();
  for (size_t i = 0; i < 2; i++) qtr_engine_get_info(engine[i], &info[i]);
  for (size_t i = 0; i < r->n_worst; i++) {
    (void)json_array_append_new(places, place_json(engine[0], &r->worst[i], token, (size_t)flags->window));
  }
  for (size_t i = 0; i < n_worst; i++) (void)json_array_append_new(worst_layers, json_integer((json_int_t)worst[i] - 1));
  json_t *kl = json_pack("{s:o, s:o, s:o, s:o, s:o}", "mean", qtr_json_number(r->kl_mean, 7), "median",
                         qtr_json_number(r->kl_median, 7), "p90", qtr_json_number(r->kl_p90, 7), "p99",
                         qtr_json_number(r->kl_p99, 7), "max", qtr_json_number(r->kl_max, 7));
  return qtr_print_json(
      NAME,
      json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:s, s:i, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
                "s:o}",
                "model_a", info[0].model_dir, "model_b", info[1].model_dir, "precision_a", info[0].precision, "precision_b",
                info[1].precision, "group_size_a", (int)info[0].group_size, "group_size_b", (int)info[1].group_size,
                "device", info[0].device, "window", (int)flags->window, "n_windows", (json_int_t)r->n_windows, "n_scored",
                (json_int_t)r->n_scored, "perplexity_a", qtr_json_number(r->perplexity_a, 8), "perplexity_b",
                qtr_json_number(r->perplexity_b, 8), "perplexity_ratio",
                qtr_json_number(r->perplexity_b / r->perplexity_a, 8), "kl", kl, "top1_agreement",
                qtr_json_number(r->top1_agreement, 7), "top1_accuracy_a", qtr_json_number(r->top1_accuracy_a, 7),
                "top1_accuracy_b", qtr_json_number(r->top1_accuracy_b, 7), "worst_tokens", places, "same_basis",
                r->layer ? json_boolean(r->same_basis) : json_null(), "layers", layers_json(r), "worst_layers", worst_layers,
                "seconds", qtr_json_number(r->seconds, 5)));
}

static void print_quoted(struct qtr_engine *engine, const int32_t *token, size_t n) {
  char shown[256], *text = text_of(engine, token, n);
  printf("\"%s\"", text ? qtr_printable(text, strlen(text), shown, sizeof shown) : "");
  free(text);
}

static void print_places(struct qtr_engine *engine, const int32_t *token, size_t window,
                         const struct qtr_compare_result *r) {
  for (size_t i = 0; i < r->n_worst; i++) {
    const struct qtr_compare_place *p = &r->worst[i];
    size_t before = QTR_MIN(p->index, (size_t)CONTEXT_TOKENS);
    printf("  %.4g  window %zu, token %zu: ", p->kl, p->index / window, p->index % window);
    print_quoted(engine, token + p->index - before, before);
    printf("\n         next ");
    print_quoted(engine, &p->target, 1);
    printf(" (A %.1f %%, B %.1f %%); A says ", 100 * (double)p->p_target_a, 100 * (double)p->p_target_b);
    print_quoted(engine, &p->best_a, 1);
    printf(" (%.1f %%), B ", 100 * (double)p->p_best_a);
    print_quoted(engine, &p->best_b, 1);
    printf(" (%.1f %%)\n", 100 * (double)p->p_best_b);
  }
}

static void print_layers(const struct qtr_compare_result *r) {
  size_t worst[SHOWN_LAYERS], n = rank_layers(r, worst);
  if (!r->layer) {
    printf("hidden states: not compared, %s\n", r->no_layers);
    return;
  }
  printf(r->same_basis
             ? "hidden states, worst layers (mean of |a - b| / |a|; error of the angles between tokens):\n"
             : "hidden states, worst layers (B's are rotated or permuted, so only the angles between tokens can be "
               "compared):\n");
  for (size_t i = 0; i < n; i++) {
    const struct qtr_compare_layer *l = &r->layer[worst[i]];
    printf("  after layer %zu: ", worst[i] - 1);
    if (r->same_basis) printf("%.4g (%+.2g in this layer); ", l->error, l->error - r->layer[worst[i] - 1].error);
    printf("%.3g\n", l->cosine_error);
  }
}

static bool print_as_text(const struct flags *flags, struct qtr_engine *const engine[2], const int32_t *token,
                          const struct qtr_compare_result *r) {
  struct qtr_engine_info info[2];
  for (size_t i = 0; i < 2; i++) qtr_engine_get_info(engine[i], &info[i]);
  printf("%zu tokens scored in %zu windows of %d, %.1f s\n", r->n_scored, r->n_windows, flags->window, r->seconds);
  printf("A  %s, %s: perplexity %.4f, right %.2f %%\n", info[0].model_dir, info[0].precision, r->perplexity_a,
         100 * r->top1_accuracy_a);
  printf("B  %s, %s: perplexity %.4f, right %.2f %%\n", info[1].model_dir, info[1].precision, r->perplexity_b,
         100 * r->top1_accuracy_b);
  printf("perplexity B/A %.5f (%+.2f %%)\n", r->perplexity_b / r->perplexity_a,
         100 * (r->perplexity_b / r->perplexity_a - 1));
  printf("same best token %.2f %%\n", 100 * r->top1_agreement);
  printf("KL(A||B) in nats: mean %.4g, median %.4g, p90 %.4g, p99 %.4g, max %.4g, at:\n", r->kl_mean, r->kl_median,
         r->kl_p90, r->kl_p99, r->kl_max);
  print_places(engine[0], token, (size_t)flags->window, r);
  print_layers(r);
  return qtr_finish_output(NAME);
}

static int eval_compare(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine[2] = {NULL, NULL};
  struct qtr_compare_result result = {0};
  int32_t *token = NULL;
  size_t n_tokens = 0;
  int code = QTR_EXIT_FAILURE;
  if (flags->tokens > 0) flags->window = QTR_MIN(flags->window, flags->tokens);
  enum qtr_status status = open_models(flags, engine, &err);
  if (!status) status = read_text(engine, flags->text, &token, &n_tokens, &err);
  if (!status) {
    const struct qtr_compare_options options = {
        .window = (size_t)flags->window, .n_tokens = (size_t)flags->tokens, .layers = !flags->no_layers};
    status = qtr_compare_run(engine[0], engine[1], token, n_tokens, &options, &result, &err);
  }
  if (status) {
    code = qtr_report(NAME, &err);
  } else if (flags->json ? print_as_json(flags, engine, token, &result) : print_as_text(flags, engine, token, &result)) {
    code = QTR_EXIT_OK;
  }
  qtr_compare_free(&result);
  free(token);
  for (size_t i = 0; i < 2; i++) qtr_engine_close(engine[i]);
  return code;
}

int qtr_eval_compare(int argc, char **argv) {
  struct flags flags = {.window = 2048};
  struct qtr_option shared[MAX_TABLE];
  qtr_model_flags_init(&flags.model);
  shared_options(shared);
  const struct qtr_option_group groups[] = {{"Models, text and windows", own_options, &flags},
                                            {NULL, qtr_text_option, &flags.text},
                                            {"Both models and engines", shared, &flags.model}};
  struct qtr_command_line line = {
      .command = NAME,
      .usage = "eval compare --model A --model B --text FILE [options]",
      .about =
          "Runs two models with the same tokens over the same windows of a text and says how far B's next-token "
          "distributions are from A's: KL divergence for each token, agreement on the best token, perplexities, the "
          "places that differ most, and the error of the hidden states after each layer. Windows are cut as by eval "
          "ppl.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (flags.models.n != 2) {
        (void)fprintf(stderr, "quattuor " NAME ": %zu models: give --model A --model B\n", flags.models.n);
      } else if (flags.precisions.n != 0 && flags.precisions.n != 2) {
        (void)fprintf(stderr, "quattuor " NAME ": --precision is given for both models or for none: A's, then B's\n");
      } else if (!flags.text) {
        (void)fprintf(stderr, "quattuor " NAME ": no text: give --text FILE\n");
      } else {
        code = eval_compare(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output(NAME) ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
