/* schema.h - JSON Schema to a grammar of JSON texts. What the grammar lets through always fits the schema; it need not let
 * through all that fits: members come in the schema's order, and none that "properties" does not name. A keyword that the
 * grammar cannot keep is an error that names it, never left out. */
#ifndef QTR_SERVER_SCHEMA_H
#define QTR_SERVER_SCHEMA_H

#include "server/grammar.h"
#include "server/request_parse.h"

/* Known: type, properties, required, additionalProperties, items, prefixItems, minItems, maxItems, minLength, maxLength,
 * pattern, format (date, time, date-time, uuid, ipv4, hostname, email; others mean nothing), minimum, maximum and their
 * exclusive forms, multipleOf of integers, enum, const, anyOf, oneOf of parts that are apart, allOf, $ref ("#", "#/…").
 * schema NULL: any object. On false err says why, with `param`. */
bool qtr_grammar_from_schema(const json_t *schema, const char *param, struct qtr_grammar **g, struct qtr_api_error *err);

/* A call of one of the tools (name NULL: any), as the model's format writes it: {"name": …, "<arguments>": {…}} between
 * `before` and `after`. */
bool qtr_grammar_for_tools(const json_t *tools, const char *name, const char *arguments, const char *before,
                           const char *after, struct qtr_grammar **g, struct qtr_api_error *err);

#endif
