/* cli.h - what the commands share: exit codes, the option groups of model and sampling, output, interruption.
 *
 * Results go to stdout, everything else to stderr. Only main() ends the process. */
#ifndef QTR_CLI_CLI_H
#define QTR_CLI_CLI_H

#include "cli/options.h"
#include "quattuor/quattuor.h"

#include <jansson.h>

enum { QTR_EXIT_OK = 0, QTR_EXIT_FAILURE = 1, QTR_EXIT_USAGE = 2, QTR_EXIT_INTERRUPTED = 130 };

struct qtr_command {
  const char *name, *about;
  int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns an exit code */
};
int qtr_cmd_generate(int argc, char **argv);
int qtr_cmd_chat(int argc, char **argv);
int qtr_cmd_serve(int argc, char **argv);
int qtr_cmd_bench(int argc, char **argv);
int qtr_cmd_eval(int argc, char **argv);
int qtr_cmd_tokenize(int argc, char **argv);
int qtr_cmd_info(int argc, char **argv);
int qtr_cmd_calibrate(int argc, char **argv);
int qtr_cmd_quantize(int argc, char **argv);
int qtr_cmd_convert(int argc, char **argv);

/* ---- option groups (groups.c) --------------------------------------------------------------------- */

struct qtr_model_flags {
  const char *model, *device, *precision, *norm, *kv_scales, *kv_quant_params_path, *kv_fp8;
  int32_t threads, gpu, group_size, kv_pages, max_num_seqs, max_num_batched_tokens, max_model_len;
  size_t kv_bytes;
  bool no_prefix_cache;
  struct qtr_sparse_options sparse;
  const char *sparse_decode_mode, *sub_chunks, *selector_heads; /* choices */
};
extern const struct qtr_option qtr_model_options_table[];  /* all of struct qtr_model_flags */
extern const struct qtr_option qtr_device_options_table[]; /* model, device, threads, precision, norm, kv-scales,
                                                              kv-quant-params-path, kv-fp8, group-size */
void qtr_model_flags_init(struct qtr_model_flags *flags);

/* The model directory: what --model says, else $QUATTUOR_MODEL, else the demo model shipped with this binary. *dir is
 * malloc'ed. */
enum qtr_status qtr_find_model(const char *given, char **dir, struct qtr_error *err);

/* Engine options from flags. Strings are borrowed. */
void qtr_engine_options_from_flags(const struct qtr_model_flags *flags, const char *dir, struct qtr_engine_options *options);
/* Finds the model and opens the engine. */
enum qtr_status qtr_open_engine(const struct qtr_model_flags *flags, struct qtr_engine **engine, struct qtr_error *err);
/* A positive whole number from the environment, 0 when the variable is absent or empty. */
enum qtr_status qtr_env_int(const char *name, int32_t *value, struct qtr_error *err);

/* ---- shared by some commands (shared_options.c) -------------------------------------------------- */

/* --threads, for tables of their own. */
#define QTR_THREADS_OPTION(at)                                                                         \
  {                                                                                                    \
    .name = "threads", .argument = "N", .kind = QTR_OPTION_INT, .offset = (at), .min = 1, .max = 1024, \
    .help = "CPU threads. Default: all cores this process may use."                                    \
  }
/* --device, too. */
#define QTR_DEVICE_CHOICES "auto|cpu|cuda|reference"
/* What a checkpoint can be written as. */
#define QTR_PRECISION_CHOICES "w4a8kv4|w4a8kv8|w4a8|w8a8kv4|w8a8kv8|w8a8|w16a16kv4|w16a16kv8|w16a16"

struct qtr_checkpoint_flags { /* of a command that writes one */
  const char *output, *kv_scales;
  int32_t group_size, threads;
  bool overwrite;
};
extern const struct qtr_option qtr_checkpoint_options_table[];
/* Whether --model and --output are there and --group-size is one of both; else says what is wrong. */
bool qtr_checkpoint_flags_good(const char *command, const char *model, const struct qtr_checkpoint_flags *flags);

struct qtr_haystack_flags { /* the texts of generated questions */
  const char *haystack, *lengths;
  uint64_t seed;
  bool has_seed;
};
extern const struct qtr_option qtr_haystack_options_table[];

struct qtr_answer_flags { /* how they are asked, and where the answers go */
  const char *prompt, *svg, *png, *answers;
};
extern const struct qtr_option qtr_answer_options_table[];

extern const struct qtr_option qtr_text_option[];  /* base: a const char * */
extern const struct qtr_option qtr_model_option[]; /* base: a const char * (groups.c) */

struct qtr_sampling_flags {
  struct qtr_sampling sampling;
  int32_t max_tokens, logprobs, n;
  struct qtr_option_list stop, stop_token;
  int32_t *stop_ids; /* parsed stop_token */
  bool ignore_eos;
};
extern const struct qtr_option qtr_sampling_options_table[]; /* all of struct qtr_sampling_flags */
void qtr_sampling_flags_init(struct qtr_sampling_flags *flags);
/* Sets the sampling part of a request; strings are borrowed from argv. */
enum qtr_status qtr_request_from_flags(struct qtr_sampling_flags *flags, struct qtr_request_options *request,
                                       struct qtr_error *err);
void qtr_sampling_flags_free(struct qtr_sampling_flags *flags);

/* ---- output (output.c) ---------------------------------------------------------------------------- */

/* Writes one object and a newline to stdout, flushed. Takes the reference, NULL fails. False after a message on stderr. */
bool qtr_print_json(const char *command, json_t *object);
/* Flushes stdout; false after a message when something could not be written (a full disk, a closed pipe). */
bool qtr_finish_output(const char *command);
/* Writes generated text to stdout; on a terminal control characters become '?', so that no model can drive the terminal. */
void qtr_print_text(const char *text, size_t len);
/* "quattuor <command>: <message>" on stderr; returns QTR_EXIT_FAILURE. */
int qtr_report(const char *command, const struct qtr_error *err);
/* x rounded to `digits` significant digits, so that JSON does not show 17 of them. */
json_t *qtr_json_number(double x, int digits);
/* "1.5 GiB" in out. */
const char *qtr_show_bytes(size_t n_bytes, char out[32]);
size_t qtr_peak_rss(void); /* bytes this process has had resident at most */
bool qtr_stdin_read(size_t max_bytes, char **data, size_t *len, struct qtr_error *err);

/* ---- interruption (interrupt.c) ------------------------------------------------------------------- */

/* From now on Ctrl-C only sets a flag; a second one before qtr_interrupt_clear ends the process as usual. */
void qtr_interrupt_watch(void);
bool qtr_interrupted(void);
void qtr_interrupt_clear(void);

/* ---- the chat template with messages built here (messages.c) -------------------------------------- */

/* Appends {"role": role, "content": content}. Invalid UTF-8 is QTR_ERR_ARGUMENT. */
enum qtr_status qtr_messages_add(json_t *messages, const char *role, const char *content, size_t len, struct qtr_error *err);
/* The template over `messages` (and tools, may be NULL), ending in the assistant's turn. */
enum qtr_status qtr_messages_render(struct qtr_engine *engine, const json_t *messages, const json_t *tools, char **prompt,
                                    struct qtr_error *err);

#endif
