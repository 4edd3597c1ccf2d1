/* registry.c - backends by name (backend.h). */
#include "backend/backend.h"
#include "base/status.h"

#include <string.h>

static const struct qtr_backend_ops *const backends[] = {
#ifdef QTR_HAVE_CUDA
    &qtr_backend_cuda,
#endif
    &qtr_backend_cpu, &qtr_backend_reference};

enum qtr_status qtr_backend_open(const char *name, const struct qtr_backend_options *options, struct qtr_backend **backend,
                                 struct qtr_error *err) {
  static const struct qtr_backend_options defaults;
  if (!options) options = &defaults;
  if (!name || strcmp(name, "auto") == 0) {
    name = "cpu";
#ifdef QTR_HAVE_CUDA
    /* A GPU when there is a usable one. One that was asked for by its number, or is there and fails, is an error. */
    enum qtr_status status = qtr_backend_cuda.open(options, backend, err);
    if (status != QTR_ERR_UNSUPPORTED || options->gpu > 0) return status;
#endif
  }
#ifndef QTR_HAVE_CUDA
  if (strcmp(name, "cuda") == 0) {
    return qtr_fail(
        err, QTR_ERR_NOT_FOUND,
        "this build has no CUDA: install the CUDA toolkit and build again (README, \"GPU\"), or use --device cpu");
  }
#endif
  for (size_t i = 0; i < sizeof backends / sizeof backends[0]; i++) {
    if (strcmp(name, backends[i]->name) == 0) return backends[i]->open(options, backend, err);
  }
  return qtr_fail(err, QTR_ERR_NOT_FOUND, "no device \"%.40s\"; choose auto, cpu, cuda or reference", name);
}

void qtr_backend_close(struct qtr_backend *b) {
  if (b) b->ops->close(b);
}
