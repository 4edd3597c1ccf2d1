/* driver.c - runs a fuzz target over files and folders given on the command line, where there is no libFuzzer. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int run_file(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) return 1;
  uint8_t *data = malloc(1 << 20);
  size_t n = data ? fread(data, 1, 1 << 20, f) : 0;
  (void)fclose(f);
  (void)LLVMFuzzerTestOneInput(data, n);
  free(data);
  return 0;
}

int main(int argc, char **argv) {
  int n_failed = 0, n_run = 0;
  for (int i = 1; i < argc; i++) {
    struct stat st;
    if (stat(argv[i], &st) != 0) return 1;
    if (!S_ISDIR(st.st_mode)) {
      n_failed += run_file(argv[i]);
      n_run++;
      continue;
    }
    DIR *dir = opendir(argv[i]);
    if (!dir) return 1;
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL) {
      if (entry->d_name[0] == '.') continue;
      char path[4096];
      int len = snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
      if (len < 0 || (size_t)len >= sizeof path) continue;
      n_failed += run_file(path);
      n_run++;
    }
    (void)closedir(dir);
  }
  printf("%d inputs\n", n_run);
  return n_failed != 0 || n_run == 0;
}
