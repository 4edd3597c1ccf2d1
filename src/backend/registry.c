/* registry.c - backends by name (backend.h). */
#include "backend/backend.h"
#include "base/status.h"

#include <string.h>

static const struct qtr_backend_ops *const backends[] = {&qtr_backend_cpu, &qtr_backend_reference};

enum qtr_status qtr_backend_open(const char *name, const struct qtr_backend_options *options, struct qtr_backend **backend,
                                 struct qtr_error *err) {
  if (!name || strcmp(name, "auto") == 0) name = "cpu";
  for (size_t i = 0; i < sizeof backends / sizeof backends[0]; i++) {
    if (strcmp(name, backends[i]->name) == 0) return backends[i]->open(options, backend, err);
  }
  return qtr_fail(err, QTR_ERR_NOT_FOUND, "no device \"%.40s\" in this build; choose auto, cpu or reference", name);
}

void qtr_backend_close(struct qtr_backend *b) {
  if (b) b->ops->close(b);
}
