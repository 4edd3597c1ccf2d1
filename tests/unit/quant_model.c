/* quant_model.c - writes a random model with the demo model's tokenizer, for tests and measurements that must run in a
 * user's clone: quant_model DIR [untied], a small one, F32; quant_model DIR CONFIG LAYERS, a BF16 one of the shape in a
 * config.json (shapes/ has some) but for the number of layers and the vocabulary, which is the tokenizer's. */
#include "quant_fixture.h"

#include "checkpoint/config.h"

#include <jansson.h>

/* CONFIG with what is changed of it, as DIR/config.json. */
static bool write_config(const char *config, const char *dir, int n_layers) {
  json_t *root = json_load_file(config, 0, NULL);
  char *path = qtr_path_join(dir, "config.json");
  bool ok = root && path &&
            json_object_update_new(
                root, json_pack("{s:i, s:i, s:i, s:i, s:s}", "num_hidden_layers", n_layers, "vocab_size", (int)FIXTURE_VOCAB,
                                "bos_token_id", 0, "eos_token_id", 1, "torch_dtype", "bfloat16")) == 0 &&
            json_dump_file(root, path, JSON_INDENT(2)) == 0;
  free(path);
  json_decref(root);
  return ok;
}

static bool write_shape(const char *config, const char *dir, int n_layers) {
  struct qtr_config c;
  if (n_layers < 1 || !write_config(config, dir, n_layers) || qtr_config_read(dir, &c, NULL) != QTR_OK) return false;
  const struct fixture_shape shape = {.hidden = (size_t)c.hidden_size,
                                      .inner = (size_t)c.intermediate_size,
                                      .n_layers = (size_t)c.n_layers,
                                      .n_heads = (size_t)c.n_heads,
                                      .n_kv_heads = (size_t)c.n_kv_heads,
                                      .head_dim = (size_t)c.head_dim,
                                      .tied = c.tie_word_embeddings,
                                      .qkv_bias = c.qkv_bias,
                                      .bf16 = true,
                                      .seed = 21};
  return fixture_write_tokenizer(dir) && fixture_write_tensors(&shape, dir);
}

int main(int argc, char **argv) {
  struct fixture_shape small = {
      .hidden = 128, .inner = 256, .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .tied = true, .seed = 21};
  if (argc < 2 || argc > 4 || (argc == 3 && strcmp(argv[2], "untied") != 0)) {
    (void)fprintf(stderr, "usage: quant_model DIR [untied]\n       quant_model DIR CONFIG LAYERS\n");
    return 2;
  }
  small.tied = argc < 3;
  bool ok = argc == 4 ? write_shape(argv[2], argv[1], atoi(argv[3])) : fixture_write_model(&small, argv[1]);
  if (!ok) (void)fprintf(stderr, "quant_model: cannot write %s\n", argv[1]);
  return ok ? 0 : 1;
}
