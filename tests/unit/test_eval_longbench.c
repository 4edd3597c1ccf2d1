/* test_eval_longbench.c - the tasks against the files their authors publish, where those are; trimming; lines; files of
 * predictions. */
#include "base/file.h"
#include "eval/longbench.h"
#include "shared.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct qtr_string str(const char *s) { return (struct qtr_string){s, strlen(s)}; }

static void tasks_as_published(void **state) {
  (void)state;
  const char *path = qtr_test_shared("data/longbench/dataset2prompt.json");
  if (!path) skip();
  json_t *prompts = json_load_file(path, 0, NULL);
  json_t *lengths = json_load_file(qtr_test_shared("data/longbench/dataset2maxlen.json"), 0, NULL);
  assert_int_equal(json_object_size(prompts), QTR_LONGBENCH_N_TASKS);
  for (size_t i = 0; i < QTR_LONGBENCH_N_TASKS; i++) {
    const struct qtr_longbench_task *t = &qtr_longbench_tasks[i];
    assert_string_equal(t->prompt, json_string_value(json_object_get(prompts, t->name)));
    assert_int_equal(t->max_tokens, json_integer_value(json_object_get(lengths, t->name)));
  }
  json_decref(prompts);
  json_decref(lengths);
}

static void tasks_found(void **state) {
  (void)state;
  assert_ptr_equal(qtr_longbench_find("qasper"), &qtr_longbench_tasks[1]);
  assert_null(qtr_longbench_find("qaspe"));
  for (size_t i = 0; i < QTR_LONGBENCH_N_TASKS; i++) {
    const struct qtr_longbench_task *t = &qtr_longbench_tasks[i];
    assert_non_null(strstr(t->prompt, "{context}"));
    assert_ptr_equal(qtr_longbench_find(t->name), t);
  }
}

static void trimming(void **state) {
  (void)state;
  static const struct {
    const char *task, *answer, *counts, *extended; /* extended NULL: the answer itself */
  } cases[] = {
      {"qasper", " \n yes \n", "yes", NULL},
      {"qasper", "yes.assistant no", "yes", NULL},
      {"qasper", "yes\n\nQuestion: what", "yes", NULL},
      {"qasper", "(Document 1", "", NULL},
      {"qasper", "yes (Passage 2", "yes", NULL},
      {"qasper", "yes\n\nAnswer no<|eot_id|>", "yes", NULL},
      {"qasper", "yes<|eot_id|>no", "yes", NULL},
      {"qasper", "yes\nno", "yes\nno", NULL},
      {"trec", "\n\nDate\nQuestion", "Date", "Date"},
      {"samsum", " one</s>two\nthree", "one", " one</s>two"},
      {"multifieldqa_zh", "北京问题：上海", "北京", NULL},
      {"qasper", "北京问题：上海", "北京问题：上海", NULL},
      {"lsht", "体育新闻内容：x\ny", "体育", "体育新闻内容：x"},
      {"passage_retrieval_zh", "段落3请问提示", "段落3", NULL},
      {"lcc", "\n\nx = 1\n", "x = 1", NULL},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct qtr_longbench_task *t = qtr_longbench_find(cases[i].task);
    struct qtr_string kept = qtr_longbench_trim(t, str(cases[i].answer), false);
    assert_int_equal(kept.n, strlen(cases[i].counts));
    assert_memory_equal(kept.p, cases[i].counts, kept.n);
    kept = qtr_longbench_trim(t, str(cases[i].answer), true);
    const char *extended = cases[i].extended ? cases[i].extended : cases[i].answer;
    assert_int_equal(kept.n, strlen(extended));
    assert_memory_equal(kept.p, extended, kept.n);
  }
}

static void lines(void **state) {
  (void)state;
  static const char good[] =
      "{\"input\":\"i\",\"context\":\"c\",\"answers\":[\"a\",\"b\"],\"all_classes\":null,\"length\":5000,\"x\":1}";
  struct qtr_longbench_item item;
  struct qtr_error err;
  assert_int_equal(qtr_longbench_item_parse(good, sizeof good - 1, false, &item, &err), QTR_OK);
  assert_string_equal(item.input.p, "i");
  assert_string_equal(item.context.p, "c");
  assert_int_equal(json_array_size(item.answers), 2);
  assert_null(item.classes);
  assert_int_equal(item.length, 5000);
  qtr_longbench_item_free(&item);
  assert_int_equal(qtr_longbench_item_parse(good, sizeof good - 1, true, &item, &err), QTR_ERR_FORMAT);
  static const char *const bad[] = {"",
                                    "{",
                                    "[]",
                                    "{\"input\":1,\"context\":\"c\",\"answers\":[]}",
                                    "{\"input\":\"i\",\"context\":\"c\",\"answers\":\"a\"}",
                                    "{\"input\":\"i\",\"context\":\"c\",\"answers\":[1]}",
                                    "{\"input\":\"i\",\"context\":\"c\",\"answers\":[],\"all_classes\":[1]}",
                                    "{\"input\":\"i\",\"context\":\"c\",\"answers\":[],\"length\":\"5\"}",
                                    "{\"input\":\"i\",\"context\":\"c\"}"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(qtr_longbench_item_parse(bad[i], strlen(bad[i]), false, &item, &err), QTR_ERR_FORMAT);
  }
}

static void predictions(void **state) {
  (void)state;
  char dir[] = "/tmp/quattuor-longbench-XXXXXX", path[64];
  assert_non_null(mkdtemp(dir));
  static const char text[] =
      "{\"pred\":\"the cat\",\"answers\":[\"dog\",\"a cat\"],\"length\":100}\n\n"
      "{\"pred\":\"a dog\",\"answers\":[\"cat\"],\"length\":5000}\n"
      "{\"pred\":\"dog house\",\"answers\":[\"dog\"],\"length\":9000}\n";
  (void)snprintf(path, sizeof path, "%s/qasper.jsonl", dir);
  struct qtr_error err;
  assert_int_equal(qtr_file_write(path, text, sizeof text - 1, &err), QTR_OK);
  struct qtr_longbench_options options = {.dir = dir, .task = {qtr_longbench_find("qasper")}, .n_tasks = 1, .quiet = true};
  struct qtr_longbench_result r;
  assert_int_equal(qtr_longbench_run(NULL, &options, &r, &err), QTR_OK);
  assert_int_equal(r.n, 3);
  assert_true(fabs(r.score - 55.56) < 1e-9); /* (1 + 0 + 2/3) / 3 */
  assert_true(fabs(r.group_score[0] - 100) < 1e-9 && r.group_score[1] == 0 && fabs(r.group_score[2] - 66.67) < 1e-9);
  options.limit = 1;
  assert_int_equal(qtr_longbench_run(NULL, &options, &r, &err), QTR_OK);
  assert_int_equal(r.n, 1);
  assert_int_equal(qtr_file_write(path, "{\"pred\":1}\n", 11, &err), QTR_OK);
  assert_int_equal(qtr_longbench_run(NULL, &options, &r, &err), QTR_ERR_FORMAT);
  assert_non_null(strstr(err.message, "qasper.jsonl, line 1"));
  assert_int_equal(qtr_file_write(path, "\n", 1, &err), QTR_OK);
  assert_int_equal(qtr_longbench_run(NULL, &options, &r, &err), QTR_ERR_FORMAT);
  assert_int_equal(remove(path), 0);
  assert_int_equal(qtr_longbench_run(NULL, &options, &r, &err), QTR_ERR_NOT_FOUND);
  assert_int_equal(remove(dir), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(tasks_as_published), cmocka_unit_test(tasks_found),
                                     cmocka_unit_test(trimming), cmocka_unit_test(lines), cmocka_unit_test(predictions)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
