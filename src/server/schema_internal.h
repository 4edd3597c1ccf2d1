/* schema_internal.h - what the files that compile JSON Schemas share: the builder, JSON texts as rules (schema_text.c), and
 * schemas as data, before anything is compiled (schema_merge.c). */
#ifndef QTR_SERVER_SCHEMA_INTERNAL_H
#define QTR_SERVER_SCHEMA_INTERNAL_H

#include "server/schema.h"

#define QTR_SCHEMA_DEPTH 64   /* of nested schemas */
#define QTR_SCHEMA_MOST 65536 /* compiled or merged in one go: anyOf in $ref in anyOf … */
#define QTR_SCHEMA_BAD_REFERENCE "must point into the schema, as \"#/$defs/name\" does"

struct qtr_schema_reference {
  const json_t *target;
  int32_t rule;
};

struct qtr_schema_build {
  struct qtr_grammar *g;
  const json_t *root;
  const char *param;
  struct qtr_api_error *err;
  int32_t space, string, character, integer, number, value; /* rules made once */
  struct qtr_schema_reference *reference; /* (n_references) compiled or being compiled: schemas may refer to themselves */
  size_t n_references;
  int n_schemas;
};

/* Says that a keyword cannot be kept, and why. False. */
bool qtr_schema_refuse(struct qtr_schema_build *b, const char *what, const char *why);

/* ---- schema_text.c ---- */
/* The rules named in the builder; `value`: any JSON value. Rule 0, the start, must exist already. */
void qtr_schema_make_basics(struct qtr_schema_build *b);
/* A text that holds JSON punctuation, then space. */
void qtr_schema_put_mark(struct qtr_schema_build *b, const char *mark);
void qtr_schema_add_choice(struct qtr_schema_build *b, int32_t rule, int32_t choice); /* one alternative more: a rule */
int32_t qtr_schema_string_rule(struct qtr_schema_build *b, int32_t min,
                               int32_t max); /* of so many characters; max -1: any */
/* open item (, item)* close, or empty. `key`: what stands before each item, -1 = nothing. */
int32_t qtr_schema_list_rule(struct qtr_schema_build *b, const char *open, const char *close, int32_t key, int32_t item,
                             int32_t min, int32_t max);

/* ---- schema_merge.c ---- */
/* The pattern of a format that is more than a remark; NULL: it is none. */
const char *qtr_schema_format_pattern(const char *format);
/* A keyword that restricts besides `a` and `b` (NULL: none); NULL when there is no other. */
const char *qtr_schema_other_restriction(const json_t *schema, const char *a, const char *b);
/* Sets of types as bits: what "type" allows (absent: all), and what a value is. */
int qtr_schema_type_bits(const json_t *type);
int qtr_schema_value_bits(const json_t *value);
bool qtr_schema_requires(const json_t *schema, const char *name);
/* "#" or "#/a/b": a path of members, or of indices in arrays, with ~0 and ~1 for ~ and /. NULL: it leads nowhere. */
const json_t *qtr_schema_resolve(const json_t *root, const char *path);
/* One schema that says what all parts of an allOf and the schema itself say. A new reference; NULL: err says why not. */
json_t *qtr_schema_merge(struct qtr_schema_build *b, const json_t *schema, int depth);
/* The same of the schema without `keyword`, and of `part`. */
json_t *qtr_schema_merge_with(struct qtr_schema_build *b, const json_t *schema, const char *keyword, const json_t *part,
                              int depth);
/* The same of a schema with a $ref beside other keywords, or an allOf. */
json_t *qtr_schema_expand(struct qtr_schema_build *b, const json_t *part, int depth);
/* Certainly no value fits two schemas of the list. */
bool qtr_schema_all_apart(const struct qtr_schema_build *b, const json_t *list);

#endif
