/* Recursive descent over + - * / % ( ) numbers and names. */
#include "program.h"
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

struct input {
    const char *at;
    const struct table *names;
    const char **error;
};

static int64_t sum(struct input *input);

static void skip(struct input *input)
{
    while (isspace((unsigned char)*input->at))
        input->at++;
}

static int take(struct input *input, char wanted)
{
    skip(input);
    if (*input->at != wanted)
        return 0;
    input->at++;
    return 1;
}

static int64_t fail(struct input *input, const char *why)
{
    if (!*input->error)
        *input->error = why;
    return 0;
}

static int64_t atom(struct input *input)
{
    if (take(input, '-'))
        return -atom(input);
    if (take(input, '(')) {
        int64_t value = sum(input);
        return take(input, ')') ? value : fail(input, "no closing parenthesis");
    }
    if (isdigit((unsigned char)*input->at)) {
        char *end;
        int64_t value = strtoll(input->at, &end, 10);
        input->at = end;
        return value;
    }
    if (isalpha((unsigned char)*input->at)) {
        char name[64];
        size_t length = 0;
        while (isalnum((unsigned char)*input->at)) {
            if (length + 1 < sizeof name)
                name[length++] = *input->at;
            input->at++;
        }
        name[length] = 0;
        return table_get(input->names, name, 0);
    }
    return fail(input, "a number, a name or a parenthesis is missing");
}

static int64_t product(struct input *input)
{
    int64_t value = atom(input);
    for (;;) {
        if (take(input, '*')) {
            value = (int64_t)((uint64_t)value * (uint64_t)atom(input));
        } else if (take(input, '/')) {
            int64_t by = atom(input);
            value = by ? value / by : fail(input, "division by zero");
        } else if (take(input, '%')) {
            int64_t by = atom(input);
            value = by ? value % by : fail(input, "division by zero");
        } else {
            return value;
        }
    }
}

static int64_t sum(struct input *input)
{
    int64_t value = product(input);
    for (;;) {
        if (take(input, '+'))
            value += product(input);
        else if (take(input, '-'))
            value -= product(input);
        else
            return value;
    }
}

int64_t evaluate(const char *text, const struct table *names, const char **error)
{
    struct input input = { text, names, error };
    *error = NULL;
    int64_t value = sum(&input);
    skip(&input);
    return *input.at ? fail(&input, "something is left over") : value;
}
