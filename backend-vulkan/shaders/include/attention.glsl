// What both attention shaders share: which rows and heads a work group has, and where its results go. A shader says how
// many HEADS it has at once, and how it attends.

layout(push_constant, scalar) uniform PushBlock {
    AttentionPush push;
};

// Where the result of a head goes, and what it is divided by there: to the output, by the sum of its weights; or, of a
// chunk of the cache, undivided to the partial results, after its largest score and that sum.
uint64_t result_place(uint row, uint head, uint chunk, float largest, float sum, out float divisor) {
    const uint64_t index = uint64_t(row) * push.heads + head;
    if (push.partial == 0) {
        divisor = sum;
        return push.y + 4 * index * push.latent;
    }
    divisor = 1.0;
    FloatsOut to = FloatsOut(push.partial + 4 * (index * push.chunks + chunk) * (push.latent + 2));
    if (gl_LocalInvocationID.x == 0) {
        to.at[0] = largest;
        to.at[1] = sum;
    }
    return uint64_t(to) + 8;
}

// Writes what HEADS heads from `first_head` on of a row see in a chunk of the cache.
void attend(uint row, uint first_head, uint chunk);

void main() {
    // A dispatch that would take too long comes in pieces.
    const uint own = push.rows == ~0u ? push.rows : push.first_row + push.rows;
    const uint rows = min(Step(push.step).rows, own);
    for (uint row = push.first_row + gl_WorkGroupID.y; row < rows; row += gl_NumWorkGroups.y) {
        attend(row, gl_WorkGroupID.x * HEADS, gl_WorkGroupID.z);
    }
}
