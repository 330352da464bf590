// What kernels for narrow subgroups, as of devices that run shaders on the CPU, do so that addresses are cheap.

#extension GL_KHR_shader_subgroup_ballot : require
#extension GL_EXT_shader_subgroup_extended_types_int64 : require

// An address that all lanes share, so that the driver can see that they do. What is loaded from there at 32-bit indices then
// takes one register for the address, not a vector of 64-bit ones, which llvmpipe would write to memory for each lane of
// each load.
uint64_t all_lanes(uint64_t address) {
    return subgroupBroadcastFirst(address);
}
