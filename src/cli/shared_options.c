/* shared_options.c - options that some commands have in common, each written once (cli.h has the structs). What all commands
 * that open a model share is in groups.c. */
#include "cli/cli.h"

/* ---- checkpoints that are written ---------------------------------------------------------------- */

#define AT(field) offsetof(struct qtr_checkpoint_flags, field)
const struct qtr_option qtr_checkpoint_options_table[] = {
    {.name = "output",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(output),
     .help = "Where the checkpoint goes, with config and tokenizer; made when absent. Needed."},
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
         "sentences."},
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
