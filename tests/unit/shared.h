/* shared.h - tests that need data from outside the repository look here; it is absent in a user's clone, and the test then
 * skips and says so. QUATTUOR_SHARED overrides the place. */
#ifndef QTR_TESTS_SHARED_H
#define QTR_TESTS_SHARED_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Path of a shared file in a static buffer, or NULL (and a line on stderr) when it is not there. */
static inline const char *qtr_test_shared(const char *name) {
  static char path[4096];
  const char *dir = getenv("QUATTUOR_SHARED");
  (void)snprintf(path, sizeof path, "%s/%s", dir ? dir : QTR_SHARED_DIR, name);
  if (access(path, R_OK) == 0) return path;
  (void)fprintf(stderr, "skipped: no %s here (data that is not part of the repository)\n", name);
  return NULL;
}

#endif
