/* shared_options.c - options that some commands have in common, each written once (cli.h has the structs). What all commands
 * that open a model share is in groups.c. */
#include "cli/cli.h"

#include <stdio.h>

/* ---- checkpoints that are written ---------------------------------------------------------------- */

#define AT(field) offsetof(struct qtr_checkpoint_flags, field)
const struct qtr_option qtr_checkpoint_options_table[] = {
    {.name = "output",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(output),
     .help = "Where the checkpoint goes, with config and tokenizer; made when absent. Needed."},
    {.name = "group-size",
     .argument = "G",
     .kind = QTR_OPTION_INT,
     .offset = AT(group_size),
     .min = -1,
     .max = 128,
     .help = "Of weights that are made 4-bit: 128 (default) or -1, one scale a channel."},
    {.name = "overwrite",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(overwrite),
     .help = "Replace a model in the output directory."},
    {.name = "kv-scales",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(kv_scales),
     .help =
         "Static KV8 scales to put in: the JSON of vLLM, acts.pt of DeepCompressor or LMQuant, or a directory with one of "
         "them. Of scales for each head the largest of a layer is taken."},
    QTR_THREADS_OPTION(AT(threads)),
    {0}};
#undef AT

bool qtr_checkpoint_flags_good(const char *command, const char *model, const struct qtr_checkpoint_flags *flags) {
  int32_t g = flags->group_size;
  if (!model || !flags->output) {
    const char *what = model ? "output" : "model";
    (void)fprintf(stderr, "quattuor %s: no %s: give --%s DIR\n", command, what, what);
    return false;
  }
  if (g == 0 || g == -1 || g == 128) return true;
  (void)fprintf(stderr, "quattuor %s: --group-size \"%d\": write -1 or 128\n", command, (int)g);
  return false;
}

/* ---- texts and questions ------------------------------------------------------------------------- */

const struct qtr_option qtr_text_option[] = {
    {.name = "text",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .help = "The text, UTF-8; line ends may be LF or CR LF and count as LF. Needed."},
    {0}};

#define AT(field) offsetof(struct qtr_haystack_flags, field)
const struct qtr_option qtr_haystack_options_table[] = {
    {.name = "haystack",
     .argument = "PATH",
     .kind = QTR_OPTION_STRING,
     .offset = AT(haystack),
     .help =
         "A text file, or a directory whose *.txt files are taken in the order of their names. Default: simple generated "
         "sentences; for calibrate heads what the model writes."},
    {.name = "lengths",
     .argument = "LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(lengths),
     .help = "Tokens of whole prompts, such as 1024,4096."},
    {.name = "seed",
     .argument = "S",
     .kind = QTR_OPTION_UINT64,
     .offset = AT(seed),
     .given = AT(has_seed),
     .help = "Of the questions: what is asked, and where it stands. Default 0."},
    {0}};
#undef AT

#define AT(field) offsetof(struct qtr_answer_flags, field)
const struct qtr_option qtr_answer_options_table[] = {
    {.name = "prompt",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(prompt),
     .choices = "auto|chat|plain",
     .help = "chat: one user turn in the model's chat template; plain: the text alone. "
             "Default auto: chat where there is a template."},
    {.name = "svg", .argument = "FILE", .kind = QTR_OPTION_STRING, .offset = AT(svg), .help = "Writes a heat map."},
    {.name = "png", .argument = "FILE", .kind = QTR_OPTION_STRING, .offset = AT(png), .help = "Writes a heat map."},
    {.name = "answers",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(answers),
     .help = "Writes every answer with its scores, a JSON object a line."},
    {0}};
#undef AT
