/* interrupt.c - Ctrl-C as a flag that the step loops look at, so that a request is cancelled instead of torn. The flag is
 * the one mutable global of the binary: a signal handler can reach nothing else. */
#include "cli/cli.h"

#include <signal.h>

static volatile sig_atomic_t caught;

static void on_interrupt(int number) {
  (void)number;
  caught = 1;
}

void qtr_interrupt_watch(void) {
  /* No SA_RESTART: a blocked read returns. SA_RESETHAND: a second Ctrl-C kills a program that does not come back. */
  struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
  (void)sigemptyset(&action.sa_mask);
  (void)sigaction(SIGINT, &action, NULL);
}

bool qtr_interrupted(void) { return caught != 0; }

void qtr_interrupt_clear(void) {
  caught = 0;
  qtr_interrupt_watch();
}
