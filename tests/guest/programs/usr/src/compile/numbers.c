/* Sorting and a checksum. */
#include "program.h"
#include <string.h>

static void sift(int64_t *numbers, size_t root, size_t count)
{
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= count)
            return;
        if (child + 1 < count && numbers[child] < numbers[child + 1])
            child++;
        if (numbers[root] >= numbers[child])
            return;
        int64_t kept = numbers[root];
        numbers[root] = numbers[child];
        numbers[child] = kept;
        root = child;
    }
}

void sort_numbers(int64_t *numbers, size_t count)
{
    for (size_t root = count / 2; root-- > 0;)
        sift(numbers, root, count);
    for (size_t end = count; end-- > 1;) {
        int64_t kept = numbers[0];
        numbers[0] = numbers[end];
        numbers[end] = kept;
        sift(numbers, 0, end);
    }
}

uint32_t checksum(const void *bytes, size_t length)
{
    const unsigned char *at = bytes;
    uint32_t crc = ~0u;
    for (size_t i = 0; i < length; i++) {
        crc ^= at[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}
