// Products of many columns in tiles of shared memory: a work group has a tile of results, for which it brings each unit of
// weights and of activations to shared memory once; each invocation sums a small tile of its own in registers. A shader
// says in what form they lie there, and how what is there is multiplied.

// The tile: rows of weights, columns of activations.
layout(constant_id = 1) const uint ROWS = 64;
layout(constant_id = 2) const uint COLUMNS = 64;

// Those of each invocation.
layout(constant_id = 3) const uint OWN_ROWS = 8;
layout(constant_id = 4) const uint OWN_COLUMNS = 4;

// Whether activations may be loaded four at a time.
layout(constant_id = 5) const uint FOURS = 0;

const uint GROUP_ROWS = ROWS;

#include "product.glsl"

// Invocations along the rows of a tile, and along its columns. What an invocation has lies so far apart.
const uint DOWN = ROWS / OWN_ROWS;
const uint ACROSS = COLUMNS / OWN_COLUMNS;

// Where columns of activations start.
shared uint64_t x[COLUMNS];

// Global, as an array whose size is specialised cannot be a parameter.
float sum[OWN_ROWS * OWN_COLUMNS];

// Brings a unit to shared memory.
void load_weights(ProductJob job, Tile tile, uint first_row, uint unit);
void load_activations(ProductJob job, uint unit);

// Adds the products of what is there to the sums.
void add_products();

void store(ProductJob job, Tile tile, uint first_row) {
    const uint down = gl_LocalInvocationID.x % DOWN, across = gl_LocalInvocationID.x / DOWN;
    [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
        const uint column = across + c * ACROSS;
        if (column < tile.count) {
            FloatsOut y = FloatsOut(column_y(job, tile, tile_column(tile, column)));
            [[unroll]] for (uint r = 0; r < OWN_ROWS; r++) {
                const uint row = first_row + down + r * DOWN;
                if (row < job.m) {
                    y.at[row] = sum[r * OWN_COLUMNS + c];
                }
            }
        }
    }
}

void multiply(ProductJob job, Tile tile, uint first_row) {
    // Nobody reads those of the tile before any more: the last barrier was passed.
    for (uint c = gl_LocalInvocationID.x; c < COLUMNS; c += THREADS) {
        x[c] = column_x(job, tile, tile_column(tile, c));
    }
    [[unroll]] for (uint i = 0; i < OWN_ROWS * OWN_COLUMNS; i++) {
        sum[i] = 0.0;
    }
    barrier();
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        load_weights(job, tile, first_row, unit);
        load_activations(job, unit);
        barrier();
        add_products();
        barrier();
    }
    store(job, tile, first_row);
}
