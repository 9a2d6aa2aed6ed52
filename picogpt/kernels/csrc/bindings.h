/* The structures that Python fills in and hands to block.c.

   picogpt/kernels/bindings.py has the same ones, with the same names in the same order; `layout` lets it
   compare every offset and size when it loads the library, so that neither side can be changed alone.
   Dimensions: R = sequences x slots rows of one window, C = WIDTH, H = heads, T = threads; a slot is one
   position of a window. Buffers are row-major; `elem` and `packed_elem` are as in simd.h and gemm.h. */

#include "layout.h"

/* Weights of one block. A matrix is packed twice: for the forward pass, and untransposed for the
   backward pass. */
struct layer_weights {
    const float *ln1_weight, *ln1_bias;  /* (C) */
    const packed_elem *attn, *attn_back; /* (3C, C), packed */
    const float *attn_bias;              /* (3C) */
    const packed_elem *proj, *proj_back; /* (C, C) */
    const float *proj_bias;              /* (C) */
    const float *ln2_weight, *ln2_bias;  /* (C) */
    const packed_elem *fc, *fc_back;     /* (4C, C) */
    const float *fc_bias;                /* (4C) */
    const packed_elem *out, *out_back;   /* (C, 4C) */
    const float *out_bias;               /* (C) */
};

/* Activations of one block for one window. The forward pass writes them; if weight gradients are
   deferred, the backward pass overwrites those that it has read for the last time with gradients. All
   but the last four may be shared by several blocks and windows, where they are not saved. */
struct activations {
    float *x;             /* (R, C) the block's input: `embed` writes the first block's, each block the next one's */
    float *ln1_stats;     /* (2, R) mean of each row, and 1 / its standard deviation */
    elem *ln1_out;        /* (R, C) written by the backward pass: right operand of the gradient of attn */
    elem *qkv;            /* (R, 3C) q, k, v; then their gradient, if weight gradients are deferred */
    elem *att_out;        /* (R, C) outputs of the heads, side by side */
    float *softmax_stats; /* (2, sequences, H, slots) row max, and 1 / softmax denominator */
    float *resid_mid;     /* (R, C) x + attention: input of the second LayerNorm */
    float *ln2_stats;     /* (2, R) */
    elem *ln2_out;        /* (R, C) like ln1_out, for fc */
    elem *fc;             /* (R, 4C) input of GELU; then its gradient, if weight gradients are deferred */
    elem *fc_gelu;        /* (R, 4C) like ln1_out, for out */
    elem *d_mlp_out;      /* (R, C) gradient of the MLP's output */
    elem *d_attn_out;     /* (R, C) gradient of attention's output */
    elem *qkv_scratch;    /* (R, 3C) scratch of the whole pass, in the cache: read right after it is written */
    elem *fc_scratch;     /* (R, 4C) */
    elem *ln_scratch;     /* (R, C) */
    elem *branch;         /* (R, C) output of attention or the MLP, before it is added to the residual path */
};

/* Gradients of one block's weights. The backward pass writes those of matrices, and adds to those of
   vectors. Vectors have a row for each thread, or for each sequence, so that sums do not depend on timing;
   Python adds the rows up. */
struct param_grads {
    float *ln1;       /* (T, 3, C) of ln1_weight, ln1_bias, and the bias of the GEMM before ln1 */
    float *attn;      /* (3C, C) */
    float *attn_bias; /* (sequences, 3C) */
    float *proj;      /* (C, C) */
    float *ln2;       /* (T, 3, C) of ln2_weight, ln2_bias and proj_bias */
    float *fc;        /* (4C, C) */
    float *fc_bias;   /* (T, 4C) */
    float *out;       /* (C, 4C) */
};

/* How much the forward pass saves for the backward pass. */
enum save {
    SAVE_NOTHING,     /* no backward pass follows */
    SAVE_INPUTS,      /* each block's x; the rest is recomputed (gradient checkpointing) */
    SAVE_ACTIVATIONS, /* all activations that it reads */
};

/* When weight gradients are computed. */
enum weight_grads {
    GRADS_PER_WINDOW, /* after each block of each window, added up */
    GRADS_DEFERRED,   /* by `weight_grad`, for all windows at once: their inputs are saved until then */
};

/* A batch, window by window through the model without its head. Behind the blocks
   there is an entry for the final LayerNorm, which is the ln1 of a block that does not exist: of its
   activations only x, ln1_stats and the scratch buffers are used. */
struct batch {
    const struct layer_weights *weights;   /* (layers + 1) */
    const struct activations *activations; /* (windows, layers + 1) */
    const float *wte, *wpe;                /* (V, C) embeddings of characters, and (max S, C) of positions */
    const int64_t *ids;                    /* (sequences, chars) */
    const int32_t *slots;                  /* (windows) slots of each window: the context slot and its characters */
    elem *hidden;                          /* (sequences, chars, C) written: final hidden states of all characters */
    float *residual;                       /* (max R, C) scratch: the residual stream; its gradient in the backward pass */
    float *context;                        /* (sequences, C) zeros: context vector of the next window, or its gradient */
    int32_t layers, sequences, windows, chars, threads;
    int32_t save; /* enum save */
};

/* Outputs of the backward pass, and its workspace. */
struct batch_grads {
    const struct param_grads *params; /* (layers + 1) */
    float *wte, *wpe;                 /* gradients of the embeddings, added to */
    const elem *hidden;               /* (sequences, chars, C) gradient of the final hidden states */
    packed_elem *workspace;           /* packed_elems, as many as `workspace_elems` says */
    int32_t weight_grads;             /* enum weight_grads */
};

/* The gradient of one matrix, sums = left^T right: left is the gradient of the GEMM's output, right its
   input. */
struct matrix_grad {
    float *sums;       /* (outputs, inputs), written */
    const elem *left;  /* (rows, outputs) */
    const elem *right; /* (rows, inputs) */
    int32_t outputs, inputs, rows, threads;
};

/* A matrix that Muon updates, with the state of its optimizer. */
struct muon_matrix {
    float *weights;        /* (rows, columns), updated */
    const float *gradient; /* (rows, columns) */
    const float *momentum; /* (rows, columns) running mean of the gradient */
    /* (longer side) running mean square of each row of the update, or each column if there are more;
       updated */
    float *mean_square;
};

/* Settings of an update, and the shape of all its matrices. */
struct muon_settings {
    const float *polynomials;  /* (n, 3) coefficients of the Newton-Schulz iterations */
    const int32_t *gram_reuse; /* (groups) iterations that share a Gram matrix; a 0 ends the list */
    float momentum, beta2;     /* decay of the running mean, and of the mean squares */
    float decay, step;         /* factor of the weights (weight decay), and step size */
    float margin;              /* safety factor: keeps the singular values below 1 after rounding */
    int32_t rows, columns;     /* one of them is WIDTH, the other WIDTH or 4 WIDTH */
    int32_t matrices, threads;
};

/* All of the above, ended by an entry without a name. */
const struct layout_entry *layout(void) {
    static const struct layout_entry entries[] = {
        /* A structure begins a line. */
        /* clang-format off */
        STRUCTURE(layer_weights), FIELD(layer_weights, ln1_weight), FIELD(layer_weights, ln1_bias), FIELD(layer_weights, attn),
        FIELD(layer_weights, attn_back), FIELD(layer_weights, attn_bias), FIELD(layer_weights, proj),
        FIELD(layer_weights, proj_back), FIELD(layer_weights, proj_bias), FIELD(layer_weights, ln2_weight),
        FIELD(layer_weights, ln2_bias), FIELD(layer_weights, fc), FIELD(layer_weights, fc_back), FIELD(layer_weights, fc_bias),
        FIELD(layer_weights, out), FIELD(layer_weights, out_back), FIELD(layer_weights, out_bias),
        STRUCTURE(activations), FIELD(activations, x), FIELD(activations, ln1_stats), FIELD(activations, ln1_out),
        FIELD(activations, qkv), FIELD(activations, att_out), FIELD(activations, softmax_stats), FIELD(activations, resid_mid),
        FIELD(activations, ln2_stats), FIELD(activations, ln2_out), FIELD(activations, fc), FIELD(activations, fc_gelu),
        FIELD(activations, d_mlp_out), FIELD(activations, d_attn_out), FIELD(activations, qkv_scratch),
        FIELD(activations, fc_scratch), FIELD(activations, ln_scratch), FIELD(activations, branch),
        STRUCTURE(param_grads), FIELD(param_grads, ln1), FIELD(param_grads, attn), FIELD(param_grads, attn_bias),
        FIELD(param_grads, proj), FIELD(param_grads, ln2), FIELD(param_grads, fc), FIELD(param_grads, fc_bias),
        FIELD(param_grads, out),
        STRUCTURE(batch), FIELD(batch, weights), FIELD(batch, activations), FIELD(batch, wte), FIELD(batch, wpe), FIELD(batch, ids),
        FIELD(batch, slots), FIELD(batch, hidden), FIELD(batch, residual), FIELD(batch, context), FIELD(batch, layers),
        FIELD(batch, sequences), FIELD(batch, windows), FIELD(batch, chars), FIELD(batch, threads), FIELD(batch, save),
        STRUCTURE(batch_grads), FIELD(batch_grads, params), FIELD(batch_grads, wte), FIELD(batch_grads, wpe),
        FIELD(batch_grads, hidden), FIELD(batch_grads, workspace), FIELD(batch_grads, weight_grads),
        STRUCTURE(matrix_grad), FIELD(matrix_grad, sums), FIELD(matrix_grad, left), FIELD(matrix_grad, right),
        FIELD(matrix_grad, outputs), FIELD(matrix_grad, inputs), FIELD(matrix_grad, rows), FIELD(matrix_grad, threads),
        STRUCTURE(muon_matrix), FIELD(muon_matrix, weights), FIELD(muon_matrix, gradient), FIELD(muon_matrix, momentum),
        FIELD(muon_matrix, mean_square),
        STRUCTURE(muon_settings), FIELD(muon_settings, polynomials), FIELD(muon_settings, gram_reuse),
        FIELD(muon_settings, momentum), FIELD(muon_settings, beta2), FIELD(muon_settings, decay), FIELD(muon_settings, step),
        FIELD(muon_settings, margin), FIELD(muon_settings, rows), FIELD(muon_settings, columns), FIELD(muon_settings, matrices),
        FIELD(muon_settings, threads),
        /* clang-format on */
        CONSTANT(SAVE_NOTHING),
        CONSTANT(SAVE_INPUTS),
        CONSTANT(SAVE_ACTIVATIONS),
        CONSTANT(GRADS_PER_WINDOW),
        CONSTANT(GRADS_DEFERRED),
        {0},
    };
    return entries;
}
