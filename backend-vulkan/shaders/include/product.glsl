// What all matrix products share: jobs, and which columns of activations belong to a tile of COLUMNS.

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

// Tiles of columns. A column is a row of the step, or one of its choices of experts; columns that are grouped by expert
// come from a list that group.comp has written.
uint column_tiles(ProductJob job) {
    if (job.order != 0) {
        return Words(job.order).at[0];
    }
    const uint columns = extent(Step(push.step), job.extent, job.fixed_count) * job.used;
    return (columns + COLUMNS - 1) / COLUMNS;
}

// Where the weights of a tile start, and each of its columns and results. Global, as arrays whose sizes are specialised
// cannot be parameters.
uint64_t weights;
uint64_t x[COLUMNS];
uint64_t y[COLUMNS];

// Sets these for tile `index`; returns how many columns it has.
uint column_tile(ProductJob job, uint index, uint batch) {
    uint first, count, matrix = batch;
    uint64_t list = 0;
    if (job.order != 0) {
        Words entry = Words(job.order + 4 * (1 + 3 * uint64_t(index)));
        matrix = entry.at[0];
        first = 0;
        count = entry.at[2];
        list = job.order + 4 * (1 + 3 * uint64_t(job.order_tiles) + entry.at[1]);
    } else {
        const uint columns = extent(Step(push.step), job.extent, job.fixed_count) * job.used;
        first = index * COLUMNS;
        count = min(COLUMNS, columns - first);
        if (job.ids != 0) {
            matrix = min(Words(job.ids).at[first], job.matrices - 1);
        }
    }
    weights = job.w + uint64_t(matrix) * job.w_batch;
    [[unroll]] for (uint i = 0; i < COLUMNS; i++) {
        uint column = first + min(i, count - 1);
        if (list != 0) {
            column = Words(list).at[column];
        }
        const uint row = column / job.used, choice = column % job.used;
        x[i] = job.x + 4 * (uint64_t(row) * job.x_row + uint64_t(choice) * job.x_choice + uint64_t(batch) * job.x_batch);
        y[i] = job.y + 4 * (uint64_t(row) * job.y_row + uint64_t(choice) * job.y_choice + uint64_t(batch) * job.y_batch);
    }
    return count;
}
