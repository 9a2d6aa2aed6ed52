/* A table of structures and constants, from which picogpt/kernels/layout.py checks that Python declares
   the same ones. A field in another place would be a write to foreign memory, which no test is sure to
   notice. */

#include <stddef.h>

/* One entry: a field ("struct.field", its offset and size), a structure (its size), or a constant (its
   value as the offset). */
struct layout_entry {
    const char *name;
    int64_t offset, size;
};

#define STRUCTURE(s) {#s, 0, sizeof(struct s)}
#define FIELD(s, field) {#s "." #field, offsetof(struct s, field), sizeof(((struct s *)0)->field)}
#define CONSTANT(name) {#name, name, 0}
