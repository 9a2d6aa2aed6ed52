/* A table of structures and constants, from which picogpt/kernels/layout.py sees whether Python has the same ones. */

#include <stddef.h>

/* A field's place in a structure, or the size of a structure, or the value of a constant. */
struct layout_entry {
    const char *name;
    int64_t offset, size;
};

#define STRUCTURE(s) {#s, 0, sizeof(struct s)}
#define FIELD(s, field) {#s "." #field, offsetof(struct s, field), sizeof(((struct s *)0)->field)}
#define CONSTANT(name) {#name, name, 0}
