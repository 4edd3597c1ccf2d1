/* main.c - the binary's entry: finds the command and runs it. Nothing else in the project ends the process. */
#include "cli/cli.h"

#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

static const struct qtr_command commands[] = {
    {"generate", "complete one prompt or many at once", qtr_cmd_generate},
    {"chat", "talk with a model in the terminal", qtr_cmd_chat},
    {"serve", "answer over HTTP, as OpenAI's API does", qtr_cmd_serve},
    {"bench", "measure speed, on a model or on random weights of its shape", qtr_cmd_bench},
    {"eval", "measure quality: perplexity, comparison, long-context tests", qtr_cmd_eval},
    {"tokenize", "turn text into token ids", qtr_cmd_tokenize},
    {"info", "say what a model directory holds and what it will cost here", qtr_cmd_info},
    {"calibrate", "find the attention heads that need the whole text", qtr_cmd_calibrate},
    {"quantize", "make a QServe checkpoint from a Hugging Face model", qtr_cmd_quantize},
    {"convert", "import DeepCompressor, GPTQ, AWQ, QServe and float checkpoints", qtr_cmd_convert},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE *to) {
  (void)fprintf(to,
                "Usage: quattuor COMMAND [options]\n\n"
                "Serves large language models with 4-bit weights, 8-bit activations and a 4-bit KV cache.\n\n"
                "Commands:\n");
  for (int i = 0; i < N_COMMANDS; i++) (void)fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].about);
  (void)fprintf(to,
                "\nquattuor COMMAND --help explains a command; quattuor --version prints the version.\n"
                "Without --model a command uses $QUATTUOR_MODEL, else the demo model that comes with Quattuor.\n");
}

static int unknown_command(const char *name) {
  const char *names[N_COMMANDS];
  for (int i = 0; i < N_COMMANDS; i++) names[i] = commands[i].name;
  const char *near = qtr_nearest_word(name, names, N_COMMANDS);
  (void)fprintf(stderr, "quattuor: unknown command \"%.60s\"", name);
  if (near) (void)fprintf(stderr, "; did you mean %s?", near);
  (void)fprintf(stderr, " (quattuor --help lists the commands)\n");
  return QTR_EXIT_USAGE;
}

int main(int argc, char **argv) {
  (void)setlocale(LC_CTYPE, "");  /* line editing needs the terminal's encoding; numbers stay in the C locale */
  (void)signal(SIGPIPE, SIG_IGN); /* a closed pipe is a failed write, reported like any other */
  if (argc < 2) {
    print_usage(stderr);
    return QTR_EXIT_USAGE;
  }
  const char *name = argv[1];
  if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
    if (argc > 2 && name[0] == 'h') { /* quattuor help generate */
      for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[2], commands[i].name) == 0) return commands[i].run(2, (char *[]){argv[2], "--help", NULL});
      }
      return unknown_command(argv[2]);
    }
    print_usage(stdout);
    return qtr_finish_output("help") ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
  }
  if (strcmp(name, "--version") == 0) {
    printf("quattuor %s\n", qtr_version());
    return qtr_finish_output("version") ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
  }
  for (int i = 0; i < N_COMMANDS; i++) {
    if (strcmp(name, commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
  }
  return unknown_command(name);
}
