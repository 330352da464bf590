// Written from src/shared.rs; a test compares.

#define MAX_EXPERTS 1024
#define EXTENT_FIXED 0
#define EXTENT_ROWS 1
#define EXTENT_OUTPUTS 2
#define ROW_RMS_NORM 0
#define ROW_ROPE 1
#define ROW_SWI_GLU 2
#define ROW_ADD 3
#define ROW_CONCAT 4
#define ROW_SELECT 5
#define ROW_CAST 6
#define ROW_KV_STORE 7
#define ROW_COMBINE 8
#define ROW_ROUTE 9
#define CAST_FROM_F16 1
#define CAST_TO_F16 2
#define CACHE_F32 0
#define CACHE_F16 1
#define CACHE_Q8_0 2
#define ROUTE_SOFTMAX 1
#define ROUTE_RENORMALISE 2

struct RowOp {
    uint64_t a;
    uint64_t b;
    uint64_t out0;
    uint64_t out1;
    uvec3 a_strides;
    uvec3 b_strides;
    uvec3 out_strides;
    uint kind;
    uint width;
    uint width_b;
    uint inner;
    uint inner_extent;
    uint groups_used;
    uint flags;
    float factor;
    uint padding;
};

struct RowsPush {
    uint64_t step;
    uint64_t table;
    uint extent;
    uint fixed_count;
};

struct EmbedPush {
    uint64_t step;
    uint64_t table;
    uint64_t ids;
    uint64_t y;
    uint row_bytes;
    uint width;
    uint vocabulary;
    uint extent;
    uint fixed_count;
    uint padding;
};

struct ProductJob {
    uint64_t w;
    uint64_t x;
    uint64_t y;
    uint64_t ids;
    uint64_t order;
    uint first_group;
    uint m;
    uint k;
    uint w_row;
    uint w_batch;
    uint x_row;
    uint x_choice;
    uint x_batch;
    uint y_row;
    uint y_choice;
    uint y_batch;
    uint used;
    uint matrices;
    uint order_tiles;
    uint extent;
    uint fixed_count;
};

struct ProductPush {
    uint64_t step;
    uint64_t table;
    uint jobs;
    uint first_group;
};

struct GroupPush {
    uint64_t step;
    uint64_t ids;
    uint64_t order;
    uint used;
    uint experts;
    uint width;
    uint order_tiles;
    uint extent;
    uint fixed_count;
};

struct AttentionPush {
    uint64_t step;
    uint64_t q;
    uint64_t cache;
    uint64_t y;
    uint64_t partial;
    uint q_row;
    uint q_head;
    uint heads;
    uint width;
    uint latent;
    uint cache_row;
    uint chunk;
    uint chunks;
    float scale;
    uint first_row;
    uint rows;
    uint padding;
};

struct MergePush {
    uint64_t step;
    uint64_t partial;
    uint64_t y;
    uint heads;
    uint latent;
    uint chunk;
    uint chunks;
};
