/* quant_model.c - writes a small random model with the demo model's tokenizer, for end-to-end tests that must run in a
 * user's clone: quant_model DIR [untied]. */
#include "quant_fixture.h"

int main(int argc, char **argv) {
  struct fixture_shape shape = {
      .hidden = 128, .inner = 256, .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .tied = true, .seed = 21};
  if (argc < 2) {
    (void)fprintf(stderr, "usage: quant_model DIR [untied]\n");
    return 2;
  }
  shape.tied = argc < 3;
  return fixture_write_model(&shape, argv[1]) ? 0 : 1;
}
