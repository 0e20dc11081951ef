/* A hash table with open addressing that doubles when it is two thirds full. */
#include "program.h"
#include <stdlib.h>
#include <string.h>

struct slot {
    char *key;
    int64_t value;
};

struct table {
    size_t slots, used;
    struct slot *slot;
};

static uint64_t hash(const char *key)
{
    uint64_t h = 14695981039346656037ull;
    for (; *key; key++)
        h = (h ^ (unsigned char)*key) * 1099511628211ull;
    return h;
}

struct table *table_new(size_t slots)
{
    struct table *table = malloc(sizeof *table);
    if (!table)
        return NULL;
    for (table->slots = 8; table->slots < slots; table->slots *= 2)
        ;
    table->used = 0;
    table->slot = calloc(table->slots, sizeof *table->slot);
    if (!table->slot) {
        free(table);
        return NULL;
    }
    return table;
}

static struct slot *find(const struct table *table, const char *key)
{
    size_t at = hash(key) & (table->slots - 1);
    while (table->slot[at].key && strcmp(table->slot[at].key, key))
        at = (at + 1) & (table->slots - 1);
    return &table->slot[at];
}

static int grow(struct table *table)
{
    struct table bigger = { table->slots * 2, table->used, calloc(table->slots * 2, sizeof *bigger.slot) };
    if (!bigger.slot)
        return -1;
    for (size_t at = 0; at < table->slots; at++)
        if (table->slot[at].key)
            *find(&bigger, table->slot[at].key) = table->slot[at];
    free(table->slot);
    *table = bigger;
    return 0;
}

int table_put(struct table *table, const char *key, int64_t value)
{
    if (table->used * 3 >= table->slots * 2 && grow(table))
        return -1;
    struct slot *slot = find(table, key);
    if (!slot->key) {
        if (!(slot->key = strdup(key)))
            return -1;
        table->used++;
    }
    slot->value = value;
    return 0;
}

int64_t table_get(const struct table *table, const char *key, int64_t otherwise)
{
    const struct slot *slot = find(table, key);
    return slot->key ? slot->value : otherwise;
}

size_t table_count(const struct table *table)
{
    return table->used;
}

void table_free(struct table *table)
{
    for (size_t at = 0; at < table->slots; at++)
        free(table->slot[at].key);
    free(table->slot);
    free(table);
}
