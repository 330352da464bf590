// What all matrix products share: jobs, and tiles of at most COLUMNS columns of activations. A shader says how many rows of
// weights a work group has at once, GROUP_ROWS, and how they are multiplied with a tile.

layout(push_constant, scalar) uniform PushBlock {
    ProductPush push;
};

layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer ProductJobs { ProductJob at[]; };

// The job that workgroup `group` belongs to.
ProductJob find_job(uint group) {
    uint index = 0;
    while (index + 1 < push.jobs && ProductJobs(push.table).at[index + 1].first_group <= group) {
        index++;
    }
    return ProductJobs(push.table).at[index];
}

// Whether columns are grouped by expert. Where they are not, the first words at `order` and `ids` may be read all the same,
// and no others are asked for: a driver may load what a branch asks for before it knows whether the branch is taken.
bool grouped(ProductJob job) {
    return job.order_tiles != 0;
}

// Tiles of columns. A column is a row of the step, or one of its choices of experts; columns that are grouped by expert
// come from a list that group.comp has written.
uint column_tiles(ProductJob job) {
    if (grouped(job)) {
        return Words(job.order).at[0];
    }
    const uint columns = extent(Step(push.step), job.extent, job.fixed_count) * job.used;
    return (columns + COLUMNS - 1) / COLUMNS;
}

// A tile of columns: where its weights start, and its columns, which are neighbours or entries of a list.
struct Tile {
    uint64_t weights;
    bool listed;
    uint64_t list;
    uint first;
    uint count;
    uint batch;
};

// Tile `index`.
Tile column_tile(ProductJob job, uint index, uint batch) {
    Tile tile;
    tile.batch = batch;
    uint matrix = batch;
    const uint entry_at = grouped(job) ? 1 + 3 * index : 0, id_at = job.matrices > 1 ? index * COLUMNS : 0;
    if (grouped(job)) {
        Words entry = Words(job.order + 4 * uint64_t(entry_at));
        matrix = min(entry.at[0], job.matrices - 1);
        tile.first = 0;
        tile.count = entry.at[2];
        tile.listed = true;
        tile.list = job.order + 4 * (1 + 3 * uint64_t(job.order_tiles) + entry.at[1]);
    } else {
        const uint columns = extent(Step(push.step), job.extent, job.fixed_count) * job.used;
        tile.first = index * COLUMNS;
        tile.count = min(COLUMNS, columns - tile.first);
        tile.listed = false;
        tile.list = job.order;
        if (job.matrices > 1) {
            matrix = min(Words(job.ids).at[id_at], job.matrices - 1);
        }
    }
    tile.weights = job.w + uint64_t(matrix) * job.w_batch;
    return tile;
}

// Which column is the `i`th of a tile; past its last one, that one again.
uint tile_column(Tile tile, uint i) {
    const uint column = tile.first + min(i, tile.count - 1);
    const uint entry = Words(tile.list).at[tile.listed ? column : 0];
    return tile.listed ? entry : column;
}

// Where a column of activations starts, and its results.
uint64_t column_x(ProductJob job, Tile tile, uint column) {
    const uint row = column / job.used, choice = column % job.used;
    return job.x
        + 4 * (uint64_t(row) * job.x_row + uint64_t(choice) * job.x_choice + uint64_t(tile.batch) * job.x_batch);
}

uint64_t column_y(ProductJob job, Tile tile, uint column) {
    const uint row = column / job.used, choice = column % job.used;
    return job.y
        + 4 * (uint64_t(row) * job.y_row + uint64_t(choice) * job.y_choice + uint64_t(tile.batch) * job.y_batch);
}

// Where row `row` of a tile's weights starts; past the last one, that one again.
uint64_t weight_row(ProductJob job, Tile tile, uint row) {
    return tile.weights + uint64_t(min(row, job.m - 1)) * job.w_row;
}

// The sum over groups of `lanes` neighbouring lanes, a power of two.
float add_across(float value, uint lanes) {
    // Not every driver unrolls a loop over powers of two.
    [[unroll]] for (uint i = 0; i < 7; i++) {
        if (1 << i < lanes) {
            value += subgroupShuffleXor(value, 1 << i);
        }
    }
    return value;
}

// Writes the products of rows `first_row` to `first_row + GROUP_ROWS - 1`, as far as there are such, with a tile's columns.
void multiply(ProductJob job, Tile tile, uint first_row);

void main() {
    // A dispatch that would take too long comes in pieces.
    const uint group = push.first_group + gl_WorkGroupID.x;
    const ProductJob job = find_job(group);
    const uint local = group - job.first_group;
    const uint row_tiles = (job.m + GROUP_ROWS - 1) / GROUP_ROWS;
    const uint batch = local / row_tiles;
    const uint first_row = local % row_tiles * GROUP_ROWS;
    const uint count = column_tiles(job);
    for (uint index = gl_WorkGroupID.y; index < count; index += gl_NumWorkGroups.y) {
        const Tile tile = column_tile(job, index, batch);
        if (tile.count > 0) {
            multiply(job, tile, first_row);
        }
    }
}
