/* Runs each part once and checks what it gives. */
#include "program.h"
#include <stdio.h>
#include <stdlib.h>

static int failures;

static void expect(const char *what, int64_t is, int64_t should)
{
    if (is != should) {
        printf("%s: %lld, not %lld\n", what, (long long)is, (long long)should);
        failures++;
    }
}

int main(void)
{
    struct table *names = table_new(0);
    if (!names)
        return 1;
    for (int number = 0; number < 2000; number++) {
        char name[32];
        snprintf(name, sizeof name, "n%d", number);
        if (table_put(names, name, number))
            return 1;
    }
    expect("names", (int64_t)table_count(names), 2000);
    const char *error;
    expect("expression", evaluate("(n7 + 3) * -n10 - 100 / (n5 - 1) % 4", names, &error), -101);
    expect("what there is", evaluate("1 + ", names, &error), 1);
    expect("reason", error != NULL, 1);

    static int64_t numbers[5000];
    uint64_t state = 1;
    for (size_t at = 0; at < 5000; at++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        numbers[at] = (int64_t)(state >> 33);
    }
    sort_numbers(numbers, 5000);
    for (size_t at = 1; at < 5000; at++)
        expect("order", numbers[at - 1] <= numbers[at], 1);
    expect("checksum", checksum("123456789", 9), 0xcbf43926);
    table_free(names);
    puts(failures ? "program: wrong" : "program: right");
    return failures != 0;
}
