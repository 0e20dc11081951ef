/* The parts of a small program whose compilation is the work. */
#include <stddef.h>
#include <stdint.h>

struct table;

struct table *table_new(size_t slots);
int table_put(struct table *table, const char *key, int64_t value);
int64_t table_get(const struct table *table, const char *key, int64_t otherwise);
size_t table_count(const struct table *table);
void table_free(struct table *table);

/* Value of an arithmetic expression over names in `names`; *error is set if there is none. */
int64_t evaluate(const char *text, const struct table *names, const char **error);

void sort_numbers(int64_t *numbers, size_t count);
uint32_t checksum(const void *bytes, size_t length);
